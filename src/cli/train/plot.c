#include "plot.h"
#include "../interrupt.h"

#include <errno.h>
#include <math.h>
#include <signal.h>
#include <spawn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

enum { WIDTH = 760, HEIGHT = 320, CODE_NOT_FOUND = 127 };
/* Of maps: log2 at the ends of the colours; columns with room for numbers; rows that are high. */
enum { MAP_MOST = 3, MAP_WIDE = 14, MAP_TALL = 20 };

/* Numbers above make gnuplot lose its axes. */
#define MOST_VALUE 1e30

/* ---- Figures --------------------------------------------------------------------------------- */

plot_curve *plot_add(plot_figure *f, uint32_t points) {
    if (f->count == f->room) {
        const uint32_t room = f->room > 0 ? 2 * f->room : 8;
        plot_curve *curves = realloc(f->curves, room * sizeof *curves);
        if (curves == NULL)
            return NULL;
        f->curves = curves;
        f->room = room;
    }
    plot_curve *curve = &f->curves[f->count];
    *curve = (plot_curve){.x = calloc(points + 1, sizeof(double)),
                          .y = calloc(points + 1, sizeof(double))};
    f->count++;
    plot_colour(f->count - 1, curve->colour);
    return curve->x != NULL && curve->y != NULL ? curve : NULL;
}

void plot_free(plot_figure *f) {
    for (uint32_t i = 0; i < f->count; i++) {
        free(f->curves[i].x);
        free(f->curves[i].y);
    }
    free(f->curves);
    f->curves = NULL;
    f->count = f->room = 0;
}

/* A part of a colour from its hue in degrees, all with one saturation. */
static unsigned channel(double hue, double light, double shift) {
    const double saturation = 0.62, k = fmod(shift + hue / 30, 12);
    const double span = saturation * fmin(light, 1 - light);
    return (unsigned)lround(255 * (light - span * fmax(-1, fmin(fmin(k - 3, 9 - k), 1))));
}

/* Eight well known ones, then 14 hues in four lights; the next one is far in both. */
void plot_colour(uint32_t n, char colour[PLOT_COLOUR]) {
    enum { FIRST = 8, HUES = 14, ACROSS = 5, LIGHTS = 4 };
    static const char *const first[FIRST] = {"#4e79a7", "#f28e2b", "#59a14f", "#e15759",
                                             "#b07aa1", "#edc948", "#76b7b2", "#9c755f"};
    static const double lights[LIGHTS] = {0.40, 0.78, 0.27, 0.62};
    if (n < FIRST) {
        snprintf(colour, PLOT_COLOUR, "%s", first[n]);
        return;
    }
    const uint32_t i = n - FIRST;
    const double hue = 360.0 * (i * ACROSS % HUES) / HUES, light = lights[(i + i / HUES) % LIGHTS];
    snprintf(colour, PLOT_COLOUR, "#%02x%02x%02x", channel(hue, light, 0) & 255,
             channel(hue, light, 8) & 255, channel(hue, light, 4) & 255);
}

/* ---- The script ------------------------------------------------------------------------------ */

static bool has_point(const plot_curve *c, uint32_t i) {
    return fabs(c->x[i]) <= MOST_VALUE && fabs(c->y[i]) <= MOST_VALUE;
}

/* x, y, and for an area the curve before it. */
static uint32_t write_points(const plot_figure *f, uint32_t index, FILE *script) {
    const plot_curve *c = &f->curves[index];
    const bool area = c->style == PLOT_AREA;
    uint32_t points = 0;
    fprintf(script, "$c%u << E\n", (unsigned)index);
    for (uint32_t i = 0; i < c->count; i++) {
        if (!has_point(c, i))
            continue;
        fprintf(script, "%.7g %.7g", c->x[i], c->y[i]);
        fprintf(script, area ? " %.7g\n" : "\n", area && index > 0 ? f->curves[index - 1].y[i] : 0);
        points++;
    }
    fputs("E\n", script);
    return points;
}

static void write_curve(const plot_figure *f, uint32_t index, FILE *script) {
    static const char *const styles[] = {
        [PLOT_LINE] = "1:2 with lines lw 2",
        [PLOT_THIN] = "1:2 with lines lw 1",
        [PLOT_DOTTED] = "1:2 with linespoints lw 2 pt 7 ps 0.5",
        [PLOT_DOTS] = "1:2 with points pt 7 ps 0.9",
        [PLOT_MARKED] = "1:2 with points pt 7 ps 1.6",
        [PLOT_AREA] = "1:3:2 with filledcurves",
    };
    const plot_curve *c = &f->curves[index];
    fprintf(script, "$c%u using %s lc rgb '%s' title '%s', ", (unsigned)index, styles[c->style],
            c->colour, c->number);
}

/* Numbers beside dots, and of the areas at their right end where there is room. */
static void write_labels(const plot_figure *f, FILE *script) {
    for (uint32_t i = 0; i < f->count; i++) {
        const plot_curve *c = &f->curves[i];
        const bool dots = c->style == PLOT_DOTS || c->style == PLOT_MARKED;
        if (dots && c->count > 0 && has_point(c, 0))
            fprintf(script, "set label '%s' at %.7g,%.7g offset 1.2,0.6\n", c->number, c->x[0],
                    c->y[0]);
        if (c->style != PLOT_AREA || c->count == 0)
            continue;
        const double top = c->y[c->count - 1];
        const double base = i > 0 ? f->curves[i - 1].y[c->count - 1] : 0;
        if (top - base >= 0.045 * f->y_most)
            fprintf(script, "set label '%s' at graph 1.012, first %.7g\n", c->number,
                    (top + base) / 2);
    }
}

static void begin_script(int height, FILE *script) {
    fprintf(script,
            "set terminal svg size %d,%d dynamic noenhanced font 'sans-serif,14' background "
            "'#ffffff'\nset encoding utf8\nunset key\n",
            WIDTH, height);
}

/* False: there is nothing to draw. */
static bool write_curves(const plot_figure *f, FILE *script) {
    bool any = false;
    begin_script(HEIGHT, script);
    fprintf(script,
            "set border 3\nset tics nomirror out\nset grid ytics lc rgb '#dddddd'\n"
            "set lmargin 11\nset rmargin 5\nset xlabel '%s'\nset ylabel '%s'\n",
            f->x_name, f->y_name);
    if (f->y_most > 0)
        fprintf(script, "set yrange [0:%.7g]\n", f->y_most);
    else if (f->y_from_0)
        fputs("set yrange [0:*]\n", script);
    if (f->over_steps)
        fputs("set xrange [0:*] noextend\n", script);
    if (f->x_log)
        fputs("set logscale x\n", script);
    write_labels(f, script);
    bool *drawn = calloc(f->count + 1, sizeof *drawn);
    for (uint32_t i = 0; i < f->count && drawn != NULL; i++) {
        drawn[i] = write_points(f, i, script) > 0;
        any = any || drawn[i];
    }
    fputs("plot ", script);
    for (uint32_t i = 0; i < f->count && drawn != NULL; i++)
        if (drawn[i])
            write_curve(f, i, script);
    fputc('\n', script);
    free(drawn);
    return any;
}

/* ---- The script of a map -----------------------------------------------------------------------
 */

/* Cells: x y, and where they have a value the colour and a text. How many there are. */
static uint32_t write_cells(const plot_map *m, bool grey, FILE *script) {
    uint32_t cells = 0;
    fprintf(script, "$%s << E\n", grey ? "grey" : "cells");
    for (uint32_t r = 0; r < m->rows; r++)
        for (uint32_t c = 0; c < m->columns; c++) {
            const double value = m->values[r][c], shown = m->shown[r][c];
            if (isnan(value) != grey)
                continue;
            fprintf(script, "%.7g %u", m->at[c], (unsigned)r);
            if (!grey)
                fprintf(script, shown < 9.95 ? " %.7g \"%.1f\"" : " %.7g \"%.0f\"",
                        fmax(-MAP_MOST, fmin(value, MAP_MOST)), shown);
            fputc('\n', script);
            cells++;
        }
    fputs("E\n", script);
    return cells;
}

static void write_names(const plot_map *m, FILE *script) {
    fprintf(script, "set x2tics scale 0 font ',12'%s (",
            m->columns > MAP_WIDE ? " rotate by 90" : "");
    for (uint32_t c = 0; c < m->columns; c++)
        fprintf(script, "%s'%s' %.7g", c > 0 ? "," : "", m->names[c], m->at[c]);
    fputs(")\nset ytics scale 0 (", script);
    for (uint32_t r = 0; r < m->rows; r++)
        fprintf(script, "%s'%s' %u", r > 0 ? "," : "", m->row_names[r], (unsigned)r);
    fputs(")\n", script);
}

/* False: there is nothing to draw. The colours are those that people with any eyes tell apart. */
static bool write_map(const plot_map *m, FILE *script) {
    const bool wide = m->columns > MAP_WIDE;
    const int rows = (int)m->rows, cells = rows * (rows > MAP_TALL ? 15 : 24);
    begin_script((cells > 140 ? cells : 140) + (wide ? 80 : 60), script);
    fprintf(script,
            "set border 0\nset lmargin 7\nset rmargin 15\nset bmargin 1\nset tmargin %d\n"
            "unset xtics\nset xrange [%.7g:%.7g]\nset x2range [%.7g:%.7g]\n"
            "set yrange [%d.5:-0.5]\nset cbrange [-%d:%d]\n"
            "set palette maxcolors 60 defined (-3 '#3b7fb9', 0 '#f6f6f6', 3 '#d6604d')\n"
            "set cbtics scale 0 ('8 times or more' 3,'4 times' 2,'twice' 1,'as the mean' 0,"
            "'half' -1,'a quarter' -2,'1/8 or less' -3)\n",
            wide ? 4 : 2, m->at[0] - 0.5, m->at[m->columns - 1] + 0.5, m->at[0] - 0.5,
            m->at[m->columns - 1] + 0.5, rows - 1, MAP_MOST, MAP_MOST);
    write_names(m, script);
    const bool any = write_cells(m, false, script) > 0;
    const bool grey = write_cells(m, true, script) > 0;
    fputs("plot $cells using 1:2:(0.48):(0.46):3 with boxxyerror fs solid noborder lc palette",
          script);
    if (grey)
        fputs(", $grey using 1:2:(0.48):(0.46) with boxxyerror fs solid noborder lc rgb '#cccccc'",
              script);
    fputs(wide ? "\n" : ", $cells using 1:2:4 with labels font ',11'\n", script);
    return any;
}

/* ---- gnuplot --------------------------------------------------------------------------------- */

/* What the child reads and writes: files without names, which are gone whatever happens. */
typedef struct plot_files {
    FILE *script, *svg, *errors;
} plot_files;

static void close_files(plot_files *files) {
    FILE *all[] = {files->script, files->svg, files->errors};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
        if (all[i] != NULL)
            fclose(all[i]);
}

static bool open_files(plot_files *files, problem *why) {
    *files = (plot_files){tmpfile(), tmpfile(), tmpfile()};
    return (files->script && files->svg && files->errors) ||
           problem_set(why, "no temporary file: %s", strerror(errno));
}

/* What interrupt_catch() ignores and blocks would stay so in a child. */
static int spawn(const plot_files *files, pid_t *child) {
    char name[] = "gnuplot", defaults[] = "-d", *words[] = {name, defaults, NULL};
    posix_spawn_file_actions_t actions;
    posix_spawnattr_t attributes;
    sigset_t set, mask;
    sigemptyset(&set);
    sigaddset(&set, SIGPIPE);
    interrupt_mask(&mask);
    posix_spawn_file_actions_init(&actions);
    posix_spawnattr_init(&attributes);
    posix_spawnattr_setsigdefault(&attributes, &set);
    posix_spawnattr_setsigmask(&attributes, &mask);
    posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETSIGMASK);
    posix_spawn_file_actions_adddup2(&actions, fileno(files->script), STDIN_FILENO);
    posix_spawn_file_actions_adddup2(&actions, fileno(files->svg), STDOUT_FILENO);
    posix_spawn_file_actions_adddup2(&actions, fileno(files->errors), STDERR_FILENO);
    const int code = posix_spawnp(child, name, &actions, &attributes, words, environ);
    posix_spawnattr_destroy(&attributes);
    posix_spawn_file_actions_destroy(&actions);
    return code;
}

/* The first line that says something, without its end. */
static void first_line(FILE *file, char *line, int size) {
    rewind(file);
    while (fgets(line, size, file) != NULL) {
        line[strcspn(line, "\n")] = '\0';
        if (line[strspn(line, " ^")] != '\0')
            return;
    }
    snprintf(line, (size_t)size, "no reason");
}

static plot_result run_gnuplot(const plot_files *files, problem *why) {
    pid_t child;
    int state = 0;
    char line[200];
    const int code = spawn(files, &child);
    if (code == ENOENT)
        return PLOT_NO_GNUPLOT;
    if (code != 0) {
        problem_set(why, "gnuplot cannot be started: %s", strerror(code));
        return PLOT_FAILED;
    }
    while (waitpid(child, &state, 0) < 0 && errno == EINTR) {
    }
    if (WIFEXITED(state) && WEXITSTATUS(state) == 0)
        return PLOT_DRAWN;
    if (WIFEXITED(state) && WEXITSTATUS(state) == CODE_NOT_FOUND)
        return PLOT_NO_GNUPLOT;
    first_line(files->errors, line, sizeof line);
    problem_set(why, "gnuplot failed: %s", line);
    return PLOT_FAILED;
}

/* ---- The picture ----------------------------------------------------------------------------- */

/* A line whose ids, and links to them, begin anew. */
static void write_line(const char *line, uint32_t number, FILE *out) {
    static const char *const marks[] = {"id='", "id=\"", "href='#"};
    while (*line != '\0') {
        size_t length = 0;
        for (size_t i = 0; i < sizeof marks / sizeof marks[0] && length == 0; i++)
            if (strncmp(line, marks[i], strlen(marks[i])) == 0)
                length = strlen(marks[i]);
        if (length > 0)
            fprintf(out, "%.*sp%u_", (int)length, line, (unsigned)number);
        else
            fputc(*line, out);
        line += length > 0 ? length : 1;
    }
}

/* gnuplot's title is its own name; the XML declaration belongs to a file. */
static bool copy_svg(const plot_figure *f, uint32_t number, FILE *svg, FILE *out) {
    char *line = NULL;
    size_t room = 0;
    bool titled = false, whole = false;
    rewind(svg);
    while (getline(&line, &room, svg) > 0) {
        const bool title = !titled && strncmp(line, "<title>", 7) == 0;
        if (title)
            fprintf(out, "<title>%s</title>\n", f->title);
        else if (strncmp(line, "<?xml", 5) != 0)
            write_line(line, number, out);
        titled = titled || title;
        whole = whole || strstr(line, "</svg>") != NULL;
    }
    free(line);
    return whole;
}

plot_result plot_draw(const plot_figure *f, uint32_t number, FILE *out, problem *why) {
    plot_files files;
    plot_result result = PLOT_FAILED;
    if (open_files(&files, why)) {
        const bool any =
            f->map != NULL ? write_map(f->map, files.script) : write_curves(f, files.script);
        result = any ? PLOT_DRAWN : PLOT_EMPTY;
        rewind(files.script);
        if (result == PLOT_DRAWN)
            result = run_gnuplot(&files, why);
        if (result == PLOT_DRAWN && !copy_svg(f, number, files.svg, out)) {
            problem_set(why, "gnuplot has drawn no whole picture");
            result = PLOT_FAILED;
        }
    }
    close_files(&files);
    return result;
}
