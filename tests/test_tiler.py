"""The tiler: slides, mpp, tissue, cells, encoders.     python -m pytest tests/test_tiler.py"""

import io
import itertools
import os
import struct
import sys
from types import SimpleNamespace

import numpy as np
import openslide
import pytest
import safetensors.torch
import tifffile
import torch
from bench import jpeg_tiles, tile_sparse, write_jpeg_tiff
from conftest import failures, run
from PIL import Image, ImageDraw, ImageFilter
from scipy.interpolate import interp1d
from scipy.spatial import cKDTree
from test_train import Evil

import data
from data import MixmagError, SlideReadError, TileSettings
from mixmag import Geometry


# ---------------------------------------------------------------------------------------- helpers
def shrunk(picture, n):
    return np.asarray(Image.fromarray(picture).reduce(n)) if n > 1 else picture


def write_tiff(path, picture, mpp, levels=(1,), tile=(256, 256), padded=False):
    """A TIFF pyramid; padded: to whole tiles of glass."""
    path.parent.mkdir(exist_ok=True)
    with tifffile.TiffWriter(path) as tiff:
        for n in levels:
            small = shrunk(picture, n)
            if padded:
                margins = [(0, -side % 256) for side in small.shape[:2]]
                small = np.pad(small, [*margins, (0, 0)], constant_values=243)
            tiff.write(
                small,
                tile=tile,
                photometric="rgb",
                compression="zlib",
                subfiletype=int(n > 1),
                resolution=(1e4 / mpp / n,) * 2 if mpp else None,
                resolutionunit="CENTIMETER" if mpp else None,
            )
    return path


def pink(height, width, seed=0):
    """Something that counts as tissue."""
    rng = np.random.default_rng(seed)
    small = rng.integers(80, 200, (height // 32 + 1, width // 32 + 1, 3), dtype=np.uint8)
    small[..., 1] //= 2
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def noisy(height, width):
    noise = np.random.default_rng(height).normal(0, 9, (height, width, 3))
    return np.clip(pink(height, width) + noise, 0, 255).astype(np.uint8)


def glass(height, width):
    return np.full((height, width, 3), 243, np.uint8)


def tile_places(path, page=0):
    """[(start, length), ...] of the tiles of a page."""
    with tifffile.TiffFile(path) as tiff:
        found = tiff.pages[page]
        return list(zip(found.dataoffsets, found.databytecounts, strict=True))


def spoil(path, *numbers, page=0):
    """A copy of a TIFF in which the bytes of some tiles are zero."""
    content = bytearray(path.read_bytes())
    for number in numbers:
        start, length = tile_places(path, page)[number]
        content[start : start + length] = bytes(length)
    bad = path.with_name(f"bad{len(numbers)}-{path.name}")
    bad.write_bytes(content)
    return bad


def without(path, *numbers):
    """A copy of a TIFF from whose first level some tiles are absent: their byte counts are zero."""
    bad = path.with_name(f"less-{path.name}")
    bad.write_bytes(path.read_bytes())
    with tifffile.TiffFile(bad, mode="r+b") as tiff:
        counts = list(tiff.pages[0].databytecounts)
        for number in numbers:
            counts[number] = 0
        tiff.pages[0].tags["TileByteCounts"].overwrite(counts)
    return bad


def openslide_alone(path):
    reader = data.Reader(path)
    reader.jpeg = {}
    return reader


def region_or_refusal(reader, *place):
    try:
        return reader.region(*place).tobytes()
    except SlideReadError:
        return "refused"


def tile(*argv):
    """`data.py tile` in this process; its exit code."""
    return data.tile_command(
        data.parse_command(["tile", *map(str, argv)], "data.py", None, data.COMMANDS)
    )


def read_slide(folder, slide_id):
    return data.read_slide(folder / "slides" / f"{slide_id}.safetensors")


# ------------------------------------------------------------------------- cells: the right pixels
def tile_edges(plan, axis, k):
    """The edges of the tiles of magnification index k, in the level's pixels. Axis 0 is x."""
    lines = plan.lines[axis]
    places = np.arange((len(lines) - 1) * 2**k + 1) / 2**k
    return np.interp(places, np.arange(len(lines)), lines)


def means_along(picture, axis, begin, end):
    """The means of a picture over 224 equal parts of an interval of an axis, by its integral."""
    integral = np.insert(np.cumsum(picture, axis, float), 0, 0, axis)
    edges = np.linspace(begin, end, 225)
    at_edges = interp1d(np.arange(integral.shape[axis]), integral, axis=axis)(edges)
    return np.diff(at_edges, axis=axis) * 224 / (end - begin)


@pytest.mark.parametrize(
    "scale, levels",
    [(1, (1,)), (1.005, (1,)), (1.26, (1,)), (2.01, (1,)), (4, (1,)), (2, (1, 2)), (4.02, (1, 4))],
)
def test_tiles_are_area_means(tmp_path, scale, levels):
    """Every pixel against the definition in floats. 10x is the mean of what was rounded at 20x, and
    Pillow rounds a half up: hence a bias below half a grey level."""
    side = 4 * int(1.1 * 112 * scale)
    picture = noisy(side, side)
    reader = data.Reader(write_tiff(tmp_path / "s.tiff", picture, 0.5 / scale, levels))
    plan = data.TilePlan(reader, TileSettings(magnifications=(10, 20), min_tissue=0.0))
    assert plan.downsample == max(n for n in levels if n <= scale)
    tiles = data.read_cell(reader, plan, 0, 0)
    source = shrunk(picture, int(plan.downsample))
    for entry, (k, r, c) in enumerate(Geometry(1, [10, 20]).token_table().tolist()):
        x, y = tile_edges(plan, 0, k), tile_edges(plan, 1, k)
        rows = means_along(source, 0, y[r], y[r + 1])
        off = tiles[entry] - means_along(rows, 1, x[c], x[c + 1])
        assert abs(off.mean()) < 0.5 and np.abs(off).mean() < 0.8
    parent = tiles[1:].reshape(2, 2, 224, 224, 3).swapaxes(1, 2).reshape(224, 2, 224, 2, 3)
    assert np.abs(parent.mean(axis=(1, 3)) - tiles[0]).max() <= 0.5


class Ramp(data.Reader):
    """A slide of any size and pyramid. Its red grows along one axis, by one in 8 level-0 pixels
    from the corner of what is read, and its green falls as much, so that rounding cancels."""

    def __init__(self, width, height, downsamples, mpp, level_sizes=None):
        self.path = data.Path("ramp")
        self.properties = {"openslide.mpp-x": str(mpp), "openslide.mpp-y": str(mpp)}
        self.downsamples = downsamples
        sizes = [(round(width / d), round(height / d)) for d in downsamples]
        self.level_sizes = level_sizes or sizes
        self.size = self.level_sizes[0]
        self.axis = 0

    def region(self, level, left, top, right, bottom):
        scale = self.downsamples[level]
        self.corner = round(left * scale), round(top * scale)  # OpenSlide counts from here
        length = (right - left, bottom - top)[self.axis]
        ramp = np.round((np.arange(length) + 0.5) * scale / 8)
        rgba = np.full((bottom - top, right - left, 4), 255, np.uint8)
        rgba[..., 0] = ramp[None] if self.axis == 0 else ramp[:, None]
        rgba[..., 1] = 255 - rgba[..., 0]
        return rgba


@pytest.fixture
def no_tissue(monkeypatch):
    """Plans are made without looking at pixels."""

    def empty(reader, mpp, own):
        return None, np.zeros([int(n * mpp / 16) for n in reader.size[::-1]], bool)

    monkeypatch.setattr(data, "tissue_mask", empty)


PYRAMIDS = [(1.0,), (1.0, 2.0, 4.0), (1.0, 2.0005, 4.00013)]
PYRAMIDS += [(1.0, 3.9998, 15.9991), (1.0, 1.9999, 4.00013)]


def test_children_tile_their_parent_at_any_mpp(no_tissue):
    """Random mpp and pyramids: edges nest exactly and lie within a pixel of the finest
    magnification of where the lattice has them, and a tile's pixels show its own place."""
    rng = np.random.default_rng(0)
    for i in range(200):
        mpp = rng.uniform(0.2, 0.6)
        magnifications = (5, 10, 20) if mpp <= 0.51 else (5, 10)
        width, height = rng.integers(4000, 90000, 2).tolist()
        reader = Ramp(width, height, PYRAMIDS[i % len(PYRAMIDS)], mpp)
        settings = TileSettings(magnifications=magnifications, region=int(rng.integers(1, 4)))
        plan = data.TilePlan(reader, settings)
        finest = 10 / magnifications[-1] / mpp  # level-0 px along one of its pixels
        assert plan.cell_px == pytest.approx(448 / mpp, rel=1e-12)
        assert plan.downsample <= finest * 1.02
        for axis, (k, magnification) in itertools.product(range(2), enumerate(magnifications)):
            edges = tile_edges(plan, axis, k) * plan.downsample
            exact = plan.cell_px / 2**k * np.arange(len(edges))
            assert np.abs(edges - exact).max() <= finest and (np.diff(edges) > 0).all()
            if k > 0:
                parents = tile_edges(plan, axis, k - 1) * plan.downsample
                assert np.abs(edges[::2] - parents).max() < 1e-6
            effective = np.diff(edges) * mpp / 224
            assert np.allclose(effective, 10 / magnification, rtol=0.02)
        if i % 10 == 0:
            axis = reader.axis = i // 10 % 2
            cell = [int(rng.integers(len(lines) - 1)) for lines in plan.lines]
            tiles = data.read_cell(reader, plan, *cell)
            red, green = tiles[..., :2].astype(float).mean(axis=(1, 2)).T
            k, row, col = np.array(Geometry(1, magnifications).token_table().tolist()).T
            place = (col, row)[axis]
            centre = (cell[axis] + (place + 0.5) / 2.0**k) * plan.cell_px - reader.corner[axis]
            assert np.abs((red + 255 - green) * 4 - centre).max() <= finest, (mpp, plan.downsample)


def test_nothing_is_upsampled(no_tissue):
    def plan(mpp, downsamples=(1.0,), level_sizes=None, **settings):
        reader = Ramp(9000, 9000, downsamples, mpp, level_sizes)
        return data.TilePlan(reader, TileSettings(**settings))

    plan(0.509)
    with pytest.raises(MixmagError, match="0.52 .*coarser than 20x .* lower --magnifications"):
        plan(0.52)
    assert plan(1.0, magnifications=(5, 10)).level == 0
    assert plan(0.25, (1.0, 2.0005, 4.0)).level == 1
    assert plan(0.252, (1.0, 2.0, 4.0)).level == 0
    assert plan(0.25, (1.0, 4.0)).shrink == 2
    with pytest.raises(MixmagError, match="does not fit level 0"):
        plan(0.25, (1.0, 2.0), [(8960, 8960), (4478, 4480)])


def test_a_macro_is_never_taken_for_the_scan(tmp_path):
    """It is refused as the first picture. As a level of the pyramid it is passed over."""
    paths = [tmp_path / "0.tiff", tmp_path / "1.tiff"]
    for kind, path in enumerate(paths):
        with tifffile.TiffWriter(path) as tiff:
            for picture, subfiletype in ((glass(900, 1200), 0), (pink(2000, 2000), kind)):
                form = {"photometric": "rgb", "subfiletype": subfiletype}
                tiff.write(picture, tile=(256, 256), **form)
    with pytest.raises(SlideReadError, match=r"\(1200, 900\) px, a later one \(2000, 2000\); save"):
        data.Reader(paths[0])
    reader = data.Reader(paths[1])
    assert reader.level_sizes == ((2000, 2000), (1200, 900)) and reader.level_for(8.0) == 0


@pytest.mark.parametrize("levels", [(1, 2), (1, 2, 32)])
def test_levels_that_are_padded_to_whole_tiles_are_passed_over(tmp_path, levels):
    """OpenSlide's downsample is wrong for them: tissue and pixels would be taken from elsewhere."""
    picture = glass(256 * 21, 256 * 23)
    picture[-2000:, -2000:] = pink(2000, 2000)
    readers = [
        data.Reader(write_tiff(tmp_path / "clean.tiff", picture, 0.25, levels)),
        data.Reader(write_tiff(tmp_path / "padded.tiff", picture, 0.25, levels, padded=True)),
    ]
    plans = [data.TilePlan(reader, TileSettings(region=1)) for reader in readers]
    assert [plan.level for plan in plans] == [1, 0]
    assert plans[0].windows == plans[1].windows and plans[0].windows
    for col, row, _, _ in plans[0].windows:
        a, b = (data.read_cell(r, p, col, row) for r, p in zip(readers, plans, strict=True))
        assert np.abs(a.astype(int) - b).max() <= 2


def test_openslide_is_never_asked_for_what_is_not_there(tmp_path, monkeypatch):
    asked = []
    read = openslide.OpenSlide.read_region

    def noted(slide, location, level, size):
        asked.append(level)
        assert 0 <= level < slide.level_count and min(size) >= 1 and min(location) >= 0
        ends = np.round(np.divide(location, slide.level_downsamples[level])) + size
        assert (ends <= slide.level_dimensions[level]).all()
        return read(slide, location, level, size)

    monkeypatch.setattr(openslide.OpenSlide, "read_region", noted)
    rng = np.random.default_rng(9)
    for i in range(6):
        mpp = rng.uniform(0.2, 0.5)
        height, width = (448 / mpp * rng.uniform(1, 2, 2)).astype(int)
        levels = [(1,), (1, 2, 4), (1, 3)][i % 3]
        path = write_tiff(tmp_path / f"{i}.tiff", pink(height, width, i), mpp, levels)
        plan = data.TilePlan(data.Reader(path), TileSettings(min_tissue=0.0, region=1))
        assert len(list(data.read_cells(data.Reader(path), plan))) == len(plan.cells) > 0
    assert set(asked) == {0, 1, 2}


# ------------------------------------------------------------------------- JPEG tiles read directly
RGB = {"keep_rgb": True, "subsampling": "4:4:4"}


def write_jpeg(path, picture, levels=(1,), side=256, rgb=False, shared=False):
    """A tiled JPEG TIFF; shared: as scanners', its tiles share tables and lack Adobe's marker."""
    form = RGB if rgb else {}
    pages = []
    tables = b""
    for n in levels:
        small = shrunk(picture, n)
        tiles = list(jpeg_tiles(small, side, **form))
        if shared:
            tables = next(jpeg_tiles(small, side, streamtype=1, **form))
            without_tables = jpeg_tiles(small, side, streamtype=2, **form)
            tiles = [jpeg.replace(data.ADOBE + b"\0", b"") for jpeg in without_tables]
        pages.append((small.shape[1], small.shape[0], tiles))
    write_jpeg_tiff(path, pages, 0.5, side, 2 if rgb else 6, tables)
    return path


@pytest.mark.parametrize(
    "form", [{}, {"shared": True}, {"rgb": True}, {"rgb": True, "shared": True}, {"side": 112}]
)
def test_jpeg_tiles_are_what_openslide_makes_of_them(tmp_path, form):
    path = write_jpeg(tmp_path / "s.tiff", noisy(904, 1200), levels=(1, 2, 4, 8), **form)
    reader, truth = data.Reader(path), openslide_alone(path)
    rng = np.random.default_rng(0)
    assert list(reader.jpeg) == [0, 1, 2, 3]
    for level, (width, height) in enumerate(reader.level_sizes):
        corners = rng.integers(0, (width, height), (20, 2, 2))
        low, high = corners.min(axis=1), corners.max(axis=1) + 1
        boxes = [*np.hstack([low, high]).tolist(), (0, 0, width, height)]
        for box in boxes:
            assert np.array_equal(reader.region(level, *box), truth.region(level, *box))


def test_jpeg_tiles_of_real_slides_are_what_openslide_makes_of_them(real):
    for path in sorted((real / "slides").glob("*.svs")):
        reader, truth = data.Reader(path), openslide_alone(path)
        assert list(reader.jpeg) == ([0] if path.name.startswith("CMU") else [])
        for level in reader.jpeg:
            place = level, 100, 50, 1300, 1700
            assert np.array_equal(reader.region(*place), truth.region(*place))


def test_a_level_of_an_odd_downsample_is_not_interpolated(tmp_path):
    """OpenSlide draws such a level at parts of a pixel; the pixels are those of the file."""
    picture, box = noisy(1024, 1030), (150, 100, 250, 250)
    path = write_jpeg(tmp_path / "s.tiff", picture, levels=(1, 4))
    reader = data.Reader(path)
    assert reader.downsamples[1] % 1 > 0.9 and list(reader.jpeg) == [0, 1]
    first = Image.open(io.BytesIO(next(jpeg_tiles(shrunk(picture, 4), 256))))
    found = reader.region(1, *box)
    assert np.array_equal(found[..., :3], first.crop(box))
    assert 0 < np.abs(openslide_alone(path).region(1, *box).astype(int) - found).mean() < 5


def grey_tile(side):
    file = io.BytesIO()
    Image.fromarray(noisy(side, side)[..., 0]).save(file, "JPEG")
    return file.getvalue()


ODD = {  # what one tile of level 0 becomes, and whether the others are still read directly
    "aperio, absent tile": (lambda jpeg: b"", False),
    "no picture": (lambda jpeg: b"\0\0" + jpeg[2:], True),
    "no first picture": (lambda jpeg: b"\0\0" + jpeg[2:], False),
    "grey": (lambda jpeg: grey_tile(128), True),
    "rgb": (lambda jpeg: next(jpeg_tiles(noisy(128, 128), 128, **RGB)), True),
    "size": (lambda jpeg: next(jpeg_tiles(noisy(96, 96), 96)), True),
    "two pages of a size": (lambda jpeg: jpeg, True),
    "tables as text": (lambda jpeg: jpeg, False),
    "colours": (lambda jpeg: jpeg, False),
    "lossless": (lambda jpeg: jpeg, False),
}


@pytest.mark.parametrize("odd", ODD)
def test_odd_jpeg_files_are_openslides_to_judge(tmp_path, odd):
    """Every place is what OpenSlide makes of it, or refused where OpenSlide refuses it."""
    path, side = tmp_path / "s.tiff", 128
    levels = []
    for n in (1, 4):
        small = shrunk(noisy(1024, 1024), n)
        levels.append((len(small), len(small), list(jpeg_tiles(small, side))))
    change, is_direct = ODD[odd]
    number = 0 if odd == "no first picture" else 9
    levels[0][2][number] = change(levels[0][2][number])
    if odd == "two pages of a size":
        levels.append((256, 256, levels[1][2][::-1]))
    tables = b"\xff\xd8\xff\xd9" * 4 if odd == "tables as text" else b""
    description = b"Aperio Image Library v1" if "aperio" in odd else b"made for a test"
    photometric = 2 if odd == "colours" else 6
    write_jpeg_tiff(path, levels, 0.5, side, photometric, tables, description)
    if odd == "tables as text":
        bytes_tag, text_tag = (struct.pack("<HHQ", 347, kind, 16) for kind in (7, 2))
        path.write_bytes(path.read_bytes().replace(bytes_tag, text_tag))
    if odd == "lossless":
        write_tiff(path, noisy(1024, 1024), 0.5, (1, 4))
    truth, reader = openslide_alone(path), data.Reader(path)
    assert (0 in reader.jpeg) == is_direct
    for level, (width, _) in enumerate(reader.level_sizes):
        for left, top in itertools.product(range(0, width, side // 2), repeat=2):
            place = level, left, top, left + side // 2, top + side // 2
            assert region_or_refusal(reader, *place) == region_or_refusal(truth, *place), place


def test_damaged_jpeg_is_openslides_to_judge(tmp_path):
    path = write_jpeg(tmp_path / "s.tiff", noisy(700, 700))
    rng, seen = np.random.default_rng(0), set()
    whole = path.read_bytes()
    start, length = tile_places(path)[4]
    for how in ["flip", "flip", "noise", "zeros", "end"] * 40:
        at = int(rng.integers(start, start + length - 8))
        rest = start + length - at
        damage = {
            "flip": bytes([whole[at] ^ 1 << at % 8]),
            "noise": rng.bytes(min(60, rest)),
            "zeros": bytes(rest),
            "end": b"\xff\xd9",
        }[how]
        path.write_bytes(whole[:at] + damage + whole[at + len(damage) :])
        reader, truth = data.Reader(path), openslide_alone(path)
        assert list(reader.jpeg) == [0]
        found = region_or_refusal(reader, 0, 200, 200, 600, 600)
        assert found == region_or_refusal(truth, 0, 200, 200, 600, 600), (how, at - start)
        seen.add((how, found == "refused"))
        neighbour = 0, 0, 0, 256, 256
        assert np.array_equal(reader.region(*neighbour), truth.region(*neighbour))
    assert seen >= {(how, True) for how in ("flip", "noise", "zeros", "end")} | {("flip", False)}


@pytest.mark.parametrize(
    "tag, page, value, size",
    [
        ("TileByteCounts", 1, 2**31, (700, 700)),
        ("TileWidth", 1, 2**28, (700, 700)),
        ("ImageWidth", 0, 3000, (3000, 1400)),
    ],
)
def test_tiles_beyond_all_measure_are_refused(tmp_path, tag, page, value, size):
    """OpenSlide would end the process for want of memory, or mix up the tiles; others are tiled."""
    write_tiff(tmp_path / "good.tiff", pink(1400, 1400), 0.5)
    bad = write_jpeg(tmp_path / "bad.tiff", pink(1400, 1400), levels=(1, 2))
    with tifffile.TiffFile(bad, mode="r+b") as tiff:
        found = tiff.pages[page].tags[tag]
        found.overwrite((*found.value[:8], value) if tag == "TileByteCounts" else value)
    assert tile("--slides", tmp_path, "--out", tmp_path / "d") == 3
    assert f"its tiles do not make {size} px" in failures(tmp_path / "d/failed.csv")["bad"]
    assert read_slide(tmp_path / "d", "good").slide_id == "good"


# ---------------------------------------------------------------------------------------------- mpp
def says(x=None, y=None, power=None):
    """The properties of a slide that says this of itself."""
    named = {"openslide.mpp-x": x, "openslide.mpp-y": y, "openslide.objective-power": power}
    return {name: value for name, value in named.items() if value is not None}


def check_mpp(properties, given, expected):
    """expected: the mpp, or what the refusal says. The user's goes before the slide's."""
    if isinstance(expected, str):
        with pytest.raises(MixmagError, match=expected):
            data.slide_mpp(properties, given)
    else:
        source = data.GIVEN if given else "openslide.mpp-x"
        assert data.slide_mpp(properties, given) == (pytest.approx(expected), source)


@pytest.mark.parametrize(
    "properties, given, expected",
    [
        (says("0,25", "0,25"), None, 0.25),
        (says("0.5", "0.509"), None, 0.5045),
        (says("0.5", "0.5", power="40"), None, 0.5),
        (says("0.499", "0.499"), 0.5, 0.5),
        (says(), 0.5, 0.5),
        (says(power="40"), 0.5, 0.5),
        (says("0.0274", "0.0274"), 0.274, 0.274),
        (says("1000", "1000"), 0.25, 0.25),
        (says("0", "0"), 0.25, 0.25),
        (says("nan", "nan"), 0.25, 0.25),
        (says("0.25", "0.5"), 0.25, 0.25),
        (says(), None, "no mpp.*--mpp or --manifest"),
        (says(power="20"), None, "no mpp"),
        (says("0", "0"), None, "0 x 0 .*0.1 to 4.*--mpp"),
        (says("nan", "0.5"), None, "nan x 0.5 .*--mpp"),
        (says("", "0.5"), None, "nan x 0.5 .*--mpp"),
        (says("0.5"), None, "0.5 x nan .*--mpp"),
        (says("-0.5", "-0.5"), None, "-0.5 x -0.5"),
        (says("25", "25"), None, "25 x 25 .*0.1 to 4"),
        (says("0.0274", "0.0274"), None, "0.0274 x .*0.1 to 4"),
        (says("0.5", "0.52"), None, "0.5 x 0.52 .*equal in x and y"),
        (says("0.25", "0.25", "20"), 0.5, f"{data.GIVEN} says 0.5.*0.25 x .*leave it out"),
        (says("0.5", "0.5"), 0.489, "leave it out"),
    ],
)
def test_mpp_is_the_users_or_the_slides_and_never_guessed(properties, given, expected):
    check_mpp(properties, given, expected)


@pytest.mark.parametrize(
    "power, words", [("40", ", not its objective power of 40"), ("20", ""), ("", ""), ("0", "")]
)
def test_a_slides_power_is_no_mpp_and_said_where_it_is_another(tmp_path, power, words):
    reader = data.Reader(write_tiff(tmp_path / "s.tiff", pink(1000, 1000), 0.5))
    reader.properties["openslide.objective-power"] = power
    report = data.plan_report(reader, data.TilePlan(reader, TileSettings()), 39, 0.25)
    assert report.startswith(f"s: 0.5 um/px (openslide.mpp-x{words}), level 0, 1 of 1 window ")


@pytest.mark.parametrize(
    "name, given, expected",
    [
        ("CMU-1-Small-Region.svs", None, 0.499),
        ("CMU-1-Small-Region.svs", 0.25, "leave it out"),
        ("luna-1065626.svs", None, 0.5026),
        ("TCGA-CR-7395-01A-01-TS1.svs", None, "no mpp"),
        ("TCGA-CR-7395-01A-01-TS1.svs", 0.5, 0.5),
        ("ezwsi-multiframe_camelyon.dcm", None, "28.97 x 28.97"),
        ("openslide-python-boxes.tiff", None, "352.8 x 352.8"),
        ("panimg-valid_tiff.tif", None, "1000 x 1000"),
        ("panimg-valid_tiff.tif", 0.5, 0.5),
        ("panimg-invalid_resolutions_tiff.tif", None, "no mpp"),
        ("panimg-no_dzi.tif", None, 0.9723706),
        ("highdicom-sm_image.dcm", None, 0.499),
        ("openslide-python-boxes_0.dcm", None, 0.499),
    ],
)
def test_mpp_of_real_slides(real, name, given, expected):
    check_mpp(data.Reader(real / "slides" / name).properties, given, expected)


def test_manifest_names_slides_by_file_or_id(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text('slide,mpp,note\nfolder/a.svs,"0,25",x\nb.c,0.5,\nd.svs,,nothing said\n')
    manifest = data.read_manifest(path, {"a", "b.c"})
    assert manifest == {"a": 0.25, "b.c": 0.5}
    for row in ("b,half", "b,25", "b,0", "b,nan", "a.svs,0.5"):
        path.write_text(f"slide,mpp\na,0.5\n{row}\n")
        said = f"line 3: expected one number of 0.1 to 4 um/px for '{row[0]}'"
        with pytest.raises(MixmagError, match=said):
            data.read_manifest(path, set())
    path.write_text("wsi,mpp\na,0.5\n")
    with pytest.raises(MixmagError, match="column slide is missing"):
        data.read_manifest(path, set())


# ------------------------------------------------------------------------------------------- tissue
def test_otsu_equals_the_definition():
    rng = np.random.default_rng(0)

    def within(values, t):
        classes = (values[values <= t], values[values > t])
        return sum(part.size * part.var() for part in classes if part.size)

    for _ in range(20):
        values = np.concatenate([rng.normal(40, 15, 300), rng.normal(170, 20, 80)])
        values = values.clip(0, 255).astype(np.uint8)
        best = min(within(values, t) for t in range(256))
        assert within(values, data.otsu(values)) == pytest.approx(best)
    assert data.otsu(np.full(10, 7, np.uint8)) == 0


INK = {"blue": (30, 60, 150), "green": (20, 130, 70), "black": (25, 25, 30), "red": (225, 35, 50)}
STAINS = {  # density in R, G, B
    "hematoxylin": (1.25, 1.35, 0.55),
    "eosin": (0.12, 0.95, 0.45),
    "blue": (0.8, 0.65, 0.42),
    "dab": (0.65, 1.3, 1.8),
}


def smooth_noise(rng, side, px):
    small = rng.standard_normal((side // px + 4,) * 2).astype(np.float32)
    return np.asarray(Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC))


def dots(rng, side, share, radius):
    image = Image.new("L", (side, side))
    for x, y in rng.integers(0, side, size=(int(share * side * side), 2)):
        ImageDraw.Draw(image).ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    return np.asarray(image, np.float32) / 255


def strokes(rng, side):
    image = Image.new("L", (side, side))
    for _ in range(2):
        points = [tuple(p) for p in rng.uniform(0, side, (4, 2))]
        width = int(rng.uniform(200, 450))
        ImageDraw.Draw(image).line(points, fill=255, width=width, joint="curve")
    return np.asarray(image.filter(ImageFilter.GaussianBlur(8)), np.float32)[..., None] / 255


def paint(seed, fault, side=1792):
    """A section on glass at 2 um/px with one thing wrong with it, and where its tissue is."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    tissue = (x**2 + y**2 + 0.15 * smooth_noise(rng, side, 400) < 0.45) & (fault != "empty")
    nuclei = dots(rng, side, 0.006, 3)
    eosin = 0.4 + 0.12 * smooth_noise(rng, side, 8) + 0.15 * smooth_noise(rng, side, 60)
    amount = {"hematoxylin": nuclei, "eosin": eosin.clip(0.05)}
    if fault == "fat":  # walls of some 4 um round cells of 80
        tree = cKDTree(rng.uniform(0, side, (int(side * side / 40**2), 2)))
        near, _ = tree.query(np.stack(np.mgrid[:side, :side], -1), k=2)
        amount = {"eosin": 0.7 * (near[..., 1] - near[..., 0] < 4)}
    elif fault == "ihc":
        amount = {"blue": 0.5 * nuclei + 0.03, "dab": 0.8 * dots(rng, side, 0.0005, 4)}
    density = sum(np.multiply.outer(a * tissue, STAINS[k]) for k, a in amount.items())
    if fault in ("haze", "empty"):
        smear = Image.fromarray((255 * (smooth_noise(rng, side, 500) > 1)).astype(np.uint8))
        smear = np.asarray(smear.filter(ImageFilter.GaussianBlur(20))) / 255
        haze = 0.05 + 0.015 * smooth_noise(rng, side, 800).clip(-2, 2) + 0.06 * smear
        density = density + np.multiply.outer(haze, STAINS["eosin"])
    light = np.array([243, 242, 244]) * np.exp(-density)
    if fault in INK:
        ink = strokes(rng, side) * rng.uniform(0.85, 0.97)
        colour = np.array(INK[fault]) + rng.integers(-15, 16, 3)
        light = light * (1 - ink + ink * colour / 255)
        tissue &= ink[..., 0] < 0.3
    if fault == "borders":
        outside = (np.hypot(x, y) > 0.95) | (y < -0.8) | (x > 0.9)
        light[outside] = 3
        tissue &= ~outside
    file = io.BytesIO()
    light = (light + rng.normal(0, 3, light.shape)).clip(0, 255).astype(np.uint8)
    Image.fromarray(light).save(file, "JPEG", quality=80)
    return np.asarray(Image.open(file)), tissue


@pytest.mark.parametrize("fault", ["none", "haze", "borders", "ihc", "fat", *INK])
def test_tissue_is_found_whatever_is_on_the_glass(tmp_path, fault):
    """Intersection over union with what was drawn; thresholds were tuned on other seeds."""
    picture, truth = paint(11, fault)
    _, mask = data.tissue_mask(data.Reader(write_tiff(tmp_path / "s.tiff", picture, 2.0)), 2.0)
    truth = shrunk(truth.astype(np.uint8) * 255, 8) > 127
    iou = (mask & truth).sum() / (mask | truth).sum()
    least = 0.8 if fault in ("ihc", "fat") else 0.85
    assert truth.mean() > 0.05 and iou > least, iou


def test_no_tissue_is_no_tissue():
    noise = np.random.default_rng(0).normal(240, 2.5, (300, 400, 3)).clip(0, 255).astype(np.uint8)
    flat = [np.full((300, 400, 3), colour, np.uint8) for colour in (255, (243, 241, 238), 0)]
    one_pixel = np.full((1, 1, 3), (200, 90, 150), np.uint8)
    for picture in (*flat, noise, one_pixel, shrunk(paint(11, "empty")[0], 8)):
        assert not data.find_tissue(picture).any()


@pytest.mark.parametrize("side", [40, 112])
def test_pale_smooth_tissue_is_tissue(side):
    """Without any texture; the larger one leaves an eighth of the picture to the glass."""
    picture = np.full((120, 120, 3), 245, np.uint8)
    picture[4 : 4 + side, 4 : 4 + side] = (235, 205, 225)
    assert np.array_equal(data.find_tissue(picture), picture[..., 1] == 205)


def test_blood_is_tissue():
    """Red cells (a real clot's mean: 183, 52, 76) are as red as ink; ink is smooth."""
    picture = glass(300, 300)
    y, x = np.mgrid[:300, :300]
    clot = (y - 150) ** 2 + (x - 150) ** 2 < 90**2
    noise = np.random.default_rng(0).normal(0, 12, (clot.sum(), 1))
    picture[clot] = np.clip((183, 52, 76) + noise, 0, 255)
    assert data.find_tissue(picture)[clot].mean() > 0.9
    smooth = glass(300, 300)
    smooth[140:170] = (200, 40, 50)
    for grain in (0.0, 36.0):  # the variance inside pixels
        assert not data.find_tissue(smooth, grain)[145:165].any()


# Of each picture: (x, y) on tissue and on none, seen by eye.
PICTURES = {
    "histoprep-slide_with_ink.jpeg": (
        "300,250 1800,400 2500,300 3300,550 4600,650 5300,550",
        "3850,830 3900,880 3780,860 100,850 3000,150 2000,850 5000,150 4160,380",
    ),
    "tissueloc-20181218042458.jpg": (
        "200,450 330,370 600,150 550,870 1300,450 1500,450 1650,800",
        "800,200 1050,450 40,890 100,950 960,990",
    ),
    "tissueloc-20181218042533.jpg": (
        "60,550 300,700 800,350 1000,430 1300,650 1600,700 1450,400",
        "400,100 200,250 1000,530 1700,200 900,60",
    ),
    "tissueloc-20181218042607.jpg": (
        "150,110 50,650 400,400 700,450 880,200 1300,450 1700,500 1250,880",
        "30,100 570,390 940,600 1000,100 400,900",
    ),
}


@pytest.mark.parametrize("name", PICTURES)
def test_tissue_of_real_pictures(real, name):
    shrink = 8 if "ink" in name else 1
    picture = Image.open(real / "pictures" / name).convert("RGB").reduce(shrink)
    mask = data.find_tissue(np.asarray(picture))
    for points, is_tissue in zip(PICTURES[name], (True, False), strict=True):
        for point in points.split():
            x, y = map(int, point.split(","))
            assert mask[y // shrink, x // shrink] == is_tissue, point


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


def test_pale_tissue_of_a_real_slide(real):
    """As much of it as at 2 um/px is coloured more than glass: 0.242, 25 windows."""
    reader = data.Reader(real / "slides" / "atlas-EAS17-HE-2um.tiff")
    plan = data.TilePlan(reader, TileSettings(magnifications=(5,)))
    assert abs(plan.mask.mean() - 0.242) < 0.01
    assert 24 <= len(plan.windows) <= 26 and plan.tissue_held > 0.85


@pytest.mark.parametrize("levels, largest", [((1, 4), 10), ((1,), 1)])
def test_the_thumbnail_is_the_box_mean(tmp_path, levels, largest):
    """The level of a quarter is a little less exact."""
    picture = pink(2776, 5000)
    path = write_tiff(tmp_path / "s.tiff", picture, 0.5, levels)
    whole = np.asarray(Image.fromarray(picture).resize((156, 87), Image.Resampling.BOX), float)
    fine = np.asarray(Image.fromarray(picture).resize((624, 348), Image.Resampling.BOX))
    deviation = fine[..., 1].reshape(87, 4, 156, 4).std(axis=(1, 3))
    rgb, variance, unread = data.thumbnail(data.Reader(path), 0.5)
    assert rgb.shape == (87, 156, 3) and not unread.any()
    assert np.abs(rgb - whole).max() <= largest
    assert np.median(np.abs(np.sqrt(variance) - deviation)) <= 0.1 * largest


# -------------------------------------------------------------------------------------------- masks
WHOLE = SimpleNamespace(size=(9000, 5000), bounds=(0, 0, 9000, 5000))
SHAPE = (156, 281)


@pytest.mark.parametrize("mode", ["1", "L", "I;16", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("size", [(90, 50), (1800, 1000)])
def test_png_masks_cover_the_whole_slide(tmp_path, mode, size):
    width, height = size
    third = np.zeros((height, width), np.uint8)
    third[:, : width // 3] = 1
    picture = {"1": third > 0, "I;16": third * np.uint16(300)}.get(mode, third)
    if mode.startswith("RGB"):
        blank = np.zeros_like(third)
        picture = np.dstack([blank, blank, third, blank + 255][: len(mode)])
    Image.fromarray(picture).convert(mode).save(tmp_path / "m.png")
    mask = data.read_mask(tmp_path / "m.png", WHOLE, SHAPE)
    assert mask[:, :93].all() and not mask[:, 95:].any()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("m.png", Image.new("L", (90, 50)), "m.png: holds no tissue"),
        ("m.png", Image.new("L", (50, 90), 255), r"\(50, 90\) is another shape.*\(9000, 5000\)"),
        ("m.png", Image.new("L", (92, 50), 255), r"\(92, 50\) is another shape"),
        ("m.png", b"no picture", "m.png: cannot be read as a mask"),
        ("m.png", Image.new("1", (27000, 15000)), "m.png: .*; 281 x 156 px are enough"),
    ],
)
def test_masks_that_are_none_are_refused(tmp_path, name, content, message):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        content.save(tmp_path / name)
    with pytest.raises(MixmagError, match=message):
        data.read_mask(tmp_path / name, WHOLE, SHAPE)


# ------------------------------------------------------------------------------- damage and absence
def test_missing_tiles_are_glass_and_unreadable_ones_are_tried(tmp_path):
    picture = glass(4096, 4096)
    picture[1024:3072, 1024:3072] = pink(2048, 2048)
    path = write_tiff(tmp_path / "s.tiff", picture, 0.5)
    lower_half = without(path, *range(128, 256))
    rgb, mask = data.tissue_mask(data.Reader(lower_half), 0.5)
    assert (rgb[64:] == 255).all() and not mask[64:].any()
    assert mask[36:60, 36:92].all() and not mask[:30].any()
    grey, tried = data.tissue_mask(data.Reader(spoil(lower_half, 6 * 16 + 6)), 0.5)
    bad = (grey == 128).all(axis=2)
    assert tried[bad].all() and bad[48:56, 48:56].all() and bad.sum() <= 32**2
    assert np.array_equal(grey[~bad], rgb[~bad])


@pytest.mark.parametrize("threads", [1, 3])
def test_neighbours_of_a_bad_region_are_those_of_the_clean_slide(tmp_path, monkeypatch, threads):
    """Whatever the order and the number of threads that stumble over a failed handle."""
    clean = write_tiff(tmp_path / "s.tiff", pink(3584, 3584), 0.5, levels=(1, 8))
    bad = spoil(clean, 5 * 14 + 6)  # of 14 x 14 tiles of 256 px: inside cell (1, 1) and that alone
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    plan = data.TilePlan(data.Reader(bad), TileSettings(region=1))
    good = {cell: tiles.tobytes() for _, cell, tiles in data.read_cells(data.Reader(clean), plan)}
    assert len(good) == 16
    for seed in range(4):
        np.random.default_rng(seed).shuffle(plan.cells)
        found = {cell: tiles for _, cell, tiles in data.read_cells(data.Reader(bad), plan)}
        assert list(found) == [cell for _, cell in plan.cells]
        assert isinstance(found.pop((1, 1)), SlideReadError) and len(found) == 15
        assert all(tiles.tobytes() == good[cell] for cell, tiles in found.items())


@pytest.mark.parametrize("levels", [(1, 8), (1,)])
def test_missing_tissue_is_never_white(tmp_path, levels):
    """Where a tile is missing inside tissue, whether or not a thumbnail still shows it."""
    picture = glass(3584, 3584)
    picture[256:3328, 256:3328] = pink(3072, 3072)
    clean = write_tiff(tmp_path / "s.tiff", picture, 0.5, levels)
    # One within cell (1, 1); corners and a side of glass.
    less = data.Reader(without(clean, 5 * 14 + 5, 0, 13, 12 * 14 + 13))
    plan = data.TilePlan(less, TileSettings(region=1))
    found = {cell: tiles for _, cell, tiles in data.read_cells(less, plan)}
    assert len(found) == 16 and "where there is tissue" in str(found.pop((1, 1)))
    for _, cell, tiles in data.read_cells(data.Reader(clean), plan):
        if cell not in ((0, 0), (3, 0), (3, 3), (1, 1)):
            assert np.array_equal(tiles, found[cell])
    assert (found[0, 0][5] == 255).all() and found[0, 0][20].min() < 200  # glass beside tissue


def test_unscanned_holes_are_no_lost_tiles(tmp_path):
    """A large hole in tissue, which scanners leave out, against one of a lost tile's size."""
    mask = np.ones((300, 300), bool)
    mask[100:200, 100:200] = mask[20:30, 20:30] = False
    Image.fromarray(mask).save(tmp_path / "m.png")
    path = write_tiff(tmp_path / "s.tiff", glass(9600, 9600), 0.5)
    settings = TileSettings(mask=tmp_path / "m.png", min_tissue=0.0)
    inside = data.TilePlan(data.Reader(path), settings).inside
    assert inside.shape == mask.shape and not inside[0].any()
    assert not inside[110:190, 110:190].any() and inside[20:30, 20:30].all()


def test_bad_windows_are_dropped_alone_and_more_than_one_percent_is_a_failure(tmp_path, capsys):
    clean = write_tiff(tmp_path / "s.tiff", pink(2464, 2464), 0.5, (1, 8), tile=(64, 64))
    bad = spoil(clean, 5 * 39 + 5)  # inside window (1, 1) of 11 x 11
    worse = spoil(clean, 5 * 39 + 5, 30 * 39 + 30)
    out = tmp_path / "d"
    flags = ("--region", 1, "--magnifications", 20, "--batch-size", 50)
    assert tile("--slides", clean, bad, worse, "--out", out, *flags) == 3
    assert "; 1 window unreadable\n" in capsys.readouterr().out
    [(failed, reason)] = failures(out / "failed.csv").items()
    assert failed == worse.stem and "2 of 121 windows cannot be read, more than 1%" in reason
    whole, less = read_slide(out, clean.stem), read_slide(out, bad.stem)
    others = (whole.cells != 1).any(axis=1)
    assert (whole.meta["n_bad"], less.meta["n_bad"], others.sum()) == (0, 1, 120)
    assert np.array_equal(less.cells, whole.cells[others])
    assert np.array_equal(less.features, whole.features[others]) and data.verify(out) == []


def test_pixels_that_the_file_does_not_have_are_counted(tmp_path, capsys):
    """A lost row of tiles from edge to edge cannot be told from unscanned glass, and is said."""
    clean = write_tiff(tmp_path / "s.tiff", pink(2700, 2700), 0.5)
    less = without(clean, *range(5 * 11, 6 * 11))
    assert tile("--slides", less, clean, "--out", tmp_path / "d") == 0
    assert capsys.readouterr().out.count("; 3 cells partly not scanned\n") == 1
    assert [read_slide(tmp_path / "d", i).meta["n_unscanned"] for i in ("less-s", "s")] == [3, 0]


@pytest.mark.parametrize(
    "width, height, levels", [(100_000, 100_000, (1, 4, 16)), (100_000, 2_048, (1,))]
)
def test_memory_is_bounded_on_huge_slides(tmp_path, width, height, levels):
    """40 GB of pixels in a pyramid, and the widest band of a single-level slide."""
    assert tile_sparse(tmp_path, width, height, levels) < 1000
    assert 3 <= len(read_slide(tmp_path / "d", "huge").cells) <= 36


# --------------------------------------------------------------------------------- the tile command
def test_real_slides(real, tmp_path):
    broken = sorted((real / "broken").iterdir())
    dicom = sorted((real / "slides").glob("*.dcm"))[:3]  # one file of each series
    flags = ("--slides", real / "slides", *broken, *dicom, "--out", tmp_path)
    out, err = run("data.py tile", *flags, cwd=tmp_path, code=3)
    assert "CMU-1-Small-Region: 0.499 um/px" in out and "6 cells, 126 tokens" in out
    assert "boxes_0: FAILED" in err
    failed = failures(tmp_path / "failed.csv")
    assert "2 slides done, " in out and data.verify(tmp_path) == []
    assert failed.keys() >= {path.stem for path in broken}
    assert Image.open(tmp_path / "qc/cmu-midfile-zeroed.png").size[0] > 500
    for slide_id, reason in (
        ("TCGA-CR-7395-01A-01-TS1", "says no mpp"),
        ("ezwsi-multiframe_camelyon", "28.97 x"),
        ("panimg-no_dzi", "give lower --magnifications"),
        ("highdicom-sm_image", "50 px are less than one cell"),
        ("panimg-invalid_resolutions_tiff", "says no mpp"),
    ):
        assert reason in failed[slide_id]


def test_bad_slides_are_listed_the_rest_is_done_and_all_are_only_read(tmp_path):
    """Odd names, and one in another encoding than the system's, as on old file servers."""
    slides = tmp_path / "sli des"
    names = ["001", "1", "a b", 'ü,"c"', "x.y", "-n", "n\nl"]
    for i, name in enumerate(names):
        write_tiff(slides / f"{name}.tiff", pink(900, 900, i), 0.5)
    good = (slides / "1.tiff").read_bytes()
    write_tiff(slides / "white.tiff", glass(1400, 1400), 0.5)
    write_tiff(slides / "no-mpp.tiff", pink(1000, 1000), None)
    (slides / "._001.tiff").write_bytes(b"resource fork")
    (slides / "empty.tiff").touch()
    (slides / "text.tiff").write_text("not a slide")
    (slides / "cut.tiff").write_bytes(good[:3000])
    (slides / os.fsdecode(b"Pr\xe4parat.tiff")).write_bytes(good)
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in slides.iterdir()}
    places = (slides, tmp_path / "gone.svs")
    out, _ = run("data.py tile", "--slides", *places, "--out", "d", cwd=tmp_path, code=3)
    assert "8 slides done, 6 failed" in out
    assert "0 of 1 window (--min-tissue 25%, the fullest holds 0.0%) with 0% of the tissue" in out
    failed = failures(tmp_path / "d/failed.csv")
    assert set(failed) == {"no-mpp", "empty", "text", "cut", "Pr\\udce4parat", "gone"}
    assert "cannot open it" in failed["empty"] and "--mpp" in failed["no-mpp"]
    assert "'utf-8' codec can't encode" in failed["Pr\\udce4parat"]
    cells = {slide.slide_id: len(slide.cells) for slide in data.read_slides(tmp_path / "d")}
    assert cells == {**dict.fromkeys(names, 1), "white": 0}
    after = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in slides.iterdir()}
    assert after == before
    out, _ = run("data.py verify", "d", cwd=tmp_path)
    assert out == "d: 8 slides, 0 task tables, 0 findings\n"


def test_manifest_mask_and_qc_from_the_command_line(tmp_path, capsys):
    slides, masks, out = (tmp_path / name for name in ("slides", "masks", "d"))
    masks.mkdir()
    for name, mpp in (("a", None), ("b", 0.5), ("c$d$", 0.5), ("e", 0.5)):
        write_tiff(slides / f"{name}.tiff", pink(1000, 1000), mpp)
    for name in ("a", "b", "c$d$"):
        Image.fromarray(np.arange(900).reshape(30, 30) % 30 < 15).save(masks / f"{name}.png")
    rows = [("a", "0.5"), ("b.tiff", "0.25"), ("gone", "0.5")]
    data.write_csv(tmp_path / "m.csv", ("slide", "mpp"), rows)
    flags = ("--slides", slides, "--out", out, "--manifest", tmp_path / "m.csv", "--mask", masks)
    assert tile(*flags) == 3
    printed, err = capsys.readouterr()
    assert f"a: 0.5 um/px ({data.GIVEN}), " in printed
    assert "2 slides done, 2 failed" in printed
    assert "such as gone" in err
    failed = failures(out / "failed.csv")
    assert "--manifest says 0.25" in failed["b"]
    assert f"No such file or directory: '{masks / 'e.png'}'" in failed["e"]
    made_with = read_slide(out, "a").meta["settings"]
    assert made_with["mask"] == data.file_sha256(masks / "a.png")
    assert sorted(path.name for path in (out / "qc").iterdir()) == ["a.png", "c$d$.png"]
    for path in (out / "qc").iterdir():
        with Image.open(path) as picture:
            assert max(picture.size) <= 2500
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 1000
    assert tile(*flags) == 3 and "a: done before" in capsys.readouterr().out
    Image.new("L", (30, 30), 255).save(masks / "a.png")
    with pytest.raises(data.OtherSettings, match="a.safetensors .* mask .*give another --out"):
        tile(*flags)
    with pytest.raises(MixmagError, match="one file for 4 slides"):
        tile("--slides", slides, "--out", out, "--mask", masks / "a.png")
    assert tile("--slides", slides / "b.tiff", "--out", out, "--mask", masks / "a.png") == 0


def test_qc_says_how_much_is_read(tmp_path):
    """And what is tissue, in the colours of the legend."""
    picture = glass(1500, 6000)
    picture[:896, :2688] = pink(896, 2688)
    picture[:400, 5000:5300] = pink(400, 300)  # under a quarter of its window
    reader = data.Reader(write_tiff(tmp_path / "s.tiff", picture, 0.5))
    plan = data.TilePlan(reader, TileSettings())
    assert 0.9 < plan.tissue_held < 0.99
    data.draw_qc(tmp_path / "qc.png", reader, plan)
    with Image.open(tmp_path / "qc.png") as sheet:
        pixels = np.asarray(sheet)
    assert pixels.shape == (310, 1000, 3)
    blue = (pixels == (0, 0, 255)).all(axis=2)
    assert blue[40:60].any() and not blue[40:60, -5:].any()
    assert blue[60:].any(axis=0)[:440].all() and not blue[60:, 460:].any()
    green = (pixels == (0, 128, 0)).all(axis=2)[60:]
    assert green[:, :460].any() and green[:, 830:890].any()


def test_dry_run_plans_and_writes_nothing(tmp_path, capsys):
    write_tiff(tmp_path / "good.tiff", pink(3000, 3000), 0.25, levels=(1, 2, 4))
    write_tiff(tmp_path / "no-mpp.tiff", pink(1000, 1000), None)
    assert tile("--slides", tmp_path, "--out", tmp_path / "d", "--dry-run") == 3
    out, err = capsys.readouterr()
    assert out.startswith("good: 0.25 um/px (openslide.mpp-x), level 1, 1 of 1 window (")
    assert "1 cell, 21 tokens, 0.00 MB\n1 slide done, 1 failed\n" in out
    assert "no-mpp: FAILED" in err
    assert {path.name for path in tmp_path.iterdir()} == {"good.tiff", "no-mpp.tiff"}


def test_folders_are_searched_by_links_and_not_where_hidden(tmp_path):
    here = tmp_path / "here"
    for name in ("store/deep/a.tiff", "b.tiff", ".snapshot/b.tiff", "c.txt", "here/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(name)
    os.symlink(tmp_path / "store", here / "linked")
    os.symlink(here, here / "loop")
    os.symlink(tmp_path / ".snapshot", here / ".hidden")
    places = [here, tmp_path / "b.tiff", here / ".." / "b.tiff"]
    assert [path.name for path in data.find_slide_files(places)] == ["b.tiff", "a.tiff"]
    (here / "a.svs").touch()
    with pytest.raises(MixmagError, match="of one slide, .*a.svs and .*a.tiff; rename one"):
        data.find_slide_files(places)


def test_flags_of_one_run_do_not_undo_another(tmp_path, monkeypatch, capsys):
    """--mpp for a slide that says nothing leaves what was tiled at the slide's own mpp. Another
    mpp, share of tissue or encoder's weights are refused at once, before a new slide is tiled."""
    slides, out, weights = (tmp_path / name for name in ("s", "d", "weights.pt"))
    write_tiff(slides / "says.tiff", pink(900, 900), 0.5)
    write_tiff(slides / "silent.tiff", pink(900, 900), None)
    flags = ("--slides", slides, "--out", out, "--region", 1)
    assert tile(*flags) == 3
    assert tile(*flags, "--mpp", 0.5) == 0 and "says: done before" in capsys.readouterr().out
    write_tiff(slides / "a-new-one.tiff", pink(900, 900), 0.5)
    with pytest.raises(data.OtherSettings, match="mpp 0.5 there, 0.4 now"):
        tile(*flags, "--mpp", 0.4)
    with pytest.raises(data.OtherSettings, match="min_tissue 0.25 there, 0.5 now; give another"):
        tile(*flags, "--min-tissue", 0.5)
    assert data.slide_files(out).keys() == {"says", "silent"}
    monkeypatch.setattr(data, "tile_encoder", lambda *rest: data.texture)
    flags = ("--slides", slides / "says.tiff", "--out", tmp_path / "e", "--encoder", "virchow2")
    for words in ("one", "one"):
        weights.write_text(words)
        assert tile(*flags, "--weights", weights) == 0
    weights.write_text("other")
    with pytest.raises(data.OtherSettings, match="weights .* there, .* now"):
        tile(*flags, "--weights", weights)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--mpp 25", "25 is not within 0.1 to 4"),
        ("--mpp nan", "nan is not within 0.1 to 4"),
        ("--shard 2/2", "2/2: expected i/n with 0 <= i < n"),
        ("--shard 1", "--shard"),
        ("--shard a/b", "--shard"),
        ("--magnifications 5 10 30", "--magnifications"),
        ("--magnifications 20 10", "--magnifications"),
        ("--magnifications nan", "--magnifications"),
        ("--magnifications 0 0", "--magnifications"),
        ("--magnifications x", "--magnifications"),
    ],
)
def test_usage_errors_come_before_any_work(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as left:
        tile("--slides", ".", *flags.split(), "--out", tmp_path / "d")
    assert left.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_shares_and_their_lists_of_failures(tmp_path):
    slides, out = tmp_path / "slides", tmp_path / "d"
    write_tiff(slides / "a.tiff", pink(1000, 1000), 0.5)
    (slides / "b.tiff").write_bytes(b"no slide")
    flags = ("--slides", slides, "--out", out)
    assert [tile(*flags, "--shard", f"{i}/2") for i in (0, 1)] == [0, 3]
    assert [path.name for path in out.glob("*failed*")] == ["failed-1-of-2.csv"]
    assert tile(*flags) == 3 and (out / "failed.csv").exists()


def test_magnifications_need_not_be_whole(tmp_path):
    """2.5x and up, as in import: a cell is 1792 px at 0.5 um/px."""
    write_tiff(tmp_path / "s.tiff", pink(2000, 2000), 0.5)
    flags = ("--region", 1, "--magnifications", 2.5, 5, 10, 20)
    assert tile("--slides", tmp_path, "--out", tmp_path / "d", *flags) == 0
    slide = read_slide(tmp_path / "d", "s")
    assert repr(slide.meta["magnifications"]) == "[2.5, 5, 10, 20]"
    assert slide.features.shape[:2] == (1, 85) and slide.meta["cell_px"] == 1792
    assert data.verify(tmp_path / "d") == []


# ----------------------------------------------------------------------------------------- encoders
def random_tiles(*shape):
    return np.random.default_rng(0).integers(0, 256, (*shape, 224, 224, 3), dtype=np.uint8)


def test_texture_is_finite_deterministic_and_blind_to_turning():
    pictures = [pink(224, 224, seed) for seed in range(3)]
    tiles = torch.from_numpy(np.stack([*pictures, np.full((224, 224, 3), 255, np.uint8)]))
    out = data.texture(tiles)
    assert out.shape == (4, 39) and torch.isfinite(out).all()
    assert torch.equal(out, data.texture(tiles))
    assert torch.allclose(data.texture(torch.rot90(tiles, 1, (1, 2))), out, atol=1e-4)
    assert (out[0] - out[1]).abs().max() > 0.01


def test_encoder_from_a_module(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("""
def factory():
    return lambda tiles: tiles.float().mean((1, 2))
def raises():
    raise KeyError('weights')
def nothing():
    pass
""")
    (tmp_path / "syntax.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    write_tiff(tmp_path / "s.tiff", pink(3000, 3000), 0.5)
    assert tile("--slides", "s.tiff", "--out", "d", "--encoder", "mine:factory") == 0
    slide = read_slide(tmp_path / "d", "s")
    assert slide.meta["encoder"] == "mine:factory" and slide.features.shape == (9, 21, 3)
    for name, message in (
        ("mine:raises", "KeyError: 'weights'"),
        ("mine:nothing", "returned None, no callable"),
        ("mine:absent", "absent"),
        ("syntax:f", "SyntaxError"),
        ("absent:f", "No module named"),
        ("resnet", "expected texture, virchow2 or module:factory"),
    ):
        with pytest.raises(MixmagError, match=message):
            data.tile_encoder(name, "cpu")
    with pytest.raises(MixmagError, match="only --encoder virchow2"):
        data.tile_encoder("texture", "cpu", "weights.pt")


def test_what_an_encoder_may_return():
    """(B, D) finite floating-point numbers: bfloat16 and ragged last batches, too."""
    tiles = random_tiles(2, 5)

    def mean(batch):
        return batch.float().mean((1, 2))

    whole = data.encode_tiles(mean, tiles, 10, "cpu")
    assert whole.shape == (2, 5, 3) and whole.dtype == np.float16
    assert np.array_equal(whole, data.encode_tiles(mean, tiles, 3, "cpu"))
    short = data.encode_tiles(lambda batch: mean(batch).bfloat16(), tiles, 4, "cpu")
    assert np.allclose(short, whole, rtol=2**-8)
    for encoder, message in (
        (lambda b: mean(b) * 1e9, "beyond float16"),
        (lambda b: mean(b) / 0 * 0, "NaN"),
        (lambda b: b.sum((1, 2)), "of floats"),
        (lambda b: mean(b)[:1], r"\(1, 3\), .* \(3, D\)"),
        (lambda b: mean(b)[:, 0], r"\(3,\)"),
        (lambda b: b.float(), r"expected a tensor \(3, D\) of floats"),
        (lambda b: mean(b).numpy(), "ndarray"),
    ):
        with pytest.raises(MixmagError, match=message):
            data.encode_tiles(encoder, tiles, 3, "cpu")


@pytest.fixture
def pretend_timm(tmp_path, monkeypatch):
    """Called with a text: a module `timm` of that text stands before any other."""

    def pretend(text):
        (tmp_path / "timm").mkdir()
        (tmp_path / "timm" / "__init__.py").write_text(text)
        (tmp_path / "timm" / "layers.py").write_text("SwiGLUPacked = 'SwiGLUPacked'\n")
        monkeypatch.syspath_prepend(tmp_path)

    for name in ("timm", "timm.layers"):
        monkeypatch.setitem(sys.modules, name, None)  # it is taken out again at the end
        monkeypatch.delitem(sys.modules, name)
    return pretend


@pytest.mark.parametrize(
    "text, message",
    [
        ("raise ModuleNotFoundError(\"No module named 'timm'\")", "'timm'.*pip install timm"),
        ("raise RuntimeError('operator torchvision::nms')", "nms.*torchvision==0.28.0"),
        (
            "def create_model(*a, **k): raise FileNotFoundError('hf_secret')",
            r"\(FileNotFoundError\): accept its terms .*HF_TOKEN.*--weights FILE",
        ),
        ("def create_model(*a, **k): raise OSError(28, 'No space left')", "No space left"),
    ],
)
def test_each_way_not_to_have_virchow2_gets_its_line(pretend_timm, text, message):
    pretend_timm(text)
    with pytest.raises(MixmagError, match=message) as error:
        data.tile_encoder("virchow2", "cpu")
    assert "hf_secret" not in str(error.value) and "\n" not in str(error.value)


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def test_virchow2_is_asked_for_as_its_authors_say(pretend_timm):
    pretend_timm("def create_model(*name, **kw): return calls.append((name, kw)) or model")
    import timm

    class Model(torch.nn.Module):
        def forward(self, x):
            token = torch.linspace(1, 9, 261)[:, None]  # the class token's factor is 1
            return x.mean((2, 3)).repeat(1, 500)[:, None, :1280] * token

    timm.calls = []
    timm.model = Model()
    encoder = data.tile_encoder("virchow2", "cpu")
    layers = {"mlp_layer": "SwiGLUPacked", "act_layer": torch.nn.SiLU}
    assert timm.calls == [(("hf-hub:paige-ai/Virchow2",), {"pretrained": True, **layers})]
    tiles = random_tiles(3)
    expected = (tiles.mean((1, 2)) / 255 - MEAN) / STD  # (3, 3)
    assert np.allclose(data.encode_tiles(encoder, tiles, 2, "cpu")[:, :3], expected, atol=2e-3)


@pytest.fixture
def shallow(monkeypatch):
    """The real timm, whose models get 1 block. A torchvision built for CUDA fails beside a torch
    for CPU only for want of two operators that nobody calls here."""
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
    monkeypatch.setattr(timm, "create_model", lambda *name, **kw: create(*name, **kw, depth=1))
    return timm


def test_virchow2_of_a_file_is_the_real_architecture(shallow, tmp_path):
    """Weights from either kind of file; what comes out is token 0 of timm's own model behind timm's
    own transform; what does not fit is refused, and nothing is unpickled."""
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
    assert state["pos_embed"].shape == (1, 261, 1280)
    assert state["blocks.0.mlp.fc1.weight"].shape == (6832, 1280)
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "w.pt")
    tiles = random_tiles(3)
    transform = shallow.data.create_transform(
        (3, 224, 224), interpolation="bicubic", mean=MEAN, std=STD, crop_pct=1.0
    )
    with torch.inference_mode():
        tokens = model(torch.stack([transform(Image.fromarray(picture)) for picture in tiles]))
        for name in ("w.safetensors", "w.pt"):
            encoder = data.tile_encoder("virchow2", "cpu", tmp_path / name)
            assert torch.equal(encoder(torch.from_numpy(tiles)), tokens[:, 0])
    del state["cls_token"]
    other = {"head.weight": torch.zeros(1), "norm.bias": torch.zeros(3)}
    torch.save({**state, **other}, tmp_path / "w.pt")
    with pytest.raises(MixmagError, match="cls_token.*head.weight.*norm.bias"):
        data.tile_encoder("virchow2", "cpu", tmp_path / "w.pt")
    torch.save({"model": state, "x": Evil(tmp_path / "ran")}, tmp_path / "w.pt")
    for name in ("w.pt", "absent.safetensors", "absent.pt"):
        with pytest.raises(MixmagError, match="no weights of Virchow2"):
            data.tile_encoder("virchow2", "cpu", tmp_path / name)
    assert not (tmp_path / "ran").exists()
