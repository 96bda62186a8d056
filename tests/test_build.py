"""Building csrc and finding it again: whatever is wrong with a compiler or the cache, `import csrc` ends in
the compiled operators or, with one warning that says what to do, in the reference; and it runs nothing that
another user could have put there."""
import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
import torch

import csrc
from conftest import ROOT, python
from csrc import beats, build

INFO, OF_BEATS = csrc.build_info(), beats.build_info()
LIBRARIES = {"ops": INFO.get("library"), "beats": OF_BEATS.get("library")}
pytestmark = pytest.mark.skipif(not all(LIBRARIES.values()), reason=str(INFO.get("why", OF_BEATS.get("why"))))
SAY = "import csrc, json; print(json.dumps(csrc.build_info()))"
SAY_BEATS = "import csrc.beats, json; print(json.dumps(csrc.beats.build_info()))"
either = pytest.mark.parametrize("face", LIBRARIES)
COMPILER = """#!/bin/sh
case "$*" in *--version*) printf '{version}'; exit {status};; *-dM*) exit;; esac
for x; do [ "$before" = -o ] && out="$x"; before="$x"; done
case "$*" in *-shared*) {link};; *) {compile};; esac
"""


COPY = """case "$*" in *beats_numpy*) cat "{beats}";; *) cat "{ops}";; esac > "$out"; chmod 700 "$out"
""".format(**LIBRARIES)


def compiler(folder, version="a compiler 1", status=0, compile=': > "$out"', link=COPY):
    """A script that stands in for one: it makes empty objects, and for a library copies ours. That of beats
    is linked at once."""
    path = folder / f"cxx-{len(list(folder.glob('cxx-*')))}"
    path.write_text(COMPILER.format(version=version, status=status, compile=compile, link=link))
    path.chmod(0o700)
    return path


def broken(folder, why="out of order"):
    return compiler(folder, compile=f"printf 'error: {why}\\n' >&2; exit 1")


# PyTorch is imported once; a process of its own is forked for every `import csrc`.
NURSERY = """
import json, os, sys, traceback
import numpy, torch.utils.cpp_extension, unittest.mock
for line in sys.stdin:
    code, environment, out = json.loads(line)
    child, status = os.fork(), 1
    if not child:
        files = open(out, "w"), open(out + ".err", "w")
        os.dup2(files[0].fileno(), 1), os.dup2(files[1].fileno(), 2)
        os.environ.update(environment)
        try:
            exec(code, {})
            status = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    out = tmp_path_factory.mktemp("nursery") / "out"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", NURSERY], cwd=ROOT, **pipes) as process:
        def run(code, environment):
            process.stdin.write(json.dumps([code, environment, str(out)]) + "\n")
            process.stdin.flush()
            status = int(process.stdout.readline())
            return status, out.read_text(), out.with_name("out.err").read_text(errors="replace")
        yield run
        process.stdin.close()


@pytest.fixture
def imported(nursery):
    """What `import csrc` says and which implementation then runs -> (standard error, build_info)."""
    def run(cache, before="", face="ops", **environment):
        environment = {name: str(value) for name, value in environment.items()}
        environment = {"ECG_CACHE": str(cache), "ECG_CSRC": "", **environment}
        status, out, said = nursery(f"{before}\n{SAY_BEATS if face == 'beats' else SAY}", environment)
        assert status == 0 and "Traceback" not in said, said
        info = json.loads(out.splitlines()[-1])
        assert said.count("Warning") == (info["implementation"] == "reference"), said
        return said, info
    return run


@pytest.fixture
def cache(tmp_path):
    """A cache in which the libraries for this machine's compiler are ready."""
    for face, ready in LIBRARIES.items():
        name = hashlib.sha256(json.dumps(build.recipe(face)).encode()).hexdigest()[:16]
        library = tmp_path / "cache/csrc" / name / "ecg_csrc.so"
        build.make(library.parent)
        shutil.copy(ready, library)
        library.chmod(0o700)
        build.seal(library, library)
    return tmp_path / "cache"


def library_in(cache, face="ops"):
    [library] = [path for path in cache.rglob("ecg_csrc.so") if build.recipe_of(path)["face"] == face]
    return library


# ---- the reference runs, with one warning ---------------------------------------------------------------

def in_the_way(path, text=""):
    path.write_text(text)
    return path


NO_NINJA = """import sysconfig; at = sysconfig.get_path
sysconfig.get_path = lambda name, *rest: "/nowhere" if name == "scripts" else at(name, *rest)"""
NO_HOME = """import pathlib
def home(*_): raise RuntimeError("Could not determine home directory.")
pathlib.Path.home = home"""
FULL = """import tempfile
def mkdtemp(**_): raise OSError(28, "No space left on device")
tempfile.mkdtemp = mkdtemp"""
NO_TOOLS = """import sys, torch.utils
sys.modules["torch.utils.cpp_extension"] = None
del torch.utils.cpp_extension"""
NO_FCNTL = "import sys; sys.modules['fcntl'] = None"
NAME_ONE = r"name .*by \$CXX"
LATER = "build.log.*tried again a day later, or when .* is deleted"
ELSEWHERE = r"set \$ECG_CACHE to a folder"

# What is wrong: environment by a function of a folder, what the warning says, and code to be run before
STATES = {
    "no compiler": (lambda f: dict(CXX="no-such-compiler"),
                    r"no C\+\+ compiler \(no-such-comp.*" + NAME_ONE, ""),
    "no compiler by any name": (lambda f: dict(CXX="", PATH="/nowhere"), r"no C\+\+ compiler \(c\+\+\)", ""),
    "unbalanced quotes": (lambda f: dict(CXX='g++ "-m64'),
                          "cannot be read .*No closing quot.*" + NAME_ONE, ""),
    "a folder for a compiler": (lambda f: dict(CXX=f), "no C.. compiler .*" + NAME_ONE, ""),
    "not executable": (lambda f: dict(CXX=in_the_way(f / "c++")), "no C.. compiler .*" + NAME_ONE, ""),
    "not a program": (lambda f: dict(CXX=in_the_way(compiler(f), "\0\1")),
                      "fails .Exec format.*" + NAME_ONE, ""),
    "it prints nothing": (lambda f: dict(CXX=compiler(f, version="")), "prints nothing.*" + NAME_ONE, ""),
    "it fails": (lambda f: dict(CXX=compiler(f, status=3)), "--version fails .status 3.*" + NAME_ONE, ""),
    "it prints garbage": (lambda f: dict(CXX=compiler(f, r"\377)json\"\001", compile="exit 1")), LATER, ""),
    "it cannot compile": (lambda f: dict(CXX=broken(f)), "out of order .*" + LATER, ""),
    "it complains in Latin-1": (lambda f: dict(CXX=broken(f, r"\344rger")),
                                "error: \ufffdrger .*" + LATER, ""),
    "no headers": (lambda f: dict(CXX=broken(f, "torch/library.h: No such")),
                   "library.h: No such .*" + LATER, ""),
    "it links nothing": (lambda f: dict(CXX=compiler(f, link=":")), "No such file .*build.log", ""),
    "it links garbage": (lambda f: dict(CXX=compiler(f, link='echo > "$out"')),
                         "file too short .*" + LATER, ""),
    "no ninja": (lambda f: dict(CXX=compiler(f), PATH="/nowhere"), "ninja is missing .pip install", NO_NINJA),
    "a broken ninja": (lambda f: dict(CXX=compiler(f), PATH=compiler(f, status=1).rename(f / "ninja").parent),
                       "ninja does not work.*pip install", ""),
    "no build tools in PyTorch": (lambda f: dict(CXX=compiler(f)), "cpp_extension", NO_TOOLS),
    "a cache that cannot be": (lambda f: dict(ECG_CACHE="/proc/none"),
                               "cannot be used .*/none.*" + ELSEWHERE, ""),
    "a file for a cache": (lambda f: dict(ECG_CACHE=in_the_way(f / "file")),
                           "Not a directory.*" + ELSEWHERE, ""),
    "a dangling link": (lambda f: (f / "link").symlink_to("/nowhere") or dict(ECG_CACHE=f / "link"),
                        "cannot be used .*" + ELSEWHERE, ""),
    "a full disk": (lambda f: dict(CXX=compiler(f)), "cannot be used .*No space left.*" + ELSEWHERE, FULL),
    "a home that cannot be": (lambda f: dict(ECG_CACHE="", HOME="/proc/none"),
                              "cannot be used .*" + ELSEWHERE, ""),
    "no home": (lambda f: dict(ECG_CACHE=""), "no home folder.*" + ELSEWHERE, NO_HOME),
    "no fcntl, and a broken compiler": (lambda f: dict(CXX=broken(f)), "out of order", NO_FCNTL),
}


@pytest.mark.parametrize("state", STATES)
def test_the_reference_runs_with_one_warning(imported, tmp_path, state):
    environment, words, before = STATES[state]
    (tmp_path / "made").mkdir()
    environment = dict(ECG_CACHE=tmp_path / "cache") | environment(tmp_path / "made")
    said, info = imported(environment.pop("ECG_CACHE"), before, **environment)
    assert info["implementation"] == "reference" and re.search(words, info["why"]) and info["why"] in said
    assert not list(tmp_path.rglob("build-*"))
    assert "ninja" not in state or not list(tmp_path.rglob("failed.txt"))  # it is heeded once it is there


NO_PYBIND = "import sys; sys.modules['pybind11'] = None"
NO_HEADERS = """import sysconfig; at = sysconfig.get_path
sysconfig.get_path = lambda name, *rest: "/nowhere" if name == "include" else at(name, *rest)"""
STATES_OF_BEATS = {name: STATES[name] for name in (
    "no compiler", "not a program", "it prints nothing", "it links nothing", "it links garbage",
    "a cache that cannot be", "a file for a cache", "a full disk", "no home")} | {
    "it cannot compile": (lambda f: dict(CXX=compiler(f, link="printf 'error: out of \\344rder'>&2; exit 1")),
                          "out of \ufffdrder .*" + LATER, ""),
    "it says nothing": (lambda f: dict(CXX=compiler(f, link="exit 3")), "fails .status 3. .*" + LATER, ""),
    "it links another library": (lambda f: dict(CXX=compiler(f, link=COPY.replace("*beats_numpy*", "no"))),
                                 "does not define .*PyInit__beats.*" + LATER, ""),
    "no pybind11": (lambda f: {}, r"pybind11 is missing \(pip install pybind11\)", NO_PYBIND),
    "no headers of Python": (lambda f: {}, "Python's headers are missing .install", NO_HEADERS)}


@pytest.mark.parametrize("state", STATES_OF_BEATS)
def test_the_reference_of_beats_runs_with_one_warning(imported, tmp_path, state):
    environment, words, before = STATES_OF_BEATS[state]
    (tmp_path / "made").mkdir()
    environment = dict(ECG_CACHE=tmp_path / "cache") | environment(tmp_path / "made")
    said, info = imported(environment.pop("ECG_CACHE"), before, "beats", **environment)
    assert info["implementation"] == "reference" and re.search(words, info["why"]) and info["why"] in said
    assert not list(tmp_path.rglob("build-*"))


def test_what_is_wrong_for_both_is_told_once(tmp_path):
    code = """import csrc.beats, numpy, torch
ecg = numpy.zeros((1, 1, 1000), numpy.float32)
print(csrc.beats.segment_beats(ecg, 500)[1], csrc.segment_beats(torch.tensor(ecg), 500)[1])"""
    result = python(code, CXX="no-such-compiler", ECG_CACHE=tmp_path, ECG_CSRC="")
    assert result.stdout == "[0] tensor([0], dtype=torch.int32)\n", result.stderr
    assert result.stderr.count("reference runs instead") == 1 and "<string>:3: UserWarning" in result.stderr


def test_where_no_name_can_be_written_the_reference_runs(tmp_path):
    ascii_only = dict(LC_ALL="C", PYTHONUTF8=0, PYTHONCOERCECLOCALE=0)
    result = python(SAY, CXX=broken(tmp_path), ECG_CACHE=tmp_path / "é", ECG_CSRC="", **ascii_only)
    assert result.returncode == 0 and "reference" in result.stdout and result.stderr.count("Warning") == 1


def test_the_reference_computes(tmp_path):
    code = "import csrc, torch; print(csrc.segment_beats(torch.zeros(1, 1, 1000), 500)[1].tolist())"
    result = python(code, CXX="no-such-compiler", ECG_CACHE=tmp_path)
    assert result.stdout == "[0]\n" and "reference runs instead" in result.stderr


def test_a_build_that_failed_is_tried_again_a_day_later(imported, tmp_path):
    bad = broken(tmp_path)
    said = [imported(tmp_path / "cache", CXX=bad)[0] for _ in range(2)]
    [failed] = tmp_path.rglob("failed.txt")
    os.utime(failed, (time.time() - build.RETRY - 9,) * 2)
    said.append(imported(tmp_path / "cache", CXX=bad)[0])
    failed.write_text("")  # half written
    said.append(imported(tmp_path / "cache", CXX=bad)[0])
    assert ["building csrc, this once" in text for text in said] == [True, False, True, True]
    assert all("out of order" in text for text in said)


def test_the_reference_can_be_asked_for():
    result = python(SAY, ECG_CACHE="/proc/none", ECG_CSRC="reference")
    assert json.loads(result.stdout) == {"implementation": "reference", "why": "$ECG_CSRC asks for it"}
    assert not result.stderr


@pytest.mark.parametrize("value", ["refrence", "1", "é\n"])
def test_an_odd_wish_is_told_and_not_heeded(cache, value):
    result = python(SAY, ECG_CSRC=value, ECG_CACHE=cache)
    assert result.returncode == 0 and "compiled" in result.stdout and "Traceback" not in result.stderr
    assert result.stderr.count("Warning") == 1 and "it may be reference, or not set" in result.stderr


# ---- the compiled operators run -------------------------------------------------------------------------

NO_LOCKS = """import fcntl
def flock(*_): raise OSError(37, "No locks available")
fcntl.flock = flock"""


@pytest.mark.parametrize("before", [NO_LOCKS, NO_FCNTL])
def test_without_file_locks_it_says_so_once_and_builds(imported, tmp_path, before):
    fast = compiler(tmp_path)
    for built in (1, 0):
        said, info = imported(tmp_path / "cache", before, CXX=fast)
        assert info["implementation"] == "compiled" and said.count("without a file lock") == built, said
    assert build.is_whole(Path(info["library"])) and not list(tmp_path.rglob("build-*"))


@either
@pytest.mark.parametrize("environment", [dict(CXX="  "), dict(CXX="c++"), dict(TORCH_CUDA_ARCH_LIST="odd")])
def test_a_library_that_is_ready_is_taken(imported, cache, environment, face):
    said, info = imported(cache, face=face, **environment)
    assert info["library"] == str(library_in(cache, face)) and not said


def test_a_cuda_part_that_cannot_be_built_leaves_that_of_the_cpu(imported, tmp_path):
    toolkit = tmp_path / "cuda"
    (toolkit / "bin").mkdir(parents=True), (toolkit / "include").mkdir()
    (toolkit / "include/cuda_runtime.h").touch(), shutil.copy(broken(tmp_path), toolkit / "bin/nvcc")
    before = f"""import torch
torch.version.cuda, torch.utils.cpp_extension.CUDA_HOME = "13.0", {str(toolkit)!r}"""
    for wanted in ("nonsense", "9.0"):
        said, info = imported(tmp_path / "cache", before, CXX=compiler(tmp_path), TORCH_CUDA_ARCH_LIST=wanted)
        assert info["implementation"] == "compiled" and info["cuda"] == "" and "building csrc" in said, said


def test_beats_need_no_pytorch(cache):
    code = """import sys; sys.modules["torch"] = None
import csrc.beats, numpy
ecg = numpy.zeros((1, 1, 1000), numpy.float32)
print(csrc.beats.segment_beats(ecg, 500)[1], csrc.beats.build_info()["library"])
csrc.segment_beats"""
    result = python(code, ECG_CACHE=cache, ECG_CSRC="")
    assert result.stdout == f"[0] {library_in(cache, 'beats')}\n"
    assert result.stderr.count("Error") == 1 and "ModuleNotFoundError" in result.stderr  # tensors do


@either
def test_a_compiler_of_two_words_and_a_path_of_all_kinds(imported, tmp_path, face):
    """Really built: a wrapper around the compiler (which saves the time to optimise), an odd umask, a folder whose name must be
    quoted."""
    cache, wrapper = tmp_path / "a b'c \" é", tmp_path / "g++"
    wrapper.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')
    wrapper.chmod(0o755)
    cxx = f"env {wrapper}"
    said, info = imported(cache, "import os; os.umask(0o777)", face, CXX=cxx, LC_ALL="C")
    assert info["implementation"] == "compiled" and info["cxx"] == cxx and "building csrc" in said
    folder = Path(info["library"]).parent
    assert {stat.S_IMODE(path.stat().st_mode) for path in (cache, cache / "csrc", folder)} == {0o700}
    assert imported(cache, face=face, CXX=cxx, LC_ALL="C") == ("", info)


def test_build_info_says_what_runs():
    assert os.path.exists(INFO["library"]) and INFO["compiler"] and "-O3" in INFO["flags"]
    assert INFO["torch"] == torch.__version__


# ---- what is not whole ----------------------------------------------------------------------------------

DAMAGE = {
    "cut": lambda library: os.truncate(library, library.stat().st_size // 2),
    "empty": lambda library: os.truncate(library, 0),
    "changed": lambda library: library.write_bytes(library.read_bytes()[:-9] + b"123456789"),
    "without a seal": lambda library: build.seal_of(library).unlink(),
    "with half a seal": lambda library: os.truncate(build.seal_of(library), 20),
    "with a seal that is no text": lambda library: build.seal_of(library).write_bytes(b"\xff\xfe\0"),
    "another's to change": lambda library: library.chmod(0o777),
}


@either
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_library_is_built_again(imported, tmp_path, damage, face):
    fast = compiler(tmp_path)
    library = Path(imported(tmp_path / "cache", face=face, CXX=fast)[1]["library"])
    DAMAGE[damage](library)
    said, info = imported(tmp_path / "cache", face=face, CXX=fast)
    assert info["library"] == str(library) and "building csrc" in said and build.is_ready(library)


@pytest.fixture
def project(tmp_path):
    """A copy of csrc with the libraries built ahead, as setup.py leaves them."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc", ignore=shutil.ignore_patterns("__pycache__", "*.so*"))
    for face, ready in LIBRARIES.items():
        library = tmp_path / f"csrc/_{face}.so"
        shutil.copy(ready, library)
        build.seal(library, library)
    return tmp_path


def of(project):
    return f"import sys; sys.path.insert(0, {str(project)!r})"


@either
def test_a_library_built_ahead_is_taken_unless_it_is_stale(imported, project, face):
    said, info = imported(project / "cache", of(project), face, CXX="no-such-compiler")
    assert info["library"] == f"{project}/csrc/_{face}.so" and not said
    with open(project / "csrc/beats.h", "a") as file:
        file.write("// changed\n")
    said, info = imported(project / "cache", of(project), face, CXX="no-such-compiler")
    assert info["implementation"] == "reference"


def garbage(library):
    """Neither a library nor what it says it is, but sealed and with our recipe: as from another machine."""
    recipe = re.search(rb"recipe \{.*?\} end of recipe", library.read_bytes(), re.DOTALL)[0]
    library.write_bytes(b"\x7fELF" + recipe)
    build.seal(library, library)


def unreadable(library):
    library.write_bytes(library.read_bytes().replace(b'recipe {"', b'recipe {,'))
    build.seal(library, library)


def of_another_python(library):
    suffix = build.here("beats")["python"].encode()
    library.write_bytes(library.read_bytes().replace(suffix, suffix.replace(b"cpython-3", b"cpython-2")))
    build.seal(library, library)


def the_other(library):
    shutil.copy(LIBRARIES["ops" if "beats" in library.name else "beats"], library)
    build.seal(library, library)


@either
@pytest.mark.parametrize("damage", [*list(DAMAGE.values())[:-1], garbage, unreadable, the_other])
def test_a_damaged_library_built_ahead_is_left_alone(imported, cache, project, damage, face):
    damage(project / f"csrc/_{face}.so")
    said, info = imported(cache, of(project), face)
    assert info["library"] == str(library_in(cache, face)) and not said


def test_beats_built_ahead_for_another_python_are_left_alone(imported, cache, project):
    of_another_python(project / "csrc/_beats.so")
    assert imported(cache, of(project), "beats")[1]["library"] == str(library_in(cache, "beats"))


# ---- installed ------------------------------------------------------------------------------------------

@pytest.fixture
def sources(tmp_path):
    """What an installer sees."""
    folder = tmp_path / "sources"
    shutil.copytree(ROOT / "csrc", folder / "csrc", ignore=shutil.ignore_patterns("__pycache__", "*.so*"))
    for path in (*ROOT.glob("*.py"), *ROOT.glob("*.json"), ROOT / "README.md", ROOT / "LICENSE"):
        shutil.copy(path, folder)
    return folder


def run(folder, *command, **environment):
    environment = {**os.environ, "ECG_CSRC": "", **environment}
    result = subprocess.run([*map(str, command)], cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("way", [[], ["-e"]])
def test_an_installed_copy_has_what_it_opens_and_builds_from(sources, tmp_path, way):
    """pip install . (and -e .) into a new environment, which sees the packages of this one."""
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode:
        pytest.skip("no pip")  # (imported here, it would turn setuptools off for the tests that follow)
    run("/", sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    there = tmp_path / "venv/bin/python"
    site = Path(run("/", there, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "outer.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    options = "--no-deps", "--no-build-isolation", "--no-index", *way
    run(sources, there, "-m", "pip", "install", *options, ".", CXX="no-such")
    code = ("import data, csrc; print(data.__file__, len(data.knowledge()['findings']) > 50); "
            "print(csrc.build.FOLDER, csrc.build.digest_of_sources())")
    found = run("/", there, "-c", code, CXX="no-such", ECG_CACHE=str(tmp_path)).split()
    home = sources if way else site
    assert found == [str(home / "data.py"), "True", str(home / "csrc"), build.digest_of_sources()]


def test_a_source_distribution_holds_all_of_it(sources):
    run(sources, sys.executable, "setup.py", "-q", "sdist", CXX="no-such")
    [archive] = (sources / "dist").iterdir()
    names = {name.partition("/")[2] for name in tarfile.open(archive).getnames()}
    wanted = {f"csrc/{path.name}" for path in (sources / "csrc").glob("*.*")}
    assert {"prompts.json", "data.py", "train.py", *wanted} <= names


def test_libraries_built_by_setup_are_taken(imported, sources, tmp_path):
    run(sources, sys.executable, "setup.py", "-q", "build_ext", "--inplace", CXX=f"env {compiler(tmp_path)}")
    for face in LIBRARIES:
        said, info = imported(tmp_path / "cache", of(sources), face, CXX="no-such")
        assert info["library"] == f"{sources}/csrc/_{face}.so" and not said


def test_without_pytorch_setup_builds_beats_alone(imported, sources, tmp_path):
    """Into a wheel, too."""
    in_the_way(sources / "torch.py", "raise ImportError('no PyTorch here')")
    environment = dict(CXX=compiler(tmp_path), PYTHONPATH=sources)
    run(sources, sys.executable, "setup.py", "-q", "build_ext", "--inplace", **environment)
    assert {path.name for path in (sources / "csrc").glob("*.so*")} == {"_beats.so", "_beats.so.sha256"}
    assert imported(tmp_path / "cache", of(sources), "beats")[1]["library"] == f"{sources}/csrc/_beats.so"
    run(sources, sys.executable, "setup.py", "-q", "bdist_wheel", **environment)
    [wheel] = (sources / "dist").iterdir()
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"csrc/_beats.so", "csrc/_beats.so.sha256", "csrc/beats_numpy.cpp", "csrc/beats.py"} <= names


def test_setup_asked_to_build_says_why_it_cannot(sources):
    result = subprocess.run([sys.executable, "setup.py", "-q", "build_ext"], cwd=sources, text=True,
                            env={**os.environ, "CXX": "no-such"}, capture_output=True)
    assert result.returncode == 1 and result.stderr.startswith("error: there is no C++ compiler (no-such)")


# ---- whose cache is it? ---------------------------------------------------------------------------------

@either
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("change, words", [
    (lambda path: path.chmod(0o777), r"can be written by other users \(chmod go-w"),
    (lambda path: path.chmod(0o720), "can be written by other users"),
    pytest.param(lambda path: os.chown(path, 12345, -1), "belongs to another user",
                 marks=pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")),
])
def test_a_folder_that_is_not_ours_alone_is_refused(imported, cache, which, change, words, face):
    """A library in there could be anyone's."""
    folder = [cache, cache / "csrc", library_in(cache, face).parent][which]
    change(folder)
    said, info = imported(cache, face=face)
    assert info["implementation"] == "reference" and re.search(words, said) and str(folder) in said
    assert "set $ECG_CACHE" in said


@either
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_library_of_another_user_is_not_run(imported, tmp_path, face):
    fast = compiler(tmp_path)
    library = Path(imported(tmp_path / "cache", face=face, CXX=fast)[1]["library"])
    os.chown(library, 12345, -1)
    said, _ = imported(tmp_path / "cache", face=face, CXX=fast)
    assert "building csrc" in said and library.stat().st_uid == os.geteuid()


def test_a_link_to_a_cache_of_ours_in_a_folder_of_all_is_fine(imported, cache, tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    (shared / "link").symlink_to(cache)
    assert imported(shared / "link")[1]["implementation"] == "compiled"
    cache.rename(shared / "cache")
    assert imported(shared / "cache")[1]["implementation"] == "compiled"


def test_no_file_is_written_through_a_link(imported, tmp_path):
    bad, mine = broken(tmp_path), in_the_way(tmp_path / "mine", "precious")
    imported(tmp_path / "cache", CXX=bad)
    [folder] = (tmp_path / "cache/csrc").iterdir()
    for name in ("build.log", "failed.txt", "ecg_csrc.so.sha256"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(mine)
    os.utime(mine, (1, 1))
    imported(tmp_path / "cache", CXX=bad)
    assert not (folder / "failed.txt").is_symlink()
    (folder / "build.lock").unlink(), (folder / "build.lock").symlink_to(mine)
    assert "symbolic links" in imported(tmp_path / "cache", CXX=bad)[0]
    assert mine.read_text() == "precious"


@either
@pytest.mark.parametrize("umask", [0, 0o777])
def test_what_is_made_is_ours_alone_whatever_the_umask(imported, tmp_path, umask, face):
    fast, cache = compiler(tmp_path), tmp_path / "not/there/yet"
    assert imported(cache, f"import os; os.umask({umask})", face, CXX=fast)[1]["implementation"] == "compiled"
    for path in (tmp_path / "not", tmp_path / "not/there", cache, *cache.rglob("*")):
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077, path
    assert imported(cache, face=face, CXX=fast) == ("", imported(cache, face=face, CXX=fast)[1])
