/* The text of `clmoe train --help`, in pieces; NULL behind the last. */
#ifndef CLMOE_CLI_TRAIN_USAGE_H
#define CLMOE_CLI_TRAIN_USAGE_H

extern const char *const train_usage[];

#endif
