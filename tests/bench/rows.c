/* Checks a file of clmoe-bench's rows and prints "CASE TOKENS ENGINE STEP" of each. */
#include <jansson.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int failures;

static void complain(size_t row, const char *field, const char *what) {
    fprintf(stderr, "row %zu: %s %s\n", row, field, what);
    failures++;
}

static const char *text(const json_t *object, size_t row, const char *field) {
    const char *value = json_string_value(json_object_get(object, field));
    if (!value || value[0] == '\0')
        complain(row, field, "is no text");
    return value ? value : "?";
}

static double number(const json_t *object, size_t row, const char *field) {
    const json_t *value = json_object_get(object, field);
    if (!json_is_number(value) || json_number_value(value) < 0)
        complain(row, field, "is no number of at least 0");
    return json_number_value(value);
}

/* % of peak; GEMMs on matrix units have none. */
static double share(const json_t *object, size_t row) {
    const bool none = strncmp(text(object, row, "engine"), "nv_", 3) == 0;
    if (none && json_is_null(json_object_get(object, "percent_of_peak")))
        return 1;
    return number(object, row, "percent_of_peak");
}

static void check_times(const json_t *object, size_t row, const char *step) {
    const double min = number(object, row, "min_ms"), low = number(object, row, "p10_ms");
    const double median = number(object, row, "median_ms"), high = number(object, row, "p90_ms");
    if (!(min > 0 && min <= low && low <= median && median <= high))
        complain(row, "median_ms", "is not in order with min, p10 and p90");
    if (number(object, row, "repeat") < 1)
        complain(row, "repeat", "is 0");
    if (strncmp(step, "create_", strlen("create_")) != 0 &&
        !(number(object, row, "gbytes_per_s") > 0 && share(object, row) > 0))
        complain(row, "gbytes_per_s", "or percent_of_peak is 0");
    number(object, row, "gflops");
}

static void check_roofline(const json_t *object, size_t row) {
    if (number(object, row, "gbytes_per_s") + number(object, row, "gflops") <= 0)
        complain(row, "gbytes_per_s", "and gflops are 0");
}

static void check_row(const json_t *object, size_t row) {
    static const char *const texts[] = {"device", "driver", "dtype", "pattern",
                                        "clmoe",  "commit", "date"};
    static const char *const counts[] = {"dim", "hidden_dim", "experts", "top_k"};
    const char *name = text(object, row, "case"), *engine = text(object, row, "engine");
    const char *step = text(object, row, "step");
    const double tokens = number(object, row, "tokens");
    for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++)
        text(object, row, texts[i]);
    for (size_t i = 0; i < sizeof counts / sizeof counts[0]; i++)
        number(object, row, counts[i]);
    if (!json_is_true(json_object_get(object, "checked")))
        complain(row, "checked", "is not true");
    if (strcmp(name, "roofline") == 0)
        check_roofline(object, row);
    else
        check_times(object, row, step);
    printf("%s %.0f %s %s\n", name, tokens, engine, step);
}

int main(int argc, char **argv) {
    json_error_t error;
    json_t *rows = argc == 2 ? json_load_file(argv[1], 0, &error) : NULL;
    if (!json_is_array(rows) || json_array_size(rows) == 0) {
        fprintf(stderr, "no array of rows\n");
        return 1;
    }
    for (size_t i = 0; i < json_array_size(rows); i++)
        check_row(json_array_get(rows, i), i);
    json_decref(rows);
    return failures > 0;
}
