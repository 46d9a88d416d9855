#include "support_checkpoint.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Appends "NAME TYPE DIMS" to a header whose data ends at *end. */
static void append_tensor(char *header, size_t size, const char *spec, size_t length, size_t *end) {
    char name[160], type[16], dims[48];
    CHECK(length < 220 && sscanf(spec, "%159s %15s %47[0-9,]", name, type, dims) == 3, "%s\n",
          spec);
    const bool one = strchr(type, '8') != NULL; /* U8, I8, F8_E4M3 */
    size_t bytes = one ? 1 : strcmp(type, "BF16") == 0 ? 2 : 4;
    for (const char *dim = dims; dim != NULL; dim = strchr(dim, ',')) {
        dim += *dim == ',';
        bytes *= strtoul(dim, NULL, 10);
    }
    size_t used = strlen(header);
    snprintf(header + used, size - used,
             "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[%s],\"data_offsets\":[%zu,%zu]}",
             used > 1 ? "," : "", name, type, dims, *end, *end + bytes);
    *end += bytes;
}

void write_tensors(const char *path, const char *tensors, const char *drop, const char *add) {
    static char header[65536];
    size_t end = 0, dropped = strlen(drop);
    strcpy(header, "{");
    for (int part = 0; part < 2; part++)
        for (const char *at = part ? add : tensors, *next; (next = strchr(at, ';')) != NULL;
             at = next + 1) {
            size_t name = (size_t)(strchr(at, ' ') - at);
            if (part == 0 && dropped > 0 && name >= dropped &&
                strncmp(at + name - dropped, drop, dropped) == 0)
                continue;
            append_tensor(header, sizeof header, at, (size_t)(next - at), &end);
        }
    strcat(header, "}");
    write_safetensors(path, header, end);
}

void write_index(const char *path, const char *tensors, const char *shard, const char *more,
                 const char *other) {
    static char index[65536];
    size_t used =
        (size_t)snprintf(index, sizeof index, "{\"metadata\": {\"x\": NaN}, \"weight_map\": {");
    for (int part = 0; part < 2; part++)
        for (const char *at = part ? more : tensors, *next; (next = strchr(at, ';')) != NULL;
             at = next + 1) {
            int name = (int)(strchr(at, ' ') - at);
            used += (size_t)snprintf(index + used, sizeof index - used, "%s\"%.*s\": \"%s\"",
                                     index[used - 1] == '{' ? "" : ", ", name, at,
                                     part ? other : shard);
        }
    snprintf(index + used, sizeof index - used, "}}");
    write_text(path, index);
}

const char *write_checkpoint(const char *name, const char *config, const char *tensors) {
    char file[128];
    const char *directory = temp_directory(name);
    snprintf(file, sizeof file, "%s/config.json", name);
    write_text(temp_path(file), config);
    snprintf(file, sizeof file, "%s/model.safetensors", name);
    write_tensors(temp_path(file), tensors, "", "");
    return directory;
}

clmoe_status describe_as(const char *assume, const char *directory, uint32_t layer,
                         clmoe_layer_desc *desc) {
    clmoe_checkpoint *checkpoint;
    clmoe_checkpoint_options options;
    clmoe_checkpoint_options_init(&options);
    options.assume = assume;
    clmoe_status status = clmoe_checkpoint_open(directory, &options, &checkpoint);
    if (status == CLMOE_SUCCESS)
        status = clmoe_checkpoint_layer(checkpoint, layer, desc);
    clmoe_checkpoint_close(checkpoint);
    return status;
}

clmoe_status describe(const char *directory, uint32_t layer, clmoe_layer_desc *desc) {
    return describe_as(NULL, directory, layer, desc);
}

char *replaced(const char *text, const char *find, const char *replace) {
    const char *at = strstr(text, find);
    CHECK(at != NULL, "no %s\n", find);
    size_t before = (size_t)(at - text), size = strlen(text) + strlen(replace) + 1;
    char *result = malloc(size);
    assert_non_null(result);
    snprintf(result, size, "%.*s%s%s", (int)before, text, replace, at + strlen(find));
    return result;
}
