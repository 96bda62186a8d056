// Between the products of sigmoid_loss on the GPU: scores become gradients, and their losses are added up. What it computes:
// sigmoid.py. A group of threads has a row of pairs, read and written once; a row's sums go to a place of their own and are added up
// afterwards: the same result every time. tests/cuda_on_host.h runs the kernel on the host.
#include "similarity_cuda.h"

#include "launch.h"

namespace similarity {

constexpr int LINE = 256;  // threads of a group

static __device__ __forceinline__ void round_to(float* to, float x) { *to = x; }
static __device__ __forceinline__ void round_to(uint16_t* to, float x) {  // bf16, the nearest; NaN stays NaN
    unsigned bits;
    memcpy(&bits, &x, 4);
    *to = x == x ? uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : uint16_t(0x7fc0);
}

// Grid: rows. -> gradient (rows, columns), and of each row the sum of losses, of gradients times scores, of gradients.
template <class T>
static __global__ void __launch_bounds__(LINE)
sigmoid_kernel(const float* scores, int columns, int64_t first, const float* both, const bool* positive, T* gradient, float* sums) {
    __shared__ float parts[3][LINE];
    const int64_t row = blockIdx.x, start = row * columns, pair = positive[first + row] ? first + row : -1;
    const float scale = both[0], bias = both[1];
    float loss = 0, of_scale = 0, of_bias = 0;
    const auto gradient_of = [&](float x, int j) {
        const float logit = scale * x + bias, sign = j == pair ? -1.f : 1.f, z = sign * logit, e = expf(-fabsf(z));
        const float g = sign * (z > 0 ? 1.f : e) / (1 + e);
        loss += fmaxf(z, 0.f) + log1pf(e), of_scale += g * x, of_bias += g;
        return g;
    };
    const int quads = columns % 4 ? 0 : columns / 4;  // of a multiple of four, all rows are aligned
    for (int q = threadIdx.x; q < quads; q += LINE) {
        const Quad<float> x = reinterpret_cast<const Quad<float>*>(scores + start)[q];
        Quad<T> g;
#pragma unroll
        for (int i = 0; i < 4; i++) round_to(&g.of[i], gradient_of(x.of[i], 4 * q + i));
        reinterpret_cast<Quad<T>*>(gradient + start)[q] = g;
    }
    for (int j = 4 * quads + threadIdx.x; j < columns; j += LINE) round_to(gradient + start + j, gradient_of(scores[start + j], j));
    parts[0][threadIdx.x] = loss, parts[1][threadIdx.x] = of_scale, parts[2][threadIdx.x] = of_bias;
    __syncthreads();
    for (int half = LINE / 2; half; half /= 2) {
        if (int(threadIdx.x) < half)
            for (auto& part : parts) part[threadIdx.x] += part[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x < 3) sums[3 * row + threadIdx.x] = parts[threadIdx.x][0];
}

const char* sigmoid_terms_cuda(const float* scores, int64_t rows, int columns, int64_t first, const float* both, const bool* positive,
                               bool half, void* gradient, float* sums, void* stream) {
    const auto launch = [&](auto* to) { LAUNCH(sigmoid_kernel, rows, LINE, stream, scores, columns, first, both, positive, to, sums); };
    if (half) launch(static_cast<uint16_t*>(gradient));
    else launch(static_cast<float*>(gradient));
    return what_failed();
}

}  // namespace similarity
