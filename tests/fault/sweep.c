/* Faults, the objects they are tried on, and what must be true after each. */
#include "sweep.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

bool everything, every_code;
unsigned one_in, tried;
const fault_layer *opencl;

static const cl_int codes[] = {CL_OUT_OF_RESOURCES, CL_MEM_OBJECT_ALLOCATION_FAILURE,
                               CL_OUT_OF_HOST_MEMORY};

/* ---- Host memory: the linker sends the library's calls here --------------------------------- */

void *__real_malloc(size_t bytes);
void *__real_calloc(size_t count, size_t bytes);
void *__real_realloc(void *block, size_t bytes);
void __real_free(void *block);
void *__wrap_malloc(size_t bytes);
void *__wrap_calloc(size_t count, size_t bytes);
void *__wrap_realloc(void *block, size_t bytes);
char *__wrap_strdup(const char *text);
void __wrap_free(void *block);

static struct {
    unsigned calls, nth;
    bool lasting, failed, watched;
    bool in_jansson; /* the call that failed was jansson's */
    long blocks;
} memory;

static bool memory_fails(void) {
    if (!memory.watched)
        return false;
    unsigned call = ++memory.calls;
    bool fails = memory.nth && (memory.lasting ? call >= memory.nth : call == memory.nth);
    memory.failed = memory.failed || fails;
    return fails;
}

static void *counted(void *block) {
    memory.blocks += memory.watched && block != NULL;
    return block;
}

void *__wrap_malloc(size_t bytes) {
    return memory_fails() ? NULL : counted(__real_malloc(bytes));
}

void *__wrap_calloc(size_t count, size_t bytes) {
    return memory_fails() ? NULL : counted(__real_calloc(count, bytes));
}

void *__wrap_realloc(void *block, size_t bytes) {
    if (memory_fails())
        return NULL;
    return block ? __real_realloc(block, bytes) : counted(__real_malloc(bytes));
}

char *__wrap_strdup(const char *text) {
    size_t bytes = strlen(text) + 1;
    char *copy = __wrap_malloc(bytes);
    return copy ? memcpy(copy, text, bytes) : NULL;
}

void __wrap_free(void *block) {
    memory.blocks -= memory.watched && block != NULL;
    __real_free(block);
}

void *jansson_malloc(size_t bytes) {
    bool failed = memory.failed;
    void *block = __wrap_malloc(bytes);
    memory.in_jansson = memory.in_jansson || (memory.failed && !failed);
    return block;
}

bool memory_watch(bool watched) {
    bool before = memory.watched;
    memory.watched = watched;
    return before;
}

/* ---- What can fail -------------------------------------------------------------------------- */

static void memory_arm(unsigned nth, cl_int code, bool lasting) {
    (void)code;
    memory.nth = nth;
    memory.lasting = lasting;
    memory.calls = 0;
    memory.failed = memory.in_jansson = false;
}

static unsigned memory_calls(void) {
    return memory.calls;
}

static const char *memory_failed(void) {
    return memory.failed ? "host memory" : "";
}

const source host_memory = {"host memory", memory_arm, memory_calls, memory_failed};

bool load_layer(void) {
    void *library = dlopen(FAULT_LAYER, RTLD_NOW | RTLD_LOCAL);
    cl_uint platforms = 0;
    if (library)
        opencl = (const fault_layer *)dlsym(library, FAULT_LAYER_SYMBOL);
    setenv("OPENCL_LAYERS", FAULT_LAYER, 1);
    clGetPlatformIDs(0, NULL, &platforms);
    return opencl != NULL && opencl->loaded();
}

/* ---- Contexts and layers -------------------------------------------------------------------- */

clmoe_status run_context(rig *r) {
    clmoe_status status = clmoe_context_create(test.context, test.device, NULL, &r->context);
    CHECK((status == CLMOE_SUCCESS) == (r->context != NULL), "a handle of a failed create\n");
    return status;
}

void undo_context(rig *r) {
    clmoe_context_destroy(r->context);
    r->context = NULL;
}

clmoe_status run_layer(rig *r) {
    clmoe_status status = clmoe_layer_create(r->context, &r->desc, &r->layer);
    CHECK((status == CLMOE_SUCCESS) == (r->layer != NULL), "a handle of a failed create\n");
    return status;
}

/* Programs stay in a context: each layer gets a new one. */
void fresh_context(rig *r) {
    OK(run_context(r));
}

void undo_layer(rig *r) {
    clmoe_layer_destroy(r->layer);
    r->layer = NULL;
    undo_context(r);
}

/* Gives back the event, if there should be one. */
clmoe_status event_is_right(clmoe_status status, cl_event event) {
    CHECK((status == CLMOE_SUCCESS) == (event != NULL), "an event of a failed call\n");
    if (event)
        clReleaseEvent(event);
    return status;
}

/* ---- Sweeping ------------------------------------------------------------------------------- */

static bool status_is_right(const rig *r, const phase *p, const source *from, clmoe_status status,
                            cl_int code) {
    if (p->traits & MAY_SUCCEED && status == CLMOE_SUCCESS)
        return true;
    if (from == &host_memory)
        return status == CLMOE_OUT_OF_MEMORY ||
               (memory.in_jansson && (status == CLMOE_BAD_FILE || status == CLMOE_SUCCESS));
    return status == code || (status == CLMOE_ENGINE_FAILED && strcmp(r->engine, "clblast") == 0);
}

/* Makes call `nth` fail and checks what is left behind. */
static void fail_call(rig *r, const phase *p, const source *from, unsigned nth, cl_int code,
                      bool lasting) {
    test_note("%s, engine %s, %s, %s: call %u fails%s with %s", r->model, r->engine, p->name,
              from->name, nth, lasting ? " lastingly" : "", clmoe_status_string(code));
    long objects = opencl->live(), blocks = memory.blocks;
    if (p->before)
        p->before(r);
    from->arm(nth, code, lasting);
    clmoe_status status = p->run(r);
    char name[64];
    snprintf(name, sizeof name, "%s", from->failed());
    bool right = status_is_right(r, p, from, status, code);
    from->arm(0, CL_SUCCESS, false);
    CL_OK(clFinish(r->queue));
    CHECK(name[0] != '\0', "the call was not made\n");
    CHECK(right, "%s gives %s: %s\n", name, clmoe_status_string(status), clmoe_last_error());
    if (status == CLMOE_SUCCESS && p->undo) {
        p->undo(r);
        if (p->before)
            p->before(r);
    }
    if (p->again)
        p->again(r);
    check_ok(p->run(r), "once more without a fault", __FILE__, __LINE__);
    CL_OK(clFinish(r->queue));
    if (p->compare)
        p->compare(r);
    if (p->undo)
        p->undo(r);
    CHECK(opencl->live() == objects, "%s leaves %ld objects\n", name, opencl->live() - objects);
    CHECK(memory.blocks == blocks, "%s leaves %ld blocks\n", name, memory.blocks - blocks);
}

bool phase_has_queue(const rig *r, const phase *p) {
    return !(p->traits & NO_QUEUE) || r->queue == test.queue;
}

static unsigned calls_of(rig *r, const phase *p, const source *from) {
    if (p->before)
        p->before(r);
    opencl->arm(0, CL_SUCCESS, false);
    from->arm(0, CL_SUCCESS, false);
    OK(p->run(r));
    unsigned calls = from->calls();
    CHECK(!(p->traits & LIGHT) || opencl->heavy_calls() == 0 || strcmp(r->engine, "clblast") == 0,
          "%s makes %u calls like %s\n", p->name, opencl->heavy_calls(), opencl->heavy());
    /* What comes next writes the same buffers, perhaps through another queue. */
    CL_OK(clFinish(r->queue));
    if (p->undo)
        p->undo(r);
    return calls;
}

void sweep(rig *r, const phase *p, const source *from) {
    unsigned calls = calls_of(r, p, from), faults = 0;
    size_t num_codes = from == &host_memory ? 1 : COUNT_OF(codes);
    bool allocates = strcmp(r->engine, "clblast") == 0;
    CHECK(from != &host_memory || !(p->traits & NO_BLOCKS) || calls == 0 || allocates,
          "%s asks for %u blocks\n", p->name, calls);
    for (unsigned nth = 1; nth <= calls; nth += one_in)
        for (unsigned lasting = 0; lasting < 2; lasting++)
            for (size_t c = 0; c < num_codes; c++)
                if (num_codes == 1 || every_code || (nth / one_in + lasting) % num_codes == c) {
                    fail_call(r, p, from, nth, codes[c], lasting != 0);
                    faults++;
                }
    tried += faults;
    print_message("%s, engine %s, %s, %s: %u calls, %u faults\n", r->model, r->engine, p->name,
                  from->name, calls, faults);
}
