/*
 * The oracle of the placement of experts: the plain rule of DeepSeek's expert-parallel load
 * balancer (github.com/deepseek-ai/EPLB), and what place.h says of any plan.
 */
#ifndef REF_PLACE_H
#define REF_PLACE_H

#include <stdint.h>

typedef struct ref_place_shape {
    uint32_t experts, replicas, groups, nodes, devices;
} ref_place_shape;

/* Nodes that groups are packed onto: 1 where they do not divide. */
uint32_t ref_place_nodes(const ref_place_shape *shape);

/* load [E] -> physical_to_logical [replicas]. */
void ref_place_plain(const ref_place_shape *shape, const double *load,
                     int32_t *physical_to_logical);

/* Largest / mean load of the devices. */
double ref_place_balance(const ref_place_shape *shape, const double *load,
                         const int32_t *physical_to_logical);

/* Slots whose expert an earlier slot of the same device has. */
uint32_t ref_place_doubles(const ref_place_shape *shape, const int32_t *physical_to_logical);

/* The fewest of them that a plan of this shape can have. */
uint32_t ref_place_least_doubles(const ref_place_shape *shape);

/* Slots that hold other experts. */
uint32_t ref_place_moves(const ref_place_shape *shape, const int32_t *from, const int32_t *to);

#endif
