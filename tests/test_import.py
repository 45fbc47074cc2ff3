"""Import of TRIDENT's and STAMP's files.     python -m pytest tests/test_import.py"""

import fcntl
import os
import shutil
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
from conftest import ROOT, Command, failures, run

import data
from data import MixmagError
from mixmag import Geometry

THREE = (5, 10, 20)


# ----------------------------------------------------------------------------- files of other tools
def random_features(count, dim=8, dtype=np.float32, name=""):
    rng = np.random.default_rng([count, *name.encode()])
    return rng.standard_normal((count, dim)).astype(dtype)


def trident_file(path, corners, magnification, side, features=None, layout=None, **changes):
    """What TRIDENT writes: chunks of one row, and attributes on both data sets."""
    corners = np.array(corners, np.int64).reshape(-1, 2)
    if features is None:
        features = random_features(len(corners), name=path.stem)
    attributes = {
        "patch_size": 224,
        "patch_size_level0": side,
        "level0_magnification": 40,
        "target_magnification": magnification,
        "overlap": 0,
        "name": path.stem,
        "savetodir": "/elsewhere",
        "level0_width": 30000,
        "level0_height": 20000,
        **changes,
    }
    encoder = attributes.pop("encoder", "virchow2")
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as f:
        for name, array in (("features", features), ("coords", corners)):
            rows = (1, *array.shape[1:])
            options = layout or {"maxshape": (None, *array.shape[1:]), "chunks": rows}
            f.create_dataset(name, data=array, **options)
        f["features"].attrs.update({"name": path.stem, "savetodir": "/elsewhere"})
        if encoder is not None:
            f["features"].attrs["encoder"] = encoder
        f["coords"].attrs.update({k: v for k, v in attributes.items() if v is not None})
    return features


def stamp_file(path, tile_um, mpp, cols, rows, seed=0, drop=0.2, **changes):
    """What STAMP writes: supertiles begin at whole slide pixels, rows are in any order."""
    rng = np.random.default_rng(seed)
    per = max(int(1024 * mpp // tile_um), 1)  # tiles along a supertile
    col, row = np.meshgrid(np.arange(cols), np.arange(rows))
    positions = np.stack([col.ravel(), row.ravel()], axis=1)
    positions = rng.permutation(positions[rng.random(len(positions)) > drop])
    supertile = positions // per * per
    step = np.ceil(tile_um / mpp) * mpp
    coords = (supertile * step + (positions - supertile) * tile_um).astype(np.float32)
    features = rng.standard_normal((len(positions), 8)).astype(np.float16)
    attributes = {
        "stamp_version": "2.3.0",
        "extractor": "virchow2",
        "unit": "um",
        "tile_size_um": tile_um,
        "tile_size_px": 224,
        "code_hash": "0",
        "feat_type": "tile",
        **changes,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as f:
        f["coords"] = attributes.pop("coords", coords)
        f["feats"] = features
        f.attrs.update({k: v for k, v in attributes.items() if v is not None})
    return positions, features


def grid(cols, rows, side):
    return [(col * side, row * side) for row in range(rows) for col in range(cols)]


def slide_of_three(folder, slide_id, cols=6, rows=3, changes=(), **common):
    """The folders of its 5x, 10x and 20x files, as TRIDENT's; changes {magnification: settings}."""
    folders = [folder / f"{m}x_224px_0px_overlap" / "features_virchow2" for m in THREE]
    for k, place in enumerate(folders):
        settings = {
            "corners": grid(cols * 2**k, rows * 2**k, 1792 >> k),
            "magnification": THREE[k],
            "side": 1792 >> k,
            **common,
            **dict(changes).get(THREE[k], {}),
        }
        trident_file(place / f"{slide_id}.h5", **settings)
    return folders


def three(folder, changes=(), **common):
    """The 5x, 10x and 20x files of a slide of 4 x 3 cells."""
    return [f / "s.h5" for f in slide_of_three(folder, "s", 4, 3, changes, **common)]


def import_files(folder, paths, tool="trident", **flags):
    """The slide, and what is said of it."""
    out = folder / "slides" / "s.safetensors"
    report = data.import_slide(paths, out, tool, **flags)
    assert data.verify(folder) == []
    return data.read_slide(out), report


# ------------------------------------------------------------------------------------ joining tiles
def by_hand(corners, features, sides, magnifications):
    """{(cell, entry): embedding} by definition: the cell and its entry that a corner is in."""
    entries = Geometry(1, magnifications).token_table().tolist()
    placed = {}
    for k, side in enumerate(sides):
        for (x, y), embedding in zip(corners[k], features[k], strict=True):
            cell = (x // sides[0], y // sides[0])
            inside = [k, (y - cell[1] * sides[0]) // side, (x - cell[0] * sides[0]) // side]
            placed[cell, entries.index(inside)] = embedding.astype(np.float16)
    return placed


def assert_holds(slide, placed):
    rows, entries = np.nonzero(slide.valid)
    found = {}
    for row, entry in zip(rows.tolist(), entries.tolist(), strict=True):
        found[tuple(slide.cells[row].tolist()), entry] = slide.features[row, entry]
    assert found.keys() == placed.keys()
    assert all(np.array_equal(found[place], placed[place]) for place in placed)
    assert not slide.features[~slide.valid].any()
    assert len(slide.cells) == len({cell for cell, _ in placed})


@pytest.mark.parametrize(
    "magnifications, cell, dtype, patch, layout",
    [
        (THREE, 1792, np.float32, 224, {"compression": "gzip"}),
        (THREE, 2048, np.float16, 256, None),
        ((10, 20), 448, np.float16, 224, None),
        ((20,), 448, np.float64, 224, None),
        ((2.5, 5, 10, 20), 3584, np.float32, 224, None),
    ],
)
def test_import_equals_placing_by_hand(tmp_path, magnifications, cell, dtype, patch, layout):
    rng = np.random.default_rng(0)
    sides = [cell >> k for k in range(len(magnifications))]
    paths, corners, features = [], [], []
    for k, side in enumerate(sides):
        places = rng.permutation(grid(5 * 2**k, 4 * 2**k, side))
        corners.append(places[rng.random(len(places)) < 0.6].tolist())
        paths.append(tmp_path / str(k) / "s.h5")
        some = random_features(len(corners[k]), dtype=dtype)
        features.append(some)
        trident_file(paths[k], corners[k], magnifications[k], side, some, layout, patch_size=patch)
    slide, report = import_files(tmp_path, paths)
    assert report.endswith(f", {len(features[-1])} tiles at {magnifications[-1]}x")
    assert_holds(slide, by_hand(corners, features, sides, magnifications))
    meta = slide.meta
    assert meta["mpp"] == pytest.approx(10 / magnifications[0] * patch / cell)
    assert repr(meta["magnifications"]) == repr(list(magnifications))  # 5, not 5.0
    assert (meta["cell_px"], meta["tile_px"]) == (cell, patch)
    assert meta["size_known"] and (meta["width"], meta["height"]) == (30000, 20000)


@pytest.mark.parametrize("mpp, given", [(0.25, None), (0.2525, None), (0.4991, 0.4991)])
def test_stamps_micrometres_are_snapped_to_the_lattice(tmp_path, mpp, given):
    """Each tile is in the place where it was cut, though STAMP's supertiles drift apart."""
    paths, corners, features = [], [], []
    for k in range(3):
        side = 448.0 / 2**k
        paths.append(tmp_path / str(k) / "a" / "s.h5")
        positions, some = stamp_file(paths[k], side, mpp, 9 * 2**k, 7 * 2**k, seed=k)
        corners.append((positions * (1792 >> k)).tolist())
        features.append(some)
    slide, _ = import_files(tmp_path, paths, "stamp", mpp=given)
    assert_holds(slide, by_hand(corners, features, [1792, 896, 448], THREE))
    meta = slide.meta
    assert meta["mpp"] == (given or 0.5)
    assert meta["cell_px"] * meta["mpp"] == pytest.approx(448)
    assert not meta["size_known"]


@pytest.mark.parametrize(
    "extractors, flag, name",
    [
        (("virchow2-dab38abe", "virchow2-0c1f23de"), None, "virchow2"),
        (("virchow2-dab38abe", "virchow2"), None, "virchow2"),
        (("uni", "uni2"), "mine", "mine"),
    ],
)
def test_stamps_hash_is_no_part_of_the_encoders_name(tmp_path, extractors, flag, name):
    """It is of STAMP's own code, and another in each version. --encoder goes before all names."""
    paths = [tmp_path / str(m) / "s.h5" for m in (5, 10)]
    for k, path in enumerate(paths):
        side = 448.0 / 2**k
        stamp_file(path, side, 0.25, 4 * 2**k, 3 * 2**k, drop=-1, extractor=extractors[k])
    slide, _ = import_files(tmp_path, paths, "stamp", encoder=flag)
    assert slide.meta["encoder"] == name and slide.valid.all()


@pytest.mark.parametrize("shape", [(0, 8), (0,)])  # TRIDENT wrote both
@pytest.mark.parametrize("empty", [(5, 10, 20), (5,), (10, 20)])
def test_empty_magnifications_are_invalid_tokens(tmp_path, empty, shape):
    nothing = {"corners": [], "features": np.zeros(shape, np.float32)}
    if len(empty) == 3 and shape == (0,):
        with pytest.raises(MixmagError, match="no tile, and no width"):
            import_files(tmp_path, three(tmp_path, dict.fromkeys(empty, nothing)))
        return
    slide, _ = import_files(tmp_path, three(tmp_path, dict.fromkeys(empty, nothing)))
    assert slide.features.shape == (0 if len(empty) == 3 else 12, 21, 8)
    for k, m in enumerate(THREE):
        assert (slide.valid[:, data.magnification_entries(k)] == (m not in empty)).all()


@pytest.mark.parametrize("encoder, width", [("virchow2", 1280), ("other", 2560)])
def test_of_virchow2_the_class_token_is_kept(tmp_path, encoder, width):
    corners = grid(4, 3, 1792)
    path = tmp_path / "5" / "s.h5"
    wide = trident_file(path, corners, 5, 1792, random_features(12, 2560), encoder=encoder)
    slide, _ = import_files(tmp_path, [path])
    assert_holds(slide, by_hand([corners], [wide[:, :width]], [1792], (5,)))


@pytest.mark.parametrize("power, tiles", [(39.99, 1), (39.99, 0), (40.005, 1), (35, 1)])
def test_trident_states_a_floored_side(tmp_path, power, tiles):
    """A scan at 39.99x is cut at round(447.888) = 448 px; the attribute says 447. Also where a
    magnification has no tile that could tell."""
    paths = [tmp_path / str(m) / "s.h5" for m in THREE]
    for k, magnification in enumerate(THREE):
        side = 224 * power / magnification
        corners = grid(4 * 2**k, 3 * 2**k, round(side))
        some = len(corners) if k else len(corners) * tiles
        trident_file(paths[k], corners[:some], magnification, side // 1)
    slide, _ = import_files(tmp_path, paths)
    assert slide.meta["cell_px"] == round(224 * power / 5) and len(slide.cells) == 12
    assert slide.meta["mpp"] == pytest.approx(10 / power, rel=1e-3)
    assert slide.valid[:, 0].all() == tiles and slide.valid[:, 1:].all()


def test_import_says_where_mpp_and_encoder_are_from(tmp_path):
    """--encoder names what the files do not. A second time, other settings are refused."""
    paths = three(tmp_path, encoder=None)
    flags = {"mpp": 0.2525, "encoder": "virchow2"}
    slide, _ = import_files(tmp_path, paths, **flags)
    found = [slide.meta[k] for k in ("mpp", "mpp_source", "cell_px", "encoder")]
    assert found == [0.2525, data.GIVEN, 1792.0, "virchow2"]
    assert import_files(tmp_path, paths, **flags)[1] == "s: done before"
    assert import_files(tmp_path, paths)[1] == "s: done before"  # all was said the first time
    for other in ({"mpp": 0.26}, {"encoder": "uni"}):
        with pytest.raises(MixmagError, match="give another --out"):
            import_files(tmp_path, paths, **other)
    trident_file(paths[0], grid(4, 3, 1792), 5, 1792, np.ones((12, 8)), encoder=None)
    with pytest.raises(MixmagError, match="give another --out"):
        import_files(tmp_path, paths, **flags)


# --------------------------------------------------------------------------------------- refusals
def moved(x, y):
    """The corners at 10x, the sixth of them moved."""
    corners = grid(8, 6, 896)
    corners[5] = (corners[5][0] + x, corners[5][1] + y)
    return corners


@pytest.mark.parametrize(
    "changes, flags, message",
    [
        ({10: {"corners": moved(1, 0)}}, {}, "off the lattice of 896: 1 of 48 tiles at 10x"),
        ({10: {"corners": moved(-896 * 6, 0)}}, {}, ": 1 of 48 tiles at 10x"),
        ({10: {"corners": moved(896, 0)}}, {}, "some tiles stand where another does"),
        ({20: {"corners": grid(16, 12, 416)}}, {}, "off the lattice of 448: .* at 20x"),
        ({20: {"patch_size_level0": 446}}, {}, "found 5x 1792 .*, 10x 896 .*, 20x 446"),
        ({20: {"magnification": 40}}, {}, "expected doublings .*, 40x 448"),
        ({20: {"level0_width": 29000}}, {}, r"one slide.*30000, 20000.*448 \(29000, 20000"),
        ({20: {"encoder": "uni_v2"}}, {}, "one --encoder, found .* virchow2, 20x .* uni_v2"),
        ({20: {"features": random_features(192, 9)}}, {}, "shape mismatch"),
        ({20: {"features": random_features(191)}}, {}, "shape mismatch"),
        ({20: {"patch_size_level0": None}}, {}, "20x_.*s.h5: .*patch_size_level0"),
        ({20: {"target_magnification": "x"}}, {}, "20x_.*s.h5: could not convert"),
        ({20: {"features": np.full((192, 8), 7e4)}}, {}, "infinite or zero: 192 of 192 tiles"),
        ({5: {"features": np.eye(12)[:, :11]}}, {}, "5x_.*s.h5: .*zero: 1 of 12 tiles"),
        ({5: {"features": np.full((12, 8), np.nan)}}, {}, "NaN, .*: 12 of 12 tiles"),
        ({5: {"features": np.ones((12, 8, 1))}}, {}, "shape mismatch"),
        ({}, {"mpp": 0.31}, "--mpp.* says 0.31, its tiles say 0.25"),
        ({m: {"encoder": None} for m in THREE}, {}, "name no encoder; .*--encoder"),
    ],
)
def test_what_does_not_match_is_refused_by_name(tmp_path, changes, flags, message):
    with pytest.raises((MixmagError, ValueError), match=message):
        import_files(tmp_path, three(tmp_path, changes), **flags)
    assert not (tmp_path / "slides").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tile_size_um": None}, "tile_size_um"),
        ({"tile_size_px": 0}, "doublings"),
        ({"extractor": "uni"}, "by one --encoder, found 5x .* virchow2, 10x .* uni"),
        ({"tile_size_um": 300.0}, "doublings"),
        ({"coords": np.array(grid(6, 5, 224.0)) + [0, 70]}, "of 224: 30 of 30 tiles at 10x"),
        ({"coords": np.full((30, 2), np.nan)}, "off the lattice of 224: 30 of 30 tiles at 10x"),
    ],
)
def test_stamp_files_that_do_not_fit_are_refused(tmp_path, changes, message):
    paths = [tmp_path / str(m) / "s.h5" for m in (5, 10)]
    stamp_file(paths[0], 448.0, 0.25, 4, 3)
    stamp_file(paths[1], 224.0, 0.25, 6, 5, drop=-1, **changes)
    with pytest.raises(MixmagError, match=message):
        import_files(tmp_path, paths, "stamp")


@pytest.mark.parametrize(
    "target, message",
    [
        ("/features", "too many links"),
        ("/", "Accessing a group"),
        ("absent", "doesn't exist"),
        ("2^60 rows", "claim [0-9]{20} bytes that it does not hold"),
    ],
)
def test_hostile_hdf5_is_refused_unread(tmp_path, target, message, monkeypatch):
    """The data set is a link to this target, not there, or of a size that no file holds."""
    paths = three(tmp_path)
    with h5py.File(paths[0], "a") as f:
        del f["features"]
        if target.startswith("/"):
            f["features"] = h5py.SoftLink(target)
        elif target == "2^60 rows":
            f.create_dataset("features", (2**60, 8), np.float32, chunks=(1, 8))
    monkeypatch.setattr(h5py.Dataset, "__getitem__", lambda *_: pytest.fail("read"))
    with pytest.raises(MixmagError, match=message):
        import_files(tmp_path, paths)


def test_folders_that_cannot_be_meant(tmp_path):
    for place in ("p/x.h5", "q/x.h5"):
        (tmp_path / place).parent.mkdir(parents=True)
        (tmp_path / place).touch()
    (tmp_path / "empty").mkdir()
    flags = ("--trident", tmp_path / "p", "empty", "gone", "--out", "d")
    _, err = run("data.py import", *flags, cwd=tmp_path, code=1)
    assert "no feature files (*.h5) in one of" in err
    with pytest.raises(MixmagError, match="two files of one slide"):
        data.files_by_id(tmp_path.glob("**/*.h5"))
    for flags in ((), ("--trident", "p", "--stamp", "q")):
        run("data.py", "import", *flags, "--out", "d", cwd=tmp_path, code=2)


# ------------------------------------------------------------------------------------- the command
def test_import_takes_each_slides_own_mpp(tmp_path):
    """A cohort of 40x and 20x scans, imported by STAMP, has its pixels from the manifest."""
    for slide_id, mpp in (("a", 0.25), ("b.1", 0.5), ("c", 0.25)):
        for m in (5, 10):
            stamp_file(tmp_path / str(m) / f"{slide_id}.h5", 2240 / m, mpp, m, m, drop=-1)
    (tmp_path / "m.csv").write_text("slide,mpp\na.svs,0.2528\nb.1,0.4991\nz.svs,0.25\n")
    args = ("import", "--stamp", 5, 10, "--out", "d", "--mpp", 0.25, "--manifest", "m.csv")
    out, err = run("data.py", *args, cwd=tmp_path)
    assert "no slide here for 1 of its rows, such as z" in err
    slides = data.read_slides(tmp_path / "d")
    mpps = {"a": 0.2528, "b.1": 0.4991, "c": 0.25}
    assert {slide.slide_id: slide.meta["mpp"] for slide in slides} == mpps
    for slide_id, mpp in mpps.items():
        assert f"{slide_id}: {mpp} um/px ({data.GIVEN}), " in out
    for slide in slides:
        assert slide.meta["cell_px"] == pytest.approx(448 / slide.meta["mpp"])


def test_an_imported_cohort_trains(tmp_path):
    """Good slides, one at one magnification, one cut short: the good ones are trained on. Also
    where another process holds a lock on a file, or the disk knows none."""
    for slide_id in ("a", "b", "cut", "lone"):
        folders = slide_of_three(tmp_path, slide_id)
    for folder in folders[1:]:
        (folder / "lone.h5").unlink()
    os.truncate(folders[1] / "cut.h5", 5000)
    args = ("import", "--trident", *folders, "--out", tmp_path / "d")
    with open(folders[1] / "a.h5") as locked:
        fcntl.flock(locked, fcntl.LOCK_EX)
        out, err = run("data.py", *args, cwd=tmp_path, code=3)
    counts = "18 cells, 18 tiles at 5x, 72 tiles at 10x, 288 tiles at 20x"
    assert f"a: 0.25 um/px (nominal), {counts}\n" in out
    assert "2 slides imported, 2 failed" in out
    assert "cut: FAILED: " in err and "lone: FAILED: FileNotFoundError" in err
    failed = failures(tmp_path / "d" / "failed.csv")
    assert failed.keys() == {"cut", "lone"} and "truncated" in failed["cut"]
    assert data.verify(tmp_path / "d") == []
    flags = ("--out", tmp_path / "r", "--steps", 2, "--batch-size", 2, "--holdout", 0)
    run("train.py", "pretrain", "--data", tmp_path / "d", *flags, cwd=tmp_path)
    for folder in folders:
        (folder / "lone.h5").unlink(missing_ok=True)
        (folder / "cut.h5").unlink()
    out, _ = run("data.py", *args, cwd=tmp_path)
    assert out.count("done before") == 2 and not (tmp_path / "d" / "failed.csv").exists()
    _, err = run("data.py", *args, "--encoder", "uni", cwd=tmp_path, code=1)
    assert "encoder 'virchow2' there, 'uni' now; give another --out" in err
    assert "sources" not in err
    assert not (tmp_path / "d" / "failed.csv").exists()


def test_a_killed_import_goes_on(tmp_path):
    for i in range(30):
        folders = slide_of_three(tmp_path, f"s{i}")
    args = ("data.py", "import", "--trident", *folders, "--out", tmp_path / "d")
    killed = Command(*args, cwd=tmp_path)
    while len(list(tmp_path.glob("d/slides/s*"))) < 3:
        time.sleep(0.01)
    killed.process.kill()
    assert killed.end()[0] == -9
    before = len(list(tmp_path.glob("d/slides/s*")))
    out, _ = run(*args, cwd=tmp_path)
    finished = out.count("done before") - before  # the killed command's own process may end a slide
    assert finished in (0, 1) and before < 29
    assert "30 slides imported, 0 failed" in out and data.verify(tmp_path / "d") == []


IMPORT_SCRIPT = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import data
read = data.read_feature_file
def damaged(path, tool):
    if "crash" in path.name:
        os.abort()
    while "hang" in path.name:
        pass
    return read(path, tool)
data.read_feature_file = damaged
data.IMPORT_SECONDS = 5
if __name__ == "__main__":
    sys.exit(data.main())
"""


def test_a_file_that_brings_the_reader_down_costs_its_slide(tmp_path):
    for slide_id in ("a", "crash", "hang", "z"):
        folders = slide_of_three(tmp_path, slide_id)
    (tmp_path / "script.py").write_text(IMPORT_SCRIPT)
    command = [sys.executable, tmp_path / "script.py", "import", "--trident", *folders]
    done = subprocess.run([*command, "--out", tmp_path / "d"], capture_output=True, text=True)
    assert done.returncode == 3 and "Traceback" not in done.stderr, done.stderr
    failed = failures(tmp_path / "d" / "failed.csv")
    assert failed.keys() == {"crash", "hang"}
    assert all("bring the HDF5 library down" in reason for reason in failed.values())
    assert data.slide_files(tmp_path / "d").keys() == {"a", "z"}
    assert data.verify(tmp_path / "d") == []


def test_mutated_hdf5_is_refused_or_read_as_it_is(tmp_path):
    """100 slides with random bytes changed in a file, or its end cut off. What is imported differs
    from the clean slide in single numbers (damaged embeddings) or places (damaged coordinates)."""
    rng = np.random.default_rng(0)
    folders = slide_of_three(tmp_path, "clean")
    for i in range(100):
        for folder in folders:
            shutil.copy(folder / "clean.h5", folder / f"s{i}.h5")
        path = folders[i % 3] / f"s{i}.h5"
        raw = bytearray(path.read_bytes())
        for at in rng.integers(len(raw), size=(1, 1, 4, 16)[i % 4]):
            raw[at] = rng.integers(256)
        if i % 10 == 0:
            raw = raw[: rng.integers(len(raw))]
        path.write_bytes(raw)
    run("data.py import --trident", *folders, "--out", "d", cwd=tmp_path, code=3)
    assert all("one slide under several ids" in line for line in data.verify(tmp_path / "d"))
    slides = {slide.slide_id: slide for slide in data.read_slides(tmp_path / "d")}
    failed = failures(tmp_path / "d" / "failed.csv")
    assert len(slides) + len(failed) == 101 and 20 < len(slides) < 90 and all(failed.values())
    clean = slides.pop("clean")
    for slide_id, slide in slides.items():
        k = int(slide_id[1:]) % 3
        with h5py.File(folders[k] / f"{slide_id}.h5") as f:
            places = sorted(map(tuple, f["coords"][...].tolist()))
        if places != sorted(grid(6 * 2**k, 3 * 2**k, 1792 >> k)):
            continue
        assert np.array_equal(slide.cells, clean.cells)
        assert np.array_equal(slide.valid, clean.valid)
        assert (slide.features == clean.features).any(axis=-1).all()
        assert (slide.features != clean.features).sum() <= 16
