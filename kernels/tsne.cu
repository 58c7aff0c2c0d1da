// Exact t-SNE on the GPU: repulsion, attraction and update of a batch of embeddings, also of different sizes.
//
// Layout    Point i of embedding b is element start[b] + i of every per-point array (Z, repulsion, attraction,
//           velocity and gains as float2, weight as float); start has one more element than there are embeddings.
//           Row first_row[b] + i of P spans indptr[r] .. indptr[r + 1] of values, in columns indices (points of
//           the same embedding); with DENSE=1 the columns are all points in order and indices is not read.
// Launch    blockIdx.y is the embedding, blockIdx.x its rows, the largest embedding sets the grid:
//           repel    THREADS threads, a warp per ROWS rows:  grid (ceil(N / (THREADS / 32 * ROWS)), B)
//           attract  THREADS threads, a warp per row:        grid (ceil(N / (THREADS / 32)), B)
//           update   UPDATE_THREADS threads, one per point:  grid (ceil(N / UPDATE_THREADS), B)
// Order     No atomics. Lane l of a warp adds the points l, l + 32, ... in turn, then the lanes are added in a fixed
//           tree, so a point's sums depend on nothing but N.
// Cost      repel is bound by instruction issue: with -use_fast_math a pair costs 9 arithmetic instructions (4 FFMA,
//           3 FADD, 1 FMUL, 1 MUFU.RCP) and 0.8 of loop and load, since ROWS points share each zj (counted in the
//           sm_90 code). update adds the N weights in every block: 4 N bytes a block, from the cache.
// Defines   GAUSSIAN=1: similarity exp(-d^2) instead of 1 / (1 + d^2). DENSE=1: see above.

#ifndef GAUSSIAN
#define GAUSSIAN 0
#endif
#ifndef DENSE
#define DENSE 0
#endif
#define THREADS 128
#define UPDATE_THREADS 256
#define ROWS 4  // divides 32: the rows of a warp lie in one tile of 32 points

struct Sums {
    float w, x, y;
};

// Add the similarity w of the points, and w^2 (zi - zj); for a Gaussian w (zi - zj).
__device__ __forceinline__ void add_pair(Sums& sums, float2 zi, float2 zj) {
    float dx = zi.x - zj.x, dy = zi.y - zj.y;
#if GAUSSIAN
    float w = expf(-(dx * dx + dy * dy));
    float force = w;
#else
    float w = 1.0f / (1.0f + dx * dx + dy * dy);
    float force = w * w;
#endif
    sums.w += w;
    sums.x += force * dx;
    sums.y += force * dy;
}

__device__ __forceinline__ float warp_sum(float value) {
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    return value;
}

extern "C" __global__ void __launch_bounds__(THREADS)
repel(const float2* __restrict__ Z, const long long* __restrict__ start, float2* __restrict__ repulsion,
      float* __restrict__ weight) {
    const long long first = start[blockIdx.y];
    const int n = (int)(start[blockIdx.y + 1] - first);
    const int lane = threadIdx.x % 32;
    const int row = (blockIdx.x * (THREADS / 32) + threadIdx.x / 32) * ROWS;
    if (row >= n) return;  // the whole warp
    const float2* z = Z + first;

    float2 zi[ROWS];
    Sums sums[ROWS];
    for (int r = 0; r < ROWS; r++) {
        zi[r] = z[min(row + r, n - 1)];
        sums[r] = {0.0f, 0.0f, 0.0f};
    }
    const int own = row / 32, full = n / 32;  // the tile that holds the rows; tiles without a gap
#pragma unroll 4
    for (int tile = 0; tile < own; tile++) {
        float2 zj = z[tile * 32 + lane];
        for (int r = 0; r < ROWS; r++) add_pair(sums[r], zi[r], zj);
    }
#pragma unroll 4
    for (int tile = own + 1; tile < full; tile++) {
        float2 zj = z[tile * 32 + lane];
        for (int r = 0; r < ROWS; r++) add_pair(sums[r], zi[r], zj);
    }
    // Left out rather than subtracted: the point's own weight of 1 would drown far neighbours.
    int j = own * 32 + lane;
    for (int r = 0; r < ROWS; r++)
        if (j < n && j != row + r) add_pair(sums[r], zi[r], z[j]);
    j = full * 32 + lane;
    if (own != full && j < n)
        for (int r = 0; r < ROWS; r++) add_pair(sums[r], zi[r], z[j]);

    for (int r = 0; r < ROWS; r++) {
        float w = warp_sum(sums[r].w), x = warp_sum(sums[r].x), y = warp_sum(sums[r].y);
        if (lane == 0 && row + r < n) {
            weight[first + row + r] = w;
            repulsion[first + row + r] = make_float2(x, y);
        }
    }
}

// sum_j p_ij w_ij (zi - zj), for a Gaussian sum_j p_ij (zi - zj)
extern "C" __global__ void __launch_bounds__(THREADS)
attract(const float2* __restrict__ Z, const long long* __restrict__ start, const long long* __restrict__ first_row,
        const long long* __restrict__ indptr, const int* __restrict__ indices, const float* __restrict__ values,
        float2* __restrict__ attraction) {
    const long long first = start[blockIdx.y];
    const int n = (int)(start[blockIdx.y + 1] - first);
    const int lane = threadIdx.x % 32;
    const int row = blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (row >= n) return;  // the whole warp
    const float2* z = Z + first;
    const float2 zi = z[row];
    const long long begin = indptr[first_row[blockIdx.y] + row], end = indptr[first_row[blockIdx.y] + row + 1];

    float x = 0.0f, y = 0.0f;
    for (long long e = begin + lane; e < end; e += 32) {
#if DENSE
        float2 zj = z[e - begin];
#else
        float2 zj = z[indices[e]];
#endif
        float dx = zi.x - zj.x, dy = zi.y - zj.y;
#if GAUSSIAN
        float force = values[e];
#else
        float force = values[e] / (1.0f + dx * dx + dy * dy);
#endif
        x += force * dx;
        y += force * dy;
    }
    x = warp_sum(x);
    y = warp_sum(y);
    if (lane == 0) attraction[first + row] = make_float2(x, y);
}

// One coordinate of a step with momentum and gains (van der Maaten & Hinton 2008, section 3.4).
__device__ __forceinline__ void descend(float& z, float& velocity, float& gain, float slope, float rate,
                                        float momentum) {
    gain = fmaxf(slope * velocity < 0.0f ? gain + 0.2f : gain * 0.8f, 0.01f);
    velocity = momentum * velocity - rate * gain * slope;
    z += velocity;
}

// The gradient is 4 (exaggeration * attraction - repulsion / sum of the embedding's weights).
extern "C" __global__ void __launch_bounds__(UPDATE_THREADS)
update(float2* __restrict__ Z, float2* __restrict__ velocity, float2* __restrict__ gains,
       const float2* __restrict__ attraction, const float2* __restrict__ repulsion, const float* __restrict__ weight,
       const long long* __restrict__ start, float exaggeration, float rate, float momentum) {
    __shared__ double partial[UPDATE_THREADS];
    const long long first = start[blockIdx.y];
    const int n = (int)(start[blockIdx.y + 1] - first);
    const int t = threadIdx.x;
    if (blockIdx.x * UPDATE_THREADS >= n) return;  // the whole block

    double total = 0.0;
    for (int j = t; j < n; j += UPDATE_THREADS) total += weight[first + j];
    partial[t] = total;
    for (int half = UPDATE_THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (t < half) partial[t] += partial[t + half];
    }
    __syncthreads();
    const float inverse = partial[0] > 0.0 ? (float)(1.0 / partial[0]) : 0.0f;  // one point alone is not repelled

    const int i = blockIdx.x * UPDATE_THREADS + t;
    if (i >= n) return;
    const float2 pull = attraction[first + i], push = repulsion[first + i];
    float2 z = Z[first + i], v = velocity[first + i], g = gains[first + i];
    descend(z.x, v.x, g.x, 4.0f * (exaggeration * pull.x - inverse * push.x), rate, momentum);
    descend(z.y, v.y, g.y, 4.0f * (exaggeration * pull.y - inverse * push.y), rate, momentum);
    Z[first + i] = z;
    velocity[first + i] = v;
    gains[first + i] = g;
}
