/* Creation and destruction of contexts. */
#include "context.h"
#include "program.h"
#include "structs.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_GROUP = 256 };

static clmoe_status check_options(const clmoe_context_options *options) {
    uint32_t group = options->group_size;
    if (group > MAX_GROUP || (group & (group - 1)) != 0)
        return fail(CLMOE_INVALID_ARGUMENT,
                    "options.group_size is %u, but must be 0 or a power of two up to %d", group,
                    MAX_GROUP);
    if (options->cache_dir && options->cache_dir[0] == '\0')
        return fail(CLMOE_INVALID_ARGUMENT, "options.cache_dir is \"\", not a directory or NULL");
    if (options->tuning_file && options->tuning_file[0] == '\0')
        return fail(CLMOE_INVALID_ARGUMENT, "options.tuning_file is \"\", not a file or NULL");
    return CLMOE_SUCCESS;
}

static clmoe_status copy_options(clmoe_context *context, const clmoe_context_options *options) {
    context->options = *options;
    context->options.cache_dir = NULL;
    context->options.tuning_file = NULL; /* read once, in clmoe_context_create() */
    if (options->cache_dir) {
        context->cache_dir = strdup(options->cache_dir);
        if (!context->cache_dir)
            return fail(CLMOE_OUT_OF_MEMORY, "out of memory for the context");
        context->options.cache_dir = context->cache_dir;
    }
    return CLMOE_SUCCESS;
}

static clmoe_status check_device(cl_context context, cl_device_id device) {
    clmoe_status status = CLMOE_SUCCESS;
    size_t bytes = 0;
    cl_device_id *devices = NULL;
    TRY(CL(clGetContextInfo(context, CL_CONTEXT_DEVICES, 0, NULL, &bytes)));
    devices = malloc(bytes);
    if (!devices)
        return fail(CLMOE_OUT_OF_MEMORY, "out of memory for the device list");
    TRY(CL(clGetContextInfo(context, CL_CONTEXT_DEVICES, bytes, devices, NULL)));
    /* PoCL names the parent of a sub-device. */
    const size_t count = bytes / sizeof *devices;
    bool found = false;
    for (size_t i = 0; i < count && !found; i++)
        TRY(device_descends(device, devices[i], &found));
    if (!found)
        status = fail(CLMOE_INVALID_ARGUMENT, "device is not one of the OpenCL context's devices");
done:
    free(devices);
    return status;
}

/* Barriers are slow where a work-group is a loop of one thread: one work-item per group there. */
static uint32_t choose_group(const clmoe_context *context) {
    if (context->options.group_size)
        return context->options.group_size;
    if (device_is_cpu(&context->info))
        return 1;
    uint32_t group = MAX_GROUP;
    while (!device_takes_group(&context->info, group, 1))
        group /= 2;
    return group;
}

clmoe_status clmoe_context_create(cl_context cl, cl_device_id device,
                                  const clmoe_context_options *options, clmoe_context **out) {
    clmoe_status status = CLMOE_SUCCESS;
    clmoe_context *context = NULL;
    clmoe_context_options own;
    if (!out)
        return fail(CLMOE_INVALID_ARGUMENT, "out is NULL");
    *out = NULL;
    if (!cl || !device)
        return fail(CLMOE_INVALID_ARGUMENT, "%s is NULL", cl ? "device" : "context");
    clmoe_context_options_init(&own);
    if (options)
        TRY(struct_take(CLMOE_INVALID_ARGUMENT, "options", options, &own, sizeof own));
    TRY(check_options(&own));
    TRY(check_device(cl, device));

    context = calloc(1, sizeof *context);
    if (!context)
        return fail(CLMOE_OUT_OF_MEMORY, "out of memory for the context");
    if (pthread_mutex_init(&context->lock, NULL) != 0) {
        free(context);
        return fail(CLMOE_OUT_OF_MEMORY, "out of memory for the context's lock");
    }
    clmoe_context_options_init(&context->options);
    if (options)
        TRY(copy_options(context, options));
    context->device = device;
    TRY(device_info_read(device, &context->info));
    TRY(tuning_read(&context->info, options ? options->tuning_file : NULL, &context->tuning));
    context->largest_group = choose_group(context);
    if (!device_takes_group(&context->info, context->largest_group, 1)) {
        const size_t most = context->info.max_group, along = context->info.max_items[0];
        status = fail(CLMOE_INVALID_ARGUMENT,
                      "options.group_size is %u, but the device allows %zu work-items per group",
                      context->largest_group, most < along ? most : along);
        goto done;
    }
    TRY(CL(clRetainContext(cl)));
    context->cl = cl;
    *out = context;
done:
    if (status != CLMOE_SUCCESS)
        clmoe_context_destroy(context);
    return status;
}

void clmoe_context_destroy(clmoe_context *context) {
    if (!context)
        return;
    if (context->forget)
        context->forget();
    programs_release(context);
    if (context->cl)
        clReleaseContext(context->cl);
    pthread_mutex_destroy(&context->lock);
    device_info_release(&context->info);
    free(context->cache_dir);
    free(context);
}
