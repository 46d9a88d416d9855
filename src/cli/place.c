#include "place.h"

#include <stdio.h>
#include <stdlib.h>

enum { JSON_FLAGS = JSON_ENSURE_ASCII | JSON_REAL_PRECISION(9) };

/* ---- The previous plan ----------------------------------------------------------------------- */

/* physical_to_logical of the file -> previous [replicas]. */
static clmoe_status read_slots(const char *path, const json_t *root, uint32_t replicas,
                               int32_t *previous) {
    const json_t *slots = json_object_get(root, "physical_to_logical");
    if (!json_is_array(slots))
        return cli_fail(CLMOE_BAD_FILE, "--previous %s has no array physical_to_logical", path);
    if (json_array_size(slots) != replicas)
        return cli_fail(CLMOE_BAD_FILE,
                        "--previous %s has %zu slots in physical_to_logical, but --replicas is %u",
                        path, json_array_size(slots), (unsigned)replicas);
    for (uint32_t i = 0; i < replicas; i++) {
        const json_t *slot = json_array_get(slots, i);
        const json_int_t expert = json_integer_value(slot);
        if (!json_is_integer(slot) || expert < 0 || expert > INT32_MAX)
            return cli_fail(CLMOE_BAD_FILE,
                            "--previous %s: physical_to_logical[%u] is not the number of an expert",
                            path, (unsigned)i);
        previous[i] = (int32_t)expert;
    }
    return CLMOE_SUCCESS;
}

static clmoe_status read_previous(const char *path, uint32_t replicas, int32_t *previous) {
    clmoe_status status = CLMOE_SUCCESS;
    json_error_t error;
    json_t *root = json_load_file(path, JSON_REJECT_DUPLICATES, &error);
    if (root == NULL)
        TRY(cli_fail(CLMOE_BAD_FILE, "--previous %s: %s", path, error.text));
    TRY(read_slots(path, root, replicas, previous));
done:
    json_decref(root);
    return status;
}

/* ---- The plan -------------------------------------------------------------------------------- */

static clmoe_status allocate(const place_options *o, uint32_t experts, placement *p) {
    p->load = calloc(experts, sizeof *p->load);
    p->copies = calloc(experts, sizeof *p->copies);
    p->slots = calloc(o->replicas, sizeof *p->slots);
    p->device_load = calloc(o->devices, sizeof *p->device_load);
    if (o->previous != NULL)
        p->previous = calloc(o->replicas, sizeof *p->previous);
    if (p->load == NULL || p->copies == NULL || p->slots == NULL || p->device_load == NULL ||
        (o->previous != NULL && p->previous == NULL))
        return cli_fail(CLMOE_OUT_OF_MEMORY, "no memory for %u replicas", (unsigned)o->replicas);
    return CLMOE_SUCCESS;
}

clmoe_status placement_open(const place_options *o, const clmoe_layer_desc *desc, placement *p) {
    clmoe_status status = CLMOE_SUCCESS;
    const uint32_t routed = desc->router.groups.count > 0 ? desc->router.groups.count : 1;
    TRY(allocate(o, desc->num_experts, p));
    if (o->previous != NULL)
        TRY(read_previous(o->previous, o->replicas, p->previous));
    p->args = (clmoe_place_args){.struct_size = sizeof p->args,
                                 .layers = 1,
                                 .experts = desc->num_experts,
                                 .replicas = o->replicas,
                                 .devices = o->devices,
                                 .nodes = o->nodes,
                                 .groups = o->groups > 0 ? o->groups : routed,
                                 .max_moves = o->max_moves,
                                 .tolerance = o->tolerance,
                                 .load = p->load,
                                 .previous = p->previous,
                                 .physical_to_logical = p->slots,
                                 .copies = p->copies,
                                 .balance_before = &p->before,
                                 .balance_after = &p->after,
                                 .moves = &p->moves,
                                 .doubles = &p->doubles};
    TRY(LIB(clmoe_place(&p->args)));
done:
    return status;
}

clmoe_status placement_make(placement *p, const uint32_t *load) {
    clmoe_status status = CLMOE_SUCCESS;
    const uint32_t slots = p->args.replicas / p->args.devices;
    for (uint32_t e = 0; e < p->args.experts; e++)
        p->load[e] = load[e];
    TRY(LIB(clmoe_place(&p->args)));
    for (uint32_t s = 0; s < p->args.replicas; s++)
        p->device_load[s / slots] += p->load[p->slots[s]] / p->copies[p->slots[s]];
done:
    return status;
}

/* Groups are packed onto nodes where they divide. */
static bool is_packed(const placement *p) {
    return p->args.nodes > 1 && p->args.groups % p->args.nodes == 0;
}

/* ---- Reports --------------------------------------------------------------------------------- */

void placement_print(const placement *p) {
    const clmoe_place_args *a = &p->args;
    const uint32_t slots = a->replicas / a->devices;
    double sum = 0;
    printf("placement %u replicas of %u experts on %u devices, %u nodes, %u groups%s\n\n",
           (unsigned)a->replicas, (unsigned)a->experts, (unsigned)a->devices, (unsigned)a->nodes,
           (unsigned)a->groups, is_packed(p) ? " packed onto them" : "");
    for (uint32_t d = 0; d < a->devices; d++)
        sum += p->device_load[d];
    printf("%6s %10s %6s  experts\n", "device", "load", "/ mean");
    for (uint32_t d = 0; d < a->devices; d++) {
        const double share = sum > 0 ? p->device_load[d] * a->devices / sum : 0;
        printf("%6u %10.6g %6.3f ", (unsigned)d, p->device_load[d], share);
        for (uint32_t s = d * slots; s < (d + 1) * slots; s++)
            printf(" %d", (int)p->slots[s]);
        putchar('\n');
    }
    printf("\ndevices   largest / mean load %.3f before, %.3f after", p->before, p->after);
    if (a->previous != NULL)
        printf("; %u of %u slots change", (unsigned)p->moves, (unsigned)a->replicas);
    putchar('\n');
    if (p->doubles > 0)
        printf("          %u slots have an expert that their device has already\n",
               (unsigned)p->doubles);
}

static json_t *integers(const int32_t *values, uint32_t count) {
    json_t *array = json_array();
    for (uint32_t i = 0; i < count; i++)
        json_array_append_new(array, json_integer(values[i]));
    return array;
}

static json_t *pairs(const double *load, uint32_t count) {
    json_t *array = json_array();
    for (uint32_t i = 0; i < count; i++)
        json_array_append_new(array, json_integer((json_int_t)load[i]));
    return array;
}

static json_t *reals(const double *values, uint32_t count) {
    json_t *array = json_array();
    for (uint32_t i = 0; i < count; i++)
        json_array_append_new(array, json_real(values[i]));
    return array;
}

json_t *placement_json(const placement *p) {
    const clmoe_place_args *a = &p->args;
    return json_pack(
        "{sI sI sI sI sI sf sf sI sI so so so so}", "experts", (json_int_t)a->experts, "replicas",
        (json_int_t)a->replicas, "devices", (json_int_t)a->devices, "nodes", (json_int_t)a->nodes,
        "groups", (json_int_t)a->groups, "balance_before", p->before, "balance_after", p->after,
        "moves", (json_int_t)p->moves, "doubles", (json_int_t)p->doubles, "load",
        pairs(p->load, a->experts), "copies", integers(p->copies, a->experts), "device_load",
        reals(p->device_load, a->devices), "physical_to_logical", integers(p->slots, a->replicas));
}

clmoe_status placement_write(place_options *o, const placement *p) {
    problem why;
    FILE *file = output_open(&o->plan, &why);
    if (file == NULL)
        return cli_fail(CLMOE_IO, "%s", why.text);
    json_t *root = placement_json(p);
    const bool written = root != NULL && json_dumpf(root, file, JSON_COMPACT | JSON_FLAGS) == 0;
    fputc('\n', file);
    json_decref(root);
    if (!written) {
        output_drop(&o->plan);
        return cli_fail(CLMOE_IO, "cannot write the plan to %s", o->plan.path);
    }
    return output_close(&o->plan, &why) ? CLMOE_SUCCESS : cli_fail(CLMOE_IO, "%s", why.text);
}

void placement_close(placement *p) {
    free(p->load);
    free(p->copies);
    free(p->slots);
    free(p->previous);
    free(p->device_load);
}
