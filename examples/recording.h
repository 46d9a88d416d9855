/* A recorded input and output: two f32 tensors NAME.x and NAME.y of a small safetensors file. */
#ifndef EXAMPLES_RECORDING_H
#define EXAMPLES_RECORDING_H

#include "common.h"
#include <stdio.h>
#include <string.h>

typedef struct recording {
    float *x, *y;
    size_t bytes; /* of each */
} recording;

/* Where the tensor lies whose name ends with `end`: the header is JSON, and `end` has the quote. */
static inline void find_tensor(const char *header, const char *end, size_t place[2]) {
    static const char format[] = "\"data_offsets\":[%zu,%zu]";
    const char *name = strstr(header, end);
    const char *offsets = name ? strstr(name, "\"data_offsets\"") : NULL;
    fail_unless(offsets && sscanf(offsets, format, &place[0], &place[1]) == 2,
                "the file has no tensor NAME.x or NAME.y");
    fail_unless(place[0] <= place[1] && place[1] < 1 << 30, "a tensor has wrong offsets");
}

/* Bytes place[0] to place[1] of the data, which begins at `data`. */
static inline float *read_tensor(FILE *file, size_t data, const size_t place[2]) {
    size_t bytes = place[1] - place[0];
    float *values = allocate(bytes);
    fail_unless(fseek(file, (long)(data + place[0]), SEEK_SET) == 0 &&
                    fread(values, 1, bytes, file) == bytes,
                "the file is too short");
    return values;
}

/* A safetensors file: the header's length in eight bytes, the header, the data. */
static inline recording recording_read(const char *path) {
    FILE *file = fopen(path, "rb");
    unsigned char length[8];
    size_t header = 0, x[2], y[2];
    fail_unless(file && fread(length, 1, sizeof length, file) == sizeof length, path);
    for (int i = 7; i >= 0; i--) /* the first byte is the lowest */
        header = header << 8 | length[i];
    fail_unless(header < 1 << 20, "this is no small safetensors file");
    char *text = allocate(header + 1);
    fail_unless(fread(text, 1, header, file) == header, "the file is too short");
    text[header] = '\0';
    find_tensor(text, ".x\"", x);
    find_tensor(text, ".y\"", y);
    recording r = {.x = read_tensor(file, sizeof length + header, x),
                   .y = read_tensor(file, sizeof length + header, y),
                   .bytes = x[1] - x[0]};
    fail_unless(y[1] - y[0] == r.bytes, "x and y differ in size");
    free(text);
    fclose(file);
    return r;
}

static inline void recording_free(recording *r) {
    free(r->x);
    free(r->y);
}

#endif
