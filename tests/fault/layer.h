/*
 * An OpenCL layer, loaded by the ICD loader through OPENCL_LAYERS: it counts the calls a program
 * makes, makes the one asked for fail, and counts the objects that are alive. CLMOE_FAULT_CALL and
 * CLMOE_FAULT_LASTING in the environment ask for CL_OUT_OF_RESOURCES from the start.
 */
#ifndef FAULT_LAYER_H
#define FAULT_LAYER_H

#include "clmoe/clmoe.h"

#include <stdbool.h>

typedef struct fault_layer {
    /*
     * Counts calls from 1 anew. Call `nth` returns `code` instead of being made, and so do all
     * after it if `lasting`; 0: none. Retains and releases are not counted, but clRetainContext is.
     */
    void (*arm)(unsigned nth, cl_int code, bool lasting);
    unsigned (*calls)(void);
    /* The first call that was made to fail since arm(), "" if none was. */
    const char *(*failed)(void);
    /* Calls since arm() that make objects, compile, copy or wait, and the last of them. */
    unsigned (*heavy_calls)(void);
    const char *(*heavy)(void);
    /* References to OpenCL objects that the program holds. */
    long (*live)(void);
    /* Whether the loader has put the layer in. */
    bool (*loaded)(void);
} fault_layer;

/* The symbol to look up: a `const fault_layer`. */
#define FAULT_LAYER_SYMBOL "clmoe_fault_layer"

#endif
