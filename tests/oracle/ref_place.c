#include "ref_place.h"

#include <stdlib.h>

uint32_t ref_place_nodes(const ref_place_shape *shape) {
    return shape->groups % shape->nodes == 0 ? shape->nodes : 1;
}

/* Items in the order of falling weights, ties by the lower index. */
static uint32_t *falling(const double *weight, uint32_t n) {
    uint32_t *order = calloc(n, sizeof *order);
    for (uint32_t i = 0; i < n; i++) {
        uint32_t at = i;
        for (; at > 0 && weight[order[at - 1]] < weight[i]; at--)
            order[at] = order[at - 1];
        order[at] = i;
    }
    return order;
}

/* n items into packs of n / packs each, which[] and rank[]: in which, and as which of it. */
static void balanced_packing(const double *weight, uint32_t n, uint32_t packs, uint32_t *which,
                             uint32_t *rank) {
    double *sum = calloc(packs, sizeof *sum);
    uint32_t *items = calloc(packs, sizeof *items), *order = falling(weight, n);
    for (uint32_t i = 0; i < n; i++) {
        uint32_t best = packs, item = n == packs ? i : order[i];
        for (uint32_t p = 0; p < packs; p++)
            if (items[p] < n / packs && (best == packs || sum[p] < sum[best]))
                best = p;
        if (n == packs)
            best = i;
        which[item] = best;
        rank[item] = items[best]++;
        sum[best] += weight[item];
    }
    free(sum);
    free(items);
    free(order);
}

/* Copies [n] of a node's experts, and of which one each of its slots is. */
static void replicate(const double *weight, uint32_t n, uint32_t slots, uint32_t *copies,
                      uint32_t *expert) {
    for (uint32_t i = 0; i < n; i++) {
        copies[i] = 1;
        expert[i] = i;
    }
    for (uint32_t slot = n; slot < slots; slot++) {
        uint32_t best = 0;
        for (uint32_t i = 1; i < n; i++)
            if (weight[i] / copies[i] > weight[best] / copies[best])
                best = i;
        expert[slot] = best;
        copies[best]++;
    }
}

/* The slots of one node, whose experts are ids [n]. */
static void place_node(const double *load, const uint32_t *ids, uint32_t n, uint32_t slots,
                       uint32_t devices, int32_t *out) {
    double *weight = calloc(slots, sizeof *weight), *share = calloc(slots, sizeof *share);
    uint32_t *copies = calloc(n, sizeof *copies), *expert = calloc(slots, sizeof *expert);
    uint32_t *which = calloc(slots, sizeof *which), *rank = calloc(slots, sizeof *rank);
    for (uint32_t i = 0; i < n; i++)
        weight[i] = load[ids[i]];
    replicate(weight, n, slots, copies, expert);
    for (uint32_t s = 0; s < slots; s++)
        share[s] = weight[expert[s]] / copies[expert[s]];
    balanced_packing(share, slots, devices, which, rank);
    for (uint32_t s = 0; s < slots; s++)
        out[which[s] * (slots / devices) + rank[s]] = (int32_t)ids[expert[s]];
    free(weight);
    free(share);
    free(copies);
    free(expert);
    free(which);
    free(rank);
}

void ref_place_plain(const ref_place_shape *shape, const double *load,
                     int32_t *physical_to_logical) {
    const uint32_t nodes = ref_place_nodes(shape), groups = nodes > 1 ? shape->groups : 1;
    const uint32_t size = shape->experts / groups, slots = shape->replicas / nodes;
    double *weight = calloc(groups, sizeof *weight);
    uint32_t *which = calloc(groups, sizeof *which), *rank = calloc(groups, sizeof *rank);
    uint32_t *ids = calloc(shape->experts, sizeof *ids);
    for (uint32_t e = 0; e < shape->experts; e++)
        weight[e / size] += load[e];
    balanced_packing(weight, groups, nodes, which, rank);
    for (uint32_t e = 0; e < shape->experts; e++) {
        const uint32_t g = e / size;
        ids[(which[g] * (groups / nodes) + rank[g]) * size + e % size] = e;
    }
    for (uint32_t n = 0; n < nodes; n++)
        place_node(load, ids + n * (shape->experts / nodes), shape->experts / nodes, slots,
                   shape->devices / nodes, physical_to_logical + n * slots);
    free(weight);
    free(which);
    free(rank);
    free(ids);
}

double ref_place_balance(const ref_place_shape *shape, const double *load,
                         const int32_t *physical_to_logical) {
    const uint32_t slots = shape->replicas / shape->devices;
    uint32_t *copies = calloc(shape->experts, sizeof *copies);
    double most = 0, total = 0;
    for (uint32_t s = 0; s < shape->replicas; s++)
        copies[physical_to_logical[s]]++;
    for (uint32_t d = 0; d < shape->devices; d++) {
        double sum = 0;
        for (uint32_t s = d * slots; s < (d + 1) * slots; s++)
            sum += load[physical_to_logical[s]] / copies[physical_to_logical[s]];
        most = sum > most ? sum : most;
        total += sum;
    }
    free(copies);
    return total > 0 ? most * shape->devices / total : 0;
}

uint32_t ref_place_doubles(const ref_place_shape *shape, const int32_t *physical_to_logical) {
    const uint32_t slots = shape->replicas / shape->devices;
    uint32_t doubles = 0;
    for (uint32_t s = 0; s < shape->replicas; s++) {
        uint32_t earlier = s - s % slots;
        while (earlier < s && physical_to_logical[earlier] != physical_to_logical[s])
            earlier++;
        doubles += earlier < s;
    }
    return doubles;
}

uint32_t ref_place_least_doubles(const ref_place_shape *shape) {
    const uint32_t slots = shape->replicas / shape->devices;
    const uint32_t experts = shape->experts / ref_place_nodes(shape);
    return slots > experts ? (slots - experts) * shape->devices : 0;
}

uint32_t ref_place_moves(const ref_place_shape *shape, const int32_t *from, const int32_t *to) {
    uint32_t moves = 0;
    for (uint32_t s = 0; s < shape->replicas; s++)
        moves += from[s] != to[s];
    return moves;
}
