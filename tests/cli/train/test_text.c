/* cli.train_text: what is drawn from the texts, what is held out, and the lists by byte. */
#include "../../../src/cli/train/text.h"
#include "support.h"
#include "support_files.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { CONTEXT = 5, SEQUENCE = 8, FILES = 3, DRAWS = 400, SEQUENCES = 6 };

static const uint32_t sizes[FILES] = {300, 2000, 260};

static char paths[FILES][64];

static void remove_files(void *object) {
    (void)object;
    for (int i = 0; i < FILES; i++)
        unlink(paths[i]);
}

static corpus read_texts(void) {
    const char *names[FILES];
    corpus c = {.context = CONTEXT, .sequence = SEQUENCE};
    clean_later(remove_files, NULL);
    for (int i = 0; i < FILES; i++) {
        snprintf(paths[i], sizeof paths[i], "/tmp/clmoe-train-text-%ld-%d", (long)getpid(), i);
        FILE *file = fopen(paths[i], "wb");
        CHECK(file != NULL, "no file\n");
        for (uint32_t b = 0; b < sizes[i]; b++)
            fputc((int)random_below(256), file);
        fclose(file);
        names[i] = paths[i];
    }
    OK(corpus_read(&c, names, FILES));
    return c;
}

/* A position of a part of one file, with all that it sees and foretells. */
static void check_inside(const corpus *c, uint32_t position, bool held_out) {
    for (uint32_t i = 0; i < FILES; i++) {
        const text_file *file = &c->files[i];
        const uint32_t begin = held_out ? file->held_out : file->begin;
        const uint32_t end = held_out ? file->end : file->held_out;
        if (position >= begin && position < end) {
            CHECK(position - (CONTEXT - 1) >= begin && position + 1 < end, "position %u\n",
                  position);
            return;
        }
    }
    CHECK(false, "position %u is in no part\n", position);
}

static void check_rows(const corpus *c, const uint32_t *positions, bool held_out) {
    for (uint32_t t = 0; t < SEQUENCES * SEQUENCE; t++) {
        check_inside(c, positions[t], held_out);
        CHECK(t % SEQUENCE == 0 || positions[t] == positions[t - 1] + 1, "token %u\n", t);
    }
}

static void parts(void **state) {
    (void)state;
    corpus c = read_texts();
    uint32_t positions[SEQUENCES * SEQUENCE], again[SEQUENCES * SEQUENCE], seen[FILES] = {0};
    for (int i = 0; i < FILES; i++) /* the last twentieth */
        CHECK(c.files[i].end - c.files[i].held_out == sizes[i] / 20, "file %d\n", i);
    for (uint32_t step = 0; step < DRAWS; step++) {
        corpus_draw(&c, 9, step, SEQUENCES, positions);
        corpus_draw(&c, 9, step, SEQUENCES, again);
        compare_bits("positions", again, positions, sizeof positions);
        check_rows(&c, positions, false);
        for (uint32_t i = 0; i < FILES; i++)
            seen[i] += positions[0] >= c.files[i].begin && positions[0] < c.files[i].end;
        corpus_draw(&c, 10, step, SEQUENCES, again);
        CHECK(memcmp(again, positions, sizeof again) != 0, "another seed gives the same\n");
    }
    CHECK(seen[0] > 20 && seen[2] > 20 && seen[1] > 200, "files in proportion: %u %u %u\n", seen[0],
          seen[1], seen[2]);
    corpus_held_out(&c, 0, SEQUENCES, SEQUENCES, positions);
    check_rows(&c, positions, true);
    corpus_free(&c);
}

static void sorted(void **state) {
    (void)state;
    enum { T = SEQUENCES * SEQUENCE };
    corpus c = read_texts();
    uint32_t positions[T], rows[T * CONTEXT], first[CONTEXT * 256 + 1];
    corpus_draw(&c, 1, 2, SEQUENCES, positions);
    memset(rows, 0xff, sizeof rows);
    corpus_sort(&c, positions, T, rows, first);
    for (uint32_t j = 0; j < CONTEXT; j++) {
        uint32_t at = j * T;
        for (uint32_t b = 0; b < 256; b++) {
            CHECK(first[j * 256 + b] == at, "distance %u, byte %u\n", j, b);
            for (uint32_t t = 0; t < T; t++)
                if (c.bytes[positions[t] - j] == b)
                    CHECK(rows[at++] == t, "distance %u, byte %u, token %u\n", j, b, t);
        }
    }
    CHECK(first[CONTEXT * 256] == T * CONTEXT, "the end is %u\n", first[CONTEXT * 256]);
    corpus_free(&c);
}

static void refused(void **state) {
    (void)state;
    corpus c = {.context = 16, .sequence = SEQUENCE}; /* 24 * 20 = 480 bytes at least */
    corpus whole = read_texts();
    const char *names[] = {paths[1], paths[0]}, *missing = "/tmp/clmoe-no-such-text";
    CHECK(corpus_read(&c, names, 2) == CLMOE_BAD_FILE && strstr(cli_error(), paths[0]) &&
              strstr(cli_error(), "480"),
          "%s\n", cli_error());
    CHECK(corpus_read(&c, &missing, 1) == CLMOE_IO && strstr(cli_error(), missing), "%s\n",
          cli_error());
    missing = "/tmp";
    CHECK(corpus_read(&c, &missing, 1) == CLMOE_IO, "a folder is read\n");
    FILE *empty = fopen(paths[0], "wb");
    CHECK(empty != NULL && fclose(empty) == 0, "no file\n");
    c.whole = true; /* of which two empty files are no bytes, not no memory */
    names[0] = paths[0];
    OK(corpus_read(&c, names, 2));
    corpus_free(&c);
    corpus_free(&whole);
}

int main(void) {
    const struct CMUnitTest tests[] = {TEST(parts), TEST(sorted), TEST(refused)};
    return RUN(tests);
}
