// The token scale on the GPU for bf16 tokens and words: forward with the best tokens, and its gradients. What it means: similarity.py.
//
// Forward: a group of threads has two ECGs and some texts of at most 256 words together. A warp multiplies 64 tokens with 64 words on the
// tensor cores (m16n8k16), keeps the best token of each word in registers, and goes on to the next 64 tokens: scores are never written.
// Tiles of 32 dimensions come into shared memory asynchronously, one ahead of the other, swizzled so that no two lanes meet in a bank.
// Backward: each word collects from its tokens, each token from its words, in a fixed order: the same result every time.
// tests/cuda_on_host.h stands in for the few instructions below and runs the kernels on the host, a thread of the machine for every lane.
#include "similarity_cuda.h"

#include "launch.h"

#ifdef __CUDACC__
// c (16 x 8) += a (16 x 16) * b (16 x 8), spread over a warp: lane 4 g + t has of a the rows g and g + 8, columns 2 t, 2 t + 1 and the same
// plus 8; of b the column g and the same rows; of c the rows g and g + 8, columns 2 t and 2 t + 1.
static __device__ __forceinline__ void multiply(float* c, const unsigned* a, const unsigned* b) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// 16 bytes to shared memory, zeros if there is nothing to read; arrive: those asked for before the last `ahead` batches are there.
static __device__ __forceinline__ void fetch(void* shared, const void* global, bool there) {
    const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(there ? 16 : 0) : "memory");
}
static __device__ __forceinline__ void end_batch() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int AHEAD> static __device__ __forceinline__ void arrive() { asm volatile("cp.async.wait_group %0;" ::"n"(AHEAD) : "memory"); }
template <class T> static __device__ __forceinline__ T from_lane_xor(T x, int lanes) { return __shfl_xor_sync(~0u, x, lanes); }
static __device__ __forceinline__ unsigned lanes_with(bool x) { return __ballot_sync(~0u, x); }
static __device__ __forceinline__ int lowest(unsigned bits) { return __ffs(bits) - 1; }
#endif

namespace similarity {

constexpr int ECGS = 2, TOKENS = 64, WORDS = 256, DEPTH = 32;  // of a group; a warp: 64 tokens of one ECG, 64 words
constexpr int WARPS = ECGS * WORDS / 64, THREADS = 32 * WARPS;
constexpr int ROWS = ECGS * TOKENS + WORDS;                    // rows of a tile, 64 bytes each

struct alignas(16) Tile { uint16_t row[ROWS][DEPTH]; };  // 24 KB: tokens of the first ECG, of the second, words

// Where eight dimensions of a row stand in a tile.
static __device__ __forceinline__ int chunk_at(int row, int chunk) { return 8 * (chunk ^ (row >> 1 & 3)); }

static __device__ __forceinline__ unsigned two_at(const Tile& tile, int row, int depth) {
    unsigned both;
    memcpy(&both, &tile.row[row][chunk_at(row, depth / 8) + depth % 8], 4);
    return both;
}

struct Sides {  // token_count, word_count: rows that are real, to be read by count_of
    const uint16_t *tokens, *words;  // (B, T, D), (C, W, D) bf16
    const int64_t *token_count, *word_count;
    int records, texts, length, most, dim;
};

// Of ECG or text i: no more rows than there are, whatever is said.
static __device__ __forceinline__ int count_of(const int64_t* counts, int i, int rows) {
    const int64_t count = counts[i];
    return count < 0 ? 0 : count < rows ? int(count) : rows;
}

static __device__ __forceinline__ void load(Tile& tile, const Sides& s, int ecg, int first_token, int first_text, int texts,
                                            int first_word, int depth) {
    for (int i = threadIdx.x; i < ROWS * DEPTH / 8; i += THREADS) {
        const int row = i / (DEPTH / 8), chunk = i % (DEPTH / 8), d = depth + 8 * chunk;
        const uint16_t* from = s.words;
        bool there = d < s.dim;
        if (row < ECGS * TOKENS) {
            const int b = ecg + row / TOKENS, t = first_token + row % TOKENS;
            there = there && b < s.records && t < s.length;
            if (there) from = s.tokens + (size_t(b) * s.length + t) * s.dim + d;
        } else {  // words of several short texts stand one behind the other; of a long one a part
            const int w = row - ECGS * TOKENS + first_word;
            there = there && w < texts * s.most;
            if (there) from = s.words + (size_t(first_text) * s.most + w) * s.dim + d;
        }
        fetch(&tile.row[row][chunk_at(row, chunk)], from, there);
    }
    end_batch();
}

// Grid: texts / texts of a group, then ECGs / 2. -> similarity (B, C) and best (B, C, W).
static __global__ void __launch_bounds__(THREADS)
token_kernel(Sides s, int texts_of_group, int text_groups, float* similarity, int16_t* best) {
    __shared__ Tile tiles[2];
    float(*value)[WORDS] = reinterpret_cast<float(*)[WORDS]>(&tiles[0]);  // of the best tokens, when the tiles have been used
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, mine = warp / (WORDS / 64);
    const int ecg = int(blockIdx.x / text_groups) * ECGS, first_text = int(blockIdx.x % text_groups) * texts_of_group;
    const int texts = s.texts - first_text < texts_of_group ? s.texts - first_text : texts_of_group;
    const int b = ecg + mine, count = b < s.records ? count_of(s.token_count, b, s.length) : 0;
    const int column = warp % (WORDS / 64) * 64;
    const int steps = (s.dim + DEPTH - 1) / DEPTH, parts = (s.length + TOKENS - 1) / TOKENS;
    float whole = 0;  // of thread ECG * texts + text: the sum over its words
    for (int first_word = 0; first_word < texts * s.most; first_word += WORDS) {
        float top[16];  // words column + 8 j + 2 t and + 1
        int at[16];
        for (int j = 0; j < 16; j++) top[j] = -INFINITY, at[j] = 0;
        load(tiles[0], s, ecg, 0, first_text, texts, first_word, 0);
        for (int part = 0, step = 0; part < parts; part++) {
            float c[4][8][4] = {};
            for (int k = 0; k < steps; k++, step++) {
                if (step + 1 < parts * steps) {
                    const int next = step + 1;
                    load(tiles[next % 2], s, ecg, next / steps * TOKENS, first_text, texts, first_word, next % steps * DEPTH);
                    arrive<1>();
                } else {
                    arrive<0>();
                }
                __syncthreads();
                const Tile& tile = tiles[step % 2];
#pragma unroll
                for (int depth = 0; depth < DEPTH; depth += 16) {
                    unsigned x[4][4], y[8][2];
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        for (int q = 0; q < 4; q++)
                            x[i][q] = two_at(tile, mine * TOKENS + 16 * i + g + q % 2 * 8, depth + 2 * t + q / 2 * 8);
#pragma unroll
                    for (int j = 0; j < 8; j++)
                        for (int q = 0; q < 2; q++)
                            y[j][q] = two_at(tile, ECGS * TOKENS + column + 8 * j + g, depth + 2 * t + q * 8);
#pragma unroll
                    for (int i = 0; i < 4; i++)
#pragma unroll
                        for (int j = 0; j < 8; j++) multiply(c[i][j], x[i], y[j]);
                }
                __syncthreads();
            }
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 8; j++)
#pragma unroll
                    for (int q = 0; q < 4; q++) {
                        const int token = part * TOKENS + 16 * i + g + q / 2 * 8, k = 2 * j + q % 2;
                        const float x = c[i][j][q];
                        if (token < count && !(x <= top[k]) && top[k] == top[k]) top[k] = x, at[k] = token;  // NaN is not lost
                    }
        }
#pragma unroll
        for (int k = 0; k < 16; k++)
            for (int lanes = 4; lanes < 32; lanes *= 2) {  // the lanes of a column
                const float x = from_lane_xor(top[k], lanes);
                const int place = from_lane_xor(at[k], lanes);
                const bool nan = top[k] != top[k], other_nan = x != x, first = place < at[k];
                if (other_nan ? !nan || first : !nan && (x > top[k] || (x == top[k] && first))) top[k] = x, at[k] = place;
            }
        if (g == 0)
            for (int k = 0; k < 16; k++) {
                const int w = column + 8 * (k / 2) + 2 * t + k % 2, here = first_word + w;
                value[mine][w] = top[k];
                if (b < s.records && here < texts * s.most)
                    best[(size_t(b) * s.texts + first_text) * s.most + here] = int16_t(at[k]);
            }
        __syncthreads();
        if (int(threadIdx.x) < ECGS * texts) {
            const int e = threadIdx.x / texts, text = threadIdx.x % texts;
            const int words = count_of(s.word_count, first_text + text, s.most);
            const int from = text * s.most, to = from + words;  // counted through all texts of the group
            for (int w = from > first_word ? from : first_word; w < to && w < first_word + WORDS; w++) whole += value[e][w - first_word];
        }
        __syncthreads();
    }
    if (int(threadIdx.x) < ECGS * texts) {
        const int e = threadIdx.x / texts, c = first_text + threadIdx.x % texts;
        const int words = count_of(s.word_count, c, s.most);
        if (ecg + e < s.records) {
            const bool real = words && s.token_count[ecg + e] > 0;
            similarity[size_t(ecg + e) * s.texts + c] = real ? whole / float(words) : 0.f;
        }
    }
}

static __device__ __forceinline__ float to_float(uint16_t x) {
    const unsigned bits = unsigned(x) << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

static __device__ __forceinline__ float share_of(const Sides& s, const float* grad, int b, int c) {
    const float words = float(count_of(s.word_count, c, s.most));
    return s.token_count[b] > 0 ? grad[size_t(b) * s.texts + c] / words : 0.f;
}

// Grid: words. A word collects from the token it took in every ECG.
static __global__ void words_kernel(Sides s, const float* grad, const int16_t* best, float* of_words) {
    const int c = int(blockIdx.x / s.most), w = int(blockIdx.x % s.most);
    for (int d = threadIdx.x; d < s.dim; d += blockDim.x) {
        float sum = 0;
        if (w < s.word_count[c])
            for (int b = 0; b < s.records; b++) {
                const int token = best[(size_t(b) * s.texts + c) * s.most + w];
                if (token < 0 || token >= s.length) {  // never of token_kernel
                    sum = NAN;
                    break;
                }
                sum += share_of(s, grad, b, c) * to_float(s.tokens[(size_t(b) * s.length + token) * s.dim + d]);
            }
        of_words[(size_t(c) * s.most + w) * s.dim + d] = sum;
    }
}

// Grid: ECGs, then their tokens by 32. A warp has four tokens, one after the other, and looks for the words that took it.
static __global__ void tokens_kernel(Sides s, const float* grad, const int16_t* best, float* of_tokens) {
    const int parts = (s.length + 31) / 32, b = int(blockIdx.x / parts), lane = threadIdx.x % 32, all = s.texts * s.most;
    for (int i = 0; i < 4; i++) {
        const int token = int(blockIdx.x % parts) * 32 + 4 * (threadIdx.x / 32) + i;
        if (token >= s.length) continue;
        for (int first = 0; first < s.dim; first += 256) {
            float sum[8] = {};  // dimensions first + lane, + 32 ..
            for (int start = 0; start < all; start += 32) {
                const int u = start + lane;
                const bool took = u < all && u % s.most < s.word_count[u / s.most] && best[size_t(b) * all + u] == token;
                for (unsigned left = lanes_with(took); left; left &= left - 1) {
                    const int word = start + lowest(left);
                    const float share = share_of(s, grad, b, word / s.most);
                    for (int j = 0; j < 8; j++) {
                        const int d = first + 32 * j + lane;
                        if (d < s.dim) sum[j] += share * to_float(s.words[size_t(word) * s.dim + d]);
                    }
                }
            }
            for (int j = 0; j < 8; j++) {
                const int d = first + 32 * j + lane;
                if (d < s.dim) of_tokens[(size_t(b) * s.length + token) * s.dim + d] = sum[j];
            }
        }
    }
}

const char* token_forward_cuda(const void* tokens, const void* words, const int64_t* token_count, const int64_t* word_count, int records,
                               int texts, int length, int most, int dim, float* similarity, int16_t* best, void* stream) {
    const Sides s{static_cast<const uint16_t*>(tokens), static_cast<const uint16_t*>(words), token_count, word_count,
                  records, texts, length, most, dim};
    int texts_of_group = WORDS / most;
    texts_of_group = texts_of_group < 1 ? 1 : texts_of_group > THREADS / ECGS ? THREADS / ECGS : texts_of_group;
    const int text_groups = (texts + texts_of_group - 1) / texts_of_group;
    LAUNCH(token_kernel, text_groups * ((records + ECGS - 1) / ECGS), THREADS, stream, s, texts_of_group, text_groups, similarity, best);
    return what_failed();
}

const char* token_backward_cuda(const float* grad, const void* tokens, const void* words, const int64_t* token_count,
                                const int64_t* word_count, const int16_t* best, int records, int texts, int length, int most, int dim,
                                float* of_tokens, float* of_words, void* stream) {
    const Sides s{static_cast<const uint16_t*>(tokens), static_cast<const uint16_t*>(words), token_count, word_count,
                  records, texts, length, most, dim};
    LAUNCH(words_kernel, texts * most, dim < 128 ? 64 : 128, stream, s, grad, best, of_words);
    LAUNCH(tokens_kernel, records * ((length + 31) / 32), 256, stream, s, grad, best, of_tokens);
    return what_failed();
}

}  // namespace similarity
