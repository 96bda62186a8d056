"""Train an ECG-language method: python train.py --method fgclep   (every flag: python train.py --help)

A run is a folder runs/NAME with config.json, tokenizer/, log.jsonl, curves.png, checkpoint.pt, training.json,
model.safetensors and results.json. Kill it at any moment, continue with python train.py --resume runs/NAME.
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
import sys
import time
import zlib
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tqdm import tqdm

import csrc
import data
import eval as evaluation
import model as models
from model import rank


def parse(argv):
    """Command line -> (Config, run to continue or None, what made it). Errors: ModelError, DataError."""
    parser = argparse.ArgumentParser(description=__doc__, argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = {}
    for title, name, note in described():
        kind, default = models.kind_of(name), getattr(models.Config, name)
        how = dict(action=argparse.BooleanOptionalAction) if kind is bool else dict(type=kind)
        if kind is str and (values := models.get_args(models.TYPES[name])):
            how["metavar"] = "|".join(values)
        if name == "data":  # said again, it adds another set
            how["action"] = "append"
        group = groups.get(title) or groups.setdefault(title, parser.add_argument_group(title))
        others = {method: small[name] for method, (_, small, _) in models.METHODS.items() if name in small}
        known = "; ".join(map(str, [default, *(f"{value} {method}" for method, value in others.items())]))
        group.add_argument(models.flag(name), **how, help=f"{note} [{known}]".replace("%", "%%"))
    parser.add_argument("--resume", metavar="RUN", help="continue a run folder; its own config holds")
    given = vars(parser.parse_args(argv))
    if "data" in given:
        given["data"] = ",".join(given["data"])
    if (resume := given.pop("resume", None)) is None:
        return models.configure(**given), None, {}
    if given:
        parser.error(f"--resume takes the config from the run: drop --{', --'.join(given).replace('_', '-')}")
    config, made_by = evaluation.read_config(resume)
    return config, Path(resume), made_by


def described():
    """(group, name, note) of every setting, as Config has them: by its sections, and then by method."""
    found, title = [], "common"
    for section, name, note in re.findall(r"^(?:  # (.*)|    (\w+): .*?  # (.*(?:\n {20,}# .*)*))$",
                                          inspect.getsource(models.Config), re.M):
        title = section or title
        if name:
            whose = ", ".join(models.owners(name))
            found.append((whose and f"of {whose}" or title, name, re.sub(r"\s*\n\s*# ", " ", note)))
    return sorted(found, key=lambda setting: setting[0].startswith("of "))


# ---- data and batches --------------------------------------------------------------------------------------

class Corpus(data.Store):
    """A store of texts, for --method cardiolm. One in twenty, by its own hash, is kept from training."""

    def __init__(self, specs, language):
        self.texts = data.corpus(specs, language)
        self.meta = {"plan": str(zlib.crc32("\n".join(self.texts).encode()))}
        self.parts = [data.Part(specs, 0, len(self.texts), 1)]

    def rows(self, split):
        kept = np.array([zlib.crc32(text.encode()) % 20 == 0 for text in self.texts])
        return np.flatnonzero(~kept if split == "train" else kept & (split == "test"))

    def microvolts(self, rows):
        return np.zeros((len(rows), 12, 0), np.int16)

    def peaks(self, rows):
        return np.full((len(rows), 1), -1, np.int32)

    def ids(self, rows):
        return [f"text {row}" for row in rows]


def open_records(config):
    """Records that a run learns from. Errors: DataError."""
    cls, truth = models.method_class(config), None
    if not cls.needs_ecg:
        store = Corpus(config.data, config.report_language)
        tags = data.Tags.from_lists([text] for text in store.texts)
    else:
        store = data.open_all(config.data, config.rate)
        store.verify()
        tags = data.report_tags(store, config.report_language)
        if "targets" in cls.settings and config.targets == "truth":
            truth = data.true_tags(store)
    return Records(store, tags, truth or data.Tags.from_lists([()] * len(tags)), config)


def tagged(tags, rows):
    """Which of the rows have tags: (R,) bool."""
    return np.diff(tags.offsets)[rows] > 0


class RawBatch(NamedTuple):
    """A batch as it is read, and its augmentation."""
    batch: models.Batch    # ecg (B, L, N) int16 microvolts, peaks as stored
    dropped: torch.Tensor  # (B, L) bool: leads to be zeroed
    shifts: torch.Tensor   # (B,) samples to be moved by


class Records(torch.utils.data.Dataset):
    """(stage, epoch, rows) -> RawBatch. What is random about a record follows from (seed, stage, epoch, row)
    alone: any number of processes, and a resumed run, see the same. tags: data.Tags, of the reports; truth:
    of what is true, none where that is not known or not asked for; rows, val_rows: training and validation
    records with a report."""

    def __init__(self, store, tags, truth, config):
        self.store, self.tags, self.truth, self.config = store, tags, truth, config
        self.rows, self.val_rows = (rows[tagged(tags, rows)] for rows in map(store.rows, ("train", "val")))

    def all_tags(self, row):
        """Those of a record's report, and behind them what else is true."""
        reported = self.tags[row]
        return reported + [tag for tag in self.truth[row] if tag not in reported]

    def rows_without_truth(self):
        """Training records whose truth is not known."""
        return self.rows[~tagged(self.truth, self.rows)]

    def can_validate(self):
        """It takes two records, and --eval-every."""
        return self.config.eval_every > 0 and len(self.val_rows) > 1

    def reports(self):
        return [models.join(self.all_tags(row)) for row in self.rows]

    def step_texts(self):
        """The texts that steps can be made of; none where they are too many to be listed."""
        if self.config.text_unit == "report":
            return [models.join(self.tags[row]) for row in self.rows]
        if self.config.text_unit == "subset":
            return []
        return [tag for row in self.rows for tag in self.all_tags(row)]

    def __getitem__(self, key):
        stage, epoch, rows = key
        ecg, sampled = torch.from_numpy(self.store.microvolts(rows)), []
        tags = [self.all_tags(row) for row in rows]
        dropped, shifts = np.zeros(ecg.shape[:2], bool), np.zeros(len(rows), np.int64)
        limit = int(self.config.shift * self.config.rate)
        for i, row in enumerate(rows):
            rng = np.random.default_rng((self.config.seed, stage, epoch, row))
            sampled.append(sample_tags(self.tags[row], tags[i], self.config.text_unit, rng))
            if self.config.lead_drop:
                dropped[i] = rng.random(ecg.shape[1]) < self.config.lead_drop
            if limit:
                shifts[i] = rng.integers(-limit, limit + 1)
        batch = models.Batch(ecg, sampled, tags, list(rows), torch.from_numpy(self.store.peaks(rows)),
                             [len(self.truth.numbers_of(row)) > 0 for row in rows])
        return RawBatch(batch, torch.from_numpy(dropped), torch.from_numpy(shifts))


def sample_tags(reported, tags, unit, rng):
    """Tags that a step's text is made of: those of the report, with unit "tags" and three more that are true,
    a random subset in random order, or one. tags: see Records.all_tags."""
    if unit == "report":
        return reported
    if unit == "tags":
        others = tags[len(reported):]
        return reported + [others[i] for i in rng.permutation(len(others))[:3]]
    count = 1 if unit == "tag" else rng.integers(1, len(reported) + 1)
    return [reported[i] for i in rng.permutation(len(reported))[:count]]


def augment(raw, device):
    """RawBatch -> models.Batch on the device, in mV: leads zeroed, records moved with their R peaks."""
    ecg, peaks, dropped, shifts = (x.to(device, non_blocking=True) for x in (
        raw.batch.ecg, raw.batch.peaks, raw.dropped, raw.shifts))
    ecg, length = ecg.float().div_(1000).masked_fill_(dropped[:, :, None], 0), ecg.shape[2]
    if raw.shifts.any():
        source = torch.arange(length, device=device) - shifts[:, None]               # (B, N)
        outside = (source < 0) | (source >= length)
        ecg = ecg.gather(2, source.clamp(0, length - 1)[:, None].expand_as(ecg))
        ecg.masked_fill_(outside[:, None], 0)
        moved = peaks + shifts[:, None].int()
        lost = (peaks < 0) | (moved < 0) | (moved >= length)
        peaks = moved.masked_fill(lost, length).sort(1).values  # the lost behind the others
        peaks = peaks.masked_fill(peaks == length, -1)
    return raw.batch._replace(ecg=ecg, peaks=peaks)


def keys(records, rows, number, epochs, first=0):
    """Keys of Records for a stage of this process, from batch `first` on: in every epoch a seeded shuffle of
    the rows that it learns from (data.epoch_rows), whole batches only, of each batch its share."""
    def shuffled(epoch):
        rng = np.random.default_rng((records.config.seed, number, epoch))
        return rng.permutation(data.epoch_rows(records.store, rng, rows))

    size = records.config.batch_size
    share = size // models.world()
    batches = len(shuffled(0)) // size
    for place in range(first, epochs * batches):
        epoch, batch = divmod(place, batches)
        if batch == 0 or place == first:
            order = shuffled(epoch)
        start = batch * size + rank() * share
        yield number, epoch, order[start:start + share]


class Stage(NamedTuple):
    name: str
    epochs: int
    first: int    # updates of the run before its first
    end: int      # and after its last
    batches: int  # an epoch
    rows: np.ndarray  # training records that it learns from

    def validates(self, update, config):
        """Are validation records looked at after an update of the run?"""
        size, seen = self.batches * config.eval_every, (update - self.first) * config.accumulate
        return size > 0 and (update == self.end or seen // size > (seen - config.accumulate) // size)


def plan_stages(records):
    """Stages of a run, for most methods one: the fine one learns from the records whose truth is not known,
    since the others have nothing to recover; where these make no batch, its epochs are the coarse one's.
    Errors: DataError where a stage has no update."""
    config, rows = records.config, records.rows
    plan = {name: (config.fine_epochs, records.rows_without_truth()) if name == "fine" else
            (config.epochs, rows) for name in models.method_class(config).stages}
    count = lambda rows: len(data.epoch_rows(records.store, np.random.default_rng(0), rows))
    if "fine" in plan and len(plan["fine"][1]) < len(rows) and count(plan["fine"][1]) < config.batch_size:
        plan = {"coarse": (config.epochs + config.fine_epochs, rows)}
        if config.llm:
            raise data.DataError("--llm: all that is true of these records is known, or of all but a few: "
                                 "nothing is to be recovered; leave it out, or add --targets reports")
    stages, end = [], 0
    for name, (epochs, learned) in plan.items():
        batches = count(learned) // config.batch_size
        first, end = end, end + epochs * batches // config.accumulate
        if epochs:
            stages.append(Stage(name, epochs, first, end, batches, learned))
    if count(rows) < config.batch_size:
        raise data.DataError(f"{count(rows)} training records with a report are too few for a batch of "
                             f"{config.batch_size}: lower --batch-size")
    if config.batch_size % models.world() or any(stage.first == stage.end for stage in stages):
        raise data.DataError(
            f"{count(rows)} training records with a report an epoch, batches of {config.batch_size} by "
            f"{models.world()} process(es), {config.accumulate} for an update: every stage needs one update, "
            "and a batch must divide by the processes; lower --batch-size or --accumulate")
    share = config.batch_size // models.world()
    if config.chunk and 1 in (config.chunk, share % config.chunk):
        raise data.DataError(f"--chunk {config.chunk} of {share} records leaves a chunk of one, which "
                             "BatchNorm cannot normalise: choose another")
    if config.keep == "best" and not records.can_validate():
        raise data.DataError("--keep best: there is nothing to choose by; it needs two validation records "
                             "with a report, and --eval-every over 0")
    return stages


def ignore_interrupts(worker):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the workers, too; the main process ends it


# ---- processes: under torchrun several train together; process 0 alone prints, and writes into the run -----

def start_processes():
    """Join torchrun's processes, if there are any -> this one's device."""
    local, cuda = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.is_available()
    if cuda and local >= (gpus := torch.cuda.device_count()):
        raise data.DataError(f"process {local + 1} of this machine has no GPU: it has {gpus}; start as many")
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        backends = "cpu:gloo,cuda:nccl" if cuda else "gloo"  # what is on the CPU must not wait for the GPU
        dist.init_process_group(backends, timeout=datetime.timedelta(hours=3))
    return device


def leave_processes():
    """Leave torchrun's processes: one that ends with its group open can abort, and the others are stopped."""
    if models.world() > 1:
        dist.barrier()
        time.sleep(0.2)  # Gloo's threads need Python's lock, under which the group waits for them for ever
        dist.destroy_process_group()


def from_first(value=None):
    """Process 0's value, in all processes, which wait for it."""
    box = [value]
    if models.world() > 1:
        dist.broadcast_object_list(box)
    return box[0]


class Stop:
    """While it is entered, SIGINT and SIGTERM ask for a stop: the loop saves and leaves before its next
    batch. A second one ends at once, but not under torchrun, where Ctrl-C comes twice."""

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

    def anywhere(self):
        """Whether any process was asked."""
        flag = torch.tensor(self.asked)
        if models.world() > 1:
            dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)


# ---- model and optimiser -----------------------------------------------------------------------------------

def make_text(config, run, reports, device, fresh):
    """(language model, tokenizer) of a run: loaded or, by default, made of all training reports, reports().
    Process 0 of a fresh run makes it and keeps tokenizer and architecture in run/tokenizer; the others, and a
    resumed run, build it from there: their weights come from process 0 or from the checkpoint."""
    folder, cls, text = run / "tokenizer", models.method_class(config), None
    if rank() == 0 and fresh:
        if config.text_model:
            text = models.load_text_model(config.text_model, cls.head)
        elif config.init and not models.publication(config.init):  # its weights are of its words
            text = models.rebuild_text_model(Path(config.init) / "tokenizer", cls.head)
        else:
            text = cls.default_text_model(reports(), config, device,
                                          lambda steps: tqdm(steps, desc="language model"))
        models.save_text_model(*text, folder)
    from_first()
    return text or models.rebuild_text_model(folder, cls.head)


def start_from(init, method, run):
    """Fill a method with what fits of other weights, those of a run or published -> {name: tensor}, and say
    what does not. run: this one; its language model may be another than that of the weights."""
    if published := models.publication(init):
        kind, (state, _) = published[0], evaluation.read_tensors(published[1])
        names = models.published()[kind]["names"]
        state = models.with_our_leads(models.rename(state, names), kind)
        before = models.configure(models.published()[kind]["method"], "paper", data="")
    else:
        state, (before, _) = evaluation.read_weights(init), evaluation.read_config(init)
        tokenizers = [data.checksums(folder, ("tokenizer/*",)) for folder in (init, run)]
        if method.config.text_model and tokenizers[0] != tokenizers[1]:
            print(f"--init {init}: its language model is not that of --text-model, and is left out")
            state = {name: x for name, x in state.items() if not name.startswith("text.")}
    ours = method.state_dict()
    taken = {name: value.reshape(ours[name].shape) for name, value in state.items()
             if name in ours and models.same_shape(value, ours[name])}
    if not any(name.startswith("ecg.") for name in taken):
        raise models.ModelError(f"--init {init}: nothing of its ECG encoder fits a {method.config.encoder} "
                                "of this --width and --patch")
    method.load_state_dict(taken, strict=False)
    parts = {"of another size": [name for name in state if name in ours and name not in taken],
             "without a place here": sorted(state.keys() - ours.keys()),
             "left as they were made": sorted(ours.keys() - state.keys())}
    size = lambda tensors: sum(x.numel() for x in tensors.values())
    print(f"--init {init}: {size(taken) / size(ours):.1%} of the weights")
    for what, names in parts.items():
        if names:
            print(f"  {len(names)} {what}: {', '.join(names[:8])}{', ...' * (len(names) > 8)}")
    for name in ("rate", "normalise"):  # the weights fit, but what they have seen was another signal
        if (was := getattr(before, name)) != (now := getattr(method.config, name)):
            print(f"  learned with {models.flag(name)} {was}: this run has {now}")
    return taken


def far_texts(method, texts, run, device, fresh, batch=256):
    """C-MELT's source of certain negatives: different reports, compared by the mean word of the untrained
    text tower. Kept in run/negatives.pt, since a resumed run has another tower."""
    texts, path = sorted(set(texts)), run / "negatives.pt"
    if rank() == 0 and fresh:
        method.text.eval()
        with torch.no_grad():
            vectors = [models.masked_mean(*method.text.encode(texts[i:i + batch])[:2]).half().cpu()
                       for i in tqdm(range(0, len(texts), batch), desc="encoding texts", leave=False)]
        data.write_atomic(path, lambda path: torch.save({"vectors": torch.cat(vectors)}, path))
    from_first()
    return models.FarTexts(texts, evaluation.read_file(path)[0]["vectors"].to(device))


def make_optimiser(method, config):
    """AdamW. Weight decay is on matrices that something is multiplied by, not on positions, class tokens,
    queries and scales, whatever their shape; a group's "scale" is its share of the learning rate."""
    groups = defaultdict(list)
    for path, p in method.named_parameters():
        named = path.endswith(("weight", "project_beats", "vocabulary"))
        table = "position" in path or "relative_attention_bias" in path
        decays = named and p.dim() > 1 and not table
        scale = config.text_lr_scale if path.startswith("text.") else 1.0
        if p.requires_grad:
            groups[config.weight_decay if decays else 0.0, scale].append(p)
    groups = [{"params": groups[decay, scale], "weight_decay": decay, "scale": scale}
              for decay, scale in sorted(groups, reverse=True)]
    return torch.optim.AdamW(groups, config.lr, (0.9, config.beta2), fused=True)


class Interpolation:
    """What of a method is validated and saved: its weights and, by a share, those of --init that it started
    from, as in robust fine-tuning (WiSE-FT, Wortsman et al. 2022): the start knows what the new data do not
    show. start (in checkpoints): {name: tensor} of --init, as far as they have fitted."""

    def __init__(self, method, share, start):
        learned = {name: p.detach() for name, p in method.named_parameters() if p.requires_grad}  # tied: once
        self.share, live = share, learned | dict(method.named_buffers())
        self.live = {name: x for name, x in live.items() if share and name in start and x.is_floating_point()}
        self.start = {name: start[name].to(x) for name, x in self.live.items()}

    @contextlib.contextmanager
    def applied(self):
        """Within, the method has the interpolated weights."""
        learned = {name: x.clone() for name, x in self.live.items()}
        try:
            for name, x in self.live.items():
                x.lerp_(self.start[name], self.share)
            yield
        finally:
            for name, x in self.live.items():
                x.copy_(learned[name])


def lr_at(update, updates, config):
    """Learning rate of one update of a stage: linear warm-up, then cosine to zero."""
    warmup = max(1, round(config.warmup * updates)) if config.warmup else 0
    if update < warmup:
        return config.lr * (update + 1) / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (update - warmup) / max(1, updates - warmup)))


# ---- files of a run ----------------------------------------------------------------------------------------

def new_folder(config, made_by):
    """Make the folder of a new run, which no other process has, with its config.json. Errors: DataError."""
    kinds = [re.split(r"[:*]", spec)[0] for spec in data.split_specs(config.data)]
    source, now = "-".join(dict.fromkeys(Path(kind).stem for kind in kinds)), time.strftime("%Y%m%d-%H%M%S")
    base = config.name or f"{config.method.rpartition(':')[2]}-{source}-{now}"
    for number in itertools.count(1):
        run = Path("runs", base if number == 1 else f"{base}-{number}")
        try:
            run.mkdir(parents=True)
            break
        except FileExistsError as error:
            if config.name or not Path("runs").is_dir():
                fault = f"exists: continue it with --resume {run}, or choose another --name"
                raise data.DataError(f"{run} {fault}") from error
        except OSError as error:
            raise data.DataError(f"{run}: cannot be made ({error.strerror}); start elsewhere") from error
    for path in models.own_files(config).values():
        shutil.copy(path, run)
    settings = models.settings_of(config) | {"made_by": made_by}
    data.write_text(run / "config.json", json.dumps(settings, indent=1))
    return run


def write_lines(path, lines):
    """Make a JSON-lines file of these lines -> the file, open for add_line."""
    data.write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
    return open(path, "a", buffering=1)


def add_line(file, line):
    """Errors: DataError where the disk is full."""
    try:
        file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise data.DataError(f"{file.name}: cannot be written: {error.strerror}; when it can, go on with "
                             f"--resume {Path(file.name).parent}") from error
    if wandb_run := getattr(sys.modules.get("wandb"), "run", None):  # what start_wandb has begun
        wandb_run.log(line, step=line["update"])


def start_wandb(config, run):
    """From now on add_line tells Weights & Biases what it writes."""
    try:
        import wandb
    except ImportError as error:
        raise models.ModelError("--wandb needs the package: pip install wandb") from error
    wandb.init(project=config.wandb, name=run.name, config=models.settings_of(config), resume="allow",
               id=run.name)


def plot_log(lines, path):
    """Loss terms, learning rate, what validation records show; a grey line where a stage begins."""
    from matplotlib.figure import Figure
    updates, looks = ([line for line in lines if key in line] for key in ("terms", "validation"))
    figure, names = Figure(figsize=(15 if looks else 9, 4), layout="constrained"), list(updates[0]["terms"])
    left, right, *more = figure.subplots(1, 3 if looks else 2)
    x, places = [u["update"] for u in updates], [line["update"] for line in looks]
    for number, name in enumerate(names):
        left.plot(x, [u["terms"].get(name) for u in updates], lw=0.8, alpha=0.5, label=name,
                  color=f"C{number}")
        left.plot(places, [line["validation"]["terms"].get(name) for line in looks], "ko-", lw=1.5, ms=4,
                  mfc=f"C{number}")
    for start in {u["stage"]: u["update"] for u in reversed(updates)}.values():
        left.axvline(start, color="0.8", lw=0.8, zorder=0)
    left.set(xlabel="update", ylabel="loss term" + " (dots: validation)" * bool(looks))
    left.legend(frameon=False)
    right.plot(x, [u["lr"] for u in updates], color="C1")
    right.set(xlabel="update", ylabel="learning rate")
    for panel in more:
        for name in ("R@1", "R@5"):
            panel.plot(places, [line["validation"][name] for line in looks], "o-", ms=3, label=name)
        for name in dict.fromkeys(name for line in looks for name in line["validation"]["auroc"]):
            panel.plot(places, [line["validation"]["auroc"].get(name) for line in looks], "s--", ms=3,
                       label=f"AUROC, {name}")
        panel.set(xlabel="update", ylabel="validation records", ylim=(0, 1))
        panel.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)


def save_weights(method, run, name="model.safetensors"):
    """Weights file of a run, with checksums of its tensors, tokenizer and own code."""
    state = {k: v.cpu().clone(memory_format=torch.contiguous_format)  # tied tensors are written twice
             for k, v in method.state_dict().items()}
    files = data.checksums(run, ("tokenizer/*", "*.py"))
    facts = {"tensors": evaluation.crc_of_tensors(state), "files": json.dumps(files)}
    data.write_atomic(Path(run) / name, lambda path: save_file(state, path, facts))


def read_checkpoint(run, save_every):
    """checkpoint.pt of a run, or None. Errors: DataError where it, or a file of it, is damaged or lost."""
    path, log = run / "checkpoint.pt", evaluation.read_log(run)
    if not path.exists():
        if (run / "model.safetensors").exists():
            raise data.DataError(f"{path}: missing; the run is finished, and needs no --resume")
        if save_every and any(line["update"] > save_every for line in log) or (
                sum(line.get("seconds", 0) for line in log) > 2 * SAVE_SECONDS):
            raise data.DataError(f"{path}: missing, and the run was beyond its first; restore it, or train "
                                 "anew")
        return None
    state, _ = evaluation.read_file(path)
    if state.keys() != {"model", "optimiser", "start", "update", "processes", "watch", "files"}:
        raise data.DataError(f"{path}: not a checkpoint of this version of the program; train anew")
    data.compare_checksums(run, state["files"])
    if sum("terms" in line and line["update"] <= state["update"] for line in log) != state["update"]:
        raise data.DataError(f"{run / 'log.jsonl'}: has not the {state['update']} updates that are done; "
                             "restore it, or train anew")
    return state


def restore(state, run, method, optimiser):
    """Fill method and optimiser from a checkpoint -> updates done. Errors: DataError if it is of another."""
    try:
        method.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        fault = f"not of {run / 'config.json'} ({models.first_line(error)})"
        raise data.DataError(f"{run / 'checkpoint.pt'}: {fault}; train anew") from error
    if rank() == 0 and (before := state["processes"]) != models.world():
        print(f"{run}: {models.world()} process(es) go on where {before} were, with other random numbers")
    return state["update"]


# ---- FG-CLEP: recovery of waveform features between its two stages -----------------------------------------

MOST_FEATURES, MOST_WORDS = 8, 10  # of one answer, of one feature
LLM_TOKENS, LLM_BATCH = 192, 32    # of one answer (eight phrases take about 80), sets of tags asked at once


def ask_llm(run, name, reports, device):
    """Ask a language model for the waveform features of R reports (lists of tags) -> R lists of phrases. Each
    distinct set of tags is asked once, the longest first: too little memory shows at once. Answers are kept
    in run/llm_answers.json by whole batches, so that a resumed run forms the same: padding moves the last
    bits of a score, and so might change an answer. Errors: ModelError, DataError."""
    path, known = run / "llm_answers.json", {"model": name, "answers": {}}
    if path.exists():
        known = data.read_json(path, {"model": str, "answers": {str: str}})
    if known["model"] != name:
        raise data.DataError(f"{path} holds the answers of {known['model']}, not of {name}: move it away")
    answers, sets = known["answers"], ["; ".join(sorted(set(tags))) for tags in reports]
    distinct = sorted(sorted(set(sets)), key=len, reverse=True)
    if left := [one for one in distinct if one not in answers]:
        with torch.random.fork_rng(devices=[]):  # loading may draw random numbers
            lm, tokenizer = load_llm(name, device)
        for start in tqdm(range(0, len(left), LLM_BATCH), desc="asking the language model"):
            batch = left[start:start + LLM_BATCH]
            answers.update(zip(batch, generate(lm, tokenizer, batch)))
            data.write_text(path, json.dumps(known, indent=1))
        del lm
        torch.cuda.empty_cache()
    found = {one: parse_features(answers[one]) for one in distinct}
    features = {feature for row in found.values() for feature in row or []}
    print(f"{name}: {len(distinct)} distinct sets of tags, {len(features)} distinct features; "
          f"{list(found.values()).count(None)} of {len(distinct)} answers could not be read")
    return [found[one] or [] for one in sets]


def load_llm(name, device):
    """(causal language model on the device, tokenizer) of a hub's name or a folder. Errors: ModelError."""
    lm, tokenizer = models.load_text_model(name, "AutoModelForCausalLM")
    if not lm.can_generate():
        raise models.ModelError(f"--llm {name!r} does not write text: it needs a causal language model")
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
    return lm.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32).eval(), tokenizer


def prompt_for(tokenizer, report):
    """The question about a report; a chat's if the model has a template for it."""
    prompt = "\n".join(data.knowledge()["question"]).format(report)
    if not tokenizer.chat_template:
        return prompt
    return tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True,
                                         tokenize=False, enable_thinking=False)  # others ignore it


@torch.inference_mode()
def generate(lm, tokenizer, reports):
    """The model's most likely answers to B reports, as B strings."""
    tokens = tokenizer([prompt_for(tokenizer, report) for report in reports], padding=True,
                       return_tensors="pt", add_special_tokens=not tokenizer.chat_template).to(lm.device)
    out = lm.generate(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], do_sample=False,
                      max_new_tokens=LLM_TOKENS, temperature=None, top_p=None, top_k=None,
                      pad_token_id=tokenizer.pad_token_id)
    return tokenizer.batch_decode(out[:, tokens["input_ids"].shape[1]:], skip_special_tokens=True)


def parse_features(answer):
    """Phrases of the first JSON list in an answer, behind its thoughts; None without such a list."""
    answer = answer.rpartition("</think>")[2]
    try:
        items, _ = json.JSONDecoder().raw_decode(answer, answer.index("["))
    except (ValueError, RecursionError):
        return None
    if not all(isinstance(item, str) for item in items):
        return None
    phrases = dict.fromkeys(" ".join(item.lower().split()).strip(" .,;:!") for item in items)
    return [p for p in phrases if data.WORD.search(p) and len(p.split()) <= MOST_WORDS][:MOST_FEATURES]


@torch.no_grad()
def recover_features(method, records, rows, proposals, run, device):
    """Enrich reports, as FG-CLEP does: every waveform feature that is proposed for a report (R lists; None:
    by prompts.json) is a candidate, scored by the coarse model against the record's own ECG. It is kept if
    its cosine reaches keep_threshold and, where it is a candidate of n records, if the ECG is one of the
    keep_share * n training ECGs with the highest cosine: so neither its popularity nor the level of its
    cosines matters. Writes run/recovered.jsonl."""
    store, tags, config = records.store, records.tags, records.config
    knowledge, lines, names = data.Findings(), [], store.ids(rows)
    places = defaultdict(list)  # feature -> (place in rows, its line)
    for place, row in enumerate(rows):
        for feature in proposals[place] if proposals else knowledge.candidates(tags[row]):
            if feature not in tags[row]:
                lines.append({"row": int(row), "id": names[place], "feature": feature})
                places[feature].append((place, lines[-1]))
    method.eval()
    vectors = evaluation.embed_records(method, store, rows, device, "scoring candidates")
    ecg = torch.from_numpy(vectors["rhythm"])                                              # (R, dim)
    features = sorted(places)
    for start in range(0, len(features), 256):  # a language model may propose many thousands
        part = features[start:start + 256]
        table = (ecg @ method.encode_text(part).report.float().cpu().T).numpy()            # (R, F)
        for feature, cosines in zip(part, table.T):
            quantile = max(0, 1 - config.keep_share * len(places[feature]) / len(rows))
            bar = max(np.quantile(cosines, quantile), config.keep_threshold)
            for place, line in places[feature]:
                line.update(cosine=round(float(cosines[place]), 4), kept=bool(cosines[place] >= bar))
    method.train()
    write_lines(run / "recovered.jsonl", lines).close()


def enrich(records, rows, run):
    """Tags with the recovered features that were kept; says how many, and of simulated ones how right."""
    shape = {"row": int, "feature": str, "cosine": float, "kept": bool}
    lines, enriched, quality = data.read_lines(run / "recovered.jsonl", shape), list(records.tags), {}
    kept = [line for line in lines if line["kept"]]
    for line in kept:
        enriched[line["row"]].append(line["feature"])
    if rank() == 0:
        print(f"recovered features: {len(lines)} candidates, {len(kept)} kept")
    if rank() == 0 and not records.config.llm:  # which has words of its own
        true = records.store.records["features"].iloc[rows]
        missing = {row: set(some) - set(records.tags[row]) for row, some in zip(rows, true) if some}
        for name, part in (("all candidates", lines), ("kept by the filter", kept)) if missing else ():
            part = [line for line in part if line["row"] in missing]
            hits = sum(line["feature"] in missing[line["row"]] for line in part)
            precision, recall = hits / max(1, len(part)), hits / max(1, sum(map(len, missing.values())))
            quality[name] = {"features": len(part), "precision": precision, "recall": recall}
            print(f"  {name:<20} {len(part):7d} features   precision {precision:.3f}   recall {recall:.3f}")
        if quality:
            data.write_text(run / "recovery.json", json.dumps(quality, indent=1))
    return data.Tags.from_lists(enriched)


# ---- the loop ----------------------------------------------------------------------------------------------

LOG_EVERY = {"cpu": 1, "cuda": 10}  # updates; between two readings of the losses nothing waits for the GPU
SAVE_SECONDS = 300                  # between checkpoints, unless --save-every says


class Watch:
    """Reports collapse of a tower, flat on a probe batch at two checks (at one it may recover), and a loss
    that is stuck after the warm-up. state (in checkpoints): last 50 losses, towers flat at the last check."""

    def __init__(self, probe, method, config, warmup_end=0):
        self.probe, self.method, self.warmup_end = probe, method, warmup_end
        self.state = {"recent": [], "flat": []}
        self.chance = method.contrast_sides * math.log(config.batch_size)

    def note(self, line):
        """A line of log.jsonl that has terms."""
        if line["update"] > self.warmup_end and "contrast" in line["terms"]:
            self.state["recent"] = [*self.state["recent"][-49:], line["terms"]["contrast"]]

    @torch.no_grad()
    def check(self):
        """Sentence on what looks wrong, or ""."""
        self.method.eval()
        views = {"ECG": self.method.encode_ecg(self.probe.ecg).rhythm,
                 "text": self.method.encode_text(self.probe.texts).report}
        self.method.train()
        spreads = {name: (x - x.mean(0)).square().sum(1).mean().item() for name, x in views.items()}
        flat = {name: spread for name, spread in spreads.items() if spread < 0.01}  # 1: all over the sphere
        still, self.state["flat"] = [name for name in flat if name in self.state["flat"]], list(flat)
        recent = self.state["recent"]
        if still:
            return (f"COLLAPSE: all {still[0]} embeddings are nearly the same (spread {flat[still[0]]:.4f}). "
                    "Stop this run; use warm-up (--warmup 0.1), a lower --lr, or a larger --batch-size.")
        if len(recent) == 50 and min(recent) > 0.98 * self.chance:
            return (f"STUCK: the contrastive loss has stayed at {np.mean(recent):.3f}, guessing within the "
                    f"batch gives {self.chance:.3f}: nothing is being learned. Use warm-up (--warmup 0.1) or "
                    "a lower --lr.")
        return ""


class Validation:
    """Validation records with a report, 2,000 at most, always the same: loss terms without augmentation, in
    whole batches, then figures. Nothing is chosen by it unless --keep best asks."""

    def __init__(self, records, device):
        self.rows = np.random.default_rng(records.config.seed).permutation(records.val_rows)[:2000]
        self.records, self.config, self.device = records, records.config, device
        self.questions = []  # of label sets: (name, places in rows, labels (R, C), C lists of texts)
        for name in data.sets_of(records.store, "val"):
            facts = records.store.records.iloc[self.rows]
            sources = data.OWN if name == "own" else (name.split("_")[0],)
            places = np.flatnonzero(facts["source"].isin(sources))
            classes, labels, keep = data.label_matrix(facts.iloc[places], name)
            if keep.any():
                prompts = data.class_prompts(name, classes, "descriptive", facts.iloc[places])
                self.questions.append((name, places[keep], labels[keep], prompts))

    @torch.no_grad()
    def evaluate(self, method):
        """-> {"loss", "terms", "R@1", "R@5", "texts", "auroc": {label set: value}}"""
        method.eval()
        size = min(self.config.batch_size, len(self.rows))
        terms, count = defaultdict(float), len(self.rows) // size
        with models.alone(), torch.random.fork_rng(), autocast(self.config, self.device):
            torch.manual_seed(self.config.seed)
            for i in range(count):
                raw = self.records[0, 0, self.rows[i * size:(i + 1) * size]]
                raw.dropped[:], raw.shifts[:] = False, 0
                for name, value in method(augment(raw, self.device)).items():
                    terms[name] += value.item() / count
            found = self.figures(method)
        method.train()
        return {"loss": method.weighted(terms), "terms": terms, **found}

    def figures(self, method):
        """R@1 and R@5 of each ECG's report among the distinct ones, and the macro AUROC of label sets."""
        store, tags, auroc = self.records.store, self.records.tags, {}
        vectors = evaluation.embed_records(method, store, self.rows, self.device, "validation")
        ecg = torch.from_numpy(vectors["rhythm"])
        texts, own = np.unique([models.join(tags[row]) for row in self.rows], return_inverse=True)
        like = models.cosine(ecg, evaluation.embed_reports(method, texts))  # not in bf16, on a CPU either
        ranks = evaluation.ranks(like.numpy(), own[:, None] == np.arange(len(texts)))
        for name, places, labels, prompts in self.questions:
            compare = lambda text: models.cosine(ecg[places], text.report.cpu())
            scores = evaluation.class_scores(method, prompts, compare)
            auroc[name] = round(float(evaluation.mean_auroc(scores, labels)), 4)
        return {"R@1": float((ranks <= 1).mean()), "R@5": float((ranks <= 5).mean()), "texts": len(texts),
                "auroc": auroc}


def autocast(config, device):
    amp = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=amp)


def do_update(method, optimiser, batches, config, device, stop):
    """An update by config.accumulate batches -> {term: value} and gradient norm, still on the device, and the
    records' rows; None where a stop was asked for: half an update is left undone."""
    terms, rows = defaultdict(float), []
    optimiser.zero_grad(set_to_none=True)
    for _ in range(config.accumulate):
        if stop.anywhere():
            return None
        batch = augment(next(batches), device)
        if config.chunk:
            losses = chunked(method, batch, config, device)
        else:
            with autocast(config, device):
                losses = method(batch)
            (method.weighted(losses) / config.accumulate).backward()
        for name, value in losses.items():
            terms[name] += value.detach().float() / config.accumulate
        rows += batch.ids
    trained = [p for group in optimiser.param_groups for p in group["params"]]
    average_gradients(trained)
    norm = torch.nn.utils.clip_grad_norm_(trained, config.clip)
    optimiser.step()
    method.limit_scales()
    return terms, norm, rows


def chunked(method, batch, config, device):
    """Loss terms of a batch, and their gradients, with config.chunk records in memory at a time (GradCache,
    Gao et al. 2021): the parts are encoded without gradient; the loss of all vectors gives the gradients of
    these; then the parts are encoded again, with the same random numbers, and gradients go on through them.
    BatchNorm normalises a part, and its running statistics see each part once."""
    batch, found, cuda = method.plan(batch), [], device.type == "cuda"
    parts = list(batch.parts(config.chunk))
    for part in parts:
        state = torch.get_rng_state(), torch.cuda.get_rng_state(device) if cuda else None
        with torch.no_grad(), autocast(config, device):
            found.append((state, *method.represent(part)))
    names = dict.fromkeys(name for _, vectors, _ in found for name in vectors)
    pieces = {name: [vectors[name] for _, vectors, _ in found if name in vectors] for name in names}
    whole = {name: padded(some).requires_grad_(some[0].is_floating_point()) for name, some in pieces.items()}
    with autocast(config, device):
        terms = method.compare(whole, batch)
    (method.weighted(terms) / config.accumulate).backward()
    pieces = {name: iter(whole[name].grad.split([len(piece) for piece in some]))
              for name, some in pieces.items() if whole[name].grad is not None}
    counts = {name: models.mean_count(sum(sums[name][1] for _, _, sums in found)) for name in found[0][2]}
    with torch.random.fork_rng([device] if cuda else []), models.replaying(method):
        for part, ((state, state_of_gpu), _, _) in zip(parts, found):
            torch.set_rng_state(state)
            if cuda:
                torch.cuda.set_rng_state(state_of_gpu, device)
            with autocast(config, device):
                vectors, sums = method.represent(part)
            own = {name: total / counts[name].to(total.dtype) for name, (total, _) in sums.items()}
            ends = [vectors[name] for name in pieces if name in vectors]
            given = [next(pieces[name])[:, :vectors[name].shape[1]] for name in pieces if name in vectors]
            last = [method.weighted(own) / config.accumulate] if own else []
            torch.autograd.backward(ends + last, given + [None] * len(last))
            for name, value in own.items():
                terms[name] = terms.get(name, 0) + value.detach()
    return terms


def padded(pieces):
    """(b, ...) tensors one behind the other; the N of (b, N, D) padded with zeros to the longest."""
    if pieces[0].dim() == 3:
        longest = max(piece.shape[1] for piece in pieces)
        pieces = [models.lengthen(piece, longest) for piece in pieces]
    return torch.cat(pieces)


def average_gradients(parameters):
    """Over the processes, at once; a parameter without gradient counts as zeros."""
    if models.world() > 1:
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        flat = torch.cat([p.grad.flatten() for p in parameters])
        dist.all_reduce(flat)
        for p, mean in zip(parameters, (flat / models.world()).split([p.numel() for p in parameters])):
            p.grad.copy_(mean.view_as(p))


class UpdateLog:
    """Updates that wait for log.jsonl: (rest of the line, *what do_update gave). Losses are on the device: to
    read them is to wait for it, so that is done for several at once, by all processes together."""

    def __init__(self, method, names, file=None, watch=None):
        self.method, self.names, self.file, self.watch = method, names, file, watch
        self.waiting, self.since = [], time.perf_counter()

    def flush(self):
        """Write the lines of log.jsonl -> them. Errors: DataError where a loss or gradient is not finite."""
        waiting, self.waiting, lines = self.waiting, [], []
        numbers = torch.stack([torch.stack([*terms.values(), norm]) for _, terms, norm, _ in waiting])
        numbers = models.mean_over_processes(numbers).tolist()
        seconds = round((time.perf_counter() - self.since) / len(waiting), 6)
        for (line, terms, _, rows), (*values, norm) in zip(waiting, numbers):
            terms = dict(zip(terms, values))
            loss = self.method.weighted(terms)
            for what, value in (("loss", loss), ("gradient", norm)):
                if not math.isfinite(value):
                    raise data.DataError(
                        f"the {what} is {value} at update {line['update']}; records of its batch: "
                        f"{', '.join(self.names(rows))}. Look at their signals (python data.py plot), or "
                        "lower --lr")
            lines.append({**line, "loss": loss, "terms": terms, "grad_norm": norm, "seconds": seconds})
            if self.file:
                add_line(self.file, lines[-1])
            if self.watch:
                self.watch.note(lines[-1])
        self.since = time.perf_counter()
        return lines


class Trainer:
    """A run while it is trained: records, method, optimiser, and how many updates are done (update).
    checkpoint: where it goes on, or None. Errors: ModelError, DataError."""

    def __init__(self, records, run, device, checkpoint):
        self.records, self.config, self.run, self.device = records, records.config, run, device
        config, fresh = self.config, checkpoint is None
        text = make_text(config, run, records.reports, device, fresh)
        torch.manual_seed(config.seed)  # a text model that is loaded leaves the random state as it was
        self.method = method = models.build_method(config, text).to(device)
        start = {} if fresh else checkpoint["start"]
        if config.init and fresh and rank() == 0:
            start = start_from(config.init, method, run)
        if method.needs_far_texts:
            method.far = far_texts(method, records.reports(), run, device, fresh)
        for tensor in method.state_dict().values() if models.world() > 1 else ():
            dist.broadcast(tensor, 0)
        self.optimiser = make_optimiser(method, config)
        self.interpolation = Interpolation(method, config.init_share, start)
        self.update = 0 if fresh else restore(checkpoint, run, method, self.optimiser)
        self.watch_state = None if fresh else checkpoint["watch"]
        self.recovered = not fresh and "recovered.jsonl" in checkpoint["files"]
        if config.compile:
            method.compile_encoder()
        if config.recompute:
            method.recompute()

    def begin(self, stages):
        """Say what is trained on what, and open log.jsonl behind the updates that are done."""
        config, self.log_file = self.config, None
        if rank() > 0:
            return
        count = sum(p.numel() for p in self.method.parameters())
        sets = ", ".join(f"{n} of {spec}" for spec, n in by_set(self.records).items())
        print(f"{config.method}: training records: {sets}; {stages[-1].end} updates, "
              f"{count / 1e6:.2f} M parameters, run {self.run}")
        if config.fine_epochs and stages[-1].name != "fine":
            print("all that is true of these records is known, or of all but a few, so nothing is to be "
                  f"recovered: the coarse stage takes the {config.fine_epochs} epochs of the fine one")
        done = [line for line in evaluation.read_log(self.run) if line["update"] <= self.update]
        self.log_file = write_lines(self.run / "log.jsonl", done)

    def recover(self, stage, proposals):
        """From now on reports hold the waveform features that the coarse model has recovered."""
        store, truth = self.records.store, self.records.truth
        if rank() == 0 and not self.recovered:  # a checkpoint of this stage has them
            with self.interpolation.applied():
                recover_features(self.method, self.records, stage.rows, proposals, self.run, self.device)
        from_first()
        self.records = Records(store, enrich(self.records, stage.rows, self.run), truth, self.config)

    def prepare_texts(self):
        """Tell the method which tags there are, and encode what a frozen language model will be asked."""
        tags, truth = self.records.tags, self.records.truth
        with autocast(self.config, self.device):
            self.method.cache_texts(self.records.step_texts, lambda parts: tqdm(parts, "texts", leave=False))
        decided = set(truth.table)  # what no record shows is a name that nobody has decided about
        self.method.set_vocabulary(list(dict.fromkeys(tags.table + truth.table)),
                                   {tag: name for tag, name in data.meanings().items() if name in decided})

    def batches(self, number, stage):
        """What is left of a stage's batches."""
        config, cuda = self.config, self.device.type == "cuda"
        done = (self.update - stage.first) * config.accumulate
        workers = config.workers if config.workers >= 0 else cuda * min(4, os.cpu_count() // models.world())
        return torch.utils.data.DataLoader(
            self.records, sampler=keys(self.records, stage.rows, number, stage.epochs, done), batch_size=None,
            num_workers=workers, pin_memory=cuda, worker_init_fn=ignore_interrupts)

    def watch_over(self, number, stage):
        """Watch of a stage, its probe the first batch; Validation, where there are records for it."""
        raw = self.records[next(keys(self.records, stage.rows, number, stage.epochs))]
        warmup_end = stage.first + self.config.warmup * (stage.end - stage.first)
        watch = Watch(augment(raw, self.device), self.method, self.config, warmup_end)
        if self.update > stage.first:
            watch.state = self.watch_state
        if self.config.eval_every and not self.records.can_validate():
            print(f"{self.config.data}: fewer than two validation records with a report: no validation curve")
        return watch, Validation(self.records, self.device) if self.records.can_validate() else None

    def begin_update(self, stage):
        """Learning rate of the next update, and its random numbers: every process draws its own, and a
        resumed run needs the state of none."""
        rate = lr_at(self.update - stage.first, stage.end - stage.first, self.config)
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group["scale"]
        seed = np.random.SeedSequence((self.config.seed, rank(), self.update)).generate_state(1, np.uint64)
        torch.manual_seed(int(seed[0]))
        return rate

    def train_stage(self, number, stage):
        """Do what is left of a stage's updates -> False where a stop was asked for before its end."""
        self.prepare_texts()
        batches, watch, validation = iter(self.batches(number, stage)), None, None
        if rank() == 0 and self.method.needs_ecg:
            watch, validation = self.watch_over(number, stage)
        log, config = UpdateLog(self.method, self.records.store.ids, self.log_file, watch), self.config
        self.method.train()
        saved, cost_due, shown = time.monotonic(), self.update + 20, {}
        bar = tqdm(range(self.update, stage.end), stage.name, stage.end - stage.first, disable=rank() > 0,
                   initial=self.update - stage.first, unit="rec",
                   unit_scale=config.batch_size * config.accumulate)
        with Stop() as stop, bar:
            for update in bar:
                rate = self.begin_update(stage)
                found = do_update(self.method, self.optimiser, batches, config, self.device, stop)
                if found is None:
                    break
                self.update = done = update + 1
                log.waiting.append(({"update": done, "stage": stage.name, "lr": rate}, *found))
                save = bool(config.save_every) and done % config.save_every == 0
                validate = stage.validates(done, config)
                if not (save or validate) and done % LOG_EVERY[self.device.type]:
                    continue
                last = log.flush()[-1]
                if rank() > 0:
                    continue
                if validation and validate:
                    shown, lowest = self.validate(stage, validation)
                    save |= lowest
                bar.set_postfix({k: f"{x:.3f}" for k, x in (last["terms"] | shown).items()}, refresh=False)
                if cost_due <= done < stage.end:
                    bar.write(self.cost(last["seconds"], stage.end - done))
                    cost_due = math.inf
                if watch and done % 50 == 0 and (warning := watch.check()):
                    add_line(self.log_file, {"update": done, "warning": warning})
                    bar.write(f"update {done}: {warning}")
                late = not config.save_every and time.monotonic() - saved > SAVE_SECONDS
                if done < stage.end and (save or late):
                    self.save_checkpoint(watch)
                    saved = time.monotonic()
                log.since = time.perf_counter()
            if log.waiting:
                log.flush()
            if rank() == 0:
                self.save_checkpoint(watch)
                if self.update < stage.end:
                    bar.write(f"stopped and saved at update {self.update}; continue with: python train.py "
                              f"--resume {self.run}")
        return self.update == stage.end

    def validate(self, stage, validation):
        """Look at validation records -> what the bar shows of them; are these, by --keep best, the best
        weights of the stage so far? (best.safetensors. A checkpoint follows then: a resumed run must not find
        later weights there.)"""
        with self.interpolation.applied():
            found = validation.evaluate(self.method)
            lowest = self.config.keep == "best" and found["loss"] < self.lowest_loss(stage)
            if lowest:
                save_weights(self.method, self.run, "best.safetensors")
        add_line(self.log_file, {"update": self.update, "stage": stage.name, "validation": found})
        return {"val": found["loss"], "R@5": found["R@5"]}, lowest

    def lowest_loss(self, stage):
        """Of validation records, before this update."""
        log = [line for line in evaluation.read_log(self.run) if line["update"] < self.update]
        return min((line["validation"]["loss"] for line in log
                    if "validation" in line and line["stage"] == stage.name), default=math.inf)

    def cost(self, seconds, left):
        """Sentence on what the rest of a stage will take."""
        size = lambda tensors: sum(x.numel() * x.element_size() for x in tensors)
        trained = [p for p in self.method.parameters() if p.requires_grad]
        kept = [*self.method.state_dict().values(), *self.interpolation.start.values(), *trained, *trained]
        cuda = self.device.type == "cuda"  # trained, twice: AdamW's moments
        memory = f", {torch.cuda.max_memory_allocated() / 1e9:.1f} GB of GPU memory" if cuda else ""
        arrival = datetime.datetime.now() + datetime.timedelta(seconds=seconds * left)
        return (f"{seconds:.3g} s an update, {left} to go: until {arrival:%a %H:%M}; a checkpoint is "
                f"{size(kept) / 1e9:.2f} GB{memory}")

    def save_checkpoint(self, watch):
        """checkpoint.pt, with checksums of the other files that a resumed run reads."""
        files = data.checksums(self.run, ("tokenizer/*", "*.py", "recovered.jsonl", "negatives.pt"))
        state = {"model": self.method.state_dict(), "optimiser": self.optimiser.state_dict(),
                 "update": self.update, "start": self.interpolation.start, "processes": models.world(),
                 "watch": watch.state if watch else {}, "files": files}
        data.write_atomic(self.run / "checkpoint.pt", lambda path: torch.save(state, path))

    def finish(self):
        """Write weights, curves.png, training.json, and what else the method leaves."""
        run, lines, records = self.run, evaluation.read_log(self.run), self.records
        updates = [line for line in lines if "terms" in line]
        with self.interpolation.applied():
            if self.config.keep == "best":
                self.take_best(lines, updates[-1]["stage"])
            if updates and not (run / "training.json").exists():  # a finished run, resumed, keeps its own
                data.write_text(run / "training.json", json.dumps(self.facts(lines, updates), indent=1))
            save_weights(self.method, run)
            plot_log(lines, run / "curves.png")
            texts = lambda: [models.join(records.tags[row]) for row in records.store.rows("test")]
            for key, found in self.method.finish(run, texts).items():
                evaluation.remember(run, key, found)

    def take_best(self, lines, stage):
        """The weights of best.safetensors, of the last stage's lowest validation loss."""
        found = [line for line in lines if "validation" in line and line["stage"] == stage]
        best = min(found, key=lambda line: line["validation"]["loss"])
        self.method.load_state_dict(evaluation.read_tensors(self.run / "best.safetensors")[0])
        evaluation.remember(self.run, "kept", {"update": best["update"], "of": stage,
                                               "lowest validation loss": best["validation"]["loss"]})

    def facts(self, lines, updates):
        """For training.json: seconds of all sessions, records_per_second of the median update (a busy machine
        makes some slow), the rest of the session that ended the run."""
        seconds, gpu = [line["seconds"] for line in updates], self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if gpu else platform.processor() or platform.machine()
        return {
            "parameters": sum(p.numel() for p in self.method.parameters()),
            "trained_parameters": sum(p.numel() for p in self.method.parameters() if p.requires_grad),
            "records": len(self.records.rows), "records_by_set": by_set(self.records),
            "seconds": sum(seconds),
            "records_per_second": self.config.batch_size * self.config.accumulate / float(np.median(seconds)),
            "peak_memory_gb": torch.cuda.max_memory_allocated(self.device) / 1e9 if gpu else None,
            "device": name, "processes": models.world(), "threads": torch.get_num_threads(),
            "warnings": [f"update {one['update']}: {one['warning']}" for one in lines if "warning" in one]}


def by_set(records):
    """How many records of each data set are learned from: {spec: number}."""
    parts = records.store.parts
    counts = np.bincount(records.store.set_of(records.rows), minlength=len(parts)).tolist()
    return {part.spec: count for part, count in zip(parts, counts)}


def train(records, stages, run, device):
    """Train, or continue a run -> whether it came to its end, or was stopped."""
    config, checkpoint, proposals = records.config, read_checkpoint(run, records.config.save_every), None
    if config.wandb and rank() == 0:
        start_wandb(config, run)
    if config.llm and rank() == 0:  # now: mistakes show at once, and the GPU is empty
        rows = records.rows_without_truth()
        proposals = ask_llm(run, config.llm, [records.tags[row] for row in rows], device)
    trainer = Trainer(records, run, device, checkpoint)
    del checkpoint  # it is as large as the model and its optimiser
    trainer.begin(stages)
    for number, stage in enumerate(stages):
        if trainer.update < stage.end:
            if stage.name == "fine":
                trainer.recover(stage, proposals)
            if not trainer.train_stage(number, stage):
                return False
    if rank() == 0:
        trainer.finish()
    return True


# ---- command line ------------------------------------------------------------------------------------------

def absolute(spec):
    """A data spec or text file whose path does not depend on where the program is started."""
    kind, colon, path = spec.partition(":")
    if kind.partition("*")[0] == "simulated":
        return spec
    path = os.path.abspath(os.path.expanduser(path if colon else spec))
    return f"{kind}:{path}" if colon else path


def make_absolute(config, resumed):
    """All paths of a config: a run that is moved must not ask the hub for what was a folder."""
    config.data = ",".join(map(absolute, data.split_specs(config.data)))
    if config.init and (published := models.publication(config.init)):
        config.init = f"{published[0]}:{os.path.abspath(published[1])}"
    elif config.init and not resumed:
        evaluation.read_config(config.init)  # is it a run?
        config.init = os.path.abspath(config.init)
    for name in ("text_model", "llm") if not resumed else ():  # a run has what it needs of them
        setattr(config, name, getattr(config, name) and models.text_model_name(getattr(config, name)))


def closing_tasks(records):
    """A table of the data's own kind for the end: {task: sets}, none for a method without ECGs."""
    config, store = records.config, records.store
    if not models.method_class(config).needs_ecg:
        return {}
    if sets := data.sets_of(store):
        return {"zeroshot": sets}
    if tagged(records.tags, store.rows("test")).sum() > 1:
        return {"retrieve": store.sources()}
    print(f"{config.data}: its test records have neither labels nor reports: there will be no table")
    return {}


def check_resumed(run, config, before, made_by):
    """before, made_by: what made the run, and what would now. Errors: DataError where the data differ."""
    if before["store"] != made_by["store"]:
        raise data.DataError(f"{run}: its training data have changed since it began; train anew")
    changed = [f"{k} {old} -> {made_by[k]}" for k, old in before.items()
               if old != made_by[k] and k not in models.own_files(config)]
    if changed and rank() == 0:
        print(f"{run} goes on with other versions: {'; '.join(changed)}; the last digits may be others")


def main(argv=None):
    config, resumed, before = parse(argv)
    device = start_processes()
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    make_absolute(config, resumed)
    if resumed and not config.data:
        raise data.DataError(f"{resumed}: an exported run, whose data are not named: train on from it with "
                             f"--init {resumed}")
    records = open_records(config)
    stages, first = plan_stages(records), rank() == 0
    made_by = {"program": models.VERSION, "torch": torch.__version__, "store": records.store.meta["plan"],
               "csrc": csrc.build_info().get("sources", "reference"),
               **{name: os.path.abspath(path) for name, path in models.own_files(config).items()}}
    tasks = closing_tasks(records) if first else {}
    run = from_first(resumed or first and new_folder(config, made_by))
    with data.locked(run / ".lock", wait=False) if first else contextlib.nullcontext(True) as acquired:
        if not acquired:
            raise data.DataError(f"{run}: another process is training it")
        if resumed:
            check_resumed(run, config, before, made_by)
        try:
            finished = train(records, stages, run, device)
        except BaseException:
            done = resumed or first and (evaluation.read_log(run) or (run / "llm_answers.json").exists())
            if first and not done:
                shutil.rmtree(run)  # nothing is lost
            raise
    leave_processes()
    for task, sets in tasks.items() if finished else ():
        print(f"training is finished; the table: python eval.py --{task} {' '.join(sets)} --run {run}",
              file=sys.stderr)  # this is what an interrupt cuts short
        evaluation.report(run, {task: sets}, device=device)


if __name__ == "__main__":
    data.guarded(main, models.ModelError)
