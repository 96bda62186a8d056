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
#include <vector>

#include "cpu.h"

#pragma GCC optimize("fp-contract=fast")  // fused multiply-add, which CFLAGS forbids for the sake of the beats

namespace similarity {

// ---- ragged texts ---------------------------------------------------------------------------------------------------

static std::vector<int64_t> counts_of(const Tensor& count, int64_t most) {
    const Tensor whole = count.to(at::kLong).clamp(0, most).contiguous();
    return {whole.const_data_ptr<int64_t>(), whole.const_data_ptr<int64_t>() + whole.numel()};
}

struct Rows {  // some rows of a padded tensor (C, most, D), and where they stand in it
    Tensor place, rows;  // (N,), (N, D)

    Rows() = default;
    Rows(const Tensor& padded, const std::vector<int64_t>& places)
        : place(at::tensor(places, at::kLong)), rows(padded.reshape({-1, padded.size(2)}).index_select(0, place)) {}
    Tensor unpack(const Tensor& packed, const Tensor& padded) const {  // (N, D) -> like padded, zeros where no row stands
        Tensor whole = at::zeros_like(padded);
        whole.view({-1, padded.size(2)}).index_copy_(0, place, packed);
        return whole;
    }
};

// ---- arithmetic -----------------------------------------------------------------------------------------------------

constexpr int LANES = 8;
template <class T> struct VectorOf { typedef T type __attribute__((vector_size(LANES * sizeof(T)))); };  // GCC's and Clang's
template <class T> using Vector = typename VectorOf<T>::type;

template <class V> static INLINE V larger(V x, V y) { return x > y ? x : y; }  // a NaN in y is not lost
template <class T> static INLINE Vector<T> load(const T* from) {
    Vector<T> x;
    memcpy(&x, from, sizeof x);
    return x;
}
template <class T> static INLINE void store(T* to, Vector<T> x) { memcpy(to, &x, sizeof x); }

// exp within 2 ulp: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]. V: float, or a vector of them; W: whole numbers of that size.
template <class V, class W> static INLINE V exp_by_polynomial(V x) {
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
static INLINE float exp_of(float x) { return exp_by_polynomial<float, int32_t>(x); }
static INLINE double exp_of(double x) { return std::exp(x); }
static INLINE Vector<float> exp_of(Vector<float> x) { return exp_by_polynomial<Vector<float>, Vector<int32_t>>(x); }
static INLINE Vector<double> exp_of(Vector<double> x) {
    for (int i = 0; i < LANES; i++) x[i] = std::exp(x[i]);
    return x;
}

}  // namespace similarity
