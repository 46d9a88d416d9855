#include "gradients.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define PREFIX "grad."

/* ---- All of them, piece by piece --------------------------------------------------------------
 */

/* Elements [first, first + count) of a tensor of the list. */
typedef struct piece {
    const tensor_entry *entry;
    uint64_t first;
    size_t count;
    const float *values;
} piece;

typedef clmoe_status (*piece_visitor)(void *user, const piece *p);

typedef struct walk {
    const gradient_list *list;
    size_t next; /* in the list */
    piece_visitor visit;
    void *user;
    bool failed; /* `visit` did, and its sentence is the one to keep */
} walk;

static clmoe_status visit_parameter(void *user, const clmoe_parameter *parameter) {
    walk *w = user;
    w->next += parameter->first == 0;
    const piece p = {.entry = &w->list->entries[w->next - 1],
                     .first = parameter->first,
                     .count = parameter->count,
                     .values = parameter->values};
    const clmoe_status status = w->visit(w->user, &p);
    w->failed = status != CLMOE_SUCCESS;
    return status;
}

static clmoe_status visit_all(const gradient_source *s, const gradient_list *list,
                              piece_visitor visit, void *user) {
    walk w = {.list = list, .next = 1, .visit = visit, .user = user};
    const piece dx = {
        .entry = &list->entries[0], .count = (size_t)s->tokens * s->desc->dim, .values = s->dx};
    clmoe_status status = visit(user, &dx);
    if (status != CLMOE_SUCCESS)
        return status;
    status = clmoe_checkpoint_gradients(s->checkpoint, s->layer, s->desc, s->queue, s->gradients,
                                        visit_parameter, &w);
    return w.failed ? status : LIB(status);
}

/* ---- The list -------------------------------------------------------------------------------- */

static clmoe_status add(gradient_list *list, const char *prefix, const char *name,
                        const tensor_shape *shape) {
    const size_t bytes = strlen(prefix) + strlen(name) + 1;
    tensor_entry *entries = realloc(list->entries, (list->count + 1) * sizeof *entries);
    char *own = malloc(bytes);
    if (entries != NULL)
        list->entries = entries;
    if (entries == NULL || own == NULL) {
        free(own);
        return cli_fail(CLMOE_OUT_OF_MEMORY, "no memory for the list of gradients");
    }
    snprintf(own, bytes, "%s%s", prefix, name);
    list->entries[list->count++] = (tensor_entry){own, *shape};
    return CLMOE_SUCCESS;
}

typedef struct listing {
    gradient_list *list;
    bool failed; /* without memory */
} listing;

static clmoe_status add_parameter(void *user, const clmoe_parameter *parameter) {
    listing *l = user;
    tensor_shape shape = {.rank = parameter->rank};
    memcpy(shape.dims, parameter->shape, parameter->rank * sizeof shape.dims[0]);
    const clmoe_status status = add(l->list, PREFIX, parameter->name, &shape);
    l->failed = status != CLMOE_SUCCESS;
    return status;
}

clmoe_status gradient_list_make(const gradient_source *s, gradient_list *list) {
    const tensor_shape rows = {.rank = 2, .dims = {s->tokens, s->desc->dim}};
    listing l = {.list = list};
    clmoe_status status = add(list, "", s->dx_name, &rows);
    if (status != CLMOE_SUCCESS)
        return status;
    status =
        clmoe_checkpoint_gradients(s->checkpoint, s->layer, s->desc, NULL, NULL, add_parameter, &l);
    return l.failed ? status : LIB(status);
}

void gradient_list_free(gradient_list *list) {
    for (size_t i = 0; i < list->count; i++)
        free((void *)list->entries[i].name);
    free(list->entries);
    *list = (gradient_list){0};
}

/* ---- To a file ------------------------------------------------------------------------------- */

static clmoe_status append_piece(void *user, const piece *p) {
    const output *to = user;
    return tensors_append(to->stream, to->path, p->values, p->count);
}

clmoe_status gradients_write(const gradient_source *source, const gradient_list *list, output *to) {
    clmoe_status status = CLMOE_SUCCESS;
    problem why;
    if (output_open(to, &why) == NULL)
        return cli_fail(CLMOE_IO, "%s", why.text);
    TRY(tensors_begin(to->stream, to->path, list->entries, list->count));
    TRY(visit_all(source, list, append_piece, to));
    if (!output_close(to, &why))
        TRY(cli_fail(CLMOE_IO, "%s", why.text));
done:
    output_drop(to);
    return status;
}

/* ---- Against a file -------------------------------------------------------------------------- */

typedef struct comparison {
    const clmoe_tensors *file;
    gradient_errors *errors;
    error_sums sums; /* of the tensor at hand */
    bool has;        /* the file has it */
} comparison;

/* NaN is the worst of all. */
static void keep_worst(gradient_errors *errors, const char *name, double error) {
    if (errors->worst != NULL && (isnan(errors->error) || error <= errors->error))
        return;
    errors->worst = name;
    errors->error = error;
}

static clmoe_status compare_values(comparison *c, const piece *p) {
    clmoe_status status = CLMOE_SUCCESS;
    float *expect = malloc(p->count > 0 ? p->count * sizeof *expect : 1);
    if (expect == NULL)
        TRY(cli_fail(CLMOE_OUT_OF_MEMORY, "no memory to compare '%s'", p->entry->name));
    TRY(LIB(clmoe_tensors_read(c->file, p->entry->name, p->first, p->count, expect)));
    error_add(&c->sums, p->values, expect, p->count);
done:
    free(expect);
    return status;
}

static clmoe_status compare_piece(void *user, const piece *p) {
    clmoe_status status = CLMOE_SUCCESS;
    comparison *c = user;
    if (p->first == 0) {
        TRY(tensor_find(c->file, p->entry->name, &p->entry->shape, &c->has));
        c->errors->tensors++;
        c->errors->compared += c->has;
        c->sums = (error_sums){0};
    }
    if (!c->has)
        return CLMOE_SUCCESS;
    TRY(compare_values(c, p));
    if (p->first + p->count == shape_elements(&p->entry->shape))
        keep_worst(c->errors, p->entry->name, error_of(&c->sums));
done:
    return status;
}

clmoe_status gradients_compare(const gradient_source *source, const gradient_list *list,
                               const clmoe_tensors *file, gradient_errors *errors) {
    clmoe_status status = CLMOE_SUCCESS;
    uint32_t rank;
    uint64_t dims[CLMOE_TENSOR_RANK];
    comparison c = {.file = file, .errors = errors};
    *errors = (gradient_errors){0};
    TRY(LIB(clmoe_tensors_shape(file, source->dx_name, &rank, dims)));
    TRY(visit_all(source, list, compare_piece, &c));
    if (errors->compared <= 1)
        TRY(cli_fail(CLMOE_BAD_FILE, "%s has no gradient of the block's tensors, such as '%s'",
                     clmoe_tensors_path(file), list->entries[list->count - 1].name));
done:
    return status;
}

char *dx_name_for(const char *dy) {
    const size_t length = strlen(dy);
    const bool named =
        length >= 2 && strcmp(dy + length - 2, "dy") == 0 && (length == 2 || dy[length - 3] == '.');
    char *name = named ? malloc(length + 1) : NULL;
    if (name != NULL) {
        memcpy(name, dy, length + 1);
        name[length - 1] = 'x';
    }
    return name;
}
