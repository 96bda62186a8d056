// beat_similarity on the CPU, forward and backward. What it computes: similarity.py.
//
// Scores of some ECGs with all sentences are one matrix product that fits into a core's cache. What belongs to one ECG and some texts is
// worked on in the L1 cache, a text in each lane of a vector. The length of an attended beat comes from the Gram matrix of the ECG's
// beats, so that no attended beat is ever made. The backward pass is given the scores if they are few, and else makes them again.
#include "similarity_common.h"

namespace similarity {

// ---- one ECG and some texts ------------------------------------------------------------------------------------------

// Some texts of equally many sentences; their columns in the scores: all first sentences, then all second ones.
struct Group { int64_t first_column, sentences, texts, first_text; };  // first_text: in the order of the groups

// A row has a column for each sentence, as in Group, but the texts filled up to whole vectors (`wide`). All rows together fit into a
// fast cache.
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

// x (rows, sentences, wide) -> y: softmax over the sentences of each text. top, sum: the largest, and the sum of exp, in the last row.
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

// y (COUNT, n) += gram (COUNT, rows) x (rows, n)
template <int COUNT, class T> static INLINE void add_some_products(const T* gram, const T* x, int64_t rows, int64_t n, T* y) {
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES) {
        Vector<T> sums[COUNT];
        for (int i = 0; i < COUNT; i++) sums[i] = load(y + i * n + j);
        for (int64_t m = 0; m < rows; m++) {
            const Vector<T> one = load(x + m * n + j);
            for (int i = 0; i < COUNT; i++) sums[i] += gram[i * rows + m] * one;
        }
        for (int i = 0; i < COUNT; i++) store(y + i * n + j, sums[i]);
    }
    for (; j < n; j++)
        for (int i = 0; i < COUNT; i++)
            for (int64_t m = 0; m < rows; m++) y[i * n + j] += gram[i * rows + m] * x[m * n + j];
}
template <class T> static INLINE void add_product_(const T* gram, const T* x, int64_t rows, int64_t n, T* y) {
    int64_t k = 0;
    for (; k + 4 <= rows; k += 4) add_some_products<4>(gram + k * rows, x, rows, n, y + k * n);
    for (; k < rows; k++) add_some_products<1>(gram + k * rows, x, rows, n, y + k * n);
}

// From r.x to r.similarity.
template <class T> static INLINE void beat_forward_(const Attention<T>& r) {
    using V = Vector<T>;
    const int64_t beats = r.beats, n = r.n;
    T *top = r.of_square, *sum = r.of_norm;  // not yet in use
    if (r.over_sentences) softmax_over_sentences(r, r.x, beats, r.p, top, sum);
    for (int64_t j = 0; j < n; j += LANES) {
        const T *x = r.x + j, *p = r.p + j;
        T* a = r.a + j;
        V largest = r.temperature * load(p), all{};
        for (int64_t k = 1; k < beats; k++) largest = larger(r.temperature * load(p + k * n), largest);
        for (int64_t k = 0; k < beats; k++) {
            const V e = exp_of(r.temperature * load(p + k * n) - largest);
            store(a + k * n, e), all += e;
        }
        const V part = T(1) / all;
        V up{};
        for (int64_t k = 0; k < beats; k++) {
            const V share = load(a + k * n) * part;
            store(a + k * n, share), up += share * load(x + k * n);
        }
        store(r.logit + j, up);
    }
    std::fill_n(r.along, beats * n, T(0));
    add_product_(r.gram, r.a, beats, n, r.along);
    for (int64_t j = 0; j < n; j += LANES) {
        V square{};
        for (int64_t k = j; k < beats * n; k += n) square += load(r.a + k) * load(r.along + k);
        store(r.root + j, larger(square, V{}));
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

// y[i] += x (n) times row i of rows (count, n)
template <int COUNT, class T> static INLINE void add_some_dots(const T* x, const T* rows, int64_t n, T* y) {
    Vector<T> sums[COUNT]{};
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES)
        for (int i = 0; i < COUNT; i++) sums[i] += load(x + j) * load(rows + i * n + j);
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

// After beat_forward_: r.x becomes the gradient of the scores; those of the Gram matrix (twice, its lower half), of temperature and
// sharpness are added up. r.grad: gradient of r.similarity, 0 where no text is.
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
        add_dots(r.logit, r.a, k + 1, n, of_gram + k * beats);
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

// float for every processor; double, for checks, as it comes.
#define FOR_EVERY_CPU(T)                                                                                                           \
    EVERY_CPU static void beat_forward(const Attention<T>& r) { beat_forward_(r); }                                                \
    EVERY_CPU static void beat_backward(const Attention<T>& r, T* of_gram, T* of_both) { beat_backward_(r, of_gram, of_both); }    \
    EVERY_CPU static void spread(const Attention<T>& r, const T* from, int64_t stride, int64_t rows, T* to) {                      \
        spread_(r, from, stride, rows, to);                                                                                        \
    }                                                                                                                              \
    EVERY_CPU static void gather(const Attention<T>& r, const T* from, int64_t rows, T* to, int64_t stride) {                      \
        gather_(r, from, rows, to, stride);                                                                                        \
    }                                                                                                                              \
    EVERY_CPU static void gram_of(const T* x, int64_t rows, int64_t n, T* gram) { gram_(x, rows, n, gram); }                       \
    EVERY_CPU static void add_product(const T* gram, const T* x, int64_t rows, int64_t n, T* y) {                                  \
        add_product_(gram, x, rows, n, y);                                                                                         \
    }
FOR_EVERY_CPU(float)
FOR_EVERY_CPU(double)

// ---- all ECGs and texts ----------------------------------------------------------------------------------------------

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
        : beats(beats), counts(counts_of(beat_count, beats.size(1))), records(beats.size(0)), texts(sentences.size(0)),
          most(beats.size(1)), dim(beats.size(2)) {
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
    // block(thread, first ECG, end, scores ((end - first) * K, N)). kept: room for all scores, or null; there: do they stand in it?
    template <class Block> void for_every_block(int64_t threads, T* kept, bool there, Block block) const {
        if (!n || !most) return;
        const int64_t step = std::max<int64_t>(1, BLOCK / (most * n));
        at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
            const c10::NoGradGuard guard;
            const Tensor room = at::empty({kept ? 0 : step * most * n}, beats.options());
            for (int64_t thread = begin; thread < end; thread++)
                for (int64_t first = records * thread / threads, stop = records * (thread + 1) / threads, last; first < stop; first = last) {
                    last = std::min(stop, first + step);
                    T* place = kept ? kept + first * most * n : room.template mutable_data_ptr<T>();
                    Tensor scores = at::from_blob(place, {(last - first) * most, n}, beats.options());
                    if (!there) at::mm_out(scores, matrix(beats, first, last), rows.t());
                    block(thread, first, last, place);
                }
        });
    }

    // Calls pair(Attention, group) for ECG b, which has beats, and every group of texts. scores (K, N): of the ECG; memory: to work in.
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
                                               const Tensor& sentence_count, const Tensor& temperatures, bool over_sentences,
                                               bool mean, int64_t keep) {
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
                                                        const Tensor& temperatures, bool over_sentences, bool mean,
                                                        const Tensor& kept) {
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
                for (int64_t s = 0; s < group.sentences; s++)
                    for (int64_t i = 0; i < group.texts; i++) dn[s * group.texts + i] += r.of_norm[s * r.wide + i];
            });
            mirror(dg, count);
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

std::tuple<Tensor, Tensor> beat_similarity(const Tensor& beats, const Tensor& sentences, const Tensor& beat_count,
                                           const Tensor& sentence_count, const Tensor& temperatures, bool over_sentences, bool mean,
                                           int64_t keep) {
    return beats.scalar_type() == at::kDouble
        ? beat_forward<double>(beats, sentences, beat_count, sentence_count, temperatures, over_sentences, mean, keep)
        : beat_forward<float>(beats, sentences, beat_count, sentence_count, temperatures, over_sentences, mean, keep);
}

std::tuple<Tensor, Tensor, Tensor> beat_similarity_backward(const Tensor& grad, const Tensor& beats, const Tensor& sentences,
                                                            const Tensor& beat_count, const Tensor& sentence_count,
                                                            const Tensor& temperatures, bool over_sentences, bool mean,
                                                            const Tensor& kept) {
    return beats.scalar_type() == at::kDouble
        ? beat_backward<double>(grad, beats, sentences, beat_count, sentence_count, temperatures, over_sentences, mean, kept)
        : beat_backward<float>(grad, beats, sentences, beat_count, sentence_count, temperatures, over_sentences, mean, kept);
}

}  // namespace similarity
