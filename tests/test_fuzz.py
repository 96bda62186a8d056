"""Damaged files of every kind: one sentence (DataError, ModelError) or a right result, no hang, no flood of memory.

KINDS names how a sound file of each kind is made and how it is opened: add a line for a new kind.
"""
import contextlib
import io
import os
import resource
import shutil
import tempfile
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import eval as evaluation
import model as models
import train
from conftest import ROOT, SHARED
from test_data import beats, csv_source, mimic_tree, table, write
from test_sets import code_tree, headers

TRIALS = int(os.environ.get("FUZZ_TRIALS", 60))  # of a kind
SECONDS, MEMORY = 5, 400e6  # the longest that one may take; bytes that all may add
NASTY = [b"nan", b"-1", b"0", b"1e999", b"9" * 30, b"../x", b"\0", b"\xe4\xb5", b'"', b"{}", b"[[[", b"null",
         b"\n", b"\r", b";", b",", b"", b"\xff\xfe", b"\xef\xbb\xbf", b"# ", b"1" + b"0" * 12, b"~",
         b"True", b"\xe2\x80\xa8"]


def damage(content, rng):
    """Bytes with one to three faults: flipped, cut, inserted, doubled, tokens swapped or replaced."""
    for _ in range(rng.integers(1, 4)):
        at, kind = int(rng.integers(0, len(content) + 1)), rng.integers(0, 7)
        size = int(rng.integers(1, 40))
        if kind == 0 and at < len(content):
            content = content[:at] + bytes([content[at] ^ 1 << int(rng.integers(0, 8))]) + content[at + 1:]
        elif kind == 1:
            content = content[:at]
        elif kind == 2:
            content = content[:at] + rng.bytes(size) + content[at:]
        elif kind == 3:
            content = content[:at] + content[at + size:]
        elif kind == 4:
            content = content[:at] + content[at:at + size] + content[at:]
        else:
            mark = rng.choice([b" ", b",", b"\n", b"/", b'"'])
            tokens = content.split(mark)
            i, j = (int(k) for k in rng.integers(0, len(tokens), 2))
            other = NASTY[rng.integers(0, len(NASTY))]
            tokens[i], tokens[j] = (tokens[j], tokens[i]) if kind == 5 else (other, tokens[j])
            content = mark.join(tokens)
    return content


# ---- kinds: make(folder) -> the file to damage; open(folder, file) -> what it says -------------------------

def record(fmt, suffix):
    def make(folder):
        signal = beats(1500 if fmt == "16" else 1000, leads=8)
        path = write(folder / "r0", signal, fmt=fmt, fs=100, names=list(data.LEADS[-8:]))
        return path.with_suffix(suffix)
    return make, lambda folder, file: sound(*data.load_record(str(folder / "r0"), 100))


def sound(ecg, usable, notes):
    assert ecg.shape == (12, 1000) and ecg.dtype == np.int16 and not ecg[~np.asarray(usable)].any() and any(usable)
    return ecg.tolist(), list(usable)


def rows_of(source):
    def open_(folder, file):
        settings = data.settings_of(source, str(folder / "list.csv" if source == "csv" else folder), 100)
        rows = list(data.SOURCES[source](settings))
        kept = [row for row in rows if "skip" not in row]
        assert len({row["id"] for row in kept}) == len(kept)
        for row in kept:
            assert row["split"] in ("train", "val", "test") and row["patient"]
            assert all(map(data.WORD.search, row.get("statements", [])))
        data.survey(settings)
        return [str(row | {"changed": "when"}) for row in rows]
    return open_


def prepared(source):
    def open_(folder, file):
        shutil.rmtree(folder / "dst", ignore_errors=True)
        shutil.rmtree(folder / "dst.partial", ignore_errors=True)
        store = data.prepare(source, folder / "list.csv" if source == "csv" else folder, folder / "dst", workers=1)
        told = store.meta["dropped"], store.meta["warnings"]
        return [store.records.to_dict("records"), store.ecg(slice(None)).tolist(), *told]
    return open_


def own(folder):
    csv_source(folder, 2, "Sinus rhythm, normal axis. No ischemia")
    table(folder / "list.csv", [
        dict(record=f"r{i}", report="Sinus rhythm, \"normal\" axis", patient="7.0", split="", labels=label)
        for i, label in enumerate(('{"SR": 80.5}', "SR; NORM"))])
    return folder / "list.csv"


def mat(folder):
    path = write(folder / "r0", beats(1000), fs=100)
    raw = path.with_suffix(".dat").read_bytes()
    path.with_suffix(".mat").write_bytes(b"\0" * 24 + raw)
    path.with_suffix(".dat").unlink()
    head = path.with_suffix(".hea")
    head.write_text(head.read_text().replace("r0.dat 16", "r0.mat 16+24"))
    return path.with_suffix(".mat")


def ptbxl(name):
    def make(folder):
        shutil.copy(SHARED / "data" / "ptbxl" / "scp_statements.csv", folder)
        table(folder / "ptbxl_database.csv", [dict(
            ecg_id=i, patient_id=float(i), report="sinusrhythmus. normales ekg", strat_fold=i,
            scp_codes="{'NORM': 100.0, 'SR': 0.0}", filename_lr=f"r{i}", filename_hr=f"r{i}") for i in range(1, 9)])
        for i in range(1, 9):
            write(folder / f"r{i}", beats(1000), fs=100)
        return folder / name
    return make


def mimic(name):
    def make(folder):
        mimic_tree(folder)
        return folder / name
    return make


def with_codes(name):
    """CODE-test's files, or a folder of headers with codes."""
    def make(folder):
        if name == "ecg_tracings.hdf5" or name.startswith("annotations"):
            return code_tree(folder, 1, count=3)[0] / name
        headers(folder, {"E1": "#Age: 74\n#Sex: Male\n#Dx: 59118001,AF\n", "E2": ""})
        table(folder / "REFERENCE.csv", [dict(Recording="E2", First_label=1, Second_label=2, Third_label="")])
        return folder / name
    return make


def labelled(folder):
    (folder / "mine.json").write_text('{"AF": {"name": "atrial fibrillation", "prompts": ["atrial fibrillation"]}}')
    return folder / "mine.json"


def store(name):
    def make(folder):
        return folder / "dst" / name if data.prepare("csv", own(folder), folder / "dst") else None
    return make


def opened(folder, file):
    kept = data.Store(folder / "dst")
    kept.verify()
    return [kept.records.to_dict("records"), kept.ecg(slice(None)).tolist(), kept.meta]


def unfinished(folder):
    """A store in the making, as a killed run leaves it."""
    data.prepare("csv", own(folder), folder / "kept")
    (folder / "kept").rename(folder / "kept.partial")
    state = data.read_state(str(folder / "kept.partial"), finished=False)
    data.write_state(str(folder / "kept.partial"), state | dict(complete=False))
    return folder / "kept.partial" / "store.json"


def gone_on(folder, file):
    content = file.read_bytes()
    shutil.rmtree(folder / "dst.partial", ignore_errors=True)
    shutil.rmtree(folder / "dst", ignore_errors=True)
    shutil.copytree(folder / "kept.partial", folder / "dst.partial")
    assert (folder / "dst.partial" / "store.json").read_bytes() == content
    return data.prepare("csv", folder / "list.csv", folder / "dst", workers=1).records.to_dict("records")


def knowledge(folder):
    return shutil.copy(ROOT / "prompts.json", folder / "prompts.json")


def read_knowledge(folder, file):
    table = data.read_knowledge(str(file))
    data.Translator(table["lexicon"], [("sinus rhythm", "sinus rhythm")])("sinusrhythmus. normales ekg")
    return str(table)


@lru_cache
def finished_run():
    """A small FG-CLEP run of both stages."""
    folder, before = Path(tempfile.mkdtemp()), os.getcwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ECG_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        train.main("--data simulated:64 --width 0.125 --dim 8 --mlm-steps 2 --batch-size 16 --epochs 1 --fine-epochs 1 --targets reports "
                   "--threads 1 --name run".split())
    assert os.getcwd() == before
    return folder / "runs" / "run"


def run_file(name):
    return lambda folder: shutil.copytree(finished_run(), folder / "run", dirs_exist_ok=True) / name


def evaluated(folder, file):
    method, config = evaluation.load_run(folder / "run")
    evaluation.known_results(folder / "run")
    weights = evaluation.crc_of_tensors(method.state_dict())
    return weights, method.text.tokenizer.tokenize("sinus rhythm"), vars(config)


def resumed(folder, file):
    """What train.py reads of a run that it is to continue."""
    config, run, _ = train.parse(["--resume", str(folder / "run")])
    state = train.read_checkpoint(run, config.save_every)
    method = models.build_method(config, models.rebuild_text_model(run / "tokenizer"))
    update = train.restore(state, run, method, train.make_optimiser(method, config))
    log = [line for line in evaluation.read_log(run) if line["update"] <= update]
    recovered = data.read_lines(run / "recovered.jsonl", {"row": int, "feature": str, "kept": bool})
    return evaluation.crc_of_tensors(method.state_dict()), recovered, log


def compared(folder, file):
    data.read_json(folder / "run" / "training.json", evaluation.FACTS)
    return evaluation.known_results(folder / "run")


def checkpoint(suffix):
    def make(folder):
        state = evaluation.read_tensors(finished_run() / "model.safetensors")[0]
        path = folder / f"w.{suffix}"
        torch.save(state, path) if suffix == "pt" else train.save_file(state, path)
        return path
    return make, lambda folder, file: evaluation.load_run(finished_run(), file)[0].state_dict().keys()


def prompts(folder):
    file = folder / "p.json"
    file.write_text('{"SR": ["sinus rhythm", "regular rhythm"], "AFIB": "atrial fibrillation", "PACE": "pacemaker"}')
    return file


def asked(folder, file):
    texts = data.class_prompts("ptbxl_rhythm", ["SR", "AFIB", "PACE"], str(file))
    assert len(texts) == 3 and all(row and all(text.strip() for text in row) for row in texts)


def text_model(name):
    def make(folder):
        tokenizer = models.word_tokenizer(["sinus rhythm with atrial fibrillation"] * 3)
        lm, _ = models.new_bert(["sinus rhythm"] * 2, dim=8, layers=1)
        lm.bert.resize_token_embeddings(len(tokenizer))
        lm.bert.save_pretrained(folder / "lm")
        tokenizer.save_pretrained(folder / "lm")
        return folder / "lm" / name
    return make, lambda folder, file: models.TextTower(*models.load_text_model(str(folder / "lm")))(["sinus rhythm"]).shape


RUNS = {  # the same of what train.py and eval.py read
    "config.json": (run_file("config.json"), evaluated, False), "weights": (run_file("model.safetensors"), evaluated, True),
    "tokenizer": (run_file("tokenizer/tokenizer.json"), evaluated, True), "results.json": (run_file("results.json"), compared, False),
    "training.json": (run_file("training.json"), compared, False), "checkpoint": (run_file("checkpoint.pt"), resumed, True),
    "log": (run_file("log.jsonl"), resumed, False), "recovered": (run_file("recovered.jsonl"), resumed, True),
    "config.json to resume": (run_file("config.json"), resumed, False), "--ckpt .pt": (*checkpoint("pt"), False),
    "--ckpt .safetensors": (*checkpoint("safetensors"), False), "--prompts": (prompts, asked, False),
    "text model's config": (*text_model("config.json"), False), "its tokenizer": (*text_model("tokenizer.json"), False),
    "its weights": (*text_model("model.safetensors"), False)}
KINDS = {  # kind: make, open, and whether any other result than the undamaged one is wrong
    "header": (*record("16", ".hea"), False), "signal": (*record("16", ".dat"), False),
    "header of 212": (*record("212", ".hea"), False), "signal in FLAC": (*record("516", ".dat"), False),
    "signal of 24": (*record("24", ".dat"), False), ".mat": (mat, record("16", ".mat")[1], False),
    "csv": (own, rows_of("csv"), False), "csv, prepared": (own, prepared("csv"), False),
    "ptbxl_database.csv": (ptbxl("ptbxl_database.csv"), rows_of("ptbxl"), False),
    "scp_statements.csv": (ptbxl("scp_statements.csv"), rows_of("ptbxl"), False),
    "record_list.csv": (mimic("record_list.csv"), rows_of("mimic"), False),
    "machine_measurements.csv": (mimic("machine_measurements.csv"), rows_of("mimic"), False),
    "REFERENCE.csv": (with_codes("REFERENCE.csv"), rows_of("georgia"), False),
    "tracings": (with_codes("ecg_tracings.hdf5"), rows_of("code"), False),
    "annotations": (with_codes("annotations/gold_standard.csv"), rows_of("code"), False),
    "label set": (labelled, lambda folder, file: str(data.label_set(str(file))), False),
    "store.json": (store("store.json"), opened, True), "records.csv": (store("records.csv"), opened, True),
    "ecg.i16": (store("ecg.i16"), opened, True), "unfinished store": (unfinished, gone_on, True),
    "prompts.json": (knowledge, read_knowledge, False), **RUNS}


@pytest.mark.parametrize("kind", KINDS)
def test_damaged(kind, tmp_path):
    if "ptbxl" in kind or "scp" in kind:
        if not (SHARED / "data" / "ptbxl").is_dir():
            pytest.skip("no PTB-XL here")
    make, open_, strict = KINDS[kind]
    file = make(tmp_path)
    good, expected = file.read_bytes(), open_(tmp_path, file)
    before, refused = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
    for seed in range(TRIALS // 4 if kind == "prompts.json" or kind in RUNS else TRIALS):  # these take long to read
        bad = damage(good, np.random.default_rng(seed))
        file.write_bytes(bad)
        started = time.monotonic()
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                result = open_(tmp_path, file)
        except (data.DataError, models.ModelError) as error:
            assert str(error).strip() and "\n" not in str(error).strip(), f"{kind}, seed {seed}: no sentence: {error}"
            refused += 1
        except Exception as error:
            raise AssertionError(f"{kind}, seed {seed}: {bad[:300]}") from error
        else:
            assert not strict or result == expected or bad == good, f"{kind}, seed {seed}: another result"
        assert time.monotonic() - started < SECONDS, f"{kind}, seed {seed}: hangs"
        file.write_bytes(good)
    assert refused, "what is damaged is refused"
    assert open_(tmp_path, file) == expected
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY
