#include "information.h"
#include "text.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

void count_pairs(const choices *c, const token_labels *labels, uint64_t *pairs) {
    memset(pairs, 0, (size_t)c->experts * labels->kinds * sizeof *pairs);
    for (uint32_t t = 0; t < c->tokens; t++)
        for (uint32_t i = c->first[t]; i < c->first[t + 1]; i++)
            pairs[(size_t)c->chosen[i] * labels->kinds + labels->of[t]]++;
}

static double sum_of(const uint64_t *counts, uint32_t count) {
    uint64_t sum = 0;
    for (uint32_t i = 0; i < count; i++)
        sum += counts[i];
    return (double)sum;
}

double entropy_bits(const uint64_t *counts, uint32_t count) {
    const double sum = sum_of(counts, count);
    double bits = 0;
    for (uint32_t i = 0; i < count; i++)
        if (counts[i] > 0)
            bits -= (double)counts[i] / sum * log2((double)counts[i] / sum);
    return bits;
}

/* The sums of the columns of [rows, columns]. */
static void sum_columns(const uint64_t *counts, uint32_t rows, uint32_t columns, uint64_t *sums) {
    memset(sums, 0, columns * sizeof *sums);
    for (uint32_t r = 0; r < rows; r++)
        for (uint32_t c = 0; c < columns; c++)
            sums[c] += counts[(size_t)r * columns + c];
}

double mutual_bits(const uint64_t *counts, uint32_t rows, uint32_t columns) {
    uint64_t sums[MOST_KINDS];
    double bits = 0;
    sum_columns(counts, rows, columns, sums);
    const double all = sum_of(sums, columns);
    for (uint32_t r = 0; r < rows; r++) {
        const uint64_t *row = counts + (size_t)r * columns;
        const double here = sum_of(row, columns);
        for (uint32_t c = 0; c < columns; c++)
            if (row[c] > 0)
                bits +=
                    (double)row[c] / all * log2((double)row[c] / here * (all / (double)sums[c]));
    }
    return fmax(bits, 0);
}

/* Fisher and Yates. */
void shuffle_labels(const token_labels *labels, uint32_t tokens, uint64_t seed, uint32_t draw) {
    for (uint32_t left = tokens; left > 1; left--) {
        const uint64_t bits = random_bits(seed, ((uint64_t)draw << 32) + left);
        const uint32_t other = (uint32_t)(bits % left);
        const uint8_t kept = labels->of[left - 1];
        labels->of[left - 1] = labels->of[other];
        labels->of[other] = kept;
    }
}

static clmoe_status describe(const choices *c, uint32_t kinds, const uint64_t *pairs,
                             information *about) {
    uint64_t sums[MOST_KINDS];
    uint64_t *loads = calloc(c->experts, sizeof *loads);
    if (loads == NULL)
        return cli_fail(CLMOE_OUT_OF_MEMORY, "no memory for the load of %u experts",
                        (unsigned)c->experts);
    for (uint32_t e = 0; e < c->experts; e++)
        loads[e] = (uint64_t)sum_of(pairs + (size_t)e * kinds, kinds);
    sum_columns(pairs, c->experts, kinds, sums);
    *about = (information){.mutual = mutual_bits(pairs, c->experts, kinds),
                           .label_entropy = entropy_bits(sums, kinds),
                           .expert_entropy = entropy_bits(loads, c->experts)};
    if (about->label_entropy > 0)
        about->normalised = about->mutual / about->label_entropy;
    free(loads);
    return CLMOE_SUCCESS;
}

/* Mean and standard deviation of the SHUFFLES values of a layer. */
static void describe_shuffles(const double *values, information *about) {
    double sum = 0, squares = 0;
    for (uint32_t i = 0; i < SHUFFLES; i++)
        sum += values[i];
    about->shuffled = sum / SHUFFLES;
    for (uint32_t i = 0; i < SHUFFLES; i++)
        squares += (values[i] - about->shuffled) * (values[i] - about->shuffled);
    about->deviation = sqrt(squares / (SHUFFLES - 1));
}

/* Room for permuted labels, their counts, and I of every layer and permutation. */
typedef struct shuffles {
    token_labels labels;
    uint64_t *pairs; /* [experts, kinds] */
    double *values;  /* [layers, SHUFFLES] */
} shuffles;

static clmoe_status shuffles_create(shuffles *s, const choices *layers, uint32_t count,
                                    const token_labels *labels) {
    const uint32_t tokens = layers[0].tokens;
    s->labels = (token_labels){malloc((size_t)tokens + 1), labels->kinds};
    s->pairs = malloc((size_t)layers[0].experts * labels->kinds * sizeof *s->pairs);
    s->values = malloc((size_t)count * SHUFFLES * sizeof *s->values);
    if (s->labels.of == NULL || s->pairs == NULL || s->values == NULL)
        return cli_fail(CLMOE_OUT_OF_MEMORY, "no memory for the labels of %u tokens",
                        (unsigned)tokens);
    memcpy(s->labels.of, labels->of, tokens);
    return CLMOE_SUCCESS;
}

static void shuffles_free(shuffles *s) {
    free(s->labels.of);
    free(s->pairs);
    free(s->values);
}

clmoe_status information_measure(const choices *layers, uint32_t count, const token_labels *labels,
                                 uint64_t seed, uint64_t *const *pairs, information *about) {
    clmoe_status status = CLMOE_SUCCESS;
    shuffles s = {0};
    TRY(shuffles_create(&s, layers, count, labels));
    for (uint32_t l = 0; l < count; l++) {
        count_pairs(&layers[l], labels, pairs[l]);
        TRY(describe(&layers[l], labels->kinds, pairs[l], &about[l]));
    }
    for (uint32_t draw = 0; draw < SHUFFLES; draw++) {
        shuffle_labels(&s.labels, layers[0].tokens, seed, draw);
        for (uint32_t l = 0; l < count; l++) {
            count_pairs(&layers[l], &s.labels, s.pairs);
            s.values[(size_t)l * SHUFFLES + draw] =
                mutual_bits(s.pairs, layers[l].experts, labels->kinds);
        }
    }
    for (uint32_t l = 0; l < count; l++)
        describe_shuffles(s.values + (size_t)l * SHUFFLES, &about[l]);
done:
    shuffles_free(&s);
    return status;
}
