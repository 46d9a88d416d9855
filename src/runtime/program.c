/* Programs: assembled from embedded sources, built once, kept in the context and on disk. */
#include "program.h"
#include "cache.h"
#include "sources.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_FLAGS = 512, MAX_DEVICES = 64 };

struct program_entry {
    program_entry *next;
    cl_program program;
    char key[]; /* "routing/topk.cl -DGROUP=256", with the version of its edit in front */
};

/* What a program is made of. */
typedef struct recipe {
    const char *step, *options;
    const program_edit *edit; /* NULL: none */
} recipe;

/* What is said about a program, passed to the callback when the lock is free. */
typedef struct messages {
    char *build_log;
    char cache_problem[CACHE_PROBLEM_SIZE];
} messages;

/* Sources of one program in order, with the directives between them. */
typedef struct text {
    char *chars;
    size_t length, capacity;
} text;

static clmoe_status text_add(text *to, const char *chars, size_t length) {
    if (to->length + length + 1 > to->capacity) {
        size_t capacity = 2 * (to->length + length + 1);
        char *grown = realloc(to->chars, capacity);
        if (!grown)
            return fail(CLMOE_OUT_OF_MEMORY, "out of memory for a kernel source");
        to->chars = grown;
        to->capacity = capacity;
    }
    memcpy(to->chars + to->length, chars, length);
    to->length += length;
    to->chars[to->length] = '\0';
    return CLMOE_SUCCESS;
}

static clmoe_status text_line_directive(text *to, unsigned line, const char *file) {
    char directive[128];
    int length = snprintf(directive, sizeof directive, "\n#line %u \"cl/%s\"\n", line, file);
    return text_add(to, directive, (size_t)length);
}

/* The text of a file of cl/, or NULL. */
static const char *find_source(const char *name, size_t length) {
    static const char folder[] = "cl/";
    const size_t front = sizeof folder - 1;
    for (const kernel_source *source = kernel_sources; source->name; source++)
        if (strncmp(source->name, folder, front) == 0 &&
            strncmp(source->name + front, name, length) == 0 &&
            source->name[front + length] == '\0')
            return source->text;
    return NULL;
}

static clmoe_status add_source(text *to, const char *name, size_t name_length);

/* The included file's name if `line` is an include directive, and its length. */
static const char *included_name(const char *line, size_t *length) {
    static const char directive[] = "#include \"";
    if (strncmp(line, directive, sizeof directive - 1) != 0)
        return NULL;
    *length = strcspn(line + sizeof directive - 1, "\"\n");
    return line + sizeof directive - 1;
}

/* OpenCL compilers get no include path: includes of embedded files are resolved here. */
static clmoe_status add_source(text *to, const char *name, size_t name_length) {
    clmoe_status status = CLMOE_SUCCESS;
    char file[64];
    unsigned line = 1;
    snprintf(file, sizeof file, "%.*s", (int)name_length, name);
    const char *source = find_source(name, name_length);
    if (!source)
        return fail(CLMOE_BUILD_FAILED, "there is no kernel source cl/%s", file);
    TRY(text_line_directive(to, line, file));
    while (*source) {
        size_t length = strcspn(source, "\n");
        size_t include_length = 0;
        const char *include = included_name(source, &include_length);
        length += source[length] == '\n';
        if (include) {
            TRY(add_source(to, include, include_length));
            TRY(text_line_directive(to, line + 1, file));
        } else {
            TRY(text_add(to, source, length));
        }
        source += length;
        line++;
    }
done:
    return status;
}

static clmoe_status build_log(const clmoe_context *context, cl_program program, char **log) {
    clmoe_status status = CLMOE_SUCCESS;
    size_t bytes = 0;
    TRY(CL(clGetProgramBuildInfo(program, context->device, CL_PROGRAM_BUILD_LOG, 0, NULL, &bytes)));
    *log = calloc(1, bytes + 1);
    if (!*log)
        return fail(CLMOE_OUT_OF_MEMORY, "out of memory for a build log");
    TRY(CL(
        clGetProgramBuildInfo(program, context->device, CL_PROGRAM_BUILD_LOG, bytes, *log, NULL)));
done:
    return status;
}

static clmoe_status add_sources(text *to, const char *step) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(add_source(to, "runtime/types.clh", strlen("runtime/types.clh")));
    TRY(add_source(to, "runtime/group.clh", strlen("runtime/group.clh")));
    TRY(add_source(to, step, strlen(step)));
done:
    return status;
}

/* The driver ran short, as opposed to a source it cannot compile. */
static bool is_shortage(cl_int code) {
    return code == CL_OUT_OF_RESOURCES || code == CL_OUT_OF_HOST_MEMORY ||
           code == CL_MEM_OBJECT_ALLOCATION_FAILURE;
}

/*
 * The binary of a program built for one device, to be freed, with a 0 behind it. Not every driver
 * puts it at the device's place. NULL: the driver gives none.
 */
static clmoe_status binary_of(cl_program program, unsigned char **binary, size_t *size) {
    clmoe_status status = CLMOE_SUCCESS;
    size_t sizes[MAX_DEVICES] = {0}, i = 0;
    unsigned char *binaries[MAX_DEVICES] = {NULL};
    *binary = NULL;
    TRY(CL(clGetProgramInfo(program, CL_PROGRAM_BINARY_SIZES, sizeof sizes, sizes, NULL)));
    while (i < MAX_DEVICES - 1 && sizes[i] == 0)
        i++;
    if (sizes[i] == 0)
        return CLMOE_SUCCESS;
    binaries[i] = calloc(1, sizes[i] + 1);
    if (!binaries[i])
        return fail(CLMOE_OUT_OF_MEMORY, "out of memory for a program's binary");
    *binary = binaries[i];
    *size = sizes[i];
    TRY(CL(clGetProgramInfo(program, CL_PROGRAM_BINARIES, sizeof binaries, binaries, NULL)));
done:
    if (status != CLMOE_SUCCESS || !binaries[i]) {
        free(*binary);
        *binary = NULL;
    }
    return status;
}

/* A program from a binary of the context's device; NULL with the driver's code where it fails. */
static cl_program from_binary(const clmoe_context *context, const void *binary, size_t size,
                              const char *flags, cl_int *code) {
    const unsigned char *bytes = binary;
    cl_program program =
        clCreateProgramWithBinary(context->cl, 1, &context->device, &size, &bytes, NULL, code);
    if (*code == CL_SUCCESS)
        *code = clBuildProgram(program, 1, &context->device, flags, NULL, NULL);
    if (*code == CL_SUCCESS || !program)
        return program;
    clReleaseProgram(program);
    return NULL;
}

/* Puts the edited program in place of *program. */
static clmoe_status apply_edit(const clmoe_context *context, const recipe *what, const char *flags,
                               cl_program *program) {
    clmoe_status status = CLMOE_SUCCESS;
    size_t size = 0;
    cl_int code = CL_SUCCESS;
    char *edited = NULL;
    unsigned char *binary = NULL;
    status = binary_of(*program, &binary, &size);
    if (status == CLMOE_OUT_OF_MEMORY || is_shortage(status))
        goto done;
    if (binary)
        TRY(what->edit->apply((const char *)binary, &edited));
    if (!edited) {
        status =
            fail(CLMOE_BUILD_FAILED, "cl/%s: the driver's binary is no text to edit", what->step);
        goto done;
    }
    cl_program other = from_binary(context, edited, strlen(edited) + 1, flags, &code);
    if (is_shortage(code))
        TRY(clmoe_cl_check(code, "clBuildProgram"));
    if (!other) {
        status = fail(CLMOE_BUILD_FAILED, "cl/%s did not build after its edit: %s (%d)", what->step,
                      clmoe_status_string(code), (int)code);
        goto done;
    }
    clReleaseProgram(*program);
    *program = other;
done:
    free(binary);
    free(edited);
    return status;
}

/* Compiles; *log gets the compiler's words, if it had any. */
static clmoe_status compile(const clmoe_context *context, const recipe *what, const char *flags,
                            const text *source, cl_program *out, char **log) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_int code = CL_SUCCESS;
    cl_program program =
        clCreateProgramWithSource(context->cl, 1, (const char **)&source->chars, NULL, &code);
    TRY(clmoe_cl_check(code, "clCreateProgramWithSource"));
    code = clBuildProgram(program, 1, &context->device, flags, NULL, NULL);
    if (is_shortage(code))
        TRY(clmoe_cl_check(code, "clBuildProgram"));
    TRY(build_log(context, program, log));
    if (code != CL_SUCCESS) {
        status = fail(CLMOE_BUILD_FAILED, "cl/%s did not build with \"%s\": %s (%d): %.256s",
                      what->step, flags, clmoe_status_string(code), (int)code, *log);
        goto done;
    }
    if (what->edit)
        TRY(apply_edit(context, what, flags, &program));
    *out = program;
    program = NULL;
done:
    if (program)
        clReleaseProgram(program);
    return status;
}

/* ---- The disk cache: its troubles are warnings, never errors ------------------------------- */

static clmoe_status add_fact(text *key, cl_device_id device, cl_device_info what) {
    clmoe_status status = CLMOE_SUCCESS;
    char *fact = NULL;
    TRY(device_info_text(device, what, &fact));
    TRY(text_add(key, fact, strlen(fact)));
    TRY(text_add(key, "\n", 1));
done:
    free(fact);
    return status;
}

static clmoe_status add_platform_fact(text *key, cl_platform_id platform, cl_platform_info what) {
    clmoe_status status = CLMOE_SUCCESS;
    char *fact = NULL;
    size_t bytes = 0;
    TRY(CL(clGetPlatformInfo(platform, what, 0, NULL, &bytes)));
    fact = calloc(1, bytes + 2);
    if (!fact)
        return fail(CLMOE_OUT_OF_MEMORY, "out of memory for a platform's description");
    TRY(CL(clGetPlatformInfo(platform, what, bytes, fact, NULL)));
    fact[strlen(fact)] = '\n';
    TRY(text_add(key, fact, strlen(fact)));
done:
    free(fact);
    return status;
}

/* Lines with the versions of the device, the driver and the platform. */
static clmoe_status add_versions(text *key, cl_device_id device) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_platform_id platform = NULL;
    TRY(CL(clGetDeviceInfo(device, CL_DEVICE_PLATFORM, sizeof platform, (void *)&platform, NULL)));
    TRY(add_fact(key, device, CL_DEVICE_NAME));
    TRY(add_fact(key, device, CL_DEVICE_VERSION));
    TRY(add_fact(key, device, CL_DRIVER_VERSION));
    TRY(add_platform_fact(key, platform, CL_PLATFORM_NAME));
    TRY(add_platform_fact(key, platform, CL_PLATFORM_VERSION));
done:
    return status;
}

/* All that a binary depends on, as text. */
static bool cache_key(const clmoe_context *context, const recipe *what, const char *flags,
                      const text *source, text *key, char problem[CACHE_PROBLEM_SIZE]) {
    char head[64];
    const error_sentence kept = error_keep();
    const int length = snprintf(head, sizeof head, "clmoe %d %.32s\n", CACHE_FORMAT,
                                what->edit ? what->edit->version : "");
    if (text_add(key, head, (size_t)length) != CLMOE_SUCCESS ||
        add_versions(key, context->device) != CLMOE_SUCCESS) {
        error_put_back(&kept);
        cache_complain(problem, context->cache_dir,
                       "is not used: the driver does not say its version");
        return false;
    }
    if (strstr(key->chars, "\nPortable Computing Language\n")) {
        /* 6.0 ends the process where LLVM gives up on a kernel of the binary that nobody runs. */
        cache_complain(problem, context->cache_dir,
                       "is not used: PoCL keeps compiled kernels itself");
        return false;
    }
    return text_add(key, flags, strlen(flags)) == CLMOE_SUCCESS &&
           text_add(key, "\n", 1) == CLMOE_SUCCESS &&
           text_add(key, source->chars, source->length) == CLMOE_SUCCESS;
}

/* The program stored under `key`, or NULL. */
static cl_program load(const clmoe_context *context, const char *flags, const text *key,
                       char problem[CACHE_PROBLEM_SIZE]) {
    size_t size = 0;
    cl_int code = CL_SUCCESS;
    void *binary = cache_read(context->cache_dir, key->chars, key->length, &size, problem);
    if (!binary)
        return NULL;
    cl_program program = from_binary(context, binary, size, flags, &code);
    free(binary);
    if (!program)
        cache_complain(problem, context->cache_dir, "has a program that the driver refused with %s",
                       clmoe_status_string(code));
    return program;
}

static void store(const clmoe_context *context, cl_program program, const text *key,
                  char problem[CACHE_PROBLEM_SIZE]) {
    size_t size = 0;
    unsigned char *binary = NULL;
    const error_sentence kept = error_keep();
    if (binary_of(program, &binary, &size) != CLMOE_SUCCESS)
        error_put_back(&kept);
    if (binary)
        cache_write(context->cache_dir, key->chars, key->length, binary, size, problem);
    else
        cache_complain(problem, context->cache_dir, "is not used: the driver gives no binary");
    free(binary);
}

/* ---- Programs of a context ------------------------------------------------------------------ */

/*
 * Kernels of Intel's GPUs reach buffers of up to 4 GiB unless they are built with this option,
 * which other drivers of such GPUs refuse.
 */
static const char *large_buffers_flag(clmoe_context *context) {
    static const char flag[] = "-cl-intel-greater-than-4GB-buffer-required ";
    static const char *source = "__kernel void nothing(__global int *p) { *p = 0; }";
    if (!context->info.is_intel_gpu)
        return "";
    if (context->large_buffers == LARGE_BUFFERS_UNKNOWN) {
        cl_program program = clCreateProgramWithSource(context->cl, 1, &source, NULL, NULL);
        context->large_buffers = LARGE_BUFFERS_ANYWAY;
        if (program && clBuildProgram(program, 1, &context->device, flag, NULL, NULL) == CL_SUCCESS)
            context->large_buffers = LARGE_BUFFERS_ASK;
        if (program)
            clReleaseProgram(program);
    }
    return context->large_buffers == LARGE_BUFFERS_ASK ? flag : "";
}

/* Loads the program from disk, or compiles and stores it. */
static clmoe_status build(clmoe_context *context, const recipe *what, cl_program *out,
                          messages *said) {
    clmoe_status status = CLMOE_SUCCESS;
    text source = {0}, key = {0};
    char flags[MAX_FLAGS];
    if (snprintf(flags, sizeof flags, "-cl-std=CL1.2 %s%s", large_buffers_flag(context),
                 what->options) >= (int)sizeof flags)
        return fail(CLMOE_BUILD_FAILED, "cl/%s: build options longer than %zu: %s", what->step,
                    sizeof flags, what->options);
    TRY(add_sources(&source, what->step));
    bool cached =
        context->cache_dir && cache_key(context, what, flags, &source, &key, said->cache_problem);
    if (cached)
        *out = load(context, flags, &key, said->cache_problem);
    if (!*out) {
        TRY(compile(context, what, flags, &source, out, &said->build_log));
        if (cached)
            store(context, *out, &key, said->cache_problem);
    }
done:
    free(source.chars);
    free(key.chars);
    return status;
}

static program_entry *find_program(program_entry *list, const char *key) {
    while (list && strcmp(list->key, key) != 0)
        list = list->next;
    return list;
}

/* Finds or builds under the lock, so that a program is built once however many threads ask. */
static clmoe_status get_program(clmoe_context *context, const recipe *what, cl_program *program,
                                messages *said) {
    clmoe_status status = CLMOE_SUCCESS;
    const char *version = what->edit ? what->edit->version : "";
    size_t key_bytes = strlen(version) + strlen(what->step) + strlen(what->options) + 3;
    program_entry *entry = calloc(1, sizeof *entry + key_bytes);
    if (!entry)
        return fail(CLMOE_OUT_OF_MEMORY, "out of memory for a program");
    snprintf(entry->key, key_bytes, "%s %s %s", version, what->step, what->options);

    pthread_mutex_lock(&context->lock);
    program_entry *known = find_program(context->programs, entry->key);
    if (known) {
        *program = known->program;
    } else {
        status = build(context, what, &entry->program, said);
        if (status == CLMOE_SUCCESS) {
            *program = entry->program;
            entry->next = context->programs;
            context->programs = entry;
            entry = NULL;
        }
    }
    if (context->cache_warned)
        said->cache_problem[0] = '\0';
    context->cache_warned |= said->cache_problem[0] != '\0';
    pthread_mutex_unlock(&context->lock);
    free(entry);
    return status;
}

static void pass_on(const clmoe_context *context, const char *message) {
    if (context->options.log && message && message[strspn(message, " \n")] != '\0')
        context->options.log(message, context->options.log_user);
}

/* What a driver may add to a kernel's local memory for itself: NVIDIA's does to align an array. */
enum { LOCAL_SLACK = 128 };

/*
 * A device may have room for fewer work-items of a kernel than of any: its registers and local
 * memory are shared by them.
 */
static clmoe_status check_kernel(const clmoe_context *context, cl_kernel kernel, const char *name) {
    clmoe_status status = CLMOE_SUCCESS;
    size_t needs[3] = {0}, most = 0;
    cl_ulong local_bytes = 0;
    cl_device_id device = context->device;
    TRY(CL(clGetKernelWorkGroupInfo(kernel, device, CL_KERNEL_COMPILE_WORK_GROUP_SIZE, sizeof needs,
                                    needs, NULL)));
    TRY(CL(clGetKernelWorkGroupInfo(kernel, device, CL_KERNEL_WORK_GROUP_SIZE, sizeof most, &most,
                                    NULL)));
    TRY(CL(clGetKernelWorkGroupInfo(kernel, device, CL_KERNEL_LOCAL_MEM_SIZE, sizeof local_bytes,
                                    &local_bytes, NULL)));
    /* NVIDIA's drivers say 256 of every kernel, and run those that are compiled for more. */
    if (needs[0] * needs[1] * needs[2] > most && context->info.nv_capability == 0)
        return fail(CLMOE_UNSUPPORTED,
                    "kernel %s needs groups of %zu work-items, but device %.64s allows it %zu",
                    name, needs[0] * needs[1] * needs[2], context->info.name, most);
    if (local_bytes > context->info.local_mem_bytes + LOCAL_SLACK)
        return fail(CLMOE_UNSUPPORTED,
                    "kernel %s needs %llu bytes of local memory, but device %.64s has %llu", name,
                    (unsigned long long)local_bytes, context->info.name,
                    (unsigned long long)context->info.local_mem_bytes);
done:
    return status;
}

clmoe_status program_kernel(clmoe_context *context, const char *step, const char *options,
                            const char *name, cl_kernel *kernel) {
    return program_kernel_edited(context, step, options, NULL, name, kernel);
}

clmoe_status program_kernel_edited(clmoe_context *context, const char *step, const char *options,
                                   const program_edit *edit, const char *name, cl_kernel *kernel) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_int code = CL_SUCCESS;
    cl_program program = NULL;
    messages said = {0};
    char file[64];
    snprintf(file, sizeof file, "%s.cl", step);
    status = get_program(context, &(recipe){file, options ? options : "", edit}, &program, &said);
    pass_on(context, said.cache_problem);
    pass_on(context, said.build_log);
    TRY(status);
    *kernel = clCreateKernel(program, name, &code);
    TRY(clmoe_cl_check(code, "clCreateKernel"));
    status = check_kernel(context, *kernel, name);
    if (status != CLMOE_SUCCESS)
        kernel_release(kernel);
done:
    free(said.build_log);
    return status;
}

void programs_release(clmoe_context *context) {
    while (context->programs) {
        program_entry *entry = context->programs;
        context->programs = entry->next;
        clReleaseProgram(entry->program);
        free(entry);
    }
}

void kernel_release(cl_kernel *kernel) {
    if (*kernel)
        clReleaseKernel(*kernel);
    *kernel = NULL;
}
