/* The edit of PTX for sm_90a. */
#include "nv_ptx.h"

#include <stdlib.h>
#include <string.h>

static const char mark[] = "//@SM90A ", target[] = ".target", plain[] = "sm_90",
                  group[] = ".reqntid", more[] = ".minnctapersm 1\n";

/* The edited text so far; room for what is added is there. */
typedef struct writer {
    char *at;
} writer;

static void put(writer *to, const char *from, size_t length) {
    memcpy(to->at, from, length);
    to->at += length;
}

static size_t occurrences(const char *text, const char *word) {
    size_t count = 0;
    for (const char *at = strstr(text, word); at; at = strstr(at + 1, word))
        count++;
    return count;
}

/* In the line alone: a search to the text's end for each line takes a time that grows by squares.
 */
static const char *find(const char *line, size_t length, const char *word) {
    const char *end = line + length, *at = line;
    while ((at = memchr(at, word[0], (size_t)(end - at))) != NULL) {
        if (strncmp(at, word, strlen(word)) == 0)
            return at;
        at++;
    }
    return NULL;
}

/* Where the line's target sm_90 ends, or NULL: sm_90a is another. */
static const char *target_end(const char *line, size_t length) {
    if (strncmp(line, target, sizeof target - 1) != 0)
        return NULL;
    const char *at = find(line, length, plain);
    if (!at)
        return NULL;
    at += sizeof plain - 1;
    return *at == ',' || *at == '\n' || *at == ' ' || *at == '\r' ? at : NULL;
}

/* Writes a line; whether its target was changed, or a comment made a line. */
static void edit_line(writer *to, const char *line, size_t length, bool *targeted, bool *marked) {
    const char *end = target_end(line, length), *comment = find(line, length, mark);
    if (end) {
        *targeted = true;
        put(to, line, (size_t)(end - line));
        put(to, "a", 1);
        put(to, end, length - (size_t)(end - line));
    } else if (comment) {
        *marked = true;
        put(to, line, (size_t)(comment - line));
        comment += sizeof mark - 1;
        put(to, comment, length - (size_t)(comment - line));
    } else {
        put(to, line, length);
        if (find(line, length, group) && line[length - 1] == '\n')
            put(to, more, sizeof more - 1);
    }
}

clmoe_status nv_ptx_edit(const char *text, char **edited) {
    bool targeted = false, marked = false;
    const size_t added =
        occurrences(text, target) + occurrences(text, group) * (sizeof more - 1) + 1;
    char *made = malloc(strlen(text) + added);
    writer to = {made};
    *edited = NULL;
    if (!made)
        return fail(CLMOE_OUT_OF_MEMORY, "out of memory for an edited program");
    while (*text) {
        size_t length = strcspn(text, "\n");
        length += text[length] == '\n';
        edit_line(&to, text, length, &targeted, &marked);
        text += length;
    }
    *to.at = '\0';
    if (targeted && marked)
        *edited = made;
    else
        free(made);
    return CLMOE_SUCCESS;
}

const program_edit nv_ptx_sm90a = {"sm_90a, 1", nv_ptx_edit};
