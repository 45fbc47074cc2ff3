"""Speeds, each as a ratio to a limit or to a peer measured in the same run.

    python tests/bench.py [--only tiling] [--json FILE]          MIXMAG_REAL=folder adds the real slides

A line is a function that yields rows; BENCHES at the end names it. Whatever is compared runs in turn, several times over: the ratio is
the median of the pairs, which a busy machine disturbs least.
"""
import argparse
import functools
import io
import json
import os
import platform
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import openslide
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data                                                                                                 # noqa: E402


def machine() -> str:
    try:
        model = next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor()
    return f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"


def in_turn(repeats: int, **functions) -> dict:
    """name -> seconds of each round."""
    seconds = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def row(line: str, work: float, unit: str, seconds: dict, peer: str, target: float) -> dict:
    """How much work per second `ours` does, and how many times faster than the peer it is."""
    return {"line": line, "value": work / statistics.median(seconds["ours"]), "unit": unit, "peer": peer, "target": target,
            "ratio": statistics.median(theirs / ours for ours, theirs in zip(seconds["ours"], seconds[peer]))}


# --------------------------------------------------------------------------------------------------------------- tiling

def jpeg_tiles(picture: np.ndarray, side: int):
    """A picture as encoded JPEG tiles, row-major, as in a scanner's file."""
    padded = np.pad(picture, [(0, -picture.shape[0] % side), (0, -picture.shape[1] % side), (0, 0)], mode="edge")
    for y in range(0, padded.shape[0], side):
        for x in range(0, padded.shape[1], side):
            file = io.BytesIO()
            Image.fromarray(padded[y:y + side, x:x + side]).save(file, "JPEG", quality=80, subsampling="4:2:0")
            yield file.getvalue()


def write_jpeg_tiff(path, levels, mpp: float, side: int = 256) -> None:
    """A tiled BigTIFF of levels (width, height, encoded JPEG tiles). Equal tiles are stored once, so a huge slide may be a small file."""
    def entry(tag, kind, count, value):
        return struct.pack("<HHQ", tag, kind, count) + (value if isinstance(value, bytes) else struct.pack("<Q", value)).ljust(8, b"\0")

    with open(path, "wb") as f:
        f.write(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0))
        link = 8                                                  # where the place of the next directory is to be written
        for width, height, tiles in levels:
            known, places = {}, []
            for tile in tiles:
                if tile not in known:
                    known[tile] = f.tell(), len(tile)
                    f.write(tile)
                places.append(known[tile])
            arrays = []
            for numbers in zip(*places):
                arrays.append(f.tell() if len(numbers) > 1 else numbers[0])
                f.write(struct.pack(f"<{len(numbers)}Q", *numbers))
            per_cm = struct.pack("<II", round(1e7 / mpp * width / levels[0][0]), 1000)
            tags = [(254, 4, 1, int(link != 8)), (256, 4, 1, width), (257, 4, 1, height), (258, 3, 3, struct.pack("<HHH", 8, 8, 8)),
                    (259, 3, 1, 7), (262, 3, 1, 6), (277, 3, 1, 3), (282, 5, 1, per_cm), (283, 5, 1, per_cm), (296, 3, 1, 3),
                    (322, 4, 1, side), (323, 4, 1, side), (324, 16, len(places), arrays[0]), (325, 16, len(places), arrays[1]),
                    (530, 3, 2, struct.pack("<HH", 2, 2))]
            directory = f.tell()
            f.write(struct.pack("<Q", len(tags)) + b"".join(entry(*tag) for tag in tags) + bytes(8))
            following = f.tell() - 8
            f.seek(link)
            f.write(struct.pack("<Q", directory))
            f.seek(0, 2)
            link = following


def write_pyramid(path, picture: np.ndarray, mpp: float, shrinks) -> None:
    """Box-averaged levels."""
    levels = [np.asarray(Image.fromarray(picture).reduce(n)) if n > 1 else picture for n in shrinks]
    write_jpeg_tiff(path, [(level.shape[1], level.shape[0], jpeg_tiles(level, 256)) for level in levels], mpp)


def write_sparse(path, width: int, height: int, shrinks, mpp: float) -> None:
    """A slide of any size in a small file, whose equal tiles are stored once: glass, and tissue on 4096 x 2048 px that begin at (4096, 0)."""
    rng, levels = np.random.default_rng(0), []
    stained = np.asarray(Image.fromarray(rng.integers((90, 40, 90), (200, 120, 200), (17, 17, 3), dtype=np.uint8)).resize((256, 256)))
    (tissue,), (glass,) = (list(jpeg_tiles(picture, 256)) for picture in (stained, np.full((256, 256, 3), 243, np.uint8)))
    for n in shrinks:
        side = 256 * n                                            # of a tile, in level-0 pixels
        levels.append((width // n, height // n, [tissue if 4096 <= x < 8192 and y < 2048 else glass
                                                 for y in range(0, height // n * n, side) for x in range(0, width // n * n, side)]))
    write_jpeg_tiff(path, levels, mpp)


def tile_sparse(folder, width: int, height: int, shrinks) -> float:
    """MB of memory that `data.py tile` takes at most on such a slide of 0.25 um/px."""
    write_sparse(Path(folder) / "huge.tiff", width, height, shrinks, 0.25)
    (Path(folder) / "mine.py").write_text("def factory():\n    return lambda tiles: tiles[:, ::8, ::8].float().mean((1, 2))\n")
    code = ("import runpy, sys\nsys.argv = sys.argv[1:]\nsys.path.insert(0, sys.argv[0].rpartition('/')[0])\n"
            "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\nexcept SystemExit as end:\n    assert not end.code\n"
            "print('KiB', open('/proc/self/status').read().split('VmHWM:')[1].split()[0])")                 # ru_maxrss would count the parent's
    done = subprocess.run([sys.executable, "-c", code, data.__file__, "tile", "--slides", "huge.tiff", "--out", "d", "--encoder", "mine:factory"],
                          cwd=folder, capture_output=True, text=True)
    assert "1 slides done" in done.stdout, done.stdout + done.stderr
    return int(done.stdout.split("KiB")[1]) * 1024 / 1e6


def plan_of(path, mpp=None):
    """All windows of a slide, tissue or not."""
    return data.plan_slide(data.Reader(path), SimpleNamespace(mpp=mpp, manifest={}, mpp_from_power=False, mask=None, region=3,
                                                              magnifications=[5, 10, 20], min_tissue=0.0))


def read_ours(path, plan) -> int:
    """How many tiles there are."""
    return sum(len(tiles) for _, _, tiles in data.read_cells(data.Reader(path), plan))


def read_plain(path, plan, block: int) -> None:
    """Decode the area that the cells cover at level 0, once, and throw it away."""
    slide = openslide.OpenSlide(path)
    (left, right), (top, bottom) = (np.round(lines[[0, -1]] * plan.downsample).astype(int).tolist() for lines in plan.lines)
    blocks = [((x, y), 0, (min(block, right - x), min(block, bottom - y))) for y in range(top, bottom, block) for x in range(left, right, block)]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for _ in pool.map(lambda place: slide.read_region(*place) and None, blocks):
            pass


def read_by_tile(path, plan) -> None:
    """Magnification by magnification and tile by tile: the best level, Pillow, a resize to 224 px."""
    slide = openslide.OpenSlide(path)

    def read(place, level, side):
        return np.asarray(slide.read_region(place, level, (side, side)).convert("RGB").resize((data.TILE_PX, data.TILE_PX)))

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for k, magnification in enumerate(plan.magnifications):
            step = plan.cell_px / 2 ** k
            level = slide.get_best_level_for_downsample(step / data.TILE_PX)
            side = round(step / slide.level_downsamples[level])
            places = [(round(plan.origin[0] + col * step), round(plan.origin[1] + row * step))
                      for row in range((len(plan.lines[1]) - 1) * 2 ** k) for col in range((len(plan.lines[0]) - 1) * 2 ** k)]
            for _ in pool.map(lambda place: read(place, level, side).shape, places):
                pass


def tiling_rows(name: str, path, mpp=None, repeats: int = 5):
    plan = plan_of(path, mpp)
    best = min((1024, 2048, 4096), key=lambda block: min(in_turn(2, plain=lambda: read_plain(path, plan, block))["plain"]))
    seconds = in_turn(repeats, ours=lambda: read_ours(path, plan), plain=lambda: read_plain(path, plan, best), by_tile=lambda: read_by_tile(path, plan))
    tiles = read_ours(path, plan)
    yield row(name, tiles, "tiles/s", seconds, "plain", 0.8)
    yield row(name, tiles, "tiles/s", seconds, "by_tile", 2.0)


def tiling():
    """`plain`: level 0 decoded once and thrown away, at the best block size; `by_tile`: as tools that read every tile by itself."""
    rng = np.random.default_rng(0)
    picture = data.synth_picture(rng, 2600, 2600)[300:2300, 300:2300] + rng.normal(0, 6, (2000, 2000, 3))
    picture = np.tile(picture.clip(0, 255).astype(np.uint8), (3, 3, 1))                                 # 1.56 bits per pixel as JPEG; CMU-1 has 1.55
    with tempfile.TemporaryDirectory() as folder:
        for name, mpp, shrinks in (("20x scan, 0.5 um/px, levels 1 2 4", 0.5, (1, 2, 4)), ("20x scan, 0.499 um/px, levels 1 4 16", 0.499, (1, 4, 16)),
                                   ("40x scan, 0.2522 um/px, levels 1 4 16", 0.2522, (1, 4, 16))):
            path = Path(folder) / "slide.tiff"
            write_pyramid(path, picture, mpp, shrinks)
            yield from tiling_rows(f"JPEG, {name}", path)
    if os.environ.get("MIXMAG_REAL"):
        for name, mpp in (("CMU-1-Small-Region.svs", None), ("TCGA-CR-7395-01A-01-TS1.svs", 0.5)):
            yield from tiling_rows(name, Path(os.environ["MIXMAG_REAL"]) / "slides" / name, mpp)


def memory():
    """A slide of 100,000 x 100,000 px with and without a pyramid; minutes, for without one its thumbnail takes every pixel."""
    for shrinks in ((1, 4, 16), (1,)):
        with tempfile.TemporaryDirectory() as folder:
            peak = tile_sparse(folder, 100_000, 100_000, shrinks)
        yield {"line": f"tile 100,000 x 100,000 px, levels {shrinks}", "value": peak, "unit": "MB", "peer": "1 GB", "ratio": 1000 / peak, "target": 1.0}


BENCHES = {"tiling": tiling, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(BENCHES), help="this one alone")
    parser.add_argument("--json", metavar="FILE", help="write the rows there, too")
    args = parser.parse_args()
    print(machine())
    rows = []
    for name in [args.only] if args.only else BENCHES:
        for r in BENCHES[name]():
            rows.append(r)
            print(f"{r['line']:<45} {r['value']:9.1f} {r['unit']:<8} {r['ratio']:6.2f} x {r['peer']:<8} (target {r['target']:g})", flush=True)
    if args.json:
        data.write_json(args.json, {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
