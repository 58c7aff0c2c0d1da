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
// Cost      Both are bound by memory: unpool reads the signal and the switches and writes the output once. The windows
//           that reach a pixel are the same in every channel; a thread finds them once for CHANNELS of them, after
//           which a pixel takes a compare, a load where it won, and a store.
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
#define CHANNELS 16
#define ROWS (DH * (KH - 1) / SH + 1)  // windows that can reach a pixel
#define COLUMNS (DW * (KW - 1) / SW + 1)
#if ROWS * COLUMNS <= 64
#define UNROLL _Pragma("unroll")
#else
#define UNROLL
#endif

#if CODE_BYTES == 1
typedef unsigned char code_t;
#else
typedef int code_t;
#endif

#if TYPE == 3
typedef double element;
typedef double real;
__device__ __forceinline__ real load(const element* at) { return *at; }
__device__ __forceinline__ void store(element* at, real value) { *at = value; }
#elif TYPE == 0
typedef float element;
typedef float real;
__device__ __forceinline__ real load(const element* at) { return *at; }
__device__ __forceinline__ void store(element* at, real value) { *at = value; }
#else
typedef unsigned short element;
typedef float real;
union Bits {
    float value;
    unsigned bits;
};

__device__ __forceinline__ real load(const element* at) {
    Bits result;
#if TYPE == 2
    result.bits = (unsigned)*at << 16;
#else
    const unsigned half = *at, magnitude = half & 0x7fffu;
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
                const real value = load(from + row * map_w + column);
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

extern "C" __global__ void __launch_bounds__(THREADS)
unpool(const element* __restrict__ signal, const code_t* __restrict__ switches, const int* __restrict__ origin,
       element* __restrict__ out, int signals, int channels, int h, int w, int pooled_h, int pooled_w, int map_h,
       int map_w, int out_h, int out_w) {
    const int pixel = blockIdx.x * THREADS + threadIdx.x;
    if (pixel >= out_h * out_w) return;
    const int begin = blockIdx.z * CHANNELS, end = min(begin + CHANNELS, channels);
    for (int b = blockIdx.y; b < signals; b += gridDim.y) {
        const int* at = origin + 5 * b;
        const int y = at[3] + pixel / out_w, x = at[4] + pixel % out_w;
        const bool inside = y >= 0 && y < map_h && x >= 0 && x < map_w;
        int wanted[ROWS * COLUMNS], in_signal[ROWS * COLUMNS], in_pooled[ROWS * COLUMNS];
        UNROLL
        for (int n = 0; n < ROWS * COLUMNS; n++) {
            const int row = (y + PH) / SH - (ROWS - 1) + n / COLUMNS;
            const int column = (x + PW) / SW - (COLUMNS - 1) + n % COLUMNS;
            const int ky = y + PH - row * SH, kx = x + PW - column * SW;  // times the dilation
            const bool reaches = inside && row >= max(at[1], 0) && row < min(at[1] + h, pooled_h) &&
                                 column >= max(at[2], 0) && column < min(at[2] + w, pooled_w) && ky % DH == 0 &&
                                 kx % DW == 0 && ky <= DH * (KH - 1) && kx <= DW * (KW - 1);
            wanted[n] = reaches ? ky / DH * KW + kx / DW : -1;
            in_signal[n] = reaches ? (row - at[1]) * w + column - at[2] : 0;
            in_pooled[n] = reaches ? row * pooled_w + column : 0;
        }
        for (int c = begin; c < end; c++) {
            const element* values = signal + ((long long)b * channels + c) * h * w;
            const code_t* codes = switches + ((long long)at[0] * channels + c) * pooled_h * pooled_w;
            real sum = 0;
            UNROLL
            for (int n = 0; n < ROWS * COLUMNS; n++)
                if (wanted[n] >= 0 && codes[in_pooled[n]] == wanted[n]) sum += load(values + in_signal[n]);
#if RECTIFY
            if (sum < 0) sum = 0;
#endif
            store(out + ((long long)b * channels + c) * out_h * out_w + pixel, sum);
        }
    }
}
