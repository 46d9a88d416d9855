/* random.clh: Philox4x32-10, and the numbers made of its bits. */
#include "ref_random.h"
#include "support.h"

#include "runtime/sources.h"

#include <math.h>
#include <string.h>

/* The device's functions behind kernels of one work-item per number. */
static const char kernels[] =
    "__kernel void bits(__global const uint *in, __global uint *out) {\n"
    "    size_t i = get_global_id(0);\n"
    "    uint4 c = vload4(0, in + 6 * i);\n"
    "    vstore4(philox(c, (uint2)(in[6 * i + 4], in[6 * i + 5])), i, out);\n"
    "}\n"
    "__kernel void numbers(__global const state_header *state, uint columns, uint use,\n"
    "                      __global uint *bits, __global float *out) {\n"
    "    size_t i = get_global_id(0);\n"
    "    uint token = i / columns, column = i % columns;\n"
    "    uint4 b = random_bits(state, token, column, use);\n"
    "    bits[i] = b.x;\n"
    "    out[3 * i] = random_uniform(b.x);\n"
    "    out[3 * i + 1] = random_normal(b);\n"
    "    out[3 * i + 2] = random_gumbel(b);\n"
    "}\n"
    "__kernel void ends(__global float *out) {\n"
    "    uint i = get_global_id(0);\n"
    "    out[i] = random_uniform(i ? 0xFFFFFFFFu : 0u);\n"
    "    out[2 + i] = random_gumbel((uint4)(i ? 0xFFFFFFFFu : 0u));\n"
    "    out[4 + i] = random_normal((uint4)(i ? 0xFFFFFFFFu : 0u));\n"
    "}\n";

static void add_file(char *text, const char *name) {
    for (const kernel_source *s = kernel_sources; s->name; s++) {
        if (strcmp(s->name, name) != 0)
            continue;
        for (const char *line = s->text; *line; line += strcspn(line, "\n") + 1)
            if (strncmp(line, "#include", 8) != 0)
                strncat(text, line, strcspn(line, "\n") + 1);
    }
}

static void release_program(void *program) {
    clReleaseProgram(program);
}

static void release_kernel(void *kernel) {
    clReleaseKernel(kernel);
}

static cl_kernel kernel_of(const char *name) {
    char *text = HOST(char, 1 << 16);
    cl_int code;
    add_file(text, "cl/runtime/types.clh");
    add_file(text, "cl/balance/state.clh");
    add_file(text, "cl/runtime/random.clh");
    strcat(text, kernels);
    const char *source = text;
    cl_program program = clCreateProgramWithSource(test.context, 1, &source, NULL, &code);
    CL_OK(code);
    clean_later(release_program, program);
    CL_OK(clBuildProgram(program, 1, &test.device, "", NULL, NULL));
    cl_kernel kernel = clCreateKernel(program, name, &code);
    CL_OK(code);
    clean_later(release_kernel, kernel);
    return kernel;
}

static void run(cl_kernel kernel, size_t count) {
    CL_OK(clEnqueueNDRangeKernel(test.queue, kernel, 1, NULL, &count, NULL, 0, NULL, NULL));
    CL_OK(clFinish(test.queue));
}

/* A plain buffer: the kernels above take no offsets. */
static void release_mem(void *mem) {
    clReleaseMemObject(mem);
}

static cl_mem mem_new(const void *data, size_t bytes) {
    cl_int code;
    cl_mem mem = clCreateBuffer(test.context, CL_MEM_READ_WRITE, bytes, NULL, &code);
    CL_OK(code);
    clean_later(release_mem, mem);
    if (data)
        CL_OK(clEnqueueWriteBuffer(test.queue, mem, CL_TRUE, 0, bytes, data, 0, NULL, NULL));
    return mem;
}

static void *mem_get(cl_mem mem, size_t bytes) {
    void *data = host_alloc(bytes, 1);
    CL_OK(clEnqueueReadBuffer(test.queue, mem, CL_TRUE, 0, bytes, data, 0, NULL, NULL));
    return data;
}

static void set_mem(cl_kernel kernel, cl_uint index, cl_mem mem) {
    CL_OK(clSetKernelArg(kernel, index, sizeof mem, (const void *)&mem));
}

/* The vectors that Random123 publishes: counter, key, result. */
static const uint32_t known[][10] = {
    {0, 0, 0, 0, 0, 0, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
    {0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0x408f276d, 0x41c83b0e,
     0xa20bc7c6, 0x6d5451fd},
    {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0, 0xd16cfe09, 0x94fdcceb,
     0x5001e420, 0x24126ea1},
};

static void known_answers(void **state) {
    (void)state;
    test_case("Random123's vectors");
    uint32_t in[COUNT_OF(known)][6], want[COUNT_OF(known)][4];
    for (size_t i = 0; i < COUNT_OF(known); i++) {
        memcpy(in[i], known[i], sizeof in[i]);
        ref_philox(known[i], known[i] + 4, want[i]);
        compare_ints("oracle", want[i], known[i] + 6, 4);
    }
    cl_kernel kernel = kernel_of("bits");
    cl_mem from = mem_new(in, sizeof in), to = mem_new(NULL, sizeof want);
    set_mem(kernel, 0, from);
    set_mem(kernel, 1, to);
    run(kernel, COUNT_OF(known));
    compare_ints("device", mem_get(to, sizeof want), want, 4 * COUNT_OF(known));
}

typedef struct moments {
    double mean, variance, low, high;
} moments;

static moments moments_of(const float *values, size_t n, size_t stride) {
    moments m = {0, 0, (double)values[0], (double)values[0]};
    for (size_t i = 0; i < n; i++) {
        double v = (double)values[i * stride];
        m.mean += v / (double)n;
        m.variance += v * v / (double)n;
        m.low = v < m.low ? v : m.low;
        m.high = v > m.high ? v : m.high;
    }
    m.variance -= m.mean * m.mean;
    return m;
}

static void check_moments(const char *what, moments m, double mean, double variance) {
    CHECK(fabs(m.mean - mean) < 0.01 && fabs(m.variance - variance) < 0.02 * variance,
          "%s: mean %g, variance %g\n", what, m.mean, m.variance);
}

/* Every stream: the layout of the counter, exact uniform numbers, and the distributions. */
static void streams(void **state) {
    (void)state;
    enum { TOKENS = 1000, COLUMNS = 300, N = TOKENS * COLUMNS };
    for (uint32_t use = 1; use <= 5; use++) {
        test_case("use %u", use);
        clmoe_state s = {.version = 2, .seed = {0x1234567u + use, 0xFEDCBA98u}, .step = 77 * use};
        uint32_t columns = COLUMNS;
        cl_kernel kernel = kernel_of("numbers");
        cl_mem bits = mem_new(NULL, N * 4), out = mem_new(NULL, N * 12);
        set_mem(kernel, 0, mem_new(&s, sizeof s));
        CL_OK(clSetKernelArg(kernel, 1, sizeof columns, &columns));
        CL_OK(clSetKernelArg(kernel, 2, sizeof use, &use));
        set_mem(kernel, 3, bits);
        set_mem(kernel, 4, out);
        run(kernel, N);
        const uint32_t *got_bits = mem_get(bits, N * 4);
        const float *got = mem_get(out, N * 12);
        double *normal = HOST(double, N), *gumbel = HOST(double, N);
        float *got_normal = HOST(float, N), *got_gumbel = HOST(float, N);
        for (uint32_t i = 0; i < N; i++) {
            uint32_t want[2];
            ref_random_bits(&s, i / COLUMNS, i % COLUMNS, use, want);
            CHECK(got_bits[i] == want[0], "bits[%u] are %x, not %x\n", i, got_bits[i], want[0]);
            CHECK((double)got[3 * i] == ref_uniform(want[0]), "uniform[%u] is %.9g\n", i,
                  (double)got[3 * i]);
            normal[i] = ref_normal(want);
            gumbel[i] = ref_gumbel(want[0]);
            got_normal[i] = got[3 * i + 1];
            got_gumbel[i] = got[3 * i + 2];
        }
        compare_floats("normal", got_normal, normal, N, STEP_TOLERANCE);
        compare_floats("gumbel", got_gumbel, gumbel, N, STEP_TOLERANCE);
        moments uniform = moments_of(got, N, 3);
        CHECK(uniform.low > 0.0 && uniform.high < 1.0, "from %g to %g\n", uniform.low,
              uniform.high);
        check_moments("uniform", uniform, 0.5, 1.0 / 12.0);
        check_moments("normal", moments_of(got_normal, N, 1), 0.0, 1.0);
        check_moments("gumbel", moments_of(got_gumbel, N, 1), 0.5772157, 1.6449341);
    }
}

/* The ends of the bits give finite numbers. */
static void ends_are_finite(void **state) {
    (void)state;
    test_case("the smallest and the largest bits");
    cl_kernel kernel = kernel_of("ends");
    cl_mem out = mem_new(NULL, 6 * 4);
    set_mem(kernel, 0, out);
    run(kernel, 2);
    const float *got = mem_get(out, 6 * 4);
    CHECK(got[0] > 0.0f && got[1] < 1.0f, "%g and %g\n", (double)got[0], (double)got[1]);
    for (int i = 2; i < 6; i++)
        CHECK(isfinite(got[i]), "[%d] is %g\n", i, (double)got[i]);
}

int main(void) {
    const struct CMUnitTest tests[] = {TEST(known_answers), TEST(streams), TEST(ends_are_finite)};
    return RUN(tests);
}
