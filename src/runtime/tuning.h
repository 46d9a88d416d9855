/* Tile sizes of the engines by device: measured by clmoe-bench --tune, kept as JSON. */
#ifndef CLMOE_TUNING_H
#define CLMOE_TUNING_H

#include "status.h"

struct device_info; /* context.h */

/* The engines that have sizes to choose. */
typedef enum tuned_engine { TUNED_CPU, TUNED_TILED, TUNED_ENGINES } tuned_engine;

/*
 * What the sizes count is the engine's to say. 0: nothing was measured for this device, or the
 * engine has no such size; it then takes its own.
 */
typedef struct tile_sizes {
    uint32_t rows, columns, depth;
} tile_sizes;

typedef struct tuning {
    tile_sizes sizes[TUNED_ENGINES];
} tuning;

/*
 * The sizes for a device: from the table in the library (src/runtime/tuned.json), and before that
 * from the file `path`, or NULL. In each, an entry with the device's name goes before one with its
 * type alone, and a later entry before an earlier one. Errors: CLMOE_IO, CLMOE_BAD_FILE, naming the
 * file, the entry and the field.
 */
clmoe_status tuning_read(const struct device_info *device, const char *path, tuning *out);

#endif
