/* A new placement: groups onto nodes, spare slots to the heaviest copies, copies onto devices. */
#include "place.h"

#include <stdlib.h>
#include <string.h>

int place_heaviest_first(const void *left, const void *right) {
    const place_item *a = left, *b = right;
    if (a->weight != b->weight)
        return a->weight > b->weight ? -1 : 1;
    return a->index < b->index ? -1 : 1;
}

static uint32_t group_of(const place_shape *shape, uint32_t expert) {
    return expert / (shape->experts / shape->groups);
}

/* The lightest of `count` bins with fewer than `most` items; there is one. */
static uint32_t lightest_bin(const double *weight, const uint32_t *items, uint32_t count,
                             uint32_t most) {
    uint32_t best = count;
    for (uint32_t i = 0; i < count; i++)
        if (items[i] < most && (best == count || weight[i] < weight[best]))
            best = i;
    return best;
}

/* room->node_of; the nodes' loads are in the place of the devices'. */
static void pack_groups(placement *p, const place_room *room) {
    const place_shape *shape = &p->shape;
    for (uint32_t g = 0; g < shape->groups; g++)
        room->items[g] = (place_item){0, g};
    for (uint32_t e = 0; e < shape->experts; e++)
        room->items[group_of(shape, e)].weight += p->load[e];
    qsort(room->items, shape->groups, sizeof *room->items, place_heaviest_first);
    memset(room->filled, 0, shape->nodes * sizeof *room->filled);
    for (uint32_t n = 0; n < shape->nodes; n++)
        p->device_load[n] = 0;
    for (uint32_t i = 0; i < shape->groups; i++) {
        uint32_t node =
            lightest_bin(p->device_load, room->filled, shape->nodes, shape->groups / shape->nodes);
        p->device_load[node] += room->items[i].weight;
        room->filled[node]++;
        room->node_of[room->items[i].index] = node;
    }
}

/* Of a node's experts with fewer than `limit` copies the one with the heaviest; E: none. */
static uint32_t heaviest_copy(const placement *p, const place_room *room, uint32_t node,
                              uint32_t limit) {
    uint32_t best = p->shape.experts;
    for (uint32_t e = 0; e < p->shape.experts; e++)
        if (room->node_of[group_of(&p->shape, e)] == node && p->copies[e] < limit &&
            (best == p->shape.experts || share_of(p, (int32_t)e) > share_of(p, (int32_t)best)))
            best = e;
    return best;
}

/* More copies than the node has devices only where every expert has as many. */
static void give_copies(placement *p, const place_room *room) {
    const place_shape *shape = &p->shape;
    const uint32_t spare = (shape->slots - shape->experts) / shape->nodes;
    for (uint32_t e = 0; e < shape->experts; e++)
        p->copies[e] = 1;
    for (uint32_t node = 0; node < shape->nodes; node++) {
        uint32_t devices = node_devices(shape);
        uint32_t limit = devices < shape->max_copies ? devices : shape->max_copies;
        for (uint32_t i = 0; i < spare; i++) {
            uint32_t e = heaviest_copy(p, room, node, limit);
            if (e == shape->experts) {
                limit = shape->max_copies;
                e = heaviest_copy(p, room, node, limit);
            }
            p->copies[e]++;
        }
    }
}

/* Puts a copy into the next free slot of a device. */
static void put(placement *p, const place_room *room, uint32_t device, int32_t expert) {
    placement_set(p, device * device_slots(&p->shape) + room->filled[device]++, expert);
    p->device_load[device] += share_of(p, expert);
}

/* Copies that an expert has on every device of its node, as it has more of them than devices. */
static uint32_t copies_everywhere(const placement *p, int32_t expert) {
    return p->copies[expert] / node_devices(&p->shape);
}

static bool holds(const placement *p, uint32_t device, int32_t expert) {
    return *held_at(p, device, expert) > copies_everywhere(p, expert);
}

/* The lightest device of a node with room, of those that do not hold `expert`; the end: none. */
static uint32_t lightest_device(const placement *p, const place_room *room, uint32_t node,
                                int32_t expert) {
    const uint32_t each = node_devices(&p->shape), end = (node + 1) * each;
    uint32_t best = end;
    for (uint32_t d = node * each; d < end; d++)
        if (room->filled[d] < device_slots(&p->shape) && (expert < 0 || !holds(p, d, expert)) &&
            (best == end || p->device_load[d] < p->device_load[best]))
            best = d;
    return best;
}

/*
 * Every device with room holds the expert. A full one that does not has more slots in use, so it
 * holds an expert that the one with room does not: that moves there, and makes place.
 */
static void make_place(placement *p, const place_room *room, uint32_t node, int32_t expert) {
    const uint32_t each = node_devices(&p->shape), slots = device_slots(&p->shape);
    const uint32_t to = lightest_device(p, room, node, -1);
    const double share = share_of(p, expert);
    uint32_t best = p->shape.slots;
    double least = 0;
    for (uint32_t slot = node * each * slots; slot < (node + 1) * each * slots; slot++) {
        const uint32_t d = slot / slots;
        if (room->filled[d] < slots || holds(p, d, expert))
            continue;
        const int32_t other = p->expert_of[slot];
        if (!holds(p, d, other) || holds(p, to, other))
            continue;
        double here = p->device_load[to] + share_of(p, other);
        double there = p->device_load[d] - share_of(p, other) + share;
        double most = here > there ? here : there;
        if (best == p->shape.slots || most < least) {
            best = slot;
            least = most;
        }
    }
    put(p, room, to, p->expert_of[best]);
    p->device_load[best / slots] += share - share_of(p, p->expert_of[best]);
    placement_set(p, best, expert);
}

/* Experts in room->items, the heaviest copies first. */
static void pack_devices(placement *p, const place_room *room) {
    const place_shape *shape = &p->shape;
    const uint32_t each = node_devices(shape);
    for (uint32_t i = 0; i < shape->experts; i++) {
        const int32_t e = (int32_t)room->items[i].index;
        const uint32_t node = room->node_of[group_of(shape, (uint32_t)e)];
        for (uint32_t copy = 0; copy < copies_everywhere(p, e) * each; copy++)
            put(p, room, node * each + copy % each, e);
    }
    for (uint32_t i = 0; i < shape->experts; i++) {
        const int32_t e = (int32_t)room->items[i].index;
        const uint32_t node = room->node_of[group_of(shape, (uint32_t)e)];
        for (uint32_t copy = 0; copy < p->copies[e] % each; copy++) {
            uint32_t device = lightest_device(p, room, node, e);
            if (device < (node + 1) * each)
                put(p, room, device, e);
            else
                make_place(p, room, node, e);
        }
    }
}

void place_new(placement *p, const place_room *room) {
    const place_shape *shape = &p->shape;
    pack_groups(p, room);
    give_copies(p, room);
    for (uint32_t e = 0; e < shape->experts; e++)
        room->items[e] = (place_item){share_of(p, (int32_t)e), e};
    qsort(room->items, shape->experts, sizeof *room->items, place_heaviest_first);
    memset(room->filled, 0, shape->devices * sizeof *room->filled);
    memset(p->held, 0, (size_t)shape->devices * shape->experts * sizeof *p->held);
    for (uint32_t d = 0; d < shape->devices; d++)
        p->device_load[d] = 0;
    for (uint32_t slot = 0; slot < shape->slots; slot++)
        p->expert_of[slot] = -1;
    pack_devices(p, room);
    placement_weigh(p);
}
