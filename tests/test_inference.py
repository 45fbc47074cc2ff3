"""predict, embed and heatmap.     python -m pytest tests/test_inference.py"""

import contextlib
import json
import shutil
from types import SimpleNamespace
from unittest.mock import Mock

import h5py
import numpy as np
import pytest
import torch
from conftest import failures, run
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from PIL import Image
from test_tiler import read_slide
from test_train import machine_of

import data
import mixmag
import train
from data import MixmagError

# a cell has 1774.2574... pixels, so every edge has to be rounded
ODD = {"encoder": "odd", "tile_px": 224, "mpp": 0.2525, "cell_px": 448 / 0.2525, "n_bad": 0}
ODD |= {"magnifications": [5, 10, 20], "origin": [100.0, 37.0], "width": 40000, "height": 30000}
CONFIG = mixmag.Config(6, region=2, width=16, depth=1, heads=2)
MACHINE = machine_of()


def write_like(slide, folder, features=None, **changes):
    """A copy of a slide with other features or metadata, in another DATA folder."""
    kept = [name for name in data.FIELDS if name not in ("format", "created", "sha256")]
    meta = {**{name: slide.meta[name] for name in kept}, **changes}
    features = np.array(slide.features if features is None else features)
    path = folder / "slides" / f"{meta['slide_id']}.safetensors"
    data.write_slide(path, features, slide.cells, slide.valid, meta)


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """DATA: a slide with holes and invalid tokens, one of many windows, an empty one, one with a
    NaN, and one that is cut short; two exported encoders of different weights."""
    folder = tmp_path_factory.mktemp("odd")
    rng = np.random.default_rng(5)
    holes = {(1, 0), (4, 2), (5, 3), (6, 0), (6, 1), (6, 3)}
    cells = {
        "holes": [(c, r) for c in range(7) for r in range(4) if (c, r) not in holes],
        "many": [(c + 3, r) for c in range(20) for r in range(14)],
        "empty": [],
        "poisoned": [(0, 0), (1, 0), (0, 1), (1, 1)],
    }
    for slide_id, places in cells.items():
        C = len(places)
        features = rng.standard_normal((C, 21, 6)).astype(np.float16)
        valid = rng.random((C, 21)) > 0.1 * (slide_id == "holes")
        if slide_id == "poisoned":
            features[0, 3] = np.nan
        path = folder / "slides" / f"{slide_id}.safetensors"
        places = np.array(places, np.int32).reshape(-1, 2)
        data.write_slide(path, features, places, valid, {"slide_id": slide_id, **ODD})
    path.with_stem("cut").write_bytes(path.read_bytes()[:2000])
    slide = read_slide(folder, "many")
    for seed in (0, 1):
        torch.manual_seed(seed)
        encoder = mixmag.MixingEncoder(CONFIG)
        pretrained = SimpleNamespace(folder=folder / f"run{seed}")
        train.export_encoder(pretrained, encoder, slide, "small", [], [])
    return folder


def edges(slide, col, row, side):
    """The box of a place on a lattice, rounded edge by edge."""
    x, y = slide.meta["origin"]
    box = (x + col * side, y + row * side, x + (col + 1) * side, y + (row + 1) * side)
    return tuple(int(np.round(edge)) for edge in box)


def brute_force(slide, region=2, magnifications=(0, 1, 2)):
    """Every valid token of every half covered window, by loops over cells that use no function of
    the project: [(window, k, (col, row), box, token)] and of each window (x, valid, corner)."""
    row_of = {tuple(cell): i for i, cell in enumerate(slide.cells.tolist())}
    tokens = []
    windows = []
    for row in range(0, 40, region):
        for col in range(0, 40, region):
            inside = [(col + c, row + r) for r in range(region) for c in range(region)]
            if sum(cell in row_of for cell in inside) < 0.5 * region**2:
                continue
            x = []
            valid = []
            for k in magnifications:
                n = 2**k
                for r in range(region * n):
                    for c in range(region * n):
                        cell = row_of.get((col + c // n, row + r // n))
                        entry = (0, 1, 5)[k] + (r % n) * n + c % n
                        valid.append(cell is not None and bool(slide.valid[cell, entry]))
                        x.append(np.zeros(slide.dim, np.float16))
                        if valid[-1]:
                            x[-1] = slide.features[cell, entry]
                            place = (col * n + c, row * n + r)
                            box = edges(slide, *place, slide.meta["cell_px"] / n)
                            tokens.append((len(windows), k, place, box, len(x) - 1))
            windows.append((np.stack(x), np.array(valid), (col, row)))
    return tokens, windows


def brute_force_regions(slide, region=2):
    """As `brute_force`, with a region in place of its tokens."""
    _, windows = brute_force(slide, region)
    side = region * slide.meta["cell_px"]
    places = [(col // region, row // region) for _, _, (col, row) in windows]
    return [(w, 0, place, edges(slide, *place, side), 0) for w, place in enumerate(places)]


# ---------------------------------------------------------------------------------- embed, predict
def embed(odd, out, *slides, init="run0", **flags):
    return train.embed(odd / init, out, odd, slides=slides or ("holes", "many"), **flags)


def read_trident(folder, slide_id, name, magnification, px, side):
    """A reader of TRIDENT's files as its documentation describes them: features and coords.
    Patho-Bench takes the level-0 side from the attributes."""
    base = folder / f"{magnification}x_{px}px_0px_overlap"
    with h5py.File(base / f"features_{name}" / f"{slide_id}.h5") as file:
        features = file["features"]
        coords = file["coords"]
        assert features.dtype == np.float32
        assert coords.dtype == np.int64
        assert features.attrs["encoder"] == name
        found = dict(coords.attrs)
        assert found["patch_size"] == px
        assert found["patch_size_level0"] == round(side)
        assert found["target_magnification"] == magnification
        assert px * found["level0_magnification"] / magnification == pytest.approx(side)
        assert (found["overlap"], found["name"]) == (0, slide_id)
        assert (found["level0_width"], found["level0_height"]) == (40000, 30000)
        assert isinstance(found["savetodir"], str)
        return features[:], coords[:].tolist()


def test_embed_writes_what_trident_readers_want(odd, tmp_path):
    """Both kinds of outputs equal the encoder applied window by window, row for row."""
    assert embed(odd, tmp_path, tokens="patch") == 0
    assert embed(odd, tmp_path, tokens="cls") == 0
    encoder = mixmag.load_encoder(odd / "run0" / "encoder")
    for slide in data.read_slides(odd, ["holes", "many"]):
        tokens, windows = brute_force(slide)
        outputs = []
        for x, valid, _ in windows:
            with torch.no_grad():
                outputs.append(encoder(torch.tensor(x)[None], valid=torch.tensor(valid)[None]))
        for k, m in enumerate((5, 10, 20)):
            side = ODD["cell_px"] / 2**k
            features, coords = read_trident(tmp_path, slide.slide_id, "mixmag_patch", m, 224, side)
            mine = [token for token in tokens if token[1] == k]
            assert coords == [list(box[:2]) for _, _, _, box, _ in mine]
            expected = [outputs[w][1][0, i].numpy() for w, _, _, _, i in mine]
            assert np.allclose(features, np.reshape(expected, (-1, 16)), atol=1e-5)
        side = 2 * ODD["cell_px"]
        features, coords = read_trident(tmp_path, slide.slide_id, "mixmag_cls", 5, 448, side)
        assert coords == [list(box[:2]) for _, _, _, box, _ in brute_force_regions(slide)]
        expected = [cls.flatten().numpy() for cls, _ in outputs]
        assert np.allclose(features, np.reshape(expected, (-1, 64)), atol=1e-5)
        assert slide.slide_id == "holes" or len(windows) > 64  # more than the encoder takes at once


def test_embed_goes_on_and_refuses_to_mix(odd, tmp_path):
    """Files of the same encoder and slide stay; what is missing or damaged comes back."""
    assert embed(odd, tmp_path, "holes", tokens="patch") == 0
    paths = sorted(tmp_path.rglob("holes.h5"))
    before = [path.read_bytes() for path in paths]
    times = [path.stat().st_mtime_ns for path in paths]
    embed(odd, tmp_path, "holes", tokens="patch")
    assert [path.stat().st_mtime_ns for path in paths] == times
    paths[0].unlink()
    paths[1].write_bytes(before[1][:300])
    embed(odd, tmp_path, "holes", tokens="patch")
    assert [path.read_bytes() for path in paths] == before
    paths[0].unlink()  # what is missing is no reason to write over the others
    for other in ({"init": "run1"}, {"min_cover": 1.0}):
        with pytest.raises(data.OtherSettings, match="was made otherwise: .*give another --out"):
            embed(odd, tmp_path, "holes", tokens="patch", **other)
    assert [path.read_bytes() for path in paths[1:]] == before[1:]


def test_a_slide_that_cannot_be_embedded_costs_itself(odd, tmp_path, capsys):
    assert embed(odd, tmp_path, "holes", "poisoned", "empty", "cut") == 3
    reasons = failures(tmp_path / "failed.csv")
    assert "not finite" in reasons["poisoned"]
    assert "no cells" in reasons["empty"]
    assert "cannot be read" in reasons["cut"]
    said = capsys.readouterr().out
    assert "3 failed" in said and "1 of 26 cells are not read (see --min-cover)" in said
    assert [path.name for path in tmp_path.rglob("*.h5")] == ["holes.h5"]
    embed(odd, tmp_path / "all", "holes", min_cover=0.0)
    assert "--min-cover" not in capsys.readouterr().out
    assert embed(odd, tmp_path, "holes") == 0
    assert not (tmp_path / "failed.csv").exists()


def test_a_full_disk_costs_the_slides_that_do_not_fit(odd, tmp_path):
    """HDF5 would end the whole process; a limit on files' sizes stands in for the disk."""
    flags = ("--data", odd, "--out", tmp_path, "--slides", "many", "holes")
    run("train.py embed --init", odd / "run0", *flags, cwd=tmp_path, code=3, RLIMIT_FSIZE=16000)
    assert "cannot be written" in failures(tmp_path / "failed.csv")["many"]
    assert {path.name for path in tmp_path.rglob("*.*5*")} == {"holes.h5"}


@pytest.fixture(scope="module")
def tuned(odd):
    """A fine-tuned run on the odd slides, with random weights."""
    torch.manual_seed(4)
    model = mixmag.SlideClassifier(CONFIG, mixmag.MixingEncoder(CONFIG), hidden=8)
    folder = odd / "tuned"
    folder.mkdir()
    settings = {"init": "random", "tokens": "patch", "magnification": "all", "hidden": 8}
    settings |= {"data": str(odd), "amp": "off", "min_cover": 0.5, "tile_encoder": "odd"}
    data.write_json(folder / "config.json", {**settings, "model": CONFIG.to_dict()})
    data.write_json(folder / "result.json", {"case_score": "max", "classes": data.BINARY})
    train.save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def test_predict_scores_what_it_can_and_lists_the_rest(odd, tuned, tmp_path, capsys):
    out = tmp_path / "p.csv"
    assert train.predict(tuned, odd, out=out) == 3
    rows = data.read_csv(out, ("slide_id", "score"))
    assert [row["slide_id"] for row in rows] == ["holes", "many"]
    assert all(0 < float(row["score"]) < 1 for row in rows)
    reasons = failures(tmp_path / "p-failed.csv")
    assert "no cells" in reasons["empty"]
    assert "not finite" in reasons["poisoned"]
    assert "cannot be read" in reasons["cut"]
    said = capsys.readouterr().out
    assert "2 slides scored" in said and "1 of 306 cells are not read (see --min-cover)" in said
    assert train.predict(tuned, odd, ["many"], out) == 0
    assert [row["slide_id"] for row in data.read_csv(out, ("slide_id",))] == ["many"]
    assert not (tmp_path / "p-failed.csv").exists()


@pytest.mark.parametrize("damage", ["model.safetensors", "config.json", "cut short", "embeddings"])
def test_a_run_that_cannot_be_used_is_refused(odd, tuned, tmp_path, damage):
    shutil.copytree(tuned, tmp_path / "r")
    weights = tmp_path / "r" / "model.safetensors"
    if damage == "cut short":
        weights.write_bytes(weights.read_bytes()[:200])
    elif damage == "embeddings":
        config = data.read_json(tmp_path / "r" / "config.json")
        data.write_json(tmp_path / "r" / "config.json", {**config, "tile_encoder": "other"})
    else:
        (tmp_path / "r" / damage).unlink()
    with pytest.raises(MixmagError, match=str(tmp_path / "r")):
        train.predict(tmp_path / "r", odd, ["many"])


# ------------------------------------------------------------------------------------------ heatmap
def expected_pooling(model, windows):
    """The pooled tokens' attention and the slide's score, by the formulas of the paper."""
    x = torch.tensor(np.stack([x for x, _, _ in windows]))
    valid = torch.tensor(np.stack([valid for _, valid, _ in windows]))
    with torch.no_grad():
        if model.encoder is None:
            h = model.standardize(x)[valid]
        else:
            cls, tokens = model.encoder(x, model.index.expand(len(x), -1), valid)
            h = cls.flatten(1) if model.tokens == "cls" else tokens[valid]
        gate = torch.tanh(model.pool.V(h)) * torch.sigmoid(model.pool.U(h))
        attention = model.pool.w(gate).flatten().softmax(0)
        return attention.numpy(), torch.sigmoid(model.head(attention @ h)).item()


def figure_of(monkeypatch, *args):
    """The figure that `draw_attention` would write."""
    figures = []
    monkeypatch.setattr(train, "whole_file", contextlib.nullcontext)
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **settings: figures.append(figure))
    train.draw_attention(None, *args)
    return figures[0]


def painted(table, k, monkeypatch):
    """What `draw_attention` paints: {box in level-0 px: value}."""
    view = (0, 0, 40000, 30000)
    figure = figure_of(monkeypatch, table, k, np.zeros((2, 2)), view[2:], view, "title")
    axis = figure.axes[0]
    squares = axis.collections[0]
    values = {}
    for path, value in zip(squares.get_paths(), squares.get_array(), strict=True):
        corners = np.round(path.vertices / ODD["mpp"]).astype(int)
        values[(*corners.min(axis=0).tolist(), *corners.max(axis=0).tolist())] = value
    assert axis.get_xlim() == pytest.approx((0, 10100))
    assert axis.get_ylim() == pytest.approx((7575, 0))
    return values


@pytest.mark.parametrize(
    "init, tokens", [("none", "patch"), ("random", "patch"), ("random", "cls")]
)
@pytest.mark.parametrize("magnification", ["all", 5, 10, 20])
def test_attention_lies_where_loops_put_it(odd, init, tokens, magnification, monkeypatch):
    """Order, places, weights, ratios, ranks and pictures of every kind of run, against loops."""
    torch.manual_seed(3)
    encoder = None if init == "none" else mixmag.MixingEncoder(CONFIG)
    model = mixmag.SlideClassifier(CONFIG, encoder, tokens, magnification, hidden=8).eval()
    slide = read_slide(odd, "holes")
    dataset = train.one_case_per_slide(model, [slide], 0.5)
    table, score = train.attention_places(model, dataset, MACHINE)
    magnifications = (0, 1, 2)
    if magnification != "all":
        magnifications = ((5, 10, 20).index(magnification),)
    expected, windows = brute_force(slide, magnifications=magnifications)
    attention, expected_score = expected_pooling(model, windows)
    if tokens == "cls":
        expected = brute_force_regions(slide)
    assert score == pytest.approx(expected_score, abs=1e-5)
    columns = (table.window, table.k, map(tuple, table.place.tolist()), table.box.tolist())
    found = [(w, k, place, tuple(box)) for w, k, place, box in zip(*columns, strict=True)]
    assert found == [token[:4] for token in expected]
    assert table.region.tolist() == [[i // 2 for i in windows[w][2]] for w, *_ in expected]
    assert np.allclose(table.weights["attention"], attention, atol=1e-6)
    assert table.weights["attention"].sum() == pytest.approx(1, abs=1e-6)
    for k in set(table.k.tolist()):
        here = table.k == k
        weights = table.weights["attention"][here]
        smaller = (weights < weights[:, None]).sum(axis=1)
        equal = (weights == weights[:, None]).sum(axis=1)
        assert np.allclose(table.weights["rank"][here], (smaller + (equal + 1) / 2) / len(weights))
        boxes = map(tuple, table.box[here].tolist())
        assert np.allclose(table.weights["ratio"][here], weights / weights.mean())
        values = dict(zip(boxes, table.weights["ratio"][here], strict=True))
        assert painted(table, k, monkeypatch) == pytest.approx(values)


def test_a_map_is_as_dramatic_as_its_weights(odd, tmp_path, monkeypatch):
    """Nearly even weights leave glass white. The caption says what was not read, and no text is
    cut off where a name is long and a slide narrow."""
    model = mixmag.SlideClassifier(CONFIG, mixmag.MixingEncoder(CONFIG))
    dataset = train.one_case_per_slide(model, [read_slide(odd, "many")], 0.5)
    table, _ = train.attention_places(model, dataset, MACHINE)
    glass = np.full((30, 40), 245)
    view = (0, 0, 40000, 30000)
    pictures = []
    for ratio in (1.0, 1.1, 20.0):
        table.weights["ratio"][:] = ratio
        train.draw_attention(tmp_path / "m.png", table, 2, glass, view[2:], view, "title")
        with Image.open(tmp_path / "m.png") as picture:
            pictures.append(np.asarray(picture.convert("RGB"), float)[100:])  # below the title
    plain, even, strong = pictures
    assert np.abs(even - plain).max() < 60 and np.abs(strong - plain).max() > 150
    title = train.textwrap.fill("x" * 200, 60)
    figure = figure_of(monkeypatch, table, 2, None, view[2:], (0, 0, 900, 30000), title)
    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    assert any("not read; see tile --min-tissue" in text.get_text() for text in texts)
    for text in texts:
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.y0 >= 0 and (box.max <= figure.bbox.max).all(), text


@pytest.fixture(scope="module")
def pictured(tmp_path_factory):
    """A synthetic slide image of 3 x 2 cells, tiled; slides like it with labels; runs fine-tuned on
    them: after pretraining, with its class tokens, and without an encoder."""
    folder = tmp_path_factory.mktemp("pictured")
    synth_picture = data.synth_picture
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "synth_picture", lambda rng, *_: synth_picture(rng, 1900, 2800))
        data.synth_images(folder / "images", 1, 6)
    run("data.py tile --slides images --out d --region 2", cwd=folder)
    slide = read_slide(folder / "d", "synthetic-000")
    rng = np.random.default_rng(0)
    rows = [("c", slide.slide_id, 1, "test"), ("c0", "s0", 0, "test")]
    for i in range(9):
        label = i % 2
        features = slide.features[rng.permutation(len(slide.cells))] + np.float16(0.2 * label)
        write_like(slide, folder / "d", features, slide_id=f"s{i}")
        if i > 0:
            rows.append((f"c{i}", f"s{i}", label, "train" if i < 5 else "tune"))
    data.write_csv(folder / "d/tasks/t.csv", ("case_id", "slide_id", "label", "split"), rows)
    common = {"data": str(folder / "d"), "region": 2, "batch_size": 4}
    mem = str(folder / "mem")
    train.pretrain(train.PretrainConfig(steps=4, holdout=0.0, out=mem, **common))
    kinds = {
        "patch": {"init": mem},
        "cls": {"init": mem, "tokens": "cls"},
        "none": {"init": "none", "magnification": 20},
    }
    for name, settings in kinds.items():
        out = str(folder / name)
        train.finetune(train.FinetuneConfig(task="t", epochs=1, out=out, **common, **settings))
    return folder


def heatmap(pictured, name, **flags):
    return train.heatmap(pictured / name, "synthetic-000", **flags)


def read_geojson(path):
    """What QuPath asks for: strict JSON, closed rectangles of whole numbers."""
    found = json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(word))
    assert found["type"] == "FeatureCollection"
    for feature in found["features"]:
        assert feature["type"] == "Feature"
        assert feature["geometry"]["type"] == "Polygon"
        (ring,) = feature["geometry"]["coordinates"]
        (left, top), _, (right, bottom), _, _ = ring
        assert ring == [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
        assert {type(edge) for edge in (left, top, right, bottom)} == {int}
        properties = feature["properties"]
        assert properties["objectType"] == "detection"
        assert {type(value) for value in properties["color"]} == {int}
        assert {type(value) for value in properties["measurements"].values()} == {float}
    return found


def test_heatmap_of_a_slide_image(pictured, tmp_path, capsys, monkeypatch):
    """Pictures, CSV and GeoJSON of each magnification, which follow from run and slide alone."""
    image = pictured / "images/synthetic-000.tiff"
    assert heatmap(pictured, "patch", image=image, out=tmp_path / "a") == 0
    said = capsys.readouterr().out
    monkeypatch.setattr(train, "draw_attention", lambda *_: None)
    heatmap(pictured, "patch", out=tmp_path / "b")
    rule = data.read_json(pictured / "patch/result.json")["case_score"]
    assert f"a case's score is the {rule} over its slides" in said
    assert "no evidence of causality" in said
    maps = [f"attention-{m}x.{suffix}" for m in (5, 10, 20) for suffix in ("png", "geojson")]
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {"attention.csv", "regions.png", *maps}
    rows = data.read_csv(tmp_path / "a" / "attention.csv", ())
    places = [tuple(int(r[n]) for n in ("magnification", "col", "row", "x", "y")) for r in rows]
    expected, _ = brute_force(read_slide(pictured / "d", "synthetic-000"))
    assert places == [((5, 10, 20)[k], *place, *box[:2]) for _, k, place, box, _ in expected]
    assert sum(float(r["attention"]) for r in rows) == pytest.approx(1, abs=1e-6)
    assert {float(r["side"]) for r in rows} == {896.0, 448.0, 224.0}
    train.predict(pictured / "patch", pictured / "d", ["synthetic-000"], tmp_path / "p.csv")
    (predicted,) = data.read_csv(tmp_path / "p.csv", ("slide_id", "score"))
    assert f"score {float(predicted['score']):.4f};" in said
    with Image.open(tmp_path / "a" / "regions.png") as picture:
        assert picture.width >= 550  # also of a slide with one region
    for m in (5, 10, 20):
        name = f"attention-{m}x.geojson"
        found = read_geojson(tmp_path / "a" / name)
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        mine = [r for r in rows if r["magnification"] == str(m)]
        for row, feature in zip(mine, found["features"], strict=True):
            corner = feature["geometry"]["coordinates"][0][0]
            assert corner == [int(row["x"]), int(row["y"])]
            attention = feature["properties"]["measurements"]["attention"]
            assert attention == float(row["attention"])
        with Image.open(tmp_path / "a" / f"attention-{m}x.png") as picture:
            pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
            assert min(picture.size) > 400
            assert len(np.unique(pixels, axis=0)) > 500


@pytest.mark.parametrize("name, label", [("cls", "regions"), ("none", "20x")])
def test_heatmap_without_an_image_and_of_other_runs(pictured, tmp_path, name, label):
    """Cells begin at the corner of the bounds, so QuPath's pixels are known without the image."""
    slide = read_slide(pictured / "d", "synthetic-000")
    write_like(slide, tmp_path, origin=[64.0, 32.0])
    out = tmp_path / "out"
    heatmap(pictured, name, folder=tmp_path, out=out)
    found = {path.name for path in out.iterdir()}
    assert found == {"attention.csv", f"attention-{label}.png", f"attention-{label}.geojson"}
    tokens, windows = brute_force(slide, magnifications=(2,))
    rows = data.read_csv(out / "attention.csv", ())
    assert len(rows) == len(windows if name == "cls" else tokens)
    features = read_geojson(out / f"attention-{label}.geojson")["features"]
    for row, feature in zip(rows, features, strict=True):
        corner = feature["geometry"]["coordinates"][0][0]
        assert corner == [int(row["x"]) - 64, int(row["y"]) - 32]


def test_heatmap_subtracts_bounds_and_survives_a_broken_image(pictured, tmp_path, monkeypatch):
    """MIRAX slides say where their tissue lies, and QuPath cuts them to it. Of an image that cannot
    be read the tables are there already."""

    class Bounded(data.Reader):
        bounds = (64, 32, 2000, 1500)

    drawn = []
    monkeypatch.setattr(train, "draw_regions", lambda *_: None)
    monkeypatch.setattr(train, "draw_attention", lambda *arguments: drawn.append(arguments))
    image = pictured / "images/synthetic-000.tiff"
    heatmap(pictured, "none", image=image, out=tmp_path / "plain")
    monkeypatch.setattr(data, "Reader", Bounded)
    heatmap(pictured, "none", image=image, out=tmp_path / "bounded")
    assert [size for *_, size, _, _ in drawn] == [(2800, 1900)] * 2
    assert [bounds for *_, bounds, _ in drawn] == [(0, 0, 2800, 1900), (64, 32, 2000, 1500)]
    for _, _, _, picture, *_ in drawn:
        assert picture.shape[1] / picture.shape[0] == pytest.approx(2800 / 1900, rel=0.01)
    plain = read_geojson(tmp_path / "plain" / "attention-20x.geojson")
    bounded = read_geojson(tmp_path / "bounded" / "attention-20x.geojson")
    for a, b in zip(plain["features"], bounded["features"], strict=True):
        moved = np.subtract(a["geometry"]["coordinates"], b["geometry"]["coordinates"])
        assert (moved == [64, 32]).all()

    monkeypatch.undo()
    monkeypatch.setattr(data.Reader, "read", Mock(side_effect=data.SlideReadError("torn")))
    with pytest.raises(data.SlideReadError, match="torn"):
        heatmap(pictured, "none", image=image, out=tmp_path / "torn")
    names = {path.name for path in (tmp_path / "torn").iterdir()}
    assert {"attention.csv", "attention-20x.geojson"} <= names


def test_top_regions_are_those_of_the_highest_sum(odd, tmp_path, monkeypatch):
    """Six regions, and in each its best tile per magnification: what is drawn, against a loop."""
    slide = read_slide(odd, "many")
    tokens, windows = brute_force(slide)
    model = mixmag.SlideClassifier(CONFIG, mixmag.MixingEncoder(CONFIG))
    places = train.output_places(model, train.one_case_per_slide(model, [slide], 0.5), "many")
    weight = np.random.default_rng(2).random(len(tokens)) ** 4
    places.weights = {"attention": weight}
    reader = Mock(["level_for", "read"], size=(40000, 30000))
    reader.level_for.return_value = 0
    reader.read.return_value = (Image.new("RGB", (8, 8)), (0, 0, 8, 8))
    outlined = []

    def plot(axis, x, y, **style):
        outlined.append((x[0], y[0], x[2], y[2]))
        return axis.add_line(Line2D(x, y, **style))

    monkeypatch.setattr("matplotlib.axes.Axes.plot", plot)
    train.draw_regions(tmp_path / "r.png", places, reader)
    cut = [call.args[1] for call in reader.read.call_args_list]
    sums = np.zeros(len(windows))
    best = {}
    for token, value in zip(tokens, weight, strict=True):
        window, k, _, box, _ = token
        sums[window] += value
        if value > best.get((window, k), (0, None))[0]:
            best[window, k] = (value, box)
    regions = brute_force_regions(slide)
    chosen = sorted(range(len(windows)), key=lambda window: -sums[window])[:6]
    assert np.allclose(cut, [regions[window][3] for window in chosen], atol=0.5)
    assert outlined == [best[window, k][1] for window in chosen for k in range(3)]
    assert (tmp_path / "r.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "width, changes, message",
    [
        (2688, {"size_known": False}, ""),
        (2900, {"size_known": False}, ""),
        (2688, {"size_known": True}, "not the same slide"),
        (2688, {"size_known": False, "cell_px": 1792.0}, "not the same slide"),
    ],
)
def test_the_image_gives_the_size_that_import_could_not_know(
    pictured, tmp_path, monkeypatch, width, changes, message
):
    """STAMP's files do not say how large a slide is. An image is refused where a tile would begin
    beyond it, or where the size is known and another. The loaded slide stays as it is."""
    slide = read_slide(pictured / "d", "synthetic-000")
    write_like(slide, tmp_path, width=width, height=1792, **changes)
    loaded = data.read_slides(tmp_path)
    monkeypatch.setattr(data, "read_slides", lambda *_: loaded)
    image = pictured / "images/synthetic-000.tiff"
    flags = {"folder": tmp_path, "image": image, "out": tmp_path / "out"}
    if message:
        with pytest.raises(MixmagError, match=message):
            heatmap(pictured, "none", **flags)
        assert not (tmp_path / "out").exists()
    else:
        assert heatmap(pictured, "none", **flags) == 0
        assert (tmp_path / "out" / "regions.png").exists()
    assert (loaded[0].meta["width"], loaded[0].meta["height"]) == (width, 1792)
