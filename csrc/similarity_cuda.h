// What similarity_cuda.cu, beat_similarity_cuda.cu and sigmoid_cuda.cu offer. No PyTorch in here: nvcc must compile it without. All on the
// stream, without waiting. They return what failed, or null.
//
// The token scale for bf16.
// tokens (records, length, dim), words (texts, most, dim) bf16, 16-byte aligned, no size 0, dim a multiple of 8; counts (records,) and
// (texts,), cut to length and most; similarity and grad (records, texts); best (records, texts, most), where
// what names no token makes the gradient NaN.
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

// The beat scale for float32. Sentences stand one behind the other, text by text; so do the texts' groups, of beat_columns() sentences at
// most. Nothing has size 0. Pointers are into the device's memory.
struct BeatScale {
    const float *gram, *norm, *temperatures;                 // (records, beats, beats), (sentences,), (2,)
    const int64_t *beat_count, *starts, *text, *first_text;  // (records,); of a text its first sentence (texts + 1,); of a sentence its
                                                             // text (sentences,); of a group its first text (groups + 1,)
    int records, texts, groups, beats, sentences;
    bool over_sentences, mean;
};
constexpr float SMALLEST = 1e-8f;  // of a product of lengths, as torch.cosine_similarity has it

// Sentences that fit into a group beside so many beats; 0: the beats alone are too many.
int beat_columns(int beats, bool over_sentences);
// scores (records, beats, sentences) -> similarity (records, texts), written where both sides have rows.
const char* beat_forward_cuda(const BeatScale& r, const float* scores, float* similarity, void* stream);
// grad (records, texts) -> scores: their gradient in their place; of_gram (groups, records, beats, beats): what times the beats is their
// gradient by way of the Gram matrix; of_sentences (3, records, sentences): gradients of norm and of the two temperatures. Both must come
// as zeros; their sums are the gradients.
const char* beat_backward_cuda(const BeatScale& r, const float* grad, float* scores, float* of_gram, float* of_sentences, void* stream);

// The sigmoid loss. scores (rows, columns), 16-byte aligned: of rows `first` and on of all pairs; both (2,): scale and bias; positive:
// (all rows,). -> gradient (rows, columns), bf16 or float32, 16-byte aligned; sums (rows, 3): losses, gradients of scale and of bias.
const char* sigmoid_terms_cuda(const float* scores, int64_t rows, int columns, int64_t first, const float* both, const bool* positive,
                               bool half, void* gradient, float* sums, void* stream);

}  // namespace similarity
