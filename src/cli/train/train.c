/* clmoe train: a small language model of MoE layers learns from a text. */
#include "../cli.h"
#include "../interrupt.h"
#include "export.h"
#include "folder.h"
#include "metrics.h"
#include "progress.h"
#include "report.h"
#include "save.h"
#include "usage.h"

#include <math.h>
#include <stdlib.h>

typedef struct train_run {
    train_settings settings;
    run_words words; /* of the run that is resumed */
    corpus text;
    device_session device;
    train_model model;
    metrics metrics;
    progress progress;
    uint32_t *positions;
    FILE *csv;
    const char *folder;
    bool begun;        /* the folder has the run */
    folder_guard lock; /* on it */
    uint32_t done;     /* steps */
} train_run;

/* ---- Opening
 * ------------------------------------------------------------------------------------- */

/* The settings of the run that --resume means; --device and --engine may be others. */
static clmoe_status take_up(train_run *r) {
    clmoe_status status = CLMOE_SUCCESS;
    const train_settings asked = r->settings;
    r->folder = asked.resume;
    TRY(run_load(r->folder, &r->words, &r->settings));
    r->begun = true;
    TRY(run_find_texts(r->folder, &r->words, &r->settings));
    r->settings.device = asked.device ? asked.device : r->settings.device;
    r->settings.engine = asked.engine ? asked.engine : r->settings.engine;
    r->settings.no_cache = asked.no_cache;
done:
    return status;
}

/* After a signal nothing is begun that takes long, and no folder made. */
static clmoe_status go_on(void) {
    return interrupt_signal() == 0 ? CLMOE_SUCCESS : cli_fail(CLMOE_IO, "interrupted");
}

static clmoe_status open_text(train_run *r) {
    clmoe_status status = CLMOE_SUCCESS;
    r->text.context = r->settings.context;
    r->text.sequence = r->settings.sequence;
    TRY(corpus_read(&r->text, r->settings.texts, r->settings.num_texts));
    r->positions = malloc(r->settings.batch * sizeof *r->positions);
    if (r->positions == NULL)
        TRY(cli_fail(CLMOE_OUT_OF_MEMORY, "no memory for --batch %u", (unsigned)r->settings.batch));
done:
    return status;
}

/*
 * A forward pass with the layers of each phase: what the library refuses is refused before anything
 * is written.
 */
static clmoe_status try_out(train_run *r) {
    clmoe_status status = CLMOE_SUCCESS;
    const train_settings *s = &r->settings;
    corpus_draw(&r->text, s->seed, 0, s->batch / s->sequence, r->positions);
    TRY(model_batch(&r->model, &r->text, r->positions, false));
    for (uint32_t i = 0; i < r->model.phases.count; i++) {
        TRY(go_on());
        TRY(model_forward(&r->model, r->model.phases.rows[i].first, true));
    }
    TRY(model_forward(&r->model, s->steps - 1, true));
    TRY(CL(clFinish(r->device.queue)));
    TRY(go_on());
done:
    return status;
}

static clmoe_status open_run(train_run *r, int argc, char **argv) {
    clmoe_status status = CLMOE_SUCCESS;
    const bool resumed = r->settings.resume != NULL;
    const run_words words = {.words = argv, .count = argc};
    if (resumed) {
        TRY(folder_lock(r->settings.resume, &r->lock));
        TRY(take_up(r));
    } else {
        TRY(run_check_words(&words));
        TRY(folder_check(r->folder = r->settings.out));
    }
    TRY(open_text(r));
    if (resumed)
        TRY(run_check_texts(r->folder, &r->text));
    TRY(session_open(&r->device, r->settings.device, !r->settings.no_cache));
    TRY(go_on());
    TRY(model_create(&r->model, &r->settings, &r->text, &r->device));
    TRY(metrics_create(&r->metrics, &r->model));
    if (resumed) {
        TRY(go_on());
        TRY(state_load(&r->model, r->folder, &r->done));
    } else {
        TRY(model_init(&r->model));
        TRY(try_out(r));
        TRY(folder_make(r->folder, &r->lock));
        TRY(run_save(r->folder, &words, &r->text));
        r->begun = true;
    }
    TRY(metrics_open(r->folder, &r->model, r->done, &r->csv));
done:
    return status;
}

static void close_run(train_run *r) {
    if (r->csv != NULL)
        fclose(r->csv);
    metrics_free(&r->metrics);
    model_release(&r->model);
    session_close(&r->device);
    corpus_free(&r->text);
    run_words_free(&r->words);
    free(r->positions);
    folder_unlock(&r->lock);
}

/* ---- Steps
 * --------------------------------------------------------------------------------------- */

static bool is_due(const train_run *r, uint32_t every) {
    return (r->done + 1) % every == 0 || r->done + 1 == r->settings.steps;
}

static bool logs_step(const train_run *r) {
    return r->done == 0 || is_due(r, r->settings.log_every) ||
           is_due(r, r->settings.validate_every);
}

/* The first and the last mark of a step; those of the layers are the model's. */
static clmoe_status mark(train_run *r) {
    if (!r->model.timed)
        return CLMOE_SUCCESS;
    return marks_add(&r->model.marks, r->device.queue);
}

static clmoe_status run_step(train_run *r) {
    clmoe_status status = CLMOE_SUCCESS;
    const train_settings *s = &r->settings;
    marks_clear(&r->model.marks);
    r->model.timed = logs_step(r);
    corpus_draw(&r->text, s->seed, r->done, s->batch / s->sequence, r->positions);
    TRY(model_batch(&r->model, &r->text, r->positions, true));
    TRY(mark(r));
    TRY(model_forward(&r->model, r->done, true));
    TRY(model_backward(&r->model, r->done));
    TRY(model_update(&r->model, r->done));
    TRY(mark(r));
    r->model.timed = false;
done:
    return status;
}

static clmoe_status validate(train_run *r) {
    clmoe_status status = CLMOE_SUCCESS;
    progress_pause(&r->progress);
    TRY(metrics_validate(&r->metrics, &r->model, &r->text, r->done));
    progress_go_on(&r->progress);
done:
    return status;
}

/* The step's line of metrics.csv, if it has one. */
static clmoe_status log_step(train_run *r) {
    clmoe_status status = CLMOE_SUCCESS;
    if (!logs_step(r))
        return status;
    TRY(metrics_gather(&r->metrics, &r->model, r->done));
    r->metrics.tokens_per_second = progress_speed(&r->progress, r->done + 1);
    if (is_due(r, r->settings.validate_every))
        TRY(validate(r));
    TRY(metrics_append(&r->metrics, r->csv));
    progress_show(&r->progress, &r->metrics);
    if (!isfinite(r->metrics.loss))
        TRY(run_diverged(r->folder, r->metrics.step, "the loss is"));
done:
    return status;
}

static clmoe_status save(train_run *r) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(CL(clFinish(r->device.queue)));
    progress_pause(&r->progress);
    TRY(metrics_sync(r->csv));
    TRY(state_save(&r->model, r->folder, r->done));
    progress_go_on(&r->progress);
done:
    return status;
}

/* A model of first values has learned nothing: of a run without a step there is none. */
static clmoe_status train(train_run *r) {
    clmoe_status status = CLMOE_SUCCESS;
    progress_begin(&r->progress, &r->settings, r->done);
    while (r->done < r->settings.steps && interrupt_signal() == 0) {
        TRY(run_step(r));
        TRY(log_step(r));
        r->done++;
        if (r->done % r->settings.save_every == 0)
            TRY(save(r));
    }
    if (r->done == 0)
        TRY(go_on());
    if (r->done == r->settings.steps && !r->metrics.validated) /* resumed at its end */
        TRY(metrics_validate(&r->metrics, &r->model, &r->text, r->done - 1));
    if (r->done % r->settings.save_every != 0)
        TRY(save(r));
    TRY(model_export(&r->model, r->folder, r->done - 1));
    TRY(report_write(r->folder));
done:
    progress_end(&r->progress);
    return status;
}

static int finish(const train_run *r) {
    char left[PATH_MAX + 100];
    if (r->done < r->settings.steps) {
        snprintf(left, sizeof left, "clmoe train --resume %s goes on after step %u", r->folder,
                 (unsigned)r->done);
        return exit_interrupted("train", left);
    }
    progress_summary(&r->settings, &r->metrics, r->folder);
    return EXIT_OK;
}

/* A signal makes a compiler at work fail, too: then it is the signal that ended the run. */
static int fail(const train_run *r) {
    char left[PATH_MAX + 100] = "no step was done";
    if (interrupt_signal() == 0)
        return exit_with_error("train");
    if (r->begun)
        snprintf(left, sizeof left, "clmoe train --resume %s goes on from what was saved",
                 r->folder);
    return exit_interrupted("train", left);
}

int train_main(int argc, char **argv) {
    train_run r = {0};
    problem why;
    int option, code;
    if (!settings_parse(&r.settings, argc, argv, &option, &why)) {
        checked(false, &why);
        return exit_with_error("train");
    }
    if (option != CLI_END) {
        for (int i = 0; i == 0 || (option == CLI_HELP && train_usage[i] != NULL); i++)
            print_usage(option, train_usage[i]);
        return EXIT_OK;
    }
    if (open_run(&r, argc, argv) != CLMOE_SUCCESS || train(&r) != CLMOE_SUCCESS)
        code = fail(&r);
    else
        code = finish(&r);
    close_run(&r);
    return code;
}
