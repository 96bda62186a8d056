"""Builds the extensions and finds them again: "ops", the operators for tensors, and "beats", segment_beats for
NumPy arrays, which needs no PyTorch. setup.py reads this file, too.

What the cache holds is run, so it must be this user's and no other's to change; and a library must be whole
before it is loaded: a cut one would end the process. What is wrong ends in a RuntimeError of one sentence."""
import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

FOLDER = Path(__file__).resolve().parent
CFLAGS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]  # the second: the same bits everywhere
MODULE_FLAGS = ["-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden",
                *(["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else [])]
CUDA_FLAGS = ["-O3", "--fmad=false"]
RETRY = 24 * 3600  # seconds after which a build that failed is tried again
ELSEWHERE = "set $ECG_CACHE to a folder that you, and only you, can write to"
NAME_ONE = "name a C++ compiler by $CXX, such as g++"


# ---- how it is to be built ------------------------------------------------------------------------------

def recipe(face, with_cuda=True):
    """How "ops" or "beats" is to be built on this machine: a dictionary that says all that shapes the result.
    with_cuda: where there is nvcc and a GPU."""
    if os.name == "nt":
        raise RuntimeError("it is not built on Windows")
    compiler, flags, chip = find_compiler(), CFLAGS, ""
    version = output_of(*compiler, "--version").strip()
    if not version:
        raise RuntimeError(f"{shlex.join(compiler)} --version prints nothing; {NAME_ONE}")
    if platform.machine() in ("x86_64", "AMD64") and not makes_clones(compiler):
        flags, chip = [*flags, "-march=native"], processor()
    made = dict(compiler=version.splitlines()[0][:200], cxx=shlex.join(compiler), chip=chip, **here(face))
    if face == "beats":
        return made | dict(flags=[*flags, *MODULE_FLAGS], cuda="", pybind11=find_pybind11().__version__)
    cuda = cuda_architecture() if with_cuda else ""
    flags = [*flags, *([] if sys.platform == "darwin" else ["-fopenmp"]), *(["-DWITH_CUDA"] if cuda else [])]
    return made | dict(flags=flags, cuda=cuda, cuda_flags=CUDA_FLAGS if cuda else [])


def find_compiler():
    """$CXX, which may be several words (ccache g++), or c++ where that is blank: a list."""
    said = os.environ.get("CXX", "").strip()
    try:
        words = shlex.split(said or "c++")
    except ValueError as error:
        raise RuntimeError(f"$CXX cannot be read ({said}: {error}); {NAME_ONE}") from None
    if not shutil.which(words[0]):
        raise RuntimeError(f"there is no C++ compiler ({said or 'c++'}); install one, or {NAME_ONE}")
    return words


def output_of(*command):
    """What a command prints, in whatever encoding."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True)
        return done.stdout.decode(errors="replace")
    except subprocess.CalledProcessError as error:
        why = f"status {error.returncode}"
    except OSError as error:
        why = error.strerror or str(error)
    raise RuntimeError(f"{shlex.join(command)} fails ({why}); {NAME_ONE}")


def here(face):
    """What a library must have been made from and for, whatever the compiler: a dictionary."""
    made = dict(face=face, machine=f"{sys.platform} {platform.machine()}", sources=digest_of_sources())
    if face == "beats":
        return made | dict(python=sysconfig.get_config_var("EXT_SUFFIX"))
    import torch
    return made | dict(torch=str(torch.__version__))


def digest_of_sources():
    """Of the C++ and CUDA files and this one."""
    files = [path for path in sorted(FOLDER.glob("*")) if path.suffix in (".cpp", ".cu", ".h") or path.name == "build.py"]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def find_pybind11():
    """The package; Python's headers must be there, too."""
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise RuntimeError("Python's headers are missing (install python3-dev, or whatever holds Python.h)")
    try:
        import pybind11
    except ImportError:
        raise RuntimeError("pybind11 is missing (pip install pybind11)") from None
    return pybind11


def find_ninja():
    """PyTorch looks for ninja in $PATH; pip may have put it beside a Python that is called by its path."""
    if not shutil.which("ninja"):
        folder = sysconfig.get_path("scripts")
        if not shutil.which("ninja", path=folder):
            raise RuntimeError("ninja is missing (pip install ninja)")
        os.environ["PATH"] = os.environ.get("PATH", "") + os.pathsep + folder
    try:
        subprocess.run(["ninja", "--version"], stdin=subprocess.DEVNULL, capture_output=True, check=True)
    except (OSError, subprocess.SubprocessError):
        broken = shutil.which("ninja")
        raise RuntimeError(f"ninja does not work: {broken} (pip install --force-reinstall ninja)") from None


def makes_clones(compiler):
    """Does the compiler make one library for every x86-64 processor (EVERY_CPU in beats.cpp)? GCC 12 and newer do on Linux. With
    others the library is for the processor at hand."""
    macros = output_of(*compiler, "-dM", "-E", "-x", "c++", os.devnull)
    gcc = re.search(r"^#define __GNUC__ (\d+)$", macros, re.MULTILINE)
    return sys.platform == "linux" and "#define __clang__ " not in macros and bool(gcc) and int(gcc[1]) >= 12


def processor():
    """What tells processors with other instructions apart."""
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        flags = next((line for line in lines if line.startswith("flags")), "")
        return hashlib.sha256(flags.encode()).hexdigest()[:16]
    return platform.processor()


def capability():
    """Of the GPU at hand, "9.0"; "" without one that works."""
    import torch
    try:
        return "%d.%d" % torch.cuda.get_device_capability() if torch.cuda.is_available() else ""
    except Exception:  # the driver is broken in whatever way
        return ""


def cuda_architecture():
    """Compute capabilities to build for: what $TORCH_CUDA_ARCH_LIST says, or that of the GPU at hand; "" with
    neither, or no nvcc that works."""
    import torch
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or capability()
    try:
        return wanted if wanted and torch.version.cuda and find_cuda() else ""
    except Exception:  # the toolkit is broken in whatever way
        return ""


def find_cuda():
    """Tell PyTorch where the CUDA toolkit is. It looks beside the nvcc in $PATH, but that may be a script; nvcc itself knows. -> bool"""
    from torch.utils import cpp_extension
    home = cpp_extension.CUDA_HOME
    if home and not Path(home, "include", "cuda_runtime.h").exists() and shutil.which("nvcc"):
        told = subprocess.run(["nvcc", "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True).stderr
        top = re.search(r"TOP=(\S+)", told.decode(errors="replace"))
        home = cpp_extension.CUDA_HOME = str(Path(top[1]).resolve()) if top else home
    return bool(home) and Path(home, "bin", "nvcc").exists()


def sources_in(folder, made):
    """Paths of all sources; one that holds the recipe is written into folder. (A flag would have to be quoted through ninja.)"""
    stamp = Path(folder) / "recipe.cpp"
    text = f"recipe {json.dumps(made)} end of recipe"
    stamp.write_text(f'extern "C" __attribute__((used)) const char ecg_recipe[] = R"json({text})json";\n')
    if made["face"] == "beats":
        return [str(FOLDER / "beats_numpy.cpp"), str(FOLDER / "beats.cpp"), str(stamp)]
    names = ["ops.cpp", "beats.cpp", "token_similarity.cpp", "beat_similarity.cpp"]
    if made["cuda"]:
        names += ["beats_cuda.cu", "similarity_cuda.cu", "beat_similarity_cuda.cu", "beat_similarity_gpu.cpp", "sigmoid_cuda.cu"]
    return [str(FOLDER / name) for name in names] + [str(stamp)]


def links_of(made):
    """Of the flags of a recipe, those that the linker needs, too."""
    return [flag for flag in made["flags"] if flag == "-fopenmp"]


# ---- is a library what it was when it was built? --------------------------------------------------------

def recipe_of(library):
    """The recipe that a library was built by, or {}: from the file, since loading registers its operators."""
    found = re.search(rb"recipe (\{.*?\}) end of recipe", Path(library).read_bytes(), re.DOTALL)
    try:
        return json.loads(found[1]) if found else {}
    except ValueError:
        return {}


def seal_of(library):
    """The file beside a library that holds its SHA-256, as sha256sum writes it."""
    return library.with_name(library.name + ".sha256")


def digest_of(library):
    return hashlib.sha256(library.read_bytes()).hexdigest()


def is_whole(library):
    try:
        return seal_of(library).read_text().split()[:1] == [digest_of(library)]
    except (OSError, ValueError):  # ValueError: no text
        return False


def seal(library, name):
    """Writes the file beside `name` that is_whole asks for, of a library that may still stand elsewhere."""
    write(seal_of(name), f"{digest_of(library)}  {name.name}\n")


def write(path, text):
    """At once or not at all, and never through a link."""
    handle, name = tempfile.mkstemp(dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


# ---- the cache ------------------------------------------------------------------------------------------

def fault_of(path):
    """Why another user could change a file or folder, or "". A link counts as what it leads to."""
    found = os.stat(path)
    if found.st_uid != os.geteuid():
        return f"{path} belongs to another user"
    if found.st_mode & 0o022:
        return f"{path} can be written by other users (chmod go-w {shlex.quote(str(path))})"
    return ""


def make(folder):
    """Makes a folder and those above it, for this user alone, whatever the umask."""
    if not folder.exists():
        make(folder.parent)
        with contextlib.suppress(FileExistsError):  # another process was first
            folder.mkdir(0o700)
            folder.chmod(0o700)


def folder_of(made):
    """The cache's folder for a recipe. What stands above the cache is not asked about: who may move folders
    there can put none there that is this user's."""
    try:
        cache = Path(os.environ.get("ECG_CACHE") or Path.home() / ".cache" / "ecg-language").absolute()
    except RuntimeError:
        raise RuntimeError(f"there is no home folder for the cache; {ELSEWHERE}") from None
    folder = cache / "csrc" / hashlib.sha256(json.dumps(made).encode()).hexdigest()[:16]
    for path in (cache, folder.parent, folder):
        make(path)
        fault = fault_of(path)
        if fault:
            raise RuntimeError(f"what is in the cache would be run, and {fault}; {ELSEWHERE}")
    return folder


@contextlib.contextmanager
def alone(folder):
    """Lets others wait that would build in the same folder, until this process ends, however it ends -> True.
    False: files cannot be locked here (some network file systems). Then several may build at a time, each in
    a folder of its own, and whole results replace each other."""
    lock = os.open(folder / "build.lock", os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except (OSError, AttributeError):  # AttributeError: there is no fcntl
            yield False
        else:
            yield True
    finally:
        os.close(lock)


def failure(folder):
    """What the last build in a folder ended with, or "": there was none, or it is long ago."""
    try:
        failed = folder / "failed.txt"
        recent = time.time() - failed.stat().st_mtime < RETRY
        return failed.read_text(errors="replace").strip() if recent else ""
    except FileNotFoundError:
        return ""


def is_ready(library):
    return is_whole(library) and not fault_of(library) and not fault_of(seal_of(library))


def cached(made):
    """Path of the extension made by a recipe, from the cache or built now."""
    try:
        folder = folder_of(made)
        result = folder / "ecg_csrc.so"
        if is_ready(result):
            return result
        with alone(folder) as locked:
            if is_ready(result):  # built while this process waited
                return result
            failed = failure(folder) or build(made, folder, locked)
    except OSError as error:
        raise RuntimeError(f"the cache cannot be used ({error}); {ELSEWHERE}") from None
    if failed:
        raise RuntimeError(f"{failed} (all of it: {folder / 'build.log'}; it is tried again a day later, or "
                           f"when {folder} is deleted)")
    return result


# ---- building -------------------------------------------------------------------------------------------

def build(made, folder, locked):
    """folder/ecg_csrc.so and its seal -> "". Where that fails: failed.txt, build.log -> why, in a line."""
    if made["face"] == "ops":
        find_ninja()
    note = "" if locked else " (without a file lock: there is none here)"
    print(f"building csrc, this once, into {folder}{note}", file=sys.stderr)
    for old in folder.glob("build-*") if locked else ():  # of builds that were killed
        shutil.rmtree(old, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix="build-", dir=folder))
    try:
        library = compile_in(work, made)
        library.chmod(0o700)
        seal(library, folder / "ecg_csrc.so")
        os.replace(library, folder / "ecg_csrc.so")
        return ""
    except OSError as error:
        if error.errno:  # of the cache; a library that does not load has none
            raise
        return record(folder, error)
    except Exception as error:  # PyTorch lets through whatever happens to its tools
        return record(folder, error)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def environment_of(made, work):
    """What PyTorch's builders shall find in os.environ. They take one word for a compiler: more become a
    script in work."""
    wanted = {"CXX": made["cxx"], "LC_ALL": "C", "TORCH_DONT_CHECK_COMPILER_ABI": "ON"}  # it prints a page
    if made["cuda"]:
        wanted["TORCH_CUDA_ARCH_LIST"] = made["cuda"]
    if " " in made["cxx"]:
        script = Path(work, "ecg-cxx")
        script.write_text(f'#!/bin/sh\nexec {made["cxx"]} "$@"\n', encoding="utf-8")
        script.chmod(0o700)
        wanted.update(CXX=script.name, PATH=os.pathsep.join([str(work), os.environ.get("PATH", os.defpath)]))
    return wanted


def compile_in(work, made):
    """Path of the library, which has been loaded."""
    if made["face"] == "beats":
        return compile_module(work, made)
    from torch.utils import cpp_extension
    from unittest import mock
    with mock.patch.dict(os.environ, environment_of(made, work)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cpp_extension.load("ecg_csrc", sources_in(work, made), extra_cflags=made["flags"], extra_cuda_cflags=made["cuda_flags"],
                           extra_ldflags=links_of(made), build_directory=str(work),
                           with_cuda=bool(made["cuda"]), is_python_module=False)
    return next(work.glob("ecg_csrc*.so"))  # a second build in one process has _v1 in its name


def compile_module(work, made):
    """compile_in for what needs no PyTorch, nor its tools: one command."""
    library = Path(work, "ecg_csrc.so")
    headers = find_pybind11().get_include(), sysconfig.get_path("include")
    command = [*shlex.split(made["cxx"]), *made["flags"], *(f"-I{folder}" for folder in headers),
               *sources_in(work, made), "-o", str(library)]
    environment = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, env=environment)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        raise RuntimeError(said or f"{made['cxx']} fails (status {done.returncode})")
    load("beats", library)
    return library


def record(folder, error):
    """Notes that a build failed -> why, in a line."""
    text = told_by(error)
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("ninja:")]
    why = next((line for line in lines if re.search(r"\berror:", line)), (lines or [repr(error)])[-1])[:500]
    write(folder / "build.log", text)
    write(folder / "failed.txt", why)
    return why


def told_by(error):
    """What an exception says; where PyTorch could not decode what a compiler said, that; or not load: why."""
    if isinstance(error, UnicodeDecodeError):
        return error.object.decode(errors="replace")
    if isinstance(error, (RuntimeError, OSError, ImportError)):
        return str(error.__cause__ if isinstance(error, OSError) and error.__cause__ else error)
    return f"{type(error).__name__}: {error}"


# ---- which library --------------------------------------------------------------------------------------

def load(face, library):
    """Registers the operators, or -> the module "beats". OSError, ImportError where it does not load."""
    if face == "ops":
        import torch
        return torch.ops.load_library(str(library))
    found = importlib.util.spec_from_file_location("csrc._beats", library)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def built_ahead(face):
    """(path, recipe) of the library that setup.py left beside the sources, if it was made from these and for
    this machine, and loads; else None."""
    library = FOLDER / f"_{face}.so"
    made = recipe_of(library) if is_whole(library) else {}
    if any(made.get(name) != value for name, value in here(face).items()):
        return None
    if made["chip"] not in ("", processor()):
        return None
    if face == "ops" and cuda_architecture() and capability() not in made["cuda"]:
        return None
    try:
        load(face, library)
    except (OSError, ImportError):  # from a machine with other libraries
        return None
    return library, made


def library(face):
    """(path, recipe) of an extension for this machine, built now if it has to be, and what hindered its CUDA
    part, or "". RuntimeError in one sentence where even the CPU's part fails."""
    ahead = built_ahead(face)
    if ahead:
        return *ahead, "" if ahead[1]["cuda"] else "it was built without"
    made, hindered = recipe(face), "there is no nvcc that works"
    if made["cuda"]:
        try:
            return cached(made), made, ""
        except RuntimeError as error:
            made, hindered = recipe(face, with_cuda=False), str(error)
    return cached(made), made, hindered


@functools.cache
def warn_once(text):
    warnings.warn(text, stacklevel=5)  # who called the function that needs it


def start(face):
    """Load or build an extension -> what load gives, build_info()'s dictionary, what hindered its CUDA part.
    Where that fails, one warning: the reference is to run."""
    chosen = os.environ.get("ECG_CSRC", "").strip()
    if chosen not in ("", "reference"):
        warn_once(f"csrc: $ECG_CSRC is {chosen!r}, not heeded; it may be reference, or not set.")
        chosen = ""
    try:
        if chosen:
            raise RuntimeError("$ECG_CSRC asks for it")
        path, made, hindered = library(face)
        return load(face, path), {"implementation": "compiled", "library": str(path)} | made, hindered
    except Exception as error:  # whatever is wrong with a compiler or a cache: the reference needs neither
        why = told_by(error)
        if not chosen:
            warn_once(f"csrc: the extension could not be built: {why}. Its NumPy reference runs instead, "
                      "slowly.")
        return None, {"implementation": "reference", "why": why}, ""
