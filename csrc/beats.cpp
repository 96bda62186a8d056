// segment_beats and beat_of_token on the CPU. The method: reference.py; the rules shared with CUDA: beats.h.
//
// A record is read once; memory is the bottleneck, so the next rows are asked for while one is worked on. After the first pass
// everything runs on blocks of 8 to 17 ms in 16-bit integers, LANES a vector, in arrays that stay in the first two caches. One
// thread a record, nothing allocated on the way. Vectors are those of GCC and Clang, at any width the machine has.
#include <algorithm>
#include <vector>

#include "beats.h"
#include "cpu.h"

namespace beats {

constexpr int LANES = 16;
typedef uint16_t Vector __attribute__((vector_size(2 * LANES)));
typedef int16_t Signed __attribute__((vector_size(2 * LANES)));
typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Places __attribute__((vector_size(32)));
typedef int16_t Shorts __attribute__((vector_size(16)));
typedef uint16_t UnsignedShorts __attribute__((vector_size(16)));

template <class V, class T> static INLINE V load(const T* x) {
    V v;
    memcpy(&v, x, sizeof v);
    return v;
}
template <class V, class T> static INLINE void store(V v, T* x) { memcpy(x, &v, sizeof v); }
template <class V> static INLINE V lower(V a, V b) { return a < b ? a : b; }
template <class V> static INLINE V higher(V a, V b) { return a > b ? a : b; }
static INLINE uint16_t mean_of(uint16_t a, uint16_t b) { return uint16_t((uint32_t(a) + b + 1) >> 1); }
static INLINE Vector distance(Vector a, Vector b) { return higher(a, b) - lower(a, b); }
static INLINE int padded(int n) { return (n + LANES - 1) & -LANES; }

#ifdef __clang__  // lanes of two vectors, counted through both
#define CHOOSE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#define CHOOSE16(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#define SHUFFLE(v, ...) __builtin_shufflevector(v, v, __VA_ARGS__)
#else
#define SHUFFLE(v, ...) __builtin_shuffle(v, Signed{__VA_ARGS__})
#define CHOOSE(a, b, ...) __builtin_shuffle(a, b, Places{__VA_ARGS__})
#define CHOOSE16(a, b, ...) __builtin_shuffle(a, b, Signed{__VA_ARGS__})
#endif

struct Bounds { float bottom, top; };  // of samples

struct Scratch {  // of one thread, made once for all its records; every array has room for a vector beyond its end
    int block_stride, tick_stride;  // between leads in blocks and in feature
    std::vector<int16_t> feature, top, lasting, begins, padded_votes, int16_row;
    std::vector<uint16_t> room, even, odd, first_step, steps;
    std::vector<float> float_row;
    uint16_t* blocks;  // with room before and behind
    int16_t* votes;    // with zeros before and behind
    std::vector<int> at, height, corner, found, chosen, best, zeros, complete, bases, gains;
    std::vector<int> chunks, segments;  // where they begin, and the last of them ends
    std::vector<Level> levels;
    std::vector<Bounds> bounds;
    std::vector<Noise> noise;  // of chunks

    Scratch(const Plan& p, int leads) {
        block_stride = padded(p.blocks + p.window) + 3 * LANES, tick_stride = padded(p.ticks) + 2 * LANES;
        room.resize(size_t(block_stride) * leads), blocks = room.data() + LANES, feature.resize(size_t(tick_stride) * leads);
        for (auto* v : {&even, &odd, &first_step, &steps}) v->resize(padded(p.ticks + p.window) + 2 * LANES);
        begins.resize(padded(p.ticks)), noise.resize(p.chunks);
        padded_votes.resize(padded(p.ticks) + 4 * LANES), votes = padded_votes.data() + LANES;
        for (int c = 0; c <= p.chunks; c++) chunks.push_back(p.chunk(c));
        for (int c = 0; c < p.chunks; c++)
            for (int i = 0; i < p.segments(c); i++) segments.push_back(p.segment_start(c, i));
        segments.push_back(p.ticks);
        for (auto* v : {&top, &lasting}) v->resize(segments.size() * LANES);
        for (auto* v : {&at, &height, &corner, &found, &chosen, &best}) v->resize(p.max_candidates);
        zeros.resize(leads), complete.resize(leads), levels.resize(leads), bounds.resize(leads);
        bases.resize(size_t(p.max_candidates) * leads), gains.resize(size_t(p.chunks) * leads);
    }
};

static INLINE std::vector<float>& spare_row(Scratch& s, const float*) { return s.float_row; }
static INLINE std::vector<int16_t>& spare_row(Scratch& s, const int16_t*) { return s.int16_row; }

struct ReadAhead {  // asks for the next cache lines of the batch, a few at a time and from every loop: many at once would wait
    const char *next, *end, *limit;
    INLINE void start_row(const void* row, size_t bytes) {
        const char* here = static_cast<const char*>(row);
        next = std::max(next, here + bytes), limit = std::min(end, here + 8 * bytes);
    }
    INLINE void lines(int n) {
        if (next < limit) {
            for (int i = 0; i < n; i++) __builtin_prefetch(next + 64 * i, 0, 1);
            next += 64 * n;
        }
    }
};

// ---- samples -> blocks ----------------------------------------------------------------------------------------------

static INLINE bool all_valid(const int16_t* x, int n) {
    int16_t low = 0;
    for (int i = 0; i < n; i++) low = low < x[i] ? low : x[i];
    return low > -32768;
}
static INLINE bool all_valid(const float*, int) { return true; }

// A copy of x (p.length) in which missing samples take the last valid one, for p.hold samples, then the origin.
template <class T> static void fill_gaps(const T* x, T origin, const Plan& p, T* row) {
    for (int i = 0, last = -1; i < p.length; i++) {
        if (is_valid(x[i])) row[i] = x[last = i];
        else row[i] = last >= 0 && i - last <= p.hold ? x[last] : origin;
    }
}

// 8 sums of N neighbours as sum_of takes them (int16: in whole numbers), in the order of PLACE: what is added stays within a half
// of a vector, which is quick.
template <int STEP, class V> static INLINE V first_of(V a, V b) {
    if constexpr (STEP == 8) return CHOOSE(a, b, 0, 1, 2, 3, 8, 9, 10, 11);
    else return CHOOSE(a, b, 0, 2, 8, 10, 4, 6, 12, 14);
}
template <int STEP, class V> static INLINE V second_of(V a, V b) {
    if constexpr (STEP == 8) return CHOOSE(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
    else return CHOOSE(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
}
template <int STEP, class V> static INLINE V sums_of_two(V a, V b) {
    return first_of<STEP>(a, b) + second_of<STEP>(a, b);
}
template <int N> static INLINE Floats sums_of(const float* x) {
    if constexpr (N == 1) return load<Floats>(x);
    else return sums_of_two<N>(sums_of<N / 2>(x), sums_of<N / 2>(x + 4 * N));
}
template <int N> static INLINE Places sums_of(const int16_t* x) {
    if constexpr (N == 1) return __builtin_convertvector(load<Shorts>(x), Places);
    else if constexpr (N == 2) return ((load<Places>(x) << 16) >> 16) + (load<Places>(x) >> 16);
    else return sums_of_two<N / 2>(sums_of<N / 2>(x), sums_of<N / 2>(x + 4 * N));
}
template <int STEP> constexpr int PLACE[8] = {0, 1, 2, 3, 4, 5, 6, 7};  // of sum i after STEP: float, N; int16, N / 2
template <> constexpr int PLACE<2>[8] = {0, 1, 4, 5, 2, 3, 6, 7};
template <> constexpr int PLACE<4>[8] = {0, 4, 1, 5, 2, 6, 3, 7};
template <> constexpr int PLACE<16>[8] = {0, 1, 4, 5, 2, 3, 6, 7};
template <int STEP> static INLINE Places in_order(Places v) {
    constexpr const int* at = PLACE<STEP>;
    return CHOOSE(v, v, at[0], at[1], at[2], at[3], at[4], at[5], at[6], at[7]);
}

// x (length) -> blocks of BLOCK samples, plus 32768. False: samples may be missing, which shows at the ends of the range.
template <int BLOCK, class T>
static INLINE bool blocks_of(const T* x, int zero, const Plan& p, ReadAhead& ahead, uint16_t* blocks) {
    const Floats bottom = Floats{} + limit_of<BLOCK, T>(zero - 32767), top = Floats{} + limit_of<BLOCK, T>(zero + 32767);
    Floats lowest = top, highest = bottom;
    for (int i = 0;; i = least(i + 8, p.blocks - 8)) {  // the last eight may begin in those before
        ahead.lines(most(1, BLOCK * int(sizeof(T)) / 16));  // half of what is read; the other loops ask for the rest
        Floats v = __builtin_convertvector(sums_of<BLOCK>(x + BLOCK * i), Floats);
        v = lower(higher(v, bottom), top);  // NaN becomes bottom
        lowest = lower(v, lowest), highest = higher(v, highest);
        for (int j = 0; j < 8; j++) v[j] = fmaf(v[j], UNIT<T> / BLOCK, ROUND);
        const Places bits = in_order<sizeof(T) == 2 ? BLOCK / 2 : BLOCK>((Places)v);
        for (int j = 0; j < 8; j++) blocks[i + j] = uint16_t(uint32_t(bits[j]) - ROUND_BITS - zero + 32768);
        if (i == p.blocks - 8) break;
    }
    bool complete = true;
    for (int j = 0; j < 8; j++) complete &= lowest[j] > bottom[j] && highest[j] < top[j];
    return sizeof(T) == 2 ? all_valid(x, p.length) : complete;
}

template <class T> static INLINE bool blocks_of(const T* x, T origin, const Plan& p, ReadAhead& ahead, uint16_t* blocks) {
    const int zero = whole(origin);
    switch (p.block) {
        case 1: return blocks_of<1>(x, zero, p, ahead, blocks);
        case 2: return blocks_of<2>(x, zero, p, ahead, blocks);
        case 4: return blocks_of<4>(x, zero, p, ahead, blocks);
        case 8: return blocks_of<8>(x, zero, p, ahead, blocks);
        default: return blocks_of<16>(x, zero, p, ahead, blocks);
    }
}

template <class T>
static INLINE bool block_means(const T* x, T origin, const Plan& p, Scratch& s, ReadAhead& ahead, uint16_t* blocks) {
    if (blocks_of(x, origin, p, ahead, blocks)) return true;
    std::vector<T>& row = spare_row(s, x);
    row.resize(p.length);
    fill_gaps(x, origin, p, row.data());
    blocks_of(row.data(), origin, p, ahead, blocks);
    return false;
}

// sums_of<N>; on the way the largest differences of neighbouring sums of 1, 2 and 4 samples -> largest.
template <int N, class V> static INLINE V compare(V a, V b, Floats* largest) {
    const Floats d = __builtin_convertvector(a - b, Floats);
    Floats& most = largest[N == 2 ? 0 : N == 4 ? 1 : 2];
    most = higher((Floats)((Places)d & 0x7fffffff), most);  // NaN tells nothing
    return a + b;
}
template <int N> static INLINE Floats compared(const float* x, Floats* largest) {
    if constexpr (N == 1) return load<Floats>(x);
    else {
        const Floats a = compared<N / 2>(x, largest), b = compared<N / 2>(x + 4 * N, largest);
        return compare<N>(first_of<N>(a, b), second_of<N>(a, b), largest);
    }
}
template <int N> static INLINE Places compared(const int16_t* x, Floats* largest) {
    if constexpr (N == 2) {
        const Places two = load<Places>(x);
        return compare<N>((two << 16) >> 16, two >> 16, largest);
    } else {
        const Places a = compared<N / 2>(x, largest), b = compared<N / 2>(x + 4 * N, largest);
        return compare<N>(first_of<N / 2>(a, b), second_of<N / 2>(a, b), largest);
    }
}

// Is any of 8 blocks steep? Few are, so that is_steep need not be quick.
template <int BLOCK, class T> static INLINE bool are_steep(const T* x, const float* steep) {
    Floats largest[3] = {};
    for (int i = 0; i < 2; i++) compared<BLOCK / 2>(x + 4 * BLOCK * i, largest);
    Places tells{};
    for (int i = 0; i < 3; i++) tells |= largest[i] > Floats{} + steep[i] * (1000.f / UNIT<T>);
    uint64_t pairs[4];
    memcpy(pairs, &tells, sizeof tells);
    return (pairs[0] | pairs[1] | pairs[2] | pairs[3]) != 0;
}

// despiked, of a block that has neighbours on both sides.
template <int BLOCK, class T> static INLINE int despiked(const T* x, int zero, Floats bottom, Floats top) {
    constexpr int QUARTER = BLOCK / 4;
    Floats v = __builtin_convertvector(sums_of<QUARTER>(x - 2 * QUARTER), Floats);
    v = lower(higher(v, bottom), top);
    for (int j = 0; j < 8; j++) v[j] = fmaf(v[j], UNIT<T> / QUARTER, ROUND);
    const Places q = in_order<sizeof(T) == 2 ? QUARTER / 2 : QUARTER>((Places)v) - int32_t(ROUND_BITS + zero);
    const Places behind = CHOOSE(q, q, 2, 3, 4, 5, 6, 7, 6, 7), last = CHOOSE(q, q, 4, 5, 6, 7, 4, 5, 6, 7);
    const Places median = higher(lower(q, behind), lower(higher(q, behind), last));  // lanes 0 to 3
    return (median[0] + median[1] + median[2] + median[3] + 2) >> 2;
}

// Blocks of a row that hold a spike are made anew; were there any? Filled: where samples are missing.
template <int BLOCK, class T>
static INLINE bool take_out_spikes(const T* row, int zero, const Plan& p, uint16_t* blocks) {
    const Floats bottom = Floats{} + limit_of<BLOCK / 4, T>(zero - 32767);
    const Floats top = Floats{} + limit_of<BLOCK / 4, T>(zero + 32767);
    bool any = false;
    for (int i = 0;; i = least(i + 8, p.blocks - 8)) {  // the last eight may begin in those before
        if (are_steep<BLOCK>(row + BLOCK * i, p.steep))
            for (int j = i; j < i + 8; j++) {
                if (!is_steep<BLOCK, T>(row + BLOCK * j, p.steep)) continue;
                const bool inside = j > 0 && j < p.blocks - 1;
                const int mean = inside ? despiked<BLOCK>(row + BLOCK * j, zero, bottom, top)
                    : despiked<BLOCK, T>(row, j, p, zero);
                blocks[j] = uint16_t(mean + 32768), any = true;
            }
        if (i == p.blocks - 8) break;
    }
    return any;
}
template <int BLOCK, class T>
static INLINE bool take_out_spikes(Filled<T> row, int zero, const Plan& p, uint16_t* blocks) {
    bool any = false;
    for (int i = 0; i < p.blocks; i++)
        if (is_steep<BLOCK, T>(row + BLOCK * i, p.steep))
            blocks[i] = uint16_t(despiked<BLOCK, T>(row, i, p, zero) + 32768), any = true;
    return any;
}
template <class T, class X>
static INLINE bool take_out_spikes(X row, int zero, const Plan& p, uint16_t* blocks) {
    if (p.block == 4) return take_out_spikes<4, T>(row, zero, p, blocks);
    else if (p.block == 8) return take_out_spikes<8, T>(row, zero, p, blocks);
    else return take_out_spikes<16, T>(row, zero, p, blocks);
}

// ---- blocks -> votes ------------------------------------------------------------------------------------------------

// blocks -> feature (ticks): path length minus net change of the smoothed blocks in a window around every second block. The
// record is mirrored at its ends, in the room around blocks.
static INLINE void there_and_back(uint16_t* __restrict blocks, const Plan& p, Scratch& s, ReadAhead& ahead,
                                  int16_t* __restrict feature) {
    const int n = p.blocks, pairs = p.window / 2, ticks = p.ticks;  // 3 to 6 pairs
    const bool twice = p.blends == 2;
    for (int i = 0; i < LANES; i++) blocks[-1 - i] = blocks[i], blocks[n + i] = blocks[n - 1 - i];
    const uint16_t* __restrict x = blocks - p.before();
    uint16_t *__restrict even = s.even.data(), *__restrict odd = s.odd.data();
    uint16_t *__restrict first = s.first_step.data(), *__restrict both = s.steps.data();
    for (int i = 0; i < ticks + pairs + 1; i += LANES, x += 2 * LANES) {
        uint16_t smooth[2 * LANES];  // a loop a mean: compilers know an instruction for it
        for (int j = 0; j < 2 * LANES; j++) smooth[j] = mean_of(x[j - 1], x[j + 1]);
        for (int j = 0; j < 2 * LANES; j++) smooth[j] = mean_of(smooth[j], x[j]);
        if (twice) for (int j = 0; j < 2 * LANES; j++) smooth[j] = mean_of(smooth[j], x[j]);
        const Vector a = load<Vector>(smooth), b = load<Vector>(smooth + LANES);
        store(CHOOSE16(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30), even + i);
        store(CHOOSE16(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31), odd + i);
    }
    const Vector limit = Vector{} + uint16_t(p.limit);
    // steps from even to odd blocks, and both with the next to even ones
    for (int i = 0; i < ticks + pairs; i += LANES) {
        ahead.lines(2);
        const Vector e = load<Vector>(even + i), o = load<Vector>(odd + i), next = load<Vector>(even + i + 1);
        const Vector step = lower(distance(e, o), limit);
        store(step, first + i), store(step + lower(distance(o, next), limit), both + i);
    }
    const uint16_t *last_step = p.window % 2 ? first + pairs : nullptr, *last = (p.window % 2 ? odd : even) + pairs;
    for (int i = 0; i < ticks; i += LANES) {
        ahead.lines(1);
        Vector path = last_step ? load<Vector>(last_step + i) : Vector{};
        path += load<Vector>(both + i) + load<Vector>(both + i + 1) + load<Vector>(both + i + 2);
        for (int j = 3; j < pairs; j++) path += load<Vector>(both + i + j);
        const Vector net = distance(load<Vector>(even + i), load<Vector>(last + i));
        store(higher(path, net) - net, feature + i);
    }
}

// Of every tick at x: the least of a quarter of a second (around, 8 to 15 ticks) from there on.
static INLINE Signed least_from(const int16_t* x, int around) {
    Signed least_of = load<Signed>(x);
    for (int j = 1; j < 8; j++) least_of = lower(least_of, load<Signed>(x + j));
    for (int j = 8; j < around; j++) least_of = lower(least_of, load<Signed>(x + j));
    return least_of;
}

// What is highest and what lasts in every segment of a lead -> lane `lead` of s.top and s.lasting.
static INLINE void sum_up(const int16_t* __restrict feature, const Plan& p, int lead, Scratch& s,
                          ReadAhead& ahead) {
    const int* starts = s.segments.data();
    int16_t *__restrict tops = s.top.data() + lead, *__restrict lasting = s.lasting.data() + lead;
    for (int i = 0, n = int(s.segments.size()) - 1; i < n; i++) {
        ahead.lines(1);
        // the last vector may begin in those before; a segment has room for 18 such quarters, or more
        const int16_t *x = feature + starts[i], *end = feature + starts[i + 1] - LANES;
        const int16_t* last = end - p.around + 1;
        Signed top = load<Signed>(end), lasts = least_from(last, p.around);
        for (const int16_t* y = x; y < end; y += LANES) top = higher(top, load<Signed>(y));
        for (const int16_t* y = x; y < last; y += LANES) lasts = higher(lasts, least_from(y, p.around));
        // lanes 0 to 7: top, the others: what lasts; lane i meets lane i + 4, i + 2, i + 1
        Signed v = higher(CHOOSE16(top, lasts, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
                          CHOOSE16(top, lasts, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31));
        v = higher(v, SHUFFLE(v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
        v = higher(v, SHUFFLE(v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
        v = higher(v, SHUFFLE(v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
        tops[i * LANES] = v[0], lasting[i * LANES] = v[8];
    }
}

// Of n values those that are good (-1), `count`: the one with three fifths of them below. A lane a lead.
static INLINE Signed usual(const int16_t* values, const int16_t* good, int n) {
    Signed ranked[MAX_SEGMENTS], count{}, found{};
    for (int i = 0; i < n; i++) {
        const Signed is_good = load<Signed>(good + i * LANES);
        Signed x = is_good ? load<Signed>(values + i * LANES) : Signed{} + int16_t(32767);
        count -= is_good;
        for (int j = 0; j < i; j++) {
            const Signed other = ranked[j];
            ranked[j] = lower(other, x), x = higher(other, x);
        }
        ranked[i] = x;
    }
    const Signed at = count * int16_t(3) / int16_t(5);  // three_fifths
    for (int i = 0; i < n; i++) found |= ranked[i] & (at == Signed{} + int16_t(i));
    return found;
}

// Levels of all leads in a chunk of n segments -> s.levels: clear_segments and usual, a lane a lead.
static INLINE void find_levels(int segment, int n, int leads, Scratch& s) {
    const int16_t *top = s.top.data() + segment * LANES, *lasting = s.lasting.data() + segment * LANES;
    int16_t beat[MAX_SEGMENTS * LANES], noise[MAX_SEGMENTS * LANES];
    for (int half = 0; half < LANES; half += 8) {
        Places most{}, below_most = Places{} + 1, below[MAX_SEGMENTS], tops[MAX_SEGMENTS];
        for (int i = 0; i < n; i++) {
            tops[i] = __builtin_convertvector(load<Shorts>(top + i * LANES + half), Places);
            const Shorts lasts = load<Shorts>(lasting + i * LANES + half);
            below[i] = __builtin_convertvector(lasts, Places) + (tops[i] >> 4) + 8;
            const Places clearer = tops[i] * below_most > most * below[i];  // products stay below 2^31
            most = clearer ? tops[i] : most, below_most = clearer ? below[i] : below_most;
        }
        for (int i = 0; i < n; i++) {
            const Places own = tops[i] * below_most, clearest = most * below[i];
            store(__builtin_convertvector(own >= (clearest + 1) >> 1, Shorts), beat + i * LANES + half);
            store(__builtin_convertvector(own >= (clearest + 3) >> 2, Shorts), noise + i * LANES + half);
        }
    }
    const Signed usual_beat = usual(top, beat, n), usual_noise = usual(lasting, noise, n);
    int16_t beats[LANES], noises[LANES];
    store(usual_beat, beats), store(usual_noise, noises);
    for (int l = 0; l < leads; l++) s.levels[l] = Level(beats[l], noises[l]);
}

// Votes of all leads for every tick; the gains with which leads share in locating.
static INLINE void count_votes(const Plan& p, int leads, Scratch& s, ReadAhead& ahead) {
    std::fill(s.padded_votes.begin(), s.padded_votes.end(), 0);
    int16_t* __restrict votes = s.votes;
    for (int c = 0, segment = 0; c < p.chunks; c++) {
        int* gains = s.gains.data() + c * leads;
        const int start = s.chunks[c], stop = s.chunks[c + 1], segments = p.segments(c);
        find_levels(segment, segments, leads, s), segment += segments;
        const Level* levels = s.levels.data();
        int best = 0, largest = 1;
        Noise noise{};
        for (int l = 0; l < leads; l++) best = most(best, levels[l].ratio);
        for (int l = 0; l < leads; l++) {
            ahead.lines(8);
            const Level v = levels[l];
            const int w = v.weight(best);
            gains[l] = v.share(w), noise.full += w;
            largest = most(largest, gains[l]);
            const uint16_t floor = v.floor, span = v.span, scale = v.scale();
            uint16_t gain[2 * LANES];  // as an array: compilers know an instruction for such a product
            std::fill_n(gain, 2 * LANES, uint16_t(v.gain(w)));
            const int16_t* __restrict feature = s.feature.data() + size_t(l) * s.tick_stride + start;
            int16_t* __restrict chunk = votes + start;
            for (int i = 0; i < stop - start; i += 2 * LANES)  // Level::vote in 16 bits
                for (int j = 0; j < 2 * LANES; j++) {
                    const uint16_t f = feature[i + j], above = uint16_t((f > floor ? f : floor) - floor);
                    const uint16_t scaled = uint16_t((above < span ? above : span) * scale);
                    chunk[i + j] += uint16_t(uint32_t(scaled) * gain[j] >> 16);
                }
        }
        std::fill_n(votes + stop, 2 * LANES, 0);  // what whole vectors left behind the chunk
        for (int l = 0; l < leads; l++) {
            gains[l] = gains[l] * 1023 / largest;
            noise.noise += gains[l] * levels[l].noise, noise.gain += gains[l];
        }
        s.noise[c] = noise;
    }
}

// ---- votes -> peaks -------------------------------------------------------------------------------------------------

// The largest corner near a tick, summed over leads with their gains.
static INLINE int corner_near(int tick, const Plan& p, int leads, const int* gains, const Scratch& s) {
    const Vector limit = Vector{} + uint16_t(32767 / 3);
    Places corner{};
    for (int i = 0; i < p.corners(); i += LANES) {
        Places sums[2] = {}, largest[2] = {};  // of even and of odd lanes
        for (int l = 0; l < leads; l++) {
            const uint16_t* x = s.blocks + size_t(l) * s.block_stride + p.corner_start(tick) + i;
            const Vector a = load<Vector>(x), b = load<Vector>(x + p.step), c = load<Vector>(x + 2 * p.step);
            const Vector d = load<Vector>(x + 3 * p.step), net = distance(a, d);
            const Vector there = lower(distance(a, b), limit) + lower(distance(b, c), limit);
            const Vector path = there + lower(distance(c, d), limit);
            const Places sharp = (Places)(higher(path, net) - net);
            const Places even = (sharp & 65535) * gains[l], odd = (sharp >> 16) * gains[l];
            sums[0] += even, largest[0] = higher(largest[0], even);
            sums[1] += odd, largest[1] = higher(largest[1], odd);
        }
        for (int j = 0; j < 2; j++) {
            const Places place = Places{0, 2, 4, 6, 8, 10, 12, 14} + j;
            const Places sum = leads > 1 ? lower(sums[j], 3 * (sums[j] - largest[j])) : sums[j];  // believed
            corner = higher(corner, sum & (place < p.corners() - i));
        }
    }
    corner = higher(corner, CHOOSE(corner, corner, 4, 5, 6, 7, 0, 1, 2, 3));
    corner = higher(corner, CHOOSE(corner, corner, 2, 3, 0, 1, 6, 7, 4, 5));
    return most(corner[0], corner[1]);
}

// What is in the leads' features at a tick or beside it, likewise.
static INLINE int size_near(int tick, const Plan& p, int leads, const int* gains, const Scratch& s) {
    const int start = most(0, tick - 1), n = least(p.ticks, tick + 2) - start;
    const int16_t* feature = s.feature.data() + start;
    Places sums{};
    for (int l = 0; l < leads; l++)
        sums += __builtin_convertvector(load<Shorts>(feature + size_t(l) * s.tick_stride), Places) * gains[l];
    return most(sums[0], most(n > 1 ? sums[1] : 0, n > 2 ? sums[2] : 0));
}

// All candidates -> s.at, s.height and s.corner; both are 0 of those that cannot be beats.
static INLINE Candidates find_candidates(const Plan& p, int leads, Scratch& s, ReadAhead& ahead) {
    Candidates c{s.at.data(), s.height.data(), s.corner.data(), 0};
    int chunk = 0;
    const int16_t* __restrict votes = s.votes;
    for (int i = 0; i < p.ticks; i += LANES) {  // begins_candidate
        const Signed v = load<Signed>(votes + i);
        Signed before{}, behind{};
        for (int j = 1; j <= 4; j++) {  // p.apart is 4 to 7
            before = higher(before, load<Signed>(votes + i - j));
            behind = higher(behind, load<Signed>(votes + i + j));
        }
        for (int j = 5; j <= p.apart; j++) {
            before = higher(before, load<Signed>(votes + i - j));
            behind = higher(behind, load<Signed>(votes + i + j));
        }
        store((v > before) & (v >= behind), s.begins.data() + i);
    }
    for (int word = 0; word < p.ticks; word += 4) {
        uint64_t four;
        memcpy(&four, s.begins.data() + word, 8);
        if (!four) continue;
        ahead.lines(8);
        for (int i = word; i < word + 4; i++) {
            if (!s.begins[i]) continue;
            const int at = plateau_middle(votes, i, p), height = height_at(votes, at, p);
            while (at >= s.chunks[chunk + 1]) chunk++;
            const int* gains = s.gains.data() + size_t(chunk) * leads;
            int corner = 0;
            bool can_be = comes_and_goes(height, votes[at], s.noise[chunk]);
            if (can_be) {
                ahead.lines(16);
                corner = corner_near(at, p, leads, gains, s);
                can_be = is_no_p_wave(corner, size_near(at, p, leads, gains, s), s.noise[chunk]);
            }
            s.at[c.n] = at, s.height[c.n] = can_be ? height : 0, s.corner[c.n] = can_be ? corner : 0, c.n++;
        }
    }
    return c;
}

static INLINE Places places(int first) { return Places{0, 1, 2, 3, 4, 5, 6, 7} + first; }
static INLINE Places over_lanes_highest(Places v) {
    v = higher(v, CHOOSE(v, v, 4, 5, 6, 7, 0, 1, 2, 3));
    v = higher(v, CHOOSE(v, v, 2, 3, 0, 1, 6, 7, 4, 5));
    return higher(v, CHOOSE(v, v, 1, 0, 3, 2, 5, 4, 7, 6));
}

// Where is the first of the largest of n numbers, none of them negative, in an array of whole vectors?
static INLINE int first_largest(const int* x, int n) {
    Places top{}, first{};
    for (int i = 0; i < n; i += 8) top = higher(top, load<Places>(x + i) & (places(i) < n));
    top = over_lanes_highest(top);
    for (int i = 0; i < n; i += 8) first = higher(first, (load<Places>(x + i) == top) & (n - places(i)));
    return n - over_lanes_highest(first)[0];
}

// Around block `middle`: the block of the largest deflection; what each lead is counted from -> bases.
static INLINE int locate_block(int middle, const Plan& p, int leads, const int* gains, const Scratch& s, int* bases) {
    const int start = most(0, middle - p.half), n = least(p.blocks - 1, middle + p.half) - start + 1;
    int moved[24] = {};  // n is at most 2 * 0.08 s * 120 Hz + 1
    if (p.block < 4) {
        for (int l = 0; l < leads; l++) {
            const uint16_t* blocks = s.blocks + size_t(l) * s.block_stride;
            bases[l] = base_of(blocks, middle, p);
            for (int i = 0; i < n; i++)
                moved[i] += magnitude(deflected(blocks, start + i, p) - bases[l]) * gains[l];
        }
        return start + first_largest(moved, n);
    }
    // base_of: the mean of both ends; at an end of the record both are the one inside
    const int end = start + n - 1, left = middle < p.half ? end : start;
    const int right = middle >= p.half && middle + p.half >= p.blocks ? start : end;
    const uint16_t* row = s.blocks;
    for (int l = 0; l < leads; l++, row += s.block_stride) bases[l] = ((row[left] + row[right]) >> 1) - 32768;
    for (int i = 0; i < n; i += 8) {
        Places sum{};
        const uint16_t* blocks = s.blocks + start + i;
        for (int l = 0; l < leads; l++, blocks += s.block_stride) {
            const Places deflection = __builtin_convertvector(load<UnsignedShorts>(blocks), Places) - 32768;
            const Places d = deflection - bases[l];
            sum += (d < 0 ? -d : d) * gains[l];
        }
        store(sum, moved + i);
    }
    return start + first_largest(moved, n);
}

// Eight samples in microvolts, and which of them are missing (-1).
static INLINE Places samples_of(const float* x, int zero, Bounds bounds, Places& missing) {
    Floats v = load<Floats>(x);
    missing = ((Places)v & 0x7f800000) == 0x7f800000;
    v = lower(higher(v, Floats{} + bounds.bottom), Floats{} + bounds.top);
    for (int i = 0; i < 8; i++) v[i] = fmaf(v[i], 1000.f, ROUND);
    return (Places)v - int32_t(ROUND_BITS + zero);
}
static INLINE Places samples_of(const int16_t* x, int, Bounds, Places& missing) {
    const Places v = __builtin_convertvector(load<Shorts>(x), Places);
    missing = v == -32768;
    return v;
}

// The largest deflection in the samples of a block and half a block on both sides; its place is counted from the record's start.
template <class T>
static INLINE Deflection locate_sample(const T* ecg, int block, const Plan& p, int leads, const int* gains, const Scratch& s,
                                       const int* bases) {
    const int first = most(0, block * p.block - p.margin()), n = least(p.length, (block + 1) * p.block + p.margin()) - first;
    const bool at_end = first + (n + 7) / 8 * 8 > p.length;
    int moved[2 * MAX_BLOCK] = {};
    T copy[MAX_LEADS][2 * MAX_BLOCK];
    const T* x = ecg + first;
    size_t stride = p.length;
    if (at_end) {
        for (int l = 0; l < leads; l++) memcpy(copy[l], x + l * stride, n * sizeof(T));
        x = copy[0], stride = 2 * MAX_BLOCK;
    }
    for (int i = 0; i < n; i += 8) {
        Places sum{};
        for (int l = 0; l < leads; l++) {
            Places missing;
            const Places sample = samples_of(x + l * stride + i, s.zeros[l], s.bounds[l], missing);
            const Places d = (sample - bases[l]) & ~missing;
            sum += (d < 0 ? -d : d) * gains[l];
        }
        store(sum, moved + i);
    }
    const int best = first_largest(moved, n);
    return {first + best, is_sharp(moved, n, best, p)};
}

// blocks and feature of all leads -> peaks, ascending, in s.best: how many. sharp: is one as sharp as a spike?
template <class T> static INLINE int find_beats(const T* ecg, const Plan& p, int leads, Scratch& s, ReadAhead& ahead, bool& sharp) {
    count_votes(p, leads, s, ahead);
    const Candidates c = find_candidates(p, leads, s, ahead);
    int n = 0, m = 0;
    for (int k = 0, i = 0; k < p.chunks; k++) {
        const Demand d = demand(c, k, s.noise[k], p);
        for (; i < c.n && c.at[i] < s.chunks[k + 1]; i++) if (is_beat(c, i, d, p)) s.found[n++] = i;
    }
    for (int k = 0; k < n; k++) {
        s.chosen[m++] = s.found[k];
        const int missing = missing_beat(c, s.found.data(), n, k);
        if (missing >= 0) s.chosen[m++] = missing;
    }
    const auto gains_at = [&](int k) { return s.gains.data() + size_t(p.chunk_of(c.at[s.chosen[k]])) * leads; };
    const auto bases_at = [&](int k) { return s.bases.data() + size_t(k) * leads; };
    for (int k = 0; k < m; k++) {
        ahead.lines(16);
        s.best[k] = locate_block(2 * c.at[s.chosen[k]], p, leads, gains_at(k), s, bases_at(k));
    }
    sharp = false;
    for (int k = 0; k < m; k++) {
        ahead.lines(16);
        const Deflection peak = locate_sample(ecg, s.best[k], p, leads, gains_at(k), s, bases_at(k));
        s.best[k] = peak.place, sharp |= peak.sharp;
        s.chosen[k] = c.height[s.chosen[k]];
    }
    return keep_apart(s.best.data(), s.chosen.data(), m, p);
}

// ecg (leads, length) -> peaks, ascending, in s.best; returns how many.
template <class T> static INLINE int segment(const T* ecg, const Plan& p, int leads, Scratch& s, ReadAhead& ahead) {
    bool sharp;
    int count = 0;
    for (int pass = 0; pass < 2; pass++) {
        bool changed = pass == 0;
        for (int l = 0; l < leads; l++) {
            const T* x = ecg + size_t(l) * p.length;
            const T from = origin(x, p.length);
            uint16_t* blocks = s.blocks + size_t(l) * s.block_stride;
            if (pass == 0) {
                ahead.start_row(x, p.length * sizeof(T));
                s.zeros[l] = whole(from);
                s.bounds[l] = {limit_of<1, T>(s.zeros[l] - 32767), limit_of<1, T>(s.zeros[l] + 32767)};
                s.complete[l] = block_means(x, from, p, s, ahead, blocks);
            } else {
                const bool any = s.complete[l] ? take_out_spikes<T>(x, s.zeros[l], p, blocks)
                    : take_out_spikes<T>(Filled<T>{x, 0, p.hold, from}, s.zeros[l], p, blocks);
                if (!any) continue;
                changed = true;
            }
            int16_t* feature = s.feature.data() + size_t(l) * s.tick_stride;
            there_and_back(blocks, p, s, ahead, feature);
            sum_up(feature, p, l, s, ahead);
        }
        if (!changed) break;
        count = find_beats(ecg, p, leads, s, ahead, sharp);
        if (!sharp || p.block < 4) break;
    }
    return count;
}

template <class T> static INLINE void segment_all(const T* ecg, int records, int leads, const Plan& p, int* peaks, int* count) {
    Scratch s(p, leads);
    ReadAhead ahead{nullptr, reinterpret_cast<const char*>(ecg + size_t(records) * leads * p.length), nullptr};
    for (int b = 0; b < records; b++, peaks += p.max_peaks()) {
        count[b] = segment(ecg + size_t(b) * leads * p.length, p, leads, s, ahead);
        std::copy_n(s.best.begin(), count[b], peaks);
        std::fill_n(peaks + count[b], p.max_peaks() - count[b], -1);
    }
}

EVERY_CPU static void segment_float(const float* ecg, int records, int leads, const Plan& p, int* peaks, int* count) {
    segment_all(ecg, records, leads, p, peaks, count);
}
EVERY_CPU static void segment_int16(const int16_t* ecg, int records, int leads, const Plan& p, int* peaks, int* count) {
    segment_all(ecg, records, leads, p, peaks, count);
}

void segment_cpu(const void* ecg, bool is_float, int records, int leads, const Plan& p, int* peaks, int* count) {
    if (is_float) segment_float(static_cast<const float*>(ecg), records, leads, p, peaks, count);
    else segment_int16(static_cast<const int16_t*>(ecg), records, leads, p, peaks, count);
}

void beat_of_token_cpu(const int* peaks, const int* count, int records, int max_peaks, int tokens, int length, int* beat) {
    for (int b = 0; b < records; b++, peaks += max_peaks, beat += tokens)
        for (int t = 0, k = 0; t < tokens; t++) beat[t] = k = beat_at(peaks, least(count[b], max_peaks), k, t, tokens, length);
}

}  // namespace beats
