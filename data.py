"""Records -> store -> batches: reading, data-set adapters, label sets, report text, the simulator.

Every data set becomes the same thing once, a store (class Store): a folder with
    ecg.i16      records x 12 leads x samples, int16 microvolts, little endian
    records.csv  id, patient, split, fold, statements, report, codes, source, leads, features, peaks (R peaks,
                 samples), age (years), sex (F or M)
    store.json   format version, rate, settings, what was dropped and why, sizes and checksums
and, of every record as numbers, what training reads (see index): split, peaks and statements.
In the program signals are float32 mV with leads in the order of LEADS, rates in Hz, positions in samples.
"""
import argparse
import ast
import contextlib
import csv
import errno
import hashlib
import inspect
import io
import json
import multiprocessing
import os
import re
import shutil
import sys
import threading
import unicodedata
import zlib
from array import array
from collections import Counter, deque, namedtuple
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from fractions import Fraction
from functools import cached_property, lru_cache, partial, wraps
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.signal import resample_poly
from scipy.sparse import csc_array
from threadpoolctl import threadpool_limits
from tqdm import tqdm
from wfdb.io._signal import BYTES_PER_SAMPLE, INVALID_SAMPLE_VALUE, _rd_dat_signals

from csrc.beats import segment_beats

try:
    import fcntl
except ImportError:  # Windows: no locks
    fcntl = None

LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
LEAD_INDEX = {lead.upper(): i for i, lead in enumerate(LEADS)} | {"DI": 0, "DII": 1, "DIII": 2}
SECONDS = 10       # length of every record in a store; shorter ones are zero-padded at the end
MAX_GAP = 0.04     # s, longest gap that is interpolated: half a normal QRS, no beat is lost or made up
MIN_SECONDS = 4.0  # s of valid signal that a lead needs: three beats even at 45 a minute
CROPS = {"first": (SECONDS, False), "center": (SECONDS, True),  # what is kept: seconds, and whether mid-way
         "cpsc-merl": (5, False)}  # MERL's rule for CPSC2018: the first 2,500 samples at 500 Hz, then zeros
MILLIVOLTS = {"mv": 1.0, "v": 1e3, "nv": 1e-6, "uv": 1e-3, "\u00b5v": 1e-3, "\u03bcv": 1e-3,  # unit -> mV
              r"\xb5v": 1e-3}  # a micro sign in Latin-1, see read_header
RATES = 50, 20000  # Hz: a header that says anything else is damaged, or not of an ECG


class DataError(ValueError):
    """One sentence for the user: which file or record, what is wrong, what to do. reason: the fault alone."""

    def __init__(self, message, reason=None):
        super().__init__(message)
        self.reason = reason or message


# ---- files: what is opened by name is opened here, and what is wrong with it is one sentence ---------------

HERE = os.path.dirname(os.path.abspath(__file__))
LFS = ": a Git LFS pointer, not the file itself; fetch it with: git lfs pull"
KINDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", list: "a list",
         dict: "an object", type(None): "null"}


def open_file(path):
    """A regular file, opened for reading in binary (a pipe or a device would hang). Errors: OSError."""
    if "\0" in str(path):
        raise OSError(errno.EINVAL, "no name of a file (it holds a zero)", str(path))
    if os.path.exists(path) and not os.path.isfile(path):
        kind = "a folder, not a file" if os.path.isdir(path) else "no regular file"
        raise OSError(errno.EINVAL, kind, str(path))
    return open(path, "rb")


def read_text(path):
    """A text file in UTF-8, whole. Errors: DataError."""
    try:
        with open_file(path) as file:
            text = file.read().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or f'not readable ({error})'}") from error
    if text.startswith("version https://git-lfs"):
        raise DataError(f"{path}{LFS}")
    return text


def parse_json(text, where):
    """A JSON text whose objects have every key once. Errors: DataError."""
    def once(pairs):
        for key, count in Counter(key for key, _ in pairs).items():
            if count > 1:
                raise ValueError(f"{key!r} occurs twice in one object")
        return dict(pairs)
    try:
        return json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:  # a JSONDecodeError says in which line and column
        raise DataError(f"{where}: {f'no JSON ({error})' if text.strip() else 'empty'}") from error


def check(value, shape, where):
    """value, if what was read from a file has this shape, else a DataError that says where it has not.

    A shape is a type or a tuple of types (float takes whole numbers, too); [shape] for a list; {"key": shape}
    for keys that an object must have, {str: shape} for all others."""
    kinds = shape if isinstance(shape, tuple) else (shape if isinstance(shape, type) else type(shape),)
    if type(value) not in kinds and not (type(value) is int and float in kinds):
        wanted = " or ".join(KINDS[kind] for kind in kinds)
        raise DataError(f"{where}: must be {wanted}, not {json.dumps(value)[:60]}")
    if isinstance(shape, list):
        for i, item in enumerate(value, 1):
            check(item, shape[0], f"{where}, place {i}")
    elif isinstance(shape, dict):
        if missing := [key for key in shape if key is not str and key not in value]:
            raise DataError(f"{where}: has no {missing[0]!r}")
        for key, item in value.items():
            if inner := shape.get(key, shape.get(str)):
                check(item, inner, f"{where}, {key}")
    return value


def read_json(path, shape=dict, advice=""):
    """A JSON file of a shape, see check. advice: what to do where it has another. Errors: DataError."""
    try:
        return check(parse_json(read_text(path), path), shape, path)
    except DataError as error:
        raise DataError(f"{error}{advice and '; ' + advice}") from error


def read_lines(path, shape):
    """Lines of a JSON-lines file, each of a shape, see check; none without the file. Errors: DataError."""
    text = read_text(path) if os.path.exists(path) else ""
    return [check(parse_json(line, f"{path}, line {n}"), shape, f"{path}, line {n}")
            for n, line in enumerate(text[:text.rfind("\n") + 1].splitlines(), 1)]  # a kill cuts the last


def write_atomic(path, write):
    """write(temporary path), then rename: a reader, or a crash, never sees half a file.

    Errors: DataError where the disk is full or the folder may not be written; what was there stays."""
    temporary = f"{path}.tmp"
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save tells a full disk by a RuntimeError
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        fault = getattr(error, "strerror", None) or f"no space left, it seems ({str(error).splitlines()[0]})"
        raise DataError(f"{path}: cannot be written: {fault}; the last whole one is kept") from error


def write_text(path, text):
    write_atomic(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def checksums(folder, patterns):
    """{path in the folder: crc32} of the files that match; read once as long as they do not change."""
    paths = sorted(path for pattern in patterns for path in Path(folder).glob(pattern) if path.is_file())
    return {path.relative_to(folder).as_posix(): crc_at(str(path), path.stat().st_mtime_ns) for path in paths}


@lru_cache(64)
def crc_at(path, changed):
    return crc_of(path)


def compare_checksums(folder, known):
    """Errors: DataError where a file is not the one whose checksum is known."""
    found = checksums(folder, known)
    for name in [name for name in known if found.get(name) != known[name]]:
        fault = "damaged" if name in found else "missing"
        raise DataError(f"{Path(folder) / name}: {fault}, and the rest was made with it; restore it, or "
                        "train anew")


@contextlib.contextmanager
def locked(path, wait=True):
    """Hold the lock file `path` -> True; False if not wait and another process holds it. It is free when this
    process ends, however it ends. Where there are no file locks: goes on, and says so. Errors: DataError."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); choose a folder that can") from error
    with open(handle, "rb"):  # closes it
        acquired = True
        try:
            if fcntl is None:
                raise OSError("this system has none")
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            acquired = False
        except OSError as error:
            print(f"{path}: no file locks here ({error}); do not start the same work twice", file=sys.stderr)
        yield acquired


def guarded(main, *errors):
    """Run a script: DataError, errors, and what the system refuses end it with one sentence and status 2."""
    try:
        return main()
    except KeyboardInterrupt:
        sys.exit(130)
    except MemoryError as error:
        sentence = f"out of memory ({error or 'no more could be had'})"
    except OSError as error:
        sentence = f"{error.filename or 'a file'}: {error.strerror or error}"
    except (DataError, *errors) as error:
        sentence = str(error)
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)


# ---- reading -----------------------------------------------------------------------------------------------

class Record(NamedTuple):
    signal: np.ndarray  # (leads, N) float32 mV in the file's own order, NaN where a sample is marked invalid
    names: list         # of the leads, as written in the file
    fs: float           # Hz
    checksum_ok: bool   # False: not the header's checksum (looked at where all is read)


class Header(NamedTuple):
    fs: float       # frames a second; a lead has one sample a frame, or more
    samples: int    # frames
    segments: list  # (name, samples) of the records that make up this one; where it has none:
    files: list     # the leads of each signal file, a list of Lead


Lead = namedtuple("Lead", "file format frame skew offset gain baseline initial checksum name")  # gain: per mV
MAX_HEADER, MAX_LEADS = 2**20, 256  # bytes, and leads: more is no ECG, and must not eat the memory
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d{1,2})?", re.I)
RECORD_LINE = re.compile(r"[^\s/]+(/(?P<segments>\d{1,9}))?\s+(?P<leads>\d{1,9})"
                         r"(\s+(?P<fs>[^\s/(]+)[/(]?\S*(\s+(?P<samples>\d{1,15})(\s.*)?)?)?")
SIGNAL_LINE = re.compile(  # numbers: resolution, zero, first sample, checksum, block size
    r"(?P<file>\S+)\s+(?P<format>\d{1,4})(x(?P<frame>\d{1,5}))?(:(?P<skew>\d{1,9}))?(\+(?P<offset>\d{1,15}))?"
    r"(\s+(?P<gain>[^\s(/]+)(\((?P<baseline>[-+]?\d{1,15})\))?(/(?P<unit>\S+))?"
    r"(?P<numbers>(\s+[-+]?\d{1,15}(?!\S)){0,5})(\s+(?P<name>\S.*))?)?")
OURS = errno.ENOSPC, errno.EMFILE, errno.ENFILE, errno.ENOMEM  # what the system lacks is no fault of a record
ODD, ODD_RATE = "not readable by wfdb", "is not {} to {} Hz".format(*RATES)


def refuse(where, fault, detail=""):
    raise DataError(f"{where}: {fault}{detail and f' ({detail})'}", fault)


def read_record(path, part=None):
    """The WFDB record at path (without extension), in any format that wfdb reads -> Record.

    part(frames, Hz) -> (start, stop): what is read of it; the rest of its files is not looked at.
    Errors: DataError says what is wrong with it; OSError, MemoryError what the system lacks."""
    path = os.fspath(path)
    try:
        header = read_header(path)
        start, stop = part(header.samples, header.fs) if part else (0, header.samples)
        return (read_segments if header.segments else read_signals)(path, header, start, stop)
    except OSError as error:
        if error.errno in OURS:
            raise
        known = {FileNotFoundError: "file is missing", PermissionError: "file may not be read"}
        refuse(error.filename or path, known.get(type(error), error.strerror or str(error)))


def read_header(path):
    """path.hea -> Header, if it fits its signal files."""
    where = f"{path}.hea"
    with open_file(where) as file:
        raw = file.read(MAX_HEADER + 1)
    first, *lines = header_lines(raw.decode("utf-8-sig", "backslashreplace"))
    record = RECORD_LINE.fullmatch(first)
    if not record or len(raw) > MAX_HEADER:
        refuse(where, ODD, f"record line {first[:60]!r}" + LFS * first.startswith("version https://git-lfs"))
    segments, leads, samples = (int(record[name] or 0) for name in ("segments", "leads", "samples"))
    if not lines or len(lines) != (segments or leads) or len(lines) > MAX_LEADS and not segments:
        refuse(where, "wrong lead count", f"announces {segments or leads}, has {len(lines)}")
    rate = record["fs"] or "none is given"
    fault = ("is no number" if not NUMBER.fullmatch(rate) else "is zero" if not float(rate) else
             ODD_RATE if not 0 < float(rate) <= RATES[1] else None)
    if fault:
        refuse(where, f"sampling rate {fault}", rate)
    rate = float(rate)
    if segments:
        found = [re.fullmatch(r"(\S+)\s+(\d{1,15})", line) for line in lines]
        parts = [(segment[1], int(segment[2])) for segment in found if segment]
        total = sum(length for _, length in parts)
        if None in found or samples not in (0, total):
            refuse(where, ODD, "its segments are not those that it announces")
        return Header(rate, total, parts, [])
    leads = [parse_lead(path, line, rate) for line in lines]
    files = [list(group) for _, group in groupby(leads, lambda lead: (lead.file, lead.format, lead.offset))]
    return Header(rate, measure(path, files, samples), [], files)


def header_lines(text):
    """Of a header: its record line, and one for each lead or segment."""
    lines = [line.strip() for line in re.split(r"[\r\n]", text)]
    return [line for line in lines if line and not line.startswith("#")] or ["(empty)"]


def named_in(text):
    """What a header names: signal files, and the records that this one is made of, two sets."""
    first, *lines = header_lines(text)
    record, names = RECORD_LINE.fullmatch(first), {line.split()[0] for line in lines}
    return (set(), names) if record and record["segments"] else (names, set())


def parse_lead(path, line, fs):
    """A signal line of path.hea -> Lead. Errors: DataError."""
    found, where = SIGNAL_LINE.fullmatch(line), f"{path}.hea"
    numbers = [int(number) for number in (found and found["numbers"] or "").split()]
    if not found or found["name"] and len(numbers) < 5 and lead_index(found["name"]) is None:
        refuse(where, ODD, f"signal line {line[:60]!r}")
    _, zero, initial, checksum, *_ = numbers + [None] * 4
    frame, skew, offset = int(found["frame"] or 1), int(found["skew"] or 0), int(found["offset"] or 0)
    gain, unit, name = found["gain"], found["unit"] or "mV", found["name"] or ""
    other = name and lead_index(name) is None  # a pressure, say: left out, whatever its unit and rate
    scale = 1.0 if other else MILLIVOLTS.get(unit.strip("[]()").lower())
    fault = ("no gain" if not gain else "gain is no number" if not NUMBER.fullmatch(gain) else
             "zero gain" if not float(gain) else f"unit {unit!r} is no voltage" if not scale else
             "skew is beyond all measure" if skew > fs else
             "samples per frame are beyond all measure" if frame > 1 and not 0 < frame * fs <= RATES[1] else
             f"sampling rate {ODD_RATE}" if not other and not RATES[0] <= frame * fs else None)
    if fault:
        refuse(where, fault, f"signal line {line[:60]!r}")
    return Lead(beside(path, found["file"]), found["format"], frame, skew, offset, float(gain) / scale,
                int(found["baseline"] or zero or 0), initial or 0, checksum, name)


def beside(path, name):
    """Path of a file that the header of a record at path names, in its folder or below. Errors: DataError."""
    if os.path.isabs(name) or ".." in re.split(r"[/\\]", name):
        refuse(f"{path}.hea", "names a file outside of its folder", name)
    return os.path.join(os.path.dirname(path), name)


def measure(path, files, samples):
    """Samples of a record, by the size of its files where the header does not say (0); else that must fit."""
    if len({leads[0].file for leads in files}) < len(files):
        refuse(f"{path}.hea", ODD, "the leads of a file are apart, or of two formats or offsets")
    for leads in files:
        name, width = leads[0].file, sum(lead.frame for lead in leads)
        with open_file(name) as file:
            room = file.seek(0, os.SEEK_END) - leads[0].offset
        frame = width * BYTES_PER_SAMPLE.get(leads[0].format, 0)  # bytes; 0: compressed
        samples = samples or (max(0, int(room / frame)) if frame else 0)
        if not samples:
            refuse(f"{path}.hea", "number of samples is unknown", f"it gives none, and {name} tells none")
        needed, text = int(samples * frame), f"{room} bytes, header: {samples} x {width} samples"
        if leads[0].format == "16" and room != needed:
            fault = "truncated" if room < needed else "longer than its header says"
            refuse(name, f"signal file is {fault}", text)
        if room < needed:
            refuse(path, ODD, f"{name} is truncated: {text}")
    return samples


def read_signals(path, header, start, stop):
    """A record without segments, from frame start to stop -> Record, as many samples of each lead as the
    finest of the twelve has. wfdb does not see the header: it takes some for damaged, and needs five times as
    long for it as for the signals; nor the skew, of which it knows one a file."""
    signal, names, ok, every = [], [], True, sum(header.files, [])
    finest = max([lead.frame for lead in every if lead_index(lead.name) is not None], default=1)
    for leads in header.files:
        each, kind = Lead(*map(list, zip(*leads))), leads[0].format  # each: lists of the leads' fields
        skip = start if kind == "8" else 0  # sums of differences: read from the beginning
        end = min(stop + max(each.skew), header.samples)
        try:
            rows = _rd_dat_signals(os.path.abspath(each.file[0]), "", None, kind, len(leads), header.samples,
                                   each.offset[0], each.frame, [0] * len(leads), each.initial, start - skip,
                                   end)
        except MemoryError:
            raise
        except Exception as error:  # wfdb fails in many ways on damaged files
            text = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise DataError(f"{path}: {ODD} ({text})", ODD) from error
        for lead, row in zip(leads, rows):
            values = (row.astype(float) - lead.baseline) / lead.gain
            values[row == INVALID_SAMPLE_VALUE[kind]] = np.nan
            values = np.pad(values.reshape(-1, lead.frame), ((0, lead.skew), (0, 0)), constant_values=np.nan)
            values = values[skip + lead.skew:][:stop - start]  # (frames, samples)
            signal.append(values.repeat(finest).reshape(-1, lead.frame).mean(1))
            names.append(lead.name)
            if lead.checksum is not None and not lead.skew and stop - start == header.samples:
                ok = ok and (row.sum(dtype=np.int64) - lead.checksum) % 65536 == 0
    with np.errstate(over="ignore"):  # what is beyond float32 is no voltage, and counts as invalid
        return Record(np.array(signal, np.float32), names, header.fs * finest, ok)


def read_segments(path, header, start, stop):
    """Records that follow one another, from start to stop -> Record; NaN where a lead is in none of them."""
    where, found, end = f"{path}.hea", [], 0
    for name, length in header.segments:
        first, last = max(start - end, 0), min(stop - end, length)
        if first < last and name != "~":  # ~: a gap
            segment = read_header(beside(path, name))
            if segment.segments:
                refuse(where, ODD, f"segment {name} has segments of its own")
            if (segment.fs, segment.samples) != (header.fs, length):
                refuse(where, ODD, f"segment {name} has another rate or length than announced")
            record = read_signals(beside(path, name), segment, first, last)
            found.append((slice(end + first - start, end + last - start), record))
        end += length
    names = list(dict.fromkeys(name for _, record in found for name in record.names))
    twice = any(len(set(record.names)) < len(record.names) for _, record in found)
    if twice or not 0 < len(names) <= MAX_LEADS:
        refuse(where, "a lead occurs twice" if twice else ODD, f"{len(names)} leads in all segments")
    fs = found[0][1].fs
    if any(record.fs != fs for _, record in found):
        refuse(where, ODD, "its segments have different numbers of samples a frame")
    finest = round(fs / header.fs)
    signal = np.full((len(names), (stop - start) * finest), np.nan, np.float32)
    for place, record in found:
        place = slice(place.start * finest, place.stop * finest)
        signal[[names.index(name) for name in record.names], place] = record.signal
    return Record(signal, names, fs, all(record.checksum_ok for _, record in found))


@lru_cache(4096)
def lead_index(name):
    """Place in LEADS of a lead by its name, whatever case and prefix ("Lead I", "MDC_ECG_LEAD_AVR")."""
    name = str(name).strip(" '\"").upper().removeprefix("MDC_ECG_LEAD_")
    return LEAD_INDEX.get(re.sub(r"^((ECG|EKG|LEAD)[\s_:.-]+)+", "", name))


def to_twelve(record):
    """Leads by name, whatever case and order -> signal (12, N), zeros where missing, and present (12,) bool.

    Other leads are left out. Missing limb leads are not derived from others: what is stored was recorded."""
    index = [lead_index(name) for name in record.names]
    known = [i for i in index if i is not None]
    if not known or len(set(known)) < len(known):
        fault = "a lead occurs twice" if known else "none of the twelve leads"
        raise DataError(f"{fault}: {', '.join(map(str, record.names))}", fault)
    signal, present = np.zeros((12, record.signal.shape[1]), np.float32), np.zeros(12, bool)
    signal[known], present[known] = record.signal[[i is not None for i in index]], True
    return signal, present


def repair(signal, present, fs):
    """Interpolate gaps (NaN, Inf) up to MAX_GAP, zero longer ones -> signal (12, N), usable (12,), zeroed.

    A lead that is flat or has less than MIN_SECONDS of valid signal becomes zeros and not usable, like a
    missing one. A record is refused if more than half of its leads have that little, or all are flat."""
    bad, time = ~np.isfinite(signal), np.arange(signal.shape[1])
    signal, long = np.where(bad, 0, signal), np.zeros_like(bad)
    for lead in np.flatnonzero(bad.any(1) & ~bad.all(1)):
        signal[lead] = np.interp(time, time[~bad[lead]], signal[lead, ~bad[lead]])
    leads, edges = np.nonzero(np.diff(bad, prepend=False, append=False))
    for lead, start, stop in zip(leads[::2], edges[::2], edges[1::2]):
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


def shift(signal, step):
    """Move a signal (..., N) by a number of samples, in place; zeros move in."""
    signal[...] = np.roll(signal, step, -1)
    signal[..., slice(0, step) if step >= 0 else slice(step, None)] = 0


def microvolts(signal, samples):
    """mV (12, N) -> microvolts (12, samples) int16, cut or zero-padded at the end; number of clipped."""
    signal = np.rint(signal[:, :samples] * 1000)
    ecg = np.zeros((12, samples), "<i2")
    ecg[:, :signal.shape[1]] = np.clip(signal, -32767, 32767)
    return ecg, int((abs(signal) > 32767).sum())


def load_record(path, rate, crop="first", read=read_record):
    """A record as a store keeps it: microvolts (12, SECONDS * rate) int16, usable (12,), {note: amount}."""
    def part(samples, fs):
        seconds, middle = CROPS[crop]
        length = min(samples, round(seconds * fs))
        start = (samples - length) // 2 if middle else 0
        return start, start + length

    record = read(path, part)
    try:
        signal, present = to_twelve(record)
        signal, usable, zeroed = repair(signal, present, record.fs)
    except DataError as error:
        raise DataError(f"{path}: {error}", error.reason) from error
    ratio = (rate / Fraction(str(record.fs))).limit_denominator(10000)  # exact for all but freakish rates
    if ratio != 1:  # padtype: with zeros assumed outside, a baseline offset would ring at both ends
        signal = resample_poly(signal, ratio.numerator, ratio.denominator, axis=1, padtype="line")
    ecg, clipped = microvolts(signal, SECONDS * rate)
    notes = {"samples of long gaps zeroed": zeroed, "samples clipped at 32.767 mV": clipped,
             "leads missing": int((~present).sum()),
             "leads flat or mostly invalid": int((present & ~usable).sum()),
             "checksum in the header is wrong": int(not record.checksum_ok)}
    return ecg, usable, {text: amount for text, amount in notes.items() if amount}


def load_signals(signals, fs, leads, rate):
    """A WFDB record's path, or an array (L, N) in mV at fs Hz with the names of its L leads; or a list of
    such, or an array (B, L, N) -> (B, 12, N) float32 mV as a store keeps them. Errors: DataError."""
    several = isinstance(signals, (list, tuple)) or getattr(signals, "ndim", 0) == 3
    found = [load_record(os.fspath(one).removesuffix(".hea"), rate) if isinstance(one, (str, os.PathLike))
             else load_record("the array", rate, read=of_array(one, fs, leads))
             for one in (signals if several else [signals])]
    if not found:
        raise DataError("there is no signal: the list is empty")
    return np.stack([ecg for ecg, *_ in found]) / np.float32(1000)


def of_array(signal, fs, leads):
    """An array as load_record reads it. Errors: DataError."""
    try:
        leads, x = list(leads), np.atleast_1d(signal)
        if x.dtype.kind not in "fiu":
            raise TypeError(f"{x.dtype} is no kind of number")
        x = np.where(np.ma.getmaskarray(signal), np.nan, x).astype(np.float32)
    except (TypeError, ValueError, RuntimeError) as error:  # what numpy makes no array of
        raise DataError(f"{type(signal).__name__}: no path of a WFDB record, no array (leads, samples) with "
                        f"the names of its leads, and no list of such ({error})") from error
    (low, high), known = RATES, isinstance(fs, (int, float, np.number))
    unknown, largest = [str(lead) for lead in leads if lead_index(lead) is None], abs(x).max(initial=0)
    for wrong, fault in (
            (not known or not low <= fs <= high, f"fs is {fs!r}: it must be the rate, {low} to {high} Hz"),
            (x.ndim != 2 or len(x) != len(leads), f"it must be ({len(leads)}, samples), a row for each of "
             f"{', '.join(map(str, leads))}"),
            (unknown, f"unknown leads {', '.join(unknown)}; known are {', '.join(LEADS)}"),
            (known and x.shape[-1] < MIN_SECONDS * fs, f"too short: it must have {MIN_SECONDS:g} s"),
            (not np.isfinite(x).all(), "it holds NaN or infinity: interpolate, or cut it off"),
            (not 0.05 < largest < 32, f"its largest value is {largest:g}: it must be in mV")):
        if wrong:
            raise DataError(f"array {x.shape}: {fault}")
    return lambda path, part: Record(x[:, slice(*part(x.shape[1], fs))], list(leads), fs, True)


# ---- the store ---------------------------------------------------------------------------------------------

FORMAT = ["ecg-language store", 5]  # name and version
CHUNK = 256  # records of a task: what is written at once, and what the simulator draws at once
COLUMNS = ("id", "patient", "split", "fold", "statements", "report", "codes", "source", "leads",
           "features", "peaks", "age", "sex")  # years and F or M, "" where unknown
JSON_COLUMNS = ("statements", "codes", "features", "peaks")
SPLITS = "train", "val", "test", "unused"
DTYPES = {"u8": "u1", "i16": "<i2", "i32": "<i4", "i64": "<i8"}  # of a file, by the end of its name
AGAIN = "delete it and prepare the data set again"
STRANGE = "label codes that prompts.json does not know, so that no label set counts them"
ZERO = "labels of likelihood 0, which count as present, as in PTB-XL (not known): leave out what is absent"
UNFINISHED = "preparing it did not finish; run the same prepare command again"
Part = namedtuple("Part", "spec first records share")  # one of the data sets of a run: see Stores


class Store:
    """A prepared data set, read-only. It reads its files when they are used and holds none of them, so that
    800,000 records open at once and a Store is small to send. rows: row numbers, (B,)."""

    def __init__(self, path, verify=False):
        self.path, self.meta = str(path), read_state(str(path))
        self.rate, self.samples = self.meta["rate"], self.meta["samples"]
        self.parts = [Part(f"store:{path}", 0, len(self), 1)]
        self.verify(content=verify)
        self.verify(*self.meta["files"].keys() - {"ecg.i16", "records.csv"})

    def verify(self, *names, content=True):
        """Are files (all, if none is named) of the size, and is their content (0.4 s a GB), what was written?
        Errors: DataError."""
        for name in names or self.meta["files"]:
            file, (size, crc) = os.path.join(self.path, name), self.meta["files"][name]
            try:
                right = os.path.getsize(file) == size and (not content or crc_of(file) == crc)
                fault = None if right else f"not the {size} bytes that were written"
            except OSError as error:
                fault = error.strerror
            if fault:
                raise DataError(f"{file}: damaged ({fault}); {AGAIN}")

    def __len__(self):
        return self.meta["files"]["split.u8"][0]  # a byte each

    def __getstate__(self):  # small to send
        return {name: value for name, value in vars(self).items() if name not in ("records", "tags")}

    def sources(self):
        """What its records come from: keys of SOURCES, each once, in order."""
        return [self.meta["settings"]["source"]]

    def set_of(self, rows):
        """The place in parts of each row, (B,)."""
        return np.searchsorted([part.first for part in self.parts], rows, "right") - 1

    @cached_property
    def records(self):
        """DataFrame of COLUMNS, JSON_COLUMNS parsed, fold 0 where there is none; leads: a character each, 0
        where the stored lead is zeros as it was missing, flat or mostly invalid. Errors: DataError."""
        self.verify("records.csv")
        records = read_records(self.path)
        for column in JSON_COLUMNS:
            records[column] = [json.loads(text) for text in records[column]]
        records["fold"] = records["fold"].replace("", "0").astype(int)
        return records

    @cached_property
    def tags(self):
        """Tags: the statements of every record."""
        return Tags.read(self.path)

    def ids(self, rows):
        """Names of records, a list."""
        return self.records["id"].iloc[rows].tolist()

    def rows(self, split):
        """Row numbers of a split, a key of SPLITS, ascending."""
        return np.flatnonzero(mapped(self.path, "split.u8") == SPLITS.index(split))

    def peaks(self, rows):
        """R peaks in samples, (B, K) int32: -1 behind the last; K is 1 or more."""
        values, offsets = mapped(self.path, "peaks.i32"), mapped(self.path, "peaks.i64")
        rows = np.arange(len(self))[rows]
        start, stop = offsets[rows, None], offsets[rows + 1, None]
        places = start + np.arange((stop - start).max(initial=1))
        peaks = np.full(places.shape, -1, np.int32)
        peaks[places < stop] = values[places[places < stop]]
        return peaks

    def microvolts(self, rows, out=None):
        """Signals as they are stored, int16 (B, 12, samples), in `out` if given. Errors: DataError."""
        rows = np.arange(len(self))[rows]
        signals = np.empty((len(rows), 12, self.samples), DTYPES["i16"]) if out is None else out
        with open(os.path.join(self.path, "ecg.i16"), "rb", buffering=0) as file:  # faster than mapped
            for row, signal in zip(rows.tolist(), signals):
                file.seek(row * signal.nbytes)
                if file.readinto(signal) != signal.nbytes:
                    raise DataError(f"{file.name}: damaged (it ends in record {row}); {AGAIN}")
        return signals

    def ecg(self, rows):
        """float32 mV (B, 12, samples)."""
        return self.microvolts(rows) / np.float32(1000)


class Stores(Store):
    """Several stores as one, their rows one behind the other. parts: of each its spec, first row, number of
    records, and share (see epoch_rows). Errors: DataError."""

    def __init__(self, specs, stores, shares):
        self.stores, self.path = stores, ",".join(specs)
        self.rate, self.samples = stores[0].rate, stores[0].samples
        first = np.cumsum([0, *map(len, stores)]).tolist()
        self.parts = list(map(Part, specs, first, map(len, stores), shares))
        plans = [store.meta["plan"] for store in stores]
        plan = hashlib.sha256(json.dumps(plans).encode()).hexdigest()
        self.meta = {"plan": plan, "leads": stores[0].meta["leads"]}
        for number, (spec, store) in enumerate(zip(specs, stores)):
            if store.rate != self.rate:
                raise DataError(f"{specs[0]} is at {self.rate} Hz, {spec} at {store.rate}; ask for one rate")
            if plans[number] in plans[:number]:
                other = specs[plans.index(plans[number])]
                raise DataError(f"{spec}: the same records as {other}; to draw them twice an epoch, say *2")

    def __len__(self):
        return sum(map(len, self.stores))

    def verify(self):
        for store in self.stores:
            store.verify()

    def sources(self):
        return list(dict.fromkeys(source for store in self.stores for source in store.sources()))

    def split_rows(self, rows):
        """Of every store that has some of the rows: their places among them, the store, its rows."""
        sets = self.set_of(rows := np.arange(len(self))[rows])
        for number in np.unique(sets):
            places = np.flatnonzero(sets == number)
            yield places, self.stores[number], rows[places] - self.parts[number].first

    @cached_property
    def records(self):
        return pd.concat([store.records for store in self.stores], ignore_index=True)

    @cached_property
    def tags(self):
        return Tags.join([store.tags for store in self.stores])

    def rows(self, split):
        pairs = zip(self.parts, self.stores)
        return np.concatenate([part.first + store.rows(split) for part, store in pairs])

    def peaks(self, rows):
        found = [(places, store.peaks(own)) for places, store, own in self.split_rows(rows)]
        peaks = np.full((len(rows), max([part.shape[1] for _, part in found], default=1)), -1, np.int32)
        for places, part in found:
            peaks[places, :part.shape[1]] = part
        return peaks

    def microvolts(self, rows, out=None):
        signals = np.empty((len(rows), 12, self.samples), DTYPES["i16"]) if out is None else out
        for places, store, own in self.split_rows(rows):
            store.microvolts(own, [signals[place] for place in places])
        return signals


def epoch_rows(store, rng, rows=None):
    """Rows that an epoch learns from, of those in `rows` [all training records], not shuffled. A part's share
    says how many times as many as its own are drawn (rounded, at least one): with 2.5 every record twice, and
    a random half of them, another one every epoch, a third time."""
    rows, drawn = store.rows("train") if rows is None else np.asarray(rows), []
    sets = store.set_of(rows)
    for number, part in enumerate(store.parts):
        own = rows[sets == number]
        wanted = max(round(part.share * len(own)), min(len(own), 1))
        whole, rest = divmod(wanted, max(len(own), 1))
        drawn += [np.tile(own, whole), rng.permutation(own)[:rest]]
    return np.concatenate(drawn)


class Tags:
    """Statements of records, each a list of strings: tags[row]. table: the distinct ones; numbers (int32):
    places in it, of one record behind the other; offsets (int64, records + 1): where each begins."""

    def __init__(self, table, numbers, offsets, folder=None):
        self.table, self.numbers, self.offsets, self.folder = table, numbers, offsets, folder

    @classmethod
    def from_lists(cls, lists):
        """Tags of lists of strings."""
        table = {}
        packed = pack([table.setdefault(text, len(table)) for text in one] for one in lists)
        return cls(list(table), *packed)

    @classmethod
    def join(cls, parts):
        """Tags of several, one behind the other, with one table."""
        table, numbers, offsets = {}, [], [np.zeros(1, DTYPES["i64"])]
        for tags in parts:
            places = [table.setdefault(text, len(table)) for text in tags.table]
            numbers.append(np.array(places, DTYPES["i32"])[tags.numbers])
            offsets.append(offsets[-1][-1] + tags.offsets[1:])
        return cls(list(table), np.concatenate(numbers), np.concatenate(offsets))

    @classmethod
    def read(cls, folder):
        """Tags of a store, as index wrote them."""
        table = json.loads(read_text(os.path.join(folder, "statements.json")))
        return cls(table, mapped(folder, "statements.i32"), mapped(folder, "statements.i64"), folder)

    def __reduce__(self):  # another process maps the files, too
        if self.folder:
            return Tags.read, (self.folder,)
        return Tags, (self.table, self.numbers, self.offsets)

    def __len__(self):
        return len(self.offsets) - 1

    def numbers_of(self, row):
        """Places in the table of a record's statements, (N,) int32."""
        row = range(len(self))[row]  # an IndexError where there is none
        return self.numbers[self.offsets[row]:self.offsets[row + 1]]

    def __getitem__(self, row):
        return [self.table[number] for number in self.numbers_of(row).tolist()]


def pack(lists):
    """Lists of whole numbers, one behind the other: all (int32); where each begins, and the end (int64)."""
    numbers, offsets = array("i"), array("q", [0])
    for one in lists:
        numbers.extend(one)
        offsets.append(len(numbers))
    return np.array(numbers, DTYPES["i32"]), np.array(offsets, DTYPES["i64"])


def mapped(folder, name):
    """The numbers in a file, memory-mapped, read-only."""
    path, dtype = os.path.join(folder, name), DTYPES[name.rpartition(".")[2]]
    return np.asarray(np.memmap(path, dtype, "r")) if os.path.getsize(path) else np.zeros(0, dtype)


def read_records(folder, columns=None):
    """Columns of records.csv [all], DataFrame of strings."""
    name = os.path.join(folder, "records.csv")
    return pd.read_csv(name, dtype=str, keep_default_na=False, usecols=columns)


def index(folder):
    """What training reads of records.csv, as numbers -> {file: bytes}. split.u8: places in SPLITS; peaks.i32
    and .i64: see pack; statements.i32, .i64 and .json: the numbers, offsets and table of Tags."""
    records = read_records(folder, ["split", "statements", "peaks"])
    tags = Tags.from_lists(map(json.loads, records["statements"]))
    peaks, first = pack(map(json.loads, records["peaks"]))
    arrays = {"split.u8": np.array([SPLITS.index(split) for split in records["split"]], DTYPES["u8"]),
              "peaks.i32": peaks, "peaks.i64": first, "statements.i32": tags.numbers,
              "statements.i64": tags.offsets}
    table = json.dumps(tags.table, ensure_ascii=False).encode()
    return {name: values.tobytes() for name, values in arrays.items()} | {"statements.json": table}


def crc_of(name):
    """Checksum of a file, read in pieces: mapped, it would count as memory of this process."""
    crc = 0
    with open(name, "rb", buffering=0) as file:
        while piece := file.read(2**20):
            crc = zlib.crc32(piece, crc)
    return crc


def checksum(state):
    return zlib.crc32(json.dumps(state, sort_keys=True).encode())


def write_state(folder, state):
    """Replace store.json in one step: after a crash it is the old one or the new one."""
    text = json.dumps(state | {"checksum": checksum(state)}, indent=1)
    write_text(os.path.join(folder, "store.json"), text)


def read_state(folder, finished=True):
    """store.json of a store, or of one in the making. Errors: DataError."""
    name = os.path.join(folder, "store.json")
    try:
        state = read_json(name)
    except DataError as error:
        advice = AGAIN if os.path.lexists(name) else "make one with python data.py prepare SOURCE SRC DST"
        fault = UNFINISHED if os.path.isdir(folder + ".partial") else f"no store ({error}); {advice}"
        raise DataError(f"{folder}: {fault}") from error
    if state.get("format") != FORMAT:
        raise DataError(f"{name}: not of a store of version {FORMAT[1]}; {AGAIN}")
    if finished and state.get("complete") is False:
        raise DataError(f"{folder}: {UNFINISHED}")
    if state.pop("checksum", None) != checksum(state):
        raise DataError(f"{name}: damaged (its content is not what was written); {AGAIN}")
    return state


def open_data(spec, rate=100, cache=None, **options):
    """Store of "ptbxl:DIR", "mimic:DIR", "csv:FILE", "cpsc2018:DIR", "csn:DIR", "georgia:DIR", "wfdb:DIR",
    "code:DIR", "simulated", "simulated:N", "store:DIR".

    All but a store are prepared on first use into `cache`, or $ECG_CACHE, or ~/.cache/ecg-language.
    rate: Hz; None: the store's own, or 100. options: of prepare. Errors: DataError."""
    source, _, src = spec.partition(":")
    src = os.path.expanduser(src)
    if source == "store":
        store = Store(src)
        if rate not in (None, store.rate):
            raise DataError(f"{src}: holds records at {store.rate} Hz, not {rate}; "
                            "prepare another or ask for its rate")
        return store
    rate = 100 if rate is None else rate
    key = json.dumps(settings_of(source, src, rate, **options))
    cache = cache or os.environ.get("ECG_CACHE") or os.path.expanduser("~/.cache/ecg-language")
    with contextlib.suppress(OSError):  # told where something is to be written
        os.makedirs(cache, 0o700, exist_ok=True)  # ours alone: csrc keeps a library there
    dst = os.path.join(cache, f"{source}-{rate}hz-{hashlib.sha256(key.encode()).hexdigest()[:10]}")
    if not os.path.exists(dst):
        print(f"preparing {spec} at {rate} Hz, this once, into {dst}", file=sys.stderr)
    return prepare(source, src, dst, rate, **options)


def open_all(text, rate=100, **options):
    """Store of a data spec, or Stores of several with commas between (see split_specs), each with *SHARE
    behind it, if it is not to be drawn once an epoch. rate, options, errors: of open_data."""
    if not (found := split_specs(text)):
        raise DataError("no data are named: say which, by --data SOURCE:PATH")
    specs, shares = zip(*map(split_share, found))
    stores = [open_data(spec, rate, **options) for spec in specs]
    if shares == (1,):
        stores[0].parts = [stores[0].parts[0]._replace(spec=specs[0])]
        return stores[0]
    return Stores(specs, stores, shares)


def settings_of(source, src, rate, crop="first", min_words=0, seed=0):
    """All that shapes a store beside the data, what reads or simulates them included. Errors: DataError."""
    src = str(src or SIMULATED if source == "simulated" else src)
    right = all(type(n) is int and n >= 0 for n in (rate, min_words, seed)) and 100 <= rate <= 1000
    number = source != "simulated" or re.fullmatch("[0-9]{1,12}", src)
    if source not in SOURCES or not src or crop not in CROPS or not number or not right:
        asked = f"{source}:{src}, {rate} Hz, crop {crop}, min_words {min_words}, seed {seed}"
        raise DataError(f"no such data: {asked}; sources are {', '.join(SOURCES)} (and a number of records), "
                        f"crops {', '.join(CROPS)}, rates 100 to 1000 Hz, all whole numbers")
    return dict(version=FORMAT[1], source=source, src=src if source == "simulated" else os.path.abspath(src),
                rate=rate, crop=crop, min_words=min_words, seed=seed, maker=maker(source))


def prepare(source, src, dst, rate=100, workers=None, **options):
    """Make the store dst, or go on where a killed run stopped, or check the one that is there -> Store.

    source: a key of SOURCES; options: crop, a key of CROPS; min_words of a MIMIC report (MERL: 4); seed of
    the simulator. A second process that prepares dst waits for the first. Errors: DataError."""
    dst, settings = os.path.realpath(dst), settings_of(source, src, rate, **options)
    plan, total, usable = survey(settings)
    if workers is not None and workers < 1:
        raise DataError(f"{workers} workers cannot prepare anything; name 1 or more")
    # starting a worker costs as much as a thousand records at 100 Hz
    workers = workers or min(os.cpu_count(), 1 + usable * rate // 100_000)
    vacant = lambda: not os.path.lexists(dst) or os.path.isdir(dst) and not os.listdir(dst)
    try:
        if vacant():
            if os.path.ismount(dst):
                raise DataError(f"{dst}: a volume is mounted here; name a folder inside of it")
            os.makedirs(os.path.dirname(dst), exist_ok=True)
            if getattr(multiprocessing.current_process(), "_inheriting", False):  # it would wait for ever
                raise DataError("this script prepares data while it is imported, and so does each of its "
                                "workers: put what it does under if __name__ == \"__main__\":")
            with locked(dst + ".lock"):  # a second process waits here
                if vacant():
                    build(settings, plan, total, dst, workers)
                    with contextlib.suppress(OSError):
                        os.unlink(dst + ".lock")  # whoever waits for it, or comes later, finds dst
        elif not os.path.lexists(os.path.join(dst, "store.json")):
            raise DataError(f"{dst}: is there already and holds no store; choose another name")
    except BrokenExecutor as error:
        raise DataError(f"{dst}: a process that read records was killed, for want of memory, it seems; "
                        "the same command goes on from there, --workers 1 needs less") from error
    except OSError as error:
        fault = f"{error.filename or ''} {error.strerror or error}".strip()
        raise DataError(f"{dst}: cannot be written ({fault}); free space or choose another folder (for the "
                        "cache by ECG_CACHE); the same command goes on where it stopped") from error
    store = Store(dst)
    if store.meta["plan"] != plan:
        raise DataError(f"{dst}: made of {source}:{src} with other settings, by other code or from other "
                        f"records; {AGAIN}")
    return store


def survey(settings):
    """A cheap pass over the source -> a checksum of what is prepared and how, number of rows, of usable ones.

    Of a row everything counts, and size and time of change of the files that it is read from."""
    digest, total, usable = hashlib.sha256(json.dumps(settings).encode()), 0, 0
    if settings["source"] == "simulated":  # the settings say all
        return digest.hexdigest(), int(settings["src"]), int(settings["src"])
    for row in SOURCES[settings["source"]](settings):
        found = stamps(row["path"], settings["source"]) if "path" in row else []
        digest.update(json.dumps([row, found]).encode())
        total, usable = total + 1, usable + ("skip" not in row)
    return digest.hexdigest(), total, usable


def stamps(path, source):
    """Ending, size and time of change of what the WFDB record at path is read from: its header and the signal
    file of its name; of PTB-XL and MIMIC (800,000 headers) no more, else also what the header names."""
    found = []

    def note(*files):
        for file in files:
            with contextlib.suppress(OSError, ValueError):
                status = os.stat(file)
                found.append((file.removeprefix(path), status.st_size, status.st_mtime_ns))

    usual = lambda record: [record + suffix for suffix in (".hea", ".dat", ".mat")]
    note(*usual(path))
    if len(found) == 1 or source not in ("ptbxl", "mimic"):
        with contextlib.suppress(OSError, ValueError):  # whatever is wrong with it is said when it is read
            with open_file(f"{path}.hea") as file:
                files, segments = named_in(file.read(MAX_HEADER).decode("utf-8", "replace"))
            note(*sorted({beside(path, name) for name in files} - set(usual(path))))
            for name in sorted(segments):
                note(*usual(beside(path, name)))
    return found


def build(settings, plan, total, dst, workers):
    """Write dst.partial task by task, then rename it to dst.

    The data of a task is on disk before store.json gives its length: a run killed at any moment is continued
    by cutting the files to the lengths in store.json."""
    folder, source, samples = dst + ".partial", settings["source"], SECONDS * settings["rate"]
    header = (",".join(COLUMNS) + "\n").encode()
    state = dict(format=FORMAT, complete=False, plan=plan, rate=settings["rate"], samples=samples,
                 leads=LEADS, settings=settings, rows=0, dropped={}, warnings={},
                 files={"ecg.i16": [0, 0], "records.csv": [len(header), zlib.crc32(header)]})  # bytes, crc32
    os.makedirs(folder, exist_ok=True)
    if os.path.lexists(os.path.join(folder, "store.json")):
        state = read_state(folder, finished=False)
        if state["plan"] != plan:
            raise DataError(f"{folder}: left by a run with other settings, other code or records; {AGAIN}")
    else:
        Path(folder, "records.csv").write_bytes(header)
    size, free = (total - state["rows"]) * 24 * samples, shutil.disk_usage(folder).free
    if source == "simulated" and size > free:  # of other sources, not every row has a record
        text = f"{total} records need {size / 1e9:.1f} GB more, and {free / 1e9:.1f} GB are free"
        raise DataError(f"{folder}: {text}")
    for name, (size, crc) in state["files"].items():
        with open(os.path.join(folder, name), "ab") as file:
            file.truncate(size)
        if crc_of(file.name) != crc:
            raise DataError(f"{file.name}: damaged; delete {folder} and prepare the data set again")
    rows = islice(SOURCES[source](settings), state["rows"], None)
    tasks = iter(lambda: list(islice(rows, CHUNK)), [])
    with tqdm(total=total, initial=state["rows"], desc="preparing", unit=" records") as bar:
        for count, blocks, notes in in_order(partial(work, settings), tasks, workers):
            for name, block in blocks.items():
                with open(os.path.join(folder, name), "ab") as file:
                    file.write(block)
                    file.flush()
                    os.fsync(file.fileno())
                size, crc = state["files"][name]
                state["files"][name] = [size + len(block), zlib.crc32(block, crc)]
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
        faults = [f"{text}, e.g. {entry['examples'][0]}" for text, entry in state["dropped"].items()]
        raise DataError(f"{settings['src']}: no usable record; {'; '.join(faults) or 'the list is empty'}")
    for name, block in index(folder).items():  # anew, if a run was killed here
        write_atomic(os.path.join(folder, name), lambda temporary: Path(temporary).write_bytes(block))
        state["files"][name] = [len(block), zlib.crc32(block)]
    write_state(folder, state | dict(complete=True))
    os.replace(folder, dst)


def in_order(function, items, workers):
    """function(item) of every item, in order, in processes; at most 2 * workers results wait."""
    if workers == 1:
        yield from map(function, items)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, initializer=start_worker) as pool:
        waiting = deque(pool.submit(function, item) for item in islice(items, 2 * workers))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(function, item) for item in islice(items, 1))


def start_worker():
    """One thread, as there are as many workers as cores; and a worker whose parent is killed would wait for
    work for ever: leave with it."""
    threadpool_limits(1)

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=wait, daemon=True).start()


def work(settings, rows):
    """Rows of a source -> their number, {file: more bytes}, notes (dropped or warnings, text, amount, id)."""
    kept, signals, notes = [], [], []
    for row in rows:
        try:
            if "skip" in row:
                raise DataError(f"{row['id']}: {row['skip']}", row["skip"])
            load = LOADERS.get(settings["source"])
            ecg, usable, warnings = (load(settings, row) if load else
                                     load_record(row["path"], settings["rate"], settings["crop"]))
            if "statements" not in row:
                row["statements"] = translate(row["report"])
        except Exception as error:  # whatever it is, it is a fault of this record and not of the next
            if isinstance(error, MemoryError) or getattr(error, "errno", None) in OURS:
                raise
            if not isinstance(error, DataError):
                text = " ".join(f"{row.get('path', row['id'])}: {type(error).__name__}: {error}".split())
                error = DataError(text, f"not readable ({type(error).__name__})")
            notes.append(("dropped", error.reason, 1, str(error)))
            continue
        signals.append(ecg)
        kept.append(dict(features=[], leads="".join("01"[int(u)] for u in usable)) | row)
        notes += [("warnings", text, amount, row["id"]) for text, amount in warnings.items()]
        if strange := [code for code in row["codes"] if not finding_of(code, row["source"])]:
            notes.append(("warnings", STRANGE, len(strange), f"{row['id']}: {', '.join(strange)[:200]}"))
        if row["source"] == "csv" and (zero := [code for code, share in row["codes"].items() if not share]):
            notes.append(("warnings", ZERO, len(zero), f"{row['id']}: {', '.join(zero)[:200]}"))
    if kept and "peaks" not in kept[0]:  # the simulator knows them
        peaks, counts = segment_beats(np.stack(signals), settings["rate"])
        for row, places, count in zip(kept, peaks, counts):
            row["peaks"] = places[:count].tolist()
    table = pd.DataFrame(kept, columns=COLUMNS)
    for column in JSON_COLUMNS:
        table[column] = [json.dumps(value, ensure_ascii=False) for value in table[column]]
    lines = table.to_csv(header=False, index=False, quoting=csv.QUOTE_ALL, lineterminator="\n").encode()
    return len(rows), {"ecg.i16": b"".join(ecg.tobytes() for ecg in signals), "records.csv": lines}, notes


# ---- data sets ---------------------------------------------------------------------------------------------
# One generator each that reads no signal. It yields rows (id, path, patient, split, fold, report, codes,
# source, age and sex if known and, if they need no translation, statements); a row of no use has `skip`, why.

NOTHING = dict.fromkeys("nan NaN none None NONE null NULL <NA> NaT".split())  # written for an empty field


def read_csv(name, columns):
    """Rows of a csv as dictionaries of strings, one at a time (MIMIC: 800,035); columns: those it must have.

    Errors: DataError, in which line, where a row does not fit the columns: its fields would be others."""
    reader = None
    try:
        with open_file(name) as raw:
            reader = csv.reader(io.TextIOWrapper(raw, encoding="utf-8-sig", newline=""), strict=True)
            header = [column.strip() for column in next(reader, [])]
            if missing := [column for column in columns if column not in header]:
                marks = [mark for mark in ";\t|" if len(header) == 1 and mark in header[0]]
                raise DataError(f"{name}: has no column {missing[0]!r}; " + (
                    f"its columns are separated by {marks[0]!r}, not by commas" if marks else
                    f"its first line names {', '.join(header)[:200]!r}" if header else "it is empty"))
            if double := [column for column in header if column and header.count(column) > 1]:
                raise DataError(f"{name}: has two columns {double[0]!r}; take one out")
            for row in filter(None, reader):
                if len(row) != len(header):
                    fault = f"{len(row)} fields, but there are {len(header)} columns"
                    advice = "a text with commas needs quotes around it"
                    raise DataError(f"{name}, line {reader.line_num}: {fault}; {advice}")
                if "\0" in "".join(row):
                    raise csv.Error("holds zeros: UTF-16, or damaged; save it as UTF-8")
                yield dict(zip(header, ["" if field in NOTHING else field for field in row]))
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not in UTF-8 ({error}); save it as UTF-8") from error
    except csv.Error as error:
        fault = f"{error}; is a quote not closed, or not doubled?"
        raise DataError(f"{name}, line {reader.line_num}: {fault}") from error
    except OSError as error:
        advice = "is the data set there, in its published layout?"
        raise DataError(f"{name}: {error.strerror}; {advice}") from error


def without_zero(number):
    """An id that passed through a column of floats: '12345.0' -> '12345'."""
    head, _, tail = number.strip().partition(".")
    return head if head.isdigit() and not tail.strip("0") else number.strip()


def person(age, sex):
    """Age and sex as a store keeps them (text of a number of years; F or M), "" for what is neither."""
    known = NUMBER.fullmatch(age.strip()) and 0 <= float(age) <= 120
    return dict(age=f"{float(age):g}" if known else "",
                sex={"f": "F", "female": "F", "m": "M", "male": "M"}.get(sex.strip().lower(), ""))


def split_by(key, train, val):
    """train, val or test by a hash of the patient: the same everywhere, and no patient in two of them."""
    share = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") / 2**32
    return "train" if share < train else "val" if share < train + val else "test"


def once(source):
    """A source whose ids and paths count only the first time: one recording must not get into two splits."""
    @wraps(source)
    def rows(settings):
        seen = set()
        for row in source(settings):  # hashes: there may be 800,000
            keys = {hash(("id", row["id"]))}
            if "path" in row:
                keys.add(hash(os.path.normpath(row["path"])))
            yield {"id": row["id"], "skip": "occurs twice (its id or its waveform)"} if keys & seen else row
            seen |= keys
    return rows


@once
def ptbxl_rows(settings):
    """PTB-XL: folds 1-8 train, 9 val, 10 test. Up to 100 Hz its 100 Hz files; those of 500 Hz if absent."""
    src, found, damaged = settings["src"], False, None
    check_classes(os.path.join(src, "scp_statements.csv"))
    table = os.path.join(src, "ptbxl_database.csv")
    sizes = ("filename_lr", "filename_hr") if settings["rate"] <= 100 else ("filename_hr",)
    for line in read_csv(table, ("ecg_id", "patient_id", "report", "scp_codes", "strat_fold", *sizes)):
        row = dict(id=line["ecg_id"], report=line["report"], source="ptbxl")
        try:
            row |= dict(id=str(int(without_zero(line["ecg_id"]))), fold=int(without_zero(line["strat_fold"])),
                        patient=str(int(without_zero(line["patient_id"]))),
                        codes=check(ast.literal_eval(line["scp_codes"]), {str: float}, "scp_codes"))
            if not 1 <= row["fold"] <= 10:
                raise ValueError("strat_fold is not 1 to 10")
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
            damaged = damaged or f"{table}: the row of ecg_id {row['id']!r} is damaged ({error})"
            yield row | dict(skip="damaged row of ptbxl_database.csv")
            continue
        age, sex = (without_zero(line.get(column, "")) for column in ("age", "sex"))
        age = "90" if age == "300" else age  # what is over 89
        row |= person(age, {"0": "male", "1": "female"}.get(sex, ""))
        row["split"] = "train" if row["fold"] <= 8 else "val" if row["fold"] == 9 else "test"
        paths = (os.path.join(src, line[size].removesuffix(".hea")) for size in sizes)
        path = next((path for path in paths if os.path.exists(path + ".hea")), None)
        found = found or path
        yield row | (dict(path=path) if path else dict(skip="waveform is not in this copy of PTB-XL"))
    if not found:
        folder = "records100" if len(sizes) > 1 else "records500"
        raise DataError(damaged or f"{src}: holds none of the waveforms; download {folder} from "
                        "https://physionet.org/content/ptb-xl/ into it")


@once
def mimic_rows(settings):
    """MIMIC-IV-ECG 1.0: report_0..17 are the statements; patients 98 % train (as MELP), 1 % val, 1 % test."""
    src, least = settings["src"], settings["min_words"]
    listed = read_csv(os.path.join(src, "record_list.csv"), ("study_id", "path"))
    paths = {without_zero(line["study_id"]): line["path"].removesuffix(".hea") for line in listed}
    reports = [f"report_{i}" for i in range(18)]
    for line in read_csv(os.path.join(src, "machine_measurements.csv"), ("subject_id", "study_id", *reports)):
        study, patient = without_zero(line["study_id"]), without_zero(line["subject_id"])
        texts = [text for name in reports if (text := line[name].strip())]
        statements = [text for text in map(clean, texts) if WORD.search(text)]
        words = sum(len(text.split()) for text in statements)
        row = dict(id=study, patient=patient, split=split_by(patient, 0.98, 0.01), fold="", source="mimic",
                   codes={}, age="", sex="", report=". ".join(texts),
                   statements=list(dict.fromkeys(text.rstrip(" .") for text in statements)))
        skip = ("study_id or subject_id is empty" if not (study and patient) else
                "report is empty" if not words else
                f"report of fewer than {least} words" if words < least else
                None if paths.get(study) else "study is not in record_list.csv")
        yield row | (dict(skip=skip) if skip else dict(path=os.path.join(src, paths[study])))


def own_rows(settings):
    """A csv of one's own: record (a WFDB record, relative to the csv), report, and optionally patient, split,
    age (years), sex (F or M) and labels (codes separated by ; or a JSON list or {code: likelihood}). Without
    split, patients go 80/10/10 % by hash."""
    src, seen = settings["src"], set()
    for line in read_csv(src, ("record", "report")):
        if not seen:
            check_columns(src, line)
        record = line["record"].strip().removesuffix(".hea")
        path = os.path.join(os.path.dirname(src), record)
        patient = without_zero(line.get("patient", "")) or record
        split = line.get("split", "").strip() or split_by(patient, 0.8, 0.1)
        age, sex = line.get("age", ""), line.get("sex", "")
        details = person(age, sex)
        fault = ("has no name" if not record else "occurs twice" if os.path.normpath(path) in seen else
                 f"has split {split!r}, not train, val or test" if split not in ("train", "val", "test") else
                 f"has age {age!r}, which is no number of years" if age.strip() and not details["age"] else
                 f"has sex {sex!r}, which is neither F nor M" if sex.strip() and not details["sex"] else None)
        if fault:
            raise DataError(f"{src}: record {record} {fault}")
        seen.add(os.path.normpath(path))
        codes = labels_of(line.get("labels", "").strip(), f"{src}: labels of record {record}")
        yield dict(id=record, patient=patient, split=split, fold="", source="csv", codes=codes, path=path,
                   report=line["report"], statements=split_statements(line["report"]), **details)


def check_columns(src, columns):
    """Errors: DataError where one of ours seems to be meant by another name: it would not be read."""
    plain = lambda name: re.sub(r"[\W_]|id$|s$", "", name.lower())
    ours = {plain(name): name for name in ("patient", "split", "age", "sex", "labels")}
    for column in columns:
        if (name := ours.get(plain(column))) and name not in columns:
            raise DataError(f"{src}: column {column!r} is not read, and there is no {name!r}: is it that? "
                            "Rename it, or give it another name")


def labels_of(text, where):
    """'SR; NORM', '["SR"]' or '{"SR": 80}' -> {code: likelihood}. Errors: DataError."""
    if text[:1] not in ("[", "{"):
        return {code.strip(): 100.0 for code in text.split(";") if code.strip()}
    try:
        labels = parse_json(text, where)
        check(labels, [str] if isinstance(labels, list) else {str: float}, where)
        for code, likelihood in labels.items() if isinstance(labels, dict) else ():
            if not 0 <= likelihood <= 100:  # NaN is not, either
                raise DataError(f"{where}: the likelihood of {code}, {likelihood}, is not from 0 to 100")
    except DataError as error:
        advice = "write codes with ; between, or a JSON list of codes, or {code: likelihood}"
        raise DataError(f"{error}; {advice}") from error
    return labels if isinstance(labels, dict) else dict.fromkeys(labels, 100.0)


COMMENT = re.compile(r"(?:^|[\r\n])\s*#\s*(Dx|Age|Sex)\s*:([^\r\n]*)", re.I)
REFERENCE = dict(zip("123456789", ("Normal", "AF", "I-AVB", "LBBB", "RBBB", "PAC", "PVC", "STD", "STE")))


@once
def header_rows(settings):
    """WFDB records at any depth below a folder, with `#Dx:` (SNOMED numbers or acronyms), `#Age:`, `#Sex:` in
    the headers. Where there is no #Dx, a REFERENCE.csv (CPSC2018) in a folder above has the labels. Acronyms
    in a ConditionNames_SNOMED-CT.csv (CSN) become its numbers. Splits: see split_of."""
    root, source = Path(settings["src"]), settings["source"]
    files, listed, numbers, heads = sorted(root.rglob("*.*")), {}, {}, {}
    for path in files:
        if path.name == "REFERENCE.csv":
            columns = "Recording", "First_label", "Second_label", "Third_label"
            rows = ([line[column].strip() for column in columns] for line in read_csv(path, columns))
            listed |= {path.parent / name: list(filter(None, labels)) for name, *labels in rows}
        elif path.name.startswith("ConditionNames"):
            for line in read_csv(path, ("Snomed_CT",)):
                acronym = line.get("AcronymName") or line.get("Acronym Name") or ""
                numbers[acronym.strip()] = line["Snomed_CT"].strip()
    headers = [path for path in files if path.suffix == ".hea"]
    if not headers:
        raise DataError(f"{root}: holds no WFDB header (*.hea); is the data set there?")
    for path in headers:
        try:
            with open_file(path) as file:
                heads[path] = file.read(MAX_HEADER).decode("utf-8", "replace")
        except OSError:
            heads[path] = ""  # what is wrong with it is said when the record is read
    segments = {path.parent / name for path, head in heads.items() for name in named_in(head)[1]}
    for path, head in heads.items():
        if path.with_suffix("") in segments:
            yield dict(id=path.relative_to(root).as_posix(), skip="a segment of another record")
            continue
        comments = {key.lower(): value.strip() for key, value in COMMENT.findall(head)}
        codes = [code for part in comments.get("dx", "").split(",") if (code := part.strip())]
        if not codes:
            labels = next((listed[at] for folder in path.parents if (at := folder / path.stem) in listed), [])
            codes = [REFERENCE.get(without_zero(label)) for label in labels]
            if None in codes:
                refuse(root, f"REFERENCE.csv labels {path.stem} {', '.join(labels)}; they are 1 to 9")
        name = path.relative_to(root).with_suffix("").as_posix() if source == "wfdb" else path.stem
        yield dict(id=name, patient=name, split=split_of(source, name), fold="",
                   path=str(path.with_suffix("")), **person(comments.get("age", ""), comments.get("sex", "")),
                   **named([numbers.get(code, code) for code in codes], source))


def named(codes, source):
    """Columns of a record whose source gives codes and no report: its statements are names of findings."""
    keys = dict.fromkeys(finding_of(code, source) for code in codes)
    names = [knowledge()["findings"][key]["name"] for key in keys if key]
    return dict(source=source, codes=dict.fromkeys(codes, 100.0), statements=names, report=". ".join(names))


@lru_cache
def published_splits():
    """splits.json: of each data set a letter for every record number."""
    return read_json(os.path.join(HERE, "splits.json"), {str: str})


def split_of(source, name):
    """The published split of a record, or unused (CPSC2018, CSN); of other sources by hash, 70/10/20 %."""
    letters, number = published_splits().get(source), re.fullmatch(r"(?:A|JS)(\d{4,5})", name)
    if not letters:
        return split_by(name, 0.7, 0.1)
    letter = letters[int(number[1]) - 1:int(number[1])] if number else ""
    return {"t": "train", "v": "val", "x": "test"}.get(letter, "unused")


UNITS = {"mV": 1.0, "1e-4 V": 0.1, "V": 1000.0}  # that CODE-test's tracings may be in -> mV


def read_tracings(src, rows):
    """Number of CODE-test's tracings (4096 samples at 400 Hz, leads in the order of LEADS), and those of
    `rows` (..., samples, 12) float32. Errors: DataError."""
    name = os.path.join(src, "ecg_tracings.hdf5")
    try:
        import h5py
        open_file(name).close()  # a pipe would hang
        with h5py.File(name, "r") as file:
            tracings = file.get("tracings")
            if getattr(tracings, "shape", ())[2:] != (12,) or tracings.dtype.kind != "f":
                raise DataError(f"{name}: has no 'tracings' of numbers (records, samples, 12)")
            return len(tracings), tracings[rows].astype(np.float32)
    except ImportError as error:
        raise DataError(f"{name}: reading it needs h5py; pip install h5py") from error
    except (OSError, RuntimeError, KeyError) as error:  # HDF5 has many words for damage
        raise DataError(f"{name}: not readable ({' '.join(str(error).split())})") from error


def code_annotations(src):
    """The tables of CODE-test: {file without .csv: (N, 6) bool}, classes as in label set code_test, rows as
    tracings (a record's id is its row, from 0). Errors: DataError."""
    found, classes = {}, list(label_set("code_test"))
    for path in sorted(Path(src, "annotations").glob("*.csv")):
        rows = [[without_zero(line[c]) for c in classes] for line in read_csv(path, classes)]
        if strange := set().union(*rows) - {"0", "1"}:
            raise DataError(f"{path}: {min(strange)!r} is neither 0 nor 1")
        found[path.stem] = np.array(rows, int).reshape(-1, len(classes)).astype(bool)
    return found


def code_rows(settings):
    """CODE-test (Ribeiro et al. 2020), all test. Its authors name two units: the one by which the median QRS
    of the file is 0.5 to 3 mV high is taken, and told."""
    src, classes = settings["src"], list(label_set("code_test"))
    name, attributes = os.path.join(src, "ecg_tracings.hdf5"), os.path.join(src, "attributes.csv")
    count, some = read_tracings(src, slice(None, None, 8))
    with np.errstate(invalid="ignore"):  # numbers of a damaged file that are none
        heights = np.ptp(np.nan_to_num(some.astype(float), posinf=0, neginf=0), axis=1)
    height = np.median(heights[heights > 0]) if heights.any() else 0
    unit = next((unit for unit, factor in UNITS.items() if 0.5 <= height * factor <= 3), None)
    if not unit:
        refuse(name, f"a median QRS of {height:g} is 0.5 to 3 mV high in none of {', '.join(UNITS)}")
    gold = code_annotations(src).get("gold_standard", ())
    people = [dict(age="", sex="")] * count
    if os.path.exists(attributes):
        people = list(read_csv(attributes, ("age", "sex")))
    if not len(gold) == len(people) == count:
        refuse(name, f"{count} tracings, but annotations/gold_standard.csv has {len(gold)} rows and "
                     f"attributes.csv {len(people)}")
    for i, (row, details) in enumerate(zip(gold, people)):
        yield dict(id=str(i), patient=str(i), split="test", fold="", path=f"{name}#{i}", number=i, unit=unit,
                   changed=os.stat(name).st_mtime_ns, **person(details["age"], details["sex"]),
                   **named([c for c, on in zip(classes, row) if on], "code"))


def load_tracing(settings, row):
    """load_record of a tracing of CODE-test."""
    def read(path, part):
        _, tracing = read_tracings(settings["src"], row["number"])
        inside = np.flatnonzero(tracing.any(1))  # zeros at both ends are padding
        if not len(inside):
            refuse(path, "every lead is flat")
        tracing = tracing[inside[0]:inside[-1] + 1]
        return Record(tracing[slice(*part(len(tracing), 400))].T * UNITS[row["unit"]], LEADS, 400, True)

    ecg, usable, notes = load_record(row["path"], settings["rate"], settings["crop"], read)
    return ecg, usable, notes | {f"samples taken to be in {row['unit']}, by the height of the QRS": 1}


def simulated_rows(settings):
    for i in range(int(settings["src"])):
        name = f"{settings['seed']}-{i}"
        yield dict(id=name, patient=name, split=split_by(name, 0.8, 0.05), fold="", sex="",
                   source="simulated", number=i)


def load_simulated(settings, row):
    """Like load_record, and fills the row."""
    block, i = divmod(row["number"], CHUNK)
    ecg, peaks, row["codes"], row["features"], row["statements"], age = (
        part[i] for part in simulated_block(settings["seed"], block, settings["rate"]))
    row |= dict(peaks=[int(p) for p in peaks], report=". ".join(row["statements"]), age=f"{age:.0f}")
    ecg, clipped = microvolts(ecg, SECONDS * settings["rate"])
    return ecg, [True] * 12, {"samples clipped at 32.767 mV": clipped} if clipped else {}


HEADERS = "cpsc2018", "csn", "georgia", "wfdb"
SOURCES = {"ptbxl": ptbxl_rows, "mimic": mimic_rows, "csv": own_rows, "simulated": simulated_rows,
           **dict.fromkeys(HEADERS, header_rows), "code": code_rows}
LOADERS = {"simulated": load_simulated, "code": load_tracing}  # of sources that are no WFDB records
SPEC = "|".join([*SOURCES, "store"])


# ---- findings and label sets: always by name, never by position --------------------------------------------

# label sets of PTB-XL -> column of scp_statements.csv: class of a code, or flag of the codes that are classes
PTBXL_SETS = {"ptbxl_super": "diagnostic_class", "ptbxl_sub": "diagnostic_subclass", "ptbxl_form": "form",
              "ptbxl_rhythm": "rhythm", "ptbxl_diag": "diagnostic", "ptbxl_all": None}
OCCURRING = "simulated", "own"  # label sets of the findings that occur in the records
OWN = "csv", "wfdb"             # sources that label set "own" is of
LABEL_SETS = (*PTBXL_SETS, "cpsc2018", "csn", "csn_published", "georgia", "cinc2021", "code_test", *OCCURRING)

CLASS = {"name": str, "prompts": [str]}
COUNTED = {"findings": [str], "snomed": [str]}
FINDING = {"name": str, "also": [str], "snomed": [str], "features": [str]}
SCP = {"prompts": [str], "form": bool, "rhythm": bool, "diagnostic": bool,
       "diagnostic_class": (str, type(None)), "diagnostic_subclass": (str, type(None))}
KNOWLEDGE = {  # the shape of prompts.json
    "findings": {str: FINDING}, "codes": {str: {str: str}}, "transfer": {str: {str: {str: [str]}}},
    "question": [str],  # of --llm: lines of a text, {} is a report
    "label_sets": {name: (dict, list) if name in PTBXL_SETS else dict for name in LABEL_SETS
                   if name not in ("csn_published", *OCCURRING)},
    "simulator": {"wall": {str: [list]}, "zone": {str: str}, "drawn": {str: {str: [float]}}, "moves": [list],
                  "order": {str: [float]}, "turns": {str: [float]}, "always": {str: str},
                  "chances": {str: {str: float}}, "also": [list], "leads": {str: [int]}, "measured": [list],
                  "implied": {str: [str]}, "harmless": [str],
                  "recorders": [[float]]},
    "lexicon": {"common": [[str]], "rewrite": [[str]], "terms": [[str]], "negations": [str],
                "sites": {str: str},
                "statements": {str: str}, "prefix": {str: str}, "suffix": {str: str}, "join": {str: str},
                "drop": {str: str}}}


@lru_cache
def knowledge():
    """prompts.json: findings by SCP code or name, codes as the sources write them (-> SNOMED number or
    finding), label sets with their prompts, classes joined for transfer, lexicon, the simulator's tables, the
    question of --llm."""
    return read_knowledge(os.path.join(HERE, "prompts.json"))


def read_knowledge(path):
    """A file in the form of prompts.json, checked: people edit it. Errors: DataError, which entry.

    Every class gets "findings", those that it counts; one with "snomed" counts no other SNOMED numbers."""
    table = read_json(path, KNOWLEDGE, "git checkout prompts.json brings the published one back")
    findings, sets = table["findings"], table["label_sets"]
    scp = check({code: f for code, f in findings.items() if "prompts" in f}, {str: SCP}, f"{path}, findings")
    numbers = Counter(number for finding in findings.values() for number in finding["snomed"])
    for key, finding in findings.items():
        check_words(f"{path}, findings, {key}", finding)
        if twice := [number for number in finding["snomed"] if numbers[number] > 1]:
            refuse(f"{path}, findings, {key}", f"{twice[0]} is also of another finding")
    for name, classes in sets.items():
        where, members = f"{path}, label_sets, {name}", {}  # class -> SCP codes
        if name not in KNOWLEDGE["label_sets"]:
            refuse(where, f"no such label set; known are {', '.join(LABEL_SETS)}")
        check(classes, {str: CLASS} if isinstance(classes, dict) else [str], where)
        if name in PTBXL_SETS:
            for code, finding in scp.items():
                members.setdefault(class_in(name, code, finding), []).append(code)
            for code in (members.keys() - {None}) ^ set(classes):
                fault = "has no" if code in members else "has more than the classes of findings:"
                refuse(where, f"{fault} {code!r}")
        if isinstance(classes, list):
            sets[name] = classes = {c: {key: findings[c][key] for key in CLASS} for c in classes}
        for c, entry in classes.items():
            check(dict.fromkeys(COUNTED, []) | entry, COUNTED, f"{where}, {c}")
            check_words(f"{where}, {c}", entry)
            entry["findings"] = members.get(c, []) + entry.get("findings", [])
            if not entry["findings"] or set(entry["findings"]) - findings.keys():
                refuse(f"{where}, {c}", f"{entry['findings']} are no keys of findings")
    for name, words in table["codes"].items():
        for word, code in words.items():
            if code not in findings and code not in numbers:
                refuse(f"{path}, codes, {name}, {word}", f"{code!r} is of no finding")
    for a, others in table["transfer"].items():
        for b, joined in others.items():
            for name, classes in ((a, joined), (b, sum(joined.values(), []))):
                if strange := set(classes) - sets.get(name, {}).keys():
                    refuse(f"{path}, transfer, {a}, {b}", f"{name} has no class {min(strange)!r}")
    return table


def check_words(where, entry):
    """A class or finding must have words in its name, wordings and prompts. Errors: DataError."""
    texts = [entry["name"], *entry.get("also", ()), *(entry.get("prompts", ["x"]) or [""])]
    if not all(map(WORD.search, texts)):
        refuse(where, "a name or wording without a word, or no prompts")


def class_in(name, code, row):
    """Class of an SCP code in a label set of PTB-XL, or None. row: of scp_statements.csv, or a finding."""
    column = PTBXL_SETS[name]
    if name in ("ptbxl_super", "ptbxl_sub"):
        return row[column] or None
    return code if column is None or row[column] else None


def check_classes(name):
    """The classes in prompts.json must be those of the scp_statements.csv at hand."""
    columns = ("", "diagnostic", "form", "rhythm", "diagnostic_class", "diagnostic_subclass")
    published, ours = {line[""]: line for line in read_csv(name, columns)}, knowledge()["findings"]
    for code in sorted(published.keys() | knowledge()["label_sets"]["ptbxl_all"].keys()):
        if code not in published or code not in ours or any(
                class_in(s, code, published[code]) != class_in(s, code, ours[code]) for s in PTBXL_SETS):
            refuse(name, f"classes of {code} are not those in prompts.json; take the file of PTB-XL 1.0.1")


@lru_cache
def code_words():
    """Code in lower case -> finding: SNOMED numbers, SCP codes, what the sources write, names and wordings.
    Of a word with two meanings the first counts: AF is fibrillation (CSN's is flutter, see finding_of)."""
    findings = knowledge()["findings"]
    words = {number: key for key, finding in findings.items() for number in finding["snomed"]}
    words |= {key.lower(): key for key in findings}
    for codes in knowledge()["codes"].values():
        words = {word.lower(): words.get(code, code) for word, code in codes.items()} | words
    return {wording.lower(): key for wording, key in reversed(wordings())} | words


SUPERCLASSES = "cd", "sttc"  # of PTB-XL, which mean other things in other sources


@lru_cache(None)
def resolve(code, source=None):
    """A code as a source writes it -> its SNOMED number, or None; the key of its finding, or None."""
    code = " ".join(code.lower().split())
    if source == "csv" and code in SUPERCLASSES:
        return None, None
    own = {word.lower(): meaning.lower() for word, meaning in knowledge()["codes"].get(source, {}).items()}
    meaning = own.get(code, code)
    return next((c for c in (meaning, code) if c.isdigit()), None), code_words().get(meaning)


def finding_of(code, source=None):
    """Key in knowledge()["findings"] of an SCP code, SNOMED number, acronym, name or other wording, or None.

    source: where the code is from, as in a store: CPSC2018 and CSN use some in a sense of their own."""
    return resolve(code, source)[1]


def label_set(name, records=None):
    """{class: {"name", "prompts", "findings"}} of a label set: one of LABEL_SETS, or a file of one's own that
    ends in .json, {code: {"name", "prompts"}}. records: whose codes "own" and "simulated" have; without them
    all findings. Errors: DataError."""
    findings = knowledge()["findings"]
    if name.endswith(".json"):
        classes = read_json(name, {str: CLASS})
        for code, entry in classes.items():
            check_words(f"{name}, {code}", entry)
            entry["code"], entry["findings"] = code, [key for key in [finding_of(code)] if key]
        return classes
    if name not in LABEL_SETS:
        raise DataError(f"unknown label set {name!r}; known are {', '.join(LABEL_SETS)}, or a file NAME.json")
    if name not in OCCURRING:
        return knowledge()["label_sets"][name.removesuffix("_published")]
    keys = findings if records is None else sorted({
        key for source, codes in sourced(records) for code in codes if (key := finding_of(code, source))})
    words = {key: [findings[key]["name"], *findings[key]["also"][:2]] for key in keys}
    return {key: {"name": words[key][0], "prompts": words[key], "findings": [key]} for key in keys}


def class_prompts(name, classes, style, records=None):
    """One list of texts a class. style: descriptive (prompts.json), plain (class names), or a JSON file
    {code: text or [texts]}, such as the published ones. Errors: DataError, also where that lacks a class."""
    if style in ("plain", "descriptive"):
        table = label_set(name, records)
        return [[table[c]["name"].lower()] if style == "plain" else table[c]["prompts"] for c in classes]
    advice = "--prompts is descriptive, plain, or a JSON file {code: text or [texts]}"
    given = read_json(style, {str: (str, list, dict)}, advice)
    given = given[name] if isinstance(given.get(name), dict) else given
    found = {c: given.get(c, given.get(c.rstrip("_"))) for c in classes}  # some drop the _
    if missing := [c for c, texts in found.items() if texts is None]:
        raise DataError(f"{style} has no prompt for {', '.join(missing)} of {name}")
    for c, texts in found.items():
        texts = found[c] = [texts] if isinstance(texts, str) else texts
        if type(texts) is not list or not texts or not all(type(t) is str and WORD.search(t) for t in texts):
            raise DataError(f"{style}: the prompt of {c} must be a text or a list of texts, with words")
    return [[t.lower() for t in texts] for texts in found.values()]


def sourced(records):
    """(source, codes) of each record."""
    return zip(records.get("source", [None] * len(records)), records["codes"])


def label_matrix(records, name):
    """Records (DataFrame: codes, source), a label set -> class names (C), labels (R, C) bool, keep (R,) bool.

    Every listed code counts whatever its likelihood, as in the published counts. keep: rows with a label of
    the set (of code_test all: most have none of its six, and all are published). "csn_published" restores
    MERL's rule, class in "AFIB,TWC", by which AFIB is AF, too (13 % more labels)."""
    classes, unknown, labels = label_set(name, records), Counter(), []
    acronyms = {number: word for word, number in reversed(knowledge()["codes"]["csn"].items())}

    @lru_cache(None)
    def classes_of(code, source):
        if source == "csv" and name in PTBXL_SETS and code.upper() in classes:
            return [code.upper()]  # CD and STTC are superclasses here, and other things in other sources
        number, finding = resolve(code, source)
        return [c for c, entry in classes.items() if code == entry.get("code") or (
            number in entry["snomed"] if number and "snomed" in entry else finding in entry["findings"])]

    for source, codes in sourced(records):
        found = set().union(*(classes_of(code, source) for code in codes))
        if name == "csn_published":
            words = [acronyms.get(resolve(code, source)[0]) for code in codes]
            joined = ",".join([*filter(None, words), *found])
            found = {c for c in classes if c in joined}
        labels.append([c in found for c in classes])
        unknown.update(code for code in codes if name in OCCURRING and not finding_of(code, source))
    if unknown:
        print(f"{name}: codes that prompts.json does not know are left out: "
              + ", ".join(f"{code} ({count})" for code, count in unknown.most_common(20)), file=sys.stderr)
    labels = np.array(labels, bool).reshape(len(labels), len(classes))
    return list(classes), labels, labels.any(1) | (name == "code_test")


def join_classes(source_set, target_set):
    """{class of target_set: [classes of source_set]} that share a finding, or are joined in prompts.json."""
    source, target, given = label_set(source_set), label_set(target_set), knowledge()["transfer"]
    a, b = source_set.removesuffix("_published"), target_set.removesuffix("_published")
    there, back = given.get(a, {}).get(b, {}), given.get(b, {}).get(a, {})
    joined = {t: [s for s in source if t in there.get(s, ()) or s in back.get(t, ()) or
                  set(source[s]["findings"]) & set(target[t]["findings"])] for t in target}
    return {t: found for t, found in joined.items() if found}


# ---- which store answers a label set -----------------------------------------------------------------------

GROUPS = {"ptbxl": ("ptbxl_super", "ptbxl_sub", "ptbxl_form", "ptbxl_rhythm"), "csv": ("own",)}


@lru_cache(8)
def open_store(spec, rate):
    return open_all(spec, rate)


def source_of(store):
    return store.sources()[0]


def find_store(name, config, specs=()):
    """The store that answers a label set: of several data specs the one of the set's source, a single one
    whatever it holds; else those of the run's own data that are of that source, together; else, for PTB-XL,
    what is in $PTBXL or data/ptbxl, and the default simulated records. Errors: DataError where there is
    none."""
    source, rate = name.split("_")[0], config.rate
    anything = source in ("own", "age", "sex") or name.endswith(".json")
    kinds = OWN if anything else (source,)
    kind = lambda spec: source_of(open_store(spec, rate)) if spec[:6] == "store:" else spec.partition(":")[0]
    given = [split_share(spec)[0] for text in specs or [config.data] for spec in split_specs(text)]
    whole = len(given) == 1 and (specs or anything)
    fitting = given if whole else [spec for spec in given if kind(spec) in kinds]
    if len(fitting) == 1 or fitting and not specs:  # a run learns from several, and they are asked together
        return open_store(",".join(f'"{spec}"' for spec in fitting) if len(fitting) > 1 else fitting[0], rate)
    if specs or given and anything:
        raise DataError(f"{'more than one' if fitting else 'none'} of {', '.join(given)} is of {name}; "
                        "name its data with --data")
    place = os.environ.get("PTBXL", os.path.join("data", "ptbxl"))
    if source not in ("simulated", "ptbxl") and (source == "own" or not anything):
        raise DataError(f"where are the records of {name}? say it with --data SOURCE:PATH")
    if source != "simulated" and not os.path.exists(os.path.join(place, "ptbxl_database.csv")):
        raise DataError(f"PTB-XL is not in {place}: download it (3 GB, free, CC BY 4.0) from "
                        "https://physionet.org/content/ptb-xl/ and say where it is: --data ptbxl:PATH")
    return open_store("simulated" if source == "simulated" else f"ptbxl:{place}", rate)


def sets_of(store, split="test"):
    """Label sets that a store's records of a split can answer: those named as their source, or the codes that
    occur; none where no record has a label."""
    if store.sources() == ["mimic"]:  # a million records without labels need not be read
        return []
    records, found = store.records[store.records["split"] == split], {}
    for source, part in records.groupby("source", sort=False):
        named = [name for name in LABEL_SETS if name in (source, source + "_test")] or ["own"]
        for name in GROUPS["ptbxl"] if source == "ptbxl" else named:
            found[name] = found.get(name) or label_matrix(part, name)[2].any()
    return [name for name in found if found[name]]


# ---- report text -------------------------------------------------------------------------------------------

LEAD = r"(?:av[rlf]|v[1-6]|i{1,3})\b"
AND = r"(?:and|und|och|bis|to|till|through|thru)"
LEAD_LIST = rf"\b{LEAD}(?:\s*[,/&+-]+\s*(?:{LEAD}|[1-6rlf]\b(?!\.\d))|\s+(?:{AND}\s+)?{LEAD})*"
TOKEN = re.compile(rf"{LEAD_LIST}|[^\W_]+")
WORD = re.compile(r"[^\W_]")  # a statement without one says nothing, and no tokenizer knows it
# a dot behind one of these ends no sentence
ABBREVIATIONS = """amplitudkrit ant ca chron dd fragl indiff inf inkompl intraventr lat li linksant moegl
    mögl neg part pat path post re resp sign st.n supraventr term unbest unvollst v.a vd ventr vollst
    z.n""".split()
SENTENCE_END = re.compile("".join(rf"(?<!\b{re.escape(a)})" for a in ABBREVIATIONS)
                          + r"(?<!\bst(?=\. ?(?:n|nach|senkung|hebung)\b))[.;!?]+(?=\s|$)(?!\s*grad)")
# a comma ends a statement, unless one word follows it or what follows only goes on
GOES_ON = "a|an|and|or|but|this|these|which|with|in|at|age|old|due|may|cannot|likely|plus|non|regular|flat"
COMMA = re.compile(rf",\s+(?=\S+ \S)(?!{LEAD}|\d|(?:{GOES_ON})\b|probab|possib|consi|sugg)")

MORE = r"[^,.;:]{1,40}(?:, (?!possib|probab|consider|normal|sinus|but|with|no|rate|otherw)[^,.;:]{1,40})+?,? "
NO_FINDING = (r"(?!(?:significant |interval |acute |definite )?(?:change|prior|previous|p[ -]?w|ectop|symptom"
          r"|vergleich|(?:ä|ae)nderung|f(?:ö|oe)r(?:ä|ae)ndring))")  # no findings, so they begin no list
NEGATED_LIST = re.compile("|".join((  # what is denied, with commas in between
    r"\b(?:no|without|neither|keine?|ohne|inga|ingen|utan|negative for|(?:absence|free|devoid) of"
    r"|not (?:show|suggest|indicate|reveal|have|suggestive of|(?:consistent|compatible) with)) "
    + NO_FINDING + MORE + r"(?:n?or|oder|noch|eller)\b",
    r"\b(?:no|keine?|inga) \w+ (?:of|for|auf|f(?:ü|ue)r|einer|p(?:å|a)|to suggest) "
    + MORE.replace("sinus", "sinus|there|however|now|old|al[td]|gammal|marked|frequent|occasional|atrial"
                   "|vorhof|f(?:ö|oe)rmak|pace")
    + r"(?:and|und|och)\b(?![^.;]*(?:is|are) (?:present|seen|noted))",
    r"(?:(?<=[.;:] )|^)(?!normal|sinus)" + MORE + r"(?:and|n?or|und|oder|och|eller) [^,.;:]{1,60}? "
    r"(?:are|were|have been|can be|sind|wurden|k(?:ö|oe)nnen|kan) "
    r"(?:excluded|ruled out|absent|not |ausgeschlossen|nicht |uteslutas)")))
# words that may stand behind what they negate
LATE = "not", "never", "absent", "resolved", "nie", "niemals", "ej", "icke", "inte"
BOTH = "and", "und", "och", "sowie", "samt"  # "lbbb and ischemia excluded"; but "sinus rhythm and ..."
SINGULAR = "is", "has", "was", "ist", "hat", "wurde"  # "lbbb and ischemia is ...": said of the last alone
RHYTHM = re.compile("rhythm|fibrillation|flutter|tachycardia|bradycardia|pac|normal")


def clean(text):
    """A report in the form MERL published: ECG for EKG, no *** and =, lower case, one line; composed letters
    (of Macs) and dashes as others write them."""
    text = re.sub("[\u2010-\u2015\u2212]", "-", unicodedata.normalize("NFC", text))
    return " ".join(re.sub(r"\*\*\*|=", "", text.lower()).replace("ekg", "ecg").split())


def one_negation(text):
    """'no ischemia, infarct or hypertrophy' -> 'no ischemia or infarct or hypertrophy': one statement."""
    text = re.sub(r"(?<=\w)n['\u2019`\u00b4]t\b", " not", re.sub(r"\bcan['\u2019`\u00b4]t\b", "cannot", text))
    text = re.sub(r"\b((?:no|without|keine?|ohne) \w{3,})\s*[/&+]\s*(?=\w{3,})", r"\1 or ", text)
    more = re.compile(r",\s+(?!(?:n?or|oder|noch|eller)\b)")
    return NEGATED_LIST.sub(lambda found: more.sub(" or ", found[0]), text)


def split_statements(text):
    """Statements of a report: its lines and sentences, and parts between commas that stand on their own."""
    text = re.sub(r"\bedit:.*", "", clean(text.replace("\n", " . ")))  # PTB-XL: label codes are no report
    sentences = SENTENCE_END.split(one_negation(text))
    parts = [part.strip(" ,.;") for sentence in sentences for part in COMMA.split(sentence)]
    return [part for part in parts if WORD.search(part)]


def lead_names(text):
    """Leads by their names in standard order: 'v4-6' -> 'v4, v5, v6'; 'iii,f' -> 'iii, avf'."""
    found, last, names = set(), None, [name.lower() for name in LEADS]
    for gap, name in re.findall(rf"(\W*(?:\b{AND}\b\s*)?)(av[rlf]|v[1-6]|i{{1,3}}|[1-6rlf])", text):
        lead = names.index("v" + name if name.isdigit() else "av" + name if name in "rlf" else name)
        low, high = min(lead, lead if last is None else last), max(lead, last or 0)
        alike = high <= names.index("iii") or low >= names.index("v1")
        is_range = alike and re.search("-|bis|to|till|thr", gap)
        found |= set(range(low, high + 1)) if is_range else {lead}
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


def is_rhythm(text):
    """Of a statement, or of the key of a finding: is it of a rhythm, or of something normal?"""
    return RHYTHM.search(knowledge()["findings"].get(text, {}).get("name", text))


def negates(template):
    """Does a template of the lexicon say that the statement does not hold?"""
    return template.startswith("no ") or template in ("~ unlikely", "~ less likely", "resolved ~")


def reach(out, group, last, both, words):
    """Where in out, of Translator.parse, begins what a negating suffix (its words) denies: "ischemia or
    infarction excluded". out[group:]: what is joined; both: by a word for and, which may part clauses."""
    if both and words[0] in SINGULAR and "longer" not in words:
        return last
    while last > group and not (both and is_rhythm(out[last - 1][1])):
        last -= 1
    return last


class Word(str):
    """Of a sentence."""
    comma = False  # does one stand before it?


class Translator:
    """German, Swedish and English reports -> English statements, by the phrases in prompts.json ("lexicon").

    Longest phrase first, left to right; a prefix waits for the next statement, a suffix changes the last one.
    What a sentence says is dropped where it holds a word of negation that is in no phrase.
    """

    def __init__(self, lexicon, synonyms=(), token=TOKEN):
        """lexicon: of prompts.json; synonyms: (wording, text) that it need not repeat. Errors: DataError.

        token: a word; by TOKEN a list of leads is one, and <leads> in a phrase stands for any."""
        self.token, self.rewrite, self.negations = token, [], set(lexicon["negations"])
        for kind, i in [(kind, i) for kind in ("common", "rewrite") for i in range(len(lexicon[kind]))]:
            try:
                old, new = lexicon[kind][i]
                self.rewrite.append((re.compile(old), new))
                self.rewrite[-1][0].sub(new, "")
            except (ValueError, IndexError, re.error) as error:
                fault = f"no [pattern, text] ({error})"
                raise DataError(f"prompts.json, lexicon, {kind}, place {i + 1}: {fault}") from error
        self.table = {}  # words of a phrase -> (kind, English texts)
        for kind in ("drop", "join", "suffix", "prefix", "statements"):  # a later kind wins
            for phrase, english in lexicon[kind].items():
                needed = {"prefix": "~", "suffix": "~", "statements": r"[^\W_]"}.get(kind, "")
                texts = english.split("; ")
                if len(self.sentences(phrase)) != 1 or not all(re.search(needed, text) for text in texts):
                    fault = f"{english!r} is no phrase with its English{' and a ~' * (needed == '~')}"
                    raise DataError(f"prompts.json, lexicon, {kind}: {phrase!r}: {fault}")
                for site, name in lexicon["sites"].items() if "<site>" in phrase else [("", "")]:
                    self.table[self.key(phrase.replace("<site>", site))] = (
                        kind, english.replace("<site>", name).split("; "))
        own = [(text, text) for kind, texts in self.table.values() if kind == "statements" for text in texts]
        for wording, text in (*own, *synonyms):  # our own English stays as it is
            self.table.setdefault(self.key(wording), ("statements", [text]))
        self.longest = max(map(len, self.table))

    def sentences(self, text):
        """List of words of every sentence, rewritten; leads in standard order, 'v1, v2'."""
        text = one_negation(clean(text.replace("\n", " . ")))
        for pattern, new in self.rewrite:
            text = pattern.sub(new, text)
        return [words for sentence in SENTENCE_END.split(text) if (words := self.words(sentence))]

    def words(self, sentence):
        """[Word]"""
        found, end = [], 0
        for match in self.token.finditer(sentence):
            found.append(Word(lead_names(match[0]) if re.match(LEAD, match[0]) else match[0]))
            found[-1].comma, end = "," in sentence[end:match.start()], match.end()
        return found

    def key(self, phrase):
        """Of a phrase with <leads>, which stands for any; another has its own leads, if any."""
        words = sum(self.sentences(phrase.replace("<leads>", "v1")), [])
        return self.generic(words) if "<leads>" in phrase else tuple(words)

    def generic(self, words):
        return tuple("<leads>" if self.token is TOKEN and re.match(LEAD, word) else word for word in words)

    def phrases(self, words):
        """(kind, English texts, words) of every phrase of a sentence; kind 'unknown' for a word in none."""
        while words:
            keys = tuple(words[:self.longest]), self.generic(words[:self.longest])
            sizes = range(len(keys[0]), 0, -1)
            found = next((key[:n] for n in sizes for key in keys if key[:n] in self.table), keys[0][:1])
            kind, texts = self.table.get(found, ("unknown", []))
            leads = words[found.index("<leads>")] if "<leads>" in found else ""
            yield kind, [text.replace("<leads>", leads) for text in texts], words[:len(found)]
            words = words[len(found):]

    def parse(self, report):
        """-> (templates, the last innermost; text) of what is said; words understood; words not understood"""
        out, last, understood, unknown = [], 0, [], []  # out[last:]: of the last phrase; a suffix changes it
        for sentence in self.sentences(report):
            waiting, used, placed = [], [], False  # prefixes to come, last used; is a place of out[last:]?
            begin, begin_unknown, doubt, late, early = len(out), len(unknown), False, False, []
            lost, group, joined, both = False, begin, False, False  # unknown since? where "a or b" begins
            for kind, texts, words in self.phrases(sentence):
                if words[0].comma and any(map(negates, waiting)):
                    if late and not lost and len(out) > begin:  # "p waves absent, ..."
                        del out[last:]
                    if late or lost:  # "no chest pain, ...": what is denied is not known
                        waiting = [template for template in waiting if not negates(template)]
                counted = unknown if kind == "unknown" else understood
                counted.extend(word for word in words if re.search("[a-z]", word))
                known = len(out) > begin or len(unknown) > begin_unknown  # has something been spoken of?
                if kind == "suffix" and not known and negates(texts[0]):  # "excluded: infarct"
                    kind, early = "prefix", texts
                if kind == "statements":
                    last, used, waiting, placed = len(out), waiting, [], True
                    group, joined = group if joined else last, False
                    out += [(used, text) for text in texts]
                elif kind == "prefix":
                    waiting, lost = waiting + texts, False
                    late = known and words[-1] in LATE
                elif kind == "join":  # "no ischemia or infarction": the prefix of the one is the other's
                    waiting, joined, both = waiting or used, len(out) > begin, words[0] in BOTH
                elif kind == "suffix" and (len(out) > begin if negates(texts[0]) else
                                           placed or not texts[0].startswith("~ in ")):
                    first = reach(out, group, last, both, words) if negates(texts[0]) else last
                    out[first:] = [(texts + templates, text) for templates, text in out[first:]]
                    if texts[0].startswith("~ in ") and waiting is used:  # "no q waves in v1 or v2, ..."
                        waiting = []
                elif kind == "unknown":
                    placed, lost, doubt = False, True, doubt or words[0] in self.negations
            if doubt:
                del out[begin:]
            elif any(map(negates, waiting)) and late and len(out) > begin:  # "infarction is not ..."
                del out[last:]
            elif early and len(out) == begin and len(unknown) == begin_unknown:  # "this has resolved"
                out[last:] = [(early + templates, text) for templates, text in out[last:]]
        return out, understood, unknown

    def __call__(self, report):
        """English statements of a report in its order, each once; none where it says nothing."""
        return list(dict.fromkeys(attach(*each) for each in self.parse(report)[0]))

    def coverage(self, reports):
        """(word occurrences understood, all of them, Counter of the others)"""
        read = [self.parse(report)[1:] for report in reports]
        left = Counter(word for _, unknown in read for word in unknown)
        known = sum(len(understood) for understood, _ in read)
        return known, known + sum(left.values()), left


def wordings():
    """(wording, key of its finding) of all findings."""
    findings = knowledge()["findings"].items()
    return [(wording, key) for key, finding in findings for wording in (finding["name"], *finding["also"])]


@lru_cache
def translator():
    names = [(wording, knowledge()["findings"][key]["name"]) for wording, key in wordings()]
    return Translator(knowledge()["lexicon"], names)


def translate(report):
    """English statements of a report in German, Swedish or English."""
    return translator()(report)


LANGUAGES = "english", "original", "translated"


def report_tags(store, language="english"):
    """Tags: the statements of every record of a store. language: english (PTB-XL's translated),
    original (as written), or translated (whatever the source)."""
    if language not in LANGUAGES:
        raise DataError(f"unknown report language {language!r}: use {', '.join(LANGUAGES)}")
    if language == "english":
        return store.tags
    read = translate if language == "translated" else split_statements
    return Tags.from_lists(map(read, store.records["report"]))


def true_tags(store):
    """Tags: all that is true of every record, where that is known (simulated ones): names of its findings,
    then its waveform features. Of the others none."""
    if isinstance(store, Stores):
        return Tags.join([true_tags(one) for one in store.stores])
    if store.sources() != ["simulated"]:
        return Tags.from_lists([()] * len(store))
    findings, records = knowledge()["findings"], store.records
    return Tags.from_lists([*(findings[code]["name"] for code in codes), *features]
                           for codes, features in zip(records["codes"], records["features"]))


def waveform_features():
    """The set of all features that findings in prompts.json have."""
    return {feature for finding in knowledge()["findings"].values() for feature in finding["features"]}


@lru_cache
def meanings():
    """{tag: name of the finding that it says, or itself where it is a waveform feature}. What is possible or
    probable in a report is true or not all the same; a wording of two findings says neither for sure."""
    findings, names = knowledge()["findings"], {}
    for wording, key in wordings():
        names.setdefault(wording, set()).add(findings[key]["name"])
    names |= {feature: {feature} for feature in waveform_features()}
    return {doubt + wording: min(name) for wording, name in names.items() if len(name) == 1
            for doubt in ("", "possible ", "probable ")}


def there(spec):
    """Is the path of a data spec, or the file, there?"""
    return os.path.exists(os.path.expanduser(re.sub(rf"^({SPEC}):", "", spec.strip())))


def split_share(spec):
    """SPEC or SPEC*SHARE -> spec, share (see epoch_rows). A path with a * that is there is one. Errors:
    DataError."""
    name, star, share = spec.rpartition("*")
    if not star or "/" in share or there(spec):
        return spec, 1
    if not NUMBER.fullmatch(share) or not 0 < float(share) <= 1000:
        raise DataError(f"{spec}: the share {share!r} is not a number over 0 and up to 1000")
    return name, float(share)


def split_specs(text):
    """Data specs and files with commas between -> list. A comma belongs to a name in double quotes, to a path
    that is there, and where what follows it neither begins a spec (ptbxl:, store:, ...) nor is there."""
    parts, specs = re.findall(r'(?:[^,"]|"[^"]*"|")+', text), []
    exists = lambda part: there(part) or there(re.sub(r"\*[^*/]*$", "", part))  # with a share behind it
    while parts:
        many = next((n for n in range(len(parts), 1, -1) if exists(",".join(parts[:n]))), 1)
        while many < len(parts) and '"' not in parts[0] + parts[many] and not (
                re.match(rf"\s*({SPEC}:|simulated\s*(\*|$))", parts[many]) or exists(parts[many])):
            many += 1
        specs.append(",".join(parts[:many]).replace('"', "").strip())
        parts = parts[many:]
    return specs


def corpus(specs, language="english"):
    """Different texts to learn language from: of a data spec every report, with or without its waveform; of a
    text file every line. specs: see split_specs. Errors: DataError where one is not there."""
    texts = []
    for spec in split_specs(specs):
        source, colon, src = spec.partition(":")
        if source in SOURCES and source != "simulated":
            for row in SOURCES[source](settings_of(source, os.path.expanduser(src), 100)):
                texts.append(". ".join(
                    split_statements(row["report"]) if language == "original" else
                    row["statements"] if "statements" in row and language == "english" else
                    translate(row["report"])))
        elif source in ("simulated", "store"):
            texts += map(". ".join, report_tags(open_data(spec, None), language))
        else:
            try:
                texts += read_text(os.path.expanduser(spec)).splitlines()
            except DataError as error:
                raise DataError(f"{spec}: neither a data set nor a readable text file ({error})") from error
    return sorted({text.strip() for text in texts} - {""})


class Findings:
    """What findings of prompts.json the statements of a report name, and the waveform features they suggest.

    Findings are recognised by their name and other wordings, longest first, unless they are negated. Words
    stay as they are, so that no lead or degree is taken for another."""

    def __init__(self):
        lexicon, self.known = knowledge()["lexicon"], {}  # statement -> keys: there are fewer than reports
        denied = lambda phrase, english: set(phrase.split()) & set(lexicon["negations"]) or negates(english)
        parts = {kind: {phrase: text for phrase, text in lexicon[kind].items() if denied(phrase, text)}
                 for kind in ("suffix", "prefix")} | {"rewrite": lexicon["terms"], "statements": {}}
        self.parse = Translator(lexicon | parts, wordings(), re.compile(r"[^\s,.;:()]+")).parse

    def named(self, statements):
        """Keys of the findings that the statements name, each once."""
        for statement in set(statements) - self.known.keys():
            phrases, *_ = self.parse(statement)
            self.known[statement] = [key for templates, key in phrases if not any(map(negates, templates))]
        return list(dict.fromkeys(key for statement in statements for key in self.known[statement]))

    def candidates(self, statements):
        """Features that the statements of one report suggest, each once."""
        findings = [knowledge()["findings"][key] for key in self.named(statements)]
        return list(dict.fromkeys(feature for finding in findings for feature in finding["features"]))


# ---- simulator ---------------------------------------------------------------------------------------------
# Every wave is a Gaussian lobe with a direction in space (x to the left, y down, z to the back; mV). The
# dipole becomes I, II, V1-V6 by Dower's matrix (Dower et al., Clin Cardiol 1980; Edenbrandt & Pahlm, J
# Electrocardiol 1988), perturbed for every patient; the other limb leads follow from I and II. A disease
# changes lobes or the clock that fires them, by rows of prompts.json (docs/simulator.md). Labels come from
# what is drawn and the noise-free beat, and say what the record shows; a report may say less.

SIMULATED = 4096  # records, if no number is given
EVENLY = 0.5      # share of the records of which one of the tables TOP is drawn evenly over its findings
TOP = "rhythm", "conduction", "early", "main"
DOWER = np.array([[.632, -.235, .059], [.235, 1.066, -.132],  # I, II, V1-V6
                  [-.515, .157, -.917], [.044, .164, -1.387], [.882, .098, -1.277],
                  [1.213, .127, -.601], [1.125, .127, -.086], [.831, .076, .230]])
LIMBS = np.eye(12, 8, -4)  # I, II, V1..V6 -> twelve leads
LIMBS[:6, :2] = [[1, 0], [0, 1], [-1, 1], [-.5, -.5], [1, -.5], [-.5, 1]]
LOBES = "QRLSEJHT"
Q, R, L, S, E, J, H, T = range(8)  # septum, apex, free wall, base, extra; ST; rise and top of T


@lru_cache(1)
def simulated_block(seed, block, rate):
    """CHUNK records -> ecg (CHUNK, 12, SECONDS * rate) mV; each one's peaks, codes, features, report, age."""
    return _block(np.random.default_rng((seed, block)), rate, SECONDS)


def _block(rng, rate, seconds, noise="usual"):
    """noise: usual; strongest, see _noise; none: the heart alone."""
    samples, c = round(seconds * rate), _diagnoses(rng)
    p = _patient(rng, c)
    codes, features = _label(c, p, _measure(c, p))
    ecg, peaks = _fire_all(rng, c, p, _rhythm(rng, c, p, seconds), rate, samples)
    ecg += _atrial_waves(rng, c, p, rate, samples)
    if noise != "none":
        ecg += _noise(rng, rate, samples, noise == "strongest")
        ecg, peaks = _record(rng, ecg, peaks, rate)
    reports = [_report(rng, *x) for x in zip(codes, features)]
    return LIMBS.astype(np.float32) @ ecg, peaks, codes, features, reports, c["age"]


def _diagnoses(rng):
    """What each patient has: code -> (CHUNK,) bool, as far as it is drawn and not measured; and the age."""
    n, c, tables = CHUNK, {}, knowledge()["simulator"]["chances"]
    even = np.where(rng.random(n) < EVENLY, rng.choice(TOP, n), "")  # what is rare is shown, too

    def draw(table, where):
        """One of a table's keys a record, by weight or by how many findings it stands for; c[key] is true
        where it was drawn, within `where`."""
        keys, weight = list(tables[table]), np.array(list(tables[table].values()), float)
        many = np.array([len(tables.get(key, " ")) for key in keys], float)
        natural, flat = (rng.choice(keys, n, p=w / w.sum()) for w in (weight, many))
        got = np.where(even == (table if table in TOP else "main"), flat, natural)
        c.update({k: (got == k) & where for k in keys})
        return got

    chance = lambda share: rng.random(n) < share
    sick = c["sick"] = chance(.7)
    c["age"] = np.clip(rng.normal(np.where(sick, 64, 50), 15), 18, 92)
    draw("rhythm", sick)
    c["SARRH"], c["STACH"] = c["SARRH"] | (~sick & chance(.07)), c["STACH"] | (~sick & chance(.04))
    c["sinus"] = c["sinus"] | ~sick | c["SBRAD"] | c["STACH"] | c["SARRH"] | c["sinus pause"]
    c["conducted"], free = c["sinus"] | c["SVARR"], sick & ~c["PACE"]
    c["blocked"] = draw("conduction", free) != "none"
    c["WPW"] &= c["sinus"]
    draw("pathway", c["WPW"])  # where the accessory pathway lies
    early = draw("early", c["sinus"] & (sick | chance(.04)) & ~c["sinus pause"])
    runs, atrial = c["BIGU"] | c["TRIGU"], chance(.3)
    c["PAC"] |= runs & atrial
    c["PVC"] |= (runs & ~atrial) | (c["AFIB"] & (early == "PVC"))
    draw("main", free & ~c["CLBBB"] & ~c["WPW"] & (~c["blocked"] | chance(.65)))  # many blocks come alone
    which = rng.random(n)  # inferior, anterior infarct or both
    draw("inferior", c["mi"] & (which < .58))
    draw("anterior", c["mi"] & (which > .43))
    for table, where in (("stage", "mi"), ("injury", "injury"), ("ischemic", "ischemic"), ("st-t", "st-t")):
        draw(table, c[where])
    for finding, given, share in knowledge()["simulator"]["also"]:
        c[finding] = c.get(finding, False) | (_all_of(c, given) & chance(share))
    return c


def _all_of(c, given):
    """Of boolean arrays c (n,) by name: where all of "this & not that" holds; "" does everywhere."""
    parts = [~c[k[4:]] if k.startswith("not ") else c[k] for k in given.split(" & ") if k]
    return np.all(parts, 0) if parts else np.ones(CHUNK, bool)


def _turn(v, frontal, horizontal):
    """Turn lobes v (n, k, 3) by angles (n,) in degrees: about z (x towards y), then about y (x towards z)."""
    a, b = np.radians(frontal)[:, None], np.radians(horizontal)[:, None]
    x, y, z = np.moveaxis(v, -1, 0)
    x, y = x * np.cos(a) - y * np.sin(a), x * np.sin(a) + y * np.cos(a)
    return np.stack([x * np.cos(b) - z * np.sin(b), y, x * np.sin(b) + z * np.cos(b)], -1)


def _patient(rng, c):
    """Heart and chest of each patient: lobes v (n, 8, 3), their local part in V1..V6 w (n, 8, 6), P lobes in
    the eight leads (n, 2, 8) mV, lead matrix (n, 8, 3), rate (1/min), intervals (s), places and widths of the
    QRS lobes in shares of it (n, 5)."""
    n, norm, uni = CHUNK, rng.standard_normal, lambda a, b: rng.uniform(a, b, (CHUNK, 1))
    logn = lambda spread, *shape: np.exp(spread * norm((n, *shape)))
    age = (c["age"] - 50) / 15
    p = {"rate": np.clip(rng.normal(np.where(c["sick"], 75, 70), np.where(c["sick"], 13, 11)), 50, 99),
         "qrs": np.clip(.092 + .008 * norm(n), .074, .110), "qtc": np.clip(.412 + .016 * norm(n), .365, .445),
         "pr": np.clip(.155 + .005 * age + .018 * norm(n), .118, .198), "p_gap": .034 + .003 * norm(n),
         "frac": np.tile((.22, .46, .6, .73, .85), (n, 1)) + .015 * norm((n, 5)),
         "wide": np.tile((.085, .095, .09, .095, .09), (n, 1)) * logn(.08, 5),
         "p": np.array([[.07, .07, -.03], [.09, .05, .03]]) * logn(.3, 1, 1) + .01 * norm((n, 2, 3)),
         "dual": c["PACE"] & (rng.random(n) < .5),  # P waves sensed or paced as well
         "ratio": rng.choice((2, 3, 4, 0), n, p=(.45, .12, .2, .23)),  # flutter waves a QRS; 0: changing
         "cycle": np.where(c["wenckebach"], rng.integers(3, 6, n), rng.integers(2, 4, n)),  # 2AVB: P waves
         "spike": ((.3, -.9, .4) + .5 * norm((n, 3))) * rng.lognormal(-2, 1, (n, 1))}
    passing = np.choose(p["ratio"], (1 / 3, 0, 1 / 2, 1 / 3, 1 / 4)), 1 - 1 / p["cycle"]  # of atrial beats
    p["pass"] = np.select([c["AFLT"], c["2AVB"]], passing, 1)
    for k, table in knowledge()["simulator"]["drawn"].items():
        for name, bounds in table.items():
            p[name] = np.where(c[k], uni(*bounds)[:, 0], p[name])
    for k, share in knowledge()["simulator"]["order"].items():
        p["frac"][c[k]] = share
    v, w = np.zeros((n, 8, 3)), np.zeros((n, 8, 6))
    v[:, :4] = (-.10, -.02, -.30), (1.20, .46, -.03), (.22, .16, .62), (-.32, -.10, .34)
    v[:, :4] = v[:, :4] * logn(.25, 4, 1) + .07 * norm((n, 4, 3)) * (1 + c["IVCD"][:, None, None])
    tilt, back = np.clip(1 - 8 * age + 17 * norm(n), -48, 55), 16 * norm(n)
    tilt = np.where(c["LAFB"] | c["LPFB"], .4, 1) * tilt
    v[:, R:E], v[:, :R] = _turn(v[:, R:E], tilt, back), _turn(v[:, :R], -.3 * tilt, back)  # septum: less
    v[:, T] = np.array((.37, .10, -.19)) * (logn(.33) * np.exp(-.1 * age))[:, None]
    v[:, T:] = _turn(v[:, T:], 12 * norm(n), 18 * norm(n))
    # beyond a dipole: T is tall in V2, ST in V1 and V2
    w[:, T] = np.linalg.norm(v[:, T], axis=1)[:, None] * (0, .17, -.12, -.32, -.15, -.05)
    v[:, J] = .12 * v[:, T] + (-.01, -.01, -.03) + .018 * norm((n, 3))
    w[:, J] = (.02, .02, 0, -.03, -.02, -.01) + .012 * norm((n, 6))
    for k, lobe, stays, added, low, high in knowledge()["simulator"]["moves"]:
        lobe = LOBES.index(lobe)
        v[c[k], lobe] = (v[:, lobe] * stays + uni(low, high) * np.array(added))[c[k]]
    for k, (mean, spread, back, back_spread) in knowledge()["simulator"]["turns"].items():
        v[c[k], R:E] = _turn(v[:, R:E], mean + spread * norm(n), back + back_spread * norm(n))[c[k]]
    w[:, E, :2] += (c["CRBBB"][:, None] * uni(0, .5) + c["IRBBB"][:, None] * uni(0, .25)) * (1, .5)
    w[:, J, 1:4] += c["early repolarization"][:, None] * uni(.05, .25) * (1, 1, .6)
    _damage(rng, c, p, v, w)
    size = (logn(.26) * np.exp(-.05 * age))[:, None, None]
    v[:, :5], w[:, :5] = v[:, :5] * size, w[:, :5] * size
    # low voltage: in the frontal plane, at times in the chest as well
    small = np.minimum(1, uni(.24, .36)[:, 0] / np.linalg.norm(v[:, :5, :2], axis=2).max(1))[:, None, None]
    flat = np.where(uni(0, 1)[..., None] < .3, small, (1, 1, 0) * small + (0, 0, 1))
    v[:, :5] *= np.where(c["low"][:, None, None], flat, 1)
    v[:, J] -= .16 * c["DIG"][:, None] * v[:, R] / np.linalg.norm(v[:, R], axis=1)[:, None]
    wide = c["CLBBB"] | c["PACE"]
    v[wide, J:] *= .2
    _oppose(p, v, np.where(wide, uni(1.6, 3.4)[:, 0], (c["ILBBB"] | c["WPW"] | c["IVCD"]) * uni(.6, 2)[:, 0]))
    p["p"][:, 1] += c["LAO/LAE"][:, None] * uni(.6, 1.4) * (.05, .03, .07)
    p["p"][:, 0] += c["RAO/RAE"][:, None] * uni(.6, 1.4) * (.02, .17, -.08)
    shift = np.clip(.25 * norm((n, 1)) + .12 * norm((n, 6)), -.6, .6)[..., None]  # of electrodes, in gaps
    chest = np.pad(DOWER[2:], ((1, 1), (0, 0)), mode="edge")
    leads = np.tile(DOWER, (n, 1, 1))
    leads[:, 2:] += abs(shift) * (np.where(shift > 0, chest[2:], chest[:-2]) - DOWER[2:])
    leads[:, 2:4, 2] += .26, -.12  # V1 sees less of the back and V2 more than on Dower's torso
    leads = leads * np.concatenate([logn(.06, 2), logn(.14, 6)], 1)[..., None] + .04 * norm((n, 8, 3))
    far = leads * np.array([1, 1, 1, .6, .42, .36, .38, .48])[:, None]  # the atria lie behind the ventricles
    return p | {"v": v, "w": w, "leads": leads, "p": p["p"] @ far.swapaxes(1, 2)}


def _oppose(p, v, strength):
    """Secondary ST-T: opposite to the area of the QRS (mV s), times strength (n,) in 1/s. Changes v."""
    area = (v[:, :5] * (p["wide"] * p["qrs"][:, None])[..., None]).sum(1) * np.sqrt(2 * np.pi)
    area = area * strength[:, None]
    v[:, T], v[:, J] = v[:, T] - area, v[:, J] - .35 * area


def _damage(rng, c, p, v, w):
    """Infarction (Q, loss of R, ST and T by age), injury and ischemia of a wall. Changes v, w and p."""
    uni, table = lambda a, b: rng.uniform(a, b, (CHUNK, 1)), knowledge()["simulator"]
    stage = (c["subacute"] + 2 * c["acute"])[:, None]

    def change(k, wall, *parts):
        for lobe, dipole, local in parts:
            v[:, lobe] += c[k][:, None] * dipole * table["wall"][wall][0]
            w[:, lobe] += c[k][:, None] * local * table["wall"][wall][1]

    for k, (wall, _) in table["wall"].items():
        size, on = uni(.3, 1), c[k]
        lost = np.maximum(v[:, R] @ wall, .55)[:, None] * size * uni(.25, 1)
        st = np.choose(stage, (uni(-.05, .02), uni(-.02, .08), uni(.1, .3)))
        t = np.choose(stage, (uni(-.14, .03), uni(-.36, -.12), uni(0, .35)))
        v[on, T] *= (.4, .6, .9)
        v[on, J] -= (uni(0, .07) * (.8, .3, 0))[on]
        p["frac"][on, Q], p["wide"][on, Q] = p["frac"][on, Q] + .05, 1.35 * p["wide"][on, Q]
        change(k, k, (Q, -.03 - .3 * size, -.25 * size), (R, -lost, -.45 * size * uni(.2, 1)),
               (L, -.15 * size, 0), (J, st, .4 * st), (T, t, .4 * t))
    for zone, wall in table["zone"].items():
        for k, low, high in (("INJ" + zone, .06, .2), ("ISC" + zone, 0, .07)):
            if k in c:
                st, t = uni(low, high), uni(.09, .34)
                v[c[k], T] *= .5
                change(k, wall, (J, -st, -.3 * st), (T, -t, -.3 * t))


def _times(p, rr):
    """Centers, widths (n, 8) in s from QRS onset for RR intervals rr (n,): QT by Fridericia's root of RR."""
    d, qt = p["qrs"], p["qtc"] * np.cbrt(np.clip(rr, .3, 1.6)) + np.maximum(p["qrs"] - .1, 0)
    top = qt - .078 * np.sqrt(qt / .4)
    return (np.column_stack([p["frac"] * d[:, None], (d + top) / 2, top - .13 * qt, top]),
            np.column_stack([p["wide"] * d[:, None], (top - d) / 2.6, .13 * qt, .1 * qt]))


def _amplitudes(v, w, leads):
    """Lobes in the eight independent leads: (n, 8 lobes, 8 leads) mV; the rise of T is a part of T."""
    a = v @ leads.swapaxes(1, 2)
    a[..., 2:] += w
    a[:, H], a[:, T] = .42 * a[:, T], .85 * a[:, T]
    return a


def _measure(c, p):
    """The noise-free beat as a cardiologist measures it: (n, 12) in mV, or (n, 1) in s, degrees, 1/min."""
    step, d = .004, p["qrs"][:, None, None]
    t = np.arange(0, .6, step)
    center, width = (x[..., None] for x in _times(p, np.ones(CHUNK)))
    lobes = np.exp(-.5 * ((t - center) / width).astype(np.float32) ** 2)
    beat = (LIMBS @ _amplitudes(p["v"], p["w"], p["leads"]).swapaxes(1, 2)).astype(np.float32) @ lobes
    qrs, tt = np.where(t < d, beat, 0), np.where((t > d + .08) & (t < p["qtc"][:, None, None] + .02), beat, 0)
    before, area = np.where(t < qrs.argmax(2)[..., None] * step, qrs, 0), qrs.sum(2)  # before the R peak
    r, s, q = qrs.max(2), -qrs.min(2), -before.min(2)
    axis = np.degrees(np.arctan2(area[:, 5] * 2 / np.sqrt(3), area[:, 0]))
    return {"r": r, "s": s, "rs": r + s, "r over s": r / (r + s + 1e-6), "axis": axis[:, None],
            "bad q": (q > .1) & (q > .33 * r) & ((before < -.04).sum(2) * step >= .028),
            "st": beat[np.arange(CHUNK), :, ((p["qrs"] + .05) / step).astype(int)],
            "t": np.where(tt.max(2) > -tt.min(2), tt.max(2), tt.min(2)),
            "sokolow": (s[:, 6] + np.maximum(r[:, 10], r[:, 11]))[:, None],
            **{name: p[name][:, None] for name in ("qrs", "pr", "qtc")},
            "beats": (p["rate"] * p["pass"])[:, None]}  # of the ventricles


def _label(c, p, m):
    """Codes (n dicts) and waveform features (n lists) from the drawn truth c, p and the measured beat m."""
    table, findings = knowledge()["simulator"], knowledge()["findings"]
    f = {k: on for k, on in c.items() if k != "age"} | {"dual": p["dual"]}
    f["narrow"] = ~(c["CLBBB"] | c["PACE"] | c["WPW"] | c["ILBBB"])
    f["plain"] = f["narrow"] & ~c["CRBBB"]
    count = {"all": lambda hit: hit.all(1), "any": lambda hit: hit.any(1), "two": lambda hit: hit.sum(1) > 1}
    for name, what, low, high, where, how, when in table["measured"]:
        value = m[what][:, table["leads"][where]]
        f[name] = count[how]((value > low) & (value <= high)) & _all_of(f, when)
    f["pathological q waves in ii, iii and avf"] &= m["bad q"][:, 1]  # a Q wave in III alone is normal
    for name, more in table["implied"].items():
        f |= {k: _all_of(f, name) | f.get(k, False) for k in more}
    ill = np.any([on for name, on in f.items() if name in findings and name not in table["harmless"]], 0)
    f["NORM"] = c["sinus"] & (p["rate"] > 45) & (p["rate"] < 110) & ~ill
    f["abnormal ecg"] = ~f["NORM"]
    names, codes, features, shapes = np.array(list(f), object), [], [], waveform_features()
    for on in np.array(list(f.values())).T:
        found = list(names[on])
        codes.append({k: 100.0 for k in found if k in findings})
        shown = [x for k in found if k in table["always"] for x in table["always"][k].split("; ")]
        features.append(list(dict.fromkeys(shown + [k for k in found if k in shapes])))
    return codes, features


def _rhythm(rng, c, p, seconds):
    """When the heart fires: times of QRS and P (n, K) in s (nan: none), early beats, RR before; breathing."""
    n, norm, uni = CHUNK, rng.standard_normal, lambda a, b: rng.uniform(a, b, CHUNK)
    beats, base, sinus, ventricular = int((seconds + 3) * 3.8), 60 / p["rate"], c["sinus"], c["PVC"]
    breath, phase = np.where(c["SARRH"], uni(.1, .25), uni(.18, .32)), uni(0, 2 * np.pi)
    depth = sinus * np.minimum(.03 * np.exp(-.02 * (c["age"] - 50) + .5 * norm(n)), .07)
    depth = np.where(c["SARRH"], uni(.09, .22), depth)
    jitter = np.select([c["AFIB"], c["SVARR"], sinus], [uni(.13, .3), .09, .012], .003)
    change, attack, first = uni(.3, .7) * seconds, 60 / uni(140, 205), rng.random(n) < .5  # of PSVT
    runs, period = c["BIGU"] | c["TRIGU"], np.where(c["BIGU"], 2, 3)
    early = ventricular | c["PAC"] | c["SVARR"]
    often, due = np.where(c["SVARR"], .3, .12), uni(.15, .7) * seconds  # by then, one early beat is sure
    ratio, cycle, grow = p["ratio"], p["cycle"], c["2AVB"] * c["wenckebach"] * uni(.04, .09)
    t, gap, since, out = -1.5 - uni(0, 1.2) * base, base, np.zeros(n), []
    was = met = sinus & False
    for k in range(beats):
        rr = base * (1 + depth * np.sin(2 * np.pi * breath * t + phase))
        rr = rr * np.exp(jitter * np.clip(norm(n), -2.5, 2.5))
        rr = np.where(c["AFLT"], rr * np.where(ratio > 0, ratio, rng.integers(2, 5, n)), rr)
        rr = np.where(c["PSVT"] & ((t < change) == first), attack, rr)
        now = early & ~was & np.where(runs, since >= period - 1, (rng.random(n) < often) | ((t > due) & ~met))
        pause = was & ventricular & ~c["AFIB"]  # compensatory
        stop = c["sinus pause"] & ~met & (t + rr > due)
        gap = np.where(now & ~c["AFIB"], rr * uni(.45, .75), np.where(pause, 2 * rr - gap, rr))
        gap = np.where(stop, np.maximum(gap * uni(1.8, 2.6), 1.8), gap)
        t, since, was = t + gap, np.where(now, 0, since + 1), now
        met = met | ((now | stop) & (t > 1.5))  # with the beat before it in the strip
        dropped = c["2AVB"] & (k % cycle == cycle - 1)
        out.append((np.where(dropped, np.nan, t + p["pr"] + grow * (k % cycle) ** .6), t, now, gap))
    qrs, atria, now, rr = (np.stack(x, 1) for x in zip(*out))
    atria[c["AFIB"] | c["AFLT"] | c["SVTAC"] | c["junctional rhythm"] | (c["PACE"] & ~p["dual"])] = np.nan
    atria[(now & ventricular[:, None]) | (c["PSVT"][:, None] & (rr < .45))] = np.nan
    own = -1.5 + (60 / uni(68, 105))[:, None] * (rng.random((n, 1)) + np.arange(beats))  # the atria's clock
    return {"qrs": qrs, "p": np.where(c["3AVB"][:, None], own, atria), "early": now, "rr": rr,
            "breath": lambda at, i: np.sin(2 * np.pi * breath[i] * at + phase[i])[:, None, None]}


def _ectopic(rng, p):
    """A heart whose beats start in a ventricle: one wide wave in a direction of its own, ST-T opposite."""
    way = (-.2, .1, .5) + rng.standard_normal((CHUNK, 3)) * (.5, .8, .6)
    way *= rng.uniform(1, 2.2, (CHUNK, 1)) / np.linalg.norm(way, axis=1, keepdims=True)
    v = np.zeros((CHUNK, 8, 3))
    v[:, :4] = way[:, None] * [[.35], [.9], [.8], [.35]] + .3 * rng.standard_normal((CHUNK, 4, 3))
    x = p | {"v": v, "w": 0, "qrs": rng.uniform(.13, .18, CHUNK), "wide": np.full((CHUNK, 5), .12),
             "frac": np.tile((.2, .42, .62, .82, .9), (CHUNK, 1))}
    _oppose(x, v, np.full(CHUNK, 3.2))
    return x


def _fire_all(rng, c, p, clock, rate, samples):
    """Fire the lobes by the clock: ecg (n, 8, N) mV of the independent leads; the samples of the R peaks."""
    leads, early, places = p["leads"].swapaxes(1, 2), clock["early"], np.arange(clock["early"].shape[1])
    pad, half, blur = 2 * rate, samples / rate / 2, .2 / rate  # waves leave the strip; the anti-alias filter
    rows, fired, peaks = [], [], []

    def waves(when, center, width, amplitude, first, last):
        """Lobes (E, k, 8 leads) at `when` (E,) s, seen within [first, last) s of it: (E, samples, 8)."""
        t = (np.floor(when * rate)[:, None] + np.arange(round(first * rate), round(last * rate))) / rate
        u = (t[:, None] - (when[:, None] + center)[..., None]).astype(np.float32)
        u *= (.5 ** .5 / np.hypot(width, blur)).astype(np.float32)[..., None]
        return np.exp(-u * u).swapaxes(1, 2) @ amplitude.astype(np.float32)

    def fire(i, when, first, wave):
        """Note waves (E, samples, 8) of records i (E,), from `first` s of `when` (E,) s on."""
        at = i * (samples + 2 * pad) + np.floor(when * rate).astype(int) + round(first * rate) + pad
        rows.append((at[:, None] + np.arange(wave.shape[1])).astype(np.int32).ravel())
        fired.append(wave.reshape(-1, 8))

    def events(when, on):
        """Rows and places of events (n, K) that the strip can see, and their times."""
        i, k = np.nonzero(on & (np.nan_to_num(abs(when - half), nan=np.inf) < half + .8))
        return i, k, when[i, k]

    wide, rr = early & c["PVC"][:, None], .7 * np.nanmedian(clock["rr"], 1, keepdims=True) + .3 * clock["rr"]
    sway = .05 * rng.standard_normal((CHUNK, 1, 8))  # breathing moves the heart
    for heart, on in ((p, ~wide), (_ectopic(rng, p), wide)):
        i, k, at = events(clock["qrs"], on)
        breath = 1 + sway[i] * clock["breath"](at, i)
        amplitude = _amplitudes(heart["v"], heart["w"], p["leads"])[i] * breath
        center, width = _times({key: heart[key][i] for key in ("qrs", "qtc", "frac", "wide")}, rr[i, k])
        wave = waves(at, center[:, J:], width[:, J:], amplitude[:, J:], -.1, .9)
        qrs = waves(at, center[:, :J], width[:, :J], amplitude[:, :J], -.1, .3)
        wave[:, :qrs.shape[1]] += qrs
        fire(i, at, -.1, wave)
        peaks.append((i, np.floor(at * rate).astype(int) + round(-.1 * rate) + (qrs ** 2).sum(2).argmax(1)))
    p_center, p_width = np.stack([0 * p["p_gap"], p["p_gap"]], 1) + .036, np.full((CHUNK, 2), .019)
    strange = rng.normal((.04, -.06, .03), (.05, .04, .05), (CHUNK, 2, 3)) @ leads  # from another place
    i, k, at = events(clock["p"], True)
    other = early | (c["SVARR"][:, None] & (places % 3 == 0)) | c["atrial tachycardia"][:, None]
    shape = np.where(other[i, k, None, None], strange[i], p["p"][i])
    fire(i, at, -.05, waves(at, p_center[i], p_width[i], shape, -.05, .2))
    spike = p["spike"][:, None] @ leads * .1 * rate ** .5
    paced = c["PACE"] & p["dual"] & (rng.random(CHUNK) < .6)
    for when, on in ((clock["qrs"], c["PACE"]), (clock["p"], paced)):
        i, _, at = events(when, on[:, None])
        fire(i, at, -.04, waves(at, np.full((len(i), 1), -.006), .3 / rate, spike[i], -.04, .03))
    (i, at), rows = np.concatenate(peaks, 1), np.concatenate(rows)  # of waves, which add up where they meet
    place = csc_array((np.ones(rows.size, np.float32), rows, np.arange(rows.size + 1, dtype=np.int32)),
                      (CHUNK * (samples + 2 * pad), rows.size))
    out = (place @ np.concatenate(fired)).reshape(CHUNK, -1, 8)[:, pad:-pad].swapaxes(1, 2)
    seen = (at >= 0) & (at < samples)
    return np.ascontiguousarray(out), [np.sort(at[(i == n) & seen]) for n in range(CHUNK)]


def _atrial_waves(rng, c, p, rate, samples):
    """Fibrillation (4-8 Hz, waxing and waning) and flutter (sawtooth, negative in II): (n, 8, N) mV."""
    t, out = np.arange(samples, dtype=np.float32) / rate, np.zeros((CHUNK, 8, samples), np.float32)
    uni = lambda a, b, k: rng.uniform(a, b, (len(on), k, 1)).astype(np.float32)
    on = np.flatnonzero(c["AFIB"] | (c["PACE"] & ~p["dual"] & (rng.random(CHUNK) < .6)))
    slow = lambda: np.sin(2 * np.pi * uni(.1, .7, 3) * t + uni(0, 6.3, 3))  # (n, 3, N)
    angle = 2 * np.pi * (uni(4.2, 7.8, 1) + uni(-.8, .8, 3)) * t + 1.2 * slow() + uni(0, 6.3, 3)
    way = (-.15, .35, -.6) + .3 * rng.standard_normal((len(on), 3, 3))
    way = p["leads"][on] @ (way * rng.lognormal(-3.5, .6, (len(on), 1, 1))).swapaxes(1, 2)
    out[on] = way.astype(np.float32) @ ((1 + .6 * slow()) * (np.sin(angle) + .3 * np.sin(2 * angle)))
    on = np.flatnonzero(c["AFLT"])
    angle = (2 * np.pi * p["rate"][on] / 60).astype(np.float32)[:, None, None] * t + uni(0, 6.3, 1)
    saw = sum(np.sin(h * angle + np.float32(.5 * h)) / np.float32(h ** 1.3) for h in (1, 2, 3))  # (n, 1, N)
    way = ((.02, -1, -.3) + .25 * rng.standard_normal((len(on), 3)))[..., None] * uni(.05, .17, 1)
    out[on] += (p["leads"][on] @ way).astype(np.float32) * saw
    return out


def _noise(rng, rate, samples, strongest=False):
    """Disturbances of the electrodes RA, LA, LL, V1..V6, seen in I, II, V1..V6: (n, 8, N) mV.

    strongest: every record has all of them, two standard deviations (of the logarithm) above the median."""
    n, t = CHUNK, np.arange(samples, dtype=np.float32) / rate
    uni = lambda a, b: rng.uniform(a, b, (n, 1, 1)).astype(np.float32)
    usual = lambda spread: np.exp(2 * spread) if strongest else rng.lognormal(0, spread, (n, 1, 1))
    strength = lambda median, spread: (median * usual(spread) * rng.lognormal(0, .4, (n, 9, 1))).astype("f4")

    def colored(shape):
        """Noise (n, 9, N) of unit deviation with the amplitude spectrum shape(f): parts of one strip."""
        f = np.fft.rfftfreq(64 * samples, 1 / rate)
        strip = np.fft.irfft(shape(f) * rng.standard_normal((f.size, 2)).view(complex)[:, 0])
        strip = (strip / strip.std()).astype(np.float32)
        starts = rng.integers(0, strip.size - samples, n * 9)
        return np.stack([strip[i:i + samples] for i in starts]).reshape(n, 9, samples)

    swell = 1 + .5 * np.sin(2 * np.pi * uni(.05, .5) * t + uni(0, 6.3))
    breath = colored(lambda f: np.where((f > .04) & (f < 2), 1 / np.maximum(f, .04), 0))  # and skin
    muscle = colored(lambda f: np.minimum(f / 8, 1) / (1 + (f / 38) ** 4))
    x = strength(.02, .9) * breath + strength(.009, .7) * swell * muscle
    mains = rng.choice((50, 60), (n, 1, 1))  # above Nyquist: taken away by the recorder's filter
    hum = strength(.004, 1) * ((uni(0, 1) < (1 if strongest else .4)) & (mains < .49 * rate))
    on = np.flatnonzero(hum.any(1))
    x[on] += hum[on] * np.sin(np.float32(2 * np.pi) * mains[on] * t + uni(0, 6.3)[on])
    kind, which = rng.random(n) * (.125 if strongest else 1), rng.integers(0, 9, n)
    for i in np.flatnonzero(kind < .125):  # one electrode: a step, a burst, or bad throughout
        since, long, high = t - rng.uniform(0, samples / rate), rng.uniform(.2, 1), rng.uniform(-.7, .7)
        if kind[i] < .06:
            high = .7 if strongest else high
            x[i, which[i]] += high * np.exp(-np.maximum(since, 0) / (2 * long)) * (since > 0)
        elif kind[i] < .1:
            x[i, which[i]] += .1 * np.exp(-.5 * (since / long) ** 2) * rng.standard_normal(samples)
        else:
            x[i, which[i]] += .25 * breath[rng.integers(n), which[i] - 1]
    electrodes = np.eye(8, 9, 1, np.float32)
    electrodes[:2, :3], electrodes[2:, :3] = [[-1, 1, 0], [-1, 0, 1]], -1 / 3
    return electrodes @ x


def _record(rng, ecg, peaks, rate):
    """What recorders make of ecg (n, 8, N) mV: a band, steps, at times a silent end."""
    table, samples = np.array(knowledge()["simulator"]["recorders"]), ecg.shape[2]
    which = rng.choice(len(table), CHUNK, p=table[:, 0] / table[:, 0].sum())
    f = np.fft.rfftfreq(samples, 1 / rate)
    for kind, (_, low, high, step, silent) in enumerate(table):
        on = np.flatnonzero(which == kind)
        if low > .05 or high < 150:
            gain = (1 + (low / np.maximum(f, 1e-3)) ** 4) ** -.5 * (1 + (f / high) ** 8) ** -.5
            ecg[on] = np.fft.irfft(np.fft.rfft(ecg[on]) * gain.astype(np.float32), samples)
        ecg[on] = np.round(ecg[on] * (1000 / step)) * np.float32(step / 1000)
        for i in on if silent else ():
            end = round(samples * (1 - rng.uniform(0, silent)))
            ecg[i, :, end:], peaks[i] = 0, peaks[i][peaks[i] < end]
    return ecg, peaks


def _report(rng, codes, features):
    """Statements of a report: rhythm first, wording varied; form codes left out at times, what follows from
    others and features often."""
    findings = knowledge()["findings"]
    spoken = lambda k: (.9 if findings[k].get("diagnostic") or k in ("PVC", "PAC") else
                        .7 if "form" in findings[k] else .2)
    rhythm, statements = [k for k in codes if findings[k].get("rhythm")], []
    rest = [k for k in codes if not findings[k].get("rhythm") and rng.random() < spoken(k)]
    rng.shuffle(rest)
    for k in rhythm + rest:
        words = [findings[k]["name"]] * 6 + findings[k]["also"][:6]
        word = words[rng.integers(len(words))]
        doubt = findings[k].get("diagnostic") and k != "NORM" and rng.random() < .07
        statements.append(("possible ", "probable ")[rng.integers(2)] + word if doubt else word)
    shown = rng.permutation(features)[:rng.integers(1, 5)] if rng.random() < .4 else []
    return (statements or [findings[next(iter(codes))]["name"]]) + [str(x) for x in shown]


# what shapes a store of a kind, beside its data and its words in prompts.json: in the key of the cache
READS = (survey, stamps, open_file, read_record, read_header, header_lines, named_in, parse_lead, beside,
         measure, read_signals, read_segments, lead_index, to_twelve, repair, microvolts, load_record, work,
         read_csv, without_zero, split_by, person, clean, one_negation, split_statements, LEADS, LEAD_INDEX,
         MAX_GAP, MIN_SECONDS, CROPS, MILLIVOLTS, RATES, RECORD_LINE, SIGNAL_LINE, NOTHING, NEGATED_LIST,
         WORD, SENTENCE_END, COMMA)
MAKERS = {"ptbxl": (*READS, once, ptbxl_rows, TOKEN, LATE, BOTH, SINGULAR, RHYTHM, Word,
                    lead_names, attach, is_rhythm, negates, reach, Translator),
          "mimic": (*READS, once, mimic_rows), "csv": (*READS, own_rows, labels_of),
          "simulated": (microvolts, work, split_by, simulated_rows, load_simulated, _block, _diagnoses,
                        _all_of, _turn, _patient, _oppose, _damage, _times, _amplitudes, _measure, _label,
                        _rhythm, _ectopic, _fire_all, _atrial_waves, _noise, _record, _report,
                        waveform_features, DOWER, LIMBS, EVENLY, TOP),
          **dict.fromkeys(HEADERS, (*READS, once, header_rows, named, split_of, COMMENT, REFERENCE)),
          "code": (*READS, code_rows, load_tracing, read_tracings, code_annotations, named, UNITS)}
WORDS = {"ptbxl": ("findings", "lexicon"), "simulated": ("findings", "simulator"), "mimic": (), "csv": ()}


@lru_cache
def maker(source):
    """A checksum of MAKERS[source], of its words in prompts.json, and of the definition of R peaks."""
    parts = [json.dumps([knowledge()[key] for key in WORDS.get(source, ("findings", "codes"))])]
    for part in MAKERS[source]:
        parts.append(inspect.getsource(part) if callable(part) else getattr(part, "pattern", repr(part)))
    if source != "simulated":
        parts.append(read_text(os.path.join(HERE, "csrc", "reference.py")))
    return zlib.crc32("\n".join(parts).encode())


# ---- command line ------------------------------------------------------------------------------------------

def describe(store):
    splits = [f"{name} {count}" for name in SPLITS if (count := len(store.rows(name)))]
    print(f"{store.path}: {len(store)} of {store.meta['rows']} records, {SECONDS} s at {store.rate} Hz,",
          ", ".join(splits))
    for kind in ("dropped", "warnings"):
        for text, entry in store.meta[kind].items():
            print(f"{kind:9s}{entry['records']:7d} records: {text} ({entry['amount']}), "
                  f"e.g. {entry['examples'][0]}")


def print_coverage(src):
    """How much of PTB-XL's reports the lexicon understands, and what is left by frequency."""
    reports = [line["report"] for line in read_csv(os.path.join(src, "ptbxl_database.csv"), ("report",))]
    known, total, left = translator().coverage(reports)
    print(f"{len(reports)} reports: {known} of {total} word occurrences understood "
          f"({100 * known / total:.2f} %); left over:")
    print(", ".join(f"{word} {count}" for word, count in left.most_common(100)))


def draw_ecg(axes, ecg, rate, title=""):
    """(12, N) mV at rate Hz as on paper: 25 mm/s, 10 mm/mV, three rows of four leads, lead II as the rhythm
    strip below, calibration pulses (1 mV, 200 ms) on the left. x: s, y: mV of the strip; a row is 3 mV."""
    from matplotlib.ticker import MultipleLocator
    up = -(-500 // rate)  # interpolated, since 100 Hz has corners at this scale
    ecg, seconds = resample_poly(ecg, up, 1, axis=1, padtype="line"), ecg.shape[1] / rate
    time, quarter = np.arange(ecg.shape[1]) / (up * rate), seconds / 4
    ink = dict(color="black", lw=0.7, solid_joinstyle="round")
    for height, row in zip((9, 6, 3, 0), (*np.arange(12).reshape(4, 3).T, [1])):
        axes.plot([-0.5, -0.4, -0.4, -0.2, -0.2, -0.1], height + np.array([0, 0, 1, 1, 0, 0]), **ink)
        for column, lead in enumerate(row):
            begin, end = column * quarter, (column + 1) * quarter if len(row) > 1 else seconds
            part = slice(*np.searchsorted(time, (begin, end)))
            axes.plot(time[part], height + ecg[lead, part], **ink)
            axes.plot([begin, begin], [height - 0.3, height + 0.3], **ink)
            axes.text(begin + 0.06, height + 1.15, LEADS[lead], fontsize=8, weight="bold")
    for locate, small, large in ((axes.xaxis, 0.04, 0.2), (axes.yaxis, 0.1, 0.5)):  # 1 and 5 mm
        locate.set_minor_locator(MultipleLocator(small))
        locate.set_major_locator(MultipleLocator(large))
    axes.grid(which="minor", color="#f7d6d6", lw=0.3)
    axes.grid(which="major", color="#eba9a9", lw=0.5)
    axes.tick_params(which="both", length=0, labelbottom=False, labelleft=False)
    axes.set(xlim=(-0.6, seconds + 0.2), ylim=(-2, 11), aspect=10 / 25, axisbelow=True)
    axes.text(0, -1.85, "25 mm/s   10 mm/mV", fontsize=7)
    axes.set_title(title, fontsize=9, parse_math=False)  # a $ is no formula


def plot_seen(ecg, rate, title, seen, peaks, path):
    """A record (12, N) on ECG paper; below, a strip for each text of seen, {text: weights (N,)}, as dark as
    it is seen there, with a triangle under every beat that has more than one and a half times its share."""
    from matplotlib.figure import Figure
    seconds, below = ecg.shape[1] / rate, 0.6 + 0.5 * len(seen)
    width, paper = (seconds + 0.8) * 25 / 25.4, 13 * 10 / 25.4  # inches
    figure = Figure(figsize=(width + 0.4, paper + below))
    place = lambda bottom, height: np.divide([0.2, bottom, width, height], [*figure.get_size_inches()] * 2)
    axes = figure.add_axes(place(below - 0.35, paper))
    draw_ecg(axes, ecg, rate, title)
    edges = [0, *((a + b) // 2 for a, b in zip(peaks, peaks[1:])), ecg.shape[1]]
    for i, (text, w) in enumerate(seen.items()):
        strip = figure.add_axes(place(below - 0.8 - 0.5 * i, 0.2))
        strip.imshow(w[None], aspect="auto", cmap="Greys", extent=(0, seconds, 0, 1), vmin=0)
        strong = [p / rate for p, a, b in zip(peaks, edges, edges[1:]) if w[a:b].mean() * len(w) > 1.5]
        strip.plot(strong, [-0.35] * len(strong), "^", color="#c03030", ms=5, clip_on=False)
        strip.text(0, 1.25, text, fontsize=8, parse_math=False)
        strip.set(xlim=axes.get_xlim(), ylim=(0, 1), xticks=[], yticks=[])
        strip.spines[:].set_visible(False)
    figure.savefig(path, dpi=150)


def plot(store, ids, path):
    """Records of a store as on paper, true to scale, R peaks marked -> PNG."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(11.2, 5.8 * len(ids)), layout="constrained")
    for axes, name in zip(np.atleast_1d(figure.subplots(len(ids), 1)), ids):
        found = np.flatnonzero(store.records["id"] == name)
        if not len(found):
            raise DataError(f"{store.path}: holds no record {name!r}")
        record = store.records.iloc[found[0]]
        title = f"{record['source']} {name}: {'; '.join(record['statements'])}"
        draw_ecg(axes, store.ecg(found[:1])[0], store.rate, title)
        peaks = np.array(record["peaks"]) / store.rate
        axes.plot(peaks, np.full(len(peaks), -1.3), "^", color="#3367a8", ms=4)
    figure.savefig(path, dpi=150, format="png")


def main():
    parser = argparse.ArgumentParser(description="Prepare and inspect stores.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("prepare", help="make a store from a data set")
    command.add_argument("source", choices=SOURCES)
    command.add_argument("src", help="folder of the data set, a csv file, or the number of simulated records")
    command.add_argument("dst", help="folder of the store")
    command.add_argument("--rate", type=int, default=100, help="Hz [100]")
    command.add_argument("--crop", choices=CROPS, default="first", help="part of a long record that is kept")
    command.add_argument("--min-words", type=int, default=0, help="that a report of MIMIC must have [0]")
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
    command.add_argument("--out", default="ecg.png", help="[ecg.png]")
    args = vars(parser.parse_args())
    name = args.pop("command")
    if name == "coverage":
        print_coverage(**args)
    elif name == "plot":
        plot(open_data(args["data"], None), args["ids"], args["out"])
        print(f"drawn in {args['out']}")
    elif name == "info":
        describe(Store(args["path"].removeprefix("store:"), args["verify"]))
    else:
        describe(prepare(**args))


if __name__ == "__main__":
    guarded(main)
