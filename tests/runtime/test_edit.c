/*
 * Edited programs: what of an edit, a driver or the disk cache may go wrong, on the device of
 * tests/native, whose binaries are text. The linker sends here what the library asks of a driver.
 */
#include "runtime/program.h" /* before support.h: cmocka has a macro fail() */

#include "support_files.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- The driver ----------------------------------------------------------------------------- */

/* What it says instead of its own answer, and how often it was asked to compile a source. */
static struct {
    cl_int sizes, binaries, create, build; /* codes of the calls; build: of a binary */
    bool gives_none;                       /* no binary: a size of 0 */
    int compiled, loaded;
    cl_program from_binary;
} driver;

cl_int __real_clGetProgramInfo(cl_program program, cl_program_info what, size_t size, void *value,
                               size_t *bytes);
cl_int __wrap_clGetProgramInfo(cl_program program, cl_program_info what, size_t size, void *value,
                               size_t *bytes);
cl_int __real_clBuildProgram(cl_program program, cl_uint count, const cl_device_id *devices,
                             const char *options, void(CL_CALLBACK *notify)(cl_program, void *),
                             void *user);
cl_int __wrap_clBuildProgram(cl_program program, cl_uint count, const cl_device_id *devices,
                             const char *options, void(CL_CALLBACK *notify)(cl_program, void *),
                             void *user);
cl_program __real_clCreateProgramWithBinary(cl_context context, cl_uint count,
                                            const cl_device_id *devices, const size_t *lengths,
                                            const unsigned char **binaries, cl_int *states,
                                            cl_int *code_ret);
cl_program __wrap_clCreateProgramWithBinary(cl_context context, cl_uint count,
                                            const cl_device_id *devices, const size_t *lengths,
                                            const unsigned char **binaries, cl_int *states,
                                            cl_int *code_ret);

cl_int __wrap_clGetProgramInfo(cl_program program, cl_program_info what, size_t size, void *value,
                               size_t *bytes) {
    const cl_int code = what == CL_PROGRAM_BINARY_SIZES ? driver.sizes : driver.binaries;
    if (what != CL_PROGRAM_BINARY_SIZES && what != CL_PROGRAM_BINARIES)
        return __real_clGetProgramInfo(program, what, size, value, bytes);
    if (code != CL_SUCCESS)
        return code;
    if (driver.gives_none)
        return CL_SUCCESS;
    return __real_clGetProgramInfo(program, what, size, value, bytes);
}

cl_int __wrap_clBuildProgram(cl_program program, cl_uint count, const cl_device_id *devices,
                             const char *options, void(CL_CALLBACK *notify)(cl_program, void *),
                             void *user) {
    const bool loaded = program == driver.from_binary;
    driver.loaded += loaded;
    driver.compiled += !loaded;
    driver.from_binary = NULL; /* another may come to lie there */
    if (loaded && driver.build != CL_SUCCESS)
        return driver.build;
    return __real_clBuildProgram(program, count, devices, options, notify, user);
}

cl_program __wrap_clCreateProgramWithBinary(cl_context context, cl_uint count,
                                            const cl_device_id *devices, const size_t *lengths,
                                            const unsigned char **binaries, cl_int *states,
                                            cl_int *code_ret) {
    if (driver.create != CL_SUCCESS) {
        *code_ret = driver.create;
        return NULL;
    }
    driver.from_binary = __real_clCreateProgramWithBinary(context, count, devices, lengths,
                                                          binaries, states, code_ret);
    return driver.from_binary;
}

/* ---- Edits ---------------------------------------------------------------------------------- */

static int edited; /* how often one was asked */

static char *with(const char *text, const char *more) {
    char *copy = malloc(strlen(text) + strlen(more) + 1);
    assert_non_null(copy);
    strcpy(copy, text);
    return strcat(copy, more);
}

static clmoe_status add_a_word(const char *text, char **to) {
    edited++;
    *to = with(text, "\n// a word\n");
    return CLMOE_SUCCESS;
}

static clmoe_status add_another(const char *text, char **to) {
    edited++;
    *to = with(text, "\n// another\n");
    return CLMOE_SUCCESS;
}

static clmoe_status refuse(const char *text, char **to) {
    (void)text;
    edited++;
    *to = NULL;
    return CLMOE_SUCCESS;
}

static clmoe_status starve(const char *text, char **to) {
    (void)text;
    edited++;
    *to = NULL;
    return CLMOE_OUT_OF_MEMORY;
}

/* Text that is none of the device's. */
static clmoe_status spoil(const char *text, char **to) {
    (void)text;
    edited++;
    *to = with("junk", "");
    return CLMOE_SUCCESS;
}

static const program_edit first = {"1", add_a_word}, second = {"2", add_another};
static const program_edit refusing = {"3", refuse}, starving = {"4", starve},
                          spoiling = {"5", spoil};

/* ---- Programs ------------------------------------------------------------------------------- */

static int warnings;

static void count_warnings(const char *message, void *user) {
    (void)user;
    warnings += strncmp(message, "program cache: ", strlen("program cache: ")) == 0;
}

static clmoe_context *new_context(const char *directory) {
    clmoe_context *context = NULL;
    clmoe_context_options options;
    clmoe_context_options_init(&options);
    options.log = count_warnings;
    options.cache_dir = directory;
    OK(clmoe_context_create(test.context, test.device, &options, &context));
    return context;
}

static clmoe_status make(clmoe_context *context, const program_edit *edit, cl_kernel *kernel) {
    *kernel = NULL;
    driver.compiled = driver.loaded = edited = warnings = 0;
    return program_kernel_edited(context, "dispatch/dispatch", "-DGROUP=1 -DX=f32", edit,
                                 "dispatch_rows", kernel);
}

/* The text of a kernel's program. */
static const char *text_of(cl_kernel kernel) {
    cl_program program = NULL;
    size_t size = 0;
    CL_OK(clGetKernelInfo(kernel, CL_KERNEL_PROGRAM, sizeof program, &program, NULL));
    CL_OK(__real_clGetProgramInfo(program, CL_PROGRAM_BINARY_SIZES, sizeof size, &size, NULL));
    char *texts[] = {HOST(char, size + 1)};
    CL_OK(__real_clGetProgramInfo(program, CL_PROGRAM_BINARIES, sizeof texts, texts, NULL));
    return texts[0];
}

/* Whether the program's text ends with that; empty: with what no edit added. */
static void ends_with(cl_kernel kernel, const char *word) {
    const char *text = text_of(kernel);
    const char *none[] = {"// a word\n", "// another\n"};
    for (size_t i = 0; i < COUNT_OF(none); i++) {
        const char *at = strstr(text, none[i]);
        CHECK((at != NULL) == (strcmp(none[i], word) == 0), "%s: it ends with %s\n", word,
              text + strlen(text) - 20);
        CHECK(!at || strcmp(at, none[i]) == 0, "edited twice: %s\n", at);
    }
}

/* A kernel of a context, made by so many compilations, loads of binaries and edits. */
static void makes(clmoe_context *context, const program_edit *edit, const char *word,
                  const int counts[3]) {
    cl_kernel kernel = NULL;
    OK(make(context, edit, &kernel));
    CHECK(driver.compiled == counts[0] && driver.loaded == counts[1] && edited == counts[2],
          "%d compiled, %d loaded, %d edited\n", driver.compiled, driver.loaded, edited);
    CHECK(warnings == 0, "%d warnings\n", warnings);
    ends_with(kernel, word);
    kernel_release(&kernel);
}

static const int compiled_alone[] = {1, 0, 0}, compiled_and_edited[] = {1, 1, 1};
static const int from_disk[] = {0, 1, 0}, from_context[] = {0, 0, 0};

static const char *new_directory(void) {
    static int count;
    char name[32];
    snprintf(name, sizeof name, "edit-%d", count++);
    return temp_path(name);
}

static int files_in(const char *directory) {
    int count = 0;
    DIR *list = opendir(directory);
    if (!list)
        return 0;
    for (struct dirent *entry; (entry = readdir(list)) != NULL;)
        count += entry->d_name[0] != '.';
    closedir(list);
    return count;
}

/* ---- What goes wrong ------------------------------------------------------------------------ */

/* Nothing is kept of it, neither in the context nor on disk: the next one is as if it had not been.
 */
static void fails(const program_edit *edit, clmoe_status want, const char *says) {
    const char *directory = new_directory();
    clmoe_context *context = new_context(directory);
    cl_kernel kernel = NULL;
    clmoe_status status = make(context, edit, &kernel);
    check_error(status, want, says, says);
    assert_null(kernel);
    assert_int_equal(files_in(directory), 0);
    memset(&driver, 0, sizeof driver);
    makes(context, &first, "// a word\n", compiled_and_edited);
    clmoe_context_destroy(context);
}

static void no_edit(void **state) {
    (void)state;
    test_case("an edit that knows no such text");
    fails(&refusing, CLMOE_BUILD_FAILED, "no text to edit");
    test_case("an edit without memory");
    fails(&starving, CLMOE_OUT_OF_MEMORY, "");
}

static void no_binary(void **state) {
    (void)state;
    test_case("a driver that gives no binary");
    driver.gives_none = true;
    fails(&first, CLMOE_BUILD_FAILED, "no text to edit");
    test_case("a driver that refuses to say a size");
    driver.sizes = CL_INVALID_VALUE;
    fails(&first, CLMOE_BUILD_FAILED, "no text to edit");
    test_case("a driver that refuses the binary");
    driver.binaries = CL_INVALID_PROGRAM;
    fails(&first, CLMOE_BUILD_FAILED, "no text to edit");
    test_case("a driver that is short of memory");
    driver.sizes = CL_OUT_OF_HOST_MEMORY;
    fails(&first, CL_OUT_OF_HOST_MEMORY, "clGetProgramInfo");
    driver.binaries = CL_OUT_OF_RESOURCES;
    fails(&first, CL_OUT_OF_RESOURCES, "clGetProgramInfo");
}

static void refused_text(void **state) {
    (void)state;
    test_case("text that is no program");
    fails(&spoiling, CLMOE_BUILD_FAILED, "after its edit");
    test_case("text that the driver does not take");
    driver.create = CL_INVALID_BINARY;
    fails(&first, CLMOE_BUILD_FAILED, "CL_INVALID_BINARY");
    test_case("text that the driver does not build");
    driver.build = CL_BUILD_PROGRAM_FAILURE;
    fails(&first, CLMOE_BUILD_FAILED, "CL_BUILD_PROGRAM_FAILURE");
    test_case("a driver that is short of memory");
    driver.create = CL_OUT_OF_HOST_MEMORY;
    fails(&first, CL_OUT_OF_HOST_MEMORY, "CL_OUT_OF_HOST_MEMORY");
    driver.build = CL_OUT_OF_RESOURCES;
    fails(&first, CL_OUT_OF_RESOURCES, "CL_OUT_OF_RESOURCES");
}

/* ---- What is found again -------------------------------------------------------------------- */

/* Of one source and its options: the plain program, and each edit's. */
static void programs_of_a_context(void **state) {
    (void)state;
    test_case("a context's programs");
    clmoe_context *context = new_context(NULL);
    for (int turn = 0; turn < 2; turn++) {
        makes(context, NULL, "", turn ? from_context : compiled_alone);
        makes(context, &first, "// a word\n", turn ? from_context : compiled_and_edited);
        makes(context, &second, "// another\n", turn ? from_context : compiled_and_edited);
    }
    clmoe_context_destroy(context);
}

/* Each in a context of its own. */
static void makes_once(const char *directory, const program_edit *edit, const char *word,
                       const int counts[3]) {
    clmoe_context *context = new_context(directory);
    makes(context, edit, word, counts);
    clmoe_context_destroy(context);
}

static void programs_on_disk(void **state) {
    (void)state;
    const char *directory = new_directory();
    test_case("programs on disk");
    makes_once(directory, NULL, "", compiled_alone);
    makes_once(directory, &first, "// a word\n", compiled_and_edited);
    assert_int_equal(files_in(directory), 2);
    makes_once(directory, &second, "// another\n", compiled_and_edited);
    assert_int_equal(files_in(directory), 3);
    for (int turn = 0; turn < 2; turn++) {
        makes_once(directory, &second, "// another\n", from_disk);
        makes_once(directory, &first, "// a word\n", from_disk);
        makes_once(directory, NULL, "", from_disk);
    }
    assert_int_equal(files_in(directory), 3);
    /* Another version of the same edit. */
    const program_edit newer = {"1, newer", add_another};
    makes_once(directory, &newer, "// another\n", compiled_and_edited);
    assert_int_equal(files_in(directory), 4);
}

/* The edited text on disk that the driver no longer takes: a warning, and it is made anew. */
static void refused_from_disk(void **state) {
    (void)state;
    const char *directory = new_directory();
    cl_kernel kernel = NULL;
    test_case("a program on disk that is refused");
    makes_once(directory, &first, "// a word\n", compiled_and_edited);
    clmoe_context *context = new_context(directory);
    driver.build = CL_INVALID_BINARY;
    check_error(make(context, &first, &kernel), CLMOE_BUILD_FAILED, "after its edit", "");
    assert_int_equal(driver.compiled, 1);
    assert_int_equal(driver.loaded, 2);
    assert_int_equal(warnings, 1);
    driver.build = CL_SUCCESS;
    makes(context, &first, "// a word\n", from_disk);
    clmoe_context_destroy(context);
}

static int setup(void **state) {
    return files_setup(state) || support_setup(state);
}

static int teardown(void **state) {
    return files_teardown(state) | support_teardown(state);
}

int main(void) {
    const struct CMUnitTest tests[] = {TEST(no_edit),          TEST(no_binary),
                                       TEST(refused_text),     TEST(programs_of_a_context),
                                       TEST(programs_on_disk), TEST(refused_from_disk)};
    support_filter();
    return cmocka_run_group_tests(tests, setup, teardown);
}
