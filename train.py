"""Train an ECG-language method: python train.py --method fgclep   (every flag: python train.py --help)

A run is a folder runs/NAME with config.json, tokenizer/, log.jsonl, curves.png, checkpoint.pt, training.json,
model.safetensors and results.json. Kill it at any moment and continue with python train.py --resume runs/NAME.
"""
import argparse
import contextlib
import datetime
import inspect
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import statistics
import sys
import time
import zlib
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import csrc
import data
import eval as evaluation
import model as models


def parse(argv):
    """Command line -> (Config, run folder to continue or None). Errors: ModelError, DataError."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    notes = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(models.Config), re.M))
    for name in models.TYPES:
        kind, default = models.kind_of(name), getattr(models.Config, name)
        how = dict(action=argparse.BooleanOptionalAction) if kind is bool else dict(type=kind)
        if kind is str and (values := models.get_args(models.TYPES[name])):
            how["metavar"] = "|".join(values)
        whose = ", ".join(models.owners(name))
        parser.add_argument(models.flag(name), default=argparse.SUPPRESS, **how,
                            help=f"{whose and whose + ': '}{notes[name]} [{default}]".replace("%", "%%"))
    parser.add_argument("--resume", metavar="RUN", help="continue a run folder; its own config holds")
    given = vars(parser.parse_args(argv))
    if (resume := given.pop("resume")) is not None:
        if given:
            parser.error(f"--resume takes the config from the run: drop --{', --'.join(given).replace('_', '-')}")
        return evaluation.read_config(resume)[0], Path(resume)
    return models.configure(**given), None


# ---- batches -----------------------------------------------------------------------------------------------------

class Records(torch.utils.data.Dataset):
    """(stage, epoch, rows) -> model.Batch. What is random about a record follows from (seed, stage, epoch, row) alone, so
    that any number of processes, and a resumed run, see the same."""

    def __init__(self, store, tags, config):
        self.store, self.tags, self.config = store, tags, config
        self.names = store.records["id"].astype(str).to_numpy()
        self.peaks = padded(store.records["peaks"])

    def __getitem__(self, key):
        stage, epoch, rows = key
        ecg, peaks, chosen = self.store.ecg(rows), self.peaks[rows], []
        for i, row in enumerate(rows):
            rng = np.random.default_rng((self.config.seed, stage, epoch, row))
            chosen.append(choose(self.tags[row], self.config.text_unit, rng))
            augment(ecg[i], peaks[i], self.config, rng)
        return models.Batch(torch.from_numpy(ecg), chosen, [self.tags[row] for row in rows], list(self.names[rows]),
                            torch.from_numpy(peaks))


class Texts(torch.utils.data.Dataset):
    """Like Records, of texts alone."""

    def __init__(self, texts):
        self.texts = texts

    def __getitem__(self, key):
        _, _, rows = key
        tags = [[self.texts[row]] for row in rows]
        return models.Batch(torch.zeros(len(rows), 0), tags, tags, [f"text {row}" for row in rows], torch.zeros(len(rows), 0))


def padded(lists):
    """Lists of positions -> (R, K) int32, -1 behind the last of each, K one at least."""
    out = np.full((len(lists), max(1, *map(len, lists))), -1, np.int32)
    for row, values in zip(out, lists):
        row[:len(values)] = values
    return out


def choose(tags, unit, rng):
    """What is said of a record in this step: all its tags (report), a random subset in random order, or one tag."""
    if unit in ("report", "tags"):
        return tags
    count = 1 if unit == "tag" else rng.integers(1, len(tags) + 1)
    return [tags[i] for i in rng.permutation(len(tags))[:count]]


def augment(ecg, peaks, config, rng):
    """Zero some leads and shift in time, in place (zeros move in). ecg: (L, N) mV; peaks: (K,) samples, -1 behind the last."""
    if config.lead_drop:
        ecg[rng.random(len(ecg)) < config.lead_drop] = 0
    limit = int(config.shift * config.rate)
    if limit:
        step = int(rng.integers(-limit, limit + 1))
        ecg[:] = np.roll(ecg, step, 1)
        ecg[:, slice(0, step) if step >= 0 else slice(step, None)] = 0
        moved = peaks[peaks >= 0] + step
        moved = moved[(moved >= 0) & (moved < ecg.shape[1])]
        peaks[:len(moved)], peaks[len(moved):] = moved, -1


def batch_keys(rows, config, stage, epoch):
    """Keys of one epoch for this process: a seeded shuffle, whole batches only, this process' share of each."""
    order = np.random.default_rng((config.seed, stage, epoch)).permutation(rows)
    share = config.batch_size // models.world()
    rank = dist.get_rank() if models.world() > 1 else 0
    for start in range(0, len(order) - config.batch_size + 1, config.batch_size):
        yield stage, epoch, order[start + rank * share: start + (rank + 1) * share]


def stages(config):
    """[(name, epochs)]: most methods have one stage, FG-CLEP a coarse and a fine one."""
    names, epochs = models.METHODS[config.method][0].stages, {"fine": config.fine_epochs}
    return [(name, n) for name in names if (n := epochs.get(name, config.epochs))]


def updates_of(config, records):
    """Updates of every stage. Errors: DataError where one has none."""
    counts = [epochs * (records // config.batch_size) // config.accumulate for _, epochs in stages(config)]
    if config.batch_size % models.world() or min(counts) < 1:
        raise data.DataError(
            f"{records} training records with a report, batches of {config.batch_size} by {models.world()} "
            f"process(es), {config.accumulate} for an update: every stage needs one update, and a batch must "
            "divide by the processes; lower --batch-size or --accumulate")
    return counts


# ---- the parts of a run ------------------------------------------------------------------------------------------

def make_text(config, run, texts, device, main):
    """(language model, tokenizer) of a run: loaded or, by default, trained on `texts` (all training reports) on the spot.

    Process 0 makes it and keeps tokenizer and architecture in run/tokenizer; the others, and a resumed run, build it from
    there: their weights come from process 0 (DDP) or from the checkpoint."""
    folder, made, head = run / "tokenizer", None, "AutoModelForMaskedLM" if config.method == "cardiolm" else "AutoModel"
    if main and not (run / "checkpoint.pt").exists():
        if config.text_model:  # (resumed before its first checkpoint, a run makes it again)
            made = models.load_text_model(config.text_model, head)
        elif config.method == "cardiolm":
            made = models.new_bert(texts, config.seed)
        else:
            made = models.small_text_model(texts, config.seed, config.mlm_steps, device=device,
                                           bar=lambda steps: tqdm(steps, desc="language model"))
        models.save_text_model(*made, folder)
    agree(None)  # the others wait here
    return made or models.rebuild_text_model(folder, head)


def far_texts(method, texts, run, main):
    """C-MELT's source of certain negatives: the different reports, compared by the mean word of the untrained text tower. Kept in
    run/negatives.pt, since a resumed run has another tower."""
    unique, path = sorted(set(texts)), run / "negatives.pt"
    if main and not path.exists():
        vectors = evaluation.embed_texts(method.text, unique).half()
        data.write_atomic(path, lambda path: torch.save({"vectors": vectors}, path))
    agree(None)  # the others wait here
    vectors = evaluation.read_torch(path).get("vectors")
    if not isinstance(vectors, torch.Tensor) or vectors.shape[:1] != (len(unique),):
        raise data.DataError(f"{path}: not the vectors of this run's {len(unique)} reports; train anew")
    return models.FarTexts(unique, vectors.to(next(method.parameters()).device))


def decays(path, module, name, p):
    """Is a parameter a matrix that something is multiplied by? Positions, class tokens, queries and scales
    are not, whatever their shape. path: of its module."""
    nn = torch.nn
    if not isinstance(module, (nn.Linear, nn.Conv1d, nn.MultiheadAttention, nn.Embedding)):
        return name in ("project_beats", "vocabulary")
    return p.dim() > 1 and "position" not in path and "relative_attention_bias" not in path


def make_optimiser(method, config):
    """AdamW; weight decay on matrices only."""
    known, groups = set(), ([], [])
    for path, module in method.named_modules():
        for name, p in module.named_parameters(recurse=False):
            if p.requires_grad and p not in known:  # a tied one counts once
                known.add(p)
                groups[0 if decays(path, module, name, p) else 1].append(p)
    decayed, others = ({"params": params} for params in groups)
    groups = [{**decayed, "weight_decay": config.weight_decay}, {**others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2))


def warm_updates(updates, config):
    """How many of a stage's updates the learning rate rises over."""
    return max(1, round(config.warmup * updates)) if config.warmup else 0


def rate_at(update, updates, config):
    """Learning rate of one update of a stage: linear warm-up, then cosine to zero."""
    warm = warm_updates(updates, config)
    if update < warm:
        return config.lr * (update + 1) / warm
    return config.lr * 0.5 * (1 + math.cos(math.pi * (update - warm) / max(1, updates - warm)))


def seed_update(config, update):
    """The random numbers of an update follow from (seed, rank, update): every process has a stream of its
    own, and a resumed run, with however many processes, needs no state of any."""
    rank = dist.get_rank() if models.world() > 1 else 0
    mixed = np.random.SeedSequence((config.seed, rank, update)).generate_state(1, np.uint64)
    torch.manual_seed(int(mixed[0]))


def save_checkpoint(run, method, optimiser, update, watch):
    """checkpoint.pt, with checksums of the other files that a resumed run reads."""
    state = {"model": method.state_dict(), "optimiser": optimiser.state_dict(), "update": update,
             "processes": models.world(), "watch": watch.state() if watch else {},
             "files": evaluation.checksums(run, ("tokenizer/*", *MADE))}
    data.write_atomic(run / "checkpoint.pt", lambda path: torch.save(state, path))


MADE = ("recovered.jsonl", "negatives.pt")  # files of a run that no resumed run could make again


def read_checkpoint(run, save_every):
    """checkpoint.pt of a run, None where there is none yet. Errors: DataError where it, or a file that it goes
    with, is damaged or lost."""
    path = run / "checkpoint.pt"
    if not path.exists():
        if any(line["update"] >= save_every for line in Log(run, 0, False).read()):
            raise data.DataError(f"{path}: missing, and the run was beyond its first; restore it, or train anew")
        return None
    kinds = {"model": dict, "optimiser": dict, "update": int, "processes": int, "watch": dict, "files": dict}
    state = evaluation.read_torch(path)
    if any(not isinstance(state.get(key), kind) for key, kind in kinds.items()):
        raise data.DataError(f"{path}: not a checkpoint of this version of the program; train anew")
    evaluation.compare_checksums(run, state["files"])
    return state


def restore(state, run, method, optimiser):
    """Fill method and optimiser from a checkpoint -> updates done. Errors: DataError where it is another
    run's."""
    path, before = run / "checkpoint.pt", state["processes"]
    try:
        method.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        fault = models.first_line(error)
        raise data.DataError(f"{path}: not of {run / 'config.json'} ({fault}); train anew") from error
    if before != models.world():
        print(f"{run}: {models.world()} process(es) go on where {before} were, with other random numbers")
    return state["update"]


class Watch:
    """Tells collapse in plain words while there is still time: both towers on a fixed probe batch, and the loss itself. A tower that
    is flat at one look only has not collapsed: early in training they can be, and recover."""

    def __init__(self, probe, method, config):
        self.probe, self.method, self.recent, self.flat = probe, method, [], []
        self.chance = method.contrast_sides * math.log(config.batch_size)

    def note(self, terms):
        """Remember an update's loss terms: name -> number."""
        if "contrast" in terms:
            self.recent = (self.recent + [terms["contrast"]])[-50:]

    def state(self):
        """What a checkpoint keeps of it."""
        return {"recent": self.recent, "flat": self.flat}

    @torch.no_grad()
    def look(self):
        """Sentence on what looks wrong, or ""."""
        was = self.method.training
        self.method.eval()
        e, t = self.method.encode_ecg(self.probe.ecg).rhythm, self.method.encode_text(self.probe.texts).report
        self.method.train(was)
        spreads = {name: (x - x.mean(0)).square().sum(1).mean().item()  # 1: all over the sphere, 0: one point
                   for name, x in (("ECG", e), ("text", t))}
        before, self.flat = self.flat, [name for name, spread in spreads.items() if spread < 0.01]
        if still := sorted(set(self.flat) & set(before)):
            return (f"COLLAPSE: all {still[0]} embeddings are nearly the same (spread {spreads[still[0]]:.4f}). Stop this run; use "
                    f"warm-up (--warmup 0.1), a lower --lr, or a larger --batch-size.")
        if len(self.recent) == 50 and min(self.recent) > 0.98 * self.chance:
            return (f"STUCK: the contrastive loss has stayed at {np.mean(self.recent):.3f}, guessing within the batch gives "
                    f"{self.chance:.3f}: nothing is being learned. Use warm-up (--warmup 0.1) or a lower --lr.")
        return ""


# ---- FG-CLEP: recovery of waveform features between its two stages -------------------------------------------------

MOST_FEATURES = 8        # of one answer
LLM_TOKENS = 192         # of one answer: eight phrases take about 80
LLM_BATCH = 32           # sets of tags asked at once
NEUTRAL = set("a an and are as at by for from in is no not of on or than that the to with".split())
FURTHER = """alternans bifid bpm compensatory constant decreased diffuse dominant electrical fixed increased mm pathologic
progressive reciprocal retrograde saw secondary shaped tooth upstroke variable"""  # English words that prompts.json has no use for
QUESTION = """You read twelve-lead ECGs. One of them is reported as: {}

Which features of its waveforms are most likely to be seen on it? Think of the P wave, PR interval, QRS complex, ST segment, \
T wave, QT interval, rate and regularity of the rhythm. Answer with nothing but a JSON list of at most {} short English phrases \
in lower case, such as {}"""
UNTRAINED = """Waveform features most likely to be seen on a twelve-lead ECG, as a JSON list of at most {} short English phrases.

{}"""
EXAMPLES = ["atrial fibrillation; left ventricular hypertrophy", "first degree av block"]  # their answers: the knowledge table


class Answers:
    """Features that a causal language model proposes for each distinct set of tags, in the place of data.Findings.

    Kept in run/llm_answers.jsonl, a line a set: {"model", "tags", "answer", "features"}, features null if unreadable.
    Errors: data.DataError if the file holds another model's answers."""

    def __init__(self, run, name):
        self.path, self.name, self.features = run / "llm_answers.jsonl", name, {}
        for line in whole_lines(self.path, {"model": str, "tags": [str], "features": (list, type(None))}):
            if line["model"] != name:
                raise data.DataError(f"{self.path} holds the answers of {line['model']}, not of {name}: move it away")
            self.features[tuple(line["tags"])] = line["features"]

    def candidates(self, tags):
        """Features proposed for the tags of one report, asked before, in any order."""
        return self.features[tuple(sorted(set(tags)))] or []

    def ask(self, reports, device):
        """One query for each distinct set among `reports` (lists of tags) that has no answer yet.

        Batches are always the same, and asked whole: padding moves the last bits of a score, and so might change an answer."""
        sets = sorted({tuple(sorted(set(tags))) for tags in reports},
                      key=lambda tags: (-len(models.join(tags)), tags))  # the longest first: too little memory shows at once
        batches = [sets[i:i + LLM_BATCH] for i in range(0, len(sets), LLM_BATCH)]
        left = [batch for batch in batches if not self.features.keys() >= set(batch)]
        if left:
            with torch.random.fork_rng(devices=[]), open(self.path, "a") as out:  # loading may draw random numbers
                lm, tokenizer = load_llm(self.name, device)
                bar = tqdm(total=len(sets), initial=len(sets) - sum(map(len, left)), desc="asking the language model", unit="set")
                for batch in left:
                    for tags, answer in zip(batch, generate(lm, tokenizer, batch)):
                        if tags not in self.features:
                            self.features[tags] = parse_features(answer)
                            out.write(json.dumps({"model": self.name, "tags": tags, "answer": answer,
                                                  "features": self.features[tags]}) + "\n")
                    out.flush()
                    bar.update(len(batch))
                bar.close()
            del lm
            if device.type == "cuda":
                torch.cuda.empty_cache()
        found = [self.features[tags] for tags in sets]
        print(f"{self.name}: {len(sets)} distinct sets of tags, {len({f for row in found for f in row or []})} distinct features; "
              f"{found.count(None)} of {len(sets)} answers could not be read")


def load_llm(name, device):
    """(causal language model on the device, tokenizer) of a Hugging Face name or folder. Errors: ModelError where there is none."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left", trust_remote_code=False)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        lm = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # as in models.load_text_model
        raise models.ModelError(
            f"language model {name!r} is neither a folder with a causal language model nor to be had from "
            f"the Hugging Face hub: {models.first_line(error)}") from error
    models.check_tokenizer(tokenizer, lm.config, name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return lm.to(device).eval(), tokenizer


def prompt_for(tokenizer, tags):
    """The question about one set of tags: a chat's if the model has a template, else worked examples to go on from."""
    knowledge = data.Findings()
    shown = {example: json.dumps(knowledge.candidates(example.split("; "))[:MOST_FEATURES]) for example in EXAMPLES}
    if tokenizer.chat_template:
        question = QUESTION.format("; ".join(tags), MOST_FEATURES, shown[EXAMPLES[0]])
        return tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False,
                                             add_generation_prompt=True, enable_thinking=False)  # others ignore it
    lines = "".join(f"Report: {example}\nFeatures: {answer}\n\n" for example, answer in shown.items())
    return UNTRAINED.format(MOST_FEATURES, lines) + f"Report: {'; '.join(tags)}\nFeatures:"


@torch.inference_mode()
def generate(lm, tokenizer, sets):
    """The model's most likely answers to B sets of tags, as B strings."""
    chat = bool(tokenizer.chat_template)
    tokens = tokenizer([prompt_for(tokenizer, tags) for tags in sets], padding=True, add_special_tokens=not chat,
                       return_tensors="pt").to(lm.device)
    out = lm.generate(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], max_new_tokens=LLM_TOKENS,
                      do_sample=False, temperature=None, top_p=None, top_k=None, pad_token_id=tokenizer.pad_token_id)
    answers = tokenizer.batch_decode(out[:, tokens["input_ids"].shape[1]:], skip_special_tokens=True)
    return answers if chat else [answer.strip().partition("\n")[0] for answer in answers]  # it goes on with more examples


def parse_features(answer):
    """An answer's features, or None unless it is one JSON list of strings (an object whose only value is such a list) or a list
    with a bullet or number before every line. Not counted: thoughts before it, and a fence around all of it.

    Each feature is lower case and given once, at most MOST_FEATURES; those that are not plausible() are dropped."""
    text = re.sub(r"^.*</think>", "", answer, flags=re.S).strip()
    text = re.sub(r"^```(?:json)?\s*\n(.*)\n\s*```$", r"\1", text, flags=re.S)
    try:
        items = json.loads(text)
    except (ValueError, RecursionError):
        bullets = [re.fullmatch(r"\s*(?:[-*\u2022]|\d+[.)])\s+(.+)", line) for line in text.splitlines() if line.strip()]
        items = [bullet[1] for bullet in bullets] if bullets and all(bullets) else None
    if isinstance(items, dict) and len(items) == 1:
        items, = items.values()
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        return None
    features = dict.fromkeys(" ".join(item.lower().split()).strip(" .,;:!") for item in items)
    return [feature for feature in features if plausible(feature)][:MOST_FEATURES]


def plausible(feature):
    """Whether a phrase may be an English waveform feature: 1 to 10 words in plain letters, more of them known than unknown.

    Letters and short names (qrs, ii, st) are the same in every language: they count only where nothing else is said."""
    if not re.fullmatch(r"[a-z0-9 /<>=.%,()'-]+", feature) or len(feature.split()) > 10:
        return False
    words = set(re.findall("[a-z]+", feature)) - NEUTRAL
    long = {word for word in words & vocabulary() if len(word) > 3}
    return bool(words) and len(long) + (words <= vocabulary()) > len(words - vocabulary())


@lru_cache
def vocabulary():
    """English words on ECGs: of the findings in prompts.json, their features, the statements that it translates to; and FURTHER."""
    table = data.knowledge()
    findings = table["findings"].values()
    texts = [text for finding in findings for text in (finding["name"], *finding["also"], *finding["features"])]
    texts += [FURTHER, *table["lexicon"]["statements"].values(), *data.LEADS]
    return set(re.findall("[a-z]+", " ".join(texts).lower())) - NEUTRAL


@torch.no_grad()
def recover_features(method, store, rows, tags, config, run, device):
    """Enrich reports (FG-CLEP, METHODS 2.5): every waveform feature that the knowledge table lists for a report's diagnoses, or
    that the language model --llm proposed for them, is a candidate; the coarse model scores it against the record's own ECG,
    and what is implausible is dropped.

    A candidate stays if its cosine reaches keep_threshold, and a quantile of that feature's cosines over all training ECGs:
    where it is a candidate of n records, the ECG must be among the keep_share * n with the highest cosine. So neither a
    feature's popularity nor the level of its cosines plays a part. Writes run/recovered.jsonl, one line a record."""
    knowledge = Answers(run, config.llm) if config.llm else data.Findings()
    candidates = [[f for f in knowledge.candidates(tags[row]) if f not in tags[row]] for row in rows]
    features = sorted({f for found in candidates for f in found})
    place = {f: i for i, f in enumerate(features)}
    ecg_of = np.repeat(np.arange(len(rows)), [len(found) for found in candidates])             # (K,) of every candidate
    feature_of = np.array([place[f] for found in candidates for f in found], int)              # (K,)
    scores, kept = np.zeros(len(ecg_of), np.float32), np.zeros(len(ecg_of), bool)
    quantiles = np.maximum(0, 1 - config.keep_share * np.bincount(feature_of, minlength=len(features)) / len(rows))
    method.eval()
    ecg = evaluation.embed_records(method, store, rows, device, "scoring candidates")["rhythm"]
    ecg = torch.from_numpy(ecg)                                                                # (R, dim)
    for start in range(0, len(features), 256):  # a language model may propose many thousands
        part = slice(start, start + 256)
        table = (ecg @ method.encode_text(features[part]).report.float().cpu().T).numpy()       # (R, F)
        bar = np.array([max(np.quantile(column, q), config.keep_threshold) for column, q in zip(table.T, quantiles[part])])
        here = np.flatnonzero((feature_of >= start) & (feature_of < start + 256))
        scores[here] = table[ecg_of[here], feature_of[here] - start]
        kept[here] = scores[here] >= bar[feature_of[here] - start]
    method.train()

    def write(path):
        scored = iter(zip(scores.tolist(), kept.tolist()))
        with open(path, "w", encoding="utf-8") as out:
            for row, found in zip(rows, candidates):
                line = [[f, round(score, 4), keep] for f, (score, keep) in zip(found, scored)]
                out.write(json.dumps({"id": str(store.records["id"].iloc[row]), "row": int(row), "candidates": line}) + "\n")
    data.write_atomic(run / "recovered.jsonl", write)


def read_recovered(run):
    """recovered.jsonl -> {row: [[feature, cosine, kept], ...]}. Errors: DataError."""
    path = run / "recovered.jsonl"
    found = {line["row"]: line["candidates"] for line in read_lines(path, {"row": int, "candidates": [list]})}
    if any(list(map(type, one)) != [str, float, bool] for row in found.values() for one in row):
        raise data.DataError(f"{path}: a candidate is [feature, cosine, kept]; restore it, or train anew")
    return found


def recovery_quality(recovered, truth):
    """Precision and recall of the recovered features, with and without the filter, against the truth (simulated records).

    truth: {row: features the record really shows and its report leaves out}. Counts are summed over records."""
    table = {}
    for name, wanted in (("all candidates", (True, False)), ("kept by the filter", (True,))):
        hits = [f in truth[row] for row, scored in recovered.items() for f, _, kept in scored if kept in wanted]
        table[name] = {"features": len(hits), "precision": sum(hits) / max(1, len(hits)),
                       "recall": sum(hits) / max(1, sum(map(len, truth.values())))}
    return table


def enrich(method, store, rows, tags, config, run, device, main):
    """Between the stages: recover features (once; a resumed run reads them) -> tags of every row with the kept ones."""
    if main and not (run / "recovered.jsonl").exists():
        recover_features(method, store, rows, tags, config, run, device)
    agree(None)  # the others wait here
    recovered = read_recovered(run)
    if recovered.keys() != set(rows):
        raise data.DataError(f"{run / 'recovered.jsonl'}: has candidates of {len(recovered)} records, not of "
                             f"{len(rows)}; restore it, or train anew (another model would recover others)")
    kept = {row: [f for f, _, keep in scored if keep] for row, scored in recovered.items()}
    if main:
        print(f"recovered features: {sum(len(s) for s in recovered.values())} candidates, {sum(map(len, kept.values()))} kept")
        if any(store.records["features"]) and not config.llm:  # a language model has its own words for them
            truth = {row: set(store.records["features"].iloc[row]) - set(tags[row]) for row in rows}
            quality = recovery_quality(recovered, truth)
            data.write_text(run / "recovery.json", json.dumps(quality, indent=1))
            for name, q in quality.items():
                print(f"  {name:<20} {q['features']:7d} features   precision {q['precision']:.3f}   recall {q['recall']:.3f}")
    return [tag + kept.get(row, []) for row, tag in enumerate(tags)]


# ---- the loop ----------------------------------------------------------------------------------------------------

def start_processes():
    """Join torchrun's processes, if there are any. Returns (device, is this the process that prints and writes)."""
    rank, local = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    cuda = torch.cuda.is_available()
    if cuda and local >= (gpus := torch.cuda.device_count()):
        raise data.DataError(f"process {local + 1} of this machine has no GPU: it has {gpus}; start as many")
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=3))
    return device, rank == 0


def leave_processes():
    """Leave torchrun's other processes: one that ends with its group open can abort, and torchrun then stops the one
    that evaluates. Gloo's threads need Python's lock to let go of their last work: a group that is freed under the
    lock before they did waits for them for ever, so they get the time."""
    if models.world() > 1:
        dist.barrier()
        time.sleep(0.2)
        dist.destroy_process_group()


def agree(value):
    """Process 0's value, in all processes."""
    if models.world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


class Stop:
    """While it is entered, SIGINT and SIGTERM ask for a stop; the loop saves and leaves before its next
    batch. A second one ends at once, but not under torchrun: there Ctrl-C comes twice, from the terminal and
    from the agent."""

    def __enter__(self):
        self.asked = 0
        self.before = {name: signal.signal(name, self.ask) for name in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error):
        for name, handler in self.before.items():
            signal.signal(name, handler)

    def ask(self, number, frame):
        if self.asked and models.world() == 1:
            sys.exit(128 + number)
        self.asked = number

    def anywhere(self, device):
        """Whether any process was asked."""
        if models.world() == 1:
            return bool(self.asked)
        flag = torch.tensor(self.asked, device=device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)


def read_lines(path, shape):
    """The lines of a JSON-lines file, each of a shape (data.check). Errors: DataError that names the line."""
    return [data.check(data.parse_json(line, f"{path}, line {n}"), shape, f"{path}, line {n}")
            for n, line in enumerate(data.read_text(path).splitlines(), 1)]


def whole_lines(path, shape):
    """read_lines of a file that may not be there yet, or was being written when a kill came: what stands
    behind the last end of a line is cut off the file."""
    text = data.read_text(path) if path.exists() else ""
    if not text.endswith("\n") and text:
        data.write_text(path, text[:text.rfind("\n") + 1])
    return read_lines(path, shape) if text else []


class Log:
    """log.jsonl of a run, one line an update; on resuming, lines past the checkpoint are cut off. Then curves.png.

    A line's `seconds` are the wall time of that update, from asking for its batch to the optimiser's step; checkpoints and the
    watch are not in it. All else in a line is the same in every repetition of a run."""

    def __init__(self, run, update, main):
        self.path, self.file = run / "log.jsonl", None
        if main:
            kept = [line for line in self.read() if line["update"] <= update]
            data.write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
            self.file = open(self.path, "a", buffering=1)

    def read(self):
        return whole_lines(self.path, {"update": int})

    def add(self, **line):
        try:
            if self.file:
                self.file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise data.DataError(f"{self.path}: cannot be written: {error.strerror}; when it can, go on with "
                                 f"--resume {self.path.parent}") from error

    def plot(self):
        from matplotlib.figure import Figure
        lines = [line for line in self.read() if "terms" in line]
        x = [line["update"] for line in lines]
        figure = Figure(figsize=(9, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        for name in sorted({name for line in lines for name in line["terms"]}):
            left.plot(x, [line["terms"].get(name, math.nan) for line in lines], lw=0.8, label=name)
        for start in {line["stage"]: line["update"] for line in reversed(lines)}.values():
            left.axvline(start, color="0.8", lw=0.8, zorder=0)
        left.set(xlabel="update", ylabel="loss term")
        left.legend(frameon=False)
        right.plot(x, [line["lr"] for line in lines], color="C1")
        right.set(xlabel="update", ylabel="learning rate")
        figure.savefig(self.path.with_name("curves.png"), dpi=120)


def training_facts(method, records, seconds, warnings, config, device):
    """What training took -> dict for training.json. seconds: of each update in log.jsonl, where it stands once, however often
    the run was stopped; device, processes, threads and memory (process 0's) are those of the session that ended it.

    records_per_second is that of the median update: a busy machine makes some slow."""
    cuda = device.type == "cuda"
    return {"parameters": sum(p.numel() for p in method.parameters()),
            "trained_parameters": sum(p.numel() for p in method.parameters() if p.requires_grad),
            "records": records, "seconds": sum(seconds),
            "records_per_second": config.batch_size * config.accumulate / statistics.median(seconds),
            "peak_memory_gb": torch.cuda.max_memory_allocated(device) / 1e9 if cuda else None,
            "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
            "processes": models.world(), "threads": torch.get_num_threads(), "warnings": warnings}


class Source(NamedTuple):
    """What a run learns from."""
    store: data.Store | None  # None: texts alone
    tags: list                # of every record, the statements of its report
    rows: list                # that are trained on
    plan: str                 # a checksum of it


def open_source(config):
    """Source of a config. Errors: DataError."""
    if config.method == "cardiolm":
        texts = data.corpus(config.data, config.report_language)
        rows = [row for row, text in enumerate(texts) if not held_out(text)]
        return Source(None, [[text] for text in texts], rows, str(zlib.crc32("\n".join(texts).encode())))
    store = data.open_data(config.data, config.rate)
    store.verify()
    tags = data.report_tags(store, config.report_language)
    rows = [row for row in np.flatnonzero(store.records["split"] == "train").tolist() if tags[row]]
    return Source(store, tags, rows, store.meta["plan"])


def ignore_interrupts(worker):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the workers, too; the main process ends it


def train(config, run, source, device, main):
    """Train to the end, or continue a run folder to its end. Returns whether it came there: no, if it was
    stopped."""
    store, tags, rows, _ = source
    counts, language = updates_of(config, len(rows)), store is None
    texts = [models.join(tags[row]) for row in rows]
    records = Texts([models.join(tag) for tag in tags]) if language else Records(store, tags, config)
    checkpoint = read_checkpoint(run, config.save_every)
    if config.llm and main and not (run / "recovered.jsonl").exists():
        Answers(run, config.llm).ask([tags[row] for row in rows], device)  # now: mistakes show at once, and the GPU is empty
    text = make_text(config, run, texts, device, main)
    torch.manual_seed(config.seed)  # a text model that is loaded leaves the random state as it was
    method = models.build_method(config, text).to(device)
    if config.method == "cmelt" and config.negatives == "far":
        method.far = far_texts(method, texts, run, main)
    optimiser = make_optimiser(method, config)
    update = restore(checkpoint, run, method, optimiser) if checkpoint else 0
    if main:
        count = sum(p.numel() for p in method.parameters())
        print(f"{config.method}: {len(rows)} training records of {config.data}, {sum(counts)} updates, "
              f"{count / 1e6:.2f} M parameters, run {run}")
    if config.compile:
        method.ecg.compile()
    parallel = method
    if models.world() > 1:
        parallel = DistributedDataParallel(method, [device.index] if device.type == "cuda" else None, broadcast_buffers=False)
    log, end = Log(run, update, main), 0
    for number, ((name, epochs), count) in enumerate(zip(stages(config), counts)):
        start, end = end, end + count
        if update >= end:
            continue
        if name == "fine":
            records = Records(store, enrich(method, store, rows, tags, config, run, device, main), config)
        keys = [key for epoch in range(epochs) for key in batch_keys(rows, config, number, epoch)]
        batches = torch.utils.data.DataLoader(
            records, sampler=keys[(update - start) * config.accumulate:], batch_size=None, collate_fn=as_it_is,
            num_workers=config.workers, pin_memory=device.type == "cuda", worker_init_fn=ignore_interrupts)
        watch = None if language or not main else Watch(to_device(records[keys[0]], device), method, config)
        if watch and update > start:  # resumed within the stage
            watch.recent, watch.flat = checkpoint["watch"]["recent"], checkpoint["watch"]["flat"]
        with Stop() as stop:
            update = train_stage(name, parallel, optimiser, batches, Updates(start, update, end), config, run,
                                 device, log, stop, watch)
        if update < end:
            return False
    if main:
        finish(config, run, source, method, log, device)
    return True


def finish(config, run, source, method, log, device):
    """Write what a finished run has more than a running one."""
    lines = log.read()
    seconds = [line["seconds"] for line in lines if "seconds" in line]  # warnings have none
    if seconds and not (run / "training.json").exists():  # a finished run that is resumed keeps its own
        warnings = [f"update {line['update']}: {line['warning']}" for line in lines if "warning" in line]
        facts = training_facts(method, len(source.rows), seconds, warnings, config, device)
        data.write_text(run / "training.json", json.dumps(facts, indent=1))
    if source.store is None:
        models.save_language_model(method, run / "language_model")
    evaluation.save_weights(method, run)
    log.plot()
    if source.store is None:
        evaluation.report_language(method, [tag for [tag] in source.tags if held_out(tag)], run)


def held_out(text):
    """One text in twenty, by its own hash, is kept from the language model's training."""
    return zlib.crc32(text.encode()) % 20 == 0


def as_it_is(batch):
    return batch


class Updates(NamedTuple):
    first: int  # global number of the stage's first update
    done: int   # updates done so far
    end: int    # global number after its last


def to_device(batch, device):
    ecg, peaks = (x.to(device, non_blocking=True) for x in (batch.ecg, batch.peaks))
    return batch._replace(ecg=ecg, peaks=peaks)


def train_stage(name, parallel, optimiser, batches, updates, config, run, device, log, stop, watch):
    """Do the updates of one stage; returns the number of updates done so far."""
    method = getattr(parallel, "module", parallel).train()
    amp = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    trained = [p for group in optimiser.param_groups for p in group["params"]]
    stream, update, last_save, stopping = iter(batches), updates.done, updates.done, False
    bar = tqdm(total=updates.end - updates.first, initial=update - updates.first, desc=name, disable=log.file is None,
               unit="rec", unit_scale=config.batch_size * config.accumulate)
    while update < updates.end and not stopping:
        began = time.perf_counter()
        seed_update(config, update)
        rate = rate_at(update - updates.first, updates.end - updates.first, config)
        for group in optimiser.param_groups:
            group["lr"] = rate
        terms = {}
        for micro in range(config.accumulate):
            if stopping := stop.anywhere(device):  # a half update is left undone
                break
            batch = to_device(next(stream), device)
            last = micro == config.accumulate - 1
            with contextlib.nullcontext() if last or parallel is method else parallel.no_sync():
                with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                    losses = parallel(batch)
                loss = sum(method.weights.get(k, 1.0) * v for k, v in losses.items()) / config.accumulate
                check_finite(loss, batch, update)
                loss.backward()
            for k, v in losses.items():
                terms[k] = terms.get(k, 0.0) + v.item() / config.accumulate
        if not stopping:
            norm = torch.nn.utils.clip_grad_norm_(trained, config.clip)
            check_finite(norm, batch, update, "gradient")
            optimiser.step()
            method.limit_scales()
            update += 1
            total = sum(method.weights.get(k, 1.0) * v for k, v in terms.items())
            log.add(update=update, stage=name, loss=total, terms=terms, lr=rate, grad_norm=norm.item(),
                    seconds=round(time.perf_counter() - began, 6))
            bar.set_postfix({k: f"{v:.3f}" for k, v in terms.items()}, refresh=False)
            bar.update()
            if watch and update - updates.first > warm_updates(updates.end - updates.first, config):
                watch.note(terms)  # in warm-up every loss is stuck
            if watch and update % 50 == 0 and (warning := watch.look()):
                log.add(update=update, warning=warning)
                bar.write(f"update {update}: {warning}")
        optimiser.zero_grad(set_to_none=True)
        if log.file and (update - last_save >= config.save_every or update == updates.end or stopping):
            save_checkpoint(run, method, optimiser, update, watch)
            last_save = update
    if stopping and log.file:
        bar.write(f"stopped and saved at update {update}; continue with: python train.py --resume {run}")
    bar.close()
    return update


def check_finite(x, batch, update, what="loss"):
    if not torch.isfinite(x):
        ids = ", ".join(batch.ids)
        raise data.DataError(f"the {what} is {x.item()} at update {update}; records of this batch: {ids}. "
                             "Look at their signals (python data.py plot), or lower --lr")


def absolute(spec):
    """A data spec or text file whose path does not depend on where the program is started."""
    kind, colon, path = spec.partition(":")
    if kind == "simulated":
        return spec
    path = os.path.abspath(os.path.expanduser(path if colon else spec))
    return f"{kind}:{path}" if colon else path


def new_folder(config, made_by):
    """Make the folder of a new run, which no other process has, with its config.json. Errors: DataError."""
    source, now = Path(config.data.split(":")[0]).stem, time.strftime("%Y%m%d-%H%M%S")
    base = config.name or f"{config.method}-{source}-{now}"
    for number in itertools.count(1):
        run = Path("runs") / (base if number == 1 else f"{base}-{number}")
        try:
            run.mkdir(parents=True)
            break
        except FileExistsError as error:
            if config.name or not Path("runs").is_dir():
                fault = f"exists: continue it with --resume {run}, or choose another --name"
                raise data.DataError(f"{run} {fault}") from error
        except OSError as error:
            raise data.DataError(f"{run}: cannot be made ({error.strerror}); start elsewhere") from error
    settings = models.settings_of(config) | {"made_by": made_by}
    data.write_text(run / "config.json", json.dumps(settings, indent=1))
    return run


WORK = ("log.jsonl", "llm_answers.jsonl")  # a run that fails without any of it leaves no folder


def check_origin(run, made_by):
    """Is a run that goes on still what it was? Other data: DataError; other versions are told."""
    before = evaluation.read_config(run)[1]
    if before["store"] != made_by["store"]:
        raise data.DataError(f"{run}: its training data have changed since it began; train anew")
    if changed := [f"{k} {before[k]} -> {v}" for k, v in made_by.items() if before[k] != v]:
        print(f"{run} goes on with other versions: {'; '.join(changed)}; the last digits may be others")


def main(argv=None):
    config, run = parse(argv)
    device, first = start_processes()
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    specs = data.split_specs(config.data) if config.method == "cardiolm" else [config.data]
    config.data = ",".join(map(absolute, specs))
    for name in ("text_model", "llm"):  # a run that is moved must not ask the hub for what was a folder
        setattr(config, name, getattr(config, name) and models.text_model_name(getattr(config, name)))
    source, resumed = open_source(config), run is not None
    made_by = {"program": models.VERSION, "torch": torch.__version__, "store": source.plan,
               "csrc": csrc.build_info().get("sources", "reference")}
    updates_of(config, len(source.rows))
    sets = evaluation.sets_of(source.store) if source.store else []
    if first and source.store and not sets:
        print(f"{config.data}: no test record has a label, so there will be no table at the end")
    run = agree(run or first and new_folder(config, made_by))
    with data.locked(run / ".lock", wait=False) if first else contextlib.nullcontext(True) as mine:
        if not mine:
            raise data.DataError(f"{run}: another process is training it")
        if resumed:
            check_origin(run, made_by)
        try:
            finished = train(config, run, source, device, first)
        except BaseException:
            done = [one for one in map(run.joinpath, WORK) if one.exists() and one.stat().st_size]
            if first and not resumed and not done:
                shutil.rmtree(run)
            raise
    leave_processes()
    if finished and sets and first:
        try:
            evaluation.report(run, {"zeroshot": sets}, device=device)
        except KeyboardInterrupt:
            print(f"training is finished; the table: python eval.py --zeroshot {' '.join(sets)} --run {run}",
                  file=sys.stderr)
            raise


if __name__ == "__main__":
    data.guarded(main, models.ModelError)
