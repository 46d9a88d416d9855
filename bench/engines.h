/* The engines of a run, by the names that rows carry. */
#ifndef BENCH_ENGINES_H
#define BENCH_ENGINES_H

#include "options.h"
#include "subject.h"

enum { MAX_ENGINES = 16 };

typedef struct engine_list {
    bench_engine engines[MAX_ENGINES];
    size_t count;
} engine_list;

/* What the options choose on the device. Errors: a name that is unknown, or does not run here. */
clmoe_status engines_choose(const bench_options *options, const bench_device *device,
                            engine_list *list);

static inline bool engine_is_peer(const bench_engine *engine) {
    return engine->library[0] == '\0';
}

/* Whether its GEMMs run on units that pass the roofline's f32 multiply-add rate. */
bool engine_has_matrix_units(const bench_engine *engine);

#endif
