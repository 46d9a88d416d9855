#include "interrupt.h"

#include <signal.h>
#include <stddef.h>
#include <time.h>
#include <unistd.h>

static volatile sig_atomic_t caught, second_of_first;
static bool catching;

static const int signals[] = {SIGINT, SIGTERM, SIGHUP};

enum { SIGNALS = sizeof signals / sizeof signals[0] };

/*
 * A signal may come twice at once: timeout(1) sends it to the process and to its group. One that
 * comes after a second means that the user does not want to wait.
 */
static void remember(int signal) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    if (caught != 0 && (int)now.tv_sec - second_of_first > 1)
        _exit(128 + signal);
    if (caught == 0)
        second_of_first = (int)now.tv_sec;
    caught = signal;
}

static void handle(int signal, void (*handler)(int), int flags) {
    struct sigaction before, action = {.sa_handler = handler, .sa_flags = flags};
    sigemptyset(&action.sa_mask);
    if (sigaction(signal, NULL, &before) == 0 && before.sa_handler != SIG_IGN)
        sigaction(signal, &action, NULL);
}

static void catch_signals(void) {
    for (size_t i = 0; i < SIGNALS; i++)
        handle(signals[i], remember, (int)SA_RESTART);
}

void interrupt_catch(void) {
    catching = true;
    catch_signals();
    handle(SIGPIPE, SIG_IGN, 0);
}

void interrupt_release(void) {
    catching = false;
    for (size_t i = 0; i < SIGNALS; i++)
        handle(signals[i], SIG_DFL, 0);
}

/* A driver's compiler may leave handlers of its own, as PoCL's does, which end the process. */
int interrupt_signal(void) {
    if (catching)
        catch_signals();
    return caught;
}

bool interrupt_problem(problem *why, const char *what) {
    const char *name = caught == SIGINT ? "SIGINT" : caught == SIGTERM ? "SIGTERM" : "SIGHUP";
    return problem_set(why, "interrupted by %s%s%s", name, what[0] != '\0' ? "; " : "", what);
}

int interrupt_exit_code(void) {
    return 128 + caught;
}
