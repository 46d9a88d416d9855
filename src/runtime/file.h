/* Files of a model directory, before it is known what is in them. */
#ifndef CLMOE_FILE_H
#define CLMOE_FILE_H

#include "runtime/status.h"

#include <sys/stat.h>

/*
 * Opens a regular file for reading; the caller closes *fd, which is -1 on an error. Errors:
 * CLMOE_IO; CLMOE_BAD_FILE for a Git LFS pointer, which stands for a file not fetched.
 */
clmoe_status file_open(const char *path, int *fd, struct stat *info);

#endif
