#include "text.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum { HELD_OUT_SHARE = 20, BYTES = 256 };

#define MOST_BYTES ((uint32_t)1 << 31)

/* ---- Random numbers ----------------------------------------------------------------------------
 */

/* SplitMix64 (Steele, Lea and Flood 2014) as a function of its counter. */
static uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9U;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebU;
    return z ^ (z >> 31);
}

uint64_t random_bits(uint64_t key, uint64_t counter) {
    return mix(mix(key + 0x9e3779b97f4a7c15U) + (counter + 1) * 0x9e3779b97f4a7c15U);
}

/* ---- Files
 * --------------------------------------------------------------------------------------- */

/* FNV-1a, to notice that a run goes on with other texts than it began with. */
static uint32_t checksum_of(const unsigned char *bytes, uint32_t size) {
    uint32_t sum = 2166136261U;
    for (uint32_t i = 0; i < size; i++)
        sum = (sum ^ bytes[i]) * 16777619U;
    return sum;
}

/* Opens a regular file: opening a pipe would wait for its other end. */
static clmoe_status open_file(const char *path, FILE **stream, uint64_t *size) {
    struct stat info;
    if (stat(path, &info) == 0 && !S_ISREG(info.st_mode))
        return cli_fail(CLMOE_IO, "--text '%s' is not a regular file", path);
    *stream = fopen(path, "rb");
    if (*stream == NULL || fstat(fileno(*stream), &info) != 0)
        return cli_fail(CLMOE_IO, "--text '%s' cannot be read: %s", path, strerror(errno));
    *size = (uint64_t)info.st_size;
    return CLMOE_SUCCESS;
}

/* Sequences that begin in a part: the bytes seen before, and the one foretold, lie in it. */
static uint32_t starts(const corpus *c, uint32_t begin, uint32_t end) {
    const uint32_t needed = c->context + c->sequence;
    return end - begin >= needed ? end - begin - needed + 1 : 0;
}

/* Appends a file of `size` bytes. */
static clmoe_status append(corpus *c, const char *path, FILE *stream, uint32_t size) {
    unsigned char *bytes = realloc(c->bytes, (size_t)c->size + size + 1); /* never 0 */
    if (bytes == NULL)
        return cli_fail(CLMOE_OUT_OF_MEMORY, "no memory for --text '%s', %u bytes", path,
                        (unsigned)size);
    c->bytes = bytes;
    if (fread(bytes + c->size, 1, size, stream) != size)
        return cli_fail(CLMOE_IO, "--text '%s' cannot be read to its end", path);
    text_file *file = &c->files[c->num_files++];
    *file = (text_file){.path = path,
                        .begin = c->size,
                        .held_out = c->size + size - size / HELD_OUT_SHARE,
                        .end = c->size + size,
                        .checksum = checksum_of(bytes + c->size, size)};
    c->size += size;
    return CLMOE_SUCCESS;
}

static clmoe_status read_one(corpus *c, const char *path) {
    clmoe_status status = CLMOE_SUCCESS;
    FILE *stream = NULL;
    uint64_t size = 0;
    const uint64_t least = (uint64_t)(c->context + c->sequence) * HELD_OUT_SHARE;
    TRY(open_file(path, &stream, &size));
    if (!c->whole && size < least)
        TRY(cli_fail(CLMOE_BAD_FILE,
                     "--text '%s' has %llu bytes; with --context %u and --sequence %u its last "
                     "twentieth is long enough from %llu on",
                     path, (unsigned long long)size, (unsigned)c->context, (unsigned)c->sequence,
                     (unsigned long long)least));
    if (size > MOST_BYTES - c->size)
        TRY(cli_fail(CLMOE_BAD_FILE, "--text '%s': the texts are more than 2^31 bytes", path));
    TRY(append(c, path, stream, (uint32_t)size));
done:
    if (stream != NULL)
        fclose(stream);
    return status;
}

clmoe_status corpus_read(corpus *c, const char *const *paths, uint32_t count) {
    clmoe_status status = CLMOE_SUCCESS;
    for (uint32_t i = 0; i < count; i++)
        TRY(read_one(c, paths[i]));
done:
    return status;
}

void corpus_free(corpus *c) {
    free(c->bytes);
    *c = (corpus){0};
}

/* ---- Batches
 * ------------------------------------------------------------------------------------- */

static void part_of(const text_file *file, bool held_out, uint32_t *begin, uint32_t *end) {
    *begin = held_out ? file->held_out : file->begin;
    *end = held_out ? file->end : file->held_out;
}

static uint64_t all_starts(const corpus *c, bool held_out) {
    uint64_t total = 0;
    for (uint32_t i = 0; i < c->num_files; i++) {
        uint32_t begin, end;
        part_of(&c->files[i], held_out, &begin, &end);
        total += starts(c, begin, end);
    }
    return total;
}

/* The positions of the sequence that is number `index` of all that there are. */
static void place_sequence(const corpus *c, bool held_out, uint64_t index, uint32_t *positions) {
    for (uint32_t i = 0; i < c->num_files; i++) {
        uint32_t begin, end;
        part_of(&c->files[i], held_out, &begin, &end);
        const uint32_t here = starts(c, begin, end);
        if (index < here) {
            for (uint32_t t = 0; t < c->sequence; t++)
                positions[t] = begin + c->context - 1 + (uint32_t)index + t;
            return;
        }
        index -= here;
    }
}

void corpus_draw(const corpus *c, uint64_t seed, uint32_t step, uint32_t sequences,
                 uint32_t *positions) {
    const uint64_t total = all_starts(c, false);
    for (uint32_t s = 0; s < sequences; s++) {
        const uint64_t drawn = random_bits(seed, ((uint64_t)step << 32) + s);
        place_sequence(c, false, drawn % total, positions + (size_t)s * c->sequence);
    }
}

void corpus_held_out(const corpus *c, uint32_t first, uint32_t sequences, uint32_t total,
                     uint32_t *positions) {
    const uint64_t all = all_starts(c, true);
    for (uint32_t s = 0; s < sequences; s++)
        place_sequence(c, true, (first + s) * all / total, positions + (size_t)s * c->sequence);
}

void corpus_sort(const corpus *c, const uint32_t *positions, uint32_t tokens, uint32_t *rows,
                 uint32_t *first) {
    for (uint32_t j = 0; j < c->context; j++) {
        uint32_t next[BYTES + 1] = {0};
        for (uint32_t t = 0; t < tokens; t++)
            next[c->bytes[positions[t] - j] + 1]++;
        next[0] = j * tokens;
        for (uint32_t b = 0; b < BYTES; b++) {
            first[j * BYTES + b] = next[b];
            next[b + 1] += next[b];
        }
        for (uint32_t t = 0; t < tokens; t++)
            rows[next[c->bytes[positions[t] - j]]++] = t;
    }
    first[c->context * BYTES] = c->context * tokens;
}
