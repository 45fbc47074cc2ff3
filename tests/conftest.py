"""Shared by the tests: python -m pytest tests"""

import csv
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("SOURCE_DATE_EPOCH", "946684800")  # equal slides have equal metadata
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the notebooks run beside the other tests
if os.environ.get("MIXMAG_REAL"):
    os.environ["MIXMAG_REAL"] = os.path.abspath(os.environ["MIXMAG_REAL"])
SERVER = multiprocessing.get_context("forkserver")  # has imported what the commands import
SERVER.set_forkserver_preload(["train", "matplotlib.pyplot", "h5py", "tifffile"])


@pytest.fixture(scope="session")
def real():
    """The folder of real files that MIXMAG_REAL names. Without it such tests are skipped."""
    if not os.environ.get("MIXMAG_REAL"):
        pytest.skip("MIXMAG_REAL is not set: no real files to try this on")
    return Path(os.environ["MIXMAG_REAL"])


def run_script(script, args, cwd, out, environment, limits):
    """What a process of the server does: the script's last lines, with its output in files.
    limits: RLIMIT_FSIZE in bytes, and the like."""
    os.chdir(cwd)
    os.environ.update(environment)
    for stream, path in ((1, out), (2, f"{out}.err")):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), (value, value))
    import torch

    import data
    import train

    if "WORLD_SIZE" in environment:
        torch.set_num_threads(1)  # as torchrun does
    sys.exit({"data.py": data, "train.py": train}[script].main(args))


class Command:
    """A command in a process of its own, as a user starts it, without the time of its imports.
    command: "data.py verify" and the like; further arguments are passed on as they are."""

    def __init__(self, command, *args, cwd, environment=None, **limits):
        self.folder = tempfile.TemporaryDirectory()
        self.out = Path(self.folder.name) / "out"
        script, *first = command.split()
        arguments = [*first, *map(str, args)]
        place = (script, arguments, str(cwd), str(self.out), environment or {}, limits)
        self.process = SERVER.Process(target=run_script, args=place)
        self.process.start()

    def hears(self) -> bool:
        """Whether it catches SIGTERM by now, or has ended."""
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
            caught = int(status.split("SigCgt:")[1].split()[0], 16)
        except (OSError, IndexError):
            return True
        return bool(caught >> 14 & 1)

    def end(self, timeout=600) -> tuple[int, str, str]:
        """Wait for it: exit code (-9 for SIGKILL), stdout, stderr."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"it has not ended within {timeout} s"
        texts = []
        for path in (self.out, Path(f"{self.out}.err")):
            texts.append(path.read_text("utf-8") if path.exists() else "")
        return self.process.exitcode, texts[0], texts[1]


def run(command, *args, cwd, code=0, timeout=600, **limits):
    """Run a command, check its exit code and that there is no traceback: (stdout, stderr)."""
    found, out, err = Command(command, *args, cwd=cwd, **limits).end(timeout)
    assert found == code, f"exit code {found}, expected {code}\n{out}\n{err}"
    assert "Traceback" not in err, err
    return out, err


def failures(path):
    """slide_id -> reason."""
    with open(path, newline="", encoding="utf-8") as file:
        return {row["slide_id"]: row["reason"] for row in csv.DictReader(file)}


@pytest.fixture(scope="session")
def cohort(tmp_path_factory):
    """A corner of the synthetic cohort: two tasks, 2 regions a slide, 16 to 24 cases a split."""
    import data

    folder = tmp_path_factory.mktemp("cohort")
    splits = dict.fromkeys(data.SPLITS, (10, 11, 0.3))
    with pytest.MonkeyPatch.context() as patch:
        floors = {"train": (24, 10), "tune": (16, 6), "test": (24, 10)}
        patch.setattr(data, "QUICK_FLOORS", floors)
        patch.setattr(data, "COHORT", dict.fromkeys(("gastric_her2", "skin_braf"), splits))
        data.synth_cohort(folder, regions=2, seed=3)
    return folder


def execute(path, folder) -> None:
    """A notebook, offline and quick, with nothing but the modules and its own folder beside it."""
    import nbformat
    from nbclient import NotebookClient

    os.environ["IPYTHONDIR"] = str(folder / "ipython")
    for module in ROOT.glob("*.py"):
        shutil.copy(module, folder)
    shutil.copytree(path.parent, folder / "notebooks")
    place = {"metadata": {"path": str(folder / "notebooks")}}
    notebook = nbformat.read(path, 4)
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources=place).execute()


@pytest.fixture(scope="session", autouse=True)
def executed(request, tmp_path_factory):
    """path -> the future of its execution. Notebooks run one after the other beside all tests."""
    items = request.session.items
    paths = [item.callspec.params["path"] for item in items if item.name.startswith("test_runs[")]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        futures = {}
        for path in paths:
            futures[path] = pool.submit(execute, path, tmp_path_factory.mktemp(path.stem))
        yield futures
