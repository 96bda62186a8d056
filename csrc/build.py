"""Builds the extension and finds it again. No PyTorch operator is registered here: setup.py reads this file, too."""
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent
CFLAGS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]  # the second: the same bits everywhere
CUDA_FLAGS = ["-O3", "--fmad=false"]


def recipe(with_cuda=True):
    """How the extension is to be built on this machine: a dictionary that says all that shapes the result. with_cuda: where there is
    nvcc and a GPU."""
    compiler = os.environ.get("CXX", "c++")
    if not shutil.which(compiler):
        raise RuntimeError(f"there is no C++ compiler ({compiler})")
    find_ninja()
    flags, chip = [*CFLAGS, *([] if sys.platform == "darwin" else ["-fopenmp"])], ""
    if platform.machine() in ("x86_64", "AMD64") and not makes_clones(compiler):
        flags, chip = [*flags, "-march=native"], processor()
    cuda = cuda_architecture() if with_cuda else ""
    flags += ["-DWITH_CUDA"] if cuda else []
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    return dict(compiler=version, flags=flags, cuda=cuda, cuda_flags=CUDA_FLAGS if cuda else [], torch=torch.__version__, chip=chip,
                sources=digest_of_sources())


def digest_of_sources():
    """Of the C++ and CUDA files and this one."""
    files = [path for path in sorted(FOLDER.glob("*")) if path.suffix in (".cpp", ".cu", ".h") or path.name == "build.py"]
    return hashlib.sha256("".join(path.read_text() for path in files).encode()).hexdigest()[:16]


def find_ninja():
    """PyTorch looks for ninja in $PATH; pip may have put it beside a Python that is called by its path."""
    if not shutil.which("ninja"):
        folder = sysconfig.get_path("scripts")
        if not shutil.which("ninja", path=folder):
            raise RuntimeError("ninja is missing (pip install ninja)")
        os.environ["PATH"] = os.environ.get("PATH", "") + os.pathsep + folder


def makes_clones(compiler):
    """Does the compiler make one library for every x86-64 processor (EVERY_CPU in beats.cpp)? GCC 12 and newer do on Linux. With
    others the library is for the processor at hand."""
    macros = subprocess.run([compiler, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True, check=True).stdout
    found = dict(line.split(None, 2)[1:] for line in macros.splitlines() if len(line.split(None, 2)) == 3)
    return sys.platform == "linux" and "__clang__" not in found and int(found.get("__GNUC__", 0)) >= 12


def processor():
    """What tells processors with other instructions apart."""
    if os.path.exists("/proc/cpuinfo"):
        flags = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
        return hashlib.sha256(flags.encode()).hexdigest()[:16]
    return platform.processor()


def capability():
    """Of the GPU at hand, "9.0"; "" without one."""
    return "%d.%d" % torch.cuda.get_device_capability() if torch.cuda.is_available() else ""


def cuda_architecture():
    """Compute capabilities to build for: what $TORCH_CUDA_ARCH_LIST says, or that of the GPU at hand; "" without either or nvcc."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST") or capability()
    return wanted if wanted and torch.version.cuda and find_cuda() else ""


def find_cuda():
    """Tell PyTorch where the CUDA toolkit is. It looks beside the nvcc in $PATH, but that may be a script; nvcc itself knows. -> bool"""
    from torch.utils import cpp_extension
    home = cpp_extension.CUDA_HOME
    if home and not Path(home, "include", "cuda_runtime.h").exists() and shutil.which("nvcc"):
        told = subprocess.run(["nvcc", "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True).stderr
        top = re.search(r"TOP=(\S+)", told)
        home = cpp_extension.CUDA_HOME = str(Path(top[1]).resolve()) if top else home
    return bool(home) and Path(home, "bin", "nvcc").exists()


def sources_in(folder, made):
    """Paths of all sources; one that holds the recipe is written into folder. (A flag would have to be quoted through ninja.)"""
    stamp = Path(folder) / "recipe.cpp"
    text = f"recipe {json.dumps(made)} end of recipe"
    stamp.write_text(f'extern "C" __attribute__((used)) const char ecg_recipe[] = R"json({text})json";\n')
    names = ["ops.cpp", "beats.cpp", "token_similarity.cpp", "beat_similarity.cpp"]
    if made["cuda"]:
        names += ["beats_cuda.cu", "similarity_cuda.cu", "beat_similarity_cuda.cu", "beat_similarity_gpu.cpp", "sigmoid_cuda.cu"]
    return [str(FOLDER / name) for name in names] + [str(stamp)]


def links_of(made):
    """Of the flags of a recipe, those that the linker needs, too."""
    return [flag for flag in made["flags"] if flag == "-fopenmp"]


def recipe_of(library):
    """The recipe that a library was built by, read from the file: loading it would register its operators."""
    return json.loads(re.search(rb"recipe (\{.*?\}) end of recipe", Path(library).read_bytes(), re.DOTALL)[1])


def library():
    """Path of the extension for this machine, built now if it has to be, and what hindered its CUDA part, or "". RuntimeError in one
    sentence where even the CPU's part fails.

    One that setup.py left beside the sources is taken if it was made from these sources and for this machine."""
    ahead = FOLDER / "_ops.so"
    if ahead.exists():
        found = recipe_of(ahead)
        if (found["sources"] == digest_of_sources() and found["torch"] == torch.__version__ and found["chip"] in ("", processor())
                and (capability() in found["cuda"] or not cuda_architecture())):
            return ahead, "" if found["cuda"] else "it was built without"
    made = recipe()
    if not made["cuda"]:
        return built(made), "there is no nvcc"
    try:
        return built(made), ""
    except RuntimeError as error:
        return built(recipe(with_cuda=False)), str(error)


def built(made):
    """Path of the extension made by a recipe, from the cache or built now. RuntimeError where that fails."""
    cache = Path(os.environ.get("ECG_CACHE") or Path.home() / ".cache" / "ecg-language")
    folder = cache / "csrc" / hashlib.sha256(json.dumps(made).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    result, failed = folder / "ecg_csrc.so", folder / "failed.txt"
    with open(folder / "build.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # others wait; it is free again when this process ends, however it ends
        if result.exists():
            return result
        if not failed.exists():
            print(f"building csrc, this once, into {folder}", file=sys.stderr)
            build(made, folder)
        if failed.exists():
            raise RuntimeError(f"{failed.read_text()} (all of it: {folder / 'build.log'}; delete {folder} to try again)")
    return result


def build(made, folder):
    """folder/ecg_csrc.so, or folder/failed.txt and build.log. What a killed build left goes: PyTorch would wait for its lock."""
    from torch.utils import cpp_extension
    work = folder / "build"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    if made["cuda"]:
        os.environ["TORCH_CUDA_ARCH_LIST"] = made["cuda"]
    try:
        cpp_extension.load("ecg_csrc", sources_in(work, made), extra_cflags=made["flags"], extra_cuda_cflags=made["cuda_flags"],
                           extra_ldflags=links_of(made), build_directory=str(work),
                           with_cuda=bool(made["cuda"]), is_python_module=False)
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        lines = [line for line in str(error).splitlines() if re.search(r"\berror:", line)] or [str(error)]
        (folder / "build.log").write_text(str(error))
        (folder / "failed.txt").write_text(lines[0].strip())
    else:
        [made] = work.glob("ecg_csrc*.so")  # a second build in one process has _v1 in its name
        os.replace(made, folder / "ecg_csrc.so")  # a library that is there is whole
