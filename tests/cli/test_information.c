/*
 * Mutual information against values by hand, and against H(X) + H(Y) - H(X, Y) from a list of
 * pairs; the baseline against the bias that Miller (1955) gives.
 */
#include "../../src/cli/train/information.h"

#include "support.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { EXPERTS = 6, KINDS = 5, TOKENS = 20000, MOST_EACH = 3 };

static void close_to(double got, double want, double bound) {
    CHECK(fabs(got - want) <= bound, "%.17g is not %.17g\n", got, want);
}

/* ---- By hand --------------------------------------------------------------------------------- */

static void entropies(void **state) {
    (void)state;
    close_to(entropy_bits((const uint64_t[]){7, 7}, 2), 1, 1e-15);
    close_to(entropy_bits((const uint64_t[]){1, 1, 2}, 3), 1.5, 1e-15);
    close_to(entropy_bits((const uint64_t[]){3, 3, 3, 3, 0}, 5), 2, 1e-15);
    close_to(entropy_bits((const uint64_t[]){1, 3}, 2), 0.81127812445913286, 1e-15);
    close_to(entropy_bits((const uint64_t[]){0, 9}, 2), 0, 0);
    close_to(entropy_bits((const uint64_t[]){0, 0}, 2), 0, 0);
    const uint64_t large[] = {(uint64_t)1 << 40, (uint64_t)1 << 40};
    close_to(entropy_bits(large, 2), 1, 1e-15);
}

static void tables(void **state) {
    (void)state;
    close_to(mutual_bits((const uint64_t[]){2, 0, 0, 2}, 2, 2), 1, 1e-15);
    close_to(mutual_bits((const uint64_t[]){1, 1, 1, 1}, 2, 2), 0, 0);
    close_to(mutual_bits((const uint64_t[]){3, 1, 1, 3}, 2, 2), 0.18872187554086714, 1e-15);
    /* A label that no expert has, an expert without pairs. */
    close_to(mutual_bits((const uint64_t[]){4, 0, 0, 0, 0, 0, 0, 0, 4}, 3, 3), 1, 1e-15);
    close_to(mutual_bits((const uint64_t[]){0, 0, 0, 0}, 2, 2), 0, 0);
    /* Rows that merge labels: three of four equal ones apart from two. */
    close_to(mutual_bits((const uint64_t[]){1, 1, 0, 0, 0, 0, 1, 1}, 2, 4), 1, 1e-15);
    close_to(mutual_bits((const uint64_t[]){5, 0, 0, 0, 0, 5, 5, 5}, 2, 4), 0.81127812445913286,
             1e-15);
}

/* Rows in proportion tell nothing, and rounding makes nothing negative. */
static void never_negative(void **state) {
    (void)state;
    seed_set(13);
    for (uint32_t round = 0; round < 1000; round++) {
        const uint64_t row[] = {random_below(99), random_below(99), 1 + random_below(99)};
        const uint64_t a = 1 + random_below(99), b = 1 + random_below(99);
        const uint64_t table[] = {a * row[0], a * row[1], a * row[2],
                                  b * row[0], b * row[1], b * row[2]};
        const double bits = mutual_bits(table, 2, 3);
        CHECK(bits >= 0 && bits < 1e-14, "%g bits in round %u\n", bits, (unsigned)round);
    }
}

/* ---- Choices --------------------------------------------------------------------------------- */

static uint32_t first[TOKENS + 1];
static uint16_t chosen[TOKENS * MOST_EACH];
static uint8_t label_of[TOKENS];
static const token_labels labels = {label_of, KINDS};
static const choices layer = {TOKENS, EXPERTS, first, chosen};

/* Labels by chance, some more often than others. */
static void draw_labels(void) {
    for (uint32_t t = 0; t < TOKENS; t++)
        label_of[t] = (uint8_t)random_below(1 + random_below(KINDS));
}

/* `each` experts by chance for every token, or 0 to 3; with `tied` mostly by its label. */
static void draw_choices(uint32_t each, bool tied) {
    for (uint32_t t = 0; t < TOKENS; t++) {
        const uint32_t count = each > 0 ? each : random_below(MOST_EACH + 1);
        const uint32_t base = tied && random_below(3) > 0 ? label_of[t] : random_below(EXPERTS);
        first[t + 1] = first[t] + count;
        for (uint32_t k = 0; k < count; k++)
            chosen[first[t] + k] = (uint16_t)((base + k) % EXPERTS);
    }
}

/* The oracle: entropy of what `key` makes of every pair. */
static double entropy_of(uint32_t by_expert, uint32_t by_label) {
    double count[EXPERTS * KINDS] = {0}, bits = 0;
    for (uint32_t t = 0; t < TOKENS; t++)
        for (uint32_t i = first[t]; i < first[t + 1]; i++)
            count[chosen[i] * by_expert + label_of[t] * by_label] += 1;
    const double all = first[TOKENS];
    for (uint32_t i = 0; i < EXPERTS * KINDS; i++)
        bits += count[i] > 0 ? count[i] / all * log(all / count[i]) / log(2) : 0;
    return bits;
}

/* The layer's numbers, with its counts in pairs. */
static information measure(uint64_t seed, uint64_t *pairs) {
    information about;
    uint64_t *const layers[] = {pairs};
    assert_int_equal(information_measure(&layer, 1, &labels, seed, layers, &about), CLMOE_SUCCESS);
    return about;
}

static void against_the_oracle(void **state) {
    (void)state;
    uint64_t pairs[EXPERTS * KINDS];
    for (uint32_t round = 0; round < 6; round++) {
        seed_set(round + 1);
        draw_labels();
        draw_choices(round % 3, round >= 3);
        const information got = measure(round, pairs);
        const double experts = entropy_of(1, 0), kinds = entropy_of(0, 1);
        const double want = experts + kinds - entropy_of(1, EXPERTS);
        close_to(got.mutual, want, 1e-12);
        close_to(got.expert_entropy, experts, 1e-12);
        close_to(got.label_entropy, kinds, 1e-12);
        close_to(got.normalised, want / kinds, 1e-12);
        uint64_t sum = 0;
        for (uint32_t i = 0; i < EXPERTS * KINDS; i++)
            sum += pairs[i];
        assert_int_equal(sum, first[TOKENS]);
    }
}

/*
 * With K experts per token the mean over permutations is (E - K) (kinds - 1) / (2 ln 2 pairs); for
 * K = 1 it is chi-squared, of that many degrees of freedom.
 */
static void independent_labels_have_the_baseline(void **state) {
    (void)state;
    uint64_t pairs[EXPERTS * KINDS];
    seed_set(77);
    draw_labels();
    for (uint32_t each = 1; each <= MOST_EACH; each++) {
        draw_choices(each, false);
        const information got = measure(5, pairs);
        const double df = (EXPERTS - each) * (KINDS - 1), unit = 1 / (2 * log(2) * TOKENS * each);
        CHECK(fabs(got.mutual - got.shuffled) < 5 * got.deviation, "%g is far from %g +- %g\n",
              got.mutual, got.shuffled, got.deviation);
        close_to(got.shuffled, df * unit, 0.35 * df * unit);
        if (each == 1)
            close_to(got.deviation, sqrt(2 * df) * unit, 0.6 * sqrt(2 * df) * unit);
    }
}

static void experts_that_are_labels(void **state) {
    (void)state;
    uint64_t pairs[EXPERTS * KINDS];
    seed_set(3);
    draw_labels();
    draw_choices(1, false);
    for (uint32_t t = 0; t < TOKENS; t++)
        chosen[t] = (uint16_t)(EXPERTS - 1 - label_of[t]);
    information got = measure(1, pairs);
    close_to(got.mutual, got.label_entropy, 1e-12);
    close_to(got.normalised, 1, 1e-12);
    assert_true(got.shuffled < 0.01 * got.mutual);
    /* Labels that share an expert: all that can be known of them is the expert. */
    for (uint32_t t = 0; t < TOKENS; t++)
        chosen[t] = label_of[t] / 2;
    got = measure(1, pairs);
    close_to(got.mutual, got.expert_entropy, 1e-12);
    assert_true(got.mutual < 0.95 * got.label_entropy);
    /* One expert for all tells nothing, by chance too. */
    memset(chosen, 0, sizeof chosen);
    got = measure(1, pairs);
    close_to(got.mutual + got.shuffled + got.deviation + got.expert_entropy, 0, 1e-12);
}

static void nothing_to_count(void **state) {
    (void)state;
    uint64_t pairs[EXPERTS * KINDS];
    uint64_t *const layers[] = {pairs};
    information got;
    draw_labels();
    memset(first, 0, sizeof first);
    got = measure(1, pairs);
    close_to(got.mutual + got.normalised + got.shuffled + got.deviation, 0, 0);
    const choices none = {0, EXPERTS, first, chosen};
    assert_int_equal(information_measure(&none, 1, &labels, 1, layers, &got), CLMOE_SUCCESS);
    close_to(got.label_entropy + got.expert_entropy + got.mutual, 0, 0);
}

/* ---- Shuffles -------------------------------------------------------------------------------- */

static void shuffles_are_seeded_permutations(void **state) {
    (void)state;
    static uint8_t kept[TOKENS], once[TOKENS];
    uint32_t before[KINDS] = {0}, after[KINDS] = {0};
    seed_set(9);
    draw_labels();
    memcpy(kept, label_of, TOKENS);
    shuffle_labels(&labels, TOKENS, 4, 0);
    memcpy(once, label_of, TOKENS);
    assert_memory_not_equal(once, kept, TOKENS);
    for (uint32_t t = 0; t < TOKENS; t++) {
        before[kept[t]]++;
        after[once[t]]++;
    }
    assert_memory_equal(before, after, sizeof before);
    memcpy(label_of, kept, TOKENS);
    shuffle_labels(&labels, TOKENS, 4, 0);
    assert_memory_equal(label_of, once, TOKENS);
    memcpy(label_of, kept, TOKENS);
    shuffle_labels(&labels, TOKENS, 4, 1);
    assert_memory_not_equal(label_of, once, TOKENS);
    memcpy(label_of, kept, TOKENS);
    shuffle_labels(&labels, TOKENS, 5, 0);
    assert_memory_not_equal(label_of, once, TOKENS);
}

/* Each order of three labels as often as every other: within 5 deviations of 29. */
static void every_order_is_as_likely(void **state) {
    (void)state;
    uint32_t orders[27] = {0}, seen = 0;
    for (uint32_t draw = 0; draw < 6000; draw++) {
        uint8_t three[] = {0, 1, 2};
        shuffle_labels(&(token_labels){three, 3}, 3, 11, draw);
        orders[three[0] * 9 + three[1] * 3 + three[2]]++;
    }
    for (uint32_t i = 0; i < 27; i++) {
        seen += orders[i] > 0;
        CHECK(orders[i] == 0 || (orders[i] > 855 && orders[i] < 1145), "order %u came %u times\n",
              (unsigned)i, (unsigned)orders[i]);
    }
    assert_int_equal(seen, 6);
}

static void same_seed_same_numbers(void **state) {
    (void)state;
    uint64_t pairs[EXPERTS * KINDS];
    seed_set(21);
    draw_labels();
    draw_choices(2, true);
    const information a = measure(8, pairs), b = measure(8, pairs), c = measure(9, pairs);
    assert_memory_equal(&a, &b, sizeof a);
    assert_true(a.mutual == c.mutual && a.shuffled != c.shuffled);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(entropies),
        cmocka_unit_test(tables),
        cmocka_unit_test(never_negative),
        cmocka_unit_test(against_the_oracle),
        cmocka_unit_test(independent_labels_have_the_baseline),
        cmocka_unit_test(experts_that_are_labels),
        cmocka_unit_test(nothing_to_count),
        cmocka_unit_test(shuffles_are_seeded_permutations),
        cmocka_unit_test(every_order_is_as_likely),
        cmocka_unit_test(same_seed_same_numbers),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
