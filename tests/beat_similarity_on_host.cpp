// csrc/beat_similarity_cuda.cu and csrc/beat_similarity_gpu.cpp as operators for the CPU (test_similarity.py).
#include "cuda_on_host.h"

#include "../csrc/beat_similarity_cuda.cu"
#include "../csrc/similarity.h"

#include <torch/library.h>

using at::Tensor;

static Tensor forward(const Tensor& beats, const Tensor& sentences, const Tensor& beat_count, const Tensor& sentence_count,
                      const Tensor& temperatures, bool over_sentences, bool mean, int64_t block) {
    return similarity::beat_similarity_kernel(beats, sentences, beat_count, sentence_count, temperatures, over_sentences, mean, block,
                                              nullptr);
}

static std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& beats, const Tensor& sentences,
                                                   const Tensor& beat_count, const Tensor& sentence_count, const Tensor& temperatures,
                                                   bool over_sentences, bool mean, int64_t block) {
    return similarity::beat_similarity_backward_kernel(grad, beats, sentences, beat_count, sentence_count, temperatures, over_sentences,
                                                       mean, block, nullptr);
}

TORCH_LIBRARY_IMPL(ecg, CPU, m) {
    m.impl("beat_similarity_kernel", forward);
    m.impl("beat_similarity_backward_kernel", backward);
}
