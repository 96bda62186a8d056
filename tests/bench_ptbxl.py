"""The README's tables: train on PTB-XL folds 1-8, zero-shot on folds 9+10. Finished runs are kept: call it again to go on.

    python tests/bench_ptbxl.py ../shared/data/ptbxl              methods x seeds
    python tests/bench_ptbxl.py ../shared/data/ptbxl --ablation   parts of FG-CLEP, one seed
"""
import argparse
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import eval as evaluation

METHODS = {"etp": ["--method", "etp"], "merl": ["--method", "merl"], "fgclep": ["--method", "fgclep"]}
ABLATION = {
    "default": [],
    "whole reports, hard targets": ["--text-unit", "report", "--fn-mode", "none"],
    "whole reports": ["--text-unit", "report"],
    "coarse stage only": ["--fine-epochs", "0"],
    "recovered features unfiltered": ["--keep-share", "1e9"],
    "whole reports, text cosine as targets": ["--text-unit", "report", "--similarity", "cos"],
    "original language": ["--report-language", "original"],
}


def train(name, args, threads):
    """Train run `name`, unless it is there. Returns its seconds, from config.json to model.safetensors."""
    run = ROOT / "runs" / name
    if not (run / "model.safetensors").exists():
        start = ["--resume", str(run)] if (run / "checkpoint.pt").exists() else ["--name", name, "--threads", str(threads), *args]
        subprocess.run([sys.executable, "train.py", *start], cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return (run / "model.safetensors").stat().st_mtime - (run / "config.json").stat().st_mtime


def macro(name, prompts="descriptive"):
    """{label set: macro AUROC of folds 9+10}"""
    results = evaluation.zeroshot(ROOT / "runs" / name, ["ptbxl"], folds=[9, 10], prompts=prompts)
    return {s: r["macro"]["auroc"] for s, r in results.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ptbxl")
    parser.add_argument("--ablation", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of a run")
    args = parser.parse_args()
    data = ["--data", f"ptbxl:{Path(args.ptbxl).resolve()}"]
    if args.ablation:
        names = {title: "fgclep" if title == "default" else title.replace(", ", "-").replace(" ", "-") for title in ABLATION}
        plan = {title: [(f"bench-{names[title]}-0", [*flags, "--method", "fgclep", "--seed", "0", *data])] for title, flags in ABLATION.items()}
    else:
        plan = {title: [(f"bench-{title}-{s}", [*flags, "--seed", str(s), *data]) for s in range(args.seeds)]
                for title, flags in METHODS.items()}
    with ThreadPoolExecutor(args.jobs) as pool:
        seconds = dict(zip([name for runs in plan.values() for name, _ in runs],
                           pool.map(lambda run: train(*run, args.threads), [run for runs in plan.values() for run in runs])))
    print(f"| folds 9+10, macro AUROC, mean of {1 if args.ablation else args.seeds} seed(s) (lowest - highest) | "
          + " | ".join(s.removeprefix("ptbxl_") for s in evaluation.PTBXL) + " | minutes |")
    print("|---" * (len(evaluation.PTBXL) + 2) + "|")
    rows = {title: ([name for name, _ in runs], "descriptive") for title, runs in plan.items()}
    if args.ablation:
        rows["default, plain class names as prompts"] = rows["default"][0], "plain"
    for title, (names, prompts) in rows.items():
        scores = [macro(name, prompts) for name in names]
        cells = []
        for s in evaluation.PTBXL:
            values = [score[s] for score in scores]
            cells.append(f"{np.mean(values):.3f}" + (f" ({min(values):.3f} - {max(values):.3f})" if len(values) > 1 else ""))
        print(f"| {title} | " + " | ".join(cells) + f" | {np.mean([seconds[n] for n in names]) / 60:.1f} |")


if __name__ == "__main__":
    main()
