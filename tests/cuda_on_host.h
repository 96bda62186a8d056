// Runs the .cu files of csrc/ on the host: groups one after another, every CUDA thread a thread of the machine, __syncthreads a
// barrier, what a warp does together an exchange between two barriers. Slow and faithful: a missing barrier is a race that
// -fsanitize=thread finds. Include it before the .cu file and compile as C++.
#pragma once
#include <pthread.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __shared__ static  // one group runs at a time
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint4 { unsigned x, y, z, w; };
struct Place { unsigned x; };
static thread_local Place threadIdx, blockIdx, blockDim;
static pthread_barrier_t group_barrier;
static float* group_memory;  // as much as the launch asks for
inline float* shared_memory() { return group_memory; }

inline void __syncthreads() { pthread_barrier_wait(&group_barrier); }
inline int atomicAdd(int* x, int value) { return __atomic_fetch_add(x, value, __ATOMIC_RELAXED); }
inline int atomicMax(int* x, int value) {
    int old = __atomic_load_n(x, __ATOMIC_RELAXED);
    while (old < value && !__atomic_compare_exchange_n(x, &old, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
    return old;
}

typedef int cudaError_t;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

// ---- a warp, for similarity_cuda.cu --------------------------------------------------------------------------------------

struct Exchange { unsigned of_lane[32][6]; };
static pthread_barrier_t warp_barriers[32];
static Exchange exchanges[32];

// Every lane's `mine` (n words) becomes visible to `read`, which may look at those of all lanes.
template <class Read> static void exchange(const unsigned* mine, int n, Read read) {
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    memcpy(exchanges[warp].of_lane[lane], mine, n * sizeof(unsigned));
    pthread_barrier_wait(&warp_barriers[warp]);
    read(exchanges[warp].of_lane);
    pthread_barrier_wait(&warp_barriers[warp]);
}

static float bf16_half(unsigned both, int half) {
    const unsigned bits = half ? both & 0xffff0000u : both << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static void multiply(float* c, const unsigned* a, const unsigned* b) {  // m16n8k16, laid out as the PTX manual says
    const unsigned mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    exchange(mine, 6, [&](unsigned (*all)[6]) {
        const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        for (int q = 0; q < 4; q++) {
            const int row = g + q / 2 * 8, column = 2 * t + q % 2;
            for (int k = 0; k < 16; k++)
                c[q] += bf16_half(all[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k % 2) * bf16_half(all[column * 4 + k % 8 / 2][4 + k / 8], k % 2);
        }
    });
}

static void fetch(void* shared, const void* global, bool there) {
    if (there) memcpy(shared, global, 16);
    else memset(shared, 0, 16);
}
static void end_batch() {}
template <int AHEAD> static void arrive() {}
template <class T> static T from_lane_xor(T x, int lanes) {
    unsigned bits;
    memcpy(&bits, &x, 4);
    exchange(&bits, 1, [&](unsigned (*all)[6]) { bits = all[threadIdx.x % 32 ^ lanes][0]; });
    memcpy(&x, &bits, 4);
    return x;
}
static unsigned lanes_with(bool x) {
    const unsigned mine = x;
    unsigned found = 0;
    exchange(&mine, 1, [&](unsigned (*all)[6]) { for (int lane = 0; lane < 32; lane++) found |= all[lane][0] << lane; });
    return found;
}
static int lowest(unsigned bits) { return __builtin_ctz(bits); }

// ---- launches -------------------------------------------------------------------------------------------------------

template <class Kernel> void run_on_host(unsigned groups, unsigned threads, size_t bytes, Kernel kernel) {
    const std::unique_ptr<float[]> memory(new float[bytes / sizeof(float)]);
    group_memory = memory.get();
    pthread_barrier_init(&group_barrier, nullptr, threads);
    for (unsigned w = 0; w < threads / 32; w++) pthread_barrier_init(&warp_barriers[w], nullptr, 32);
    std::vector<std::thread> team;
    for (unsigned t = 0; t < threads; t++)
        team.emplace_back([=] {
            threadIdx.x = t, blockDim.x = threads;
            for (unsigned g = 0; g < groups; g++) {
                blockIdx.x = g;
                kernel();
                __syncthreads();  // the next group has the same shared memory
            }
        });
    for (auto& t : team) t.join();
    pthread_barrier_destroy(&group_barrier);
    for (unsigned w = 0; w < threads / 32; w++) pthread_barrier_destroy(&warp_barriers[w]);
}
#define LAUNCH_WITH_MEMORY(kernel, groups, threads, bytes, stream, ...) run_on_host(groups, threads, bytes, [=] { kernel(__VA_ARGS__); })
#define LAUNCH(kernel, groups, threads, stream, ...) LAUNCH_WITH_MEMORY(kernel, groups, threads, 0, stream, __VA_ARGS__)
