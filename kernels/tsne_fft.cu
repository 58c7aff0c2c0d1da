// t-SNE on the GPU with the repulsion on a grid: what is not a Fourier transform, of a batch of embeddings.
//
// Method    As kernels/tsne_fft.py: points are charges of 1 that B-splines of order 6 spread to the nodes of a grid, the
//           convolution with the similarity, less its value far away, gives the potential at the nodes, and the same
//           splines bring it and its gradient back to the points, without what a point's charge adds to its own.
// Layout    Points as for tsne.cu. Embedding b has the grid grids[b], whose nodes, row after row, are elements
//           grids[b].nodes + row * nx + column of charges and potential; a grid with ny = 0 is none, and its embedding's
//           repulsion and weight come from tsne.cu.
// Launch    blockIdx.y is the embedding where there is a batch:
//           spread, gather   THREADS threads, GROUP lanes per point:  grid (ceil(N / (THREADS / GROUP)), B)
//           twist, untwist   THREADS threads, one per node:           grid (ceil(ny nx / THREADS))
//           settle           THREADS threads:                         grid (1, B)
//           update           THREADS threads, one per point:          grid (ceil(N / THREADS), B)
// Order     A node's charge is the sum of integers, 2^-40 each: integer sums have no order, so spread may add them as
//           they come and its bits depend on the points alone; no sort is needed. A node holds up to 2^23 charges,
//           27,700,000 points at one place, of which it has 0.55^2 each.
//           All else is summed in the order of tsne.cu.
// Halting   An iteration that a grid cannot do is not done: settle ends an embedding's turns where a point has left its
//           grid, where similarities are too small for float32 transforms, or where all its turns are done. The host
//           looks only after all.
// Cost      spread: 36 additions of 8 bytes a point, six neighbours in one request; gather: 36 floats a point;
//           twist 32 and untwist 20 bytes a node; settle reads 4 N bytes in one block.

#define THREADS 256
#define GROUP 8  // lanes of a point: one for each column that it reaches, and two idle
#define ORDER 6
#define UNIT 0x1p-40f
#define SPARSE 0.02  // mean similarity to all others below which float32 transforms do not resolve it

struct Grid {  // as engines/fft_cuda.py packs it
    double left_out;               // of the sum of all similarities, by the grid's kernel
    long long nodes;               // the first
    float x, y, scale, factor;     // origin, cells in a unit of length, repulsion over the potential's slope
    int ny, nx, turns, padding;    // turns: iterations to do
    float core[ORDER * GROUP];     // the kernel between a point's nodes
};

struct State {
    int halted, outside, sparse, done;
};

// Tables of polynomials, float [rows][GROUP], the highest power first: of a lane's weight in t, its derivative, and, in
// t^2, the autocorrelation and its derivative over t.
#define WEIGHT 0
#define SLOPE 6
#define AUTO 11
#define AUTO_SLOPE 17
#define TERMS 22

__device__ __forceinline__ float polynomial(const float* table, int from, int to, int lane, float t) {
    float value = table[from * GROUP + lane];
    for (int k = from + 1; k < to; k++) value = fmaf(value, t, table[k * GROUP + lane]);
    return value;
}

struct Place {
    int row, column;
    float tx, ty;  // in the cell, from -1/2 on
};

__device__ __forceinline__ Place place_of(float2 z, const Grid& grid) {
    const float x = (z.x - grid.x) * grid.scale, y = (z.y - grid.y) * grid.scale;
    const int row = (int)y, column = (int)x;
    return {row, column, x - (float)column - 0.5f, y - (float)row - 0.5f};
}

__device__ __forceinline__ bool has_turn(const Grid& grid, const State& state) {
    return grid.ny > 0 && !state.halted && !state.outside;
}

extern "C" __global__ void __launch_bounds__(THREADS)
spread(const float2* __restrict__ Z, const long long* __restrict__ start, const Grid* __restrict__ grids,
       const State* __restrict__ states, const float* __restrict__ table, unsigned long long* __restrict__ charges) {
    const Grid& grid = grids[blockIdx.y];
    const long long first = start[blockIdx.y];
    const int n = (int)(start[blockIdx.y + 1] - first), block = blockIdx.x * (THREADS / GROUP);
    if (block >= n || !has_turn(grid, states[blockIdx.y])) return;  // the whole block
    const int lane = threadIdx.x % GROUP, group = threadIdx.x % 32 - lane, i = block + threadIdx.x / GROUP;
    const Place place = place_of(Z[first + min(i, n - 1)], grid);
    const float wx = polynomial(table, WEIGHT, SLOPE, lane, place.tx);
    const float wy = polynomial(table, WEIGHT, SLOPE, lane, place.ty);
    float weights[ORDER];
    for (int row = 0; row < ORDER; row++) weights[row] = wx * __shfl_sync(0xffffffffu, wy, group + row);
    if (i >= n || lane >= ORDER) return;
    unsigned long long* node = charges + grid.nodes + (long long)place.row * grid.nx + place.column + lane;
    for (int row = 0; row < ORDER; row++)
        atomicAdd(node + (long long)row * grid.nx, (unsigned long long)(long long)(weights[row] * (1.0f / UNIT)));
}

// The charges for transforms at the shifted frequencies (k_y + 1/4) / ny and k_x / nx, or (k_x + 1/2) / nx, as
// kernels/fft.py has them, complex [2][ny][nx]; the charges are set to 0. angles: cos and sin [ny], then [nx].
extern "C" __global__ void __launch_bounds__(THREADS)
twist(unsigned long long* __restrict__ charges, const float2* __restrict__ angles, float2* __restrict__ twisted,
      long long first, unsigned ny, unsigned nx) {
    const unsigned node = blockIdx.x * THREADS + threadIdx.x, nodes = ny * nx;
    if (node >= nodes) return;
    const float value = (float)(long long)charges[first + node] * UNIT;
    charges[first + node] = 0;
    const float2 y = angles[node / nx], x = angles[ny + node % nx];
    const float2 even = make_float2(value * y.x, value * y.y);
    twisted[node] = even;
    twisted[nodes + node] = make_float2(even.x * x.x - even.y * x.y, even.x * x.y + even.y * x.x);
}

// The potential, from the transforms back.
extern "C" __global__ void __launch_bounds__(THREADS)
untwist(const float2* __restrict__ twisted, const float2* __restrict__ angles, float* __restrict__ potential,
        long long first, unsigned ny, unsigned nx) {
    const unsigned node = blockIdx.x * THREADS + threadIdx.x, nodes = ny * nx;
    if (node >= nodes) return;
    const float2 y = angles[node / nx], x = angles[ny + node % nx];
    const float2 even = twisted[node], odd = twisted[nodes + node];
    const float re = even.x + (odd.x * x.x + odd.y * x.y), im = even.y + (odd.y * x.x - odd.x * x.y);
    potential[first + node] = re * y.x + im * y.y;
}

__device__ __forceinline__ float group_sum(float value) {
    for (int offset = GROUP / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    return value;
}

// Repulsion, and as weight the potential.
extern "C" __global__ void __launch_bounds__(THREADS)
gather(const float2* __restrict__ Z, const long long* __restrict__ start, const Grid* __restrict__ grids,
       const State* __restrict__ states, const float* __restrict__ table, const float* __restrict__ potential,
       float2* __restrict__ repulsion, float* __restrict__ weight) {
    const Grid& grid = grids[blockIdx.y];
    const long long first = start[blockIdx.y];
    const int n = (int)(start[blockIdx.y + 1] - first), block = blockIdx.x * (THREADS / GROUP);
    if (block >= n || !has_turn(grid, states[blockIdx.y])) return;  // the whole block
    const int lane = threadIdx.x % GROUP, group = threadIdx.x % 32 - lane, i = block + threadIdx.x / GROUP;
    const Place place = place_of(Z[first + min(i, n - 1)], grid);
    const float wx = polynomial(table, WEIGHT, SLOPE, lane, place.tx);
    const float wy = polynomial(table, WEIGHT, SLOPE, lane, place.ty);
    const float dx = polynomial(table, SLOPE, AUTO, lane, place.tx);
    const float dy = polynomial(table, SLOPE, AUTO, lane, place.ty);
    // The derivative of the potential moves one of the two points only: half of the autocorrelation's.
    const float xx = place.tx * place.tx, yy = place.ty * place.ty;
    const float ax = polynomial(table, AUTO, AUTO_SLOPE, lane, xx), ay = polynomial(table, AUTO, AUTO_SLOPE, lane, yy);
    const float bx = 0.5f * place.tx * polynomial(table, AUTO_SLOPE, TERMS, lane, xx);
    const float by = 0.5f * place.ty * polynomial(table, AUTO_SLOPE, TERMS, lane, yy);

    const float* node = potential + grid.nodes + (long long)place.row * grid.nx + place.column + lane;
    float plain = 0.0f, sloped = 0.0f, own = 0.0f, own_sloped = 0.0f;
    for (int row = 0; row < ORDER; row++) {
        const float value = lane < ORDER ? node[(long long)row * grid.nx] : 0.0f, core = grid.core[row * GROUP + lane];
        plain = fmaf(__shfl_sync(0xffffffffu, wy, group + row), value, plain);
        sloped = fmaf(__shfl_sync(0xffffffffu, dy, group + row), value, sloped);
        own = fmaf(__shfl_sync(0xffffffffu, ay, group + row), core, own);
        own_sloped = fmaf(__shfl_sync(0xffffffffu, by, group + row), core, own_sloped);
    }
    const float sum = group_sum(wx * plain - ax * own);
    const float x = group_sum(dx * plain - bx * own), y = group_sum(wx * sloped - ax * own_sloped);
    if (lane == 0 && i < n) {
        weight[first + i] = sum;
        repulsion[first + i] = make_float2(grid.factor * x, grid.factor * y);
    }
}

// Whether an embedding does an iteration, and over what its repulsion is divided.
extern "C" __global__ void __launch_bounds__(THREADS)
settle(const long long* __restrict__ start, const Grid* __restrict__ grids, const float* __restrict__ weight,
       State* __restrict__ states, float* __restrict__ inverse) {
    __shared__ double partial[THREADS];
    const long long first = start[blockIdx.y];
    const int n = (int)(start[blockIdx.y + 1] - first), t = threadIdx.x;
    double total = 0.0;
    for (int j = t; j < n; j += THREADS) total += weight[first + j];
    partial[t] = total;
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (t < half) partial[t] += partial[t + half];
    }
    if (t > 0) return;
    const Grid& grid = grids[blockIdx.y];
    State& state = states[blockIdx.y];
    bool goes = !state.halted && !state.outside && state.done < grid.turns;
    if (goes && grid.ny > 0) {
        partial[0] += grid.left_out;
        state.sparse = !(partial[0] >= SPARSE * n);
        goes = !state.sparse;
    }
    state.halted = !goes;
    state.done += goes;
    inverse[blockIdx.y] = partial[0] > 0.0 ? (float)(1.0 / partial[0]) : 0.0f;
}

// One coordinate of a step with momentum and gains (van der Maaten & Hinton 2008, section 3.4).
__device__ __forceinline__ void descend(float& z, float& velocity, float& gain, float slope, float rate,
                                        float momentum) {
    gain = fmaxf(slope * velocity < 0.0f ? gain + 0.2f : gain * 0.8f, 0.01f);
    velocity = momentum * velocity - rate * gain * slope;
    z += velocity;
}

extern "C" __global__ void __launch_bounds__(THREADS)
update(float2* __restrict__ Z, float2* __restrict__ velocity, float2* __restrict__ gains,
       const float2* __restrict__ attraction, const float2* __restrict__ repulsion, const float* __restrict__ inverse,
       const long long* __restrict__ start, const Grid* __restrict__ grids, State* __restrict__ states,
       float exaggeration, float rate, float momentum) {
    const Grid& grid = grids[blockIdx.y];
    const long long first = start[blockIdx.y];
    const int n = (int)(start[blockIdx.y + 1] - first), i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= n || states[blockIdx.y].halted) return;
    const float2 pull = attraction[first + i], push = repulsion[first + i];
    const float over = inverse[blockIdx.y];
    float2 z = Z[first + i], v = velocity[first + i], g = gains[first + i];
    descend(z.x, v.x, g.x, 4.0f * (exaggeration * pull.x - over * push.x), rate, momentum);
    descend(z.y, v.y, g.y, 4.0f * (exaggeration * pull.y - over * push.y), rate, momentum);
    Z[first + i] = z;
    velocity[first + i] = v;
    gains[first + i] = g;
    const float x = (z.x - grid.x) * grid.scale, y = (z.y - grid.y) * grid.scale;
    const float right = grid.nx - ORDER + 0.5f, top = grid.ny - ORDER + 0.5f;
    if (grid.ny > 0 && !(x >= 0.0f && x < right && y >= 0.0f && y < top)) states[blockIdx.y].outside = 1;
}
