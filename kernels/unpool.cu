// Max-pooling that records which pixel won, and its adjoint: unpooling with switches (Zeiler & Fergus 2014).
//
// Layout    Maps are [B, C, height, width] in memory order. A switch is the number ky * KW + kx of the winning pixel in
//           its window, in one byte if the window has at most 256 pixels (CODE_BYTES=1), else in four.
// Windows   unpool works on a rectangle of each signal. origin[b] = {map, pooled y, pooled x, y, x}: signal b has the
//           switches of `map`, its first element is the window (pooled y, pooled x), and its output begins at pixel
//           (y, x). Elements outside the pooled map are not read; pixels outside the map are 0.
// Launch    max_pool  THREADS threads, one per window:  grid (ceil(h * w / THREADS), planes)
//           unpool    THREADS threads, one per pixel:   grid (ceil(out_h * out_w / THREADS), B, ceil(C / CHANNELS))
//           Both walk on in steps of gridDim.y where that is smaller than what it stands for.
// Order     unpool gathers: a pixel adds, row by row, the windows that chose it. No atomics, so the same bits each time.
// Cost      Both are bound by memory: unpool reads the signal and the switches and writes the output once. It finds
//           the windows that reach its pixel without a list of them, so that large ones need no local memory, and asks
//           for switches and signal of TOGETHER channels before it looks at the first; what another pixel won is read
//           for nothing, but comes from the cache. In the sm_90 code a window takes 10 instructions a channel and a
//           pixel 12 more: 22 for 2 x 2, stride 2, and 43 for 3 x 3, stride 2, where a warp goes through 3 windows.
// Defines   KH KW SH SW PH PW DH DW: kernel, stride, padding, dilation. TYPE: 0 float, 1 half, 2 bfloat16, 3 double; sums
//           of half precision are float. RECTIFY=1: negative outputs are 0. Without them: 3 x 3, stride 2, float.

#ifndef TYPE
#define TYPE 0
#endif
#ifndef CODE_BYTES
#define CODE_BYTES 1
#endif
#ifndef RECTIFY
#define RECTIFY 0
#endif
#ifndef KH
#define KH 3
#define KW 3
#define SH 2
#define SW 2
#define PH 0
#define PW 0
#define DH 1
#define DW 1
#endif
#define THREADS 256
#define CHANNELS 16  // of one thread
#define TOGETHER 8   // of them at once

#if CODE_BYTES == 1
typedef unsigned char code_t;
#else
typedef int code_t;
#endif

#if TYPE == 3
typedef double element;
typedef double real;
__device__ __forceinline__ real widen(element value) { return value; }
__device__ __forceinline__ void store(element* at, real value) { *at = value; }
#elif TYPE == 0
typedef float element;
typedef float real;
__device__ __forceinline__ real widen(element value) { return value; }
__device__ __forceinline__ void store(element* at, real value) { *at = value; }
#else
typedef unsigned short element;
typedef float real;
union Bits {
    float value;
    unsigned bits;
};

__device__ __forceinline__ real widen(element value) {
    Bits result;
#if TYPE == 2
    result.bits = (unsigned)value << 16;
#else
    const unsigned half = value, magnitude = half & 0x7fffu;
    result.bits = magnitude << 13;
    result.value *= 5.192296858534828e33f;  // 2^112, from a bias of 15 to one of 127; subnormal numbers as well
    if (magnitude >= 0x7c00u) result.bits = 0x7f800000u | magnitude << 13;  // infinity, NaN
    result.bits |= (half & 0x8000u) << 16;
#endif
    return result.value;
}

// Rounds to nearest, ties to even.
__device__ __forceinline__ void store(element* at, real value) {
    Bits given;
    given.value = value;
#if TYPE == 2
    const unsigned rounded = given.bits + 0x7fffu + (given.bits >> 16 & 1u);
    *at = value != value ? 0x7fc0u : rounded >> 16;
#else
    const unsigned sign = given.bits >> 16 & 0x8000u, magnitude = given.bits & 0x7fffffffu;
    unsigned half;
    if (magnitude > 0x7f800000u) half = 0x7e00u;         // NaN
    else if (magnitude >= 0x477ff000u) half = 0x7c00u;   // 65520 and above round to infinity
    else if (magnitude < 0x38800000u) {                  // subnormal: adding 0.5 rounds to a multiple of 2^-24
        Bits shifted;
        shifted.bits = magnitude;
        shifted.value += 0.5f;
        half = shifted.bits - 0x3f000000u;
    } else half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    *at = sign | half;
#endif
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS)
max_pool(const element* __restrict__ maps, element* __restrict__ pooled, code_t* __restrict__ switches, int planes,
         int map_h, int map_w, int h, int w) {
    const int place = blockIdx.x * THREADS + threadIdx.x;
    if (place >= h * w) return;
    const int y = place / w * SH - PH, x = place % w * SW - PW;
    for (int plane = blockIdx.y; plane < planes; plane += gridDim.y) {
        const element* from = maps + (long long)plane * map_h * map_w;
        int winner = -1;
        real best = 0;
        for (int ky = 0; ky < KH; ky++)
            for (int kx = 0; kx < KW; kx++) {
                const int row = y + ky * DH, column = x + kx * DW;
                if (row < 0 || row >= map_h || column < 0 || column >= map_w) continue;
                const real value = widen(from[row * map_w + column]);
                if (winner < 0 || value > best || value != value) {  // the first of equal pixels; NaN stays
                    best = value;
                    winner = ky * KW + kx;
                }
            }
        if (winner < 0) {  // dilated over the whole map: no pixel, which unpooling respects
            best = -1 / (real)0;  // NVRTC knows no INFINITY
            winner = 0;
        }
        store(pooled + (long long)plane * h * w + place, best);
        switches[(long long)plane * h * w + place] = (code_t)winner;
    }
}

// The windows that reach the pixel (y, x) of a map, and where the signal's rectangle of them begins.
struct Reach {
    int y, x, top, left, first_row, last_row, first_column, last_column;
};

// Unpool one pixel in TOGETHER channels, which are `*_step` elements apart; if not FULL in the `count` that there are:
// a channel beyond the last is worked on as the last one and not stored.
template <bool FULL>
__device__ __forceinline__ void unpool_pixel(const Reach& reach, const element* signal, const code_t* switches,
                                             element* out, int count, int w, int pooled_w, long long signal_step,
                                             long long switch_step, long long out_step) {
    real sums[TOGETHER];
#pragma unroll
    for (int c = 0; c < TOGETHER; c++) sums[c] = 0;
#pragma unroll 1
    for (int row = reach.first_row; row <= reach.last_row; row++)
#pragma unroll 1
        for (int column = reach.first_column; column <= reach.last_column; column++) {
            const int down = reach.y + PH - row * SH, across = reach.x + PW - column * SW;  // of the window's corner
            if (down % DH != 0 || across % DW != 0) continue;
            const int code = down / DH * KW + across / DW;
            const element* from = signal + ((row - reach.top) * w + column - reach.left);
            const code_t* winner = switches + (row * pooled_w + column);
            element values[TOGETHER];
            code_t codes[TOGETHER];
#pragma unroll
            for (int c = 0; c < TOGETHER; c++) {
                values[c] = *from, codes[c] = *winner;
                if (FULL || c + 1 < count) from += signal_step, winner += switch_step;
            }
#pragma unroll
            for (int c = 0; c < TOGETHER; c++)
                if (codes[c] == code) sums[c] += widen(values[c]);
        }
#pragma unroll
    for (int c = 0; c < TOGETHER; c++) {
        if (!FULL && c >= count) break;
#if RECTIFY
        if (sums[c] < 0) sums[c] = 0;
#endif
        store(out, sums[c]);
        out += out_step;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
unpool(const element* __restrict__ signal, const code_t* __restrict__ switches, const int* __restrict__ origin,
       element* __restrict__ out, int signals, int channels, int h, int w, int pooled_h, int pooled_w, int map_h,
       int map_w, int out_h, int out_w) {
    const int pixel = blockIdx.x * THREADS + threadIdx.x;
    if (pixel >= out_h * out_w) return;
    const int begin = blockIdx.z * CHANNELS, count = min(CHANNELS, channels - begin);
    const long long signal_step = (long long)h * w, switch_step = (long long)pooled_h * pooled_w;
    const long long out_step = (long long)out_h * out_w;
    for (int b = blockIdx.y; b < signals; b += gridDim.y) {
        const int* at = origin + 5 * b;
        const int y = at[3] + pixel / out_w, x = at[4] + pixel % out_w, top = at[1], left = at[2];
        Reach reach = {y, x, top, left,
                       max((y + PH - DH * (KH - 1) + SH - 1) / SH, max(top, 0)),
                       min((y + PH) / SH, min(top + h, pooled_h) - 1),
                       max((x + PW - DW * (KW - 1) + SW - 1) / SW, max(left, 0)),
                       min((x + PW) / SW, min(left + w, pooled_w) - 1)};
        if (y < 0 || y >= map_h || x < 0 || x >= map_w) reach.last_row = reach.first_row - 1;  // outside of the map
        const element* from = signal + ((long long)b * channels + begin) * signal_step;
        const code_t* winners = switches + ((long long)at[0] * channels + begin) * switch_step;
        element* to = out + ((long long)b * channels + begin) * out_step + pixel;
        for (int c = 0; c < count; c += TOGETHER) {
            const int rest = count - c;
            if (rest >= TOGETHER)
                unpool_pixel<true>(reach, from, winners, to, rest, w, pooled_w, signal_step, switch_step, out_step);
            else
                unpool_pixel<false>(reach, from, winners, to, rest, w, pooled_w, signal_step, switch_step, out_step);
            from += TOGETHER * signal_step, winners += TOGETHER * switch_step, to += TOGETHER * out_step;
        }
    }
}
