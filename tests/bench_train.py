"""Training speed: records/s of whole updates as train.py does them (batch in memory -> optimiser step), median
of several, and peak memory beyond model and batch, on this machine. Text models have their published shapes,
with random weights.

    python tests/bench_train.py [--method merl] [--size small|paper] [--batch-size 64] [--compile] [--profile]
    MALLOC_MMAP_THRESHOLD_=65536 python tests/bench_train.py --method merl --size paper --threads 1 \\
        --batch-size 256 --chunk 16     # and 16 alone, and 16 --accumulate 16; the variable makes memory exact
"""
import argparse
import itertools
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import model as models
import train

WITH_ECGS = [name for name in models.METHODS if name != "cardiolm"]
REPORT = ["sinus rhythm", "left axis deviation", "left anterior fascicular block", "possible left ventricular hypertrophy"]


def text_model(config, size):
    if size == "small":
        return models.small_text_model([models.join(REPORT)] * 4, steps=1)
    from transformers import BertConfig, BertModel, T5Config, T5EncoderModel
    lm = BertModel(BertConfig()) if config.method != "cmelt" else T5EncoderModel(T5Config(
        d_model=768, d_ff=2048, num_layers=12, num_heads=12, feed_forward_proj="gated-gelu", is_encoder_decoder=False))
    return lm, models.word_tokenizer([models.join(REPORT)] * 4)


def prepare(name, size, device, batch_size, compiled, **settings):
    """One update of a method as a function without arguments, its config and its parameters in millions."""
    config = models.configure(name, size, **settings, **(dict(batch_size=batch_size) if batch_size else {}))
    method = models.build_method(config, text_model(config, size)).to(device).train()
    tags = [REPORT[:1 + i % 4] + [f"finding {i % 29}"] for i in range(config.batch_size)]
    if name == "cmelt":
        texts = sorted({models.join(one) for one in tags})
        method.far = models.FarTexts(texts, torch.randn(len(texts), 512, device=device))
    ecg = (300 * torch.randn(config.batch_size, 12, method.samples)).short()
    batch = models.Batch(ecg, tags, tags, [""] * len(tags), torch.full((len(tags), 1), -1, dtype=torch.int32))
    drawn = train.RawBatch(batch, torch.zeros(ecg.shape[:2], dtype=torch.bool), torch.ones(len(ecg), dtype=torch.long))
    if device.type == "cuda":
        drawn = drawn._replace(batch=batch._replace(ecg=ecg.pin_memory()))
    if compiled:
        method.compile_encoder()
    if method.text.frozen:
        method.text.cache(batch.texts)
    optimiser, batches, stop = train.make_optimiser(method, config), itertools.repeat(drawn), train.Stop()
    stop.asked = 0
    update = lambda: train.do_update(method, optimiser, batches, config, device, stop)
    return update, config, sum(p.numel() for p in method.parameters()) / 1e6


def timed(update, device, count):
    """Seconds of an update, some times over: mean of as many as do not wait for one another."""
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        for _ in range(train.LOG_EVERY[device.type]):
            update()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start) / train.LOG_EVERY[device.type])
    return seconds


class Peak:
    """Most memory since it was made, in GB, beyond what there was: of the GPU, or of this process (Linux)."""

    def __init__(self, device):
        self.gpu = device.type == "cuda"
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
        elif Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")
        self.start = self.now()

    def now(self):
        if self.gpu:
            return torch.cuda.max_memory_allocated() / 1e9
        lines = Path("/proc/self/status").read_text().splitlines() if Path("/proc/self/status").exists() else []
        return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith("VmHWM")), float("nan"))

    def beyond(self):
        return self.now() - self.start


def profile(update):
    """What an update spends its time on: the operators by their own time, then by time on the CPU."""
    kinds = torch.profiler.ProfilerActivity
    kinds = [kinds.CPU, kinds.CUDA] if torch.cuda.is_available() else [kinds.CPU]
    with torch.profiler.profile(activities=kinds) as found:
        for _ in range(3):
            update()
    averages = found.key_averages()
    for order in ["self_cuda_time_total"] * torch.cuda.is_available() + ["self_cpu_time_total"]:
        print(averages.table(sort_by=order, row_limit=16, max_name_column_width=70))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", nargs="+", default=WITH_ECGS)
    parser.add_argument("--size", choices=("small", "paper"), nargs="+", default=["small", "paper"])
    parser.add_argument("--batch-size", type=int, help="instead of the method's own")
    parser.add_argument("--chunk", type=int, default=0)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    name = torch.cuda.get_device_name() if gpu else f"{platform.processor() or platform.machine()}, {args.threads} threads"
    print(f"{name}, torch {torch.__version__}{', compiled' * args.compile}\n\n"
          "| method | size | batch | parameters | records/s | peak, GB |\n|---|---|---|---|---|---|")
    for method in args.method:
        for size in args.size:
            update, config, parameters = prepare(method, size, device, args.batch_size, args.compile,
                                                 chunk=args.chunk, accumulate=args.accumulate)
            peak = Peak(device)
            timed(update, device, 2)
            rate = config.batch_size * config.accumulate / statistics.median(timed(update, device, 3))
            print(f"| {method} | {size} | {config.batch_size} | {parameters:.1f} M | {rate:,.1f} | "
                  f"{peak.beyond():.2f} |", flush=True)
            if args.profile:
                profile(update)
            del update


if __name__ == "__main__":
    main()
