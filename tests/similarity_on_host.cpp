// csrc/similarity_cuda.cu as a library for the host (test_similarity.py), or with -DFUZZ a program that runs it for the sanitizers.
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
    std::printf("4 rounds of the similarity kernels without a fault\n");
}
#endif
