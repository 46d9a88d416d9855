#include "force.h"
#include "options.h"
#include "sources.h"

#include <stdio.h>
#include <string.h>

enum { MOST_SOURCES = 4 };

bool force_parse(const char *option, const char *text, forced_routing *forced, problem *why) {
    const char *colon = strchr(text, ':');
    if (strcmp(text, "round-robin") == 0) {
        forced->kind = FORCE_ROUND_ROBIN;
        return true;
    }
    if (strcmp(text, "zipf") != 0 && strncmp(text, "zipf:", 5) != 0)
        return problem_set(why, "%s is '%.40s', but must be round-robin or zipf[:EXPONENT]", option,
                           text);
    forced->kind = FORCE_ZIPF;
    forced->exponent = 1.0;
    if (colon == NULL)
        return true;
    if (!cli_is_real(colon + 1, &forced->exponent) || forced->exponent > FORCE_MOST_EXPONENT)
        return problem_set(why, "%s is '%.40s', whose exponent is not a number from 0 to %g",
                           option, text, FORCE_MOST_EXPONENT);
    return true;
}

void force_text(const forced_routing *forced, char *text, size_t size) {
    if (forced->kind == FORCE_ROUND_ROBIN)
        snprintf(text, size, "round-robin, seed %u", (unsigned)forced->seed);
    else
        snprintf(text, size, "zipf:%g, seed %u", forced->exponent, (unsigned)forced->seed);
}

/* The queue's context and device. */
static clmoe_status build(cl_command_queue queue, cl_program *program) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_context context = NULL;
    cl_device_id device = NULL;
    cl_int code = CL_SUCCESS;
    const char *texts[MOST_SOURCES];
    cl_uint count = 0;
    for (; count < MOST_SOURCES && force_sources[count].name != NULL; count++)
        texts[count] = force_sources[count].text;
    TRY(CL(clGetCommandQueueInfo(queue, CL_QUEUE_CONTEXT, sizeof(cl_context), (void *)&context,
                                 NULL)));
    TRY(CL(clGetCommandQueueInfo(queue, CL_QUEUE_DEVICE, sizeof(cl_device_id), (void *)&device,
                                 NULL)));
    *program = clCreateProgramWithSource(context, count, texts, NULL, &code);
    TRY(cli_cl(code, "clCreateProgramWithSource"));
    TRY(CL(clBuildProgram(*program, 1, &device, "-cl-std=CL1.2", NULL, NULL)));
done:
    return status;
}

static clmoe_status set_arguments(cl_kernel kernel, const forced_routing *forced,
                                  const forced_batch *batch) {
    clmoe_status status = CLMOE_SUCCESS;
    const cl_float exponent = (cl_float)forced->exponent;
    const cl_uint seed =
        forced->kind == FORCE_ZIPF ? forced->seed : forced->seed % batch->experts; /* the first */
    TRY(CL(clSetKernelArg(kernel, 0, sizeof batch->ids, &batch->ids)));
    TRY(CL(clSetKernelArg(kernel, 1, sizeof batch->pair_weights, &batch->pair_weights)));
    TRY(CL(clSetKernelArg(kernel, 2, sizeof(cl_uint), &batch->top_k)));
    TRY(CL(clSetKernelArg(kernel, 3, sizeof(cl_uint), &batch->experts)));
    TRY(CL(clSetKernelArg(kernel, 4, sizeof seed, &seed)));
    if (forced->kind == FORCE_ZIPF)
        TRY(CL(clSetKernelArg(kernel, 5, sizeof exponent, &exponent)));
done:
    return status;
}

clmoe_status force_fill(const forced_routing *forced, cl_command_queue queue,
                        const forced_batch *batch) {
    clmoe_status status = CLMOE_SUCCESS;
    const bool zipf = forced->kind == FORCE_ZIPF;
    const size_t items = (size_t)batch->tokens * (zipf ? 1 : batch->top_k);
    cl_program program = NULL;
    cl_kernel kernel = NULL;
    cl_int code = CL_SUCCESS;
    if (batch->top_k > batch->experts)
        return cli_fail(CLMOE_UNSUPPORTED, "%u of %u different experts cannot be forced",
                        (unsigned)batch->top_k, (unsigned)batch->experts);
    if (items == 0)
        return CLMOE_SUCCESS;
    TRY(build(queue, &program));
    kernel = clCreateKernel(program, zipf ? "force_zipf" : "force_round_robin", &code);
    TRY(cli_cl(code, "clCreateKernel"));
    TRY(set_arguments(kernel, forced, batch));
    TRY(CL(clEnqueueNDRangeKernel(queue, kernel, 1, NULL, &items, NULL, 0, NULL, NULL)));
    TRY(CL(clFinish(queue)));
done:
    if (kernel != NULL)
        clReleaseKernel(kernel);
    if (program != NULL)
        clReleaseProgram(program);
    return status;
}
