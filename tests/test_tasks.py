"""eval.py's tasks by known answers: vectors that are the labels, figures worked out by hand, refusals."""
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from matplotlib.image import imread
from sklearn.metrics import roc_auc_score

import data
import eval as evaluation
import model as models
import train
from conftest import ROOT, small_config, toy_config
from test_data import beats, csv_source, table, write

asking, vectors = evaluation.asking, evaluation.vectors
NO_FOLDS = ("cpsc2018", "csn", "csn_published", "georgia", "code_test")


# ---- a store and a method whose vectors are chosen by the test ---------------------------------------------

class Painted:
    """A store without recordings: lead I of a record begins with its vector, the rest is zero."""
    rate, samples, path = 100, 1000, "painted"

    def __init__(self, records, painted):
        self.records, self.painted = records, np.asarray(painted, np.float32)
        self.meta = {"plan": "painted", "settings": {"src": "painted"}}

    def __len__(self):
        return len(self.records)

    @property
    def tags(self):
        return data.Tags.from_lists(self.records["statements"])

    def sources(self):
        return self.records["source"].unique().tolist()

    def ecg(self, rows):
        ecg = np.zeros((len(self), 12, self.samples), np.float32)[rows]
        ecg[:, 0, :self.painted.shape[1]] = self.painted[rows]
        return ecg


class Reader:
    """A method whose vectors are what is painted; texts: {text: its vector}."""
    scales, samples, class_score = ("rhythm",), Painted.samples, models.Method.class_score

    def __init__(self, size, texts=()):
        self.size, self.texts, self.encoded = size, dict(texts), 0

    def encode_tokens(self, ecg):
        self.encoded += len(ecg)
        return ecg[:, :1, :self.size]

    def views(self, tokens, ecg):
        return SimpleNamespace(rhythm=F.normalize(tokens[:, 0], dim=1))

    def encode_text(self, texts):
        return SimpleNamespace(report=torch.stack([torch.from_numpy(self.texts[text]) for text in texts]))


def table_of(codes, source, statements=None):
    """Records with these codes: two of each patient; a tenth of the patients in each fold."""
    count, fold = len(codes), np.arange(len(codes)) // 2 % 10 + 1
    split = np.array(["train"] * 8 + ["val", "test"])[fold - 1]
    return pd.DataFrame(dict(id=[str(i) for i in range(count)], patient=[f"p{i // 2}" for i in range(count)],
                             split=split, fold=fold if source == "ptbxl" else 0, source=source, codes=codes,
                             statements=statements or [[]] * count, report="", age="", sex=""))


def code_of(name, c, source):
    """A code that is of this class of a label set, and of no other."""
    entry = data.label_set(name)[c]
    for code in [*entry.get("snomed", ()), *entry["findings"]]:
        classes, labels, _ = data.label_matrix(pd.DataFrame(dict(codes=[{code: 100.0}], source=source)), name)
        if [k for k, found in zip(classes, labels[0]) if found] == [c]:
            return code


def labelled(name, count=800, also=0.3, seed=0):
    """(store, labels): records with one class of a label set each, or two; their vectors are their labels."""
    rng, source = np.random.default_rng(seed), name.split("_")[0]
    names = [code for c in data.label_set(name) if (code := code_of(name, c, source))]
    first = rng.permutation(np.arange(count) % len(names))
    codes = [{names[i]: 100.0} | ({names[rng.integers(len(names))]: 100.0} if rng.random() < also else {})
             for i in first]
    records = table_of(codes, source)
    _, labels, _ = data.label_matrix(records, name)
    return Painted(records, labels), labels


def run_of(store, monkeypatch, folder, method=None, **options):
    """A run with Reader for its method, which finds this store whatever is asked."""
    monkeypatch.setattr(data, "find_store", lambda *_: store)
    monkeypatch.setattr(data, "code_annotations", lambda _: {})
    method = method or Reader(store.painted.shape[1])
    return evaluation.Run(folder, method, small_config("etp", width=0.125, **options), "cpu", "painted")


def knowing(name, store, monkeypatch, folder):
    """A run for which a text is the unit vector of its class, and zero if two classes share it."""
    texts, classes = {}, list(data.label_set(name))
    for c, prompts in enumerate(data.class_prompts(name, classes, "descriptive")):
        for text in prompts:
            texts[text] = np.eye(len(classes), dtype=np.float32)[c] * (text not in texts)
    return run_of(store, monkeypatch, folder, Reader(len(classes), texts))


def perfect(metrics):
    """The classes that are told apart without a fault."""
    return {c for c, each in metrics["classes"].items() if each.get("auroc", 0) > 1 - 1e-9}


def only_the_run(monkeypatch):
    """Without the rows that train an encoder, which Reader has none of."""
    monkeypatch.setattr(evaluation, "random_weights", lambda run: run)
    monkeypatch.setattr(evaluation, "with_labels", lambda *_, **__: {})


@pytest.fixture(autouse=True)
def no_references(monkeypatch):
    """A test makes its own rows of other encoders."""
    monkeypatch.setattr(evaluation, "REFERENCES", {})


# ---- zero-shot and probe -----------------------------------------------------------------------------------

@pytest.mark.parametrize("name, folds", [*((name, None) for name in NO_FOLDS), *(
    (name, folds) for name in data.GROUPS["ptbxl"] for folds in (None, [9], [9, 10]))])
def test_zero_shot_of_vectors_that_are_the_labels(name, folds, tmp_path, monkeypatch):
    store, labels = labelled(name)
    run = knowing(name, store, monkeypatch, tmp_path)
    m = evaluation.zeroshot(run, name, asking(folds=folds))[""]["zero-shot"]
    assert m["records"] == 80 * len(folds or [10]) and m["macro"]["classes"] >= 5
    prompts = data.class_prompts(name, list(m["classes"]), "descriptive")
    said = {c for c, texts in zip(m["classes"], prompts)
            if any(run.method.texts[text].any() for text in texts)}
    assert perfect(m) >= said & {c for c, each in m["classes"].items() if "auroc" in each}
    assert len(m["classes"]) - len(said) == (2 if name.startswith("csn") else 0)  # only other classes' texts
    store.painted = store.painted[np.random.default_rng(1).permutation(len(store))]
    m = evaluation.zeroshot(run._replace(crc="permuted"), name, asking(folds=folds))[""]["zero-shot"]
    low, high = m["macro"]["interval"] or (0.3, 0.7)  # rare classes have none
    assert low < 0.5 < high and m["macro"]["auroc"] < 0.75


@pytest.mark.parametrize("name, folds", [("ptbxl_super", None), ("ptbxl_super", [9, 10]),
                                         ("ptbxl_rhythm", [9]), ("cpsc2018", None)])
def test_the_probe_of_vectors_that_are_the_labels(name, folds, tmp_path, monkeypatch):
    """At any ratio every class with a training positive is found; the others are listed."""
    only_the_run(monkeypatch)
    store, labels = labelled(name, also=0)
    run = run_of(store, monkeypatch, tmp_path)
    found = evaluation.probe(run, name, asking(folds=folds, ratios=(0.005, 0.2, 1)))[""]
    for m in found.values():
        assert perfect(m) == set(m["classes"]) - set(m["untrained"])
        assert m["macro"]["classes"] == len(m["classes"])  # the first mean has them all
        enough = {c for c, each in m["classes"].items() if each["positives"] >= evaluation.ENOUGH}
        assert m.get("macro_enough", {"classes": 0})["classes"] == len(enough - set(m["untrained"]))
    few, tenth, all_ = found.values()
    assert few["untrained"] and few["macro"]["auroc"] < 0.99
    assert not all_["untrained"] and few["training records"] < tenth["training records"]
    store.painted = store.painted[np.random.default_rng(1).permutation(len(store))]
    m = evaluation.probe(run._replace(crc="permuted"), name, asking(folds=folds, ratios=(1,)))[""]["100 %"]
    assert m["macro"]["interval"][0] < 0.5 < m["macro"]["interval"][1]


def test_doctors_are_rows_of_code_test(tmp_path, monkeypatch):
    """Scored by the row of the tracings that is a record's id."""
    store, labels = labelled("code_test")
    run = knowing("code_test", store, monkeypatch, tmp_path)
    half = labels & (np.arange(len(labels)) % 2 == 0)[:, None]
    marks = dict(gold_standard=labels, right=labels, half=half)
    monkeypatch.setattr(data, "code_annotations", lambda _: marks)
    found = evaluation.zeroshot(run, "code_test", asking())
    assert list(found) == ["", "right", "half"] and found["right"]["zero-shot"]["macro"]["auroc"] > 1 - 1e-9
    tested = store.records["split"] == "test"
    expected = [roc_auc_score(y, x) for y, x in zip(labels[tested].T, half[tested].T)]
    assert found["half"]["zero-shot"]["macro"]["auroc"] == pytest.approx(np.mean(expected))


@pytest.mark.filterwarnings("ignore:Line search of Newton")  # it has nothing to go by
def test_controls_fall_to_a_half(tmp_path, monkeypatch):
    only_the_run(monkeypatch)
    store, _ = labelled("ptbxl_super", seed=1)
    run = knowing("ptbxl_super", store, monkeypatch, tmp_path)
    for control in ("zero", "other"):
        ask = asking(control=control, folds=[9, 10], ratios=(1,))
        for m in (evaluation.zeroshot(run, "ptbxl_super", ask)[""]["zero-shot"],
                  evaluation.probe(run, "ptbxl_super", ask)[""]["100 %"]):
            low, high = m["macro"]["interval"]
            assert low <= 0.5 <= high and (control == "other" or m["macro"]["auroc"] == 0.5)


def test_the_probe_never_looks_at_test_rows(tmp_path, monkeypatch):
    """Poisoned test vectors and labels change neither the setting that is chosen nor the predictor."""
    only_the_run(monkeypatch)
    store, labels = labelled("ptbxl_super")
    rng = np.random.default_rng(2)
    store.painted = (labels + rng.normal(size=labels.shape)).astype(np.float32)  # no setting is perfect
    fit, choose, chosen = evaluation.fit_classes, evaluation.choose_classes, []

    def fitted(x, labels, setting):
        predict = fit(x, labels, setting)
        predict.setting = setting
        return predict

    def choosing(*known):
        chosen.append(choose(*known))
        return chosen[-1]
    monkeypatch.setattr(evaluation, "fit_classes", fitted)
    monkeypatch.setattr(evaluation, "choose_classes", choosing)
    figures = []
    for folds in (None, [9, 10]):
        tested = store.records["fold"].isin(folds or [10]).to_numpy()
        for poisoned in (False, True):
            other = Painted(store.records.copy(), store.painted.copy())
            if poisoned:
                other.painted[tested] = rng.normal(size=(tested.sum(), 5)) * 1e3
                codes = rng.permutation(np.array(list(store.records["codes"]), object)[tested])
                other.records.loc[tested, "codes"] = codes
            run = run_of(other, monkeypatch, tmp_path / f"{folds}{poisoned}")
            evaluation.REFERENCES.clear()
            m = evaluation.probe(run, "ptbxl_super", asking(folds=folds, ratios=(0.1, 1)))[""]["100 %"]
            figures.append(m["macro"]["auroc"])
    assert all(clean > 0.6 > poisoned for clean, poisoned in zip(figures[::2], figures[1::2]))
    x = rng.normal(size=(50, 10)).astype(np.float32)
    for i in range(0, len(chosen), 8):  # two rows, two ratios: four predictors clean, four poisoned
        for clean, poisoned in zip(chosen[i:i + 4], chosen[i + 4:i + 8]):
            assert clean.setting == poisoned.setting and np.array_equal(clean(x), poisoned(x))


@pytest.mark.parametrize("options", [dict(folds=None), dict(folds=[9]), dict(folds=[9, 10]), dict(folds=[1]),
                                     dict(split="val"), dict(split="train")])
def test_patients_of_training_validation_and_test_are_apart(options, tmp_path, monkeypatch):
    store, _ = labelled("ptbxl_super")
    run = run_of(store, monkeypatch, tmp_path)
    question = evaluation.ask_set("ptbxl_super", run.config, asking(**options))
    train, val, test = (set(part.patients) for part in question[2:])
    assert not train & val and not train & test and not val & test and test and (val and train) or (
        options.get("split") == "train" and not train and len(test) == 320)
    if options.get("folds") in ([9], [9, 10]):  # the validation fold is tested: from training patients
        assert 0.05 < len(val) / (len(train) + len(val)) < 0.2


def test_validation_rows_of_data_that_have_none_come_from_training_patients(simulated, tmp_path, monkeypatch):
    """Also where the split is by a hash of the patient, as the simulator's is."""
    run, split = run_of(simulated, monkeypatch, tmp_path, Reader(1)), simulated.records["split"].replace("val", "train")
    monkeypatch.setitem(simulated.records, "split", split)
    question = evaluation.ask_set("simulated", run.config, asking())
    assert not (split == "val").any() and set(split[question.val.rows]) == {"train"}
    assert 0.05 < len(question.val.rows) / (split == "train").sum() < 0.2
    assert not set(question.val.rows) & set(question.train.rows)


def test_a_feature_that_is_constant_in_training_does_not_drown_the_others():
    """As with few rows it may be: where it varies later, it says nothing."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(140, 4)).astype(np.float32)
    x[:40, 3] = 0.7
    labels = x[:, :1] + 0.3 * rng.normal(size=(140, 1)) > 0
    for setting in evaluation.GRID:
        with_it, without = (evaluation.fit_classes(part[:40], labels[:40], setting)(part[40:])
                            for part in (x, x[:, :3]))
        assert roc_auc_score(labels[40:], with_it) > 0.9 < roc_auc_score(labels[40:], without)


def test_shares_of_the_training_rows_are_drawn_with_seed_42():
    rows = lambda n: evaluation.Labelled(np.arange(n), None, None)
    assert evaluation.subset(rows(20), 0.25).tolist() == [7, 9, 12, 14, 15]  # NumPy's permutation
    few, many = (set(evaluation.subset(rows(1000), ratio)) for ratio in (0.01, 0.1))
    assert (len(few), len(many)) == (10, 100) and few < many
    assert len(evaluation.subset(rows(7), 0.01)) == 2
    assert evaluation.subset(rows(7), 1).tolist() == list(range(7))


def test_few_labels(tmp_path, monkeypatch):
    store, _ = labelled("ptbxl_super", also=0)
    run = knowing("ptbxl_super", store, monkeypatch, tmp_path)
    found = evaluation.probe(run, "ptbxl_super", asking(shots=[1, 4]))[""]
    assert list(found) == ["1 a class", "4 a class", "zero-shot"]
    assert [found[f"{k} a class"]["training records"] for k in (1, 4)] == [5, 20]
    assert all(found[f"{k} a class"]["value"] == 1 for k in (1, 4))
    evaluation.show(tmp_path, "probe", "ptbxl_super", {"": found}, asking(shots=[1, 4]))
    assert imread(tmp_path / "probe_ptbxl_super_shots=1,4.png").std() > 0.01


def test_a_default_that_is_given_is_no_option():
    assert evaluation.entry("x", {"ratios": [0.01, 0.1, 1.0], "folds": [9]}) == "x folds=9"


def test_results_of_other_sources_do_not_replace_one_another(tmp_path):
    """Of a transfer, what it has learned from counts; of a set on its own, only where its records are."""
    found = {"": {"from csn, probe": {"what": "AUROC", "value": 0.5, "interval": None}}}
    for more in ("csn:B", "cpsc2018:C"):
        evaluation.show(tmp_path, "transfer", "ptbxl_super", found, asking(data=["ptbxl:A", more]))
        evaluation.show(tmp_path, "identify", "ptbxl", found, asking(data=["ptbxl:A", more]))
    known = evaluation.known_results(tmp_path)
    assert len(known["transfer"]) == 2 and list(known["identify"]) == ["ptbxl data=ptbxl:A"]


def test_few_labels_of_a_single_class(tmp_path, monkeypatch):
    store, _ = labelled("ptbxl_super", also=0)
    store.records["codes"] = [{"AFIB": 100.0}] * len(store.records)
    (tmp_path / "one.json").write_text('{"AFIB": {"name": "atrial fibrillation", "prompts": ["atrial fibrillation"]}}')
    run = run_of(store, monkeypatch, tmp_path, Reader(1, {"atrial fibrillation": np.ones(1, np.float32)}))
    with pytest.raises(data.DataError, match="no class of the set has records with and without it"):
        evaluation.probe(run, str(tmp_path / "one.json"), asking(shots=[1]))


def test_random_weights_are_of_their_encoder():
    """Vectors of one are not those of another, and nothing of them is learned."""
    runs = [evaluation.random_weights(evaluation.Run(Path("x"), untrained(name, **options), untrained(name, **options).config, "cpu", ""))
            for name, options in (("etp", {}), ("etp", {"encoder": "vit_tiny"}), ("cmelt", {}))]
    assert len({run.crc for run in runs}) == 3
    method = untrained("cmelt")
    with torch.no_grad():
        method.cls.fill_(9.0)
    random = evaluation.random_weights(evaluation.Run(Path("x"), method, method.config, "cpu", "")).method
    assert random.cls.abs().max() < 1 and method.cls.min() == 9
    key = lambda name: evaluation.of_encoder(
        SimpleNamespace(method=untrained(name, encoder="vit_tiny"), config=small_config(name, encoder="vit_tiny")), "random", "s",
        SimpleNamespace(store=SimpleNamespace(meta={"plan": "p"})), asking(), lambda: name)
    assert [key(name) for name in ("etp", "fgclep", "merl", "etp")] == ["etp", "etp", "merl", "etp"]  # MERL's ViT has no last norm


def test_age_and_sex(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    records = table_of([{}] * 400, "ptbxl")
    age, female = rng.integers(20, 90, 400), rng.random(400) < 0.5
    records["age"] = np.where(np.arange(400) % 7, age.astype(str), "")
    records["sex"] = np.where(female, "F", "M")
    records.loc[::9, "sex"] = ""
    store = Painted(records, np.stack([age / 100, female], 1))
    run = run_of(store, monkeypatch, tmp_path)
    only_the_run(monkeypatch)
    m = evaluation.probe(run, "age", asking())[""]["age"]
    tested = (records["fold"] == 10) & (records["age"] != "")
    assert m["records"] == tested.sum() and m["value"] < 0.5 and m["correlation"] > 0.999
    assert m["error of the median age"] > 10 and m["interval"][0] <= m["value"] <= m["interval"][1]
    found = evaluation.probe(run, "sex", asking(ratios=(0.1, 1)))[""]
    assert [m["classes"]["female"]["auroc"] for m in found.values()] == [1, 1]
    assert found["100 %"]["records"] == ((records["fold"] == 10) & (records["sex"] != "")).sum()
    for option in (dict(ratios=[0.1]), dict(protocol="merl"), dict(epochs=3)):
        with pytest.raises(data.DataError, match="age is a regression on all training rows"):
            evaluation.probe(run, "age", asking(**option))
    for name in ("age", "sex"):
        with pytest.raises(data.DataError, match=f"{name} has no prompts"):
            evaluation.probe(run, name, asking(shots=[1]))


def test_published_heads():
    """MERL's figure is that of the best test epoch, which no other choice of epoch beats; MELP's is not."""
    rng = np.random.default_rng(0)
    labels = rng.random((72, 3)) < 0.4
    x = (np.repeat(labels, 2, 1) + 2 * rng.normal(size=(72, 6))).astype(np.float32)
    parts = x[:32], labels[:32], x[32:48], labels[32:48], x[48:]
    auroc = lambda scores: roc_auc_score(labels[48:], scores)
    best = auroc(evaluation.published_head(*parts, labels[48:], "merl"))
    others = [auroc(evaluation.published_head(*parts, wrong, "merl"))
              for wrong in (~labels[48:], rng.permutation(labels[48:]))]
    assert best >= max(others) and best > min(others)
    one, same = (evaluation.published_head(*parts, test, "melp") for test in (labels[48:], ~labels[48:]))
    assert one.shape == (24, 3) and np.array_equal(one, same)


def test_an_encoder_trained_with_labels_learns_them(tmp_path, monkeypatch):
    """The run itself is not changed."""
    records = table_of([{("NORM", "IMI")[i % 2]: 100.0} for i in range(120)], "ptbxl")
    store = Painted(records, np.repeat(np.arange(120)[:, None] % 2, 250, 1))
    method = untrained("etp")
    run = run_of(store, monkeypatch, tmp_path, method)
    before = evaluation.crc_of_tensors(method.state_dict())
    asked, real = [], evaluation.with_labels
    monkeypatch.setattr(evaluation, "with_labels", lambda *known: asked.append(known) or known[-1])
    found = evaluation.finetune(run, "ptbxl_super", asking(ratios=(0.08,), epochs=2))
    assert found == {"": {"8 %": False}, "trained with labels": {"8 %": True}}  # fresh weights or not
    found = real(*asked[0])
    assert found["training records"] == 8 and found["classes"]["MI"]["auroc"] > 0.9
    assert evaluation.crc_of_tensors(method.state_dict()) == before


# ---- vectors -----------------------------------------------------------------------------------------------

def test_vectors_are_encoded_once(tmp_path, monkeypatch):
    records = table_of([{}] * 40, "ptbxl")
    store = Painted(records, np.random.default_rng(0).normal(size=(40, 3)))
    run = run_of(store, monkeypatch, tmp_path)

    def count(rows, run=run, **options):
        """How many records have been encoded in all, after these were asked for."""
        vectors(run, store, rows, asking(**options))
        return run.method.encoded
    found = vectors(run, store, np.array([9, 3, 5]), asking())
    painted = store.painted[[9, 3, 5]]
    assert np.allclose(found["features"], np.tile(painted, 2)) and run.method.encoded == 3
    assert np.allclose(found["rhythm"], painted / np.linalg.norm(painted, axis=1, keepdims=True))
    assert count(np.array([5, 9])) == 3 and count(np.arange(10)) == 10 and count(np.arange(12, 2, -1)) == 13
    kept = np.load(tmp_path / "embeddings" / "ptbxl.npz")
    assert kept["ids"].tolist() == records["id"][:13].tolist() and kept["rows"].tolist() == list(range(13))
    assert kept["split"].tolist() == records["split"][:13].tolist() and kept["features"].dtype == np.float32
    assert count(np.arange(5), control="zero") == 18 and count(np.arange(5), leads=["I"]) == 23
    assert count(np.arange(5), leads=["I"], noise=10.0) == 28
    assert count(np.arange(13)) == 28 == count(np.arange(5), control="zero")  # each kept for itself
    assert count(np.arange(5), run=run._replace(crc="other weights")) == 33
    store.meta = {"plan": "another store"}
    assert count(np.arange(5), run=run._replace(crc="other weights")) == 38
    assert len(np.load(tmp_path / "embeddings" / "ptbxl.npz")["rows"]) == 5
    evaluation.embed_set(run, "ptbxl", asking())
    assert np.load(tmp_path / "embeddings" / "ptbxl.npz")["ids"].tolist() == records["id"].tolist()


@pytest.mark.parametrize("damage", [
    lambda b: b[:len(b) // 2], lambda b: b"", lambda b: b"nothing", lambda b: b"PK\x03\x04" + bytes(99),
    lambda b: b[:200] + bytes(300) + b[500:], lambda b: b[:40] + b"\xff" * 20 + b[60:]])
def test_damaged_vectors_are_told_and_made_anew(damage, tmp_path, monkeypatch, capsys):
    store = Painted(table_of([{}] * 40, "ptbxl"), np.random.default_rng(0).normal(size=(40, 3)))
    run, rows = run_of(store, monkeypatch, tmp_path), np.arange(20)
    good, path = vectors(run, store, rows, asking()), tmp_path / "embeddings" / "ptbxl.npz"
    path.write_bytes(damage(path.read_bytes()))
    again = vectors(run, store, rows, asking())
    assert all(np.array_equal(good[k], again[k]) for k in good) and run.method.encoded == 40
    assert "ptbxl.npz: not readable" in capsys.readouterr().out


# ---- signals -----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """200 simulated records; the cache of these tests is not the user's."""
    return data.open_data("simulated:200", cache=tmp_path_factory.mktemp("cache"))


def test_fewer_leads(simulated):
    rows = np.arange(30)
    ecg, six = simulated.ecg(rows), ["I", "II", "III", "aVR", "aVL", "aVF"]
    kept = evaluation.signals(simulated, rows, asking(leads=["II", "i", "V2"]))
    assert np.array_equal(kept[:, [0, 1, 7]], ecg[:, [0, 1, 7]])
    assert not np.delete(kept, [0, 1, 7], 1).any()
    derived = evaluation.signals(simulated, rows, asking(leads=["I", "II"], derive_leads=True))
    limbs = evaluation.signals(simulated, rows, asking(leads=six))
    assert np.abs(derived - limbs).max() < 0.0016  # a store has whole microvolts, of all six
    assert np.array_equal(evaluation.signals(simulated, rows, asking()), ecg)


@pytest.mark.parametrize("decibel", [20, 10, 0])
def test_noise_of_the_ratio_asked_for(simulated, decibel):
    rows = np.arange(40)
    ecg, noisy = simulated.ecg(rows), evaluation.signals(simulated, rows, asking(noise=decibel))
    ratio = 20 * np.log10(ecg.std(2) / (noisy - ecg).std(2))
    assert abs(ratio.mean() - decibel) < 0.05 and abs(ratio - decibel).max() < 0.7
    assert np.array_equal(evaluation.signals(simulated, rows[7:9], asking(noise=decibel)), noisy[7:9])
    assert not np.allclose((noisy - ecg)[0] / ecg[0].std(), (noisy - ecg)[1] / ecg[1].std(), atol=0.01)
    with_one = evaluation.signals(simulated, rows, asking(noise=decibel, leads=["V1"]))
    assert with_one[:, 6].any() and not np.delete(with_one, 6, 1).any()


def test_noise_has_its_parts_and_leaves_flat_leads_flat():
    """At 500 Hz a third of the power each: below 1 Hz, at 50 Hz, everywhere."""
    time, flat = np.arange(5000) / 500, np.arange(12) == 4
    ecg = np.where(flat[:, None], 0, np.sin(2 * np.pi * 3 * time))
    noise = evaluation.noise_like(ecg, 500, 0, np.random.default_rng(0))
    assert not noise[4].any()
    power = np.abs(np.fft.rfft(noise[~flat] - noise[~flat].mean(1, keepdims=True))) ** 2
    hertz = np.fft.rfftfreq(5000, 1 / 500)
    mains, slow = (abs(hertz - 50) < 0.15), hertz < 3
    share = [float((power[:, band].sum(1) / power.sum(1)).mean()) for band in (mains, slow)]
    assert share == pytest.approx([1 / 3, 1 / 3], abs=0.04)


@pytest.mark.parametrize("count", [2, 3, 17, 100])
def test_the_control_is_another_record(count):
    store = Painted(table_of([{}] * count, "ptbxl"), np.arange(count)[:, None] + 1)
    given = evaluation.signals(store, np.arange(count), asking(control="other"))[:, 0, 0] - 1
    assert sorted(given) == list(range(count)) and (given != np.arange(count)).all()
    assert evaluation.signals(store, np.array([1]), asking(control="other"))[0, 0, 0] - 1 == given[1]
    assert not evaluation.signals(store, np.arange(count), asking(control="zero")).any()


# ---- retrieval, identification, comparison -----------------------------------------------------------------

def test_ranks_by_hand():
    """Four records, three texts, the first of which two records have; record 2 sees both texts alike."""
    like = np.array([[0.9, 0.5, 0.1], [0.2, 0.8, 0.5], [0.3, 0.6, 0.6], [0.7, 0.1, 0.4]])
    texts, said, patients = np.array([0, 0, 1, 2]), np.array(["x", "y", "x"]), np.array(list("abcd"))
    found = evaluation.both_directions(like, np.eye(3), texts, said, patients)
    figures = {title: [m[k] for k in ("value", "R@5", "median rank", "chance", "queries", "candidates")]
               for title, m in found.items()}
    assert figures == {
        "ECG -> report": pytest.approx([1 / 4, 1, 1.75, 1 / 3, 4, 3]),             # ranks 1, 3, 1.5, 2
        "report -> ECG": pytest.approx([1 / 3, 1, 2, 1 / 3, 3, 4]),                # 1, 2, 3
        "ECG -> report, same findings": pytest.approx([2 / 4, 1, 1.25, 7 / 12, 4, 3]),  # 1, 2, 1.5, 1
        "report -> ECG, same findings": pytest.approx([1 / 3, 1, 2, 7 / 12, 3, 4])}     # 1, 2, 2
    copies = [0, 0, 0, 1, 2, 3]  # record 0, with its report, three times: not one candidate more
    again = evaluation.both_directions(like[copies], np.eye(3), texts[copies], said, np.array(list("abcdef")))
    assert again["ECG -> report"]["candidates"] == 3
    assert again["ECG -> report"]["value"] == pytest.approx(3 / 6)
    assert again["report -> ECG"]["median rank"] == 2


def reported(count, distinct):
    """(store, texts): records with reports, of which some are the same; their vectors say which."""
    names = sorted({entry["name"] for entry in data.knowledge()["findings"].values()})[:distinct]
    which = np.random.default_rng(0).integers(0, distinct, count)
    store = Painted(table_of([{}] * count, "ptbxl", [[names[i]] for i in which]), np.eye(distinct)[which])
    return store, {name: row for name, row in zip(names, np.eye(distinct, dtype=np.float32))}


def test_retrieval_of_vectors_that_are_the_reports(tmp_path, monkeypatch):
    store, texts = reported(1500, 30)
    store.records["split"] = "test"
    run = run_of(store, monkeypatch, tmp_path, Reader(30, texts))
    found = evaluation.retrieve(run, "ptbxl", asking())[""]
    assert len(found) == 8 and all(m["value"] == 1 == m["median rank"] for m in found.values())
    assert found["ECG -> report"]["candidates"] == 30 and found["ECG -> report"]["queries"] == 1500
    assert found["ECG -> report, of 1,000"]["queries"] == 1000
    assert found["report -> ECG, of 1,000"]["candidates"] == 1000
    store.records.at[3, "statements"] = []  # no report, no question
    assert evaluation.retrieve(run, "ptbxl", asking())[""]["ECG -> report"]["queries"] == 1499
    m = evaluation.retrieve(run, "ptbxl", asking(control="other"))[""]["ECG -> report"]
    assert m["value"] < 0.1
    store.records["statements"] = [[]] * 1500
    with pytest.raises(data.DataError, match="fewer than two of the records asked for have a report"):
        evaluation.retrieve(run, "ptbxl", asking())


def test_identification(tmp_path, monkeypatch):
    """Vectors that are the patient's find every second record; those of nobody, one by chance."""
    rng = np.random.default_rng(0)
    store = Painted(table_of([{}] * 400, "ptbxl"), np.repeat(rng.normal(size=(200, 8)), 2, 0))
    run = run_of(store, monkeypatch, tmp_path)
    m = evaluation.identify(run, "ptbxl", asking(folds=[9, 10]))[""]["second record"]
    assert (m["value"], m["queries"], m["chance"]) == (1, 40, 1 / 40)
    store.painted = rng.normal(size=(400, 8)).astype(np.float32)
    m = evaluation.identify(run._replace(crc="nobody"), "ptbxl", asking(folds=[9, 10]))[""]["second record"]
    assert m["value"] < 0.15 and m["interval"][0] <= m["value"] <= m["interval"][1]
    store.records["patient"] = store.records["id"]
    with pytest.raises(data.DataError, match="fewer than two patients with two records"):
        evaluation.identify(run, "ptbxl", asking())


def test_transfer_takes_the_maximum_of_joined_classes(tmp_path, monkeypatch, capsys):
    """CPSC2018's blocks are CD, both ST changes STTC, and it knows nothing of MI and HYP (docs/evaluation.md)."""
    target, labels = labelled("ptbxl_super")
    own = knowing("ptbxl_super", target, monkeypatch, tmp_path).method.texts
    source, _ = labelled("cpsc2018")
    source.path = "elsewhere"
    target.painted = np.random.default_rng(0).normal(size=(len(target), 9)).astype(np.float32)
    source.painted = target.painted

    def find_store(name, *_):
        if name == "csn":
            raise data.DataError("csn is not here")
        return source if name == "cpsc2018" else target
    texts = {text: np.pad(vector, (0, 4)) for text, vector in own.items()}
    run = run_of(source, monkeypatch, tmp_path, Reader(9, texts))
    monkeypatch.setattr(data, "find_store", find_store)
    monkeypatch.setattr(evaluation, "choose_classes", lambda *_: lambda x: x[:, :9])  # scores are the vectors
    found = evaluation.transfer(run, "ptbxl_super", asking())[""]
    assert list(found) == ["from cpsc2018, probe", "from cpsc2018, zero-shot"]
    m, (nsr, _, iavb, lbbb, rbbb, _, _, std, ste) = found["from cpsc2018, probe"], target.painted[
        target.records["split"] == "test"].T
    assert m["left out"] == ["MI", "HYP"] == found["from cpsc2018, zero-shot"]["left out"]
    by_hand = {"STTC": np.maximum(std, ste), "NORM": nsr, "CD": np.maximum(np.maximum(iavb, lbbb), rbbb)}
    assert m["joined"] == {"STTC": ["STD", "STE"], "NORM": ["NSR"], "CD": ["IAVB", "LBBB", "RBBB"]}
    for c, scores in zip(m["joined"], m["scores"].T):
        assert np.allclose(scores, by_hand[c])
    out, err = capsys.readouterr()
    assert "csn -> ptbxl_super: not done: csn is not here" in err
    assert "CD = IAVB, LBBB, RBBB" in out and "left out: MI, HYP" in out
    foreign, paced = own_classes(tmp_path, PACE="pacemaker"), Reader(9, {"pacemaker": np.ones(9, np.float32)})
    codes, target.records["codes"] = target.records["codes"], [{"PACE": 100.0}] * len(target)
    with pytest.raises(data.DataError, match="no other set of"):
        evaluation.transfer(run._replace(method=paced), str(foreign), asking())
    assert "they have no class in common" in capsys.readouterr().err
    target.records["codes"] = codes
    source.path = target.path
    with pytest.raises(data.DataError, match="no other set of"):
        evaluation.transfer(run, "ptbxl_super", asking())
    assert "cpsc2018 -> ptbxl_super: not done: they are of the same records" in capsys.readouterr().err
    source.path, source.records["split"] = "elsewhere", "test"  # nothing to learn from
    with pytest.raises(data.DataError, match="no other set of"):
        evaluation.transfer(run, "ptbxl_super", asking())
    assert "cpsc2018 -> ptbxl_super: not done: elsewhere: no training rows" in capsys.readouterr().err


def test_permutation_p(monkeypatch):
    rng = np.random.default_rng(0)
    labels = rng.random((150, 2)) < 0.4
    good, bad = labels + rng.normal(size=(150, 2)), rng.normal(size=(150, 2))
    monkeypatch.setattr(evaluation, "RESAMPLES", 100)
    assert evaluation.permutation_p([bad], [bad], labels) == 1
    assert evaluation.permutation_p([bad, good], [good, bad], labels) == 1  # two runs a group
    assert evaluation.permutation_p([good], [bad], labels) == evaluation.permutation_p([bad], [good], labels)
    assert evaluation.permutation_p([good], [bad], labels) < 0.02
    assert evaluation.permutation_p([100 * good + 7], [good], labels) == 1  # only the order of scores counts
    null = [evaluation.permutation_p(*rng.normal(size=(2, 1, 60, 1)), rng.random((60, 1)) < 0.4)
            for _ in range(60)]
    assert 0.3 < np.mean(null) < 0.7 and np.mean(np.array(null) < 0.2) < 0.4 and min(null) > 0


def test_bleu_and_rouge_by_hand():
    words = lambda *texts: [text.split() for text in texts]
    a, b = words("a b c d e"), words("a b c d f")  # 4/5, 3/4, 2/3, 1/2 of the n-grams
    assert evaluation.bleu(a, b) == pytest.approx(0.2 ** 0.25)
    assert evaluation.bleu(words("a b c d"), words("a b c d e f")) == pytest.approx(np.exp(1 - 6 / 4))
    assert evaluation.bleu(a, a) == 1
    assert evaluation.bleu(words("a a a a a"), a) == 0 == evaluation.bleu([[]], a)
    # a corpus counts n-grams over all: (5 + 4)/(5 + 5), (4 + 3)/8, (3 + 2)/6, (2 + 1)/4
    assert evaluation.bleu(a + b, a + a) == pytest.approx((9 / 10 * 7 / 8 * 5 / 6 * 3 / 4) ** 0.25)
    assert evaluation.bleu(words("a a b a"), words("a b a a")) == 0  # clipped; no 4-gram in common
    assert evaluation.rouge_l(words("a b c d e"), words("a x c e")) == pytest.approx(2 * 3 / 9)
    assert evaluation.rouge_l(words("a b c", "x"), words("a b c", "y")) == pytest.approx(0.5)
    assert evaluation.rouge_l([[]], a) == 0


# ---- where a model looks -----------------------------------------------------------------------------------

TEXTS = ["atrial fibrillation", "sinus rhythm. normal ecg", "st elevation in v1, v2"]


def untrained(method, **options):
    torch.manual_seed(0)
    config = toy_config(method, **options)
    text = models.small_text_model(TEXTS * 2, steps=1, dim=32, layers=1)
    return models.build_method(config, text).eval()


@pytest.mark.parametrize("method, options, parts", [
    ("fgclep", dict(align="word", encoder="resnet18"), 63),
    ("fgclep", dict(align="tag", encoder="resnet18"), 63),
    ("fgclep", dict(align="tag", encoder="leadvit_tiny", patch=50), 20),
    ("fgclep", dict(align="word", encoder="leadvit_tiny", patch=50), 20), ("melp", dict(beats="rpeak"), 0)])
def test_attention_over_time(simulated, method, options, parts):
    method, ecg = untrained(method, **options), torch.from_numpy(simulated.ecg(np.arange(1)))
    with torch.no_grad():
        weight = models.attention_over_time(method, ecg, method.encode_text(TEXTS))
    assert weight.shape == (3, 1000) and (weight >= 0).all() and np.allclose(weight.sum(1), 1, atol=1e-4)
    steps = np.unique(np.flatnonzero(np.diff(weight)[0]))
    if method.config.method == "melp":  # a beat is whole, and every beat has its place
        peaks = np.array(simulated.records["peaks"][0])
        assert len(steps) <= len(peaks) and all((np.abs(peaks - step) > 10).all() for step in steps)
    else:
        assert len(steps) <= parts - 1
    assert not np.allclose(weight[0], weight[1])


@pytest.mark.parametrize("method, options", [("fgclep", {}), ("etp", {}), ("melp", {"beats": "query"})])
def test_a_run_that_sees_whole_records_says_so(simulated, method, options):
    method = untrained(method, **options)
    with pytest.raises(models.ModelError, match=f"this {method.config.method} run sees texts in the whole"):
        models.attention_over_time(method, torch.from_numpy(simulated.ecg(np.arange(1))),
                                       method.encode_text(TEXTS))


# ---- the command line --------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small run; the data it was trained on are gone."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ECG_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        data.prepare("simulated", "200", folder / "store")
        train.main("--method fgclep --align word --data store:store --width 0.125 --dim 8 --mlm-steps 2 "
                   "--batch-size 32 --epochs 1 --fine-epochs 0 --threads 1 --name run".split())
        shutil.rmtree(folder / "store")
        data.open_store.cache_clear()
        yield folder


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """A copy of it, in a folder of its own."""
    monkeypatch.setenv("ECG_CACHE", str(trained / "cache"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained / "runs", tmp_path / "runs")
    return tmp_path / "runs" / "run"


def ask(line):
    evaluation.main(line.split())


@pytest.mark.parametrize("line, sentence", [
    ("", "say what to do: --zeroshot SET"), ("--zeroshot", "expected at least one argument"),
    ("--probe ptbxl --leads I,V9", "--leads I,V9: leads are I, II, III, aVR"),
    ("--probe ptbxl --derive-leads", "--derive-leads needs --leads with I and II"),
    ("--probe ptbxl --derive-leads --leads I,V2", "--derive-leads needs --leads with I and II"),
    ("--probe ptbxl --ratios 0,1", "--ratios are shares above 0, up to 1"),
    ("--probe ptbxl --ratios 1.5", "--ratios are shares above 0, up to 1"),
    ("--probe ptbxl --ratios nan", "--ratios are shares above 0, up to 1"),
    ("--probe ptbxl --ratios x", "--ratios: invalid"), ("--probe ptbxl --shots 4,0", "are numbers from 1"),
    ("--probe ptbxl --epochs 0", "are numbers from 1"), ("--generate --beams 0", "are numbers from 1"),
    ("--zeroshot ptbxl --noise nan", "--noise is a ratio in dB"), ("--look record", "--look RECORD TEXT..."),
    ("--look record st ...", "--look: a text needs words"),
    ("--look record text --leads I", "--look shows a record as it is"),
    ("--zeroshot ptbxl --ratios 0.1", "ratios is of no use without --probe or --finetune"),
    ("--retrieve ptbxl --prompts plain", "prompts is of no use without --zeroshot or --transfer or --probe"),
    ("--finetune ptbxl --probe-protocol merl", "protocol is of no use without --probe"),
    ("--zeroshot ptbxl --control noise", "--control: invalid choice"),
    ("--probe ptbxl --probe-protocol etp", "--probe-protocol: invalid choice"),
    ("--zeroshot ptbxl --split 10", "--split: invalid choice")])
def test_refused_options(line, sentence, capsys):
    with pytest.raises(SystemExit) as end:
        ask(line)
    assert end.value.code == 2 and sentence in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("line, error, sentence", [
    ("--zeroshot ptbxl_all ecgs", data.DataError, "unknown label set 'ecgs'; known are ptbxl_super"),
    ("--zeroshot age --data simulated:200", data.DataError, "unknown label set 'age'"),
    ("--zeroshot simulated --data simulated:200 --scales token,beat", models.ModelError, "has no beat scale"),
    ("--zeroshot simulated --data simulated:200 --folds 9", data.DataError, "no folds: leave out --folds"),
    ("--zeroshot simulated --data simulated:5 --split val", data.DataError, "no record of the val split"),
    ("--zeroshot simulated", data.DataError, "/store: no store "),
    ("--zeroshot cpsc2018 --data georgia:a csn:b", data.DataError, "none of georgia:a, csn:b is of cpsc2018"),
    ("--zeroshot none.json --data simulated:200", data.DataError, "none.json: No such file"),
    ("--probe simulated --data simulated:200 --split all", data.DataError, "no training rows"),
    ("--identify simulated --data simulated:200", data.DataError, "fewer than two patients with two records"),
    ("--generate simulated --data simulated:200", models.ModelError, "writes no reports; --method melp does"),
    ("--generate", data.DataError, "/store: no store "),
    ("--look nowhere text", data.DataError, "there is no nowhere.hea"),
    ("--look simulated:200:9-9 text", data.DataError, "holds no record '9-9'")])
def test_what_cannot_be_done_is_a_sentence(run, line, error, sentence):
    with pytest.raises(error, match=sentence):
        ask(f"--run {run} {line}")


def test_reports_are_written_for_the_runs_own_data(run, simulated, monkeypatch):
    """--generate without a set: of whatever source they, or those named, are."""
    asked = []
    monkeypatch.setattr(evaluation, "report", lambda _, wanted, **options: asked.append(wanted))
    config = json.loads((run / "config.json").read_text()) | {"data": f"store:{simulated.path}"}
    (run / "config.json").write_text(json.dumps(config))
    ask(f"--run {run} --generate")
    ask(f"--run {run} --generate --data simulated:200")
    ask(f"--run {run} --generate ptbxl")
    assert asked == [{"generate": ["simulated"]}, {"generate": ["simulated"]}, {"generate": ["ptbxl"]}]


def own_classes(folder, **words):
    """A JSON file of classes, with one prompt each."""
    path = folder / "mine.json"
    path.write_text(json.dumps({c: dict(name=text, prompts=[text]) for c, text in words.items()}))
    return path


def test_a_task_of_ones_own(run, simulated, tmp_path, monkeypatch, capsys):
    """The one in docs/fork.md, computed anew by hand; what is no task is a sentence."""
    monkeypatch.setattr(evaluation, "TASKS", {**evaluation.TASKS})
    code = re.search(r"```python\n(from eval .*?)```", (ROOT / "docs/fork.md").read_text(), re.S)[1]
    (tmp_path / "my.py").write_text(code + "\nprobe = nearest\ndef plain(run, name, ask):\n    return {'': {'x': {'what': 'style', "
                                    "'value': 1.0 if ask.prompts == 'plain' else 0.0, 'interval': None}}}\n")
    start = f"--run {run} --data simulated:200"
    ask(f"{start} --task my.py:nearest simulated")
    assert "nearest" in capsys.readouterr().out
    [found] = evaluation.known_results(run)["my.py:nearest"].values()
    opened = evaluation.open_run(run, asking())
    q = evaluation.ask_set("simulated", opened.config, asking(data=["simulated:200"]))
    unit = lambda part: [x / np.linalg.norm(x) for x in evaluation.embed_records(opened.method, q.store, part.rows, "cpu")["features"]]
    known = unit(q.train)
    guessed = np.array([q.train.labels[max(range(len(known)), key=lambda i: known[i] @ x)] for x in unit(q.test)])
    used = q.test.labels.any(0) & ~q.test.labels.all(0)
    expected = roc_auc_score(q.test.labels[:, used], guessed[:, used].astype(float))
    assert found["results"][""]["nearest"]["macro"]["auroc"] == pytest.approx(expected)
    for spec, sentence in (("my.py:missing", "my.py has no function missing"), ("other.py:x", "there is no file other.py"),
                           ("nearest", "nearest: there is no file")):
        with pytest.raises(models.ModelError, match=sentence):
            ask(f"{start} --task {spec} simulated")
    ask(f"{start} --task my.py:probe simulated")  # no other than a task here
    assert "probe" not in evaluation.known_results(run) and "my.py:probe" in evaluation.known_results(run)
    ask(f"{start} --task my.py:plain simulated")
    ask(f"{start} --task my.py:plain simulated --prompts plain")  # which it may look at: another result
    figures = [entry["results"][""]["x"]["value"] for entry in evaluation.known_results(run)["my.py:plain"].values()]
    assert figures == [0.0, 1.0]
    with pytest.raises(SystemExit):
        ask(f"{start} --task my.py:nearest")
    assert "--task my.py:nearest: name a set, too" in capsys.readouterr().err


def test_several_tasks_end_to_end(run, tmp_path, capsys):
    """The run's own data are gone; what cannot be done does not keep the others from being done."""
    classes = own_classes(tmp_path, AFIB="atrial fibrillation", NORM="normal ecg", PVC="ventricular ectopics")
    start = f"--run {run} --data simulated:200 "
    ask(f"{start} --zeroshot simulated georgia --retrieve simulated --identify simulated --embed simulated")
    ask(f"{start} --zeroshot simulated --prompts plain --probe {classes.name} --ratios 0.1 --epochs 1")
    ask(f"{start} --zeroshot simulated --scales rhythm --leads I,II --noise 10")
    out, err = capsys.readouterr()
    assert "identify simulated: not done: " in err and "vectors of simulated, with ids and split" in out
    known = evaluation.known_results(run)
    titles = [title.replace(" data=simulated:200", "") for title in known["zeroshot"]]
    assert titles[1:] == ["simulated", "georgia", "simulated prompts=plain",  # after training's
                          "simulated scales=rhythm leads=I,II noise=10.0"]
    [probe], [retrieve] = known["probe"].values(), known["retrieve"].values()
    assert list(probe["results"]) == ["", "random weights", "trained with labels"]
    assert len({row["10 %"]["records"] for row in probe["results"].values()}) == 1
    assert len(retrieve["results"][""]) == 4 and not known["identify"]
    kept = np.load(run / "embeddings" / "simulated.npz")
    assert len(kept["ids"]) == 200 == len(kept["features"]) and kept["rhythm"].shape == (200, 8)
    assert np.allclose(np.linalg.norm(kept["rhythm"], axis=1), 1, atol=1e-5)
    assert (run / "embeddings" / "simulated_leads=I,II_noise=10.0.npz").exists()
    assert len(list(run.glob("*.png"))) == 1 + sum(map(len, known.values()))  # and that of training


def test_a_set_that_is_nowhere_does_not_stop_the_others(run, capsys, monkeypatch):
    monkeypatch.delenv("PTBXL", raising=False)
    sets = "simulated cpsc2018 csn"
    ask(f"--run {run} --data simulated:200 georgia:nowhere --zeroshot {sets}")
    err = capsys.readouterr().err
    assert all(f"zeroshot {name}: not done: none of simulated:200, georgia:nowhere is of" in err
               for name in sets.split()[1:])
    assert list(evaluation.known_results(run)["zeroshot"])[-1].startswith("simulated data=")
    config = json.loads((run / "config.json").read_text()) | {"data": "ptbxl:/nowhere"}
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit) as end:  # only where nothing could be done
        data.guarded(lambda: ask(f"--run {run} --zeroshot csn ptbxl_super"), models.ModelError)
    err = capsys.readouterr().err
    assert end.value.code == 2 and "where are the records of csn" in err and "error: " in err
    config["data"] = ""
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(data.DataError, match="physionet.org/content/ptb-xl"):
        ask(f"--run {run} --zeroshot ptbxl_super")


def own_csv(folder):
    """Six test records with labels: one of a code that nobody knows."""
    source = csv_source(folder, 6)
    labels = "AFIB", "SR", "164889003;mine", "SR;PVC", "mine", "mine"
    table(source, [dict(record=f"r{i}", report="", patient=f"p{i}", split="test", labels=codes)
                   for i, codes in enumerate(labels)])
    return source


def test_an_own_csv_and_own_classes(run, tmp_path, capsys):
    source = own_csv(tmp_path / "own")
    classes = own_classes(tmp_path, mine="wide qrs complexes", AFIB="atrial fibrillation")
    ask(f"--run {run} --data csv:{source} --zeroshot csv")
    assert "codes that prompts.json does not know are left out: mine (3)" in capsys.readouterr().err
    ask(f"--run {run} --data csv:{source} --zeroshot {classes} --prompts plain")
    known = evaluation.known_results(run)["zeroshot"]
    own, mine = ([entry for title, entry in known.items() if title.startswith(start)][0]
                 for start in ("own", str(classes)))
    own, mine = (entry["results"][""]["zero-shot"] for entry in (own, mine))
    assert {c: each["positives"] for c, each in own["classes"].items()} == {"AFIB": 2, "PVC": 1, "SR": 2}
    assert own["records"] == 4 == mine["records"]
    assert {c: each["positives"] for c, each in mine["classes"].items()} == {"mine": 3, "AFIB": 2}


def test_own_labels_that_are_classes_of_ptbxl():
    """CD, HYP and STTC are superclasses in a csv of one's own, whatever they mean in other sources."""
    codes = ["NORM", "CD", "MI;HYP", "cd;STTC", "LAFB/LPFB", "AFIB"]
    records = table_of([dict.fromkeys(c.split(";"), 100.0) for c in codes], "csv")
    classes, labels, keep = data.label_matrix(records, "ptbxl_super")
    found = [{c for c, on in zip(classes, row) if on} for row in labels]
    assert found == [{"NORM"}, {"CD"}, {"MI", "HYP"}, {"CD", "STTC"}, set(), set()] and keep.tolist() == [True] * 4 + [False] * 2
    classes, labels, _ = data.label_matrix(records, "ptbxl_sub")
    assert {c for c, on in zip(classes, labels[4]) if on} == {"LAFB/LPFB"} and labels[3, classes.index("STTC")]
    assert data.finding_of("CD", "csv") is None is data.finding_of("sttc", "csv") and data.finding_of("CD", "csn") == "arrhythmia"


def test_look(run, tmp_path, capsys):
    """At a record of one's own, with the training data gone, and at a record of a store."""
    write(tmp_path / "mine", beats())
    evaluation.main(["--run", str(run), "--look", "mine.hea", "Atrial fibrillation.", "st elevation"])
    out = capsys.readouterr().out
    assert "no comparison with the training records: " in out and "st elevation" in out
    assert imread(run / "look_mine.hea.png").std() > 0.05
    config = json.loads((run / "config.json").read_text()) | {"data": "simulated:200"}
    (run / "config.json").write_text(json.dumps(config))
    evaluation.main(["--run", str(run), "--look", "simulated:200:0-3", "atrial fibrillation"])
    out = capsys.readouterr().out
    assert "training records" in out and "no comparison" not in out
    assert imread(run / "look_simulated_200_0-3.png").shape[0] > 900


# ---- notebooks, and a run to be published ------------------------------------------------------------------

def test_the_notebook_in_the_readme(run, tmp_path):
    """Its five lines run; a record's vectors are those that --embed writes, whatever its rate and leads."""
    source, read = csv_source(tmp_path / "wfdb", 3), lambda i: data.read_record(f"wfdb/r{i}")
    code = re.search(r"```python\n(from eval import .*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    one, _ = read(0), shutil.copytree(run, "runs/x")
    signal = one.signal[[data.lead_index(name) in (0, 1, 7) for name in one.names]]
    names = {"signal": signal}
    exec(code.replace("wfdb/0001", "wfdb/r0").replace("fs=500", f"fs={one.fs:g}"), names)
    assert code.count("\n") == 5 and names["vectors"]["rhythm"].shape == (1, 8) and names["scores"].shape == (1, 2)
    ask(f"--run runs/x --embed csv --data csv:{source}")
    kept, method = np.load("runs/x/embeddings/csv.npz"), names["method"]
    several = evaluation.embed(method, ["wfdb/r0.hea", *(f"wfdb/r{i}" for i in (1, 2))])
    mirrored = [dict(signals=record.signal[::-1], fs=record.fs, leads=record.names[::-1]) for record in map(read, range(3))]
    for i, given in enumerate(mirrored):
        for name in ("rhythm", "features"):
            assert np.allclose(kept[name][i], several[name][i], atol=1e-6)
            assert np.allclose(kept[name][i], evaluation.embed(method, **given)[name][0], atol=1e-6)
    scores = evaluation.score(method, ["Sinus rhythm.", "normal ecg"], [f"wfdb/r{i}" for i in range(3)], scales=["rhythm"])
    with torch.no_grad():
        text = method.encode_text(["sinus rhythm", "normal ecg"]).report.numpy()
    assert np.allclose(scores, kept["rhythm"] @ text.T, atol=1e-6) and scores.std() > 0


@pytest.mark.parametrize("change, words", [
    (dict(leads=["I", "V9"]), "unknown leads V9; known are I, II"), (dict(leads=["I", "i"]), "a lead occurs twice"),
    (dict(leads=["I"]), r"array \(2, 5000\): it must be \(1, samples\), a row for each of I"),
    (dict(fs=None), "fs is None: it must be the rate"), (dict(fs=5), "fs is 5: it must be"), (dict(fs=2000), "too short: it must have 4 s"),
    (dict(signals=np.full((2, 5000), np.nan)), "it holds NaN"), (dict(signals=np.full((2, 5000), 900)), "must be in mV"),
    (dict(signals=np.zeros((2, 0))), "too short"), (dict(signals=np.zeros(5000)), "a row for each of I, II"),
    (dict(signals="nowhere"), "nowhere.hea: file is missing"), (dict(signals=[]), "the list is empty"),
    (dict(fs="500"), "fs is '500': it must be the rate"), (dict(leads=None), "no array .leads, samples. with the names"),
    (dict(signals=3.0), "it must be"), (dict(signals={"I": 1}), "dict: no path"), (dict(signals=b"a"), "bytes: no path"),
    (dict(signals=np.full((2, 5000), "1")), "no array"), (dict(signals=torch.ones(2, 5000, requires_grad=True)), "requires grad"),
    (dict(signals=np.ma.masked_greater(np.sin(np.arange(10000.0)).reshape(2, -1), 0.9)), "it holds NaN")])
def test_signals_that_are_none(change, words):
    method = untrained("etp")
    wave = np.sin(np.arange(5000) / 40) * np.ones((2, 1))
    good = dict(signals=wave, fs=500, leads=["I", "II"])
    assert evaluation.embed(method, **good)["features"].shape == (1, 2 * method.ecg.dim)
    assert evaluation.embed(method, **good | {"signals": np.stack([wave] * 3)})["rhythm"].shape == (3, 16)
    assert evaluation.embed(method, **good | {"leads": iter(["I", "II"])})["rhythm"].shape == (1, 16)
    assert evaluation.score(method, ["sinus rhythm"], **good, scales="rhythm").shape == (1, 1)
    with pytest.raises(data.DataError, match=words):
        evaluation.embed(method, **good | change)


@pytest.mark.parametrize("texts", ["sinus rhythm", [], [" . "], [3], [["sinus rhythm"]]])
def test_texts_that_are_none(texts):
    with pytest.raises(data.DataError, match="they must be a list of texts with words"):
        evaluation.score(untrained("etp"), texts, np.ones((12, 5000)), 500)


def test_a_run_is_exported(run, tmp_path, monkeypatch):
    """Also one that was drawn towards its start, which lies elsewhere."""
    began = {"init": str(tmp_path / "first"), "init_share": 0.5}
    (run / "config.json").write_text(json.dumps(json.loads((run / "config.json").read_text()) | began))
    ask(f"--run {run} --data simulated:200 --zeroshot simulated --split all --export published")
    known = evaluation.known_results(run)["zeroshot"]["simulated data=simulated:200 split=all"]["results"]
    shutil.rmtree(run)
    card, config = ((tmp_path / "published" / name).read_text() for name in ("README.md", "config.json"))
    macro = known[""]["zero-shot"]["macro"]
    assert macro["interval"] is None  # of 64 classes some have one positive
    assert f"| zeroshot, zero-shot | simulated split=all | AUROC {macro['auroc']:.3f} | 200 |" in card
    assert card.startswith("---\ntags: [ecg") and "(I, II, III, aVR, aVL, aVF, V1" in card and "100 Hz, 10 s, mV" in card
    about = json.loads(config)["about"]
    sets = about.pop("label_sets")
    assert about == {"leads": list(data.LEADS), "rate": 100, "seconds": 10, "unit": "mV", "normalise": "mv"}
    assert sets["ptbxl_super"]["NORM"] == data.label_set("ptbxl_super")["NORM"]["prompts"]
    assert "store" not in json.loads(config)["data"] and str(tmp_path) not in card + config
    shutil.move("published", "elsewhere")
    method, config = evaluation.load_run("elsewhere")
    assert evaluation.embed(method, np.sin(np.arange(1000) / 9) * np.ones((12, 1)), 100)["rhythm"].shape == (1, 8)
    with pytest.raises(data.DataError, match="elsewhere: an exported run, .* train on from it with --init elsewhere"):
        train.main(["--resume", "elsewhere"])
    with pytest.raises(data.DataError, match="where are the records of own[?] say it with --data"):
        ask("--run elsewhere --zeroshot csv")
    with pytest.raises(data.DataError, match="no data are named"):
        ask("--run elsewhere --generate")
    with pytest.raises(data.DataError, match="elsewhere exists: choose another folder"):
        evaluation.export("elsewhere", "elsewhere")
    for line, words in (("--export b --ckpt w", "--export takes a run's own weights"), ("--compare a --export b", "drop --run")):
        with pytest.raises(SystemExit):
            ask(line)
