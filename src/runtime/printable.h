/* Text of files, made fit for a terminal or a log. */
#ifndef CLMOE_PRINTABLE_H
#define CLMOE_PRINTABLE_H

#include <stddef.h>

/*
 * Copies `text`, as much as fits, with each byte of control characters, of marks that turn the
 * direction of text, and of what is not UTF-8 as \xNN: names in a file can then neither move the
 * cursor nor fake lines.
 */
void printable(const char *text, char *out, size_t size);

#endif
