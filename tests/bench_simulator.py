"""Mean beats of every finding that the simulator draws, beside those of PTB-XL's folds 1-8 (both: the median
beat of each record that has the code, mean over records), and the distance of the two; how fast it is.

    python tests/bench_simulator.py PTBXL_DIR [--records 4096] [--out docs]
"""
import argparse
import sys
import time
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
    """A row a code, a column a lead, 1 mV a row; grey: recorded, blue: simulated."""
    figure = Figure(figsize=(1.3 * len(leads) + 1.2, 0.36 * len(codes) + 0.5), layout="constrained")
    panel, seconds = figure.subplots(), np.arange(-BEFORE, AFTER, 1 / RATE)
    for row, code in enumerate(codes):
        for column, lead in enumerate(leads):
            for found, color in ((real, "0.55"), (drawn, "C0")):
                panel.plot(seconds + column, np.clip(found[code][1][lead], -1, 1) - row, color=color, lw=0.9)
    panel.set(xlim=(-BEFORE, len(leads) - BEFORE), ylim=(0.2 - len(codes), 1))
    panel.set_xticks(range(len(leads)), [data.LEADS[lead] for lead in leads])
    panel.set_yticks([-row for row in range(len(codes))], [f"{code} ({real[code][0]})" for code in codes],
                     fontsize=7)
    panel.tick_params(length=0, labeltop=True)
    panel.spines[:].set_visible(False)
    figure.savefig(path, dpi=90)


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
    codes = [code for code in data.knowledge()["label_sets"]["ptbxl_all"] if code in drawn and code in real]
    print("root mean square of the difference of mean beats, of the recorded one (mV)\n"
          f"{'code':<9}{'recorded':>8}{'simulated':>10}   limb leads      chest leads")
    rms = lambda x, leads: np.sqrt(np.mean(x[list(leads)] ** 2))
    for code in codes:
        (count, beat), (many, other) = real[code], drawn[code]
        print(f"{code:<9}{count:>8}{many:>10}   " + "  ".join(
            f"{rms(beat - other, leads):.3f}, {rms(beat, leads):.3f}" for leads in GROUPS.values()))
    for name, leads in GROUPS.items():
        draw(real, drawn, codes, leads, Path(args.out, f"simulator_{name}.png"))
    for rate in (100, 500):
        seconds = []
        for block in range(7):
            start = time.perf_counter()
            data.simulated_block.__wrapped__(0, block, rate)
            seconds.append(time.perf_counter() - start)
        print(f"{rate} Hz: {data.CHUNK / np.median(seconds):.0f} records/s, median of 7 blocks of {data.CHUNK}")


if __name__ == "__main__":
    main()
