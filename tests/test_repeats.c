/*
 * The same batch forward and backward again and again, by every engine, on both kinds of queue and
 * in memory that held something else: the same bits. `test_repeats 50` does it 50 times, on a GPU
 * with a batch that fills the device.
 */
#include "support.h"
#include "support_backward.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* An expert has rows enough for every engine's largest tiles; columns fill none. */
static const shape some = {320, 136, 4, 0, 2, 72};
static const shape many = {4099, 264, 16, 0, 4, 248};

static unsigned repeats = 3;

/* An array that a run writes, and what the first run wrote. */
typedef struct output {
    const char *name;
    clmoe_buf buf;
    size_t bytes;
    void *first;
} output;

enum { MOST_OUTPUTS = 4 + REF_GRADIENT_FIELDS };

/* A batch with its buffers. */
typedef struct rig {
    clmoe_layer *layer;
    batch b;
    device_batch d;
    clmoe_gradients gradients;
    clmoe_backward_args back;
    output outputs[MOST_OUTPUTS];
    size_t num_outputs;
} rig;

static void add_output(rig *r, const char *name, clmoe_buf buf, size_t bytes) {
    if (buf.mem)
        r->outputs[r->num_outputs++] =
            (output){.name = name, .buf = buf, .bytes = bytes, .first = host_alloc(bytes, 1)};
}

static void make_backward(rig *r) {
    const clmoe_forward_args *in = &r->d.args;
    const size_t n = (size_t)in->tokens * r->b.desc.dim;
    clmoe_backward_args_init(&r->back);
    r->back.tokens = in->tokens;
    r->back.weights = in->weights;
    r->back.x = in->x;
    r->back.token_mask = in->token_mask;
    r->back.saved = in->saved;
    r->back.scratch = in->scratch;
    r->back.dy = buf_of_type(r->b.desc.type, random_floats(n, 1.0), n);
    r->back.dx = buf_new_type(r->b.desc.type, n);
    r->back.gradients = &r->gradients;
}

static void make_outputs(rig *r) {
    const clmoe_forward_args *in = &r->d.args;
    const clmoe_layer_desc *desc = &r->b.desc;
    const size_t pairs = (size_t)in->tokens * desc->top_k * 4;
    const size_t rows = (size_t)in->tokens * desc->dim * type_size(desc->type);
    add_output(r, "ids", in->ids, pairs);
    add_output(r, "pair_weights", in->pair_weights, pairs);
    add_output(r, "y", in->y, rows);
    add_output(r, "dx", r->back.dx, rows);
    for (size_t i = 0; i < REF_GRADIENT_FIELDS; i++) {
        const size_t n = ref_gradient_count(desc, i);
        const clmoe_type type = gradient_type_of(desc, i);
        clmoe_buf *gradient = gradients_field(&r->gradients, i);
        if (n > 0)
            *gradient = buf_new_type(type, n);
        add_output(r, ref_gradient_fields[i].name, *gradient, n * type_size(type));
    }
}

static void make_rig(rig *r, const char *engine, clmoe_type type, const shape *s) {
    clmoe_layer_desc desc = desc_of(s);
    memset(r, 0, sizeof *r);
    desc.engine = engine;
    desc.type = desc.weight_type = type;
    desc.training = 1;
    desc.capacity.factor = 1.1; /* some pairs are dropped */
    desc.experts.gate_up_bias = desc.experts.down_bias = 1;
    seed_set(1);
    batch_make(&r->b, &desc, s->tokens);
    r->b.in.token_mask = random_mask(s->tokens);
    r->layer = test_layer(0, &desc);
    batch_upload(r->layer, &r->b, &r->d);
    make_backward(r);
    make_outputs(r);
}

/* Forward, and backward behind it. */
static void run(rig *r, cl_command_queue queue) {
    cl_event forward = NULL, backward = NULL;
    OK(clmoe_forward(r->layer, queue, &r->d.args, 0, NULL, &forward));
    OK(clmoe_backward(r->layer, queue, &r->back, 1, &forward, &backward));
    CL_OK(clWaitForEvents(1, &backward));
    clReleaseEvent(forward);
    clReleaseEvent(backward);
}

/* The outputs are those of the first run; *seen: there was one. */
static void compare(rig *r, bool *seen) {
    for (size_t i = 0; i < r->num_outputs; i++) {
        output *o = &r->outputs[i];
        void *now = malloc(o->bytes);
        assert_non_null(now);
        buf_read(o->buf, now, o->bytes);
        if (*seen)
            compare_bits(o->name, now, o->first, o->bytes);
        else
            memcpy(o->first, now, o->bytes);
        free(now);
    }
    *seen = true;
}

static void run_again_and_again(rig *r, const char *form, bool *seen) {
    for (unsigned n = 0; n < repeats; n++) {
        test_note("engine %s, type %d, %s, run %u", clmoe_layer_engine(r->layer), r->b.desc.type,
                  form, n);
        for (size_t i = 0; i < r->num_outputs; i++)
            buf_poison(r->outputs[i].buf);
        if (n < 3) {
            buf_poison(r->d.args.saved);
            buf_poison(r->d.args.scratch);
        }
        run(r, n % 2 ? test.out_of_order : test.queue);
        compare(r, seen);
    }
}

/* Whether the weights now lie in the engine's own form as well, which forward then reads. */
static bool pack(rig *r) {
    size_t bytes = 0;
    const clmoe_mlp_weights raw = r->d.weights.experts;
    if (clmoe_packed_size(r->layer, CLMOE_MLP_EXPERTS, &bytes) != CLMOE_SUCCESS)
        return false;
    weights_pack(r->layer, CLMOE_MLP_EXPERTS, &r->d.weights.experts);
    const clmoe_buf packed = r->d.weights.experts.packed;
    r->d.weights.experts = raw;
    r->d.weights.experts.packed = packed;
    return true;
}

static void check_engine(const char *engine, clmoe_type type, const shape *s) {
    rig r;
    bool seen = false;
    test_case("engine %s, type %d", engine, type);
    make_rig(&r, engine, type, s);
    run_again_and_again(&r, "raw weights", &seen);
    seen = seen && strcmp(engine, "nv_wgmma") == 0; /* whose bits are the same with either */
    if (pack(&r))
        run_again_and_again(&r, "packed weights", &seen);
}

static void check_type(clmoe_type type) {
    cl_device_type device = 0;
    CL_OK(clGetDeviceInfo(test.device, CL_DEVICE_TYPE, sizeof device, &device, NULL));
    const bool full = repeats > 3 && !(device & CL_DEVICE_TYPE_CPU);
    const char *const *engines = test_engines_of(type, type);
    for (size_t n = 0; engines[n] != NULL; n++)
        check_engine(engines[n], type, full ? &many : &some);
}

static void f32_repeats(void **state) {
    (void)state;
    check_type(CLMOE_F32);
}

static void f16_repeats(void **state) {
    (void)state;
    check_type(CLMOE_F16);
}

static void bf16_repeats(void **state) {
    (void)state;
    check_type(CLMOE_BF16);
}

int main(int argc, char **argv) {
    const struct CMUnitTest tests[] = {TEST(f32_repeats), TEST(f16_repeats), TEST(bf16_repeats)};
    if (argc > 1)
        repeats = (unsigned)atoi(argv[1]);
    return RUN(tests);
}
