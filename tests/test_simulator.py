"""The simulator: the same records every time, physics, and truth that agrees with the signal."""
import numpy as np
import pytest

import data

N, RATE = 768, 100


@pytest.fixture(scope="module")
def records():
    """N records: ecg (N, 12, 1000) mV, and lists of peaks, codes, features, statements."""
    blocks = [data.simulated_block.__wrapped__(5, b, RATE) for b in range(N // data.CHUNK)]
    return (np.concatenate([b[0] for b in blocks]), *([x for b in blocks for x in b[i]] for i in range(1, 5)))


def with_code(records, code):
    return [i for i, codes in enumerate(records[2]) if code in codes]


def rr(records, i):
    return np.diff(records[1][i]) / RATE


def test_the_same_records_every_time(records):
    again = data.simulated_block.__wrapped__(5, 1, RATE)
    chunk = slice(data.CHUNK, 2 * data.CHUNK)
    assert np.array_equal(again[0], records[0][chunk]) and again[4] == records[4][chunk]
    other = data.simulated_block.__wrapped__(6, 1, RATE)
    assert not np.array_equal(other[0], again[0])


def test_a_longer_set_begins_with_the_shorter(tmp_path):
    short, long = (data.prepare("simulated", str(n), tmp_path / str(n)) for n in (40, 300))
    assert np.array_equal(short.ecg(range(40)), long.ecg(range(40)))
    assert list(short.records["statements"]) == list(long.records["statements"][:40])


def test_physics(records):
    ecg = records[0]
    assert np.isfinite(ecg).all() and ecg.shape == (N, 12, 1000)
    lead = {name: ecg[:, i] for i, name in enumerate(data.LEADS)}
    assert np.allclose(lead["II"], lead["I"] + lead["III"], atol=1e-4)
    assert np.allclose(lead["aVR"] + lead["aVL"] + lead["aVF"], 0, atol=1e-4)
    assert np.allclose(lead["aVF"], (lead["II"] + lead["III"]) / 2, atol=1e-4)


def test_peaks_are_where_the_signal_moves(records):
    """At a true peak the spatial slope nearby is among the steepest of the record, in normal records."""
    ecg, peaks = records[0], records[1]
    hits = total = 0
    for i in with_code(records, "NORM")[:60]:
        slope = np.abs(np.diff(ecg[i], axis=1)).sum(0)
        high = np.quantile(slope, 0.9)
        inside = [p for p in peaks[i] if 6 < p < 990]
        hits += sum(slope[p - 5:p + 6].max() > high for p in inside)
        total += len(inside)
    assert hits / total > 0.97


def test_rate_and_rhythm_are_what_the_codes_say(records):
    heart = lambda i: 60 / np.median(rr(records, i))
    assert all(heart(i) > 97 for i in with_code(records, "STACH"))
    plain = [i for i in with_code(records, "SBRAD") if not {"PVC", "PAC", "BIGU", "TRIGU"} & records[2][i].keys()]
    assert plain and np.mean([heart(i) < 62 for i in plain]) > 0.95
    irregular = lambda i: np.std(rr(records, i)) / np.mean(rr(records, i))
    assert np.median([irregular(i) for i in with_code(records, "AFIB")]) > 3 * np.median([irregular(i) for i in with_code(records, "NORM")])


def test_shapes_are_what_the_codes_say(records):
    """QRS of a left bundle branch block is negative in V1 and wide; of a hypertrophy tall; low voltage is low."""
    ecg, peaks = records[0], records[1]

    def beat(i, lead):
        cuts = [ecg[i, data.LEADS.index(lead), p - 12:p + 13] for p in peaks[i] if 12 < p < 980]
        return np.median([c - np.median(c) for c in cuts], 0)
    plain = [i for i in with_code(records, "NORM")]
    assert np.mean([beat(i, "V1").min() < -abs(beat(i, "V1").max()) for i in with_code(records, "CLBBB")]) > 0.8
    width = lambda i: (np.abs(beat(i, "V6")) > 0.3 * np.abs(beat(i, "V6")).max()).sum()
    assert np.median([width(i) for i in with_code(records, "CLBBB")]) > 1.4 * np.median([width(i) for i in plain])
    swing = lambda i: sum(np.ptp(beat(i, lead)) for lead in ("V2", "V5", "aVL"))
    assert np.median([swing(i) for i in with_code(records, "LVH")]) > 1.3 * np.median([swing(i) for i in plain])


def test_truth_and_reports(records):
    _, _, codes, features, statements = records
    findings, scp = data.knowledge()["findings"], data.knowledge()["label_sets"]["ptbxl_all"]
    vocabulary = {f for finding in findings.values() for f in finding["features"]}
    assert all(set(c) <= scp.keys() for c in codes) and all(codes)
    assert {f for row in features for f in row} <= vocabulary
    assert all(statements), "every record has a report"
    told = [bool(set(row) & vocabulary) for row in statements]
    assert 0.2 < np.mean(told) < 0.5, "more than half of the reports leave the waveform features out (FG-CLEP)"
    assert np.mean([len(row) for row in features]) > 4
    lying = [i for i in range(N) if set(statements[i]) & vocabulary - set(features[i])]
    assert not lying, "a stated feature is a true one"
    wordings = {s for row, c in zip(statements, codes) if "AFIB" in c for s in row if "fib" in s}
    assert len(wordings) > 2


def test_true_tags_and_what_they_mean(tmp_path):
    store = data.open_data("simulated:64", cache=tmp_path)
    truth, meaning = data.true_tags(store), data.meanings()
    row = next(row for row in range(64) if "IMI" in store.records["codes"][row])
    assert "inferior myocardial infarction" in truth[row] and truth[row][-1] == store.records["features"][row][-1]
    assert len(truth[row]) == len(store.records["codes"][row]) + len(store.records["features"][row])
    assert {meaning[tag] for tag in ("inferior infarct", "possible inferior mi", "probable inferior myocardial infarction")} == {
        "inferior myocardial infarction"}
    assert meaning["flat t waves"] == "flat t waves" and "no st elevation" not in meaning
    for row in range(64):  # what a report says is true
        assert {meaning[tag] for tag in store.tags[row]} <= {meaning[tag] for tag in truth[row]}


def test_truth_is_known_of_simulated_records_alone(tmp_path, monkeypatch):
    from test_data import csv_source
    source = csv_source(tmp_path / "src", 3)
    monkeypatch.setenv("ECG_CACHE", str(tmp_path / "cache"))
    both, alone = data.true_tags(data.open_all(f"csv:{source},simulated:5")), data.true_tags(data.open_data("simulated:5"))
    assert list(both)[:3] == [[]] * 3 and list(both)[3:] == list(alone) and all(alone)


def test_a_wording_of_two_findings_says_neither(monkeypatch):
    findings = {"A": dict(name="a", also=["x", "f"], features=["f"]), "B": dict(name="b", also=["x"], features=[])}
    monkeypatch.setattr(data, "knowledge", lambda: {"findings": findings})
    assert data.meanings.__wrapped__() == {doubt + tag: name for tag, name in dict(a="a", b="b", f="f").items()
                                           for doubt in ("", "possible ", "probable ")}


def test_normal_is_normal(records):
    for codes in records[2]:
        if "NORM" in codes:
            assert not [c for c in codes if data.knowledge()["findings"][c]["diagnostic_class"] not in (None, "NORM")], codes
