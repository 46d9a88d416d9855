/* The placement of experts on devices, as a public call. */
#include "place.h"

#include "runtime/structs.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- A plan -------------------------------------------------------------------------------- */

void placement_set(placement *p, uint32_t slot, int32_t expert) {
    const uint32_t device = slot / device_slots(&p->shape);
    if (p->expert_of[slot] >= 0)
        --*held_at(p, device, p->expert_of[slot]);
    ++*held_at(p, device, expert);
    p->expert_of[slot] = expert;
}

void placement_weigh(placement *p) {
    const uint32_t slots = device_slots(&p->shape);
    for (uint32_t d = 0; d < p->shape.devices; d++) {
        p->device_load[d] = 0;
        for (uint32_t s = 0; s < slots; s++)
            p->device_load[d] += share_of(p, p->expert_of[d * slots + s]);
    }
}

void placement_count(placement *p) {
    const place_shape *shape = &p->shape;
    memset(p->copies, 0, shape->experts * sizeof *p->copies);
    memset(p->held, 0, (size_t)shape->devices * shape->experts * sizeof *p->held);
    for (uint32_t slot = 0; slot < shape->slots; slot++) {
        p->copies[p->expert_of[slot]]++;
        ++*held_at(p, slot / device_slots(shape), p->expert_of[slot]);
    }
    placement_weigh(p);
}

static double balance_of(const double *device_load, uint32_t devices) {
    double most = 0, sum = 0;
    for (uint32_t d = 0; d < devices; d++) {
        most = device_load[d] > most ? device_load[d] : most;
        sum += device_load[d];
    }
    return sum > 0 ? most / (sum / devices) : 0;
}

static uint32_t count_doubles(const placement *p) {
    uint32_t doubles = 0;
    for (uint32_t d = 0; d < p->shape.devices; d++)
        for (uint32_t e = 0; e < p->shape.experts; e++) {
            const uint32_t held = *held_at(p, d, (int32_t)e);
            doubles += held > 1 ? held - 1 : 0;
        }
    return doubles;
}

static uint32_t count_moves(const placement *p, const int32_t *previous) {
    uint32_t moves = 0;
    for (uint32_t slot = 0; slot < p->shape.slots; slot++)
        moves += p->expert_of[slot] != previous[slot];
    return moves;
}

/* Slots outside the node that has the first one of their group. */
static uint32_t count_strays(const placement *p, const place_room *room) {
    const place_shape *shape = &p->shape;
    uint32_t strays = 0;
    for (uint32_t g = 0; g < shape->groups; g++)
        room->node_of[g] = shape->nodes;
    for (uint32_t slot = 0; slot < shape->slots; slot++) {
        const uint32_t group = (uint32_t)p->expert_of[slot] / (shape->experts / shape->groups);
        const uint32_t node = slot / (shape->slots / shape->nodes);
        if (room->node_of[group] == shape->nodes)
            room->node_of[group] = node;
        strays += room->node_of[group] != node;
    }
    return strays;
}

/* ---- Checks -------------------------------------------------------------------------------- */

static clmoe_status check_multiple(const char *name, uint32_t value, const char *of, uint32_t by) {
    if (by > 0 && value % by == 0)
        return CLMOE_SUCCESS;
    return fail(CLMOE_INVALID_ARGUMENT, "%s is %u, but must be a multiple of %s, %u", name, value,
                of, by);
}

static clmoe_status check_shape(const clmoe_place_args *args) {
    clmoe_status status = CLMOE_SUCCESS;
    const struct {
        const char *name;
        uint32_t value;
    } counts[] = {{"layers", args->layers}, {"experts", args->experts}, {"devices", args->devices}};
    for (size_t i = 0; i < sizeof counts / sizeof counts[0]; i++)
        if (counts[i].value == 0)
            return fail(CLMOE_INVALID_ARGUMENT, "%s is 0, but must be at least 1", counts[i].name);
    if (args->replicas < args->experts || args->replicas > INT32_MAX)
        return fail(CLMOE_INVALID_ARGUMENT,
                    "replicas is %u, but must be from %u, the experts, to 2^31 - 1", args->replicas,
                    args->experts);
    TRY(check_multiple("replicas", args->replicas, "devices", args->devices));
    TRY(check_multiple("devices", args->devices, "nodes", args->nodes));
    TRY(check_multiple("experts", args->experts, "groups", args->groups));
    if ((uint64_t)args->experts * args->max_copies < args->replicas)
        return fail(CLMOE_INVALID_ARGUMENT,
                    "max_copies is %u, but %u experts need more for %u replicas", args->max_copies,
                    args->experts, args->replicas);
    if (args->max_moves > 0 && !args->previous)
        return fail(CLMOE_INVALID_ARGUMENT, "max_moves is %u, but previous is NULL",
                    args->max_moves);
    if (!(args->tolerance >= 0) || isinf(args->tolerance))
        return fail(CLMOE_INVALID_ARGUMENT, "tolerance is %g, but must be finite and not negative",
                    args->tolerance);
    if (args->tolerance > 0 && !args->previous)
        return fail(CLMOE_INVALID_ARGUMENT, "tolerance is %g, but previous is NULL",
                    args->tolerance);
done:
    return status;
}

static clmoe_status check_load(const clmoe_place_args *args, uint32_t layer) {
    const double *load = args->load + (size_t)layer * args->experts;
    double sum = 0;
    for (uint32_t e = 0; e < args->experts; e++) {
        if (!(load[e] >= 0) || isinf(load[e]))
            return fail(CLMOE_INVALID_ARGUMENT,
                        "load[%u][%u] is %g, but must be finite and not negative", layer, e,
                        load[e]);
        sum += load[e];
    }
    if (isinf(sum))
        return fail(CLMOE_INVALID_ARGUMENT, "load[%u] has an infinite sum", layer);
    return CLMOE_SUCCESS;
}

/* count [E]. */
static clmoe_status check_previous(const clmoe_place_args *args, uint32_t layer, uint32_t *count) {
    const int32_t *previous = args->previous + (size_t)layer * args->replicas;
    memset(count, 0, args->experts * sizeof *count);
    for (uint32_t slot = 0; slot < args->replicas; slot++) {
        if (previous[slot] < 0 || (uint32_t)previous[slot] >= args->experts)
            return fail(CLMOE_INVALID_ARGUMENT,
                        "previous[%u][%u] is %d, but must be from 0 to %u, an expert", layer, slot,
                        (int)previous[slot], args->experts - 1);
        count[previous[slot]]++;
    }
    for (uint32_t e = 0; e < args->experts; e++)
        if (count[e] == 0 || count[e] > args->max_copies)
            return fail(CLMOE_INVALID_ARGUMENT,
                        "previous[%u] has %u copies of expert %u, but must have from 1 to %u",
                        layer, count[e], e, args->max_copies);
    return CLMOE_SUCCESS;
}

static clmoe_status check_layers(const clmoe_place_args *args, uint32_t *count) {
    clmoe_status status = CLMOE_SUCCESS;
    if (!args->load || !args->physical_to_logical)
        return fail(CLMOE_INVALID_ARGUMENT, "%s is NULL",
                    args->load ? "physical_to_logical" : "load");
    for (uint32_t layer = 0; layer < args->layers; layer++) {
        TRY(check_load(args, layer));
        if (args->previous)
            TRY(check_previous(args, layer, count));
    }
done:
    return status;
}

/* ---- The call ------------------------------------------------------------------------------ */

/* Everything that a call allocates: two plans, and the room for making them. */
typedef struct place_memory {
    placement fresh, old;
    place_room room;
} place_memory;

static clmoe_status allocate(void *to, size_t rows, size_t columns, size_t element) {
    size_t count;
    void *block = size_mul(rows, columns, &count) ? calloc(count, element) : NULL;
    memcpy(to, &block, sizeof block);
    if (!block)
        return fail(CLMOE_OUT_OF_MEMORY, "no memory for %zu x %zu numbers", rows, columns);
    return CLMOE_SUCCESS;
}

#define ALLOCATE(pointer, rows, columns) allocate(&(pointer), (rows), (columns), sizeof *(pointer))

static clmoe_status placement_open(const place_shape *shape, placement *p) {
    clmoe_status status = CLMOE_SUCCESS;
    p->shape = *shape;
    TRY(ALLOCATE(p->expert_of, shape->slots, 1));
    TRY(ALLOCATE(p->copies, shape->experts, 1));
    TRY(ALLOCATE(p->held, shape->devices, shape->experts));
    TRY(ALLOCATE(p->device_load, shape->devices, 1));
done:
    return status;
}

static void placement_close(placement *p) {
    free(p->expert_of);
    free(p->copies);
    free(p->held);
    free(p->device_load);
}

static clmoe_status memory_open(const place_shape *shape, bool previous, place_memory *m) {
    clmoe_status status = CLMOE_SUCCESS;
    place_room *room = &m->room;
    TRY(placement_open(shape, &m->fresh));
    TRY(ALLOCATE(room->items, shape->experts, 1));
    TRY(ALLOCATE(room->node_of, shape->groups, 1));
    TRY(ALLOCATE(room->filled, shape->devices, 1));
    TRY(ALLOCATE(room->count, shape->experts, 1));
    TRY(ALLOCATE(room->by_load, shape->devices, 1));
    if (!previous)
        return CLMOE_SUCCESS;
    TRY(placement_open(shape, &m->old));
    TRY(ALLOCATE(room->overlap, shape->devices, shape->devices));
    TRY(ALLOCATE(room->to, shape->devices, 1));
    TRY(ALLOCATE(room->expert_of, shape->slots, 1));
    TRY(ALLOCATE(room->first, shape->experts, 1));
    TRY(ALLOCATE(room->holders, shape->slots, 1));
done:
    return status;
}

static void memory_close(place_memory *m) {
    placement_close(&m->fresh);
    placement_close(&m->old);
    free(m->room.items);
    free(m->room.node_of);
    free(m->room.filled);
    free(m->room.count);
    free(m->room.overlap);
    free(m->room.to);
    free(m->room.expert_of);
    free(m->room.by_load);
    free(m->room.first);
    free(m->room.holders);
}

/* The balance of E experts in a row, without copies. */
static double plain_balance(placement *p) {
    const place_shape *shape = &p->shape;
    for (uint32_t d = 0; d < shape->devices; d++)
        p->device_load[d] = 0;
    for (uint32_t e = 0; e < shape->experts; e++)
        p->device_load[(uint64_t)e * shape->devices / shape->experts] += p->load[e];
    return balance_of(p->device_load, shape->devices);
}

static uint32_t count_faults(const placement *p, const place_room *room) {
    return count_doubles(p) + count_strays(p, room);
}

/* The previous plan improved, where moves are bounded; what is `enough` of the new plan's load. */
static void improve_old(const clmoe_place_args *args, place_memory *m, const int32_t *previous) {
    const placement *fresh = &m->fresh;
    double most = 0;
    for (uint32_t d = 0; d < fresh->shape.devices; d++)
        most = fresh->device_load[d] > most ? fresh->device_load[d] : most;
    const uint32_t moves = args->max_moves > 0 ? args->max_moves : UINT32_MAX;
    const double enough = args->tolerance > 0 ? most * (1 + args->tolerance) : 0;
    if (args->max_moves > 0 || args->tolerance > 0)
        place_improve(&m->old, &(place_limits){previous, moves, enough}, &m->room);
}

/* The new plan, or the previous one as it is or improved, whichever is better and allowed. */
static placement *choose(const clmoe_place_args *args, place_memory *m, const int32_t *previous) {
    placement *fresh = &m->fresh, *old = &m->old;
    improve_old(args, m, previous);
    if (args->max_moves > 0 && count_moves(fresh, previous) > args->max_moves)
        return old;
    const double now = balance_of(fresh->device_load, fresh->shape.devices);
    const double then = balance_of(old->device_load, old->shape.devices);
    if (count_faults(fresh, &m->room) != count_faults(old, &m->room))
        return count_faults(fresh, &m->room) < count_faults(old, &m->room) ? fresh : old;
    if (args->tolerance > 0 && then <= now * (1 + args->tolerance) * (1 + PLACE_ROUNDING))
        return count_moves(fresh, previous) < count_moves(old, previous) ? fresh : old;
    return now < then * (1 - PLACE_ROUNDING) ? fresh : old;
}

static void write_layer(const clmoe_place_args *args, uint32_t layer, const placement *p,
                        uint32_t *count) {
    int32_t *slots = args->logical_to_physical;
    memcpy(args->physical_to_logical + (size_t)layer * args->replicas, p->expert_of,
           args->replicas * sizeof *p->expert_of);
    for (uint32_t e = 0; e < args->experts && args->copies; e++)
        args->copies[(size_t)layer * args->experts + e] = (int32_t)p->copies[e];
    if (!slots)
        return;
    slots += (size_t)layer * args->experts * args->max_copies;
    for (size_t i = 0; i < (size_t)args->experts * args->max_copies; i++)
        slots[i] = -1;
    memset(count, 0, args->experts * sizeof *count);
    for (uint32_t slot = 0; slot < args->replicas; slot++) {
        const size_t e = (size_t)p->expert_of[slot];
        slots[e * args->max_copies + count[e]++] = (int32_t)slot;
    }
}

static void place_layer(const clmoe_place_args *args, uint32_t layer, place_memory *m) {
    const int32_t *previous = NULL;
    placement *plan = &m->fresh;
    double before = 0;
    m->fresh.load = m->old.load = args->load + (size_t)layer * args->experts;
    if (args->previous) {
        previous = args->previous + (size_t)layer * args->replicas;
        memcpy(m->old.expert_of, previous, args->replicas * sizeof *previous);
        placement_count(&m->old);
        before = balance_of(m->old.device_load, args->devices);
    } else {
        before = plain_balance(&m->fresh);
    }
    place_new(&m->fresh, &m->room);
    place_improve(&m->fresh, &(place_limits){NULL, 0, 0}, &m->room);
    if (previous) {
        place_align(&m->fresh, previous, &m->room);
        plan = choose(args, m, previous);
    }
    if (args->balance_before)
        args->balance_before[layer] = before;
    if (args->balance_after)
        args->balance_after[layer] = balance_of(plan->device_load, args->devices);
    if (args->moves)
        args->moves[layer] = previous ? count_moves(plan, previous) : 0;
    if (args->doubles)
        args->doubles[layer] = count_doubles(plan);
    write_layer(args, layer, plan, m->room.count);
}

clmoe_status clmoe_place(const clmoe_place_args *args) {
    clmoe_status status = CLMOE_SUCCESS;
    clmoe_place_args own = {0};
    place_memory memory = {0};
    TRY(STRUCT_TAKE_ARGS(args, &own));
    own.nodes += own.nodes == 0;
    own.groups += own.groups == 0;
    if (own.max_copies == 0 && own.replicas >= own.experts)
        own.max_copies = own.replicas - own.experts + 1;
    TRY(check_shape(&own));
    const uint32_t nodes = own.groups % own.nodes == 0 ? own.nodes : 1;
    const uint32_t groups = nodes > 1 ? own.groups : 1;
    const place_shape shape = {own.experts, own.replicas, own.devices,
                               nodes,       groups,       own.max_copies};
    TRY(memory_open(&shape, own.previous != NULL, &memory));
    TRY(check_layers(&own, memory.room.count));
    for (uint32_t layer = 0; layer < own.layers; layer++)
        place_layer(&own, layer, &memory);
done:
    memory_close(&memory);
    return status;
}
