/*
 * JSON as others write it. Python writes numbers that JSON has not (NaN, Infinity, integers of any
 * size, 1e400) and strings that are no text (half of a surrogate pair, NUL); a key may be repeated.
 * None of it is an error in a value that nobody reads, so that it is rewritten before jansson sees
 * it: such a number becomes a string, which no reader takes for a number, such a character U+FFFD,
 * and a key that its object has already gets JSON_REPEATED at its end.
 */
#ifndef CLMOE_JSON_H
#define CLMOE_JSON_H

#include "runtime/status.h"

#include <jansson.h>
#include <stdbool.h>

#define JSON_REPEATED " (repeated)"

bool json_is_repeated(const char *key);

/*
 * Parses `length` bytes of the file `path`; the caller json_decref()s *root. Errors:
 * CLMOE_BAD_FILE, naming the file and the line; CLMOE_OUT_OF_MEMORY.
 */
clmoe_status json_parse(const char *path, const char *text, size_t length, json_t **root);

/* Reads and parses a regular file whose root is an object. Errors: CLMOE_IO, and as above. */
clmoe_status json_read(const char *path, json_t **root);

/* Whether jansson failed for lack of memory, not because of the text. */
bool json_out_of_memory(const json_error_t *error);

#endif
