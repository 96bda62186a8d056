// What token_similarity.cpp and beat_similarity.cpp offer, and at the end beat_similarity_gpu.cpp. All tensors on the CPU, contiguous;
// tokens, words, beats, sentences and grad float32 or float64 alike; counts int64 (B,) or (C,). similarity.py says what it means.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace similarity {

using at::Tensor;

std::tuple<Tensor, Tensor> token_similarity(const Tensor& tokens, const Tensor& words, const Tensor& token_count,
                                            const Tensor& word_count, const std::optional<Tensor>& temperature);
std::tuple<Tensor, Tensor, Tensor> token_similarity_backward(const Tensor& grad, const Tensor& tokens, const Tensor& words,
                                                             const Tensor& token_count, const Tensor& word_count,
                                                             const std::optional<Tensor>& temperature, const Tensor& best);
// keep: scores for each ECG that `kept` has room for, at least K ((C + 7) S + 32); with 0 the backward pass makes them again.
std::tuple<Tensor, Tensor> beat_similarity(const Tensor& beats, const Tensor& sentences, const Tensor& beat_count,
                                           const Tensor& sentence_count, const Tensor& temperatures, bool over_sentences, bool mean,
                                           int64_t keep);
std::tuple<Tensor, Tensor, Tensor> beat_similarity_backward(const Tensor& grad, const Tensor& beats, const Tensor& sentences,
                                                            const Tensor& beat_count, const Tensor& sentence_count,
                                                            const Tensor& temperatures, bool over_sentences, bool mean,
                                                            const Tensor& kept);

// By the kernels of beat_similarity_cuda.cu: all on the GPU, float32, no more sentences in a text than beat_columns() allows (it throws
// otherwise). block: scores that may be there at a time.
Tensor beat_similarity_kernel(const Tensor& beats, const Tensor& sentences, const Tensor& beat_count, const Tensor& sentence_count,
                              const Tensor& temperatures, bool over_sentences, bool mean, int64_t block, void* stream);
std::tuple<Tensor, Tensor, Tensor> beat_similarity_backward_kernel(const Tensor& grad, const Tensor& beats, const Tensor& sentences,
                                                                   const Tensor& beat_count, const Tensor& sentence_count,
                                                                   const Tensor& temperatures, bool over_sentences, bool mean,
                                                                   int64_t block, void* stream);

}  // namespace similarity
