/* The text of `clmoe train --help`. */
#ifndef CLMOE_CLI_TRAIN_USAGE_H
#define CLMOE_CLI_TRAIN_USAGE_H

extern const char train_usage[];

#endif
