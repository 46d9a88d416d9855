/*
 * The texts that `clmoe train` learns from: all files one after another in one array, of each the
 * last twentieth held out. What a step draws depends on seed and step alone.
 */
#ifndef CLMOE_CLI_TRAIN_TEXT_H
#define CLMOE_CLI_TRAIN_TEXT_H

#include "../error.h"

enum { MOST_TEXTS = 64 };

/* Positions [begin, held_out) are trained on, [held_out, end) held out. */
typedef struct text_file {
    const char *path;
    uint32_t begin, held_out, end;
    uint32_t checksum;
} text_file;

typedef struct corpus {
    unsigned char *bytes; /* [size] */
    uint32_t size;
    text_file files[MOST_TEXTS];
    uint32_t num_files;
    uint32_t context, sequence; /* bytes that a token sees; tokens in a row */
    bool whole;                 /* files of any length, for who holds nothing out */
} corpus;

/*
 * Reads the files. Each must be long enough for a sequence in both of its parts; together they are
 * at most 2^31 bytes. Errors name the file.
 */
clmoe_status corpus_read(corpus *c, const char *const *paths, uint32_t count);
void corpus_free(corpus *c);

/*
 * positions[sequences * c->sequence]: of step `step` of a run with `seed`, sequences that begin
 * anywhere in the part that is trained on.
 */
void corpus_draw(const corpus *c, uint64_t seed, uint32_t step, uint32_t sequences,
                 uint32_t *positions);

/* Of `total` sequences spread evenly over what is held out, `sequences` from `first` on. */
void corpus_held_out(const corpus *c, uint32_t first, uint32_t sequences, uint32_t total,
                     uint32_t *positions);

/*
 * The tokens by the byte at each distance, as embed_backward reads them: rows [context,T], first
 * [context * 256 + 1].
 */
void corpus_sort(const corpus *c, const uint32_t *positions, uint32_t tokens, uint32_t *rows,
                 uint32_t *first);

/* A uniform number of 64 bits: the same for the same key and counter. */
uint64_t random_bits(uint64_t key, uint64_t counter);

#endif
