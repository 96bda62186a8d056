// What the operators ask of their tensors before they take their memory: torch.ops.ecg.* may be called with anything.
#pragma once
#include <ATen/core/Tensor.h>

#include <limits>

namespace checks {

using at::Tensor;

constexpr int64_t MOST = std::numeric_limits<int32_t>::max();  // sizes that are counted by int

inline bool is(const Tensor& x, at::ScalarType type, const at::Device& device) {
    return x.scalar_type() == type && x.device() == device && x.is_contiguous();
}

inline void like(const char* name, const char* what, const Tensor& x, at::IntArrayRef sizes, at::ScalarType type, const Tensor& other) {
    TORCH_CHECK(x.sizes() == sizes && is(x, type, other.device()), name, ": ", what, " must be contiguous, ", type, " ", sizes, " on ",
                other.device(), ", not ", x.scalar_type(), " ", x.sizes(), " on ", x.device());
}

inline bool counts(const Tensor& count, const Tensor& rows) {
    return count.dim() == 1 && count.size(0) == rows.size(0) && at::isIntegralType(count.scalar_type(), /*includeBool=*/false) &&
           count.device() == rows.device();
}

// ecgs (B, N, D) and texts (C, M, D) of one type; ecg_count (B,) and text_count (C,): too large or small ones are cut by who reads them.
inline void sides(const char* name, const Tensor& ecgs, const Tensor& texts, const Tensor& ecg_count, const Tensor& text_count) {
    TORCH_CHECK(ecgs.dim() == 3 && texts.dim() == 3 && ecgs.size(2) == texts.size(2) && ecgs.is_contiguous() &&
                is(texts, ecgs.scalar_type(), ecgs.device()),
                name, ": both sides must be contiguous, (B, N, D) and (C, M, D), of one type on one device; they are ",
                ecgs.scalar_type(), " ", ecgs.sizes(), " on ", ecgs.device(), " and ", texts.scalar_type(), " ", texts.sizes(), " on ",
                texts.device());
    TORCH_CHECK(counts(ecg_count, ecgs) && counts(text_count, texts), name, ": counts must be whole numbers (B,) and (C,) on ",
                ecgs.device(), "; they are ", ecg_count.scalar_type(), " ", ecg_count.sizes(), " on ", ecg_count.device(), " and ",
                text_count.scalar_type(), " ", text_count.sizes(), " on ", text_count.device());
}

inline void floating(const char* name, const Tensor& x) {
    TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble, name, ": float32 or float64, not ", x.scalar_type());
}

inline void temperatures(const char* name, const Tensor& x, int64_t numbers, const Tensor& other) {
    TORCH_CHECK(x.numel() == numbers && at::isFloatingType(x.scalar_type()) && x.device() == other.device(), name, ": ", numbers,
                " floating-point temperatures on ", other.device(), ", not ", x.scalar_type(), " ", x.sizes(), " on ", x.device());
}

}  // namespace checks
