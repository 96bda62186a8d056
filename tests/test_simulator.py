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
    findings = data.knowledge()["findings"]
    vocabulary = {f for finding in findings.values() for f in finding["features"]}
    assert all(set(c) <= findings.keys() for c in codes) and all(codes)
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
            assert not [c for c in codes if data.knowledge()["findings"][c].get("diagnostic_class") not in (None, "NORM")], codes


# ---- labels against the heart's own signal: measured anew, without noise, by other means than the labels -----

BEFORE, AFTER = 30, 50  # samples of a beat around the R peak


@pytest.fixture(scope="module")
def clean():
    """Of 1,024 records without noise: mean of the usual beats (n, 12, 80) mV about the level before the QRS,
    RR intervals in s, whole signal, peaks, and all that is said to be true (sets of codes and features)."""
    beats, intervals, ecgs, places, truths = [], [], [], [], []
    for block in range(4):
        ecg, peaks, codes, features, *_ = data._block(np.random.default_rng((7, block)), RATE, 10, noise="none")
        for x, p, true in zip(ecg, peaks, ([*c, *f] for c, f in zip(codes, features))):
            cuts = [x[:, q - BEFORE:q + AFTER] for q in p if q >= BEFORE and q + AFTER <= 1000]
            beat = np.median(cuts, 0) if cuts else np.full((12, BEFORE + AFTER), np.nan)
            beats.append(beat - np.median(beat[:, BEFORE - 9:BEFORE - 6], 1, keepdims=True))
            intervals.append(np.diff(p) / RATE), ecgs.append(x), places.append(p), truths.append(set(true))
    return np.array(beats), intervals, np.array(ecgs), places, truths


def having(truths, *wanted, without=()):
    return np.array([set(wanted) <= t and not set(without) & t for t in truths])


def above(value, yes, no):
    """How often a record of `yes` has a larger value than one of `no`: the AUROC."""
    return (value[yes][:, None] > value[no][None]).mean()


WIDE = "wide qrs", "PACE", "WPW", "ILBBB", "IVCD", "CRBBB", "CLBBB"  # ST-T follows the QRS
CROWDED = "tachycardia", "AFLT", "PAC", "PVC", "SVARR"               # other waves lie in the beat's window
LEADS_OF = {"i and avl": [0, 4], "ii, iii and avf": [1, 2, 5], "v1 to v3": [6, 7, 8], "v2 to v4": [7, 8, 9],
            "v1 to v4": [6, 7, 8, 9], "v4 to v6": [9, 10, 11]}


@pytest.mark.parametrize("feature", [f"{what} in {where}" for what, places in {
    "st elevation": ("ii, iii and avf", "v1 to v3", "v2 to v4"),
    "st depression": ("i and avl", "ii, iii and avf", "v4 to v6"),
    "inverted t waves": ("i and avl", "ii, iii and avf", "v1 to v4", "v4 to v6")}.items() for where in places])
def test_st_level_and_t_wave(clean, feature):
    beats, *_, truths = clean
    what, where = feature.split(" in ", 1)
    level = beats[:, LEADS_OF[where]]                                           # (n, leads, 80)
    if what == "inverted t waves":
        t = level[:, :, BEFORE + 16:]
        value = -np.where(t.max(2) > -t.min(2), t.max(2), t.min(2)).max(1)      # of the least inverted lead
    else:
        sign = 1 if what == "st elevation" else -1
        value = (sign * level[:, :, BEFORE + 9:BEFORE + 12].mean(2)).min(1)
    plain = having(truths, without=(*WIDE, *CROWDED)) & np.isfinite(value)
    yes, no = plain & having(truths, feature), plain & having(truths, without=(feature,))
    assert yes.sum() >= 3 and np.median(value[yes]) > .04, (yes.sum(), value[yes])
    assert above(value, yes, no) > .98


def test_pr_interval_and_p_waves(clean):
    beats, _, _, _, truths = clean
    before = beats[:, 1, BEFORE - 28:BEFORE - 6]                                 # lead II
    sinus = having(truths, "upright p wave in ii before every qrs", without=(*CROWDED, *WIDE, "2AVB"))
    none = having(truths, "absent p waves", without=(*CROWDED, *WIDE, "AFIB"))
    bump = before.max(1) - before.min(1)
    assert sinus.sum() > 300 and none.sum() > 5 and above(bump, sinus, none) > .97
    distance = 28 - before.argmax(1) + 0.0                                       # samples from P to R
    long, usual = sinus & having(truths, "1AVB"), sinus & having(truths, without=("1AVB", "WPW"))
    clear = bump > .05
    assert above(distance, long & clear, usual & clear) > .93
    short = sinus & having(truths, "short pr interval") & clear
    assert above(-distance, short, usual & clear) > .85


def test_qt_interval(clean):
    beats, intervals, _, _, truths = clean
    rr = np.array([np.median(r) if len(r) else np.nan for r in intervals])
    size = np.abs(beats[:, :, BEFORE + 14:]).max(1)                              # (n, 36): T in any lead
    top = (size.argmax(1) + 14) / RATE / np.cbrt(np.clip(rr, .3, 1.6))           # corrected as QT is (Fridericia)
    plain = having(truths, without=(*WIDE, "AFIB", "PVC", "PAC", "AFLT", "tachycardia")) & np.isfinite(top)
    long = plain & having(truths, "LNGQT") & (size.max(1) > .1)
    short = plain & having(truths, "short qt interval")
    usual = plain & having(truths, without=("LNGQT", "short qt interval", "DIG", "corrected qt shorter than 360 ms"))
    assert above(top, long, usual) > .9 and above(-top, short, usual) > .85


def test_heart_rate(clean):
    _, intervals, _, _, truths = clean
    rate = np.array([60 / np.median(r) if len(r) > 2 else np.nan for r in intervals])
    early = ("PVC", "PAC", "BIGU", "TRIGU", "SVARR", "2AVB", "AFLT", "PSVT", "AFIB", "sinus pause", "SARRH")
    flutter = [60 / np.mean(r) for r, true in zip(intervals, truths) if "AFLT" in true and "tachycardia" in true]
    assert len(flutter) > 5 and np.mean(np.array(flutter) > 95) > .8
    plain = having(truths, without=early) & np.isfinite(rate)
    for name, low, high in (("tachycardia", 97, 400), ("bradycardia", 0, 62), ("SR", 58, 102), ("SBRAD", 0, 62)):
        yes, no = plain & having(truths, name), plain & having(truths, without=(name,))
        assert yes.sum() > 10 and ((rate[yes] > low) & (rate[yes] < high)).mean() > .97, name
        assert name in ("SR", "SBRAD") or not ((rate[no] > low + 5) & (rate[no] < high - 5)).any(), name
    pause = [max(r) / np.median(r) for r, true in zip(intervals, truths) if "sinus pause" in true]
    assert len(pause) > 3 and min(pause) > 1.4
    ratio = np.array([min(r) / np.median(r) if len(r) > 2 else 1 for r in intervals])
    regular = having(truths, "regular rr intervals", without=("2AVB", "PSVT"))
    assert ratio[having(truths, "PAC", without=("BIGU", "TRIGU"))].max() < .87 < np.quantile(ratio[regular], .02)


def test_voltage_axis_and_q_waves(clean):
    beats, *_, truths = clean
    qrs = beats[:, :, BEFORE - 6:BEFORE + 8]
    swing, finite = np.ptp(qrs, axis=2), np.isfinite(beats[:, 0, 0])
    low, high = having(truths, "qrs below 0.5 mv in limb leads"), having(truths, "VCLVH")
    assert above(-swing[:, :6].max(1), low & finite, ~low & finite) > .93
    tall = swing[:, 6] + swing[:, 10:].max(1)                                    # Sokolow and Lyon, about
    assert above(tall, high & finite, ~high & having(truths, without=WIDE) & finite) > .84  # or aVL alone
    area = qrs.sum(2)
    angle = np.degrees(np.arctan2(area[:, 5] * 2 / np.sqrt(3), area[:, 0]))
    for name, where in (("left axis deviation", (-95, -25)), ("right axis deviation", (85, 185))):
        inside = (angle > where[0]) & (angle < where[1])
        assert inside[having(truths, name, without=WIDE) & finite].mean() > .9, name
    wide = (np.abs(beats) > .25 * np.abs(qrs).max(2, keepdims=True))[:, :, BEFORE - 12:BEFORE + 14].sum(2).mean(1)
    assert above(wide, having(truths, "CLBBB") & finite, having(truths, "normal qrs duration") & finite) > .97


def test_every_finding_is_drawn_often_enough():
    """The share that is drawn evenly: no finding of a table is as rare as its weight among the healthy says."""
    drawn = [data._diagnoses(np.random.default_rng((3, block))) for block in range(16)]  # 4,096 patients
    for name, table in data.knowledge()["simulator"]["chances"].items():
        for code in table.keys() - {"none", "sinus"} if name != "pathway" else ():
            assert sum(c[code].sum() for c in drawn) >= 20, code
