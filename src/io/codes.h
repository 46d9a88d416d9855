/*
 * How weights are coded in safetensors files, as a table: how a format is found, which shapes its
 * tensors have, and how rows of it become floats. Knows no models.
 */
#ifndef CLMOE_CODES_H
#define CLMOE_CODES_H

#include "safetensors.h"

/* How the tensor with the codes of a matrix [N,K] is laid out. */
typedef enum code_layout {
    CODES_BYTES,  /* [N,K], a byte each */
    CODES_PAIRS,  /* [N,K/2], two in a byte, the low half first */
    CODES_BLOCKS, /* [E,N,K/32,16], as pairs; a stack */
} code_layout;

/* Which elements share a scale. */
typedef enum code_grid {
    GRID_BLOCKS, /* [ceil(N/n), ceil(K/k)]: blocks of n x k, those at the edges short */
    GRID_ANY,    /* one, one per row, or blocks: the shape tells */
    GRID_GROUPS, /* [..,K/32] */
} code_grid;

/* A row of the table. Lists are words separated by blanks. */
typedef struct code_format {
    const char *name;        /* for sentences: "MXFP4" */
    const char *end;         /* the end of the name of the tensor with the codes, */
    const char *scales;      /* what stands there in the name of its scales, */
    const char *plain;       /* and in that of a tensor of plain numbers */
    const char *types;       /* the dtypes of the codes; others mean something else */
    const char *scale_types; /* the dtypes of the scales; others are an error */
    const char *methods;     /* the quant_method of models that have it */
    bool certain;            /* whether name and dtype alone tell, so that scales must be there */
    code_layout layout;
    code_grid grid;
    /* Codes [first, first + count) behind `codes` as floats, not scaled. */
    void (*decode)(const unsigned char *codes, size_t first, size_t count, float *out);
} code_format;

/* The rows of the table; NULL behind the last. */
const code_format *code_format_at(size_t index);

/* Whether `word` is one of the list's. */
bool code_list_has(const char *list, const char *word);

/* Rows and columns that share a scale in GRID_BLOCKS, if a model does not say. */
#define CODE_BLOCK 128

/* A matrix, or a stack of some, in codes. */
typedef struct coded {
    const code_format *format;
    const safetensors *codes_file, *scales_file;
    const st_tensor *codes, *scales;
    st_tensor plain;        /* what it stands for: the codes' name, the shape of the numbers */
    uint64_t rows, columns; /* of all matrices together, and of each */
    uint64_t block_rows, block_columns; /* that share a scale */
} coded;

/*
 * Fills what follows from format, files and tensors, which are set: checks dtypes and shapes.
 * `block`: rows and columns that share a scale in GRID_BLOCKS. CLMOE_BAD_FILE names the tensor.
 */
clmoe_status coded_check(coded *c, const uint32_t block[2]);

/*
 * Numbers [first, first + count), row-major, as f32: code times scale, rounded once. Reads the
 * files in pieces of a fixed size. Errors: CLMOE_IO, CLMOE_BAD_FILE, CLMOE_OUT_OF_MEMORY.
 */
clmoe_status coded_read_f32(const coded *c, uint64_t first, size_t count, float *out);

/* Single codes. */
float code_e4m3(unsigned char code); /* e4m3fn: 0x7F and 0xFF are NaN, there is no infinity */
float code_e8m0(unsigned char code); /* 2^(code - 127), 0 a subnormal; 255 is NaN */
float code_e2m1(unsigned char code); /* of the lower four bits */

#endif
