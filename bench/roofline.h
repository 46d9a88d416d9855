/* The most a device can do, measured: memory bandwidth and f32 multiply-adds. */
#ifndef BENCH_ROOFLINE_H
#define BENCH_ROOFLINE_H

#include "device.h"

/* Fills read_gbs, copy_gbs (bytes read and written) and fma_gflops; quicker where rows are measured
 * fewer than five times. */
clmoe_status roofline_measure(bench_device *device, uint32_t repeat);

/* The least milliseconds that so many bytes and operations take. */
double roofline_ms(const bench_device *device, double bytes, double flops);

#endif
