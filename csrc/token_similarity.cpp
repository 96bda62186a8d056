// token_similarity on the CPU, forward and backward. What it computes: similarity.py.
//
// A word's best token is found while its scores are in registers: they are never written. With a temperature, scores are made in blocks
// that fit into the caches, reduced at once and forgotten; the backward pass makes them again. There is no tensor of ECG x text x token x
// word. Texts are ragged, so their words are packed first, without the padding.
#include "checks.h"
#include "similarity_common.h"

namespace similarity {

constexpr int64_t COLUMNS = 512;  // words of a block: with 128 tokens the scores are 256 KB

// The words of all texts, one behind the other in blocks of whole texts; each block begins with a panel.
template <class T> struct Words : Rows<T> {
    struct Block { int64_t first, last, start, n; };  // texts; columns
    std::vector<Block> blocks;
    std::vector<int64_t> starts;  // column of a text's first word
    int64_t widest = 0;

    Words(const Tensor& padded, const std::vector<int64_t>& counts) {
        int64_t& n = this->n;
        for (int64_t c = 0; c < int64_t(counts.size()); c++) {
            if (blocks.empty() || n + counts[c] > blocks.back().start + COLUMNS) {
                n = filled_up(n, PANEL);
                blocks.push_back({c, c, n, 0});
            }
            starts.push_back(n);
            for (int64_t w = 0; w < counts[c]; w++) this->take(c * padded.size(1) + w, n++);
            Block& block = blocks.back();
            block.last = c + 1, block.n = n - block.start, widest = std::max(widest, filled_up(block.n, PANEL));
        }
        n = filled_up(n, PANEL);
        this->pack(padded);
    }
};

// ---- columns of scores -----------------------------------------------------------------------------------------------

template <class T> struct Best {  // keeps the largest of every column, and its row. NaN is larger than all else: it must not get lost.
    using Place = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
    T* top;
    Place* at;
    T infinity = std::numeric_limits<T>::infinity();  // only NaN is not <= that

    template <class V> INLINE void keep(int64_t i, int64_t j, const V& x) const {
        using P = typename VectorOf<Place, sizeof(V) / sizeof(T)>::type;
        const V old = load<V>(top + j), nan = old <= V{} + infinity ? V{} : old;  // nested choices GCC would do number by number
        store(top + j, (x <= old ? old : x) + nan), store(at + j, x <= old ? load<P>(at + j) : P{} + Place(i));
    }
    template <class V> INLINE void operator()(int64_t i, int64_t j, const V& low, const V& high) const {
        keep(i, j, low), keep(i, int64_t(j + sizeof(V) / sizeof(T)), high);
    }
};

#define DEFINE_FIND_BEST(T, COUNT, BYTES)                                                                                          \
    static void find_best(const Left<T>& left, const Right<T>& right, int64_t depth, const Best<T>& best) {                        \
        multiply<COUNT, BYTES>(left, right, depth, best);                                                                          \
    }
FOR_EVERY_VECTOR(DEFINE_FIND_BEST, float)
FOR_EVERY_VECTOR(DEFINE_FIND_BEST, double)

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

// ---- all ECGs and texts ----------------------------------------------------------------------------------------------

// Which token each word took, (B, C, W): int16 where that holds them all, else int32.
static at::ScalarType type_of_best(const Tensor& tokens) {
    return tokens.size(1) <= 1 << 15 ? at::kShort : at::kInt;
}

struct Chosen {
    int16_t* narrow = nullptr;
    int32_t* wide = nullptr;

    explicit Chosen(const Tensor& best) {
        void* data = const_cast<void*>(best.const_data_ptr());
        if (best.scalar_type() == at::kShort) narrow = static_cast<int16_t*>(data);
        else wide = static_cast<int32_t*>(data);
    }
    void set(int64_t i, int64_t token) const {
        if (narrow) narrow[i] = int16_t(token);
        else wide[i] = int32_t(token);
    }
    int64_t get(int64_t i) const { return narrow ? narrow[i] : wide[i]; }
};

template <class T>
static std::tuple<Tensor, Tensor> token_forward(const Tensor& tokens, const Tensor& words, const Tensor& token_count,
                                                const Tensor& word_count, const std::optional<Tensor>& temperature) {
    const int64_t records = tokens.size(0), texts = words.size(0), most = words.size(1), length = tokens.size(1), dim = tokens.size(2);
    const std::vector<int64_t> tc = counts_of(token_count, length), wc = counts_of(word_count, most);
    const Words<T> all(words, wc);
    Tensor similarity = at::zeros({records, texts}, tokens.options());
    const auto places = tokens.options().dtype(type_of_best(tokens));
    Tensor best = temperature ? at::zeros({0}, places) : at::zeros({records, texts, most}, places);
    if (!all.n) return {similarity, best};
    const T warm = temperature ? temperature->item<T>() : T(0), *x = tokens.const_data_ptr<T>();
    T* out = similarity.mutable_data_ptr<T>();
    const Chosen chosen(best);
    const Tensor panels = panels_of(all.rows.t());
    const int64_t blocks = all.blocks.size();
    at::parallel_for(0, records * blocks, 1, [&](int64_t begin, int64_t end) {
        const int64_t wide = all.widest;
        std::vector<T> value(wide), top(temperature ? wide : 0), sum(temperature ? wide : 0), scores(temperature ? length * wide : 0);
        std::vector<typename Best<T>::Place> at(wide);
        for (int64_t task = begin; task < end; task++) {
            const int64_t b = task / blocks;
            const auto& block = all.blocks[task % blocks];
            if (!tc[b] || !block.n) continue;
            const Left<T> mine{x + b * length * dim, dim, 1, tc[b]};
            Right<T> columns(panels, block.n);
            columns.x += block.start * dim;
            if (temperature) {
                multiply(mine, columns, dim, scores.data(), block.n, false);
                column_softmax(scores.data(), tc[b], block.n, warm, top.data(), sum.data(), value.data());
            } else {
                std::fill_n(value.data(), wide, -std::numeric_limits<T>::infinity()), std::fill_n(at.data(), wide, 0);
                find_best(mine, columns, dim, Best<T>{value.data(), at.data()});
            }
            for (int64_t c = block.first; c < block.last; c++) {
                T whole = 0;
                for (int64_t w = 0, j = all.starts[c] - block.start; w < wc[c]; w++, j++) {
                    whole += value[j];
                    if (!temperature) chosen.set((b * texts + c) * most + w, at[j]);
                }
                if (wc[c]) out[b * texts + c] = whole / T(wc[c]);
            }
        }
    });
    return {similarity, best};
}

// A word's gradient goes to the token it took, and back.
template <class T>
static std::tuple<Tensor, Tensor> best_backward(const Tensor& grad, const Tensor& tokens, const Tensor& words,
                                                const std::vector<int64_t>& tc, const std::vector<int64_t>& wc, const Tensor& best) {
    const int64_t records = tokens.size(0), texts = words.size(0), most = words.size(1), length = tokens.size(1), dim = tokens.size(2);
    Tensor of_tokens = at::zeros_like(tokens), of_words = at::zeros_like(words);
    const T *g = grad.const_data_ptr<T>(), *x = tokens.const_data_ptr<T>(), *y = words.const_data_ptr<T>();
    T *dx = of_tokens.mutable_data_ptr<T>(), *dy = of_words.mutable_data_ptr<T>();
    const Chosen chosen(best);
    const auto pair = [&](int64_t b, int64_t c, bool to_tokens) {
        if (!tc[b] || !wc[c]) return;
        const T factor = g[b * texts + c] / T(wc[c]);
        for (int64_t w = 0; w < wc[c]; w++) {
            const int64_t token = chosen.get((b * texts + c) * most + w);
            const int64_t t = (b * length + token) * dim, u = (c * most + w) * dim;
            TORCH_CHECK(token >= 0 && token < length, "token_similarity: best is ", token, " of ", length);
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
    return {of_tokens, of_words};
}

// Scores of a block are made again and become their gradients. Every thread has its own ECGs.
template <class T>
static std::tuple<Tensor, Tensor, Tensor> softmax_backward(const Tensor& grad, const Tensor& tokens, const Tensor& words,
                                                           const std::vector<int64_t>& tc, const std::vector<int64_t>& wc, T warm) {
    const Words<T> all(words, wc);
    const int64_t records = tokens.size(0), texts = words.size(0), length = tokens.size(1), dim = tokens.size(2), wide = all.widest;
    const int64_t threads = threads_for(records, all.n * dim);
    Tensor of_tokens = at::zeros_like(tokens), of_rows = at::zeros({threads, all.n, dim}, tokens.options());
    Tensor of_temperature = at::zeros({threads}, tokens.options());
    const Tensor columns = panels_of(all.rows.t()), rows = panels_of(all.rows);
    const T *g = grad.const_data_ptr<T>(), *x = tokens.const_data_ptr<T>();
    T *dx = of_tokens.mutable_data_ptr<T>(), *dy = of_rows.mutable_data_ptr<T>(), *of_warm = of_temperature.mutable_data_ptr<T>();
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
        const c10::NoGradGuard guard;
        std::vector<T> scores(length * wide), top(wide), sum(wide), mean(wide), share(wide), spare(wide);
        for (int64_t thread = begin; thread < end; thread++)
            for (int64_t b = records * thread / threads; b < records * (thread + 1) / threads; b++) {
                if (!tc[b]) continue;
                const Tensor mine = panels_of(tokens[b].narrow(0, 0, tc[b]));
                for (const auto& block : all.blocks) {
                    if (!block.n) continue;
                    Right<T> words_down(columns, block.n), words_across(rows, dim);
                    words_down.x += block.start * dim, words_across.x += block.start * PANEL;
                    for (int64_t c = block.first; c < block.last; c++)
                        std::fill_n(share.data() + all.starts[c] - block.start, wc[c], g[b * texts + c] / T(wc[c]));
                    T* s = scores.data();
                    multiply(Left<T>{x + b * length * dim, dim, 1, tc[b]}, words_down, dim, s, block.n, false);
                    column_softmax(s, tc[b], block.n, warm, top.data(), sum.data(), mean.data());
                    of_warm[thread] += column_softmax_grad(s, tc[b], block.n, warm, top.data(), sum.data(), mean.data(), share.data(),
                                                           spare.data());
                    multiply(Left<T>{s, block.n, 1, tc[b]}, words_across, block.n, dx + b * length * dim, dim, true);
                    multiply(Left<T>{s, 1, block.n, block.n}, Right<T>(mine, dim), tc[b], dy + (thread * all.n + block.start) * dim, dim,
                             true);
                }
            }
    });
    return {of_tokens, all.unpack(of_rows, words), of_temperature.sum()};
}

template <class T>
static std::tuple<Tensor, Tensor, Tensor> token_backward(const Tensor& grad, const Tensor& tokens, const Tensor& words,
                                                         const Tensor& token_count, const Tensor& word_count,
                                                         const std::optional<Tensor>& temperature, const Tensor& best) {
    const std::vector<int64_t> tc = counts_of(token_count, tokens.size(1)), wc = counts_of(word_count, words.size(1));
    if (temperature) return softmax_backward<T>(grad, tokens, words, tc, wc, temperature->item<T>());
    const auto [of_tokens, of_words] = best_backward<T>(grad, tokens, words, tc, wc, best);
    return {of_tokens, of_words, at::zeros({}, tokens.options())};
}

// ---- checks and types ------------------------------------------------------------------------------------

static void check(const Tensor& tokens, const Tensor& words, const Tensor& token_count,
                  const Tensor& word_count, const std::optional<Tensor>& temperature) {
    const char* name = "token_similarity";
    checks::sides(name, tokens, words, token_count, word_count);
    checks::floating(name, tokens);
    TORCH_CHECK(tokens.size(1) <= checks::MOST, name, ": ", tokens.size(1), " tokens; fewer than 2^31");
    if (temperature) checks::temperatures(name, *temperature, 1, tokens);
}

std::tuple<Tensor, Tensor> token_similarity(const Tensor& tokens, const Tensor& words, const Tensor& token_count,
                                            const Tensor& word_count, const std::optional<Tensor>& temperature) {
    check(tokens, words, token_count, word_count, temperature);
    return tokens.scalar_type() == at::kDouble ? token_forward<double>(tokens, words, token_count, word_count, temperature)
                                               : token_forward<float>(tokens, words, token_count, word_count, temperature);
}

std::tuple<Tensor, Tensor, Tensor> token_similarity_backward(const Tensor& grad, const Tensor& tokens, const Tensor& words,
                                                             const Tensor& token_count, const Tensor& word_count,
                                                             const std::optional<Tensor>& temperature, const Tensor& best) {
    check(tokens, words, token_count, word_count, temperature);
    const int64_t records = tokens.size(0), texts = words.size(0), most = words.size(1);
    checks::like("token_similarity", "grad", grad, {records, texts}, tokens.scalar_type(), tokens);
    if (!temperature)
        checks::like("token_similarity", "best", best, {records, texts, most}, type_of_best(tokens), tokens);
    return tokens.scalar_type() == at::kDouble
        ? token_backward<double>(grad, tokens, words, token_count, word_count, temperature, best)
        : token_backward<float>(grad, tokens, words, token_count, word_count, temperature, best);
}

}  // namespace similarity
