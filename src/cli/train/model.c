#include "model.h"
#include "sizes.h"

#include <stdlib.h>

/* ---- Buffers -----------------------------------------------------------------------------------
 */

/* Keeps a buffer for model_release(). */
static clmoe_status own(train_model *m, cl_mem mem) {
    if (m->num_owned == m->owned_room) {
        const uint32_t room = 2 * m->owned_room + 64;
        cl_mem *owned = realloc(m->owned, room * sizeof *owned);
        if (owned == NULL) {
            clReleaseMemObject(mem);
            return cli_fail(CLMOE_OUT_OF_MEMORY, "no memory for a list of %u buffers",
                            (unsigned)room);
        }
        m->owned = owned;
        m->owned_room = room;
    }
    m->owned[m->num_owned++] = mem;
    return CLMOE_SUCCESS;
}

/* Whether the device has room for one more buffer. */
static clmoe_status check_room(train_model *m, size_t bytes) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_device_id id = NULL;
    cl_ulong most = 0, memory = 0;
    TRY(CL(clGetCommandQueueInfo(m->device->queue, CL_QUEUE_DEVICE, sizeof id, (void *)&id, NULL)));
    TRY(CL(clGetDeviceInfo(id, CL_DEVICE_MAX_MEM_ALLOC_SIZE, sizeof most, &most, NULL)));
    TRY(CL(clGetDeviceInfo(id, CL_DEVICE_GLOBAL_MEM_SIZE, sizeof memory, &memory, NULL)));
    if (bytes > most)
        TRY(cli_fail(CLMOE_UNSUPPORTED,
                     "the run needs a buffer of %zu bytes, but the device allows %llu; its "
                     "--experts, --dim, --hidden, --layers, --context or --batch must be smaller",
                     bytes, (unsigned long long)most));
    m->bytes += bytes;
    if (m->bytes > memory)
        TRY(cli_fail(CLMOE_UNSUPPORTED,
                     "the run needs more than the device's %llu bytes of memory; its --experts, "
                     "--dim, --hidden, --layers, --context or --batch must be smaller",
                     (unsigned long long)memory));
done:
    return status;
}

/* A buffer, zeros after fill_all(); none of 0 bytes. */
static clmoe_status create(train_model *m, size_t bytes, cl_mem *mem) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_int code = CL_SUCCESS;
    if (bytes == 0)
        return status;
    TRY(check_room(m, bytes));
    *mem = clCreateBuffer(m->device->cl, CL_MEM_READ_WRITE, bytes, NULL, &code);
    TRY(cli_cl(code, "clCreateBuffer"));
    TRY(own(m, *mem));
done:
    return status;
}

/* Only after all have found room: it is now that the memory is taken. */
static clmoe_status fill_all(train_model *m) {
    clmoe_status status = CLMOE_SUCCESS;
    for (uint32_t i = 0; i < m->num_owned; i++) {
        size_t bytes = 0;
        TRY(CL(clGetMemObjectInfo(m->owned[i], CL_MEM_SIZE, sizeof bytes, &bytes, NULL)));
        TRY(model_clear(m, m->owned[i], bytes));
    }
done:
    return status;
}

/* The part of an array of f32 that a parameter has. */
static clmoe_status part_of(train_model *m, cl_mem array, const parameter *row, cl_mem *part) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_int code = CL_SUCCESS;
    const cl_buffer_region region = {row->first * sizeof(cl_float), row->count * sizeof(cl_float)};
    *part =
        clCreateSubBuffer(array, CL_MEM_READ_WRITE, CL_BUFFER_CREATE_TYPE_REGION, &region, &code);
    TRY(cli_cl(code, "clCreateSubBuffer"));
    TRY(own(m, *part));
done:
    return status;
}

/* A parameter in an array of elements of `bytes`; {NULL, 0} where the model has none. */
static clmoe_buf place_of(const train_model *m, cl_mem array, size_t bytes, parameter_kind kind,
                          uint32_t block) {
    const parameter *row = parameters_find(&m->parameters, kind, block);
    return row != NULL ? (clmoe_buf){array, row->first * bytes} : (clmoe_buf){NULL, 0};
}

/* ---- Blocks ------------------------------------------------------------------------------------
 */

static void bind_weights(train_model *m, uint32_t block) {
    train_block *b = &m->blocks[block];
    const size_t bytes = clmoe_type_size(m->settings->type), word = sizeof(cl_float);
    const cl_mem copy = m->copy ? m->copy : m->values;
    b->weights = (clmoe_weights){
        .experts.gate = place_of(m, copy, bytes, PARAMETER_GATE_UP, block),
        .experts.down = place_of(m, copy, bytes, PARAMETER_DOWN, block),
        .shared.gate = place_of(m, copy, bytes, PARAMETER_SHARED_GATE_UP, block),
        .shared.down = place_of(m, copy, bytes, PARAMETER_SHARED_DOWN, block),
        .router = place_of(m, m->values, word, PARAMETER_ROUTER, block),
        .noise_router = place_of(m, m->values, word, PARAMETER_NOISE_ROUTER, block),
    };
    b->gradients = (clmoe_gradients){
        .experts.gate = place_of(m, m->gradients, word, PARAMETER_GATE_UP, block),
        .experts.down = place_of(m, m->gradients, word, PARAMETER_DOWN, block),
        .shared.gate = place_of(m, m->gradients, word, PARAMETER_SHARED_GATE_UP, block),
        .shared.down = place_of(m, m->gradients, word, PARAMETER_SHARED_DOWN, block),
        .router = place_of(m, m->gradients, word, PARAMETER_ROUTER, block),
        .noise_router = place_of(m, m->gradients, word, PARAMETER_NOISE_ROUTER, block),
    };
    b->frozen = b->weights;
    if (m->phases.biased)
        b->frozen.select_bias = (clmoe_buf){b->state, sizeof(clmoe_state)};
}

/* The norm of a block, or of the head. */
static clmoe_status create_norm(train_model *m, uint32_t block) {
    clmoe_status status = CLMOE_SUCCESS;
    train_block *b = &m->blocks[block];
    const train_settings *s = m->settings;
    const size_t rows = (size_t)s->batch * s->dim * clmoe_type_size(s->type);
    const parameter *gain = parameters_find(&m->parameters, PARAMETER_GAIN, block);
    TRY(create(m, rows, &b->x));
    TRY(create(m, rows, &b->h));
    TRY(create(m, s->batch * sizeof(cl_float), &b->inverse));
    TRY(part_of(m, m->values, gain, &b->gain));
    TRY(part_of(m, m->gradients, gain, &b->dgain));
done:
    return status;
}

static clmoe_status create_counted(train_model *m, train_block *b) {
    clmoe_status status = CLMOE_SUCCESS;
    const train_settings *s = m->settings;
    const clmoe_layer *layer = phases_at(&m->phases, UINT32_MAX)->layer;
    const balance_method *rule = methods_find(&s->methods, METHOD_RULE);
    const size_t logits = (size_t)s->batch * s->experts * sizeof(cl_float);
    size_t counts = 0;
    if (!m->phases.counted)
        return status;
    TRY(LIB(clmoe_state_size(layer, &m->state_bytes)));
    TRY(LIB(clmoe_stats_size(layer, &m->stats_bytes)));
    if (rule != NULL && rule->row->which == CLMOE_BIAS_QUANTILE)
        TRY(LIB(clmoe_bias_counts_size(layer, &counts)));
    TRY(create(m, m->state_bytes, &b->state));
    TRY(create(m, m->stats_bytes, &b->stats));
    TRY(create(m, counts, &b->bias_counts));
    TRY(create(m, logits, &b->dlogits));
    TRY(create(m, s->noise == CLMOE_NOISE_LEARNED ? logits : 0, &b->dnoise));
    TRY(create(m, MOST_LOSSES * sizeof(cl_float), &b->loss_values));
done:
    return status;
}

static clmoe_status create_blocks(train_model *m) {
    clmoe_status status = CLMOE_SUCCESS;
    m->blocks = calloc(m->settings->layers + 1, sizeof *m->blocks);
    if (m->blocks == NULL)
        TRY(cli_fail(CLMOE_OUT_OF_MEMORY, "no memory for --layers %u",
                     (unsigned)m->settings->layers));
    for (uint32_t l = 0; l <= m->settings->layers; l++)
        TRY(create_norm(m, l));
    for (uint32_t l = 0; l < m->settings->layers; l++) {
        TRY(create(m, m->phases.saved, &m->blocks[l].saved));
        TRY(create_counted(m, &m->blocks[l]));
        bind_weights(m, l);
    }
done:
    return status;
}

/* ---- The rest of the model ---------------------------------------------------------------------
 */

/* The head is the router of a layer, whose experts are the bytes: clmoe_score() and its backward.
 */
static clmoe_status create_head(train_model *m) {
    clmoe_status status = CLMOE_SUCCESS;
    size_t scratch = 0;
    clmoe_layer_desc desc;
    clmoe_layer_desc_init(&desc);
    desc.dim = m->settings->dim;
    desc.num_experts = BYTE_VALUES;
    desc.top_k = 1;
    desc.type = m->settings->type;
    desc.training = 1;
    desc.engine = m->settings->engine;
    desc.experts.hidden_dim = 1;
    TRY(LIB(clmoe_layer_create(m->device->context, &desc, &m->head)));
    TRY(LIB(clmoe_layer_memory(m->head, m->settings->batch, NULL, &scratch)));
    m->phases.scratch = scratch > m->phases.scratch ? scratch : m->phases.scratch;
    m->head_weights.router = place_of(m, m->values, sizeof(cl_float), PARAMETER_HEAD, 0);
    m->head_gradients.router = place_of(m, m->gradients, sizeof(cl_float), PARAMETER_HEAD, 0);
done:
    return status;
}

static clmoe_status create_parameters(train_model *m) {
    clmoe_status status = CLMOE_SUCCESS;
    const parameter *table;
    const size_t bytes = sizeof(cl_float);
    TRY(create(m, m->parameters.elements * bytes, &m->values));
    TRY(create(m, m->parameters.elements * bytes, &m->gradients));
    TRY(create(m, m->parameters.elements * bytes, &m->mean));
    TRY(create(m, m->parameters.elements * bytes, &m->square));
    if (m->settings->type != CLMOE_F32)
        TRY(create(m, m->parameters.copied * clmoe_type_size(m->settings->type), &m->copy));
    table = parameters_find(&m->parameters, PARAMETER_TABLE, 0);
    TRY(part_of(m, m->values, table, &m->table));
    TRY(part_of(m, m->gradients, table, &m->dtable));
done:
    return status;
}

static clmoe_status create_batch(train_model *m, const corpus *text) {
    clmoe_status status = CLMOE_SUCCESS;
    const train_settings *s = m->settings;
    const size_t tokens = s->batch, word = sizeof(cl_uint);
    const size_t rows = tokens * s->dim * clmoe_type_size(s->type);
    TRY(create(m, text->size, &m->text));
    TRY(create(m, tokens * word, &m->positions));
    TRY(create(m, tokens * s->context * word, &m->rows));
    TRY(create(m, ((size_t)s->context * BYTE_VALUES + 1) * word, &m->first));
    TRY(create(m, rows, &m->dy));
    TRY(create(m, rows, &m->dh));
    TRY(create(m, tokens * BYTE_VALUES * word, &m->logits));
    TRY(create(m, tokens * BYTE_VALUES * word, &m->scores));
    TRY(create(m, tokens * word, &m->losses));
    TRY(create(m, (size_t)GAIN_SLICES * s->dim * word, &m->partial));
    for (int i = 0; i < SUM_STAGES; i++)
        TRY(create(m, sum_items[i] * word, &m->sums[i]));
    TRY(create(m, m->phases.scratch, &m->scratch));
    TRY(fill_all(m));
    TRY(model_write(m, m->text, text->size, text->bytes));
done:
    return status;
}

clmoe_status model_round(train_model *m, float *values) {
    const clmoe_type type = m->settings->type;
    if (m->copy == NULL)
        return CLMOE_SUCCESS;
    clmoe_type_encode(type, values, m->parameters.copied, values);
    return model_write(m, m->copy, m->parameters.copied * clmoe_type_size(type), values);
}

clmoe_status model_init(train_model *m) {
    clmoe_status status = CLMOE_SUCCESS;
    const size_t count = m->parameters.elements;
    float *values = malloc(count * sizeof *values);
    if (values == NULL)
        TRY(cli_fail(CLMOE_OUT_OF_MEMORY, "no memory for %zu parameters", count));
    parameters_init(&m->parameters, m->settings, values);
    TRY(model_write(m, m->values, count * sizeof *values, values));
    TRY(model_round(m, values));
    TRY(model_start(m));
done:
    free(values);
    return status;
}

clmoe_status model_create(train_model *m, const train_settings *s, const corpus *text,
                          device_session *device) {
    clmoe_status status = CLMOE_SUCCESS;
    m->settings = s;
    m->device = device;
    TRY(parameters_create(&m->parameters, s));
    TRY(marks_create(&m->marks, 2 + 4 * s->layers));
    TRY(train_kernels_create(&m->kernels, device, s->type));
    TRY(phases_create(&m->phases, s, device->context));
    TRY(create_parameters(m));
    TRY(create_head(m));
    TRY(create_blocks(m));
    TRY(create_batch(m, text));
done:
    return status;
}

clmoe_status model_choices(train_model *m, uint32_t step, uint32_t *pairs) {
    clmoe_status status = CLMOE_SUCCESS;
    const train_phase *phase = phases_at(&m->phases, step);
    const uint32_t tokens = m->settings->batch;
    const size_t word = sizeof(cl_int);
    const bool owned = phase->policy == CLMOE_POLICY_EXPERT_CHOICE;
    clmoe_plan_layout layout;
    TRY(LIB(clmoe_plan_layout_get(phase->validation, tokens, &layout)));
    *pairs = layout.pairs;
    for (uint32_t l = 0; l < m->settings->layers; l++) {
        TRY(create(m, *pairs * word, &m->blocks[l].ids));
        TRY(create(m, owned ? (tokens + 1) * word : 0, &m->blocks[l].offsets));
    }
done:
    return status;
}

void model_release(train_model *m) {
    if (m->device != NULL)
        clFinish(m->device->queue);
    /* Parts before the arrays that they are of. */
    while (m->num_owned > 0)
        clReleaseMemObject(m->owned[--m->num_owned]);
    free(m->owned);
    free(m->blocks);
    marks_free(&m->marks);
    clmoe_layer_destroy(m->head);
    phases_destroy(&m->phases);
    train_kernels_release(&m->kernels);
    parameters_free(&m->parameters);
    *m = (train_model){0};
}

/* By the widest pattern that fits: some drivers are slow with narrow ones. */
clmoe_status model_clear(train_model *m, cl_mem mem, size_t bytes) {
    const cl_uchar zeros[64] = {0};
    size_t width = sizeof zeros;
    while (bytes % width != 0)
        width /= 2;
    return CL(clEnqueueFillBuffer(m->device->queue, mem, zeros, width, 0, bytes, 0, NULL, NULL));
}

clmoe_status model_read(train_model *m, cl_mem from, size_t bytes, void *to) {
    return CL(clEnqueueReadBuffer(m->device->queue, from, CL_TRUE, 0, bytes, to, 0, NULL, NULL));
}

clmoe_status model_write(train_model *m, cl_mem to, size_t bytes, const void *from) {
    return CL(clEnqueueWriteBuffer(m->device->queue, to, CL_TRUE, 0, bytes, from, 0, NULL, NULL));
}
