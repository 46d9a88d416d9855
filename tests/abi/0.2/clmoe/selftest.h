/*
 * clmoe, the self-test: whether a device computes what the formulas say. Part of clmoe.h, which
 * includes it.
 *
 * SPDX-License-Identifier: Apache-2.0
 *
 * clmoe_selftest() runs small layers of every policy, top-k form and storage type on every engine
 * that the device has, forward and backward, and compares what they give with
 *   - the host, which computes the layer in double precision straight from the formulas of clmoe.h,
 *     and some elements of each gradient by differences;
 *   - the engine "ref", all elements, where that agrees with the host;
 *   - a second run of the same batch, whose bits must be the same;
 * and with the host once more by packed weights, where the engine has them: see pack.h.
 * Layers with a state, whose statistics, losses and next state are compared too, are of the router,
 * which all engines share: "ref" alone runs them, or options.engine.
 * `clmoe selftest` prints it: the proof that a device works, and what a report of a defect needs.
 */
#ifndef CLMOE_SELFTEST_H
#define CLMOE_SELFTEST_H

#include "clmoe.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef uint32_t clmoe_selftest_status;
enum {
    CLMOE_SELFTEST_PASSED = 0,
    CLMOE_SELFTEST_DIFFERS = 1, /* a number is off by more than the tolerance, or not repeatable */
    CLMOE_SELFTEST_SKIPPED = 2, /* the engine cannot run such a layer on this device */
    CLMOE_SELFTEST_FAILED = 3,  /* a call failed: a kernel did not compile, the driver refused */
};

/*
 * What came of one batch of one layer on one engine. The errors are those of the comparison that
 * is worst, as a share of what is allowed, or, where something differs, of the first array in the
 * chain of steps that does; 0 where nothing was compared.
 */
typedef struct clmoe_selftest_result {
    size_t struct_size; /* of this struct in the library */
    const char *layer;  /* "token choice 2 of 5": what the layer is; it has one name */
    const char *batch;  /* "13 tokens, masked" */
    const char *engine; /* of clmoe_engine_name() */
    clmoe_type type;    /* of x and of the experts' weights */
    clmoe_selftest_status status;
    const char *array;      /* which array: "y", "stats", ...; "" where nothing was compared */
    const char *against;    /* "host", "ref", "repeat" or "host, packed weights" */
    double norm_error;      /* ||got - want|| / ||want|| */
    double norm_tolerance;  /* allowed */
    double worst_error;     /* largest |got - want| / (|want| + mean of all |want|) */
    double worst_tolerance; /* allowed */
    /*
     * A sentence about what is not passed: which element is off and by how much, why it was
     * skipped, which call failed, and of a kernel that did not build the first lines of the log.
     * Else "".
     */
    const char *message;
} clmoe_selftest_result;

/* Start with clmoe_selftest_options_init(); what is left 0 is not given. */
typedef struct clmoe_selftest_options {
    size_t struct_size;
    const char *engine; /* this one alone, or NULL: all; "ref" is run all the same */
    const char *layer;  /* layers whose names have this in them, or NULL: all */
    /*
     * Receives each result, or NULL. Called on the calling thread; the result and its texts are
     * valid until it returns. Not 0 stops the test.
     */
    int (*report)(void *user, const clmoe_selftest_result *result);
    void *user;
} clmoe_selftest_options;

static inline void clmoe_selftest_options_init(clmoe_selftest_options *options) {
    memset(options, 0, sizeof *options);
    options->struct_size = sizeof *options;
}

/* How many results there were of each status. */
typedef struct clmoe_selftest_summary {
    size_t struct_size; /* sizeof(clmoe_selftest_summary), set by the caller */
    uint32_t passed, differs, skipped, failed;
    uint32_t stopped;  /* 1: by the callback */
    uint32_t reserved; /* 0 */
} clmoe_selftest_summary;

/*
 * Runs the self-test on a queue of its own and waits for it. A case that fails does not stop the
 * others: success means that the test was done, and `summary` says what came of it; the device
 * passes if differs and failed are 0. `options` may be NULL. All memory is given back. Errors:
 * CLMOE_INVALID_ARGUMENT, also for an engine or a layer that there is not; OpenCL's for the queue;
 * CLMOE_OUT_OF_MEMORY.
 */
CLMOE_API clmoe_status clmoe_selftest(clmoe_context *context, const clmoe_selftest_options *options,
                                      clmoe_selftest_summary *summary);

#ifdef __cplusplus
}
#endif

#endif
