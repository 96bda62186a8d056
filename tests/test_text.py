"""Report text: cleaning, statements, translation to English, and the waveform features that diagnoses suggest."""
import csv
import json
import unicodedata

import numpy as np
import pytest

import data
from conftest import ROOT, SHARED

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


LEADS = {"st elevation v2\u2013v5": "st elevation in v2, v3, v4, v5", "st depression v6-v4": "st depression in v4, v5, v6",
         "st elevation v2 till v5": "st elevation in v2, v3, v4, v5", "st elevation in leads i-iii": "st elevation in i, ii, iii", "st elevation v1 through v4": "st elevation in v1, v2, v3, v4",
         "tall r waves in v5-v6": "tall r waves in v5, v6", "tall r wave in v1": "tall r wave in v1",
         "rsr' pattern in ii, iii": "rsr' pattern in ii, iii", "mobitz ii": "second degree av block type two",
         "mobitz i": "second degree av block type one", "av-block ii-iii": "av block", "av-block i.-ii. grades": "av block"}


def test_leads_and_degrees():
    """Ranges either way and in any dash; a wording with a lead, or a degree, of its own stands for no other."""
    assert {text: data.translate(text) for text in LEADS} == {text: [english] for text, english in LEADS.items()}


def test_lines_are_sentences_and_label_codes_no_report():
    report = "No previous tracing\nInferior infarct\nQRS not prolonged\nRBBB. Edit: LVH 100, AFIB"
    for statements in (data.translate(report), data.split_statements(report)):
        assert data.Findings().named(statements) == ["IMI", "CRBBB"]
    named = data.Findings().named
    assert named(data.split_statements("may be at increased risk of developing complete heart block")) == []
    assert named(["first-degree av block"]) == ["1AVB"] and named(["left bundle-branch block"]) == ["CLBBB"]
    assert named(["af with rbbb"]) == ["AFIB", "CRBBB"] and named(["a-fib"]) == ["AFIB"] and named(["1st degree heart block"]) == ["1AVB"]
    assert named(["qtc is prolonged"]) == ["LNGQT"] == named(data.translate("QT interval prolonged"))
    assert named(["myocardial ischaemia"]) == ["ISC_"] and named(["atrial fibrillation resolved"]) == []
    assert data.translate("AV block I, RBBB") == ["first degree av block", "complete right bundle branch block"]


def test_composed_letters():
    for text in ("Kein Hinweis für Ischämie, Linksschenkelblock", "Hinterwandinfarkt möglich", "Förmaksflimmer"):
        assert data.translate(unicodedata.normalize("NFD", text)) == data.translate(text) != []


def test_clean_and_split():
    assert data.clean("*** Abnormal EKG ***\n= sinus") == "abnormal ecg sinus"
    assert data.split_statements("*** Sinus rhythm ***\nInferior infarct, age undetermined") == ["sinus rhythm", "inferior infarct, age undetermined"]
    assert data.split_statements("Sinus rhythm. ST segments are depressed in II, V4,5,6. PR 0.22 sec.\nAbnormal EKG") == [
        "sinus rhythm", "st segments are depressed in ii, v4,5,6", "pr 0.22 sec", "abnormal ecg"]
    assert data.split_statements("no full stop") == ["no full stop"]  # MELP loses such reports (docs/papers.md)


def test_our_own_names_stay_as_they_are():
    """The translation's English is the wording of the prompts: a code's name is a statement of itself."""
    changed = [f["name"] for f in data.label_set("ptbxl_all").values() if data.translate(f["name"]) != [f["name"]]]
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
    for code in data.label_set("ptbxl_all"):
        finding = data.knowledge()["findings"][code]
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


NEGATED = """infarct excluded; myocardial infarction ruled out; inferior infarct has been ruled out; atrial fibrillation is unlikely;
absence of st elevation; atrial fibrillation is no longer present; neither ischemia nor infarction; no lvh, lbbb, or atrial fibrillation;
no evidence of ischemia, infarction or hypertrophy; negative for left ventricular hypertrophy; free of st depression; denies atrial fibrillation;
without left bundle branch block; infarct is not present; doesn't show atrial fibrillation; atrial fibrillation isn't present; lack of st elevation;
atrial fibrillation never seen; st elevation has resolved; this is not atrial fibrillation; does not meet criteria for lvh; ischemia not likely;
infarction less likely; acute mi has been excluded; resolution of atrial fibrillation; left bundle branch block nowhere to be seen;
vorhofflimmern ausgeschlossen; infarkt nicht mehr nachweisbar; kein vorhofflimmern; keine ischaemie, infarkt oder hypertrophie;
ohne linksschenkelblock; vorhofflimmern liegt nicht vor; linksschenkelblock nirgends erkennbar; weder ischaemie noch infarkt;
kein anhalt fuer infarkt; infarkt unwahrscheinlich; ej foermaksflimmer; inget foermaksflimmer; inga tecken pa infarkt; utan infarkt;
infarkt kan uteslutas; varken ischemi eller infarkt; foermaksflimmer saknas; w/o ischemia; exclusion of infarct; excluded: infarct;
ischemia cannot be confirmed; infarct could not be found; it is unlikely that this is infarct; less likely infarct; no lbbb/rbbb;
lvh criteria not met; voltage criteria for lvh are not met; fails to meet criteria for lvh; atrial fibrillation terminated;
avsaknad av ischemi; infarkt foereligger ej; inte infarkt; infarkt verneint; keine zeichen eines infarkts; ischemia not demonstrable;
ischemia and infarction excluded; ischämie und infarkt ausgeschlossen; ischemi eller infarkt kan uteslutas; lvh and rvh criteria not met;
vorhofflimmern oder vorhofflattern unwahrscheinlich; no longer in atrial fibrillation; patient is no longer in sinus rhythm; lvh: nein;
atrial fibrillation: no; infarct: none; förmaksflimmer: nej; extrasystolen: keine; lvh negativ; lvh-kriterien negativ; troponin negative;
nothing to suggest ischemia or infarction; i cannot see any ischemia; no ischaemia & infarction; this isn`t atrial fibrillation;
negative for acute ischemia, inferior infarction, or ventricular hypertrophy; absence of ischemia, infarction or lvh;
does not show ischemia, infarction or lvh; no signs of acute ischemia, inferior infarction and left ventricular hypertrophy;
keine hinweise auf vorhofflimmern, akute ischämie und alten infarkt; acute ischemia, inferior infarction and pericarditis are excluded"""
NEGATED = NEGATED.replace("\n", " ").split("; ")
AFFIRMED = {"inferior infarct cannot be excluded": "IMI", "inferior infarct not excluded": "IMI", "cannot rule out inferior infarct": "IMI",
            "can't exclude inferior infarct": "IMI", "non-specific st changes": "NST_", "sinus rhythm rather than atrial fibrillation": "SR",
            "sinus rhythm, not atrial fibrillation": "SR", "atrial fibrillation has been replaced by sinus rhythm": "SR",
            "infarkt nicht auszuschliessen": "myocardial infarction", "infarkt kan ej uteslutas": "myocardial infarction",
            "rule out inferior infarct": "IMI", "no change in atrial fibrillation": "AFIB", "negative t waves": "INVT",
            # a negating suffix is of what it stands behind: over "and" not of a rhythm, in the singular of the last alone
            "sinus rhythm and ischemia unlikely": "SR", "rbbb is present and ischemia is unlikely": "CRBBB",
            "sinus rhythm and atrial fibrillation has resolved": "SR", "sinus rhythm and lvh criteria not met": "SR",
            "embolism excluded, rbbb": "CRBBB", "voltage criteria not met, rbbb": "CRBBB", "ectopy has resolved, rbbb": "CRBBB",
            # neither double negations nor earlier tracings deny
            "inferior infarct cannot be completely ruled out": "IMI", "does not exclude inferior infarct": "IMI",
            "inferior infarct not entirely excluded": "IMI", "rbbb, not present on previous tracing": "CRBBB",
            "infarkt nicht völlig ausgeschlossen": "myocardial infarction",
            # what a negation begins is no list where it denies no finding, or where a sentence goes on
            "no previous ecg for comparison, rbbb": "CRBBB", "no evidence of acute ischemia, there is rbbb": "CRBBB",
            "no st elevation in v1 or v2, rbbb": "CRBBB",
            # what is denied is no finding, and ends at the comma
            "no chest pain, sinus rhythm": "SR", "qtc not prolonged, rbbb": "CRBBB", "no ectopy, rbbb": "CRBBB",
            "p waves absent, atrial fibrillation": "AFIB", "q waves absent, left ventricular hypertrophy": "LVH",
            "kein vor-ekg, infarkt": "myocardial infarction", "no abnormal st. lvh.": "LVH", "sinus rhythm. vorbefund: keine": "SR",
            "sinus rhythm, ischemia and infarction are excluded": "SR", "sinus rhythm has replaced atrial fibrillation": "SR",
            "atrial fibrillation replaced by sinus rhythm": "SR", "compared to prior ecg, atrial fibrillation has developed": "AFIB",
            "sinus rhythm without ectopic beats": "SR", "no acute changes. old inferior infarct": "IMI", "not only left ventricular hypertrophy": "LVH"}


@pytest.mark.parametrize("statement", NEGATED)
def test_what_is_negated_is_not_named(statement):
    findings = data.Findings()
    translated = data.translate(statement)
    assert all(s.startswith(("no ", "resolved ")) or s.endswith(("unlikely", "less likely")) for s in translated)
    for said in ([statement], data.split_statements(statement), translated):
        assert findings.named(said) == [], said


@pytest.mark.parametrize("statement", AFFIRMED)
def test_a_negation_in_an_understood_phrase_is_none(statement):
    findings = data.Findings()
    assert findings.named(data.translate(statement)) == [AFFIRMED[statement]]
    if "infarkt" not in statement:  # findings know their English wordings
        assert findings.named([statement]) == [AFFIRMED[statement]]


MACHINE = {  # statements of MIMIC-IV-ECG (GE 12SL) -> findings
    "sinus rhythm with 1st degree a-v block": "SR 1AVB", "sinus bradycardia with borderline 1st degree a-v block": "SBRAD 1AVB",
    "sinus rhythm with pac(s)": "SR PAC", "sinus rhythm with pvc(s)": "SR PVC", "sinus rhythm with frequent pvcs": "SR PVC",
    "sinus tachycardia with occasional premature ventricular complexes": "STACH PVC", "sinus rhythm with marked sinus arrhythmia": "SR SARRH",
    "atrial fibrillation with rapid ventricular response": "AFIB rapid_ventricular_response", "probable atrial flutter": "AFLT",
    "atrial fibrillation with premature ventricular or aberrantly conducted complexes": "AFIB PVC",
    "atrial flutter with variable a-v block": "AFLT av_block", "supraventricular tachycardia": "SVTAC", "2nd degree a-v block": "2AVB",
    "complete a-v block": "3AVB", "3rd degree a-v block": "3AVB", "complete heart block": "3AVB", "ventricular bigeminy": "BIGU",
    "left axis deviation": "left_axis_deviation", "leftward axis": "left_axis_deviation", "rbbb": "CRBBB", "lbbb": "CLBBB",
    "rbbb with left anterior fascicular block": "CRBBB LAFB", "rbbb and lpfb": "CRBBB LPFB", "incomplete rbbb": "IRBBB",
    "incomplete left bundle branch block": "ILBBB", "iv conduction defect": "IVCD", "nonspecific intraventricular conduction delay": "IVCD",
    "lvh": "LVH", "lvh with secondary repolarization abnormality": "LVH st-t_changes", "lvh by voltage": "VCLVH",
    "minimal voltage criteria for lvh, may be normal variant": "VCLVH", "possible right ventricular hypertrophy": "RVH",
    "left atrial abnormality": "LAO/LAE", "possible left atrial enlargement": "LAO/LAE", "right atrial enlargement": "RAO/RAE",
    "possible inferior infarct - age undetermined": "IMI age_undetermined", "inferior infarct, old": "IMI",
    "anteroseptal infarct - age undetermined": "ASMI age_undetermined", "inferior/lateral infarct": "ILMI", "inferior/posterior infarct": "IPMI",
    "cannot rule out anterior infarct, age undetermined": "AMI age_undetermined", "*** acute mi ***": "acute_myocardial_infarction",
    "lateral st-t changes are nonspecific": "st-t_changes_in_lateral_leads", "nonspecific st-t wave changes": "NST_",
    "nonspecific t wave abnormality": "NDT", "t wave abnormality, consider lateral ischemia": "TAB_ ISCLA", "t wave inversion": "INVT",
    "extensive st-t changes may be due to hypertrophy and/or ischemia": "st-t_changes ISC_", "prolonged qt interval": "LNGQT",
    "st junctional depression is nonspecific": "STD_", "abnormal r-wave progression": "poor_r_wave_progression", "wolff-parkinson-white": "WPW",
    "low qrs voltages in limb leads": "LVOLT", "ventricular-paced rhythm": "ventricular_pacing", "a-v dual-paced rhythm": "av_sequential_pacing",
    "pacemaker rhythm - no further analysis": "PACE", "normal ecg except for rate": "NORM", "early precordial r/s transition":
    "counterclockwise_rotation", "no previous ecg available for comparison": "", "no significant change since last tracing": "",
    "all 12 leads are missing": ""}


def test_machine_statements():
    findings = data.Findings()
    assert {s: findings.named([s]) for s in MACHINE} == {s: [code.replace("_", " ") if code.islower() else code for code in codes.split()]
                                                         for s, codes in MACHINE.items()}


def test_one_negation_keeps_lists_together():
    assert data.split_statements("No ischemia, old infarct or LVH. Sinus rhythm, left axis deviation") == [
        "no ischemia or old infarct or lvh", "sinus rhythm", "left axis deviation"]
    assert data.split_statements("Sinus rhythm. ***. ... -- . (Normal)") == ["sinus rhythm", "(normal)"]


# ---- prompts.json, which people edit -----------------------------------------------------------------------------------

def edited(change):
    table = json.loads((ROOT / "prompts.json").read_text())
    change(table)
    return json.dumps(table)


WRONG = {  # what is written -> what is said
    "": "empty", "{": "line 1 column 2", '{\n "findings": {,}}': "line 2 column 15", "[]": "must be an object", "{}": "has no 'findings'",
    '{"a": 1, "a": 2}': "'a' occurs twice", "version https://git-lfs.github.com/spec/v1": "git lfs pull"}
EDITS = [
    (lambda t: t["findings"]["SR"].pop("also"), "findings, SR: has no 'also'"),
    (lambda t: t["findings"]["SR"].update(also="sinus"), "findings, SR, also: must be a list, not \"sinus\""),
    (lambda t: t["findings"]["SR"].update(prompts=[]), "findings, SR: .*no prompts"),
    (lambda t: t["findings"]["SR"].update(prompts=["***"]), "findings, SR: .*without a word"),
    (lambda t: t["findings"]["SR"].update(name=" "), "findings, SR: .*without a word"),
    (lambda t: t["findings"]["SR"].update(rhythm="yes"), "findings, SR, rhythm: must be true or false"),
    (lambda t: t["findings"].pop("AFIB"), "label_sets, .*has more than the classes of findings: 'AFIB'"),
    (lambda t: t["label_sets"]["ptbxl_rhythm"].append("XYZ"), "label_sets, ptbxl_rhythm: has more than the classes of findings: 'XYZ'"),
    (lambda t: t["label_sets"]["ptbxl_rhythm"].remove("SR"), "label_sets, ptbxl_rhythm: has no 'SR'"),
    (lambda t: t["label_sets"]["ptbxl_super"]["MI"].update(prompts=[]), "label_sets, ptbxl_super, MI: .*no prompts"),
    (lambda t: t["label_sets"].pop("ptbxl_all"), "label_sets: has no 'ptbxl_all'"),
    (lambda t: t["label_sets"].update(mine=[]), "label_sets, mine: no such label set"),
    (lambda t: t["lexicon"]["rewrite"].append(["(", ""]), r"lexicon, rewrite, place \d+: no \[pattern, text\]"),
    (lambda t: t["lexicon"]["rewrite"].append(["a", r"\9"]), r"lexicon, rewrite, place \d+: no \[pattern, text\]"),
    (lambda t: t["lexicon"]["rewrite"].append(["a"]), r"lexicon, rewrite, place \d+: no \[pattern, text\]"),
    (lambda t: t["lexicon"]["prefix"].update(never="no"), "lexicon, prefix: 'never': 'no' is no phrase with its English and a ~"),
    (lambda t: t["lexicon"]["statements"].update({"": "x"}), "lexicon, statements: '': 'x' is no phrase"),
    (lambda t: t["lexicon"]["statements"].update({"x": ""}), "lexicon, statements: 'x': '' is no phrase"),
    (lambda t: t["lexicon"].update(negations="no"), "lexicon, negations: must be a list")]


@pytest.mark.parametrize("content, message", [*WRONG.items(), *((change, message) for change, message in EDITS)])
def test_what_is_wrong_in_prompts_is_said(tmp_path, content, message):
    path = tmp_path / "prompts.json"
    path.write_text(content if isinstance(content, str) else edited(content))
    with pytest.raises(data.DataError, match=message) as error:
        data.Translator(data.read_knowledge(path)["lexicon"])
    assert "prompts.json" in str(error.value) and "\n" not in str(error.value)
