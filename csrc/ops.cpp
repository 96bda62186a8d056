// The operators as PyTorch sees them. Schemas, and checks that tell a user what to give instead, are in
// ops.py; those here and in checks.h keep direct calls of torch.ops.ecg.* within their tensors' memory.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#ifdef WITH_CUDA
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "similarity_cuda.h"
#endif

#include <algorithm>
#include <tuple>

#include "beats.h"
#include "checks.h"
#include "similarity.h"

namespace {

using at::Tensor;

struct Sizes { int64_t records; int leads; beats::Plan plan; };

Sizes sizes_of(const Tensor& ecg, double fs) {
    TORCH_CHECK(ecg.dim() == 3 && ecg.is_contiguous(), "segment_beats: ecg must be contiguous, (B, leads, N)");
    TORCH_CHECK(ecg.scalar_type() == at::kFloat || ecg.scalar_type() == at::kShort, "segment_beats: ecg must be float32 or int16");
    TORCH_CHECK(ecg.size(1) >= 1 && ecg.size(1) <= beats::MAX_LEADS && fs >= 100 && fs <= 1000 && ecg.size(2) >= 2 * fs &&
                ecg.size(2) < (1 << 30), "segment_beats: 1 to 12 leads, 100 to 1000 Hz, 2 s at least");
    TORCH_CHECK(ecg.size(0) <= checks::MOST, "segment_beats: ", ecg.size(0), " records; fewer than 2^31");
    return {ecg.size(0), int(ecg.size(1)), beats::make_plan(fs, int(ecg.size(2)))};
}

std::tuple<Tensor, Tensor> outputs_of(const Tensor& ecg, const Sizes& s) {
    const auto options = ecg.options().dtype(at::kInt);
    return {at::empty({s.records, s.plan.max_peaks()}, options), at::empty({s.records}, options)};
}

void check_tokens(const Tensor& peaks, const Tensor& count, int64_t tokens, int64_t samples) {
    TORCH_CHECK(peaks.dim() == 2 && peaks.scalar_type() == at::kInt && peaks.is_contiguous(),
                "beat_of_token: peaks must be contiguous, (B, K) int32");
    checks::like("beat_of_token", "count", count, {peaks.size(0)}, at::kInt, peaks);
    TORCH_CHECK(std::min(tokens, samples) >= 1 && std::max(tokens, samples) <= checks::MOST,
                "beat_of_token: ", tokens, " tokens of ", samples, " samples; 1 at least, fewer than 2^31");
    TORCH_CHECK(peaks.size(0) <= checks::MOST && peaks.size(1) <= checks::MOST, "beat_of_token: peaks are ",
                peaks.sizes(), "; it takes fewer than 2^31 rows and columns");
}

std::tuple<Tensor, Tensor> segment_beats_cpu(const Tensor& ecg, double fs) {
    const Sizes s = sizes_of(ecg, fs);
    auto [peaks, count] = outputs_of(ecg, s);
    const bool is_float = ecg.scalar_type() == at::kFloat;
    const size_t bytes = size_t(s.leads) * s.plan.length * ecg.element_size();
    const char* x = static_cast<const char*>(ecg.const_data_ptr());
    int *p = peaks.mutable_data_ptr<int>(), *c = count.mutable_data_ptr<int>();
    at::parallel_for(0, s.records, 1, [&](int64_t begin, int64_t end) {
        beats::segment_cpu(x + bytes * begin, is_float, end - begin, s.leads, s.plan, p + begin * s.plan.max_peaks(), c + begin);
    });
    return {peaks, count};
}

Tensor beat_of_token_cpu(const Tensor& peaks, const Tensor& count, int64_t tokens, int64_t samples) {
    check_tokens(peaks, count, tokens, samples);
    Tensor beat = at::empty({peaks.size(0), tokens}, peaks.options());
    beats::beat_of_token_cpu(peaks.const_data_ptr<int>(), count.const_data_ptr<int>(), peaks.size(0), peaks.size(1), tokens,
                             samples, beat.mutable_data_ptr<int>());
    return beat;
}

#ifdef WITH_CUDA
std::tuple<Tensor, Tensor> segment_beats_cuda(const Tensor& ecg, double fs) {
    const c10::cuda::CUDAGuard guard(ecg.device());
    const Sizes s = sizes_of(ecg, fs);
    auto [peaks, count] = outputs_of(ecg, s);
    const int64_t bytes = beats::workspace_bytes(s.records, s.leads, s.plan);
    const Tensor workspace = at::empty({bytes}, ecg.options().dtype(at::kByte));
    const char* failed = beats::segment_cuda(
        ecg.const_data_ptr(), ecg.scalar_type() == at::kFloat, s.records, s.leads, s.plan, peaks.mutable_data_ptr<int>(),
        count.mutable_data_ptr<int>(), workspace.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream().stream());
    TORCH_CHECK(!failed, "segment_beats: ", failed);
    return {peaks, count};
}

Tensor beat_of_token_cuda(const Tensor& peaks, const Tensor& count, int64_t tokens, int64_t samples) {
    const c10::cuda::CUDAGuard guard(peaks.device());
    check_tokens(peaks, count, tokens, samples);
    Tensor beat = at::empty({peaks.size(0), tokens}, peaks.options());
    const char* failed = beats::beat_of_token_cuda(
        peaks.const_data_ptr<int>(), count.const_data_ptr<int>(), peaks.size(0), peaks.size(1), tokens, samples,
        beat.mutable_data_ptr<int>(), c10::cuda::getCurrentCUDAStream().stream());
    TORCH_CHECK(!failed, "beat_of_token: ", failed);
    return beat;
}

Tensor aligned(const Tensor& x) { return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 ? x.clone() : x; }

// The kernels cut counts to the rows that there are: to look at them here would be to wait for the GPU.
void check_bf16(const Tensor& tokens, const Tensor& words, const Tensor& counts, const Tensor& word_counts) {
    const char* name = "token_similarity";
    checks::sides(name, tokens, words, counts, word_counts);
    checks::like(name, "token_count", counts, {tokens.size(0)}, at::kLong, tokens);
    checks::like(name, "word_count", word_counts, {words.size(0)}, at::kLong, tokens);
    TORCH_CHECK(tokens.scalar_type() == at::kBFloat16 && tokens.size(2) % 8 == 0, name,
                ": bf16, and a multiple of 8 dimensions");
    TORCH_CHECK(tokens.size(1) <= 1 << 15, name, ": ", tokens.size(1), " tokens; the kernel takes 32,768");
    const int64_t grids[] = {tokens.size(0) * words.size(0), words.size(0) * words.size(1), words.size(2),
                             tokens.size(0) * ((tokens.size(1) + 31) / 32)};
    for (int64_t size : grids)
        TORCH_CHECK(size <= checks::MOST, name, ": ", tokens.sizes(), " and ", words.sizes(), ": too many");
}

std::tuple<Tensor, Tensor> token_similarity_bf16(const Tensor& tokens, const Tensor& words, const Tensor& token_count, const Tensor& word_count) {
    const c10::cuda::CUDAGuard guard(tokens.device());
    check_bf16(tokens, words, token_count, word_count);
    const int64_t records = tokens.size(0), texts = words.size(0), most = words.size(1);
    Tensor similarity = at::zeros({records, texts}, tokens.options().dtype(at::kFloat));
    Tensor best = at::zeros({records, texts, most}, tokens.options().dtype(at::kShort));
    if (!tokens.numel() || !words.numel()) return {similarity, best};
    const Tensor x = aligned(tokens), y = aligned(words);
    const char* failed = similarity::token_forward_cuda(
        x.const_data_ptr(), y.const_data_ptr(), token_count.const_data_ptr<int64_t>(), word_count.const_data_ptr<int64_t>(), records, texts,
        x.size(1), most, x.size(2), similarity.mutable_data_ptr<float>(), best.mutable_data_ptr<int16_t>(),
        c10::cuda::getCurrentCUDAStream().stream());
    TORCH_CHECK(!failed, "token_similarity: ", failed);
    return {similarity, best};
}

std::tuple<Tensor, Tensor> token_similarity_backward_bf16(const Tensor& grad, const Tensor& tokens, const Tensor& words,
                                                          const Tensor& token_count, const Tensor& word_count, const Tensor& best) {
    const c10::cuda::CUDAGuard guard(tokens.device());
    check_bf16(tokens, words, token_count, word_count);
    const int64_t records = tokens.size(0), texts = words.size(0);
    checks::like("token_similarity", "grad", grad, {records, texts}, at::kFloat, tokens);
    checks::like("token_similarity", "best", best, {records, texts, words.size(1)}, at::kShort, tokens);
    if (!tokens.numel() || !words.numel()) return {at::zeros_like(tokens), at::zeros_like(words)};
    Tensor of_tokens = at::empty_like(tokens, tokens.options().dtype(at::kFloat)), of_words = at::empty_like(words, words.options().dtype(at::kFloat));
    const char* failed = similarity::token_backward_cuda(
        grad.const_data_ptr<float>(), tokens.const_data_ptr(), words.const_data_ptr(), token_count.const_data_ptr<int64_t>(),
        word_count.const_data_ptr<int64_t>(), best.const_data_ptr<int16_t>(), tokens.size(0), words.size(0), tokens.size(1), words.size(1),
        tokens.size(2), of_tokens.mutable_data_ptr<float>(), of_words.mutable_data_ptr<float>(),
        c10::cuda::getCurrentCUDAStream().stream());
    TORCH_CHECK(!failed, "token_similarity: ", failed);
    return {of_tokens.to(tokens.scalar_type()), of_words.to(words.scalar_type())};
}

Tensor beat_similarity_kernel(const Tensor& beats, const Tensor& sentences, const Tensor& beat_count, const Tensor& sentence_count,
                              const Tensor& temperatures, bool over_sentences, bool mean, int64_t block) {
    const c10::cuda::CUDAGuard guard(beats.device());
    return similarity::beat_similarity_kernel(beats, sentences, beat_count, sentence_count, temperatures, over_sentences, mean, block,
                                              c10::cuda::getCurrentCUDAStream().stream());
}

std::tuple<Tensor, Tensor, Tensor> beat_similarity_backward_kernel(const Tensor& grad, const Tensor& beats, const Tensor& sentences,
                                                                   const Tensor& beat_count, const Tensor& sentence_count,
                                                                   const Tensor& temperatures, bool over_sentences, bool mean,
                                                                   int64_t block) {
    const c10::cuda::CUDAGuard guard(beats.device());
    return similarity::beat_similarity_backward_kernel(grad, beats, sentences, beat_count, sentence_count, temperatures, over_sentences,
                                                       mean, block, c10::cuda::getCurrentCUDAStream().stream());
}

std::tuple<Tensor, Tensor> sigmoid_terms(const Tensor& scores, int64_t first, const Tensor& both, const Tensor& positive, at::ScalarType dtype) {
    const c10::cuda::CUDAGuard guard(scores.device());
    TORCH_CHECK(scores.dim() == 2 && scores.scalar_type() == at::kFloat && scores.is_contiguous() &&
                scores.size(0) <= checks::MOST && scores.size(1) <= checks::MOST &&
                (dtype == at::kFloat || dtype == at::kBFloat16),
                "sigmoid_terms: scores must be contiguous, (R, B) float32, and gradients float32 or bf16");
    checks::like("sigmoid_terms", "both", both, {2}, at::kFloat, scores);
    checks::like("sigmoid_terms", "positive", positive, {scores.size(1)}, at::kBool, scores);
    TORCH_CHECK(first >= 0 && first <= scores.size(1) - scores.size(0), "sigmoid_terms: ", scores.size(0),
                " rows from ", first, " on, of ", scores.size(1));
    const Tensor x = aligned(scores);
    Tensor gradient = at::empty_like(scores, scores.options().dtype(dtype)), sums = at::zeros({scores.size(0), 3}, scores.options());
    if (!scores.numel()) return {gradient, sums.sum(0)};
    const char* failed = similarity::sigmoid_terms_cuda(
        x.const_data_ptr<float>(), x.size(0), x.size(1), first, both.const_data_ptr<float>(), positive.const_data_ptr<bool>(),
        dtype == at::kBFloat16, gradient.mutable_data_ptr(), sums.mutable_data_ptr<float>(), c10::cuda::getCurrentCUDAStream().stream());
    TORCH_CHECK(!failed, "sigmoid_terms: ", failed);
    return {gradient, sums.sum(0)};
}
#endif

}  // namespace

TORCH_LIBRARY_IMPL(ecg, CPU, m) {
    m.impl("segment_beats", segment_beats_cpu);
    m.impl("beat_of_token", beat_of_token_cpu);
    m.impl("token_similarity", similarity::token_similarity);
    m.impl("token_similarity_backward", similarity::token_similarity_backward);
    m.impl("beat_similarity", similarity::beat_similarity);
    m.impl("beat_similarity_backward", similarity::beat_similarity_backward);
}

#ifdef WITH_CUDA
TORCH_LIBRARY_IMPL(ecg, CUDA, m) {
    m.impl("segment_beats", segment_beats_cuda);
    m.impl("beat_of_token", beat_of_token_cuda);
    m.impl("token_similarity_bf16", token_similarity_bf16);
    m.impl("token_similarity_backward_bf16", token_similarity_backward_bf16);
    m.impl("beat_similarity_kernel", beat_similarity_kernel);
    m.impl("beat_similarity_backward_kernel", beat_similarity_backward_kernel);
    m.impl("sigmoid_terms", sigmoid_terms);
}
#endif
