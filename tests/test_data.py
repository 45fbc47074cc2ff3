"""Slide files, data sets, tasks, cohort, verify.     python -m pytest tests/test_data.py"""

import errno
import json
import math
import os
import pickle
import resource
import signal
import subprocess
import sys
import tempfile
import time
import unicodedata
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import openslide
import pytest
import safetensors
import scipy.stats
import torch
from conftest import ROOT, run
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch.utils.data import DataLoader, RandomSampler

import data
from data import MixmagError
from mixmag import Geometry

META = {
    "encoder": "test",
    "magnifications": [5, 10, 20],
    "tile_px": 224,
    "mpp": 0.5,
    "cell_px": 896.0,
    "origin": [0.0, 0.0],
    "width": 9000,
    "height": 9000,
    "n_bad": 0,
}


def square(side):
    return [(col, row) for row in range(side) for col in range(side)]


def make_slide(folder, slide_id="a", cells=((0, 0), (1, 0)), seed=0, dim=8, valid=None, **meta):
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((len(cells), 21, dim)).astype(np.float16)
    if valid is None:
        valid = np.ones((len(cells), 21), bool)
    path = folder / "slides" / f"{slide_id}.safetensors"
    cells = np.array(cells, np.int32).reshape(-1, 2)
    data.write_slide(path, features, cells, valid, {**META, "slide_id": slide_id, **meta})
    return path


FOLDS = ("fold_0", "fold_1")


def task(folder, rows, name="t", splits=("split",)):
    path = folder / "tasks" / f"{name}.csv"
    data.write_csv(path, ("case_id", "slide_id", "label", *splits), rows)
    return path


def poison(path, at, value) -> None:
    """One feature of a slide file has another value."""
    slide = data.read_slide(path)
    slide.features[at] = value
    data.write_slide(path, slide.features, slide.cells, slide.valid, slide.meta)


def content(path):
    """metadata, tensors: as the library alone reads them."""
    with safetensors.safe_open(path, "numpy") as file:
        names = sorted(file.keys())
        return file.metadata(), {name: file.get_tensor(name) for name in names}


def write_by_hand(path, meta, tensors):
    """As slide files were written before the library wrote them, with the tensors in any order."""
    dtypes = {"bool": "BOOL", "float16": "F16", "float32": "F32", "int32": "I32"}
    header = {"__metadata__": meta}
    start = 0
    for name, x in tensors.items():
        end = start + x.nbytes
        dtype = dtypes[x.dtype.name]
        header[name] = {"dtype": dtype, "shape": x.shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    raw = b"".join(x.tobytes() for x in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw)


# ----------------------------------------------------------------------------------- the slide file
def test_slides_are_read_through_a_private_memory_map(tmp_path):
    path = make_slide(tmp_path, cells=[(3, 1), (0, 2)])
    raw = path.read_bytes()
    slide = data.read_slide(path)
    expected = slide.features.copy()
    assert str(path) in Path("/proc/self/maps").read_text()
    slide.features[:] = 0
    assert path.read_bytes() == raw
    assert slide.cells.tolist() == [[3, 1], [0, 2]] and slide.valid.all() and slide.dim == 8
    assert slide.meta["cell_px"] == 896.0 and slide.meta["magnifications"] == [5, 10, 20]
    again = data.read_slide(make_slide(tmp_path, seed=1))
    assert not np.array_equal(again.features, expected) and again.features.any()


def test_embeddings_of_another_type_are_not_written(tmp_path):
    features = np.zeros((4, 21, 8), np.float32)
    cells = np.array(square(2), np.int32)
    with pytest.raises(ValueError, match="float32.* expected .*float16"):
        data.write_slide(tmp_path / "a", features, cells, features[..., 0] > 0, META)


@pytest.mark.parametrize("order", [("cells", "features", "valid"), ("valid", "features", "cells")])
def test_files_written_by_hand_open_with_tensors_in_any_order(tmp_path, order):
    """In the second order the features begin at an odd byte."""
    path = make_slide(tmp_path, cells=[(0, 0)])
    meta, tensors = content(path)
    write_by_hand(path, meta, {name: tensors[name] for name in order})
    slide = data.read_slide(path)
    assert np.array_equal(slide.features, tensors["features"])
    assert np.array_equal(slide.cells, tensors["cells"]) and data.verify(tmp_path) == []


@pytest.mark.parametrize(
    "meta, tensors, words",
    [
        ({"format": "mixmag/2"}, {}, "expected format mixmag/1"),
        ({"magnifications": "[5, 10, 30]"}, {}, "magnifications that double"),
        ({"magnifications": "5"}, {}, "not iterable"),
        ({"magnifications": "[5, 10]"}, {}, r"expected .*float16', \(2, 5, 8\)"),
        ({"mpp": "half"}, {}, "Expecting value"),
        ({"slide_id": "b"}, {}, "it holds slide 'b'; rename the file"),
        ({}, {"features": np.zeros((2, 21, 8), np.float32)}, "float32.* expected"),
        ({}, {"features": np.zeros((2, 168), np.float16)}, "expected"),
        ({}, {"valid": np.ones((2, 20), bool)}, "expected"),
        ({}, {"cells": np.zeros((3, 2), np.int32)}, "expected"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, meta, tensors, words):
    path = make_slide(tmp_path)
    old_meta, old_tensors = content(path)
    write_by_hand(path, {**old_meta, **meta}, {**old_tensors, **tensors})
    with pytest.raises(MixmagError, match=f"a.safetensors: cannot be read as a slide.*{words}"):
        data.read_slide(path)


def test_slides_that_cannot_be_read_are_listed(tmp_path):
    for slide_id in "abc":
        make_slide(tmp_path, slide_id)
    (tmp_path / "slides" / "b.safetensors").write_bytes(b"no slide")
    with pytest.raises(MixmagError, match="b.safetensors: cannot be read"):
        data.read_slides(tmp_path)
    failed = []
    assert [s.slide_id for s in data.read_slides(tmp_path, failed=failed)] == ["a", "c"]
    assert [row[:2] for row in failed] == [("b", "read")]
    with pytest.raises(MixmagError, match="no slide can be read.*b.safetensors"):
        data.read_slides(tmp_path, ["b"], failed=[])
    make_slide(tmp_path, "b", dim=4)
    with pytest.raises(MixmagError, match="width 4, .* but a has .* width 8"):
        data.read_slides(tmp_path)
    with pytest.raises(MixmagError, match="no slide files"):
        data.read_slides(tmp_path / "absent")


def test_many_slides_do_not_exhaust_file_descriptors(tmp_path):
    for i in range(400):
        make_slide(tmp_path, f"s{i}")
    before = len(os.listdir("/proc/self/fd"))
    total = sum(float(slide.features[0, 0, 0]) for slide in data.read_slides(tmp_path))
    assert np.isfinite(total) and len(os.listdir("/proc/self/fd")) - before <= 260


# ------------------------------------------------------------------------------------------- verify
def test_verify_finds_every_flipped_byte(tmp_path):
    path = make_slide(tmp_path, cells=[(0, 0)])
    whole = path.read_bytes()
    assert data.verify(tmp_path) == []
    rng = np.random.default_rng(0)
    places = rng.choice(len(whole), 400, replace=False).tolist()
    for at in [*places, 0, 7, 8, len(whole) - 1]:
        changed = bytearray(whole)
        changed[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        assert data.verify(tmp_path), f"byte {at} flipped and nothing found"


FAULTS = [  # rows of a task table, and what is said of them
    (("c0", "other", 0, "test"), "line 8, case 'c0' is in two splits, train and test"),
    (("new", "absent", 1, "test"), "t.csv: 1 slide without a file, such as 'absent'"),
    (("c1", "nan", 0, "train"), "case 'c1' has two labels, 1 and 0"),
    (("x", "y", 7, "train"), "case 'x': label is '7', expected 0 or 1 or 2"),  # there are three
    (("x", "y", 1, "later"), "case 'x': split is 'later', expected train, tune or test"),
    (("z", "twin", 0, "test"), "one slide under several ids: other, s0, twin"),
    (("c9", "s5", 1, "test"), "'s5' stands in more than one row"),
    (("", "y", 1, "test"), "case_id or slide_id is empty"),
]


def test_verify_prints_every_finding(tmp_path):
    with pytest.raises(MixmagError, match="is no DATA folder: neither slides/ nor tasks/"):
        data.verify(tmp_path)
    good = [(f"c{i}", f"s{i}", i % 2, data.SPLITS[i // 2 % 3]) for i in range(6)]
    for i in range(6):
        make_slide(tmp_path, f"s{i}", seed=i)
    task(tmp_path, good)
    assert data.verify(tmp_path) == []
    make_slide(tmp_path, "other", encoder="another")
    make_slide(tmp_path, "twin", seed=0)
    poison(make_slide(tmp_path, "nan", seed=6), (0, 3, 2), np.nan)
    slides = tmp_path / "slides"
    whole = (slides / "s0.safetensors").read_bytes()
    (slides / "misnamed.safetensors").write_bytes(whole)
    (slides / "cut.safetensors").write_bytes(whole[:-10])
    task(tmp_path, good + [row for row, _ in FAULTS])
    task(tmp_path, [("c2", "new", 0, "train")], "small")
    (tmp_path / "tasks" / "bad.csv").write_text("case_id,slide_id\n")
    data.write_csv(tmp_path / "pretrain.csv", ("slide_id",), [("s0",), ("new",), ("gone",)])
    findings = "\n".join(data.verify(tmp_path))
    words = [
        "1 slide, such as other, with encoder another, width 8",
        "NaN or infinite features in cells [[0, 0]]",
        "holds slide 's0'",
        "cut.safetensors: cannot be read",
        "small.csv: split: tune has no case of class 0, 1",
        "bad.csv: column label, split is missing or twice",
        "pretrain.csv: slide 'new' belongs to a tune or test case",  # c2 is one in another task
        "pretrain.csv: 2 slides without a file, such as 'gone'",
    ]
    for expected in words + [said for _, said in FAULTS]:
        assert expected in findings, f"{expected!r} not among\n{findings}"
    assert "'s0' belongs" not in findings
    out, _ = run("data.py verify", tmp_path, cwd=tmp_path, code=1)
    assert out.count("\n") == findings.count("\n") + 2
    assert f"{tmp_path}: 11 slides, 3 task tables, " in out
    (tmp_path / "pretrain.csv").write_text("slide\nb\n")
    assert sum("column slide_id is missing" in line for line in data.verify(tmp_path)) == 1


# --------------------------------------------------------------------------------- tasks and splits
def test_an_outcome_of_another_kind_is_one_class(tmp_path, monkeypatch):
    class Grade(data.Outcome):
        def classes(self, labels):
            return ["low", "medium", "high"]

    monkeypatch.setattr(data, "OUTCOME", Grade())
    task(tmp_path, [("c", "s", "high", "train"), ("d", "t", "low", "train")])
    assert [case.label for case in data.read_task(tmp_path, "t")] == [2, 0]


@pytest.mark.parametrize(
    "labels, classes, parsed",
    [
        ("1 0 1.0 0.00", "0 1", [1, 0, 1, 0]),
        ("1 1", "0 1", [1, 1]),
        ("2.0 0 1 2", "0 1 2", [2, 0, 1, 2]),
        ("wild mutated wild", "mutated wild", [1, 0, 1]),  # sorted: the second is the positive one
        ("3+ 2+ 0 1+ 3+", "0 1+ 2+ 3+", [3, 2, 0, 1, 3]),
        ("0 1 5", "0 1 2", "'5', expected 0 or 1 or 2"),
        ("1 2", "0 1", "'2', expected 0 or 1"),
        *((x, "0 1", f"'{x}', expected 0 or 1") for x in ("1.5", "-1", "", "nan", "NA", "2")),
        ("0 1 high", "0 1", "'high', expected 0 or 1"),
        ("low high NA", "high low", "'NA', expected high or low"),
    ],
)
def test_labels_are_numbers_from_0_on_or_names(tmp_path, labels, classes, parsed):
    rows = [(f"c{i}", f"s{i}", label, "train") for i, label in enumerate(labels.split(" "))]
    task(tmp_path, rows)
    table = data.any_table(tmp_path / "tasks" / "t.csv")
    assert table.classes == classes.split()
    if isinstance(parsed, list):
        assert (table.findings, [case.label for case in table.cases]) == ([], parsed)
    else:
        assert [finding.split("label is ")[1] for finding in table.findings] == [parsed]


def test_the_binary_outcome_equals_its_definition():
    outcome = data.OUTCOME
    torch.manual_seed(0)
    logit = torch.randn(50) * 3
    label = (torch.rand(50) < 0.4).float()
    score = outcome.score(logit)
    assert score.dtype == torch.float64 and len(set(outcome.score(torch.tensor([30.0, 31.0])))) == 2
    assert torch.equal(score, torch.sigmoid(logit.double()))
    by_torch = torch.nn.BCEWithLogitsLoss(reduction="none")
    for smoothing in (0.0, 0.1):
        target = label * (1 - smoothing) + smoothing / 2
        assert torch.equal(outcome.loss(logit, label, smoothing), by_torch(logit, target))
    assert outcome.metric(label.tolist(), score.tolist()) == roc_auc_score(label, score)
    assert outcome.columns(["mutated", "wild"]) == ["score"]
    with pytest.raises(MixmagError, match="AUROC needs 2 classes; found 2 cases of 1"):
        outcome.metric([1, 1], [0.2, 0.3])


def test_the_outcome_of_more_classes_equals_its_definition():
    outcome = data.OUTCOME
    torch.manual_seed(0)
    logit = torch.randn(60, 4) * 3
    label = torch.randint(4, (60,)).float()
    score = outcome.score(logit)
    assert torch.allclose(score, logit.double().exp() / logit.double().exp().sum(1, keepdim=True))
    for smoothing in (0.0, 0.1):
        target = torch.nn.functional.one_hot(label.long(), 4) * (1 - smoothing) + smoothing / 4
        expected = -(target * score.log()).sum(1)
        assert torch.allclose(outcome.loss(logit, label, smoothing).double(), expected, atol=1e-5)
    by_sklearn = roc_auc_score(label, score, multi_class="ovr", average="macro")
    assert outcome.metric(label.tolist(), score.tolist()) == pytest.approx(by_sklearn, abs=1e-12)
    two = outcome.score(torch.stack([torch.zeros(9), logit[:9, 0]], 1))[:, 1]
    assert torch.allclose(two, outcome.score(logit[:9, 0]))
    with pytest.raises(MixmagError, match="AUROC needs 4 classes; found 3 cases of 2"):
        outcome.metric([1, 1, 3], score[:3])


# -------------------------------------------------------------------------------------------- folds
def slides_in(cases, *splits):
    return {i for case in cases if case.split in splits for i in case.slide_ids}


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3)), min_size=4, max_size=30),
    st.integers(2, 6),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=12, deadline=None)
def test_no_case_is_on_both_sides_of_a_fold(cases, folds, seed):
    """Whatever the table: new folds test each case once, whole; carved tune cases follow from seed
    and ids alone; the same --fold and --seed leave them out of pretraining."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        rows = []
        for i, (label, slides) in enumerate(cases):
            rows += [(f"p{i}", f"p{i}-{s}", "abc"[label]) for s in range(slides)]
        data.write_csv(folder / "own.csv", ("case_id", "slide_id", "label"), rows)
        out = folder / "tasks" / "t.csv"
        split(folder / "own.csv", "--folds", folds, "--seed", seed, "--out", out)
        (folder / "slides").mkdir()
        for _, slide_id, _ in rows:
            (folder / "slides" / f"{slide_id}.safetensors").touch()
        table = data.read_table(folder, "t")
        tested = []
        for fold in table.folds:
            of_fold = table.in_fold(fold, seed)
            parts = [slides_in(of_fold, split) for split in data.SPLITS]
            assert sum(map(len, parts)) == len(set().union(*parts)) == len(rows)
            tested += [case.case_id for case in of_fold if case.split == "test"]
            used = set(data.pretraining_ids(folder, data.read_tasks(folder, fold, seed)))
            assert used == parts[0]
            for label in {case.label for case in of_fold}:
                mine = [case.split for case in of_fold if case.label == label]
                learning = len(mine) - mine.count("test")
                assert mine.count("tune") == math.ceil(learning / 5)
                assert abs(mine.count("test") - len(mine) / folds) < 1
            again = data.parse_table(out, data.read_csv(out, ())[::-1]).in_fold(fold, seed)
            assert [slides_in(again, split) for split in data.SPLITS] == parts
        assert sorted(tested) == sorted({row[0] for row in rows})


def test_tune_cases_of_a_table_are_kept_and_carved_ones_vary_with_the_seed(tmp_path):
    rows = [(f"p{i}", f"s{i}", i % 2, "test" if i < 4 else "train", "train") for i in range(40)]
    rows[5] = ("p5", "s5", 1, "tune", "test")
    task(tmp_path, rows, splits=FOLDS)
    assert slides_in(data.read_task(tmp_path, "t", 0), "tune") == {"s5"}
    carved = [frozenset(slides_in(data.read_task(tmp_path, "t", 1, s), "tune")) for s in range(6)]
    assert len(set(carved)) == 6
    assert {len(tune) for tune in carved} == {4 + 4}


def test_a_fold_that_is_not_there_is_named(tmp_path):
    rows = [("p", "s", 0, "test", "train"), ("q", "r", 1, "train", "test")]
    task(tmp_path, rows, splits=FOLDS)
    for fold, column in ((None, "split"), (2, "fold_2")):
        said = f"no column {column}, found fold_0, fold_1; see --fold"
        with pytest.raises(MixmagError, match=said):
            data.read_task(tmp_path, "t", fold)
    for slide_id in "sr":
        make_slide(tmp_path, slide_id)
    with pytest.raises(MixmagError, match="every case is tested; give --fold K"):
        data.pretraining_ids(tmp_path, data.read_tasks(tmp_path))
    data.write_csv(tmp_path / "pretrain.csv", ("slide_id",), [("s",)])
    assert data.pretraining_ids(tmp_path, data.read_tasks(tmp_path)) == ["s"]
    assert data.evaluation_slides(data.read_tasks(tmp_path)) == {"t": {"s", "r"}}
    task(tmp_path, [("p", "s", 1, "train")])
    with pytest.raises(MixmagError, match="no column fold_0, found split"):
        data.read_task(tmp_path, "t", 0)
    with pytest.raises(MixmagError, match="--fold 0: no table in .* has a column fold_0"):
        data.read_tasks(tmp_path, 0)
    task(tmp_path, [("p", "s", 0, "test", "test")], splits=("split", "fold_0"))
    with pytest.raises(MixmagError, match="found split, fold_0; expected a split or folds"):
        data.read_task(tmp_path, "t")


def test_verify_looks_into_every_fold(tmp_path):
    for i in range(4):
        make_slide(tmp_path, f"s{i}", seed=i % 3)  # s3 is a copy of s0
    splits = [("train", "test"), ("test", "train"), ("tune", "tune"), ("test", "test")]
    rows = [(f"p{i}", f"s{i}", i % 2, *splits[i]) for i in range(4)]
    path = task(tmp_path, [*rows, ("p1", "s9", 1, "train", "train")], splits=FOLDS)
    findings = data.verify(tmp_path)
    assert f"{tmp_path}: one slide under several ids: s0, s3" in findings
    assert f"{path}: fold_1: test has no case of class 0" not in findings
    assert f"{path}: fold_1: tune has no case of class 1" in findings
    assert f"{path}: line 6, case 'p1' is in two splits, test and train" in findings


def split(*arguments) -> None:
    args = data.parse_command(["split", *map(str, arguments)], "data.py", "", data.COMMANDS)
    assert args.function(args) == 0


def test_patho_bench_tables_are_read(tmp_path):
    """Tabs, the task's own column, val for tune; p0 has two slides."""
    table = tmp_path / "k=all.tsv"
    rows = ["case_id slide_id BRAF fold_0 fold_1", "p0 s0 0 train val", "p1 s1 1 test train"]
    rows += ["p2 s2 2 val test", "p0 s3 0 train val"]
    table.write_text("\n".join(rows).replace(" ", "\t"))
    out = tmp_path / "tasks" / "t.csv"
    split(table, "--label", "BRAF", "--out", out)
    for fold, splits in enumerate((["train", "test", "tune"], ["tune", "train", "test"])):
        cases = data.read_task(tmp_path, "t", fold)
        assert [case.split for case in cases] == splits
        assert [(case.label, case.slide_ids) for case in cases][0] == (0, ["s0", "s3"])
    with pytest.raises(MixmagError, match="t.csv has fold_0, fold_1; leave --clam and --folds"):
        split(out, "--folds", 5, "--out", out)
    table.write_text("\n".join(rows).replace(" ", "\t").replace("train\tval", "train\tlater", 1))
    with pytest.raises(MixmagError, match="line 2, case 'p0': fold_1 is 'later', expected train"):
        split(table, "--label", "BRAF", "--out", tmp_path / "new.csv")
    assert not (tmp_path / "new.csv").exists()


@pytest.mark.parametrize(
    "last, said",
    [
        ("2,s3,,", ""),
        ("2,s3,s2,", "splits_1.csv: not once there and in the table: slide s2"),
        ("2,s3,,s9", "splits_1.csv: not once there and in the table: slide s9"),
        ("2,,,", "splits_1.csv: not once there and in the table: slide s3"),
        ("2,,s3,", "case 'p0' is in two splits, train and tune"),
    ],
)
def test_clam_splits_are_read(tmp_path, last, said):
    """The columns of a file are lists of slides, padded with blanks."""
    (tmp_path / "splits_0.csv").write_text(",train,val,test\n0,s1,s0,s2\n1,,s3,\n")
    (tmp_path / "splits_1.csv").write_text(f",train,val,test\n0,s0,s2,s1\n{last}\n")
    (tmp_path / "splits_0_bool.csv").write_text(",train,val,test\ns0,True,False,False\n")
    table = tmp_path / "labels.csv"
    table.write_text("case_id,slide_id,label\np0,s0,a\np1,s1,b\np2,s2,a\np0,s3,a\n")
    command = (table, "--clam", tmp_path, "--out", tmp_path / "tasks" / "t.csv")
    if said:
        with pytest.raises(MixmagError, match=said):
            split(*command)
        return
    split(*command)
    assert [case.split for case in data.read_task(tmp_path, "t", 0)] == ["tune", "train", "test"]
    assert [case.split for case in data.read_task(tmp_path, "t", 1)] == ["train", "test", "tune"]


@pytest.mark.parametrize(
    "one, other",
    [
        ([("2", "b", 1, "tune")], [("2", "b", 0, "train"), ("3", "c", 1, "test")]),
        ([("2", "b", 1, "train")], [("2", "c", 1, "test"), ("3", "d", 0, "train")]),
    ],
)
def test_pretraining_leaves_out_every_tune_and_test_case(tmp_path, one, other):
    """Whole, with all its slides, whatever another task says of them; pretrain.csv overrules."""
    for slide_id in "abcd":
        make_slide(tmp_path, slide_id)
    task(tmp_path, [("1", "a", 0, "train"), *one])
    task(tmp_path, other, "u")
    assert data.pretraining_ids(tmp_path, data.read_tasks(tmp_path)) == ["a", "d"]
    data.write_csv(tmp_path / "pretrain.csv", ("slide_id",), [("d",), ("b",), ("d",)])
    assert data.pretraining_ids(tmp_path, data.read_tasks(tmp_path)) == ["d", "b"]


def test_hidden_files_are_nobodys(tmp_path):
    """macOS leaves ._S.safetensors beside S.safetensors on disks that are not its own."""
    make_slide(tmp_path, "a")
    (tmp_path / "slides" / "._a.safetensors").write_bytes(b"\0\5\x16\7")
    task(tmp_path, [("p", "a", 1, "train")])
    (tmp_path / "tasks" / "._t.csv").write_bytes(b"\0\5\x16\7")
    assert [slide.slide_id for slide in data.read_slides(tmp_path)] == ["a"]
    assert data.pretraining_ids(tmp_path, data.read_tasks(tmp_path)) == ["a"]
    assert data.task_names(tmp_path) == ["t"]
    assert not any("._" in finding for finding in data.verify(tmp_path))


# ----------------------------------------------------------------------------- the synthetic cohort
@pytest.mark.parametrize("scale", ["full", "quick"])
def test_full_scale_is_the_papers_appendix_and_quick_scale_can_be_ranked(scale):
    for name, rows in data.synth_plan(scale, 0).items():
        for split, (cases, slides, positive) in data.COHORT[name].items():
            mine = [row for row in rows if row[3] == split]
            labels = {row[0]: row[2] for row in mine}
            positives = sum(labels.values())
            if scale == "full":
                assert (len(labels), len(mine)) == (cases, slides)
                assert positives / cases == pytest.approx(positive, abs=0.5 / cases + 1e-9)
            else:
                least, least_positives = data.QUICK_FLOORS[split]
                assert len(labels) >= least
                assert least_positives <= positives <= len(labels) - least_positives
            shown = [row[0] for row in mine if row[4]]  # by one slide of a case at most
            assert len(set(shown)) == len(shown)
            found = sum(labels[case] for case in shown)
            assert positives - found == round(0.015 * positives)
            assert len(shown) - found == round(0.015 * (len(labels) - positives))


def test_cohort_follows_from_its_seed_and_looks_like_real_embeddings(cohort):
    def slide(seed):
        world = data.synth_world(64, seed)
        return data.synth_slide(world, np.random.default_rng(5), "lung_egfr", True, 3)

    features, cells, least = slide(3)
    again = slide(3)
    assert features.tobytes() == again[0].tobytes() and np.array_equal(cells, again[1])
    assert features.tobytes() != slide(0)[0].tobytes()
    assert data.synth_plan("quick", 1) != data.synth_plan("quick", 0)
    assert data.verify(cohort) == [] and data.synthetic_facts(cohort)["complete"] is True
    x = np.concatenate([slide.features.reshape(-1, 64) for slide in data.read_slides(cohort)])
    assert x.min() == 0 and x.max() < 8 and 0.4 < (x == 0).mean() < 0.6
    assert np.median(scipy.stats.kurtosis(x.astype(float))) > 10


@pytest.mark.parametrize("name", data.MECHANISMS)
def test_mechanisms_are_as_written(name):
    """The patterns of a task are where, and as often as, the text says."""
    rule, (k1, _), (k2, _), _ = data.MECHANISMS[name]
    counts = {0: [], 1: []}
    for seed in range(60):
        for label in (0, 1):
            rng = np.random.default_rng(seed)
            first, second = data.planted_tokens(rng, 4, name, bool(label))  # (36, 21)
            counts[label].append((first.sum(), second.sum()))
            inside = [np.arange(21)[data.magnification_entries(k)] for k in (k1, k2)]
            assert set(first.nonzero()[1]) <= set(inside[0])
            assert set(second.nonzero()[1]) <= set(inside[1])
            meet = first.any(1) & second.any(1)
            if rule == "alone":
                assert not first.any() and second.any() == bool(label)
            else:
                assert first.any() and meet.any() == bool(label)
            if rule == "adjacent":  # 1 2 / 3 4 are the 10x tokens of a cell
                gap = first[meet].argmax(1) - second[meet].argmax(1)
                assert set(np.abs(gap)) <= {1, 2} and (first[meet].sum(1) == 1).all()
    if rule != "alone":  # the first tells nothing by its number, the second half the truth
        negative = np.array(counts[0])
        positive = np.array(counts[1])
        assert (positive[:, 0] == negative[:, 0]).all() and len(set(positive[:, 0])) > 3
        assert set(negative[:, 1] / positive[:, 1]) == {0, 1}
        assert 0.3 < (negative[:, 1] == 0).mean() < 0.7


def log_likelihood(features, known) -> float:
    """Of a slide's embeddings for one who knows its latent vectors but the noise."""
    std = data.NOISE**0.5
    latent = np.sqrt(features.astype(float) / data.SCALE)
    density = scipy.stats.norm.logpdf(latent, known, std)
    return np.where(features > 0, density, scipy.stats.norm.logcdf(-known / std)).sum()


@pytest.mark.parametrize("name", ["colon_msi", "lung_egfr", "skin_braf"])
def test_an_oracle_that_knows_what_was_planted_solves_a_task(name):
    world = data.synth_world(64, 0)
    scores = {}
    labels = {}
    for i, (case, _, label, split, shows) in enumerate(data.synth_plan("quick", 0)[name]):
        if split == "tune":
            features = data.synth_slide(world, np.random.default_rng(i), name, shows, 4)[0]
            likelihoods = []
            for positive in (True, False):
                twin = data.known_latents(world, np.random.default_rng(i), name, positive, 4)
                likelihoods.append(log_likelihood(features, twin[1]))
            ratio = likelihoods[0] - likelihoods[1]
            scores[case] = max(ratio, scores.get(case, ratio))
            labels[case] = label
    assert roc_auc_score(list(labels.values()), list(scores.values())) > 0.97


def test_the_least_loss_is_that_of_the_best_prediction():
    world = data.synth_world(64, 0)
    least = data.synth_slide(world, np.random.default_rng(0), "skin_braf", True, 9)[2]
    _, known = data.known_latents(world, np.random.default_rng(0), "skin_braf", True, 9)
    noise = data.NOISE**0.5 * np.random.default_rng(1).standard_normal((100, *known.shape))
    x = torch.nn.functional.normalize(torch.from_numpy(known + noise).clamp(min=0) ** 2, dim=-1)
    # (C, 21): by the direction of the largest mean cosine
    best = 1 - x.mean(0).norm(dim=-1).numpy()
    for k in range(3):
        assert least[k] == pytest.approx(best[:, data.magnification_entries(k)].mean(), abs=0.01)


def test_a_cohort_is_complete_only_at_its_end_and_mixes_with_nothing(tmp_path, monkeypatch):
    few = {"skin_braf": dict.fromkeys(data.SPLITS, (2, 2, 0.5))}
    monkeypatch.setattr(data, "COHORT", few)
    monkeypatch.setattr(data, "QUICK_FLOORS", dict.fromkeys(data.SPLITS, (2, 1)))
    with monkeypatch.context() as patch, pytest.raises(data.Stopped):
        patch.setattr(data, "STOP_SIGNALS", [signal.SIGTERM])
        data.synth_cohort(tmp_path)
    assert data.synthetic_facts(tmp_path)["complete"] is False
    data.synth_cohort(tmp_path)
    assert data.synthetic_facts(tmp_path)["complete"] is True
    with pytest.raises(data.OtherSettings, match="give another --out"):
        data.synth_cohort(tmp_path, seed=1)
    (tmp_path / "synthetic.json").unlink()
    with pytest.raises(MixmagError, match="is no cohort of .*give another --out"):
        data.synth_cohort(tmp_path)
    assert not (tmp_path / "synthetic.json").exists()


def test_synthetic_images_open_and_tile(tmp_path):
    run("data.py synth --images 1 --out images", cwd=tmp_path)
    slide = openslide.OpenSlide(next((tmp_path / "images").glob("*.tiff")))
    assert slide.level_count >= 3
    mpp = float(slide.properties[openslide.PROPERTY_NAME_MPP_X])
    assert mpp == pytest.approx(0.5, rel=1e-3)
    out, _ = run("data.py tile --slides images --out d", cwd=tmp_path)
    assert "done, 0 failed" in out and data.verify(tmp_path / "d") == []


# --------------------------------------------------------------------------------- windows, batches
@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("cover", [1.0, 0.5, 0.01])
def test_windows_equal_the_loop(stride, cover):
    rng = np.random.default_rng(0)
    cells = np.argwhere(rng.random((9, 7)) < 0.7)[:, ::-1].astype(np.int32)
    cells = cells[rng.permutation(len(cells))]
    rows, corners = data.windows(cells, 3, stride, cover)
    at = {tuple(cell): i for i, cell in enumerate(cells.tolist())}
    expected = {}
    for row in range(-3, 12):
        for col in range(-3, 12):
            inside = [at.get((col + c, row + r), -1) for r in range(3) for c in range(3)]
            present = sum(i >= 0 for i in inside)
            on_lattice = col % stride == 0 and row % stride == 0
            if on_lattice and present and present / 9 >= cover:
                expected[col, row] = inside
    corners = [tuple(corner) for corner in corners.tolist()]
    assert dict(zip(corners, rows.tolist(), strict=True)) == expected
    assert corners == sorted(corners, key=lambda corner: corner[::-1])


def test_narrow_slides_are_used_as_a_whole():
    """A needle core of one or two columns of cells, wherever it lies against the windows."""
    for columns in ((0,), (2, 3), (5, 6)):
        cells = np.array([(c, r) for c in columns for r in range(39)], np.int32)
        rows, corners = data.covering_windows(cells, 3, 0.5)
        assert sorted(rows[rows >= 0].tolist()) == list(range(len(cells)))
        assert (corners % 3 == 0).all()
    cells = np.array(square(4), np.int32)  # where windows are full, a half is wanted as ever
    assert (data.covering_windows(cells, 3, 0.5)[0] >= 0).sum() == 9
    assert (data.covering_windows(cells, 3, 0.3)[0] >= 0).sum() == 15


def test_gather_equals_the_loop(tmp_path):
    valid = np.random.default_rng(1).random((5, 21)) > 0.2
    cells = [(0, 0), (1, 0), (0, 1), (1, 1), (2, 1)]
    slide = data.read_slide(make_slide(tmp_path, cells=cells, valid=valid))
    geometry = Geometry(2)
    order = geometry.cell_order().numpy()
    rows, corners = data.windows(slide.cells, 2, 1, 0.5)
    x, ok = data.gather(slide, rows, order)
    assert np.array_equal(ok, data.token_index(slide, rows, order)[1])
    at = {tuple(cell): i for i, cell in enumerate(cells)}
    in_cell = {tuple(token): i for i, token in enumerate(Geometry(1).token_table().tolist())}
    for w, (col, row) in enumerate(corners.tolist()):
        for i, (k, r, c) in enumerate(geometry.token_table().tolist()):
            cell = at.get((col + (c >> k), row + (r >> k)))
            entry = in_cell[k, r % 2**k, c % 2**k]
            expected = np.zeros(8)
            if cell is not None and valid[cell, entry]:
                expected = slide.features[cell, entry]
            assert ok[w, i] == expected.any() and np.array_equal(x[w, i], expected)


@pytest.fixture
def holed(tmp_path):
    """Three slides of 20 cells, the second one with tokens that are not valid."""
    cells = [(col, row) for col in range(4) for row in range(5)]
    holes = np.random.default_rng(1).random((20, 21)) > 0.1
    for i, valid in enumerate((None, holes, None)):
        make_slide(tmp_path, str(i), cells, seed=i, valid=valid)
    return data.read_slides(tmp_path)


@pytest.mark.parametrize("views", [{}, {"source": 4}])
def test_a_sample_is_a_function_of_seed_and_index(holed, views):
    """In any batch, of any copy of the data set, over the border of epochs; read as by `gather`."""
    dataset = data.RegionDataset(holed, Geometry(3), 7, 0.5, **views)
    copy = pickle.loads(pickle.dumps(dataset))
    indices = [3, len(dataset) + 5, *range(6, 14)]
    batch = dataset.batch(indices)
    axes = (2, 10) if views else (10,)
    assert batch["x"].shape == (*axes, 189, 8) and batch["removed"].shape == (*axes, 94)
    assert batch["valid"].shape == (*axes, 189)
    window, turn, _, _ = dataset.draw(indices)
    for at, i in enumerate(indices):
        sample = copy[i]
        for key in ("x", "removed", "valid"):
            assert torch.equal(batch[key].select(len(axes) - 1, at), sample[key])
        entries = dataset.geometry.cell_order()[dataset.geometry.dihedral()[turn[:, at]]].numpy()
        slide = holed[dataset.slide_of[window[0, at]]]
        x, valid = data.gather(slide, dataset.window_cells[window[:, at]], entries)
        assert np.array_equal(sample["x"].reshape(x.shape), x)
        assert np.array_equal(sample["valid"].reshape(valid.shape), valid)
    other = data.RegionDataset(holed, Geometry(3), 8, 0.5, **views)
    assert not torch.equal(other[3]["removed"], dataset[3]["removed"])
    assert data.RegionDataset(holed[:1], Geometry(3), 7, 0.5, **views).batch([0])["valid"] is None


@pytest.mark.parametrize("views", [{}, {"source": 4}])
def test_torch_loads_regions_in_its_workers(holed, views):
    dataset = data.RegionDataset(holed, Geometry(3), 7, 0.5, **views)
    context = "spawn" if views else "fork"
    batches = list(DataLoader(dataset, 4, num_workers=2, multiprocessing_context=context))
    assert sum(len(batch["x"]) for batch in batches) == len(dataset) == 18
    for start, batch in zip(range(0, 18, 4), batches, strict=True):
        for b, x in enumerate(batch["x"]):
            assert torch.equal(x, dataset[start + b]["x"])
    whole = DataLoader(range(len(dataset)), 9, collate_fn=dataset.batch)
    assert torch.equal(next(iter(whole))["x"], dataset.batch(range(9))["x"])


def test_an_epoch_sees_every_window_once(cohort):
    dataset = data.RegionDataset(data.read_slides(cohort)[:20], Geometry(3), 0, 0.5)
    orders = []
    for epoch in (0, 3):
        window, turn, removed, _ = dataset.draw(epoch * len(dataset) + np.arange(len(dataset)))
        orders.append(window[0].tolist())
        assert sorted(orders[-1]) == list(range(len(dataset))) and set(turn[0]) == set(range(8))
        assert all(len(set(tokens)) == 94 for tokens in removed[0].tolist())
        assert np.bincount(removed.ravel(), minlength=189).min() > 0
    assert orders[0] != orders[1]


def test_swapped_regions_take_the_mean_of_another_slide(cohort):
    slides = data.read_slides(cohort)[:5]
    plain = data.RegionDataset(slides, Geometry(3), 0, 0.5)
    swapped = data.RegionDataset(slides, Geometry(3), 0, 0.5, swap=0.5)
    (window,), _, _, look = swapped.draw(range(64))
    own = swapped.slide_of[window]
    level = Geometry(3).level().numpy()
    means = []
    for slide in slides:
        x = slide.features.astype(np.float32)
        means.append([x[:, e].mean((0, 1)) for e in map(data.magnification_entries, range(3))])
    batch, as_it_is = swapped.batch(range(64)), plain.batch(range(64))
    assert torch.equal(batch["removed"], as_it_is["removed"])
    assert 16 < (look != own).sum() < 48
    for b in range(64):
        change = np.array(means)[look[b]] - np.array(means)[own[b]]  # (K, D)
        found = (batch["x"][b].float() - as_it_is["x"][b].float()).numpy()
        assert np.allclose(found, change[level], atol=0.02)
    slides[1].valid[:, 0] = False  # no 5x token: there is no mean to take or to give
    swapped = data.RegionDataset(slides, Geometry(3), 0, 0.5, swap=0.5)
    found = (swapped.batch(range(64))["x"] - as_it_is["x"])[:, level == 0].numpy()
    takes = (look == 1) & (own != 1)
    assert takes.any() and (found[takes] == 0).all()


def test_two_views_lie_in_one_source_window(cohort):
    """A second window is one of those in a random source window around the first, by a loop."""
    slides = data.read_slides(cohort)[:20]
    for source in (3, 5, 7):
        dataset = data.RegionDataset(slides, Geometry(3), 0, 0.5, source=source)
        (first, second), _, removed, _ = dataset.draw(range(300))
        gaps = np.abs(dataset.corners[first] - dataset.corners[second]).max(axis=1)
        assert np.array_equal(dataset.slide_of[first], dataset.slide_of[second])
        assert (removed[0] != removed[1]).any(axis=1).all()
        assert max(gaps) <= source - 3 and (source == 3 or max(gaps) > 0)
    weight = np.zeros(len(dataset))
    for left in range(5):
        for top in range(5):
            start = dataset.corners[0] - (left, top)
            inside = ((dataset.corners >= start) & (dataset.corners <= start + 4)).all(axis=1)
            inside &= dataset.slide_of == dataset.slide_of[0]
            weight += inside / inside.sum() / 25
    rng = np.random.default_rng(0)
    drawn = np.bincount([dataset.draw_partner(0, rng) for _ in range(8000)], minlength=len(weight))
    assert np.abs(drawn / 8000 - weight).max() < 0.03


def test_case_batches_are_ragged_bags(cohort):
    cases = [case for case in data.read_task(cohort, "skin_braf") if case.split == "train"]
    slides = {slide.slide_id: slide for slide in data.read_slides(cohort)}
    several = next(i for i, case in enumerate(cases) if len(case.slide_ids) > 1)
    dataset = data.CaseDataset(slides, cases, Geometry(3), Geometry(3).select(10))
    batch = dataset.batch([several, 0])
    ids = cases[several].slide_ids + cases[0].slide_ids
    assert batch["slide_ids"] == ids and batch["case"].tolist() == [0, 0, 1]
    assert batch["label"].tolist() == [cases[several].label, cases[0].label]
    assert batch["valid"] is None and not batch["cached"] and dataset.batch([]) == {}
    entries = Geometry(3).cell_order().numpy()[Geometry(3).select(10)]
    parts = batch["x"].split(batch["regions"].tolist())
    for slide_id, part in zip(ids, parts, strict=True):
        expected, _ = data.gather(slides[slide_id], dataset.window_cells[slide_id], entries)
        assert np.array_equal(part, expected) and part.shape[1:] == (36, 64)
    for i in dataset.window_cells:
        W = len(dataset.window_cells[i])
        dataset.cached[i] = (np.full((W, 1, 3), W, np.float32), np.ones((W, 1), bool))
    cached = dataset.batch([several, 0])
    assert cached["cached"] and cached["x"].shape == (len(batch["x"]), 1, 3)
    assert torch.equal(cached["regions"], batch["regions"])


def test_torch_loads_cases_in_its_workers(cohort):
    cases = [case for case in data.read_task(cohort, "skin_braf") if case.split == "tune"]
    slides = {slide.slide_id: slide for slide in data.read_slides(cohort)}
    dataset = data.CaseDataset(slides, cases, Geometry(3), Geometry(3).select())
    dataset = pickle.loads(pickle.dumps(dataset))
    for i, case in enumerate(DataLoader(dataset, batch_size=None, num_workers=2)):
        assert torch.equal(case["x"], dataset[i]["x"]) and case["valid"] is None
        assert case["slide_ids"] == cases[i].slide_ids
    assert len(list(DataLoader(dataset, None, sampler=RandomSampler(dataset)))) == len(cases)


def test_small_slides_count_and_empty_ones_are_named(tmp_path):
    """Of a slide smaller than a window its fullest windows count; in pretraining none."""
    make_slide(tmp_path, "whole", cells=[*square(3), (3, 0)])
    make_slide(tmp_path, "small", cells=[(0, 0), (1, 0), (4, 1)])
    make_slide(tmp_path, "scrap", cells=[])
    slides = {slide.slide_id: slide for slide in data.read_slides(tmp_path)}
    cells = slides["small"].cells
    assert data.covering_windows(cells, 3, 0.6)[1].tolist() == [[0, 0]]
    assert data.covering_windows(cells[:0], 3, 0.5)[0].shape == (0, 9)
    assert len(data.RegionDataset([slides["small"]], Geometry(3), 0, 0.5)) == 0
    cases = [data.Case("1", 0, "train", ["whole", "scrap"]), data.Case("2", 1, "train", ["scrap"])]
    cases.append(data.Case("3", 1, "train", ["small"]))
    dataset = data.CaseDataset(slides, cases, Geometry(3), Geometry(3).select())
    assert dataset.labels == [0, 1] and dataset.dropped == ["scrap", "scrap"]
    assert set(dataset.window_cells) == {"whole", "small"}
    assert dataset.uncovered == "; 1 of 13 cells are not read (see --min-cover)"
    batch = dataset.batch([1])
    assert batch["regions"].tolist() == [2] and batch["valid"].sum() == 3 * 21


def test_regions_without_a_valid_token_are_no_regions(tmp_path):
    """Of two regions one has nothing at 20x: it has no class tokens to pool where 20x is read."""
    valid = np.ones((2, 21), bool)
    valid[1, 5:] = False
    slides = {"a": data.read_slide(make_slide(tmp_path, "a", valid=valid))}
    cases = [data.Case("1", 0, "train", ["a"])]
    for magnification, corners in ((20, [[0, 0]]), (5, [[0, 0], [1, 0]])):
        index = Geometry(1).select(magnification)
        dataset = data.CaseDataset(slides, cases, Geometry(1), index)
        assert dataset.corners["a"].tolist() == corners
        assert dataset.uncovered.startswith("; 1 of 2 cells are") == (magnification == 20)
        assert dataset.batch([0])["regions"].tolist() == [len(corners)]


@pytest.mark.parametrize("magnifications", [None, [0, 1, 2], [1], [0, 2]])
def test_statistics_equal_the_definition(tmp_path, magnifications):
    valid = np.random.default_rng(1).random((2, 21)) > 0.3
    slides = []
    for seed, holes in ((0, valid), (1, None)):
        slides.append(data.read_slide(make_slide(tmp_path, str(seed), seed=seed, valid=holes)))
    mean, std, directions = data.feature_statistics(slides, magnifications)
    magnification_of = Geometry(1).token_table()[:, 0].numpy()
    parts = []
    for k in magnifications or range(3):
        at = [slide.features[:, magnification_of == k] for slide in slides]
        ok = [slide.valid[:, magnification_of == k] for slide in slides]
        tokens = np.concatenate([at[0][ok[0]], at[1][ok[1]]]).astype(np.float64)
        unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
        assert np.allclose(directions[k], unit.mean(0), atol=1e-6)
        parts.append(tokens)
    tokens = np.concatenate(parts)
    assert np.allclose(mean, tokens.mean(0), atol=1e-6)
    assert np.allclose(std, tokens.std(0), atol=1e-6)


def test_statistics_of_many_cells_are_those_of_evenly_spread_ones(tmp_path):
    slide = data.read_slide(make_slide(tmp_path, cells=square(10)))
    mean, _, _ = data.feature_statistics([slide], limit=30)
    assert np.allclose(mean, slide.features[::4].astype(np.float64).mean((0, 1)), atol=1e-6)
    slide.features[4, 0, 0] = np.nan
    with pytest.raises(MixmagError, match="a.safetensors: NaN or infinite"):
        data.feature_statistics([slide], limit=30)


# -------------------------------------------------------------------------- files, errors, progress
def test_a_failing_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.txt"
    data.write_text(path, "good")
    with pytest.raises(KeyError), data.whole_file(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    refused = pytest.raises(MixmagError, match=r"x.txt: cannot be written \(.*: no space left\)")
    with refused, data.whole_file(path):
        raise RuntimeError("no space\n left")
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(errno.ENOSPC, "No space")))
    with pytest.raises(MixmagError, match="x.txt: cannot be written .*No space"):
        data.write_text(path, "other")
    assert path.read_text() == "good" and os.listdir(tmp_path) == ["x.txt"]


def test_tables_come_back_as_they_were(tmp_path):
    """Also with file names that are no UTF-8; `line` is the line where a row ends."""
    path = tmp_path / "t.csv"
    rows = [("a,b", 'q"q'), ("two\nlines", " x "), (os.fsdecode(b"caf\xe9"), "")]
    data.write_csv(path, ("one", "other"), rows)
    found = data.read_csv(path, ("other", "one"))
    assert [row["one"] for row in found] == ["a,b", "two\nlines", "caf\\udce9"]
    assert [row["line"] for row in found] == [2, 4, 5] and found[1]["other"] == "x"
    path.write_text("[1")
    with pytest.raises(MixmagError, match="t.csv: cannot be read as JSON"):
        data.read_json(path)
    assert data.report_failed(path, [("a", "read", "b")]) == 3 and path.exists()
    assert data.report_failed(path, []) == 0 and not path.exists()


@pytest.mark.parametrize(
    "error, signals, code, line",
    [
        (None, [], 0, ""),
        (MixmagError("bad input"), [], 1, "error: bad input\n"),
        (OSError(2, "Gone"), [], 1, "error: FileNotFoundError: [Errno 2] Gone\n"),
        (MemoryError(), [], 1, "error: MemoryError"),
        (data.Stopped(), [signal.SIGTERM], 75, "stopped by a signal"),
        (data.Stopped(), [signal.SIGINT], 130, "stopped by a signal"),
    ],
)
def test_exit_codes_are_those_of_the_contract(monkeypatch, capsys, error, signals, code, line):
    monkeypatch.setattr(data, "catch_signals", lambda: None)
    monkeypatch.setattr(data, "STOP_SIGNALS", signals)

    def function(first, second):
        if error:
            raise error
        return first + second

    assert data.run_command(function, -2, second=2) == code
    assert capsys.readouterr().err.startswith(line)
    assert data.run_command(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        data.run_command(lambda: 1 / 0)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    """It does not go on, in silence, on the processor. A process of torchrun has its own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert data.find_device("auto") == data.find_device("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:1", "gpu"):
        with pytest.raises(MixmagError, match=f"--device {name}.*: expected auto, cpu"):
            data.find_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert data.find_device("auto") == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert data.find_device("auto") == data.find_device("cuda") == torch.device("cuda:1")


def test_a_rank_without_a_world_is_refused(monkeypatch):
    """It would train and write nothing."""
    assert data.process_rank() == (0, 1)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(MixmagError, match="RANK is 1 of 1: start with torchrun, or unset RANK"):
        data.process_rank()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert data.process_rank() == (1, 2)


def test_a_line_stands_by_itself_above_the_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    bar = data.progress(total=3, desc="bar")
    data.log("a line")
    bar.close()
    assert "\ra line\n" in capsys.readouterr().err


def test_a_disk_without_memory_maps_is_said(tmp_path, capsys):
    """The kernel's own files refuse them."""
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides" / "a.safetensors").symlink_to("/proc/self/maps")
    assert data.run_command(data.read_slides, tmp_path) == 1
    said = "this disk takes no memory maps: copy the files to another"
    assert capsys.readouterr().err.count(said) == 1


def test_weights_and_slides_can_be_read_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o027)
    try:
        path = make_slide(tmp_path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


TABLE = "case_id,slide_id,label,split\nc,S1,1,train\n"


@pytest.mark.parametrize(
    "raw, said",
    [
        (TABLE.replace(",", ";").encode(), "separated by ',' .with semicolons: save it"),
        (TABLE.encode("utf-16"), "cannot be read as 'CSV UTF-8' .it is UTF-16"),
        (TABLE.encode("utf-16-le"), "it is UTF-16"),
        (TABLE.replace("S1", "Grün").encode("cp1252"), "cannot be read as 'CSV UTF-8'"),
        (TABLE.replace("label", "label,label").encode(), "column label is missing or twice"),
    ],
)
def test_what_spreadsheets_write_is_read_or_named(tmp_path, raw, said):
    (tmp_path / "tasks").mkdir()
    path = tmp_path / "tasks" / "t.csv"
    path.write_bytes(raw)
    with pytest.raises(MixmagError, match=f"t.csv: .*{said}"):
        data.read_task(tmp_path, "t")
    text = " case_id , slide_id,label ,split,x\n,,,\nc,S1,1.0,train,,\n,,,,,,\nd,S2,0.0,tune\n,,\n"
    path.write_bytes(text.encode("utf-8-sig"))
    found = [(case.case_id, case.label, case.slide_ids) for case in data.read_task(tmp_path, "t")]
    assert found == [("c", 1, ["S1"]), ("d", 0, ["S2"])]


def test_ids_are_compared_in_one_form_of_unicode(tmp_path):
    """macOS names files with decomposed letters; a table of composed ones holds them out."""
    forms = [unicodedata.normalize(form, "Größe é") for form in ("NFD", "NFC")]
    for file_name, in_table in (forms, forms[::-1]):
        folder = tmp_path / str(len(file_name))
        make_slide(folder, file_name)
        make_slide(folder, "other")
        task(folder, [("c", in_table, 1, "test")])
        assert data.pretraining_ids(folder, data.read_tasks(folder)) == ["other"]
        assert [slide.slide_id for slide in data.read_slides(folder, [in_table])] == [forms[1]]
        assert "without a file" not in str(data.verify(folder))
    make_slide(folder, in_table)
    with pytest.raises(MixmagError, match="two files of one slide"):
        data.read_slides(folder)


def test_a_table_of_other_slides_holds_nothing_out_and_is_refused(tmp_path):
    make_slide(tmp_path, "S1")
    task(tmp_path, [("c", "S1.svs", 1, "test")])
    with pytest.raises(MixmagError, match="t.csv: 1 slide .*'S1.svs'; leave .svs out"):
        data.pretraining_ids(tmp_path, data.read_tasks(tmp_path))
    (tmp_path / "tasks" / "t.csv").rename(tmp_path / "tasks" / "t.CSV")
    with pytest.raises(MixmagError, match="t.CSV: expected a table whose name ends with .csv"):
        data.pretraining_ids(tmp_path, data.read_tasks(tmp_path))


@pytest.mark.parametrize("threads", [0, 2])
def test_prefetch_keeps_its_order_and_ends_with_its_reader(threads):
    """At most two items a thread are begun early, and an error comes where it belongs."""
    begun = []

    def slowly(item):
        begun.append(item)
        time.sleep(0.02 * (item % 3 == 0))
        return 1 / (item - 30)

    results = data.prefetch(slowly, range(40), threads)
    assert [next(results) for _ in range(10)] == [1 / (i - 30) for i in range(10)]
    assert len(begun) <= 10 + 2 * threads
    with pytest.raises(ZeroDivisionError):
        list(results)
    assert max(begun) <= 30 + 2 * threads and sorted(set(begun)) == sorted(begun)


def test_help_answers_at_once():
    """Measured in seconds of computing, because other tests run beside it."""
    for script in ("data.py", "train.py"):
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, check=True)
        assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 6
