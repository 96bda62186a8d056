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
    parts = [data._block(np.random.default_rng((seed, b)), rate, 10, strongest_noise=True) for b in range(blocks)]
    return [Recording(ecg, rate, np.array(peaks), (0, 10 * rate - 1)) for part in parts for ecg, peaks in zip(*part[:2])]


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
        beats, false = beats + len(r.truth), false + sum(r.span[0] <= peak <= r.span[1] for peak in others)
        distances += [abs(d) / r.fs * 1000 for d in differences]
    hits = len(distances)
    return Score(beats, false, beats - hits, float(np.median(distances)), 2 * hits / max(1, hits + false + beats))


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
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT.parent / "shared" / "data"
    print(f"{platform.processor() or platform.machine()}, PyTorch {torch.__version__}, csrc {csrc.build_info()['implementation']}")
    others = peers()
    accuracy(folder, others)
    records = ludb(folder / "ludb") if (folder / "ludb").is_dir() else simulated(500, 1)[:100]
    speed(records, others)
    if torch.cuda.is_available():
        gpu_speed(records)


if __name__ == "__main__":
    main()
