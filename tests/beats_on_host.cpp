// csrc/beats_cuda.cu as a library for the host (test_csrc.py), or with -DFUZZ a program: the kernels, and the CPU version, on random input
// of every kind, for the sanitizers (sanitize.sh).
#include "cuda_on_host.h"

#include "../csrc/beats_cuda.cu"

extern "C" void segment(const void* ecg, int is_float, int records, int leads, int length, double fs, int* peaks, int* count) {
    const beats::Plan plan = beats::make_plan(fs, length);
    std::vector<char> workspace(beats::workspace_bytes(records, leads, plan));
    beats::segment_cuda(ecg, is_float, records, leads, plan, peaks, count, workspace.data(), nullptr);
}

#ifdef FUZZ
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>

// Random ECGs in memory that ends where they end, so that a read beyond is caught.
template <class T> bool same_on_both(std::mt19937& random, bool cpu_only) {
    auto pick = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
    const double rates[] = {100, 120, 125, 239.9, 240, 333, 479, 480, 500, 960, 1000}, fs = rates[pick(0, 10)];
    const int records = pick(1, 3), leads = pick(1, 12), length = int(2 * fs) + 1 + pick(0, pick(0, 1) ? 40 : int(20 * fs)), kind = pick(0, 4);
    const size_t size = size_t(records) * leads * length;
    std::unique_ptr<T[]> ecg(new T[size]);
    std::normal_distribution<float> normal;
    const float inf = std::numeric_limits<float>::infinity(), odd[] = {NAN, inf, -inf, 3e38f, -3e38f, 1e-42f};
    const float scale = sizeof(T) == 2 ? 300 : float(std::pow(10, pick(-3, 4)));
    float walk = 0;
    for (size_t i = 0; i < size; i++) {
        const float x = kind == 0 ? normal(random) : kind == 1 ? 1 : kind == 2 ? 9 * (pick(0, 300) == 0) : kind == 3 ? walk += normal(random) / 10
                      : std::pow(std::sin(float(i % length) * 9 / float(fs)), 9.f);
        ecg[i] = T(sizeof(T) == 2 ? std::max(-32768.f, std::min(32767.f, x * scale)) : x * scale);
    }
    for (int k = pick(0, 6); k--;) {
        const size_t start = size_t(pick(0, int(size) - 1)), stop = std::min(size, start + pick(1, int(4 * fs)));
        const T value = sizeof(T) == 2 ? T(-32768) : T(odd[pick(0, 5)]);
        std::fill(&ecg[0] + start, &ecg[0] + stop, value);
    }
    const beats::Plan plan = beats::make_plan(fs, length);
    std::vector<int> peaks(records * plan.max_peaks()), count(records), peaks2(peaks.size()), count2(records), beat(records * 63);
    beats::segment_cpu(ecg.get(), sizeof(T) == 4, records, leads, plan, peaks.data(), count.data());
    beats::beat_of_token_cpu(peaks.data(), count.data(), records, plan.max_peaks(), 63, length, beat.data());
    if (cpu_only) return true;
    segment(ecg.get(), sizeof(T) == 4, records, leads, length, fs, peaks2.data(), count2.data());
    return peaks == peaks2 && count == count2;
}

int main(int, char** arguments) {  // rounds, cpu or both
    std::mt19937 random(1);
    const bool cpu_only = arguments[2][0] == 'c';
    for (int round = 0, rounds = std::atoi(arguments[1]); round < rounds; round++)
        if (!(round % 2 ? same_on_both<float>(random, cpu_only) : same_on_both<int16_t>(random, cpu_only))) {
            std::printf("round %d: the kernels and the CPU version differ\n", round);
            return 1;
        }
    std::printf("%s rounds without a fault\n", arguments[1]);
}
#endif
