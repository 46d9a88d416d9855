#include "session.h"
#include "device_list.h"
#include "device_name.h"

#include <stdlib.h>
#include <string.h>

/* Keeps what the OpenCL compiler said last, for a kernel that does not build. */
static void keep_log(const char *message, void *user) {
    char **log = user;
    free(*log);
    *log = strdup(message);
}

clmoe_status open_model(const char *directory, const char *assume, clmoe_decode decode,
                        clmoe_checkpoint **out) {
    clmoe_checkpoint_options options;
    clmoe_checkpoint_options_init(&options);
    options.assume = assume;
    options.decode = decode;
    return LIB(clmoe_checkpoint_open(directory, &options, out));
}

/* The device that --device means; NULL: the preferred one. */
static clmoe_status pick_device(const device_list *list, const char *wanted, uint32_t *picked) {
    *picked = list->preferred;
    if (wanted == NULL)
        return CLMOE_SUCCESS;
    for (*picked = 0; *picked < list->count; ++*picked)
        if (device_is_meant(list->entries[*picked].device, *picked, wanted))
            return CLMOE_SUCCESS;
    problem why;
    device_not_found(wanted, list->count, &why);
    return checked(false, &why);
}

clmoe_status session_open(device_session *s, const char *wanted, bool cache) {
    clmoe_status status = CLMOE_SUCCESS;
    device_list list;
    cl_int code;
    uint32_t picked = 0;
    clmoe_context_options options;
    char cache_path[CACHE_PATH_SIZE];
    TRY(device_list_get(&list));
    TRY(pick_device(&list, wanted, &picked));
    cl_device_id device = list.entries[picked].device;
    device_text(device, CL_DEVICE_NAME, s->name, sizeof s->name);
    s->cl = clCreateContext(NULL, 1, &device, NULL, NULL, &code);
    TRY(cli_cl(code, "clCreateContext"));
    s->queue = clCreateCommandQueue(s->cl, device, CL_QUEUE_PROFILING_ENABLE, &code);
    TRY(cli_cl(code, "clCreateCommandQueue"));
    clmoe_context_options_init(&options);
    options.log = keep_log;
    options.log_user = &s->log;
    if (cache)
        options.cache_dir = user_cache_dir(list.entries[picked].platform, cache_path);
    TRY(LIB(clmoe_context_create(s->cl, device, &options, &s->context)));
done:
    device_list_free(&list);
    return status;
}

void session_close(device_session *s) {
    clmoe_context_destroy(s->context);
    if (s->queue != NULL)
        clReleaseCommandQueue(s->queue);
    if (s->cl != NULL)
        clReleaseContext(s->cl);
    free(s->log);
    *s = (device_session){0};
}
