"""eval.py --compare: what belongs together and how it is called, the table's numbers, errors, and two runs end to end."""
import json

import numpy as np
import pytest
from matplotlib.image import imread

import data
import eval as evaluation
import train
from conftest import write_config

FLAGS = ["--method", "etp", "--data", "simulated:96", "--width", "0.125", "--dim", "16", "--mlm-steps", "3", "--batch-size", "16",
         "--epochs", "1", "--threads", "1"]


def config(method="etp", seed=0, **fields):
    return {"method": method, "name": f"{method}-{seed}", "seed": seed, "threads": seed, "lr": 0.1, "prior": True, **fields}


def test_groups_and_titles_by_hand():
    assert evaluation.group_runs([config(), config("merl"), config(seed=1), config("merl", lr=0.2)]) == {
        "etp": [0, 2], "merl": [1], "merl lr=0.2": [3]}
    ablation = [config(prior=False), config(), config(seed=1), config(lr=0.2, prior=False), config(lr=0.3)]
    assert evaluation.group_runs(ablation) == {  # prior: two groups each, so the first one's value goes without saying
        "etp": [0], "etp prior=True": [1, 2], "etp lr=0.2": [3], "etp lr=0.3 prior=True": [4]}
    ablation.append(config(unit="tag"))  # a field that the others' version did not have; prior=True is most common now
    assert list(evaluation.group_runs(ablation)) == [
        "etp prior=False", "etp", "etp lr=0.2 prior=False", "etp lr=0.3", "etp unit=tag"]


def run_of(seed, training, **sets):
    results = {name: {"records": 9, "macro": {"auroc": auroc, "interval": [auroc - width, auroc + width]}}
               for name, (auroc, width) in sets.items()}
    return {"run": f"runs/etp-{seed}", "config": config(seed=seed), "training": training, "results": results}


def test_numbers_of_the_table_by_hand():
    slow, fast = ({"records_per_second": speed, "parameters": 2e6} for speed in (100, 140))
    three = evaluation.summarise([run_of(0, slow, ptbxl_super=(0.7, 0.1), simulated=(0.5, 0.1)),
                                  run_of(1, fast, ptbxl_super=(0.8, 0.1), simulated=(0.6, 0.1)),
                                  run_of(2, None, ptbxl_super=(0.9, 0.04), simulated=(0.7, 0.1))])
    s = three["sets"]["ptbxl_super"]
    assert s["auroc"] == [0.7, 0.8, 0.9] and (s["lowest"], s["highest"]) == (0.7, 0.9) and s["mean"] == pytest.approx(0.8)
    assert np.allclose(s["interval"], [0.72, 0.88]) and three["seeds"] == [0, 1, 2] and "seed" not in three["config"]
    one = evaluation.summarise([run_of(0, None, ptbxl_super=(0.75, 0.1), simulated=(0.5, 0.2))])
    assert evaluation.markdown({"etp": three, "merl": one}).splitlines() == [
        "| method | seeds | super | simulated | records/s | parameters |", "|---|---|---|---|---|---|",
        "| etp | 3 | 0.800 (0.700 - 0.900) [0.720, 0.880] | 0.600 (0.500 - 0.700) [0.500, 0.700] | 120 | 2.00 M |",
        "| merl | 1 | 0.750 [0.650, 0.850] | 0.500 [0.300, 0.700] | - | - |"]
    assert one["sets_enough"] == {"ptbxl_super": None, "simulated": None}  # 9 records: no class has 10 positives
    assert evaluation.markdown({"merl": one}, "sets_enough").splitlines()[2] == "| merl | 1 | - | - | - | - |"
    run = run_of(0, None, simulated=(0.5, 0.2))
    run["results"]["simulated"]["macro_enough"] = {"auroc": 0.625, "interval": [0.5, 0.75]}
    assert evaluation.markdown({"etp": evaluation.summarise([run])}, "sets_enough").splitlines()[2] == (
        "| etp | 1 | 0.625 [0.500, 0.750] | - | - |")


def test_two_seeds_and_another_rate_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ECG_CACHE", str(tmp_path / "cache"))
    for name, *more in (("a", "--seed", "0"), ("b", "--seed", "1"), ("c", "--rate", "200")):
        train.main([*FLAGS, "--name", name, *more])
    path = tmp_path / "runs/b/training.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"warnings": ["update 50: COLLAPSE"]}))
    capsys.readouterr()
    for again in range(2):  # the second time comparison.json is among the paths
        evaluation.main(["--compare", *map(str, sorted((tmp_path / "runs").iterdir())), "--zeroshot", "simulated"])
        table = capsys.readouterr().out.splitlines()
        assert [line.split(" | ")[:2] for line in table if line.startswith("| etp")] == 2 * [["| etp", "2"], ["| etp rate=200", "1"]]
        assert [line for line in table if "warnings" in line] == [
            f"warnings in training of {tmp_path}/runs/b: 1, the last at update 50: COLLAPSE"]
    written = json.loads((tmp_path / "runs/comparison.json").read_text())["groups"]["etp"]
    for i, name in enumerate("ab"):
        own = json.loads((tmp_path / f"runs/{name}/results.json").read_text())["zeroshot"]["simulated"]
        assert own["macro"]["auroc"] == written["sets"]["simulated"]["auroc"][i] and own["options"]["prompts"] == "descriptive"
        assert written["training"][i] == json.loads((tmp_path / f"runs/{name}/training.json").read_text())
    assert imread(tmp_path / "runs/comparison.png").std() > 0.01  # something is drawn
    (tmp_path / "runs/c/model.safetensors").unlink()
    with pytest.raises(data.DataError, match="runs/c is not a finished run"):
        evaluation.compare(["runs/a", "runs/c"], ["simulated"])


def test_clear_errors(tmp_path, monkeypatch, capsys):
    with pytest.raises(data.DataError, match="not a run folder"):
        evaluation.compare([tmp_path], ["simulated"])
    with pytest.raises(data.DataError, match="no run folder to compare"):
        evaluation.compare([__file__], ["simulated"])
    for name in "ab":
        (tmp_path / name).mkdir()
        write_config(tmp_path / name, "etp")
        (tmp_path / name / "model.safetensors").touch()
    monkeypatch.setattr(evaluation, "zeroshot", lambda run, sets: {"simulated": {"records": 9 if run.name == "a" else 8}})
    monkeypatch.setattr(evaluation, "save_results", lambda *args: None)
    with pytest.raises(data.DataError, match="simulated has 8 records for .*b, but 9 for .*a: name the same"):
        evaluation.compare([tmp_path / "a", tmp_path / "b"], ["simulated"])
    with pytest.raises(SystemExit):
        evaluation.main(["--compare", "a", "--generate"])
    assert "--compare needs --zeroshot SET" in capsys.readouterr().err
    for other in ("--run", "--ckpt"):
        with pytest.raises(SystemExit):
            evaluation.main(["--zeroshot", "simulated", "--compare", "a", other, "b"])
        assert "drop --run and --ckpt" in capsys.readouterr().err
