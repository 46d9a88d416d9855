/* Tile sizes from a file: they take effect, change no result, and bad files are refused. */
#include "support_files.h"

#include <stdio.h>
#include <string.h>

static char device_name[256];

static clmoe_status open_with(const char *path, clmoe_context **context) {
    clmoe_context_options options;
    clmoe_context_options_init(&options);
    options.tuning_file = path;
    return clmoe_context_create(test.context, test.device, &options, context);
}

static void destroy_context(void *context) {
    clmoe_context_destroy(context);
}

/* A context with the text as its tuning file, which is gone when this returns. */
static clmoe_context *context_of(const char *text) {
    clmoe_context *context = NULL;
    const char *path = temp_path("tuning.json");
    write_text(path, text);
    OK(open_with(path, &context));
    assert_int_equal(remove(path), 0);
    clean_later(destroy_context, context);
    return context;
}

static bool runs_here(const char *engine) {
    for (const char *const *name = test_engines(); *name; name++)
        if (strcmp(*name, engine) == 0)
            return true;
    return false;
}

static void destroy_layer(void *layer) {
    clmoe_layer_destroy(layer);
}

static clmoe_layer *layer_of(clmoe_context *context, const char *engine, batch *b) {
    static const shape sizes = {
        .tokens = 150, .dim = 77, .hidden_dim = 139, .experts = 3, .top_k = 2};
    clmoe_layer *layer = NULL;
    clmoe_layer_desc desc = desc_of(&sizes);
    desc.engine = engine;
    batch_make(b, &desc, sizes.tokens);
    OK(clmoe_layer_create(context, &desc, &layer));
    clean_later(destroy_layer, layer);
    return layer;
}

static uint32_t row_tile_of(clmoe_layer *layer) {
    clmoe_plan_layout layout;
    OK(clmoe_plan_layout_get(layer, 100000, &layout));
    return layout.row_tile;
}

/* The whole layer against the oracle, with raw weights and, where there are, packed ones. */
static void run_layer(clmoe_layer *layer, const batch *b) {
    device_batch d;
    size_t bytes = 0;
    const ref_result *want = batch_reference(b);
    batch_run(layer, b, &d);
    batch_compare(b, &d, want);
    if (clmoe_packed_size(layer, CLMOE_MLP_EXPERTS, &bytes) != CLMOE_SUCCESS)
        return;
    batch_upload(layer, b, &d);
    weights_pack(layer, CLMOE_MLP_EXPERTS, &d.weights.experts);
    OK(clmoe_forward(layer, test.queue, &d.args, 0, NULL, NULL));
    CL_OK(clFinish(test.queue));
    batch_compare(b, &d, want);
}

static void every_size(void **state) {
    static const struct {
        const char *engine, *sizes;
        uint32_t row_tile;
    } cases[] = {
        {"cpu", "\"rows\": 40, \"depth\": 128", 40},
        {"cpu", "\"rows\": 320, \"depth\": 512", 320},
        {"tiled", "\"rows\": 32, \"columns\": 32, \"depth\": 8", 32},
        {"tiled", "\"rows\": 64, \"columns\": 32, \"depth\": 32", 64},
        {"tiled", "\"rows\": 128, \"columns\": 64, \"depth\": 16", 128},
    };
    (void)state;
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        char text[512];
        batch b;
        test_case("engine %s, %s", cases[i].engine, cases[i].sizes);
        if (!runs_here(cases[i].engine))
            continue;
        snprintf(
            text, sizeof text,
            "{\"tuning\": [{\"device\": \"%s\", \"type\": \"other\", \"engine\": \"%s\", %s}]}",
            device_name, cases[i].engine, cases[i].sizes);
        clmoe_layer *layer = layer_of(context_of(text), cases[i].engine, &b);
        const uint32_t got = row_tile_of(layer);
        /* Devices with less get a smaller tile. */
        CHECK(got <= cases[i].row_tile, "row_tile is %u\n", got);
        if (strcmp(cases[i].engine, "cpu") == 0)
            assert_int_equal(got / 8 * 8, got);
        run_layer(layer, &b);
    }
}

#define ENTRY(device, type, rows)                                                                  \
    "{\"device\": \"" device "\", \"type\": \"" type "\", \"engine\": \"cpu\", \"rows\": " rows    \
    ", \"depth\": 256}"

/* A name goes before a type, what comes later before what comes earlier. */
static void which_entry(void **state) {
    static const struct {
        const char *entries;
        uint32_t row_tile;
    } cases[] = {
        {ENTRY("%s", "other", "80"), 80},
        {ENTRY("other", "cpu", "80"), 80},
        {ENTRY("other", "gpu", "80") ", " ENTRY("%s", "cpu", "40"), 40},
        {ENTRY("%s", "cpu", "40") ", " ENTRY("other", "cpu", "80"), 40},
        {ENTRY("%s", "cpu", "80") ", " ENTRY("%s", "cpu", "40"), 40},
    };
    (void)state;
    test_case("entries");
    if (!runs_here("cpu"))
        skip();
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        char entries[1024], text[1100];
        batch b;
        test_case("%s", cases[i].entries);
        snprintf(entries, sizeof entries, cases[i].entries, device_name, device_name);
        snprintf(text, sizeof text, "{\"tuning\": [%s]}", entries);
        assert_int_equal(row_tile_of(layer_of(context_of(text), "cpu", &b)), cases[i].row_tile);
    }
}

static void bad_files(void **state) {
#define ONE(fields) "{\"tuning\": [" fields "]}"
    static const char *const cases[][2] = {
        {"", "is not JSON"},
        {"[]", "is not a JSON object"},
        {"{}", "tuning is not an array"},
        {"{\"tuning\": 3}", "tuning is not an array"},
        {ONE("3"), "tuning[0].device is missing, but must be a text"},
        {ONE("{\"device\": \"x\"}"), "tuning[0].type is missing, but must be a text"},
        {ONE("{\"device\": \"x\", \"type\": \"cpu\", \"engine\": 7}"),
         "tuning[0].engine is 7, but must be a text"},
        {ONE("{\"device\": \"x\", \"type\": \"cpu\", \"engine\": \"ref\"}"),
         "tuning[0].engine is \"ref\", but has no sizes"},
        {ONE("{\"device\": \"x\", \"type\": \"cpu\", \"engine\": \"cpu\"}"),
         "tuning[0].rows is missing, but engine cpu can have: 40, 80, 160, 320"},
        {ONE(ENTRY("x", "cpu", "41")), "rows is 41, but engine cpu can have: 40, 80, 160, 320"},
        {ONE(ENTRY("x", "cpu", "80.0")), "tuning[0].rows is 80.0, but"},
        {ONE(ENTRY("x", "cpu", "80") ", " ENTRY("x", "cpu", "-80")), "tuning[1].rows is -80, but"},
        {ONE(ENTRY("x", "toaster", "80")), "tuning[0].type is \"toaster\", but must be cpu, gpu"},
        {ONE(ENTRY("x", "cpu", "80, \"rows\": 40")), "tuning[0].rows is 40, but the file has it"},
        {ONE(ENTRY("x\", \"device\": \"y", "cpu", "80")), "device is \"y\", but the file has it"},
        {ONE(ENTRY("x", "cpu", "80, \"foo\": 1")),
         "tuning[0].foo is 1, but an entry of its engine"},
        {ONE(ENTRY("x", "cpu", "80, \"columns\": 32")), "tuning[0].columns is 32, but an entry of"},
        {"{\"tuning\": [], \"tuning\": 3}", "\"tuning (repeated)\" beside"},
        {"{\"tuning\": [], \"tunings\": 3}", "has \"tunings\" beside"},
    };
    (void)state;
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        clmoe_context *context = NULL;
        const char *path = temp_path("bad.json");
        test_case("bad file %s", cases[i][0]);
        write_text(path, cases[i][0]);
        REFUSED(open_with(path, &context), CLMOE_BAD_FILE, path, cases[i][1]);
        assert_null(context);
    }
    clmoe_context *context = NULL;
    const char *missing = temp_path("missing.json");
    REFUSED(open_with(missing, &context), CLMOE_IO, missing);
    REFUSED(open_with("", &context), CLMOE_INVALID_ARGUMENT, "tuning_file");
}

static int setup(void **state) {
    if (support_setup(state) != 0 || files_setup(state) != 0)
        return -1;
    return clGetDeviceInfo(test.device, CL_DEVICE_NAME, sizeof device_name, device_name, NULL);
}

static int teardown(void **state) {
    const int files = files_teardown(state);
    return support_teardown(state) != 0 || files != 0 ? -1 : 0;
}

int main(void) {
    const struct CMUnitTest tests[] = {TEST(every_size), TEST(which_entry), TEST(bad_files)};
    support_filter();
    return cmocka_run_group_tests(tests, setup, teardown);
}
