"""python setup.py build_ext --inplace, or pip install --no-build-isolation -e ., builds the extension ahead of its first use."""
import os
import re
import sys
import tempfile
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
BESIDE = ["prompts.json", "splits.json", "weights.json"]  # files that the modules look for beside themselves
sys.path.insert(0, str(ROOT / "csrc"))


class BuildModules(build_py):
    """With BESIDE, which setuptools takes along with packages only, not with modules. An editable install has
    them where they are."""

    def run(self):
        super().run()
        if not self.editable_mode:
            for name in BESIDE:
                self.copy_file(str(ROOT / name), str(Path(self.build_lib, name)))

    def get_outputs(self, include_bytecode=1):
        return [*super().get_outputs(include_bytecode), *(str(Path(self.build_lib, name)) for name in BESIDE)]

    def get_source_files(self):  # of a source distribution
        return [*super().get_source_files(), *BESIDE]


def extension():
    """(ext_modules, cmdclass). Without PyTorch or a compiler none, unless building was asked for: csrc builds on first use, or runs its
    reference."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
        import build
        made = build.recipe()
    except (ImportError, RuntimeError, OSError) as error:
        if "build_ext" in sys.argv:
            sys.exit(f"error: {error}")
        print(f"the extension is not built now: {error}", file=sys.stderr)
        return [], {}

    class BuildSealed(BuildExtension.with_options(no_python_abi_suffix=True)):
        """With the seal beside the library that csrc asks for."""

        def run(self):
            super().run()
            for one in self.extensions:
                library = Path(self.get_ext_fullpath(one.name))
                build.seal(library, library)

        def get_source_files(self):  # for sdist: package_data has all but this machine's recipe
            return []

    kind, flags = (CUDAExtension, {"cxx": made["flags"], "nvcc": made["cuda_flags"]}) if made["cuda"] else (CppExtension, made["flags"])
    work = tempfile.mkdtemp()
    os.environ.update(build.environment_of(made, work))
    sources = map(Path, build.sources_in(work, made))
    sources = [path.relative_to(ROOT) if path.is_relative_to(ROOT) else path for path in sources]
    return [kind("csrc._ops", list(map(str, sources)), extra_compile_args=flags, extra_link_args=build.links_of(made))], \
        {"build_ext": BuildSealed}


ext_modules, cmdclass = extension()
setup(
    name="ecg-language",
    version=re.search(r'^VERSION = "(.*)"', (ROOT / "model.py").read_text(), re.M)[1],
    description="ECG-language pretraining: ETP, MERL, C-MELT, MELP and FG-CLEP side by side, and compiled operators",
    license="MIT",
    python_requires=">=3.10",
    py_modules=["data", "model", "train", "eval"],
    packages=["csrc"],
    package_data={"csrc": ["*.cpp", "*.cu", "*.h"]},
    ext_modules=ext_modules,
    cmdclass={"build_py": BuildModules, **cmdclass},
    install_requires=[
        "torch>=2.10", "numpy>=1.26", "scipy>=1.11", "pandas>=2.0", "wfdb>=4.1", "h5py>=3.8",
        "scikit-learn>=1.3", "joblib>=1.3", "threadpoolctl>=3", "matplotlib>=3.7", "tqdm>=4.65",
        "transformers>=4.56", "tokenizers>=0.20", "safetensors>=0.4", "ninja>=1.11", "setuptools",
    ],
    extras_require={"test": ["pytest>=8", "pytest-xdist>=3"], "bench": ["sleepecg==0.6.*", "neurokit2>=0.2"]},
)
