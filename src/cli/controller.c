#include "controller.h"

#include <stdio.h>
#include <string.h>

#define COUNT(array) (sizeof(array) / sizeof(array)[0])

/* What a rule can be told besides its name. */
static const struct {
    const char *name;
    bool rate, centred, smebu, devices;
} rules[] = {
    [CLMOE_BIAS_NONE] = {.name = "none"},
    [CLMOE_BIAS_SIGN] = {"bias", .rate = true, .centred = true},
    [CLMOE_BIAS_PROPORTIONAL] = {"proportional", .rate = true, .centred = true},
    [CLMOE_BIAS_QUANTILE] = {"quantile"},
    [CLMOE_BIAS_SMEBU] = {"smebu", .rate = true, .centred = true, .smebu = true},
    [CLMOE_BIAS_DEVICE] = {"device", .rate = true, .centred = true, .devices = true},
};

static const char *const centrings[] = {
    [CLMOE_CENTRED_NONE] = "none", [CLMOE_CENTRED_BIAS] = "bias", [CLMOE_CENTRED_DELTA] = "delta"};

bool controller_parse(const char *text, clmoe_bias_rule *rule, problem *why) {
    for (size_t i = 0; i < COUNT(rules); i++)
        if (strcmp(text, rules[i].name) == 0) {
            *rule = (clmoe_bias_rule)i;
            return true;
        }
    return problem_set(why,
                       "--controller is '%s', but must be bias, proportional, smebu, quantile, "
                       "device or none",
                       text);
}

bool controller_parse_centred(const char *text, uint32_t *centred, problem *why) {
    for (size_t i = 0; i < COUNT(centrings); i++)
        if (strcmp(text, centrings[i]) == 0) {
            *centred = (uint32_t)i;
            return true;
        }
    return problem_set(why, "--centred is '%s', but must be bias, delta or none", text);
}

bool controller_check(const controller_options *o, const controller_given *given, problem *why) {
    const struct {
        const char *option;
        bool given, has;
        const char *lack;
    } all[] = {
        {"gamma", given->gamma, rules[o->rule].rate, "has no rate"},
        {"centred", given->centred, rules[o->rule].centred,
         o->rule == CLMOE_BIAS_NONE ? "moves no bias" : "has the mean 0 always"},
        {"kappa", given->kappa, rules[o->rule].smebu, "has no kappa"},
        {"beta", given->beta, rules[o->rule].smebu, "has no beta"},
        {"device-groups", given->device_groups, rules[o->rule].devices, "is of single experts"},
    };
    for (size_t i = 0; i < COUNT(all); i++)
        if (all[i].given && !all[i].has)
            return problem_set(why, "--%s does not go with --controller %s, which %s",
                               all[i].option, rules[o->rule].name, all[i].lack);
    if (given->centred && o->rule == CLMOE_BIAS_SMEBU && o->centred != CLMOE_CENTRED_BIAS)
        return problem_set(why,
                           "--centred %s has no effect with --controller smebu, which has delta "
                           "always",
                           centrings[o->centred]);
    if (!(o->kappa > 0))
        return problem_set(why, "--kappa is %g, but must be more than 0", o->kappa);
    if (!((float)o->beta < 1))
        return problem_set(why, "--beta is %g, but must be less than 1", o->beta);
    if (o->rule == CLMOE_BIAS_DEVICE && !given->device_groups)
        return problem_set(why, "--controller device needs --device-groups");
    return true;
}

/* As CLMOE_BIAS_QUANTILE in balance.h has it. */
static bool quantile_fits(const clmoe_layer_desc *desc, problem *why) {
    const clmoe_router_desc *router = &desc->router;
    const char *rule = "--controller is 'quantile', but the model's router";
    if (router->groups.count > 0)
        return problem_set(why, "%s has %u groups", rule, (unsigned)router->groups.count);
    if (desc->num_identity_experts > 0)
        return problem_set(why, "%s has %u identity experts", rule,
                           (unsigned)desc->num_identity_experts);
    if (desc->top_k >= desc->num_experts)
        return problem_set(why, "%s chooses %u of %u experts, which is all", rule,
                           (unsigned)desc->top_k, (unsigned)desc->num_experts);
    if (router->order != CLMOE_ORDER_SCORE_THEN_TOPK)
        return problem_set(why, "%s chooses by logits, not by scores", rule);
    if (router->score != CLMOE_SCORE_SOFTMAX && router->score != CLMOE_SCORE_SIGMOID)
        return problem_set(why, "%s has neither softmax nor sigmoid scores", rule);
    return true;
}

bool controller_fits(const controller_options *o, const clmoe_layer_desc *desc, problem *why) {
    if (o->rule == CLMOE_BIAS_DEVICE && desc->num_experts % o->device_groups != 0)
        return problem_set(why,
                           "--device-groups is %u, but the model's %u experts are not a multiple "
                           "of it",
                           (unsigned)o->device_groups, (unsigned)desc->num_experts);
    return o->rule != CLMOE_BIAS_QUANTILE || quantile_fits(desc, why);
}

void controller_fill(const controller_options *o, clmoe_balance_args *args) {
    args->bias_rule = o->rule;
    args->bias_rate = (float)o->gamma;
    args->bias_centred = o->centred;
    args->bias_kappa = (float)o->kappa;
    args->bias_beta = (float)o->beta;
}

void controller_describe(const controller_options *o, char *text, size_t size) {
    char more[128] = "";
    if (rules[o->rule].smebu)
        snprintf(more, sizeof more, ", kappa %g, beta %g", o->kappa, o->beta);
    if (rules[o->rule].devices)
        snprintf(more, sizeof more, ", %u device groups", (unsigned)o->device_groups);
    if (rules[o->rule].rate)
        snprintf(text, size, "%s, gamma %g%s%s%s", rules[o->rule].name, o->gamma, more,
                 o->centred ? ", centred " : "", o->centred ? centrings[o->centred] : "");
    else
        snprintf(text, size, "%s", rules[o->rule].name);
}

void controller_json(const controller_options *o, json_t *object) {
    json_object_set_new(object, "controller", json_string(rules[o->rule].name));
    json_object_set_new(object, "gamma", rules[o->rule].rate ? json_real(o->gamma) : json_null());
    if (rules[o->rule].centred)
        json_object_set_new(object, "centred", json_string(centrings[o->centred]));
    if (rules[o->rule].smebu) {
        json_object_set_new(object, "kappa", json_real(o->kappa));
        json_object_set_new(object, "beta", json_real(o->beta));
    }
    if (rules[o->rule].devices)
        json_object_set_new(object, "device_groups", json_integer((json_int_t)o->device_groups));
}
