/* Whether the tensor cores of an NVIDIA device compute what the engines nv_mma and nv_wgmma expect.
 */
#ifndef CLMOE_NV_PROBE_H
#define CLMOE_NV_PROBE_H

#include "runtime/context.h"

/*
 * Compiles and runs a small product on a queue of its own, once per context. CLMOE_UNSUPPORTED with
 * a sentence if it did not compile or gave other numbers.
 */
clmoe_status nv_probe(clmoe_context *context, nv_probe_kind kind);

#endif
