// token_similarity and beat_similarity on the CPU, forward and backward. What they compute: similarity.py.
//
// Scores are made by matrix products in blocks that fit into the caches, reduced at once and forgotten; there is no tensor of ECG x
// text x token x word. Texts are ragged, so their words (sentences) are packed first, without the padding. The backward pass of the
// token scale knows which token each word took; that of the beat scale makes the scores again.
#include "similarity.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu.h"

namespace similarity {

using at::Tensor;

// ---- ragged texts ---------------------------------------------------------------------------------------------------

static std::vector<int64_t> counts_of(const Tensor& count, int64_t most) {
    const Tensor whole = count.to(at::kLong).clamp(0, most).contiguous();
    return {whole.const_data_ptr<int64_t>(), whole.const_data_ptr<int64_t>() + whole.numel()};
}

struct Rows {  // some rows of a padded tensor (C, most, D), and where they stand in it
    Tensor place, rows;  // (N,), (N, D)

    Rows() = default;
    Rows(const Tensor& padded, const std::vector<int64_t>& places)
        : place(at::tensor(places, at::kLong)), rows(padded.reshape({-1, padded.size(2)}).index_select(0, place)) {}
    Tensor unpack(const Tensor& packed, const Tensor& padded) const {  // (N, D) -> like padded, zeros where no row stands
        Tensor whole = at::zeros_like(padded);
        whole.view({-1, padded.size(2)}).index_copy_(0, place, packed);
        return whole;
    }
};

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

// ---- arithmetic -----------------------------------------------------------------------------------------------------

// exp within 2 ulp, in a form that compilers vectorise: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2].
static INLINE float exp_of(float x) {
    x = x < -87.f ? -87.f : x;
    x = x > 88.f ? 88.f : x;
    const float shifted = x * 1.44269504f + 12582912.f, n = shifted - 12582912.f;  // rounds to the nearest integer
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f, y = y * r + 8.3334519073e-3f, y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f, y = y * r + 5.0000001201e-1f, y = y * r * r + r + 1.f;
    int32_t bits;
    memcpy(&bits, &shifted, 4);
    const int32_t power = (bits + (127 - 0x4B400000)) << 23;
    float scale;
    memcpy(&scale, &power, 4);
    return y * scale;
}
static INLINE double exp_of(double x) { return std::exp(x); }

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

// Texts of as many sentences stand side by side: first their first sentences, then their second ones; so loops over texts are vectors.
struct Group { int64_t first_column, sentences, texts, first_text; };  // first_text: in the order of BeatRow::similarity

// One ECG and all texts at the beat scale. Rows of n columns, a sentence each.
template <class T> struct BeatRow {
    int64_t beats, n;
    const std::vector<Group>* groups;
    T temperature, sharpness;  // of the attention over beats; of the sum over sentences
    bool over_sentences, mean;
    const T *gram, *norm;      // (beats, beats); length of every sentence
    std::vector<T> memory;
    T *p, *a, *along, *dz;                                      // (beats, n): softmax over sentences, over beats, gram times it
    T *up, *square, *root, *cosine, *share, *column, *column2;  // (n)
    T *similarity, *grad;                                       // (texts), in the order of the groups

    void room() {
        memory.resize(4 * beats * n + 9 * n);
        T* next = memory.data();
        for (T** rows : {&p, &a, &along, &dz}) *rows = next, next += beats * n;
        for (T** row : {&up, &square, &root, &cosine, &share, &column, &column2, &similarity, &grad}) *row = next, next += n;
    }
};

constexpr double SMALLEST = 1e-8;  // of a product of lengths, as torch.cosine_similarity has it

// sum of x * y * z, in an order that vectors like
template <class T>
static INLINE T sum_of_products(const T* __restrict x, const T* __restrict y, const T* __restrict z, int64_t n) {
    constexpr int LANES = 16;
    T lanes[LANES] = {}, sum = 0;
    for (int64_t j = 0; j + LANES <= n; j += LANES)
        for (int l = 0; l < LANES; l++) lanes[l] += x[j + l] * y[j + l] * z[j + l];
    for (int64_t j = n / LANES * LANES; j < n; j++) sum += x[j] * y[j] * z[j];
    for (int l = 0; l < LANES; l++) sum += lanes[l];
    return sum;
}

// x (n), a column a sentence -> softmax over the sentences of each text, in place; the largest and the sum of exp -> top and all.
template <class T>
static INLINE void softmax_over_texts(T* __restrict x, const std::vector<Group>& groups, int64_t n, T* __restrict top,
                                      T* __restrict all) {
    for (const Group& g : groups) {
        T *__restrict y = x + g.first_column, *__restrict t = top + g.first_text;
        for (int64_t i = 0; i < g.texts; i++) t[i] = y[i];
        for (int64_t s = 1; s < g.sentences; s++)
            for (int64_t i = 0; i < g.texts; i++) t[i] = y[s * g.texts + i] > t[i] ? y[s * g.texts + i] : t[i];
        for (int64_t s = 0; s < g.sentences; s++)
            for (int64_t i = 0; i < g.texts; i++) y[s * g.texts + i] -= t[i];
    }
    for (int64_t j = 0; j < n; j++) x[j] = exp_of(x[j]);
    for (const Group& g : groups) {
        T *__restrict y = x + g.first_column, *__restrict sum = all + g.first_text;
        for (int64_t i = 0; i < g.texts; i++) sum[i] = y[i];
        for (int64_t s = 1; s < g.sentences; s++)
            for (int64_t i = 0; i < g.texts; i++) sum[i] += y[s * g.texts + i];
        for (int64_t s = 0; s < g.sentences; s++)
            for (int64_t i = 0; i < g.texts; i++) y[s * g.texts + i] /= sum[i];
    }
}

// x (beats, n): scores. -> r.similarity
template <class T> static INLINE void beat_forward_(BeatRow<T>& r, const T* __restrict x) {
    const int64_t beats = r.beats, n = r.n;
    T *__restrict p = r.p, *__restrict a = r.a, *__restrict along = r.along;
    T *__restrict top = r.column, *__restrict sum = r.column2;
    std::copy_n(x, beats * n, p);
    if (r.over_sentences) for (int64_t k = 0; k < beats; k++) softmax_over_texts(p + k * n, *r.groups, n, top, sum);
    for (int64_t j = 0; j < n; j++) top[j] = r.temperature * p[j], sum[j] = 0;
    for (int64_t k = 1; k < beats; k++)
        for (int64_t j = 0; j < n; j++) { const T z = r.temperature * p[k * n + j]; top[j] = z > top[j] ? z : top[j]; }
    for (int64_t k = 0; k < beats; k++)
        for (int64_t j = 0; j < n; j++) sum[j] += a[k * n + j] = exp_of(r.temperature * p[k * n + j] - top[j]);
    T *__restrict up = r.up, *__restrict square = r.square, *__restrict root = r.root;
    T *__restrict cosine = r.cosine, *__restrict share = r.share;
    for (int64_t j = 0; j < n; j++) up[j] = square[j] = 0, sum[j] = 1 / sum[j];
    for (int64_t k = 0; k < beats; k++)
        for (int64_t j = 0; j < n; j++) a[k * n + j] *= sum[j], up[j] += a[k * n + j] * x[k * n + j];
    for (int64_t k = 0; k < beats; k++) {
        for (int64_t j = 0; j < n; j++) along[k * n + j] = 0;
        for (int64_t l = 0; l < beats; l++)
            for (int64_t j = 0; j < n; j++) along[k * n + j] += r.gram[k * beats + l] * a[l * n + j];
        for (int64_t j = 0; j < n; j++) square[j] += a[k * n + j] * along[k * n + j];
    }
    for (int64_t j = 0; j < n; j++) {
        root[j] = std::sqrt(square[j] > 0 ? square[j] : T(0));
        const T lengths = root[j] * r.norm[j];
        cosine[j] = up[j] / (lengths > T(SMALLEST) ? lengths : T(SMALLEST));
        share[j] = r.sharpness * cosine[j];
    }
    softmax_over_texts(share, *r.groups, n, top, sum);  // its sums are the result, its shares the gradient
    for (const Group& g : *r.groups)
        for (int64_t i = g.first_text; i < g.first_text + g.texts; i++)
            r.similarity[i] = top[i] + std::log(r.mean ? sum[i] / T(g.sentences) : sum[i]);
}

// The same, then the gradient: of the scores in place of x, of the Gram matrix and of the sentences' lengths. r.grad: of r.similarity.
template <class T>
static INLINE void beat_backward_(BeatRow<T>& r, T* __restrict x, T* __restrict of_gram, T* __restrict of_norm, T* of_temperature,
                                  T* of_sharpness) {
    beat_forward_(r, static_cast<const T*>(x));
    const int64_t beats = r.beats, n = r.n;
    T *__restrict p = r.p, *__restrict a = r.a, *__restrict along = r.along, *__restrict dz = r.dz;
    T *__restrict of_up = r.up, *__restrict of_square = r.square, *__restrict inner = r.column, *__restrict of_z = r.column2;
    for (const Group& g : *r.groups)
        for (int64_t s = 0; s < g.sentences; s++)
            for (int64_t i = 0; i < g.texts; i++) r.share[g.first_column + s * g.texts + i] *= r.grad[g.first_text + i];
    const T *__restrict share = r.share, *__restrict cosine = r.cosine, *__restrict root = r.root, *__restrict norm = r.norm;
    for (int64_t j = 0; j < n; j++) *of_sharpness += share[j] * cosine[j];
    for (int64_t j = 0; j < n; j++) {
        const T lengths = root[j] * norm[j], d = share[j] * r.sharpness;  // gradient of the cosine
        const bool large = lengths > T(SMALLEST);
        of_up[j] = d / (large ? lengths : T(SMALLEST));
        of_square[j] = large ? -d * cosine[j] / (root[j] * root[j]) : T(0);  // twice that of the squared length
        of_norm[j] = large ? -d * cosine[j] / norm[j] : T(0);
    }
    for (int64_t j = 0; j < n; j++) inner[j] = of_z[j] = 0;
    for (int64_t k = 0; k < beats; k++)
        for (int64_t l = 0; l <= k; l++)  // twice the gradient: what the beats get
            of_gram[k * beats + l] = of_gram[l * beats + k] = sum_of_products(of_square, a + k * n, a + l * n, n);
    for (int64_t k = 0; k < beats; k++) {
        T *__restrict xk = x + k * n, *__restrict dk = dz + k * n;
        const T *__restrict ak = a + k * n, *__restrict lk = along + k * n;
        for (int64_t j = 0; j < n; j++) dk[j] = of_up[j] * xk[j] + of_square[j] * lk[j];
        for (int64_t j = 0; j < n; j++) inner[j] += ak[j] * dk[j], xk[j] = of_up[j] * ak[j];
    }
    for (int64_t k = 0; k < beats; k++) {
        T* __restrict dk = dz + k * n;
        const T *__restrict ak = a + k * n, *__restrict pk = p + k * n;
        for (int64_t j = 0; j < n; j++) {
            const T d = ak[j] * (dk[j] - inner[j]);
            of_z[j] += d * pk[j];
            dk[j] = r.temperature * d;  // gradient of p
        }
    }
    for (int64_t j = 0; j < n; j++) *of_temperature += of_z[j];
    for (int64_t k = 0; k < beats; k++) {
        if (r.over_sentences)
            for (const Group& g : *r.groups) {
                T *__restrict q = p + k * n + g.first_column, *__restrict d = dz + k * n + g.first_column;
                T* __restrict whole = inner;
                for (int64_t i = 0; i < g.texts; i++) whole[i] = q[i] * d[i];
                for (int64_t s = 1; s < g.sentences; s++)
                    for (int64_t i = 0; i < g.texts; i++) whole[i] += q[s * g.texts + i] * d[s * g.texts + i];
                for (int64_t s = 0; s < g.sentences; s++)
                    for (int64_t i = 0; i < g.texts; i++)
                        d[s * g.texts + i] = q[s * g.texts + i] * (d[s * g.texts + i] - whole[i]);
            }
        for (int64_t j = 0; j < n; j++) x[k * n + j] += dz[k * n + j];
    }
}

// float for every processor; double, for checks, as it comes.
#define FOR_EVERY_CPU(T)                                                                                                          \
    EVERY_CPU static void column_max(const T* s, int64_t rows, int64_t n, T* top, int32_t* at) { column_max_(s, rows, n, top, at); } \
    EVERY_CPU static void column_softmax(const T* s, int64_t rows, int64_t n, T temperature, T* top, T* sum, T* mean) {           \
        column_softmax_(s, rows, n, temperature, top, sum, mean);                                                                 \
    }                                                                                                                             \
    EVERY_CPU static T column_softmax_grad(T* s, int64_t rows, int64_t n, T temperature, const T* top, const T* sum, const T* mean, \
                                           const T* grad, T* of_temperature) {                                                    \
        return column_softmax_grad_(s, rows, n, temperature, top, sum, mean, grad, of_temperature);                               \
    }                                                                                                                             \
    EVERY_CPU static void beat_forward(BeatRow<T>& r, const T* x) { beat_forward_(r, x); }                                        \
    EVERY_CPU static void beat_backward(BeatRow<T>& r, T* x, T* of_gram, T* of_norm, T* of_temperature, T* of_sharpness) {        \
        beat_backward_(r, x, of_gram, of_norm, of_temperature, of_sharpness);                                                     \
    }                                                                                                                             \
    EVERY_CPU static void add(T factor, const T* __restrict x, int64_t n, T* __restrict y) {                                      \
        for (int64_t i = 0; i < n; i++) y[i] += factor * x[i];                                                                    \
    }
FOR_EVERY_CPU(float)
FOR_EVERY_CPU(double)

// ---- token scale ----------------------------------------------------------------------------------------------------

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

// ---- beat scale -----------------------------------------------------------------------------------------------------

template <class T> struct Beats : Rows {  // rows: the sentences, by groups
    Tensor beats, gram, norm;
    std::vector<int64_t> counts, order;  // order: which text is the i-th
    std::vector<Group> groups;
    T temperature, sharpness;
    bool over_sentences, mean;

    Beats(const Tensor& beats, const Tensor& sentences, const Tensor& beat_count, const Tensor& sentence_count,
          const Tensor& temperatures, bool over_sentences, bool mean)
        : beats(beats), gram(at::bmm(beats, beats.transpose(1, 2))), counts(counts_of(beat_count, beats.size(1))),
          over_sentences(over_sentences), mean(mean) {
        const int64_t most = sentences.size(1);
        const std::vector<int64_t> sizes = counts_of(sentence_count, most);
        std::vector<int64_t> places;
        for (int64_t size = 1; size <= most; size++) {
            const int64_t first = order.size();
            for (size_t c = 0; c < sizes.size(); c++) if (sizes[c] == size) order.push_back(c);
            const int64_t texts = order.size() - first;
            if (texts) groups.push_back({int64_t(places.size()), size, texts, first});
            for (int64_t s = 0; s < size; s++)
                for (int64_t i = 0; i < texts; i++) places.push_back(order[first + i] * most + s);
        }
        static_cast<Rows&>(*this) = Rows(sentences, places);
        norm = rows.norm(2, 1);
        const Tensor both = temperatures.to(beats.scalar_type()).contiguous();
        temperature = both.const_data_ptr<T>()[0], sharpness = both.const_data_ptr<T>()[1];
    }

    // Calls row(its scores (K, N), ECG, BeatRow) for every ECG that has beats, on all threads; done(scores (ECGs * K, N), first ECG)
    // after every block of ECGs whose scores fit into a cache.
    template <class Row, class Done> void for_every_ecg(Row row, Done done) const {
        const int64_t records = beats.size(0), most = beats.size(1), n = rows.size(0);
        const int64_t step = std::max<int64_t>(1, (1 << 20) / std::max<int64_t>(1, most * n));
        for (int64_t first = 0; first < records && n && most; first += step) {
            const int64_t ecgs = std::min(step, records - first);
            const Tensor scores = at::mm(beats.narrow(0, first, ecgs).reshape({ecgs * most, beats.size(2)}), rows.t());
            T* s = scores.template mutable_data_ptr<T>();
            at::parallel_for(0, ecgs, 1, [&](int64_t begin, int64_t end) {
                BeatRow<T> r{0, n, &groups, temperature, sharpness, over_sentences, mean};
                std::vector<T> square(most * most);
                for (int64_t b = first + begin; b < first + end; b++) {
                    const int64_t k = counts[b];
                    if (!k) continue;
                    const T* whole = gram.template const_data_ptr<T>() + b * most * most;
                    for (int64_t j = 0; j < k; j++) std::copy_n(whole + j * most, k, square.data() + j * k);
                    r.beats = k, r.gram = square.data(), r.norm = norm.template const_data_ptr<T>();
                    r.room();
                    row(r, s + (b - first) * most * n, b);
                }
            });
            done(scores, first);
        }
    }
};

template <class T>
static Tensor beat_forward(const Tensor& beats, const Tensor& sentences, const Tensor& beat_count, const Tensor& sentence_count,
                           const Tensor& temperatures, bool over_sentences, bool mean) {
    const Beats<T> all(beats, sentences, beat_count, sentence_count, temperatures, over_sentences, mean);
    const int64_t texts = sentences.size(0);
    Tensor similarity = at::zeros({beats.size(0), texts}, beats.options());
    T* out = similarity.mutable_data_ptr<T>();
    all.for_every_ecg([&](BeatRow<T>& r, T* x, int64_t b) {
        beat_forward(r, x);
        for (size_t i = 0; i < all.order.size(); i++) out[b * texts + all.order[i]] = r.similarity[i];
    }, [](const Tensor&, int64_t) {});
    return similarity;
}

template <class T>
static std::tuple<Tensor, Tensor, Tensor> beat_backward(const Tensor& grad, const Tensor& beats, const Tensor& sentences,
                                                        const Tensor& beat_count, const Tensor& sentence_count,
                                                        const Tensor& temperatures, bool over_sentences, bool mean) {
    const Beats<T> all(beats, sentences, beat_count, sentence_count, temperatures, over_sentences, mean);
    const int64_t records = beats.size(0), most = beats.size(1), dim = beats.size(2);
    const int64_t n = all.rows.size(0), texts = sentences.size(0);
    Tensor of_beats = at::zeros_like(beats), of_rows = at::zeros_like(all.rows), of_gram = at::zeros_like(all.gram);
    Tensor of_norm = at::zeros({records, n}, beats.options()), of_both = at::zeros({records, 2}, beats.options());
    const T* g = grad.const_data_ptr<T>();
    T *dg = of_gram.mutable_data_ptr<T>(), *dn = of_norm.mutable_data_ptr<T>(), *both = of_both.mutable_data_ptr<T>();
    all.for_every_ecg([&](BeatRow<T>& r, T* x, int64_t b) {
        std::vector<T> square(r.beats * r.beats);
        for (size_t i = 0; i < all.order.size(); i++) r.grad[i] = g[b * texts + all.order[i]];
        beat_backward(r, x, square.data(), dn + b * n, both + 2 * b, both + 2 * b + 1);
        for (int64_t k = 0; k < r.beats; k++) std::copy_n(square.data() + k * r.beats, r.beats, dg + (b * most + k) * most);
    }, [&](const Tensor& scores, int64_t first) {  // they are gradients now
        const int64_t ecgs = scores.size(0) / most;
        for (int64_t i = 0; i < ecgs; i++) {
            const int64_t count = all.counts[first + i];
            if (count < most) scores.narrow(0, i * most + count, most - count).zero_();
        }
        of_beats.narrow(0, first, ecgs).view({ecgs * most, dim}).addmm_(scores, all.rows);
        of_rows.addmm_(scores.t(), beats.narrow(0, first, ecgs).reshape({ecgs * most, dim}));
    });
    of_beats.baddbmm_(of_gram, beats);
    of_rows.add_(all.rows * (of_norm.sum(0) / all.norm.clamp_min(SMALLEST)).unsqueeze(1));
    return {of_beats, all.unpack(of_rows, sentences), of_both.sum(0)};
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

Tensor beat_similarity(const Tensor& beats, const Tensor& sentences, const Tensor& beat_count, const Tensor& sentence_count,
                       const Tensor& temperatures, bool over_sentences, bool mean) {
    return beats.scalar_type() == at::kDouble
        ? beat_forward<double>(beats, sentences, beat_count, sentence_count, temperatures, over_sentences, mean)
        : beat_forward<float>(beats, sentences, beat_count, sentence_count, temperatures, over_sentences, mean);
}

std::tuple<Tensor, Tensor, Tensor> beat_similarity_backward(const Tensor& grad, const Tensor& beats, const Tensor& sentences,
                                                            const Tensor& beat_count, const Tensor& sentence_count,
                                                            const Tensor& temperatures, bool over_sentences, bool mean) {
    return beats.scalar_type() == at::kDouble
        ? beat_backward<double>(grad, beats, sentences, beat_count, sentence_count, temperatures, over_sentences, mean)
        : beat_backward<float>(grad, beats, sentences, beat_count, sentence_count, temperatures, over_sentences, mean);
}

}  // namespace similarity
