/*
 * The disk cache of programs: what is found again, what is refused, and that no trouble with files
 * is ever more than one warning. Usage: test_cache [child DIRECTORY]
 */
#include "layer.h"
#include "runtime/cache.h"
#include "runtime/program.h"
#include "support_files.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

static const char *own_path;

/* ---- Directories ----------------------------------------------------------------------------- */

/* A path in the temporary directory where nothing is yet. */
static const char *new_path(void) {
    static int count;
    char name[32];
    snprintf(name, sizeof name, "cache-%d", count++);
    return temp_path(name);
}

/* The number of entries, and the path of the last one; -1 if it cannot be listed. */
static int list_directory(const char *directory, char last[512]) {
    int count = 0;
    DIR *list = opendir(directory);
    if (!list)
        return -1;
    for (struct dirent *entry; (entry = readdir(list)) != NULL;) {
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
            continue;
        count++;
        if (last)
            snprintf(last, 512, "%s/%s", directory, entry->d_name);
    }
    closedir(list);
    return count;
}

/* The only file of a directory. */
static void only_file(const char *directory, char path[512]) {
    assert_int_equal(list_directory(directory, path), 1);
}

static mode_t mode_of(const char *path) {
    struct stat info;
    assert_int_equal(lstat(path, &info), 0);
    return info.st_mode;
}

static size_t size_of(const char *path) {
    struct stat info;
    assert_int_equal(lstat(path, &info), 0);
    return (size_t)info.st_size;
}

/* ---- Files ----------------------------------------------------------------------------------- */

static const char key[] = "a device\na driver\n-DGROUP=1\n__kernel void nothing() {}\n";
static const char binary[] = "\0binary of a program, \xff\0 and more of it";

typedef struct problem {
    char text[CACHE_PROBLEM_SIZE];
} problem;

static void store_in(const char *directory, problem *p) {
    p->text[0] = '\0';
    cache_write(directory, key, sizeof key, binary, sizeof binary, p->text);
}

static void store_cleanly(const char *directory) {
    problem p;
    store_in(directory, &p);
    CHECK(p.text[0] == '\0', "%s\n", p.text);
}

/* Whether the binary is there; any other result fails the test. */
static bool found(const char *directory, problem *p) {
    size_t size = 0;
    p->text[0] = '\0';
    void *got = cache_read(directory, key, sizeof key, &size, p->text);
    if (got) {
        assert_int_equal(size, sizeof binary);
        assert_memory_equal(got, binary, sizeof binary);
        CHECK(p->text[0] == '\0', "%s\n", p->text);
    }
    free(got);
    return got != NULL;
}

static void check_found(const char *directory) {
    problem p;
    CHECK(found(directory, &p), "not found: %s\n", p.text);
}

/* Refused with a sentence that names the path, then replaced and found. */
static void check_replaced(const char *directory, const char *path) {
    problem p;
    CHECK(!found(directory, &p), "%s was taken\n", path);
    CHECK(strstr(p.text, path) != NULL, "\"%s\" does not name %s\n", p.text, path);
    store_cleanly(directory);
    check_found(directory);
    assert_true(S_ISREG(mode_of(path)));
    assert_int_equal(list_directory(directory, NULL), 1);
}

static void test_found_again(void **state) {
    (void)state;
    const char *directory = new_path();
    const char other[] = "another key";
    char path[512], first[512];
    problem p = {""};
    size_t size;
    test_case("found again");
    assert_false(found(directory, &p));
    assert_string_equal(p.text, "");
    assert_int_equal(list_directory(directory, NULL), -1);
    store_cleanly(directory);
    check_found(directory);
    only_file(directory, path);
    assert_int_equal(mode_of(directory), S_IFDIR | 0700);
    assert_int_equal(mode_of(path), S_IFREG | 0600);

    assert_null(cache_read(directory, other, sizeof other, &size, p.text));
    assert_null(cache_read(directory, key, sizeof key - 1, &size, p.text));
    assert_string_equal(p.text, "");
    store_cleanly(directory);
    only_file(directory, first);
    assert_string_equal(first, path);
    cache_write(directory, other, sizeof other, other, sizeof other, p.text);
    assert_string_equal(p.text, "");
    assert_int_equal(list_directory(directory, NULL), 2);
    check_found(directory);
}

static void test_every_damaged_byte(void **state) {
    (void)state;
    const char *directory = new_path();
    char path[512];
    problem p;
    test_case("damaged bytes");
    store_cleanly(directory);
    only_file(directory, path);
    size_t size = size_of(path);
    char *content = read_text(path);
    for (size_t i = 0; i < size; i++)
        for (int bit = 0; bit < 8; bit++) {
            content[i] = (char)(content[i] ^ 1 << bit);
            write_bytes(path, content, size);
            CHECK(!found(directory, &p), "bit %d of byte %zu of %zu\n", bit, i, size);
            CHECK(strstr(p.text, path) != NULL, "no sentence for byte %zu\n", i);
            content[i] = (char)(content[i] ^ 1 << bit);
        }
    for (size_t length = 0; length < size; length++) {
        write_bytes(path, content, length);
        CHECK(!found(directory, &p), "%zu bytes of %zu\n", length, size);
    }
    content[size] = '\0';
    write_bytes(path, content, size + 1);
    CHECK(!found(directory, &p), "one byte more than %zu\n", size);
    check_replaced(directory, path);
    free(content);
}

/* A file of another key under this key's name: what a collision of two hashes would be. */
static void test_other_key(void **state) {
    (void)state;
    const char *directory = new_path();
    char path[512], other_path[512];
    char other[sizeof key];
    problem p = {""};
    test_case("another key's file");
    memcpy(other, key, sizeof key);
    other[5] ^= 1;
    store_cleanly(directory);
    only_file(directory, path);
    assert_int_equal(unlink(path), 0);
    cache_write(directory, other, sizeof other, binary, sizeof binary, p.text);
    only_file(directory, other_path);
    assert_int_equal(rename(other_path, path), 0);
    check_replaced(directory, path);
}

static void test_foreign_files(void **state) {
    (void)state;
    const char *directory = new_path();
    char path[512];
    const char *elsewhere = temp_path("elsewhere");
    problem p;
    store_cleanly(directory);
    only_file(directory, path);

    test_case("a symbolic link to the right file");
    assert_int_equal(rename(path, elsewhere), 0);
    assert_int_equal(symlink(elsewhere, path), 0);
    check_replaced(directory, path);
    test_case("a dangling link");
    unlink(path);
    assert_int_equal(symlink("/nonexistent/file", path), 0);
    check_replaced(directory, path);
    test_case("a FIFO");
    unlink(path);
    assert_int_equal(mkfifo(path, 0600), 0);
    check_replaced(directory, path);
    test_case("text");
    write_text(path, "not a program");
    check_replaced(directory, path);
    test_case("an empty file");
    write_text(path, "");
    check_replaced(directory, path);
    test_case("a huge file");
    assert_int_equal(truncate(path, (off_t)1 << 40), 0);
    check_replaced(directory, path);
    test_case("a file that others can write");
    assert_int_equal(chmod(path, 0620), 0);
    check_replaced(directory, path);
    if (geteuid() == 0) {
        test_case("a file of another user");
        assert_int_equal(chown(path, 12345, 12345), 0);
        check_replaced(directory, path);
    }
    test_case("a directory");
    unlink(path);
    assert_int_equal(mkdir(path, 0700), 0);
    assert_false(found(directory, &p));
    assert_non_null(strstr(p.text, path));
    store_in(directory, &p);
    assert_non_null(strstr(p.text, path));
    assert_int_equal(list_directory(directory, NULL), 1);
}

/* Neither found nor stored; the sentence of each names the directory. */
static void check_unusable(const char *directory, bool reading_too) {
    problem p;
    assert_false(found(directory, &p));
    if (reading_too)
        CHECK(strstr(p.text, directory) != NULL, "\"%s\" does not name %s\n", p.text, directory);
    store_in(directory, &p);
    CHECK(strstr(p.text, directory) != NULL, "\"%s\" does not name %s\n", p.text, directory);
}

static void test_directories(void **state) {
    (void)state;
    const char *directory = new_path(), *link = new_path(), *file = temp_path("a-file");
    char path[512], longest[5000];
    test_case("a missing parent");
    snprintf(path, sizeof path, "%s/there", new_path());
    check_unusable(path, false);
    test_case("a file instead of a directory");
    write_text(file, "text");
    check_unusable(file, true);
    snprintf(path, sizeof path, "%s/there", file);
    check_unusable(path, true);
    test_case("a symbolic link to a directory");
    store_cleanly(directory);
    assert_int_equal(symlink(directory, link), 0);
    check_unusable(link, true);
    check_found(directory);
    test_case("a name longer than paths are");
    memset(longest, 'x', sizeof longest - 1);
    longest[sizeof longest - 1] = '\0';
    problem p;
    assert_false(found(longest, &p));
    store_in(longest, &p);
    assert_string_not_equal(p.text, "");

    test_case("a directory that is read-only");
    only_file(directory, path);
    assert_int_equal(chmod(directory, 0500), 0);
    check_found(directory);
    if (geteuid() != 0) {
        store_in(directory, &p);
        assert_non_null(strstr(p.text, directory));
    }
    assert_int_equal(chmod(directory, 0700), 0);
    assert_int_equal(list_directory(directory, NULL), 1);
}

/* Writes fail midway as on a full disk. */
static void test_full_disk(void **state) {
    (void)state;
    const char *directory = new_path();
    struct rlimit limit, small;
    problem p;
    test_case("a full disk");
    void (*handler)(int) = signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &limit), 0);
    small = limit;
    small.rlim_cur = 70;
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
    store_in(directory, &p);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &limit), 0);
    signal(SIGXFSZ, handler);
    assert_non_null(strstr(p.text, directory));
    assert_int_equal(list_directory(directory, NULL), 0);
    test_case("a program over the limit");
    size_t size = (size_t)64 << 20;
    void *program = calloc(1, size);
    assert_non_null(program);
    p.text[0] = '\0';
    cache_write(directory, key, sizeof key, program, size, p.text);
    assert_non_null(strstr(p.text, directory));
    assert_int_equal(list_directory(directory, NULL), 0);
    free(program);
}

/* ---- Programs -------------------------------------------------------------------------------- */

static atomic_int warnings;
static char last_message[2048];

static bool platform_is(const char *name) {
    char platform[256] = "";
    clGetPlatformInfo(test.platform, CL_PLATFORM_NAME, sizeof platform, platform, NULL);
    return strcmp(platform, name) == 0;
}

static void count_warnings(const char *message, void *user) {
    (void)user;
    if (strncmp(message, "program cache: ", 15) == 0)
        atomic_fetch_add(&warnings, 1);
    snprintf(last_message, sizeof last_message, "%s", message);
}

static clmoe_context *new_context(cl_context cl, cl_device_id device, const char *directory) {
    clmoe_context *context = NULL;
    clmoe_context_options options;
    clmoe_context_options_init(&options);
    options.log = count_warnings;
    options.cache_dir = directory;
    OK(clmoe_context_create(cl, device, &options, &context));
    return context;
}

/* Whether the kernel's program came from a binary. */
static bool is_loaded(cl_kernel kernel) {
    cl_program program = NULL;
    size_t bytes = 0;
    CL_OK(clGetKernelInfo(kernel, CL_KERNEL_PROGRAM, sizeof program, &program, NULL));
    CL_OK(clGetProgramInfo(program, CL_PROGRAM_SOURCE, 0, NULL, &bytes));
    return bytes <= 1;
}

/* Makes the dispatch kernel in a context; whether it was loaded from disk. */
static bool make_kernel(clmoe_context *context, const char *options) {
    cl_kernel kernel = NULL;
    OK(program_kernel(context, "dispatch/dispatch", options, "dispatch_rows", &kernel));
    bool loaded = is_loaded(kernel);
    kernel_release(&kernel);
    return loaded;
}

#define OPTIONS "-DGROUP=1 -DX=f32"

/* The same in a context of its own. */
static bool start_once(const char *directory) {
    clmoe_context *context = new_context(test.context, test.device, directory);
    bool loaded = make_kernel(context, OPTIONS);
    clmoe_context_destroy(context);
    return loaded;
}

static void expect_warnings(int want) {
    int got = atomic_exchange(&warnings, 0);
    CHECK(got == want, "%d warnings, not %d; the last: %s\n", got, want, last_message);
}

static void test_hit_and_miss(void **state) {
    (void)state;
    char directory[512], path[512];
    snprintf(directory, sizeof directory, "%s", new_path());
    test_case("hit and miss");
    clmoe_context *context = new_context(test.context, test.device, directory);
    char *given = directory + strlen(directory) - 1;
    char saved = *given;
    *given = '!'; /* the context has its own copy */
    assert_false(make_kernel(context, OPTIONS));
    *given = saved;
    only_file(directory, path);
    clmoe_context_destroy(context);
    struct stat before, after;
    assert_int_equal(stat(path, &before), 0);

    context = new_context(test.context, test.device, directory);
    assert_true(make_kernel(context, OPTIONS));
    assert_int_equal(stat(path, &after), 0);
    assert_int_equal(before.st_ino, after.st_ino);
    assert_false(make_kernel(context, OPTIONS " -DANOTHER"));
    assert_int_equal(list_directory(directory, NULL), 2);
    assert_true(make_kernel(context, OPTIONS));
    clmoe_context_destroy(context);
    expect_warnings(0);

    assert_false(start_once(NULL));
    clmoe_context_options options;
    clmoe_context_options_init(&options);
    options.cache_dir = "";
    REFUSED(clmoe_context_create(test.context, test.device, &options, &context),
            CLMOE_INVALID_ARGUMENT, "cache_dir");
}

static void test_build_failure(void **state) {
    (void)state;
    const char *directory = new_path();
    cl_kernel kernel = NULL;
    test_case("a program that does not build");
    clmoe_context *context = new_context(test.context, test.device, directory);
    assert_int_equal(program_kernel(context, "nothing", "", "nothing", &kernel),
                     CLMOE_BUILD_FAILED);
    if (!platform_is("clmoe test device")) /* which compiles nothing */
        assert_int_equal(program_kernel(context, "dispatch/dispatch", OPTIONS " -D__kernel=oops",
                                        "dispatch_rows", &kernel),
                         CLMOE_BUILD_FAILED);
    assert_null(kernel);
    assert_int_equal(list_directory(directory, NULL), -1);
    expect_warnings(0);
    clmoe_context_destroy(context);
}

/* Damage in each part of a real file: magic, format, sizes, checksum, key, binary, the last byte.
 */
static void test_damaged_programs(void **state) {
    (void)state;
    const char *directory = new_path();
    char path[512];
    test_case("damaged programs");
    assert_false(start_once(directory));
    only_file(directory, path);
    size_t size = size_of(path);
    char *content = read_text(path);
    const size_t places[] = {0, 8, 16, 24, 32, 40, 60, size / 2, size - 1};
    for (size_t i = 0; i < COUNT_OF(places); i++) {
        test_note("byte %zu of %zu", places[i], size);
        content[places[i]] ^= 0x40;
        write_bytes(path, content, size);
        content[places[i]] ^= 0x40;
        assert_false(start_once(directory));
        expect_warnings(1);
        assert_true(start_once(directory));
    }
    const size_t lengths[] = {0, 7, 47, 48, size / 2, size - 1};
    for (size_t i = 0; i < COUNT_OF(lengths); i++) {
        test_note("%zu bytes of %zu", lengths[i], size);
        write_bytes(path, content, lengths[i]);
        assert_false(start_once(directory));
        expect_warnings(1);
        assert_true(start_once(directory));
    }
    expect_warnings(0);
    only_file(directory, path);
    free(content);
}

/* A whole file with a binary that is none: the driver refuses it. */
static void test_refused_binary(void **state) {
    (void)state;
    const char *directory = new_path();
    char path[512];
    problem p = {""};
    test_case("a binary that the driver refuses");
    if (platform_is("rusticl"))
        return; /* it ends the process on such a binary */
    assert_false(start_once(directory));
    only_file(directory, path);
    char *content = read_text(path);
    uint64_t key_size;
    memcpy(&key_size, content + 16, sizeof key_size);
    cache_write(directory, content + 48, (size_t)key_size, "junk", 4, p.text);
    assert_string_equal(p.text, "");
    only_file(directory, path);
    assert_false(start_once(directory));
    expect_warnings(1);
    assert_true(start_once(directory));
    expect_warnings(0);
    free(content);
}

static void test_one_warning(void **state) {
    (void)state;
    const char *file = temp_path("no-directory");
    test_case("one warning per context");
    write_text(file, "text");
    clmoe_context *context = new_context(test.context, test.device, file);
    assert_false(make_kernel(context, OPTIONS));
    assert_false(make_kernel(context, OPTIONS " -DANOTHER"));
    expect_warnings(1);
    assert_non_null(strstr(last_message, file));
    clmoe_context_destroy(context);
    assert_false(start_once(file));
    expect_warnings(1);
}

/* PoCL is never asked for a binary: nothing is written, and the log is told once. */
static void test_not_on_pocl(void **state) {
    (void)state;
    const char *directory = new_path();
    test_case("PoCL's own cache");
    clmoe_context *context = new_context(test.context, test.device, directory);
    assert_false(make_kernel(context, OPTIONS));
    assert_false(make_kernel(context, OPTIONS " -DANOTHER"));
    expect_warnings(1);
    assert_non_null(strstr(last_message, directory));
    assert_non_null(strstr(last_message, "PoCL"));
    assert_false(make_kernel(context, OPTIONS));
    expect_warnings(0);
    clmoe_context_destroy(context);
    assert_int_equal(list_directory(directory, NULL), -1);
}

/* A layer whose programs come from disk gives the same bits. */
static void test_same_bits(void **state) {
    (void)state;
    static const shape sizes = {70, 36, 9, 1, 3, 20};
    const char *directory = new_path();
    clmoe_layer_desc desc = desc_of(&sizes);
    device_batch first, second;
    batch b;
    test_case("a layer from disk");
    if (platform_is("clmoe test device"))
        return; /* it runs nothing; see tests/native */
    batch_make(&b, &desc, sizes.tokens);
    clmoe_context *contexts[2];
    clmoe_layer *layers[2];
    for (int i = 0; i < 2; i++) {
        contexts[i] = new_context(test.context, test.device, directory);
        OK(clmoe_layer_create(contexts[i], &desc, &layers[i]));
        for (int id = 0; id < KERNEL_COUNT; id++)
            if (layers[i]->kernels[id])
                assert_int_equal(is_loaded(layers[i]->kernels[id]), i);
    }
    batch_run(layers[0], &b, &first);
    batch_run(layers[1], &b, &second);
    size_t bytes = (size_t)sizes.tokens * sizes.dim * sizeof(float);
    compare_bits("y", buf_get(first.args.y), buf_get(second.args.y), bytes);
    batch_compare(&b, &second, batch_reference(&b));
    for (int i = 0; i < 2; i++) {
        clmoe_layer_destroy(layers[i]);
        clmoe_context_destroy(contexts[i]);
    }
    expect_warnings(0);
}

/* ---- Sharing --------------------------------------------------------------------------------- */

enum { THREADS = 8 };

typedef struct sharer {
    pthread_t thread;
    const char *directory;
    clmoe_context *context; /* shared, or NULL: one of its own */
} sharer;

static void *share(void *argument) {
    const sharer *s = argument;
    for (int i = 0; i < 3; i++) {
        if (s->context)
            make_kernel(s->context, OPTIONS);
        else
            start_once(s->directory);
    }
    return NULL;
}

static void test_threads(void **state) {
    (void)state;
    if (platform_is("Oclgrind"))
        skip(); /* it compiles in one LLVM context without a lock; native_cache has threads */
    for (int shared = 0; shared < 2; shared++) {
        const char *directory = new_path();
        sharer sharers[THREADS];
        test_case("%d threads, %s", THREADS, shared ? "one context" : "a context each");
        clmoe_context *context = shared ? new_context(test.context, test.device, directory) : NULL;
        for (int i = 0; i < THREADS; i++) {
            sharers[i] = (sharer){.directory = directory, .context = context};
            assert_int_equal(pthread_create(&sharers[i].thread, NULL, share, &sharers[i]), 0);
        }
        for (int i = 0; i < THREADS; i++)
            pthread_join(sharers[i].thread, NULL);
        clmoe_context_destroy(context);
        expect_warnings(0);
        assert_int_equal(list_directory(directory, NULL), 1);
        assert_true(start_once(directory));
    }
}

static void test_processes(void **state) {
    (void)state;
    const char *directory = new_path();
    pid_t children[2];
    test_case("two processes");
    for (int i = 0; i < 2; i++) {
        const char *arguments[] = {own_path, "child", directory, NULL};
        assert_int_equal(
            posix_spawn(&children[i], own_path, NULL, NULL, (char **)arguments, environ), 0);
    }
    for (int i = 0; i < 2; i++) {
        int result = -1;
        assert_int_equal(waitpid(children[i], &result, 0), children[i]);
        assert_int_equal(result, 0);
    }
    assert_int_equal(list_directory(directory, NULL), 1);
    assert_true(start_once(directory));
    expect_warnings(0);
}

/*
 * The other process: many starts, with the file taken away now and then; not the file that the
 * other one is writing, with a dot in its name, which it would miss.
 */
static int child(const char *directory) {
    char path[512];
    if (support_setup(NULL) != 0)
        return 1;
    for (int i = 0; i < 10; i++) {
        start_once(directory);
        if (i % 3 == 2 && list_directory(directory, path) == 1 && !strchr(strrchr(path, '/'), '.'))
            unlink(path);
    }
    start_once(directory);
    return support_teardown(NULL) != 0 || atomic_load(&warnings) != 0;
}

/* The binary of the right one of an OpenCL context's devices, where the platform has more. */
static void test_two_devices(void **state) {
    (void)state;
    cl_device_id devices[2];
    cl_uint count = 0;
    cl_int code = CL_SUCCESS;
    test_case("two devices");
    CL_OK(clGetDeviceIDs(test.platform, CL_DEVICE_TYPE_ALL, 2, devices, &count));
    if (count < 2)
        return;
    cl_context cl = clCreateContext(NULL, 2, devices, NULL, NULL, &code);
    CL_OK(code);
    for (int i = 0; i < 2; i++) {
        const char *directory = new_path();
        for (int run = 0; run < 2; run++) {
            clmoe_context *context = new_context(cl, devices[i], directory);
            assert_int_equal(make_kernel(context, OPTIONS), run);
            clmoe_context_destroy(context);
        }
    }
    expect_warnings(0);
    clReleaseContext(cl);
}

static int setup(void **state) {
    return files_setup(state) || support_setup(state);
}

static int teardown(void **state) {
    return files_teardown(state) | support_teardown(state);
}

int main(int argc, char **argv) {
    const struct CMUnitTest files[] = {
        TEST(test_found_again),   TEST(test_every_damaged_byte), TEST(test_other_key),
        TEST(test_foreign_files), TEST(test_directories),        TEST(test_full_disk),
    };
    const struct CMUnitTest programs[] = {
        TEST(test_hit_and_miss),   TEST(test_build_failure), TEST(test_damaged_programs),
        TEST(test_refused_binary), TEST(test_one_warning),   TEST(test_same_bits),
        TEST(test_threads),        TEST(test_processes),     TEST(test_two_devices),
    };
    const struct CMUnitTest pocl[] = {TEST(test_not_on_pocl)};
    own_path = argv[0];
    if (argc == 3 && strcmp(argv[1], "child") == 0)
        return child(argv[2]);
    if (setup(NULL) != 0)
        return 1;
    int failed = cmocka_run_group_tests(files, NULL, NULL);
    support_filter();
    failed += platform_is("Portable Computing Language")
                  ? cmocka_run_group_tests(pocl, NULL, NULL)
                  : cmocka_run_group_tests(programs, NULL, NULL);
    return failed + teardown(NULL) != 0;
}
