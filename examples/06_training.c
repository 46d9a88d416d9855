/*
 * Training: forward, your loss, backward, your optimiser, all on the device. Tokens are of four
 * kinds, and each kind has another map to learn: a router that sends them to experts of their own
 * is what brings the loss down.
 */
#include "common.h"

enum { TOKENS = 256, DIM = 16, EXPERTS = 4, TOP_K = 2, HIDDEN = 32, STEPS = 300 };
enum { KINDS = 4, X = TOKENS * DIM, WEIGHTS = 3 };

static const float rate = 0.3f;

/* What is not clmoe's: dL/dy of L = |y - target|^2 / (2 T), and a step of gradient descent. */
static const char source[] =
    "__kernel void loss(__global const float *y, __global const float *target,\n"
    "                   __global float *dy, float scale) {\n"
    "    size_t i = get_global_id(0);\n"
    "    dy[i] = (y[i] - target[i]) * scale;\n"
    "}\n"
    "__kernel void descend(__global float *w, __global const float *dw, float rate) {\n"
    "    size_t i = get_global_id(0);\n"
    "    w[i] -= rate * dw[i];\n"
    "}\n";

static cl_program build(const gpu *g) {
    const char *text = source;
    cl_int code;
    cl_program program = clCreateProgramWithSource(g->cl, 1, &text, NULL, &code);
    check(code);
    check(clBuildProgram(program, 1, &g->device, "", NULL, NULL));
    return program;
}

/* Runs a kernel of `buffers` buffers and a number on `count` elements. */
static void run(const gpu *g, cl_program program, const char *name, const clmoe_buf *buffers,
                float number, size_t count) {
    cl_int code;
    cl_uint n = name[0] == 'l' ? 3 : 2;
    cl_kernel kernel = clCreateKernel(program, name, &code);
    check(code);
    for (cl_uint i = 0; i < n; i++)
        check(clSetKernelArg(kernel, i, sizeof(cl_mem), &buffers[i].mem));
    check(clSetKernelArg(kernel, n, sizeof number, &number));
    check(clEnqueueNDRangeKernel(g->queue, kernel, 1, NULL, &count, NULL, 0, NULL, NULL));
    clReleaseKernel(kernel);
}

/* x: noise, with a mark of its kind; target: x with the signs of its kind. */
static void make_batch(const gpu *g, clmoe_buf *x, clmoe_buf *target) {
    static float values[X], wanted[X];
    for (int t = 0; t < TOKENS; t++)
        for (int d = 0; d < DIM; d++) {
            const int kind = t % KINDS, sign = (d / 4 + kind) % KINDS < 2 ? 1 : -1;
            float *value = &values[t * DIM + d];
            *value = (float)(rand() % 2001 - 1000) / 1000.0f + (d == kind ? 3.0f : 0.0f);
            wanted[t * DIM + d] = *value * (float)sign;
        }
    *x = buffer(g, sizeof values, values);
    *target = buffer(g, sizeof wanted, wanted);
}

/* L, of dL/dy: only to print it. */
static double loss_of(const gpu *g, clmoe_buf dy) {
    static float values[X];
    double sum = 0;
    read_back(g, dy, sizeof values, values, NULL);
    for (int i = 0; i < X; i++)
        sum += (double)values[i] * (double)values[i];
    return sum * TOKENS / 2;
}

static clmoe_layer *create_layer(const gpu *g) {
    clmoe_layer *layer;
    clmoe_layer_desc desc;
    clmoe_layer_desc_init(&desc);
    desc.dim = DIM;
    desc.num_experts = EXPERTS;
    desc.top_k = TOP_K;
    desc.router.renorm.kind = CLMOE_RENORM_SUM;
    desc.experts.hidden_dim = HIDDEN;
    desc.training = 1;
    check(clmoe_layer_create(g->context, &desc, &layer));
    return layer;
}

int main(void) {
    static const size_t counts[WEIGHTS] = {EXPERTS * DIM, EXPERTS * 2 * HIDDEN * DIM,
                                           EXPERTS * DIM * HIDDEN};
    gpu g = gpu_open(0); /* in order: each command waits for the one before */
    cl_program program = build(&g);
    clmoe_layer *layer = create_layer(&g);
    clmoe_weights weights = {.router = random_buffer(&g, counts[0], 0.2f),
                             .experts.gate = random_buffer(&g, counts[1], 1.0f),
                             .experts.down = random_buffer(&g, counts[2], 0.5f)};
    clmoe_gradients gradients = {.router = buffer(&g, counts[0] * sizeof(float), NULL),
                                 .experts.gate = buffer(&g, counts[1] * sizeof(float), NULL),
                                 .experts.down = buffer(&g, counts[2] * sizeof(float), NULL)};
    const clmoe_buf steps[WEIGHTS][2] = {{weights.router, gradients.router},
                                         {weights.experts.gate, gradients.experts.gate},
                                         {weights.experts.down, gradients.experts.down}};
    clmoe_buf target, dy = buffer(&g, X * sizeof(float), NULL);
    clmoe_forward_args forward;
    clmoe_forward_args_init(&forward);
    forward.tokens = TOKENS;
    forward.weights = &weights;
    make_batch(&g, &forward.x, &target);
    batch_buffers(&g, layer, &forward, X * sizeof(float));
    clmoe_backward_args backward;
    clmoe_backward_args_init(&backward);
    backward.tokens = TOKENS;
    backward.weights = &weights;
    backward.x = forward.x;
    backward.saved = forward.saved;
    backward.scratch = forward.scratch; /* forward's is free again */
    backward.dy = dy;
    backward.gradients = &gradients; /* dx would go to the layer before */

    double first = 0, last = 0;
    for (int step = 0; step <= STEPS; step++) {
        const clmoe_buf of_loss[] = {forward.y, target, dy};
        check(clmoe_forward(layer, g.queue, &forward, 0, NULL, NULL));
        run(&g, program, "loss", of_loss, 1.0f / TOKENS, X);
        check(clmoe_backward(layer, g.queue, &backward, 0, NULL, NULL));
        for (int i = 0; i < WEIGHTS; i++)
            run(&g, program, "descend", steps[i], rate, counts[i]);
        if (step % 100 == 0) {
            last = loss_of(&g, dy);
            first = step == 0 ? last : first;
            printf("step %3d: loss %.4f\n", step, last);
        }
    }
    fail_unless(last < first / 20, "the layer does not learn");

    clmoe_buf *buffers[] = {&forward.x,
                            &forward.saved,
                            &forward.scratch,
                            &forward.y,
                            &target,
                            &dy,
                            &gradients.router,
                            &gradients.experts.gate,
                            &gradients.experts.down};
    for (size_t i = 0; i < sizeof buffers / sizeof buffers[0]; i++)
        buffer_free(buffers[i]);
    clReleaseProgram(program);
    clmoe_weights_release(&weights);
    clmoe_layer_destroy(layer);
    gpu_close(&g);
    return 0;
}
