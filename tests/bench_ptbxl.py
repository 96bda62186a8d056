"""The README's tables: train on PTB-XL folds 1-8, compare zero-shot on folds 9+10. Finished runs are kept, others continued: call
it again to go on.

    python tests/bench_ptbxl.py ../shared/data/ptbxl              methods x seeds
    python tests/bench_ptbxl.py ../shared/data/ptbxl --ablation   parts of FG-CLEP x seeds
"""
import argparse
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import eval as evaluation
import model as models

METHODS = [name for name in models.METHODS if name != "cardiolm"]
ABLATION = {
    "default": [],
    "whole reports, hard targets": ["--text-unit", "report", "--fn-mode", "none"],
    "whole reports": ["--text-unit", "report"],
    "coarse stage only": ["--fine-epochs", "0"],
    "recovered features unfiltered": ["--keep-share", "1e9"],
    "whole reports, text cosine as targets": ["--text-unit", "report", "--similarity", "cos"],
    "original language": ["--report-language", "original"],
}


def train(name, flags):
    """Train run `name` to its end, unless it is there."""
    run = ROOT / "runs" / name
    if not (run / "model.safetensors").exists():
        start = ["--resume", str(run)] if (run / "config.json").exists() else ["--name", name, *flags]
        subprocess.run([sys.executable, "train.py", *start], cwd=ROOT, check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ptbxl")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--methods", default=",".join(METHODS), help="%(default)s")
    what.add_argument("--ablation", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of a run")
    args = parser.parse_args()
    plan = {name: ["--method", name] for name in args.methods.split(",")}
    if not plan.keys() <= models.METHODS.keys():
        parser.error(f"unknown method in {args.methods}; methods: {', '.join(models.METHODS)}")
    if args.ablation:
        plan = {"fgclep" if title == "default" else title.replace(", ", "-").replace(" ", "-"): ["--method", "fgclep", *flags]
                for title, flags in ABLATION.items()}
    common = ["--data", f"ptbxl:{Path(args.ptbxl).resolve()}", "--threads", str(args.threads)]
    runs = {f"bench-{name}-{seed}": [*flags, "--seed", str(seed), *common]
            for name, flags in plan.items() for seed in range(args.seeds)}
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(train, runs, runs.values()))
    evaluation.compare([ROOT / "runs" / name for name in runs], ["ptbxl"], folds=[9, 10],
                       device="cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    main()
