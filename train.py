"""Train an ECG-language method: python train.py --method fgclep   (every flag: python train.py --help)

A run is a folder runs/NAME with config.json, tokenizer/, log.jsonl, curves.png, checkpoint.pt, training.json,
model.safetensors and results.json. Kill it at any moment and continue with python train.py --resume runs/NAME.
"""
import argparse
import contextlib
import dataclasses
import datetime
import inspect
import json
import math
import os
import platform
import re
import signal
import statistics
import sys
import time
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import eval as evaluation
import model as models


@dataclass
class Config:
    """The small default, made for two CPU cores. A method's own defaults and --preset paper stand in model.METHODS."""
    method: str = "fgclep"            # etp | merl | cmelt | melp | fgclep, or cardiolm (a language model for --text-model)
    preset: str = "small"             # small: the defaults here; paper: the method's published recipe
    data: str = "simulated"           # simulated[:N] | ptbxl:PATH | mimic:PATH | csv:FILE | store:PATH; cardiolm: also text files, with commas
    name: str = ""                    # name of the run folder; default: method, data and time
    seed: int = 0                     # everything random follows from it
    # signal
    rate: int = 100                   # Hz of the store
    seconds: float = 10.0             # length of a record
    normalise: str = "mv"             # mv | record | lead: model.normalise
    lead_drop: float = 0.2            # chance that a lead is zeroed in a training step
    shift: float = 1.0                # seconds; a training record is moved in time by at most this much
    # ECG encoder
    encoder: str = "resnet18"         # resnet18|34|50|101 | vit_tiny|small|middle|base | leadvit_(the same) | w2v_tiny|small|base
    width: float = 0.25               # channels of a ResNet, as a factor
    patch: int = 10                   # samples of a patch of vit or leadvit
    dim: int = 128                    # dimension of the shared space
    max_pool: bool = False            # etp, fgclep: the maximum over time beside the mean
    # text tower
    text_model: str = ""              # Hugging Face name, folder or cardiolm run; default: a small BERT made from the training reports
    text_trainable_layers: int = -1   # -1 all, 0 frozen, n the last n layers
    text_pooling: str = "mean"        # mean | cls | pooler
    text_max_length: int = 128        # tokens
    text_mask: bool = True            # False: padding is attended to (D-BETA's published code)
    mlm_steps: int = 150              # masked-language-model updates of the small BERT
    text_unit: str = "report"         # what is said of a record in a step: report | subset | tag | fgclep: tags (every one)
    report_language: str = "english"  # english | original
    # loss
    temperature: float = 0.07         # etp, merl: fixed softmax temperature
    uma_dropout: float = 0.1          # merl: dropout of the two ECG views
    beats: str = "query"              # melp: query (learned, published) | rpeak (mean over each R-R interval)
    beat_queries: int = 12            # melp: learned beats
    beat_mean: bool = True            # melp: False rewards long reports (published code)
    beat_weight: float = 0.2          # melp: of the beat loss
    caption_queries: int = 32         # melp: ECG tokens that the caption decoder sees
    caption_weight: float = 2.0       # melp: of the caption loss
    decoder_layers: int = 2           # melp: of the caption decoder
    fusion_layers: int = 2            # cmelt: of each stream
    frame_drop: float = 0.75          # cmelt: share of frames hidden from the encoder
    lead_mask: float = 0.5            # cmelt: chance that the encoder does not see a lead
    word_mask: float = 0.25           # cmelt, cardiolm: share of hidden words
    mem_target: str = "record"        # cmelt: record: hidden leads are rebuilt too | input: they are to be zero (published code)
    ets_sum: bool = True              # cmelt: a record's pairs are summed (paper) | False: averaged (published code), 1/B of it
    negatives: str = "far"            # cmelt: N3S far (paper) | lost (published code) | none
    align: str = "rhythm"             # fgclep: rhythm (v1) | tag (v2: tags over patches) | word (words over tokens)
    fn_mode: str = "soft_bce"         # fgclep: soft_bce | l1 | none (hard targets)
    similarity: str = "tags"          # fgclep: soft targets by tags | half | cos: model.FGCLEP.targets
    prior: bool = True                # fgclep: logits start from each text's frequency in the batch: model.FGCLEP.loss
    llm: str = ""                     # fgclep: causal language model (name or folder) to propose features; default: prompts.json
    keep_share: float = 1.5           # fgclep: of a feature's n candidates stay those among its 1.5 n best-scoring ECGs
    keep_threshold: float = -1.0      # fgclep: and whose cosine is at least this (FOCAL: 0.95)
    # optimisation
    epochs: int = 12                  # fgclep: of the coarse stage
    fine_epochs: int = 0              # fgclep: of the fine stage
    batch_size: int = 32              # records contrasted with one another, over all processes
    accumulate: int = 1               # such batches per update
    lr: float = 2e-3                  # peak learning rate (AdamW)
    beta2: float = 0.999              # AdamW
    weight_decay: float = 0.05        # of weight matrices; vectors (norms, biases, positions) have none
    warmup: float = 0.1               # share of a stage's updates with rising rate; without it towers collapse
    clip: float = 1.0                 # largest gradient norm
    precision: str = "auto"           # auto: bf16 on CUDA, float32 on CPU | float32 | bf16
    compile: bool = False             # torch.compile the ECG encoder
    threads: int = 0                  # CPU threads; 0: torch's choice
    workers: int = 0                  # processes that read batches
    save_every: int = 200             # updates between checkpoints


def parse(argv):
    """Command line -> (Config, run folder to continue or None)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    notes = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(Config), re.M))
    for field in dataclasses.fields(Config):
        kind = dict(action=argparse.BooleanOptionalAction) if field.type is bool else dict(type=field.type)
        parser.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS,
                            help=f"{notes[field.name]} [{field.default}]".replace("%", "%%"), **kind)
    parser.add_argument("--resume", metavar="RUN", help="continue a run folder; its own config holds")
    given = vars(parser.parse_args(argv))
    resume = given.pop("resume")
    if resume:
        if given:
            parser.error(f"--resume takes the config from the run: drop --{', --'.join(given).replace('_', '-')}")
        settings = evaluation.read_config(resume)
        if unknown := settings.keys() - {field.name for field in dataclasses.fields(Config)}:
            parser.error(f"{resume} was made by another version of this program, with settings unknown to this one: "
                         f"{', '.join(sorted(unknown))}. Continue it with that version, or train anew")
        return Config(**settings), Path(resume)
    method, preset = given.get("method", Config.method), given.get("preset", Config.preset)
    if method not in models.METHODS or preset not in ("small", "paper"):
        parser.error(f"unknown method or preset: {method}, {preset}; methods: {', '.join(models.METHODS)}; presets: small, paper")
    _, small, paper = models.METHODS[method]
    return Config(**{**small, **(paper if preset == "paper" else {}), **given}), None


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
    names = getattr(models.METHODS[config.method][0], "stages", ("train",))
    return [(n, e) for n, e in zip(names, (config.epochs, config.fine_epochs)) if e]


# ---- the parts of a run ------------------------------------------------------------------------------------------

def make_text(config, run, texts, device, main):
    """(language model, tokenizer) of a run: loaded or, by default, trained on `texts` (all training reports) on the spot.

    Process 0 makes it and keeps tokenizer and architecture in run/tokenizer; the others, and a resumed run, build it from
    there: their weights come from process 0 (DDP) or from the checkpoint."""
    folder, made, head = run / "tokenizer", None, "AutoModelForMaskedLM" if config.method == "cardiolm" else "AutoModel"
    if main and not (run / "checkpoint.pt").exists():
        if config.text_model:
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
        write_atomic(path, lambda path: torch.save(vectors, path))
    agree(None)  # the others wait here
    return models.FarTexts(unique, torch.load(path, map_location=next(method.parameters()).device, weights_only=True))


def make_optimiser(method, config):
    """AdamW; weight decay on matrices only."""
    params = [p for p in method.parameters() if p.requires_grad]
    groups = [{"params": [p for p in params if p.dim() > 1], "weight_decay": config.weight_decay},
              {"params": [p for p in params if p.dim() <= 1], "weight_decay": 0.0}]
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


def write_atomic(path, write):
    """write(temporary path), then rename: a reader never sees half a file."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)


def save_checkpoint(run, method, optimiser, update):
    state = {"model": method.state_dict(), "optimiser": optimiser.state_dict(), "update": update,
             "rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}
    write_atomic(run / "checkpoint.pt", lambda path: torch.save(state, path))


def load_checkpoint(run, method, optimiser, device):
    state = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
    method.load_state_dict(state["model"])
    optimiser.load_state_dict(state["optimiser"])
    torch.set_rng_state(state["rng"])
    if device.type == "cuda":
        torch.cuda.set_rng_state_all(state["cuda_rng"])
    return state["update"]


class Watch:
    """Tells collapse in plain words while there is still time: both towers on a fixed probe batch, and the loss itself. A tower that
    is flat at one look only has not collapsed: early in training they can be, and recover."""

    def __init__(self, probe, method, config):
        self.probe, self.method, self.recent, self.flat = probe, method, [], set()
        self.chance = method.contrast_sides * math.log(config.batch_size)

    def note(self, terms):
        """Remember an update's loss terms: name -> number."""
        if "contrast" in terms:
            self.recent = (self.recent + [terms["contrast"]])[-50:]

    @torch.no_grad()
    def look(self):
        """Sentence on what looks wrong, or ""."""
        was = self.method.training
        self.method.eval()
        e, t = self.method.encode_ecg(self.probe.ecg).rhythm, self.method.encode_text(self.probe.texts).report
        self.method.train(was)
        spreads = {name: (x - x.mean(0)).square().sum(1).mean().item()  # 1: all over the sphere, 0: one point
                   for name, x in (("ECG", e), ("text", t))}
        before, self.flat = self.flat, {name for name, spread in spreads.items() if spread < 0.01}
        if still := sorted(self.flat & before):
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
        text = self.path.read_text() if self.path.exists() else ""
        whole = text[:text.rfind("\n") + 1]
        if whole != text:  # a kill may leave half a line
            write_atomic(self.path, lambda path: path.write_text(whole))
        for line in map(json.loads, whole.splitlines()):
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
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
        lm = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    except (OSError, ValueError) as error:  # ValueError: a model, but not a causal one
        raise models.ModelError(f"language model {name!r} is neither a folder with a causal language model nor to be had from the "
                                "Hugging Face hub: " + str(error).splitlines()[0]) from error
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
    findings = [*table["findings"].values(), *table["more_findings"].values()]
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
    ecg = evaluation.embed_records(method, store, rows, device, "scoring candidates")           # (R, dim)
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
        with open(path, "w") as out:
            for row, found in zip(rows, candidates):
                line = [[f, round(score, 4), keep] for f, (score, keep) in zip(found, scored)]
                out.write(json.dumps({"id": str(store.records["id"].iloc[row]), "row": int(row), "candidates": line}) + "\n")
    write_atomic(run / "recovered.jsonl", write)


def read_recovered(run):
    """recovered.jsonl -> {row: [[feature, cosine, kept], ...]}."""
    lines = map(json.loads, (run / "recovered.jsonl").read_text().splitlines())
    return {line["row"]: line["candidates"] for line in lines}


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
    kept = {row: [f for f, _, keep in scored if keep] for row, scored in recovered.items()}
    if main:
        print(f"recovered features: {sum(len(s) for s in recovered.values())} candidates, {sum(map(len, kept.values()))} kept")
        if any(store.records["features"]) and not config.llm:  # a language model has its own words for them
            truth = {row: set(store.records["features"].iloc[row]) - set(tags[row]) for row in rows}
            quality = recovery_quality(recovered, truth)
            write_atomic(run / "recovery.json", lambda path: path.write_text(json.dumps(quality, indent=1)))
            for name, q in quality.items():
                print(f"  {name:<20} {q['features']:7d} features   precision {q['precision']:.3f}   recall {q['recall']:.3f}")
    return [tag + kept.get(row, []) for row, tag in enumerate(tags)]


# ---- the loop ----------------------------------------------------------------------------------------------------

def start_processes():
    """Join torchrun's processes, if there are any. Returns (device, is this the process that prints and writes)."""
    rank, local = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=3))
    return device, rank == 0


def agree(value):
    """Process 0's value, in all processes."""
    if models.world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


class Stop:
    """SIGINT and SIGTERM ask for a stop; the loop saves and leaves at the next update. A second one ends at once."""

    def __init__(self):
        self.asked = 0
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self.ask)

    def ask(self, number, frame):
        if self.asked:
            sys.exit(128 + number)
        self.asked = number

    def anywhere(self, device):
        """Whether any process was asked."""
        if models.world() == 1:
            return bool(self.asked)
        flag = torch.tensor(self.asked, device=device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)


class Log:
    """log.jsonl of a run, one line an update; on resuming, lines past the checkpoint are cut off. Then curves.png.

    A line's `seconds` are the wall time of that update, from asking for its batch to the optimiser's step; checkpoints and the
    watch are not in it. All else in a line is the same in every repetition of a run."""

    def __init__(self, run, update, main):
        self.path, self.file = run / "log.jsonl", None
        if main:
            kept = [line for line in self.read() if line["update"] <= update]
            write_atomic(self.path, lambda path: path.write_text("".join(json.dumps(line) + "\n" for line in kept)))
            self.file = open(self.path, "a", buffering=1)

    def read(self):
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]  # a kill may leave half a line

    def add(self, **line):
        if self.file:
            self.file.write(json.dumps(line) + "\n")

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


def train(config, run, device, main):
    """Train to the end, or continue a run folder to its end. Returns the source of its data, None if stopped by a signal."""
    if language := config.method == "cardiolm":
        texts = data.corpus(config.data, config.report_language)
        rows = [row for row, text in enumerate(texts) if not held_out(text)]
        source, records = "texts", Texts(texts)
    else:
        store = data.open_data(config.data, config.rate)
        tags = data.report_tags(store, config.report_language)
        rows = [row for row in np.flatnonzero(store.records["split"] == "train") if tags[row]]
        source, records = store.records["source"].iloc[0], Records(store, tags, config)
        texts = [models.join(tag) for tag in tags]
    said = [texts[row] for row in rows]
    if config.batch_size % models.world() or len(rows) < config.batch_size:
        raise data.DataError(f"batch size {config.batch_size} must divide by {models.world()} processes and not exceed the "
                             f"{len(rows)} training records with a report")
    if config.llm and main and "fine" in dict(stages(config)) and not (run / "recovered.jsonl").exists():
        Answers(run, config.llm).ask([tags[row] for row in rows], device)  # now: mistakes show at once, and the GPU is empty
    text = make_text(config, run, said, device, main)
    torch.manual_seed(config.seed)  # a text model that is loaded leaves the random state as it was
    method = models.build_method(config, text).to(device)
    if config.method == "cmelt" and config.negatives == "far":
        method.far = far_texts(method, said, run, main)
    torch.manual_seed(config.seed)
    optimiser = make_optimiser(method, config)
    update = load_checkpoint(run, method, optimiser, device) if (run / "checkpoint.pt").exists() else 0
    if main:
        count = sum(p.numel() for p in method.parameters())
        print(f"{config.method}: {len(rows)} training records of {config.data}, {count / 1e6:.2f} M parameters, run {run}")
    if config.compile:
        method.ecg.compile()
    parallel = method
    if models.world() > 1:
        parallel = DistributedDataParallel(method, [device.index] if device.type == "cuda" else None, broadcast_buffers=False)
    stop, log, end = Stop(), Log(run, update, main), 0
    for number, (name, epochs) in enumerate(stages(config)):
        start, end = end, end + epochs * (len(rows) // config.batch_size) // config.accumulate
        if update >= end:
            continue
        if name == "fine":
            records = Records(store, enrich(method, store, rows, tags, config, run, device, main), config)
        keys = [key for epoch in range(epochs) for key in batch_keys(rows, config, number, epoch)]
        batches = torch.utils.data.DataLoader(
            records, sampler=keys[(update - start) * config.accumulate:], batch_size=None,
            num_workers=config.workers, collate_fn=as_it_is, pin_memory=device.type == "cuda",
            generator=torch.Generator())  # its own: a loader must not move the random state that a resumed run continues
        update = train_stage(name, parallel, optimiser, batches, Updates(start, update, end), config, run, device, log, stop)
        if update < end:
            return None
    if main:
        lines = log.read()
        seconds = [line["seconds"] for line in lines if "seconds" in line]  # warnings have none, nor has a run of an older version
        if seconds and not (run / "training.json").exists():  # a finished run that is resumed keeps its own
            warnings = [f"update {line['update']}: {line['warning']}" for line in lines if "warning" in line]
            facts = training_facts(method, len(rows), seconds, warnings, config, device)
            write_atomic(run / "training.json", lambda path: path.write_text(json.dumps(facts, indent=1)))
        if language:
            models.save_language_model(method, run / "language_model")
            evaluation.report_language(method, [text for text in texts if held_out(text)], run)
        write_atomic(run / "model.safetensors", lambda path: save_file(contiguous(method.state_dict()), path))
        log.plot()
    return source


def held_out(text):
    """One text in twenty, by its own hash, is kept from the language model's training."""
    return zlib.crc32(text.encode()) % 20 == 0


def contiguous(state):
    """A state dictionary that safetensors takes: tied tensors are written twice."""
    return {k: v.clone(memory_format=torch.contiguous_format) for k, v in state.items()}


def as_it_is(batch):
    return batch


class Updates(NamedTuple):
    first: int  # global number of the stage's first update
    done: int   # updates done so far
    end: int    # global number after its last


def train_stage(name, parallel, optimiser, batches, updates, config, run, device, log, stop):
    """Do the updates of one stage; returns the number of updates done so far."""
    method = getattr(parallel, "module", parallel).train()
    amp = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    stream, update, watch, last_save = iter(batches), updates.done, None, updates.done
    bar = tqdm(total=updates.end - updates.first, initial=update - updates.first, desc=name, disable=log.file is None,
               unit="rec", unit_scale=config.batch_size * config.accumulate)
    while update < updates.end:
        began = time.perf_counter()
        rate = rate_at(update - updates.first, updates.end - updates.first, config)
        for group in optimiser.param_groups:
            group["lr"] = rate
        terms = {}
        for micro in range(config.accumulate):
            batch = next(stream)
            batch = batch._replace(ecg=batch.ecg.to(device, non_blocking=True), peaks=batch.peaks.to(device, non_blocking=True))
            last = micro == config.accumulate - 1
            with contextlib.nullcontext() if last or parallel is method else parallel.no_sync():
                with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                    losses = parallel(batch)
                loss = sum(method.weights.get(k, 1.0) * v for k, v in losses.items()) / config.accumulate
                check_finite(loss, batch, update)
                loss.backward()
            for k, v in losses.items():
                terms[k] = terms.get(k, 0.0) + v.item() / config.accumulate
        norm = torch.nn.utils.clip_grad_norm_(method.parameters(), config.clip).item()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        update += 1
        log.add(update=update, stage=name, loss=sum(method.weights.get(k, 1.0) * v for k, v in terms.items()), terms=terms,
                lr=rate, grad_norm=norm, seconds=round(time.perf_counter() - began, 6))
        bar.set_postfix({k: f"{v:.3f}" for k, v in terms.items()}, refresh=False)
        bar.update()
        if config.method != "cardiolm":
            watch = watch or Watch(batch, method, config)
            if update - updates.first > warm_updates(updates.end - updates.first, config):  # in warm-up every loss is stuck
                watch.note(terms)
        if watch and update % 50 == 0:
            warning = watch.look()
            if warning:
                log.add(update=update, warning=warning)
                bar.write(f"update {update}: {warning}")
        stopping = stop.anywhere(device)
        if log.file and (update - last_save >= config.save_every or update == updates.end or stopping):
            save_checkpoint(run, method, optimiser, update)
            last_save = update
        if stopping:
            bar.close()
            if log.file:
                print(f"stopped and saved at update {update}; continue with: python train.py --resume {run}")
            break
    bar.close()
    return update


def check_finite(loss, batch, update):
    if not torch.isfinite(loss):
        raise data.DataError(f"the loss is {loss.item()} at update {update}; records of this batch: {', '.join(batch.ids)}. "
                             "Look at their signals (python data.py plot), or lower --lr")


def absolute(spec):
    """A data spec or text file whose path does not depend on where the program is started."""
    kind, colon, path = spec.partition(":")
    if kind == "simulated":
        return spec
    path = os.path.abspath(os.path.expanduser(path if colon else spec))
    return f"{kind}:{path}" if colon else path


def main(argv=None):
    config, run = parse(argv)
    device, first = start_processes()
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if run is None and config.name and (Path("runs") / config.name / "config.json").exists():
        raise data.DataError(f"runs/{config.name} exists: continue it with --resume runs/{config.name}, or choose another --name")
    config.data = ",".join(map(absolute, config.data.split(",")))
    name = config.name or f"{config.method}-{Path(config.data.split(':')[0]).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    run = agree(run or Path("runs") / name)
    if first and not (run / "config.json").exists():
        run.mkdir(parents=True, exist_ok=True)
        write_atomic(run / "config.json", lambda path: path.write_text(json.dumps(dataclasses.asdict(config), indent=1)))
    source = train(config, run, device, first)
    if models.world() > 1:
        dist.destroy_process_group()  # a process that ends with it open can abort, and torchrun then stops the one that evaluates
    if source and source != "texts" and first:
        evaluation.report(run, ["ptbxl" if source == "ptbxl" else "simulated"], device=device)


if __name__ == "__main__":
    try:
        main()
    except (data.DataError, models.ModelError) as error:
        sys.exit(f"error: {error}")
