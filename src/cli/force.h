/* A choice of experts that no router made, for measuring and debugging: made on the device. */
#ifndef CLMOE_CLI_FORCE_H
#define CLMOE_CLI_FORCE_H

#include "error.h"

typedef enum force_kind { FORCE_NONE, FORCE_ROUND_ROBIN, FORCE_ZIPF } force_kind;

typedef struct forced_routing {
    force_kind kind;
    double exponent; /* of Zipf */
    uint32_t seed;   /* of Zipf; the first expert of round robin, mod E */
} forced_routing;

#define FORCE_MOST_EXPONENT 16.0

/* "round-robin" or "zipf[:EXPONENT]"; leaves the seed. */
bool force_parse(const char *option, const char *text, forced_routing *forced, problem *why);

/* As force_parse() takes it, with the exponent and the seed. */
void force_text(const forced_routing *forced, char *text, size_t size);

/* What is filled, of a batch of `tokens`: K of E experts for each, with weights 1/K. */
typedef struct forced_batch {
    uint32_t tokens, experts, top_k;
    cl_mem ids;          /* [T,K] i32 */
    cl_mem pair_weights; /* [T,K] f32 */
} forced_batch;

/* Compiles the kernels, runs one on `queue` and waits for it. */
clmoe_status force_fill(const forced_routing *forced, cl_command_queue queue,
                        const forced_batch *batch);

#endif
