"""ECG encoders, the text tower, losses, and one class a method: everything that is learned.

Every method has the same three calls (see Method): encode_ecg, encode_text, loss. To add one, write a class
and put its defaults into METHODS at the end of this file; train.py and eval.py need no change.
"""
import math
import string
from collections import Counter
from typing import NamedTuple, Optional

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.nn.functional import all_gather, all_reduce

from csrc import beat_of_token


class ModelError(ValueError):
    """One sentence for the user: which setting is wrong, and what to use."""


class EcgViews(NamedTuple):
    """An ECG at three scales; a method fills in the ones it uses."""
    tokens: Optional[torch.Tensor]  # (B, T, D) encoder time steps
    beats: Optional[torch.Tensor]   # (B, beats, D)
    rhythm: torch.Tensor            # (B, dim) whole record, L2-normalised


class TextViews(NamedTuple):
    """A text at three scales; a method fills in the ones it uses."""
    words: Optional[torch.Tensor]      # (B, W, D)
    sentences: Optional[torch.Tensor]  # (B, S, D)
    report: torch.Tensor               # (B, dim) whole text, L2-normalised


class Batch(NamedTuple):
    """What a method's loss sees: B records of one process."""
    ecg: torch.Tensor  # (B, L, N) float32 mV
    chosen: list       # B lists of tags: what is said of the record in this step (train.py, text_unit)
    tags: list         # B lists of tags: everything the record's report says
    ids: list          # B record names, for messages
    peaks: torch.Tensor  # (B, K) int32 R peaks in samples of ecg, -1 behind the last

    @property
    def texts(self):
        return [join(tags) for tags in self.chosen]


def join(tags):
    """Tags of one record -> one text."""
    return ". ".join(tags)


# ---- several processes -------------------------------------------------------------------------------------
# Features are gathered WITH gradient and every process computes the loss of the whole batch. The backward pass of
# all_gather sums over processes and DDP averages parameter gradients, so the result is that of one process.

def world():
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(x):
    """(B, ...) of this process -> (B * world, ...) of all, in order of rank, differentiable."""
    return torch.cat(all_gather(x.contiguous()), 0) if world() > 1 else x


def gather_texts(items):
    """A list of this process -> the concatenated list of all, in order of rank."""
    if world() == 1:
        return items
    parts = [None] * world()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm1d whose training statistics are those of the batch of ALL processes (also on CPU, where
    nn.SyncBatchNorm cannot run); with one process exactly nn.BatchNorm1d. x: (B, C) or (B, C, T)."""

    def forward(self, x):
        if world() == 1 or not self.training:
            return super().forward(x)
        axes = [0] if x.dim() == 2 else [0, 2]
        shape = (1, -1) if x.dim() == 2 else (1, -1, 1)
        f = x.float()
        count = f.numel() / f.shape[1] * world()
        mean = all_reduce(f.sum(axes)) / count                             # (C,)
        var = all_reduce((f - mean.view(shape)).square().sum(axes)) / count  # two passes: no cancellation
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
        f = (f - mean.view(shape)) * torch.rsqrt(var + self.eps).view(shape)
        return (f * self.weight.view(shape) + self.bias.view(shape)).to(x.dtype)


# ---- ECG encoders: (B, leads, N) -> tokens (B, T, dim) ---------------------------------------------------------

def normalise(ecg, how):
    """Scale ECGs for an encoder. ecg (B, L, N) mV -> (B, L, N).

    mv: millivolts, clipped at 5 mV: amplitudes keep their meaning (hypertrophy, low voltage). record: min-max over all
    leads to [0, 1] (MERL, MELP). lead: min-max of each lead to [-1, 1], a flat lead becomes 0 (FG-CLEP's authors)."""
    if how == "mv":
        return ecg.clamp(-5, 5)
    axes = (1, 2) if how == "record" else (2,)
    low, high = ecg.amin(axes, keepdim=True), ecg.amax(axes, keepdim=True)
    scaled = (ecg - low) / (high - low).clamp_min(1e-6)
    if how == "record":
        return scaled
    return torch.where(high > low, 2 * scaled - 1, 0.0)


class ResNet1d(nn.Module):
    """1-D ResNet of MERL (METHODS 1.2): stem conv 7/2 WITHOUT max-pooling, stages of stride 1/2/2/2, 16 samples a token.

    depth 18/34 (basic blocks) or 50/101 (bottlenecks); width scales every channel count; any leads, any length."""
    BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}

    def __init__(self, depth=18, leads=12, width=1.0):
        super().__init__()
        widths = [max(8, int(c * width)) for c in (64, 128, 256, 512)]
        bottleneck = depth >= 50
        self.conv1 = nn.Conv1d(leads, widths[0], 7, stride=2, padding=3, bias=False)
        self.bn1 = BatchNorm(widths[0])
        channels, stages = widths[0], []
        for i, (c, n) in enumerate(zip(widths, self.BLOCKS[depth])):
            blocks = []
            for j in range(n):
                block = ResBlock(channels, c, 2 if i and not j else 1, bottleneck)
                blocks.append(block)
                channels = block.out
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.dim = channels

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))  # (B, C, N/2)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.transpose(1, 2)             # (B, N/16, dim)


class ResBlock(nn.Module):
    """Residual block: two 3-convolutions, or 1-3-1 with four times the channels (bottleneck)."""

    def __init__(self, cin, c, stride, bottleneck):
        super().__init__()
        self.out = 4 * c if bottleneck else c
        plan = [(cin, c, 1, 1), (c, c, 3, stride), (c, self.out, 1, 1)] if bottleneck else \
               [(cin, c, 3, stride), (c, c, 3, 1)]
        self.convs = nn.ModuleList(nn.Conv1d(a, b, k, s, k // 2, bias=False) for a, b, k, s in plan)
        self.norms = nn.ModuleList(BatchNorm(b) for _, b, _, _ in plan)
        self.shortcut = nn.Sequential()
        if stride != 1 or cin != self.out:
            self.shortcut = nn.Sequential(nn.Conv1d(cin, self.out, 1, stride, bias=False), BatchNorm(self.out))

    def forward(self, x):
        h = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            h = norm(conv(h))
            if i < len(self.convs) - 1:
                h = F.relu(h)
        return F.relu(h + self.shortcut(x))


def at_length(positions, n):
    """Learned positions (1, P, D) for n tokens: as they are, or linearly interpolated where a record is longer or shorter."""
    if positions.shape[1] == n:
        return positions
    return F.interpolate(positions.transpose(1, 2), n, mode="linear", align_corners=False).transpose(1, 2)


class ViT1d(nn.Module):
    """1-D vision transformer of MERL (METHODS 1.2): patches over all leads, learned positions, pre-norm blocks.

    The final LayerNorm comes AFTER pooling there, so it is left to the head (`norm`). samples and patch set the number of
    learned positions; other lengths interpolate them; a last incomplete patch is dropped."""
    SIZES = {"tiny": (192, 3), "small": (384, 6), "middle": (512, 8), "base": (768, 12)}

    def __init__(self, size="tiny", leads=12, samples=5000, patch=50, depth=12):
        super().__init__()
        self.dim, heads = self.SIZES[size]
        self.patch = nn.Conv1d(leads, self.dim, patch, stride=patch, bias=False)
        self.positions = nn.Parameter(torch.randn(1, samples // patch, self.dim))
        self.blocks = nn.ModuleList(ViTBlock(self.dim, heads, {"tiny": 768, "small": 1536, "middle": 2048, "base": 3072}[size])
                                    for _ in range(depth))
        self.norm = nn.LayerNorm(self.dim)

    def forward(self, x):
        x = self.patch(x).transpose(1, 2)  # (B, T, dim)
        x = x + at_length(self.positions, x.shape[1])
        for block in self.blocks:
            x = block(x)
        return x


class ViTBlock(nn.Module):
    def __init__(self, dim, heads, mlp):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp), nn.GELU(), nn.Linear(mlp, dim))

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, T, d)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def build_encoder(name, leads, samples, width=1.0, patch=50):
    """ECG encoder by name: resnet18|34|50|101 or vit_tiny|small|middle|base."""
    kind, _, size = name.partition("_")
    if kind == "vit" and size in ViT1d.SIZES:
        return ViT1d(size, leads, samples, patch)
    if name.startswith("resnet") and name[6:].isdigit() and int(name[6:]) in ResNet1d.BLOCKS:
        return ResNet1d(int(name[6:]), leads, width)
    raise ModelError(f"unknown ECG encoder {name!r}: use resnet18, 34, 50, 101 or vit_tiny, small, middle, base")


class AttentionPool(nn.Module):
    """MERL's pooling head: a learned class token asks all tokens. (B, T, dim) -> (B, dim).

    Position 0 is added to the class token twice, as in the published code (golden vectors agree only so)."""

    def __init__(self, tokens, dim, heads=4):
        super().__init__()
        self.positions = nn.Parameter(torch.randn(1, tokens + 1, dim) / dim)
        self.cls = nn.Parameter(torch.randn(1, 1, dim))
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.out = nn.Linear(dim, dim)

    def forward(self, x):
        first, rest = self.positions[:, :1], at_length(self.positions[:, 1:], x.shape[1])
        cls = (self.cls + 2 * first).expand(len(x), -1, -1)
        x = torch.cat([cls, x + rest], 1)  # (B, 1 + T, dim)
        return self.out(self.attention(x[:, :1], x, x, need_weights=False)[0])[:, 0]


# ---- text tower ------------------------------------------------------------------------------------------------

class TextTower(nn.Module):
    """Any Hugging Face encoder as a text tower: list of B strings -> (B, dim).

    trainable_layers: -1 all, 0 frozen (no gradient, no dropout), n the last n layers (embeddings stay frozen).
    pooling: mean (over words, without [CLS] and [SEP]), cls, or pooler (the model's own). Equal texts are encoded once; padding
    goes only to the longest text of the batch."""

    def __init__(self, lm, tokenizer, trainable_layers=-1, pooling="mean", max_length=256):
        super().__init__()
        if pooling not in ("mean", "cls", "pooler"):
            raise ModelError(f"unknown text pooling {pooling!r}: use mean, cls or pooler")
        self.lm, self.tokenizer, self.pooling = lm, tokenizer, pooling
        self.max_length = min(max_length, getattr(lm.config, "max_position_embeddings", max_length))
        self.dim, self.frozen = lm.config.hidden_size, trainable_layers == 0
        if trainable_layers >= 0:
            lm.requires_grad_(False)
            layers = next(m for m in lm.modules() if isinstance(m, nn.ModuleList))
            for layer in list(layers)[len(layers) - trainable_layers:]:
                layer.requires_grad_(True)
        if pooling == "pooler" and getattr(lm, "pooler", None) is None:
            raise ModelError("this text model has no pooler: use --text-pooling mean or cls")
        if pooling != "pooler" and hasattr(lm, "pooler"):
            lm.pooler = None  # unused weights would be waited for by DDP and saved for nothing

    def train(self, mode=True):
        return super().train(mode and not self.frozen)

    def forward(self, texts):
        unique = list(dict.fromkeys(texts))
        device = next(self.lm.parameters()).device
        tokens = self.tokenizer(unique, padding=True, truncation=True, max_length=self.max_length,
                                return_special_tokens_mask=True, return_tensors="pt").to(device)
        special = tokens.pop("special_tokens_mask")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            out = self.lm(**tokens)
        if self.pooling == "mean":
            words = (1 - special)[:, :, None]  # of a two-word statement, half would be special tokens, the same in all
            pooled = (out.last_hidden_state * words).sum(1) / words.sum(1).clamp(min=1)
        else:
            pooled = out.pooler_output if self.pooling == "pooler" else out.last_hidden_state[:, 0]
        row = {text: i for i, text in enumerate(unique)}
        return pooled[torch.tensor([row[text] for text in texts], device=device)]  # (B, dim)


def load_text_model(name):
    """(encoder, tokenizer) of a Hugging Face name or folder. Errors: ModelError where there is none."""
    from transformers import AutoModel, AutoTokenizer
    try:
        return AutoModel.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    except OSError as error:
        raise ModelError(f"text model {name!r} is neither a folder with a model nor to be had from the Hugging Face hub: "
                         + str(error).splitlines()[0]) from error


def rebuild_text_model(folder):
    """(encoder with random weights, tokenizer) as save_text_model wrote them: a run brings its own weights."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer
    return AutoModel.from_config(AutoConfig.from_pretrained(folder)), AutoTokenizer.from_pretrained(folder)


def save_text_model(lm, tokenizer, folder):
    """Write the tokenizer and the architecture (not the weights) of a text model."""
    tokenizer.save_pretrained(folder)
    lm.config.save_pretrained(folder)


def word_tokenizer(texts, size=3000):
    """WordPiece tokenizer with the words of `texts` as whole pieces, most frequent first (at least twice), and every character
    for the rest. (The trainers of the tokenizers library give another vocabulary on every call: a seed must fix ours.)"""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizerFast
    split = BertWordPieceTokenizer(lowercase=True)
    words = Counter(word for text in texts for word, _ in
                    split.pre_tokenizer.pre_tokenize_str(split.normalizer.normalize_str(text)))
    letters = sorted({c for word in words for c in word} | set(string.ascii_lowercase + string.digits))
    common = sorted((w for w, n in words.items() if n > 1 and len(w) > 1), key=lambda w: (-words[w], w))
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + c for c in letters), *common][:size]
    made = BertWordPieceTokenizer({piece: i for i, piece in enumerate(pieces)}, lowercase=True)
    return BertTokenizerFast(tokenizer_object=made._tokenizer, model_max_length=256)


def small_text_model(texts, seed=0, steps=150, batch=32, dim=128, layers=2, vocab=3000, lr=1e-3, device="cpu", bar=None):
    """A small BERT with a WordPiece tokenizer, both made from `texts` on the spot: MELP's cardiology language model
    (METHODS 2.3, masked-language modelling, 15 % of the tokens) at small scale.

    texts: list of strings, equal ones count. steps: masked-language-model updates. Returns (encoder, tokenizer)."""
    from transformers import BertConfig, BertForMaskedLM, DataCollatorForLanguageModeling
    tokenizer = word_tokenizer(texts, vocab)
    torch.manual_seed(seed)
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=dim, num_hidden_layers=layers, num_attention_heads=4,
                        intermediate_size=4 * dim, max_position_embeddings=256, pad_token_id=tokenizer.pad_token_id)
    lm = BertForMaskedLM(config).to(device).train()
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    optimiser = torch.optim.AdamW(lm.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=max(2, steps), pct_start=0.1)
    rng = np.random.default_rng(seed)
    for _ in (bar or iter)(range(steps)):
        chosen = [texts[i] for i in rng.integers(0, len(texts), batch)]
        tokens = tokenizer(chosen, truncation=True, max_length=64)["input_ids"]
        inputs = collate([{"input_ids": t} for t in tokens]).to(device)
        loss = lm(**inputs).loss
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    return lm.bert, tokenizer


# ---- beats -------------------------------------------------------------------------------------------------------

def pool_beats(tokens, peaks, samples):
    """Encoder tokens -> beats: the mean of the tokens from half-way to the R peak before to half-way to the next.

    tokens (B, T, D), of records of `samples` samples; peaks (B, K) int32 in samples, -1 behind the last (Batch.peaks, segment_beats).
    Returns beats (B, K, D), zeros behind the last, and count (B,) int32. A beat shorter than a token takes the one its peak is in.
    Gradient to the tokens."""
    length, count = tokens.shape[1], (peaks >= 0).sum(1, dtype=torch.int32)
    beat = beat_of_token(peaks, count, length, samples)                                   # (B, T)
    index = torch.arange(peaks.shape[1], device=peaks.device)[None, :, None]              # (1, K, 1)
    mine = beat[:, None] == index                                                         # (B, K, T)
    at_peak = (peaks.long() * length // samples)[:, :, None] == torch.arange(length, device=peaks.device)
    mine = torch.where(mine.any(2, keepdim=True), mine, at_peak) & (peaks >= 0)[:, :, None]
    share = mine / mine.sum(2, keepdim=True).clamp(min=1)
    return share.to(tokens.dtype) @ tokens, count


# ---- losses ----------------------------------------------------------------------------------------------------
# x: (B, D) ECG vectors, y: (C, D) text vectors; "logits" are scale * cosine unless said.

def cosine(x, y):
    """x @ y.T in float32, also under autocast: at scale 100 the three digits of bf16 are not enough."""
    with torch.autocast(x.device.type, enabled=False):
        return x.float() @ y.float().T


def info_nce(x, y, scale, sides=2):
    """Contrastive loss of a batch whose pairs stand on the diagonal (B = C).

    L = -1/B sum_i log( exp(s x_i.y_i) / sum_j exp(s x_i.y_j) ); sides=2: the mean with its transpose (CLIP, ETP 2.1).
    scale s = 1 / temperature, a number (fixed) or a tensor (learned). x, y: L2-normalised. MERL's form is twice the mean."""
    logits = scale * cosine(x, y)  # (B, B)
    target = torch.arange(len(x), device=x.device)
    loss = F.cross_entropy(logits, target)
    return loss if sides == 1 else (loss + F.cross_entropy(logits.T, target)) / 2


def soft_sigmoid(logits, target):
    """L = mean_kl [ S_kl softplus(-x_kl) + (1 - S_kl) softplus(x_kl) ], FG-CLEP's loss (METHODS 2.5). logits x, target S: (B, C)."""
    return F.binary_cross_entropy_with_logits(logits, target)


def l1_similarity(x, y, target):
    """L = 1/B sum_kl | x_k.y_l - S_kl |: the other published form of false-negative mitigation (METHODS 2.5)."""
    return (cosine(x, y) - target).abs().sum() / len(x)


# ---- methods -----------------------------------------------------------------------------------------------------

class Method(nn.Module):
    """Two towers. `config` (train.py's Config) says which; `text` is a (language model, tokenizer) pair.

    A method gives encode_ecg, encode_text and loss; train.py calls it as a module, so that DDP sees every gradient."""

    def __init__(self, config, text):
        super().__init__()
        self.config = config
        self.samples = round(config.rate * config.seconds)
        self.ecg = build_encoder(config.encoder, 12, self.samples, config.width, config.patch)
        self.text = TextTower(*text, config.text_trainable_layers, config.text_pooling, config.text_max_length)

    weights = {}        # of the loss terms, where not 1
    contrast_sides = 1  # loss term "contrast" is this many times ln(batch size) when nothing is learned

    def forward(self, batch):
        return self.loss(batch)

    def encode_tokens(self, ecg):
        return self.ecg(normalise(ecg, self.config.normalise))  # (B, T, D)

    def learned_scale(self):
        """exp of the learned log-scale, clamped at 100 as CLIP does."""
        return self.log_scale.exp().clamp(max=100)


class ETP(Method):
    """ETP (Liu et al. 2023; METHODS 2.1): CNN and a frozen language model, one linear projector each, one InfoNCE.

    Parts without a public source (linear projectors, tau 0.07) follow METHODS 1.1."""

    def __init__(self, config, text):
        super().__init__(config, text)
        self.project_ecg = nn.Linear(self.ecg.dim * (1 + config.max_pool), config.dim)
        self.project_text = nn.Linear(self.text.dim, config.dim)

    def encode_ecg(self, ecg):
        tokens = self.encode_tokens(ecg)
        pooled = torch.cat([tokens.mean(1), tokens.amax(1)], 1) if self.config.max_pool else tokens.mean(1)
        return EcgViews(tokens, None, F.normalize(self.project_ecg(pooled), dim=1))

    def encode_text(self, texts):
        return TextViews(None, None, F.normalize(self.project_text(self.text(texts)), dim=1))

    def loss(self, batch):
        e, t = gather(self.encode_ecg(batch.ecg).rhythm), gather(self.encode_text(batch.texts).report)
        return {"contrast": info_nce(e, t, 1 / self.config.temperature)}


class MERL(Method):
    """MERL (Liu et al. 2024; METHODS 1.2, 2.2): cross-modal alignment (CMA) + two dropout views of the ECG (UMA)."""

    def __init__(self, config, text):
        super().__init__(config, text)
        dim, vit = config.dim, isinstance(self.ecg, ViT1d)
        if vit:
            self.project_ecg = nn.Sequential(nn.Linear(self.ecg.dim, dim), BatchNorm(dim), nn.ReLU(),
                                             nn.Linear(dim, dim), BatchNorm(dim))
        else:
            self.down = nn.Conv1d(self.ecg.dim, dim, 1)
            self.pool = AttentionPool(math.ceil(self.samples / 16), dim)
        self.view1 = nn.Linear(self.ecg.dim if vit else dim, dim, bias=False)
        self.view2 = nn.Linear(self.ecg.dim if vit else dim, dim, bias=False)
        self.project_text = nn.Sequential(nn.Linear(self.text.dim, dim), nn.GELU(), nn.Linear(dim, dim))

    def encode_both(self, ecg):
        """ecg -> tokens (B, T, D), the vector the UMA views start from (B, D), the ECG vector (B, dim)."""
        tokens = self.encode_tokens(ecg)
        if isinstance(self.ecg, ViT1d):
            mean = self.ecg.norm(tokens.mean(1))
            return tokens, mean, F.normalize(self.project_ecg(mean), dim=1)
        tokens = self.down(tokens.transpose(1, 2)).transpose(1, 2)
        return tokens, tokens.mean(1), F.normalize(self.pool(tokens), dim=1)

    def encode_ecg(self, ecg):
        tokens, _, rhythm = self.encode_both(ecg)
        return EcgViews(tokens, None, rhythm)

    def encode_text(self, texts):
        return TextViews(None, None, F.normalize(self.project_text(self.text(texts)), dim=1))

    def loss(self, batch):
        _, mean, e = self.encode_both(batch.ecg)
        views = [F.normalize(F.dropout(view(mean), self.config.uma_dropout, self.training), dim=1)
                 for view in (self.view1, self.view2)]
        scale = 1 / self.config.temperature
        return {"contrast": 2 * info_nce(gather(e), gather(self.encode_text(batch.texts).report), scale),
                "uma": 2 * info_nce(gather(views[0]), gather(views[1]), scale)}


class FGCLEP(Method):
    """FG-CLEP v1 (METHODS 1.5, 2.5): sigmoid loss with a semantic-similarity matrix as soft targets; trained coarse on the
    reports, then fine on reports enriched by recovered waveform features that the coarse model finds plausible."""
    stages = ("coarse", "fine")

    def __init__(self, config, text):
        if config.text_unit == "tags" and (config.similarity != "tags" or config.fn_mode == "none"):
            raise ModelError("--similarity half or cos and --fn-mode none pair each record with one text: add --text-unit report")
        super().__init__(config, text)
        self.project_ecg = nn.Linear(self.ecg.dim * (1 + config.max_pool), config.dim)
        self.project_text = nn.Linear(self.text.dim, config.dim)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)), requires_grad=config.fn_mode != "l1")

    encode_ecg, encode_text = ETP.encode_ecg, ETP.encode_text

    def loss(self, batch):
        e = gather(self.encode_ecg(batch.ecg).rhythm)  # (B, dim)
        tags, chosen = gather_texts(batch.tags), gather_texts(batch.chosen)
        if self.config.text_unit == "tags":  # every distinct tag of the batch, against every record
            chosen = [[tag] for tag in dict.fromkeys(tag for row in tags for tag in row)]
            t = self.encode_text([join(row) for row in chosen]).report  # the same in all processes
        else:
            t = gather(self.encode_text(batch.texts).report)
        target = self.similarity(t, chosen, tags)  # (B, C)
        if self.config.fn_mode == "l1":
            return {"l1": l1_similarity(e, t, target)}
        logits = self.learned_scale() * cosine(e, t)
        if self.config.prior:  # how frequent a text is, the cosine need not say: only which records it is true of
            logits = logits + torch.logit(target.mean(0), eps=0.5 / len(e))
        return {"sigmoid": soft_sigmoid(logits, target)}

    @torch.no_grad()
    def similarity(self, t, chosen, tags):
        """Soft targets S (B, C): how far text l (column) is true of record k (row). config.similarity:

        tags: share of the text that the record's own report contains (tag_containment);
        half: (1 + cos(t_k, t_l)) / 2, the published form, in which unrelated texts get 1/2; cos: max(cos, 0).
        fn_mode none: the identity, no false-negative mitigation."""
        if self.config.fn_mode == "none":
            return torch.eye(len(t), device=t.device)
        if self.config.similarity == "tags":
            return tag_containment(chosen, tags).to(t.device)
        same = cosine(t, t)
        return (1 + same) / 2 if self.config.similarity == "half" else same.clamp(min=0)


def tag_containment(chosen, tags):
    """S[k, l] = mean over the tags a of text l of max over the tags b of record k of w(words of a in b) / w(words of a).

    chosen: C lists of tags, tags: B lists. w sums over words log(B / number of records that use the word) (+ 0.05), so that
    "sinus rhythm" says little of "sinus tachycardia", but "lateral ischemia" nearly all of "probable lateral ischemia".
    Returns (B, C) float32: 1 where record k says all of text l."""
    unique = list(dict.fromkeys(tag for row in (*chosen, *tags) for tag in row))
    place = {tag: i for i, tag in enumerate(unique)}
    split = [set(tag.replace(",", " ").split()) for tag in unique]
    column = {word: j for j, word in enumerate(sorted(set().union(*split)))}
    words = indicator([[column[word] for word in row] for row in split], len(column))        # (U, words)
    of_record = indicator([[place[tag] for tag in row] for row in tags], len(unique))        # (B, U)
    of_text = indicator([[place[tag] for tag in row] for row in chosen], len(unique))        # (C, U)
    used = (of_record @ words > 0).sum(0)                                                    # (words,) records that use it
    weight = torch.log(len(tags) / used.clamp(min=1)) + 0.05
    cover = (words * weight) @ words.T / (words @ weight)[:, None]                           # (a, b): share of a in b
    best = torch.stack([cover[:, row > 0].amax(1) for row in of_record])                     # (B, a)
    return best @ of_text.T / of_text.sum(1)                                                 # (B, C)


def indicator(rows, columns):
    """rows: lists of column numbers -> (len(rows), columns) float32 of zeros and ones."""
    out = torch.zeros(len(rows), columns)
    out[[i for i, row in enumerate(rows) for _ in row], [j for row in rows for j in row]] = 1
    return out


# ---- the methods by name ---------------------------------------------------------------------------------------
# name: (class, its defaults at small scale, its published recipe: --preset paper). Sources: METHODS 1 and 3.2; what is
# written there as recalled or missing is marked in the README.

METHODS = {
    "etp": (ETP, dict(text_trainable_layers=0, batch_size=64), dict(
        width=1.0, dim=128, text_model="emilyalsentzer/Bio_ClinicalBERT", text_pooling="cls", text_max_length=256,
        batch_size=128, epochs=50, lr=2e-3, weight_decay=1e-5, lead_drop=0.0, shift=0.0)),
    "merl": (MERL, dict(batch_size=64, lr=1e-3), dict(
        rate=500, normalise="record", width=1.0, patch=50, dim=256, text_model="ncbi/MedCPT-Query-Encoder",
        text_trainable_layers=0, text_pooling="pooler", text_max_length=256, batch_size=1024, epochs=20, lr=1e-3,
        weight_decay=1e-8, lead_drop=0.0, shift=0.0)),
    "fgclep": (FGCLEP, dict(text_unit="tags", max_pool=True, epochs=14, fine_epochs=4), dict(
        normalise="lead", encoder="resnet50", width=1.0, dim=512, text_model="emilyalsentzer/Bio_ClinicalBERT",
        text_trainable_layers=3, text_pooling="pooler", text_max_length=256, text_unit="report", similarity="half", prior=False, max_pool=False,
        keep_share=1e9, keep_threshold=0.95, batch_size=800, epochs=10, fine_epochs=3, lr=2e-5, weight_decay=1e-4,
        lead_drop=0.0, shift=0.0)),
}


def build_method(config, text):
    """The method named in config.method, with its two towers. text: (language model, tokenizer)."""
    return METHODS[config.method][0](config, text)
