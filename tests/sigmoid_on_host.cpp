// csrc/sigmoid_cuda.cu as a library for the host (test_sigmoid.py), or with -DFUZZ a program that runs it for the sanitizers.
#include "cuda_on_host.h"

#include "../csrc/sigmoid_cuda.cu"

extern "C" void terms(const float* scores, int64_t rows, int columns, int64_t first, const float* both, const bool* positive, bool half,
                      void* gradient, float* sums) {
    similarity::sigmoid_terms_cuda(scores, rows, columns, first, both, positive, half, gradient, sums, nullptr);
}

#ifdef FUZZ
#include <cstdio>

int main() {
    for (int columns : {1, 5, 8, 1028}) {
        const std::unique_ptr<bool[]> positive(new bool[columns]());
        std::vector<float> scores(2 * columns, 1.f), sums(6), gradient(2 * columns);
        const float both[2] = {2.f, -1.f};
        const int rows = columns > 1 ? 2 : 1;
        for (bool half : {false, true}) terms(scores.data(), rows, columns, columns - rows, both, positive.get(), half, gradient.data(), sums.data());
    }
    std::printf("the sigmoid kernel without a fault\n");
}
#endif
