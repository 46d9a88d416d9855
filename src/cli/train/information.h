/*
 * What the choice of experts tells about labels of tokens, in bits. A pair is (token, expert that
 * it was given to); all counts are over pairs, so that a token with K experts counts K times.
 */
#ifndef CLMOE_CLI_TRAIN_INFORMATION_H
#define CLMOE_CLI_TRAIN_INFORMATION_H

#include "../error.h"

enum { MOST_KINDS = 256, SHUFFLES = 20 };

/* The experts of token t: chosen[first[t]] to chosen[first[t + 1] - 1]; any number of them. */
typedef struct choices {
    uint32_t tokens, experts;
    uint32_t *first; /* [tokens + 1] */
    uint16_t *chosen;
} choices;

/* Labels 0 to kinds - 1 of the tokens. */
typedef struct token_labels {
    uint8_t *of; /* [tokens] */
    uint32_t kinds;
} token_labels;

/*
 * Of expert and label. The estimate from counts is biased upwards, where they are independent by
 * about (E - K) (kinds - 1) / (2 ln 2 pairs) bits (Miller 1955 for K = 1): `shuffled` is what it
 * gives when the labels are permuted among the tokens, mean and standard deviation over SHUFFLES
 * permutations. Tokens count as independent: where a label holds for whole sequences, chance alone
 * gives several times more, as the tokens of a sequence are alike.
 */
typedef struct information {
    double mutual;                        /* I(expert; label) */
    double label_entropy, expert_entropy; /* H, each at least I */
    double normalised;                    /* I / H(label); 0 where H is 0 */
    double shuffled, deviation;
} information;

/* pairs [experts, kinds]: how many pairs an expert has with tokens of each label. */
void count_pairs(const choices *c, const token_labels *labels, uint64_t *pairs);

/* H of counts. */
double entropy_bits(const uint64_t *counts, uint32_t count);

/* I of a table of counts [rows, columns], columns at most MOST_KINDS: never negative. */
double mutual_bits(const uint64_t *counts, uint32_t rows, uint32_t columns);

/* A permutation of the labels that depends on seed and draw alone. */
void shuffle_labels(const token_labels *labels, uint32_t tokens, uint64_t seed, uint32_t draw);

/* Of `count` layers that chose for the same tokens: counts to pairs[layer], I to about[layer]. */
clmoe_status information_measure(const choices *layers, uint32_t count, const token_labels *labels,
                                 uint64_t seed, uint64_t *const *pairs, information *about);

#endif
