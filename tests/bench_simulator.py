"""Mean beats of every finding that the simulator draws, beside those of PTB-XL's folds 1-8 (both: the median
beat of each record that has the code, mean over records), and the distance of the two.

    python tests/bench_simulator.py PTBXL_DIR [--records 4096] [--out docs]
"""
import argparse
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data

BEFORE, AFTER, RATE, LEAST = 0.3, 0.5, 100, 3  # s around the R peak; Hz; records that a mean needs
GROUPS = {"limb": range(6), "chest": range(6, 12)}


def median_beats(store, rows):
    """Each record's median beat from BEFORE the R peak to AFTER: (R, 12, n) mV, nan where there is none."""
    before, after = round(BEFORE * RATE), round(AFTER * RATE)
    found = np.full((len(rows), 12, before + after), np.nan, np.float32)
    for place, row in enumerate(rows):
        ecg, peaks = store.ecg([row])[0], store.peaks([row])[0]
        cuts = [ecg[:, p - before:p + after] for p in peaks if p >= before and p + after <= ecg.shape[1]]
        if cuts:
            beat = np.median(cuts, 0)
            found[place] = beat - np.median(beat[:, before - 9:before - 5], 1, keepdims=True)  # PR segment
    return found


def by_code(store, rows):
    """{code: (records, mean beat (12, n))}"""
    beats, codes = median_beats(store, rows), [store.records["codes"].iloc[row] for row in rows]
    places = {code: [i for i, of in enumerate(codes) if code in of]
              for code in dict.fromkeys(code for of in codes for code in of)}
    return {code: (len(where), np.nanmean(beats[where], 0)) for code, where in places.items()
            if len(where) >= LEAST}


def draw(real, drawn, codes, leads, path):
    """A row a code, a column a lead; grey: recorded, blue: simulated."""
    figure = Figure(figsize=(2 * len(leads), 1.15 * len(codes)), layout="constrained")
    panels = figure.subplots(len(codes), len(leads), sharex=True, squeeze=False)
    time = np.arange(-BEFORE, AFTER, 1 / RATE)
    for row, code in zip(panels, codes):
        for panel, lead in zip(row, leads):
            for found, color in ((real, "0.6"), (drawn, "C0")):
                if code in found:
                    panel.plot(time, found[code][1][lead], color=color, lw=1)
            panel.axhline(0, color="0.9", lw=0.5, zorder=0)
            panel.set(ylim=(-1.3, 1.3), yticks=[], xticks=[])
        row[0].set_ylabel(f"{code}\n{real[code][0] if code in real else 0} | {drawn[code][0]}", rotation=0,
                          ha="right", va="center", fontsize=8)
    for panel, lead in zip(panels[0], leads):
        panel.set_title(data.LEADS[lead], fontsize=9)
    figure.savefig(path, dpi=70)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ptbxl")
    parser.add_argument("--records", type=int, default=4096)
    parser.add_argument("--out", default="docs")
    args = parser.parse_args()
    store = data.open_data(f"ptbxl:{args.ptbxl}", RATE)
    real = by_code(store, np.flatnonzero(store.records["fold"].astype(int) <= 8))
    store = data.open_data(f"simulated:{args.records}", RATE)
    drawn = by_code(store, range(args.records))
    codes = [code for code in data.knowledge()["label_sets"]["ptbxl_all"] if code in drawn]
    print(f"{'code':<8}{'recorded':>9}{'simulated':>10}   root mean square of the difference (mV), limb, chest; of the "
          "recorded beat")
    for code in codes:
        if code in real:
            gap, size = real[code][1] - drawn[code][1], real[code][1]
            rms = lambda x, leads: np.sqrt(np.mean(x[list(leads)] ** 2))
            print(f"{code:<8}{real[code][0]:>9}{drawn[code][0]:>10}   " + "   ".join(
                f"{rms(gap, leads):.3f} of {rms(size, leads):.3f}" for leads in GROUPS.values()))
    for name, leads in GROUPS.items():
        draw(real, drawn, codes, leads, Path(args.out, f"simulator_{name}.png"))


if __name__ == "__main__":
    main()
