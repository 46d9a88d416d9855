#include "settings.h"
#include "../options.h"
#include "parameters.h"

#include <stddef.h>
#include <stdio.h>
#include <string.h>

enum { MOST_STEPS = 1 << 24, MOST_TOKENS = 1 << 20 };

enum {
    OPT_TEXT,
    OPT_OUT,
    OPT_RESUME,
    OPT_DEVICE,
    OPT_ENGINE,
    OPT_NO_CACHE,
    OPT_CONTEXT,
    OPT_LAYERS,
    OPT_DIM,
    OPT_HIDDEN,
    OPT_EXPERTS,
    OPT_TOP_K,
    OPT_SHARED,
    OPT_DTYPE,
    OPT_INIT,
    OPT_BATCH,
    OPT_SEQUENCE,
    OPT_STEPS,
    OPT_WARMUP,
    OPT_SEED,
    OPT_LR,
    OPT_WEIGHT_DECAY,
    OPT_CLIP,
    OPT_BALANCE,
    OPT_BALANCE_FROM,
    OPT_PER_SEQUENCE,
    OPT_Z_LOSS,
    OPT_TOKEN_ENTROPY,
    OPT_CAPACITY_FACTOR,
    OPT_KEEP,
    OPT_OVERFLOW,
    OPT_NOISE,
    OPT_ANNEAL,
    OPT_EXPERT_DROPOUT,
    OPT_ROUTER_DROPOUT,
    OPT_HIDDEN_DROPOUT,
    OPT_SOFT_STEPS,
    OPT_TOP_K_SCHEDULE,
    OPT_LOG_EVERY,
    OPT_VALIDATE_EVERY,
    OPT_SAVE_EVERY,
    OPTIONS
};

static const cli_option table[OPTIONS] = {
    [OPT_TEXT] = {.name = "text", .has_value = true, .repeats = true},
    [OPT_OUT] = {.name = "out", .has_value = true},
    [OPT_RESUME] = {.name = "resume", .has_value = true, .excludes = "out text"},
    [OPT_DEVICE] = {.name = "device", .has_value = true},
    [OPT_ENGINE] = {.name = "engine", .has_value = true},
    [OPT_NO_CACHE] = {.name = "no-cache"},
    [OPT_CONTEXT] = {.name = "context", .has_value = true},
    [OPT_LAYERS] = {.name = "layers", .has_value = true},
    [OPT_DIM] = {.name = "dim", .has_value = true},
    [OPT_HIDDEN] = {.name = "hidden", .has_value = true},
    [OPT_EXPERTS] = {.name = "experts", .has_value = true},
    [OPT_TOP_K] = {.name = "top-k", .has_value = true, .excludes = "top-k-schedule"},
    [OPT_SHARED] = {.name = "shared", .has_value = true},
    [OPT_DTYPE] = {.name = "dtype", .has_value = true},
    [OPT_INIT] = {.name = "init", .has_value = true},
    [OPT_BATCH] = {.name = "batch", .has_value = true},
    [OPT_SEQUENCE] = {.name = "sequence", .has_value = true},
    [OPT_STEPS] = {.name = "steps", .has_value = true},
    [OPT_WARMUP] = {.name = "warmup", .has_value = true},
    [OPT_SEED] = {.name = "seed", .has_value = true},
    [OPT_LR] = {.name = "lr", .has_value = true},
    [OPT_WEIGHT_DECAY] = {.name = "weight-decay", .has_value = true},
    [OPT_CLIP] = {.name = "clip", .has_value = true},
    [OPT_BALANCE] = {.name = "balance", .has_value = true},
    [OPT_BALANCE_FROM] = {.name = "balance-from", .has_value = true, .needs = "balance"},
    [OPT_PER_SEQUENCE] = {.name = "per-sequence", .needs = "balance capacity-factor"},
    [OPT_Z_LOSS] = {.name = "z-loss", .has_value = true},
    [OPT_TOKEN_ENTROPY] = {.name = "token-entropy", .has_value = true},
    [OPT_CAPACITY_FACTOR] = {.name = "capacity-factor", .has_value = true},
    [OPT_KEEP] = {.name = "keep", .has_value = true},
    [OPT_OVERFLOW] = {.name = "overflow", .has_value = true, .needs = "capacity-factor"},
    [OPT_NOISE] = {.name = "noise", .has_value = true},
    [OPT_ANNEAL] = {.name = "anneal", .has_value = true, .needs = "noise"},
    [OPT_EXPERT_DROPOUT] = {.name = "expert-dropout", .has_value = true},
    [OPT_ROUTER_DROPOUT] = {.name = "router-dropout", .has_value = true},
    [OPT_HIDDEN_DROPOUT] = {.name = "hidden-dropout", .has_value = true},
    [OPT_SOFT_STEPS] = {.name = "soft-steps", .has_value = true},
    [OPT_TOP_K_SCHEDULE] = {.name = "top-k-schedule", .has_value = true},
    [OPT_LOG_EVERY] = {.name = "log-every", .has_value = true},
    [OPT_VALIDATE_EVERY] = {.name = "validate-every", .has_value = true},
    [OPT_SAVE_EVERY] = {.name = "save-every", .has_value = true},
};

/* ---- Values
 * -------------------------------------------------------------------------------------- */

/* Where a whole number goes, and its range; max 0: the option has none. */
typedef struct whole_row {
    size_t offset;
    uint32_t min, max;
} whole_row;

#define WHOLE(field, min, max)                                                                     \
    { offsetof(train_settings, field), min, max }

static const whole_row wholes[OPTIONS] = {
    [OPT_CONTEXT] = WHOLE(context, 1, 256),
    [OPT_LAYERS] = WHOLE(layers, 1, 64),
    [OPT_DIM] = WHOLE(dim, 16, 8192),
    [OPT_HIDDEN] = WHOLE(hidden, 1, 65536),
    [OPT_EXPERTS] = WHOLE(experts, 1, 4096),
    [OPT_TOP_K] = WHOLE(top_k, 1, 256),
    [OPT_SHARED] = WHOLE(shared, 0, 65536),
    [OPT_BATCH] = WHOLE(batch, 1, MOST_TOKENS),
    [OPT_SEQUENCE] = WHOLE(sequence, 1, MOST_TOKENS),
    [OPT_STEPS] = WHOLE(steps, 1, MOST_STEPS),
    [OPT_WARMUP] = WHOLE(warmup, 0, MOST_STEPS),
    [OPT_SEED] = WHOLE(seed, 0, UINT32_MAX),
    [OPT_BALANCE_FROM] = WHOLE(balance_from, 0, MOST_STEPS),
    [OPT_ANNEAL] = WHOLE(anneal, 1, MOST_STEPS),
    [OPT_SOFT_STEPS] = WHOLE(soft_steps, 1, MOST_STEPS),
    [OPT_LOG_EVERY] = WHOLE(log_every, 1, MOST_STEPS),
    [OPT_VALIDATE_EVERY] = WHOLE(validate_every, 1, MOST_STEPS),
    [OPT_SAVE_EVERY] = WHOLE(save_every, 1, MOST_STEPS),
};

/* Where a number goes; most 0: the option has none. */
typedef struct real_row {
    size_t offset;
    double most;
} real_row;

#define REAL(field, most)                                                                          \
    { offsetof(train_settings, field), most }

static const real_row reals[OPTIONS] = {
    [OPT_LR] = REAL(rate, 10),
    [OPT_WEIGHT_DECAY] = REAL(decay, 10),
    [OPT_CLIP] = REAL(clip, 1e30),
    [OPT_Z_LOSS] = REAL(z_loss, 1e6),
    [OPT_TOKEN_ENTROPY] = REAL(token_entropy, 1e6),
    [OPT_CAPACITY_FACTOR] = REAL(capacity_factor, 4096),
    [OPT_EXPERT_DROPOUT] = REAL(expert_dropout, 0.999),
    [OPT_ROUTER_DROPOUT] = REAL(router_dropout, 0.999),
    [OPT_HIDDEN_DROPOUT] = REAL(hidden_dropout, 0.999),
};

static const size_t texts[OPTIONS] = {
    [OPT_OUT] = offsetof(train_settings, out),
    [OPT_RESUME] = offsetof(train_settings, resume),
    [OPT_DEVICE] = offsetof(train_settings, device),
    [OPT_ENGINE] = offsetof(train_settings, engine),
};

/* A word of a list, to its number in it. */
static bool parse_word(int option, const char *text, const char *const *words, uint32_t *number,
                       problem *why) {
    char names[200] = "";
    for (*number = 0; words[*number] != NULL; ++*number) {
        const size_t used = strlen(names);
        if (strcmp(text, words[*number]) == 0)
            return true;
        snprintf(names + used, sizeof names - used, "%s%s", used > 0 ? ", " : "", words[*number]);
    }
    return problem_set(why, "--%s is '%s', which is none of %s", table[option].name, text, names);
}

static const char *const keep_words[] = {"position", "choice-major", "priority", "weight",
                                         "random",   "round",        NULL};
static const char *const overflow_words[] = {"drop", "reroute", NULL};

static bool parse_keep(train_settings *s, const char *text, problem *why) {
    return parse_word(OPT_KEEP, text, keep_words, &s->keep, why);
}

static bool parse_overflow(train_settings *s, const char *text, problem *why) {
    return parse_word(OPT_OVERFLOW, text, overflow_words, &s->overflow, why);
}

static bool parse_dtype(train_settings *s, const char *text, problem *why) {
    static const char *const words[] = {"f32", "bf16", NULL};
    uint32_t number = 0;
    const bool right = parse_word(OPT_DTYPE, text, words, &number, why);
    s->type = number == 1 ? CLMOE_BF16 : CLMOE_F32;
    return right;
}

static bool parse_init(train_settings *s, const char *text, problem *why) {
    static const char *const words[] = {"default", "skewed", NULL};
    uint32_t number = 0;
    const bool right = parse_word(OPT_INIT, text, words, &number, why);
    s->skewed = number == 1;
    return right;
}

/* KIND[:SCALE] */
static bool parse_noise(train_settings *s, const char *text, problem *why) {
    static const char *const words[] = {"none", "gaussian", "learned", "gumbel", NULL};
    char kind[16];
    const size_t length = strcspn(text, ":");
    snprintf(kind, sizeof kind, "%.*s", (int)(length < sizeof kind ? length : 15), text);
    if (!parse_word(OPT_NOISE, kind, words, &s->noise, why))
        return false;
    if (text[length] != '\0' && s->noise == CLMOE_NOISE_NONE)
        return problem_set(why, "--noise has a number for 'none', which takes none");
    return text[length] == '\0' || cli_real("--noise", text + length + 1, &s->noise_scale, why);
}

/* "K:STEP," or the last "K" at `text`; NULL if it is neither. */
static const char *parse_phase(const char *text, top_k_phase *phase, uint32_t *end, problem *why) {
    char word[24];
    const size_t length = strcspn(text, ",");
    snprintf(word, sizeof word, "%.*s", (int)(length < sizeof word ? length : 23), text);
    char *colon = strchr(word, ':');
    if ((colon != NULL) != (text[length] == ','))
        return NULL;
    if (colon != NULL)
        *colon = '\0';
    if (!cli_u32("--top-k-schedule", word, 1, 256, &phase->top_k, why) ||
        (colon != NULL &&
         !cli_u32("--top-k-schedule", colon + 1, phase->first + 1, MOST_STEPS, end, why)))
        return NULL;
    return text + length + (colon != NULL);
}

/* "1:500,2": K = 1 until step 500, then 2. */
static bool parse_schedule(train_settings *s, const char *text, problem *why) {
    const char *rest = text;
    uint32_t first = 0;
    problem_set(why, "--top-k-schedule is '%s', but must be K:STEP,K:STEP,...,K", text);
    s->num_top_k_phases = 0;
    do {
        if (s->num_top_k_phases == MOST_PHASES)
            return problem_set(why, "--top-k-schedule has more than %d phases", MOST_PHASES);
        top_k_phase *phase = &s->top_k_phases[s->num_top_k_phases++];
        phase->first = first;
        rest = parse_phase(rest, phase, &first, why);
        if (rest == NULL)
            return false;
        s->top_k = phase->top_k;
    } while (rest[-1] == ',');
    return true;
}

static bool add_text(train_settings *s, const char *path, problem *why) {
    if (s->num_texts == MOST_TEXTS)
        return problem_set(why, "--text is given more than %d times", MOST_TEXTS);
    s->texts[s->num_texts++] = path;
    return true;
}

static bool set_real(train_settings *s, int option, const char *text, problem *why) {
    double *value = (void *)((char *)s + reals[option].offset);
    char name[40];
    snprintf(name, sizeof name, "--%s", table[option].name);
    if (!cli_real(name, text, value, why))
        return false;
    return *value <= reals[option].most ||
           problem_set(why, "%s is %s, which is more than %g", name, text, reals[option].most);
}

static bool set_whole(train_settings *s, int option, const char *text, problem *why) {
    const whole_row *row = &wholes[option];
    char name[40];
    snprintf(name, sizeof name, "--%s", table[option].name);
    return cli_u32(name, text, row->min, row->max, (void *)((char *)s + row->offset), why);
}

static bool set_value(void *to, int option, const char *text, problem *why) {
    train_settings *s = to;
    if (wholes[option].max > 0)
        return set_whole(s, option, text, why);
    if (reals[option].most > 0)
        return set_real(s, option, text, why);
    if (texts[option] > 0) {
        const char **place = (void *)((char *)s + texts[option]);
        *place = text;
        return true;
    }
    switch (option) {
    case OPT_TEXT:
        return add_text(s, text, why);
    case OPT_DTYPE:
        return parse_dtype(s, text, why);
    case OPT_INIT:
        return parse_init(s, text, why);
    case OPT_BALANCE:
        return methods_parse(text, &s->methods, why);
    case OPT_KEEP:
        return parse_keep(s, text, why);
    case OPT_OVERFLOW:
        return parse_overflow(s, text, why);
    case OPT_NOISE:
        return parse_noise(s, text, why);
    default:
        return parse_schedule(s, text, why);
    }
}

/* ---- All of it
 * ----------------------------------------------------------------------------------- */

static bool check_sizes(const train_settings *s, problem *why) {
    if (s->dim % 16 != 0)
        return problem_set(why, "--dim is %u, which is no multiple of 16", (unsigned)s->dim);
    if (s->batch % s->sequence != 0)
        return problem_set(why, "--batch is %u, which is no multiple of --sequence, %u",
                           (unsigned)s->batch, (unsigned)s->sequence);
    if (s->batch % 16 != 0)
        return problem_set(why, "--batch is %u, which is no multiple of 16", (unsigned)s->batch);
    for (uint32_t i = 0; i < s->num_top_k_phases; i++)
        if (s->top_k_phases[i].top_k > s->experts)
            return problem_set(why, "--top-k-schedule has %u of --experts %u",
                               (unsigned)s->top_k_phases[i].top_k, (unsigned)s->experts);
    if (s->top_k > s->experts)
        return problem_set(why, "--top-k is %u, but --experts is %u", (unsigned)s->top_k,
                           (unsigned)s->experts);
    return true;
}

static uint32_t most_top_k(const train_settings *s) {
    uint32_t most = s->top_k;
    for (uint32_t i = 0; i < s->num_top_k_phases; i++)
        most = s->top_k_phases[i].top_k > most ? s->top_k_phases[i].top_k : most;
    return most;
}

/* Two options, and whether they meet though they do not go together. */
typedef struct clash {
    bool is;
    const char *one, *other;
} clash;

static bool check_clashes(const clash *rows, size_t count, problem *why) {
    for (size_t i = 0; i < count; i++)
        if (rows[i].is)
            return problem_set(why, "%s does not go with %s", rows[i].one, rows[i].other);
    return true;
}

/* Soft MoE has slots instead of choices: no statistics, no state, a router of another size. */
static bool check_soft_moe(const train_settings *s, problem *why) {
    static const char soft[] = "--balance soft-moe";
    const clash rows[] = {
        {s->methods.count > 1, soft, "another --balance"},
        {s->balance_from > 0, soft, "--balance-from"},
        {s->soft_steps > 0, soft, "--soft-steps"},
        {s->num_top_k_phases > 0, soft, "--top-k-schedule"},
        {s->hidden_dropout > 0, soft, "--hidden-dropout"},
        {s->expert_dropout > 0, soft, "--expert-dropout"},
        {s->router_dropout > 0, soft, "--router-dropout"},
        {s->z_loss > 0, soft, "--z-loss"},
        {s->token_entropy > 0, soft, "--token-entropy"},
        {s->capacity_factor > 0, soft, "--capacity-factor"},
        {s->keep != CLMOE_KEEP_POSITION, soft, "--keep"},
        {s->noise != CLMOE_NOISE_NONE, soft, "--noise"},
        {s->per_sequence, soft, "--per-sequence"},
    };
    if (!check_clashes(rows, sizeof rows / sizeof rows[0], why))
        return false;
    return router_rows(s) <= s->experts * MOST_SLOTS ||
           problem_set(why,
                       "--balance soft-moe:%g with --batch %u needs %d slots or more of each "
                       "expert, but there are at most %d",
                       s->methods.rows[0].value, (unsigned)s->batch, MOST_SLOTS + 1, MOST_SLOTS);
}

/* What the library would refuse, in the words of its descriptors. */
static bool check_choice(const train_settings *s, problem *why) {
    const balance_method *policy = methods_find(&s->methods, METHOD_POLICY);
    const bool rebalance = methods_find(&s->methods, METHOD_REBALANCE) != NULL;
    const bool round = s->keep == CLMOE_KEEP_ROUND, reroute = s->overflow == CLMOE_OVERFLOW_REROUTE;
    const bool by_expert = policy != NULL && policy->row->which == CLMOE_POLICY_EXPERT_CHOICE;
    char name[40] = "", keep[40];
    if (policy != NULL)
        snprintf(name, sizeof name, "--balance %s", policy->row->name);
    snprintf(keep, sizeof keep, "--keep %s", keep_words[s->keep]);
    const clash rows[] = {
        {round && policy != NULL, "--keep round", name},
        {round && rebalance, "--keep round", "--balance rebalance"},
        {round && s->capacity_factor > 0, "--keep round", "--capacity-factor"},
        {round && s->per_sequence, "--keep round", "--per-sequence"},
        {reroute && policy != NULL, "--overflow reroute", name},
        {reroute && s->per_sequence, "--overflow reroute", "--per-sequence"},
        {rebalance && policy != NULL && policy->row->which != CLMOE_POLICY_SINKHORN,
         "--balance rebalance", name},
        {by_expert && s->keep != CLMOE_KEEP_POSITION, keep, name},
        {by_expert && s->per_sequence, "--per-sequence", name},
        {s->anneal > 0 && s->noise == CLMOE_NOISE_NONE, "--anneal", "--noise none"},
    };
    return check_clashes(rows, sizeof rows / sizeof rows[0], why);
}

/* Where all experts are chosen there is no place between those that are and those that are not. */
static bool check_chosen(const train_settings *s, problem *why) {
    const uint32_t most = most_top_k(s);
    for (uint32_t i = 0; i < s->methods.count; i++) {
        const balance_method *method = &s->methods.rows[i];
        const bool smooth = methods_is_loss(method, CLMOE_LOSS_SMOOTH_LOAD);
        const bool quantile =
            method->row->kind == METHOD_RULE && method->row->which == CLMOE_BIAS_QUANTILE;
        if ((smooth || quantile) && most >= s->experts)
            return problem_set(why, "--balance %s needs more --experts than --top-k",
                               method->row->name);
        if (smooth && s->noise == CLMOE_NOISE_GUMBEL)
            return problem_set(why, "--balance smooth-load does not go with --noise gumbel");
        if (smooth && s->soft_steps > s->balance_from)
            return problem_set(why,
                               "--balance smooth-load acts from --balance-from %u, but all "
                               "experts are chosen until --soft-steps %u",
                               (unsigned)s->balance_from, (unsigned)s->soft_steps);
    }
    return true;
}

static bool check_policy(const train_settings *s, problem *why) {
    const balance_method *policy = methods_find(&s->methods, METHOD_POLICY);
    const bool soft = policy != NULL && policy->row->which == CLMOE_POLICY_SOFT_MOE;
    return (!soft || check_soft_moe(s, why)) && check_choice(s, why) && check_chosen(s, why);
}

/* An option that would not be heard, and for want of what. */
typedef struct unheard {
    bool is;
    int option;
    const char *value, *without;
} unheard;

static bool is_unheard(const unheard *row, problem *why) {
    problem_set(why, "--%s%s%s has no effect %s", table[row->option].name,
                row->value[0] != '\0' ? " " : "", row->value, row->without);
    return row->is;
}

static bool check_capacity_heard(const cli_parser *p, const train_settings *s, problem *why) {
    static const char without[] = "without a --capacity-factor above 0";
    clmoe_loss_desc losses[MOST_METHODS];
    const bool none = s->capacity_factor == 0;
    const unheard rows[] = {
        {p->given[OPT_KEEP] > 0 && s->keep != CLMOE_KEEP_ROUND && none, OPT_KEEP,
         keep_words[s->keep], without},
        {p->given[OPT_OVERFLOW] > 0 && none, OPT_OVERFLOW, overflow_words[s->overflow], without},
        {s->per_sequence && none && methods_losses(&s->methods, losses) == 0, OPT_PER_SEQUENCE, "",
         "without a loss in --balance or a --capacity-factor above 0"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++)
        if (is_unheard(&rows[i], why))
            return false;
    return true;
}

/* Two options that both say the same thing, of which one would win. */
static bool check_said_once(const cli_parser *p, const train_settings *s, problem *why) {
    const balance_method *policy = methods_find(&s->methods, METHOD_POLICY);
    if (policy != NULL && policy->row->which == CLMOE_POLICY_EXPERT_CHOICE && policy->numbered &&
        p->given[OPT_CAPACITY_FACTOR] > 0)
        return problem_set(why,
                           "--balance expert-choice:%g does not go with --capacity-factor %g: both "
                           "are the capacity factor",
                           policy->value, s->capacity_factor);
    for (uint32_t i = 0; i < s->methods.count; i++)
        if (methods_is_loss(&s->methods.rows[i], CLMOE_LOSS_SMOOTH_LOAD) &&
            p->given[OPT_NOISE] > 0 && s->noise == CLMOE_NOISE_NONE)
            return problem_set(why, "--balance smooth-load does not go with --noise none");
    return true;
}

static bool check_heard(const cli_parser *p, const train_settings *s, problem *why) {
    char from[16], steps[32], anneal[16];
    snprintf(from, sizeof from, "%u", (unsigned)s->balance_from);
    snprintf(steps, sizeof steps, "with --steps %u", (unsigned)s->steps);
    snprintf(anneal, sizeof anneal, "%u", (unsigned)s->anneal);
    const unheard rows[] = {
        {p->given[OPT_BALANCE_FROM] > 0 && methods_find(&s->methods, METHOD_NONE) != NULL,
         OPT_BALANCE_FROM, from, "with --balance none"},
        {s->balance_from >= s->steps, OPT_BALANCE_FROM, from, steps},
        {s->anneal > 0 && s->noise_scale == 0, OPT_ANNEAL, anneal, "with a --noise of 0"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++)
        if (is_unheard(&rows[i], why))
            return false;
    return check_capacity_heard(p, s, why);
}

/* A run goes on as it was begun: what else was asked for would not be heard. */
static bool check_resume(const cli_parser *p, problem *why) {
    for (int i = 0; i < OPTIONS; i++)
        if (p->given[i] > 0 && i != OPT_RESUME && i != OPT_DEVICE && i != OPT_ENGINE &&
            i != OPT_NO_CACHE)
            return problem_set(why, "--resume goes on as the run was begun, without --%s",
                               table[i].name);
    return true;
}

/* The smooth load is one of noisy logits: by itself it brings V-MoE's noise. */
static void set_noise(train_settings *s) {
    for (uint32_t i = 0; i < s->methods.count && s->noise == CLMOE_NOISE_NONE; i++)
        if (methods_is_loss(&s->methods.rows[i], CLMOE_LOSS_SMOOTH_LOAD)) {
            s->noise = CLMOE_NOISE_GAUSSIAN;
            s->noise_scale = 1.0 / s->experts;
        }
}

static bool check_all(const cli_parser *p, train_settings *s, problem *why) {
    if (s->num_texts == 0)
        return problem_set(why, "--text is needed: a file to learn from");
    if (s->out == NULL)
        return problem_set(why, "--out is needed: the folder that the run is written to");
    if (!check_sizes(s, why) || !check_said_once(p, s, why))
        return false;
    set_noise(s);
    return check_policy(s, why) && check_heard(p, s, why);
}

static const train_settings defaults = {
    .context = 16,
    .layers = 2,
    .dim = 64,
    .hidden = 128,
    .experts = 8,
    .top_k = 2,
    .batch = 1024,
    .sequence = 256,
    .steps = 2000,
    .warmup = 100,
    .rate = 3e-3,
    .decay = 0.1,
    .clip = 1,
    .noise_scale = 1,
    .log_every = 10,
    .validate_every = 100,
    .save_every = 500,
};

bool settings_parse(train_settings *s, int argc, char **argv, int *option, problem *why) {
    cli_parser parser = {.options = table, .count = OPTIONS, .set_value = set_value};
    *s = defaults;
    *option = cli_parse(&parser, argc, argv, s, why);
    if (*option != CLI_END)
        return *option != CLI_BAD;
    s->per_sequence = parser.given[OPT_PER_SEQUENCE] > 0;
    s->no_cache = parser.given[OPT_NO_CACHE] > 0;
    if (!(s->resume != NULL ? check_resume(&parser, why) : check_all(&parser, s, why)))
        *option = CLI_BAD;
    return *option != CLI_BAD;
}
