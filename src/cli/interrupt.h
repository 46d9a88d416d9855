/* Ctrl-C and its like: work stops at the next good place, and what was done until then is kept. */
#ifndef CLMOE_CLI_INTERRUPT_H
#define CLMOE_CLI_INTERRUPT_H

#include "problem.h"

#include <signal.h>

/*
 * From now on SIGINT, SIGTERM and SIGHUP are remembered by a thread of their own, blocked in this
 * one and those it begins; another one, a second later, ends the process. One that the caller
 * ignores stays ignored. A closed pipe is an error of writing and not the end.
 */
void interrupt_catch(void);

/* In a child that was forked: as before interrupt_catch(). */
void interrupt_release(void);

/* The signals that a program which is started may block: those of before interrupt_catch(). */
void interrupt_mask(sigset_t *mask);

/* The signal that came, or 0. */
int interrupt_signal(void);

/* "interrupted by SIGINT; WHAT"; false. */
bool interrupt_problem(problem *why, const char *what);

/* What a shell gives for a process that the signal ended. */
int interrupt_exit_code(void);

#endif
