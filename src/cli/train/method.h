/* The means of --balance: a table of what there is, and what each asks of a layer. */
#ifndef CLMOE_CLI_TRAIN_METHOD_H
#define CLMOE_CLI_TRAIN_METHOD_H

#include "../error.h"

enum { MOST_METHODS = 8 };

typedef enum method_kind {
    METHOD_NONE,
    METHOD_LOSS,          /* `which` is a clmoe_loss_kind, the number its weight */
    METHOD_RULE,          /* a clmoe_bias_rule; its rate */
    METHOD_POLICY,        /* a clmoe_policy; the number is the row's own */
    METHOD_REBALANCE,     /* of weights; mu */
    METHOD_ORTHOGONALITY, /* of the router's rows; its weight */
} method_kind;

typedef struct method_row {
    const char *name;
    method_kind kind;
    uint32_t which;
    double value; /* where --balance says none */
} method_row;

typedef struct balance_method {
    const method_row *row;
    double value;
    bool numbered; /* --balance says the value */
} balance_method;

/* All means that are combined. Start from {0}. */
typedef struct balance_methods {
    balance_method rows[MOST_METHODS];
    uint32_t count;
} balance_methods;

/* The rows by index, NULL past the last. */
const method_row *method_at(uint32_t index);

/* "switch:0.02,bias": names of the table, each with a number or without. */
bool methods_parse(const char *text, balance_methods *methods, problem *why);

/* The one of a kind, or NULL. */
const balance_method *methods_find(const balance_methods *methods, method_kind kind);

bool methods_is_loss(const balance_method *method, clmoe_loss_kind kind);

/* clmoe_balance_args' rule and rate: none without one. */
void methods_rule(const balance_methods *methods, clmoe_balance_args *args);

/* The losses, to losses[MOST_METHODS]; their number. */
uint32_t methods_losses(const balance_methods *methods, clmoe_loss_desc *losses);

#endif
