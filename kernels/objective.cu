// What t-SNE's similarities add up to on the GPU, for the KL divergence, in float64.
//
// Layout    x and y are the coordinates of n points, sum has an element for each.
// Launch    THREADS threads, a warp per ROWS points: grid (ceil(n / (THREADS / 32 * ROWS)))
// Order     No atomics. Lane l of a warp adds the points l, l + 32, ... in turn, then the lanes are added in a fixed tree.
// Cost      bound by issue: a pair takes 11 float64 instructions (6 DFMA, 4 DADD, 1 DMUL, most of them the division) and 16
//           others, counted in the sm_90 code. 16 bytes are read for ROWS pairs, from the caches.
// Defines   GAUSSIAN=1: similarity exp(-d^2) instead of 1 / (1 + d^2).

#ifndef GAUSSIAN
#define GAUSSIAN 0
#endif
#define THREADS 128
#define ROWS 8

__device__ __forceinline__ double squared(double dx, double dy) { return dx * dx + dy * dy; }

// The sum of the similarity to all other points; for a Gaussian its logarithm, since far points underflow.
extern "C" __global__ void __launch_bounds__(THREADS)
similarities(const double* __restrict__ x, const double* __restrict__ y, double* __restrict__ sum, int n) {
    const int lane = threadIdx.x % 32;
    const int row = (blockIdx.x * (THREADS / 32) + threadIdx.x / 32) * ROWS;
    if (row >= n) return;  // the whole warp

    double xi[ROWS], yi[ROWS], nearest[ROWS], total[ROWS];
    for (int r = 0; r < ROWS; r++) {
        xi[r] = x[min(row + r, n - 1)];
        yi[r] = y[min(row + r, n - 1)];
        nearest[r] = 1e300;  // no map is so wide
        total[r] = 0.0;
    }
#if GAUSSIAN
    for (int j = lane; j < n; j += 32)
        for (int r = 0; r < ROWS; r++)
            if (j != row + r) nearest[r] = fmin(nearest[r], squared(xi[r] - x[j], yi[r] - y[j]));
    for (int r = 0; r < ROWS; r++)
        for (int offset = 16; offset > 0; offset /= 2)
            nearest[r] = fmin(nearest[r], __shfl_xor_sync(0xffffffffu, nearest[r], offset));
#endif
    for (int j = lane; j < n; j += 32) {
        const double xj = x[j], yj = y[j];
        for (int r = 0; r < ROWS; r++) {
            const double d = squared(xi[r] - xj, yi[r] - yj);
            const double w = GAUSSIAN ? exp(nearest[r] - d) : 1.0 / (1.0 + d);
            if (j != row + r) total[r] += w;
        }
    }
    for (int r = 0; r < ROWS; r++) {
        for (int offset = 16; offset > 0; offset /= 2) total[r] += __shfl_xor_sync(0xffffffffu, total[r], offset);
        if (lane == 0 && row + r < n) sum[row + r] = GAUSSIAN ? log(total[r]) - nearest[r] : total[r];
    }
}
