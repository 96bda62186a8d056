"""The tables of docs/results.md: train on PTB-XL folds 1-8, compare zero-shot on folds 9+10. Finished runs are kept, others continued: call
it again to go on.

    python tests/bench_ptbxl.py ../shared/data/ptbxl              methods x seeds
    python tests/bench_ptbxl.py ../shared/data/ptbxl --tasks zeroshot,probe
    python tests/bench_ptbxl.py ../shared/data/ptbxl --ablation   parts of FG-CLEP x seeds
    python tests/bench_ptbxl.py ../shared/data/ptbxl --methods melp,melp-rpeak,melp-cardiolm
    python tests/bench_ptbxl.py ../shared/data/ptbxl --methods fgclep,fgclep-simulated,fgclep-reports,fgclep-mixed,fgclep-init
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
HARD = ["--text-unit", "report", "--fn-mode", "none"]
ABLATION = {  # name of the runs -> flags; each but the last two adds a part of FG-CLEP to the one before
    "fgclep-coarse": [*HARD, "--fine-epochs", "0"],
    "fgclep-recovery": [*HARD, "--keep-share", "1e9"],
    "fgclep-filter": HARD,
    "fgclep-soft-reports": ["--text-unit", "report"],  # soft targets
    "fgclep": [],  # over every tag
    "fgclep-tag": ["--align", "tag"],
    "fgclep-word": ["--align", "word"],
    "fgclep-soft-coarse": ["--fine-epochs", "0"],
}
LANGUAGE_MODEL = "bench-cardiolm"
SIMULATED = ["--data", "simulated:16384", "--epochs", "8", "--fine-epochs", "4"]
VARIANTS = {"cmelt-far": ["--method", "cmelt", "--negatives", "far"],  # N3S
            "melp-rpeak": ["--method", "melp", "--beats", "rpeak"],
            "melp-cardiolm": ["--method", "melp", "--text-model", f"runs/{LANGUAGE_MODEL}"],
            "fgclep-simulated": ["--method", "fgclep", *SIMULATED],
            "fgclep-reports": ["--method", "fgclep", *SIMULATED, "--targets", "reports"],
            "fgclep-mixed": ["--method", "fgclep", "--data", "{data},simulated:16384*0.25"],
            "fgclep-init": ["--method", "fgclep", "--init", "runs/bench-fgclep-simulated-{seed}", "--init-share", "0.5"]}


def train(name, flags):
    """Train run `name` to its end, unless it is there."""
    run = ROOT / "runs" / name
    if not (run / "model.safetensors").exists():
        start = ["--resume", str(run)] if (run / "config.json").exists() else ["--name", name, *flags]
        subprocess.run([sys.executable, "train.py", *start], cwd=ROOT, check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def train_all(runs, jobs):
    """Train {name: flags}, `jobs` at a time."""
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(train, runs, runs.values()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ptbxl")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--methods", default=",".join(METHODS), help="%(default)s")
    what.add_argument("--ablation", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of a run")
    parser.add_argument("--tasks", default="zeroshot", help="of eval.py on the finished runs: zeroshot,probe,...")
    args = parser.parse_args()
    known = {**{name: ["--method", name] for name in METHODS}, **VARIANTS,
             **{name: ["--method", "fgclep", *flags] for name, flags in ABLATION.items()}}
    names = list(ABLATION) if args.ablation else args.methods.split(",")
    if unknown := [name for name in names if name not in known]:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
    plan = {name: known[name] for name in names}
    ptbxl = f"ptbxl:{Path(args.ptbxl).resolve()}"
    common = ["--data", ptbxl, "--threads", str(args.threads)]
    own = lambda flags, seed: [*common[2 * ("--data" in flags):], "--seed", str(seed),
                               *(flag.format(data=ptbxl, seed=seed) for flag in flags)]
    runs = {f"bench-{name}-{seed}": own(flags, seed) for name, flags in plan.items() for seed in range(args.seeds)}
    if "melp-cardiolm" in names:
        train(LANGUAGE_MODEL, ["--method", "cardiolm", *common])
    late = {name: flags for name, flags in runs.items() if "--init" in flags}  # they need the others
    train_all({name: flags for name, flags in runs.items() if name not in late}, args.jobs)
    train_all(late, args.jobs)
    wanted = {task: evaluation.sets_for(task, ["ptbxl"]) for task in args.tasks.split(",")}
    evaluation.compare([ROOT / "runs" / name for name in runs], wanted, folds=[9, 10],
                       data=[ptbxl], device="cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    main()
