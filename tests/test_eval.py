"""eval.py: metrics against scikit-learn, classes without positives, prompts, clear errors."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

import data
import eval as evaluation
import model as models
from conftest import small_config, write_config


def test_bootstrap_auroc_equals_scikit_learn_with_weights_and_ties():
    rng = np.random.default_rng(0)
    score, positive = np.round(rng.normal(size=200), 1), rng.random(200) < 0.2  # rounded: many ties
    weights = rng.multinomial(200, np.full(200, 1 / 200), 20)
    ours = evaluation.auroc_of_resamples(score, positive, weights)
    theirs = [roc_auc_score(positive, score, sample_weight=w) for w in weights]
    assert np.allclose(ours, theirs, atol=1e-12)
    none = evaluation.auroc_of_resamples(score, np.zeros(200, bool), weights)
    assert np.isnan(none).all()


def test_classes_without_positives_are_listed_and_not_averaged():
    rng = np.random.default_rng(1)
    scores, positives = rng.normal(size=(300, 3)), np.zeros((300, 3), bool)
    positives[:100, 0] = True
    positives[:5, 1] = True
    scores[:100, 0] += 1
    result = evaluation.score_classes(["A", "B", "C"], scores, positives)
    assert result["classes"]["C"] == {"positives": 0} and result["macro"]["classes"] == 2 and result["macro_enough"]["classes"] == 1
    a = roc_auc_score(positives[:, 0], scores[:, 0])
    assert result["classes"]["A"]["auroc"] == result["macro_enough"]["auroc"] == pytest.approx(a)
    low, high = result["classes"]["A"]["interval"]
    assert low < a < high and 0.05 < high - low < 0.2
    evaluation.print_table("test", result)


def test_the_interval_covers_the_truth():
    """Of many data sets with a known AUROC (0.760 for a shift of one standard deviation), about 95 % of intervals hold it."""
    rng, hits = np.random.default_rng(2), 0
    for _ in range(60):
        positive = rng.random(200) < 0.3
        score = rng.normal(size=200) + positive
        result = evaluation.score_classes(["A"], score[:, None], positive[:, None])
        low, high = result["classes"]["A"]["interval"]
        hits += low < 0.7602 < high
    assert 51 <= hits <= 60


def test_best_f1_by_hand():
    assert evaluation.best_f1(np.array([0.9, 0.8, 0.7, 0.1]), np.array([1, 0, 1, 0], bool)) == pytest.approx(0.8)


def test_prompts(tmp_path):
    classes = ["NORM", "NST_"]
    plain = evaluation.class_prompts("ptbxl_all", classes, "plain")
    assert plain[0] == ["normal ecg"] and len(plain[1]) == 1
    assert [len(p) > 1 for p in evaluation.class_prompts("ptbxl_all", classes, "descriptive")] == [False, True]
    file = tmp_path / "published.json"
    file.write_text(json.dumps({"NORM": "Normal ECG", "NST": ["one", "two"]}))  # published files drop the underscore
    assert evaluation.class_prompts("ptbxl_all", classes, str(file)) == [["normal ecg"], ["one", "two"]]
    with pytest.raises(data.DataError, match="no prompt for AFIB"):
        evaluation.class_prompts("ptbxl_rhythm", ["AFIB"], str(file))


def test_the_bootstrap_draws_patients():
    """Eighty records of ten patients are ten draws: the interval is far wider than that of eighty patients."""
    rng, patient = np.random.default_rng(0), np.arange(80) // 8
    positive = (patient % 2 == 0)[:, None]
    scores = 0.5 * positive + rng.normal(size=10)[patient][:, None] + 0.1 * rng.normal(size=(80, 1))
    wide, narrow = (evaluation.score_classes(["A"], scores, positive, who) for who in (patient.astype(str), None))
    assert (wide["patients"], narrow["patients"]) == (10, 80)
    width = lambda r: np.diff(r["classes"]["A"]["interval"])[0]
    assert width(wide) > 2 * width(narrow) > 0.1


def test_few_positives_have_no_interval_and_means_only_resamples_with_every_class(capsys):
    rng = np.random.default_rng(0)
    scores, positives = rng.normal(size=(60, 4)), np.zeros((60, 4), bool)
    positives[:30, 0] = positives[:1, 1] = positives[:, 2] = True
    scores[:1, 1] = 9  # a class with one positive that is found: every resample says 1
    result = evaluation.score_classes(["A", "one", "all", "none"], scores, positives)
    assert result["classes"]["one"]["auroc"] == 1 and result["classes"]["one"]["interval"] is None
    assert result["classes"]["all"] == {"positives": 60} and result["classes"]["none"] == {"positives": 0}
    a = evaluation.auroc_of_resamples(scores[:, 0], positives[:, 0], draws := np.random.default_rng(0).multinomial(
        60, np.full(60, 1 / 60), evaluation.RESAMPLES))
    both = ((a + 1) / 2)[draws[:, 0] > 0]  # where the one positive of the second class was drawn
    assert result["macro"]["interval"] == pytest.approx(np.percentile(both, [2.5, 97.5]))
    evaluation.print_table("test", result)
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert "no negatives" in lines["all"] and "no positives" in lines["none"] and lines["one"].split()[3] == "-"
    rare = np.eye(60, 12, dtype=bool)  # twelve classes of one positive each: all drawn in fewer than a tenth of the resamples
    assert evaluation.score_classes(list("abcdefghijkl"), rng.normal(size=(60, 12)), rare)["macro"]["interval"] is None


def test_the_data_that_are_named_are_the_data_that_are_used(tmp_path, monkeypatch):
    """--data of whatever source; a run's own data need not be there for that."""
    monkeypatch.setenv("ECG_CACHE", str(tmp_path / "cache"))
    config = small_config("etp", data="ptbxl:/no/longer/there")
    store = evaluation.find_store("ptbxl", config, "simulated:40")
    assert len(store) == 40 and store.records["source"][0] == "simulated"
    assert len(evaluation.find_store("simulated", small_config("etp", data="simulated:30"), None)) == 30
    with pytest.raises(data.DataError, match="no such data: nothing:"):
        evaluation.find_store("ptbxl", config, "nothing:here")
    with pytest.raises(data.DataError, match="these records have no folds: leave out --folds"):
        evaluation.test_rows(store, [9, 10])
    store.records["fold"] = 3
    with pytest.raises(data.DataError, match="holds no record of fold 9, 10; name folds with --folds"):
        evaluation.test_rows(store, [9, 10])
    store.records["split"] = "train"
    with pytest.raises(data.DataError, match="holds no record of the test split"):
        evaluation.test_rows(store)
    assert evaluation.sets_of(store) == []


def test_no_result_overwrites_another(tmp_path):
    result = {"records": 3, "classes": {"A": {"positives": 0}}}
    for options in ({}, {"prompts": "plain"}, {"folds": [9]}, {"folds": [9], "scales": ["beat"]}, {"checkpoint": "w.pt"}, {}):
        evaluation.save_results(tmp_path, {"ptbxl_sub": result}, {"prompts": "descriptive", **options})
    assert list(evaluation.known_results(tmp_path)["zeroshot"]) == [
        "ptbxl_sub", "ptbxl_sub prompts=plain", "ptbxl_sub folds=9", "ptbxl_sub folds=9 scales=beat", "ptbxl_sub checkpoint=w.pt"]
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(data.DataError, match="results.json: must be an object, not .*; move it away"):
        evaluation.report(tmp_path, ["ptbxl_sub"])  # before anything is computed


@pytest.mark.parametrize("content, words", [
    (None, "No such file"), ("", "empty"), ("{'SR': 'x'}", "no JSON"), ('["sinus rhythm"]', "must be an object"),
    ('{"SR": []}', "the prompt of SR must be"), ('{"SR": ["...", "x"]}', "the prompt of SR must be"), ('{"SR": 3}', "SR: must be a text"),
    ('{"SR": "a", "SR": "b"}', "'SR' occurs twice"), ('{"NORM": "x"}', "no prompt for SR"), ('{"SR": [1]}', "the prompt of SR must be")])
def test_a_prompts_file_that_is_none_is_explained(tmp_path, content, words):
    path = tmp_path / "p.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(data.DataError, match=f"p.json.*{words}"):
        evaluation.class_prompts("ptbxl_rhythm", ["SR"], str(path))


@pytest.mark.parametrize("name", [name for name in data.LABEL_SETS if name not in data.OCCURRING])
def test_every_class_of_every_set_has_prompts(name):
    classes = list(data.label_set(name))
    assert len(classes) == {"ptbxl_super": 5, "ptbxl_sub": 23, "ptbxl_form": 19, "ptbxl_rhythm": 12, "ptbxl_diag": 44, "ptbxl_all": 71,
                            "cpsc2018": 9, "csn": 38, "csn_published": 38, "georgia": 20, "cinc2021": 26, "code_test": 6}[name]
    for style in ("plain", "descriptive"):
        for texts in evaluation.class_prompts(name, classes, style):
            assert texts and all(t == t.lower().strip() and t for t in texts)


def test_a_class_scores_the_mean_over_its_prompts():
    method = models.build_method(small_config("etp", width=0.125, dim=16),
                                 models.small_text_model(["sinus rhythm.", "normal ecg."] * 4, steps=1, dim=32, layers=1)).eval()
    store = SimpleNamespace(ecg=lambda rows: np.random.default_rng(0).normal(size=(5, 12, 1000)).astype(np.float32)[rows])
    score = lambda prompts, batch: evaluation.score_records(method, store, np.arange(5), prompts, None, "cpu", batch)
    both = score([["sinus rhythm", "normal ecg."], ["normal ecg"]], 2)
    one = score([["sinus rhythm"], ["normal ecg"]], 5)
    assert both.shape == (5, 2) and np.allclose(both[:, 0], one.mean(1), atol=1e-6) and np.allclose(both[:, 1], one[:, 1], atol=1e-6)
    with pytest.raises(models.ModelError, match="no beat scale, only rhythm"):
        evaluation.score_records(method, store, np.arange(5), [["normal ecg"]], ["beat"], "cpu")


def test_clear_errors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PTBXL", raising=False)
    with pytest.raises(data.DataError, match="no finished run"):
        evaluation.newest_run()
    with pytest.raises(data.DataError, match="not a run folder"):
        evaluation.load_run(tmp_path)
    with pytest.raises(data.DataError, match="physionet.org/content/ptb-xl"):
        evaluation.find_store("ptbxl", small_config("etp", data=""), None)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(data.DataError, match="config.json: has no 'method'"):
        evaluation.load_run(tmp_path)
    write_config(tmp_path, "etp")
    with pytest.raises(data.DataError, match="did not finish"):
        evaluation.load_run(tmp_path)


def test_a_third_of_an_attention_is_missing():
    names = {part: f"ecg_encoder.encoder.layers.0.self_attn.{part}_proj.bias" for part in "qkv"}
    names_of_melp = evaluation.published()["melp"]["names"]
    state = {names["k"]: torch.ones(2), names["q"]: torch.zeros(2)}
    assert evaluation.rename(state, names_of_melp) == {}
    found = evaluation.rename({**state, names["v"]: torch.full((2,), 2.0)}, names_of_melp)
    assert found["ecg.layers.0.self_attn.in_proj_bias"].tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("content", [{"state_dict": {"a": SimpleNamespace()}}, {"a": "text"}, torch.zeros(3), b"", b"none", None])
def test_files_without_tensors_are_refused(content, tmp_path):
    file = tmp_path / "best.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises(data.DataError, match="best.pth: "):
        evaluation.open_published("merl", file)


def test_unknown_publication():
    assert evaluation.publication("merl:a/b.pth") == ("merl", "a/b.pth")
    assert evaluation.publication("runs/x/model.safetensors") is evaluation.publication(None) is evaluation.publication("C:x") is None
    with pytest.raises(models.ModelError, match="no published checkpoint 'clip'; known: merl, melp, dbeta"):
        evaluation.open_published("clip", "best.pth")


def test_written_reports_are_compared_as_sets(tmp_path, monkeypatch, capsys):
    assert evaluation.overlap([{"a", "b"}, {"c"}], [{"a"}, {"d", "c"}]) == pytest.approx({"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3})
    config = small_config("melp", width=0.125, dim=16, data="simulated:96")
    monkeypatch.setenv("ECG_CACHE", str(tmp_path / "cache"))
    method = models.build_method(config, models.small_text_model(["sinus rhythm. normal ecg"] * 8, steps=1, dim=32, layers=1)).eval()
    monkeypatch.setattr(evaluation, "load_run", lambda *a: (method, config))
    store = data.open_data("simulated:96")
    test = [tags for tags, split in zip(data.report_tags(store), store.records["split"]) if split == "test" and tags]
    monkeypatch.setattr(method, "generate", lambda ecg, beams: [models.join(test.pop(0)) + "." for _ in ecg])
    found = evaluation.generate(tmp_path)
    assert found["written"]["statements"]["f1"] == found["written"]["findings"]["f1"] == 1 > found["commonest report"]["statements"]["f1"]
    lines = [json.loads(line) for line in (tmp_path / "reports.jsonl").read_text().splitlines()]
    assert all(line["report"] == line["written"] for line in lines) and "commonest report" in capsys.readouterr().out
    etp = models.build_method(small_config("etp", width=0.125, dim=16), models.small_text_model(["normal ecg"] * 4, steps=1, dim=32, layers=1))
    monkeypatch.setattr(evaluation, "load_run", lambda *a: (etp, SimpleNamespace(method="etp")))
    with pytest.raises(models.ModelError, match="a etp run writes no reports; --method melp does"):
        evaluation.generate(tmp_path)
