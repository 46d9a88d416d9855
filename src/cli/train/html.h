/* Documents of one file: nothing in them is loaded from elsewhere. */
#ifndef CLMOE_CLI_TRAIN_HTML_H
#define CLMOE_CLI_TRAIN_HTML_H

#include "plot.h"

/* Start from {file}. */
typedef struct html_page {
    FILE *file;
    uint32_t pictures;
} html_page;

/* Any text, as text. */
void html_text(const html_page *page, const char *text);

void html_begin(const html_page *page, const char *title);
void html_end(const html_page *page);

/* A figure with its title, its legend, and a sentence below, which may be NULL. */
void html_figure(html_page *page, const plot_figure *figure, const char *below);

#endif
