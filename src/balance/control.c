/* The controllers: what happens to the state between two batches. */
#include "balance/state.clh"
#include "check/check.h"
#include "runtime/structs.h"
#include "steps.h"

#include <math.h>

/* cl/balance/state.clh has the same numbers. */
SAME_NUMBER(BIAS_NONE);
SAME_NUMBER(BIAS_SIGN);
SAME_NUMBER(BIAS_PROPORTIONAL);
SAME_NUMBER(BIAS_QUANTILE);
SAME_NUMBER(BIAS_SMEBU);
SAME_NUMBER(BIAS_DEVICE);
SAME_NUMBER(CENTRED_NONE);
SAME_NUMBER(CENTRED_BIAS);
SAME_NUMBER(CENTRED_DELTA);
SAME_NUMBER(SCHEDULE_NONE);
SAME_NUMBER(SCHEDULE_LINEAR);
SAME_NUMBER(SCHEDULE_COSINE);
SAME_NUMBER(SCHEDULE_EXPONENTIAL);

static const clmoe_balance_args defaults = {
    .struct_size = sizeof defaults,
    .bias_rate = 1e-3F,
    .ema_decay = 0.9F,
    .loss_rate = 0.01F,
    .loss_min = 1e-3F,
    .loss_max = 1e3F,
    .target_drop_rate = -1,
    .capacity_rate = 0.01F,
    .capacity_min = 0.1F,
    .bias_kappa = 2,
    .bias_beta = 0.5F,
};

void clmoe_balance_args_init_sized(clmoe_balance_args *args, size_t struct_size) {
    struct_give(&defaults, sizeof defaults, args, struct_size);
}

static schedule_rule schedule_of(const clmoe_schedule *schedule) {
    return (schedule_rule){.shape = (int)schedule->shape,
                           .start = schedule->start,
                           .end = schedule->end,
                           .first = schedule->first,
                           .steps = schedule->steps};
}

static control_rules rules_of(const clmoe_layer *layer, const clmoe_balance_args *args) {
    return (control_rules){
        .experts = layer->desc.num_experts,
        .columns = layer->columns,
        .bias_rule = (int)args->bias_rule,
        .bias_rate = args->bias_rate,
        .bias_centred = (int)args->bias_centred,
        .bias_kappa = args->bias_kappa,
        .bias_beta = args->bias_beta,
        .device_groups = layer->desc.balance.device_groups,
        .ema_decay = args->ema_decay,
        .target_violation = args->target_violation,
        .loss_up = (float)exp((double)args->loss_rate),
        .loss_down = (float)exp(-(double)args->loss_rate),
        .loss_min = args->loss_min,
        .loss_max = args->loss_max,
        .target_drop_rate = args->target_drop_rate,
        .capacity_up = (float)exp((double)args->capacity_rate),
        .capacity_down = (float)exp(-(double)args->capacity_rate),
        .capacity_min = args->capacity_min,
        .noise = schedule_of(&args->noise),
        .temperature = schedule_of(&args->temperature),
    };
}

clmoe_status control_create(clmoe_layer *layer) {
    static const kernel_entry kernels[] = {
        {KERNEL_CONTROL, "control_update"},
        {KERNEL_CONTROL_START, "control_start"},
    };
    return GROUP_KERNELS(layer, "balance/control", kernels);
}

static clmoe_status step_start(const clmoe_layer *layer, launch *chain,
                               const clmoe_balance_args *args) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_kernel kernel = layer->kernels[KERNEL_CONTROL_START];
    control_rules rules = rules_of(layer, args);
    TRY(KERNEL_SET(kernel, ARG_F32(args->state), ARG_STRUCT(rules)));
    TRY(launch_1d(chain, kernel, 1, layer->group));
done:
    return status;
}

static clmoe_status step_control(const clmoe_layer *layer, launch *chain,
                                 const clmoe_balance_args *args) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_kernel kernel = layer->kernels[KERNEL_CONTROL];
    control_rules rules = rules_of(layer, args);
    if (args->bias_rule == CLMOE_BIAS_QUANTILE)
        TRY(step_bias_quantile(layer, chain, args));
    TRY(KERNEL_SET(kernel, ARG_F32(args->state), ARG_F32(args->stats), ARG_F32(args->load),
                   ARG_STRUCT(rules)));
    TRY(launch_1d(chain, kernel, 1, layer->group));
done:
    return status;
}

clmoe_status clmoe_balance_update(clmoe_layer *layer, cl_command_queue queue,
                                  const clmoe_balance_args *args, cl_uint num_wait,
                                  const cl_event *wait, cl_event *event) {
    clmoe_status status = CLMOE_SUCCESS;
    launch chain = {0};
    clmoe_balance_args own = defaults;
    TRY(STRUCT_TAKE_ARGS(args, &own));
    TRY(check_balance(layer, &own));
    TRY(launch_begin(&chain, layer->context, queue, num_wait, wait));
    TRY(step_control(layer, &chain, &own));
done:
    return launch_end(&chain, status, event);
}

clmoe_status clmoe_balance_start(clmoe_layer *layer, cl_command_queue queue,
                                 const clmoe_balance_args *args, cl_uint num_wait,
                                 const cl_event *wait, cl_event *event) {
    clmoe_status status = CLMOE_SUCCESS;
    launch chain = {0};
    clmoe_balance_args own = defaults;
    TRY(STRUCT_TAKE_ARGS(args, &own));
    TRY(check_balance_start(layer, &own));
    TRY(launch_begin(&chain, layer->context, queue, num_wait, wait));
    TRY(step_start(layer, &chain, &own));
done:
    return launch_end(&chain, status, event);
}
