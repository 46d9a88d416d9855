/* Kernels as native code: compiled into a library each, work-items as contexts in turn. */
#define _GNU_SOURCE /* dladdr(): where this library itself lies */
#include "device.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>

struct native_program {
    void *library; /* NULL: nothing is run */
};

/* ---- Building ------------------------------------------------------------------------------- */

/* FNV-1a */
static uint64_t hash_of(const char *text, uint64_t hash) {
    for (; *text; text++)
        hash = (hash ^ (unsigned char)*text) * 0x100000001B3u;
    return hash;
}

/* "topk-0123456789abcdef": the last file that starts at its line 1 and is no header, without its
 * room. */
static void name_of(const char *source, const char *options, char *name, size_t bytes) {
    static const char directive[] = "#line 1 \"cl/";
    const char *step = "kernel";
    size_t length = strlen(step);
    for (const char *at = source; (at = strstr(at, directive)) != NULL;) {
        at += sizeof directive - 1;
        size_t file = strcspn(at, "\"");
        if (file > 3 && strncmp(at + file - 3, ".cl", 3) == 0) {
            step = at;
            for (size_t i = 0; i < file; i++)
                step = at[i] == '/' ? at + i + 1 : step;
            length = file - 3 - (size_t)(step - at);
        }
    }
    uint64_t hash = hash_of(options, hash_of(source, 0xCBF29CE484222325u));
    snprintf(name, bytes, "%.*s-%016llx", (int)length, step, (unsigned long long)hash);
}

/* The name has the content's hash: a file that is there is right. */
static bool write_source(const char *path, const char *source, const char *options) {
    if (access(path, F_OK) == 0)
        return true;
    FILE *file = fopen(path, "w");
    if (!file)
        return false;
    fprintf(file, SOURCE_OPTIONS "%s\n%s", options, source);
    return fclose(file) == 0;
}

/* The compiler's words. */
static void read_log(const char *path, char *log, size_t log_bytes) {
    FILE *file = fopen(path, "r");
    size_t bytes = file ? fread(log, 1, log_bytes - 1, file) : 0;
    log[bytes] = '\0';
    if (file)
        fclose(file);
}

/* Compiles DIRECTORY/NAME.cl to DIRECTORY/NAME.so and loads it. */
static void *compile(const char *directory, const char *name, const char *options, char *log,
                     size_t log_bytes) {
    char command[8192], library[1024], words[1024];
    const char *compiler = getenv("CLMOE_NATIVE_COMPILE");
    Dl_info self;
    static const char here = 0;
    if (!compiler || !dladdr(&here, &self))
        return NULL;
    snprintf(library, sizeof library, "%s/%s.so", directory, name);
    snprintf(words, sizeof words, "%s/%s.log", directory, name);
    snprintf(command, sizeof command, "%s %s/%s.cl %s %s %s 2>%s", compiler, directory, name,
             library, self.dli_fname, options, words);
    int failed = system(command);
    void *loaded = failed ? NULL : dlopen(library, RTLD_NOW | RTLD_LOCAL);
    read_log(words, log, log_bytes);
    if (!failed && !loaded)
        snprintf(log, log_bytes, "%s", dlerror());
    return loaded;
}

/* Without the one that only keeps names: it makes no other code, and a program is compiled once. */
static void drop_names(const char *options, char *kept, size_t bytes) {
    static const char names[] = " -cl-kernel-arg-info";
    const char *at = strstr(options, names);
    const size_t front = at ? (size_t)(at - options) : strlen(options);
    snprintf(kept, bytes, "%.*s%s", (int)front, options, at ? at + strlen(names) : "");
}

native_program *native_build(const char *source, const char *options, int loaded, char *log,
                             size_t log_bytes) {
    const char *run = getenv("CLMOE_NATIVE_RUN"), *keep = getenv("CLMOE_NATIVE_SOURCES");
    char name[256], path[1024], kept[2048];
    native_program *program = calloc(1, sizeof *program);
    if (!program || (!run && (!keep || loaded)))
        return program;
    drop_names(options, kept, sizeof kept);
    name_of(source, kept, name, sizeof name);
    snprintf(path, sizeof path, "%s/%s.cl", run ? run : keep, name);
    bool written = write_source(path, source, kept);
    if (written && run)
        program->library = compile(run, name, kept, log, log_bytes);
    if (written && (!run || program->library))
        return program;
    if (!written)
        snprintf(log, log_bytes, "%s: cannot be written", path);
    free(program);
    return NULL;
}

void native_free(native_program *program) {
    /* The library stays: its coverage is written when the process ends. */
    free(program);
}

typedef void (*kernel_function)(void **arguments);

static kernel_function find_kernel(const native_program *program, const char *name) {
    char symbol[256];
    kernel_function function;
    snprintf(symbol, sizeof symbol, "run_%s", name);
    void *address = dlsym(program->library, symbol);
    memcpy(&function, &address, sizeof function);
    return function;
}

int native_has_kernel(const native_program *program, const char *name) {
    return program && (!program->library || find_kernel(program, name));
}

/* ---- Work-items ----------------------------------------------------------------------------- */

enum { STACK_BYTES = 256 << 10 };

typedef enum item_state { ITEM_RUNS, ITEM_AT_BARRIER, ITEM_ENDED } item_state;

typedef struct launch launch;

/* A work-item: a function of its own that hands over at barriers. */
typedef struct item {
    launch *of;
    size_t id[3];
    item_state state;
    ucontext_t context;
} item;

struct launch {
    const char *name;
    kernel_function function;
    void **arguments;
    size_t group[3], groups[3], local[3], offset[3], count;
    item *items;
    ucontext_t between; /* where items hand over to */
};

static item *current;
static pthread_mutex_t one_launch = PTHREAD_MUTEX_INITIALIZER;

static void hand_over(item_state state) {
    current->state = state;
    swapcontext(&current->context, &current->of->between);
}

static void run_item(void) {
    current->of->function(current->of->arguments);
    hand_over(ITEM_ENDED);
}

/* Stacks for as many items as any launch had, kept. */
static char *stacks_for(size_t count) {
    static char *stacks;
    static size_t have;
    if (count > have) {
        free(stacks);
        stacks = malloc(count * STACK_BYTES);
        have = count;
    }
    return stacks;
}

static void begin_items(launch *l) {
    char *stacks = stacks_for(l->count);
    for (size_t i = 0; i < l->count; i++) {
        item *it = &l->items[i];
        it->state = ITEM_RUNS;
        getcontext(&it->context);
        it->context.uc_stack.ss_sp = stacks + i * STACK_BYTES;
        it->context.uc_stack.ss_size = STACK_BYTES;
        makecontext(&it->context, run_item, 0);
    }
}

/* Each item in turn up to its next barrier or its end, which must be the same for all. */
static void run_group(launch *l) {
    begin_items(l);
    do {
        for (size_t i = 0; i < l->count; i++) {
            current = &l->items[i];
            swapcontext(&l->between, &current->context);
            if (current->state != l->items[0].state) {
                fprintf(stderr, "divergent barrier in kernel %s\n", l->name);
                abort();
            }
        }
    } while (l->items[0].state != ITEM_ENDED);
}

/* A group of one needs no stack of its own. */
static void run_alone(launch *l) {
    current = &l->items[0];
    l->function(l->arguments);
}

static void run_groups(launch *l) {
    for (l->group[2] = 0; l->group[2] < l->groups[2]; l->group[2]++)
        for (l->group[1] = 0; l->group[1] < l->groups[1]; l->group[1]++)
            for (l->group[0] = 0; l->group[0] < l->groups[0]; l->group[0]++)
                (l->count == 1 ? run_alone : run_group)(l);
}

void native_launch(const native_program *program, const char *name, void **arguments,
                   const size_t groups[3], const size_t local[3], const size_t offset[3]) {
    if (!program->library)
        return;
    launch l = {.name = name, .function = find_kernel(program, name), .arguments = arguments};
    memcpy(l.groups, groups, sizeof l.groups);
    memcpy(l.offset, offset, sizeof l.offset);
    memcpy(l.local, local, sizeof l.local);
    l.count = local[0] * local[1] * local[2];
    l.items = calloc(l.count, sizeof *l.items);
    if (!l.items)
        abort();
    for (size_t i = 0; i < l.count; i++) {
        l.items[i].of = &l;
        l.items[i].id[0] = i % local[0];
        l.items[i].id[1] = i / local[0] % local[1];
        l.items[i].id[2] = i / local[0] / local[1];
    }
    /* __local variables are the library's own: one launch at a time. */
    pthread_mutex_lock(&one_launch);
    run_groups(&l);
    pthread_mutex_unlock(&one_launch);
    free(l.items);
}

/* ---- What kernels call ---------------------------------------------------------------------- */

size_t get_local_id(unsigned d);
size_t get_group_id(unsigned d);
size_t get_local_size(unsigned d);
size_t get_num_groups(unsigned d);
size_t get_global_id(unsigned d);
size_t get_global_size(unsigned d);
size_t get_global_offset(unsigned d);
void barrier(unsigned flags);

size_t get_local_id(unsigned d) {
    return current->id[d];
}

size_t get_group_id(unsigned d) {
    return current->of->group[d];
}

size_t get_local_size(unsigned d) {
    return current->of->local[d];
}

size_t get_num_groups(unsigned d) {
    return current->of->groups[d];
}

size_t get_global_id(unsigned d) {
    return current->of->offset[d] + current->of->group[d] * current->of->local[d] + current->id[d];
}

size_t get_global_size(unsigned d) {
    return current->of->groups[d] * current->of->local[d];
}

size_t get_global_offset(unsigned d) {
    return current->of->offset[d];
}

void barrier(unsigned flags) {
    (void)flags;
    if (current->of->count > 1)
        hand_over(ITEM_AT_BARRIER);
}
