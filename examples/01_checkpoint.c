/*
 * A layer from a model directory: opens it, describes the MoE block of layer 0, uploads its
 * weights, runs it on a recorded input and compares with the recorded output.
 *
 *   01_checkpoint MODEL_DIRECTORY ACTIVATIONS.safetensors
 *
 * ACTIVATIONS has two f32 tensors [T,D], NAME.x and NAME.y, as those of tests/data/checkpoints.
 */
#include "recording.h"

int main(int argc, char **argv) {
    fail_unless(argc == 3, "usage: 01_checkpoint MODEL_DIRECTORY ACTIVATIONS.safetensors");
    recording r = recording_read(argv[2]);
    gpu g = gpu_open(0);

    clmoe_checkpoint *checkpoint;
    clmoe_layer_desc desc;
    clmoe_weights weights;
    clmoe_layer *layer;
    check(clmoe_checkpoint_open(argv[1], NULL, &checkpoint));
    check(clmoe_checkpoint_layer(checkpoint, 0, &desc));
    check(clmoe_layer_create(g.context, &desc, &layer));
    check(clmoe_checkpoint_upload(checkpoint, 0, &desc, g.cl, g.queue, &weights));
    printf("%s: %u experts, %u per token, dim %u, hidden %u; engine %s\n",
           clmoe_checkpoint_model_type(checkpoint), desc.num_experts, desc.top_k, desc.dim,
           desc.experts.hidden_dim, clmoe_layer_engine(layer));
    clmoe_checkpoint_close(checkpoint); /* the weights are the program's own */

    clmoe_forward_args args;
    clmoe_forward_args_init(&args);
    args.tokens = (uint32_t)(r.bytes / sizeof(float) / desc.dim);
    args.weights = &weights;
    args.x = buffer(&g, r.bytes, r.x);
    batch_buffers(&g, layer, &args, r.bytes);
    check(clmoe_forward(layer, g.queue, &args, 0, NULL, NULL));

    float *y = allocate(r.bytes);
    read_back(&g, args.y, r.bytes, y, NULL); /* the queue is in order */
    double error = relative_error(y, r.y, r.bytes / sizeof(float));
    printf("%u tokens, relative error %.2e\n", args.tokens, error);
    fail_unless(error < 1e-5, "y differs from the recorded output");

    clmoe_buf *buffers[] = {&args.x, &args.saved, &args.scratch, &args.y};
    for (size_t i = 0; i < sizeof buffers / sizeof buffers[0]; i++)
        buffer_free(buffers[i]);
    free(y);
    recording_free(&r);
    clmoe_weights_release(&weights);
    clmoe_layer_destroy(layer);
    gpu_close(&g);
    return 0;
}
