"""Tables, demo, doctor and their statistics.     python -m pytest tests/test_tables.py"""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import time
import types

import numpy as np
import pytest
from conftest import ROOT, Command, run
from sklearn.metrics import roc_auc_score

import data
import train

RESULTS = ROOT / "notebooks" / "results"
ONE_CELL = "train.py table --rows abmil-20 --epochs 1"


def data_folder(folder, cohort, tasks: dict) -> None:
    """DATA with the cohort's slides and the tables `tasks`: name -> lines of the CSV."""
    (folder / "tasks").mkdir(parents=True)
    os.symlink(cohort / "slides", folder / "slides")
    for name, lines in tasks.items():
        (folder / "tasks" / f"{name}.csv").write_text("\n".join(lines) + "\n")


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


def test_resamples_are_drawn_class_by_class_the_last_one_first():
    """So those of two classes are what they were when there were only two."""
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 3, 40)
    scores = rng.dirichlet(np.ones(3), 40).round(1)  # some are equal
    for k in (2, 3):
        of_class = [np.flatnonzero(labels % k == i) for i in range(k)]
        drawn = np.random.default_rng(7)
        cases = [drawn.choice(m, (50, len(m))) for m in of_class[::-1]]
        cases = np.concatenate(cases, axis=1)
        given = scores[:, 1] if k == 2 else scores
        expected = [data.OUTCOME.metric((labels % k)[some], given[some]) for some in cases]
        found = train.bootstrap_aurocs(labels % k, given, 7, 50)
        assert found == pytest.approx(expected, abs=1e-12)
    assert train.bootstrap_aurocs([0, 0, 1, 1, 2], scores[:5], 0) is None
    assert train.bootstrap_aurocs([1, 0, 0], [0.1, 0.2, 0.3], 0) is None


def test_the_papers_averages_are_those_of_its_columns_but_for_two():
    means = {row: np.mean(values[:7]) for row, values in train.PAPER.items()}
    differ = {row for row, mean in means.items() if abs(mean - train.PAPER[row][7]) > 0.051}
    assert len(means) == 24
    assert differ == {"abmil-20", "cmem-7-patch"}


@pytest.mark.parametrize("name, rows, seeds", [("table", 24, 1), ("seeds", 8, 3)])
def test_committed_results_can_be_read(name, rows, seeds):
    results = train.Results(RESULTS / name)
    assert (len(results.rows), len(results.tasks), len(results.seeds)) == (rows, 7, seeds)
    check_aurocs(results)


def check_aurocs(results) -> None:
    for (row, task), scores in results.scores.items():
        areas = [roc_auc_score(results.labels[task], of_seed) for of_seed in np.transpose(scores)]
        assert results.aurocs[row, task] == pytest.approx(areas, abs=1e-9)


def test_rows_share_the_resamples():
    """Two rows that order the cases alike are equal in each resample; missing scores count not."""
    results = train.Results(RESULTS / "seeds")
    row = "abmil-20"
    for task in results.tasks:
        results.scores["other", task] = 3 * np.array(results.scores[row, task]) + 1
    samples = train.resampled_average(results, row)
    assert np.array_equal(samples, train.resampled_average(results, "other"))
    aurocs = [results.aurocs[row, task] for task in results.tasks]
    assert samples.mean() == pytest.approx(np.mean(aurocs), abs=0.005)
    results.scores["other", "skin_braf"][0] = np.nan  # a case that this row left out
    assert np.isfinite(train.resampled_average(results, "other")).all()
    results.scores["other", "skin_braf"][:] = np.nan  # a refused cell
    assert train.resampled_average(results, "other") is None


def test_table_runs_skips_and_prints(cohort, tmp_path):
    """A second time with other settings it replaces nothing."""
    command = "train.py table --rows abmil-20 mem-0.25-cls --steps 4 --epochs 1 --seeds 2 --out t"
    out, _ = run(command, "--data", cohort, cwd=tmp_path)
    paper = np.mean([train.PAPER["abmil-20"][i] for i in (4, 6)])
    for text in ("## Table 1", "## Table 2", "| MEM 0.25 CLS |", f"| {paper:.1f} |"):
        assert text in out
    assert (tmp_path / "t" / "SUMMARY.md").read_text() in out
    results = train.Results(tmp_path / "t")
    assert (results.tasks, results.seeds) == (["gastric_her2", "skin_braf"], ["0", "1"])
    check_aurocs(results)
    for scores in results.scores.values():
        assert np.diff(scores, axis=1).any()  # the two seeds differ
    assert results.machine["data"] == "synthetic cohort, seed 3"
    again, err = run(command, "--data", cohort, cwd=tmp_path)
    assert out.endswith(again)
    assert err.count("this run is finished") == 12
    before = {path: path.read_bytes() for path in (tmp_path / "t").glob("*.*")}
    _, err = run(command, "--data", cohort, "--epochs", 2, cwd=tmp_path, code=1)
    assert "epochs 1 there, 2 now" in err
    assert {path: path.read_bytes() for path in (tmp_path / "t").glob("*.*")} == before


def test_a_refused_cell_costs_itself(cohort, tmp_path):
    lines = (cohort / "tasks" / "skin_braf.csv").read_text().splitlines()
    no_test = [line for line in lines if not line.endswith(",test")]
    one_class = [line.replace(",1,", ",0,") for line in lines]
    tasks = {"own": lines, "skin_braf": lines, "one_class": one_class, "no_test": no_test}
    data_folder(tmp_path / "mine", cohort, tasks)
    out, _ = run(f"{ONE_CELL} --data mine --out u", cwd=tmp_path, code=3)
    assert "|  | Skin BRAF | no_test | one_class | own | average" in out
    assert "| n/a | n/a |" in out
    _, err = run(f"{ONE_CELL} --data mine --tasks no_test --out v", cwd=tmp_path, code=1)
    assert "no cell of the table has a score" in err


def test_a_table_of_several_processes(cohort, tmp_path):
    command = f"-m torch.distributed.run --standalone --nproc-per-node 2 {ROOT}/{ONE_CELL}"
    command += f" --tasks skin_braf --data {cohort} --epochs "
    for epochs in (1, 2):
        asked = [sys.executable, *f"{command}{epochs}".split()]
        done = subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert (done.returncode == 0) == (epochs == 1), done.stderr
    assert "holds a run with other settings" in done.stderr
    assert len(train.Results(tmp_path / "runs" / "table").scores) == 1


def fold_tables(cohort, folder) -> None:
    """DATA with three folds of two and of three classes, over 24 cases of the cohort."""
    lines = (cohort / "tasks" / "skin_braf.csv").read_text().splitlines()[1:]
    rows = [line.split(",") for line in lines if line.endswith("train")]
    tables: dict = {"two": [], "three": []}
    for case_id, slide_id, label, _ in rows:
        number = int(case_id.split("-")[-1])
        folds = ["test" if number % 3 == fold else "train" for fold in range(3)]
        grade = ["low", "medium", "high"][number // 3 % 3]
        tables["two"].append(",".join([case_id, slide_id, label, *folds]))
        tables["three"].append(",".join([case_id, slide_id, grade, *folds]))
    header = "case_id,slide_id,label,fold_0,fold_1,fold_2"
    data_folder(folder, cohort, {name: [header, *lines] for name, lines in tables.items()})


def test_a_table_pools_its_folds_and_goes_on_after_it_was_killed(cohort, tmp_path):
    """One AUROC of the test cases of all folds, each scored by a model that never saw it."""
    fold_tables(cohort, tmp_path / "d")
    command = "train.py table --rows mem-0.50-cls --steps 2 --epochs 1 --data d --out t"
    folder = tmp_path / "t" / "seed-0"
    first = folder / "three-mem-0.50-cls-fold-0" / "result.json"
    killed = Command(command, cwd=tmp_path)
    while killed.process.is_alive() and not first.exists():
        time.sleep(0.05)
    killed.process.kill()
    assert killed.end()[0] == -9
    before = first.stat().st_mtime_ns
    out, _ = run(command, cwd=tmp_path)
    assert "AUROC x 100 on the test cases of d, those of all folds together" in out
    assert first.stat().st_mtime_ns == before
    results = train.Results(tmp_path / "t")
    columns = {"two": ["score"], "three": ["score_high", "score_low", "score_medium"]}
    for task, names in columns.items():
        labels = []
        scores = []
        for fold in range(3):
            cases = data.read_task(tmp_path / "d", task, fold)
            path = folder / f"{task}-mem-0.50-cls-fold-{fold}" / "predictions.csv"
            lines = data.read_csv(path, ("case_id", "label", "split", *names))
            lines = [line for line in lines if line["split"] == "test"]
            tested = {case.case_id for case in cases if case.split == "test"}
            assert {line["case_id"] for line in lines} == tested
            labels += [line["label"] for line in lines]
            scores += [[float(line[name]) for name in names] for line in lines]
        assert len(labels) == len(cases)
        by_hand = roc_auc_score(labels, np.squeeze(scores), multi_class="ovr")
        assert results.aurocs["mem-0.50-cls", task] == [pytest.approx(by_hand, abs=1e-12)]
    for line in data.read_csv(tmp_path / "t" / "results.csv", ("low", "high")):
        assert float(line["low"]) <= float(line["auroc"]) <= float(line["high"])
    assert train.resampled_average(results, "mem-0.50-cls").shape == (1000,)


def test_a_case_of_several_folds_has_the_mean_of_its_scores(tmp_path):
    header = ("case_id", "label", "score", "split")
    folders = [tmp_path / "0", tmp_path / "1"]
    for folder, scores in zip(folders, [(0.2, 0.9, 0.4), (0.6, 0.1)], strict=True):
        rows = [(f"p{i}", i % 2, score, "test") for i, score in enumerate(scores)]
        data.write_csv(folder / "predictions.csv", header, [*rows, ("q", 1, 1, "tune")])
    found = train.tested_cases(folders, data.BINARY)
    assert found == {("p0", 0): [0.4], ("p1", 1): [0.5], ("p2", 0): [0.4]}


def test_demo_wants_its_own_task(cohort, tmp_path):
    data_folder(tmp_path / "d", cohort, {})
    _, err = run("train.py demo --data d", cwd=tmp_path, code=1)
    assert "{'gastric_her2'}: no such row or task" in err


def test_doctor_names_what_is_there_and_what_is_missing(monkeypatch, capsys):
    versions = {"torch": "1.2.3"}
    monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)
    monkeypatch.setattr(importlib.metadata, "PackageNotFoundError", KeyError)
    disk = types.SimpleNamespace(free=2**30)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: disk)
    train.doctor()
    out = capsys.readouterr().out
    for pattern in ("torch +1.2.3", "h5py +WARNING: missing; pip", "1.0 GiB\n[0-9]+ warnings$"):
        assert re.search(pattern, out)
