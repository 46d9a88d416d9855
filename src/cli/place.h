/* clmoe balance --place: the experts of a layer on devices, from the load that was measured. */
#ifndef CLMOE_CLI_PLACE_H
#define CLMOE_CLI_PLACE_H

#include "error.h"
#include "output.h"

#include <jansson.h>

typedef struct place_options {
    bool wanted;
    uint32_t replicas, devices, nodes;
    uint32_t groups; /* 0: those of the model's router */
    uint32_t max_moves;
    double tolerance;
    const char *previous; /* a file that --plan wrote, or NULL */
    output plan;
} place_options;

/* Start from {0}. */
typedef struct placement {
    clmoe_place_args args;
    double *load;                       /* [E] */
    int32_t *previous, *slots, *copies; /* [replicas], NULL without; [replicas]; [E] */
    double before, after, *device_load; /* [devices] */
    uint32_t moves, doubles;
} placement;

/* Reads the previous plan, and refuses what cannot be placed, before the load is known. */
clmoe_status placement_open(const place_options *o, const clmoe_layer_desc *desc, placement *p);

/* load [E]: pairs per expert. */
clmoe_status placement_make(placement *p, const uint32_t *load);

void placement_print(const placement *p);
json_t *placement_json(const placement *p);
/* The same to the file of --plan. */
clmoe_status placement_write(place_options *o, const placement *p);
void placement_close(placement *p);

#endif
