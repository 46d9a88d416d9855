/* Better placements from given ones: slots that change places or experts; and names that stay. */
#include "place.h"

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
    uint32_t heaviest, second, third; /* devices */
    uint32_t moves;
    double limit; /* most must be below */
    change best;
} search;

/* The heaviest device but for two; `devices` if there is no other. */
static uint32_t heaviest_but(const placement *p, uint32_t one, uint32_t other) {
    uint32_t best = p->shape.devices;
    for (uint32_t d = 0; d < p->shape.devices; d++)
        if (d != one && d != other &&
            (best == p->shape.devices || p->device_load[d] > p->device_load[best]))
            best = d;
    return best;
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
    /* Not where two copies of an expert would meet, but to part two others. */
    if (!(less > 0) || *held_at(p, to, x) >= *held_at(p, from, x) ||
        *held_at(p, from, y) >= *held_at(p, to, y))
        return;
    const double here = p->device_load[from] - less, there = p->device_load[to] + less;
    const double most = here > there ? here : there;
    const uint32_t next = to == s->second ? s->third : s->second;
    const double rest = next < p->shape.devices ? p->device_load[next] : 0;
    consider(s, &(change){CHANGE_SWAP, a, b, moves_with(s, moves_with(s, s->moves, a, y), b, x),
                          most, most > rest ? most : rest});
}

/* Fills `most` and `largest`, if slot a takes x instead of y. */
static void weigh_copy(const placement *p, change *c, int32_t x, int32_t y) {
    const uint32_t at = c->a / device_slots(&p->shape);
    const double x_share = p->load[x] / (p->copies[x] + 1);
    const double y_share = p->load[y] / (p->copies[y] - 1);
    for (uint32_t d = 0; d < p->shape.devices; d++) {
        const uint32_t xs = *held_at(p, d, x), ys = *held_at(p, d, y);
        double load =
            p->device_load[d] + xs * (x_share - share_of(p, x)) + ys * (y_share - share_of(p, y));
        if (d == at)
            load += x_share - y_share;
        c->largest = load > c->largest ? load : c->largest;
        if (xs + ys > 0)
            c->most = load > c->most ? load : c->most;
    }
}

static void consider_copy(search *s, uint32_t a, uint32_t b) {
    const placement *p = s->p;
    const uint32_t at = a / device_slots(&p->shape);
    const int32_t y = p->expert_of[a], x = p->expert_of[b];
    change c = {.kind = CHANGE_COPY, .a = a, .b = b, .moves = moves_with(s, s->moves, a, x)};
    if (x == y || p->copies[x] >= p->shape.max_copies || p->copies[y] < 2 ||
        c.moves > s->limits->max_moves || (*held_at(p, at, x) > 0 && *held_at(p, at, y) < 2))
        return;
    weigh_copy(p, &c, x, y);
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
void place_improve(placement *p, const place_limits *limits) {
    search s = {.p = p, .limits = limits};
    for (uint64_t step = 0; step < (uint64_t)p->shape.slots * 8; step++) {
        s.heaviest = heaviest_but(p, p->shape.devices, p->shape.devices);
        if (p->device_load[s.heaviest] <= limits->enough)
            return;
        s.second = heaviest_but(p, s.heaviest, s.heaviest);
        s.third = heaviest_but(p, s.heaviest, s.second);
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
