"""segment_beats for NumPy arrays, by the same C++ code as for tensors, to the sample. It needs no PyTorch.

It is built on the first call, as csrc says, which takes a C++ compiler, pybind11 and Python's headers."""
import functools

import numpy as np

from . import build, reference


def segment_beats(ecg, fs):
    """R peaks of ECGs; all leads vote. csrc.segment_beats says what it finds.

    ecg: array (B, leads, N) or (leads, N), float32 mV or int16 microvolts; copied only if it is not contiguous.
    fs: Hz. Returns peaks (B, K) int32, positions in samples, -1 behind the last; count (B,) int32; of (leads, N)
    peaks (K,) and a number. Errors: TypeError, ValueError, in one sentence.
    A call takes one thread, and lets others run meanwhile: it holds no GIL."""
    found = ecg.dtype if type(ecg) in (np.ndarray, np.memmap) else type(ecg).__name__  # no masked array
    if found not in (np.float32, np.int16):
        raise TypeError(f"segment_beats: ecg is {found}; give a NumPy array of float32 millivolts "
                        "(ecg.astype('float32')) or int16 microvolts")
    batch = ecg[None] if ecg.ndim == 2 else ecg
    check(batch.shape, fs)
    peaks, count = started()[0](np.require(batch, requirements=["C", "A"]), float(fs))
    return (peaks[0], count[0]) if ecg.ndim == 2 else (peaks, count)


def check(shape, fs):
    """Can a batch of this shape, (B, leads, N), at fs Hz be segmented? Errors: ValueError, in one sentence."""
    if len(shape) != 3 or not 1 <= shape[1] <= 12:
        raise ValueError(f"segment_beats: ecg has shape {tuple(shape)}; it must be (B, leads, N) "
                         "with 1 to 12 leads")
    if not 100 <= fs <= 1000:
        raise ValueError(f"segment_beats: fs is {fs}; it must be 100 to 1000 Hz (resample the signal)")
    if not 2 * fs <= shape[2] < 2**30:
        raise ValueError(f"segment_beats: {shape[2]} samples at {fs} Hz; it takes 2 s at least, "
                         "and fewer than 2^30 samples")


def max_peaks(length, fs):
    """K, the columns of peaks: so many fit into length samples, 200 ms apart."""
    gap = int(0.2 * fs + 0.5)
    return (length + gap - 1) // gap


def by_reference(ecg, fs):
    peaks = np.full((len(ecg), max_peaks(ecg.shape[2], fs)), -1, np.int32)
    count = np.zeros(len(ecg), np.int32)
    for i, record in enumerate(ecg):
        found = reference.segment_beats(record, fs)
        peaks[i, :len(found)], count[i] = found, len(found)
    return peaks, count


@functools.cache
def started():
    """The function that runs, compiled or the reference's; build_info()'s dictionary."""
    module, info, _ = build.start("beats")
    return module.segment_beats if module else by_reference, info


def build_info():
    """Of this module, as csrc.build_info() of the operators."""
    return dict(started()[1])
