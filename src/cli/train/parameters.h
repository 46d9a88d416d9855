/*
 * The parameters of the model of `clmoe train`: one array of f32, in which every matrix has its
 * place; gradients and moments are arrays of the same layout.
 */
#ifndef CLMOE_CLI_TRAIN_PARAMETERS_H
#define CLMOE_CLI_TRAIN_PARAMETERS_H

#include "settings.h"

/* What a parameter is; in this order they lie in the array. */
typedef enum parameter_kind {
    /* Read by the layers in the model's type, of which there is a copy. */
    PARAMETER_GATE_UP, /* [E,2H,D]: H gate rows, then H up rows */
    PARAMETER_DOWN,    /* [E,D,H] */
    PARAMETER_SHARED_GATE_UP,
    PARAMETER_SHARED_DOWN,
    /* Read as f32. */
    PARAMETER_ROUTER,       /* [E,D], with Soft MoE [E*p,D] */
    PARAMETER_NOISE_ROUTER, /* [E,D] */
    PARAMETER_HEAD,         /* [256,D] */
    /* Without weight decay. */
    PARAMETER_TABLE, /* [n,256,D] */
    PARAMETER_GAIN,  /* [D], of a block's norm; that of the head is block `layers` */
    PARAMETER_KINDS
} parameter_kind;

typedef struct parameter {
    parameter_kind kind;
    uint32_t block;
    uint32_t rank, shape[3];
    size_t first, count; /* its elements */
} parameter;

typedef struct parameters {
    parameter *rows;
    uint32_t count;
    size_t elements;
    /* Elements [0, copied) have a copy, [0, decayed) weight decay; both multiples of 16. */
    size_t copied, decayed;
} parameters;

clmoe_status parameters_create(parameters *p, const train_settings *s);
void parameters_free(parameters *p);

/* NULL if the model has none. */
const parameter *parameters_find(const parameters *p, parameter_kind kind, uint32_t block);

/*
 * The first values [elements], by the seed: normal with deviation 1 / sqrt(length of a row), tables
 * 1 / sqrt(n), gains 1; padding 0. --init skewed: row e of a router is multiplied by 1 + 3 e / E.
 */
void parameters_init(const parameters *p, const train_settings *s, float *values);

/* Of an expert with Soft MoE, as the library has it. */
enum { MOST_SLOTS = 256 };

/* Rows of the router: E, with Soft MoE E*p, p at most MOST_SLOTS + 1. */
uint32_t router_rows(const train_settings *s);

#endif
