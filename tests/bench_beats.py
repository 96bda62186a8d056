"""segment_beats against its peers: beats found on annotated and on simulated records, and records a second.

    python tests/bench_beats.py [DIR]     DIR: the recordings, with ludb/ and mitdb/ (default: ../shared/data beside the project)

Peers, where installed (pip install sleepecg==0.6.* neurokit2): SleepECG's C detector and NeuroKit2 on lead II; XQRS comes with wfdb.
"""
import platform
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import wfdb

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import csrc
import data

BEATS = set("NLRBAaJSVrFejnE/fQ?")  # of WFDB's annotation symbols


# ---- recordings with known beats ------------------------------------------------------------------------------------

class Recording(NamedTuple):
    ecg: np.ndarray    # (L, N) float32 mV
    fs: float          # Hz
    truth: np.ndarray  # (K,) samples
    span: tuple        # first and last sample that was annotated
    unsure: tuple = (0, 0)  # first and last sample of a part in which nobody knows


def ludb(folder):
    """LUDB: QRS peaks of all leads, those within 100 ms together, kept where at least 6 leads have one: the median."""
    records = []
    for head in sorted(Path(folder, "data").glob("*.hea"), key=lambda path: int(path.stem)):
        record = data.read_record(str(head.with_suffix("")))
        leads = [wfdb.rdann(str(head.with_suffix("")), name.lower()) for name in data.LEADS]
        peaks = np.sort(np.concatenate([lead.sample[np.array(lead.symbol) == "N"] for lead in leads]))
        groups = np.split(peaks, np.flatnonzero(np.diff(peaks) > 0.1 * record.fs) + 1)
        truth = np.array([int(np.median(group)) for group in groups if len(group) >= 6])
        span = np.median([(lead.sample.min(), lead.sample.max()) for lead in leads], axis=0)
        records.append(Recording(data.to_twelve(record)[0], record.fs, truth, tuple(span)))
    return records


def mitdb(folder, leads=(0, 1)):
    """Record 100 of the MIT-BIH Arrhythmia Database, half an hour."""
    record, notes = data.read_record(f"{folder}/100"), wfdb.rdann(f"{folder}/100", "atr")
    truth = notes.sample[[symbol in BEATS for symbol in notes.symbol]]
    return [Recording(record.signal[list(leads)], record.fs, truth, (0, record.signal.shape[1] - 1))]


def simulated(rate, blocks=2, seed=21):
    """Simulated records, every one with every noise at its strongest."""
    parts = [data._block(np.random.default_rng((seed, b)), rate, 10, noise="strongest") for b in range(blocks)]
    return [Recording(ecg, rate, np.array(peaks), (0, 10 * rate - 1)) for part in parts for ecg, peaks in zip(*part[:2])]


# ---- hard cases, made here ----------------------------------------------------------------------------------

AXIS = np.array([.7, 1, .35, -.8, .2, .65, -.5, .3, .8, 1.2, 1, .7])  # a normal beat of 1 mV in twelve leads
RHYTHMS = {"regular": (25, 300), "irregular": (25, 250), "bigeminy": (25, 100), "trigeminy": (25, 100),
           "couplets": (25, 100), "alternans": (25, 150), "wide": (25, 250)}  # rates (1/min) with all beats found
RATES = (25, 40, 80, 100, 150, 200, 250, 300)


def bump(t, at, width):
    return np.exp(-0.5 * ((t - at) / width) ** 2)


def beats_at(times, early=(), sizes=1., mv=1., ratio=2., p=.12, noise=.008, fs=500, seed=0, rr=1.,
             seconds=10):
    """A strip of twelve leads: normal beats (P, QRS, T) of mv * sizes, and premature ones, broad and without P,
    of mv * ratio."""
    t, rng = np.arange(seconds * fs) / fs, np.random.default_rng(seed)
    ecg, later = np.zeros((12, len(t))), .28 * min(1, rr) ** .5
    for at, broad, size in np.broadcast(times, early if len(early) else False, sizes):
        w = min(.0178, .066 * rr) if broad else .010
        qrs = bump(t, at, w) - .12 * bump(t, at - 2.4 * w, w) - .3 * bump(t, at + 2.6 * w, w)
        if broad:
            ecg += mv * ratio * AXIS[::-1, None] * (qrs - .3 * bump(t, at + later, .06 * min(1, rr) ** .5))
        else:
            waves = p * (rr > .4) * bump(t, at - .16, .022)
            waves += .25 * bump(t, at + later, .04 * min(1, rr) ** .5)
            ecg += mv * size * AXIS[:, None] * (qrs + waves)
    ecg = (ecg + noise * rng.standard_normal(ecg.shape)).astype(np.float32)
    times = np.asarray(times)
    inside = times[(times > .1) & (times < seconds - .1)]
    return Recording(ecg, fs, inside * fs, (.1 * fs, (seconds - .1) * fs))


def rhythm(kind, rate, mv, seed=0):
    """Ten seconds of a rhythm of RHYTHMS with beats of mv; noise 4 % of that, 8 uV at most."""
    rr, k = 60 / rate, np.arange(10 * rate // 60 + 3)  # of the beats
    early = {"bigeminy": k % 2 == 1, "trigeminy": k % 3 == 2, "couplets": k % 5 >= 3,
             "wide": k >= 0}.get(kind, k < 0)
    steps = np.full(len(k), rr)
    if kind == "irregular":
        steps *= np.clip(1 + .2 * np.random.default_rng(seed).standard_normal(len(k)), max(.6, .21 / rr), 1.6)
    elif kind != "wide":
        coupling = np.clip(.8 * rr, .3, .6)
        steps[:-1][early[1:]] = coupling
        steps[:-1][early[:-1] & ~early[1:]] = 2 * rr - coupling
    times = .35 * min(1, rr) + np.r_[0, steps.cumsum()[:-1]]
    keep, sizes = times < 9.95, np.where((kind == "alternans") & (k % 2 == 1), .5, 1)
    return beats_at(times[keep], early[keep], sizes[keep], mv, 1 if kind == "wide" else 2,
                    noise=min(.008, .04 * mv), seed=seed, rr=rr)


def coloured(kind, shape, fs, rng):
    """Noise of standard deviation 1."""
    white = rng.standard_normal(shape)
    if kind == "white":
        return white
    if kind == "mains":
        phase = rng.uniform(0, 6, (*shape[:-1], 1))
        return 2 ** .5 * np.sin(2 * np.pi * 50 * np.arange(shape[-1]) / fs + phase) + .02 * white
    f = np.fft.rfftfreq(shape[-1], 1 / fs)
    gain = f.clip(.3) ** -.5 if kind == "pink" else (f > 20) & (f < 45)  # or muscle
    noise = np.fft.irfft(np.fft.rfft(white) * gain, shape[-1])
    return noise / noise.std()


def noisy_part(start, stop, mv, kind="white", seed=0):
    """Beats at 70 a minute under noise of mv from start to stop (s); those outside it count."""
    r, rng = beats_at(np.arange(.35, 10, 60 / 70), seed=seed), np.random.default_rng(seed)
    t = np.arange(r.ecg.shape[1]) / r.fs
    ecg = r.ecg + mv * coloured(kind, r.ecg.shape, r.fs, rng) * ((t >= start) & (t < stop))
    return r._replace(ecg=ecg.astype(np.float32), unsure=((start - .2) * r.fs, (stop + .2) * r.fs),
                      truth=r.truth[(r.truth < (start - .2) * r.fs) | (r.truth > (stop + .2) * r.fs)])


def early_beats(kind, normal, ectopic, coupling, seed=0):
    early = np.resize({"bigeminy": [0, 1], "trigeminy": [0, 0, 1]}[kind], 20) == 1
    steps = np.where(np.roll(early, -1), coupling, np.where(early, 1.25 - coupling + .2, .8))
    times = .6 + np.r_[0, steps.cumsum()[:-1]]
    keep = times < 9.6
    return beats_at(times[keep], early[keep], 1., normal, ectopic / normal, p=.12, seed=seed)


def hard_cases():
    """{name: recordings}"""
    colours, seeds = ("white", "pink", "muscle", "mains"), range(3)
    noise = lambda uv, kind, seed: coloured(kind, (12, 5000), 500, np.random.default_rng((uv, seed)))
    alone = lambda uv, *how: Recording((uv / 1000 * noise(uv, *how)).astype(np.float32), 500, np.zeros(0), (0, 4999))
    parts = {"at the start": [(0, 3), (0, 5), (0, 7)], "in the middle": [(3, 6), (2.5, 7.5)],
             "at the end": [(5, 10), (3, 10)]}
    few = ([.4, 1.2], [5.], [2., 8.], [.5, 1.4, 2.3])
    return {
        **{f"noise of 1 and 3 mV {name}": [noisy_part(a, b, mv, seed=s) for a, b in spans for mv in (1, 3)
                                           for s in seeds] for name, spans in parts.items()},
        "noise of 1 to 50 uV alone": [alone(uv, c, s) for uv in (1, 5, 20, 50) for c in colours for s in seeds],
        "one to three beats, then none": [beats_at(np.array(t), mv=mv, seed=s) for t in few
                                          for mv in (.5, 1, 2) for s in seeds],
        **{f"{kind}, {n} and {e} mV": [early_beats(kind, n, e, c, s) for c in (.42, .5, .58) for s in seeds]
           for kind in ("bigeminy", "trigeminy") for n, e in ((.3, 1.), (.5, 1.5), (.7, 2.5))},
        **{f"{kind}, {0.3 if kind == 'wide' else 0.05} to 5 mV": [
            rhythm(kind, rate, mv) for rate in RATES if a <= rate <= b for mv in (.05, .3, 1, 5)
            if kind != "wide" or mv >= .3] for kind, (a, b) in RHYTHMS.items()},
    }


# ---- scores ---------------------------------------------------------------------------------------------------------

def match(found, truth, tolerance):
    """Each true beat takes the nearest detection within tolerance (samples) that no beat before it took -> differences of pairs,
    and the detections that nobody took."""
    left, differences = list(found), []
    for beat in truth:
        near = min(left, key=lambda peak: abs(peak - beat), default=None)
        if near is not None and abs(near - beat) <= tolerance:
            left.remove(near)
            differences.append(near - beat)
    return differences, left


class Score(NamedTuple):
    beats: int
    false: int        # detections that are none
    missed: int
    timing: float     # ms, median distance of a detection from its beat
    f1: float


def score(records, detect, tolerance=0.15):
    """detect(ecg (L, N), fs) -> (K,) samples. A detection outside what was annotated is not false. tolerance: s."""
    beats, false, distances = 0, 0, []
    for r in records:
        differences, others = match(detect(r.ecg, r.fs), r.truth, tolerance * r.fs)
        beats, false = beats + len(r.truth), false + sum(
            r.span[0] <= peak <= r.span[1] and not r.unsure[0] < peak < r.unsure[1] for peak in others)
        distances += [abs(d) / r.fs * 1000 for d in differences]
    hits = len(distances)
    f1 = 2 * hits / max(1, hits + false + beats)
    return Score(beats, false, beats - hits, float(np.median(distances or [0])), f1)


def ours(ecg, fs):
    peaks, count = csrc.segment_beats(torch.from_numpy(np.ascontiguousarray(ecg, np.float32))[None], fs)
    return peaks[0, :count[0]].numpy()


def peers():
    """{name: detect} of those that are installed; the others are named."""
    from wfdb.processing import xqrs_detect
    second = lambda ecg: ecg[min(1, len(ecg) - 1)].astype(float)
    found = {"wfdb XQRS, lead II": lambda ecg, fs: xqrs_detect(second(ecg), fs, verbose=False)}
    try:
        import sleepecg
        found["SleepECG, lead II"] = lambda ecg, fs: sleepecg.detect_heartbeats(second(ecg), fs)
    except ImportError:
        print("SleepECG is not installed: pip install 'sleepecg==0.6.*'")
    try:
        import neurokit2
        clean, peaks = neurokit2.ecg_clean, neurokit2.ecg_peaks
        found["NeuroKit2, lead II"] = lambda ecg, fs: peaks(clean(second(ecg), fs), fs)[1]["ECG_R_Peaks"]
    except ImportError:
        print("NeuroKit2 is not installed: pip install neurokit2")
    return found


# ---- tables ---------------------------------------------------------------------------------------------------------

def print_table(head, rows):
    print("\n| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |", flush=True)


def accuracy(folder, others):
    rows, described = [], lambda s: (s.beats, s.false, s.missed, f"{s.f1:.4f}", f"{s.timing:.0f} ms")
    if (folder / "ludb").is_dir():
        records = ludb(folder / "ludb")
        for name, detect in {"segment_beats": ours, **others}.items():
            rows.append(("LUDB, within 150 ms", name, *described(score(records, detect))))
    if (folder / "mitdb").is_dir():
        for leads, name in (((0,), "MLII"), ((1,), "V5"), ((0, 1), "both leads")):
            result = score(mitdb(folder / "mitdb", leads), ours, 0.075)
            rows.append(("MIT-BIH 100, within 75 ms", f"segment_beats, {name}", *described(result)))
        if "SleepECG, lead II" in others:
            result = score(mitdb(folder / "mitdb", (0,)), others["SleepECG, lead II"], 0.075)
            rows.append(("MIT-BIH 100, within 75 ms", "SleepECG, MLII", *described(result)))
    for rate in (100, 250, 360, 500, 1000):
        result = score(simulated(rate), ours)
        rows.append((f"simulated, every noise at its strongest, {rate} Hz", "segment_beats", *described(result)))
    print_table(("recordings", "detector", "beats", "false", "missed", "F1", "timing"), rows)


def hard(others):
    """The hard cases: beats, and of each detector the false and the missed. A peak in the noise of a part is not
    counted for anybody."""
    detectors, rows = {"segment_beats": ours, **{name: quiet(detect) for name, detect in others.items()}}, []
    for name, records in hard_cases().items():
        results = [score(records, detect, .1) for detect in detectors.values()]
        rows.append((name, len(records), results[0].beats, *(f"{r.false} / {r.missed}" for r in results)))
    print_table(("hard cases: false / missed", "records", "beats", *detectors), rows)


def quiet(detect):
    """detect, and no peak where it fails, as some do where there is no beat."""
    def peaks(ecg, fs):
        try:
            return detect(ecg, fs)
        except Exception:
            return []
    return peaks


def seconds(calls, rounds=15):
    """Median seconds of each call, taken in turns: a busy moment of the machine meets all of them. Each is called once before it is timed:
    its turn begins with the caches as it leaves them, not as another left them."""
    times = [[] for _ in calls]
    for _ in range(rounds):
        for call, spent in zip(calls, times):
            call()
            start = time.perf_counter()
            call()
            spent.append(time.perf_counter() - start)
    return np.median(times, axis=1)


def speed(records, others):
    """Records (10 s, 500 Hz, twelve leads) a second on one thread, and on two."""
    ecg = torch.from_numpy(np.stack([r.ecg for r in records]))
    some = ecg[:16].numpy()
    reference = others.get("SleepECG, lead II")
    calls = [lambda: [reference(x, 500) for x in some]] if reference else []
    rows, torch_threads = [], torch.get_num_threads()
    for batch in (16, 64, 1024):
        for kind, x in (("float32", ecg), ("int16", (1000 * ecg).round().short())):
            x = x.repeat(-(-batch // len(x)), 1, 1)[:batch].contiguous()
            once = x.view(torch.int32).view(-1)
            inner = range(max(1, 256 // batch))
            torch.set_num_threads(1)
            run, read = lambda: [csrc.segment_beats(x, 500) for _ in inner], lambda: [once.sum(dtype=torch.int32) for _ in inner]
            one, floor, *peer = seconds([run, read, *calls])
            torch.set_num_threads(2)
            [two] = seconds([run])
            torch.set_num_threads(1)
            one, two, floor = (t / batch / len(inner) * 1e6 for t in (one, two, floor))
            ratio = f"{peer[0] / len(some) * 1e6 / one:.1f}" if peer else "-"
            rows.append((f"{batch} x {kind}", f"{one:.1f}", f"{1e6 / one:,.0f}", ratio, f"{one / two:.2f}", f"{floor:.1f}",
                         f"{one / floor:.1f}"))
    print_table(("batch", "µs a record", "records/s", "times SleepECG", "two threads", "µs to read it", "times that"), rows)
    rows = []
    for name, f in others.items():
        part = some[:1 if "SleepECG" not in name else 16]
        [t] = seconds([lambda: [f(x, 500) for x in part]], 5)
        rows.append((name, f"{t / len(part) * 1e6:,.0f}", f"{len(part) / t:,.0f}"))
    print_table(("peers, one lead", "µs a record", "records/s"), rows)
    torch.set_num_threads(torch_threads)


def gpu_seconds(calls, rounds=7, repeats=5):
    """seconds() on the GPU, whose clock counts: each call `repeats` times in a row."""
    def once(call):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / repeats * 1e-3
    for call in calls:
        once(call)
    return np.median([[once(call) for call in calls] for _ in range(rounds)], axis=0)


def gpu_speed(records):
    """The same on the GPU, and the share of the rate at which it reads memory: a sum over the same bytes."""
    rows, ecg = [], torch.from_numpy(np.stack([r.ecg for r in records])).cuda()
    for batch in (64, 512, 4096):
        for kind, x in (("float32", ecg), ("int16", (1000 * ecg).round().short())):
            x = x.repeat(-(-batch // len(x)), 1, 1)[:batch].contiguous()
            once = x.view(torch.int32).view(-1)
            t, floor = gpu_seconds([lambda: csrc.segment_beats(x, 500), lambda: once.sum(dtype=torch.int32)], repeats=10)
            rates = (x.nbytes / spent * 1e-9 for spent in (t, floor))
            rows.append((f"{batch} x {kind}", f"{t * 1e3:.3f}", f"{batch / t:,.0f}", *(f"{r:,.0f}" for r in rates),
                         f"{100 * floor / t:.0f} %"))
    print_table((torch.cuda.get_device_name(), "ms", "records/s", "GB/s", "GB/s, sum of the same", "share of it"), rows)


def main():
    folder = Path(next((x for x in sys.argv[1:] if x != "--gpu"), ROOT.parent / "shared" / "data"))
    print(f"{platform.processor() or platform.machine()}, PyTorch {torch.__version__}, csrc {csrc.build_info()['implementation']}")
    records = ludb(folder / "ludb") if (folder / "ludb").is_dir() else simulated(500, 1)[:100]
    if "--gpu" not in sys.argv:
        others = peers()
        accuracy(folder, others)
        hard(others)
        speed(records, others)
    if torch.cuda.is_available():
        gpu_speed(records)


if __name__ == "__main__":
    main()
