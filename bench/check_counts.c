/* The counts of the quantile rule, by the oracle from the logits that were counted. */
#include "check.h"

#include "ref_quantile.h"

#include <stdlib.h>

enum { BINS = CLMOE_BIAS_BINS, CHUNK_TOKENS = 1024 };

/* As near to an edge as this a distance may be in either bin. */
#define EDGE 2e-6

/* What may be counted up to each bin, and what must be. */
typedef struct bounds {
    clmoe_layer_desc desc;
    float *bias;            /* [E] */
    float *logits;          /* [CHUNK_TOKENS,E] */
    double *clean, *scores; /* likewise */
    double *distances;      /* [E,CHUNK_TOKENS] */
    double edges[BINS];     /* where bins begin, but the first, which has no end */
    uint32_t *most, *least; /* [E,BINS]: counts by the lowest bin and by the highest one */
    uint32_t *got;          /* [E,BINS] */
} bounds;

static void bounds_free(bounds *b) {
    free(b->bias);
    free(b->logits);
    free(b->clean);
    free(b->scores);
    free(b->distances);
    free(b->most);
    free(b->least);
    free(b->got);
}

static clmoe_status bounds_make(const bench_counts *c, bounds *b) {
    const size_t experts = c->in->of.experts, some = CHUNK_TOKENS * experts, all = experts * BINS;
    *b = (bounds){.desc = counts_desc(c->in, NULL),
                  .bias = malloc(experts * sizeof *b->bias),
                  .logits = malloc(some * sizeof *b->logits),
                  .clean = malloc(some * sizeof *b->clean),
                  .scores = malloc(some * sizeof *b->scores),
                  .distances = malloc(some * sizeof *b->distances),
                  .most = calloc(all, sizeof *b->most),
                  .least = calloc(all, sizeof *b->least),
                  .got = malloc(all * sizeof *b->got)};
    if (!b->bias || !b->logits || !b->clean || !b->scores || !b->distances || !b->most ||
        !b->least || !b->got)
        return bench_no_memory("the counts");
    for (uint32_t e = 0; e < experts; e++)
        b->bias[e] = counts_bias(&c->in->of, e);
    for (uint32_t bin = 1; bin < BINS; bin++)
        b->edges[bin] = ref_quantile_edge(bin);
    return CLMOE_SUCCESS;
}

static uint32_t bin_of(const bounds *b, double distance) {
    uint32_t bin = 0, end = BINS;
    while (bin + 1 < end) {
        const uint32_t middle = (bin + end) / 2;
        if (distance >= b->edges[middle])
            bin = middle;
        else
            end = middle;
    }
    return bin;
}

static clmoe_status add_tokens(const bench_counts *c, uint32_t first, uint32_t tokens, bounds *b) {
    clmoe_status status = CLMOE_SUCCESS;
    const size_t experts = c->in->of.experts, count = tokens * experts;
    TRY(CL(clEnqueueReadBuffer(c->device->queue, c->logits, CL_TRUE,
                               first * experts * sizeof *b->logits, count * sizeof *b->logits,
                               b->logits, 0, NULL, NULL)));
    for (size_t i = 0; i < count; i++)
        b->clean[i] = (double)b->logits[i];
    ref_scores(&b->desc, tokens, b->clean, b->scores);
    ref_quantile_distances(&b->desc, tokens, b->scores, b->bias, NULL, b->distances);
    for (size_t e = 0; e < experts; e++)
        for (uint32_t t = 0; t < tokens; t++) {
            const double distance = b->distances[e * tokens + t];
            b->most[e * BINS + bin_of(b, distance - EDGE)]++;
            b->least[e * BINS + bin_of(b, distance + EDGE)]++;
        }
done:
    return status;
}

static void compare(const bounds *b, check_result *result) {
    for (size_t e = 0; e < b->desc.num_experts; e++) {
        uint64_t got = 0, least = 0, most = 0;
        for (size_t bin = 0; bin < BINS; bin++) {
            got += b->got[e * BINS + bin];
            least += b->least[e * BINS + bin];
            most += b->most[e * BINS + bin];
            if (got < least || got > most)
                complain(result, "expert %zu has %.0f tokens up to bin %zu, not %.0f to %.0f", e,
                         (double)got, bin, (double)least, (double)most);
        }
    }
}

clmoe_status check_counts(const bench_counts *c, check_result *result) {
    clmoe_status status = CLMOE_SUCCESS;
    const uint32_t tokens = c->in->of.tokens;
    const size_t bytes = (size_t)c->in->of.experts * BINS * sizeof(uint32_t);
    bounds b;
    TRY(bounds_make(c, &b));
    for (uint32_t t = 0; t < tokens; t += CHUNK_TOKENS)
        TRY(add_tokens(c, t, tokens - t < CHUNK_TOKENS ? tokens - t : CHUNK_TOKENS, &b));
    TRY(CL(clEnqueueReadBuffer(c->device->queue, c->buffers[COUNTS_BIAS_COUNTS], CL_TRUE, 0, bytes,
                               b.got, 0, NULL, NULL)));
    compare(&b, result);
done:
    bounds_free(&b);
    return status;
}
