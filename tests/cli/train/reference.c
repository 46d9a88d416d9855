#include "reference.h"

#include <math.h>
#include <string.h>

enum { D = REF_DIM, H = REF_HIDDEN, E = REF_EXPERTS, K = REF_TOP_K };

static double dot(const double *a, const double *b, int n) {
    double sum = 0;
    for (int i = 0; i < n; i++)
        sum += a[i] * b[i];
    return sum;
}

static void norm(const double *x, const double *gain, double *h) {
    const double rms = sqrt(dot(x, x, D) / D + 1e-5);
    for (int d = 0; d < D; d++)
        h[d] = gain[d] * x[d] / rms;
}

static void softmax(double *l, int n) {
    double most = l[0], sum = 0;
    for (int i = 1; i < n; i++)
        most = fmax(most, l[i]);
    for (int i = 0; i < n; i++)
        sum += l[i] = exp(l[i] - most);
    for (int i = 0; i < n; i++)
        l[i] /= sum;
}

/* y += weight * expert e of h */
static void expert(const ref_model *m, int layer, int e, const double *h, double weight,
                   double *y) {
    const double *gate = m->gate_up[layer] + (size_t)e * 2 * H * D, *up = gate + H * D;
    const double *down = m->down[layer] + (size_t)e * D * H;
    double a[H];
    for (int i = 0; i < H; i++) {
        const double g = dot(gate + i * D, h, D);
        a[i] = g / (1 + exp(-g)) * dot(up + i * D, h, D);
    }
    for (int d = 0; d < D; d++)
        y[d] += weight * dot(down + d * H, a, H);
}

static void moe(const ref_model *m, int layer, const double *h, double *y, ref_balance *balance) {
    double p[E], sum = 0;
    int chosen[K];
    for (int e = 0; e < E; e++)
        p[e] = dot(m->router[layer] + e * D, h, D);
    softmax(p, E);
    for (int k = 0; k < K; k++) {
        chosen[k] = -1;
        for (int e = 0; e < E; e++) {
            int taken = 0;
            for (int j = 0; j < k; j++)
                taken |= chosen[j] == e;
            if (!taken && (chosen[k] < 0 || p[e] > p[chosen[k]]))
                chosen[k] = e;
        }
        sum += p[chosen[k]];
        balance->share[layer][chosen[k]]++;
    }
    for (int e = 0; e < E; e++)
        balance->score[layer][e] += p[e];
    for (int k = 0; k < K; k++)
        expert(m, layer, chosen[k], h, p[chosen[k]] / sum, y);
}

static double token_loss(const ref_model *m, const unsigned char *last, ref_balance *balance) {
    double x[D] = {0}, h[D], l[256];
    for (int j = 0; j < REF_CONTEXT; j++)
        for (int d = 0; d < D; d++)
            x[d] += m->table[(j * 256 + last[-j]) * D + d];
    for (int layer = 0; layer < REF_LAYERS; layer++) {
        norm(x, m->gain[layer], h);
        moe(m, layer, h, x, balance);
    }
    norm(x, m->gain[REF_LAYERS], h);
    for (int b = 0; b < 256; b++)
        l[b] = dot(m->head + b * D, h, D);
    softmax(l, 256);
    return -log(l[last[1]]);
}

double ref_loss(const ref_model *m, const unsigned char *text, const uint32_t *positions,
                uint32_t tokens, ref_balance *balance) {
    double sum = 0;
    memset(balance, 0, sizeof *balance);
    for (uint32_t t = 0; t < tokens; t++)
        sum += token_loss(m, text + positions[t], balance);
    for (int layer = 0; layer < REF_LAYERS; layer++)
        for (int e = 0; e < E; e++) {
            balance->share[layer][e] /= tokens * K;
            balance->score[layer][e] /= tokens;
        }
    return sum / tokens;
}
