/* Programs: assembled from embedded sources, built once, kept in the context. */
#include "program.h"
#include "sources.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct program_entry {
    program_entry *next;
    cl_program program;
    char key[]; /* "topk.cl -DGROUP=256" */
};

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

static const char *find_source(const char *name, size_t length) {
    for (const kernel_source *source = kernel_sources; source->name; source++)
        if (strncmp(source->name, name, length) == 0 && source->name[length] == '\0')
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

/* Builds; *log gets the compiler's words, if it had any. */
static clmoe_status build(const clmoe_context *context, const char *step, const char *options,
                          cl_program *out, char **log) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_int code = CL_SUCCESS;
    cl_program program = NULL;
    text source = {0};
    char flags[512];
    snprintf(flags, sizeof flags, "-cl-std=CL1.2 %s", options);
    TRY(add_source(&source, "types.clh", strlen("types.clh")));
    TRY(add_source(&source, "group.clh", strlen("group.clh")));
    TRY(add_source(&source, step, strlen(step)));
    program = clCreateProgramWithSource(context->cl, 1, (const char **)&source.chars, NULL, &code);
    TRY(clmoe_cl_check(code, "clCreateProgramWithSource"));
    code = clBuildProgram(program, 1, &context->device, flags, NULL, NULL);
    TRY(build_log(context, program, log));
    if (code != CL_SUCCESS) {
        status = fail(CLMOE_BUILD_FAILED, "cl/%s did not build with \"%s\": %s (%d): %.256s", step,
                      flags, clmoe_status_string(code), (int)code, *log);
        goto done;
    }
    *out = program;
    program = NULL;
done:
    if (program)
        clReleaseProgram(program);
    free(source.chars);
    return status;
}

static program_entry *find_program(program_entry *list, const char *key) {
    while (list && strcmp(list->key, key) != 0)
        list = list->next;
    return list;
}

/* Finds or builds under the lock, so that a program is built once however many threads ask. */
static clmoe_status get_program(clmoe_context *context, const char *step, const char *options,
                                cl_program *program, char **log) {
    clmoe_status status = CLMOE_SUCCESS;
    size_t key_bytes = strlen(step) + strlen(options) + 2;
    program_entry *entry = calloc(1, sizeof *entry + key_bytes);
    if (!entry)
        return fail(CLMOE_OUT_OF_MEMORY, "out of memory for a program");
    snprintf(entry->key, key_bytes, "%s %s", step, options);

    pthread_mutex_lock(&context->lock);
    program_entry *known = find_program(context->programs, entry->key);
    if (known) {
        *program = known->program;
    } else {
        status = build(context, step, options, &entry->program, log);
        if (status == CLMOE_SUCCESS) {
            *program = entry->program;
            entry->next = context->programs;
            context->programs = entry;
            entry = NULL;
        }
    }
    pthread_mutex_unlock(&context->lock);
    free(entry);
    return status;
}

clmoe_status program_kernel(clmoe_context *context, const char *step, const char *options,
                            const char *name, cl_kernel *kernel) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_int code = CL_SUCCESS;
    cl_program program = NULL;
    char *log = NULL;
    char file[64];
    snprintf(file, sizeof file, "%s.cl", step);
    status = get_program(context, file, options ? options : "", &program, &log);
    if (context->options.log && log && log[strspn(log, " \n")] != '\0')
        context->options.log(log, context->options.log_user);
    TRY(status);
    *kernel = clCreateKernel(program, name, &code);
    TRY(clmoe_cl_check(code, "clCreateKernel"));
done:
    free(log);
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
