"""predict, embed and heatmap.     python -m pytest tests/test_inference.py"""

import csv
import json
import math
import uuid
from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile
import torch
from conftest import run
from PIL import Image
from test_train import compute

import data
import mixmag
import train
from data import MixmagError

ODD = {
    "encoder": "odd",
    "magnifications": [5, 10, 20],
    "tile_px": 224,
    "mpp": 0.2525,
    "cell_px": 448 / 0.2525,
    "origin": [100.0, 37.0],
    "width": 40000,
    "height": 30000,
    "n_bad": 0,
}  # a cell is 1774.2574... pixels: every edge has to be rounded


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A DATA folder of a slide with holes and invalid tokens, one of many windows, an empty one and one with a NaN; an encoder and one of other weights."""
    folder, rng = tmp_path_factory.mktemp("odd"), np.random.default_rng(5)
    cells = {
        "holes": [
            (c, r)
            for c in range(7)
            for r in range(4)
            if (c, r) not in ((1, 0), (4, 2), (5, 3), (6, 0), (6, 1), (6, 3))
        ],
        "many": [(c + 3, r) for c in range(20) for r in range(14)],
        "empty": [],
        "poisoned": [(0, 0), (1, 0), (0, 1), (1, 1)],
    }
    for name, places in cells.items():
        places = np.array(places, np.int32).reshape(-1, 2)
        features, valid = (
            rng.standard_normal((len(places), 21, 6)).astype(np.float16),
            rng.random((len(places), 21)) > 0.1 * (name == "holes"),
        )
        features[:1, 3] = np.nan if name == "poisoned" else features[:1, 3]
        data.write_slide(
            folder / "slides" / f"{name}.safetensors",
            features,
            places,
            valid,
            {"slide_id": name, **ODD},
        )
    for seed in (0, 1):
        torch.manual_seed(seed)
        encoder = mixmag.MixingEncoder(mixmag.Config(6, region=2, width=16, depth=1, heads=2))
        (folder / f"run{seed}").mkdir()
        train.export_encoder(
            train.SimpleNamespace(folder=folder / f"run{seed}"),
            encoder,
            data.read_slides(folder, ["many"])[0],
            "small",
            [],
        )
    return folder


def embed(odd, out, *flags, slides=("holes", "many", "empty"), init="run0"):
    return train.embed_command(
        train.parse(
            [
                "embed",
                "--init",
                str(odd / init),
                "--data",
                str(odd),
                "--out",
                str(out),
                "--slides",
                *slides,
                *flags,
            ]
        )
    )


def brute_force(slide, region=2, levels=(0, 1, 2), min_cover=0.5):
    """Every valid token of every window, by loops over cells, as [(window, level, (col, row), box)] and the windows' inputs (N, D), valid (N,):
    written from the description of a region, with no function of the project."""
    at = {tuple(c): i for i, c in enumerate(slide.cells.tolist())}
    first = [0, 1, 5]
    edge = lambda k, i, side: int(np.round(slide.meta["origin"][k] + i * side))  # noqa: E731
    tokens, inputs = [], []
    for row in range(0, 40, region):
        for col in range(0, 40, region):
            inside = [(col + c, row + r) for r in range(region) for c in range(region)]
            if sum(i in at for i in inside) < min_cover * region**2:
                continue
            x, valid = [], []
            for k in levels:
                side = slide.meta["cell_px"] / 2**k
                for r in range(region * 2**k):
                    for c in range(region * 2**k):
                        cell, n = (col + c // 2**k, row + r // 2**k), 2**k
                        t = first[k] + (r % n) * n + c % n
                        there = cell in at and bool(slide.valid[at[cell], t])
                        x.append(
                            slide.features[at[cell], t]
                            if there
                            else np.zeros(slide.dim, np.float16)
                        )
                        valid.append(there)
                        if there:
                            X, Y = col * n + c, row * n + r
                            tokens.append(
                                (
                                    len(inputs),
                                    k,
                                    (X, Y),
                                    (
                                        edge(0, X, side),
                                        edge(1, Y, side),
                                        edge(0, X + 1, side),
                                        edge(1, Y + 1, side),
                                    ),
                                    len(x) - 1,
                                )
                            )
            inputs.append((np.stack(x), np.array(valid), (col, row)))
    return tokens, inputs


def read_trident(
    folder: Path, slide_id: str, name: str, width: int, px: int, magnification: int, side: float
):
    """A reader of TRIDENT's two files as its documentation describes them; torchmil takes names from the one and coordinates from the other,
    Patho-Bench the level-0 patch size from the attributes."""
    types = {
        "patch_size": int,
        "patch_size_level0": int,
        "level0_magnification": float,
        "target_magnification": int,
        "overlap": int,
        "name": str,
        "savetodir": str,
        "level0_width": int,
        "level0_height": int,
    }
    base = folder / f"{magnification:g}x_{px}px_0px_overlap"
    with (
        h5py.File(base / f"features_{name}" / f"{slide_id}.h5", "r") as f,
        h5py.File(base / "patches" / f"{slide_id}_patches.h5", "r") as p,
    ):
        assert set(f) == {"features", "coords"} and set(p) == {"coords"}
        assert (
            f["features"].dtype == np.float32 and f["coords"].dtype == p["coords"].dtype == np.int64
        )
        assert (
            f["features"].shape == (len(f["coords"]), width)
            and f["coords"].shape[1:] == (2,)
            and np.array_equal(f["coords"], p["coords"])
        )
        for coords in (f["coords"], p["coords"]):
            found = dict(coords.attrs)
            assert set(found) == set(types)
            for key, kind in types.items():
                assert isinstance(
                    found[key], {int: np.integer, float: (np.integer, np.floating), str: str}[kind]
                ), key
            assert (
                abs(px * found["level0_magnification"] / magnification - found["patch_size_level0"])
                < 1
            )  # as TRIDENT computes the side
            assert {k: found[k] for k in types if k != "savetodir"} == {
                "patch_size": px,
                "patch_size_level0": round(side),
                "level0_magnification": pytest.approx(10 / ODD["mpp"], abs=0.5),
                "target_magnification": magnification,
                "overlap": 0,
                "name": slide_id,
                "level0_width": 40000,
                "level0_height": 30000,
            }
        assert (
            f["features"].attrs["encoder"] == name
            and f["features"].attrs["name"] == slide_id
            and isinstance(f["features"].attrs["savetodir"], str)
        )
        return f["features"][:], f["coords"][:]


def test_embed_writes_what_trident_readers_want(odd, tmp_path, capsys):
    """Both outputs, read by readers that know nothing of the writer, equal the encoder applied window by window, row for row."""
    assert embed(odd, tmp_path, "--tokens", "patch") == embed(odd, tmp_path, "--tokens", "cls") == 0
    encoder, said = (
        mixmag.load_encoder(odd / "run0" / "encoder"),
        capsys.readouterr().out.splitlines(),
    )
    written = [
        [
            t[1]
            for s in data.read_slides(odd, ["holes", "many", "empty"])
            for t in brute_force(s)[0]
        ].count(k)
        for k in range(3)
    ]
    assert said[0].startswith(
        f"3 slides, patch outputs in {tmp_path}: {written[0]} at 5x, {written[1]} at 10x, {written[2]} at 20x; 1 slides have no tissue"
    )
    for slide in data.read_slides(odd, ["holes", "many", "empty"]):
        tokens, inputs = brute_force(slide)
        with torch.no_grad():
            outputs = [
                encoder(torch.from_numpy(x)[None], valid=torch.from_numpy(valid)[None])
                for x, valid, _ in inputs
            ]
        for k, m in enumerate((5, 10, 20)):
            features, coords = read_trident(
                tmp_path, slide.slide_id, "mixmag_patch", 16, 224, m, ODD["cell_px"] / 2**k
            )
            mine = [t for t in tokens if t[1] == k]
            assert coords.tolist() == [list(box[:2]) for _, _, _, box, _ in mine]
            if mine:
                assert np.allclose(
                    features, torch.stack([outputs[w][1][0, i] for w, *_, i in mine]), atol=1e-5
                )
        features, coords = read_trident(
            tmp_path, slide.slide_id, "mixmag_cls", 64, 448, 5, 2 * ODD["cell_px"]
        )
        assert coords.tolist() == [
            [int(np.round(o + c * ODD["cell_px"])) for o, c in zip(ODD["origin"], corner)]
            for *_, corner in inputs
        ]
        if inputs:
            assert np.allclose(
                features, torch.stack([cls[0].flatten() for cls, _ in outputs]), atol=1e-5
            )
    assert (
        len(inputs) == 77 and not brute_force(data.read_slides(odd, ["empty"])[0])[1]
    )  # more windows than one pass takes; none


def test_embed_in_clams_layout(odd, tmp_path):
    embed(odd, tmp_path / "clam", "--layout", "clam")
    embed(odd, tmp_path / "trident")
    for slide_id in ("holes", "many", "empty"):
        bag = torch.load(
            tmp_path / "clam/5x_448px_0px_overlap/mixmag_cls/pt_files" / f"{slide_id}.pt",
            weights_only=True,
        )
        with h5py.File(
            tmp_path / "clam/5x_448px_0px_overlap/mixmag_cls/h5_files" / f"{slide_id}.h5", "r"
        ) as f:
            features, coords = f["features"][:], f["coords"][:]
        same, there = read_trident(
            tmp_path / "trident", slide_id, "mixmag_cls", 64, 448, 5, 2 * ODD["cell_px"]
        )
        assert (
            bag.dtype == torch.float32
            and np.array_equal(bag, features)
            and np.array_equal(features, same)
            and np.array_equal(coords, there)
        )


def test_embed_goes_on_and_refuses_to_mix(odd, tmp_path, capsys):
    """Files of the same encoder and slide stay, what is missing comes back byte for byte, other encoders and other tools' files are refused, and a slide
    with a NaN costs only itself."""
    embed(odd, tmp_path, "--tokens", "patch", slides=("holes",))
    path = tmp_path / "20x_224px_0px_overlap/features_mixmag_patch/holes.h5"
    before, stamp = path.read_bytes(), path.stat().st_mtime_ns
    said = capsys.readouterr().out
    embed(odd, tmp_path, "--tokens", "patch", slides=("holes",))
    assert path.stat().st_mtime_ns == stamp and capsys.readouterr().out == said
    path.unlink()
    embed(odd, tmp_path, "--tokens", "patch", slides=("holes",))
    assert path.read_bytes() == before
    with pytest.raises(MixmagError, match="made with .*give another --out"):
        embed(odd, tmp_path, "--tokens", "patch", slides=("holes",), init="run1")
    patches = tmp_path / "10x_224px_0px_overlap/patches/many_patches.h5"
    with h5py.File(patches, "w") as f:
        f["coords"] = np.zeros((3, 2), np.int64)
    theirs = patches.read_bytes()
    assert embed(odd, tmp_path, "--tokens", "patch", slides=("holes", "many", "poisoned")) == 3
    failed = {
        r["slide_id"]: r["reason"]
        for r in data.read_csv(tmp_path / "failed.csv", ("slide_id", "stage", "reason"))
    }
    assert (
        set(failed) == {"many", "poisoned"}
        and "other coordinates" in failed["many"]
        and "not finite" in failed["poisoned"]
    )
    assert (
        patches.read_bytes() == theirs
        and not list(tmp_path.rglob("poisoned*"))
        and not list(tmp_path.rglob("*.tmp"))
    )


def test_embed_asks_for_room_first(odd, tmp_path, monkeypatch):
    """HDF5 brings the process down where a disk gets full under it, so what will not fit is refused before its first byte; the others are written."""
    monkeypatch.setattr(data, "free_bytes", lambda folder: 5000)
    assert embed(odd, tmp_path) == 3
    failed = {
        r["slide_id"]: r["reason"]
        for r in data.read_csv(tmp_path / "failed.csv", ("slide_id", "stage", "reason"))
    }
    assert (
        set(failed) == {"many"}
        and "MB do not fit into the 0 MB that are free under" in failed["many"]
    )
    assert {p.stem for p in tmp_path.rglob("features*/*.h5")} == {"holes", "empty"}


KINDS = [
    ("none", "patch", "all"),
    ("none", "patch", 10),
    ("random", "patch", "all"),
    ("random", "patch", 20),
    ("random", "cls", "all"),
    ("random", "cls", 5),
]


@pytest.mark.parametrize("init,tokens,magnification", KINDS)
def test_attention_lies_where_a_loop_over_windows_puts_it(
    odd, init, tokens, magnification, monkeypatch
):
    """Places, weights and ranks of every kind of run, in CaseDataset's order, against loops; a slide's weights sum to 1."""
    torch.manual_seed(3)
    config = mixmag.Config(6, region=2, width=16, depth=1, heads=2)
    model = mixmag.SlideClassifier(
        config,
        mixmag.MixingEncoder(config) if init == "random" else None,
        tokens,
        magnification,
        hidden=8,
    ).eval()
    if model.whiten is not None:
        model.whiten.fit(
            torch.randn_like(model.whiten.mean), torch.diag(torch.rand(len(model.whiten.matrix)))
        )
    slide = data.read_slides(odd, ["holes"])[0]
    dataset = data.CaseDataset(
        {"holes": slide},
        [data.Case("holes", 0, "", ["holes"])],
        config.geometry(),
        model.index,
        0.5,
    )
    table, score = train.attention_table(model, dataset, compute())
    levels = (0, 1, 2) if magnification == "all" else ((5, 10, 20).index(magnification),)
    expected, inputs = brute_force(slide, levels=levels)
    x, valid = (torch.from_numpy(np.stack(part)) for part in list(zip(*inputs))[:2])
    with torch.no_grad():
        h = (
            model.standardize(x)
            if init == "none"
            else model.encoder(x, model.index.expand(len(x), -1), valid)[
                0 if tokens == "cls" else 1
            ]
        )
        h = h.flatten(1)[:, None] if tokens == "cls" else h
        h = h if init == "none" else (h - model.whiten.mean) @ model.whiten.matrix
        h = h[:, 0] if tokens == "cls" else h[valid]
        raw = (
            model.pool.w(torch.tanh(model.pool.V(h)) * torch.sigmoid(model.pool.U(h)))
            .flatten()
            .softmax(0)
        )
        assert score == pytest.approx(torch.sigmoid(model.head(raw @ h)).item(), abs=1e-5)
    if tokens == "cls":
        expected = [
            (
                w,
                0,
                (col // 2, row // 2),
                tuple(
                    int(
                        np.round(
                            ODD["origin"][i % 2] + ((col, row)[i % 2] + i // 2 * 2) * ODD["cell_px"]
                        )
                    )
                    for i in range(4)
                ),
                0,
            )
            for w, (*_, (col, row)) in enumerate(inputs)
        ]
    assert [
        (w, k, tuple(p), tuple(b))
        for w, k, p, b in zip(
            table.window.tolist(), table.level.tolist(), table.place.tolist(), table.box.tolist()
        )
    ] == [e[:4] for e in expected]
    assert np.allclose(table.weight, raw, atol=1e-6) and table.weight.sum() == pytest.approx(
        1, abs=1e-6
    )
    assert table.region.tolist() == [[c // 2 for c in inputs[w][2]] for w, *_ in expected]
    for k in levels if tokens == "patch" else (0,):
        weights = table.weight[table.level == k]
        assert np.allclose(
            table.rank[table.level == k],
            [
                ((weights < v).sum() + ((weights == v).sum() + 1) / 2) / len(weights)
                for v in weights
            ],
        )
    figures = []
    monkeypatch.setattr(train, "save_figure", lambda figure, _: figures.append(figure))
    for k, side in set(
        zip(table.level.tolist(), table.side.tolist())
    ):  # what is painted, by the place on the axes, and what is left bare
        train.draw_attention(
            None,
            table,
            k,
            slide,
            (np.zeros((2, 2)), (0, 40000, 30000, 0)),
            (0, 0, 40000, 30000),
            "title",
        )
        axis = figures.pop().axes[0]
        shown, (left, right, bottom, top) = (
            axis.images[1].get_array(),
            np.array(axis.images[1].get_extent()) / 0.2525,
        )
        centre = {
            (
                left + (c + 0.5) * (right - left) / shown.shape[1],
                top + (r + 0.5) * (bottom - top) / shown.shape[0],
            ): shown[r, c]
            for r, c in zip(*np.where(~shown.mask))
        }
        boxes = [
            (b, v) for b, v, level in zip(table.box.tolist(), table.rank, table.level) if level == k
        ]
        for x, y in centre:
            (value,) = [v for (x0, y0, x1, y1), v in boxes if x0 < x < x1 and y0 < y < y1]
            assert centre[x, y] == value
        assert len(centre) == (
            len(boxes) if tokens == "patch" else len(slide.cells) - 1
        )  # one cell lies in no region that is half covered
        assert axis.get_xlim() == pytest.approx((0, 10100)) and axis.get_ylim() == pytest.approx(
            (7575, 0)
        )


@pytest.fixture(scope="module")
def pictured(tmp_path_factory):
    """A synthetic slide image of 3 x 2 cells, tiled; slides like it with planted labels; runs fine-tuned on them: of a pretraining run, of its class
    tokens, of none."""
    folder, whole = tmp_path_factory.mktemp("pictured"), data.synth_picture
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "synth_picture", lambda rng, *_: whole(rng, 1900, 2800))
        data.synth_images(folder / "images", 1, 6)
    run("data.py", "tile", "--slides", "images", "--out", "d", "--region", 2, cwd=folder)
    slide, rng = data.read_slides(folder / "d")[0], np.random.default_rng(0)
    rows = [("c0", slide.slide_id, 1, "test"), ("c1", "s0", 0, "test")]
    for i in range(9):
        features = slide.features[rng.permutation(len(slide.cells))] + np.float16(0.2 * (i % 2))
        data.write_slide(
            folder / "d/slides" / f"s{i}.safetensors",
            features,
            slide.cells,
            slide.valid,
            {
                **{
                    k: slide.meta[k]
                    for k in data.FIELDS
                    if k not in ("format", "created", "sha256")
                },
                "slide_id": f"s{i}",
            },
        )
        rows += [(f"c{i + 1}", f"s{i}", i % 2, "train" if i < 5 else "tune")] * (i > 0)
    data.write_csv(folder / "d/tasks/t.csv", ("case_id", "slide_id", "label", "split"), rows)
    for name, *flags in (
        ("patch",),
        ("cls", "--tokens", "cls"),
        ("none", "--init", "none", "--magnification", "20"),
    ):
        if name == "patch":
            train.pretrain(
                train.parse(
                    [
                        "pretrain",
                        *map(
                            str,
                            (
                                "--data",
                                folder / "d",
                                "--region",
                                2,
                                "--steps",
                                4,
                                "--batch-size",
                                4,
                                "--holdout",
                                0,
                                "--out",
                                folder / "mem",
                            ),
                        ),
                    ]
                )
            )
        train.finetune(
            train.parse(
                [
                    "finetune",
                    "--task",
                    "t",
                    *map(
                        str,
                        (
                            "--data",
                            folder / "d",
                            "--init",
                            folder / "mem",
                            "--region",
                            2,
                            "--epochs",
                            1,
                            "--batch-size",
                            4,
                            "--out",
                            folder / name,
                            *flags,
                        ),
                    ),
                ]
            )
        )
    return folder


def heatmap(pictured, name, *flags):
    return train.heatmap_command(
        train.parse(
            ["heatmap", "--run", str(pictured / name), "--slide", "synthetic-000", *map(str, flags)]
        )
    )


def read_geojson(path):
    """A reader of what QuPath asks for: strict JSON, closed integer rectangles, unique ids, finite measurements."""
    found = json.loads(
        path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON")
    )
    assert found["type"] == "FeatureCollection" and len(
        {f["id"] for f in found["features"]}
    ) == len(found["features"])
    for f in found["features"]:
        (ring,), p = f["geometry"]["coordinates"], f["properties"]
        assert (
            f["type"] == "Feature"
            and f["geometry"]["type"] == "Polygon"
            and uuid.UUID(f["id"]).version == 5
        )
        assert (
            len(ring) == 5
            and ring[0] == ring[-1]
            and all(type(v) is int for point in ring for v in point)
        )
        assert (
            p["objectType"] == "detection"
            and all(0 <= v <= 255 and type(v) is int for v in p["color"])
            and isinstance(p["classification"]["name"], str)
        )
        assert isinstance(p["measurements"], dict) and all(
            math.isfinite(v) for v in p["measurements"].values()
        )
    return found


def test_heatmap_of_a_slide_image(pictured, tmp_path, capsys, monkeypatch):
    """Through the whole chain, on the image: pictures, CSV and GeoJSON of each magnification, which follow from run and slide alone."""
    assert (
        heatmap(
            pictured,
            "patch",
            "--image",
            pictured / "images/synthetic-000.tiff",
            "--out",
            tmp_path / "a",
        )
        == 0
    )
    said = capsys.readouterr().out
    monkeypatch.setattr(train, "draw_attention", lambda *_: None)
    heatmap(pictured, "patch", "--out", tmp_path / "b")
    rule = json.loads((pictured / "patch/result.json").read_text())["case_score"]
    assert (
        f"a case's score is the {rule} over its slides" in said
        and "no evidence of causality" in said
    )
    assert {p.name for p in (tmp_path / "a").iterdir()} == {
        "attention.csv",
        "regions.png",
        *(f"attention-{m}x.{e}" for m in (5, 10, 20) for e in ("png", "geojson")),
    }
    with open(tmp_path / "a/attention.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    slide = data.read_slides(pictured / "d", ["synthetic-000"])[0]
    expected, _ = brute_force(slide)
    assert [
        (int(r["magnification"]), int(r["col"]), int(r["row"]), int(r["x"]), int(r["y"]))
        for r in rows
    ] == [((5, 10, 20)[k], *place, *box[:2]) for _, k, place, box, _ in expected]
    assert sum(float(r["attention"]) for r in rows) == pytest.approx(1, abs=1e-6) and {
        float(r["side"]) for r in rows
    } == {896.0, 448.0, 224.0}
    predicted, score = tmp_path / "p.csv", float(said.split("score ")[1].split(";")[0])
    train.predict_command(
        train.parse(
            [
                "predict",
                "--run",
                str(pictured / "patch"),
                "--data",
                str(pictured / "d"),
                "--slides",
                "synthetic-000",
                "--out",
                str(predicted),
            ]
        )
    )
    assert score == pytest.approx(
        float(data.read_csv(predicted, ("slide_id", "score"))[0]["score"]), abs=1e-4
    )
    for m in (5, 10, 20):
        found = read_geojson(tmp_path / "a" / f"attention-{m}x.geojson")
        assert (tmp_path / "a" / f"attention-{m}x.geojson").read_bytes() == (
            tmp_path / "b" / f"attention-{m}x.geojson"
        ).read_bytes()
        mine = [r for r in rows if r["magnification"] == str(m)]
        for r, f in zip(mine, found["features"], strict=True):
            assert f["geometry"]["coordinates"][0][0] == [int(r["x"]), int(r["y"])] and f[
                "properties"
            ]["measurements"]["attention"] == float(r["attention"])
        assert found["metadata"]["bounds_subtracted"] == [0, 0]
        with Image.open(tmp_path / "a" / f"attention-{m}x.png") as picture:
            assert (
                min(picture.size) > 400
                and len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 500
            )


def test_heatmap_without_an_image_and_of_other_runs(pictured, tmp_path, capsys):
    heatmap(pictured, "cls", "--out", tmp_path / "cls")
    heatmap(pictured, "none", "--out", tmp_path / "none")
    assert capsys.readouterr().out.count("no --image, so no top regions") == 2
    assert {p.name for p in (tmp_path / "cls").iterdir()} == {
        "attention.csv",
        "attention-regions.png",
        "attention-regions.geojson",
    }
    assert {p.name for p in (tmp_path / "none").iterdir()} == {
        "attention.csv",
        "attention-20x.png",
        "attention-20x.geojson",
    }
    slide = data.read_slides(pictured / "d", ["synthetic-000"])[0]
    assert len(read_geojson(tmp_path / "cls/attention-regions.geojson")["features"]) == len(
        brute_force(slide)[1]
    )
    assert len(read_geojson(tmp_path / "none/attention-20x.geojson")["features"]) == len(
        brute_force(slide, levels=(2,))[0]
    )
    with Image.open(tmp_path / "none/attention-20x.png") as picture:
        assert min(picture.size) > 400


def test_heatmap_subtracts_bounds_and_survives_a_broken_image(
    pictured, tmp_path, monkeypatch, capsys
):
    """MIRAX slides say where their tissue lies, and QuPath cuts them to it. What cannot be read is drawn grey, and said."""

    class Bounded(data.Reader):
        def __init__(self, path):
            super().__init__(path)
            self.slide = type(
                "Slide", (), {"__getattr__": lambda _, name, slide=self.slide: getattr(slide, name)}
            )()
            self.slide.properties = {
                "openslide.bounds-x": "64",
                "openslide.bounds-y": "32",
                "openslide.bounds-width": "2000",
                "openslide.bounds-height": "1500",
            }

    image, drawn = pictured / "images/synthetic-000.tiff", []
    monkeypatch.setattr(train, "draw_regions", lambda *_: None)
    monkeypatch.setattr(train, "draw_attention", lambda *words: drawn.append(words))
    heatmap(pictured, "patch", "--image", image, "--out", tmp_path / "plain")
    monkeypatch.setattr(data, "Reader", Bounded)
    heatmap(pictured, "patch", "--image", image, "--out", tmp_path / "bounded")
    assert [words[5] for words in drawn] == [(0, 0, 2800, 1900)] * 3 + [
        (64, 32, 2064, 1532)
    ] * 3  # what is seen, level-0 px
    (whole, extent), (cut, cut_extent) = (
        drawn[0][4],
        drawn[3][4],
    )  # the ground: the cut is the whole's, at its own scale
    assert (
        extent == (0, 2800, 1900, 0)
        and cut_extent == (64, 2064, 1532, 32)
        and whole.shape[1] == cut.shape[1] == 1600
    )
    small = np.asarray(Image.fromarray(whole).resize((2800 // 8, 1900 // 8), Image.Resampling.BOX))[
        4:191, 8:258
    ]
    assert (
        np.corrcoef(
            small.ravel(),
            np.asarray(
                Image.fromarray(cut).resize(small.shape[::-1], Image.Resampling.BOX)
            ).ravel(),
        )[0, 1]
        > 0.98
    )
    plain, bounded = (
        read_geojson(tmp_path / name / "attention-10x.geojson") for name in ("plain", "bounded")
    )
    assert bounded["metadata"]["bounds_subtracted"] == [64, 32]
    for a, b in zip(plain["features"], bounded["features"], strict=True):
        assert (
            np.array(a["geometry"]["coordinates"]) - b["geometry"]["coordinates"] == [64, 32]
        ).all()

    def fail(*_):
        raise data.openslide.OpenSlideError("torn")

    monkeypatch.setattr(Bounded, "read", fail)
    heatmap(pictured, "patch", "--image", image, "--out", tmp_path / "torn")
    assert (
        drawn[-1][4][0] == 128
    ).all() and "cannot be read and are drawn grey (torn)" in capsys.readouterr().err
    tifffile.imwrite(
        tmp_path / "other.tiff",
        np.zeros((512, 512, 3), np.uint8),
        tile=(256, 256),
        photometric="rgb",
    )
    with pytest.raises(MixmagError, match="not the same slide"):
        heatmap(pictured, "patch", "--image", tmp_path / "other.tiff")


def test_top_regions_are_those_of_the_highest_sum(odd, tmp_path, monkeypatch):
    """Six regions, and of each its best tile per magnification: what is cut from the slide, against a loop."""
    rng = np.random.default_rng(2)
    slide = data.read_slides(odd, ["many"])[0]
    tokens, inputs = brute_force(slide)
    weight = rng.random(len(tokens)) ** 4
    window, level = (np.array([t[i] for t in tokens]) for i in (0, 1))
    table = train.SimpleNamespace(
        window=window,
        level=level,
        weight=weight,
        box=np.array([t[3] for t in tokens]),
        region=np.array([inputs[w][2] for w in window]) // 2,
    )
    cut = []
    monkeypatch.setattr(
        train,
        "slide_picture",
        lambda _reader, box, _width: (
            cut.append([int(v) for v in box]) or np.zeros((4, 4, 3), np.uint8)
        ),
    )
    train.draw_regions(
        tmp_path / "r.png", table, ["5x", "10x", "20x"], slide, None, 2 * ODD["cell_px"]
    )
    sums = {w: weight[window == w].sum() for w in range(len(inputs))}
    expected = []
    for w in sorted(sums, key=lambda w: -sums[w])[:6]:
        col, row = inputs[w][2]
        box = [
            int(np.round(o + c * ODD["cell_px"]))
            for c, o in ((col, 100), (row, 37), (col + 2, 100), (row + 2, 37))
        ]
        expected.append([min(v, limit) for v, limit in zip(box, (40000, 30000) * 2)])
        for k in range(3):
            best = max(
                (i for i in range(len(tokens)) if window[i] == w and level[i] == k),
                key=lambda i: weight[i],
            )
            expected.append(
                [min(v, limit) for v, limit in zip(tokens[best][3], (40000, 30000) * 2)]
            )
    assert cut == expected and len(cut) == 24


def test_heatmap_takes_the_size_that_import_could_not_know(pictured, tmp_path):
    """STAMP's files do not say how large the slide is; the image does, unless a tile would begin beyond it, or its micrometres became pixels of
    another size. A cell at the border may be cut."""
    slide = data.read_slides(pictured / "d", ["synthetic-000"])[0]
    for size, changes, message in (
        ((2688, 1792), {"size_known": False}, ""),
        ((2900, 1792), {"size_known": False}, ""),
        ((2688, 1792), {"size_known": True}, "not the same slide"),
        ((2688, 1792), {"size_known": False, "cell_px": 1792.0}, "not the same slide"),
        (
            (2688, 1792),
            {"size_known": False, "mpp": 0.6, "settings": {"tool": "stamp"}},
            "import it with --mpp 0.5",
        ),
    ):
        folder = tmp_path / uuid.uuid4().hex
        meta = {
            **{k: slide.meta[k] for k in data.FIELDS if k not in ("format", "created", "sha256")},
            "width": size[0],
            "height": size[1],
            **changes,
        }
        data.write_slide(
            folder / "slides" / "synthetic-000.safetensors",
            np.array(slide.features),
            slide.cells,
            slide.valid,
            meta,
        )
        flags = (
            "--data",
            folder,
            "--image",
            pictured / "images/synthetic-000.tiff",
            "--out",
            folder / "out",
        )
        if not message:
            assert (
                heatmap(pictured, "none", *flags) == 0 and (folder / "out" / "regions.png").exists()
            )
        else:
            with pytest.raises(MixmagError, match=message):
                heatmap(pictured, "none", *flags)


def test_geojson_without_the_slide_takes_its_bounds_from_the_lattice(
    pictured, tmp_path, monkeypatch
):
    """Cells of a slide with bounds begin at their corner, so that QuPath's pixels are known without the slide."""
    read = data.read_slide

    def moved(path):
        slide = read(path)
        slide.meta["origin"] = [64.0, 32.0]
        return slide

    monkeypatch.setattr(data, "read_slide", moved)
    heatmap(pictured, "patch", "--out", tmp_path)
    found = read_geojson(tmp_path / "attention-5x.geojson")
    with open(tmp_path / "attention.csv", newline="") as f:
        first = next(r for r in csv.DictReader(f) if r["magnification"] == "5")
    assert found["metadata"]["bounds_subtracted"] == [64, 32]
    assert found["features"][0]["geometry"]["coordinates"][0][0] == [
        int(first["x"]) - 64,
        int(first["y"]) - 32,
    ]


def test_what_embed_and_predict_leave_out_is_said(runs, cohort, tmp_path):
    """Cells in windows that are too little covered."""
    slide = data.read_slides(cohort)[0]
    meta = {k: slide.meta[k] for k in data.FIELDS if k not in ("format", "created", "sha256")}
    cells = np.array([(c, r) for c in range(4) for r in range(4)], np.int32)
    features = np.resize(np.array(slide.features), (16, 21, slide.dim))
    data.write_slide(
        tmp_path / "d" / "slides" / f"{slide.slide_id}.safetensors",
        features,
        cells,
        np.ones((16, 21), bool),
        meta,
    )
    found = runs / "runs"
    init = next(
        p.parent
        for p in found.glob("*/result.json")
        if json.loads(p.read_text())["kind"] == "pretrain"
    )
    out, _ = run("train.py", "embed", "--init", init, "--data", "d", "--out", "e", cwd=tmp_path)
    assert "1 regions" in out and "7 of 16 cells lie in windows that --min-cover leaves out" in out
    out, _ = run(
        "train.py",
        "embed",
        "--init",
        init,
        "--data",
        "d",
        "--out",
        "f",
        "--min-cover",
        0,
        cwd=tmp_path,
    )
    assert "4 regions" in out and "--min-cover" not in out
