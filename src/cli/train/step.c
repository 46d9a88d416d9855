/* One step of the model: forward, backward, the optimiser and the controllers. */
#include "model.h"
#include "sizes.h"

#include <math.h>
#include <stdlib.h>

enum { CHUNK = 16, QUAD = 4 };

static clmoe_buf at(cl_mem mem) {
    return (clmoe_buf){mem, 0};
}

static clmoe_status mark(train_model *m) {
    return m->timed ? marks_add(&m->marks, m->device->queue) : CLMOE_SUCCESS;
}

/* ---- The batch ---------------------------------------------------------------------------------
 */

clmoe_status model_batch(train_model *m, const corpus *text, const uint32_t *positions,
                         bool training) {
    clmoe_status status = CLMOE_SUCCESS;
    const uint32_t tokens = m->settings->batch;
    const size_t pairs = (size_t)tokens * m->settings->context, word = sizeof(uint32_t);
    const size_t entries = (size_t)m->settings->context * BYTE_VALUES + 1;
    uint32_t *rows = NULL;
    TRY(model_write(m, m->positions, tokens * word, positions));
    if (!training)
        goto done;
    rows = malloc((pairs + entries) * word);
    if (rows == NULL)
        TRY(cli_fail(CLMOE_OUT_OF_MEMORY, "no memory for a batch of %u tokens", (unsigned)tokens));
    corpus_sort(text, positions, tokens, rows, rows + pairs);
    TRY(model_write(m, m->rows, pairs * word, rows));
    TRY(model_write(m, m->first, entries * word, rows + pairs));
done:
    free(rows);
    return status;
}

/* ---- What is not a layer -----------------------------------------------------------------------
 */

static clmoe_status embed(train_model *m) {
    const cl_uint context = m->settings->context;
    return train_kernels_run(
        &m->kernels, &(kernel_launch){.kernel = KERNEL_EMBED,
                                      .columns = m->settings->dim / CHUNK,
                                      .rows = m->settings->batch,
                                      .arguments = {ARGUMENT(m->text), ARGUMENT(m->positions),
                                                    ARGUMENT(m->table), ARGUMENT(m->blocks[0].x),
                                                    ARGUMENT(context)}});
}

static clmoe_status embed_backward(train_model *m) {
    return train_kernels_run(&m->kernels,
                             &(kernel_launch){.kernel = KERNEL_EMBED_BACKWARD,
                                              .columns = m->settings->dim / CHUNK,
                                              .rows = (size_t)m->settings->context * BYTE_VALUES,
                                              .arguments = {ARGUMENT(m->rows), ARGUMENT(m->first),
                                                            ARGUMENT(m->dy), ARGUMENT(m->dtable)}});
}

static clmoe_status norm(train_model *m, train_block *b) {
    const cl_uint chunks = m->settings->dim / CHUNK;
    return train_kernels_run(
        &m->kernels,
        &(kernel_launch){.kernel = KERNEL_NORM,
                         .columns = m->settings->batch,
                         .grouped = true,
                         .arguments = {ARGUMENT(b->x), ARGUMENT(b->gain), ARGUMENT(b->h),
                                       ARGUMENT(b->inverse), ARGUMENT(chunks)}});
}

/* dh -> the gain's gradient. */
static clmoe_status norm_gain(train_model *m, train_block *b) {
    clmoe_status status = CLMOE_SUCCESS;
    const cl_uint tokens = m->settings->batch, slices = GAIN_SLICES;
    const kernel_launch launches[] = {
        {.kernel = KERNEL_NORM_GAIN,
         .columns = m->settings->dim / CHUNK,
         .rows = slices,
         .arguments = {ARGUMENT(b->x), ARGUMENT(m->dh), ARGUMENT(b->inverse), ARGUMENT(m->partial),
                       ARGUMENT(tokens)}},
        {.kernel = KERNEL_SUM_ROWS,
         .columns = m->settings->dim / CHUNK,
         .arguments = {ARGUMENT(m->partial), ARGUMENT(b->dgain), ARGUMENT(slices)}},
    };
    for (int i = 0; i < 2; i++)
        TRY(train_kernels_run(&m->kernels, &launches[i]));
done:
    return status;
}

/* dh, and where the residual passes dy -> dy of the rows before the norm. */
static clmoe_status norm_backward(train_model *m, train_block *b, bool residual) {
    clmoe_status status = CLMOE_SUCCESS;
    const cl_uint chunks = m->settings->dim / CHUNK, has_dy = residual;
    TRY(norm_gain(m, b));
    TRY(train_kernels_run(
        &m->kernels,
        &(kernel_launch){.kernel = KERNEL_NORM_BACKWARD,
                         .columns = m->settings->batch,
                         .grouped = true,
                         .arguments = {ARGUMENT(b->x), ARGUMENT(b->gain), ARGUMENT(m->dh),
                                       ARGUMENT(b->inverse), ARGUMENT(m->dy), ARGUMENT(m->dy),
                                       ARGUMENT(chunks), ARGUMENT(has_dy)}}));
done:
    return status;
}

static clmoe_status head(train_model *m, bool training) {
    clmoe_status status = CLMOE_SUCCESS;
    const cl_uint backward = training;
    const clmoe_score_args score = {.struct_size = sizeof score,
                                    .tokens = m->settings->batch,
                                    .weights = &m->head_weights,
                                    .x = at(m->blocks[m->settings->layers].h),
                                    .logits = at(m->logits),
                                    .scores = at(m->scores),
                                    .scratch = at(m->scratch)};
    TRY(LIB(clmoe_score(m->head, m->device->queue, &score, 0, NULL, NULL)));
    TRY(train_kernels_run(&m->kernels,
                          &(kernel_launch){.kernel = KERNEL_CROSS_ENTROPY,
                                           .columns = m->settings->batch,
                                           .grouped = true,
                                           .arguments = {ARGUMENT(m->text), ARGUMENT(m->positions),
                                                         ARGUMENT(m->logits), ARGUMENT(m->losses),
                                                         ARGUMENT(backward)}}));
done:
    return status;
}

/* dlogits -> dh. */
static clmoe_status head_backward(train_model *m) {
    const clmoe_score_backward_args args = {.struct_size = sizeof args,
                                            .tokens = m->settings->batch,
                                            .weights = &m->head_weights,
                                            .x = at(m->blocks[m->settings->layers].h),
                                            .dlogits = at(m->logits),
                                            .scratch = at(m->scratch),
                                            .router_dx = at(m->dh),
                                            .gradients = &m->head_gradients};
    return LIB(clmoe_score_backward(m->head, m->device->queue, &args, 0, NULL, NULL));
}

/* ---- Layers ------------------------------------------------------------------------------------
 */

uint32_t model_losses(const train_model *m, uint32_t step, clmoe_loss_desc *losses) {
    const train_settings *s = m->settings;
    uint32_t count = 0;
    if (!m->phases.counted)
        return 0;
    if (step >= s->balance_from)
        count = methods_losses(&s->methods, losses);
    for (uint32_t i = 0; i < count; i++)
        losses[i].per_sequence = s->per_sequence;
    if (s->z_loss > 0)
        losses[count++] = (clmoe_loss_desc){.kind = CLMOE_LOSS_Z, .weight = (float)s->z_loss};
    if (s->token_entropy > 0)
        losses[count++] =
            (clmoe_loss_desc){.kind = CLMOE_LOSS_TOKEN_ENTROPY, .weight = (float)s->token_entropy};
    return count;
}

/* Whether the rule of the selection bias moves it after a step. */
static bool rule_acts(const train_settings *s, uint32_t step) {
    return step >= s->balance_from && step >= s->soft_steps;
}

/* What a layer in training gets besides: its state, losses, counts. */
static clmoe_status add_training(train_model *m, const train_block *b, uint32_t step,
                                 clmoe_forward_args *args) {
    clmoe_status status = CLMOE_SUCCESS;
    const train_settings *s = m->settings;
    const size_t logits = (size_t)s->batch * s->experts * sizeof(cl_float);
    args->saved = at(b->saved);
    args->state = at(b->state);
    if (b->bias_counts != NULL && rule_acts(s, step)) {
        args->bias_counts = at(b->bias_counts);
        TRY(model_clear(m, b->bias_counts, (size_t)s->experts * CLMOE_BIAS_BINS * sizeof(cl_uint)));
    }
    if (args->num_losses == 0)
        return status;
    args->loss_values = at(b->loss_values);
    args->dlogits = at(b->dlogits);
    args->dnoise = at(b->dnoise);
    TRY(model_clear(m, b->dlogits, logits));
    if (b->dnoise != NULL)
        TRY(model_clear(m, b->dnoise, logits));
done:
    return status;
}

static clmoe_status layer_forward(train_model *m, uint32_t block, uint32_t step, bool training) {
    clmoe_status status = CLMOE_SUCCESS;
    train_block *b = &m->blocks[block];
    const train_phase *phase = phases_at(&m->phases, step);
    clmoe_loss_desc losses[MOST_LOSSES];
    clmoe_forward_args args;
    clmoe_forward_args_init(&args);
    args.tokens = m->settings->batch;
    args.weights = training ? &b->weights : &b->frozen;
    args.x = at(b->h);
    args.residual = at(b->x);
    args.y = at(m->blocks[block + 1].x);
    args.scratch = at(m->scratch);
    args.stats = at(b->stats);
    if (training) {
        args.num_losses = model_losses(m, step, losses);
        args.losses = args.num_losses > 0 ? losses : NULL;
        args.loss_size = sizeof losses[0];
        TRY(add_training(m, b, step, &args));
    } else {
        args.ids = at(b->ids);
        args.token_offsets = at(b->offsets);
    }
    TRY(mark(m));
    TRY(LIB(clmoe_forward(training ? phase->layer : phase->validation, m->device->queue, &args, 0,
                          NULL, NULL)));
    TRY(mark(m));
done:
    return status;
}

/* dy -> dh and the gradients of the weights. */
static clmoe_status layer_backward(train_model *m, uint32_t block, uint32_t step) {
    clmoe_status status = CLMOE_SUCCESS;
    train_block *b = &m->blocks[block];
    clmoe_loss_desc losses[MOST_LOSSES];
    clmoe_backward_args args;
    clmoe_backward_args_init(&args);
    args.tokens = m->settings->batch;
    args.weights = &b->weights;
    args.x = at(b->h);
    args.state = at(b->state);
    args.saved = at(b->saved);
    args.scratch = at(m->scratch);
    args.dy = at(m->dy);
    args.dx = at(m->dh);
    args.gradients = &b->gradients;
    if (model_losses(m, step, losses) > 0) {
        args.dlogits = at(b->dlogits);
        args.dnoise = at(b->dnoise);
    }
    TRY(mark(m));
    TRY(LIB(clmoe_backward(phases_at(&m->phases, step)->layer, m->device->queue, &args, 0, NULL,
                           NULL)));
    TRY(mark(m));
done:
    return status;
}

static clmoe_status orthogonality(train_model *m, uint32_t block, uint32_t step) {
    const train_settings *s = m->settings;
    const balance_method *method = methods_find(&s->methods, METHOD_ORTHOGONALITY);
    train_block *b = &m->blocks[block];
    if (method == NULL || step < s->balance_from)
        return CLMOE_SUCCESS;
    const clmoe_router_orthogonality_args args = {.struct_size = sizeof args,
                                                  .weights = &b->weights,
                                                  .weight = (float)method->value,
                                                  .scratch = at(m->scratch),
                                                  .drouter = b->gradients.router};
    return LIB(clmoe_router_orthogonality(phases_at(&m->phases, step)->layer, m->device->queue,
                                          &args, 0, NULL, NULL));
}

clmoe_status model_forward(train_model *m, uint32_t step, bool training) {
    clmoe_status status = CLMOE_SUCCESS;
    const uint32_t layers = m->settings->layers;
    TRY(embed(m));
    for (uint32_t l = 0; l < layers; l++) {
        TRY(norm(m, &m->blocks[l]));
        TRY(layer_forward(m, l, step, training));
    }
    TRY(norm(m, &m->blocks[layers]));
    TRY(head(m, training));
done:
    return status;
}

clmoe_status model_backward(train_model *m, uint32_t step) {
    clmoe_status status = CLMOE_SUCCESS;
    const uint32_t layers = m->settings->layers;
    TRY(head_backward(m));
    TRY(norm_backward(m, &m->blocks[layers], false));
    for (uint32_t l = layers; l-- > 0;) {
        TRY(layer_backward(m, l, step));
        TRY(orthogonality(m, l, step));
        TRY(norm_backward(m, &m->blocks[l], true));
    }
    TRY(embed_backward(m));
done:
    return status;
}

/* ---- Between steps -----------------------------------------------------------------------------
 */

static void controller(const train_model *m, uint32_t block, clmoe_balance_args *args) {
    const train_block *b = &m->blocks[block];
    clmoe_balance_args_init(args);
    args->state = at(b->state);
    args->stats = at(b->stats);
    if (m->settings->anneal > 0)
        args->noise = (clmoe_schedule){
            .shape = CLMOE_SCHEDULE_LINEAR, .start = 1, .steps = m->settings->anneal};
}

clmoe_status model_start(train_model *m) {
    clmoe_status status = CLMOE_SUCCESS;
    const train_phase *phase = phases_at(&m->phases, 0);
    clmoe_balance_args args;
    for (uint32_t l = 0; l < m->settings->layers && m->phases.counted; l++) {
        const uint64_t seed = random_bits(m->settings->seed, l);
        TRY(LIB(clmoe_state_init(phase->layer, m->device->queue, at(m->blocks[l].state), seed, 0,
                                 NULL, NULL)));
        controller(m, l, &args);
        TRY(LIB(clmoe_balance_start(phase->layer, m->device->queue, &args, 0, NULL, NULL)));
    }
done:
    return status;
}

/* The sum of `elements` values, or of their squares, -> sums[SUM_STAGES - 1]. */
static clmoe_status sum(train_model *m, cl_mem values, size_t elements, bool squared) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_mem from = values;
    for (int i = 0; i < SUM_STAGES; i++) {
        const cl_uint squares = squared && i == 0, quads = (cl_uint)(elements / QUAD);
        const kernel_launch launch = {.kernel = KERNEL_SUM_VALUES,
                                      .columns = sum_items[i],
                                      .arguments = {ARGUMENT(from), ARGUMENT(m->sums[i]),
                                                    ARGUMENT(quads), ARGUMENT(squares)}};
        TRY(train_kernels_run(&m->kernels, &launch));
        from = m->sums[i];
        elements = sum_items[i];
    }
done:
    return status;
}

/* Linear warm-up, then a cosine down to a tenth. */
static double rate_at(const train_settings *s, uint32_t step) {
    if (step < s->warmup)
        return s->rate * (step + 1) / s->warmup;
    const uint32_t left = s->steps > s->warmup ? s->steps - s->warmup : 1;
    const double way = (double)(step - s->warmup) / left;
    return s->rate * (0.1 + 0.45 * (1 + cos(3.141592653589793 * (way < 1 ? way : 1))));
}

static clmoe_status optimise(train_model *m, uint32_t step) {
    const train_settings *s = m->settings;
    const double beta1 = 0.9, beta2 = 0.99;
    const cl_uint copied = m->copy ? (cl_uint)m->parameters.copied : 0;
    const cl_uint decayed = (cl_uint)m->parameters.decayed;
    const cl_mem copy = m->copy ? m->copy : m->values, squared = m->sums[SUM_STAGES - 1];
    const struct {
        cl_float rate, decay, clip, beta1, beta2, eps, correction1, correction2;
    } rates = {.rate = (cl_float)rate_at(s, step),
               .decay = (cl_float)s->decay,
               .clip = (cl_float)s->clip,
               .beta1 = (cl_float)beta1,
               .beta2 = (cl_float)beta2,
               .eps = 1e-8F,
               .correction1 = (cl_float)(1 - pow(beta1, step + 1)),
               .correction2 = (cl_float)(1 - pow(beta2, step + 1))};
    return train_kernels_run(
        &m->kernels,
        &(kernel_launch){.kernel = KERNEL_ADAMW,
                         .columns = m->parameters.elements,
                         .arguments = {ARGUMENT(m->values), ARGUMENT(m->gradients),
                                       ARGUMENT(m->mean), ARGUMENT(m->square), ARGUMENT(copy),
                                       ARGUMENT(squared), ARGUMENT(rates), ARGUMENT(copied),
                                       ARGUMENT(decayed)}});
}

static clmoe_status control(train_model *m, uint32_t block, uint32_t step) {
    const train_settings *s = m->settings;
    clmoe_balance_args args;
    controller(m, block, &args);
    if (rule_acts(s, step))
        methods_rule(&s->methods, &args);
    if (args.bias_rule == CLMOE_BIAS_QUANTILE)
        args.bias_counts = at(m->blocks[block].bias_counts);
    return LIB(clmoe_balance_update(phases_at(&m->phases, step)->layer, m->device->queue, &args, 0,
                                    NULL, NULL));
}

clmoe_status model_update(train_model *m, uint32_t step) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(sum(m, m->gradients, m->parameters.elements, true));
    TRY(optimise(m, step));
    for (uint32_t l = 0; l < m->settings->layers && m->phases.counted; l++)
        TRY(control(m, l, step));
done:
    return status;
}

clmoe_status model_loss(train_model *m, double *loss) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_float total = 0;
    TRY(sum(m, m->losses, m->settings->batch, false));
    TRY(model_read(m, m->sums[SUM_STAGES - 1], sizeof total, &total));
    *loss = (double)total / m->settings->batch;
done:
    return status;
}
