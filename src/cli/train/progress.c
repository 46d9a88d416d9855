#include "progress.h"

#include <time.h>
#include <unistd.h>

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

void progress_begin(progress *p, const train_settings *s, uint32_t done) {
    *p = (progress){.settings = s, .terminal = isatty(STDERR_FILENO) == 1, .first = done};
    p->begin = p->last = now();
    p->last_step = done;
}

double progress_speed(progress *p, uint32_t steps) {
    const double time = now();
    const double speed =
        (double)(steps - p->last_step) * p->settings->batch / (time - p->last + 1e-9);
    p->last = time;
    p->last_step = steps;
    return speed;
}

void progress_pause(progress *p) {
    p->paused = now();
}

void progress_go_on(progress *p) {
    p->last += now() - p->paused;
}

/* "1:05" */
static void time_text(double seconds, char text[16]) {
    const unsigned whole = seconds > 0 && seconds < 3.5e6 ? (unsigned)seconds : 0;
    snprintf(text, 16, "%u:%02u", whole / 60, whole % 60);
}

static double left(const progress *p, const metrics *r) {
    const double each = (now() - p->begin) / (r->step - p->first);
    return each * (p->settings->steps - r->step);
}

void progress_show(progress *p, const metrics *r) {
    char eta[16], balance[80] = "";
    time_text(left(p, r), eta);
    if (!p->terminal && !r->validated)
        return;
    if (r->counted)
        snprintf(balance, sizeof balance, "  MaxVio %5.2f  dead %u  drops %4.1f %%",
                 metrics_violation(r), (unsigned)metrics_dead(r), 100 * metrics_drop_rate(r));
    fprintf(stderr, "%sstep %u/%u  loss %.3f%s  %.0f tokens/s  ETA %s", p->terminal ? "\r" : "",
            (unsigned)r->step, (unsigned)p->settings->steps, r->loss, balance, r->tokens_per_second,
            eta);
    if (r->validated)
        fprintf(stderr, "  validation %.3f\n", r->validation_loss);
    p->shown = !r->validated;
}

void progress_end(progress *p) {
    if (p->shown && p->terminal)
        fputc('\n', stderr);
}

/* Experts with less than a share of a layer's held-out tokens. */
static uint32_t below(const metrics *r, double share) {
    uint32_t count = 0;
    for (uint32_t l = 0; l < r->layers; l++) {
        const uint32_t *loads = r->validation_loads + (size_t)l * r->experts;
        uint64_t sum = 0;
        for (uint32_t e = 0; e < r->experts; e++)
            sum += loads[e];
        for (uint32_t e = 0; e < r->experts; e++)
            count += loads[e] < share * (double)sum;
    }
    return count;
}

void progress_summary(const train_settings *s, const metrics *r, const char *folder) {
    printf("%s: validation loss %.4f nats per byte after %u steps", folder, r->validation_loss,
           (unsigned)s->steps);
    if (r->counted)
        printf(", MaxVio %.2f, %u of %u experts below %g %% of the tokens", r->validation_violation,
               (unsigned)below(r, 0.16 / s->experts), (unsigned)(s->layers * s->experts),
               16.0 / s->experts);
    putchar('\n');
}
