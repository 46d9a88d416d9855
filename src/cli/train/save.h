/*
 * What a run leaves to go on from and to be opened by others:
 *   run.json            the command line and the texts' checksums
 *   state.safetensors   all that training needs: a run that goes on from it is bit for bit the run
 *                       that was never stopped
 *   model.safetensors, config.json
 *                       the model under the names of Mixtral, see export.h
 */
#ifndef CLMOE_CLI_TRAIN_SAVE_H
#define CLMOE_CLI_TRAIN_SAVE_H

#include "model.h"

/* The words of the command line that a run began with. */
typedef struct run_words {
    char **words; /* words[0] is the subcommand; ended by NULL */
    int count;
    char *texts[MOST_TEXTS]; /* whole paths of run_find_texts() */
} run_words;

/* Whether run.json can hold the words. */
clmoe_status run_check_words(const run_words *words);
/* Writes run.json of a new run. */
clmoe_status run_save(const char *folder, const run_words *words, const corpus *text);
/*
 * The settings of a folder's run. They point into the words: free those with run_words_free(), also
 * after an error.
 */
clmoe_status run_load(const char *folder, run_words *words, train_settings *settings);
void run_words_free(run_words *words);
/* The texts where they were when the run began, as far as they are there; else as they were given.
 */
clmoe_status run_find_texts(const char *folder, run_words *words, train_settings *settings);
/* Whether the texts are those that the run began with. */
clmoe_status run_check_texts(const char *folder, const corpus *text);

/* The error of a run that has left the numbers. */
clmoe_status run_diverged(const char *folder, uint32_t step, const char *what);
/* Writes state.safetensors after `steps` steps. */
clmoe_status state_save(train_model *m, const char *folder, uint32_t steps);
/* Reads it, or else the model has its first values; *steps: how many were done. */
clmoe_status state_load(train_model *m, const char *folder, uint32_t *steps);

#endif
