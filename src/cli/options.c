#include "cli.h"

#include <getopt.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

clmoe_status option_refused(char **argv, int code) {
    const char *word = argv[optind - 1];
    if (code == ':')
        return fail(CLMOE_INVALID_ARGUMENT, "option '%s' needs a value", word);
    if (optopt >= 256)
        return fail(CLMOE_INVALID_ARGUMENT, "option '%s' takes no value", word);
    if (optopt != 0)
        return fail(CLMOE_INVALID_ARGUMENT, "unknown option '-%c'; see --help", optopt);
    return fail(CLMOE_INVALID_ARGUMENT, "unknown option '%s'; see --help", word);
}

clmoe_status parse_u32(const char *option, const char *text, uint32_t min, uint32_t max,
                       uint32_t *value) {
    size_t length = strlen(text);
    bool digits = length > 0 && length <= 10 && strspn(text, "0123456789") == length;
    unsigned long long number = digits ? strtoull(text, NULL, 10) : 0;
    if (!digits || number < min || number > max)
        return fail(CLMOE_INVALID_ARGUMENT, "%s is '%s', which is not a whole number from %u to %u",
                    option, text, (unsigned)min, (unsigned)max);
    *value = (uint32_t)number;
    return CLMOE_SUCCESS;
}

clmoe_status parse_real(const char *option, const char *text, double *value) {
    size_t length = strlen(text);
    char *end = NULL;
    double number = strtod(text, &end);
    bool whole = length > 0 && strspn(text, "0123456789.+-eE") == length && end == text + length;
    if (!whole || !isfinite(number) || signbit(number))
        return fail(CLMOE_INVALID_ARGUMENT,
                    "%s is '%s', which is not a finite number of at least 0", option, text);
    *value = number;
    return CLMOE_SUCCESS;
}
