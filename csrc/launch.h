// What the CUDA files share: launching a kernel, what became of it, and four numbers together. tests/cuda_on_host.h brings its own.
#pragma once

#ifdef __CUDACC__
#define LAUNCH_WITH_MEMORY(kernel, groups, threads, bytes, stream, ...) \
    kernel<<<groups, threads, bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define LAUNCH(kernel, groups, threads, stream, ...) LAUNCH_WITH_MEMORY(kernel, groups, threads, 0, stream, __VA_ARGS__)
#endif

template <class T> struct alignas(4 * sizeof(T)) Quad { T of[4]; };  // read and written at once

static inline const char* what_failed() {
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
