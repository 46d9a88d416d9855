#include "tuning.h"
#include "context.h"
#include "json.h"
#include "sources.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define BUILT_IN "src/runtime/tuned.json"

enum { MAX_CHOICES = 5 };

/* A size of an engine: the values it can have, ended by 0. */
typedef struct size_choice {
    const char *field;
    size_t offset; /* in tile_sizes */
    uint32_t values[MAX_CHOICES];
} size_choice;

#define ROWS(...)                                                                                  \
    {                                                                                              \
        "rows", offsetof(tile_sizes, rows), {                                                      \
            __VA_ARGS__                                                                            \
        }                                                                                          \
    }
#define COLUMNS(...)                                                                               \
    {                                                                                              \
        "columns", offsetof(tile_sizes, columns), {                                                \
            __VA_ARGS__                                                                            \
        }                                                                                          \
    }
#define DEPTH(...)                                                                                 \
    {                                                                                              \
        "depth", offsetof(tile_sizes, depth), {                                                    \
            __VA_ARGS__                                                                            \
        }                                                                                          \
    }

/* docs in context.h; bench/tune.c tries these. */
static const struct {
    const char *name;
    size_choice choices[3];
} engines[TUNED_ENGINES] = {
    [TUNED_CPU] = {"cpu", {ROWS(40, 80, 160, 320), DEPTH(128, 256, 512)}},
    [TUNED_TILED] = {"tiled", {ROWS(32, 64, 128), COLUMNS(32, 64), DEPTH(8, 16, 32)}},
};

/* How well an entry fits the device; a worse one does not replace a better one. */
typedef enum fit { FITS_NOT, FITS_TYPE, FITS_NAME } fit;

/* Where an entry stands, for sentences. */
typedef struct place {
    const char *file;
    size_t entry;
} place;

static const char *type_of(const device_info *device) {
    return device->type & CL_DEVICE_TYPE_CPU   ? "cpu"
           : device->type & CL_DEVICE_TYPE_GPU ? "gpu"
                                               : "other";
}

/* "FILE: tuning[N].FIELD is VALUE, but WHAT". */
static clmoe_status fail_field(const place *at, const char *field, const json_t *value,
                               const char *what) {
    char *text = value ? json_dumps(value, JSON_ENCODE_ANY | JSON_COMPACT) : NULL;
    fail(CLMOE_BAD_FILE, "%s: tuning[%zu].%.64s is %.60s, but %s", at->file, at->entry, field,
         text ? text : "missing", what);
    free(text);
    return CLMOE_BAD_FILE;
}

static clmoe_status read_text(const json_t *entry, const place *at, const char *field,
                              const char **text) {
    const json_t *value = json_object_get(entry, field);
    *text = json_string_value(value);
    return *text ? CLMOE_SUCCESS : fail_field(at, field, value, "must be a text");
}

static clmoe_status read_size(const json_t *entry, const place *at, const char *engine,
                              const size_choice *choice, tile_sizes *sizes) {
    const json_t *number = json_object_get(entry, choice->field);
    char what[128];
    size_t used = (size_t)snprintf(what, sizeof what, "engine %s can have: ", engine);
    for (size_t i = 0; i < MAX_CHOICES && choice->values[i]; i++) {
        if (json_is_integer(number) && json_integer_value(number) == choice->values[i]) {
            memcpy((char *)sizes + choice->offset, &choice->values[i], sizeof(uint32_t));
            return CLMOE_SUCCESS;
        }
        used += (size_t)snprintf(what + used, sizeof what - used, "%s%u", i ? ", " : "",
                                 choice->values[i]);
    }
    return fail_field(at, choice->field, number, what);
}

/* Whether an entry of the engine may have the field; the last three are for people. */
static bool is_known(size_t engine, const char *field) {
    static const char *const names[] = {"device", "type", "engine", "driver", "measured", "date"};
    bool known = false;
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        known = known || strcmp(names[i], field) == 0;
    for (size_t i = 0; i < 3 && engines[engine].choices[i].field; i++)
        known = known || strcmp(engines[engine].choices[i].field, field) == 0;
    return known;
}

/* CLMOE_BAD_FILE for a field that is there twice, see json.h, or that the engine has not. */
static clmoe_status check_fields(const json_t *entry, const place *at, size_t engine) {
    const char *field;
    json_t *value;
    json_object_foreach((json_t *)entry, field, value) {
        char base[64];
        const size_t mark = json_is_repeated(field) ? strlen(JSON_REPEATED) : 0;
        snprintf(base, sizeof base, "%.*s", (int)(strlen(field) - mark), field);
        if (mark > 0)
            return fail_field(at, base, value, "the file has it twice");
        if (!is_known(engine, field))
            return fail_field(at, field, value, "an entry of its engine has no such field");
    }
    return CLMOE_SUCCESS;
}

static clmoe_status check_type(const json_t *entry, const place *at, const char *type) {
    static const char *const types[] = {"cpu", "gpu", "other"};
    for (size_t i = 0; i < sizeof types / sizeof types[0]; i++)
        if (strcmp(types[i], type) == 0)
            return CLMOE_SUCCESS;
    return fail_field(at, "type", json_object_get(entry, "type"), "must be cpu, gpu or other");
}

static clmoe_status read_entry(const device_info *device, const json_t *entry, const place *at,
                               fit *best, tuning *out) {
    clmoe_status status = CLMOE_SUCCESS;
    const char *name = NULL, *type = NULL, *engine = NULL;
    size_t which = 0;
    tile_sizes sizes = {0};
    TRY(read_text(entry, at, "device", &name));
    TRY(read_text(entry, at, "type", &type));
    TRY(check_type(entry, at, type));
    TRY(read_text(entry, at, "engine", &engine));
    while (which < TUNED_ENGINES && strcmp(engines[which].name, engine) != 0)
        which++;
    if (which == TUNED_ENGINES)
        return fail_field(at, "engine", json_object_get(entry, "engine"), "has no sizes");
    TRY(check_fields(entry, at, which));
    for (size_t i = 0; i < 3 && engines[which].choices[i].field; i++)
        TRY(read_size(entry, at, engine, &engines[which].choices[i], &sizes));
    const fit now = strcmp(name, device->name) == 0      ? FITS_NAME
                    : strcmp(type, type_of(device)) == 0 ? FITS_TYPE
                                                         : FITS_NOT;
    if (now != FITS_NOT && now >= best[which]) {
        best[which] = now;
        out->sizes[which] = sizes;
    }
done:
    return status;
}

static clmoe_status read_table(const device_info *device, const json_t *root, const char *file,
                               tuning *out) {
    clmoe_status status = CLMOE_SUCCESS;
    const json_t *entries = json_object_get(root, "tuning");
    fit best[TUNED_ENGINES] = {FITS_NOT};
    const char *name;
    json_t *value;
    if (!json_is_array(entries))
        return fail(CLMOE_BAD_FILE, "%s: tuning is not an array", file);
    json_object_foreach((json_t *)root, name, value) {
        if (strcmp(name, "tuning") != 0)
            return fail(CLMOE_BAD_FILE, "%s: has \"%.64s\" beside \"tuning\"", file, name);
    }
    for (size_t i = 0; i < json_array_size(entries); i++)
        TRY(read_entry(device, json_array_get(entries, i), &(place){file, i}, best, out));
done:
    return status;
}

static clmoe_status load_built_in(json_t **root) {
    json_error_t error;
    const kernel_source *source = kernel_sources;
    while (source->name && strcmp(source->name, BUILT_IN) != 0)
        source++;
    *root = json_loads(source->name ? source->text : "", JSON_REJECT_DUPLICATES, &error);
    if (*root)
        return CLMOE_SUCCESS;
    if (json_out_of_memory(&error))
        return fail(CLMOE_OUT_OF_MEMORY, "out of memory for the table of tile sizes");
    return fail(CLMOE_BAD_FILE, "%s: line %d is not JSON: %s", BUILT_IN, error.line, error.text);
}

clmoe_status tuning_read(const device_info *device, const char *path, tuning *out) {
    clmoe_status status = CLMOE_SUCCESS;
    json_t *built_in = NULL, *file = NULL;
    *out = (tuning){0};
    TRY(load_built_in(&built_in));
    TRY(read_table(device, built_in, BUILT_IN, out));
    if (path) {
        TRY(json_read(path, &file));
        TRY(read_table(device, file, path, out));
    }
done:
    json_decref(built_in);
    json_decref(file);
    return status;
}
