// Exact squared distances on the GPU, with the bits of kernels/distances.py.
//
// Every distance is the float64 sum of squared differences, added up over the d coordinates from first to last; products
// and sums are rounded one by one, since a fused multiply-add would give other bits.
//
// Layout    X is [N, d] and XT its transpose, float64; points are int64.
// Launch    listed   THREADS threads, a pair each:                        grid (ceil(n m / THREADS))
//           to_all   THREADS threads, a point each beside ROWS rows:      grid (ceil(N / THREADS), ceil(n / ROWS))
//           ranks    THREADS threads, a warp per ROWS rows:               grid (ceil(N / (THREADS / 32 * ROWS)))
// Order     No atomics; ranks are counts.
// Cost      float64 arithmetic: DADD, DMUL, DADD a pair and coordinate. ranks has 7 instructions more a pair and 32 columns,
//           reads XT once per ROWS rows, from the second-level cache, and adds to a rank once per TILE points.

#define THREADS 128
#define ROWS 4
#define TILE 128
#define INFINITE __longlong_as_double(0x7ff0000000000000LL)

__device__ __forceinline__ double add_square(double sum, double difference) {
    return __dadd_rn(sum, __dmul_rn(difference, difference));
}

// Distances of point j to ROWS points; infinity where it is one of them.
__device__ __forceinline__ void to_rows(const double* XT, long long N, int d, const long long* rows, long long j,
                                        double* sums) {
    for (int r = 0; r < ROWS; r++) sums[r] = 0.0;
    for (int a = 0; a < d; a++) {
        const double* x = XT + a * N;
        const double xj = x[j];
        for (int r = 0; r < ROWS; r++) sums[r] = add_square(sums[r], xj - x[rows[r]]);
    }
    for (int r = 0; r < ROWS; r++)
        if (j == rows[r]) sums[r] = INFINITE;
}

// out[i, c]: point i and point indices[i, c]; infinity for i itself
extern "C" __global__ void __launch_bounds__(THREADS)
listed(const double* __restrict__ X, const long long* __restrict__ indices, double* __restrict__ out, long long pairs, int m,
       int d) {
    const long long pair = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (pair >= pairs) return;
    const long long i = pair / m, j = indices[pair];
    const double *x = X + i * d, *y = X + j * d;
    double sum = 0.0;
    for (int a = 0; a < d; a++) sum = add_square(sum, y[a] - x[a]);
    out[pair] = i == j ? INFINITE : sum;
}

// out[r, j]: point rows[r] and point j, of all N; infinity for itself
extern "C" __global__ void __launch_bounds__(THREADS)
to_all(const double* __restrict__ XT, const long long* __restrict__ rows, double* __restrict__ out, long long n, long long N,
       int d) {
    const long long j = (long long)blockIdx.x * THREADS + threadIdx.x, first = (long long)blockIdx.y * ROWS;
    if (j >= N) return;
    long long own[ROWS];
    double sums[ROWS];
    for (int r = 0; r < ROWS; r++) own[r] = rows[min(first + r, n - 1)];
    to_rows(XT, N, d, own, j, sums);
    for (int r = 0; r < ROWS; r++)
        if (first + r < n) out[(first + r) * N + j] = sums[r];
}

// out[i, c]: 1 and how many points are before point indices[i, c], by distance to i, equally far ones by the product of their
// lots [N] and that of i, signed, of 64 bits; limits [N, m] are from `listed`
extern "C" __global__ void __launch_bounds__(THREADS)
ranks(const double* __restrict__ XT, const long long* __restrict__ lots, const long long* __restrict__ indices,
      const double* __restrict__ limits, long long* __restrict__ out, long long N, int m, int d) {
    __shared__ double tile[THREADS / 32][ROWS][TILE];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const long long row = ((long long)blockIdx.x * (THREADS / 32) + warp) * ROWS;
    long long own[ROWS];
    double sums[ROWS];
    for (int r = 0; r < ROWS; r++) own[r] = min(row + r, N - 1);

    for (long long first = 0; first < N; first += TILE) {
        const int width = (int)min((long long)TILE, N - first);
        for (int j = lane; j < width; j += 32) {
            to_rows(XT, N, d, own, first + j, sums);
            for (int r = 0; r < ROWS; r++) tile[warp][r][j] = sums[r];
        }
        __syncthreads();
        for (int r = 0; r < ROWS && row + r < N; r++)
            for (int c = lane; c < m; c += 32) {
                const long long place = (row + r) * m + c;
                const double limit = limits[place];
                int closer = 0, ties = 0;
                for (int j = 0; j < width; j++) {
                    const double distance = tile[warp][r][j];
                    closer += distance < limit;
                    ties += distance == limit;
                }
                if (ties) {
                    const unsigned long long lot = lots[row + r];
                    const long long product = lot * lots[indices[place]];
                    for (int j = 0; j < width; j++)
                        closer += tile[warp][r][j] == limit && (long long)(lot * lots[first + j]) < product;
                }
                out[place] = (first ? out[place] : 1) + closer;
            }
        __syncthreads();
    }
}
