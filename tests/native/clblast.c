/*
 * CLBlast's one call that the engine makes, on the host, for a device that cannot run CLBlast's own
 * kernels. Preloaded, so that it is found before the library.
 */
#include <clblast_c.h>
#include <stdlib.h>

/* A whole buffer of floats on the host; NULL on any failure. */
static float *read_floats(cl_command_queue queue, cl_mem buffer, size_t *bytes) {
    if (clGetMemObjectInfo(buffer, CL_MEM_SIZE, sizeof *bytes, bytes, NULL) != CL_SUCCESS)
        return NULL;
    float *floats = malloc(*bytes);
    if (floats &&
        clEnqueueReadBuffer(queue, buffer, CL_TRUE, 0, *bytes, floats, 0, NULL, NULL) == CL_SUCCESS)
        return floats;
    free(floats);
    return NULL;
}

/* Row-major C = A B, or that added to C; A or B may be transposed. */
CLBlastStatusCode CLBlastSgemm(const CLBlastLayout layout, const CLBlastTranspose a_transpose,
                               const CLBlastTranspose b_transpose, const size_t m, const size_t n,
                               const size_t k, const float alpha, const cl_mem a_buffer,
                               const size_t a_offset, const size_t a_ld, const cl_mem b_buffer,
                               const size_t b_offset, const size_t b_ld, const float beta,
                               cl_mem c_buffer, const size_t c_offset, const size_t c_ld,
                               cl_command_queue *queue, cl_event *event) {
    CLBlastStatusCode code = CLBlastOpenCLOutOfResources;
    size_t bytes = 0;
    (void)event;
    if (layout != CLBlastLayoutRowMajor || alpha != 1.0f || (beta != 0.0f && beta != 1.0f))
        return CLBlastNotImplemented;
    /* Where no kernel runs, the sizes that were read back mean nothing. */
    if (!getenv("CLMOE_NATIVE_RUN"))
        return clFlush(*queue) == CL_SUCCESS ? CLBlastSuccess : CLBlastOpenCLOutOfResources;
    float *a = read_floats(*queue, a_buffer, &bytes), *b = read_floats(*queue, b_buffer, &bytes);
    float *c = read_floats(*queue, c_buffer, &bytes);
    const size_t a_row = a_transpose == CLBlastTransposeNo ? a_ld : 1;
    const size_t a_column = a_transpose == CLBlastTransposeNo ? 1 : a_ld;
    const size_t row = b_transpose == CLBlastTransposeNo ? 1 : b_ld;
    const size_t column = b_transpose == CLBlastTransposeNo ? b_ld : 1;
    for (size_t i = 0; a && b && c && i < m; i++)
        for (size_t j = 0; j < n; j++) {
            float sum = 0.0f, *to = &c[c_offset + i * c_ld + j];
            for (size_t p = 0; p < k; p++)
                sum += a[a_offset + i * a_row + p * a_column] * b[b_offset + j * row + p * column];
            *to = beta != 0.0f ? *to + sum : sum;
        }
    if (a && b && c &&
        clEnqueueWriteBuffer(*queue, c_buffer, CL_TRUE, 0, bytes, c, 0, NULL, NULL) == CL_SUCCESS)
        code = CLBlastSuccess;
    free(a);
    free(b);
    free(c);
    return code;
}
