"""The tiler: slides, mpp, tissue, cells, encoders.     python -m pytest tests/test_tiler.py"""

import csv
import io
import itertools
import json
import os
import struct
import subprocess
import sys

import numpy as np
import openslide
import pytest
import safetensors
import torch
from bench import jpeg_tiles, tile_sparse, write_jpeg_tiff
from conftest import ROOT, run
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage
from scipy.spatial import cKDTree
from test_import import Trap

import data
from data import MixmagError
from mixmag import Geometry


# ------------------------------------------------------------------------------------------------------------- the tiler
class Args:
    """What plan_slide and friends read of the command line."""

    mpp, region, magnifications, min_tissue, batch_size, device = (
        None,
        3,
        [5, 10, 20],
        0.25,
        64,
        torch.device("cpu"),
    )
    manifest, mask, mpp_from_power = {}, None, False

    def __init__(self, **changes):
        vars(self).update(changes)


def write_tiff(path, picture, mpp, levels=(1,), tile=(256, 256)):
    import tifffile

    with tifffile.TiffWriter(path) as tiff:
        for i, shrink in enumerate(levels):
            small = np.asarray(Image.fromarray(picture).reduce(shrink)) if shrink > 1 else picture
            resolution = None if mpp is None else (1e4 / mpp / shrink,) * 2
            tiff.write(
                small,
                tile=tile,
                photometric="rgb",
                compression="zlib",
                subfiletype=int(i > 0),
                resolution=resolution,
                resolutionunit="CENTIMETER" if mpp else None,
            )
    return path


def pink(height, width, seed=0):
    rng = np.random.default_rng(seed)
    small = rng.integers(80, 200, (height // 32 + 1, width // 32 + 1, 3), dtype=np.uint8)
    small[..., 1] //= 2
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def test_otsu_equals_the_definition():
    rng = np.random.default_rng(0)
    for _ in range(20):
        values = np.clip(
            np.concatenate([rng.normal(40, 15, 300), rng.normal(170, 20, 80)]), 0, 255
        ).astype(np.uint8)

        def between(t):
            low, high = values[values <= t].astype(float), values[values > t].astype(float)
            return (
                len(low) * len(high) * (low.mean() - high.mean()) ** 2
                if len(low) and len(high)
                else 0.0
            )

        best = max(between(t) for t in range(256))
        assert between(data.otsu(values)) == pytest.approx(best)
    assert data.otsu(np.full(10, 7, np.uint8)) == 0


def area_mean(picture, left, top, right, bottom, n):
    """The definition: (n, n, 3) floats, each the mean of a picture over its own part of a box, pixels counted by their share."""

    def weights(size, begin, end):
        edges, p = begin + (end - begin) * np.arange(n + 1) / n, np.arange(size)
        return (
            np.clip(np.minimum(edges[1:, None], p + 1) - np.maximum(edges[:-1, None], p), 0, None)
            * n
            / (end - begin)
        )

    (y0, y1), (x0, x1) = (
        (max(0, int(lo) - 1), int(hi) + 2) for lo, hi in ((top, bottom), (left, right))
    )
    part = picture[y0:y1, x0:x1].astype(float)
    return np.einsum(
        "ai,ijc,bj->abc",
        weights(part.shape[0], top - y0, bottom - y0),
        part,
        weights(part.shape[1], left - x0, right - x0),
        optimize=True,
    )


@pytest.mark.parametrize("mpp", [0.5, 0.2525, 0.4991, 0.37])
def test_tiles_are_the_right_pixels(tmp_path, mpp):
    """Each tile is the area mean of its own exact box of level 0, and not of a box one pixel of the tile further."""
    side = 4 * int(2.3 * 112 / mpp)
    picture = pink(side, side)
    reader = data.Reader(write_tiff(tmp_path / "s.tiff", picture, mpp, levels=(1, 2, 4)))
    plan = data.plan_slide(reader, Args(min_tissue=0.0))
    assert plan.cell_px == pytest.approx(448 / mpp, rel=1e-6) and plan.windows == [(0, 0, 2, 2)]
    tiles = data.read_window(reader, plan, plan.windows[0])
    assert tiles.shape == (4, 21, 224, 224, 3)
    cell_table = Geometry(1).cell_table().tolist()

    def error(cell, entry, dx, dy):
        k, r, c = cell_table[entry]
        step = plan.cell_px / 2**k
        left, top = (
            (a * plan.cell_px + b * step + d * step / 224)
            for a, b, d in ((cell % 2, c, dx), (cell // 2, r, dy))
        )
        return np.abs(
            area_mean(picture, left, top, left + step, top + step, 224) - tiles[cell, entry]
        )[2:-2, 2:-2].mean()

    for cell in (0, 1, 3):
        for entry in (0, 2, 3, 9, 20):
            here = error(cell, entry, 0, 0)
            assert all(
                here < error(cell, entry, dx, dy) for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1))
            )


@pytest.mark.parametrize(
    "scale, levels",
    [
        (1, (1,)),
        (1.005, (1,)),
        (1.26, (1,)),
        (2, (1,)),
        (2.01, (1,)),
        (4, (1,)),
        (2, (1, 2)),
        (4, (1, 2, 4)),
        (4.02, (1, 4)),
    ],
)
def test_tiles_are_area_means(tmp_path, scale, levels):
    """Every pixel against the definition in floats, on the level that is read, with noise in it. 10x is the mean of what was rounded at
    20x, and Pillow rounds a half up: hence a bias below half a grey level."""
    rng, side = np.random.default_rng(0), 4 * int(1.1 * 112 * scale)
    picture = np.clip(
        pink(side, side).astype(float) + rng.normal(0, 10, (side, side, 3)), 0, 255
    ).astype(np.uint8)
    reader = data.Reader(write_tiff(tmp_path / "s.tiff", picture, 0.5 / scale, levels=levels))
    plan = data.plan_slide(reader, Args(magnifications=[10, 20], min_tissue=0.0, mpp=0.5 / scale))
    assert plan.downsample == max(n for n in levels if n <= scale)
    tiles = data.read_cell(reader, plan, 0, 0)
    source = np.asarray(Image.fromarray(picture).reduce(int(plan.downsample)))
    xs, ys = ([data.tile_edges(lines[:2], k) for k in range(2)] for lines in plan.lines)
    for entry, (k, r, c) in enumerate(Geometry(1, [10, 20]).cell_table().tolist()):
        off = tiles[entry] - area_mean(source, xs[k][c], ys[k][r], xs[k][c + 1], ys[k][r + 1], 224)
        assert abs(off.mean()) < 0.5 and np.abs(off).mean() < 0.8, (
            entry,
            off.mean(),
            np.abs(off).mean(),
        )
    parent = (
        tiles[1:].reshape(2, 2, 224, 224, 3).swapaxes(1, 2).reshape(224, 2, 224, 2, 3)
    )  # a tile is the mean of its children
    assert np.abs(parent.mean(axis=(1, 3)) - tiles[0]).max() <= 0.5


def tables_and_rest(jpeg: bytes) -> tuple[bytes, bytes]:
    """A JPEG picture as a scanner's TIFF holds it: its quantisation and Huffman tables, and the picture without them; Adobe's marker is left out."""
    tables, rest, at = b"", b"", 2
    while jpeg[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        if jpeg[at + 1] in (0xDB, 0xC4):
            tables += jpeg[at:end]
        elif jpeg[at + 1] != 0xEE:
            rest += jpeg[at:end]
        at = end
    return b"\xff\xd8" + tables + b"\xff\xd9", b"\xff\xd8" + rest + jpeg[at:]


def write_jpeg(path, picture, levels=(1,), side=256, rgb=False, shared=False, says=None):
    """A tiled JPEG TIFF; `shared`: its tiles share their tables; `says`: its photometric tag, whatever the truth."""
    pages, settings = [], {"keep_rgb": True, "subsampling": "4:4:4"} if rgb else {}
    for shrink in levels:
        small = np.asarray(Image.fromarray(picture).reduce(shrink)) if shrink > 1 else picture
        tables, tiles = zip(
            *(
                tables_and_rest(tile) if shared else (b"", tile)
                for tile in jpeg_tiles(small, side, **settings)
            )
        )
        pages.append((small.shape[1], small.shape[0], tiles))
    write_jpeg_tiff(path, pages, 0.5, side, says or (2 if rgb else 6), tables[0])
    return path


def noisy(height, width):
    rng = np.random.default_rng(height)
    return np.clip(pink(height, width) + rng.normal(0, 9, (height, width, 3)), 0, 255).astype(
        np.uint8
    )


def alone(path):
    """A reader that leaves everything to OpenSlide."""
    reader = data.Reader(path)
    reader.jpeg = {}
    return reader


def region_or_refusal(reader, *place):
    try:
        return reader.region(*place).tobytes()
    except openslide.OpenSlideError:
        return "refused"


@pytest.mark.parametrize(
    "form", [{}, {"shared": True}, {"rgb": True}, {"rgb": True, "shared": True}, {"side": 112}]
)
def test_jpeg_tiles_are_what_openslide_makes_of_them(tmp_path, form):
    """Every byte, in rectangles across the edges of tiles and at the borders of the slide."""
    path = write_jpeg(tmp_path / "s.tiff", noisy(904, 1200), levels=(1, 2, 4, 8), **form)
    reader, truth, rng = data.Reader(path), alone(path), np.random.default_rng(0)
    assert list(reader.jpeg) == [0, 1, 2, 3]
    for level, (width, height) in enumerate(reader.sizes):
        boxes = [
            np.sort(rng.integers(0, (width + 1, height + 1), (2, 2)), axis=0).ravel().tolist()
            for _ in range(20)
        ]
        for left, top, right, bottom in [
            (0, 0, width, height),
            (width - 1, height - 1, width, height),
            *boxes,
        ]:
            if left < right and top < bottom:
                assert np.array_equal(
                    reader.region(level, left, top, right, bottom),
                    truth.region(level, left, top, right, bottom),
                )


def test_jpeg_tiles_of_real_slides_are_what_openslide_makes_of_them(real):
    for path in sorted((real / "slides").glob("*.svs")):
        reader, truth = data.Reader(path), alone(path)
        assert (
            list(reader.jpeg) == ([0] if path.name.startswith("CMU") else [])
            and reader.slide.level_count >= 1
        )
        for level in reader.jpeg:
            assert np.array_equal(
                reader.region(level, 100, 50, 1300, 1700), truth.region(level, 100, 50, 1300, 1700)
            )


def test_a_level_of_an_odd_downsample_is_not_interpolated(tmp_path):
    """OpenSlide draws such a level at parts of a pixel; the pixels are those of the file."""
    picture, box = noisy(1024, 1030), (150, 100, 250, 250)
    reader = data.Reader(path := write_jpeg(tmp_path / "s.tiff", picture, levels=(1, 4)))
    assert reader.downsamples[1] % 1 > 0.9 and list(reader.jpeg) == [0, 1]
    first = next(jpeg_tiles(np.asarray(Image.fromarray(picture).reduce(4)), 256))
    assert np.array_equal(reader.region(1, *box)[..., :3], Image.open(io.BytesIO(first)).crop(box))
    assert 0 < np.abs(alone(path).region(1, *box).astype(int) - reader.region(1, *box)).mean() < 5


@pytest.mark.parametrize("wrong", ["colours", "lossless", "first tile"])
def test_what_is_no_plain_jpeg_is_left_to_openslide(tmp_path, wrong):
    path, picture = tmp_path / "s.tiff", noisy(600, 700)
    if wrong == "lossless":
        write_tiff(path, picture, 0.5)
    else:
        write_jpeg(path, picture, says=2 if wrong == "colours" else None)
    reader = data.Reader(spoil(path, 0) if wrong == "first tile" else path)
    assert reader.jpeg == {}
    assert np.array_equal(
        reader.region(0, 300, 300, 700, 500),
        openslide.OpenSlide(path).read_region((300, 300), 0, (400, 200)),
    )


@pytest.mark.parametrize(
    "odd",
    [
        "aperio, absent tile",
        "two pages of a size",
        "no picture",
        "no first picture",
        "tables as text",
        "grey",
        "rgb",
        "size",
    ],
)
def test_odd_jpeg_files_are_openslides_to_judge(tmp_path, odd):
    """One tile, page or tag that is not like the others: every place is what OpenSlide makes of it, or refused where it refuses."""
    import tifffile

    path, side, levels = tmp_path / "s.tiff", 128, []
    for n in (1, 4):
        small = np.asarray(Image.fromarray(noisy(1024, 1024)).reduce(n))
        levels.append((len(small), len(small), list(jpeg_tiles(small, side))))
    tiles = levels[0][2]
    [tiles[0]], [rgb], [less] = (
        jpeg_tiles(picture, len(picture), **settings)
        for picture, settings in (
            (np.full((side, side, 3), 240, np.uint8), {}),
            (noisy(side, side), {"keep_rgb": True, "subsampling": "4:4:4"}),
            (noisy(96, 96), {}),
        )
    )
    Image.fromarray(noisy(side, side)[..., 0]).save(grey := io.BytesIO(), "JPEG")
    if odd == "two pages of a size":
        levels.append((256, 256, [tiles[5], *levels[1][2][1:][::-1]]))
        levels[1] = levels[1][:2] + ([tiles[5], *levels[1][2][1:]],)
    else:
        number = 0 if odd == "no first picture" else 9
        tiles[number] = {
            "aperio, absent tile": b"",
            "no picture": b"\0\0" + tiles[9][2:],
            "no first picture": b"\0\0" + tiles[0][2:],
            "tables as text": tiles[9],
            "grey": grey.getvalue(),
            "rgb": rgb,
            "size": less,
        }[odd]
    write_jpeg_tiff(
        path,
        levels,
        0.5,
        side,
        tables=b"\xff\xd8\xff\xd9" * 4 if odd == "tables as text" else b"",
        description=b"Aperio Image Library v1" if "aperio" in odd else b"made for a test",
    )
    if odd == "tables as text":
        path.write_bytes(
            path.read_bytes().replace(
                struct.pack("<HHQ", 347, 7, 16), struct.pack("<HHQ", 347, 2, 16)
            )
        )
    truth, reader = alone(path), data.Reader(path)
    with tifffile.TiffFile(path) as tiff:
        assert len(tiff.pages) == len(levels) and (0 in reader.jpeg) == (
            odd in ("two pages of a size", "no picture", "grey", "rgb", "size")
        )
    for level, (width, _) in enumerate(reader.sizes):
        for left, top in itertools.product(range(0, width, side // 2), repeat=2):
            place = level, left, top, left + side // 2, top + side // 2
            assert region_or_refusal(reader, *place) == region_or_refusal(truth, *place), place


def test_damaged_jpeg_is_openslides_to_judge(tmp_path):
    """A tile with any byte changed, cut short or absent is refused where OpenSlide refuses it, and is what OpenSlide makes of it otherwise."""
    import tifffile

    path, rng, seen = (
        write_jpeg(tmp_path / "s.tiff", noisy(700, 700)),
        np.random.default_rng(0),
        set(),
    )
    whole = path.read_bytes()
    with tifffile.TiffFile(path) as tiff:
        start, length = tiff.pages[0].dataoffsets[4], tiff.pages[0].databytecounts[4]
    for how in ["flip", "noise", "zeros", "end"] * 40:
        file, at = bytearray(whole), int(rng.integers(start, start + length - 8))
        stop = {
            "flip": at + 1,
            "noise": min(at + 60, start + length),
            "zeros": start + length,
            "end": at + 2,
        }[how]
        file[at:stop] = {
            "flip": bytes([file[at] ^ 1 << rng.integers(8)]),
            "noise": rng.bytes(stop - at),
            "zeros": bytes(stop - at),
            "end": b"\xff\xd9",
        }[how]
        path.write_bytes(file)
        reader = data.Reader(path)
        assert list(reader.jpeg) == [0]
        found = region_or_refusal(reader, 0, 200, 200, 600, 600)
        assert found == region_or_refusal(alone(path), 0, 200, 200, 600, 600), (how, at - start)
        seen.add((how, found == "refused"))
        assert np.array_equal(
            reader.region(0, 0, 0, 256, 256), alone(path).region(0, 0, 0, 256, 256)
        )  # the neighbour
    assert {
        ("flip", True),
        ("flip", False),
        ("noise", True),
        ("zeros", True),
        ("end", True),
    } <= seen


@pytest.mark.parametrize(
    "tag, page, value, message",
    [
        ("TileByteCounts", 1, 2**42, f"one of its tiles would have {2**42} bytes"),
        ("TileWidth", 1, 2**28, f"one of its tiles would have {2**38} bytes"),
        (
            "ImageWidth",
            0,
            3000,
            "its 36 tiles of 256 x 256 px do not make a level of 3000 x 1400 px",
        ),
    ],
)
def test_tiles_beyond_all_measure_are_refused(
    tmp_path, monkeypatch, capsys, tag, page, value, message
):
    """OpenSlide would ask for that much memory, and end the process when there is none, or mix up the tiles; the other slides are tiled."""
    import tifffile

    write_tiff(tmp_path / "good.tiff", pink(1400, 1400), 0.5)
    with tifffile.TiffFile(
        write_jpeg(tmp_path / "bad.tiff", pink(1400, 1400), levels=(1, 2)), mode="r+b"
    ) as tiff:
        found = tiff.pages[page].tags[tag]
        found.overwrite((*found.value[:8], value) if tag == "TileByteCounts" else value)
    assert tile(monkeypatch, "--slides", tmp_path, "--out", tmp_path / "d") == 3
    assert message in capsys.readouterr().err
    assert [p.stem for p in (tmp_path / "d" / "slides").glob("*.safetensors")] == ["good"]


def test_openslide_is_never_asked_for_what_is_not_there(tmp_path, monkeypatch):
    """Every read of the thumbnail and of all cells, also those at the borders: an existing level, a positive size, and no pixel beyond the level's."""
    asked, read = [], openslide.OpenSlide.read_region

    def noted(slide, location, level, size):
        asked.append(level)
        assert 0 <= level < slide.level_count and min(size) >= 1 and min(location) >= 0
        scale = slide.level_downsamples[level]
        assert all(
            round(x / scale) + n <= whole
            for x, n, whole in zip(location, size, slide.level_dimensions[level])
        )
        return read(slide, location, level, size)

    monkeypatch.setattr(openslide.OpenSlide, "read_region", noted)
    rng = np.random.default_rng(9)
    for i in range(8):
        mpp = rng.uniform(0.2, 0.5)
        height, width = (448 / mpp * rng.uniform(1, 2, 2)).astype(int)
        path = write_tiff(
            tmp_path / f"{i}.tiff",
            pink(height, width, i),
            mpp,
            levels=[(1,), (1, 2, 4), (1, 3)][i % 3],
        )
        plan = data.plan_slide(data.Reader(path), Args(min_tissue=0.0, region=1))
        assert len(list(data.read_cells(data.Reader(path), plan))) == plan.cells > 0
    assert set(asked) == {0, 1, 2}


class Ramp:
    """A slide of any size and pyramid that stands in for data.Reader: its red grows along one axis, by one in 8 level-0 pixels from the
    corner of what is read, and its green falls as much, so that rounding cancels."""

    path, level_for, fits = data.Path("ramp"), data.Reader.level_for, data.Reader.fits

    def __init__(self, width, height, downsamples, **properties):
        self.slide, self.downsamples, self.axis = stub(**properties), downsamples, 0
        self.slide.dimensions, self.sizes = (
            (width, height),
            [(round(width / d), round(height / d)) for d in downsamples],
        )

    def region(self, level, left, top, right, bottom):
        scale = self.downsamples[level]
        self.corner = round(left * scale), round(top * scale)  # OpenSlide counts from here
        ramp = np.round((np.arange((right - left, bottom - top)[self.axis]) + 0.5) * scale / 8)
        rgba = np.full((bottom - top, right - left, 4), 255, np.uint8)
        rgba[..., 0] = ramp[None] if self.axis == 0 else ramp[:, None]
        rgba[..., 1] = 255 - rgba[..., 0]
        return rgba


def test_children_tile_their_parent_at_any_mpp(monkeypatch):
    """Random mpp and pyramids, odd downsamples among them, through the planner and the reader of cells: edges nest exactly, lie within a
    pixel of the finest magnification of where the lattice has them, and a tile's pixels show its own place."""
    rng = np.random.default_rng(0)
    monkeypatch.setattr(
        data,
        "tissue_mask",
        lambda reader, mpp, own: (
            None,
            np.zeros([int(n * mpp / 16) for n in reader.slide.dimensions[::-1]], bool),
        ),
    )
    pyramids = [
        (1.0,),
        (1.0, 2.0, 4.0),
        (1.0, 2.0005, 4.00013),
        (1.0, 3.9998, 15.9991),
        (1.0, 1.9999, 4.00013),
    ]
    for i in range(200):
        mpp = str(rng.uniform(0.2, 0.6))
        magnifications = [5, 10, 20] if float(mpp) <= 0.51 else [5, 10]
        reader = Ramp(
            *(int(v) for v in rng.integers(4000, 90000, 2)),
            pyramids[i % len(pyramids)],
            x=mpp,
            y=mpp,
        )
        plan = data.plan_slide(
            reader, Args(magnifications=magnifications, region=int(rng.integers(1, 4)))
        )
        finest = (
            10 / magnifications[-1] / plan.mpp
        )  # level-0 pixels per pixel of the finest magnification
        assert (
            plan.cell_px == pytest.approx(448 / float(mpp), rel=1e-12)
            and plan.downsample <= finest * 1.02
        )
        for axis, lines in enumerate(plan.lines):
            edges = [
                data.tile_edges(lines, k) * plan.downsample for k in range(len(magnifications))
            ]
            for k, e in enumerate(edges):
                assert (
                    np.abs(e - plan.cell_px / 2**k * np.arange(len(e))).max() <= finest
                    and (np.diff(e) > 0).all()
                )
                assert k == 0 or np.abs(e[::2] - edges[k - 1]).max() < 1e-6
        nesting, off, kept = data.lattice_error(plan)
        assert (
            nesting < 1e-6
            and off <= finest * plan.mpp
            and all(
                abs(v * m / 10 - 1) < 0.02 for m, pair in zip(magnifications, kept) for v in pair
            )
        )
        if i % 10 == 0:
            reader.axis, cell = (
                i // 10 % 2,
                [int(rng.integers(len(lines) - 1)) for lines in plan.lines],
            )
            red, green = (
                data.read_cell(reader, plan, *cell)[..., :2].astype(float).mean(axis=(1, 2)).T
            )
            places = np.array(
                Geometry(1, magnifications).cell_table().tolist()
            )  # (T, 3) level, row, col
            centre = (
                cell[reader.axis] + (places[:, 2 - reader.axis] + 0.5) / 2.0 ** places[:, 0]
            ) * plan.cell_px - reader.corner[reader.axis]
            assert np.abs((red + 255 - green) * 4 - centre).max() <= finest, (mpp, plan.downsample)


def stub(**properties):
    """A slide that says this of itself; mpp and unit stand for OpenSlide's names."""
    names = {
        "x": "openslide.mpp-x",
        "y": "openslide.mpp-y",
        "res_x": "tiff.XResolution",
        "res_y": "tiff.YResolution",
        "unit": "tiff.ResolutionUnit",
        "power": "openslide.objective-power",
    }
    return type("Stub", (), {"properties": {names[k]: v for k, v in properties.items()}})


@pytest.mark.parametrize(
    "said, given, power, expected",
    [
        (dict(x="0.25", y="0.25"), None, False, (0.25, "openslide.mpp-x")),
        (dict(x="0,25", y="0,25"), None, False, (0.25, "openslide.mpp-x")),
        (dict(x="0.5", y="0.509"), None, False, (0.5045, "openslide.mpp-x")),
        (dict(x="0.5", y="0.5", power="40"), None, True, (0.5, "openslide.mpp-x")),
        (
            dict(res_x="20000", res_y="20000", unit="centimeter"),
            None,
            False,
            (0.5, "tiff.XResolution"),
        ),
        (
            dict(res_x="50800", res_y="50800", unit="inch", power="20"),
            None,
            True,
            (0.5, "tiff.XResolution"),
        ),
        (
            dict(x="0.499", y="0.499", res_x="72", res_y="72", unit="inch"),
            None,
            False,
            (0.499, "openslide.mpp-x"),
        ),
        (dict(power="40"), None, True, (0.25, "openslide.objective-power")),
        (
            dict(unit="none", res_x="1", res_y="1", power="20"),
            None,
            True,
            (0.5, "openslide.objective-power"),
        ),
        (dict(x="0.499", y="0.499"), 0.5, False, (0.5, "--mpp")),
        ({}, 0.5, False, (0.5, "--mpp")),
        (dict(power="40"), 0.5, True, (0.5, "--mpp")),
        (dict(x="0.0274", y="0.0274"), 0.274, False, (0.274, "--mpp")),
        (dict(x="1000", y="1000"), 0.25, False, (0.25, "--mpp")),
        (dict(x="0", y="0"), 0.25, False, (0.25, "--mpp")),
        (dict(x="nan", y="nan"), 0.25, False, (0.25, "--mpp")),
        (dict(x="0.25", y="0.5"), 0.25, False, (0.25, "--mpp")),
    ],
)
def test_mpp_comes_from_who_says_it(said, given, power, expected):
    mpp, source = data.slide_mpp(stub(**said), given, from_power=power)
    assert (mpp, source) == (pytest.approx(expected[0]), expected[1])


@pytest.mark.parametrize(
    "said, given, power, words",
    [
        ({}, None, False, ["no mpp", "--mpp", "--manifest"]),
        (dict(power="20"), None, False, ["objective-power is '20'", "--mpp-from-power"]),
        (dict(unit="none", res_x="1", res_y="1"), None, True, ["no mpp", "--mpp"]),
        (dict(power="0"), None, True, ["objective-power is '0'", "--mpp"]),
        (dict(x="0", y="0"), None, True, ["mpp-x '0'", "0.1 to 4", "--mpp"]),
        (dict(x="nan", y="0.5"), None, False, ["mpp-x 'nan'", "--mpp"]),
        (dict(x="", y="0.5"), None, False, ["mpp-x ''", "--mpp"]),
        (dict(x="0.5"), None, False, ["mpp-y None", "--mpp"]),
        (dict(x="-0.5", y="-0.5"), None, False, ["'-0.5'"]),
        (dict(x="25", y="25"), None, False, ["mpp-x '25'", "0.1 to 4"]),
        (dict(x="0.0274", y="0.0274"), None, False, ["'0.0274'", "0.1 to 4"]),
        (dict(x="0.5", y="0.52"), None, False, ["'0.52'", "same in x and y"]),
        (
            dict(x="0.25", y="0.25", power="20"),
            0.5,
            False,
            ["--mpp says 0.5", "'0.25'", "leave --mpp out"],
        ),
        (dict(x="0.5", y="0.5"), 0.489, False, ["2 %"]),
        (
            dict(res_x="72", res_y="72", unit="inch"),
            None,
            True,
            ["XResolution '72'", "per inch", "352.8"],
        ),
        (dict(res_x="0", res_y="0", unit="centimeter"), None, False, ["XResolution '0'", "nan"]),
        (dict(res_x="20000", res_y="20000", unit="centimeter"), 0.25, False, ["0.5 and 0.5 um/px"]),
        ({}, 25.0, False, ["--mpp says 25", "0.1 to 4"]),
        ({}, float("nan"), False, ["--mpp says nan"]),
        (dict(x="0.5", y="0.5"), 0.0, False, ["--mpp says 0"]),
    ],
)
def test_mpp_is_never_guessed(said, given, power, words):
    with pytest.raises(MixmagError) as error:
        data.slide_mpp(stub(**said), given, from_power=power)
    assert all(w in str(error.value) for w in words), error.value


@pytest.mark.parametrize(
    "name, given, expected",
    [
        ("CMU-1-Small-Region.svs", None, 0.499),
        ("CMU-1-Small-Region.svs", 0.5, 0.5),
        ("CMU-1-Small-Region.svs", 0.25, "leave --mpp out"),
        ("luna-1065626.svs", None, 0.5026),
        ("TCGA-CR-7395-01A-01-TS1.svs", None, "no mpp"),
        ("TCGA-CR-7395-01A-01-TS1.svs", 0.5, 0.5),
        ("ezwsi-multiframe_camelyon.dcm", None, "'28.969"),
        ("openslide-python-boxes.tiff", None, "'352.7"),
        ("openslide-python-boxes.tiff", 0.5, 0.5),
        ("panimg-valid_tiff.tif", None, "'1000.0"),
        ("panimg-valid_tiff.tif", 0.5, 0.5),
        ("panimg-invalid_resolutions_tiff.tif", None, "no mpp"),
        ("panimg-no_dzi.tif", None, 0.97237),
        ("highdicom-sm_image.dcm", None, 0.499),
        ("openslide-python-boxes_0.dcm", None, 0.499),
    ],
)
def test_mpp_of_real_slides(real, name, given, expected):
    slide = openslide.OpenSlide(real / "slides" / name)
    if isinstance(expected, str):
        with pytest.raises(MixmagError, match=expected):
            data.slide_mpp(slide, given, from_power=True)
    else:
        assert data.slide_mpp(slide, given)[0] == pytest.approx(expected, rel=1e-4)


def test_manifest_names_slides_by_file_or_id(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text(
        'slide,mpp,note\nfolder/a.svs,"0,25",x\nb.c,0.5,\nd.svs,,nothing said\n', "utf-8"
    )
    args = Args(mpp=0.3, manifest=data.read_manifest(path))
    asked = {name: data.user_mpp(name, args) for name in ("a", "b.c", "b", "d")}
    assert asked == {
        "a": (0.25, "--manifest row a.svs"),
        "b.c": (0.5, "--manifest row b.c"),
        "b": (0.3, "--mpp"),
        "d": (0.3, "--mpp"),
    }
    with pytest.raises(MixmagError, match="row a.svs says 0.25.*leave --manifest row a.svs out"):
        data.slide_mpp(stub(x="0.5", y="0.5"), *asked["a"])
    with pytest.raises(MixmagError, match="two rows"):
        data.user_mpp("a", Args(manifest={"a": 0.5, "a.svs": 0.5}))
    path.write_text("slide,mpp\na,0.5\nb,half\na,0.25\n", "utf-8")
    with pytest.raises(MixmagError, match="'a' '0.5'.*more than one row.*'b' 'half'"):
        data.read_manifest(path)
    path.write_text("wsi,mpp\na,0.5\n", "utf-8")
    with pytest.raises(MixmagError, match="column slide is missing"):
        data.read_manifest(path)


INK = {"blue": (30, 60, 150), "green": (20, 130, 70), "black": (25, 25, 30), "red": (225, 35, 50)}


STAINS = {
    "hematoxylin": (1.25, 1.35, 0.55),
    "eosin": (0.12, 0.95, 0.45),
    "blue": (0.8, 0.65, 0.42),
    "dab": (0.65, 1.3, 1.8),
}  # density in R, G, B


def field(rng, side, px):
    return np.asarray(
        Image.fromarray(rng.standard_normal((side // px + 4,) * 2).astype(np.float32)).resize(
            (side, side), Image.Resampling.BICUBIC
        )
    )


def dots(rng, side, share, radius):
    image = Image.new("L", (side, side))
    for x, y in rng.integers(0, side, size=(int(share * side * side), 2)):
        ImageDraw.Draw(image).ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    return np.asarray(image, np.float32) / 255


def paint(seed, fault, side=1792):
    """A section on glass at 2 um/px with one thing wrong with it, as a JPEG, and where a region of it should be taken:
    (side, side, 3) uint8, (side, side) bool."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    tissue = (x**2 + y**2 + 0.15 * field(rng, side, 400) < 0.45) & (fault != "empty")
    nuclei, eosin = (
        dots(rng, side, 0.006, 3),
        (0.4 + 0.12 * field(rng, side, 8) + 0.15 * field(rng, side, 60)).clip(0.05),
    )
    amount = {"hematoxylin": nuclei, "eosin": eosin}
    if fault == "fat":
        near = cKDTree(rng.uniform(0, side, (int(side * side / 40**2), 2))).query(
            np.stack(np.mgrid[:side, :side], -1), k=2
        )[0]
        amount = {
            "eosin": 0.7 * (near[..., 1] - near[..., 0] < 4)
        }  # walls of some 4 um round cells of 80
    elif fault == "ihc":
        amount = {"blue": 0.5 * nuclei + 0.03, "dab": 0.8 * dots(rng, side, 0.0005, 4)}
    density = sum(np.multiply.outer(a * tissue, STAINS[k]) for k, a in amount.items())
    if fault in ("haze", "empty"):
        smear = Image.fromarray((255 * (field(rng, side, 500) > 1)).astype(np.uint8)).filter(
            ImageFilter.GaussianBlur(20)
        )
        density = density + np.multiply.outer(
            0.05 + 0.015 * field(rng, side, 800).clip(-2, 2) + 0.06 * (np.asarray(smear) / 255),
            STAINS["eosin"],
        )
    light = np.array([243, 242, 244]) * np.exp(-density)
    if fault in INK:
        image = Image.new("L", (side, side))
        for _ in range(2):
            ImageDraw.Draw(image).line(
                [tuple(p) for p in rng.uniform(0, side, (4, 2))],
                fill=255,
                width=int(rng.uniform(200, 450)),
                joint="curve",
            )
        ink = (
            np.asarray(image.filter(ImageFilter.GaussianBlur(8)), np.float32)[..., None]
            / 255
            * rng.uniform(0.85, 0.97)
        )
        light = light * (1 - ink + ink * (np.array(INK[fault]) + rng.integers(-15, 16, 3)) / 255)
        tissue &= ink[..., 0] < 0.3
    if fault == "borders":
        outside = (np.hypot(x, y) > 0.95) | (y < -0.8) | (x > 0.9)
        light[outside], tissue = 3, tissue & ~outside
    buffer = io.BytesIO()
    Image.fromarray((light + rng.normal(0, 3, light.shape)).clip(0, 255).astype(np.uint8)).save(
        buffer, "JPEG", quality=80
    )
    return np.asarray(Image.open(buffer)), tissue


def at_16_um(picture):
    return np.asarray(Image.fromarray(picture).reduce(8))


@pytest.mark.parametrize(
    "fault, least",
    [
        ("none", 0.85),
        ("haze", 0.85),
        ("borders", 0.85),
        ("ihc", 0.8),
        ("fat", 0.8),
        *((ink, 0.85) for ink in INK),
    ],
)
def test_tissue_is_found_whatever_is_on_the_glass(fault, least):
    """Intersection over union with what was drawn; the thresholds were tuned on seeds 0 to 5 and 21, 22."""
    picture, truth = paint(11, fault)
    mask, truth = data.find_tissue(at_16_um(picture)), at_16_um(truth.astype(np.uint8) * 255) > 127
    iou = (mask & truth).sum() / (mask | truth).sum()
    print(
        f"{fault}: IoU {iou:.3f}, recall {(mask & truth).sum() / truth.sum():.3f}, precision {(mask & truth).sum() / mask.sum():.3f}"
    )
    assert truth.mean() > 0.05 and iou > least


@pytest.mark.parametrize("what", ["haze", "white", "glass", "black", "noise", "one pixel"])
def test_no_tissue_is_no_tissue(what):
    rng = np.random.default_rng(0)
    flat = {"white": 255, "glass": (243, 241, 238), "black": 0, "one pixel": (200, 90, 150)}
    rgb = (
        at_16_um(paint(11, "empty")[0])
        if what == "haze"
        else rng.normal(240, 2.5, (300, 400, 3)).clip(0, 255).astype(np.uint8)
        if what == "noise"
        else np.full((1, 1, 3) if what == "one pixel" else (300, 400, 3), flat[what], np.uint8)
    )
    assert not data.find_tissue(rgb).any()


@pytest.mark.parametrize(
    "name, shrink, tissue, none",
    [  # seen by eye, (x, y) in pixels of the picture
        (
            "histoprep-slide_with_ink.jpeg",
            8,
            [(300, 250), (1800, 400), (2500, 300), (3300, 550), (4600, 650), (5300, 550)],
            [
                (3850, 830),
                (3900, 880),
                (3780, 860),
                (100, 850),
                (3000, 150),
                (2000, 850),
                (5000, 150),
                (4160, 380),
            ],
        ),
        (
            "tissueloc-20181218042458.jpg",
            1,
            [(200, 450), (330, 370), (600, 150), (550, 870), (1300, 450), (1500, 450), (1650, 800)],
            [(800, 200), (1050, 450), (40, 890), (100, 950), (960, 990)],
        ),
        (
            "tissueloc-20181218042533.jpg",
            1,
            [(60, 550), (300, 700), (800, 350), (1000, 430), (1300, 650), (1600, 700), (1450, 400)],
            [(400, 100), (200, 250), (1000, 530), (1700, 200), (900, 60)],
        ),
        (
            "tissueloc-20181218042607.jpg",
            1,
            [
                (150, 110),
                (50, 650),
                (400, 400),
                (700, 450),
                (880, 200),
                (1300, 450),
                (1700, 500),
                (1250, 880),
            ],
            [(30, 100), (570, 390), (940, 600), (1000, 100), (400, 900)],
        ),
    ],
)
def test_tissue_of_real_pictures(real, name, shrink, tissue, none):
    mask = data.find_tissue(
        np.asarray(Image.open(real / "pictures" / name).convert("RGB").reduce(shrink))
    )
    assert all(mask[y // shrink, x // shrink] for x, y in tissue) and not any(
        mask[y // shrink, x // shrink] for x, y in none
    )


@pytest.mark.parametrize(
    "name, mpp, least, most",
    [
        ("CMU-1-Small-Region.svs", 0.499, 0.3, 0.5),
        ("TCGA-CR-7395-01A-01-TS1.svs", 0.5, 0.55, 0.75),
        ("luna-1065626.svs", 0.5026, 0.003, 0.01),
        ("panimg-no_dzi.tif", 0.972, 0, 0),
        ("panimg-valid_tiff.tif", 0.5, 0, 0),
    ],
)
def test_tissue_of_real_slides(real, name, mpp, least, most):
    """How much of each is tissue, by eye."""
    assert least <= data.tissue_mask(data.Reader(real / "slides" / name), mpp)[1].mean() <= most


def test_the_thumbnail_is_the_box_mean_however_it_is_read(tmp_path):
    picture = pink(2777, 5000)
    rgb, unread = data.thumbnail(data.Reader(write_tiff(tmp_path / "s.tiff", picture, 0.5)), 0.5)
    whole = np.asarray(
        Image.fromarray(picture).resize((rgb.shape[1], rgb.shape[0]), Image.Resampling.BOX), float
    )
    assert rgb.shape == (87, 156, 3) and not unread.any() and np.abs(rgb - whole).max() <= 1


def test_missing_tiles_are_glass_and_unreadable_ones_are_tried(tmp_path):
    import tifffile

    picture = np.full((4096, 4096, 3), 243, np.uint8)
    picture[1024:3072, 1024:3072] = pink(2048, 2048)
    tiles = [
        picture[y : y + 256, x : x + 256] if y < 2048 else None
        for y in range(0, 4096, 256)
        for x in range(0, 4096, 256)
    ]
    with tifffile.TiffWriter(tmp_path / "s.tiff") as tiff:
        tiff.write(
            iter(tiles),
            shape=picture.shape,
            dtype=np.uint8,
            tile=(256, 256),
            photometric="rgb",
            compression="zlib",
            resolution=(2e4, 2e4),
            resolutionunit="CENTIMETER",
        )
    rgb, mask = data.tissue_mask(data.Reader(tmp_path / "s.tiff"), 0.5)
    assert (
        (rgb[64:] == 255).all()
        and not mask[64:].any()
        and mask[36:60, 36:92].all()
        and not mask[:30].any()
    )
    with tifffile.TiffFile(tmp_path / "s.tiff") as tiff:
        start, length = (
            (tiff.pages[0].tags[t].value[6 * 16 + 6]) for t in ("TileOffsets", "TileByteCounts")
        )
    whole = (tmp_path / "s.tiff").read_bytes()
    (tmp_path / "bad.tiff").write_bytes(whole[:start] + bytes(length) + whole[start + length :])
    grey, tried = data.tissue_mask(data.Reader(tmp_path / "bad.tiff"), 0.5)
    bad = (grey == 128).all(axis=2)
    assert (
        tried[bad].all()
        and bad[48:56, 48:56].all()
        and bad.sum() <= 16**2
        and np.array_equal(grey[~bad], rgb[~bad])
    )


def ring(x, y, radius, n=40):
    return [[x + radius * np.cos(a), y + radius * np.sin(a)] for a in np.linspace(0, 2 * np.pi, n)]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda p: {
            "type": "FeatureCollection",
            "features": [
                {"type": "Feature", "geometry": None},
                *(
                    {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": q}}
                    for q in p
                ),
            ],
        },
        lambda p: {
            "type": "Feature",
            "properties": {"name": "tissue"},
            "geometry": {"type": "MultiPolygon", "coordinates": p},
        },
        lambda p: {"type": "MultiPolygon", "coordinates": p},
        lambda p: [{"type": "Polygon", "coordinates": q} for q in p],
        lambda p: {
            "type": "GeometryCollection",
            "geometries": [{"type": "Polygon", "coordinates": q} for q in p],
        },
    ],
)
def test_geojson_masks_are_the_polygons(tmp_path, wrap):
    """Against matplotlib's point in polygon: a disc with a hole, an island in the hole, and a disc that overlaps a hole of another."""
    from matplotlib.path import Path as Polygon

    parts = [
        [ring(2000, 2000, 500)],
        [ring(2000, 2000, 1500), ring(2000, 2000, 900)],
        [ring(6000, 3000, 900)],
        [ring(6500, 3000, 1000), ring(6300, 3000, 400)],
    ]
    (tmp_path / "m.geojson").write_text(json.dumps(wrap(parts)), "utf-8")
    slide = type(
        "Stub",
        (),
        {
            "dimensions": (9000, 5000),
            "properties": {"openslide.bounds-x": "320", "openslide.bounds-y": "64"},
        },
    )
    mask = data.read_mask(tmp_path / "m.geojson", slide, (156, 281))
    centres = np.stack(
        np.meshgrid((np.arange(281) + 0.5) * 9000 / 281, (np.arange(156) + 0.5) * 5000 / 156),
        axis=-1,
    ).reshape(-1, 2) - (320, 64)
    within = [[Polygon(r).contains_points(centres) for r in rings] for rings in parts]
    expected = np.any(
        [w[0] & ~np.any([np.zeros(len(centres), bool), *w[1:]], axis=0) for w in within], axis=0
    ).reshape(156, 281)
    edge = ndimage.maximum_filter(expected, 3) ^ ndimage.minimum_filter(
        expected, 3
    )  # Pillow draws the outline, too
    assert (
        expected.mean() > 0.1
        and np.array_equal(mask[~edge], expected[~edge])
        and abs(mask.mean() / expected.mean() - 1) < 0.04
    )


@pytest.mark.parametrize("mode", ["1", "L", "I;16", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("size", [(90, 50), (281, 156), (1800, 1000)])
def test_png_masks_cover_the_whole_slide(tmp_path, mode, size):
    half = np.zeros((size[1], size[0]), bool)
    half[:, : size[0] // 3] = True
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
    mask = data.read_mask(
        tmp_path / "m.png",
        type("Stub", (), {"dimensions": (9000, 5000), "properties": {}}),
        (156, 281),
    )
    assert mask[:, :93].all() and not mask[:, 95:].any()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("m.png", Image.new("L", (90, 50)), "m.png: holds no tissue"),
        (
            "m.png",
            Image.new("L", (50, 90), 255),
            "50 x 90 is another shape than the slide's 9000 x 5000",
        ),
        ("m.png", Image.new("L", (92, 50), 255), "92 x 50 is another shape"),
        ("m.png", b"no picture", "m.png: cannot be read as a mask"),
        ("m.geojson", {"type": "FeatureCollection", "features": []}, "m.geojson: holds no tissue"),
        (
            "m.geojson",
            {"type": "Polygon", "coordinates": [ring(20000, 0, 100)]},
            "a polygon leaves the slide's 9000 x 5000 px",
        ),
        ("m.geojson", {"type": "Point", "coordinates": [5, 5]}, "holds no tissue"),
        ("m.geojson", {"type": "Polygon", "coordinates": [["x", "y"]]}, "cannot be read as a mask"),
        ("m.geojson", {"name": "no type"}, "cannot be read"),
        ("m.geojson", b"{", "cannot be read"),
        ("m.geojson", b"\xff\xfe", "cannot be read"),
    ],
)
def test_masks_that_are_none_are_refused(tmp_path, name, content, message):
    if isinstance(content, Image.Image):
        content.save(tmp_path / name)
    else:
        (tmp_path / name).write_bytes(
            content if isinstance(content, bytes) else json.dumps(content).encode()
        )
    with pytest.raises(MixmagError, match=message):
        data.read_mask(
            tmp_path / name,
            type("Stub", (), {"dimensions": (9000, 5000), "properties": {}}),
            (156, 281),
        )


def test_masks_belong_to_slides_by_name(tmp_path):
    for name in ("a.png", "b.geojson", "c.png", "c.geojson"):
        (tmp_path / name).touch()
    assert (
        data.find_mask(data.Path("x/a.svs"), None) is None
        and data.find_mask(data.Path("x/z.svs"), tmp_path / "a.png") == tmp_path / "a.png"
    )
    assert [data.find_mask(data.Path(f"x/{i}.svs"), tmp_path).name for i in "ab"] == [
        "a.png",
        "b.geojson",
    ]
    for slide, place, message in (
        ("c", tmp_path, "found 2"),
        ("d", tmp_path, "d.png or .*d.geojson; found 0"),
        ("a", tmp_path / "none.png", "none.png; found 0"),
    ):
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
            Image.fromarray(np.pad(np.full((30, 15), 255, np.uint8), ((0, 0), (0, 15)))).save(
                tmp_path / "masks" / f"{name}.png"
            )
    data.write_csv(
        tmp_path / "m.csv", ("slide", "mpp"), [("a", "0.5"), ("b.tiff", "0.25"), ("gone", "0.5")]
    )
    flags = (
        "--slides",
        slides,
        "--out",
        tmp_path / "d",
        "--manifest",
        tmp_path / "m.csv",
        "--mask",
        tmp_path / "masks",
    )
    assert tile(monkeypatch, *flags) == 3
    out, err = capsys.readouterr()
    assert (
        "a: 0.5 um/px (--manifest row a)" in out
        and "1 of 3 rows name no slide here, such as gone" in err
    )
    assert (
        "b: FAILED" in err
        and "--manifest row b.tiff says 0.25" in err
        and "e: FAILED" in err
        and "e.png" in err
        and "2 slides done, 2 failed" in out
    )
    assert (
        data.read_slide(tmp_path / "d/slides/a.safetensors").meta["settings"]["mask"]
        == data.hashlib.sha256((tmp_path / "masks/a.png").read_bytes()).hexdigest()
    )
    assert sorted(p.name for p in (tmp_path / "d/qc").iterdir()) == [
        "a.png",
        "c$d$.png",
    ]  # and no temporary files
    for name in ("a", "c$d$"):
        with Image.open(tmp_path / "d/qc" / f"{name}.png") as picture:
            assert (
                max(picture.size) <= 2000 and len(picture.convert("RGB").getcolors(1 << 24)) > 1000
            )
    assert tile(monkeypatch, *flags) == 3 and "a: done before" in capsys.readouterr().out
    Image.new("L", (30, 30), 255).save(tmp_path / "masks" / "a.png")
    assert (
        tile(monkeypatch, *flags) == 3
        and "a: FAILED" in (err := capsys.readouterr().err)
        and "give another --out" in err
    )
    with pytest.raises(MixmagError, match="no such file or folder"):
        tile(
            monkeypatch,
            "--slides",
            tmp_path,
            "--out",
            tmp_path / "d",
            "--mask",
            tmp_path / "absent.png",
        )
    with pytest.raises(MixmagError, match="one file for 4 slides"):
        tile(
            monkeypatch,
            "--slides",
            slides,
            "--out",
            tmp_path / "d",
            "--mask",
            tmp_path / "masks" / "a.png",
        )


def test_processes_share_the_slides_and_a_bad_one_ends_none_of_them(tmp_path):
    """Under torchrun, which would end all at the first exit code that is not 0; here one slide says no mpp."""
    (tmp_path / "slides").mkdir()
    for name, mpp in (("a", None), ("b", 0.5), ("c", 0.5), ("d", 0.5)):
        write_tiff(tmp_path / "slides" / f"{name}.tiff", pink(1400, 1400), mpp)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            str(ROOT / "data.py"),
            "tile",
            "--slides",
            "slides",
            "--out",
            "d",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode != 0 and "a: FAILED" in done.stderr, done.stderr
    assert (
        {p.stem for p in (tmp_path / "d" / "slides").iterdir()} == {"b", "c", "d"}
        and "2 slides done, 0 failed" in done.stdout
        and "1 slides done, 1 failed" in done.stdout
    )
    assert [p.name for p in (tmp_path / "d").glob("failed*")] == ["failed-0-of-2.csv"]


def test_qc_shows_the_tiles_in_their_places(tmp_path, monkeypatch):
    """Each panel, put together from tiles, is the region itself at the panel's resolution."""
    from matplotlib.figure import Figure

    region = pink(2 * 896, 3 * 896)
    table, tiles = Geometry(1).cell_table().tolist(), np.empty((6, 21, 224, 224, 3), np.uint8)
    for cell in range(6):
        part = Image.fromarray(region).crop(
            (left := cell % 3 * 896, top := cell // 3 * 896, left + 896, top + 896)
        )
        for i, (k, r, c) in enumerate(table):
            tiles[cell, i] = np.asarray(part.reduce(2 ** (2 - k)))[
                224 * r : 224 * (r + 1), 224 * c : 224 * (c + 1)
            ]
    monkeypatch.setattr(data, "read_window", lambda *_: tiles)
    figure = Figure()
    plan = type("Plan", (), {"cell_px": 896.0, "mpp": 0.5, "magnifications": [5, 10, 20]})
    data.draw_window(figure, figure.add_gridspec(2, 5), None, plan, (0, 0, 3, 2), (2, 1))
    whole, cell = Image.fromarray(region), Image.fromarray(region).crop((1792, 896, 2688, 1792))
    for axis, picture in zip(figure.axes, [whole] * 3 + [cell] * 3, strict=True):
        shown = np.asarray(axis.images[0].get_array(), float)
        expected = np.asarray(picture.resize(shown.shape[1::-1], Image.Resampling.BOX), float)
        assert np.abs(shown - expected).max() <= 3 and axis.images[0].get_extent() == [
            0,
            picture.width / 2,
            picture.height / 2,
            0,
        ]


def test_qc_says_when_its_region_cannot_be_read(real, tmp_path, monkeypatch):
    assert (
        tile(monkeypatch, "--slides", real / "broken/cmu-midfile-zeroed.svs", "--out", tmp_path)
        == 3
    )
    assert Image.open(tmp_path / "qc/cmu-midfile-zeroed.png").size[0] > 500


def test_nothing_is_upsampled(tmp_path, monkeypatch):
    monkeypatch.setattr(
        data, "tissue_mask", lambda reader, mpp, own: (None, np.zeros((300, 300), bool))
    )

    def plan(mpp, downsamples=(1.0,), **args):
        reader = Ramp(9000, 9000, downsamples, x=str(mpp), y=str(mpp))
        reader.sizes = args.pop("sizes", reader.sizes)
        plan = data.plan_slide(reader, Args(**args))
        return plan, data.plan_report(reader, plan, 3)

    for mpp, words in (
        (0.4991, None),
        (0.5026, "0.5026 um/px are interpolated by 0.5%"),
        (0.509, "interpolated by 1.8%"),
    ):
        assert (words or "tokens") in plan(mpp)[1] and ("interpolated" in plan(mpp)[1]) == bool(
            words
        )
    with pytest.raises(
        MixmagError, match="0.52 um/px are coarser than 20x .* --magnifications 5 10 tiles it"
    ):
        plan(0.52)
    with pytest.raises(MixmagError, match="it has none of the magnifications"):
        plan(3.0)
    assert plan(1.0, magnifications=[5, 10])[0].level == 0
    assert (
        plan(0.25, (1.0, 2.0005, 4.0))[0].level == 1
        and plan(0.252, (1.0, 2.0, 4.0))[0].level == 0
        and plan(0.25, (1.0, 4.0))[0].shrink == 2
    )
    with pytest.raises(MixmagError, match="does not fit level 0"):
        plan(0.25, (1.0, 2.0), sizes=[(8960, 8960), (4478, 4480)])
    assert plan(0.25, (1.0, 1.95), sizes=[(9000, 9000), (4500, 4737)])[0].level == 0


def test_white_slide_yields_an_empty_file(tmp_path):
    write_tiff(tmp_path / "white.tiff", np.full((3000, 3000, 3), 243, np.uint8), 0.5)
    out, _ = run(
        "data.py",
        "tile",
        "--slides",
        tmp_path / "white.tiff",
        "--out",
        tmp_path / "d",
        cwd=tmp_path,
    )
    assert (
        "nothing to embed" in out
        and len(data.read_slide(tmp_path / "d/slides/white.safetensors").cells) == 0
    )


def test_bad_slides_are_listed_and_the_rest_is_done(tmp_path):
    write_tiff(tmp_path / "good.tiff", pink(3000, 3000), 0.5)
    write_tiff(tmp_path / "no-mpp.tiff", pink(1000, 1000), None)
    (tmp_path / "empty.tiff").touch()
    (tmp_path / "text.tiff").write_text("not a slide")
    (tmp_path / "cut.tiff").write_bytes((tmp_path / "good.tiff").read_bytes()[:3000])
    out, err = run(
        "data.py", "tile", "--slides", tmp_path, "--out", tmp_path / "d", cwd=tmp_path, code=3
    )
    assert "1 slides done, 4 failed" in out
    with open(tmp_path / "d" / "failed.csv", newline="") as f:
        failed = {row["slide_id"]: row["reason"] for row in csv.DictReader(f)}
    assert (
        set(failed) == {"no-mpp", "empty", "text", "cut"}
        and "0 bytes" in failed["empty"]
        and "--mpp" in failed["no-mpp"]
    )
    assert data.verify(tmp_path / "d") == []


@pytest.mark.parametrize(
    "width, height, shrinks", [(100_000, 100_000, (1, 4, 16)), (100_000, 2_048, (1,))]
)
def test_memory_is_bounded_on_huge_slides(tmp_path, width, height, shrinks):
    """40 GB of pixels in a pyramid, and the widest band of a single-level slide (tests/bench.py has the whole one)."""
    assert tile_sparse(tmp_path, width, height, shrinks) < 1000
    assert 3 <= len(data.read_slide(tmp_path / "d/slides/huge.safetensors").cells) <= 36


def tiff_tile(path, number, page=0):
    """Where the bytes of a tile lie in a TIFF file, and how many there are."""
    import tifffile

    with tifffile.TiffFile(path) as tiff:
        return tiff.pages[page].dataoffsets[number], tiff.pages[page].databytecounts[number]


def spoil(path, number):
    """A copy of a TIFF in which one tile's bytes are zero."""
    (start, length), whole = tiff_tile(path, number), path.read_bytes()
    bad = path.with_name(f"bad{number}-{path.name}")
    bad.write_bytes(whole[:start] + bytes(length) + whole[start + length :])
    return bad


def without(path, *numbers):
    """A copy of a TIFF from whose first level tiles are missing: their byte counts are zero."""
    import tifffile

    bad = path.with_name(f"less-{path.name}")
    bad.write_bytes(path.read_bytes())
    with tifffile.TiffFile(bad, mode="r+b") as tiff:
        counts = list(tiff.pages[0].databytecounts)
        for number in numbers:
            counts[number] = 0
        tiff.pages[0].tags["TileByteCounts"].overwrite(counts)
    return bad


@pytest.mark.parametrize("threads", [1, 3])
def test_neighbours_of_a_bad_region_are_those_of_the_clean_slide(tmp_path, monkeypatch, threads):
    """Whatever the order and the number of threads that stumble over one another's failed handle."""
    clean = write_tiff(tmp_path / "s.tiff", pink(3584, 3584), 0.5, levels=(1, 8))
    bad = spoil(clean, 5 * 14 + 6)  # of 14 x 14 tiles of 256 px: inside cell (1, 1) and that alone
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    plan = data.plan_slide(data.Reader(bad), Args(region=1))
    good = {cell: tiles.tobytes() for _, cell, tiles in data.read_cells(data.Reader(clean), plan)}
    assert len(good) == 16
    for seed in range(4):
        np.random.default_rng(seed).shuffle(plan.windows)
        found = list(data.read_cells(reader := data.Reader(bad), plan))
        assert [cell for _, cell, _ in found] == [w[:2] for w in plan.windows]
        assert [
            cell for _, cell, tiles in found if isinstance(tiles, openslide.OpenSlideError)
        ] == [(1, 1)]
        assert all(
            tiles.tobytes() == good[cell] for _, cell, tiles in found if cell != (1, 1)
        ) and reader.slide.dimensions == (3584, 3584)


def test_bad_windows_are_dropped_alone_and_more_than_one_percent_is_a_failure(
    tmp_path, monkeypatch, capsys
):
    clean = write_tiff(tmp_path / "s.tiff", pink(2464, 2464), 0.5, levels=(1, 8), tile=(64, 64))
    bad, worse = (
        spoil(clean, 5 * 39 + 5),
        spoil(spoil(clean, 5 * 39 + 5), 30 * 39 + 30),
    )  # inside windows (1, 1) and (8, 8) of 11 x 11
    flags = ("--out", tmp_path / "d", "--region", 1, "--magnifications", 20, "--batch-size", 50)
    assert tile(monkeypatch, "--slides", clean, bad, worse, *flags) == 3
    out, err = capsys.readouterr()
    assert (
        "1 windows dropped as unreadable" in out
        and "2 of 121 windows cannot be read, more than 1%" in err
    )
    whole, less = (
        data.read_slide(tmp_path / f"d/slides/{p.stem}.safetensors") for p in (clean, bad)
    )
    others = (whole.cells != 1).any(axis=1)
    assert (
        whole.meta["n_bad"] == 0
        and less.meta["n_bad"] == 1
        and others.sum() == 120
        and data.verify(tmp_path / "d") == []
    )
    assert np.array_equal(less.cells, whole.cells[others]) and np.array_equal(
        less.features, whole.features[others]
    )
    with open(tmp_path / "d" / "failed.csv", newline="") as f:
        assert [(r["slide_id"], r["stage"]) for r in csv.DictReader(f)] == [(worse.stem, "tile")]


@pytest.mark.parametrize("levels", [(1, 8), (1,)])
def test_missing_tissue_is_never_white(tmp_path, levels):
    """A tile that is missing inside tissue makes its cell unreadable, whether or not a thumbnail still shows it; one that is missing
    outside of tissue is glass."""
    picture = np.full((3584, 3584, 3), 243, np.uint8)
    picture[256:3328, 256:3328] = pink(3072, 3072)
    clean = write_tiff(tmp_path / "s.tiff", picture, 0.5, levels=levels)
    less = data.Reader(
        without(clean, 5 * 14 + 5, 0, 13, 12 * 14 + 13)
    )  # within cell (1, 1); corners and a side of glass
    plan = data.plan_slide(less, Args(region=1))
    assert len(plan.windows) == 16
    found = {cell: tiles for _, cell, tiles in data.read_cells(less, plan)}
    assert [cell for cell, tiles in found.items() if isinstance(tiles, Exception)] == [
        (1, 1)
    ] and "where the thumbnail shows tissue" in str(found[1, 1])
    for _, cell, tiles in data.read_cells(data.Reader(clean), plan):
        if cell not in ((0, 0), (3, 0), (3, 3), (1, 1)):
            assert np.array_equal(tiles, found[cell])
    assert (found[0, 0][5][:, :] == 255).all() and found[0, 0][
        20
    ].min() < 200  # glass, and tissue beside it


def test_dry_run_plans_and_writes_nothing(tmp_path, monkeypatch, capsys):
    slides = tmp_path / "slides"
    slides.mkdir()
    write_tiff(slides / "good.tiff", pink(3000, 3000), 0.25, levels=(1, 2, 4))
    flags = ("--slides", slides, "--out", tmp_path / "d", "--dry-run")
    assert tile(monkeypatch, *flags) == 0
    out = capsys.readouterr().out
    for words in (
        "0.25 um/px (openslide.mpp-x)",
        "level 1 of 3 (downsample 2)",
        "1 of 1 windows",
        "1 cells, 21 tokens (5x 1, 10x 4, 20x 16)",
        "drift:",
        "1 slides can be tiled, 0 cannot",
        "GB free",
    ):
        assert words in out, f"{words!r} not in {out}"
    write_tiff(slides / "no-mpp.tiff", pink(1000, 1000), None)
    assert (
        tile(monkeypatch, *flags) == 3
        and "no-mpp: FAILED" in capsys.readouterr().err
        and os.listdir(tmp_path) == ["slides"]
    )
    monkeypatch.setattr(data, "free_bytes", lambda folder: 1000)
    with pytest.raises(MixmagError, match="do not fit under --out"):
        tile(monkeypatch, *flags)
    assert (
        tile(monkeypatch, *flags[:-1]) == 3
        and "good: FAILED: its 0 MB do not fit" in capsys.readouterr().err
    )


def test_slides_are_only_read_and_their_names_may_be_odd(tmp_path, monkeypatch, capsys):
    slides = tmp_path / "sli des"
    slides.mkdir()
    names = ["001", "1", "a b", 'ü,"c"', "x.y", "-n", "n\nl"]
    for i, name in enumerate(names):
        write_tiff(slides / f"{name}.tiff", pink(900, 900, i), 0.5)
    (slides / "._001.tiff").write_bytes(b"resource fork")
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in slides.iterdir()}
    for out in (slides, slides.parent):
        (out / "slides").mkdir(exist_ok=True)
    with pytest.raises(MixmagError, match="among the slides"):
        tile(monkeypatch, "--slides", slides, "--out", slides)
    assert (
        tile(monkeypatch, "--slides", slides, "--out", tmp_path / "d") == 0
        and f"{len(names)} slides done, 0 failed" in capsys.readouterr().out
    )
    assert {s.slide_id for s in data.read_slides(tmp_path / "d")} == set(names) and data.verify(
        tmp_path / "d"
    ) == []
    (slides / "slides").rmdir()
    assert {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in slides.iterdir()} == before


def test_slides_with_one_id_are_refused(tmp_path):
    for name in ("a.tiff", "A.svs"):
        (tmp_path / name).touch()
    _, err = run(
        "data.py", "tile", "--slides", tmp_path, "--out", tmp_path / "d", cwd=tmp_path, code=1
    )
    assert "slides with one id" in err


def test_texture_is_finite_deterministic_and_blind_to_turning():
    tiles = torch.from_numpy(
        np.stack(
            [pink(224, 224, seed) for seed in range(3)] + [np.full((224, 224, 3), 255, np.uint8)]
        )
    )
    out = data.texture(tiles)
    assert (
        out.shape == (4, 46) and torch.isfinite(out).all() and torch.equal(out, data.texture(tiles))
    )
    assert torch.allclose(data.texture(torch.rot90(tiles, 1, (1, 2))), out, atol=1e-4)
    assert (out[0] - out[1]).abs().max() > 0.01


def test_encoder_from_a_module(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def factory():\n    return lambda tiles: tiles.float().mean((1, 2))\n"
        "def nan():\n    return lambda tiles: tiles.float().mean((1, 2)).where(tiles.amin((1, 2)) > 250, float('nan'))\n"
    )
    write_tiff(tmp_path / "s.tiff", pink(3000, 3000), 0.5)
    run(
        "data.py",
        "tile",
        "--slides",
        "s.tiff",
        "--out",
        "d",
        "--encoder",
        "mine:factory",
        cwd=tmp_path,
    )
    slide = data.read_slide(tmp_path / "d/slides/s.safetensors")
    assert (
        slide.dim == 3
        and slide.meta["encoder"] == "mine:factory"
        and slide.features.shape == (9, 21, 3)
    )
    _, err = run(
        "data.py",
        "tile",
        "--slides",
        "s.tiff",
        "--out",
        "e",
        "--encoder",
        "mine:nan",
        cwd=tmp_path,
        code=3,
    )
    assert "s: FAILED: the encoder returned NaN" in err
    _, err = run(
        "data.py",
        "tile",
        "--slides",
        "s.tiff",
        "--out",
        "e",
        "--encoder",
        "mine:absent",
        cwd=tmp_path,
        code=1,
    )
    assert "absent" in err


def test_real_slides(real, tmp_path):
    out, err = run(
        "data.py", "tile", "--slides", real / "slides", "--out", tmp_path, cwd=tmp_path, code=3
    )
    assert "CMU-1-Small-Region: 0.499 um/px" in out and "6 cells, 126 tokens" in out
    assert (
        "2 slides done, 8 failed" in out
        and "boxes_1.dcm: the same DICOM series as openslide-python-boxes_0.dcm" in err
        and data.verify(tmp_path) == []
    )
    for slide_id, reason in (
        ("TCGA-CR-7395-01A-01-TS1", "says no mpp"),
        ("ezwsi-multiframe_camelyon", "28.969"),
        ("panimg-no_dzi", "--magnifications 5 10 tiles it"),
        ("highdicom-sm_image", "50 x 50 px are less than one cell"),
        ("panimg-invalid_resolutions_tiff", "says no mpp"),
    ):
        assert any(
            line.startswith(f"{slide_id}: FAILED") and reason in line for line in err.splitlines()
        ), slide_id


def test_broken_slides_each_get_a_line(real, tmp_path):
    broken = sorted((real / "broken").iterdir())
    out, err = run("data.py", "tile", "--slides", *broken, "--out", tmp_path, cwd=tmp_path, code=3)
    assert f"0 slides done, {len(broken)} failed" in out and all(
        f"{p.stem}: FAILED" in err for p in broken
    )


def test_what_an_encoder_may_return():
    """Every way out of (B, D) finite floating-point numbers of one width is refused; bfloat16 and ragged last batches are not."""
    tiles = np.random.default_rng(0).integers(0, 256, (2, 5, 224, 224, 3), dtype=np.uint8)

    def mean(batch):
        return batch.float().mean((1, 2))

    whole = data.encode_tiles(mean, tiles, 10, "cpu")
    assert (
        whole.shape == (2, 5, 3)
        and whole.dtype == np.float16
        and np.array_equal(whole, data.encode_tiles(mean, tiles, 3, "cpu", 3))
    )
    assert np.allclose(
        data.encode_tiles(lambda b: mean(b).bfloat16(), tiles, 4, "cpu"), whole, rtol=2**-8
    )
    widths = iter((3, 3, 3, 2))
    for encoder, message in (
        (lambda b: mean(b) * 1e9, "beyond float16, for 10 of 10"),
        (lambda b: mean(b) / 0 * 0, "NaN"),
        (lambda b: b.sum((1, 2)), "torch.int64"),
        (lambda b: mean(b)[:1], r"\(1, 3\) of 3 tiles"),
        (lambda b: mean(b)[:, 0], r"\(3,\)"),
        (lambda b: b.float(), "expected floating-point"),
        (lambda b: mean(b).numpy(), "ndarray"),
        (lambda b: mean(b)[:, : next(widths)], r"\(1, 2\) of 1 tiles, expected .* \(1, 3\)"),
    ):
        with pytest.raises(MixmagError, match=message):
            data.encode_tiles(encoder, tiles, 3, "cpu")
    with pytest.raises(MixmagError, match=r"\(3, 3\) of 3 tiles, expected .* \(3, 4\)"):
        data.encode_tiles(mean, tiles, 3, "cpu", 4)


def test_a_factory_that_fails_gives_one_line(tmp_path, monkeypatch):
    (tmp_path / "bad.py").write_text(
        "def raises():\n    raise KeyError('weights')\ndef nothing():\n    pass\n"
    )
    (tmp_path / "syntax.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    for name, message in (
        ("bad:raises", "KeyError: 'weights'"),
        ("bad:nothing", "returned NoneType"),
        ("syntax:f", "SyntaxError"),
        ("absent:f", "No module named"),
        ("resnet", "expected texture, virchow2 or module:factory"),
    ):
        with pytest.raises(MixmagError, match=message):
            data.tile_encoder(name, "cpu")
    with pytest.raises(MixmagError, match="only --encoder virchow2"):
        data.tile_encoder("texture", "cpu", "weights.pt")


# -------------------------------------------------------------------------------------------------------------- Virchow2
@pytest.fixture
def pretend_timm(tmp_path, monkeypatch):
    """Called with a text: a module `timm` of that text stands before any other while the test runs."""

    def pretend(text):
        (tmp_path / "timm").mkdir()
        (tmp_path / "timm" / "__init__.py").write_text(text)
        (tmp_path / "timm" / "layers.py").write_text("SwiGLUPacked = 'SwiGLUPacked'\n")
        monkeypatch.syspath_prepend(tmp_path)

    real = {
        name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "timm"
    }
    yield pretend
    for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
        del sys.modules[name]
    sys.modules.update(real)


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "raise ModuleNotFoundError(\"No module named 'timm'\", name='timm')",
            "not installed: pip install timm torchvision==0.28.0",
        ),
        (
            "raise ModuleNotFoundError(\"No module named 'torchvision'\", name='torchvision')",
            "does not match torch .*No module named 'torchvision'",
        ),
        (
            "raise RuntimeError('operator torchvision::nms does not exist')",
            "does not match torch .*nms does not exist.*torchvision==0.28.0",
        ),
        (
            "class Gated(OSError):\n    response = type('R', (), {'status_code': 403})\ndef create_model(*a, **k):\n    raise Gated('hf_secret 403')",
            "accept its terms at .*HF_TOKEN",
        ),
        (
            "class Gated(OSError):\n    response = type('R', (), {'status_code': 401})\ndef create_model(*a, **k):\n    raise Gated('hf_secret 401')",
            "accept its terms at .*HF_TOKEN",
        ),
        (
            "class LocalEntryNotFoundError(FileNotFoundError): pass\ndef create_model(*a, **k):\n    raise LocalEntryNotFoundError('hf_secret')",
            r"\(LocalEntryNotFoundError\): without a network give --weights FILE",
        ),
        (
            "def create_model(*a, **k):\n    raise OSError(28, 'No space left on device')",
            "No space left on device",
        ),
    ],
)
def test_each_way_not_to_have_virchow2_gets_its_line(pretend_timm, monkeypatch, text, message):
    pretend_timm(text)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(MixmagError, match=message) as error:
        data.tile_encoder("virchow2", "cpu")
    assert "hf_secret" not in str(error.value) and "\n" not in str(error.value)


def test_virchow2_is_asked_for_as_its_authors_say_and_checked(pretend_timm):
    """The class token of what the model makes of the normalised picture; a model of another width or with NaN is refused at once."""
    pretend_timm(
        "calls = []\ndef create_model(name, **settings):\n    calls.append((name, settings))\n    return model\n"
    )
    import timm

    class Model(torch.nn.Module):
        def forward(self, x, dim=1280, fill=1.0):
            return (
                x.mean((2, 3)).repeat(1, 500)[:, None, :dim] * torch.linspace(fill, 9, 261)[:, None]
            )

    timm.model = Model()
    encoder = data.tile_encoder("virchow2", "cpu")
    assert timm.calls == [
        (
            "hf-hub:paige-ai/Virchow2",
            {"pretrained": True, "mlp_layer": "SwiGLUPacked", "act_layer": torch.nn.SiLU},
        )
    ]
    tiles = np.random.default_rng(0).integers(0, 256, (3, 224, 224, 3), dtype=np.uint8)
    expected = (tiles.mean((1, 2)) / 255 - [0.485, 0.456, 0.406]) / [
        0.229,
        0.224,
        0.225,
    ]  # (3, 3), the class token's factor is 1
    assert np.allclose(data.encode_tiles(encoder, tiles, 2, "cpu")[:, :3], expected, atol=2e-3)
    for settings, message in (
        ({"dim": 1024}, r"expected floating-point numbers \(2, 1280\)"),
        ({"fill": np.nan}, "NaN"),
    ):
        timm.model.forward = lambda x, settings=settings: Model.forward(timm.model, x, **settings)
        with pytest.raises(MixmagError, match=message):
            data.tile_encoder("virchow2", "cpu")


def test_other_weights_are_another_encoder(tmp_path, monkeypatch, capsys):
    """A slide is tiled again into the same place only by the very same weights."""
    write_tiff(tmp_path / "a.tiff", pink(1000, 1000), 0.5)
    monkeypatch.setattr(data, "tile_encoder", lambda *rest: data.texture)
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "data.py",
            "tile",
            "--slides",
            str(tmp_path / "a.tiff"),
            "--out",
            str(tmp_path / "d"),
            "--region",
            "1",
            "--encoder",
            "virchow2",
            "--weights",
            str(tmp_path / "weights.pt"),
        ],
    )
    codes = []
    for words in ("one", "one", "other"):
        (tmp_path / "weights.pt").write_text(words)
        codes.append(data.tile_command(data.parse()))
    assert codes == [0, 0, 3] and "give another --out" in capsys.readouterr().err


@pytest.fixture
def shallow(monkeypatch):
    """The real timm, whose models get 1 block. A torchvision built for CUDA fails beside a torch for CPU only for want of two operators that nobody calls here."""
    operators = torch.library.Library("torchvision", "FRAGMENT")
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pytest.skip("torchvision is not installed: the architecture cannot be tried")
    except RuntimeError:
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    timm = pytest.importorskip("timm")
    create = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda name, **settings: create(name, **settings, depth=1)
    )
    yield timm


def test_virchow2_of_a_file_is_the_real_architecture(shallow, tmp_path):
    """Weights from either kind of file; what comes out is token 0 of timm's own model behind timm's own transform; strictness."""
    from timm.layers import SwiGLUPacked

    torch.manual_seed(0)
    model = shallow.create_model(
        "vit_huge_patch14_224",
        img_size=224,
        init_values=1e-5,
        num_classes=0,
        reg_tokens=4,
        mlp_ratio=5.3375,
        global_pool="",
        dynamic_img_size=True,
        mlp_layer=SwiGLUPacked,
        act_layer=torch.nn.SiLU,
    ).eval()
    state = model.state_dict()
    assert (
        state["pos_embed"].shape == (1, 261, 1280)
        and state["blocks.0.mlp.fc1.weight"].shape == (6832, 1280)
        and state["reg_token"].shape == (1, 4, 1280)
    )
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "w.pt")
    tiles = np.random.default_rng(0).integers(0, 256, (3, 224, 224, 3), dtype=np.uint8)
    transform = shallow.data.create_transform(
        (3, 224, 224),
        interpolation="bicubic",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        crop_pct=1.0,
    )
    with torch.inference_mode():
        tokens = model(torch.stack([transform(Image.fromarray(tile)) for tile in tiles]))
        assert tokens.shape == (3, 261, 1280)
        for name in ("w.safetensors", "w.pt"):
            assert torch.equal(
                data.tile_encoder("virchow2", "cpu", tmp_path / name)(torch.from_numpy(tiles)),
                tokens[:, 0],
            )
    del state["cls_token"]
    torch.save(
        {**state, "head.weight": torch.zeros(1), "norm.bias": torch.zeros(3)}, tmp_path / "w.pt"
    )
    with pytest.raises(
        MixmagError,
        match="1 missing, such as cls_token; 1 unexpected, such as head.weight; 1 of another shape, such as norm.bias",
    ):
        data.tile_encoder("virchow2", "cpu", tmp_path / "w.pt")
    torch.save({"model": state, "x": Trap(tmp_path / "ran")}, tmp_path / "w.pt")
    for name in ("w.pt", "absent.safetensors", "absent.pt"):
        with pytest.raises(MixmagError, match="cannot be read as a file of named tensors"):
            data.tile_encoder("virchow2", "cpu", tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_a_flag_for_one_slide_does_not_undo_another(tmp_path, monkeypatch, capsys):
    """--mpp for a slide that says nothing leaves what was tiled at the slide's own; another mpp is refused."""
    (tmp_path / "s").mkdir()
    write_tiff(tmp_path / "s" / "says.tiff", pink(900, 900), 0.5)
    write_tiff(tmp_path / "s" / "silent.tiff", pink(900, 900), None)
    flags = ("--slides", tmp_path / "s", "--out", tmp_path / "d", "--region", 1)
    assert tile(monkeypatch, *flags) == 3
    assert (
        tile(monkeypatch, *flags, "--mpp", 0.5) == 0
        and "says: done before" in capsys.readouterr().out
    )
    assert (
        tile(monkeypatch, *flags, "--mpp", 0.4) == 3
        and "was made at 0.5 um/px, now asked for 0.4" in capsys.readouterr().err
    )


def test_folders_are_searched_by_links_and_not_where_hidden(tmp_path):
    (tmp_path / "store" / "deep").mkdir(parents=True)
    for name in ("store/deep/a.tiff", "b.tiff", ".snapshot/b.tiff", "c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "here").mkdir()
    os.symlink(tmp_path / "store", tmp_path / "here" / "linked")
    os.symlink(tmp_path / "here", tmp_path / "here" / "loop")
    os.symlink(tmp_path / ".snapshot", tmp_path / "here" / ".hidden")
    assert [
        p.name
        for p in data.find_slide_files(
            [tmp_path / "here", tmp_path / "b.tiff", tmp_path / "here" / ".." / "b.tiff"]
        )
    ] == ["a.tiff", "b.tiff"]
    for name in ("here/A.svs", "here/B.svs"):
        (tmp_path / name).touch()
    with pytest.raises(MixmagError, match="(?s)A.svs.*a.tiff.*B.svs.*b.tiff"):
        data.find_slide_files([tmp_path / "here", tmp_path / "b.tiff"])


def test_a_dicom_series_is_one_slide(real, capsys):
    files = sorted((real / "slides").glob("openslide-python-boxes_*.dcm"))
    same = {data.openslide.OpenSlide(p).properties["openslide.quickhash-1"] for p in files}
    assert len(data.find_slide_files(files)) == len(same)
    assert capsys.readouterr().err.count("the same DICOM series") == len(files) - len(same)


def test_unscanned_holes_are_no_lost_tiles():
    """A large hole in tissue, which scanners leave out, against one of a lost tile's size."""
    mask = np.ones((300, 300), bool)
    mask[100:200, 100:200] = mask[20:30, 20:30] = False
    plan = data.TilePlan(
        0.5,
        "",
        [5, 10, 20],
        896.0,
        (0.0, 0.0),
        0,
        1.0,
        (),
        [],
        0,
        None,
        mask,
        np.array([1 / 32, 1 / 32]),
    )
    assert (
        not plan.inside[110:190, 110:190].any()
        and plan.inside[20:30, 20:30].all()
        and not plan.inside[0].any()
    )


@pytest.mark.parametrize("crs, corner", [({}, (3000, 2000)), ({"crs": {"type": "name"}}, (0, 0))])
def test_masks_begin_where_their_tool_counts_from(tmp_path, crs, corner):
    """QuPath counts from the corner of the bounds; TRIDENT, whose files have a crs, from the slide's. Points and lines have no area."""

    class Slide:
        dimensions, properties = (
            (9000, 5000),
            {"openslide.bounds-x": "3000", "openslide.bounds-y": "2000"},
        )

    shapes = [
        {"type": "Feature", "geometry": {"type": "Point", "coordinates": [1, 1]}},
        {"type": "Polygon", "coordinates": [[[0, 0], [1000, 0], [1000, 500], [0, 500]]]},
    ]
    (tmp_path / "m.geojson").write_bytes(
        b"\xef\xbb\xbf"
        + json.dumps({"type": "FeatureCollection", "features": shapes, **crs}).encode()
    )
    y, x = np.nonzero(data.read_mask(tmp_path / "m.geojson", Slide, (50, 90)))
    assert (x.min(), y.min()) == (corner[0] // 100, corner[1] // 100) and len(x) >= 50


def test_shares_and_their_lists_of_failures(tmp_path, monkeypatch):
    """torchrun shares the slides out by itself; a whole run replaces the lists that shares left."""
    (tmp_path / "slides").mkdir()
    write_tiff(tmp_path / "slides" / "a.tiff", pink(1000, 1000), 0.5)
    (tmp_path / "slides" / "b.tiff").write_bytes(b"no slide")
    flags = ("--slides", tmp_path / "slides", "--out", tmp_path / "d")
    assert [tile(monkeypatch, *flags, "--shard", f"{i}/2") for i in (0, 1)] == [0, 3] and (
        tmp_path / "d" / "failed-1-of-2.csv"
    ).exists()
    assert tile(monkeypatch, *flags) == 3 and [
        p.name for p in (tmp_path / "d").glob("*failed*")
    ] == ["failed.csv"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(MixmagError, match="torchrun shares the slides out already"):
        tile(monkeypatch, *flags, "--shard", "0/2")


@pytest.mark.parametrize("far", [False, True])
def test_levels_that_are_padded_to_whole_tiles_are_passed_over(tmp_path, far):
    """OpenSlide's downsample, the mean of the sides' ratios, is wrong for them: tissue would be looked for, and pixels taken, somewhere else."""
    import tifffile

    picture = np.full((256 * 21, 256 * 23, 3), 243, np.uint8)
    picture[-2000:, -2000:] = pink(2000, 2000)
    clean = write_tiff(tmp_path / "clean.tiff", picture, 0.25, levels=(1, 2, 32) if far else (1, 2))
    padded = tmp_path / "padded.tiff"
    with tifffile.TiffWriter(padded) as tiff:
        for shrink in (1, 2, 32) if far else (1, 2):
            small = np.asarray(Image.fromarray(picture).reduce(shrink))
            small = np.pad(
                small, [(0, -n % 256) for n in small.shape[:2]] + [(0, 0)], constant_values=243
            )
            tiff.write(
                small,
                tile=(256, 256),
                photometric="rgb",
                compression="zlib",
                subfiletype=int(shrink > 1),
                resolution=(4e4, 4e4),
                resolutionunit="CENTIMETER",
            )
    plans = [data.plan_slide(data.Reader(path), Args(region=1)) for path in (clean, padded)]
    assert data.Reader(padded).downsamples[1] == pytest.approx(
        (23 / 12 + 21 / 11) / 2, rel=1e-3
    ) and [p.level for p in plans] == [1, 0]
    assert plans[0].windows == plans[1].windows and len(plans[0].windows) > 0
    for cell in plans[0].windows:
        a, b = (
            data.read_cell(data.Reader(path), plan, *cell[:2]).astype(int)
            for path, plan in zip((clean, padded), plans)
        )
        assert np.abs(a - b).max() <= 2


def test_a_damaged_coarse_level_costs_nothing(tmp_path):
    """Its thumbnail is made of the level below."""
    picture = np.full((5400, 5400, 3), 243, np.uint8)
    picture[:2700, :2700] = pink(2700, 2700)
    clean = write_tiff(tmp_path / "s.tiff", picture, 0.5, levels=(1, 4))
    import tifffile

    bad = tmp_path / "bad.tiff"
    bad.write_bytes(clean.read_bytes())
    with tifffile.TiffFile(clean) as tiff:
        places = list(zip(tiff.pages[1].dataoffsets, tiff.pages[1].databytecounts))
    with open(bad, "r+b") as f:
        for offset, count in places:
            f.seek(offset)
            f.write(bytes(count))
    (rgb, unread), (same, _) = (data.thumbnail(data.Reader(path), 0.5) for path in (bad, clean))
    assert not unread.any() and np.abs(rgb.astype(int) - same).mean() < 0.5


def test_pixels_that_the_file_does_not_have_are_counted(tmp_path, monkeypatch, capsys):
    """A lost row of tiles from one edge to the other cannot be told from glass that was never scanned, and is said."""
    clean = write_tiff(tmp_path / "s.tiff", pink(2700, 2700), 0.5)
    assert (
        tile(
            monkeypatch,
            "--slides",
            without(clean, *range(5 * 11, 6 * 11)),
            clean,
            "--out",
            tmp_path / "d",
        )
        == 0
    )
    out = capsys.readouterr().out
    assert out.count("3 cells hold pixels that the file does not have, taken for glass") == 1
    assert [
        data.read_slide(tmp_path / f"d/slides/{i}.safetensors").meta["n_unscanned"]
        for i in ("less-s", "s")
    ] == [3, 0]


def test_a_name_that_is_no_text_fails_alone(tmp_path):
    """A name in another encoding than the system's, as on old file servers."""
    (tmp_path / "in").mkdir()
    good = write_tiff(tmp_path / "in" / "a.tiff", pink(1000, 1000), 0.5)
    (tmp_path / "in" / os.fsdecode(b"Pr\xe4parat.tiff")).write_bytes(good.read_bytes())
    _, err = run("data.py", "tile", "--slides", "in", "--out", "d", cwd=tmp_path, code=3)
    assert [p.name for p in (tmp_path / "d" / "slides").iterdir()] == [
        "a.safetensors"
    ] and "the name is no UTF-8; rename the file" in err
    with open(tmp_path / "d" / "failed.csv", newline="", encoding="utf-8") as f:
        assert [r["slide_id"] for r in csv.DictReader(f)] == ["Pr\\udce4parat"]


def test_blood_is_tissue():
    """Red cells in H&E (mean of a clot in a real section: 183, 52, 76) are as red as ink; but ink is smooth."""
    rng = np.random.default_rng(0)
    picture = np.full((300, 300, 3), 243, np.uint8)
    y, x = np.mgrid[:300, :300]
    clot = (y - 150) ** 2 + (x - 150) ** 2 < 90**2
    picture[clot] = np.clip((183, 52, 76) + rng.normal(0, 12, (clot.sum(), 1)), 0, 255)
    assert data.find_tissue(picture)[clot].mean() > 0.9
    smooth = np.full((300, 300, 3), 243, np.uint8)
    smooth[140:170] = (200, 40, 50)
    assert not data.find_tissue(smooth)[145:165].any()
