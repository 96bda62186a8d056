"""token_beat_rhythm: the similarity of every ECG with every text at three scales, without a tensor of ECG x text x token x word.

The two large scales are operators, token_similarity and beat_similarity: compiled for the CPU (token_similarity.cpp,
beat_similarity.cpp), for the GPU the token scale in bf16 (similarity_cuda.cu) and the beat scale in float32 within the limits of
suits_beat_kernel (beat_similarity_cuda.cu); for all else the plain definitions below, block by block.
Everywhere: B ECGs and C texts; token_count, beat_count (B,) and word_count, sentence_count (C,) say how many rows of the padded tensors
are real. A pair of which one side is empty has similarity 0 and no gradient.
"""
import torch

BLOCK = 2**24    # scores that a block of the plain version may hold
KEEP = 2**23     # scores that the beat scale may keep for its backward pass (32 MB); where they are more, it makes them again
KERNELS = False  # are the CUDA kernels there? (ops.py)
PLAIN = set()    # devices that the plain version serves
WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

TOKEN = "Tensor tokens, Tensor words, Tensor token_count, Tensor word_count, Tensor? temperature"
BEAT = "Tensor beats, Tensor sentences, Tensor beat_count, Tensor sentence_count, Tensor temperatures, bool over_sentences, bool mean"
torch.library.define("ecg::token_similarity", f"({TOKEN}) -> (Tensor, Tensor)")
torch.library.define("ecg::token_similarity_backward", f"(Tensor grad, {TOKEN}, Tensor best) -> (Tensor, Tensor, Tensor)")
torch.library.define("ecg::token_similarity_bf16", f"({TOKEN.rpartition(',')[0]}) -> (Tensor, Tensor)")
torch.library.define("ecg::token_similarity_backward_bf16", f"(Tensor grad, {TOKEN.rpartition(',')[0]}, Tensor best) -> (Tensor, Tensor)")
torch.library.define("ecg::beat_similarity", f"({BEAT}, SymInt keep=0) -> (Tensor, Tensor)")
torch.library.define("ecg::beat_similarity_backward", f"(Tensor grad, {BEAT}, Tensor kept) -> (Tensor, Tensor, Tensor)")
torch.library.define("ecg::beat_similarity_kernel", f"({BEAT}, SymInt block) -> Tensor")
torch.library.define("ecg::beat_similarity_backward_kernel", f"(Tensor grad, {BEAT}, SymInt block) -> (Tensor, Tensor, Tensor)")


def token_beat_rhythm(tokens=None, words=None, beats=None, sentences=None, rhythm=None, report=None, *, token_count=None,
                      word_count=None, beat_count=None, sentence_count=None, weights=(1.0, 1.0, 1.0), token_temperature=None,
                      beat_temperatures=(4.0, 5.0, 10.0), over_sentences=True, beat_mean=False, parts=False):
    """Similarity of every ECG with every text: a weighted sum of three scales, each of which may be left out.

    token: tokens (B, T, D) and words (C, W, D). Each word takes the token that suits it best or, with a token_temperature, the
        tokens' mean under the softmax of its scores; mean over the words (FILIP, Yao et al. 2022; ColBERT, Khattab & Zaharia 2020).
    beat: beats (B, K, D) and sentences (C, S, D). Each sentence attends over the beats, then cosine, then log-sum-exp over the
        sentences, or with beat_mean log-mean-exp: GLoRIA as in MELP (docs/papers.md, also on why the mean), with its three
        beat_temperatures. over_sentences=False leaves out the softmax over sentences that precedes the one over beats: FG-CLEP
        v2's tags over patches.
    rhythm: rhythm (B, D) and report (C, D): their dot product.

    token_count, beat_count (B,), word_count, sentence_count (C,): rows that are real, all where not given; where a side has none,
    the scale is 0 without gradient. weights, temperatures: numbers, or tensors that may be learned. float32 and float64 are computed as
    they are, bf16 and fp16 in float32 (on a GPU bf16 products, added in float32). Of several best tokens the first gets the gradient.
    Returns (B, C), float32 or float64; with parts=True also a dictionary of the scales, unweighted. Gradients to all tensors.
    Memory grows with B * C (and two bytes for every ECG and word, four with more than 2^15 tokens), not with
    tokens; at most 32 MB (KEEP) of the beat scale's scores are kept for the backward pass. Errors: TypeError,
    ValueError."""
    found = {}
    if given("token", tokens, words, "tokens (B, T, D)", "words (C, W, D)", 3):
        x, y = (tokens.contiguous(), words.contiguous()) if suits_kernel(tokens, words, token_temperature) else alike(tokens, words)
        warm = None if token_temperature is None else torch.as_tensor(token_temperature, dtype=x.dtype, device=x.device)
        counts = counts_of(token_count, x, "token_count"), counts_of(word_count, y, "word_count")
        with full_precision(x):
            found["token"] = torch.ops.ecg.token_similarity(x, y, *counts, warm)[0]
    if given("beat", beats, sentences, "beats (B, K, D)", "sentences (C, S, D)", 3):
        x, y = alike(beats, sentences)
        attention, sharpness, scale = (torch.as_tensor(t, dtype=x.dtype, device=x.device) for t in beat_temperatures)
        counts = counts_of(beat_count, x, "beat_count"), counts_of(sentence_count, y, "sentence_count")
        both = torch.stack([attention, sharpness])
        with full_precision(x):
            found["beat"] = scale * torch.ops.ecg.beat_similarity(x, y, *counts, both, over_sentences, beat_mean, to_keep(x, y))[0]
    if given("rhythm", rhythm, report, "rhythm (B, D)", "report (C, D)", 2):
        x, y = alike(rhythm, report)
        with full_precision(x):
            found["rhythm"] = x @ y.T
    if not found:
        raise ValueError("token_beat_rhythm: no scale is given; give tokens and words, beats and sentences, or rhythm and report")
    if len({part.shape for part in found.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(part.shape)}" for name, part in found.items())
        raise ValueError(f"token_beat_rhythm: the scales differ in the number of ECGs or texts: {shapes}")
    total = sum(weight * found[name] for name, weight in zip(("token", "beat", "rhythm"), weights) if name in found)
    return (total, found) if parts else total


def given(scale, ecg, text, ecg_name, text_name, dims):
    """Is a scale there, and of the right shape?"""
    if ecg is None and text is None:
        return False
    if ecg is None or text is None:
        raise ValueError(f"token_beat_rhythm: the {scale} scale needs {ecg_name} and {text_name}; one is missing")
    if ecg.dim() != dims or text.dim() != dims or ecg.shape[-1] != text.shape[-1] or ecg.device != text.device:
        raise ValueError(f"token_beat_rhythm: the {scale} scale needs {ecg_name} and {text_name} on one device; they are "
                         f"{tuple(ecg.shape)} on {ecg.device} and {tuple(text.shape)} on {text.device}")
    if not (ecg.is_floating_point() and text.is_floating_point()):
        raise TypeError(f"token_beat_rhythm: the {scale} scale needs floating-point tensors, not {ecg.dtype} and {text.dtype}")
    return True


def full_precision(x):
    """No autocast: at scale 100 the three digits of bf16 are not enough."""
    return torch.autocast(x.device.type, enabled=False)


def suits_beat_kernel(beats, sentences, over_sentences):
    """Can beat_similarity_cuda.cu take them? What an ECG has with the longest text must fit into 48 KB."""
    k, s = beats.shape[1], sentences.shape[1]
    return KERNELS and beats.dtype == torch.float32 and k <= 64 and s <= 128 and (3 if over_sentences else 1) * k * s <= 4800


def suits_kernel(tokens, words, temperature):
    """Can similarity_cuda.cu take them?"""
    half = tokens.dtype == words.dtype == torch.bfloat16
    fits = tokens.shape[2] % 8 == 0 and tokens.shape[1] <= 2**15
    return KERNELS and tokens.is_cuda and half and temperature is None and fits


def to_keep(beats, sentences):
    """Scores of an ECG that beat_similarity shall keep for its backward pass: all, if there will be one and they are few."""
    texts, most = sentences.shape[:2]
    numbers = beats.shape[1] * ((texts + 7) * most + 32)  # texts and columns are filled up to whole vectors
    wanted = torch.is_grad_enabled() and beats.device.type not in PLAIN and (beats.requires_grad or sentences.requires_grad)
    return numbers if wanted and len(beats) * numbers <= KEEP else 0


def alike(x, y):
    """Both float32, or float64 if one is; contiguous."""
    dtype = torch.float64 if torch.float64 in (x.dtype, y.dtype) else torch.float32
    return x.to(dtype).contiguous(), y.to(dtype).contiguous()


def counts_of(count, rows, name):
    """Real rows of each of rows (R, N, D), (R,) int64."""
    if count is None:
        return torch.full((len(rows),), rows.shape[1], device=rows.device)
    if count.shape != rows.shape[:1] or count.is_floating_point():
        raise ValueError(f"token_beat_rhythm: {name} is {count.dtype} {tuple(count.shape)}; it must be whole numbers ({len(rows)},)")
    return cut(count.to(rows.device, torch.int64), rows)


def cut(count, rows):
    """No fewer than none, and no more than rows (R, N, D) has."""
    return count.clamp(0, rows.shape[1])


# ---- definitions ------------------------------------------------------------------------------------------------------

def mask(count, length):
    """(R,) -> (R, length) bool: which rows are real. Where none is, all: the result is set to 0 later, and nothing is NaN."""
    return (torch.arange(length, device=count.device) < count[:, None]) | (count == 0)[:, None]


def tokens_by_words(tokens, words, token_count, word_count, temperature=None):
    """tokens (B, T, D), words (C, W, D) -> similarity (B, C); and which token each word took (B, C, W), or with a temperature None:
    each takes the softmax-pooled token."""
    scores = torch.einsum("btd,cwd->bcwt", tokens, words)
    hidden, best = ~mask(token_count, tokens.shape[1])[:, None, None], None
    if temperature is None:
        taken, best = scores.masked_fill(hidden, -torch.inf).max(-1)
    else:
        taken = ((scores / temperature).masked_fill(hidden, -torch.inf).softmax(-1) * scores).sum(-1)
    return torch.where(pairs(words, token_count, word_count), taken, 0).sum(-1) / word_count.clamp(min=1), best


def pairs(words, token_count, word_count):
    """(B, C, W) bool: is there a word, and a token for it?"""
    return (mask(word_count, words.shape[1]) & (word_count > 0)[:, None])[None] & (token_count > 0)[:, None, None]


def beats_by_sentences(beats, sentences, beat_count, sentence_count, temperatures, over_sentences=True, mean=False):
    """beats (B, K, D), sentences (C, S, D), temperatures (2,) -> (B, C). x = <beat, sentence>; p = softmax of x over the sentences;
    a = softmax of temperatures[0] p over the beats; v = sum of a beat; log sum exp(temperatures[1] cos(v, sentence))."""
    x = torch.einsum("bkd,csd->bcks", beats, sentences)
    real_beat = mask(beat_count, beats.shape[1])[:, None, :, None]
    real = mask(sentence_count, sentences.shape[1])[None]                                  # (1, C, S)
    p = x.masked_fill(~real[:, :, None], -torch.inf).softmax(3) if over_sentences else x
    a = (temperatures[0] * p).masked_fill(~real_beat, -torch.inf).softmax(2)               # (B, C, K, S)
    square = (a * torch.einsum("bkl,bcls->bcks", beats @ beats.mT, a)).sum(2)              # |v|^2 = a' G a, G the beats' Gram matrix
    lengths = (square.clamp(min=1e-30).sqrt() * sentences.norm(dim=-1)).clamp(min=1e-8)
    cosine = (a * x).sum(2) / lengths                                                      # (B, C, S)
    total = (temperatures[1] * cosine).masked_fill(~real, -torch.inf).logsumexp(2)
    if mean:
        total = total - sentence_count.clamp(min=1).to(total.dtype).log()
    return torch.where((beat_count > 0)[:, None] & (sentence_count > 0), total, 0)


# ---- the plain version, some ECGs at a time ---------------------------------------------------------------------------

def blocks(ecgs, size_of_one):
    """Slices of ECGs whose intermediate tensors stay small."""
    size = max(1, BLOCK // max(1, size_of_one))
    return [slice(start, start + size) for start in range(0, len(ecgs), size)]


def fitting(x, y, x_count, y_count, temperatures, numbers, grad=None):
    """The counts, cut to the rows that there are. ValueError, as in checks.h, where tensors do not fit: PyTorch
    would broadcast them to a wrong result."""
    fit = x.dim() == y.dim() == 3 and x.shape[2] == y.shape[2] and x.dtype == y.dtype
    for count, rows in ((x_count, x), (y_count, y)):
        fit = fit and count.shape == rows.shape[:1] and count.dtype in WHOLE
    fit = fit and (temperatures is None or temperatures.numel() == numbers)
    if not fit or (grad is not None and grad.shape != (len(x), len(y))):
        tensors = x, y, x_count, y_count, temperatures, grad
        found = [t if t is None else (t.dtype, *t.shape) for t in tensors]
        raise ValueError(f"similarity: sides, counts, temperatures ({numbers}), gradient do not fit: {found}")
    return cut(x_count, x), cut(y_count, y)


def token_forward(tokens, words, token_count, word_count, temperature):
    if tokens.dtype == torch.bfloat16:
        return torch.ops.ecg.token_similarity_bf16(tokens, words, token_count, word_count)
    token_count, word_count = fitting(tokens, words, token_count, word_count, temperature, 1)
    similarity = tokens.new_zeros(len(tokens), len(words))
    best = tokens.new_zeros(shape_of_best(tokens, words, temperature), dtype=type_of_best(tokens))
    if tokens.shape[1] and words.numel():
        for b in blocks(tokens, tokens.shape[1] * words.shape[0] * words.shape[1]):
            similarity[b], took = tokens_by_words(tokens[b], words, token_count[b], word_count, temperature)
            if took is not None:
                best[b] = took
    return similarity, best


def token_backward(grad, tokens, words, token_count, word_count, temperature, best):
    if tokens.dtype == torch.bfloat16:
        found = torch.ops.ecg.token_similarity_backward_bf16(grad, tokens, words, token_count, word_count, best)
        return *found, grad.new_zeros(())
    token_count, word_count = fitting(tokens, words, token_count, word_count, temperature, 1, grad)
    if best.shape != shape_of_best(tokens, words, temperature):
        raise ValueError(f"token_similarity: best is {tuple(best.shape)}; it must be (B, C, W), or (0,)")
    if temperature is not None:
        def similarity(*arguments):
            return tokens_by_words(*arguments)[0]
        return backward(similarity, grad, tokens, words, token_count, word_count, temperature)
    of_tokens, of_words, dim = torch.zeros_like(tokens), torch.zeros_like(words), words.shape[2]
    share = (grad / word_count.clamp(min=1))[:, :, None]
    factor = torch.where(pairs(words, token_count, word_count), share, 0).flatten(1)[:, :, None]           # (B, C * W, 1)
    for b in blocks(tokens, words.numel()) if tokens.shape[1] else ():
        took = best[b].long().flatten(1)[:, :, None].expand(-1, -1, dim)                                   # (b, C * W, D)
        of_tokens[b] = of_tokens[b].scatter_add(1, took, factor[b] * words.flatten(0, 1))
        of_words += (factor[b] * tokens[b].gather(1, took)).sum(0).view_as(words)
    return of_tokens, of_words, tokens.new_zeros(())


def beat_forward(beats, sentences, beat_count, sentence_count, temperatures, over_sentences, mean, keep=0):
    if suits_beat_kernel(beats, sentences, over_sentences):
        similarity = torch.ops.ecg.beat_similarity_kernel(beats, sentences, beat_count, sentence_count, temperatures, over_sentences,
                                                          mean, BLOCK)
        return similarity, beats.new_empty(len(beats), keep)
    beat_count, sentence_count = fitting(beats, sentences, beat_count, sentence_count, temperatures, 2)
    similarity = beats.new_zeros(len(beats), len(sentences))
    if beats.shape[1] and sentences.numel():
        for b in blocks(beats, beats.shape[1] * sentences.shape[0] * sentences.shape[1]):
            similarity[b] = beats_by_sentences(beats[b], sentences, beat_count[b], sentence_count, temperatures, over_sentences,
                                               mean)
    return similarity, beats.new_empty(len(beats), keep)


def beat_backward(grad, beats, sentences, beat_count, sentence_count, temperatures, over_sentences, mean, kept):
    if suits_beat_kernel(beats, sentences, over_sentences):
        return torch.ops.ecg.beat_similarity_backward_kernel(grad, beats, sentences, beat_count, sentence_count, temperatures,
                                                             over_sentences, mean, BLOCK)
    counts = fitting(beats, sentences, beat_count, sentence_count, temperatures, 2, grad)
    return backward(beats_by_sentences, grad, beats, sentences, *counts, temperatures, over_sentences, mean)


def backward(similarity, grad, ecgs, texts, ecg_count, text_count, temperature, *rest):
    """Gradients of similarity with respect to ECGs, texts and temperature; each block is computed again."""
    of_ecgs, of_texts, of_temperature = (torch.zeros_like(x) for x in (ecgs, texts, temperature))
    for b in blocks(ecgs, ecgs.shape[1] * texts.shape[0] * texts.shape[1]) if ecgs.shape[1] and texts.numel() else ():
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (ecgs[b], texts, temperature)]
            out = similarity(leaves[0], leaves[1], ecg_count[b], text_count, leaves[2], *rest)
            found = torch.autograd.grad(out, leaves, grad[b])
        of_ecgs[b] = found[0]
        of_texts += found[1]
        of_temperature += found[2]
    return of_ecgs, of_texts, of_temperature


def use_plain(device):
    """Let the plain version run on a device, "cpu" or "cuda"."""
    PLAIN.add(device)
    for name, function in (("token_similarity", token_forward), ("token_similarity_backward", token_backward),
                           ("beat_similarity", beat_forward), ("beat_similarity_backward", beat_backward)):
        torch.library.impl(f"ecg::{name}", device, function)


# ---- what torch.compile and autograd need -----------------------------------------------------------------------------

def shape_of_best(tokens, words, temperature):
    return (tokens.shape[0], words.shape[0], words.shape[1]) if temperature is None else (0,)


def type_of_best(tokens):
    return torch.int16 if tokens.shape[1] <= 2**15 else torch.int32


@torch.library.register_fake("ecg::token_similarity")
def _(tokens, words, ecg_count, text_count, temperature):
    dtype = torch.float32 if tokens.dtype == torch.bfloat16 else tokens.dtype
    return (tokens.new_empty(tokens.shape[0], words.shape[0], dtype=dtype),
            tokens.new_empty(shape_of_best(tokens, words, temperature), dtype=type_of_best(tokens)))


@torch.library.register_fake("ecg::token_similarity_backward")
def _(grad, tokens, words, ecg_count, text_count, temperature, best):
    return torch.empty_like(tokens), torch.empty_like(words), grad.new_empty(())


@torch.library.register_fake("ecg::beat_similarity")
def _(beats, sentences, ecg_count, text_count, temperatures, over_sentences, mean, keep=0):
    return beats.new_empty(beats.shape[0], sentences.shape[0]), beats.new_empty(beats.shape[0], keep)


@torch.library.register_fake("ecg::beat_similarity_backward")
def _(grad, beats, sentences, ecg_count, text_count, temperatures, over_sentences, mean, kept):
    return torch.empty_like(beats), torch.empty_like(sentences), beats.new_empty(2)


def keep_for_token(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def token_gradients(ctx, grad, _):
    with full_precision(grad):
        of_tokens, of_words, of_temperature = torch.ops.ecg.token_similarity_backward(grad.contiguous(), *ctx.saved_tensors)
    return of_tokens, of_words, None, None, of_temperature if ctx.needs_input_grad[4] else None


def keep_for_beat(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.flags = inputs[5:7]


def beat_gradients(ctx, grad, _):
    *inputs, kept = ctx.saved_tensors
    with full_precision(grad):
        found = torch.ops.ecg.beat_similarity_backward(grad.contiguous(), *inputs, *ctx.flags, kept)
    of_beats, of_sentences, of_temperatures = found
    return of_beats, of_sentences, None, None, of_temperatures, None, None, None


torch.library.register_autograd("ecg::token_similarity", token_gradients, setup_context=keep_for_token)
torch.library.register_autograd("ecg::beat_similarity", beat_gradients, setup_context=keep_for_beat)
