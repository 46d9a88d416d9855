/*
 * Whether tensor y of several files is the same, by relative norm to the first:
 *   compare TOLERANCE FILE FILE...
 */
#include "cli/tensors.h"

#include <stdio.h>
#include <stdlib.h>

typedef struct rows {
    float *values;
    uint32_t tokens, dim;
} rows;

static clmoe_status read_y(const char *path, rows *y) {
    clmoe_status status = CLMOE_SUCCESS;
    clmoe_tensors *file = NULL;
    uint32_t rank = 0;
    uint64_t shape[CLMOE_TENSOR_RANK];
    TRY(LIB(clmoe_tensors_open(path, &file)));
    TRY(LIB(clmoe_tensors_shape(file, "y", &rank, shape)));
    if (rank != 2)
        TRY(cli_fail(CLMOE_BAD_FILE, "%s has no matrix y", path));
    y->dim = (uint32_t)shape[1];
    TRY(rows_read(file, "y", y->dim, &y->tokens, &y->values));
done:
    clmoe_tensors_close(file);
    return status;
}

int main(int argc, char **argv) {
    int result = argc > 3 ? 0 : 2;
    rows first = {0};
    double tolerance = argc > 1 ? strtod(argv[1], NULL) : 0;
    for (int i = 2; i < argc && result == 0; i++) {
        rows y = {0};
        if (read_y(argv[i], i == 2 ? &first : &y) != CLMOE_SUCCESS) {
            fprintf(stderr, "%s\n", cli_error());
            result = 2;
        } else if (i > 2) {
            bool same_shape = y.tokens == first.tokens && y.dim == first.dim;
            size_t count = (size_t)first.tokens * first.dim;
            double error = same_shape ? relative_error(y.values, first.values, count) : 1;
            printf("%s %.2e\n", argv[i], error);
            result = error <= tolerance ? 0 : 1;
        }
        free(y.values);
    }
    free(first.values);
    return result;
}
