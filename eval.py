"""Evaluation: python eval.py --zeroshot ptbxl   (newest run; or --run runs/NAME, or --ckpt FILE)

    --zeroshot SET...  classes told apart by their texts alone     --retrieve SET...  ECG -> report, report -> ECG
    --probe SET...     a linear classifier on the vectors          --identify SET...  whose second record is it?
    --transfer         probe and texts from one set to another     --generate         reports written (melp)
    --finetune SET...  encoder and classifier trained with labels  --embed SET...     just the vectors (npz)
    --compare RUN...   any of these over runs and seeds, one table --look RECORD TEXT...  where a text is seen

Tables are printed, and written with pictures into the run: results.json has an entry for each task, set and options.
Test rows are the official test split (PTB-XL: fold 10) unless --folds or --split says otherwise; nothing is ever
chosen on them. A task is one function and a line in TASKS.
"""
import argparse
import contextlib
import copy
import itertools
import json
import math
import os
import re
import sys
import textwrap
import zipfile
import zlib
from collections import Counter
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import average_precision_score, log_loss, precision_recall_curve, roc_auc_score
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

import data
import model as models
from csrc import beat_of_token, segment_beats

GROUPS = {"ptbxl": ("ptbxl_super", "ptbxl_sub", "ptbxl_form", "ptbxl_rhythm")}  # names for several label sets
RESAMPLES = 1000  # of the bootstrap, and of the permutations
ENOUGH = 10       # positives a class needs for an interval and for the second mean (fewer: a lottery)
FACTS = {"records_per_second": float, "parameters": float, "warnings": [str]}  # what is read of training.json
NO_MATTER = ("name", "seed", "threads", "workers", "save_every", "compile")  # in which repetitions may differ
DEFAULTS = dict(data=(), prompts="descriptive", scales=None, folds=None, split="test", leads=None,
                derive_leads=False, noise=None, control=None, ratios=(0.01, 0.1, 1.0), shots=None, protocol="grid",
                epochs=10, beams=1, checkpoint=None, text_model="", device="cpu")


# ---- runs and their weights ----------------------------------------------------------------------------------

def newest_run(folder="runs"):
    """The finished run of `folder` that was written last. Errors: DataError where there is none."""
    runs = sorted(Path(folder).glob("*/model.safetensors"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise data.DataError(f"no finished run in {folder}/: train one first (python train.py), or name one "
                             "with --run")
    return runs[-1].parent


def read_config(run):
    """(Config, what made it: a dictionary) of a run folder. Errors: DataError where there is none, or another
    version's."""
    path = Path(run) / "config.json"
    if not path.exists():
        raise data.DataError(f"{run}: not a run folder (no config.json)")
    found = data.read_json(path, {"method": str, "preset": str, str: (str, int, float, bool, dict)})
    made_by = found.pop("made_by", {})
    try:
        config = models.configure(**found)
        if lacking := sorted(models.settings_of(config).keys() - found.keys()):
            raise models.ModelError(f"there is no {lacking[0]!r}")
        data.check(made_by, dict.fromkeys(("program", "torch", "csrc", "store"), str), "made_by")
    except (models.ModelError, data.DataError) as error:
        raise data.DataError(f"{path}: not of this version of the program, {models.VERSION}, or changed by "
                             f"hand ({error}); use the version that made it, or train anew") from error
    return config, made_by


def checksums(folder, patterns):
    """{path in the folder: crc32} of the files that match."""
    paths = sorted(path for pattern in patterns for path in Path(folder).glob(pattern) if path.is_file())
    return {path.relative_to(folder).as_posix(): checksum(path, path.stat().st_mtime_ns) for path in paths}


@lru_cache(64)
def checksum(path, changed):
    """crc32 of a file, read once as long as it does not change."""
    return data.crc_of(str(path))


def compare_checksums(folder, known):
    """Errors: DataError where a file is not the one whose checksum is known."""
    for name, crc in known.items():
        path = Path(folder) / name
        if checksums(folder, [name]).get(name) != crc:
            fault = "damaged" if path.exists() else "missing"
            raise data.DataError(f"{path}: {fault}, and the rest was made with it; restore it, or train anew")


def save_weights(method, run):
    """model.safetensors of a run, with checksums of its tensors and of the tokenizer."""
    state = {k: v.cpu().clone(memory_format=torch.contiguous_format)  # tied tensors are written twice
             for k, v in method.state_dict().items()}
    facts = {"tensors": crc_of_tensors(state), "files": json.dumps(checksums(run, ["tokenizer/*"]))}
    data.write_atomic(Path(run) / "model.safetensors", lambda path: save_file(state, path, facts))


def crc_of_tensors(state):
    """A checksum of named tensors, as text."""
    crc = 0
    for name in sorted(state):
        bytes_of = state[name].cpu().contiguous().flatten().view(torch.uint8).numpy()
        crc = zlib.crc32(bytes_of, zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"


@contextlib.contextmanager
def reading(path):
    """Whatever keeps a file of weights from being read is a DataError that says what to do."""
    try:
        yield
    except Exception as error:  # pickle, zipfile, torch and safetensors fail in many ways on a damaged file
        head = b""
        with contextlib.suppress(OSError), data.open_file(path) as file:
            head = file.read(40)
        fault = f"{type(error).__name__}: {models.first_line(error)[:150]}"
        fault = f"damaged, cut off, or no tensors that can be loaded safely ({fault}); restore it, or train anew"
        if head.startswith(b"version https://git-lfs"):
            fault = "a Git LFS pointer, not the file itself; fetch it with: git lfs pull"
        elif isinstance(error, OSError) and error.strerror:
            fault = error.strerror
        raise data.DataError(f"{path}: {fault}") from error


def read_torch(path):
    """What torch.save wrote; nothing but tensors and plain values is unpickled, and the file's checksums
    hold. Errors: DataError."""
    with reading(path), data.open_file(path) as file:
        with zipfile.ZipFile(file) as archive:  # torch.load does not look at them
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} has another checksum")
        file.seek(0)
        state = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise data.DataError(f"{path}: holds other things than named tensors")
    return state


def read_tensors(path):
    """(named tensors, metadata) in a file of torch or safetensors, or in a training checkpoint. Errors:
    DataError."""
    facts = {}
    if Path(path).suffix == ".safetensors":
        with reading(path):
            data.open_file(path).close()
            with safe_open(path, "pt") as file:
                state, facts = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
            if facts.get("tensors", crc := crc_of_tensors(state)) != crc:
                raise ValueError("the weights have another checksum")
    else:
        state = read_torch(path)
    for key in ("state_dict", "model", "model_state_dict"):  # what surrounds weights in a training checkpoint
        if isinstance(state.get(key), dict):
            state = state[key]
    if not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise data.DataError(f"{path}: holds other things than named tensors")
    wrapped = bool(state) and all(name.startswith("module.") for name in state)  # DistributedDataParallel's
    return {name.removeprefix("module.") if wrapped else name: value for name, value in state.items()}, facts


def load_run(run, checkpoint=None, device="cpu", text_model=""):
    """(method in eval mode, its config) of a run folder. checkpoint: other weights than its model.safetensors,
    or NAME:FILE as the authors published them, for which the run does not matter (open_published).
    Errors: DataError, ModelError."""
    if found := publication(checkpoint):
        return open_published(*found, text_model, device)
    run, (config, _) = Path(run), read_config(run)
    weights = Path(checkpoint or run / "model.safetensors")
    if not weights.exists():
        advice = f": the run did not finish; continue it with: python train.py --resume {run}"
        raise data.DataError(f"{weights} is missing{'' if checkpoint else advice}")
    if config.method == "cardiolm":
        raise models.ModelError(f"{run} is a language model without an ECG encoder: give it to another run "
                                f"with --text-model {run}")
    state, facts = read_tensors(weights)
    if not checkpoint:
        compare_checksums(run, json.loads(facts.get("files", "{}")))
    method = models.build_method(config, models.rebuild_text_model(run / "tokenizer"))
    try:
        method.load_state_dict(state)
    except RuntimeError as error:
        fault = " ".join(str(error).split())[:300]
        raise data.DataError(f"{weights}: not of {run / 'config.json'}: {fault}") from error
    return method.to(device).eval(), config


# ---- published checkpoints -----------------------------------------------------------------------------------
# --ckpt merl:FILE, melp:FILE, dbeta:FILE. weights.json: names in the authors' state dictionaries -> ours; *
# stands for anything, the same on both sides in order. A name with +0, +1, +2 is a part (query, key, value)
# of a larger tensor of ours; "-" is what neither training nor zero-shot here has a use for. "optional": what
# a file may lack. D-BETA's T5 sees no attention mask, but one text at a time has no padding: that is our
# tower with its mask, in any batch.

@lru_cache
def published():
    """weights.json: {kind: {"method", "optional", "names"}}."""
    shape = {"method": str, "optional": [str], "names": {str: str}}
    return data.read_json(Path(__file__).with_name("weights.json"), {str: shape})


WRAPPER = re.compile(r"^((module|model)\.)*(ecg_encoder\.(?=ecg_encoder\.|attn_pool|ln_c|proj_contrast|bn\.)"
                     r"|\w*decoder\.(?=resblocks|cross_attn|ln_final|text_proj))?")
DROPPED = ("text.lm.pooler.", "text.lm.embeddings.position_ids")  # of a language model, that a tower may lack


def publication(checkpoint):
    """"merl:FILE" -> ("merl", "FILE"), None for any other checkpoint."""
    kind, colon, file = str(checkpoint or "").partition(":")
    return (kind, file) if colon and kind in published() else None


def rename(state, names):
    """The authors' state dictionary -> ours by names {theirs: ours}. Errors: ModelError with unknown names."""
    rules = [(re.compile(re.escape(theirs).replace(r"\*", "(.*?)")), ours.split("*"))
             for theirs, ours in names.items()]
    parts, unknown = {}, []
    for theirs, value in state.items():
        bare = WRAPPER.sub("", theirs)
        match, ours = next(((m, ours) for pattern, ours in rules if (m := pattern.fullmatch(bare))), (0, 0))
        if not match:
            unknown.append(theirs)
        elif ours != ["-"]:
            pieces = itertools.zip_longest(ours, match.groups(), fillvalue="")
            name, _, part = "".join(itertools.chain(*pieces)).partition("+")
            parts.setdefault(name, {})[part] = value
    if unknown:
        raise models.ModelError(f"{len(unknown)} unexpected names in the checkpoint: {', '.join(unknown[:10])}")
    return {name: found[""] if "" in found else torch.cat([found[part] for part in sorted(found)])
            for name, found in parts.items() if "" in found or len(found) == 3}  # else it counts as missing


def load_published(method, state, kind):
    """Fill a method with the authors' weights, kind a key of published(). Errors: ModelError that names what
    is missing, unknown or misshapen."""
    given = rename(state, published()[kind]["names"])
    ours = {k: v for k, v in method.state_dict().items() if not k.endswith("num_batches_tracked")}
    unused = {k for k in given.keys() - ours.keys() if k.startswith(DROPPED)}
    if unexpected := sorted(given.keys() - ours.keys() - unused):
        raise models.ModelError(f"this {method.config.method} has no place for {', '.join(unexpected[:10])}")
    optional = tuple(published()[kind]["optional"])
    if missing := sorted(k for k in ours.keys() - given.keys() if not k.startswith(optional)):
        raise models.ModelError(f"the checkpoint lacks {len(missing)} weights, such as {', '.join(missing[:10])}")
    shape = lambda x: [n for n in x.shape if n > 1]  # the authors have more axes of length 1
    if misshapen := sorted(k for k in given.keys() & ours.keys() if shape(given[k]) != shape(ours[k])):
        raise models.ModelError("other sizes than this method's: " + ", ".join(
            f"{k} {tuple(given[k].shape)} for {tuple(ours[k].shape)}" for k in misshapen[:5]))
    method.load_state_dict({k: given[k].reshape(ours[k].shape) for k in given.keys() - unused}, strict=False)
    return method


def open_published(kind, file, text_model="", device="cpu"):
    """(method in eval mode, its config) of an authors' checkpoint, with the paper's preset; text_model: where
    the tokenizer and the shape of the text tower are, if not on the hub under the published name. Errors:
    ModelError, DataError."""
    if kind not in published():
        raise models.ModelError(f"no published checkpoint {kind!r}; known: {', '.join(published())}")
    state, _ = read_tensors(file)
    width = lambda ending, axis=0: next((v.shape[axis] for k, v in state.items() if k.endswith(ending)), 0)
    config = models.configure(published()[kind]["method"], "paper", data="")  # it brings none
    config.text_model = text_model or config.text_model
    if kind == "merl":
        vits = {dim: name for name, (dim, _, _) in models.ViT1d.SIZES.items()}
        resnet = "resnet50" if width("downconv.weight", 1) == 2048 else "resnet18"
        vit = width("to_patch_embedding.weight")
        config.encoder = f"vit_{vits.get(vit, 'tiny')}" if vit else resnet
    lm, tokenizer = models.load_text_model(config.text_model)
    if kind == "melp":
        config.beat_queries = width("attn_pool_contrast.query") or config.beat_queries
        tokenizer.add_special_tokens({"bos_token": "[BOS]"})  # in place of [CLS], which goes to the end
        if len(tokenizer) > lm.config.vocab_size:
            lm.resize_token_embeddings(len(tokenizer))
    method = load_published(models.build_method(config, (lm, tokenizer)), state, kind)
    if kind in ("merl", "melp"):  # trained with MIMIC-IV-ECG's order of leads: aVF before aVL
        first = next(m for m in method.ecg.modules() if isinstance(m, torch.nn.Conv1d))
        first.weight.data = first.weight.data[:, [0, 1, 2, 3, 5, 4, 6, 7, 8, 9, 10, 11]].clone()
    return method.to(device).eval(), config


# ---- what is asked: a run, records, signals, vectors ---------------------------------------------------------

class Run(NamedTuple):
    """A trained model. crc: a checksum of its weights."""
    folder: Path
    method: models.Method
    config: models.Config
    device: str
    crc: str


def open_run(folder, ask):
    method, config = load_run(folder, ask.checkpoint, ask.device, ask.text_model)
    return Run(Path(folder), method, config, ask.device, crc_of_tensors(method.state_dict()))


@lru_cache(8)
def open_store(spec, rate):
    return data.open_data(spec, rate)


def source_of(store):
    return str(store.records["source"].iloc[0]) if len(store) else ""


def find_store(name, config, specs=()):
    """The store that answers a label set: of several data specs the one of the set's source, a single one
    whatever it holds; else the run's own data, if they are of that source; else, for PTB-XL, what is in
    $PTBXL or data/ptbxl, and the default simulated records. Errors: DataError where there is none."""
    source = name.split("_")[0]
    kind = lambda spec: (source_of(open_store(spec, config.rate)) if spec.startswith("store:") else
                         spec.partition(":")[0])
    if specs:
        fitting = [spec for spec in specs if kind(spec) == source] or list(specs) * (len(specs) == 1)
        if len(fitting) != 1:
            raise data.DataError(f"{len(fitting)} of the data named with --data are of {name}: "
                                 f"{', '.join(specs)}; name one")
        return open_store(fitting[0], config.rate)
    anything = source in ("own", "age", "sex") or name.endswith(".json")
    if config.data and (anything or config.data.partition(":")[0] in ("store", source)):
        store = open_store(config.data, config.rate)
        if anything or source_of(store) == source:
            return store
    if source == "simulated":
        return open_store("simulated", config.rate)
    if source not in ("ptbxl", "age", "sex"):
        raise data.DataError(f"{name}: where are its records? Say it with --data SOURCE:PATH")
    place = os.environ.get("PTBXL", os.path.join("data", "ptbxl"))
    if not os.path.exists(os.path.join(place, "ptbxl_database.csv")):
        raise data.DataError(f"PTB-XL is not in {place}: download it from https://physionet.org/content/ptb-xl/ "
                             "(3 GB, free, CC BY 4.0) and say where it is with --data ptbxl:PATH")
    return open_store(f"ptbxl:{place}", config.rate)


def sets_of(store):
    """Label sets that a store's test records can answer: those named as its source, or all codes that occur;
    none where no test record has a label."""
    source, records = source_of(store), store.records[store.records["split"] == "test"]
    names = GROUPS.get(source) or [name for name in data.LABEL_SETS if name in (source, source + "_test")] or ["own"]
    return [name for name in names if len(records) and data.label_matrix(records, name)[2].any()]


def test_rows(store, ask=SimpleNamespace(**DEFAULTS)):
    """Row numbers of a store's test records, or of the folds or the split that is asked for. Errors: DataError
    where there are none."""
    records, folds = store.records, ask.folds
    if folds and not records["fold"].any():
        raise data.DataError(f"{store.path}: these records have no folds: leave out --folds")
    where = records["fold"].isin(folds) if folds else (records["split"] == ask.split) | (ask.split == "all")
    rows = np.flatnonzero(where)
    if not len(rows):
        wanted = f"fold {', '.join(map(str, folds))}" if folds else f"the {ask.split} split"
        raise data.DataError(f"{store.path}: holds no record of {wanted}; name folds with --folds, another "
                             "--split, or other records with --data")
    return rows


class Labelled(NamedTuple):
    """Records of one split that have a label of a set."""
    rows: np.ndarray      # (R,) row numbers in the store
    labels: np.ndarray    # (R, C) bool; age: years
    patients: np.ndarray  # (R,)


class Question(NamedTuple):
    """A label set on a store."""
    store: data.Store
    classes: list
    train: Labelled
    val: Labelled  # what a setting is chosen by; never test rows
    test: Labelled


def labels_of(records, name):
    """Class names (C), labels (R, C), keep (R,): data.label_matrix, and two sets that are no diagnoses."""
    if name == "sex":
        return ["female"], (records["sex"] == "F").to_numpy()[:, None], records["sex"].isin(["F", "M"]).to_numpy()
    if name == "age":
        age = pd.to_numeric(records["age"], errors="coerce").to_numpy(float)
        return ["age"], age[:, None], np.isfinite(age)
    return data.label_matrix(records, name)


def ask_set(name, config, ask):
    """Question of a label set. Validation rows are the val split; where that is tested, an eighth of the
    training patients by a hash. Errors: DataError where no test record has a label."""
    store = find_store(name, config, ask.data)
    classes, labels, keep = labels_of(store.records, name)
    patients, split = store.records["patient"].to_numpy(), store.records["split"].to_numpy().copy()
    tested = np.isin(np.arange(len(store)), test_rows(store, ask))
    if not (keep & ~tested & (split == "val")).any():
        held = [data.split_by(str(patient), 7 / 8, 1 / 8) == "val" for patient in patients]
        split[(split == "train") & np.array(held, bool)] = "val"
    parts = [np.flatnonzero(keep & where) for where in
             (~tested & (split == "train"), ~tested & (split == "val"), tested)]
    if not len(parts[2]):
        raise data.DataError(f"{store.path}: no record to evaluate has a label of {name}")
    return Question(store, classes, *(Labelled(rows, labels[rows], patients[rows]) for rows in parts))


def signals(store, rows, ask):
    """ECGs of rows (B, 12, N) float32 mV: as stored, or with noise, fewer leads, or a control in their place."""
    if ask.control == "other":  # another record of the same store, the same one whenever it is asked
        order = np.random.default_rng(0).permutation(len(store))
        rows, drawn = np.roll(order, 1)[np.argsort(order)][rows], rows
    else:
        drawn = rows
    ecg = store.ecg(rows)
    if ask.control == "zero":
        ecg[:] = 0
    if ask.noise is not None:
        for x, row in zip(ecg, drawn):
            x += noise_like(x, store.rate, ask.noise, np.random.default_rng((0, row)))
    if ask.leads:
        kept = [data.lead_index(lead) for lead in ask.leads]
        ecg[:, [i for i in range(12) if i not in kept]] = 0
        if ask.derive_leads:  # Einthoven, Goldberger
            one, two = ecg[:, 0], ecg[:, 1]
            ecg[:, 2:6] = np.stack([two - one, -(one + two) / 2, one - two / 2, two - one / 2], 1)
    return ecg


def noise_like(ecg, rate, decibel, rng):
    """Baseline wander (0.05 to 0.5 Hz), mains (50 Hz, where the rate can show it) and white noise, of equal power,
    this much below the signal's: ecg (12, N) mV -> noise (12, N) mV; none in leads that are flat."""
    time, shape = np.arange(ecg.shape[1]) / rate, (len(ecg), 1)
    phase = lambda: rng.uniform(0, 2 * np.pi, shape)
    parts = [sum(np.sin(2 * np.pi * rng.uniform(0.05, 0.5, shape) * time + phase()) for _ in range(3)),
             rng.standard_normal(ecg.shape)]
    if rate > 100:
        parts.append(np.sin(2 * np.pi * 50 * time + phase()))
    noise = sum(part / part.std(1, keepdims=True) for part in parts) / np.sqrt(len(parts))
    return noise * ecg.std(1, keepdims=True) * 10 ** (-decibel / 20)


CHANGES = ("leads", "derive_leads", "noise", "control")  # options that change the signals


@torch.no_grad()
def embed_records(method, store, rows, device, what="encoding ECGs", ask=SimpleNamespace(**DEFAULTS), batch=256):
    """Vectors of rows of a store, float32 numpy: "rhythm" (R, dim), L2-normalised, in the space shared with
    text; "features" (R, 2 D), mean and maximum of the encoder's tokens, before any projection."""
    out = {"rhythm": [], "features": []}
    for start in tqdm(range(0, len(rows), batch), desc=what, leave=False):
        ecg = torch.from_numpy(signals(store, rows[start:start + batch], ask)).to(device)
        tokens = method.encode_tokens(ecg)
        out["rhythm"].append(method.views(tokens, ecg).rhythm.float().cpu())
        out["features"].append(torch.cat([tokens.mean(1), tokens.amax(1)], 1).float().cpu())
    return {name: torch.cat(parts).numpy() for name, parts in out.items()}


def vectors(run, store, rows, ask):
    """embed_records of rows, encoded once: they stay in the run, embeddings/SOURCE.npz, with ids and splits,
    as long as weights, store and signals are these."""
    changed = {name: getattr(ask, name) for name in CHANGES if getattr(ask, name) != DEFAULTS[name]}
    path = run.folder / "embeddings" / f"{file_name(entry(source_of(store), changed))}.npz"
    key, known = f"{run.crc} {store.meta['plan']} {changed}", {}
    if path.exists():
        try:
            with np.load(path) as file:
                known = dict(file) if str(file["key"]) == key else {}
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            print(f"{path}: not readable ({error}), encoded anew")
    missing = np.setdiff1d(rows, known.get("rows", []))
    if len(missing):
        new = {"rows": missing} | embed_records(run.method, store, missing, run.device, ask=ask)
        known = {name: np.concatenate([known[name], new[name]]) if known else new[name] for name in new}
        order = np.argsort(known["rows"])
        known = {name: values[order] for name, values in known.items()}
        told = {name: store.records[column].to_numpy(str)[known["rows"]]
                for name, column in (("ids", "id"), ("split", "split"))}
        path.parent.mkdir(exist_ok=True)
        data.write_atomic(path, lambda new: save_arrays(new, key=key, **told, **known))
    place = np.searchsorted(known["rows"], rows)
    return {name: known[name][place] for name in ("rhythm", "features")}


def save_arrays(path, **arrays):
    with open(path, "wb") as file:  # savez adds .npz to a name
        np.savez(file, **arrays)


@torch.no_grad()
def embed_texts(tower, texts, batch=256):
    """Mean word of each text: list of R strings -> (R, D) on the CPU."""
    was, out = tower.training, []
    tower.eval()
    for start in tqdm(range(0, len(texts), batch), desc="encoding texts", leave=False):
        states, words, _ = tower.encode(texts[start:start + batch])
        out.append(models.masked_mean(states, words).cpu())
    tower.train(was)
    return torch.cat(out)


@torch.no_grad()
def score_records(run, store, rows, prompts, ask, batch=256):
    """Zero-shot scores of rows of a store: prompts are C lists of texts, the score of a class is the mean over its
    texts of the similarity with the ECG -> (R, C) float32."""
    method, scales = run.method, ask.scales or run.method.scales
    texts, parts = [text.rstrip(". ") for row in prompts for text in row], []  # worded as statements are
    text = method.encode_text(texts)
    if list(scales) == ["rhythm"]:  # vectors say it all
        parts = [torch.from_numpy(vectors(run, store, rows, ask)["rhythm"]) @ text.report.float().cpu().T]
    else:
        for start in tqdm(range(0, len(rows), batch), desc="encoding ECGs", leave=False):
            ecg = torch.from_numpy(signals(store, rows[start:start + batch], ask)).to(run.device)
            parts.append(method.similarity(method.encode_ecg(ecg), text, scales).float().cpu())
    like = torch.cat(parts).split([len(row) for row in prompts], 1)  # C of (R, texts)
    return torch.stack([part.mean(1) for part in like], 1).numpy()


# ---- metrics -------------------------------------------------------------------------------------------------

def auroc_of_resamples(score, positive, weights):
    """AUROC of one class in many bootstrap resamples at once. score (R,), positive (R,) bool, weights (K, R): how
    often each row was drawn. Returns (K,), NaN where a resample lacks positives or negatives. Ties count half."""
    order = np.argsort(score, kind="stable")
    score, positive, weights = score[order], positive[order], weights[:, order]
    pos, neg = weights * positive, weights * ~positive
    below = np.concatenate([np.zeros((len(weights), 1)), np.cumsum(neg, 1)], 1)  # (K, R + 1)
    left, right = np.searchsorted(score, score, "left"), np.searchsorted(score, score, "right")
    wins = (pos * (below[:, left] + below[:, right])).sum(1) / 2
    pairs = pos.sum(1) * neg.sum(1)
    return np.divide(wins, pairs, out=np.full(len(weights), np.nan), where=pairs > 0)


def best_f1(score, positive):
    """Largest F1 over all thresholds ON THESE ROWS, as published: an optimistic number."""
    precision, recall, _ = precision_recall_curve(positive, score)
    return float(np.max(2 * precision * recall / np.maximum(precision + recall, 1e-12)))


def interval(samples):
    """95 % bootstrap interval [low, high] of (K,) samples; None where fewer than a tenth are numbers."""
    found = samples[np.isfinite(samples)]
    return [float(v) for v in np.percentile(found, [2.5, 97.5])] if 10 * len(found) >= len(samples) else None


def resamples(patients, seed=0):
    """Bootstrap over patients with all their records: (R,) -> (RESAMPLES, R), how often each row is drawn."""
    unique, place = np.unique(patients, return_inverse=True)
    rng = np.random.default_rng(seed)
    return rng.multinomial(len(unique), np.full(len(unique), 1 / len(unique)), RESAMPLES)[:, place]


def score_classes(names, scores, positives, patients=None, untrained=()):
    """Metrics of a label set. scores (R, C), positives (R, C) bool, patients (R,) -> dict with "macro",
    "macro_enough" and "classes". untrained: classes of which a classifier saw no positive.

    A class without positives, or without negatives, is listed and left out of the means; the second mean
    leaves out classes with fewer than ENOUGH positives and the untrained. Intervals: of a class with at least ENOUGH
    positives; of a mean over the resamples in which every one of its classes has both kinds (none where these
    are fewer than a tenth)."""
    patients = np.arange(len(scores)) if patients is None else patients
    weights, classes, samples = resamples(patients), {}, {}
    for c, name in enumerate(names):
        count = int(positives[:, c].sum())
        classes[name] = {"positives": count}
        if 0 < count < len(scores):
            samples[name] = auroc_of_resamples(scores[:, c], positives[:, c], weights)
            classes[name] |= {"auroc": float(roc_auc_score(positives[:, c], scores[:, c])),
                              "interval": interval(samples[name]) if count >= ENOUGH else None,
                              "auprc": float(average_precision_score(positives[:, c], scores[:, c])),
                              "f1": best_f1(scores[:, c], positives[:, c])}
    means = {}
    for title, least, without in (("macro", 1, ()), ("macro_enough", ENOUGH, untrained)):
        used = [n for n in samples if classes[n]["positives"] >= least and n not in without]
        if used:
            means[title] = {m: float(np.mean([classes[n][m] for n in used])) for m in ("auroc", "auprc", "f1")}
            means[title] |= {"classes": len(used), "interval": interval(np.mean([samples[n] for n in used], 0))}
    found = {"records": len(scores), "patients": len(np.unique(patients)), **means, "classes": classes}
    return found | ({"untrained": list(untrained)} if untrained else {})


def share(hits, patients):
    """Mean of (R,) numbers with its bootstrap interval."""
    weights = resamples(patients)
    return {"value": float(hits.mean()), "interval": interval(weights @ hits / weights.sum(1))}


# ---- tasks ---------------------------------------------------------------------------------------------------
# task(run, set, ask) -> {row: {column: metrics}}; row "" is the run itself. metrics: of score_classes, or with "value".

def class_prompts(name, classes, style, records=None):
    """One list of texts a class. style: descriptive (prompts.json), plain (class names), or a JSON file
    {code: text or [texts]}, such as the published ones; a class the file lacks is an error."""
    if style in ("plain", "descriptive"):
        table = data.label_set(name, records)
        return [[table[c]["name"].lower()] if style == "plain" else table[c]["prompts"] for c in classes]
    advice = "--prompts is descriptive, plain, or a JSON file {code: text or [texts]}"
    given = data.read_json(style, {str: (str, list, dict)}, advice)
    given = given[name] if isinstance(given.get(name), dict) else given
    if missing := [c for c in classes if c not in given and c.rstrip("_") not in given]:
        raise data.DataError(f"{style} has no prompt for {', '.join(missing)} of {name}")
    texts = [given.get(c, given.get(c.rstrip("_"))) for c in classes]
    texts = [[text] if isinstance(text, str) else text for text in texts]
    for c, row in zip(classes, texts):
        if not isinstance(row, list) or not row or not all(isinstance(t, str) and data.WORD.search(t)
                                                           for t in row):
            raise data.DataError(f"{style}: the prompt of {c} must be a text or a list of texts, with words")
    return [[t.lower() for t in row] for row in texts]


def texts_scores(run, question, name, ask):
    """Zero-shot scores (R, C) of the test rows."""
    records = question.store.records
    prompts = class_prompts(name, question.classes, ask.prompts, records)
    return score_records(run, question.store, question.test.rows, prompts, ask)


def zeroshot(run, name, ask):
    """Classes told apart by their texts: no label is used."""
    question = ask_set(name, run.config, ask)
    found = score_classes(question.classes, scores := texts_scores(run, question, name, ask), question.test.labels,
                          question.test.patients)
    return {"": {"zero-shot": found | {"scores": scores, "labels": question.test.labels}}}


GRID = [(scale, balance, c) for scale in (True, False) for balance in (None, "balanced") for c in (0.01, 0.1, 1, 10)]
FEW = (True, "balanced", 0.1)  # with a few labels there are none to choose a setting by


def fit_classes(x, labels, setting):
    """A logistic regression a class: x (R, D), labels (R, C) -> function x -> log-odds (R, C). A class whose rows
    are all of one kind has that kind's log-odds, by Laplace's rule."""
    scale, balance, c = setting
    scaler, heads = StandardScaler().fit(x) if scale else None, []
    ready = lambda x: scaler.transform(x) if scale else x
    for y in labels.T:
        if y.any() and not y.all():
            head = LogisticRegression(C=c, class_weight=balance, max_iter=500).fit(ready(x), y)
            heads.append((head.coef_[0], head.intercept_[0]))
        else:
            heads.append((np.zeros(x.shape[1]), math.log((y.sum() + 1) / ((~y).sum() + 1))))
    weights, biases = (np.stack(parts) for parts in zip(*heads))
    return lambda x: ready(x) @ weights.T + biases


def choose_classes(x, labels, x_val, val):
    """fit_classes with the setting of GRID that has the lowest log-loss on validation rows, mean over classes."""
    best = (math.inf, None)
    for setting in GRID:
        predict = fit_classes(x, labels, setting)
        odds = predict(x_val)
        loss = np.logaddexp(0, np.where(val, -odds, odds)).mean()
        best = min(best, (loss, setting, predict), key=lambda found: found[0])
    return best[2]


def subset(labelled, ratio):
    """This share of training rows, drawn with seed 42 as published; two at least."""
    count = max(2, round(ratio * len(labelled.rows)))
    drawn = np.sort(np.random.default_rng(42).permutation(len(labelled.rows))[:count])
    return Labelled(*(part[drawn] for part in labelled))


def untrained(run):
    """The same encoder with random weights."""
    torch.manual_seed(run.config.seed)
    method, c = copy.deepcopy(run.method), run.config
    method.ecg = models.build_encoder(c.encoder, 12, method.samples, c.width, c.patch).to(run.device).eval()
    return run._replace(method=method, folder=run.folder / "random", crc=f"random {c.seed}")


def percent(ratio):
    return f"{100 * ratio:g} %"


def probe(run, name, ask):
    """A linear classifier on frozen vectors (ask.ratios of the training rows), beside the same encoder with random
    weights and the same one trained with labels."""
    question = ask_set(name, run.config, ask)
    if ask.shots:
        return few_labels(run, name, question, ask)
    if not len(question.train.rows) or not len(question.val.rows):
        raise data.DataError(f"{question.store.path}: no training rows with a label of {name} to learn from")
    if name == "age":
        return {"": {"age": age_probe(run, question, ask)}}
    rows = {}
    for title, one in (("", run), ("random weights", untrained(run))):
        part = lambda labelled: vectors(one, question.store, labelled.rows, ask)["features"]
        x, x_val, x_test = part(question.train), part(question.val), part(question.test)
        place, rows[title] = {row: i for i, row in enumerate(question.train.rows)}, {}
        for ratio in ask.ratios:
            train = subset(question.train, ratio)
            x_train = x[[place[row] for row in train.rows]]
            if ask.protocol == "grid":
                scores = choose_classes(x_train, train.labels, x_val, question.val.labels)(x_test)
            else:
                scores = published_head(x_train, train.labels, x_val, question.val.labels, x_test,
                                        question.test.labels, ask.protocol)
            rows[title][percent(ratio)] = probe_metrics(question, train, scores)
    if ask.protocol == "grid":
        rows["trained with labels"] = {percent(ratio): with_labels(run, question, ratio, ask, fresh=True)
                                       for ratio in ask.ratios}
    return rows


def probe_metrics(question, train, scores):
    lacking = [c for c, some in zip(question.classes, train.labels.any(0)) if not some]
    return score_classes(question.classes, scores, question.test.labels, question.test.patients, lacking) | {
        "training records": len(train.rows), "scores": scores, "labels": question.test.labels}


def age_probe(run, question, ask):
    """Ridge regression of the age in years, its penalty chosen on validation rows."""
    x, x_val, x_test = (vectors(run, question.store, part.rows, ask)["features"]
                        for part in (question.train, question.val, question.test))
    scaler = StandardScaler().fit(x)
    fits = [Ridge(alpha).fit(scaler.transform(x), question.train.labels[:, 0]) for alpha in 10.0 ** np.arange(-1, 6)]
    error = lambda fit, x, part: abs(fit.predict(scaler.transform(x)) - part.labels[:, 0])
    best = min(fits, key=lambda fit: error(fit, x_val, question.val).mean())
    found = share(error(best, x_test, question.test), question.test.patients)
    guess = abs(np.median(question.train.labels) - question.test.labels).mean()
    fit = np.corrcoef(best.predict(scaler.transform(x_test)), question.test.labels[:, 0])[0, 1]
    return found | {"unit": "years, mean error", "guessing the median": float(guess), "correlation": float(fit),
                    "records": len(question.test.rows)}


def few_labels(run, name, question, ask):
    """k positives of every class (all where there are fewer), ten draws: mean and spread of macro AUROC."""
    train, test = question.train, question.test
    x, x_test = (vectors(run, question.store, part.rows, ask)["features"] for part in (train, test))
    columns = {}
    for k in ask.shots:
        found = []
        for draw in range(10):
            rng = np.random.default_rng((draw, k))
            drawn = np.unique(np.concatenate([rng.permutation(np.flatnonzero(y))[:k] for y in train.labels.T]))
            scores = fit_classes(x[drawn], train.labels[drawn], FEW)(x_test)
            used = test.labels.any(0) & ~test.labels.all(0)
            found.append((roc_auc_score(test.labels[:, used], scores[:, used]), len(drawn)))
        values, counts = zip(*found)
        columns[f"{k} a class"] = {"value": float(np.mean(values)), "interval": [min(values), max(values)],
                                   "deviation": float(np.std(values)), "training records": float(np.mean(counts)),
                                   "records": len(test.rows)}
    texts = zeroshot(run, name, ask)[""]["zero-shot"]
    return {"": columns | {"zero-shot": {"value": texts["macro"]["auroc"], "interval": texts["macro"]["interval"],
                                         "records": len(test.rows)}}}


def published_head(x, labels, x_val, val, x_test, test, protocol):
    """Test scores of a linear head trained as published on the mean over tokens. merl (finetune/main_single.py):
    Adam, the rate falls after 40 batches, and the BEST TEST EPOCH counts. melp: AdamW, cosine, early stopping by
    validation AUROC, softmax over the classes."""
    torch.manual_seed(42)
    x, x_val, x_test = (torch.from_numpy(part[:, :part.shape[1] // 2]) for part in (x, x_val, x_test))
    labels, head, best, waited = torch.from_numpy(labels).float(), torch.nn.Linear(x.shape[1], labels.shape[1]), None, 0
    if protocol == "merl":
        optimiser, size = torch.optim.Adam(head.parameters(), 1e-3), 16
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, [40], 0.1)
    else:
        optimiser, size = torch.optim.AdamW(head.parameters(), 1e-3, weight_decay=1e-4), 128
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 100, 1e-5)
    for _ in range(100):
        for rows in torch.randperm(len(x)).split(size):
            optimiser.zero_grad()
            torch.nn.functional.binary_cross_entropy_with_logits(head(x[rows]), labels[rows]).backward()
            optimiser.step()
            if protocol == "merl":
                schedule.step()
        schedule.step()
        with torch.no_grad():
            shown, scores = head(x_val).softmax(1).numpy(), head(x_test)
        scores = (scores if protocol == "merl" else scores.softmax(1)).numpy()
        quality = mean_auroc(scores, test) if protocol == "merl" else mean_auroc(shown, val)
        best, waited = ((quality, scores), 0) if best is None or quality > best[0] else (best, waited + 1)
        if protocol == "melp" and waited == 5:
            break
    return best[1]


def mean_auroc(scores, labels):
    """Macro AUROC over the classes that have positives and negatives; 0.5 where none has."""
    used = labels.any(0) & ~labels.all(0)
    return roc_auc_score(labels[:, used], scores[:, used]) if used.any() else 0.5


def with_labels(run, question, ratio, ask, fresh=False, batch=32):
    """Encoder and linear head trained with labels (AdamW, head 1e-3, encoder 1e-4, or 1e-3 from random weights;
    warm-up, cosine; leads dropped and records shifted as in the run's training); the epoch with the best validation
    AUROC is tested. ask.epochs, more where they are short: 200 updates at least."""
    train, (method, c) = subset(question.train, ratio), (untrained(run) if fresh else run)[1:3]
    method = method if fresh else copy.deepcopy(method)
    torch.manual_seed(c.seed)
    head = torch.nn.Linear(2 * method.ecg.dim, len(question.classes)).to(run.device)
    per_epoch = math.ceil(len(train.rows) / batch)
    epochs = max(ask.epochs, math.ceil(200 / per_epoch))
    groups = [{"params": head.parameters(), "lr": 1e-3}, {"params": method.ecg.parameters(), "lr": 1e-3 if fresh else 1e-4}]
    optimiser = torch.optim.AdamW(groups)
    rise = max(1, epochs * per_epoch // 10)
    rate = lambda n: min(n / rise, 0.5 + 0.5 * math.cos(math.pi * n / (epochs * per_epoch)))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda n: rate(n + 1))
    best = (-1, None)

    def odds(ecg):
        tokens = method.encode_tokens(ecg)
        return head(torch.cat([tokens.mean(1), tokens.amax(1)], 1))

    @torch.no_grad()
    def predict(rows):
        method.eval()
        parts = [torch.from_numpy(signals(question.store, some, ask)) for some in np.array_split(rows, len(rows) // 256 + 1)]
        return torch.cat([odds(part.to(run.device)).cpu() for part in parts]).numpy()

    for epoch in tqdm(range(epochs), desc=f"training with labels, {percent(ratio)}", leave=False):
        method.train()
        for some in torch.randperm(len(train.rows)).split(batch):
            ecg = torch.from_numpy(signals(question.store, train.rows[some.numpy()], ask))
            step = int(torch.randint(-int(c.shift * c.rate), int(c.shift * c.rate) + 1, ()))
            ecg = torch.roll(ecg, step, 2) * (torch.rand(len(ecg), 12, 1) >= c.lead_drop)
            ecg[:, :, slice(0, step) if step >= 0 else slice(step, None)] = 0
            wanted = torch.from_numpy(train.labels[some.numpy()]).float().to(run.device)
            torch.nn.functional.binary_cross_entropy_with_logits(odds(ecg.to(run.device)), wanted).backward()
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
        if (epoch + 1) % max(1, epochs // ask.epochs) == 0 or epoch == epochs - 1:
            quality = mean_auroc(predict(question.val.rows), question.val.labels) if len(question.val.rows) else epoch
            if quality > best[0]:
                best = (quality, copy.deepcopy((method.ecg.state_dict(), head.state_dict())))
    method.ecg.load_state_dict(best[1][0])
    head.load_state_dict(best[1][1])
    return probe_metrics(question, train, predict(question.test.rows))


def finetune(run, name, ask):
    """Encoder and head trained with labels, from the run's weights and from random ones."""
    question = ask_set(name, run.config, ask)
    if name == "age" or not len(question.train.rows):
        raise data.DataError(f"{question.store.path}: nothing to train a classifier of {name} on")
    return {row: {percent(ratio): with_labels(run, question, ratio, ask, fresh) for ratio in ask.ratios}
            for row, fresh in (("", False), ("trained with labels", True))}


TRANSFER = ("ptbxl_super", "cpsc2018", "csn")


def transfer(run, name, ask):
    """A probe learned on another set, and zero-shot, over the classes that both sets have (data.join_classes): the
    score of a class is the highest of the source's classes that are joined to it."""
    question, columns = ask_set(name, run.config, ask), {}
    texts = texts_scores(run, question, name, ask)
    for source in TRANSFER:
        if source == name:
            continue
        try:
            learned = ask_set(source, run.config, ask)
        except data.DataError as error:
            print(f"transfer from {source}: {error}")
            continue
        x, x_val, x_test = (vectors(run, q.store, part.rows, ask)["features"] for q, part in (
            (learned, learned.train), (learned, learned.val), (question, question.test)))
        scores = choose_classes(x, learned.train.labels, x_val, learned.val.labels)(x_test)
        joined = {c: from_ for c, from_ in data.join_classes(source, name).items() if c in question.classes}
        own = [question.classes.index(c) for c in joined]
        mapped = np.stack([scores[:, [learned.classes.index(s) for s in from_]].max(1) for from_ in joined.values()], 1)
        facts = {"joined": joined, "left out": [c for c in question.classes if c not in joined]}
        for how, found in (("probe", mapped), ("zero-shot", texts[:, own])):
            columns[f"from {source}, {how}"] = facts | score_classes(
                list(joined), found, question.test.labels[:, own], question.test.patients)
        print(f"{source} -> {name}: joined " + "; ".join(f"{c} = {', '.join(f)}" for c, f in joined.items())
              + f"; left out {', '.join(facts['left out']) or 'none'}")
    if not columns:
        raise data.DataError(f"no other set of {', '.join(TRANSFER)} to transfer from")
    return {"": columns}


def ranks(like, right):
    """Rank of the best right candidate among the wrong ones, a tie counts half: like (Q, K), right (Q, K) -> (Q,)"""
    best = np.where(right, like, -np.inf).max(1, keepdims=True)
    wrong = np.where(right, -np.inf, like)
    return 1 + (wrong > best).sum(1) + (wrong == best).sum(1) / 2


def recall(like, right, patients):
    """R@k of queries (Q, K) with their interval; chance: R@1 of a random order."""
    rank = ranks(like, right)
    found = share((rank <= 1).astype(float), patients)
    return found | {f"R@{k}": float((rank <= k).mean()) for k in (5, 10)} | {
        "median rank": float(np.median(rank)), "chance": float(right.mean()), "queries": len(like),
        "candidates": like.shape[1]}


def both_ways(ecg, text, texts, findings, patients):
    """Retrieval among R records: ecg (R, dim) and text (T, dim) vectors of the T distinct texts, texts (R,) which of
    them is a record's, findings (T,) what each says. Equal texts are one candidate; of a text, the best-ranked of
    its records counts."""
    present, texts = np.unique(texts, return_inverse=True)
    like, same = ecg @ text[present].T, findings[present][:, None] == findings[present]  # (R, T), (T, T)
    own = texts[:, None] == np.arange(len(present))
    first = np.array([patients[np.argmax(column)] for column in own.T])
    found = {}
    for title, right in (("", own), (", same findings", same[texts])):
        found[f"ECG -> report{title}"] = recall(like, right, patients)
        found[f"report -> ECG{title}"] = recall(like.T, right.T, first)
    return found


def retrieve(run, name, ask):
    """Which report belongs to this ECG, which ECG to this report?"""
    store = find_store(name, run.config, ask.data)
    tags = data.report_tags(store, run.config.report_language)
    rows = np.array([row for row in test_rows(store, ask) if tags[row]], int)
    if len(rows) < 2:
        raise data.DataError(f"{store.path}: fewer than two of the records asked for have a report")
    distinct, texts = np.unique([models.join(tags[row]) for row in rows], return_inverse=True)
    first, read = {text: row for text, row in zip(texts[::-1], rows[::-1])}, data.Findings()
    said = [" ".join(sorted(read.named(tags[first[i]]))) or f"nothing {i}" for i in range(len(distinct))]
    with torch.no_grad():
        parts = [run.method.encode_text(list(distinct[i:i + 256])).report.float().cpu() for i in range(0, len(distinct), 256)]
    about = vectors(run, store, rows, ask)["rhythm"], torch.cat(parts).numpy(), texts, np.array(said)
    patients, columns = store.records["patient"].to_numpy()[rows], {}
    columns = both_ways(*about, patients)
    if len(rows) > 1000:
        pools = []
        for draw in range(10):
            some = np.random.default_rng(draw).permutation(len(rows))[:1000]
            pools.append(both_ways(about[0][some], about[1], texts[some], about[3], patients[some]))
        for title in pools[0]:
            numbers = [k for k, v in pools[0][title].items() if isinstance(v, (int, float))]
            columns[f"{title}, of 1,000"] = {k: float(np.mean([pool[title][k] for pool in pools])) for k in numbers}
    return {"": columns}


def identify(run, name, ask):
    """Patients with two records or more: is the second record nearest to the same patient's first? By the cosine of
    unprojected vectors; nothing is trained."""
    store = find_store(name, run.config, ask.data)
    rows = test_rows(store, ask)
    pairs = [group[:2] for _, group in pd.Series(rows).groupby(store.records["patient"].to_numpy()[rows]) if len(group) > 1]
    if len(pairs) < 2:
        raise data.DataError(f"{store.path}: fewer than two patients with two records among those asked for")
    first, second = np.array(pairs).T
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    a, b = (unit(vectors(run, store, part, ask)["features"]) for part in (first, second))
    return {"": {"identification": recall(b @ a.T, np.eye(len(a), dtype=bool), store.records["patient"].to_numpy()[first])}}


def embed(run, name, ask):
    """Just the vectors of every record: no result, a file."""
    store = find_store(name, run.config, ask.data)
    found = vectors(run, store, np.arange(len(store)), ask)
    shapes = ", ".join(f"{name} {values.shape}" for name, values in found.items())
    print(f"{run.folder / 'embeddings'}: {source_of(store)}.npz with ids, split, {shapes}")
    return {}


def overlap(written, truth):
    """Micro precision, recall and F1 of sets: both lists of R sets."""
    hits, said, true = sum(len(a & b) for a, b in zip(written, truth)), sum(map(len, written)), sum(map(len, truth))
    return {"precision": hits / max(1, said), "recall": hits / max(1, true), "value": 2 * hits / max(1, said + true)}


def bleu(written, truth):
    """BLEU-4 of a corpus (Papineni et al. 2002): lists of R lists of words, one reference each."""
    logs = []
    for n in range(1, 5):
        grams = lambda words: Counter(tuple(words[i:i + n]) for i in range(len(words) - n + 1))
        pairs = [(grams(w), grams(t)) for w, t in zip(written, truth)]
        hits, total = sum((w & t).total() for w, t in pairs), sum(w.total() for w, _ in pairs)
        if not hits:
            return 0.0
        logs.append(math.log(hits / total))
    brevity = min(0, 1 - sum(map(len, truth)) / sum(map(len, written)))
    return math.exp(brevity + sum(logs) / 4)


def rouge_l(written, truth):
    """Mean F1 of the longest common subsequence of words (Lin 2004)."""
    scores = []
    for w, t in zip(written, truth):
        row = [0] * (len(t) + 1)
        for word in w:
            above = row[:]
            for i, other in enumerate(t):
                row[i + 1] = above[i] + 1 if word == other else max(above[i + 1], row[i])
        scores.append(2 * row[-1] / max(1, len(w) + len(t)))
    return float(np.mean(scores))


def generate(run, name, ask, batch=64):
    """Reports written from the ECG (reports.jsonl) against the doctors', as sets of statements and of findings (the codes
    that data.Findings reads), and word by word; beside them the commonest training report."""
    if not hasattr(run.method, "generate"):
        raise models.ModelError(f"a {run.config.method} run writes no reports; --method melp does")
    store = find_store(name, run.config, ask.data)
    tags, read = data.report_tags(store, run.config.report_language), data.Findings()
    rows = [row for row in test_rows(store, ask) if tags[row]]
    if not rows:
        raise data.DataError(f"{store.path}: none of the records asked for has a report")
    texts = []
    for start in tqdm(range(0, len(rows), batch), desc="writing", leave=False):
        ecg = torch.from_numpy(signals(store, rows[start:start + batch], ask)).to(run.device)
        texts += run.method.generate(ecg, ask.beams)
    written, truth = [[s.strip(" .") for s in text.split(". ") if s.strip(" .")] for text in texts], [tags[r] for r in rows]
    train = [tuple(tags[row]) for row in np.flatnonzero(store.records["split"] == "train") if tags[row]]
    common = list(Counter(train or map(tuple, truth)).most_common(1)[0][0])
    data.write_text(run.folder / "reports.jsonl", "".join(
        json.dumps({"id": str(store.records["id"].iloc[row]), "report": true, "written": said}) + "\n"
        for row, true, said in zip(rows, truth, written)))
    words, found = lambda reports: [models.join(report).split() for report in reports], {}
    for title, said in (("", written), ("commonest report", [common] * len(rows))):
        pair = [[set(read.named(report)) for report in reports] for reports in (said, truth)]
        facts = {"BLEU-4": bleu(words(said), words(truth)), "ROUGE-L": rouge_l(words(said), words(truth)),
                 "records": len(rows), "different": len(set(map(tuple, said)))}
        found[title] = {"findings F1": overlap(*pair) | facts,
                        "statements F1": overlap(list(map(set, said)), list(map(set, truth)))}
    return found


@torch.no_grad()
def report_language(method, texts, run, batch=64):
    """How many hidden words of `texts` a CardioLM guesses; prints it and adds it to results.json. The yardstick is to
    say the commonest word every time."""
    if not texts:
        print("masked words: no figure, since no text (one in twenty is, by its hash) was kept from training")
        return
    method.eval()
    counts, sums = Counter(), torch.zeros(3)
    torch.manual_seed(0)  # training is over
    for start in range(0, len(texts), batch):
        part = texts[start:start + batch]
        sums += torch.stack([x.float().cpu() for x in method.guess(part)])
        counts.update(piece for row in method.tokenizer(part, add_special_tokens=False)["input_ids"] for piece in row)
    loss, right = (sums[[0, 2]] / sums[1]).tolist()
    found = {"texts": len(texts), "loss": loss, "accuracy": right, "commonest": max(counts.values()) / counts.total()}
    print(f"masked words of {len(texts)} texts not trained on: {100 * right:.1f} % right (always the commonest word: "
          f"{100 * found['commonest']:.1f} %), loss {loss:.3f}")
    remember(run, "language", found)


TASKS = {"zeroshot": zeroshot, "probe": probe, "transfer": transfer, "retrieve": retrieve, "finetune": finetune,
         "identify": identify, "embed": embed, "generate": generate}


# ---- where a model looks -------------------------------------------------------------------------------------

@torch.no_grad()
def attention_over_time(method, ecg, text):
    """Where each text is seen: ecg (1, 12, N) mV, TextViews of C texts -> (C, N), each row sums to 1: the softmax over
    tokens of every word's similarity, mean over words; or over beats, patches, as the method weighs them. Errors:
    ModelError where a method has no scale below the whole record."""
    views, config, samples = method.encode_ecg(ecg), method.config, ecg.shape[2]
    if "token" in method.scales:
        words = [text.words[i, :n] for i, n in enumerate(text.word_count)]
        weight = torch.stack([(w @ views.tokens[0].T * method.log_scale.exp()).softmax(1).mean(0) for w in words])
    elif "beat" in method.scales and getattr(config, "beats", "") != "query" or config.method == "fgclep" and \
            config.align == "tag":
        scale = method.beat_options["beat_temperatures"][0]
        beats = views.beats[0] if views.beat_count is None else views.beats[0, :views.beat_count[0]]
        weight = (text.sentences[:, 0] @ beats.T * scale).softmax(1)
    else:
        raise models.ModelError(f"this {config.method} run sees texts in the whole record only; fgclep --align word "
                                "or tag, and melp --beats rpeak, see them at a place")
    if config.method == "melp":  # beats: from midpoint to midpoint
        peaks, count = segment_beats(ecg, config.rate)
        place = beat_of_token(peaks, count, samples, samples)[0].long()
        length = torch.bincount(place, minlength=weight.shape[1])
        return (weight / length.clamp(min=1))[:, place].cpu().numpy()
    windows = samples // config.patch if "leadvit" in config.encoder else weight.shape[1]
    weight = weight.unflatten(1, (-1, windows)).sum(1)  # patches of all leads at one time
    place = torch.arange(samples) * windows // samples
    return (weight[:, place.to(weight.device)] * windows / samples).cpu().numpy()


def open_record(record, rate):
    """(ECG (1, 12, N) mV, title) of a WFDB record or of SPEC:ID. Errors: DataError."""
    path = record.removesuffix(".hea")
    if os.path.exists(path + ".hea"):
        return data.load_record(path, rate)[0][None].astype(np.float32) / 1000, os.path.basename(path)
    spec, _, name = record.rpartition(":")
    if not spec:
        raise data.DataError(f"{record}: no WFDB record (there is no {path}.hea), and not SOURCE:PATH:ID")
    store = open_store(spec, rate)
    rows = np.flatnonzero(store.records["id"] == name)
    if not len(rows):
        raise data.DataError(f"{store.path}: holds no record {name!r}")
    return store.ecg(rows[:1]), f"{source_of(store)} {name}: {'; '.join(store.records['statements'].iloc[rows[0]])}"


def look(run, record, texts, ask):
    """Scores of texts on one record, with their quantile among the run's training records, and look_RECORD.png."""
    texts = [text.lower().strip(" .") for text in texts]
    ecg, title = open_record(record, run.config.rate)
    ecg, text = torch.from_numpy(ecg).to(run.device), run.method.encode_text(texts)
    with torch.no_grad():
        scores = run.method.similarity(run.method.encode_ecg(ecg), text, ask.scales)[0].tolist()
    rows = {t: {"similarity": s} for t, s in zip(texts, scores)}
    try:
        store = open_store(run.config.data, run.config.rate)
        known = np.flatnonzero(store.records["split"] == "train")
        known = np.sort(np.random.default_rng(0).permutation(known)[:1000])
        others = score_records(run, store, known, [[t] for t in texts], SimpleNamespace(**DEFAULTS | {"scales": ask.scales}))
        for row, score, column in zip(rows.values(), scores, others.T):
            row[f"higher than, of {len(known)} training records"] = f"{100 * (column < score).mean():.0f} %"
    except data.DataError as error:
        print(f"no comparison with the training records: {error}")
    print_rows(title, rows)
    try:
        weight = attention_over_time(run.method, ecg, text)
    except models.ModelError as error:
        print(error)
        weight = None
    path = run.folder / f"look_{file_name(record)}.png"
    plot_look(ecg[0].cpu().numpy(), run.config.rate, title, rows, weight, path)
    print(f"drawn in {path}")


def plot_look(ecg, rate, title, rows, weight, path):
    """The record on ECG paper; a strip for each text under it, as dark as the text is seen there, and a triangle over the
    beats that carry more than one and a half times their share."""
    from matplotlib.figure import Figure
    count = 0 if weight is None else len(rows)
    figure = Figure(figsize=(12, 7 + 0.55 * count), layout="constrained")
    axes = figure.subplots(1 + count, 1, sharex=True, squeeze=False, height_ratios=[12] + [1] * count)[:, 0]
    data.draw_ecg(axes[0], ecg, rate, title)
    peaks = data.r_peaks([data.microvolts(ecg, ecg.shape[1])[0]], rate)[0]
    edges = [0, *((a + b) // 2 for a, b in zip(peaks, peaks[1:])), ecg.shape[1]]
    for strip, (text, facts), w in zip(axes[1:], rows.items(), [] if weight is None else weight):
        seconds = ecg.shape[1] / rate
        strip.imshow(w[None], aspect="auto", cmap="Greys", extent=(0, seconds, 0, 1), vmin=0, vmax=w.max())
        shares = [w[a:b].sum() * len(w) / (b - a) for a, b in zip(edges, edges[1:])]
        strong = [peak / rate for peak, value in zip(peaks, shares) if value > 1.5]
        strip.plot(strong, [1.25] * len(strong), "v", color="#c03030", ms=5, clip_on=False)
        quantile = [value for name, value in facts.items() if name != "similarity"]
        strip.set_title(f"{text}: {facts['similarity']:.3f}" + (f", higher than {quantile[0]}" if quantile else ""),
                        loc="left", fontsize=9, parse_math=False)
        strip.set(yticks=[], xlim=(0, seconds))
    axes[-1].set_xlabel("s")
    figure.savefig(path, dpi=150)


# ---- tables, pictures, results.json --------------------------------------------------------------------------

def headline(metrics, mean="macro"):
    """(value, interval) that a result is known by; (None, None) where there is none."""
    found = metrics.get(mean, {}) if "classes" in metrics else metrics
    return found.get("auroc", found.get("value")), found.get("interval")


def summary(metrics):
    """One line of a table."""
    if "classes" not in metrics:
        return metrics
    line = {"records": metrics["records"]}
    for mean, name in (("macro", "AUROC"), ("macro_enough", f"AUROC, {ENOUGH} positives")):
        if mean in metrics:
            line |= {name: metrics[mean]["auroc"], f"interval{' ' * (mean != 'macro')}": metrics[mean]["interval"],
                     f"classes{' ' * (mean != 'macro')}": metrics[mean]["classes"]}
    return line | {"AUPRC": metrics.get("macro", {}).get("auprc"), "no training positive": len(metrics.get("untrained", ()))}


def class_rows(metrics):
    """The table of a label set's classes and their means."""
    rows = {}
    for name, r in metrics["classes"].items():
        why = None if "auroc" in r else "no negatives" if r["positives"] else "no positives"
        rows[name] = {"positives": r["positives"], "AUROC": r.get("auroc"), "95 % interval": why or r["interval"],
                      "AUPRC": r.get("auprc"), "best F1": r.get("f1")}
    for key, text in (("macro", "macro, classes with positives"), ("macro_enough", f"macro, at least {ENOUGH} positives")):
        if m := metrics.get(key):
            rows[f"{text} ({m['classes']})"] = {"positives": "", "AUROC": m["auroc"], "95 % interval": m["interval"],
                                                "AUPRC": m["auprc"], "best F1": m["f1"]}
    return rows


def written(value):
    if isinstance(value, list) and len(value) == 2 and isinstance(value[0], float):
        return "{:.3f} - {:.3f}".format(*value)
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def print_rows(title, rows):
    """{row: {column: value}} as a table; nested values stay in results.json."""
    plain = {row: {k: written(v) for k, v in values.items() if not isinstance(v, (dict, np.ndarray))}
             for row, values in rows.items()}
    print(f"\n{title}\n{pd.DataFrame.from_dict(plain, orient='index').fillna('-').to_string()}")


def lines_of(rows):
    """{row: {column: metrics}} -> {"row, column": metrics}"""
    return {", ".join(filter(None, [row, column])): m for row, columns in rows.items() for column, m in columns.items()}


def plot(title, points, path):
    """{label: (value, interval or None, strong)} as dots with their intervals, best at the top."""
    from matplotlib.figure import Figure
    points = sorted(((v, label, i, strong) for label, (v, i, strong) in points.items() if v is not None), key=lambda p: p[0])
    if not points:
        return
    figure = Figure(figsize=(8, 1.4 + 0.24 * len(points)), layout="constrained")
    axes = figure.subplots()
    for y, (value, _, ends, strong) in enumerate(points):
        if ends:
            axes.plot(ends, [y, y], color="0.7", lw=3, solid_capstyle="butt", zorder=1)
        axes.plot(value, y, "o", color="C0" if strong else "0.5", ms=5, zorder=2)
    axes.axvline(0.5, color="0.8", lw=1, zorder=0)
    axes.set_yticks(range(len(points)), [label for _, label, _, _ in points], fontsize=8)
    axes.set(ylim=(-0.8, len(points) - 0.2), title=textwrap.fill(title, 80))
    figure.savefig(path, dpi=120)


def plot_shots(title, columns, path):
    """Macro AUROC over the number of positives a class, mean and range of ten draws, and the zero-shot line."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes, texts = figure.subplots(), columns["zero-shot"]["value"]
    few = {int(name.split()[0]): m for name, m in columns.items() if name != "zero-shot"}
    axes.plot(list(few), [m["value"] for m in few.values()], "o-", label="probe")
    axes.fill_between(list(few), *zip(*(m["interval"] for m in few.values())), alpha=0.2)
    axes.axhline(texts, color="C1", ls="--", label="zero-shot")
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(few), list(map(str, few)))
    axes.set(xlabel="positives a class", ylabel="macro AUROC", title=title)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def entry(name, options):
    """The title of a result: what was asked, and those options that are not the defaults."""
    text = lambda v: ",".join(map(str, v)) if isinstance(v, (list, tuple)) else v
    return " ".join([name, *(f"{k}={text(v)}" for k, v in options.items() if v != DEFAULTS.get(k, v))])


def file_name(text):
    return re.sub("[^a-zA-Z0-9_.=,-]+", "_", text).strip("_.")[-150:]


def save_results(folder, task, name, rows, ask):
    """results.json and TASK_SET.png of a run: an entry for each task, set and options, none of which overwrites
    another."""
    options = {k: v for k, v in vars(ask).items() if k not in ("device", "text_model")}
    options["data"] = [spec for spec in ask.data]
    title = entry(name, {k: v for k, v in options.items() if k != "data"})
    path, lines = Path(folder) / f"{task}_{file_name(title)}.png", lines_of(rows)
    if task == "probe" and ask.shots:
        plot_shots(title, rows[""], path)
    elif task == "zeroshot":
        [metrics] = lines.values()
        plot(f"zero-shot {title}: AUROC", {f"{n} ({r['positives']})": (r.get("auroc"), r.get("interval"), r["positives"] >= ENOUGH)
                                           for n, r in metrics["classes"].items()}, path)
    elif lines:
        plot(f"{task} {title}", {label: (*headline(m), True) for label, m in lines.items()}, path)
    plain = {row: {column: {k: v for k, v in m.items() if not isinstance(v, np.ndarray)} for column, m in columns.items()}
             for row, columns in rows.items()}
    if rows:
        remember(folder, task, {title: {"options": options, "results": plain}})


def known_results(run):
    """results.json of a run, {} where there is none. Errors: DataError."""
    path = Path(run) / "results.json"
    return data.read_json(path, {str: dict}, "move it away") if path.exists() else {}


def remember(run, key, found):
    """Add to an entry of a run's results.json; nothing, before all the work, to show that it can be done.
    Errors: DataError."""
    if not Path(run).is_dir():
        raise data.DataError(f"{run}: not a run folder")
    with data.locked(Path(run) / ".results.lock"):  # of two evaluations at a time, none loses the other's
        known = known_results(run)
        known.setdefault(key, {}).update(found)
        data.write_text(Path(run) / "results.json", json.dumps(known, indent=1))


def report(folder, wanted, **options):
    """Do tasks on a run, {task: sets}: print the tables, write results.json and pictures -> {(task, set): rows}. What
    cannot be done is said in a sentence, and the others go on. Errors: DataError, ModelError where nothing can."""
    ask = SimpleNamespace(**DEFAULTS | options)
    for task in wanted:
        remember(folder, task, {})
    run, results, fault = open_run(folder, ask), {}, None
    for task, name in ((task, name) for task, names in wanted.items() for name in names):
        try:
            rows = results[task, name] = TASKS[task](run, name, ask)
        except (data.DataError, models.ModelError) as error:
            fault = error
            print(f"\n{task} {name}: not done: {error}", file=sys.stderr)
            continue
        lines = lines_of(rows)
        if task == "zeroshot":
            [metrics] = lines.values()
            print_rows(f"zero-shot {name}: {metrics['records']} records", class_rows(metrics))
        elif lines:
            print_rows(f"{task} {name}", {label: summary(m) for label, m in lines.items()})
        save_results(folder, task, name, rows, ask)
    if fault and not results:
        raise fault
    return results


# ---- many runs -----------------------------------------------------------------------------------------------

def group_runs(configs):
    """Configs that differ in NO_MATTER only belong together -> {title: their places}, in order of appearance. A
    title is the method and what sets the group apart from the method's others; each field's most common value
    goes without saying (among equally common ones the first). A field that a config lacks is None."""
    fields = [f for f in dict.fromkeys(f for config in configs for f in config) if f not in NO_MATTER]
    groups, titled = {}, {}
    for place, config in enumerate(configs):
        groups.setdefault(tuple(config.get(f) for f in fields), []).append(place)
    for values, places in groups.items():
        method = configs[places[0]]["method"]
        peers = [v for v, p in groups.items() if configs[p[0]]["method"] == method]
        usual = [Counter(column).most_common(1)[0][0] for column in zip(*peers)]
        titled[" ".join([method] + [f"{f}={v}" for f, v, u in zip(fields, values, usual) if v != u])] = places
    return titled


def over_runs(found, mean):
    """A figure over runs: metrics of each -> dict; mean: "macro" or "macro_enough". None where no run has it."""
    heads = [head for head in (headline(m, mean) for m in found) if head[0] is not None]
    if not heads:
        return None
    values, known = [value for value, _ in heads], [ends for _, ends in heads if ends]
    return {"values": values, "mean": float(np.mean(values)), "lowest": min(values), "highest": max(values),
            "interval": np.mean(known, 0).tolist() if len(known) == len(heads) else None}


def permutation_p(ours, others, labels):
    """Paired permutation test of two groups' macro AUROC: lists of scores (R, C), as ranks, mean over the runs of
    a group; record by record the two are exchanged -> p, two-sided."""
    a, b = (np.mean([rankdata(scores, axis=0) for scores in group], 0) for group in (ours, others))
    rng, gap = np.random.default_rng(0), abs(mean_auroc(a, labels) - mean_auroc(b, labels))
    used = labels.any(0) & ~labels.all(0)
    positive, a, b = labels[:, used], a[:, used], b[:, used]
    count = positive.sum(0)

    def macro(scores):  # Mann-Whitney
        wins = (rankdata(scores, axis=0) * positive).sum(0) - count * (count + 1) / 2
        return (wins / (count * (len(scores) - count))).mean()

    more = 0
    for _ in range(RESAMPLES):
        swap = rng.random((len(a), 1)) < 0.5
        more += abs(macro(np.where(swap, b, a)) - macro(np.where(swap, a, b))) >= gap - 1e-12
    return (more + 1) / (RESAMPLES + 1)


def figure_text(s):
    """mean (lowest - highest) [interval] p"""
    if s is None:
        return "-"
    spread = f" ({s['lowest']:.3f} - {s['highest']:.3f})" if len(s["values"]) > 1 else ""
    ends = " [{:.3f}, {:.3f}]".format(*s["interval"]) if s["interval"] else ""
    return f"{s['mean']:.3f}{spread}{ends}" + (f" p={s['p']:.3f}" if "p" in s else "")


def markdown(groups, mean="macro"):
    """{title: {"runs", "macro": {column: figure}, ...}} -> a table."""
    names = list(dict.fromkeys(name for group in groups.values() for name in group[mean]))
    lines = ["| method | runs | " + " | ".join(n.removeprefix("ptbxl_") for n in names) + " | records/s | parameters |",
             "|---" * (len(names) + 4) + "|"]
    for title, group in groups.items():
        cost = [f"{group['records_per_second']:.0f}", f"{group['parameters'] / 1e6:.2f} M"] if group["parameters"] else ["-", "-"]
        figures = [figure_text(group[mean].get(name)) for name in names]
        lines.append("| " + " | ".join([title, str(len(group["runs"])), *figures, *cost]) + " |")
    return "\n".join(lines)


def plot_comparison(groups, path):
    """A panel for each column, a line for each group: a dot for each run, the mean as a stroke, the interval as a bar."""
    from matplotlib.figure import Figure
    names = list(dict.fromkeys(name for group in groups.values() for name in group["macro"]))
    labels = [textwrap.fill(title, 32) for title in groups]
    columns = min(4, len(names))
    shape = math.ceil(len(names) / columns), columns
    height = sum(0.3 + 0.14 * label.count("\n") for label in labels)
    figure = Figure(figsize=(2.2 + 2.4 * columns, (1.0 + height) * shape[0]), layout="constrained")
    panels = figure.subplots(*shape, sharey=True, squeeze=False).flat
    for axes, name in itertools.zip_longest(panels, names):
        for y, group in enumerate(groups.values()):
            if name and (s := group["macro"].get(name)):
                if s["interval"]:
                    axes.plot(s["interval"], [y, y], c=f"C{y % 10}", alpha=.25, lw=8, solid_capstyle="butt", zorder=1)
                axes.plot([s["mean"]] * 2, [y - 0.3, y + 0.3], color=f"C{y % 10}", lw=1.5, zorder=2)
                axes.plot(s["values"], [y] * len(s["values"]), "o", color=f"C{y % 10}", mec="white", ms=5.5, zorder=3)
        axes.set_title(name or "", fontsize=9)
        axes.set_yticks(range(len(labels)), labels, fontsize=8)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.locator_params(axis="x", nbins=5)
        axes.tick_params(labelsize=8)
        axes.grid(axis="x", color="0.92")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.set_visible(bool(name))
    figure.supxlabel("each run, their mean, and the 95 % bootstrap interval", fontsize=8)
    figure.savefig(path, dpi=150)


def compare(folders, wanted, **options):
    """Do tasks on finished runs, put repetitions together (group_runs), print one table, write it to
    comparison.json and comparison.png in the parent folder of the first run. Plain files among `folders` are passed
    over, so that runs/* will do. Errors: DataError for a folder that is not a finished run, and where runs were
    asked about different records."""
    folders = list(dict.fromkeys(folder for folder in map(Path, folders) if not folder.is_file()))
    if not folders:
        raise data.DataError("no run folder to compare")
    configs = [models.settings_of(read_config(folder)[0]) for folder in folders]
    for folder in folders:  # before hours of evaluation
        if not (folder / "model.safetensors").exists():
            raise data.DataError(f"{folder} is not a finished run: continue it with python train.py --resume {folder}, "
                                 "or leave it out")
    rows, titles = {}, {place: title for title, places in group_runs(configs).items() for place in places}
    for place, (folder, config) in enumerate(zip(tqdm(folders, desc="runs"), configs)):
        for (task, name), result in report(folder, wanted, **options).items():
            for row, columns in result.items():
                title = f"{row} ({config['encoder']})" if row else titles[place]
                group = rows.setdefault(title, {"places": [], "columns": {}})
                if place not in group["places"]:
                    group["places"].append(place)
                for column, metrics in columns.items():
                    label = name if column == task or task == "zeroshot" else f"{name} {task} {column}"
                    group["columns"].setdefault(label, []).append(metrics)
    records = {}
    for title, group in rows.items():
        for label, found in group["columns"].items():
            for metrics, place in zip(found, group["places"]):
                known = records.setdefault(label, (metrics.get("records"), folders[place]))
                if known[0] != metrics.get("records"):
                    raise data.DataError(f"{label} has {metrics['records']} records for {folders[place]}, but {known[0]} for "
                                         f"{known[1]}: name the same for all with --data")
    first, groups = next(iter(rows.values()))["columns"], {}
    for title, group in rows.items():
        groups[title] = summarise(group, [folders[p] for p in group["places"]], [configs[p] for p in group["places"]])
        for label, found in group["columns"].items():
            if len(groups) > 1 and "scores" in found[0] and label in first and groups[title]["macro"][label]:
                groups[title]["macro"][label]["p"] = permutation_p(
                    *([m["scores"] for m in some] for some in (found, first[label])), found[0]["labels"])
    print("macro AUROC or the task's own figure: mean over runs (lowest - highest) [95 % bootstrap interval, mean of its "
          f"ends]; p: against {next(iter(groups))}, paired permutation\n")
    print(markdown(groups))
    print(f"\nthe same over classes with at least {ENOUGH} positives\n")
    print(markdown(groups, "macro_enough"))
    for group in groups.values():
        for folder, facts in zip(group["runs"], group["training"]):
            if warnings := (facts or {}).get("warnings"):
                print(f"\nwarnings in training of {folder}: {len(warnings)}, the last at {warnings[-1]}")
    path = folders[0].parent / "comparison.json"
    asked = {k: str(v) for k, v in options.items()}
    data.write_text(path, json.dumps({"options": asked, "groups": groups}, indent=1))
    plot_comparison(groups, path.with_suffix(".png"))
    print(f"\nwritten to {path} and {path.with_suffix('.png')}")
    return groups


def summarise(group, folders, configs):
    """{"columns": {label: metrics of each run}} -> figures over runs; speed and parameters are means."""
    paths = [Path(folder) / "training.json" for folder in folders]
    training = [data.read_json(path, FACTS) if path.exists() else None for path in paths]
    known = [facts for facts in training if facts]
    figures = {mean: {label: over_runs(found, mean) for label, found in group["columns"].items()}
               for mean in ("macro", "macro_enough")}
    costs = {k: float(np.mean([facts[k] for facts in known])) if known else None
             for k in ("records_per_second", "parameters")}
    return {"runs": list(map(str, folders)), "seeds": [config["seed"] for config in configs],
            "config": {k: v for k, v in configs[0].items() if k not in NO_MATTER}, **figures, **costs, "training": training}


# ---- command line --------------------------------------------------------------------------------------------

def sets_for(task, names):
    """Label sets of a task: "ptbxl" is four where classes are asked about, and a data set elsewhere."""
    if task == "transfer":
        return names or list(TRANSFER)
    if task in ("zeroshot", "probe", "finetune"):
        names = [name for given in names for name in GROUPS.get(given, (given,))]
        names = ["own" if name.rstrip(":") == "csv" else name for name in names]
        known = (*data.LABEL_SETS, *(("age", "sex") if task == "probe" else ()))
        for name in names:
            if name not in known and not name.endswith(".json"):
                raise data.DataError(f"unknown label set {name!r}; known are {', '.join(known)}, csv (the codes of your own), or "
                                     "a file NAME.json")
    return names


def arguments(argv):
    """Command line -> namespace with "wanted", {task: sets}."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    lists = lambda kind: lambda text: [kind(part) for part in text.split(",")]
    several = f"ptbxl (four sets), csv, a JSON file of classes, or {', '.join(data.LABEL_SETS)}"
    for task, function in TASKS.items():
        note = function.__doc__.split("\n\n")[0].split(". ")[0].replace("\n", " ").replace("%", "%%")
        parser.add_argument(f"--{task}", nargs="*" if task in ("transfer", "generate") else "+", metavar="SET",
                            help=f"{' '.join(note.split())}{'; SET: ' + several if task == 'zeroshot' else ''}")
    parser.add_argument("--look", nargs="+", metavar=("RECORD", "TEXT"), help="where texts are seen in a WFDB record or SPEC:ID")
    parser.add_argument("--run", help="run folder [the newest in runs/]")
    parser.add_argument("--compare", nargs="+", metavar="RUN", help="finished run folders: one table over all")
    parser.add_argument("--ckpt", dest="checkpoint", help="a .safetensors file, with config and tokenizer from --run or from "
                        "beside it; or merl:FILE, melp:FILE, dbeta:FILE, a checkpoint as its authors published it")
    parser.add_argument("--text-model", help="of a published checkpoint: folder with its tokenizer [the published name]")
    parser.add_argument("--data", nargs="+", metavar="SOURCE:PATH", help="where the records are, one for each source")
    parser.add_argument("--split", choices=("test", "val", "train", "all"), help="records that are tested [test]")
    parser.add_argument("--folds", type=lists(int), help="PTB-XL folds in place of the split, e.g. 9,10")
    parser.add_argument("--prompts", help="descriptive | plain | a JSON file {code: text or [texts]} [descriptive]")
    parser.add_argument("--scales", type=lists(str), help="rhythm,beat,token or some of them [the method's own]")
    parser.add_argument("--leads", type=lists(str), help="the others are zero, e.g. I,II,V2")
    parser.add_argument("--derive-leads", action="store_true", help="with I and II given: III, aVR, aVL, aVF from them")
    parser.add_argument("--noise", type=float, metavar="DB", help="signal-to-noise ratio of added wander, mains, white noise")
    parser.add_argument("--control", choices=("zero", "other"), help="no signal, or another record's: figures must fall to 0.5")
    parser.add_argument("--ratios", type=lists(float), help="shares of the training rows [0.01,0.1,1]")
    parser.add_argument("--shots", type=lists(int), help="of --probe: so many positives a class, e.g. 1,2,4,8,16")
    parser.add_argument("--probe-protocol", dest="protocol", choices=("grid", "merl", "melp"), help="[grid]")
    parser.add_argument("--epochs", type=int, help="of training with labels [10]")
    parser.add_argument("--beams", type=int, help="of --generate; 1: greedy")
    args = parser.parse_args(argv, SimpleNamespace())
    return parser, args


def main(argv=None):
    parser, args = arguments(argv)
    given = {k: v for k, v in vars(args).items() if v not in (None, False)}
    wanted = {task: sets_for(task, given.pop(task)) for task in TASKS if task in given}
    options = {k: given[k] for k in DEFAULTS if k in given}
    options["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    check_options(parser, options)
    if not wanted and not args.look:
        parser.error("say what to do: --zeroshot SET, --probe SET, ...; --compare needs one of them, too")
    if args.compare:
        if args.run or args.checkpoint or args.look:
            parser.error("--compare names its own runs: drop --run, --ckpt and --look")
        compare(args.compare, wanted, **options)
        return
    if found := publication(args.checkpoint):  # its results go to a folder of their own beside the runs
        run = Path("runs") / f"published-{found[0]}-{Path(found[1]).stem}"
        run.mkdir(parents=True, exist_ok=True)
    else:
        run = args.run or (Path(args.checkpoint).parent if args.checkpoint else newest_run())
    print(f"run {run}")
    if args.look:
        ask = SimpleNamespace(**DEFAULTS | options)
        look(open_run(run, ask), args.look[0], args.look[1:] or parser.error("--look RECORD TEXT..."), ask)
    if "generate" in wanted:
        wanted["generate"] = wanted["generate"] or [read_config(run)[0].data.partition(":")[0]]
    if wanted:
        report(run, wanted, **options)


def check_options(parser, options):
    """Errors: a sentence where an option makes no sense."""
    leads = options.get("leads") or []
    unknown = [lead for lead in leads if data.lead_index(lead) is None]
    faults = {f"--leads {', '.join(unknown)}: no lead; there are {', '.join(data.LEADS)}": unknown,
              "--derive-leads needs --leads with I and II": options.get("derive_leads") and not {0, 1} <= {
                  data.lead_index(lead) for lead in leads},
              "--ratios are shares above 0, up to 1": any(not 0 < r <= 1 for r in options.get("ratios", ())),
              "--shots are positive numbers": any(k < 1 for k in options.get("shots", ())),
              "--epochs and --beams are at least 1": min(options.get("epochs", 1), options.get("beams", 1)) < 1,
              "--noise is a ratio in dB": not math.isfinite(options.get("noise", 0))}
    for sentence, wrong in faults.items():
        if wrong:
            parser.error(sentence)


if __name__ == "__main__":
    data.guarded(main, models.ModelError)
