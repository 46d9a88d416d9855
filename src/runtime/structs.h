/* Public structs that begin with their size, which other versions of the headers have otherwise. */
#ifndef CLMOE_STRUCTS_H
#define CLMOE_STRUCTS_H

#include "status.h"

#include <stdbool.h>

/*
 * Takes the caller's struct into `own` of `size` bytes, which has the defaults: fields that an
 * older header does not have keep them, those that only a newer one has must be 0. `refusal` is the
 * status of a size that cannot be, and `name` the struct's in messages.
 */
clmoe_status struct_take(clmoe_status refusal, const char *name, const void *theirs, void *own,
                         size_t size);

/* Gives `own` of `size` bytes to the caller's struct of `given` bytes; what that has more is 0. */
void struct_give(const void *own, size_t size, void *theirs, size_t given);

/* The first of `count` words that is not 0; `count` if all are. */
size_t struct_used_word(const uint32_t *words, size_t count);

/* Whether all bytes from `begin` to `end` are 0. */
bool struct_is_zero(const void *bytes, size_t begin, size_t end);

/*
 * CLMOE_INVALID_DESC for what only a later header has, in any part of the descriptor; `prefix`
 * stands before its name in the sentence.
 */
clmoe_status struct_desc_unused(const clmoe_layer_desc *desc, const char *prefix);

#define STRUCT_TAKE_ARGS(args, own)                                                                \
    struct_take(CLMOE_INVALID_ARGUMENT, "args", (args), (own), sizeof *(own))

#endif
