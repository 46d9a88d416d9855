/*
 * What the fuzz targets share: a directory of their own for the files the library reads, and how a
 * checkpoint is gone through. Each target is a file with LLVMFuzzerTestOneInput(); libFuzzer calls
 * it, or main.c with the seeds.
 */
#ifndef FUZZ_H
#define FUZZ_H

#include <stddef.h>
#include <stdint.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* The directory, made at the first call and removed at exit. */
const char *fuzz_directory(void);

/* Writes a file there, in place of what it was. */
void fuzz_write(const char *name, const void *data, size_t size);

/* Copies a file of FUZZ_SEEDS there, once. */
void fuzz_copy(const char *seed, const char *name);

/* Opens the directory as a checkpoint and asks for the descriptors of its layers. */
void fuzz_checkpoint(void);

#endif
