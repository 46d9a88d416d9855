/* Pictures: gnuplot, where it is installed, draws them as SVG. */
#ifndef CLMOE_CLI_TRAIN_PLOT_H
#define CLMOE_CLI_TRAIN_PLOT_H

#include "../error.h"

#include <stdio.h>

enum { PLOT_COLOUR = 8, PLOT_POINTS = 400, MAP_ROWS = 64, MAP_COLUMNS = 72, MAP_NAME = 16 };

typedef enum plot_style {
    PLOT_LINE,
    PLOT_THIN,   /* a pale line */
    PLOT_DOTTED, /* a line with a dot at each point */
    PLOT_DOTS,   /* dots alone, each with the curve's number beside it */
    PLOT_MARKED, /* the same, large */
    PLOT_AREA,   /* between the curve before it, or 0, and its own */
} plot_style;

/* Points with a NAN or an infinity are left out. */
typedef struct plot_curve {
    const char *name; /* of the legend; it never reaches gnuplot */
    char number[24];  /* behind it, or instead: "layer 3"; nothing that a user writes */
    char colour[PLOT_COLOUR];
    plot_style style;
    bool unnamed; /* the legend leaves it out */
    uint32_t count;
    double *x, *y; /* [count] */
} plot_curve;

/*
 * A table as a picture: the colour of a cell is log2 of how many times as large as usual it is.
 * Names are the program's own. NAN: a grey cell; nothing is shown in it.
 */
typedef struct plot_map {
    uint32_t rows, columns;
    char row_names[MAP_ROWS][MAP_NAME], names[MAP_COLUMNS][MAP_NAME];
    double at[MAP_COLUMNS]; /* where a column is; it is 1 wide */
    double values[MAP_ROWS][MAP_COLUMNS];
    double shown[MAP_ROWS][MAP_COLUMNS]; /* the number in the cell, where there is room for it */
} plot_map;

/* Start from {0} and the names, which are the program's own and have no quotes. */
typedef struct plot_figure {
    const char *title, *x_name, *y_name;
    double y_most; /* 0: as the curves have it */
    bool y_from_0; /* y_most > 0 means it, too */
    bool over_steps, x_log;
    plot_curve *curves; /* [count] */
    uint32_t count, room;
    const plot_map *map; /* instead of curves and axes, or NULL */
} plot_figure;

/* A new curve with room for so many points, whose count and style are to be set; NULL: no memory.
 */
plot_curve *plot_add(plot_figure *figure, uint32_t points);
void plot_free(plot_figure *figure);
/* The n-th of so many colours, of which neighbours differ. */
void plot_colour(uint32_t n, char colour[PLOT_COLOUR]);

typedef enum plot_result { PLOT_DRAWN, PLOT_EMPTY, PLOT_NO_GNUPLOT, PLOT_FAILED } plot_result;

/*
 * Writes an svg element. Its ids begin with p and the number, so that many of them are in one
 * document. PLOT_EMPTY: no curve has a point, no cell a value. PLOT_FAILED: `why` has what gnuplot
 * says.
 */
plot_result plot_draw(const plot_figure *figure, uint32_t number, FILE *out, problem *why);

#endif
