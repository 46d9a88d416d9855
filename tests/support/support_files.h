/* Files for tests: a temporary directory, and safetensors files made by hand, right or wrong. */
#ifndef SUPPORT_FILES_H
#define SUPPORT_FILES_H

#include "support.h"

/* cmocka group fixtures: a fresh temporary directory, removed with all its files. */
int files_setup(void **state);
int files_teardown(void **state);

/* "DIRECTORY/NAME"; valid until files_teardown(). */
const char *temp_path(const char *name);

/* Makes a directory in the temporary one and returns its path. */
const char *temp_directory(const char *name);

void write_bytes(const char *path, const void *data, size_t bytes);
void write_text(const char *path, const char *text);
char *read_text(const char *path); /* to be freed */

/* A length, `header`, and `data_bytes` bytes of data 0, 1, 2, ... */
void write_safetensors(const char *path, const char *header, size_t data_bytes);

/* Fails unless `status` is `want` and clmoe's sentence has every one of the texts, NULL at the end.
 */
void check_refused(clmoe_status status, clmoe_status want, const char *const *texts);
#define REFUSED(status, want, ...)                                                                 \
    check_refused((status), (want), (const char *const[]){__VA_ARGS__, NULL})

#endif
