/*
 * Threads that share a context, on a device that does nothing: made for ThreadSanitizer, which then
 * sees the library's own accesses and no lock but the library's. Each thread creates layers whose
 * programs the others build too, runs them on a queue of its own, fails, and destroys.
 */
#include "support.h"

#include <pthread.h>
#include <stdio.h>
#include <string.h>

enum { THREADS = 4, ROUNDS = 25 };

static const shape small = {9, 10, 12, 2, 3, 7};

typedef struct worker {
    clmoe_context *context;
    const char *const *engines;
    clmoe_layer_desc desc;
    device_batch d;
    uint32_t number;
    clmoe_status status;
    char call[64], error[256];
} worker;

/* Keeps the first failure: cmocka's checks are the main thread's. */
static bool succeeded(worker *w, const char *call, clmoe_status status) {
    if (status == CLMOE_SUCCESS || w->status != CLMOE_SUCCESS)
        return w->status == CLMOE_SUCCESS;
    w->status = status;
    strncpy(w->call, call, sizeof w->call - 1);
    strncpy(w->error, clmoe_last_error(), sizeof w->error - 1);
    return false;
}

static void fail_on_purpose(worker *w) {
    char number[16];
    clmoe_layer *layer = NULL;
    clmoe_layer_desc bad = w->desc;
    bad.top_k = 1000 + w->number;
    snprintf(number, sizeof number, "%u", bad.top_k);
    if (clmoe_layer_create(w->context, &bad, &layer) != CLMOE_INVALID_DESC ||
        !strstr(clmoe_last_error(), number))
        succeeded(w, "last_error", CLMOE_INVALID_DESC);
}

static void one_round(worker *w, cl_command_queue queue, const char *engine) {
    clmoe_layer *layer = NULL;
    clmoe_plan_layout layout;
    size_t saved = 0, scratch = 0;
    uint32_t supported = 0;
    w->desc.engine = engine;
    if (succeeded(w, "create", clmoe_layer_create(w->context, &w->desc, &layer)) &&
        succeeded(w, "memory", clmoe_layer_memory(layer, small.tokens, &saved, &scratch)) &&
        succeeded(w, "layout", clmoe_plan_layout_get(layer, small.tokens, &layout)))
        succeeded(w, "forward", clmoe_forward(layer, queue, &w->d.args, 0, NULL, NULL));
    clmoe_engine_name(w->context, w->number, &supported);
    fail_on_purpose(w);
    clmoe_layer_destroy(layer);
}

static void *work(void *opaque) {
    worker *w = opaque;
    cl_int code = CL_SUCCESS;
    cl_command_queue queue = clCreateCommandQueue(test.context, test.device, 0, &code);
    succeeded(w, "clCreateCommandQueue", code);
    for (uint32_t round = 0; round < ROUNDS && w->status == CLMOE_SUCCESS; round++)
        for (size_t n = 0; w->engines[n] != NULL; n++)
            one_round(w, queue, w->engines[n]);
    if (queue)
        clReleaseCommandQueue(queue);
    return NULL;
}

/* Scratch for the engine that needs most. */
static clmoe_buf scratch_of_all(const clmoe_layer_desc *desc) {
    const char *const *engines = test_engines();
    clmoe_layer_desc each = *desc;
    size_t saved = 0, scratch = 0, most = 0;
    for (size_t n = 0; engines[n] != NULL; n++) {
        each.engine = engines[n];
        OK(clmoe_layer_memory(test_layer(0, &each), small.tokens, &saved, &scratch));
        most = scratch > most ? scratch : most;
    }
    return buf_new(most);
}

static void threads_share_a_context(void **state) {
    (void)state;
    static worker w[THREADS];
    pthread_t threads[THREADS];
    clmoe_context *context = NULL;
    test_case("%d threads", THREADS);
    OK(clmoe_context_create(test.context, test.device, NULL, &context));
    for (uint32_t i = 0; i < THREADS; i++) {
        batch b;
        clmoe_layer_desc desc = desc_of(&small);
        desc.capacity.factor = 1.0;
        desc.capacity.keep = (clmoe_keep)(i % 4);
        batch_make(&b, &desc, small.tokens);
        w[i] = (worker){.context = context, .engines = test_engines(), .desc = desc, .number = i};
        batch_upload(test_layer(0, &desc), &b, &w[i].d);
        w[i].d.args.scratch = scratch_of_all(&desc);
    }
    for (size_t i = 0; i < THREADS; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, work, &w[i]), 0);
    for (size_t i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    clmoe_context_destroy(context);
    for (size_t i = 0; i < THREADS; i++)
        CHECK(w[i].status == CLMOE_SUCCESS, "thread %zu, %s: %s\n", i, w[i].call, w[i].error);
}

/* Checkpoints and their blocks have nothing in common. */
static void *open_and_describe(void *opaque) {
    clmoe_status *status = opaque;
    for (int round = 0; round < ROUNDS && *status == CLMOE_SUCCESS; round++) {
        clmoe_checkpoint *checkpoint = NULL;
        clmoe_layer_desc desc;
        *status = clmoe_checkpoint_open(TEST_DATA "/checkpoints/qwen2_moe", NULL, &checkpoint);
        if (*status == CLMOE_SUCCESS)
            *status = clmoe_checkpoint_layer(checkpoint, 0, &desc);
        clmoe_checkpoint_close(checkpoint);
    }
    return NULL;
}

static void threads_open_checkpoints(void **state) {
    (void)state;
    pthread_t threads[THREADS];
    clmoe_status status[THREADS] = {CLMOE_SUCCESS};
    test_case("checkpoints");
    for (size_t i = 0; i < THREADS; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, open_and_describe, &status[i]), 0);
    for (size_t i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    for (size_t i = 0; i < THREADS; i++)
        assert_int_equal(status[i], CLMOE_SUCCESS);
}

int main(void) {
    const struct CMUnitTest tests[] = {TEST(threads_share_a_context),
                                       TEST(threads_open_checkpoints)};
    return RUN(tests);
}
