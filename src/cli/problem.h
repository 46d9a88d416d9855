/* Why something cannot be, as a sentence. */
#ifndef CLMOE_CLI_PROBLEM_H
#define CLMOE_CLI_PROBLEM_H

#include <stdbool.h>

typedef struct problem {
    char text[1024];
} problem;

#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
/* Writes the sentence and gives false: return problem_set(why, ...). */
bool problem_set(problem *why, const char *format, ...);

#endif
