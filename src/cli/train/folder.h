/*
 * The folder of a run. Files in it are written beside and renamed, so that each is whole at any
 * moment, whatever kills the process.
 */
#ifndef CLMOE_CLI_TRAIN_FOLDER_H
#define CLMOE_CLI_TRAIN_FOLDER_H

#include "../error.h"

#include <limits.h>
#include <stdio.h>

/* A file that is being replaced. Start from {0}. */
typedef struct folder_file {
    char path[PATH_MAX], temporary[PATH_MAX];
    FILE *stream;
} folder_file;

/* Whether a folder can be that of a new run: it is not there, or empty. */
clmoe_status folder_check(const char *folder);
/*
 * One process at a time writes in a folder: others are refused until folder_unlock(), or the end of
 * the process. Start from {0}. A file system without locks has none.
 */
typedef struct folder_guard {
    int fd; /* + 1, so that 0 is none */
} folder_guard;

clmoe_status folder_lock(const char *folder, folder_guard *guard);
void folder_unlock(folder_guard *guard);
/* Makes it, locks it, and looks again whether it is empty. */
clmoe_status folder_make(const char *folder, folder_guard *guard);

/* FOLDER/NAME; an error if that is too long. */
clmoe_status folder_path(const char *folder, const char *name, char path[PATH_MAX]);

clmoe_status folder_begin(folder_file *file, const char *folder, const char *name);
/* On the disk, then renamed. After an error the file is as it was. */
clmoe_status folder_end(folder_file *file);
/* After an error: what was begun goes. Allowed on {0} and after folder_end(). */
void folder_drop(folder_file *file);

#endif
