// segment_beats and beat_of_token on the GPU. The method: reference.py; the rules, and the arithmetic to the last bit: beats.h.
//
// Reading the samples is what takes time. Of every row (a lead of a record) a group of threads makes blocks, which are 1/16 of the
// bytes, then feature and levels, while the other groups of the processor read theirs. A second kernel goes from there to a
// record's peaks. Both run twice, the second time for records with pacing spikes only. Nothing comes back to the host.
// Kernels use no warp intrinsics: tests/cuda_on_host.h runs them on the host, a thread of the machine for every CUDA thread.
#include "beats.h"
#include "launch.h"

namespace beats {

constexpr int THREADS = 128;  // of a group

struct Workspace {  // pieces of one allocation, a row a record and lead unless said otherwise
    uint16_t* blocks;                          // stored plus 32768
    int16_t *feature, *votes;                  // votes: a row a record
    int *zeros, *sharp;                        // a number a row; a number a record: does it hold pacing spikes?
    Level* levels;                             // (records, chunks, leads)
    Noise* noise;                              // (records, chunks)
    int* gains;                                // (records, chunks, leads)
    int *at, *height, *corner, *found, *chosen, *best;  // (records, max_candidates)

    size_t carve(char* memory, int records, int leads, const Plan& p) {
        size_t used = 0;
        auto take = [&](auto*& pointer, size_t count) {
            pointer = reinterpret_cast<typename std::remove_reference<decltype(pointer)>::type>(memory + used);
            used += (count * sizeof(*pointer) + 255) / 256 * 256;
        };
        const size_t rows = size_t(records) * leads, candidates = size_t(records) * p.max_candidates;
        take(blocks, rows * p.blocks), take(feature, rows * p.ticks), take(votes, size_t(records) * p.ticks);
        take(zeros, rows), take(sharp, records), take(levels, rows * p.chunks), take(gains, rows * p.chunks);
        take(noise, size_t(records) * p.chunks);
        for (int** list : {&at, &height, &corner, &found, &chosen, &best}) take(*list, candidates);
        return used;
    }
};

// ---- rows: samples -> blocks, feature, levels -----------------------------------------------------------------------

// Copies BLOCK samples at x, 16 bytes at a time where they are aligned.
template <int BLOCK, class T> __device__ void read(const T* x, T* samples) {
    constexpr int WIDE = 16 / sizeof(T);
    if (BLOCK >= WIDE && reinterpret_cast<uintptr_t>(x) % 16 == 0) {
        for (int i = 0; i < BLOCK / WIDE; i++) reinterpret_cast<uint4*>(samples)[i] = reinterpret_cast<const uint4*>(x)[i];
    } else {
        for (int i = 0; i < BLOCK; i++) samples[i] = x[i];
    }
}

template <int BLOCK, class T> __device__ void make_blocks(const T* x, T origin, const Plan& p, uint16_t* blocks) {
    const int zero = whole(origin);
    for (int i = threadIdx.x; i < p.blocks; i += blockDim.x) {
        alignas(16) T samples[BLOCK < 8 ? 8 : BLOCK];
        read<BLOCK>(x + size_t(BLOCK) * i, samples);
        bool complete = true;
        for (int j = 0; j < BLOCK; j++) complete &= is_valid(samples[j]);
        const Filled<T> filled{x, BLOCK * i, p.hold, origin};
        const int mean = complete ? mean_of<BLOCK, T>(static_cast<const T*>(samples), zero) : mean_of<BLOCK, T>(filled, zero);
        blocks[i] = uint16_t(mean + 32768);
    }
}

template <int BLOCK, class T> __device__ void take_out_spikes(const T* x, T origin, const Plan& p, uint16_t* blocks) {
    const Filled<T> filled{x, 0, p.hold, origin};
    for (int i = threadIdx.x; i < p.blocks; i += blockDim.x)
        if (is_steep<BLOCK, T>(filled + BLOCK * i, p.steep))
            blocks[i] = uint16_t(despiked<BLOCK, T>(filled, i, p, whole(origin)) + 32768);
}

__device__ Level level_of(const int16_t* feature, const Plan& p, int c) {  // all threads together
    __shared__ int top[MAX_SEGMENTS], lasting[MAX_SEGMENTS];
    const int segments = p.segments(c);
    __syncthreads();  // the last level has been read
    for (int i = threadIdx.x; i < MAX_SEGMENTS; i += blockDim.x) top[i] = lasting[i] = 0;
    __syncthreads();
    for (int i = p.chunk(c) + threadIdx.x, s = 0; i < p.chunk(c + 1); i += blockDim.x) {
        while (i >= p.segment_start(c, s + 1)) s++;
        if (feature[i]) atomicMax(&top[s], feature[i]);
        if (i + p.around > p.segment_start(c, s + 1)) continue;
        int low = feature[i];
        for (int j = 1; j < p.around; j++) low = least(low, feature[i + j]);
        if (low) atomicMax(&lasting[s], low);
    }
    __syncthreads();
    bool beat[MAX_SEGMENTS], noise[MAX_SEGMENTS];
    clear_segments(top, lasting, segments, beat, noise);
    return Level(usual(top, beat, segments), usual(lasting, noise, segments));
}

// A group a row. again: only rows of records with spikes, which are taken out.
template <int BLOCK, class T> __global__ void rows_kernel(const T* ecg, int leads, Plan p, Workspace w, bool again) {
    const size_t row = blockIdx.x, record = row / leads;
    if (again && !w.sharp[record]) return;
    const T *x = ecg + row * p.length, from = origin(x, p.length);
    uint16_t* blocks = w.blocks + row * p.blocks;
    int16_t* feature = w.feature + row * p.ticks;
    if (threadIdx.x == 0) w.zeros[row] = whole(from);
    if (again) take_out_spikes<BLOCK>(x, from, p, blocks);
    else make_blocks<BLOCK>(x, from, p, blocks);
    __syncthreads();
    for (int i = threadIdx.x; i < p.ticks; i += blockDim.x) feature[i] = int16_t(feature_at(blocks, i, p));
    __syncthreads();
    for (int c = 0; c < p.chunks; c++) {
        const Level level = level_of(feature, p, c);
        if (threadIdx.x == 0) w.levels[(record * p.chunks + c) * leads + row % leads] = level;
    }
}

// ---- records: levels -> peaks ---------------------------------------------------------------------------------------

struct Record {  // one record's part of the workspace
    const uint16_t* blocks;
    const int16_t* feature;
    const int* zeros;
    const Level* levels;
    int16_t* votes;
    Noise* noise;
    int *gains, *at, *height, *corner, *found, *chosen, *best;

    __device__ Record(const Workspace& w, size_t i, int leads, const Plan& p)
        : blocks(w.blocks + i * leads * p.blocks), feature(w.feature + i * leads * p.ticks), zeros(w.zeros + i * leads),
          levels(w.levels + i * leads * p.chunks), votes(w.votes + i * p.ticks), noise(w.noise + i * p.chunks),
          gains(w.gains + i * leads * p.chunks), at(w.at + i * p.max_candidates),
          height(w.height + i * p.max_candidates), corner(w.corner + i * p.max_candidates),
          found(w.found + i * p.max_candidates), chosen(w.chosen + i * p.max_candidates),
          best(w.best + i * p.max_candidates) {}
};

__device__ void count_votes(const Record& r, int leads, const Plan& p) {
    for (int c = 0; c < p.chunks; c++) {
        const Level* levels = r.levels + c * leads;
        int top = 0, largest = 1;
        for (int l = 0; l < leads; l++) top = most(top, levels[l].ratio);
        const auto share = [&](int l) { return levels[l].share(levels[l].weight(top)); };
        for (int l = 0; l < leads; l++) largest = most(largest, share(l));
        Noise noise{};
        for (int l = 0; l < leads; l++) {
            const int gain = share(l) * 1023 / largest;
            noise.noise += gain * levels[l].noise, noise.gain += gain, noise.full += levels[l].weight(top);
            if (threadIdx.x == 0) r.gains[c * leads + l] = gain;
        }
        if (threadIdx.x == 0) r.noise[c] = noise;
        for (int i = p.chunk(c) + threadIdx.x; i < p.chunk(c + 1); i += blockDim.x) {
            int sum = 0;
            for (int l = 0; l < leads; l++)
                sum += levels[l].vote(r.feature[size_t(l) * p.ticks + i], levels[l].scale(), levels[l].gain(levels[l].weight(top)));
            r.votes[i] = int16_t(sum);
        }
    }
    __syncthreads();
}

// The corners of n candidates, a team of 32 threads each; corner and height are 0 where there can be no beat.
__device__ void find_corners(const Record& r, int n, int leads, const Plan& p) {
    constexpr int TEAMS = THREADS / 32;
    __shared__ int corner[TEAMS], size[TEAMS];
    const int team = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int start = 0; start < n; start += TEAMS) {
        const int i = start + team;
        if (lane == 0) corner[team] = size[team] = 0;
        __syncthreads();
        if (i < n && comes_and_goes(r.height[i], r.votes[r.at[i]], r.noise[p.chunk_of(r.at[i])])) {
            const int at = r.at[i], tick = at + lane - 1, *gains = r.gains + size_t(p.chunk_of(at)) * leads;
            int here = 0, largest = 0, feature = 0;
            for (int l = 0; l < leads; l++) {
                if (lane < p.corners()) {
                    const uint16_t* blocks = r.blocks + size_t(l) * p.blocks;
                    const int own = corner_at(blocks, p.corner_start(at) + lane, p) * gains[l];
                    here += own, largest = most(largest, own);
                }
                if (lane < 3 && tick >= 0 && tick < p.ticks)
                    feature += r.feature[size_t(l) * p.ticks + tick] * gains[l];
            }
            atomicMax(&corner[team], believed(here, largest, leads));
            atomicMax(&size[team], feature);
        }
        __syncthreads();
        if (i < n && lane == 0) {
            const bool can_be = comes_and_goes(r.height[i], r.votes[r.at[i]], r.noise[p.chunk_of(r.at[i])])
                             && is_no_p_wave(corner[team], size[team], r.noise[p.chunk_of(r.at[i])]);
            r.corner[i] = can_be ? corner[team] : 0;
            if (!can_be) r.height[i] = 0;
        }
        __syncthreads();
    }
}

__device__ Candidates find_candidates(const Record& r, int leads, const Plan& p) {
    __shared__ int begins[THREADS], count;
    if (threadIdx.x == 0) count = 0;
    __syncthreads();
    for (int start = 0; start < p.ticks; start += THREADS) {  // in order
        const int own = start + int(threadIdx.x);
        begins[threadIdx.x] = own < p.ticks && begins_candidate(r.votes, own, p);
        __syncthreads();
        if (threadIdx.x == 0)
            for (int i = 0; i < THREADS; i++) if (begins[i]) r.at[count++] = start + i;
        __syncthreads();
    }
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        r.at[i] = plateau_middle(r.votes, r.at[i], p);
        r.height[i] = height_at(r.votes, r.at[i], p);
    }
    __syncthreads();
    find_corners(r, count, leads, p);
    return {r.at, r.height, r.corner, count};
}

__device__ int choose_beats(const Record& r, Candidates c, const Plan& p) {  // -> r.chosen: how many
    __shared__ int chosen;
    for (int k = 0; k < p.chunks; k++) {
        const Demand d = demand(c, k, r.noise[k], p);
        const int stop = first_from(c, p.chunk(k + 1));
        for (int i = first_from(c, p.chunk(k)) + threadIdx.x; i < stop; i += blockDim.x) r.best[i] = is_beat(c, i, d, p);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        int found = 0, n = 0;
        for (int i = 0; i < c.n; i++) if (r.best[i]) r.found[found++] = i;
        for (int k = 0; k < found; k++) {
            r.chosen[n++] = r.found[k];
            const int missing = missing_beat(c, r.found, found, k);
            if (missing >= 0) r.chosen[n++] = missing;
        }
        chosen = n;
    }
    __syncthreads();
    return chosen;
}

// The peaks of n chosen candidates -> r.best; a team of 32 threads each. -> is one of them as sharp as a spike?
template <class T> __device__ bool locate(const T* ecg, const Record& r, Candidates c, int n, int leads, const Plan& p) {
    constexpr int TEAMS = THREADS / 32;
    __shared__ int moved[TEAMS][32], best_block[TEAMS], sharp;
    const int team = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) sharp = 0;
    __syncthreads();
    for (int start = 0; start < n; start += TEAMS) {
        const int k = start + team;
        const bool active = k < n;
        const int middle = active ? 2 * c.at[r.chosen[k]] : 0;
        const int* gains = r.gains + size_t(active ? p.chunk_of(c.at[r.chosen[k]]) : 0) * leads;
        const int first_block = most(0, middle - p.half);
        const int blocks = least(p.blocks - 1, middle + p.half) - first_block + 1;  // at most 20
        int sum = 0;
        if (active && lane < blocks)
            for (int l = 0; l < leads; l++) {
                const uint16_t* lead = r.blocks + size_t(l) * p.blocks;
                sum += magnitude(deflected(lead, first_block + lane, p) - base_of(lead, middle, p)) * gains[l];
            }
        moved[team][lane] = sum;
        __syncthreads();
        if (lane == 0) best_block[team] = first_block + largest_of(moved[team], blocks, p).place;
        __syncthreads();
        const int first = most(0, best_block[team] * p.block - p.margin());
        const int samples = least(p.length, (best_block[team] + 1) * p.block + p.margin()) - first;  // at most 32
        sum = 0;
        if (active && lane < samples)
            for (int l = 0; l < leads; l++) {
                const T x = ecg[size_t(l) * p.length + first + lane];
                const int base = base_of(r.blocks + size_t(l) * p.blocks, middle, p);
                if (is_valid(x)) sum += magnitude(mean_of<1, T>(&x, r.zeros[l]) - base) * gains[l];
            }
        moved[team][lane] = sum;
        __syncthreads();
        if (active && lane == 0) {
            const Deflection peak = largest_of(moved[team], samples, p);
            r.best[k] = first + peak.place;
            if (peak.sharp) atomicMax(&sharp, 1);
        }
        __syncthreads();
    }
    return sharp;
}

// A group a record. again: only records with spikes.
template <class T> __global__ void peaks_kernel(const T* ecg, int leads, Plan p, Workspace w, bool again, int* peaks, int* count) {
    __shared__ int kept;
    const size_t record = blockIdx.x;
    if (again && !w.sharp[record]) return;
    const Record r(w, record, leads, p);
    count_votes(r, leads, p);
    const Candidates c = find_candidates(r, leads, p);
    const int n = choose_beats(r, c, p);
    const bool sharp = locate(ecg + record * leads * p.length, r, c, n, leads, p);
    if (threadIdx.x == 0) {
        for (int k = 0; k < n; k++) r.chosen[k] = c.height[r.chosen[k]];
        kept = count[record] = keep_apart(r.best, r.chosen, n, p);
        w.sharp[record] = sharp;
    }
    __syncthreads();
    for (int k = threadIdx.x; k < p.max_peaks(); k += blockDim.x) peaks[record * p.max_peaks() + k] = k < kept ? r.best[k] : -1;
}

__global__ void beat_of_token_kernel(const int* peaks, const int* count, int max_peaks, int tokens, int length, int* beat) {
    const size_t record = blockIdx.x;
    for (int t = threadIdx.x; t < tokens; t += blockDim.x)
        beat[record * tokens + t] = beat_at(peaks + record * max_peaks, least(count[record], max_peaks), 0, t, tokens, length);
}

// ---- launches -------------------------------------------------------------------------------------------------------

template <int BLOCK, class T>
void segment_on(const T* ecg, int records, int leads, const Plan& p, int* peaks, int* count, const Workspace& w, void* stream) {
    for (bool again : {false, true}) {
        if (again && BLOCK < 4) break;  // too short for spikes to be taken out
        LAUNCH((rows_kernel<BLOCK, T>), records * leads, THREADS, stream, ecg, leads, p, w, again);
        LAUNCH((peaks_kernel<T>), records, THREADS, stream, ecg, leads, p, w, again, peaks, count);
    }
}

template <class T>
void segment_on(const void* all, int records, int leads, const Plan& p, int* peaks, int* count, const Workspace& w, void* stream) {
    const T* ecg = static_cast<const T*>(all);
    switch (p.block) {
        case 1: return segment_on<1>(ecg, records, leads, p, peaks, count, w, stream);
        case 2: return segment_on<2>(ecg, records, leads, p, peaks, count, w, stream);
        case 4: return segment_on<4>(ecg, records, leads, p, peaks, count, w, stream);
        case 8: return segment_on<8>(ecg, records, leads, p, peaks, count, w, stream);
        default: return segment_on<16>(ecg, records, leads, p, peaks, count, w, stream);
    }
}

size_t workspace_bytes(int records, int leads, const Plan& plan) { return Workspace().carve(nullptr, records, leads, plan); }

const char* segment_cuda(const void* ecg, bool is_float, int records, int leads, const Plan& plan, int* peaks, int* count,
                         void* workspace, void* stream) {
    if (!records) return nullptr;
    Workspace w;
    w.carve(static_cast<char*>(workspace), records, leads, plan);
    if (is_float) segment_on<float>(ecg, records, leads, plan, peaks, count, w, stream);
    else segment_on<int16_t>(ecg, records, leads, plan, peaks, count, w, stream);
    return what_failed();
}

const char* beat_of_token_cuda(const int* peaks, const int* count, int records, int max_peaks, int tokens, int length, int* beat,
                               void* stream) {
    if (!records || !tokens) return nullptr;
    LAUNCH(beat_of_token_kernel, records, THREADS, stream, peaks, count, max_peaks, tokens, length, beat);
    return what_failed();
}

}  // namespace beats
