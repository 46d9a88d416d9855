/*
 * The bundled checkpoints with x and the expert weights rounded to f16 and bf16, against the oracle
 * fed the same rounded values: ids equal where the scores are further apart than f32 can blur, and
 * y.
 */
#include "io/safetensors.h"
#include "support.h"

#include <dirent.h>
#include <stdio.h>
#include <string.h>

#define MIN_GAP 1e-5

static const float *weights_back(clmoe_buf buf, clmoe_type type) {
    size_t bytes = 0;
    if (!buf.mem)
        return NULL;
    CL_OK(clGetMemObjectInfo(buf.mem, CL_MEM_SIZE, sizeof bytes, &bytes, NULL));
    void *elements = host_alloc(bytes, 1);
    CL_OK(clEnqueueReadBuffer(test.queue, buf.mem, CL_TRUE, 0, bytes, elements, 0, NULL, NULL));
    return type_values(type, elements, bytes / type_size(type));
}

static ref_mlp_weights mlp_back(const clmoe_mlp_weights *w, clmoe_type type) {
    return (ref_mlp_weights){.gate = weights_back(w->gate, type),
                             .up = weights_back(w->up, type),
                             .down = weights_back(w->down, type),
                             .gate_bias = weights_back(w->gate_bias, type),
                             .up_bias = weights_back(w->up_bias, type),
                             .down_bias = weights_back(w->down_bias, type)};
}

/* The buffers as they were uploaded, on the host. */
static ref_weights all_back(const clmoe_layer_desc *desc, const clmoe_weights *w) {
    clmoe_type type = desc->weight_type;
    return (ref_weights){.router = weights_back(w->router, CLMOE_F32),
                         .router_bias = weights_back(w->router_bias, CLMOE_F32),
                         .select_bias = weights_back(w->select_bias, CLMOE_F32),
                         .expert_scale = weights_back(w->expert_scale, CLMOE_F32),
                         .experts = mlp_back(&w->experts, type),
                         .shared = mlp_back(&w->shared, type),
                         .shared_gate = weights_back(w->shared_gate, CLMOE_F32),
                         .output_bias = weights_back(w->output_bias, type)};
}

/* The first recorded input of the family's activations. */
static float *recorded_x(const char *directory, uint32_t dim, uint32_t *tokens) {
    char path[1024];
    safetensors *file = NULL;
    float *x = NULL;
    snprintf(path, sizeof path, "%s/activations.safetensors", directory);
    OK(safetensors_open(path, &file));
    for (size_t i = 0; i < safetensors_count(file) && !x; i++) {
        const st_tensor *t = safetensors_at(file, i);
        size_t length = strlen(t->name);
        if (length < 2 || strcmp(t->name + length - 2, ".x") != 0)
            continue;
        *tokens = (uint32_t)(t->elements / dim);
        x = HOST(float, t->elements);
        OK(safetensors_read_f32(file, t, 0, (size_t)t->elements, x));
    }
    safetensors_close(file);
    CHECK(x != NULL, "no recorded x in %s\n", path);
    return x;
}

/* Keeps only the rows of tokens whose choice f32 cannot blur; returns how many. */
static uint32_t keep_clear(const batch *b, const ref_result *want, int32_t *ids, float *y) {
    size_t K = b->desc.top_k, D = b->desc.dim, R = ref_columns(&b->desc);
    uint32_t clear = 0;
    for (size_t t = 0; t < b->in.tokens; t++) {
        if (ref_choice_gap(&b->desc, 1, want->scores + t * R, &b->weights) <= MIN_GAP)
            continue;
        memmove(ids + clear * K, ids + t * K, K * sizeof *ids);
        memmove(want->ids + clear * K, want->ids + t * K, K * sizeof *ids);
        memmove(y + clear * D, y + t * D, D * sizeof *y);
        memmove(want->y + clear * D, want->y + t * D, D * sizeof *want->y);
        clear++;
    }
    return clear;
}

static void release_weights(void *weights) {
    clmoe_weights_release(weights);
}

static void run_family(const char *directory, clmoe_type type) {
    batch b = {0};
    device_batch d = {0};
    clmoe_checkpoint *checkpoint = NULL;
    clmoe_weights *weights = HOST(clmoe_weights, 1);
    OK(clmoe_checkpoint_open(directory, NULL, &checkpoint));
    OK(clmoe_checkpoint_layer(checkpoint, 0, &b.desc));
    b.desc.type = b.desc.weight_type = type;
    b.desc.balance.enabled = 1;
    clean_later(release_weights, weights);
    OK(clmoe_checkpoint_upload(checkpoint, 0, &b.desc, test.context, test.queue, weights));
    clmoe_checkpoint_close(checkpoint);
    b.weights = all_back(&b.desc, weights);
    float *x = recorded_x(directory, b.desc.dim, &b.in.tokens);
    round_all(type, x, (size_t)b.in.tokens * b.desc.dim);
    b.in.x = x;
    b.in.weights = &b.weights;
    batch_run(test_layer(0, &b.desc), &b, &d);

    const ref_result *want = batch_reference(&b);
    int32_t *ids = buf_get(d.args.ids);
    float *y = buf_get_type(d.args.y, type, (size_t)b.in.tokens * b.desc.dim);
    uint32_t clear = keep_clear(&b, want, ids, y);
    CHECK(clear * 2 > b.in.tokens, "only %u of %u tokens have a clear choice\n", clear,
          b.in.tokens);
    compare_ints("ids", ids, want->ids, (size_t)clear * b.desc.top_k);
    compare_floats("y", y, want->y, (size_t)clear * b.desc.dim, type_tolerance(type));
}

static void every_family_rounded(void **state) {
    (void)state;
    const clmoe_type types[] = {CLMOE_F32, CLMOE_F16, CLMOE_BF16};
    int families = 0;
    DIR *all = opendir(TEST_DATA "/checkpoints");
    CHECK(all != NULL, "no " TEST_DATA "/checkpoints\n");
    for (struct dirent *entry = readdir(all); entry; entry = readdir(all)) {
        char directory[512];
        if (entry->d_name[0] == '.')
            continue;
        snprintf(directory, sizeof directory, TEST_DATA "/checkpoints/%s", entry->d_name);
        for (size_t i = 0; i < COUNT_OF(types); i++) {
            test_case("%s, type %d", entry->d_name, types[i]);
            run_family(directory, types[i]);
        }
        families++;
    }
    closedir(all);
    CHECK(families == 17, "%d families\n", families);
}

int main(void) {
    const struct CMUnitTest tests[] = {TEST(every_family_rounded)};
    return RUN(tests);
}
