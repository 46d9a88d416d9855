#include "csv.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum { MOST_BYTES = 1 << 30, MOST_COLUMNS = 1 << 20, MOST_LETTERS = 32, MOST_NAME = 64 };

static clmoe_status no_memory(const char *path) {
    return cli_fail(CLMOE_OUT_OF_MEMORY, "no memory for %s", path);
}

/* The whole file to table->text, ended by 0. */
static clmoe_status read_text(const char *path, csv_table *t, size_t *bytes) {
    clmoe_status status = CLMOE_SUCCESS;
    struct stat info;
    FILE *file = NULL;
    if (stat(path, &info) != 0)
        return cli_fail(CLMOE_IO, "%s: %s", path, strerror(errno));
    if (!S_ISREG(info.st_mode) || info.st_size > MOST_BYTES)
        return cli_fail(CLMOE_BAD_FILE, "%s is no regular file of at most 1 GiB", path);
    file = fopen(path, "rb");
    if (file == NULL)
        return cli_fail(CLMOE_IO, "%s cannot be opened: %s", path, strerror(errno));
    t->text = malloc((size_t)info.st_size + 1);
    if (t->text == NULL)
        TRY(no_memory(path));
    *bytes = fread(t->text, 1, (size_t)info.st_size, file);
    if (ferror(file))
        TRY(cli_fail(CLMOE_IO, "%s cannot be read: %s", path, strerror(errno)));
    t->text[*bytes] = '\0';
    if (memchr(t->text, '\0', *bytes) != NULL)
        TRY(cli_fail(CLMOE_BAD_FILE, "%s has a byte 0, which is no text", path));
done:
    fclose(file);
    return status;
}

/* Cuts off a field: its length, and *end of the line, which the caller's `at` then points to. */
static char *cut(char **at, bool *last) {
    char *field = *at, *end = field + strcspn(field, ",");
    *last = *end == '\0';
    *end = '\0';
    *at = end + !*last;
    return field;
}

static int by_name(const void *a, const void *b) {
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* Whether two of the names are one; NULL if not. */
static clmoe_status find_twin(const char *path, const csv_table *t) {
    clmoe_status status = CLMOE_SUCCESS;
    const char **sorted = malloc(t->columns * sizeof *sorted);
    if (sorted == NULL)
        return no_memory(path);
    memcpy(sorted, t->names, t->columns * sizeof *sorted);
    qsort(sorted, t->columns, sizeof *sorted, by_name);
    for (uint32_t i = 1; i < t->columns && status == CLMOE_SUCCESS; i++)
        if (strcmp(sorted[i - 1], sorted[i]) == 0)
            status = cli_fail(CLMOE_BAD_FILE, "%s has two columns '%s'", path, sorted[i]);
    free(sorted);
    return status;
}

static clmoe_status read_names(const char *path, char *line, csv_table *t) {
    size_t count = 1;
    bool last = false;
    for (const char *c = line; *c != '\0'; c++)
        count += *c == ',';
    if (count > MOST_COLUMNS)
        return cli_fail(CLMOE_BAD_FILE, "%s has more than %d columns", path, MOST_COLUMNS);
    t->names = calloc(count, sizeof *t->names);
    if (t->names == NULL)
        return no_memory(path);
    while (!last) {
        const char *name = cut(&line, &last);
        const size_t length = strlen(name);
        if (length == 0 || length > MOST_NAME ||
            strspn(name, "abcdefghijklmnopqrstuvwxyz0123456789_-") != length)
            return cli_fail(CLMOE_BAD_FILE, "%s: '%.64s' in line 1 is no name of a column", path,
                            name);
        t->names[t->columns++] = name;
    }
    return find_twin(path, t);
}

/* An empty field has no value; a loss may have become infinite. */
static bool parse_number(const char *text, double *value) {
    const size_t length = strlen(text);
    char *end = NULL;
    *value = NAN;
    if (length == 0)
        return true;
    if (strcmp(text, "inf") == 0 || strcmp(text, "-inf") == 0) {
        *value = text[0] == '-' ? -HUGE_VAL : HUGE_VAL;
        return true;
    }
    if (length > MOST_LETTERS || strspn(text, "0123456789.+-eE") != length)
        return false;
    *value = strtod(text, &end);
    return end == text + length && isfinite(*value);
}

static clmoe_status read_row(const char *path, char *line, csv_table *t) {
    const unsigned number = t->rows + 2;
    double *row = t->values + (size_t)t->rows * t->columns;
    uint32_t column = 0;
    for (bool last = false; !last; column++) {
        const char *field = cut(&line, &last);
        if (column == t->columns)
            return cli_fail(CLMOE_BAD_FILE, "%s: line %u has more than the %u fields of line 1",
                            path, number, (unsigned)t->columns);
        if (!parse_number(field, &row[column]))
            return cli_fail(CLMOE_BAD_FILE, "%s: line %u: %s is '%.40s', which is no number", path,
                            number, t->names[column], field);
    }
    t->rows++;
    if (column == t->columns)
        return CLMOE_SUCCESS;
    return cli_fail(CLMOE_BAD_FILE, "%s: line %u has %u fields, but line 1 has %u", path, number,
                    (unsigned)column, (unsigned)t->columns);
}

/* Room for the values of all lines. */
static clmoe_status make_room(const char *path, csv_table *t, const char *rest) {
    size_t lines = 0;
    for (const char *c = rest; (c = strchr(c, '\n')) != NULL; c++)
        lines++;
    t->values = malloc((lines * t->columns + 1) * sizeof *t->values);
    return t->values != NULL ? CLMOE_SUCCESS : no_memory(path);
}

clmoe_status csv_read(const char *path, csv_table *t) {
    clmoe_status status = CLMOE_SUCCESS;
    size_t bytes = 0;
    TRY(read_text(path, t, &bytes));
    char *line = t->text, *end = strchr(line, '\n');
    if (end == NULL)
        TRY(cli_fail(CLMOE_BAD_FILE, "%s has no whole line", path));
    *end = '\0';
    TRY(read_names(path, line, t));
    line = end + 1;
    TRY(make_room(path, t, line));
    for (; (end = strchr(line, '\n')) != NULL; line = end + 1) {
        *end = '\0';
        TRY(read_row(path, line, t));
    }
done:
    return status;
}

void csv_free(csv_table *t) {
    free(t->text);
    free(t->names);
    free(t->values);
    *t = (csv_table){0};
}

/* Names are asked for in their order, mostly. */
uint32_t csv_column(csv_table *t, const char *name) {
    for (uint32_t i = 0; i < t->columns; i++) {
        const uint32_t column = (t->next + i) % t->columns;
        if (strcmp(t->names[column], name) == 0) {
            t->next = column + 1;
            return column;
        }
    }
    return CSV_NONE;
}
