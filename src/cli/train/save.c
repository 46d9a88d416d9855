#include "save.h"
#include "../options.h"
#include "../tensors.h"
#include "folder.h"

#include <errno.h>
#include <getopt.h>
#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char run_name[] = "run.json", state_name[] = "state.safetensors";

/* ---- run.json
 * ------------------------------------------------------------------------------------ */

/* Appends a value to an array, or is the end of both: a word that is not UTF-8 has none. */
static json_t *appended(json_t *array, json_t *value) {
    if (array != NULL && json_array_append_new(array, value) == 0)
        return array;
    json_decref(array);
    return NULL;
}

static json_t *words_json(const run_words *words) {
    json_t *array = json_array();
    for (int i = 0; i < words->count && array != NULL; i++)
        array = appended(array, json_string(words->words[i]));
    return array;
}

/* The whole path, by which a run goes on from anywhere; as it was given if that is not UTF-8. */
static json_t *path_json(const char *path) {
    char here[PATH_MAX];
    json_t *value = NULL;
    if (path[0] != '/' && getcwd(here, sizeof here) != NULL)
        value = json_sprintf("%s/%s", here, path);
    return value != NULL ? value : json_string(path);
}

static json_t *texts_json(const corpus *text) {
    json_t *array = json_array();
    for (uint32_t i = 0; i < text->num_files && array != NULL; i++) {
        const text_file *file = &text->files[i];
        array = appended(array, json_pack("{s:o, s:I, s:I}", "path", path_json(file->path), "bytes",
                                          (json_int_t)(file->end - file->begin), "fnv1a",
                                          (json_int_t)file->checksum));
    }
    return array;
}

clmoe_status run_check_words(const run_words *words) {
    clmoe_status status = CLMOE_SUCCESS;
    for (int i = 0; i < words->count; i++) {
        json_t *word = json_string(words->words[i]);
        if (word == NULL)
            TRY(cli_fail(CLMOE_INVALID_ARGUMENT, "'%s' is not UTF-8, as %s must be",
                         words->words[i], run_name));
        json_decref(word);
    }
done:
    return status;
}

clmoe_status run_save(const char *folder, const run_words *words, const corpus *text) {
    clmoe_status status = CLMOE_SUCCESS;
    folder_file file = {0};
    json_t *root = json_pack("{s:s, s:o, s:o}", "clmoe", clmoe_version(), "command",
                             words_json(words), "texts", texts_json(text));
    if (root == NULL)
        return cli_fail(CLMOE_OUT_OF_MEMORY, "no memory for %s/%s", folder, run_name);
    TRY(folder_begin(&file, folder, run_name));
    json_dumpf(root, file.stream, JSON_INDENT(1));
    fputc('\n', file.stream);
    TRY(folder_end(&file));
done:
    folder_drop(&file);
    json_decref(root);
    return status;
}

static clmoe_status load_json(const char *folder, json_t **root) {
    clmoe_status status = CLMOE_SUCCESS;
    char path[PATH_MAX];
    json_error_t error;
    TRY(folder_path(folder, run_name, path));
    if (access(path, R_OK) != 0)
        return cli_fail(CLMOE_IO, "'%s' is no folder of a run: %s: %s", folder, path,
                        strerror(errno));
    *root = json_load_file(path, JSON_REJECT_DUPLICATES, &error);
    if (*root == NULL)
        return cli_fail(CLMOE_BAD_FILE, "%s: %s", path, error.text);
done:
    return status;
}

static clmoe_status copy_words(const json_t *array, run_words *words) {
    const size_t count = json_array_size(array);
    words->words = calloc(count + 1, sizeof *words->words);
    for (size_t i = 0; words->words != NULL && i < count; i++) {
        const char *word = json_string_value(json_array_get(array, i));
        words->words[i] = word ? strdup(word) : NULL;
        if (words->words[i] == NULL)
            return cli_fail(CLMOE_BAD_FILE, "%s: 'command' is no list of words", run_name);
        words->count = (int)i + 1;
    }
    return words->count > 0 ? CLMOE_SUCCESS
                            : cli_fail(CLMOE_BAD_FILE, "%s has no 'command'", run_name);
}

clmoe_status run_load(const char *folder, run_words *words, train_settings *settings) {
    clmoe_status status = CLMOE_SUCCESS;
    json_t *root = NULL;
    problem why;
    int option = CLI_BAD;
    TRY(load_json(folder, &root));
    TRY(copy_words(json_object_get(root, "command"), words));
    optind = 0; /* getopt_long() begins anew */
    if (!settings_parse(settings, words->count, words->words, &option, &why))
        TRY(cli_fail(CLMOE_BAD_FILE, "%s/%s: %s", folder, run_name, why.text));
    if (option != CLI_END || settings->resume != NULL)
        TRY(cli_fail(CLMOE_BAD_FILE, "%s/%s is not the command of a run", folder, run_name));
done:
    json_decref(root);
    return status;
}

void run_words_free(run_words *words) {
    for (int i = 0; i < words->count; i++)
        free(words->words[i]);
    for (uint32_t i = 0; i < MOST_TEXTS; i++)
        free(words->texts[i]);
    free(words->words);
    *words = (run_words){0};
}

clmoe_status run_find_texts(const char *folder, run_words *words, train_settings *settings) {
    clmoe_status status = CLMOE_SUCCESS;
    json_t *root = NULL;
    TRY(load_json(folder, &root));
    for (uint32_t i = 0; i < settings->num_texts; i++) {
        const json_t *entry = json_array_get(json_object_get(root, "texts"), i);
        const char *path = json_string_value(json_object_get(entry, "path"));
        if (path == NULL || access(path, R_OK) != 0)
            continue;
        words->texts[i] = strdup(path);
        if (words->texts[i] != NULL)
            settings->texts[i] = words->texts[i];
    }
done:
    json_decref(root);
    return status;
}

clmoe_status run_check_texts(const char *folder, const corpus *text) {
    clmoe_status status = CLMOE_SUCCESS;
    json_t *root = NULL;
    TRY(load_json(folder, &root));
    for (uint32_t i = 0; i < text->num_files; i++) {
        const json_t *entry = json_array_get(json_object_get(root, "texts"), i);
        const text_file *file = &text->files[i];
        if (json_integer_value(json_object_get(entry, "bytes")) != file->end - file->begin ||
            json_integer_value(json_object_get(entry, "fnv1a")) != file->checksum)
            TRY(cli_fail(CLMOE_BAD_FILE, "%s is not what the run of '%s' began with", file->path,
                         folder));
    }
done:
    json_decref(root);
    return status;
}

/* ---- state.safetensors
 * --------------------------------------------------------------------------- */

/* An array of the device as a tensor of f32; words that are no floats as halves, see words_of(). */
typedef struct state_tensor {
    char name[40];
    cl_mem mem;
    size_t elements; /* f32, or words */
    bool words;
} state_tensor;

enum { FLOAT_TENSORS = 3, HALF_BITS = 16, HALF_MASK = 0xffff };

static uint32_t state_tensors(const train_model *m, state_tensor *tensors) {
    const size_t elements = m->parameters.elements;
    uint32_t count = 0;
    tensors[count++] = (state_tensor){"parameters", m->values, elements, false};
    tensors[count++] = (state_tensor){"adamw.mean", m->mean, elements, false};
    tensors[count++] = (state_tensor){"adamw.square", m->square, elements, false};
    for (uint32_t l = 0; l < m->settings->layers && m->phases.counted; l++) {
        state_tensor *tensor = &tensors[count++];
        *tensor = (state_tensor){.mem = m->blocks[l].state,
                                 .elements = m->state_bytes / sizeof(uint32_t),
                                 .words = true};
        snprintf(tensor->name, sizeof tensor->name, "balance.%u", (unsigned)l);
    }
    return count;
}

/* A word as two numbers of 16 bits, which any reader of floats keeps. */
static void halves_of_words(float *values, size_t count) {
    for (size_t i = count; i-- > 0;) {
        uint32_t word;
        memcpy(&word, &values[i], sizeof word);
        values[2 * i] = (float)(word & HALF_MASK);
        values[2 * i + 1] = (float)(word >> HALF_BITS);
    }
}

/* false: a number is no half of a word. */
static bool words_of_halves(float *values, size_t count) {
    for (size_t i = 0; i < 2 * count; i++)
        if (!(values[i] >= 0 && values[i] <= HALF_MASK))
            return false;
    for (size_t i = 0; i < count; i++) {
        const uint32_t word = (uint32_t)values[2 * i] | (uint32_t)values[2 * i + 1] << HALF_BITS;
        memcpy(&values[i], &word, sizeof word);
    }
    return true;
}

static bool all_finite(const float *values, size_t count) {
    for (size_t i = 0; i < count; i++)
        if (!isfinite(values[i]))
            return false;
    return true;
}

static size_t tensor_floats(const state_tensor *tensor) {
    return tensor->words ? 2 * tensor->elements : tensor->elements;
}

/* The tensors of a state, their entries in the file, and room for the largest. */
typedef struct state_file {
    state_tensor *tensors;
    tensor_entry *entries; /* one more: "step" */
    float *values;
    uint32_t count;
} state_file;

static clmoe_status state_file_create(const train_model *m, state_file *f) {
    const uint32_t most = FLOAT_TENSORS + m->settings->layers;
    size_t room = 1;
    f->tensors = calloc(most, sizeof *f->tensors);
    f->entries = calloc(most + 1, sizeof *f->entries);
    if (f->tensors == NULL || f->entries == NULL)
        return cli_fail(CLMOE_OUT_OF_MEMORY, "no memory for %s", state_name);
    f->count = state_tensors(m, f->tensors);
    for (uint32_t i = 0; i < f->count; i++) {
        const size_t floats = tensor_floats(&f->tensors[i]);
        f->entries[i] = (tensor_entry){f->tensors[i].name, {.rank = 1, .dims = {floats}}};
        room = floats > room ? floats : room;
    }
    f->entries[f->count] = (tensor_entry){"step", {.rank = 1, .dims = {1}}};
    f->values = malloc(room * sizeof *f->values);
    return f->values ? CLMOE_SUCCESS
                     : cli_fail(CLMOE_OUT_OF_MEMORY, "no memory for %s", state_name);
}

static void state_file_free(state_file *f) {
    free(f->tensors);
    free(f->entries);
    free(f->values);
}

clmoe_status run_diverged(const char *folder, uint32_t step, const char *what) {
    return cli_fail(
        CLMOE_UNSUPPORTED,
        "step %u: %s no finite number any more; a smaller --lr may help. '%s' keeps what "
        "was saved before",
        (unsigned)step, what, folder);
}

clmoe_status state_save(train_model *m, const char *folder, uint32_t steps) {
    clmoe_status status = CLMOE_SUCCESS;
    const float step = (float)steps;
    folder_file file = {0};
    state_file f = {0};
    TRY(state_file_create(m, &f));
    TRY(folder_begin(&file, folder, state_name));
    TRY(tensors_begin(file.stream, file.path, f.entries, f.count + 1));
    for (uint32_t i = 0; i < f.count; i++) {
        const state_tensor *tensor = &f.tensors[i];
        TRY(model_read(m, tensor->mem, tensor->elements * sizeof *f.values, f.values));
        if (tensor->words)
            halves_of_words(f.values, tensor->elements);
        else if (!all_finite(f.values, tensor->elements))
            TRY(run_diverged(folder, steps, "a parameter or its moment is"));
        TRY(tensors_append(file.stream, file.path, f.values, tensor_floats(tensor)));
    }
    TRY(tensors_append(file.stream, file.path, &step, 1));
    TRY(folder_end(&file));
done:
    folder_drop(&file);
    state_file_free(&f);
    return status;
}

/* Whether a tensor has the length that the model asks for. */
static clmoe_status check_length(const clmoe_tensors *file, const tensor_entry *entry) {
    bool has = false;
    const clmoe_status status = tensor_find(file, entry->name, &entry->shape, &has);
    if (status == CLMOE_SUCCESS && !has)
        return cli_fail(CLMOE_BAD_FILE, "%s has no tensor '%s'", clmoe_tensors_path(file),
                        entry->name);
    return status;
}

static clmoe_status load_tensor(train_model *m, const clmoe_tensors *file, const state_file *f,
                                uint32_t index) {
    clmoe_status status = CLMOE_SUCCESS;
    const state_tensor *tensor = &f->tensors[index];
    TRY(check_length(file, &f->entries[index]));
    TRY(LIB(clmoe_tensors_read(file, tensor->name, 0, tensor_floats(tensor), f->values)));
    if (tensor->words) {
        if (!words_of_halves(f->values, tensor->elements))
            TRY(cli_fail(CLMOE_BAD_FILE, "%s: '%s' has numbers that are no halves of words",
                         clmoe_tensors_path(file), tensor->name));
        TRY(LIB(clmoe_state_check(phases_at(&m->phases, 0)->layer, f->values, m->state_bytes)));
    }
    if (!tensor->words && !all_finite(f->values, tensor->elements))
        TRY(cli_fail(CLMOE_BAD_FILE, "%s: '%s' has a number that is not finite",
                     clmoe_tensors_path(file), tensor->name));
    TRY(model_write(m, tensor->mem, tensor->elements * sizeof *f->values, f->values));
    if (tensor->mem == m->values)
        TRY(model_round(m, f->values));
done:
    return status;
}

static clmoe_status load_all(train_model *m, const char *path, uint32_t *steps) {
    clmoe_status status = CLMOE_SUCCESS;
    clmoe_tensors *file = NULL;
    state_file f = {0};
    float step = 0;
    TRY(LIB(clmoe_tensors_open(path, &file)));
    TRY(state_file_create(m, &f));
    for (uint32_t i = 0; i < f.count; i++)
        TRY(load_tensor(m, file, &f, i));
    TRY(check_length(file, &f.entries[f.count]));
    TRY(LIB(clmoe_tensors_read(file, "step", 0, 1, &step)));
    if (!(step >= 0 && step <= (float)m->settings->steps && step == floorf(step)))
        TRY(cli_fail(CLMOE_BAD_FILE, "%s: 'step' is %g of %u", path, (double)step,
                     (unsigned)m->settings->steps));
    *steps = (uint32_t)step;
done:
    state_file_free(&f);
    clmoe_tensors_close(file);
    return status;
}

clmoe_status state_load(train_model *m, const char *folder, uint32_t *steps) {
    clmoe_status status = CLMOE_SUCCESS;
    char path[PATH_MAX];
    *steps = 0;
    TRY(folder_path(folder, state_name, path));
    if (access(path, F_OK) == 0)
        TRY(load_all(m, path, steps));
    else
        TRY(model_init(m));
done:
    return status;
}
