// token_similarity and beat_similarity on the CPU, forward and backward. What they compute: similarity.py.
//
// Scores are made by matrix products in blocks that fit into the caches, reduced at once and forgotten; there is no tensor of ECG x
// text x token x word. Texts are ragged, so their words (sentences) are packed first, without the padding. The backward pass of the
// token scale knows which token each word took; that of the beat scale is given the scores if they are few, and else makes them again.
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

#pragma GCC optimize("fp-contract=fast")  // fused multiply-add, which CFLAGS forbids for the sake of the beats

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

constexpr int LANES = 8;
template <class T> struct VectorOf { typedef T type __attribute__((vector_size(LANES * sizeof(T)))); };  // GCC's and Clang's
template <class T> using Vector = typename VectorOf<T>::type;

template <class V> static INLINE V larger(V x, V y) { return x > y ? x : y; }  // a NaN in y is not lost
template <class T> static INLINE Vector<T> load(const T* from) {
    Vector<T> x;
    memcpy(&x, from, sizeof x);
    return x;
}
template <class T> static INLINE void store(T* to, Vector<T> x) { memcpy(to, &x, sizeof x); }

template <class T> static INLINE T dot_(const T* x, const T* y, int64_t n) {
    Vector<T> sums{};
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES) sums += load(x + j) * load(y + j);
    T sum = 0;
    for (int l = 0; l < LANES; l++) sum += sums[l];
    for (; j < n; j++) sum += x[j] * y[j];
    return sum;
}

// exp within 2 ulp: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]. V: float, or a vector of them; W: whole numbers of that size.
template <class V, class W> static INLINE V exp_by_polynomial(V x) {
    x = larger(V{} - 87.f, x);
    x = x > V{} + 88.f ? V{} + 88.f : x;
    const V shifted = x * 1.44269504f + 12582912.f, n = shifted - 12582912.f;  // rounds to the nearest integer
    const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    V y = r * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f, y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f, y = y * r + 5.0000001201e-1f, y = y * r * r + r + 1.f;
    W bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + (127 - 0x4B400000)) << 23;
    V scale;
    memcpy(&scale, &bits, sizeof scale);
    return y * scale;
}
static INLINE float exp_of(float x) { return exp_by_polynomial<float, int32_t>(x); }
static INLINE double exp_of(double x) { return std::exp(x); }
static INLINE Vector<float> exp_of(Vector<float> x) { return exp_by_polynomial<Vector<float>, Vector<int32_t>>(x); }
static INLINE Vector<double> exp_of(Vector<double> x) {
    for (int i = 0; i < LANES; i++) x[i] = std::exp(x[i]);
    return x;
}

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

// Some texts of equally many sentences; their columns in the scores: all first sentences, then all second ones.
struct Group { int64_t first_column, sentences, texts, first_text; };  // first_text: in the order of the groups

// One ECG and one group of texts at the beat scale. A row has a column for each sentence, as in Group, but the texts filled up to whole
// vectors (`wide`). All rows together fit into a fast cache.
template <class T> struct Attention {
    int64_t beats, sentences, texts, wide, n;  // n = sentences * wide
    T temperature, sharpness;                  // of the attention over beats; of the sum over sentences
    bool over_sentences, mean;
    const T* gram;                             // (beats, beats)
    T *x, *p, *a, *along;                      // (beats, n): scores, softmax over sentences, over beats, gram times that
    T *norm, *logit, *root, *cosine, *share;   // (n); norm: length of every sentence, root: of every attended beat
    T *similarity, *grad;                      // (wide)
    T *of_square, *of_norm;                    // (n): gradients, the first of twice the attended beat's squared length

    static int64_t room(int64_t beats, int64_t widest) { return (4 * beats + 9) * widest; }
    void use(T* memory) {
        wide = (texts + LANES - 1) / LANES * LANES, n = sentences * wide;
        for (T** some : {&x, &p, &a, &along}) *some = memory, memory += beats * n;
        for (T** one : {&norm, &logit, &root, &cosine, &share, &similarity, &grad, &of_square, &of_norm}) *one = memory, memory += n;
        if (!over_sentences) p = x;
    }
};

// Rows of scores, `stride` apart, to rows of Attention, with zeros behind the texts; and back.
template <class T> static INLINE void spread_(const Attention<T>& r, const T* from, int64_t stride, int64_t rows, T* to) {
    for (int64_t k = 0; k < rows; k++, from += stride)
        for (int64_t s = 0; s < r.sentences; s++, to += r.wide) {
            store(to + r.wide - LANES, Vector<T>{});
            for (int64_t i = 0; i < r.texts; i++) to[i] = from[s * r.texts + i];
        }
}
template <class T> static INLINE void gather_(const Attention<T>& r, const T* from, int64_t rows, T* to, int64_t stride) {
    for (int64_t k = 0; k < rows; k++, to += stride)
        for (int64_t s = 0; s < r.sentences; s++, from += r.wide)
            for (int64_t i = 0; i < r.texts; i++) to[s * r.texts + i] = from[i];
}

constexpr double SMALLEST = 1e-8;  // of a product of lengths, as torch.cosine_similarity has it

// x (rows, sentences, wide) -> y: softmax over the sentences of each text. top, sum: the largest, and the sum of exp, of the last row.
template <class T>
static INLINE void softmax_over_sentences(const Attention<T>& r, const T* x, int64_t rows, T* y, T* top, T* sum) {
    const int64_t n = r.n, wide = r.wide;
    for (int64_t k = 0; k < rows * n; k += n)
        for (int64_t i = k; i < k + wide; i += LANES) {
            Vector<T> largest = load(x + i);
            for (int64_t s = i + wide; s < k + n; s += wide) largest = larger(load(x + s), largest);
            for (int64_t s = i; s < k + n; s += wide) store(y + s, load(x + s) - largest);
            store(top + i - k, largest);
        }
    for (int64_t j = 0; j < rows * n; j += LANES) store(y + j, exp_of(load(y + j)));
    for (int64_t k = 0; k < rows * n; k += n)
        for (int64_t i = k; i < k + wide; i += LANES) {
            Vector<T> all{};
            for (int64_t s = i; s < k + n; s += wide) all += load(y + s);
            const Vector<T> part = T(1) / all;
            for (int64_t s = i; s < k + n; s += wide) store(y + s, load(y + s) * part);
            store(sum + i - k, all);
        }
}

// From r.x to r.similarity.
template <class T> static INLINE void beat_forward_(const Attention<T>& r) {
    using V = Vector<T>;
    const int64_t beats = r.beats, n = r.n;
    T *top = r.of_square, *sum = r.of_norm;  // not yet in use
    if (r.over_sentences) softmax_over_sentences(r, r.x, beats, r.p, top, sum);
    for (int64_t j = 0; j < n; j += LANES) {
        const T *x = r.x + j, *p = r.p + j;
        T *a = r.a + j, *along = r.along + j;
        V largest = r.temperature * load(p), all{};
        for (int64_t k = 1; k < beats; k++) largest = larger(r.temperature * load(p + k * n), largest);
        for (int64_t k = 0; k < beats; k++) {
            const V e = exp_of(r.temperature * load(p + k * n) - largest);
            store(a + k * n, e), all += e;
        }
        const V part = T(1) / all;
        V up{}, square{};
        for (int64_t k = 0; k < beats; k++) {
            const V share = load(a + k * n) * part;
            store(a + k * n, share), up += share * load(x + k * n);
        }
        for (int64_t k = 0; k < beats; k++) {
            V even{}, odd{};
            for (int64_t m = 0; m + 1 < beats; m += 2) {
                even += r.gram[k * beats + m] * load(a + m * n);
                odd += r.gram[k * beats + m + 1] * load(a + (m + 1) * n);
            }
            if (beats % 2) even += r.gram[k * beats + beats - 1] * load(a + (beats - 1) * n);
            even += odd;
            store(along + k * n, even), square += load(a + k * n) * even;
        }
        store(r.root + j, larger(square, V{})), store(r.logit + j, up);
    }
    for (int64_t j = 0; j < n; j++) {
        r.root[j] = std::sqrt(r.root[j]);
        const T lengths = r.root[j] * r.norm[j];
        r.cosine[j] = r.logit[j] / (lengths > T(SMALLEST) ? lengths : T(SMALLEST));
        r.logit[j] = r.sharpness * r.cosine[j];
    }
    softmax_over_sentences(r, r.logit, 1, r.share, top, sum);  // its sums are the result, its shares the gradient
    for (int64_t i = 0; i < r.texts; i++) r.similarity[i] = top[i] + std::log(r.mean ? sum[i] / T(r.sentences) : sum[i]);
}

// After beat_forward_: r.x becomes the gradient of the scores; those of the Gram matrix (twice), of temperature and sharpness are added
// up. r.grad: gradient of r.similarity, 0 where no text is.
template <class T> static INLINE void beat_backward_(const Attention<T>& r, T* of_gram, T* of_both) {
    using V = Vector<T>;
    const int64_t beats = r.beats, n = r.n;
    const V none{};
    V of_temperature{}, of_sharpness{};
    for (int64_t s = 0, j = 0; s < r.sentences; s++)
        for (int64_t i = 0; i < r.wide; i += LANES, j += LANES) {
            const V share = load(r.share + j) * load(r.grad + i), cosine = load(r.cosine + j);
            const V root = load(r.root + j), norm = load(r.norm + j), lengths = root * norm;
            const V d = share * r.sharpness;  // gradient of the cosine
            const auto large = lengths > V{} + T(SMALLEST);
            const V of_up = d / (large ? lengths : V{} + T(SMALLEST)), of_square = large ? -d * cosine / (root * root) : none;
            store(r.of_square + j, of_square), store(r.of_norm + j, large ? -d * cosine / norm : none);
            of_sharpness += share * cosine;
            T *x = r.x + j, *dz = r.along + j;
            const T *a = r.a + j, *p = r.p + j;
            V inner{};
            for (int64_t k = 0; k < beats; k++) {
                const V dk = of_up * load(x + k * n) + of_square * load(dz + k * n);
                store(dz + k * n, dk), inner += load(a + k * n) * dk;
            }
            for (int64_t k = 0; k < beats; k++) {
                const V ak = load(a + k * n), dk = ak * (load(dz + k * n) - inner);
                of_temperature += dk * load(p + k * n);
                store(dz + k * n, r.temperature * dk);  // gradient of p
                store(x + k * n, of_up * ak + (r.over_sentences ? none : r.temperature * dk));
            }
        }
    for (int l = 0; l < LANES; l++) of_both[0] += of_temperature[l], of_both[1] += of_sharpness[l];
    for (int64_t k = 0; k < beats; k++) {
        for (int64_t j = 0; j < n; j += LANES) store(r.logit + j, load(r.of_square + j) * load(r.a + k * n + j));
        for (int64_t m = 0; m <= k; m++) of_gram[k * beats + m] += dot_(r.logit, r.a + m * n, n);
    }
    if (r.over_sentences)
        for (int64_t k = 0; k < beats; k++)
            for (int64_t i = k * n; i < k * n + r.wide; i += LANES) {
                V whole{};
                for (int64_t s = i; s < i + n; s += r.wide) whole += load(r.p + s) * load(r.along + s);
                for (int64_t s = i; s < i + n; s += r.wide)
                    store(r.x + s, load(r.x + s) + load(r.p + s) * (load(r.along + s) - whole));
            }
}

// gram (rows, rows), x (rows, n): y += gram x
template <class T> static INLINE void add_product_(const T* gram, const T* x, int64_t rows, int64_t n, T* y) {
    for (int64_t k = 0; k < rows; k++, y += n) {
        int64_t j = 0;
        for (; j + LANES <= n; j += LANES) {
            Vector<T> sum = load(y + j);
            for (int64_t m = 0; m < rows; m++) sum += gram[k * rows + m] * load(x + m * n + j);
            store(y + j, sum);
        }
        for (; j < n; j++)
            for (int64_t m = 0; m < rows; m++) y[j] += gram[k * rows + m] * x[m * n + j];
    }
}

// x (rows, n) -> x x', (rows, rows)
template <class T> static INLINE void gram_(const T* x, int64_t rows, int64_t n, T* gram) {
    for (int64_t k = 0; k < rows; k++)
        for (int64_t m = 0; m <= k; m++) gram[k * rows + m] = gram[m * rows + k] = dot_(x + k * n, x + m * n, n);
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
    EVERY_CPU static void beat_forward(const Attention<T>& r) { beat_forward_(r); }                                               \
    EVERY_CPU static void beat_backward(const Attention<T>& r, T* of_gram, T* of_both) { beat_backward_(r, of_gram, of_both); }   \
    EVERY_CPU static void spread(const Attention<T>& r, const T* from, int64_t stride, int64_t rows, T* to) {                     \
        spread_(r, from, stride, rows, to);                                                                                       \
    }                                                                                                                             \
    EVERY_CPU static void gather(const Attention<T>& r, const T* from, int64_t rows, T* to, int64_t stride) {                     \
        gather_(r, from, rows, to, stride);                                                                                       \
    }                                                                                                                             \
    EVERY_CPU static void gram_of(const T* x, int64_t rows, int64_t n, T* gram) { gram_(x, rows, n, gram); }                      \
    EVERY_CPU static void add_product(const T* gram, const T* x, int64_t rows, int64_t n, T* y) { add_product_(gram, x, rows, n, y); } \
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

constexpr int64_t GROUP = 128;      // sentences of a group of texts: what one ECG has with them is about 32 KB
constexpr int64_t BLOCK = 1 << 17;  // scores of a block of ECGs: half a megabyte
constexpr int64_t SUMS = 1 << 24;   // numbers that all threads' sums may have together

template <class T> struct Beats : Rows {  // rows (N, D): the sentences, by groups
    Tensor beats, norm;
    std::vector<int64_t> counts, order;  // order: which text is the i-th
    std::vector<Group> groups;
    int64_t records, texts, most, dim, n, widest = 0;  // most: beats; widest: columns of a group, filled up
    Attention<T> common;

    Beats(const Tensor& beats, const Tensor& sentences, const Tensor& beat_count, const Tensor& sentence_count,
          const Tensor& temperatures, bool over_sentences, bool mean)
        : beats(beats), counts(counts_of(beat_count, beats.size(1))), records(beats.size(0)), texts(sentences.size(0)), most(beats.size(1)),
          dim(beats.size(2)) {
        const std::vector<int64_t> sizes = counts_of(sentence_count, sentences.size(1));
        std::vector<int64_t> places;
        for (int64_t size = 1; size <= sentences.size(1); size++) {
            std::vector<int64_t> alike;
            for (int64_t c = 0; c < texts; c++) if (sizes[c] == size) alike.push_back(c);
            const int64_t step = std::max<int64_t>(LANES, GROUP / size / LANES * LANES);
            for (int64_t first = 0, count; first < int64_t(alike.size()); first += count) {
                count = std::min<int64_t>(step, alike.size() - first);
                groups.push_back({int64_t(places.size()), size, count, int64_t(order.size())});
                for (int64_t s = 0; s < size; s++)
                    for (int64_t i = first; i < first + count; i++) places.push_back(alike[i] * sentences.size(1) + s);
                order.insert(order.end(), alike.begin() + first, alike.begin() + first + count);
                widest = std::max(widest, size * (count + LANES - 1));
            }
        }
        static_cast<Rows&>(*this) = Rows(sentences, places);
        n = places.size();
        norm = rows.norm(2, 1);
        const Tensor both = temperatures.to(beats.scalar_type()).contiguous();
        common.temperature = both.const_data_ptr<T>()[0], common.sharpness = both.const_data_ptr<T>()[1];
        common.over_sentences = over_sentences, common.mean = mean;
    }

    Tensor matrix(const Tensor& of_ecgs, int64_t first, int64_t last) const {  // (B, K, D) -> ((last - first) * K, D)
        return of_ecgs.narrow(0, first, last - first).view({-1, dim});
    }

    // Each of the threads has some ECGs, and takes as many of them at a time as have their scores in a cache:
    // block(thread, first ECG, end, scores ((end - first) * K, N)). kept: numbers that hold, or shall hold, all scores, or null.
    template <class Block> void for_every_block(int64_t threads, T* kept, bool there, Block block) const {
        if (!n || !most) return;
        const int64_t step = std::max<int64_t>(1, BLOCK / (most * n));
        at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
            const c10::NoGradGuard guard;
            const Tensor room = at::empty({kept ? 0 : step * most * n}, beats.options());
            for (int64_t thread = begin; thread < end; thread++)
                for (int64_t first = records * thread / threads, stop = records * (thread + 1) / threads; first < stop; first += step) {
                    const int64_t last = std::min(stop, first + step);
                    T* place = kept ? kept + first * most * n : room.template mutable_data_ptr<T>();
                    Tensor scores = at::from_blob(place, {(last - first) * most, n}, beats.options());
                    if (!there) at::mm_out(scores, matrix(beats, first, last), rows.t());
                    block(thread, first, last, place);
                }
        });
    }

    // Calls pair(Attention, group) for ECG b, that has beats, and every group of texts. scores: (K, N) of the ECG; memory: to be used.
    template <class Pair> void for_every_group(int64_t b, const T* scores, std::vector<T>& memory, Pair pair) const {
        Attention<T> r = common;
        r.beats = counts[b];
        memory.resize(most * most + Attention<T>::room(most, widest));
        gram_of(beats.template const_data_ptr<T>() + b * most * dim, r.beats, dim, memory.data());
        r.gram = memory.data();
        for (const Group& g : groups) {
            r.sentences = g.sentences, r.texts = g.texts;
            r.use(memory.data() + most * most);
            spread(r, scores + g.first_column, n, r.beats, r.x);
            spread(r, norm.template const_data_ptr<T>() + g.first_column, n, 1, r.norm);
            pair(r, g);
        }
    }
};

template <class T>
static std::tuple<Tensor, Tensor> beat_forward(const Tensor& beats, const Tensor& sentences, const Tensor& beat_count,
                                               const Tensor& sentence_count, const Tensor& temperatures, bool over_sentences, bool mean,
                                               int64_t keep) {
    const Beats<T> all(beats, sentences, beat_count, sentence_count, temperatures, over_sentences, mean);
    Tensor similarity = at::zeros({all.records, all.texts}, beats.options()), kept = at::empty({all.records, keep}, beats.options());
    T* out = similarity.mutable_data_ptr<T>();
    all.for_every_block(at::get_num_threads(), keep ? kept.mutable_data_ptr<T>() : nullptr, false,
                        [&](int64_t, int64_t first, int64_t last, const T* x) {
        std::vector<T> memory;
        for (int64_t b = first; b < last; b++, x += all.most * all.n)
            if (all.counts[b])
                all.for_every_group(b, x, memory, [&](const Attention<T>& r, const Group& g) {
                    beat_forward(r);
                    for (int64_t i = 0; i < g.texts; i++) out[b * all.texts + all.order[g.first_text + i]] = r.similarity[i];
                });
    });
    return {similarity, kept};
}

template <class T>
static std::tuple<Tensor, Tensor, Tensor> beat_backward(const Tensor& grad, const Tensor& beats, const Tensor& sentences,
                                                        const Tensor& beat_count, const Tensor& sentence_count,
                                                        const Tensor& temperatures, bool over_sentences, bool mean, const Tensor& kept) {
    const Beats<T> all(beats, sentences, beat_count, sentence_count, temperatures, over_sentences, mean);
    const int64_t most = all.most, dim = all.dim, n = all.n;
    // Each thread adds up on its own, in order: the same result every time.
    const int64_t threads = std::min<int64_t>({at::get_num_threads(), std::max<int64_t>(1, SUMS / std::max<int64_t>(1, n * dim)),
                                               std::max<int64_t>(1, all.records)});
    Tensor of_beats = n && most ? at::empty_like(beats) : at::zeros_like(beats);
    Tensor of_rows = at::zeros({threads, n, dim}, beats.options());
    Tensor of_norm = at::zeros({threads, n}, beats.options()), of_both = at::zeros({threads, 2}, beats.options());
    const T *g = grad.const_data_ptr<T>(), *vectors = beats.const_data_ptr<T>();
    T *dx = of_beats.mutable_data_ptr<T>(), *norms = of_norm.mutable_data_ptr<T>(), *both = of_both.mutable_data_ptr<T>();
    all.for_every_block(threads, kept.numel() ? const_cast<T*>(kept.const_data_ptr<T>()) : nullptr, kept.numel() > 0,
                        [&](int64_t thread, int64_t first, int64_t last, const T* x) {
        std::vector<T> memory, of_gram((last - first) * most * most);
        const Tensor of_scores = at::empty({(last - first) * most, n}, beats.options());
        T *ds = of_scores.mutable_data_ptr<T>(), *dg = of_gram.data();
        for (int64_t b = first; b < last; b++, x += most * n, ds += most * n, dg += most * most) {
            const int64_t count = all.counts[b];
            std::fill_n(ds + count * n, (most - count) * n, T(0));
            if (!count) continue;
            all.for_every_group(b, x, memory, [&](const Attention<T>& r, const Group& group) {
                for (int64_t i = 0; i < r.wide; i++)
                    r.grad[i] = i < group.texts ? g[b * all.texts + all.order[group.first_text + i]] : T(0);
                beat_forward(r);
                beat_backward(r, dg, both + 2 * thread);
                gather(r, r.x, count, ds + group.first_column, n);
                T* dn = norms + thread * n + group.first_column;
                for (int64_t s = 0; s < group.sentences; s++) add(1, r.of_norm + s * r.wide, group.texts, dn + s * group.texts);
            });
            for (int64_t k = 0; k < count; k++)
                for (int64_t m = 0; m < k; m++) dg[m * count + k] = dg[k * count + m];
        }
        Tensor mine = all.matrix(of_beats, first, last);
        at::mm_out(mine, of_scores, all.rows);
        of_rows[thread].addmm_(of_scores.t(), all.matrix(beats, first, last));
        dg = of_gram.data();
        for (int64_t b = first; b < last; b++, dg += most * most)
            add_product(dg, vectors + b * most * dim, all.counts[b], dim, dx + b * most * dim);
    });
    const Tensor of_lengths = of_norm.sum(0) / all.norm.clamp_min(SMALLEST);
    return {of_beats, all.unpack(of_rows.sum(0).addcmul_(all.rows, of_lengths.unsqueeze(1)), sentences), of_both.sum(0)};
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

std::tuple<Tensor, Tensor> beat_similarity(const Tensor& beats, const Tensor& sentences, const Tensor& beat_count,
                                           const Tensor& sentence_count, const Tensor& temperatures, bool over_sentences, bool mean,
                                           int64_t keep) {
    return beats.scalar_type() == at::kDouble
        ? beat_forward<double>(beats, sentences, beat_count, sentence_count, temperatures, over_sentences, mean, keep)
        : beat_forward<float>(beats, sentences, beat_count, sentence_count, temperatures, over_sentences, mean, keep);
}

std::tuple<Tensor, Tensor, Tensor> beat_similarity_backward(const Tensor& grad, const Tensor& beats, const Tensor& sentences,
                                                            const Tensor& beat_count, const Tensor& sentence_count,
                                                            const Tensor& temperatures, bool over_sentences, bool mean, const Tensor& kept) {
    return beats.scalar_type() == at::kDouble
        ? beat_backward<double>(grad, beats, sentences, beat_count, sentence_count, temperatures, over_sentences, mean, kept)
        : beat_backward<float>(grad, beats, sentences, beat_count, sentence_count, temperatures, over_sentences, mean, kept);
}

}  // namespace similarity
