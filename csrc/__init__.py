"""The compiled operators, one Python function each: of PyTorch tensors here, of NumPy arrays in csrc.beats.

Behind a function stands the C++ (CPU) or the CUDA version or, where nothing could be built, the reference: one
warning, then it just works, slower. The extension is built when the first function is asked for (half a minute,
once; kept in ~/.cache/ecg-language or $ECG_CACHE, which only you may be able to write to), or ahead of time by
python setup.py build_ext --inplace. $ECG_CSRC=reference asks for the reference. Until then PyTorch is not imported,
nor is anything registered: who uses torch.ops.ecg.* alone says import csrc.ops.

    python -c "import csrc; print(csrc.build_info())"     # what runs, and how it was built
"""
from .beats import max_peaks

__all__ = ["segment_beats", "beat_of_token", "token_beat_rhythm", "sigmoid_loss", "build_info", "max_peaks"]


def __getattr__(name):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import ops
    globals().update((one, getattr(ops, one)) for one in __all__)
    return globals()[name]
