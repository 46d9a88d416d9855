/* Better placements from given ones: slots that change places or experts; and names that stay. */
#include "place.h"

#include <stdlib.h>
#include <string.h>

/* ---- Lower loads --------------------------------------------------------------------------- */

typedef enum change_kind { CHANGE_NONE, CHANGE_SWAP, CHANGE_COPY } change_kind;

/* A step: slots a and b change places, or a takes the expert of b too. */
typedef struct change {
    change_kind kind;
    uint32_t a, b, moves; /* moves: of the plan then */
    double most, largest; /* the largest load then: of the devices it concerns, of all */
} change;

typedef struct search {
    placement *p;
    const place_limits *limits;
    const place_room *room;
    uint32_t heaviest, second, third; /* devices */
    uint32_t moves;
    double limit; /* most must be below */
    change best;
} search;

/* The device at a place among them, the heaviest first; the end: there is none. */
static uint32_t device_at(const search *s, uint32_t place) {
    return place < s->p->shape.devices ? s->room->by_load[place].index : s->p->shape.devices;
}

/* The order of the devices; what it was is a good start. */
static void sort_devices(search *s) {
    const uint32_t devices = s->p->shape.devices;
    for (uint32_t i = 0; i < devices; i++)
        s->room->by_load[i].weight = s->p->device_load[s->room->by_load[i].index];
    qsort(s->room->by_load, devices, sizeof *s->room->by_load, place_heaviest_first);
    s->heaviest = device_at(s, 0);
    s->second = device_at(s, 1);
    s->third = device_at(s, 2);
}

/* The devices of each expert, each once: holders [first[e], first[e] + count[e]). */
static void list_holders(const placement *p, const place_room *room) {
    const place_shape *shape = &p->shape;
    uint32_t first = 0;
    for (uint32_t e = 0; e < shape->experts; e++) {
        room->first[e] = first;
        room->count[e] = 0;
        first += p->copies[e];
    }
    for (uint32_t slot = 0; slot < shape->slots; slot++) {
        const uint32_t device = slot / device_slots(shape);
        const int32_t e = p->expert_of[slot];
        uint32_t *holders = room->holders + room->first[e];
        if (room->count[e] == 0 || holders[room->count[e] - 1] != device)
            holders[room->count[e]++] = device;
    }
}

/* Whether a change with such a load cannot become the best one. */
static bool is_hopeless(const search *s, double most) {
    return !(most < s->limit) || (s->best.kind != CHANGE_NONE && most > s->best.largest);
}

static uint32_t is_moved(const search *s, uint32_t slot, int32_t expert) {
    return s->limits->previous && s->limits->previous[slot] != expert;
}

/* Moves of the plan if a slot had another expert. */
static uint32_t moves_with(const search *s, uint32_t moves, uint32_t slot, int32_t expert) {
    return moves - is_moved(s, slot, s->p->expert_of[slot]) + is_moved(s, slot, expert);
}

static void consider(search *s, const change *c) {
    const change *best = &s->best;
    if (!(c->most < s->limit) || (s->limits->previous && c->moves > s->limits->max_moves))
        return;
    if (best->kind == CHANGE_NONE || c->largest < best->largest ||
        (c->largest == best->largest && c->most < best->most))
        s->best = *c;
}

static void consider_swap(search *s, uint32_t a, uint32_t b) {
    const placement *p = s->p;
    const uint32_t from = s->heaviest, to = b / device_slots(&p->shape);
    const int32_t x = p->expert_of[a], y = p->expert_of[b];
    const double less = share_of(p, x) - share_of(p, y);
    const double here = p->device_load[from] - less, there = p->device_load[to] + less;
    const double most = here > there ? here : there;
    /* Not where two copies of an expert would meet, but to part two others. */
    if (!(less > 0) || is_hopeless(s, most) || *held_at(p, to, x) >= *held_at(p, from, x) ||
        *held_at(p, from, y) >= *held_at(p, to, y))
        return;
    const uint32_t next = to == s->second ? s->third : s->second;
    const double rest = next < p->shape.devices ? p->device_load[next] : 0;
    consider(s, &(change){CHANGE_SWAP, a, b, moves_with(s, moves_with(s, s->moves, a, y), b, x),
                          most, most > rest ? most : rest});
}

/* Slot a takes expert x instead of y: the shares of their other copies change too. */
typedef struct copy_change {
    int32_t x, y;
    uint32_t at;             /* the device of slot a */
    double more, x_up, y_up; /* of the load there, and of each copy of x and y */
} copy_change;

static double load_after(const placement *p, const copy_change *c, uint32_t device) {
    const uint32_t xs = *held_at(p, device, c->x), ys = *held_at(p, device, c->y);
    const double load = p->device_load[device] + xs * c->x_up + ys * c->y_up;
    return device == c->at ? load + c->more : load;
}

/* Raises `most` to the loads of the devices with an expert; false: that is hopeless. */
static bool raise_most(const search *s, const copy_change *c, int32_t expert, double *most) {
    const uint32_t *holders = s->room->holders + s->room->first[expert];
    for (uint32_t i = 0; i < s->room->count[expert]; i++) {
        const double load = load_after(s->p, c, holders[i]);
        *most = load > *most ? load : *most;
        if (is_hopeless(s, *most))
            return false;
    }
    return true;
}

/* The largest load of the devices with neither expert, which stays; 0 if there is none. */
static double largest_rest(const search *s, const copy_change *c) {
    for (uint32_t i = 0; i < s->p->shape.devices; i++) {
        const place_item *device = &s->room->by_load[i];
        if (*held_at(s->p, device->index, c->x) + *held_at(s->p, device->index, c->y) == 0)
            return device->weight;
    }
    return 0;
}

static void consider_copy(search *s, uint32_t a, uint32_t b) {
    const placement *p = s->p;
    const uint32_t at = a / device_slots(&p->shape);
    const int32_t y = p->expert_of[a], x = p->expert_of[b];
    change c = {.kind = CHANGE_COPY, .a = a, .b = b, .moves = moves_with(s, s->moves, a, x)};
    if (x == y || p->copies[x] >= p->shape.max_copies || p->copies[y] < 2 ||
        c.moves > s->limits->max_moves)
        return;
    const double x_share = p->load[x] / (p->copies[x] + 1);
    const double y_share = p->load[y] / (p->copies[y] - 1);
    const copy_change now = {.x = x,
                             .y = y,
                             .at = at,
                             .more = x_share - y_share,
                             .x_up = x_share - share_of(p, x),
                             .y_up = y_share - share_of(p, y)};
    /* The heaviest device is one of them. */
    if (is_hopeless(s, load_after(p, &now, s->heaviest)) ||
        (*held_at(p, at, x) > 0 && *held_at(p, at, y) < 2) || !raise_most(s, &now, y, &c.most) ||
        !raise_most(s, &now, x, &c.most))
        return;
    const double rest = largest_rest(s, &now);
    c.largest = rest > c.most ? rest : c.most;
    consider(s, &c);
}

/* Every change of a slot of the heaviest device, or of its experts, in its node. */
static void find_change(search *s) {
    const place_shape *shape = &s->p->shape;
    const uint32_t slots = device_slots(shape), node = s->heaviest / node_devices(shape);
    const uint32_t begin = node * node_devices(shape) * slots;
    const uint32_t end = begin + node_devices(shape) * slots;
    for (uint32_t a = s->heaviest * slots; a < (s->heaviest + 1) * slots; a++)
        for (uint32_t b = begin; b < end; b++) {
            if (s->limits->previous) {
                consider_copy(s, a, b);
                consider_copy(s, b, a);
            }
            if (b / slots != s->heaviest)
                consider_swap(s, a, b);
        }
}

static void apply(search *s) {
    placement *p = s->p;
    const uint32_t a = s->best.a, b = s->best.b;
    const int32_t x = p->expert_of[a], y = p->expert_of[b];
    placement_set(p, a, y);
    if (s->best.kind == CHANGE_SWAP) {
        placement_set(p, b, x);
    } else {
        p->copies[y]++;
        p->copies[x]--;
    }
    s->moves = s->best.moves;
    placement_weigh(p);
}

/*
 * Each step lowers the load of the heaviest device, and none rises above what that was: sorted, the
 * loads fall. Rounding could make two plans take turns; the bound ends that.
 */
void place_improve(placement *p, const place_limits *limits, const place_room *room) {
    search s = {.p = p, .limits = limits, .room = room};
    for (uint32_t d = 0; d < p->shape.devices; d++)
        room->by_load[d].index = d;
    for (uint64_t step = 0; step < (uint64_t)p->shape.slots * 8; step++) {
        sort_devices(&s);
        if (p->device_load[s.heaviest] <= limits->enough)
            return;
        if (limits->previous)
            list_holders(p, room);
        s.limit = p->device_load[s.heaviest] * (1 - PLACE_ROUNDING);
        s.best.kind = CHANGE_NONE;
        find_change(&s);
        if (s.best.kind == CHANGE_NONE)
            return;
        apply(&s);
    }
}

/* ---- Names that stay ----------------------------------------------------------------------- */

/* Parts of `size` slots: overlap [count, count] of part i of the plan and part j of `previous`. */
static void count_overlaps(const int32_t *now, const int32_t *previous, uint32_t count,
                           uint32_t size, const place_room *room) {
    for (uint32_t j = 0; j < count; j++)
        for (uint32_t i = 0; i < count; i++) {
            const int32_t *old = previous + (size_t)j * size, *new = now + (size_t)i *size;
            uint32_t same = 0;
            for (uint32_t s = 0; s < size; s++)
                room->count[old[s]] = 0;
            for (uint32_t s = 0; s < size; s++)
                room->count[new[s]] = 0;
            for (uint32_t s = 0; s < size; s++)
                room->count[old[s]]++;
            for (uint32_t s = 0; s < size; s++)
                if (room->count[new[s]] > 0) {
                    room->count[new[s]]--;
                    same++;
                }
            room->overlap[(size_t)i * count + j] = same;
        }
}

/* room->to: which part of `previous` each becomes, the most alike first. */
static void match_parts(uint32_t count, uint32_t size, const place_room *room) {
    memset(room->filled, 0, count * sizeof *room->filled);
    for (uint32_t i = 0; i < count; i++)
        room->to[i] = count;
    for (uint32_t same = size + 1; same-- > 0;)
        for (uint32_t i = 0; i < count; i++)
            for (uint32_t j = 0; j < count && room->to[i] == count; j++)
                if (!room->filled[j] && room->overlap[(size_t)i * count + j] == same) {
                    room->filled[j] = 1;
                    room->to[i] = j;
                }
}

/* Parts of the plan take the places of those of `previous` that are most like them. */
static void align_parts(int32_t *now, const int32_t *previous, uint32_t count, uint32_t size,
                        const place_room *room) {
    count_overlaps(now, previous, count, size, room);
    match_parts(count, size, room);
    for (uint32_t i = 0; i < count; i++)
        memcpy(room->expert_of + (size_t)room->to[i] * size, now + (size_t)i * size,
               size * sizeof *now);
    memcpy(now, room->expert_of, (size_t)count * size * sizeof *now);
}

/* The experts of one device: what `previous` has of them stays, the others fill what is left. */
static void align_slots(int32_t *now, const int32_t *previous, uint32_t size,
                        const place_room *room) {
    uint32_t free_slot = 0;
    for (uint32_t s = 0; s < size; s++)
        room->count[previous[s]] = 0;
    for (uint32_t s = 0; s < size; s++)
        room->count[now[s]] = 0;
    for (uint32_t s = 0; s < size; s++)
        room->count[now[s]]++;
    for (uint32_t s = 0; s < size; s++) {
        const bool stays = room->count[previous[s]] > 0;
        room->count[previous[s]] -= stays;
        room->expert_of[s] = stays ? previous[s] : -1;
    }
    for (uint32_t s = 0; s < size; s++)
        if (room->count[now[s]] > 0) {
            room->count[now[s]]--;
            while (room->expert_of[free_slot] >= 0)
                free_slot++;
            room->expert_of[free_slot] = now[s];
        }
    memcpy(now, room->expert_of, size * sizeof *now);
}

void place_align(placement *p, const int32_t *previous, const place_room *room) {
    const place_shape *shape = &p->shape;
    const uint32_t size = device_slots(shape), devices = node_devices(shape);
    const uint32_t node_slots = size * devices;
    align_parts(p->expert_of, previous, shape->nodes, node_slots, room);
    for (uint32_t n = 0; n < shape->nodes; n++) {
        const size_t first = (size_t)n * node_slots;
        align_parts(p->expert_of + first, previous + first, devices, size, room);
    }
    for (uint32_t d = 0; d < shape->devices; d++)
        align_slots(p->expert_of + (size_t)d * size, previous + (size_t)d * size, size, room);
    placement_count(p);
}
