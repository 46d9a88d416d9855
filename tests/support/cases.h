/* Sizes shared by the tests: every E, K and T that matters, D and H multiples of nothing. */
#ifndef CASES_H
#define CASES_H

#include <stdint.h>

typedef struct shape {
    uint32_t tokens, dim, experts, identity, top_k, hidden_dim;
} shape;

/* clang-format off */

/* Routing alone: dim and hidden_dim are small, so that the other steps cost nothing. */
static const shape routing_shapes[] = {
    /* T     D  E     Z    K    H */
    {7,      5, 1,    0,   1,   3},
    {1,      5, 3,    0,   1,   3},
    {64,     5, 3,    0,   2,   3},
    {1000,   5, 8,    0,   2,   3},
    {7,      5, 8,    0,   8,   3},
    {1000,   5, 60,   0,   4,   3},
    {64,     5, 60,   3,   5,   3},
    {1000,   5, 64,   0,   6,   3},
    {64,     5, 64,   0,   16,  3},
    {7,      5, 64,   0,   64,  3},
    {64,     5, 205,  0,   7,   3},
    {7,      5, 205,  51,  256, 3},
    {64,     5, 384,  0,   10,  3},
    {1000,   5, 512,  256, 12,  3},
    {7,      5, 512,  0,   256, 3},
    {64,     5, 4096, 0,   9,   3},
    {1,      5, 4096, 0,   256, 3},
    {7,      5, 4095, 1,   16,  3},
    {0,      5, 64,   0,   6,   3},
};

/* Every K from 1 to 16 at one E. */
static const uint32_t small_top_k[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};

/* The whole layer. */
static const shape layer_shapes[] = {
    /* T     D   E     Z   K    H */
    {0,      17, 8,    0,  2,   11},
    {1,      1,  1,    0,  1,   1},
    {1,      37, 8,    0,  2,   19},
    {7,      33, 3,    0,  3,   21},
    {64,     45, 12,   0,  3,   29},
    {64,     70, 60,   4,  4,   37},
    {7,      19, 205,  0,  16,  13},
    {1000,   23, 64,   0,  6,   17},
    {7,      65, 8,    0,  2,   131},
    {64,     13, 384,  0,  8,   9},
    {7,      9,  4096, 0,  16,  5},
};

/* The capacity factor that goes with each of them; 0: dropless. */
static const double layer_factors[] = {0, 1, 1.25, 0, 1, 0.75, 0, 0.75, 1.25, 0, 1};

/* clang-format on */

#define COUNT_OF(array) (sizeof(array) / sizeof((array)[0]))

#endif
