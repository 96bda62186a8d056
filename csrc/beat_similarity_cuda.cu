// The beat scale on the GPU: from the scores of some ECGs' beats with all sentences to the similarities, and back. What it computes:
// similarity.py; the matrix products around it: beat_similarity_gpu.cpp.
//
// A group of threads has one ECG and some texts, a thread one sentence: a column of the scores. What the sentences of a text exchange, and
// the attention over beats, stands in shared memory; sums over sentences and groups go to places of their own and are added up
// afterwards, in a fixed order: the same result every time. tests/cuda_on_host.h runs the kernels on the host.
#include "similarity_cuda.h"

#include "launch.h"

#ifdef __CUDACC__
static __device__ __forceinline__ float* shared_memory() {
    extern __shared__ float4 memory[];
    return reinterpret_cast<float*>(memory);
}
#endif

namespace similarity {

constexpr int SENTENCES = 128;       // of a group at most; as many threads
constexpr int ROOM = 48 * 1024 / 4;  // numbers in a group's shared memory, on every GPU

using Four = Quad<float>;

struct Workspace {  // a group's shared memory. Rows are `stride` apart: neither the threads of a warp nor rows meet in a bank
    Four* gram;            // (beats, quarters)
    float *line, *second;  // (threads)
    float *a, *p, *w;      // (beats, threads): attention over beats, softmax over sentences, and that times its gradient
    int quarters, stride;
};

struct Sentence { int ecg, beats, column, text, first, last; };  // first, last: threads of its text. Without beats, if there is none

static int room(int beats, int threads, int rows) {  // rows: a, or a and p, or all three
    const int quarters = (beats + 3) / 4;
    return 16 * quarters * quarters + 2 * threads + rows * beats * (threads + 1);
}

int beat_columns(int beats, bool over_sentences) {
    int columns = beats < ROOM ? SENTENCES : 0;  // more would overflow below
    while (columns && room(beats, columns, over_sentences ? 3 : 1) > ROOM) columns -= 32;
    return columns;
}

static __device__ __forceinline__ Workspace workspace_of(const BeatScale& r) {
    const int threads = blockDim.x;
    Workspace s;
    s.quarters = (r.beats + 3) / 4, s.stride = threads + 1;
    s.gram = reinterpret_cast<Four*>(shared_memory());
    s.line = reinterpret_cast<float*>(s.gram + 4 * s.quarters * s.quarters), s.second = s.line + threads;
    s.a = s.second + threads, s.p = s.a + r.beats * s.stride, s.w = s.p + r.beats * s.stride;
    return s;
}

static __device__ __forceinline__ Sentence sentence_of(const BeatScale& r) {
    const int group = blockIdx.x % r.groups, start = int(r.starts[r.first_text[group]]), end = int(r.starts[r.first_text[group + 1]]);
    Sentence mine{int(blockIdx.x) / r.groups, 0, start + int(threadIdx.x), 0, 0, 0};
    if (mine.column < end) {
        mine.beats = int(r.beat_count[mine.ecg]), mine.text = int(r.text[mine.column]);
        mine.first = int(r.starts[mine.text]) - start, mine.last = int(r.starts[mine.text + 1]) - start;
    }
    return mine;
}

static __device__ __forceinline__ float largest_of(const float* row, const Sentence& mine) {
    float top = row[mine.first];
    for (int i = mine.first + 1; i < mine.last; i++) top = fmaxf(top, row[i]);
    return top;
}
static __device__ __forceinline__ float sum_of(const float* row, const Sentence& mine) {
    float sum = 0;
    for (int i = mine.first; i < mine.last; i++) sum += row[i];
    return sum;
}

// sum += rows first to first + 3 of the Gram matrix, columns from to end, times the thread's a
static __device__ __forceinline__ void add_products(const Workspace& s, int first, int from, int end, Four& sum) {
    for (int m = from; m < end; m++) {
        const float a = s.a[m * s.stride + threadIdx.x];
        const Four g = s.gram[m * s.quarters + first / 4];
        for (int i = 0; i < 4; i++) sum.of[i] = fmaf(g.of[i], a, sum.of[i]);
    }
}

// Of the attended beat: dot product with the sentence, squared length, length. share: the sentence's of its text.
struct Attended { float up, square, root, lengths, cosine, share, similarity; };

// x: the sentence's scores, `sentences` apart. Leaves s.a, and s.p where there is one. All threads of the group must come.
static __device__ __forceinline__ Attended attend(const BeatScale& r, const Sentence& mine, const float* x, Workspace& s) {
    const int j = threadIdx.x, n = r.sentences;
    const float temperature = r.temperatures[0];
    for (int k = j / 32; k < r.beats; k += blockDim.x / 32)
        for (int m = j % 32; m < 4 * s.quarters; m += 32)
            s.gram[k * s.quarters + m / 4].of[m % 4] = m < r.beats ? r.gram[(size_t(mine.ecg) * r.beats + k) * r.beats + m] : 0.f;
    if (r.over_sentences) {
        for (int k = 0; k < mine.beats; k++) s.p[k * s.stride + j] = x[size_t(k) * n];
        __syncthreads();
        for (int k = 0; k < mine.beats; k++) {
            const float* row = s.p + k * s.stride;
            s.a[k * s.stride + j] = expf(row[j] - largest_of(row, mine));
        }
        __syncthreads();
        for (int k = 0; k < mine.beats; k++) {
            const float* row = s.a + k * s.stride;
            s.p[k * s.stride + j] = row[j] / sum_of(row, mine);
        }
    }
    __syncthreads();
    float top = -INFINITY, all = 0, up = 0;
    for (int k = 0; k < mine.beats; k++) {
        const float z = temperature * (r.over_sentences ? s.p[k * s.stride + j] : x[size_t(k) * n]);
        s.a[k * s.stride + j] = z, top = fmaxf(top, z);
    }
    for (int k = 0; k < mine.beats; k++) {
        const float e = expf(s.a[k * s.stride + j] - top);
        s.a[k * s.stride + j] = e, all += e, up += e * x[size_t(k) * n];
    }
    const float part = 1 / all;
    for (int k = 0; k < mine.beats; k++) s.a[k * s.stride + j] *= part;
    Attended v{up * part};
    for (int k = 0; k < mine.beats; k += 4) {  // a' G a: what stands left of four rows' square on the diagonal counts twice
        const int end = k + 4 < mine.beats ? k + 4 : mine.beats;
        Four sum{};
        add_products(s, k, 0, k, sum);
        for (int i = 0; i < 4; i++) sum.of[i] *= 2;
        add_products(s, k, k, end, sum);
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (k + i < end) v.square += s.a[(k + i) * s.stride + j] * sum.of[i];
    }
    v.root = sqrtf(v.square < 0 ? 0.f : v.square);  // NaN stays
    v.lengths = mine.beats ? v.root * r.norm[mine.column] : 0.f;
    v.cosine = v.up / (v.lengths > SMALLEST ? v.lengths : SMALLEST);
    const float logit = r.temperatures[1] * v.cosine;
    s.line[j] = logit;
    __syncthreads();
    const float highest = mine.beats ? largest_of(s.line, mine) : 0.f;
    s.second[j] = expf(logit - highest);
    __syncthreads();
    const float sum = sum_of(s.second, mine);
    v.share = s.second[j] / sum;
    v.similarity = highest + logf(r.mean ? sum / float(mine.last - mine.first) : sum);
    return v;
}

// Grid: groups of texts, then ECGs. -> similarity (records, texts), where both sides have rows.
static __global__ void __launch_bounds__(SENTENCES) beat_forward_kernel(BeatScale r, const float* scores, float* similarity) {
    const Sentence mine = sentence_of(r);
    if (!r.beat_count[mine.ecg]) return;
    Workspace s = workspace_of(r);
    const Attended v = attend(r, mine, scores + size_t(mine.ecg) * r.beats * r.sentences + mine.column, s);
    if (mine.beats && int(threadIdx.x) == mine.first) similarity[size_t(mine.ecg) * r.texts + mine.text] = v.similarity;
}

// Sum over a group's sentences of s.line a a' -> of_gram (most, most), by squares of SIDE by SIDE.
template <int SIDE>
static __device__ __forceinline__ void add_up_gram(const Workspace& s, int beats, int sentences, int most, float* of_gram) {
    const int side = (beats + SIDE - 1) / SIDE;
    for (int square = threadIdx.x; square < side * (side + 1) / 2; square += blockDim.x) {
        int k = 0, m = square;  // of the lower triangle
        while (m > k) m -= ++k;
        k *= SIDE, m *= SIDE;
        float sum[SIDE][SIDE] = {};
        for (int j = 0; j < sentences; j++) {
            float left[SIDE], right[SIDE];
#pragma unroll
            for (int i = 0; i < SIDE; i++) {
                left[i] = k + i < beats ? s.line[j] * s.a[(k + i) * s.stride + j] : 0.f;
                right[i] = m + i < beats ? s.a[(m + i) * s.stride + j] : 0.f;
            }
#pragma unroll
            for (int i = 0; i < SIDE; i++)
#pragma unroll
                for (int q = 0; q < SIDE; q++) sum[i][q] = fmaf(left[i], right[q], sum[i][q]);
        }
#pragma unroll
        for (int i = 0; i < SIDE; i++)
#pragma unroll
            for (int q = 0; q < SIDE; q++)
                if (k + i < beats && m + q < beats)
                    of_gram[(k + i) * most + m + q] = of_gram[(m + q) * most + k + i] = sum[i][q];
    }
}

// Grid: groups of texts, then ECGs. Scores become their gradients. of_gram and of_sentences must be zero.
static __global__ void __launch_bounds__(SENTENCES, 8)  // left alone, the compiler wants a ninth group at a time, and spills
beat_backward_kernel(BeatScale r, const float* grad, float* scores, float* of_gram, float* of_sentences) {
    const Sentence mine = sentence_of(r);
    const int j = threadIdx.x, n = r.sentences, beats = int(r.beat_count[mine.ecg]), group = blockIdx.x % r.groups;
    float* x = scores + size_t(mine.ecg) * r.beats * n + mine.column;
    if (mine.last)
        for (int k = beats; k < r.beats; k++) x[size_t(k) * n] = 0;
    if (!beats) return;
    Workspace s = workspace_of(r);
    const Attended v = attend(r, mine, x, s);
    if (mine.last) {
        const float temperature = r.temperatures[0], share = v.share * grad[size_t(mine.ecg) * r.texts + mine.text];
        const float d = share * r.temperatures[1];  // gradient of the cosine
        const bool large = v.lengths > SMALLEST;
        const float of_up = d / (large ? v.lengths : SMALLEST);
        const float of_square = large ? -d * v.cosine / (v.root * v.root) : 0.f;  // twice that of the attended beat's squared length
        const float inner = of_up * v.up + of_square * v.square;  // a' times its gradient
        float of_temperature = 0;
        for (int k = 0; k < beats; k += 4) {
            Four sum{};
            add_products(s, k, 0, beats, sum);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (k + i >= beats) continue;
                const int at = (k + i) * s.stride + j;
                const float one = x[size_t(k + i) * n], p = r.over_sentences ? s.p[at] : one;
                const float of_logit = s.a[at] * (of_up * one + of_square * sum.of[i] - inner), of_p = temperature * of_logit;
                of_temperature += of_logit * p;
                if (r.over_sentences) s.w[at] = p * of_p;
                else x[size_t(k + i) * n] = of_up * s.a[at] + of_p;
            }
        }
        float* of_mine = of_sentences + size_t(mine.ecg) * n + mine.column;
        const size_t whole = size_t(r.records) * n;
        of_mine[0] = large ? -d * v.cosine / r.norm[mine.column] : 0.f;
        of_mine[whole] = of_temperature, of_mine[2 * whole] = share * v.cosine;
        s.line[j] = of_square;
        if (r.over_sentences)
            for (int k = 0; k < beats; k++) x[size_t(k) * n] = of_up * s.a[k * s.stride + j];
    }
    __syncthreads();
    if (r.over_sentences && mine.last)
        for (int k = 0; k < beats; k++) {
            const float* row = s.w + k * s.stride;
            x[size_t(k) * n] += row[j] - s.p[k * s.stride + j] * sum_of(row, mine);
        }
    const int sentences = int(r.starts[r.first_text[group + 1]] - r.starts[r.first_text[group]]);
    float* of_mine = of_gram + (size_t(group) * r.records + mine.ecg) * r.beats * r.beats;
    if (beats > 32) add_up_gram<4>(s, beats, sentences, r.beats, of_mine);
    else add_up_gram<2>(s, beats, sentences, r.beats, of_mine);
}

const char* beat_forward_cuda(const BeatScale& r, const float* scores, float* similarity, void* stream) {
    const int threads = beat_columns(r.beats, r.over_sentences), memory = 4 * room(r.beats, threads, r.over_sentences ? 2 : 1);
    LAUNCH_WITH_MEMORY(beat_forward_kernel, r.groups * r.records, threads, memory, stream, r, scores, similarity);
    return what_failed();
}

const char* beat_backward_cuda(const BeatScale& r, const float* grad, float* scores, float* of_gram, float* of_sentences, void* stream) {
    const int threads = beat_columns(r.beats, r.over_sentences), memory = 4 * room(r.beats, threads, r.over_sentences ? 3 : 1);
    LAUNCH_WITH_MEMORY(beat_backward_kernel, r.groups * r.records, threads, memory, stream, r, grad, scores, of_gram, of_sentences);
    return what_failed();
}

}  // namespace similarity
