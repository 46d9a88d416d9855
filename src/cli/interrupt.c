#include "interrupt.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <time.h>
#include <unistd.h>

static atomic_int caught, second_of_first;

/* Of the process before interrupt_catch(), and what is waited for since. */
static sigset_t before, awaited;
static bool catching;

enum { SIGNALS = 3 };
static const int signals[SIGNALS] = {SIGINT, SIGTERM, SIGHUP};
static bool ignored[SIGNALS]; /* by the caller */

/*
 * A signal may come twice at once: timeout(1) sends it to the process and to its group. One that
 * comes after a second means that the user does not want to wait.
 */
static void remember(int signal) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    if (caught != 0 && (int)now.tv_sec - second_of_first > 1)
        _exit(128 + signal);
    if (caught == 0) {
        second_of_first = (int)now.tv_sec;
        caught = signal;
    }
}

static void remember_all(const sigset_t *set) {
    for (size_t i = 0; i < SIGNALS; i++)
        if (!ignored[i] && sigismember(&awaited, signals[i]) == 1 &&
            sigismember(set, signals[i]) == 1)
            remember(signals[i]);
}

static void *wait_for_signals(void *none) {
    int signal;
    while (sigwait(&awaited, &signal) == 0) {
        sigset_t one;
        sigemptyset(&one);
        sigaddset(&one, signal);
        remember_all(&one);
    }
    return none;
}

/* Those that the caller does not block. What it ignores is waited for, too: not to end by it. */
static void choose_awaited(void) {
    sigemptyset(&awaited);
    for (size_t i = 0; i < SIGNALS; i++) {
        struct sigaction action;
        ignored[i] = sigaction(signals[i], NULL, &action) == 0 && action.sa_handler == SIG_IGN;
        if (sigismember(&before, signals[i]) == 0)
            sigaddset(&awaited, signals[i]);
    }
}

static void handle(int signal, void (*handler)(int)) {
    struct sigaction action = {.sa_handler = handler, .sa_flags = (int)SA_RESTART};
    sigemptyset(&action.sa_mask);
    sigaction(signal, &action, NULL);
}

/* For threads that a library began before main(), as OpenBLAS does, and that block nothing. */
static void handle_all(void) {
    for (size_t i = 0; i < SIGNALS; i++)
        if (!ignored[i])
            handle(signals[i], remember);
}

/*
 * Blocked in this thread and all that it begins: a driver's compiler may install handlers of its
 * own, as PoCL's does, which would end the process. They are never called.
 */
void interrupt_catch(void) {
    pthread_t waiter;
    signal(SIGPIPE, SIG_IGN);
    if (pthread_sigmask(SIG_BLOCK, NULL, &before) != 0)
        return;
    choose_awaited();
    pthread_sigmask(SIG_BLOCK, &awaited, NULL);
    catching = pthread_create(&waiter, NULL, wait_for_signals, NULL) == 0;
    if (!catching) { /* a signal ends the process, as any other one */
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        return;
    }
    pthread_detach(waiter);
    handle_all();
}

void interrupt_release(void) {
    if (!catching)
        return;
    catching = false;
    for (size_t i = 0; i < SIGNALS; i++)
        handle(signals[i], ignored[i] ? SIG_IGN : SIG_DFL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

void interrupt_mask(sigset_t *mask) {
    if (catching)
        *mask = before;
    else
        pthread_sigmask(SIG_BLOCK, NULL, mask);
}

/* One that its thread has not been given yet is seen all the same. A compiler's handlers go. */
int interrupt_signal(void) {
    sigset_t pending;
    if (catching)
        handle_all();
    if (catching && caught == 0 && sigpending(&pending) == 0)
        remember_all(&pending);
    return caught;
}

bool interrupt_problem(problem *why, const char *what) {
    const char *name = caught == SIGINT ? "SIGINT" : caught == SIGTERM ? "SIGTERM" : "SIGHUP";
    return problem_set(why, "interrupted by %s%s%s", name, what[0] != '\0' ? "; " : "", what);
}

int interrupt_exit_code(void) {
    return 128 + caught;
}
