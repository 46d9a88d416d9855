#include "model_files.h"

#include <jansson.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define INDEX "model.safetensors.index.json"

typedef struct guard {
    const char *directory, *option;
    const output *output;
    problem *why;
} guard;

static bool is_spared(const guard *g, const char *name) {
    char path[PATH_MAX];
    const int bytes = snprintf(path, sizeof path, "%s/%s", g->directory, name);
    if (bytes < 0 || bytes >= (int)sizeof path || !output_is_file(g->output, path))
        return true;
    return problem_set(g->why, "%s %.300s is a file of the model, %.300s", g->option,
                       g->output->path, path);
}

/* The files that the index names. */
static bool are_shards_spared(const guard *g, const char *index) {
    const char *tensor, *last = "";
    json_t *file;
    json_error_t error;
    json_t *root = json_load_file(index, 0, &error);
    bool spared = root != NULL || problem_set(g->why,
                                              "%s %.300s: whether it is a file of the model "
                                              "is not known, for %.300s cannot be read: %s",
                                              g->option, g->output->path, index, error.text);
    json_object_foreach(json_object_get(root, "weight_map"), tensor, file) {
        const char *name = json_string_value(file);
        if (name != NULL && spared && strcmp(name, last) != 0)
            spared = is_spared(g, name);
        last = name != NULL ? name : "";
    }
    json_decref(root);
    return spared;
}

bool model_is_spared(const char *directory, const output *o, const char *option, problem *why) {
    static const char *const names[] = {"config.json", "model.safetensors", INDEX};
    const guard g = {.directory = directory, .option = option, .output = o, .why = why};
    char index[PATH_MAX];
    if (o->path == NULL)
        return true;
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        if (!is_spared(&g, names[i]))
            return false;
    const int bytes = snprintf(index, sizeof index, "%s/" INDEX, directory);
    if (bytes < 0 || bytes >= (int)sizeof index || access(index, F_OK) != 0 || !o->identified)
        return true;
    return are_shards_spared(&g, index);
}
