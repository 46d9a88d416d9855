/* buffers: what a memory object given to a call must be: a buffer, of the right flags, apart. */
#include "support.h"

#include <stdio.h>
#include <string.h>

static const shape small = {6, 5, 8, 0, 2, 3};

typedef enum use { READ, WRITE, BOTH } use;

/* A buffer of clmoe_forward_args, or of clmoe_weights. */
typedef struct field {
    const char *name;
    size_t offset;
    use use;
    bool of_weights;
} field;

#define ARG(field, use)                                                                            \
    { #field, offsetof(clmoe_forward_args, field), use, false }
#define WEIGHT(field)                                                                              \
    { "weights." #field, offsetof(clmoe_weights, field), READ, true }

static const field fields[] = {
    ARG(x, READ),         ARG(token_mask, READ),     ARG(residual, READ),
    ARG(saved, BOTH),     ARG(scratch, BOTH),        ARG(y, WRITE),
    ARG(logits, WRITE),   ARG(ids, WRITE),           ARG(weights_out, WRITE),
    ARG(stats, WRITE),    ARG(load_target, READ),    ARG(loss_values, WRITE),
    ARG(dlogits, BOTH),   ARG(state, READ),          WEIGHT(router),
    WEIGHT(router_bias),  WEIGHT(expert_scale),      WEIGHT(experts.gate),
    WEIGHT(experts.down), WEIGHT(experts.down_bias), WEIGHT(shared.gate),
    WEIGHT(shared.down),  WEIGHT(shared_gate),       WEIGHT(output_bias),
};

static const clmoe_loss_desc loss = {.kind = CLMOE_LOSS_SWITCH, .weight = 1.0f};

typedef struct fixture {
    clmoe_layer_desc desc;
    clmoe_layer *layer;
    batch b;
    device_batch d;
} fixture;

static clmoe_buf *buf_at(fixture *f, const field *of) {
    return (clmoe_buf *)((char *)(of->of_weights ? (void *)&f->d.weights : (void *)&f->d.args) +
                         of->offset);
}

static void fixture_make(fixture *f, const char *engine) {
    size_t state = 0, T = small.tokens, D = small.dim;
    f->desc = desc_of(&small);
    f->desc.engine = engine;
    f->desc.training = 1;
    f->desc.router.bias = f->desc.router.expert_scale = 1;
    f->desc.experts.down_bias = 1;
    f->desc.shared.hidden_dim = 3;
    f->desc.shared_gate = f->desc.output_bias = 1;
    f->layer = test_layer(0, &f->desc);
    seed_set(1);
    batch_make(&f->b, &f->desc, small.tokens);
    f->b.in.token_mask = random_mask(small.tokens);
    f->b.in.residual = random_floats(T * D, 1.0);
    batch_upload(f->layer, &f->b, &f->d);
    OK(clmoe_state_size(f->layer, &state));
    f->d.args.losses = &loss;
    f->d.args.num_losses = 1;
    f->d.args.loss_values = buf_new(4);
    f->d.args.dlogits = buf_of(HOST(float, T * 8), T * 8 * 4);
    f->d.args.load_target = buf_of(random_floats(8, 1.0), 8 * 4);
    f->d.args.state = buf_of(HOST(char, state), state);
}

static clmoe_status forward(fixture *f) {
    clmoe_status status = clmoe_forward(f->layer, test.queue, &f->d.args, 0, NULL, NULL);
    CL_OK(clFinish(test.queue));
    return status;
}

static void refused(fixture *f, const char *name, const char *why) {
    clmoe_status status = forward(f);
    CHECK(status == CLMOE_INVALID_ARGUMENT, "%s, %s: %s\n", name, why, clmoe_status_string(status));
    CHECK(strstr(clmoe_last_error(), name) && strstr(clmoe_last_error(), why),
          "\"%s\" does not say %s and %s\n", clmoe_last_error(), name, why);
}

static void release(void *mem) {
    clReleaseMemObject(mem);
}

static cl_mem new_mem(cl_mem_flags flags, size_t bytes) {
    cl_int code = CL_SUCCESS;
    cl_mem mem = clCreateBuffer(test.context, flags, bytes, NULL, &code);
    CL_OK(code);
    clean_later(release, mem);
    return mem;
}

static size_t size_of(cl_mem mem) {
    size_t size = 0;
    CL_OK(clGetMemObjectInfo(mem, CL_MEM_SIZE, sizeof size, &size, NULL));
    return size;
}

static void flags_of_buffers(void **state) {
    (void)state;
    fixture f;
    test_case("flags");
    fixture_make(&f, "ref");
    for (size_t i = 0; i < COUNT_OF(fields); i++) {
        clmoe_buf *buf = buf_at(&f, &fields[i]), right = *buf;
        CHECK(right.mem != NULL, "%s is not in the fixture\n", fields[i].name);
        buf->mem = new_mem(CL_MEM_READ_ONLY, size_of(right.mem));
        if (fields[i].use != READ)
            refused(&f, fields[i].name, "CL_MEM_READ_ONLY");
        else
            OK(forward(&f));
        buf->mem = new_mem(CL_MEM_WRITE_ONLY, size_of(right.mem));
        if (fields[i].use != WRITE)
            refused(&f, fields[i].name, "CL_MEM_WRITE_ONLY");
        else
            OK(forward(&f));
        *buf = right;
    }
}

static void images(void **state) {
    (void)state;
    const cl_image_format format = {CL_RGBA, CL_FLOAT};
    const cl_image_desc desc = {
        .image_type = CL_MEM_OBJECT_IMAGE2D, .image_width = 256, .image_height = 256};
    cl_int code = CL_SUCCESS;
    fixture f;
    test_case("images");
    fixture_make(&f, "ref");
    cl_mem image = clCreateImage(test.context, CL_MEM_READ_WRITE, &format, &desc, NULL, &code);
    if (code != CL_SUCCESS)
        return; /* the device has none */
    clean_later(release, image);
    for (size_t i = 0; i < COUNT_OF(fields); i++) {
        clmoe_buf *buf = buf_at(&f, &fields[i]), right = *buf;
        *buf = (clmoe_buf){image, 0};
        refused(&f, fields[i].name, "no buffer");
        *buf = right;
    }
}

/* Moves all buffers of the fixture into one, apart; returns its size. */
static size_t move_together(fixture *f) {
    size_t at = 0;
    for (size_t i = 0; i < COUNT_OF(fields); i++) {
        clmoe_buf *buf = buf_at(f, &fields[i]);
        size_t size = size_of(buf->mem);
        *buf = (clmoe_buf){NULL, at};
        at += (size + 4095) / 4096 * 4096;
    }
    cl_mem one = new_mem(CL_MEM_READ_WRITE, 2 * at); /* room for any at the place of the last */
    for (size_t i = 0; i < COUNT_OF(fields); i++)
        buf_at(f, &fields[i])->mem = one;
    return at;
}

static void overlaps(void **state) {
    (void)state;
    fixture f;
    test_case("overlaps");
    fixture_make(&f, "ref");
    move_together(&f);
    OK(forward(&f));
    for (size_t i = 0; i < COUNT_OF(fields); i++)
        for (size_t j = 0; j < COUNT_OF(fields); j++) {
            clmoe_buf *moved = buf_at(&f, &fields[i]), right = *moved;
            const bool in_place =
                !strcmp(fields[i].name, "y") && !strcmp(fields[j].name, "residual");
            if (i == j || fields[i].use == READ)
                continue;
            moved->offset = buf_at(&f, &fields[j])->offset;
            if (in_place)
                OK(forward(&f));
            moved->offset += in_place ? 4 : 0;
            refused(&f, fields[i].name, "overlaps");
            *moved = right;
        }
}

/* A part of a buffer is that buffer. */
static void sub_buffers(void **state) {
    (void)state;
    fixture f;
    cl_int code = CL_SUCCESS;
    test_case("sub-buffers");
    fixture_make(&f, "ref");
    size_t end = move_together(&f);
    const clmoe_buf x = f.d.args.x, y = f.d.args.y;
    cl_buffer_region over_x = {x.offset, 4096}, over_y = {y.offset, end - y.offset};
    cl_mem parts[2];
    for (int i = 0; i < 2; i++) {
        parts[i] = clCreateSubBuffer(x.mem, CL_MEM_READ_WRITE, CL_BUFFER_CREATE_TYPE_REGION,
                                     i ? &over_y : &over_x, &code);
        CL_OK(code);
        clean_later(release, parts[i]);
    }
    f.d.args.y = (clmoe_buf){parts[0], 0};
    refused(&f, "y", "overlaps x");
    f.d.args.y = (clmoe_buf){parts[1], 0};
    OK(forward(&f));
    f.d.args.x = (clmoe_buf){parts[0], 0};
    OK(forward(&f));
}

/* An engine that reads sizes on the host needs to be allowed to; the others do not. */
static void host_access(void **state) {
    (void)state;
    const cl_mem_flags flags[] = {CL_MEM_HOST_NO_ACCESS, CL_MEM_HOST_WRITE_ONLY};
    const char *const *engines = test_engines();
    for (size_t n = 0; engines[n]; n++)
        for (size_t i = 0; i < COUNT_OF(flags); i++) {
            fixture f;
            test_case("engine %s, flag %zu", engines[n], i);
            fixture_make(&f, engines[n]);
            f.d.args.saved.mem = new_mem(CL_MEM_READ_WRITE | flags[i], size_of(f.d.args.saved.mem));
            if (strcmp(engines[n], "clblast") == 0)
                refused(&f, "saved", i ? "HOST_WRITE_ONLY" : "HOST_NO_ACCESS");
            else
                OK(forward(&f));
        }
}

int main(void) {
    const struct CMUnitTest tests[] = {TEST(flags_of_buffers), TEST(images), TEST(overlaps),
                                       TEST(sub_buffers), TEST(host_access)};
    return RUN(tests);
}
