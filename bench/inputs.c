#include "inputs.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { FILL_GROUP = 64, FILL_GROUPS = 4096 };

/* What is left of the device's memory for everything but the weights. */
#define WEIGHTS_SHARE 0.9

const char *const type_names[3] = {"f32", "f16", "bf16"};
const char *const gradient_names[2] = {"f32", "weights"};

size_t type_bytes(clmoe_type type) {
    return type == CLMOE_F32 ? 4 : 2;
}

/* Values of about the wanted deviation; uniform ones in [-scale, scale) have scale / sqrt(3). */
static values values_of(uint32_t stream, clmoe_type type, double deviation) {
    static const uint32_t significand_bits[] = {24, 11, 8};
    values v = {.stream = stream, .bits = significand_bits[type], .type = type};
    double exponent = round(log2(deviation * sqrt(3)));
    v.scale = (float)exp2(exponent - (v.bits - 1));
    return v;
}

void values_fill(const values *v, uint64_t first, size_t count, float *to) {
    for (size_t i = 0; i < count; i++)
        to[i] = value_at(v, first + i);
}

clmoe_status values_write(const bench_device *device, const values *v, cl_mem buffer,
                          cl_ulong count) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_kernel kernel = NULL;
    char options[64];
    snprintf(options, sizeof options, "-DGROUP=%d -DTYPE=%d", FILL_GROUP, (int)v->type);
    TRY(device_kernel(device, "fill.cl", options, "fill_random", &kernel));
    TRY(CL(clSetKernelArg(kernel, 0, sizeof buffer, &buffer)));
    TRY(CL(clSetKernelArg(kernel, 1, sizeof count, &count)));
    TRY(CL(clSetKernelArg(kernel, 2, sizeof v->stream, &v->stream)));
    TRY(CL(clSetKernelArg(kernel, 3, sizeof v->bits, &v->bits)));
    TRY(CL(clSetKernelArg(kernel, 4, sizeof v->scale, &v->scale)));
    TRY(device_launch(device, kernel, FILL_GROUPS, FILL_GROUP));
    TRY(CL(clFinish(device->queue)));
done:
    if (kernel)
        clReleaseKernel(kernel);
    return status;
}

static clmoe_status create(const bench_device *device, const values *v, size_t count,
                           clmoe_buf *buf) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(device_buffer(device, count * type_bytes(v->type), &buf->mem));
    TRY(values_write(device, v, buf->mem, count));
done:
    return status;
}

static clmoe_status create_bias(inputs *in, const bench_device *device) {
    clmoe_status status = CLMOE_SUCCESS;
    const uint32_t experts = in->of.experts;
    float *bias = malloc(experts * sizeof *bias);
    if (!bias)
        TRY(bench_no_memory("a bias"));
    for (uint32_t e = 0; e < experts; e++)
        bias[e] = pattern_bias(in->pattern, e);
    buffer_release(&in->weights.router_bias.mem);
    TRY(device_buffer(device, experts * sizeof *bias, &in->weights.router_bias.mem));
    TRY(CL(clEnqueueWriteBuffer(device->queue, in->weights.router_bias.mem, CL_TRUE, 0,
                                experts * sizeof *bias, bias, 0, NULL, NULL)));
done:
    free(bias);
    return status;
}

static clmoe_status create_weights(inputs *in, const bench_device *device) {
    clmoe_status status = CLMOE_SUCCESS;
    const bench_case *c = &in->of;
    const size_t matrix = (size_t)c->experts * c->hidden_dim * c->dim;
    const double bytes = case_weight_bytes(c, type_bytes(in->type));
    if (bytes > WEIGHTS_SHARE * (double)device->memory)
        return cli_fail(CLMOE_UNSUPPORTED, "the weights need %.1f GB, but %s has %.1f GB",
                        bytes * 1e-9, device->name, (double)device->memory * 1e-9);
    TRY(create(device, &in->router, (size_t)c->experts * c->dim, &in->weights.router));
    TRY(create(device, &in->gate, 2 * matrix, &in->weights.experts.gate));
    TRY(create(device, &in->down, matrix, &in->weights.experts.down));
done:
    return status;
}

static bool same_layer(const bench_case *a, const bench_case *b) {
    return a->dim == b->dim && a->hidden_dim == b->hidden_dim && a->experts == b->experts;
}

clmoe_status inputs_set(inputs *in, const bench_device *device, const bench_case *c,
                        case_pattern pattern, clmoe_type type) {
    clmoe_status status = CLMOE_SUCCESS;
    const bool keep = in->weights.router.mem && in->type == type && same_layer(&in->of, c);
    if (!keep)
        inputs_release(in);
    in->of = *c;
    in->pattern = pattern;
    in->type = type;
    in->x = values_of(1, type, 1);
    in->dy = values_of(5, type, 1);
    in->router = values_of(2, CLMOE_F32, 1 / sqrt(c->dim));
    in->gate = values_of(3, type, 1 / sqrt(c->dim));
    in->down = values_of(4, type, 1 / sqrt(c->hidden_dim));
    buffer_release(&in->x_buf.mem);
    if (!keep)
        TRY(create_weights(in, device));
    TRY(create_bias(in, device));
    TRY(create(device, &in->x, (size_t)c->tokens * c->dim, &in->x_buf));
done:
    if (status != CLMOE_SUCCESS)
        inputs_release(in);
    return status;
}

void inputs_release(inputs *in) {
    buffer_release(&in->x_buf.mem);
    clmoe_weights_release(&in->weights);
    *in = (inputs){0};
}

clmoe_type inputs_gradient_type(const inputs *in) {
    return in->gradient_type == CLMOE_GRADIENT_F32 ? CLMOE_F32 : in->type;
}

clmoe_layer_desc inputs_desc(const inputs *in, const char *engine) {
    clmoe_layer_desc desc;
    clmoe_layer_desc_init(&desc);
    desc.dim = in->of.dim;
    desc.num_experts = in->of.experts;
    desc.top_k = in->of.top_k;
    desc.type = in->type;
    desc.weight_type = in->type;
    desc.engine = engine;
    desc.router.bias = 1;
    desc.router.renorm.kind = CLMOE_RENORM_SUM;
    desc.experts.hidden_dim = in->of.hidden_dim;
    return desc;
}
