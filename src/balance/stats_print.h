/* The names of statistics, where they are printed and where the tool writes them as JSON. */
#ifndef CLMOE_STATS_PRINT_H
#define CLMOE_STATS_PRINT_H

#include <stdbool.h>
#include <stddef.h>

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

/* In order; the last row has no name. */
extern const stats_field stats_fields[];
extern const stats_array stats_arrays[];

#endif
