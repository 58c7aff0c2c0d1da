// Runs device code on the CPU, from the very source that ships.
//
// A block's threads are fibers (ucontext) of one CPU thread. A fiber runs until it ends or meets a rendezvous
// (__syncthreads, __syncwarp, a shuffle or a vote); blocks run one after the other. The fibers take turns in a shuffled
// order, so that a missing barrier shows as a wrong result. A thread that leaves the others waiting is an error.
// Shuffles and votes expect all 32 lanes of a warp. Not every race can be seen this way.

#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <tuple>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x = 1, y = 1, z = 1; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct int2 { int x, y; };
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline int2 make_int2(int x, int y) { return {x, y}; }
using std::max;
using std::min;
static inline double __dadd_rn(double a, double b) { return a + b; }
static inline double __dmul_rn(double a, double b) { return a * b; }
static inline double __longlong_as_double(long long bits) {
    double value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
template <class T> static inline T __ldg(const T* address) { return *address; }

// Fibers change places at a rendezvous only.
template <class T> static inline T atomicAdd(T* address, T value) {
    const T before = *address;
    *address += value;
    return before;
}

static uint3 threadIdx, blockIdx;
static dim3 blockDim, gridDim;
static const int warpSize = 32;

namespace shim {
enum State { RUNS, AT_BLOCK, AT_WARP, ENDED };
struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    State state;
    unsigned index, exchanges;  // exchanges: how many shuffles and votes it has done
    uint64_t slot[2];           // what it offers to its warp; two, because a lane may be one exchange ahead
};
static std::vector<Fiber> fibers;
static ucontext_t scheduler;
static Fiber* current;
static void (*body)(void*);
static void* body_arguments;

static void wait(State state) {
    current->state = state;
    swapcontext(&current->context, &scheduler);
}

static void enter() {
    body(body_arguments);
    current->state = ENDED;
    swapcontext(&current->context, &scheduler);
}

// Set fibers [begin, end) running again if all of them wait at the same kind of rendezvous.
static bool release(size_t begin, size_t end, State state, bool ended_count) {
    bool some = false;
    for (size_t f = begin; f < end; f++) {
        if (fibers[f].state == ENDED && ended_count) continue;
        if (fibers[f].state != state) return false;
        some = true;
    }
    for (size_t f = begin; f < end; f++)
        if (fibers[f].state == state) fibers[f].state = RUNS;
    return some;
}

static bool run_block(std::mt19937& random) {
    const size_t n = blockDim.x * blockDim.y * blockDim.z;
    fibers.resize(std::max(fibers.size(), n));
    std::vector<size_t> order(n);
    for (size_t f = 0; f < n; f++) {
        Fiber& fiber = fibers[f];
        order[f] = f;
        fiber.stack.resize(1 << 16);
        fiber.state = RUNS;
        fiber.index = f;
        fiber.exchanges = 0;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = &scheduler;
        makecontext(&fiber.context, enter, 0);
    }
    for (;;) {
        std::shuffle(order.begin(), order.end(), random);
        bool moved = false, all_ended = true;
        for (size_t f : order) {
            if (fibers[f].state != RUNS) continue;
            current = &fibers[f];
            threadIdx = {(unsigned)(f % blockDim.x), (unsigned)(f / blockDim.x % blockDim.y),
                         (unsigned)(f / blockDim.x / blockDim.y)};
            swapcontext(&scheduler, &current->context);
            moved = true;
        }
        for (size_t f = 0; f < n; f += 32) moved |= release(f, std::min(f + 32, n), AT_WARP, false);
        moved |= release(0, n, AT_BLOCK, true);
        for (size_t f = 0; f < n; f++) all_ended &= fibers[f].state == ENDED;
        if (all_ended) return true;
        if (!moved) return false;
    }
}

template <class T> static T exchange(T value, unsigned source) {
    static_assert(sizeof(T) <= 8, "a lane exchanges at most 8 bytes");
    const unsigned slot = current->exchanges++ % 2, warp = current->index / 32 * 32;
    memcpy(&current->slot[slot], &value, sizeof(T));
    wait(AT_WARP);
    memcpy(&value, &fibers[warp + source % 32].slot[slot], sizeof(T));
    return value;
}

static unsigned ballot(bool value) {
    const unsigned slot = current->exchanges++ % 2, warp = current->index / 32 * 32;
    current->slot[slot] = value;
    wait(AT_WARP);
    unsigned bits = 0;
    for (unsigned lane = 0; lane < 32; lane++) bits |= (unsigned)fibers[warp + lane].slot[slot] << lane;
    return bits;
}

// Call `kernel` in every thread of the grid with the arguments that `arguments` points to, as cuLaunchKernel does.
// Returns 0, or 1 if some threads were left waiting.
template <class... A>
static int launch(void (*kernel)(A...), void** arguments, const unsigned* sizes, unsigned seed) {
    gridDim = {sizes[0], sizes[1], sizes[2]};
    blockDim = {sizes[3], sizes[4], sizes[5]};
    std::tuple<std::remove_cv_t<A>...> values;
    size_t i = 0;
    std::apply([&](auto&... value) { (memcpy(&value, arguments[i++], sizeof(value)), ...); }, values);
    auto call = std::make_pair(kernel, values);
    body_arguments = &call;
    body = [](void* pointer) {
        auto& [function, copied] = *static_cast<decltype(call)*>(pointer);
        std::apply(function, copied);
    };
    std::mt19937 random(seed);
    for (unsigned z = 0; z < gridDim.z; z++)
        for (unsigned y = 0; y < gridDim.y; y++)
            for (unsigned x = 0; x < gridDim.x; x++) {
                blockIdx = {x, y, z};
                if (!run_block(random)) return 1;
            }
    return 0;
}
}  // namespace shim

static inline unsigned shim_lane() { return shim::current->index % 32; }
static inline void __syncthreads() { shim::wait(shim::AT_BLOCK); }
static inline void __syncwarp(unsigned = ~0u) { shim::wait(shim::AT_WARP); }
static inline unsigned __ballot_sync(unsigned, bool value) { return shim::ballot(value); }
static inline int __any_sync(unsigned, bool value) { return shim::ballot(value) != 0; }
static inline int __all_sync(unsigned, bool value) { return shim::ballot(value) == ~0u; }
template <class T> static inline T __shfl_sync(unsigned, T value, int lane) { return shim::exchange(value, lane); }
template <class T> static inline T __shfl_xor_sync(unsigned, T value, int bits) {
    return shim::exchange(value, shim_lane() ^ bits);
}
template <class T> static inline T __shfl_down_sync(unsigned, T value, unsigned delta) {
    return shim::exchange(value, shim_lane() + delta < 32 ? shim_lane() + delta : shim_lane());
}
template <class T> static inline T __shfl_up_sync(unsigned, T value, unsigned delta) {
    return shim::exchange(value, shim_lane() >= delta ? shim_lane() - delta : shim_lane());
}

// Makes `extern "C" int run_<kernel>(void** arguments, const unsigned sizes[6], unsigned seed)`.
#define SHIM_EXPORT(kernel)                                                                         \
    extern "C" int run_##kernel(void** arguments, const unsigned* sizes, unsigned seed) {           \
        return shim::launch(kernel, arguments, sizes, seed);                                        \
    }
