/* Statistics as text for people. */
#include "balance/state.clh"
#include "runtime/status.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

/* A four-byte field of clmoe_stats. */
typedef struct stats_field {
    const char *name;
    size_t offset;
    bool is_float;
} stats_field;

/* An array [R] of four-byte values behind it. */
typedef struct stats_array {
    const char *name;
    bool is_float;
} stats_array;

#define COUNT(field) {#field, offsetof(clmoe_stats, field), false},
#define FLOAT(field) {#field, offsetof(clmoe_stats, field), true},

static const stats_field stats_fields[] = {STATS_FIELDS(COUNT, FLOAT)};

#define ARRAY(NAME, name, type) {#name, _Generic((type)0, float : true, default : false)},
static const stats_array stats_arrays[] = {STATS_ARRAYS(ARRAY)};

enum { FIELD_COUNT = sizeof stats_fields / sizeof stats_fields[0] };

const char *clmoe_stats_field(uint32_t index, size_t *offset, uint32_t *is_float) {
    if (index >= FIELD_COUNT)
        return NULL;
    if (offset)
        *offset = stats_fields[index].offset;
    if (is_float)
        *is_float = stats_fields[index].is_float;
    return stats_fields[index].name;
}

const char *clmoe_stats_array(uint32_t index, uint32_t *is_float) {
    if (index >= STATS_ARRAY_COUNT)
        return NULL;
    if (is_float)
        *is_float = stats_arrays[index].is_float;
    return stats_arrays[index].name;
}

/* What snprintf() would have written, piece by piece. */
typedef struct text_out {
    char *text;
    size_t size, length;
} text_out;

static void append(text_out *out, const char *format, ...) CLMOE_PRINTF(2);

static void append(text_out *out, const char *format, ...) {
    const size_t at = out->length < out->size ? out->length : out->size;
    va_list values;
    va_start(values, format);
    int more = vsnprintf(at < out->size ? out->text + at : NULL, out->size - at, format, values);
    va_end(values);
    out->length += more > 0 ? (size_t)more : 0;
}

/* Word `i` of the four-byte words at `base`, which may lie at any address. */
static uint32_t word_at(const unsigned char *base, size_t i) {
    uint32_t word;
    memcpy(&word, base + i * sizeof word, sizeof word);
    return word;
}

static double float_at(const unsigned char *base, size_t i) {
    float value;
    memcpy(&value, base + i * sizeof value, sizeof value);
    return (double)value;
}

static void format_fields(text_out *out, const unsigned char *base) {
    for (size_t i = 0; i < FIELD_COUNT; i++) {
        const stats_field *field = &stats_fields[i];
        size_t word = field->offset / sizeof(uint32_t);
        if (field->offset == offsetof(clmoe_stats, invalid_ids) && word_at(base, word) == 0)
            continue;
        if (field->is_float)
            append(out, "%-21s %.6g\n", field->name, float_at(base, word));
        else
            append(out, "%-21s %" PRIu32 "\n", field->name, word_at(base, word));
    }
}

static void format_experts(text_out *out, const unsigned char *base, size_t columns) {
    append(out, "\n%6s", "expert");
    for (size_t a = 0; a < STATS_ARRAY_COUNT; a++)
        append(out, " %11s", stats_arrays[a].name);
    append(out, "\n");
    for (size_t e = 0; e < columns; e++) {
        append(out, "%6zu", e);
        for (size_t a = 0; a < STATS_ARRAY_COUNT; a++) {
            if (stats_arrays[a].is_float)
                append(out, " %11.6g", float_at(base, a * columns + e));
            else
                append(out, " %11" PRIu32, word_at(base, a * columns + e));
        }
        append(out, "\n");
    }
}

static void format_groups(text_out *out, const unsigned char *base, size_t groups) {
    if (groups > 0)
        append(out, "\n%6s %13s\n", "group", "device_tokens");
    for (size_t d = 0; d < groups; d++)
        append(out, "%6zu %13" PRIu32 "\n", d, word_at(base, d));
}

clmoe_status clmoe_stats_format(const void *stats, size_t bytes, char *text, size_t size,
                                size_t *length) {
    clmoe_stats header;
    text_out out = {text, size, 0};
    if (!stats || (!text && size > 0))
        return fail(CLMOE_INVALID_ARGUMENT, "%s is NULL", stats ? "text" : "stats");
    if (bytes < sizeof header)
        return fail(CLMOE_INVALID_ARGUMENT, "bytes is %zu, but the header alone has %zu", bytes,
                    sizeof header);
    memcpy(&header, stats, sizeof header);
    size_t columns = header.columns, groups = header.device_groups;
    size_t needed = sizeof header + (STATS_ARRAY_COUNT * columns + groups) * sizeof(uint32_t);
    if (bytes != needed)
        return fail(CLMOE_INVALID_ARGUMENT,
                    "bytes is %zu, but %zu columns and %zu device groups have %zu", bytes, columns,
                    groups, needed);
    const unsigned char *base = stats, *behind = base + sizeof header;
    format_fields(&out, base);
    format_experts(&out, behind, columns);
    format_groups(&out, behind + STATS_ARRAY_COUNT * columns * sizeof(uint32_t), groups);
    if (length)
        *length = out.length;
    return CLMOE_SUCCESS;
}
