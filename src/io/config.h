/* config.json: the fields of an MoE layer under all the names that model families give them. */
#ifndef CLMOE_CONFIG_H
#define CLMOE_CONFIG_H

#include "../status.h"

#include <stdbool.h>

/* What a field means; config.c's table has its names. */
typedef enum config_field {
    FIELD_DIM,
    FIELD_LAYERS,
    FIELD_EXPERTS,
    FIELD_IDENTITY_EXPERTS,
    FIELD_TOP_K,
    FIELD_HIDDEN,        /* H of an expert */
    FIELD_SHARED_HIDDEN, /* H of the shared expert */
    FIELD_SHARED_COUNT,  /* or how many experts' H it has */
    FIELD_SCORE,
    FIELD_NUM_GROUPS,
    FIELD_TOPK_GROUPS,
    FIELD_TOPK_METHOD,
    FIELD_RENORM,
    FIELD_RENORM_P,
    FIELD_RENORM_MIN,
    FIELD_SCALE,
    FIELD_SOFTCAP,
    FIELD_SPARSEMIXER_EPS,
    FIELD_SELECT_BIAS,
    FIELD_ACTIVATION,
    FIELD_LIMIT,
    FIELD_COUNT
} config_field;

typedef struct config config;

/* Reads and parses `path`. Errors: CLMOE_IO, CLMOE_BAD_FILE. */
clmoe_status config_open(const char *path, config **out);
void config_close(config *c);

const char *config_path(const config *c);
const char *config_model_type(const config *c); /* the model's; "" if it has none */
const char *config_text_type(const config *c);  /* of the nested text model, else the model's */

/*
 * The values below leave *value as it is when the field is absent or null. A field may be a list
 * with one value per layer.
 */
clmoe_status config_uint(const config *c, config_field field, uint32_t layer, uint32_t min,
                         uint32_t *value);
clmoe_status config_number(const config *c, config_field field, double *value);
clmoe_status config_flag(const config *c, config_field field, bool *value);
clmoe_status config_string(const config *c, config_field field, const char **value);

/* Whether the field is there, null included; whether a field of exactly this name is, not null. */
bool config_has(const config *c, config_field field);
bool config_has_name(const config *c, const char *name);

/* The name the field has in this file, or its most usual one. */
const char *config_name(const config *c, config_field field);

/* CLMOE_BAD_FILE: the file lacks the field; the sentence lists its names. */
clmoe_status config_missing(const config *c, config_field field);

/* Whether one of the field's values, under any of its names, is `value`; true if it has none. */
bool config_allows(const config *c, config_field field, uint32_t layer, uint64_t value);

/* CLMOE_UNSUPPORTED if the file asks for something that clmoe lacks, naming the field. */
clmoe_status config_check_features(const config *c);

#endif
