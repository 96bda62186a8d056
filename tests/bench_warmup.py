"""MELP with and without warm-up: contrastive loss by update, docs/warmup.png. Finished runs are kept, others continued.

    python tests/bench_warmup.py ../shared/data/ptbxl
"""
import argparse
import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import bench_ptbxl
import eval as evaluation
import model as models
import train as training

RATES = (1e-3, 4e-3)  # the default, and four times that
WARMUPS = {0.1: "C0", 0.0: "C3"}


def curve(run, window=10):
    """(updates, contrastive loss as a mean over `window` updates, what the watch said) of a run folder."""
    lines = evaluation.read_log(run)
    terms = [line["terms"]["contrast"] for line in lines if "terms" in line]
    return np.arange(window, len(terms) + 1), np.convolve(terms, np.full(window, 1 / window), "valid"), \
        [line["warning"] for line in lines if "warning" in line]


def plot(curves, chance, path):
    """curves: {(lr, warm-up, seed): (updates, losses, warnings)}."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axis, rate in zip(figure.subplots(1, len(RATES), sharey=True), RATES):
        for (lr, warmup, seed), (x, y, _) in curves.items():
            if lr == rate:
                label = (f"warm-up over {warmup:.0%} of the updates" if warmup else "no warm-up") if seed == 0 else None
                axis.plot(x, y, color=WARMUPS[warmup], lw=1, label=label)
        axis.axhline(chance, color="0.6", lw=0.8, ls="--")
        axis.set(title=f"peak learning rate {rate:g}", xlabel="update")
        axis.title.set_fontsize(10)
    figure.axes[0].set_ylabel("contrastive loss (dashed: chance)")
    figure.axes[-1].legend(frameon=False)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ptbxl")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of a run")
    args = parser.parse_args()
    plan = {(lr, warmup, seed): f"warmup-{lr:g}-{warmup:g}-{seed}"
            for lr in RATES for warmup in WARMUPS for seed in range(args.seeds)}
    bench_ptbxl.train_all({name: ["--method", "melp", "--data", f"ptbxl:{Path(args.ptbxl).resolve()}", "--epochs", str(args.epochs),
                                  "--threads", str(args.threads), "--lr", str(lr), "--warmup", str(warmup), "--seed", str(seed)]
                           for (lr, warmup, seed), name in plan.items()}, args.jobs)
    curves = {key: curve(bench_ptbxl.ROOT / "runs" / name) for key, name in plan.items()}
    chance = math.log(models.METHODS["melp"][1]["batch_size"])
    print(f"chance {chance:.2f}\n\n| peak rate | warm-up | seed | loss half-way | last | the watch |\n|---|---|---|---|---|---|")
    for (lr, warmup, seed), (_, y, warnings) in curves.items():
        print(f"| {lr:g} | {warmup:g} | {seed} | {y[len(y) // 2]:.2f} | {y[-1]:.2f} | {warnings[0] if warnings else ''} |")
    plot(curves, chance, bench_ptbxl.ROOT / "docs" / "warmup.png")


if __name__ == "__main__":
    main()
