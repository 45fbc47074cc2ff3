"""Shared by the tests: python -m pytest tests"""
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def real():
    """The folder of real slides that MIXMAG_REAL names; tests that want it are skipped, saying so, where it is not set."""
    if not os.environ.get("MIXMAG_REAL"):
        pytest.skip("MIXMAG_REAL is not set: no real files to try this on")
    return Path(os.environ["MIXMAG_REAL"]).resolve()


def run(script, *args, cwd, code=0, timeout=600):
    """Run a command of the project as a user would, check its exit code, return (stdout, stderr)."""
    done = subprocess.run([sys.executable, str(ROOT / script), *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == code, f"exit code {done.returncode}, expected {code}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout, done.stderr


@pytest.fixture(scope="session")
def cohort(tmp_path_factory):
    """A corner of the synthetic cohort: two tasks, 2 regions a slide, 16 to 24 cases a split; training on it takes seconds."""
    import data
    data.QUICK_FLOORS, before = {"train": (24, 10), "tune": (16, 6), "test": (24, 10)}, data.QUICK_FLOORS
    data.COHORT, whole = {task: {split: (10, 11, 0.3) for split in data.SPLITS} for task in ("breast_cdh1", "skin_braf")}, data.COHORT
    folder = tmp_path_factory.mktemp("cohort")
    data.synth_cohort(folder, regions=2, seed=3)
    data.QUICK_FLOORS, data.COHORT = before, whole
    return folder
