#include "trace_report.h"
#include "folder.h"
#include "trace_read.h"

#include <jansson.h>
#include <string.h>

enum { SHARE_DIGITS = 5, PATH_TEXT = 1024 };

/* ---- Tables ---------------------------------------------------------------------------------- */

/* The classes in their order, cut short. */
static void print_head(const trace *t) {
    printf("  expert    pairs   load lower upper digit punct space  line other");
    for (uint32_t s = 0; s < t->by[TRACE_SOURCE].kinds; s++)
        printf(" %s%u", s < 10 ? " text" : "text", (unsigned)s);
    putchar('\n');
}

static void print_shares(const trace *t, trace_label label, uint32_t layer, uint32_t expert,
                         int width) {
    double shares[MOST_KINDS];
    trace_shares(t, label, layer, expert, shares);
    for (uint32_t k = 0; k < t->by[label].kinds; k++)
        printf(" %*.1f", width, 100 * shares[k]);
}

static void print_row(const trace *t, uint32_t layer, uint32_t expert) {
    const uint64_t all = trace_layer_pairs(t, layer);
    const uint64_t pairs = expert < t->experts ? trace_expert_pairs(t, layer, expert) : all;
    if (expert < t->experts)
        printf("  %6u", (unsigned)expert);
    else
        printf("  %6s", "all");
    printf(" %8llu %6.1f", (unsigned long long)pairs,
           all > 0 ? 100 * (double)pairs / (double)all : 0.0);
    print_shares(t, TRACE_CLASS, layer, expert, 5);
    print_shares(t, TRACE_SOURCE, layer, expert, 6);
    putchar('\n');
}

static void print_information(const char *label, const information *i) {
    printf("  expert and %-6s %8.5f bits, %5.1f %% of %.3f; shuffled %.5f, deviation %.5f\n", label,
           i->mutual, 100 * i->normalised, i->label_entropy, i->shuffled, i->deviation);
}

static void print_texts(const corpus *text) {
    char path[PATH_TEXT];
    for (uint32_t i = 0; i < text->num_files; i++) {
        clmoe_printable(text->files[i].path, path, sizeof path);
        printf("text %-4u %s\n", (unsigned)i, path);
    }
}

void trace_print(const trace *t, const trace_title *title) {
    char folder[PATH_TEXT];
    clmoe_printable(title->folder, folder, sizeof folder);
    printf("%s after %u of %u steps, on %s: %u tokens\n", folder, (unsigned)title->done,
           (unsigned)title->steps, title->device, (unsigned)t->tokens);
    print_texts(title->text);
    printf("Shares in %%: of the layer's pairs (load); of the expert's by class of the token's own "
           "byte, the last\nthat it sees, and by text.\n");
    for (uint32_t l = 0; l < t->layers; l++) {
        printf("\nlayer %u\n", (unsigned)l);
        print_head(t);
        for (uint32_t e = 0; e <= t->experts; e++)
            print_row(t, l, e);
        print_information("class:", &t->by[TRACE_CLASS].about[l]);
        if (t->by[TRACE_SOURCE].kinds > 1)
            print_information("text:", &t->by[TRACE_SOURCE].about[l]);
    }
}

/* ---- JSON ------------------------------------------------------------------------------------ */

static json_t *information_json(const information *i) {
    return json_pack("{sf sf sf sf sf sf si}", "mutual_information", i->mutual, "entropy",
                     i->label_entropy, "expert_entropy", i->expert_entropy, "normalised",
                     i->normalised, "shuffled_mean", i->shuffled, "shuffled_deviation",
                     i->deviation, "shuffles", SHUFFLES);
}

static json_t *texts_json(const corpus *text) {
    char path[PATH_TEXT];
    json_t *array = json_array();
    for (uint32_t i = 0; i < text->num_files; i++) {
        clmoe_printable(text->files[i].path, path, sizeof path);
        json_array_append_new(array, json_string(path));
    }
    return array;
}

static json_t *layer_json(const trace *t, const trace_title *title, uint32_t layer) {
    const trace_counts *sources = &t->by[TRACE_SOURCE];
    return json_pack("{ss sI sI sI sI sI so so so}", "kind", "layer", "layer", (json_int_t)layer,
                     "experts", (json_int_t)t->experts, "step", (json_int_t)title->done, "tokens",
                     (json_int_t)t->tokens, "pairs", (json_int_t)trace_layer_pairs(t, layer),
                     "texts", texts_json(title->text), "class",
                     information_json(&t->by[TRACE_CLASS].about[layer]), "text",
                     sources->kinds > 1 ? information_json(&sources->about[layer]) : json_null());
}

/* Of one kind of label: counts, and shares, which are null for an expert without pairs. */
static void set_counts(const trace *t, trace_label label, uint32_t layer, uint32_t expert,
                       json_t *object) {
    const trace_counts *counts = &t->by[label];
    const bool classes = label == TRACE_CLASS, has = trace_expert_pairs(t, layer, expert) > 0;
    json_t *pairs = classes ? json_object() : json_array();
    json_t *parts = classes ? json_object() : json_array();
    double shares[MOST_KINDS];
    trace_shares(t, label, layer, expert, shares);
    for (uint32_t k = 0; k < counts->kinds; k++) {
        const uint64_t count = counts->pairs[layer][(size_t)expert * counts->kinds + k];
        json_t *number = json_integer((json_int_t)count);
        json_t *share = has ? json_real(shares[k]) : json_null();
        if (classes) {
            json_object_set_new(pairs, class_name((byte_class)k), number);
            json_object_set_new(parts, class_name((byte_class)k), share);
        } else {
            json_array_append_new(pairs, number);
            json_array_append_new(parts, share);
        }
    }
    json_object_set_new(object, classes ? "class_pairs" : "text_pairs", pairs);
    json_object_set_new(object, classes ? "class_shares" : "text_shares", parts);
}

static json_t *expert_json(const trace *t, uint32_t layer, uint32_t expert) {
    const uint64_t pairs = trace_expert_pairs(t, layer, expert), all = trace_layer_pairs(t, layer);
    json_t *object = json_pack("{ss sI sI sI sf}", "kind", "expert", "layer", (json_int_t)layer,
                               "expert", (json_int_t)expert, "pairs", (json_int_t)pairs, "load",
                               all > 0 ? (double)pairs / (double)all : 0.0);
    for (int i = 0; i < TRACE_LABELS; i++)
        set_counts(t, (trace_label)i, layer, expert, object);
    return object;
}

/* Takes the object. */
static bool write_line(FILE *file, json_t *object) {
    const bool written =
        object != NULL &&
        json_dumpf(object, file, JSON_COMPACT | JSON_ENSURE_ASCII | JSON_REAL_PRECISION(9)) == 0;
    fputc('\n', file);
    json_decref(object);
    return written;
}

static clmoe_status finish(output *to, bool written) {
    problem why;
    if (written)
        return checked(output_close(to, &why), &why);
    output_drop(to);
    return cli_fail(CLMOE_IO, "%s cannot be written", to->path);
}

static bool write_lines(const trace *t, const trace_title *title, FILE *file) {
    bool written = true;
    for (uint32_t l = 0; l < t->layers && written; l++) {
        written = write_line(file, layer_json(t, title, l));
        for (uint32_t e = 0; e < t->experts && written; e++)
            written = write_line(file, expert_json(t, l, e));
    }
    return written;
}

clmoe_status trace_write_json(const trace *t, const trace_title *title, output *to) {
    problem why;
    FILE *file = output_open(to, &why);
    if (file == NULL)
        return checked(false, &why);
    return finish(to, write_lines(t, title, file));
}

clmoe_status trace_keep(const trace *t, const trace_title *title) {
    clmoe_status status = CLMOE_SUCCESS;
    folder_file file = {0};
    TRY(folder_begin(&file, title->folder, TRACE_FILE));
    if (!write_lines(t, title, file.stream))
        TRY(cli_fail(CLMOE_IO, "%s cannot be written", file.path));
    TRY(folder_end(&file));
done:
    folder_drop(&file);
    return status;
}

/* ---- CSV ------------------------------------------------------------------------------------- */

static void write_shares(const trace *t, trace_label label, uint32_t layer, uint32_t expert,
                         FILE *file) {
    double shares[MOST_KINDS];
    const bool has = trace_expert_pairs(t, layer, expert) > 0;
    trace_shares(t, label, layer, expert, shares);
    for (uint32_t k = 0; k < t->by[label].kinds; k++)
        if (has)
            fprintf(file, ",%.*g", SHARE_DIGITS, shares[k]);
        else
            fputc(',', file);
}

static void write_row(const trace *t, uint32_t layer, uint32_t expert, FILE *file) {
    const uint64_t pairs = trace_expert_pairs(t, layer, expert), all = trace_layer_pairs(t, layer);
    fprintf(file, "%u,%u,%llu,%.*g", (unsigned)layer, (unsigned)expert, (unsigned long long)pairs,
            SHARE_DIGITS, all > 0 ? (double)pairs / (double)all : 0.0);
    write_shares(t, TRACE_CLASS, layer, expert, file);
    write_shares(t, TRACE_SOURCE, layer, expert, file);
    fputc('\n', file);
}

clmoe_status trace_write_csv(const trace *t, output *to) {
    problem why;
    FILE *file = output_open(to, &why);
    if (file == NULL)
        return checked(false, &why);
    fputs("layer,expert,pairs,load", file);
    for (int i = 0; i < BYTE_CLASSES; i++)
        fprintf(file, ",%s", class_name((byte_class)i));
    for (uint32_t s = 0; s < t->by[TRACE_SOURCE].kinds; s++)
        fprintf(file, ",text_%u", (unsigned)s);
    fputc('\n', file);
    for (uint32_t l = 0; l < t->layers; l++)
        for (uint32_t e = 0; e < t->experts; e++)
            write_row(t, l, e, file);
    return finish(to, true);
}
