"""Data sets whose labels are codes (CPSC2018, CSN, Georgia, CODE-test, any WFDB folder), and label sets."""
import json
import pickle

import numpy as np
import pandas as pd
import pytest

import data
from conftest import SHARED, small_config
from test_data import beats, csv_source, edit, table, write

REAL = SHARED / "data"
here = pytest.mark.skipif(not (REAL / "cpsc2018").is_dir(), reason=f"no real recordings in {REAL}")
CONDITIONS = "270492004:1AVB 251173003:ABI 164889003:AFIB 164890007:AF 17338001:VPB 59118001:RBBB"


def headers(folder, comments, encoding="utf-8"):
    """Records {name: comment lines} below a folder, in the layout of the Challenges."""
    for i, (name, text) in enumerate(comments.items()):
        path = write(folder / name, beats(seed=i)).with_suffix(".hea")
        path.write_bytes(path.read_bytes() + text.encode(encoding))
    return folder


def opened(source, folder, **options):
    return data.open_data(f"{source}:{folder}", cache=folder.parent / "cache", **options)


def column(store, name):
    return dict(zip(store.records["id"], store.records[name]))


def labels(records, name):
    """{class: positives} of the classes that have some."""
    classes, matrix, _ = data.label_matrix(records, name)
    return {c: int(n) for c, n in zip(classes, matrix.sum(0)) if n}


# ---- folders of WFDB headers -------------------------------------------------------------------------------

def test_cpsc2018_in_all_its_forms(tmp_path):
    """SNOMED numbers (Challenge), acronyms (first release), REFERENCE.csv where a header has neither."""
    folder = headers(tmp_path / "cpsc", {
        "A0001": "# Age: 74\n# Sex: Male\n# Dx: 59118001\n", "A0002": "#Age: NaN\n#Sex: F\n#Dx: 426783006\n",
        "t/A0003": "#Dx:  af, I-AVB ,\n#Sx: Unknows\n", "t/A0004": "#Sex: Unknown\n#Dx: Normal\n",
        "t/A0005": "# \xb5\n", "A0006": "#Dx:\n", "Q0001": "#Dx: 164884008,284470004\n"}, "latin-1")
    rows = ("A0005", 8, "4.0"), ("A0003", 1, ""), ("A0006", 1, "")
    columns = "Recording", "First_label", "Second_label", "Third_label"
    table(folder / "t" / "REFERENCE.csv", [dict(zip(columns, (*row, ""))) for row in rows])
    store = opened("cpsc2018", folder)
    assert {name: list(codes) for name, codes in column(store, "codes").items()} == {
        "A0001": ["59118001"], "A0002": ["426783006"], "A0003": ["af", "I-AVB"], "A0004": ["Normal"],
        "A0005": ["STD", "LBBB"], "A0006": [], "Q0001": ["164884008", "284470004"]}
    assert column(store, "statements") == {
        "A0001": ["complete right bundle branch block"], "A0002": ["normal ecg"], "A0004": ["normal ecg"],
        "A0003": ["atrial fibrillation", "first degree av block"],
        "A0005": ["st depression", "complete left bundle branch block"],
        "A0006": [], "Q0001": ["ventricular premature complex", "atrial premature complex"]}
    assert store.records["age"].tolist() == ["74", "", "", "", "", "", ""]
    assert [column(store, "sex")[name] for name in ("A0001", "A0002", "A0004")] == ["M", "F", ""]
    assert column(store, "split")["Q0001"] == "unused" and data.STRANGE not in store.meta["warnings"]
    assert labels(store.records, "cpsc2018") == dict(NSR=2, AF=1, IAVB=1, LBBB=1, RBBB=1, PAC=1, PVC=1, STD=1)
    edit(folder / "t" / "REFERENCE.csv", "A0005,8", "A0005,12")
    with pytest.raises(data.DataError, match="REFERENCE.csv labels A0005 12, 4.0; they are 1 to 9"):
        opened("cpsc2018", folder)
    with pytest.raises(data.DataError, match="holds no WFDB header"):
        opened("cpsc2018", tmp_path / "nowhere")


@pytest.mark.parametrize("bom, name", [("\ufeff", "AcronymName"), ("", "AcronymName"),
                                       ("\ufeff", "Acronym Name"), ("", "Acronym Name")])
def test_csn_and_its_table_of_acronyms(tmp_path, bom, name):
    folder = headers(tmp_path / "csn", {
        "WFDBRecords/01/010/JS00001": "#Age: 85\n#Sex: Male\n#Dx: 164889003,59118001,,164934002\n",
        "WFDBRecords/20/200/JS20000": "#Dx: AF,VPB, NEW\n",
        "WFDBRecords/46/460/JS46000": "#Dx: 251238007,164890007\n"})
    rows = [pair.split(":") for pair in [*CONDITIONS.split(), "427084000:NEW"]]
    lines = [f"{bom}{name},Full Name,Snomed_CT", *(f"{word},x,{number}" for number, word in rows)]
    (folder / "ConditionNames_SNOMED-CT.csv").write_text("\n".join(lines), encoding="utf-8")
    store = opened("csn", folder)
    assert {key: list(codes) for key, codes in column(store, "codes").items()} == {
        "JS00001": ["164889003", "59118001", "164934002"], "JS20000": ["164890007", "17338001", "427084000"],
        "JS46000": ["251238007", "164890007"]}
    assert column(store, "statements")["JS20000"] == [
        "atrial flutter", "ventricular premature complex", "sinus tachycardia"]
    assert column(store, "split") == {"JS00001": "train", "JS20000": "unused", "JS46000": "unused"}
    entry = store.meta["warnings"][data.STRANGE]
    assert (entry["records"], entry["examples"]) == (1, ["JS46000: 251238007"])
    assert labels(store.records, "csn") == dict(AFIB=1, RBBB=1, TWC=1, AF=2, VPB=1, ST=1)
    published = labels(store.records, "csn_published")
    assert published == labels(store.records, "csn") | dict(AF=3)  # "AF" is in "AFIB,RBBB,TWC"
    edit(folder / "ConditionNames_SNOMED-CT.csv", "Snomed_CT", "SNOMED")
    with pytest.raises(data.DataError, match="no column 'Snomed_CT'"):
        opened("csn", folder)


def test_georgia_and_any_folder(tmp_path):
    folder = headers(tmp_path / "src", {
        "g1/E1": "#Dx: 733534002,713427006\n", "g1/E2": "#Dx: 63593006,17338001\n",
        "g2/E1": "#Dx: 59118001\n", "g2/E3": "#Dx: 427172004,164884008,284470004,164909002\n"})
    store = opened("wfdb", folder)
    assert store.records["id"].tolist() == ["g1/E1", "g1/E2", "g2/E1", "g2/E3"]
    assert (store.records["patient"] == store.records["id"]).all()
    assert labels(store.records, "cinc2021") == dict(LBBB=2, RBBB=2, PAC=2, PVC=2)
    assert labels(store.records, "georgia") == dict(LBBB=2, RBBB=2, PAC=2, VPB=2)
    georgia = opened("georgia", folder)
    assert georgia.records["id"].tolist() == ["E1", "E2", "E3"]  # the same name twice is one record
    assert georgia.meta["dropped"]["occurs twice (its id or its waveform)"]["records"] == 1
    assert georgia.records["split"].tolist() == [data.split_by(name, 0.7, 0.1) for name in ("E1", "E2", "E3")]
    shares = [data.split_of("georgia", f"E{i:05}") for i in range(20000)]
    shares = [shares.count(split) / 20000 for split in ("train", "val", "test")]
    np.testing.assert_allclose(shares, [0.7, 0.1, 0.2], atol=0.01)


# ---- CODE-test ---------------------------------------------------------------------------------------------

def code_tree(folder, unit, count=9):
    """CODE-test's layout: 10 s at 400 Hz between zeros, in mV times `unit`; record i has class i mod 6."""
    h5py = pytest.importorskip("h5py", reason="reading CODE-test needs h5py")
    (folder / "annotations").mkdir(parents=True)
    signals = np.stack([beats(4000, 400, seed=i) + 0.01 for i in range(count)])
    tracings = np.zeros((count, 4096, 12), np.float32)
    tracings[:, 48:4048] = signals.swapaxes(1, 2) * unit
    with h5py.File(folder / "ecg_tracings.hdf5", "w") as file:
        file["tracings"] = tracings
    rows = [{c: int(i % 6 == k) for k, c in enumerate(data.label_set("code_test"))} for i in range(count)]
    table(folder / "annotations" / "gold_standard.csv", rows)
    table(folder / "annotations" / "medical_students.csv", rows[1:] + rows[:1])
    table(folder / "attributes.csv", [dict(age=30 + i, sex="MF"[i % 2]) for i in range(count)])
    return folder, signals


@pytest.mark.parametrize("unit, name", [(1, "mV"), (10, "1e-4 V"), (1e-3, "V")])
def test_code_test_in_each_unit(tmp_path, unit, name):
    folder, signals = code_tree(tmp_path / "code", unit)
    store = opened("code", folder, rate=400)
    ecg = store.ecg(slice(None))
    np.testing.assert_allclose(ecg, signals, atol=0.0006)  # leads in their order, padding taken away
    assert list(store.meta["warnings"]) == [f"samples taken to be in {name}, by the height of the QRS"]
    assert set(store.records["split"]) == {"test"} and store.records["age"].tolist()[:2] == ["30", "31"]
    assert store.records["sex"].tolist()[:2] == ["M", "F"]
    classes, matrix, keep = data.label_matrix(store.records, "code_test")
    assert keep.all() and (matrix == (np.arange(9)[:, None] % 6 == np.arange(6))).all()
    others = data.code_annotations(folder)
    assert list(others) == ["gold_standard", "medical_students"] and (others["gold_standard"] == matrix).all()
    assert (others["medical_students"] == np.roll(matrix, -1, 0)).all()
    assert store.records["statements"][0] == ["first degree av block"]


def test_code_test_that_cannot_be_honoured(tmp_path, monkeypatch):
    folder, _ = code_tree(tmp_path / "code", 100)
    with pytest.raises(data.DataError, match="0.5 to 3 mV high in none of mV, 1e-4 V, V"):
        opened("code", folder)
    folder, _ = code_tree(tmp_path / "other", 1)
    before = opened("code", folder)
    (folder / "attributes.csv").unlink()
    assert opened("code", tmp_path / "other", rate=200).records["age"].tolist() == [""] * 9
    edit(folder / "annotations" / "gold_standard.csv", "\n1", "\n2")
    with pytest.raises(data.DataError, match="gold_standard.csv: '2' is neither 0 nor 1"):
        opened("code", folder)
    (folder / "annotations" / "gold_standard.csv").unlink()
    with pytest.raises(data.DataError, match="9 tracings, but annotations/gold_standard.csv has 0 rows"):
        opened("code", folder)
    (folder / "ecg_tracings.hdf5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    with pytest.raises(data.DataError, match="ecg_tracings.hdf5: not readable"):
        opened("code", folder)
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(data.DataError, match="needs h5py"):
        opened("code", folder)
    assert len(before) == 9


# ---- age and sex, languages --------------------------------------------------------------------------------

def test_age_and_sex_of_an_own_csv(tmp_path):
    source = csv_source(tmp_path / "src", 3)
    rows = [dict(record=f"r{i}", report="Sinusrhythmus. Normales EKG", age=age, sex=sex)
            for i, (age, sex) in enumerate([("61.0", "female"), ("", ""), ("0.5", " M ")])]
    table(source, rows)
    store = data.prepare("csv", source, tmp_path / "dst")
    assert store.records["age"].tolist() == ["61", "", "0.5"]
    assert store.records["sex"].tolist() == ["F", "", "M"]
    assert data.report_tags(store)[0] == ["sinusrhythmus", "normales ecg"]
    assert data.report_tags(store, "translated")[0] == ["sinus rhythm", "normal ecg"]
    assert data.corpus(f"csv:{source}", "translated") == ["sinus rhythm. normal ecg"]
    with pytest.raises(data.DataError, match="unknown report language 'latin'"):
        data.report_tags(store, "latin")
    for change, message in ((dict(age="old"), "record r0 has age 'old'"), (dict(age="300"), "has age '300'"),
                            (dict(sex="1"), "record r0 has sex '1', which is neither F nor M")):
        table(source, [rows[0] | change])
        with pytest.raises(data.DataError, match=message):
            data.prepare("csv", source, tmp_path / "bad")


def test_age_and_sex_of_ptbxl(tmp_path):
    from test_data import ptbxl_copy
    people = [("56.0", "1"), ("300.0", "0"), ("", ""), ("0.0", "0.0")]
    change = lambda row: row | dict(zip(("age", "sex"), people[row["ecg_id"] % 4]))
    source = ptbxl_copy(tmp_path / "src", change, count=4)
    store = data.prepare("ptbxl", source, tmp_path / "dst")
    assert store.records["age"].tolist() == ["90", "", "0", "56"]  # 300 stands for over 89
    assert store.records["sex"].tolist() == ["M", "", "M", "F"]


# ---- findings and label sets -------------------------------------------------------------------------------

@pytest.mark.parametrize("code, source, key", [
    ("AFIB", None, "AFIB"), ("164889003", None, "AFIB"), ("AF", None, "AFIB"), ("AF", "csn", "AFLT"),
    ("STE_", None, "STE_"), ("STE", None, "st elevation"), ("AMI", None, "AMI"), (" i-avb", None, "1AVB"),
    ("57054005", None, "acute myocardial infarction"), ("Normal", None, "NORM"), ("426783006", None, "SR"),
    ("426783006", "cpsc2018", "NORM"), ("LAnFB", None, "LAFB"), ("ST", "code", "STACH"), ("", None, None),
    ("Left  Axis Deviation", None, "left axis deviation"), ("251238007", None, None), ("my own", None, None),
    ("wenckebach", None, "second degree av block type one")])
def test_finding_of_a_code(code, source, key):
    assert data.finding_of(code, source) == key


def test_every_published_code_has_its_finding():
    codes = data.knowledge()["codes"]
    counts = {name: len(words) for name, words in codes.items()}
    assert counts == dict(challenge=133, cpsc2018=12, csn=64, code=6)
    for source, words in codes.items():
        assert all(data.finding_of(word, source) and data.finding_of(code) for word, code in words.items())
    for one, same in (("733534002", "164909002"), ("713427006", "59118001"), ("63593006", "284470004"),
                      ("17338001", "427172004")):
        assert data.finding_of(one) == data.finding_of(same)
    for name in ("cinc2021", "georgia"):
        words = codes["challenge"] | dict(LBBB="164909002", RBBB="59118001")
        for c in data.label_set(name):  # the number of the class, and only its class
            assert labels(pd.DataFrame(dict(codes=[{words[c]: 100.0}])), name) == {c: 1}


@here
@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("name, file", [("csn", "csn_exact/csn"), ("csn_published", "csn/chapman")])
def test_csn_agrees_with_the_published_tables_in_every_row(name, file, split):
    published = pd.read_csv(REAL / "splits" / f"{file}_{split}.csv", keep_default_na=False)
    names = published["ecg_path"].str.extract(r"(JS\d+)", expand=False)
    numbers = data.knowledge()["codes"]["csn"]
    written = [text.split(",") for text in published["diagnose"]]
    for codes in (written, [[numbers.get(code, code) for code in row] for row in written]):
        records = pd.DataFrame(dict(codes=[dict.fromkeys(row, 100.0) for row in codes], source="csn"))
        classes, matrix, _ = data.label_matrix(records, name)
        assert len(classes) == 38 and (matrix == published[classes].to_numpy(bool)).all()
    if split == "test":  # docs/papers.md, data and labels
        counts = matrix[:, [classes.index(c) for c in "VB AVB CR AF SA ST 2AVB".split()]].sum(0).tolist()
        exact, published = [0, 39, 12, 690, 395, 1030, 3], [169, 169, 50, 987, 536, 1281, 4]
        assert counts == (exact if name == "csn" else published)
    assert {data.split_of("csn", name) for name in names} == {split}


@here
def test_real_records_have_their_labels(tmp_path):
    """All 30 of CPSC2018, 20 of CSN, 15 of Georgia; CPSC2018's are those of REFERENCE.csv."""
    store = data.prepare("cpsc2018", REAL / "cpsc2018", tmp_path / "cpsc2018")
    rows = pd.read_csv(REAL / "cpsc2018" / "REFERENCE.csv", dtype=str, keep_default_na=False, index_col=0)
    assert len(store) == 30 and not store.meta["dropped"]
    classes, matrix, _ = data.label_matrix(store.records, "cpsc2018")
    assert classes == "NSR AF IAVB LBBB RBBB PAC PVC STD STE".split()  # labels 1 to 9
    for name, row in zip(store.records["id"], matrix):
        assert sorted(label for label in rows.loc[name] if label) == [str(k + 1) for k in np.flatnonzero(row)]
    published = pd.concat(pd.read_csv(path) for path in (REAL / "splits" / "cpsc2018").glob("*.csv"))
    assert len(published) == 6877
    for split in ("train", "val", "test"):
        names = pd.read_csv(REAL / "splits" / "cpsc2018" / f"icbeb_{split}.csv")["filename"]
        assert {data.split_of("cpsc2018", name) for name in names} == {split}
    store = data.prepare("csn", REAL / "csn", tmp_path / "csn")
    exact = pd.concat(pd.read_csv(path) for path in (REAL / "splits" / "csn_exact").glob("*.csv"))
    exact = exact.set_index(exact["ecg_path"].str.extract(r"(JS\d+)", expand=False))
    classes, matrix, _ = data.label_matrix(store.records, "csn")
    known = store.records["id"].isin(exact.index)
    assert len(store) == 20 and known.sum() == 8 and (store.records["split"][~known] == "unused").all()
    assert (matrix[known] == exact.loc[store.records["id"][known], classes].to_numpy(bool)).all()
    store = data.prepare("georgia", REAL / "georgia", tmp_path / "georgia")
    assert len(store) == 15
    assert labels(store.records, "georgia") == dict(NSR=4, SB=3, LQT=2, STach=5, TInv=1, RBBB=1)
    assert store.records["age"].ne("").all() and set(store.records["sex"]) == {"F", "M"}


@pytest.mark.parametrize("name", ["ptbxl_super", "cpsc2018", "csn", "cinc2021", "code_test"])
def test_any_set_is_scored_on_any_store(name):
    """Right bundle branch block as four sources write it."""
    codes = [{code: 100.0} for code in ("CRBBB", "59118001", "RBBB", "RBBB")]
    records = pd.DataFrame(dict(codes=codes, source=["ptbxl", "georgia", "cpsc2018", "code"]))
    assert list(labels(records, name).values()) == [4]


def test_the_codes_that_occur(capsys):
    codes = [{"AFIB": 100.0, "mine": 100.0}, {"164889003": 100.0}, {"LAD": 100.0}, {"mine": 1.0}]
    records = pd.DataFrame(dict(codes=codes))
    assert labels(records, "own") == {"AFIB": 2, "left axis deviation": 1}
    assert "own: codes that prompts.json does not know are left out: mine (2)" in capsys.readouterr().err
    assert data.label_set("own", records)["AFIB"]["prompts"][0] == "atrial fibrillation"


def test_classes_of_a_file(tmp_path):
    path = tmp_path / "mine.json"
    classes = {"mine": "wide something", "AF": "atrial fibrillation", "never": "nothing"}
    path.write_text(json.dumps({c: dict(name=text, prompts=[text]) for c, text in classes.items()}))
    records = pd.DataFrame(dict(codes=[{"mine": 100.0}, {"164889003": 100.0}, {"AFIB": 50.0}, {}]))
    names, matrix, keep = data.label_matrix(records, str(path))
    assert names == list(classes) and matrix.sum(0).tolist() == [1, 2, 0]
    assert keep.tolist() == [True, True, True, False]
    for content, message in (('{"a": {"name": "x"}}', "mine.json, a: has no 'prompts'"),
                             ("[]", "must be an object"),
                             ('{"a": {"name": "x", "prompts": []}}', "mine.json, a: .*no prompts")):
        path.write_text(content)
        with pytest.raises(data.DataError, match=message):
            data.label_set(str(path))


def test_classes_are_joined_for_transfer():
    """docs/evaluation.md, by equal findings and by hand; the same both ways."""
    blocks = ["WPW", "2AVB", "2AVB1", "AVB", "LBBB", "RBBB", "1AVB"]
    joined = data.join_classes("csn", "ptbxl_super")
    assert joined == dict(STTC=["STTC", "STE", "TWO", "STTU", "QTIE", "STDD", "TWC"], NORM=["SR"], MI=["MI"],
                          HYP=["RVH", "LVH"], CD=blocks)
    back = data.join_classes("ptbxl_super", "csn_published")
    pairs = {(c, s) for c, found in joined.items() for s in found}
    assert pairs == {(c, s) for s, found in back.items() for c in found}
    assert data.join_classes("ptbxl_super", "cpsc2018") == dict(
        NSR=["NORM"], IAVB=["CD"], LBBB=["CD"], RBBB=["CD"], STD=["STTC"], STE=["STTC"])
    assert data.join_classes("cpsc2018", "csn") == dict(
        SR=["NSR"], STE=["STE"], VPB=["PVC"], STTU=["STE"], APB=["PAC"], LBBB=["LBBB"], RBBB=["RBBB"],
        STDD=["STD"], AFIB=["AF"]) | {"1AVB": ["IAVB"]}


@pytest.mark.parametrize("change, message", [
    (lambda t: t["findings"]["SR"].update(snomed=["164889003"]), "(SR|AFIB): 164889003 is also of another"),
    (lambda t: t["codes"]["csn"].update(SR="12"), "codes, csn, SR: '12' is of no finding"),
    (lambda t: t["label_sets"]["csn"]["SR"].update(findings=["sinus"]), "csn, SR: .*'sinus'.* are no keys"),
    (lambda t: t["label_sets"]["csn"]["SR"].pop("findings"), "csn, SR: .* are no keys of findings"),
    (lambda t: t["label_sets"]["csn"]["SR"].update(snomed="1"), "csn, SR, snomed: must be a list"),
    (lambda t: t["transfer"]["ptbxl_super"]["csn"].update(CD=["XX"]), "super, csn: csn has no class 'XX'"),
    (lambda t: t["transfer"].update(mine={"csn": {"a": ["SR"]}}), "mine, csn: mine has no class 'a'")])
def test_edited_sets_are_checked(tmp_path, change, message):
    table_of = json.loads((data.Path(data.HERE) / "prompts.json").read_text())
    change(table_of)
    (tmp_path / "prompts.json").write_text(json.dumps(table_of))
    with pytest.raises(data.DataError, match=f"prompts.json, .*{message}"):
        data.read_knowledge(tmp_path / "prompts.json")


def test_records_with_codes_train(tmp_path, monkeypatch):
    """Their findings, worded by name, are the statements."""
    import train
    folder = headers(tmp_path / "src", {f"E{i:05}": f"#Dx: {('426783006', '164889003', '59118001')[i % 3]}\n"
                                        for i in range(24)})
    monkeypatch.setenv("ECG_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    train.main(f"--method etp --data georgia:{folder} --width 0.125 --dim 8 --mlm-steps 2 --batch-size 8 "
               "--epochs 1 --threads 1 --name run".split())
    assert (tmp_path / "runs" / "run" / "checkpoint.pt").exists()


# ---- several data sets in one run ----------------------------------------------------------------------------------

@pytest.fixture
def three(tmp_path, monkeypatch):
    """A data set of one's own, 300 simulated records, and one without a peak or a statement; a spec of all three."""
    monkeypatch.setenv("ECG_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flat").mkdir()
    write(tmp_path / "flat" / "r0", np.tile(np.linspace(0, 0.1, 5000), (12, 1)))
    table(tmp_path / "flat" / "list.csv", [dict(record="r0", report="", split="val")])
    own = csv_source(tmp_path / "own", 5, "Sinus rhythm. Only here")
    rows = [dict(record=f"r{i}", report=f"Sinus rhythm. Only here {i}", split="train" if i else "test") for i in range(5)]
    table(own, rows)
    yield "csv:own/list.csv*2.5,simulated:300*0.3,csv:flat/list.csv"
    data.open_store.cache_clear()


def test_stores_are_their_parts(three):
    store = data.open_all(three)
    parts = [data.open_data(spec) for spec in ("csv:own/list.csv", "simulated:300", "csv:flat/list.csv")]
    assert store.parts == [("csv:own/list.csv", 0, 5, 2.5), ("simulated:300", 5, 300, 0.3), ("csv:flat/list.csv", 305, 1, 1)]
    assert len(store) == 306 and (store.rate, store.samples) == (100, 1000) and store.meta["leads"] == list(data.LEADS)
    assert store.set_of([0, 4, 5, 304, 305]).tolist() == [0, 0, 1, 1, 2]
    rows = np.random.default_rng(0).permutation(306)
    ecg, counts, peaks = store.ecg(rows), store.microvolts(rows), store.peaks(rows)
    assert ecg.dtype == np.float32 and counts.dtype == np.int16 and peaks.dtype == np.int32
    columns = store.records.loc[rows, list(data.COLUMNS)].to_dict("records")
    for i, row in enumerate(rows):
        part = parts[store.set_of(row)]
        place = row - (0, 5, 305)[store.set_of(row)]
        assert columns[i] == part.records.loc[place, list(data.COLUMNS)].to_dict()
        assert (ecg[i] == part.ecg([place])[0]).all() and (counts[i] == part.microvolts([place])[0]).all()
        assert peaks[i][peaks[i] >= 0].tolist() == part.records["peaks"][place]
        assert store.tags[row] == part.tags[place] and store.ids([row]) == part.ids([place])
    assert len(store.tags) == 306 and len(set(store.tags.table)) == len(store.tags.table)
    assert len(store.tags.table) < sum(len(part.tags.table) for part in parts)  # sinus rhythm is one
    assert list(data.report_tags(store, "original"))[:5] == list(data.report_tags(parts[0], "original"))
    for split in data.SPLITS:
        assert store.rows(split).tolist() == np.flatnonzero(store.records["split"] == split).tolist()
    again = pickle.loads(pickle.dumps(store))
    assert len(pickle.dumps(store)) < 20_000 and (again.microvolts(rows) == counts).all() and again.parts == store.parts
    assert store.peaks([305]).tolist() == [[-1]] and store.microvolts([]).shape == (0, 12, 1000)
    out = np.empty((306, 12, 1000), np.int16)
    assert store.microvolts(rows, out) is out and (out == counts).all()
    with pytest.raises(IndexError):
        store.microvolts([306])


def test_one_spec_is_a_store_and_a_plan_is_of_all(three):
    one = data.open_all("simulated:300")
    assert type(one) is data.Store and one.meta["plan"] == data.open_data("simulated:300").meta["plan"]
    assert one.set_of([0, 299]).tolist() == [0, 0]
    plans = {data.open_all(text).meta["plan"] for text in (three, "simulated:300", "simulated:300,csv:own/list.csv",
                                                           "csv:own/list.csv,simulated:300")}
    assert len(plans) == 4 and data.open_all("simulated:300*3,csv:own/list.csv").meta["plan"] in plans


def test_a_label_set_finds_its_part(three):
    """Of the run's own data, however they are given; a share is no part of the name."""
    table("own/list.csv", [dict(record=f"r{i}", report="x", split="test", labels="NORM") for i in range(2)])
    text = "simulated:300*0.3,csv:own/list.csv*2.5"
    config = small_config("etp", data=text)
    assert data.sets_of(data.open_all(text)) == ["simulated", "own"]
    for specs in ((), [text]):
        assert len(data.find_store("simulated", config, specs)) == 300
        assert len(data.find_store("own", config, specs)) == 2
    with pytest.raises(data.DataError, match="none of simulated:300, simulated:9 is of own; name its data"):
        data.find_store("own", small_config("etp", data="simulated:300,simulated:9"))
    assert len(data.find_store("own", small_config("etp", data="simulated:9*2"))) == 9


def test_damage_of_a_part_is_noticed(three):
    store = data.open_all(three)
    store.verify()
    with open(f"{store.stores[1].path}/ecg.i16", "r+b") as file:
        file.write(b"\x55\xaa")
    with pytest.raises(data.DataError, match="simulated.*ecg.i16: damaged"):
        store.verify()


def test_shares(three):
    store, drawn = data.open_all(three), lambda seed, *rows: data.epoch_rows(store, np.random.default_rng(seed), *rows)
    train = store.rows("train")
    own, simulated = train[train < 5], train[train >= 5]
    assert own.tolist() == [1, 2, 3, 4]  # and no training record in the last
    first, again, other = drawn(1), drawn(1), drawn(2)
    assert (first == again).all() and len(first) == len(other) and set(first) != set(other)
    for epoch in (first, other):
        times = np.bincount(epoch, minlength=306)
        assert sorted(times[own]) == [2, 2, 3, 3] and times.sum() == 10 + round(0.3 * len(simulated))
        assert set(times[simulated]) == {0, 1} and times[simulated].sum() == round(0.3 * len(simulated))
    assert set(drawn(1, [3, 7, 8])) & {7, 8} and np.bincount(drawn(1, [3, 7, 8]))[3] == 2  # of 1: 2.5 times, of 2: at least 1
    assert len(drawn(1, [3, 7, 8])) == 3
    seen = set().union(*(drawn(seed) for seed in range(60)))
    assert seen == set(train)  # another third every epoch
    one = data.open_all("simulated:300")
    assert data.epoch_rows(one, np.random.default_rng(0)).tolist() == one.rows("train").tolist()
    twice = data.open_all("simulated:300*2")
    assert sorted(data.epoch_rows(twice, np.random.default_rng(0))) == sorted([*one.rows("train")] * 2)


@pytest.mark.parametrize("text, message", [
    ("simulated:8*x", "simulated:8[*]x: the share 'x' is not a number over 0 and up to 1000"), ("simulated:8*0", "the share '0'"),
    ("simulated:8*-1", "the share '-1'"), ("simulated:8*1001", "'1001'"), ("simulated:8*nan", "'nan'"), ("simulated:8*", "share ''"),
    ("simulated:8*inf,simulated:9", "'inf'"), ("simulated:8,simulated:8", "simulated:8: the same records as simulated:8; .*[*]2"),
    ("simulated,simulated:9,simulated:4096*2", "simulated:4096: the same records as simulated;"), ("", "no data are named"),
    ("simulated:8,ptb:x", "no such data|No such file"), ("simulated:8,csv:nowhere.csv*2", "nowhere.csv: No such file")])
def test_bad_sets_are_one_sentence(tmp_path, monkeypatch, text, message):
    monkeypatch.setenv("ECG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "SIMULATED", 16)
    text = text.replace("4096", "16")
    with pytest.raises(data.DataError, match=message.replace("4096", "16")):
        data.open_all(text)


def test_sets_of_two_rates(three, tmp_path):
    fast = data.prepare("simulated", "8", tmp_path / "fast", rate=500)
    with pytest.raises(data.DataError, match="fast: holds records at 500 Hz, not 100"):
        data.open_all(f"simulated:300,store:{fast.path}")
    with pytest.raises(data.DataError, match="simulated:300 is at 100 Hz, store:.*fast at 500; ask for one rate"):
        data.open_all(f"simulated:300,store:{fast.path}", None)
    assert data.open_all(f"simulated:9,store:{fast.path}", 500).samples == 5000


def test_specs_with_a_share(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.csv", "c.csv*0.5", "d*x.txt"):
        (tmp_path / name).write_text("")
    for text, specs in (("csv:a,b.csv*0.5,simulated*2", [("csv:a,b.csv", 0.5), ("simulated", 2)]),
                        ("csv:c.csv*0.5,simulated:20000*.5", [("csv:c.csv*0.5", 1), ("simulated:20000", 0.5)]),
                        ("csv:c.csv*0.5*1e1,ptbxl:x*y/z", [("csv:c.csv*0.5", 10), ("ptbxl:x*y/z", 1)]),
                        ('"csv:q, r.csv"*3,d*x.txt,mimic:/m*2', [("csv:q, r.csv", 3), ("d*x.txt", 1), ("mimic:/m", 2)])):
        assert [data.split_share(spec) for spec in data.split_specs(text)] == specs, text
