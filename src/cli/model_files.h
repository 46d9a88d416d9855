/* The files of a model, which no output may overwrite. */
#ifndef CLMOE_CLI_MODEL_FILES_H
#define CLMOE_CLI_MODEL_FILES_H

#include "output.h"

/*
 * False if an output is a file of the model in `directory`, by whatever name, or would become one:
 * config.json, the index, or what it names. `option` begins the sentence. Without an output, true.
 */
bool model_is_spared(const char *directory, const output *o, const char *option, problem *why);

#endif
