"""The operators as Python sees them: csrc has them from here when it is first asked for one."""
import numpy as np
import torch

from . import build, reference, sigmoid, similarity
from .beats import by_reference, check, max_peaks

sigmoid_loss, token_beat_rhythm = sigmoid.sigmoid_loss, similarity.token_beat_rhythm

torch.library.define("ecg::segment_beats", "(Tensor ecg, float fs) -> (Tensor, Tensor)")
torch.library.define("ecg::beat_of_token", "(Tensor peaks, Tensor count, SymInt tokens, SymInt samples) -> Tensor")


# ---- operators -----------------------------------------------------------------------------------------------------

def segment_beats(ecg, fs):
    """R peaks of a batch of ECGs; all leads vote.

    ecg: (B, leads, N) float32 mV, or int16 microvolts as a store holds them; 1 to 12 leads in any order, 2 s at least. NaN,
    infinity and int16 -32768 are missing samples. fs: Hz, 100 to 1000.
    Returns peaks (B, K) int32, positions in samples, ascending, -1 behind the last; count (B,) int32. No two peaks are closer than
    200 ms; a record without a signal has none. The same on CPU, on GPU and by the reference, to the sample. No gradient.
    Errors: TypeError, ValueError, in one sentence.
    Method: see reference.py (after Pan & Tompkins 1985; Zong, Moody & Jiang 2003)."""
    if not isinstance(ecg, torch.Tensor) or ecg.dtype not in (torch.float32, torch.int16):
        found = ecg.dtype if isinstance(ecg, torch.Tensor) else type(ecg).__name__
        raise TypeError(f"segment_beats: ecg is {found}; give a tensor of float32 millivolts (ecg.float()) or int16 microvolts")
    check(ecg.shape, fs)
    return torch.ops.ecg.segment_beats(ecg.contiguous(), float(fs))


def beat_of_token(peaks, count, n_tokens, n_samples):
    """To which beat each encoder token belongs: the borders are half-way between R peaks.

    peaks (B, K), count (B,): of segment_beats, int32. n_tokens: T equal parts of n_samples, the record's length.
    Returns (B, T) int32, 0 to count - 1; all -1 where a record has no beat. Errors: TypeError, ValueError."""
    if any(not isinstance(x, torch.Tensor) or x.dtype != torch.int32 for x in (peaks, count)):
        raise TypeError("beat_of_token: peaks and count must be int32 tensors, as segment_beats returns them")
    if peaks.dim() != 2 or count.shape != peaks.shape[:1] or peaks.device != count.device:
        raise ValueError(f"beat_of_token: peaks {tuple(peaks.shape)} on {peaks.device} and count {tuple(count.shape)} on "
                         f"{count.device}; they must be (B, K) and (B,) on one device")
    if not (1 <= n_tokens < 2**31 and 1 <= n_samples < 2**31):
        raise ValueError(f"beat_of_token: {n_tokens} tokens of {n_samples} samples; there must be one of "
                         "each at least, and fewer than 2^31")
    return torch.ops.ecg.beat_of_token(peaks.contiguous(), count.contiguous(), n_tokens, n_samples)


@torch.library.register_fake("ecg::segment_beats")
def _(ecg, fs):
    records, integers = ecg.shape[0], dict(dtype=torch.int32)
    return ecg.new_empty(records, max_peaks(ecg.shape[2], fs), **integers), ecg.new_empty(records, **integers)


@torch.library.register_fake("ecg::beat_of_token")
def _(peaks, count, tokens, samples):
    return peaks.new_empty(peaks.shape[0], tokens)


# ---- what runs -----------------------------------------------------------------------------------------------------

def segment_beats_reference(ecg, fs):
    return tuple(torch.from_numpy(x).to(ecg.device) for x in by_reference(ecg.cpu().numpy(), fs))


def beat_of_token_reference(peaks, count, tokens, samples):
    rows = [reference.beat_of_token(p[:max(0, c)], tokens, samples) for p, c in zip(peaks.cpu().numpy(), count.cpu().numpy())]
    return torch.from_numpy(np.array(rows, np.int32).reshape(len(rows), tokens)).to(peaks.device)


def by_way_of_the_cpu(operator):
    """For GPU tensors where only the CPU version could be built: there and back."""
    def run(*arguments):
        moved = [x.cpu() if isinstance(x, torch.Tensor) else x for x in arguments]
        out, device = operator(*moved), arguments[0].device
        return tuple(x.to(device) for x in out) if isinstance(out, tuple) else out.to(device)
    return run


def start():
    """Load or build the extension -> build_info()'s dictionary."""
    _, info, without_cuda = build.start("ops")
    if info["implementation"] == "reference":
        for device in ("cpu", "cuda"):
            torch.library.impl("ecg::segment_beats", device, segment_beats_reference)
            torch.library.impl("ecg::beat_of_token", device, beat_of_token_reference)
            similarity.use_plain(device)
        return info
    similarity.use_plain("cuda")
    similarity.KERNELS = bool(info["cuda"])
    if not info["cuda"]:
        torch.library.impl("ecg::segment_beats", "cuda", by_way_of_the_cpu(torch.ops.ecg.segment_beats))
        torch.library.impl("ecg::beat_of_token", "cuda", by_way_of_the_cpu(torch.ops.ecg.beat_of_token))
        if torch.cuda.is_available():
            build.warn_once(f"csrc: the CUDA part is missing: {without_cuda}. GPU tensors go to the CPU and back.")
    return info


INFO = start()


def build_info():
    """Which implementation runs ("compiled" or "reference"), and the recipe it was built by or why it was not: a dictionary."""
    return dict(INFO)
