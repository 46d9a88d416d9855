/* Buffers of the public calls: each by itself, and that no two overlap that must not. */
#include "check_buffers.h"

#include <string.h>

size_t bytes_of(size_t rows, size_t columns, size_t element) {
    size_t elements, bytes;
    return size_mul(rows, columns, &elements) && size_mul(elements, element, &bytes) ? bytes
                                                                                     : SIZE_MAX;
}

/* What OpenCL knows of a memory object. */
typedef struct mem_facts {
    size_t size;
    cl_context context;
    cl_mem_object_type type;
    cl_mem_flags flags;
    cl_mem parent; /* NULL: none */
    size_t origin; /* in the parent */
} mem_facts;

static clmoe_status ask(cl_mem mem, mem_facts *facts) {
    clmoe_status status = CLMOE_SUCCESS;
    *facts = (mem_facts){0};
    TRY(CL(clGetMemObjectInfo(mem, CL_MEM_SIZE, sizeof facts->size, &facts->size, NULL)));
    TRY(CL(clGetMemObjectInfo(mem, CL_MEM_CONTEXT, sizeof facts->context, (void *)&facts->context,
                              NULL)));
    TRY(CL(clGetMemObjectInfo(mem, CL_MEM_TYPE, sizeof facts->type, &facts->type, NULL)));
    TRY(CL(clGetMemObjectInfo(mem, CL_MEM_FLAGS, sizeof facts->flags, &facts->flags, NULL)));
    TRY(CL(clGetMemObjectInfo(mem, CL_MEM_ASSOCIATED_MEMOBJECT, sizeof facts->parent,
                              (void *)&facts->parent, NULL)));
    if (facts->parent)
        TRY(CL(clGetMemObjectInfo(mem, CL_MEM_OFFSET, sizeof facts->origin, &facts->origin, NULL)));
done:
    return status;
}

/* Whether a kernel may use the object as the call will. */
static clmoe_status check_use(const buffer_need *need, const mem_facts *facts) {
    if (facts->type != CL_MEM_OBJECT_BUFFER)
        return fail(CLMOE_INVALID_ARGUMENT, "%s is an OpenCL memory object of type 0x%x, no buffer",
                    need->name, facts->type);
    if (need->use != BUFFER_READ && (facts->flags & CL_MEM_READ_ONLY))
        return fail(CLMOE_INVALID_ARGUMENT, "%s is written, but is CL_MEM_READ_ONLY", need->name);
    if (need->use != BUFFER_WRITE && (facts->flags & CL_MEM_WRITE_ONLY))
        return fail(CLMOE_INVALID_ARGUMENT, "%s is read, but is CL_MEM_WRITE_ONLY", need->name);
    return CLMOE_SUCCESS;
}

static clmoe_status check_place(const buffer_need *need, const mem_facts *facts) {
    const size_t offset = need->buf->offset;
    size_t end;
    if (offset % need->element != 0)
        return fail(CLMOE_INVALID_ARGUMENT, "%s.offset is %zu, but must be a multiple of %zu",
                    need->name, offset, need->element);
    if (!size_add(offset, need->bytes, &end) || end > facts->size)
        return fail(CLMOE_INVALID_ARGUMENT, "%s has %zu bytes, but needs %zu from offset %zu%s",
                    need->name, facts->size, need->bytes, offset,
                    strcmp(need->name, "state") == 0 ? "; states of version 1 are too short" : "");
    if (facts->origin % need->element != 0)
        return fail(CLMOE_INVALID_ARGUMENT,
                    "%s is a sub-buffer at %zu, but must begin at a multiple of %zu", need->name,
                    facts->origin, need->element);
    return CLMOE_SUCCESS;
}

static void keep_range(call_check *call, const buffer_need *need, const mem_facts *facts) {
    const size_t begin = facts->origin + need->buf->offset;
    if (call->count == MAX_CALL_BUFFERS) /* no call has as many */
        return;
    call->ranges[call->count++] = (used_range){
        need->name, need->buf,           facts->parent ? facts->parent : need->buf->mem,
        begin,      begin + need->bytes, need->use != BUFFER_READ};
}

clmoe_status check_buffer(call_check *call, const buffer_need *need) {
    clmoe_status status = CLMOE_SUCCESS;
    mem_facts facts;
    if (need->bytes == 0)
        return CLMOE_SUCCESS;
    if (!need->buf->mem) {
        if (need->required)
            return fail(CLMOE_INVALID_ARGUMENT, "%s is not given, but needs %zu bytes", need->name,
                        need->bytes);
        return CLMOE_SUCCESS;
    }
    TRY(ask(need->buf->mem, &facts));
    if (facts.context != call->layer->context->cl)
        return fail(CLMOE_INVALID_ARGUMENT, "%s belongs to another OpenCL context", need->name);
    TRY(check_use(need, &facts));
    TRY(check_place(need, &facts));
    keep_range(call, need, &facts);
done:
    if (status == CL_INVALID_MEM_OBJECT)
        return fail(CLMOE_INVALID_ARGUMENT, "%s is not a valid OpenCL buffer: %s", need->name,
                    clmoe_status_string(status));
    return status;
}

clmoe_status check_buffers(call_check *call, const buffer_need *needs, size_t count) {
    clmoe_status status = CLMOE_SUCCESS;
    for (size_t i = 0; i < count; i++)
        TRY(check_buffer(call, &needs[i]));
done:
    return status;
}

/* Whether both are the same place, and the call allows these two that. */
static bool may_share(const call_check *call, const used_range *a, const used_range *b) {
    const bool named = (a->buf == call->in_place[0] && b->buf == call->in_place[1]) ||
                       (a->buf == call->in_place[1] && b->buf == call->in_place[0]);
    return named && a->begin == b->begin;
}

clmoe_status check_overlaps(const call_check *call) {
    for (size_t i = 0; i < call->count; i++)
        for (size_t j = 0; call->ranges[i].written && j < call->count; j++) {
            const used_range *a = &call->ranges[i], *b = &call->ranges[j];
            if (a->root != b->root || a->end <= b->begin || b->end <= a->begin ||
                a->buf == b->buf || may_share(call, a, b))
                continue;
            return fail(CLMOE_INVALID_ARGUMENT,
                        "%s overlaps %s: bytes %zu to %zu and %zu to %zu of one buffer", a->name,
                        b->name, a->begin, a->end, b->begin, b->end);
        }
    return CLMOE_SUCCESS;
}

clmoe_status check_host_reads(const char *name, const clmoe_buf *buf) {
    clmoe_status status = CLMOE_SUCCESS;
    const cl_mem_flags none = CL_MEM_HOST_NO_ACCESS | CL_MEM_HOST_WRITE_ONLY;
    cl_mem_flags flags = 0;
    if (!buf->mem)
        return CLMOE_SUCCESS;
    TRY(CL(clGetMemObjectInfo(buf->mem, CL_MEM_FLAGS, sizeof flags, &flags, NULL)));
    if (flags & none)
        return fail(CLMOE_INVALID_ARGUMENT,
                    "%s is CL_MEM_HOST_%s, but the call reads it on the host", name,
                    flags & CL_MEM_HOST_NO_ACCESS ? "NO_ACCESS" : "WRITE_ONLY");
done:
    return status;
}

clmoe_status check_head(const clmoe_layer *layer, uint32_t tokens, workspace_layout *ws) {
    if (!layer)
        return fail(CLMOE_INVALID_ARGUMENT, "layer is NULL");
    return workspace_layout_get(layer, tokens, ws);
}

clmoe_status check_step(const clmoe_layer *layer, uint32_t tokens, workspace_layout *ws) {
    clmoe_status status = check_head(layer, tokens, ws);
    if (status == CLMOE_SUCCESS && layer_is_soft_moe(layer))
        return fail(CLMOE_UNSUPPORTED, "router.policy is Soft MoE, which has no such step");
    return status;
}

clmoe_status check_measures(const clmoe_layer *layer, const char *asked) {
    if (layer_measures(layer))
        return CLMOE_SUCCESS;
    return fail(CLMOE_UNSUPPORTED,
                "%s is asked for, but the layer was made with balance.enabled 0 and training 0",
                asked);
}

clmoe_status check_unused(uint32_t reserved) {
    if (reserved == 0)
        return CLMOE_SUCCESS;
    return fail(CLMOE_INVALID_ARGUMENT, "reserved is %u, but must be 0", reserved);
}
