"""eval.py --compare: what belongs together and its name, the table's numbers, errors, runs end to end."""
import json

import numpy as np
import pytest
from matplotlib.image import imread

import data
import eval as evaluation
import train
from conftest import write_config

FLAGS = ("--method etp --data simulated:96 --width 0.125 --dim 16 --mlm-steps 3 --batch-size 16 --epochs 1 "
         "--threads 1").split()


def config(method="etp", seed=0, **fields):
    return {"method": method, "name": f"{method}-{seed}", "seed": seed, "threads": seed, "lr": 0.1,
            "prior": True, **fields}


def test_groups_and_titles_by_hand():
    assert evaluation.group_runs([config(), config("merl"), config(seed=1), config("merl", lr=0.2)]) == {
        "etp": [0, 2], "merl": [1], "merl lr=0.2": [3]}
    ablation = [config(prior=False), config(), config(seed=1), config(lr=0.2, prior=False), config(lr=0.3)]
    assert evaluation.group_runs(ablation) == {  # prior: two groups each; the first one's goes without saying
        "etp": [0], "etp prior=True": [1, 2], "etp lr=0.2": [3], "etp lr=0.3 prior=True": [4]}
    ablation.append(config(unit="tag"))  # a field the others' version lacked; prior=True is commonest now
    assert list(evaluation.group_runs(ablation)) == [
        "etp prior=False", "etp", "etp lr=0.2 prior=False", "etp lr=0.3", "etp unit=tag"]


def metrics(value, width, **more):
    """A result as score_classes gives it."""
    macro = {"auroc": value, "interval": [value - width, value + width]}
    return {"records": 9, "classes": {}, "macro": macro} | more


def folder(path, facts):
    """A run's folder with nothing in it but training.json, or not even that."""
    path.mkdir()
    if facts:
        (path / "training.json").write_text(json.dumps(facts))
    return path


def test_numbers_of_the_table_by_hand(tmp_path):
    slow, fast = ({"records_per_second": speed, "parameters": 2e6, "warnings": []} for speed in (100, 140))
    folders = [folder(tmp_path / name, facts) for name, facts in zip("abc", (slow, fast, None))]
    found = {"ptbxl_super": [metrics(0.7, 0.1), metrics(0.8, 0.1), metrics(0.9, 0.04)],
             "simulated": [metrics(0.5, 0.1), metrics(0.6, 0.1), metrics(0.7, 0.1)]}
    three = evaluation.summarise(found, folders, [config(seed=seed) for seed in range(3)])
    s = three["macro"]["ptbxl_super"]
    assert s["values"] == [0.7, 0.8, 0.9] and (s["lowest"], s["highest"]) == (0.7, 0.9)
    assert s["mean"] == pytest.approx(0.8) and np.allclose(s["interval"], [0.72, 0.88])
    assert three["seeds"] == [0, 1, 2] and "seed" not in three["config"]
    found = {"ptbxl_super": [metrics(0.75, 0.1)], "simulated": [metrics(0.5, 0.2)]}
    one = evaluation.summarise(found, folders[2:], [config()])
    assert evaluation.markdown({"etp": three, "merl": one}).splitlines() == [
        "| method | runs | super | simulated | records/s | parameters |",
        "| --- | --- | --- | --- | --- | --- |",
        "| etp | 3 | 0.800 (0.700 - 0.900) [0.720, 0.880] | 0.600 (0.500 - 0.700) [0.500, 0.700] | 120 "
        "| 2.00 M |",
        "| merl | 1 | 0.750 [0.650, 0.850] | 0.500 [0.300, 0.700] | - | - |"]
    assert one["macro_enough"] == {"ptbxl_super": None, "simulated": None}  # no class has 10 positives
    without = evaluation.markdown({"merl": one}, "macro_enough").splitlines()
    assert without[2] == "| merl | 1 | - | - | - | - |"
    enough = metrics(0.5, 0.2, macro_enough={"auroc": 0.625, "interval": [0.5, 0.75]})
    one = evaluation.summarise({"simulated": [enough]}, folders[2:], [config()])
    assert evaluation.markdown({"etp": one}, "macro_enough").splitlines()[2] == (
        "| etp | 1 | 0.625 [0.500, 0.750] | - | - |")
    one["macro_enough"]["simulated"]["p"] = 0.25
    assert "| 0.625 [0.500, 0.750] p=0.250 |" in evaluation.markdown({"etp": one}, "macro_enough")


def test_rows_of_other_encoders_and_p_values(tmp_path, monkeypatch, capsys):
    """Of two runs one row, of their encoder with random weights another; each against the first."""
    for seed, name in enumerate("ab"):
        folder(tmp_path / name, None)
        write_config(tmp_path / name, "etp", seed=seed)
        (tmp_path / name / "model.safetensors").touch()
    rng = np.random.default_rng(0)
    labels = rng.random((80, 1)) < 0.4

    def scored(shift):
        scores = shift * labels + rng.normal(size=(80, 1))
        return {"10 %": evaluation.score_classes(["A"], scores, labels)}
    monkeypatch.setattr(evaluation, "report", lambda *_, **__: {
        ("probe", "ptbxl_super"): {"": scored(3), "random weights": scored(0)}, ("embed", "ptbxl"): {}})
    groups = evaluation.compare([tmp_path / "a", tmp_path / "b"], {"probe": ["ptbxl_super"]})
    assert list(groups) == ["etp", "random weights (resnet18)"] and groups["etp"]["seeds"] == [0, 1]
    label = "ptbxl_super probe, 10 %"
    own, other = (group["macro"][label] for group in groups.values())
    assert len(own["values"]) == 2 and "p" not in own and own["mean"] > 0.9 > 0.7 > other["mean"]
    assert other["p"] < 0.05 and f"p={other['p']:.3f}" in capsys.readouterr().out
    monkeypatch.setattr(evaluation, "report", lambda *_, **__: {("embed", "ptbxl"): {}})
    assert evaluation.compare([tmp_path / "a"], {"embed": ["ptbxl"]}) == {}  # no figures, no table


def runs_of(folder):
    return map(str, sorted((folder / "runs").iterdir()))


def test_runs_of_other_code_are_no_repetitions(tmp_path, monkeypatch, capsys):
    for seed, name in enumerate("ab"):
        folder(tmp_path / name, None)
        (tmp_path / name / "enc.py").write_text(f"import torch\n\nclass Enc(torch.nn.Module):\n    dim = {seed}\n")
        write_config(tmp_path / name, "etp", seed=seed, encoder=str(tmp_path / name / "enc.py:Enc"))
        (tmp_path / name / "model.safetensors").touch()
    monkeypatch.setattr(evaluation, "report", lambda *_, **__: {("zeroshot", "simulated"): {"": {"zero-shot": metrics(0.7, 0.1)}}})
    groups = evaluation.compare([tmp_path / "a", tmp_path / "b"], {"zeroshot": ["simulated"]})
    assert [len(group["runs"]) for group in groups.values()] == [1, 1] and "checksum of encoder" in list(groups)[1]
    write_config(tmp_path / "b", "etp", seed=1, encoder=str(tmp_path / "b/enc.py:Enc"), made_by={"store": "other"})
    (tmp_path / "b/enc.py").write_text((tmp_path / "a/enc.py").read_text())
    assert len(evaluation.compare([tmp_path / "a", tmp_path / "b"], {"zeroshot": ["simulated"]})) == 1
    assert "etp: its runs are of different stores" in capsys.readouterr().out


def test_two_seeds_and_another_rate_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ECG_CACHE", str(tmp_path / "cache"))
    for name, *more in (("a", "--seed", "0"), ("b", "--seed", "1"), ("c", "--rate", "200")):
        train.main([*FLAGS, "--name", name, *more])
    path = tmp_path / "runs/b/training.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"warnings": ["update 50: COLLAPSE"]}))
    capsys.readouterr()
    for again in range(2):  # the second time comparison.json is among the paths
        evaluation.main(["--compare", *runs_of(tmp_path), "--zeroshot", "simulated"])
        table = capsys.readouterr().out.splitlines()
        rows = [line.split(" | ") for line in table if line.startswith("| etp")]
        assert [row[:2] for row in rows] == 2 * [["| etp", "2"], ["| etp rate=200", "1"]]
        assert " p=" not in rows[0][2] and " p=" in rows[1][2]  # against the first row
        assert [line for line in table if "warnings" in line] == [
            f"warnings in training of {tmp_path}/runs/b: 1, the last at update 50: COLLAPSE"]
    evaluation.main(["--compare", "runs/a", "runs/b"])  # what validation records showed: nothing is evaluated
    own = [[line["validation"] for line in evaluation.read_log(tmp_path / "runs" / name) if "validation" in line][-1]
           for name in "ab"]
    alone = json.loads((tmp_path / "runs/comparison.json").read_text())["groups"]["etp"]["macro"]
    assert alone["validation, loss"]["values"] == [one["loss"] for one in own]
    assert alone["validation, simulated"]["mean"] == pytest.approx(np.mean([one["auroc"]["simulated"] for one in own]))
    assert "positives" not in capsys.readouterr().out
    evaluation.main(["--compare", "runs/a", "runs/b", "runs/c"])
    assert "these runs are of different stores" in capsys.readouterr().out
    evaluation.remember("runs/a", "kept", {"update": 10**6})  # of which the log tells nothing
    with pytest.raises(data.DataError, match="runs/a: no validation records were looked at in training"):
        evaluation.compare(["runs/a"], {})
    assert evaluation.compare(["runs/a", "runs/b"], {})["etp"]["runs"] == ["runs/b"]
    assert "runs/a: no validation records were looked at in training; name a task; it is left out" in capsys.readouterr().out
    (tmp_path / "runs/published-merl-x").mkdir()  # of --ckpt merl:FILE
    evaluation.main(["--compare", *runs_of(tmp_path), "--zeroshot", "simulated"])
    assert "published-merl-x is left out: no run with an ECG encoder" in capsys.readouterr().out
    written = json.loads((tmp_path / "runs/comparison.json").read_text())["groups"]["etp"]
    for i, name in enumerate("ab"):
        own = json.loads((tmp_path / f"runs/{name}/results.json").read_text())["zeroshot"]["simulated"]
        figure = own["results"][""]["zero-shot"]["macro"]["auroc"]
        assert figure == written["macro"]["simulated"]["values"][i]
        assert own["options"]["prompts"] == "descriptive"
        assert written["training"][i] == json.loads((tmp_path / f"runs/{name}/training.json").read_text())
    assert imread(tmp_path / "runs/comparison.png").std() > 0.01  # something is drawn
    (tmp_path / "runs/c/model.safetensors").unlink()
    with pytest.raises(data.DataError, match="runs/c is not a finished run"):
        evaluation.compare(["runs/a", "runs/c"], {"zeroshot": ["simulated"]})


def test_clear_errors(tmp_path, monkeypatch, capsys):
    wanted = {"zeroshot": ["simulated"]}
    with pytest.raises(data.DataError, match="not a run folder"):
        evaluation.compare([tmp_path], wanted)
    with pytest.raises(data.DataError, match="no run folder to compare"):
        evaluation.compare([__file__], wanted)
    for name in "ab":
        (tmp_path / name).mkdir()
        write_config(tmp_path / name, "etp")
        (tmp_path / name / "model.safetensors").touch()
    monkeypatch.setattr(evaluation, "report", lambda run, *_, **options: {
        ("zeroshot", "simulated"): {"": {"zero-shot": {"records": 9 if run.name == "a" else 8}}}})
    with pytest.raises(data.DataError, match="simulated has 8 records for .*b, but 9 for .*a: name the same"):
        evaluation.compare([tmp_path / "a", tmp_path / "b"], wanted)
    for more, sentence in (("--folds 9", "--compare without a task shows what was validated"), ("--generate", "--compare needs sets"),
                           ("--zeroshot simulated --run b", "--compare names its own runs"),
                           ("--zeroshot simulated --ckpt b", "--compare names its own runs"),
                           ("--look r t", "--compare names its own runs")):
        with pytest.raises(SystemExit):
            evaluation.main(["--compare", "a", *more.split()])
        assert sentence in " ".join(capsys.readouterr().err.split())
