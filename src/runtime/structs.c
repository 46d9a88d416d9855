#include "structs.h"

#include <string.h>

/* Of a struct's size: no struct of any version is outside, and a size that was not set mostly is.
 */
enum { LEAST_SIZE = 2 * sizeof(size_t), MOST_SIZE = 4096 };

bool struct_is_zero(const void *bytes, size_t begin, size_t end) {
    const unsigned char *byte = bytes;
    for (size_t i = begin; i < end; i++)
        if (byte[i] != 0)
            return false;
    return true;
}

size_t struct_used_word(const uint32_t *words, size_t count) {
    size_t i = 0;
    while (i < count && words[i] == 0)
        i++;
    return i;
}

clmoe_status struct_take(clmoe_status refusal, const char *name, const void *theirs, void *own,
                         size_t size) {
    size_t given;
    if (!theirs)
        return fail(CLMOE_INVALID_ARGUMENT, "%s is NULL", name);
    memcpy(&given, theirs, sizeof given);
    if (given < LEAST_SIZE || given > MOST_SIZE)
        return fail(refusal, "%s.struct_size is %zu, but must be from %d to %d", name, given,
                    (int)LEAST_SIZE, MOST_SIZE);
    if (!struct_is_zero(theirs, size, given))
        return fail(refusal,
                    "%s.struct_size is %zu, but this library knows %zu, and what follows is not 0",
                    name, given, size);
    memcpy(own, theirs, given < size ? given : size);
    memcpy(own, &size, sizeof size);
    return CLMOE_SUCCESS;
}

void struct_give(const void *own, size_t size, void *theirs, size_t given) {
    memset(theirs, 0, given);
    memcpy(theirs, own, given < size ? given : size);
    memcpy(theirs, &given, sizeof given);
}

clmoe_status struct_desc_unused(const clmoe_layer_desc *desc, const char *prefix) {
#define ROOM(part)                                                                                 \
    { #part, desc->part.reserved, sizeof desc->part.reserved / sizeof(uint32_t) }
    const struct {
        const char *part;
        const uint32_t *words;
        size_t count;
    } rooms[] = {
        ROOM(router),          ROOM(router.groups), ROOM(router.renorm),  ROOM(router.sinkhorn),
        ROOM(router.soft_moe), ROOM(router.noise),  ROOM(router.dropout), ROOM(router.rebalance),
        ROOM(capacity),        ROOM(experts),       ROOM(shared),         ROOM(balance),
    };
#undef ROOM
    if (desc->reserved != 0)
        return fail(CLMOE_INVALID_DESC, "%sreserved is %u, but must be 0", prefix, desc->reserved);
    for (size_t i = 0; i < sizeof rooms / sizeof rooms[0]; i++) {
        const size_t used = struct_used_word(rooms[i].words, rooms[i].count);
        if (used < rooms[i].count)
            return fail(CLMOE_INVALID_DESC, "%s%s.reserved[%zu] is %u, but must be 0", prefix,
                        rooms[i].part, used, rooms[i].words[used]);
    }
    return CLMOE_SUCCESS;
}
