/* Files of numbers below a line of names, as metrics.csv is; anything else is refused. */
#ifndef CLMOE_CLI_TRAIN_CSV_H
#define CLMOE_CLI_TRAIN_CSV_H

#include "../error.h"

#define CSV_NONE UINT32_MAX

/* Start from {0}. */
typedef struct csv_table {
    char *text;         /* the file; the names lie in it */
    const char **names; /* [columns], all different */
    double *values;     /* [rows, columns]; NAN: an empty field */
    uint32_t columns, rows;
    uint32_t next; /* column: where the next search begins */
} csv_table;

/* A last line without its end, of a process that was killed, is left out. */
clmoe_status csv_read(const char *path, csv_table *table);
/* Allowed on {0} and after an error. */
void csv_free(csv_table *table);

/* The column of that name, or CSV_NONE. */
uint32_t csv_column(csv_table *table, const char *name);

#endif
