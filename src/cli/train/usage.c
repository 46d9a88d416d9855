#include "usage.h"

const char train_usage[] =
    "Usage: clmoe train --text FILE... --out DIR [OPTION]...\n"
    "       clmoe train --resume DIR [--device D] [--engine E]\n"
    "Trains a small language model of MoE layers on bytes of text and shows what balancing does\n"
    "to its experts. The last twentieth of each file is held out for validation. DIR gets\n"
    "metrics.csv, the model, and what --resume goes on from.\n";
