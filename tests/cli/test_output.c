/* Where a tool's output goes: every kind of file that its path can be. */
#define _XOPEN_SOURCE 700 /* mknod */
#include "support_files.h"

#include "../../src/cli/output.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

/* ---- Files ----------------------------------------------------------------------------------- */

static void put(const char *path, const char *text) {
    FILE *file = fopen(path, "wb");
    assert_non_null(file);
    fputs(text, file);
    assert_int_equal(fclose(file), 0);
}

static void expect_text(const char *path, const char *want) {
    char got[64] = "";
    FILE *file = fopen(path, "rb");
    assert_non_null(file);
    const size_t length = fread(got, 1, sizeof got - 1, file);
    fclose(file);
    assert_int_equal(length, strlen(want));
    assert_string_equal(got, want);
}

static mode_t mode_of(const char *path) {
    struct stat info;
    assert_int_equal(lstat(path, &info), 0);
    return info.st_mode;
}

static bool is_there(const char *path) {
    struct stat info;
    return lstat(path, &info) == 0;
}

/* A path of a new file in a new folder. */
static const char *fresh(const char *name) {
    static unsigned count;
    static char path[1024];
    char folder[64];
    snprintf(folder, sizeof folder, "folder%u", count++);
    snprintf(path, sizeof path, "%s/%s", temp_directory(folder), name);
    return path;
}

/* Names that begin like a temporary file's, beside `path`. */
static void expect_nothing_beside(const char *path) {
    char command[2048];
    const char *slash = strrchr(path, '/');
    snprintf(command, sizeof command, "test -z \"$(find '%.*s' -name '.clmoe-*')\"",
             (int)(slash - path), path);
    assert_int_equal(system(command), 0);
}

/* ---- Writing --------------------------------------------------------------------------------- */

static void write_new(const char *path, bool force) {
    output o;
    problem why = {""};
    if (!output_check(&o, "--out", path, force, &why))
        fail_msg("refused: %s", why.text);
    FILE *stream = output_open(&o, &why);
    if (stream == NULL)
        fail_msg("not opened: %s", why.text);
    fputs("new", stream);
    if (!output_close(&o, &why))
        fail_msg("not closed: %s", why.text);
}

/* The sentence names the option and has `word`. */
static void refused(const char *path, bool force, const char *word) {
    output o;
    problem why = {""};
    assert_false(output_check(&o, "--out", path, force, &why));
    if (strncmp(why.text, "--out ", 6) != 0 || strstr(why.text, word) == NULL)
        fail_msg("no '%s' in: %s", word, why.text);
}

static void regular_files(void **state) {
    (void)state;
    const char *path = fresh("x");
    const mode_t mask = umask(027);
    write_new(path, false);
    umask(mask);
    expect_text(path, "new");
    assert_int_equal(mode_of(path) & 0777, 0640);
    put(path, "old");
    refused(path, false, "--force");
    expect_text(path, "old");
    assert_int_equal(chmod(path, 0602), 0);
    if (geteuid() == 0)
        assert_int_equal(chown(path, 1234, 4321), 0);
    write_new(path, true);
    expect_text(path, "new");
    assert_int_equal(mode_of(path) & 0777, 0602);
    struct stat info;
    assert_int_equal(stat(path, &info), 0);
    assert_int_equal(info.st_uid, geteuid() == 0 ? 1234 : geteuid());
    expect_nothing_beside(path);
}

static void refusals(void **state) {
    (void)state;
    char below[1200];
    const char *path = fresh("x");
    put(path, "old");
    assert_int_equal(chmod(path, 0444), 0);
    refused(path, true, "read-only");
    refused(path, false, "read-only");
    expect_text(path, "old");
    snprintf(below, sizeof below, "%s/y", path);
    refused(below, true, "folder");
    refused("", true, "names no file");
    refused("/nonexistent/place/x", true, "/nonexistent/place");
    path = fresh("sub");
    assert_int_equal(mkdir(path, 0755), 0);
    refused(path, true, "is a folder");
    snprintf(below, sizeof below, "%s/", path);
    refused(below, true, "folder");
    snprintf(below, sizeof below, "%s/none/", path);
    refused(below, true, "none");
    assert_int_equal(chmod(path, 0555), 0);
    snprintf(below, sizeof below, "%s/x", path);
    refused(below, true, "read-only");
    memset(below, 'n', 300);
    below[300] = '\0';
    refused(below, true, "long");
}

static void links(void **state) {
    (void)state;
    char target[1200], link[1200], second[1200];
    const char *path = fresh("file");
    const int folder = (int)(strrchr(path, '/') - path);
    snprintf(target, sizeof target, "%s", path);
    snprintf(link, sizeof link, "%.*s/link", folder, target);
    snprintf(second, sizeof second, "%.*s/sub", folder, target);
    assert_int_equal(mkdir(second, 0755), 0);
    snprintf(second, sizeof second, "%.*s/sub/second", folder, target);
    assert_int_equal(symlink("file", link), 0);
    assert_int_equal(symlink("../link", second), 0);
    write_new(second, false); /* which dangles */
    expect_text(target, "new");
    put(target, "old");
    refused(second, false, "--force");
    refused(link, false, "--force");
    write_new(second, true);
    expect_text(target, "new");
    assert_true(S_ISLNK(mode_of(link)) && S_ISLNK(mode_of(second)));
    assert_int_equal(unlink(link), 0);
    assert_int_equal(symlink("sub/second", link), 0); /* in a circle */
    refused(link, true, "symbolic links");
    assert_int_equal(unlink(link), 0);
    assert_int_equal(symlink("none/file", link), 0);
    refused(link, true, "none");
    expect_nothing_beside(target);
}

/* What is no regular file is written to as it is, with or without --force. */
static void fifos(void **state) {
    (void)state;
    for (int force = 0; force < 2; force++) {
        const char *path = fresh("fifo");
        char got[8] = "";
        int status = 1;
        assert_int_equal(mkfifo(path, 0600), 0);
        pid_t child = fork();
        if (child == 0) {
            int fd = open(path, O_RDONLY);
            _exit(read(fd, got, 3) == 3 && memcmp(got, "new", 3) == 0 ? 0 : 1);
        }
        write_new(path, force != 0);
        assert_int_equal(waitpid(child, &status, 0), child);
        assert_int_equal(status, 0);
        assert_true(S_ISFIFO(mode_of(path)));
    }
}

/* Devices of the test's own: null and full. */
static void devices(void **state) {
    (void)state;
    char link[1200];
    output o;
    problem why = {""};
    const char *path = fresh("null");
    if (mknod(path, S_IFCHR | 0666, makedev(1, 3)) != 0 || access(path, W_OK) != 0)
        skip();
    FILE *probe = fopen(path, "w");
    if (probe == NULL) /* a file system without devices */
        skip();
    fclose(probe);
    write_new(path, false);
    write_new(path, true);
    snprintf(link, sizeof link, "%s.link", path);
    assert_int_equal(symlink("null", link), 0);
    write_new(link, true);
    assert_true(S_ISCHR(mode_of(path)) && S_ISLNK(mode_of(link)));
    assert_int_equal(chmod(path, 0444), 0);
    refused(path, true, "read-only");
    path = fresh("full");
    assert_int_equal(mknod(path, S_IFCHR | 0666, makedev(1, 7)), 0);
    assert_true(output_check(&o, "--out", path, false, &why));
    fputs("new", output_open(&o, &why));
    assert_false(output_close(&o, &why));
    assert_non_null(strstr(why.text, "space"));
    assert_true(S_ISCHR(mode_of(path)));
}

static void sockets(void **state) {
    (void)state;
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    const char *path = fresh("s");
    if (strlen(path) >= sizeof address.sun_path)
        skip();
    strcpy(address.sun_path, path);
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    assert_int_equal(bind(fd, (struct sockaddr *)&address, sizeof address), 0);
    refused(path, true, "socket");
    close(fd);
}

/* Standard output by any name, here a regular file that grows. */
static void standard_output(void **state) {
    (void)state;
    const char *const names[] = {"-", "/proc/self/fd/1", NULL};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        output o;
        problem why = {""};
        const char *path = fresh("out");
        fflush(stdout);
        int before = dup(STDOUT_FILENO), fd = open(path, O_WRONLY | O_CREAT, 0600);
        dup2(fd, STDOUT_FILENO);
        printf("old");
        bool right = output_check(&o, "--out", names[i] ? names[i] : path, false, &why);
        FILE *stream = right ? output_open(&o, &why) : NULL;
        if (stream != NULL)
            fputs("new", stream);
        right = stream != NULL && output_close(&o, &why) && o.to_stdout;
        dup2(before, STDOUT_FILENO);
        close(before);
        close(fd);
        if (!right)
            fail_msg("%s: %s", names[i] ? names[i] : path, why.text);
        expect_text(path, "oldnew");
    }
}

/* A file that comes after the check is not overwritten, and the result is not lost. */
static void latecomer(void **state) {
    (void)state;
    output o;
    problem why = {""};
    const char *path = fresh("x");
    assert_true(output_check(&o, "--out", path, false, &why));
    fputs("new", output_open(&o, &why));
    put(path, "old");
    assert_false(output_close(&o, &why));
    expect_text(path, "old");
    const char *kept = strstr(why.text, "what was written is ");
    assert_non_null(kept);
    expect_text(kept + strlen("what was written is "), "new");
}

/* After an error the file is as it was. */
static void dropped(void **state) {
    (void)state;
    output o = {0};
    problem why = {""};
    output_drop(&o);
    const char *path = fresh("x");
    put(path, "old");
    assert_true(output_check(&o, "--out", path, true, &why));
    fputs("new", output_open(&o, &why));
    output_drop(&o);
    output_drop(&o);
    expect_text(path, "old");
    expect_nothing_beside(path);
    assert_true(output_is_file(&o, path));
    assert_false(output_is_file(&o, "/dev/null"));
    assert_true(is_there(path));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(regular_files),   cmocka_unit_test(refusals),  cmocka_unit_test(links),
        cmocka_unit_test(fifos),           cmocka_unit_test(devices),   cmocka_unit_test(sockets),
        cmocka_unit_test(standard_output), cmocka_unit_test(latecomer), cmocka_unit_test(dropped),
    };
    return cmocka_run_group_tests(tests, files_setup, files_teardown);
}
