"""A store of MIMIC's size: seconds and memory to open it, and how fast random records of it are read.

    python tests/bench_scale.py [--records 800000] [--full]
"""
import argparse
import multiprocessing
import re
import shutil
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data

WANTED, BATCH = 10_000, 256  # records/s that the training loop is to be fed with; records


def enlarge(small, folder, count, full=False):
    """A store of `count` records, copies of those of `small`. full: the signals, too; else they are a hole in
    a file without disk, all zero, and fail verify."""
    folder, table = Path(folder), data.read_records(small.path)
    folder.mkdir(parents=True)
    copies, rest = divmod(count, len(table))
    rows = table.to_csv(index=False, header=False, quoting=1, lineterminator="\n")
    with open(folder / "records.csv", "w") as file:
        file.write(",".join(data.COLUMNS) + "\n" + rows * copies)
        table[:rest].to_csv(file, index=False, header=False, quoting=1, lineterminator="\n")
    signals = Path(small.path, "ecg.i16").read_bytes()
    with open(folder / "ecg.i16", "wb") as file:
        for _ in range(full * (copies + 1)):
            file.write(signals)
        file.truncate(count * 24 * small.samples)
    for name, block in data.index(folder).items():
        (folder / name).write_bytes(block)
    crc = lambda path: zlib.crc32(path.read_bytes()) if full or path.name != "ecg.i16" else 0
    files = {path.name: [path.stat().st_size, crc(path)] for path in sorted(folder.iterdir())}
    data.write_state(folder, small.meta | dict(files=files, rows=count))


def opening(path, answer):
    """Seconds, and MB at most, that a process needs with all that is asked of a store before the first batch."""
    memory = lambda what: int(re.search(rf"{what}:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1e3
    before, start = memory("VmRSS"), time.perf_counter()
    store = data.Store(path)
    tags = data.report_tags(store)
    rows = store.rows("train")
    store.peaks(rows[:BATCH]), store.microvolts(rows[:BATCH]), tags[rows[0]]
    answer.put((time.perf_counter() - start, memory("VmHWM") - before))


class Batches(torch.utils.data.Dataset):
    def __init__(self, store):
        self.store, self.tags = store, store.tags

    def __getitem__(self, rows):
        ecg, peaks = self.store.microvolts(rows), self.store.peaks(rows)
        return torch.from_numpy(ecg), torch.from_numpy(peaks), [self.tags[row] for row in rows]


def reading(path, workers, batches=200):
    """Batches/s of random rows."""
    store = data.Store(path)
    rows = np.random.default_rng(0).integers(0, len(store), (batches, BATCH))
    loader = torch.utils.data.DataLoader(Batches(store), batch_size=None, sampler=rows, num_workers=workers)
    batches = iter(loader)
    for _ in range(8):  # what the workers prepared while they started does not count
        next(batches)
    start = time.perf_counter()
    return sum(1 for _ in batches) / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=800_000)
    parser.add_argument("--full", action="store_true", help="real signals: 19 GB at 100 Hz, 96 GB at 500 Hz")
    args = parser.parse_args()
    folder, spawn = Path(tempfile.mkdtemp()), multiprocessing.get_context("spawn")
    try:
        for rate in (100, 500):
            small = data.open_data("simulated:1024", rate)
            enlarge(small, folder / f"{rate}", args.records, args.full)
            answer = spawn.Queue()
            process = spawn.Process(target=opening, args=(folder / f"{rate}", answer))
            process.start()
            seconds, memory = answer.get()
            process.join()
            print(f"{args.records} records at {rate} Hz: opened in {seconds:.2f} s and {memory:.0f} MB")
            for workers in (0, 1, 4):
                speed = reading(folder / f"{rate}", workers)
                print(f"  {workers} workers: {speed:6.1f} batches of {BATCH} a second, "
                      f"{speed * BATCH / WANTED:.2f} of {WANTED} records/s")
            shutil.rmtree(folder / f"{rate}")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
