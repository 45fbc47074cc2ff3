"""Shared by the tests: python -m pytest tests"""

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
os.environ.setdefault(
    "SOURCE_DATE_EPOCH", "946684800"
)  # of all slide files: equal content is equal bytes
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the notebooks run beside the other tests
if os.environ.get("MIXMAG_REAL"):
    os.environ["MIXMAG_REAL"] = os.path.abspath(
        os.environ["MIXMAG_REAL"]
    )  # notebooks run in another folder
SERVER = multiprocessing.get_context(
    "forkserver"
)  # has imported what the commands import, and computed nothing
SERVER.set_forkserver_preload(["train", "matplotlib.pyplot", "h5py", "tifffile"])


@pytest.fixture(scope="session")
def real():
    """The folder of real slides that MIXMAG_REAL names; tests that want it are skipped, saying so, where it is not set."""
    if not os.environ.get("MIXMAG_REAL"):
        pytest.skip("MIXMAG_REAL is not set: no real files to try this on")
    return Path(os.environ["MIXMAG_REAL"])


def command(script, args, cwd, out, environment, limits):
    """What a process of the server does: the script's last lines, with its output in files."""
    os.chdir(cwd)
    os.environ.update(environment)
    for stream, path in ((1, out), (2, f"{out}.err")):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    for (
        name,
        value,
    ) in limits.items():  # RLIMIT_FSIZE in bytes; RLIMIT_AS in bytes beyond what is there
        value += (
            int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            if name == "RLIMIT_AS"
            else 0
        )
        resource.setrlimit(getattr(resource, name), (value, value))
    sys.argv = [script, *args]
    import torch

    import data
    import train

    if "WORLD_SIZE" in environment:
        torch.set_num_threads(1)  # as torchrun does
    module = {"data.py": data, "train.py": train}[script]
    arguments = module.parse()
    sys.exit(data.run_command(module.COMMANDS[arguments.command], arguments))


class Command:
    """A command of the project in a process of its own, as a user would start it, but for the seconds that its imports take."""

    def __init__(self, script, *args, cwd, environment=None, **limits):
        self.folder = tempfile.TemporaryDirectory()
        self.out = Path(self.folder.name) / "out"
        self.process = SERVER.Process(
            target=command,
            args=(
                script,
                [str(a) for a in args],
                str(cwd),
                str(self.out),
                environment or {},
                limits,
            ),
        )
        self.process.start()

    def hears(self) -> bool:
        """Whether it catches SIGTERM by now, or has ended."""
        try:
            return bool(
                int(
                    Path(f"/proc/{self.process.pid}/status")
                    .read_text()
                    .split("SigCgt:")[1]
                    .split()[0],
                    16,
                )
                >> 14
                & 1
            )
        except (OSError, IndexError):
            return True

    def end(self, timeout=600) -> tuple[int, str, str]:
        """Wait for it: exit code (-9 for SIGKILL), stdout, stderr."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"it has not ended within {timeout} s"
        return self.process.exitcode, *(
            p.read_text("utf-8") if p.exists() else "" for p in (self.out, Path(f"{self.out}.err"))
        )


def run(script, *args, cwd, code=0, timeout=600, **limits):
    """Run a command of the project, check its exit code and that it ends without a traceback, return (stdout, stderr)."""
    found, out, err = Command(script, *args, cwd=cwd, **limits).end(timeout)
    assert found == code, f"exit code {found}, expected {code}\n{out}\n{err}"
    assert "Traceback" not in err, err
    return out, err


@pytest.fixture(scope="session")
def cohort(tmp_path_factory):
    """A corner of the synthetic cohort: two tasks, 2 regions a slide, 16 to 24 cases a split; training on it takes seconds."""
    import data

    data.QUICK_FLOORS, before = (
        {"train": (24, 10), "tune": (16, 6), "test": (24, 10)},
        data.QUICK_FLOORS,
    )
    data.COHORT, whole = (
        {
            task: {split: (10, 11, 0.3) for split in data.SPLITS}
            for task in ("gastric_her2", "skin_braf")
        },
        data.COHORT,
    )
    folder = tmp_path_factory.mktemp("cohort")
    data.synth_cohort(folder, regions=2, seed=3)
    data.QUICK_FLOORS, data.COHORT = before, whole
    return folder


def execute(path, folder) -> None:
    """A notebook, offline, quick, and with nothing but the modules and its own folder beside it. An error in a cell is raised here."""
    import nbformat
    from nbclient import NotebookClient

    os.environ["IPYTHONDIR"] = str(folder / "ipython")
    for module in ROOT.glob("*.py"):
        shutil.copy(module, folder)
    shutil.copytree(path.parent, folder / "notebooks")
    NotebookClient(
        nbformat.read(path, 4),
        timeout=900,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder / "notebooks")}},
    ).execute()


@pytest.fixture(scope="session", autouse=True)
def executed(request, tmp_path_factory):
    """path -> the future of its execution: the notebooks that are asked for run one after the other beside all tests, from the first test on."""
    paths = [
        item.callspec.params["path"]
        for item in request.session.items
        if item.name.startswith("test_runs[")
    ]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield {
            path: pool.submit(execute, path, tmp_path_factory.mktemp(path.stem)) for path in paths
        }
