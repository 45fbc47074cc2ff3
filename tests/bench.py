"""Speeds, each as a ratio to a limit or to a peer measured in the same run.

    python tests/bench.py [--only tiling] [--json FILE]          MIXMAG_REAL=folder adds the real slides

A line is a function that yields rows; BENCHES at the end names it. Whatever is compared runs in turn, several times over: the ratio is
the median of the pairs, which a busy machine disturbs least. Models are timed by the wall clock, but with one thread (OMP_NUM_THREADS=1) by
processor time, which other work on the machine hardly lengthens. `pretraining` wants `pip install transformers` for its peer.
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
from types import SimpleNamespace

import numpy as np
import openslide
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import mixmag  # noqa: E402
import train  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine() -> str:
    try:
        model = next(
            line.split(":")[1].strip()
            for line in open("/proc/cpuinfo")
            if line.startswith("model name")
        )
    except (OSError, StopIteration):
        model = platform.processor()
    return f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"


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
    return (
        time.process_time()
        if DEVICE.type == "cpu" and torch.get_num_threads() == 1
        else time.perf_counter()
    )


def row(
    line: str, work: float, unit: str, seconds: dict, peer: str, target: float, share: float = 1.0
) -> dict:
    """How much work per second `ours` does, and how many times faster than the peer it is, which did 1/share as much."""
    return {
        "line": line,
        "value": work / statistics.median(seconds["ours"]),
        "unit": unit,
        "peer": peer,
        "target": target,
        "ratio": share
        * statistics.median(theirs / ours for ours, theirs in zip(seconds["ours"], seconds[peer])),
    }


def in_child(function, *arguments):
    """What it returns in a process of its own, whose memory nothing else has touched."""
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


# ---------------------------------------------------------------------------------------------------------- pretraining


def block_flops(width: int, n: int, wanted: int) -> int:
    """Forward, for `wanted` of n tokens that look at all n: keys and values of all, queries, scores, values, output and SwiGLU of the wanted."""
    hidden = mixmag.SwiGLU(width).w1.out_features
    return (
        2 * n * 2 * width**2
        + 2 * wanted * (2 * width**2 + 3 * width * hidden)
        + 4 * wanted * n * width
    )


def step_flops(config, M: int) -> int:
    """Useful FLOPs of a MEM step, per region: matrix products forward and twice that backward (once for the input layer, whose input needs no
    gradient). The encoder sees the kept tokens, the decoder all, its last block and head are wanted at the M removed ones."""
    N, cls = config.geometry().num_tokens, config.cls_tokens
    n, d = N - M + cls, config.decoder_width
    encoder = config.depth * block_flops(config.width, n, n)
    decoder = (
        (config.decoder_depth - 1) * block_flops(d, N + cls, N + cls)
        + block_flops(d, N + cls, M)
        + 2 * n * config.width * d
        + 2 * M * d * config.dim
    )
    return 3 * (encoder + decoder) + 2 * 2 * (N - M) * config.dim * config.width


def products(flops: float, dtype) -> callable:
    """As many FLOPs in plain matrix products, of the size that is fastest."""
    side = 1024 if DEVICE.type == "cpu" else 8192
    count = math.ceil(flops / 2 / side**3)
    a, b = (
        torch.randn(round(flops / 2 / side**2 / count), side, device=DEVICE, dtype=dtype),
        torch.randn(side, side, device=DEVICE, dtype=dtype),
    )
    return lambda: [a @ b for _ in range(count)] and None


def mem_step(model, x, removed, dtype=None):
    compute = SimpleNamespace(
        autocast=lambda: torch.autocast(
            DEVICE.type, dtype or torch.float32, enabled=dtype is not None
        ),
        world=1,
        scaler=torch.amp.GradScaler(DEVICE.type, enabled=False),
    )

    def step():
        model.zero_grad(set_to_none=True)
        train.pretrain_step(
            model, [{"x": x, "removed": removed, "valid": None}], len(x), len(x), compute
        )

    return step


def vit_mae(config, B: int, dtype):
    """transformers' masked autoencoder of the same sizes over 14 x 14 patches of one pixel with 1280 channels. None where it is not installed."""
    try:
        from transformers import ViTMAEConfig, ViTMAEForPreTraining
    except ImportError:
        return None
    model = ViTMAEForPreTraining(
        ViTMAEConfig(
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
    ).to(DEVICE)
    x = torch.randn(B, config.dim, 14, 14, device=DEVICE)

    def step():
        model.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE.type, dtype or torch.float32, enabled=dtype is not None):
            loss = model(x).loss
        loss.backward()

    return step


def pretraining(repeats: int = 5):
    """Forward and backward of one part of a batch. `products`: the useful FLOPs as plain matrix products in the same precision; `ViTMAE`: per token."""
    torch.manual_seed(0)
    config, B = mixmag.Config.paper(), 16 if DEVICE.type == "cpu" else 256
    model, x = (
        mixmag.MaskedEmbeddingModel(config).to(DEVICE),
        torch.randn(B, 189, 1280, device=DEVICE).half(),
    )
    removed = mixmag.random_removal(B, 189, 0.5, device=DEVICE)
    compiled = copy.deepcopy(model)
    compiled.compile(dynamic=False)
    for name, mine, dtype, target in (
        ("bf16", model, torch.bfloat16, 0.7),
        ("fp32", model, None, 0.9),
        ("bf16, --compile", compiled, torch.bfloat16, 0.7),
    ):
        steps = {
            "ours": mem_step(mine, x, removed, dtype),
            "products": products(B * step_flops(config, removed.shape[1]), dtype or torch.float32),
            "ViTMAE": vit_mae(config, B, dtype),
        }
        steps = {k: step for k, step in steps.items() if step}
        for step in steps.values():
            step()
        seconds = in_turn(repeats, model_clock, **steps)
        yield row(
            f"MEM step, paper preset, {name}", B * 189, "tokens/s", seconds, "products", target
        )
        if "ViTMAE" in steps:
            yield row(
                f"MEM step, paper preset, {name}",
                B * 189,
                "tokens/s",
                seconds,
                "ViTMAE",
                1.5,
                share=189 / 196,
            )
        else:
            print("ViTMAE: skipped, transformers is not installed")


# -------------------------------------------------------------------------------------------------------------- loading


def write_cohort(folder, slides: int, side: int, dim: int = 1280) -> None:
    """Slides of side x side cells with random embeddings."""
    cells = np.array([(c, r) for r in range(side) for c in range(side)], np.int32)
    features = (
        np.random.default_rng(0)
        .standard_normal((len(cells), 21, dim), np.float32)
        .astype(np.float16)
    )
    for i in range(slides):
        data.write_slide(
            Path(folder) / "slides" / f"{i:06d}.safetensors",
            features,
            cells,
            np.ones((len(cells), 21), bool),
            {
                "slide_id": f"{i:06d}",
                "encoder": "bench",
                "magnifications": [5, 10, 20],
                "tile_px": 224,
                "mpp": 0.5,
                "cell_px": 896.0,
                "origin": [0.0, 0.0],
                "width": 896 * side,
                "height": 896 * side,
                "n_bad": 0,
            },
        )


def loading(batches: int = 300, batch: int = train.LOAD):
    """Random windows of 484 kB from files that the system holds in memory, as many at once as pretraining loads. `bare`: the same rows out of the
    same memory maps, and nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        write_cohort(folder, 24, 16)
        dataset = data.RegionDataset(data.read_slides(folder), mixmag.Geometry(3), 0, 0.5)
        (window,), (turn,), _ = dataset.draw(range(batch * batches))
        rows, maps = (
            dataset.tokens_of(window, turn)[0],
            [dataset.slides[s].features.reshape(-1, 1280) for s in dataset.slide_of[window]],
        )
        out = np.empty((batch, 189, 1280), np.float16)

        def bare():
            for i in range(len(rows)):
                np.take(maps[i], rows[i], axis=0, out=out[i % batch], mode="clip")

        def loaded(workers):
            for _ in dataset.batches(
                [range(i, i + batch) for i in range(0, batch * batches, batch)], workers, DEVICE
            ):
                pass

        bare()
        for held in (False, True):
            for workers in (0, 1, 2):
                seconds = in_turn(3, ours=lambda: loaded(workers), bare=bare)
                yield row(
                    f"windows, {workers} workers"
                    + (f", in memory on {DEVICE.type}" if held else ""),
                    batch * batches,
                    "windows/s",
                    seconds,
                    "bare",
                    0.8,
                )
            dataset.hold(DEVICE)


# ----------------------------------------------------------------------------------------------------------- fine-tuning


def slide_cost(regions: int, learns: bool) -> tuple[float, int]:
    """Seconds of a slide's way through the paper preset in Patch mode, and back where it learns, and the bytes that this process held at most."""
    config = mixmag.Config.paper()
    model, dtype = (
        mixmag.SlideClassifier(config, mixmag.MixingEncoder(config), dropout=0.2).to(DEVICE),
        train.amp_dtype("auto", DEVICE, config.width),
    )
    x, sizes = (
        torch.ones(regions, 189, 1280, dtype=torch.float16, device=DEVICE),
        torch.tensor([regions], device=DEVICE),
    )

    def there_and_back():
        with (
            torch.set_grad_enabled(learns),
            torch.autocast(DEVICE.type, dtype or torch.float32, enabled=dtype is not None),
        ):
            logit, _ = model(x, sizes)
        if learns:
            logit.sum().backward()

    seconds = in_turn(1, model_clock, ours=there_and_back)["ours"][0]
    return (
        seconds,
        torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else train.peak_memory(),
    )


def finetuning(most: int = 1000):
    """Memory of a slide in Patch mode, all of the encoder learning."""
    sizes = [most // 8, most // 4, most // 2, most]
    peaks = [in_child(slide_cost, regions, True)[1] / 1e9 for regions in sizes]
    for regions, peak in zip(sizes, peaks):
        yield {
            "line": f"slide of {regions} regions, {189 * regions:,} tokens",
            "value": peak,
            "unit": "GB",
            "peer": "8 GB",
            "ratio": 8 / peak,
            "target": 1.0,
        }
    slope, base = np.polyfit(sizes, peaks, 1)
    print(f"  {base:.2f} GB + {1e6 * slope / 189:.1f} kB per token")


def bags():
    """The aggregator on ragged bags, forward and backward. `loop`: bag by bag."""
    for name, dim, lengths in (
        ("32 bags of 1 to 64, 3072 wide", 3072, range(1, 65, 2)),
        ("512 bags of 1 to 32, 64 wide", 64, [1 + i % 32 for i in range(512)]),
    ):
        pool, x, lengths = (
            mixmag.GatedABMIL(dim).to(DEVICE),
            torch.randn(sum(lengths), dim, device=DEVICE),
            torch.tensor(list(lengths), device=DEVICE),
        )
        alone = [
            (part, torch.tensor([len(part)], device=DEVICE)) for part in x.split(lengths.tolist())
        ]
        seconds = in_turn(
            9,
            model_clock,
            ours=lambda: pool(x, lengths)[0].sum().backward(),
            loop=lambda: torch.cat([pool(*bag)[0] for bag in alone]).sum().backward(),
        )
        yield row(f"AB-MIL, {name}", len(lengths), "bags/s", seconds, "loop", 3.0)


# --------------------------------------------------------------------------------------------------- how the cost grows


def cohort_cost(slides: int) -> tuple[float, int]:
    """Seconds to open a cohort of small slides for pretraining, and the bytes that this process then held."""
    with tempfile.TemporaryDirectory() as folder:
        write_cohort(folder, slides, 4, dim=8)
        before, began = train.peak_memory(), time.perf_counter()
        dataset = data.RegionDataset(data.read_slides(folder), mixmag.Geometry(3), 0, 0.5)
        assert len(dataset) == 4 * slides
        return time.perf_counter() - began, train.peak_memory() - before


def region_cost(region: int) -> tuple[float, int]:
    """Seconds of a MEM step over about 3000 tokens in regions of region x region cells, bf16, per token; and the bytes held at most."""
    config = mixmag.Config.paper(region=region)
    N, dtype = config.geometry().num_tokens, train.amp_dtype("auto", DEVICE, config.width)
    B = round(3024 / N)
    step = mem_step(
        mixmag.MaskedEmbeddingModel(config).to(DEVICE),
        torch.randn(B, N, 1280, device=DEVICE).half(),
        mixmag.random_removal(B, N, 0.5, device=DEVICE),
        dtype,
    )
    step()
    return statistics.median(in_turn(3, model_clock, ours=step)["ours"]) / (
        B * N
    ), train.peak_memory()


def growth():
    """Each measured in a process of its own; the line after it is fitted by least squares, and 1.00 is what that line says."""
    for name, cost, sizes, unit in (
        ("cells a side, MEM step per token", region_cost, range(1, 7), "tokens in a region"),
        (
            "regions of a slide, encoded",
            functools.partial(slide_cost, learns=False),
            (6, 53, 530, 5300),
            "tokens",
        ),
        ("slides of a cohort, opened", cohort_cost, (10, 100, 1000), "slides"),
    ):
        amount = [{"slides": s, "tokens": 189 * s}.get(unit, 21 * s**2) for s in sizes]
        seconds, memory = np.array([in_child(cost, s) for s in sizes]).T
        fits = [np.polyfit(amount, values, 1) for values in (seconds, memory)]
        for s, a, t, b in zip(sizes, amount, seconds, memory):
            yield {
                "line": f"{name}: {s} ({b / 1e9:.2f} GB)",
                "value": 1e6 * t,
                "unit": "us",
                "peer": "line",
                "ratio": t / np.polyval(fits[0], a),
                "target": 1,
            }
        print(
            "  "
            + ", ".join(
                f"{scale * base:.3g} {what} + {scale * slope:.3g} x {unit}"
                for (slope, base), scale, what in zip(fits, (1e6, 1e-6), ("us", "MB"))
            )
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
    rows = []
    for name in [args.only] if args.only else BENCHES:
        for r in BENCHES[name]():
            rows.append(r)
            print(
                f"{r['line']:<45} {r['value']:9.1f} {r['unit']:<8} {r['ratio']:6.2f} x {r['peer']:<8} (target {r['target']:g})",
                flush=True,
            )
    if args.json:
        data.write_json(args.json, {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
