/*
 * Contexts: a device of an OpenCL context, and what clmoe compiled for it.
 *
 * Devices need OpenCL C 1.2 in the full profile, a compiler, and little-endian numbers, and nothing
 * else: work-groups shrink to what the device and each of its kernels allow, and engines that do
 * not fit the device are left out. Sub-devices work too.
 */
#ifndef CLMOE_PUBLIC_CONTEXT_H
#define CLMOE_PUBLIC_CONTEXT_H

#include "clmoe.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct clmoe_context_options {
    size_t struct_size; /* set by clmoe_context_options_init() */
    /*
     * Receives kernel build logs and warnings, or NULL. Called on the thread that builds, with no
     * lock of the library's that another clmoe call would need.
     */
    void (*log)(const char *message, void *user);
    void *log_user;
    /*
     * Work-items per group of the routing kernels: 0 lets the library choose (1 on CPUs, where
     * barriers are slow, 256 or the device's limit elsewhere), else a power of two up to 256. A
     * layer halves it until the device can run all of its kernels in such groups.
     * Integer results do not depend on it; sums of scores may differ in the last bits.
     */
    uint32_t group_size;
    /*
     * Directory that keeps compiled programs for later runs, or NULL: none. Copied; created with
     * mode 0700 if its parent exists. A program is found by its sources, its options, the device,
     * the driver and the platform. What is damaged, or was written by others, or the driver
     * refuses, is compiled and written anew. Trouble with the cache is never an error: programs are
     * then compiled as without it, and `log` gets one warning per context. Threads and processes
     * may share a directory; nothing in it is ever deleted, but you may delete it at any time.
     * Not used on PoCL, which keeps compiled kernels itself; `log` is told once per context.
     */
    const char *cache_dir;
    /*
     * JSON file with tile sizes, or NULL: those built into the library alone. Read once, at
     * creation; `clmoe-bench --tune FILE` writes one. An entry with the device's name
     * outranks one with its type alone ("cpu", "gpu", "other"), and the file the library's.
     *   {"tuning": [{"device": NAME, "type": "cpu", "engine": "cpu", "rows": 160, "depth": 128}]}
     * cpu: rows 40, 80, 160, 320; depth 128, 256, 512, which is part of the order of sums. tiled:
     * rows 32, 64, 128; columns 32, 64; depth 8, 16, 32. Errors: CLMOE_IO, CLMOE_BAD_FILE.
     */
    const char *tuning_file;
    /*
     * Multiply-adds that one launch may have, 0: any number. For GPUs that also draw the desktop,
     * where a watchdog kills launches of seconds: 1e10 is about 0.1 s where matrices run at 0.2
     * TFLOP/s. It cuts into launches of one work-group and more:
     *   - the GEMMs of the router, the experts, the shared expert and Soft MoE's mixing, in every
     *     engine but "clblast", whose library makes its own launches. All rows that there is room
     *     for count, used or not;
     *   - the rounds of overflow reroute that one work-group does: T * E each. They run on
     *     a single compute unit, so leave some margin.
     * All other launches pass over their arrays a few times. In the longest of them a work-group
     * reads one word of each token: milliseconds for a million tokens. The bits of all results are
     * the same; a launch costs some microseconds, a kernel that is cut perhaps a second compilation
     * in the driver.
     */
    uint64_t max_launch_work;
} clmoe_context_options;

/* Sets the defaults, all of which are 0, and struct_size. */
static inline void clmoe_context_options_init(clmoe_context_options *options) {
    memset(options, 0, sizeof *options);
    options->struct_size = sizeof *options;
}

/*
 * Binds `device` of `context`, which is retained. `options` may be NULL. Compiles nothing yet.
 * The device may be a sub-device of one of the context's. Errors: CLMOE_INVALID_ARGUMENT if it is
 * not; CLMOE_UNSUPPORTED, naming the device and what it lacks: a compiler, OpenCL C 1.2, the full
 * profile, little-endian numbers; CLMOE_IO and CLMOE_BAD_FILE of options->tuning_file.
 */
CLMOE_API clmoe_status clmoe_context_create(cl_context context, cl_device_id device,
                                            const clmoe_context_options *options,
                                            clmoe_context **out);

/*
 * Destroys the context; its layers must be destroyed before. NULL is allowed. It leaves nothing
 * behind, with one delay: CLBlast keeps about 3 MB for each OpenCL context in the whole process.
 * When the last context that used the engine "clblast" is destroyed, that is freed by
 * CLBlastClearCache(), and other users of CLBlast in the process compile its kernels once more.
 */
CLMOE_API void clmoe_context_destroy(clmoe_context *context);

#ifdef __cplusplus
}
#endif

#endif
