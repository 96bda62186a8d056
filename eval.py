"""Zero-shot evaluation: python eval.py --zeroshot ptbxl   (newest run; or --run runs/NAME, or --ckpt FILE)

Prints a table per label set, writes results.json and zeroshot_SET.png into the run. With --compare runs/* it prints one
table over runs and seeds, and writes comparison.json and comparison.png into the folder that holds the first run. Nothing here
is ever used to choose a model or a threshold; rows are the official test split (PTB-XL fold 10) unless --folds says otherwise.
"""
import argparse
import contextlib
import itertools
import json
import os
import re
import textwrap
import zipfile
import zlib
from collections import Counter
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from tqdm import tqdm

import data
import model as models

PTBXL = ("ptbxl_super", "ptbxl_sub", "ptbxl_form", "ptbxl_rhythm")  # "ptbxl": the four published sets
RESAMPLES = 1000  # of the bootstrap
FACTS = {"records_per_second": float, "parameters": float, "warnings": [str]}  # what is read of training.json
NO_MATTER = ("name", "seed", "threads", "workers", "save_every", "compile")  # config fields in which repetitions may differ
ENOUGH = 10       # positives a class needs for the second mean: fewer make macro AUROC a lottery (METHODS 0.4)


def newest_run(folder="runs"):
    """The finished run of `folder` that was written last. Errors: DataError where there is none."""
    runs = sorted(Path(folder).glob("*/model.safetensors"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise data.DataError(f"no finished run in {folder}/: train one first (python train.py), or name one with --run")
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
        bytes_of = state[name].contiguous().flatten().view(torch.uint8).numpy()
        crc = zlib.crc32(bytes_of, zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"


def read_torch(path):
    """What torch.save wrote; nothing but tensors and plain values is unpickled, and the file's checksums
    hold. Errors: DataError."""
    try:
        with data.open_file(path) as file:
            with zipfile.ZipFile(file) as archive:  # torch.load does not look at them
                if damaged := archive.testzip():
                    raise ValueError(f"{damaged} has another checksum")
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zipfile and torch fail in many ways on a damaged file
        raise data.DataError(f"{path}: {damage(path, error)}") from error
    if not isinstance(state, dict):
        raise data.DataError(f"{path}: holds other things than named tensors")
    return state


def read_tensors(path):
    """(named tensors, metadata) in a file of torch or safetensors, or in a training checkpoint. Errors:
    DataError."""
    facts = {}
    if Path(path).suffix == ".safetensors":
        try:
            data.open_file(path).close()
            with safe_open(path, "pt") as file:
                state, facts = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
            if facts.get("tensors", crc := crc_of_tensors(state)) != crc:
                raise ValueError("the weights have another checksum")
        except Exception as error:  # as above
            raise data.DataError(f"{path}: {damage(path, error)}") from error
    else:
        state = read_torch(path)
    for key in ("state_dict", "model", "model_state_dict"):  # what surrounds weights in a training checkpoint
        if isinstance(state.get(key), dict):
            state = state[key]
    if not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise data.DataError(f"{path}: holds other things than named tensors")
    wrapped = bool(state) and all(name.startswith("module.") for name in state)  # DistributedDataParallel's
    return {name.removeprefix("module.") if wrapped else name: value for name, value in state.items()}, facts


def damage(path, error):
    """What keeps a file of weights from being read, and what to do."""
    head = b""
    with contextlib.suppress(OSError), data.open_file(path) as file:
        head = file.read(40)
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself; fetch it with: git lfs pull"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    fault = f"{type(error).__name__}: {models.first_line(error)[:150]}"
    return f"damaged, cut off, or no tensors that can be loaded safely ({fault}); restore it, or train anew"


def load_run(run, checkpoint=None, device="cpu", text_model=""):
    """(method in eval mode, its config) of a run folder. checkpoint: other weights than its model.safetensors, or NAME:FILE as the
    authors published them, for which the run does not matter (open_published). Errors: DataError, ModelError."""
    if found := publication(checkpoint):
        return open_published(*found, text_model, device)
    run, (config, _) = Path(run), read_config(run)
    weights = Path(checkpoint or run / "model.safetensors")
    if not weights.exists():
        raise data.DataError(f"{weights} is missing" + (": the run did not finish; continue it with: python train.py "
                                                        f"--resume {run}" if not checkpoint else ""))
    if config.method == "cardiolm":
        raise models.ModelError(f"{run} is a language model without an ECG encoder: give it to another run with --text-model {run}")
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


@torch.no_grad()
def embed_records(method, store, rows, device, what="encoding ECGs", batch=256):
    """Rhythm embeddings of rows of a store -> (R, dim) float32 on the CPU, L2-normalised."""
    out = []
    for start in tqdm(range(0, len(rows), batch), desc=what, leave=False):
        ecg = torch.from_numpy(store.ecg(rows[start:start + batch])).to(device)
        out.append(method.encode_ecg(ecg).rhythm.float().cpu())
    return torch.cat(out)


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
def score_records(method, store, rows, prompts, scales, device, batch=256):
    """Zero-shot scores of rows of a store: prompts are C lists of texts, a class' score is the mean over its texts -> (R, C) float32."""
    texts = [text.rstrip(". ") for row in prompts for text in row]  # worded as statements are
    text, scores = method.encode_text(texts), []
    for start in tqdm(range(0, len(rows), batch), desc="encoding ECGs", leave=False):
        ecg = torch.from_numpy(store.ecg(rows[start:start + batch])).to(device)
        like = method.similarity(method.encode_ecg(ecg), text, scales).float().cpu()           # (B, texts)
        scores.append(torch.stack([part.mean(1) for part in like.split([len(row) for row in prompts], 1)], 1))
    return torch.cat(scores).numpy()


# ---- published checkpoints -------------------------------------------------------------------------------------
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
DROPPED = ("text.lm.pooler.", "text.lm.embeddings.position_ids")  # parts of a language model that a tower may do without


def publication(checkpoint):
    """"merl:FILE" -> ("merl", "FILE"), None for any other checkpoint."""
    kind, colon, file = str(checkpoint or "").partition(":")
    return (kind, file) if colon and kind in published() else None


def rename(state, names):
    """The authors' state dictionary -> ours by names {theirs: ours}. Errors: models.ModelError with unknown
    names."""
    rules = [(re.compile(re.escape(theirs).replace(r"\*", "(.*?)")), ours.split("*"))
             for theirs, ours in names.items()]
    parts, unknown = {}, []
    for theirs, value in state.items():
        bare = WRAPPER.sub("", theirs)
        match, ours = next(((m, ours) for pattern, ours in rules if (m := pattern.fullmatch(bare))), (None, None))
        if match is None:
            unknown.append(theirs)
        elif ours != ["-"]:
            name, _, part = "".join(a + b for a, b in itertools.zip_longest(ours, match.groups(), fillvalue="")).partition("+")
            parts.setdefault(name, {})[part] = value
    if unknown:
        raise models.ModelError(f"{len(unknown)} unexpected names in the checkpoint: {', '.join(unknown[:10])}")
    return {name: found[""] if "" in found else torch.cat([found[part] for part in sorted(found)]) for name, found in parts.items()
            if "" in found or len(found) == 3}  # else it counts as missing


def load_published(method, state, kind):
    """Fill a method with the authors' weights, kind a key of published(). Errors: models.ModelError that
    names what is missing, unknown or misshapen."""
    optional = tuple(published()[kind]["optional"])
    given = rename(state, published()[kind]["names"])
    ours = {k: v for k, v in method.state_dict().items() if not k.endswith("num_batches_tracked")}
    unused = {k for k in given.keys() - ours.keys() if k.startswith(DROPPED)}
    if unexpected := sorted(given.keys() - ours.keys() - unused):
        raise models.ModelError(f"this {method.config.method} has no place for {', '.join(unexpected[:10])}")
    if missing := sorted(k for k in ours.keys() - given.keys() if not k.startswith(optional)):
        raise models.ModelError(f"the checkpoint lacks {len(missing)} weights, such as {', '.join(missing[:10])}")
    if misshapen := sorted(k for k in given.keys() & ours.keys() if extent(given[k]) != extent(ours[k])):
        raise models.ModelError("other sizes than this method's: " + ", ".join(
            f"{k} {tuple(given[k].shape)} for {tuple(ours[k].shape)}" for k in misshapen[:5]))
    method.load_state_dict({k: given[k].reshape(ours[k].shape) for k in given.keys() - unused}, strict=False)
    return method


def extent(x):
    """Shape without the axes of length 1, of which the authors have more."""
    return [n for n in x.shape if n > 1]


def open_published(kind, file, text_model="", device="cpu"):
    """(method in eval mode, its config) of an authors' checkpoint, with the paper's preset; text_model: where the tokenizer and the
    shape of the text tower are, if not on the hub under the published name. Errors: ModelError, DataError."""
    if kind not in published():
        raise models.ModelError(f"no published checkpoint {kind!r}; known: {', '.join(published())}")
    state, _ = read_tensors(file)
    config = models.configure(published()[kind]["method"], "paper", data="")  # it brings none
    config.text_model = text_model or config.text_model
    if kind == "merl":
        vits = {width: name for name, (width, _, _) in models.ViT1d.SIZES.items()}
        vit, down = state_width(state, "to_patch_embedding.weight"), state_width(state, "downconv.weight", 1)
        config.encoder = f"vit_{vits.get(vit, 'tiny')}" if vit else "resnet50" if down == 2048 else "resnet18"
    lm, tokenizer = models.load_text_model(config.text_model)
    if kind == "melp":
        config.beat_queries = state_width(state, "attn_pool_contrast.query") or config.beat_queries
        tokenizer.add_special_tokens({"bos_token": "[BOS]"})  # in place of [CLS], which goes to the end
        if len(tokenizer) > lm.config.vocab_size:
            lm.resize_token_embeddings(len(tokenizer))
    method = load_published(models.build_method(config, (lm, tokenizer)), state, kind)
    if kind in ("merl", "melp"):  # trained with MIMIC-IV-ECG's order of leads, aVF before aVL (METHODS 0, item 6); ours is aVL, aVF
        first = next(m for m in method.ecg.modules() if isinstance(m, torch.nn.Conv1d))
        first.weight.data = first.weight.data[:, [0, 1, 2, 3, 5, 4, 6, 7, 8, 9, 10, 11]].clone()
    return method.to(device).eval(), config


def state_width(state, ending, axis=0):
    """The size along an axis of the tensor whose name ends so, 0 where there is none."""
    return next((value.shape[axis] for name, value in state.items() if name.endswith(ending)), 0)


# ---- metrics -------------------------------------------------------------------------------------------------------

def auroc_of_resamples(score, positive, weights):
    """AUROC of one class in many bootstrap resamples at once. score (R,), positive (R,) bool, weights (K, R): how often
    each row was drawn. Returns (K,), NaN where a resample lacks positives or negatives. Ties count half."""
    order = np.argsort(score, kind="stable")
    score, positive, weights = score[order], positive[order], weights[:, order]
    pos, neg = weights * positive, weights * ~positive
    below = np.concatenate([np.zeros((len(weights), 1)), np.cumsum(neg, 1)], 1)  # (K, R + 1)
    left, right = np.searchsorted(score, score, "left"), np.searchsorted(score, score, "right")
    wins = (pos * (below[:, left] + below[:, right])).sum(1) / 2
    pairs = pos.sum(1) * neg.sum(1)
    return np.divide(wins, pairs, out=np.full(len(weights), np.nan), where=pairs > 0)


def best_f1(score, positive):
    """Largest F1 over all thresholds ON THESE ROWS, as published (METHODS 4.2): an optimistic number."""
    precision, recall, _ = precision_recall_curve(positive, score)
    return float(np.max(2 * precision * recall / np.maximum(precision + recall, 1e-12)))


def interval(samples):
    """95 % bootstrap interval [low, high] of (K,) samples; None where fewer than a tenth are numbers."""
    found = samples[np.isfinite(samples)]
    return [float(v) for v in np.percentile(found, [2.5, 97.5])] if 10 * len(found) >= len(samples) else None


def score_classes(names, scores, positives, patients=None, seed=0):
    """Metrics of a label set. scores (R, C), positives (R, C) bool, patients (R,) -> dict with "macro",
    "macro_enough" and "classes".

    A class without positives, or without negatives, is listed and left out of the means. The bootstrap draws
    patients with all their records. Intervals: of a class with at least ENOUGH positives; of a mean over the
    resamples in which every one of its classes has both kinds (none where these are fewer than a tenth)."""
    _, patient = np.unique(np.arange(len(scores)) if patients is None else patients, return_inverse=True)
    many = int(patient.max()) + 1
    draws = np.random.default_rng(seed).multinomial(many, np.full(many, 1 / many), RESAMPLES)
    weights = draws[:, patient]  # (K, R)
    classes, samples = {}, {}
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
    for title, least in (("macro", 1), ("macro_enough", ENOUGH)):
        chosen = [n for n in samples if classes[n]["positives"] >= least]
        if chosen:
            mean = lambda m: float(np.mean([classes[n][m] for n in chosen]))
            means[title] = {"classes": len(chosen), **{m: mean(m) for m in ("auroc", "auprc", "f1")},
                            "interval": interval(np.mean([samples[n] for n in chosen], 0))}
    return {"records": len(scores), "patients": many, **means, "classes": classes}


def print_table(title, result):
    line = "{:<44} {:>9} {:>7} {:>15} {:>7} {:>7}"
    print(f"\n{title}: {result['records']} records")
    print(line.format("class", "positives", "AUROC", "95 % interval", "AUPRC", "best F1"))
    for name, r in result["classes"].items():
        if "auroc" in r:
            print(line.format(name[:44], r["positives"], *columns(r)))
        else:
            why = "no negatives" if r["positives"] else "no positives"
            print(line.format(name[:44], r["positives"], "-", why, "-", "-"))
    for key, text in (("macro", "macro, classes with positives"), ("macro_enough", f"macro, at least {ENOUGH} positives")):
        if key in result:
            print(line.format(f"{text} ({result[key]['classes']})", "", *columns(result[key])))


def columns(r):
    shown = "{:.3f} - {:.3f}".format(*r["interval"]) if r["interval"] else "-"
    return f"{r['auroc']:.3f}", shown, f"{r['auprc']:.3f}", f"{r['f1']:.3f}"


def plot(title, result, path):
    """AUROC of every class, with its interval if it has one, best at the top; no picture where no class has
    any."""
    if "macro" not in result:
        return
    from matplotlib.figure import Figure
    shown = sorted(((r["auroc"], n, r) for n, r in result["classes"].items() if "auroc" in r), key=lambda x: x[0])
    figure = Figure(figsize=(8, 1.4 + 0.24 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for y, (auroc, _, r) in enumerate(shown):
        if r["interval"]:
            axes.plot(r["interval"], [y, y], color="0.7", lw=3, solid_capstyle="butt", zorder=1)
        axes.plot(auroc, y, "o", color="C0" if r["positives"] >= ENOUGH else "0.5", ms=5, zorder=2)
    axes.axvline(0.5, color="0.8", lw=1, zorder=0)
    axes.axvline(result["macro"]["auroc"], color="C1", lw=1, ls="--", zorder=0)
    axes.set_yticks(range(len(shown)), [f"{n} ({r['positives']})" for _, n, r in shown], fontsize=8)
    least = min((r["interval"] or [auroc])[0] for auroc, _, r in shown)
    axes.set(xlim=(min(0.4, least), 1.0), ylim=(-0.8, len(shown) - 0.2), xlabel="AUROC",
             title=f"{title}: macro AUROC {result['macro']['auroc']:.3f}, {result['records']} records")
    figure.savefig(path, dpi=120)


# ---- zero-shot -------------------------------------------------------------------------------------------------------

def class_prompts(name, classes, style):
    """One list of texts a class. style: descriptive (the project's, prompts.json), plain (class names), or a JSON file
    {code: text or [texts]}, such as the published ones; a class the file lacks is an error."""
    table = data.label_set(name)
    if style == "plain":
        return [[table[c]["name"]] for c in classes]
    if style == "descriptive":
        return [table[c]["prompts"] for c in classes]
    advice = "--prompts is descriptive, plain, or a JSON file {code: text or [texts]}"
    given = data.read_json(style, {str: (str, list, dict)}, advice)
    given = given[name] if isinstance(given.get(name), dict) else given
    missing = [c for c in classes if c not in given and c.rstrip("_") not in given]
    if missing:
        raise data.DataError(f"{style} has no prompt for {', '.join(missing)} of {name}")
    texts = [given.get(c, given.get(c.rstrip("_"))) for c in classes]
    texts = [[text] if isinstance(text, str) else text for text in texts]
    for c, row in zip(classes, texts):
        if not isinstance(row, list) or not row or not all(isinstance(t, str) and data.WORD.search(t)
                                                           for t in row):
            raise data.DataError(f"{style}: the prompt of {c} must be a text or a list of texts, with words")
    return [[t.lower() for t in row] for row in texts]


def find_store(source, config, spec):
    """The store to evaluate on: what --data says, whatever it holds; else the run's own data if they are of
    the label set's source; else, for PTB-XL, what is in $PTBXL or data/ptbxl, and the default simulated
    records."""
    if spec:
        return data.open_data(spec, config.rate)
    if config.data.partition(":")[0] in ("store", source):
        store = data.open_data(config.data, config.rate)
        if store.records["source"].iloc[0] == source:
            return store
    if source == "simulated":
        return data.open_data("simulated", config.rate)
    place = os.environ.get("PTBXL", os.path.join("data", "ptbxl"))
    if not os.path.exists(os.path.join(place, "ptbxl_database.csv")):
        raise data.DataError(f"PTB-XL is not in {place}: download it from https://physionet.org/content/ptb-xl/ (3 GB, free, "
                             "CC BY 4.0) and say where it is with --data ptbxl:PATH")
    return data.open_data(f"ptbxl:{place}", config.rate)


def sets_of(store):
    """Label sets that a store's test records can answer: PTB-XL's four, or all codes; none where no record
    has one."""
    names = ["ptbxl"] if store.records["source"].iloc[0] == "ptbxl" else ["simulated"]
    codes = store.records["codes"].iloc[np.flatnonzero(store.records["split"] == "test")]
    return names if any(code in data.knowledge()["findings"] for row in codes for code in row) else []


def test_rows(store, folds=None):
    """Row numbers of a store's test records, or of the given folds. Errors: DataError where there are
    none."""
    records = store.records
    if folds and not records["fold"].any():
        raise data.DataError(f"{store.path}: these records have no folds: leave out --folds")
    rows = np.flatnonzero(records["fold"].isin(folds) if folds else records["split"] == "test")
    if not len(rows):
        wanted = f"fold {', '.join(map(str, folds))}" if folds else "the test split"
        raise data.DataError(f"{store.path}: holds no record of {wanted}; name folds with --folds, or other "
                             "records with --data")
    return rows


def zeroshot(run, sets, checkpoint=None, spec=None, prompts="descriptive", folds=None, scales=None, text_model="",
             device="cpu"):
    """Zero-shot classification (METHODS 4.2): score = similarity of the ECG with the class' texts -> {set: metrics}.

    checkpoint, text_model: load_run. scales: of rhythm, beat, token, whose mean is the score; default: the method's."""
    method, config = load_run(run, checkpoint, device, text_model)
    names = [n for s in sets for n in (PTBXL if s == "ptbxl" else (s,))]
    for name in names:
        data.label_set(name)  # an unknown name ends here
    results = {}
    for source in dict.fromkeys(name.split("_")[0] for name in names):
        store = find_store(source, config, spec)
        rows = test_rows(store, folds)
        labels = {name: data.label_matrix(store.records.iloc[rows], name) for name in names if name.split("_")[0] == source}
        texts = {name: class_prompts(name, classes, prompts) for name, (classes, _, _) in labels.items()}
        scores = score_records(method, store, rows, [text for name in texts for text in texts[name]], scales, device)
        for name, (classes, positives, keep) in labels.items():
            if not keep.any():
                raise data.DataError(f"{spec or store.path}: no record to evaluate has a label of {name}")
            mine, scores = scores[:, :len(classes)], scores[:, len(classes):]
            results[name] = {"source": str(store.records["source"].iloc[0])} | score_classes(
                classes, mine[keep], positives[keep], store.records["patient"].iloc[rows][keep])
    return {name: results[name] for name in names}


def report(run, sets, **options):
    """Evaluate, print the tables, write results.json and the pictures into the run."""
    remember(run, "zeroshot", {})
    results = zeroshot(run, sets, **options)
    for name, result in results.items():
        print_table(f"zero-shot {name} of {result['source']} records", result)
    save_results(run, results, options)
    return results


DEFAULTS = {"prompts": "descriptive", "folds": None, "scales": None, "checkpoint": None, "spec": None,
            "beams": 1}


def entry(name, options):
    """The title of a result: what was asked, and those options that are not the defaults."""
    text = lambda value: ",".join(map(str, value)) if isinstance(value, list) else value
    return " ".join([name, *(f"{k}={text(v)}" for k, v in options.items() if v != DEFAULTS.get(k, v))])


def save_results(run, results, options):
    """results.json and zeroshot_SET.png of a run: an entry for each label set and options, none of which
    overwrites another."""
    for name, result in results.items():
        title = entry(name, options)
        file = re.sub("[^a-zA-Z0-9_.=,-]+", "_", title)[:150]
        plot(f"zero-shot {title}", result, Path(run) / f"zeroshot_{file}.png")
    given = {k: str(v) for k, v in options.items()}
    remember(run, "zeroshot", {entry(n, options): {"options": given, **r} for n, r in results.items()})


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


# ---- reports written from the ECG --------------------------------------------------------------------------------------

def overlap(written, truth):
    """Micro precision, recall and F1 of sets: both lists of R sets."""
    hits, said, true = sum(len(a & b) for a, b in zip(written, truth)), sum(map(len, written)), sum(map(len, truth))
    return {"precision": hits / max(1, said), "recall": hits / max(1, true), "f1": 2 * hits / max(1, said + true)}


def generate(run, checkpoint=None, spec=None, folds=None, beams=1, text_model="", device="cpu", batch=64):
    """Let a run write the reports of its test records; prints how far they agree with the doctors', writes reports.jsonl.

    Compared as sets: whole statements, and findings (codes that data.Findings reads in them). The yardstick is to give every record
    the commonest training report. Errors: ModelError where the method does not write."""
    method, config = load_run(run, checkpoint, device, text_model)
    if not hasattr(method, "generate"):
        raise models.ModelError(f"a {config.method} run writes no reports; --method melp does")
    store = data.open_data(spec or config.data, config.rate)
    tags, read = data.report_tags(store, config.report_language), data.Findings()
    rows = [row for row in test_rows(store, folds) if tags[row]]
    if not rows:
        raise data.DataError(f"{store.path}: none of the records asked for has a report")
    remember(run, "reports", {})
    texts = []
    for start in tqdm(range(0, len(rows), batch), desc="writing", leave=False):
        texts += method.generate(torch.from_numpy(store.ecg(rows[start:start + batch])).to(device), beams)
    written = [[s.strip(" .") for s in text.split(". ") if s.strip(" .")] for text in texts]
    common = Counter(tuple(tags[row]) for row in np.flatnonzero(store.records["split"] == "train") if tags[row]).most_common(1)[0][0]
    found, truth = {}, [tags[row] for row in rows]
    for name, said in (("written", written), ("commonest report", [list(common)] * len(rows))):
        found[name] = {"statements": overlap(list(map(set, said)), list(map(set, truth))),
                       "findings": overlap([set(read.named(s)) for s in said], [set(read.named(s)) for s in truth])}
    data.write_text(Path(run) / "reports.jsonl", "".join(
        json.dumps({"id": str(store.records["id"].iloc[row]), "report": true, "written": said}) + "\n"
        for row, true, said in zip(rows, truth, written)))
    print(f"\nreports of {len(rows)} records, {len(set(texts))} different ones, {beams} beam(s)\n{'':<18} "
          + "".join(f"{kind + ' ' + m:>22}" for kind in ("statements", "findings") for m in ("precision", "recall", "F1")))
    for name, r in found.items():
        print(f"{name:<18} " + "".join(f"{r[kind][m]:22.3f}" for kind in ("statements", "findings") for m in ("precision", "recall", "f1")))
    given = dict(beams=beams, folds=folds, checkpoint=checkpoint, spec=spec)
    counts = {"records": len(rows), "different": len(set(texts))}
    remember(run, "reports", {entry("written", given): counts | found})
    return found


# ---- language --------------------------------------------------------------------------------------------------------

@torch.no_grad()
def report_language(method, texts, run, batch=64):
    """How many hidden words of `texts` a CardioLM guesses; prints it and adds it to results.json. The yardstick is to say the
    commonest word every time."""
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


# ---- many runs -------------------------------------------------------------------------------------------------------

def group_runs(configs):
    """Configs that differ in NO_MATTER only belong together -> {title: their places}, in order of appearance. A title is the
    method and what sets the group apart from the method's others; each field's most common value goes without saying (among
    equally common ones the first). A field that an older version did not have is None."""
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


def over_runs(runs, name, mean):
    """The macro AUROC of label set `name` over runs; mean: "macro" or "macro_enough". None where it has no such class."""
    found = [r["results"][name][mean] for r in runs if mean in r["results"][name]]
    if not found:
        return None
    values = [m["auroc"] for m in found]
    known = [m["interval"] for m in found if m["interval"]]
    return {"auroc": values, "mean": float(np.mean(values)), "lowest": min(values), "highest": max(values),
            "interval": np.mean(known, 0).tolist() if len(known) == len(found) else None}


def summarise(runs):
    """runs of a group: [{"run", "config", "training" (None for runs of older versions), "results": {set: metrics}}] -> dict.
    Over runs: AUROCs are macro AUROCs; each end of the interval, speed and parameters are means."""
    means = {key: {name: over_runs(runs, name, mean) for name in runs[0]["results"]}
             for key, mean in (("sets", "macro"), ("sets_enough", "macro_enough"))}
    known = [r["training"] for r in runs if r["training"]]
    costs = {k: float(np.mean([t[k] for t in known])) if known else None for k in ("records_per_second", "parameters")}
    return {"runs": [r["run"] for r in runs], "seeds": [r["config"]["seed"] for r in runs],
            "config": {k: v for k, v in runs[0]["config"].items() if k not in NO_MATTER},
            **means, **costs, "training": [r["training"] for r in runs]}


def cell(s):
    """mean (lowest - highest) [interval]"""
    if s is None:
        return "-"
    spread = f" ({s['lowest']:.3f} - {s['highest']:.3f})" if len(s["auroc"]) > 1 else ""
    return f"{s['mean']:.3f}{spread}" + (" [{:.3f}, {:.3f}]".format(*s["interval"]) if s["interval"] else "")


def markdown(groups, key="sets"):
    """{title: summary} -> table of "sets" (classes with positives) or "sets_enough" (with at least ENOUGH)."""
    names = list(next(iter(groups.values()))["sets"])
    lines = ["| method | seeds | " + " | ".join(n.removeprefix("ptbxl_") for n in names) + " | records/s | parameters |",
             "|---" * (len(names) + 4) + "|"]
    for title, group in groups.items():
        cost = [f"{group['records_per_second']:.0f}", f"{group['parameters'] / 1e6:.2f} M"] if group["parameters"] else ["-", "-"]
        lines.append("| " + " | ".join([title, str(len(group["runs"])), *map(cell, group[key].values()), *cost]) + " |")
    return "\n".join(lines)


def plot_comparison(groups, path):
    """A panel for each label set, a line for each group: a dot for each run, the mean as a stroke, the interval as a bar."""
    from matplotlib.figure import Figure
    sets = list(next(iter(groups.values()))["sets"])
    labels = [textwrap.fill(title, 32) for title in groups]
    methods = list(dict.fromkeys(group["config"]["method"] for group in groups.values()))
    height = sum(0.3 + 0.14 * label.count("\n") for label in labels)
    figure = Figure(figsize=(2.2 + 2.3 * len(sets), 1.2 + height), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(sets), sharey=True, squeeze=False)[0], sets):
        for y, group in enumerate(groups.values()):
            s, colour = group["sets"][name], f"C{methods.index(group['config']['method']) % 10}"
            if s is None:
                continue
            if s["interval"]:
                axes.plot(s["interval"], [y, y], c=colour, alpha=.25, lw=8, solid_capstyle="butt", zorder=1)
            axes.plot([s["mean"]] * 2, [y - 0.3, y + 0.3], color=colour, lw=1.5, zorder=2)
            axes.plot(s["auroc"], [y] * len(s["auroc"]), "o", color=colour, mec="white", mew=0.6, ms=5.5, zorder=3)
        axes.set_title(name, fontsize=10)
        axes.set_yticks(range(len(labels)), labels, fontsize=8)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.locator_params(axis="x", nbins=5)
        axes.tick_params(axis="x", labelsize=8)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color="0.92")
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
    figure.supxlabel("macro AUROC of each run, their mean, and the 95 % bootstrap interval", fontsize=8)
    figure.savefig(path, dpi=150)


def compare(runs, sets, **options):
    """Evaluate finished runs, put repetitions together (group_runs), print one table, and write it to comparison.json and
    comparison.png in the parent folder of the first run. Plain files among `runs` are passed over, so that runs/* will do.
    Errors: DataError for a folder that is not a finished run, and where runs were asked about different numbers of records."""
    runs = list(dict.fromkeys(run for run in map(Path, runs) if not run.is_file()))
    if not runs:
        raise data.DataError("no run folder to compare")
    configs = [models.settings_of(read_config(run)[0]) for run in runs]
    for run in runs:  # before hours of evaluation
        if not (run / "model.safetensors").exists():
            raise data.DataError(f"{run} is not a finished run: continue it with python train.py --resume {run}, or leave it out")
    found = []
    for run, config in zip(tqdm(runs, desc="runs"), configs):
        results = zeroshot(run, sets, **options)
        save_results(run, results, options)
        training = run / "training.json"
        found.append({"run": str(run), "config": config, "results": results,
                      "training": data.read_json(training, FACTS) if training.exists() else None})
        for name, first in found[0]["results"].items():
            if results[name]["records"] != first["records"]:
                raise data.DataError(f"{name} has {results[name]['records']} records for {run}, but {first['records']} for "
                                     f"{runs[0]}: name the same for all with --data")
    groups = {title: summarise([found[i] for i in places]) for title, places in group_runs(configs).items()}
    print("macro AUROC: mean over seeds (lowest - highest) [95 % bootstrap interval, mean of its ends over seeds]\n")
    print(markdown(groups))
    print(f"\nthe same over classes with at least {ENOUGH} positives\n")
    print(markdown(groups, "sets_enough"))
    for one in found:
        if warnings := (one["training"] or {}).get("warnings"):
            print(f"\nwarnings in training of {one['run']}: {len(warnings)}, the last at {warnings[-1]}")
    path = runs[0].parent / "comparison.json"
    asked = {k: str(v) for k, v in options.items()}
    data.write_text(path, json.dumps({"options": asked, "groups": groups}, indent=1))
    plot_comparison(groups, path.with_suffix(".png"))
    print(f"\nwritten to {path} and {path.with_suffix('.png')}")
    return groups


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zeroshot", nargs="+", metavar="SET",
                        help=f"ptbxl (= {', '.join(PTBXL)}), simulated, or any label set: {', '.join(data.LABEL_SETS)}")
    parser.add_argument("--run", help="run folder [the newest in runs/]")
    parser.add_argument("--compare", nargs="+", metavar="RUN", help="finished run folders: one table over all")
    parser.add_argument("--ckpt", help="a .safetensors file, with config and tokenizer from --run or from beside it; or merl:FILE, "
                        "melp:FILE, dbeta:FILE, a checkpoint as its authors published it")
    parser.add_argument("--text-model", default="", help="of a published checkpoint: folder with its tokenizer [the published name]")
    parser.add_argument("--generate", action="store_true", help="write the test records' reports (melp)")
    parser.add_argument("--beams", type=int, default=1, help="of --generate; 1: greedy")
    parser.add_argument("--data", metavar="ptbxl:PATH", help="where the records are")
    parser.add_argument("--prompts", default="descriptive", help="descriptive | plain | a JSON file {code: text or [texts]}")
    parser.add_argument("--scales", type=lambda text: text.split(","), help="rhythm,beat,token or some of them [the method's own]")
    parser.add_argument("--folds", type=lambda text: [int(f) for f in text.split(",")], help="PTB-XL folds, e.g. 9,10 [10]")
    args = parser.parse_args(argv)
    if args.beams < 1:
        parser.error("--beams is the width of a search: at least 1")
    if not (args.zeroshot or args.generate and not args.compare):
        parser.error("say what to do: --zeroshot SET or --generate; --compare needs --zeroshot SET")
    where = dict(spec=args.data, folds=args.folds, device="cuda" if torch.cuda.is_available() else "cpu")
    how = dict(prompts=args.prompts, scales=args.scales)
    if args.compare:
        if args.run or args.ckpt:
            parser.error("--compare names its own runs: drop --run and --ckpt")
        compare(args.compare, args.zeroshot, **where, **how)
        return
    weights = dict(checkpoint=args.ckpt, text_model=args.text_model)
    if published := publication(args.ckpt):  # its results go to a folder of their own beside the runs
        run = Path("runs") / f"published-{published[0]}-{Path(published[1]).stem}"
        run.mkdir(parents=True, exist_ok=True)
    else:
        run = args.run or (Path(args.ckpt).parent if args.ckpt else newest_run())
    print(f"run {run}")
    if args.zeroshot:
        report(run, args.zeroshot, **weights, **where, **how)
    if args.generate:
        generate(run, beams=args.beams, **weights, **where)


if __name__ == "__main__":
    data.guarded(main, models.ModelError)
