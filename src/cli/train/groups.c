#include "groups.h"
#include "describe.h"

#include <math.h>
#include <stdlib.h>

/* ---- Seeds ----------------------------------------------------------------------------------- */

static bool has_none(const balance_methods *methods) {
    return methods->count == 0 || methods->rows[0].row->kind == METHOD_NONE;
}

/* Whether the means of --balance are the same, with the same numbers but for one's. */
static bool same_methods(const balance_methods *a, const balance_methods *b, uint32_t but) {
    bool same = a->count == b->count;
    for (uint32_t i = 0; same && i < a->count; i++)
        same = a->rows[i].row == b->rows[i].row &&
               (i == but ||
                !(a->rows[i].value < b->rows[i].value || a->rows[i].value > b->rows[i].value));
    return same || (has_none(a) && has_none(b));
}

static bool alike(const run_record *a, const run_record *b, uint32_t but) {
    return a->steps == b->steps && same_methods(&a->settings.methods, &b->settings.methods, but) &&
           settings_same_but_balance(&a->settings, &b->settings);
}

/* A run with the seed of another one is no further seed, but the same once more. */
static bool belongs(const comparison *c, uint32_t run, uint32_t group) {
    for (uint32_t i = 0; i < run; i++)
        if (c->group_of[i] == group && c->runs[i].settings.seed == c->runs[run].settings.seed)
            return false;
    return alike(&c->runs[run], c->groups[group].lead, UINT32_MAX);
}

static void add_run(comparison *c, uint32_t run) {
    uint32_t group = 0;
    while (group < c->num_groups && !belongs(c, run, group))
        group++;
    c->group_of[run] = group;
    if (group == c->num_groups) {
        c->groups[group] = (run_group){.lead = &c->runs[run], .sweep = NO_SWEEP};
        c->num_groups++;
    }
    c->groups[group].count++;
}

static void set_means(comparison *c, uint32_t group, run_figure figure) {
    run_group *g = &c->groups[group];
    double sum = 0, squares = 0;
    for (uint32_t i = 0; i < c->num_runs; i++)
        if (c->group_of[i] == group)
            sum += c->runs[i].figures[figure];
    g->mean[figure] = sum / g->count;
    for (uint32_t i = 0; i < c->num_runs; i++)
        if (c->group_of[i] == group)
            squares += pow(c->runs[i].figures[figure] - g->mean[figure], 2);
    g->spread[figure] = g->count > 1 ? sqrt(squares / (g->count - 1)) : NAN;
}

/* ---- Sweeps ---------------------------------------------------------------------------------- */

/* Whether a group, which is in no sweep yet, is in one with `first` that changes that number. */
static bool in_sweep(const run_group *first, const run_group *g, uint32_t method) {
    return g->sweep == NO_SWEEP && alike(first->lead, g->lead, method);
}

static void find_sweep(comparison *c, uint32_t first, uint32_t method) {
    const balance_method *row = &c->groups[first].lead->settings.methods.rows[method];
    bool differs = false;
    for (uint32_t i = first + 1; i < c->num_groups; i++)
        differs = differs || (in_sweep(&c->groups[first], &c->groups[i], method) &&
                              !alike(c->groups[first].lead, c->groups[i].lead, UINT32_MAX));
    if (!differs || !balance_has_number(row))
        return;
    for (uint32_t i = first; i < c->num_groups; i++) {
        run_group *g = &c->groups[i];
        if (!in_sweep(&c->groups[first], g, method))
            continue;
        g->sweep = c->num_sweeps;
        g->method = method;
        g->weight = g->lead->settings.methods.rows[method].value;
    }
    c->num_sweeps++;
}

static bool is_better(const run_group *a, const run_group *b) {
    const double loss = a->mean[FIGURE_FINAL] - b->mean[FIGURE_FINAL];
    const double violation = a->mean[FIGURE_VIOLATION] - b->mean[FIGURE_VIOLATION];
    return loss <= 0 && violation <= 0 && (loss < 0 || violation < 0);
}

static void mark_pareto(comparison *c) {
    for (uint32_t i = 0; i < c->num_groups; i++) {
        run_group *g = &c->groups[i];
        g->pareto = g->sweep != NO_SWEEP && isfinite(g->mean[FIGURE_FINAL]) &&
                    isfinite(g->mean[FIGURE_VIOLATION]);
        for (uint32_t k = 0; k < c->num_groups; k++)
            if (c->groups[k].sweep == g->sweep && is_better(&c->groups[k], g))
                g->pareto = false;
    }
}

clmoe_status comparison_make(comparison *c) {
    c->group_of = calloc(c->num_runs + 1, sizeof *c->group_of);
    c->groups = calloc(c->num_runs + 1, sizeof *c->groups);
    if (c->group_of == NULL || c->groups == NULL)
        return cli_fail(CLMOE_OUT_OF_MEMORY, "no memory to compare %u runs", (unsigned)c->num_runs);
    for (uint32_t i = 0; i < c->num_runs; i++)
        add_run(c, i);
    for (uint32_t group = 0; group < c->num_groups; group++)
        for (run_figure figure = 0; figure < RUN_FIGURES; figure++)
            set_means(c, group, figure);
    for (uint32_t group = 0; group < c->num_groups; group++)
        for (uint32_t m = 0; m < c->groups[group].lead->settings.methods.count; m++)
            if (c->groups[group].sweep == NO_SWEEP)
                find_sweep(c, group, m);
    mark_pareto(c);
    return CLMOE_SUCCESS;
}

void comparison_free(comparison *c) {
    free(c->group_of);
    free(c->groups);
}
