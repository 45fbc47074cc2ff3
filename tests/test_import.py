"""Import of TRIDENT's and STAMP's files.     python -m pytest tests/test_import.py"""

import csv
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, run

import data
from data import MixmagError
from mixmag import Geometry


class Trap:
    """A pickle that would leave a file behind where it was loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


# --------------------------------------------------------------------------------------------------- import of other tools' files
def trident_file(
    path,
    corners,
    magnification,
    side,
    features=None,
    dim=8,
    power=40,
    dtype=np.float32,
    layout=None,
    **changes,
):
    """What TRIDENT writes of one slide at one magnification, by the description of its layout: chunks of one row, attributes on both data sets."""
    import h5py

    corners = np.array(corners, np.int64).reshape(-1, 2)
    if features is None:
        features = (
            np.random.default_rng(len(corners)).standard_normal((len(corners), dim)).astype(dtype)
        )
    attributes = {
        "patch_size": 224,
        "patch_size_level0": side,
        "level0_magnification": power,
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
            f.create_dataset(
                name,
                data=array,
                **(
                    {"maxshape": (None, *array.shape[1:]), "chunks": (1, *array.shape[1:])}
                    if layout is None
                    else layout
                ),
            )
        f["features"].attrs.update(
            {
                "name": path.stem,
                "savetodir": "/elsewhere",
                **({"encoder": encoder} if encoder else {}),
            }
        )
        f["coords"].attrs.update({k: v for k, v in attributes.items() if v is not None})
    return features


def grid(cols, rows, side, kept=lambda col, row: True):
    return [
        (col * side, row * side) for row in range(rows) for col in range(cols) if kept(col, row)
    ]


def job(folder, *paths, tool="trident", **changes):
    return {
        "slide_id": "s",
        "paths": [str(p) for p in paths],
        "out": str(folder / "slides" / "s.safetensors"),
        "tool": tool,
        "mpp": (None, "--mpp"),
        "encoder": None,
        "class_token": None,
        **changes,
    }


def by_hand(corners, features, sides, magnifications):
    """{cell: {entry: embedding}} by the definition: which cell's box and which of its 4^k boxes a tile's corner is the corner of."""
    at = {
        tuple(place): i for i, place in enumerate(Geometry(1, magnifications).cell_table().tolist())
    }
    cells = {}
    for k, (side, places, rows) in enumerate(zip(sides, corners, features)):
        for (x, y), row in zip(places, rows):
            col, line = x // sides[0], y // sides[0]
            cells.setdefault((col, line), {})[
                at[k, (y - line * sides[0]) // side, (x - col * sides[0]) // side]
            ] = row
    return cells


@pytest.mark.parametrize(
    "magnifications, cell, dtype, patch",
    [
        ((5, 10, 20), 1792, np.float32, 224),
        ((5, 10, 20), 2048, np.float16, 256),
        ((10, 20), 448, np.float16, 224),
        ((20,), 448, np.float64, 224),
        ((5, 10, 20, 40), 3584, np.float32, 224),
    ],
)
def test_import_equals_placing_by_hand(tmp_path, magnifications, cell, dtype, patch):
    rng, power = np.random.default_rng(0), cell * magnifications[0] // patch
    sides = [cell >> k for k in range(len(magnifications))]
    corners = [
        rng.permutation([c for c in grid(5 * 2**k, 4 * 2**k, side) if rng.random() < 0.6])
        for k, side in enumerate(sides)
    ]
    paths = [tmp_path / str(m) / "s.h5" for m in magnifications]
    features = [
        trident_file(path, c, m, side, power=power, dtype=dtype, patch_size=patch)
        for path, c, m, side in zip(paths, corners, magnifications, sides)
    ]
    assert data.import_slide(job(tmp_path, *paths)) == "imported" and data.verify(tmp_path) == []
    slide, expected = (
        data.read_slide(tmp_path / "slides" / "s.safetensors"),
        by_hand(corners, features, sides, magnifications),
    )
    assert sorted(map(tuple, slide.cells.tolist())) == sorted(expected)
    for cell_at, row, valid in zip(slide.cells.tolist(), slide.features, slide.valid):
        held = expected[tuple(cell_at)]
        assert set(np.flatnonzero(valid)) == set(held) and not row[~valid].any()
        assert all(
            np.array_equal(row[entry], vector.astype(np.float16)) for entry, vector in held.items()
        )
    assert (
        slide.meta["mpp"] == pytest.approx(10 / power)
        and slide.meta["cell_px"] == cell
        and slide.meta["magnifications"] == list(magnifications)
    )
    assert (
        slide.meta["encoder"],
        slide.meta["tile_px"],
        slide.meta["width"],
        slide.meta["n_bad"],
    ) == ("virchow2", patch, 30000, 0)
    row = dict(zip(data.IMPORT_COLUMNS[3:], data.import_row(slide, 1)))
    tables = [
        {
            (k, r + c[1] * 2**k, q + c[0] * 2**k)
            for k, r, q in Geometry(1, magnifications).cell_table()[list(held)].tolist()
        }
        for c, held in expected.items()
    ]
    there = set().union(*tables)
    alone = sum(k > 0 and (k - 1, r // 2, c // 2) not in there for k, r, c in there)
    gaps = sum(
        (k + 1, 2 * r + i, 2 * c + j) not in there
        for k, r, c in there
        if k + 1 < len(magnifications)
        for i in (0, 1)
        for j in (0, 1)
    )
    assert (row["without_parent"], row["missing_children"]) == (alone, gaps) and row[
        "tiles"
    ] == " ".join(str(len(c)) for c in corners)


def three(folder, changes=(), **common):
    """5x, 10x and 20x files of one 4 x 3 cell slide; changes {magnification: settings}."""
    paths = []
    for k, m in enumerate((5, 10, 20)):
        settings = {
            "corners": grid(4 * 2**k, 3 * 2**k, 1792 >> k),
            "magnification": m,
            "side": 1792 >> k,
            **common,
            **dict(changes).get(m, {}),
        }
        paths.append(folder / f"{m}x" / "s.h5")
        trident_file(paths[-1], **settings)
    return paths


def off(column, row, where):
    return [
        (x + column, y + row) if i == where else (x, y) for i, (x, y) in enumerate(grid(8, 6, 896))
    ]


@pytest.mark.parametrize(
    "changes, settings, message",
    [
        ({10: {"corners": off(1, 0, 5)}}, {}, "10x: 1 of 48 tiles are off the lattice of 896"),
        ({10: {"corners": off(896, 0, 5)}}, {}, "10x: 1 of 48 tiles stand where another one does"),
        ({10: {"corners": off(0, 40 * 896, 5)}}, {}, "begin beyond its 30000 x 20000 px"),
        ({20: {"corners": off(-896, 0, 0)}}, {}, "off the lattice"),
        ({20: {"corners": grid(8, 6, 896)}}, {}, "20x: the 48 tiles are 2 x 448 apart"),
        ({20: {"corners": grid(8, 6, 224)}}, {}, "20x: 36 of 48 tiles are off the lattice of 448"),
        (
            {20: {"side": 896, "power": None}},
            {},
            "1792 px at 5x, 896 px at 10x, 896 px at 20x; expected each half",
        ),
        ({20: {"side": 896}}, {}, "patch_size_level0 is 896, but 224 px at 20x of 40x are 448"),
        ({20: {"magnification": 40, "power": 80}}, {}, "5x, 10x, 40x; expected doublings"),
        (
            {20: {"patch_size": 256, "power": 35}},
            {},
            "do not agree on the patch size: 224, 224, 256",
        ),
        ({20: {"overlap": 32}}, {}, "overlap is 32"),
        ({20: {"name": "other"}}, {}, "slide's name: s, s, other"),
        ({5: {"encoder": "virchow2\x1b[2J"}}, {}, r"encoder is 'virchow2\\x1b\[2J'"),
        ({20: {"level0_width": 29000}}, {}, "slide's size"),
        ({20: {"encoder": "uni_v2"}}, {}, "encoder: virchow2, virchow2, uni_v2"),
        ({20: {"dim": 9}}, {}, "width of an embedding: 8, 8, 9"),
        (
            {20: {"patch_size_level0": None}},
            {},
            "attribute patch_size_level0 is None, expected a number",
        ),
        ({20: {"target_magnification": "20"}}, {}, "is '20', expected a number"),
        ({20: {"patch_size": [224, 224]}}, {}, "'an array'"),
        ({20: {"level0_magnification": float("nan")}}, {}, "is nan"),
        (
            {20: {"features": np.full((192, 8), 7e4, np.float32)}},
            {},
            "beyond float16.* in 192 of 192",
        ),
        ({20: {"features": np.ones((191, 8), np.float16)}}, {}, "191 embeddings at 192"),
        (
            {5: {"features": np.array([[1.0] * 8, [1.0] * 7 + [np.nan]] * 6, np.float16)}},
            {},
            "5x/s.h5: NaN.* in 6 of 12 tiles, first in row 1",
        ),
        (
            {5: {"features": np.eye(12, dtype=np.float32)[:, :11]}},
            {},
            "nothing but zeros in 1 of 12 tiles, first in row 11",
        ),
        ({5: {"features": np.ones((12, 8), np.int64)}}, {}, "features is int64"),
        ({5: {"features": np.ones((12, 8, 1), np.float32)}}, {}, "features is float32"),
        (
            {},
            {"mpp": (0.31, "--mpp")},
            "--mpp says 0.31, but tiles of 1792 px at 5x were cut as if it were 0.25",
        ),
        ({}, {"encoder": "uni_v2"}, "'virchow2', --encoder says 'uni_v2'"),
        ({m: {"encoder": None} for m in (5, 10, 20)}, {}, "say it with --encoder"),
        ({}, {"class_token": True}, "holds 8 numbers .*--class-token cuts 2560"),
    ],
)
def test_what_does_not_match_is_refused_by_name(tmp_path, changes, settings, message):
    with pytest.raises(MixmagError, match=message):
        data.import_slide(job(tmp_path, *three(tmp_path, changes), **settings))
    assert not (tmp_path / "slides").exists()


def test_a_text_that_is_no_utf8_can_still_be_reported(tmp_path):
    paths = three(tmp_path, {20: {"name": "s\xe9"}})
    paths[2].write_bytes(paths[2].read_bytes().replace("s\xe9".encode(), b"s\xc3\xff"))
    with pytest.raises(MixmagError, match="attribute name is") as error:
        data.import_slide(job(tmp_path, *paths))
    assert str(error.value).encode("utf-8").isascii()


def test_folders_in_the_wrong_order_are_refused(tmp_path):
    with pytest.raises(MixmagError, match="20x, 10x, 5x; expected doublings"):
        data.import_slide(job(tmp_path, *three(tmp_path)[::-1]))


def test_import_says_where_mpp_and_encoder_are_from(tmp_path):
    """--mpp within 2 % of the nominal one is taken; --encoder names what the files do not; the second time nothing is done, or refused."""
    asked = job(tmp_path, *three(tmp_path, encoder=None), mpp=(0.2525, "--mpp"), encoder="virchow2")
    assert data.import_slide(asked) == "imported" and data.import_slide(asked) == "done before"
    meta = data.read_slide(asked["out"]).meta
    assert (meta["mpp"], meta["mpp_source"], meta["cell_px"], meta["encoder"]) == (
        0.2525,
        "--mpp",
        1792.0,
        "virchow2",
    )
    with pytest.raises(MixmagError, match="give another --out"):
        data.import_slide({**asked, "mpp": (0.26, "--mpp")})
    assert (
        data.import_slide({**asked, "mpp": (None, "--mpp"), "encoder": None}) == "done before"
    )  # whatever made it was said the first time
    three(tmp_path, {20: {"features": np.ones((192, 8), np.float32)}}, encoder=None)
    with pytest.raises(MixmagError, match="give another --out"):
        data.import_slide(asked)


@pytest.mark.parametrize("power", [39.99, 40.005, 35])
def test_floored_sides_are_settled_by_the_coordinates(tmp_path, power):
    """A scan at 39.99x is cut at round(447.888) = 448 px, and the attribute says 447; at 35x everything divides."""
    sides = [round(224 * power / m) for m in (5, 10, 20)]
    paths = three(
        tmp_path,
        {
            m: {"corners": grid(4 * 2**k, 3 * 2**k, side), "side": 224 * power // m, "power": power}
            for k, (m, side) in enumerate(zip((5, 10, 20), sides))
        },
    )
    data.import_slide(job(tmp_path, *paths))
    slide = data.read_slide(tmp_path / "slides" / "s.safetensors")
    assert slide.meta["cell_px"] == sides[0] and slide.valid.all() and len(slide.cells) == 12
    assert slide.meta["mpp"] == pytest.approx(10 / power, rel=1e-3)


def test_a_scan_whose_magnifications_drift_apart_is_refused(tmp_path):
    paths = three(
        tmp_path,
        {
            m: {
                "corners": grid(4 * 2**k, 3 * 2**k, round(224 * 33 / m)),
                "side": 224 * 33 // m,
                "power": 33,
            }
            for k, m in enumerate((5, 10, 20))
        },
    )
    with pytest.raises(MixmagError, match="1478 px at 5x, 739 px at 10x, 369 px at 20x"):
        data.import_slide(job(tmp_path, *paths))


@pytest.mark.parametrize(
    "encoder, asked, width",
    [
        ("virchow2", None, 1280),
        ("virchow2", False, 2560),
        ("other", True, 1280),
        ("other", False, 2560),
        ("other", None, None),
    ],
)
def test_2560_numbers_are_cut_by_rule_only(tmp_path, encoder, asked, width):
    wide = np.random.default_rng(0).standard_normal((12, 2560)).astype(np.float32)
    paths = three(tmp_path, {5: {"features": wide}}, dim=2560, encoder=encoder)
    if width is None:
        with pytest.raises(
            MixmagError,
            match="2560 numbers .*--class-token keeps the first 1280.*--no-class-token all",
        ):
            data.import_slide(job(tmp_path, *paths, class_token=asked))
    else:
        data.import_slide(job(tmp_path, *paths, class_token=asked))
        assert np.array_equal(
            data.read_slide(tmp_path / "slides" / "s.safetensors").features[:, 0],
            wide[:, :width].astype(np.float16),
        )


@pytest.mark.parametrize("empty", [(5, 10, 20), (5,), (10, 20)])
def test_empty_magnifications_are_invalid_tokens(tmp_path, empty):
    paths = three(
        tmp_path, {m: {"corners": [], "features": np.zeros((0, 8), np.float32)} for m in empty}
    )
    data.import_slide(job(tmp_path, *paths))
    slide, starts = (
        data.read_slide(tmp_path / "slides" / "s.safetensors"),
        {5: slice(0, 1), 10: slice(1, 5), 20: slice(5, 21)},
    )
    assert (
        slide.features.shape == (0 if len(empty) == 3 else 12, 21, 8)
        and data.verify(tmp_path) == []
    )
    assert all(slide.valid[:, starts[m]].any() != (m in empty) for m in starts if len(empty) < 3)


def stamp_file(path, tile_um, mpp, cols, rows, seed=0, drop=0.2, **changes):
    """STAMP's walk over a slide: supertiles of a whole number of tiles, each rounded up to whole slide pixels; then its file, rows in any order."""
    import h5py

    rng, step = np.random.default_rng(seed), int(np.ceil(tile_um / mpp))
    per = max(int(1024 * mpp // tile_um), 1)  # tiles along a supertile
    places = [
        (sx, sy, x, y)
        for sy in range(0, rows, per)
        for sx in range(0, cols, per)
        for y in range(per)
        for x in range(per)
        if sx + x < cols and sy + y < rows and rng.random() > drop
    ]
    places = np.array(places)[rng.permutation(len(places))]
    coords = (places[:, :2] * step * mpp + places[:, 2:] * tile_um).astype(np.float32)
    feats = rng.standard_normal((len(places), 8)).astype(np.float16)
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as f:
        f["coords"], f["feats"] = changes.pop("coords", coords), feats
        f.attrs.update(
            {
                k: v
                for k, v in {
                    "stamp_version": "2.3.0",
                    "extractor": "virchow2",
                    "unit": "um",
                    "tile_size_um": tile_um,
                    "tile_size_px": 224,
                    "code_hash": "0",
                    "feat_type": "tile",
                    **changes,
                }.items()
                if v is not None
            }
        )
    return places[:, :2] + places[:, 2:], feats


@pytest.mark.parametrize("mpp, given", [(0.25, None), (0.2525, None), (0.4991, 0.4991)])
def test_stamps_micrometres_are_snapped_to_the_lattice(tmp_path, mpp, given):
    """Each tile in the place that it was cut at, though STAMP's supertiles drift; pixels are of --mpp, else of the finest magnification."""
    paths, made = [tmp_path / str(m) / "a" / "s.h5" for m in (5, 10, 20)], []
    for k, path in enumerate(paths):
        made.append(stamp_file(path, 448.0 / 2**k, mpp, 9 * 2**k, 7 * 2**k, seed=k))
    data.import_slide(job(tmp_path, *paths, tool="stamp", mpp=(given, "--mpp")))
    slide = data.read_slide(tmp_path / "slides" / "s.safetensors")
    assert (
        slide.meta["mpp"] == (given or 0.5)
        and slide.meta["cell_px"] * slide.meta["mpp"] == pytest.approx(448)
        and data.verify(tmp_path) == []
    )
    expected = by_hand(
        [p * 1792 // 2**k for k, (p, _) in enumerate(made)],
        [f for _, f in made],
        [1792, 896, 448],
        (5, 10, 20),
    )
    found = {
        tuple(cell): {e: row[e] for e in np.flatnonzero(valid)}
        for cell, row, valid in zip(slide.cells.tolist(), slide.features, slide.valid)
    }
    assert found.keys() == expected.keys()
    assert all(
        found[c].keys() == expected[c].keys()
        and all(np.array_equal(found[c][e], v) for e, v in expected[c].items())
        for c in expected
    )
    drift = max(
        abs((int(np.ceil(448 / 2**k / mpp)) * mpp - 448 / 2**k) * p.max())
        for k, (p, _) in enumerate(made)
    )
    assert slide.meta["residual_um"] <= drift + 0.1 and (slide.meta["residual_um"] < 0.01) == (
        mpp == 0.25
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"unit": None}, "unit is None"),
        ({"unit": "px"}, "unit is 'px'"),
        ({"feat_type": "slide"}, "feat_type 'slide'"),
        ({"tile_size_um": None}, "tile_size_um is None"),
        ({"tile_size_px": 0}, "tile_size_px is 0"),
        ({"extractor": "uni"}, "do not agree on the encoder"),
        ({"tile_size_um": 300.0}, "doublings"),
        ({"coords": np.array([[100.0, 0], [224, 0]], np.float32)}, "20 embeddings|embeddings at 2"),
        ({"coords": np.full((26, 2), np.nan)}, "finite"),
    ],
)
def test_stamp_files_that_do_not_say_or_do_not_fit_are_refused(tmp_path, changes, message):
    paths = [tmp_path / str(m) / "s.h5" for m in (5, 10)]
    stamp_file(paths[0], 448.0, 0.25, 4, 3)
    stamp_file(paths[1], 224.0, 0.25, 6, 5, drop=-1, **changes)
    with pytest.raises(MixmagError, match=message):
        data.import_slide(job(tmp_path, *paths, tool="stamp"))


def test_stamp_tiles_between_two_places_are_refused(tmp_path):
    coords = np.array(grid(4, 3, 448.0), np.float32)
    stamp_file(
        tmp_path / "s.h5",
        448.0,
        0.25,
        4,
        3,
        drop=-1,
        coords=coords + [0, 0.3 * 448] * (np.arange(12) == 7)[:, None],
    )
    with pytest.raises(MixmagError, match="5x: 1 of 12 tiles are off the lattice"):
        data.import_slide(job(tmp_path, tmp_path / "s.h5", tool="stamp"))


def hostile(f, kind, folder):
    """Make the data set `features` of an open file something that must not be read."""
    import h5py

    del f["features"]
    if kind == "external link":
        f["features"] = h5py.ExternalLink(str(folder / "elsewhere.h5"), "features")
    elif kind == "soft link loop":
        f["features"], f["again"] = h5py.SoftLink("/again"), h5py.SoftLink("/features")
    elif kind == "group":
        f.create_group("features")
    elif kind == "absent":
        f["\x1b[2J"] = 1
    elif kind == "objects":
        f.create_dataset("features", (12, 8), dtype=h5py.vlen_dtype(np.float32))
    elif kind == "references":
        f.create_dataset("features", (12, 8), dtype=h5py.ref_dtype)
    elif kind == "compound":
        f.create_dataset("features", (12, 8), dtype=[("a", "f4")])
    elif kind == "2^60 rows":
        f.create_dataset("features", (2**60, 8), np.float32, chunks=(1, 8))
    elif kind == "2^58 columns":
        f.create_dataset("features", (12, 2**58), np.float16, chunks=(1, 8))
    elif kind == "never written":
        f.create_dataset("features", (12, 8), np.float32)
    elif kind == "half written":
        f.create_dataset("features", (12, 8), np.float32, chunks=(1, 8))[:6] = 1
    elif kind == "gzip":
        f.create_dataset("features", data=np.ones((12, 8), np.float32), compression="gzip")
    elif kind == "scale-offset":
        f.create_dataset(
            "features", data=np.ones((12, 8), np.float32), scaleoffset=2, chunks=(1, 8)
        )
    elif kind == "external file":
        np.ones((12, 8), np.float32).tofile(folder / "raw")
        f.create_dataset(
            "features", (12, 8), np.float32, external=[(str(folder / "raw"), 0, h5py.h5f.UNLIMITED)]
        )
    elif kind == "virtual":
        layout = h5py.VirtualLayout((12, 8), np.float32)
        layout[:] = h5py.VirtualSource(str(folder / "elsewhere.h5"), "features", (12, 8))
        f.create_virtual_dataset("features", layout)
    elif kind == "long double":
        f.create_dataset("features", data=np.ones((12, 8), np.longdouble))


@pytest.mark.parametrize(
    "kind, message",
    [
        ("external link", "no data set 'features' of its own"),
        ("soft link loop", "no data set 'features' of its own"),
        ("group", "no data set 'features' of its own"),
        ("absent", r"no data set 'features' of its own; found \?\[2J, coords"),
        ("objects", "features is object"),
        ("references", "features is object"),
        ("compound", "features is"),
        ("2^60 rows", "claims 36893488147419103232 bytes"),
        ("2^58 columns", "claims 6917529027641081856 bytes"),
        ("never written", "claims 384 bytes.* of which 0 are stored here"),
        ("half written", "claims 384 bytes.* of which 192 are stored here"),
        ("gzip", "stored through filter 1.* h5repack"),
        ("scale-offset", "stored through filter 6"),
        ("external file", "of which"),
        ("virtual", "of which"),
        ("long double", "features is float128|features is longdouble"),
    ],
)
def test_hostile_hdf5_is_refused_unread(tmp_path, kind, message, monkeypatch):
    import h5py

    paths = three(tmp_path)
    (tmp_path / "elsewhere.h5").write_bytes(paths[0].read_bytes())
    with h5py.File(paths[0], "a") as f:
        hostile(f, kind, tmp_path)
    monkeypatch.setattr(h5py.Dataset, "__getitem__", lambda *_: pytest.fail("read"))
    with pytest.raises(MixmagError, match=message):
        data.import_slide(job(tmp_path, *paths))


def slide_of_three(folder, slide_id, **settings):
    for k, m in enumerate((5, 10, 20)):
        trident_file(
            folder / f"{m}x_224px_0px_overlap" / "features_virchow2" / f"{slide_id}.h5",
            grid(6 * 2**k, 3 * 2**k, 1792 >> k),
            m,
            1792 >> k,
            **settings,
        )
    return [folder / f"{m}x_224px_0px_overlap" for m in (5, 10, 20)]


def table(path):
    with open(path, newline="") as f:
        return {row["slide_id"]: row for row in csv.DictReader(f)}


def test_import_takes_each_slides_own_mpp(tmp_path):
    """STAMP's files know micrometres only: a cohort of 40x and 20x scans has its pixels from the manifest."""
    for i, mpp in (("a", 0.25), ("b.1", 0.5), ("c", 0.25)):
        for m in (5, 10):
            stamp_file(tmp_path / str(m) / f"{i}.h5", 2240 / m, mpp, m, m, drop=-1)
    (tmp_path / "m.csv").write_text("slide,mpp\na.svs,0.2528\nb.1,0.4991\nz.svs,0.25\n")
    args = ("import", "--stamp", 5, 10, "--out", "d", "--mpp", 0.25, "--manifest", "m.csv")
    _, err = run("data.py", *args, cwd=tmp_path)
    rows, slides = (
        table(tmp_path / "d" / "import.csv"),
        {s.slide_id: s for s in data.read_slides(tmp_path / "d")},
    )
    assert {i: (row["mpp"], row["mpp_source"]) for i, row in rows.items()} == {
        "a": ("0.2528", "--manifest row a.svs"),
        "b.1": ("0.4991", "--manifest row b.1"),
        "c": ("0.25", "--mpp"),
    }
    assert (
        all(s.meta["cell_px"] == pytest.approx(448 / s.meta["mpp"]) for s in slides.values())
        and "1 of 3 rows name no slide here, such as z.svs" in err
    )
    (tmp_path / "m.csv").write_text("slide,mpp\na.svs,0.2528\na,0.25\n")
    assert "two rows for this slide" in run("data.py", *args, cwd=tmp_path, code=1)[1]


def test_an_imported_cohort_trains(tmp_path):
    """The command on folders of folders: good slides, one at a single magnification, damage; what is good is verified and trained on."""
    for i in "ab":
        folders = slide_of_three(tmp_path, i)
    lone = slide_of_three(tmp_path / "other", "lone")[0] / "features_virchow2" / "lone.h5"
    lone.rename(folders[0] / "features_virchow2" / "lone.h5")
    slide_of_three(tmp_path, "cut")
    cut = folders[1] / "features_virchow2" / "cut.h5"
    cut.write_bytes(cut.read_bytes()[:5000])
    out, err = run(
        "data.py", "import", "--trident", *folders, "--out", tmp_path / "d", cwd=tmp_path, code=3
    )
    assert (
        "a: imported, mpp 0.25" in out
        and "2 slides imported, 2 failed" in out
        and "cut: FAILED" in err
        and "lone: FAILED: no file in" in err
    )
    rows, failed = table(tmp_path / "d" / "import.csv"), table(tmp_path / "d" / "failed.csv")
    assert {i: row["status"] for i, row in rows.items()} == {
        "a": "imported",
        "b": "imported",
        "cut": "failed",
        "lone": "failed",
    } and set(failed) == {"cut", "lone"}
    assert (rows["a"]["tiles"], rows["a"]["of"], rows["a"]["whole_windows"]) == (
        "18 72 288",
        "18 72 288",
        "2",
    ) and "truncated" in failed["cut"]["reason"]
    assert data.verify(tmp_path / "d") == []
    run(
        "train.py",
        "pretrain",
        "--data",
        tmp_path / "d",
        "--out",
        tmp_path / "r",
        "--steps",
        2,
        "--batch-size",
        2,
        "--holdout",
        0,
        cwd=tmp_path,
    )
    for place in folders:
        for i in ("lone", "cut"):
            (place / "features_virchow2" / f"{i}.h5").unlink(missing_ok=True)
    out, _ = run("data.py", "import", "--trident", *folders, "--out", tmp_path / "d", cwd=tmp_path)
    assert out.count("done before") == 2 and not (tmp_path / "d" / "failed.csv").exists()


def test_import_folders_that_cannot_be_meant(tmp_path):
    for place in ("job/features_a/x.h5", "job/features_b/x.h5", "nested/p/x.h5", "nested/q/X.h5"):
        (tmp_path / place).parent.mkdir(parents=True)
        (tmp_path / place).touch()
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "s\udcae.h5").touch()
    for place, tool, message in (
        ("none", "trident", "no feature files"),
        ("raw", "trident", r"'s\\udcae' in .* not a printable name"),
        ("job", "trident", "features_a; there is .*features_b"),
        ("nested", "stamp", "two slides with one id"),
    ):
        with pytest.raises(MixmagError, match=message):
            data.import_folder(tmp_path / place, tool, None)
    assert data.import_folder(tmp_path / "job", "trident", "b") == {
        "x": tmp_path / "job" / "features_b" / "x.h5"
    }
    for flags in ((), ("--trident", "a", "--stamp", "b")):
        run("data.py", "import", *flags, "--out", "d", cwd=tmp_path, code=2)


IMPORT_SCRIPT = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import data
read = data.read_tiles
def damaged(path, job):
    if "crash" in path:
        os.abort()
    while "hang" in path:
        pass
    return read(path, job)
data.read_tiles, data.IMPORT_SECONDS = damaged, 5
if __name__ == "__main__":
    sys.exit(data.run_command(data.import_command, data.parse()))
"""


def import_damaged(folder, folders, code):
    (folder / "script.py").write_text(IMPORT_SCRIPT)
    done = subprocess.run(
        [
            sys.executable,
            str(folder / "script.py"),
            "import",
            "--trident",
            *map(str, folders),
            "--out",
            str(folder / "d"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    return table(folder / "d" / "import.csv")


def test_a_file_that_brings_the_reader_down_costs_its_slide(tmp_path):
    for i in ("a", "crash", "hang", "z"):
        folders = slide_of_three(tmp_path, i)
    rows = import_damaged(tmp_path, folders, 3)
    assert {i for i, row in rows.items() if row["status"] == "imported"} == {
        "a",
        "z",
    } and data.verify(tmp_path / "d") == []
    assert all("bring the HDF5 library down" in rows[i]["reason"] for i in ("crash", "hang"))


def test_mutated_hdf5_is_refused_or_read_as_it_is(tmp_path):
    """100 slides with random bytes changed in one of their files, or its end cut off: each has a row; what is imported differs from the clean
    slide only in single numbers, where the damage hit the embedding's own bytes, or in places, where it hit the coordinates'."""
    import h5py

    rng = np.random.default_rng(0)
    folders = slide_of_three(tmp_path, "clean")
    for i in range(100):
        slide_of_three(tmp_path, f"s{i}", name="clean")
        path = folders[i % 3] / "features_virchow2" / f"s{i}.h5"
        raw = bytearray(path.read_bytes())
        for at in rng.integers(len(raw), size=(1, 1, 4, 16)[i % 4]):
            raw[at] = rng.integers(256)
        path.write_bytes(raw[: rng.integers(len(raw))] if i % 10 == 0 else raw)
    rows = import_damaged(tmp_path, folders, 3)
    clean = data.read_slide(tmp_path / "d" / "slides" / "clean.safetensors")
    imported = [i for i, row in rows.items() if row["status"] == "imported"]
    assert (
        len(rows) == 101
        and {row["status"] for row in rows.values()} == {"imported", "failed"}
        and 20 < len(imported) < 90
        and data.verify(tmp_path / "d") == []
    )
    assert all(row["reason"] for row in rows.values() if row["status"] == "failed")
    for i in imported:
        slide, k = (
            data.read_slide(tmp_path / "d" / "slides" / f"{i}.safetensors"),
            int(i[1:]) % 3 if i != "clean" else 0,
        )
        with h5py.File(folders[k] / "features_virchow2" / f"{i}.h5") as f:
            places = sorted(map(tuple, f["coords"][...].tolist()))
        if places == sorted(grid(6 * 2**k, 3 * 2**k, 1792 >> k)):
            assert np.array_equal(slide.cells, clean.cells) and np.array_equal(
                slide.valid, clean.valid
            )
            assert (slide.features == clean.features).any(axis=-1).all() and (
                slide.features != clean.features
            ).sum() <= 16
