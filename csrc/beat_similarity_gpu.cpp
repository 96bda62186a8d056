// The beat scale around the kernels of beat_similarity_cuda.cu: it packs the sentences, makes the matrix products, some ECGs at a time,
// and adds up what the kernels give. It asks for nothing that only a GPU has: the tests run it on the host.
#include "checks.h"
#include "similarity.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include <algorithm>
#include <vector>

#include "similarity_cuda.h"

namespace similarity {

struct Packed {  // what is the same for all ECGs; rows (N, D): the real sentences
    Tensor beats, beat_count, warm, numbers, place, rows, norm;  // place (N,): of the rows among the padded ones
    BeatScale scale;
    int64_t step;  // ECGs of a block

    // Waits for the GPU once, for the numbers of sentences: the sizes of all that follows depend on them.
    Packed(const Tensor& beats, const Tensor& sentences, const Tensor& beat_count, const Tensor& sentence_count,
           const Tensor& temperatures, bool over_sentences, bool mean, int64_t block)
        : beats(beats) {
        checks::sides("beat_similarity", beats, sentences, beat_count, sentence_count);
        checks::temperatures("beat_similarity", temperatures, 2, beats);
        TORCH_CHECK(block > 0 && beats.size(1) <= checks::MOST, "beat_similarity: block is ", block,
                    ", beats are ", beats.sizes());
        this->beat_count = beat_count.to(at::kLong).clamp(0, beats.size(1)).contiguous();
        warm = temperatures.contiguous();
        const int64_t texts = sentences.size(0), most = sentences.size(1), columns = beat_columns(beats.size(1), over_sentences);
        TORCH_CHECK(beats.scalar_type() == at::kFloat && warm.scalar_type() == at::kFloat,
                    "beat_similarity: float32");
        TORCH_CHECK(most <= columns, "beat_similarity: ", most, " sentences in a text; beside ", beats.size(1), " beats there is room for ",
                    columns);
        const Tensor counts = sentence_count.to(at::kCPU, at::kLong).clamp(0, most).contiguous();
        const int64_t* count = counts.const_data_ptr<int64_t>();
        std::vector<int64_t> places, starts{0}, text, first_text{0};
        for (int64_t c = 0; c < texts; c++) {
            if (starts[c] + count[c] - starts[first_text.back()] > columns) first_text.push_back(c);
            for (int64_t s = 0; s < count[c]; s++) places.push_back(c * most + s), text.push_back(c);
            starts.push_back(places.size());
        }
        first_text.push_back(texts);
        const int64_t n = places.size(), groups = first_text.size() - 1;
        for (const auto* more : {&starts, &text, &first_text}) places.insert(places.end(), more->begin(), more->end());
        numbers = at::tensor(places, at::kLong).to(beats.device(), at::kLong, /*non_blocking=*/true);
        place = numbers.narrow(0, 0, n);
        rows = sentences.view({texts * most, sentences.size(2)}).index_select(0, place);
        norm = rows.norm(2, 1);
        const int64_t* in = numbers.const_data_ptr<int64_t>() + n;
        scale = {nullptr, norm.const_data_ptr<float>(), warm.const_data_ptr<float>(), nullptr, in, in + texts + 1, in + texts + 1 + n,
                 0, int(texts), int(groups), int(beats.size(1)), int(n), over_sentences, mean};
        step = std::max<int64_t>(1, block / std::max<int64_t>(1, beats.size(1) * n));
        const int64_t grid = groups * std::min(step, beats.size(0));
        TORCH_CHECK(std::max({texts, n, grid}) <= checks::MOST, "beat_similarity: ", texts, " texts, ", n,
                    " sentences and blocks of ", step, " ECGs are too many for a kernel");
    }

    // Calls block(first ECG, their beats (b, K, D), scores (b K, N), BeatScale) for some ECGs after others.
    template <class Block> void for_every_block(Block block) const {
        if (!beats.numel() || !rows.numel()) return;
        for (int64_t first = 0; first < beats.size(0); first += step) {
            const Tensor some = beats.narrow(0, first, std::min(step, beats.size(0) - first)), gram = at::bmm(some, some.transpose(1, 2));
            BeatScale r = scale;
            r.gram = gram.const_data_ptr<float>(), r.beat_count = beat_count.const_data_ptr<int64_t>() + first, r.records = some.size(0);
            block(first, some, at::mm(some.view({-1, some.size(2)}), rows.t()), r);
        }
    }
};

Tensor beat_similarity_kernel(const Tensor& beats, const Tensor& sentences, const Tensor& beat_count, const Tensor& sentence_count,
                              const Tensor& temperatures, bool over_sentences, bool mean, int64_t block, void* stream) {
    const Packed all(beats, sentences, beat_count, sentence_count, temperatures, over_sentences, mean, block);
    Tensor similarity = at::zeros({beats.size(0), sentences.size(0)}, beats.options());
    all.for_every_block([&](int64_t first, const Tensor&, const Tensor& scores, const BeatScale& r) {
        const char* failed = beat_forward_cuda(r, scores.const_data_ptr<float>(),
                                               similarity.mutable_data_ptr<float>() + first * sentences.size(0), stream);
        TORCH_CHECK(!failed, "beat_similarity: ", failed);
    });
    return similarity;
}

std::tuple<Tensor, Tensor, Tensor> beat_similarity_backward_kernel(const Tensor& grad, const Tensor& beats, const Tensor& sentences,
                                                                   const Tensor& beat_count, const Tensor& sentence_count,
                                                                   const Tensor& temperatures, bool over_sentences, bool mean,
                                                                   int64_t block, void* stream) {
    const Packed all(beats, sentences, beat_count, sentence_count, temperatures, over_sentences, mean, block);
    const int64_t records = beats.size(0), texts = sentences.size(0);
    checks::like("beat_similarity", "grad", grad, {records, texts}, beats.scalar_type(), beats);
    const int64_t most = beats.size(1), dim = beats.size(2), n = all.rows.size(0);
    Tensor of_beats = at::zeros_like(beats), of_rows = at::zeros_like(all.rows), sums = at::zeros({3, n}, beats.options());
    all.for_every_block([&](int64_t first, const Tensor& some, const Tensor& scores, const BeatScale& r) {
        const Tensor of_gram = at::zeros({r.groups, r.records, most, most}, beats.options());
        const Tensor of_sentences = at::zeros({3, r.records, n}, beats.options());
        const char* failed = beat_backward_cuda(r, grad.const_data_ptr<float>() + first * sentences.size(0),
                                                scores.mutable_data_ptr<float>(), of_gram.mutable_data_ptr<float>(),
                                                of_sentences.mutable_data_ptr<float>(), stream);
        TORCH_CHECK(!failed, "beat_similarity: ", failed);
        Tensor mine = of_beats.narrow(0, first, r.records);
        at::baddbmm_out(mine, at::mm(scores, all.rows).view({-1, most, dim}), of_gram.sum(0), some);
        of_rows.addmm_(scores.t(), some.view({-1, dim}));
        sums.add_(of_sentences.sum(1));
    });
    of_rows.addcmul_(all.rows, (sums[0] / all.norm.clamp_min(SMALLEST)).unsqueeze(1));
    Tensor of_padded = at::zeros_like(sentences);
    of_padded.view({sentences.size(0) * sentences.size(1), dim}).index_copy_(0, all.place, of_rows);
    return {of_beats, of_padded, sums.narrow(0, 1, 2).sum(1)};
}

}  // namespace similarity
