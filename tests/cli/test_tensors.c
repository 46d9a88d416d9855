/* The tool's tensors: what it writes, the library's public calls read back. */
#include "support_files.h"

#include "../../src/cli/tensors.h"

#include <math.h>
#include <string.h>
#include <unistd.h>

static clmoe_status write_to(const char *path, const char *name, uint64_t rows,
                             const float *values) {
    FILE *stream = fopen(path, "wb");
    assert_non_null(stream);
    clmoe_status status = tensor_write(stream, path, name, rows, 3, values);
    fclose(stream);
    return status;
}

static void refused(clmoe_status status, clmoe_status want, const char *sentence,
                    const char *says) {
    assert_int_equal(status, want);
    if (!strstr(sentence, says))
        fail_msg("\"%s\" does not say \"%s\"", sentence, says);
}

static void written_and_read(void **state) {
    (void)state;
    const char *path = temp_path("written.safetensors");
    const float values[6] = {1, -2.5F, 3e-40F, INFINITY, 0, 6};
    float got[6], last = 0;
    clmoe_tensors *file = NULL;
    uint32_t rank = 0;
    uint64_t dims[CLMOE_TENSOR_RANK];
    assert_int_equal(write_to(path, "a \"name\"", 2, values), CLMOE_SUCCESS);
    assert_int_equal(clmoe_tensors_open(path, &file), CLMOE_SUCCESS);
    assert_string_equal(clmoe_tensors_path(file), path);
    assert_int_equal(clmoe_tensors_shape(file, "a \"name\"", &rank, dims), CLMOE_SUCCESS);
    assert_int_equal(rank, 2);
    assert_int_equal(dims[0], 2);
    assert_int_equal(dims[1], 3);
    assert_int_equal(clmoe_tensors_read(file, "a \"name\"", 0, 6, got), CLMOE_SUCCESS);
    assert_memory_equal(got, values, sizeof values);
    assert_int_equal(clmoe_tensors_read(file, "a \"name\"", 5, 1, &last), CLMOE_SUCCESS);
    assert_true(last == values[5]);
    refused(clmoe_tensors_read(file, "a \"name\"", 5, 2, got), CLMOE_INVALID_ARGUMENT,
            clmoe_last_error(), "6 elements");
    refused(clmoe_tensors_shape(file, "b", &rank, dims), CLMOE_BAD_FILE, clmoe_last_error(),
            "no tensor 'b'; it has a \"name\"");
    clmoe_tensors_close(file);
    assert_int_equal(write_to(path, "none", 0, NULL), CLMOE_SUCCESS);
    assert_int_equal(clmoe_tensors_open(path, &file), CLMOE_SUCCESS);
    assert_int_equal(clmoe_tensors_read(file, "none", 0, 0, NULL), CLMOE_SUCCESS);
    clmoe_tensors_close(file);
}

static void cannot_be_written(void **state) {
    (void)state;
    const float values[6] = {0};
    refused(write_to(temp_path("large.safetensors"), "y", UINT64_MAX, values),
            CLMOE_INVALID_ARGUMENT, cli_error(), "large.safetensors");
    if (access("/dev/full", W_OK) == 0)
        refused(write_to("/dev/full", "y", 2, values), CLMOE_IO, cli_error(), "/dev/full");
}

static void missing_arguments(void **state) {
    (void)state;
    clmoe_tensors *file = (clmoe_tensors *)state;
    uint32_t rank;
    uint64_t dims[CLMOE_TENSOR_RANK];
    refused(clmoe_tensors_open(NULL, &file), CLMOE_INVALID_ARGUMENT, clmoe_last_error(),
            "path is NULL");
    assert_null(file);
    refused(clmoe_tensors_open("", &file), CLMOE_INVALID_ARGUMENT, clmoe_last_error(),
            "path is ''");
    assert_null(file);
    refused(clmoe_tensors_open("x", NULL), CLMOE_INVALID_ARGUMENT, clmoe_last_error(),
            "out is NULL");
    refused(clmoe_tensors_shape(NULL, "x", &rank, dims), CLMOE_INVALID_ARGUMENT, clmoe_last_error(),
            "tensors is NULL");
    clmoe_tensors_close(NULL);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(written_and_read),
        cmocka_unit_test(cannot_be_written),
        cmocka_unit_test(missing_arguments),
    };
    return cmocka_run_group_tests(tests, files_setup, files_teardown);
}
