"""Slide files, data sets, tasks, the synthetic cohort, verify.     python -m pytest tests/test_data.py"""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import openslide
import pytest
import safetensors
import torch
from conftest import ROOT, run

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


def make_slide(folder, slide_id="a", cells=((0, 0), (1, 0)), seed=0, dim=8, valid=None, **meta):
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((len(cells), 21, dim)).astype(np.float16)
    path = folder / "slides" / f"{slide_id}.safetensors"
    data.write_slide(
        path,
        features,
        np.array(cells, np.int32).reshape(-1, 2),
        np.ones((len(cells), 21), bool) if valid is None else valid,
        {**META, "slide_id": slide_id, **meta},
    )
    return path


# ------------------------------------------------------------------------------------------------------- the slide file
def test_slide_round_trip_through_a_memory_map(tmp_path):
    path = make_slide(tmp_path, cells=[(3, 1), (0, 2)])
    slide = data.read_slide(path)
    expected = np.random.default_rng(0).standard_normal((2, 21, 8)).astype(np.float16)
    assert np.array_equal(slide.features, expected) and str(path) in open("/proc/self/maps").read()
    assert (
        slide.cells.tolist() == [[3, 1], [0, 2]]
        and slide.valid.all()
        and slide.meta["cell_px"] == 896.0
        and slide.meta["magnifications"] == [5, 10, 20]
    )


def test_slide_file_is_what_the_contract_says(tmp_path):
    """Read with the safetensors library alone, and the checksum computed again from its definition."""
    import hashlib

    with safetensors.safe_open(make_slide(tmp_path), "numpy") as f:
        meta, tensors = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}
    assert {k: (v.dtype.name, v.shape) for k, v in tensors.items()} == {
        "features": ("float16", (2, 21, 8)),
        "cells": ("int32", (2, 2)),
        "valid": ("bool", (2, 21)),
    }
    assert (
        meta["format"] == "mixmag/1"
        and json.loads(meta["origin"]) == [0.0, 0.0]
        and all(isinstance(v, str) for v in meta.values())
    )
    digest = hashlib.sha256(b"".join(tensors[k].tobytes() for k in ("features", "cells", "valid")))
    digest.update(
        json.dumps(
            {k: v for k, v in meta.items() if k != "sha256"}, sort_keys=True, separators=(",", ":")
        ).encode()
    )
    assert meta["sha256"] == digest.hexdigest()


def test_empty_slide_is_a_valid_file(tmp_path):
    slide = data.read_slide(make_slide(tmp_path, cells=[]))
    assert slide.features.shape == (0, 21, 8) and not data.verify(tmp_path)


def test_features_at_an_odd_byte_are_refused(tmp_path):
    """The format allows the tensors in any order, and numpy maps no 16-bit numbers from an odd byte: they would be read shifted."""
    path = make_slide(tmp_path, cells=[(0, 0)])
    with safetensors.safe_open(path, "numpy") as f:
        meta, tensors = f.metadata(), {k: f.get_tensor(k) for k in ("valid", "features", "cells")}
    header, start = {"__metadata__": meta}, 0
    for name, x in tensors.items():
        header[name] = {
            "dtype": {"bool": "BOOL", "float16": "F16", "int32": "I32"}[x.dtype.name],
            "shape": x.shape,
            "data_offsets": [start, start + x.nbytes],
        }
        start += x.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(
        len(text).to_bytes(8, "little") + text + b"".join(x.tobytes() for x in tensors.values())
    )
    with safetensors.safe_open(path, "numpy") as f:
        assert np.array_equal(f.get_tensor("features"), tensors["features"])
    with pytest.raises(MixmagError, match="begin at an odd byte"):
        data.read_slide(path)


def test_json_nested_beyond_reason_is_one_line(tmp_path):
    (tmp_path / "x.json").write_text('{"a":' * 100000)
    with pytest.raises(MixmagError, match="cannot be read as JSON"):
        data.read_json(tmp_path / "x.json")


@pytest.mark.parametrize("rank", [None, "0"])
def test_a_gpu_that_is_not_there_is_refused(monkeypatch, rank):
    """Also where torchrun started the process: it does not go on, in silence, on the processor."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("RANK", raising=False)
    if rank:
        monkeypatch.setenv("RANK", rank)
    assert data.find_device("auto") == data.find_device("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:1", "gpu"):
        with pytest.raises(MixmagError, match=f"--device {name}.*: expected auto, cpu"):
            data.find_device(name)


def test_many_slides_do_not_exhaust_file_descriptors(tmp_path):
    for i in range(400):
        make_slide(tmp_path, f"s{i}")
    before = len(os.listdir("/proc/self/fd"))
    total = sum(float(s.features[0, 0, 0]) for s in data.read_slides(tmp_path))
    assert np.isfinite(total) and len(os.listdir("/proc/self/fd")) - before <= 260


def test_a_killed_writer_leaves_nothing_under_the_final_name(tmp_path):
    """kill -9 while a writer loops: whatever stands under a final name is whole."""
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\nfrom test_data import make_slide\nfrom pathlib import Path\n"
        f"for i in range(10**6): make_slide(Path({str(tmp_path)!r}), f's{{i % 3}}', cells=[(c, 0) for c in range(300)], seed=i)"
    )
    for delay in (0.0, 0.03, 0.11):
        process = subprocess.Popen([sys.executable, "-c", code])
        deadline = time.time() + 60
        while not list(tmp_path.glob("slides/*.safetensors")) and time.time() < deadline:
            time.sleep(0.05)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert list(tmp_path.glob("slides/*.safetensors")) and data.verify(tmp_path) == []


def test_a_failing_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "x.txt"
    data.write_text(path, "good")
    with pytest.raises(RuntimeError), data.whole_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "good" and os.listdir(tmp_path) == ["x.txt"]


# --------------------------------------------------------------------------------------------------------------- verify
def test_verify_finds_every_flipped_byte(tmp_path):
    path = make_slide(tmp_path, cells=[(0, 0)])
    whole = path.read_bytes()
    assert data.verify(tmp_path) == []
    rng = np.random.default_rng(0)
    for at in sorted(rng.choice(len(whole), 400, replace=False).tolist()) + [
        0,
        7,
        8,
        len(whole) - 1,
    ]:
        path.write_bytes(
            whole[:at] + bytes([whole[at] ^ (1 << int(rng.integers(8)))]) + whole[at + 1 :]
        )
        assert data.verify(tmp_path), f"byte {at} flipped and nothing found"


def task(folder, rows, name="t"):
    data.write_csv(
        folder / "tasks" / f"{name}.csv", ("case_id", "slide_id", "label", "split"), rows
    )


def test_verify_prints_every_finding(tmp_path):
    good = [(f"c{i}", f"s{i}", i % 2, data.SPLITS[i // 2 % 3]) for i in range(6)]
    for i in range(6):
        make_slide(tmp_path, f"s{i}", seed=i)
    task(tmp_path, good)
    assert data.verify(tmp_path) == []
    make_slide(tmp_path, "other", encoder="another")
    features = np.ones((1, 21, 8), np.float16)
    features[0, 3, 2] = np.nan
    data.write_slide(
        tmp_path / "slides" / "nan.safetensors",
        features,
        np.zeros((1, 2), np.int32),
        np.ones((1, 21), bool),
        {**META, "slide_id": "nan"},
    )
    (tmp_path / "slides" / "misnamed.safetensors").write_bytes(
        (tmp_path / "slides" / "s0.safetensors").read_bytes()
    )
    (tmp_path / "slides" / "cut.safetensors").write_bytes(
        (tmp_path / "slides" / "s0.safetensors").read_bytes()[:-10]
    )
    make_slide(tmp_path, "twin", seed=0)  # the content of s0 under another name
    task(
        tmp_path,
        good
        + [
            ("c0", "other", 0, "test"),
            ("new", "absent", 1, "test"),
            ("c1", "nan", 0, "train"),
            ("x", "y", 2, "train"),
            ("x", "y", 1, "later"),
            ("z", "twin", 0, "test"),
            ("c9", "s5", 1, "test"),
        ],
    )
    data.write_csv(tmp_path / "pretrain.csv", ("slide_id",), [("s0",), ("s4",), ("gone",)])
    findings = "\n".join(data.verify(tmp_path))
    for words in (
        "encoder another",
        "NaN",
        "holds slide 's0'",
        "cut.safetensors: cannot be read",
        "case 'c0' is in two splits",
        "slide 'absent' of case 'new' has no file",
        "two labels",
        "label of case 'x' is '2'",
        "split of case 'x' is 'later'",
        "same content in two splits",
        "'s5' stands in more than one row",
        "slide 's4' is in a tune or test split",
        "slide 'gone' has no file",
    ):
        assert words in findings, f"{words!r} not among\n{findings}"
    out, _ = run("data.py", "verify", tmp_path, cwd=tmp_path, code=1)
    assert out.count("\n") == findings.count("\n") + 2


def test_task_tables_keep_ids_as_text_and_survive_bom_and_crlf(tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "t.csv").write_bytes(
        "\ufeffcase_id,slide_id,label,split,extra\r\n001,0010,1,train,x\r\n1,10,0,train,y\r\n".encode()
    )
    cases = data.read_task(tmp_path, "t")
    assert [(c.case_id, c.slide_ids, c.label) for c in cases] == [
        ("001", ["0010"], 1),
        ("1", ["10"], 0),
    ]


@pytest.mark.parametrize("label", ["1.0", "yes", "", "nan", "2"])
def test_labels_are_zero_or_one(tmp_path, label):
    task(tmp_path, [("c", "s", label, "train")])
    with pytest.raises(MixmagError, match="expected 0 or 1"):
        data.read_task(tmp_path, "t")


@pytest.mark.parametrize(
    "one, other",
    [
        ([("2", "b", 1, "tune")], [("2", "b", 0, "train"), ("3", "c", 1, "test")]),
        ([("2", "b", 1, "train")], [("2", "c", 1, "test"), ("3", "d", 0, "train")]),
    ],
)
def test_pretraining_leaves_out_every_tune_and_test_case(tmp_path, one, other):
    """Whole, with all its slides, whatever another task says of them; pretrain.csv overrules."""
    for i in "abcd":
        make_slide(tmp_path, i)
    task(tmp_path, [("1", "a", 0, "train"), *one])
    task(tmp_path, other, "u")
    assert data.pretraining_ids(tmp_path) == ["a", "d"]
    data.write_csv(tmp_path / "pretrain.csv", ("slide_id",), [("d",), ("b",), ("d",)])
    assert data.pretraining_ids(tmp_path) == ["d", "b"]


# ----------------------------------------------------------------------------------------------------- synthetic cohort
def test_full_scale_is_the_papers_appendix():
    for name, rows in data.synth_plan("full", 0).items():
        for split, (cases, slides, share) in data.COHORT[name].items():
            mine = [r for r in rows if r[3] == split]
            labels = {r[0]: r[2] for r in mine}
            assert len(labels) == cases and len(mine) == slides
            assert np.mean(list(labels.values())) == pytest.approx(share, abs=0.5 / cases + 1e-9)


def test_quick_scale_can_be_ranked():
    for rows in data.synth_plan("quick", 0).values():
        for split, (least, positives) in data.QUICK_FLOORS.items():
            labels = {r[0]: r[2] for r in rows if r[3] == split}
            assert (
                len(labels) >= least
                and min(sum(labels.values()), len(labels) - sum(labels.values())) >= positives
            )
    assert any(
        len({r[1] for r in rows}) > len({r[0] for r in rows})
        for rows in data.synth_plan("quick", 0).values()
    )


def test_cohort_follows_from_its_seed(cohort, tmp_path):
    world = data.synth_world(64, 3)
    for _ in range(2):
        a, b = (
            data.synth_slide(world, np.random.default_rng(5), "lung_egfr", True, 3)
            for _ in range(2)
        )
        assert a[0].tobytes() == b[0].tobytes() and np.array_equal(a[1], b[1])
    assert data.synth_plan("quick", 1) != data.synth_plan("quick", 0)
    assert data.verify(cohort) == []
    one = data.synth_slide(data.synth_world(64, 0), np.random.default_rng(5), "lung_egfr", True, 3)
    assert one[0].tobytes() != a[0].tobytes()


@pytest.mark.parametrize("name", data.MECHANISMS)
def test_mechanisms_are_as_written(name):
    """The rare patterns of a task: where and how often the text says."""
    mechanism, (k1, p1), (k2, p2), _ = data.MECHANISMS[name]
    counts = {0: [], 1: []}
    for seed in range(60):
        for label in (0, 1):
            rng = np.random.default_rng([seed, label])
            tiles = data.synth_patterns(rng, data.synth_cells(rng, 4), name, bool(label))
            first, second = tiles[k1] == p1, tiles[k2] == p2
            in_cell = [
                {tuple(c) for c in np.argwhere(t) // 2**k} for t, k in ((first, k1), (second, k2))
            ]
            counts[label].append((first.sum(), second.sum()))
            if mechanism == "alone":
                assert first.any() == bool(label)
            elif mechanism == "together":
                assert in_cell[0] and (
                    in_cell[0] >= in_cell[1] > set() if label else not in_cell[0] & in_cell[1]
                )
            else:
                beside = any(
                    np.abs(a - b).sum() == 1
                    for a in np.argwhere(first)
                    for b in np.argwhere(second)
                    if (a // 2 == b // 2).all()
                )
                assert beside == bool(label)
    if mechanism != "alone":  # the first tells nothing by its number, the second half the truth
        (a, b), (c, d) = (np.array(counts[label]).mean(axis=0) for label in (1, 0))
        assert (
            0.8 < a / c < 1.25
            and 1.4 < b / d < 2.8
            and 0.3 < np.mean(np.array(counts[0])[:, 1] == 0) < 0.7
        )


def test_synthetic_images_open_and_tile(tmp_path):
    run("data.py", "synth", "--images", 1, "--out", tmp_path / "images", cwd=tmp_path)
    slide = openslide.OpenSlide(next((tmp_path / "images").glob("*.tiff")))
    assert slide.level_count >= 3 and float(
        slide.properties[openslide.PROPERTY_NAME_MPP_X]
    ) == pytest.approx(0.5, rel=1e-3)
    out, _ = run(
        "data.py", "tile", "--slides", tmp_path / "images", "--out", tmp_path / "d", cwd=tmp_path
    )
    assert "1 slides done, 0 failed" in out and data.verify(tmp_path / "d") == []
    again, _ = run(
        "data.py", "tile", "--slides", tmp_path / "images", "--out", tmp_path / "d", cwd=tmp_path
    )
    assert "done before" in again


# ------------------------------------------------------------------------------------------------------ windows, batches
@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("cover", [1.0, 0.5, 0.01])
def test_windows_equal_the_loop(stride, cover):
    rng = np.random.default_rng(0)
    cells = np.argwhere(rng.random((9, 7)) < 0.7)[:, ::-1].astype(np.int32)
    cells = cells[rng.permutation(len(cells))]
    rows, corners = data.windows(cells, 3, stride, cover)
    at, expected = {tuple(c): i for i, c in enumerate(cells.tolist())}, {}
    for row in range(-3, 12):
        for col in range(-3, 12):
            inside = [at.get((col + c, row + r), -1) for r in range(3) for c in range(3)]
            held = sum(i >= 0 for i in inside) / 9
            if col % stride == 0 and row % stride == 0 and held >= cover and held > 0:
                expected[col, row] = inside
    assert {tuple(c): r for c, r in zip(corners.tolist(), rows.tolist())} == expected
    assert corners.tolist() == sorted(corners.tolist(), key=lambda c: (c[1], c[0]))


def test_gather_equals_the_loop(tmp_path):
    valid = np.random.default_rng(1).random((5, 21)) > 0.2
    slide = data.read_slide(
        make_slide(tmp_path, cells=[(0, 0), (1, 0), (0, 1), (1, 1), (2, 1)], valid=valid)
    )
    g = Geometry(2)
    rows, corners = data.windows(slide.cells, 2, 1, 0.5)
    x, ok = data.gather(slide, rows, g.cell_order().numpy())
    assert np.array_equal(ok, data.token_index(slide, rows, g.cell_order().numpy())[1])
    at = {tuple(c): i for i, c in enumerate(slide.cells.tolist())}
    in_cell = {tuple(t): i for i, t in enumerate(Geometry(1).token_table().tolist())}
    for w, (col, row) in enumerate(corners.tolist()):
        for i, (k, r, c) in enumerate(g.token_table().tolist()):
            cell = at.get((col + (c >> k), row + (r >> k)))
            entry = in_cell[k, r % 2**k, c % 2**k]
            held = cell is not None and valid[cell, entry]
            assert ok[w, i] == held and np.array_equal(
                x[w, i], slide.features[cell, entry] if held else np.zeros(8)
            )


def test_a_sample_is_a_function_of_seed_and_index(cohort):
    slides = data.read_slides(cohort, data.pretraining_ids(cohort))
    a = data.RegionDataset(slides, Geometry(3), 7, 0.5, views=2, source=5)
    b = data.RegionDataset(slides, Geometry(3), 7, 0.5, views=2, source=5)
    together, alone = a.__getitems__([3, len(a) + 5, 2]), b.__getitems__([len(b) + 5])
    assert (
        together["x"].shape == (2, 3, 189, 64)
        and together["removed"].shape == (2, 3, 94)
        and together["valid"] is None
    )
    for key in ("x", "removed", "slide"):
        assert torch.equal(together[key][:, 1:2], alone[key])
    assert not torch.equal(
        data.RegionDataset(slides, Geometry(3), 8, 0.5).__getitems__([3])["x"],
        data.RegionDataset(slides, Geometry(3), 7, 0.5).__getitems__([3])["x"],
    )


def test_embeddings_held_in_memory_are_those_of_the_files(tmp_path):
    cells, holes = (
        [(c, r) for c in range(4) for r in range(5)],
        np.random.default_rng(1).random((20, 21)) > 0.1,
    )
    for i, valid in enumerate((None, holes, None)):
        make_slide(tmp_path, str(i), cells, seed=i, valid=valid)
    for settings in ({}, {"views": 2, "source": 4}):
        files, held = (
            data.RegionDataset(data.read_slides(tmp_path), Geometry(3), 7, 0.5, **settings)
            for _ in range(2)
        )
        held.hold("cpu")
        expected, (found,) = files.__getitems__(range(20)), held.batches([range(20)], 1, "cpu")
        assert expected["x"].shape == found["x"].shape and torch.equal(
            expected["x"][expected["valid"]], found["x"][found["valid"]]
        )
        assert (
            all(torch.equal(expected[k], found[k]) for k in ("valid", "removed", "slide"))
            and not expected["valid"].all()
        )


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_a_batch_stays_as_it_is_until_the_next_is_asked_for(tmp_path, threads):
    """However long it is in use and however far ahead the threads are, over the border of epochs; and all lie in the same few places."""
    cells, holes = (
        [(c, r) for c in range(4) for r in range(5)],
        np.random.default_rng(1).random((20, 21)) > 0.1,
    )
    for i, valid in enumerate((None, holes, None)):
        make_slide(tmp_path, str(i), cells, seed=i, valid=valid)
    fresh, again = (
        data.RegionDataset(data.read_slides(tmp_path), Geometry(3), 7, 0.5, views=2, source=4)
        for _ in range(2)
    )
    loads, places = [range(i, i + 4) for i in range(0, 120, 4)] + [range(2)], Counter()
    for indices, batch in zip(loads, again.batches(loads, threads, "cpu"), strict=True):
        time.sleep(0.02)
        expected = fresh.__getitems__(indices)
        assert all(torch.equal(expected[k], batch[k]) for k in ("x", "removed", "slide")) and (
            expected["valid"] is None
        ) == (batch["valid"] is None)
        places[batch["x"].data_ptr()] += 1
    assert len(places) == (2 * threads or 1) and min(places.values()) > 3


@pytest.mark.parametrize("threads", [0, 2])
def test_work_ahead_keeps_its_order_and_ends_with_its_reader(threads):
    """Results come in order; at most two items a thread are begun before the first result is asked for more than once; an error comes where it belongs,
    and a reader who stops ends the rest."""
    begun = []

    def slowly(item):
        begun.append(item)
        time.sleep(0.02 * (item % 3 == 0))
        return 1 / (item - 30)

    results = data.prefetch(slowly, range(40), threads)
    assert [next(results) for _ in range(10)] == [1 / (i - 30) for i in range(10)] and len(
        begun
    ) <= 10 + 2 * threads
    with pytest.raises(ZeroDivisionError):
        list(results)
    assert max(begun) <= 30 + 2 * threads and sorted(set(begun)) == sorted(begun)


def test_an_epoch_sees_every_window_once(cohort):
    dataset = data.RegionDataset(data.read_slides(cohort)[:20], Geometry(3), 0, 0.5)
    for epoch in (0, 3):
        assert sorted(dataset.draw(epoch * len(dataset) + np.arange(len(dataset)))[0][0]) == list(
            range(len(dataset))
        )


def test_two_views_lie_in_one_source_window(cohort):
    slides = data.read_slides(cohort)[:20]
    for source in (3, 5, 7):
        dataset = data.RegionDataset(slides, Geometry(3), 0, 0.5, views=2, source=source)
        (a, b), _, removed = dataset.draw(range(300))
        gaps = np.abs(dataset.corners[a] - dataset.corners[b]).max(axis=1)
        assert (
            np.array_equal(dataset.slide_of[a], dataset.slide_of[b])
            and (removed[0] != removed[1]).any(axis=1).all()
        )
        assert max(gaps) <= source - 3 and (source == 3 or max(gaps) > 0)


def test_turned_windows_hold_the_turned_tokens(cohort):
    dataset = data.RegionDataset(data.read_slides(cohort)[:5], Geometry(3), 0, 0.5)
    plain = data.RegionDataset(data.read_slides(cohort)[:5], Geometry(3), 0, 0.5, turn=False)
    for i in range(20):
        turn = dataset.draw([i])[1].item()
        assert torch.equal(
            dataset.__getitems__([i])["x"][0],
            plain.__getitems__([i])["x"][0][Geometry(3).dihedral()[turn]],
        )


def test_case_batches_are_ragged_bags(cohort):
    cases = [c for c in data.read_task(cohort, "skin_braf") if c.split == "train"]
    slides = {s.slide_id: s for s in data.read_slides(cohort)}
    dataset = data.CaseDataset(slides, cases, Geometry(3), Geometry(3).select(10))
    batch = dataset.__getitems__([2, 0])
    ids = [i for c in (cases[2], cases[0]) for i in c.slide_ids]
    assert (
        batch["slide_ids"] == ids
        and batch["x"].shape == (int(batch["regions"].sum()), 36, 64)
        and batch["valid"] is None
    )
    assert batch["label"].tolist() == [cases[2].label, cases[0].label] and batch[
        "case"
    ].tolist() == [0] * len(cases[2].slide_ids) + [1] * len(cases[0].slide_ids)
    first = data.gather(
        slides[ids[0]],
        dataset.rows[ids[0]],
        Geometry(3).cell_order().numpy()[Geometry(3).select(10)],
    )[0]
    assert np.array_equal(batch["x"][: len(first)].numpy(), first)


def test_slides_without_a_region_are_named(tmp_path):
    make_slide(tmp_path, "whole", cells=[(c, r) for c in range(3) for r in range(3)])
    make_slide(tmp_path, "scrap", cells=[])
    slides = {s.slide_id: s for s in data.read_slides(tmp_path)}
    cases = [data.Case("1", 0, "train", ["whole", "scrap"]), data.Case("2", 1, "train", ["scrap"])]
    dataset = data.CaseDataset(slides, cases, Geometry(3), Geometry(3).select())
    assert len(dataset) == 1 and dataset.dropped == ["scrap", "scrap"]


def test_regions_without_a_valid_token_are_no_regions(tmp_path):
    """Two regions, one of which has nothing at 20x: it gives no class tokens to pool where 20x alone is read."""
    valid = np.ones((2, 21), bool)
    valid[1, 5:] = False
    make_slide(tmp_path, "a", cells=[(0, 0), (1, 0)], valid=valid)
    slides, geometry = {"a": data.read_slides(tmp_path)[0]}, Geometry(1)
    for magnification, corners in ((20, [[0, 0]]), (5, [[0, 0], [1, 0]])):
        dataset = data.CaseDataset(
            slides, [data.Case("1", 0, "train", ["a"])], geometry, geometry.select(magnification)
        )
        assert dataset.corners["a"].tolist() == corners and dataset.__getitems__([0])[
            "regions"
        ].tolist() == [len(corners)]


def test_statistics_equal_the_definition(tmp_path):
    valid = np.random.default_rng(1).random((2, 21)) > 0.3
    make_slide(tmp_path, "a", valid=valid)
    make_slide(tmp_path, "b", seed=1)
    slides = data.read_slides(tmp_path)
    mean, std, directions = data.feature_statistics(slides)
    tokens = np.concatenate([s.features[s.valid].astype(np.float64) for s in slides])
    assert np.allclose(mean, tokens.mean(0), atol=1e-6) and np.allclose(
        std, tokens.std(0), atol=1e-6
    )
    level = Geometry(1).cell_table()[:, 0].numpy()
    for k in range(3):
        at = np.concatenate(
            [s.features[:, level == k][s.valid[:, level == k]].astype(np.float64) for s in slides]
        )
        assert np.allclose(
            directions[k], (at / np.linalg.norm(at, axis=1, keepdims=True)).mean(0), atol=1e-6
        )


def test_help_answers_at_once():
    for script in ("data.py", "train.py"):
        began = time.time()
        subprocess.run(
            [sys.executable, str(ROOT / script), "--help"], capture_output=True, check=True
        )
        assert (
            time.time() - began < 5
        )  # about 0.1 s; importing torch alone takes longer than a second
        out = subprocess.run(
            [sys.executable, "-X", "importtime", str(ROOT / script), "--help"],
            capture_output=True,
            text=True,
        ).stderr
        assert "torch" not in out


def test_narrow_slides_are_used_as_a_whole(tmp_path):
    """A needle core of one or two columns of cells, wherever it lies against the windows; where windows are full, half of one is wanted as ever."""
    for columns in ((0,), (2, 3), (5, 6)):
        cells = np.array([(c, r) for c in columns for r in range(39)], np.int32)
        rows, corners = data.covering_windows(cells, 3, 0.5)
        assert (
            sorted(rows[rows >= 0].tolist()) == list(range(len(cells))) and (corners % 3 == 0).all()
        )
    square = np.array([(c, r) for c in range(4) for r in range(4)], np.int32)
    assert (data.covering_windows(square, 3, 0.5)[0] >= 0).sum() == 9 and (
        data.covering_windows(square, 3, 0.3)[0] >= 0
    ).sum() == 15


def test_a_slide_smaller_than_a_window_is_usable(tmp_path):
    """Its fullest windows count in inference, and in pretraining none."""
    small, whole = (
        data.read_slide(make_slide(tmp_path, "small", cells=[(0, 0), (1, 0), (4, 1)])),
        data.read_slide(
            make_slide(
                tmp_path, "whole", cells=[(c, r) for c in range(3) for r in range(3)] + [(3, 0)]
            )
        ),
    )
    assert data.covering_windows(small.cells, 3, 0.6)[1].tolist() == [
        [0, 0]
    ] and data.covering_windows(whole.cells, 3, 0.5)[1].tolist() == [[0, 0]]
    assert data.covering_windows(small.cells[:0], 3, 0.5)[0].shape == (0, 9)
    cases = [data.Case("1", 0, "train", ["small"])]
    batch = data.CaseDataset(
        {"small": small}, cases, Geometry(3), Geometry(3).select()
    ).__getitems__([0])
    assert batch["regions"].tolist() == [2] and batch["valid"].sum() == 3 * 21
    assert len(data.RegionDataset([small], Geometry(3), 0, 0.5)) == 0


def test_statistics_of_some_magnifications(tmp_path):
    """Against the tokens themselves, of slides small enough to be read whole."""
    valid = np.random.default_rng(0).random((2, 21)) > 0.2
    slides = [
        data.read_slide(make_slide(tmp_path, "a", valid=valid)),
        data.read_slide(make_slide(tmp_path, "b", seed=1)),
    ]
    every = np.concatenate([s.features[:, 1:5][s.valid[:, 1:5]] for s in slides]).astype(np.float64)
    mean, std, directions = data.feature_statistics(slides, [1])
    assert np.allclose(mean, every.mean(0), atol=1e-6) and np.allclose(std, every.std(0), atol=1e-6)
    assert np.allclose(
        directions[1], (every / np.linalg.norm(every, axis=1, keepdims=True)).mean(0), atol=1e-6
    )
    assert np.allclose(
        data.feature_statistics(slides, [0, 1, 2])[0], data.feature_statistics(slides)[0]
    )


def test_verify_goes_by_cases_and_past_a_bad_list(tmp_path):
    """A slide of a held-out case is held out by whichever task names it, as fine-tuning has it; a bad pretrain.csv is one finding among the others."""
    for i in "abcd":
        make_slide(tmp_path, i, [(0, 0), (1, 0)], seed=ord(i))
    task(tmp_path, [("p", "a", 1, "test")], "one")
    task(tmp_path, [("p", "b", 1, "train")], "two")
    (tmp_path / "pretrain.csv").write_text("slide_id\nb\nc\n")
    assert [f for f in data.verify(tmp_path) if "pretrain.csv" in f] == [
        f"{tmp_path}/pretrain.csv: slide 'b' is in a tune or test split, itself or by its case"
    ]
    (tmp_path / "pretrain.csv").write_text("slide\nb\n")
    found = data.verify(tmp_path)
    assert sum("column slide_id is missing" in f for f in found) == 1 and any(
        "split tune does not hold both classes" in f for f in found
    )


def test_findings_name_the_line_of_the_file(tmp_path):
    make_slide(tmp_path, "a", [(0, 0)])
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "t.csv").write_text(
        'case_id,slide_id,label,split\n\np,a,1,train\n"q\nq",b,2,train\n'
    )
    assert any("line 5: label of case" in f for f in data.verify(tmp_path))


def test_files_that_vanish_meanwhile_are_no_fault(tmp_path, monkeypatch):
    rest = tmp_path / ".a.csv.1.tmp"
    rest.write_text("")
    os.utime(rest, (0, 0))
    monkeypatch.setattr(data.Path, "stat", lambda self, **_: rest.unlink() or os.stat(rest))
    data.sweep(tmp_path)


def test_synth_does_not_mix_with_anything_else(tmp_path):
    task(tmp_path, [("p", "a", 1, "train")], "colon_msi")
    before = (tmp_path / "tasks" / "colon_msi.csv").read_bytes()
    with pytest.raises(MixmagError, match="no synthetic cohort's; give another --out"):
        data.synth_cohort(tmp_path)
    assert (tmp_path / "tasks" / "colon_msi.csv").read_bytes() == before and not (
        tmp_path / "slides"
    ).exists()


@pytest.mark.parametrize("mode", ["--text", "--binary"])
def test_sums_of_the_program_sha256sum_are_read(tmp_path, mode):
    make_slide(tmp_path, "a")
    (tmp_path / "SHA256SUMS").write_bytes(
        subprocess.run(
            ["sha256sum", mode, "slides/a.safetensors"], cwd=tmp_path, capture_output=True
        ).stdout
    )
    assert data.seal_findings(tmp_path / "SHA256SUMS") == []
    make_slide(tmp_path, "a", seed=1)
    assert "checksum differs" in data.seal_findings(tmp_path / "SHA256SUMS")[0]


def test_hidden_files_are_nobodys(tmp_path):
    """macOS leaves ._S.safetensors beside S.safetensors on disks that are not its own."""
    make_slide(tmp_path, "a")
    (tmp_path / "slides" / "._a.safetensors").write_bytes(b"\0\5\x16\7")
    task(tmp_path, [("p", "a", 1, "train")])
    (tmp_path / "tasks" / "._t.csv").write_bytes(b"\0\5\x16\7")
    assert [s.slide_id for s in data.read_slides(tmp_path)] == data.pretraining_ids(tmp_path) == [
        "a"
    ] and data.task_names(tmp_path) == ["t"]
    assert not any("._" in finding for finding in data.verify(tmp_path))
