"""csrc: the compiled operators are the reference to the sample, find every beat of real records whatever is done to them, and break on
nothing. Real recordings are in ../shared/data or $ECG_TEST_DATA."""
import ctypes
import itertools
import shutil
import subprocess
import threading
import time
import tracemalloc

import numpy as np
import pytest
import torch
from scipy.signal import resample_poly

import bench_beats as bench
import csrc
import data
from conftest import ROOT, SHARED
from csrc import beats, build, reference

REAL = SHARED / "data"
real = pytest.mark.skipif(not (REAL / "ludb").is_dir(), reason=f"no real recordings in {REAL} (set ECG_TEST_DATA)")
INFO = csrc.build_info()
compiled = pytest.mark.skipif(INFO["implementation"] != "compiled", reason=f"not compiled: {INFO.get('why')}")
compiler = pytest.mark.skipif(not shutil.which("g++"), reason="no g++ to run the kernels on the host")
RATES = (100, 119, 128, 250, 257, 360, 500, 1000)


def detect(ecg, fs):
    """Peaks of each record of a batch (B, L, N), as lists; of tensors and of arrays, which must agree."""
    peaks, count = csrc.segment_beats(torch.as_tensor(ecg), fs)
    for tensor, array in zip((peaks, count), beats.segment_beats(np.asarray(ecg), fs), strict=True):
        assert type(array) is np.ndarray and array.dtype == np.int32 and np.array_equal(tensor, array)
    assert peaks.dtype == count.dtype == torch.int32 and peaks.shape[1] == csrc.max_peaks(ecg.shape[2], fs)
    for row, n in zip(peaks, count):
        assert (row[n:] == -1).all() and ((row[:n] >= 0) & (row[:n] < ecg.shape[2])).all()
        assert (torch.diff(row[:n]) >= int(0.2 * fs + 0.5)).all()  # ascending, and no two within the refractory time
    return [row[:n].tolist() for row, n in zip(peaks, count)]


def assert_same(ecg, fs):
    for record, peaks in zip(ecg, detect(ecg, fs)):
        assert peaks == reference.segment_beats(record, fs).tolist()


def recordings(pattern, limit=None):
    """Twelve leads (12, N) and rate of WFDB records."""
    for head in sorted(REAL.glob(pattern))[:limit]:
        record = data.read_record(str(head.with_suffix("")))
        yield data.to_twelve(record)[0], record.fs


@pytest.fixture(scope="module")
def ludb():
    return bench.ludb(REAL / "ludb")


@pytest.fixture(scope="module")
def strips():
    """Simulated records: (8, 12, N) mV for each of RATES, some with what a recording should not have."""
    out = {}
    for fs in RATES:
        ecg = data._block(np.random.default_rng(fs), fs, 10, noise="strongest")[0][:8].copy()
        ecg[1, 3, fs:3 * fs] = np.nan
        ecg[2, :, 4 * fs:4 * fs + 3] = np.nan
        ecg[3, 5], ecg[3, 6] = np.nan, 0
        ecg[4, ::2] *= -1
        ecg[5, 1] = 1e30
        ecg[6] += np.where(np.arange(10 * fs) % fs < max(2, fs // 400), 4, 0)  # pacing spikes
        ecg[7, 2, ::97] = -np.inf
        out[fs] = ecg.astype(np.float32)
    return out


# ---- accuracy -------------------------------------------------------------------------------------------------------

@real
def test_every_beat_of_ludb(ludb):
    result = bench.score(ludb, bench.ours)
    assert result.beats == 923 and result.false + result.missed <= 1 and result.f1 >= 0.9994 and result.timing < 10


@real
@pytest.mark.parametrize("leads", [(0,), (0, 1)])
def test_every_beat_of_mitbih_100(leads):
    result = bench.score(bench.mitdb(REAL / "mitdb", leads), bench.ours, 0.075)
    assert result.beats == 2273 and result.false == result.missed == 0


@pytest.mark.parametrize("fs", [100, 500])
def test_simulated_records_with_every_noise_at_its_strongest(fs):
    result = bench.score(bench.simulated(fs, blocks=1), bench.ours)
    assert result.beats > 3000 and result.f1 >= 0.993  # early beats on a T wave and 0.5 mV in the noise are missed


def test_peaks_in_order_of_leads_do_not_matter(strips):
    ecg = strips[500]
    assert detect(ecg[:, ::-1].copy(), 500) == detect(ecg, 500)


# ---- robustness: F1 on LUDB stays at least 0.995 whatever is done to the records -----------------------------------------

def changed(records, change):
    """Records with change(ecg, generator) instead of ecg."""
    return [r._replace(ecg=change(r.ecg.copy(), np.random.default_rng(i)).astype(np.float32)) for i, r in enumerate(records)]


def resampled(records, fs):
    scale = fs / 500
    return [r._replace(ecg=resample_poly(r.ecg, fs, 500, axis=1, padtype="line").astype(np.float32), fs=fs, truth=r.truth * scale,
                       span=tuple(x * scale for x in r.span)) for r in records]


def with_lead(ecg, lead, values):
    ecg[lead] = values
    return ecg


DETACHED = {  # what an electrode that hangs in the air may give, (N,) mV
    "white": lambda rng, n: rng.standard_normal(n),
    "huge": lambda rng, n: 5 * rng.standard_normal(n),
    "wandering": lambda rng, n: 0.1 * rng.standard_normal(n).cumsum(),
    "mains": lambda rng, n: 2 * np.sin(2 * np.pi * 50 * np.arange(n) / 500 + rng.uniform(0, 6)) + 0.1 * rng.standard_normal(n),
    "pops": lambda rng, n: np.convolve(5 * (rng.random(n) < 12 / n) * rng.standard_normal(n), np.exp(-np.arange(100) / 15), "same"),
    "like QRS": lambda rng, n: 0.3 * np.convolve(rng.standard_normal(n), np.hanning(25), "same"),
}


@real
@pytest.mark.parametrize("lead", range(12))
def test_an_inverted_lead(ludb, lead):
    assert bench.score(changed(ludb, lambda x, _: with_lead(x, lead, -x[lead])), bench.ours).f1 >= 0.995


@real
def test_eight_flat_leads(ludb):
    choices = list(itertools.combinations(range(12), 8))
    for flat in [choices[i] for i in np.random.default_rng(0).choice(len(choices), 40, replace=False)]:
        assert bench.score(changed(ludb, lambda x, _: with_lead(x, list(flat), 0)), bench.ours).f1 >= 0.995, flat


@real
@pytest.mark.parametrize("kind", DETACHED)
def test_a_detached_lead(ludb, kind):
    for lead in range(12):
        noisy = changed(ludb, lambda x, rng: with_lead(x, lead, DETACHED[kind](rng, x.shape[1])))
        assert bench.score(noisy, bench.ours).f1 >= 0.995, data.LEADS[lead]


@real
@pytest.mark.parametrize("fs", [100, 250, 360, 1000])
def test_other_sampling_rates(ludb, fs):
    assert bench.score(resampled(ludb, fs), bench.ours).f1 >= 0.995


@real
@pytest.mark.parametrize("factor", [0.1, 10])
def test_other_amplitudes(ludb, factor):
    assert bench.score(changed(ludb, lambda x, _: x * factor), bench.ours).f1 >= 0.995


@real
@pytest.mark.parametrize("change", [
    lambda x, rng: x + 0.5 * np.sin(2 * np.pi * 50 * np.arange(x.shape[1]) / 500 + rng.uniform(0, 6, (12, 1))),
    lambda x, rng: x + np.where(np.arange(x.shape[1]) >= rng.integers(0, x.shape[1]), 3 * rng.standard_normal((12, 1)), 0),
    lambda x, rng: np.clip(x, *np.quantile(x, (0.02, 0.98))),
    lambda x, rng: x + 2 * np.sin(2 * np.pi * 0.3 * np.arange(x.shape[1]) / 500 + rng.uniform(0, 6, (12, 1))),
    lambda x, rng: np.where((np.arange(x.shape[1]) - rng.integers(0, x.shape[1], (12, 1))) % x.shape[1] < 400, np.nan, x),
], ids=["mains", "jump of the baseline", "clipped", "drift", "gaps"])
def test_what_else_befalls_a_recording(ludb, change):
    assert bench.score(changed(ludb, change), bench.ours).f1 >= 0.995


# ---- hard cases: every beat and no other --------------------------------------------------------------------

def errors(records):
    result = bench.score(records, bench.ours, 0.1)
    return int(result.false), result.missed


@pytest.fixture(scope="module")
def hard_cases():
    return bench.hard_cases()


def test_hard_cases(hard_cases):
    wrong = {name: errors(records) for name, records in hard_cases.items() if not name.startswith("regular")}
    assert wrong == dict.fromkeys(wrong, (0, 0))


@pytest.mark.parametrize("kind", bench.RHYTHMS)
def test_every_rhythm_at_every_rate_and_amplitude(kind):
    """Broad beats of 0.1 mV and less look like P waves. At 300 a minute beats touch each other."""
    slowest, fastest = bench.RHYTHMS[kind]
    for rate in (25, 30, 40, 50, 60, 80, 100, 120, 150, 180, 200, 220, 250, 280, 300):
        for mv in (0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 5):
            if slowest <= rate <= fastest and (kind != "wide" or mv >= 0.3):
                false, missed = errors([bench.rhythm(kind, rate, mv)])
                assert false == 0 and missed <= (3 if rate == 300 and mv <= 0.3 else 0), (rate, mv)


@pytest.mark.parametrize("fs", [100, 250, 500, 1000])
def test_noise_alone_has_no_beats(fs):
    colours = "white", "pink", "muscle"
    for seed, uv, kind, leads in itertools.product(range(3), (1, 5, 20, 50), colours, (1, 3, 12)):
        rng = np.random.default_rng((seed, uv, leads))
        ecg = (uv / 1000 * bench.coloured(kind, (1, leads, 10 * fs), fs, rng)).astype(np.float32)
        assert detect(ecg, fs) == [[]], (seed, uv, kind, leads)
        assert detect((1000 * ecg).round().astype(np.int16), fs) == [[]], (seed, uv, kind, leads)


def test_p_waves_alone_are_no_beats():
    for rate in (40, 70, 100):
        for seed in range(3):
            r = bench.beats_at(np.arange(0.4, 10, 60 / rate), mv=0, seed=seed)
            p = sum(bench.bump(np.arange(5000) / 500, at, 0.022) for at in r.truth / r.fs)
            ecg = (r.ecg + 0.12 * bench.AXIS[:, None] * p).astype(np.float32)
            assert detect(ecg[None], 500) == [[]], (rate, seed)


@pytest.mark.parametrize("fs", [100, 128, 250, 360, 1000])
@pytest.mark.parametrize("leads", [1, 3])
def test_hard_cases_at_other_rates_in_fewer_leads(fs, leads):
    few = bench.beats_at(np.array([0.5, 1.4]), fs=fs)
    slow = bench.beats_at(np.arange(0.4, 10, 2.4), fs=fs)
    half = bench.beats_at(np.arange(0.35, 10, 0.85), fs=fs)
    half.ecg[:, :5 * fs] += 3 * np.random.default_rng(0).standard_normal((12, 5 * fs)).astype(np.float32)
    half = half._replace(truth=half.truth[half.truth > 5.2 * fs], span=(5.2 * fs, 10 * fs))
    for record in (few, slow, half):
        assert errors([record._replace(ecg=record.ecg[1:1 + leads])]) == (0, 0)


@real
@pytest.mark.parametrize("start, stop", [(0, 5), (2.5, 7.5), (5, 10), (0, 7)])
def test_noise_in_a_part_of_ludb_costs_no_beat_of_the_rest(ludb, start, stop):
    """Noise of 1, 3 or 5 mV in all leads. The half second behind it may have the T wave of a beat under it."""
    for mv in (1, 3, 5):
        part = slice(int(start * 500), int(stop * 500))
        noisy = changed(ludb, lambda x, rng: np.concatenate(
            [x[:, :part.start], x[:, part] + mv * rng.standard_normal(x[:, part].shape), x[:, part.stop:]], 1))
        clean = [r._replace(truth=r.truth[(r.truth < part.start - 100) | (r.truth > part.stop + 100)],
                            unsure=(part.start - 100, part.stop + 250)) for r in noisy]
        result = bench.score(clean, bench.ours)
        assert result.beats > 200 and result.missed == 0 and result.false <= 2, (mv, result)


# ---- compiled = reference ---------------------------------------------------------------------------------------------

@compiled
@pytest.mark.parametrize("fs", RATES)
def test_compiled_is_the_reference(strips, fs):
    assert_same(strips[fs], fs)
    assert_same(strips[fs][:4, 2:5, :2 * fs + 1].copy(), fs)
    assert_same(np.nan_to_num(1000 * strips[fs], nan=-32768).clip(-32768, 32767).astype(np.int16), fs)


@compiled
@real
@pytest.mark.parametrize("pattern", ["ludb/data/*.hea", "cpsc2018/*.hea", "csn/*.hea", "georgia/*.hea", "ptbxl/records500/*/*.hea",
                                     "ptbxl/records100/*/*.hea"])
def test_compiled_is_the_reference_on_recordings(pattern):
    for ecg, fs in recordings(pattern, 100):
        assert_same(ecg[None], fs)


@compiled
@real
def test_compiled_is_the_reference_on_a_long_recording():
    [record] = bench.mitdb(REAL / "mitdb")
    assert_same(record.ecg[None, :, :10 * 60 * 360], 360)


def random_batch(rng):
    """Shapes, values and faults of all kinds -> ecg (B, L, N), fs."""
    fs = float(rng.choice([100, 120, 125, 239.9, 240, 333, 479, 480, 500, 960, 1000]))
    shape = int(rng.integers(1, 4)), int(rng.integers(1, 13)), int(fs * rng.choice([2, 3.3, 10, 16, 31])) + int(rng.integers(1, 20))
    kind = rng.choice(["noise", "constant", "spikes", "steps", "wave", "walk"])
    t = np.arange(shape[2]) / fs
    ecg = {"noise": lambda: rng.standard_normal(shape),
           "constant": lambda: np.broadcast_to(rng.standard_normal((*shape[:2], 1)), shape),
           "spikes": lambda: 9 * (rng.random(shape) < 0.003) * rng.standard_normal(shape),
           "steps": lambda: 3 * (rng.random(shape) < 0.002).cumsum(2) % 5,
           "wave": lambda: np.broadcast_to(np.sin(2 * np.pi * rng.uniform(0.2, 30) * t) ** 9, shape),
           "walk": lambda: 0.1 * rng.standard_normal(shape).cumsum(2)}[kind]().astype(np.float32)
    ecg = ecg * np.float32(10.0 ** rng.integers(-3, 6))
    for value in rng.choice([np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-42, 32.767, -0.0], 3):
        start = rng.integers(0, shape[2], 2)
        ecg[rng.integers(shape[0]), rng.integers(shape[1]), start.min():start.max()] = value
        ecg[rng.random(shape) < 0.002] = value
    if rng.random() < 0.3:
        return np.nan_to_num(ecg, nan=-32768).clip(-32768, 32767).astype(np.int16), fs
    return ecg, fs


@compiled
def test_compiled_is_the_reference_on_anything():
    for seed in range(150):
        assert_same(*random_batch(np.random.default_rng(seed)))


@compiled
def test_compiled_is_the_reference_on_hard_cases(hard_cases):
    for records in hard_cases.values():
        for record in records[::3]:
            assert_same(record.ecg[None], record.fs)


@compiled
def test_threads_do_not_matter(strips):
    before, one = torch.get_num_threads(), []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            one.append(detect(strips[250], 250))
    finally:
        torch.set_num_threads(before)
    assert one[0] == one[1] and any(one[0])


# ---- input ------------------------------------------------------------------------------------------------------------

def test_nothing_to_find():
    for value in (0, 5, np.nan, np.inf, -np.inf, 1e38):
        assert detect(np.full((2, 3, 2000), value, np.float32), 500) == [[], []]
    assert detect(np.full((1, 12, 2000), -32768, np.int16), 500) == [[]]
    peaks, count = csrc.segment_beats(torch.zeros(0, 12, 5000), 500)
    assert peaks.shape == (0, 50) and count.shape == (0,)


def test_any_strides(strips):
    ecg = torch.as_tensor(strips[500])
    for view in (ecg.transpose(0, 1).contiguous().transpose(0, 1), torch.stack([ecg, ecg], 3)[..., 1], ecg[::2, 1:9:2],
                 ecg[:1].expand(3, -1, -1)):
        assert not view.is_contiguous() and detect(view, 500) == detect(view.contiguous(), 500)


def test_int16_is_millivolts_in_thousandths(strips):
    whole = np.rint(1000 * np.nan_to_num(strips[500][[0, 4, 6]])).clip(-32767, 32767).astype(np.int16)
    for a, b in zip(detect(whole, 500), detect(whole.astype(np.float32) / 1000, 500)):
        assert len(a) == len(b) and len(a) > 3 and np.abs(np.subtract(a, b)).max() <= 4


@pytest.mark.parametrize("ecg, fs, error, words", [
    (np.zeros((1, 12, 5000)), 500, TypeError, "numpy|ndarray"),
    (torch.zeros(1, 12, 5000, dtype=torch.float64), 500, TypeError, r"float64; give a tensor of float32 millivolts \(ecg.float\(\)\)"),
    (torch.zeros(12, 5000), 500, ValueError, r"shape \(12, 5000\); it must be \(B, leads, N\)"),
    (torch.zeros(1, 13, 5000), 500, ValueError, "1 to 12 leads"),
    (torch.zeros(1, 0, 5000), 500, ValueError, "1 to 12 leads"),
    (torch.zeros(1, 12, 999), 500, ValueError, "999 samples at 500 Hz; it takes 2 s at least"),
    (torch.zeros(1, 12, 5000), 50, ValueError, "fs is 50; it must be 100 to 1000 Hz"),
    (torch.zeros(1, 12, 5000), 2000, ValueError, "fs is 2000"),
    (torch.zeros(1, 12, 5000), float("nan"), ValueError, "fs is nan"),
])
def test_bad_input_is_explained(ecg, fs, error, words):
    with pytest.raises(error, match=words):
        csrc.segment_beats(ecg, fs)


def test_tokens_go_to_the_beat_they_are_nearest_to():
    peaks = torch.tensor([[100, 300, 420], [10, -1, -1], [-1, -1, -1]], dtype=torch.int32)
    beat = csrc.beat_of_token(peaks, torch.tensor([3, 1, 0], dtype=torch.int32), 10, 500)  # middles 25, 75, .., 475
    assert beat.tolist() == [[0, 0, 0, 0, 1, 1, 1, 2, 2, 2], [0] * 10, [-1] * 10] and beat.dtype == torch.int32
    rng = np.random.default_rng(0)
    for tokens, samples in ((63, 1000), (7, 5000), (5000, 5000), (313, 5001)):
        found = np.sort(rng.choice(samples, 12, replace=False)).astype(np.int32)
        ours = csrc.beat_of_token(torch.as_tensor(found)[None], torch.tensor([12], dtype=torch.int32), tokens, samples)[0].numpy()
        middles = (np.arange(tokens) + 0.5) * samples / tokens
        distance = abs(middles[:, None] - found)
        assert np.allclose(distance[np.arange(tokens), ours], distance.min(1))
        assert (ours == reference.beat_of_token(found, tokens, samples)).all()


@pytest.mark.parametrize("tokens, samples, found", [
    (4, 2**31 - 1, [2**30, 2**31 - 3, 2**31 - 2]), (2**21 + 1, 2**31 - 1, [5, 2**30 + 7, 2**31 - 2]),
    (2**21, 2**12, [2000, 4001])])
def test_tokens_and_samples_whose_product_is_large(tokens, samples, found):
    """By Python's whole numbers, which do not overflow: some tokens from everywhere, and near borders."""
    peaks, count = (torch.tensor(x, dtype=torch.int32) for x in ([found], [len(found)]))
    ours = csrc.beat_of_token(peaks, count, tokens, samples)[0]
    borders = [(a + b) * tokens for a, b in zip(found, found[1:])]
    near = [border // (2 * samples) + i for border in borders for i in range(-2, 3)]
    for t in {t for t in [*range(0, tokens, tokens // 4), tokens - 1, *near] if 0 <= t < tokens}:
        assert ours[t] == sum(border <= (2 * t + 1) * samples for border in borders), t
    assert (ours.numpy() == reference.beat_of_token(peaks[0].numpy(), tokens, samples)).all()


@pytest.mark.parametrize("peaks, count, tokens, error, words", [
    (torch.zeros(2, 3), torch.zeros(2, dtype=torch.int32), 5, TypeError, "int32"),
    (torch.zeros(2, 3, dtype=torch.int32), torch.zeros(3, dtype=torch.int32), 5, ValueError, r"must be \(B, K\) and \(B,\)"),
    (torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, dtype=torch.int32), 0, ValueError, "0 tokens"),
    (torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, dtype=torch.int32), 2**31, ValueError, "fewer"),
])
def test_bad_peaks_are_explained(peaks, count, tokens, error, words):
    with pytest.raises(error, match=words):
        csrc.beat_of_token(peaks, count, tokens, 100)


def test_a_count_that_cannot_be_is_cut_to_what_can():
    peaks = torch.tensor([[100, 300]] * 2, dtype=torch.int32)
    assert csrc.beat_of_token(peaks, torch.tensor([9, -1], dtype=torch.int32), 4, 400).tolist() == [[0, 0, 1, 1], [-1] * 4]


# ---- NumPy -------------------------------------------------------------------------------------------------

def test_arrays_as_they_come(strips, tmp_path):
    ecg = np.nan_to_num(1000 * strips[250], nan=-32768).clip(-32768, 32767).astype(np.int16)
    peaks, count = beats.segment_beats(ecg, 250)
    for one, found, n in zip(ecg, peaks, count):
        alone = beats.segment_beats(one, 250)
        assert np.array_equal(alone[0], found) and alone[1] == n and found.shape == (50,)
    ecg.tofile(tmp_path / "ecg.i16")
    mapped = np.memmap(tmp_path / "ecg.i16", np.int16, "r", shape=ecg.shape)
    odd = np.frombuffer(b"\0" + ecg.tobytes(), np.int16, offset=1).reshape(ecg.shape)
    assert not odd.flags.aligned
    for other in (mapped, odd, np.asfortranarray(ecg)):
        assert np.array_equal(beats.segment_beats(other, 250)[0], peaks)
    few = ecg[::2, 1:9:2]
    assert np.array_equal(beats.segment_beats(few, 250)[0], beats.segment_beats(few.copy(), 250)[0])


def test_the_reference_gives_arrays_like_the_compiled(strips):
    both = beats.by_reference(strips[100], 100), beats.segment_beats(strips[100], 100)
    for ours, theirs in zip(*both, strict=True):
        assert ours.dtype == np.int32 and np.array_equal(ours, theirs)


@compiled
def test_arrays_are_not_copied_and_others_may_run():
    ecg, ended = np.zeros((4000, 12, 1000), np.int16), []
    ecg[:] = 300 * np.random.default_rng(0).standard_normal(1000)
    thread = threading.Thread(target=lambda: ended.append(beats.segment_beats(ecg, 100)))
    tracemalloc.start()
    thread.start()
    turns = 0
    while not ended:
        time.sleep(0.001)
        turns += 1
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    thread.join()
    assert turns > 5 and most < ecg.nbytes / 20


@pytest.mark.parametrize("ecg, fs, error, words", [
    (torch.zeros(1, 12, 5000), 500, TypeError, "ecg is Tensor; give a NumPy array"),
    ([[0.0] * 5000], 500, TypeError, "ecg is list"),
    (np.zeros((1, 12, 5000)), 500, TypeError, r"float64; .* millivolts \(ecg.astype\('float32'\)\) or int16"),
    (np.zeros((1, 12, 5000), ">i2"), 500, TypeError, "ecg is >i2"),
    (np.zeros((1, 12, 5000), np.uint16), 500, TypeError, "ecg is uint16"),
    (np.ma.zeros((1, 12, 5000), np.float32), 500, TypeError, "ecg is MaskedArray"),
    (np.zeros(5000, np.float32), 500, ValueError, r"shape \(5000,\); it must be \(B, leads, N\)"),
    (np.zeros((1, 1, 12, 5000), np.float32), 500, ValueError, r"shape \(1, 1, 12, 5000\)"),
    (np.zeros((13, 5000), np.float32), 500, ValueError, "1 to 12 leads"),
    (np.zeros((1, 0, 5000), np.float32), 500, ValueError, "1 to 12 leads"),
    (np.zeros((1, 12, 999), np.float32), 500, ValueError, "999 samples at 500 Hz; it takes 2 s at least"),
    (np.zeros((1, 12, 5000), np.float32), 2000, ValueError, "fs is 2000; it must be 100 to 1000 Hz"),
    (np.zeros((1, 12, 5000), np.float32), float("nan"), ValueError, "fs is nan"),
])
def test_bad_arrays_are_explained(ecg, fs, error, words):
    with pytest.raises(error, match=words):
        beats.segment_beats(ecg, fs)


# ---- PyTorch ----------------------------------------------------------------------------------------------------------

def test_opcheck(strips):
    ecg = torch.as_tensor(strips[100])
    torch.library.opcheck(torch.ops.ecg.segment_beats.default, (ecg, 100.0))
    torch.library.opcheck(torch.ops.ecg.segment_beats.default, ((1000 * torch.nan_to_num(ecg)).short(), 100.0))
    torch.library.opcheck(torch.ops.ecg.beat_of_token.default, (*csrc.segment_beats(ecg, 100), 63, 1000))


def test_torch_compile_keeps_one_graph(strips):
    def beats(ecg):
        peaks, count = csrc.segment_beats(ecg * 2, 100)
        return csrc.beat_of_token(peaks, count, 63, 1000) + 1
    ecg = torch.as_tensor(strips[100])
    assert torch.equal(torch.compile(beats, fullgraph=True, backend="aot_eager")(ecg), beats(ecg))


# ---- CUDA, without a GPU ----------------------------------------------------------------------------------------------

@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
@pytest.mark.parametrize("source", ["beats_cuda.cu", "similarity_cuda.cu", "beat_similarity_cuda.cu", "sigmoid_cuda.cu"])
@pytest.mark.parametrize("architecture", [80, 90])
def test_kernels_compile_without_spills(tmp_path, architecture, source):
    code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    result = subprocess.run(["nvcc", "-c", "-std=c++17", *build.CUDA_FLAGS, "-Xptxas=-v", code, str(build.FOLDER / source),
                             "-o", str(tmp_path / "object.o")], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "registers" in result.stderr and result.stderr.count("bytes spill stores") == result.stderr.count(" 0 bytes spill stores")


def on_host(source, folder):
    """Library of a file in tests/ that runs kernels on the host by cuda_on_host.h."""
    library = folder / "kernels.so"
    subprocess.run(["g++", "-std=c++17", "-O2", "-ffp-contract=off", "-shared", "-fPIC", "-pthread", "-Wno-unknown-pragmas",
                    str(ROOT / "tests" / source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """segment_beats of csrc/beats_cuda.cu, run on the host."""
    function = on_host("beats_on_host.cpp", tmp_path_factory.mktemp("kernels")).segment

    def run(ecg, fs):
        ecg = np.ascontiguousarray(ecg)
        records, leads, length = ecg.shape
        peaks, count = (np.full(shape, -7, np.int32) for shape in ((records, csrc.max_peaks(length, fs)), records))
        function(ecg.ctypes.data_as(ctypes.c_void_p), ecg.dtype == np.float32, records, leads, length, ctypes.c_double(fs),
                 peaks.ctypes.data_as(ctypes.c_void_p), count.ctypes.data_as(ctypes.c_void_p))
        assert all((row[n:] == -1).all() for row, n in zip(peaks, count))
        return [row[:n].tolist() for row, n in zip(peaks, count)]
    return run


@compiler
@pytest.mark.parametrize("fs", RATES)
def test_kernels_on_the_host_are_the_reference(kernels, strips, fs):
    assert kernels(strips[fs], fs) == detect(strips[fs], fs)
    whole = np.nan_to_num(1000 * strips[fs], nan=-32768).clip(-32768, 32767).astype(np.int16)
    assert kernels(whole, fs) == detect(whole, fs)


@compiler
def test_kernels_on_the_host_are_the_reference_on_hard_cases(kernels, hard_cases):
    ecg = np.stack([records[0].ecg for records in hard_cases.values()])
    assert kernels(ecg, 500) == detect(ecg, 500)


@compiler
def test_kernels_on_the_host_take_anything(kernels):
    for seed in range(25):
        ecg, fs = random_batch(np.random.default_rng(seed))
        assert kernels(ecg, fs) == detect(ecg, fs), seed


@compiler
@real
def test_kernels_on_the_host_are_the_reference_on_recordings(kernels, ludb):
    ecg = np.stack([r.ecg for r in ludb[::4]])
    assert kernels(ecg, 500) == detect(ecg, 500)
