/*
 * Coded checkpoints, decoded at upload: files of an independent writer, single codes against their
 * formulas, blocks with short edges, and files that contradict themselves.
 */
#include "io/codes.h"
#include "io/safetensors.h"
#include "support_checkpoint.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---- Single codes --------------------------------------------------------------------------- */

/* Compares by bits, but for NaN, of which there are many. */
static void check_code(const char *what, int code, float got, double want) {
    if (isnan(want)) {
        CHECK(isnan(got), "%s %d is %g, not NaN\n", what, code, (double)got);
        return;
    }
    CHECK((double)got == want && !signbit(got) == !signbit(want), "%s %d is %g, not %g\n", what,
          code, (double)got, want);
}

static void every_code(void **state) {
    (void)state;
    static const double fp4[8] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
    test_case("codes");
    for (int code = 0; code < 256; code++) {
        const double sign = code & 128 ? -1 : 1;
        const int e = code >> 3 & 15, m = code & 7;
        const double e4m3 = (code & 127) == 127 ? (double)NAN
                            : e == 0            ? sign * m / 512
                                                : sign * (1 + m / 8.0) * pow(2, e - 7);
        check_code("e4m3", code, code_e4m3((unsigned char)code), e4m3);
        check_code("e8m0", code, code_e8m0((unsigned char)code),
                   code == 255 ? (double)NAN : pow(2, code - 127));
        check_code("e2m1", code, code_e2m1((unsigned char)code),
                   (code & 8 ? -1 : 1) * fp4[code & 7]);
    }
}

/* ---- Files of another writer ---------------------------------------------------------------- */

static const struct {
    const char *name, *format;
} written[] = {
    {"fp8_f32", "FP8"},        {"fp8_bf16", "FP8"},       {"fp8_e8m0", "FP8"},
    {"fp8_scale", "FP8"},      {"fp8_channel", "FP8"},    {"fp8_tensor", "FP8"},
    {"mxfp4_blocks", "MXFP4"}, {"mxfp4_packed", "MXFP4"}, {"mxfp4_pairs", "MXFP4"},
};

static const char *directory_of(size_t i) {
    static char path[512];
    snprintf(path, sizeof path, "%s/coded/%s", TEST_DATA, written[i].name);
    return path;
}

static safetensors *open_file(size_t i, const char *name) {
    char path[600];
    safetensors *file = NULL;
    snprintf(path, sizeof path, "%s/%s", directory_of(i), name);
    OK(safetensors_open(path, &file));
    return file;
}

static float *read_tensor(const safetensors *file, const char *name) {
    const st_tensor *t = safetensors_find(file, name);
    CHECK(t != NULL, "no tensor %s\n", name);
    float *values = HOST(float, t->elements);
    OK(safetensors_read_f32(file, t, 0, (size_t)t->elements, values));
    return values;
}

static clmoe_checkpoint *open_decoding(const char *directory, clmoe_decode decode) {
    clmoe_checkpoint *checkpoint = NULL;
    clmoe_checkpoint_options options;
    clmoe_checkpoint_options_init(&options);
    options.decode = decode;
    OK(clmoe_checkpoint_open(directory, &options, &checkpoint));
    return checkpoint;
}

static void release_weights(void *weights) {
    clmoe_weights_release(weights);
}

/* Uploads layer 0 and returns its weights, which are released when the test ends. */
static clmoe_weights *upload(const char *directory, clmoe_decode decode, const char *engine,
                             clmoe_layer_desc *desc) {
    clmoe_weights *weights = HOST(clmoe_weights, 1);
    clmoe_checkpoint *checkpoint = open_decoding(directory, decode);
    OK(clmoe_checkpoint_layer(checkpoint, 0, desc));
    CHECK(desc->weight_type + 1 == decode, "weight_type %u\n", desc->weight_type);
    desc->engine = engine;
    clean_later(release_weights, weights);
    OK(clmoe_checkpoint_upload(checkpoint, 0, desc, test.context, test.queue, weights));
    clmoe_checkpoint_close(checkpoint);
    return weights;
}

static void outputs(void **state) {
    (void)state;
    static const char *const engines[] = {"ref", "cpu"};
    for (size_t i = 0; i < COUNT_OF(written); i++)
        for (size_t e = 0; e < COUNT_OF(engines); e++) {
            batch b = {0};
            device_batch d = {0};
            ref_weights none = {0};
            test_case("%s, %s", written[i].name, engines[e]);
            clmoe_weights *weights =
                upload(directory_of(i), CLMOE_DECODE_F32, engines[e], &b.desc);
            safetensors *file = open_file(i, "expected.safetensors");
            const float *y = read_tensor(file, "y");
            b.in.x = read_tensor(file, "x");
            b.in.tokens = (uint32_t)safetensors_find(file, "x")->shape[0];
            b.in.weights = &none;
            safetensors_close(file);
            clmoe_layer *layer = test_layer(0, &b.desc);
            run_uploaded(layer, weights, &b, &d);
            const float *got = buf_get(d.args.y);
            double off = 0, norm = 0;
            for (size_t k = 0; k < (size_t)b.in.tokens * b.desc.dim; k++) {
                off += ((double)got[k] - (double)y[k]) * ((double)got[k] - (double)y[k]);
                norm += (double)y[k] * (double)y[k];
            }
            CHECK(sqrt(off / norm) < 1e-5, "off by %g\n", sqrt(off / norm));
        }
}
