// What the CUDA files share: launching a kernel, and what became of it. tests/cuda_on_host.h brings a LAUNCH of its own.
#pragma once

#ifdef __CUDACC__
#define LAUNCH(kernel, groups, threads, stream, ...) kernel<<<groups, threads, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#endif

static inline const char* what_failed() {
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
