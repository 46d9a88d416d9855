#include "tidy.h"
#include "runtime/json.h"

#include <errno.h>
#include <locale.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define MAX_NUMBER 400 /* bytes of a number; jansson has no room for a longer one */
#define MAX_DEPTH  4096

/* An object or a list that is not closed yet. */
typedef struct scope {
    json_t *keys; /* of an object, those seen so far; NULL for a list, or before the first */
    bool is_object;
    bool expects_key;
} scope;

typedef struct tidier {
    const char *at, *end;
    tidy_text *out;
    size_t room;
    scope *scopes;
    size_t depth, scope_room;
    bool failed; /* no memory */
} tidier;

/* ---- Output ---------------------------------------------------------------------------------- */

static void put(tidier *t, const char *bytes, size_t count) {
    size_t needed = t->out->length + count;
    if (needed > t->room && !t->failed) {
        size_t room = needed + needed / 2;
        char *text = realloc(t->out->text, room);
        t->failed = text == NULL;
        t->out->text = text ? text : t->out->text;
        t->room = text ? room : t->room;
    }
    if (t->failed)
        return;
    memcpy(t->out->text + t->out->length, bytes, count);
    t->out->length += count;
}

/* ---- Keys ------------------------------------------------------------------------------------ */

static scope *innermost(const tidier *t) {
    return t->depth > 0 ? &t->scopes[t->depth - 1] : NULL;
}

static void enter(tidier *t, bool is_object) {
    if (t->depth == MAX_DEPTH) { /* jansson refuses far less */
        put(t, t->at, (size_t)(t->end - t->at - 1));
        t->at = t->end - 1;
        return;
    }
    if (t->depth == t->scope_room) {
        size_t room = 2 * t->scope_room + 16;
        scope *scopes = realloc(t->scopes, room * sizeof scopes[0]);
        t->failed = t->failed || scopes == NULL;
        if (scopes == NULL)
            return;
        t->scopes = scopes;
        t->scope_room = room;
    }
    t->scopes[t->depth++] = (scope){NULL, is_object, is_object};
}

static void leave(tidier *t) {
    if (t->depth > 0)
        json_decref(t->scopes[--t->depth].keys);
}

/* Whether the innermost object has the key, `count` bytes between quotes, already; notes it. */
static bool note_key(tidier *t, const char *key, size_t count) {
    scope *s = innermost(t);
    char *name = malloc(count + 1);
    s->keys = s->keys ? s->keys : json_object();
    if (name != NULL)
        memcpy(name, key, count);
    if (name != NULL)
        name[count] = '\0';
    bool repeated = name != NULL && json_object_get(s->keys, name) != NULL;
    if (name == NULL || json_object_set_new_nocheck(s->keys, name, json_true()) != 0)
        t->failed = true;
    free(name);
    return repeated;
}

/* ---- Strings --------------------------------------------------------------------------------- */

/* The code unit of "\uXXXX" at `at`, or -1. */
static long code_unit(const char *at, const char *end) {
    char digits[5] = {0};
    if (end - at < 6 || at[0] != '\\' || at[1] != 'u')
        return -1;
    memcpy(digits, at + 2, 4);
    return strspn(digits, "0123456789abcdefABCDEF") == 4 ? strtol(digits, NULL, 16) : -1;
}

/* Copies the escape at t->at, or U+FFFD where it is no character by itself. */
static void copy_escape(tidier *t) {
    long unit = code_unit(t->at, t->end);
    size_t count = unit < 0 ? 2 : 6;
    if (unit >= 0xd800 && unit < 0xdc00) {
        long low = code_unit(t->at + 6, t->end);
        if (low >= 0xdc00 && low < 0xe000)
            count = 12;
    }
    bool lone = unit == 0 || (count == 6 && unit >= 0xd800 && unit < 0xe000);
    count = count > (size_t)(t->end - t->at) ? (size_t)(t->end - t->at) : count;
    put(t, lone ? "\\ufffd" : t->at, lone ? 6 : count);
    t->at += count;
}

/* Copies the string that begins at t->at; a key gets its mark if it is repeated. */
static void copy_string(tidier *t) {
    scope *s = innermost(t);
    const char *plain = t->at++;
    size_t begin = t->out->length + 1;
    put(t, plain, 1);
    while (t->at < t->end && *t->at != '"') {
        for (plain = t->at; t->at < t->end && *t->at != '"' && *t->at != '\\'; t->at++)
            ;
        put(t, plain, (size_t)(t->at - plain));
        if (t->at < t->end && *t->at == '\\')
            copy_escape(t);
    }
    if (!t->failed && s != NULL && s->expects_key &&
        note_key(t, t->out->text + begin, t->out->length - begin))
        put(t, JSON_REPEATED, strlen(JSON_REPEATED));
    if (s != NULL)
        s->expects_key = false;
    if (t->at < t->end)
        put(t, t->at++, 1);
}

/* ---- Numbers --------------------------------------------------------------------------------- */

/* Whether the whole of `text` is a number of JSON's grammar that jansson has no room for. */
static bool is_too_large(char *text) {
    const char *at = text + (*text == '-');
    size_t digits = strspn(at, "0123456789");
    if (digits == 0 || (digits > 1 && *at == '0'))
        return false;
    at += digits;
    bool integer = *at == '\0';
    if (*at == '.' && (digits = strspn(at + 1, "0123456789")) > 0)
        at += 1 + digits;
    if (*at == 'e' || *at == 'E') {
        at += 1 + (at[1] == '+' || at[1] == '-');
        digits = strspn(at, "0123456789");
        at += digits;
        if (digits == 0)
            return false;
    }
    errno = 0;
    if (integer)
        return strtoll(text, NULL, 10) != 0 && errno == ERANGE;
    char *point = strchr(text, '.');
    if (point != NULL) /* strtod() goes by the locale */
        *point = localeconv()->decimal_point[0];
    return *at == '\0' && isinf(strtod(text, NULL));
}

static bool is_numeric(const char *bytes, size_t count) {
    size_t i = 0;
    while (i < count && bytes[i] != '\0' && strchr("+-0123456789.eE", bytes[i]) != NULL)
        i++;
    return i == count;
}

/* A word or a number: all that stands between the marks of structure. */
static void copy_literal(tidier *t) {
    static const char *const pythons[] = {"NaN", "Infinity", "-Infinity"};
    const char *begin = t->at;
    char text[MAX_NUMBER + 1];
    while (t->at < t->end && *t->at != '\0' && strchr("{}[]:,\" \t\r\n", *t->at) == NULL)
        t->at++;
    t->at += t->at == begin;
    size_t count = (size_t)(t->at - begin);
    bool quote = count > MAX_NUMBER && is_numeric(begin, count);
    if (count <= MAX_NUMBER) {
        memcpy(text, begin, count);
        text[count] = '\0';
        quote = is_too_large(text);
        for (size_t i = 0; i < sizeof pythons / sizeof pythons[0]; i++)
            quote = quote || strcmp(text, pythons[i]) == 0;
    }
    put(t, "\"", quote);
    put(t, begin, count);
    put(t, "\"", quote);
}

/* ---- All ------------------------------------------------------------------------------------- */

static void copy_next(tidier *t) {
    scope *s = innermost(t);
    switch (*t->at) {
    case '"':
        copy_string(t);
        return;
    case '{':
    case '[':
        enter(t, *t->at == '{');
        break;
    case '}':
    case ']':
        leave(t);
        break;
    case ',':
        if (s != NULL)
            s->expects_key = s->is_object;
        break;
    case ':':
    case ' ':
    case '\t':
    case '\r':
    case '\n':
        break;
    default:
        copy_literal(t);
        return;
    }
    put(t, t->at++, 1);
}

bool json_tidy(const char *text, size_t length, tidy_text *out) {
    tidier t = {.at = text, .end = text + length, .out = out, .room = length + 64};
    *out = (tidy_text){malloc(t.room), 0};
    t.failed = out->text == NULL;
    while (t.at < t.end && !t.failed)
        copy_next(&t);
    while (t.depth > 0)
        leave(&t);
    free(t.scopes);
    if (t.failed) {
        free(out->text);
        *out = (tidy_text){NULL, 0};
    }
    return !t.failed;
}
