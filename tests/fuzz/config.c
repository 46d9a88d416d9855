/* A hostile config.json beside good tensors. */
#include "fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    fuzz_copy("safetensors/tiny", "model.safetensors");
    fuzz_write("config.json", data, size);
    fuzz_checkpoint();
    return 0;
}
