/*
 * Who gets what: the experts that a model chooses for the tokens of texts, by the class of the
 * token's own byte, the last of its context, and by the file that it is of. Pairs count as they
 * were chosen, those that then found no place included.
 */
#ifndef CLMOE_CLI_TRAIN_TRACE_H
#define CLMOE_CLI_TRAIN_TRACE_H

#include "classes.h"
#include "information.h"
#include "model.h"

typedef enum trace_label { TRACE_CLASS, TRACE_SOURCE, TRACE_LABELS } trace_label;

/* Of one kind of label. */
typedef struct trace_counts {
    uint32_t kinds;     /* BYTE_CLASSES, or the number of files */
    uint64_t **pairs;   /* [layers] of [experts, kinds] */
    information *about; /* [layers] */
} trace_counts;

/* Start from {0}. */
typedef struct trace {
    uint32_t layers, experts;
    uint32_t tokens; /* of all files */
    trace_counts by[TRACE_LABELS];
} trace;

/*
 * Routes `each` tokens of every file, in sequences spread evenly over it, as in validation after
 * `steps` steps; run and text have passed the checks below, and the model was created with the
 * text. `seed` is of the shuffles. After an error trace_free(), too.
 */
clmoe_status trace_measure(trace *t, train_model *m, const corpus *text, uint32_t steps,
                           uint32_t each, uint64_t seed);
void trace_free(trace *t);

/* Room for counts, all 0, of the trace's layers and experts. After an error trace_free(), too. */
clmoe_status trace_create_counts(const trace *t, uint32_t kinds, trace_counts *counts);

/* Soft MoE has no choice to trace: refused. */
clmoe_status trace_check_run(const train_settings *s);
/* Whether every file has so many tokens. */
clmoe_status trace_check_text(const corpus *text, uint32_t each);

/* Pairs of an expert; of a layer. */
uint64_t trace_expert_pairs(const trace *t, uint32_t layer, uint32_t expert);
uint64_t trace_layer_pairs(const trace *t, uint32_t layer);

/*
 * shares [kinds]: of the pairs of an expert those of each label; they sum to 1, or are all 0 where
 * it has none. With expert = experts those of the whole layer. A layer's are the rows of a heat
 * map.
 */
void trace_shares(const trace *t, trace_label label, uint32_t layer, uint32_t expert,
                  double *shares);

#endif
