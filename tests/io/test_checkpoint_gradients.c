/*
 * Gradients by the names of a model's files: what was uploaded, handed out again, is what the files
 * have, in every layout of the bundled checkpoints; and the buffers made for gradients.
 */
#include "io/checkpoint.h"
#include "support_checkpoint.h"

#include <dirent.h>
#include <stdio.h>
#include <string.h>

/* What a walk has seen. */
typedef struct seen {
    const clmoe_checkpoint *checkpoint;
    clmoe_type type;   /* that the values went through */
    uint32_t tensors;  /* begun */
    uint64_t elements; /* of the tensor at hand, so far */
    bool values;       /* there are some */
    clmoe_status stop; /* given back for the second tensor */
} seen;

static void compare_values(const seen *s, const clmoe_parameter *p, const file_tensor *t) {
    float *want = HOST(float, p->count);
    OK(safetensors_read_f32(t->file, t->tensor, p->first, p->count, want));
    if (strstr(p->name, "router.bias") == NULL) /* f32 in any case */
        round_all(s->type, want, p->count);
    CHECK(memcmp(p->values, want, p->count * sizeof *want) == 0, "%s has other values\n", p->name);
}

static clmoe_status see(void *user, const clmoe_parameter *p) {
    seen *s = user;
    const file_tensor *t = checkpoint_find(s->checkpoint, p->name);
    CHECK(t != NULL, "the model has no %s\n", p->name);
    CHECK(p->rank == t->tensor->rank && p->elements == t->tensor->elements &&
              memcmp(p->shape, t->tensor->shape, p->rank * sizeof p->shape[0]) == 0,
          "%s has another shape\n", p->name);
    CHECK(strstr(p->name, "correction_bias") == NULL && strstr(p->name, "expert_bias") == NULL,
          "%s has no gradient\n", p->name);
    CHECK(s->values == (p->values != NULL), "%s: values\n", p->name);
    if (p->first == 0)
        s->elements = 0;
    CHECK(p->first == s->elements, "%s: a piece is missing\n", p->name);
    s->elements += p->count;
    s->tensors += p->first == 0;
    if (p->values)
        compare_values(s, p, t);
    return s->tensors == 2 ? s->stop : CLMOE_SUCCESS;
}

static void release_weights(void *weights) {
    clmoe_weights_release(weights);
}

/* The uploaded weights as if they were gradients. */
static clmoe_gradients as_gradients(const clmoe_weights *w) {
    const clmoe_mlp_weights *e = &w->experts, *s = &w->shared;
    return (clmoe_gradients){
        .router = w->router,
        .router_bias = w->router_bias,
        .expert_scale = w->expert_scale,
        .experts = {e->gate, e->up, e->down, e->gate_bias, e->up_bias, e->down_bias, {{0}}},
        .shared = {s->gate, s->up, s->down, s->gate_bias, s->up_bias, s->down_bias, {{0}}},
        .shared_gate = w->shared_gate,
        .output_bias = w->output_bias};
}

/* Tensors of the block that get a gradient: all that are not selection biases, or unread. */
static uint32_t count_tensors(const block *b) {
    uint32_t count = 0;
    for (int role = 0; role < ROLE_COUNT; role++)
        if (role != ROLE_SELECT_BIAS)
            count += b->roles[role].count;
    return count;
}

static void check_sizes(clmoe_buf gradient, clmoe_buf weight, const char *name) {
    size_t has = 0, wants = 0;
    if (weight.mem)
        CL_OK(clGetMemObjectInfo(weight.mem, CL_MEM_SIZE, sizeof wants, &wants, NULL));
    if (gradient.mem)
        CL_OK(clGetMemObjectInfo(gradient.mem, CL_MEM_SIZE, sizeof has, &has, NULL));
    CHECK(has == wants && gradient.offset == 0, "%s has %zu bytes, not %zu\n", name, has, wants);
}

/* The buffers that clmoe_gradients_create() makes are those of the weights, of their types. */
static void check_created(const clmoe_layer_desc *desc, const clmoe_weights *w) {
    clmoe_layer_desc training = *desc;
    clmoe_gradients made, want = as_gradients(w);
    const clmoe_gradients none = {.router = {NULL, 0}};
    training.type = desc->weight_type;
    training.training = 1;
    training.engine = "ref";
    OK(clmoe_gradients_create(test_layer(0, &training), &made));
    const clmoe_buf *has = (const clmoe_buf *)&made, *wants = (const clmoe_buf *)&want;
    for (size_t i = 0; i < sizeof made / sizeof *has; i++)
        check_sizes(has[i], wants[i], "a gradient");
    clmoe_gradients_release(&made);
    CHECK(memcmp(&made, &none, sizeof none) == 0, "the gradients are not cleared\n");
}

static void run_family(const char *directory, clmoe_type type, clmoe_gradient_type gradients) {
    static clmoe_weights weights; /* lives until the clean-up */
    clmoe_checkpoint *checkpoint = NULL;
    clmoe_layer_desc desc, own;
    block b;
    OK(clmoe_checkpoint_open(directory, NULL, &checkpoint));
    OK(clmoe_checkpoint_layer(checkpoint, 0, &desc));
    OK(checkpoint_describe(checkpoint, 0, &own, &b));
    const uint32_t tensors = count_tensors(&b);
    block_release(&b);
    desc.weight_type = desc.router.weight_type = type;
    desc.gradient_type = gradients;
    OK(clmoe_checkpoint_upload(checkpoint, 0, &desc, test.context, test.queue, &weights));
    clean_later(release_weights, &weights);
    const clmoe_gradients given = as_gradients(&weights);
    seen list = {.checkpoint = checkpoint}, all = {.checkpoint = checkpoint, .values = true};
    all.type = type;
    OK(clmoe_checkpoint_gradients(checkpoint, 0, &desc, NULL, NULL, see, &list));
    CHECK(list.tensors == tensors, "%u tensors, not %u\n", list.tensors, tensors);
    OK(clmoe_checkpoint_gradients(checkpoint, 0, &desc, test.queue, &given, see, &all));
    CHECK(all.tensors == tensors, "%u tensors, not %u\n", all.tensors, tensors);
    check_created(&desc, &weights);
    clmoe_weights_release(&weights);
    clmoe_checkpoint_close(checkpoint);
}

static void every_family(void **state) {
    (void)state;
    int families = 0;
    DIR *all = opendir(TEST_DATA "/checkpoints");
    CHECK(all != NULL, "no " TEST_DATA "/checkpoints\n");
    for (struct dirent *entry = readdir(all); entry; entry = readdir(all)) {
        char directory[512];
        if (entry->d_name[0] == '.')
            continue;
        snprintf(directory, sizeof directory, TEST_DATA "/checkpoints/%s", entry->d_name);
        test_case("%s", entry->d_name);
        run_family(directory, CLMOE_F32, CLMOE_GRADIENT_F32);
        test_case("%s, as the weights", entry->d_name);
        run_family(directory, CLMOE_BF16, CLMOE_GRADIENT_OF_WEIGHT);
        families++;
    }
    closedir(all);
    CHECK(families == 17, "%d families\n", families);
}

/* The small checkpoint, its weights taken for gradients. */
typedef struct fixture {
    clmoe_checkpoint *checkpoint;
    clmoe_layer_desc desc;
    clmoe_weights weights;
    clmoe_gradients gradients;
} fixture;

static void begin(fixture *f) {
    OK(clmoe_checkpoint_open(write_checkpoint("gradients", CONFIG, TENSORS), NULL, &f->checkpoint));
    OK(clmoe_checkpoint_layer(f->checkpoint, 0, &f->desc));
    OK(clmoe_checkpoint_upload(f->checkpoint, 0, &f->desc, test.context, test.queue, &f->weights));
    clean_later(release_weights, &f->weights);
    f->gradients = as_gradients(&f->weights);
}

static void end(fixture *f) {
    clmoe_weights_release(&f->weights);
    clmoe_checkpoint_close(f->checkpoint);
}

static clmoe_status hand_out(fixture *f, seen *s) {
    *s = (seen){.checkpoint = f->checkpoint, .values = true, .stop = s->stop};
    return clmoe_checkpoint_gradients(f->checkpoint, 0, &f->desc, test.queue, &f->gradients, see,
                                      s);
}

/* Gradients that are not there are left out; one inside a larger buffer is found. */
static void parts(void **state) {
    (void)state;
    static fixture f;
    seen s = {.stop = CLMOE_SUCCESS};
    begin(&f);
    const clmoe_buf down = f.gradients.experts.down;
    f.gradients.experts.down = f.gradients.router = (clmoe_buf){NULL, 0};
    OK(hand_out(&f, &s));
    CHECK(s.tensors == 4, "%u tensors, not gate and up of two experts\n", s.tensors);
    const size_t bytes = 2 * 4 * 3 * sizeof(float);
    const clmoe_buf inside = buf_new(bytes);
    CHECK(inside.offset > 0, "at the beginning of its buffer\n");
    CL_OK(clEnqueueCopyBuffer(test.queue, down.mem, inside.mem, 0, inside.offset, bytes, 0, NULL,
                              NULL));
    f.gradients.experts.down = inside;
    OK(hand_out(&f, &s));
    CHECK(s.tensors == 6, "%u tensors, not those of two experts\n", s.tensors);
    end(&f);
}

static void refusals(void **state) {
    (void)state;
    static fixture f;
    seen s = {.stop = CLMOE_ENGINE_FAILED};
    begin(&f);
    CHECK(hand_out(&f, &s) == CLMOE_ENGINE_FAILED, "another status than the visitor's\n");
    CHECK(s.tensors == 2, "the walk went on to %u tensors\n", s.tensors);
    s.stop = CLMOE_SUCCESS;
    f.gradients.experts.down.offset = sizeof(float);
    REFUSED(hand_out(&f, &s), CLMOE_INVALID_ARGUMENT, "gradients.experts.down has 92 bytes",
            "24 elements of 4");
    f.gradients.experts.down.offset = 0;
    f.desc.gradient_type = 2;
    REFUSED(hand_out(&f, &s), CLMOE_INVALID_DESC, "gradient_type is 2");
    f.desc.gradient_type = 0;
    f.desc.experts.hidden_dim = 4;
    REFUSED(hand_out(&f, &s), CLMOE_INVALID_ARGUMENT, "experts.hidden_dim is 4");
    f.desc.experts.hidden_dim = 3;
    REFUSED(clmoe_checkpoint_gradients(f.checkpoint, 0, &f.desc, NULL, &f.gradients, see, &s),
            CLMOE_INVALID_ARGUMENT, "queue is NULL");
    REFUSED(clmoe_checkpoint_gradients(NULL, 0, &f.desc, test.queue, NULL, see, &s),
            CLMOE_INVALID_ARGUMENT, "checkpoint");
    REFUSED(clmoe_checkpoint_gradients(f.checkpoint, 0, &f.desc, test.queue, NULL, NULL, &s),
            CLMOE_INVALID_ARGUMENT, "visit");
    REFUSED(clmoe_checkpoint_gradients(f.checkpoint, 1, &f.desc, test.queue, NULL, see, &s),
            CLMOE_BAD_FILE, "layer 1");
    end(&f);
}

static void creation_refused(void **state) {
    (void)state;
    static fixture f;
    clmoe_gradients gradients;
    begin(&f);
    clmoe_layer *layer = test_layer(0, &f.desc);
    REFUSED(clmoe_gradients_create(layer, &gradients), CLMOE_INVALID_ARGUMENT, "training 0");
    REFUSED(clmoe_gradients_create(NULL, &gradients), CLMOE_INVALID_ARGUMENT, "layer is NULL");
    REFUSED(clmoe_gradients_create(layer, NULL), CLMOE_INVALID_ARGUMENT, "gradients is NULL");
    clmoe_gradients_release(NULL);
    end(&f);
}

/* Whether buffer i of clmoe_gradients is room for later fields. */
static bool is_reserved(size_t i) {
    static const clmoe_gradients *const g = NULL;
    const size_t at = i * sizeof(clmoe_buf);
    return at >= offsetof(clmoe_gradients, reserved) ||
           (at - offsetof(clmoe_gradients, experts.reserved)) < sizeof g->experts.reserved ||
           (at - offsetof(clmoe_gradients, shared.reserved)) < sizeof g->shared.reserved;
}

/* Every buffer there is a field for is released, and the struct is cleared. */
static void release_all(void **state) {
    (void)state;
    enum { FIELDS = sizeof(clmoe_gradients) / sizeof(clmoe_buf) };
    _Static_assert(sizeof(clmoe_gradients) == FIELDS * sizeof(clmoe_buf), "not of buffers alone");
    clmoe_buf bufs[FIELDS] = {{NULL, 0}};
    clmoe_gradients gradients;
    const clmoe_gradients none = {.router = {NULL, 0}};
    cl_int code = CL_SUCCESS;
    /* Not buf_new(), whose command may hold a reference a little longer. */
    for (size_t i = 0; i < FIELDS; i++) {
        if (is_reserved(i))
            continue;
        bufs[i] = (clmoe_buf){clCreateBuffer(test.context, CL_MEM_READ_WRITE, 4, NULL, &code), 0};
        CL_OK(code);
        CL_OK(clRetainMemObject(bufs[i].mem));
    }
    memcpy(&gradients, bufs, sizeof gradients);
    clmoe_gradients_release(&gradients);
    for (size_t i = 0; i < FIELDS; i++) {
        cl_uint count = 0;
        if (is_reserved(i))
            continue;
        CL_OK(clGetMemObjectInfo(bufs[i].mem, CL_MEM_REFERENCE_COUNT, sizeof count, &count, NULL));
        CHECK(count == 1, "buffer %zu has %u references\n", i, count);
        clReleaseMemObject(bufs[i].mem);
    }
    CHECK(memcmp(&gradients, &none, sizeof none) == 0, "the gradients are not cleared\n");
}

static int setup(void **state) {
    return files_setup(state) || support_setup(state);
}

static int teardown(void **state) {
    return files_teardown(state) | support_teardown(state);
}

int main(void) {
    const struct CMUnitTest tests[] = {TEST(every_family), TEST(parts), TEST(refusals),
                                       TEST(creation_refused), TEST(release_all)};
    return cmocka_run_group_tests(tests, setup, teardown);
}
