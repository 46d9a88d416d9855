#include "coded.h"

#include <jansson.h>
#include <stdio.h>
#include <string.h>

/* ---- What config.json says ------------------------------------------------------------------ */

typedef struct quantization {
    const char *field;  /* its name; NULL: the file says nothing */
    const char *method; /* quant_method, or "not given" */
    bool exceptions;    /* some modules have plain numbers */
    uint32_t block[2];  /* rows and columns that share a scale */
    bool block_given;
} quantization;

static bool lists_some(const json_t *object, const char *name) {
    return json_array_size(json_object_get(object, name)) > 0;
}

/* Two numbers of a list, as block sizes; null is none. */
static clmoe_status read_block(const clmoe_checkpoint *c, const json_t *list, const char *name,
                               quantization *q) {
    if (list == NULL || json_is_null(list))
        return CLMOE_SUCCESS;
    json_int_t sizes[2];
    for (size_t i = 0; i < 2; i++)
        sizes[i] = json_integer_value(json_array_get(list, i)); /* 0 for anything else */
    if (json_array_size(list) != 2 || sizes[0] < 1 || sizes[1] < 1 || sizes[0] > INT32_MAX ||
        sizes[1] > INT32_MAX)
        return fail(CLMOE_BAD_FILE, "%s: %s.%s must be two positive numbers",
                    config_path(c->config), q->field, name);
    const uint32_t given[2] = {(uint32_t)sizes[0], (uint32_t)sizes[1]};
    if (q->block_given && memcmp(given, q->block, sizeof given) != 0)
        return fail(CLMOE_UNSUPPORTED, "%s: %s.%s is another than one before it",
                    config_path(c->config), q->field, name);
    memcpy(q->block, given, sizeof given);
    q->block_given = true;
    return CLMOE_SUCCESS;
}

static clmoe_status read_quantization(const clmoe_checkpoint *c, quantization *q) {
    clmoe_status status = CLMOE_SUCCESS;
    const char *name;
    json_t *group;
    *q = (quantization){.block = {CODE_BLOCK, CODE_BLOCK}};
    const json_t *object = config_quantization(c->config, &q->field);
    if (object == NULL)
        return CLMOE_SUCCESS;
    q->method = json_string_value(json_object_get(object, "quant_method"));
    if (q->method == NULL)
        q->method = "not given";
    q->exceptions = lists_some(object, "modules_to_not_convert") || lists_some(object, "ignore") ||
                    lists_some(object, "ignored_layers");
    TRY(read_block(c, json_object_get(object, "weight_block_size"), "weight_block_size", q));
    json_object_foreach(json_object_get(object, "config_groups"), name, group) {
        const json_t *weights = json_object_get(group, "weights");
        TRY(read_block(c, json_object_get(weights, "block_structure"), "block_structure", q));
    }
done:
    return status;
}

static bool method_known(const char *method) {
    const code_format *f;
    for (size_t i = 0; (f = code_format_at(i)) != NULL; i++)
        if (code_list_has(f->methods, method))
            return true;
    return false;
}

clmoe_status coded_check_none(const block *b) {
    quantization q;
    clmoe_status status = read_quantization(b->checkpoint, &q);
    if (status != CLMOE_SUCCESS || q.field == NULL || (method_known(q.method) && q.exceptions))
        return status;
    return fail(CLMOE_UNSUPPORTED,
                "%s: %s has quant_method '%.60s', but layer %u has no matrices of codes that "
                "clmoe can read: FP8 or MXFP4",
                config_path(b->checkpoint->config), q.field, q.method, b->layer);
}

/* ---- Names ---------------------------------------------------------------------------------- */

/* `name` with `with` for its end; false if it has another end, or is too long. */
static bool replace_end(const char *name, const char *end, const char *with,
                        char out[2 * MAX_PREFIX]) {
    const size_t length = strlen(name), cut = strlen(end), more = strlen(with);
    if (length < cut || strcmp(name + length - cut, end) != 0 ||
        length - cut + more >= 2 * MAX_PREFIX)
        return false;
    memcpy(out, name, length - cut);
    memcpy(out + length - cut, with, more + 1);
    return true;
}

/* The tensor beside `t` whose name has another end, or NULL. */
static const file_tensor *find_beside(const clmoe_checkpoint *c, const st_tensor *t,
                                      const char *end, const char *with) {
    char name[2 * MAX_PREFIX];
    return replace_end(t->name, end, with, name) ? checkpoint_find(c, name) : NULL;
}

/* The next row, from *at, that may be of a tensor of codes; NULL if there is none. */
static const code_format *next_format(const st_tensor *t, size_t *at) {
    const code_format *f;
    char name[2 * MAX_PREFIX];
    while ((f = code_format_at((*at)++)) != NULL)
        if (code_list_has(f->types, t->type_name) && replace_end(t->name, f->end, "", name))
            return f;
    return NULL;
}

/* CLMOE_BAD_FILE for codes without scales; names those that they may have. */
static clmoe_status fail_no_scales(const file_tensor *t) {
    const code_format *f, *first = NULL;
    char ends[128] = "";
    for (size_t i = 0; (f = next_format(t->tensor, &i)) != NULL;) {
        const size_t used = strlen(ends);
        snprintf(ends + used, sizeof ends - used, "%s...%s", first ? " or " : "", f->scales);
        first = first ? first : f;
    }
    return fail(CLMOE_BAD_FILE,
                "%s: tensor '%s' has dtype %s, as %s weights, whose scales (%s) are missing",
                safetensors_path(t->file), t->tensor->name, t->tensor->type_name, first->name,
                ends);
}

/* Whether `t` is of a matrix of codes that has another end: its scales, or for activations. */
static bool is_beside(const clmoe_checkpoint *c, const st_tensor *t) {
    static const char *const unused[] = {".input_scale", ".activation_scale"};
    const code_format *f;
    for (size_t i = 0; (f = code_format_at(i)) != NULL; i++) {
        const file_tensor *codes = find_beside(c, t, f->scales, f->end);
        if (codes != NULL && code_list_has(f->types, codes->tensor->type_name))
            return true;
        for (size_t u = 0; u < sizeof unused / sizeof unused[0]; u++) {
            codes = find_beside(c, t, unused[u], f->end);
            if (codes != NULL && code_list_has(f->types, codes->tensor->type_name))
                return true;
        }
    }
    return false;
}

clmoe_status coded_find(const clmoe_checkpoint *c, const file_tensor *t, coded_kind *kind,
                        coded *out, char plain[2 * MAX_PREFIX]) {
    const code_format *f;
    bool certain = false;
    *kind = CODED_NOT;
    memset(out, 0, sizeof *out);
    for (size_t i = 0; (f = next_format(t->tensor, &i)) != NULL;) {
        const file_tensor *scales = find_beside(c, t->tensor, f->end, f->scales);
        certain = certain || f->certain;
        if (scales == NULL)
            continue;
        if (out->format != NULL)
            return fail(CLMOE_BAD_FILE, "%s: tensor '%s' has scales twice: '%s' and '%s'",
                        safetensors_path(t->file), t->tensor->name, out->scales->name,
                        scales->tensor->name);
        *out = (coded){.format = f,
                       .codes_file = t->file,
                       .codes = t->tensor,
                       .scales_file = scales->file,
                       .scales = scales->tensor};
        replace_end(t->tensor->name, f->end, f->plain, plain);
        *kind = CODED_MATRIX;
    }
    if (*kind == CODED_NOT && certain)
        return fail_no_scales(t);
    if (*kind == CODED_NOT && is_beside(c, t->tensor))
        *kind = CODED_BESIDE;
    return CLMOE_SUCCESS;
}

clmoe_status coded_accept(const clmoe_checkpoint *c, coded *matrix) {
    clmoe_status status = CLMOE_SUCCESS;
    quantization q;
    const char *path = safetensors_path(matrix->codes_file), *name = matrix->codes->name;
    TRY(read_quantization(c, &q));
    if (q.field != NULL && !code_list_has(matrix->format->methods, q.method))
        return fail(CLMOE_UNSUPPORTED, "%s: %s has quant_method '%.60s', but tensor '%s' is %s",
                    config_path(c->config), q.field, q.method, name, matrix->format->name);
    TRY(coded_check(matrix, q.block));
    if (c->decode == CLMOE_DECODE_NO)
        return fail(CLMOE_UNSUPPORTED,
                    "%s: tensor '%s' is %s, which clmoe does not compute with; allow to decode "
                    "such by options.decode (clmoe run --decode f32, f16 or bf16)",
                    path, name, matrix->format->name);
done:
    return status;
}
