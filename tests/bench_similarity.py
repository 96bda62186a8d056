"""token_beat_rhythm against what it replaces, forward and backward: time on the CPU's threads, and memory.

    python tests/bench_similarity.py [--memory]     --memory: the table over batch sizes, some minutes; on a GPU also its kernels
"""
import platform
import subprocess
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import csrc
from csrc import similarity as plain
from bench_beats import gpu_seconds, print_table, seconds

GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(*shape, generator=GENERATOR, requires_grad=True)


# ---- what it replaces -------------------------------------------------------------------------------------------------

def text_by_text(beats, sentences, counts, temperatures=(4.0, 5.0, 10.0)):
    """GLoRIA's similarity as MELP's code does it, step by step: a loop over texts, each repeated for all ECGs, softmaxes over flattened
    copies, cosine by sums. -> (B, C)"""
    records, beats_of_one, dim = beats.shape
    columns = []
    for text, count in zip(sentences, counts.tolist()):
        query = text[:count].T[None].repeat(records, 1, 1)                                 # (B, D, S)
        context = beats.transpose(1, 2).contiguous()                                       # (B, D, K)
        scores = torch.bmm(context.transpose(1, 2).contiguous(), query)                    # (B, K, S)
        over_sentences = scores.view(-1, count).softmax(-1).view(records, beats_of_one, count)
        flat = over_sentences.transpose(1, 2).contiguous().view(-1, beats_of_one)
        share = (flat * temperatures[0]).softmax(-1).view(records, count, beats_of_one)
        attended = torch.bmm(context, share.transpose(1, 2).contiguous())                  # (B, D, S)
        x = query.transpose(1, 2).contiguous().view(-1, dim)
        y = attended.transpose(1, 2).contiguous().view(-1, dim)
        cosine = (x * y).sum(1) / (x.norm(2, 1) * y.norm(2, 1)).clamp(min=1e-8)
        columns.append((cosine.view(records, count) * temperatures[1]).exp().sum(1, keepdim=True).log())
    return temperatures[2] * torch.cat(columns, 1)


def all_at_once(tokens, words, counts):
    """Late interaction with the whole tensor: (B, C, T, W)."""
    best = torch.einsum("btd,cwd->bctw", tokens, words).amax(2)            # (B, C, W)
    real = torch.arange(words.shape[1]) < counts[:, None]
    return (best * real).sum(2) / counts


# ---- tables -----------------------------------------------------------------------------------------------------------

def contrast(similarity):
    """A contrastive loss of (B, B)."""
    target = torch.arange(len(similarity), device=similarity.device)
    return F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)


def there_and_back(similarity, *leaves):
    """One forward and backward pass."""
    return lambda: torch.autograd.grad(contrast(similarity(*leaves)), leaves)


def row(name, new, old, bare, rounds):
    (new, old, bare) = seconds([new, old, bare], rounds) * 1e3
    return name, f"{old:.0f}", f"{new:.1f}", f"{old / new:.1f}", f"{bare:.1f}", f"{new / bare:.2f}"


def speed():
    beats, sentences, counts = normal(128, 12, 256), normal(128, 6, 256), torch.randint(1, 7, (128,), generator=GENERATOR)
    packed = torch.cat([s[:n] for s, n in zip(sentences, counts)]).detach()

    def products():  # scores and two gradients
        rows = beats.detach().view(-1, 256)
        scores = rows @ packed.T
        scores @ packed, scores.T @ rows
    rows = [row("beat, B = C = 128, 12 beats, 1-6 sentences, D = 256",
                there_and_back(lambda x, y: csrc.token_beat_rhythm(beats=x, sentences=y, sentence_count=counts), beats, sentences),
                there_and_back(lambda x, y: text_by_text(x, y, counts), beats, sentences), products, 9)]
    tokens, words, counts = normal(64, 128, 256), normal(64, 64, 256), torch.full((64,), 64)

    def product():  # scores once; gradients need none
        return tokens.detach().view(-1, 256) @ words.detach().view(-1, 256).T
    rows.append(row("token, B = C = 64, T = 128, W = 64, D = 256",
                    there_and_back(lambda x, y: csrc.token_beat_rhythm(tokens=x, words=y), tokens, words),
                    there_and_back(lambda x, y: all_at_once(x, y, counts), tokens, words), product, 5))
    print_table((f"forward + backward, {torch.get_num_threads()} threads", "replaced, ms", "ours, ms", "times faster",
                 "its matrix products, ms", "ours / those"), rows)


def peak():
    """Largest resident memory of this process, MB."""
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024


def memory_of(kind, batch):
    """Peak memory (MB) of one forward and backward pass of all three scales beyond its inputs and their gradients, in this process."""
    tokens, words, beats, sentences = (normal(batch, rows, 256) for rows in (128, 64, 12, 6))
    rhythm, report, counts = normal(batch, 256), normal(batch, 256), torch.full((batch,), 6)
    leaves = tokens, words, beats, sentences, rhythm, report
    for leaf in leaves:
        leaf.grad = torch.zeros_like(leaf)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here (Linux)
    start = peak()
    if kind == "ours":
        out = csrc.token_beat_rhythm(*leaves)
    else:
        out = all_at_once(tokens, words, torch.full((batch,), 64)) + text_by_text(beats, sentences, counts) + rhythm @ report.T
    contrast(out).backward()
    return peak() - start


def memory():
    """Each figure in a process of its own: its peak must not be that of another."""
    def measure(kind, batch):
        code = f"import bench_similarity as b; b.memory_of({kind!r}, 16); print(b.memory_of({kind!r}, {batch}))"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tests", capture_output=True, text=True, check=True)
        return float(done.stdout.split()[-1])
    rows = []
    for batch in (32, 64, 128, 256, 512, 1024):
        mine = measure("ours", batch)
        replaced = f"{measure('replaced', batch):.0f}" if batch <= 256 else "-"
        rows.append((f"{batch}", f"{mine:.0f}", f"{mine * 2**20 / batch**2:.0f}", replaced))
    print_table(("all three scales, B = C (T 128, W 64, K 12, S 6, D 256)", "ours, MB", "bytes a pair", "replaced, MB"), rows)


def gpu_memory_of(call):
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - start) / 2**20


def gpu():
    """The token scale in bf16 on the GPU: forward against the bare product, forward + backward against eager and torch.compile."""
    batch, length, most, dim = 512, 64, 32, 128
    tokens, words = (torch.randn(batch, n, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True) for n in (length, most))
    x, y = tokens.detach().view(-1, dim), words.detach().view(-1, dim)
    ours = lambda t, w: csrc.token_beat_rhythm(tokens=t, words=w)
    eager = lambda t, w: torch.einsum("btd,cwd->bctw", t, w).amax(2).float().mean(2)
    compiled = torch.compile(eager)
    rows, work = [], 2 * batch * length * batch * most * dim * 1e-9
    with torch.no_grad():
        for name, call in (("torch.matmul of the same product", lambda: x @ y.T), ("ours, forward", lambda: ours(tokens, words)),
                           ("eager, forward", lambda: eager(tokens, words)), ("torch.compile, forward", lambda: compiled(tokens, words))):
            ms = gpu_seconds([call])[0] * 1e3
            rows.append((name, f"{ms:.2f}", f"{work / ms:,.0f}", f"{gpu_memory_of(call):,.0f}"))
    for name, similarity in (("ours", ours), ("eager", eager), ("torch.compile", compiled)):
        call = there_and_back(similarity, tokens, words)
        rows.append((f"{name}, forward + backward", f"{gpu_seconds([call])[0] * 1e3:.2f}", "", f"{gpu_memory_of(call):,.0f}"))
    print_table((f"{torch.cuda.get_device_name()}, token scale, B = C = 512, T = 64, W = 32, D = 128, bf16", "ms", "TFLOP/s", "MB"), rows)


def gpu_beats():
    """The beat scale in float32 on the GPU, forward + backward: the kernels, the plain version in blocks, its definition compiled."""
    rows = []
    for batch, beats, most, over_sentences in ((512, 12, 6, True), (128, 63, 20, False)):
        x, y = (torch.randn(batch, n, 256, device="cuda", requires_grad=True) for n in (beats, most))
        counts = torch.full((batch,), beats).cuda(), torch.randint(1, most + 1, (batch,), generator=GENERATOR).cuda()
        rest = *counts, torch.tensor([4.0, 5.0], device="cuda"), over_sentences, False
        ours, compiled = lambda u, v: torch.ops.ecg.beat_similarity(u, v, *rest)[0], torch.compile(plain.beats_by_sentences)
        for name, similarity, kernels in (("the kernels", ours, True), ("plain, in blocks", ours, False),
                                          ("torch.compile", lambda u, v: compiled(u, v, *rest), False)):
            with mock.patch.object(plain, "KERNELS", kernels):
                call = there_and_back(similarity, x, y)
                rows.append((f"{name}: B = C = {batch}, K = {beats}, S = 1-{most}", f"{gpu_seconds([call])[0] * 1e3:.2f}",
                             f"{gpu_memory_of(call):,.0f}"))
    print_table((f"{torch.cuda.get_device_name()}, beat scale, D = 256, float32, forward + backward", "ms", "MB"), rows)


def gpu_sigmoid():
    """The sigmoid loss of bf16 vectors on the GPU, forward + backward: with all pairs at once, ours, and the package siglip-kernel."""
    batch, dim = 16384, 512
    x, y = (F.normalize(torch.randn(batch, dim, device="cuda"), dim=1).bfloat16().requires_grad_() for _ in range(2))
    warmth, bias = (torch.tensor(v, device="cuda", requires_grad=True) for v in (2.3, -10.0))

    def eager(x, y, warmth, bias):
        return F.binary_cross_entropy_with_logits((x @ y.T).float() * warmth.exp() + bias, torch.eye(batch, device="cuda"))
    losses = {"all pairs at once": eager, "ours": lambda x, y, warmth, bias: csrc.sigmoid_loss(x, y, warmth.exp(), bias)}
    try:
        import siglip_kernel
        losses["siglip-kernel"] = lambda *leaves: siglip_kernel.fused_siglip_loss(*leaves) / batch  # it is a mean over rows
    except ImportError:
        print("siglip-kernel is not installed (pip install siglip-kernel): no row for it")
    rows, leaves = [], (x, y, warmth, bias)
    for name, loss in losses.items():
        call = lambda: torch.autograd.grad(loss(*leaves), leaves)
        rows.append((name, f"{gpu_seconds([call])[0] * 1e3:.2f}", f"{gpu_memory_of(call):,.0f}", f"{loss(*leaves).item() * batch:.4f}"))
    print_table((f"{torch.cuda.get_device_name()}, sigmoid loss, B = 16,384, D = 512, bf16, forward + backward", "ms", "MB",
                 "loss, mean over rows"), rows)


def main():
    print(f"{platform.processor() or platform.machine()}, PyTorch {torch.__version__}, csrc {csrc.build_info()['implementation']}")
    if "--gpu" not in sys.argv:
        speed()
    if torch.cuda.is_available():
        gpu()
        gpu_beats()
        gpu_sigmoid()
    if "--memory" in sys.argv[1:]:
        memory()


if __name__ == "__main__":
    main()
