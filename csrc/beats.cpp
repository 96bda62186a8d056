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
#define SHUFFLE(v, ...) __builtin_shufflevector(v, v, __VA_ARGS__)
#else
#define SHUFFLE(v, ...) __builtin_shuffle(v, Signed{__VA_ARGS__})
#define CHOOSE(a, b, ...) __builtin_shuffle(a, b, Places{__VA_ARGS__})
#endif

struct Scratch {  // of one thread, made once for all its records; every array has room for a vector beyond its end
    int block_stride, tick_stride;  // between leads in blocks and in feature
    std::vector<int16_t> feature, lasting, begins, padded_votes, int16_row;
    std::vector<uint16_t> room, smooth, even, odd, first_step, steps;
    std::vector<float> float_row;
    std::vector<uint8_t> steep;
    uint16_t* blocks;  // with room before and behind
    int16_t* votes;    // with zeros before and behind
    std::vector<int> at, height, corner, found, chosen, best, zeros, complete, bases, gains;
    std::vector<Level> levels;
    std::vector<Noise> noise;  // of chunks

    Scratch(const Plan& p, int leads) {
        block_stride = padded(p.blocks + p.window) + 3 * LANES, tick_stride = padded(p.ticks) + 2 * LANES;
        room.resize(size_t(block_stride) * leads), blocks = room.data() + LANES, feature.resize(size_t(tick_stride) * leads);
        steep.resize(p.blocks), smooth.resize(2 * padded(p.ticks + p.window) + 4 * LANES);
        for (auto* v : {&even, &odd, &first_step, &steps}) v->resize(padded(p.ticks + p.window) + 2 * LANES);
        lasting.resize(padded(p.ticks)), begins.resize(padded(p.ticks)), noise.resize(p.chunks);
        padded_votes.resize(padded(p.ticks) + 2 * LANES), votes = padded_votes.data() + LANES;
        for (auto* v : {&at, &height, &corner, &found, &chosen, &best}) v->resize(p.max_candidates);
        zeros.resize(leads), complete.resize(leads), levels.resize(size_t(p.chunks) * leads);
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
template <int STEP, class V> static INLINE V sums_of_two(V a, V b) {
    if constexpr (STEP == 8) return CHOOSE(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + CHOOSE(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
    else return CHOOSE(a, b, 0, 2, 8, 10, 4, 6, 12, 14) + CHOOSE(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
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

// Blocks of a row that hold a spike are made anew. X: a pointer or, where samples are missing, Filled.
template <int BLOCK, class T, class X>
static INLINE void take_out_spikes(X row, int zero, const Plan& p, uint8_t* __restrict steep, uint16_t* blocks) {
    const float bounds[3] = {p.steep[0], p.steep[1], p.steep[2]};
    for (int i = 0; i < p.blocks; i++) steep[i] = is_steep<BLOCK, T>(row + BLOCK * i, bounds);
    for (int i = 0; i < p.blocks; i++) if (steep[i]) blocks[i] = uint16_t(despiked<BLOCK, T>(row, i, p, zero) + 32768);
}
template <class T, class X>
static INLINE void take_out_spikes(X row, int zero, const Plan& p, uint8_t* steep, uint16_t* blocks) {
    if (p.block == 4) take_out_spikes<4, T>(row, zero, p, steep, blocks);
    else if (p.block == 8) take_out_spikes<8, T>(row, zero, p, steep, blocks);
    else take_out_spikes<16, T>(row, zero, p, steep, blocks);
}

// ---- blocks -> votes ------------------------------------------------------------------------------------------------

// blocks -> feature (ticks): path length minus net change of the smoothed blocks in a window around every second block. The
// record is mirrored at its ends, in the room around blocks.
static INLINE void there_and_back(uint16_t* __restrict blocks, const Plan& p, Scratch& s, ReadAhead& ahead,
                                  int16_t* __restrict feature) {
    const int n = p.blocks, pairs = p.window / 2;
    uint16_t* __restrict smooth = s.smooth.data();
    for (int i = 0; i < LANES; i++) blocks[-1 - i] = blocks[i], blocks[n + i] = blocks[n - 1 - i];
    const uint16_t* __restrict x = blocks - p.before();
    const int stop = padded(n + p.window);
    for (int i = 0; i < stop; i++) smooth[i] = mean_of(x[i - 1], x[i + 1]);  // a loop a mean: compilers know an instruction for it
    for (int j = 0; j < p.blends; j++) for (int i = 0; i < stop; i++) smooth[i] = mean_of(smooth[i], x[i]);
    uint16_t *__restrict even = s.even.data(), *__restrict odd = s.odd.data();
    uint16_t *__restrict first = s.first_step.data(), *__restrict both = s.steps.data();
    for (int i = 0, stop = padded(p.ticks + pairs + 1); i < stop; i++) even[i] = smooth[2 * i], odd[i] = smooth[2 * i + 1];
    const Vector limit = Vector{} + uint16_t(p.limit);
    for (int i = 0; i < p.ticks + pairs; i += LANES) {  // steps from even to odd blocks, and those with the next to even ones
        ahead.lines(2);
        const Vector e = load<Vector>(even + i), o = load<Vector>(odd + i), next = load<Vector>(even + i + 1);
        const Vector step = lower(distance(e, o), limit);
        store(step, first + i), store(step + lower(distance(o, next), limit), both + i);
    }
    const uint16_t *last_step = p.window % 2 ? first + pairs : nullptr, *last = (p.window % 2 ? odd : even) + pairs;
    for (int i = 0; i < p.ticks; i += LANES) {
        ahead.lines(2);
        Vector path = last_step ? load<Vector>(last_step + i) : Vector{};
        for (int j = 0; j < pairs; j++) path += load<Vector>(both + i + j);
        const Vector net = distance(load<Vector>(even + i), load<Vector>(last + i));
        store(higher(path, net) - net, feature + i);
    }
}

// Lane i meets lane i + 8, then i + 4, i + 2, i + 1: the result is in lane 0.
struct Sum { static INLINE Signed of(Signed a, Signed b) { return a + b; } };
struct Highest { static INLINE Signed of(Signed a, Signed b) { return higher(a, b); } };
template <class Op> static INLINE int over_lanes(Signed v) {
    v = Op::of(v, SHUFFLE(v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    v = Op::of(v, SHUFFLE(v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
    v = Op::of(v, SHUFFLE(v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    v = Op::of(v, SHUFFLE(v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
    return v[0];
}

static INLINE int highest_of(const int16_t* x, int n) {
    if (n < LANES) return *std::max_element(x, x + n);
    Signed top = load<Signed>(x + n - LANES);  // the rest, and some again
    for (int i = 0; i < n - LANES; i += LANES) top = higher(top, load<Signed>(x + i));
    return over_lanes<Highest>(top);
}

static INLINE int rank(Signed v, int n, int k) {  // of lanes 0 to n - 1: the value with k smaller ones, ties by place
    Signed below{}, place;
    for (int i = 0; i < LANES; i++) place[i] = int16_t(i);
    for (int j = 0; j < n; j++) {
        const Signed w = Signed{} + v[j];
        below -= (w < v) | ((w == v) & (place > int16_t(j)));
    }
    return over_lanes<Highest>(v & (below == Signed{} + int16_t(k)) & (place < Signed{} + int16_t(n)));
}

static INLINE int usual(const int16_t* values, const bool* good, int n) {
    int16_t ranked[LANES];
    int count = 0;
    for (int i = 0; i < LANES; i++) ranked[i] = good[i] ? values[i] : int16_t(32767);
    for (int i = 0; i < n; i++) count += good[i];
    return rank(load<Signed>(ranked), n, three_fifths(count));
}

// Levels of a lead -> levels, one a chunk, `leads` apart.
static INLINE void find_levels(const int16_t* __restrict feature, const Plan& p, int leads, Scratch& s,
                               ReadAhead& ahead, Level* levels) {
    int16_t* __restrict lasting = s.lasting.data();
    for (int i = 0; i < p.ticks; i += LANES) {  // the least of a quarter of a second from here on
        Signed least_of = load<Signed>(feature + i);
        for (int j = 1; j < p.around; j++) least_of = lower(least_of, load<Signed>(feature + i + j));
        store(least_of, lasting + i);
    }
    for (int c = 0; c < p.chunks; c++) {
        const int n = p.segments(c);
        int16_t top[LANES] = {}, low[LANES] = {};
        bool beat[LANES] = {}, noise[LANES] = {};
        for (int i = 0, start = p.chunk(c); i < n; i++) {
            const int stop = p.segment_start(c, i + 1);
            ahead.lines(4);
            top[i] = int16_t(highest_of(feature + start, stop - start));
            low[i] = int16_t(highest_of(lasting + start, stop - start - p.around + 1));
            start = stop;
        }
        clear_segments(top, low, n, beat, noise);
        levels[c * leads] = Level(usual(top, beat, n), usual(low, noise, n));
    }
}

// Votes of all leads for every tick; the gains with which leads share in locating.
static INLINE void count_votes(const Plan& p, int leads, Scratch& s, ReadAhead& ahead) {
    std::fill(s.padded_votes.begin(), s.padded_votes.end(), 0);
    int16_t* __restrict votes = s.votes;
    for (int c = 0; c < p.chunks; c++) {
        int* gains = s.gains.data() + c * leads;
        const Level* levels = s.levels.data() + c * leads;
        int best = 0, largest = 1;
        Noise noise{};
        for (int l = 0; l < leads; l++) best = most(best, levels[l].ratio);
        for (int l = 0; l < leads; l++) {
            ahead.lines(8);
            const Level v = levels[l];
            const int w = v.weight(best);
            gains[l] = v.share(w), noise.full += w;
            largest = most(largest, gains[l]);
            const uint16_t floor = v.floor, span = v.span, scale = v.scale(), gain = v.gain(w);
            const int16_t* __restrict feature = s.feature.data() + size_t(l) * s.tick_stride;
            for (int i = p.chunk(c), stop = p.chunk(c + 1); i < stop; i++) {  // Level::vote in 16 bits
                const uint16_t f = feature[i], above = uint16_t((f > floor ? f : floor) - floor);
                votes[i] += uint16_t(uint32_t(uint16_t((above < span ? above : span) * scale)) * gain >> 16);
            }
        }
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
    int corner = 0;
    for (int i = 0; i < p.corners(); i += LANES) {
        Places sums[2] = {}, largest[2] = {};
        for (int l = 0; l < leads; l++) {
            const uint16_t* x = s.blocks + size_t(l) * s.block_stride + p.corner_start(tick) + i;
            const Vector a = load<Vector>(x), b = load<Vector>(x + p.step), c = load<Vector>(x + 2 * p.step);
            const Vector d = load<Vector>(x + 3 * p.step), net = distance(a, d);
            const Vector there = lower(distance(a, b), limit) + lower(distance(b, c), limit);
            const Vector path = there + lower(distance(c, d), limit);
            const Vector sharp = higher(path, net) - net;
            Shorts halves[2];
            memcpy(halves, &sharp, sizeof sharp);
            for (int j = 0; j < 2; j++) {
                const Places own = __builtin_convertvector(halves[j], Places) * gains[l];
                sums[j] += own, largest[j] = higher(largest[j], own);
            }
        }
        int sum[LANES], top[LANES];
        memcpy(sum, sums, sizeof sum), memcpy(top, largest, sizeof top);
        for (int j = 0; j < least(LANES, p.corners() - i); j++)
            corner = most(corner, believed(sum[j], top[j], leads));
    }
    return corner;
}

// What is in the leads' features at a tick or beside it, likewise.
static INLINE int size_near(int tick, const Plan& p, int leads, const int* gains, const Scratch& s) {
    int size = 0;
    for (int i = most(0, tick - 1); i <= least(p.ticks - 1, tick + 1); i++) {
        int sum = 0;
        for (int l = 0; l < leads; l++) sum += s.feature[size_t(l) * s.tick_stride + i] * gains[l];
        size = most(size, sum);
    }
    return size;
}

// All candidates -> s.at, s.height and s.corner; both are 0 of those that cannot be beats.
static INLINE Candidates find_candidates(const Plan& p, int leads, Scratch& s, ReadAhead& ahead) {
    Candidates c{s.at.data(), s.height.data(), s.corner.data(), 0};
    const int16_t* __restrict votes = s.votes;
    for (int i = 0; i < p.ticks; i += LANES) {  // begins_candidate
        const Signed v = load<Signed>(votes + i);
        Signed before{}, behind{};
        for (int j = 1; j <= p.apart; j++) {
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
            const int at = plateau_middle(votes, i, p), height = height_at(votes, at, p), chunk = p.chunk_of(at);
            const int* gains = s.gains.data() + size_t(chunk) * leads;
            int corner = 0;
            bool can_be = comes_and_goes(height, votes[at], s.noise[chunk]);
            if (can_be) {
                corner = corner_near(at, p, leads, gains, s);
                can_be = is_no_p_wave(corner, size_near(at, p, leads, gains, s), s.noise[chunk]);
            }
            s.at[c.n] = at, s.height[c.n] = can_be ? height : 0, s.corner[c.n] = can_be ? corner : 0, c.n++;
        }
    }
    return c;
}

// Around block `middle`: the block of the largest deflection; what each lead is counted from -> bases.
static INLINE int locate_block(int middle, const Plan& p, int leads, const int* gains, const Scratch& s, int* bases) {
    const int start = most(0, middle - p.half), n = least(p.blocks - 1, middle + p.half) - start + 1;
    int moved[24] = {}, best = 0;  // n is at most 2 * 0.08 s * 120 Hz + 1
    for (int l = 0; l < leads; l++) {
        const uint16_t* blocks = s.blocks + size_t(l) * s.block_stride;
        const int base = bases[l] = base_of(blocks, middle, p), gain = gains[l];
        if (p.block >= 4) for (int i = 0; i < 24; i++) moved[i] += magnitude(blocks[start + i] - 32768 - base) * gain;
        else for (int i = 0; i < n; i++) moved[i] += magnitude(deflected(blocks, start + i, p) - base) * gain;
    }
    for (int i = 1; i < n; i++) if (moved[i] > moved[best]) best = i;
    return start + best;
}

// Eight samples in microvolts, and which of them are missing (-1).
static INLINE Places samples_of(const float* x, int zero, Places& missing) {
    Floats v = load<Floats>(x);
    missing = ((Places)v & 0x7f800000) == 0x7f800000;
    v = lower(higher(v, Floats{} + limit_of<1, float>(zero - 32767)), Floats{} + limit_of<1, float>(zero + 32767));
    for (int i = 0; i < 8; i++) v[i] = fmaf(v[i], 1000.f, ROUND);
    return (Places)v - int32_t(ROUND_BITS + zero);
}
static INLINE Places samples_of(const int16_t* x, int, Places& missing) {
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
    for (int l = 0; l < leads; l++) {
        const T* x = ecg + size_t(l) * p.length + first;
        T copy[2 * MAX_BLOCK];
        if (at_end) x = static_cast<const T*>(memcpy(copy, x, n * sizeof(T)));
        for (int i = 0; i < n; i += 8) {
            Places missing;
            const Places deflection = (samples_of(x + i, s.zeros[l], missing) - bases[l]) & ~missing;
            store(load<Places>(moved + i) + (deflection < 0 ? -deflection : deflection) * gains[l], moved + i);
        }
    }
    const Deflection found = largest_of(moved, n, p);
    return {first + found.place, found.sharp};
}

// blocks and feature of all leads -> peaks, ascending, in s.best: how many. sharp: is one as sharp as a spike?
template <class T> static INLINE int find_beats(const T* ecg, const Plan& p, int leads, Scratch& s, ReadAhead& ahead, bool& sharp) {
    count_votes(p, leads, s, ahead);
    const Candidates c = find_candidates(p, leads, s, ahead);
    int n = 0, m = 0;
    for (int k = 0, i = 0; k < p.chunks; k++) {
        const Demand d = demand(c, k, s.noise[k], p);
        for (; i < c.n && c.at[i] < p.chunk(k + 1); i++) if (is_beat(c, i, d, p)) s.found[n++] = i;
    }
    for (int k = 0; k < n; k++) {
        s.chosen[m++] = s.found[k];
        const int missing = missing_beat(c, s.found.data(), n, k);
        if (missing >= 0) s.chosen[m++] = missing;
    }
    const auto gains_at = [&](int k) { return s.gains.data() + size_t(p.chunk_of(c.at[s.chosen[k]])) * leads; };
    const auto bases_at = [&](int k) { return s.bases.data() + size_t(k) * leads; };
    for (int k = 0; k < m; k++) s.best[k] = locate_block(2 * c.at[s.chosen[k]], p, leads, gains_at(k), s, bases_at(k));
    sharp = false;
    for (int k = 0; k < m; k++) {
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
        for (int l = 0; l < leads; l++) {
            const T* x = ecg + size_t(l) * p.length;
            const T from = origin(x, p.length);
            uint16_t* blocks = s.blocks + size_t(l) * s.block_stride;
            if (pass == 0) {
                ahead.start_row(x, p.length * sizeof(T));
                s.zeros[l] = whole(from);
                s.complete[l] = block_means(x, from, p, s, ahead, blocks);
            } else {
                if (s.complete[l]) take_out_spikes<T>(x, s.zeros[l], p, s.steep.data(), blocks);
                else take_out_spikes<T>(Filled<T>{x, 0, p.hold, from}, s.zeros[l], p, s.steep.data(), blocks);
            }
            int16_t* feature = s.feature.data() + size_t(l) * s.tick_stride;
            there_and_back(blocks, p, s, ahead, feature);
            find_levels(feature, p, leads, s, ahead, s.levels.data() + l);
        }
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
