#include "method.h"
#include "../options.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { NAME_SIZE = 40 };

static const method_row table[] = {
    {"none", METHOD_NONE, 0, 0},
    {"switch", METHOD_LOSS, CLMOE_LOSS_SWITCH, 0.01},
    {"squared", METHOD_LOSS, CLMOE_LOSS_SQUARED, 0.1},
    {"entropy", METHOD_LOSS, CLMOE_LOSS_ENTROPY, 0.01},
    {"l1", METHOD_LOSS, CLMOE_LOSS_L1, 0.01},
    {"max", METHOD_LOSS, CLMOE_LOSS_MAX, 0.05},
    {"minimax", METHOD_LOSS, CLMOE_LOSS_MINIMAX, 0.05},
    {"variance", METHOD_LOSS, CLMOE_LOSS_IMPORTANCE_VARIANCE, 1},
    {"cv2", METHOD_LOSS, CLMOE_LOSS_IMPORTANCE_CV2, 0.01},
    {"load", METHOD_LOSS, CLMOE_LOSS_LOAD_CV2, 0.01},
    {"smooth-load", METHOD_LOSS, CLMOE_LOSS_SMOOTH_LOAD, 0.01},
    {"bias", METHOD_RULE, CLMOE_BIAS_SIGN, 1e-3},
    {"proportional", METHOD_RULE, CLMOE_BIAS_PROPORTIONAL, 1e-2},
    {"quantile", METHOD_RULE, CLMOE_BIAS_QUANTILE, 0},
    {"smebu", METHOD_RULE, CLMOE_BIAS_SMEBU, 1e-2},
    {"rebalance", METHOD_REBALANCE, 0, 1},
    {"orthogonality", METHOD_ORTHOGONALITY, 0, 1e-3},
    {"expert-choice", METHOD_POLICY, CLMOE_POLICY_EXPERT_CHOICE, 1},
    {"sinkhorn", METHOD_POLICY, CLMOE_POLICY_SINKHORN, 100},
    {"all", METHOD_POLICY, CLMOE_POLICY_ALL_EXPERTS, 0},
    {"soft-moe", METHOD_POLICY, CLMOE_POLICY_SOFT_MOE, 1},
};

enum { ROWS = sizeof table / sizeof table[0] };

const method_row *method_at(uint32_t index) {
    return index < ROWS ? &table[index] : NULL;
}

static bool unknown_name(const char *name, problem *why) {
    char names[512] = "";
    for (size_t i = 0; i < ROWS; i++) {
        const size_t used = strlen(names);
        snprintf(names + used, sizeof names - used, "%s%s", i > 0 ? ", " : "", table[i].name);
    }
    return problem_set(why, "--balance has '%s', which is none of %s", name, names);
}

static bool is_policy(const balance_method *method, clmoe_policy policy) {
    return method->row->kind == METHOD_POLICY && method->row->which == policy;
}

/* Numbers that count something, or that nothing is left of. */
static bool fits(const balance_method *method, problem *why) {
    const double value = method->value;
    if (is_policy(method, CLMOE_POLICY_SINKHORN) &&
        (value < 1 || value > 1000 || value != floor(value)))
        return problem_set(why,
                           "--balance has %g for 'sinkhorn', which takes a whole number of "
                           "iterations from 1 to 1000",
                           value);
    if (method->row->kind == METHOD_POLICY && (value == 0 || value > 4096))
        return problem_set(why, "--balance has %g for '%s', but must be above 0 and at most 4096",
                           value, method->row->name);
    return true;
}

/* NAME[:NUMBER], the first `length` letters of `text`. */
static bool parse_one(const char *text, size_t length, balance_method *method, problem *why) {
    char word[NAME_SIZE];
    snprintf(word, sizeof word, "%.*s", (int)(length < NAME_SIZE ? length : NAME_SIZE - 1), text);
    char *colon = strchr(word, ':');
    if (colon != NULL)
        *colon = '\0';
    for (size_t i = 0; i < ROWS && method->row == NULL; i++)
        if (strcmp(word, table[i].name) == 0)
            method->row = &table[i];
    if (method->row == NULL)
        return unknown_name(word, why);
    method->value = method->row->value;
    if (colon == NULL)
        return true;
    if (method->value == 0)
        return problem_set(why, "--balance has a number for '%s', which takes none", word);
    method->numbered = true;
    return cli_real("--balance", colon + 1, &method->value, why) && fits(method, why);
}

/* Two means of one kind: only losses add up, and each once; a policy has its own choice. */
static bool goes_together(const balance_method *a, const balance_method *b, problem *why) {
    const bool same = a->row->kind == b->row->kind;
    const bool none = a->row->kind == METHOD_NONE || b->row->kind == METHOD_NONE;
    const bool chosen = (a->row->kind == METHOD_POLICY && b->row->kind == METHOD_RULE) ||
                        (b->row->kind == METHOD_POLICY && a->row->kind == METHOD_RULE);
    if (a->row == b->row || none || chosen || (same && a->row->kind != METHOD_LOSS))
        return problem_set(why, "--balance has '%s' and '%s', which do not go together",
                           a->row->name, b->row->name);
    return true;
}

bool methods_parse(const char *text, balance_methods *methods, problem *why) {
    *methods = (balance_methods){0};
    for (;; text++) {
        const size_t length = strcspn(text, ",");
        balance_method method = {.row = NULL};
        if (methods->count == MOST_METHODS)
            return problem_set(why, "--balance has more than %d means", MOST_METHODS);
        if (!parse_one(text, length, &method, why))
            return false;
        for (uint32_t i = 0; i < methods->count; i++)
            if (!goes_together(&methods->rows[i], &method, why))
                return false;
        methods->rows[methods->count++] = method;
        text += length;
        if (*text == '\0')
            return true;
    }
}

const balance_method *methods_find(const balance_methods *methods, method_kind kind) {
    for (uint32_t i = 0; i < methods->count; i++)
        if (methods->rows[i].row->kind == kind)
            return &methods->rows[i];
    return NULL;
}

bool methods_is_loss(const balance_method *method, clmoe_loss_kind kind) {
    return method->row->kind == METHOD_LOSS && method->row->which == kind;
}

void methods_rule(const balance_methods *methods, clmoe_balance_args *args) {
    const balance_method *rule = methods_find(methods, METHOD_RULE);
    if (rule == NULL)
        return;
    args->bias_rule = (clmoe_bias_rule)rule->row->which;
    args->bias_rate = (float)rule->value;
}

uint32_t methods_losses(const balance_methods *methods, clmoe_loss_desc *losses) {
    uint32_t count = 0;
    for (uint32_t i = 0; i < methods->count; i++)
        if (methods->rows[i].row->kind == METHOD_LOSS)
            losses[count++] = (clmoe_loss_desc){.kind = methods->rows[i].row->which,
                                                .weight = (float)methods->rows[i].value};
    return count;
}
