"""Slide files, the synthetic cohort, the tiler, the data sets.     python -m pytest tests/test_data.py"""
import csv
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import openslide
import pytest
import safetensors
import torch
from conftest import ROOT, run
from PIL import Image

import data
from data import MixmagError
from mixmag import Geometry

META = {"encoder": "test", "magnifications": [5, 10, 20], "tile_px": 224, "mpp": 0.5, "cell_px": 896.0, "origin": [0.0, 0.0],
        "width": 9000, "height": 9000, "n_bad": 0}


def make_slide(folder, slide_id="a", cells=((0, 0), (1, 0)), seed=0, dim=8, valid=None, **meta):
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((len(cells), 21, dim)).astype(np.float16)
    path = folder / "slides" / f"{slide_id}.safetensors"
    data.write_slide(path, features, np.array(cells, np.int32).reshape(-1, 2), np.ones((len(cells), 21), bool) if valid is None else valid,
                     {**META, "slide_id": slide_id, **meta})
    return path


# ------------------------------------------------------------------------------------------------------- the slide file

def test_slide_round_trip_through_a_memory_map(tmp_path):
    path = make_slide(tmp_path, cells=[(3, 1), (0, 2)])
    slide = data.read_slide(path)
    expected = np.random.default_rng(0).standard_normal((2, 21, 8)).astype(np.float16)
    assert isinstance(slide.features, np.memmap) and np.array_equal(slide.features, expected)
    assert slide.cells.tolist() == [[3, 1], [0, 2]] and slide.valid.all() and slide.meta["cell_px"] == 896.0 and slide.meta["magnifications"] == [5, 10, 20]


def test_slide_file_is_what_the_contract_says(tmp_path):
    """Read with the safetensors library alone, and the checksum computed again from its definition."""
    import hashlib
    with safetensors.safe_open(make_slide(tmp_path), "numpy") as f:
        meta, tensors = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}
    assert {k: (v.dtype.name, v.shape) for k, v in tensors.items()} == {"features": ("float16", (2, 21, 8)), "cells": ("int32", (2, 2)), "valid": ("bool", (2, 21))}
    assert meta["format"] == "mixmag/1" and json.loads(meta["origin"]) == [0.0, 0.0] and all(isinstance(v, str) for v in meta.values())
    digest = hashlib.sha256(b"".join(tensors[k].tobytes() for k in ("features", "cells", "valid")))
    digest.update(json.dumps({k: v for k, v in meta.items() if k != "sha256"}, sort_keys=True, separators=(",", ":")).encode())
    assert meta["sha256"] == digest.hexdigest()


def test_empty_slide_is_a_valid_file(tmp_path):
    slide = data.read_slide(make_slide(tmp_path, cells=[]))
    assert slide.features.shape == (0, 21, 8) and not data.verify(tmp_path)


def test_many_slides_do_not_exhaust_file_descriptors(tmp_path):
    for i in range(400):
        make_slide(tmp_path, f"s{i}")
    before = len(os.listdir("/proc/self/fd"))
    total = sum(float(s.features[0, 0, 0]) for s in data.read_slides(tmp_path))
    assert np.isfinite(total) and len(os.listdir("/proc/self/fd")) - before <= 260


def test_a_killed_writer_leaves_nothing_under_the_final_name(tmp_path):
    """kill -9 while a writer loops: whatever stands under a final name is whole."""
    code = (f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\nfrom test_data import make_slide\nfrom pathlib import Path\n"
            f"for i in range(10**6): make_slide(Path({str(tmp_path)!r}), f's{{i % 3}}', cells=[(c, 0) for c in range(300)], seed=i)")
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
    for at in sorted(rng.choice(len(whole), 400, replace=False).tolist()) + [0, 7, 8, len(whole) - 1]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << int(rng.integers(8)))]) + whole[at + 1:])
        assert data.verify(tmp_path), f"byte {at} flipped and nothing found"


def task(folder, rows, name="t"):
    data.write_csv(folder / "tasks" / f"{name}.csv", ("case_id", "slide_id", "label", "split"), rows)


def test_verify_prints_every_finding(tmp_path):
    good = [(f"c{i}", f"s{i}", i % 2, data.SPLITS[i // 2 % 3]) for i in range(6)]
    for i in range(6):
        make_slide(tmp_path, f"s{i}", seed=i)
    task(tmp_path, good)
    assert data.verify(tmp_path) == []
    make_slide(tmp_path, "other", encoder="another")
    features = np.ones((1, 21, 8), np.float16)
    features[0, 3, 2] = np.nan
    data.write_slide(tmp_path / "slides" / "nan.safetensors", features, np.zeros((1, 2), np.int32), np.ones((1, 21), bool), {**META, "slide_id": "nan"})
    (tmp_path / "slides" / "misnamed.safetensors").write_bytes((tmp_path / "slides" / "s0.safetensors").read_bytes())
    (tmp_path / "slides" / "cut.safetensors").write_bytes((tmp_path / "slides" / "s0.safetensors").read_bytes()[:-10])
    make_slide(tmp_path, "twin", seed=0)                           # the content of s0 under another name
    task(tmp_path, good + [("c0", "other", 0, "test"), ("new", "absent", 1, "test"), ("c1", "nan", 0, "train"), ("x", "y", 2, "train"), ("x", "y", 1, "later"),
                           ("z", "twin", 0, "test"), ("c9", "s5", 1, "test")])
    data.write_csv(tmp_path / "pretrain.csv", ("slide_id",), [("s0",), ("s4",), ("gone",)])
    findings = "\n".join(data.verify(tmp_path))
    for words in ("encoder another", "NaN", "holds slide 's0'", "cut.safetensors: cannot be read", "case 'c0' is in two splits", "slide 'absent' of case 'new' has no file",
                  "two labels", "label of case 'x' is '2'", "split of case 'x' is 'later'", "same content in two splits", "'s5' stands in more than one row",
                  "slide 's4' is in a tune or test split", "slide 'gone' has no file"):
        assert words in findings, f"{words!r} not among\n{findings}"
    out, _ = run("data.py", "verify", tmp_path, cwd=tmp_path, code=1)
    assert out.count("\n") == findings.count("\n") + 2


def test_task_tables_keep_ids_as_text_and_survive_bom_and_crlf(tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "t.csv").write_bytes("\ufeffcase_id,slide_id,label,split,extra\r\n001,0010,1,train,x\r\n1,10,0,train,y\r\n".encode())
    cases = data.read_task(tmp_path, "t")
    assert [(c.case_id, c.slide_ids, c.label) for c in cases] == [("001", ["0010"], 1), ("1", ["10"], 0)]


@pytest.mark.parametrize("label", ["1.0", "yes", "", "nan", "2"])
def test_labels_are_zero_or_one(tmp_path, label):
    task(tmp_path, [("c", "s", label, "train")])
    with pytest.raises(MixmagError, match="expected 0 or 1"):
        data.read_task(tmp_path, "t")


def test_pretraining_leaves_out_every_tune_and_test_slide(tmp_path):
    for i in "abcd":
        make_slide(tmp_path, i)
    task(tmp_path, [("1", "a", 0, "train"), ("2", "b", 1, "tune")])
    task(tmp_path, [("2", "b", 0, "train"), ("3", "c", 1, "test")], "u")
    assert data.pretraining_ids(tmp_path) == ["a", "d"]


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
            assert len(labels) >= least and min(sum(labels.values()), len(labels) - sum(labels.values())) >= positives
    assert any(len({r[1] for r in rows}) > len({r[0] for r in rows}) for rows in data.synth_plan("quick", 0).values())


def test_cohort_follows_from_its_seed(cohort, tmp_path):
    world = data.synth_world(64, 3)
    for _ in range(2):
        a, b = (data.synth_slide(world, np.random.default_rng(5), "lung_egfr", True, 3) for _ in range(2))
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
            in_cell = [{tuple(c) for c in np.argwhere(t) // 2 ** k} for t, k in ((first, k1), (second, k2))]
            counts[label].append((first.sum(), second.sum()))
            if mechanism == "alone":
                assert first.any() == bool(label)
            elif mechanism == "together":
                assert in_cell[0] and (in_cell[0] >= in_cell[1] > set() if label else not in_cell[0] & in_cell[1])
            else:
                beside = any(np.abs(a - b).sum() == 1 for a in np.argwhere(first) for b in np.argwhere(second) if (a // 2 == b // 2).all())
                assert beside == bool(label)
    if mechanism != "alone":                                       # the first tells nothing by its number, the second half the truth
        (a, b), (c, d) = (np.array(counts[label]).mean(axis=0) for label in (1, 0))
        assert 0.8 < a / c < 1.25 and 1.4 < b / d < 2.8 and 0.3 < np.mean(np.array(counts[0])[:, 1] == 0) < 0.7


def test_synthetic_images_open_and_tile(tmp_path):
    run("data.py", "synth", "--images", 1, "--out", tmp_path / "images", cwd=tmp_path)
    slide = openslide.OpenSlide(next((tmp_path / "images").glob("*.tiff")))
    assert slide.level_count >= 3 and float(slide.properties[openslide.PROPERTY_NAME_MPP_X]) == pytest.approx(0.5, rel=1e-3)
    out, _ = run("data.py", "tile", "--slides", tmp_path / "images", "--out", tmp_path / "d", cwd=tmp_path)
    assert "1 slides done, 0 failed" in out and data.verify(tmp_path / "d") == []
    again, _ = run("data.py", "tile", "--slides", tmp_path / "images", "--out", tmp_path / "d", cwd=tmp_path)
    assert "done before" in again


# ------------------------------------------------------------------------------------------------------------- the tiler

class Args:
    """What plan_slide and friends read of the command line."""
    mpp, region, magnifications, min_tissue, batch_size, device = None, 3, [5, 10, 20], 0.25, 64, torch.device("cpu")

    def __init__(self, **changes):
        vars(self).update(changes)


def write_tiff(path, picture, mpp, levels=(1,), tile=(256, 256)):
    import tifffile
    with tifffile.TiffWriter(path) as tiff:
        for i, shrink in enumerate(levels):
            small = np.asarray(Image.fromarray(picture).reduce(shrink)) if shrink > 1 else picture
            resolution = None if mpp is None else (1e4 / mpp / shrink,) * 2
            tiff.write(small, tile=tile, photometric="rgb", compression="zlib", subfiletype=int(i > 0), resolution=resolution,
                       resolutionunit="CENTIMETER" if mpp else None)
    return path


def pink(height, width, seed=0):
    rng = np.random.default_rng(seed)
    small = rng.integers(80, 200, (height // 32 + 1, width // 32 + 1, 3), dtype=np.uint8)
    small[..., 1] //= 2
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def test_otsu_equals_the_definition():
    rng = np.random.default_rng(0)
    for _ in range(20):
        values = np.clip(np.concatenate([rng.normal(40, 15, 300), rng.normal(170, 20, 80)]), 0, 255).astype(np.uint8)

        def between(t):
            low, high = values[values <= t].astype(float), values[values > t].astype(float)
            return len(low) * len(high) * (low.mean() - high.mean()) ** 2 if len(low) and len(high) else 0.0

        best = max(between(t) for t in range(256))
        assert between(data.otsu(values)) == pytest.approx(best)
    assert data.otsu(np.full(10, 7, np.uint8)) == 0


@pytest.mark.parametrize("mpp", [0.5, 0.2525, 0.4991, 0.37])
def test_tiles_are_the_right_pixels(tmp_path, mpp):
    """Each tile is what area-averaging its own exact box of level 0 gives, and not what a box one pixel of the tile further
    gives, whatever level it was read from."""
    side = int(3.4 * 448 / mpp)
    picture = pink(side, side)
    reader = data.Reader(write_tiff(tmp_path / "s.tiff", picture, mpp, levels=(1, 2, 4)))
    plan = data.plan_slide(reader, Args(min_tissue=0.0))
    assert plan.cell_px == pytest.approx(448 / mpp, rel=2e-3) and plan.windows == [(0, 0, 3, 3)]
    tiles = data.read_window(reader, plan, plan.windows[0])
    assert tiles.shape == (9, 21, 224, 224, 3)
    cell_table, image = Geometry(1).cell_table().tolist(), Image.fromarray(picture)

    def error(cell, entry, dx, dy):
        k, r, c = cell_table[entry]
        step = plan.cell_px / 2 ** k
        left, top = ((a * plan.cell_px + b * step + d * step / 224) for a, b, d in ((cell % 3, c, dx), (cell // 3, r, dy)))
        box = [min(max(v, 0), side) for v in (left, top, left + step, top + step)]
        return np.abs(np.asarray(image.resize((224, 224), Image.Resampling.BOX, box=box), float) - tiles[cell, entry]).mean()

    for cell in (0, 5, 8):
        for entry in (0, 2, 3, 9, 20):
            here = error(cell, entry, 0, 0)
            assert all(here < error(cell, entry, dx, dy) for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1)))


@pytest.mark.parametrize("properties, given, message", [
    ({}, None, "give the true value with --mpp"), ({"openslide.mpp-x": "0", "openslide.mpp-y": "0"}, None, "0.1 to 4"),
    ({"openslide.mpp-x": "nan", "openslide.mpp-y": "0.5"}, None, "--mpp"), ({"openslide.mpp-x": "25", "openslide.mpp-y": "25"}, None, "0.1 to 4"),
    ({"openslide.mpp-x": "0.5", "openslide.mpp-y": "0.52"}, None, "same in x and y"), ({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.25"}, 0.5, "leave --mpp out")])
def test_mpp_is_never_guessed(properties, given, message):
    slide = type("Stub", (), {"properties": properties})
    with pytest.raises(MixmagError, match=message):
        data.slide_mpp(slide, given)


def test_mpp_with_a_decimal_comma():
    assert data.slide_mpp(type("Stub", (), {"properties": {"openslide.mpp-x": "0,25", "openslide.mpp-y": "0,25"}}), None) == (0.25, "openslide.mpp-x")


def test_nothing_is_upsampled(tmp_path):
    reader = data.Reader(write_tiff(tmp_path / "s.tiff", pink(1000, 1000), 1.0))
    with pytest.raises(MixmagError, match="coarser than 20x"):
        data.plan_slide(reader, Args())
    assert data.plan_slide(reader, Args(magnifications=[5, 10], region=2)).levels == {5: 0, 10: 0}


def test_white_slide_yields_an_empty_file(tmp_path):
    write_tiff(tmp_path / "white.tiff", np.full((3000, 3000, 3), 243, np.uint8), 0.5)
    out, _ = run("data.py", "tile", "--slides", tmp_path / "white.tiff", "--out", tmp_path / "d", cwd=tmp_path)
    assert "nothing to embed" in out and len(data.read_slide(tmp_path / "d/slides/white.safetensors").cells) == 0


def test_bad_slides_are_listed_and_the_rest_is_done(tmp_path):
    write_tiff(tmp_path / "good.tiff", pink(3000, 3000), 0.5)
    write_tiff(tmp_path / "no-mpp.tiff", pink(1000, 1000), None)
    (tmp_path / "empty.tiff").touch()
    (tmp_path / "text.tiff").write_text("not a slide")
    (tmp_path / "cut.tiff").write_bytes((tmp_path / "good.tiff").read_bytes()[:3000])
    out, err = run("data.py", "tile", "--slides", tmp_path, "--out", tmp_path / "d", cwd=tmp_path, code=3)
    assert "1 slides done, 4 failed" in out
    with open(tmp_path / "d" / "failed.csv", newline="") as f:
        failed = {row["slide_id"]: row["reason"] for row in csv.DictReader(f)}
    assert set(failed) == {"no-mpp", "empty", "text", "cut"} and "0 bytes" in failed["empty"] and "--mpp" in failed["no-mpp"]
    assert data.verify(tmp_path / "d") == []


def test_slides_with_one_id_are_refused(tmp_path):
    for name in ("a.tiff", "A.svs"):
        (tmp_path / name).touch()
    _, err = run("data.py", "tile", "--slides", tmp_path, "--out", tmp_path / "d", cwd=tmp_path, code=1)
    assert "two slides with one id" in err


def test_texture_is_finite_deterministic_and_blind_to_turning():
    tiles = torch.from_numpy(np.stack([pink(224, 224, seed) for seed in range(3)] + [np.full((224, 224, 3), 255, np.uint8)]))
    out = data.texture(tiles)
    assert out.shape == (4, 46) and torch.isfinite(out).all() and torch.equal(out, data.texture(tiles))
    assert torch.allclose(data.texture(torch.rot90(tiles, 1, (1, 2))), out, atol=1e-4)
    assert (out[0] - out[1]).abs().max() > 0.01


def test_encoder_from_a_module(tmp_path):
    (tmp_path / "mine.py").write_text("def factory():\n    return lambda tiles: tiles.float().mean((1, 2))\n"
                                      "def nan():\n    return lambda tiles: tiles.float().mean((1, 2)) / 0 * 0\n")
    write_tiff(tmp_path / "s.tiff", pink(3000, 3000), 0.5)
    run("data.py", "tile", "--slides", "s.tiff", "--out", "d", "--encoder", "mine:factory", cwd=tmp_path)
    slide = data.read_slide(tmp_path / "d/slides/s.safetensors")
    assert slide.dim == 3 and slide.meta["encoder"] == "mine:factory" and slide.features.shape == (9, 21, 3)
    _, err = run("data.py", "tile", "--slides", "s.tiff", "--out", "e", "--encoder", "mine:nan", cwd=tmp_path, code=1)
    assert "NaN" in err
    _, err = run("data.py", "tile", "--slides", "s.tiff", "--out", "e", "--encoder", "mine:absent", cwd=tmp_path, code=1)
    assert "absent" in err


def test_real_slides(real, tmp_path):
    out, err = run("data.py", "tile", "--slides", real / "slides", "--out", tmp_path, cwd=tmp_path, code=3)
    assert "CMU-1-Small-Region: 0.499 um/px" in out and "6 cells, 126 tokens" in out
    assert "5 slides done, 6 failed" in out and data.verify(tmp_path) == []
    for slide_id in ("TCGA-CR-7395-01A-01-TS1", "ezwsi-multiframe_camelyon", "panimg-no_dzi"):
        assert f"{slide_id}: FAILED" in err


def test_broken_slides_each_get_a_line(real, tmp_path):
    broken = sorted((real / "broken").iterdir())
    out, err = run("data.py", "tile", "--slides", *broken, "--out", tmp_path, cwd=tmp_path, code=3)
    assert f"0 slides done, {len(broken)} failed" in out and all(f"{p.stem}: FAILED" in err for p in broken)


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
    slide = data.read_slide(make_slide(tmp_path, cells=[(0, 0), (1, 0), (0, 1), (1, 1), (2, 1)], valid=valid))
    g = Geometry(2)
    rows, corners = data.windows(slide.cells, 2, 1, 0.5)
    x, ok = data.gather(slide, rows, g.cell_order().numpy())
    assert np.array_equal(ok, data.gather_valid(slide, rows, g.cell_order().numpy()))
    at = {tuple(c): i for i, c in enumerate(slide.cells.tolist())}
    in_cell = {tuple(t): i for i, t in enumerate(Geometry(1).token_table().tolist())}
    for w, (col, row) in enumerate(corners.tolist()):
        for i, (k, r, c) in enumerate(g.token_table().tolist()):
            cell = at.get((col + (c >> k), row + (r >> k)))
            entry = in_cell[k, r % 2 ** k, c % 2 ** k]
            held = cell is not None and valid[cell, entry]
            assert ok[w, i] == held and np.array_equal(x[w, i], slide.features[cell, entry] if held else np.zeros(8))


def test_a_sample_is_a_function_of_seed_and_index(cohort):
    slides = data.read_slides(cohort, data.pretraining_ids(cohort))
    a = data.RegionDataset(slides, Geometry(3), 7, 0.5, views=2, source=5)
    b = data.RegionDataset(slides, Geometry(3), 7, 0.5, views=2, source=5)
    together, alone = a.__getitems__([3, len(a) + 5, 2]), b.__getitems__([len(b) + 5])
    assert together["x"].shape == (2, 3, 189, 64) and together["removed"].shape == (2, 3, 94) and together["valid"] is None
    for key in ("x", "removed", "slide"):
        assert torch.equal(together[key][:, 1:2], alone[key])
    assert not torch.equal(data.RegionDataset(slides, Geometry(3), 8, 0.5).__getitems__([3])["x"], data.RegionDataset(slides, Geometry(3), 7, 0.5).__getitems__([3])["x"])


def test_an_epoch_sees_every_window_once(cohort):
    dataset = data.RegionDataset(data.read_slides(cohort)[:20], Geometry(3), 0, 0.5)
    for epoch in (0, 3):
        assert sorted(dataset.draw(epoch * len(dataset) + i)[0][0] for i in range(len(dataset))) == list(range(len(dataset)))


def test_two_views_lie_in_one_source_window(cohort):
    slides = data.read_slides(cohort)[:20]
    for source in (3, 5, 7):
        dataset = data.RegionDataset(slides, Geometry(3), 0, 0.5, views=2, source=source)
        gaps = []
        for i in range(300):
            (a, _, removed_a), (b, _, removed_b) = dataset.draw(i)
            assert dataset.slide_of[a] == dataset.slide_of[b] and not np.array_equal(removed_a, removed_b)
            gaps.append(np.abs(dataset.corners[a] - dataset.corners[b]).max())
        assert max(gaps) <= source - 3 and (source == 3 or max(gaps) > 0)


def test_turned_windows_hold_the_turned_tokens(cohort):
    dataset = data.RegionDataset(data.read_slides(cohort)[:5], Geometry(3), 0, 0.5)
    plain = data.RegionDataset(data.read_slides(cohort)[:5], Geometry(3), 0, 0.5, turn=False)
    for i in range(20):
        window, turn, _ = dataset.draw(i)[0]
        assert torch.equal(dataset.__getitems__([i])["x"][0], plain.__getitems__([i])["x"][0][Geometry(3).dihedral()[turn]])


def test_case_batches_are_ragged_bags(cohort):
    cases = [c for c in data.read_task(cohort, "skin_braf") if c.split == "train"]
    slides = {s.slide_id: s for s in data.read_slides(cohort)}
    dataset = data.CaseDataset(slides, cases, Geometry(3), Geometry(3).select(10))
    batch = dataset.__getitems__([2, 0])
    ids = [i for c in (cases[2], cases[0]) for i in c.slide_ids]
    assert batch["slide_ids"] == ids and batch["x"].shape == (int(batch["regions"].sum()), 36, 64) and batch["valid"] is None
    assert batch["label"].tolist() == [cases[2].label, cases[0].label] and batch["case"].tolist() == [0] * len(cases[2].slide_ids) + [1] * len(cases[0].slide_ids)
    first = data.gather(slides[ids[0]], dataset.rows[ids[0]], Geometry(3).cell_order().numpy()[Geometry(3).select(10)])[0]
    assert np.array_equal(batch["x"][:len(first)].numpy(), first)


def test_slides_without_a_region_are_named(tmp_path):
    make_slide(tmp_path, "whole", cells=[(c, r) for c in range(3) for r in range(3)])
    make_slide(tmp_path, "scrap", cells=[(0, 0)])
    slides = {s.slide_id: s for s in data.read_slides(tmp_path)}
    cases = [data.Case("1", 0, "train", ["whole", "scrap"]), data.Case("2", 1, "train", ["scrap"])]
    dataset = data.CaseDataset(slides, cases, Geometry(3), Geometry(3).select())
    assert len(dataset) == 1 and dataset.dropped == ["scrap", "scrap"]


def test_statistics_equal_the_definition(tmp_path):
    valid = np.random.default_rng(1).random((2, 21)) > 0.3
    make_slide(tmp_path, "a", valid=valid)
    make_slide(tmp_path, "b", seed=1)
    slides = data.read_slides(tmp_path)
    mean, std, directions = data.feature_statistics(slides)
    tokens = np.concatenate([s.features[s.valid].astype(np.float64) for s in slides])
    assert np.allclose(mean, tokens.mean(0), atol=1e-6) and np.allclose(std, tokens.std(0), atol=1e-6)
    level = Geometry(1).cell_table()[:, 0].numpy()
    for k in range(3):
        at = np.concatenate([s.features[:, level == k][s.valid[:, level == k]].astype(np.float64) for s in slides])
        unit = (at / np.linalg.norm(at, axis=1, keepdims=True)).sum(0)
        assert np.allclose(directions[k], unit / np.linalg.norm(unit), atol=1e-5)


def test_help_answers_at_once():
    for script in ("data.py", "train.py"):
        began = time.time()
        subprocess.run([sys.executable, str(ROOT / script), "--help"], capture_output=True, check=True)
        assert time.time() - began < 5                             # about 0.1 s; importing torch alone takes longer than a second
        out = subprocess.run([sys.executable, "-X", "importtime", str(ROOT / script), "--help"], capture_output=True, text=True).stderr
        assert "torch" not in out
