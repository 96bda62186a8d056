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
from conftest import small_config, toy_config, write_config


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
    assert result["classes"]["C"] == {"positives": 0}
    assert result["macro"]["classes"] == 2 and result["macro_enough"]["classes"] == 1
    a = roc_auc_score(positives[:, 0], scores[:, 0])
    assert result["classes"]["A"]["auroc"] == result["macro_enough"]["auroc"] == pytest.approx(a)
    low, high = result["classes"]["A"]["interval"]
    assert low < a < high and 0.05 < high - low < 0.2
    evaluation.print_table("test", evaluation.class_rows(result))


def test_the_interval_covers_the_truth():
    """Of many data sets with a known AUROC (0.760 for a shift of one standard deviation), about 95 % of
    intervals hold it."""
    rng, hits = np.random.default_rng(2), 0
    for _ in range(60):
        positive = rng.random(200) < 0.3
        score = rng.normal(size=200) + positive
        result = evaluation.score_classes(["A"], score[:, None], positive[:, None])
        low, high = result["classes"]["A"]["interval"]
        hits += low < 0.7602 < high
    assert 51 <= hits <= 60


def test_best_f1_by_hand():
    scores, positive = np.array([0.9, 0.8, 0.7, 0.1]), np.array([1, 0, 1, 0], bool)
    assert evaluation.best_f1(scores, positive) == pytest.approx(0.8)


def test_prompts(tmp_path):
    classes = ["NORM", "NST_"]
    plain = data.class_prompts("ptbxl_all", classes, "plain")
    assert plain[0] == ["normal ecg"] and len(plain[1]) == 1
    several = [len(p) > 1 for p in data.class_prompts("ptbxl_all", classes, "descriptive")]
    assert several == [False, True]
    file = tmp_path / "published.json"
    published = {"NORM": "Normal ECG", "NST": ["one", "two"]}  # such files drop the underscore
    file.write_text(json.dumps(published))
    assert data.class_prompts("ptbxl_all", classes, str(file)) == [["normal ecg"], ["one", "two"]]
    with pytest.raises(data.DataError, match="no prompt for AFIB"):
        data.class_prompts("ptbxl_rhythm", ["AFIB"], str(file))


def test_the_bootstrap_draws_patients():
    """Eighty records of ten patients are ten draws: the interval is far wider than that of eighty."""
    rng, patient = np.random.default_rng(0), np.arange(80) // 8
    positive = (patient % 2 == 0)[:, None]
    scores = 0.5 * positive + rng.normal(size=10)[patient][:, None] + 0.1 * rng.normal(size=(80, 1))
    wide, narrow = (evaluation.score_classes(["A"], scores, positive, who)
                    for who in (patient.astype(str), None))
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
    draws = np.random.default_rng(0).multinomial(60, np.full(60, 1 / 60), evaluation.RESAMPLES)
    a = evaluation.auroc_of_resamples(scores[:, 0], positives[:, 0], draws)
    both = ((a + 1) / 2)[draws[:, 0] > 0]  # where the one positive of the second class was drawn
    assert result["macro"]["interval"] == pytest.approx(np.percentile(both, [2.5, 97.5]))
    evaluation.print_table("test", evaluation.class_rows(result))
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert "no negatives" in lines["all"] and "no positives" in lines["none"]
    assert lines["one"].split()[3] == "-"
    rare = np.eye(60, 12, dtype=bool)  # fewer than a tenth of the resamples have all twelve positives
    result = evaluation.score_classes(list("abcdefghijkl"), rng.normal(size=(60, 12)), rare)
    assert result["macro"]["interval"] is None


def test_the_data_that_are_named_are_the_data_that_are_used(tmp_path, monkeypatch):
    """--data of whatever source; a run's own data need not be there for that."""
    monkeypatch.setenv("ECG_CACHE", str(tmp_path / "cache"))
    config, rows = small_config("etp", data="ptbxl:/no/longer/there"), evaluation.test_rows
    asking = evaluation.asking
    store = data.find_store("ptbxl", config, ["simulated:40"])
    assert len(store) == 40 and store.records["source"][0] == "simulated"
    assert len(data.find_store("simulated", small_config("etp", data="simulated:30"))) == 30
    assert len(data.find_store("simulated", config, ["csn:/nowhere", "simulated:40"])) == 40
    for specs, words in ((["csn:a", "georgia:b"], "none of csn:a, georgia:b is of simulated"),
                         (["simulated:40", "simulated:30"], "more than one of .* is of simulated")):
        with pytest.raises(data.DataError, match=f"{words}; name its data with --data"):
            data.find_store("simulated", config, specs)
    with pytest.raises(data.DataError, match="where are the records of csn.* --data SOURCE:PATH"):
        data.find_store("csn", config)
    with pytest.raises(data.DataError, match="no such data: nothing:"):
        data.find_store("ptbxl", config, ["nothing:here"])
    with pytest.raises(data.DataError, match="these records have no folds: leave out --folds"):
        rows(store, asking(folds=[9, 10]))
    assert len(rows(store, asking(split="all"))) == 40
    split = store.records["split"].copy()
    assert rows(store, asking(split="train")).tolist() == np.flatnonzero(split == "train").tolist()
    try:
        store.records["fold"] = 3
        with pytest.raises(data.DataError, match="holds no record of fold 9, 10; name folds with --folds"):
            rows(store, asking(folds=[9, 10]))
        store.records["split"] = "train"
        with pytest.raises(data.DataError, match="holds no record of the test split"):
            rows(store, asking())
        assert data.sets_of(store) == []
    finally:
        data.open_store.cache_clear()  # others read it, too


def test_no_result_overwrites_another(tmp_path):
    result = evaluation.score_classes(["A"], np.zeros((3, 1)), np.zeros((3, 1), bool))
    folds, plain = {"folds": [9]}, {"prompts": "plain"}
    for options in ({}, plain, folds, folds | {"scales": ["beat"]}, {"checkpoint": "w.pt"}, {}):
        evaluation.show(tmp_path, "zeroshot", "ptbxl_sub", {"": {"zero-shot": {"source": "ptbxl"} | result}},
                        evaluation.asking(**options))
    known = evaluation.known_results(tmp_path)["zeroshot"]
    assert list(known) == ["ptbxl_sub", "ptbxl_sub prompts=plain", "ptbxl_sub folds=9",
                           "ptbxl_sub scales=beat folds=9", "ptbxl_sub checkpoint=w.pt"]
    kept = known["ptbxl_sub folds=9"]
    assert kept["options"]["folds"] == [9] and kept["results"][""]["zero-shot"] == {
        "source": "ptbxl", "records": 3, "patients": 3, "classes": {"A": {"positives": 0}}, "untrained": []}
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(data.DataError, match="results.json: must be an object, not .*; move it away"):
        evaluation.report(tmp_path, {"zeroshot": ["ptbxl_sub"]})  # before anything is computed


@pytest.mark.parametrize("content, words", [
    (None, "No such file"), ("", "empty"), ("{'SR': 'x'}", "no JSON"), ('["SR"]', "must be an object"),
    ('{"SR": []}', "the prompt of SR must be"), ('{"SR": ["...", "x"]}', "the prompt of SR must be"),
    ('{"SR": 3}', "SR: must be a text"), ('{"SR": "a", "SR": "b"}', "'SR' occurs twice"),
    ('{"NORM": "x"}', "no prompt for SR"), ('{"SR": [1]}', "the prompt of SR must be")])
def test_a_prompts_file_that_is_none_is_explained(tmp_path, content, words):
    path = tmp_path / "p.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(data.DataError, match=f"p.json.*{words}"):
        data.class_prompts("ptbxl_rhythm", ["SR"], str(path))


@pytest.mark.parametrize("name", [name for name in data.LABEL_SETS if name not in data.OCCURRING])
def test_every_class_of_every_set_has_prompts(name):
    classes = list(data.label_set(name))
    assert len(classes) == dict(ptbxl_super=5, ptbxl_sub=23, ptbxl_form=19, ptbxl_rhythm=12, ptbxl_diag=44,
                                ptbxl_all=71, cpsc2018=9, csn=38, csn_published=38, georgia=20, cinc2021=26,
                                code_test=6)[name]
    for style in ("plain", "descriptive"):
        for texts in data.class_prompts(name, classes, style):
            assert texts and all(t == t.lower().strip() and t for t in texts)


def tiny(method, texts, **options):
    """An untrained method."""
    config = toy_config(method, **options)
    return models.build_method(config, models.small_text_model(texts, steps=1, dim=32, layers=1)).eval()


@pytest.mark.parametrize("name, options, scales, joined", [
    ("etp", {}, ["rhythm"], lambda one: one.mean(1)),  # log-mean-exp at the scale that FG-CLEP starts with, 10
    ("fgclep", {}, ["rhythm"], lambda one: np.log(np.exp(10 * one).mean(1)) / 10),
    ("fgclep", {"align": "word"}, ["rhythm", "token"], lambda one: np.log(np.exp(10 * one).mean(1)) / 10)])
def test_a_class_scores_what_its_prompts_do(tmp_path, monkeypatch, name, options, scales, joined):
    """By the stored vectors and by the method's own similarity."""
    method = tiny(name, ["sinus rhythm.", "normal ecg."] * 4, **options)
    store = data.prepare("simulated", "5", tmp_path / "store")
    run = evaluation.Run(tmp_path, method, method.config, "cpu", "")
    score = lambda prompts: evaluation.score_records(run, store, np.arange(5), prompts, evaluation.asking(scales=scales))
    one, whole = score([["sinus rhythm"], ["normal ecg"]]), evaluation.batches
    monkeypatch.setattr(evaluation, "batches", lambda *given: whole(*given, batch=2))
    both = score([["sinus rhythm", "normal ecg."], ["normal ecg"]])
    assert both.shape == (5, 2) and np.allclose(both[:, 0], joined(one), atol=2e-5)
    assert np.allclose(both[:, 1], one[:, 1], atol=2e-5)
    with torch.no_grad():
        views = method.encode_ecg(torch.from_numpy(store.ecg(np.arange(5))))
        text = method.encode_text(["sinus rhythm", "normal ecg"])
        assert np.allclose(one, method.similarity(views, text, scales), atol=2e-5)
    with pytest.raises(models.ModelError, match="has no beat scale, only rhythm"):
        scales = ["beat"]
        score([["normal ecg"]])


def test_clear_errors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PTBXL", raising=False)
    with pytest.raises(data.DataError, match="no finished run"):
        evaluation.newest_run()
    with pytest.raises(data.DataError, match="not a run folder"):
        evaluation.load_run(tmp_path)
    with pytest.raises(data.DataError, match="physionet.org/content/ptb-xl"):
        data.find_store("ptbxl", small_config("etp", data=""))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(data.DataError, match="config.json: has no 'method'"):
        evaluation.load_run(tmp_path)
    write_config(tmp_path, "etp")
    with pytest.raises(data.DataError, match="did not finish"):
        evaluation.load_run(tmp_path)


def test_a_third_of_an_attention_is_missing():
    names = {part: f"ecg_encoder.encoder.layers.0.self_attn.{part}_proj.bias" for part in "qkv"}
    names_of_melp = models.published()["melp"]["names"]
    state = {names["k"]: torch.ones(2), names["q"]: torch.zeros(2)}
    assert models.rename(state, names_of_melp) == {}
    found = models.rename({**state, names["v"]: torch.full((2,), 2.0)}, names_of_melp)
    assert found["ecg.layers.0.self_attn.in_proj_bias"].tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("content", [{"state_dict": {"a": SimpleNamespace()}}, {"a": "text"}, torch.zeros(3),
                                     b"", b"none", None])
def test_files_without_tensors_are_refused(content, tmp_path):
    file = tmp_path / "best.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises(data.DataError, match="best.pth: "):
        evaluation.open_published("merl", file)


def test_unknown_publication():
    assert models.publication("merl:a/b.pth") == ("merl", "a/b.pth")
    assert not any(map(models.publication, ("runs/x/model.safetensors", None, "C:x")))
    with pytest.raises(models.ModelError, match="no published checkpoint 'clip'; known: merl, melp, dbeta"):
        evaluation.open_published("clip", "best.pth")


def test_written_reports_are_compared_as_sets(tmp_path, monkeypatch):
    found = evaluation.overlap([{"a", "b"}, {"c"}], [{"a"}, {"d", "c"}])
    assert found == pytest.approx({"what": "F1", "value": 2 / 3, "precision": 2 / 3, "recall": 2 / 3})
    monkeypatch.setenv("ECG_CACHE", str(tmp_path / "cache"))
    method = tiny("melp", ["sinus rhythm. normal ecg"] * 8, data="simulated:96")
    run = evaluation.Run(tmp_path, method, method.config, "cpu", "")
    store = data.open_data("simulated:96")
    said = zip(data.report_tags(store), store.records["split"])
    test = [tags for tags, split in said if split == "test" and tags]
    monkeypatch.setattr(method, "generate", lambda ecg, beams: [models.join(test.pop(0)) + "." for _ in ecg])
    found = evaluation.generate(run, "simulated", evaluation.asking())
    own, common = found[""], found["commonest report"]
    assert own["statements"]["value"] == own["findings"]["value"] == 1 > common["statements"]["value"]
    assert own["findings"]["BLEU-4"] == own["findings"]["ROUGE-L"] == 1 > common["findings"]["BLEU-4"]
    lines = [json.loads(line) for line in (tmp_path / "reports.jsonl").read_text().splitlines()]
    assert len(lines) == own["findings"]["records"] and all(x["report"] == x["written"] for x in lines)
    etp = tiny("etp", ["normal ecg"] * 4)
    with pytest.raises(models.ModelError, match="a etp run writes no reports; --method melp does"):
        evaluation.generate(run._replace(method=etp, config=etp.config), "simulated", evaluation.asking())


def test_an_option_that_is_mistyped_is_named():
    with pytest.raises(data.DataError, match="there is no option 'fold'; there are data, prompts, .*folds"):
        evaluation.asking(fold=[9])
