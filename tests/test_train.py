"""train.py: resuming to the same numbers, signals, bad losses, the collapse watch, recovery, the learning-rate schedule."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import bench_train
import data
import eval as evaluation
import model as models
import train
from conftest import ROOT, small_config

TINY = ["--width", "0.125", "--dim", "16", "--mlm-steps", "3", "--batch-size", "16", "--epochs", "3", "--threads", "1"]


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory):
    """96 simulated records in a store; the cache of these tests is not the user's."""
    os.environ["ECG_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    return data.open_data("simulated:96").path


def run_train(folder, *args, **options):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *args], cwd=folder, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)


def updates(run):
    path = Path(run) / "log.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def wait_for(condition, process, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end and process.poll() is None, process.communicate()[0] if process.poll() is not None else "too slow"
        time.sleep(0.02)


@pytest.mark.parametrize("method, how", [("fgclep", signal.SIGTERM), ("fgclep", signal.SIGKILL), ("cmelt", signal.SIGKILL)])
def test_a_stopped_run_resumes_to_the_same_numbers(tiny_store, tmp_path, method, how):
    """Stopped by SIGTERM (saves) or kill -9 (from the last checkpoint), then continued: FG-CLEP through both stages, and C-MELT, which
    draws masks and negatives at random."""
    args = ["--data", f"store:{tiny_store}", "--method", method, "--save-every", "4", *TINY]
    args += ["--fine-epochs", "2"] if method == "fgclep" else ["--negatives", "far"]
    whole = run_train(tmp_path, "--name", "whole", *args)
    assert whole.wait() == 0, whole.communicate()[0]
    part = run_train(tmp_path, "--name", "part", *args)
    wait_for(lambda: updates(tmp_path / "runs/part") >= 6, part)
    part.send_signal(how)
    out = part.communicate()[0]
    assert not (tmp_path / "runs/part/model.safetensors").exists(), "the run ended before it was stopped"
    if how == signal.SIGTERM:
        assert part.returncode == 0 and "--resume runs/part" in out
    again = run_train(tmp_path, "--resume", "runs/part")
    out = again.communicate()[0]
    assert again.returncode == 0, out
    a, b = (load_file(tmp_path / f"runs/{name}/model.safetensors") for name in ("whole", "part"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    logs = [[json.loads(line) for line in (tmp_path / f"runs/{name}/log.jsonl").read_text().splitlines()] for name in ("whole", "part")]
    for name, log in zip(("whole", "part"), logs):
        seconds = [line.pop("seconds") for line in log if "terms" in line]  # the only thing that may differ
        facts = json.loads((tmp_path / f"runs/{name}/training.json").read_text())
        assert min(seconds) > 0 and facts["seconds"] == pytest.approx(sum(seconds))
        assert facts["records_per_second"] == pytest.approx(16 / np.median(seconds))
        assert facts["warnings"] == [f"update {line['update']}: {line['warning']}" for line in log if "warning" in line]
        assert facts["parameters"] == facts["trained_parameters"] > 1e4 and facts["records"] > 48
        assert (facts["processes"], facts["threads"]) == (1, 1) and (facts["peak_memory_gb"] is None) == (not torch.cuda.is_available())
    assert logs[0] == logs[1] and [line["update"] for line in logs[0] if "terms" in line] == list(range(1, len(logs[0]) + 1))
    for name in ("config.json", "curves.png", "results.json", "recovered.jsonl" if method == "fgclep" else "negatives.pt", "tokenizer"):
        assert (tmp_path / "runs/part" / name).exists(), name


def test_torchrun_with_two_processes_trains_like_one(tiny_store, tmp_path, free_port):
    """ETP has no dropout (its text tower is frozen), so the whole runs can be compared: losses of every update."""
    args = ["--method", "etp", "--data", f"store:{tiny_store}", "--lr", "1e-4", *TINY]
    one = run_train(tmp_path, "--name", "one", *args)
    assert one.wait() == 0, one.communicate()[0]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    two = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port}",
                          str(ROOT / "train.py"), "--name", "two", *args], cwd=tmp_path, env=env, text=True, capture_output=True)
    assert two.returncode == 0, two.stdout + two.stderr
    losses = [[json.loads(line)["loss"] for line in (tmp_path / f"runs/{name}/log.jsonl").read_text().splitlines()] for name in ("one", "two")]
    assert len(losses[0]) == len(losses[1]) > 10
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)
    assert np.allclose(*losses, rtol=2e-3)  # AdamW's first steps are signs: they enlarge differences of rounding


def test_a_not_finite_loss_stops_with_the_record_ids(tiny_store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "info_nce", lambda x, y, *a: (x.sum() + y.sum()) * float("nan"))
    with pytest.raises(data.DataError, match="loss is nan at update 0; records of this batch: .*[0-9]"):
        train.main(["--method", "etp", "--data", f"store:{tiny_store}", *TINY])


def test_the_watch_tells_a_collapsed_tower_and_a_stuck_loss():
    class Collapsed(torch.nn.Module):
        contrast_sides = 1

        def __init__(self, spread):
            super().__init__()
            self.spread = spread

        def encode_ecg(self, ecg):
            x = torch.ones(16, 8) + self.spread * torch.randn(16, 8)
            return models.EcgViews(None, None, torch.nn.functional.normalize(x, dim=1))

        def encode_text(self, texts):
            return models.TextViews(None, None, torch.nn.functional.normalize(torch.randn(16, 8), dim=1))
    probe = models.Batch(torch.zeros(16, 12, 10), [["a"]] * 16, [["a"]] * 16, ["r"] * 16, None)
    config = small_config("etp", batch_size=16)
    flat = Collapsed(0.01)
    watch = train.Watch(probe, flat, config)
    assert watch.look() == "" and watch.look().startswith("COLLAPSE: all ECG embeddings")
    flat.spread = 1.0
    assert watch.look() == ""
    flat.spread = 0.01
    assert watch.look() == "" and watch.look().startswith("COLLAPSE")
    healthy = train.Watch(probe, Collapsed(1.0), config)
    for _ in range(50):
        healthy.note({"contrast": 1.0})
    assert healthy.look() == ""
    for _ in range(50):
        healthy.note({"contrast": np.log(16)})
    assert healthy.look().startswith("STUCK")


def test_the_learning_rate_warms_up_and_falls_to_zero():
    config = small_config("etp", lr=1.0, warmup=0.1)
    assert train.warm_updates(100, config) == 10 and train.warm_updates(100, small_config("etp", warmup=0.0)) == 0
    rates = [train.rate_at(u, 100, config) for u in range(100)]
    assert np.allclose(rates[:10], np.arange(1, 11) / 10) and np.argmax(rates) in (9, 10)
    assert all(np.diff(rates[10:]) < 0) and rates[-1] < 0.001
    assert train.rate_at(0, 100, small_config("etp", lr=1.0, warmup=0.0)) == 1.0


def test_weight_decay_is_on_matrices_only():
    config = small_config("merl", width=0.125, dim=16)
    method = models.build_method(config, models.small_text_model(["sinus rhythm."] * 4, steps=1, dim=32, layers=1))
    with_decay, without = train.make_optimiser(method, config).param_groups
    assert with_decay["weight_decay"] > 0 and all(p.dim() > 1 for p in with_decay["params"])
    assert without["weight_decay"] == 0 and all(p.dim() <= 1 for p in without["params"])
    assert len(with_decay["params"]) + len(without["params"]) == sum(p.requires_grad for p in method.parameters())


def test_every_process_sees_its_share_of_the_same_batches(monkeypatch):
    config = small_config("etp", batch_size=8)
    rows = np.arange(100, 137)
    whole = list(train.batch_keys(rows, config, 0, 1))
    assert len(whole) == 4 and len({int(r) for key in whole for r in key[2]}) == 32
    monkeypatch.setattr(models, "world", lambda: 2)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(train.dist, "get_rank", lambda rank=rank: rank)
        parts.append(list(train.batch_keys(rows, config, 0, 1)))
    for key, a, b in zip(whole, *parts):
        assert np.array_equal(key[2], np.concatenate([a[2], b[2]]))


def test_text_units():
    tags = ["a", "b", "c"]
    assert train.choose(tags, "report", np.random.default_rng(0)) == tags
    assert all(len(train.choose(tags, "tag", np.random.default_rng(s))) == 1 for s in range(9))
    subsets = [train.choose(tags, "subset", np.random.default_rng(s)) for s in range(50)]
    assert {len(s) for s in subsets} == {1, 2, 3} and all(set(s) <= set(tags) and len(set(s)) == len(s) for s in subsets)


def test_augmentation_moves_and_drops():
    config = small_config("etp", lead_drop=0.5, shift=1.0)
    ecg, peaks = np.tile(np.arange(1, 1001, dtype=np.float32), (12, 1)), train.padded([[2, 300, 600, 999]])[0]
    train.augment(ecg, peaks, config, np.random.default_rng(1))
    kept = ecg[ecg.any(1)]
    assert 0 < len(kept) < 12 and (kept == kept[0]).all()
    inside = kept[0][kept[0] > 0]
    assert 900 <= len(inside) < 1000 and (np.diff(inside) == 1).all()  # shifted, zeros moved in
    assert (peaks[:3] >= 0).all() and peaks[3] == -1                    # and one peak moved out
    assert set(kept[0][peaks[:3]]) < {3, 301, 601, 1000}                # the others lie where they did


def test_recovery_quality():
    recovered = {0: [["a", 0.9, True], ["b", 0.1, False]], 1: [["a", 0.8, True], ["c", 0.7, True]]}
    quality = train.recovery_quality(recovered, {0: {"a"}, 1: {"c", "d"}})
    assert quality["all candidates"] == {"features": 4, "precision": 0.5, "recall": 2 / 3}
    assert quality["kept by the filter"] == {"features": 3, "precision": 2 / 3, "recall": 2 / 3}


def test_the_command_line_explains_itself(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.parse(["--method", "clip"])
    assert "unknown method" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.parse(["--resume", "runs/x", "--lr", "1"])
    assert "drop --lr" in capsys.readouterr().err
    with pytest.raises(data.DataError, match="not a run folder"):
        train.parse(["--resume", str(tmp_path)])
    (tmp_path / "config.json").write_text('{"method": "etp", "gone": 1}')
    with pytest.raises(SystemExit):
        train.parse(["--resume", str(tmp_path)])
    assert "another version" in capsys.readouterr().err
    config, _ = train.parse(["--method", "merl", "--preset", "paper", "--lr", "0.5"])
    assert (config.rate, config.dim, config.lr) == (500, 256, 0.5)


def test_a_language_model_of_ones_own(tiny_store, tmp_path, monkeypatch, capsys):
    """cardiolm learns from reports and text files, says how many hidden words it guesses, and is a --text-model of other runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "more.txt").write_text("\n".join(f"atrial fibrillation is the rhythm of record {i}" for i in range(60)))
    args = ["--batch-size", "16", "--threads", "1", "--epochs", "6"]
    train.main(["--method", "cardiolm", "--data", f"store:{tiny_store},more.txt", "--name", "lm", *args])
    assert "masked words of" in capsys.readouterr().out
    found = json.loads((tmp_path / "runs/lm/results.json").read_text())["language"]
    losses = [json.loads(line)["loss"] for line in (tmp_path / "runs/lm/log.jsonl").read_text().splitlines()]
    assert np.mean(losses[-3:]) < losses[0] - 1 and 0 < found["accuracy"] <= 1 and 0 < found["commonest"] < 1
    train.main(["--method", "melp", "--data", f"store:{tiny_store}", "--name", "with", "--text-model", "runs/lm", "--dim", "16",
                "--width", "0.125", *args[:4], "--epochs", "1"])
    with pytest.raises(models.ModelError, match="runs/lm is a language model without an ECG encoder: .* --text-model runs/lm"):
        evaluation.load_run("runs/lm")
    train.main(["--method", "cardiolm", "--data", "more.txt", *args[:4], "--epochs", "1"])
    assert len(list((tmp_path / "runs").glob("cardiolm-more-*"))) == 1  # named after the file, wherever that is
    lm, _ = models.load_text_model("runs/lm")
    start = lm.state_dict()["embeddings.word_embeddings.weight"]
    now = load_file("runs/with/model.safetensors")["text.lm.embeddings.word_embeddings.weight"]
    assert torch.corrcoef(torch.stack([start.flatten(), now.flatten()]))[0, 1] > 0.9  # it began there


@pytest.mark.parametrize("name", bench_train.WITH_ECGS)
def test_the_speed_benchmark_runs_every_method(name):
    rate, parameters = bench_train.speed(name, "small", "cpu", updates=1, batch_size=4)
    assert rate > 0 and 0.1 < parameters < 10
