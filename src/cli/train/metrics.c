#include "metrics.h"
#include "folder.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { VALIDATION_BATCHES = 8, LOAD_OFFSET = sizeof(clmoe_stats) };

static const char csv_name[] = "metrics.csv";

/* ---- Measuring
 * ----------------------------------------------------------------------------------- */

clmoe_status metrics_create(metrics *r, const train_model *m) {
    clmoe_loss_desc losses[MOST_LOSSES];
    r->layers = m->settings->layers;
    r->experts = m->settings->experts;
    r->counted = m->phases.counted;
    r->losses = model_losses(m, UINT32_MAX, losses);
    const size_t loads = (size_t)r->layers * r->experts;
    r->stats = calloc(r->layers, sizeof *r->stats);
    r->loads = calloc(loads, sizeof *r->loads);
    r->validation_loads = calloc(loads, sizeof *r->validation_loads);
    r->loss_values = calloc(MOST_LOSSES, sizeof *r->loss_values);
    r->bytes = malloc(m->stats_bytes + 1);
    if (!r->stats || !r->loads || !r->validation_loads || !r->loss_values || !r->bytes)
        return cli_fail(CLMOE_OUT_OF_MEMORY, "no memory for the statistics of %u layers",
                        (unsigned)r->layers);
    return CLMOE_SUCCESS;
}

void metrics_free(metrics *r) {
    free(r->stats);
    free(r->loads);
    free(r->validation_loads);
    free(r->loss_values);
    free(r->bytes);
    *r = (metrics){0};
}

/* A layer's statistics as the last forward left them: the header, and the load to r->loads. */
static clmoe_status read_stats(metrics *r, train_model *m, uint32_t layer) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(model_read(m, m->blocks[layer].stats, m->stats_bytes, r->bytes));
    memcpy(&r->stats[layer], r->bytes, sizeof *r->stats);
    memcpy(r->loads + (size_t)layer * r->experts, r->bytes + LOAD_OFFSET,
           r->experts * sizeof *r->loads);
done:
    return status;
}

/* Losses that do not act yet have no value. */
static clmoe_status read_losses(metrics *r, train_model *m, uint32_t step) {
    clmoe_status status = CLMOE_SUCCESS;
    clmoe_loss_desc losses[MOST_LOSSES];
    float values[MOST_LOSSES];
    const uint32_t count = model_losses(m, step, losses), late = r->losses - count;
    for (uint32_t i = 0; i < r->losses; i++)
        r->loss_values[i] = i < late ? NAN : 0;
    for (uint32_t l = 0; l < r->layers && count > 0; l++) {
        TRY(model_read(m, m->blocks[l].loss_values, count * sizeof values[0], values));
        for (uint32_t i = 0; i < count; i++)
            r->loss_values[late + i] += values[i] / (float)r->layers;
    }
done:
    return status;
}

/* The gradient of the losses, summed up layer by layer. */
static clmoe_status read_gradient(metrics *r, train_model *m, uint32_t step) {
    clmoe_status status = CLMOE_SUCCESS;
    clmoe_loss_desc losses[MOST_LOSSES];
    const size_t count = (size_t)m->settings->batch * r->experts;
    const bool acts = model_losses(m, step, losses) > 0;
    float *values = acts ? malloc(count * sizeof *values) : NULL;
    double squares = 0;
    if (acts && values == NULL)
        return cli_fail(CLMOE_OUT_OF_MEMORY, "no memory for a gradient of the logits");
    for (uint32_t l = 0; l < r->layers && acts; l++) {
        TRY(model_read(m, m->blocks[l].dlogits, count * sizeof *values, values));
        for (size_t i = 0; i < count; i++)
            squares += (double)values[i] * (double)values[i];
    }
    r->balance_gradient = sqrt(squares);
done:
    free(values);
    return status;
}

clmoe_status metrics_gather(metrics *r, train_model *m, uint32_t step) {
    clmoe_status status = CLMOE_SUCCESS;
    r->step = step + 1;
    r->validated = false;
    TRY(model_loss(m, &r->loss));
    TRY(marks_share(&m->marks, &r->moe_share));
    for (uint32_t l = 0; l < r->layers && r->counted; l++)
        TRY(read_stats(r, m, l));
    TRY(read_losses(r, m, step));
    TRY(read_gradient(r, m, step));
done:
    return status;
}

/* MaxVio of a layer's validation loads. */
static double violation_of(const uint32_t *loads, uint32_t experts) {
    uint64_t sum = 0;
    uint32_t most = 0;
    for (uint32_t e = 0; e < experts; e++) {
        sum += loads[e];
        most = loads[e] > most ? loads[e] : most;
    }
    return sum > 0 ? (double)most * experts / (double)sum - 1 : 0;
}

static clmoe_status add_loads(metrics *r, train_model *m) {
    clmoe_status status = CLMOE_SUCCESS;
    for (uint32_t l = 0; l < r->layers && r->counted; l++) {
        uint32_t *loads = r->validation_loads + (size_t)l * r->experts;
        TRY(model_read(m, m->blocks[l].stats, m->stats_bytes, r->bytes));
        for (uint32_t e = 0; e < r->experts; e++) {
            uint32_t load;
            memcpy(&load, r->bytes + LOAD_OFFSET + e * sizeof load, sizeof load);
            loads[e] += load;
        }
    }
done:
    return status;
}

clmoe_status metrics_validate(metrics *r, train_model *m, const corpus *text, uint32_t step) {
    clmoe_status status = CLMOE_SUCCESS;
    const uint32_t sequences = m->settings->batch / m->settings->sequence;
    const uint32_t total = sequences * VALIDATION_BATCHES;
    uint32_t *positions = malloc(m->settings->batch * sizeof *positions);
    double sum = 0, loss;
    if (positions == NULL)
        return cli_fail(CLMOE_OUT_OF_MEMORY, "no memory for a batch to validate");
    memset(r->validation_loads, 0, (size_t)r->layers * r->experts * sizeof *r->validation_loads);
    for (uint32_t i = 0; i < VALIDATION_BATCHES; i++) {
        corpus_held_out(text, i * sequences, sequences, total, positions);
        TRY(model_batch(m, text, positions, false));
        TRY(model_forward(m, step, false));
        TRY(model_loss(m, &loss));
        TRY(add_loads(r, m));
        sum += loss;
    }
    r->validated = true;
    r->validation_loss = sum / VALIDATION_BATCHES;
    r->validation_violation = 0;
    for (uint32_t l = 0; l < r->layers; l++)
        r->validation_violation =
            fmax(r->validation_violation,
                 violation_of(r->validation_loads + (size_t)l * r->experts, r->experts));
done:
    free(positions);
    return status;
}

double metrics_violation(const metrics *r) {
    double most = 0;
    for (uint32_t l = 0; l < r->layers; l++)
        most = fmax(most, (double)r->stats[l].max_violation);
    return most;
}

double metrics_drop_rate(const metrics *r) {
    double sum = 0;
    for (uint32_t l = 0; l < r->layers; l++)
        sum += (double)r->stats[l].drop_rate;
    return sum / r->layers;
}

double metrics_entropy(const metrics *r) {
    double sum = 0;
    for (uint32_t l = 0; l < r->layers; l++)
        sum += (double)r->stats[l].load_entropy;
    return sum / r->layers;
}

uint32_t metrics_dead(const metrics *r) {
    uint32_t sum = 0;
    for (uint32_t l = 0; l < r->layers; l++)
        sum += r->stats[l].dead_experts;
    return sum;
}

/* ---- metrics.csv
 * --------------------------------------------------------------------------------- */

static void write_head(const train_model *m, FILE *file) {
    const train_settings *s = m->settings;
    clmoe_loss_desc losses[MOST_LOSSES];
    const uint32_t count = model_losses(m, UINT32_MAX, losses);
    fputs("step,loss,validation_loss,validation_max_vio,max_vio,entropy,drop_rate,dead_experts,"
          "tokens_per_s,moe_share,balance_gradient",
          file);
    for (uint32_t i = 0; i < count; i++)
        fprintf(file, ",loss_%s", clmoe_loss_name(losses[i].kind));
    for (uint32_t l = 0; l < s->layers && m->phases.counted; l++)
        fprintf(file, ",max_vio_%u", (unsigned)l);
    for (uint32_t l = 0; l < s->layers && m->phases.counted; l++)
        for (uint32_t e = 0; e < s->experts; e++)
            fprintf(file, ",share_%u_%u", (unsigned)l, (unsigned)e);
    fputc('\n', file);
}

/* A line of any length without its end, to be freed; NULL: no more whole ones. */
static char *read_line(FILE *file) {
    char *line = NULL;
    size_t room = 0;
    const ssize_t length = getline(&line, &room, file);
    if (length > 0 && line[length - 1] == '\n') {
        line[length - 1] = '\0';
        return line;
    }
    free(line);
    return NULL;
}

/* The lines of an earlier part of the run, up to `steps`; without any, the head. */
static void copy_lines(const train_model *m, FILE *from, uint32_t steps, FILE *to) {
    char *line = from ? read_line(from) : NULL;
    write_head(m, to);
    if (line == NULL)
        return;
    free(line);
    while ((line = read_line(from)) != NULL) {
        if (strtoul(line, NULL, 10) <= steps)
            fprintf(to, "%s\n", line);
        free(line);
    }
}

clmoe_status metrics_open(const char *folder, const train_model *m, uint32_t steps, FILE **file) {
    clmoe_status status = CLMOE_SUCCESS;
    folder_file replaced = {0};
    FILE *before = NULL;
    char path[PATH_MAX];
    TRY(folder_path(folder, csv_name, path));
    before = fopen(path, "r");
    if (before == NULL && errno != ENOENT)
        TRY(cli_fail(CLMOE_IO, "%s cannot be read: %s", path, strerror(errno)));
    TRY(folder_begin(&replaced, folder, csv_name));
    copy_lines(m, before, steps, replaced.stream);
    if (before != NULL && ferror(before))
        TRY(cli_fail(CLMOE_IO, "%s cannot be read to its end", path));
    TRY(folder_end(&replaced));
    *file = fopen(path, "a");
    if (*file == NULL)
        TRY(cli_fail(CLMOE_IO, "%s cannot be written: %s", path, strerror(errno)));
done:
    if (before != NULL)
        fclose(before);
    folder_drop(&replaced);
    return status;
}

/* A number, or nothing where there is none. */
static void write_number(FILE *file, bool has, double value) {
    if (has && !isnan(value))
        fprintf(file, ",%.6g", value);
    else
        fputc(',', file);
}

static void write_shares(const metrics *r, uint32_t layer, FILE *file) {
    const uint32_t *loads = r->loads + (size_t)layer * r->experts;
    uint64_t sum = 0;
    for (uint32_t e = 0; e < r->experts; e++)
        sum += loads[e];
    for (uint32_t e = 0; e < r->experts; e++)
        fprintf(file, ",%.5g", sum > 0 ? (double)loads[e] / (double)sum : 0.0);
}

clmoe_status metrics_append(const metrics *r, FILE *file) {
    fprintf(file, "%" PRIu32, r->step);
    write_number(file, true, r->loss);
    write_number(file, r->validated, r->validation_loss);
    write_number(file, r->validated && r->counted, r->validation_violation);
    write_number(file, r->counted, metrics_violation(r));
    write_number(file, r->counted, metrics_entropy(r));
    write_number(file, r->counted, metrics_drop_rate(r));
    write_number(file, r->counted, metrics_dead(r));
    write_number(file, true, r->tokens_per_second);
    write_number(file, true, r->moe_share);
    write_number(file, r->losses > 0, r->balance_gradient);
    for (uint32_t i = 0; i < r->losses; i++)
        write_number(file, true, (double)r->loss_values[i]);
    for (uint32_t l = 0; l < r->layers && r->counted; l++)
        write_number(file, true, (double)r->stats[l].max_violation);
    for (uint32_t l = 0; l < r->layers && r->counted; l++)
        write_shares(r, l, file);
    fputc('\n', file);
    if (fflush(file) == 0)
        return CLMOE_SUCCESS;
    return cli_fail(CLMOE_IO, "%s cannot be written: %s", csv_name, strerror(errno));
}

clmoe_status metrics_sync(FILE *file) {
    if (fsync(fileno(file)) == 0)
        return CLMOE_SUCCESS;
    return cli_fail(CLMOE_IO, "%s cannot be written: %s", csv_name, strerror(errno));
}
