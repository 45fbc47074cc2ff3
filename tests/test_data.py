"""Slide files, the synthetic cohort, the tiler, the data sets.     python -m pytest tests/test_data.py"""
import csv
import io
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
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage
from scipy.spatial import cKDTree

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
    manifest, mask, mpp_from_power = {}, None, False

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


def stub(**properties):
    """A slide that says this of itself; mpp and unit stand for OpenSlide's names."""
    names = {"x": "openslide.mpp-x", "y": "openslide.mpp-y", "res_x": "tiff.XResolution", "res_y": "tiff.YResolution", "unit": "tiff.ResolutionUnit",
             "power": "openslide.objective-power"}
    return type("Stub", (), {"properties": {names[k]: v for k, v in properties.items()}})


@pytest.mark.parametrize("said, given, power, expected", [
    (dict(x="0.25", y="0.25"), None, False, (0.25, "openslide.mpp-x")), (dict(x="0,25", y="0,25"), None, False, (0.25, "openslide.mpp-x")),
    (dict(x="0.5", y="0.509"), None, False, (0.5045, "openslide.mpp-x")), (dict(x="0.5", y="0.5", power="40"), None, True, (0.5, "openslide.mpp-x")),
    (dict(res_x="20000", res_y="20000", unit="centimeter"), None, False, (0.5, "tiff.XResolution")),
    (dict(res_x="50800", res_y="50800", unit="inch", power="20"), None, True, (0.5, "tiff.XResolution")),
    (dict(x="0.499", y="0.499", res_x="72", res_y="72", unit="inch"), None, False, (0.499, "openslide.mpp-x")),
    (dict(power="40"), None, True, (0.25, "openslide.objective-power")),
    (dict(unit="none", res_x="1", res_y="1", power="20"), None, True, (0.5, "openslide.objective-power")),
    (dict(x="0.499", y="0.499"), 0.5, False, (0.5, "--mpp")), ({}, 0.5, False, (0.5, "--mpp")), (dict(power="40"), 0.5, True, (0.5, "--mpp")),
    (dict(x="0.0274", y="0.0274"), 0.274, False, (0.274, "--mpp")), (dict(x="1000", y="1000"), 0.25, False, (0.25, "--mpp")),
    (dict(x="0", y="0"), 0.25, False, (0.25, "--mpp")),
    (dict(x="nan", y="nan"), 0.25, False, (0.25, "--mpp")), (dict(x="0.25", y="0.5"), 0.25, False, (0.25, "--mpp"))])
def test_mpp_comes_from_who_says_it(said, given, power, expected):
    mpp, source = data.slide_mpp(stub(**said), given, from_power=power)
    assert (mpp, source) == (pytest.approx(expected[0]), expected[1])


@pytest.mark.parametrize("said, given, power, words", [
    ({}, None, False, ["no mpp", "--mpp", "--manifest"]), (dict(power="20"), None, False, ["objective-power is '20'", "--mpp-from-power"]),
    (dict(unit="none", res_x="1", res_y="1"), None, True, ["no mpp", "--mpp"]), (dict(power="0"), None, True, ["objective-power is '0'", "--mpp"]),
    (dict(x="0", y="0"), None, True, ["mpp-x '0'", "0.1 to 4", "--mpp"]), (dict(x="nan", y="0.5"), None, False, ["mpp-x 'nan'", "--mpp"]),
    (dict(x="", y="0.5"), None, False, ["mpp-x ''", "--mpp"]), (dict(x="0.5"), None, False, ["mpp-y None", "--mpp"]),
    (dict(x="-0.5", y="-0.5"), None, False, ["'-0.5'"]),
    (dict(x="25", y="25"), None, False, ["mpp-x '25'", "0.1 to 4"]), (dict(x="0.0274", y="0.0274"), None, False, ["'0.0274'", "0.1 to 4"]),
    (dict(x="0.5", y="0.52"), None, False, ["'0.52'", "same in x and y"]),
    (dict(x="0.25", y="0.25", power="20"), 0.5, False, ["--mpp says 0.5", "'0.25'", "leave --mpp out"]),
    (dict(x="0.5", y="0.5"), 0.489, False, ["2 %"]),
    (dict(res_x="72", res_y="72", unit="inch"), None, True, ["XResolution '72'", "per inch", "352.8"]),
    (dict(res_x="0", res_y="0", unit="centimeter"), None, False, ["XResolution '0'", "nan"]),
    (dict(res_x="20000", res_y="20000", unit="centimeter"), 0.25, False, ["0.5 and 0.5 um/px"]),
    ({}, 25.0, False, ["--mpp says 25", "0.1 to 4"]), ({}, float("nan"), False, ["--mpp says nan"]), (dict(x="0.5", y="0.5"), 0.0, False, ["--mpp says 0"])])
def test_mpp_is_never_guessed(said, given, power, words):
    with pytest.raises(MixmagError) as error:
        data.slide_mpp(stub(**said), given, from_power=power)
    assert all(w in str(error.value) for w in words), error.value


@pytest.mark.parametrize("name, given, expected", [
    ("CMU-1-Small-Region.svs", None, 0.499), ("CMU-1-Small-Region.svs", 0.5, 0.5), ("CMU-1-Small-Region.svs", 0.25, "leave --mpp out"),
    ("luna-1065626.svs", None, 0.5026),
    ("TCGA-CR-7395-01A-01-TS1.svs", None, "no mpp"), ("TCGA-CR-7395-01A-01-TS1.svs", 0.5, 0.5), ("ezwsi-multiframe_camelyon.dcm", None, "'28.969"),
    ("openslide-python-boxes.tiff", None, "'352.7"), ("openslide-python-boxes.tiff", 0.5, 0.5),
    ("panimg-valid_tiff.tif", None, "'1000.0"), ("panimg-valid_tiff.tif", 0.5, 0.5),
    ("panimg-invalid_resolutions_tiff.tif", None, "no mpp"), ("panimg-no_dzi.tif", None, 0.97237),
    ("highdicom-sm_image.dcm", None, 0.499), ("openslide-python-boxes_0.dcm", None, 0.499)])
def test_mpp_of_real_slides(real, name, given, expected):
    slide = openslide.OpenSlide(real / "slides" / name)
    if isinstance(expected, str):
        with pytest.raises(MixmagError, match=expected):
            data.slide_mpp(slide, given, from_power=True)
    else:
        assert data.slide_mpp(slide, given)[0] == pytest.approx(expected, rel=1e-4)


def test_manifest_names_slides_by_file_or_id(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text("slide,mpp,note\nfolder/a.svs,\"0,25\",x\nb.c,0.5,\nd.svs,,nothing said\n", "utf-8")
    args = Args(mpp=0.3, manifest=data.read_manifest(path))
    asked = {name: data.given_mpp(data.Path(name), args) for name in ("x/a.svs", "b.c.tiff", "d.svs")}
    assert asked == {"x/a.svs": (0.25, "--manifest row a.svs"), "b.c.tiff": (0.5, "--manifest row b.c"), "d.svs": (0.3, "--mpp")}
    with pytest.raises(MixmagError, match="row a.svs says 0.25.*leave --manifest row a.svs out"):
        data.slide_mpp(stub(x="0.5", y="0.5"), *asked["x/a.svs"])
    with pytest.raises(MixmagError, match="two rows"):
        data.given_mpp(data.Path("a.svs"), Args(manifest={"a": 0.5, "a.svs": 0.5}))
    path.write_text("slide,mpp\na,0.5\nb,half\na,0.25\n", "utf-8")
    with pytest.raises(MixmagError, match="'a' '0.5'.*more than one row.*'b' 'half'"):
        data.read_manifest(path)
    path.write_text("wsi,mpp\na,0.5\n", "utf-8")
    with pytest.raises(MixmagError, match="column slide is missing"):
        data.read_manifest(path)


INK = {"blue": (30, 60, 150), "green": (20, 130, 70), "black": (25, 25, 30), "red": (225, 35, 50)}
STAINS = {"hematoxylin": (1.25, 1.35, 0.55), "eosin": (0.12, 0.95, 0.45), "blue": (0.8, 0.65, 0.42), "dab": (0.65, 1.3, 1.8)}             # density in R, G, B


def field(rng, side, px):
    return np.asarray(Image.fromarray(rng.standard_normal((side // px + 4,) * 2).astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC))


def dots(rng, side, share, radius):
    image = Image.new("L", (side, side))
    for x, y in rng.integers(0, side, size=(int(share * side * side), 2)):
        ImageDraw.Draw(image).ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    return np.asarray(image, np.float32) / 255


def paint(seed, fault, side=1792):
    """A section on glass at 2 um/px with one thing wrong with it, as a JPEG, and where a region of it should be taken:
    (side, side, 3) uint8, (side, side) bool."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1:1:side * 1j, -1:1:side * 1j]
    tissue = (x ** 2 + y ** 2 + 0.15 * field(rng, side, 400) < 0.45) & (fault != "empty")
    nuclei, eosin = dots(rng, side, 0.006, 3), (0.4 + 0.12 * field(rng, side, 8) + 0.15 * field(rng, side, 60)).clip(0.05)
    amount = {"hematoxylin": nuclei, "eosin": eosin}
    if fault == "fat":
        near = cKDTree(rng.uniform(0, side, (int(side * side / 40 ** 2), 2))).query(np.stack(np.mgrid[:side, :side], -1), k=2)[0]
        amount = {"eosin": 0.7 * (near[..., 1] - near[..., 0] < 4)}                                     # walls of some 4 um round cells of 80
    elif fault == "ihc":
        amount = {"blue": 0.5 * nuclei + 0.03, "dab": 0.8 * dots(rng, side, 0.0005, 4)}
    density = sum(np.multiply.outer(a * tissue, STAINS[k]) for k, a in amount.items())
    if fault in ("haze", "empty"):
        smear = Image.fromarray((255 * (field(rng, side, 500) > 1)).astype(np.uint8)).filter(ImageFilter.GaussianBlur(20))
        density = density + np.multiply.outer(0.05 + 0.015 * field(rng, side, 800).clip(-2, 2) + 0.06 * (np.asarray(smear) / 255), STAINS["eosin"])
    light = np.array([243, 242, 244]) * np.exp(-density)
    if fault in INK:
        image = Image.new("L", (side, side))
        for _ in range(2):
            ImageDraw.Draw(image).line([tuple(p) for p in rng.uniform(0, side, (4, 2))], fill=255, width=int(rng.uniform(200, 450)), joint="curve")
        ink = np.asarray(image.filter(ImageFilter.GaussianBlur(8)), np.float32)[..., None] / 255 * rng.uniform(0.85, 0.97)
        light = light * (1 - ink + ink * (np.array(INK[fault]) + rng.integers(-15, 16, 3)) / 255)
        tissue &= ink[..., 0] < 0.3
    if fault == "borders":
        outside = (np.hypot(x, y) > 0.95) | (y < -0.8) | (x > 0.9)
        light[outside], tissue = 3, tissue & ~outside
    buffer = io.BytesIO()
    Image.fromarray((light + rng.normal(0, 3, light.shape)).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=80)
    return np.asarray(Image.open(buffer)), tissue


def at_16_um(picture):
    return np.asarray(Image.fromarray(picture).reduce(8))


@pytest.mark.parametrize("fault, least", [("none", 0.85), ("haze", 0.85), ("borders", 0.85), ("ihc", 0.8), ("fat", 0.8), *((ink, 0.85) for ink in INK)])
def test_tissue_is_found_whatever_is_on_the_glass(fault, least):
    """Intersection over union with what was drawn; the thresholds were tuned on seeds 0 to 5 and 21, 22."""
    picture, truth = paint(11, fault)
    mask, truth = data.find_tissue(at_16_um(picture)), at_16_um(truth.astype(np.uint8) * 255) > 127
    iou = (mask & truth).sum() / (mask | truth).sum()
    print(f"{fault}: IoU {iou:.3f}, recall {(mask & truth).sum() / truth.sum():.3f}, precision {(mask & truth).sum() / mask.sum():.3f}")
    assert truth.mean() > 0.05 and iou > least


@pytest.mark.parametrize("what", ["haze", "white", "glass", "black", "noise", "one pixel"])
def test_no_tissue_is_no_tissue(what):
    rng = np.random.default_rng(0)
    flat = {"white": 255, "glass": (243, 241, 238), "black": 0, "one pixel": (200, 90, 150)}
    rgb = at_16_um(paint(11, "empty")[0]) if what == "haze" else rng.normal(240, 2.5, (300, 400, 3)).clip(0, 255).astype(np.uint8) if what == "noise" else \
        np.full((1, 1, 3) if what == "one pixel" else (300, 400, 3), flat[what], np.uint8)
    assert not data.find_tissue(rgb).any()


@pytest.mark.parametrize("name, shrink, tissue, none", [                                                # seen by eye, (x, y) in pixels of the picture
    ("histoprep-slide_with_ink.jpeg", 8, [(300, 250), (1800, 400), (2500, 300), (3300, 550), (4600, 650), (5300, 550)],
     [(3850, 830), (3900, 880), (3780, 860), (100, 850), (3000, 150), (2000, 850), (5000, 150), (4160, 380)]),
    ("tissueloc-20181218042458.jpg", 1, [(200, 450), (330, 370), (600, 150), (550, 870), (1300, 450), (1500, 450), (1650, 800)],
     [(800, 200), (1050, 450), (40, 890), (100, 950), (960, 990)]),
    ("tissueloc-20181218042533.jpg", 1, [(60, 550), (300, 700), (800, 350), (1000, 430), (1300, 650), (1600, 700), (1450, 400)],
     [(400, 100), (200, 250), (1000, 530), (1700, 200), (900, 60)]),
    ("tissueloc-20181218042607.jpg", 1, [(150, 110), (50, 650), (400, 400), (700, 450), (880, 200), (1300, 450), (1700, 500), (1250, 880)],
     [(30, 100), (570, 390), (940, 600), (1000, 100), (400, 900)])])
def test_tissue_of_real_pictures(real, name, shrink, tissue, none):
    mask = data.find_tissue(np.asarray(Image.open(real / "pictures" / name).convert("RGB").reduce(shrink)))
    assert all(mask[y // shrink, x // shrink] for x, y in tissue) and not any(mask[y // shrink, x // shrink] for x, y in none)


@pytest.mark.parametrize("name, mpp, least, most", [
    ("CMU-1-Small-Region.svs", 0.499, 0.3, 0.5), ("TCGA-CR-7395-01A-01-TS1.svs", 0.5, 0.55, 0.75), ("luna-1065626.svs", 0.5026, 0.003, 0.01),
    ("panimg-no_dzi.tif", 0.972, 0, 0), ("panimg-valid_tiff.tif", 0.5, 0, 0)])
def test_tissue_of_real_slides(real, name, mpp, least, most):
    """How much of each is tissue, by eye."""
    assert least <= data.tissue_mask(data.Reader(real / "slides" / name), mpp)[1].mean() <= most


def test_the_thumbnail_is_the_box_mean_however_it_is_read(tmp_path):
    picture = pink(2777, 5000)
    rgb, unread = data.thumbnail(data.Reader(write_tiff(tmp_path / "s.tiff", picture, 0.5)), 0.5)
    whole = np.asarray(Image.fromarray(picture).resize((rgb.shape[1], rgb.shape[0]), Image.Resampling.BOX), float)
    assert rgb.shape == (87, 156, 3) and not unread.any() and np.abs(rgb - whole).max() <= 1


def test_missing_tiles_are_glass_and_unreadable_ones_are_tried(tmp_path):
    import tifffile
    picture = np.full((4096, 4096, 3), 243, np.uint8)
    picture[1024:3072, 1024:3072] = pink(2048, 2048)
    tiles = [picture[y:y + 256, x:x + 256] if y < 2048 else None for y in range(0, 4096, 256) for x in range(0, 4096, 256)]
    with tifffile.TiffWriter(tmp_path / "s.tiff") as tiff:
        tiff.write(iter(tiles), shape=picture.shape, dtype=np.uint8, tile=(256, 256), photometric="rgb", compression="zlib", resolution=(2e4, 2e4),
                   resolutionunit="CENTIMETER")
    rgb, mask = data.tissue_mask(data.Reader(tmp_path / "s.tiff"), 0.5)
    assert (rgb[64:] == 255).all() and not mask[64:].any() and mask[36:60, 36:92].all() and not mask[:30].any()
    with tifffile.TiffFile(tmp_path / "s.tiff") as tiff:
        start, length = ((tiff.pages[0].tags[t].value[6 * 16 + 6]) for t in ("TileOffsets", "TileByteCounts"))
    whole = (tmp_path / "s.tiff").read_bytes()
    (tmp_path / "bad.tiff").write_bytes(whole[:start] + bytes(length) + whole[start + length:])
    grey, tried = data.tissue_mask(data.Reader(tmp_path / "bad.tiff"), 0.5)
    bad = (grey == 128).all(axis=2)
    assert tried[bad].all() and bad[48:56, 48:56].all() and bad.sum() <= 16 ** 2 and np.array_equal(grey[~bad], rgb[~bad])


def ring(x, y, radius, n=40):
    return [[x + radius * np.cos(a), y + radius * np.sin(a)] for a in np.linspace(0, 2 * np.pi, n)]


@pytest.mark.parametrize("wrap", [
    lambda p: {"type": "FeatureCollection", "features": [{"type": "Feature", "geometry": {"type": "Polygon", "coordinates": q}} for q in p]},
    lambda p: {"type": "Feature", "properties": {"name": "tissue"}, "geometry": {"type": "MultiPolygon", "coordinates": p}},
    lambda p: {"type": "MultiPolygon", "coordinates": p}, lambda p: [{"type": "Polygon", "coordinates": q} for q in p],
    lambda p: {"type": "GeometryCollection", "geometries": [{"type": "Polygon", "coordinates": q} for q in p]}])
def test_geojson_masks_are_the_polygons(tmp_path, wrap):
    """Against matplotlib's point in polygon: a disc with a hole, an island in the hole, and a disc that overlaps a hole of another."""
    from matplotlib.path import Path as Polygon
    parts = [[ring(2000, 2000, 500)], [ring(2000, 2000, 1500), ring(2000, 2000, 900)], [ring(6000, 3000, 900)], [ring(6500, 3000, 1000), ring(6300, 3000, 400)]]
    (tmp_path / "m.geojson").write_text(json.dumps(wrap(parts)), "utf-8")
    slide = type("Stub", (), {"dimensions": (9000, 5000), "properties": {"openslide.bounds-x": "320", "openslide.bounds-y": "64"}})
    mask = data.read_mask(tmp_path / "m.geojson", slide, (156, 281))
    centres = np.stack(np.meshgrid((np.arange(281) + 0.5) * 9000 / 281, (np.arange(156) + 0.5) * 5000 / 156), axis=-1).reshape(-1, 2) - (320, 64)
    within = [[Polygon(r).contains_points(centres) for r in rings] for rings in parts]
    expected = np.any([w[0] & ~np.any([np.zeros(len(centres), bool), *w[1:]], axis=0) for w in within], axis=0).reshape(156, 281)
    edge = ndimage.maximum_filter(expected, 3) ^ ndimage.minimum_filter(expected, 3)                    # Pillow draws the outline, too
    assert expected.mean() > 0.1 and np.array_equal(mask[~edge], expected[~edge]) and abs(mask.mean() / expected.mean() - 1) < 0.04


@pytest.mark.parametrize("mode", ["1", "L", "I;16", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("size", [(90, 50), (281, 156), (1800, 1000)])
def test_png_masks_cover_the_whole_slide(tmp_path, mode, size):
    half = np.zeros((size[1], size[0]), bool)
    half[:, :size[0] // 3] = True
    value = {"I;16": np.uint16(300), "1": True}.get(mode, np.uint8(1))
    if mode in ("RGB", "RGBA"):
        array = np.zeros((*half.shape, len(mode)), np.uint8)
        array[half, 2], array[..., 3:] = 1, 255
    else:
        array = half * value
    image = Image.fromarray(array)
    if mode == "P":
        image = Image.fromarray(array).convert("P")
    image.save(tmp_path / "m.png")
    mask = data.read_mask(tmp_path / "m.png", type("Stub", (), {"dimensions": (9000, 5000), "properties": {}}), (156, 281))
    assert mask[:, :93].all() and not mask[:, 95:].any()


@pytest.mark.parametrize("name, content, message", [
    ("m.png", Image.new("L", (90, 50)), "m.png: holds no tissue"),
    ("m.png", Image.new("L", (50, 90), 255), "50 x 90 is another shape than the slide's 9000 x 5000"),
    ("m.png", Image.new("L", (92, 50), 255), "92 x 50 is another shape"), ("m.png", b"no picture", "m.png: cannot be read as a mask"),
    ("m.geojson", {"type": "FeatureCollection", "features": []}, "m.geojson: holds no tissue"),
    ("m.geojson", {"type": "Polygon", "coordinates": [ring(20000, 0, 100)]}, "holds no tissue"),
    ("m.geojson", {"type": "Point", "coordinates": [5, 5]}, "a Point has no area"),
    ("m.geojson", {"type": "Polygon", "coordinates": [["x", "y"]]}, "cannot be read as a mask"),
    ("m.geojson", {"name": "no type"}, "cannot be read"), ("m.geojson", b"{", "cannot be read"), ("m.geojson", b"\xff\xfe", "cannot be read")])
def test_masks_that_are_none_are_refused(tmp_path, name, content, message):
    if isinstance(content, Image.Image):
        content.save(tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(MixmagError, match=message):
        data.read_mask(tmp_path / name, type("Stub", (), {"dimensions": (9000, 5000), "properties": {}}), (156, 281))


def test_masks_belong_to_slides_by_name(tmp_path):
    for name in ("a.png", "b.geojson", "c.png", "c.geojson"):
        (tmp_path / name).touch()
    assert data.find_mask(data.Path("x/a.svs"), None) is None and data.find_mask(data.Path("x/z.svs"), tmp_path / "a.png") == tmp_path / "a.png"
    assert [data.find_mask(data.Path(f"x/{i}.svs"), tmp_path).name for i in "ab"] == ["a.png", "b.geojson"]
    for slide, place, message in (("c", tmp_path, "found 2"), ("d", tmp_path, "d.png or .*d.geojson; found 0"), ("a", tmp_path / "none.png", "none.png; found 0")):
        with pytest.raises(MixmagError, match=message):
            data.find_mask(data.Path(f"x/{slide}.svs"), place)


def tile(monkeypatch, *argv):
    """`data.py tile` in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["data.py", "tile", *map(str, argv)])
    return data.tile_command(data.parse())


def test_manifest_mask_and_qc_from_the_command_line(tmp_path, monkeypatch, capsys):
    slides = tmp_path / "slides"
    slides.mkdir()
    (tmp_path / "masks").mkdir()
    for name, mpp in (("a", None), ("b", 0.5), ("c$d$", 0.5), ("e", 0.5)):
        write_tiff(slides / f"{name}.tiff", pink(1000, 1000), mpp)
        if name != "e":
            Image.fromarray(np.pad(np.full((30, 15), 255, np.uint8), ((0, 0), (0, 15)))).save(tmp_path / "masks" / f"{name}.png")
    data.write_csv(tmp_path / "m.csv", ("slide", "mpp"), [("a", "0.5"), ("b.tiff", "0.25"), ("gone", "0.5")])
    flags = ("--slides", slides, "--out", tmp_path / "d", "--manifest", tmp_path / "m.csv", "--mask", tmp_path / "masks")
    assert tile(monkeypatch, *flags) == 3
    out, err = capsys.readouterr()
    assert "a: 0.5 um/px (--manifest row a)" in out and "1 of 3 rows name no slide here, such as gone" in err
    assert "b: FAILED" in err and "--manifest row b.tiff says 0.25" in err and "e: FAILED" in err and "e.png" in err and "2 slides done, 2 failed" in out
    assert data.read_slide(tmp_path / "d/slides/a.safetensors").meta["settings"]["mask"] == data.hashlib.sha256((tmp_path / "masks/a.png").read_bytes()).hexdigest()
    assert sorted(p.name for p in (tmp_path / "d/qc").iterdir()) == ["a.png", "c$d$.png"]               # and no temporary files
    for name in ("a", "c$d$"):
        with Image.open(tmp_path / "d/qc" / f"{name}.png") as picture:
            assert max(picture.size) <= 2000 and len(picture.convert("RGB").getcolors(1 << 24)) > 1000
    assert tile(monkeypatch, *flags) == 3 and "a: done before" in capsys.readouterr().out
    Image.new("L", (30, 30), 255).save(tmp_path / "masks" / "a.png")
    assert tile(monkeypatch, *flags) == 3 and "a: FAILED" in (err := capsys.readouterr().err) and "give another --out" in err
    with pytest.raises(MixmagError, match="one file for 4 slides"):
        tile(monkeypatch, "--slides", slides, "--out", tmp_path / "d", "--mask", tmp_path / "masks" / "a.png")


def test_qc_shows_the_tiles_in_their_places(tmp_path, monkeypatch):
    """Each panel, put together from tiles, is the region itself at the panel's resolution."""
    from matplotlib.figure import Figure
    region = pink(2 * 896, 3 * 896)
    table, tiles = Geometry(1).cell_table().tolist(), np.empty((6, 21, 224, 224, 3), np.uint8)
    for cell in range(6):
        part = Image.fromarray(region).crop((left := cell % 3 * 896, top := cell // 3 * 896, left + 896, top + 896))
        for i, (k, r, c) in enumerate(table):
            tiles[cell, i] = np.asarray(part.reduce(2 ** (2 - k)))[224 * r:224 * (r + 1), 224 * c:224 * (c + 1)]
    monkeypatch.setattr(data, "read_window", lambda *_: tiles)
    figure = Figure()
    plan = type("Plan", (), {"cell_px": 896.0, "mpp": 0.5})
    data.draw_window(figure, figure.add_gridspec(2, 5), None, plan, (0, 0, 3, 2), (2, 1), [5, 10, 20])
    whole, cell = Image.fromarray(region), Image.fromarray(region).crop((1792, 896, 2688, 1792))
    for axis, picture in zip(figure.axes, [whole] * 3 + [cell] * 3, strict=True):
        shown = np.asarray(axis.images[0].get_array(), float)
        expected = np.asarray(picture.resize(shown.shape[1::-1], Image.Resampling.BOX), float)
        assert np.abs(shown - expected).max() <= 3 and axis.images[0].get_extent() == [0, picture.width / 2, picture.height / 2, 0]


def test_qc_says_when_its_region_cannot_be_read(real, tmp_path, monkeypatch):
    assert tile(monkeypatch, "--slides", real / "broken/cmu-midfile-zeroed.svs", "--out", tmp_path) == 3
    assert Image.open(tmp_path / "qc/cmu-midfile-zeroed.png").size[0] > 500


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
