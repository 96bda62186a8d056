// token_similarity on the CPU, forward and backward. What it computes: similarity.py.
//
// Scores are made by matrix products in blocks that fit into the caches, reduced at once and forgotten; there is no tensor of ECG x
// text x token x word. Texts are ragged, so their words are packed first, without the padding. The backward pass knows which token each
// word took; with a temperature it makes the scores again.
#include "similarity_common.h"

namespace similarity {

struct Packed : Rows {  // all texts one behind the other: text c has rows starts[c] to starts[c + 1] - 1
    std::vector<int64_t> starts;

    Packed(const Tensor& padded, const std::vector<int64_t>& counts) : starts(counts.size() + 1, 0) {
        std::vector<int64_t> places;
        for (size_t c = 0; c < counts.size(); c++) {
            for (int64_t w = 0; w < counts[c]; w++) places.push_back(c * padded.size(1) + w);
            starts[c + 1] = places.size();
        }
        static_cast<Rows&>(*this) = Rows(padded, places);
    }
    // Texts from .. to - 1 whose rows are at most `rows`, one text at least.
    int64_t block_end(int64_t from, int64_t rows) const {
        int64_t to = from + 1;
        while (to + 1 < int64_t(starts.size()) && starts[to + 1] - starts[from] <= rows) to++;
        return to;
    }
};

// s (rows, n) -> the largest of every column, and its row. NaN is larger than all else: it must not get lost.
template <class T>
static INLINE void column_max_(const T* __restrict s, int64_t rows, int64_t n, T* __restrict top, int32_t* __restrict at) {
    for (int64_t j = 0; j < n; j++) top[j] = s[j], at[j] = 0;
    for (int64_t t = 1; t < rows; t++)
        for (int64_t j = 0; j < n; j++) {
            const T x = s[t * n + j];
            const bool more = !(x <= top[j]) & (top[j] == top[j]);
            at[j] = more ? int32_t(t) : at[j];
            top[j] = more ? x : top[j];
        }
}

// s (rows, n) -> of every column the mean under its softmax at a temperature; also the largest, and the sum of
// exp((s - top) / temperature).
template <class T>
static INLINE void column_softmax_(const T* __restrict s, int64_t rows, int64_t n, T temperature, T* __restrict top, T* __restrict sum,
                                   T* __restrict mean) {
    for (int64_t j = 0; j < n; j++) top[j] = s[j], sum[j] = mean[j] = 0;
    for (int64_t t = 1; t < rows; t++)
        for (int64_t j = 0; j < n; j++) top[j] = s[t * n + j] > top[j] ? s[t * n + j] : top[j];
    for (int64_t t = 0; t < rows; t++)
        for (int64_t j = 0; j < n; j++) {
            const T e = exp_of((s[t * n + j] - top[j]) / temperature);
            sum[j] += e, mean[j] += e * s[t * n + j];
        }
    for (int64_t j = 0; j < n; j++) mean[j] /= sum[j];
}

// The gradient of column_softmax_, in place of s; grad (n): of the means. Returns that of the temperature.
template <class T>
static INLINE T column_softmax_grad_(T* __restrict s, int64_t rows, int64_t n, T temperature, const T* __restrict top,
                                     const T* __restrict sum, const T* __restrict mean, const T* __restrict grad,
                                     T* __restrict of_temperature) {
    for (int64_t j = 0; j < n; j++) of_temperature[j] = 0;
    for (int64_t t = 0; t < rows; t++)
        for (int64_t j = 0; j < n; j++) {
            const T x = s[t * n + j], share = exp_of((x - top[j]) / temperature) / sum[j] * grad[j];
            s[t * n + j] = share * (1 + (x - mean[j]) / temperature);
            of_temperature[j] -= share * (x - mean[j]) * x;
        }
    T all = 0;
    for (int64_t j = 0; j < n; j++) all += of_temperature[j];
    return all / (temperature * temperature);
}

// float for every processor; double, for checks, as it comes.
#define FOR_EVERY_CPU(T)                                                                                                           \
    EVERY_CPU static void column_max(const T* s, int64_t rows, int64_t n, T* top, int32_t* at) {                                   \
        column_max_(s, rows, n, top, at);                                                                                          \
    }                                                                                                                              \
    EVERY_CPU static void column_softmax(const T* s, int64_t rows, int64_t n, T temperature, T* top, T* sum, T* mean) {            \
        column_softmax_(s, rows, n, temperature, top, sum, mean);                                                                  \
    }                                                                                                                              \
    EVERY_CPU static T column_softmax_grad(T* s, int64_t rows, int64_t n, T temperature, const T* top, const T* sum, const T* mean, \
                                           const T* grad, T* of_temperature) {                                                     \
        return column_softmax_grad_(s, rows, n, temperature, top, sum, mean, grad, of_temperature);                                \
    }                                                                                                                              \
    EVERY_CPU static void add(T factor, const T* __restrict x, int64_t n, T* __restrict y) {                                       \
        for (int64_t i = 0; i < n; i++) y[i] += factor * x[i];                                                                     \
    }
FOR_EVERY_CPU(float)
FOR_EVERY_CPU(double)

// ---- blocks of scores ------------------------------------------------------------------------------------------------

constexpr int64_t COLUMNS = 512;  // words of a block: with 128 tokens the scores are 256 KB

// Calls reduce(scores (T', n), ECG, texts from, to) with the scores of every ECG and every block of texts, on all threads.
template <class T, class Reduce>
static void for_every_block(const Tensor& tokens, const std::vector<int64_t>& token_count, const Packed& words, Reduce reduce) {
    std::vector<int64_t> ends;
    const int64_t texts = words.starts.size() - 1, records = tokens.size(0);
    for (int64_t c = 0; c < texts; c = ends.back()) ends.push_back(words.block_end(c, COLUMNS));
    int64_t widest = 0;
    for (size_t i = 0; i < ends.size(); i++) widest = std::max(widest, words.starts[ends[i]] - words.starts[i ? ends[i - 1] : 0]);
    const Tensor columns = words.rows.t();
    at::parallel_for(0, records * int64_t(ends.size()), 1, [&](int64_t begin, int64_t end) {
        const c10::NoGradGuard guard;
        const Tensor room = at::empty({tokens.size(1) * widest}, tokens.options());
        for (int64_t task = begin; task < end; task++) {
            const int64_t b = task / ends.size(), i = task % ends.size(), from = i ? ends[i - 1] : 0;
            const int64_t n = words.starts[ends[i]] - words.starts[from];
            if (!n || !token_count[b]) continue;
            Tensor scores = room.narrow(0, 0, token_count[b] * n).view({token_count[b], n});
            at::mm_out(scores, tokens[b].narrow(0, 0, token_count[b]), columns.narrow(1, words.starts[from], n));
            reduce(scores.template mutable_data_ptr<T>(), n, b, from, ends[i]);
        }
    });
}

template <class T>
static std::tuple<Tensor, Tensor> token_forward(const Tensor& tokens, const Tensor& words, const Tensor& token_count,
                                                const Tensor& word_count, const std::optional<Tensor>& temperature) {
    const int64_t records = tokens.size(0), texts = words.size(0), most = words.size(1);
    const std::vector<int64_t> tc = counts_of(token_count, tokens.size(1));
    const Packed packed(words, counts_of(word_count, most));
    Tensor similarity = at::zeros({records, texts}, tokens.options());
    const auto places = tokens.options().dtype(at::kShort);
    Tensor best = temperature ? at::zeros({0}, places) : at::zeros({records, texts, most}, places);
    T* out = similarity.mutable_data_ptr<T>();
    int16_t* chosen = temperature ? nullptr : best.mutable_data_ptr<int16_t>();
    const T warm = temperature ? temperature->item<T>() : T(0);
    for_every_block<T>(tokens, tc, packed, [&](const T* scores, int64_t n, int64_t b, int64_t from, int64_t to) {
        std::vector<T> value(n), top(temperature ? n : 0), sum(temperature ? n : 0);
        std::vector<int32_t> at(temperature ? 0 : n);
        if (temperature) column_softmax(scores, tc[b], n, warm, top.data(), sum.data(), value.data());
        else column_max(scores, tc[b], n, value.data(), at.data());
        for (int64_t c = from, j = 0; c < to; c++) {
            const int64_t count = packed.starts[c + 1] - packed.starts[c];
            T whole = 0;
            for (int64_t w = 0; w < count; w++, j++) {
                whole += value[j];
                if (chosen) chosen[(b * texts + c) * most + w] = int16_t(at[j]);
            }
            out[b * texts + c] = count ? whole / T(count) : T(0);
        }
    });
    return {similarity, best};
}

template <class T>
static std::tuple<Tensor, Tensor, Tensor> token_backward(const Tensor& grad, const Tensor& tokens, const Tensor& words,
                                                         const Tensor& token_count, const Tensor& word_count,
                                                         const std::optional<Tensor>& temperature, const Tensor& best) {
    const int64_t records = tokens.size(0), texts = words.size(0), most = words.size(1);
    const int64_t length = tokens.size(1), dim = tokens.size(2);
    const std::vector<int64_t> tc = counts_of(token_count, length), wc = counts_of(word_count, most);
    Tensor of_tokens = at::zeros_like(tokens), of_words = at::zeros_like(words), of_temperature = at::zeros({}, tokens.options());
    const T *g = grad.const_data_ptr<T>(), *x = tokens.const_data_ptr<T>(), *y = words.const_data_ptr<T>();
    T *dx = of_tokens.mutable_data_ptr<T>(), *dy = of_words.mutable_data_ptr<T>();
    if (!temperature) {  // a word's gradient goes to the token it took, and back
        const int16_t* chosen = best.const_data_ptr<int16_t>();
        const auto pair = [&](int64_t b, int64_t c, bool to_tokens) {
            if (!tc[b] || !wc[c]) return;
            const T factor = g[b * texts + c] / T(wc[c]);
            for (int64_t w = 0; w < wc[c]; w++) {
                const int64_t t = (b * length + chosen[(b * texts + c) * most + w]) * dim, u = (c * most + w) * dim;
                if (to_tokens) add(factor, y + u, dim, dx + t);
                else add(factor, x + t, dim, dy + u);
            }
        };
        at::parallel_for(0, records, 1, [&](int64_t begin, int64_t end) {
            for (int64_t b = begin; b < end; b++) for (int64_t c = 0; c < texts; c++) pair(b, c, true);
        });
        at::parallel_for(0, texts, 1, [&](int64_t begin, int64_t end) {
            for (int64_t c = begin; c < end; c++) for (int64_t b = 0; b < records; b++) pair(b, c, false);
        });
        return {of_tokens, of_words, of_temperature};
    }
    // Scores become their gradients block by block; the products with them use all threads.
    const Packed packed(words, wc);
    const T warm = temperature->item<T>();
    Tensor of_packed = at::zeros_like(packed.rows);
    T all = 0;
    for (int64_t from = 0, to; from < texts; from = to) {
        to = packed.block_end(from, 2048);
        const int64_t n = packed.starts[to] - packed.starts[from];
        if (!n) continue;
        const Tensor rows = packed.rows.narrow(0, packed.starts[from], n);
        std::vector<T> top(n), sum(n), mean(n), share(n), spare(n);
        for (int64_t b = 0; b < records; b++) {
            if (!tc[b]) continue;
            const Tensor mine = tokens[b].narrow(0, 0, tc[b]);
            Tensor scores = at::mm(mine, rows.t());
            T* s = scores.mutable_data_ptr<T>();
            for (int64_t c = from, j = 0; c < to; c++)
                for (int64_t w = 0; w < wc[c]; w++) share[j++] = g[b * texts + c] / T(wc[c]);
            column_softmax(s, tc[b], n, warm, top.data(), sum.data(), mean.data());
            all += column_softmax_grad(s, tc[b], n, warm, top.data(), sum.data(), mean.data(), share.data(), spare.data());
            of_tokens[b].narrow(0, 0, tc[b]).addmm_(scores, rows);
            of_packed.narrow(0, packed.starts[from], n).addmm_(scores.t(), mine);
        }
    }
    of_temperature.fill_(all);
    return {of_tokens, packed.unpack(of_packed, words), of_temperature};
}

// ---- types ----------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> token_similarity(const Tensor& tokens, const Tensor& words, const Tensor& token_count,
                                            const Tensor& word_count, const std::optional<Tensor>& temperature) {
    return tokens.scalar_type() == at::kDouble ? token_forward<double>(tokens, words, token_count, word_count, temperature)
                                               : token_forward<float>(tokens, words, token_count, word_count, temperature);
}

std::tuple<Tensor, Tensor, Tensor> token_similarity_backward(const Tensor& grad, const Tensor& tokens, const Tensor& words,
                                                             const Tensor& token_count, const Tensor& word_count,
                                                             const std::optional<Tensor>& temperature, const Tensor& best) {
    return tokens.scalar_type() == at::kDouble
        ? token_backward<double>(grad, tokens, words, token_count, word_count, temperature, best)
        : token_backward<float>(grad, tokens, words, token_count, word_count, temperature, best);
}

}  // namespace similarity
