// csrc/similarity_cuda.cu as a library for the host (test_similarity.py), or with -DFUZZ a program that runs it and
// csrc/beat_similarity_cuda.cu for the sanitizers.
#include "cuda_on_host.h"

#include "../csrc/similarity_cuda.cu"

extern "C" void forward(const void* tokens, const void* words, const int64_t* token_count, const int64_t* word_count, int records, int texts,
                        int length, int most, int dim, float* similarity, int16_t* best) {
    similarity::token_forward_cuda(tokens, words, token_count, word_count, records, texts, length, most, dim, similarity, best, nullptr);
}

extern "C" void backward(const float* grad, const void* tokens, const void* words, const int64_t* token_count, const int64_t* word_count,
                         const int16_t* best, int records, int texts, int length, int most, int dim, float* of_tokens, float* of_words) {
    similarity::token_backward_cuda(grad, tokens, words, token_count, word_count, best, records, texts, length, most, dim, of_tokens, of_words,
                                    nullptr);
}

#ifdef FUZZ
#include "../csrc/beat_similarity_cuda.cu"

#include <cmath>
#include <cstdio>
#include <random>

int main() {
    std::mt19937 random(1);
    for (int round = 0; round < 4; round++) {
        auto pick = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
        const int records = pick(1, 3), texts = pick(1, 4), length = pick(1, 70), most = round == 3 ? 260 : pick(1, 40), dim = 8 * pick(1, 5);
        std::vector<uint16_t> tokens(records * length * dim), words(texts * most * dim);
        for (auto* side : {&tokens, &words}) for (uint16_t& x : *side) x = uint16_t(0x3f00 + pick(0, 255) + 0x8000 * pick(0, 1));
        std::vector<int64_t> token_count(records), word_count(texts);
        for (int64_t& n : token_count) n = pick(0, length);
        for (int64_t& n : word_count) n = pick(0, most);
        std::vector<float> similarity(records * texts), grad(similarity.size(), 1.f), of_tokens(tokens.size()), of_words(words.size());
        std::vector<int16_t> best(records * texts * most);
        forward(tokens.data(), words.data(), token_count.data(), word_count.data(), records, texts, length, most, dim, similarity.data(), best.data());
        backward(grad.data(), tokens.data(), words.data(), token_count.data(), word_count.data(), best.data(), records, texts, length, most, dim,
                 of_tokens.data(), of_words.data());
    }
    for (int round = 0; round < 8; round++) {  // groups of texts as full as can be, some of them empty
        auto pick = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
        const bool over_sentences = round % 2;
        const int records = pick(1, 3), texts = pick(1, 9), beats = round < 2 ? 64 : pick(1, 40);
        const int most = similarity::beat_columns(beats, over_sentences);
        std::vector<int64_t> beat_count(records), starts{0}, text, first_text{0};
        for (int64_t& n : beat_count) n = pick(0, beats);
        for (int c = 0; c < texts; c++) {
            const int n = pick(0, 2) ? pick(0, most) : most;
            if (starts[c] + n - starts[first_text.back()] > most) first_text.push_back(c);
            text.insert(text.end(), n, c), starts.push_back(starts[c] + n);
        }
        first_text.push_back(texts);
        const int sentences = text.size(), groups = first_text.size() - 1;
        std::vector<float> scores(records * beats * sentences), gram(records * beats * beats, 0.5f), norm(sentences, 2.f);
        for (float& x : scores) x = std::sin(pick(0, 999));
        const float temperatures[2] = {4, 5};
        std::vector<float> similarity(records * texts), grad(similarity.size(), 1.f), of_gram(groups * gram.size());
        std::vector<float> of_sentences(3 * records * sentences);
        const similarity::BeatScale r{gram.data(), norm.data(), temperatures, beat_count.data(), starts.data(), text.data(),
                                      first_text.data(), records, texts, groups, beats, sentences, over_sentences, round % 3 == 0};
        similarity::beat_forward_cuda(r, scores.data(), similarity.data(), nullptr);
        similarity::beat_backward_cuda(r, grad.data(), scores.data(), of_gram.data(), of_sentences.data(), nullptr);
    }
    std::printf("12 rounds of the similarity kernels without a fault\n");
}
#endif
