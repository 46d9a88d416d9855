/* The tensors of a block that hold codes, or belong to such. */
#ifndef CLMOE_CODED_H
#define CLMOE_CODED_H

#include "checkpoint.h"
#include "codes.h"

typedef enum coded_kind {
    CODED_NOT,    /* plain numbers, or none that clmoe knows */
    CODED_MATRIX, /* codes of a matrix */
    CODED_BESIDE, /* scales of such codes, or what only quantised activations need */
} coded_kind;

/*
 * What tensor `t` of the checkpoint is. Of a matrix *out has the format, files and tensors, and
 * `plain` is the name of the tensor that it stands for. CLMOE_BAD_FILE: scales without codes, codes
 * without scales or with two kinds.
 */
clmoe_status coded_find(const clmoe_checkpoint *c, const file_tensor *t, coded_kind *kind,
                        coded *out, char plain[2 * MAX_PREFIX]);

/* Checks a matrix against config.json and its own shapes, and that the caller allows to decode. */
clmoe_status coded_accept(const clmoe_checkpoint *c, coded *matrix);

/* CLMOE_UNSUPPORTED for a block without codes in a model that config.json says has some. */
clmoe_status coded_check_none(const block *b);

#endif
