// Runs a .cu file of csrc/ on the host: groups one after another, every CUDA thread a thread of the machine, __syncthreads a
// barrier. Slow and faithful: a missing barrier is a race that -fsanitize=thread finds. Include it before the .cu file and compile as C++.
#pragma once
#include <pthread.h>

#include <algorithm>
#include <cstddef>
#include <thread>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __shared__ static  // one group runs at a time

struct uint4 { unsigned x, y, z, w; };
struct Place { unsigned x; };
static thread_local Place threadIdx, blockIdx, blockDim;
static pthread_barrier_t group_barrier;

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

template <class Kernel> void run_on_host(unsigned groups, unsigned threads, Kernel kernel) {
    pthread_barrier_init(&group_barrier, nullptr, threads);
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
}
#define LAUNCH(kernel, groups, threads, stream, ...) run_on_host(groups, threads, [=] { kernel(__VA_ARGS__); })
