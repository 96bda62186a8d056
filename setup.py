"""python setup.py build_ext --inplace, or pip install --no-build-isolation -e ., builds the extensions ahead
of their first use."""
import re
import shutil
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
BESIDE = ["prompts.json", "splits.json", "weights.json"]  # files that the modules look for beside themselves
sys.path.insert(0, str(ROOT / "csrc"))
import build  # noqa: E402  (csrc/build.py)


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


class BuildSealed(build_ext):
    """As csrc would build them, each with the seal beside it that csrc asks for."""

    def get_ext_filename(self, name):
        return name.replace(".", "/") + ".so"

    def build_extension(self, one):
        library = Path(self.get_ext_fullpath(one.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as work:
            shutil.copy(build.compile_in(Path(work), one.recipe), library)

    def run(self):
        super().run()
        for one in self.extensions:
            library = Path(self.get_ext_fullpath(one.name))
            build.seal(library, library)


def extensions():
    """Those that can be built here and now. csrc builds the others on first use, or runs its reference; but
    where building was asked for, only PyTorch may be missing."""
    found = []
    for face in ("ops", "beats"):
        try:
            recipe = build.recipe(face)
            if face == "ops":
                build.find_ninja()
        except (ImportError, RuntimeError, OSError) as error:
            if "build_ext" in sys.argv and not isinstance(error, ImportError):
                sys.exit(f"error: {error}")
            print(f"csrc._{face} is not built now: {error}", file=sys.stderr)
            continue
        found.append(Extension(f"csrc._{face}", []))
        found[-1].recipe = recipe
    return found


setup(
    name="ecg-language",
    version=re.search(r'^VERSION = "(.*)"', (ROOT / "model.py").read_text(), re.M)[1],
    description="ECG-language pretraining: ETP, MERL, C-MELT, MELP, FG-CLEP side by side, compiled operators",
    license="MIT",
    python_requires=">=3.10",
    py_modules=["data", "model", "train", "eval"],
    packages=["csrc"],
    package_data={"csrc": ["*.cpp", "*.cu", "*.h"]},
    ext_modules=extensions(),
    cmdclass={"build_py": BuildModules, "build_ext": BuildSealed},
    install_requires=[
        "torch>=2.10", "numpy>=1.26", "scipy>=1.11", "pandas>=2.0", "wfdb>=4.1", "h5py>=3.8",
        "scikit-learn>=1.3", "joblib>=1.3", "threadpoolctl>=3", "matplotlib>=3.7", "tqdm>=4.65",
        "transformers>=4.56", "tokenizers>=0.20", "safetensors>=0.4", "ninja>=1.11", "pybind11>=2.13",
        "setuptools",
    ],
    extras_require={"test": ["pytest>=8", "pytest-xdist>=3"], "bench": ["sleepecg==0.6.*", "neurokit2>=0.2"]},
)
