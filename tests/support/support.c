/* The device under test, memory with canaries, seeded inputs, comparisons. */
#include "support.h"

#include <ctype.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_PLATFORMS 16
#define MAX_DEVICES   64
#define FRONT         260 /* a multiple of 4 and of nothing more */
#define ODD_FRONT     258 /* a multiple of 2 alone */
#define ALIGNED_FRONT 256
#define BACK          256
#define CANARY        0xA5
#define POISON        0x7FC0DEADu /* a NaN, and far out of range as an integer */

test_device test;

/* ---- Running ------------------------------------------------------------------------------- */

static char case_text[512];
static uint64_t case_seed;

void test_case(const char *format, ...) {
    CHECK(support_clean(NULL) == 0, "the case before this one left damage\n");
    va_list args;
    va_start(args, format);
    vsnprintf(case_text, sizeof case_text, format, args);
    va_end(args);
}

void test_note(const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(case_text, sizeof case_text, format, args);
    va_end(args);
}

void check_failed(const char *file, int line) {
    print_error("case: %s (seed %llu)\n", case_text, (unsigned long long)case_seed);
    _fail(file, line);
}

void check_ok(clmoe_status status, const char *call, const char *file, int line) {
    if (status == CLMOE_SUCCESS)
        return;
    print_error("%s\n  %s: %s\n", call, clmoe_status_string(status), clmoe_last_error());
    check_failed(file, line);
}

void check_error(clmoe_status status, clmoe_status want, const char *field, const char *value) {
    const char *sentence = clmoe_last_error();
    CHECK(status == want, "%s = %s: status %s, not %s: %s\n", field, value,
          clmoe_status_string(status), clmoe_status_string(want), sentence);
    CHECK(strstr(sentence, field) != NULL, "\"%s\" does not name %s\n", sentence, field);
    CHECK(strstr(sentence, value) != NULL, "\"%s\" does not give %s\n", sentence, value);
}

/* ---- Device -------------------------------------------------------------------------------- */

/* Whether `part` is in `name`, whatever the case. */
static bool contains(const char *name, const char *part) {
    size_t n = strlen(part);
    for (; *name; name++) {
        size_t i = 0;
        while (i < n && tolower((unsigned char)name[i]) == tolower((unsigned char)part[i]))
            i++;
        if (i == n)
            return true;
    }
    return false;
}

/* Whether CLMOE_TEST_DEVICE means the device with that index and these names. */
static bool is_wanted(const char *wanted, cl_uint index, const char *platform, const char *device) {
    if (wanted == NULL || wanted[0] == '\0')
        return true;
    char *end = NULL;
    unsigned long number = strtoul(wanted, &end, 10);
    if (*end == '\0')
        return number == index;
    return contains(platform, wanted) || contains(device, wanted);
}

static bool find_device(void) {
    const char *wanted = getenv("CLMOE_TEST_DEVICE");
    cl_platform_id platforms[MAX_PLATFORMS];
    cl_uint num_platforms = 0, index = 0;
    clGetPlatformIDs(MAX_PLATFORMS, platforms, &num_platforms);
    for (cl_uint p = 0; p < num_platforms && p < MAX_PLATFORMS; p++) {
        cl_device_id devices[MAX_DEVICES];
        cl_uint num_devices = 0;
        char platform[256] = "", device[256] = "";
        clGetPlatformInfo(platforms[p], CL_PLATFORM_NAME, sizeof platform, platform, NULL);
        clGetDeviceIDs(platforms[p], CL_DEVICE_TYPE_ALL, MAX_DEVICES, devices, &num_devices);
        for (cl_uint d = 0; d < num_devices && d < MAX_DEVICES; d++, index++) {
            clGetDeviceInfo(devices[d], CL_DEVICE_NAME, sizeof device, device, NULL);
            if (!is_wanted(wanted, index, platform, device))
                continue;
            test.platform = platforms[p];
            test.device = devices[d];
            printf("device %u: %s, %s\n", index, platform, device);
            return true;
        }
    }
    fprintf(stderr, "no OpenCL device%s%s\n", wanted ? " matches CLMOE_TEST_DEVICE=" : "",
            wanted ? wanted : "");
    return false;
}

void support_filter(void) {
    cmocka_set_test_filter(getenv("CLMOE_TEST_FILTER"));
}

uint32_t group_sizes[2];

/* Asked once, by support_setup(): not while a test makes calls fail. */
static bool is_pocl;

static void ask_platform(void) {
    char name[64] = "";
    CL_OK(clGetPlatformInfo(test.platform, CL_PLATFORM_NAME, sizeof name, name, NULL));
    is_pocl = strcmp(name, "Portable Computing Language") == 0;
}

int support_setup(void **state) {
    (void)state;
    cl_device_type type = 0;
    if (!find_device())
        return -1;
    ask_platform();
    fflush(stdout);
    cl_int code = clGetDeviceInfo(test.device, CL_DEVICE_TYPE, sizeof type, &type, NULL);
    if (code != CL_SUCCESS)
        return -1;
    group_sizes[1] = type & CL_DEVICE_TYPE_CPU ? 256 : 64;
    test.context = clCreateContext(NULL, 1, &test.device, NULL, NULL, &code);
    if (code == CL_SUCCESS)
        test.queue = clCreateCommandQueue(test.context, test.device, 0, &code);
    if (code == CL_SUCCESS)
        test.out_of_order = clCreateCommandQueue(test.context, test.device,
                                                 CL_QUEUE_OUT_OF_ORDER_EXEC_MODE_ENABLE, &code);
    /* A device without out-of-order queues runs those tests in order. */
    if (code == CL_INVALID_QUEUE_PROPERTIES)
        test.out_of_order = clCreateCommandQueue(test.context, test.device, 0, &code);
    return code == CL_SUCCESS ? 0 : -1;
}

static struct {
    uint32_t group_size;
    clmoe_context *context;
} contexts[8];

static void log_message(const char *message, void *user) {
    (void)user;
    print_message("log: %s\n", message);
}

clmoe_context *test_context(uint32_t group_size) {
    size_t i = 0;
    const char *most = getenv("CLMOE_TEST_MOST_GROUP");
    if (most && group_size > (uint32_t)atoi(most))
        group_size = (uint32_t)atoi(most);
    while (contexts[i].context != NULL && contexts[i].group_size != group_size)
        i++;
    if (contexts[i].context != NULL)
        return contexts[i].context;
    clmoe_context_options options;
    clmoe_context_options_init(&options);
    options.group_size = group_size;
    options.log = log_message;
    options.cache_dir = getenv("CLMOE_TEST_CACHE");
    OK(clmoe_context_create(test.context, test.device, &options, &contexts[i].context));
    contexts[i].group_size = group_size;
    return contexts[i].context;
}

size_t test_forms(uint32_t forms[2]) {
    size_t most = 0;
    CL_OK(clGetDeviceInfo(test.device, CL_DEVICE_MAX_WORK_GROUP_SIZE, sizeof most, &most, NULL));
    const bool own = most <= 64;
    forms[0] = own ? (uint32_t)most : 1;
    forms[1] = 16;
    return own ? 1 : 2;
}

_Thread_local bool program_runs_long;

/* Whether the options ask for groups of more than one. Engine tiled has ROWS, all others GROUP. */
static bool has_groups(const char *options) {
    static const char group[] = "-DGROUP=";
    const char *at = strstr(options, group);
    return strstr(options, "-DROWS=") || (at && atoi(at + sizeof group - 1) > 1);
}

const char *build_quickly(const char *options) {
    const bool quick = options && has_groups(options) && !program_runs_long;
    return quick && is_pocl ? " -cl-opt-disable" : "";
}

bool on_oclgrind(void) {
    char name[64] = "";
    CL_OK(clGetDeviceInfo(test.device, CL_DEVICE_NAME, sizeof name, name, NULL));
    return strstr(name, "Oclgrind") != NULL;
}

/* The library says so when a layer is created; asked here, so that tests need not try. */
static bool engine_takes(const char *engine, clmoe_type type, clmoe_type weight_type) {
    if (strncmp(engine, "nv_", 3) == 0)
        return type != CLMOE_F32 && type == weight_type;
    return strcmp(engine, "clblast") != 0 || (type == CLMOE_F32 && weight_type == CLMOE_F32);
}

const char *const *test_engines_of(clmoe_type type, clmoe_type weight_type) {
    static const char *names[16];
    size_t n = 0;
    uint32_t supported = 0;
    const char *name, *only = getenv("CLMOE_TEST_ENGINE");
    for (uint32_t i = 0; (name = clmoe_engine_name(test_context(0), i, &supported)) != NULL; i++)
        if (supported && (!only || strcmp(only, name) == 0) && n + 1 < COUNT_OF(names) &&
            engine_takes(name, type, weight_type))
            names[n++] = name;
    names[n] = NULL;
    return names;
}

const char *const *test_engines(void) {
    const char *const *names = test_engines_of(CLMOE_F32, CLMOE_F32);
    CHECK(names[0] != NULL, "no engine runs on the device\n");
    return names;
}

int support_teardown(void **state) {
    int damage = support_clean(state);
    for (size_t i = 0; i < COUNT_OF(contexts); i++)
        clmoe_context_destroy(contexts[i].context);
    memset(contexts, 0, sizeof contexts);
    clReleaseCommandQueue(test.queue);
    clReleaseCommandQueue(test.out_of_order);
    clReleaseContext(test.context);
    return damage;
}

/* ---- Memory -------------------------------------------------------------------------------- */

/* A list of things to release. */
typedef struct list {
    size_t count, room, size;
    void *items;
} list;

typedef struct guarded {
    cl_mem mem;
    size_t bytes;
    size_t front; /* bytes of canary before, or 0 without canaries */
    bool output;  /* still as buf_new() left it, as far as the host knows */
} guarded;

typedef struct deferred {
    void (*release)(void *object);
    void *object;
} deferred;

static list blocks = {.size = sizeof(void *)};
static list buffers = {.size = sizeof(guarded)};
static list releases = {.size = sizeof(deferred)};

static void push(list *to, const void *item) {
    if (to->count == to->room) {
        to->room = to->room ? 2 * to->room : 64;
        to->items = realloc(to->items, to->room * to->size);
        assert_non_null(to->items);
    }
    memcpy((char *)to->items + to->count++ * to->size, item, to->size);
}

void clean_later(void (*release)(void *object), void *object) {
    deferred item = {release, object};
    push(&releases, &item);
}

static guarded *buffer_at(size_t i) {
    return (guarded *)buffers.items + i;
}

static guarded *find_buffer(clmoe_buf buf) {
    for (size_t i = buffers.count; i-- > 0;)
        if (buffer_at(i)->mem == buf.mem)
            return buffer_at(i);
    CHECK(false, "this buffer was not made by buf_new()\n");
    return NULL;
}

void *host_alloc(size_t count, size_t size) {
    void *block = calloc(count ? count : 1, size ? size : 1);
    assert_non_null(block);
    push(&blocks, &block);
    return block;
}

static void write_payload(const guarded *g, const void *data) {
    if (g->bytes > 0)
        CL_OK(clEnqueueWriteBuffer(test.queue, g->mem, CL_TRUE, g->front, g->bytes, data, 0, NULL,
                                   NULL));
    CL_OK(clFinish(test.queue)); /* Intel's blocking writes reach other queues too late without */
}

static void fill_poison(void *to, size_t bytes) {
    const uint32_t poison = POISON;
    for (size_t at = 0; at < bytes; at += sizeof poison)
        memcpy((char *)to + at, &poison, bytes - at < sizeof poison ? bytes - at : sizeof poison);
}

void buf_poison(clmoe_buf buf) {
    guarded *g = find_buffer(buf);
    void *poison = malloc(g->bytes + 1);
    assert_non_null(poison);
    fill_poison(poison, g->bytes);
    write_payload(g, poison);
    free(poison);
    g->output = true;
}

bool support_bare;
bool support_aligned;

/* Data, or poison if that is NULL, between canaries. */
static unsigned char *guarded_copy(size_t front, const void *data, size_t bytes) {
    unsigned char *copy = malloc(front + bytes + BACK);
    assert_non_null(copy);
    memset(copy, CANARY, front);
    if (data)
        memcpy(copy + front, data, bytes);
    else
        fill_poison(copy + front, bytes);
    memset(copy + front + bytes, CANARY, BACK);
    return copy;
}

/* A buffer comes with what is in it: a driver's thread would be woken for each command. */
static clmoe_buf buf_behind(size_t front, const void *data, size_t bytes) {
    cl_int code = CL_SUCCESS;
    guarded g = {NULL, bytes, support_bare ? 0 : front, data == NULL};
    if (support_bare) {
        g.mem = clCreateBuffer(test.context, CL_MEM_READ_WRITE, bytes + !bytes, NULL, &code);
    } else {
        unsigned char *copy = guarded_copy(front, data, bytes);
        g.mem = clCreateBuffer(test.context, CL_MEM_READ_WRITE | CL_MEM_COPY_HOST_PTR,
                               front + bytes + BACK, copy, &code);
        free(copy);
    }
    CL_OK(code);
    push(&buffers, &g);
    if (support_bare && data)
        write_payload(&g, data);
    return (clmoe_buf){g.mem, g.front};
}

static size_t usual_front(void) {
    return support_aligned ? ALIGNED_FRONT : FRONT;
}

size_t stats_size(const clmoe_layer *layer) {
    size_t bytes = 0;
    OK(clmoe_stats_size(layer, &bytes));
    return bytes;
}

clmoe_buf buf_new(size_t bytes) {
    return buf_behind(usual_front(), NULL, bytes);
}

clmoe_buf buf_new_type(clmoe_type type, size_t n) {
    if (type == CLMOE_F32 || support_aligned)
        return buf_new(n * type_size(type));
    return buf_behind(ODD_FRONT, NULL, n * type_size(type));
}

static void release_mem(void *mem) {
    clReleaseMemObject(mem);
}

clmoe_buf buf_short(size_t bytes) {
    cl_int code;
    cl_mem mem = clCreateBuffer(test.context, CL_MEM_READ_WRITE, bytes - 1, NULL, &code);
    CL_OK(code);
    clean_later(release_mem, mem);
    return (clmoe_buf){mem, 0};
}

void buf_write(clmoe_buf buf, const void *data, size_t bytes) {
    guarded *g = find_buffer(buf);
    CHECK(bytes == g->bytes, "buf_write of %zu bytes to a buffer of %zu\n", bytes, g->bytes);
    write_payload(g, data);
    g->output = false;
}

clmoe_buf buf_of(const void *data, size_t bytes) {
    if (data == NULL)
        return (clmoe_buf){NULL, 0};
    return buf_behind(usual_front(), data, bytes);
}

void buf_read(clmoe_buf buf, void *to, size_t bytes) {
    if (bytes > 0)
        CL_OK(clEnqueueReadBuffer(test.queue, buf.mem, CL_TRUE, buf.offset, bytes, to, 0, NULL,
                                  NULL));
}

void *buf_get(clmoe_buf buf) {
    size_t bytes = find_buffer(buf)->bytes;
    void *to = host_alloc(bytes, 1);
    buf_read(buf, to, bytes);
    return to;
}

bool buf_untouched(clmoe_buf buf) {
    const uint32_t *words = buf_get(buf);
    for (size_t i = 0; i < find_buffer(buf)->bytes / 4; i++)
        if (words[i] != POISON)
            return false;
    return true;
}

bool all_untouched(void) {
    for (size_t i = 0; i < buffers.count; i++)
        if (buffer_at(i)->output &&
            !buf_untouched((clmoe_buf){buffer_at(i)->mem, buffer_at(i)->front}))
            return false;
    return true;
}

typedef struct edges {
    unsigned char before[FRONT], behind[BACK];
} edges;

static cl_int read_edges(const guarded *g, edges *to) {
    cl_int code =
        clEnqueueReadBuffer(test.queue, g->mem, CL_FALSE, 0, g->front, to->before, 0, NULL, NULL);
    if (code == CL_SUCCESS)
        code = clEnqueueReadBuffer(test.queue, g->mem, CL_FALSE, g->front + g->bytes, BACK,
                                   to->behind, 0, NULL, NULL);
    return code;
}

static bool is_canary(const guarded *g, const char *place, const unsigned char *at, size_t bytes) {
    for (size_t i = 0; i < bytes; i++)
        if (at[i] != CANARY) {
            print_error("canary %s a buffer of %zu bytes is damaged (case: %s)\n", place, g->bytes,
                        case_text);
            return false;
        }
    return true;
}

/* How many buffers have damaged canaries, or cannot be read. */
static int count_damage(void) {
    int damage = 0;
    if (buffers.count == 0) /* and perhaps no device */
        return 0;
    edges *all = calloc(buffers.count, sizeof *all);
    assert_non_null(all);
    for (size_t i = 0; i < buffers.count; i++)
        if (buffer_at(i)->front > 0 && read_edges(buffer_at(i), &all[i]) != CL_SUCCESS)
            damage++;
    damage += clFinish(test.queue) != CL_SUCCESS;
    for (size_t i = 0; i < buffers.count; i++) {
        const guarded *g = buffer_at(i);
        damage += g->front > 0 && !(is_canary(g, "before", all[i].before, g->front) &&
                                    is_canary(g, "behind", all[i].behind, BACK));
    }
    free(all);
    return damage;
}

int support_clean(void **state) {
    (void)state;
    clFinish(test.queue);
    clFinish(test.out_of_order);
    const int damage = count_damage();
    for (size_t i = 0; i < releases.count; i++) {
        deferred item = ((deferred *)releases.items)[i];
        item.release(item.object);
    }
    for (size_t i = 0; i < buffers.count && !support_bare; i++)
        clReleaseMemObject(buffer_at(i)->mem);
    for (size_t i = 0; i < blocks.count; i++)
        free(((void **)blocks.items)[i]);
    list *all[] = {&releases, &buffers, &blocks};
    for (size_t i = 0; i < COUNT_OF(all); i++) {
        free(all[i]->items);
        *all[i] = (list){.size = all[i]->size};
    }
    return damage;
}

static void destroy_layer(void *layer) {
    clmoe_layer_destroy(layer);
}

clmoe_layer *test_layer(uint32_t group_size, const clmoe_layer_desc *desc) {
    clmoe_layer *layer = NULL;
    OK(clmoe_layer_create(test_context(group_size), desc, &layer));
    clean_later(destroy_layer, layer);
    return layer;
}

/* ---- Inputs -------------------------------------------------------------------------------- */

static uint64_t random_state;

void seed_set(uint64_t seed) {
    case_seed = seed;
    random_state = seed;
}

/* splitmix64 */
static uint64_t random_bits(void) {
    uint64_t z = (random_state += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

double random_unit(void) {
    return (double)(random_bits() >> 11) * 0x1p-53;
}

uint32_t random_below(uint32_t n) {
    return (uint32_t)(random_unit() * n);
}

double random_normal(void) {
    const double pi = 3.14159265358979323846;
    double radius = sqrt(-2.0 * log(1.0 - random_unit()));
    return radius * cos(2.0 * pi * random_unit());
}

float *random_floats(size_t n, double deviation) {
    float *values = HOST(float, n);
    for (size_t i = 0; i < n; i++)
        values[i] = (float)(deviation * random_normal());
    return values;
}

float *random_eighths(size_t n, double deviation) {
    float *values = HOST(float, n);
    for (size_t i = 0; i < n; i++)
        values[i] = (float)(round(8.0 * deviation * random_normal()) / 8.0);
    return values;
}

const char *pattern_name(pattern kind) {
    static const char *const names[] = {"uniform",       "zipf", "all to one",
                                        "empty experts", "ties", "non-finite"};
    return names[kind];
}

static float pattern_value(pattern kind, uint32_t columns, uint32_t e) {
    static const float few[] = {-1.0f, -0.0f, 0.0f, 0.5f, 0.5f, 2.0f};
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    double value = random_normal();
    switch (kind) {
    case PATTERN_ZIPF:
        return (float)(value - 1.5 * log(1.0 + (double)((uint64_t)e * 7919 % columns)));
    case PATTERN_ALL_TO_ONE:
        return (float)(value + (e == columns / 2 ? 20.0 : 0.0));
    case PATTERN_EMPTY_EXPERTS:
        return (float)(value - (e % 3 != 0 ? 20.0 : 0.0));
    case PATTERN_TIES:
        return few[random_below(COUNT_OF(few))];
    case PATTERN_NONFINITE:
        return random_below(3) == 0 ? bad[random_below(COUNT_OF(bad))] : (float)value;
    default:
        return (float)value;
    }
}

float *pattern_logits(pattern kind, uint32_t tokens, uint32_t columns) {
    float *rows = HOST(float, (size_t)tokens *columns);
    for (size_t t = 0; t < tokens; t++) {
        /* Of the non-finite rows, some hold one bad value, some a third, some nothing else. */
        uint32_t share = random_below(4), finite = random_below(columns);
        for (uint32_t e = 0; e < columns; e++) {
            bool mixed = kind != PATTERN_NONFINITE || share < 2 || e == finite;
            float value = pattern_value(mixed ? kind : PATTERN_UNIFORM, columns, e);
            rows[t * columns + e] = kind == PATTERN_NONFINITE && share == 0 ? NAN : value;
        }
    }
    return rows;
}

float *pattern_scores(pattern kind, uint32_t tokens, uint32_t columns) {
    float *rows = pattern_logits(kind, tokens, columns);
    for (size_t i = 0; i < (size_t)tokens * columns; i++)
        rows[i] = rows[i] == INFINITY ? -INFINITY : rows[i];
    return rows;
}

uint8_t *random_mask(uint32_t tokens) {
    uint8_t *mask = HOST(uint8_t, tokens);
    for (uint32_t t = 0; t < tokens; t++)
        mask[t] = (uint8_t)(random_below(4) == 0 ? 0 : 1 + random_below(255));
    return mask;
}

/* ---- Comparisons --------------------------------------------------------------------------- */

void compare_ints(const char *what, const void *got, const void *want, size_t n) {
    const int32_t *g = got, *w = want;
    for (size_t i = 0; i < n; i++)
        CHECK(g[i] == w[i], "%s[%zu] of %zu is %d, not %d\n", what, i, n, g[i], w[i]);
}

void compare_bits(const char *what, const void *got, const void *want, size_t bytes) {
    const unsigned char *g = got, *w = want;
    for (size_t i = 0; i < bytes; i++)
        CHECK(g[i] == w[i], "%s differs at byte %zu of %zu\n", what, i, bytes);
}

void compare_floats(const char *what, const float *got, const double *want, size_t n,
                    double tolerance) {
    double error = 0.0, norm = 0.0;
    size_t finite = 0;
    for (size_t i = 0; i < n; i++) {
        if (!isfinite(want[i])) {
            CHECK((double)got[i] == want[i], "%s[%zu] is %g, not %g\n", what, i, (double)got[i],
                  want[i]);
            continue;
        }
        CHECK(isfinite(got[i]), "%s[%zu] is %g, not %g\n", what, i, (double)got[i], want[i]);
        error += ((double)got[i] - want[i]) * ((double)got[i] - want[i]);
        norm += want[i] * want[i];
        finite++;
    }
    double mean = finite ? sqrt(norm / (double)finite) : 0.0;
    for (size_t i = 0; i < n; i++) {
        if (!isfinite(want[i]))
            continue;
        double off = fabs((double)got[i] - want[i]);
        double bound = 32.0 * tolerance * (fabs(want[i]) + mean);
        CHECK(off <= bound, "%s[%zu] of %zu is %.9g, not %.9g\n", what, i, n, (double)got[i],
              want[i]);
    }
    CHECK(sqrt(error) <= tolerance * sqrt(norm), "%s: relative error %g, over %g\n", what,
          sqrt(error / norm), tolerance);
}

void compare_ids(const clmoe_layer_desc *desc, uint32_t tokens, const int32_t *got,
                 const int32_t *want, const int32_t *live) {
    size_t K = desc->top_k, R = ref_columns(desc);
    unsigned char *seen = HOST(unsigned char, R);
    for (size_t t = 0; t < tokens; t++) {
        for (size_t e = 0; e < R; e++)
            seen[e] = 0;
        for (size_t k = 0; k < K; k++) {
            int32_t id = got[t * K + k];
            bool real = live == NULL || (int32_t)k < live[t];
            CHECK(!real || id == want[t * K + k], "ids[%zu][%zu] is %d, not %d\n", t, k, id,
                  want[t * K + k]);
            CHECK(id >= 0 && (size_t)id < R, "ids[%zu][%zu] is %d of %zu\n", t, k, id, R);
            CHECK(!seen[id]++, "ids[%zu][%zu] is %d again\n", t, k, id);
        }
    }
}
