/* A hostile model.safetensors.index.json beside a good config and two names of a good shard. */
#include "fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    fuzz_copy("config/tiny.json", "config.json");
    fuzz_copy("safetensors/tiny", "a.safetensors");
    fuzz_copy("safetensors/tiny", "b.safetensors");
    fuzz_write("model.safetensors.index.json", data, size);
    fuzz_checkpoint();
    return 0;
}
