/*
 * clmoe, the placement of experts on devices: which device holds which copies of which expert, from
 * the load that was measured. Part of clmoe.h, which includes it. clmoe_place() works on the host
 * and needs no device; clmoe_replicate() is a step that sends pairs to the copies.
 *
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef CLMOE_PLACE_H
#define CLMOE_PLACE_H

#include "clmoe.h"

#ifdef __cplusplus
extern "C" {
#endif

/*
 * place: load -> which expert lies in which slot. A slot has room for the weights of one expert, P
 * = replicas counts them all; device d has the slots [d P/devices, (d + 1) P/devices), node n the
 * devices [n devices/nodes, (n + 1) devices/nodes). The copies of an expert share its load evenly,
 * as clmoe_replicate() gives it to them; the load of a device is the sum over its slots.
 *
 * A new plan follows the hierarchical rule of DeepSeek's expert-parallel load balancer
 * (github.com/deepseek-ai/EPLB), layer by layer, for each:
 *
 *   1. If groups is a multiple of nodes, the groups of E / groups experts in a row are packed onto
 *      nodes, the heaviest first onto the lightest node with room, so that a token routed to few
 *      groups meets few nodes. Else all is one node.
 *   2. In a node every spare slot goes to the expert with the largest load / copies.
 *   3. In a node copies are packed onto devices, the heaviest first onto the lightest with room.
 *
 * Beyond that rule: ties go to the lowest index. Two copies of an expert never lie on one device
 * where that can be avoided, which is where a device has no more slots than its node has experts:
 * copies are bounded by the devices of a node. Two slots of a node change places while that lowers
 * the largest load.
 *
 * With `previous`, slots keep their expert where they can: nodes, devices and slots of the new plan
 * are named so that many stay; if it is no better, the previous plan stays as it is. With max_moves
 * or a tolerance the previous plan is improved step by step, by two slots that change places or by
 * one that takes another expert, whatever lowers the largest load most, until nothing does, or
 * max_moves slots of a layer would change, or the largest load is within the tolerance. Where that
 * ends above the tolerance, or leaves more copies on one device or groups on more nodes than one,
 * and the new plan is within max_moves, that is taken.
 *
 * Host memory, of the caller's. On an error nothing is written. CLMOE_INVALID_ARGUMENT names the
 * field and its value; CLMOE_OUT_OF_MEMORY.
 */
typedef struct clmoe_place_args {
    size_t struct_size;
    uint32_t layers;
    uint32_t experts;  /* E */
    uint32_t replicas; /* P >= E, a multiple of devices */
    uint32_t devices;  /* a multiple of nodes */
    uint32_t nodes;    /* 0: 1 */
    uint32_t groups;   /* of experts, divides E; 0: 1 */
    /* Bounds the copies of an expert, E * max_copies >= P; 0: P - E + 1, the most there can be. */
    uint32_t max_copies;
    /* Bounds the slots of a layer that change, against `previous`; 0: any number. */
    uint32_t max_moves;
    /*
     * With `previous`: what a plan's balance may be above the new plan's, as a share of it, if that
     * saves moves. Not negative; 0: nothing.
     */
    double tolerance;
    /* [layers, E], finite, not negative: counts of pairs, or an average of them. */
    const double *load;
    /* Optional [layers, P], of this shape: physical_to_logical that holds now; every expert in it.
     */
    const int32_t *previous;
    int32_t *physical_to_logical; /* [layers, P]; may be the place of `previous` */
    /* Optional [layers, E, max_copies]: an expert's slots, ascending, then -1. */
    int32_t *logical_to_physical;
    int32_t *copies; /* optional [layers, E]: from 1 to max_copies */
    /*
     * Optional [layers]: largest / mean load of the devices, 1 is even, 0 without load: of
     * `previous`, or without it of E experts in a row without copies, expert e on device floor(e
     * devices / E); and of the new plan.
     */
    double *balance_before, *balance_after;
    uint32_t *moves;   /* optional [layers]: slots whose expert is not that of `previous`, or 0 */
    uint32_t *doubles; /* optional [layers]: slots whose expert an earlier one of the device has */
} clmoe_place_args;

CLMOE_API clmoe_status clmoe_place(const clmoe_place_args *args);

/*
 * replicate: ids of experts -> ids of slots, which are the experts of a second layer with E = P and
 * external ids. Pair p of expert e goes to slot logical_to_physical[e][row % copies[e]], row its
 * place in the expert's bucket of the plan: the rank of the pair among those of its expert, in the
 * order of pairs where nothing is dropped, else in that of the keep rule. So every copy gets its
 * share to within one pair, and the same pairs each time.
 *
 * An identity expert E + z becomes P + z, the second layer's. What has no slot becomes -1: pairs
 * that the plan has no place for, ids outside [0, R), surplus pairs and those of masked tokens; and
 * where copies[e] is not positive or a slot not in [0, P). copies[e] counts as at most max_copies.
 *
 * Statistics of the experts are those of this layer with ids and plan, of the copies those of the
 * second layer with physical_ids; there a -1 of a token that is not masked counts as invalid_ids.
 * The buffers' rules are those of steps.h. Errors: CLMOE_INVALID_ARGUMENT; CLMOE_UNSUPPORTED with
 * Soft MoE, which has no pairs.
 */
typedef struct clmoe_replicate_args {
    size_t struct_size;
    uint32_t tokens;
    uint32_t replicas;   /* P, from E to 4096 - Z */
    uint32_t max_copies; /* from 1 to P */
    uint32_t reserved;   /* 0 */
    clmoe_buf ids;       /* [pairs] i32, as clmoe_plan() left them */
    clmoe_buf plan;
    clmoe_buf copies;              /* [E] i32 */
    clmoe_buf logical_to_physical; /* [E, max_copies] i32 */
    clmoe_buf physical_ids;        /* [pairs] i32, written */
} clmoe_replicate_args;

CLMOE_API clmoe_status clmoe_replicate(clmoe_layer *layer, cl_command_queue queue,
                                       const clmoe_replicate_args *args, cl_uint num_wait,
                                       const cl_event *wait, cl_event *event);

#ifdef __cplusplus
}
#endif

#endif
