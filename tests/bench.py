"""Speeds, each as a ratio to a limit or to a peer that is measured in the same run.

    python tests/bench.py [--only tiling] [--json FILE]      MIXMAG_REAL=folder adds real slides

Whatever is compared runs in turn, several times. The ratio is the median over the rounds: a busy
machine disturbs it least. Models are timed by the wall clock, or with OMP_NUM_THREADS=1 by
processor time, which other work hardly changes. The peer ViTMAE needs `pip install transformers`.
"""

import argparse
import copy
import functools
import io
import math
import multiprocessing
import os
import platform
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openslide
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import mixmag
import train

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine() -> str:
    processor = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and "model name" in cpuinfo.read_text():
        processor = cpuinfo.read_text().split("model name")[1].splitlines()[0].strip("\t :")
    threads = torch.get_num_threads()
    return f"{processor}, {os.cpu_count()} cores, {threads} threads, torch {torch.__version__}"


def in_turn(repeats: int, clock=time.perf_counter, **functions) -> dict:
    """name -> seconds of each round."""
    seconds = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            began = clock()
            function()
            seconds[name].append(clock() - began)
    return seconds


def model_clock() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def row(
    line: str, work: float, unit: str, seconds: dict, peer: str, target: float, share: float = 1.0
) -> dict:
    """The work per second of "ours", and how many times as fast as the peer it is.

    share: our work / the peer's work.
    """
    rounds = zip(seconds["ours"], seconds[peer], strict=True)
    ratio = share * statistics.median(theirs / ours for ours, theirs in rounds)
    value = work / statistics.median(seconds["ours"])
    return result(line, value, unit, ratio, peer, target)


def result(line: str, value: float, unit: str, ratio: float, peer: str, target: float) -> dict:
    names = ("line", "value", "unit", "ratio", "peer", "target")
    return dict(zip(names, (line, value, unit, ratio, peer, target), strict=True))


def peak_memory() -> int:
    """The most bytes that this process held. Linux only; ru_maxrss would count the parent's."""
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def in_child(function, *arguments):
    """Its result in a process of its own, whose memory nothing else has touched."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


# --------------------------------------------------------------------------------------------------------------- tiling


def jpeg_tiles(picture: np.ndarray, side: int, **settings):
    """A picture as encoded JPEG tiles, row-major, as in a scanner's file. settings: Pillow's for JPEG."""
    padded = np.pad(
        picture, [(0, -picture.shape[0] % side), (0, -picture.shape[1] % side), (0, 0)], mode="edge"
    )
    for y in range(0, padded.shape[0], side):
        for x in range(0, padded.shape[1], side):
            file = io.BytesIO()
            Image.fromarray(padded[y : y + side, x : x + side]).save(
                file, "JPEG", **{"quality": 80, "subsampling": "4:2:0", **settings}
            )
            yield file.getvalue()


def write_jpeg_tiff(
    path,
    levels,
    mpp: float,
    side: int = 256,
    photometric: int = 6,
    tables: bytes = b"",
    description: bytes = b"made for a test",
) -> None:
    """A tiled BigTIFF of levels (width, height, encoded JPEG tiles). Equal tiles are stored once, so a huge slide may be a small file.
    photometric: 6 for YCbCr, 2 for RGB; tables: what all tiles share, if they do; description: longer than 8 bytes."""

    def entry(tag, kind, count, value):
        return struct.pack("<HHQ", tag, kind, count) + (
            value if isinstance(value, bytes) else struct.pack("<Q", value)
        ).ljust(8, b"\0")

    with open(path, "wb") as f:
        f.write(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0))
        link = 8  # where the place of the next directory is to be written
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
            shared = f.tell()
            f.write(tables + description + b"\0")
            tags = [
                (254, 4, 1, int(link != 8)),
                (256, 4, 1, width),
                (257, 4, 1, height),
                (258, 3, 3, struct.pack("<HHH", 8, 8, 8)),
                (259, 3, 1, 7),
                (262, 3, 1, photometric),
                (270, 2, len(description) + 1, shared + len(tables)),
                (277, 3, 1, 3),
                (282, 5, 1, per_cm),
                (283, 5, 1, per_cm),
                (296, 3, 1, 3),
                (322, 4, 1, side),
                (323, 4, 1, side),
                (324, 16, len(places), arrays[0]),
                (325, 16, len(places), arrays[1]),
                *([(347, 7, len(tables), shared)] if tables else []),
                (530, 3, 2, struct.pack("<HH", 2, 2)),
            ]
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
    write_jpeg_tiff(
        path, [(level.shape[1], level.shape[0], jpeg_tiles(level, 256)) for level in levels], mpp
    )


def write_sparse(path, width: int, height: int, shrinks, mpp: float) -> None:
    """A slide of any size in a small file, whose equal tiles are stored once: glass, and tissue on 4096 x 2048 px that begin at (4096, 0)."""
    rng, levels = np.random.default_rng(0), []
    stained = np.asarray(
        Image.fromarray(
            rng.integers((90, 40, 90), (200, 120, 200), (17, 17, 3), dtype=np.uint8)
        ).resize((256, 256))
    )
    (tissue,), (glass,) = (
        list(jpeg_tiles(picture, 256))
        for picture in (stained, np.full((256, 256, 3), 243, np.uint8))
    )
    for n in shrinks:
        side = 256 * n  # of a tile, in level-0 pixels
        levels.append(
            (
                width // n,
                height // n,
                [
                    tissue if 4096 <= x < 8192 and y < 2048 else glass
                    for y in range(0, height // n * n, side)
                    for x in range(0, width // n * n, side)
                ],
            )
        )
    write_jpeg_tiff(path, levels, mpp)


def tile_sparse(folder, width: int, height: int, shrinks) -> float:
    """MB of memory that `data.py tile` takes at most on such a slide of 0.25 um/px."""
    write_sparse(Path(folder) / "huge.tiff", width, height, shrinks, 0.25)
    (Path(folder) / "mine.py").write_text(
        "def factory():\n    return lambda tiles: tiles[:, ::8, ::8].float().mean((1, 2))\n"
    )
    code = (
        "import runpy, sys\nsys.argv = sys.argv[1:]\nsys.path.insert(0, sys.argv[0].rpartition('/')[0])\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\nexcept SystemExit as end:\n    assert not end.code\n"
        "print('KiB', open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )  # ru_maxrss would count the parent's
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            data.__file__,
            "tile",
            "--slides",
            "huge.tiff",
            "--out",
            "d",
            "--encoder",
            "mine:factory",
        ],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert "1 slides done" in done.stdout, done.stdout + done.stderr
    return int(done.stdout.split("KiB")[1]) * 1024 / 1e6


def plan_of(path, mpp=None):
    """All windows of a slide, tissue or not."""
    return data.plan_slide(data.Reader(path), data.TileSettings(mpp=mpp, min_tissue=0.0))


def read_ours(path, plan, jpeg: bool = True) -> int:
    """How many tiles there are. Without `jpeg`, OpenSlide decodes them all, as it does those of other formats."""
    reader = data.Reader(path)
    reader.jpeg = reader.jpeg if jpeg else {}
    return sum(len(tiles) for _, _, tiles in data.read_cells(reader, plan))


def read_plain(path, plan, block: int) -> None:
    """Decode the area that the cells cover at level 0, once, and throw it away."""
    slide = openslide.OpenSlide(path)
    (left, right), (top, bottom) = (
        np.round(lines[[0, -1]] * plan.downsample).astype(int).tolist() for lines in plan.lines
    )
    blocks = [
        ((x, y), 0, (min(block, right - x), min(block, bottom - y)))
        for y in range(top, bottom, block)
        for x in range(left, right, block)
    ]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for _ in pool.map(lambda place: slide.read_region(*place) and None, blocks):
            pass


def read_by_tile(path, plan) -> None:
    """Magnification by magnification and tile by tile: the best level, Pillow, a resize to 224 px."""
    slide = openslide.OpenSlide(path)

    def read(place, level, side):
        return np.asarray(
            slide.read_region(place, level, (side, side))
            .convert("RGB")
            .resize((data.TILE_PX, data.TILE_PX))
        )

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for k, magnification in enumerate(plan.magnifications):
            step = plan.cell_px / 2**k
            level = slide.get_best_level_for_downsample(step / data.TILE_PX)
            side = round(step / slide.level_downsamples[level])
            places = [
                (round(plan.origin[0] + col * step), round(plan.origin[1] + row * step))
                for row in range((len(plan.lines[1]) - 1) * 2**k)
                for col in range((len(plan.lines[0]) - 1) * 2**k)
            ]
            for _ in pool.map(lambda place: read(place, level, side).shape, places):
                pass


def tiling_rows(name: str, path, mpp=None, repeats: int = 5):
    plan = plan_of(path, mpp)
    best = min(
        (1024, 2048, 4096),
        key=lambda block: min(in_turn(2, plain=lambda: read_plain(path, plan, block))["plain"]),
    )
    peers = dict(
        plain=lambda: read_plain(path, plan, best), by_tile=lambda: read_by_tile(path, plan)
    )
    for way, jpeg in (("", True), (", all by OpenSlide", False))[
        : 1 + bool(data.Reader(path).jpeg)
    ]:
        seconds = in_turn(repeats, ours=lambda: read_ours(path, plan, jpeg), **peers)
        tiles = read_ours(path, plan)
        yield row(name + way, tiles, "tiles/s", seconds, "plain", 0.8)
        yield row(name + way, tiles, "tiles/s", seconds, "by_tile", 2.0)


def tiling():
    """`plain`: OpenSlide decodes level 0 once and throws it away, at the best block size; `by_tile`: as tools that read every tile by itself."""
    rng = np.random.default_rng(0)
    picture = data.synth_picture(rng, 2600, 2600)[300:2300, 300:2300] + rng.normal(
        0, 6, (2000, 2000, 3)
    )
    picture = np.tile(
        picture.clip(0, 255).astype(np.uint8), (6, 6, 1)
    )  # 1.56 bits per pixel as JPEG; CMU-1 has 1.55
    with tempfile.TemporaryDirectory() as folder:
        for name, mpp, shrinks in (
            ("20x scan, 0.5 um/px, levels 1 2 4", 0.5, (1, 2, 4)),
            ("20x scan, 0.499 um/px, levels 1 4 16", 0.499, (1, 4, 16)),
            ("40x scan, 0.2522 um/px, levels 1 4 16", 0.2522, (1, 4, 16)),
        ):
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
        yield {
            "line": f"tile 100,000 x 100,000 px, levels {shrinks}",
            "value": peak,
            "unit": "MB",
            "peer": "1 GB",
            "ratio": 1000 / peak,
            "target": 1.0,
        }


# ------------------------------------------------------------------------------------- pretraining


def block_flops(width: int, n: int, wanted: int) -> int:
    """Forward FLOPs of a block whose outputs at `wanted` of n tokens are used."""
    hidden = mixmag.SwiGLU(width).w1.out_features
    keys_values = 2 * n * 2 * width**2
    attention = 2 * wanted * (2 * width**2 + 2 * n * width)
    return keys_values + attention + 2 * wanted * 3 * width * hidden


def step_flops(config, M: int) -> int:
    """Useful FLOPs of a MEM step on one region: matrix products forward, and twice that backward.

    The input layer goes backward once, as its input needs no gradient.
    """
    N = config.geometry().num_tokens
    n = N - M + config.cls_tokens
    d = config.decoder_width
    all_tokens = N + config.cls_tokens
    encoder = config.depth * block_flops(config.width, n, n)
    decoder = (config.decoder_depth - 1) * block_flops(d, all_tokens, all_tokens)
    decoder += block_flops(d, all_tokens, M)  # the last block
    decoder += 2 * n * config.width * d + 2 * M * d * config.dim  # its first and last layers
    return 3 * (encoder + decoder) + 2 * 2 * (N - M) * config.dim * config.width


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


def mem_step(model, x, removed, dtype=None):
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=False)
    machine = train.Machine(DEVICE, dtype, rank=0, world=1, scaler=scaler)
    slide = torch.zeros(len(x), device=DEVICE)
    part = {"x": x, "removed": removed, "valid": None, "slide": slide}

    def step():
        model.zero_grad(set_to_none=True)
        train.mem_step(model, [part], len(x), machine)

    return step


def vit_mae(config, B: int, dtype):
    """transformers' masked autoencoder of the same sizes, on 14 x 14 patches of one pixel each."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    settings = ViTMAEConfig(
        hidden_size=config.width,
        num_hidden_layers=config.depth,
        num_attention_heads=config.heads,
        intermediate_size=4 * config.width,
        image_size=14,
        patch_size=1,
        num_channels=config.dim,
        decoder_hidden_size=config.decoder_width,
        decoder_num_hidden_layers=config.decoder_depth,
        decoder_num_attention_heads=config.decoder_heads,
        decoder_intermediate_size=4 * config.decoder_width,
        mask_ratio=0.5,
    )
    model = ViTMAEForPreTraining(settings).to(DEVICE)
    x = torch.randn(B, config.dim, 14, 14, device=DEVICE)

    def step():
        model.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE.type, dtype, enabled=dtype is not None):
            loss = model(x).loss
        loss.backward()

    return step


def pretraining(repeats: int = 5):
    """Forward and backward of one part of a batch.

    `products`: the useful FLOPs as plain matrix products in the same precision. `ViTMAE`: by token.
    """
    torch.manual_seed(0)
    config = mixmag.Config.paper()
    B = 16 if DEVICE.type == "cpu" else 256
    model = mixmag.MaskedEmbeddingModel(config).to(DEVICE)
    compiled = copy.deepcopy(model)
    compiled.compile(dynamic=False)
    x = torch.randn(B, 189, 1280, device=DEVICE).half()
    removed = mixmag.random_removal(B, 189, 0.5, device=DEVICE)
    flops = B * step_flops(config, removed.shape[1])
    for name, ours, dtype, target in (
        ("bf16", model, torch.bfloat16, 0.7),
        ("fp32", model, None, 0.9),
        ("bf16, --compile", compiled, torch.bfloat16, 0.7),
    ):
        steps = {"ours": mem_step(ours, x, removed, dtype)}
        steps["products"] = products(flops, dtype or torch.float32)
        try:
            steps["ViTMAE"] = vit_mae(config, B, dtype)
        except ImportError:
            print("ViTMAE: skipped, transformers is not installed")
        for step in steps.values():
            step()
        seconds = in_turn(repeats, model_clock, **steps)
        line = f"MEM step, paper preset, {name}"
        yield row(line, B * 189, "tokens/s", seconds, "products", target)
        if "ViTMAE" in steps:
            yield row(line, B * 189, "tokens/s", seconds, "ViTMAE", 1.5, share=189 / 196)


# ----------------------------------------------------------------------------------------- loading


def write_cohort(folder, slides: int, side: int, dim: int = 1280) -> None:
    """Slides of side x side cells with random embeddings."""
    cells = np.argwhere(np.ones((side, side)))[:, ::-1].astype(np.int32)  # (col, row), by rows
    valid = np.ones((len(cells), 21), bool)
    rng = np.random.default_rng(0)
    features = rng.standard_normal((len(cells), 21, dim), np.float32).astype(np.float16)
    meta = {
        "encoder": "bench",
        "magnifications": [5, 10, 20],
        "tile_px": 224,
        "mpp": 0.5,
        "cell_px": 896.0,
        "origin": [0.0, 0.0],
        "width": 896 * side,
        "height": 896 * side,
        "n_bad": 0,
    }
    for i in range(slides):
        name = f"{i:06d}"
        path = Path(folder) / "slides" / f"{name}.safetensors"
        data.write_slide(path, features, cells, valid, {"slide_id": name, **meta})


def open_cohort(folder) -> data.RegionDataset:
    return data.RegionDataset(data.read_slides(folder), mixmag.Geometry(3), seed=0, mask=0.5)


def loading(batches: int = 600, size: int = train.PretrainConfig.micro_batch):
    """Random windows of 484 kB from files that the system holds in memory.

    `bare`: the same rows out of the same memory maps into one buffer, and nothing else.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_cohort(folder, 24, 16)
        dataset = open_cohort(folder)
        parts = [range(i, i + size) for i in range(0, size * batches, size)]
        (window,), (turn,), _ = dataset.draw(range(size * batches))
        index, _ = data.token_rows(dataset.rows[window], dataset.entries[turn], 21)
        slides = [slide.features.reshape(-1, 1280) for slide in dataset.slides]
        sources = [slides[s] for s in dataset.slide_of[window]]
        out = np.empty((size, 189, 1280), np.float16)

        def bare():
            for i, source in enumerate(sources):
                np.take(source, index[i], axis=0, out=out[i % size], mode="clip")

        def load(indices):
            return data.pinned(dataset.batch(indices), DEVICE)

        def loaded(workers):
            for batch in data.prefetch(load, parts, workers):
                data.to_device(batch, DEVICE)

        bare()
        for workers in (0, 1, 2):
            seconds = in_turn(3, ours=functools.partial(loaded, workers), bare=bare)
            line = f"windows, {workers} workers"
            yield row(line, size * batches, "windows/s", seconds, "bare", 0.5)


# ------------------------------------------------------------------------------------- fine-tuning


def slide_cost(regions: int, learns: bool) -> tuple[float, int]:
    """Seconds and bytes at most for a slide through the paper preset in Patch mode.

    learns: also backward.
    """
    config = mixmag.Config.paper()
    model = mixmag.SlideClassifier(config, mixmag.MixingEncoder(config), dropout=0.2).to(DEVICE)
    machine = train.start_machine(width=config.width)
    x = torch.ones(regions, 189, 1280, dtype=torch.float16, device=DEVICE)
    sizes = torch.tensor([regions], device=DEVICE)

    def through():
        with torch.set_grad_enabled(learns), machine.autocast():
            logit, _ = model(x, sizes)
        if learns:
            logit.sum().backward()

    (seconds,) = in_turn(1, model_clock, ours=through)["ours"]
    if DEVICE.type == "cuda":
        return seconds, torch.cuda.max_memory_allocated()
    return seconds, peak_memory()


def finetuning(most: int = 1000):
    """Memory of a slide in Patch mode, all of the encoder learning."""
    sizes = [most // 8, most // 4, most // 2, most]
    peaks = []
    for regions in sizes:
        _, peak = in_child(slide_cost, regions, True)
        peaks.append(peak / 1e9)
        line = f"slide of {regions} regions, {189 * regions:,} tokens"
        yield result(line, peaks[-1], "GB", 8 / peaks[-1], "8 GB", 1.0)
    slope, base = np.polyfit(sizes, peaks, 1)
    print(f"  {base:.2f} GB + {1e6 * slope / 189:.1f} kB per token")


def bags():
    """The aggregator on ragged bags, forward and backward. `loop`: bag by bag."""
    for name, dim, sizes in (
        ("32 bags of 1 to 64, 3072 wide", 3072, list(range(1, 65, 2))),
        ("512 bags of 1 to 32, 64 wide", 64, 16 * list(range(1, 33))),
    ):
        pool = mixmag.GatedABMIL(dim).to(DEVICE)
        x = torch.randn(sum(sizes), dim, device=DEVICE)
        lengths = torch.tensor(sizes, device=DEVICE)
        alone = list(zip(x.split(sizes), lengths.split(1), strict=True))

        def together(pool=pool, x=x, lengths=lengths):
            pooled, _ = pool(x, lengths)
            pooled.sum().backward()

        def loop(pool=pool, alone=alone):
            pooled = [pool(*bag)[0] for bag in alone]
            torch.cat(pooled).sum().backward()

        seconds = in_turn(9, model_clock, ours=together, loop=loop)
        yield row(f"AB-MIL, {name}", len(sizes), "bags/s", seconds, "loop", 3.0)


# ---------------------------------------------------------------------------------- how cost grows


def cohort_cost(slides: int) -> tuple[float, int]:
    """Seconds to open a cohort of small slides for pretraining, and the bytes that it takes."""
    with tempfile.TemporaryDirectory() as folder:
        write_cohort(folder, slides, 4, dim=8)
        before = peak_memory()
        began = time.perf_counter()
        assert len(open_cohort(folder)) == 4 * slides
        return time.perf_counter() - began, peak_memory() - before


def region_cost(region: int) -> tuple[float, int]:
    """Seconds per token of a MEM step on about 3000 tokens, and the bytes held at most.

    Regions have region x region cells.
    """
    config = mixmag.Config.paper(region=region)
    N = config.geometry().num_tokens
    B = round(3024 / N)
    model = mixmag.MaskedEmbeddingModel(config).to(DEVICE)
    x = torch.randn(B, N, 1280, device=DEVICE).half()
    removed = mixmag.random_removal(B, N, 0.5, device=DEVICE)
    step = mem_step(model, x, removed, train.amp_dtype("auto", DEVICE, config.width))
    step()
    seconds = in_turn(3, model_clock, ours=step)["ours"]
    return statistics.median(seconds) / (B * N), peak_memory()


def growth():
    """Each size in a process of its own. The peer is a line fitted to all sizes."""
    sides = {region: 21 * region**2 for region in range(1, 7)}
    regions = {count: 189 * count for count in (6, 53, 530, 5300)}
    slides = {count: count for count in (10, 100, 1000)}
    encode = functools.partial(slide_cost, learns=False)
    yield from growth_rows(
        "cells a side, MEM step per token", region_cost, sides, "tokens in a region"
    )
    yield from growth_rows("regions of a slide, encoded", encode, regions, "tokens")
    yield from growth_rows("slides of a cohort, opened", cohort_cost, slides, "slides")


def growth_rows(name: str, cost, amounts: dict, unit: str):
    """amounts: size -> how many of `unit` it is."""
    amount = np.array(list(amounts.values()))
    costs = np.array([in_child(cost, size) for size in amounts])  # seconds, bytes
    microseconds, megabytes = costs.T * [[1e6], [1e-6]]
    time_line = np.polyfit(amount, microseconds, 1)
    memory_line = np.polyfit(amount, megabytes, 1)
    ratios = microseconds / np.polyval(time_line, amount)
    for i, size in enumerate(amounts):
        line = f"{name}: {size} ({megabytes[i] / 1e3:.2f} GB)"
        yield result(line, microseconds[i], "us", ratios[i], "line", 1)
    print(
        f"  {time_line[1]:.3g} us + {time_line[0]:.3g} x {unit}, "
        f"{memory_line[1]:.3g} MB + {memory_line[0]:.3g} x {unit}"
    )


BENCHES = {
    "tiling": tiling,
    "memory": memory,
    "pretraining": pretraining,
    "loading": loading,
    "finetuning": finetuning,
    "bags": bags,
    "growth": growth,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=sorted(BENCHES), help="this one alone")
    parser.add_argument("--json", metavar="FILE", help="write the rows there, too")
    args = parser.parse_args()
    print(machine())
    names = [args.only] if args.only else list(BENCHES)
    rows = []
    for name in names:
        for r in BENCHES[name]():
            rows.append(r)
            value = f"{r['line']:<45} {r['value']:9.1f} {r['unit']:<8}"
            ratio = f"{r['ratio']:6.2f} x {r['peer']:<8} (target {r['target']:g})"
            print(value, ratio, flush=True)
    if args.json:
        data.write_json(args.json, {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
