// The rules of segment_beats that the CPU and the CUDA version share; reference.py says what they mean and why.
// No PyTorch in here: beats_cuda.cu must compile without it.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define HD inline __attribute__((always_inline))
#else
#define HD inline
#endif

namespace beats {

HD int least(int a, int b) { return a < b ? a : b; }
HD int most(int a, int b) { return a > b ? a : b; }
HD int magnitude(int a) { return a < 0 ? -a : a; }
HD int middle_of_three(int a, int b, int c) { return most(least(a, b), least(most(a, b), c)); }

constexpr int MAX_LEADS = 12;
constexpr int MAX_SEGMENTS = 16;  // of a chunk: 15 s / 1 s and rounding
constexpr int MAX_BLOCK = 16;     // samples: 1000 Hz / 60 Hz, a power of two

struct Plan {  // reference.py, class Plan
    int length, block, blends, window, limit, half, step;
    int apart, around, refractory, near, after, ahead, early;
    int gap, edge, brief, hold;
    int blocks, ticks, chunks, max_candidates;  // of the record
    double segment;
    float steep[3];  // mV

    HD int before() const { return window / 2; }                 // blocks of a window before its middle, and behind it
    HD int behind() const { return window - window / 2; }
    HD int corner_start(int tick) const { return 2 * tick - half - 3 * step / 2; }  // first of those near
    HD int corners() const { return 2 * half + 1; }              // how many: 21 at most
    HD int margin() const { return most(1, block / 2); }         // samples beside the best block that may hold the peak
    HD int max_peaks() const { return (length + gap - 1) / gap; }
    HD int chunk(int c) const { return int(int64_t(ticks) * c / chunks); }  // where chunk c begins
    HD int chunk_of(int tick) const { return int((int64_t(tick + 1) * chunks - 1) / ticks); }
    HD int segments(int c) const { return most(2, int((chunk(c + 1) - chunk(c)) / segment + 0.5)); }
    HD int segment_start(int c, int i) const { return chunk(c) + int(int64_t(chunk(c + 1) - chunk(c)) * i / segments(c)); }
};

inline Plan make_plan(double fs, int length) {
    Plan p;
    p.length = length, p.block = 1;
    while (fs / (2 * p.block) >= 60) p.block *= 2;
    const double rate = fs / p.block;
    auto blocks = [rate](double seconds) { return int(seconds * rate + 0.5); };
    auto ticks = [rate](double seconds) { return int(seconds * rate / 2 + 0.5); };
    p.blends = 1 + (rate < 75);
    for (int i = 0; i < 3; i++) p.steep[i] = float(250 * double(1 << 2 * i) / fs);
    p.window = blocks(0.11), p.limit = 32767 / p.window, p.half = blocks(0.08);
    p.step = blocks(0.016), p.segment = rate / 2;
    p.apart = ticks(0.12), p.around = ticks(0.25), p.refractory = ticks(0.18), p.near = ticks(0.25);
    p.after = ticks(0.5), p.ahead = ticks(0.4), p.early = ticks(0.4);
    p.gap = int(0.2 * fs + 0.5), p.edge = int(0.004 * fs + 0.999), p.brief = most(1, int(0.004 * fs)), p.hold = int(fs + 0.5);
    p.blocks = length / p.block, p.ticks = (p.blocks + 1) / 2;
    p.chunks = most(1, int(p.ticks / (10 * rate / 2) + 0.5)), p.max_candidates = p.ticks / (p.apart + 1) + 1;
    return p;
}

// ---- samples -> whole microvolts ------------------------------------------------------------------------------------

HD bool is_valid(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (bits & 0x7f800000u) != 0x7f800000u;
}
HD bool is_valid(int16_t x) { return x != -32768; }

// Adding 1.5 * 2^23 rounds to the nearest integer, ties to even, and leaves it in the low bits. One rounding (fma) in all.
constexpr float ROUND = 12582912.f;
constexpr uint32_t ROUND_BITS = 0x4B400000u;
HD int32_t quantise(float x, float bottom, float top, float scale, int origin) {  // NaN becomes bottom
    float v = x > bottom ? x : bottom;
    v = v < top ? v : top;
    v = fmaf(v, scale, ROUND);
    uint32_t bits;
    memcpy(&bits, &v, 4);
    return int32_t(bits - ROUND_BITS - uint32_t(origin));
}

template <class T> constexpr float UNIT = sizeof(T) == 2 ? 1.f : 1000.f;  // microvolts

// What a lead is counted from, and what stands for a long gap: float, the middle one of the first, the central and the last
// sample (of two the higher), within 4 V; int16, 0.
HD int16_t origin(const int16_t*, int) { return 0; }
HD float origin(const float* x, int length) {
    float marks[3] = {x[0], x[length / 2], x[length - 1]}, middle = 0;
    int n = 0;
    for (int i = 0; i < 3; i++) if (is_valid(marks[i])) marks[n++] = marks[i];
    for (int i = 0; i < n; i++) {
        int below = 0;
        for (int j = 0; j < n; j++) below += marks[j] < marks[i] || (marks[j] == marks[i] && j < i);
        if (below == n / 2) middle = marks[i];
    }
    return middle < -4000 ? -4000 : middle > 4000 ? 4000 : middle;
}
HD int whole(float origin) { return quantise(origin, -4000, 4000, 1000, 0); }
HD int whole(int16_t) { return 0; }

// A row whose missing samples take the last valid one, for p.hold samples, then the origin; read like a pointer to sample i.
template <class T> struct Filled {
    const T* row;
    int i, hold;
    T origin;
    HD T operator[](int k) const {
        for (int j = i + k, last = most(0, j - hold); j >= last; j--) if (is_valid(row[j])) return row[j];
        return origin;
    }
    HD Filled operator+(int k) const { return {row, i + k, hold, origin}; }
};

// The sum of the N samples at x: pairs first, then pairs of pairs. X: a pointer or Filled.
template <int N, class X> HD float sum_of(X x) {
    if constexpr (N <= 1) return float(x[0]);
    else return sum_of<N / 2>(x) + sum_of<N / 2>(x + N / 2);
}

// Their mean in microvolts from an origin (whole microvolts), at most 32767 either way.
template <int N, class T> HD float limit_of(int microvolts) { return float(microvolts) / UNIT<T> * N; }
template <int N, class T, class X> HD int mean_of(X x, int zero) {
    return quantise(sum_of<N>(x), limit_of<N, T>(zero - 32767), limit_of<N, T>(zero + 32767), UNIT<T> / N, zero);
}

// Does a block of N samples at x hold a pacing spike, or the steepest of QRS? Neighbouring sums of 1, 2 .. N / 4 samples tell.
template <int N, class T, int WIDTH = 1, class X> HD bool is_steep(X x, const float* steep) {
    if constexpr (WIDTH * 4 > N) return false;
    else {
        float largest = 0;
        for (int i = 0; i < N; i += 2 * WIDTH) {
            const float d = fabsf(sum_of<WIDTH>(x + i) - sum_of<WIDTH>(x + (i + WIDTH)));
            largest = d > largest ? d : largest;
        }
        return (largest > steep[0] * (1000.f / UNIT<T>)) | is_steep<N, T, 2 * WIDTH>(x, steep + 1);
    }
}

// Block i of a row without its spike: every quarter becomes the median of itself and those two before and behind.
template <int N, class T, class X> HD int despiked(X row, int i, const Plan& p, int zero) {
    constexpr int QUARTER = N < 4 ? 1 : N / 4;
    int quarters[8], sum = 2;
    for (int j = 0; j < 8; j++) {
        const int quarter = least(most(4 * i + j - 2, 0), 4 * p.blocks - 1);
        quarters[j] = mean_of<QUARTER, T>(row + QUARTER * quarter, zero);
    }
    for (int j = 0; j < 4; j++) sum += middle_of_three(quarters[j], quarters[j + 2], quarters[j + 4]);
    return sum >> 2;
}

// ---- blocks (stored plus 32768) -> feature --------------------------------------------------------------------------

HD int mirrored(const uint16_t* blocks, int i, const Plan& p) {
    return blocks[i < 0 ? -1 - i : i < p.blocks ? i : 2 * p.blocks - 1 - i];
}

HD int smoothed(const uint16_t* blocks, int i, const Plan& p) {
    int near[3];
    for (int j = 0; j < 3; j++) near[j] = mirrored(blocks, i + j - 1, p);
    int mean = (near[0] + near[2] + 1) >> 1;
    for (int j = 0; j < p.blends; j++) mean = (mean + near[1] + 1) >> 1;
    return mean;
}

HD int feature_at(const uint16_t* blocks, int tick, const Plan& p) {
    const int start = 2 * tick - p.window / 2, first = smoothed(blocks, start, p);
    int path = 0, last = first;
    for (int j = 1; j <= p.window; j++) {
        const int next = smoothed(blocks, start + j, p);
        path += least(magnitude(next - last), p.limit);
        last = next;
    }
    return most(path - magnitude(last - first), 0);
}

// ---- levels of a lead in a chunk ------------------------------------------------------------------------------------

HD int rank(const int* values, int n, int k) {  // the value with k smaller ones, ties by place
    int found = 0;
    for (int i = 0; i < n; i++) {
        int below = 0;
        for (int j = 0; j < n; j++) below += values[j] < values[i] || (values[j] == values[i] && j < i);
        if (below == k) found = values[i];
    }
    return found;
}

// Of n values those that are good: the one with three fifths of them below.
HD int three_fifths(int good) { return good * 3 / 5; }
HD int usual(const int* values, const bool* good, int n) {
    int chosen[MAX_SEGMENTS], count = 0;
    for (int i = 0; i < n; i++) if (good[i]) chosen[count++] = values[i];
    return rank(chosen, count, three_fifths(count));
}

// Which of n segments stand out, by what is highest in each and what lasts: for the beat, and for the noise.
template <class T> HD void clear_segments(const T* top, const T* lasting, int n, bool* beat, bool* noise) {
    int64_t most = 0, below_most = 1;
    const auto below = [&](int i) { return int64_t(lasting[i] + top[i] / 16 + 8); };
    for (int i = 0; i < n; i++)
        if (top[i] * below_most > most * below(i)) most = top[i], below_most = below(i);
    for (int i = 0; i < n; i++) {
        const int64_t own = top[i] * below_most, clearest = most * below(i);
        beat[i] = 2 * own >= clearest, noise[i] = 4 * own >= clearest;
    }
}

struct Level {
    int beat, noise, floor, span, ratio;  // usual beat, noise, its bound, beat - floor, signal to noise in 1/64
    HD Level(int beat, int noise) : beat(beat), noise(noise), floor(least(noise * 3 / 2, beat * 3 / 4)),
                                    span(most(1, beat - floor)),
                                    ratio(beat >= 16 ? beat * 64 / (noise + beat / 14 + 1) : 0) {}
    Level() = default;
    HD bool has_vote() const { return 4 * beat >= 13 * least(noise, 180) + 64; }
    HD int weight(int best_ratio) const { const int w = ratio * 45 / most(1, best_ratio); return w * w; }
    HD int scale() const { int s = 1; while (span * s < 16384) s *= 2; return s; }
    HD int gain(int weight) const { return has_vote() ? weight * 65536 / (span * scale()) : 0; }
    HD int share(int weight) const { return weight * 512 / most(1, beat); }
    HD int vote(int feature, int scale, int gain) const { return least(most(feature - floor, 0), span) * scale * gain >> 16; }
};

// Of a chunk, of all leads: their noise with their gains; these gains; the most that votes can come to.
struct Noise { int noise, gain, full; };

// ---- votes -> candidates -> beats -----------------------------------------------------------------------------------

// Does a candidate begin at tick i? Its votes are more than all before and no fewer than all behind that are near.
HD bool begins_candidate(const int16_t* votes, int i, const Plan& p) {
    const int v = votes[i];
    if (v <= 0) return false;
    for (int j = most(0, i - p.apart); j < i; j++) if (votes[j] >= v) return false;
    for (int j = i + 1, stop = least(p.ticks - 1, i + p.apart); j <= stop; j++) if (votes[j] > v) return false;
    return true;
}

HD int plateau_middle(const int16_t* votes, int i, const Plan& p) {
    const int stop = least(p.ticks - 1, i + p.apart);
    int last = i;
    while (last < stop && votes[last + 1] == votes[i]) last++;
    return i + (last - i) / 2;
}

HD int height_at(const int16_t* votes, int i, const Plan& p) {
    int before = i < p.around ? 0 : votes[i], behind = i + p.around >= p.ticks ? 0 : votes[i];  // no votes outside the record
    for (int j = 1; j <= p.around && before + behind; j++) {
        if (before) before = least(before, votes[i - j]);
        if (behind) behind = least(behind, votes[i + j]);
    }
    return votes[i] - most(before, behind);
}

// How far a lead goes there and back in three steps from block i on.
HD int corner_at(const uint16_t* blocks, int i, const Plan& p) {
    int x[4], path = 0;
    for (int k = 0; k < 4; k++) x[k] = mirrored(blocks, i + k * p.step, p);
    for (int k = 0; k < 3; k++) path += least(magnitude(x[k + 1] - x[k]), 32767 / 3);
    return most(path - magnitude(x[3] - x[0]), 0);
}

HD int believed(int sum, int largest, int leads) {  // of corners: one lead alone is not
    return leads > 1 ? least(sum, 3 * (sum - largest)) : sum;
}
HD bool comes_and_goes(int height, int vote, const Noise& n) {
    return 32 * height >= n.full && 8 * height >= 5 * vote;
}
HD bool is_no_p_wave(int corner, int size, const Noise& n) {
    return 32 * int64_t(corner) >= 21 * int64_t(size) || size >= 200 * n.gain
        || size >= 18 * int64_t(n.noise);
}

struct Candidates { const int *at, *height, *corner; int n; };  // ticks, ascending

HD int first_from(Candidates c, int tick) {  // index of the first candidate at the tick or later
    int low = 0, high = c.n;
    while (low < high) {
        const int mid = (low + high) / 2;
        if (c.at[mid] < tick) low = mid + 1;
        else high = mid;
    }
    return low;
}

struct Demand {  // of a chunk
    int high, small, keen, noise;  // usual height of a beat, mean of what is too small; usual corner, noise
    bool any;                      // is there a beat at all?
};
HD Demand demand(Candidates c, int chunk, const Noise& noise, const Plan& p) {
    const int n = p.segments(chunk), from = first_from(c, p.chunk(chunk)), to = first_from(c, p.chunk(chunk + 1));
    int height[MAX_SEGMENTS], corner[MAX_SEGMENTS], highest = 0;
    bool good[MAX_SEGMENTS];
    for (int s = 0, i = from; s < n; s++) {
        height[s] = corner[s] = 0;
        const int stop = p.segment_start(chunk, s + 1);
        for (; i < to && c.at[i] < stop; i++)
            height[s] = most(height[s], c.height[i]), corner[s] = most(corner[s], c.corner[i]);
        highest = most(highest, height[s]);
    }
    for (int s = 0; s < n; s++) good[s] = 2 * height[s] >= highest;
    const int high = usual(height, good, n);
    int64_t sum = 0;
    int small = 0;
    for (int i = from; i < to; i++) if (20 * c.height[i] < 7 * high) sum += c.height[i], small++;
    return {high, int(sum / most(1, small)), usual(corner, good, n), noise.noise, 4 * high >= noise.full};
}

// Is a candidate of height `own`, `distance` ticks after (negative: before) one of height `other`, no beat of
// its own? Likewise their corners; noise: as much of its corner may be noise.
HD int falling(int top, int low, int d, int end, const Plan& p) {
    return d <= p.near ? top : d < end ? top - (top - low) * (d - p.near) / (end - p.near) : 0;
}
HD bool overshadows(int distance, int own, int other, int corner, int other_corner, int noise,
                    const Plan& p) {
    const int d = magnitude(distance);
    const bool late = distance > 0;
    if (d < p.refractory) return own < other || (own == other && late);
    if (2 * own >= other && 4 * int64_t(corner) >= 3 * int64_t(other_corner)) return false;  // two of a kind
    const int end = late ? p.after : p.ahead;
    return 1024 * own < falling(late ? 922 : 717, 205, d, end, p) * other
        && 1024 * int64_t(corner - noise) < falling(464, 192, d, end, p) * int64_t(other_corner);
}

HD bool is_beat(Candidates c, int i, Demand d, const Plan& p) {
    const int at = c.at[i], height = c.height[i], sharp = c.corner[i] - 2 * d.noise;
    const bool low = 20 * height < 3 * d.high + 20 * d.small;
    if (!d.any || (low && 32 * int64_t(sharp) < 5 * int64_t(d.keen))) return false;
    if (at <= p.early && 2 * height < d.high && 64 * int64_t(sharp) < 29 * int64_t(d.keen)) return false;
    const auto loses = [&](int j) {
        return overshadows(at - c.at[j], height, c.height[j], c.corner[i], c.corner[j], 2 * d.noise, p);
    };
    for (int j = i - 1; j >= 0 && at - c.at[j] < p.after; j--) if (loses(j)) return false;
    for (int j = i + 1; j < c.n && c.at[j] - at < p.after; j++) if (loses(j)) return false;
    return true;
}

// Search back between beats found[k] and found[k + 1] (indices of candidates, m of them): index of the candidate to add, or -1.
HD int missing_beat(Candidates c, const int* found, int m, int k) {
    if (k + 1 >= m) return -1;
    const int i = found[k], j = found[k + 1];
    int beside = 0, n = 0, best = -1;
    if (k > 0) beside += c.at[i] - c.at[found[k - 1]], n++;
    if (k + 2 < m) beside += c.at[found[k + 2]] - c.at[j], n++;
    if (!n || 2 * (c.at[j] - c.at[i]) <= 3 * (beside / n)) return -1;
    const int usual = beside / n, lower = least(c.height[i], c.height[j]);
    for (int q = i + 1; q < j; q++)
        if (5 * least(c.at[q] - c.at[i], c.at[j] - c.at[q]) >= 3 * usual && 5 * c.height[q] >= 2 * lower)
            if (best < 0 || c.height[q] > c.height[best]) best = q;
    return best;
}

// ---- a beat's block -> its sample -----------------------------------------------------------------------------------

// A block (stored plus 32768). Where blocks are too short for spikes to be taken out, they are blunted here.
HD int deflected(const uint16_t* blocks, int i, const Plan& p) {
    if (p.block >= 4) return blocks[i] - 32768;
    return ((blocks[most(0, i - 1)] + 2 * blocks[i] + blocks[least(p.blocks - 1, i + 1)] + 2) >> 2) - 32768;
}

// What a lead's deflection is counted from around a block: the mean of both ends, or the one that is inside the record.
HD int base_of(const uint16_t* blocks, int middle, const Plan& p) {
    const int left = deflected(blocks, most(0, middle - p.half), p);
    const int right = deflected(blocks, least(p.blocks - 1, middle + p.half), p);
    return middle < p.half ? right : middle + p.half >= p.blocks ? left : (left + right) >> 1;
}

// The largest of n deflections, and whether it is sharp, as a pacing spike is: 0.7 of it gained or lost in 4 ms.
struct Deflection { int place; bool sharp; };
HD bool is_sharp(const int* moved, int n, int best, const Plan& p) {
    int step = 0;
    for (int i = p.brief; i < n; i++) step = most(step, magnitude(moved[i] - moved[i - p.brief]));
    return 10 * int64_t(step) > 7 * int64_t(moved[best]);
}
HD Deflection largest_of(const int* moved, int n, const Plan& p) {
    int best = 0;
    for (int i = 1; i < n; i++) if (moved[i] > moved[best]) best = i;
    return {best, is_sharp(moved, n, best, p)};
}

// Keep peaks inside the record and apart, in place; returns how many. peaks ascend by candidate, height: theirs.
HD int keep_apart(int* peaks, int* height, int n, const Plan& p) {
    int kept = 0;
    for (int i = 0; i < n; i++) {
        int peak = peaks[i];
        if (kept && 10 * (peak - peaks[kept - 1]) >= 9 * p.gap) peak = most(peak, peaks[kept - 1] + p.gap);
        if (peak < p.edge || peak >= p.length - p.edge) continue;
        const bool close = kept && peak - peaks[kept - 1] < p.gap;
        if (close && height[i] <= height[kept - 1]) continue;
        kept -= close;
        peaks[kept] = peak, height[kept] = height[i], kept++;
    }
    return kept;
}

// ---- tokens ---------------------------------------------------------------------------------------------------------

// Beat of token t of `tokens` in `length` samples, given that it is no earlier than beat k: borders half-way between peaks.
HD int beat_at(const int* peaks, int count, int k, int t, int tokens, int length) {
    if (count <= 0) return -1;
    const int64_t middle = (2 * int64_t(t) + 1) * length;
    for (k = most(k, 0); k + 1 < count && tokens * (int64_t(peaks[k]) + peaks[k + 1]) <= middle;) k++;
    return k;
}

// ---- what beats.cpp and beats_cuda.cu offer ------------------------------------------------------------------------------
// ecg (records, leads, length) contiguous; peaks (records, max_peaks), -1 where there is none; count (records,);
// beat (records, tokens).

void segment_cpu(const void* ecg, bool is_float, int records, int leads, const Plan& plan, int* peaks, int* count);
void beat_of_token_cpu(const int* peaks, const int* count, int records, int max_peaks, int tokens, int length, int* beat);

// CUDA: on the stream, without waiting; workspace: so many bytes of device memory. They return what failed, or null.
size_t workspace_bytes(int records, int leads, const Plan& plan);
const char* segment_cuda(const void* ecg, bool is_float, int records, int leads, const Plan& plan, int* peaks, int* count,
                         void* workspace, void* stream);
const char* beat_of_token_cuda(const int* peaks, const int* count, int records, int max_peaks, int tokens, int length, int* beat,
                               void* stream);

}  // namespace beats
