"""The operators in plain NumPy: slow, clear, and the yardstick of the compiled ones, which must agree to the sample.

segment_beats in short. A QRS goes up and comes back within a tenth of a second; drift, steps of the baseline,
ST segments and P and T waves do not, or less steeply. So a lead's feature is how far the signal moves there
and back within 110 ms: (path length - net change) of the smoothed signal. Steps and gaps cancel exactly; no
filter rings.

What is noise: a beat is over within a quarter of a second, noise goes on. So what lasts in a feature, the
least of a quarter of a second, is its noise, at any rate, and a second in which the feature stands far above
what lasts there tells what the usual beat of this stretch is. Seconds of noise do not, however large it is;
and where no second stands out, however small the signal, there is no beat.

Every lead votes with its feature above its noise, in units of its usual beat, with a weight by its signal-to-
noise ratio. Candidates are the peaks of the sum between which it goes back to nearly nothing.

What may follow what: T and P waves are smaller than the QRS beside them, or rounder. So a candidate is a beat
if it is high, or if it is sharp: if the leads go there and back within 50 ms, which tells a small QRS beside
a large one from a T wave of the same height. What is round, small and not far above the noise is a P wave,
with a QRS or without.

If a peak is as sharp as a pacing spike, spikes are taken out and all is done again. After the conversion to
microvolts there is only integer arithmetic: CPU, GPU and this file give the same peaks, not nearly the same.

Sources: the moving integration, the T wave rule, search back and two noise-adapted levels follow Pan & Tompkins, IEEE Trans
Biomed Eng 1985; path length as QRS feature: Zong, Moody & Jiang, Computers in Cardiology 2003 (wqrs). The net change, the vote of
the leads and the order-free rules are this project's own; their numbers were chosen on LUDB, PTB-XL (by eye) and simulated
records.
"""
from typing import NamedTuple

import numpy as np


class Plan(NamedTuple):
    """Lengths for one sampling rate, in samples, in blocks (60 to 120 a second) or in ticks, which are two blocks."""
    block: int       # samples averaged into one; a power of two
    steep: tuple     # mV: difference of neighbouring sums of 1, 2, 4 samples (up to block / 4) at 250 mV/s: more is a spike
    blends: int      # blocks are smoothed by [1 2 1] / 4 (1) or, where they are long, by [1 6 1] / 8 (2): in all some 8 ms
    window: int      # blocks: 110 ms, in which the signal goes there and back
    limit: int       # microvolts: largest step between blocks, so that sums of a window stay in 16 bits
    half: int        # blocks: 80 ms, half of the part in which a QRS' peak is looked for
    step: int        # blocks: 16 ms; three of them there and back are sharp
    chunk: float     # ticks: 10 s; levels are those of a part of this length
    segment: float   # ticks: 1 s; the usual beat is taken over maxima of such segments
    apart: int       # ticks: 120 ms between candidates
    around: int      # ticks: 250 ms; a candidate's height is from the minima this near; what lasts it is noise
    refractory: int  # ticks: 180 ms
    near: int        # ticks: 250 ms; from here the demand on a candidate after (before) a larger one falls
    after: int       # ticks: 500 ms; to here
    before: int      # ticks: 400 ms
    early: int       # ticks: 400 ms; a beat before the record may have left a T wave there
    gap: int         # samples: 200 ms, the refractory time of the result
    edge: int        # samples: 4 ms; a peak on the edge of the record lies outside it
    brief: int       # samples: 4 ms, one at least
    hold: int        # samples: 1 s that a missing sample takes the last valid one


def make_plan(fs):
    block = 1
    while fs / (2 * block) >= 60:
        block *= 2
    rate = fs / block
    blocks = lambda seconds: int(seconds * rate + 0.5)
    ticks = lambda seconds: int(seconds * rate / 2 + 0.5)
    samples = lambda seconds: int(seconds * fs + 0.5)
    return Plan(
        block=block, steep=tuple(np.float32(250 * 4 ** i / fs) for i in range(block.bit_length() - 2)), blends=1 + (rate < 75),
        window=blocks(0.11), limit=32767 // blocks(0.11), half=blocks(0.08), step=blocks(0.016),
        chunk=10 * rate / 2, segment=rate / 2, apart=ticks(0.12), around=ticks(0.25), refractory=ticks(0.18),
        near=ticks(0.25), after=ticks(0.5), before=ticks(0.4),
        early=ticks(0.4), gap=samples(0.2), edge=int(0.004 * fs + 0.999), brief=max(1, int(0.004 * fs)), hold=samples(1))


def segment_beats(ecg, fs):
    """R peaks of one record. ecg (L, N) float32 mV or int16 microvolts -> (K,) int64 samples, ascending."""
    plan = make_plan(fs)
    valid = ecg != -32768 if ecg.dtype == np.int16 else np.isfinite(ecg)
    signal, origin = without_gaps(ecg, valid, plan)                            # (L, N), (L,)
    samples = np.where(valid, microvolts(signal, origin), 0), valid
    blocks = microvolts(signal[:, :signal.shape[1] // plan.block * plan.block], origin, plan.block)  # (L, M)
    peaks, sharp = find_beats(blocks, samples, plan)
    if sharp and plan.steep:
        peaks, _ = find_beats(without_spikes(blocks, signal, origin, plan), samples, plan)
    return peaks


def find_beats(blocks, samples, plan):
    """Peaks (K,) from blocks (L, M) and samples (signal, valid); and whether one is as sharp as a pacing spike."""
    feature = there_and_back(blocks, plan)                                     # (L, T), T = ceil(M / 2)
    chunks = split(feature.shape[1], plan.chunk)
    votes, gains, noise, full = vote(feature, chunks, plan)
    at, height = candidates(votes, plan)
    chunk = np.searchsorted(chunks, at, "right") - 1                           # (C,)
    corner, size = corners(at, gains[chunk], blocks, feature, plan)
    real = stands_out(height, votes[at], corner, size, noise[chunk], gains[chunk].sum(1), full[chunk])
    height, corner = height * real, corner * real
    beats = choose(at, height, corner, noise, full, chunks, plan)
    located = [locate(2 * at[i], *samples, blocks, gains[chunk[i]], plan) for i in beats]
    return keep_apart([peak for peak, _ in located], height[beats], samples[0].shape[1], plan), any(sharp for _, sharp in located)


def without_gaps(ecg, valid, plan):
    """-> signal like ecg, in which a missing sample takes the last valid one, for a second, and then the origin; origin (L,): the
    middle one of the first, the central and the last sample, so that a large offset costs no range; int16: 0."""
    length = ecg.shape[1]
    marks = [sorted(lead[i] for i in (0, length // 2, length - 1) if ok[i]) for lead, ok in zip(ecg, valid)]
    origin = np.array([m[len(m) // 2] if m and ecg.dtype != np.int16 else 0 for m in marks], ecg.dtype)
    origin = np.clip(origin, -4000, 4000) if ecg.dtype != np.int16 else origin
    last = np.maximum.accumulate(np.where(valid, np.arange(length), -1), axis=1)
    held = (last >= 0) & (np.arange(length) - last <= plan.hold)
    return np.where(held, np.take_along_axis(ecg, np.maximum(last, 0), 1), origin[:, None]), origin


def pair_sums(x):
    with np.errstate(over="ignore", invalid="ignore"):
        return x[:, ::2] + x[:, 1::2]


def microvolts(signal, origin, count=1):
    """Means of `count` samples, (L, n * count) -> (L, n) whole microvolts from the origin (L,), within +-32767. Samples are
    summed in float32, pairs first, then pairs of pairs."""
    unit = np.float32(1 if signal.dtype == np.int16 else 1000)
    zero = np.rint(origin.astype(float) * unit).astype(np.int64)[:, None]
    bottom, top = ((zero + bound).astype(np.float32) / unit * np.float32(count) for bound in (-32767, 32767))
    signal = signal.astype(np.float32)
    for _ in range(count.bit_length() - 1):
        signal = pair_sums(signal)
    signal = np.where(signal > bottom, signal, bottom)  # NaN, of infinities that cancel, too
    signal = np.where(signal < top, signal, top)
    return np.rint(signal.astype(float) * (float(unit) / count)).astype(np.int64) - zero


def without_spikes(blocks, signal, origin, plan):
    """Blocks (L, M) in which the steep ones, which a pacing spike or the steepest of QRS makes, are made anew: every quarter
    becomes the median of itself and those two before and behind."""
    signal = signal[:, :blocks.shape[1] * plan.block]
    quarters = microvolts(signal, origin, plan.block // 4)
    padded = np.pad(quarters, ((0, 0), (2, 2)), mode="edge")
    median = np.sort([padded[:, :-4], quarters, padded[:, 4:]], axis=0)[1]
    sums, steep = signal.astype(np.float32), False
    for bound in plan.steep:
        with np.errstate(over="ignore", invalid="ignore"):
            difference = abs(sums[:, ::2] - sums[:, 1::2])
        bound = bound * np.float32(1 if signal.dtype != np.int16 else 1000)
        steep = steep | (difference > bound).reshape(*blocks.shape, -1).any(2)
        sums = pair_sums(sums)
    return np.where(steep, (median.reshape(*blocks.shape, 4).sum(2) + 2) // 4, blocks)


def there_and_back(blocks, plan):
    """(L, M) -> (L, T) path length minus net change of the smoothed signal in a window around every second block. The record is
    mirrored at its ends."""
    before, behind = plan.window // 2, plan.window - plan.window // 2
    mirrored = np.pad(blocks, ((0, 0), (before + 1, behind + 1)), mode="symmetric")
    smooth = (mirrored[:, :-2] + mirrored[:, 2:] + 1) // 2
    for _ in range(plan.blends):
        smooth = (smooth + mirrored[:, 1:-1] + 1) // 2
    steps = np.minimum(abs(np.diff(smooth, axis=1)), plan.limit)
    path = np.lib.stride_tricks.sliding_window_view(steps, plan.window, 1).sum(2)
    net = abs(smooth[:, plan.window:] - smooth[:, :-plan.window])
    return np.maximum(path - net, 0)[:, :blocks.shape[1]:2]


def split(count, length):
    """Borders (parts + 1) of nearly equal parts of about `length`."""
    parts = max(1, int(count / length + 0.5))
    return [count * i // parts for i in range(parts + 1)]


def segments(start, stop, plan):
    """Borders (segments + 1) of the segments, two at least, of a chunk."""
    parts = max(2, int((stop - start) / plan.segment + 0.5))
    return [start + (stop - start) * i // parts for i in range(parts + 1)]


def usual(values, good):
    """Of those of values (segments, ...) that are good: the one with three fifths of them below."""
    ranked = np.sort(np.where(good, values, 1 << 30), axis=0)
    return np.take_along_axis(ranked, good.sum(0)[None] * 3 // 5, 0)[0]


def levels(feature, borders, plan):
    """The usual beat of every lead (L,), and its noise (L,): the most that lasts for a quarter of a second.
    Both are of segments that stand out: the beat of those half as clear as the clearest, the noise, which
    need not be as clear, of a quarter."""
    parts = [feature[:, a:b] for a, b in zip(borders[:-1], borders[1:])]
    top = np.array([part.max(1) for part in parts])                            # (segments, L)
    window = np.lib.stride_tricks.sliding_window_view
    lasting = np.array([window(part, plan.around, 1).min(2).max(1) for part in parts])
    below = lasting + top // 16 + 8
    clearest = (top[:, None] * below >= top * below[:, None]).all(1).argmax(0)  # segments (L,)
    most = clearest, np.arange(len(feature))
    own, best = top * below[most], top[most] * below
    return usual(top, 2 * own >= best), usual(lasting, 4 * own >= best)


def vote(feature, chunks, plan):
    """Weighted sum of the leads' features, each from its floor (0) to its usual beat (1) -> votes (T,) below
    2^15; of every chunk: gains (chunks, L) with which the leads share in locating a peak, noise (chunks,)
    with these gains, and the most that votes could come to (chunks,), of leads too that do not stand out from
    their noise and have no vote."""
    votes, gains, noises, full = np.zeros(feature.shape[1], np.int64), [], [], []
    for start, stop in zip(chunks[:-1], chunks[1:]):
        beat, noise = levels(feature, segments(start, stop, plan), plan)
        floor = np.minimum(noise * 3 // 2, beat * 3 // 4)
        span = np.maximum(beat - floor, 1)
        ratio = np.where(beat >= 16, beat * 64 // (noise + beat // 14 + 1), 0)  # a quiet lead is no judge of the others; < 16: flat
        weight = (ratio * 45 // max(1, ratio.max())) ** 2                      # at most 2025
        scale = np.array([1 << (15 - int(s).bit_length()) for s in span])      # brings span to 2^14 .. 2^15: 16 bits go a long way
        # 3 times the noise and more; what is larger than noise of 50 uV can be, is heard in any noise
        gain = np.where(4 * beat >= 13 * np.minimum(noise, 180) + 64, weight * 65536 // (span * scale), 0)
        above = np.clip(feature[:, start:stop] - floor[:, None], 0, span[:, None]) * scale[:, None]
        votes[start:stop] = (above * gain[:, None] // 65536).sum(0)
        share = weight * 512 // np.maximum(beat, 1)
        gains.append(share * 1023 // max(1, share.max()))
        noises.append((gains[-1] * noise).sum())
        full.append(weight.sum())
    return votes, np.array(gains), np.array(noises), np.array(full)


def candidates(votes, plan):
    """Local maxima of votes -> positions (C,) in ticks (the middle of a plateau), and heights (C,) above the higher of the minima
    on both sides; outside the record there are no votes."""
    padded, at, height = np.pad(votes, plan.around), [], []
    for i in np.flatnonzero(votes):
        left, right = votes[max(0, i - plan.apart):i], votes[i + 1:i + plan.apart + 1]
        if votes[i] > left.max(initial=0) and votes[i] >= right.max(initial=0):
            level = np.flatnonzero(right != votes[i])
            middle = i + (level[0] if len(level) else len(right)) // 2
            near = padded[middle:middle + 2 * plan.around + 1]
            at.append(middle)
            height.append(votes[i] - max(near[:plan.around + 1].min(), near[plan.around:].min()))
    return np.array(at, int), np.array(height, int)


def corners(at, gains, blocks, feature, plan):
    """Of candidates at (C,), summed with their gains (C, L): how far the leads go there and back within three
    steps, at most, near the candidate, and the feature there -> (C,), (C,)."""
    reach, span = plan.half + 3 * plan.step, 3 * plan.step
    mirrored = np.pad(blocks, ((0, 0), (reach, reach)), mode="symmetric")
    steps = np.minimum(abs(mirrored[:, plan.step:] - mirrored[:, :-plan.step]), 32767 // 3)
    path = sum(steps[:, k:mirrored.shape[1] - span + k] for k in range(0, span, plan.step))
    sharp = np.maximum(path - abs(mirrored[:, span:] - mirrored[:, :-span]), 0)  # from each block on
    corner, size, first = np.zeros(len(at), int), np.zeros(len(at), int), reach - plan.half - span // 2
    for i, (tick, gain) in enumerate(zip(at, gains)):
        each = gain[:, None] * sharp[:, 2 * tick + first:][:, :2 * plan.half + 1]
        most = each.max(0) if len(gain) > 1 else 0  # one lead alone is not believed
        corner[i] = np.minimum(each.sum(0), 3 * (each.sum(0) - most)).max()
        size[i] = (gain @ feature[:, max(0, tick - 1):tick + 2]).max()
    return corner, size


def stands_out(height, vote, corner, size, noise, gain, full):
    """Can it be a beat? It is not next to nothing, comes from, and goes back to, nearly nothing; and it is
    sharp or larger than a P wave, which has less than 0.1 mV there and back, or far above the noise."""
    no_p_wave = (32 * corner >= 21 * size) | (size >= 200 * gain) | (size >= 18 * noise)
    return (32 * height >= full) & (8 * height >= 5 * vote) & no_p_wave


def choose(at, height, corner, noise, full, chunks, plan):
    """Which candidates are beats: indices, ascending. They are high or sharp enough for their chunk and not
    the T or P wave of a larger neighbour; or they fill a gap."""
    beat, sharp = np.zeros(len(at), bool), corner.copy()
    for c, (start, stop) in enumerate(zip(chunks[:-1], chunks[1:])):
        inside, borders = (at >= start) & (at < stop), segments(start, stop, plan)
        top = np.array([[x[(at >= a) & (at < b)].max(initial=0) for x in (height, corner)]
                        for a, b in zip(borders[:-1], borders[1:])])           # (segments, 2)
        high, keen = usual(top, np.repeat(2 * top[:, :1] >= top[:, 0].max(), 2, 1))
        small = height[inside & (20 * height < 7 * high)]
        demand = 3 * high + 20 * (small.sum() // max(1, len(small)))
        sharp[inside] -= 2 * noise[c]
        if 4 * high >= full[c]:                                                # most leads say so
            beat |= inside & ((20 * height >= demand) | (32 * sharp >= 5 * keen))
        if start == 0:
            beat &= (at > plan.early) | (2 * height >= high) | (64 * sharp >= 29 * keen)
    for i in np.flatnonzero(beat):
        rivals = ((at[i] - at[j], height[i], height[j], corner[i], corner[j]) for j in range(len(at)) if j != i)
        beat[i] = not any(overshadows(*rival, corner[i] - sharp[i], plan) for rival in rivals)
    return fill_gaps(beat, at, height)


def overshadows(distance, own, other, corner, other_corner, noise, plan):
    """Is a candidate `distance` ticks after (negative: before) another no beat of its own, by their heights
    and corners? noise: as much of its corner may be noise."""
    d, late = abs(distance), distance > 0
    if d < plan.refractory:
        return own < other or own == other and late
    if 2 * own >= other and 4 * corner >= 3 * other_corner:                    # two of a kind
        return False
    end = plan.after if late else plan.before
    fall = lambda top, low: top - (top - low) * (d - plan.near) // (end - plan.near)
    share = lambda top, low: top if d <= plan.near else fall(top, low) if d < end else 0
    return (1024 * own < share(922 if late else 717, 205) * other              # 0.9 or 0.7 to 0.2
            and 1024 * (corner - noise) < share(464, 192) * other_corner)


def fill_gaps(beat, at, height):
    """Search back: where two beats are 1.5 times as far apart as their neighbours, the highest candidate well inside becomes a
    beat if it has 0.4 of the height of the lower of the two."""
    found, out = np.flatnonzero(beat), beat.copy()
    for n, (i, j) in enumerate(zip(found[:-1], found[1:])):
        beside = [at[found[k + 1]] - at[found[k]] for k in (n - 1, n + 1) if 0 <= k < len(found) - 1]
        usual = sum(beside) // max(1, len(beside))
        inside = [k for k in range(i + 1, j) if 5 * min(at[k] - at[i], at[j] - at[k]) >= 3 * usual
                  and 5 * height[k] >= 2 * min(height[i], height[j])]
        if beside and 2 * (at[j] - at[i]) > 3 * usual and inside:
            out[max(inside, key=lambda k: height[k])] = True
    return np.flatnonzero(out)


def locate(middle, signal, valid, blocks, gain, plan):
    """Sample of the largest deflection, summed over leads with their gains, around a block: first in blocks, where a spike is no
    match for a QRS, then in the samples of the best block and half a block on both sides. And is it sharp, as a spike is: 0.7 of
    it gained or lost in 4 ms?"""
    count, length = blocks.shape[1], signal.shape[1]
    start, stop = max(0, middle - plan.half), min(count - 1, middle + plan.half)
    if plan.block < 4:  # no spike was taken out: blunt it
        padded = np.pad(blocks, ((0, 0), (1, 1)), mode="edge")
        blocks = (padded[:, :-2] + 2 * blocks + padded[:, 2:] + 2) // 4
    left, right = blocks[:, start], blocks[:, stop]
    base = right if middle < plan.half else left if middle + plan.half >= count else (left + right) // 2   # a cut QRS has one end
    best = start + np.argmax(gain @ abs(blocks[:, start:stop + 1] - base[:, None]))
    margin = max(1, plan.block // 2)
    first, last = max(0, best * plan.block - margin), min(length, (best + 1) * plan.block + margin)
    moved = np.where(valid[:, first:last], abs(signal[:, first:last] - base[:, None]), 0)
    size = gain @ moved
    return first + np.argmax(size), 10 * abs(size[plan.brief:] - size[:-plan.brief]).max(initial=0) > 7 * size.max()


def keep_apart(peaks, height, length, plan):
    """Peaks inside the record; of two within the refractory time the higher one. A peak that is nearly out of
    it, as at 300 beats a minute, moves there."""
    kept = []
    for peak, high in zip(peaks, height):
        if kept and 10 * (peak - kept[-1][0]) >= 9 * plan.gap:
            peak = max(peak, kept[-1][0] + plan.gap)
        if plan.edge <= peak < length - plan.edge:
            if kept and peak - kept[-1][0] < plan.gap:
                if high > kept[-1][1]:
                    kept[-1] = peak, high
            else:
                kept.append((peak, high))
    return np.array([peak for peak, _ in kept], np.int64)


def beat_of_token(peaks, tokens, samples):
    """Beat of each of `tokens` equal parts of a record: borders half-way between peaks (K,); -1 without a peak. -> (tokens,)"""
    middles = (2 * np.arange(tokens, dtype=np.int64) + 1) * samples       # times 2 * tokens: whole numbers
    borders = (peaks[:-1].astype(np.int64) + peaks[1:]) * tokens
    return np.searchsorted(borders, middles, "right") if len(peaks) else np.full(tokens, -1)
