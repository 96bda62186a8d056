"""Does a run see early beats where they are? On simulated test records with some, the share of a text's weight
inside the early beats over their share of time (1: no better than chance).

    python train.py --method fgclep --align word --name word && python tests/bench_look.py runs/word
"""
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import eval as evaluation
import model as models

TEXTS = {"PVC": ["premature ventricular complex", "ventricular premature complexes", "ventricular extrasystoles"],
         "PAC": ["premature atrial complex", "atrial premature complexes", "supraventricular extrasystoles"]}


def early_beats(peaks, samples):
    """(samples,) bool: within a beat that follows the one before by less than 0.8 of the median interval."""
    intervals = np.diff(peaks)
    edges, inside = [0, *((peaks[:-1] + peaks[1:]) // 2), samples], np.zeros(samples, bool)
    for beat in 1 + np.flatnonzero(intervals < 0.8 * np.median(intervals)):
        inside[edges[beat]:edges[beat + 1]] = True
    return inside


def main():
    run = evaluation.open_run(sys.argv[1], evaluation.asking())
    store, rows = data.open_data("simulated", run.config.rate), {}
    for code, texts in TEXTS.items():
        text, ratios = run.method.encode_text(texts), []
        fits = [code in codes and "AFIB" not in codes for codes in store.records["codes"]]
        for row in np.flatnonzero(fits & (store.records["split"] == "test")):
            inside = early_beats(np.array(store.records["peaks"].iloc[row]), store.samples)
            if 0 < inside.mean() < 0.5:
                weight = models.attention_over_time(run.method, torch.from_numpy(store.ecg([row])), text)
                ratios.append(weight[:, inside].sum(1) / inside.mean())
        for name, found in zip(texts, np.array(ratios).T):
            rows[name] = {"code": code, "records": len(found), "mean": float(found.mean()),
                          "median": float(np.median(found))}
    evaluation.print_table(f"{sys.argv[1]}: weight inside early beats over their share of time", rows)


if __name__ == "__main__":
    main()
