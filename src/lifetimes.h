/* When the regions of scratch are alive, and where that lets them lie. */
#ifndef CLMOE_LIFETIMES_H
#define CLMOE_LIFETIMES_H

#include "workspace.h"

enum { REGION_ALIGNMENT = 256 };

/*
 * The offsets of the regions that lie in scratch, and scratch_bytes, from layout->bytes and
 * layout->saved. Never more bytes where no region has more, so that memory for a batch serves every
 * smaller one. False: more than size_t holds.
 */
bool lifetimes_place(workspace_layout *layout);

#endif
