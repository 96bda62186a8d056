import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tensors here are small, and processes many
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SHARED = Path(os.environ.get("ECG_TEST_DATA", ROOT.parent / "shared" / "data")).parent  # real recordings
GOLDEN = ROOT / "tests" / "golden"  # what the authors' code gave


def small_config(method, **options):
    """A method's small default with some options."""
    import model as models
    return models.configure(method, **options)


def toy_config(method, **options):
    """One of few weights."""
    import model as models
    narrow = {"width": 0.125} if "width" in models.encoder_settings(small_config(method, **options).encoder) else {}
    return small_config(method, **{"dim": 16} | narrow | options)


def write_config(folder, method, made_by={}, **options):
    """The config.json of a run of a method's small default."""
    import json
    import model as models
    made_by = dict(program=models.VERSION, torch="", csrc="", store="") | made_by
    (folder / "config.json").write_text(json.dumps(models.settings_of(small_config(method, **options)) | {"made_by": made_by}))


def python(code, *arguments, **environment):
    """Python code, run beside the project in a process of its own."""
    environment = {**os.environ, **{name: str(value) for name, value in environment.items()}}
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, env=environment,
                          capture_output=True, text=True, errors="replace")


@pytest.fixture
def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
