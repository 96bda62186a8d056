// beat_similarity on the CPU, forward and backward. What it computes: similarity.py.
//
// Scores of some ECGs with all sentences are one matrix product that fits into a core's cache. What belongs to one ECG and some texts is
// worked on in the L1 cache, a text in each lane of a vector. The length of an attended beat comes from the Gram matrix of the ECG's
// beats, so that no attended beat is ever made. The backward pass is given the scores if they are few, and else makes them again.
#include "checks.h"
#include "similarity_common.h"

namespace similarity {

// ---- one ECG and some texts ------------------------------------------------------------------------------------------

// Some texts of about equally many sentences. Their columns in the scores: all first sentences, then all second ones; each filled up to
// whole vectors (`wide`) with sentences of zeros, whose gradients are zero, too. `hidden` keeps those of a text out of its softmaxes.
struct Group { int64_t first_column, sentences, texts, wide, first_text; };  // first_text: in the order of the groups

template <class T> struct Attention {
    int64_t beats, sentences, texts, wide, n;  // n = sentences * wide
    T temperature, sharpness;                  // of the attention over beats; of the sum over sentences
    bool over_sentences, mean;
    const T* gram;                             // (beats, beats)
    const T *x, *norm, *hidden;                // (beats, n), rows `stride` apart: scores; (n): lengths of sentences; HIDDEN or 0
    T* of_x;                                   // as x, and may be x: its gradient
    int64_t stride;
    T *p, *a, *along;                          // (beats, n): softmax over sentences, over beats, gram times that
    T *up, *root, *cosine, *logit, *share;     // (n); up: attended beat times sentence, root: length of the former
    T *similarity, *grad;                      // (wide)
    T *of_square, *spare;                      // (n): gradient of twice the attended beat's squared length

    static int64_t room(int64_t beats, int64_t widest) { return (3 * beats + 9) * widest; }
    void use(T* memory) {
        for (T** some : {&p, &a, &along}) *some = memory, memory += beats * n;
        for (T** one : {&up, &root, &cosine, &logit, &share, &similarity, &grad, &of_square, &spare}) *one = memory, memory += n;
    }
};

constexpr double SMALLEST = 1e-8;  // of a product of lengths, as torch.cosine_similarity has it
constexpr double HIDDEN = -1e30;   // added to what no softmax shall see

// x (rows, sentences, wide), rows `stride` apart -> y, without gaps: softmax over the sentences of each text. top, sum: the largest, and
// the sum of exp, in the last row.
template <int BYTES, class T>
static INLINE void softmax_over_sentences(const Attention<T>& r, const T* x, int64_t stride, int64_t rows, T* y, T* top, T* sum) {
    using V = Vector<T>;
    const int64_t n = r.n, wide = r.wide;
    for (int64_t k = 0; k < rows; k++, x += stride)
        for (int64_t i = 0; i < wide; i += LANES) {
            V largest = load<V>(x + i);  // the first is never hidden
            for (int64_t s = i; s < n; s += wide) {
                const V one = load<V>(x + s) + load<V>(r.hidden + s);
                largest = larger(one, largest);
                store(y + k * n + s, one);
            }
            for (int64_t s = i; s < n; s += wide) store(y + k * n + s, load<V>(y + k * n + s) - largest);
            store(top + i, largest);
        }
    for_columns<BYTES, T>(rows * n, [=](auto zero, int64_t j) INLINE_LAMBDA { store(y + j, exp_of(load<decltype(zero)>(y + j))); });
    for (int64_t k = 0; k < rows * n; k += n)
        for (int64_t i = k; i < k + wide; i += LANES) {
            V all{};
            for (int64_t s = i; s < k + n; s += wide) all += load<V>(y + s);
            const V part = T(1) / all;
            for (int64_t s = i; s < k + n; s += wide) store(y + s, load<V>(y + s) * part);
            store(sum + i - k, all);
        }
}

// Rows k to rows - 1 of y (rows, n) = gram (rows, rows) times x (rows, n), COUNT at a time.
template <int COUNT, int BYTES, class T>
static INLINE void gram_times(const T* gram, const T* x, int64_t k, int64_t rows, int64_t n, T* y) {
    for (; k + COUNT <= rows; k += COUNT)
        for_columns<BYTES, T>(n, [=](auto zero, int64_t j) INLINE_LAMBDA {
            using V = decltype(zero);
            V sums[COUNT]{};
            for (int64_t m = 0; m < rows; m++)
                for (int i = 0; i < COUNT; i++) sums[i] += gram[(k + i) * rows + m] * load<V>(x + m * n + j);
            for (int i = 0; i < COUNT; i++) store(y + (k + i) * n + j, sums[i]);
        });
    if constexpr (COUNT > 1) gram_times<1, BYTES>(gram, x, k, rows, n, y);
}

// From r.x to r.similarity.
template <int BYTES, class T> static INLINE void beat_forward_(const Attention<T>& r) {
    const int64_t beats = r.beats, n = r.n;
    T *top = r.of_square, *sum = r.spare;  // not yet in use
    if (r.over_sentences) softmax_over_sentences<BYTES>(r, r.x, r.stride, beats, r.p, top, sum);
    else for (int64_t k = 0; k < beats; k++) std::copy_n(r.x + k * r.stride, n, r.p + k * n);
    for_columns<BYTES, T>(n, [&](auto zero, int64_t j) INLINE_LAMBDA {
        using V = decltype(zero);
        const T *x = r.x + j, *p = r.p + j;
        T* a = r.a + j;
        V largest = r.temperature * load<V>(p), all{}, up{};
        for (int64_t k = 1; k < beats; k++) largest = larger(r.temperature * load<V>(p + k * n), largest);
        for (int64_t k = 0; k < beats; k++) {
            const V e = exp_of(r.temperature * load<V>(p + k * n) - largest);
            store(a + k * n, e), all += e;
        }
        const V part = T(1) / all;
        for (int64_t k = 0; k < beats; k++) {
            const V share = load<V>(a + k * n) * part;
            store(a + k * n, share), up += share * load<V>(x + k * r.stride);
        }
        store(r.up + j, up);
    });
    gram_times<4, BYTES>(r.gram, r.a, 0, beats, n, r.along);
    for_columns<BYTES, T>(n, [&](auto zero, int64_t j) INLINE_LAMBDA {
        using V = decltype(zero);
        V square{};
        for (int64_t k = j; k < beats * n; k += n) square += load<V>(r.a + k) * load<V>(r.along + k);
        store(r.root + j, larger(square, V{}));
    });
    for (T* root = r.root; root < r.root + n; root++) *root = std::sqrt(*root);
    for_columns<BYTES, T>(n, [&](auto zero, int64_t j) INLINE_LAMBDA {
        using V = decltype(zero);
        const V cosine = load<V>(r.up + j) / larger(load<V>(r.root + j) * load<V>(r.norm + j), zero + T(SMALLEST));
        store(r.cosine + j, cosine), store(r.logit + j, r.sharpness * cosine);
    });
    softmax_over_sentences<BYTES>(r, r.logit, n, 1, r.share, top, sum);  // its sums are the result, its shares the gradient
    for (int64_t i = 0; i < r.texts; i++) {
        int64_t count = r.sentences;
        while (r.hidden[(count - 1) * r.wide + i]) count--;
        r.similarity[i] = top[i] + std::log(r.mean ? sum[i] / T(count) : sum[i]);
    }
}

// y[i] += x (n) times row i of rows (count, n)
template <int COUNT, class T> static INLINE void add_some_dots(const T* x, const T* rows, int64_t n, T* y) {
    using V = Vector<T>;
    V sums[COUNT]{};
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES)
        for (int i = 0; i < COUNT; i++) sums[i] += load<V>(x + j) * load<V>(rows + i * n + j);
    for (int i = 0; i < COUNT; i++) {
        for (int l = 0; l < LANES; l++) y[i] += sums[i][l];
        for (int64_t rest = j; rest < n; rest++) y[i] += x[rest] * rows[i * n + rest];
    }
}
template <class T> static INLINE void add_dots(const T* x, const T* rows, int64_t count, int64_t n, T* y) {
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) add_some_dots<4>(x, rows + i * n, n, y + i);
    for (; i < count; i++) add_some_dots<1>(x, rows + i * n, n, y + i);
}

// After beat_forward_: r.of_x becomes the gradient of the scores; those of the Gram matrix (twice, its lower half), of r.norm, of
// temperature and sharpness are added up. r.grad: gradient of r.similarity, 0 where no text is.
template <int BYTES, class T> static INLINE void beat_backward_(const Attention<T>& r, T* of_gram, T* of_norm, T* of_both) {
    using V = Vector<T>;
    const int64_t beats = r.beats, n = r.n;
    for (int64_t j = 0; j < n; j += r.wide)
        for (int64_t i = 0; i < r.wide; i += LANES) store(r.share + j + i, load<V>(r.share + j + i) * load<V>(r.grad + i));
    for_columns<BYTES, T>(n, [&](auto none, int64_t j) INLINE_LAMBDA {
        using V = decltype(none);
        const V cosine = load<V>(r.cosine + j), root = load<V>(r.root + j), norm = load<V>(r.norm + j), lengths = root * norm;
        const V d = load<V>(r.share + j) * r.sharpness;  // gradient of the cosine
        const auto large = lengths > none + T(SMALLEST);
        const V of_up = d / (large ? lengths : none + T(SMALLEST)), of_square = large ? -d * cosine / (root * root) : none;
        const V inner = of_up * load<V>(r.up + j) + of_square * root * root;  // sum of a over the beats times its gradient
        store(r.of_square + j, of_square), store(of_norm + j, load<V>(of_norm + j) + (large ? -d * cosine / norm : none));
        const T *x = r.x + j, *a = r.a + j, *p = r.p + j;
        T *of_x = r.of_x + j, *of_p = r.along + j;
        V of_temperature{};
        for (int64_t k = 0; k < beats; k++, x += r.stride, of_x += r.stride, a += n, p += n, of_p += n) {
            const V ak = load<V>(a), dk = ak * (of_up * load<V>(x) + of_square * load<V>(of_p) - inner);
            of_temperature += dk * load<V>(p);
            store(of_p, r.temperature * dk), store(of_x, of_up * ak + (r.over_sentences ? none : r.temperature * dk));
        }
        store(r.spare + j, of_temperature);
    });
    V of_temperature{}, of_sharpness{};
    for (int64_t j = 0; j < n; j += LANES)
        of_temperature += load<V>(r.spare + j), of_sharpness += load<V>(r.share + j) * load<V>(r.cosine + j);
    for (int l = 0; l < LANES; l++) of_both[0] += of_temperature[l], of_both[1] += of_sharpness[l];
    for (int64_t k = 0; k < beats; k++) {
        for (int64_t j = 0; j < n; j += LANES) store(r.logit + j, load<V>(r.of_square + j) * load<V>(r.a + k * n + j));
        add_dots(r.logit, r.a, k + 1, n, of_gram + k * beats);
    }
    if (r.over_sentences)
        for (int64_t k = 0; k < beats; k++) {
            const T *p = r.p + k * n, *dp = r.along + k * n;
            T* of_x = r.of_x + k * r.stride;
            for (int64_t i = 0; i < r.wide; i += LANES) {
                V whole{};
                for (int64_t s = i; s < n; s += r.wide) whole += load<V>(p + s) * load<V>(dp + s);
                for (int64_t s = i; s < n; s += r.wide) store(of_x + s, load<V>(of_x + s) + load<V>(p + s) * (load<V>(dp + s) - whole));
            }
        }
}

// The lower triangle of x (rows, rows) also above its diagonal.
template <class T> static INLINE void mirror(T* x, int64_t rows) {
    for (int64_t k = 0; k < rows; k++)
        for (int64_t m = 0; m < k; m++) x[m * rows + k] = x[k * rows + m];
}

// x (rows, n) -> x x', (rows, rows)
template <class T> static INLINE void gram_(const T* x, int64_t rows, int64_t n, T* gram) {
    std::fill_n(gram, rows * rows, T(0));
    for (int64_t k = 0; k < rows; k++) add_dots(x + k * n, x, k + 1, n, gram + k * rows);
    mirror(gram, rows);
}

#define DEFINE_FORWARD(T, COUNT, BYTES) static void beat_forward(const Attention<T>& r) { beat_forward_<BYTES>(r); }
#define DEFINE_BACKWARD(T, COUNT, BYTES)                                                             \
    static void beat_backward(const Attention<T>& r, T* of_gram, T* of_norm, T* of_both) {           \
        beat_backward_<BYTES>(r, of_gram, of_norm, of_both);                                         \
    }
FOR_EVERY_VECTOR(DEFINE_FORWARD, float)
FOR_EVERY_VECTOR(DEFINE_FORWARD, double)
FOR_EVERY_VECTOR(DEFINE_BACKWARD, float)
FOR_EVERY_VECTOR(DEFINE_BACKWARD, double)
EVERY_CPU static void gram_of(const float* x, int64_t rows, int64_t n, float* gram) { gram_(x, rows, n, gram); }
EVERY_CPU static void gram_of(const double* x, int64_t rows, int64_t n, double* gram) { gram_(x, rows, n, gram); }

// ---- all ECGs and texts ----------------------------------------------------------------------------------------------

constexpr int64_t GROUP = 128;      // sentences of a group of texts: what one ECG has with them is about 32 KB
constexpr int64_t BLOCK = 1 << 17;  // scores of a block of ECGs: half a megabyte

template <class T> struct Beats : Rows<T> {
    using Rows<T>::n, Rows<T>::rows;  // rows: the sentences, by groups
    Tensor beats, norm, hidden;
    std::vector<int64_t> counts, order;       // order: which text is the i-th, the longest first
    std::vector<Group> groups;
    int64_t records, texts, most, dim, filled, step, widest = 0;  // most: beats; filled: columns of all groups; widest: of a group
    Attention<T> common;

    Beats(const Tensor& beats, const Tensor& sentences, const Tensor& beat_count, const Tensor& sentence_count,
          const Tensor& temperatures, bool over_sentences, bool mean)
        : beats(beats), counts(counts_of(beat_count, beats.size(1))), records(beats.size(0)), texts(sentences.size(0)),
          most(beats.size(1)), dim(beats.size(2)) {
        const std::vector<int64_t> sizes = counts_of(sentence_count, sentences.size(1));
        for (int64_t c = 0; c < texts; c++) if (sizes[c]) order.push_back(c);
        std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return sizes[a] > sizes[b]; });
        std::vector<T> mask;
        for (int64_t first = 0, count; first < int64_t(order.size()); first += count) {
            const int64_t size = sizes[order[first]], left = order.size() - first;
            count = 1;
            while (count < left && sizes[order[first + count]] == size) count++;
            const int64_t wide = std::min(filled_up(count, LANES), std::max<int64_t>(LANES, GROUP / size / LANES * LANES));
            count = std::min(wide, left);  // the last vector may hold shorter texts
            groups.push_back({n, size, count, wide, first});
            widest = std::max(widest, size * wide);
            for (int64_t s = 0; s < size; s++, n += wide) {
                mask.resize(n + wide);
                for (int64_t i = 0; i < count; i++) {
                    const int64_t c = order[first + i];
                    if (s < sizes[c]) this->take(c * sentences.size(1) + s, n + i);
                    else mask[n + i] = HIDDEN;
                }
            }
        }
        hidden = at::tensor(mask, beats.options());
        filled = n;
        n = filled_up(n, PANEL);
        step = std::max<int64_t>(1, std::min(records, BLOCK / std::max<int64_t>(1, most * n)));  // ECGs of a block
        this->pack(sentences);
        norm = rows.norm(2, 1);
        const Tensor both = temperatures.to(beats.scalar_type()).contiguous();
        common.temperature = both.const_data_ptr<T>()[0], common.sharpness = both.const_data_ptr<T>()[1];
        common.over_sentences = over_sentences, common.mean = mean, common.stride = n;
    }

    // Each of the threads has some ECGs, and takes as many of them at a time as have their scores in a cache:
    // block(thread, first ECG, end, scores ((end - first) * K, n)). kept: room for all scores, or null; there: do they stand in it?
    template <class Block> void for_every_block(int64_t threads, T* kept, bool there, Block block) const {
        if (!n || !most) return;
        const Tensor sentences = there ? Tensor() : panels_of(rows.t());
        at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
            const c10::NoGradGuard guard;
            const Tensor room = at::empty({kept ? 0 : step * most * n}, beats.options());
            for (int64_t thread = begin; thread < end; thread++) {
                const int64_t stop = records * (thread + 1) / threads;
                for (int64_t first = records * thread / threads, last; first < stop; first = last) {
                    last = std::min(stop, first + step);
                    T* scores = kept ? kept + first * most * n : room.template mutable_data_ptr<T>();
                    const Left<T> vectors{beats.template const_data_ptr<T>() + first * most * dim, dim, 1, (last - first) * most};
                    if (!there) multiply(vectors, Right<T>(sentences, n), dim, scores, n, false);
                    block(thread, first, last, scores);
                }
            }
        });
    }

    void check_room(int64_t keep) const {
        const int64_t all = most * n;
        TORCH_CHECK(!keep || keep >= all, "beat_similarity: room for ", keep, " scores; there are ", all);
    }
    int64_t working() const { return Attention<T>::room(most, widest); }
    Tensor memory() const { return at::empty({working() + most * most}, beats.options()); }

    // Calls pair(Attention, group) for ECG b, which has beats, and every group of texts. scores (K, n): of the ECG; of_scores: their
    // gradients' place; memory: to work in.
    template <class Pair> void for_every_group(int64_t b, const T* scores, T* of_scores, T* memory, Pair pair) const {
        Attention<T> r = common;
        r.beats = counts[b];
        gram_of(beats.template const_data_ptr<T>() + b * most * dim, r.beats, dim, memory + working());
        r.gram = memory + working();
        for (const Group& g : groups) {
            r.sentences = g.sentences, r.texts = g.texts, r.wide = g.wide, r.n = g.sentences * g.wide;
            r.x = scores + g.first_column, r.norm = norm.template const_data_ptr<T>() + g.first_column;
            r.hidden = hidden.template const_data_ptr<T>() + g.first_column;
            if (of_scores) r.of_x = of_scores + g.first_column;
            r.use(memory);
            pair(r, g);
        }
    }
};

template <class T>
static std::tuple<Tensor, Tensor> beat_forward(const Tensor& beats, const Tensor& sentences, const Tensor& beat_count,
                                               const Tensor& sentence_count, const Tensor& temperatures, bool over_sentences,
                                               bool mean, int64_t keep) {
    const Beats<T> all(beats, sentences, beat_count, sentence_count, temperatures, over_sentences, mean);
    all.check_room(keep);
    Tensor similarity = at::zeros({all.records, all.texts}, beats.options()), kept = at::empty({all.records, keep}, beats.options());
    T* out = similarity.mutable_data_ptr<T>();
    all.for_every_block(at::get_num_threads(), keep ? kept.mutable_data_ptr<T>() : nullptr, false,
                        [&](int64_t, int64_t first, int64_t last, const T* x) {
        const Tensor memory = all.memory();
        for (int64_t b = first; b < last; b++, x += all.most * all.n)
            if (all.counts[b])
                all.for_every_group(b, x, nullptr, memory.mutable_data_ptr<T>(), [&](const Attention<T>& r, const Group& g) {
                    beat_forward(r);
                    for (int64_t i = 0; i < g.texts; i++) out[b * all.texts + all.order[g.first_text + i]] = r.similarity[i];
                });
    });
    return {similarity, kept};
}

template <class T>
static std::tuple<Tensor, Tensor, Tensor> beat_backward(const Tensor& grad, const Tensor& beats, const Tensor& sentences,
                                                        const Tensor& beat_count, const Tensor& sentence_count,
                                                        const Tensor& temperatures, bool over_sentences, bool mean,
                                                        const Tensor& kept) {
    const Beats<T> all(beats, sentences, beat_count, sentence_count, temperatures, over_sentences, mean);
    all.check_room(kept.size(1));
    const int64_t most = all.most, dim = all.dim, n = all.n, threads = threads_for(all.records, n * dim);
    Tensor of_beats = n && most ? at::empty_like(beats) : at::zeros_like(beats);
    Tensor of_rows = at::zeros({threads, n, dim}, beats.options());
    Tensor of_norm = at::zeros({threads, n}, beats.options()), of_both = at::zeros({threads, 2}, beats.options());
    const Tensor columns = panels_of(all.rows), ecgs = at::empty({threads, columns.size(0), all.step * most, PANEL}, beats.options());
    const bool there = kept.numel() > 0;  // these must stay as they are: gradients stand apart
    const Tensor apart = at::empty({there ? threads * all.step * most * n : 0}, beats.options());
    T* const aside = apart.mutable_data_ptr<T>();
    const T* g = grad.const_data_ptr<T>();
    T *dx = of_beats.mutable_data_ptr<T>(), *dy = of_rows.mutable_data_ptr<T>(), *norms = of_norm.mutable_data_ptr<T>();
    T* both = of_both.mutable_data_ptr<T>();
    all.for_every_block(threads, there ? const_cast<T*>(kept.const_data_ptr<T>()) : nullptr, there,
                        [&](int64_t thread, int64_t first, int64_t last, T* scores) {
        const Tensor room = all.memory();
        T* const memory = room.mutable_data_ptr<T>();
        std::vector<T> of_gram((last - first) * most * most);
        T* const of_scores = there ? aside + thread * all.step * most * n : scores;
        for (int64_t b = first; b < last; b++) {
            const int64_t count = all.counts[b], start = (b - first) * most * n;
            for (int64_t k = 0; k < most; k++)  // where no group writes
                std::fill(of_scores + start + k * n + (k < count ? all.filled : 0), of_scores + start + (k + 1) * n, T(0));
            T* dg = of_gram.data() + (b - first) * most * most;
            if (count)
                all.for_every_group(b, scores + start, of_scores + start, memory, [&](const Attention<T>& r, const Group& group) {
                    for (int64_t i = 0; i < r.wide; i++)
                        r.grad[i] = i < group.texts ? g[b * all.texts + all.order[group.first_text + i]] : T(0);
                    beat_forward(r);
                    beat_backward(r, dg, norms + thread * n + group.first_column, both + 2 * thread);
                });
            mirror(dg, count);
        }
        const int64_t rows = (last - first) * most;
        multiply(Left<T>{of_scores, n, 1, rows}, Right<T>(columns, dim), n, dx + first * most * dim, dim, false);
        const Tensor panels = ecgs[thread];
        panels.narrow(1, 0, rows).copy_(in_panels(beats.narrow(0, first, last - first).view({rows, dim})));
        Right<T> vectors(panels, dim);
        multiply(Left<T>{of_scores, 1, n, n}, vectors, rows, dy + thread * n * dim, dim, true);
        for (int64_t b = first; b < last; b++, vectors.x += most * PANEL) {
            const int64_t count = all.counts[b];
            multiply(Left<T>{of_gram.data() + (b - first) * most * most, count, 1, count}, vectors, count, dx + b * most * dim, dim, true);
        }
    });
    const Tensor of_lengths = of_norm.sum(0) / all.norm.clamp_min(SMALLEST);
    of_rows[0].addcmul_(all.rows, of_lengths.unsqueeze(1));
    return {of_beats, all.unpack(of_rows, sentences), of_both.sum(0)};
}

// ---- checks and types ------------------------------------------------------------------------------------

static void check(const Tensor& beats, const Tensor& sentences, const Tensor& beat_count,
                  const Tensor& sentence_count, const Tensor& temperatures) {
    checks::sides("beat_similarity", beats, sentences, beat_count, sentence_count);
    checks::floating("beat_similarity", beats);
    checks::temperatures("beat_similarity", temperatures, 2, beats);
}

std::tuple<Tensor, Tensor> beat_similarity(const Tensor& beats, const Tensor& sentences, const Tensor& beat_count,
                                           const Tensor& sentence_count, const Tensor& temperatures, bool over_sentences, bool mean,
                                           int64_t keep) {
    check(beats, sentences, beat_count, sentence_count, temperatures);
    return beats.scalar_type() == at::kDouble
        ? beat_forward<double>(beats, sentences, beat_count, sentence_count, temperatures, over_sentences, mean, keep)
        : beat_forward<float>(beats, sentences, beat_count, sentence_count, temperatures, over_sentences, mean, keep);
}

std::tuple<Tensor, Tensor, Tensor> beat_similarity_backward(const Tensor& grad, const Tensor& beats, const Tensor& sentences,
                                                            const Tensor& beat_count, const Tensor& sentence_count,
                                                            const Tensor& temperatures, bool over_sentences, bool mean,
                                                            const Tensor& kept) {
    check(beats, sentences, beat_count, sentence_count, temperatures);
    const int64_t records = beats.size(0), texts = sentences.size(0);
    checks::like("beat_similarity", "grad", grad, {records, texts}, beats.scalar_type(), beats);
    TORCH_CHECK(kept.dim() == 2, "beat_similarity: kept must be (B, keep), not ", kept.sizes());
    checks::like("beat_similarity", "kept", kept, {records, kept.size(1)}, beats.scalar_type(), beats);
    return beats.scalar_type() == at::kDouble
        ? beat_backward<double>(grad, beats, sentences, beat_count, sentence_count, temperatures, over_sentences, mean, kept)
        : beat_backward<float>(grad, beats, sentences, beat_count, sentence_count, temperatures, over_sentences, mean, kept);
}

}  // namespace similarity
