"""ECG encoders, the text tower, losses, one class a method, and its settings: everything that is learned.

To add a method, write a class (see Method) in a file of your own, --method FILE.py:Class; or put it here, and
its defaults into METHODS at the end of this file.
"""
import contextlib
import dataclasses
import functools
import importlib.util
import inspect
import json
import math
import os
import re
import string
import sys
import traceback
from collections import Counter
from typing import Annotated, Literal, NamedTuple, Optional, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.nn.functional import all_gather, all_reduce
from torch.utils.checkpoint import checkpoint

from csrc import beat_of_token, segment_beats, sigmoid_loss, token_beat_rhythm

SECONDS = 10  # length of a record, as data.py stores it
VERSION = "0.7.2"


class ModelError(ValueError):
    """One sentence for the user: which setting is wrong, and what to use."""


class EcgViews(NamedTuple):
    """An ECG at three scales; a method fills in the ones it uses."""
    tokens: Optional[torch.Tensor]  # (B, T, D) in time; (B, T, dim) where the token scale compares them
    beats: Optional[torch.Tensor]   # (B, K, dim) beats, or patches in their place (FG-CLEP)
    rhythm: torch.Tensor            # (B, dim) whole record, L2-normalised
    beat_count: Optional[torch.Tensor] = None  # (B,) beats that are real; None: all


class TextViews(NamedTuple):
    """A text at three scales; a method fills in the ones it uses."""
    words: Optional[torch.Tensor]      # (B, W, dim)
    sentences: Optional[torch.Tensor]  # (B, S, dim)
    report: torch.Tensor               # (B, dim) whole text, L2-normalised
    word_count: Optional[torch.Tensor] = None      # (B,) words that are real; None: all
    sentence_count: Optional[torch.Tensor] = None  # (B,)


class Batch(NamedTuple):
    """What a method's loss sees: B records of one process."""
    ecg: torch.Tensor  # (B, L, N) float32 mV
    sampled: list      # B lists of tags: of which the record's text is made in this step (--text-unit)
    tags: list         # B lists of tags: the record's whole report
    ids: list          # B rows in the store
    peaks: torch.Tensor  # (B, K) int32 R peaks in samples of ecg, -1 behind the last
    exact: list = ()  # B bools: tags are all that is true of the record; (): of none
    captions: Optional[list] = None   # the texts to be encoded, where they are not one a record
    gathered: Optional[tuple] = None  # of all processes: see FGCLEP.plan

    @property
    def texts(self):
        return [join(tags) for tags in self.sampled] if self.captions is None else self.captions

    def parts(self, size):
        """Batches of at most `size` records; captions are shared out evenly."""
        starts = range(0, len(self.ids), size)
        share = -(-len(self.captions or ()) // len(starts))
        for n, i in enumerate(starts):
            captions = self.captions and self.captions[n * share:(n + 1) * share]
            yield Batch(*(part[i:i + size] for part in self[:6]), captions, self.gathered)


def join(tags):
    """Tags of one record -> one text."""
    return ". ".join(tags)


# ---- several processes -----------------------------------------------------------------------------------
# Every process gathers what it compares its own records with, with gradient: gather sums gradients over the
# processes, train.average_gradients averages those of parameters. So the mean of the processes' losses, and
# of their gradients, is what one process has with the whole batch.

ALONE = False  # see alone


def world():
    """Number of processes that train together."""
    together = dist.is_available() and dist.is_initialized() and not ALONE
    return dist.get_world_size() if together else 1


@contextlib.contextmanager
def alone():
    """What is computed within is of this process alone."""
    global ALONE
    ALONE = True
    try:
        yield
    finally:
        ALONE = False


def rank():
    return dist.get_rank() if world() > 1 else 0


def gather(x):
    """What this process has, (B, ...) -> what all have, in order of rank, differentiable; None stays. The N
    of (B, N, D) may differ between processes: padded with zeros to the longest."""
    if world() == 1 or x is None:
        return x
    if x.dim() == 3:
        longest = torch.tensor(x.shape[1])  # on the CPU, so that nothing waits for the GPU
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        x = lengthen(x, int(longest))
    return torch.cat(all_gather(x.contiguous()))


def lengthen(x, n):
    """(B, N, D) -> (B, n, D), zeros behind."""
    return F.pad(x, (0, 0, 0, n - x.shape[1]))


def gather_lists(rows, number):
    """B lists of tags of this process -> those of all. number: {tag: number}, the same everywhere: tags
    travel as numbers."""
    if world() == 1:
        return rows
    size = torch.tensor([len(rows), max(map(len, rows))])
    dist.all_reduce(size, dist.ReduceOp.MAX)
    numbers = torch.full((int(size[0]), int(size[1])), -1)
    for i, row in enumerate(rows):
        numbers[i, :len(row)] = torch.tensor([number[tag] for tag in row])
    parts, tags = [torch.empty_like(numbers) for _ in range(world())], list(number)
    dist.all_gather(parts, numbers)
    return [[tags[n] for n in row if n >= 0] for row in torch.cat(parts).tolist()]


def share_out(items):
    """The U different items that all processes have -> this one's share, as many in each; the last repeat the
    first. gather(...)[:U] has all again."""
    share = -(-len(items) // world())
    padded = items + items[:share * world() - len(items)]
    return padded[rank() * share:(rank() + 1) * share]


def mean_over_processes(x):
    """Mean of every process' x, without gradient."""
    if world() > 1:
        x = x.detach().clone()
        dist.all_reduce(x)
    return x / world()


def mean_over_all(total, count):
    """Sum (differentiable scalar) and number of this process' items -> its part of the mean over all items:
    the mean over the processes is that. 0 of none."""
    return total / mean_count(count).to(total.dtype)


def mean_count(count):
    """Mean number of items of a process, float64; over 0 where there is none: 0 is divided by it."""
    return mean_over_processes(count.double()).clamp(min=1 / world())


class BatchNorm(nn.SyncBatchNorm):
    """BatchNorm1d with the statistics of the batch of ALL processes in training, on CPUs as well, where
    nn.SyncBatchNorm cannot run. x: (B, C) or (B, C, T)."""

    def forward(self, x):
        if world() == 1 or not self.training or x.is_cuda:
            if x.dim() == 2:
                return super().forward(x)
            return super().forward(x.unsqueeze(2)).squeeze(2)  # (B, C, 1, T): kernels for channels last
        f, axes = wide(x), [0] if x.dim() == 2 else [0, 2]
        count = f.numel() / f.shape[1] * world()
        mean = all_reduce(f.sum(axes, keepdim=True)) / count                   # (1, C) or (1, C, 1)
        var = all_reduce((f - mean).square().sum(axes, keepdim=True)) / count  # two passes: no cancellation
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.flatten(), self.momentum)
            self.running_var.lerp_(var.flatten() * count / (count - 1), self.momentum)
        weight, bias = self.weight.view(mean.shape), self.bias.view(mean.shape)
        return ((f - mean) * torch.rsqrt(var + self.eps) * weight + bias).to(x.dtype)


@contextlib.contextmanager
def replaying(model):
    """What is computed within is computed again: BatchNorm uses the statistics of its batch, and does not
    count it a second time."""
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)


class Conv(nn.Conv1d):
    """nn.Conv1d without bias. x: (B, C, T). Computed as a 2-D one, in and out in the order (B, T, C) of
    memory (channels last), which what is elementwise keeps: a ResNet takes less than half the time on a GPU,
    and 0.7 to 0.85 of it on a CPU."""

    def forward(self, x):
        x = x.unsqueeze(2).contiguous(memory_format=torch.channels_last)
        stride, padding = (1, *self.stride), (0, *self.padding)
        return F.conv2d(x, self.weight.unsqueeze(2), None, stride, padding).squeeze(2)


# ---- ECG encoders: (B, leads, N) -> tokens (B, T, dim) ---------------------------------------------------

def normalise(ecg, how):
    """Scale ECGs for an encoder. ecg (B, L, N) mV -> (B, L, N).

    mv: clipped at 5 mV; amplitudes keep their meaning (hypertrophy, low voltage). record: min-max over all
    leads to [0, 1] (MERL, MELP). lead: min-max of each to [-1, 1], a flat lead becomes 0 (FG-CLEP)."""
    if how == "mv":
        return ecg.clamp(-5, 5)
    axes = (1, 2) if how == "record" else (2,)
    low, high = ecg.amin(axes, keepdim=True), ecg.amax(axes, keepdim=True)
    scaled = (ecg - low) / (high - low).clamp_min(1e-6)
    return scaled if how == "record" else torch.where(high > low, 2 * scaled - 1, 0.0)


class ResNet1d(nn.Module):
    """1-D ResNet of MERL: stem WITHOUT max-pooling, 16 samples a token. depth 18/34 (basic blocks) or 50/101
    (bottlenecks); width scales every channel count."""
    BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}

    def __init__(self, depth=18, leads=12, samples=None, width=1.0):
        super().__init__()
        widths = [max(8, int(c * width)) for c in (64, 128, 256, 512)]
        self.dim = widths[0]
        self.conv1 = Conv(leads, self.dim, 7, stride=2, padding=3, bias=False)
        self.bn1 = BatchNorm(self.dim)
        for i, (c, blocks) in enumerate(zip(widths, self.BLOCKS[depth]), 1):
            stage = nn.Sequential()
            for j in range(blocks):
                stage.append(ResBlock(self.dim, c, 2 if i > 1 and j == 0 else 1, bottleneck=depth >= 50))
                self.dim = stage[-1].out
            self.add_module(f"layer{i}", stage)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))  # (B, C, N/2)
        return self.layer4(self.layer3(self.layer2(self.layer1(x)))).transpose(1, 2)  # (B, N/16, dim)


class ResBlock(nn.Module):
    """Residual block: two 3-convolutions, or 1-3-1 with four times the channels (bottleneck)."""

    def __init__(self, cin, c, stride, bottleneck):
        super().__init__()
        self.out = 4 * c if bottleneck else c
        plan = [(cin, c, 1, 1), (c, c, 3, stride), (c, self.out, 1, 1)] if bottleneck else \
               [(cin, c, 3, stride), (c, c, 3, 1)]
        self.convs = nn.ModuleList(Conv(a, b, k, s, k // 2, bias=False) for a, b, k, s in plan)
        self.norms = nn.ModuleList(BatchNorm(b) for _, b, _, _ in plan)
        self.shortcut = nn.Sequential()
        if stride != 1 or cin != self.out:
            self.shortcut.extend([Conv(cin, self.out, 1, stride, bias=False), BatchNorm(self.out)])

    def forward(self, x):
        h = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            h = norm(conv(F.relu(h) if i else h))
        return F.relu(h + self.shortcut(x))


class Block(nn.Module):
    """Pre-norm transformer block: x (B, T, D) attends to itself or to a context (B, N, D), then an MLP."""

    def __init__(self, dim, heads, hidden, cross=False, activation=nn.GELU):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.norm_context = nn.LayerNorm(dim) if cross else None
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), activation(), nn.Linear(hidden, dim))

    def forward(self, x, context=None, mask=None):
        q = self.norm1(x)
        kv = q if context is None else self.norm_context(context)
        x = x + self.attention(q, kv, kv, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


def heads_for(dim, most):
    """Attention heads: as many as divide dim, at most `most`."""
    return next(heads for heads in range(max(1, most), 0, -1) if dim % heads == 0)


def at_length(positions, n):
    """Learned positions (1, P, D) for n tokens: linearly interpolated where a record is longer or shorter."""
    if positions.shape[1] == n:
        return positions
    return F.interpolate(positions.transpose(1, 2), n, mode="linear", align_corners=False).transpose(1, 2)


class ViT1d(nn.Module):
    """1-D vision transformer of MERL: patches over all leads; a last incomplete patch is dropped."""
    SIZES = {"tiny": (192, 3, 768), "small": (384, 6, 1536), "middle": (512, 8, 2048),
             "base": (768, 12, 3072)}  # width, heads, hidden

    def __init__(self, size="tiny", leads=12, samples=5000, patch=50, depth=12):
        super().__init__()
        self.dim, heads, hidden = self.SIZES[size]
        self.patch = nn.Conv1d(leads, self.dim, patch, stride=patch, bias=False)
        self.positions = nn.Parameter(torch.randn(1, samples // patch, self.dim))
        self.blocks = nn.Sequential(*(Block(self.dim, heads, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(self.dim)

    def states(self, x):
        """Tokens (B, T, dim) before the last LayerNorm, where MERL pools them."""
        x = self.patch(x).transpose(1, 2)  # (B, T, dim)
        return self.blocks(x + at_length(self.positions, x.shape[1]))

    def forward(self, x):
        return self.norm(self.states(x))


class LeadViT(nn.Module):
    """Vision transformer over lead-time patches (FG-CLEP v2): a patch is a window of one lead, with learned
    embeddings of lead and time. Tokens (B, leads * windows, dim), lead by lead."""

    def __init__(self, size="tiny", leads=12, samples=1000, patch=100, depth=12):
        super().__init__()
        self.dim, heads, hidden = ViT1d.SIZES[size]
        self.patch = patch
        self.embed = nn.Sequential(nn.LayerNorm(patch), nn.Linear(patch, self.dim), nn.LayerNorm(self.dim))
        self.lead = nn.Parameter(0.02 * torch.randn(leads, 1, self.dim))
        self.positions = nn.Parameter(0.02 * torch.randn(1, samples // patch, self.dim))
        self.blocks = nn.Sequential(*(Block(self.dim, heads, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(self.dim)

    def forward(self, x):
        x = self.embed(x.unfold(2, self.patch, self.patch))                        # (B, L, windows, dim)
        x = (x + self.lead + at_length(self.positions, x.shape[2])).flatten(1, 2)  # (B, L * windows, dim)
        return self.norm(self.blocks(x))


class ConvTransformer(nn.Module):
    """wav2vec 2.0 tower of MELP and D-BETA: convolutions (16 samples a frame), one more that gives positions,
    post-norm transformer layers. embed and encode are apart, so that frames can be dropped in between."""
    SIZES = {"tiny": (64, 128, 4, 4, 31), "small": (128, 256, 6, 8, 63), "base": (256, 768, 8, 12, 128)}

    def __init__(self, size="base", leads=12, samples=None, dropout=0.1):
        super().__init__()
        channels, self.dim, depth, heads, reach = self.SIZES[size]
        self.stem = nn.Sequential(Conv(leads, channels, 2, stride=2, bias=False),
                                  nn.GroupNorm(channels, channels), nn.GELU())
        for _ in range(3):
            self.stem.append(Conv(channels, channels, 2, stride=2, bias=False)).append(nn.GELU())
        self.norm_stem, self.project = nn.LayerNorm(channels), nn.Linear(channels, self.dim)
        place = nn.Conv1d(self.dim, self.dim, reach, padding=reach // 2, groups=16)
        nn.init.normal_(place.weight, std=2 / math.sqrt(reach * self.dim))
        self.place = nn.utils.parametrizations.weight_norm(place, dim=2)
        self.norm, self.dropout = nn.LayerNorm(self.dim), nn.Dropout(dropout)
        self.layers = nn.Sequential(*(nn.TransformerEncoderLayer(
            self.dim, heads, 4 * self.dim, dropout, "gelu", batch_first=True) for _ in range(depth)))

    def embed(self, x):
        """(B, leads, N) -> frames (B, N // 16, dim) with their positions."""
        x = self.dropout(self.project(self.norm_stem(self.stem(x).transpose(1, 2))))
        place = self.place(x.transpose(1, 2))[:, :, :x.shape[1]]  # an even width gives one too many
        return x + F.gelu(place).transpose(1, 2)

    def encode(self, frames):
        return self.layers(self.dropout(self.norm(frames)))

    def forward(self, x):
        return self.encode(self.embed(x))


ENCODERS = {f"{prefix}{size}": (cls, size) for prefix, cls, sizes in (
    ("resnet", ResNet1d, ResNet1d.BLOCKS), ("vit_", ViT1d, ViT1d.SIZES), ("leadvit_", LeadViT, ViT1d.SIZES),
    ("w2v_", ConvTransformer, ConvTransformer.SIZES)) for size in sizes}


def encoder_class(name):
    """Errors: ModelError."""
    if not is_file(name) and name not in ENCODERS:
        raise ModelError(f"unknown --encoder {name!r}: use {', '.join(ENCODERS)}, or FILE.py:Class")
    return load_own(name, nn.Module) if is_file(name) else ENCODERS[name][0]


OF_ENCODERS = "width", "patch"  # settings that an encoder has if its class takes arguments of these names


def encoder_settings(name):
    """Those of OF_ENCODERS that an encoder has. Errors: ModelError."""
    arguments = inspect.signature(encoder_class(name)).parameters
    return [setting for setting in OF_ENCODERS if setting in arguments]


def build_encoder(name, leads, samples, **settings):
    """ECG encoder by name: one of ENCODERS, or FILE.py:Class, an nn.Module that Class(leads, samples) makes:
    normalised ECGs (B, leads, samples) -> (B, T, dim), of any T; dim is its attribute. settings: width, patch
    (others than the encoder's are not looked at: configure refuses them). Errors: ModelError."""
    cls = encoder_class(name)
    settings = {setting: settings[setting] for setting in encoder_settings(name) if setting in settings}
    if is_file(name):
        return build_own(cls, leads, samples, settings)
    return cls(ENCODERS[name][1], leads, samples, **settings)


def build_own(cls, leads, samples, settings):
    """An encoder of one's own, tried on two ECGs. Errors: ModelError."""
    try:
        encoder = cls(leads, samples, **settings)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            shape = tuple(encoder.eval()(torch.randn(2, leads, samples)).shape)
        wanted = (2, max(1, *shape[1:2]), encoder.dim)  # of however many tokens
    except Exception as error:  # whatever somebody's code does
        raise ModelError(f"--encoder {cls.__name__}({leads}, {samples}): {fault_in(error)}") from error
    if shape != wanted:
        raise ModelError(f"--encoder {cls.__name__} makes {shape} of ECGs (2, {leads}, {samples}); it must "
                         f"be (2, tokens, {encoder.dim}): (B, T, its attribute dim)")
    return encoder.train()


# ---- FILE.py:NAME, a method, an encoder or a task of one's own ---------------------------------------------

def is_file(name):
    return ".py:" in name


def own_files(config):
    """{setting: FILE} of what comes from a file."""
    return {name: spec.rpartition(":")[0] for name in ("method", "encoder")
            if is_file(spec := getattr(config, name))}


def load_own(spec, kind=None):
    """The subclass of kind, or the function, that "FILE.py:NAME" names; the file is run, again only if it has
    changed, and may import model, and eval. Errors: ModelError."""
    path, _, name = spec.rpartition(":")
    if not os.path.isfile(path):
        raise ModelError(f"{spec}: there is no file {path}")
    found = getattr(load_file(os.path.abspath(path), os.stat(path).st_mtime_ns), name, None)
    if kind is None and not callable(found):
        raise ModelError(f"{path} has no function {name}")
    if kind and not (isinstance(found, type) and issubclass(found, kind)):
        raise ModelError(f"{path} has no class {name} made from {kind.__module__}.{kind.__name__}")
    return found


@functools.lru_cache
def load_file(path, changed):
    """The module in a Python file. Errors: ModelError."""
    spec = importlib.util.spec_from_file_location(f"own {path} {changed}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever somebody's code does
        raise ModelError(f"{path}: {fault_in(error)}") from error
    return module


def fault_in(error):
    """Where and what, as one sentence."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = f" ({os.path.basename(last.filename)}, line {last.lineno})"
    return f"{type(error).__name__}: {first_line(error)}{where * (not isinstance(error, SyntaxError))}"


# ---- text tower ------------------------------------------------------------------------------------------

class TextTower(nn.Module):
    """Any Hugging Face encoder as a text tower: list of B strings -> (B, dim). Equal texts are encoded once.

    trainable_layers: -1 all, 0 frozen (no gradient, no dropout), n the last n (embeddings stay frozen).
    pooling: mean (over words, without [CLS] and [SEP]), cls (the first piece), or pooler (the model's own).
    mask=False lets the padding be attended to, as D-BETA does."""

    def __init__(self, lm, tokenizer, trainable_layers=-1, pooling="mean", max_length=256, mask=True):
        super().__init__()
        self.lm, self.tokenizer, self.pooling, self.mask = lm, tokenizer, pooling, mask
        self.max_length = min(max_length, positions_of(lm, max_length))
        self.dim, self.frozen = lm.config.hidden_size, trainable_layers == 0
        if trainable_layers >= 0:
            lm.requires_grad_(False)
            layers = next(m for m in lm.modules() if isinstance(m, nn.ModuleList))
            for layer in list(layers)[max(0, len(layers) - trainable_layers):]:
                layer.requires_grad_(True)
        self.cached, self.row = None, {}  # pooled vectors of texts: see cache
        if pooling == "pooler" and (getattr(lm, "pooler", None) is None or getattr(lm, "new_pooler", False)):
            raise ModelError("this text model has no pooler of its own: use --text-pooling mean or cls")
        if pooling != "pooler" and hasattr(lm, "pooler"):
            lm.pooler = None  # unused weights would be saved for nothing

    def train(self, mode=True):
        return super().train(mode and not self.frozen)

    def run(self, tokens, **inputs):
        """The language model's output for tokenise's tensors; inputs: others that it takes."""
        if self.mask:
            inputs["attention_mask"] = tokens["attention_mask"]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.lm(input_ids=tokens["input_ids"], **inputs)

    def encode(self, texts):
        """B strings -> (states (B, W, D), which are words (B, W) bool, pooled (B, D))."""
        unique, rows = distinct(texts)
        tokens = tokenise(self, unique)
        out, words = self.run(tokens), tokens["words"]
        states = out.last_hidden_state
        if self.pooling == "mean":  # of a two-word statement, half would be special tokens, the same in all
            pooled = masked_mean(states, words)
        else:
            pooled = out.pooler_output if self.pooling == "pooler" else states[:, 0]
        return states[rows], words[rows], pooled[rows]

    @torch.no_grad()
    def cache(self, texts, bar=iter, size=256):
        """Of a frozen tower: encode texts now, each different one once, the longest first; forward looks them
        up from then on. On a GPU in half precision: bf16 has made them."""
        self.eval()
        texts = sorted(set(texts), key=lambda text: (-len(text), text))
        if not texts:
            return
        parts = [self.encode(texts[i:i + size])[2] for i in bar(range(0, len(texts), size))]
        self.cached = torch.cat([part.half() if part.is_cuda else part for part in parts])
        self.row = {text: i for i, text in enumerate(texts)}

    def forward(self, texts):
        rows = [self.row.get(text) for text in texts]
        return self.encode(texts)[2] if None in rows else self.cached[rows].float()


def positions_of(lm, default):
    """The longest text in pieces that a language model has positions for; a RoBERTa's begin behind its
    padding's. default: where any length will do."""
    table = getattr(getattr(lm.base_model, "embeddings", None), "position_embeddings", None)
    before = getattr(table, "padding_idx", None)
    return getattr(lm.config, "max_position_embeddings", default) - (0 if before is None else before + 1)


def tokenise(tower, texts, **options):
    """B strings -> the tensors (B, W) of a tower's tokenizer, with "words": not [CLS], [SEP] or padding."""
    tokens = tower.tokenizer(texts, padding=True, truncation=True, max_length=tower.max_length, **options,
                             return_special_tokens_mask=True, return_tensors="pt").to(tower.lm.device)
    tokens["words"] = tokens.pop("special_tokens_mask") == 0
    return tokens


def distinct(texts):
    """B strings -> (the U different ones, list of B rows in them)."""
    row = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    return list(row), [row[text] for text in texts]


def masked_mean(x, real):
    """x (B, N, D), real (B, N) bool -> mean over the real ones (B, D), 0 where there is none."""
    return (x * real[:, :, None]).sum(1) / real.sum(1, keepdim=True).clamp(min=1)


class CausalText(NamedTuple):
    """What CausalTower.encode gives: B texts of up to W pieces."""
    ids: torch.Tensor        # (B, W)
    mask: torch.Tensor       # (B, W) 1 where not padding
    report: torch.Tensor     # (B, D) the whole text, what forward gives
    states: torch.Tensor     # (B, W, D), each of the text up to its piece
    sentences: torch.Tensor  # (B, S, D) mean over the pieces of a sentence
    sentence_count: torch.Tensor  # (B,)

    def at(self, rows):
        return CausalText(*(part[rows] for part in self))


class CausalTower(TextTower):
    """MELP's text tower: a BERT with causal attention, as its caption decoder needs; a [CLS] at the very end
    (position max_length) sees the whole text. Errors: ModelError where the model cannot be made causal."""

    def __init__(self, lm, tokenizer, trainable_layers=-1, pooling="cls", max_length=128, mask=True):
        super().__init__(lm, tokenizer, trainable_layers, "cls", max_length, mask)
        self.max_length = min(max_length, positions_of(lm, max_length + 1) - 1)
        lm.config.is_decoder, lm.config.use_cache = True, False
        for module in lm.modules():
            if hasattr(module, "is_causal"):
                module.is_causal = True
        probe = torch.tensor([[0, 1, 2, 0], [0, 1, 3, 0]], device=next(lm.parameters()).device)
        mask = torch.tensor([[1, 1, 1, 0]] * 2, device=probe.device)  # some are causal only without padding
        training = lm.training
        with torch.no_grad():
            a, b = lm.eval()(input_ids=probe, attention_mask=mask).last_hidden_state
        lm.train(training)
        change = (b - a).norm(dim=1)  # of each state, by the third piece
        if change[:2].max() > 1e-5 * change[2]:
            raise ModelError(f"this text model ({lm.config.model_type}) cannot be run as a causal one, as "
                             "MELP needs: use a BERT")
        # the piece that a text begins with: [CLS], or the [BOS] that the authors' tokenizer has besides
        self.first = tokenizer.cls_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id

    def run(self, tokens):
        """ids, mask (B, W) -> (states (B, W, D), report (B, D))."""
        ids = F.pad(tokens["input_ids"], (0, 1), value=self.tokenizer.cls_token_id)
        mask = F.pad(tokens["attention_mask"], (0, 1), value=1)
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids).clone()
        positions[:, -1] = self.max_length  # wherever the padding of this batch ends
        out = super().run({"input_ids": ids, "attention_mask": mask}, position_ids=positions)
        return out.last_hidden_state[:, :-1], out.last_hidden_state[:, -1]

    def encode(self, texts):
        """B strings -> CausalText."""
        unique, rows = distinct(texts)
        tokens = tokenise(self, unique, return_offsets_mapping=True)
        tokens["input_ids"][:, 0] = self.first
        states, report = self.run(tokens)
        sentence = sentence_of_piece(unique, tokens["offset_mapping"], tokens["words"])
        return CausalText(tokens["input_ids"], tokens["attention_mask"], report, states,
                          *sentence_means(states, sentence)).at(rows)


def sentence_of_piece(texts, offsets, words):
    """Number of each piece's sentence (B, W), -1 for special ones. ". " ends one, as join puts it; "0.5" does
    not. offsets (B, W, 2): a piece's first and last character."""
    starts = offsets[:, :, 0].tolist()
    number = [[text.count(". ", 0, start) for start in row] for text, row in zip(texts, starts)]
    return torch.where(words, torch.tensor(number, device=words.device), -1)


def sentence_means(states, sentence):
    """states (B, W, D), sentence (B, W), -1 for none -> mean state of each (B, S, D), their number (B,)."""
    count = sentence.amax(1) + 1
    index = torch.arange(max(1, int(count.max())), device=sentence.device)[:, None]
    member = sentence[:, None] == index  # (B, S, W)
    return (member / member.sum(2, keepdim=True).clamp(min=1)).to(states.dtype) @ states, count


def first_rows(x, real):
    """x (B, N, D), real (B, N) -> its real rows in front (B, longest, D), zeros behind, their number (B,)."""
    count = real.sum(1)
    return nn.utils.rnn.pad_sequence(x[real].split(count.tolist()), batch_first=True), count


def mask_words(ids, words, tokenizer, share):
    """Hide a share of the words as BERT does: 80 % behind the mask (T5: first sentinel), 10 % behind another
    piece, 10 % left. ids, words (B, W) -> (masked ids, labels: -100 where nothing is hidden)."""
    mask = tokenizer.mask_token_id
    if mask is None:
        mask = tokenizer.convert_tokens_to_ids("<extra_id_0>")
    hidden = (torch.rand(ids.shape, device=ids.device) < share) & words
    kind = torch.rand(ids.shape, device=ids.device)
    other = torch.randint(len(tokenizer), ids.shape, device=ids.device)
    masked = torch.where(hidden & (kind < 0.8), mask, torch.where(hidden & (kind >= 0.9), other, ids))
    return masked, ids.masked_fill(~hidden, -100)


# ---- text models -----------------------------------------------------------------------------------------

def load_text_model(name, head="AutoModel"):
    """(encoder, tokenizer) of a Hugging Face name or folder, or a cardiolm run. head: class of transformers.
    Errors: ModelError where there is none, or it lacks words or layers."""
    name = text_model_name(name)
    try:
        if os.path.isdir(name) and not all(os.path.isfile(x) or os.path.isdir(x) for x in os.scandir(name)):
            raise OSError("it holds a pipe, a device or a dead link")
        auto, _, tokenizer = architecture(name, head)
        lm, info = auto.from_pretrained(name, trust_remote_code=False, output_loading_info=True)
    except Exception as error:  # transformers, safetensors and the hub fail in many ways on what is wrong
        raise ModelError(f"text model {name!r} is neither a folder with a whole model nor to be had from the "
                         f"Hugging Face hub: {first_line(error)}") from error
    missing = sorted(info["missing_keys"])
    needed = [key for key in missing if (head == "AutoModel" or key.startswith(lm.base_model_prefix + "."))
              and "pooler." not in key and not key.endswith("position_ids")]
    if needed:
        raise ModelError(f"text model {name!r}: its file lacks {len(needed)} weights, such as "
                         f"{', '.join(needed[:3])}: it is of another model or cut off")
    if missing:
        print(f"text model {name}: new, since not in its file: {len(missing)} weights, such as {missing[0]}")
    lm.new_pooler = any("pooler." in key for key in missing)
    return lm, check_tokenizer(tokenizer, lm.config, name)


def rebuild_text_model(folder, head="AutoModel"):
    """(encoder with random weights, tokenizer) that save_text_model wrote. Errors: ModelError."""
    try:
        auto, config, tokenizer = architecture(folder, head)
        lm = auto.from_config(config, trust_remote_code=False)
    except Exception as error:  # as above
        raise ModelError(f"{folder}: damaged or missing ({first_line(error)}); copy it again") from error
    return lm, check_tokenizer(tokenizer, config, str(folder))


def save_text_model(lm, tokenizer, folder):
    """Write the tokenizer and the architecture of a text model; its weights are in the run's own."""
    tokenizer.save_pretrained(folder)
    lm.config.save_pretrained(folder)


def architecture(name, head):
    """(transformers class, its config, tokenizer) of a text model; of a T5, the encoder half."""
    import transformers
    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    if config.is_encoder_decoder or config.model_type in ("t5", "mt5", "umt5"):  # a half says False
        head = "AutoModelForTextEncoding"
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    return getattr(transformers, head), config, tokenizer


def text_model_name(name):
    """The folder, absolute, or the hub's name. Errors: ModelError where what is plainly meant as a folder is
    not there: the hub would be asked for a name that anybody may have registered."""
    folder = os.path.abspath(os.path.expanduser(name))
    inner = os.path.join(folder, "language_model")  # of a cardiolm run
    if os.path.isdir(folder):
        return inner if os.path.isdir(inner) else folder
    parts = name.split("/")
    if len(parts) > 2 or name.startswith((".", "~", "/")) or len(parts) == 2 and os.path.isdir(parts[0]):
        raise ModelError(f"text model {name!r} is neither a folder nor a name of the Hugging Face hub: there "
                         f"is no {folder}")
    return name


def first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def check_tokenizer(tokenizer, config, name):
    """tokenizer. Errors: ModelError where it is not the model's: too many pieces, or every word unknown."""
    pieces, probe = len(tokenizer), tokenizer.tokenize("sinus rhythm with atrial fibrillation")
    if pieces > config.vocab_size or all(piece == tokenizer.unk_token for piece in probe):
        raise ModelError(f"text model {name!r} has no tokenizer of its own: the one found knows {pieces} "
                         f"pieces, the model {config.vocab_size}; put its tokenizer.json or vocab.txt there")
    if 2 * pieces < config.vocab_size:
        print(f"text model {name}: the tokenizer knows {pieces} pieces, the model {config.vocab_size}")
    return tokenizer


def word_tokenizer(texts, size=3000):
    """WordPiece tokenizer of the words of `texts`, most frequent first (twice at least), and of characters.
    (The trainers of the tokenizers library give another vocabulary on every call.)"""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizerFast
    split = BertWordPieceTokenizer(lowercase=True)
    words = Counter(word for text in texts for word, _ in
                    split.pre_tokenizer.pre_tokenize_str(split.normalizer.normalize_str(text)))
    letters = sorted({c for word in words for c in word} | set(string.ascii_lowercase + string.digits))
    common = sorted((w for w, n in words.items() if n > 1 and len(w) > 1), key=lambda w: (-words[w], w))
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + c for c in letters), *common]
    made = BertWordPieceTokenizer({piece: i for i, piece in enumerate(pieces[:size])}, lowercase=True)
    return BertTokenizerFast(tokenizer_object=made._tokenizer, model_max_length=256)


def new_bert(texts, seed=0, dim=128, layers=2):
    """A small BERT with a masked-language head, weights by seed, and a tokenizer made from `texts`."""
    from transformers import BertConfig, BertForMaskedLM
    tokenizer = word_tokenizer(texts)
    torch.manual_seed(seed)
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=dim, num_hidden_layers=layers,
                        num_attention_heads=4, intermediate_size=4 * dim, max_position_embeddings=256,
                        pad_token_id=tokenizer.pad_token_id)
    return BertForMaskedLM(config), tokenizer


def small_text_model(texts, seed=0, steps=150, dim=128, layers=2, device="cpu", bar=iter):
    """(encoder, tokenizer) of new_bert after some masked-language updates: a small cardiology language model.
    texts: strings, equal ones count; bar shows the progress of an iterable."""
    lm, tokenizer = new_bert(texts, seed, dim, layers)
    method = CardioLM(configure("cardiolm", text_max_length=64), (lm.to(device), tokenizer)).train()
    optimiser = torch.optim.AdamW(lm.parameters(), lr=1e-3, weight_decay=0.01)
    rising = 0.2 if steps == 10 else 0.1  # torch divides by 0.1 * 10 - 1
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, total_steps=max(2, steps),
                                                   pct_start=rising)
    rng = np.random.default_rng(seed)
    for _ in bar(range(steps)):
        total, count, _ = method.guess([texts[i] for i in rng.integers(0, len(texts), 32)])
        loss = total / count.clamp(min=1)  # of this process: only one makes the model
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    lm.zero_grad(set_to_none=True)  # what stays in a frozen tower would count in every later gradient norm
    return lm.bert, tokenizer


# ---- losses: x (B, D) ECG vectors, y (C, D) text vectors ---------------------------------------------------

def cosine(x, y):
    """x @ y.T in float32, also under autocast: at scale 100 the three digits of bf16 are not enough."""
    with torch.autocast(x.device.type, enabled=False):
        return wide(x) @ wide(y).T


def wide(x):
    """x in float32, or float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def as_autocast(x):
    """x in the precision of autocast, where that is on. (What is normalised under it comes in float32.)"""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def info_nce(x, y, scale):
    """Contrastive loss of L2-normalised pairs, x and y (b, D) of this process, as in CLIP: mean over both
    directions of -1/b sum_i log( exp(s x_i.y_i) / sum_j exp(s x_i.y_j) ), j over the pairs of all processes.
    s: 1 / temperature, fixed or learned."""
    rows = scale * cosine(x, gather(y))
    return paired_cross_entropy(rows, rows.T if world() == 1 else scale * cosine(y, gather(x)))


def paired_cross_entropy(rows, columns):
    """Cross entropy of logits of this process' ECGs with all texts, and of its texts with all ECGs, each
    (b, B); mean of the two."""
    target = rank() * len(rows) + torch.arange(len(rows), device=rows.device)
    return (F.cross_entropy(rows, target) + F.cross_entropy(columns, target)) / 2


def masked_cross_entropy(logits, labels):
    """Cross entropy of logits (..., V) with labels (...), -100 where there is none -> sum and number."""
    total = F.cross_entropy(wide(logits).flatten(0, -2), labels.flatten(), reduction="sum")
    return total, (labels >= 0).sum()


def soft_sigmoid(logits, target, weight):
    """FG-CLEP: mean_kl [ S_kl softplus(-x_kl) + (1 - S_kl) softplus(x_kl) ]; logits x, target S, weight of
    each in the mean: (B, C)."""
    total = F.binary_cross_entropy_with_logits(logits, target, weight, reduction="sum")
    return mean_over_all(total, weight.sum())


def l1_similarity(cosines, target):
    """FG-CLEP's other published form: 1/B sum_kl | cos(x_k, y_l) - S_kl |. Both (B, C)."""
    return (cosines - target).abs().sum() / len(cosines)


def frames_of(ecg, size=16):
    """What a masked ECG is rebuilt as: leads with mean 0 and variance 1 over the record, cut into frames.
    (B, L, N) -> (B, N // size, L * size), lead by lead."""
    ecg = ecg[:, :, :ecg.shape[2] // size * size]
    ecg = (ecg - ecg.mean(2, keepdim=True)) / torch.sqrt(ecg.var(2, keepdim=True) + 1e-6)
    return ecg.unflatten(2, (-1, size)).transpose(1, 2).flatten(2)


def reconstruction_loss(rebuilt, target, hidden):
    """Mean squared errors of hidden frames -> sum and number. Both (B, T, D), hidden (B, T) 0 or 1."""
    return ((rebuilt - target).square().mean(2) * hidden).sum(), hidden.sum()


# ---- methods ---------------------------------------------------------------------------------------------

class Objective(nn.Module):
    """What train.py trains: Batch -> {term: scalar}, in three steps, so that a batch can be encoded in parts
    (train.chunked): plan looks at the whole batch, represent at a part, compare at what all parts gave."""
    settings = ()        # of Config, that belong to it and maybe to some others: the rest refuse them
    small, paper = {}, {}  # defaults, and --preset paper, of a class in a file; else see METHODS
    stages = ("train",)  # "fine", if there is one, has config.fine_epochs
    weights = {}         # of the loss terms, where not 1
    needs_ecg = True     # False: texts are enough
    needs_far_texts = False  # attribute far: a FarTexts of all training reports
    head = "AutoModel"   # class of transformers that its text model is of

    def __init__(self, config):
        super().__init__()
        self.config = config

    @staticmethod
    def default_text_model(texts, config, device, bar):
        """(language model, tokenizer) where --text-model names none, made of the training reports."""
        return small_text_model(texts, config.seed, config.mlm_steps, device=device, bar=bar)

    def set_vocabulary(self, tags, meaning):
        """tags: all that batches can have, in the same order in every process. meaning: {tag: what it
        says, in other words}, of those that are known to be true or not where all truth is."""

    def cache_texts(self, texts, bar):
        """Before a stage: texts() are those that its steps can be made of, if they can be listed."""

    def finish(self, run, texts):
        """What it leaves in a run besides weights -> {key: facts} of results.json. texts(): of test rows."""
        return {}

    def plan(self, batch):
        return batch

    def represent(self, batch):
        """-> {name: vectors (n, ...)} that compare asks for, {term: (sum, number)} of single records."""
        raise NotImplementedError

    def compare(self, vectors, batch):
        """-> {term: scalar} of vectors of the whole batch."""
        return {}

    @classmethod
    def check(cls, config):
        """Errors: ModelError where settings do not go together."""

    def forward(self, batch):
        batch = self.plan(batch)
        vectors, sums = self.represent(batch)
        return self.compare(vectors, batch) | {name: mean_over_all(*pair) for name, pair in sums.items()}

    def weighted(self, terms):
        """Sum of loss terms {name: value}. Errors: ModelError where there is none."""
        if not terms:
            raise ModelError(f"{type(self).__name__} has no loss: neither represent nor compare gives a term")
        return sum(self.weights.get(name, 1.0) * value for name, value in terms.items())

    @torch.no_grad()
    def limit_scales(self):
        """Learned scales stay at 100 or below, as in CLIP: after a step, since a clamp in the forward pass
        would leave a scale that is once beyond without gradient for ever."""
        for name, p in self.named_parameters():
            if name in ("log_scale", "log_attention"):
                p.clamp_(max=math.log(100))


class CardioLM(Objective):
    """MELP's first stage: a language model of texts alone. text: (masked-language model, tokenizer)."""
    settings, needs_ecg, head = ("word_mask",), False, "AutoModelForMaskedLM"

    def __init__(self, config, text):
        super().__init__(config)
        self.lm, self.tokenizer = text
        self.max_length = min(config.text_max_length, positions_of(self.lm, config.text_max_length))

    @classmethod
    def check(cls, config):
        if config.compile or config.recompute or config.chunk or config.init or config.keep == "best":
            raise ModelError("--compile, --recompute, --chunk, --init, --keep best are for an ECG encoder, "
                             "and cardiolm has none")

    def guess(self, texts):
        """Hide words of B strings -> (sum of their cross entropies, their number, how many are right)."""
        tokens = tokenise(self, texts)
        ids, labels = mask_words(tokens["input_ids"], tokens["words"], self.tokenizer, self.config.word_mask)
        logits = self.lm(input_ids=ids, attention_mask=tokens["attention_mask"]).logits.float()
        hidden = labels >= 0
        loss = F.cross_entropy(logits[hidden], labels[hidden], reduction="sum")
        return loss, hidden.sum(), (logits.argmax(2) == labels)[hidden].sum()

    def represent(self, batch):
        total, count, _ = self.guess(batch.texts)
        return {}, {"mlm": (total, count)}

    @staticmethod
    def default_text_model(texts, config, device, bar):
        return new_bert(texts, config.seed)

    @torch.no_grad()
    def finish(self, run, texts, batch=64):
        """A Hugging Face folder, which any --text-model takes; how many hidden words of the texts it guesses,
        and as a yardstick, how often the commonest would be right."""
        self.lm.save_pretrained(run / "language_model")
        self.tokenizer.save_pretrained(run / "language_model")
        texts = texts()
        if not texts:
            print("masked words: no figure, since no text (one in twenty is, by its hash) was kept from "
                  "training")
            return {}
        self.eval()
        torch.manual_seed(0)  # training is over
        parts = [self.guess(texts[i:i + batch]) for i in range(0, len(texts), batch)]
        loss, count, right = (sum(float(part[i]) for part in parts) for i in range(3))
        pieces = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        counts = np.unique(np.concatenate(pieces), return_counts=True)[1]
        facts = {"texts": len(texts), "loss": loss / count, "accuracy": right / count,
                 "commonest": float(counts.max() / counts.sum())}
        print(f"masked words of {len(texts)} texts not trained on: {100 * facts['accuracy']:.1f} % right "
              f"(always the commonest word: {100 * facts['commonest']:.1f} %), loss {facts['loss']:.3f}")
        return {"language": facts}


class Method(Objective):
    """Two towers, as config (a Config) says; text: (language model, tokenizer). A method gives views,
    represent and compare, project_text or another encode_text, and for a beat scale beat_options (of
    token_beat_rhythm)."""
    tower = TextTower
    contrast_sides = 1    # loss term "contrast" is this many times ln(batch size) when nothing is learned
    scales = ("rhythm",)  # at which its views can be compared: rhythm, beat, token

    def __init__(self, config, text):
        super().__init__(config)
        self.samples = SECONDS * config.rate
        self.new_encoder()
        self.text = self.tower(*text, config.text_trainable_layers, config.text_pooling,
                               config.text_max_length)

    @classmethod
    def check(cls, config):
        if config.compile and config.recompute:
            raise ModelError("--compile decides itself what to compute again: leave out --recompute")
        if config.text_unit == "tags" and "fine" not in cls.stages:
            raise ModelError("--text-unit tags is fgclep's: the other methods pair each record with one text")

    def new_encoder(self):
        """Random weights for what encode_tokens uses."""
        config = self.config
        self.ecg = build_encoder(config.encoder, 12, self.samples, width=config.width, patch=config.patch)

    def represent(self, batch):
        return {"ecg": self.encode_ecg(batch.ecg).rhythm, "text": self.encode_text(batch.texts).report}, {}

    def encode_ecg(self, ecg):
        """(B, 12, N) mV -> EcgViews."""
        return self.views(self.encode_tokens(ecg), ecg)

    def encode_tokens(self, ecg):
        """(B, 12, N) mV -> (B, T, D) of the encoder, before any projection: views makes EcgViews of them."""
        return self.ecg(normalise(ecg, self.config.normalise))

    def encode_text(self, texts):
        """B strings -> TextViews."""
        return TextViews(None, None, F.normalize(self.project_text(self.text(texts)), dim=1))

    def compile_encoder(self):
        """torch.compile what of the ECG encoder is called, on first use."""
        for name in {"forward", "states", "embed", "encode"} & set(dir(self.ecg)):
            setattr(self.ecg, name, torch.compile(getattr(self.ecg, name)))

    def recompute(self):
        """Gradient checkpointing (Chen et al. 2016) of each block of both towers: its activations are
        computed again in the backward pass, with the same random numbers."""
        def again(block):
            how = dict(use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), replaying(block)))
            block.forward = functools.partial(checkpoint, block.forward, **how)
        for module in self.modules():
            if isinstance(module, (ResBlock, Block, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
                again(module)
        if not self.text.frozen and self.text.lm.supports_gradient_checkpointing:
            self.text.lm.gradient_checkpointing_enable({"use_reentrant": False})

    def cache_texts(self, texts, bar):
        if self.text.frozen and "text_pooling" in self.settings:  # the others need more than pooled vectors
            self.text.cache(texts(), bar)

    def class_score(self, like):
        """Similarities with the texts of a class (R, texts) -> its score (R,)."""
        return like.mean(1)

    def learned_scale(self):
        """exp of the learned log-scale, at most 100 (limit_scales)."""
        return self.log_scale.exp()

    def similarity(self, ecg, text, scales=None):
        """EcgViews of B, TextViews of C -> (B, C): mean over scales (default: all that it has)."""
        scales = scales or self.scales
        if missing := [scale for scale in scales if scale not in self.scales]:
            raise ModelError(f"this {self.config.method} run has no {' or '.join(missing)} scale, only "
                             f"{', '.join(self.scales)}")
        views = {}
        if "rhythm" in scales:
            views |= dict(rhythm=ecg.rhythm, report=text.report)
        if "token" in scales:
            views |= dict(tokens=as_autocast(ecg.tokens), words=as_autocast(text.words),
                          word_count=text.word_count)
        if "beat" in scales:
            views |= dict(beats=ecg.beats, sentences=text.sentences, beat_count=ecg.beat_count,
                          sentence_count=text.sentence_count, **self.beat_options())
        return token_beat_rhythm(**views, weights=[1 / len(scales)] * 3)


class ETP(Method):
    """ETP (Liu et al. 2023): CNN and frozen language model, a linear projector each, one InfoNCE. (Projectors
    and temperature have no public source: docs/papers.md.)"""
    settings = ("temperature", "max_pool", "text_pooling")

    def __init__(self, config, text):
        super().__init__(config, text)
        self.project_ecg = nn.Linear(self.ecg.dim * (1 + config.max_pool), config.dim)
        self.project_text = nn.Linear(self.text.dim, config.dim)

    def views(self, tokens, ecg):
        pooled = torch.cat([tokens.mean(1), tokens.amax(1)], 1) if self.config.max_pool else tokens.mean(1)
        return EcgViews(tokens, None, F.normalize(self.project_ecg(pooled), dim=1))

    def compare(self, vectors, batch):
        return {"contrast": info_nce(vectors["ecg"], vectors["text"], 1 / self.config.temperature)}


class MERL(Method):
    """MERL (Liu et al. 2024): cross-modal alignment (CMA) + two dropout views of the ECG (UMA)."""
    settings = ("temperature", "uma_dropout", "text_pooling")
    contrast_sides = 2

    def __init__(self, config, text):
        super().__init__(config, text)
        self.vit, width, dim = isinstance(self.ecg, ViT1d), self.ecg.dim, config.dim
        if self.vit:
            self.project_ecg = nn.Sequential(nn.Linear(width, dim), BatchNorm(dim), nn.ReLU(),
                                             nn.Linear(dim, dim), BatchNorm(dim))
        else:
            self.down = nn.Conv1d(width, dim, 1)
            self.pool = AttentionPool(math.ceil(self.samples / 16), dim)
        self.view1, self.view2 = (nn.Linear(width if self.vit else dim, dim, bias=False) for _ in range(2))
        self.project_text = nn.Sequential(nn.Linear(self.text.dim, dim), nn.GELU(), nn.Linear(dim, dim))

    def encode_tokens(self, ecg):
        ecg = normalise(ecg, self.config.normalise)
        return self.ecg.states(ecg) if self.vit else self.ecg(ecg)

    def project(self, tokens):
        """Encoder tokens -> tokens (B, T, D), their mean (B, D), where UMA starts, ECG vector (B, dim)."""
        if self.vit:
            mean = self.ecg.norm(tokens.mean(1))
            return tokens, mean, F.normalize(self.project_ecg(mean), dim=1)
        tokens = self.down(tokens.transpose(1, 2)).transpose(1, 2)
        return tokens, tokens.mean(1), F.normalize(self.pool(tokens), dim=1)

    def views(self, tokens, ecg):
        tokens, _, rhythm = self.project(tokens)
        return EcgViews(tokens, None, rhythm)

    def represent(self, batch):
        _, mean, rhythm = self.project(self.encode_tokens(batch.ecg))
        one, other = (F.normalize(F.dropout(view(mean), self.config.uma_dropout, self.training), dim=1)
                      for view in (self.view1, self.view2))
        return {"ecg": rhythm, "text": self.encode_text(batch.texts).report, "one": one, "other": other}, {}

    def compare(self, vectors, batch):
        scale = 1 / self.config.temperature
        return {"contrast": 2 * info_nce(vectors["ecg"], vectors["text"], scale),
                "uma": 2 * info_nce(vectors["one"], vectors["other"], scale)}


class AttentionPool(nn.Module):
    """MERL's pooling head: a learned class token asks all tokens. (B, T, dim) -> (B, dim). It gets position 0
    twice, as in the published code (golden vectors agree only so)."""

    def __init__(self, tokens, dim):
        super().__init__()
        self.positions = nn.Parameter(torch.randn(1, tokens + 1, dim) / dim)
        self.cls = nn.Parameter(torch.randn(1, 1, dim))
        self.attention = nn.MultiheadAttention(dim, heads_for(dim, 4), batch_first=True)
        self.out = nn.Linear(dim, dim)

    def forward(self, x):
        first, rest = self.positions[:, :1], at_length(self.positions[:, 1:], x.shape[1])
        cls = (self.cls + 2 * first).expand(len(x), -1, -1)
        x = torch.cat([cls, x + rest], 1)  # (B, 1 + T, dim)
        return self.out(self.attention(x[:, :1], x, x, need_weights=False)[0])[:, 0]


class MELP(Method):
    """MELP (Wang et al. 2025): contrast of whole records (rhythm), GLoRIA's attention of sentences over beats
    (beat), and the report written from the ECG (token, as in CoCa). beats: learned queries, as published, or
    the mean over real R-R intervals (--beats rpeak)."""
    settings = ("beats", "beat_queries", "as_published", "beat_weight", "caption_queries", "caption_weight",
                "decoder_layers")
    tower, scales = CausalTower, ("rhythm", "beat")

    def __init__(self, config, text):
        super().__init__(config, text)
        dim, width = config.dim, self.text.dim
        self.beat_pool = QueryPool(config.beat_queries, dim, self.ecg.dim) if config.beats == "query" else \
            nn.Sequential(nn.Linear(self.ecg.dim, dim), nn.LayerNorm(dim))
        self.project_beats = nn.Parameter(torch.randn(dim, dim) * dim ** -0.5)
        self.caption_pool = QueryPool(config.caption_queries, width, self.ecg.dim)
        self.decoder = CaptionDecoder(width, self.text.lm.config.vocab_size, config.decoder_layers)
        self.project_text = nn.Sequential(nn.Linear(width, dim), nn.GELU(), nn.Linear(dim, dim))
        self.project_sentences = nn.Linear(width, dim)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.weights = {"caption": config.caption_weight, "beat": config.beat_weight}

    def beat_options(self):
        return dict(beat_temperatures=(4.0, 5.0, 0.2), beat_mean=True)  # a soft maximum of cosines

    def pool(self, tokens, ecg, peaks=None):
        """Encoder tokens of raw ecg -> beats before their projection (B, K, dim), number of beats (B,)."""
        if self.config.beats == "query":
            beats = self.beat_pool(tokens)
            return beats, torch.full(beats.shape[:1], beats.shape[1], device=beats.device)
        peaks = segment_beats(ecg, self.config.rate)[0] if peaks is None else peaks
        beats, count = pool_beats(tokens, peaks, ecg.shape[2])
        whole = torch.where(count[:, None] > 0, beats[:, 0], tokens.mean(1))  # a record without a beat is one
        return self.beat_pool(torch.cat([whole[:, None], beats[:, 1:]], 1)), count.clamp(min=1)

    def views(self, tokens, ecg, peaks=None):
        beats, count = self.pool(tokens, ecg, peaks)
        beats = beats @ self.project_beats
        real = torch.arange(beats.shape[1], device=beats.device) < count[:, None]
        return EcgViews(tokens, beats, F.normalize(masked_mean(beats, real), dim=1), count)

    def text_views(self, text):
        report = F.normalize(self.project_text(text.report), dim=1)
        return TextViews(None, self.project_sentences(text.sentences), report, None, text.sentence_count)

    def encode_text(self, texts):
        return self.text_views(self.text.encode(texts))

    def represent(self, batch):
        tokens, number = self.encode_tokens(batch.ecg), len(batch.texts)
        texts = self.text.encode(batch.texts + [join(tags) for tags in batch.tags])  # contrasted; written
        text, report = self.text_views(texts.at(slice(number))), texts.at(slice(number, None))
        ecg, real = self.views(tokens, batch.ecg, batch.peaks), report.mask[:, 1:] == 1
        # each piece is written from those before it
        logits = self.decoder(report.states[:, :-1], self.caption_pool(tokens), real)
        return {"ecg": ecg.rhythm, "beats": ecg.beats, "beat_count": ecg.beat_count, "text": text.report,
                "sentences": text.sentences, "sentence_count": text.sentence_count}, {
                    "caption": masked_cross_entropy(logits, report.ids[:, 1:][real])}

    def compare(self, vectors, batch):
        sides = [{name: vectors[name] for name in names} for names in (
            ("beats", "beat_count"), ("sentences", "sentence_count"))]
        beats, sentences = sides
        all_beats, all_sentences = ({name: gather(x) for name, x in side.items()} for side in sides)
        mean = not self.config.as_published
        rows = token_beat_rhythm(**beats, **all_sentences, beat_mean=mean)
        columns = rows.T if world() == 1 else token_beat_rhythm(**all_beats, **sentences, beat_mean=mean).T
        return {"contrast": info_nce(vectors["ecg"], vectors["text"], self.learned_scale()),
                "beat": paired_cross_entropy(rows, columns)}

    @torch.no_grad()
    def generate(self, ecg, beams=1, longest=64):
        """Write the reports of ecg (B, 12, N) mV -> B strings: greedy, or beam search."""
        tokenizer, start = self.text.tokenizer, torch.full((len(ecg), 1), self.text.first, device=ecg.device)
        ids = caption_writer(self).generate(
            start, ecg=self.caption_pool(self.encode_tokens(ecg)), num_beams=beams, do_sample=False,
            use_cache=False, max_length=min(longest, self.text.max_length),
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.sep_token_id)
        return tokenizer.batch_decode(ids, skip_special_tokens=True)


def pool_beats(tokens, peaks, samples):
    """Encoder tokens -> beats: mean of the tokens from half-way to the R peak before to half-way to the next.

    tokens (B, T, D) of `samples` samples; peaks (B, K) int32 samples, -1 behind the last -> beats (B, K, D),
    zeros behind the last, and count (B,) int32. A beat without a token takes the one of its peak."""
    length, count = tokens.shape[1], (peaks >= 0).sum(1, dtype=torch.int32)
    beat = beat_of_token(peaks, count, length, samples)                                   # (B, T)
    member = beat[:, None] == torch.arange(peaks.shape[1], device=peaks.device)[:, None]  # (B, K, T)
    at_peak = (peaks.long() * length // samples)[:, :, None] == torch.arange(length, device=peaks.device)
    member = torch.where(member.any(2, keepdim=True), member, at_peak) & (peaks >= 0)[:, :, None]
    share = member / member.sum(2, keepdim=True).clamp(min=1)
    return share.to(tokens.dtype) @ tokens, count


class QueryPool(nn.Module):
    """CoCa's attention pooling: n learned queries ask all tokens. (B, T, tokens) -> (B, n, dim)."""

    def __init__(self, n, dim, tokens):
        super().__init__()
        self.query = nn.Parameter(torch.randn(n, dim))
        heads = heads_for(dim, 8)
        self.attention = nn.MultiheadAttention(dim, heads, kdim=tokens, vdim=tokens, batch_first=True)
        self.norm_query, self.norm_context, self.norm = (nn.LayerNorm(d) for d in (dim, tokens, dim))

    def forward(self, x):
        x, q = self.norm_context(x), self.norm_query(self.query).expand(len(x), -1, -1)
        return self.norm(self.attention(q, x, x, need_weights=False)[0])


class CaptionDecoder(nn.Module):
    """CoCa's multimodal decoder: causal blocks, each followed by one that asks the ECG."""

    def __init__(self, dim, vocabulary, depth):
        super().__init__()
        heads = heads_for(dim, 8)
        self.blocks = nn.ModuleList(Block(dim, heads, 4 * dim) for _ in range(depth))
        self.cross = nn.ModuleList(Block(dim, heads, 4 * dim, cross=True) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.vocabulary = nn.Parameter(torch.randn(dim, vocabulary) * dim ** -0.5)

    def forward(self, x, ecg, where=slice(None)):
        """x (B, W, D) of the causal text tower, ecg (B, M, D) -> logits of the next piece (B, W, vocabulary).
        where: an index into (B, W), to spare the others' vocabulary."""
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        for block, cross in zip(self.blocks, self.cross):
            x = cross(block(x, mask=later), ecg)
        return self.norm(x)[where] @ self.vocabulary


def caption_writer(melp):
    """A MELP as a causal language model of transformers, whose generate() has greedy and beam search."""
    from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutput

    class CaptionWriter(PreTrainedModel, GenerationMixin):
        config_class = PretrainedConfig

        def prepare_inputs_for_generation(self, input_ids, ecg, **_):
            return {"input_ids": input_ids, "ecg": ecg}

        def forward(self, input_ids, ecg, **_):  # ecg (B, M, D): generate repeats it for every beam
            states, _ = melp.text.run({"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)})
            return CausalLMOutput(logits=melp.decoder(states, ecg, (slice(None), slice(-1, None))).float())

    writer = CaptionWriter(PretrainedConfig(vocab_size=len(melp.text.tokenizer), is_decoder=True))
    writer.place = melp.log_scale  # generate looks at a parameter for the device
    return writer


class CMELT(Method):
    """C-MELT, alias D-BETA (Pham et al. 2025): masked language and ECG modelling with fused towers (mlm,
    mem), ECG-text matching (etm), sigmoid loss on the towers' own vectors (ets), replaced texts as certain
    negatives (N3S): far, as in the paper (as_published: called wrong, but the record's own text reaches the
    model), or none."""
    settings = ("fusion_layers", "frame_drop", "lead_mask", "word_mask", "negatives", "as_published")

    @classmethod
    def check(cls, config):
        super().check(config)
        if not config.encoder.startswith("w2v_"):
            raise ModelError("cmelt drops frames before its transformer: use --encoder w2v_tiny, small or "
                             f"base, not {config.encoder}")

    def __init__(self, config, text):
        super().__init__(config, text)
        d, heads, eps = config.dim, heads_for(config.dim, config.dim // 64), 1e-12  # BERT's eps: 1e-5 shows
        self.text.mask = not config.as_published
        self.needs_far_texts = config.negatives == "far" and not config.as_published
        self.cls = nn.Parameter(0.02 * torch.randn(self.ecg.dim))
        self.project_ecg, self.project_text = nn.Linear(self.ecg.dim, d), nn.Linear(self.text.dim, d)
        self.pool_ecg, self.pool_text, self.pool_fused_ecg, self.pool_fused_text = (
            nn.Sequential(nn.Linear(d, d), nn.Tanh()) for _ in range(4))  # of a first state
        self.modality = nn.Embedding(2, d)  # 0 text, 1 ECG
        self.fuse_ecg, self.fuse_text = (nn.ModuleList(nn.TransformerDecoderLayer(
            d, heads, 4 * d, 0.1, "gelu", layer_norm_eps=eps, batch_first=True)
            for _ in range(config.fusion_layers)) for _ in range(2))
        self.tell_word = nn.Sequential(nn.Linear(d, d), nn.GELU(), nn.LayerNorm(d, eps),
                                       nn.Linear(d, self.text.lm.config.vocab_size))
        self.rebuild = FrameDecoder(d, self.samples // 16, heads_for(max(1, d // 2), d // 128))
        self.match = nn.Linear(2 * d, 2)

    def new_encoder(self):
        super().new_encoder()
        if hasattr(self, "cls"):
            nn.init.normal_(self.cls, std=0.02)

    def fuse(self, text, text_mask, ecg):
        """Text (B, W, d), ecg (B, 1 + T, d) -> both after the fusion layers, and the ECG's half-way."""
        text, ecg, padding = text + self.modality.weight[0], ecg + self.modality.weight[1], text_mask == 0
        for i, (text_layer, ecg_layer) in enumerate(zip(self.fuse_text, self.fuse_ecg), 1):
            text, ecg = (text_layer(text, ecg, tgt_key_padding_mask=padding),
                         ecg_layer(ecg, text, memory_key_padding_mask=padding))
            if i == max(1, len(self.fuse_ecg) // 2):
                half = ecg
        return text, ecg, half

    def encode_frames(self, frames):
        """Frames (B, T, D) -> encoder output with the class token first (B, 1 + T, D)."""
        return self.ecg.encode(torch.cat([self.cls.expand(len(frames), 1, -1), frames], 1))

    def encode_tokens(self, ecg):
        return self.encode_frames(self.ecg.embed(normalise(ecg, self.config.normalise)))

    def views(self, tokens, ecg):
        states = self.project_ecg(tokens)
        return EcgViews(states[:, 1:], None, F.normalize(self.pool_ecg(states[:, 0]), dim=1))

    def encode_text(self, texts):
        states = self.project_text(self.text.encode(texts)[0])
        return TextViews(None, None, F.normalize(self.pool_text(states[:, 0]), dim=1))

    def masked_states(self, frames, order):
        """Projected states, class token first, of the frames that come first in order (B, T), and which are
        hidden (B, T): 1, not 0."""
        kept = order[:, :max(1, int(frames.shape[1] * (1 - self.config.frame_drop)))]
        tokens = self.encode_frames(frames.gather(1, kept[:, :, None].expand(-1, -1, frames.shape[2])))
        return self.project_ecg(tokens), torch.ones(order.shape, device=order.device).scatter(1, kept, 0)

    def represent(self, batch):
        ecg = normalise(batch.ecg, self.config.normalise)
        visible = ecg * (torch.rand(ecg.shape[:2], device=ecg.device) >= self.config.lead_mask)[:, :, None]
        frames = self.ecg.embed(visible)                                            # (B, T, D)
        order = torch.rand(frames.shape[:2], device=frames.device).argsort(1)
        states, hidden = self.masked_states(frames, order)

        sampled, aligned = self.with_negatives(batch)
        tokens = tokenise(self.text, [join(tags) for tags in sampled])
        ids, labels = mask_words(tokens["input_ids"], tokens["words"], self.text.tokenizer,
                                 self.config.word_mask)
        words = self.project_text(self.text.run({**tokens, "input_ids": ids}).last_hidden_state)
        fused_text, fused_ecg, half = self.fuse(words, tokens["attention_mask"], states)

        masked = labels >= 0  # only these need the vocabulary
        target = frames_of(visible if self.config.as_published else ecg)  # (B, T, 16 * L)
        pair = torch.cat([self.pool_fused_text(fused_text[:, 0]), self.pool_fused_ecg(fused_ecg[:, 0])], 1)
        vectors = {"ecg": self.pool_ecg(states[:, 0]), "text": self.pool_text(words[:, 0])}
        return vectors | {"aligned": aligned}, {
            "mlm": masked_cross_entropy(self.tell_word(fused_text[masked]), labels[masked]),
            "mem": reconstruction_loss(self.rebuild(half, order.argsort(1)), target, hidden),
            "etm": masked_cross_entropy(self.match(pair), aligned.long())}

    def compare(self, vectors, batch):
        ecg, text = vectors["ecg"], gather(vectors["text"])
        ets = sigmoid_loss(ecg, text, positive=gather(vectors["aligned"]), first=rank() * len(ecg))
        return {"ets": ets if self.config.as_published else ets * len(text)}

    def with_negatives(self, batch):
        """The records' texts (B lists of tags), about half replaced by what a far text says and the record's
        does not, and which are still their own (B,) bool."""
        sampled, aligned = list(batch.sampled), torch.ones(len(batch.ids), dtype=torch.bool)
        if self.config.negatives != "none":
            number = min(len(sampled), round(0.5 * len(sampled) + torch.rand(()).item()))
            rows = torch.randperm(len(sampled))[:number]
            aligned[rows] = False
        if self.needs_far_texts:
            for row, text in zip(rows.tolist(), self.far.draw([join(batch.tags[row]) for row in rows])):
                tags = [tag for tag in text.split(". ") if tag not in batch.tags[row]]
                aligned[row] = not tags
                if tags:  # as many as the record's text has: the length must not give it away
                    sampled[row] = [tags[i] for i in torch.randperm(len(tags))[:len(batch.sampled[row])]]
        return sampled, aligned.to(batch.ecg.device)


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class FrameDecoder(nn.Module):
    """D-BETA's masked-autoencoder decoder: mask tokens for dropped frames, fixed positions, four blocks."""

    def __init__(self, d, frames, heads, leads=12):
        super().__init__()
        dim = max(1, d // 2)
        self.embed, self.mask = nn.Linear(d, dim), nn.Parameter(0.02 * torch.randn(dim))
        rate = torch.exp(torch.arange(0, dim, 2) * (-math.log(10000) / dim))
        angle = torch.arange(frames + 1)[:, None] * rate
        positions = torch.stack([angle.sin(), angle.cos()], 2).flatten(1)[:, :dim]
        self.register_buffer("positions", positions, persistent=False)  # (1 + T, dim)
        self.blocks = nn.Sequential(*(Block(dim, heads, 4 * dim, activation=QuickGELU) for _ in range(4)))
        self.norm, self.predict = nn.LayerNorm(dim), nn.Linear(dim, 16 * leads)

    def forward(self, states, place):
        """states (B, 1 + kept, d), class token first; place (B, T): where frame t stands among the kept, then
        the dropped ones. Returns (B, T, leads * 16)."""
        x = self.embed(states)
        dropped = self.mask.to(x.dtype).expand(len(x), place.shape[1] + 1 - x.shape[1], -1)
        frames = torch.cat([x[:, 1:], dropped], 1).gather(1, place[:, :, None].expand(-1, -1, x.shape[2]))
        x = torch.cat([x[:, :1], frames], 1) + self.positions[:place.shape[1] + 1]
        return self.predict(self.norm(self.blocks(x)))[:, 1:]


class FarTexts:
    """N3S: for a report, one of the 64 that are least like it. texts: U different reports; vectors (U, d): by
    which they are compared."""

    def __init__(self, texts, vectors, nearest=64):
        self.texts, self.row = texts, {text: i for i, text in enumerate(texts)}
        dtype = vectors.dtype if vectors.is_cuda else torch.float32  # half is slow on a CPU
        self.vectors, self.nearest = F.normalize(vectors.float(), dim=1).to(dtype), min(nearest, len(texts))

    def draw(self, texts):
        """n reports -> n far ones; any, for a report that is not among the U (of a validation record)."""
        cosines = self.vectors[[self.row.get(text, 0) for text in texts]] @ self.vectors.T  # (n, U)
        far = cosines.topk(self.nearest, largest=False).indices.cpu()
        drawn = far.gather(1, torch.randint(self.nearest, (len(texts), 1)))[:, 0].tolist()
        return [self.texts[i if text in self.row else torch.randint(len(self.texts), ())]
                for text, i in zip(texts, drawn)]


class FGCLEP(ETP):
    """FG-CLEP: ETP's towers, sigmoid loss with a semantic-similarity matrix as soft targets; coarse, then
    fine on reports enriched by waveform features that the coarse model finds plausible.
    align: rhythm, the whole record (v1); tag, besides, every tag's cross-attention over tokens (v2; lead-time
    patches with --encoder leadvit_*); word, besides, each word with its best token (FILIP)."""
    settings = ("max_pool", "align", "fn_mode", "similarity", "targets", "prior", "llm", "keep_share",
                "keep_threshold", "fine_epochs", "text_pooling")
    stages = ("coarse", "fine")
    ALIGN = {"rhythm": ("rhythm",), "tag": ("rhythm", "beat"), "word": ("rhythm", "token")}

    @classmethod
    def check(cls, config):
        super().check(config)
        if config.text_unit == "tags" and not config.compares_tags:
            raise ModelError("--similarity half or cos and --fn-mode none pair each record with one text: "
                             "add --text-unit report")
        if config.targets == "truth" and not config.compares_tags:
            raise ModelError("--targets truth says of which records a tag is true, and --similarity half or "
                             "cos and --fn-mode none do not ask: leave one of them out")
        if config.llm and not config.fine_epochs:
            raise ModelError("--llm proposes features for the fine stage: add --fine-epochs")

    def __init__(self, config, text):
        super().__init__(config, text)
        self.scales, self.number, self.meaning = self.ALIGN[config.align], {}, {}  # see set_vocabulary
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)), requires_grad=config.fn_mode != "l1")
        if config.align != "rhythm":
            self.project_tokens = nn.Linear(self.ecg.dim, config.dim)
        if config.align == "tag":
            self.log_attention = nn.Parameter(torch.tensor(math.log(10.0)))

    def beat_options(self):
        """One softmax, over the patches; then the cosine of a single sentence, the tag."""
        return dict(over_sentences=False, beat_temperatures=(self.log_attention.exp(), 1.0, 1.0))

    def views(self, tokens, ecg):
        views = super().views(tokens, ecg)
        if self.config.align == "rhythm":
            return views
        patches = F.normalize(self.project_tokens(tokens), dim=2)
        return views._replace(tokens=patches, beats=patches)  # a tag asks patches as a sentence asks beats

    def encode_text(self, texts):
        if self.config.align != "word":
            report = super().encode_text(texts).report
            return TextViews(None, report[:, None], report)
        states, real, pooled = self.text.encode(texts)
        words, count = first_rows(F.normalize(self.project_text(states), dim=2), real)
        return TextViews(words, None, F.normalize(self.project_text(pooled), dim=1), count)

    def class_score(self, like):
        """The sigmoid loss judges each text by itself, so a class is there if any of its texts is true: a
        maximum, as soft as the learned scale is small."""
        scale = self.learned_scale().float().cpu()
        return (torch.logsumexp(scale * like, 1) - math.log(like.shape[1])) / scale

    def set_vocabulary(self, tags, meaning):
        self.number, self.meaning = {tag: i for i, tag in enumerate(tags)}, meaning

    def plan(self, batch):
        """gathered of the batch: tags of the C texts that it is contrasted with, tags of all records, and
        which texts are stated of a record whose truth is not known, and of one where it is, (2, C) bool. Unit
        tags: the texts are the distinct tags that are sampled in the batch; processes share them."""
        batch = batch._replace(exact=batch.exact or [False] * len(batch.ids))
        tags, sampled = gather_lists(batch.tags, self.number), gather_lists(batch.sampled, self.number)
        exact = gather(torch.tensor(batch.exact).float()) > 0
        if self.config.text_unit != "tags":
            return batch._replace(gathered=(sampled, tags, torch.stack([~exact, exact])))
        texts = list(dict.fromkeys(tag for row in sampled for tag in row))
        place, stated = {text: i for i, text in enumerate(texts)}, torch.zeros(2, len(texts)).bool()
        for row, kind in zip(sampled, exact.long().tolist()):
            stated[kind, [place[tag] for tag in row]] = True
        return batch._replace(captions=share_out(texts), gathered=([[text] for text in texts], tags, stated))

    def represent(self, batch):
        ecg = self.encode_ecg(batch.ecg)
        vectors = {"ecg": ecg.rhythm} | ({} if self.config.align == "rhythm" else {"tokens": ecg.tokens})
        if batch.texts:  # parts can be more than texts
            text = self.encode_text(batch.texts)
            vectors |= {"text": text.report} | ({} if text.words is None else {
                "words": text.words, "word_count": text.word_count})
        return vectors, {}

    def compare(self, vectors, batch):
        text_tags, tags, stated = batch.gathered
        report, words, word_count = (x if x is None else x[:len(text_tags)] for x in (
            gather(vectors.get(name)) for name in ("text", "words", "word_count")))
        text = TextViews(words, report[:, None], report, word_count)
        ecg = EcgViews(vectors.get("tokens"), vectors.get("tokens"), vectors["ecg"])
        target = self.targets(report, text_tags, batch, tags)  # (b, C)
        weight = self.loss_mask(text_tags, stated, batch).to(target)
        # with a prior the cosine need not say how frequent a text is, only of which records it is true
        count = mean_over_processes(weight.sum(0)).clamp(min=1e-6)
        frequency = mean_over_processes((target * weight).sum(0)) / count
        prior = torch.logit(frequency, eps=0.5 / len(tags)) if self.config.prior else 0
        terms = {}
        for scale in self.scales:
            cosines = self.similarity(ecg, text, [scale])  # (b, C)
            name = "" if scale == "rhythm" else "_" + self.config.align
            if self.config.fn_mode == "l1":
                terms["l1" + name] = l1_similarity(cosines * weight, target * weight)
            else:
                terms["sigmoid" + name] = soft_sigmoid(self.learned_scale() * cosines + prior, target, weight)
        return terms

    def loss_mask(self, text_tags, stated, batch):
        """Which texts the loss looks at, record by record: (b, C) bool. Where the truth is not known, only
        what such records state: a report does not deny what reports leave out. Where it is known, what such
        records state, and all that their truth decides."""
        decided = torch.tensor([all(tag in self.meaning for tag in row) for row in text_tags])
        return torch.where(torch.tensor(batch.exact)[:, None], stated[1] | decided, stated[0])

    @torch.no_grad()
    def targets(self, text, text_tags, batch, all_tags):
        """Soft targets S (b, C): how far text l is true of record k, of this process. similarity tags: share
        of the text that the record's report contains, or its truth; half: (1 + cos(t_k, t_l)) / 2, as
        published: unrelated texts get 1/2; cos: max(cos, 0). fn_mode none: the identity. text (C, dim);
        all_tags: of the records of all processes."""
        own = slice(rank() * len(batch.tags), (rank() + 1) * len(batch.tags))
        if self.config.fn_mode == "none":
            return torch.eye(len(text), device=text.device)[own]
        if self.config.similarity == "tags":
            return tag_containment(text_tags, batch.tags, all_tags, text.device, batch.exact, self.meaning)
        cosines = cosine(text[own], text)
        return (1 + cosines) / 2 if self.config.similarity == "half" else cosines.clamp(min=0)


def tag_containment(text_tags, tags, all_tags=None, device="cpu", exact=(), meaning={}):
    """S[k, l] = mean over tags a of text l of max over tags b of record k of w(words of a in b) / w(of a),
    (B, C): 1 where record k says all of text l. text_tags: C lists of tags, tags: B lists.

    w sums over words log(N / records that use the word) + 0.05, of the N records of all_tags (default: tags):
    "sinus rhythm" says little of "sinus tachycardia", but "lateral ischemia" nearly all of "probable lateral
    ischemia".

    exact: B bools. Of such a record the tags are all that is true: an a that has a meaning ({tag: name}) is
    worth 1 where a b means the same, and else 0."""
    all_tags = tags if all_tags is None else all_tags
    number = {tag: i for i, tag in enumerate(dict.fromkeys(t for row in (*text_tags, *tags) for t in row))}
    used = Counter(word for row in all_tags for word in set().union(*map(words_of, row)))
    place = {word: i for i, word in enumerate(dict.fromkeys(w for tag in number for w in words_of(tag)))}
    weight = torch.tensor([math.log(len(all_tags) / max(1, used[w])) + 0.05 for w in place], device=device)
    words = members([[place[word] for word in words_of(tag)] for tag in number], len(place), device)  # (U, W)
    cover = (words * weight) @ words.T / (words @ weight)[:, None]        # (a, b): share of a in b
    longest = max(map(len, tags))
    rows = [[number[tag] for tag in row + row[:1] * (longest - len(row))] for row in tags]  # filled up
    rows = torch.tensor(rows, device=device)
    best = best_of(cover, rows)                                           # (B, a)
    if any(exact):
        names = {}
        name = [names.setdefault(meaning.get(tag, tag), len(names)) for tag in number]
        same = members([[n] for n in name], len(names), device)
        same = same @ same.T                                              # (a, b): do they mean the same?
        known = torch.tensor([tag in meaning for tag in number], device=device)[:, None]
        exact = torch.tensor(exact, device=device)
        best[exact] = best_of(torch.where(known, same, cover), rows[exact])
    in_text = members([[number[tag] for tag in row] for row in text_tags], len(number), device)       # (C, U)
    return best @ in_text.T / in_text.sum(1)                              # (B, C)


def best_of(cover, rows):
    """cover (a, b), rows (B, N) of numbers b -> (B, a), the largest of a record's; B x N x a never exists."""
    table = cover.T.contiguous()
    return functools.reduce(torch.maximum, (table[column] for column in rows.T))


@functools.lru_cache(2**20)
def words_of(tag):
    """Sorted: the order of a set is another in every process, and with it the last bits of sums."""
    return sorted(set(tag.replace(",", " ").split()))


def members(rows, size, device):
    """Lists of numbers below size -> (len(rows), size) float32 of zeros and ones."""
    out = torch.zeros(len(rows), size)
    out[[i for i, row in enumerate(rows) for _ in row], [n for row in rows for n in row]] = 1
    return out.to(device)


# ---- where a method looks ----------------------------------------------------------------------------------

@torch.no_grad()
def attention_over_time(method, ecg, text):
    """Where each text is seen: ecg (1, 12, N) mV, TextViews of C texts -> (C, N), rows sum to 1: the softmax
    over tokens of each word's similarity, mean over words; or over beats or patches, as the method weighs
    them. Errors: ModelError where a method has no scale below the whole record."""
    views, config, samples = method.encode_ecg(ecg), method.config, ecg.shape[2]
    melp = isinstance(method, MELP)
    if "token" in method.scales:
        like = [text.words[i, :n] @ views.tokens[0].T for i, n in enumerate(text.word_count)]
        weight = torch.stack([(each * method.learned_scale()).softmax(1).mean(0) for each in like])   # (C, T)
    elif "beat" in method.scales and not (melp and config.beats == "query"):
        beats = views.beats[0] if views.beat_count is None else views.beats[0, :views.beat_count[0]]
        weight = (text.sentences[:, 0] @ beats.T * method.beat_options()["beat_temperatures"][0]).softmax(1)
    else:
        raise ModelError(f"this {config.method} run sees texts in the whole record only; fgclep "
                         "--align word or tag, and melp --beats rpeak, see them at a place")
    if melp:  # beats, from midpoint to midpoint
        place = beat_of_token(*segment_beats(ecg, config.rate), samples, samples)[0].long()
    else:  # tokens of equal length; patches of all leads at one time together
        windows = samples // config.patch if isinstance(method.ecg, LeadViT) else weight.shape[1]
        weight, place = weight.unflatten(1, (-1, windows)).sum(1), torch.arange(samples) * windows // samples
    length = torch.bincount(place, minlength=weight.shape[1]).clamp(min=1)
    return (weight.cpu() / length)[:, place].numpy()


# ---- weights as their authors published them ---------------------------------------------------------------
# weights.json: names in the authors' state dictionaries -> ours; * stands for anything, the same on both
# sides in order. A name with +0, +1, +2 is a part (query, key, value) of a larger tensor of ours; "-" is what
# neither training nor zero-shot here has a use for. "optional": what a file may lack. D-BETA's T5 sees no
# attention mask, but one text at a time has no padding: that is our tower with its mask, in any batch.

WRAPPER = re.compile(r"^((module|model)\.)*(ecg_encoder\.(?=ecg_encoder\.|attn_pool|ln_c|proj_contrast|bn\.)"
                     r"|\w*decoder\.(?=resblocks|cross_attn|ln_final|text_proj))?")
DROPPED = ("text.lm.pooler.", "text.lm.embeddings.position_ids")  # of a language model, that a tower may lack


@functools.lru_cache
def published():
    """weights.json: {kind: {"method", "optional", "names"}}."""
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "weights.json")) as file:
        return json.load(file)


def publication(checkpoint):
    """"merl:FILE" -> ("merl", "FILE"), None for any other checkpoint."""
    kind, _, file = str(checkpoint or "").partition(":")
    return (kind, file) if file and kind in published() else None


def rename(state, names):
    """The authors' state dictionary -> ours by names {theirs: ours}. Errors: ModelError, unknown names."""
    rules = [(re.compile(re.escape(theirs).replace(r"\*", "(.*?)")), ours) for theirs, ours in names.items()]
    parts, unknown = {}, []
    for theirs, value in state.items():
        bare = WRAPPER.sub("", theirs)
        match, ours = next(((m, ours) for pattern, ours in rules if (m := pattern.fullmatch(bare))), (0, 0))
        if not match:
            unknown.append(theirs)
        elif ours != "-":
            for group in match.groups():
                ours = ours.replace("*", group, 1)
            name, _, part = ours.partition("+")
            parts.setdefault(name, {})[part] = value
    if unknown:
        raise ModelError(f"{len(unknown)} unexpected names in the checkpoint: {', '.join(unknown[:10])}")
    return {name: found[""] if "" in found else torch.cat([found[part] for part in sorted(found)])
            for name, found in parts.items() if "" in found or len(found) == 3}  # else it counts as missing


def with_our_leads(state, kind):
    """A state dictionary of ours, for our order of leads: MERL and MELP had MIMIC-IV-ECG's, aVF first."""
    first = ("ecg.conv1.weight", "ecg.patch.weight", "ecg.stem.0.weight") if kind != "dbeta" else ()
    order = [0, 1, 2, 3, 5, 4, *range(6, 12)]
    return {name: value[:, order] if name in first else value for name, value in state.items()}


def same_shape(x, y):
    """But for axes of length 1, of which the authors have more."""
    return [n for n in x.shape if n > 1] == [n for n in y.shape if n > 1]


def load_published(method, state, kind):
    """Fill a method with the authors' weights, kind a key of published(). Errors: ModelError that names what
    is missing, unknown or misshapen."""
    given, optional = rename(state, published()[kind]["names"]), tuple(published()[kind]["optional"])
    given = {k: v for k, v in given.items() if k in method.state_dict() or not k.startswith(DROPPED)}
    ours = {k: v for k, v in method.state_dict().items() if not k.endswith("num_batches_tracked")}
    misshapen = [f"{k} {tuple(given[k].shape)} for {tuple(ours[k].shape)}" for k in given.keys() & ours.keys()
                 if not same_shape(given[k], ours[k])]
    missing = [k for k in ours.keys() - given.keys() if not k.startswith(optional)]
    for wrong, fault in ((given.keys() - ours.keys(), f"this {method.config.method} has no place for"),
                         (missing, f"the checkpoint lacks {len(missing)} weights, such as"),
                         (misshapen, "other sizes than this method's:")):
        if wrong:
            raise ModelError(f"{fault} {', '.join(sorted(wrong)[:10])}")
    method.load_state_dict({k: v.reshape(ours[k].shape) for k, v in given.items()}, strict=False)
    return method


# ---- settings --------------------------------------------------------------------------------------------
# A type says what a setting may be: Literal its values, Annotated[kind, lowest, highest] its range.

Count, CountOr0 = Annotated[int, 1, 10**9], Annotated[int, 0, 10**9]
Share, Weight = Annotated[float, 0, 1], Annotated[float, 0, 10**12]
Part = Annotated[float, 0, 0.99]  # all of it would leave nothing


@dataclasses.dataclass
class Config:
    """The small default, made for two CPU cores; a method's own and --preset paper are in METHODS."""
    method: str = "fgclep"  # etp|merl|cmelt|melp|fgclep; FILE.py:Class; cardiolm: for --text-model
    preset: Literal["small", "paper"] = "small"  # paper: the method's published recipe
    data: str = "simulated:8192*0.35"  # simulated[:N], ptbxl|mimic|cpsc2018|csn|georgia|wfdb|store:DIR,
                                       # csv:FILE; A,B*2: see docs/training.md
    init: str = ""  # weights to start from: a run folder, or merl:FILE, melp:FILE, dbeta:FILE as published
    init_share: Share = 0.0  # of these in the weights that are saved
    name: str = ""  # name of the run folder; default: method, data and time
    seed: Annotated[int, 0, 2**31] = 0  # everything random follows from it
    epochs: Count = 12  # fgclep: of the coarse stage
    batch_size: Annotated[int, 2, 10**9] = 32  # records contrasted with one another, over all processes
    lr: Annotated[float, 1e-12, 100] = 2e-3  # peak learning rate (AdamW)
    wandb: str = ""  # project of Weights & Biases that sees log.jsonl, too
  # signal
    rate: Annotated[int, 100, 1000] = 100  # Hz of the store
    normalise: Literal["mv", "record", "lead"] = "mv"  # model.normalise
    lead_drop: Part = 0.2  # chance that a lead is zeroed in a training step
    shift: Annotated[float, 0, 5] = 1.0  # seconds; a training record is moved in time by at most this much
  # ECG encoder
    encoder: str = "resnet18"  # resnet18|34|50|101, vit_ or leadvit_tiny|small|middle|base, w2v_tiny|small|
                               # base, FILE.py:Class
    width: Annotated[float, 0.01, 16] = 0.25  # channels of a ResNet, as a factor
    patch: Count = 10  # samples of a patch of vit or leadvit
    dim: Annotated[int, 1, 65536] = 128  # dimension of the shared space
    max_pool: bool = False  # the maximum over time beside the mean
  # text tower
    text_model: str = ""  # Hugging Face name, folder, cardiolm run; default: a small BERT made of the reports
    text_trainable_layers: Annotated[int, -1, 1000] = -1  # -1 all, 0 frozen, n the last n layers
    text_lr_scale: Annotated[float, 0, 1e3] = 1.0  # learning rate of the language model, as a share of --lr
    text_pooling: Literal["mean", "cls", "pooler"] = "mean"  # model.TextTower
    text_max_length: Annotated[int, 3, 10**6] = 128  # tokens
    mlm_steps: CountOr0 = 150  # masked-language-model updates of the small BERT
    text_unit: Literal["report", "subset", "tag", "tags"] = "report"  # a step's text; tags: fgclep's, all
    report_language: Literal["english", "original", "translated"] = "english"  # original: as written
  # loss
    temperature: Annotated[float, 1e-3, 1e3] = 0.07  # fixed softmax temperature
    uma_dropout: Part = 0.1  # dropout of the two ECG views
    beats: Literal["query", "rpeak"] = "query"  # learned (published), or the mean over each R-R interval
    beat_queries: Count = 12  # learned beats
    beat_weight: Weight = 0.2  # of the beat loss
    caption_queries: Count = 32  # ECG tokens that the caption decoder sees
    caption_weight: Weight = 2.0  # of the caption loss
    decoder_layers: Count = 2  # of the caption decoder
    fusion_layers: Count = 2  # of each stream
    frame_drop: Part = 0.75  # share of frames hidden from the encoder
    lead_mask: Part = 0.5  # chance that the encoder does not see a lead
    word_mask: Share = 0.25  # share of hidden words
    negatives: Literal["far", "none"] = "far"  # N3S: replaced texts
    as_published: bool = False  # defects of the code: melp's beat loss rewards long reports; cmelt attends to
                                # padding, rebuilds hidden leads as zeros, has 1/B of ets, loses N3S's texts
    align: Literal["rhythm", "tag", "word"] = "rhythm"  # v1; tag: v2, over patches; word: over tokens
    fn_mode: Literal["soft_bce", "l1", "none"] = "soft_bce"  # of false negatives; none: hard targets
    similarity: Literal["tags", "half", "cos"] = "tags"  # soft targets: model.FGCLEP.targets
    targets: Literal["reports", "truth"] = "truth"  # where it is known (simulated), not what a report says
    prior: bool = True  # logits start from each text's frequency in the batch: model.FGCLEP.compare
    llm: str = ""  # causal language model (name or folder) to propose features; default: prompts.json
    keep_share: Weight = 1.5  # of a feature's n candidates stay those among its 1.5 n best-scoring ECGs
    keep_threshold: Annotated[float, -1, 1] = -1.0  # and whose cosine is at least this (FOCAL: 0.95)
  # optimisation
    fine_epochs: CountOr0 = 0  # of the fine stage
    accumulate: Count = 1  # such batches per update
    chunk: CountOr0 = 0  # records encoded at a time, where memory does not hold a batch; 0: all
    beta2: Annotated[float, 0, 0.999999] = 0.999  # AdamW
    weight_decay: Annotated[float, 0, 100] = 0.05  # of weight matrices alone: train.make_optimiser
    warmup: Share = 0.1  # share of a stage's updates with rising rate; without it towers collapse
    clip: Annotated[float, 1e-12, math.inf] = 1.0  # largest gradient norm
    precision: Literal["auto", "float32", "bf16"] = "auto"  # auto: bf16 on CUDA, float32 on CPU
    recompute: bool = False  # keep no activations within the towers' blocks: compute them again going back
    compile: bool = False  # torch.compile the ECG encoder
    threads: Annotated[int, 0, 4096] = 0  # CPU threads; 0: torch's choice
    eval_every: CountOr0 = 1  # epochs between looks at the validation records; 0: never
    keep: Literal["last", "best"] = "last"  # weights of the last update, or of the lowest validation loss
    workers: Annotated[int, -1, 1024] = -1  # processes that read batches; -1: with a GPU up to 4, else none
    save_every: CountOr0 = 0  # updates between checkpoints; 0: those of five minutes

    @property
    def compares_tags(self):
        """Do soft targets come from tags?"""
        return self.similarity == "tags" and self.fn_mode != "none"


TYPES = {field.name: field.type for field in dataclasses.fields(Config)}


def kind_of(setting):
    """The Python type of a setting's values."""
    first = (get_args(TYPES[setting]) or (TYPES[setting],))[0]
    return first if isinstance(first, type) else str


def owners(setting):
    """The methods that a setting belongs to; none: it is common to all."""
    return [name for name, (cls, _, _) in METHODS.items() if setting in cls.settings]


def recipe(method):
    """(class, small defaults, published recipe) of one of METHODS; of FILE.py:Class, its own over those of
    the method that it inherits from. Errors: ModelError."""
    if not is_file(method):
        if method not in METHODS:
            raise ModelError(f"unknown method {method!r}: use {', '.join(METHODS)}, or FILE.py:Class")
        return METHODS[method]
    cls = load_own(method, Method)
    of = {known: defaults for known, *defaults in METHODS.values()}
    small, paper = next((of[base] for base in cls.__mro__ if base in of), ({}, {}))
    return cls, small | cls.small, paper | cls.paper


def method_class(config):
    return recipe(config.method)[0]


def flag(setting):
    return "--" + setting.replace("_", "-")


def check_setting(name, value):
    """Errors: ModelError where a setting cannot have this value."""
    kind, limits = kind_of(name), get_args(TYPES[name])
    kinds = (int, float) if kind is float else kind
    fits = isinstance(value, kinds) and isinstance(value, bool) == (kind is bool)
    allowed = {str: "a text", bool: "true or false"}.get(kind)
    if limits and kind is str:
        fits, allowed = fits and value in limits, "one of " + ", ".join(limits)
    elif limits:  # never true of NaN
        fits, allowed = fits and limits[1] <= value <= limits[2], f"from {limits[1]:g} to {limits[2]:g}"
    if not fits:
        whole = "a whole number " if kind is int else ""
        raise ModelError(f"{flag(name)} is {value!r}; it must be {whole}{allowed}")


def configure(method=Config.method, preset=Config.preset, **given):
    """Config of a method: its defaults, its published recipe if preset is paper, and over them what is given.
    Errors: ModelError for a setting that is unknown, has no such value, or belongs to other methods."""
    cls, small, paper = recipe(method)
    check_setting("preset", preset)
    for name in [*small, *paper, *given]:
        if name not in TYPES:
            raise ModelError(f"there is no setting {name!r}")
        if (whose := owners(name)) and name not in cls.settings:
            raise ModelError(f"{flag(name)} is a setting of {', '.join(whose)}, not of {method}: leave it "
                             "out")
    config = Config(**small | (paper if preset == "paper" else {}) | given, method=method, preset=preset)
    if "targets" not in given and not config.compares_tags:
        config.targets = "reports"
    for name in TYPES:
        check_setting(name, getattr(config, name))
    takes = encoder_settings(config.encoder)
    for name in [name for name in OF_ENCODERS if name in given and name not in takes]:
        raise ModelError(f"{flag(name)} is not a setting of --encoder {config.encoder}: leave it out")
    if "patch" in takes and config.patch > SECONDS * config.rate:
        raise ModelError(f"--patch {config.patch} is longer than a record of {SECONDS * config.rate} samples")
    files = set(map(os.path.abspath, own_files(config).values()))
    if len(set(map(os.path.basename, files))) < len(files):
        raise ModelError(f"{' and '.join(sorted(files))} would be one file in the run: rename one")
    if config.name and not re.fullmatch(r"[^\W_][^/\\\0]*", config.name):
        raise ModelError(f"--name {config.name!r} is no name of a folder: begin with a letter, use no slash")
    if config.init_share and not config.init:
        raise ModelError("--init-share is of the weights that --init names: name some, or leave it out")
    cls.check(config)
    return config


def settings_of(config):
    """Those of a Config that its method has -> dictionary, which configure takes back; a FILE.py lies beside
    the config.json that they are written to, and has no folder."""
    special = [*method_class(config).settings, *encoder_settings(config.encoder)]
    settings = {name: value for name, value in dataclasses.asdict(config).items()
                if name in special or not owners(name) and name not in OF_ENCODERS}
    return settings | {name: os.path.basename(settings[name]) for name in own_files(config)}


# ---- the methods by name ---------------------------------------------------------------------------------
# name: (class, defaults at small scale, published recipe: --preset paper). Sources, and what
# no public one gives: docs/papers.md.

METHODS = {
    "etp": (ETP, dict(text_trainable_layers=0, text_unit="tag", batch_size=64), dict(
        width=1.0, dim=128, text_model="emilyalsentzer/Bio_ClinicalBERT", text_pooling="cls", lr=2e-3,
        text_max_length=256, text_unit="report", batch_size=128, epochs=50, weight_decay=1e-5, lead_drop=0.0,
        shift=0.0)),
    "merl": (MERL, dict(text_unit="subset", batch_size=64, lr=1e-3, epochs=16), dict(
        rate=500, normalise="record", width=1.0, patch=50, dim=256, text_model="ncbi/MedCPT-Query-Encoder",
        text_trainable_layers=0, text_pooling="pooler", text_max_length=256, text_unit="report", epochs=20,
        batch_size=1024, lr=1e-3, weight_decay=1e-8, lead_drop=0.0, shift=0.0)),
    "cmelt": (CMELT, dict(
        encoder="w2v_tiny", text_unit="tag", text_max_length=48, frame_drop=0.5, lead_mask=0.2, lr=7e-4,
        negatives="none", batch_size=64, lead_drop=0.0, epochs=30), dict(
        rate=500, encoder="w2v_base", dim=768, fusion_layers=6, text_model="google/flan-t5-base", epochs=49,
        text_max_length=256, text_unit="report", negatives="far", frame_drop=0.75, lead_mask=0.5, lr=5e-5,
        batch_size=128, weight_decay=0.01, beta2=0.98, shift=0.0)),
    "melp": (MELP, dict(text_unit="tag", text_max_length=64, batch_size=64, lr=1e-3, epochs=16), dict(
        rate=500, normalise="record", encoder="w2v_base", dim=256, caption_queries=128, decoder_layers=6,
        text_model="fuyingw/heart_bert", text_trainable_layers=6, text_max_length=127, text_unit="report",
        batch_size=256, epochs=100, lr=2e-4, weight_decay=0.2, beta2=0.95, lead_drop=0.5, shift=0.0)),
    "fgclep": (FGCLEP, dict(text_unit="tags", targets="truth", max_pool=True, epochs=14, fine_epochs=4), dict(
        normalise="lead", encoder="resnet50", width=1.0, dim=512, text_trainable_layers=3, lr=2e-5,
        text_model="emilyalsentzer/Bio_ClinicalBERT", text_pooling="pooler", text_max_length=256, prior=False,
        text_unit="report", similarity="half", targets="reports", max_pool=False, keep_share=1e9,
        keep_threshold=0.95, batch_size=800, epochs=10, fine_epochs=3, weight_decay=1e-4, lead_drop=0.0,
        shift=0.0)),
    "cardiolm": (CardioLM, dict(word_mask=0.15, batch_size=32, lr=1e-3, weight_decay=0.01, epochs=8), dict(
        text_model="ncbi/MedCPT-Query-Encoder", text_max_length=512, epochs=1, lr=5e-5, warmup=0.06)),
}


def build_method(config, text):
    """The method named in config.method, with its two towers. text: (language model, tokenizer)."""
    return method_class(config)(config, text)
