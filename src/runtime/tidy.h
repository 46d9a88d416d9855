/* The rewriting that json.h tells of: from what others write to what jansson parses. */
#ifndef CLMOE_TIDY_H
#define CLMOE_TIDY_H

#include <stdbool.h>
#include <stddef.h>

typedef struct tidy_text {
    char *text; /* to be freed; no NUL at its end */
    size_t length;
} tidy_text;

/*
 * Rewrites `length` bytes. Text that is no JSON stays as it is, for jansson to refuse. False: no
 * memory, and out->text is NULL.
 */
bool json_tidy(const char *text, size_t length, tidy_text *out);

#endif
