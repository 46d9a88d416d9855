/* clmoe trace: which tokens the experts of a run of clmoe train get. */
#include "../cli.h"
#include "../interrupt.h"
#include "folder.h"
#include "report.h"
#include "save.h"
#include "trace_read.h"
#include "trace_report.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

enum { MOST_TOKENS = 1 << 20 };

static const char usage[] =
    "Usage: clmoe trace DIR --text FILE... [OPTION]...\n"
    "Shows which tokens the experts of a run of clmoe train get: by class of the token's own byte,\n"
    "the last of the bytes that it sees, and by file. The texts go through the model as in\n"
    "validation, without noise and dropout; they need not be those it learned from. The mutual\n"
    "information of expert and class, and of expert and file, is in bits; beside it stands what\n"
    "it would be by chance, with the labels shuffled among the tokens 20 times.\n"
    "DIR keeps the last trace, as --json writes it, in trace.jsonl; DIR/report.html is written anew\n"
    "and has it as pictures.\n"
    "\n"
    "  DIR            the folder of the run, finished or stopped\n"
    "\n"
    "Options:\n"
    "  --text FILE    a text; may be given more than once\n"
    "  --tokens N     tokens of each file, 1 to 1048576, in sequences spread evenly over it;\n"
    "                 default 65536\n"
    "  --seed N       of the shuffles; default 0\n"
    "  --json FILE    writes JSON lines, one object per layer and one for each of its experts; - is\n"
    "                 standard output, instead of the tables\n"
    "  --csv FILE     writes a line per layer and expert; - is standard output, instead of the\n"
    "                 tables\n"
    "  --force        overwrites a file that exists\n"
    "  --device D     index or part of a name from clmoe devices; default: as the run\n"
    "  --engine E     instead of the run's\n"
    "  --help         this text\n"
    "  --version      the version\n";

enum {
    OPT_TEXT,
    OPT_TOKENS,
    OPT_SEED,
    OPT_JSON,
    OPT_CSV,
    OPT_FORCE,
    OPT_DEVICE,
    OPT_ENGINE,
    OPTIONS
};

static const cli_option table[OPTIONS] = {
    [OPT_TEXT] = {.name = "text", .has_value = true, .repeats = true},
    [OPT_TOKENS] = {.name = "tokens", .has_value = true},
    [OPT_SEED] = {.name = "seed", .has_value = true},
    [OPT_JSON] = {.name = "json", .has_value = true},
    [OPT_CSV] = {.name = "csv", .has_value = true},
    [OPT_FORCE] = {.name = "force", .needs = "json csv"},
    [OPT_DEVICE] = {.name = "device", .has_value = true},
    [OPT_ENGINE] = {.name = "engine", .has_value = true},
};

typedef struct trace_options {
    const char *folder, *device, *engine;
    const char *texts[MOST_TEXTS];
    uint32_t num_texts, tokens, seed;
    output json, csv;
} trace_options;

typedef struct trace_session {
    run_words words;
    train_settings settings;
    corpus text;
    device_session device;
    train_model model;
    trace trace;
    uint32_t done; /* steps */
} trace_session;

/* ---- Options --------------------------------------------------------------------------------- */

static bool set_value(void *to, int option, const char *text, problem *why) {
    trace_options *o = to;
    switch (option) {
    case OPT_TEXT:
        if (o->num_texts == MOST_TEXTS)
            return problem_set(why, "--text is given more than %d times", MOST_TEXTS);
        o->texts[o->num_texts++] = text;
        return true;
    case OPT_TOKENS:
        return cli_u32("--tokens", text, 1, MOST_TOKENS, &o->tokens, why);
    case OPT_SEED:
        return cli_u32("--seed", text, 0, UINT32_MAX, &o->seed, why);
    default: {
        const char **const texts[OPTIONS] = {[OPT_JSON] = &o->json.path,
                                             [OPT_CSV] = &o->csv.path,
                                             [OPT_DEVICE] = &o->device,
                                             [OPT_ENGINE] = &o->engine};
        *texts[option] = text;
        return true;
    }
    }
}

/* What a run leaves is never written over. */
static bool run_is_spared(const char *folder, const output *o, const char *option, problem *why) {
    static const char *const names[] = {"run.json",          "state.safetensors", "metrics.csv",
                                        "model.safetensors", "config.json",       "report.html",
                                        TRACE_FILE};
    char path[PATH_MAX];
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        if (folder_path(folder, names[i], path) == CLMOE_SUCCESS && output_is_file(o, path))
            return problem_set(why, "%s %.300s is a file of the run, %.300s", option, o->path,
                               path);
    return true;
}

static bool check_output(const trace_options *o, output *to, const char *option, bool force,
                         problem *why) {
    if (to->path == NULL)
        return true;
    const bool right = output_check(to, option, to->path, force, why);
    for (uint32_t i = 0; i < o->num_texts; i++)
        if (output_is_file(to, o->texts[i]))
            return problem_set(why, "%s %.300s is the same file as --text %.300s", option, to->path,
                               o->texts[i]);
    return run_is_spared(o->folder, to, option, why) && right;
}

static bool check_options(trace_options *o, bool force, problem *why) {
    const char *missing = o->folder == NULL ? "DIR" : o->num_texts == 0 ? "--text" : NULL;
    if (missing != NULL)
        return problem_set(why, "%s is missing; see --help", missing);
    if (o->folder[0] == '\0')
        return problem_set(why, "DIR is '', which names no folder");
    if (!check_output(o, &o->json, "--json", force, why) ||
        !check_output(o, &o->csv, "--csv", force, why))
        return false;
    if (o->json.to_stdout && o->csv.to_stdout)
        return problem_set(why, "--json %s and --csv %s both write to standard output",
                           o->json.path, o->csv.path);
    if (o->json.path != NULL && o->csv.path != NULL && output_is_file(&o->json, o->csv.path))
        return problem_set(why, "--json %.300s is the same file as --csv", o->json.path);
    return true;
}

static clmoe_status parse_options(trace_options *o, int argc, char **argv, bool *stop) {
    clmoe_status status = CLMOE_SUCCESS;
    cli_parser parser = {.options = table, .count = OPTIONS, .set_value = set_value, .words = 1};
    problem why;
    TRY(parse_command(&parser, argc, argv, o, usage, stop));
    if (*stop)
        return status;
    o->folder = cli_word(argc, argv);
    TRY(checked(check_options(o, parser.given[OPT_FORCE] > 0, &why), &why));
done:
    return status;
}

/* ---- The run --------------------------------------------------------------------------------- */

/* state_load() takes a run without a state for one that begins. */
static clmoe_status check_state(const char *folder) {
    clmoe_status status = CLMOE_SUCCESS;
    char path[PATH_MAX];
    TRY(folder_path(folder, "state.safetensors", path));
    if (access(path, R_OK) != 0)
        TRY(cli_fail(CLMOE_IO, "'%s' has no step that was saved: %s: %s", folder, path,
                     strerror(errno)));
done:
    return status;
}

static clmoe_status open_run(const trace_options *o, trace_session *s) {
    clmoe_status status = CLMOE_SUCCESS;
    train_settings *of = &s->settings;
    TRY(run_load(o->folder, &s->words, of));
    TRY(trace_check_run(of));
    TRY(check_state(o->folder));
    s->text = (corpus){.context = of->context, .sequence = of->sequence, .whole = true};
    TRY(corpus_read(&s->text, o->texts, o->num_texts));
    TRY(trace_check_text(&s->text, o->tokens));
    of->engine = o->engine ? o->engine : of->engine;
    TRY(session_open(&s->device, o->device ? o->device : of->device, !of->no_cache));
    TRY(model_create(&s->model, of, &s->text, &s->device));
    TRY(state_load(&s->model, o->folder, &s->done));
done:
    return status;
}

static clmoe_status report(trace_options *o, const trace_session *s) {
    clmoe_status status = CLMOE_SUCCESS;
    const trace_title title = {.folder = o->folder,
                               .device = s->device.name,
                               .done = s->done,
                               .steps = s->settings.steps,
                               .text = &s->text};
    if (o->json.path != NULL)
        TRY(trace_write_json(&s->trace, &title, &o->json));
    if (o->csv.path != NULL)
        TRY(trace_write_csv(&s->trace, &o->csv));
    if (!o->json.to_stdout && !o->csv.to_stdout)
        trace_print(&s->trace, &title);
    TRY(trace_keep(&s->trace, &title));
    TRY(report_write(o->folder));
done:
    return status;
}

static void close_run(trace_session *s) {
    trace_free(&s->trace);
    model_release(&s->model);
    session_close(&s->device);
    corpus_free(&s->text);
    run_words_free(&s->words);
}

int trace_main(int argc, char **argv) {
    clmoe_status status = CLMOE_SUCCESS;
    trace_options options = {.tokens = 65536};
    trace_session session = {0};
    bool stop = false;
    TRY(parse_options(&options, argc, argv, &stop));
    if (stop)
        return EXIT_OK;
    TRY(open_run(&options, &session));
    TRY(trace_measure(&session.trace, &session.model, &session.text, session.done, options.tokens,
                      options.seed));
    TRY(report(&options, &session));
done:;
    int code = status != CLMOE_SUCCESS ? exit_with_error("trace") : EXIT_OK;
    if (interrupt_signal() != 0) /* which makes a compiler at work fail, too */
        code = exit_interrupted("trace", "no result");
    close_run(&session);
    return code;
}
