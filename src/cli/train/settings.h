/* What `clmoe train` was asked for. */
#ifndef CLMOE_CLI_TRAIN_SETTINGS_H
#define CLMOE_CLI_TRAIN_SETTINGS_H

#include "method.h"
#include "text.h"

enum { MOST_PHASES = 8 };

/* K experts per token from step `first` on. */
typedef struct top_k_phase {
    uint32_t first, top_k;
} top_k_phase;

typedef struct train_settings {
    const char *texts[MOST_TEXTS];
    uint32_t num_texts;
    const char *out, *resume, *device, *engine;
    /* The model. */
    uint32_t context, layers, dim, hidden, experts, top_k, shared;
    clmoe_type type;
    bool skewed;
    /* How it learns. */
    uint32_t batch, sequence, steps, warmup, seed;
    double rate, decay, clip;
    /* Balance. */
    balance_methods methods;
    uint32_t balance_from;
    bool per_sequence;
    double z_loss, token_entropy;
    double capacity_factor;
    clmoe_keep keep;
    clmoe_overflow overflow;
    clmoe_noise noise;
    double noise_scale;
    uint32_t anneal;
    double expert_dropout, router_dropout, hidden_dropout;
    uint32_t soft_steps;
    top_k_phase top_k_phases[MOST_PHASES];
    uint32_t num_top_k_phases;
    /* What is written, and when. */
    uint32_t log_every, validate_every, save_every;
    bool no_cache;
} train_settings;

/*
 * Parses a command line; `option` becomes CLI_HELP, CLI_VERSION, CLI_END or CLI_BAD. What is not
 * said has its default. The texts of the values stay the caller's.
 */
bool settings_parse(train_settings *s, int argc, char **argv, int *option, problem *why);

#endif
