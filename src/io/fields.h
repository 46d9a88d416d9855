/*
 * What is known of config.json's field names, as tables: the names of each meaning, fields that do
 * not change what the block computes, and the words that make an unknown field suspicious.
 */
#ifndef CLMOE_FIELDS_H
#define CLMOE_FIELDS_H

#include <stdbool.h>
#include <stddef.h>

/* What a field means; fields.c's table has its names. */
typedef enum config_field {
    FIELD_DIM,
    FIELD_LAYERS,
    FIELD_EXPERTS,
    FIELD_IDENTITY_EXPERTS,
    FIELD_TOP_K,
    FIELD_HIDDEN,        /* H of an expert */
    FIELD_SHARED_HIDDEN, /* H of the shared expert */
    FIELD_SHARED_COUNT,  /* or how many experts' H it has */
    FIELD_SHARED_COMBINE,
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
    FIELD_MLP_BIAS,
    FIELD_ACTIVATION,
    FIELD_LIMIT,
    FIELD_ALPHA,
    FIELD_COUNT
} config_field;

/* The names of a field, the more usual first; NULL behind the last. */
const char *field_alias(config_field field, size_t index);

/* The meaning of a name; FIELD_COUNT for none. */
config_field field_of(const char *name);

/*
 * A name of two uses, as "top_k", which is a sampling parameter of old files too: it counts only
 * where the field has no other name, and contradicts none.
 */
bool field_name_is_weak(const char *name);

/* The JSON texts, separated by blanks, with which the field does as if it were not there. */
const char *field_neutral(config_field field);

/* A field that no reader asks for. */
typedef struct other_field {
    const char *name;
    const char *model_type; /* NULL: of any model */
    const char *neutral;    /* the values that change nothing, as field_neutral(); "*": all */
    const char *feature;    /* what the other values turn on, and clmoe lacks; NULL: not known */
} other_field;

/* The row of a name in a model of that type; NULL if there is none. */
const other_field *field_other(const char *name, const char *model_type);

/*
 * Whether a name that no table has may be of the MoE block. `certain`: it has a word like "expert",
 * "moe" or "router". Else it may also have one like "norm", "scale" or "act", unless another says
 * that it is of attention, embeddings, vision and so on.
 */
bool field_is_suspicious(const char *name, bool certain);

/* Whether a known name is used for other parts too, as "hidden_act" and "top_k" are. */
bool field_is_general(const char *name);

/* Where in the file a field stands. */
typedef enum field_place {
    PLACE_MODEL,   /* in the text model's own object, where readers look */
    PLACE_AROUND,  /* in the object that holds the text model's */
    PLACE_BLOCK,   /* deeper, in an object of layers or of the block: "per_layer_config" */
    PLACE_UNKNOWN, /* deeper, in an object of any other name */
    PLACE_OUTSIDE, /* in an object of another part: "vision_config" */
} field_place;

/* What an object of that name holds; it stands itself in `around`. */
field_place field_place_inside(const char *name, field_place around);

#endif
