"""Training speed: records/s of whole updates (batch in memory -> optimiser step), median of several, on this machine.

    python tests/bench_train.py [--size small|paper] [--threads 2]
"""
import argparse
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import model as models

WITH_ECGS = [name for name in models.METHODS if name != "cardiolm"]
REPORT = ["sinus rhythm", "left axis deviation", "left anterior fascicular block", "possible left ventricular hypertrophy"]


def speed(name, size, device, updates=7, batch_size=64):
    """(records/s, parameters in millions) of a method at its small or paper size; the text model is the small BERT in both."""
    text = dict(text_model="", text_trainable_layers=-1, text_max_length=128)
    if "text_pooling" in models.METHODS[name][0].settings:
        text["text_pooling"] = "mean"
    config = models.configure(name, size, batch_size=batch_size, **(text if size == "paper" else {}))
    method = models.build_method(config, models.small_text_model([models.join(REPORT)] * 4, steps=1)).to(device).train()
    tags = [REPORT[:1 + i % 4] + [f"finding {i % 29}"] for i in range(config.batch_size)]
    if name == "cmelt":
        texts = sorted({models.join(one) for one in tags})
        method.far = models.FarTexts(texts, torch.randn(len(texts), 512, device=device))
    batch = models.Batch(torch.randn(config.batch_size, 12, method.samples, device=device), tags, tags, [""] * len(tags),
                         torch.full((len(tags), 1), -1, dtype=torch.int32, device=device))
    optimiser = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-4)
    seconds = []
    for _ in range(updates + 2):
        start = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = sum(method(batch).values())
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        loss.item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return config.batch_size / statistics.median(seconds[2:]), sum(p.numel() for p in method.parameters()) / 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("small", "paper"), nargs="+", default=["small", "paper"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.processor() or platform.machine()}, {args.threads} threads"
    print(f"{name}, torch {torch.__version__}\n\n| method | size | parameters | records/s |\n|---|---|---|---|")
    for method in WITH_ECGS:
        for size in args.size:
            rate, parameters = speed(method, size, device)
            print(f"| {method} | {size} | {parameters:.1f} M | {rate:.0f} |")


if __name__ == "__main__":
    main()
