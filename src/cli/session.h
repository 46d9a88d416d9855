/* What a command that computes opens: a device, a queue, a clmoe context. */
#ifndef CLMOE_CLI_SESSION_H
#define CLMOE_CLI_SESSION_H

#include "error.h"

/* Start from {0}. */
typedef struct device_session {
    cl_context cl;
    cl_command_queue queue; /* with profiling */
    clmoe_context *context;
    char name[256]; /* the device's */
    char *log;      /* the OpenCL compiler's last words, for a kernel that does not build */
} device_session;

/*
 * Opens the device that `wanted` means, a number of `clmoe devices` or part of a name; NULL: the
 * preferred one. `cache`: with the user's program cache.
 */
clmoe_status session_open(device_session *s, const char *wanted, bool cache);
/* Allowed on what session_open() left after an error. */
void session_close(device_session *s);

/*
 * Opens a model directory; `assume` is the value of --assume, or NULL, and `decode` what coded
 * weights may be decoded to.
 */
clmoe_status open_model(const char *directory, const char *assume, clmoe_decode decode,
                        clmoe_checkpoint **out);

#endif
