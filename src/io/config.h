/* config.json: values of an MoE layer's fields, and what nothing read of them. */
#ifndef CLMOE_CONFIG_H
#define CLMOE_CONFIG_H

#include "fields.h"
#include "runtime/status.h"

#include <stdbool.h>

typedef struct config config;

struct json_t;

/*
 * Reads and parses `path`. Errors: CLMOE_IO, CLMOE_BAD_FILE; CLMOE_UNSUPPORTED for two text
 * models, or two sentences of how the weights are coded, that differ.
 */
clmoe_status config_open(const char *path, config **out);
void config_close(config *c);

const char *config_path(const config *c);
const char *config_model_type(const config *c); /* the model's; "" if it has none */
const char *config_text_type(const config *c);  /* of the nested text model, else the model's */

/* Whether the field is there, null included; whether a field of exactly this name is, not null. */
bool config_has(const config *c, config_field field);
bool config_has_name(const config *c, const char *name);

/* The name the field has in this file, or its most usual one. */
const char *config_name(const config *c, config_field field);

/* The object that says how the weights are coded, and its name; NULL if there is none. */
const struct json_t *config_quantization(const config *c, const char **name);

/* CLMOE_BAD_FILE: the file lacks the field; the sentence lists its names. */
clmoe_status config_missing(const config *c, config_field field);

/* ---- Reading the fields of one layer -------------------------------------------------------- */

/* What a field came to: the file's value, or the reader's own where the file has none. */
typedef struct config_value {
    enum { VALUE_NONE, VALUE_NUMBER, VALUE_FLAG, VALUE_TEXT } kind;
    double number; /* a flag is 0 or 1 */
    const char *text;
} config_value;

/* Start from {config, layer}. */
typedef struct config_reader {
    const config *config;
    uint32_t layer;
    bool read[FIELD_COUNT];
    config_value taken[FIELD_COUNT]; /* of the fields that were read */
} config_reader;

/*
 * The values below leave *value as it is when the field is absent; a null is 0, or false, or leaves
 * a string as it is. A field may be a list with one value per layer. Errors: CLMOE_BAD_FILE for a
 * value of another kind, for a number that a float cannot hold, or for two names of the field that
 * contradict each other.
 */
clmoe_status config_uint(config_reader *r, config_field field, uint32_t min, uint32_t *value);
clmoe_status config_number(config_reader *r, config_field field, double *value);
clmoe_status config_flag(config_reader *r, config_field field, bool *value);
clmoe_status config_string(config_reader *r, config_field field, const char **value);

/* Whether one of the field's values, under any of its names, is `value`; true if it has none. */
bool config_allows(config_reader *r, config_field field, uint64_t value);

/* A field that the file leaves out came to `number`, as other parts of the file show. */
void config_take(config_reader *r, config_field field, uint32_t number);

/*
 * "FILE: NAME is VALUE, but WHAT", VALUE being null, or what was taken instead, where the file has
 * none: CLMOE_UNSUPPORTED, CLMOE_BAD_FILE.
 */
clmoe_status config_refuse(const config_reader *r, config_field field, const char *what);
clmoe_status config_wrong(const config_reader *r, config_field field, const char *what);

/*
 * Once all is read: an error for a field that may change what the block computes and that nothing
 * read, unless its value is neutral. CLMOE_UNSUPPORTED, naming the field and its value. In an
 * object around the text model's, a field that was read must say the same: else CLMOE_BAD_FILE,
 * naming both values.
 */
clmoe_status config_check_unread(const config_reader *r);

#endif
