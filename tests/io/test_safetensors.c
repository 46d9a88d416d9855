/* safetensors files: every way a file can be wrong, and every type that can be read. */
#include "io/safetensors.h"
#include "support_files.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define DATA_BYTES 64
#define F32_AT(begin, end)                                                                         \
    "{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[" #begin "," #end "]}"

static clmoe_status open_and_close(const char *path) {
    safetensors *file;
    clmoe_status status = safetensors_open(path, &file);
    safetensors_close(file);
    return status;
}

/* ---- Bad headers ---------------------------------------------------------------------------- */

static const struct {
    const char *header;
    const char *says, *names; /* both in the sentence */
} bad_headers[] = {
    {"", "not JSON", "bad.safetensors"},
    {"not json", "not JSON", "bad.safetensors"},
    {"{\"x\":", "not JSON", "bad.safetensors"},
    {"{} {}", "not JSON", "bad.safetensors"},
    {"[]", "not a JSON object", "bad.safetensors"},
    {"{\"x\":1}", "entry 'x' is not an object", "bad.safetensors"},
    {"{\"__metadata__\":1}", "'__metadata__' is not an object", "bad.safetensors"},
    {"{\"x\":{}}", "no dtype", "'x'"},
    {"{\"x\":{\"dtype\":4,\"shape\":[4],\"data_offsets\":[0,16]}}", "no dtype", "'x'"},
    {"{\"x\":{\"dtype\":\"F32\",\"data_offsets\":[0,16]}}", "no shape", "'x'"},
    {"{\"x\":{\"dtype\":\"F32\",\"shape\":4,\"data_offsets\":[0,16]}}", "no shape", "'x'"},
    {"{\"x\":{\"dtype\":\"F32\",\"shape\":[4,-1],\"data_offsets\":[0,16]}}", "dimension 1", "'x'"},
    {"{\"x\":{\"dtype\":\"F32\",\"shape\":[4.0],\"data_offsets\":[0,16]}}", "dimension 0", "'x'"},
    {"{\"x\":{\"dtype\":\"F32\",\"shape\":[\"4\"],\"data_offsets\":[0,16]}}", "dimension 0", "'x'"},
    {"{\"x\":{\"dtype\":\"F32\",\"shape\":[1,1,1,1,1,1,1,1,4],\"data_offsets\":[0,16]}}",
     "9 dimensions", "'x'"},
    {"{\"x\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,16]}}",
     "64 bits", "'x'"},
    {"{\"x\":{\"dtype\":\"F32\",\"shape\":[4611686018427387905],\"data_offsets\":[0,4]}}",
     "do not fill its 4 bytes", "'x'"},
    {"{\"x\":{\"dtype\":\"F32\",\"shape\":[99999999999999999999],\"data_offsets\":[0,4]}}",
     "not JSON", "bad.safetensors"},
    {"{\"x\":{\"dtype\":\"F32\",\"shape\":[4]}}", "data_offsets", "'x'"},
    {"{\"x\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":16}}", "data_offsets", "'x'"},
    {"{\"x\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0]}}", "data_offsets", "'x'"},
    {"{\"x\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,16,32]}}", "data_offsets", "'x'"},
    {"{\"x\":" F32_AT(-16, 0) "}", "data_offsets", "'x'"},
    {"{\"x\":" F32_AT(0, 16.0) "}", "data_offsets", "'x'"},
    {"{\"x\":" F32_AT(32, 16) "}", "begin at 32, after their end 16", "'x'"},
    {"{\"x\":" F32_AT(0, 99999) "}", "bytes [0, 99999) pass the end of the data (64)", "'x'"},
    {"{\"x\":" F32_AT(56, 72) "}", "bytes [56, 72) pass the end of the data (64)", "'x'"},
    {"{\"x\":" F32_AT(0, 9223372036854775807) "}", "pass the end", "'x'"},
    {"{\"x\":" F32_AT(0, 12) "}", "4 elements of F32 do not fill its 12 bytes", "'x'"},
    {"{\"x\":" F32_AT(0, 16) ",\"y\":" F32_AT(12, 28) "}", "overlap", "'y'"},
    {"{\"x\":" F32_AT(0, 16) ",\"y\":" F32_AT(0, 16) "}", "overlap", "'y'"},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[64],\"data_offsets\":[0,64]},"
     "\"b\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[8,8]},"
     "\"c\":{\"dtype\":\"U8\",\"shape\":[8],\"data_offsets\":[16,24]}}",
     "'a' and 'c' overlap", "bad.safetensors"},
    {"{\"x\":" F32_AT(0, 16) ",\"x\":" F32_AT(16, 32) "}", "duplicate", "x"},
};

static void test_bad_headers(void **state) {
    (void)state;
    const char *path = temp_path("bad.safetensors");
    for (size_t i = 0; i < sizeof bad_headers / sizeof bad_headers[0]; i++) {
        test_note("header %s", bad_headers[i].header);
        write_safetensors(path, bad_headers[i].header, DATA_BYTES);
        REFUSED(open_and_close(path), CLMOE_BAD_FILE, "bad.safetensors", bad_headers[i].says,
                bad_headers[i].names);
    }
}

/* ---- Bad files ------------------------------------------------------------------------------ */

static void write_length(const char *path, uint64_t length, size_t file_bytes) {
    unsigned char *bytes = calloc(1, file_bytes + 8);
    assert_non_null(bytes);
    for (size_t i = 0; i < 8; i++)
        bytes[i] = (unsigned char)(length >> (8 * i) & 255);
    write_bytes(path, bytes, file_bytes);
    free(bytes);
}

static void test_bad_lengths(void **state) {
    (void)state;
    const char *path = temp_path("bad.safetensors");
    test_note("empty and short files, lengths past the end");
    write_bytes(path, "", 0);
    REFUSED(open_and_close(path), CLMOE_BAD_FILE, "bad.safetensors", "0 bytes");
    write_bytes(path, "\1\0\0\0\0\0\0", 7);
    REFUSED(open_and_close(path), CLMOE_BAD_FILE, "bad.safetensors", "7 bytes");
    write_length(path, 0, 8);
    REFUSED(open_and_close(path), CLMOE_BAD_FILE, "bad.safetensors", "not JSON");
    write_length(path, 3, 10);
    REFUSED(open_and_close(path), CLMOE_BAD_FILE, "length 3 passes the end of the file (10 bytes)");
    write_length(path, (uint64_t)1 << 60, 100);
    REFUSED(open_and_close(path), CLMOE_BAD_FILE, "length 1152921504606846976", "limit");
    write_length(path, UINT64_MAX, 100);
    REFUSED(open_and_close(path), CLMOE_BAD_FILE, "length 18446744073709551615", "limit");
    write_length(path, 100000001, 100);
    REFUSED(open_and_close(path), CLMOE_BAD_FILE, "length 100000001", "limit of 100000000");
    write_length(path, 100000000, 100);
    REFUSED(open_and_close(path), CLMOE_BAD_FILE, "passes the end of the file");
}

static void test_deep_json(void **state) {
    (void)state;
    enum { DEPTH = 100000 };
    const char *path = temp_path("deep.safetensors");
    char *header = malloc(6 * DEPTH + 1);
    assert_non_null(header);
    for (size_t i = 0; i < DEPTH; i++)
        memcpy(header + 5 * i, "{\"a\":", 5);
    memset(header + 5 * DEPTH, '}', DEPTH);
    header[6 * DEPTH] = '\0';
    write_safetensors(path, header, DATA_BYTES);
    REFUSED(open_and_close(path), CLMOE_BAD_FILE, "deep.safetensors", "depth");
    memset(header, '[', 6 * DEPTH);
    write_safetensors(path, header, DATA_BYTES);
    REFUSED(open_and_close(path), CLMOE_BAD_FILE, "deep.safetensors", "depth");
    free(header);
}

static void test_no_file(void **state) {
    (void)state;
    const char *fifo = temp_path("fifo.safetensors");
    assert_int_equal(mkfifo(fifo, 0666), 0);
    REFUSED(open_and_close(temp_path("none.safetensors")), CLMOE_IO, "none.safetensors", "No such");
    REFUSED(open_and_close(temp_directory("dir.safetensors")), CLMOE_IO, "dir.safetensors",
            "not a regular file");
    REFUSED(open_and_close(fifo), CLMOE_IO, "fifo.safetensors", "not a regular file");
}

/* A file that loses its end after it was opened gives an error when it is read, no signal. */
static void test_truncated_later(void **state) {
    (void)state;
    const char *path = temp_path("truncated.safetensors");
    float values[4];
    safetensors *file;
    write_safetensors(path, "{\"x\":" F32_AT(0, 16) "}", 16);
    OK(safetensors_open(path, &file));
    struct stat info;
    assert_int_equal(stat(path, &info), 0);
    assert_int_equal(truncate(path, info.st_size - 8), 0);
    REFUSED(safetensors_read_f32(file, safetensors_find(file, "x"), 0, 4, values), CLMOE_BAD_FILE,
            "truncated.safetensors", "when it was opened");
    OK(safetensors_read_f32(file, safetensors_find(file, "x"), 0, 2, values));
    safetensors_close(file);
}

/* ---- Good files ----------------------------------------------------------------------------- */

static void test_list(void **state) {
    (void)state;
    const char *path = temp_path("list.safetensors");
    safetensors *file;
    /* With metadata, a hole at 16, an empty tensor, a scalar and a type of unknown size. */
    write_safetensors(
        path,
        "{\"__metadata__\":{\"format\":\"pt\"},\"b\":" F32_AT(0, 16) ",\"a\":" F32_AT(
            20, 36) ",\"empty\":{\"dtype\":\"BF16\",\"shape\":[0,7],\"data_offsets\":[40,40]},"
                    "\"scalar\":{\"dtype\":\"F64\",\"shape\":[],\"data_offsets\":[40,48]},"
                    "\"odd\":{\"dtype\":\"F4\",\"shape\":[3],\"data_offsets\":[48,50]}}   ",
        DATA_BYTES);
    OK(safetensors_open(path, &file));
    assert_string_equal(safetensors_path(file), path);
    assert_int_equal(safetensors_count(file), 5);
    for (size_t i = 1; i < 5; i++)
        assert_true(strcmp(safetensors_at(file, i - 1)->name, safetensors_at(file, i)->name) < 0);
    const st_tensor *a = safetensors_find(file, "a");
    assert_non_null(a);
    assert_int_equal(a->type, ST_F32);
    assert_int_equal(a->rank, 1);
    assert_int_equal(a->shape[0], 4);
    assert_int_equal(a->elements, 4);
    assert_int_equal(a->bytes, 16);
    assert_int_equal(safetensors_find(file, "empty")->elements, 0);
    assert_int_equal(safetensors_find(file, "scalar")->elements, 1);
    assert_int_equal(safetensors_find(file, "odd")->type, ST_OTHER);
    assert_string_equal(safetensors_find(file, "odd")->type_name, "F4");
    assert_null(safetensors_find(file, "c"));
    assert_null(safetensors_find(file, "__metadata__"));
    float value;
    REFUSED(safetensors_read_f32(file, safetensors_find(file, "odd"), 0, 1, &value),
            CLMOE_UNSUPPORTED, "list.safetensors", "'odd'", "F4");
    REFUSED(safetensors_read_f32(file, a, 3, 2, &value), CLMOE_INVALID_ARGUMENT, "'a'",
            "4 elements");
    REFUSED(safetensors_read_f32(file, a, 5, 0, &value), CLMOE_INVALID_ARGUMENT, "'a'");
    OK(safetensors_read_f32(file, safetensors_find(file, "empty"), 0, 0, &value));
    safetensors_close(file);
}

/* A file of one tensor [count] with the given bytes. */
static safetensors *open_values(const char *type, size_t count, const void *values, size_t bytes) {
    char header[160];
    int length = snprintf(header, sizeof header,
                          "{\"x\":{\"dtype\":\"%s\",\"shape\":[%zu],\"data_offsets\":[0,%zu]}}",
                          type, count, bytes);
    unsigned char *file = calloc(1, 8 + (size_t)length + bytes);
    assert_non_null(file);
    file[0] = (unsigned char)length;
    memcpy(file + 8, header, (size_t)length);
    memcpy(file + 8 + length, values, bytes);
    const char *path = temp_path("values.safetensors");
    write_bytes(path, file, 8 + (size_t)length + bytes);
    free(file);
    safetensors *opened;
    OK(safetensors_open(path, &opened));
    return opened;
}

static void check_values(const char *type, const void *values, size_t bytes, const float *want,
                         size_t count) {
    float got[16];
    test_note("values of %s", type);
    safetensors *file = open_values(type, count, values, bytes);
    OK(safetensors_read_f32(file, safetensors_find(file, "x"), 0, count, got));
    for (size_t i = 0; i < count; i++)
        CHECK(isnan(want[i]) ? isnan(got[i]) : memcmp(&got[i], &want[i], 4) == 0,
              "element %zu is %g, not %g\n", i, (double)got[i], (double)want[i]);
    safetensors_close(file);
}

static void test_types(void **state) {
    (void)state;
    const float f32[] = {1.5F, -0.0F, INFINITY, NAN, 1e-40F};
    check_values("F32", f32, sizeof f32, f32, 5);
    const double f64[] = {1.5, -0.1, 1e300, 1e-300};
    const float of_f64[] = {1.5F, -0.1F, INFINITY, 0};
    check_values("F64", f64, sizeof f64, of_f64, 4);
    const uint16_t f16[] = {0x3C00, 0xC000, 0x7BFF, 0x0001, 0x83FF, 0x0400, 0x7C00, 0xFE00, 0x8000};
    const float of_f16[] = {1,        -2,       65504, 0x1p-24F, -1023 * 0x1p-24F,
                            0x1p-14F, INFINITY, NAN,   -0.0F};
    check_values("F16", f16, sizeof f16, of_f16, 9);
    const uint16_t bf16[] = {0x3F80, 0xC000, 0x7F80, 0xFF80, 0x7FC0, 0x0001};
    const float of_bf16[] = {1, -2, INFINITY, -INFINITY, NAN, 0x1p-133F};
    check_values("BF16", bf16, sizeof bf16, of_bf16, 6);
}

/* Reads that begin and end inside and at the ends of the pieces a read is cut into. */
static void test_ranges(void **state) {
    (void)state;
    enum { COUNT = 70000 };
    uint16_t *values = malloc(COUNT * sizeof *values);
    float *got = malloc(COUNT * sizeof *got);
    assert_true(values != NULL && got != NULL);
    for (uint32_t i = 0; i < COUNT; i++) { /* bf16 of i, its low bits cut */
        float value = (float)i;
        uint32_t bits;
        memcpy(&bits, &value, 4);
        values[i] = (uint16_t)(bits >> 16);
    }
    safetensors *file = open_values("BF16", COUNT, values, COUNT * sizeof *values);
    static const struct {
        uint64_t first;
        size_t count;
    } ranges[] = {{0, COUNT}, {1, COUNT - 1}, {16383, 2}, {16384, 16384}, {5, 32768}, {COUNT, 0}};
    for (size_t r = 0; r < sizeof ranges / sizeof ranges[0]; r++) {
        OK(safetensors_read_f32(file, safetensors_find(file, "x"), ranges[r].first, ranges[r].count,
                                got));
        for (size_t i = 0; i < ranges[r].count; i++) {
            uint32_t bits;
            memcpy(&bits, &got[i], 4);
            assert_int_equal(bits, (uint32_t)values[ranges[r].first + i] << 16);
        }
    }
    safetensors_close(file);
    free(got);
    free(values);
}

/* Many names are found in less time than a walk through all would take. */
static void test_many(void **state) {
    (void)state;
    enum { TENSORS = 50000, ENTRY = 96 };
    char *header = malloc((size_t)TENSORS * ENTRY + 2), name[32];
    assert_non_null(header);
    size_t at = 0;
    for (int i = 0; i < TENSORS; i++)
        at += (size_t)snprintf(
            header + at, ENTRY,
            "%c\"layers.%d\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[%d,%d]}",
            i ? ',' : '{', i, i, i + 1);
    header[at++] = '}';
    header[at] = '\0';
    const char *path = temp_path("many.safetensors");
    write_safetensors(path, header, TENSORS);
    free(header);
    safetensors *file;
    OK(safetensors_open(path, &file));
    assert_int_equal(safetensors_count(file), TENSORS);
    clock_t start = clock();
    for (int i = 0; i < TENSORS; i++) {
        snprintf(name, sizeof name, "layers.%d", i);
        const st_tensor *t = safetensors_find(file, name);
        assert_non_null(t);
        assert_string_equal(t->name, name);
    }
    assert_true((double)(clock() - start) / CLOCKS_PER_SEC < 2);
    safetensors_close(file);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bad_headers),
        cmocka_unit_test(test_bad_lengths),
        cmocka_unit_test(test_deep_json),
        cmocka_unit_test(test_no_file),
        cmocka_unit_test(test_truncated_later),
        cmocka_unit_test(test_list),
        cmocka_unit_test(test_types),
        cmocka_unit_test(test_ranges),
        cmocka_unit_test(test_many),
    };
    return cmocka_run_group_tests(tests, files_setup, files_teardown);
}
