/* The placement of one layer's experts on devices: new plans, and better ones from old ones. */
#ifndef CLMOE_BALANCE_PLACE_H
#define CLMOE_BALANCE_PLACE_H

#include "runtime/status.h"

#include <stdbool.h>

/* The same for all layers; nodes is 1 where groups are not packed. */
typedef struct place_shape {
    uint32_t experts, slots, devices, nodes, groups, max_copies;
} place_shape;

/* A plan, and what follows from it for a load. */
typedef struct placement {
    place_shape shape;
    const double *load;  /* [E] */
    int32_t *expert_of;  /* [slots] */
    uint32_t *copies;    /* [E] */
    uint32_t *held;      /* [devices, E]: copies on a device */
    double *device_load; /* [devices] */
} placement;

static inline uint32_t device_slots(const place_shape *shape) {
    return shape->slots / shape->devices;
}

static inline uint32_t node_devices(const place_shape *shape) {
    return shape->devices / shape->nodes;
}

/* Copies of an expert on a device. */
static inline uint32_t *held_at(const placement *p, uint32_t device, int32_t expert) {
    return &p->held[(size_t)device * p->shape.experts + (size_t)expert];
}

/* The load of each copy. */
static inline double share_of(const placement *p, int32_t expert) {
    return p->load[expert] / p->copies[expert];
}

/* An improvement below this share is rounding. */
#define PLACE_ROUNDING 1e-9

/* expert_of -> copies, held, device_load. */
void placement_count(placement *p);
/* copies, held -> device_load. */
void placement_weigh(placement *p);
/* Another expert for a slot: expert_of and held; copies and device_load are the caller's. */
void placement_set(placement *p, uint32_t slot, int32_t expert);

/* Memory for what is done with one layer after the other. */
typedef struct place_item {
    double weight;
    uint32_t index;
} place_item;

/* The heaviest first, of the same weight the lowest index: for qsort(). */
int place_heaviest_first(const void *left, const void *right);

typedef struct place_room {
    place_item *items;  /* [E] */
    uint32_t *node_of;  /* [groups] */
    uint32_t *filled;   /* [devices]: slots in use; of nodes: groups */
    uint32_t *overlap;  /* [devices, devices] */
    uint32_t *to;       /* [devices] */
    uint32_t *count;    /* [E] */
    int32_t *expert_of; /* [slots] */
    /* Of place_improve(): the devices by load, and, from a previous plan, those of each expert. */
    place_item *by_load;       /* [devices] */
    uint32_t *first, *holders; /* [E], [slots] */
} place_room;

/* A new plan by the rule of place.h, before slots change places. */
void place_new(placement *p, const place_room *room);

/* What place_improve() may do. */
typedef struct place_limits {
    const int32_t *previous; /* [slots]; NULL: slots only change places, any number of them */
    uint32_t max_moves;
    double enough; /* the largest load at which to stop */
} place_limits;

/* Lowers the largest load, one step after the other. */
void place_improve(placement *p, const place_limits *limits, const place_room *room);

/* Names nodes, devices and slots of the plan so that many hold what they held before. */
void place_align(placement *p, const int32_t *previous, const place_room *room);

#endif
