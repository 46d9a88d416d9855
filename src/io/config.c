#include "config.h"

#include "runtime/json.h"

#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_SCOPES 2
#define MAX_AROUND 2

/* Where a file may keep the fields of its text model; the first path that exists is used. */
static const char *const text_paths[][2] = {
    {"text_config", NULL},
    {"thinker_config", "text_config"},
    {"language_config", NULL},
    {"llm_config", NULL},
};

#define COUNT(array) (sizeof(array) / sizeof(array)[0])

/* Where a file may say how its weights are coded. */
static const char *const quantizations[] = {"quantization_config", "compression_config",
                                            "quantization"};

struct config {
    char *path;
    json_t *root;
    const json_t *scopes[MAX_SCOPES]; /* innermost first: the text model's FFN fields, its own */
    size_t num_scopes;
    const json_t *text;               /* the text model's object, root if not nested */
    const char *text_name;            /* of that object, or NULL */
    const json_t *around[MAX_AROUND]; /* the objects that hold it, outermost first */
    size_t num_around;
};

/* ---- Looking up ---------------------------------------------------------------------------- */

/* The nth value of a field, over scopes and names; NULL when there are fewer. */
static const json_t *find_nth(const config *c, config_field field, size_t nth, const char **name) {
    const char *alias;
    for (size_t s = 0; s < c->num_scopes; s++)
        for (size_t i = 0; (alias = field_alias(field, i)) != NULL; i++) {
            const json_t *value = json_object_get(c->scopes[s], alias);
            if (value == NULL || json_is_null(value) || nth-- > 0)
                continue;
            *name = alias;
            return value;
        }
    return NULL;
}

bool config_has(const config *c, config_field field) {
    const char *alias;
    for (size_t s = 0; s < c->num_scopes; s++)
        for (size_t i = 0; (alias = field_alias(field, i)) != NULL; i++)
            if (json_object_get(c->scopes[s], alias) != NULL)
                return true;
    return false;
}

bool config_has_name(const config *c, const char *name) {
    for (size_t s = 0; s < c->num_scopes; s++) {
        const json_t *value = json_object_get(c->scopes[s], name);
        if (value != NULL && !json_is_null(value))
            return true;
    }
    return false;
}

const char *config_name(const config *c, config_field field) {
    const char *name = field_alias(field, 0), *alias;
    if (find_nth(c, field, 0, &name) != NULL)
        return name;
    for (size_t s = 0; s < c->num_scopes; s++) /* a null, then */
        for (size_t i = 0; (alias = field_alias(field, i)) != NULL; i++)
            if (json_object_get(c->scopes[s], alias) != NULL)
                return alias;
    return name;
}

/* A value as a sentence shows it, and as the tables of fields.c have it; to be freed. */
static char *text_of(const json_t *value) {
    return json_dumps(value, JSON_ENCODE_ANY | JSON_COMPACT | JSON_REAL_PRECISION(9));
}

/* "FILE: NAME is VALUE, but WHAT". */
static clmoe_status fail_value(clmoe_status status, const config *c, const char *name,
                               const json_t *value, const char *what) {
    char *text = text_of(value);
    fail(status, "%s: %s is %.60s, but %s", c->path, name, text ? text : "?", what);
    free(text);
    return status;
}

/* What a field came to, as a sentence shows it. */
static void print_taken(const config_value *taken, char *text, size_t size) {
    if (taken->kind == VALUE_NUMBER)
        snprintf(text, size, "%.*g", taken->number == floor(taken->number) ? 10 : 7, taken->number);
    else if (taken->kind == VALUE_FLAG)
        snprintf(text, size, "%s", taken->number != 0 ? "true" : "false");
    else if (taken->kind == VALUE_TEXT)
        snprintf(text, size, "\"%.40s\"", taken->text);
    else
        snprintf(text, size, "null");
}

static clmoe_status refuse(clmoe_status status, const config_reader *r, config_field field,
                           const char *what) {
    char taken[64];
    const char *name = config_name(r->config, field);
    const json_t *value = find_nth(r->config, field, 0, &name);
    json_t *null = json_null();
    if (value != NULL || config_has(r->config, field))
        return fail_value(status, r->config, name, value ? value : null, what);
    print_taken(&r->taken[field], taken, sizeof taken);
    return fail(status, "%s: %s is %s, but %s", r->config->path, name, taken, what);
}

clmoe_status config_refuse(const config_reader *r, config_field field, const char *what) {
    return refuse(CLMOE_UNSUPPORTED, r, field, what);
}

clmoe_status config_wrong(const config_reader *r, config_field field, const char *what) {
    return refuse(CLMOE_BAD_FILE, r, field, what);
}

clmoe_status config_missing(const config *c, config_field field) {
    char names[256] = "";
    const char *alias;
    for (size_t i = 0; (alias = field_alias(field, i)) != NULL; i++) {
        size_t used = strlen(names);
        snprintf(names + used, sizeof names - used, "%s%s", i ? ", " : "", alias);
    }
    return fail(CLMOE_BAD_FILE, "%s: has none of the fields %s", c->path, names);
}

/* ---- Values -------------------------------------------------------------------------------- */

/* What stands for a value: itself, or the name in {"name": "silu"}. */
static const json_t *plain(const json_t *value) {
    const json_t *name = json_object_size(value) == 1 ? json_object_get(value, "name") : NULL;
    return json_is_string(name) ? name : value;
}

/* The layer's value of a field that may be a list with one per layer; NULL if the list is not. */
static const json_t *of_layer(const config_reader *r, const json_t *value) {
    const char *name;
    const json_t *layers;
    if (!json_is_array(value))
        return value;
    for (size_t nth = 0; (layers = find_nth(r->config, FIELD_LAYERS, nth, &name)) != NULL; nth++)
        if (json_is_integer(layers) &&
            json_integer_value(layers) == (json_int_t)json_array_size(value))
            return json_array_get(value, r->layer);
    return NULL;
}

static clmoe_status fail_list(const config_reader *r, const char *name, const json_t *list) {
    return fail(CLMOE_BAD_FILE, "%s: %s has %zu entries, not one for each layer: none for layer %u",
                r->config->path, name, json_array_size(list), r->layer);
}

/* CLMOE_BAD_FILE if another name of the field has another value than `name`. */
static clmoe_status check_names(const config_reader *r, config_field field, const char *name,
                                const json_t *value) {
    const char *other;
    const json_t *found;
    char *text, what[128];
    for (size_t nth = 1; (found = find_nth(r->config, field, nth, &other)) != NULL; nth++) {
        if (json_equal(found, value) || field_name_is_weak(other))
            continue;
        text = text_of(found);
        snprintf(what, sizeof what, "%s, which means the same, is %.40s", other, text ? text : "?");
        free(text);
        return fail_value(CLMOE_BAD_FILE, r->config, name, value, what);
    }
    return CLMOE_SUCCESS;
}

/* The layer's value of the field, and its name; NULL if it is absent or null. */
static clmoe_status find_value(config_reader *r, config_field field, const char **name,
                               const json_t **value) {
    clmoe_status status = CLMOE_SUCCESS;
    r->read[field] = true;
    *value = find_nth(r->config, field, 0, name);
    if (*value == NULL)
        return CLMOE_SUCCESS;
    TRY(check_names(r, field, *name, *value));
    const json_t *found = of_layer(r, *value);
    if (found == NULL)
        TRY(fail_list(r, *name, *value));
    *value = found;
done:
    return status;
}

static void take(config_reader *r, config_field field, int kind, double number) {
    r->taken[field].kind = kind;
    r->taken[field].number = number;
}

void config_take(config_reader *r, config_field field, uint32_t number) {
    const char *name;
    if (find_nth(r->config, field, 0, &name) == NULL)
        take(r, field, VALUE_NUMBER, number);
}

clmoe_status config_uint(config_reader *r, config_field field, uint32_t min, uint32_t *value) {
    const char *name;
    const json_t *found;
    clmoe_status status = find_value(r, field, &name, &found);
    take(r, field, VALUE_NUMBER, *value);
    if (status != CLMOE_SUCCESS || (found == NULL && !config_has(r->config, field)))
        return status;
    json_t *null = json_null();
    if (found == NULL && min > 0)
        return fail_value(CLMOE_BAD_FILE, r->config, config_name(r->config, field), null,
                          "must be a positive integer");
    if (found != NULL && (!json_is_integer(found) || json_integer_value(found) < min ||
                          json_integer_value(found) > INT32_MAX))
        return fail_value(CLMOE_BAD_FILE, r->config, name, found,
                          min > 0 ? "must be a positive integer" : "must be a natural number");
    *value = found ? (uint32_t)json_integer_value(found) : 0;
    take(r, field, VALUE_NUMBER, *value);
    return CLMOE_SUCCESS;
}

/* Kernels take floats: neither infinity nor, for a positive number, 0 or what some flush to 0. */
static bool is_float(double number) {
    return number == 0 || (number >= (double)FLT_MIN && number <= (double)FLT_MAX);
}

clmoe_status config_number(config_reader *r, config_field field, double *value) {
    const char *name;
    const json_t *found;
    clmoe_status status = find_value(r, field, &name, &found);
    take(r, field, VALUE_NUMBER, *value);
    if (status != CLMOE_SUCCESS || (found == NULL && !config_has(r->config, field)))
        return status;
    if (found != NULL && (!json_is_number(found) || json_number_value(found) < 0))
        return fail_value(CLMOE_BAD_FILE, r->config, name, found, "must be a number, not negative");
    if (found != NULL && !is_float(json_number_value(found)))
        return fail_value(CLMOE_BAD_FILE, r->config, name, found,
                          "must be 0 or from 1.2e-38 to 3.4e+38, as a float");
    *value = found ? json_number_value(found) : 0;
    take(r, field, VALUE_NUMBER, *value);
    return CLMOE_SUCCESS;
}

clmoe_status config_flag(config_reader *r, config_field field, bool *value) {
    const char *name;
    const json_t *found;
    clmoe_status status = find_value(r, field, &name, &found);
    take(r, field, VALUE_FLAG, *value);
    if (status != CLMOE_SUCCESS || (found == NULL && !config_has(r->config, field)))
        return status;
    if (found != NULL && !json_is_boolean(found))
        return fail_value(CLMOE_BAD_FILE, r->config, name, found, "must be true or false");
    *value = json_is_true(found);
    take(r, field, VALUE_FLAG, *value);
    return CLMOE_SUCCESS;
}

clmoe_status config_string(config_reader *r, config_field field, const char **value) {
    const char *name;
    const json_t *found;
    clmoe_status status = find_value(r, field, &name, &found);
    r->taken[field] = (config_value){.kind = *value ? VALUE_TEXT : VALUE_NONE, .text = *value};
    if (status != CLMOE_SUCCESS || found == NULL)
        return status;
    if (!json_is_string(plain(found)))
        return fail_value(CLMOE_BAD_FILE, r->config, name, found, "must be a string");
    *value = json_string_value(plain(found));
    r->taken[field] = (config_value){.kind = VALUE_TEXT, .text = *value};
    return CLMOE_SUCCESS;
}

bool config_allows(config_reader *r, config_field field, uint64_t value) {
    const char *name;
    const json_t *found;
    size_t nth = 0;
    r->read[field] = true;
    take(r, field, VALUE_NUMBER, (double)value);
    while ((found = find_nth(r->config, field, nth, &name)) != NULL) {
        found = of_layer(r, found);
        if (json_is_integer(found) && json_integer_value(found) >= 0 &&
            (uint64_t)json_integer_value(found) == value)
            return true;
        nth++;
    }
    return nth == 0;
}

/* ---- What is there twice -------------------------------------------------------------------- */

/* Whether a name is of an object, or of a kind, that readers ask for besides fields. */
static bool is_structure(const char *name) {
    static const char *const names[] = {"model_type", "ffn_config"};
    bool found = false;
    for (size_t i = 0; i < COUNT(text_paths); i++)
        for (size_t part = 0; part < 2 && text_paths[i][part] != NULL; part++)
            found = found || strcmp(text_paths[i][part], name) == 0;
    for (size_t i = 0; i < COUNT(quantizations); i++)
        found = found || strcmp(quantizations[i], name) == 0;
    for (size_t i = 0; i < COUNT(names); i++)
        found = found || strcmp(names[i], name) == 0;
    return found;
}

/* Whether readers look at a field of that name where it stands. */
static bool is_needed(const char *name, field_place place) {
    bool certain = place == PLACE_AROUND || place == PLACE_UNKNOWN;
    return field_of(name) < FIELD_COUNT || field_is_suspicious(name, certain) || is_structure(name);
}

/* CLMOE_BAD_FILE for a field of the object that is needed and there twice: see json.h. */
static clmoe_status check_object_repeated(const config *c, const json_t *object,
                                          field_place place) {
    const char *name;
    json_t *value;
    json_object_foreach((json_t *)object, name, value) {
        char base[128];
        if (!json_is_repeated(name))
            continue;
        snprintf(base, sizeof base, "%.*s", (int)(strlen(name) - strlen(JSON_REPEATED)), name);
        if (is_needed(base, place))
            return fail_value(CLMOE_BAD_FILE, c, base, value, "the file has it twice");
    }
    return CLMOE_SUCCESS;
}

/* ---- What nothing read ---------------------------------------------------------------------- */

/* Whether a text is one of those in `list`, which are separated by blanks. */
static bool is_listed(const char *list, const char *text) {
    size_t length = strlen(text);
    for (const char *at = list; length > 0 && (at = strstr(at, text)) != NULL; at++)
        if ((at == list || at[-1] == ' ') && (at[length] == ' ' || at[length] == '\0'))
            return true;
    return false;
}

/* Whether `list` of texts, separated by blanks, has that of the layer's value; null always is. */
static bool is_neutral(const config_reader *r, const char *list, const json_t *value) {
    if (json_is_null(value) || strcmp(list, "*") == 0)
        return true;
    char *text = text_of(of_layer(r, value));
    bool neutral = text != NULL && is_listed(list, text);
    free(text);
    return neutral;
}

/* Whether two values are the same; 1 and 1.0 are. */
static bool same_value(const json_t *a, const json_t *b) {
    if (json_is_number(a) && json_is_number(b))
        return json_number_value(a) == json_number_value(b);
    return json_equal(plain(a), plain(b));
}

/* Whether the file gives the field this value where readers look. */
static bool agrees(const config_reader *r, config_field field, const json_t *value) {
    const char *name;
    const json_t *found;
    for (size_t nth = 0; (found = find_nth(r->config, field, nth, &name)) != NULL; nth++)
        if (same_value(found, value) || same_value(of_layer(r, found), value))
            return true;
    return false;
}

/* Whether a value is what readers took for the field. */
static bool is_taken(const config_value *taken, const json_t *value) {
    const json_t *named = plain(value);
    switch (taken->kind) {
    case VALUE_NUMBER: /* a family's own number is a float: 2.826f */
        return json_is_integer(value)
                   ? json_number_value(value) == taken->number
                   : json_is_real(value) && (float)json_real_value(value) == (float)taken->number;
    case VALUE_FLAG:
        return json_is_boolean(value) && json_is_true(value) == (taken->number != 0);
    case VALUE_TEXT:
        return json_is_string(named) && strcmp(json_string_value(named), taken->text) == 0;
    default:
        return false;
    }
}

/* Whether what readers took for the field does as if it were not there. */
static bool took_neutral(const config_reader *r, config_field field) {
    char text[64];
    print_taken(&r->taken[field], text, sizeof text);
    return is_listed(field_neutral(field), text);
}

/*
 * Whether a field that was read, in an object around the text model's, says what was taken. Names
 * of two uses, and sizes that the tensors tell, may be of another part.
 */
static bool agrees_around(const config_reader *r, const char *name, const json_t *value) {
    config_field field = field_of(name);
    const char *inner;
    if (field == FIELD_DIM || field == FIELD_LAYERS || field_name_is_weak(name))
        return true;
    if (find_nth(r->config, field, 0, &inner) != NULL)
        return agrees(r, field, value) || agrees(r, field, of_layer(r, value));
    return is_taken(&r->taken[field], of_layer(r, value)) ||
           (took_neutral(r, field) && is_neutral(r, field_neutral(field), value));
}

/* CLMOE_BAD_FILE: a field around the text model's object contradicts what was taken. */
static clmoe_status fail_around(const config_reader *r, const char *name, const json_t *value) {
    config_field field = field_of(name);
    char taken[64], what[256];
    const char *inner, *object = r->config->text_name;
    const json_t *found = find_nth(r->config, field, 0, &inner);
    char *text = found ? text_of(found) : NULL;
    print_taken(&r->taken[field], taken, sizeof taken);
    if (found != NULL)
        snprintf(what, sizeof what, "%s, which counts, has %s %.60s", object, inner,
                 text ? text : "?");
    else
        snprintf(what, sizeof what, "%s, which counts, has none, which means %s", object, taken);
    free(text);
    return fail_value(CLMOE_BAD_FILE, r->config, name, value, what);
}

/* Whether a field that readers ask for was read, or says there what changes nothing. */
static bool is_settled(const config_reader *r, const char *name, const json_t *value,
                       field_place place) {
    config_field field = field_of(name);
    bool neutral = is_neutral(r, field_neutral(field), value);
    if (place == PLACE_AROUND && r->read[field])
        return json_is_null(value) || agrees_around(r, name, value);
    if (place == PLACE_MODEL || place == PLACE_AROUND)
        return r->read[field] || neutral;
    if (field == FIELD_DIM || field == FIELD_LAYERS || field == FIELD_HIDDEN)
        return true; /* the tensors tell */
    if (place == PLACE_UNKNOWN && field_is_general(name))
        return true;
    return agrees(r, field, value) || json_is_null(value) || (neutral && !r->read[field]);
}

static clmoe_status check_field(const config_reader *r, const char *name, const json_t *value,
                                field_place place) {
    const char *type = config_text_type(r->config);
    bool known = field_of(name) < FIELD_COUNT;
    bool certain = place == PLACE_AROUND || place == PLACE_UNKNOWN;
    const other_field *other = field_other(name, type);
    char what[160];
    if (known && is_settled(r, name, value, place))
        return CLMOE_SUCCESS;
    if (known && place == PLACE_AROUND && r->read[field_of(name)])
        return fail_around(r, name, value);
    if (other != NULL && is_neutral(r, other->neutral, value))
        return CLMOE_SUCCESS;
    if (other != NULL && other->feature != NULL) {
        snprintf(what, sizeof what, "clmoe does not have %s", other->feature);
        return fail_value(CLMOE_UNSUPPORTED, r->config, name, value, what);
    }
    if (json_is_null(value) || (!known && other == NULL && !field_is_suspicious(name, certain)))
        return CLMOE_SUCCESS;
    if (known && r->read[field_of(name)])
        snprintf(what, sizeof what, "clmoe does not read it from an object inside the model's");
    else
        snprintf(what, sizeof what, "clmoe has no use for it in model_type '%.60s'", type);
    return fail_value(CLMOE_UNSUPPORTED, r->config, name, value, what);
}

static clmoe_status check_inside(const config_reader *r, const json_t *value, field_place place);

/* The fields of an object; in one with numbers for names, those of the layer. */
static clmoe_status check_object(const config_reader *r, const json_t *object, field_place place) {
    clmoe_status status = CLMOE_SUCCESS;
    const char *name;
    json_t *value;
    TRY(check_object_repeated(r->config, object, place));
    json_object_foreach((json_t *)object, name, value) {
        bool number = name[0] != '\0' && name[strspn(name, "0123456789")] == '\0';
        if (place == PLACE_BLOCK && number && strtoul(name, NULL, 10) != r->layer)
            continue;
        TRY(check_field(r, name, value, place));
        field_place inside = field_place_inside(name, place);
        if ((place != PLACE_AROUND || inside == PLACE_BLOCK) && value != r->config->scopes[0])
            TRY(check_inside(r, value, inside));
    }
done:
    return status;
}

/* The fields of objects in a value, an object or a list of some. */
static clmoe_status check_inside(const config_reader *r, const json_t *value, field_place place) {
    clmoe_status status = CLMOE_SUCCESS;
    const json_t *own = place == PLACE_BLOCK ? of_layer(r, value) : NULL;
    size_t i;
    json_t *item;
    if (place == PLACE_OUTSIDE)
        return CLMOE_SUCCESS;
    if (!json_is_array(value))
        return check_object(r, value, place);
    if (own != NULL)
        return check_inside(r, own, place);
    json_array_foreach(value, i, item) {
        TRY(check_inside(r, item, place));
    }
done:
    return status;
}

clmoe_status config_check_unread(const config_reader *r) {
    clmoe_status status = CLMOE_SUCCESS;
    const config *c = r->config;
    for (size_t s = 0; s < c->num_scopes; s++)
        TRY(check_object(r, c->scopes[s], PLACE_MODEL));
    for (size_t i = 0; i < c->num_around; i++)
        TRY(check_object(r, c->around[i], PLACE_AROUND));
done:
    return status;
}

/* ---- Opening ------------------------------------------------------------------------------- */

/* Lists the objects to look in: the text model's nested FFN fields, the text model. */
static void list_scopes(config *c) {
    c->text = c->root;
    for (size_t i = 0; i < COUNT(text_paths) && c->text == c->root; i++) {
        const json_t *outer = json_object_get(c->root, text_paths[i][0]);
        const json_t *inner = text_paths[i][1] ? json_object_get(outer, text_paths[i][1]) : outer;
        if (!json_is_object(inner))
            continue;
        c->text = inner;
        c->text_name = text_paths[i][inner != outer];
        c->around[c->num_around++] = c->root;
        if (inner != outer)
            c->around[c->num_around++] = outer;
    }
    const json_t *ffn = json_object_get(c->text, "ffn_config");
    if (json_is_object(ffn))
        c->scopes[c->num_scopes++] = ffn;
    c->scopes[c->num_scopes++] = c->text;
}

/* CLMOE_UNSUPPORTED for a file with two objects of a text model that differ. */
static clmoe_status check_one_text(const config *c) {
    for (size_t i = 0; i < COUNT(text_paths); i++) {
        const json_t *other = json_object_get(c->root, text_paths[i][0]);
        if (text_paths[i][1] != NULL)
            other = json_object_get(other, text_paths[i][1]);
        if (json_is_object(other) && !json_equal(other, c->text))
            return fail(CLMOE_UNSUPPORTED, "%s: has both %s and %s; which of them is the model?",
                        c->path, c->text_name, text_paths[i][0]);
    }
    return CLMOE_SUCCESS;
}

/* The nth object that says how the weights are coded; NULL when there are fewer. */
static const json_t *find_quantization(const config *c, size_t nth, const char **name) {
    const json_t *places[MAX_AROUND + 1] = {c->text, c->around[0], c->around[1]};
    for (size_t p = 0; p < 1 + c->num_around; p++)
        for (size_t i = 0; i < COUNT(quantizations); i++) {
            const json_t *found = json_object_get(places[p], quantizations[i]);
            if (found == NULL || json_is_null(found) || nth-- > 0)
                continue;
            *name = quantizations[i];
            return found;
        }
    return NULL;
}

const json_t *config_quantization(const config *c, const char **name) {
    return find_quantization(c, 0, name);
}

/* CLMOE_UNSUPPORTED for two that differ. */
static clmoe_status check_quantization(const config *c) {
    const char *name = NULL, *other = NULL;
    const json_t *first = find_quantization(c, 0, &name), *next;
    for (size_t i = 1; (next = find_quantization(c, i, &other)) != NULL; i++)
        if (!json_equal(first, next))
            return fail(CLMOE_UNSUPPORTED,
                        "%s: has %s twice, or %s beside it, and they differ; which is the model's?",
                        c->path, name, other);
    return CLMOE_SUCCESS;
}

/* CLMOE_BAD_FILE if what tells where the model's fields are, and which they are, is there twice. */
static clmoe_status check_repeated(const config *c) {
    clmoe_status status = CLMOE_SUCCESS;
    for (size_t s = 0; s < c->num_scopes; s++)
        TRY(check_object_repeated(c, c->scopes[s], PLACE_MODEL));
    TRY(check_object_repeated(c, c->root, c->text == c->root ? PLACE_MODEL : PLACE_AROUND));
    for (size_t i = 0; i < COUNT(text_paths); i++)
        if (text_paths[i][1] != NULL)
            TRY(check_object_repeated(c, json_object_get(c->root, text_paths[i][0]), PLACE_AROUND));
done:
    return status;
}

/* CLMOE_BAD_FILE for a model_type that is no string: null is as none. */
static clmoe_status check_types(const config *c) {
    const json_t *places[] = {c->root, c->text};
    for (size_t p = 0; p < 2; p++) {
        const json_t *type = json_object_get(places[p], "model_type");
        if (type != NULL && !json_is_null(type) && !json_is_string(type))
            return fail_value(CLMOE_BAD_FILE, c, "model_type", type, "must be a string");
    }
    return CLMOE_SUCCESS;
}

clmoe_status config_open(const char *path, config **out) {
    clmoe_status status = CLMOE_SUCCESS;
    *out = NULL;
    config *c = calloc(1, sizeof *c);
    if (c == NULL || (c->path = malloc(strlen(path) + 1)) == NULL)
        TRY(fail(CLMOE_OUT_OF_MEMORY, "%s: no memory to open it", path));
    strcpy(c->path, path);
    TRY(json_read(path, &c->root));
    list_scopes(c);
    TRY(check_repeated(c));
    TRY(check_types(c));
    TRY(check_one_text(c));
    TRY(check_quantization(c));
    *out = c;
    c = NULL;
done:
    config_close(c);
    return status;
}

void config_close(config *c) {
    if (c == NULL)
        return;
    json_decref(c->root);
    free(c->path);
    free(c);
}

const char *config_path(const config *c) {
    return c->path;
}

const char *config_model_type(const config *c) {
    const char *type = json_string_value(json_object_get(c->root, "model_type"));
    return type ? type : "";
}

const char *config_text_type(const config *c) {
    const char *type = json_string_value(json_object_get(c->text, "model_type"));
    return type ? type : config_model_type(c);
}
