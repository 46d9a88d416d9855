/* Arguments of the calls on the state: its first values, and the controllers. */
#include "check_buffers.h"
#include "runtime/structs.h"

#include <math.h>

clmoe_status check_state_init(const clmoe_layer *layer, clmoe_buf state) {
    call_check call = {.layer = layer};
    if (!layer)
        return fail(CLMOE_INVALID_ARGUMENT, "layer is NULL");
    const buffer_need need = WRITES("state", &state, layer_state_bytes(layer), 4, true);
    return check_buffer(&call, &need);
}

static clmoe_status in_range(const char *name, uint32_t value, uint32_t low, uint32_t high) {
    if (value >= low && value <= high)
        return CLMOE_SUCCESS;
    return fail(CLMOE_INVALID_ARGUMENT, "%s is %u, but must be from %u to %u", name, value, low,
                high);
}

static clmoe_status is_at_least(const char *name, float value, float low) {
    if (isfinite(value) && value >= low)
        return CLMOE_SUCCESS;
    return fail(CLMOE_INVALID_ARGUMENT, "%s is %g, but must be finite and at least %g", name,
                (double)value, (double)low);
}

static clmoe_status is_positive(const char *name, float value) {
    if (isfinite(value) && value > 0)
        return CLMOE_SUCCESS;
    return fail(CLMOE_INVALID_ARGUMENT, "%s is %g, but must be finite and more than 0", name,
                (double)value);
}

/* Names of a schedule's fields in messages. */
typedef struct schedule_names {
    const char *shape, *start, *end, *steps, *reserved;
} schedule_names;

#define SCHEDULE_NAMES(of)                                                                         \
    { of ".shape", of ".start", of ".end", of ".steps", of ".reserved" }

static const schedule_names noise_names = SCHEDULE_NAMES("noise");
static const schedule_names temperature_names = SCHEDULE_NAMES("temperature");

static clmoe_status check_schedule(const clmoe_schedule *schedule, const schedule_names *names,
                                   bool positive) {
    clmoe_status status = CLMOE_SUCCESS;
    const size_t room = sizeof schedule->reserved / sizeof schedule->reserved[0];
    const size_t used = struct_used_word(schedule->reserved, room);
    if (used < room)
        return fail(CLMOE_INVALID_ARGUMENT, "%s[%zu] is %u, but must be 0", names->reserved, used,
                    schedule->reserved[used]);
    TRY(in_range(names->shape, schedule->shape, 0, CLMOE_SCHEDULE_EXPONENTIAL));
    if (schedule->shape == CLMOE_SCHEDULE_NONE)
        return CLMOE_SUCCESS;
    TRY(in_range(names->steps, schedule->steps, 1, UINT32_MAX));
    if (positive || schedule->shape == CLMOE_SCHEDULE_EXPONENTIAL) {
        TRY(is_positive(names->start, schedule->start));
        TRY(is_positive(names->end, schedule->end));
    }
    TRY(is_at_least(names->start, schedule->start, 0));
    TRY(is_at_least(names->end, schedule->end, 0));
done:
    return status;
}

static clmoe_status check_rates(const clmoe_balance_args *args) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(in_range("bias_centred", args->bias_centred, 0, CLMOE_CENTRED_DELTA));
    TRY(is_positive("bias_kappa", args->bias_kappa));
    if (!(args->bias_beta >= 0 && args->bias_beta < 1))
        return fail(CLMOE_INVALID_ARGUMENT,
                    "bias_beta is %g, but must be at least 0 and less than 1",
                    (double)args->bias_beta);
    TRY(is_at_least("bias_rate", args->bias_rate, 0));
    TRY(is_at_least("target_violation", args->target_violation, 0));
    TRY(is_at_least("loss_rate", args->loss_rate, 0));
    TRY(is_positive("loss_min", args->loss_min));
    TRY(is_at_least("loss_max", args->loss_max, args->loss_min));
    TRY(is_at_least("capacity_rate", args->capacity_rate, 0));
    if (!(args->ema_decay >= 0 && args->ema_decay < 1))
        return fail(CLMOE_INVALID_ARGUMENT,
                    "ema_decay is %g, but must be at least 0 and less than 1",
                    (double)args->ema_decay);
    if (!(args->target_drop_rate < 1))
        return fail(CLMOE_INVALID_ARGUMENT, "target_drop_rate is %g, but must be less than 1",
                    (double)args->target_drop_rate);
    if (!(args->capacity_min > 0 && args->capacity_min <= 1))
        return fail(CLMOE_INVALID_ARGUMENT,
                    "capacity_min is %g, but must be more than 0 and at most 1",
                    (double)args->capacity_min);
done:
    return status;
}

static clmoe_status check_schedules(const clmoe_balance_args *args) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(check_schedule(&args->noise, &noise_names, false));
    TRY(check_schedule(&args->temperature, &temperature_names, true));
done:
    return status;
}

clmoe_status check_balance_start(const clmoe_layer *layer, const clmoe_balance_args *args) {
    call_check call = {.layer = layer};
    clmoe_status status = CLMOE_SUCCESS;
    if (!layer)
        return fail(CLMOE_INVALID_ARGUMENT, "layer is NULL");
    TRY(check_measures(layer, "balance"));
    TRY(check_unused(args->reserved));
    const buffer_need need = UPDATES("state", &args->state, layer_state_bytes(layer), 4, true);
    TRY(check_buffer(&call, &need));
    TRY(check_schedules(args));
done:
    return status;
}

clmoe_status check_quantile(const clmoe_layer *layer, const char *name) {
    const char *lack = layer_lacks_quantile(&layer->desc);
    if (!lack)
        return check_measures(layer, name);
    return fail(CLMOE_UNSUPPORTED, "%s is of the quantile rule, but %s", name, lack);
}

static clmoe_status check_rule(const clmoe_layer *layer, const clmoe_balance_args *args) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(in_range("bias_rule", args->bias_rule, 0, CLMOE_BIAS_DEVICE));
    if (args->bias_rule == CLMOE_BIAS_QUANTILE)
        TRY(check_quantile(layer, "bias_rule"));
    if (args->bias_rule == CLMOE_BIAS_DEVICE && layer->desc.balance.device_groups == 0)
        return fail(CLMOE_UNSUPPORTED,
                    "bias_rule is device, but the layer has balance.device_groups 0");
    if (args->bias_rule != CLMOE_BIAS_QUANTILE && args->bias_counts.mem)
        return fail(CLMOE_INVALID_ARGUMENT,
                    "bias_counts is given, but bias_rule is %u, and only quantile reads them",
                    args->bias_rule);
done:
    return status;
}

clmoe_status check_bias_counts(const clmoe_layer *layer, const clmoe_bias_counts_args *args) {
    call_check call = {.layer = layer};
    clmoe_status status = CLMOE_SUCCESS;
    workspace_layout ws;
    TRY(check_step(layer, args->tokens, &ws));
    TRY(check_quantile(layer, "bias_counts"));
    TRY(in_range("accumulate", args->accumulate, 0, 1));
    const buffer_need needs[] = {
        READS("logits", &args->logits, bytes_of(args->tokens, layer->columns, 4), 4, true),
        READS("token_mask", &args->token_mask, args->tokens, 1, false),
        READS("state", &args->state, layer_state_bytes(layer), 4, true),
        UPDATES("scratch", &args->scratch, ws.scratch_bytes, 4, true),
        UPDATES("bias_counts", &args->bias_counts, layer_bias_counts_bytes(layer), 4, true),
    };
    TRY(CHECK_BUFFERS(&call, needs));
    TRY(check_router_weights(&call, args->weights, &args->x, args->state, args->tokens));
    TRY(check_overlaps(&call));
done:
    return status;
}

clmoe_status check_balance(const clmoe_layer *layer, const clmoe_balance_args *args) {
    call_check call = {.layer = layer};
    clmoe_status status = CLMOE_SUCCESS;
    if (!layer)
        return fail(CLMOE_INVALID_ARGUMENT, "layer is NULL");
    TRY(check_measures(layer, "balance"));
    TRY(check_unused(args->reserved));
    const buffer_need needs[] = {
        UPDATES("state", &args->state, layer_state_bytes(layer), 4, true),
        READS("stats", &args->stats, layer_stats_bytes(layer), 4, true),
        READS("load", &args->load, bytes_of(layer->columns, 1, 4), 4, false),
        READS("bias_counts", &args->bias_counts, layer_bias_counts_bytes(layer), 4,
              args->bias_rule == CLMOE_BIAS_QUANTILE),
    };
    TRY(check_rule(layer, args));
    TRY(CHECK_BUFFERS(&call, needs));
    TRY(check_rates(args));
    TRY(check_schedules(args));
    TRY(check_overlaps(&call));
done:
    return status;
}
