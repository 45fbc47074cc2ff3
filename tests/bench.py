"""Speeds, each as a ratio to a limit or to a peer that is measured in the same run.

    python tests/bench.py [--only tiling]      MIXMAG_REAL=folder adds real slides
    python tests/bench.py --only gpu           the paper preset on one GPU

Whatever is compared runs in turn, several times. The ratio is the median over the rounds: a busy
machine disturbs it least.
"""

import argparse
import contextlib
import functools
import importlib.util
import io
import itertools
import math
import multiprocessing
import os
import sys
import tempfile
import time
import types
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if "gpu" in sys.argv:  # a GPU machine may lack what reads slides, and nothing there uses it
    for package in ("openslide", "simplejpeg", "h5py", "tifffile"):
        if importlib.util.find_spec(package) is None:
            sys.modules[package] = types.ModuleType(package)
import openslide
import tifffile

import data
import mixmag
import train

DEVICE = data.find_device("auto")
ROW = "{:<45} {:9.1f} {:<8} {:6.2f} x {:<8} (target {:g})"


def describe_machine() -> str:
    processor = Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].partition("\n")[0]
    if DEVICE.type == "cuda":
        processor = f"{torch.cuda.get_device_name()}, {processor}"
    threads = torch.get_num_threads()
    return f"{processor}, {os.cpu_count()} cores, {threads} threads, torch {torch.__version__}"


def clock() -> float:
    """Seconds, when the GPU has done what it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def in_turn(repeats: int, **functions) -> dict:
    """name -> (repeats,) seconds of each round."""
    seconds = np.empty((repeats, len(functions)))
    for i in range(repeats):
        for k, function in enumerate(functions.values()):
            began = clock()
            function()
            seconds[i, k] = clock() - began
    return dict(zip(functions, seconds.T, strict=True))


def seconds_of(function, repeats: int = 3) -> float:
    """The median, after one call that is slower."""
    function()
    return float(np.median(in_turn(repeats, ours=function)["ours"]))


def row(line: str, work: float, unit: str, seconds: dict, peer: str, target: float) -> tuple:
    """The work per second of "ours", and how many times as fast as the peer it is."""
    value = work / np.median(seconds["ours"])
    ratio = np.median(seconds[peer] / seconds["ours"])
    return line, value, unit, ratio, peer, target


def peak_memory() -> int:
    """The most bytes that this process held. Linux only; ru_maxrss would count the parent's."""
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def most_held() -> int:
    """The most bytes that models took: on the GPU, or in this process."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return peak_memory()


def in_child(function, *arguments):
    """Its result in a process of its own, whose memory nothing else has touched."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def lattice(cols: int, rows: int) -> np.ndarray:
    """(rows * cols, 2) places (col, row), row by row."""
    return np.argwhere(np.ones((rows, cols)))[:, ::-1]


# ------------------------------------------------------------------------------------------ tiling
def jpeg_tiles(picture: np.ndarray, side: int, **settings):
    """Yields a picture's tiles as JPEG bytes, row by row. settings: Pillow's for JPEG."""
    height, width, _ = picture.shape
    padded = np.pad(picture, [(0, -height % side), (0, -width % side), (0, 0)], mode="edge")
    settings = {"quality": 80, "subsampling": "4:2:0", **settings}
    for y in range(0, height, side):
        for x in range(0, width, side):
            file = io.BytesIO()
            Image.fromarray(padded[y : y + side, x : x + side]).save(file, "JPEG", **settings)
            yield file.getvalue()


def write_jpeg_tiff(
    path, levels, mpp, side=256, photometric=6, tables=b"", description=b"made for a test"
) -> None:
    """A BigTIFF of levels (width, height, JPEG tiles). Equal tiles of a level are stored once.
    photometric: 6 for YCbCr, 2 for RGB. tables: JPEG tables that all tiles share."""
    tiles_of = []
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        for level, (width, height, tiles) in enumerate(levels):
            tiles_of.append(list(tiles))
            per_cm = 1e4 / mpp * width / levels[0][0]
            tiff.write(
                without_repeats(tiles_of[-1]),
                shape=(height, width, 3),
                dtype="uint8",
                tile=(side, side),
                photometric="rgb",
                compression="adobe_deflate",  # JPEG would need the package imagecodecs
                jpegtables=tables or None,
                resolution=(per_cm, per_cm),
                resolutionunit="centimeter",
                subfiletype=int(level > 0),
                description=description,
                metadata=None,
            )
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        for page, tiles in zip(tiff.pages, tiles_of, strict=True):
            first = {}  # of equal tiles, its place in the file
            for tile, offset in zip(tiles, page.dataoffsets, strict=True):
                first.setdefault(tile, offset)
            page.tags["TileOffsets"].overwrite([first[tile] for tile in tiles])
            page.tags["TileByteCounts"].overwrite([len(tile) for tile in tiles])
            page.tags["Compression"].overwrite(7)  # JPEG
            page.tags["PhotometricInterpretation"].overwrite(photometric)


def without_repeats(tiles: list):
    seen = set()
    for tile in tiles:
        yield b"" if tile in seen else tile
        seen.add(tile)


def write_pyramid(path, picture: np.ndarray, mpp: float, shrinks) -> None:
    """Box-averaged levels."""
    levels = []
    for n in shrinks:
        level = np.asarray(Image.fromarray(picture).reduce(n))
        height, width, _ = level.shape
        levels.append((width, height, jpeg_tiles(level, 256)))
    write_jpeg_tiff(path, levels, mpp)


def write_sparse(path, width: int, height: int, shrinks, mpp: float) -> None:
    """A small file of any size in pixels: glass, and tissue on 4096 x 2048 px from (4096, 0) on."""
    rng = np.random.default_rng(0)
    noise = rng.integers((90, 40, 90), (200, 120, 200), (17, 17, 3), dtype=np.uint8)
    (tissue,) = jpeg_tiles(np.asarray(Image.fromarray(noise).resize((256, 256))), 256)
    (glass,) = jpeg_tiles(np.full((256, 256, 3), 243, np.uint8), 256)
    levels = []
    for n in shrinks:
        cols = math.ceil(width // n / 256)
        rows = math.ceil(height // n / 256)
        x, y = 256 * n * lattice(cols, rows).T  # in level-0 pixels
        is_tissue = (x >= 4096) & (x < 8192) & (y < 2048)
        tiles = np.array([glass, tissue], object)[is_tissue.astype(int)]
        levels.append((width // n, height // n, tiles))
    write_jpeg_tiff(path, levels, mpp)


def mean_colours():
    """A tile encoder that takes hardly any time or memory."""
    return lambda tiles: tiles[:, ::8, ::8].float().mean((1, 2))


def tile_peak(folder: str) -> int:
    """The most bytes that this process holds after `data.py tile`."""
    flags = ["--slides", f"{folder}/huge.tiff", "--out", f"{folder}/d"]
    with contextlib.redirect_stdout(sys.stderr):
        assert data.main(["tile", *flags, "--encoder", "bench:mean_colours"]) == 0
    return peak_memory()


def tile_sparse(folder, width: int, height: int, shrinks) -> float:
    """MB of memory that `data.py tile` takes at most on such a slide of 0.25 um/px."""
    write_sparse(f"{folder}/huge.tiff", width, height, shrinks, 0.25)
    return in_child(tile_peak, str(folder)) / 1e6


def read_ours(path, plan) -> int:
    """How many tiles there are."""
    return sum(len(tiles) for _, _, tiles in data.read_cells(data.Reader(path), plan))


def read_by_tile(path, plan) -> None:
    """Magnification by magnification and tile by tile: the best level, Pillow, a resize."""
    slide = openslide.OpenSlide(path)

    def read(level, side, corner):
        tile = slide.read_region(corner, level, (side, side)).convert("RGB")
        np.asarray(tile.resize((data.TILE_PX, data.TILE_PX)))

    cols, rows = (len(lines) - 1 for lines in plan.lines)
    for k in range(len(plan.magnifications)):
        step = plan.cell_px / 2**k  # the side of a tile in level-0 pixels
        level = slide.get_best_level_for_downsample(step / data.TILE_PX)
        side = round(step / slide.level_downsamples[level])
        corners = np.round(plan.origin + step * lattice(cols * 2**k, rows * 2**k)).astype(int)
        read_tile = functools.partial(read, level, side)
        list(data.prefetch(read_tile, corners.tolist(), torch.get_num_threads()))


def tiling_row(name: str, path, mpp=None, repeats: int = 5) -> tuple:
    settings = data.TileSettings(mpp=mpp, min_tissue=0.0)  # all windows, tissue or not
    plan = data.TilePlan(data.Reader(path), settings)
    ours = functools.partial(read_ours, path, plan)
    by_tile = functools.partial(read_by_tile, path, plan)
    seconds = in_turn(repeats, ours=ours, by_tile=by_tile)
    return row(name, ours(), "tiles/s", seconds, "by_tile", 2.0)


def tiling():
    """`by_tile`: as tools that read every tile by itself."""
    rng = np.random.default_rng(0)
    picture = data.synth_picture(rng, 2600, 2600)[300:2300, 300:2300]
    # With this noise a pixel takes 1.56 bits as JPEG; those of the real slide CMU-1 take 1.55.
    noisy = (picture + rng.normal(0, 6, picture.shape)).clip(0, 255).astype(np.uint8)
    picture = np.tile(noisy, (6, 6, 1))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "slide.tiff"
        for name, mpp, shrinks in (
            ("20x scan, 0.5 um/px, levels 1 2 4", 0.5, (1, 2, 4)),
            ("20x scan, 0.499 um/px, levels 1 4 16", 0.499, (1, 4, 16)),
            ("40x scan, 0.2522 um/px, levels 1 4 16", 0.2522, (1, 4, 16)),
        ):
            write_pyramid(path, picture, mpp, shrinks)
            yield tiling_row(f"JPEG, {name}", path)
    if os.environ.get("MIXMAG_REAL"):
        slides = Path(os.environ["MIXMAG_REAL"]) / "slides"
        for name, mpp in (("CMU-1-Small-Region.svs", None), ("TCGA-CR-7395-01A-01-TS1.svs", 0.5)):
            yield tiling_row(name, slides / name, mpp)


def memory():
    """Minutes: where a slide has no pyramid, its thumbnail takes every pixel."""
    with tempfile.TemporaryDirectory() as folder:
        peak = tile_sparse(folder, 100_000, 100_000, (1,))
    yield "tile 100,000 x 100,000 px without a pyramid", peak, "MB", 1000 / peak, "1 GB", 1.0


# ------------------------------------------------------------------------------------- pretraining
def products(flops: float, dtype):
    """As many FLOPs in plain matrix products of the size that is fastest."""
    side = 1024 if DEVICE.type == "cpu" else 8192
    count = math.ceil(flops / (2 * side**3))
    rows = round(flops / (2 * side**2 * count))
    a = torch.randn(rows, side, device=DEVICE, dtype=dtype)
    b = torch.randn(side, side, device=DEVICE, dtype=dtype)

    def multiply():
        for _ in range(count):
            a @ b

    return multiply


def random_regions(config, B: int, views: int = 1) -> dict:
    """As RegionDataset gives B regions, or two views of each, with half the tokens removed."""
    N = config.geometry().num_tokens
    shape = (B,) if views == 1 else (views, B)
    x = torch.randn(*shape, N, config.dim, device=DEVICE, dtype=torch.float16)
    removed = mixmag.random_removal(views * B, N, 0.5, device=DEVICE).unflatten(0, shape)
    return {"x": x, "removed": removed, "valid": None}


def training_step(config, B: int, micro: int, machine, views=1, compiled=False, updates=True):
    """A step on B random regions that the device holds, `micro` at a time: forward, backward and,
    with `updates`, AdamW."""
    model_class = mixmag.MaskedEmbeddingModel if views == 1 else mixmag.ContrastiveEmbeddingModel
    model = model_class(config).to(DEVICE)
    if compiled:
        train.compile_blocks(model)
    groups = train.parameter_groups(model, 0.05)
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
    parts = [random_regions(config, micro, views) for _ in range(B // micro)]
    train_step = train.mem_step if views == 1 else train.cmem_step

    def step(parts=parts):
        model.zero_grad(set_to_none=True)
        train_step(model, parts, B, machine)
        if updates:
            train.optimizer_step(model, optimizer, machine, 1e-4, 1.0)

    return step


def pretraining(repeats: int = 5):
    """Forward and backward of one part of a batch. `products`: the useful FLOPs as plain matrix
    products in the same precision."""
    torch.manual_seed(0)
    config = mixmag.Config.paper()
    B = 16 if DEVICE.type == "cpu" else 256
    flops = B * train.region_flops(config, mixmag.removal_count(189, 0.5))
    for name, amp, compiled, target in (
        ("bf16", "bf16", False, 0.7),
        ("fp32", "off", False, 0.9),
        ("bf16, --compile", "bf16", True, 0.7),
    ):
        machine = train.start_machine(amp=amp)
        ours = training_step(config, B, B, machine, compiled=compiled, updates=False)
        peer = products(flops, machine.dtype or torch.float32)
        in_turn(1, ours=ours, products=peer)  # the first step is slower
        seconds = in_turn(repeats, ours=ours, products=peer)
        line = f"MEM step, paper preset, {name}"
        yield row(line, B * 189, "tokens/s", seconds, "products", target)


# ----------------------------------------------------------------------------------------- loading
def write_cohort(folder, slides: int, side: int) -> None:
    """Slides of side x side cells with random embeddings."""
    cells = lattice(side, side).astype(np.int32)
    valid = np.ones((len(cells), 21), bool)
    rng = np.random.default_rng(0)
    features = rng.standard_normal((len(cells), 21, 1280), np.float32).astype(np.float16)
    meta = {"encoder": "bench", "magnifications": [5, 10, 20], "tile_px": 224, "mpp": 0.5}
    meta |= {"cell_px": 896.0, "origin": [0.0, 0.0], "width": 896 * side, "height": 896 * side}
    for i in range(slides):
        path = Path(folder) / "slides" / f"{i:06d}.safetensors"
        data.write_slide(path, features, cells, valid, {"slide_id": path.stem, "n_bad": 0, **meta})


def loading(batches: int = 600, size: int = 64, repeats: int = 3):
    """Random windows of 484 kB from files that the system holds in memory. `bare`: the same rows
    out of the same memory maps into one buffer, and nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        write_cohort(folder, 24, 16)
        dataset = data.RegionDataset(data.read_slides(folder), mixmag.Geometry(3), 0, mask=0.5)
        parts = [range(i, i + size) for i in range(0, size * batches, size)]
        places = []  # of each sample: its slide's embeddings, and which rows of them
        (windows,), (turns,), _, _ = dataset.draw(range(size * batches))
        for window, turn in zip(windows, turns, strict=True):
            slide = dataset.slides[dataset.slide_of[window]]
            cells = dataset.window_cells[window, None]
            rows, _ = data.token_index(slide, cells, dataset.turned_entries[turn])
            places.append((slide.features.reshape(-1, slide.dim), rows[0]))
        out = np.empty((size, 189, 1280), np.float16)

        def bare():
            for i, (features, rows) in enumerate(places):
                np.take(features, rows, axis=0, out=out[i % size], mode="clip")

        def load(indices):
            return data.pinned(dataset.batch(indices), DEVICE)

        def loaded(workers):
            for batch in data.prefetch(load, parts, workers):
                data.to_device(batch, DEVICE)

        bare()
        for workers in (0, 1, 2):
            seconds = in_turn(repeats, ours=functools.partial(loaded, workers), bare=bare)
            yield row(f"windows, {workers} workers", len(places), "windows/s", seconds, "bare", 0.5)


# ------------------------------------------------------------------------------------- fine-tuning
def slide_cost(config, regions: int) -> tuple[float, int]:
    """Seconds and bytes at most of a slide in Patch mode, through the encoder and back."""
    model = mixmag.SlideClassifier(config, mixmag.MixingEncoder(config), dropout=0.2).to(DEVICE)
    machine = train.start_machine(width=config.width)
    x = torch.ones(regions, 189, 1280, dtype=torch.float16, device=DEVICE)

    def through(x):
        with machine.autocast():
            logit, _ = model(x, torch.tensor([len(x)], device=DEVICE))
        logit.sum().backward()

    through(x[: regions // 10])  # the first call is slower
    (seconds,) = in_turn(1, ours=functools.partial(through, x))["ours"]
    return seconds, most_held()


def finetuning(config=None, regions: int = 200):
    """All of the encoder learns; on two cores the paper preset takes two minutes for it."""
    seconds, held = in_child(slide_cost, config or mixmag.Config.paper(), regions)
    yield f"slide of {regions} regions", regions / seconds, "regions", 1 / seconds, "1 s", 1
    yield "  memory", held / 1e9, "GB", 8e9 / held, "8 GB", 1


def pool_bags(pool, bags: list) -> None:
    pooled = [pool(x, lengths)[0] for x, lengths in bags]
    torch.cat(pooled).sum().backward()


def bags(repeats: int = 9):
    """The aggregator on ragged bags, forward and backward. `loop`: bag by bag."""
    for name, dim, sizes in (
        ("32 bags of 1 to 64, 3072 wide", 3072, list(range(1, 65, 2))),
        ("512 bags of 1 to 32, 64 wide", 64, 16 * list(range(1, 33))),
    ):
        pool = mixmag.GatedABMIL(dim).to(DEVICE)
        x = torch.randn(sum(sizes), dim, device=DEVICE)
        lengths = torch.tensor(sizes, device=DEVICE)
        alone = list(zip(x.split(sizes), lengths.split(1), strict=True))
        together = functools.partial(pool_bags, pool, [(x, lengths)])
        loop = functools.partial(pool_bags, pool, alone)
        seconds = in_turn(repeats, ours=together, loop=loop)
        yield row(f"AB-MIL, {name}", len(sizes), "bags/s", seconds, "loop", 3.0)


# --------------------------------------------------------------------------------------- one GPU
def gpu():
    """The paper preset on one GPU: five minutes. On a CPU a small one, to try the script."""
    if DEVICE.type == "cuda":
        config = mixmag.Config.paper()
        batch, regions, tiles = 4096, 1000, 256
    else:
        config = mixmag.Config.small(1280)
        batch, regions, tiles = 32, 10, 1
    machine = train.start_machine(width=config.width)
    rate = train.matrix_rate(machine)
    yield "matrix products", rate / 1e12, "TFLOP/s", 1.0, "products", 1
    yield from gpu_steps(config, batch, rate, machine)
    yield from gpu_loader(config, batch, batch // 8, machine)
    yield from finetuning(config, regions)
    yield from gpu_virchow2(tiles)


def step_cost(config, batch: int, micro: int, views: int, compiled: bool) -> tuple[float, int]:
    """Seconds and bytes at most of a training_step."""
    machine = train.start_machine(width=config.width)
    step = training_step(config, batch, micro, machine, views, compiled)
    return seconds_of(step), most_held()


def gpu_steps(config, batch: int, rate: float, machine):
    """`products`: what the useful FLOPs would take as plain matrix products."""
    M = mixmag.removal_count(config.geometry().num_tokens, 0.5)
    flops = train.region_flops(config, M)
    size = 2 if machine.dtype else 4
    for name, views, micro in (("MEM", 1, batch // 8), ("CMEM 7x7", 2, batch // 16)):
        formula = micro * views * train.region_bytes(config, M, size)
        for mode, compiled in (("--compile", True), ("eager", False)):
            seconds, held = in_child(step_cost, config, batch, micro, views, compiled)
            regions = batch * views / seconds
            line = f"{name} step, {micro} at a time, {mode}"
            yield line, regions, "regions", regions * flops / rate, "products", 0.45
            yield "  memory", held / 1e9, "GB", held / formula, "formula", 1


def gpu_loader(config, batch: int, micro: int, machine):
    """Steps that load their windows, beside steps whose windows are there already."""
    steps = 3
    with tempfile.TemporaryDirectory() as folder:
        write_cohort(folder, 24, 16)
        dataset = data.RegionDataset(data.read_slides(folder), mixmag.Geometry(3), 0, mask=0.5)
        step = training_step(config, batch, micro, machine, compiled=DEVICE.type == "cuda")
        resident = seconds_of(step)
        for workers in (1, 4, 12):
            loads = data.prefetch(
                lambda indices: data.pinned(dataset.batch(indices), DEVICE),
                [range(i, i + micro) for i in range(0, batch * (steps + 1), micro)],
                workers,
            )
            own = batch // micro
            step(itertools.islice(loads, own))
            began = clock()
            for _ in range(steps):
                step(itertools.islice(loads, own))
            seconds = (clock() - began) / steps
            line = f"MEM step with its loader, {workers} workers, {micro} at a time"
            yield line, batch / seconds, "regions", resident / seconds, "resident", 0.95


def virchow2_cost(tiles: int) -> tuple[float, int]:
    """Seconds and bytes at most of that many tiles."""
    model = data.empty_virchow2().to_empty(device=DEVICE)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    encoder = data.Virchow2(model).to(DEVICE).eval()
    pictures = torch.randint(0, 256, (tiles, 224, 224, 3), dtype=torch.uint8, device=DEVICE)
    with torch.inference_mode():
        return seconds_of(functools.partial(encoder, pictures)), most_held()


def gpu_virchow2(tiles: int):
    """Virchow2's architecture at random weights, which nobody's licence covers."""
    if importlib.util.find_spec("timm") is None:
        print("  timm is not installed: no tile encoder was timed")
        return
    seconds, held = in_child(virchow2_cost, tiles)
    yield "Virchow2's architecture", tiles / seconds, "tiles/s", held / 1e9, "GB", 1


BENCHES = [tiling, memory, pretraining, loading, finetuning, bags, gpu]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = sorted(bench.__name__ for bench in BENCHES)
    parser.add_argument("--only", choices=names, help="this one alone")
    args = parser.parse_args()
    print(describe_machine())
    for bench in BENCHES:
        if args.only == bench.__name__ or (args.only is None and bench is not gpu):
            for found in bench():
                print(ROW.format(*found), flush=True)


if __name__ == "__main__":
    main()
