// What similarity_cuda.cu offers: the token scale for bf16 on the GPU. No PyTorch in here: nvcc must compile it without.
// tokens (records, length, dim), words (texts, most, dim) bf16, 16-byte aligned, no size 0, dim a multiple of 8; counts (records,) and
// (texts,), at most length and most; similarity and grad (records, texts); best (records, texts, most). On the stream, without waiting.
// They return what failed, or null.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace similarity {

const char* token_forward_cuda(const void* tokens, const void* words, const int64_t* token_count, const int64_t* word_count, int records,
                               int texts, int length, int most, int dim, float* similarity, int16_t* best, void* stream);
const char* token_backward_cuda(const float* grad, const void* tokens, const void* words, const int64_t* token_count,
                                const int64_t* word_count, const int16_t* best, int records, int texts, int length, int most, int dim,
                                float* of_tokens, float* of_words, void* stream);

}  // namespace similarity
