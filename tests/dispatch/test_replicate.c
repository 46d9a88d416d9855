/* replicate: ids of experts -> slots of their copies, exact; and a layer whose experts are these.
 */
#include "ref_place.h"
#include "support.h"
#include "support_balance.h"

#include <math.h>
#include <string.h>

/* A batch of choices, the layer's plan of them, and a placement by their load. */
typedef struct rig {
    clmoe_layer_desc desc;
    clmoe_layer *layer;
    ref_plan_in in;
    const ref_plan *plan;
    ref_place_shape place;
    uint32_t max_copies;
    double *load;                    /* [E] */
    int32_t *slots, *table, *copies; /* [P], [E, max_copies], [E] */
    double before, after;
    clmoe_replicate_args args;
} rig;

/* Ids that are none among them. */
static void spoil_ids(rig *r) {
    const size_t pairs = (size_t)r->in.tokens * r->desc.top_k;
    int32_t *ids = HOST(int32_t, pairs);
    memcpy(ids, r->in.ids, pairs * sizeof *ids);
    for (size_t p = 0; p < pairs; p += 1 + random_below(9))
        ids[p] = random_below(2) ? -1 - (int32_t)random_below(3)
                                 : (int32_t)(ref_columns(&r->desc) + random_below(2));
    r->in.ids = ids;
}

static void place(rig *r, uint32_t devices) {
    const uint32_t E = r->desc.num_experts, each = (E + devices - 1) / devices;
    r->place = (ref_place_shape){E, (each + 1) * devices, 1, 1, devices};
    const uint32_t P = r->place.replicas;
    r->max_copies = P - E + 1;
    r->load = HOST(double, E);
    r->slots = HOST(int32_t, P);
    r->table = HOST(int32_t, (size_t)E * r->max_copies);
    r->copies = HOST(int32_t, E);
    for (uint32_t e = 0; e < E; e++)
        r->load[e] = r->plan->load[e];
    const clmoe_place_args args = {.struct_size = sizeof args,
                                   .layers = 1,
                                   .experts = E,
                                   .replicas = P,
                                   .devices = devices,
                                   .load = r->load,
                                   .physical_to_logical = r->slots,
                                   .logical_to_physical = r->table,
                                   .copies = r->copies,
                                   .balance_before = &r->before,
                                   .balance_after = &r->after};
    OK(clmoe_place(&args));
}

/* From in.tokens and in.ids on. */
static void rig_make(rig *r, uint32_t group_size, uint32_t devices) {
    clmoe_plan_layout layout;
    r->layer = test_layer(group_size, &r->desc);
    const clmoe_buf plan = plan_run(r->layer, &r->desc, &r->in, &layout);
    r->plan = plan_reference(&r->desc, &r->in);
    place(r, devices);
    const size_t pairs = layout.pairs, E = r->desc.num_experts;
    r->args = (clmoe_replicate_args){
        .struct_size = sizeof r->args,
        .tokens = r->in.tokens,
        .replicas = r->place.replicas,
        .max_copies = r->max_copies,
        .ids = buf_of(r->in.ids, pairs * 4),
        .plan = plan,
        .copies = buf_of(r->copies, E * 4),
        .logical_to_physical = buf_of(r->table, E * r->max_copies * 4),
        .physical_ids = buf_new(pairs * 4),
    };
    OK(clmoe_replicate(r->layer, test.queue, &r->args, 0, NULL, NULL));
}

/* want [pairs]: by the ranks of pairs, or with a capacity by their rows. */
static int32_t *wanted(const rig *r) {
    const uint32_t K = r->desc.top_k, E = r->desc.num_experts;
    const bool dropless = r->desc.capacity.rows == 0 && r->desc.capacity.factor <= 0;
    int32_t *want = HOST(int32_t, (size_t)r->in.tokens * K);
    uint32_t *ranks = HOST(uint32_t, E);
    for (size_t p = 0; p < (size_t)r->in.tokens * K; p++) {
        const uint32_t t = (uint32_t)(p / K), k = (uint32_t)(p % K);
        const int32_t e = r->in.ids[p];
        const bool real = (!r->in.live || (int32_t)k < r->in.live[t]) &&
                          (!r->in.token_mask || r->in.token_mask[t]) && e >= 0 &&
                          (uint32_t)e < ref_columns(&r->desc);
        want[p] = -1;
        if (real && (uint32_t)e >= E) {
            want[p] = (int32_t)(r->place.replicas + (uint32_t)e - E);
        } else if (real && (dropless || r->plan->slot_of[p] >= 0)) {
            uint32_t rank =
                dropless ? ranks[e]++ : (uint32_t)r->plan->slot_of[p] - r->plan->offsets[e];
            uint32_t copy = rank % (uint32_t)r->copies[e];
            want[p] = r->table[(size_t)e * r->max_copies + copy];
        }
    }
    return want;
}

/* Sizes, patterns and group sizes; dropless, and by keep rules where rows are other ranks. */
static void every_pair(void **state) {
    (void)state;
    static const shape shapes[] = {
        {1, 5, 3, 0, 1, 3}, {64, 5, 8, 2, 3, 3}, {1000, 5, 60, 4, 4, 3}, {333, 5, 205, 0, 16, 3}};
    for (uint32_t n = 0; n < 9 * COUNT_OF(shapes); n++) {
        const uint32_t group_size = group_sizes[n % COUNT_OF(group_sizes)];
        const uint32_t i = n / 3 % COUNT_OF(shapes);
        const pattern kind = (pattern)((n + n / 12) % PATTERN_COUNT);
        rig r = {.desc = desc_of(&shapes[i])};
        test_case("group size %u, T %u, E %u, %s", group_size, shapes[i].tokens, shapes[i].experts,
                  pattern_name(kind));
        seed_set(n);
        r.desc.capacity.factor = n / 3 % 3 == 2 ? 0.7 : 0.0;
        r.desc.capacity.keep = CLMOE_KEEP_WEIGHT;
        route_random(&r.desc, shapes[i].tokens, kind, &r.in);
        r.in.token_mask = random_below(2) ? random_mask(shapes[i].tokens) : NULL;
        spoil_ids(&r);
        rig_make(&r, group_size, 1 + i * 2);
        compare_ints("physical_ids", buf_get(r.args.physical_ids), wanted(&r),
                     (size_t)shapes[i].tokens * shapes[i].top_k);
    }
}

/* Tables that no plan has give no slot, and none out of range. */
static void bad_tables(void **state) {
    (void)state;
    test_case("bad tables");
    rig r = {.desc = desc_of(&(shape){64, 5, 4, 0, 1, 3})};
    seed_set(5);
    route_random(&r.desc, 64, PATTERN_UNIFORM, &r.in);
    rig_make(&r, 0, 2);
    const int32_t P = (int32_t)r.place.replicas, most = (int32_t)r.max_copies;
    const int32_t copies[] = {0, -7, 1000000, most};
    int32_t *want = HOST(int32_t, 64);
    for (int32_t i = 0; i < 4 * most; i++)
        r.table[i] = i / most < 3 ? i % most : i % 2 ? -5 : P + i;
    buf_write(r.args.copies, copies, sizeof copies);
    buf_write(r.args.logical_to_physical, r.table, 4 * (size_t)most * 4);
    OK(clmoe_replicate(r.layer, test.queue, &r.args, 0, NULL, NULL));
    int32_t rank = 0;
    for (size_t p = 0; p < 64; p++)
        want[p] = r.in.ids[p] == 2 ? rank++ % most : -1;
    CHECK(rank > most, "only %d pairs\n", (int)rank);
    compare_ints("physical_ids", buf_get(r.args.physical_ids), want, 64);
}

/* load [R] of a layer's statistics of ids. */
static const uint32_t *load_of(clmoe_layer *layer, uint32_t tokens, clmoe_buf ids, clmoe_buf plan,
                               clmoe_stats *header) {
    const clmoe_stats_args args = {.struct_size = sizeof args,
                                   .tokens = tokens,
                                   .ids = ids,
                                   .plan = plan,
                                   .scratch = scratch_of(layer, tokens),
                                   .stats = buf_new(stats_size(layer))};
    OK(clmoe_stats_compute(layer, test.queue, &args, 0, NULL, NULL));
    const clmoe_stats *stats = buf_get(args.stats);
    *header = *stats;
    return (const uint32_t *)(stats + 1);
}

/* Statistics of experts and of copies, and what devices get: as the plan said, to the pair. */
static void statistics(void **state) {
    (void)state;
    enum { T = 1000, E = 24, DEVICES = 8 };
    test_case("statistics");
    rig r = {.desc = desc_of(&(shape){T, 5, E, 0, 4, 3})};
    clmoe_stats of_experts, of_copies;
    clmoe_plan_layout layout;
    seed_set(11);
    r.desc.balance.enabled = 1;
    route_random(&r.desc, T, PATTERN_ZIPF, &r.in);
    rig_make(&r, 0, DEVICES);
    const uint32_t P = r.place.replicas, each = P / DEVICES;
    clmoe_layer_desc second = r.desc;
    second.num_experts = P;
    clmoe_layer *layer = test_layer(0, &second);
    ref_plan_in in = {.tokens = T, .ids = buf_get(r.args.physical_ids), .live = r.in.live};
    const clmoe_buf plan = plan_run(layer, &second, &in, &layout);
    const uint32_t *load = load_of(r.layer, T, r.args.ids, r.args.plan, &of_experts);
    const uint32_t *copy_load = load_of(layer, T, r.args.physical_ids, plan, &of_copies);
    compare_ints("load of experts", load, r.plan->load, E);
    uint32_t *want = HOST(uint32_t, P);
    for (uint32_t e = 0; e < E; e++)
        for (uint32_t i = 0; i < (uint32_t)r.copies[e]; i++)
            want[r.table[e * r.max_copies + i]] =
                load[e] / (uint32_t)r.copies[e] + (i < load[e] % (uint32_t)r.copies[e]);
    compare_ints("load of copies", copy_load, want, P);
    CHECK(of_copies.invalid_ids == 0 && of_copies.pairs == of_experts.pairs, "%u of %u pairs\n",
          of_copies.pairs, of_experts.pairs);
    uint32_t most = 0, row_most = 0;
    for (uint32_t d = 0; d < DEVICES; d++) {
        uint32_t sum = 0, row = 0;
        for (uint32_t s = d * each; s < (d + 1) * each; s++)
            sum += copy_load[s];
        for (uint32_t e = d * (E / DEVICES); e < (d + 1) * (E / DEVICES); e++)
            row += load[e];
        most = sum > most ? sum : most;
        row_most = row > row_most ? row : row_most;
    }
    const double mean = of_experts.pairs / (double)DEVICES;
    print_message("devices, largest / mean: %.3f in a row, %.3f placed; the plan said %.3f, %.3f\n",
                  row_most / mean, most / mean, r.before, r.after);
    CHECK(fabs(row_most / mean - r.before) < 1e-12, "before is %g\n", r.before);
    CHECK(fabs(most / mean - r.after) <= each / mean && r.after < 0.7 * r.before,
          "%g after %g, and on the device %g\n", r.after, r.before, most / mean);
}

/* Matrices of experts, each in the slots of its copies. */
static float *spread(const float *matrices, const int32_t *slots, uint32_t P, size_t size) {
    float *out = HOST(float, P *size);
    for (uint32_t s = 0; s < P; s++)
        memcpy(out + s * size, matrices + (size_t)slots[s] * size, size * sizeof *out);
    return out;
}

/* The second layer, with the weights of each slot's expert, gives what the first one gives. */
static void forward(void **state) {
    (void)state;
    const shape s = {65, 9, 10, 2, 3, 7};
    test_case("a forward of the copies");
    rig r = {.desc = desc_of(&s)};
    batch first, second;
    device_batch of_first, of_second;
    seed_set(7);
    r.desc.experts.gate_layout = CLMOE_GATE_NONE;
    r.desc.experts.activation = CLMOE_ACT_RELU2;
    route_random(&r.desc, s.tokens, PATTERN_ZIPF, &r.in);
    r.in.live = NULL;
    rig_make(&r, 0, 4);
    batch_make(&first, &r.desc, s.tokens);
    first.in.ids_in = r.in.ids;
    first.in.pair_weights_in = random_floats((size_t)s.tokens * s.top_k, 1.0);
    batch_upload(r.layer, &first, &of_first);
    OK(clmoe_forward(r.layer, test.queue, &of_first.args, 0, NULL, NULL));
    second = first;
    const uint32_t P = r.place.replicas;
    const size_t size = (size_t)s.hidden_dim * s.dim;
    second.desc.num_experts = P;
    second.weights = weights_make(&second.desc);
    second.weights.experts.up = spread(first.weights.experts.up, r.slots, P, size);
    second.weights.experts.down = spread(first.weights.experts.down, r.slots, P, size);
    second.in.ids_in = buf_get(r.args.physical_ids);
    clmoe_layer *layer = test_layer(0, &second.desc);
    batch_upload(layer, &second, &of_second);
    OK(clmoe_forward(layer, test.queue, &of_second.args, 0, NULL, NULL));
    const size_t n = (size_t)s.tokens * s.dim;
    compare_floats("y", buf_get(of_second.args.y), batch_reference(&first)->y, n,
                   FORWARD_TOLERANCE);
    compare_bits("y", buf_get(of_second.args.y), buf_get(of_first.args.y), n * sizeof(float));
}

static void errors(void **state) {
    (void)state;
    test_case("errors");
    rig r = {.desc = desc_of(&(shape){6, 5, 8, 2, 2, 3})};
    route_random(&r.desc, 6, PATTERN_UNIFORM, &r.in);
    rig_make(&r, 0, 4);
    buf_poison(r.args.physical_ids);
#define REFUSED(field, bad, text)                                                                  \
    do {                                                                                           \
        clmoe_replicate_args args = r.args;                                                        \
        args.field = bad;                                                                          \
        check_error(clmoe_replicate(r.layer, test.queue, &args, 0, NULL, NULL),                    \
                    CLMOE_INVALID_ARGUMENT, #field, text);                                         \
    } while (0)
    REFUSED(replicas, 7, "7");
    REFUSED(replicas, 4095, "4095");
    REFUSED(max_copies, 0, "0");
    REFUSED(max_copies, r.args.replicas + 1, "13");
    REFUSED(reserved, 3, "3");
    CHECK(buf_untouched(r.args.physical_ids), "an error wrote ids\n");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(every_pair), TEST(bad_tables), TEST(statistics), TEST(forward), TEST(errors),
    };
    return RUN(tests);
}
