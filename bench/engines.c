#include "engines.h"
#include "peer.h"

#include <stdio.h>
#include <string.h>

/* Engines that take weights in more than one form: a row says which. */
static const bench_engine forms[] = {
    {"cpu-packed", "cpu", true},
    {"cpu-raw", "cpu", false},
    {"nv_wgmma-packed", "nv_wgmma", true},
    {"nv_wgmma-raw", "nv_wgmma", false},
};

/* The plain kernels that the tests compare with: only by name. */
static const char plain_engine[] = "ref";

bool engine_has_matrix_units(const bench_engine *engine) {
    return strncmp(engine->library, "nv_", 3) == 0;
}

static void add(engine_list *list, const char *name, const char *library, bool packed) {
    bench_engine *engine = &list->engines[list->count];
    if (list->count == MAX_ENGINES)
        return;
    snprintf(engine->name, sizeof engine->name, "%.31s", name);
    snprintf(engine->library, sizeof engine->library, "%.31s", library);
    engine->packed = packed;
    list->count++;
}

static void add_forms(engine_list *list, const char *library) {
    bool found = false;
    for (size_t i = 0; i < COUNT_OF(forms); i++)
        if (strcmp(forms[i].library, library) == 0) {
            add(list, forms[i].name, library, forms[i].packed);
            found = true;
        }
    if (!found)
        add(list, library, library, false);
}

/* Everything that runs on the device. */
static void list_engines(const bench_device *device, engine_list *list) {
    const char *name;
    uint32_t supported = 0;
    list->count = 0;
    for (uint32_t i = 0; (name = clmoe_engine_name(device->clmoe, i, &supported)) != NULL; i++)
        if (supported)
            add_forms(list, name);
    if (device->cpu && peer_openblas_built())
        add(list, PEER_OPENBLAS, "", false);
    if (peer_clblast_built())
        add(list, PEER_CLBLAST, "", false);
}

static bool chosen(const bench_options *options, const bench_engine *engine) {
    if (options->peer && strcmp(options->peer, engine->name) == 0)
        return true;
    return list_has(options->engines, engine->name) ||
           (list_is_all(options->engines) && strcmp(engine->library, plain_engine) != 0);
}

/* Every name must be in the list, or be "all". */
static clmoe_status check_names(const char *names, const engine_list *list) {
    char name[64];
    bool found = true, more = true;
    while (more && found) {
        const size_t length = strcspn(names, ",");
        snprintf(name, sizeof name, "%.*s", (int)length, names);
        found = strcmp(name, "all") == 0;
        for (size_t i = 0; i < list->count; i++)
            found = found || strcmp(list->engines[i].name, name) == 0;
        more = names[length] == ',';
        names += length + more;
    }
    return found
               ? CLMOE_SUCCESS
               : cli_fail(CLMOE_UNSUPPORTED, "engine '%s' is unknown, or does not run here", name);
}

clmoe_status engines_choose(const bench_options *options, const bench_device *device,
                            engine_list *list) {
    clmoe_status status = CLMOE_SUCCESS;
    engine_list all;
    list_engines(device, &all);
    TRY(check_names(options->engines, &all));
    if (options->peer)
        TRY(check_names(options->peer, &all));
    list->count = 0;
    for (size_t i = 0; i < all.count; i++)
        if (chosen(options, &all.engines[i]))
            list->engines[list->count++] = all.engines[i];
done:
    return status;
}
