// Matrix products of pieces that stay in the caches; what follows is done while the sums are in registers. PyTorch multiplies by MKL, which
// on some processors (AMD's) reaches half of what this does: tests/bench_similarity.py shows both. To be included last.
#pragma once
#include <ATen/Functions.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu.h"

#ifdef __clang__  // fused multiply-add, which CFLAGS forbids for the sake of the beats
#pragma clang fp contract(fast)
#else
#pragma GCC optimize("fp-contract=fast")
#endif

namespace similarity {

constexpr int64_t PANEL = 32;
constexpr int64_t TOGETHER = 48;  // rows of the left side that meet all panels before the next do: both then stay in the second cache

// (depth, columns) -> (panels, depth, PANEL): all rows of PANEL columns, then of the next; zeros behind the last column. Not yet moved.
static at::Tensor in_panels(const at::Tensor& matrix) {
    const int64_t depth = matrix.size(0), panels = (matrix.size(1) + PANEL - 1) / PANEL, missing = panels * PANEL - matrix.size(1);
    const at::Tensor whole = missing ? at::constant_pad_nd(matrix, {0, missing}) : matrix;
    return whole.view({depth, panels, PANEL}).transpose(0, 1);
}
static at::Tensor panels_of(const at::Tensor& matrix) { return in_panels(matrix).contiguous(); }

template <class T> struct Left { const T* x; int64_t row, step, rows; };  // its element (i, k) is x[i * row + k * step]
template <class T> struct Right {  // panels; x may be moved by PANEL for every row that is to be left out
    const T* x;
    int64_t panel, columns;

    Right(const at::Tensor& panels, int64_t columns) : x(panels.const_data_ptr<T>()), panel(panels.size(1) * PANEL), columns(columns) {}
};

// Rows first to last - 1, COUNT at a time, times two vectors of a panel's columns: done(row, sums, sums of the second vector).
template <int COUNT, class V, class T, class Done>
static INLINE void multiply_rows(const Left<T>& left, int64_t first, int64_t last, const T* panel, int64_t depth, Done done) {
    for (; first + COUNT <= last; first += COUNT) {
        V low[COUNT]{}, high[COUNT]{};
        const T *x = left.x + first * left.row, *y = panel;
        for (int64_t k = 0; k < depth; k++, x += left.step, y += PANEL) {
            V y_low, y_high;
            memcpy(&y_low, y, sizeof(V)), memcpy(&y_high, y + sizeof(V) / sizeof(T), sizeof(V));
#pragma GCC unroll 12
            for (int i = 0; i < COUNT; i++) {
                const T one = x[i * left.row];
                low[i] += one * y_low, high[i] += one * y_high;
            }
        }
#pragma GCC unroll 12
        for (int i = 0; i < COUNT; i++) done(first + i, low[i], high[i]);
    }
    if constexpr (COUNT > 1) multiply_rows<COUNT / 2, V>(left, first, last, panel, depth, done);
}

// left (rows, depth) times right (depth, columns): done(row, column, sums, sums), a vector of BYTES bytes from the column on and the next.
template <int COUNT, int BYTES, class T, class Done>
static INLINE void multiply(const Left<T>& left, const Right<T>& right, int64_t depth, Done done) {
    typedef T V __attribute__((vector_size(BYTES)));
    for (int64_t first = 0; first < left.rows; first += TOGETHER)
        for (int64_t j = 0; j < right.columns; j += 2 * BYTES / sizeof(T)) {
            const T* panel = right.x + j / PANEL * right.panel + j % PANEL;
            multiply_rows<COUNT, V>(left, first, std::min(first + TOGETHER, left.rows), panel, depth,
                                    [&](int64_t i, const V& low, const V& high) INLINE_LAMBDA { done(i, j, low, high); });
        }
}

// DEFINE(T, rows at a time, bytes of a vector) for every processor: so many sums as it has registers for.
#ifdef CLONES
#define FOR_EVERY_VECTOR(DEFINE, T)                                          \
    __attribute__((target("arch=x86-64-v4"))) DEFINE(T, 12, 64)              \
    __attribute__((target("arch=x86-64-v3"))) DEFINE(T, 6, 32)               \
    __attribute__((target("default"))) DEFINE(T, 6, 16)
#elif defined(__aarch64__)
#define FOR_EVERY_VECTOR(DEFINE, T) DEFINE(T, 12, 16)
#elif defined(__AVX512F__)
#define FOR_EVERY_VECTOR(DEFINE, T) DEFINE(T, 12, 64)
#elif defined(__AVX__)
#define FOR_EVERY_VECTOR(DEFINE, T) DEFINE(T, 6, 32)
#else
#define FOR_EVERY_VECTOR(DEFINE, T) DEFINE(T, 6, 16)
#endif

// ---- the whole product ----------------------------------------------------------------------------------------------

template <class T> struct Write {  // to a result whose rows are `stride` apart
    T* result;
    int64_t stride, columns;
    bool add;

    template <class V> INLINE void operator()(int64_t i, int64_t j, const V& low, const V& high) const {
        constexpr int64_t HALF = sizeof(V) / sizeof(T);
        T sums[2 * HALF], *to = result + i * stride + j;
        memcpy(sums, &low, sizeof low), memcpy(sums + HALF, &high, sizeof high);
        const int64_t n = std::min(2 * HALF, columns - j);
        if (add) for (int64_t l = 0; l < n; l++) to[l] += sums[l];
        else for (int64_t l = 0; l < n; l++) to[l] = sums[l];
    }
};

#define DEFINE_MULTIPLY(T, COUNT, BYTES)                                                                                           \
    static void multiply(const Left<T>& left, const Right<T>& right, int64_t depth, T* result, int64_t stride, bool add) {         \
        multiply<COUNT, BYTES>(left, right, depth, Write<T>{result, stride, right.columns, add});                                  \
    }
FOR_EVERY_VECTOR(DEFINE_MULTIPLY, float)
FOR_EVERY_VECTOR(DEFINE_MULTIPLY, double)

}  // namespace similarity
