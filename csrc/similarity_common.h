// What token_similarity.cpp and beat_similarity.cpp share: rows of ragged texts, and arithmetic. To be included last.
#pragma once
#include "similarity.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "product.h"

namespace similarity {

// ---- ragged texts ---------------------------------------------------------------------------------------------------

static std::vector<int64_t> counts_of(const Tensor& count, int64_t most) {
    const Tensor whole = count.to(at::kLong).clamp(0, most).contiguous();
    return {whole.const_data_ptr<int64_t>(), whole.const_data_ptr<int64_t>() + whole.numel()};
}

static int64_t filled_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

template <class T> struct Rows {  // some rows of a padded tensor (C, most, D), with rows of zeros between them
    std::vector<int64_t> places, columns;  // row columns[i] of rows (n, D) is number places[i] of all; rows are columns in the scores
    Tensor rows;
    int64_t n = 0;

    void take(int64_t place, int64_t column) { places.push_back(place), columns.push_back(column); }
    void pack(const Tensor& padded) {
        const int64_t dim = padded.size(2);
        rows = at::zeros({n, dim}, padded.options());
        const T* from = padded.const_data_ptr<T>();
        T* to = rows.mutable_data_ptr<T>();
        for_every_row([=](int64_t place, int64_t column) { std::copy_n(from + place * dim, dim, to + column * dim); });
    }
    // The sum of parts (threads, n, D) -> like padded, zeros where no row stands.
    Tensor unpack(const Tensor& parts, const Tensor& padded) const {
        const int64_t dim = padded.size(2), threads = parts.size(0), part = n * dim;
        Tensor whole = at::zeros_like(padded);
        const T* from = parts.const_data_ptr<T>();
        T* to = whole.mutable_data_ptr<T>();
        for_every_row([=](int64_t place, int64_t column) {
            for (int64_t thread = 0; thread < threads; thread++)
                for (int64_t d = 0; d < dim; d++) to[place * dim + d] += from[thread * part + column * dim + d];
        });
        return whole;
    }

  private:
    template <class Work> void for_every_row(Work work) const {
        at::parallel_for(0, places.size(), 64, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; i++) work(places[i], columns[i]);
        });
    }
};

// Threads that take some ECGs each and add up `numbers` numbers of their own, in order: the same result every time.
static int64_t threads_for(int64_t records, int64_t numbers) {
    constexpr int64_t SUMS = 1 << 24;  // that all of them may have together
    return std::max<int64_t>(1, std::min<int64_t>({at::get_num_threads(), SUMS / std::max<int64_t>(1, numbers), records}));
}

// ---- arithmetic -----------------------------------------------------------------------------------------------------

constexpr int LANES = 8;
template <class T, int N = LANES> struct VectorOf { typedef T type __attribute__((vector_size(N * sizeof(T)))); };  // GCC's and Clang's
template <class T> using Vector = typename VectorOf<T>::type;

template <class V> static INLINE V larger(V x, V y) { return x > y ? x : y; }  // a NaN in y is not lost
template <class V, class T> static INLINE V load(const T* from) {
    V x;
    memcpy(&x, from, sizeof x);
    return x;
}
template <class V, class T> static INLINE void store(T* to, V x) { memcpy(to, &x, sizeof x); }

// work(vector of zeros, j) for n columns, a multiple of LANES: by vectors of BYTES bytes where these are larger, the rest by LANES.
template <int BYTES, class T, class Work> static INLINE void for_columns(int64_t n, Work work) {
    constexpr int64_t WIDE = std::max<int64_t>(LANES, BYTES / sizeof(T));
    int64_t j = 0;
    for (; j + WIDE <= n; j += WIDE) work(typename VectorOf<T, WIDE>::type{}, j);
    for (; j < n; j += LANES) work(Vector<T>{}, j);
}

// exp within 2 ulp: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]. V: float, or a vector of them; W: whole numbers of that size.
template <class W, class V> static INLINE V exp_by_polynomial(V x) {
    x = larger(V{} - 87.f, x);
    x = x > V{} + 88.f ? V{} + 88.f : x;
    const V shifted = x * 1.44269504f + 12582912.f, n = shifted - 12582912.f;  // rounds to the nearest integer
    const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    V y = r * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f, y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f, y = y * r + 5.0000001201e-1f, y = y * r * r + r + 1.f;
    W bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + (127 - 0x4B400000)) << 23;
    V scale;
    memcpy(&scale, &bits, sizeof scale);
    return y * scale;
}
static INLINE float exp_of(float x) { return exp_by_polynomial<int32_t>(x); }
static INLINE double exp_of(double x) { return std::exp(x); }
template <class V> static INLINE V exp_of(V x) {  // of a vector
    if constexpr (sizeof x[0] == sizeof(float)) return exp_by_polynomial<typename VectorOf<int32_t, sizeof x / sizeof x[0]>::type>(x);
    else for (size_t i = 0; i < sizeof x / sizeof x[0]; i++) x[i] = std::exp(x[i]);
    return x;
}

}  // namespace similarity
