#include "memory.h"
#include "engines.h"

#include <stdio.h>

static double mib(double bytes) {
    return bytes / (1 << 20);
}

static clmoe_status layer_memory(const bench_device *device, const clmoe_layer_desc *desc,
                                 uint32_t tokens, size_t *saved, size_t *scratch) {
    clmoe_status status = CLMOE_SUCCESS;
    clmoe_layer *layer = NULL;
    TRY(LIB(clmoe_layer_create(device->clmoe, desc, &layer)));
    /* The sizes are told of what is too much for this device, too. */
    status = clmoe_layer_memory(layer, tokens, saved, scratch);
    if (status != CLMOE_UNSUPPORTED || *scratch == 0)
        TRY(LIB(status));
    status = CLMOE_SUCCESS;
done:
    clmoe_layer_destroy(layer);
    return status;
}

static clmoe_status print_row(const bench_device *device, const bench_case *c,
                              const bench_engine *engine, clmoe_type type) {
    clmoe_status status = CLMOE_SUCCESS;
    size_t saved = 0, scratch = 0, training_scratch = 0, saved_less = 0, scratch_more = 0;
    const inputs in = {.of = *c, .type = type};
    const double element = (double)type_bytes(type);
    clmoe_layer_desc desc = inputs_desc(&in, engine->library);
    TRY(layer_memory(device, &desc, c->tokens, &saved, &scratch));
    desc.training = 1;
    TRY(layer_memory(device, &desc, c->tokens, &saved, &training_scratch));
    desc.recompute = 1;
    TRY(layer_memory(device, &desc, c->tokens, &saved_less, &scratch_more));
    printf("| %s | %u | %s | %s | %.1f | %.1f | %.1f | %.1f + %.1f | %.1f + %.1f |\n", c->name,
           (unsigned)c->tokens, engine->name, type_names[type],
           mib(case_weight_bytes(c, type_bytes(type))), mib(2 * element * c->tokens * c->dim),
           mib((double)scratch), mib((double)saved), mib((double)training_scratch),
           mib((double)saved_less), mib((double)scratch_more));
done:
    return status;
}

clmoe_status memory_print(const bench_options *options) {
    clmoe_status status = CLMOE_SUCCESS;
    bench_device device = {0};
    engine_list list = {.count = 0};
    TRY(device_open(options->device, &device));
    TRY(options_check_cases(options, device.cpu));
    TRY(engines_choose(options, &device, &list));
    printf("%s, driver %s\n\n", device.name, device.driver);
    puts(
        "| MiB | T | engine | type | experts' weights | x and y | scratch | training: saved + scratch "
        "| with recompute |\n|---|--:|---|---|--:|--:|--:|--:|--:|");
    for (const bench_case *c = bench_cases; c->name; c++)
        for (size_t i = 0; i < list.count && options_choose(options, c, device.cpu); i++)
            if (!engine_is_peer(&list.engines[i]))
                TRY(print_row(&device, c, &list.engines[i], options->type));
    if (fflush(stdout) != 0)
        status = cli_fail(CLMOE_IO, "cannot write to standard output");
done:
    device_close(&device);
    return status;
}
