"""Records -> store -> batches: reading, data-set adapters, label sets, report text, the simulator.

Every data set becomes the same thing once, a store (class Store): a folder with
    ecg.i16      records x 12 leads x samples, int16 microvolts, little endian, memory-mapped
    records.csv  id, patient, split, fold, statements, report, codes, source, leads, features, peaks
    store.json   format version, rate, settings, what was dropped and why, sizes and checksums
In the program signals are float32 millivolts with leads in the order of LEADS, rates in Hz, positions in samples.
"""
import argparse
import ast
import contextlib
import csv
import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import sys
import threading
import zlib
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from functools import lru_cache, partial
from itertools import islice
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.signal import resample_poly
from tqdm import tqdm

LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
LEAD_INDEX = {lead.upper(): i for i, lead in enumerate(LEADS)} | {"DI": 0, "DII": 1, "DIII": 2}
SECONDS = 10       # length of every record in a store; shorter ones are zero-padded at the end
MAX_GAP = 0.04     # s, longest gap that is interpolated: half a normal QRS, so that no beat is lost or made up
MIN_SECONDS = 4.0  # s of valid signal that a lead needs: three beats even at 45 a minute
CROPS = {"first": (SECONDS, False), "center": (SECONDS, True),  # what is kept of a record: seconds, and whether mid-way
         "cpsc-merl": (5, False)}  # MERL's rule for CPSC2018: the first 2,500 samples at 500 Hz, then zeros
MILLIVOLTS = {"mv": 1.0, "uv": 1e-3, "\u00b5v": 1e-3, "v": 1e3, "nv": 1e-6}  # unit in the header -> mV


class DataError(ValueError):
    """One sentence for the user: which file or record, what is wrong, what to do. reason: the fault without names."""

    def __init__(self, message, reason=None):
        super().__init__(message)
        self.reason = reason or message


# ---- reading --------------------------------------------------------------------------------------------------------

class Record(NamedTuple):
    signal: np.ndarray  # (leads, N) float32 mV in the file's own lead order, NaN where the file marks a sample invalid
    names: list         # of the leads, as written in the file
    fs: float           # Hz
    checksum_ok: bool   # False: the samples do not add up to the header's checksum (only looked at in plain format 16)


RECORD_LINE = re.compile(r"[^\s/]+\s+(?P<leads>\d+)\s+(?P<fs>\d+\.?\d*)\s+(?P<samples>\d+)(\s|$)")
SIGNAL_LINE = re.compile(
    r"(?P<file>\S+)\s+16(\+(?P<offset>\d+))?\s+(?P<gain>-?\d+\.?\d*(e[-+]?\d+)?)(\((?P<baseline>-?\d+)\))?"
    r"(/(?P<unit>\S+))?\s+\d+\s+(?P<zero>-?\d+)\s+-?\d+\s+(?P<checksum>-?\d+)\s+\d+\s+(?P<name>\S.*)")


def read_record(path, fast=True):
    """The WFDB record at path (without extension), in any format wfdb reads. DataError says what is wrong with it.

    fast: plain format 16 (PTB-XL, MIMIC-IV-ECG, LUDB, the Challenges' .mat) is read by numpy instead of wfdb.
    """
    try:
        with open(f"{path}.hea", encoding="latin-1") as file:
            head, *lines = [line.strip() for line in file if line.strip() and not line.startswith("#")] or [""]
        record, leads = RECORD_LINE.match(head), [SIGNAL_LINE.match(line) for line in lines]
        if record and (not lines or len(lines) != int(record["leads"])):
            raise DataError(f"{path}.hea: announces {record['leads']} leads, has {len(lines)}", "wrong lead count")
        if any(re.match(r"\S+\s+\S+\s+-?0+\.?0*([(/\s]|$)", line) for line in lines):
            raise DataError(f"{path}.hea: a lead has gain zero, so its samples have no unit", "zero gain")
        plain = fast and record and all(leads) and len({(lead["file"], lead["offset"]) for lead in leads}) == 1
        signal, units, record = read_format16(path, record, leads) if plain else read_wfdb(path)
    except (FileNotFoundError, PermissionError) as error:
        fault = "file is missing" if isinstance(error, FileNotFoundError) else "file may not be read"
        raise DataError(f"{error.filename}: {fault}", fault) from error
    unknown = [str(unit) for unit in units if str(unit).lower() not in MILLIVOLTS]
    if unknown or record.fs <= 0:
        fault = f"unit {unknown[0]!r} is no voltage" if unknown else "sampling rate is zero"
        raise DataError(f"{path}.hea: {fault}", fault)
    signal = signal * [MILLIVOLTS[unit.lower()] for unit in units]
    return record._replace(signal=np.ascontiguousarray(signal.T, np.float32))


def read_format16(path, record, leads):
    """One file of interleaved int16 samples, -32768 where invalid -> signal (N, leads), units, Record without it."""
    name, shape = os.path.join(os.path.dirname(path), leads[0]["file"]), (int(record["samples"]), len(leads))
    raw = np.fromfile(name, "<i2", offset=int(leads[0]["offset"] or 0))
    if raw.size != shape[0] * shape[1]:
        fault = "signal file is " + ("truncated" if raw.size < shape[0] * shape[1] else "longer than its header says")
        raise DataError(f"{name}: {fault} ({raw.size} samples, header: {shape[0]} x {shape[1]} leads)", fault)
    raw = raw.reshape(shape)
    signal = raw - np.array([float(lead["baseline"] or lead["zero"]) for lead in leads])
    signal /= [float(lead["gain"]) for lead in leads]
    signal[raw == -32768] = np.nan
    excess = raw.sum(0, dtype=np.int64) - [int(lead["checksum"]) for lead in leads]
    record = Record(None, [lead["name"] for lead in leads], float(record["fs"]), not (excess % 65536).any())
    return signal, [lead["unit"] or "mV" for lead in leads], record


def read_wfdb(path):
    """Any other format -> the same as read_format16."""
    import wfdb  # takes a second, and most data sets do not need it
    try:
        record = wfdb.rdrecord(path)
    except OSError:
        raise
    except Exception as error:  # wfdb fails in many ways on damaged files; each of them is a fault of this record only
        fault = "not readable by wfdb"
        raise DataError(f"{path}: {fault} ({type(error).__name__}: {error})", fault) from error
    return record.p_signal, record.units, Record(None, record.sig_name, float(record.fs), True)


def to_twelve(record):
    """Leads by name, whatever case and order -> signal (12, N), zeros where missing, and present (12,) bool.

    Other leads are left out. Missing limb leads are not derived from the others: what is stored was recorded.
    """
    index = [LEAD_INDEX.get(str(name).strip().upper().removeprefix("MDC_ECG_LEAD_")) for name in record.names]
    known = [i for i in index if i is not None]
    if not known or len(set(known)) < len(known):
        fault = "a lead occurs twice" if known else "none of the twelve leads"
        raise DataError(f"{fault}: {', '.join(map(str, record.names))}", fault)
    signal, present = np.zeros((12, record.signal.shape[1]), np.float32), np.zeros(12, bool)
    signal[known], present[known] = record.signal[[i is not None for i in index]], True
    return signal, present


def repair(signal, present, fs):
    """Interpolate gaps (NaN, Inf) up to MAX_GAP, zero longer ones: signal (12, N) -> signal, usable (12,) bool, zeroed.

    A lead that is flat or has less than MIN_SECONDS of valid signal becomes zeros and not usable, like a missing one.
    A record in which more than half of the leads have that little, or all are flat, is refused.
    """
    bad, time = ~np.isfinite(signal), np.arange(signal.shape[1])
    signal, long = np.where(bad, 0, signal), np.zeros_like(bad)
    for lead in np.flatnonzero(bad.any(1)):
        if not bad[lead].all():
            signal[lead] = np.interp(time, time[~bad[lead]], signal[lead, ~bad[lead]])
        edges = np.flatnonzero(np.diff(bad[lead], prepend=False, append=False))
        for start, stop in zip(edges[::2], edges[1::2]):
            long[lead, start:stop] = stop - start > MAX_GAP * fs
    enough = present & ((~long).sum(1) >= MIN_SECONDS * fs)
    if 2 * enough.sum() < present.sum():
        fault = "too little valid signal"
        raise DataError(f"{fault}: less than {MIN_SECONDS:g} s in more than half of the leads", fault)
    usable = enough & (np.ptp(signal, axis=1) > 0)
    if not usable.any():
        raise DataError("every lead is flat")
    signal[long | ~usable[:, None]] = 0
    return signal, usable, int(long[usable].sum())


def microvolts(signal, samples):
    """mV (12, N) -> microvolts (12, samples) int16, cut or zero-padded at the end; number of clipped samples."""
    signal = np.rint(signal[:, :samples] * 1000)
    ecg = np.zeros((12, samples), "<i2")
    ecg[:, :signal.shape[1]] = np.clip(signal, -32767, 32767)
    return ecg, int((abs(signal) > 32767).sum())


def load_record(path, rate, crop="first"):
    """A record as a store keeps it: microvolts (12, SECONDS * rate) int16, usable (12,) bool, notes {text: amount}."""
    record = read_record(path)
    seconds, middle = CROPS[crop]
    length = round(seconds * record.fs)
    start = max(0, (record.signal.shape[1] - length) // 2) if middle else 0
    try:
        signal, present = to_twelve(record)
        signal, usable, zeroed = repair(signal[:, start:start + length], present, record.fs)
    except DataError as error:
        raise DataError(f"{path}: {error}", error.reason) from error
    ratio = (rate / Fraction(str(record.fs))).limit_denominator(10000)  # exact for all but freakish rates
    if ratio != 1:  # padtype: with zeros assumed outside, a baseline offset would ring at both ends
        signal = resample_poly(signal, ratio.numerator, ratio.denominator, axis=1, padtype="line")
    ecg, clipped = microvolts(signal, SECONDS * rate)
    notes = {"samples of long gaps zeroed": zeroed, "samples clipped at 32.767 mV": clipped,
             "leads missing": int((~present).sum()), "leads flat or mostly invalid": int((present & ~usable).sum()),
             "checksum in the header is wrong": int(not record.checksum_ok)}
    return ecg, usable, {text: amount for text, amount in notes.items() if amount}


# ---- the store ------------------------------------------------------------------------------------------------------

FORMAT = ["ecg-language store", 1]  # name and version
CHUNK = 256  # records of a task: what is written at once, and what the simulator draws at once
COLUMNS = ("id", "patient", "split", "fold", "statements", "report", "codes", "source", "leads", "features", "peaks")
JSON_COLUMNS = ("statements", "codes", "features", "peaks")
AGAIN = "delete it and prepare the data set again"
UNFINISHED = "preparing it did not finish; run the same prepare command again"


class Store:
    """A prepared data set, read-only. records: DataFrame, JSON_COLUMNS parsed, fold 0 where the source has no folds;
    leads: a character each, 0 where the stored lead is zeros because it was missing, flat or mostly invalid."""

    def __init__(self, path, verify=False):
        self.path, self.meta = str(path), read_state(str(path))
        if not self.meta["complete"]:
            raise DataError(f"{path}: {UNFINISHED}")
        self.rate, self.samples = self.meta["rate"], self.meta["samples"]
        for name, (size, crc) in self.meta["files"].items():
            file = os.path.join(self.path, name)
            found = os.path.getsize(file) if os.path.exists(file) else 0
            if found != size or (verify or name == "records.csv") and crc_of(file) != crc:
                raise DataError(f"{file}: damaged ({found} of {size} bytes, or other content); {AGAIN}")
        self.records = pd.read_csv(os.path.join(self.path, "records.csv"), dtype=str, keep_default_na=False)
        if self.meta["files"]["ecg.i16"][0] != len(self) * 24 * self.samples:
            raise DataError(f"{path}: ecg.i16 and records.csv differ in the number of records; {AGAIN}")
        for column in JSON_COLUMNS:
            self.records[column] = [json.loads(text) for text in self.records[column]]
        self.records["fold"] = self.records["fold"].replace("", "0").astype(int)

    def __len__(self):
        return len(self.records)

    def ecg(self, indices):
        """float32 mV (B, 12, samples). Mapped anew each time: cheap, and a Store stays small when sent to a process."""
        shape = len(self), 12, self.samples
        signals = np.memmap(os.path.join(self.path, "ecg.i16"), "<i2", "r", shape=shape)
        return signals[indices].astype(np.float32) / 1000


def read_state(folder):
    """store.json of a store, or of one in the making."""
    try:
        with open(os.path.join(folder, "store.json"), encoding="utf-8") as file:
            state = json.load(file)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: " + (UNFINISHED if os.path.isdir(folder + ".partial") else
                        f"no store ({error}); make one with python data.py prepare SOURCE SRC DST")) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise DataError(f"{folder}/store.json: not of a store of version {FORMAT[1]}; {AGAIN}")
    return state


def write_state(folder, state):
    """Replace store.json in one step: after a crash it is the old one or the new one."""
    name = os.path.join(folder, "store.json")
    with open(name + ".tmp", "w", encoding="utf-8") as file:
        json.dump(state, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(name + ".tmp", name)


def crc_of(name):
    return zlib.crc32(np.memmap(name, "u1", "r")) if os.path.getsize(name) else 0


def open_data(spec, rate=100, cache=None, **options):
    """Store of "ptbxl:DIR", "mimic:DIR", "csv:FILE", "simulated", "simulated:N", "store:DIR"; options as of prepare().

    All but a store are prepared on first use into `cache`, or $ECG_CACHE, or ~/.cache/ecg-language.
    """
    source, _, src = spec.partition(":")
    if source == "store":
        store = Store(src)
        if store.rate != rate:
            raise DataError(f"{src}: holds records at {store.rate} Hz, not {rate}; prepare another or ask for its rate")
        return store
    key = json.dumps(settings_of(source, os.path.expanduser(src), rate, **options))
    cache = cache or os.environ.get("ECG_CACHE") or os.path.expanduser("~/.cache/ecg-language")
    dst = os.path.join(cache, f"{source}-{rate}hz-{hashlib.sha256(key.encode()).hexdigest()[:10]}")
    if not os.path.exists(dst):
        print(f"preparing {spec} at {rate} Hz, this once, into {dst}", file=sys.stderr)
    return prepare(source, os.path.expanduser(src), dst, rate, **options)


def settings_of(source, src, rate, crop="first", min_words=0, seed=0):
    """All that shapes a store beside the data themselves: what translates its reports, or what simulates, included."""
    if source == "simulated":
        src = str(src or SIMULATED)
    if source not in SOURCES or crop not in CROPS or rate < 1 or source == "simulated" and not src.isdigit():
        raise DataError(f"no such data: {source}:{src}, crop {crop}, {rate} Hz; sources are {', '.join(SOURCES)} "
                        f"(and a number of records), crops {', '.join(CROPS)}, rates 1 Hz and more")
    words = {"simulated": SIMULATOR, "ptbxl": zlib.crc32(json.dumps(knowledge()["lexicon"]).encode())}.get(source)
    return dict(source=source, src=src if source == "simulated" else os.path.abspath(src), rate=rate, crop=crop,
                min_words=min_words, seed=seed, words=words)


def prepare(source, src, dst, rate=100, workers=None, **options):
    """Make the store dst, or go on where a killed run stopped, or check the one that is there -> Store.

    source: a key of SOURCES; options: crop, a key of CROPS; min_words of a MIMIC report (MERL: 4); seed of the simulator.
    A second process that prepares dst waits for the first.
    """
    dst, settings = os.path.abspath(dst), settings_of(source, src, rate, **options)
    plan, total, readable = survey(settings)
    workers = workers or min(os.cpu_count(), 1 + readable // 4000)  # starting one costs some thousand records
    if not os.path.exists(dst):
        os.makedirs(os.path.dirname(dst), exist_ok=True)
        with open(dst + ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # held until the file is closed, whatever happens to this process
            if not os.path.exists(dst):
                build(settings, plan, total, dst, workers)
                os.unlink(lock.name)  # whoever waits for it, or comes later, finds dst
    store = Store(dst)
    if store.meta["plan"] != plan:
        raise DataError(f"{dst}: made with other settings or from other records; {AGAIN}")
    return store


def survey(settings):
    """A cheap pass over the source: a checksum of what is prepared and how, the number of rows, and of usable ones."""
    digest, total, readable = hashlib.sha256(json.dumps(settings).encode()), 0, 0
    for row in SOURCES[settings["source"]](settings):
        digest.update(json.dumps([row["id"], row.get("path"), row.get("skip")]).encode())
        total, readable = total + 1, readable + ("skip" not in row)
    return digest.hexdigest(), total, readable


def build(settings, plan, total, dst, workers):
    """Write dst.partial task by task, then rename it to dst.

    The data of a task is on disk before store.json gives its length: a run killed at any moment is continued by
    cutting the files to the lengths in store.json.
    """
    folder = dst + ".partial"
    os.makedirs(folder, exist_ok=True)
    state = dict(format=FORMAT, complete=False, plan=plan, rate=settings["rate"], samples=SECONDS * settings["rate"],
                 leads=LEADS, settings=settings, rows=0, dropped={}, warnings={},
                 files={"ecg.i16": [0, 0], "records.csv": [0, 0]})  # bytes, crc32
    if os.path.exists(os.path.join(folder, "store.json")):
        state = read_state(folder)
        if state["plan"] != plan:
            raise DataError(f"{folder}: left by a run with other settings or records; {AGAIN}")
    rows = islice(SOURCES[settings["source"]](settings), state["rows"], None)
    tasks = iter(lambda: list(islice(rows, CHUNK)), [])
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(os.path.join(folder, name), "ab")) for name in state["files"]}
        for name, (size, crc) in state["files"].items():
            files[name].truncate(size)
            if crc_of(files[name].name) != crc:
                raise DataError(f"{files[name].name}: damaged; delete {folder} and prepare the data set again")
        if not state["rows"]:
            append(files, state, {"records.csv": (",".join(COLUMNS) + "\n").encode()})
        bar = stack.enter_context(tqdm(total=total, initial=state["rows"], desc="preparing", unit=" records"))
        for count, blocks, notes in in_order(partial(work, settings), tasks, workers):
            append(files, state, blocks)
            for kind, text, amount, example in notes:
                entry = state[kind].setdefault(text, dict(records=0, amount=0, examples=[]))
                entry["records"] += 1
                entry["amount"] += amount
                entry["examples"] = (entry["examples"] + [example])[:20]
            state["rows"] += count
            write_state(folder, state)
            bar.update(count)
    if not state["files"]["ecg.i16"][0]:
        shutil.rmtree(folder)
        raise DataError(f"{settings['src']}: no usable record; {'; '.join(state['dropped']) or 'the list is empty'}")
    write_state(folder, state | dict(complete=True))
    os.rename(folder, dst)


def append(files, state, blocks):
    """Write blocks {file name: bytes} through to the disk and keep account of them."""
    for name, block in blocks.items():
        files[name].write(block)
        files[name].flush()
        os.fsync(files[name].fileno())
        size, crc = state["files"][name]
        state["files"][name] = [size + len(block), zlib.crc32(block, crc)]


def in_order(function, items, workers):
    """function(item) for every item, in order, in processes; at most 2 * workers results wait, so memory stays flat."""
    if workers == 1:
        yield from map(function, items)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=die_with_parent) as pool:
        waiting = deque(pool.submit(function, item) for item in islice(items, 2 * workers))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(function, item) for item in islice(items, 1))


def die_with_parent():
    """A worker whose parent is killed would wait for work for ever: leave with it."""
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def work(settings, rows):
    """A task: rows of a source -> their number, {file name: bytes}, notes (dropped or warnings, text, amount, id)."""
    table, signals, notes = io.StringIO(), [], []
    writer = csv.DictWriter(table, COLUMNS, quoting=csv.QUOTE_ALL, lineterminator="\n")
    for row in rows:
        try:
            if "skip" in row:
                raise DataError(f"{row['id']}: {row['skip']}", row["skip"])
            ecg, usable, warnings = (load_simulated(settings, row) if settings["source"] == "simulated" else
                                     load_record(row["path"], settings["rate"], settings["crop"]))
        except DataError as error:
            notes.append(("dropped", error.reason, 1, str(error)))
            continue
        if "statements" not in row:
            row["statements"] = translate(row["report"])
        row = dict(features=[], peaks=[], leads="".join("01"[int(u)] for u in usable)) | row
        writer.writerow({c: json.dumps(row[c], ensure_ascii=False) if c in JSON_COLUMNS else row[c] for c in COLUMNS})
        signals.append(ecg.tobytes())
        notes += [("warnings", text, amount, row["id"]) for text, amount in warnings.items()]
    return len(rows), {"ecg.i16": b"".join(signals), "records.csv": table.getvalue().encode()}, notes


# ---- data sets ------------------------------------------------------------------------------------------------------
# One generator each that reads no signal. It yields rows (id, path, patient, split, fold, report, codes, source and, if
# they need no translation, statements); a row that cannot be used has `skip`, the reason, and counts as dropped.

def read_csv(name, columns):
    """Rows of a csv as dictionaries of strings, one at a time (MIMIC has 800,035); columns: those it must have."""
    try:
        with open(name, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restval="")
            if missing := [column for column in columns if column not in (reader.fieldnames or [])]:
                raise DataError(f"{name}: has no column {missing[0]!r}")
            yield from reader
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{name}: not readable ({error}); is the data set there, in its published layout?") from error


def split_by(key, train, val):
    """train, val or test by a hash of the patient: the same everywhere, and no patient in two of them."""
    share = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") / 2**32
    return "train" if share < train else "val" if share < train + val else "test"


def ptbxl_rows(settings):
    """PTB-XL: folds 1-8 train, 9 val, 10 test. Up to 100 Hz its 100 Hz files, or those of 500 Hz if they are absent."""
    src, found = settings["src"], False
    check_classes(os.path.join(src, "scp_statements.csv"))
    sizes = ("filename_lr", "filename_hr") if settings["rate"] <= 100 else ("filename_hr",)
    columns = ("ecg_id", "patient_id", "report", "scp_codes", "strat_fold", *sizes)
    for line in read_csv(os.path.join(src, "ptbxl_database.csv"), columns):
        row = dict(id=line["ecg_id"], report=line["report"], source="ptbxl")
        try:
            row |= dict(fold=int(line["strat_fold"]), patient=str(int(float(line["patient_id"]))),
                        codes=dict(ast.literal_eval(line["scp_codes"])))
        except (ValueError, TypeError, SyntaxError):
            yield row | dict(skip="damaged row of ptbxl_database.csv")
            continue
        row["split"] = "train" if row["fold"] <= 8 else "val" if row["fold"] == 9 else "test"
        paths = (os.path.join(src, line[size]) for size in sizes)
        path = next((path for path in paths if os.path.exists(path + ".hea")), None)
        found = found or path
        yield row | (dict(path=path) if path else dict(skip="waveform is not in this copy of PTB-XL"))
    if not found:
        raise DataError(f"{src}: holds none of the waveforms; download records{100 if len(sizes) > 1 else 500} "
                        "from https://physionet.org/content/ptb-xl/ into it")


def mimic_rows(settings):
    """MIMIC-IV-ECG 1.0: report_0..17 are the statements; patients 98 % train (as MELP), 1 % val, 1 % test."""
    src = settings["src"]
    listed = read_csv(os.path.join(src, "record_list.csv"), ("study_id", "path"))
    paths = {line["study_id"]: line["path"] for line in listed}
    reports = [f"report_{i}" for i in range(18)]
    for line in read_csv(os.path.join(src, "machine_measurements.csv"), ("subject_id", "study_id", *reports)):
        study, patient = line["study_id"], line["subject_id"]
        texts = [text for name in reports if (text := line[name].strip())]
        statements = [text for text in map(clean, texts) if text]
        words = sum(len(text.split()) for text in statements)
        row = dict(id=study, patient=patient, split=split_by(patient, 0.98, 0.01), fold="", source="mimic", codes={},
                   report=". ".join(texts), statements=list(dict.fromkeys(text.rstrip(" .") for text in statements)))
        skip = ("report is empty" if not words else f"report of fewer than {settings['min_words']} words"
                if words < settings["min_words"] else None if study in paths else "study is not in record_list.csv")
        yield row | (dict(skip=skip) if skip else dict(path=os.path.join(src, paths[study])))


def own_rows(settings):
    """A csv of one's own: record (a WFDB record, relative to the csv), report, and optionally patient, split and labels
    (codes separated by ; or a JSON list or {code: likelihood}). Without split, patients go 80/10/10 % by hash."""
    src, seen = settings["src"], set()
    for line in read_csv(src, ("record", "report")):
        record, labels = line["record"].removesuffix(".hea"), line.get("labels", "").strip()
        patient = line.get("patient") or record
        split = line.get("split") or split_by(patient, 0.8, 0.1)
        if record in seen or split not in ("train", "val", "test"):
            fault = "occurs twice" if record in seen else f"has split {split!r}, not train, val or test"
            raise DataError(f"{src}: record {record} {fault}")
        seen.add(record)
        try:
            labels = json.loads(labels) if labels[:1] in ("[", "{") else list(map(str.strip, labels.split(";")))
        except ValueError as error:
            raise DataError(f"{src}: labels of record {record} are no JSON ({error})") from error
        codes = labels if isinstance(labels, dict) else {code: 100.0 for code in labels if code}
        yield dict(id=record, patient=patient, split=split, fold="", source="csv", codes=codes, report=line["report"],
                   statements=split_statements(line["report"]), path=os.path.join(os.path.dirname(src), record))


def simulated_rows(settings):
    for i in range(int(settings["src"])):
        name = f"{settings['seed']}-{i}"
        yield dict(id=name, patient=name, split=split_by(name, 0.8, 0.1), fold="", source="simulated", number=i)


def load_simulated(settings, row):
    """Like load_record, and fills the row."""
    block, i = divmod(row["number"], CHUNK)
    ecg, peaks, row["codes"], row["features"], row["statements"] = (
        part[i] for part in simulated_block(settings["seed"], block, settings["rate"]))
    row |= dict(peaks=[int(p) for p in peaks], report=". ".join(row["statements"]))
    ecg, clipped = microvolts(ecg, SECONDS * settings["rate"])
    return ecg, [True] * 12, {"samples clipped at 32.767 mV": clipped} if clipped else {}


SOURCES = {"ptbxl": ptbxl_rows, "mimic": mimic_rows, "csv": own_rows, "simulated": simulated_rows}


# ---- label sets: always by name, never by position ------------------------------------------------------------------

# label set -> column of scp_statements.csv with the class of a code, or with a flag for a code that is its own class
LABEL_SETS = {"ptbxl_super": "diagnostic_class", "ptbxl_sub": "diagnostic_subclass", "ptbxl_form": "form",
              "ptbxl_rhythm": "rhythm", "ptbxl_diag": "diagnostic", "ptbxl_all": None, "simulated": None}


@lru_cache
def knowledge():
    """prompts.json: findings by SCP code, and the label sets with their prompts."""
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "prompts.json"), encoding="utf-8") as file:
        return json.load(file)


def label_set(name):
    """{class: {"name", "prompts"}} of a label set."""
    if name not in LABEL_SETS:
        raise DataError(f"unknown label set {name!r}; known are {', '.join(LABEL_SETS)}")
    findings = knowledge()["findings"]
    classes = knowledge()["label_sets"].get(name, list(findings))  # simulated: any code
    return classes if isinstance(classes, dict) else {code: findings[code] for code in classes}


def class_in(name, code, finding):
    """Class of an SCP code in a label set, or None. finding: its row of scp_statements.csv or of prompts.json."""
    column = LABEL_SETS[name]
    if column in ("diagnostic_class", "diagnostic_subclass"):
        return finding[column] or None
    return code if column is None or finding[column] else None


def label_matrix(records, name):
    """Records (DataFrame with codes) and a label set -> class names (C), labels (R, C) bool, keep (R,) bool.

    Every listed code counts whatever its likelihood, as in the published counts. keep: rows with a label of the set.
    "simulated" has the classes that occur in the records.
    """
    classes = list(label_set(name))
    class_of = {code: class_in(name, code, finding) for code, finding in knowledge()["findings"].items()}
    listed = [{class_of.get(code) for code in codes} - {None} for codes in records["codes"]]
    names = sorted(set().union(*listed)) if name == "simulated" else classes
    labels = np.array([[c in row for c in names] for row in listed], bool).reshape(len(listed), len(names))
    return names, labels, labels.any(1)


def check_classes(name):
    """The classes in prompts.json must be those of the scp_statements.csv at hand."""
    columns = ("", "diagnostic", "form", "rhythm", "diagnostic_class", "diagnostic_subclass")
    published, ours = {line[""]: line for line in read_csv(name, columns)}, knowledge()["findings"]
    for code in sorted(published.keys() | ours.keys()):
        if code not in published or code not in ours or any(
                class_in(s, code, published[code]) != class_in(s, code, ours[code]) for s in LABEL_SETS):
            raise DataError(f"{name}: classes of {code} are not those in prompts.json; take the file of PTB-XL 1.0.1")


# ---- report text ----------------------------------------------------------------------------------------------------

LEAD = r"(?:av[rlf]|v[1-6]|i{1,3})\b"
LEAD_LIST = rf"\b{LEAD}(?:\s*[,/&+-]+\s*(?:{LEAD}|[1-6rlf]\b(?!\.\d))|\s+(?:(?:and|und|och|bis|to)\s+)?{LEAD})*"
TOKEN = re.compile(rf"{LEAD_LIST}|[^\W_]+")
# a dot behind one of these ends no sentence
ABBREVIATIONS = """amplitudkrit ant ca chron dd fragl indiff inf inkompl intraventr lat li linksant moegl mögl neg part
    pat path post re resp sign st st.n supraventr term unbest unvollst v.a vd ventr vollst z.n""".split()
SENTENCE_END = re.compile("".join(rf"(?<!\b{re.escape(a)})" for a in ABBREVIATIONS) + r"[.;!?]+(?=\s|$)(?!\s*grad)")
# a comma ends a statement, unless one word follows it or what follows only goes on
GOES_ON = "a|an|and|or|but|this|these|which|with|in|at|age|old|due|may|cannot|likely|plus|non|regular|flat"
COMMA = re.compile(rf",\s+(?=\S+ \S)(?!{LEAD}|\d|(?:{GOES_ON})\b|probab|possib|consi|sugg)")


def clean(text):
    """A report in the form MERL published: ECG for EKG, no *** and =, lower case, one line."""
    return " ".join(re.sub(r"\*\*\*|=", "", text.lower()).replace("ekg", "ecg").split())


def split_statements(text):
    """Statements of a report: its lines and sentences, and parts between commas that stand on their own."""
    sentences = SENTENCE_END.split(clean(text.replace("\n", " . ")))
    parts = [part.strip(" ,.;") for sentence in sentences for part in COMMA.split(sentence)]
    return [part for part in parts if part]


def lead_names(text):
    """Leads by their names in standard order: 'v4-6' -> 'v4, v5, v6'; 'iii,f' -> 'iii, avf'."""
    found, last, names = set(), None, [name.lower() for name in LEADS]
    for gap, name in re.findall(r"(\W*(?:\b(?:and|und|och|bis|to)\b\s*)?)(av[rlf]|v[1-6]|i{1,3}|[1-6rlf])", text):
        lead = names.index("v" + name if name.isdigit() else "av" + name if name in "rlf" else name)
        is_range = last is not None and re.search("-|bis|to", gap) and names.index("v1") <= last < lead
        found |= set(range(last, lead + 1)) if is_range else {lead}
        last = lead
    return ", ".join(names[k] for k in sorted(found))


def attach(templates, statement):
    """'possible ~' or '~ in v1' put around a statement, the last one innermost."""
    for template in reversed(templates):
        if template.endswith("~") and statement.startswith(template[:-1]):
            continue  # twice possible is possible
        if template.startswith("~ in ") and " in " in statement:
            template = template.replace("~ in ", "~, ")  # one more place: 'in v1, v2, high lateral leads'
        statement = template.replace("~", statement)
    return statement


class Translator:
    """German, Swedish and English reports -> English statements, by the phrases in prompts.json ("lexicon").

    Longest phrase first, left to right; a prefix waits for the next statement, a suffix changes the last one.
    """

    def __init__(self, lexicon, synonyms=()):
        """lexicon: "lexicon" in prompts.json; synonyms: (wording, English) of statements it need not repeat."""
        self.rewrite = [(re.compile(old), new) for old, new in lexicon["rewrite"]]
        self.table = {}  # words of a phrase -> (kind, English texts)
        for kind in ("drop", "join", "suffix", "prefix", "statements"):  # a later kind wins
            for phrase, english in lexicon[kind].items():
                for site, name in lexicon["sites"].items() if "<site>" in phrase else [("", "")]:
                    [words] = self.sentences(phrase.replace("<site>", site).replace("<leads>", "v1"))
                    self.table[self.key(words)] = kind, english.replace("<site>", name).split("; ")
        own = [(text, text) for kind, texts in self.table.values() if kind == "statements" for text in texts]
        for wording, text in (*own, *synonyms):  # our own English stays as it is
            words = sum(self.sentences(wording.replace("<leads>", "v1")), [])
            self.table.setdefault(self.key(words), ("statements", [text]))
        self.longest = max(map(len, self.table))

    def sentences(self, text):
        """List of words of every sentence, rewritten; a list of leads is one word, 'v1, v2'."""
        text = clean(text)
        for pattern, new in self.rewrite:
            text = pattern.sub(new, text)
        words = [TOKEN.findall(sentence) for sentence in SENTENCE_END.split(text)]
        return [[lead_names(w) if re.match(LEAD, w) else w for w in sentence] for sentence in words if sentence]

    def key(self, words):
        return tuple("<leads>" if re.match(LEAD, word) else word for word in words)

    def phrases(self, words):
        """(kind, English texts, words) of every phrase of a sentence; kind is 'unknown' for a word in none."""
        while words:
            keys = self.key(words[:self.longest])
            size = next((n for n in range(len(keys), 0, -1) if keys[:n] in self.table), 1)
            kind, texts = self.table.get(keys[:size], ("unknown", []))
            leads = words[keys.index("<leads>")] if "<leads>" in keys[:size] else ""
            yield kind, [text.replace("<leads>", leads) for text in texts], words[:size]
            words = words[size:]

    def read(self, report):
        """-> (English statements, words understood, words not understood)"""
        out, last, understood, unknown = [], 0, [], []  # out[last:] is what the last phrase said: a suffix changes it
        for sentence in self.sentences(report):
            waiting, used, placed = [], [], False  # prefixes to come and last used; may a place be that of out[last:]?
            for kind, texts, words in self.phrases(sentence):
                (unknown if kind == "unknown" else understood).extend(w for w in words if re.search("[a-z]", w))
                if kind == "statements":
                    last, used, waiting, placed = len(out), waiting, [], True
                    out += [attach(used, text) for text in texts]
                elif kind == "prefix":
                    waiting = waiting + texts
                elif kind == "join":  # "no ischemia or infarction": the prefix of the one is that of the other
                    waiting = waiting or used
                elif kind == "suffix" and (placed or not texts[0].startswith("~ in ")):
                    out[last:] = [attach(texts, text) for text in out[last:]]
                elif kind == "unknown":
                    placed = False
        return list(dict.fromkeys(out)), understood, unknown

    def __call__(self, report):
        """English statements of a report in its order, each once; none where it says nothing."""
        return self.read(report)[0]

    def coverage(self, reports):
        """(word occurrences understood, all of them, Counter of the others)"""
        read = [self.read(report)[1:] for report in reports]
        left = Counter(word for _, unknown in read for word in unknown)
        known = sum(len(understood) for understood, _ in read)
        return known, known + sum(left.values()), left


@lru_cache
def translator():
    findings = [*knowledge()["findings"].values(), *knowledge()["more_findings"].values()]
    return Translator(knowledge()["lexicon"], [(word, f["name"]) for f in findings for word in (f["name"], *f["also"])])


def translate(report):
    """English statements of a report in German, Swedish or English."""
    return translator()(report)


def report_tags(store, language="english"):
    """Statements of every record of a store, a list of strings each; language english or original (as written)."""
    if language not in ("english", "original"):
        raise DataError(f"unknown report language {language!r}: use english or original")
    return list(store.records["statements"] if language == "english" else map(split_statements, store.records["report"]))


class Findings:
    """The knowledge table in prompts.json: which waveform features the diagnoses of a report suggest.

    Findings are recognised by their name and other wordings, longest first; a statement that negates suggests nothing."""

    def __init__(self):
        table = knowledge()
        self.features = {tuple(wording.split()): finding["features"]
                         for finding in (*table["findings"].values(), *table["more_findings"].values())
                         for wording in (finding["name"], *finding["also"])}
        self.longest = max(map(len, self.features))
        self.known = {}  # statement -> features: there are far fewer statements than reports

    def candidates(self, statements):
        """Features that the statements of one report suggest, each once."""
        for statement in set(statements) - self.known.keys():
            self.known[statement] = self.read(statement)
        return list(dict.fromkeys(feature for statement in statements for feature in self.known[statement]))

    def read(self, statement):
        words, found = re.findall(r"[^\s,.;:()]+", statement.lower()), []
        if {"no", "not", "without"} & set(words) and "excluded" not in words:
            return []
        while words:
            size = next((n for n in range(min(self.longest, len(words)), 0, -1) if tuple(words[:n]) in self.features), 1)
            found += self.features.get(tuple(words[:size]), [])
            words = words[size:]
        return found


# ---- simulator ------------------------------------------------------------------------------------------------------
# Twelve-lead ECG simulator: a moving heart dipole seen through Dower's leads, with true labels and reports.
#
# Every wave is a Gaussian lobe with a direction in space (x to the left, y down, z to the back; mV): P (two atria), QRS (septum,
# apex, free wall, base, one extra for a block or delta wave), a flat ST lobe, T and U.  The dipole (3) is turned into I, II, V1-V6
# by Dower's matrix (Dower, Machado, Osborne, Clin Cardiol 1980; as printed by Edenbrandt & Pahlm, J Electrocardiol 1988), perturbed
# for every patient as electrodes shift; the other limb leads follow exactly from I and II (Einthoven, Goldberger).
# A disease changes lobes (an infarct turns early forces away from its wall, a block adds a late slow lobe, ...) or the clock that
# fires them.  Codes and features are read from the drawn parameters and from the noise-free beat, so they are what the record shows.
#
# Not simulated, because no trace tells them apart from another code: ANEUR, EL, NT_, TAB_, PRC(S).

SIMULATED = 4096  # records, if no number is given
SIMULATOR = 1     # version: raise it with every change of what is simulated
DOWER = np.array([[.632, -.235, .059], [.235, 1.066, -.132], [-.515, .157, -.917], [.044, .164, -1.387],
                  [.882, .098, -1.277], [1.213, .127, -.601], [1.125, .127, -.086], [.831, .076, .230]])  # I, II, V1..V6
LIMBS = np.zeros((12, 8))       # I, II, V1-V6 -> all twelve leads
LIMBS[[0, 1, 6, 7, 8, 9, 10, 11], range(8)] = 1
LIMBS[2:6, :2] = [[-1, 1], [-.5, -.5], [1, -.5], [-.5, 1]]
Q, R, L, S, E, J, T, U = range(8)                       # lobes of a ventricular beat: septum .. base, extra, ST, T, U
I, II, V1, V2, V3, V4, V5, V6 = range(8)                # independent leads
# walls of the left ventricle: direction towards it, and its chest leads V1..V6 (share of a local, non-dipolar part)
WALL = {"IMI": ((0, 1, .1), (0, 0, 0, 0, 0, 0)), "ILMI": ((.6, .8, 0), (0, 0, 0, 0, .5, .8)),
        "IPMI": ((0, .8, .7), (-.5, -.5, 0, 0, 0, 0)), "IPLMI": ((.6, .6, .6), (-.5, -.5, 0, 0, .5, .8)),
        "PMI": ((0, .1, 1), (-.7, -.8, -.4, 0, 0, 0)), "ASMI": ((.2, .1, -1), (.35, .9, 1, .7, .1, 0)),
        "AMI": ((.5, .1, -.9), (0, .6, 1, 1, .4, 0)), "ALMI": ((.95, -.1, -.3), (0, .1, .6, 1, 1, .8)),
        "LMI": ((1, -.35, .1), (0, 0, 0, 0, .7, 1))}
ZONE = {"AS": "ASMI", "AN": "AMI", "AL": "ALMI", "LA": "LMI", "IN": "IMI", "IL": "ILMI"}


@lru_cache(1)
def simulated_block(seed, block, rate):
    """CHUNK records -> ecg (CHUNK, 12, SECONDS * rate) mV, and lists of peaks, codes, features, statements."""
    return _block(np.random.default_rng((seed, block)), rate, SECONDS, 1.0)


def _block(rng, rate, seconds, noise):
    c = _diagnoses(rng)
    p = _patient(rng, c)
    _conduct(rng, c, p)
    _damage(rng, c, p)
    m = _measure(p)
    codes, features = _label(rng, c, p, m)
    clock = _rhythm(rng, c, p, seconds)
    ecg, peaks = _draw(rng, c, p, clock, rate, seconds)
    ecg += noise * _noise(rng, ecg.shape[2], rate)
    ecg = np.round(ecg * 200) / 200                                                   # 5 microvolt steps
    return (np.einsum("ij,njt->nit", LIMBS, ecg).astype(np.float32), peaks, codes, features, _reports(rng, codes, features))


def _diagnoses(rng):
    """What each patient has: code -> (CHUNK,) bool, before anything is measured."""
    n = CHUNK
    pick = lambda table: rng.choice(list(table), n, p=np.array(list(table.values())) / sum(table.values()))
    sick = rng.random(n) < .62
    c = {"sick": sick, "age": np.clip(rng.normal(np.where(sick, 64, 50), 15), 18, 92)}
    rhythm = np.where(sick, pick({"sinus": 48, "SBRAD": 4, "STACH": 7, "SARRH": 4, "AFIB": 12, "AFLT": 3, "SVTAC": 2.5, "PSVT": 2.5,
                                  "SVARR": 3, "PACE": 4, "3AVB": 2.3, "2AVB": 2.8}), pick({"sinus": 87, "SARRH": 9, "STACH": 4}))
    for k in ("SBRAD", "STACH", "SARRH", "AFIB", "AFLT", "SVTAC", "PSVT", "SVARR", "PACE", "3AVB", "2AVB"):
        c[k] = rhythm == k
    c["sinus"] = np.isin(rhythm, ("sinus", "SBRAD", "STACH", "SARRH"))
    free = sick & ~c["PACE"]
    conduction = pick({"none": 56, "CLBBB": 6, "CRBBB": 6, "ILBBB": 2.5, "IRBBB": 8, "IVCD": 5, "LAFB": 9, "LPFB": 3, "WPW": 3, "CRBBB LAFB": 2.5})
    for k in ("CLBBB", "CRBBB", "ILBBB", "IRBBB", "IVCD", "LAFB", "LPFB", "WPW"):
        c[k] = free & (np.char.find(conduction, k) >= 0)
    c["WPW"] &= c["sinus"]
    c["1AVB"] = sick & (c["sinus"] | c["SVARR"]) & ~c["WPW"] & (rng.random(n) < .14)
    ectopy = pick({"none": 76, "PVC": 11, "BIGU": 2.7, "TRIGU": 2.7, "PAC": 7.6})
    for k in ("PVC", "BIGU", "TRIGU", "PAC"):
        c[k] = (sick | (rng.random(n) < .04)) & (ectopy == k) & (c["sinus"] | (c["AFIB"] & (k == "PVC")))
    free &= ~c["CLBBB"] & ~c["WPW"]
    main = pick({"none": 13, "mi": 33, "injury": 12, "ischemia": 12, "st-t": 20, "LVH": 15, "RVH": 4, "SEHYP": 2.5})
    inferior, anterior = pick({"IMI": 60, "ILMI": 14, "IPMI": 8, "IPLMI": 10, "PMI": 11}), pick({"ASMI": 55, "AMI": 17, "ALMI": 15, "LMI": 13})
    which = rng.random(n)                                                              # inferior, anterior or both
    for k in WALL:
        c[k] = free & (main == "mi") & (((inferior == k) & (which < .58)) | ((anterior == k) & (which > .43)))
    c["LAFB"] |= c["ASMI"] & (conduction == "none") & (rng.random(n) < .2)
    zone = pick({"AS": 19, "AN": 12, "AL": 21, "LA": 16, "IN": 16, "IL": 16})
    for k in ZONE:
        c["INJ" + k] = free & (main == "injury") & (zone == k) & (k != "AN")
        c["ISC" + k] = free & ((main == "ischemia") | ((main == "injury") & (k == "AN"))) & (zone == k)
    minor = pick({"NDT": 40, "NST_": 22, "ISC_": 12, "DIG": 13, "LNGQT": 13})
    for k in ("NDT", "NST_", "ISC_", "DIG", "LNGQT"):
        c[k] = free & (main == "st-t") & (minor == k)
    c["DIG"] |= free & c["AFIB"] & (main == "none") & (rng.random(n) < .5)
    for k in ("LVH", "RVH", "SEHYP"):
        c[k] = free & (main == k)
    c["LVH"] |= free & np.isin(main, ("mi", "ischemia")) & (rng.random(n) < .08)
    c["strain"] = c["LVH"] & (rng.random(n) < .6)
    c["ISC_"] |= c["strain"]
    c["RVH"] &= ~c["LVH"]
    p_waves = c["sinus"] & sick
    c["LAO/LAE"] = p_waves & (rng.random(n) < np.where(c["LVH"], .2, .06))
    c["RAO/RAE"] = p_waves & (rng.random(n) < np.where(c["RVH"], .4, .03))
    c["LVOLT"] = sick & ~c["LVH"] & ~c["RVH"] & (rng.random(n) < .03)
    return c


def _turn(v, frontal, horizontal):
    """Turn lobes v (n, k, 3) by angles (n,): first about z (clockwise on paper, x to y), then about y (x to z: to the back)."""
    x, y, z = np.moveaxis(v, -1, 0)
    a, b = frontal[:, None], horizontal[:, None]
    x, y = x * np.cos(a) - y * np.sin(a), x * np.sin(a) + y * np.cos(a)
    return np.stack([x * np.cos(b) - z * np.sin(b), y, x * np.sin(b) + z * np.cos(b)], -1)


def _patient(rng, c):
    """A healthy patient of that age: lobe directions v (n, 8, 3), local chest parts w (n, 8, 6), times and the lead matrix."""
    n, norm, age = CHUNK, rng.standard_normal, (c["age"] - 50) / 15
    logn = lambda s, *shape: np.exp(s * norm((n, *shape)))
    p = {"rate": np.clip(rng.normal(np.where(c["sick"], 75, 71), np.where(c["sick"], 13, 10)), 51, 99)}
    p["qrs"] = np.clip(.092 + .008 * norm(n), .074, .110)                              # s
    p["pr"] = np.clip(.155 + .005 * age + .018 * norm(n), .118, .198)
    p["qtc"] = np.clip(.408 + .016 * norm(n), .365, .445)                              # Fridericia, s
    v = np.zeros((n, 8, 3))
    v[:, Q], v[:, R], v[:, L], v[:, S] = (-.10, -.02, -.30), (1.20, .46, -.03), (.22, .16, .62), (-.32, -.10, .34)
    v[:, :4] *= logn(.25, 4, 1) * logn(.25, 1, 1) * np.exp(-.05 * age)[:, None, None]
    v[:, :4] += .06 * norm((n, 4, 3))
    tilt, back = np.radians(np.clip(4 - 8 * age + 22 * norm(n), -48, 58)), np.radians(16 * norm(n))
    v[:, R:E], v[:, Q:R] = _turn(v[:, R:E], tilt, back), _turn(v[:, Q:R], -.6 * tilt, back)   # the septum points away from the axis
    v[:, T] = np.array((.30, .12, -.22)) * (logn(.35) * np.exp(-.1 * age))[:, None]
    v[:, T:T + 1] = _turn(v[:, T:T + 1], np.radians(14 * norm(n)), np.radians(20 * norm(n)))
    v[:, J] = .14 * v[:, T] + (0, 0, -.03) + .012 * norm((n, 3))
    v[:, U] = .06 * v[:, T] * logn(.4)[:, None]
    p["v"], p["w"] = v, np.zeros((n, 8, 6))
    p["w"][:, T] = np.linalg.norm(v[:, T], axis=1)[:, None] * (0, .2, 0, -.15, 0, 0)    # T is taller in V2 than a dipole makes it
    p["frac"] = np.tile((.22, .46, .6, .73, .85), (n, 1)) + .015 * norm((n, 5))        # lobe centres as shares of the QRS
    p["wide"] = np.tile((.09, .11, .105, .10, .09), (n, 1)) * logn(.08, 5)              # lobe widths as shares of the QRS
    p["p"] = np.array([[.05, .07, -.03], [.065, .05, .03]]) * logn(.3, 1, 1) + .008 * norm((n, 2, 3))
    p["p_gap"] = .034 + .003 * norm(n)                                                 # right to left atrium, s
    p["secondary"] = np.zeros(n)                                                       # ST-T opposite to a wide QRS
    shift = np.clip(.25 * norm((n, 1)) + .12 * norm((n, 6)), -.6, .6)                  # chest electrodes, in electrode gaps
    chest = np.pad(DOWER[2:], ((1, 1), (0, 0)), mode="edge")
    near = np.where(shift[..., None] > 0, chest[2:], chest[:-2])
    p["leads"] = np.tile(DOWER, (n, 1, 1))
    p["leads"][:, 2:] += abs(shift)[..., None] * (near - DOWER[2:])
    p["leads"] *= np.concatenate([logn(.06, 2), logn(.14, 6)], 1)[..., None]
    p["leads"][:, [V1, V2], 2] += .26, -.12                                            # V1 sees less of the back, V2 more, than in Dower's torso
    p["leads"] += .04 * norm((n, 8, 3))
    return p


def _conduct(rng, c, p):
    """Changes of rate, intervals and of the way the ventricles are activated."""
    n, uni, norm, v, w = CHUNK, lambda a, b: rng.uniform(a, b, CHUNK), rng.standard_normal, p["v"], p["w"]
    def put(name, where, value):
        p[name] = np.where(where, value, p[name])
    put("rate", c["SBRAD"], uni(38, 58)); put("rate", c["STACH"], 100 + rng.gamma(1.5, 9, n))
    put("rate", c["AFIB"], np.clip(92 + 24 * norm(n), 50, 175)); put("rate", c["PACE"], uni(60, 85))
    put("rate", c["AFLT"], uni(240, 330)); put("rate", c["SVTAC"], uni(140, 215))       # flutter: atrial rate
    put("rate", c["3AVB"], uni(28, 52)); put("rate", c["2AVB"], uni(65, 100))           # 2AVB: atrial rate
    put("pr", c["1AVB"], .205 + rng.gamma(2, .02, n)); put("pr", c["WPW"], uni(.08, .118))
    put("qtc", c["LNGQT"], uni(.47, .56)); put("qtc", c["DIG"], uni(.34, .39))
    put("qrs", c["LVH"], p["qrs"] + .008)
    def add(where, lobe, direction, low, high):
        v[where, lobe] += (np.array(direction) * uni(low, high)[:, None])[where]
    def keep(where, lobe, factor):
        v[where, lobe] *= np.array(factor)
    def tilt(where, lobes, degrees, back=None):
        v[where, lobes] = _turn(v[:, lobes], np.radians(degrees), np.radians(back if back is not None else np.zeros(n)))[where]
    left, full = c["CLBBB"] | c["ILBBB"], c["CLBBB"]
    size = np.linalg.norm(v[:, R], axis=1)[:, None]                                     # a patient's own amplitude
    new = np.array([(.15, .1, .25), (.3, .35, 1.15), (.45, .25, 1.25), (.35, -.15, .65)])   # left bundle: all forces left and back
    for i, lobe in enumerate((Q, R, L, S)):
        mixed = size * new[i] * np.exp(.2 * norm((n, 3))) + .1 * norm((n, 3))
        v[full, lobe] = mixed[full]
        v[c["ILBBB"], lobe] = (.55 * v[:, lobe] + .45 * mixed)[c["ILBBB"]]
    tilt(full, slice(0, 4), np.clip(-8 + 25 * norm(n), -70, 45), 10 * norm(n))
    put("qrs", full, np.clip(.146 + .013 * norm(n), .122, .185)); put("qrs", c["ILBBB"], uni(.108, .119))
    late, part = c["CRBBB"], c["IRBBB"]
    add(late, E, (-.6, -.05, -.52), .6, 1.5); add(part, E, (-.3, -.12, -.34), .3, 1.1)
    keep(late, L, (.8, .8, .45)); keep(late, S, .2); keep(part, L, (1, 1, .6)); keep(part, S, (1, 1, .4))
    w[late, E, :3] += (np.array((.35, .2, .05)) * uni(0, 1.5)[:, None])[late]
    w[part, E, :2] += (np.array((.12, .05)) * uni(0, 1.3)[:, None])[part]
    put("qrs", late, np.clip(.138 + .012 * norm(n), .121, .18)); put("qrs", part, uni(.098, .118))
    p["frac"][late] = (.14, .31, .43, .55, .76); p["wide"][late] = (.06, .08, .085, .09, .14)
    p["frac"][part] = (.18, .4, .52, .65, .79)
    put("qrs", c["IVCD"], uni(.112, .138))
    p["frac"][c["IVCD"]] += .05 * norm((n, 5))[c["IVCD"]]; v[c["IVCD"], :4] += .1 * norm((n, 4, 3))[c["IVCD"]]
    for k, angle in (("LAFB", -50), ("LPFB", 62)):                                     # early forces one way, the rest the other
        tilt(c[k], slice(R, E), angle + 10 * norm(n), 5 * norm(n))
        tilt(c[k], slice(Q, R), -angle / 2 + 10 * norm(n))
    add(c["LAFB"], S, (-.1, -.35, .05), .3, 1.2); add(c["LAFB"], Q, (.3, .25, 0), .4, 1.2)
    add(c["LPFB"], Q, (.2, -.2, 0), .4, 1.2); add(c["LPFB"], S, (-.3, .25, 0), .3, 1.2)
    wpw = c["WPW"]
    delta = rng.choice(4, n)                                                            # pathway: left, right, septal, front
    way = np.array([(-.35, .5, -.6), (.8, .3, .1), (.7, -.6, -.5), (.5, .6, -.3)])[delta]
    v[wpw, E] = (way * uni(.35, .8)[:, None])[wpw]; v[wpw, Q] = (.5 * way * uni(.3, .8)[:, None])[wpw]
    put("qrs", wpw, uni(.115, .145)); p["frac"][wpw] = (.16, .58, .7, .84, .3); p["wide"][wpw, E] = .13
    pace = c["PACE"]
    for i, lobe in enumerate((Q, R, L, S)):                                            # paced at the apex of the right ventricle
        v[pace, lobe] = (np.array([(.05, -.1, .1), (.1, -.5, .55), (.2, -.65, .65), (.1, -.35, .3)])[i] *
                         np.exp(.25 * norm((n, 1)) + .25 * norm((n, 3))) + .12 * norm((n, 3)))[pace]
    tilt(pace, slice(0, 4), 40 * norm(n), 30 * norm(n)); put("qrs", pace, uni(.14, .185))
    p["dual"] = pace & (rng.random(n) < .5)                                             # paced atrium or sensed P wave as well
    p["spike"] = (np.array((.3, -.9, .4)) + .5 * norm((n, 3))) * rng.lognormal(-1.6, 1, n)[:, None]
    high = c["LVH"]                                                                     # thick left ventricle: left and back
    v[high, R] *= (uni(1.2, 1.9))[high, None]; v[high, L] *= (uni(1.2, 2.2))[high, None]
    tilt(high, slice(R, E), np.clip(8 + 8 * norm(n), -20, 25), np.clip(4 + 8 * norm(n), -10, 25))
    rvh = c["RVH"]                                                                      # thick right ventricle: right and front
    keep(rvh, L, (.5, .7, .3)); keep(rvh, R, (.75, .9, 1))
    add(rvh, R, (-.1, .05, -.3), .2, 1.5); add(rvh, S, (-.5, .02, -.5), .5, 1.4)
    add(rvh, T, (.1, -.12, .35), .3, 1.2)
    add(c["SEHYP"], Q, (-.45, -.3, -.5), .7, 1.6); add(c["SEHYP"], R, (.2, 0, -.1), 0, 1)
    low = c["LVOLT"]
    v[low, :5] *= (.42 / np.maximum(np.linalg.norm(v[low, :5], axis=2).max(1), .8))[:, None, None]
    v[low, T] *= .6
    wide = full | pace
    p["secondary"] = np.where(wide, uni(2.3, 3.8), np.where(c["ILBBB"] | wpw, uni(.8, 2.2), 0.))
    v[wide, T] *= .2; v[wide, J] *= .2
    add(late, T, (.12, .02, .36), .5, 1.4); w[late, T, :3] -= (np.array((.15, .1, .03)) * uni(0, 1.2)[:, None])[late]
    add(part, T, (.03, 0, .08), 0, 1.3)
    strain = c["strain"]
    keep(strain, T, (.1, .2, 1.2)); add(strain, T, (-.16, -.12, -.08), .2, 1.6); add(strain, J, (-.06, -.03, -.05), .3, 1.8)
    keep(high & ~strain, T, (.6, .7, 1.1))
    big_l, big_r = c["LAO/LAE"], c["RAO/RAE"]
    p["p"][big_l, 1] += (np.array((.06, .03, .10)) * uni(.6, 1.3)[:, None])[big_l]
    put("p_gap", big_l, uni(.052, .068)); p["p"][big_r, 0] += (np.array((.02, .17, -.08)) * uni(.7, 1.4)[:, None])[big_r]
    put("pr", big_l, np.maximum(p["pr"], .15))
    area = (v[:, :5] * (p["wide"] * p["qrs"][:, None])[..., None]).sum(1) * 2.5066      # mV s
    v[:, T] -= p["secondary"][:, None] * area; v[:, J] -= .35 * p["secondary"][:, None] * area


def _damage(rng, c, p):
    """Infarction, injury, ischemia and the unspecific changes of ST and T."""
    n, uni, v, w = CHUNK, lambda a, b: rng.uniform(a, b, CHUNK), p["v"], p["w"]
    stage = rng.choice(3, n, p=(.74, .16, .10))                                          # old, subacute, acute
    c["acute"] = np.zeros(n, bool)
    for k, (wall, chest) in WALL.items():
        on, size = c[k], uni(.3, 1)
        wall, chest = np.array(wall) / np.linalg.norm(wall), np.array(chest)
        lost = np.maximum(v[:, R] @ wall, .55)
        v[on, Q] -= (wall * (.05 + .28 * size)[:, None])[on]
        v[on, R] -= (wall * (lost * size * uni(.1, .7))[:, None])[on]
        v[on, L] -= (wall * (.15 * size)[:, None])[on]
        w[on, Q] -= (chest * (.25 * size * uni(.3, 1))[:, None])[on]
        w[on, R] -= (chest * (.45 * size * uni(.2, 1))[:, None])[on]
        p["frac"][on, Q] += .05
        p["wide"][on, Q] *= 1.35
        st = np.choose(stage, (uni(-.02, .04), uni(.02, .1), uni(.1, .32)))
        t = np.choose(stage, (uni(-.22, 0), uni(-.42, -.15), uni(0, .35)))
        v[on, T] *= np.choose(stage, (.85, .7, .95))[on, None]
        for lobe, size in ((J, st), (T, t)):
            v[on, lobe] += (wall * size[:, None])[on]
            w[on, lobe] += (chest * (.4 * size)[:, None])[on]
        c["acute"] |= on & (stage == 2)
    for k, name in ZONE.items():
        wall, chest = WALL[name]
        wall, chest = np.array(wall) / np.linalg.norm(wall), np.array(chest)
        for on, st, t, rest in ((c.get("INJ" + k), uni(.06, .2), uni(.08, .32), .5), (c["ISC" + k], uni(0, .07), uni(.1, .36), .5)):
            v[on, T] *= rest
            for lobe, size in ((J, st), (T, t)):
                v[on, lobe] -= (wall * size[:, None])[on]
                w[on, lobe] -= (chest * (.3 * size)[:, None])[on]
    on = c["NDT"]; v[on, T] *= np.stack([uni(-.05, .45), uni(-.05, .45), uni(.4, 1)], 1)[on]; w[on, T] *= .7
    on = c["NST_"]; v[on, T] *= uni(.5, .9)[on, None]; v[on, J] -= (np.array((.8, .5, -.3)) * uni(.05, .11)[:, None])[on]
    on = c["ISC_"] & ~c["strain"]; v[on, T] *= (.2, .2, .7)
    v[on, T] -= (np.array((.2, .12, 0)) * uni(.3, 1.3)[:, None])[on]; v[on, J] -= (np.array((.8, .5, -.3)) * uni(.03, .12)[:, None])[on]
    on = c["DIG"]; v[on, T] *= uni(.2, .6)[on, None]
    v[on, J] -= (v[:, R] / np.linalg.norm(v[:, R], axis=1)[:, None] * uni(.1, .22)[:, None])[on]


def _times(p, rr):
    """Centres and widths (n, 8) in s from QRS onset, for RR intervals rr (n,): QT follows Fridericia's cube root."""
    d, qt = p["qrs"], p["qtc"] * np.cbrt(np.clip(rr, .3, 1.6)) + np.maximum(p["qrs"] - .1, 0)
    top = qt - .078 * np.sqrt(qt / .4)
    centre = np.concatenate([p["frac"] * d[:, None], np.stack([(d + top) / 2, top, qt + .07], 1)], 1)
    width = np.concatenate([p["wide"] * d[:, None], np.stack([(top - d) / 2, .1 * qt, .04 + 0 * qt], 1)], 1)
    return centre, width, qt


def _lobes(t, centre, width):
    """Lobes (n, 8, W) at times t (n, W): Gaussian; ST flat-topped; T steeper on its right side."""
    u = (t[:, None] - centre[..., None]) / width[..., None]
    u[:, T] *= np.where(u[:, T] > 0, 1, .72)
    u[:, J] = np.sqrt(2) * u[:, J] ** 2
    return np.exp(-.5 * u * u)


def _sum(p, v, w):
    """Lobe amplitudes in the eight independent leads: (n, 8 lobes, 8 leads) mV."""
    a = v @ p["leads"].swapaxes(1, 2)
    a[..., 2:] += w
    return a


def _measure(p):
    """What a cardiologist would measure on the noise-free beat, all twelve leads: dict of (n, 12) mV or s, and the axis (n,) degrees."""
    step = .004
    t = np.tile(np.arange(0, .72, step), (CHUNK, 1))
    centre, width, qt = _times(p, 60 / np.clip(p["rate"], 30, 130))
    beat = np.einsum("nkt,nkl,ml->nmt", _lobes(t, centre, width), _sum(p, p["v"], p["w"]), LIMBS)
    inside = lambda a, b: np.where(((t >= a[:, None]) & (t < b[:, None]))[:, None], beat, 0)
    zero, d = np.zeros(CHUNK), p["qrs"]
    qrs = inside(zero, d)
    m = {"r": qrs.max(2), "s": -qrs.min(2), "r_at": qrs.argmax(2) * step}
    before = t[:, None] < m["r_at"][..., None]
    m["q"] = -np.where(before, qrs, 0).min(2)
    m["q_wide"] = (before & (qrs < -.04)).sum(2) * step
    j = np.clip(((d + .05) / step).astype(int), 0, t.shape[1] - 1)
    m["st"] = beat[np.arange(CHUNK), :, j]
    tt = inside(d + .08, qt + .02)
    m["t"] = np.where(tt.max(2) > -tt.min(2), tt.max(2), tt.min(2))
    m["t_low"] = tt.min(2)
    area = qrs.sum(2)
    m["axis"] = np.degrees(np.arctan2(area[:, 5] * 2 / np.sqrt(3), area[:, 0]))
    return m


GROUPS = {"ii, iii and avf": (1, 2, 5), "i and avl": (0, 4), "v1 to v3": (6, 7, 8), "v2 to v4": (7, 8, 9), "v3 to v6": (8, 9, 10, 11),
          "v4 to v6": (9, 10, 11), "v5 and v6": (10, 11), "v1 to v4": (6, 7, 8, 9)}


def _label(rng, c, p, m):
    """Codes (n dicts) and waveform features (n lists) from the drawn truth c, p and the measured beat m."""
    r, s, st, t, axis, rate, pr = m["r"], m["s"], m["st"], m["t"], m["axis"], p["rate"], p["pr"]
    mi = np.any([c[k] for k in WALL], 0)
    wide = c["CLBBB"] | c["PACE"] | c["WPW"] | c["ILBBB"]
    sinus, p_seen = c["sinus"], c["sinus"] | c["SVARR"] | c["2AVB"]
    bradycardia, tachycardia = sinus & (rate < 60), sinus & (rate > 100)
    every = lambda hit, leads: hit[:, list(leads)].all(1)
    most = lambda hit, leads: hit[:, list(leads)].sum(1) >= min(2, len(leads))
    pathological = (m["q"] > .1) & (m["q"] > .33 * r) & (m["q_wide"] >= .028) & ~wide[:, None]
    q_groups = {g: most(pathological, GROUPS[g]) for g in ("ii, iii and avf", "i and avl", "v5 and v6", "v3 to v6", "v2 to v4", "v1 to v3")}
    q_groups["v1 to v3"] &= pathological[:, 7]
    poor_r = (r[:, 8] < .3) & (r[:, 8] < s[:, 8]) & ~wide
    sokolow = s[:, 6] + np.maximum(r[:, 10], r[:, 11])
    late_delta = ~wide & ~c["CRBBB"]
    f = {"flat t waves": (abs(t[:, [0, 1, 9, 10, 11]]) < .12).all(1), "left axis deviation": (axis < -30) & (axis > -90)}
    low_st = (st < -.05) & ~wide[:, None]
    code = {k: c[k] for k in c if k.isupper() or "/" in k}
    code |= {"SR": sinus & ~bradycardia & ~tachycardia & ~c["SARRH"], "SBRAD": bradycardia, "STACH": tachycardia,
             "1AVB": p_seen & (pr > .2) & ~c["2AVB"], "LPR": p_seen & (pr > .2) & ~c["2AVB"],
             "VCLVH": late_delta & ~c["RVH"] & ((sokolow > 3.5) | (r[:, 4] > 1.1)), "HVOLT": late_delta & ((r + s)[:, 6:] > 4).any(1),
             "LVOLT": ((r + s)[:, :6] < .5).all(1) | ((r + s)[:, 6:] < 1).all(1), "QWAVE": np.any(list(q_groups.values()), 0),
             "LOWT": f["flat t waves"] & ~wide, "INVT": ~wide & ((t[:, [0, 1, 8, 9, 10, 11]] < -.1).sum(1) > 1),
             "STD_": low_st[:, [0, 1, 4, 5, 8, 9, 10, 11]].sum(1) > 1, "STE_": ~mi & ~wide & ((st[:, 7:9] > .2).any(1) | most(st > .1, (1, 5, 10, 11)))}
    code["ABQRS"] = code["QWAVE"] | poor_r
    ectopic_atrial = rng.random(CHUNK) < .3                                            # the early beats of bi- and trigeminy
    runs = code["BIGU"] | code["TRIGU"]
    c["early_v"], c["early_a"] = code["PVC"] | (runs & ~ectopic_atrial), code["PAC"] | (runs & ectopic_atrial) | code["SVARR"]
    code["PVC"], code["PAC"] = c["early_v"], c["early_a"] & ~code["SVARR"]
    code["NORM"] = ~c["sick"] & ~np.any([code[k] for k in ("QWAVE", "INVT", "STD_", "LOWT", "ABQRS", "LVOLT", "BIGU", "TRIGU")], 0)
    irregular = c["AFIB"] | c["SVARR"] | c["SARRH"] | c["early_v"] | c["early_a"]
    up = sinus & ~c["RAO/RAE"] & ~c["LAO/LAE"]
    regular = (sinus | c["SVTAC"] | c["PACE"]) & ~irregular
    for name, g in GROUPS.items():
        f["inverted t waves in " + name] = every(t < -.08, g)
        f["st depression in " + name] = every(st < -.05, g)
        f["st elevation in " + name] = every(st > .1, g) & (c["acute"] | code["STE_"])
        f["pathological q waves in " + name] = q_groups.get(name, np.zeros(CHUNK, bool))
    fine_axis = (r - s)[:, 0] > 0, (r - s)[:, 5] > 0
    deep = s > 1.8
    f |= {"right axis deviation": axis > 95, "positive qrs in i and avf": fine_axis[0] & fine_axis[1],
          "positive qrs in i and negative qrs in avf": fine_axis[0] & ~fine_axis[1],
          "negative qrs in i and positive qrs in avf": ~fine_axis[0] & fine_axis[1], "negative qrs in i and avf": ~fine_axis[0] & ~fine_axis[1],
          "heart rate above 100": tachycardia | c["SVTAC"] | (c["AFIB"] & (rate > 100)), "heart rate above 150": c["SVTAC"] & (rate > 150),
          "heart rate below 60": bradycardia | c["3AVB"], "heart rate between 60 and 100": sinus & (rate >= 60) & (rate <= 100),
          "absent p waves": c["AFIB"] | c["AFLT"] | c["SVTAC"], "fibrillatory baseline": c["AFIB"], "irregularly irregular rr intervals": c["AFIB"],
          "sawtooth flutter waves": c["AFLT"], "atrial rate near 300": c["AFLT"] & (rate > 280) & (rate < 320), "regular rr intervals": regular,
          "varying rr intervals": irregular, "sudden change of heart rate": c["PSVT"], "upright p wave in ii before every qrs": sinus & ~c["early_v"],
          "normal p waves": up, "normal pr interval": up & (pr > .12) & (pr <= .2), "pr interval longer than 200 ms": code["1AVB"],
          "pr interval shorter than 120 ms": sinus & (pr < .12), "p waves not followed by qrs": c["2AVB"] | c["3AVB"],
          "p waves unrelated to qrs": c["3AVB"], "tall peaked p waves in ii": c["RAO/RAE"], "wide notched p waves in ii": c["LAO/LAE"],
          "deep terminal p wave in v1": c["LAO/LAE"], "tall initial p wave in v1": c["RAO/RAE"],
          "normal qrs duration": p["qrs"] < .1, "qrs between 100 and 120 ms": (p["qrs"] >= .1) & (p["qrs"] < .12), "qrs longer than 120 ms": p["qrs"] >= .12,
          "rsr' pattern in v1": c["CRBBB"] | c["IRBBB"], "wide s waves in i and v6": c["CRBBB"], "broad notched r waves in i and v6": c["CLBBB"],
          "absent septal q waves": c["CLBBB"] | c["ILBBB"], "delta waves": c["WPW"], "pacing spikes": c["PACE"],
          "t wave opposite to the qrs": c["CLBBB"] | c["PACE"] | c["early_v"], "early wide qrs without p wave": c["early_v"],
          "early narrow qrs": c["early_a"], "early p wave of different shape": c["early_a"], "pause after an early beat": c["early_v"],
          "every second beat early": code["BIGU"], "every third beat early": code["TRIGU"],
          "small q and tall r in i and avl": c["LAFB"], "small r and deep s in ii, iii and avf": c["LAFB"],
          "small r and deep s in i and avl": c["LPFB"], "small q and tall r in ii, iii and avf": c["LPFB"],
          "deep narrow q waves in v4 to v6": c["SEHYP"], "tall r waves in v5 and v6": np.maximum(r[:, 10], r[:, 11]) > 2.4,
          "tall r waves in avl": r[:, 4] > 1.1, "tall r waves in v1 and v2": (r[:, 6] > .6) & (r[:, 6] > s[:, 6]), "deep s waves in v1 and v2": deep[:, 6] | deep[:, 7],
          "deep s waves in v5 and v6": (s[:, 10] > .7) & (s[:, 10] > r[:, 10]), "poor r wave progression": poor_r,
          "normal r wave progression": ~poor_r & (r[:, 9] > s[:, 9]) & (r[:, 6] < s[:, 6]), "early r wave transition in chest leads": r[:, 7] > s[:, 7],
          "late r wave transition in chest leads": r[:, 10] < s[:, 10],
          "corrected qt longer than 460 ms": p["qtc"] > .46, "corrected qt shorter than 360 ms": p["qtc"] < .36,
          "scooped st depression": c["DIG"], "isoelectric st segment": (abs(st) < .05).all(1), "upright t waves": (t[:, [0, 1, 8, 9, 10, 11]] > .08).all(1),
          "tall peaked t waves": (t[:, 6:] > 1.2).any(1), "qrs below 0.5 mv in limb leads": ((r + s)[:, :6] < .5).all(1),
          "qrs below 1 mv in chest leads": ((r + s)[:, 6:] < 1).all(1)}
    words = lambda table, i: [k for k, on in table.items() if on[i]]
    return [dict.fromkeys(words(code, i), 100.0) for i in range(CHUNK)], [words(f, i) for i in range(CHUNK)]


def _rhythm(rng, c, p, seconds):
    """When atria and ventricles fire: dict of QRS and P times (n, K) in s (nan: none), whether early, and the RR before each beat."""
    n, uni = CHUNK, lambda a, b: rng.uniform(a, b, CHUNK)
    beats = int((seconds + 3) * 3.8)
    base, age = 60 / p["rate"], (c["age"] - 50) / 15
    breath, phase = uni(.18, .32), uni(0, 2 * np.pi)
    depth = np.where(c["SARRH"], uni(.1, .26), np.where(c["sinus"], np.minimum(.028 * np.exp(-.35 * age + .5 * rng.standard_normal(n)), .07), 0))
    jitter = np.where(c["AFIB"], uni(.13, .3), np.where(c["SVARR"], .09, np.where(c["SVTAC"] | c["PACE"] | c["AFLT"], .003, .012)))
    ratio = rng.choice((2, 3, 4, 0), n, p=(.45, .12, .2, .23))                          # flutter waves a QRS, 0: changing
    change, fast, first = uni(3, seconds - 2.5), 60 / uni(140, 205), rng.random(n) < .5  # paroxysm: when, how fast, at first or later
    chance = np.where(c["SVARR"], .3, np.where(c["BIGU"] | c["TRIGU"], 0, .12))
    period = np.where(c["BIGU"], 2, np.where(c["TRIGU"], 3, 10 ** 6))
    due, ectopic = uni(1.5, seconds - 2), c["early_v"] | c["early_a"]
    kind2, cycle = rng.choice(3, n, p=(.45, .2, .35)), rng.integers(3, 6, n)            # Wenckebach, Mobitz II, 2:1
    cycle = np.where(kind2 == 2, 2, cycle)
    grow = np.where(kind2 == 0, uni(.04, .09), 0)
    t, was, since, gap = -1.5 - uni(0, 1.2) * base, np.zeros(n, bool), np.zeros(n, int), base
    out = {k: np.full((n, beats), np.nan) for k in ("qrs", "p", "rr")} | {"early": np.zeros((n, beats), bool)}
    for k in range(beats):
        rr = base * (1 + depth * np.sin(2 * np.pi * breath * t + phase)) * np.exp(jitter * np.clip(rng.standard_normal(n), -2.5, 2.5))
        rr = np.where(c["AFLT"], rr * np.where(ratio > 0, ratio, rng.integers(2, 5, n)), rr)
        rr = np.where(c["PSVT"] & ((t < change) == first), fast, rr)
        early = ectopic & ~was & ((since >= period - 1) | (rng.random(n) < chance) | ((t > due) & (t < due + 1.5) & (period > 9) & (since >= k - 1)))
        gap = np.where(early, rr * np.where(c["AFIB"], 1, uni(.52, .75)), np.where(was & c["early_v"] & ~c["AFIB"], 2 * rr - gap, rr))
        t = t + gap
        since, was = np.where(early, 0, since + 1), early
        place = k % cycle
        dropped = c["2AVB"] & (place == cycle - 1)
        delay = p["pr"] + np.where(c["2AVB"], grow * place ** .6, 0)
        out["qrs"][:, k] = np.where(dropped, np.nan, t + delay)
        out["p"][:, k], out["rr"][:, k], out["early"][:, k] = t, gap, early
    out["p"][(c["AFIB"] | c["AFLT"] | c["SVTAC"] | (c["PACE"] & ~p["dual"]))] = np.nan
    out["p"][out["early"] & c["early_v"][:, None]] = np.nan
    out["p"][c["PSVT"][:, None] & (out["rr"] < .45)] = np.nan
    own = -1.5 + (60 / uni(68, 105))[:, None] * (uni(0, 1)[:, None] + np.arange(beats) + .01 * rng.standard_normal((n, beats)))
    out["p"] = np.where(c["3AVB"][:, None], own, out["p"])
    out["breath"] = breath, phase
    return out


def _draw(rng, c, p, clock, rate, seconds):
    """Fire the lobes: ecg (n, 8, N) mV of the independent leads, and the samples of the R peaks."""
    n, samples, norm = CHUNK, round(seconds * rate), rng.standard_normal
    pad = rate                                                                          # room for waves that begin or end outside
    out, top = np.zeros((n, samples + 2 * pad, 8)), [[] for _ in range(n)]
    blur = .2 / rate                                                                    # the anti-alias filter's share of every width
    way = np.array((-.2, .1, .5)) + norm((n, 3)) * (.5, .8, .6)                         # an early ventricular beat: one wide wave
    way /= np.linalg.norm(way, axis=1, keepdims=True)
    size = rng.uniform(1, 2.2, n)[:, None]
    v = np.zeros((n, 8, 3))
    for lobe, share in ((Q, .35), (R, .9), (L, .8), (S, .35)):
        v[:, lobe] = size * (share * way + .2 * norm((n, 3)))
    x = dict(p, v=v, w=np.zeros((n, 8, 6)), qrs=rng.uniform(.13, .18, n), frac=np.tile((.2, .42, .62, .82, .9), (n, 1)), wide=np.full((n, 5), .12))
    area = (v[:, :5] * (x["wide"] * x["qrs"][:, None])[..., None]).sum(1) * 2.5066
    v[:, T], v[:, J] = -3.2 * area, -1.1 * area
    usual = np.nanmedian(clock["rr"], 1)
    lead_breath = .05 * norm((n, 8))
    breath, phase = clock["breath"]
    length = int(1.0 * rate)

    def fire(where, start, shape, amplitude):
        """Add shape (m, k, W) x amplitude (m, k, 8) at sample start (m,)."""
        beat = np.einsum("mkt,mkl->mtl", shape, amplitude, optimize=True)
        out[where[:, None], start[:, None] + pad + np.arange(shape.shape[2])] += beat
        return beat

    for b, amplitude, early in ((p, _sum(p, p["v"], p["w"]), False), (x, _sum(x, x["v"], x["w"]), True)):
        for k in range(clock["qrs"].shape[1]):
            at = clock["qrs"][:, k]
            with np.errstate(invalid="ignore"):
                i = np.flatnonzero((at > -.8) & (at < seconds + .1) & ((clock["early"][:, k] & c["early_v"]) == early))
            if not i.size:
                continue
            one = {name: b[name][i] for name in ("qrs", "qtc", "frac", "wide")}
            centre, width, _ = _times(one, .7 * usual[i] + .3 * clock["rr"][i, k])
            start = np.floor((at[i] - .12) * rate).astype(int)
            t = (start[:, None] + np.arange(length)) / rate - at[i, None]
            gain = 1 + lead_breath[i] * np.sin(2 * np.pi * breath[i] * at[i] + phase[i])[:, None]
            beat = fire(i, start, _lobes(t, centre, np.hypot(width, blur)), amplitude[i] * gain[:, None])
            size = np.where((t > 0) & (t < one["qrs"][:, None]), (beat ** 2).sum(2), 0)
            for record, peak in zip(i, start + size.argmax(1)):
                if 0 <= peak < samples:
                    top[record].append(peak)
    atria = p["p"] @ p["leads"].swapaxes(1, 2)                                          # (n, 2, 8)
    other = (p["p"] * (1, -.8, 1.2) + .03 * norm((n, 2, 3))) @ p["leads"].swapaxes(1, 2)
    for k in range(clock["p"].shape[1]):
        at = clock["p"][:, k]
        with np.errstate(invalid="ignore"):
            i = np.flatnonzero((at > -.5) & (at < seconds + .1))
        if not i.size:
            continue
        start = np.floor(at[i] * rate).astype(int) - rate // 20
        t = (start[:, None] + np.arange(rate // 3)) / rate - at[i, None]
        centre = .036 + np.stack([0 * i, p["p_gap"][i]], 1)
        shape = np.exp(-.5 * ((t[:, None] - centre[..., None]) / np.hypot(.019, blur)) ** 2)
        fire(i, start, shape, np.where((clock["early"][i, k] | c["SVARR"][i] & (k % 3 == 0))[:, None, None], other[i], atria[i]))
    sharp = max(.0012, .35 / rate)                                                      # pacing spikes: one sample
    for times, on in ((clock["qrs"], c["PACE"]), (clock["p"], c["PACE"] & p["dual"] & (rng.random(n) < .6))):
        for i in np.flatnonzero(on):
            for at in times[i][(times[i] > 0) & (times[i] < seconds)] - .006:
                s = int(at * rate) + np.arange(-2, 4)
                out[i, pad + s] += np.exp(-.5 * ((s / rate - at) / sharp) ** 2)[:, None] * (p["leads"][i] @ p["spike"][i]) * .0012 / sharp * 4
    out = out[:, pad:-pad].swapaxes(1, 2) + _atrial_waves(rng, c, p, np.arange(samples) / rate)
    return out, [np.sort(np.array(x, int)) for x in top]


def _atrial_waves(rng, c, p, t):
    """Fibrillation (4-8 Hz, waxing and waning) and flutter (sawtooth, negative in II): (n, 8, N) mV."""
    n, uni = CHUNK, lambda *s: rng.uniform(0, 1, (CHUNK, *s))
    af = c["AFIB"] | (c["PACE"] & ~p["dual"] & (rng.random(n) < .6))
    f = (4.2 + 3.6 * uni(1)) + (uni(3) - .5) * 1.6                                      # (n, 3) Hz
    wobble = 1.2 * np.sin(2 * np.pi * (.15 + .5 * uni(3))[..., None] * t + 6.3 * uni(3)[..., None])
    swell = 1 + .6 * np.sin(2 * np.pi * (.1 + .6 * uni(3))[..., None] * t + 6.3 * uni(3)[..., None])
    angle = 2 * np.pi * f[..., None] * t + wobble + 6.3 * uni(3)[..., None]
    wave = swell * (np.sin(angle) + .3 * np.sin(2 * angle))                             # (n, 3, N)
    way = (np.array((-.15, .35, -.6)) + .3 * rng.standard_normal((n, 3, 3))) * (rng.lognormal(-3.3, .6, n) * af)[:, None, None]
    angle = 2 * np.pi * (p["rate"] / 60)[:, None] * t + 6.3 * uni(1)
    saw = sum(np.sin(h * angle + .5 * h) / h ** 1.3 for h in (1, 2, 3))
    flutter = (np.array((.02, -1, -.3)) + .25 * rng.standard_normal((n, 3))) * (rng.uniform(.05, .17, n) * c["AFLT"])[:, None]
    source = np.einsum("nkt,nkx->nxt", wave, way) + flutter[..., None] * saw[:, None]
    return p["leads"] @ source


def _noise(rng, samples, rate):
    """Disturbances of the nine electrodes RA, LA, LL, V1..V6 seen in the leads I, II, V1..V6: (n, 8, N) mV."""
    n, norm = CHUNK, rng.standard_normal
    f = np.fft.rfftfreq(samples, 1 / rate)
    t = np.arange(samples) / rate

    def coloured(shape, amount):
        """Gaussian noise with amplitude spectrum `shape` (F,) scaled to a standard deviation of `amount` (n, 9)."""
        spectrum = (norm((n, 9, f.size)) + 1j * norm((n, 9, f.size))) * shape
        x = np.fft.irfft(spectrum, samples)
        return x / x.std(-1, keepdims=True) * amount[..., None]

    per = lambda median, spread: rng.lognormal(np.log(median), spread, (n, 1)) * rng.lognormal(0, .4, (n, 9))
    wander = coloured(np.where(f < .04, 0, 1 / np.maximum(f, .04) ** 1.3) * (f < 2), per(.028, .8))
    muscle = coloured(np.minimum(f / 8, 1) / (1 + (f / 35) ** 4), per(.007, .7))
    muscle *= 1 + .5 * np.sin(2 * np.pi * rng.uniform(.05, .5, (n, 1, 1)) * t + rng.uniform(0, 6.3, (n, 1, 1)))
    mains = rng.choice((50, 60), n)
    hum = per(.004, 1) * ((rng.random(n) < .4) & (mains < .49 * rate))[:, None]          # above Nyquist the recorder's filter took it
    x = wander + muscle + hum[..., None] * np.sin(2 * np.pi * mains[:, None] * t + rng.uniform(0, 6.3, (n, 1)))[:, None]
    at, one = rng.uniform(0, t[-1], (n, 1)), np.eye(9)[rng.integers(0, 9, n)]            # one electrode moves, or is bad
    step = np.where(t > at, np.exp(-(t - at) / rng.uniform(.2, 2, (n, 1))), 0) * norm((n, 1)) * .4
    burst = np.exp(-.5 * ((t - at) / rng.uniform(.2, 1, (n, 1))) ** 2) * norm((n, samples)) * .1
    bad = coloured(1 / (1 + f / 3), np.full((n, 9), .25))[:, 0]
    u = rng.random((n, 1))
    fault = np.where(u < .06, step, np.where(u < .10, burst, np.where(u < .125, bad, 0)))
    x += one[:, :, None] * fault[:, None]
    electrodes = np.zeros((8, 9))
    electrodes[0, [0, 1]], electrodes[1, [0, 2]] = (-1, 1), (-1, 1)
    electrodes[2:, 3:], electrodes[2:, :3] = np.eye(6), -1 / 3
    return electrodes @ x


def _reports(rng, codes, features):
    """Reports (n lists of statements) in the wording of KNOWLEDGE: rhythm first, incomplete, features in fewer than half of them."""
    out = []
    for code, feature in zip(codes, features):
        loud = [k for k in code if knowledge()["findings"][k]["rhythm"]]
        rest = [k for k in code if k not in loud and (rng.random() > (.55 if k in QUIET else .1))]
        rng.shuffle(rest)
        said = [_word(rng, k) for k in loud + rest]
        if rng.random() < .4 and feature:
            said += list(rng.choice(feature, min(len(feature), rng.integers(1, 5)), replace=False))
        out.append(said)
    return out


def _word(rng, code):
    also = [a for a in knowledge()["findings"][code]["also"] if not a.startswith(("old", "acute", "recent"))]
    word = knowledge()["findings"][code]["name"] if rng.random() < .5 or not also else str(rng.choice(also))
    doubt = rng.random()
    return ("possible " if doubt < .04 else "probable " if doubt < .07 else "") + word if knowledge()["findings"][code]["diagnostic"] and code != "NORM" else word


QUIET = {"ABQRS", "QWAVE", "LOWT", "INVT", "STD_", "STE_", "VCLVH", "HVOLT", "LPR"}
import json, pathlib


# ---- command line ---------------------------------------------------------------------------------------------------

def describe(store):
    print(f"{store.path}: {len(store)} of {store.meta['rows']} records, {SECONDS} s at {store.rate} Hz, "
          + ", ".join(f"{name} {count}" for name, count in store.records["split"].value_counts().items()))
    for kind in ("dropped", "warnings"):
        for text, entry in store.meta[kind].items():
            print(f"{kind:9s}{entry['records']:7d} records: {text} ({entry['amount']}), e.g. {entry['examples'][0]}")


def print_coverage(src):
    """How much of PTB-XL's reports the lexicon understands, and what is left by frequency."""
    reports = [line["report"] for line in read_csv(os.path.join(src, "ptbxl_database.csv"), ("report",))]
    known, total, left = translator().coverage(reports)
    print(f"{len(reports)} reports: {known} of {total} word occurrences understood ({100 * known / total:.2f} %); left over:")
    print(", ".join(f"{word} {count}" for word, count in left.most_common(100)))


def plot(store, ids, path):
    """Records of a store as on paper (25 mm/s and 10 mm/mV squares), three columns of four leads and II below each -> PNG."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(12, 5 * len(ids)), layout="constrained")
    for axes, name in zip(np.atleast_1d(figure.subplots(len(ids), 1)), ids):
        found = np.flatnonzero(store.records["id"] == name)
        if not len(found):
            raise DataError(f"{store.path}: holds no record {name!r}")
        record, ecg = store.records.iloc[found[0]], store.ecg(found[:1])[0]
        quarter = store.samples // 4
        for i, lead in enumerate(LEADS):
            column, row = divmod(i, 3)
            part = slice(column * quarter, (column + 1) * quarter)
            axes.plot(np.arange(store.samples)[part] / store.rate, ecg[i, part] - 2.2 * row, "k", lw=0.8)
            axes.text(column * quarter / store.rate + 0.05, 0.85 - 2.2 * row, lead, fontsize=9)
        axes.plot(np.arange(store.samples) / store.rate, ecg[1] - 6.6, "k", lw=0.8)
        axes.text(0.05, 0.85 - 6.6, "II", fontsize=9)
        axes.set_xticks(np.arange(0, SECONDS + 0.1, 0.2), minor=True)
        axes.set_yticks(np.arange(-8, 1.6, 0.5), minor=True)
        axes.grid(which="both", color="#f3c6c6", lw=0.5)
        axes.set(xlim=(0, SECONDS), ylim=(-8, 1.5), xticks=range(SECONDS + 1), yticks=[], xlabel="s",
                 title=f"{record['source']} {name}: {'; '.join(record['statements'])}")
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description="Prepare and inspect stores.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("prepare", help="make a store from a data set")
    command.add_argument("source", choices=SOURCES)
    command.add_argument("src", help="folder of the data set; csv: the csv file; simulated: number of records")
    command.add_argument("dst", help="folder of the store")
    command.add_argument("--rate", type=int, default=100, help="Hz [100]")
    command.add_argument("--crop", choices=CROPS, default="first", help="which part of a longer record is kept [first]")
    command.add_argument("--min-words", type=int, default=0, help="leave out MIMIC reports with fewer words [0]")
    command.add_argument("--seed", type=int, default=0, help="of the simulator [0]")
    command.add_argument("--workers", type=int, help="processes [as many as pay]")
    command = commands.add_parser("info", help="describe a store")
    command.add_argument("path")
    command.add_argument("--verify", action="store_true", help="compare the checksum of the signals, too")
    command = commands.add_parser("coverage", help="how much of PTB-XL's reports the translation understands")
    command.add_argument("src", help="folder with ptbxl_database.csv")
    command = commands.add_parser("plot", help="draw records as a PNG")
    command.add_argument("data", help="as for train.py: simulated, ptbxl:PATH, store:PATH, ...")
    command.add_argument("ids", nargs="+")
    command.add_argument("--out", default="ecg.png")
    args = vars(parser.parse_args())
    name = args.pop("command")
    if name == "coverage":
        print_coverage(**args)
    elif name == "plot":
        plot(open_data(args["data"]), args["ids"], args["out"])
    else:
        describe((prepare if name == "prepare" else Store)(**args))


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
