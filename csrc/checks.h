// What the operators ask of their tensors before they take their memory: torch.ops.ecg.* takes anything.
#pragma once
#include <ATen/core/Tensor.h>

#include <limits>
#include <string>

namespace checks {

using at::Tensor;

constexpr int64_t MOST = std::numeric_limits<int32_t>::max();  // sizes that are counted by int

inline std::string told(at::ScalarType type, at::IntArrayRef sizes, at::Device device) {
    return c10::str(type, " ", sizes, " on ", device);
}
inline std::string told(const Tensor& x) { return told(x.scalar_type(), x.sizes(), x.device()); }

inline bool is(const Tensor& x, at::ScalarType type, at::Device device) {
    return x.scalar_type() == type && x.device() == device && x.is_contiguous();
}

inline void like(const char* name, const char* what, const Tensor& x, at::IntArrayRef sizes,
                 at::ScalarType type, const Tensor& other) {
    TORCH_CHECK(x.sizes() == sizes && is(x, type, other.device()), name, ": ", what, " must be contiguous, ",
                told(type, sizes, other.device()), ", not ", told(x));
}

inline bool counts(const Tensor& count, const Tensor& rows) {
    return count.dim() == 1 && count.size(0) == rows.size(0) && count.device() == rows.device() &&
           at::isIntegralType(count.scalar_type(), /*includeBool=*/false);
}

// ecgs (B, N, D), texts (C, M, D), ecg_count (B,) and text_count (C,), which are cut to N and M later.
inline void sides(const char* name, const Tensor& ecgs, const Tensor& texts, const Tensor& ecg_count,
                  const Tensor& text_count) {
    const bool alike = is(texts, ecgs.scalar_type(), ecgs.device()) && ecgs.is_contiguous();
    TORCH_CHECK(alike && ecgs.dim() == 3 && texts.dim() == 3 && ecgs.size(2) == texts.size(2), name,
                ": both sides must be contiguous, (B, N, D) and (C, M, D), of one type on one device; not ",
                told(ecgs), " and ", told(texts));
    TORCH_CHECK(counts(ecg_count, ecgs) && counts(text_count, texts), name,
                ": counts must be whole numbers (B,) and (C,) on ", ecgs.device(), ", not ", told(ecg_count),
                " and ", told(text_count));
}

inline void floating(const char* name, const Tensor& x) {
    const at::ScalarType type = x.scalar_type();
    TORCH_CHECK(type == at::kFloat || type == at::kDouble, name, ": float32 or float64, not ", type);
}

inline void temperatures(const char* name, const Tensor& x, int64_t numbers, const Tensor& other) {
    const auto device = other.device();
    TORCH_CHECK(x.numel() == numbers && at::isFloatingType(x.scalar_type()) && x.device() == device, name,
                ": ", numbers, " floating-point temperatures on ", device, ", not ", told(x));
}

}  // namespace checks
