"""csrc.token_beat_rhythm: the definition to the last digits, gradients, ragged and empty sides, PyTorch's checks, the authors' values."""
import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import csrc
from conftest import GOLDEN, ROOT, python
from csrc import build
from csrc import similarity as plain
from test_csrc import compiled, compiler, on_host

OPS = torch.ops.ecg
PROCESSOR = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []  # what it can do


def draw(*shape, dtype=torch.float64, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed + sum(shape))
    return (scale * torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype).requires_grad_()


def ragged(dtype=torch.float64, records=5, texts=4, dim=8, tokens=7, words=6, beats=5, sentences=4):
    """Sides of every length from none to all: {scale: (ECGs, texts, ECG counts, text counts)}."""
    count = lambda n, most: torch.tensor([most, 1, 0, *range(2, most)] * n)[:n]
    side = lambda n, most: draw(n, most, dim, dtype=dtype)
    return {"token": (side(records, tokens), side(texts, words), count(records, tokens), count(texts, words)),
            "beat": (side(records, beats), side(texts, sentences), count(records, beats), count(texts, sentences))}


def scalar(*values, dtype=torch.float64):
    return torch.tensor(values if len(values) > 1 else values[0], dtype=dtype, requires_grad=True)


CASES = [("token", None, ()), ("token", 0.7, ())] + [("beat", (4.0, 5.0), (s, m)) for s in (True, False) for m in (False, True)]


def operator_and_definition(scale, temperature, flags, data):
    """(operator, definition, differentiable inputs) as functions of these inputs."""
    ecgs, texts, ecg_count, text_count = data[scale]
    warm = () if temperature is None else (scalar(*np.atleast_1d(temperature), dtype=ecgs.dtype),)
    if scale == "token":
        fast = lambda x, y, t=None: OPS.token_similarity(x, y, ecg_count, text_count, t)[0]
        slow = lambda x, y, t=None: plain.tokens_by_words(x, y, ecg_count, text_count, t)[0]
    else:
        fast = lambda x, y, t: OPS.beat_similarity(x, y, ecg_count, text_count, t, *flags)[0]
        slow = lambda x, y, t: plain.beats_by_sentences(x, y, ecg_count, text_count, t, *flags)
    return fast, slow, (ecgs, texts, *warm)


def difference(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


# ---- the definition ---------------------------------------------------------------------------------------------------

def test_the_definition_by_hand():
    """Loops over pairs, words and sentences, as one would write it on paper."""
    data = ragged()
    tokens, words, tc, wc = (x.detach() for x in data["token"])
    beats, sentences, bc, sc = (x.detach() for x in data["beat"])
    rhythm, report = draw(5, 3).detach(), draw(4, 3).detach()
    for mean in (False, True):
        for temperature in (None, 0.7):
            total, parts = csrc.token_beat_rhythm(
                tokens, words, beats, sentences, rhythm, report, token_count=tc, word_count=wc, beat_count=bc, sentence_count=sc,
                weights=(2, 3, 4), token_temperature=temperature, beat_mean=mean, parts=True)
            for b in range(5):
                for c in range(4):
                    scores = tokens[b, :tc[b]] @ words[c, :wc[c]].T                        # (T, W)
                    token = torch.tensor(0.0)
                    if scores.numel():
                        taken = scores.amax(0) if temperature is None else ((scores / temperature).softmax(0) * scores).sum(0)
                        token = taken.mean()
                    x, y = beats[b, :bc[b]], sentences[c, :sc[c]]
                    beat = torch.tensor(0.0)
                    if len(x) and len(y):
                        share = (4 * (x @ y.T).softmax(1)).softmax(0)                      # (K, S)
                        e = (5 * F.cosine_similarity(share.T @ x, y)).exp()
                        beat = 10 * (e.mean() if mean else e.sum()).log()
                    assert torch.allclose(parts["token"][b, c], token.to(torch.float64), atol=1e-12)
                    assert torch.allclose(parts["beat"][b, c], beat.to(torch.float64), atol=1e-12)
            assert torch.allclose(parts["rhythm"], rhythm @ report.T)
            assert torch.allclose(total, 2 * parts["token"] + 3 * parts["beat"] + 4 * parts["rhythm"])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sizes", [
    {}, dict(records=1, texts=1), dict(words=1, sentences=1, beats=1, tokens=1), dict(records=3, texts=9, dim=33, words=40),
    dict(records=9, texts=40, sentences=9, beats=13, words=70, tokens=21)])
def test_forward_and_gradients_are_those_of_the_definition(case, sizes):
    fast, slow, leaves = operator_and_definition(*case, ragged(**sizes))
    ours, theirs = fast(*leaves), slow(*leaves)
    assert torch.isfinite(ours).all() and (ours - theirs).abs().max() < 1e-10
    seed = draw(*ours.shape).detach()
    for a, b in zip(torch.autograd.grad(ours, leaves, seed), torch.autograd.grad(theirs, leaves, seed)):
        assert torch.isfinite(a).all() and (a - b).abs().max() < 1e-10


@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case):
    fast, _, leaves = operator_and_definition(*case, ragged())
    assert torch.autograd.gradcheck(fast, leaves)


@pytest.mark.parametrize("case", CASES)
def test_float32_is_within_1e5(case):
    sizes = dict(records=12, texts=11, dim=256, tokens=40, words=30, beats=12, sentences=6)
    single, double = ragged(torch.float32, **sizes), ragged(**sizes)
    fast, _, leaves = operator_and_definition(*case, single)
    _, slow, exact = operator_and_definition(*case, double)
    ours, theirs = fast(*leaves), slow(*exact)
    assert difference(ours, theirs) < 1e-5
    for a, b in zip(torch.autograd.grad(ours.sum(), leaves), torch.autograd.grad(theirs.sum(), exact)):
        assert difference(a, b) < 1e-4


def test_bf16_is_within_1e2_and_gradients_keep_the_type():
    x, y = draw(6, 20, 64, dtype=torch.bfloat16, scale=0.3), draw(5, 9, 64, dtype=torch.bfloat16, scale=0.3)
    u, v = draw(6, 7, 64, dtype=torch.bfloat16, scale=0.3), draw(5, 4, 64, dtype=torch.bfloat16, scale=0.3)
    ours = csrc.token_beat_rhythm(x, y, u, v)
    exact = csrc.token_beat_rhythm(*(t.detach().double() for t in (x, y, u, v)))
    assert ours.dtype == torch.float32 and difference(ours, exact) < 1e-2
    ours.sum().backward()
    assert all(t.grad.dtype == torch.bfloat16 and t.grad.abs().sum() > 0 for t in (x, y, u, v))


@pytest.mark.parametrize("run", ["operator", "plain"])
@pytest.mark.parametrize("length", [2**15, 2**15 + 1, 2**16 + 1])
def test_any_number_of_tokens(length, run):
    """The best token of each word is the last, or the one before 2^15 or 2^16, and gets the gradient."""
    tokens, words = torch.zeros(1, length, 2), torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    tokens[0, -1, 0], tokens[0, min(length, 2**16) - 2, 1] = 2.0, 3.0
    whole = torch.tensor([length]), torch.tensor([2])
    if run == "operator":
        tokens.requires_grad_(), words.requires_grad_()
        similarity, best = OPS.token_similarity(tokens, words, *whole, None)
        of_tokens, of_words = torch.autograd.grad(similarity, (tokens, words), torch.ones(1, 1))
    else:
        similarity, best = plain.token_forward(tokens, words, *whole, None)
        of_tokens, of_words, _ = plain.token_backward(torch.ones(1, 1), tokens, words, *whole, None, best)
    assert similarity.item() == 2.5 and best.tolist() == [[[length - 1, min(length, 2**16) - 2]]]
    assert best.dtype == (torch.int16 if length <= 2**15 else torch.int32)
    expected = torch.zeros(1, length, 2)
    expected[0, -1, 0] = expected[0, min(length, 2**16) - 2, 1] = 0.5
    assert torch.equal(of_tokens, expected)
    assert torch.equal(of_words, torch.tensor([[[1.0, 0.0], [0.0, 1.5]]]))
    inputs = tokens, words, *whole, None
    torch.library.opcheck(OPS.token_similarity.default, inputs, test_utils="test_faketensor")


def test_learned_temperatures_and_weights_get_gradients():
    data, learned = ragged(), [scalar(v) for v in (0.7, 4.0, 5.0, 10.0)]
    weights = scalar(1.0, 2.0, 3.0)
    def similarity(warm, attention, sharpness, scale, weights):
        tokens, words, tc, wc = data["token"]
        beats, sentences, bc, sc = data["beat"]
        return csrc.token_beat_rhythm(
            tokens, words, beats, sentences, draw(5, 3).detach(), draw(4, 3).detach(), token_count=tc, word_count=wc, beat_count=bc,
            sentence_count=sc, weights=weights, token_temperature=warm, beat_temperatures=(attention, sharpness, scale))
    assert torch.autograd.gradcheck(similarity, (*learned, weights))


def test_mean_is_sum_less_the_logarithm_of_the_number_of_sentences():
    beats, sentences, count = draw(5, 6, 8), draw(4, 3, 8), torch.tensor([3, 1, 2, 3])
    both = [csrc.token_beat_rhythm(beats=beats, sentences=sentences, sentence_count=count, beat_mean=m) for m in (False, True)]
    assert torch.allclose(both[0] - both[1], 10 * count.double().log().expand(5, -1))  # docs/papers.md, MELP


@pytest.mark.parametrize("kind", ["unit", "soft"])
@pytest.mark.parametrize("aggregation", ["sum", "mean"])
def test_melp_beat_loss_of_the_authors(kind, aggregation):
    golden = np.load(GOLDEN / "melp_beat_loss.npz")
    counts = torch.tensor(golden["counts"])
    beats, flat = (torch.tensor(golden[f"{kind}_{name}"], requires_grad=True) for name in ("beats", "sents"))
    sentences = torch.nn.utils.rnn.pad_sequence(flat.split(counts.tolist()), batch_first=True)
    similarity = csrc.token_beat_rhythm(beats=beats, sentences=sentences, sentence_count=counts, beat_mean=aggregation == "mean")
    target = torch.arange(len(counts))
    loss = (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2
    loss.backward()
    for name, ours in dict(similarity=similarity, loss=loss, grad_beats=beats.grad, grad_sents=flat.grad).items():
        assert difference(ours.detach(), torch.tensor(golden[f"{kind}_{aggregation}_{name}"])) < 1e-4, name


# ---- sides that are empty or absent -----------------------------------------------------------------------------------

def test_empty_batches_and_sides():
    for b, c, n, m in ((0, 3, 4, 5), (3, 0, 4, 5), (3, 2, 0, 5), (3, 2, 4, 0)):
        x, y = draw(b, n, 8), draw(c, m, 8)
        for scales in (dict(tokens=x, words=y), dict(beats=x, sentences=y), dict(tokens=x, words=y, token_temperature=0.5)):
            out = csrc.token_beat_rhythm(**scales)
            assert out.shape == (b, c) and not out.any()
            assert all(not g.any() for g in torch.autograd.grad(out.sum(), (x, y)))


@pytest.mark.parametrize("where", [0, 3])
def test_nan_is_not_lost(where):
    """A tower that gives NaN must show in the loss."""
    x, y = draw(3, 5, 8).detach(), draw(2, 4, 8).detach()
    x[1, where, 2] = torch.nan
    for scales in (dict(tokens=x, words=y), dict(tokens=x, words=y, token_temperature=0.5), dict(beats=x, sentences=y)):
        out = csrc.token_beat_rhythm(**scales)
        assert out[1].isnan().all() and out[[0, 2]].isfinite().all()


def test_rows_beyond_the_counts_do_not_matter():
    data = ragged()
    for case in CASES:
        fast, _, leaves = operator_and_definition(*case, data)
        before = fast(*leaves)
        ecgs, texts, ecg_count, text_count = data[case[0]]
        x, y = (torch.where((torch.arange(t.shape[1]) < n[:, None])[:, :, None], t, 1e6)
                for t, n in ((ecgs, ecg_count), (texts, text_count)))
        assert torch.equal(fast(x.detach(), y.detach(), *leaves[2:]), before)


@pytest.mark.parametrize("arguments, error, words", [
    (dict(), ValueError, "no scale is given"),
    (dict(tokens=draw(2, 3, 4)), ValueError, r"the token scale needs tokens \(B, T, D\) and words \(C, W, D\); one is missing"),
    (dict(tokens=draw(2, 3, 4), words=draw(2, 3, 5)), ValueError, "on one device; they are"),
    (dict(rhythm=draw(2, 3, 4), report=draw(2, 3, 4)), ValueError, "the rhythm scale needs"),
    (dict(tokens=torch.ones(2, 3, 4, dtype=torch.int64), words=draw(2, 3, 4)), TypeError, "floating-point"),
    (dict(tokens=draw(2, 3, 4), words=draw(2, 3, 4), word_count=torch.tensor([1, 2, 3])), ValueError, "word_count is"),
    (dict(tokens=draw(2, 3, 4), words=draw(2, 3, 4), rhythm=draw(3, 4), report=draw(2, 4)), ValueError, r"\(2, 2\), rhythm \(3, 2\)"),
])
def test_bad_input_is_explained(arguments, error, words):
    with pytest.raises(error, match=words):
        csrc.token_beat_rhythm(**arguments)


# ---- PyTorch ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype):
    data = ragged(dtype)
    for warm in (None, scalar(0.7, dtype=dtype)):
        torch.library.opcheck(OPS.token_similarity.default, (*data["token"], warm))
    warm = scalar(4.0, 5.0, dtype=dtype)
    torch.library.opcheck(OPS.beat_similarity.default, (*data["beat"], warm, True, False))
    x, y = data["beat"][:2]
    full = (x, y, plain.counts_of(None, x, ""), plain.counts_of(None, y, ""))
    if plain.to_keep(x, y):
        columns = 8 * y.shape[1]  # one group of 4 texts, filled up to 8: what is kept is compared, too, and must have no gaps
        torch.library.opcheck(OPS.beat_similarity.default, (*full, warm, True, False, x.shape[1] * columns))


@compiled
@pytest.mark.parametrize("flags", [(s, m) for s in (True, False) for m in (False, True)])
def test_kept_scores_are_those_made_again(flags):
    """Also where texts make up several groups, and ECGs several blocks and threads."""
    sides = ragged(torch.float32, records=70, texts=150, dim=20, beats=13, sentences=7)["beat"]
    keep, seed, results = plain.to_keep(*sides[:2]), draw(70, 150, dtype=torch.float32).detach(), []
    assert keep >= 13 * 150 * 7
    for room in (0, keep):
        for threads in (1, 3):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            similarity = OPS.beat_similarity(*sides, scalar(4.0, 5.0, dtype=torch.float32), *flags, room)[0]
            results.append((similarity, *torch.autograd.grad(similarity, sides[:2], seed)))
            torch.set_num_threads(before)
    exact = plain.beats_by_sentences(*(x.double() for x in sides[:2]), *sides[2:], scalar(4.0, 5.0), *flags)
    results.append((exact, *torch.autograd.grad(exact, sides[:2], seed.double())))
    assert all(torch.equal(a, b) for i in (0, 1) for a, b in zip(results[i], results[i + 2]))
    assert all(difference(a.double(), b) < 1e-5 for a, b in zip(results[0], results[-1]))
    assert all(difference(a.double(), b) < 1e-5 for a, b in zip(results[1], results[-1]))


def test_only_so_many_scores_are_kept(monkeypatch):
    x, y = draw(4, 6, 8), draw(3, 2, 8)
    keep = plain.to_keep(x, y)
    assert (keep == 0 if "cpu" in plain.PLAIN else keep >= 6 * 3 * 2) and plain.to_keep(x.detach(), y.detach()) == 0
    with torch.no_grad():
        assert plain.to_keep(x, y) == 0
    monkeypatch.setattr(plain, "KEEP", 4 * keep - 1)
    assert plain.to_keep(x, y) == 0


def test_torch_compile_keeps_one_graph():
    leaves = draw(4, 9, 8), draw(3, 5, 8), draw(4, 6, 8), draw(3, 2, 8), draw(4, 8), draw(3, 8)
    loss = lambda *x: csrc.token_beat_rhythm(*x).square().sum()
    eager = torch.autograd.grad(loss(*leaves), leaves)
    graph = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    assert all(torch.allclose(a, b) for a, b in zip(eager, graph))


def test_autocast_does_not_touch_it():
    x, y, u, v, r, s = (draw(*shape, dtype=torch.float32) for shape in ((4, 9, 8), (3, 5, 8), (4, 6, 8), (3, 2, 8), (4, 8), (3, 8)))
    expected = csrc.token_beat_rhythm(x, y, u, v, r, s)
    gradients = torch.autograd.grad(expected.sum(), (x, y, u, v))
    with torch.autocast("cpu", torch.bfloat16):
        similarity = csrc.token_beat_rhythm(x, y, u, v, r, s)
        assert torch.equal(similarity, expected)
        assert all(map(torch.equal, torch.autograd.grad(similarity.sum(), (x, y, u, v)), gradients))


@compiled
def test_the_plain_version_in_blocks_is_the_same(monkeypatch):
    """What runs on a GPU, and without a compiler."""
    monkeypatch.setattr(plain, "BLOCK", 100)
    data = ragged()
    for scale, temperature, flags in CASES:
        fast, _, leaves = operator_and_definition(scale, temperature, flags, data)
        ours = fast(*leaves)
        seed = draw(*ours.shape).detach()
        expected = torch.autograd.grad(ours, leaves, seed)
        ecgs, texts, ecg_count, text_count = (t.detach() for t in data[scale])
        warm = leaves[2].detach() if len(leaves) == 3 else None
        if scale == "token":
            found, best = plain.token_forward(ecgs, texts, ecg_count, text_count, warm)
            gradients = plain.token_backward(seed, ecgs, texts, ecg_count, text_count, warm, best)
        else:
            found, kept = plain.beat_forward(ecgs, texts, ecg_count, text_count, warm, *flags, 0)
            gradients = plain.beat_backward(seed, ecgs, texts, ecg_count, text_count, warm, *flags, kept)
        assert torch.allclose(found, ours, atol=1e-12)
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(gradients, expected))


@compiled
@pytest.mark.skipif("avx512f" not in PROCESSOR or "avx2" not in PROCESSOR, reason="the version for AVX2 is the one that runs, or none")
def test_the_version_for_avx2(tmp_path):
    """A library serves every processor, and this one takes the version for AVX-512. What others take is built on its own, and held against
    the definition by the tests above."""
    for folder in ("csrc", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    recipe = tmp_path / "csrc" / "build.py"
    recipe.write_text(recipe.read_text().replace("CFLAGS = [", 'CFLAGS = ["-DEVERY_CPU=", "-march=x86-64-v3", ', 1))
    chosen = "by_hand or those_of_the_definition or within_1e5 or nan_is_not_lost or made_again"
    result = subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/test_similarity.py", "-k", chosen], cwd=tmp_path, text=True,
                            capture_output=True, env={**os.environ, "ECG_CACHE": str(tmp_path / "cache"), "ECG_CSRC": ""})
    assert result.returncode == 0 and "skipped" not in result.stdout, result.stdout + result.stderr
    [library] = (tmp_path / "cache").rglob("ecg_csrc.so")
    assert "-march=x86-64-v3" in build.recipe_of(library)["flags"]


def test_without_a_compiler_it_runs_as_well():
    code = ("import csrc, torch; x = torch.ones(2, 3, 4, requires_grad=True); "
            "csrc.token_beat_rhythm(x, x, x, x, x[:, 0], x[:, 0]).sum().backward(); "
            "print(x.grad.shape, csrc.build_info()['implementation'])")
    result = python(code, ECG_CSRC="reference")
    assert result.stdout.strip() == "torch.Size([2, 3, 4]) reference", result.stderr


@compiled
def test_memory_grows_with_pairs_only():
    """Forward and backward allocate less than a quarter of the tensor of scores (PyTorch's own account of CPU memory)."""
    x, y = draw(64, 128, 64, dtype=torch.float32), draw(64, 64, 64, dtype=torch.float32)
    whole = 4 * 64 * 64 * 128 * 64                                                           # bytes: 134 MB
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        csrc.token_beat_rhythm(tokens=x, words=y).sum().backward()
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages())
    assert allocated < whole / 4


# ---- whoever calls an operator directly --------------------------------------------------------------------

FUZZ = """
import faulthandler, random, resource, sys, torch
import csrc.ops
faulthandler.enable()
if sys.argv[1:]:
    torch.ops.load_library(sys.argv[1])
here = int(open("/proc/self/status").read().split("VmSize:")[1].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (here + 2**32, here + 2**32))  # what takes more is refused, not begun
r, x = random.Random(0), torch.rand
whole = lambda *values: torch.tensor(values)
sides = lambda: [x(3, 5, 8), x(2, 4, 8), whole(5, 0, 3), whole(4, 2)]
token = lambda: [*sides(), r.choice([None, torch.tensor(0.5)])]
beat = lambda: [*sides(), x(2), True, False]
half = lambda: [v.bfloat16() if v.is_floating_point() else v for v in sides()]
peaks = lambda: [whole([100, 300, 420], [10, -1, -1]).int(), whole(3, 1).int()]
GOOD = {
    "segment_beats": lambda: [x(2, 3, 1500), 500.0],
    "beat_of_token": lambda: [*peaks(), 10, 500],
    "token_similarity": token,
    "token_similarity_backward": lambda: [x(3, 2), *token(), torch.zeros(3, 2, 4, dtype=torch.int16)],
    "token_similarity_bf16": half,
    "token_similarity_backward_bf16": lambda: [x(3, 2), *half(), torch.zeros(3, 2, 4, dtype=torch.int16)],
    "beat_similarity": lambda: [*beat(), r.choice([0, 5 * (9 * 4 + 32)])],
    "beat_similarity_backward": lambda: [x(3, 2), *beat(), x(3, r.choice([0, 5 * (9 * 4 + 32)]))],
    "beat_similarity_kernel": lambda: [*beat(), 50],
    "beat_similarity_backward_kernel": lambda: [x(3, 2), *beat(), 50],
    "sigmoid_loss": lambda: [x(5, 3), x(5, 3), x(2), torch.ones(5, dtype=torch.bool), True],
    "sigmoid_terms": lambda: [x(2, 5), 3, x(2), torch.ones(5, dtype=torch.bool), torch.float32],
}
WRONG = [
    lambda v: x([r.choice([0, 1, 2, 3, 5, 9]) for _ in range(r.randrange(5))]).to(v.dtype),  # of any shape
    lambda v: v.to(r.choice([torch.float64, torch.float16, torch.bfloat16, torch.complex64])),
    lambda v: v.to(r.choice([torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool])),
    lambda v: v.transpose(0, -1) if v.dim() else v,
    lambda v: torch.stack([v, v], -1)[..., 0],
    lambda v: v[:0] if v.dim() else v,
    lambda v: torch.cat([v, v]) if v.dim() else v,
    lambda v: v.narrow(-1, 0, max(0, v.shape[-1] - 1)) if v.dim() else v,
    lambda v: torch.full_like(v, r.choice([-1, 6, 99, 2**15 - 1])) if v.dtype != torch.bool else v,
    lambda v: v.to("meta"),
    lambda v: v.to_sparse(),
    lambda v: v.detach().requires_grad_() if v.is_floating_point() else v.view(v.shape + (1,)),
    lambda v: torch.empty(0, 2**40, 8),
    lambda v: torch.empty(2**33, 0, dtype=v.dtype),
]
ODD = [None, -1, 0, 1, 2**31 - 1, 2**31, 2**62, -2**63, 1.5, torch.nan, torch.inf, "", True, torch.ones(2)]
for name, good in GOOD.items():
    operator, ends = getattr(torch.ops.ecg, name), {"a result": 0, "an error": 0}
    for call in range(int(sys.argv[2]) if sys.argv[2:] else 300):
        arguments = good()
        many = r.choice([0, 1, 1, 1, 2, 3]) if call else 0
        for place in r.sample(range(len(arguments)), min(len(arguments), many)):
            old, bend = arguments[place], r.random() < 0.8
            bend = bend and isinstance(old, torch.Tensor)
            arguments[place] = r.choice(WRONG)(old) if bend else r.choice(ODD)
        try:
            operator(*arguments)
            ends["a result"] += 1
        except Exception:
            ends["an error"] += 1
            assert call or "bf16" in name or "kernel" in name or "terms" in name, name
    print(name, ends)
"""


def fuzz(*arguments):
    result = python(FUZZ, *arguments)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    return {line.split()[0]: line for line in result.stdout.splitlines()}


@compiled
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="it limits its memory as Linux does")
def test_wrong_arguments_end_in_an_error_never_in_a_crash():
    said = fuzz()
    assert len(said) == 12
    assert "'a result': 0" not in said["token_similarity"] + said["beat_similarity_backward"]


@compiled
def test_what_a_direct_call_gets_wrong_is_told():
    x, y, counts = torch.rand(3, 5, 8), torch.rand(2, 4, 8), (torch.tensor([5, 0, 3]), torch.tensor([4, 2]))
    grad, best, warm = torch.rand(3, 2), torch.zeros(3, 2, 4, dtype=torch.int16), torch.tensor([4.0, 5.0])
    token, token_back = OPS.token_similarity, OPS.token_similarity_backward
    beat_back = OPS.beat_similarity_backward
    flags, one = (True, False), torch.ones(1, dtype=torch.int32)
    for words, operator, *arguments in (
            (r"counts must be whole numbers \(B,\) and \(C,\)", token, x, y, counts[0][:2], counts[1], None),
            ("both sides must be contiguous", token, x, y.transpose(0, 1), *counts, None),
            ("of one type", token, x, y.double(), *counts, None),
            ("float32 or float64, not Half", token, x.half(), y.half(), *counts, None),
            ("1 floating-point temperatures", token, x, y, *counts, warm),
            ("grad must be contiguous", token_back, grad.T, x, y, *counts, None, best),
            ("best is 5 of 5", token_back, grad, x, y, *counts, None, best + 5),
            ("best is -1 of 5", token_back, grad, x, y, *counts, None, best - 1),
            ("best must be contiguous, Short", token_back, grad, x, y, *counts, None, best.long()),
            ("2 floating-point temperatures", OPS.beat_similarity, x, y, *counts, warm[:1], *flags),
            ("room for 7 scores", OPS.beat_similarity, x, y, *counts, warm, *flags, 7),
            ("room for 7 scores", beat_back, grad, x, y, *counts, warm, *flags, torch.rand(3, 7)),
            ("kept must be contiguous", beat_back, grad, x, y, *counts, warm, *flags, torch.rand(2, 0)),
            ("fewer than 2", OPS.beat_of_token, one[None], one, 2**31, 9)):
        with pytest.raises(RuntimeError, match=words):
            operator(*arguments)


def test_the_plain_version_broadcasts_nothing():
    x, y, grad, warm = torch.rand(3, 5, 8), torch.rand(2, 4, 8), torch.rand(3, 2), torch.tensor([4.0, 5.0])
    counts, best = (torch.tensor([5, 0, 3]), torch.tensor([4, 2])), torch.zeros(3, 2, 4, dtype=torch.int16)
    flags, kept = (True, False), torch.rand(3, 0)
    for function, *arguments in (
            (plain.token_forward, x, y, counts[0][:1], counts[1], None),
            (plain.token_forward, x, y, counts[0].float(), counts[1], None),
            (plain.token_forward, x, y, *counts, warm),
            (plain.token_forward, x, y.double(), *counts, None),
            (plain.token_backward, grad[:1], x, y, *counts, None, best),
            (plain.token_backward, grad, x, y, *counts, None, best[:, :, :1]),
            (plain.beat_forward, x, y, counts[0], counts[1][:1], warm, *flags),
            (plain.beat_forward, x, y, *counts, warm[:1], *flags),
            (plain.beat_backward, grad[:, :1], x, y, *counts, warm, *flags, kept)):
        with pytest.raises(ValueError, match="do not fit|best is"):
            function(*arguments)


@pytest.mark.parametrize("run", ["operator", "plain"])
def test_counts_that_cannot_be_are_cut_to_what_can(run):
    x, y, seed = draw(3, 5, 8).detach(), draw(2, 4, 8).detach(), torch.ones(3, 2, dtype=torch.float64)
    warm = torch.tensor([4.0, 5.0], dtype=torch.float64)
    wild = torch.tensor([99, -7, 3]), torch.tensor([5, -1])
    cut = torch.tensor([5, 0, 3]), torch.tensor([4, 0])
    token = {"operator": (OPS.token_similarity, OPS.token_similarity_backward),
             "plain": (plain.token_forward, plain.token_backward)}[run]
    beat = {"operator": (OPS.beat_similarity, OPS.beat_similarity_backward),
            "plain": (plain.beat_forward, plain.beat_backward)}[run]
    for (forward, backward), rest in ((token, (None,)), (token, (warm[0],)), (beat, (warm, True, False))):
        found = [(out, *backward(seed, x, y, *counts, *rest, kept)) for counts in (wild, cut)
                 for out, kept in [forward(x, y, *counts, *rest)]]
        assert all(map(torch.equal, *found)) and found[0][0].isfinite().all()


# ---- CUDA, without a GPU ----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """csrc/similarity_cuda.cu, run on the host."""
    return on_host("similarity_on_host.cpp", tmp_path_factory.mktemp("kernels"))


@compiler
@pytest.mark.parametrize("sizes", [(2, 3, 64, 32, 32), (3, 5, 70, 33, 40), (1, 2, 9, 300, 16), (3, 4, 130, 20, 72), (4, 70, 5, 2, 8)])
@pytest.mark.parametrize("whole", [True, False])
def test_kernels_on_the_host_are_the_definition(kernels, sizes, whole):
    records, texts, length, most, dim = sizes
    g = torch.Generator().manual_seed(sum(sizes))
    tokens, words = (torch.randn(*shape, generator=g).bfloat16() for shape in ((records, length, dim), (texts, most, dim)))
    token_count, word_count = (torch.full((n,), m) if whole else torch.randint(0, m + 1, (n,), generator=g)
                               for n, m in ((records, length), (texts, most)))
    similarity, best = torch.full((records, texts), 7.0), torch.full((records, texts, most), -5, dtype=torch.int16)
    inputs = [ctypes.c_void_p(x.data_ptr()) for x in (tokens, words, token_count, word_count)]
    outputs = [ctypes.c_void_p(x.data_ptr()) for x in (similarity, best)]
    kernels.forward(*inputs, *sizes, *outputs)
    exact = [x.double().requires_grad_() for x in (tokens, words)]
    expected, expected_best = plain.tokens_by_words(*exact, token_count, word_count)
    real = plain.pairs(words, token_count, word_count)
    assert torch.allclose(similarity.double(), expected, atol=1e-4) and torch.equal(best[real].long(), expected_best[real])
    grad, of_tokens, of_words = torch.randn(records, texts, generator=g), torch.full(tokens.shape, 9.0), torch.full(words.shape, 9.0)
    kernels.backward(ctypes.c_void_p(grad.data_ptr()), *inputs, outputs[1], *sizes, *(ctypes.c_void_p(x.data_ptr()) for x in (of_tokens, of_words)))
    for ours, theirs in zip((of_tokens, of_words), torch.autograd.grad(expected, exact, grad.double())):
        assert torch.allclose(ours.double(), theirs, atol=1e-5)


@pytest.fixture(scope="module")
def beat_operators(tmp_path_factory):
    """csrc/beat_similarity_gpu.cpp as operators for the CPU, its kernels run on the host."""
    from torch.utils import cpp_extension
    build.find_ninja()
    sources = [ROOT / "tests/beat_similarity_on_host.cpp", build.FOLDER / "beat_similarity_gpu.cpp"]
    folder = tmp_path_factory.mktemp("beat")
    cpp_extension.load("beat_on_host", list(map(str, sources)), extra_cflags=["-O1", "-pthread", "-Wno-unknown-pragmas"],
                       build_directory=str(folder), is_python_module=False)
    return folder / "beat_on_host.so"


@pytest.fixture
def by_kernels(beat_operators, monkeypatch):
    """The beat scale as on a GPU, by the kernels alone, in blocks of few scores."""
    monkeypatch.setattr(plain, "KERNELS", True)
    monkeypatch.setattr(plain, "BLOCK", 2000)
    definition = plain.beats_by_sentences
    monkeypatch.setattr(plain, "beats_by_sentences", None)
    return definition


@compiled
@pytest.mark.parametrize("flags", [(s, m) for s in (True, False) for m in (False, True)])
@pytest.mark.parametrize("sizes", [
    {}, dict(records=1, texts=1), dict(sentences=1, beats=1), dict(records=4, texts=60, dim=24, sentences=9, beats=13),
    dict(records=7, texts=8, beats=17, sentences=6), dict(records=3, texts=7, dim=32, beats=63, sentences=20),
    dict(records=2, texts=3, beats=33, sentences=48), dict(records=2, texts=3, beats=12, sentences=128)])
def test_beat_kernels_on_the_host_are_the_definition(by_kernels, sizes, flags):
    ecgs, texts, *counts = ragged(torch.float32, **sizes)["beat"]
    exact = ecgs.detach().double().requires_grad_(), texts.detach().double().requires_grad_(), scalar(4.0, 5.0)
    inputs = ecgs.detach(), texts.detach(), *counts, exact[2].detach().float(), *flags
    expected = by_kernels(*exact[:2], *counts, exact[2], *flags)
    seed = draw(*expected.shape, dtype=torch.float32).detach()
    similarity, kept = plain.beat_forward(*inputs)
    assert difference(similarity, expected) < 1e-5 and not similarity[expected == 0].any() and kept.shape == (len(ecgs), 0)
    for ours, theirs in zip(plain.beat_backward(seed, *inputs, kept), torch.autograd.grad(expected, exact, seed.double())):
        assert difference(ours, theirs) < 1e-4 and not ours[theirs == 0].any()


@compiled
def test_beat_kernels_on_the_host_take_empty_sides_and_lose_no_nan(by_kernels):
    def run(x, y):
        inputs = x, y, plain.counts_of(None, x, ""), plain.counts_of(None, y, ""), torch.tensor([4.0, 5.0]), True, False
        out, kept = plain.beat_forward(*inputs)
        return out, *plain.beat_backward(torch.ones_like(out), *inputs, kept)
    for b, c, n, m in ((0, 3, 4, 5), (3, 0, 4, 5), (3, 2, 0, 5), (3, 2, 4, 0)):
        found = run(torch.ones(b, n, 8), torch.ones(c, m, 8))
        assert [x.shape for x in found] == [(b, c), (b, n, 8), (c, m, 8), (2,)] and not any(x.any() for x in found)
    for where in (0, 3, 4):
        x, y = draw(3, 5, 8, dtype=torch.float32).detach(), draw(2, 4, 8, dtype=torch.float32).detach()
        x[1, where, 2] = torch.nan
        out = run(x, y)[0]
        assert out[1].isnan().all() and out[[0, 2]].isfinite().all()


@compiled
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="it limits its memory as Linux does")
def test_wrong_arguments_of_the_beat_kernels_end_in_an_error(beat_operators):
    said = fuzz(beat_operators, 100)
    assert "'a result': 0" not in said["beat_similarity_kernel"] + said["beat_similarity_backward_kernel"]


@compiled
def test_what_suits_the_beat_kernels_has_room_and_the_rest_is_plain(by_kernels, monkeypatch):
    counts, warm = (torch.empty(0, dtype=torch.int64), torch.tensor([1])), torch.tensor([4.0, 5.0])
    for over in (True, False):
        for k in range(1, 65):
            s = max(s for s in range(1, 130) if plain.suits_beat_kernel(torch.empty(0, k, 4), torch.empty(1, s, 4), over))
            OPS.beat_similarity_kernel(torch.empty(0, k, 4), torch.empty(1, s, 4), *counts, warm, over, False, 1)
    monkeypatch.setattr(plain, "beats_by_sentences", by_kernels)
    for beats, sentences in ((65, 2), (2, 129), (64, 33)):
        x, y, *some = ragged(torch.float32, beats=beats, sentences=sentences)["beat"]
        x, y = x.detach(), y.detach()
        inputs = x, y, *some, warm, True, False
        ours, theirs = plain.beat_forward(*inputs)[0], by_kernels(*inputs)
        assert torch.allclose(ours, theirs, atol=1e-6)
    with pytest.raises(RuntimeError, match="129 sentences in a text; beside 4 beats there is room for 128"):
        OPS.beat_similarity_kernel(torch.empty(0, 4, 4), torch.empty(1, 129, 4), *counts, warm, True, False, 1)
