"""mixmag data: slide files, the data sets that training reads, the tiler, the synthetic cohort.

    python data.py synth  --out data/synthetic                    seven planted biomarkers
    python data.py tile   --slides slides/ --out data/mine        whole-slide images -> slide files
    python data.py import --trident 5x 10x 20x --out data/mine    other tools' embeddings
    python data.py verify data/mine                               checksums, values, tasks, leakage

Shape letters as in mixmag.py, and C cells of a slide, W windows (regions) of it. Lengths in `_px`
are level-0 pixels unless the comment says otherwise; mpp is micrometres per pixel; a place on a
lattice is (col, row). A level is one of the slide's pyramid; a magnification's index is k.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import hashlib
import importlib
import io
import itertools
import json
import math
import multiprocessing
import operator
import os
import re
import shutil
import signal
import sys
import textwrap
import time
from collections import Counter, defaultdict, deque
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import openslide
import safetensors
import safetensors.numpy
import safetensors.torch
import simplejpeg
import tifffile
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from scipy import ndimage
from tqdm import tqdm

from mixmag import Geometry, removal_count

# ----------------------------------------------------------------------------------- the slide file

TILE_PX = 224  # paper 4.1: the same at every magnification
FORMAT = "mixmag/1"
TEXT_FIELDS = ("format", "slide_id", "encoder", "created", "sha256")
JSON_FIELDS = ("magnifications", "tile_px", "mpp", "cell_px", "origin", "width", "height", "n_bad")
FIELDS = (*TEXT_FIELDS, *JSON_FIELDS)
DTYPES = {"float16": "F16", "int32": "I32", "bool": "BOOL"}  # numpy's names -> safetensors' names


@dataclass
class Slide:
    """One slide file. Its features stay on disk until they are used."""

    path: Path
    meta: dict
    cells: np.ndarray  # (C, 2) int32: col, row on the lowest magnification's lattice
    valid: np.ndarray  # (C, T) bool: True where a token holds an embedding
    dim: int  # D
    version: tuple  # inode and time of change: a file that is written anew is mapped anew

    @property
    def slide_id(self) -> str:
        return self.meta["slide_id"]

    @property
    def features(self) -> np.ndarray:
        """(C, T, D) float16, a private memory map of the file: only what is used is read."""
        return map_features(self.path, self.version)


@functools.lru_cache(maxsize=30000)  # Linux gives a process about 65,000 maps
def map_features(path: Path, version: tuple) -> np.ndarray:
    with safetensors.safe_open(path, "pt") as file:  # torch maps the tensor, numpy would copy it
        return file.get_tensor("features").numpy()


def checksum(features, cells, valid, metadata: dict) -> str:
    """sha256 over the tensors' bytes and all metadata except `sha256` itself."""
    digest = hashlib.sha256()
    for array in (features, cells, valid):
        digest.update(np.ascontiguousarray(array).reshape(-1).data)
    others = {name: value for name, value in metadata.items() if name != "sha256"}
    digest.update(json.dumps(others, sort_keys=True, separators=(",", ":")).encode("utf-8"))
    return digest.hexdigest()


def check_layout(layout: dict, magnifications) -> int:
    """layout: name -> (dtype, shape) of each tensor. Returns D; raises ValueError for others."""
    T = Geometry(1, magnifications).tokens_per_cell
    _, shape = layout.get("features", ("", []))
    expected = {
        "cells": ("I32", [*shape[:1], 2]),
        "features": ("F16", shape),
        "valid": ("BOOL", shape[:2]),
    }
    if layout != expected or len(shape) != 3 or shape[1] != T:
        raise ValueError(
            f"magnifications {magnifications} need cells I32 [C, 2], features F16 [C, {T}, D] "
            f"and valid BOOL [C, {T}]; found {layout}"
        )
    return shape[2]


def write_slide(path, features, cells, valid, meta: dict) -> None:
    """Write a slide file. Raises ValueError for arrays of another dtype or shape.

    features (C, T, D) float16, cells (C, 2) int32, valid (C, T) bool.
    meta: every field except `format`, `created` and `sha256`, and any others.
    """
    arrays = {"cells": cells, "features": features, "valid": valid}
    layout = {}
    for name, array in arrays.items():
        layout[name] = (DTYPES.get(array.dtype.name), list(array.shape))
        arrays[name] = np.ascontiguousarray(array)  # the library scrambles any other
    check_layout(layout, meta["magnifications"])
    now = float(os.environ.get("SOURCE_DATE_EPOCH", time.time()))  # reproducible-builds.org
    created = datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds")
    text = {}
    for name, value in {"format": FORMAT, "created": created, **meta}.items():
        text[name] = value if name in TEXT_FIELDS else json.dumps(value)
    text["sha256"] = checksum(features, cells, valid, text)
    with whole_file(path) as temporary:
        safetensors.numpy.save_file(arrays, temporary, text)


def read_slide(path) -> Slide:
    """Open a slide file and check its structure; only `data.py verify` computes the checksum.

    Raises MixmagError that says what is wrong.
    """
    path = Path(path)
    layout = {}
    try:
        status = path.stat()
        with safetensors.safe_open(path, "numpy") as file:
            meta = parse_metadata(file.metadata() or {})
            names = file.keys()
            for name in names:
                tensor = file.get_slice(name)
                layout[name] = (tensor.get_dtype(), tensor.get_shape())
            dim = check_layout(layout, meta["magnifications"])
            cells = file.get_tensor("cells")
            valid = file.get_tensor("valid")
    except (OSError, safetensors.SafetensorError, ValueError, TypeError) as error:
        raise MixmagError(f"{path}: cannot be read as a slide file ({error})") from None
    return Slide(path, meta, cells, valid, dim, (status.st_ino, status.st_mtime_ns))


def parse_metadata(text: dict) -> dict:
    missing = [name for name in FIELDS if name not in text]
    if missing or text["format"] != FORMAT:
        found = text.get("format")
        raise ValueError(f"expected format {FORMAT}, found {found}; missing fields: {missing}")
    meta = {}
    for name, value in text.items():
        meta[name] = value if name in TEXT_FIELDS else json.loads(value)
    return meta


def read_slides(data, ids=None, failed: list | None = None) -> list[Slide]:
    """The slides of DATA, or those of `ids`, sorted by id.

    All must agree on encoder, width and magnifications. Raises MixmagError for the first that
    does not, and for one that cannot be read. Where `failed` is given, slides that cannot be read
    are left out and listed there as (slide_id, stage, reason).
    """
    slides = []
    paths = slide_paths(Path(data) / "slides", ids)
    for path in progress(paths, desc="slides", leave=False):
        try:
            slides.append(read_slide(path))
        except MixmagError as error:
            if failed is None:
                raise
            failed.append((path.stem, "read", str(error)))
    if failed and not slides:
        raise MixmagError(f"no slide can be read; the last error is: {failed[-1][2]}")
    for slide in slides:
        if slide.slide_id != slide.path.stem:
            raise MixmagError(f"{slide.path}: holds slide {slide.slide_id!r}; rename the file")
        if embedding_signature(slide) != embedding_signature(slides[0]):
            raise MixmagError(
                f"{slide.path}: made with {embedding_signature(slide)}, "
                f"but {slides[0].slide_id} with {embedding_signature(slides[0])}"
            )
    return slides


def slide_paths(folder: Path, ids=None) -> list[Path]:
    if ids is None:
        paths = visible_files(folder, "*.safetensors")
    else:
        paths = [folder / f"{slide_id}.safetensors" for slide_id in sorted(set(ids))]
    absent = [path.stem for path in paths if path.parent != folder or not path.exists()]
    if absent:
        raise MixmagError(f"{folder}: {len(absent)} slides have no file, such as {absent[0]!r}")
    if not paths:
        raise MixmagError(f"{folder}: no slide files; make them with data.py tile or data.py synth")
    return paths


def already_done(path, wanted: dict, mpp: float | None) -> bool:
    """Whether this slide file exists. Raises OtherSettings where it was made with other settings.

    wanted: metadata that it must have; None stands for any value. mpp: the user's, if given.
    """
    if not Path(path).exists():
        return False
    meta = read_slide(path).meta
    for name, value in wanted.items():
        if value is not None and meta.get(name) != value:
            raise OtherSettings(
                f"{path} was made with {name} {meta.get(name)}, now asked for {value}; "
                "give another --out"
            )
    if mpp is not None and not abs(mpp - meta["mpp"]) <= 0.02 * meta["mpp"]:
        raise OtherSettings(
            f"{path} was made at {meta['mpp']:g} um/px, now asked for {mpp:g}; give another --out"
        )
    return True


def embedding_signature(slide: Slide) -> str:
    """What slides must share to be used together."""
    encoder = slide.meta["encoder"]
    return f"encoder {encoder}, width {slide.dim}, magnifications {slide.meta['magnifications']}"


# ---------------------------------------------------------------------------- windows and data sets


def magnification_entries(k: int) -> slice:
    """Where the tokens of magnification k (0 is the lowest) stand among those of a cell."""
    return slice((4**k - 1) // 3, (4 ** (k + 1) - 1) // 3)


def windows(cells, region: int, stride: int, min_cover: float) -> tuple[np.ndarray, np.ndarray]:
    """Windows of region x region cells that hold at least the fraction `min_cover` of their cells.

    cells (C, 2) -> (W, R*R) the row in `cells` of each cell of a window, row-major, -1 where the
    cell is missing, and (W, 2) the windows' corners (col, row), row-major. Corners lie on a lattice
    of `stride`: at every cell with stride 1.
    """
    cells = cells.astype(np.int64)
    row, col = np.divmod(np.arange(region**2), region)
    inside = np.stack([col, row], axis=1)  # (R*R, 2)
    corners = (cells[:, None] - inside).reshape(-1, 2)
    corners = corners[(corners % stride == 0).all(axis=1)]
    _, first = np.unique(cell_keys(corners), return_index=True)
    corners = corners[first]  # (W, 2)
    rows = find_cells(cells, corners[:, None] + inside)  # (W, R*R)
    kept = (rows >= 0).mean(axis=1) >= min_cover
    return rows[kept], corners[kept]


def cell_keys(cells: np.ndarray) -> np.ndarray:
    """(..., 2) -> (...): one number for each (col, row), in row-major order."""
    return (cells[..., 1] << 32) + cells[..., 0]


def find_cells(cells: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """cells (C, 2), wanted (..., 2) -> (...): the row of each wanted cell in `cells`, or -1."""
    keys = cell_keys(cells)
    rows = np.argsort(keys, kind="stable")
    end = np.iinfo(np.int64).max  # above every key, so that each search ends at an entry
    keys = np.append(keys[rows], end)
    rows = np.append(rows, -1)
    at = np.searchsorted(keys, cell_keys(wanted))
    return np.where(keys[at] == cell_keys(wanted), rows[at], -1)


def covering_windows(cells, region: int, min_cover: float) -> tuple[np.ndarray, np.ndarray]:
    """`windows` side by side, for fine-tuning and inference.

    A slide may be so small or narrow that no window holds `min_cover` of its cells. Then windows
    count that hold `min_cover` of the cells that the fullest window holds.
    """
    rows, corners = windows(cells, region, region, 0.0)
    present = (rows >= 0).sum(axis=1)  # (W,)
    kept = present >= min_cover * region**2
    if not kept.any():
        kept = present >= min_cover * present.max(initial=0)
    return rows[kept], corners[kept]


def describe_uncovered(used: int, cells_total: int) -> str:
    """For the log: how many cells lie in no window that counts. Empty if all are used."""
    if used == cells_total:
        return ""
    unused = cells_total - used
    return f"; {unused} of {cells_total} cells lie in windows that --min-cover leaves out"


def token_rows(rows, entries, T: int) -> tuple[np.ndarray, np.ndarray]:
    """rows (..., R*R) of `windows`, entries (..., n): which of a window's R*R*T cell-major entries
    -> (..., n) rows of the slide's (C*T, D) embeddings, and whether the token's cell exists."""
    cell = np.take_along_axis(rows, entries // T, axis=-1)
    return np.maximum(cell * T + entries % T, 0), cell >= 0


def token_index(slide: Slide, rows, entries) -> tuple[np.ndarray, np.ndarray]:
    """`token_rows` of windows (W, R*R) and entries (n,) or (W, n), and which tokens are valid."""
    index, exists = token_rows(rows, np.atleast_2d(entries), slide.valid.shape[1])
    return index, exists & slide.valid.reshape(-1)[index]


def gather(slide: Slide, rows, entries) -> tuple[np.ndarray, np.ndarray]:
    """As `token_index`, with x (W, n, D) float16 for the index; x is 0 where a token is invalid."""
    index, valid = token_index(slide, rows, entries)
    x = slide.features.reshape(-1, slide.dim)[index]
    x[~valid] = 0
    return x, valid


def as_batch(x: np.ndarray, valid: np.ndarray, device="cpu") -> tuple:
    """Tensors x and valid. Where every token is valid, valid is None and no mask is ever built."""
    if valid.all():
        return torch.from_numpy(x).to(device), None
    return torch.from_numpy(x).to(device), torch.from_numpy(valid).to(device)


def to_device(batch: dict, device) -> dict:
    tensors = {key: value for key, value in batch.items() if torch.is_tensor(value)}
    moved = {key: value.to(device, non_blocking=True) for key, value in tensors.items()}
    return {**batch, **moved}


def pinned(batch: dict, device) -> dict:
    """Where the device is a GPU: the batch in memory that the GPU can copy from by itself."""
    if torch.device(device).type != "cuda":
        return batch
    tensors = {key: value for key, value in batch.items() if torch.is_tensor(value)}
    return {**batch, **{key: value.pin_memory() for key, value in tensors.items()}}


class RegionDataset(torch.utils.data.Dataset):
    """Random windows for pretraining: turned at random, with the tokens that are to be removed.

    Sample i is a function of (seed, i) alone. Samples e*W to e*W + W - 1 are epoch e: each of the
    W windows once, in random order. There is no last sample: `len` is W, the length of an epoch.

    mask: the removal ratio. views: 2 for the contrastive loss, whose second window is drawn from a
    `source` x `source` window that holds the first (paper 3.1.2). turn: whether windows are turned.
    """

    def __init__(
        self,
        slides: list[Slide],
        geometry: Geometry,
        seed: int,
        mask: float,
        views: int = 1,
        source: int = 0,
        stride: int = 1,
        min_cover: float = 1.0,
        turn: bool = True,
    ):
        self.slides = slides
        self.geometry = geometry
        self.seed = seed
        self.views = views
        self.turn = turn
        self.removed_tokens = removal_count(geometry.num_tokens, mask)  # M
        self.reach = (source or geometry.region) - geometry.region
        self.entries = geometry.cell_order().numpy()[geometry.dihedral().numpy()]  # (8, N)
        found = [windows(slide.cells, geometry.region, stride, min_cover) for slide in slides]
        rows, corners = zip(*found, strict=True)
        self.rows = np.concatenate(rows)  # (W, R*R)
        self.corners = np.concatenate(corners)  # (W, 2)
        counts = [len(part) for part in rows]
        self.slide_of = np.repeat(np.arange(len(slides)), counts)  # (W,)
        self.first = np.cumsum([0, *counts])  # each slide's first window

    def __len__(self) -> int:
        return len(self.rows)

    def draw(self, indices) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of B samples: windows (views, B), turns of them (views, B), removed (views, B, M)."""
        N = self.geometry.num_tokens
        window = np.empty((self.views, len(indices)), np.int64)
        turn = np.empty_like(window)
        removed = np.empty((*window.shape, self.removed_tokens), np.int64)
        for b, i in enumerate(indices):
            rng = np.random.default_rng([self.seed, i])
            epoch, position = divmod(int(i), len(self))
            window[0, b] = epoch_order(self.seed, epoch, len(self))[position]
            if self.views == 2:
                window[1, b] = self.draw_partner(window[0, b], rng)
            for view in range(self.views):
                turn[view, b] = rng.integers(8) * self.turn
                removed[view, b] = rng.permutation(N)[: self.removed_tokens]
        return window, turn, removed

    def draw_partner(self, window: int, rng) -> int:
        """A random window inside a random source window that holds the given one."""
        slide = self.slide_of[window]
        corners = self.corners[self.first[slide] : self.first[slide + 1]]
        start = self.corners[window] - rng.integers(self.reach + 1, size=2)  # the source's corner
        inside = ((corners >= start) & (corners <= start + self.reach)).all(axis=1)
        candidates = np.flatnonzero(inside)
        return self.first[slide] + candidates[rng.integers(len(candidates))]

    def read(self, indices) -> dict:
        """As `batch`, each with a leading axis of views and `valid` always a tensor."""
        window, turn, removed = self.draw(indices)
        slide = self.slide_of[window]
        T = self.geometry.tokens_per_cell
        index, valid = token_rows(self.rows[window], self.entries[turn], T)  # (views, B, N)
        x = np.empty((*index.shape, self.slides[0].dim), np.float16)
        for at in np.ndindex(window.shape):
            source = self.slides[slide[at]]
            features = source.features.reshape(-1, source.dim)
            np.take(features, index[at], axis=0, out=x[at], mode="clip")  # clip: straight into x
            valid[at] &= source.valid.reshape(-1)[index[at]]
        x[~valid] = 0
        arrays = {"x": x, "removed": removed, "valid": valid, "slide": slide}
        return {key: torch.from_numpy(array) for key, array in arrays.items()}

    def __getitem__(self, i: int) -> dict:
        """x (N, D) float16, removed (M,), valid (N,) bool, slide (): its place in `slides`.

        With two views each has a leading axis of 2.
        """
        sample = self.read([i])
        if self.views == 2:
            return {key: value[:, 0] for key, value in sample.items()}
        return {key: value[0, 0] for key, value in sample.items()}

    def batch(self, indices) -> dict:
        """x (B, N, D) float16, removed (B, M), valid (B, N) or None if all are valid, slide (B,).

        With two views each has a leading axis of 2.
        """
        batch = self.read(indices)
        if self.views == 1:
            batch = {key: value[0] for key, value in batch.items()}
        if batch["valid"].all():
            batch["valid"] = None
        return batch


@functools.lru_cache(maxsize=4)  # threads that work ahead may be in the next epoch
def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch, 1]).permutation(count)


class CaseDataset(torch.utils.data.Dataset):
    """The cases of a split as ragged bags: a case has slides, a slide has regions.

    index (n,): which tokens of a region are read (Geometry.select). rows and corners: of each
    slide, the `covering_windows` that hold a valid token. Slides without one are listed in
    `dropped`, and cases without slides are left out. labels: each case's.
    cached: slide_id -> (encoder outputs (W, n or 1, d), valid (W, n)), given instead of embeddings.
    uncovered: for the log, how many cells lie in no window.
    """

    def __init__(
        self, slides: dict, cases: list, geometry: Geometry, index, min_cover: float = 0.5
    ):
        self.slides = slides
        self.entries = geometry.cell_order().numpy()[np.asarray(index)]  # (n,)
        self.rows: dict[str, np.ndarray] = {}
        self.corners: dict[str, np.ndarray] = {}
        self.cached: dict[str, tuple] = {}
        self.cases: list[Case] = []
        self.dropped: list[str] = []
        cells_used = 0
        cells_total = 0
        for case in cases:
            usable: list[str] = []
            for slide_id in case.slide_ids:
                used = self.find_windows(slide_id, geometry.region, min_cover)
                cells_used += used
                cells_total += len(slides[slide_id].cells)
                (usable if used else self.dropped).append(slide_id)
            if usable:
                self.cases.append(Case(case.case_id, case.label, case.split, usable))
        self.labels = [case.label for case in self.cases]
        self.uncovered = describe_uncovered(cells_used, cells_total)

    def find_windows(self, slide_id: str, region: int, min_cover: float) -> int:
        """Note the slide's windows, if there are any; returns how many cells they hold."""
        slide = self.slides[slide_id]
        rows, corners = covering_windows(slide.cells, region, min_cover)
        _, valid = token_index(slide, rows, self.entries)  # (W, n)
        nonempty = valid.any(axis=1)
        if nonempty.any():
            self.rows[slide_id] = rows[nonempty]
            self.corners[slide_id] = corners[nonempty]
        return int((rows[nonempty] >= 0).sum())

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, i: int) -> dict:
        """One case as a batch, with `valid` always a tensor."""
        case = self.batch([i])
        if case["valid"] is None:
            W = len(case["x"])
            case["valid"] = torch.ones(W, len(self.entries), dtype=torch.bool)
        return case

    def batch(self, indices) -> dict:
        """x (W, n, D) float16, or what is `cached` for it; valid (W, n) or None if all are valid;
        regions (S,): how many of the W regions each slide has; case (S,): the slide's case, counted
        from 0 in this batch; label (cases,) float. Empty for no indices.
        """
        if not len(indices):
            return {}
        cases = [self.cases[i] for i in indices]
        parts = []
        slide_ids = []
        case_of = []
        for number, case in enumerate(cases):
            for slide_id in case.slide_ids:
                slide_ids.append(slide_id)
                case_of.append(number)
                parts.append(self.read(slide_id))
        inputs, masks = zip(*parts, strict=True)
        x, valid = as_batch(np.concatenate(inputs), np.concatenate(masks))
        return {
            "x": x,
            "valid": valid,
            "cached": bool(self.cached),
            "slide_ids": slide_ids,
            "regions": torch.tensor([len(mask) for mask in masks]),
            "case": torch.tensor(case_of),
            "label": torch.tensor([float(case.label) for case in cases]),
        }

    def read(self, slide_id: str) -> tuple[np.ndarray, np.ndarray]:
        if self.cached:
            return self.cached[slide_id]
        return gather(self.slides[slide_id], self.rows[slide_id], self.entries)


def feature_statistics(slides, magnifications=None, limit: int = 20000) -> tuple:
    """mean (D,), std (D,) and directions (K, D) of the embeddings, as float tensors.

    A direction is the mean of a magnification's embeddings, each scaled to length 1: the constant
    prediction that minimises Eq. 2. Read are evenly spread cells, about `limit` at most.
    magnifications: the indices of those that count, 0 the lowest. Raises MixmagError for values
    that are not finite.
    """
    cell_table = Geometry(1, slides[0].meta["magnifications"]).token_table()
    magnification_of = cell_table[:, 0].numpy()  # (T,)
    counted = np.ones(len(magnification_of), bool)
    if magnifications is not None:
        counted = np.isin(magnification_of, magnifications)
    stride = max(1, math.ceil(sum(len(slide.cells) for slide in slides) / limit))
    count = np.zeros(magnification_of.max() + 1)  # (K,)
    total = np.zeros(slides[0].dim)
    squares = np.zeros(slides[0].dim)
    directions = np.zeros((len(count), slides[0].dim))
    for slide in progress(slides, desc="statistics", leave=False):
        valid = slide.valid[::stride] & counted  # (C', T)
        tokens = slide.features[::stride][valid].astype(np.float64)  # (n, D)
        if not np.isfinite(tokens).all():
            raise MixmagError(f"{slide.path}: NaN or infinite features; data.py verify says where")
        total += tokens.sum(axis=0)
        squares += (tokens**2).sum(axis=0)
        unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True).clip(min=1e-12)
        magnification = np.broadcast_to(magnification_of, valid.shape)[valid]  # (n,)
        for k in range(len(count)):
            count[k] += (magnification == k).sum()
            directions[k] += unit[magnification == k].sum(axis=0)
    tokens_total = max(count.sum(), 1)
    mean = total / tokens_total
    std = np.sqrt((squares / tokens_total - mean**2).clip(min=0))
    directions /= count.clip(min=1)[:, None]
    return tuple(torch.from_numpy(array).float() for array in (mean, std, directions))


# --------------------------------------------------------------------------------- tasks and splits

SPLITS = ("train", "tune", "test")


class Outcome:
    """What a slide's label is: 0 or 1. Another kind of label is another class with these names."""

    outputs = 1  # numbers that the classifier gives for a slide
    metric_name = "AUROC"

    def parse(self, text: str) -> int:
        """The label that a task table states. Raises ValueError that says what is expected."""
        if text not in ("0", "1"):
            raise ValueError("expected 0 or 1")
        return int(text)

    def loss(self, logit: torch.Tensor, label: torch.Tensor, smoothing: float) -> torch.Tensor:
        """logit (S,), label (S,) float, label smoothing -> (S,) binary cross-entropy."""
        target = label * (1 - smoothing) + smoothing / 2
        return F.binary_cross_entropy_with_logits(logit, target, reduction="none")

    def score(self, logit: torch.Tensor) -> torch.Tensor:
        """(S,) -> probability (S,) float64 on the CPU: in fp32 the highest would all be 1."""
        return torch.sigmoid(logit.cpu().double())

    def metric(self, labels, scores) -> float:
        """Area under the ROC curve. Raises MixmagError where only one class is present."""
        if len(set(labels)) < 2:
            raise MixmagError(
                f"{self.metric_name} needs both classes; found {len(labels)} cases, "
                f"all labelled {set(labels)}"
            )
        from sklearn.metrics import roc_auc_score  # its import takes a second

        return float(roc_auc_score(labels, scores))


OUTCOME = Outcome()


@dataclass
class Case:
    case_id: str
    label: int
    split: str
    slide_ids: list


def task_names(data) -> list[str]:
    return [path.stem for path in visible_files(Path(data) / "tasks", "*.csv")]


def row_fault(row: dict) -> str:
    """What is wrong with a row of a task table by itself. Empty if nothing is."""
    if not row["case_id"] or not row["slide_id"]:
        return "case_id or slide_id is empty"
    if "/" in row["slide_id"] or row["slide_id"] in (".", ".."):
        return (
            f"slide_id {row['slide_id']!r} is a path, "
            "expected the name of a file in slides/ without its suffix"
        )
    try:
        OUTCOME.parse(row["label"])
    except ValueError as error:
        return f"label of case {row['case_id']!r} is {row['label']!r}, {error}"
    if row["split"] not in SPLITS:
        expected = ", ".join(SPLITS)
        return f"split of case {row['case_id']!r} is {row['split']!r}, expected one of {expected}"
    return ""


def task_findings(path) -> tuple[list[Case], list[str]]:
    """The cases of a task table, and everything that is wrong with it."""
    findings = []
    cases: dict[str, Case] = {}
    seen = set()
    for row in read_csv(path, ("case_id", "slide_id", "label", "split")):
        where = f"{path}: line {row['line']}"
        case_id = row["case_id"]
        slide_id = row["slide_id"]
        fault = row_fault(row)
        if not fault and slide_id in seen:
            fault = f"slide {slide_id!r} stands in more than one row"
        if fault:
            findings.append(f"{where}: {fault}")
            continue
        label = OUTCOME.parse(row["label"])
        case = cases.setdefault(case_id, Case(case_id, label, row["split"], []))
        if case.split != row["split"]:
            both = f"{case.split} and {row['split']}"
            findings.append(f"{where}: case {case_id!r} is in two splits, {both}")
        if case.label != label:
            both = f"{case.label} and {label}"
            findings.append(f"{where}: case {case_id!r} has two labels, {both}")
        case.slide_ids.append(slide_id)
        seen.add(slide_id)
    return list(cases.values()), findings


def read_task(data, task) -> list[Case]:
    """Raises MixmagError for an unknown task, and with the first finding of a faulty table."""
    path = Path(data) / "tasks" / f"{task}.csv"
    if task not in task_names(data):
        found = ", ".join(task_names(data)) or "none"
        raise MixmagError(f"{path}: no such task; found {found}")
    cases, findings = task_findings(path)
    if findings:
        raise MixmagError(f"{findings[0]} (data.py verify lists all {len(findings)} findings)")
    return cases


def evaluation_slides(data) -> set:
    """`evaluation_slides_of` all tasks; only pretrain.csv can give them to pretraining."""
    cases = []
    for task in task_names(data):
        cases += read_task(data, task)
    return evaluation_slides_of(cases)


def evaluation_slides_of(cases: list) -> set:
    """All slides of every case that any of `cases` puts into a tune or test split."""
    evaluation = {case.case_id for case in cases if case.split != "train"}
    slides = set()
    for case in cases:
        if case.case_id in evaluation:
            slides.update(case.slide_ids)
    return slides


def pretraining_ids(data) -> list[str]:
    """The slides of pretrain.csv; without it, every slide that is in no tune or test split."""
    listed = Path(data) / "pretrain.csv"
    if listed.exists():
        return list(dict.fromkeys(row["slide_id"] for row in read_csv(listed, ("slide_id",))))
    evaluation = evaluation_slides(data)
    paths = visible_files(Path(data) / "slides", "*.safetensors")
    return [path.stem for path in paths if path.stem not in evaluation]


# ======================================================================================== stop here
# Above stands what the paper needs. Below stands what a lab needs around it: reading slides and
# other tools' files, the synthetic cohort, checks, and the command line.


# ---------------------------------------------------------- the slide reader, micrometres per pixel

CACHE_BYTES = 2**26  # of decoded tiles, shared by neighbouring reads of a level (assumed)
SLIDE_SUFFIXES = [".svs", ".tif", ".tiff", ".ndpi", ".vms", ".vmu"]
SLIDE_SUFFIXES += [".scn", ".mrxs", ".svslide", ".bif", ".dcm", ".czi"]
MPP_TOLERANCE = 0.02  # the share by which two values of one slide may differ (assumed)
RESOLUTION_UM = {"inch": 25400.0, "centimeter": 10000.0}  # by tiff.ResolutionUnit


class Reader:
    """A slide, read by OpenSlide, for any number of threads. Level 0 of its pyramid is the finest.

    Raises SlideReadError for a file that is no slide, and later for pixels that cannot be read.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.cache = openslide.OpenSlideCache(CACHE_BYTES)
        if not self.path.is_file() or self.path.stat().st_size == 0:
            raise SlideReadError(f"{path}: no such file, or an empty one (0 bytes)")
        try:
            self.handle = self.open()
            # All is asked for now: a handle that has failed once gives no more answers.
            self.properties = dict(self.handle.properties)
            self.downsamples = self.handle.level_downsamples
            self.level_sizes = self.handle.level_dimensions  # (width, height) of each level
        except openslide.OpenSlideError as error:
            reasons = "another format, a TIFF in strips, a part of a slide, or cut short?"
            raise SlideReadError(f"{path}: OpenSlide cannot open it ({error}); {reasons}") from None
        self.size = self.level_sizes[0]
        self.jpeg: dict[int, JpegLevel] = {}  # while it is empty, OpenSlide reads all levels
        self.jpeg = jpeg_levels(self)

    def open(self) -> openslide.OpenSlide:
        handle = openslide.OpenSlide(self.path)
        handle.set_cache(self.cache)
        return handle

    @property
    def bounds(self) -> tuple:
        """(x, y, width, height) of the scanned part, level-0 px; of all if the slide says none."""
        names = (f"openslide.bounds-{side}" for side in ("x", "y", "width", "height"))
        return tuple(map(int, map(self.properties.get, names, (0, 0, *self.size))))

    def fits(self, level: int) -> bool:
        """Whether a level is level 0 shrunk by a whole number, to two of its pixels. A level padded
        to whole tiles is not; OpenSlide's downsample, a mean of two ratios, is wrong for it."""
        downsample = self.downsamples[level]
        sides = np.multiply(self.level_sizes[level], round(downsample))
        return bool((np.abs(sides - self.size) <= 2 * downsample).all())

    def level_for(self, downsample: float) -> int:
        """The coarsest level that fits and is at least as fine as the downsample asks."""
        best = 0
        for level, found in enumerate(self.downsamples):
            # Pyramids often say 4.0001 or 3.9998 where 4 is meant.
            if found <= downsample * 1.001 and self.fits(level):
                best = level
        return best

    def region(self, level: int, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        """(h, w, 4) uint8 RGBA of a rectangle in the level's own pixels."""
        if level in self.jpeg:
            with contextlib.suppress(ValueError, OSError):
                return self.jpeg[level].region(left, top, right, bottom)
        scale = self.downsamples[level]
        corner = (round(left * scale), round(top * scale))
        place = (corner, level, (right - left, bottom - top))
        with contextlib.suppress(openslide.OpenSlideError):
            return np.asarray(self.handle.read_region(*place))
        # A handle that has failed refuses all further reads, in every thread. The others go on with
        # a new one. Another one, for this read alone, tells whether these pixels are to blame.
        try:
            self.handle = self.open()
            return np.asarray(self.open().read_region(*place))
        except openslide.OpenSlideError as error:
            raise SlideReadError(f"level {level} cannot be read at {corner}: {error}") from None

    def read(self, level: int, box: tuple) -> tuple[Image.Image, tuple]:
        """box (left, top, right, bottom) in level-0 px, floats -> the RGB picture, over white, of
        the level's pixels that cover it, and the box in pixels of that picture."""
        edges = np.divide(box, self.downsamples[level])
        left, top = edges[:2].astype(int).tolist()
        right, bottom = np.ceil(edges[2:]).clip(max=self.level_sizes[level]).astype(int).tolist()
        picture = over_white(self.region(level, left, top, right, bottom))
        within = edges - (left, top, left, top)
        return picture, tuple(within.clip(0, picture.size * 2))


def over_white(rgba: np.ndarray) -> Image.Image:
    """(h, w, 4) uint8 RGBA -> the RGB picture over white glass."""
    picture = Image.fromarray(rgba)
    rgb = Image.new("RGB", picture.size, "white")
    rgb.paste(picture, mask=picture.getchannel("A"))
    return rgb


def dicom_series(path: Path) -> str | None:
    """What all files of one DICOM slide have in common; None for other files."""
    with contextlib.suppress(openslide.OpenSlideError, OSError):  # Reader says why when it comes
        if path.suffix.lower() == ".dcm":
            return openslide.OpenSlide(path).properties.get("openslide.quickhash-1")
    return None


def openslide_version() -> str:
    return openslide.__library_version__


def number(text) -> float:
    """The number in a text, with a decimal point or comma; NaN if there is none, or 0."""
    try:
        return float(str(text).replace(",", ".")) or math.nan
    except ValueError:
        return math.nan


def plausible_mpp(x: float, y: float) -> float:
    """The mean of both; NaN if it is not within 0.1 to 4 um/px, or if x and y differ."""
    mean = (x + y) / 2
    return mean if 0.1 <= mean <= 4 and abs(x - y) <= MPP_TOLERANCE * mean else math.nan


def stated_mpp(properties) -> tuple:
    """(mpp, name, words): what a slide says of itself, NaN if it is not plausible; the property
    that says it; its text. OpenSlide's mpp, else the TIFF's resolution, else (NaN, None, None)."""
    name = "openslide.mpp-x"
    texts = [properties.get(name), properties.get("openslide.mpp-y")]
    if texts != [None, None]:
        x, y = map(number, texts)
        return plausible_mpp(x, y), name, f"{name} {texts[0]!r}, mpp-y {texts[1]!r}"
    name = "tiff.XResolution"
    texts = [properties.get(name), properties.get("tiff.YResolution")]
    unit = properties.get("tiff.ResolutionUnit")
    if texts == [None, None] or unit not in RESOLUTION_UM:
        return math.nan, None, None
    x, y = (RESOLUTION_UM[unit] / number(text) for text in texts)
    words = f"{name} {texts[0]!r}, YResolution {texts[1]!r} per {unit}"
    return plausible_mpp(x, y), name, f"{words}, which is {x:.4g} and {y:.4g} um/px"


def slide_mpp(properties, given: float | None = None, giver: str = "--mpp", from_power=False):
    """Micrometres per level-0 pixel, and who says so (a flag, or a property of the slide).

    The order: `given`, what the user gives by the flag `giver`; the slide's mpp; its TIFF
    resolution; with from_power, 10 / objective power. A given value mends an implausible one of the
    slide, and never overrules a plausible one. Nothing is guessed: raises MixmagError.
    """
    mpp, name, words = stated_mpp(properties)
    if given is not None:
        if math.isnan(plausible_mpp(given, given)):
            raise MixmagError(f"{giver} says {given:g} um/px, expected 0.1 to 4; correct it there")
        if abs(given - mpp) > MPP_TOLERANCE * mpp:
            both = f"{giver} says {given:g} um/px, the slide says {words}"
            raise MixmagError(f"{both}, more than 2 % apart; leave {giver} out for this slide")
        return given, giver
    advice = "give the true value with --mpp or --manifest"
    if name and math.isnan(mpp):
        expected = "expected 0.1 to 4 um/px and the same in x and y (2 %)"
        raise MixmagError(f"the slide says {words}; {expected}; {advice}")
    if name:
        return mpp, name
    power = properties.get("openslide.objective-power")
    mpp = 10.0 / number(power)  # 20x is 0.5 um/px
    if from_power and not math.isnan(plausible_mpp(mpp, mpp)):
        return mpp, "openslide.objective-power"
    if power and not from_power:
        advice += ", or take 10 / power with --mpp-from-power"
    raise MixmagError(f"the slide says no mpp (openslide.objective-power is {power!r}); {advice}")


def read_manifest(path) -> dict:
    """{slide id: mpp} of a CSV with the columns slide (an id or a file) and mpp; {} without a path.
    Rows without an mpp are skipped. Raises MixmagError for a slide with two rows or no number."""
    found: dict[str, float] = {}
    bad = []
    for row in read_csv(path, ("slide", "mpp")) if path else ():
        file = Path(row["slide"])
        slide_id = file.stem if file.suffix.lower() in SLIDE_SUFFIXES else file.name
        mpp = number(row["mpp"])
        if row["mpp"] and (slide_id in found or math.isnan(mpp)):
            bad.append(f"line {row['line']}: {slide_id!r} {row['mpp']!r}")
        elif row["mpp"]:
            found[slide_id] = mpp
    if bad:
        raise MixmagError(f"{path}: expected one number of um/px for each slide: {', '.join(bad)}")
    return found


def warn_unmatched_rows(manifest: dict, slide_ids: set) -> None:
    unmatched = sorted(manifest.keys() - slide_ids)
    if unmatched:
        rows = f"{len(unmatched)} of {len(manifest)} rows name no slide here"
        print(f"--manifest: {rows}, such as {unmatched[0]}", file=sys.stderr)


def user_mpp(slide_id: str, manifest: dict, mpp: float | None) -> tuple[float | None, str]:
    """What the user says of a slide, and where: its row of the manifest, else --mpp."""
    if slide_id in manifest:
        return manifest[slide_id], f"--manifest row {slide_id}"
    return mpp, "--mpp"


# ------------------------------------------------------------------------- JPEG tiles read directly

MAX_TILE_BYTES = 2**30  # that a TIFF may claim for one of its tiles (assumed)
START = b"\xff\xd8"  # of every JPEG picture
ADOBE = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0"  # the byte after it tells libjpeg YCbCr (1) or RGB (0)
RESTART_INTERVAL = b"\xff\xdd"


class JpegLevel:
    """A level of a TIFF whose tiles are JPEG pictures, for any number of threads. page: tifffile's.

    OpenSlide spends most of such a read on drawing in floating point (its issue 440); here tiles
    are laid side by side. ValueError: a tile is absent, damaged or not as the page says.
    """

    def __init__(self, path, page):
        self.tile_size = (page.tilewidth, page.tilelength)
        self.tiles_across = math.ceil(page.imagewidth / page.tilewidth)
        self.starts = page.dataoffsets
        self.lengths = page.databytecounts
        is_ycbcr = page.photometric == tifffile.PHOTOMETRIC.YCBCR
        tables = (page.jpegtables or b"")[2:-2]  # of all tiles, without their own start and end
        head = START + ADOBE + bytes([is_ycbcr]) + tables
        expected = (page.tilelength, page.tilewidth, "YCbCr" if is_ycbcr else "RGB")
        # The cached function does not know self: no cycle of references keeps the cache alive.
        decode = functools.partial(decode_tile, io.FileIO(path), head, expected)
        self.tile = functools.lru_cache(CACHE_BYTES // decoded_bytes(page))(decode)

    def region(self, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        """(bottom - top, right - left, 4) uint8 RGBA of a rectangle inside the level."""
        width, height = self.tile_size
        pixels = np.empty((bottom - top, right - left, 4), np.uint8)
        for y in range(top - top % height, bottom, height):
            for x in range(left - left % width, right, width):
                i = y // height * self.tiles_across + x // width
                tile = self.tile(self.starts[i], self.lengths[i])
                part = tile[max(0, top - y) : bottom - y, max(0, left - x) : right - x]
                row = max(0, y - top)
                column = max(0, x - left)
                pixels[row : row + part.shape[0], column : column + part.shape[1]] = part
        return pixels


def decode_tile(file, head: bytes, expected: tuple, start: int, length: int) -> np.ndarray:
    """(h, w, 4) uint8 RGBA of the tile at `start`, whose first two bytes `head` replaces."""
    found = os.pread(file.fileno(), length, start)
    jpeg = head + found[2:]
    if found[:2] != START or simplejpeg.decode_jpeg_header(jpeg)[:3] != expected:
        raise ValueError("no JPEG picture of the size and colours that the page says")
    return simplejpeg.decode_jpeg(jpeg, "RGBA")


def decoded_bytes(page) -> int:
    """Of a tile."""
    return 4 * page.tilewidth * page.tilelength


def check_tiles(path, page) -> None:
    """Raises SlideReadError for a tile so large that OpenSlide would end the process for want of
    memory, and for more or fewer tiles than the level has, which OpenSlide would mix up."""
    largest = max(decoded_bytes(page), max(page.databytecounts))
    if largest > MAX_TILE_BYTES:
        raise SlideReadError(f"{path}: is damaged: one of its tiles would have {largest} bytes")
    if len(page.dataoffsets) != math.prod(page.chunked):  # in each direction, and colour planes
        tiles = f"{len(page.dataoffsets)} tiles of {page.tilewidth} x {page.tilelength} px"
        level = f"{page.imagewidth} x {page.imagelength} px"
        raise SlideReadError(f"{path}: is damaged: its {tiles} do not make a level of {level}")


def is_plain_jpeg(page, file_bytes: int) -> bool:
    """Whether all tiles are JPEG pictures of three 8-bit colours that lie within the file."""
    form = (page.compression, page.planarconfig, page.bitspersample, page.samplesperpixel)
    if form != (tifffile.COMPRESSION.JPEG, tifffile.PLANARCONFIG.CONTIG, 8, 3):
        return False
    if decoded_bytes(page) > CACHE_BYTES:
        return False
    if RESTART_INTERVAL in (page.jpegtables or b""):  # it would hold for the tables alone
        return False
    ends = map(operator.add, page.dataoffsets, page.databytecounts)
    return len(page.dataoffsets) == len(page.databytecounts) and max(ends) <= file_bytes


def same_first_tile(reader: Reader, level: int, jpeg: JpegLevel) -> bool:
    """Whether OpenSlide makes the same of it."""
    right, bottom = np.minimum(reader.level_sizes[level], jpeg.tile_size).tolist()
    try:
        ours = jpeg.region(0, 0, right, bottom)
        return np.array_equal(ours, reader.region(level, 0, 0, right, bottom))
    except (ValueError, OSError, SlideReadError):
        return False


def plain_jpeg_pages(reader: Reader, tiff: tifffile.TiffFile) -> dict:
    """{level: page} of the levels whose tiles are plain JPEG pictures."""
    pages: dict = defaultdict(list)  # by size
    for page in map(tifffile.TiffPage.aspage, tiff.pages):
        if page.is_tiled:
            pages[page.imagewidth, page.imagelength].append(page)
    found = {}
    has_absent_tile = False
    for level, size in enumerate(reader.level_sizes):
        for page in pages[size]:
            check_tiles(reader.path, page)
            has_absent_tile |= 0 in page.databytecounts
        # Either of two pages of one size may be OpenSlide's.
        if len(pages[size]) == 1 and is_plain_jpeg(pages[size][0], tiff.filehandle.size):
            found[level] = pages[size][0]
    # OpenSlide draws what lies over an absent tile of Aperio's from the finer level.
    is_aperio = reader.properties["openslide.vendor"] == "aperio"
    return {} if is_aperio and has_absent_tile else found


def jpeg_levels(reader: Reader) -> dict[int, JpegLevel]:
    """Those levels, by number, that can be read without OpenSlide; SlideReadError as
    check_tiles."""
    if reader.properties["openslide.vendor"] not in ("aperio", "generic-tiff"):
        return {}
    levels = {}
    try:
        with tifffile.TiffFile(reader.path) as tiff:
            for level, page in plain_jpeg_pages(reader, tiff).items():
                levels[level] = JpegLevel(reader.path, page)
    except SlideReadError:
        raise
    except Exception:  # tifffile has all kinds for tags that OpenSlide does not look at
        return {}
    return {level: jpeg for level, jpeg in levels.items() if same_first_tile(reader, level, jpeg)}


# --------------------------------------------------------------------------------- tissue and masks

TISSUE_UM = 16.0  # um per pixel of thumbnail and mask; all that follows was set at it
TISSUE_CHROMA = (40, 60)  # assumed: haze is below, stained tissue above, Otsu decides between
TEXTURE = 4.0  # assumed: glass and haze vary less within 80 um, pale tissue and fat more
SPECK = 25  # mask pixels (0.006 mm2): smaller pieces are dropped
HOLE = 200  # mask pixels (0.05 mm2): smaller holes are filled
STROKE = 8  # mask pixels: half of the least width of a pen
RIM = 2  # mask pixels that are cut around ink
HALO = 32  # mask pixels over which ink may fade


def otsu(values: np.ndarray) -> int:
    """The threshold that parts uint8 values into two classes of the largest variance between them
    (Otsu 1979); the upper class is > threshold. 0 if all values are the same."""
    count = np.bincount(values.reshape(-1), minlength=256).astype(np.float64)
    below = count.cumsum()
    above = below[-1] - below
    total = (count * np.arange(256)).cumsum()
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = total / below - (total[-1] - total) / above
    return int(np.nan_to_num(below * above * distance**2).argmax())


def thumbnail(reader: Reader, mpp: float) -> tuple[np.ndarray, np.ndarray]:
    """(h, w, 3) uint8 of the whole slide at TISSUE_UM, box-averaged over white, and (h, w) bool
    where it cannot be read. Memory does not grow with the slide, because it is read in blocks. A
    block that fails is quartered, down to an eighth of its side, and then read from a finer
    level."""
    width, height = reader.size
    w = max(1, round(width * mpp / TISSUE_UM))
    h = max(1, round(height * mpp / TISSUE_UM))
    level = reader.level_for(TISSUE_UM / mpp)
    step = max(1, int(2048 * reader.downsamples[level] * mpp / TISSUE_UM))
    rgb = np.full((h, w, 3), 255, np.uint8)
    unread = np.zeros((h, w), bool)
    blocks = [(x, y, step, level) for y in range(0, h, step) for x in range(0, w, step)]
    while blocks:
        stop_if_asked()
        x, y, side, level = blocks.pop()
        right = min(x + side, w)
        bottom = min(y + side, h)
        if x >= w or y >= h:
            continue
        box = (x * width / w, y * height / h, right * width / w, bottom * height / h)
        try:
            picture, within = reader.read(level, box)
            size = (right - x, bottom - y)
            rgb[y:bottom, x:right] = picture.resize(size, Image.Resampling.BOX, box=within)
        except SlideReadError:
            if side > max(1, step // 8):
                half = math.ceil(side / 2)
                corners = itertools.product((x, x + half), (y, y + half))
                blocks += [(*corner, half, level) for corner in corners]
            elif level > 0:
                blocks.append((x, y, side, level - 1))
            else:
                unread[y:bottom, x:right] = True
    return rgb, unread


def ink_mask(colour: np.ndarray, textured: np.ndarray) -> np.ndarray:
    """Pens and black borders. colour (3, h, w) on white glass, textured (h, w) -> (h, w) bool.

    A pixel of 16 um averages nuclei with what lies between them. Over a stroke's width, a quarter
    of a millimetre, H&E and DAB are therefore never green, as blue or as red as ink, or black. Ink
    on bare glass is also smooth; there less colour is enough.
    """
    colour = ndimage.uniform_filter(colour, (1, 5, 5))
    red, green, blue = colour
    high = colour.max(0)
    saturation = 1 - colour.min(0) / high.clip(min=1)
    hue = np.degrees(np.arctan2(3**0.5 * (green - blue), 2 * red - green - blue)) % 360
    cool = (hue > 60) & (hue < 245)
    warm = (hue > 340) | (hue < 10)
    black = high < 90
    over_tissue = (red < 80) & ((blue - red > 40) | (green - red > 15))
    least_blue = np.where(textured, 0.5, 0.25)
    green_or_blue = cool & (saturation > np.where(hue < 190, 0.2, least_blue))
    least_smooth_red = np.where(high > 200, 0.5, 0.65)
    strong_red = warm & (saturation > np.where(textured, 0.78, least_smooth_red))
    smooth_red = (hue > 345) & (saturation > 0.3) & ~textured
    ink = black | over_tissue | green_or_blue | strong_red | smooth_red
    core = ndimage.distance_transform_edt(ink) > STROKE
    if not core.any():
        return core
    distance = ndimage.distance_transform_edt(~core) - STROKE
    faded = cool & (saturation > 0.1) | warm & (saturation > 0.35)
    return (distance <= RIM) | (distance <= HALO) & faded


def large_components(mask: np.ndarray, least: int) -> np.ndarray:
    """Those connected pieces of a mask that have at least so many pixels."""
    labels, _ = ndimage.label(mask)
    return mask & (np.bincount(labels.reshape(-1))[labels] >= least)


def on_white_glass(colour: np.ndarray) -> np.ndarray:
    """(3, h, w) with its colours scaled so that glass, if there is any, is white."""
    high = colour.max(0)
    low = colour.min(0)
    # Pure white is where nothing was scanned.
    glass = colour[:, (low >= 180) & (low < 254) & (high - low < 40)]
    if glass.shape[1] <= 0.01 * low.size:
        return colour
    darkest = glass.min(0)
    white = np.median(glass[:, darkest >= np.quantile(darkest, 0.75)], axis=1)
    return np.minimum(colour * (255 / white[:, None, None]), 255)


def find_tissue(rgb: np.ndarray) -> np.ndarray:
    """(h, w, 3) uint8 at TISSUE_UM -> (h, w) bool, for H&E and DAB.

    Tissue is coloured more strongly than haze, or coloured and textured (pale stains; fat, by its
    walls). It is no ink, not black and no speck. Grey, as of dust or shadow, has no colour.
    """
    colour = on_white_glass(rgb.transpose(2, 0, 1).astype(np.float32, order="C"))  # (3, h, w)
    chroma = colour.max(0) - colour.min(0)
    drop = 255 - colour.min(0)
    mean = functools.partial(ndimage.uniform_filter, size=5)
    textured = (mean(drop**2) - mean(drop) ** 2 > TEXTURE**2) & (mean(chroma) > 5)
    ink = ink_mask(colour, textured)
    chroma[ink] = 0
    # Without the edges of haze, which are textured but thin.
    inner = ndimage.binary_erosion(textured & ~ink, np.ones((5, 5)), border_value=1)
    threshold = np.clip(otsu(chroma.astype(np.uint8)), *TISSUE_CHROMA)
    mask = large_components(inner | (chroma > threshold), SPECK)
    holes = ndimage.binary_fill_holes(mask) & ~mask
    return (mask | holes & ~large_components(holes, HOLE)) & ~ink


def find_mask(path: Path, place) -> Path | None:
    """The user's mask of a slide: the file `place`, or <slide_id>.png or .geojson in that
    folder."""
    if place is None:
        return None
    files = [Path(place)]
    if files[0].is_dir():
        files = [Path(place, f"{path.stem}{suffix}") for suffix in (".png", ".geojson")]
    found = [file for file in files if file.is_file()]
    if len(found) != 1:
        expected = " or ".join(map(str, files))
        raise MixmagError(f"--mask: expected one of {expected}; found {len(found)} of them")
    return found[0]


def png_mask(path: Path, reader: Reader, size: tuple) -> np.ndarray:
    """A picture of the whole slide, whose non-zero pixels are tissue -> (h, w) bool."""
    with Image.open(path) as image:
        colours = [band != "A" for band in image.getbands()]
        pixels = np.asarray(image).reshape(image.height, image.width, -1)
    h, w, _ = pixels.shape
    width, height = reader.size
    if abs(w / h / (width / height) - 1) > 0.02:
        raise MixmagError(f"{path}: {w} x {h} is another shape than the slide's {width} x {height}")
    tissue = Image.fromarray(pixels[..., colours].any(axis=2).astype(np.uint8) * 255)
    return np.asarray(tissue.resize(size, Image.Resampling.BOX)) > 127


def polygon_rings(node) -> list:
    """[[outer ring, hole, ...], ...] of all polygons in a GeoJSON text."""
    inside = {
        "FeatureCollection": "features",
        "Feature": "geometry",
        "GeometryCollection": "geometries",
    }
    if node is None:  # a feature without a geometry
        return []
    if isinstance(node, list):
        return [rings for part in node for rings in polygon_rings(part)]
    if node["type"] in inside:
        return polygon_rings(node[inside[node["type"]]])
    if node["type"] == "Polygon":
        return [node["coordinates"]]
    if node["type"] == "MultiPolygon":
        return node["coordinates"]
    return []  # points and lines have no area


def geojson_mask(path: Path, reader: Reader, size: tuple) -> np.ndarray:
    """Polygons in level-0 px -> (h, w) bool. They are counted from the corner of the slide's
    bounds, as QuPath does, or, in a file with a `crs`, as TRIDENT's, from the slide's corner."""
    drawn = json.loads(path.read_text("utf-8-sig"))
    corner = reader.bounds[:2]
    if "crs" in drawn:
        corner = (0, 0)
    canvas = Image.new("1", size)
    for rings in polygon_rings(drawn):
        layer = canvas
        if len(rings) > 1:  # a hole cuts its own polygon only
            layer = Image.new("1", size)
        for i, ring in enumerate(rings):
            points = (np.array(ring, float)[:, :2] + corner) * np.divide(size, reader.size)
            if (np.abs(points - np.divide(size, 2)) > np.multiply(size, 0.52) + 1).any():
                limit = f"{reader.size[0]} x {reader.size[1]} level-0 px"
                raise MixmagError(f"{path}: a polygon leaves the slide's {limit}")
            ImageDraw.Draw(layer).polygon(points.reshape(-1).tolist(), fill=int(i == 0))
        canvas.paste(layer, mask=layer)
    return np.asarray(canvas)


def read_mask(path: Path, reader: Reader, shape: tuple) -> np.ndarray:
    """(h, w) bool of a PNG or GeoJSON file. Raises MixmagError for a file that is neither, has
    another shape than the slide or leaves it (by 2 %), or holds no tissue."""
    read = png_mask if path.suffix.lower() == ".png" else geojson_mask
    try:
        mask = read(path, reader, shape[::-1])
    except MixmagError:
        raise
    except Exception as error:  # Pillow and broken JSON have many kinds
        words = f"{type(error).__name__}: {error}"
        raise MixmagError(f"{path}: cannot be read as a mask, PNG or GeoJSON ({words})") from None
    if not mask.any():
        raise MixmagError(f"{path}: holds no tissue")
    return mask


def tissue_mask(reader: Reader, mpp: float, own: Path | None = None) -> tuple:
    """The thumbnail, (h, w, 3) uint8 at TISSUE_UM, and where tissue is, (h, w) bool, by the user's
    mask or by its looks. What cannot be read is grey, and counts as tissue, so that its windows are
    tried, found unreadable and counted."""
    picture, unread = thumbnail(reader, mpp)
    mask = read_mask(own, reader, unread.shape) if own else find_tissue(picture) | unread
    picture[unread] = 128
    return picture, mask


# ------------------------------------------------------ the plan of a slide, its cells, its picture

MAX_STRETCH = 1.02  # assumed: a mpp is not known better than this, so 0.51 um/px are still 20x
MAX_DRIFT = 1.0  # px of the finest magnification that an edge may lie off the lattice
MAX_LOST = 0.01  # share of a cell that may be missing where the mask sees tissue (assumed)


@dataclass
class TilePlan:
    """What will be read of a slide: one lattice of cells. Its lines, floats in level-0 px, are
    rounded once, to whole pixels of the one level that is read. A tile is an equal part of its
    cell, so that children tile their parent whatever the mpp. Windows are (col, row, cols, rows) in
    cells."""

    mpp: float
    mpp_source: str
    magnifications: list
    cell_px: float
    origin: tuple
    level: int  # the coarsest one that is fine enough for every magnification
    downsample: float
    lines: tuple  # (cols + 1,), (rows + 1,) int: the lattice in the level's pixels
    thumbnail: np.ndarray  # (h, w, 3) at TISSUE_UM
    mask: np.ndarray  # (h, w) where its tissue is
    mask_scale: np.ndarray  # (2,) pixels of the mask per level-0 pixel, in x and y
    windows: list = field(default_factory=list)  # those with enough tissue
    candidates: int = 0  # windows looked at
    unscanned: set = field(default_factory=set)  # cells read so far with pixels that do not exist

    def choose_windows(self, R: int, min_tissue: float) -> None:
        cols, rows = (len(lines) - 1 for lines in self.lines)
        for row, col in itertools.product(range(0, rows, R), range(0, cols, R)):
            window = (col, row, min(R, cols - col), min(R, rows - row))
            self.candidates += 1
            if self.patch(self.mask, *window).mean() >= min_tissue:
                self.windows.append(window)

    @property
    def cell_count(self) -> int:
        return sum(cols * rows for _, _, cols, rows in self.windows)

    @property
    def covered(self) -> float:
        """The share of the mask's tissue in the windows. The rest is in windows with too little of
        it, or beyond the last whole cell."""
        inside = sum(self.patch(self.mask, *window).sum() for window in self.windows)
        return inside / max(1, self.mask.sum())

    @property
    def shrink(self) -> int:
        """The level's pixels, rounded, along a pixel of the finest magnification."""
        return max(1, round(10.0 / self.magnifications[-1] / self.mpp / self.downsample))

    def patch(self, mask: np.ndarray, col: int, row: int, cols: int = 1, rows: int = 1):
        """The part of a mask that these cells cover, at least one pixel of it."""
        corners = np.array([[col, row], [col + cols, row + rows]]) * self.cell_px + self.origin
        (x0, y0), (x1, y1) = np.round(corners * self.mask_scale).astype(int)
        return mask[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]

    @functools.cached_property
    def inside(self) -> np.ndarray:
        """(h, w) where tissue is for certain: the mask without its rim, and with its small holes,
        as a lost tile makes them, but not with large ones, which are lumen or were not scanned."""
        holes = ndimage.binary_fill_holes(self.mask) & ~self.mask
        small_holes = holes & ~large_components(holes, 4 * HOLE)
        return ndimage.binary_erosion(self.mask | small_holes, iterations=2)

    def edges(self, axis: int, k: int) -> np.ndarray:
        """Where the tiles of magnification index k begin and end, in the level's pixels: every
        interval of the lattice in 2^k equal parts. Axis 0 is x."""
        lines = self.lines[axis]
        places = np.arange((len(lines) - 1) * 2**k + 1) / 2**k
        return np.interp(places, np.arange(len(lines)), lines)

    def drift(self) -> float:
        """The largest distance of an edge of a tile from the unrounded lattice, um."""
        distances = []
        for k in range(len(self.magnifications)):
            for axis in range(2):
                edges = self.edges(axis, k) * self.downsample
                exact = self.origin[axis] + self.cell_px / 2**k * np.arange(len(edges))
                distances.append(np.abs(edges - exact).max() * self.mpp)
        return max(distances)

    def effective_mpp(self, k: int) -> tuple[float, float]:
        """The least and the largest um/px of the tiles of magnification index k."""
        sides = np.concatenate([np.diff(self.edges(axis, k)) for axis in range(2)])
        sides = sides * self.downsample * self.mpp / TILE_PX
        return sides.min(), sides.max()


def check_fine_enough(mpp: float, magnifications) -> None:
    """Raises MixmagError for a slide that would have to be upsampled."""
    finest = 10.0 / magnifications[-1]  # 20x is 0.5 um/px, 5x is 2.0
    coarser = [str(m) for m in magnifications if mpp <= MAX_STRETCH * 10.0 / m]
    if len(coarser) == len(magnifications):
        return
    found = f"its {mpp:g} um/px are coarser than {magnifications[-1]}x ({finest:g} um/px)"
    advice = f"--magnifications {' '.join(coarser)} tiles it at what it has"
    if not coarser:
        advice = "it has none of the magnifications"
    raise MixmagError(f"{found}, and nothing is upsampled; {advice}")


def plan_slide(reader: Reader, settings: TileSettings) -> TilePlan:
    """The lattice of cells, in exact mpp, from the corner of the slide's bounds, and the windows of
    region x region cells, on a lattice of that stride, with enough tissue. A window at the border
    has those of its cells that lie wholly on the slide."""
    given, giver = user_mpp(reader.path.stem, settings.manifest, settings.mpp)
    mpp, source = slide_mpp(reader.properties, given, giver, settings.mpp_from_power)
    check_fine_enough(mpp, settings.magnifications)
    finest = 10.0 / settings.magnifications[-1]
    cell_px = TILE_PX * 10.0 / settings.magnifications[0] / mpp
    bounds = reader.bounds
    level = reader.level_for(finest / mpp)
    lines = []
    for start, side, size in zip(bounds[:2], bounds[2:], reader.level_sizes[level], strict=True):
        cells = int((side + 1) / cell_px)  # a last line may be rounded, too
        if cells == 0:
            cell = f"one cell of {cell_px:g} px ({cell_px * mpp:g} um)"
            raise MixmagError(f"its {bounds[2]} x {bounds[3]} px are less than {cell}")
        exact = (start + cell_px * np.arange(cells + 1)) / reader.downsamples[level]
        lines.append(np.round(exact).clip(max=size).astype(int))
    picture, mask = tissue_mask(reader, mpp, find_mask(reader.path, settings.mask))
    plan = TilePlan(
        mpp=mpp,
        mpp_source=source,
        magnifications=settings.magnifications,
        cell_px=cell_px,
        origin=(float(bounds[0]), float(bounds[1])),
        level=level,
        downsample=reader.downsamples[level],
        lines=tuple(lines),
        thumbnail=picture,
        mask=mask,
        mask_scale=np.divide(mask.shape[::-1], reader.size),
    )
    plan.choose_windows(settings.region, settings.min_tissue)
    if plan.drift() > MAX_DRIFT * finest:
        found = f"edges would lie {plan.drift():.3g} um off, more than {MAX_DRIFT * finest:g} um"
        sizes = f"{reader.level_sizes[level]} px) does not fit level 0 ({reader.size} px)"
        raise MixmagError(f"level {level} ({sizes}: {found}")
    return plan


def check_nothing_lost(plan: TilePlan, alpha: np.ndarray, col: int, row: int) -> None:
    """Notes a cell that has pixels which the file does not have, alpha (h, w) = 0. Raises
    SlideReadError if there was tissue."""
    plan.unscanned.add((col, row))
    inside = plan.patch(plan.inside, col, row)
    size = inside.shape[::-1]
    absent = np.asarray(Image.fromarray(alpha).resize(size, Image.Resampling.BOX)) == 0
    lost = (inside & absent).mean()
    if lost > MAX_LOST:
        cell = f"{lost:.0%} of the cell at (col, row) ({col}, {row})"
        where = "where the thumbnail shows tissue"
        raise SlideReadError(f"level {plan.level} has no pixels for {cell}, {where}")


def read_cell(reader: Reader, plan: TilePlan, col: int, row: int) -> np.ndarray:
    """(T, 224, 224, 3) uint8: a cell's tiles in the slide file's token order.

    Pixels are decoded once and resampled once, by a factor near 1. Means of whole pixels do the
    rest. Together this is area averaging, and a tile is the mean of its children. Raises
    SlideReadError for pixels that cannot be read, or are missing where there was tissue.
    """
    left, right = plan.lines[0][col : col + 2].tolist()
    top, bottom = plan.lines[1][row : row + 2].tolist()
    # Four bytes a pixel: torch and Pillow work faster on them than on three.
    pixels = reader.region(plan.level, left, top, right, bottom)  # (h, w, 4)
    least_alpha = pixels[..., 3].min()
    if least_alpha == 0:
        check_nothing_lost(plan, pixels[..., 3], col, row)
    if least_alpha < 255:
        pixels = np.asarray(over_white(pixels).convert("RGBX"))
    K = len(plan.magnifications)
    side = TILE_PX * 2 ** (K - 1) * plan.shrink
    if pixels.shape[:2] != (side, side):
        pixels = np.require(pixels, requirements="W")  # torch takes no read-only array
        planes = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)  # (1, 4, h, w)
        planes = F.interpolate(planes, size=(side, side), mode="bilinear", antialias=True)
        pixels = planes[0].permute(1, 2, 0).numpy()
    picture = Image.frombuffer("RGBX", (side, side), pixels, "raw", "RGBX", 0, 1)
    tiles = np.empty(((4**K - 1) // 3, TILE_PX, TILE_PX, 3), np.uint8)
    shrink = plan.shrink
    for k in reversed(range(K)):
        if shrink > 1:
            picture = picture.reduce(shrink)
        shrink = 2
        n = 2**k
        rgb = np.frombuffer(picture.tobytes("raw", "RGB"), np.uint8)
        rgb = rgb.reshape(n, TILE_PX, n, TILE_PX, 3).swapaxes(1, 2)  # (n, n, 224, 224, 3)
        tiles[magnification_entries(k)].reshape(rgb.shape)[:] = rgb
    return tiles


def cells_of(window: tuple) -> list:
    """[(col, row), ...] of the cells in a window, row-major."""
    col, row, cols, rows = window
    return [(col + c, row + r) for r in range(rows) for c in range(cols)]


def read_window(reader: Reader, plan: TilePlan, window: tuple) -> np.ndarray:
    """(cells, T, 224, 224, 3) uint8: the tiles of a window, cell-major."""
    return np.stack([read_cell(reader, plan, *cell) for cell in cells_of(window)])


def read_cells(reader: Reader, plan: TilePlan):
    """Yields (number of the window, (col, row), tiles or the SlideReadError) in the plan's order,
    while threads read a few cells ahead."""

    def read(item):
        number, cell = item
        try:
            return number, cell, read_cell(reader, plan, *cell)
        except SlideReadError as error:
            return number, cell, error

    cells = [(i, cell) for i, window in enumerate(plan.windows) for cell in cells_of(window)]
    return prefetch(read, cells, torch.get_num_threads())


def scale_bar(axis, across: float) -> None:
    """A bar of a round length at the lower left of a picture whose axis is in um and shows
    `across`."""
    lengths = [n * 10.0**k for n in (1, 2, 5) for k in range(6)]
    length = max(n for n in lengths if n <= max(across / 3, 1))
    left, right = axis.get_xlim()
    bottom, top = axis.get_ylim()
    x = left + 0.04 * (right - left)
    y = bottom + 0.04 * (top - bottom)
    for colour, thick in (("white", 5), ("black", 3)):
        axis.plot([x, x + length], [y, y], color=colour, lw=thick, solid_capstyle="butt")
    label = f"{length:g} um" if length < 1000 else f"{length / 1000:g} mm"
    box = {"facecolor": "white", "alpha": 0.7, "lw": 0, "pad": 1}
    axis.annotate(label, (x, y), (0, 5), textcoords="offset points", fontsize=8, bbox=box)


def draw_qc(path, reader: Reader, plan: TilePlan) -> None:
    """A PNG to look at: the thumbnail with the contours of its tissue and the kept windows; beside
    it the tiles of the window with most tissue (red), each magnification at the same size in um."""
    from matplotlib.figure import Figure  # without pyplot: nothing global, no display

    K = len(plan.magnifications)
    figure = Figure((5 + 4 * K, 5), dpi=130, layout="constrained")
    axes = figure.subplots(1, K + 1, squeeze=False)[0]
    best = sorted(plan.windows, key=lambda window: -plan.patch(plan.mask, *window).sum())[:1]
    draw_overview(axes[0], reader, plan, best)
    try:
        for window in best:
            draw_tiles(axes[1:], plan, window, read_window(reader, plan, window))
    except SlideReadError as error:
        figure.suptitle(f"the red window cannot be read: {error}", fontsize=8, wrap=True)
    for axis in axes:
        axis.set(xticks=[], yticks=[])
        axis.set_visible(bool(axis.images))
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png")


def draw_overview(axis, reader: Reader, plan: TilePlan, best: list) -> None:
    """The thumbnail, in um, its tissue and its windows, those of `best` in red."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    width, height = np.multiply(reader.size, plan.mpp)
    extent = (0, width, height, 0)
    shrink = math.ceil(max(plan.mask.shape) / 1500)
    axis.imshow(Image.fromarray(plan.thumbnail).reduce(shrink), extent=extent)
    if plan.mask.any() and not plan.mask.all():
        look = {"levels": [0.5], "colors": "lime", "linewidths": 0.7}
        axis.contour(plan.mask[::shrink, ::shrink], origin="upper", extent=extent, **look)
    side = plan.cell_px * plan.mpp
    for windows, colour, thick in ((plan.windows, "tab:blue", 0.7), (best, "red", 1.5)):
        frames = []
        for col, row, cols, rows in windows:
            corner = np.multiply(plan.origin, plan.mpp) + (col * side, row * side)
            frames.append(Rectangle(corner, cols * side, rows * side))
        axis.add_collection(PatchCollection(frames, facecolor="none", edgecolor=colour, lw=thick))
    lines = [
        *textwrap.wrap(reader.path.stem, 60),
        f"{plan.mpp:.4g} um/px ({plan.mpp_source}); tissue {plan.mask.mean():.1%}",
        f"{len(plan.windows)} of {plan.candidates} windows kept, {plan.covered:.0%} of the tissue",
    ]
    axis.set_title("\n".join(lines), fontsize=9, parse_math=False)
    scale_bar(axis, width)


def draw_tiles(axes, plan: TilePlan, window: tuple, tiles: np.ndarray) -> None:
    """Tiles (C, T, 224, 224, 3) of a window, a picture per magnification, their edges in white."""
    _, _, cols, rows = window
    side = plan.cell_px * plan.mpp
    for k, axis in enumerate(axes):
        n = 2**k
        picture = tiles[:, magnification_entries(k)]  # (C, n * n, 224, 224, 3)
        picture = picture.reshape(rows, cols, n, n, TILE_PX, TILE_PX, 3)
        picture = picture.transpose(0, 2, 4, 1, 3, 5, 6)  # (rows, n, 224, cols, n, 224, 3)
        picture = Image.fromarray(picture.reshape(rows * n * TILE_PX, cols * n * TILE_PX, 3))
        shrink = max(1, max(picture.size) // 900)
        axis.imshow(picture.reduce(shrink), extent=(0, cols * side, rows * side, 0))
        axis.vlines(np.arange(1, cols * n) * side / n, 0, rows * side, color="white", lw=0.4)
        axis.hlines(np.arange(1, rows * n) * side / n, 0, cols * side, color="white", lw=0.4)
        axis.set_title(f"{plan.magnifications[k]}x: {cols * n} x {rows * n} tiles", fontsize=8)
        scale_bar(axis, cols * side)


def plan_report(reader: Reader, plan: TilePlan, region: int) -> str:
    """Two lines about what will be read, and how exactly."""
    tokens = []
    effective = []
    for k, magnification in enumerate(plan.magnifications):
        low, high = plan.effective_mpp(k)
        tokens.append(f"{magnification}x {plan.cell_count * 4**k}")
        effective.append(f"{magnification}x {10 / magnification:g} ({low:.4g} to {high:.4g})")
    whole = sum(cols * rows == region**2 for _, _, cols, rows in plan.windows)
    total = plan.cell_count * (4 ** len(tokens) - 1) // 3
    report = (
        f"{reader.path.stem}: {plan.mpp:.4g} um/px ({plan.mpp_source}), level {plan.level} of "
        f"{len(reader.level_sizes)} (downsample {plan.downsample:.6g}), {len(plan.windows)} of "
        f"{plan.candidates} windows hold tissue ({whole} with all {region**2} cells) and "
        f"{plan.covered:.0%} of it, {plan.cell_count} cells, {total} tokens ({', '.join(tokens)})\n"
        f"    drift: edges keep to the lattice within {plan.drift():.2g} um; "
        f"um/px asked (effective): {', '.join(effective)}"
    )
    finest = 10.0 / plan.magnifications[-1]
    native = plan.mpp * plan.downsample
    if native > 1.0005 * finest:
        report += f"; the slide's {native:.4g} um/px are interpolated by {native / finest - 1:.1%}"
    return report


# ------------------------------------------------------------------------------------ tile encoders


def texture(tiles: torch.Tensor) -> torch.Tensor:
    """A stand-in for a tile foundation model: 46 fixed statistics of colour and texture, no
    weights, the same for a turned tile. tiles (B, 224, 224, 3) uint8 RGB -> (B, 46) float32.

    It makes the whole chain run anywhere; it is no substitute for a trained encoder.
    """
    rgb = tiles.permute(0, 3, 1, 2).float()  # (B, 3, 224, 224)
    density = -torch.log10((rgb + 1) / 256)  # optical density, Beer-Lambert
    stains = torch.tensor(  # Ruifrok & Johnston 2001
        [[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]]
    )
    stained = torch.einsum("sc,bchw->bshw", stains.to(density), density)  # (B, 3, 224, 224)
    flat = stained.flatten(2)
    ordered = F.avg_pool2d(stained, 4).flatten(2).sort().values  # (B, 3, 56 * 56)
    at = (torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]) * ordered.shape[-1]).long()
    features = [flat.mean(2), flat.std(2), ordered[..., at].flatten(1)]  # 3 + 3 + 15
    for scale in (1, 2, 4, 8, 16):  # how much varies between neighbours, and within, at each scale
        coarse = F.avg_pool2d(stained[:, :2], scale)
        down = coarse.diff(dim=2).abs().mean((2, 3))
        across = coarse.diff(dim=3).abs().mean((2, 3))
        features += [2 * (down + across), coarse.std((2, 3))]  # 5 * 4
    chroma = (rgb.amax(1) - rgb.amin(1)) / 255
    centred = flat[:, :2] - flat[:, :2].mean(2, keepdim=True)
    single = [
        chroma.mean((1, 2)),
        chroma.std((1, 2)),
        10 * centred.prod(1).mean(1),
        (rgb.mean(1) > 220).float().mean((1, 2)),
        rgb[:, 0].mean((1, 2)) / 255,
    ]
    return torch.cat([*features, torch.stack(single, dim=1)], dim=1)


def tile_encoder(name: str, device, weights=None):
    """The callable (B, 224, 224, 3) uint8, on `device`, -> (B, D) of a name (texture, virchow2 or
    module:factory). Raises MixmagError if it cannot be had."""
    if weights and name != "virchow2":
        raise MixmagError(f"--weights {weights}: only --encoder virchow2 takes them, not {name}")
    if name == "texture":
        return texture
    if name == "virchow2":
        return load_virchow2(device, weights)
    module, _, factory = name.partition(":")
    if not module or not factory:
        raise MixmagError(f"--encoder {name}: expected texture, virchow2 or module:factory")
    sys.path.insert(0, os.getcwd())
    try:
        encoder = getattr(importlib.import_module(module), factory)()
    except Exception as error:  # whatever the user's module raises
        raise MixmagError(f"--encoder {name}: {type(error).__name__}: {error}") from None
    if not callable(encoder):
        found = f"{factory}() returned {type(encoder).__name__}"
        expected = "a callable (B, 224, 224, 3) uint8 -> (B, D)"
        raise MixmagError(f"--encoder {name}: {found}, expected {expected}")
    return encoder.to(device).eval() if isinstance(encoder, torch.nn.Module) else encoder


def encode_tiles(encoder, tiles: np.ndarray, batch_size: int, device, dim: int | None = None):
    """tiles (..., 224, 224, 3) uint8 -> (..., D) float16. Raises MixmagError for an output that is
    no (B, D) of finite floats in float16's range, or has not the width `dim`, if given, in each
    batch."""
    made = []
    with torch.inference_mode():
        for batch in torch.from_numpy(tiles.reshape(-1, *tiles.shape[-3:])).split(batch_size):
            out = encoder(batch.to(device))
            check_encoded(out, len(batch), dim)
            dim = out.shape[1]
            made.append(out.half().cpu())
    half = torch.cat(made)
    bad = int((~half.isfinite()).any(1).sum())
    if bad:
        values = "NaN, or values beyond float16"
        raise MixmagError(f"the encoder returned {values}, for {bad} of {len(half)} tiles")
    return half.numpy().reshape(*tiles.shape[:-3], -1)


def check_encoded(out, tiles: int, dim: int | None) -> None:
    """Raises MixmagError for an encoder's output that is no (tiles, dim) of floats."""
    found = type(out).__name__
    if isinstance(out, torch.Tensor):
        found = f"{out.dtype} {tuple(out.shape)}"
        is_table = out.is_floating_point() and out.ndim == 2 and len(out) == tiles
        if is_table and dim in (None, out.shape[1]):
            return
    expected = f"floating-point numbers ({tiles}, {dim or 'D'})"
    raise MixmagError(f"the encoder made {found} of {tiles} tiles, expected {expected}")


class Virchow2(torch.nn.Module):
    """tiles (B, 224, 224, 3) uint8 -> (B, 1280) float32: the class token of Virchow2 (Zimmermann et
    al. 2024), a ViT-H/14 of 631 M parameters; fp16 autocast on a GPU.

    The tokens are class, 4 registers, 256 patches; paper 4.1 uses the class token alone. The
    constants are ImageNet's. They are written out, because timm's configuration of a local model
    says 0.5.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]))

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        pictures = ((tiles / 255 - self.mean) / self.std).permute(0, 3, 1, 2)
        with torch.autocast(tiles.device.type, torch.float16, enabled=tiles.is_cuda):
            return self.model(pictures)[:, 0].float()


def load_virchow2(device, weights=None) -> Virchow2:
    """With the weights of a file, else of the Hugging Face hub. Raises MixmagError with what to
    do."""
    try:
        import timm
        from timm.layers import SwiGLUPacked
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision for another torch
        needed = f"timm, and a torchvision that matches torch {torch.__version__}"
        advice = "pip install timm torchvision==0.28.0, the one for torch 2.13, on the same device"
        raise MixmagError(f"--encoder virchow2 needs {needed} ({error}): {advice}") from None
    layers = {"mlp_layer": SwiGLUPacked, "act_layer": torch.nn.SiLU}
    if weights:
        with torch.device("meta"):  # 2.5 GB that need not be drawn at random first
            model = timm.create_model(
                "vit_huge_patch14_224",
                img_size=224,
                init_values=1e-5,
                num_classes=0,
                reg_tokens=4,
                mlp_ratio=5.3375,
                global_pool="",
                dynamic_img_size=True,
                **layers,
            )
        load_weights(model, weights)
    else:
        try:
            model = timm.create_model("hf-hub:paige-ai/Virchow2", pretrained=True, **layers)
        except OSError as error:  # all that the hub and the network raise
            reason = error.strerror or type(error).__name__  # the full text may hold a token
            raise MixmagError(
                f"Virchow2 cannot be fetched ({reason}): accept its terms at "
                "huggingface.co/paige-ai/Virchow2 and set HF_TOKEN to a token of that account, "
                "or, without a network, give --weights FILE"
            ) from None
    encoder = Virchow2(model).to(device).eval()
    encode_tiles(encoder, np.full((2, TILE_PX, TILE_PX, 3), 200, np.uint8), 2, device, 1280)
    return encoder


def load_weights(model: torch.nn.Module, path) -> None:
    """Give a model on the meta device all weights of a file, and no others, as fp32. Raises
    MixmagError with what does not fit."""
    try:
        if str(path).endswith(".safetensors"):
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, "cpu", weights_only=True, mmap=True)
        state = {name: tensor.float() for name, tensor in state.items()}
    except Exception as error:  # each of the two libraries has half a dozen ways to say it
        kind = type(error).__name__
        raise MixmagError(f"--weights {path}: no file of named tensors ({kind})") from None
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:500]
        raise MixmagError(f"--weights {path}: does not fit Virchow2: {reason}") from None


# --------------------------------------------------------------------------------- the tile command

MAX_BAD_WINDOWS = 0.01  # a slide of which more cannot be read has failed


@dataclass(frozen=True)
class TileSettings:
    """How slides are tiled: the flags of `data.py tile`, their files read."""

    out: Path = Path("data")
    encoder: str = "texture"
    weights_sha256: str | None = None
    mpp: float | None = None
    manifest: dict = field(default_factory=dict)  # slide id -> mpp
    mpp_from_power: bool = False
    magnifications: tuple = (5, 10, 20)
    region: int = 3
    min_tissue: float = 0.25
    mask: str | None = None  # a file or a folder
    batch_size: int = 256
    device: torch.device = torch.device("cpu")
    dry_run: bool = False


def tile_slide(reader: Reader, plan: TilePlan, encoder, dim: int, settings: TileSettings) -> tuple:
    """features (C, T, D) float16, cells (C, 2) int32, and the number of windows that are left out
    because their pixels cannot be read."""
    T = Geometry(1, plan.magnifications).tokens_per_cell
    cells_per_batch = max(1, settings.batch_size // T)
    batch = []  # tiles of cells, each (T, 224, 224, 3)
    features = [np.zeros((0, T, dim), np.float16)]
    done = []  # (window, (col, row)) of each cell, in the order of the features
    unreadable = set()  # windows

    def encode():
        tiles = np.stack(batch)
        features.append(encode_tiles(encoder, tiles, settings.batch_size, settings.device, dim))
        batch.clear()

    name = reader.path.stem[:24]
    reads = read_cells(reader, plan)
    for window, cell, tiles in progress(reads, total=plan.cell_count, desc=name, leave=False):
        if isinstance(tiles, SlideReadError):
            unreadable.add(window)
            if len(unreadable) > MAX_BAD_WINDOWS * len(plan.windows):
                share = f"{len(unreadable)} of {len(plan.windows)}"
                limit = f"{MAX_BAD_WINDOWS:.0%}"
                raise MixmagError(f"{share} windows cannot be read, more than {limit}: {tiles}")
        elif window not in unreadable:
            done.append((window, cell))
            batch.append(tiles)
        if len(batch) == cells_per_batch:
            encode()
    if batch:
        encode()
    good = np.array([window not in unreadable for window, _ in done], bool)
    cells = np.array([cell for _, cell in done], np.int32).reshape(-1, 2)
    return np.concatenate(features)[good], cells[good], len(unreadable)


def slide_files_below(folder: Path):
    """Slide files in a folder and those below it, also by links, but not in hidden ones."""
    seen = set()  # real folders, each of which is searched once
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        for name in sorted(files):
            if Path(name).suffix.lower() in SLIDE_SUFFIXES and not name.startswith("."):
                yield Path(place, name)


def find_slide_files(places) -> list[Path]:
    """Slide files, named or found in folders, one for each DICOM series. Raises MixmagError if two
    have the same slide id."""
    paths = []
    for place in map(Path, places):
        paths += slide_files_below(place) if place.is_dir() else [place]
    first: dict = {}  # by what makes a file another slide
    for path in paths:
        series = dicom_series(path)
        key = (path.parent.resolve(), series) if series else (path.resolve(), path.name)
        if series and key in first:
            print(f"{path}: the same DICOM series as {first[key].name}", file=sys.stderr)
        first.setdefault(key, path)
    by_id = defaultdict(list)
    for path in first.values():
        by_id[path.stem.lower()].append(str(path))
    clashes = [" and ".join(same) for same in by_id.values() if len(same) > 1]
    if clashes:
        raise MixmagError(f"slides with one id: {'; '.join(clashes)}: rename them")
    if not paths:
        suffixes = " ".join(SLIDE_SUFFIXES)
        raise MixmagError(f"no slides in {', '.join(map(str, places))} (suffixes: {suffixes})")
    return list(first.values())


def tile_one(path: Path, encoder, dim: int, settings: TileSettings) -> tuple[str, int]:
    """Tile one slide into its file; a report, and the bytes of its features. Raises MixmagError."""
    if path.stem.encode("utf-8", "ignore").decode("utf-8") != path.stem:
        raise MixmagError(f"{ascii(path.stem)}: the name is no UTF-8; rename the file")
    out = settings.out / "slides" / f"{path.stem}.safetensors"
    mask = find_mask(path, settings.mask)
    made_with = {
        "region": settings.region,
        "min_tissue": settings.min_tissue,
        "source_bytes": path.stat().st_size,
        "mask": file_sha256(mask) if mask else None,
        "weights": settings.weights_sha256,
    }
    wanted = {
        "encoder": settings.encoder,
        "magnifications": list(settings.magnifications),
        "settings": made_with,
    }
    mpp, _ = user_mpp(path.stem, settings.manifest, settings.mpp)
    if already_done(out, wanted, mpp):
        return f"{path.stem}: done before", 0
    reader = Reader(path)
    plan = plan_slide(reader, settings)
    size = plan.cell_count * Geometry(1, plan.magnifications).tokens_per_cell * dim * 2
    report = f"{plan_report(reader, plan, settings.region)}; {size / 1e6:.2f} MB"
    if not settings.dry_run:
        draw_qc(settings.out / "qc" / f"{path.stem}.png", reader, plan)
        features, cells, bad = tile_slide(reader, plan, encoder, dim, settings)
        meta = wanted | slide_meta(reader, plan) | {"n_bad": bad}
        write_slide(out, features, cells, np.ones(features.shape[:2], bool), meta)
        if bad:
            report += f"; {bad} windows dropped as unreadable"
        if plan.unscanned:
            report += f"; {len(plan.unscanned)} cells hold pixels that the file does not have"
            report += ", taken for glass"
    if not plan.windows:
        report += f"; nothing to embed: tissue is {plan.mask.mean():.1%} of the slide, and of no "
        report += f"window as much as --min-tissue {settings.min_tissue:.0%}"
    return report, size


def slide_meta(reader: Reader, plan: TilePlan) -> dict:
    """What a slide file says of the slide."""
    return {
        "slide_id": reader.path.stem,
        "tile_px": TILE_PX,
        "mpp": plan.mpp,
        "cell_px": plan.cell_px,
        "origin": plan.origin,
        "width": reader.size[0],
        "height": reader.size[1],
        "n_unscanned": len(plan.unscanned),
    }


def share_of_slides(shard: str | None) -> tuple[int, int]:
    """(i, n): this process does the i-th of n shares, as --shard says, or torchrun."""
    rank, world = process_rank()
    if shard is None:
        return rank, world
    if world > 1:
        raise MixmagError(f"--shard {shard}: torchrun shares the slides out already; leave out one")
    numbers = re.fullmatch(r"(\d+)/(\d+)", shard)
    if not numbers or int(numbers[1]) >= int(numbers[2]):
        raise MixmagError(f"--shard {shard}: expected i/n with 0 <= i < n")
    return int(numbers[1]), int(numbers[2])


def check_tile_flags(args, paths: list) -> None:
    """Raises MixmagError for what can be refused before any work."""
    try:
        Geometry(args.region, args.magnifications)
    except ValueError as error:
        raise MixmagError(str(error)) from None
    if args.mask and not Path(args.mask).exists():
        raise MixmagError(f"--mask {args.mask}: no such file or folder")
    if args.mask and Path(args.mask).is_file() and len(paths) > 1:
        advice = "give a folder of <slide_id>.png or .geojson"
        raise MixmagError(f"--mask {args.mask} is one file for {len(paths)} slides; {advice}")
    out = Path(args.out).resolve()
    if any(path.resolve().parent in (out, out / "slides") for path in paths):
        raise MixmagError(f"--out {args.out} is a folder of slides; name another folder")


def wait_for_other_processes() -> None:
    """torchrun ends all processes with the first that ends with a code other than 0."""
    if process_rank()[1] > 1:
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def tile_command(args) -> int:
    share, shares = share_of_slides(args.shard)
    paths = find_slide_files(args.slides)
    check_tile_flags(args, paths)
    manifest = read_manifest(args.manifest)
    warn_unmatched_rows(manifest, {path.stem for path in paths})
    device = find_device(args.device)
    encoder = tile_encoder(args.encoder, device, args.weights)
    white = np.full((1, TILE_PX, TILE_PX, 3), 255, np.uint8)
    dim = encode_tiles(encoder, white, 1, device).shape[1]
    flags = vars(args) | {"manifest": manifest, "device": device}
    flags["out"] = Path(args.out).resolve()
    flags["weights_sha256"] = file_sha256(args.weights) if args.weights else None
    settings = TileSettings(**{name: flags[name] for name in TileSettings.__dataclass_fields__})
    paths = paths[share::shares]
    failed, needed = tile_all(paths, encoder, dim, settings)
    wait_for_other_processes()
    done = len(paths) - len(failed)
    if args.dry_run:
        free = free_bytes(settings.out)
        room = f"{needed / 1e9:.3f} GB are needed, {free / 1e9:.3f} GB free under {args.out}"
        print(f"{done} slides can be tiled, {len(failed)} cannot; {room}")
        if needed > free:
            raise MixmagError(f"the slides do not fit under --out {args.out}")
        return 3 if failed else 0
    table = settings.out / f"failed-{share}-of-{shares}.csv"
    if shares == 1:
        for old in settings.out.glob("failed-*-of-*.csv"):  # of shares, now done again as a whole
            old.unlink()
        table = settings.out / "failed.csv"
    print(f"{done} slides done, {len(failed)} failed" + f" (see {table})" * bool(failed))
    return report_failed(table, failed)


def tile_all(paths: list, encoder, dim: int, settings: TileSettings) -> tuple[list, int]:
    """The (slide_id, stage, reason) of each slide that fails, and the bytes of all features."""
    failed = []
    total = 0
    for path in progress(paths, desc="slides"):
        try:
            report, size = tile_one(path, encoder, dim, settings)
        except Stopped:
            raise
        except Exception as error:  # whatever a slide, or the user's encoder, raises
            kind = "" if isinstance(error, MixmagError) else f"{type(error).__name__}: "
            reason = " ".join(f"{kind}{error}".split())
            failed.append((path.stem, "tile", reason))
            print(f"{path.stem}: FAILED: {reason}", file=sys.stderr)
        else:
            total += size
            print(report, flush=True)
    return failed, total


# --------------------------------------------------------------------- import of other tools' files

IMPORT_SECONDS = 1800  # assumed: no slide takes longer, unless a file hangs the HDF5 library
STAMP_SNAP = 0.1  # assumed: how far STAMP's tiles may be off their lattice, in tiles
MAX_RATIO = 1032  # gzip cannot shrink more, so an array is at most this many times its file
IMPORT_FACTS = ("encoder", "magnifications", "mpp", "mpp_source")


def whole_if_possible(value: float) -> int | float:
    """5 for 5.0, and 2.5 for 2.5."""
    return int(value) if value == int(value) else value


@dataclass
class ImportJob:
    slide_id: str
    paths: list[Path]  # one file for each magnification, from low to high
    out: Path
    tool: str  # trident or stamp
    encoder: str | None = None
    class_token: bool | None = None
    mpp: float | None = None
    mpp_source: str = "--mpp"


@dataclass
class FeatureFile:
    """One slide at one magnification. Lengths are level-0 pixels (TRIDENT) or um (STAMP)."""

    features: np.ndarray  # (n, D)
    corners: np.ndarray  # (n, 2): x, y of the tiles' top-left corners
    side: float  # of a tile
    tile_px: int
    magnification: float
    encoder: str | None
    slide_size: tuple = (None, None)  # width, height


def read_array(file: h5py.File, name: str) -> np.ndarray:
    """What claims more bytes than its file can hold is refused unread."""
    array = file[name]
    if array.nbytes > MAX_RATIO * os.path.getsize(file.filename):
        raise MixmagError(f"{name} claims {array.nbytes} bytes that its file does not hold")
    return array[...]


def read_trident(file: h5py.File) -> FeatureFile:
    """Layout: trident/IO.py of mahmoodlab/TRIDENT."""
    facts = file["coords"].attrs
    return FeatureFile(
        read_array(file, "features"),
        read_array(file, "coords"),
        side=float(facts["patch_size_level0"]),
        tile_px=int(facts["patch_size"]),
        magnification=float(facts["target_magnification"]),
        encoder=file["features"].attrs.get("encoder"),
        slide_size=(facts.get("level0_width"), facts.get("level0_height")),
    )


def read_stamp(file: h5py.File) -> FeatureFile:
    """Layout: src/stamp/preprocessing/__init__.py of KatherLab/STAMP, from version 2.1 on."""
    features = read_array(file, "feats")
    corners = read_array(file, "coords")
    side = float(file.attrs["tile_size_um"])
    tile_px = int(file.attrs["tile_size_px"])
    magnification = round(10 * tile_px / side, 6)
    encoder = file.attrs.get("extractor")
    return FeatureFile(features, corners, side, tile_px, magnification, encoder)


def read_feature_file(path: Path, tool: str) -> FeatureFile:
    read = {"trident": read_trident, "stamp": read_stamp}[tool]
    try:
        with h5py.File(path) as file:
            found = read(file)
    except Exception as error:  # damage raises a dozen types
        raise MixmagError(f"{path}: {error}") from None
    with np.errstate(over="ignore"):
        found.features = found.features.astype(np.float16)
    good = np.isfinite(found.features).all(axis=1)
    good &= found.features.any(axis=1)  # HDF5 reads zeros where a row was never written
    if not good.all():
        raise MixmagError(f"{path}: {sum(~good)} of {len(good)} tiles are NaN, infinite or zero")
    return found


def settle_trident_sides(files: list[FeatureFile]) -> None:
    """TRIDENT cuts tiles of a rounded side but states its floor: one more may be the true side."""
    for finest in (files[-1].side, files[-1].side + 1):
        sides = [finest * 2**k for k in reversed(range(len(files)))]
        pairs = list(zip(files, sides, strict=True))
        nested = all(0 <= side - file.side <= 1 for file, side in pairs)
        if nested and not any((file.corners % side).any() for file, side in pairs):
            for file, side in pairs:
                file.side = side
            return


def check_same_slide(files: list[FeatureFile]) -> None:
    for low, high in itertools.pairwise(files):
        if (low.encoder, low.slide_size) != (high.encoder, high.slide_size):
            raise MixmagError("its files differ in encoder or slide size")
        if high.magnification != 2 * low.magnification or high.side != low.side / 2:
            found = [f"{file.magnification:g}x {file.side:g}" for file in files]
            raise MixmagError(f"expected doublings and half the side each, found {found}")


def embedding_width(width: int, encoder: str, class_token: bool | None) -> int:
    """How many numbers to keep. Virchow2's 2560 are its class token, then the mean patch token."""
    unclear = class_token is None and width == 2560 and encoder != "virchow2"
    if unclear or (class_token and width != 2560):
        rule = "--class-token keeps 1280 of 2560, --no-class-token keeps all"
        raise MixmagError(f"its embeddings hold {width} numbers of {encoder!r}: {rule}")
    return 1280 if width == 2560 and class_token is not False else width


def import_mpp(files: list[FeatureFile], job: ImportJob) -> tuple[float, str]:
    """um per level-0 pixel, and who says so. STAMP's files know no pixels of the slide."""
    nominal = 10 / files[-1].magnification
    if job.tool == "trident":
        nominal *= files[-1].tile_px / files[-1].side
    if job.mpp is None:
        return nominal, "nominal"
    # TRIDENT cuts slides of 0.2 to 0.3 um/px as if they were 0.25.
    if job.tool == "trident" and abs(job.mpp - nominal) > 0.2 * nominal:
        raise MixmagError(f"{job.mpp_source} says {job.mpp:g}, its tiles say {nominal:.4g} um/px")
    return job.mpp, job.mpp_source


def lattice_positions(file: FeatureFile, tool: str) -> np.ndarray:
    """(n, 2) int64: col, row of the tiles on the lattice of their side."""
    exact = file.corners / file.side
    position = np.rint(exact)
    tolerance = np.zeros_like(exact)
    if tool == "stamp":  # its tiles are up to 1 px too far apart
        tolerance = STAMP_SNAP + position / file.tile_px
    fits = (np.abs(exact - position) <= tolerance) & (position >= 0) & (position < 2**31)
    if not fits.all():
        off = f"{np.count_nonzero(~fits.all(axis=1))} of {len(fits)} tiles"
        raise MixmagError(f"{file.magnification:g}x: {off} are off the lattice of {file.side:g}")
    return position.astype(np.int64)


def assemble_cells(files: list, positions: list) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """features (C, T, D), cells (C, 2), valid (C, T). A cell exists where any of its tiles does."""
    keys = [cell_keys(position >> k) for k, position in enumerate(positions)]
    cells = np.unique(np.concatenate(keys))
    T = magnification_entries(len(files)).start
    features = np.zeros((len(cells), T, files[0].features.shape[1]), np.float16)
    valid = np.zeros((len(cells), T), bool)
    for k, file in enumerate(files):
        row = np.searchsorted(cells, keys[k])
        col_inside, row_inside = (positions[k] % 2**k).T
        entry = magnification_entries(k).start + row_inside * 2**k + col_inside
        features[row, entry] = file.features
        valid[row, entry] = True
    if np.count_nonzero(valid) < sum(map(len, positions)):
        raise MixmagError("some tiles stand where another does")
    return features, np.stack([cells % 2**32, cells >> 32], axis=1).astype(np.int32), valid


def import_slide(job: ImportJob) -> str:
    """Writes the slide file. Returns what was done."""
    sources = [file_sha256(path) for path in job.paths]
    settings = {"tool": job.tool, "class_token": job.class_token, "sources": sources}
    if already_done(job.out, {"encoder": job.encoder, "settings": settings}, job.mpp):
        return "done before"
    files = [read_feature_file(path, job.tool) for path in job.paths]
    if job.tool == "trident":
        settle_trident_sides(files)
    check_same_slide(files)
    first = files[0]
    encoder = job.encoder or first.encoder
    if encoder is None:
        raise MixmagError("its files do not name the encoder; give it with --encoder")
    width = embedding_width(first.features.shape[1], encoder, job.class_token)
    mpp, mpp_source = import_mpp(files, job)
    cell_px = first.side / mpp if job.tool == "stamp" else first.side
    positions = [lattice_positions(file, job.tool) for file in files]
    features, cells, valid = assemble_cells(files, positions)
    size = first.slide_size
    if None in size:
        size = (cells.max(axis=0, initial=-1) + 1) * cell_px
    meta = {
        "slide_id": job.slide_id,
        "encoder": encoder,
        "magnifications": [whole_if_possible(file.magnification) for file in files],
        "tile_px": first.tile_px,
        "mpp": mpp,
        "mpp_source": mpp_source,
        "cell_px": cell_px,
        "origin": [0.0, 0.0],
        "width": math.ceil(size[0]),
        "height": math.ceil(size[1]),
        "n_bad": 0,
        "settings": settings,
        "size_known": None not in first.slide_size,
    }
    write_slide(job.out, features[..., :width], cells, valid, meta)
    return "imported"


def import_worker(job: ImportJob) -> list:
    """Imports a slide in a process of its own. Returns its row of import.csv."""
    for signum in SIGNALS:  # the parent receives them too, and lets the slide be finished
        signal.signal(signum, signal.SIG_IGN)
    signal.alarm(IMPORT_SECONDS)  # ends this process if a file hangs it, or the parent is dead
    status = import_slide(job)
    slide = read_slide(job.out)
    facts = [slide.meta[name] for name in IMPORT_FACTS]
    entries = map(magnification_entries, range(len(slide.meta["magnifications"])))
    tiles = [int(slide.valid[:, entry].sum()) for entry in entries]
    return [job.slide_id, status, "", *facts, len(slide.cells), tiles]


def find_feature_files(folder: Path) -> dict[str, Path]:
    """slide id -> file."""
    paths = visible_files(folder, "**/*.h5")  # STAMP repeats the folders of the slides
    files = {path.stem: path for path in paths}
    if not files:
        raise MixmagError(f"{folder}: no feature files (*.h5)")
    if len(files) < len(paths):
        twice = set(paths) - set(files.values())
        raise MixmagError(f"two files of one slide, such as {twice.pop()}; rename one")
    return files


def import_command(args) -> int:
    tool = "trident" if args.trident else "stamp"
    found = {folder: find_feature_files(Path(folder)) for folder in getattr(args, tool)}
    slide_ids = sorted(set().union(*found.values()))
    manifest = read_manifest(args.manifest)
    warn_unmatched_rows(manifest, set(slide_ids))
    rows = []
    spawn = multiprocessing.get_context("spawn")  # a fork inherits torch's threads
    pool = ProcessPoolExecutor(1, spawn)
    for i in progress(slide_ids, desc="slides"):
        paths = [files.get(i, Path(folder, f"{i}.h5")) for folder, files in found.items()]
        out = Path(args.out, "slides", f"{i}.safetensors")
        mpp = user_mpp(i, manifest, args.mpp)
        job = ImportJob(i, paths, out, tool, args.encoder, args.class_token, *mpp)
        try:
            row = pool.submit(import_worker, job).result()
        except BrokenExecutor:
            stop_if_asked()  # then a signal ended it
            pool = ProcessPoolExecutor(1, spawn)
            row = [i, "failed", "its files bring the HDF5 library down, or hang it"]
        except Exception as error:  # no such file, a full disk, no memory
            row = [i, "failed", f"{type(error).__name__}: {error}"]
        rows.append(row)
        print(*row[:3], sep=": ", flush=True)
    pool.shutdown()
    failed = [(row[0], "import", row[2]) for row in rows if row[1] == "failed"]
    table = Path(args.out, "import.csv")
    write_csv(table, ("slide_id", "status", "reason", *IMPORT_FACTS, "cells", "tiles"), rows)
    print(f"{len(rows) - len(failed)} slides imported, {len(failed)} failed; see {table}")
    return report_failed(table.with_name("failed.csv"), failed)


# ----------------------------------------------------------------------------- the synthetic cohort

# A token's embedding is the sum of its magnification's mean, its tissue (smooth in space, shared by
# parent and children), one of four patterns of its magnification, a shift of the slide's site and
# stain, and noise. The tiles of a cell mostly show one pattern, often the one of the same number at
# the next magnification. In every task two patterns are rare and carry the label:
#     alone      positive slides hold the pattern, negative slides do not;
#     together   positive slides hold both patterns in the same cells. Negative slides hold the
#                first, and half of them the second, as often but in other regions;
#     adjacent   the same with two patterns of one magnification, in tiles side by side.
# Stains move a slide along the patterns' own directions, by more than the rare cells move its mean,
# so a plain mean tells little. All this was fixed before methods were compared on it.
MECHANISMS = {  # rule, (magnification index, pattern), (magnification index, pattern), in words
    "breast_cdh1": ("alone", (2, 0), (2, 0), "a 20x pattern: visible at 20x only"),
    "bladder_fgfr": ("alone", (1, 0), (1, 0), "a 10x pattern: visible at 10x only"),
    "colon_msi": ("alone", (0, 0), (0, 0), "a 5x pattern: visible at 5x only"),
    "endometrial_pten": ("together", (0, 1), (2, 2), "a 5x and a 20x pattern in the same cell"),
    "gastric_her2": ("together", (1, 1), (2, 3), "a 10x and a 20x pattern in the same cell"),
    "lung_egfr": ("adjacent", (1, 2), (1, 3), "two 10x patterns in tiles side by side"),
    "skin_braf": ("together", (0, 3), (2, 1), "a 5x and a 20x pattern in the same cell"),
}
COHORT = {  # paper, supplementary table: split -> cases, slides, fraction of positive cases
    "breast_cdh1": {"train": (648, 673, 0.15), "tune": (214, 219, 0.14), "test": (214, 228, 0.15)},
    "colon_msi": {"train": (2008, 2268, 0.10), "tune": (335, 381, 0.12), "test": (331, 373, 0.13)},
    "bladder_fgfr": {"train": (518, 540, 0.26), "tune": (255, 271, 0.31), "test": (254, 265, 0.28)},
    "endometrial_pten": {
        "train": (975, 1027, 0.48),
        "tune": (162, 168, 0.43),
        "test": (164, 178, 0.41),
    },
    "lung_egfr": {"train": (2129, 2773, 0.28), "tune": (345, 437, 0.30), "test": (352, 446, 0.28)},
    "gastric_her2": {"train": (967, 967, 0.19), "tune": (169, 169, 0.23), "test": (160, 160, 0.18)},
    "skin_braf": {"train": (320, 343, 0.23), "tune": (55, 58, 0.11), "test": (54, 62, 0.13)},
}
QUICK_FLOORS = {"train": (120, 40), "tune": (60, 20), "test": (200, 60)}  # cases, positive ones
PATTERNS = 4  # per magnification
TISSUES = 8
SITES = 4
STAINS = 4
LATENT = 64
PATTERN_SIZE = 2.6  # length of a pattern's vector
STAIN_SIZE = 1.2  # length of a stain's vector
NOISE_VARIANCE = 0.5  # per dimension
RARE_CELLS = (3, 7)  # `alone`: a slide has at least 3 and less than 7 cells with the pattern
RARE_PER_REGION = 6  # other rules: cells with the pattern, of the 9 of a region
KEEPS = 0.85  # how often a tile shows its cell's pattern
USUAL = 0.6  # how often a cell's pattern has the same number as the one a magnification below


def synth_world(dim: int, seed: int) -> dict:
    """The vectors that all slides of a cohort share. They have LATENT entries; one isometry takes
    them to `dim` dimensions, so that a cohort is equally hard at any width."""
    if dim < LATENT:
        raise MixmagError(f"--dim {dim}: a synthetic embedding needs at least {LATENT} dimensions")
    rng = np.random.default_rng([seed, 0])

    def directions(*shape, variance):
        vectors = rng.standard_normal((*shape, LATENT))
        length = np.linalg.norm(vectors, axis=-1, keepdims=True)
        return vectors / length * np.sqrt(variance * LATENT)

    isometry = np.linalg.qr(rng.standard_normal((dim, LATENT)))[0].T * np.sqrt(dim / LATENT)
    pattern = directions(3, PATTERNS, variance=1 / LATENT) * PATTERN_SIZE  # (3, 4, 64)
    stain = rng.standard_normal((STAINS, 3 * PATTERNS)) @ pattern.reshape(-1, LATENT)
    return {
        "mean": directions(3, variance=0.2),
        "site": directions(SITES, variance=0.04),
        "isometry": isometry,  # (64, D)
        "tissue": directions(TISSUES, variance=0.05) + directions(3, TISSUES, variance=0.1),
        "pattern": pattern,
        "stain": stain / np.linalg.norm(stain, axis=-1, keepdims=True) * STAIN_SIZE,
    }


def synth_cells(rng, regions: int) -> np.ndarray:
    """(C, 2) row, col: one connected piece of tissue, grown from `regions` windows of 3 x 3."""
    grown = {(0, 0)}
    while len(grown) < regions:
        row, col = sorted(grown)[rng.integers(len(grown))]
        down, right = ((0, 1), (1, 0), (0, -1), (-1, 0))[rng.integers(4)]
        grown.add((row + down, col + right))
    corners = np.array(sorted(grown))
    corners = 3 * (corners - corners.min(axis=0))
    return np.concatenate([corners + (i, j) for i in range(3) for j in range(3)])


def common_patterns(rng, common: list, rows: int, cols: int) -> list:
    """(rows, cols) for each magnification: every cell's pattern, one of the `common` ones."""
    of_cell = []
    for choices in common:
        weights = rng.dirichlet([2.0] * len(choices))
        of_cell.append(rng.choice(choices, size=(rows, cols), p=weights))
    for k in (1, 2):  # often the number of the magnification below
        usual = np.isin(of_cell[k - 1], common[k]) & (rng.random((rows, cols)) < USUAL)
        of_cell[k] = np.where(usual, of_cell[k - 1], of_cell[k])
    return of_cell


def rare_cells(rng, cells, rule: str) -> tuple[np.ndarray, np.ndarray]:
    """Cells (., 2) of the first rare pattern, and of the second one in a negative slide."""
    if rule == "alone":
        order = rng.permutation(len(cells))
        here = cells[order[: rng.integers(*RARE_CELLS)]]
        return here, here
    regions = rng.permutation(np.unique(cells // 3, axis=0))
    half = len(regions) // 2
    chosen = []
    for row, col in 3 * regions[: 2 * half]:
        place = rng.permutation(9)[:RARE_PER_REGION]
        chosen.append(np.stack([row + place // 3, col + place % 3], axis=1))
    here = np.concatenate(chosen[:half])
    elsewhere = np.concatenate(chosen[half:])
    present = rng.integers(2)  # in half of the negative slides there is no second pattern
    return here, elsewhere[: len(elsewhere) * present]


def synth_patterns(rng, cells, task: str, positive: bool) -> list:
    """Each tile's pattern: int (rows, cols) at 5x, (2 rows, 2 cols) at 10x, (4 rows, 4 cols)."""
    rule, (k1, first), (k2, second), _ = MECHANISMS[task]
    common = [list(range(PATTERNS)) for _ in range(3)]
    common[k1].remove(first)
    if rule != "alone":
        common[k2].remove(second)
    rows, cols = cells.max(axis=0) + 1
    of_cell = common_patterns(rng, common, rows, cols)
    here, other = rare_cells(rng, cells, rule)
    if positive:
        other = here
    if rule == "together" or (rule == "alone" and positive):
        of_cell[k1][tuple(here.T)] = first
        of_cell[k2][tuple(other.T)] = second
    tiles = [np.kron(of_cell[k], np.ones((2**k, 2**k), int)) for k in range(3)]
    for k in (1, 2):
        keeps = rng.random(tiles[k].shape) < KEEPS
        tiles[k] = np.where(keeps, tiles[k], rng.choice(common[k], size=tiles[k].shape))
    if rule == "adjacent":
        ring = np.array([(0, 0), (0, 1), (1, 1), (1, 0)])  # a cell's 10x tiles: successive touch
        turn = rng.integers(4, size=len(here))
        next_turn = (turn[: len(other)] + 1) % 4
        tiles[1][tuple((2 * here + ring[turn]).T)] = first
        tiles[1][tuple((2 * other + ring[next_turn]).T)] = second
    return tiles


def smooth_fields(coarse: np.ndarray, height: int, width: int) -> torch.Tensor:
    """(count, h, w) -> (count, height, width)."""
    x = torch.from_numpy(coarse)[None]
    return F.interpolate(x, size=(height, width), mode="bicubic", align_corners=True)[0]


def synth_slide(world: dict, rng, task: str, positive: bool, regions: int) -> tuple:
    """features (C, 21, D) float16, cells (C, 2) int32, and (3,) the least MEM loss of each
    magnification that the noise allows."""
    cells = synth_cells(rng, regions)
    rows, cols = cells.max(axis=0) + 1
    coarse = rng.standard_normal((TISSUES, 2 + 2 * rows // 3, 2 + 2 * cols // 3))
    strongest = smooth_fields(coarse, 4 * rows, 4 * cols).argmax(0).numpy()
    tissue = np.eye(TISSUES)[strongest]  # (4 rows, 4 cols, Q) one-hot
    site = world["site"][rng.integers(SITES)]
    shift = site + rng.standard_normal(STAINS) @ world["stain"]  # (64,)
    patterns = synth_patterns(rng, cells, task, positive)
    tokens = []
    for k in range(3):
        side = 2**k
        blocks = tissue.reshape(rows * side, 4 // side, cols * side, 4 // side, TISSUES)
        mixture = blocks.mean(axis=(1, 3))  # (rows s, cols s, Q)
        x = world["mean"][k] + mixture @ world["tissue"][k] + world["pattern"][k][patterns[k]]
        x = (x + shift).reshape(rows, side, cols, side, LATENT).swapaxes(1, 2)
        tokens.append(x[cells[:, 0], cells[:, 1]].reshape(len(cells), side**2, LATENT))
    clean = np.concatenate(tokens, axis=1)  # (C, 21, 64)
    noisy = clean + rng.standard_normal(clean.shape) * np.sqrt(NOISE_VARIANCE)
    cosine = (clean * noisy).sum(-1)
    cosine = cosine / np.linalg.norm(clean, axis=-1) / np.linalg.norm(noisy, axis=-1)  # (C, 21)
    floor = 1 - np.array([cosine[:, magnification_entries(k)].mean() for k in range(3)])
    return (noisy @ world["isometry"]).astype(np.float16), cells[:, ::-1].astype(np.int32), floor


def plan_split(rng, task: str, split: str, scale: str) -> list[tuple]:
    cases, slides, positive = COHORT[task][split]
    count = cases
    positives = round(positive * count)
    if scale == "quick":
        least, least_positives = QUICK_FLOORS[split]
        count = max(least, round(cases / 20))
        positives = max(least_positives, round(positive * count))
    with_two = round(count * (slides / cases - 1))  # cases with a second slide
    labels = rng.permutation([1] * positives + [0] * (count - positives)).tolist()
    two = set(rng.permutation(count)[:with_two].tolist())
    rows = []
    for i, label in enumerate(labels):
        case_id = f"{task}-{split}-{i:04d}"
        shown_by = rng.integers(2)  # which of two slides shows a positive label
        if i in two:
            rows.append((case_id, f"{case_id}-a", label, split, label == 1 and shown_by == 0))
            rows.append((case_id, f"{case_id}-b", label, split, label == 1 and shown_by == 1))
        else:
            rows.append((case_id, f"{case_id}-a", label, split, label == 1))
    return rows


def synth_plan(scale: str, seed: int) -> dict:
    """task -> [(case_id, slide_id, label, split, whether this slide shows the label)]."""
    plan: dict[str, list[tuple]] = {}
    for number, task in enumerate(COHORT):
        rng = np.random.default_rng([seed, 1, number])
        plan[task] = []
        for split in COHORT[task]:
            plan[task] += plan_split(rng, task, split, scale)
    return plan


def synthetic_facts(path) -> dict:
    """What synthetic.json says of a synthetic cohort; empty for any other data."""
    about = Path(path) / "synthetic.json"
    return read_json(about) if about.exists() else {}


def synth_cohort(out, scale="quick", dim=64, regions=4, seed=0) -> None:
    """Write DATA/slides, DATA/tasks and DATA/synthetic.json, which says `complete` at the end.

    A function of the arguments alone. Slide files that are there are kept.
    """
    out = Path(out)
    settings = {"synthetic": True, "scale": scale, "dim": dim, "regions": regions, "seed": seed}
    start_cohort(out, settings)
    world = synth_world(dim, seed)
    floors = []
    for number, (task, rows) in enumerate(synth_plan(scale, seed).items()):
        for i, (_, slide_id, _, _, shows) in enumerate(progress(rows, desc=f"synthetic {task}")):
            rng = np.random.default_rng([seed, 2, number, i])
            count = max(2, regions + int(rng.integers(-1, 2)))
            features, cells, floor = synth_slide(world, rng, task, shows, count)
            write_synthetic_slide(out, slide_id, features, cells, seed)
            floors.append(floor)
        table = [row[:4] for row in rows]
        header = ("case_id", "slide_id", "label", "split")
        write_csv(out / "tasks" / f"{task}.csv", header, table)
    facts = {
        **settings,
        "complete": True,
        "mechanisms": {task: words for task, (*_, words) in MECHANISMS.items()},
        "least_mem_loss": dict(zip(("5", "10", "20"), np.mean(floors, axis=0), strict=True)),
    }
    write_json(out / "synthetic.json", facts)


def start_cohort(out: Path, settings: dict) -> None:
    """Raises MixmagError where the folder holds anything but a cohort of these settings."""
    facts = synthetic_facts(out)
    if not facts:
        if (out / "slides").exists() or (out / "tasks").exists():
            raise MixmagError(
                f"{out}: holds slides or tasks that are no synthetic cohort's; give another --out"
            )
        write_json(out / "synthetic.json", {**settings, "complete": False})
        return
    found = {name: facts.get(name) for name in settings}
    if found != settings:
        raise OtherSettings(
            f"{out}: holds a cohort of {found}, now asked for {settings}; give another --out"
        )


def write_synthetic_slide(out: Path, slide_id: str, features, cells, seed: int) -> None:
    path = out / "slides" / f"{slide_id}.safetensors"
    if path.exists():
        return
    width, height = (896 * (cells.max(axis=0) + 1)).tolist()
    meta = {
        "slide_id": slide_id,
        "encoder": f"synthetic-{seed}",
        "magnifications": [5, 10, 20],
        "tile_px": TILE_PX,
        "mpp": 0.5,
        "cell_px": 896.0,
        "origin": [0.0, 0.0],
        "width": width,
        "height": height,
        "n_bad": 0,
        "created": "2000-01-01T00:00:00+00:00",  # fixed: the same seed gives the same checksum
    }
    write_slide(path, features, cells, np.ones(features.shape[:2], bool), meta)


def synth_picture(rng, height: int, width: int) -> np.ndarray:
    """(height, width, 3) uint8: purple nuclei in pink stroma on white glass, like H&E at 0.5 um/px;
    synthetic."""

    def noise(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    def smooth(px):  # a random field with features of about px pixels
        return smooth_fields(noise(1, height // px + 4, width // px + 4), height, width)[0]

    y = torch.linspace(-1, 1, height)[:, None]
    x = torch.linspace(-1, 1, width)[None]
    tissue = ((y**2 + x**2) + 0.25 * smooth(700) < 0.75).float()
    crowding = torch.sigmoid(2 * smooth(300))  # where nuclei are dense
    chance = torch.from_numpy(rng.random((height, width), np.float32))
    centres = (chance < 0.004 * crowding).float()[None, None]
    discs = F.max_pool2d(F.max_pool2d(centres, (13, 1), 1, (6, 0)), (1, 13), 1, (0, 6))
    nuclei = F.avg_pool2d(F.avg_pool2d(discs, 7, 1, 3), 5, 1, 2)[0, 0]
    eosin = (0.35 + 0.12 * smooth(24) + 0.15 * smooth(120)).clamp(min=0.02)
    hematoxylin = nuclei * (0.9 + 0.2 * smooth(6)) + 0.03
    absorption = torch.tensor([[1.25, 0.12], [1.35, 0.95], [0.55, 0.45]])  # of both, per channel
    absorption = absorption[:, :, None, None]
    density = tissue * (absorption[:, 0] * hematoxylin + absorption[:, 1] * eosin)
    light = 244 * torch.exp(-density.clamp(min=0))  # Beer-Lambert
    light += 2 * torch.from_numpy(noise(3, height, width))
    return light.clamp(0, 255).byte().permute(1, 2, 0).numpy()


def synth_images(out, count: int, seed: int) -> None:
    """Write `count` pyramidal TIFFs (tiled, deflate, box-averaged levels, 0.5 um/px)."""
    import tifffile

    settings: dict[str, Any] = {
        "tile": (256, 256),
        "photometric": "rgb",
        "compression": "zlib",
        "compressionargs": {"level": 1},
        "resolutionunit": "CENTIMETER",
    }
    for i in progress(range(count), desc="synthetic images"):
        rng = np.random.default_rng([seed, 3, i])
        picture = synth_picture(rng, *(256 * rng.integers(14, 22, size=2)).tolist())
        path = Path(out) / f"synthetic-{i:03d}.tiff"
        with whole_file(path) as temporary, tifffile.TiffWriter(temporary) as tiff:
            for level in range(4):
                resolution = (2e4 / 2**level, 2e4 / 2**level)
                tiff.write(picture, subfiletype=int(level > 0), resolution=resolution, **settings)
                h = picture.shape[0] // 2
                w = picture.shape[1] // 2
                blocks = picture[: 2 * h, : 2 * w].reshape(h, 2, w, 2, 3)
                picture = blocks.mean(axis=(1, 3)).round().astype(np.uint8)


def synth_command(args) -> int:
    if args.images:
        synth_images(args.out, args.images, args.seed)
        print(f"{args.images} synthetic images in {args.out}")
    else:
        synth_cohort(args.out, args.scale, args.dim, args.regions, args.seed)
        tasks = ", ".join(task_names(args.out))
        print(f"synthetic cohort, {args.scale} scale, in {args.out}: {tasks}")
    return 0


# ------------------------------------------------------------------------------------------- verify


def slide_findings(path) -> tuple[Slide | None, list[str]]:
    """A slide file, if it can be opened, and everything that is wrong with it."""
    try:
        slide = read_slide(path)
    except MixmagError as error:
        return None, [str(error)]
    findings = []
    with safetensors.safe_open(path, "numpy") as file:
        text = file.metadata()
    if checksum(slide.features, slide.cells, slide.valid, text) != text["sha256"]:
        findings.append(f"{path}: checksum differs: the file changed after it was written")
    if slide.slide_id != Path(path).stem:
        findings.append(f"{path}: holds slide {slide.slide_id!r}")
    bad = (~np.isfinite(slide.features) & slide.valid[..., None]).any(axis=(1, 2))  # (C,)
    if bad.any():
        first = slide.cells[bad][0].tolist()
        findings.append(
            f"{path}: NaN or infinite features in {bad.sum()} of {len(bad)} cells, "
            f"first at (col, row) {first}"
        )
    if len(np.unique(slide.cells, axis=0)) != len(slide.cells):
        findings.append(f"{path}: a cell stands in it twice")
    if (slide.cells < 0).any():
        findings.append(f"{path}: negative cell positions")
    return slide, findings


def cases_findings(path: Path, cases: list, slides: dict, present: set) -> list[str]:
    """What is wrong between a task table and the slides, `present` the ids that have a file."""
    findings = []
    splits_of: dict[bytes, dict] = defaultdict(dict)  # hash of the features -> split -> slide id
    for case in cases:
        for slide_id in case.slide_ids:
            if slide_id not in present:
                findings.append(f"{path}: slide {slide_id!r} of case {case.case_id!r} has no file")
            elif slide_id in slides and len(slides[slide_id].cells):
                content = hashlib.sha256(slides[slide_id].features.tobytes()).digest()
                splits_of[content].setdefault(case.split, slide_id)
    for splits in splits_of.values():
        if len(splits) > 1:
            findings.append(f"{path}: the same content in two splits: {splits}")
    for split in SPLITS:
        if len({case.label for case in cases if case.split == split}) < 2:
            findings.append(
                f"{path}: split {split} does not hold both classes, so it has no "
                f"{OUTCOME.metric_name}"
            )
    return findings


def pretrain_findings(data: Path, present: set, evaluation: set) -> list[str]:
    """What is wrong with pretrain.csv, where there is one."""
    path = data / "pretrain.csv"
    findings = []
    for slide_id in pretraining_ids(data) if path.exists() else ():
        if slide_id not in present:
            findings.append(f"{path}: slide {slide_id!r} has no file")
        if slide_id in evaluation:
            findings.append(
                f"{path}: slide {slide_id!r} is in a tune or test split, itself or by its case"
            )
    return findings


def verify(data) -> list[str]:
    """Every finding in DATA, one line each: slide files, task tables, leakage."""
    data = Path(data)
    findings = []
    slides = {}
    paths = visible_files(data / "slides", "*.safetensors")
    present = {path.stem for path in paths}
    if not paths:
        findings.append(f"{data}: no slide files in slides/")
    for path in progress(paths, desc="slides"):
        slide, found = slide_findings(path)
        findings += found
        if slide:
            slides[path.stem] = slide
    signatures = Counter(embedding_signature(slide) for slide in slides.values())
    for slide in slides.values():
        usual, count = signatures.most_common(1)[0]
        signature = embedding_signature(slide)
        if signature != usual:
            findings.append(f"{slide.path}: {signature}; expected {usual} as in {count} others")
    all_cases = []
    for task in task_names(data):
        path = data / "tasks" / f"{task}.csv"
        try:
            cases, found = task_findings(path)
        except MixmagError as error:
            findings.append(str(error))
            continue
        all_cases += cases
        findings += found + cases_findings(path, cases, slides, present)
    try:
        findings += pretrain_findings(data, present, evaluation_slides_of(all_cases))
    except MixmagError as error:
        findings.append(str(error))
    return findings


def verify_command(args) -> int:
    findings = verify(args.data)
    for line in findings:
        print(line)
    if findings:
        print(f"{len(findings)} findings in {args.data}")
        return 1
    print(f"{args.data}: nothing wrong found")
    return 0


# -------------------------------------------------------------------------- files, errors, progress


class MixmagError(Exception):
    """An input is refused: the command prints this one line and ends with exit code 1."""


class SlideReadError(MixmagError):
    """A slide, or some of its pixels, cannot be read."""


class OtherSettings(MixmagError):
    """The output folder holds what was made with other settings."""


class Stopped(Exception):
    """A signal asked for the end, and everything worth keeping is saved."""


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STOP_SIGNALS: list[int] = []  # those received so far


def catch_signals() -> None:
    """From now on a first signal is only noted, for `stop_if_asked`; a second one acts at once.

    Under torchrun none acts at once: a second signal there is often the first one, passed on.
    """

    def note(number, frame):
        STOP_SIGNALS.append(number)
        if "RANK" not in os.environ:
            for each in SIGNALS:
                signal.signal(each, signal.SIG_DFL)

    for each in SIGNALS:
        signal.signal(each, note)


def stop_if_asked() -> None:
    """Raises Stopped when a signal was received."""
    if STOP_SIGNALS:
        raise Stopped


def run_command(function, *args, **kwargs) -> int:
    """Call the function and turn its end into the exit code that README promises."""
    catch_signals()
    try:
        return function(*args, **kwargs) or 0
    except Stopped:
        print("stopped by a signal; the same command goes on from what is saved", file=sys.stderr)
        return 130 if signal.SIGINT in STOP_SIGNALS else 75
    except BrokenPipeError:  # `| head` closed our stdout: there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE  # what a shell reports for a program that does not catch it
    except (MixmagError, OSError, MemoryError) as error:
        reason = str(error) or "out of memory"  # Python's own MemoryError says nothing
        print(f"error: {reason}", file=sys.stderr)
        return 1


def find_device(name: str) -> torch.device:
    """`auto` is this process's GPU or the CPU. Raises MixmagError for a device that is missing."""
    wanted = name
    if name == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda":
        wanted = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if wanted not in devices:
        raise MixmagError(f"--device {name}: expected auto, {', '.join(devices)}")
    return torch.device(wanted)


def process_rank() -> tuple[int, int]:
    """This process's number and how many there are, as torchrun says."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def progress(items=None, **settings):
    """A tqdm bar on stderr, if that is a terminal and this is the first process.

    Over items it ends at a signal."""
    hidden = True if process_rank()[0] else None  # None: tqdm looks whether it is a terminal
    bar = tqdm(items, disable=hidden, dynamic_ncols=True, **settings)
    return bar if items is None else until_stopped(bar)


def until_stopped(items):
    for item in items:
        stop_if_asked()
        yield item


def prefetch(function, items, threads: int):
    """function(item) of each item, in order, while threads work on the next 2 * threads items.

    Without threads, each when it is asked for. Numpy, torch, Pillow and OpenSlide release the
    interpreter while they work on embeddings and pixels.
    """
    if not threads:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(threads)
    try:
        futures = (pool.submit(function, item) for item in items)
        waiting = deque(itertools.islice(futures, 2 * threads))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(itertools.islice(futures, 1))
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def whole_file(path):
    """Write a file whole or not at all: yields a temporary name, which is renamed at the end.

    Raises MixmagError where that fails; an older file of that name is then still there.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes files that only their owner can read
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        # torch reports a full disk as a RuntimeError of this name
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        reason = " ".join(str(error).split())  # torch's has several lines
        free = f"{free_bytes(path) / 1e6:.0f} MB are free there"
        raise MixmagError(f"{path}: cannot be written ({reason}); {free}") from None
    finally:
        with contextlib.suppress(OSError):  # the parent may be no folder
            temporary.unlink(missing_ok=True)


def visible_files(folder: Path, pattern: str) -> list[Path]:
    """The folder's files, sorted, without hidden ones such as macOS leaves beside others."""
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk that will hold a folder, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def file_sha256(path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path, text: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path, value) -> None:
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path) -> dict:
    """Raises MixmagError for a file that is missing or is no JSON object."""
    try:
        value = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise MixmagError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise MixmagError(f"{path}: cannot be read as JSON (expected names and values)")
    return value


def write_csv(path, header, rows) -> None:
    """Bytes of a file name that are no UTF-8 are written escaped."""
    buffer = io.StringIO()
    csv.writer(buffer).writerows([header, *rows])
    with whole_file(path) as temporary:
        temporary.write_text(buffer.getvalue(), "utf-8", errors="backslashreplace", newline="")


def read_csv(path, columns) -> list[dict]:
    """Rows as dicts of stripped strings, and under "line" the line where each ends.

    Raises MixmagError for a missing file or column."""
    rows = []
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = set(columns) - set(reader.fieldnames or ())
            if missing:
                names = ", ".join(sorted(missing))
                raise MixmagError(f"{path}: column {names} is missing; found {reader.fieldnames}")
            for values in reader:
                row = {name: (values[name] or "").strip() for name in columns}
                rows.append({**row, "line": reader.line_num})
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise MixmagError(f"{path}: cannot be read as a UTF-8 CSV ({error})") from None
    return rows


def report_failed(path, failed: list) -> int:
    """Write the table of (slide_id, stage, reason), if any failed. Returns the exit code."""
    Path(path).unlink(missing_ok=True)
    if not failed:
        return 0
    write_csv(path, ("slide_id", "stage", "reason"), failed)
    return 3


# --------------------------------------------------------------------------------- the command line


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of each flag that has one."""

    def _get_help_string(self, action):
        if action.default is None:
            return action.help
        return super()._get_help_string(action)


def number_in(kind, low, high):
    """The type of a flag: a number of this kind from low to high."""

    def number(text):
        value = kind(text)
        if not low <= value <= high:  # NaN is not
            raise argparse.ArgumentTypeError(f"{text} is not within {low:g} to {high:g}")
        return value

    return number


class Doublings(argparse.Action):
    """Takes a run of doublings as magnifications."""

    def __call__(self, parser, namespace, values, option_string=None):
        namespace.magnifications = [whole_if_possible(value) for value in values]
        try:
            Geometry(1, namespace.magnifications)
        except ValueError as error:
            raise argparse.ArgumentError(self, str(error)) from None


NATURAL = number_in(int, 0, 2**32 - 1)
POSITIVE = number_in(int, 1, 2**32 - 1)


# The docstrings of these functions are the summaries that --help shows.


def add_synth_flags(parser) -> None:
    """make a synthetic cohort: embeddings with seven planted biomarkers"""
    parser.epilog = "example: python data.py synth --out data/synthetic --scale quick"
    add = parser.add_argument
    add("--out", default="data/synthetic", help="folder to write")
    scales = "full: as many cases as the paper has; quick: a twentieth, and at least some"
    add("--scale", choices=("quick", "full"), default="quick", help=scales)
    add("--dim", type=POSITIVE, default=64, help="width of an embedding (Virchow2 has 1280)")
    add("--regions", type=POSITIVE, default=4, help="3 x 3 regions a slide on average, at least 2")
    add("--images", type=NATURAL, default=0, help="write so many H&E-like slides for tile instead")
    add("--seed", type=NATURAL, default=0, help="everything follows from it")


def add_output_flags(parser) -> None:
    add = parser.add_argument
    add("--out", required=True, help="DATA folder; slides go to DATA/slides/<slide_id>.safetensors")
    add("--manifest", help="CSV with columns slide (file name or id) and mpp; goes before --mpp")


def add_tile_flags(parser) -> None:
    """turn whole-slide images into slide files: tissue, cells on one lattice, embeddings"""
    parser.epilog = "example: python data.py tile --slides slides/ --out data/mine --mpp 0.5"
    add = parser.add_argument
    add("--slides", nargs="+", required=True, metavar="DIR|FILE", help="slides, or their folders")
    add_output_flags(parser)
    add("--region", type=POSITIVE, default=3, help="cells per side of a window")
    add("--encoder", default="texture", help="texture, virchow2, or module:factory (see README)")
    add("--weights", help="virchow2's weights, .safetensors or .pt; else from the Hugging Face hub")
    add("--mpp", type=float, help="um per level-0 pixel, for slides that do not say it")
    add("--mpp-from-power", action="store_true", help="else take 10 / objective power as mpp")
    run = {"nargs": "+", "type": number_in(float, 0.01, 1000), "action": Doublings}
    add("--magnifications", default=[5, 10, 20], help="each twice the one before", **run)
    tissue = "least share of tissue in a window (assumed); biopsies and smears want less"
    add("--min-tissue", type=number_in(float, 0, 1), default=0.25, help=tissue)
    add("--mask", metavar="FILE|DIR", help="a tissue mask, PNG or GeoJSON; DIR: one per slide id")
    add("--shard", metavar="i/n", help="do the i-th of n shares of the slides, from 0 on")
    add("--batch-size", type=POSITIVE, default=256, help="tiles per call of the encoder")
    add("--device", default="auto", help="auto, cpu or cuda[:i]")
    add("--dry-run", action="store_true", help="only say mpp, windows, tokens, bytes of each slide")


def add_import_flags(parser) -> None:
    """join the embeddings that TRIDENT or STAMP made at each magnification into slide files"""
    parser.epilog = "example: python data.py import --stamp 5x 10x 20x --mpp 0.25 --out data/mine"
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    folders = "its folders of feature files, one per magnification, from low to high"
    source.add_argument("--trident", nargs="+", metavar="DIR", help=folders)
    source.add_argument("--stamp", nargs="+", metavar="DIR", help=folders)
    add_output_flags(parser)
    add("--encoder", help="the encoder's name (default: as the files say)")
    token = "keep the first 1280 of Virchow2's 2560 numbers (default: where the files say virchow2)"
    add("--class-token", action=argparse.BooleanOptionalAction, help=token)
    mpp = number_in(float, 0.1, 4)
    add("--mpp", type=mpp, help="um per level-0 pixel, which STAMP's files do not say")


def add_verify_flags(parser) -> None:
    """check slide files and task tables; print every finding; exit 1 if there is any"""
    parser.epilog = "example: python data.py verify data/mine"
    parser.add_argument("data", help="DATA folder")


COMMANDS = {
    "synth": (synth_command, add_synth_flags),
    "tile": (tile_command, add_tile_flags),
    "import": (import_command, add_import_flags),
    "verify": (verify_command, add_verify_flags),
}


def parse_command(argv, script: str, summary, commands: dict) -> argparse.Namespace:
    """The flags of a command. commands: name -> its function, and what adds its flags."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=script, description=summary, formatter_class=plain)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (function, add_flags) in commands.items():
        words = {"help": add_flags.__doc__, "description": add_flags.__doc__}
        subparser = subparsers.add_parser(name, formatter_class=HelpFormatter, **words)
        subparser.set_defaults(function=function)
        add_flags(subparser)
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse_command(argv, "data.py", __doc__, COMMANDS)
    return run_command(args.function, args)


if __name__ == "__main__":
    sys.exit(main())
