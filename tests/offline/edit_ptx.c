/* Edits PTX for sm_90a as the library does: standard input to standard output. 1: it is refused. */
#include "experts/gemm/nv_ptx.h"

#include <stdio.h>
#include <stdlib.h>

int main(void) {
    enum { PART = 1 << 16 };
    size_t bytes = 0, got = 0;
    char *text = NULL, *edited = NULL;
    do {
        char *grown = realloc(text, bytes + PART + 1);
        if (!grown)
            return 2;
        text = grown;
        got = fread(text + bytes, 1, PART, stdin);
        bytes += got;
    } while (got > 0);
    text[bytes] = '\0';
    const bool whole = nv_ptx_edit(text, &edited) == CLMOE_SUCCESS && edited &&
                       fputs(edited, stdout) >= 0 && fflush(stdout) == 0;
    free(text);
    free(edited);
    return whole ? 0 : 1;
}
