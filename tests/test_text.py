"""Report text: cleaning, statements, translation to English, and the waveform features that diagnoses suggest."""
import csv

import numpy as np
import pytest

import data
from conftest import SHARED

PTBXL = SHARED / "data" / "ptbxl"
CASES = {
    "sinusrhythmus lagetyp normal normales ekg 4.46      unbestÄtigter bericht": ["sinus rhythm", "normal axis", "normal ecg"],
    "sinusbradykardie sonst normales ekg": ["sinus bradycardia", "otherwise normal ecg"],
    "sinusrhythmus ueberdrehter linkstyp linksanteriorer hemiblock qrs(t) abnorm    anteroseptaler myokardschaden nicht "
    "auszuschliessen    inferiorer infarkt     alter unbest.":
        ["sinus rhythm", "marked left axis deviation", "left anterior fascicular block", "abnormal qrs",
         "anteroseptal myocardial damage cannot be excluded", "inferior myocardial infarction, age undetermined"],
    "vorhofflimmern/-flattern lagetyp normal st & t abnorm, wahrscheinlich    anterolaterale ischÄmie oder linksbelastung":
        ["atrial fibrillation or flutter", "normal axis", "st-t changes", "probable anterolateral ischemia or left ventricular strain"],
    "sinusrytm vänster el-axel avvikande qrs(t) förlopp    inferior infarkt bör övervägas":
        ["sinus rhythm", "left axis deviation", "abnormal qrs", "possible inferior myocardial infarction"],
    "sinusrytm låga qrs amplituder i extremitetsavledningarna inga tecken på ischemi eller myokardskada":
        ["sinus rhythm", "low qrs voltages in limb leads", "no myocardial ischemia", "no myocardial damage"],
    "sinus rhythm. st segments are depressed in i, v4,5,6. t waves are flat in ii and inverted in avl. this may be due to lv "
    "strain or ischaemia.":
        ["sinus rhythm", "st depression in i, v4, v5, v6", "flat t waves in ii", "inverted t waves in avl",
         "possible left ventricular strain or ischemia"],
    "sinus rhythm. normal ecg. there is no definite ecg evidence to suggest pericarditis.": ["sinus rhythm", "normal ecg", "no pericarditis"],
    "sinus rhythm. normal ecg. Edit: LVH 100, (IMI 15)": ["sinus rhythm", "normal ecg"],  # label codes are no report
    "infarkt inferior chronisch moeglich q in iii,avf t- veraenderungen neg in v4 - v6 ekg pathologisch":
        ["possible old inferior myocardial infarction", "q waves in iii, avf", "inverted t waves in v4, v5, v6", "abnormal ecg"],
    "trace only requested.": [],
    "sinusrhythmus xyzblock in v1-3": ["sinus rhythm"],  # a place goes with what was understood, not with another finding
}


@pytest.mark.parametrize("report", CASES)
def test_translation(report):
    assert data.translate(report) == CASES[report]


def test_clean_and_split():
    assert data.clean("*** Abnormal EKG ***\n= sinus") == "abnormal ecg sinus"
    assert data.split_statements("*** Sinus rhythm ***\nInferior infarct, age undetermined") == ["sinus rhythm", "inferior infarct, age undetermined"]
    assert data.split_statements("Sinus rhythm. ST segments are depressed in II, V4,5,6. PR 0.22 sec.\nAbnormal EKG") == [
        "sinus rhythm", "st segments are depressed in ii, v4,5,6", "pr 0.22 sec", "abnormal ecg"]
    assert data.split_statements("no full stop") == ["no full stop"]  # MELP loses such reports (METHODS 0.13)


def test_our_own_names_stay_as_they_are():
    """The translation's English is the wording of the prompts: a code's name is a statement of itself."""
    changed = [f["name"] for f in data.knowledge()["findings"].values() if data.translate(f["name"]) != [f["name"]]]
    assert not changed


@pytest.mark.skipif(not PTBXL.exists(), reason=f"PTB-XL is not at {PTBXL}")
def test_coverage_of_all_reports_and_agreement_with_the_labels():
    with open(PTBXL / "ptbxl_database.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if int(row["strat_fold"]) <= 8]
    known, total, left = data.translator().coverage(row["report"] for row in rows)
    assert known / total > 0.95 and total == known + sum(left.values())
    said = [data.translate(row["report"]) for row in rows[::5]]
    for code, name, least, most in (("AFIB", "atrial fibrillation", 0.98, 0.01), ("CLBBB", "complete left bundle branch block", 0.85, 0.02),
                                    ("STACH", "sinus tachycardia", 0.97, 0.01), ("LVH", "left ventricular hypertrophy", 0.5, 0.06)):
        coded = np.array([f"'{code}'" in row["scp_codes"] for row in rows[::5]])
        named = np.array([any(name in s and not s.startswith(("no ", "previous")) for s in statements) for statements in said])
        assert named[coded].mean() > least and named[~coded].mean() < most, code


def test_candidates_of_a_report():
    findings = data.Findings()
    assert "absent p waves" in findings.candidates(["atrial fibrillation", "left axis deviation"])
    assert findings.candidates(["no atrial fibrillation"]) == []
    assert findings.candidates(["old inferior myocardial infarction cannot be excluded"])
    complete, incomplete = (findings.candidates([s]) for s in ("complete right bundle branch block", "incomplete right bundle branch block"))
    assert "qrs longer than 120 ms" in complete and "qrs longer than 120 ms" not in incomplete  # the longest wording wins


def test_every_code_has_features_and_prompts():
    vocabulary = set()
    for code, finding in data.knowledge()["findings"].items():
        assert finding["features"] and finding["prompts"] and finding["name"], code
        vocabulary |= set(finding["features"])
    assert 40 < len(vocabulary) < 120


def test_a_corpus_of_reports_and_lines(tmp_path):
    """Reports count whether or not their waveform is there; equal texts count once."""
    (tmp_path / "own.csv").write_text("record,report\nmissing/a,Sinus rhythm. Normal ECG\nmissing/b,Sinus rhythm. Normal ECG\n")
    (tmp_path / "lines.txt").write_text("atrial fibrillation is irregular\n\n atrial flutter is not \n")
    spec = f"csv:{tmp_path / 'own.csv'},{tmp_path / 'lines.txt'}"
    assert data.corpus(spec) == ["atrial fibrillation is irregular", "atrial flutter is not", "sinus rhythm. normal ecg"]
    with pytest.raises(data.DataError, match="nowhere.txt: neither a data set nor a readable text file"):
        data.corpus(str(tmp_path / "nowhere.txt"))
