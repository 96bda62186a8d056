"""data.py: reading, repair, stores, adapters, label sets. Real recordings are in ../shared/data or $ECG_TEST_DATA."""
import csv
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import wfdb

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data
from bench_scale import enlarge

REAL = Path(os.environ.get("ECG_TEST_DATA", ROOT.parent / "shared" / "data"))
PTBXL = REAL / "ptbxl"
NAMES = ["I", "II", "III", "AVR", "AVL", "AVF", "V1", "V2", "V3", "V4", "V5", "V6"]
real = pytest.mark.skipif(not PTBXL.is_dir(), reason=f"no real recordings in {REAL} (set ECG_TEST_DATA)")


def write(path, signal, fs=500, names=NAMES, fmt="16", gain=1000):
    """A WFDB record of signal (leads, N) mV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    n = len(signal)
    wfdb.wrsamp(path.name, fs=fs, units=["mV"] * n, sig_name=list(names)[:n], p_signal=np.asarray(signal, float).T,
                fmt=[fmt] * n, adc_gain=[gain] * n, baseline=[0] * n, write_dir=str(path.parent))
    return path


def beats(n=5000, fs=500, leads=12, seed=0):
    """Something with the shape of an ECG, different in every lead."""
    t = np.arange(n) / fs
    pulse = np.exp(-((t % 0.8 - 0.4) / 0.02) ** 2)
    return np.round((np.arange(1, leads + 1)[:, None] * 0.1 * pulse + 0.05 * np.sin(2 * np.pi * t + seed)), 3)


def edit(path, old, new):
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))


def table(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def csv_source(folder, count, report="sinus rhythm. normal ecg"):
    """A generic data set of `count` records."""
    for i in range(count):
        write(folder / f"r{i}", beats(seed=i))
    table(folder / "list.csv", [dict(record=f"r{i}", report=report, patient=f"p{i // 2}") for i in range(count)])
    return folder / "list.csv"


# ---- reading --------------------------------------------------------------------------------------------------------

@real
@pytest.mark.parametrize("pattern, every", [("ptbxl/records100/*/*.hea", 20), ("ptbxl/records500/*/*.hea", 6),
                                            ("ludb/data/*.hea", 2), ("cpsc2018/*.hea", 3), ("csn/*.hea", 3)])
def test_reading_equals_wfdb(pattern, every):
    paths = [str(p.with_suffix("")) for p in sorted(REAL.glob(pattern))][::every]
    assert len(paths) >= 6
    for path in paths:
        record, expected = data.read_record(path), wfdb.rdrecord(path)
        assert (record.names, record.fs) == (expected.sig_name, expected.fs) and record.checksum_ok
        np.testing.assert_array_equal(record.signal, expected.p_signal.T.astype(np.float32))


@real
def test_formats_of_wfdb_and_odd_headers():
    record = data.read_record(REAL / "mitdb" / "100")
    assert record.signal.shape == (2, 650000) and record.fs == 360 and record.names == ["MLII", "V5"]
    signal, present = data.to_twelve(record)
    assert present.tolist() == [lead == "V5" for lead in data.LEADS]  # MLII is no lead of the twelve
    name = next((REAL / "georgia").glob("*.hea"))  # their record name has an extension, which wfdb 4.3 refuses
    assert data.read_record(name.with_suffix("")).signal.shape == (12, 5000)


@pytest.mark.parametrize("fmt", ["16", "212", "24", "32", "80", "516", "524"])  # the last two are FLAC
def test_written_formats(tmp_path, fmt):
    signal = np.round(beats() * (50 if fmt == "80" else 1000)) / 1000  # format 80 has 8 bits
    path = write(tmp_path / "a", signal, fmt=fmt)
    record = data.read_record(path)
    np.testing.assert_allclose(record.signal, signal, atol=1e-6)
    assert record.checksum_ok
    head = path.with_suffix(".hea").read_text().split("\n")
    checksum = head[3].split()[6]
    edit(path.with_suffix(".hea"), f" {checksum} ", f" {int(checksum) ^ 1} ")
    assert not data.read_record(path).checksum_ok
    assert data.read_record(path, lambda samples, fs: (0, samples - 2)).checksum_ok  # not looked at


def test_invalid_samples_units_and_checksum(tmp_path):
    signal = beats()
    signal[3, 100:110] = np.nan
    path = write(tmp_path / "a", signal)
    record = data.read_record(path)
    np.testing.assert_allclose(record.signal, signal, atol=1e-6)
    for unit, factor in (("uV", 1e-3), ("V", 1e3)):
        edit(path.with_suffix(".hea"), "/mV", f"/{unit}")
        np.testing.assert_allclose(data.read_record(path).signal[0], signal[0] * factor, rtol=1e-6)
        edit(path.with_suffix(".hea"), f"/{unit}", "/mV")
    raw = np.fromfile(tmp_path / "a.dat", "<i2")
    raw[0] += 1
    raw.tofile(tmp_path / "a.dat")
    assert record.checksum_ok and not data.read_record(path).checksum_ok
    assert data.load_record(path, 100)[2]["checksum in the header is wrong"] == 1


def test_leads_by_name(tmp_path):
    order = ["V6", "aVF", "avl", "MDC_ECG_LEAD_AVR", "DIII", "ii", "I", "V1", "V3", "V2", "v5", "V4", "VX"]
    target = [11, 5, 4, 3, 2, 1, 0, 6, 8, 7, 10, 9]
    signal = beats(leads=13)
    twelve, present = data.to_twelve(data.read_record(write(tmp_path / "a", signal, names=order)))
    assert present.all()
    for row, lead in enumerate(target):
        np.testing.assert_allclose(twelve[lead], signal[row], atol=1e-6)


def test_missing_and_flat_leads(tmp_path):
    signal = beats(leads=8)
    signal[2] = 0.7
    names = ["I", "II", "V1", "V2", "V3", "V4", "V5", "V6"]
    ecg, usable, notes = data.load_record(write(tmp_path / "a", signal, names=names), 500)
    assert usable.tolist() == [True, True] + [False] * 5 + [True] * 5
    assert not ecg[~usable].any() and notes == {"leads missing": 4, "leads flat or mostly invalid": 1}
    np.testing.assert_array_equal(ecg[0], np.rint(signal[0] * 1000))


def test_repair():
    fs, signal = 500, np.tile(np.arange(5000, dtype=np.float32) / 1000, (12, 1))
    broken = signal.copy()
    broken[0, 100:120] = np.nan                           # 0.04 s: interpolated, here exactly
    broken[1, 100:121] = np.inf                           # longer: zeroed
    broken[2, :10] = np.nan                               # at the end: the nearest value
    broken[3, 1900:] = np.nan                             # 3.8 s are left: not usable
    fixed, usable, zeroed = data.repair(broken, np.ones(12, bool), fs)
    np.testing.assert_allclose(fixed[0], signal[0], atol=1e-6)
    assert zeroed == 21 and not fixed[1, 100:121].any() and (fixed[1, 121:] == signal[1, 121:]).all()
    assert (fixed[2, :10] == signal[2, 10]).all()
    assert usable.tolist() == [lead != 3 for lead in range(12)] and not fixed[3].any()
    broken[5:] = np.nan
    with pytest.raises(data.DataError, match="too little valid signal"):
        data.repair(broken, np.ones(12, bool), fs)
    with pytest.raises(data.DataError, match="every lead is flat"):
        data.repair(np.ones((12, 5000), np.float32), np.ones(12, bool), fs)


@pytest.mark.parametrize("fs, rate", [(500, 100), (360, 100), (257, 250), (100, 500), (500, 500)])
def test_resampling_keeps_a_sine(tmp_path, fs, rate):
    n = 10 * fs
    wave = lambda t: 0.8 * np.sin(2 * np.pi * 7 * t + 0.3) + 0.5
    path = write(tmp_path / "a", np.tile(wave(np.arange(n) / fs), (12, 1)), fs=fs, gain=10000)
    ecg, _, _ = data.load_record(path, rate)
    assert ecg.shape == (12, 10 * rate) and ecg.dtype == np.int16
    inner = slice(rate // 5, -rate // 5)
    np.testing.assert_allclose(ecg[0, inner] / 1000, wave(np.arange(10 * rate) / rate)[inner], atol=0.004)
    assert abs(ecg[0, :2] / 1000 - wave(np.arange(2) / rate)).max() < 0.1  # no ringing from the offset at the edge


@pytest.mark.parametrize("crop, start, stop", [("first", 0, 1000), ("center", 500, 1500), ("cpsc-merl", 0, 500)])
def test_crop_and_pad(tmp_path, crop, start, stop):
    signal = beats(n=2000, fs=100)
    ecg, _, _ = data.load_record(write(tmp_path / "long", signal, fs=100), 100, crop)
    np.testing.assert_array_equal(ecg[:, :stop - start], np.rint(signal[:, start:stop] * 1000))
    assert not ecg[:, stop - start:].any()
    ecg, _, _ = data.load_record(write(tmp_path / "short", signal[:, :450], fs=100), 100, crop)
    np.testing.assert_array_equal(ecg[:, :450], np.rint(signal[:, :450] * 1000))
    assert not ecg[:, 450:].any()


def test_clipping(tmp_path):
    signal = beats()
    signal[4, 7], signal[4, 9] = 40, -40
    ecg, _, notes = data.load_record(write(tmp_path / "a", signal, gain=500), 500)
    assert (ecg[4, 7], ecg[4, 9]) == (32767, -32767) and notes == {"samples clipped at 32.767 mV": 2}


FAULTS = {  # what is done to a good record -> the reason it is dropped for
    "file is missing": lambda p: p.with_suffix(".dat").unlink(),
    "signal file is truncated": lambda p: p.with_suffix(".dat").write_bytes(p.with_suffix(".dat").read_bytes()[:-2]),
    "signal file is longer than its header says": lambda p: edit(p.with_suffix(".hea"), " 12 500 5000", " 12 500 4000"),
    "zero gain": lambda p: edit(p.with_suffix(".hea"), "1000(0)/mV", "0(0)/mV"),
    "wrong lead count": lambda p: edit(p.with_suffix(".hea"), " 12 500", " 11 500"),
    "not readable by wfdb": lambda p: p.with_suffix(".hea").write_bytes(bytes(range(128, 256)) * 4),
    "none of the twelve leads": lambda p: p.with_suffix(".hea").write_text(
        "".join(line.rsplit(" ", 1)[0] + f" ch{i}\n" if i else line + "\n"
                for i, line in enumerate(p.with_suffix(".hea").read_text().splitlines()))),
    "a lead occurs twice": lambda p: edit(p.with_suffix(".hea"), " V6", " V5"),
    "unit 'mmHg' is no voltage": lambda p: edit(p.with_suffix(".hea"), "/mV", "/mmHg"),
    "sampling rate is zero": lambda p: edit(p.with_suffix(".hea"), " 12 500 ", " 12 0 "),
    "too little valid signal": lambda p: write(p, np.full((12, 5000), np.nan)),
    "every lead is flat": lambda p: write(p, np.full((12, 5000), 0.3)),
}


def test_malformed_records_are_named_counted_and_not_fatal(tmp_path):
    source = csv_source(tmp_path / "src", len(FAULTS) + 2)
    for i, fault in enumerate(FAULTS.values(), 1):
        fault(tmp_path / "src" / f"r{i}")
    store = data.prepare("csv", source, tmp_path / "dst", workers=1)
    assert store.records["id"].tolist() == ["r0", f"r{len(FAULTS) + 1}"]
    dropped = store.meta["dropped"]
    assert list(dropped) == list(FAULTS)
    for i, reason in enumerate(FAULTS, 1):
        assert dropped[reason]["records"] == 1
        assert f"r{i}" in dropped[reason]["examples"][0] and "\n" not in dropped[reason]["examples"][0]
    for i in (0, 1):
        expected, _, _ = data.load_record(tmp_path / "src" / store.records["id"][i], 100)
        np.testing.assert_allclose(store.ecg([i])[0], expected / 1000, atol=1e-6)


def test_truncated_file_of_another_format(tmp_path):
    path = write(tmp_path / "a", beats(), fmt="212")
    path.with_suffix(".dat").write_bytes(path.with_suffix(".dat").read_bytes()[:-5000])
    with pytest.raises(data.DataError, match="a: not readable by wfdb"):
        data.read_record(path)


# ---- headers: every form that header(5) allows, and what is none ------------------------------------------------------

def header(path, record, lines, tail="", newline="\n", encoding="utf-8"):
    path.with_suffix(".hea").write_bytes((newline.join([record, *lines]) + newline + tail).encode(encoding))
    return path


@pytest.fixture
def plain(tmp_path):
    """A record of format 16 with 12 leads, 5,000 samples at 500 Hz -> its path, signal, signal lines as lists of fields."""
    signal = beats()
    path = write(tmp_path / "a", signal)
    return path, signal, [line.split() for line in path.with_suffix(".hea").read_text().splitlines()[1:13]]


RECORD_LINES = ["a 12 500 5000", "a 12 500 5000 12:00:00 01/02/2003", "a 12 500/1000(17) 5000", "a\t12  500.0\t5000  ", "a.mat 12 5e2 5000",
                "a 12 500", "a 12 500 0", "\n\n  # a comment first\n\t#another\na 12 500 5000"]
SPOILT_RECORD_LINES = {  # record line -> the reason
    "a 12": "sampling rate is no number", "a 12 5x0 5000": "sampling rate is no number", "a 12 nan 5000": "sampling rate is no number",
    "a 12 : 5000": "sampling rate is no number", "a 12 1e999 5000": "sampling rate is no number", "a 12 0 5000": "sampling rate is zero",
    "a 12 5 5000": "sampling rate is not 50 to 20000 Hz", "a 12 500000 5000": "sampling rate is not 50 to 20000 Hz",
    "a 12 -500 5000": "sampling rate is not 50 to 20000 Hz", "a 11 500 5000": "wrong lead count", "a 0 500 5000": "wrong lead count",
    "a 12 500 999999999999999": "signal file is truncated", "a 12 500 5x00": "not readable by wfdb", "12 500 5000": "wrong lead count",
    "version https://git-lfs.github.com/spec/v1": "not readable by wfdb"}


@pytest.mark.parametrize("line", RECORD_LINES)
def test_record_lines(plain, line):
    path, signal, fields = plain
    record = data.read_record(header(path, line, map(" ".join, fields), "\t# Age: 61\n #Dx: 1\n"))
    np.testing.assert_allclose(record.signal, signal, atol=1e-6)
    assert record.fs == 500


@pytest.mark.parametrize("line", SPOILT_RECORD_LINES)
def test_spoilt_record_lines(plain, line):
    path, _, fields = plain
    with pytest.raises(data.DataError) as error:
        data.read_record(header(path, line, map(" ".join, fields)))
    assert error.value.reason == SPOILT_RECORD_LINES[line] and str(path) in str(error.value)


SIGNAL_LINES = {  # what is done to the fields of each signal line -> what the samples become
    "as they are": (lambda f: f, 1), "tabs": (lambda f: ["\t".join(f) + " "], 1), "frame": (lambda f: [f[0], "16x1:0+0", *f[2:]], 1),
    "gain alone": (lambda f: [*f[:2], "1000", *f[3:]], 1), "exponent": (lambda f: [*f[:2], "1e3/mV", *f[3:]], 1),
    "inverted": (lambda f: [*f[:2], "-1000/mV", *f[3:]], -1), "microvolts": (lambda f: [*f[:2], "1/\u00b5V", *f[3:]], 1),
    "Greek mu": (lambda f: [*f[:2], "1/\u03bcV", *f[3:]], 1), "brackets": (lambda f: [*f[:2], "1000/[mV]", *f[3:]], 1),
    "zero": (lambda f: [*f[:2], "1000/mV", "16", "0", *f[5:]], 1), "names": (lambda f: [*f[:8], "ECG lead " + f[8].lower()], 1),
    "quotes": (lambda f: [*f[:8], f'"{f[8]}"'], 1), "MDC": (lambda f: [*f[:8], "MDC_ECG_LEAD_" + f[8]], 1),
    "name at once": (lambda f: [*f[:3], f[8]], 1)}
SPOILT_SIGNAL_LINES = {
    "no gain": (lambda f: f[:2]), "gain is no number": (lambda f: [*f[:2], "nan/mV", *f[3:]]), "zero gain": (lambda f: [*f[:2], "0/mV", *f[3:]]),
    "unit 'mmHg' is no voltage": (lambda f: [*f[:2], "1000/mmHg", *f[3:]]), "not readable by wfdb": (lambda f: [*f[:4], "x0", *f[5:]]),
    "none of the twelve leads": (lambda f: f[:8]), "names a file outside of its folder": (lambda f: ["../" + f[0], *f[1:]]),
    "signal file is truncated": (lambda f: [f[0], "16+24", *f[2:]]), "file is missing": (lambda f: ["b.dat", *f[1:]])}


@pytest.mark.parametrize("form", SIGNAL_LINES)
@pytest.mark.parametrize("encoding, newline", [("utf-8", "\n"), ("latin-1", "\r\n")])
def test_signal_lines(plain, form, encoding, newline):
    path, signal, fields = plain
    change, factor = SIGNAL_LINES[form]
    encoding = "utf-8" if form == "Greek mu" else encoding  # Latin-1 has no Greek
    header(path, "a 12 500 5000", [" ".join(change(f)) for f in fields], newline=newline, encoding=encoding)
    record = data.read_record(path)
    np.testing.assert_allclose(record.signal, factor * signal, atol=1e-6)
    assert data.to_twelve(record)[1].all() and record.checksum_ok


@pytest.mark.parametrize("reason", SPOILT_SIGNAL_LINES)
def test_spoilt_signal_lines(plain, reason):
    path, _, fields = plain
    header(path, "a 12 500 5000", [" ".join(SPOILT_SIGNAL_LINES[reason](f)) for f in fields])
    with pytest.raises(data.DataError) as error:
        data.load_record(path, 100)
    assert error.value.reason == reason and str(path.parent) in str(error.value)


@pytest.mark.parametrize("name", ["/etc/hostname", "../secret.dat", "x/../../secret.dat", "..\\secret.dat"])
def test_a_header_does_not_lead_out_of_its_folder(plain, name):
    path, _, fields = plain
    path.with_suffix(".dat").rename(path.parent.parent / "secret.dat")
    for line in ("a 12 500 5000", "a/1 12 500 5000"):
        lines = [f"{name.removesuffix('.dat')} 5000"] if "/" in line else [" ".join([name, *f[1:]]) for f in fields]
        with pytest.raises(data.DataError, match="outside of its folder"):
            data.read_record(header(path, line, lines))


def test_several_samples_a_frame_and_skew(plain):
    path, signal, fields = plain
    raw = np.fromfile(path.with_suffix(".dat"), "<i2").reshape(-1, 12)
    header(path, "a 12 500 5000", [" ".join([f[0], "16:2" if i == 0 else "16", *f[2:]]) for i, f in enumerate(fields)])
    record = data.read_record(path)
    np.testing.assert_allclose(record.signal[0, :-2], signal[0, 2:], atol=1e-6)
    np.testing.assert_allclose(record.signal[1:], signal[1:], atol=1e-6)
    header(path, "a 12 500 5000", [" ".join([f[0], f"16:{i}", *f[2:]]) for i, f in enumerate(fields)])  # each another
    for part in (None, lambda samples, fs: (1000, 3000), lambda samples, fs: (4000, 5000)):
        start, stop = part(0, 0) if part else (0, 5000)
        record = data.read_record(path, part)
        for i, (lead, whole) in enumerate(zip(record.signal, signal)):
            known = whole[start + i:stop + i]
            np.testing.assert_allclose(lead[:len(known)], known, atol=1e-6)
            assert np.isnan(lead[len(known):]).all() and len(lead) == stop - start
    for count in (2, 10, 500):  # of samples a frame: none is lost, even where there is a frame a second
        raw.reshape(-1, count, 12).transpose(0, 2, 1).tofile(path.with_suffix(".dat"))
        header(path, f"a 12 {500 / count:g}", [" ".join([f[0], f"16x{count}", *f[2:]]) for f in fields])
        record = data.read_record(path)
        assert record.fs == 500
        np.testing.assert_allclose(record.signal, signal, atol=1e-6)


def test_leads_of_several_rates_and_channels_that_are_none(tmp_path):
    """As many samples as the finest of the twelve has; what is no lead may have any unit and rate."""
    signal, path = beats(n=1000, leads=2), tmp_path / "a"
    fine, coarse, pressure = (np.rint(1000 * x).astype("<i2").reshape(250, -1) for x in (
        signal[0], signal[1].reshape(-1, 2).mean(1), np.arange(250) / 1000))
    np.concatenate([fine, coarse, pressure], 1).tofile(path.with_suffix(".dat"))
    header(path, "a 3 25 250", ["a.dat 16x4 1000/mV 16 0 0 0 0 II", "a.dat 16x2 1000/mV 16 0 0 0 0 V1", "a.dat 16 1/mmHg 16 0 0 0 0 ABP"])
    record = data.read_record(path)
    assert record.fs == 100 and record.names == ["II", "V1", "ABP"]
    np.testing.assert_allclose(record.signal[0], signal[0], atol=1e-6)
    np.testing.assert_allclose(record.signal[1], signal[1].reshape(-1, 2).mean(1).repeat(2), atol=0.00051)
    ecg, usable, _ = data.load_record(path, 100)
    assert usable.nonzero()[0].tolist() == [1, 6] and np.array_equal(ecg[1], np.rint(1000 * signal[0]))
    with pytest.raises(data.DataError, match="sampling rate is not 50 to 20000 Hz"):
        edit(path.with_suffix(".hea"), "16x2", "16")
        data.read_record(path)


def test_leads_in_several_files(plain):
    path, signal, fields = plain
    raw = np.fromfile(path.with_suffix(".dat"), "<i2").reshape(-1, 12)
    for name, columns in (("x", slice(0, 5)), ("y", slice(5, 12))):
        (path.parent / f"{name}.dat").write_bytes(b"head" * (name == "y") + raw[:, columns].tobytes())
    header(path, "a 12 500", [" ".join(["x.dat", "16", *f[2:]] if i < 5 else ["y.dat", "16+4", *f[2:]]) for i, f in enumerate(fields)])
    np.testing.assert_allclose(data.read_record(path).signal, signal, atol=1e-6)


def test_leads_of_a_file_that_are_apart_are_refused(plain):
    """The format wants the lines of a file's leads one behind another."""
    path, _, fields = plain
    raw = np.fromfile(path.with_suffix(".dat"), "<i2").reshape(-1, 12)
    for name, columns in (("x", slice(0, 12, 2)), ("y", slice(1, 12, 2))):
        (path.parent / f"{name}.dat").write_bytes(raw[:, columns].tobytes())
    header(path, "a 12 500", [" ".join([f"{'xy'[i % 2]}.dat", *f[1:]]) for i, f in enumerate(fields)])
    with pytest.raises(data.DataError, match="not readable by wfdb .the leads of a file are apart"):
        data.read_record(path)


def test_segments(tmp_path):
    """One behind another; a gap (~) and a lead that a segment lacks are NaN; only what is kept is read."""
    signal = beats(6000)
    write(tmp_path / "s0", signal[:, :2000])
    write(tmp_path / "s1", signal[:11, 2000:3000], fmt="212", gain=200)
    write(tmp_path / "s2", signal[:, 4000:])
    header(tmp_path / "a", "a/5 12 500 6000", ["lay 0", "s0 2000", "s1 1000", "~ 1000", "s2 2000"])
    record = data.read_record(tmp_path / "a")
    np.testing.assert_allclose(record.signal[:, :2000], signal[:, :2000], atol=1e-6)
    np.testing.assert_allclose(record.signal[:11, 2000:3000], signal[:11, 2000:3000], atol=0.0026)
    assert np.isnan(record.signal[11, 2000:3000]).all() and np.isnan(record.signal[:, 3000:4000]).all()
    np.testing.assert_allclose(record.signal[:, 4000:], signal[:, 4000:], atol=1e-6)
    expected = wfdb.rdrecord(str(tmp_path / "s2")).p_signal
    np.testing.assert_allclose(record.signal[:, 4000:].T, expected, atol=1e-6)
    (tmp_path / "s2.dat").unlink()
    with pytest.raises(data.DataError, match="file is missing"):
        data.load_record(tmp_path / "a", 100)
    header(tmp_path / "a", "a/3 12 500", ["s0 2000", "s1 1000", "s2 999999999999"])
    assert data.read_record(tmp_path / "a", part=lambda samples, fs: (100, 2500)).signal.shape == (12, 2400)
    for lines, message in ((["a 500", "s1 1000"], "segments of its own"), (["s0 1999", "s1 1000"], "another rate or length"),
                           (["s0 2000", "s1"], "segments are not those")):
        with pytest.raises(data.DataError, match=message):
            data.read_record(header(tmp_path / "a", "a/2 12 500", lines))


@pytest.mark.parametrize("fmt", ["16", "212", "24", "32", "80", "8", "61", "160", "311", "516"])
def test_only_what_is_kept_is_read(tmp_path, fmt):
    signal = np.round(beats(20000) * (25 if fmt in ("80", "8") else 100 if fmt == "311" else 200)) / 1000
    path = write(tmp_path / "a", signal, fmt=fmt if fmt in ("16", "212", "24", "32", "80", "516") else "16")
    raw = np.rint(signal.T * 1000).astype(int)
    if fmt in ("8", "61", "160", "311"):  # wfdb reads them, and writes none
        first = raw[0]
        {"8": lambda: np.diff(raw, axis=0, prepend=raw[:1]).astype("i1"), "61": lambda: raw.astype(">i2"),
         "160": lambda: (raw + 32768).astype("<u2"), "311": lambda: ((raw.reshape(-1, 3) & 1023) << [0, 10, 20]).sum(1).astype("<u4"),
         }[fmt]().tofile(path.with_suffix(".dat"))
        text = path.with_suffix(".hea").read_text().splitlines()
        lines = [line.split() for line in text[1:13]]
        header(path, text[0], [" ".join([f[0], fmt, *f[2:5], str(first[i]), *f[6:]]) for i, f in enumerate(lines)])
    whole = data.read_record(path).signal
    np.testing.assert_allclose(whole, signal, atol=1e-6)
    for crop, part in (("first", slice(0, 5000)), ("center", slice(7500, 12500)), ("cpsc-merl", slice(0, 2500))):
        kept = data.load_record(path, 500, crop)[0]
        np.testing.assert_allclose(kept[:, :part.stop - part.start], whole[:, part] * 1000, atol=0.51)


def test_a_header_that_claims_too_much_is_cheap(tmp_path):
    """A lossless file says little of its length: what is not kept is neither read nor allocated."""
    import tracemalloc
    path = write(tmp_path / "a", beats(leads=8), fmt="516")
    edit(path.with_suffix(".hea"), " 8 500 5000", " 8 500 900000000000")
    tracemalloc.start()
    expected = data.load_record(path, 500)[0]
    np.testing.assert_allclose(expected[0], np.rint(beats()[0] * 1000), atol=1)
    for old, new in (("516 ", "516x60000 "), ("516 ", "516:900000000 ")):
        text = path.with_suffix(".hea").read_text()
        path.with_suffix(".hea").write_text(text.replace(old, new))
        with pytest.raises(data.DataError, match="beyond all measure"):
            data.load_record(path, 500)
        path.with_suffix(".hea").write_text(text)
    with pytest.raises(data.DataError, match="not readable by wfdb"):
        data.load_record(path, 500, "center")
    assert tracemalloc.get_traced_memory()[1] < 60e6
    tracemalloc.stop()
    path.with_suffix(".hea").write_bytes(b"a 12 500 5000\n" + b"x" * 2**21)
    with pytest.raises(data.DataError, match="not readable"):
        data.read_record(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize("fmt", ["16", "212"])
def test_only_regular_files_are_opened(tmp_path, fmt):
    for suffix in (".hea", ".dat"):
        path = write(tmp_path / suffix[1:] / "a", beats(), fmt=fmt)
        path.with_suffix(suffix).unlink()
        os.mkfifo(path.with_suffix(suffix))
        with pytest.raises(data.DataError, match="no regular file"):
            data.read_record(path)
        path.with_suffix(suffix).unlink()
        path.with_suffix(suffix).symlink_to("/dev/zero")
        with pytest.raises(data.DataError, match="no regular file"):
            data.read_record(path)


def test_whatever_one_record_is_the_others_are_prepared(tmp_path, monkeypatch):
    source = csv_source(tmp_path / "src", 8)
    src = tmp_path / "src"
    for name in ("r1.hea", "r2.dat", "r3.hea"):
        (src / name).unlink()
    (src / "r1.hea").mkdir()
    (src / "r2.dat").write_bytes(b"")
    (src / "r3.hea").symlink_to(src / "r3.hea")
    rows = list(csv.DictReader(open(source))) + [dict(record="x" * 300, report="", patient="")]
    table(source, rows)
    real = data.to_twelve
    monkeypatch.setattr(data, "to_twelve", lambda record: 1 / 0 if record.signal[0, 400] == beats(seed=4)[0, 400].astype("f4") and
                        np.allclose(record.signal, beats(seed=4), atol=1e-6) else real(record))
    store = data.prepare("csv", source, tmp_path / "dst", workers=1)
    assert store.records["id"].tolist() == ["r0", "r5", "r6", "r7"]
    dropped = store.meta["dropped"]
    assert {"a folder, not a file", "signal file is truncated", "not readable (ZeroDivisionError)"} <= set(dropped) and len(dropped) == 5
    assert all("\n" not in entry["examples"][0] for entry in dropped.values())
    for error in (MemoryError(), OSError(28, "No space left on device")):
        def fail(record, error=error):
            raise error
        monkeypatch.setattr(data, "to_twelve", fail)  # what the system lacks is no fault of a record
        with pytest.raises((MemoryError, data.DataError), match="No space left|^$"):
            data.prepare("csv", source, tmp_path / f"other{type(error).__name__}", workers=1)


# ---- the store ------------------------------------------------------------------------------------------------------

COMMAND = [sys.executable, str(ROOT / "data.py"), "prepare"]


def contents(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A data set of 1,500 records (15 files under 100 names each, one missing), and the store of an undisturbed run."""
    folder = tmp_path_factory.mktemp("many")
    for i in range(15):
        write(folder / f"r{i}", beats(seed=i))
    for i in range(15, 1500):
        (folder / f"r{i}.hea").symlink_to(folder / f"r{i % 15}.hea")
    (folder / "r100.hea").unlink()
    table(folder / "list.csv", [dict(record=f"r{i}", report=f"sinus rhythm, number {i}") for i in range(1500)])
    data.prepare("csv", folder / "list.csv", folder / "whole", workers=1)
    return folder


def test_killed_preparing_goes_on_without_loss_or_doubling(many, tmp_path):
    partial, state, moments = tmp_path / "dst.partial", tmp_path / "dst.partial" / "store.json", []
    for wanted, workers in ((1, "1"), (500, "2"), (1000, "1")):  # rows done when the axe falls
        command = [*COMMAND, "csv", str(many / "list.csv"), str(tmp_path / "dst"), "--workers", workers]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (state.exists() and json.loads(state.read_text())["rows"] >= wanted):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        moments.append(json.loads(state.read_text())["rows"])
        for folder in (tmp_path / "dst", partial):
            with pytest.raises(data.DataError, match="did not finish"):
                data.Store(folder)
        with open(partial / "ecg.i16", "ab") as file:  # half a task that did not get into store.json
            file.write(b"half a task")
    assert len(moments) == 3 and moments == sorted(moments) and moments[-1] < 1500
    store = data.prepare("csv", many / "list.csv", tmp_path / "dst", workers=1)
    assert contents(tmp_path / "dst") == contents(many / "whole") and len(store) == 1499
    assert not partial.exists()


def test_workers_leave_with_a_killed_parent():
    code = (f"import sys, time, multiprocessing; sys.path.insert(0, {str(ROOT)!r}); import data\n"
            "results = data.in_order(time.sleep, iter([0, 0, 60, 60]), 2)\n"
            "next(results), next(results)\n"
            "print(*[p.pid for p in multiprocessing.active_children()], flush=True)\n"
            "next(results)")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    workers = process.stdout.readline().split()

    def alive(pid):  # and not a zombie
        stat = Path(f"/proc/{pid}/stat")
        return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] not in "ZX"

    assert len(workers) == 2 and all(map(alive, workers))
    process.kill()
    process.wait()
    deadline = time.time() + 20
    while any(map(alive, workers)) and time.time() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers))


def test_two_processes_prepare_one_store_once(many, tmp_path):
    command = [*COMMAND, "csv", str(many / "list.csv"), str(tmp_path / "dst"), "--workers", "1"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [p.communicate() for p in processes]
    assert [p.returncode for p in processes] == [0, 0]
    assert sum("preparing" in err for _, err in outputs) == 1 and outputs[0][0] == outputs[1][0]
    assert contents(tmp_path / "dst") == contents(many / "whole")


def test_store_errors(many, tmp_path):
    def damaged(name, change):
        folder = tmp_path / name
        folder.mkdir()
        for file, content in contents(many / "whole").items():
            (folder / file).write_bytes(content)
        change(folder)
        return folder

    def state(folder, **changes):
        name = folder / "store.json"
        name.write_text(json.dumps(json.loads(name.read_text()) | changes))

    cases = {"no store .*No such file": lambda f: (f / "store.json").unlink(),
             "no store .*Expecting": lambda f: (f / "store.json").write_text("{"),
             "not of a store": lambda f: state(f, format=["ecg-language store", 999]),
             "did not finish": lambda f: state(f, complete=False),
             "ecg.i16: damaged": lambda f: os.truncate(f / "ecg.i16", 1000),
             "records.csv: damaged": lambda f: edit(f / "records.csv", "number 7", "number 8")}
    for i, (message, change) in enumerate(cases.items()):
        with pytest.raises(data.DataError, match=message):
            data.Store(damaged(f"s{i}", change)).records
    with pytest.raises(data.DataError, match="no store"):
        data.Store(tmp_path / "nowhere")

    def flip(folder):
        with open(folder / "ecg.i16", "r+b") as file:
            file.seek(12345)
            file.write(b"\x55\xaa")
    folder = damaged("flipped", flip)
    assert len(data.Store(folder)) == 1499
    with pytest.raises(data.DataError, match="ecg.i16: damaged"):
        data.Store(folder, verify=True)
    with pytest.raises(data.DataError, match="other settings"):
        data.prepare("csv", many / "list.csv", many / "whole", rate=125)


class Killed(BaseException):
    pass


def test_killed_at_the_end_of_preparing(tmp_path, monkeypatch):
    """Before every rename from the first index file to the store's own, twice in a row."""
    source, replace, left = csv_source(tmp_path / "src", 3), os.replace, [0]
    data.prepare("csv", source, tmp_path / "whole")

    def dying(old, new):
        if not new.endswith("/store.json") or "complete\": true" in Path(old).read_text():
            left[0] -= 1
            if not left[0]:
                raise Killed
        replace(old, new)
    monkeypatch.setattr(os, "replace", dying)
    for moment in range(1, 9):  # six files of numbers, store.json, the folder
        for left[0] in (moment, max(1, moment - 1)):
            with pytest.raises(Killed):
                data.prepare("csv", source, tmp_path / f"dst{moment}")
        data.prepare("csv", source, tmp_path / f"dst{moment}")
        written = contents(tmp_path / f"dst{moment}")
        assert written == contents(tmp_path / "whole") and len(written) == 9, moment
    left[0] = 9
    data.prepare("csv", source, tmp_path / "dst9")
    assert left[0] == 1


def test_index(tmp_path):
    records = [dict(split="train", statements=["a", "b"], peaks=[5, 300], report="x, y"),
               dict(split="unused", statements=[], peaks=[], report=""),
               dict(split="val", statements=["b", "\u00e4 \"", "b"], peaks=[7], report="")]
    table(tmp_path / "records.csv", [{k: v if isinstance(v, str) else json.dumps(v) for k, v in record.items()}
                                     for record in records])
    files = data.index(tmp_path)
    ints = lambda name: np.frombuffer(files[name], f"<i{int(name[-2:]) // 8}").tolist()
    assert files["split.u8"] == b"\0\3\1" and json.loads(files["statements.json"]) == ["a", "b", "\u00e4 \""]
    assert ints("peaks.i32") == [5, 300, 7] and ints("peaks.i64") == [0, 2, 2, 3]
    assert ints("statements.i32") == [0, 1, 1, 2, 1] and ints("statements.i64") == [0, 2, 2, 5]


@pytest.mark.parametrize("name", ["split.u8", "peaks.i32", "peaks.i64", "statements.i32", "statements.i64", "statements.json"])
def test_damaged_index(tmp_path, name):
    source, file = csv_source(tmp_path / "src", 2), tmp_path / "dst" / name
    data.prepare("csv", source, tmp_path / "dst")
    content = file.read_bytes()
    for damage in (lambda: file.write_bytes(content[:-1] + bytes([content[-1] ^ 1])), lambda: os.truncate(file, 1), file.unlink):
        damage()
        for open_ in (lambda: data.Store(tmp_path / "dst"), lambda: data.prepare("csv", source, tmp_path / "dst")):
            with pytest.raises(data.DataError, match=f"dst/{name}: damaged .*; delete it and prepare the data set again"):
                open_()
        file.write_bytes(content)
    store = data.Store(tmp_path / "dst")
    file.write_bytes(content[::-1] + b" ")
    with pytest.raises(data.DataError, match=f"{name}: damaged"):
        store.verify()


def test_what_is_read_without_the_records(tmp_path):
    """Of every record the same as in records, though records.csv is away; nothing of it is sent along."""
    store = data.prepare("simulated", "300", tmp_path / "dst")
    records, ecg = store.records, store.ecg(slice(None))
    (tmp_path / "dst" / "records.csv").rename(tmp_path / "records.csv")
    store = pickle.loads(pickle.dumps(store))
    assert len(pickle.dumps(store)) < 10_000 and len(pickle.dumps(store.tags)) < 1000
    tags = pickle.loads(pickle.dumps(store.tags))
    assert list(tags) == list(store.tags) == list(data.report_tags(store)) == records["statements"].tolist()
    assert tags[-1] == records["statements"][299] and len(set(tags.table)) == len(tags.table)
    for row in (300, -301):
        with pytest.raises(IndexError):
            tags[row]
    for split in data.SPLITS:
        assert store.rows(split).tolist() == np.flatnonzero(records["split"] == split).tolist()
    rows = [7, 7, 299, 0]
    peaks = store.peaks(rows)
    assert peaks.dtype == np.int32 and peaks.shape[1] == max(len(records["peaks"][row]) for row in rows)
    for row, found in zip(rows, peaks):
        assert found[found >= 0].tolist() == records["peaks"][row] and (found[len(records["peaks"][row]):] == -1).all()
    raw = np.fromfile(tmp_path / "dst" / "ecg.i16", "<i2").reshape(300, 12, 1000)
    for some in (rows, np.array(rows), [], [-1]):
        assert (store.microvolts(some) == raw[some]).all() and store.microvolts(some).dtype == np.int16
        assert store.ecg(some).dtype == np.float32 and (store.ecg(some) == ecg[some]).all()
        assert store.peaks(some).shape[0] == len(some)
    assert (ecg == raw.astype(np.float32) / 1000).all()
    store.microvolts(rows)[:] = 0  # a copy
    assert (store.microvolts(rows) == raw[rows]).all()
    assert store.peaks([-1]).tolist() == store.peaks([299]).tolist()
    for read in (store.microvolts, store.peaks):
        with pytest.raises(IndexError):
            read([300])
    with pytest.raises(data.DataError, match="records.csv: damaged .*No such file"):
        store.records
    os.truncate(tmp_path / "dst" / "ecg.i16", 24000 * 299)
    with pytest.raises(data.DataError, match="ecg.i16: damaged .*ends in record 299"):
        store.microvolts([299])


def test_records_without_peaks_and_statements(tmp_path):
    store = data.prepare("simulated", "1", tmp_path / "dst")
    table(tmp_path / "records.csv", [dict(split="test", statements="[]", peaks="[]")])
    for name, block in data.index(tmp_path).items():
        (tmp_path / name).write_bytes(block)
    store.path = str(tmp_path)
    assert store.peaks([0]).tolist() == [[-1]] and store.rows("test").tolist() == [0]
    assert list(store.tags) == [[]] and store.tags.table == [] and store.tags.numbers_of(0).tolist() == []


def test_tags():
    tags = data.Tags.from_lists([["b", "a"], [], ["a", "c", "a"]])
    assert tags.table == ["b", "a", "c"] and tags.numbers.tolist() == [0, 1, 1, 2, 1] and tags.offsets.tolist() == [0, 2, 2, 5]
    assert (tags.numbers.dtype, tags.offsets.dtype) == (np.int32, np.int64) and tags.numbers_of(2).tolist() == [1, 2, 1]
    assert list(pickle.loads(pickle.dumps(tags))) == [["b", "a"], [], ["a", "c", "a"]] and len(tags) == 3
    assert list(data.Tags.from_lists([])) == []


def test_a_large_store_opens_at_once(tmp_path):
    enlarge(data.prepare("simulated", "256", tmp_path / "small"), tmp_path / "dst", 100_000)
    start = time.perf_counter()
    store = data.Store(tmp_path / "dst")
    assert len(store) == len(store.tags) == 100_000 and store.tags[99_999] == store.tags[99_999 % 256]
    assert store.peaks([256 * 390 + 5]).tolist() == store.peaks([5]).tolist() and len(store.rows("train")) > 60_000
    assert time.perf_counter() - start < 2  # on a busy machine; 0.1 s on a free one


def test_partial_of_other_settings_is_refused(many, tmp_path):
    process = subprocess.Popen([*COMMAND, "csv", str(many / "list.csv"), str(tmp_path / "dst"), "--workers", "1"],
                               stderr=subprocess.DEVNULL)
    while not (tmp_path / "dst.partial" / "store.json").exists():
        time.sleep(0.001)
    process.kill()
    process.wait()
    with pytest.raises(data.DataError, match="dst.partial: left by a run with other settings"):
        data.prepare("csv", many / "list.csv", tmp_path / "dst", rate=125)
    with open(tmp_path / "dst.partial" / "ecg.i16", "r+b") as file:
        file.write(b"\x55\xaa")
    with pytest.raises(data.DataError, match="ecg.i16: damaged"):
        data.prepare("csv", many / "list.csv", tmp_path / "dst")


def test_command_line_errors_and_info(tmp_path):
    result = subprocess.run([*COMMAND, "ptbxl", str(tmp_path), str(tmp_path / "dst")], capture_output=True, text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr and "scp_statements.csv" in result.stderr
    source = csv_source(tmp_path / "src", 2)
    result = subprocess.run([*COMMAND, "csv", str(source), str(tmp_path / "dst")], capture_output=True, text=True)
    assert result.returncode == 0 and "2 of 2 records" in result.stdout
    result = subprocess.run([*COMMAND[:-1], "info", str(tmp_path / "dst"), "--verify"], capture_output=True, text=True)
    assert result.returncode == 0 and "2 of 2 records" in result.stdout


# ---- data sets ------------------------------------------------------------------------------------------------------

def mimic_tree(root):
    """Six studies in the layout of MIMIC-IV-ECG 1.0. 3: all NaN; 4: no file; 5: empty report; 6: three words."""
    order = ["I", "II", "III", "aVR", "aVF", "aVL", "V1", "V2", "V3", "V4", "V5", "V6"]
    records, measured = [], []
    reports = {1: ["Sinus rhythm", "*** Anterior infarct ***", "Sinus rhythm", "Abnormal EKG"],
               2: ["Atrial fibrillation with rapid response."], 3: ["Sinus rhythm", "Normal ECG"],
               4: ["Sinus rhythm", "Normal ECG"], 5: [], 6: ["Sinus bradycardia", "Borderline"]}
    for i, report in reports.items():
        subject, study = 10000000 + i // 2, 40000000 + i
        path = f"files/p{str(subject)[:4]}/p{subject}/s{study}/{study}"
        ids = dict(subject_id=subject, study_id=study)
        records.append(ids | dict(file_name=study, ecg_time="2180-07-23 08:44:00", path=path))
        measured.append(ids | dict(cart_id=1, ecg_time="2180-07-23 08:44:00") | dict(bandwidth="0.005-150 Hz")
                        | {f"report_{k}": report[k] if k < len(report) else "" for k in range(18)})
        if i != 4:
            write(root / path, beats() if i != 3 else np.full((12, 5000), np.nan), names=order, gain=200)
    measured.append(measured[0] | dict(study_id=49999999))
    table(root / "record_list.csv", records)
    table(root / "machine_measurements.csv", measured)


def test_mimic(tmp_path):
    mimic_tree(tmp_path / "mimic")
    store = data.prepare("mimic", tmp_path / "mimic", tmp_path / "dst", min_words=4)
    assert store.records["id"].tolist() == ["40000001", "40000002"]
    assert {reason: entry["records"] for reason, entry in store.meta["dropped"].items()} == {
        "too little valid signal": 1, "file is missing": 1, "report is empty": 1, "report of fewer than 4 words": 1,
        "study is not in record_list.csv": 1}
    assert store.records["statements"][0] == ["sinus rhythm", "anterior infarct", "abnormal ecg"]
    assert store.records["report"][0] == "Sinus rhythm. *** Anterior infarct ***. Sinus rhythm. Abnormal EKG"
    assert store.records["statements"][1] == ["atrial fibrillation with rapid response"]
    signal = np.round(beats() * 200) / 200
    peak = 40  # samples at 100 Hz; aVL is the sixth lead of the file, aVF the fifth
    np.testing.assert_allclose(store.ecg([0])[0][3:7, peak], signal[[3, 5, 4, 6], 5 * peak], atol=0.02)
    assert len(data.prepare("mimic", tmp_path / "mimic", tmp_path / "all")) == 3


def test_patients_do_not_cross_splits():
    splits = [data.split_by(str(10000000 + i), 0.98, 0.01) for i in range(20000)]
    assert splits == [data.split_by(str(10000000 + i), 0.98, 0.01) for i in range(20000)]
    shares = [splits.count(s) / 20000 for s in ("train", "val", "test")]
    np.testing.assert_allclose(shares, [0.98, 0.01, 0.01], atol=0.003)


def test_own_csv(tmp_path):
    src = tmp_path / "src"
    for name in ("a", "deep/b", "c"):
        write(src / name, beats())
    table(src / "mine.csv", [
        dict(record="a", report="Sinus rhythm. Normal ECG", patient="x", split="test", labels="SR; NORM"),
        dict(record="deep/b.hea", report="AF", patient="y", split="train", labels='{"AFIB": 80}'),
        dict(record="c", report="", patient="", split="", labels='["PVC"]')])
    store = data.open_data(f"csv:{src / 'mine.csv'}", rate=250, cache=tmp_path / "cache")
    assert store.records["codes"].tolist() == [{"SR": 100.0, "NORM": 100.0}, {"AFIB": 80}, {"PVC": 100.0}]
    assert store.records["split"].tolist()[:2] == ["test", "train"]
    assert store.records["patient"].tolist() == ["x", "y", "c"]
    assert store.records["statements"].tolist() == [["sinus rhythm", "normal ecg"], ["af"], []]
    assert store.ecg([0, 2]).shape == (2, 12, 2500) and store.ecg(slice(1, 2)).dtype == np.float32
    assert store.records["leads"].tolist() == ["1" * 12] * 3 and store.records["fold"].tolist() == [0, 0, 0]
    for rows, message in (([dict(record="a", report="")] * 2, "occurs twice"),
                          ([dict(record="a", report="", split="dev")], "split 'dev'"),
                          ([dict(record="a", report="", labels="[x")], "no JSON"),
                          ([dict(name="a")], "no column 'record'")):
        table(src / "bad.csv", rows)
        with pytest.raises(data.DataError, match=message):
            data.prepare("csv", src / "bad.csv", tmp_path / "bad")


def test_report_text_is_kept_to_the_letter(tmp_path):
    report = 'null, "NA";\n sinusrhythmus\r überhöht \\ 0.5 \'mV\''
    source = csv_source(tmp_path / "src", 1, report)
    assert data.prepare("csv", source, tmp_path / "dst").records["report"].tolist() == [report]
    source = csv_source(tmp_path / "na", 1, "NA")
    assert data.prepare("csv", source, tmp_path / "other").records["report"].tolist() == ["NA"]


def test_open_data(tmp_path, capsys):
    source = csv_source(tmp_path / "src", 2)
    first = data.open_data(f"csv:{source}", cache=tmp_path / "cache")
    assert f"preparing csv:{source} at 100 Hz" in capsys.readouterr().err
    again = data.open_data(f"csv:{source}", cache=tmp_path / "cache")
    assert again.path == first.path and "preparing" not in capsys.readouterr().err
    assert data.open_data(f"csv:{source}", cache=tmp_path / "cache", crop="center").path != first.path
    assert len(data.open_data(f"store:{first.path}")) == 2
    with pytest.raises(data.DataError, match="100 Hz, not 500"):
        data.open_data(f"store:{first.path}", rate=500)
    with pytest.raises(data.DataError, match="no such data: ptb:.* sources are ptbxl, mimic, csv, simulated"):
        data.open_data("ptb:here", cache=tmp_path / "cache")
    write(tmp_path / "src" / "r9", beats())  # the source has changed: no silent use of the old store
    table(source, [dict(record="r9", report="x")])
    with pytest.raises(data.DataError, match="from other records"):
        data.open_data(f"csv:{source}", cache=tmp_path / "cache")


@real
def test_ptbxl(tmp_path):
    """A copy with ten rows: 100 Hz, fallback to 500 Hz, none."""
    src = tmp_path / "ptbxl"
    src.mkdir()
    (src / "scp_statements.csv").write_text((PTBXL / "scp_statements.csv").read_text())
    rows = pd.read_csv(PTBXL / "ptbxl_database.csv", dtype=str, keep_default_na=False)
    has = [os.path.exists(PTBXL / f"{name}.hea") for name in rows["filename_hr"]]
    rows = rows[has].iloc[:10]
    rows.to_csv(src / "ptbxl_database.csv", index=False)
    with pytest.raises(data.DataError, match="physionet.org/content/ptb-xl"):
        data.prepare("ptbxl", src, tmp_path / "none")

    def link(name):
        for suffix in (".hea", ".dat"):
            (src / name).parent.mkdir(parents=True, exist_ok=True)
            (src / (name + suffix)).symlink_to(PTBXL / (name + suffix))
    for i in range(5):
        link(rows["filename_lr"].iloc[i])
    for i in range(3, 8):
        link(rows["filename_hr"].iloc[i])
    store = data.prepare("ptbxl", src, tmp_path / "s100")
    assert store.records["id"].tolist() == rows["ecg_id"].tolist()[:8]
    assert store.meta["dropped"]["waveform is not in this copy of PTB-XL"]["records"] == 2
    assert store.records["fold"].tolist() == rows["strat_fold"].astype(int).tolist()[:8]
    assert store.records["split"].tolist() == [{9: "val", 10: "test"}.get(f, "train") for f in store.records["fold"]]
    assert store.records["report"].tolist() == rows["report"].tolist()[:8]
    assert [json.dumps(c).replace('"', "'") for c in store.records["codes"]] == rows["scp_codes"].tolist()[:8]
    for i in (0, 6):  # as PTB-XL's own 100 Hz file, also where it was made from the one at 500 Hz
        expected = data.load_record(PTBXL / rows["filename_lr"].iloc[i], 100)[0] / 1000
        correlation = [np.corrcoef(a, b)[0, 1] for a, b in zip(store.ecg([i])[0], expected)]
        assert np.median(correlation) > (0.98 if i else 0.999999)
    for i in (0, 6):  # R peaks: those of the signal
        peaks, ecg = store.records["peaks"][i], store.ecg([i])[0]
        assert 5 < len(peaks) < 30 and min(peaks) >= 0 and max(peaks) < 1000 and (np.diff(peaks) >= 20).all()
        swing = np.ptp([ecg[:, max(0, p - 4):p + 5] for p in peaks if 4 < p < 995], axis=2).mean(0)
        assert (swing > 3 * np.median(np.ptp(ecg.reshape(12, -1, 10), axis=2), axis=1)).mean() > 0.7
    high = data.prepare("ptbxl", src, tmp_path / "s500", rate=500)
    assert high.records["id"].tolist() == rows["ecg_id"].tolist()[3:8] and high.samples == 5000
    link(rows["filename_lr"].iloc[7])  # now it is there: another file for one of the same records
    with pytest.raises(data.DataError, match="from other records"):
        data.prepare("ptbxl", src, tmp_path / "s100")
    edit(src / "scp_statements.csv", "MI,IMI", "MI,AMI")
    with pytest.raises(data.DataError, match="classes of IMI are not those in prompts.json"):
        data.prepare("ptbxl", src, tmp_path / "s101")


# ---- tables as people and programs write them -------------------------------------------------------------------------

def csv_of(folder, text, encoding="utf-8"):
    """Records r0..r2 and a list of them with this text."""
    for i in range(3):
        write(folder / f"r{i}", beats(seed=i))
    (folder / "list.csv").write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return folder / "list.csv"


@pytest.mark.parametrize("text, message", [
    ("record,report\nr0,sinus rhythm, normal axis\n", "list.csv, line 2: 3 fields, but there are 2 columns"),
    ("record,report,patient\nr0,sinus rhythm,p\nr1,sinus rhythm\n", "list.csv, line 3: 2 fields, but there are 3 columns"),
    ("record;report\nr0;sinus rhythm\n", "no column 'record'; its columns are separated by ';'"),
    ("record\treport\nr0\tsinus rhythm\n", "no column 'record'; its columns are separated by '\\\\t'"),
    ("r0,sinus rhythm\nr1,sinus rhythm\n", "no column 'record'; its first line names 'r0, sinus rhythm'"),
    ("", "it is empty"), ("record,report,report\nr0,a,b\n", "two columns 'report'"),
    ('record,report\nr0,"sinus rhythm\nr1,normal\n', "line 3: .*is a quote not closed"),
    ('record,report\nr0,"sinus" rhythm\n', "line 2: .*is a quote not closed, or not doubled"),
    ("record,report\nr0,sinus\0rhythm\n", "holds zeros"), ("record,report\nr0,überhöht\n".encode("latin-1"), "not in UTF-8"),
    ("record,report\nr0,sinus\n".encode("utf-16"), "not in UTF-8"), ("record,report\nr0,sinus\n".encode("utf-16-le"), "no column 'record'"),
    ("record,report\nr0," + "x" * 200000 + "\n", "field larger than field limit"),
    ("record,report\nr0,a\n./r0,b\n", "record ./r0 occurs twice"), ("record,report\nr0,a\nr0.hea,b\n", "record r0 occurs twice"),
    ("record,report\nr0,a\nx/../r0,b\n", "occurs twice"), ("record,report\n,a\n", "has no name"),
    ("record,report,patient_id\nr0,a,1\n", "column 'patient_id' is not read, and there is no 'patient'"),
    ("record,report,Split\nr0,a,test\n", "column 'Split' is not read"), ("record,report,Label\nr0,a,AF\n", "column 'Label' is not read"),
    ("version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git-lfs")])
def test_csv_that_cannot_be_honoured(tmp_path, text, message):
    with pytest.raises(data.DataError, match=message) as error:
        data.prepare("csv", csv_of(tmp_path, text), tmp_path / "dst")
    assert "list.csv" in str(error.value) and not (tmp_path / "dst").exists()


@pytest.mark.parametrize("text", [
    "\ufeffrecord,report\r\nr0,sinus rhythm\r\n\r\nr1,nan\r\n", "record,report\rr0,sinus rhythm\rr1,None\r",
    ",record , report,x\n0,r0,sinus rhythm,\n1,r1,NaN,\n", "record,report,,\nr0,sinus rhythm,,\nr1,null,,\n"])
def test_csv_as_programs_write_them(tmp_path, text):
    store = data.prepare("csv", csv_of(tmp_path, text), tmp_path / "dst")
    assert store.records["statements"].tolist() == [["sinus rhythm"], []] and store.records["report"].tolist() == ["sinus rhythm", ""]
    assert store.records["patient"].tolist() == ["r0", "r1"]


def test_columns_beside_ours_and_labels_of_no_likelihood(tmp_path, capsys):
    text = 'record,report,patient,patient_id,labels\nr0,a,p,q,"{""AFIB"": 0, ""SR"": 100}"\n'
    store = data.prepare("csv", csv_of(tmp_path, text), tmp_path / "dst")
    assert store.records["patient"].tolist() == ["p"] and store.records["codes"].tolist() == [{"AFIB": 0, "SR": 100}]
    assert store.meta["warnings"][data.ZERO]["examples"] == ["r0: AFIB"]


def test_statements_without_a_word_and_empty_patients(tmp_path):
    text = 'record,report,patient,split\nr0,"***. ... sinus rhythm. --",nan,\nr1,"***",12.0,\nr2,"a",12,train \n'
    store = data.prepare("csv", csv_of(tmp_path, text), tmp_path / "dst")
    assert store.records["statements"].tolist() == [["sinus rhythm"], [], ["a"]]
    assert store.records["patient"].tolist() == ["r0", "12", "12"]


@pytest.mark.parametrize("labels, codes", [
    ('[{"code": "AFIB"}]', None), ('[["AFIB"]]', None), ("[1]", None), ("[null]", None), ('{"AFIB": "x"}', None), ('{"AFIB": null}', None),
    ('{"AFIB": true}', None), ('{"AFIB": 1, "AFIB": 2}', None), ("[x", None), ("null", {}), ("", {}), (" AFIB ;", {"AFIB": 100.0}),
    ('["AFIB", "SR"]', {"AFIB": 100.0, "SR": 100.0}), ('{"AFIB": 50}', {"AFIB": 50}), ("NaN", {})])
def test_labels(tmp_path, labels, codes):
    source = csv_source(tmp_path / "src", 1)
    table(source, [dict(record="r0", report="x", labels=labels)])
    if codes is None:
        with pytest.raises(data.DataError, match="list.csv: labels of record r0"):
            data.prepare("csv", source, tmp_path / "dst")
    else:
        assert data.prepare("csv", source, tmp_path / "dst").records["codes"][0] == codes


def test_codes_that_nobody_knows_are_told(tmp_path, capsys):
    source = csv_source(tmp_path / "src", 2)
    table(source, [dict(record="r0", report="x", labels="AFIB;251238007;my own"), dict(record="r1", report="x", labels="SR")])
    store = data.prepare("csv", source, tmp_path / "dst")
    entry = store.meta["warnings"][data.STRANGE]
    assert (entry["records"], entry["amount"], entry["examples"]) == (1, 2, ["r0: 251238007, my own"])
    data.describe(store)
    assert "251238007" in capsys.readouterr().out


def ptbxl_copy(folder, change=lambda row: row, count=10):
    """A copy of PTB-XL with synthetic records."""
    folder.mkdir()
    findings = {code: data.knowledge()["findings"][code] for code in data.label_set("ptbxl_all")}
    table(folder / "scp_statements.csv", [{"": code} | {key: value if isinstance(value, str) else "1.0" if value else "" for key in (
        "diagnostic", "form", "rhythm", "diagnostic_class", "diagnostic_subclass") for value in [f[key]]} for code, f in findings.items()])
    for i in range(1, count + 1):
        write(folder / f"r{i}_lr", beats(1000, seed=i), fs=100)
    table(folder / "ptbxl_database.csv", [change(dict(
        ecg_id=i, patient_id=float(i), report="sinusrhythmus. normales ekg", scp_codes="{'NORM': 100.0, 'SR': 0.0}", strat_fold=i,
        filename_lr=f"r{i}_lr", filename_hr=f"r{i}_hr")) for i in range(1, count + 1)])
    return folder


def test_ptbxl_as_pandas_writes_it(tmp_path):
    store = data.prepare("ptbxl", ptbxl_copy(tmp_path / "src", lambda row: {"": row["ecg_id"] - 1} | row | dict(
        ecg_id=f"{row['ecg_id']}.0", strat_fold=f"{row['strat_fold']}.0", filename_lr=row["filename_lr"] + ".hea")), tmp_path / "dst")
    assert store.records["fold"].tolist() == list(range(1, 11)) and store.records["id"].tolist() == [str(i) for i in range(1, 11)]
    assert store.records["split"].tolist() == ["train"] * 8 + ["val", "test"]
    broken = {"2": dict(strat_fold="nan"), "3": dict(strat_fold="11"), "4": dict(patient_id=""), "5": dict(scp_codes="{'NORM': 'x'}"),
              "6": dict(scp_codes="[" * 500), "7": dict(ecg_id="1"), "8": dict(filename_lr="./r1_lr"), "9": dict(strat_fold="9.5")}
    source = ptbxl_copy(tmp_path / "broken", lambda row: row | broken.get(str(row["ecg_id"]), {}))
    store = data.prepare("ptbxl", source, tmp_path / "some")
    assert store.records["id"].tolist() == ["1", "10"]
    assert {reason: entry["records"] for reason, entry in store.meta["dropped"].items()} == {
        "damaged row of ptbxl_database.csv": 6, "occurs twice (its id or its waveform)": 2}
    source = ptbxl_copy(tmp_path / "none", lambda row: row | dict(strat_fold="x"))
    with pytest.raises(data.DataError, match="ptbxl_database.csv: the row of ecg_id '1' is damaged"):
        data.prepare("ptbxl", source, tmp_path / "no")


def test_mimic_ids_that_were_floats_and_rows_that_occur_twice(tmp_path):
    mimic_tree(tmp_path / "mimic")
    name = tmp_path / "mimic" / "machine_measurements.csv"
    rows = list(csv.DictReader(open(name)))
    rows += [rows[0] | dict(subject_id="5", report_0="Atrial fibrillation"), rows[1] | dict(study_id="40000077"), rows[0] | dict(study_id="")]
    for row in rows:
        row.update(subject_id=row["subject_id"] + ".0", study_id=row["study_id"] + ".0" * bool(row["study_id"]), report_3="nan", report_4="***")
    table(name, rows)
    listed = tmp_path / "mimic" / "record_list.csv"
    paths = list(csv.DictReader(open(listed)))
    table(listed, paths + [paths[1] | dict(study_id="40000077", path=paths[1]["path"].replace("files/", "files/./"))])
    store = data.prepare("mimic", tmp_path / "mimic", tmp_path / "dst")
    assert store.records["id"].tolist() == ["40000001", "40000002", "40000006"]
    assert store.records["patient"].tolist() == ["10000000", "10000001", "10000003"]
    assert store.records["statements"][0] == ["sinus rhythm", "anterior infarct"]
    assert store.meta["dropped"]["occurs twice (its id or its waveform)"]["records"] == 2
    assert store.meta["dropped"]["study_id or subject_id is empty"]["records"] == 1


# ---- a store is kept while its source and its makers are the same -------------------------------------------------------

@pytest.mark.parametrize("value", ["NaN", "-1", "101", "Infinity"])
def test_a_likelihood_is_from_0_to_100(value):
    assert data.labels_of('{"SR": 0, "AFIB": 100}', "x") == {"SR": 0, "AFIB": 100}
    with pytest.raises(data.DataError, match="x: the likelihood of SR, .* is not from 0 to 100; write codes"):
        data.labels_of(f'{{"SR": {value}}}', "x")


def test_an_age_is_a_plain_number():
    assert data.person(" 71.0 ", "m") == dict(age="71", sex="M") and data.person("1_0", "F") == dict(age="", sex="F")
    assert data.person("121", "") == data.person("nan", "x") == dict(age="", sex="")


def test_a_single_set_is_called_as_it_was_named(tmp_path, monkeypatch):
    monkeypatch.setenv("ECG_CACHE", str(tmp_path / "cache"))
    source = csv_source(tmp_path / "src", 2)
    assert [part.spec for part in data.open_all(f"csv:{source}").parts] == [f"csv:{source}"]


def test_segments_are_no_records(tmp_path):
    """Nor in a split of their own: they are the record that they make up."""
    for name, part in (("m/s1", slice(0, 2000)), ("m/s2", slice(2000, 5000)), ("other", slice(None))):
        write(tmp_path / "src" / name, beats()[:, part])
    header(tmp_path / "src/m/m", "m/2 12 500 5000", ["s1 2000", "s2 3000"], "# Dx: 426783006\n")
    store = data.prepare("wfdb", tmp_path / "src", tmp_path / "dst")
    assert store.records["id"].tolist() == ["m/m", "other"]
    assert store.meta["dropped"]["a segment of another record"]["records"] == 2


@pytest.mark.parametrize("kind", ["another name", "a second file", "segments"])
def test_a_signal_file_of_another_name_that_changed_is_seen(tmp_path, kind):
    source, folder = csv_source(tmp_path / "src", 3), tmp_path / "src"
    if kind == "segments":
        (folder / "r1.hea").rename(folder / "part.hea")
        (folder / "part.hea").write_text((folder / "part.hea").read_text().replace("r1", "part"))
        (folder / "r1.dat").rename(folder / "part.dat")
        _, leads, rate, samples, *_ = (folder / "part.hea").read_text().split()
        (folder / "r1.hea").write_text(f"r1/1 {leads} {rate} {samples}\npart {samples}\n")
    elif kind == "a second file":
        raw = np.fromfile(folder / "r1.dat", "<i2").reshape(-1, 12)
        raw[:, :6].tofile(folder / "r1.dat")
        raw[:, 6:].tofile(folder / "part.dat")
        head, *lines = (folder / "r1.hea").read_text().splitlines()
        (folder / "r1.hea").write_text("\n".join([head, *lines[:6], *(line.replace("r1.dat", "part.dat") for line in lines[6:])]))
    else:
        (folder / "r1.hea").write_text((folder / "r1.hea").read_text().replace("r1.dat", "part.dat"))
        (folder / "r1.dat").rename(folder / "part.dat")
    assert len(data.prepare("csv", source, tmp_path / "dst")) == 3
    data.prepare("csv", source, tmp_path / "dst")
    (folder / "part.dat").write_bytes((folder / "part.dat").read_bytes()[::-1])
    with pytest.raises(data.DataError, match="from other records"):
        data.prepare("csv", source, tmp_path / "dst")


def test_a_changed_source_is_no_longer_the_store(tmp_path, monkeypatch):
    source = csv_source(tmp_path / "src", 3)
    rows = [row | dict(split="train", labels="SR") for row in csv.DictReader(open(source))]
    table(source, rows)
    dst = tmp_path / "dst"
    data.prepare("csv", source, dst)
    before = (dst / "store.json").stat()
    data.prepare("csv", source, dst)
    assert (dst / "store.json").stat() == before  # the same again is recognised
    for change in (dict(report="atrial fibrillation"), dict(split="test"), dict(labels="AFIB"), dict(patient="q")):
        table(source, [rows[0] | change, *rows[1:]])
        with pytest.raises(data.DataError, match="dst: made .* or from other records; delete it and prepare the data set again"):
            data.prepare("csv", source, dst)
    table(source, rows)
    assert len(data.prepare("csv", source, dst)) == 3
    signal = tmp_path / "src" / "r1.dat"
    content, status = signal.read_bytes(), signal.stat()
    signal.write_bytes(content[::-1])  # exported again: the same length
    os.utime(signal, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(data.DataError, match="from other records"):
        data.prepare("csv", source, dst)
    signal.write_bytes(content)
    os.utime(signal, ns=(status.st_atime_ns, status.st_mtime_ns))
    data.prepare("csv", source, dst)
    monkeypatch.setattr(data, "MAKERS", data.MAKERS | {"csv": (*data.MAKERS["csv"], "another step")})
    data.maker.cache_clear()
    with pytest.raises(data.DataError, match="by other code"):
        data.prepare("csv", source, dst)
    data.maker.cache_clear()


def test_what_makes_a_store_is_named(monkeypatch):
    """In the key: the words of the findings, and the definition of R peaks; not: plot() and main()."""
    keys = lambda: [data.maker.__wrapped__(source) for source in ("ptbxl", "mimic", "csv", "simulated", "csn", "code")]
    before, table = keys(), json.loads(json.dumps(data.knowledge()))
    table["findings"]["normal axis"]["also"].append("straight axis")
    monkeypatch.setattr(data, "knowledge", lambda: table)
    assert [a != b for a, b in zip(before, keys())] == [True, False, False, True, True, True]
    monkeypatch.undo()
    read = data.read_text
    monkeypatch.setattr(data, "read_text", lambda path: read(path) + "# other peaks")
    assert [a != b for a, b in zip(before, keys())] == [True, True, True, False, True, True]
    monkeypatch.undo()
    monkeypatch.setattr(data, "plot", None)
    assert keys() == before
    named = {part.__name__ for parts in data.MAKERS.values() for part in parts if callable(part)}
    left = {name for name, f in vars(data).items() if getattr(f, "__module__", "") == "data" and callable(f)} - named
    assert not left & {name for name in left if name.startswith(("read_format", "_"))}, left
    assert {"survey", "stamps"} <= named  # another way to look at a source makes another store, and no refusal


def test_damage_is_noticed_when_asked(many, tmp_path):
    folder = tmp_path / "dst"
    folder.mkdir()
    for file, content in contents(many / "whole").items():
        (folder / file).write_bytes(content)
    store = data.Store(folder)
    store.verify()
    with open(folder / "ecg.i16", "r+b") as file:
        file.seek(12345)
        file.write(b"\x55\xaa")
    with pytest.raises(data.DataError, match="ecg.i16: damaged"):
        store.verify()
    edit(folder / "store.json", '"rate": 100', '"rate": 101')
    with pytest.raises(data.DataError, match="store.json: damaged"):
        data.Store(folder)


@pytest.mark.parametrize("content, message", [
    (b"", "empty"), (b"{", "Expecting"), (b"[]", "must be an object"), (b"{}", "not of a store of version"), (b"\xff", "not readable"),
    (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"), (b'{"format": ["ecg-language store", 4]}', "not of a store of version 5"),
    (b'{"format": ["ecg-language store", 5], "rate": "x"}', "damaged"), (b'{"a": 1, "a": 2}', "occurs twice"), (None, "a folder, not a file")])
def test_what_is_no_store_is_said(tmp_path, content, message):
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "store.json").mkdir() if content is None else (tmp_path / "dst" / "store.json").write_bytes(content)
    source = csv_source(tmp_path / "src", 1)
    for open_ in (lambda: data.Store(tmp_path / "dst"), lambda: data.prepare("csv", source, tmp_path / "dst"),
                  lambda: data.open_data(f"store:{tmp_path / 'dst'}")):
        with pytest.raises(data.DataError, match=message):
            open_()
    (tmp_path / "dst").rename(tmp_path / "other.partial")
    with pytest.raises(data.DataError, match=message + "|did not finish"):
        data.prepare("csv", source, tmp_path / "other")


# ---- where a store is made ------------------------------------------------------------------------------------------

def test_stores_need_no_pytorch(tmp_path):
    """data.py and its workers start without it: that is a second each, and much memory."""
    (tmp_path / "torch.py").write_text("raise SystemExit('PyTorch is imported')")
    commands = (["prepare", "csv", csv_source(tmp_path / "data", 2), tmp_path / "store", "--workers", "2"],
                ["info", tmp_path / "store"],
                ["plot", f"store:{tmp_path / 'store'}", "r0", "--out", tmp_path / "r0.png"])
    for command in commands:
        result = subprocess.run([sys.executable, ROOT / "data.py", *command], capture_output=True, text=True,
                                env={**os.environ, "PYTHONPATH": str(tmp_path)})
        assert result.returncode == 0, result.stderr
    assert all(len(peaks) == 12 for peaks in data.Store(tmp_path / "store").records["peaks"])


def test_destinations(tmp_path, monkeypatch):
    source = csv_source(tmp_path / "src", 1)
    (tmp_path / "empty").mkdir()
    assert len(data.prepare("csv", source, tmp_path / "empty")) == 1
    (tmp_path / "aim").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "aim")
    assert len(data.prepare("csv", source, tmp_path / "link")) == len(data.Store(tmp_path / "aim")) == 1
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").write_text("")
    (tmp_path / "file").write_text("")
    for dst, message in (("full", "is there already and holds no store"), ("file", "is there already and holds no store"),
                         ("file/dst", "file/dst: cannot be written .*ECG_CACHE"), ("x" * 300, "cannot be written")):
        with pytest.raises(data.DataError, match=message):
            data.prepare("csv", source, f"{tmp_path}/{dst}")
    monkeypatch.setenv("ECG_CACHE", "/proc/none/cache")
    with pytest.raises(data.DataError, match="/proc/none/cache.* cannot be written .*ECG_CACHE"):
        data.open_data("simulated:8")
    with pytest.raises(data.DataError, match="r0.dat.hea: file is missing"):
        table(source, [dict(record="r0.dat", report="x")])
        data.prepare("csv", source, tmp_path / "none")


def test_a_full_disk_is_one_sentence_and_preparing_goes_on(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "none", disk], capture_output=True).returncode:
        pytest.skip("no right to mount")
    try:
        (tmp_path / "src").mkdir()
        source = csv_source(tmp_path / "src", 60)
        with pytest.raises(data.DataError, match="dst: cannot be written .*No space left"):
            data.prepare("csv", source, disk / "dst", workers=1)
        subprocess.run(["mount", "-o", "remount,size=8M", disk], check=True)
        assert len(data.prepare("csv", source, disk / "dst", workers=1)) == 60
        with pytest.raises(data.DataError, match="disk: a volume is mounted here"):
            subprocess.run(["rm", "-r", *disk.iterdir()], check=True)
            data.prepare("csv", source, disk)
        with pytest.raises(data.DataError, match="4000 records need 0.1 GB more"):
            data.prepare("simulated", "4000", disk / "simulated")
    finally:
        subprocess.run(["umount", disk])


@pytest.mark.parametrize("spec, options", [
    ("simulated:-5", {}), ("simulated:1e3", {}), ("simulated:\u00b2", {}), (":", {}), ("", {}), ("ptbxl", {}), ("csv:", {}),
    ("simulated:8", dict(rate=100.5)), ("simulated:8", dict(rate=-100)), ("simulated:8", dict(rate=0)), ("simulated:8", dict(rate=True)),
    ("simulated:8", dict(seed=-1)), ("simulated:8", dict(min_words=1.5)), ("simulated:8", dict(crop="middle")),
    ("simulated:9999999999999999", {}), ("simulated:999999999999", {})])
def test_nonsense_is_one_sentence(tmp_path, spec, options):
    with pytest.raises(data.DataError, match="no such data|999999999999 records need .* GB more"):
        data.open_data(spec, cache=tmp_path, **options)


def test_workers(tmp_path, monkeypatch):
    source = csv_source(tmp_path / "src", 1)
    with pytest.raises(data.DataError, match="-1 workers"):
        data.prepare("csv", source, tmp_path / "dst", workers=-1)

    def killed(*args):
        raise data.BrokenExecutor("a child was terminated abruptly")
    monkeypatch.setattr(data, "in_order", killed)
    with pytest.raises(data.DataError, match="was killed, .* the same command goes on from there"):
        data.prepare("csv", source, tmp_path / "dst")
    monkeypatch.undo()
    assert len(data.prepare("csv", source, tmp_path / "dst")) == 1


def test_a_store_is_plotted_at_its_own_rate(tmp_path):
    data.prepare("csv", csv_source(tmp_path / "src", 1, "a $ and a $x_{"), tmp_path / "dst", rate=500)
    result = subprocess.run([*COMMAND[:-1], "plot", f"store:{tmp_path / 'dst'}", "r0", "--out", str(tmp_path / "x.png")], capture_output=True)
    assert result.returncode == 0 and (tmp_path / "x.png").stat().st_size > 10000


def test_paper_is_to_scale():
    """A square of 0.2 s and 0.5 mV is one; the pulse is 1 mV and 200 ms; a lead is where it was measured."""
    from matplotlib.figure import Figure
    figure = Figure()
    axes, ecg = figure.subplots(), beats(n=1000, fs=100)
    data.draw_ecg(axes, ecg, 100, "a $ and a $x_{")
    figure.draw_without_rendering()
    origin, right, up = axes.transData.transform([(0, 0), (0.2, 0), (0, 0.5)])
    assert right[0] - origin[0] == pytest.approx(up[1] - origin[1])
    pulse, strip = axes.lines[0].get_xydata(), max((line.get_xydata() for line in axes.lines), key=len)
    assert np.ptp(pulse[:, 1]) == 1 and np.ptp(pulse[pulse[:, 1] == pulse[:, 1].max(), 0]) == pytest.approx(0.2)
    np.testing.assert_allclose(strip[::5, 0], np.arange(1000) / 100, atol=1e-9)
    np.testing.assert_allclose(strip[::5, 1], ecg[1], atol=0.01)
    assert {text.get_text() for text in axes.texts} >= set(data.LEADS)


def test_split_specs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ECG, export 2023").mkdir()
    for name in ("ECG, export 2023/list.csv", "lines.txt", "a,b,c.txt"):
        (tmp_path / name).write_text("")
    for text, specs in (("simulated", ["simulated"]), ("csv:a.csv,simulated:8", ["csv:a.csv", "simulated:8"]),
                        ("csv:ECG, export 2023/list.csv", ["csv:ECG, export 2023/list.csv"]),
                        ("csv:ECG, export 2023/list.csv,lines.txt", ["csv:ECG, export 2023/list.csv", "lines.txt"]),
                        ("a,b,c.txt,lines.txt,ptbxl:x", ["a,b,c.txt", "lines.txt", "ptbxl:x"]), ("csv:not, there.csv", ["csv:not, there.csv"]),
                        ('"x, y.txt",simulated,store:z', ["x, y.txt", "simulated", "store:z"]),
                        ('csv:"x,lines.txt",lines.txt', ["csv:x,lines.txt", "lines.txt"]), ("", [])):
        assert data.split_specs(text) == specs, text


# ---- label sets -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def everything():
    """All 21,837 rows of PTB-XL, with or without waveform."""
    rows = pd.DataFrame([row for row in data.ptbxl_rows(dict(src=str(PTBXL), rate=100))])
    assert len(rows) == 21837
    return rows.set_index("id", drop=False)


@real
@pytest.mark.parametrize("name, classes, counts", [
    ("ptbxl_super", 5, (17111, 2156, 2163)), ("ptbxl_sub", 23, (17111, 2156, 2163)),
    ("ptbxl_form", 19, (7202, 904, 882)), ("ptbxl_rhythm", 12, (16854, 2109, 2103)),
    ("ptbxl_diag", 44, (17111, 2156, 2163)),
    ("ptbxl_all", 71, (17441, 2193, 2203))])
def test_label_counts_are_the_published_ones(everything, name, classes, counts):
    names, labels, keep = data.label_matrix(everything, name)
    assert len(names) == len(set(names)) == classes and labels.shape == (21837, classes) and labels.any(0).all()
    folds = everything["fold"].to_numpy()
    assert tuple(int((keep & part).sum()) for part in (folds <= 8, folds == 9, folds == 10)) == counts


@real
@pytest.mark.parametrize("name, file", [("ptbxl_super", "super_class"), ("ptbxl_sub", "sub_class"),
                                        ("ptbxl_form", "form"), ("ptbxl_rhythm", "rhythm")])
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_labels_agree_by_name_with_the_published_split(everything, name, file, split):
    published = pd.read_csv(REAL / "splits" / "ptbxl" / f"ptbxl_{file}_{split}.csv", dtype={"ecg_id": str})
    names, labels, _ = data.label_matrix(everything.loc[published["ecg_id"]], name)
    columns = {column.strip("_"): column for column in published.columns[6:]}
    assert sorted(columns) == sorted(n.strip("_") for n in names)
    ours = pd.DataFrame(labels, columns=[columns[n.strip("_")] for n in names])
    differing = (ours[published.columns[6:]].to_numpy() != published.iloc[:, 6:].astype(bool).to_numpy()).any(1)
    assert set(published["ecg_id"][differing]) <= {"1371", "3799", "3802", "9822"}  # the csv has other codes for these


def test_simulated_label_set():
    records = pd.DataFrame(dict(codes=[{"SR": 100.0, "LVH": 100.0}, {}, {"AFIB": 100.0}]))
    names, labels, keep = data.label_matrix(records, "simulated")
    assert names == ["AFIB", "LVH", "SR"] and keep.tolist() == [True, False, True]
    assert labels.tolist() == [[False, True, True], [False] * 3, [True, False, False]]
    with pytest.raises(data.DataError, match="unknown label set 'ptbxl'"):
        data.label_matrix(records, "ptbxl")


def test_a_script_that_prepares_while_it_is_imported_ends(tmp_path):
    """Its workers import it again: each would wait for the lock that their parent holds."""
    script = tmp_path / "mine.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport data\n"
                      f"data.prepare('simulated', '600', {str(tmp_path / 'store')!r}, workers=2)\n")
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert run.returncode == 1 and 'put what it does under if __name__ == "__main__":' in run.stderr
