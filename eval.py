"""Evaluation: python eval.py --zeroshot ptbxl   (newest run; or --run runs/NAME, or --ckpt FILE)

    --zeroshot SET...  classes told apart by their texts     --retrieve SET...  ECG -> report, report -> ECG
    --probe SET...     a linear classifier on the vectors    --identify SET...  whose second record is it?
    --transfer         both from one set to another          --generate         reports written (melp)
    --finetune SET...  encoder trained with labels, too      --embed SET...     just the vectors (npz)
    --look RECORD TEXT...  where a text is seen              --export DIR       the run as a model to publish
    --compare RUN...   any of these over runs, one table; alone: what validation showed in training

Tables are printed, and written with pictures into the run: results.json has an entry for each task, set and
options. Test rows are the official test split (PTB-XL: fold 10) unless --folds or --split says otherwise;
nothing is chosen on them (but by the protocol of MERL's probe). A task is one function, and a line in TASKS.
"""
import argparse
import copy
import json
import math
import os
import re
import shutil
import sys
import textwrap
import zipfile
import zlib
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from joblib import Parallel, delayed
from safetensors import safe_open
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import data
import model as models
from csrc import segment_beats


TRANSFER = ("ptbxl_super", "cpsc2018", "csn")
RESAMPLES = 1000  # of the bootstrap, and of the permutations
ENOUGH = 10       # positives a class needs for an interval and for the second mean (fewer: a lottery)
DEFAULTS = dict(data=(), prompts="descriptive", scales=None, folds=None, split="test", leads=None,
                derive_leads=False, noise=None, control=None, ratios=(0.01, 0.1, 1.0), shots=None,
                protocol="grid", epochs=10, beams=1, checkpoint=None, text_model="", device="cpu")


def asking(**options):
    """What is asked, besides the task and the set: DEFAULTS and the options of the command line. Errors:
    DataError where there is no such option."""
    if unknown := sorted(options.keys() - DEFAULTS.keys()):
        raise data.DataError(f"there is no option {unknown[0]!r}; there are {', '.join(DEFAULTS)}")
    return SimpleNamespace(**DEFAULTS | options)


# ---- runs and their weights --------------------------------------------------------------------------------

def newest_run():
    """The run in runs/ that was finished last. Errors: DataError where there is none."""
    finished = sorted(Path("runs").glob("*/model.safetensors"), key=os.path.getmtime)
    if not finished:
        raise data.DataError("no finished run in runs/: train one (python train.py), or name it: --run")
    return finished[-1].parent


def read_config(run):
    """(Config, what made it: a dictionary) of a run folder. Errors: DataError."""
    path = Path(run) / "config.json"
    if not path.exists():
        raise data.DataError(f"{run}: not a run folder (no config.json)")
    found = data.read_json(path, {"method": str, "preset": str, str: (str, int, float, bool, dict)})
    made_by, _ = found.pop("made_by", {}), found.pop("about", {})
    found |= {name: str(path.with_name(os.path.basename(found[name]))) for name in ("method", "encoder")
              if models.is_file(found.get(name, ""))}
    try:
        config = models.configure(**found)
        if lacking := sorted(models.settings_of(config).keys() - found.keys()):
            raise models.ModelError(f"there is no {lacking[0]!r}")
        data.check(made_by, dict.fromkeys(("program", "torch", "csrc", "store"), str), "made_by")
    except (models.ModelError, data.DataError) as error:
        raise data.DataError(f"{path}: not of this version of the program, {models.VERSION}, or changed by "
                             f"hand ({error}); use the version that made it, or train anew") from error
    for name, path in models.own_files(config).items():
        original = made_by.get(name, "")
        if os.path.isfile(original) and data.crc_of(original) != data.crc_of(path):
            print(f"{path} is used, of which the run was made; {original} has changed since")
    return config, made_by


def read_log(run):
    """log.jsonl: a line an update (seconds: of it alone), a warning, or a look at the validation records."""
    return data.read_lines(Path(run) / "log.jsonl", {"update": int})


def crc_of_tensors(state):
    """A checksum of named tensors, as text."""
    crc = 0
    for name, x in sorted(state.items()):
        crc = zlib.crc32(name.encode(), crc)
        crc = zlib.crc32(x.cpu().contiguous().flatten().view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"


def read_file(path):
    """(what torch.save or safetensors wrote, a dictionary, and its metadata); nothing but tensors and plain
    values is unpickled, and checksums hold. Errors: DataError."""
    try:
        with data.open_file(path) as file:
            if file.read(23) == b"version https://git-lfs":
                raise OSError(0, data.LFS[2:])
            if Path(path).suffix == ".safetensors":
                with safe_open(path, "pt") as found:
                    state, facts = {k: found.get_tensor(k) for k in found.keys()}, found.metadata() or {}
                if facts.get("tensors", crc := crc_of_tensors(state)) != crc:
                    raise ValueError("the weights have another checksum")
                return state, facts
            with zipfile.ZipFile(file) as archive:  # torch.load does not look at them
                if damaged := archive.testzip():
                    raise ValueError(f"{damaged} has another checksum")
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError("it holds other things than tensors")
        return state, {}
    except Exception as error:  # pickle, zipfile, torch and safetensors fail in many ways on a damaged file
        fault = isinstance(error, OSError) and error.strerror or (
            "damaged, cut off, or no tensors that can be loaded safely "
            f"({type(error).__name__}: {models.first_line(error)[:150]}); restore it, or train anew")
        raise data.DataError(f"{path}: {fault}") from error


def read_tensors(path):
    """(named tensors, metadata) in a file of read_file, or in a training checkpoint. Errors: DataError."""
    state, facts = read_file(path)
    if isinstance(state.get("start"), dict) and state["start"]:
        raise data.DataError(f"{path}: of a run with --init-share, whose weights are drawn towards their "
                             "start when it saves model.safetensors: use that")
    for key in ("state_dict", "model", "model_state_dict"):  # what surrounds weights in a training checkpoint
        state = state[key] if isinstance(state.get(key), dict) else state
    if not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise data.DataError(f"{path}: holds other things than named tensors")
    return state, facts


def read_weights(run):
    """Named tensors of a run folder, whose tokenizer and own code are still those of the weights. Errors:
    DataError."""
    state, facts = read_tensors(Path(run) / "model.safetensors")
    data.compare_checksums(run, json.loads(facts.get("files", "{}")))
    return state


def load_run(run, checkpoint=None, device="cpu", text_model=""):
    """(method in eval mode, its config) of a run folder. checkpoint: other weights than its own, or NAME:FILE
    as the authors published them (open_published), whatever the run. Errors: DataError, ModelError."""
    if found := models.publication(checkpoint):
        return open_published(*found, text_model, device)
    run, (config, _) = Path(run), read_config(run)
    weights = Path(checkpoint or run / "model.safetensors")
    if not models.method_class(config).needs_ecg:
        raise models.ModelError(f"{run} is a language model without an ECG encoder: give it to another run "
                                f"with --text-model {run}")
    if not (checkpoint or weights.exists()):
        raise data.DataError(f"{weights} is missing: the run did not finish; continue it with: python "
                             f"train.py --resume {run}")
    state = read_tensors(checkpoint)[0] if checkpoint else read_weights(run)
    method = models.build_method(config, models.rebuild_text_model(run / "tokenizer"))
    try:
        method.load_state_dict(state)
    except RuntimeError as error:
        fault = " ".join(str(error).split())[:300]
        raise data.DataError(f"{weights}: not of {run / 'config.json'}: {fault}") from error
    return method.to(device).eval(), config


def open_published(kind, file, text_model="", device="cpu"):
    """load_run of an authors' checkpoint, with the paper's preset; text_model: in place of the hub's."""
    if kind not in models.published():
        raise models.ModelError(f"no published checkpoint {kind!r}; known: {', '.join(models.published())}")
    state, _ = read_tensors(file)
    width = lambda ending, axis=0: next((v.shape[axis] for k, v in state.items() if k.endswith(ending)), 0)
    config = models.configure(models.published()[kind]["method"], "paper", data="")  # it brings none
    config.text_model = text_model or config.text_model
    if kind == "merl":
        vits = {dim: f"vit_{name}" for name, (dim, *_) in models.ViT1d.SIZES.items()}
        resnet = "resnet50" if width("downconv.weight", 1) == 2048 else "resnet18"
        config.encoder = vits.get(width("to_patch_embedding.weight"), resnet)
    lm, tokenizer = models.load_text_model(config.text_model)
    if kind == "melp":
        config.beat_queries = width("attn_pool_contrast.query") or config.beat_queries
        tokenizer.add_special_tokens({"bos_token": "[BOS]"})  # in place of [CLS], which goes to the end
        lm.resize_token_embeddings(max(len(tokenizer), lm.config.vocab_size))
    method = models.load_published(models.build_method(config, (lm, tokenizer)), state, kind)
    method.load_state_dict(models.with_our_leads(method.state_dict(), kind))
    return method.to(device).eval(), config


# ---- a run, records, signals, vectors; in notebooks: embed, score ------------------------------------------

class Run(NamedTuple):
    folder: Path
    method: models.Method
    config: models.Config
    device: str
    crc: str  # of the weights


def open_run(folder, ask):
    method, config = load_run(folder, ask.checkpoint, ask.device, ask.text_model)
    return Run(Path(folder), method, config, ask.device, crc_of_tensors(method.state_dict()))


def test_rows(store, ask):
    """Row numbers of a store's test records, or of the folds or the split asked for. Errors: DataError."""
    records, folds = store.records, ask.folds
    if folds and not records["fold"].any():
        if len(ask.data) < 2:
            raise data.DataError(f"{store.path}: these records have no folds: leave out --folds")
        print(f"{data.source_of(store)}: these records have no folds; their {ask.split} split is tested")
        folds = None
    rows = np.flatnonzero(records["fold"].isin(folds) if folds else records["split"].isin(
        data.SPLITS if ask.split == "all" else [ask.split]))
    if not len(rows):
        wanted = f"fold {', '.join(map(str, folds))}" if folds else f"the {ask.split} split"
        raise data.DataError(f"{store.path}: holds no record of {wanted}; name folds with --folds, another "
                             "--split, or other records with --data")
    return rows


def rows_with_reports(store, run, ask, least=1):
    """Those of test_rows that have a report, and data.Tags. Errors: DataError where there are too few."""
    tags = data.report_tags(store, run.config.report_language)
    rows = np.array([row for row in test_rows(store, ask) if tags[row]], int)
    if len(rows) < least:
        number = "one" if least == 1 else "two"
        raise data.DataError(f"{store.path}: fewer than {number} of the records asked for have a report")
    return rows, tags


class Labelled(NamedTuple):
    """Records of one split that have a label of a set."""
    rows: np.ndarray      # (R,) row numbers in the store
    labels: np.ndarray    # (R, C) bool; age: years
    patients: np.ndarray  # (R,)

    def at(self, places):
        return Labelled(*(part[places] for part in self))


class Question(NamedTuple):
    """A label set on a store."""
    store: data.Store
    classes: list
    train: Labelled
    val: Labelled  # what a setting is chosen by; never test rows
    test: Labelled


def ask_set(name, config, ask, learn=False, test=True):
    """Question of a label set, "sex" or "age". Validation rows are the val split; where that is tested, an
    eighth of the training patients. Errors: DataError where none to test, or to learn from, is labelled."""
    store = data.find_store(name, config, ask.data)
    patients, split, sex = (store.records[column].to_numpy(object) for column in ("patient", "split", "sex"))
    if name == "sex":
        classes, labels, keep = ["female"], sex[:, None] == "F", np.isin(sex, ["F", "M"])
    elif name == "age":
        years = pd.to_numeric(store.records["age"], errors="coerce").to_numpy(float)
        classes, labels, keep = ["age"], years[:, None], np.isfinite(years)
    else:
        classes, labels, keep = data.label_matrix(store.records, name)
    tested = np.isin(np.arange(len(store)), test_rows(store, ask)) if test else split == "test"
    if not (keep & ~tested & (split == "val")).any():
        held = [data.split_by(f"held {patient}", 7 / 8, 1 / 8) == "val" for patient in patients]
        split = np.where((split == "train") & held, "val", split)
    everything = Labelled(np.arange(len(store)), labels, patients)
    train, val = (everything.at(keep & ~tested & (split == part)) for part in ("train", "val"))
    if test and not (keep & tested).any():
        raise data.DataError(f"{store.path}: no record to evaluate has a label of {name}")
    if learn and not (len(train.rows) and len(val.rows)):
        raise data.DataError(f"{store.path}: no training rows with a label of {name} to learn from")
    return Question(store, classes, train, val, everything.at(keep & tested))


def signals(store, rows, ask):
    """ECGs of rows (B, 12, N) float32 mV: as stored, or with noise, fewer leads, or a control instead."""
    order = np.random.default_rng(0).permutation(len(store)) if ask.control == "other" else None
    # another: of each record the one before it in a circle through all, which is always the same
    ecg = store.ecg(rows if order is None else np.roll(order, 1)[np.argsort(order)][rows])
    if ask.noise is not None and ask.control != "zero":
        for x, row in zip(ecg, rows):
            x += noise_like(x, store.rate, ask.noise, np.random.default_rng((0, row)))
    kept = range(12) if not ask.leads else [data.lead_index(lead) for lead in ask.leads]
    ecg[:, [i for i in range(12) if i not in kept or ask.control == "zero"]] = 0
    if ask.derive_leads:  # Einthoven, Goldberger
        one, two = ecg[:, 0], ecg[:, 1]
        ecg[:, 2:6] = np.stack([two - one, -(one + two) / 2, one - two / 2, two - one / 2], 1)
    return ecg


def noise_like(ecg, rate, decibel, rng):
    """Wander, white noise and mains of equal power, together this much below the signal: (12, N) mV."""
    time, uniform = np.arange(ecg.shape[1]) / rate, lambda *bounds: rng.uniform(*bounds, (len(ecg), 1))
    wave = lambda hertz: np.sin(2 * np.pi * (hertz * time + uniform(0, 1)))
    parts = [sum(wave(uniform(0.05, 0.5)) for _ in range(3)), rng.standard_normal(ecg.shape)]
    parts += [wave(50)] if rate > 100 else []  # where the rate can show it
    noise = sum(part / part.std(1, keepdims=True) for part in parts) / math.sqrt(len(parts))
    return noise * ecg.std(1, keepdims=True) * 10 ** (-decibel / 20)


def pool(tokens):
    """Mean and maximum over time: (B, T, D) -> (B, 2 D)."""
    return torch.cat([tokens.mean(1), tokens.amax(1)], 1)


@torch.no_grad()
def encode(method, ecg):
    """Vectors of ECGs (B, 12, N) mV, float32: "rhythm" (B, dim), L2-normalised, comparable with texts;
    "features" (B, 2 D), mean and maximum of the encoder's tokens before any projection."""
    tokens = method.encode_tokens(ecg)
    found = {"rhythm": method.views(tokens, ecg).rhythm, "features": pool(tokens)}
    return {name: x.float().cpu().numpy() for name, x in found.items()}


def batches(store, rows, device, ask, what="encoding ECGs", batch=256):
    """ECGs of rows, (B, 12, N) mV on the device, some at a time."""
    for start in tqdm(range(0, len(rows), batch), desc=what, leave=False):
        yield torch.from_numpy(signals(store, rows[start:start + batch], ask)).to(device)


def embed_records(method, store, rows, device, what="encoding ECGs", ask=asking()):
    """encode, of rows of a store."""
    parts = [encode(method, ecg) for ecg in batches(store, rows, device, ask, what)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def vectors(run, store, rows, ask):
    """embed_records of rows, encoded once: kept in embeddings/SOURCE.npz of the run, with ids and splits, as
    long as weights, store and signals are these."""
    changed = {k: getattr(ask, k) for k in ("leads", "derive_leads", "noise", "control")}
    path = run.folder / "embeddings" / f"{file_name(entry(data.source_of(store), changed))}.npz"
    key, known = f"{run.crc} {store.meta['plan']} {changed}", {}
    try:
        with np.load(path) as file:
            known = dict(file) if str(file["key"]) == key else {}
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        print(f"{path}: not readable ({error}), encoded anew")
    missing = np.setdiff1d(rows, known.get("rows", []))
    if len(missing):
        new = {"rows": missing} | embed_records(run.method, store, missing, run.device, ask=ask)
        new = {k: np.concatenate([known[k], new[k]]) if known else new[k] for k in new}
        order = np.argsort(new["rows"])
        facts = store.records.iloc[new["rows"][order]]
        known = {k: values[order] for k, values in new.items()} | {
            "key": key, "ids": facts["id"].to_numpy(str), "split": facts["split"].to_numpy(str)}
        data.write_atomic(path, lambda new: save_arrays(new, known))
    place = np.searchsorted(known["rows"], rows)
    return {k: known[k][place] for k in ("rhythm", "features")}


def save_arrays(path, arrays):
    with open(path, "wb") as file:  # given a name, savez would add .npz
        np.savez(file, **arrays)


@torch.no_grad()
def score_records(run, store, rows, prompts, ask):
    """class_scores of R rows of a store with C lists of texts."""
    method, scales = run.method, list(ask.scales or run.method.scales)

    def compare(text):
        if scales == ["rhythm"]:  # the vectors say it all
            return torch.from_numpy(vectors(run, store, rows, ask)["rhythm"]) @ text.report.float().cpu().T
        return torch.cat([method.similarity(method.encode_ecg(ecg), text, scales).float().cpu()
                          for ecg in batches(store, rows, run.device, ask)])
    return class_scores(method, prompts, compare)


@torch.no_grad()
def class_scores(method, prompts, compare):
    """Zero-shot scores of C classes, by a list of texts each -> (R, C) float32. compare: TextViews of all T
    texts -> (R, T) similarities, of which Method.class_score makes a class's. Digits beyond the fifth, in
    which a batch's rounding would rank equal records, are cut."""
    like = compare(method.encode_text([text.rstrip(". ") for row in prompts for text in row]))
    scores = [method.class_score(part) for part in like.split([len(row) for row in prompts], 1)]
    return torch.stack(scores, 1).numpy().round(5)


def embed_reports(method, texts):
    """U strings -> (U, dim) vectors on the CPU."""
    parts = np.array_split(np.array(texts, object), len(texts) // 256 + 1)
    return torch.cat([method.encode_text(part.tolist()).report.float().cpu() for part in parts])


def embed(method, signals, fs=None, leads=data.LEADS):
    """encode, of B signals (see data.load_signals), as --embed does. Errors: DataError."""
    ecg = torch.from_numpy(data.load_signals(signals, fs, leads, method.config.rate))
    return encode(method, ecg.to(next(method.parameters()).device))


@torch.no_grad()
def score(method, texts, signals, fs=None, leads=data.LEADS, scales=None):
    """Similarity of B signals (see data.load_signals) with C texts -> (B, C) float32: comparable over signals
    only. scales: rhythm, beat, token or some of them; None: the method's own. Errors: DataError."""
    if isinstance(texts, str) or not len(texts) or not all(
            isinstance(text, str) and data.WORD.search(text) for text in texts):
        raise data.DataError(f"texts are {texts!r}: they must be a list of texts with words, such as "
                             "['atrial fibrillation']")
    ecg = torch.from_numpy(data.load_signals(signals, fs, leads, method.config.rate))
    text = method.encode_text([text.lower().strip(" .") for text in texts])
    views = method.encode_ecg(ecg.to(text.report.device))
    scales = [scales] if isinstance(scales, str) else scales
    return method.similarity(views, text, scales).float().cpu().numpy()


# ---- metrics -----------------------------------------------------------------------------------------------

def auroc_of_resamples(score, positive, weights):
    """AUROC of a class in K resamples, NaN if it has none: score (R,), positive (R,), weights (K, R)."""
    order = np.argsort(score, kind="stable")
    score, positive, weights = score[order], positive[order], weights[:, order]
    pos, neg = weights * positive, weights * ~positive
    below = np.concatenate([np.zeros((len(weights), 1)), np.cumsum(neg, 1)], 1)  # (K, R + 1)
    left, right = np.searchsorted(score, score, "left"), np.searchsorted(score, score, "right")
    wins = (pos * (below[:, left] + below[:, right])).sum(1) / 2
    pairs = pos.sum(1) * neg.sum(1)
    return np.divide(wins, pairs, out=np.full(len(weights), np.nan), where=pairs > 0)


def mean_auroc(scores, labels):
    """Macro AUROC over the classes that have positives and negatives; 0.5 where none has."""
    used = labels.any(0) & ~labels.all(0)
    return roc_auc_score(labels[:, used], scores[:, used]) if used.any() else 0.5


def best_f1(score, positive):
    """Largest F1 over all thresholds ON THESE ROWS, as published: an optimistic number."""
    precision, recall, _ = precision_recall_curve(positive, score)
    return float(np.max(2 * precision * recall / np.maximum(precision + recall, 1e-12)))


def interval(samples):
    """95 % bootstrap interval [low, high] of (K,) samples; None where fewer than a tenth are numbers."""
    found = samples[np.isfinite(samples)]
    return [float(v) for v in np.percentile(found, [2.5, 97.5])] if 10 * len(found) >= len(samples) else None


def resamples(patients):
    """Bootstrap over patients with all their records: (R,) -> (RESAMPLES, R), how often each row is drawn."""
    unique, place = np.unique(patients, return_inverse=True)
    rng = np.random.default_rng(0)
    return rng.multinomial(len(unique), np.full(len(unique), 1 / len(unique)), RESAMPLES)[:, place]


def score_classes(names, scores, positives, patients=None, untrained=()):
    """Metrics of a label set. scores (R, C), positives (R, C) bool, patients (R,) -> dict with "macro",
    "macro_enough" and "classes". untrained: classes of which a classifier saw no positive.

    A class without positives, or negatives, is listed and left out of the means; the second mean leaves out
    those with fewer than ENOUGH positives and the untrained. Intervals: of a class with ENOUGH positives; of
    a mean over the resamples in which all its classes have both kinds (none where they are under a tenth)."""
    patients = np.arange(len(scores)) if patients is None else patients
    weights, classes, samples, means = resamples(patients), {}, {}, {}
    for name, score, positive in zip(names, scores.T, positives.T):
        count = int(positive.sum())
        classes[name] = {"positives": count}
        if 0 < count < len(scores):
            samples[name] = auroc_of_resamples(score, positive, weights)
            classes[name] |= {"auroc": float(roc_auc_score(positive, score)),
                              "interval": interval(samples[name]) if count >= ENOUGH else None,
                              "auprc": float(average_precision_score(positive, score)),
                              "f1": best_f1(score, positive)}
    for title, least, without in (("macro", 1, ()), ("macro_enough", ENOUGH, untrained)):
        used = [n for n in samples if classes[n]["positives"] >= least and n not in without]
        if used:
            mean = {m: float(np.mean([classes[n][m] for n in used])) for m in ("auroc", "auprc", "f1")}
            ends = interval(np.mean([samples[n] for n in used], 0))
            means[title] = {"classes": len(used), "interval": ends, **mean}
    return {"records": len(scores), "patients": len(np.unique(patients)), **means, "classes": classes,
            "untrained": list(untrained), "scores": scores, "labels": positives}  # arrays stay out of files


def mean_with_interval(hits, patients, name):
    """Mean of (R,) numbers with its bootstrap interval; name: what it is."""
    weights = resamples(patients)
    return {"what": name, "value": float(hits.mean()), "interval": interval(weights @ hits / weights.sum(1))}


def permutation_p(ours, others, labels):
    """Paired permutation test, record by record, of two groups' macro AUROC: a list of scores (R, C) of each;
    their ranks are averaged over the runs of a group -> p, two-sided."""
    used = labels.any(0) & ~labels.all(0)
    a, b = (np.mean([rankdata(scores[:, used], axis=0) for scores in group], 0) for group in (ours, others))
    rng, positive = np.random.default_rng(0), labels[:, used]
    pairs = positive.sum(0) * (~positive).sum(0)
    macro = lambda scores: ((rankdata(scores, axis=0) * positive).sum(0) / pairs).mean()  # AUROC + constant
    swaps = [np.zeros((len(a), 1), bool), *(rng.random((RESAMPLES, len(a), 1)) < 0.5)]
    gaps = [abs(macro(np.where(swap, b, a)) - macro(np.where(swap, a, b))) for swap in swaps]
    return float(np.mean(np.array(gaps) >= gaps[0] - 1e-12))  # the first one is as it was


# ---- tasks -------------------------------------------------------------------------------------------------
# task(run, set, ask) -> {row: {column: metrics}}; row "" is the run itself. metrics: those of score_classes,
# or a dictionary with "what", "value", "interval" and further facts.


def text_scores(run, question, name, ask):
    """Zero-shot scores (R, C) of the records that are tested."""
    prompts = data.class_prompts(name, question.classes, ask.prompts, question.store.records)
    return score_records(run, question.store, question.test.rows, prompts, ask)


def zeroshot(run, name, ask):
    """Classes told apart by the similarity of the ECG with their texts; no label is used."""
    question = ask_set(name, run.config, ask)
    store, (rows, labels, patients), source = question.store, question.test, data.source_of(question.store)
    everyone = {"": text_scores(run, question, name, ask)}
    if len(rows) < 100 and ask.split == "test" and not ask.folds and len(store) > len(rows):
        print(f"\n{name}: {len(rows)} of {len(store)} {source} records are test records with a label of the "
              "set; --split all asks about all: fair, if the run saw none of them")
    if source == "code" and name == "code_test":  # beside it doctors, students and the authors' network
        marks, ids = data.code_annotations(store.meta["settings"]["src"]), store.records["id"].astype(int)
        everyone |= {who: m[ids[rows]].astype(float) for who, m in marks.items() if who != "gold_standard"}
    return {who: {"zero-shot": {"source": source} | score_classes(question.classes, given, labels, patients)}
            for who, given in everyone.items()}


GRID = [(scale, balance, c) for scale in (True, False) for balance in (None, "balanced")
        for c in (0.01, 0.1, 1, 10)]  # the protocol of ecg-fix (zackeberger/ecg-fix)


def fit_classes(x, labels, setting):
    """A logistic regression a class, by one of GRID: x (R, D), labels (R, C) -> function x -> log-odds."""
    scale, balance, c = setting
    center, spread = (x.mean(0), x.std(0) + 1e-8) if scale else (0, 1)
    ready = lambda x: ((x - center) / spread).astype(np.float64)  # the solver needs the digits
    x, weights = ready(x), np.zeros((labels.shape[1], x.shape[1]))
    biases = np.log((labels.sum(0) + 1) / ((~labels).sum(0) + 1))  # Laplace's, of a class of one kind
    for i in np.flatnonzero(labels.any(0) & ~labels.all(0)):
        head = LogisticRegression(C=c, class_weight=balance, solver="newton-cholesky").fit(x, labels[:, i])
        weights[i], biases[i] = head.coef_[0], head.intercept_[0]
    return lambda x: ready(x) @ weights.T + biases


def choose_classes(x, labels, x_val, val):
    """fit_classes with the setting of GRID that has the lowest log-loss on validation rows."""
    with threadpool_limits(1):  # a core a setting is faster than all cores on one
        fits = Parallel(-1, prefer="threads")(delayed(fit_classes)(x, labels, setting) for setting in GRID)
    return min(fits, key=lambda predict: np.logaddexp(0, predict(x_val) * np.where(val, -1, 1)).mean())


def subset(labelled, ratio):
    """Places of this share of training rows, drawn with seed 42; two at least."""
    count = len(labelled.rows)
    return np.sort(np.random.default_rng(42).permutation(count)[:max(2, round(ratio * count))])


def random_weights(run):
    """The same encoder with random weights."""
    torch.manual_seed(run.config.seed)
    method = copy.deepcopy(run.method)
    method.new_encoder()
    method.to(run.device).eval()
    return run._replace(method=method, folder=run.folder / "random", crc=crc_of_tensors(method.state_dict()))


REFERENCES = {}  # results that do not depend on what a run has learned


def of_encoder(run, what, name, question, ask, make):
    """make(), once for all runs of a comparison that encode alike, whatever their loss and seed."""
    own = ("rate", "normalise", "encoder", "width", "patch", "lead_drop", "shift")
    how = type(run.method).encode_tokens.__qualname__, [getattr(run.config, s) for s in own]
    key = repr((what, name, question.store.meta["plan"], vars(ask), how))
    if key not in REFERENCES:
        REFERENCES[key] = make()
    return REFERENCES[key]


def probe(run, name, ask):
    """A linear classifier on frozen vectors, by shares of the training rows (--ratios) or by positives a
    class (--shots); beside it the same encoder with random weights, and trained with labels."""
    if ask.shots and name in ("age", "sex"):
        raise data.DataError(f"{name} has no prompts for the zero-shot line of --shots: leave that out")
    if name == "age" and [tuple(ask.ratios), ask.protocol, ask.epochs] != [
            DEFAULTS[k] for k in ("ratios", "protocol", "epochs")]:
        raise data.DataError("age is a regression on all training rows: leave out --ratios, --probe-protocol "
                             "and --epochs")
    question = ask_set(name, run.config, ask, learn=True)
    features = lambda one: [vectors(one, question.store, part.rows, ask)["features"] for part in question[2:]]
    if name == "age":
        return {"": {"age": age_probe(*features(run), question)}}
    if ask.shots:
        value, ends = headline(zeroshot(run, name, ask)[""]["zero-shot"])
        texts = {"what": "AUROC", "value": value, "interval": ends, "records": len(question.test.rows)}
        return {"": few_labels(*features(run), question, ask) | {"zero-shot": texts}}

    def learned(one):
        (x, x_val, x_test), found = features(one), {}
        for ratio in ask.ratios:
            drawn = subset(question.train, ratio)
            known = x[drawn], question.train.labels[drawn], x_val, question.val.labels
            scores = (choose_classes(*known)(x_test) if ask.protocol == "grid" else
                      published_head(*known, x_test, question.test.labels, ask.protocol))
            found[f"{100 * ratio:g} %"] = supervised_metrics(question, drawn, scores)
        return found

    random = of_encoder(run, "random", name, question, ask, lambda: learned(random_weights(run)))
    return {"": learned(run), "random weights": random, **labels_alone(run, name, question, ask)}


def supervised_metrics(question, drawn, scores):
    """score_classes of the test rows, for what has learned from the training rows at these places."""
    seen = question.train.labels[drawn].any(0)
    return {"training records": len(drawn)} | score_classes(
        question.classes, scores, question.test.labels, question.test.patients,
        [c for c, some in zip(question.classes, seen) if not some])


def age_probe(x, x_val, x_test, question):
    """Ridge regression of the age in years, its penalty chosen on validation rows."""
    scaler, (train, val, test) = StandardScaler().fit(x), (part.labels[:, 0] for part in question[2:])
    x, x_val, x_test = map(scaler.transform, (x, x_val, x_test))
    fits = [Ridge(alpha).fit(x, train) for alpha in 10.0 ** np.arange(-1, 6)]
    found = min(fits, key=lambda fit: abs(fit.predict(x_val) - val).mean()).predict(x_test)
    return mean_with_interval(abs(found - test), question.test.patients, "error, years") | {
        "error of the median age": float(abs(np.median(train) - test).mean()),
        "correlation": float(np.corrcoef(found, test)[0, 1]), "records": len(test)}


def few_labels(x, _, x_test, question, ask):
    """k positives of every class (all where there are fewer), ten draws: mean and range of macro AUROC."""
    columns, labels, test = {}, question.train.labels, question.test.labels
    if labels.all(0).all() or not (test.any(0) & ~test.all(0)).any():
        raise data.DataError("no class of the set has records with and without it, to learn from and to test")
    for k in ask.shots:
        draws = [np.random.default_rng((draw, k)) for draw in range(10)]
        drawn = [np.unique(np.concatenate([rng.permutation(np.flatnonzero(y))[:k] for y in labels.T]))
                 for rng in draws]
        fits = [fit_classes(x[some], labels[some], (True, "balanced", 0.1)) for some in drawn]
        found = [mean_auroc(fit(x_test), test) for fit in fits]
        columns[f"{k} a class"] = {
            "what": "AUROC", "value": float(np.mean(found)), "interval": [min(found), max(found)],
            "deviation": float(np.std(found)), "records": len(x_test),
            "training records": float(np.mean(list(map(len, drawn))))}
    return columns


def published_head(x, labels, x_val, val, x_test, test, protocol):
    """Test scores of a linear head on the mean token, trained as published. merl: Adam, the rate falls after
    40 batches, and the BEST TEST EPOCH counts. melp: AdamW, cosine, stops after 5 epochs without a better
    AUROC on validation rows, softmax over the classes."""
    torch.manual_seed(42)
    x, x_val, x_test = (torch.from_numpy(part[:, :part.shape[1] // 2]) for part in (x, x_val, x_test))
    head, merl, best, since = torch.nn.Linear(x.shape[1], labels.shape[1]), protocol == "merl", (-1, None), 0
    optimiser = torch.optim.AdamW(head.parameters(), 1e-3, weight_decay=0 if merl else 1e-4)
    falling = torch.optim.lr_scheduler.MultiStepLR(optimiser, [40], 0.1) if merl else \
        torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 100, 1e-5)
    for _ in range(100):
        for rows in torch.randperm(len(x)).split(16 if merl else 128):
            optimiser.zero_grad()
            wanted = torch.from_numpy(labels[rows]).float()
            F.binary_cross_entropy_with_logits(head(x[rows]), wanted).backward()
            optimiser.step()
            if merl:
                falling.step()
        falling.step()
        with torch.no_grad():
            scores, shown = (head(x).numpy() if merl else head(x).softmax(1).numpy() for x in (x_test, x_val))
        quality = mean_auroc(scores, test) if merl else mean_auroc(shown, val)
        best, since = ((quality, scores), 0) if quality > best[0] else (best, since + 1)
        if since == 5 and not merl:
            break
    return best[1]


def with_labels(run, question, ratio, ask, fresh, batch=32):
    """Encoder and linear head trained with labels: AdamW, head 1e-3, encoder 1e-4, or 1e-3 from random
    weights; warm-up, cosine; leads dropped and records shifted as in the run's training. The epoch with the
    best AUROC on validation rows is tested. ask.epochs, or as many as 200 updates need."""
    drawn, device, c = subset(question.train, ratio), run.device, run.config
    train, rates = question.train.at(drawn), [1e-3, 1e-3 if fresh else 1e-4]
    method = random_weights(run).method if fresh else copy.deepcopy(run.method)
    torch.manual_seed(c.seed)
    head = torch.nn.Linear(2 * method.ecg.dim, len(question.classes)).to(device)
    per_epoch = math.ceil(len(drawn) / batch)
    epochs, limit = max(ask.epochs, math.ceil(200 / per_epoch)), int(c.shift * c.rate)
    learned, best = torch.nn.ModuleList([head, method.ecg]), (-1, None)
    optimiser = torch.optim.AdamW([{"params": part.parameters()} for part in learned])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rates, epochs * per_epoch, pct_start=0.1,
                                                   cycle_momentum=False)
    odds = lambda ecg: head(pool(method.encode_tokens(ecg)))

    @torch.no_grad()
    def predict(rows):
        method.eval()
        return torch.cat([odds(ecg).cpu() for ecg in batches(question.store, rows, device, ask)]).numpy()

    for epoch in tqdm(range(epochs), desc=f"training with labels, {ratio:g}", leave=False):
        method.train()
        for some in torch.randperm(len(drawn)).split(batch):
            part, step = train.at(some.numpy()), int(torch.randint(-limit, limit + 1, ()))
            ecg = signals(question.store, part.rows, ask)
            data.shift(ecg, step)
            ecg = torch.from_numpy(ecg) * (torch.rand(len(ecg), 12, 1) >= c.lead_drop)
            labels = torch.from_numpy(part.labels).float().to(device)
            F.binary_cross_entropy_with_logits(odds(ecg.to(device)), labels).backward()
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
        if (epoch + 1) % max(1, epochs // ask.epochs) == 0 or epoch == epochs - 1:
            quality = mean_auroc(predict(question.val.rows), question.val.labels)
            if quality > best[0]:
                best = quality, copy.deepcopy(learned.state_dict())
    learned.load_state_dict(best[1])
    return supervised_metrics(question, drawn, predict(question.test.rows))


def labels_alone(run, name, question, ask):
    """The row "trained with labels" of a probe and of fine-tuning: the encoder from random weights."""
    make = lambda: {f"{100 * r:g} %": with_labels(run, question, r, ask, True) for r in ask.ratios}
    return {"trained with labels": of_encoder(run, "labels", name, question, ask, make)}


def finetune(run, name, ask):
    """Encoder and classifier trained with labels, from the run's weights and from random ones."""
    question = ask_set(name, run.config, ask, learn=True)
    return {"": {f"{100 * r:g} %": with_labels(run, question, r, ask, False) for r in ask.ratios},
            **labels_alone(run, name, question, ask)}


def transfer(run, name, ask):
    """Zero-shot, and a probe learned on another set, over the classes that both have (data.join_classes): a
    class scores the highest of the source's classes that are joined to it."""
    question, columns = ask_set(name, run.config, ask), {}
    texts, (_, labels, patients) = text_scores(run, question, name, ask), question.test
    place = {c: i for i, c in enumerate(question.classes)}
    for source in (source for source in TRANSFER if source != name):
        try:
            known = ask_set(source, run.config, ask, learn=True, test=False)
            joined = {c: those for c, those in data.join_classes(source, name).items() if c in place}
            if known.store.path == question.store.path:  # what is tested may have been learned from
                raise data.DataError("they are of the same records")
            if not joined:
                raise data.DataError("they have no class in common")
        except data.DataError as error:
            print(f"{source} -> {name}: not done: {error}", file=sys.stderr)
            continue
        x, x_val, x_test = (vectors(run, store, part.rows, ask)["features"] for store, part in (
            (known.store, known.train), (known.store, known.val), (question.store, question.test)))
        scores = choose_classes(x, known.train.labels, x_val, known.val.labels)(x_test)
        highest = [scores[:, list(map(known.classes.index, those))].max(1) for those in joined.values()]
        own, without = [place[c] for c in joined], [c for c in place if c not in joined]
        for how, found in (("probe", np.stack(highest, 1)), ("zero-shot", texts[:, own])):
            columns[f"from {source}, {how}"] = {"joined": joined, "left out": without} | score_classes(
                list(joined), found, labels[:, own], patients)
        print(f"{source} -> {name}: " + "; ".join(f"{c} = {', '.join(those)}" for c, those in joined.items())
              + f"; left out: {', '.join(without) or 'none'}")
    if not columns:
        raise data.DataError(f"no other set of {', '.join(TRANSFER)} to transfer from")
    return {"": columns}


def ranks(like, right):
    """Rank of the best right candidate among the wrong ones, a tie counts half: like, right (Q, K) -> (Q,)"""
    best, wrong = np.where(right, like, -np.inf).max(1, keepdims=True), np.where(right, -np.inf, like)
    return 1 + (wrong > best).sum(1) + (wrong == best).sum(1) / 2


def recall(like, right, patients):
    """R@k of queries among candidates, like and right (Q, K); chance: R@1 of a random order."""
    rank = ranks(like, right)
    return mean_with_interval((rank <= 1).astype(float), patients, "R@1") | {
        **{f"R@{k}": float((rank <= k).mean()) for k in (5, 10)}, "chance": float(right.mean()),
        "median rank": float(np.median(rank)), "queries": len(like), "candidates": like.shape[1]}


def both_directions(ecg, text, texts, findings, patients):
    """Retrieval among R records: ecg (R, dim), text (T, dim) of distinct texts, texts (R,) which of them is a
    record's, findings (T,) what each says. Of a text, the best-ranked of its records counts."""
    present, texts = np.unique(texts, return_inverse=True)
    like, findings = ecg @ text[present].T, findings[present]                              # (R, T), (T,)
    own, same = texts[:, None] == np.arange(len(present)), findings[texts][:, None] == findings  # (R, T)
    first, found = patients[own.argmax(0)], {}
    for title, right in (("", own), (", same findings", same)):
        found[f"ECG -> report{title}"] = recall(like, right, patients)
        found[f"report -> ECG{title}"] = recall(like.T, right.T, first)
    return found


@torch.no_grad()
def retrieve(run, name, ask):
    """Which report belongs to this ECG, and which ECG to this report? Of more than 1,000 records also in
    pools of 1,000, mean of ten draws."""
    store, read = data.find_store(name, run.config, ask.data), data.Findings()
    rows, tags = rows_with_reports(store, run, ask, 2)
    reports = [models.join(tags[row]) for row in rows]
    distinct, first, texts = np.unique(reports, return_index=True, return_inverse=True)
    findings = np.array([" ".join(sorted(read.named(tags[rows[i]]))) or f"none {i}" for i in first])
    text = embed_reports(run.method, distinct).numpy()
    ecg, patients = vectors(run, store, rows, ask)["rhythm"], store.records["patient"].to_numpy()[rows]
    among = lambda some: both_directions(ecg[some], text, texts[some], findings, patients[some])
    columns = among(np.arange(len(rows)))
    if len(rows) > 1000:
        pools = [among(np.random.default_rng(draw).permutation(len(rows))[:1000]) for draw in range(10)]
        for title, m in pools[0].items():
            mean = lambda k: np.mean([pool[title][k] for pool in pools], 0).tolist()
            columns[f"{title}, of 1,000"] = m | {k: mean(k) for k in (
                "value", "interval", "R@5", "R@10", "chance", "median rank")}
    return {"": columns}


def identify(run, name, ask):
    """Is a patient's second record nearest to the same patient's first? By the cosine of unprojected vectors,
    among patients with two records or more; nothing is trained."""
    store = data.find_store(name, run.config, ask.data)
    rows, patients = test_rows(store, ask), store.records["patient"].to_numpy()
    pairs = np.array([rows[:2] for _, rows in pd.Series(rows).groupby(patients[rows]) if len(rows) > 1])
    if len(pairs) < 2:
        raise data.DataError(f"{store.path}: fewer than two patients with two records among those asked for")
    x = (vectors(run, store, part, ask)["features"] for part in pairs.T)
    first, second = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in x)
    right = np.eye(len(pairs), dtype=bool)
    return {"": {"second record": recall(second @ first.T, right, patients[pairs[:, 0]])}}


def embed_set(run, name, ask):
    """Just the vectors of every record: a file in the run's embeddings/, and no table."""
    store = data.find_store(name, run.config, ask.data)
    shapes = {k: values.shape for k, values in vectors(run, store, np.arange(len(store)), ask).items()}
    print(f"{run.folder / 'embeddings'}: vectors of {data.source_of(store)}, with ids and split: {shapes}")
    return {}


def overlap(written, truth):
    """Micro F1, precision and recall of sets: both lists of R sets."""
    hits = sum(len(a & b) for a, b in zip(written, truth))
    claims, facts = sum(map(len, written)), sum(map(len, truth))
    return {"what": "F1", "value": 2 * hits / max(1, claims + facts), "precision": hits / max(1, claims),
            "recall": hits / max(1, facts)}


def bleu(written, truth):
    """BLEU-4 of a corpus (Papineni et al. 2002): two lists of R lists of words, one reference each."""
    logs, grams = [], lambda words, n: Counter(zip(*(words[i:] for i in range(n))))
    for n in range(1, 5):
        pairs = [(grams(w, n), grams(t, n)) for w, t in zip(written, truth)]
        hits, total = sum((w & t).total() for w, t in pairs), sum(w.total() for w, _ in pairs)
        logs.append(math.log(hits / total) if hits else -math.inf)
    return math.exp(min(0, 1 - sum(map(len, truth)) / max(1, sum(map(len, written)))) + sum(logs) / 4)


def rouge_l(written, truth):
    """Mean F1 of the longest common subsequence of words (Lin 2004)."""
    scores = []
    for w, t in zip(written, truth):
        row = [0] * (len(t) + 1)
        for word in w:
            above, row = row, [0]
            for i, other in enumerate(t):
                row.append(above[i] + 1 if word == other else max(above[i + 1], row[i]))
        scores.append(2 * row[-1] / max(1, len(w) + len(t)))
    return float(np.mean(scores))


def generate(run, name, ask, batch=64):
    """Reports written from the ECG (reports.jsonl) against the doctors': as sets of findings (codes that
    data.Findings reads) and of statements, and word by word; beside them the commonest training report."""
    if not hasattr(run.method, "generate"):
        raise models.ModelError(f"a {run.config.method} run writes no reports; --method melp does")
    store, read = data.find_store(name, run.config, ask.data), data.Findings()
    rows, tags = rows_with_reports(store, run, ask)
    texts = [text for ecg in batches(store, rows, run.device, ask, "writing", batch)
             for text in run.method.generate(ecg, ask.beams)]
    written = [[s.strip(" .") for s in text.split(". ") if s.strip(" .")] for text in texts]
    truth, ids = [tags[row] for row in rows], store.records["id"].iloc[rows]
    lines = [json.dumps({"id": str(i), "report": t, "written": w}) for i, t, w in zip(ids, truth, written)]
    data.write_text(run.folder / "reports.jsonl", "\n".join(lines) + "\n")
    train = [tuple(tags[row]) for row in np.flatnonzero(store.records["split"] == "train") if tags[row]]
    common = list(Counter(train or map(tuple, truth)).most_common(1)[0][0])
    words, found = lambda reports: [models.join(report).split() for report in reports], {}
    for title, given in (("", written), ("commonest report", [common] * len(rows))):
        codes = [[set(read.named(report)) for report in reports] for reports in (given, truth)]
        facts = {"BLEU-4": bleu(words(given), words(truth)), "ROUGE-L": rouge_l(words(given), words(truth)),
                 "records": len(rows), "different": len(set(map(tuple, given)))}
        found[title] = {"findings": overlap(*codes) | facts,
                        "statements": overlap(list(map(set, given)), list(map(set, truth)))}
    return found


TASKS = {"zeroshot": zeroshot, "probe": probe, "transfer": transfer, "retrieve": retrieve,
         "finetune": finetune, "identify": identify, "embed": embed_set, "generate": generate}


# ---- where a model looks -----------------------------------------------------------------------------------

def open_record(record, rate):
    """(ECG (12, N) mV, title) of a WFDB record, or of SPEC:ID. Errors: DataError."""
    path, (spec, _, name) = record.removesuffix(".hea"), record.rpartition(":")
    if os.path.exists(path + ".hea"):
        return data.load_signals(path, None, (), rate)[0], os.path.basename(path)
    if not spec:
        raise data.DataError(f"{record}: no WFDB record (there is no {path}.hea), and not SOURCE:PATH:ID")
    store = data.open_store(spec, rate)
    rows = np.flatnonzero(store.records["id"] == name)
    if not len(rows):
        raise data.DataError(f"{store.path}: holds no record {name!r}")
    statements = "; ".join(store.records["statements"].iloc[rows[0]])
    return store.ecg(rows[:1])[0], f"{data.source_of(store)} {name}: {statements}"


@torch.no_grad()
def look(run, record, texts, ask):
    """Scores of texts on one record, their quantile among the run's training records, and a picture."""
    ecg, title = open_record(record, run.config.rate)
    texts, path = [t.lower().strip(" .") for t in texts], run.folder / f"look_{file_name(record)}.png"
    text, signal = run.method.encode_text(texts), torch.from_numpy(ecg)[None].to(run.device)
    scores = run.method.similarity(run.method.encode_ecg(signal), text, ask.scales)[0].tolist()
    rows, weight = {t: {"similarity": score} for t, score in zip(texts, scores)}, []
    try:
        store = data.open_store(run.config.data, run.config.rate)
        known = np.sort(np.random.default_rng(0).permutation(store.rows("train"))[:1000])
        others = score_records(run, store, known, [[t] for t in texts], asking(scales=ask.scales))
        for row, score, column in zip(rows.values(), scores, others.T):
            row["higher than"] = f"{100 * (column < score).mean():.0f} % of {len(known)} training records"
    except data.DataError as error:
        print(f"no comparison with the training records: {error}")
    print_table(title, rows)
    try:
        weight = models.attention_over_time(run.method, signal, text)
    except models.ModelError as error:
        print(error)
    labels = [", higher than ".join([f"{t}: {r.pop('similarity'):.3f}", *r.values()])
              for t, r in rows.items()]
    peaks = [p for p in segment_beats(signal, run.config.rate)[0][0].tolist() if p >= 0]
    data.plot_seen(ecg, run.config.rate, textwrap.shorten(title, 150), dict(zip(labels, weight)), peaks, path)
    print(f"drawn in {path}")


# ---- tables, pictures, results.json ------------------------------------------------------------------------

def headline(metrics, mean="macro"):
    """(value, interval) that a result is known by; (None, None) where there is none."""
    found = metrics.get(mean, {}) if "classes" in metrics else metrics
    return found.get("auroc", found.get("value")), found.get("interval")


def summary(metrics):
    """A result as one line of a table."""
    if "classes" not in metrics:
        return {metrics.get("what") if k == "value" else k: v for k, v in metrics.items() if k != "what"}
    line = {"records": metrics["records"]}
    for mean, note in (("macro", ""), ("macro_enough", f", {ENOUGH} positives")):
        line |= dict(zip((f"AUROC{note}", f"95 %{note}"), headline(metrics, mean)))
        line[f"classes{note}"] = metrics.get(mean, {}).get("classes")
    return line | {"AUPRC": metrics.get("macro", {}).get("auprc"), "untrained": len(metrics["untrained"])}


COLUMNS = {"positives": "positives", "auroc": "AUROC", "interval": "95 % interval", "auprc": "AUPRC",
           "f1": "best F1"}


def class_rows(metrics):
    """A result as a table of classes, their means below."""
    rows = {name: {"interval": "no negatives" if r["positives"] else "no positives"} | r
            for name, r in metrics["classes"].items()}
    for mean, text in (("macro", "classes with positives"), ("macro_enough", f"at least {ENOUGH} positives")):
        if mean in metrics:
            rows[f"macro, {text} ({metrics[mean]['classes']})"] = {"positives": ""} | metrics[mean]
    return {name: {title: r.get(key) for key, title in COLUMNS.items()} for name, r in rows.items()}


def print_table(title, rows):
    """{row: {column: value}}; what is nested is for results.json alone."""
    def written(value):
        if isinstance(value, list) and len(value) == 2:
            return "{:.3f} - {:.3f}".format(*value)
        return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
    plain = {row: {k: written(v) for k, v in values.items() if not isinstance(v, (dict, np.ndarray))}
             for row, values in rows.items()}
    print(f"\n{title}\n{pd.DataFrame.from_dict(plain, orient='index').fillna('-').to_string()}")


def plot(title, panels, path):
    """{panel: {label: (values, interval or None)}}: dots, their mean as a stroke, the interval as a bar."""
    from matplotlib.figure import Figure
    labels = list(dict.fromkeys(label for rows in panels.values() for label in rows))
    columns = min(4, len(panels))
    lines = math.ceil(len(panels) / columns)
    size = max(7, 2.2 + 2.4 * columns), lines * (1.1 + 0.25 * len(labels))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(lines, columns, sharey=True, squeeze=False).flat
    for axes in grid[len(panels):]:
        axes.set_visible(False)
    for axes, (panel, rows) in zip(grid, panels.items()):
        for label, (values, ends) in rows.items():
            y, color = labels.index(label), "C0" if ends else "0.5"
            axes.plot(ends or [], [y, y] if ends else [], color="0.8", lw=5, solid_capstyle="butt", zorder=1)
            axes.plot([np.mean(values)] * 2, [y - 0.3, y + 0.3], color="C0", lw=1.5, zorder=2)
            axes.plot(values, [y] * len(values), "o", color=color, mec="white", ms=5.5, zorder=3)
        axes.set_yticks(range(len(labels)), [textwrap.fill(label, 40) for label in labels], fontsize=8)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.set_title(panel, fontsize=9)
        axes.grid(axis="x", color="0.92")
        axes.spines[["top", "right", "left"]].set_visible(False)
    figure.suptitle(textwrap.fill(title, 90), fontsize=10)
    figure.savefig(path, dpi=130)


OPTIONS = {  # that concern some tasks only, or no result
    "device": (), "text_model": (), "ratios": ("probe", "finetune"), "shots": ("probe",),
    "protocol": ("probe",), "epochs": ("probe", "finetune"), "beams": ("generate",),
    "prompts": ("zeroshot", "transfer", "probe"),  # of --probe for its zero-shot line
    "scales": ("zeroshot", "transfer", "probe", "look")}


def is_own(task):
    """Is it a task of --task, which may look at any option?"""
    return models.is_file(task)


def entry(name, options):
    """The title of a result: what was asked, and those options that are not the defaults."""
    plain = lambda v: tuple(v) if isinstance(v, list) else v
    given = {k: v for k, v in options.items() if v and plain(v) != DEFAULTS[k] or v == 0 and k == "noise"}
    text = lambda v: ",".join(map(str, v)) if isinstance(v, (list, tuple)) else v
    return " ".join([name, *(f"{k}={text(v)}" for k, v in given.items())])


def file_name(text):
    return re.sub("[^a-zA-Z0-9_.=,-]+", "_", text).strip("_.")[-150:]


def show(folder, task, name, rows, ask):
    """Print a result, draw it, and put it into results.json: none of other options is overwritten."""
    concerned = lambda option: task in OPTIONS.get(option, TASKS) or is_own(task) and OPTIONS[option]
    options = {k: v for k, v in vars(ask).items() if concerned(k)}
    data_of_set = [spec for spec in ask.data if spec.partition(":")[0] == name.split("_")[0]]
    options["data"] = data_of_set if data_of_set and task != "transfer" else list(ask.data)
    title = entry(name, options)
    lines = {", ".join(filter(None, place)): m for place, m in flat(rows).items()}
    heads = {label: ([value], ends) for label, (value, ends) in zip(lines, map(headline, lines.values()))
             if value is not None}
    if task == "zeroshot":
        for label, m in lines.items():
            print_table(f"{label} {name} of {m['source']} records: {m['records']} records", class_rows(m))
        known = {c: r for c, r in rows[""]["zero-shot"]["classes"].items() if "auroc" in r}
        heads = {f"{c} ({known[c]['positives']})": ([known[c]["auroc"]], known[c]["interval"])
                 for c in sorted(known, key=lambda c: -known[c]["auroc"])}
    elif lines:
        how = {"merl": ", as MERL: the best TEST epoch", "melp": ", as MELP"}.get(ask.protocol, "")
        print_table(f"{task} {name}{how}", {label: summary(m) for label, m in lines.items()})
    if heads:
        what = next(iter(lines.values())).get("what", "AUROC")
        plot(f"{task} {title}", {what: heads}, Path(folder) / f"{task}_{file_name(title)}.png")
    plain = {row: {} for row in rows}
    for (row, column), m in flat(rows).items():
        plain[row][column] = {k: v for k, v in m.items() if not isinstance(v, np.ndarray)}
    if rows:
        remember(folder, task, {title: {"options": options, "results": plain}})


def flat(rows):
    """{row: {column: metrics}} -> {(row, column): metrics}."""
    return {(row, column): m for row, columns in rows.items() for column, m in columns.items()}


def known_results(run):
    """results.json of a run, {} where there is none. Errors: DataError."""
    path = Path(run) / "results.json"
    return data.read_json(path, {str: dict}, "move it away") if path.exists() else {}


def remember(run, key, found):
    """Add to an entry of a run's results.json. Errors: DataError where that cannot be done."""
    if not Path(run).is_dir():
        raise data.DataError(f"{run}: not a run folder")
    with data.locked(Path(run) / ".results.lock"):  # of two evaluations at a time, none loses the other's
        known = known_results(run)
        known.setdefault(key, {}).update(found)
        data.write_text(Path(run) / "results.json", json.dumps(known, indent=1))


def report(folder, wanted, **options):
    """Do tasks on a run, {task: sets}, and show each -> {(task, set): rows}. What cannot be done is said in a
    sentence, and the others go on. Errors: DataError, ModelError where nothing can."""
    ask, results, fault = asking(**options), {}, None
    for task in wanted:  # before all the work: can it be kept?
        remember(folder, task, {})
    run = open_run(folder, ask)
    if (ask.split in ("train", "all") or min(ask.folds or [10]) < 9) and run.config.data:
        folds = ", folds 1 to 8" * bool(ask.folds)
        print(f"of {run.config.data}, the run has seen the training records{folds}")
    for task, name in [(task, name) for task, names in wanted.items() for name in names]:
        try:
            results[task, name] = TASKS[task](run, name, ask)
            show(folder, task, name, results[task, name], ask)
        except (data.DataError, models.ModelError) as error:
            fault = error
            print(f"\n{task} {name}: not done: {error}", file=sys.stderr)
    if fault and not results:
        raise fault
    return results


# ---- a run to be published ---------------------------------------------------------------------------------

CARD = """---
tags: [ecg, electrocardiogram, zero-shot-classification]
---
# {name}

{method}, {parameters:.1f} M parameters: 12-lead ECGs ({leads}; {rate} Hz, 10 s, mV) and texts in one space.
With ecg-language {version}:

    from eval import load_run, score
    method, config = load_run("{name}")
    score(method, ["atrial fibrillation"], signal, fs=500, leads=["I", "II", "V2"])  # (3, N) in mV

| task | set | figure [95 % interval] | records |
|---|---|---|---|
{table}
"""


def export(run, folder):
    """Write a run as a folder to publish, which load_run opens anywhere and which names no path of this
    machine; with what a signal must be, the label sets' prompts, and a model card. Errors: DataError."""
    (method, config), folder = load_run(run), Path(folder)
    if folder.exists():
        raise data.DataError(f"{folder} exists: choose another folder")
    shutil.copytree(Path(run) / "tokenizer", folder / "tokenizer")
    for path in [Path(run) / "model.safetensors", *Path(run).glob("*.py")]:
        shutil.copy(path, folder)
    signal = dict(leads=data.LEADS, rate=config.rate, seconds=10, unit="mV", normalise=config.normalise)
    sets = {name: {c: row["prompts"] for c, row in data.label_set(name).items()}
            for name in data.LABEL_SETS if name not in data.OCCURRING}
    made_by = {k: v for k, v in read_config(run)[1].items() if k not in models.own_files(config)}
    settings = models.settings_of(config)
    here = dict.fromkeys(("data", "init", "text_model", "name", "llm"), "") | {"init_share": 0.0}
    settings |= {k: v for k, v in here.items() if k in settings}
    settings |= {"made_by": made_by, "about": signal | {"label_sets": sets}}
    data.write_text(folder / "config.json", json.dumps(settings, indent=1))
    data.write_text(folder / "README.md", CARD.format(
        name=folder.name, method=settings["method"], leads=", ".join(data.LEADS), rate=config.rate,
        parameters=sum(p.numel() for p in method.parameters()) / 1e6, version=models.VERSION,
        table="\n".join(measured(known_results(run)))))
    print(f"written to {folder}; its README.md is the model card")


def measured(known):
    """results.json -> the lines of a Markdown table, of what was measured with the run's own weights."""
    for task, title, found in [(task, *each) for task, entries in known.items() for each in entries.items()]:
        if isinstance(found, dict) and "results" in found and not found["options"]["checkpoint"]:
            shown = entry(title.split()[0], found["options"] | {"data": ()})
            for place, m in flat(found["results"]).items():
                figure, how = figure_text(over_runs([m])), ", ".join(filter(None, (task, *place)))
                asked = m.get("records", m.get("queries", "-"))
                yield f"| {how} | {shown} | {m.get('what', 'AUROC')} {figure} | {asked} |"


# ---- many runs ---------------------------------------------------------------------------------------------

FACTS = {"records_per_second": float, "parameters": float, "warnings": [str]}  # what is read of training.json
NO_MATTER = "name", "seed", "threads", "workers", "save_every", "compile", "wandb"  # repetitions may differ


def group_runs(configs):
    """Configs that differ in NO_MATTER only belong together -> {title: their places}, in order. A title is
    the method and each field that has not its most common value (of equally common ones the first)."""
    fields = [f for f in dict.fromkeys(f for config in configs for f in config) if f not in NO_MATTER]
    groups, titled = {}, {}
    for place, config in enumerate(configs):
        groups.setdefault(tuple(config.get(f) for f in fields), []).append(place)
    for values, places in groups.items():
        method = configs[places[0]]["method"]
        peers = [v for v, p in groups.items() if configs[p[0]]["method"] == method]
        usual = [Counter(column).most_common(1)[0][0] for column in zip(*peers)]
        titled[" ".join([method] + [f"{f}={v}" for f, v, u in zip(fields, values, usual)
                                     if v not in (u, None)])] = places
    return titled


def over_runs(found, mean="macro"):
    """A figure over runs: metrics of each -> dict; mean: "macro" or "macro_enough". None: no run has it."""
    heads = [head for head in (headline(m, mean) for m in found) if head[0] is not None]
    values, known = [value for value, _ in heads], [ends for _, ends in heads if ends]
    return {"values": values, "mean": float(np.mean(values)), "lowest": min(values), "highest": max(values),
            "interval": np.mean(known, 0).tolist() if len(known) == len(heads) else None} if heads else None


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
    rows = [["method", "runs", *(n.removeprefix("ptbxl_") for n in names), "records/s", "parameters"],
            ["---"] * (len(names) + 4)]
    for title, group in groups.items():
        speed, size = group["records_per_second"], group["parameters"]
        rows.append([title, str(len(group["runs"])), *(figure_text(group[mean].get(name)) for name in names),
                     f"{speed:.0f}" if speed else "-", f"{size / 1e6:.2f} M" if size else "-"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def summarise(found, folders, configs):
    """A group of runs: {column: metrics of each} -> figures over runs; speed and parameters are means."""
    paths = [Path(folder) / "training.json" for folder in folders]
    training = [data.read_json(path, FACTS) if path.exists() else None for path in paths]
    mean = lambda key: float(np.mean([facts[key] for facts in training if facts])) if any(training) else None
    return {"runs": list(map(str, folders)), "seeds": [config["seed"] for config in configs],
            "config": {k: v for k, v in configs[0].items() if k not in NO_MATTER}, "training": training,
            **{key: {c: over_runs(m, key) for c, m in found.items()} for key in ("macro", "macro_enough")},
            **{key: mean(key) for key in ("records_per_second", "parameters")}}


VALIDATED = {"loss": float, "R@1": float, "R@5": float, "auroc": {str: float}}


def validation_figures(run):
    """What validation records showed of a run's weights, in training -> columns as of a task. Errors:
    DataError."""
    kept = known_results(run).get("kept", {}).get("update")  # by --keep best; else the last
    found = [line for line in read_log(run) if "validation" in line and kept in (None, line["update"])]
    if not found:
        raise data.DataError(f"{run}: no validation records were looked at in training; name a task")
    last = data.check(found[-1]["validation"], VALIDATED, Path(run) / "log.jsonl")
    figures = {k: last[k] for k in ("loss", "R@1", "R@5")} | last["auroc"]
    return {name: {"what": name, "value": value} for name, value in figures.items()}


OVER_RUNS = ": mean over runs (lowest - highest)"
AS_TASKS = ("macro AUROC, or the task's own figure" + OVER_RUNS
            + " [95 % bootstrap interval, mean of its ends over runs], p against {}")
AS_VALIDATED = "what validation records showed in training, of a label set the macro AUROC" + OVER_RUNS


def compare(folders, wanted, **options):
    """Do tasks on finished runs, or where none is wanted show what validation records showed (a setting
    chosen by test records is not tested by them); put repetitions together (group_runs), print one table,
    draw and keep it beside the first run. Plain files among `folders` (runs/*) are passed over. Errors:
    DataError."""
    folders = list(dict.fromkeys(folder for folder in map(Path, folders) if not folder.is_file()))
    several, configs, stores = len(folders) > 1, [], []
    for folder in list(folders):
        there = not several or (folder / "config.json").exists()
        config, made_by = read_config(folder) if there else (None, {})
        if several and not (config and models.method_class(config).needs_ecg):
            print(f"{folder} is left out: no run with an ECG encoder")
            folders.remove(folder)
            continue
        files = {f"checksum of {name}": data.crc_of(path) for name, path in models.own_files(config).items()}
        configs.append(models.settings_of(config) | files)
        stores.append(made_by["store"])
    if not folders:
        raise data.DataError("no run folder to compare")
    if not wanted and len(set(stores)) > 1:
        print("these runs are of different stores: their validation records may not be the same")
    grouped = group_runs(configs)
    for title, places in grouped.items():
        if len({stores[place] for place in places}) > 1:
            print(f"{title}: its runs are of different stores: of other records, or prepared by other code")
    for folder in folders:  # before hours of evaluation
        if not (folder / "model.safetensors").exists():
            raise data.DataError(f"{folder} is not a finished run: continue it with python train.py --resume "
                                 f"{folder}, or leave it out")
    titles = {place: title for title, places in grouped.items() for place in places}
    table, records = defaultdict(lambda: defaultdict(dict)), {}  # {title: {label: {place of a run: metrics}}}
    for i, folder in enumerate(tqdm(folders, desc="runs")):
        try:
            results = report(folder, wanted, **options) if wanted else {
                ("validation", ""): {"": validation_figures(folder)}}
        except data.DataError as error:
            if wanted or not several:
                raise
            print(f"{error}; it is left out")
            continue
        for (task, name), rows in results.items():
            for (row, column), m in flat(rows).items():
                label = name if task == "zeroshot" else f"{name} {task}, {column}".strip()
                found = table[f"{row} ({configs[i]['encoder']})" if row else titles[i]][label]
                if not any(m is other for other in found.values()):  # not what an earlier run has brought
                    found[i] = m
                asked = m.get("records", m.get("queries"))
                number, other = records.setdefault(label, (asked, folder))
                if number != asked:
                    raise data.DataError(f"{label} has {asked} records for {folder}, but {number} for "
                                         f"{other}: name the same for all with --data")
    if not table:  # --embed has no figures, or no run was validated
        return {}
    groups = {}
    for title, columns in table.items():
        places = sorted(set().union(*columns.values()))
        groups[title] = summarise({label: list(found.values()) for label, found in columns.items()},
                                  [folders[i] for i in places], [configs[i] for i in places])
    first, *others = groups
    for title in others:
        for label, figure in groups[title]["macro"].items():
            sides = [[m for m in table[t][label].values() if "scores" in m] for t in (title, first)]
            if figure and all(sides):
                scores = [[m["scores"] for m in side] for side in sides]
                figure["p"] = permutation_p(*scores, sides[0][0]["labels"])
    print(f"\n{AS_TASKS.format(first) if wanted else AS_VALIDATED}\n\n{markdown(groups)}")
    if wanted:
        print(f"\nthe same over classes with at least {ENOUGH} positives\n\n"
              f"{markdown(groups, 'macro_enough')}")
    for run, facts in [pair for group in groups.values() for pair in zip(group["runs"], group["training"])]:
        if warnings := (facts or {}).get("warnings"):
            print(f"\nwarnings in training of {run}: {len(warnings)}, the last at {warnings[-1]}")
    path, asked = folders[0].parent / "comparison.json", {k: str(v) for k, v in options.items()}
    data.write_text(path, json.dumps({"options": asked, "groups": groups}, indent=1))
    panels = {label: {title: (group["macro"][label]["values"], group["macro"][label]["interval"])
                      for title, group in groups.items() if group["macro"].get(label)} for label in records}
    plot("each run, their mean, and the 95 % bootstrap interval", panels, path.with_suffix(".png"))
    print(f"\nwritten to {path} and {path.with_suffix('.png')}")
    return groups


# ---- command line ------------------------------------------------------------------------------------------

def sets_for(task, names):
    """Label sets of a task: "ptbxl" is four where classes are asked about, and a data set elsewhere."""
    if task not in ("zeroshot", "probe", "finetune", "transfer"):
        return names
    names = [name for given in names for name in data.GROUPS.get(given.rstrip(":"), (given,))]
    known = [*data.LABEL_SETS, *(("age", "sex") if task == "probe" else ())]
    for name in names:
        if name not in known and not name.endswith(".json"):
            raise data.DataError(f"unknown label set {name!r}; known are {', '.join(known)}, csv (the codes "
                                 "of your own data), or a file NAME.json")
    return names or list(TRANSFER)


def parse(argv):
    """Command line -> what was given."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS,
        description=__doc__, epilog=textwrap.fill(
            "Label sets: ptbxl (the first four), csv (the codes of your own records), a file NAME.json of "
            f"your own classes, {', '.join(data.LABEL_SETS)}.", 100))
    add, several = parser.add_argument, lambda kind: lambda text: [kind(part) for part in text.split(",")]
    for task, function in [pair for pair in TASKS.items() if not is_own(pair[0])]:
        note = " ".join(function.__doc__.split("\n\n")[0].split()).replace("%", "%%")
        add(f"--{task}", nargs="*" if task in ("transfer", "generate") else "+", metavar="SET", help=note)
    add("--task", nargs="+", metavar=("FILE.py:FUNCTION", "SET"), help="a task of your own: docs/fork.md")
    add("--look", nargs="+", metavar=("RECORD", "TEXT"), help="where it is seen in a WFDB record, SPEC:ID")
    add("--run", help="run folder [the newest in runs/]")
    add("--export", metavar="DIR", help="a folder to publish: weights, config, tokenizer, model card")
    add("--compare", nargs="+", metavar="RUN", help="finished runs: one table over all, of tasks, or else of "
        "what validation records showed in training")
    add("--ckpt", dest="checkpoint", help="a .safetensors file, with config and tokenizer from --run or from "
        "beside it; or merl:FILE, melp:FILE, dbeta:FILE, a checkpoint as its authors published it")
    add("--text-model", help="of a published checkpoint: folder with its tokenizer [the published name]")
    add("--data", nargs="+", metavar="SOURCE:PATH", help="where the records are: one for each source")
    add("--split", choices=("test", "val", "train", "all"), help="which records are tested [test]")
    add("--folds", type=several(int), help="PTB-XL folds in place of the split, e.g. 9,10")
    add("--prompts", help="descriptive | plain | a JSON file {code: text or [texts]} [descriptive]")
    add("--scales", type=several(str), help="rhythm,beat,token or some of them [the method's own]")
    add("--leads", type=several(str), help="leads that are kept, e.g. I,II,V2; the others are zero")
    add("--derive-leads", action="store_true", help="with I and II kept: III, aVR, aVL, aVF from them")
    add("--noise", type=float, metavar="DB", help="signal-to-noise ratio of added wander, mains, white noise")
    add("--control", choices=("zero", "other"), help="no signal, or another record's: all must fall to 0.5")
    add("--ratios", type=several(float), help="shares of the training rows [0.01,0.1,1]")
    add("--shots", type=several(int), help="of --probe: so many positives a class, e.g. 1,2,4,8,16")
    add("--probe-protocol", dest="protocol", choices=("grid", "merl", "melp"), help="[grid]")
    add("--epochs", type=int, help="of training with labels [10]")
    add("--beams", type=int, help="of --generate; 1: greedy")
    given = vars(parser.parse_args(argv))
    if "task" in given:
        spec, *sets = given.pop("task")
        if not sets:
            parser.error(f"--task {spec}: name a set, too")
        name = os.path.basename(spec)
        TASKS[name], given[name] = models.load_own(spec), sets
    ask, texts = SimpleNamespace(**DEFAULTS | {"leads": ()} | given), given.get("look", ("", "x"))[1:]
    leads = {lead: data.lead_index(lead) for lead in ask.leads}
    for wrong, sentence in (
            (None in leads.values(), f"--leads {','.join(leads)}: leads are {', '.join(data.LEADS)}"),
            (ask.derive_leads and not {0, 1} <= set(leads.values()),
             "--derive-leads needs --leads with I and II"),
            (any(not 0 < r <= 1 for r in ask.ratios), "--ratios are shares above 0, up to 1"),
            (min(*(ask.shots or ()), ask.epochs, ask.beams) < 1,
             "--shots, --epochs and --beams are numbers from 1"),
            (not math.isfinite(ask.noise or 0), "--noise is a ratio in dB"),
            (not {"look", "export", "compare", *TASKS} & given.keys(),
             "say what to do: --zeroshot SET, --probe SET, ..."),
            ("compare" in given and {"run", "checkpoint", "look", "export"} & given.keys(),
             "--compare names its own runs: drop --run, --ckpt, --look and --export"),
            ("compare" in given and not TASKS.keys() & given.keys() and len(given) > 1,
             "--compare without a task shows what was validated in training: drop the rest, or name a task"),
            ("export" in given and "checkpoint" in given, "--export takes a run's own weights: drop --ckpt"),
            ("compare" in given and given.get("generate") == [], "--compare needs sets: --generate SET"),
            (not texts, "--look RECORD TEXT..."),
            (not all(map(data.WORD.search, texts)), "--look: a text needs words"),
            ("look" in given and {"leads", "noise", "control"} & given.keys(),
             "--look shows a record as it is: drop --leads, --noise and --control"),
            *((option in given and tasks and not given.keys() & tasks and not any(map(is_own, given)),
               f"{option} is of no use without --{' or --'.join(tasks)}")
              for option, tasks in OPTIONS.items())):
        if wrong:
            parser.error(sentence)
    return given


def main(argv=None):
    given = parse(argv)
    wanted = {task: sets_for(task, given[task]) for task in TASKS if task in given}
    options = {k: v for k, v in given.items() if k in DEFAULTS}
    options["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    if "compare" in given:
        compare(given["compare"], wanted, **options)
        return
    ask = asking(**options)
    if found := models.publication(ask.checkpoint):  # its results go to a folder of their own beside the runs
        data.open_file(found[1]).close()  # is it there?
        run = Path("runs") / f"published-{found[0]}-{Path(found[1]).stem}"
        run.mkdir(parents=True, exist_ok=True)
    else:
        run = given.get("run") or (Path(ask.checkpoint).parent if ask.checkpoint else newest_run())
    print(f"run {run}")
    if wanted.get("generate") == []:
        config = read_config(run)[0]
        wanted["generate"] = [data.source_of(data.open_store(*ask.data[:1] or [config.data], config.rate))]
    if wanted:
        report(run, wanted, **options)
    if "look" in given:
        look(open_run(run, ask), given["look"][0], given["look"][1:], ask)
    if "export" in given:
        export(run, given["export"])


if __name__ == "__main__":
    data.guarded(main, models.ModelError)
