/* clmoe balance --controller: a rule of the selection bias, and what it can be told. */
#ifndef CLMOE_CLI_CONTROLLER_H
#define CLMOE_CLI_CONTROLLER_H

#include "error.h"

#include <jansson.h>
#include <stdbool.h>

/* Start from CONTROLLER_DEFAULTS. */
typedef struct controller_options {
    clmoe_bias_rule rule;
    uint32_t centred; /* CLMOE_CENTRED_... */
    uint32_t device_groups;
    double gamma, kappa, beta;
} controller_options;

#define CONTROLLER_DEFAULTS                                                                        \
    { .rule = CLMOE_BIAS_SIGN, .gamma = 1e-3, .kappa = 2, .beta = 0.5 }

/* Which of its options were given. */
typedef struct controller_given {
    bool gamma, centred, kappa, beta, device_groups;
} controller_given;

/* The values of --controller and --centred. */
bool controller_parse(const char *text, clmoe_bias_rule *rule, problem *why);
bool controller_parse_centred(const char *text, uint32_t *centred, problem *why);

/* Refuses options that the rule does not have, and values out of their range. */
bool controller_check(const controller_options *o, const controller_given *given, problem *why);

/* Refuses a model that the rule is not for, as far as its descriptor tells. */
bool controller_fits(const controller_options *o, const clmoe_layer_desc *desc, problem *why);

/* Sets the bias of the arguments, whose other fields have their defaults. */
void controller_fill(const controller_options *o, clmoe_balance_args *args);

/* "smebu, gamma 0.001, kappa 2, beta 0.5": what the rule has. */
void controller_describe(const controller_options *o, char *text, size_t size);

/* The same as fields of an object; gamma is null for a rule without one. */
void controller_json(const controller_options *o, json_t *object);

#endif
