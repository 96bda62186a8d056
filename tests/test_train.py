"""train.py: resuming to the same numbers, signals, bad losses, the collapse watch, recovery, the learning-rate schedule."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import bench_train
import csrc
import data
import eval as evaluation
import model as models
import train
from conftest import ROOT, small_config

SMALL = ["--dim", "16", "--mlm-steps", "3", "--batch-size", "16", "--epochs", "3", "--threads", "1"]
TINY = ["--width", "0.125", *SMALL]


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory):
    """96 simulated records in a store; the cache of these tests is not the user's, but for the compiled operators."""
    os.environ["ECG_CACHE"] = str(cache := tmp_path_factory.mktemp("cache"))
    library = csrc.build_info().get("library", "")
    if library.endswith("ecg_csrc.so"):
        (cache / "csrc").symlink_to(Path(library).parent.parent)
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


@pytest.mark.parametrize("method, how", [("fgclep", signal.SIGKILL), ("cmelt", signal.SIGKILL), ("etp", signal.SIGTERM)])
def test_a_stopped_run_resumes_to_the_same_numbers(tiny_store, tmp_path, monkeypatch, method, how):
    """Stopped by SIGTERM (saves) or kill -9 (from the last checkpoint), then continued: FG-CLEP through both stages, C-MELT, which
    draws masks and negatives at random, and ETP, whose frozen text tower was trained just before."""
    args = ["--data", f"store:{tiny_store}", "--method", method, "--save-every", "4", *(SMALL if method == "cmelt" else TINY)]
    args += {"fgclep": ["--fine-epochs", "2", "--targets", "reports"], "cmelt": ["--negatives", "far"], "etp": ["--epochs", "8"]}[method]
    monkeypatch.chdir(tmp_path)
    train.main(["--name", "whole", *args])
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
        assert facts["parameters"] >= facts["trained_parameters"] > 1e4 and facts["records"] > 48
        assert (facts["parameters"] == facts["trained_parameters"]) == (method != "etp")
        assert (facts["processes"], facts["threads"]) == (1, 1) and (facts["peak_memory_gb"] is None) == (not torch.cuda.is_available())
    updated = [line for line in logs[0] if "terms" in line]
    assert logs[0] == logs[1] and [line["update"] for line in updated] == list(range(1, len(updated) + 1))
    looks = [line["validation"] for line in logs[0] if "validation" in line]
    assert len(looks) > 2 and all(look["terms"].keys() == updated[0]["terms"].keys() and
                                  0 <= look["R@1"] <= look["R@5"] <= 1 for look in looks)
    own = {"fgclep": ["recovered.jsonl"], "cmelt": ["negatives.pt"], "etp": []}[method]
    for name in ("config.json", "curves.png", "results.json", "tokenizer", *own):
        assert (tmp_path / "runs/part" / name).exists(), name


@pytest.mark.parametrize("flags", [["--width", "0.125"], ["--accumulate", "2", "--chunk", "6", "--encoder", "vit_tiny", "--patch", "50"]])
def test_torchrun_with_two_processes_trains_like_one(tiny_store, tmp_path, free_port, flags):
    """ETP has no dropout (its text tower is frozen), so the whole runs can be compared: losses of every update. In chunks only an
    encoder without BatchNorm can be."""
    args = ["--method", "etp", "--data", f"store:{tiny_store}", "--lr", "1e-4", *SMALL, *flags]
    one = run_train(tmp_path, "--name", "one", *args)
    assert one.wait() == 0, one.communicate()[0]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    two = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port}",
                          str(ROOT / "train.py"), "--name", "two", *args], cwd=tmp_path, env=env, text=True, capture_output=True)
    assert two.returncode == 0, two.stdout + two.stderr
    losses = [[line["loss"] for line in lines_of(tmp_path / "runs" / name, "loss")] for name in ("one", "two")]
    assert len(losses[0]) == len(losses[1]) == (6 if "--accumulate" in flags else 12)
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)
    assert np.allclose(*losses, rtol=2e-3)  # AdamW's first steps are signs: they enlarge differences of rounding


def rank_of_two(rank, port, folder, jobs):
    """A process of two that trains; after `last` updates it is told to stop. Keeps its weights and what C-MELT hid first."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    os.chdir(folder)
    optimiser, masked, anywhere = train.make_optimiser, models.CMELT.masked_states, train.Stop.anywhere
    train.evaluation.report = lambda *a, **k: None
    for i, (name, argv, last) in enumerate(jobs):
        os.environ["MASTER_PORT"] = str(port + i)
        made, hidden, asked = [], [], []
        train.make_optimiser = lambda method, config: made.append(method) or optimiser(method, config)
        models.CMELT.masked_states = lambda self, frames, order: hidden.append(order.clone()) or masked(self, frames, order)
        train.Stop.anywhere = lambda self: asked.append(0) or len(asked) > last or anywhere(self)
        train.main(argv)
        torch.save({"model": made[0].state_dict(), "hidden": hidden[:1]}, f"{name}-{rank}.pt")


def test_two_processes_keep_the_same_weights_draw_other_numbers_and_resume(tiny_store, tmp_path, free_port):
    jobs, log = [], lambda run: [{**json.loads(line), "seconds": 0} for line in (tmp_path / f"runs/{run}/log.jsonl").open()]
    for method in ("etp", "cmelt"):
        args = ["--method", method, "--data", f"store:{tiny_store}", "--epochs", "2", "--save-every", "3", *SMALL[:-4], "--threads", "1"]
        jobs.append((f"{method}-whole", [*args, "--name", f"{method}-whole"], 999))
    jobs += [("cmelt-part", [*args, "--name", "cmelt-part"], 4), ("cmelt-again", ["--resume", "runs/cmelt-part"], 999)]
    torch.multiprocessing.spawn(rank_of_two, (free_port, tmp_path, jobs), nprocs=2)
    for names in (["etp-whole"], ["cmelt-whole", "cmelt-again"]):
        found = [torch.load(tmp_path / f"{name}-{rank}.pt") for name in names for rank in (0, 1)]
        for other in found[1:]:
            assert all(torch.equal(found[0]["model"][k], other["model"][k]) for k in found[0]["model"])
    assert log("cmelt-whole") == log("cmelt-part") and len(log("cmelt-whole")) > 6
    assert not torch.equal(found[0]["hidden"][0], found[1]["hidden"][0])  # each process its own masks


def test_ctrl_c_under_torchrun_saves(tiny_store, tmp_path, free_port):
    """The terminal's SIGINT reaches every process, and torchrun sends another."""
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port}", str(ROOT / "train.py"),
         "--method", "etp", "--data", f"store:{tiny_store}", "--name", "x", *TINY, "--epochs", "2000", "--accumulate", "50"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True)
    wait_for(lambda: updates(tmp_path / "runs/x") >= 1, process)
    os.killpg(process.pid, signal.SIGINT)
    out = process.communicate()[0]
    assert "stopped and saved at update" in out and (tmp_path / "runs/x/checkpoint.pt").exists()


def test_ctrl_c_after_training_says_how_to_go_on(tiny_store, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluation, "report", lambda *a, **k: os.kill(os.getpid(), signal.SIGINT) or time.sleep(5))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where a shell started this behind
    try:
        with pytest.raises(KeyboardInterrupt):
            train.main(["--method", "etp", "--data", f"store:{tiny_store}", "--name", "x", *TINY, "--epochs", "1"])
    finally:
        signal.signal(signal.SIGINT, before)
    assert "training is finished; the table: python eval.py --zeroshot simulated --run runs/x" in capsys.readouterr().err


# ---- run folders -----------------------------------------------------------------------------------------------------

def test_runs_of_the_same_second_have_folders_of_their_own(tiny_store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.time, "strftime", lambda form: "20261126-120000")
    config = small_config("etp", data="simulated")
    names = [train.new_folder(config, {}).name for _ in range(3)]
    assert names == ["etp-simulated-20261126-120000", "etp-simulated-20261126-120000-2", "etp-simulated-20261126-120000-3"]
    config.name = "mine"
    train.new_folder(config, {})
    with pytest.raises(data.DataError, match="runs/mine exists: continue it with --resume runs/mine"):
        train.new_folder(config, {})


def test_two_processes_do_not_resume_one_run(finished, tmp_path, monkeypatch):
    run = copy_of(finished, tmp_path, monkeypatch)
    with data.locked(run / ".lock"), pytest.raises(data.DataError, match="another process is training it"):
        train.main(["--resume", str(run)])


def test_a_run_that_fails_before_its_first_update_leaves_no_folder(tiny_store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "info_nce", lambda x, y, *a: (x.sum() + y.sum()) * float("nan"))
    for more, words in ((["--accumulate", "100"], "every stage needs one update"), (["--batch-size", "5000"], "lower --batch-size"), (["--chunk", "5"], "leaves a chunk of one, which BatchNorm"),
                        (["--text-model", str(tmp_path)], "neither a folder with a whole model"), ([], "loss is nan at update 1")):
        with pytest.raises((data.DataError, models.ModelError), match=words):
            train.main(["--method", "etp", "--data", f"store:{tiny_store}", *TINY, *more])
        assert not list((tmp_path / "runs").glob("*"))


def test_a_gradient_that_is_not_finite_stops(tiny_store, tmp_path, monkeypatch):
    class Root(torch.autograd.Function):  # 0 forward, infinite backward
        @staticmethod
        def forward(ctx, x):
            return x * 0

        @staticmethod
        def backward(ctx, grad):
            return grad * float("inf")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "info_nce", lambda x, y, *a: Root.apply(x.sum() + y.sum()))
    with pytest.raises(data.DataError, match="the gradient is (inf|nan) at update 1; records"):
        train.main(["--method", "etp", "--data", f"store:{tiny_store}", *TINY])


@pytest.fixture(scope="session")
def finished(tiny_store, tmp_path_factory):
    """A whole FG-CLEP run, and beside it, in "fine", the same stopped in its fine stage."""
    folder = tmp_path_factory.mktemp("finished")
    args = ["--data", f"store:{tiny_store}", "--targets", "reports", "--fine-epochs", "2", "--save-every", "9", *TINY]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train.main([*args, "--name", "whole"])
        asked = []
        patch.setattr(train.Stop, "anywhere", lambda self: asked.append(0) or len(asked) > 14)
        train.main([*args, "--name", "fine"])
    assert torch.load(folder / "runs/fine/checkpoint.pt")["update"] == 14 and (folder / "runs/fine/recovered.jsonl").exists()
    return folder / "runs"


def copy_of(runs, folder, monkeypatch, name="fine"):
    monkeypatch.chdir(folder)
    shutil.copytree(runs / name, folder / "runs" / name)
    return Path("runs") / name


def test_a_run_stopped_in_its_fine_stage_resumes(finished, tmp_path, monkeypatch):
    run = copy_of(finished, tmp_path, monkeypatch)
    train.main(["--resume", str(run)])
    a, b = load_file(run / "model.safetensors"), load_file(finished / "whole/model.safetensors")
    assert all(torch.equal(a[k], b[k]) for k in a)


def cut_line(path):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def edit_number(path):
    text = path.read_text()
    path.write_text(text.replace("true", "false", 1))


@pytest.mark.parametrize("name, change, words", [
    ("recovered.jsonl", cut_line, "damaged, and the rest was made with it"),
    ("recovered.jsonl", edit_number, "damaged, and the rest was made with it"),
    ("recovered.jsonl", Path.unlink, "missing, and the rest was made with it"),
    ("tokenizer/tokenizer.json", lambda path: path.write_text(path.read_text().replace("sinus", "minus")), "damaged"),
    ("tokenizer/tokenizer.json", Path.unlink, "missing"), ("tokenizer/config.json", lambda path: path.write_text("{"), "damaged"),
    ("checkpoint.pt", lambda path: path.write_bytes(path.read_bytes()[:-1000]), "checkpoint.pt: damaged, cut off"),
    ("checkpoint.pt", Path.unlink, "missing, and the run was beyond its first"),
    ("checkpoint.pt", lambda path: torch.save({"model": {}}, path), "not a checkpoint of this version"),
    ("checkpoint.pt", lambda path: torch.save([1], path), "holds other things"),
    ("checkpoint.pt", lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "a Git LFS pointer"),
    ("log.jsonl", lambda path: path.write_text("x\n" + path.read_text()), r"log.jsonl, line 1: no JSON"),
    ("config.json", lambda path: path.write_text(path.read_text().replace('"dim": 16', '"dim": 32')), r"checkpoint.pt: not of .*config.json"),
    ("config.json", lambda path: path.write_text(path.read_text().replace('"lr": 0.002', '"lr": "fast"')), "--lr is 'fast'"),
    ("config.json", lambda path: path.write_text(path.read_text().replace('"store": "', '"store": "0')), "training data have changed"),
])
def test_a_damaged_run_is_refused(finished, tmp_path, monkeypatch, name, change, words):
    run = copy_of(finished, tmp_path, monkeypatch)
    change(run / name)
    with pytest.raises(data.DataError, match=words):
        train.main(["--resume", str(run)])
    assert (run / "log.jsonl").exists()  # nothing was thrown away


def test_a_log_line_cut_by_a_kill_is_passed_over(finished, tmp_path, monkeypatch):
    run = copy_of(finished, tmp_path, monkeypatch)
    with open(run / "log.jsonl", "a") as file:
        file.write('{"update": 15, "terms": {"contrast": 1.0}')  # ends with a brace
    text = (run / "log.jsonl").read_text()
    assert [line["update"] for line in evaluation.read_log(run) if "terms" in line] == list(range(1, 15))
    assert (run / "log.jsonl").read_text() == text  # every process reads it, only the first may write
    train.main(["--resume", str(run)])
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "terms" in line]
    assert [line["update"] for line in lines] == list(range(1, len(lines) + 1))


def test_flipped_bits_in_weights_are_noticed(finished, tmp_path, monkeypatch):
    """Everywhere in checkpoint.pt and model.safetensors: refused, or, in bytes that mean nothing, the same tensors."""
    for name in ("checkpoint.pt", "model.safetensors"):
        path, rng, blob = tmp_path / name, np.random.default_rng(0), (finished / "whole" / name).read_bytes()
        read = lambda path: evaluation.read_file(path)[0]
        path.write_bytes(blob)
        whole, refused = evaluation.crc_of_tensors(read(path).get("model", read(path))), 0
        for place in [*rng.integers(0, len(blob), 60), *rng.integers(len(blob) - 20000, len(blob), 20), *rng.integers(0, 2000, 20)]:
            path.write_bytes(blob[:place] + bytes([blob[place] ^ 1 << int(rng.integers(8))]) + blob[place + 1:])
            try:
                state = read(path)
                assert evaluation.crc_of_tensors(state.get("model", state)) == whole, place
            except data.DataError as error:
                assert name in str(error)
                refused += 1
        assert refused > 60


def test_a_run_whose_log_or_checkpoint_is_lost_is_refused(finished, tmp_path, monkeypatch):
    run = copy_of(finished, tmp_path, monkeypatch, "whole")
    log = (run / "log.jsonl").read_text()
    for left in ("", "".join(log.splitlines(True)[1:])):
        (run / "log.jsonl").write_text(left)
        with pytest.raises(data.DataError, match="log.jsonl: has not the [0-9]+ updates that are done"):
            train.main(["--resume", str(run)])
    (run / "log.jsonl").write_text(log)
    (run / "checkpoint.pt").unlink()
    with pytest.raises(data.DataError, match="checkpoint.pt: missing; the run is finished"):
        train.main(["--resume", str(run)])


def test_help_tells_each_methods_default(capsys):
    with pytest.raises(SystemExit):
        train.parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "[0.75; 0.5 cmelt]" in text and "[0; 4 fgclep]" in text and "100 %" not in text.split("--epochs")[0]


def test_a_batch_larger_than_the_records_says_so(tiny_store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(data.DataError, match="training records with a report are too few for a batch of 4096: lower --batch-size"):
        train.main(["--method", "etp", "--data", f"store:{tiny_store}", *TINY, "--batch-size", "4096"])


def test_a_run_killed_at_its_first_checkpoint_begins_anew(tmp_path):
    """Its log has the update after which it was to be written; beyond that, it is missing."""
    for last, gone in ((4, False), (5, True)):
        (tmp_path / "log.jsonl").write_text("".join(json.dumps({"update": n, "seconds": 0.1}) + "\n" for n in range(1, last + 1)))
        if gone:
            with pytest.raises(data.DataError, match="missing, and the run was beyond its first"):
                train.read_checkpoint(tmp_path, 4)
        else:
            assert train.read_checkpoint(tmp_path, 4) is None


def test_the_watch_goes_on_where_it_was(finished, tmp_path, monkeypatch):
    """What it has seen is in the checkpoint: a resumed run warns as a whole one does."""
    run = copy_of(finished, tmp_path, monkeypatch)
    seen, state = [], {"recent": [1.0, 2.0], "flat": ["ECG"]}
    checkpoint = torch.load(run / "checkpoint.pt")
    torch.save(checkpoint | {"watch": state}, run / "checkpoint.pt")
    log = train.UpdateLog
    monkeypatch.setattr(train, "UpdateLog", lambda *a: seen.append(dict(a[-1].state)) or log(*a))
    train.main(["--resume", str(run)])
    assert seen == [state] and "watch" in torch.load(run / "checkpoint.pt")


def test_a_full_disk_keeps_the_last_checkpoint(tiny_store, tmp_path):
    """A limit on the size of files stands for the disk: the checkpoint does not fit, one sentence says so."""
    code = ("import resource, signal, sys, train; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
            "resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6)); train.data.guarded(lambda: train.main(sys.argv[1:]))")
    result = subprocess.run([sys.executable, "-c", code, "--method", "etp", "--data", f"store:{tiny_store}", "--name", "x", *TINY],
                            cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "runs/x/checkpoint.pt: cannot be written: " in result.stderr and "the last whole one is kept" in result.stderr
    assert not list((tmp_path / "runs/x").glob("*.tmp"))


def test_a_run_of_ones_own_records_ends_with_their_table(tmp_path, monkeypatch, capsys):
    from test_data import beats, table, write
    monkeypatch.chdir(tmp_path)
    for i in range(24):
        write(tmp_path / f"r{i}", beats(seed=i))
    rows = [dict(record=f"r{i}", report="sinus rhythm" if i % 2 else "atrial fibrillation", labels="SR" if i % 2 else "AFIB",
                 split="test" if i > 17 else "train") for i in range(24)]
    table(tmp_path / "list.csv", rows)
    args = ["--method", "etp", "--data", "csv:list.csv", *TINY, "--epochs", "1"]
    train.main([*args, "--name", "own"])
    assert "zero-shot own of csv records: 6 records" in capsys.readouterr().out
    table(tmp_path / "list.csv", [row | dict(labels="") for row in rows])
    with pytest.raises(data.DataError, match="from other records; delete it"):  # the old store is not used in silence
        train.main([*args, "--name", "unlabelled"])
    monkeypatch.setenv("ECG_CACHE", str(tmp_path / "cache"))
    train.main([*args, "--name", "unlabelled"])
    out = capsys.readouterr().out
    assert "ECG -> report" in out and "zero-shot" not in out  # of reports, which these records have
    with pytest.raises(data.DataError, match="its training data have changed since it began"):
        train.main(["--resume", "runs/own"])


def test_a_not_finite_loss_stops_with_the_record_ids(tiny_store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "info_nce", lambda x, y, *a: (x.sum() + y.sum()) * float("nan"))
    with pytest.raises(data.DataError, match="loss is nan at update 1; records of its batch: .*[0-9]"):
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
    assert watch.check() == "" and watch.check().startswith("COLLAPSE: all ECG embeddings")
    flat.spread = 1.0
    assert watch.check() == ""
    flat.spread = 0.01
    assert watch.check() == "" and watch.check().startswith("COLLAPSE")
    healthy = train.Watch(probe, Collapsed(1.0), config, warmup_end=5)
    for _ in range(50):
        healthy.note({"update": 9, "terms": {"contrast": 1.0}})
    assert healthy.check() == ""
    for _ in range(50):
        healthy.note({"update": 9, "terms": {"contrast": np.log(16)}})
        healthy.note({"update": 4, "terms": {"contrast": 9.0}})
    assert healthy.check().startswith("STUCK")


def test_the_learning_rate_warms_up_and_falls_to_zero():
    config = small_config("etp", lr=1.0, warmup=0.1)
    rates = [train.lr_at(u, 100, config) for u in range(100)]
    assert np.allclose(rates[:10], np.arange(1, 11) / 10) and np.argmax(rates) in (9, 10)
    assert all(np.diff(rates[10:]) < 0) and rates[-1] < 0.001
    assert train.lr_at(0, 100, small_config("etp", lr=1.0, warmup=0.0)) == 1.0


class Learner(torch.nn.Module):
    """A weight that learns and has two names, one that does not, a running mean and a count."""

    def __init__(self):
        super().__init__()
        self.weight, self.frozen = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.ones(2), requires_grad=False)
        self.tied = self.weight
        self.register_buffer("running", torch.zeros(1))
        self.register_buffer("count", torch.tensor(0))


def test_weights_drawn_towards_their_start_by_hand():
    method = Learner()
    with torch.no_grad():
        method.weight.fill_(4.0)
        method.running.fill_(8.0)
        method.count += 3
    start = {"weight": torch.tensor([1.0, 2.0]), "running": torch.zeros(1), "count": torch.tensor(9), "frozen": torch.zeros(2)}
    blend = train.Interpolation(method, 0.25, start)
    with pytest.raises(KeyboardInterrupt), blend.applied():
        assert method.weight.tolist() == [3.25, 3.5] and method.running.item() == 6 and method.count == 3
        assert method.frozen.tolist() == [1, 1]
        raise KeyboardInterrupt
    assert method.weight.tolist() == [4, 4] and method.running.item() == 8
    del start["running"]  # what --init did not have is left as it was learned
    with train.Interpolation(method, 0.25, start).applied():
        assert method.weight.tolist() == [3.25, 3.5] and method.running.item() == 8
    assert train.Interpolation(method, 0.0, start).start == {}


def test_a_run_is_drawn_towards_its_start_and_resumes(tmp_path, monkeypatch):
    """Validated and saved is the blend, and the checkpoint keeps what training goes on with, and the start."""
    monkeypatch.chdir(tmp_path)
    seen, look = [], train.Validation.evaluate
    monkeypatch.setattr(train.Validation, "evaluate", lambda self, method: seen.append(
        {k: v.clone() for k, v in method.state_dict().items()}) or look(self, method))
    args = ["--method", "etp", "--data", "simulated:200", *TINY, "--epochs", "2", "--save-every", "5"]
    train.main([*args, "--name", "first"])
    args += ["--init", "runs/first", "--init-share", "0.3"]
    train.main([*args, "--name", "whole"])
    start, saved = (load_file(f"runs/{name}/model.safetensors") for name in ("first", "whole"))
    learned = torch.load("runs/whole/checkpoint.pt")["model"]
    for name, x in saved.items():
        assert torch.equal(x, seen[-1][name])
        expected = 0.3 * start[name] + 0.7 * learned[name] if x.is_floating_point() else learned[name]
        assert torch.allclose(x, expected, rtol=1e-5, atol=1e-7), name
    assert not torch.allclose(saved["project_ecg.weight"], learned["project_ecg.weight"])
    with pytest.MonkeyPatch.context() as patch:
        asked = []
        patch.setattr(train.Stop, "anywhere", lambda self: asked.append(0) or len(asked) > 7)
        train.main([*args, "--name", "part"])
    with pytest.raises(data.DataError, match="of a run with --init-share, .*: use that"):
        evaluation.load_run("runs/whole", "runs/whole/checkpoint.pt")
    shutil.rmtree("runs/first")  # the checkpoint has the start
    train.main(["--resume", "runs/part"])
    again = load_file("runs/part/model.safetensors")
    assert all(torch.equal(saved[k], again[k]) for k in saved)
    with pytest.raises(models.ModelError, match="--init-share is of the weights that --init names"):
        train.main(["--data", "simulated:200", "--init-share", "0.3"])


def test_weight_decay_is_on_matrices_only():
    """Of every tensor with more than one dimension it is written here whether it is a matrix."""
    plain = {"merl": ["pool.positions", "pool.cls"], "merl vit_tiny": ["ecg.positions"],
             "melp": ["beat_pool.query", "caption_pool.query"], "fgclep leadvit_tiny": ["ecg.lead", "ecg.positions"],
             "cmelt": ["ecg.place.parametrizations.weight.original0", "ecg.place.parametrizations.weight.original1"]}
    matrices = {"melp": ["project_beats", "decoder.vocabulary", "beat_pool.attention.q_proj_weight"], "merl": ["down.weight"],
                "cmelt": ["modality.weight", "fuse_ecg.0.self_attn.in_proj_weight"], "merl vit_tiny": ["view1.weight"],
                "fgclep leadvit_tiny": ["ecg.embed.1.weight"]}
    for name, none in plain.items():
        method, *encoder = name.split()
        config = small_config(method, dim=16, **({"encoder": encoder[0], "patch": 50} if encoder else {}))
        text = models.small_text_model(["sinus rhythm."] * 4, steps=1, dim=32, layers=1)
        method = models.build_method(config, text)
        names = {p: n for n, p in method.named_parameters()}
        with_decay, without = train.make_optimiser(method, config).param_groups
        decayed, other = ([names[p] for p in group["params"]] for group in (with_decay, without))
        assert with_decay["weight_decay"] > 0 and without["weight_decay"] == 0
        assert sorted(decayed + other) == sorted(n for n, p in method.named_parameters() if p.requires_grad)
        position = "text.lm.embeddings.position_embeddings.weight"
        assert {n for n in other if method.get_parameter(n).dim() > 1} == {*none, position}, name
        assert {*matrices[name], "text.lm.embeddings.word_embeddings.weight"} <= set(decayed)


def test_every_process_sees_its_share_of_the_same_batches(monkeypatch):
    config = small_config("etp", batch_size=8)
    store = SimpleNamespace(parts=[data.Part("x", 0, 200, 1)], set_of=lambda rows: np.zeros(len(rows), int))
    records = SimpleNamespace(store=store, rows=np.arange(100, 137), config=config)
    whole = list(train.keys(records, records.rows, 0, 3))[4:8]
    assert {key[:2] for key in whole} == {(0, 1)} and [list(k[2]) for k in train.keys(records, records.rows, 0, 2, 4)] == [
        list(k[2]) for k in whole]
    assert len(whole) == 4 and len({int(r) for key in whole for r in key[2]}) == 32
    monkeypatch.setattr(models, "world", lambda: 2)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(train.dist, "get_rank", lambda rank=rank: rank)
        parts.append(list(train.keys(records, records.rows, 0, 2, 4)))
    for key, a, b in zip(whole, *parts):
        assert np.array_equal(key[2], np.concatenate([a[2], b[2]]))


def test_text_units():
    tags = ["a", "b", "c"]
    assert train.sample_tags(tags, tags, "report", np.random.default_rng(0)) == tags
    assert all(len(train.sample_tags(tags, tags, "tag", np.random.default_rng(s))) == 1 for s in range(9))
    subsets = [train.sample_tags(tags, tags, "subset", np.random.default_rng(s)) for s in range(50)]
    assert {len(s) for s in subsets} == {1, 2, 3} and all(set(s) <= set(tags) and len(set(s)) == len(s) for s in subsets)


def drawn(ecg, peaks, dropped, steps):
    batch = models.Batch(torch.from_numpy(ecg), [], [], [], torch.tensor(peaks, dtype=torch.int32))
    return train.RawBatch(batch, torch.tensor(dropped), torch.tensor(steps))


def test_augmentation_moves_and_drops():
    """Record by record what data.shift and a zeroed lead make of it, and every peak where its sample went."""
    rng, steps = np.random.default_rng(0), [0, 3, -4, 10, -10, 25]
    ecg = rng.integers(1, 30000, (6, 12, 10)).astype(np.int16)
    dropped, peaks = rng.random((6, 12)) < 0.4, np.tile([1, 5, 9, -1], (6, 1))
    batch = train.augment(drawn(ecg, peaks, dropped, steps), torch.device("cpu"))
    for i, step in enumerate(steps):
        expected = ecg[i].astype(np.float32) / 1000
        expected[dropped[i]] = 0
        data.shift(expected, step)
        assert np.array_equal(batch.ecg[i].numpy(), expected) and not np.signbit(batch.ecg[i].numpy()).any()
        moved = [p + step for p in (1, 5, 9) if 0 <= p + step < 10]
        assert batch.peaks[i].tolist() == moved + [-1] * (4 - len(moved))
        for p in moved:
            assert (batch.ecg[i, :, p].numpy() == np.where(dropped[i], 0, ecg[i, :, p - step] / np.float32(1000))).all()


def test_what_is_random_about_a_record_is_its_own(tiny_store):
    """Not that of its batch, nor of the number of batches before."""
    store, config = data.open_data(f"store:{tiny_store}"), small_config("etp", lead_drop=0.5, shift=1.0)
    records = train.Records(store, data.report_tags(store), data.true_tags(store), config)
    one, other = records[0, 1, [4, 7, 9]], records[0, 1, [9, 4]]
    assert one.shifts.unique().numel() == 3 and one.shifts.abs().max() <= 100 and 0 < one.dropped.float().mean() < 1
    assert other.shifts.tolist() == [one.shifts[2], one.shifts[0]] and torch.equal(other.dropped, one.dropped[[2, 0]])
    assert other.batch.sampled == [one.batch.sampled[2], one.batch.sampled[0]]
    assert not torch.equal(records[0, 2, [4, 7, 9]].shifts, one.shifts)


def test_kept_features_join_the_tags_and_are_compared_with_the_truth(tmp_path, capsys):
    found = [(0, "a", True), (0, "b", False), (1, "a", True), (1, "c", True)]
    lines = [{"row": row, "id": str(row), "feature": feature, "cosine": 0.5, "kept": kept} for row, feature, kept in found]
    (tmp_path / "recovered.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    store = SimpleNamespace(records=pd.DataFrame({"features": [["a"], ["c", "d", "y"], ["e"]]}))
    tags = data.Tags.from_lists([["x"], ["y"], ["z"]])
    records = SimpleNamespace(store=store, tags=tags, config=small_config("fgclep"))
    enriched = train.enrich(records, [0, 1], tmp_path)
    assert list(enriched) == [["x", "a"], ["y", "a", "c"], ["z"]] and list(tags) == [["x"], ["y"], ["z"]]
    assert json.loads((tmp_path / "recovery.json").read_text()) == {
        "all candidates": {"features": 4, "precision": 0.5, "recall": 2 / 3},
        "kept by the filter": {"features": 3, "precision": 2 / 3, "recall": 2 / 3}}
    assert "4 candidates, 3 kept" in capsys.readouterr().out


def test_recovery_of_records_without_features_has_no_precision(tmp_path, capsys):
    """Of the two that candidates were made for, only the second has features to be compared with."""
    lines = [{"row": row, "id": str(row), "feature": "a", "cosine": 0.5, "kept": True} for row in (0, 1)]
    (tmp_path / "recovered.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    store = SimpleNamespace(records=pd.DataFrame({"features": [[], ["a", "b"], ["a"]]}))
    records = SimpleNamespace(store=store, tags=data.Tags.from_lists([["x"], ["y"], ["z"]]), config=small_config("fgclep"))
    train.enrich(records, [0, 1], tmp_path)
    found = json.loads((tmp_path / "recovery.json").read_text())
    assert found["kept by the filter"] == {"features": 1, "precision": 1.0, "recall": 0.5}
    (tmp_path / "recovery.json").unlink()
    (tmp_path / "recovered.jsonl").write_text(json.dumps(lines[0]) + "\n")
    capsys.readouterr()
    train.enrich(records, [0], tmp_path)
    assert "precision" not in capsys.readouterr().out and not (tmp_path / "recovery.json").exists()


def test_a_simulated_record_has_its_whole_truth(tiny_store):
    store = data.open_data(f"store:{tiny_store}")
    reports, truth, rows = data.report_tags(store), data.true_tags(store), [4, 7, 9]
    for unit in ("tags", "report"):
        batch = train.Records(store, reports, truth, small_config("fgclep", text_unit=unit))[0, 0, rows].batch
        for row, chosen, tags in zip(rows, batch.sampled, batch.tags):
            assert tags[:len(reports[row])] == reports[row] and set(tags) == {*reports[row], *truth[row]} and len(tags) == len(set(tags))
            more = chosen[len(reports[row]):]
            assert chosen[:len(reports[row])] == reports[row] and set(more) <= set(truth[row]) - set(reports[row])
            assert len(more) == len(set(more)) == (3 if unit == "tags" else 0)
        assert batch.exact == [True] * 3 and [len(part.exact) for part in batch.parts(2)] == [2, 1]
    plain = train.Records(store, reports, data.Tags.from_lists([()] * len(store)), small_config("fgclep"))[0, 0, rows].batch
    assert plain.tags == plain.sampled == [reports[row] for row in rows] and plain.exact == [False] * 3


TRUTH = ["--fine-epochs", "1", "--save-every", "3", *TINY, "--epochs", "1"]


def test_a_run_of_simulated_records_has_nothing_to_recover(tiny_store, tmp_path, monkeypatch, capsys):
    """The coarse stage takes the fine stage's epochs; stopped, it resumes to the same weights."""
    monkeypatch.chdir(tmp_path)
    args = ["--data", f"store:{tiny_store}", *TRUTH]
    train.main([*args, "--name", "whole"])
    assert "nothing is to be recovered: the coarse stage takes the 1 epochs of the fine one" in capsys.readouterr().out
    stages = [line["stage"] for line in lines_of(tmp_path / "runs/whole", "terms")]
    assert stages == ["coarse"] * (2 * (len(data.open_data(f"store:{tiny_store}").rows("train")) // 16))
    assert not (tmp_path / "runs/whole/recovered.jsonl").exists()
    with pytest.MonkeyPatch.context() as patch:
        asked = []
        patch.setattr(train.Stop, "anywhere", lambda self: asked.append(0) or len(asked) > 5)
        train.main([*args, "--name", "part"])
    train.main(["--resume", "runs/part"])
    a, b = (load_file(tmp_path / f"runs/{name}/model.safetensors") for name in ("whole", "part"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(data.DataError, match="--llm: all that is true of these records is known"):
        train.main([*args, "--llm", "x"])


def test_a_mixed_run_recovers_for_real_records_only(tmp_path, monkeypatch, capsys):
    from test_data import beats, table, write
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ECG_CACHE", str(tmp_path / "cache"))
    for i in range(24):
        write(tmp_path / f"r{i}", beats(seed=i))
    table(tmp_path / "list.csv", [dict(record=f"r{i}", report="left ventricular hypertrophy" if i % 2 else "atrial fibrillation",
                                       split="val" if i > 17 else "train") for i in range(24)])
    train.main(["--data", "csv:list.csv,simulated:64", *TRUTH, "--name", "mixed"])
    lines = [json.loads(line) for line in (tmp_path / "runs/mixed/recovered.jsonl").open()]
    assert {line["row"] for line in lines} == set(range(18)) and "precision" not in capsys.readouterr().out
    assert {line["stage"] for line in lines_of(tmp_path / "runs/mixed", "terms")} == {"coarse", "fine"}


def test_the_command_line_explains_itself(tmp_path, capsys):
    with pytest.raises(models.ModelError, match="unknown method"):
        train.parse(["--method", "clip"])
    assert train.parse(["--data", "ptbxl:a,csn:b", "--data", "simulated:9*2"])[0].data == "ptbxl:a,csn:b,simulated:9*2"
    with pytest.raises(SystemExit):
        train.parse(["--resume", "runs/x", "--lr", "1"])
    assert "drop --lr" in capsys.readouterr().err
    with pytest.raises(data.DataError, match="not a run folder"):
        train.parse(["--resume", str(tmp_path)])
    for content in ('{"method": "etp", "preset": "small", "gone": 1}', '{"method": "etp", "preset": "small"}'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(data.DataError, match="not of this version"):
            train.parse(["--resume", str(tmp_path)])
    with pytest.raises(data.DataError, match="not a run folder"):
        train.parse(["--resume", ""])  # an unset variable of a shell
    config, *_ = train.parse(["--method", "merl", "--preset", "paper", "--lr", "0.5"])
    assert (config.rate, config.dim, config.lr) == (500, 256, 0.5)


def test_a_corpus_of_which_no_text_is_held_out_ends_with_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    texts = [text for i in range(60) if zlib.crc32((text := f"sinus rhythm of record {i}").encode()) % 20]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    train.main(["--method", "cardiolm", "--data", "texts.txt", "--name", "lm", "--batch-size", "16", "--threads", "1", "--epochs", "1"])
    assert "masked words: no figure, since no text" in capsys.readouterr().out
    assert (tmp_path / "runs/lm/model.safetensors").exists() and models.load_text_model("runs/lm")


def test_a_language_model_of_ones_own(tiny_store, tmp_path, monkeypatch, capsys):
    """cardiolm learns from reports and text files, says how many hidden words it guesses, and is a --text-model of other runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "more.txt").write_text("\n".join(f"atrial fibrillation is the rhythm of record {i}" for i in range(60)))
    args = ["--batch-size", "16", "--threads", "1", "--epochs", "9"]
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
    update, config, parameters = bench_train.prepare(name, "small", torch.device("cpu"), 4, False)
    terms, norm, ids = update()
    assert len(ids) == 4 and norm > 0 and 0.1 < parameters < 10


# ---- several data sets, validation, a start from other weights ---------------------------------------------------------

def lines_of(run, key):
    return [line for line in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if key in line]


def test_several_data_sets_in_one_run(tiny_store, tmp_path, monkeypatch, capsys):
    """Training records of all, by their shares, mixed in batches; the log says how many of each."""
    monkeypatch.chdir(tmp_path)
    other = data.open_data("simulated:64")
    specs = f"store:{tiny_store},simulated:64*0.5"
    train.main(["--method", "etp", "--data", specs, "--name", "x", *TINY])
    facts = json.loads((tmp_path / "runs/x/training.json").read_text())
    store = data.open_data(f"store:{tiny_store}")
    number, more = len(store.rows("train")), len(other.rows("train"))
    assert facts["records_by_set"] == {f"store:{tiny_store}": number, "simulated:64": more} and facts["records"] == number + more
    assert len(lines_of(tmp_path / "runs/x", "terms")) == 3 * ((number + round(more / 2)) // 16)
    assert f"training records: {number} of store:{tiny_store}, {more} of simulated:64; " in capsys.readouterr().out
    both = data.open_all(specs)
    records = SimpleNamespace(store=both, rows=both.rows("train"), config=small_config("etp", batch_size=16))
    keys = list(train.keys(records, records.rows, 0, 2))
    sets = [set(both.set_of(rows)) for _, _, rows in keys]
    assert {0, 1} in sets and all(len(set(rows)) == 16 for _, _, rows in keys)
    halves = [{r for _, e, rows in keys if e == epoch for r in rows if r >= len(store)} for epoch in (0, 1)]
    assert halves[0] != halves[1]  # another half every epoch


def test_validation_sees_no_training_record_and_changes_nothing(tiny_store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen, figures = [], train.Validation.figures
    monkeypatch.setattr(train.Validation, "figures", lambda self, method: seen.append(self.rows) or figures(self, method))
    store = data.open_data("simulated:200")
    args = ["--method", "merl", "--data", "simulated:200", *TINY]
    train.main([*args, "--name", "a"])
    train.main([*args, "--name", "b", "--eval-every", "0"])
    train.main([*args, "--name", "c", "--eval-every", "2"])
    a, b = (load_file(tmp_path / f"runs/{name}/model.safetensors") for name in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a) and not lines_of(tmp_path / "runs/b", "validation")
    assert set(np.concatenate(seen)) == set(store.rows("val")) and len(store.rows("val")) > 4
    looks, updates = lines_of(tmp_path / "runs/a", "validation"), lines_of(tmp_path / "runs/a", "terms")
    assert len(looks) == 3 and len(lines_of(tmp_path / "runs/c", "validation")) == 2  # after two epochs, and at the end
    assert looks[-1]["update"] == updates[-1]["update"] and looks[0]["validation"]["auroc"].keys() == {"simulated"}


def test_validation_by_hand(tiny_store):
    """Retrieval and AUROC of vectors that say what the records are."""
    store = data.open_data("simulated:200")
    tags = data.report_tags(store)
    records = train.Records(store, tags, data.Tags.from_lists([()] * len(tags)), small_config("etp"))
    validation = train.Validation(records, torch.device("cpu"))
    rows = validation.rows
    assert sorted(rows) == store.rows("val").tolist()
    texts, own = np.unique([models.join(tags[row]) for row in rows], return_inverse=True)
    classes, labels, _ = data.label_matrix(store.records.iloc[rows], "simulated")
    size = len(texts) + len(classes)

    class Oracle(torch.nn.Module):
        """Of a report the axis of its text, of a prompt the axis of its class, of an ECG both its own."""
        class_score = models.Method.class_score

        def encode_text(self, said):
            prompts = data.class_prompts("simulated", classes, "descriptive")
            axis = {text: i for i, text in enumerate(texts)}
            place = [axis[t] if t in axis else next(len(texts) + c for c, row in enumerate(prompts) if t in row) for t in said]
            return models.TextViews(None, None, torch.eye(size)[place])
    ecg = np.concatenate([np.eye(len(texts))[own], 0.5 * labels], 1).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "embed_records", lambda *a: {"rhythm": ecg})
        found = validation.figures(Oracle())
        patch.setattr(evaluation, "embed_records", lambda *a: {"rhythm": -ecg})
        wrong = validation.figures(Oracle())
    assert found["R@1"] == found["R@5"] == 1 and found["auroc"] == {"simulated": 1.0} and found["texts"] == len(texts)
    assert wrong["R@1"] == 0 and wrong["auroc"] == {"simulated": 0.0}


def test_the_best_weights_are_kept_where_that_is_asked_for(tmp_path, monkeypatch, tiny_store):
    monkeypatch.chdir(tmp_path)
    losses, look = iter([3.0, 1.0, 2.0]), train.Validation.evaluate
    kept = []
    monkeypatch.setattr(train.Validation, "evaluate", lambda self, method: kept.append(
        {k: v.clone() for k, v in method.state_dict().items()}) or {**look(self, method), "loss": next(losses)})
    train.main(["--method", "etp", "--data", "simulated:200", "--name", "x", "--keep", "best", *TINY])
    weights, looks = load_file(tmp_path / "runs/x/model.safetensors"), lines_of(tmp_path / "runs/x", "validation")
    assert all(torch.equal(weights[k], kept[1][k]) for k in weights) and not torch.equal(
        kept[2]["project_ecg.weight"], kept[1]["project_ecg.weight"])
    assert json.loads((tmp_path / "runs/x/results.json").read_text())["kept"] == {
        "update": looks[1]["update"], "of": "train", "lowest validation loss": 1.0}
    with pytest.raises(data.DataError, match="--keep best: there is nothing to choose by"):
        train.main(["--method", "etp", "--data", f"store:{tiny_store}", "--keep", "best", "--eval-every", "0", *TINY])
    assert [run.name for run in (tmp_path / "runs").iterdir()] == ["x"]


def test_a_run_starts_from_the_weights_of_another(tmp_path, monkeypatch, capsys, tiny_store):
    """Also of another method, with the words of its tokenizer; what does not fit is named."""
    monkeypatch.chdir(tmp_path)
    made = []
    monkeypatch.setattr(train, "make_optimiser", lambda method, config, make=train.make_optimiser: made.append(
        {k: v.clone() for k, v in method.state_dict().items()}) or make(method, config))
    args = ["--data", f"store:{tiny_store}", *TINY]
    train.main(["--method", "fgclep", "--name", "first", *args])
    first = load_file(tmp_path / "runs/first/model.safetensors")
    capsys.readouterr()
    train.main(["--method", "merl", "--name", "second", "--init", "runs/first", "--normalise", "record", *args])
    out, second = capsys.readouterr().out, made[-1]
    same = {k for k in second if k in first and second[k].shape == first[k].shape}
    assert all(torch.equal(second[k], first[k]) for k in same) and {k for k in first if k.startswith(("ecg.", "text."))} <= same
    assert "--init " in out and "left as they were made: down.bias" in out and "project_ecg" in out
    assert "learned with --normalise mv: this run has record" in out and "--rate" not in out
    words = [json.loads((tmp_path / f"runs/{name}/tokenizer/tokenizer.json").read_text())["model"] for name in ("first", "second")]
    assert words[0] == words[1]
    with pytest.raises(models.ModelError, match="nothing of its ECG encoder fits a vit_tiny"):
        train.main(["--method", "etp", "--init", "runs/first", "--encoder", "vit_tiny", *args[:2], *SMALL])
    with pytest.raises(data.DataError, match="not a run folder"):
        train.main(["--method", "etp", "--init", "runs/none", *args])
    with open(tmp_path / "runs/first/tokenizer/tokenizer.json", "a") as file:
        file.write(" ")
    with pytest.raises(data.DataError, match="tokenizer.json: damaged, and the rest was made with it"):
        train.main(["--method", "etp", "--init", "runs/first", *args])


def test_a_start_with_another_language_model_takes_none_of_the_old(tmp_path, monkeypatch, capsys, tiny_store):
    """And a run that is resumed asks neither for it nor for the weights that it began with."""
    monkeypatch.chdir(tmp_path)
    args = ["--data", f"store:{tiny_store}", *TINY]
    (tmp_path / "words.txt").write_text("sinus rhythm\natrial fibrillation\n" * 3 + "left axis\nright axis\n")
    train.main(["--method", "cardiolm", "--data", "words.txt", "--name", "lm", "--epochs", "1", "--batch-size", "2"])
    train.main(["--method", "etp", "--name", "first", *args])
    first, made = load_file(tmp_path / "runs/first/model.safetensors"), []
    monkeypatch.setattr(train, "make_optimiser", lambda method, config, make=train.make_optimiser: made.append(
        {k: v.clone() for k, v in method.state_dict().items()}) or make(method, config))
    train.main(["--method", "etp", "--name", "second", "--init", "runs/first", "--text-model", "runs/lm", *args])
    assert "its language model is not that of --text-model, and is left out" in capsys.readouterr().out
    own = load_file(tmp_path / "runs/lm/language_model/model.safetensors")
    text = {k.removeprefix("text.lm."): v for k, v in made[0].items() if k.startswith("text.lm.")}
    assert text and all(torch.equal(v, own["bert." + k]) for k, v in text.items() if "bert." + k in own)
    assert torch.equal(made[0]["ecg.conv1.weight"], first["ecg.conv1.weight"])
    shutil.rmtree(tmp_path / "runs/lm")
    shutil.rmtree(tmp_path / "runs/first")
    train.main(["--resume", "runs/second"])


@pytest.mark.parametrize("method, flags", [("etp", ["--precision", "bf16"]), ("etp", ["--text-unit", "subset"])])
def test_validation_in_bf16_and_frozen_texts_that_cannot_be_listed(method, flags, tiny_store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.evaluation, "report", lambda *a, **k: None)
    train.main(["--method", method, "--data", f"store:{tiny_store}", "--name", "x", *TINY, *flags])
    assert 0 <= lines_of(tmp_path / "runs/x", "validation")[-1]["validation"]["R@5"] <= 1


def test_validation_asks_own_codes_of_own_records_only(tmp_path, monkeypatch):
    """As eval.py does: simulated records in the mixture have label sets of theirs."""
    from test_data import csv_source, table
    monkeypatch.setenv("ECG_CACHE", str(tmp_path / "cache"))
    source = csv_source(tmp_path / "src", 6)
    rows = [dict(record=f"r{i}", report="sinus rhythm", split="val" if i < 4 else "train", labels="SR" if i % 2 else "AFIB") for i in range(6)]
    table(source, rows)
    config = small_config("etp", data=f"csv:{source},simulated:256")
    asked = {name: (len(places), labels.shape[1]) for name, places, labels, _ in
             train.Validation(train.open_records(config), torch.device("cpu")).questions}
    assert asked["own"] == (4, 2) and asked["simulated"][0] > 4


def test_the_language_model_learns_at_a_rate_of_its_own():
    method = models.build_method(small_config("etp", text_trainable_layers=-1), models.small_text_model(["a b"] * 2, steps=1))
    groups = train.make_optimiser(method, small_config("etp", text_lr_scale=0.1)).param_groups
    names = {p: n for n, p in method.named_parameters()}
    for group in groups:
        assert {names[p].startswith("text.") for p in group["params"]} == {group["scale"] == 0.1}
    assert sum(len(group["params"]) for group in groups) == len(names) and len(groups) == 4


def test_a_frozen_text_tower_is_run_once(tiny_store, tmp_path, monkeypatch):
    """At the start for every tag, and never in a step; the training is what it was without keeping them."""
    monkeypatch.chdir(tmp_path)
    runs, encode, cache = {}, models.TextTower.encode, models.TextTower.cache
    monkeypatch.setattr(train.evaluation, "report", lambda *a, **k: None)
    for name in ("kept", "not"):
        calls = []
        monkeypatch.setattr(models.TextTower, "encode", lambda self, texts: calls.append(texts) or encode(self, texts))
        monkeypatch.setattr(models.TextTower, "cache", cache if name == "kept" else lambda *a: None)
        train.main(["--method", "etp", "--data", f"store:{tiny_store}", "--name", name, "--eval-every", "0", *TINY])
        runs[name] = calls, [line["loss"] for line in lines_of(tmp_path / "runs" / name, "terms")]
    assert len(runs["kept"][0]) == 1 and len(set(runs["kept"][0][0])) == len(runs["kept"][0][0]) > 20
    assert len(runs["not"][0]) == len(runs["not"][1]) > 10
    assert np.allclose(runs["kept"][1][:2], runs["not"][1][:2], rtol=1e-6)  # then AdamW enlarges the last bits


def test_losses_are_looked_at_some_updates_at_a_time(tiny_store, tmp_path, monkeypatch):
    """As on a GPU: the log is the same, and a loss that is not finite is found before weights are saved."""
    monkeypatch.chdir(tmp_path)
    args = ["--method", "etp", "--data", f"store:{tiny_store}", *TINY]
    train.main([*args, "--name", "each"])
    monkeypatch.setitem(train.LOG_EVERY, "cpu", 5)
    train.main([*args, "--name", "five"])
    logs = [[{**line, "seconds": 0} for line in lines_of(tmp_path / "runs" / name, "update")] for name in ("each", "five")]
    assert logs[0] == logs[1] and len(logs[0]) > 11
    info_nce, count = models.info_nce, []
    monkeypatch.setattr(models, "info_nce", lambda *a: count.append(0) or info_nce(*a) * (float("nan") if len(count) == 7 else 1))
    with pytest.raises(data.DataError, match="the loss is nan at update 7; records of its batch"):
        train.main([*args, "--name", "bad", "--save-every", "5", "--eval-every", "0"])
    assert torch.load(tmp_path / "runs/bad/checkpoint.pt")["update"] == 5


# ---- a method and an encoder of one's own ----------------------------------------------------------------------------

def own_file():
    """The method and the encoder in docs/fork.md."""
    method, encoder = re.findall(r"```python\n((?:from model|class Patches).*?)```", (ROOT / "docs/fork.md").read_text(), re.S)
    assert method.count("\n") <= 25
    return method + "\n\n" + encoder


def train_own(folder, store, monkeypatch, *flags):
    monkeypatch.chdir(folder)
    (folder / "my.py").write_text(own_file())
    train.main(["--method", "my.py:SigLIP", "--encoder", "my.py:Patches", "--data", f"store:{store}", *SMALL, *flags])


def test_a_method_and_an_encoder_of_ones_own(tiny_store, tmp_path, monkeypatch, capsys):
    """The run is evaluated and resumed with its copy of the file: that is gone, or was edited; another copy is refused."""
    train_own(tmp_path, tiny_store, monkeypatch, "--name", "own")
    run, config = tmp_path / "runs/own", json.loads((tmp_path / "runs/own/config.json").read_text())
    assert (config["method"], config["encoder"], config["batch_size"]) == ("my.py:SigLIP", "my.py:Patches", 16)
    assert models.configure("my.py:SigLIP").batch_size == 32 and (run / "my.py").read_text() == own_file()
    assert updates(run) and list(json.loads((run / "log.jsonl").read_text().splitlines()[0])["terms"]) == ["sigmoid"]
    (tmp_path / "my.py").write_text("edited = True")
    train.main(["--resume", "runs/own"])
    assert f"runs/own/my.py is used, of which the run was made; {tmp_path}/my.py has changed since" in capsys.readouterr().out
    (tmp_path / "my.py").unlink()
    shutil.move(run, tmp_path / "elsewhere")
    evaluation.main(["--zeroshot", "simulated", "--run", "elsewhere", "--data", f"store:{tiny_store}", "--split", "all"])
    assert "macro" in capsys.readouterr().out
    method, config = evaluation.load_run("elsewhere")
    assert type(method).__name__ == "SigLIP" and method.ecg.dim == 64 and method.encode_ecg(torch.zeros(2, 12, 1000)).tokens.shape == (2, 40, 64)
    (tmp_path / "elsewhere/my.py").write_text(own_file() + "# another")
    with pytest.raises(data.DataError, match="elsewhere/my.py: damaged, and the rest was made with it"):
        evaluation.load_run("elsewhere")


@pytest.mark.parametrize("method", ["etp", "merl", "melp", "fgclep"])
def test_an_encoder_of_ones_own_in_every_method(tiny_store, tmp_path, monkeypatch, method):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.py").write_text("from model import *\n\n" + own_file().split("\n\n\n")[-1])
    train.main(["--method", method, "--encoder", "my.py:Patches", "--data", f"store:{tiny_store}", *SMALL, "--name", "own", "--epochs", "1"])
    assert evaluation.load_run("runs/own")[0].ecg.dim == 64


def test_a_method_of_ones_own_begins_with_the_defaults_of_its_parent(tmp_path):
    (tmp_path / "my.py").write_text("import model\nclass A(model.MERL):\n    small = dict(dim=24)\nclass B(A):\n    paper = dict(dim=9)")
    config = models.configure(f"{tmp_path}/my.py:B")
    assert (config.dim, config.text_unit, config.epochs) == (24, "subset", 16)  # its own, and MERL's
    paper = models.configure(f"{tmp_path}/my.py:B", "paper", temperature=0.1)
    assert (paper.dim, paper.rate, paper.temperature) == (9, 500, 0.1)
    with pytest.raises(models.ModelError, match="--beats is a setting of melp, not of"):
        models.configure(f"{tmp_path}/my.py:B", beats="rpeak")


@pytest.mark.parametrize("code, spec, words", [
    (None, "my.py:X", "my.py:X: there is no file my.py"), ("x = 1", "my.py:X", "my.py has no class X made from model.Method"),
    ("class X: pass", "my.py:X", "my.py has no class X made from model.Method"),
    ("\n1 / 0", "my.py:X", "my.py: ZeroDivisionError: division by zero \\(my.py, line 2\\)"),
    ("class X", "my.py:X", "my.py: SyntaxError: expected ':' \\(my.py, line 1\\)"),
    ("import model\nclass X(model.Method):\n    small = dict(gone=1)", "my.py:X", "there is no setting 'gone'")])
def test_a_file_without_a_method_is_one_sentence(tmp_path, monkeypatch, code, spec, words):
    monkeypatch.chdir(tmp_path)
    if code:
        (tmp_path / "my.py").write_text(code)
    with pytest.raises(models.ModelError, match=words):
        models.configure(spec)


def test_an_encoder_of_ones_own_has_the_width_that_it_takes(tmp_path):
    text = own_file()
    (tmp_path / "my.py").write_text(text)
    (tmp_path / "wide.py").write_text(text.replace("leads, samples):", "leads, samples, width=9):").replace("dim = 64", "dim = int(64 * width)"))
    with pytest.raises(models.ModelError, match=r"--width is not a setting of --encoder .*my.py:Patches"):
        models.configure("etp", encoder=f"{tmp_path}/my.py:Patches", width=0.5)
    config = models.configure("etp", encoder=f"{tmp_path}/wide.py:Patches", width=0.5)
    assert models.configure(**models.settings_of(config) | {"encoder": config.encoder}) == config
    assert "patch" not in models.settings_of(config) and "width" not in models.settings_of(models.configure("cmelt"))
    assert models.build_encoder(config.encoder, 12, 1000, width=config.width, patch=config.patch).dim == 32


@pytest.mark.parametrize("forward, words", [
    ("ecg.mean(2)", r"E makes \(2, 12\) of ECGs \(2, 12, 1000\); it must be \(2, tokens, 5\)"),
    ("ecg", r"E makes \(2, 12, 1000\) of"), ("ecg[:1, :, :5]", r"E makes \(1, 12, 5\) of"),
    ("ecg @ ecg", r"--encoder E\(12, 1000\): RuntimeError: .* \(my.py, line 6\)")])
def test_an_encoder_that_makes_other_shapes_is_refused(tmp_path, forward, words):
    (tmp_path / "my.py").write_text("import torch\nclass E(torch.nn.Module):\n    dim = 5\n    def __init__(self, leads, samples):\n"
                                    f"        super().__init__()\n    def forward(self, ecg): return {forward}")
    with pytest.raises(models.ModelError, match=words):
        models.build_encoder(f"{tmp_path}/my.py:E", 12, 1000)
    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "my.py", tmp_path / "b/my.py")
    (tmp_path / "my.py").write_text("import model\nclass X(model.ETP): pass")
    with pytest.raises(models.ModelError, match="would be one file in the run: rename one"):
        models.configure(f"{tmp_path}/my.py:X", encoder=f"{tmp_path}/b/my.py:E")


# ---- flags -----------------------------------------------------------------------------------------------------------

def test_wandb_sees_the_log(tiny_store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen, fake = [], SimpleNamespace(run=None)
    fake.init = lambda **given: (seen.append(given), setattr(fake, "run", SimpleNamespace(log=lambda line, step: seen.append((step, line)))))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    args = ["--method", "etp", "--data", f"store:{tiny_store}", *TINY, "--epochs", "1"]
    train.main([*args, "--wandb", "hearts", "--name", "x"])
    lines = [json.loads(line) for line in (tmp_path / "runs/x/log.jsonl").read_text().splitlines()]
    assert (seen[0]["project"], seen[0]["name"], seen[0]["config"]["method"]) == ("hearts", "x", "etp")
    assert [json.loads(json.dumps(line)) for _, line in seen[1:]] == lines and [step for step, _ in seen[1:]] == [x["update"] for x in lines]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(models.ModelError, match="pip install wandb"):
        train.main([*args, "--wandb", "hearts"])


def test_help_is_grouped(capsys):
    with pytest.raises(SystemExit):
        train.parse(["--help"])
    groups = re.findall(r"^(\S.*):$", capsys.readouterr().out, re.M)
    assert groups[:6] == ["options", "common", "signal", "ECG encoder", "text tower", "optimisation"]
    assert "of melp" in groups[6:] and all(group.startswith("of ") for group in groups[6:])
    listed = {name: (title, note) for title, name, note in train.described()}
    assert list(listed.keys() ^ models.TYPES.keys()) == [] and listed["lr"][0] == "common"
    assert listed["as_published"][0] == "of cmelt, melp" and listed["as_published"][1].endswith("loses N3S's texts")
