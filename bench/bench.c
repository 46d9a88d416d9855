#include "bench.h"
#include "../src/cli/interrupt.h"

clmoe_status bench_no_memory(const char *what) {
    return cli_fail(CLMOE_OUT_OF_MEMORY, "no memory for %s", what);
}

clmoe_status bench_go_on(void) {
    problem why;
    if (interrupt_signal() == 0)
        return CLMOE_SUCCESS;
    interrupt_problem(&why, "the results until then are written");
    return cli_fail(CLMOE_IO, "%s", why.text);
}
