/* The safetensors file a command reads its tensors from. */
#ifndef CLMOE_CLI_INPUT_H
#define CLMOE_CLI_INPUT_H

#include "error.h"

/*
 * Opens the file of --input. "-" is standard input; that and a FIFO are read to their end into a
 * temporary file first.
 */
clmoe_status input_open(const char *path, clmoe_tensors **out);

#endif
