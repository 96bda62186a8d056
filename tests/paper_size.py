"""Every method at its published size on this machine: python tests/paper_size.py   (two updates of eight records each)

On a GPU, some hundred updates: python tests/paper_size.py --batch-size 64 --records 2000 --epochs 12. The text models have the published shapes and random weights (nothing is downloaded), the records are simulated. Prints a table."""
import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data
import model as models

# --method -> further flags; FG-CLEP v2 has lead-time patches of two seconds
PLAN = {"etp": [], "merl": [], "merl vit": ["--encoder", "vit_tiny"], "cmelt": [], "melp": [], "fgclep": [],
        "fgclep v2": ["--align", "tag", "--encoder", "leadvit_base", "--patch", "200"]}


def save_text_models(folder):
    """BERT-base and the encoder of Flan-T5-base, untrained, with a tokenizer of the simulator's words."""
    from transformers import BertConfig, BertModel, T5Config, T5EncoderModel
    tags = data.report_tags(data.open_data("simulated:64", 500))
    tokenizer = models.word_tokenizer([models.join(tag) for tag in tags])
    bert = BertModel(BertConfig(vocab_size=30522))
    t5 = T5EncoderModel(T5Config(vocab_size=32128, d_model=768, d_kv=64, d_ff=2048, num_layers=12, num_heads=12,
                                 feed_forward_proj="gated-gelu", is_encoder_decoder=False))
    for name, lm in (("bert", bert), ("t5", t5)):
        lm.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--records", type=int, default=24, help="simulated; four fifths of them are trained on")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--method", nargs="+", default=list(PLAN))
    args = parser.parse_args()
    rows = ["| method | million parameters | trained | records/s | GB, resident | GB on the GPU | loss, first and last |", "|---" * 7 + "|"]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        save_text_models(folder)
        for name in args.method:
            method = name.split()[0]
            flags = ["--method", method, "--preset", "paper", "--text-model", str(folder / ("t5" if method == "cmelt" else "bert")),
                     "--data", f"simulated:{args.records}", "--batch-size", str(args.batch_size), "--name", name.replace(" ", "-"),
                     "--epochs", str(args.epochs)]
            flags += ["--fine-epochs", "0"] * (method == "fgclep") + ["--rate", "100"] * (method == "etp") + PLAN[name]
            process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *flags], cwd=folder, stdout=subprocess.DEVNULL)
            _, status, usage = os.wait4(process.pid, 0)
            if status:
                sys.exit(f"{name} failed")
            run = folder / "runs" / name.replace(" ", "-")
            facts = json.loads((run / "training.json").read_text())
            losses = [line["loss"] for line in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if "loss" in line]
            rows.append(f"| {name} | {facts['parameters'] / 1e6:.1f} | {facts['trained_parameters'] / 1e6:.1f} | "
                        f"{facts['records_per_second']:.2f} | {usage.ru_maxrss / 2**20:.1f} | {facts['peak_memory_gb'] or '-'} | "
                        f"{losses[0]:.3f}, {losses[-1]:.3f} |")
            print(rows[-1], flush=True)
    print("\n".join(rows))


if __name__ == "__main__":
    main()
