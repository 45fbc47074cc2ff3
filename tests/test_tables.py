"""Tables, demo, doctor and their statistics.     python -m pytest tests/test_tables.py"""

import itertools
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, run
from sklearn.metrics import roc_auc_score

import data
import train

RESULTS = ROOT / "notebooks" / "results"
ONE_CELL = ("table", "--rows", "abmil-20", "--epochs", 1)


def files(folder) -> dict:
    return {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def data_folder(folder, cohort, tasks: dict):
    """DATA with the cohort's slides and the tables `tasks`: name -> lines of the CSV."""
    (folder / "tasks").mkdir(parents=True)
    os.symlink(cohort / "slides", folder / "slides")
    for name, lines in tasks.items():
        (folder / "tasks" / f"{name}.csv").write_text("\n".join(lines) + "\n")
    return folder


def task_lines(cohort, task="skin_braf") -> list[str]:
    return (cohort / "tasks" / f"{task}.csv").read_text().splitlines()


def test_bootstrap_interval_covers_the_true_value():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], [60, 30])
    covered = 0
    for trial in range(60):
        scores = rng.standard_normal(90) + labels  # true AUROC: Phi(1 / sqrt 2)
        low, high = train.interval(train.bootstrap_aurocs(labels, scores, trial, 400))
        assert low <= roc_auc_score(labels, scores) <= high
        covered += low <= 0.7602 <= high
    assert covered >= 50  # 57 are expected; fewer than 50 have a chance of about 1e-4


def test_bootstrap_areas_are_those_of_scikit_learn():
    """With so few cases every resample can be listed."""
    labels = np.array([1, 0, 0, 1, 0])
    scores = np.array([0.9, 0.1, 0.5, 0.5, 0.7])
    possible = set()
    for positive in itertools.product([0.9, 0.5], repeat=2):
        for negative in itertools.product([0.1, 0.5, 0.7], repeat=3):
            possible.add(round(roc_auc_score([1, 1, 0, 0, 0], positive + negative), 9))
    samples = {round(float(s), 9) for s in train.bootstrap_aurocs(labels, scores, 0, 200)}
    assert samples <= possible
    assert len(samples) > 4
    assert train.bootstrap_aurocs([1, 0, 0], [0.1, 0.2, 0.3], 0) is None


def test_the_papers_averages_are_those_of_its_columns_but_for_two():
    differ = set()
    for row, values in train.PAPER.items():
        assert len(values) == len(train.TASK_TITLES) + 1
        if abs(np.mean(values[:-1]) - values[-1]) > 0.051:
            differ.add(row)
    assert len(train.PAPER) == 24
    assert differ == {"abmil-20", "cmem-7-patch"}


@pytest.mark.parametrize("name, rows, seeds", [("longer", 7, 3), ("quick", 24, 1)])
def test_committed_results_can_be_read(name, rows, seeds):
    results = train.read_results(RESULTS / name)
    assert (len(results.rows), len(results.tasks), len(results.seeds)) == (rows, 7, seeds)
    for (row, task), scores in results.scores.items():
        for auroc, of_seed in zip(results.aurocs[row, task], np.transpose(scores), strict=True):
            assert auroc == pytest.approx(roc_auc_score(results.labels[task], of_seed), abs=1e-9)


def test_rows_share_the_resamples():
    """Of two rows with the same order of cases the difference is 0 in each resample."""
    rng = np.random.default_rng(0)
    labels = {"a": [0, 1] * 20, "b": [0, 0, 1] * 12}
    scores = {}
    for task in labels:
        scores["one", task] = rng.random((len(labels[task]), 2)) + 0.2 * np.c_[labels[task]]
        scores["other", task] = 3 * scores["one", task] + 1
    results = train.Results(["one", "other"], ["a", "b"], ["0", "1"], {}, labels, scores, {})
    one = train.resampled_average(results, "one")
    assert np.array_equal(one, train.resampled_average(results, "other"))
    areas = []
    for task in labels:
        areas += [roc_auc_score(labels[task], of_seed) for of_seed in scores["one", task].T]
    low, high = train.interval(one)
    assert low < np.mean(areas) < high
    scores["one", "b"][0] = np.nan  # one case was left out
    assert train.resampled_average(results, "one") is not None
    scores["one", "b"][:] = np.nan  # the cell was refused
    assert train.resampled_average(results, "one") is None


def test_table_runs_skips_and_prints(cohort, tmp_path):
    rows = ("abmil-20", "random-all-cls", "mem-0.25-patch")
    settings = ("--steps", 4, "--epochs", 1, "--seeds", 2, "--out", "t")
    args = ("table", "--data", cohort, "--rows", *rows, *settings)
    out, _ = run("train.py", *args, cwd=tmp_path)
    for text in ("## Table 1", "## Table 2", "| MEM 0.25 patch |", "| Random all CLS |"):
        assert text in out
    paper = np.mean([train.PAPER["abmil-20"][4], train.PAPER["abmil-20"][6]])
    assert f"| {paper:.1f} |" in out
    assert (tmp_path / "t" / "SUMMARY.md").read_text() in out
    results = train.read_results(tmp_path / "t")
    assert (results.tasks, results.seeds) == (["gastric_her2", "skin_braf"], ["0", "1"])
    for (row, task), scores in results.scores.items():
        expected = [
            roc_auc_score(results.labels[task], of_seed) for of_seed in np.transpose(scores)
        ]
        assert results.aurocs[row, task] == pytest.approx(expected, abs=1e-9)
    facts = results.machine
    assert facts["data"] == "synthetic cohort, seed 3"
    assert facts["steps"] == 4
    again, err = run("train.py", *args, cwd=tmp_path)
    assert out.endswith(again)
    assert err.count("this run is finished") >= 12


def test_refused_cells_and_other_settings(cohort, tmp_path):
    args = (*ONE_CELL, "--data", cohort, "--tasks", "skin_braf", "--out", "t")
    run("train.py", *args, cwd=tmp_path)
    before = files(tmp_path / "t")
    _, err = run("train.py", *args, "--epochs", 2, cwd=tmp_path, code=1)
    assert "epochs 1 there, 2 now" in err
    assert files(tmp_path / "t") == before
    lines = task_lines(cohort)
    one_class = [lines[0], *(line.replace(",1,", ",0,") for line in lines[1:])]
    no_test = [line for line in lines if not line.endswith(",test")]
    tasks = {"own": lines, "skin_braf": lines, "one_class": one_class, "no_test": no_test}
    data_folder(tmp_path / "mine", cohort, tasks)
    (tmp_path / "mine" / "tasks" / "._own.csv").write_bytes(b"\0\5")  # as macOS leaves them
    out, err = run("train.py", *ONE_CELL, "--data", "mine", "--out", "u", cwd=tmp_path, code=3)
    assert "|  | Skin BRAF | no_test | one_class | own | average" in out
    assert "| n/a | n/a |" in out
    assert "one_class" in err
    args = (*ONE_CELL, "--data", "mine", "--tasks", "no_test", "--out", "v")
    _, err = run("train.py", *args, cwd=tmp_path, code=1)
    assert "no cell of the table has a score" in err
    assert not (tmp_path / "v" / "results.csv").exists()


def test_a_table_of_several_processes(cohort, tmp_path):
    args = [*ONE_CELL, "--data", cohort, "--tasks", "skin_braf", "--out", "t"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *torchrun, ROOT / "train.py", *args]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for epochs, text in (("1", ""), ("2", "holds a run with other settings")):
        asked = [str(word) for word in (*command, "--epochs", epochs)]
        done = subprocess.run(
            asked, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=environment
        )
        assert (done.returncode == 0) == (text == ""), done.stderr
        assert text in done.stderr
    assert len(train.read_results(tmp_path / "t").scores) == 1


def test_demo_wants_its_own_task(cohort, tmp_path):
    data_folder(tmp_path / "d", cohort, {"skin_braf": task_lines(cohort)})
    _, err = run("train.py", "demo", "--data", "d", cwd=tmp_path, code=1)
    assert "gastric_her2: no such row or task" in err
    assert not (tmp_path / "runs").exists()


def test_machine_facts_want_no_git(cohort, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    train.write_machine(tmp_path / "machine.json", {"data": str(cohort)}, 0.0)
    assert "commit" not in data.read_json(tmp_path / "machine.json")


def test_doctor_names_what_is_there_and_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(train, "PACKAGES", ["torch", "no-such-package"])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 8, 2**30))
    assert train.doctor() == 0
    out = capsys.readouterr().out
    for text in (
        "torch  ",
        "WARNING: no-such-package",
        "free disk          1.0 GiB",
        "on this disk",
    ):
        assert text in out
