/* A hostile model.safetensors beside a good config.json; the tensors it claims are read. */
#include "io/safetensors.h"
#include "fuzz.h"

#include <stdio.h>
#include <stdlib.h>

static void read_tensor(const safetensors *file, const st_tensor *tensor) {
    enum { MOST = 4096 };
    float values[16];
    size_t count = tensor->elements < 16 ? (size_t)tensor->elements : 16;
    uint64_t last = tensor->elements < MOST ? tensor->elements : MOST;
    safetensors_read_f32(file, tensor, 0, count, values);
    safetensors_read_f32(file, tensor, last - count, count, values);
    if (safetensors_find(file, tensor->name) != tensor)
        abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    char path[512];
    safetensors *file = NULL;
    fuzz_copy("config/tiny.json", "config.json");
    fuzz_write("model.safetensors", data, size);
    snprintf(path, sizeof path, "%s/model.safetensors", fuzz_directory());
    if (safetensors_open(path, &file) != CLMOE_SUCCESS)
        return 0;
    for (size_t i = 0; i < safetensors_count(file); i++)
        read_tensor(file, safetensors_at(file, i));
    safetensors_close(file);
    fuzz_checkpoint();
    return 0;
}
