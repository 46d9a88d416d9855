/* cli.force: the ids of forced routing, and how they are asked for. */
#include "../../src/cli/force.h"
#include "support.h"

#include <math.h>
#include <string.h>

static const struct {
    uint32_t tokens, experts, top_k;
} sizes[] = {{1, 1, 1}, {37, 6, 2}, {50, 5, 5}, {9, 300, 40}, {0, 4, 2}, {2000, 11, 3}};

static void release(void *mem) {
    clReleaseMemObject(mem);
}

static cl_mem new_mem(size_t words) {
    cl_int code = CL_SUCCESS;
    cl_mem mem = clCreateBuffer(test.context, CL_MEM_READ_WRITE, (words + 1) * 4, NULL, &code);
    CL_OK(code);
    clean_later(release, mem);
    return mem;
}

/* The ids; the weights are looked at here. */
static int32_t *fill(const forced_routing *forced, uint32_t tokens, uint32_t experts,
                     uint32_t top_k) {
    const size_t pairs = (size_t)tokens * top_k;
    const forced_batch wanted = {tokens, experts, top_k, new_mem(pairs), new_mem(pairs)};
    int32_t *ids = HOST(int32_t, pairs + 1);
    float *weights = HOST(float, pairs + 1);
    const clmoe_status status = force_fill(forced, test.queue, &wanted);
    CHECK(status == CLMOE_SUCCESS, "%s\n", cli_error());
    if (pairs == 0)
        return ids;
    CL_OK(clEnqueueReadBuffer(test.queue, wanted.ids, CL_TRUE, 0, pairs * 4, ids, 0, NULL, NULL));
    CL_OK(clEnqueueReadBuffer(test.queue, wanted.pair_weights, CL_TRUE, 0, pairs * 4, weights, 0,
                              NULL, NULL));
    for (size_t i = 0; i < pairs; i++)
        CHECK(weights[i] == 1.0f / (float)top_k, "weights[%zu] is %g\n", i, (double)weights[i]);
    return ids;
}

/* Every token has K different experts. */
static void check_distinct(const int32_t *ids, uint32_t tokens, uint32_t experts, uint32_t top_k) {
    for (uint32_t t = 0; t < tokens; t++) {
        bool *seen = HOST(bool, experts);
        for (uint32_t k = 0; k < top_k; k++) {
            const int32_t id = ids[(size_t)t * top_k + k];
            CHECK(id >= 0 && (uint32_t)id < experts && !seen[id], "token %u, choice %u: %d\n", t, k,
                  id);
            seen[id] = true;
        }
    }
}

static void round_robin(void **state) {
    (void)state;
    for (size_t n = 0; n < COUNT_OF(sizes); n++) {
        const uint32_t T = sizes[n].tokens, E = sizes[n].experts, K = sizes[n].top_k;
        test_case("%u tokens, %u of %u", T, K, E);
        const forced_routing forced = {.kind = FORCE_ROUND_ROBIN, .seed = 1234567891};
        const int32_t *ids = fill(&forced, T, E, K);
        check_distinct(ids, T, E, K);
        for (size_t i = 0; i < (size_t)T * K; i++)
            CHECK((uint64_t)ids[i] == (1234567891 + i) % E, "ids[%zu] is %d\n", i, ids[i]);
    }
}

static void zipf(void **state) {
    (void)state;
    for (size_t n = 0; n < COUNT_OF(sizes); n++) {
        const uint32_t T = sizes[n].tokens, E = sizes[n].experts, K = sizes[n].top_k;
        test_case("%u tokens, %u of %u", T, K, E);
        const forced_routing forced = {.kind = FORCE_ZIPF, .exponent = 1.2, .seed = 5};
        const int32_t *ids = fill(&forced, T, E, K);
        check_distinct(ids, T, E, K);
        compare_ints("the same seed", ids, fill(&forced, T, E, K), (size_t)T * K);
    }
}

/* The share of the first choices of each expert is that of the law. */
static void shares_of_first_choices(void **state) {
    (void)state;
    enum { T = 20000, E = 9, K = 2 };
    static const double exponents[] = {0.0, 1.0, 2.5, FORCE_MOST_EXPONENT};
    for (size_t n = 0; n < COUNT_OF(exponents); n++) {
        const forced_routing forced = {
            .kind = FORCE_ZIPF, .exponent = exponents[n], .seed = 4294967295u};
        double sum = 0.0, counts[E] = {0.0};
        test_case("exponent %g", exponents[n]);
        const int32_t *ids = fill(&forced, T, E, K);
        for (size_t t = 0; t < T; t++)
            counts[ids[t * K]]++;
        for (int e = 0; e < E; e++)
            sum += pow(e + 1, -exponents[n]);
        for (int e = 0; e < E; e++) {
            const double p = pow(e + 1, -exponents[n]) / sum;
            const double off = fabs(counts[e] - T * p);
            CHECK(off <= 5 * sqrt(T * p * (1 - p)) + 1, "expert %d: %g of %d, share %g\n", e,
                  counts[e], T, p);
        }
    }
}

static void texts(void **state) {
    (void)state;
    static const struct {
        const char *text, *again; /* NULL: refused */
    } cases[] = {{"round-robin", "round-robin, seed 3"},
                 {"zipf", "zipf:1, seed 3"},
                 {"zipf:0", "zipf:0, seed 3"},
                 {"zipf:1.25", "zipf:1.25, seed 3"},
                 {"zipf:16", "zipf:16, seed 3"},
                 {"zipf:16.1", NULL},
                 {"zipf:-1", NULL},
                 {"zipf:", NULL},
                 {"zipf:nan", NULL},
                 {"zip", NULL},
                 {"round-robin:2", NULL},
                 {"", NULL}};
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        forced_routing forced = {.seed = 3};
        problem why = {""};
        char text[64];
        const bool right = force_parse("--option", cases[i].text, &forced, &why);
        CHECK(right == (cases[i].again != NULL), "'%s': %s\n", cases[i].text, why.text);
        if (!right) {
            CHECK(strstr(why.text, "--option is '") != NULL, "%s\n", why.text);
            continue;
        }
        force_text(&forced, text, sizeof text);
        assert_string_equal(text, cases[i].again);
    }
}

static void more_than_there_are(void **state) {
    (void)state;
    const forced_routing forced = {.kind = FORCE_ZIPF, .exponent = 1.0};
    const forced_batch wanted = {3, 4, 5, new_mem(15), new_mem(15)};
    const clmoe_status status = force_fill(&forced, test.queue, &wanted);
    CHECK(status == CLMOE_UNSUPPORTED && strstr(cli_error(), "5 of 4"), "%s\n", cli_error());
}

int main(void) {
    const struct CMUnitTest tests[] = {TEST(round_robin), TEST(zipf), TEST(shares_of_first_choices),
                                       TEST(texts), TEST(more_than_there_are)};
    return RUN(tests);
}
