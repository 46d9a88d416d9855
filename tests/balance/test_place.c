/* clmoe_place() against the plain rule, and against what place.h says of a plan. */
#include "ref_place.h"
#include "support.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* One layer: its shape and load, and what the call makes of it. */
typedef struct place_case {
    ref_place_shape shape;
    double *load;
    uint32_t max_copies;
    int32_t *slots, *slots_of, *copies; /* [P], [E, max_copies], [E] */
    double before, after;
    uint32_t moves, doubles;
} place_case;

static place_case case_of(const ref_place_shape *sizes) {
    place_case c = {.shape = *sizes, .max_copies = sizes->replicas - sizes->experts + 1};
    c.load = HOST(double, sizes->experts);
    c.slots = HOST(int32_t, sizes->replicas);
    c.slots_of = HOST(int32_t, (size_t)sizes->experts * c.max_copies);
    c.copies = HOST(int32_t, sizes->experts);
    return c;
}

static clmoe_place_args args_of(place_case *c) {
    return (clmoe_place_args){.struct_size = sizeof(clmoe_place_args),
                              .layers = 1,
                              .experts = c->shape.experts,
                              .replicas = c->shape.replicas,
                              .devices = c->shape.devices,
                              .nodes = c->shape.nodes,
                              .groups = c->shape.groups,
                              .max_copies = c->max_copies,
                              .load = c->load,
                              .physical_to_logical = c->slots,
                              .logical_to_physical = c->slots_of,
                              .copies = c->copies,
                              .balance_before = &c->before,
                              .balance_after = &c->after,
                              .moves = &c->moves,
                              .doubles = &c->doubles};
}

/* As Zipf has it, whole numbers, the experts in a random order. */
static void zipf_load(place_case *c) {
    static const double exponents[] = {0.3, 0.7, 1.0, 1.3};
    const double exponent = exponents[random_below(COUNT_OF(exponents))];
    const uint32_t n = c->shape.experts;
    for (uint32_t e = 0; e < n; e++) {
        const uint32_t other = random_below(e + 1);
        c->load[e] = c->load[other];
        c->load[other] = floor(1e4 * pow(e + 1, -exponent) * (0.5 + random_unit()));
    }
}

/* One case in eight has more slots per device than a node has experts, or almost. */
static ref_place_shape random_shape(void) {
    static const uint32_t nodes[] = {1, 1, 2, 4}, devices[] = {2, 3, 4, 8, 16};
    ref_place_shape s = {.nodes = nodes[random_below(4)]};
    const uint32_t each = devices[random_below(5)], crowded = random_below(8) == 0;
    s.groups = random_below(4) == 0 ? 1 + random_below(4) : s.nodes * (1 + random_below(4));
    s.devices = s.nodes * each;
    const uint32_t size = 1 + random_below(crowded ? 3 : 16);
    s.experts = s.groups * size;
    const uint32_t least = (s.experts + s.devices - 1) / s.devices;
    s.replicas = s.devices * (least + random_below(crowded ? 4 : 3));
    return s;
}

/* What holds for every plan. */
static void check_plan(const place_case *c, const int32_t *previous) {
    const ref_place_shape *s = &c->shape;
    uint32_t *copies = HOST(uint32_t, s->experts);
    for (uint32_t slot = 0; slot < s->replicas; slot++) {
        const int32_t e = c->slots[slot];
        CHECK(e >= 0 && (uint32_t)e < s->experts, "slot %u has %d\n", slot, (int)e);
        const int32_t at = c->slots_of[(size_t)e * c->max_copies + copies[e]++];
        CHECK(at == (int32_t)slot, "expert %d: slot %d, not %u\n", (int)e, (int)at, slot);
    }
    for (uint32_t e = 0; e < s->experts; e++) {
        CHECK(copies[e] > 0 && (int32_t)copies[e] == c->copies[e], "%u copies of %u, told %d\n",
              copies[e], e, (int)c->copies[e]);
        for (uint32_t i = copies[e]; i < c->max_copies; i++)
            CHECK(c->slots_of[(size_t)e * c->max_copies + i] == -1, "expert %u: no -1\n", e);
    }
    const double balance = ref_place_balance(s, c->load, c->slots);
    CHECK(fabs(balance - c->after) <= 1e-12 * balance, "after is %g, not %g\n", c->after, balance);
    const uint32_t moves = previous ? ref_place_moves(s, previous, c->slots) : 0;
    CHECK(c->moves == moves, "moves is %u, not %u\n", c->moves, moves);
    const uint32_t doubles = ref_place_doubles(s, c->slots);
    CHECK(c->doubles == doubles, "doubles is %u, not %u\n", c->doubles, doubles);
}

/* Groups stay on one node each. */
static void check_groups(const place_case *c) {
    const ref_place_shape *s = &c->shape;
    const uint32_t nodes = ref_place_nodes(s), size = s->experts / s->groups;
    int32_t *node_of = HOST(int32_t, s->groups);
    for (uint32_t slot = 0; slot < s->replicas && nodes > 1; slot++) {
        const uint32_t group = (uint32_t)c->slots[slot] / size;
        const int32_t node = (int32_t)(slot / (s->replicas / nodes)) + 1;
        CHECK(node_of[group] == 0 || node_of[group] == node, "group %u on two nodes\n", group);
        node_of[group] = node;
    }
}

/* Spare slots go where the plain rule puts them, where no expert has more copies than devices. */
static void check_copies(const place_case *c, const int32_t *plain) {
    const ref_place_shape *s = &c->shape;
    const uint32_t devices = s->devices / ref_place_nodes(s);
    int32_t *copies = HOST(int32_t, s->experts), most = 0;
    for (uint32_t slot = 0; slot < s->replicas; slot++) {
        copies[plain[slot]]++;
        most = copies[plain[slot]] > most ? copies[plain[slot]] : most;
    }
    if ((uint32_t)most <= devices)
        compare_ints("copies", c->copies, copies, s->experts);
}

/* E experts in a row, without copies. */
static double row_balance(const place_case *c) {
    const ref_place_shape *s = &c->shape;
    double *sum = HOST(double, s->devices), most = 0, total = 0;
    for (uint32_t e = 0; e < s->experts; e++)
        sum[e * s->devices / s->experts] += c->load[e];
    for (uint32_t d = 0; d < s->devices; d++) {
        most = sum[d] > most ? sum[d] : most;
        total += sum[d];
    }
    return total > 0 ? most * s->devices / total : 0;
}

/* ---- Cases ---------------------------------------------------------------------------------- */

/* The vector of EPLB's own example. */
static void plain_vector(void **state) {
    (void)state;
    static const double load[] = {90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86};
    static const int32_t want[] = {5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1};
    test_case("the example");
    place_case c = case_of(&(ref_place_shape){12, 16, 4, 2, 8});
    int32_t plain[16];
    memcpy(c.load, load, sizeof load);
    ref_place_plain(&c.shape, load, plain);
    compare_ints("the plain rule", plain, want, 16);
    const double even = ref_place_balance(&c.shape, load, plain);
    CHECK(fabs(even - 1.208) < 5e-4, "its balance is %g\n", even);
    clmoe_place_args args = args_of(&c);
    OK(clmoe_place(&args));
    check_plan(&c, NULL);
    check_groups(&c);
    check_copies(&c, plain);
    CHECK(c.after <= even && c.doubles == 0, "%g, %u doubles\n", c.after, c.doubles);
    print_message("the example: plain rule %.4f, ours %.4f\n", even, c.after);
}

enum { DRAWS = 1000 };

static void random_loads(void **state) {
    (void)state;
    double ours = 0, theirs = 0;
    uint32_t avoidable = 0, worse = 0, better = 0;
    seed_set(20261201);
    for (uint32_t draw = 0; draw < DRAWS; draw++) {
        const ref_place_shape sizes = random_shape();
        test_case("draw %u: %u experts, %u replicas, %u groups, %u nodes, %u devices", draw,
                  sizes.experts, sizes.replicas, sizes.groups, sizes.nodes, sizes.devices);
        place_case c = case_of(&sizes), again = case_of(&sizes);
        int32_t *plain = HOST(int32_t, sizes.replicas);
        clmoe_place_args args = args_of(&c), args_again = args_of(&again);
        zipf_load(&c);
        again.load = c.load;
        args_again.load = c.load;
        OK(clmoe_place(&args));
        OK(clmoe_place(&args_again));
        compare_ints("the same again", again.slots, c.slots, sizes.replicas);
        ref_place_plain(&sizes, c.load, plain);
        check_plan(&c, NULL);
        check_groups(&c);
        check_copies(&c, plain);
        const uint32_t least = ref_place_least_doubles(&sizes);
        CHECK(c.doubles == least, "%u doubles, not %u\n", c.doubles, least);
        const double row = row_balance(&c), even = ref_place_balance(&sizes, c.load, plain);
        CHECK(fabs(row - c.before) <= 1e-12 * row, "before is %g, not %g\n", c.before, row);
        const bool tempted = ref_place_doubles(&sizes, plain) > least;
        CHECK(tempted || c.after <= even * (1 + 1e-9), "%g, the plain rule %g\n", c.after, even);
        avoidable += tempted;
        worse += c.after > even * (1 + 1e-9);
        better += c.after < even * (1 - 1e-9);
        ours += c.after / DRAWS;
        theirs += even / DRAWS;
    }
    print_message("%d draws: max / mean %.4f, plain rule %.4f; better %u, worse %u; avoidable "
                  "doubles by the plain rule in %u\n",
                  DRAWS, ours, theirs, better, worse, avoidable);
    CHECK(ours <= theirs, "%g on average, the plain rule %g\n", ours, theirs);
    CHECK(avoidable > 0, "no draw tempts the plain rule\n");
}

/* The load drifts: from one plan to the next, with all moves and with few. */
static void moves(void **state) {
    (void)state;
    double ends[5] = {0}, counts[5] = {0}, stale = 0, anew = 0, near = 0, near_moves = 0;
    seed_set(20261202);
    for (uint32_t draw = 0; draw < 200; draw++) {
        const ref_place_shape sizes = random_shape();
        test_case("drift %u: %u experts, %u replicas, %u groups, %u nodes, %u devices", draw,
                  sizes.experts, sizes.replicas, sizes.groups, sizes.nodes, sizes.devices);
        place_case c = case_of(&sizes);
        clmoe_place_args args = args_of(&c);
        int32_t *previous = HOST(int32_t, sizes.replicas), *fresh = HOST(int32_t, sizes.replicas);
        zipf_load(&c);
        OK(clmoe_place(&args));
        memcpy(previous, c.slots, sizes.replicas * sizeof *previous);
        args.previous = previous;
        OK(clmoe_place(&args));
        CHECK(c.moves == 0, "%u moves for the same load\n", c.moves);
        for (uint32_t e = 0; e < sizes.experts; e++)
            c.load[e] = floor(c.load[e] * (0.5 + random_unit()));
        args.previous = NULL;
        OK(clmoe_place(&args));
        memcpy(fresh, c.slots, sizes.replicas * sizeof *fresh);
        anew += ref_place_moves(&sizes, previous, fresh) / (double)sizes.replicas / 200;
        args.previous = previous;
        const double even = c.after;
        for (uint32_t i = 0; i < 5; i++) {
            args.max_moves = i == 0 ? 0 : 1u << (i - 1);
            OK(clmoe_place(&args));
            check_plan(&c, previous);
            check_groups(&c);
            const double before = ref_place_balance(&sizes, c.load, previous);
            CHECK(c.doubles == ref_place_least_doubles(&sizes), "%u doubles\n", c.doubles);
            CHECK(fabs(before - c.before) <= 1e-12 * before, "before is %g\n", c.before);
            CHECK(c.after <= c.before * (1 + 1e-9), "%g after %g\n", c.after, c.before);
            CHECK(args.max_moves == 0 || c.moves <= args.max_moves, "%u moves of %u\n", c.moves,
                  args.max_moves);
            CHECK(args.max_moves > 0 || c.after <= even * (1 + 1e-9), "%g, not %g\n", c.after,
                  even);
            CHECK(i > 0 || c.moves <= ref_place_moves(&sizes, previous, fresh), "%u moves\n",
                  c.moves);
            ends[i] += c.after / 200;
            counts[i] += c.moves / (double)sizes.replicas / 200;
        }
        stale += c.before / 200;
        args.max_moves = 0;
        OK(clmoe_place(&args));
        const uint32_t all = c.moves;
        args.tolerance = 0.05;
        OK(clmoe_place(&args));
        check_plan(&c, previous);
        check_groups(&c);
        CHECK(c.doubles == ref_place_least_doubles(&sizes), "%u doubles\n", c.doubles);
        CHECK(c.after <= even * 1.05 * (1 + 1e-9), "%g is not within 5 %% of %g\n", c.after, even);
        CHECK(c.moves <= all, "%u moves, without a tolerance %u\n", c.moves, all);
        near += c.after / 200;
        near_moves += c.moves / (double)sizes.replicas / 200;
    }
    print_message("a tolerance of 5 %%: %.4f by %.0f %% of the slots\n", near, 100 * near_moves);
    CHECK(near_moves < 0.5 * counts[0], "a tolerance saves few moves\n");
    print_message("200 drifts, max / mean: %.4f as it was; moves 1: %.4f, 2: %.4f, 4: %.4f, 8: "
                  "%.4f, any: %.4f, of %.0f %% of the slots, %.0f %% unaligned\n",
                  stale, ends[1], ends[2], ends[3], ends[4], ends[0], 100 * counts[0], 100 * anew);
    CHECK(ends[1] < stale && ends[4] < ends[1], "more moves are no better\n");
}

static void mix(uint64_t *sum, const int32_t *slots, uint32_t count) {
    for (uint32_t slot = 0; slot < count; slot++)
        *sum = (*sum ^ (uint32_t)slots[slot]) * 0x100000001b3u;
}

/*
 * The plans of the plain search, which weighed every change on every device: a faster one finds the
 * same. The loads are multiples of all numbers up to 16, and copies are no more, so that no sum is
 * rounded, on any machine.
 */
static void the_same_plans(void **state) {
    (void)state;
    enum { MULTIPLE = 720720, MOST_COPIES = 16 };
    static const struct {
        uint32_t max_moves;
        double tolerance;
    } limits[] = {{0, 0}, {1, 0}, {5, 0}, {0, 0.03125}, {9, 0.0625}};
    uint64_t sum = 0xcbf29ce484222325u;
    seed_set(20261204);
    for (uint32_t draw = 0; draw < 500; draw++) {
        const ref_place_shape sizes = random_shape();
        place_case c = case_of(&sizes);
        int32_t *previous = HOST(int32_t, sizes.replicas);
        c.max_copies = c.max_copies < MOST_COPIES ? c.max_copies : MOST_COPIES;
        if (sizes.experts * c.max_copies < sizes.replicas)
            continue;
        clmoe_place_args args = args_of(&c);
        for (uint32_t e = 0; e < sizes.experts; e++)
            c.load[e] = (double)MULTIPLE * (1 + random_below(1 + random_below(2000)));
        OK(clmoe_place(&args));
        mix(&sum, c.slots, sizes.replicas);
        memcpy(previous, c.slots, sizes.replicas * sizeof *previous);
        args.previous = previous;
        for (uint32_t e = 0; e < sizes.experts; e++)
            c.load[e] += (double)MULTIPLE * random_below(500);
        for (size_t i = 0; i < COUNT_OF(limits); i++) {
            args.max_moves = limits[i].max_moves;
            args.tolerance = limits[i].tolerance;
            OK(clmoe_place(&args));
            mix(&sum, c.slots, sizes.replicas);
        }
    }
    CHECK(sum == 0x1ad0815fb89b548du, "other plans: 0x%016" PRIx64 "\n", sum);
}

/* The best balance that another expert in one slot can give. */
static double best_move(const place_case *c, const int32_t *previous) {
    const ref_place_shape *s = &c->shape;
    const uint32_t nodes = ref_place_nodes(s), size = s->experts / s->groups;
    const uint32_t least = ref_place_doubles(s, previous);
    double best = ref_place_balance(s, c->load, previous);
    int32_t *node_of = HOST(int32_t, s->groups), *plan = HOST(int32_t, s->replicas);
    uint32_t *copies = HOST(uint32_t, s->experts);
    memcpy(plan, previous, s->replicas * sizeof *plan);
    for (uint32_t slot = 0; slot < s->replicas; slot++) {
        copies[previous[slot]]++;
        node_of[(uint32_t)previous[slot] / size] = (int32_t)(slot / (s->replicas / nodes));
    }
    for (uint32_t slot = 0; slot < s->replicas; slot++) {
        const int32_t node = (int32_t)(slot / (s->replicas / nodes));
        for (uint32_t e = 0; e < s->experts && copies[previous[slot]] > 1; e++) {
            plan[slot] = (int32_t)e;
            if ((nodes > 1 && node_of[e / size] != node) || copies[e] >= c->max_copies ||
                ref_place_doubles(s, plan) > least)
                continue;
            const double balance = ref_place_balance(s, c->load, plan);
            best = balance < best ? balance : best;
        }
        plan[slot] = previous[slot];
    }
    return best;
}

/* Few copies of an expert, in the new plan and in every step from an old one. */
static void bounded_copies(void **state) {
    (void)state;
    /* The last expert's second copy finds room on one device alone, which has the first. */
    static const double loads[][11] = {{200, 160, 11, 10, 10, 10, 10, 10, 10},
                                       {200, 160, 11.5, 11, 10, 10, 10, 10, 10, 10, 10}};
    clmoe_place_args args;
    for (uint32_t i = 0; i < 2; i++) {
        test_case("full devices, %u", i);
        place_case full = case_of(&(ref_place_shape){9 + 2 * i, 12 + 3 * i, 1, 1, 3});
        args = args_of(&full);
        memcpy(full.load, loads[i], full.shape.experts * sizeof *full.load);
        args.max_copies = full.max_copies = 2;
        OK(clmoe_place(&args));
        check_plan(&full, NULL);
        CHECK(full.doubles == 0, "%u doubles\n", full.doubles);
    }
    seed_set(20261203);
    for (uint32_t draw = 0; draw < 300; draw++) {
        const ref_place_shape sizes = random_shape();
        test_case("draw %u: %u experts, %u replicas, %u groups, %u nodes, %u devices", draw,
                  sizes.experts, sizes.replicas, sizes.groups, sizes.nodes, sizes.devices);
        place_case c = case_of(&sizes);
        int32_t *previous = HOST(int32_t, sizes.replicas);
        const uint32_t few = (sizes.replicas + sizes.experts - 1) / sizes.experts;
        c.max_copies = few + random_below(2) < c.max_copies ? few + random_below(2) : c.max_copies;
        args = args_of(&c);
        zipf_load(&c);
        OK(clmoe_place(&args));
        check_plan(&c, NULL);
        CHECK(c.doubles == ref_place_least_doubles(&sizes), "%u doubles\n", c.doubles);
        memcpy(previous, c.slots, sizes.replicas * sizeof *previous);
        args.previous = previous;
        zipf_load(&c);
        args.max_moves = 1;
        OK(clmoe_place(&args));
        check_plan(&c, previous);
        const double best = best_move(&c, previous);
        CHECK(c.after <= best * (1 + 1e-9), "%g, but one move gives %g\n", c.after, best);
        args.max_moves = 4;
        OK(clmoe_place(&args));
        check_plan(&c, previous);
    }
}

/* What the rule for doubles or groups forbids is mended where moves allow it, told where not. */
static void mended(void **state) {
    (void)state;
    test_case("doubles of before");
    place_case c = case_of(&(ref_place_shape){2, 4, 1, 1, 2});
    clmoe_place_args args = args_of(&c);
    const int32_t previous[] = {0, 0, 1, 1};
    c.load[0] = c.load[1] = 4;
    args.previous = previous;
    OK(clmoe_place(&args));
    check_plan(&c, previous);
    CHECK(c.doubles == 0 && c.moves == 2 && c.after == 1, "%u doubles\n", c.doubles);
    args.max_moves = 1;
    OK(clmoe_place(&args));
    check_plan(&c, previous);
    CHECK(c.doubles == 2 && c.moves == 0, "%u doubles, %u moves\n", c.doubles, c.moves);
    test_case("groups of before on many nodes");
    c = case_of(&(ref_place_shape){12, 16, 1, 1, 8});
    args = args_of(&c);
    zipf_load(&c);
    OK(clmoe_place(&args));
    int32_t *one_node = c.slots;
    const double even = c.after;
    c.slots = HOST(int32_t, 16);
    c.shape.nodes = args.nodes = 2;
    c.shape.groups = args.groups = 4;
    args.physical_to_logical = c.slots;
    args.previous = one_node;
    OK(clmoe_place(&args));
    check_plan(&c, one_node);
    check_groups(&c);
    CHECK(c.after > even, "%g: the nodes cost nothing\n", c.after);
}

/* A plan whose nodes, devices and slots were named otherwise, and two of its slots exchanged. */
static void renamed(void **state) {
    (void)state;
    enum { NODES = 3, DEVICES = 4, SLOTS = 5, ALL = NODES * DEVICES * SLOTS };
    test_case("renamed");
    place_case c = case_of(&(ref_place_shape){48, ALL, 12, NODES, NODES * DEVICES});
    clmoe_place_args args = args_of(&c);
    int32_t previous[ALL];
    for (uint32_t e = 0; e < 48; e++)
        c.load[(e * 31) % 48] = 10000 / (e + 7) * 10 + e;
    OK(clmoe_place(&args));
    const double even = c.after;
    for (uint32_t slot = 0; slot < ALL; slot++) {
        const uint32_t node = slot / SLOTS / DEVICES, device = slot / SLOTS % DEVICES;
        const uint32_t to = (node + 1) % NODES * DEVICES + (device + 1 + node) % DEVICES;
        previous[to * SLOTS + (slot % SLOTS + device) % SLOTS] = c.slots[slot];
    }
    args.previous = previous;
    OK(clmoe_place(&args));
    CHECK(c.moves == 0 && c.after == even, "%u moves\n", c.moves);
    const int32_t first = previous[0];
    previous[0] = previous[SLOTS];
    previous[SLOTS] = first;
    OK(clmoe_place(&args));
    check_plan(&c, previous);
    CHECK(c.before > even && c.moves == 2, "%u moves, %g before\n", c.moves, c.before);
    CHECK(fabs(c.after - even) < 1e-12, "%g, not %g\n", c.after, even);
}

/* Equal loads go by index, whatever their size; those without load too. */
static void ties(void **state) {
    (void)state;
    static const int32_t none[] = {0, 1, 2, 3, 4, 5, 6, 7}, equal[] = {0, 4, 1, 5, 2, 6, 3, 7};
    test_case("ties");
    place_case c = case_of(&(ref_place_shape){8, 8, 1, 1, 4});
    clmoe_place_args args = args_of(&c);
    for (int load = 0; load < 3; load++) {
        for (uint32_t e = 0; e < 8; e++)
            c.load[e] = load;
        OK(clmoe_place(&args));
        compare_ints("equal loads", c.slots, load > 0 ? equal : none, 8);
        CHECK(c.after == (load > 0), "balance %g of load %d\n", c.after, load);
    }
}

/* Layers by themselves; outputs that are not asked for; in the place of the previous plan. */
static void layers(void **state) {
    (void)state;
    test_case("layers");
    enum { LAYERS = 3 };
    const ref_place_shape sizes = {12, 16, 4, 2, 8};
    double load[LAYERS][12];
    int32_t slots[LAYERS][16], want[LAYERS][16];
    for (uint32_t layer = 0; layer < LAYERS; layer++) {
        place_case c = case_of(&sizes);
        clmoe_place_args args = args_of(&c);
        zipf_load(&c);
        memcpy(load[layer], c.load, sizeof load[layer]);
        OK(clmoe_place(&args));
        memcpy(want[layer], c.slots, sizeof want[layer]);
    }
    clmoe_place_args args = {.struct_size = sizeof args,
                             .layers = LAYERS,
                             .experts = 12,
                             .replicas = 16,
                             .devices = 8,
                             .nodes = 2,
                             .groups = 4,
                             .load = load[0],
                             .physical_to_logical = slots[0]};
    OK(clmoe_place(&args));
    compare_ints("three layers", slots, want, 16 * LAYERS);
    args.previous = slots[0];
    OK(clmoe_place(&args));
    compare_ints("in place", slots, want, 16 * LAYERS);
}

static void errors(void **state) {
    (void)state;
    static const struct {
        const char *field, *value;
        size_t offset;
        uint32_t number;
    } cases[] = {
#define BAD(field, value, text) {#field, text, offsetof(clmoe_place_args, field), value}
        BAD(layers, 0, "0"),     BAD(experts, 0, "0"),    BAD(experts, 17, "17"),
        BAD(replicas, 11, "11"), BAD(replicas, 18, "18"), BAD(replicas, 0x80000000u, "2147483648"),
        BAD(devices, 0, "0"),    BAD(devices, 5, "5"),    BAD(nodes, 3, "3"),
        BAD(groups, 5, "5"),     BAD(max_copies, 1, "1"), BAD(max_moves, 7, "7"),
#undef BAD
    };
    test_case("errors");
    place_case c = case_of(&(ref_place_shape){12, 16, 4, 2, 8});
    int32_t previous[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        clmoe_place_args args = args_of(&c);
        memcpy((char *)&args + cases[i].offset, &cases[i].number, sizeof cases[i].number);
        check_error(clmoe_place(&args), CLMOE_INVALID_ARGUMENT,
                    strcmp(cases[i].value, "17") == 0 ? "replicas" : cases[i].field,
                    cases[i].value);
    }
#define REFUSED(change, field, value)                                                              \
    do {                                                                                           \
        clmoe_place_args args = args_of(&c);                                                       \
        change;                                                                                    \
        check_error(clmoe_place(&args), CLMOE_INVALID_ARGUMENT, field, value);                     \
    } while (0)
    check_error(clmoe_place(NULL), CLMOE_INVALID_ARGUMENT, "args", "NULL");
    REFUSED(args.struct_size = 3, "struct_size", "3");
    REFUSED(args.load = NULL, "load", "NULL");
    REFUSED(args.physical_to_logical = NULL, "physical_to_logical", "NULL");
    REFUSED((args.previous = previous, previous[4] = 12), "previous[0][4]", "12");
    REFUSED((args.previous = previous, previous[4] = -1), "previous[0][4]", "-1");
    REFUSED((args.previous = previous, previous[4] = 3), "previous[0]", "0 copies of expert 4");
    previous[4] = 4;
    REFUSED((args.previous = previous, args.max_copies = 4), "previous[0]", "5 copies of expert 0");
    REFUSED(args.tolerance = 0.5, "tolerance", "0.5");
    REFUSED((args.previous = previous, args.tolerance = -1), "tolerance", "-1");
    REFUSED((args.previous = previous, args.tolerance = NAN), "tolerance", "nan");
    static const double bad[] = {-1, NAN, INFINITY};
    static const char *const texts[] = {"-1", "nan", "inf"};
    for (size_t i = 0; i < COUNT_OF(bad); i++) {
        c.load[7] = bad[i];
        REFUSED((void)0, "load[0][7]", texts[i]);
    }
    c.load[6] = c.load[7] = 1.7e308;
    REFUSED((void)0, "load[0]", "infinite sum");
    for (uint32_t slot = 0; slot < 16; slot++)
        CHECK(c.slots[slot] == 0, "an error wrote slot %u\n", slot);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(plain_vector),   TEST(random_loads), TEST(moves),   TEST(the_same_plans),
        TEST(bounded_copies), TEST(mended),       TEST(renamed), TEST(ties),
        TEST(layers),         TEST(errors),
    };
    return RUN(tests);
}
