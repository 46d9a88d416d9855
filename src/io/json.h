/* JSON files of a model directory. */
#ifndef CLMOE_JSON_H
#define CLMOE_JSON_H

#include "../status.h"

#include <jansson.h>
#include <stdbool.h>

/*
 * Reads and parses a regular file whose root is an object; the caller json_decref()s it. Errors:
 * CLMOE_IO, CLMOE_BAD_FILE, naming the file and the line.
 */
clmoe_status json_read(const char *path, json_t **root);

/* Whether jansson failed for lack of memory, not because of the text. */
bool json_out_of_memory(const json_error_t *error);

#endif
