/* The safetensors file a command reads its tensors from. */
#ifndef CLMOE_CLI_INPUT_H
#define CLMOE_CLI_INPUT_H

#include "io/safetensors.h"

/*
 * Opens the file of --input. "-" is standard input; that and a FIFO are read to their end into a
 * temporary file first.
 */
clmoe_status input_open(const char *path, safetensors **out);

#endif
