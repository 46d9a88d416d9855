/* The settings of a run as names and texts: for a report, and to say in what two runs differ. */
#ifndef CLMOE_CLI_TRAIN_DESCRIBE_H
#define CLMOE_CLI_TRAIN_DESCRIBE_H

#include "settings.h"

enum { SETTING_TEXT = 256 };

/* The option's name without the dashes; NULL past the last. */
const char *setting_name(uint32_t index);

/* Its value, "-" for one that is off. */
void setting_text(const train_settings *s, uint32_t index, char text[SETTING_TEXT]);

/* Whether two runs have it alike; texts count by their paths. */
bool setting_same(const train_settings *a, const train_settings *b, uint32_t index);

/* Whether they are alike in all but --seed and --balance. */
bool settings_same_but_balance(const train_settings *a, const train_settings *b);

/* The means of --balance: "switch+bias", and their numbers, "0.01+0.001", "-" for none. */
void balance_names(const balance_methods *methods, char text[SETTING_TEXT]);
void balance_numbers(const balance_methods *methods, char text[SETTING_TEXT]);

/* Whether it takes a number. */
bool balance_has_number(const balance_method *method);

#endif
