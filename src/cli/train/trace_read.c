#include "trace_read.h"
#include "folder.h"

#include <errno.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum { MOST_BYTES = 1 << 28 };

typedef struct trace_lines {
    FILE *file;
    char *line;
    size_t room;
    uint32_t number; /* of the line, from 1 */
} trace_lines;

/* The object of the next line, or NULL. */
static json_t *next_object(trace_lines *in, problem *why) {
    const ssize_t bytes = getline(&in->line, &in->room, in->file);
    in->number++;
    if (bytes <= 0 || in->line[bytes - 1] != '\n') {
        problem_set(why, "it ends in line %u, before all experts", (unsigned)in->number);
        return NULL;
    }
    json_t *object = json_loadb(in->line, (size_t)bytes, JSON_REJECT_DUPLICATES, NULL);
    if (object == NULL)
        problem_set(why, "line %u is no JSON", (unsigned)in->number);
    return object;
}

static bool unlike(const trace_lines *in, const char *what, problem *why) {
    return problem_set(why, "line %u is no %s as clmoe trace writes it", (unsigned)in->number,
                       what);
}

/* ---- A layer --------------------------------------------------------------------------------- */

static bool read_information(json_t *object, information *about) {
    return json_unpack(object, "{sF sF sF sF sF sF}", "mutual_information", &about->mutual,
                       "entropy", &about->label_entropy, "expert_entropy", &about->expert_entropy,
                       "normalised", &about->normalised, "shuffled_mean", &about->shuffled,
                       "shuffled_deviation", &about->deviation) == 0;
}

/* The texts' names, which every layer has. */
static bool read_texts(const json_t *array, trace_record *r) {
    const size_t count = json_array_size(array);
    const bool first = r->num_texts == 0;
    if (count == 0 || count > MOST_TEXTS || (!first && count != r->num_texts))
        return false;
    for (size_t i = 0; first && i < count; i++) {
        const char *name = json_string_value(json_array_get(array, i));
        r->texts[i] = name != NULL ? strdup(name) : NULL;
        if (r->texts[i] == NULL)
            return false;
        r->num_texts++;
    }
    return true;
}

static bool create_counts(trace_record *r, problem *why) {
    trace *t = &r->trace;
    if (trace_create_counts(t, BYTE_CLASSES, &t->by[TRACE_CLASS]) == CLMOE_SUCCESS &&
        trace_create_counts(t, r->num_texts, &t->by[TRACE_SOURCE]) == CLMOE_SUCCESS)
        return true;
    return problem_set(why, "there is no memory for it");
}

static bool read_layer(trace_lines *in, const json_t *object, uint32_t layer, trace_record *r,
                       problem *why) {
    trace *t = &r->trace;
    json_int_t number, experts, step, tokens;
    json_t *texts, *classes, *sources;
    const char *kind;
    if (json_unpack((json_t *)object, "{ss sI sI sI sI so so so}", "kind", &kind, "layer", &number,
                    "experts", &experts, "step", &step, "tokens", &tokens, "texts", &texts, "class",
                    &classes, "text", &sources) != 0 ||
        strcmp(kind, "layer") != 0 || number != layer || step < 0 || step > UINT32_MAX ||
        tokens < 1 || tokens > UINT32_MAX)
        return unlike(in, "layer", why);
    if (experts != t->experts)
        return problem_set(why, "it has %lld experts, the run %u", (long long)experts,
                           (unsigned)t->experts);
    if (!read_texts(texts, r))
        return unlike(in, "layer", why);
    if (layer == 0 && !create_counts(r, why))
        return false;
    r->steps = (uint32_t)step;
    t->tokens = (uint32_t)tokens;
    if (!read_information(classes, &t->by[TRACE_CLASS].about[layer]) ||
        (r->num_texts > 1 && !read_information(sources, &t->by[TRACE_SOURCE].about[layer])))
        return unlike(in, "layer", why);
    return true;
}

/* ---- An expert ------------------------------------------------------------------------------- */

/* Of one kind of label; *sum: of all. */
static bool read_counts(const json_t *from, trace_counts *counts, uint32_t layer, uint32_t expert,
                        uint64_t *sum) {
    const bool classes = json_is_object(from);
    *sum = 0;
    if ((classes ? json_object_size(from) : json_array_size(from)) != counts->kinds)
        return false;
    for (uint32_t k = 0; k < counts->kinds; k++) {
        const json_t *number =
            classes ? json_object_get(from, class_name((byte_class)k)) : json_array_get(from, k);
        const json_int_t count = json_is_integer(number) ? json_integer_value(number) : -1;
        if (count < 0 || count > UINT32_MAX)
            return false;
        counts->pairs[layer][(size_t)expert * counts->kinds + k] = (uint64_t)count;
        *sum += (uint64_t)count;
    }
    return true;
}

static bool read_expert(trace_lines *in, const json_t *object, uint32_t layer, uint32_t expert,
                        trace_record *r, problem *why) {
    json_int_t of, number;
    json_t *classes, *sources;
    const char *kind;
    uint64_t one, other;
    if (json_unpack((json_t *)object, "{ss sI sI so so}", "kind", &kind, "layer", &of, "expert",
                    &number, "class_pairs", &classes, "text_pairs", &sources) != 0 ||
        strcmp(kind, "expert") != 0 || of != layer || number != expert ||
        !json_is_object(classes) || !json_is_array(sources) ||
        !read_counts(classes, &r->trace.by[TRACE_CLASS], layer, expert, &one) ||
        !read_counts(sources, &r->trace.by[TRACE_SOURCE], layer, expert, &other) || one != other)
        return unlike(in, "expert", why);
    return true;
}

/* ---- The file -------------------------------------------------------------------------------- */

/* Line `line` of a layer: itself, and behind it its experts. */
static bool read_line(trace_lines *in, uint32_t layer, uint32_t line, trace_record *r,
                      problem *why) {
    json_t *object = next_object(in, why);
    const bool right =
        object != NULL && (line == 0 ? read_layer(in, object, layer, r, why)
                                     : read_expert(in, object, layer, line - 1, r, why));
    json_decref(object);
    return right;
}

static bool read_lines(trace_lines *in, trace_record *r, problem *why) {
    const trace *t = &r->trace;
    for (uint32_t l = 0; l < t->layers; l++)
        for (uint32_t line = 0; line <= t->experts; line++)
            if (!read_line(in, l, line, r, why))
                return false;
    return getc(in->file) == EOF ||
           problem_set(why, "it has more than the run's %u layers", (unsigned)t->layers);
}

bool trace_read(const char *folder, const train_settings *run, trace_record *r, problem *why) {
    char path[PATH_MAX];
    struct stat info;
    r->trace.layers = run->layers;
    r->trace.experts = run->experts;
    if (folder_path(folder, TRACE_FILE, path) != CLMOE_SUCCESS ||
        (stat(path, &info) != 0 && errno == ENOENT))
        return true;
    if (stat(path, &info) == 0 && (!S_ISREG(info.st_mode) || info.st_size > MOST_BYTES))
        return problem_set(why, "it is no regular file of at most 256 MiB");
    trace_lines in = {.file = fopen(path, "rb")};
    if (in.file == NULL)
        return problem_set(why, "it cannot be opened: %s", strerror(errno));
    const bool right = read_lines(&in, r, why);
    fclose(in.file);
    free(in.line);
    return right;
}

void trace_record_free(trace_record *r) {
    trace_free(&r->trace);
    for (uint32_t i = 0; i < r->num_texts; i++)
        free(r->texts[i]);
    *r = (trace_record){0};
}
