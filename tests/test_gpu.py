"""What only a GPU can show: the same loss and the same R peaks as on the CPU, bf16 training, torch.compile, resuming. Skipped without
CUDA."""
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import csrc
import eval as evaluation
import model as models
import test_similarity
import train
from csrc import sigmoid, similarity
from test_csrc import RATES, random_batch, real, recordings, strips  # noqa: F401 (a fixture)
from test_model import (CHUNKED, NOTHING_RANDOM, test_chunks_give_the_gradients_of_all_at_once as compare_chunks, toy_batch,
                        toy_method)
from test_train import (SMALL, TINY, test_a_mixed_run_recovers_for_real_records_only,  # noqa: F401 (here on a GPU)
                        test_a_run_is_drawn_towards_its_start_and_resumes, tiny_store)  # noqa: F401 (a fixture)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("name, options", [("etp", {}), ("merl", {}), ("fgclep", {}), ("fgclep", {"align": "tag"}),
                                           ("fgclep", {"align": "word"}), ("melp", {}), ("melp", {"beats": "rpeak"}),
                                           ("cmelt", NOTHING_RANDOM)])
def test_loss_and_gradients_are_those_of_the_cpu(monkeypatch, name, options):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    batch, losses, grads = toy_batch(), [], []
    for device in ("cpu", "cuda"):
        method = toy_method(name, **options).to(device)
        loss = sum(method(batch._replace(ecg=batch.ecg.to(device), peaks=batch.peaks.to(device))).values())
        loss.backward()
        losses.append(loss.item())
        grads.append({n: p.grad.cpu() for n, p in method.named_parameters() if p.grad is not None})
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    top = max(g.abs().max() for g in grads[0].values())
    for n, g in grads[0].items():
        assert (g - grads[1][n]).abs().max() < 2e-3 * top, (n, ((g - grads[1][n]).abs().max() / top).item())


@pytest.mark.parametrize("name, options", CHUNKED)
def test_chunks_give_the_gradients_of_all_at_once(name, options):
    compare_chunks(name, options, 3, "cuda")


@pytest.mark.parametrize("flags", [[], ["--targets", "truth"], ["--compile"], ["--accumulate", "2"], ["--precision", "float32"],
                                   ["--method", "merl", "--workers", "2"], ["--method", "etp", "--compile"],
                                   ["--method", "merl", "--chunk", "6"], ["--method", "melp", "--recompute"]])
def test_training_runs_to_its_table(tiny_store, tmp_path, monkeypatch, flags):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    train.main(["--name", "gpu", "--data", f"store:{tiny_store}", *TINY, *flags,
                *["--fine-epochs", "1"] * ("--method" not in flags), *["--targets", "reports"] * (not {"--method", "--targets"} & {*flags})])
    assert (tmp_path / "runs/gpu/results.json").exists()
    log = [json.loads(line) for line in open(tmp_path / "runs/gpu/log.jsonl")]
    assert [line["update"] for line in log if "terms" in line] == list(range(1, log[-1]["update"] + 1))


def test_a_run_is_stopped_and_resumed(tiny_store, tmp_path, monkeypatch):  # noqa: F811
    """The weights that a whole run ends with, but for the order of sums on a GPU."""
    monkeypatch.chdir(tmp_path)
    args = ["--method", "etp", "--data", f"store:{tiny_store}", *TINY, "--precision", "float32", "--lr", "1e-4"]
    train.main([*args, "--name", "whole"])
    asked = []
    monkeypatch.setattr(train.Stop, "anywhere", lambda self: asked.append(0) or len(asked) > 7)
    train.main([*args, "--name", "part"])
    assert torch.load(tmp_path / "runs/part/checkpoint.pt")["update"] == 7
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    train.main(["--resume", "runs/part"])
    a, b = (load_file(tmp_path / f"runs/{name}/model.safetensors") for name in ("whole", "part"))
    assert all((a[k].float() - b[k].float()).abs().max() < 1e-3 for k in a)


@pytest.mark.parametrize("method", ["cmelt", "melp"])
def test_the_methods_with_transformers_train_in_bf16(tiny_store, tmp_path, monkeypatch, method):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    train.main(["--name", "gpu", "--method", method, "--data", f"store:{tiny_store}", *(SMALL if method == "cmelt" else TINY)])
    assert (tmp_path / "runs/gpu/results.json").exists()
    if method == "melp":
        evaluation.main(["--generate", "--beams", "2", "--run", "runs/gpu"])
        assert (tmp_path / "runs/gpu/reports.jsonl").exists()


def assert_same_beats(ecg, fs):
    ecg = torch.as_tensor(np.ascontiguousarray(ecg))
    cpu, gpu = csrc.segment_beats(ecg, fs), csrc.segment_beats(ecg.cuda(), fs)
    assert torch.equal(cpu[0], gpu[0].cpu()) and torch.equal(cpu[1], gpu[1].cpu())
    tokens = csrc.beat_of_token(*cpu, 63, ecg.shape[2]), csrc.beat_of_token(*gpu, 63, ecg.shape[2])
    assert torch.equal(tokens[0], tokens[1].cpu())


def test_csrc_was_built_for_this_gpu():
    assert csrc.build_info()["implementation"] == "compiled" and csrc.build_info()["cuda"]


@pytest.mark.parametrize("fs", RATES)
def test_peaks_are_those_of_the_cpu(strips, fs):  # noqa: F811
    assert_same_beats(strips[fs], fs)
    assert_same_beats(strips[fs].repeat(50, axis=0), fs)
    assert_same_beats(np.nan_to_num(1000 * strips[fs], nan=-32768).clip(-32768, 32767).astype(np.int16), fs)


def test_peaks_are_those_of_the_cpu_on_anything():
    for seed in range(300):
        assert_same_beats(*random_batch(np.random.default_rng(seed)))


@real
@pytest.mark.parametrize("pattern", ["ludb/data/*.hea", "cpsc2018/*.hea", "csn/*.hea", "georgia/*.hea", "ptbxl/records*/*/*.hea"])
def test_peaks_are_those_of_the_cpu_on_recordings(pattern):
    for ecg, fs in recordings(pattern):
        assert_same_beats(ecg[None], fs)


def test_operators_in_a_compiled_graph(strips):  # noqa: F811
    def beats(ecg, tokens):
        peaks, _ = csrc.segment_beats(ecg, 500)
        return models.pool_beats(tokens, peaks, ecg.shape[2])[0]
    ecg, tokens = torch.as_tensor(strips[500]).cuda(), torch.randn(8, 313, 32, device="cuda", requires_grad=True)
    eager, compiled = beats(ecg, tokens), torch.compile(beats, fullgraph=True)(ecg, tokens)
    assert torch.allclose(eager, compiled, atol=1e-5)
    compiled.sum().backward()
    assert tokens.grad.abs().sum() > 0
    torch.library.opcheck(torch.ops.ecg.segment_beats.default, (ecg, 500.0))


@pytest.mark.parametrize("case", test_similarity.CASES)
def test_similarity_is_that_of_the_cpu(case):
    sizes = dict(records=12, texts=11, dim=256, tokens=40, words=30, beats=12, sentences=6)
    data = test_similarity.ragged(torch.float32, **sizes)
    moved = {scale: tuple(x.detach().cuda().requires_grad_(x.requires_grad) for x in side) for scale, side in data.items()}
    results = []
    for where in (data, moved):
        similarity, _, leaves = test_similarity.operator_and_definition(*case, where)
        leaves = tuple(x.to(where[case[0]][0].device).detach().requires_grad_() for x in leaves)
        out = similarity(*leaves)
        results.append([x.cpu() for x in (out, *torch.autograd.grad(out.sum(), leaves))])
    for cpu, gpu in zip(*results):
        assert (cpu - gpu).abs().max() < 1e-4 * cpu.abs().max()


@pytest.mark.parametrize("sizes", [(2, 3, 64, 32, 32), (3, 5, 70, 33, 40), (1, 2, 9, 300, 16), (33, 129, 313, 48, 256), (64, 70, 5, 2, 8)])
def test_token_similarity_in_bf16(sizes):
    records, texts, length, most, dim = sizes
    g = torch.Generator().manual_seed(sum(sizes))
    leaves = [torch.randn(*shape, generator=g).bfloat16() for shape in ((records, length, dim), (texts, most, dim))]
    counts = dict(token_count=torch.randint(0, length + 1, (records,), generator=g), word_count=torch.randint(0, most + 1, (texts,), generator=g))
    seed, results = torch.randn(records, texts, generator=g), []
    for device in ("cpu", "cuda"):
        tokens, words = (x.to(device).requires_grad_() for x in leaves)
        out = csrc.token_beat_rhythm(tokens=tokens, words=words, **{k: v.to(device) for k, v in counts.items()})
        results.append([x.float().cpu() for x in (out, *torch.autograd.grad(out, (tokens, words), seed.to(device)))])
    assert (results[0][0] - results[1][0]).abs().max() < 1e-4 * results[0][0].abs().max()
    for cpu, gpu in zip(results[0][1:], results[1][1:]):
        assert (cpu - gpu).abs().mean() < 1e-2 * cpu.abs().mean()  # where two tokens are equally good, either may be taken


@pytest.mark.parametrize("flags", [(s, m) for s in (True, False) for m in (False, True)])
@pytest.mark.parametrize("sizes", [{}, dict(sentences=1, beats=1), dict(records=150, texts=130, dim=256, beats=12, sentences=6),
                                   dict(records=40, texts=50, dim=256, beats=63, sentences=20),
                                   dict(records=9, texts=20, dim=64, beats=12, sentences=128)])
def test_beat_similarity_by_kernels(monkeypatch, sizes, flags):
    """That of the CPU, the same twice, also in blocks; a NaN shows. The plain version is not there to help."""
    data = test_similarity.ragged(torch.float32, **sizes)["beat"]
    x, y, *counts = (v.detach().cuda() for v in data)
    warm, seed = torch.tensor([4.0, 5.0]), torch.randn(len(x), len(y), generator=torch.Generator().manual_seed(0))

    def run(x, y, *counts):
        leaves = x.detach().requires_grad_(), y.detach().requires_grad_(), warm.to(x.device).requires_grad_()
        out = torch.ops.ecg.beat_similarity(*leaves[:2], *counts, leaves[2], *flags)[0]
        return out, *torch.autograd.grad(out, leaves, seed.to(x.device))
    expected = run(*data)
    monkeypatch.setattr(similarity, "beats_by_sentences", None)
    once, twice = run(x, y, *counts), run(x, y, *counts)
    monkeypatch.setattr(similarity, "BLOCK", 2**16)
    for cpu, gpu, again, in_blocks in zip(expected, once, twice, run(x, y, *counts)):
        assert torch.equal(gpu, again)
        assert all((cpu - g.cpu()).abs().max() < 3e-4 * cpu.abs().max() for g in (gpu, in_blocks))
    x[0, 0, 1] = torch.nan
    out = run(x, y, *counts)[0]
    assert out[0, counts[1] > 0].isnan().all() and out[1:].isfinite().all()


def test_beat_similarity_in_a_graph():
    data = tuple(x.detach().cuda() for x in test_similarity.ragged(torch.float32)["beat"])
    warm = torch.tensor([4.0, 5.0], device="cuda")
    leaves = *(x.requires_grad_() for x in data[:2]), *data[2:], warm.requires_grad_()
    torch.library.opcheck(torch.ops.ecg.beat_similarity.default, (*leaves, True, False))
    similarity_of = lambda x, y: csrc.token_beat_rhythm(beats=x, sentences=y, beat_count=data[2], sentence_count=data[3])
    assert torch.allclose(torch.compile(similarity_of, fullgraph=True)(*leaves[:2]), similarity_of(*leaves[:2]), atol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("size, dim", [(1, 8), (301, 64), (1024, 256)])
def test_sigmoid_loss_is_that_of_the_cpu(monkeypatch, size, dim, dtype, tolerance):
    """Also in blocks, and the same twice."""
    g = torch.Generator().manual_seed(size)
    leaves = [torch.randn(size, dim, generator=g).to(dtype) / dim**0.5 for _ in range(2)] + [torch.tensor(3.0), torch.tensor(-2.0)]
    positive = torch.arange(size) % 5 != 1

    def run(device):
        moved = [v.to(device).requires_grad_() for v in leaves]
        loss = csrc.sigmoid_loss(*moved, positive.to(device))
        return [v.float().cpu() for v in (loss, *torch.autograd.grad(loss, moved))]
    expected, once, twice = run("cpu"), run("cuda"), run("cuda")
    monkeypatch.setitem(sigmoid.PAIRS, "cuda", 100 * size)
    for cpu, gpu, again, in_blocks in zip(expected, once, twice, run("cuda")):
        assert torch.equal(gpu, again)
        assert all((cpu - v).abs().max() <= tolerance * cpu.abs().max() for v in (gpu, in_blocks))
