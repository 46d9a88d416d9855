#include "checkpoint.h"

#include "runtime/json.h"
#include "runtime/structs.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MAX_SHARDS 10000

/* "DIRECTORY/NAME"; NULL without memory. */
static char *join(const char *directory, const char *name) {
    size_t bytes = strlen(directory) + strlen(name) + 2;
    char *path = malloc(bytes);
    if (path != NULL)
        snprintf(path, bytes, "%s/%s", directory, name);
    else
        fail(CLMOE_OUT_OF_MEMORY, "%s: no memory for the path of %s", directory, name);
    return path;
}

/* ---- One list of all tensors ---------------------------------------------------------------- */

static int by_name(const void *a, const void *b) {
    return strcmp(((const file_tensor *)a)->tensor->name, ((const file_tensor *)b)->tensor->name);
}

/* Makes room for `count` tensors more. */
static clmoe_status reserve(clmoe_checkpoint *c, size_t count) {
    file_tensor *tensors = realloc(c->tensors, (c->num_tensors + count + 1) * sizeof *tensors);
    if (tensors == NULL)
        return fail(CLMOE_OUT_OF_MEMORY, "%s: no memory for its list of tensors", c->directory);
    c->tensors = tensors;
    return CLMOE_SUCCESS;
}

size_t checkpoint_lower_bound(const clmoe_checkpoint *c, const char *name) {
    size_t low = 0, high = c->num_tensors;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (strcmp(c->tensors[middle].tensor->name, name) < 0)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

const file_tensor *checkpoint_find(const clmoe_checkpoint *c, const char *name) {
    size_t at = checkpoint_lower_bound(c, name);
    bool found = at < c->num_tensors && strcmp(c->tensors[at].tensor->name, name) == 0;
    return found ? &c->tensors[at] : NULL;
}

/* ---- Files ---------------------------------------------------------------------------------- */

static clmoe_status open_one(clmoe_checkpoint *c, const char *path) {
    safetensors **files = realloc(c->files, (c->num_files + 1) * sizeof *files);
    if (files == NULL)
        return fail(CLMOE_OUT_OF_MEMORY, "%s: no memory to open it", path);
    c->files = files;
    clmoe_status status = safetensors_open(path, &c->files[c->num_files]);
    c->num_files += status == CLMOE_SUCCESS;
    return status;
}

/* Whether `name` is of a file in the directory or below, written without detours. */
static bool is_inside(const char *name) {
    for (const char *part = name; part != NULL; part = strchr(part, '/')) {
        part += *part == '/' && part != name;
        size_t length = strcspn(part, "/");
        if (length == 0 || (length == 2 && strncmp(part, "..", 2) == 0))
            return false;
    }
    return true;
}

/* The file of that name, opened if it is new. */
static clmoe_status find_shard(clmoe_checkpoint *c, const char *index, const char *shard,
                               safetensors **file) {
    clmoe_status status = CLMOE_SUCCESS;
    size_t f = 0;
    while (strncmp(shard, "./", 2) == 0)
        shard += 2;
    char *path = join(c->directory, shard);
    if (path == NULL)
        return CLMOE_OUT_OF_MEMORY;
    while (f < c->num_files && strcmp(safetensors_path(c->files[f]), path) != 0)
        f++;
    if (f == MAX_SHARDS)
        TRY(fail(CLMOE_BAD_FILE, "%s: weight_map names more than %d files", index, MAX_SHARDS));
    if (f == c->num_files)
        TRY(open_one(c, path));
    *file = c->files[f];
done:
    free(path);
    return status;
}

/* One line of the index, tensor -> shard. */
static clmoe_status add_tensor(clmoe_checkpoint *c, const char *index, const char *tensor,
                               const char *shard) {
    clmoe_status status = CLMOE_SUCCESS;
    safetensors *file;
    if (json_is_repeated(tensor))
        return fail(CLMOE_BAD_FILE, "%s: weight_map has tensor '%.*s' twice", index,
                    (int)(strlen(tensor) - strlen(JSON_REPEATED)), tensor);
    if (shard == NULL || !is_inside(shard))
        return fail(
            CLMOE_BAD_FILE,
            "%s: weight_map gives tensor '%s' the file '%s', not a name inside the directory",
            index, tensor, shard ? shard : "?");
    TRY(find_shard(c, index, shard, &file));
    const st_tensor *found = safetensors_find(file, tensor);
    if (found == NULL)
        TRY(fail(CLMOE_BAD_FILE, "%s: tensor '%s' is missing, which %s says it has",
                 safetensors_path(file), tensor, index));
    c->tensors[c->num_tensors++] = (file_tensor){.file = file, .tensor = found};
done:
    return status;
}

/* The tensors that the index lists, where it says: what else its files hold is not the model's. */
static clmoe_status open_shards(clmoe_checkpoint *c, const char *index) {
    clmoe_status status = CLMOE_SUCCESS;
    json_t *root = NULL, *shard;
    const char *tensor;
    TRY(json_read(index, &root));
    json_t *map = json_object_get(root, "weight_map");
    if (json_object_get(root, "weight_map" JSON_REPEATED) != NULL)
        TRY(fail(CLMOE_BAD_FILE, "%s: has weight_map twice", index));
    if (!json_is_object(map) || json_object_size(map) == 0)
        TRY(fail(CLMOE_BAD_FILE, "%s: has no weight_map, or an empty one", index));
    TRY(reserve(c, json_object_size(map)));
    json_object_foreach(map, tensor, shard) {
        TRY(add_tensor(c, index, tensor, json_string_value(shard)));
    }
done:
    json_decref(root);
    return status;
}

static clmoe_status open_single(clmoe_checkpoint *c, const char *path) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(open_one(c, path));
    size_t count = safetensors_count(c->files[0]);
    TRY(reserve(c, count));
    for (size_t i = 0; i < count; i++)
        c->tensors[c->num_tensors++] =
            (file_tensor){.file = c->files[0], .tensor = safetensors_at(c->files[0], i)};
done:
    return status;
}

/* CLMOE_BAD_FILE if the index leaves model.safetensors, which is there too, without a use. */
static clmoe_status check_single_unused(const clmoe_checkpoint *c, const char *single) {
    for (size_t f = 0; f < c->num_files; f++)
        if (strcmp(safetensors_path(c->files[f]), single) == 0)
            return CLMOE_SUCCESS;
    return fail(
        CLMOE_BAD_FILE,
        "%s: has both model.safetensors and model.safetensors.index.json, which names other "
        "files; which of them is the model? Move the other away",
        c->directory);
}

static clmoe_status open_tensors(clmoe_checkpoint *c) {
    clmoe_status status = CLMOE_SUCCESS;
    char *single = join(c->directory, "model.safetensors");
    char *index = join(c->directory, "model.safetensors.index.json");
    if (single == NULL || index == NULL)
        TRY(CLMOE_OUT_OF_MEMORY);
    bool has_single = access(single, F_OK) == 0;
    if (access(index, F_OK) == 0) {
        TRY(open_shards(c, index));
        TRY(has_single ? check_single_unused(c, single) : CLMOE_SUCCESS);
    } else if (has_single) {
        TRY(open_single(c, single));
    } else {
        TRY(fail(CLMOE_IO, "%s: has neither model.safetensors nor model.safetensors.index.json",
                 c->directory));
    }
    qsort(c->tensors, c->num_tensors, sizeof c->tensors[0], by_name);
done:
    free(index);
    free(single);
    return status;
}

clmoe_status clmoe_checkpoint_open(const char *directory, const clmoe_checkpoint_options *options,
                                   clmoe_checkpoint **out) {
    clmoe_status status = CLMOE_SUCCESS;
    char *path = NULL;
    clmoe_checkpoint *c = NULL;
    clmoe_checkpoint_options own;
    if (directory == NULL || out == NULL)
        return fail(CLMOE_INVALID_ARGUMENT, "%s is NULL", directory ? "out" : "directory");
    *out = NULL;
    if (directory[0] == '\0')
        return fail(CLMOE_INVALID_ARGUMENT, "directory is '', which names none");
    clmoe_checkpoint_options_init(&own);
    if (options != NULL)
        TRY(struct_take(CLMOE_INVALID_ARGUMENT, "options", options, &own, sizeof own));
    if (own.decode > CLMOE_DECODE_BF16 || own.reserved != 0)
        TRY(fail(CLMOE_INVALID_ARGUMENT, "options.%s is %u, which is %s",
                 own.reserved ? "reserved" : "decode", own.reserved ? own.reserved : own.decode,
                 own.reserved ? "not 0" : "no clmoe_decode"));
    c = calloc(1, sizeof *c);
    if (c == NULL || (c->directory = malloc(strlen(directory) + 1)) == NULL)
        TRY(fail(CLMOE_OUT_OF_MEMORY, "%s: no memory to open it", directory));
    strcpy(c->directory, directory);
    c->decode = own.decode;
    path = join(directory, "config.json");
    if (path == NULL)
        TRY(CLMOE_OUT_OF_MEMORY);
    TRY(config_open(path, &c->config));
    TRY(checkpoint_choose_family(c, own.assume));
    TRY(open_tensors(c));
    *out = c;
    c = NULL;
done:
    free(path);
    clmoe_checkpoint_close(c);
    return status;
}

void clmoe_checkpoint_close(clmoe_checkpoint *c) {
    if (c == NULL)
        return;
    free(c->tensors);
    for (size_t f = 0; f < c->num_files; f++)
        safetensors_close(c->files[f]);
    free(c->files);
    config_close(c->config);
    free(c->directory);
    free(c);
}

const char *clmoe_checkpoint_model_type(const clmoe_checkpoint *c) {
    return c ? config_model_type(c->config) : "";
}
