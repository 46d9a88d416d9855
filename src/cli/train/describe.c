#include "describe.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

typedef enum setting_kind { WHOLE, REAL, FLAG, TEXT, WORD, OWN } setting_kind;

typedef struct setting {
    const char *name;
    setting_kind kind;
    size_t offset;
    const char *const *words; /* of a WORD */
    bool free;                /* runs that differ in it alone are of one kind */
} setting;

static const char *const keeps[] = {"position", "choice-major", "priority",
                                    "weight",   "random",       "round"};
static const char *const overflows[] = {"drop", "reroute"};
static const char *const noises[] = {"none", "gaussian", "learned", "gumbel"};

/* What a setting is made of that is no single field. */
static const char text_name[] = "text", balance_name[] = "balance", dtype_name[] = "dtype",
                  init_name[] = "init", noise_name[] = "noise", schedule_name[] = "top-k-schedule";

#define AT(field) offsetof(train_settings, field)

static const setting table[] = {
    {text_name, OWN, 0, NULL, false},
    {balance_name, OWN, 0, NULL, true},
    {"seed", WHOLE, AT(seed), NULL, true},
    {"experts", WHOLE, AT(experts), NULL, false},
    {"top-k", WHOLE, AT(top_k), NULL, false},
    {schedule_name, OWN, 0, NULL, false},
    {"layers", WHOLE, AT(layers), NULL, false},
    {"dim", WHOLE, AT(dim), NULL, false},
    {"hidden", WHOLE, AT(hidden), NULL, false},
    {"shared", WHOLE, AT(shared), NULL, false},
    {"context", WHOLE, AT(context), NULL, false},
    {dtype_name, OWN, 0, NULL, false},
    {init_name, OWN, 0, NULL, false},
    {"steps", WHOLE, AT(steps), NULL, false},
    {"batch", WHOLE, AT(batch), NULL, false},
    {"sequence", WHOLE, AT(sequence), NULL, false},
    {"lr", REAL, AT(rate), NULL, false},
    {"warmup", WHOLE, AT(warmup), NULL, false},
    {"weight-decay", REAL, AT(decay), NULL, false},
    {"clip", REAL, AT(clip), NULL, false},
    {"balance-from", WHOLE, AT(balance_from), NULL, false},
    {"per-sequence", FLAG, AT(per_sequence), NULL, false},
    {"z-loss", REAL, AT(z_loss), NULL, false},
    {"token-entropy", REAL, AT(token_entropy), NULL, false},
    {"capacity-factor", REAL, AT(capacity_factor), NULL, false},
    {"keep", WORD, AT(keep), keeps, false},
    {"overflow", WORD, AT(overflow), overflows, false},
    {noise_name, OWN, 0, NULL, false},
    {"anneal", WHOLE, AT(anneal), NULL, false},
    {"expert-dropout", REAL, AT(expert_dropout), NULL, false},
    {"router-dropout", REAL, AT(router_dropout), NULL, false},
    {"hidden-dropout", REAL, AT(hidden_dropout), NULL, false},
    {"soft-steps", WHOLE, AT(soft_steps), NULL, false},
    {"device", TEXT, AT(device), NULL, false},
    {"engine", TEXT, AT(engine), NULL, false},
};

enum { ROWS = sizeof table / sizeof table[0] };

/* Appends to a text, as far as there is room. */
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
static void
add(char text[SETTING_TEXT], const char *format, ...) {
    const size_t used = strlen(text);
    va_list list;
    va_start(list, format);
    vsnprintf(text + used, SETTING_TEXT - used, format, list);
    va_end(list);
}

/* ---- --balance ------------------------------------------------------------------------------- */

bool balance_has_number(const balance_method *method) {
    return method->row->value != 0;
}

void balance_names(const balance_methods *methods, char text[SETTING_TEXT]) {
    text[0] = '\0';
    for (uint32_t i = 0; i < methods->count; i++)
        add(text, "%s%s", i > 0 ? "+" : "", methods->rows[i].row->name);
    if (methods->count == 0)
        add(text, "none");
}

void balance_numbers(const balance_methods *methods, char text[SETTING_TEXT]) {
    text[0] = '\0';
    for (uint32_t i = 0; i < methods->count; i++) {
        add(text, "%s", i > 0 ? "+" : "");
        if (balance_has_number(&methods->rows[i]))
            add(text, "%.7g", methods->rows[i].value);
        else
            add(text, "-");
    }
    if (methods->count == 0)
        add(text, "-");
}

static void balance_text(const balance_methods *methods, char text[SETTING_TEXT]) {
    for (uint32_t i = 0; i < methods->count; i++) {
        add(text, "%s%s", i > 0 ? "," : "", methods->rows[i].row->name);
        if (balance_has_number(&methods->rows[i]))
            add(text, ":%.7g", methods->rows[i].value);
    }
    if (methods->count == 0)
        add(text, "none");
}

/* ---- All settings ---------------------------------------------------------------------------- */

const char *setting_name(uint32_t index) {
    return index < ROWS ? table[index].name : NULL;
}

static void schedule_text(const train_settings *s, char text[SETTING_TEXT]) {
    for (uint32_t i = 0; i < s->num_top_k_phases; i++) {
        add(text, "%s%u", i > 0 ? "," : "", (unsigned)s->top_k_phases[i].top_k);
        if (i + 1 < s->num_top_k_phases)
            add(text, ":%u", (unsigned)s->top_k_phases[i + 1].first);
    }
    if (s->num_top_k_phases == 0)
        add(text, "-");
}

static void own_text(const train_settings *s, const char *name, char text[SETTING_TEXT]) {
    if (name == balance_name)
        balance_text(&s->methods, text);
    else if (name == schedule_name)
        schedule_text(s, text);
    else if (name == dtype_name)
        add(text, s->type == CLMOE_BF16 ? "bf16" : "f32");
    else if (name == noise_name && s->noise == CLMOE_NOISE_NONE)
        add(text, "-");
    else if (name == noise_name)
        add(text, "%s:%.7g", noises[s->noise], s->noise_scale);
    else if (name == init_name)
        add(text, s->skewed ? "skewed" : "default");
    else
        for (uint32_t i = 0; i < s->num_texts; i++)
            add(text, "%s%s", i > 0 ? ", " : "", s->texts[i]);
}

void setting_text(const train_settings *s, uint32_t index, char text[SETTING_TEXT]) {
    const setting *row = &table[index];
    const void *field = (const char *)s + row->offset;
    text[0] = '\0';
    if (row->kind == WHOLE)
        add(text, "%" PRIu32, *(const uint32_t *)field);
    else if (row->kind == REAL)
        add(text, "%.7g", *(const double *)field);
    else if (row->kind == FLAG)
        add(text, "%s", *(const bool *)field ? "yes" : "-");
    else if (row->kind == WORD)
        add(text, "%s", row->words[*(const uint32_t *)field]);
    else if (row->kind == TEXT)
        add(text, "%s", *(const char *const *)field ? *(const char *const *)field : "-");
    else
        own_text(s, row->name, text);
}

static bool same_texts(const train_settings *a, const train_settings *b) {
    bool same = a->num_texts == b->num_texts;
    for (uint32_t i = 0; same && i < a->num_texts; i++)
        same = strcmp(a->texts[i], b->texts[i]) == 0;
    return same;
}

bool setting_same(const train_settings *a, const train_settings *b, uint32_t index) {
    char one[SETTING_TEXT], other[SETTING_TEXT];
    if (table[index].name == text_name)
        return same_texts(a, b);
    setting_text(a, index, one);
    setting_text(b, index, other);
    return strcmp(one, other) == 0;
}

bool settings_same_but_balance(const train_settings *a, const train_settings *b) {
    for (uint32_t i = 0; i < ROWS; i++)
        if (!table[i].free && !setting_same(a, b, i))
            return false;
    return true;
}
