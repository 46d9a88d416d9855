/* How the PTX of an OpenCL program becomes one for sm_90a. */
#ifndef CLMOE_NV_PTX_H
#define CLMOE_NV_PTX_H

#include "runtime/program.h"

/*
 * NVIDIA's OpenCL compiler writes PTX for sm_90 and knows nothing of wgmma. The edit
 * - makes lines of comments "//@SM90A ...": cl/experts/gemm/nv_wgmma.clh has them;
 * - changes the target sm_90 to sm_90a;
 * - adds .minnctapersm 1 behind each .reqntid: without it setmaxnreg is ignored.
 * It searches for these words, not for their places. *edited, to be freed, is NULL where there is
 * no such target or no such comment, and where there is no memory: CLMOE_OUT_OF_MEMORY.
 */
clmoe_status nv_ptx_edit(const char *text, char **edited);

extern const program_edit nv_ptx_sm90a;

#endif
