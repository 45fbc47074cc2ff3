"""mixmag data: slide files, the data sets that training reads, the tiler, the synthetic cohort.

    python data.py synth  --out data/synthetic                    seven planted biomarkers
    python data.py tile   --slides slides/ --out data/mine        whole-slide images -> slide files
    python data.py import --trident 5x 10x 20x --out data/mine    other tools' embeddings
    python data.py split  labels.csv --out data/mine/tasks/t.csv  folds of a task table
    python data.py verify data/mine                               checksums, values, tasks, leakage

Shape letters as in mixmag.py, and C cells of a slide, W windows (regions) of it, G classes of a
task. Lengths in `_px` are level-0 pixels unless the comment says otherwise; mpp is micrometres per
pixel; a place on a lattice is (col, row). Here a level is one of the slide's pyramid, and k is the
index of a magnification, which mixmag.py calls a level.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import glob
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import pkgutil
import re
import reprlib
import signal
import sys
import time
import unicodedata
from collections import Counter, defaultdict, deque
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
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
from PIL import Image, ImageDraw, ImageOps
from scipy import ndimage, special
from tqdm import tqdm

from mixmag import Geometry, removal_count

# ----------------------------------------------------------------------------------- the slide file

TILE_PX = 224  # paper 4.1: the same at every magnification
FORMAT = "mixmag/1"
TEXT_FIELDS = ("format", "slide_id", "encoder", "created", "sha256")
JSON_FIELDS = ("magnifications", "tile_px", "mpp", "cell_px", "origin", "width", "height", "n_bad")
FIELDS = (*TEXT_FIELDS, *JSON_FIELDS)


@dataclass
class Slide:
    """One slide file. Its features are a private memory map: only what is used is read."""

    path: Path
    meta: dict
    features: np.ndarray  # (C, T, D) float16
    cells: np.ndarray  # (C, 2) int32: col, row on the lowest magnification's lattice
    valid: np.ndarray  # (C, T) bool: True where a token holds an embedding

    @property
    def slide_id(self) -> str:
        return composed(self.meta["slide_id"])

    @property
    def dim(self) -> int:
        return self.features.shape[2]

    def __reduce__(self):
        return read_slide, (self.path,)  # a worker of a DataLoader maps the file anew


def checksum(features, cells, valid, metadata: dict) -> str:
    """sha256 over the bytes of contiguous arrays and all metadata except `sha256` itself."""
    digest = hashlib.sha256()
    for array in (features, cells, valid):
        digest.update(array)
    others = {name: value for name, value in metadata.items() if name != "sha256"}
    digest.update(json.dumps(others, sort_keys=True, separators=(",", ":")).encode("utf-8"))
    return digest.hexdigest()


def check_arrays(features, cells, valid, magnifications) -> None:
    """Raises ValueError unless all have the dtype and shape of a slide file."""
    T = Geometry(1, magnifications).tokens_per_cell
    C = len(cells)
    found = [(array.dtype.name, array.shape) for array in (features, cells, valid)]
    D = features.shape[-1]
    expected = [("float16", (C, T, D)), ("int32", (C, 2)), ("bool", (C, T))]
    if found != expected:
        raise ValueError(f"features, cells, valid are {found}, expected {expected}")


def write_slide(path, features, cells, valid, meta: dict) -> None:
    """Write a slide file. Raises ValueError for arrays of another dtype or shape.
    features (C, T, D) float16, cells (C, 2) int32, valid (C, T) bool.
    meta: every field except `format`, `created` and `sha256`, and any others."""
    check_arrays(features, cells, valid, meta["magnifications"])
    now = float(os.environ.get("SOURCE_DATE_EPOCH", time.time()))  # reproducible-builds.org
    created = datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds")
    text = {}
    for name, value in {"format": FORMAT, "created": created, **meta}.items():
        text[name] = value if name in TEXT_FIELDS else json.dumps(value)
    arrays = {"features": features, "cells": cells, "valid": valid}
    # save_file writes other arrays in the wrong order
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    text["sha256"] = checksum(**arrays, metadata=text)
    with whole_file(path) as temporary:
        safetensors.numpy.save_file(arrays, temporary, text)


def read_slide(path) -> Slide:
    """Open a slide file and check its structure; only `data.py verify` computes the checksum.
    Raises MixmagError that says what is wrong."""
    path = Path(path)
    try:
        with safetensors.safe_open(path, "pt") as file:
            text = file.metadata() or {}
            missing = [name for name in FIELDS if name not in text]
            if missing or text["format"] != FORMAT:
                raise ValueError(f"expected format {FORMAT}; missing fields: {missing}")
            features = file.get_tensor("features").numpy()  # torch maps it, numpy would copy it
            cells = file.get_tensor("cells").numpy().copy()
            valid = file.get_tensor("valid").numpy().copy()
        meta = {}
        for name, value in text.items():
            meta[name] = value if name in TEXT_FIELDS else json.loads(value)
        check_arrays(features, cells, valid, meta["magnifications"])
        if composed(meta["slide_id"]) != composed(path.stem):
            raise ValueError(f"it holds slide {meta['slide_id']!r}; rename the file")
    except (OSError, safetensors.SafetensorError, ValueError, TypeError) as error:
        raise MixmagError(f"{path}: cannot be read as a slide file ({one_line(error)})") from None
    return Slide(path, meta, features, cells, valid)


def read_slides(data, ids=None, failed: list | None = None) -> list[Slide]:
    """The slides of DATA, or those of `ids`, sorted by id.
    All must agree on encoder, width and magnifications. Raises MixmagError for the first that
    does not, and for one that cannot be read. Where `failed` is given, slides that cannot be read
    are left out and listed there as (slide_id, stage, reason)."""
    files = slide_files(data, ids)
    if not files:
        raise MixmagError(f"{data}/slides: no slide files; make them with data.py tile or synth")
    slides = []
    for path in progress(files.values(), desc="slides"):
        try:
            slides.append(read_slide(path))
        except MixmagError as error:
            if failed is None:
                raise
            failed.append((path.stem, "read", str(error)))
    if failed and not slides:
        raise MixmagError(f"no slide can be read; the last error is: {failed[-1][2]}")
    first = embedding_signature(slides[0])
    for slide in slides:
        found = embedding_signature(slide)
        if found != first:
            raise MixmagError(f"{slide.path}: {found}, but {slides[0].slide_id} has {first}")
    return slides


def embedding_signature(slide: Slide) -> str:
    """What slides must share to be used together."""
    return signature(slide.meta["encoder"], slide.dim, slide.meta["magnifications"])


def signature(encoder: str, dim: int, magnifications) -> str:
    return f"encoder {encoder}, width {dim}, magnifications {list(magnifications)}"


# ---------------------------------------------------------------------------- windows and data sets


def magnification_entries(k: int) -> slice:
    """Where the tokens of magnification k (0 is the lowest) stand among those of a cell."""
    return slice((4**k - 1) // 3, (4 ** (k + 1) - 1) // 3)


def windows(cells, region: int, stride: int, min_cover: float) -> tuple:
    """Windows of region x region cells that hold at least the share `min_cover` of their cells.
    cells (C, 2) -> window_cells (W, R*R): the indices of a window's cells, row by row, -1 where a
    cell is missing; and corners (W, 2): col, row of its first cell, multiples of `stride`."""
    if not len(cells):
        return np.empty((0, region**2), int), np.empty((0, 2), int)
    start = (cells.min(axis=0) - region + 1) // stride * stride  # the first corner
    width, height = cells.max(axis=0) - start + region
    grid = np.full((height, width), -1)
    col, row = (cells - start).T
    grid[row, col] = np.arange(len(cells))
    window_cells = np.lib.stride_tricks.sliding_window_view(grid, (region, region))
    window_cells = window_cells[::stride, ::stride]  # (h, w, R, R)
    share = (window_cells >= 0).mean(axis=(2, 3))  # (h, w)
    kept = (share > 0) & (share >= min_cover)
    corners = start + stride * np.argwhere(kept)[:, ::-1]
    return window_cells[kept].reshape(-1, region**2), corners


def covering_windows(cells, region: int, min_cover: float) -> tuple:
    """`windows` side by side, for fine-tuning and inference.
    On a slide so small or narrow that no window is full enough, `min_cover` is a share of the cells
    of its fullest window, not of a whole window."""
    window_cells, corners = windows(cells, region, region, 0.0)
    present = (window_cells >= 0).sum(axis=1)  # (W,)
    kept = present >= min_cover * region**2
    if not kept.any():
        kept = present >= min_cover * present.max(initial=0)
    return window_cells[kept], corners[kept]


def token_index(slide: Slide, window_cells, entries) -> tuple:
    """Index (W, n) of each wanted token in features.reshape(C*T, D), and valid (W, n).
    window_cells (W, R*R): as `windows` returns them. entries (n,) or (W, n): the wanted tokens,
    counted cell by cell: entry e is token e % T of the window's cell e // T. With T = 5, in a
    window of the cells 7, 8, -1, 9, entry 6 is token 1 of cell 8: index 41; entry 10 is missing.
    Geometry.cell_order() holds all entries in the order in which the model reads them."""
    T = slide.valid.shape[1]
    place, token = np.divmod(entries, T)
    cell = window_cells[np.arange(len(window_cells))[:, None], place]  # (W, n)
    index = np.maximum(cell * T + token, 0)  # any legal one where the cell is missing
    return index, (cell >= 0) & slide.valid.reshape(-1)[index]


def gather(slide: Slide, window_cells, entries, out=None) -> tuple:
    """The embeddings at `token_index`: x (W, n, D) float16, 0 where invalid, and valid (W, n).
    out: an array for x."""
    index, valid = token_index(slide, window_cells, entries)
    # "clip" takes straight into `out`: all indices are legal
    x = slide.features.reshape(-1, slide.dim).take(index, axis=0, out=out, mode="clip")
    if not valid.all():
        x[~valid] = 0
    return x, valid


def as_batch(x: np.ndarray, valid: np.ndarray, device="cpu") -> dict:
    """Tensors. Where every token is valid, valid is None: then attention needs no mask."""
    batch = {"x": torch.from_numpy(x).to(device), "valid": None}
    if not valid.all():
        batch["valid"] = torch.from_numpy(valid).to(device)
    return batch


def to_device(batch: dict, device) -> dict:
    moved = {k: v.to(device, non_blocking=True) for k, v in batch.items() if torch.is_tensor(v)}
    return batch | moved


def pinned(batch: dict, device) -> dict:
    """For a GPU, the batch in memory that the GPU can copy from by itself."""
    if torch.device(device).type != "cuda":
        return batch
    return batch | {k: v.pin_memory() for k, v in batch.items() if torch.is_tensor(v)}


@dataclass(eq=False, repr=False)
class RegionDataset(torch.utils.data.Dataset):
    """Random windows for pretraining: turned at random, with the tokens that are to be removed.
    Sample i is a function of (seed, i) alone. In an epoch each of the W windows comes once, in
    random order. `len` is W; i >= W belongs to a later epoch, i // W. With stride 1 windows
    overlap, so an epoch sees most cells several times.
    source: for the contrastive loss; a sample then has a second view, a window drawn from a source
    x source window that holds the first (paper 3.1.2). swap: share of samples that are shifted to
    the mean embeddings of another slide, as if they were stained and scanned like it."""

    slides: list[Slide]
    geometry: Geometry
    seed: int
    mask: float  # the removal ratio
    source: int = 0  # cells per side; 0: one view
    stride: int = 1
    min_cover: float = 1.0
    turn: bool = True  # whether windows are turned
    swap: float = 0.0

    def __post_init__(self):
        geometry = self.geometry
        self.views = 2 if self.source else 1
        self.k = geometry.level().numpy()  # (N,)
        if self.swap:
            self.slide_means = slide_means(self.slides)  # (S, K, D)
        self.removed_tokens = removal_count(geometry.num_tokens, self.mask)  # M
        self.turned_entries = geometry.cell_order().numpy()[geometry.dihedral().numpy()]  # (8, N)
        layout = (geometry.region, self.stride, self.min_cover)
        windows_of = [windows(slide.cells, *layout) for slide in self.slides]
        window_cells, corners = zip(*windows_of, strict=True)
        self.window_cells = np.concatenate(window_cells)  # (W, R*R)
        self.corners = np.concatenate(corners)  # (W, 2)
        counts = [len(part) for part in corners]
        self.slide_of = np.repeat(np.arange(len(counts)), counts)  # (W,)

    def __len__(self) -> int:
        return len(self.corners)

    def draw(self, indices) -> tuple:
        """Of B samples: windows (views, B), turns of them (views, B), removed (views, B, M), and
        the slides whose means they get (B,)."""
        N = self.geometry.num_tokens
        window = np.empty((self.views, len(indices)), np.int64)
        turn = np.empty_like(window)
        removed = np.empty((*window.shape, self.removed_tokens), np.int64)
        style = np.empty(len(indices), np.int64)
        for b, i in enumerate(indices):
            rng = np.random.default_rng([self.seed, i])
            epoch, position = divmod(int(i), len(self))
            window[0, b] = epoch_order(self.seed, epoch, len(self))[position]
            if self.views == 2:
                window[1, b] = self.draw_partner(window[0, b], rng)
            for view in range(self.views):
                turn[view, b] = rng.integers(8) * self.turn  # always drawn: the rest stays equal
                removed[view, b] = rng.permutation(N)[: self.removed_tokens]
            style[b] = self.slide_of[window[0, b]]
            if rng.random() < self.swap:
                style[b] = rng.integers(len(self.slides))
        return window, turn, removed, style

    def draw_partner(self, window: int, rng) -> int:
        """A random window inside a random source window that holds the given one."""
        slide = self.slide_of[window]
        first, end = np.searchsorted(self.slide_of, [slide, slide + 1])  # the slide's windows
        corners = self.corners[first:end]
        reach = self.source - self.geometry.region
        start = self.corners[window] - rng.integers(reach + 1, size=2)  # the source's corner
        inside = ((corners >= start) & (corners <= start + reach)).all(axis=1)
        return first + rng.choice(np.flatnonzero(inside))

    def __getitem__(self, i: int) -> dict:
        """Sample i: as `batch`, without the axis of samples, and `valid` always a tensor."""
        sample = self.batch([i])
        if sample["valid"] is None:
            sample["valid"] = torch.ones(sample["x"].shape[:-1], dtype=torch.bool)
        sample_axis = 1 if self.views == 2 else 0
        return {key: value.select(sample_axis, 0) for key, value in sample.items()}

    def batch(self, indices) -> dict:
        """x (B, N, D) float16, valid (B, N) or None if all are valid, and removed (B, M).
        With two views each has a leading axis of 2."""
        window, turn, removed, style = self.draw(indices)
        x = np.empty((*window.shape, self.geometry.num_tokens, self.slides[0].dim), np.float16)
        valid = np.empty(x.shape[:-1], bool)
        for b, own in enumerate(self.slide_of[window[0]]):
            cells = self.window_cells[window[:, b]]
            entries = self.turned_entries[turn[:, b]]
            _, valid[:, b] = gather(self.slides[own], cells, entries, out=x[:, b])
            if style[b] != own:
                change = self.slide_means[style[b]] - self.slide_means[own]  # (K, D)
                change[np.isnan(change)] = 0  # one of the two has no token of a magnification
                x[:, b] += change[self.k] * valid[:, b, :, None]
        views = slice(None) if self.views == 2 else 0
        return as_batch(x[views], valid[views]) | {"removed": torch.from_numpy(removed[views])}


@functools.lru_cache(maxsize=4)  # threads that work ahead may be in the next epoch
def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    # without the 1 these would be the random numbers of sample i = epoch
    return np.random.default_rng([seed, epoch, 1]).permutation(count)


class CaseDataset(torch.utils.data.Dataset):
    """The cases of a split as ragged bags: a case has slides, a slide has regions.
    index (n,): which tokens of a region are read (Geometry.select). `window_cells` and `corners`
    hold, for each slide, its `covering_windows` with a valid token. Slides without such a window
    are in `dropped`; a case without slides is left out. `labels` holds the label of each case.
    `cached` may hold a slide's encoder outputs (W, n or 1, d) and valid (W, n), which `batch` then
    gives instead of embeddings."""

    def __init__(self, slides: dict, cases: list, geometry: Geometry, index, min_cover=0.5):
        self.slides = slides
        self.entries = geometry.cell_order().numpy()[np.asarray(index)]  # (n,)
        self.window_cells: dict[str, np.ndarray] = {}
        self.corners: dict[str, np.ndarray] = {}
        self.cached: dict[str, tuple] = {}
        self.cases: list[Case] = []
        self.dropped: list[str] = []
        for case in cases:
            for slide_id in case.slide_ids:
                cells = slides[slide_id].cells
                window_cells, corners = covering_windows(cells, geometry.region, min_cover)
                _, valid = token_index(slides[slide_id], window_cells, self.entries)  # (W, n)
                kept = valid.any(axis=1)
                if kept.any():
                    self.window_cells[slide_id] = window_cells[kept]
                    self.corners[slide_id] = corners[kept]
                else:
                    self.dropped.append(slide_id)
            usable = [i for i in case.slide_ids if i in self.corners]
            if usable:
                self.cases.append(replace(case, slide_ids=usable))
        self.labels = [case.label for case in self.cases]

    @property
    def uncovered(self) -> str:
        """Says for the log how many cells of these slides lie in no window; empty if none does."""
        cells = sum(len(self.slides[slide_id].cells) for slide_id in self.corners)
        covered = sum(np.count_nonzero(of_slide >= 0) for of_slide in self.window_cells.values())
        if covered == cells:
            return ""
        return f"; {cells - covered} of {cells} cells are not read (see --min-cover)"

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, i: int) -> dict:
        return self.batch([i])

    def batch(self, indices) -> dict:
        """x (W, n, D) float16, or what is `cached` for it; valid (W, n) or None if all are valid;
        regions (S,): how many of the W regions each slide has; case (S,): the slide's case, counted
        from 0 in this batch; label (cases,) float. Empty for no indices."""
        if not len(indices):
            return {}
        slides_of = [self.cases[i].slide_ids for i in indices]
        slide_ids = list(itertools.chain(*slides_of))
        counts = [len(ids) for ids in slides_of]
        inputs, valids = zip(*map(self.read, slide_ids), strict=True)
        return as_batch(np.concatenate(inputs), np.concatenate(valids)) | {
            "cached": bool(self.cached),
            "slide_ids": slide_ids,
            "regions": torch.tensor([len(valid) for valid in valids]),
            "case": torch.from_numpy(np.repeat(np.arange(len(counts)), counts)),
            "label": torch.tensor([float(self.labels[i]) for i in indices]),
        }

    def read(self, slide_id: str) -> tuple:
        if self.cached:
            return self.cached[slide_id]
        return gather(self.slides[slide_id], self.window_cells[slide_id], self.entries)


# --------------------------------------------------------------------------------- tasks and splits

SPLITS = ("train", "tune", "test")
BINARY = ["0", "1"]
NUMBER = re.compile(r"(0|[1-9][0-9]*)(\.0*)?")
NO_NAME = re.compile(r"(nan|n/?a|[-+]?[0-9.,]+)?", re.IGNORECASE)  # of a class


class Outcome:
    """What a slide's label is: the number of its class.
    Two classes have one logit and one score, of the second class, which is the positive one; more
    have one each. A regression needs more than another Outcome: splits are stratified by class
    (`shuffled`, train.split_cases), predictions name classes, and intervals are those of AUROC."""

    def classes(self, labels) -> list[str]:
        """The classes of a table's labels: 0, 1, ..., or their names in sorted order."""
        numbers = {self.class_name(label) for label in labels if NUMBER.fullmatch(label)}
        names = {label for label in labels if not NO_NAME.fullmatch(label)}
        if len(numbers) > 1 or (numbers and len(names) < 2):
            return [str(i) for i in range(max(2, len(numbers)))]
        return sorted(names | numbers) or BINARY  # grades such as 0, 1+, 2+ are names

    def class_name(self, label: str) -> str:
        """As `classes` writes it: spreadsheets write 1.0 for 1."""
        number = NUMBER.fullmatch(label)
        return number[1] if number else label

    def columns(self, classes: list[str]) -> list[str]:
        """Names for the scores of a slide, as many as it has logits."""
        return ["score"] if len(classes) == 2 else [f"score_{name}" for name in classes]

    def loss(self, logit: torch.Tensor, label: torch.Tensor, smoothing: float) -> torch.Tensor:
        """logit (S,) or (S, G), label (S,) float, label smoothing -> (S,) cross-entropy."""
        if logit.ndim == 2:
            return F.cross_entropy(logit, label.long(), reduction="none", label_smoothing=smoothing)
        target = label * (1 - smoothing) + smoothing / 2
        return F.binary_cross_entropy_with_logits(logit, target, reduction="none")

    def score(self, logit: torch.Tensor) -> torch.Tensor:
        """Probabilities on the CPU, in the shape of `logit`. In float64, because in float32 large
        logits all give 1 and would tie."""
        logit = logit.cpu().double()
        return torch.sigmoid(logit) if logit.ndim == 1 else torch.softmax(logit, dim=1)

    def of_class(self, scores) -> dict[int, np.ndarray]:
        """scores (cases,) or (cases, G) -> class -> (cases,), for each class that is ranked."""
        scores = np.asarray(scores)
        return {1: scores} if scores.ndim == 1 else dict(enumerate(scores.T))

    def metric(self, labels, scores) -> float:
        """Area under the ROC curve; of more than two classes the mean of each against the rest.
        Raises MixmagError where a class is absent."""
        from sklearn.metrics import roc_auc_score  # its import takes a second

        labels = np.asarray(labels)
        ranked = self.of_class(scores)
        if len(set(labels)) <= max(ranked):
            found = f"{len(labels)} cases of {len(set(labels))}"
            raise MixmagError(f"AUROC needs {max(ranked) + 1} classes; found {found}")
        return float(np.mean([roc_auc_score(labels == g, ranked[g]) for g in ranked]))


OUTCOME = Outcome()


@dataclass
class Case:
    case_id: str
    label: int
    split: str
    slide_ids: list
    splits: dict = field(default_factory=dict)  # column of the table -> split


def evaluation_slides(tasks: dict[str, list[Case]]) -> dict[str, set]:
    """For each task the slides of its tune and test cases, as any of the tables lists them."""
    slides_of: dict[str, set] = defaultdict(set)
    for case in itertools.chain(*tasks.values()):
        slides_of[case.case_id].update(case.slide_ids)
    evaluation = {}
    for task, cases in tasks.items():
        held_out = [slides_of[case.case_id] for case in cases if case.split != "train"]
        evaluation[task] = set().union(*held_out)
    return evaluation


def pretraining_ids(data, tasks: dict[str, list[Case]]) -> list[str]:
    """The slides of pretrain.csv; without it, every slide that no task tunes or tests on."""
    listed = Path(data) / "pretrain.csv"
    if listed.exists():
        return list(dict.fromkeys(row["slide_id"] for row in read_csv(listed, ("slide_id",))))
    evaluation = set().union(*evaluation_slides(tasks).values())
    return [slide_id for slide_id in slide_files(data) if slide_id not in evaluation]


# ======================================================================================== stop here
# Above stands what the paper needs. Below stands what a lab needs around it: statistics, tables and
# folds, reading slides and other tools' files, the synthetic cohort, and the command line.


# ------------------------------------------------------------------------- statistics of embeddings


def tokens_in(slide: Slide, cells, k: int) -> np.ndarray:
    """(n, D): the valid embeddings of magnification k in these cells, a slice or indices."""
    entries = magnification_entries(k)
    return slide.features[cells, entries][slide.valid[cells, entries]]


def feature_statistics(slides, magnifications=None, limit: int = 20000) -> tuple:
    """mean (D,), std (D,) and directions (K, D) of the embeddings, as float tensors.
    A direction is the mean of a magnification's embeddings after each is scaled to length 1. It is
    the constant prediction that minimises Eq. 2. About `limit` evenly spread cells are read.
    magnifications: the indices of those that count. Raises MixmagError for values that are not
    finite."""
    K = len(slides[0].meta["magnifications"])
    stride = max(1, math.ceil(sum(len(slide.cells) for slide in slides) / limit))
    count = np.zeros((K, 1))
    total, squares, directions = np.zeros((3, K, slides[0].dim))
    for slide in progress(slides, desc="statistics"):
        for k in range(K) if magnifications is None else magnifications:
            tokens = tokens_in(slide, slice(None, None, stride), k).astype(np.float64)  # (n, D)
            if not np.isfinite(tokens).all():
                raise MixmagError(f"{slide.path}: NaN or infinite features; see data.py verify")
            length = np.linalg.norm(tokens, axis=1, keepdims=True).clip(min=1e-12)
            count[k] += len(tokens)
            total[k] += tokens.sum(axis=0)
            squares[k] += (tokens**2).sum(axis=0)
            directions[k] += (tokens / length).sum(axis=0)
    tokens_total = max(count.sum(), 1)
    mean = total.sum(axis=0) / tokens_total
    variance = squares.sum(axis=0) / tokens_total - mean**2
    std = np.sqrt(variance.clip(min=0))
    directions /= count.clip(min=1)
    return tuple(torch.from_numpy(array).float() for array in (mean, std, directions))


def slide_means(slides) -> np.ndarray:
    """(S, K, D) float16: mean embedding of each magnification in at most 32 evenly spread cells;
    NaN where there is none."""
    K = len(slides[0].meta["magnifications"])
    means = np.full((len(slides), K, slides[0].dim), np.nan, np.float16)
    for i, slide in enumerate(progress(slides, desc="slide means")):
        count = len(slide.cells)
        chosen = np.linspace(0, count - 1, min(count, 32)).astype(int)
        for k in range(K):
            tokens = tokens_in(slide, chosen, k).astype(np.float32)  # (n, D)
            if len(tokens):
                means[i, k] = tokens.mean(axis=0)
    return means


# ----------------------------------------------------------------------- finding files, task tables


def slide_files(data, ids=None) -> dict[str, Path]:
    """Slide id -> file, sorted. Raises MixmagError for one of `ids` that has no file."""
    files = files_by_id(Path(data, "slides").glob("[!.]*.safetensors"))  # macOS leaves hidden ones
    if ids is None:
        return files
    check_present(ids, files, f"{data}/slides")
    return {i: files[i] for i in sorted(map(composed, ids))}


def files_by_id(paths) -> dict[str, Path]:
    """Slide id -> the file that is named so, sorted. Raises MixmagError for two files of one id."""
    files: dict[str, Path] = {}
    for path in sorted(paths):
        other = files.setdefault(composed(path.stem), path)
        if other != path:
            raise MixmagError(f"two files of one slide, {other} and {path}; rename one")
    return files


def check_present(ids, files: dict, where) -> None:
    """Raises MixmagError where slides have no file, with the likely mistake."""
    if absent := sorted(set(map(composed, ids)) - files.keys()):
        fault = f"{plural(len(absent), 'slide')} without a file, such as {absent[0]!r}"
        if Path(absent[0]).stem in files:
            fault += f"; leave {Path(absent[0]).suffix} out"
        raise MixmagError(f"{where}: {fault}")


@dataclass
class TaskTable:
    """The table of a task. Until a fold is chosen, a case's split is train only where it is in the
    train split of every fold. columns: those that say a split, `split` or fold_0, fold_1, ...
    classes: their names; a label is an index of this list. findings: everything that is wrong."""

    path: Path
    columns: list[str]
    classes: list[str]
    cases: list[Case]
    findings: list[str]

    @property
    def slide_ids(self) -> list[str]:
        return list(itertools.chain(*[case.slide_ids for case in self.cases]))

    @property
    def folds(self) -> list[int]:
        return [int(name.removeprefix("fold_")) for name in self.columns if name != "split"]

    def in_fold(self, fold: int | None, seed: int = 0) -> list[Case]:
        """The cases with their splits in a fold, or in the column `split` if fold is None.
        In a fold without tune cases, a fifth of each class's training cases (assumed) become tune
        cases."""
        column = "split" if fold is None else f"fold_{fold}"
        if column not in self.columns:
            found = ", ".join(self.columns)
            raise MixmagError(f"{self.path}: no column {column}, found {found}; see --fold")
        cases = [replace(case, split=case.splits[column]) for case in self.cases]
        if fold is not None and "tune" not in {case.split for case in cases}:
            train = [case for case in cases if case.split == "train"]
            ordered = shuffled(train, f"{seed} {column}")
            for _, of_class in itertools.groupby(ordered, key=lambda case: case.label):
                for case in list(of_class)[::5]:
                    case.split = "tune"
        return cases


def shuffled(cases: list[Case], seed) -> list[Case]:
    """Class by class, in each in an order that follows from the seed and the ids alone."""
    hashed = {c.case_id: hashlib.sha256(f"{seed} {c.case_id}".encode()).digest() for c in cases}
    return sorted(cases, key=lambda case: (case.label, hashed[case.case_id]))


def read_table(data, task) -> TaskTable:
    """Raises MixmagError for an unknown task, and with the first finding of a faulty table."""
    found = task_names(data)
    if task not in found:
        raise MixmagError(f"{data}/tasks/{task}.csv: no such task; found {', '.join(found)}")
    table = any_table(Path(data) / "tasks" / f"{task}.csv")
    if table.findings:
        raise MixmagError(f"{table.findings[0]} (1 of {len(table.findings)}; see data.py verify)")
    return table


def read_task(data, task, fold: int | None = None, seed: int = 0) -> list[Case]:
    """The cases of a task, with their splits in a fold. Raises as read_table and in_fold do."""
    return read_table(data, task).in_fold(fold, seed)


def read_tasks(data, fold: int | None = None, seed: int = 0) -> dict[str, list[Case]]:
    """The cases of every task, in that fold where a table has folds. Raises MixmagError for
    1. a faulty table, 2. a table whose slides are not in DATA, 3. a fold that no table has, or that
    a table with folds lacks, 4. a table with folds if neither `fold` nor pretrain.csv is given."""
    files = slide_files(data)
    tables = {task: read_table(data, task) for task in task_names(data)}
    folded = [table for table in tables.values() if table.folds]
    if fold is not None and not folded:
        raise MixmagError(f"--fold {fold}: no table in {data}/tasks has a column fold_{fold}")
    if fold is None and folded and not (Path(data) / "pretrain.csv").exists():
        found = f"{folded[0].path}: over its folds every case is tested"
        raise MixmagError(f"{found}; give --fold K, or list slides in pretrain.csv")
    tasks = {}
    for task, table in tables.items():
        check_present(table.slide_ids, files, table.path)
        tasks[task] = table.cases
        if fold is not None and table.folds:
            tasks[task] = table.in_fold(fold, seed)
    return tasks


def task_names(data) -> list[str]:
    """Raises MixmagError for a table of another format: it would hold nothing out, in silence."""
    paths = sorted(Path(data).glob("tasks/[!.]*.*"))
    for path in paths:
        if path.suffix in (".CSV", ".tsv", ".txt", ".xls", ".xlsx", ".ods"):
            raise MixmagError(f"{path}: expected a table whose name ends with .csv")
    return [path.stem for path in paths if path.suffix == ".csv"]


def any_table(path) -> TaskTable:
    """A table with all that is wrong in it as `findings`. Raises MixmagError for another file."""
    columns = split_columns(path, read_csv(path, ())) or ["split"]
    return parse_table(path, read_csv(path, ("case_id", "slide_id", "label", *columns)))


def split_columns(path, rows: list[dict]) -> list[str]:
    """Those that say a case's split: `split`, or fold_0, fold_1, ..., or none."""
    names = list(rows[0]) if rows else ["split"]
    columns = [name for name in names if re.fullmatch(r"split|fold_(0|[1-9][0-9]*)", name)]
    if "split" in columns and len(columns) > 1:
        raise MixmagError(f"{path}: found {', '.join(columns)}; expected a split or folds")
    return columns


def parse_table(path, rows: list[dict]) -> TaskTable:
    columns = split_columns(path, rows)
    classes = OUTCOME.classes([row["label"] for row in rows])
    findings = []
    cases: dict[str, Case] = {}
    seen = set()
    for row in rows:
        where = f"{path}: line {row['line']}, case {row['case_id']!r}"
        fault = row_fault(row, columns, classes)
        if row["slide_id"] in seen:
            fault = f"slide {row['slide_id']!r} stands in more than one row"
        if fault:
            findings.append(f"{where}: {fault}")
            continue
        label = classes.index(OUTCOME.class_name(row["label"]))
        splits = {column: row[column] for column in columns}
        split = next((split for split in splits.values() if split != "train"), "train")
        case = cases.setdefault(row["case_id"], Case(row["case_id"], label, split, [], splits))
        for column, split in case.splits.items():
            if split != row[column]:
                findings.append(f"{where} is in two splits, {split} and {row[column]}")
        if case.label != label:
            findings.append(f"{where} has two labels, {classes[case.label]} and {classes[label]}")
        case.slide_ids.append(row["slide_id"])
        seen.add(row["slide_id"])
    return TaskTable(Path(path), columns, classes, list(cases.values()), findings)


def row_fault(row: dict, columns: list[str], classes: list[str]) -> str:
    """What is wrong with a row of a task table by itself. Empty if nothing is."""
    if not row["case_id"] or not row["slide_id"]:
        return "case_id or slide_id is empty"
    for column in columns:
        if row[column] not in SPLITS:
            return f"{column} is {row[column]!r}, expected train, tune or test"
    if OUTCOME.class_name(row["label"]) not in classes:
        return f"label is {row['label']!r}, expected {' or '.join(classes)}"
    return ""


# ---------------------------------------------------------- the slide reader, micrometres per pixel

CACHE_BYTES = 2**26  # of decoded tiles, shared by neighbouring reads of a level (assumed)
SLIDE_SUFFIXES = [".svs", ".tif", ".tiff", ".ndpi", ".vms", ".vmu"]
SLIDE_SUFFIXES += [".scn", ".mrxs", ".svslide", ".bif", ".czi"]
OPENSLIDE_VERSION = openslide.__library_version__
GIVEN = "--mpp or --manifest"  # a row of the manifest goes before
MPP_TOLERANCE = 0.02  # the share by which two values of one slide may differ (assumed)


class Reader:
    """A slide, read by OpenSlide, for any number of threads. Level 0 of its pyramid is the finest.
    Others use path, size, properties, downsamples, level_sizes, bounds, level_for, region and read.
    Raises SlideReadError for a file that is no slide, and later for pixels that cannot be read."""

    def __init__(self, path):
        self.path = Path(path)
        self.cache = openslide.OpenSlideCache(CACHE_BYTES)
        try:
            self.handle = self.open()
            # All is asked for now: a handle that has failed once gives no more answers.
            self.properties = dict(self.handle.properties)
            self.downsamples = self.handle.level_downsamples
            self.level_sizes = self.handle.level_dimensions  # (width, height) of each level
        except openslide.OpenSlideError as error:
            raise SlideReadError(f"{path}: OpenSlide cannot open it ({error})") from None
        self.size = self.level_sizes[0]
        self.jpeg: dict = {}  # while it is empty, OpenSlide reads all levels
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

    def level_for(self, downsample: float) -> int:
        """The coarsest level that is at least as fine as asked, and not padded to whole tiles:
        OpenSlide's downsample, a mean of two ratios, is wrong for such a level."""
        best = 0
        for level, found in enumerate(self.downsamples):
            sides = np.multiply(self.level_sizes[level], round(found))
            fits = (np.abs(sides - self.size) <= 2 * found).all()
            # Pyramids often say 4.0001 or 3.9998 where 4 is meant.
            if fits and found <= downsample * 1.001:
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
        # A handle that has failed refuses all further reads, in every thread: the others need a new
        # one. Another one, for this read alone, tells whether these pixels are to blame.
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


def number(text) -> float:
    """The number in a text, with a decimal point or comma; NaN if there is none."""
    try:
        return float(str(text).replace(",", "."))
    except ValueError:
        return math.nan


def slide_mpp(properties, given: float | None = None) -> tuple[float, str]:
    """Micrometres per level-0 pixel, and who says so: the user, or a property of the slide. A given
    value mends an implausible one of the slide, and never overrules a plausible one. Nothing is
    guessed: raises MixmagError."""
    name = "openslide.mpp-x"  # of a plain TIFF, OpenSlide makes it from the resolution
    x = number(properties.get(name))
    y = number(properties.get("openslide.mpp-y"))
    mpp = (x + y) / 2
    plausible = 0.1 <= mpp <= 4 and abs(x - y) <= MPP_TOLERANCE * mpp
    stated = "the slide says no mpp"
    if name in properties:
        stated = f"the slide says {x:.4g} x {y:.4g} um/px"
    if given is None and not plausible:
        raise MixmagError(f"{stated}, expected 0.1 to 4, equal in x and y; give {GIVEN}")
    if given is None:
        return mpp, name
    if plausible and abs(given - mpp) > MPP_TOLERANCE * mpp:
        raise MixmagError(f"{GIVEN} says {given:g} um/px, {stated}; leave it out for this one")
    return given, GIVEN


def read_manifest(path, slide_ids) -> dict:
    """{slide id: mpp} of a CSV with the columns slide (an id or a file) and mpp; {} without a path.
    Rows without an mpp are skipped. Raises MixmagError for a second mpp, or one not in 0.1 to 4."""
    found: dict[str, float] = {}
    for row in read_csv(path, ("slide", "mpp")) if path else ():
        file = Path(row["slide"])
        slide_id = file.stem if file.suffix.lower() in SLIDE_SUFFIXES else file.name
        if not row["mpp"]:
            continue
        mpp = number(row["mpp"])
        if slide_id in found or not 0.1 <= mpp <= 4:
            expected = f"expected one number of 0.1 to 4 um/px for {slide_id!r}"
            raise MixmagError(f"{path}, line {row['line']}: {expected}")
        found[slide_id] = mpp
    if unmatched := sorted(found.keys() - slide_ids):
        log(f"--manifest: no slide here for {len(unmatched)} of its rows, such as {unmatched[0]}")
    return found


# ------------------------------------------------------------------------- JPEG tiles read directly

MAX_TILE_BYTES = 2**30  # that a TIFF may claim for one of its tiles (assumed)
START = b"\xff\xd8"  # of every JPEG picture
ADOBE = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0"  # the byte after it tells libjpeg YCbCr (1) or RGB (0)


class JpegLevel:
    """A level of a TIFF whose tiles are JPEG pictures, for any number of threads. page: tifffile's.
    OpenSlide spends most of such a read on drawing in floating point (its issue 440); here tiles
    are laid side by side. ValueError: a tile is damaged or not as the page says."""

    def __init__(self, path, page):
        self.tile_size = (page.tilewidth, page.tilelength)
        self.tiles_across = math.ceil(page.imagewidth / page.tilewidth)
        file = io.FileIO(path)
        is_ycbcr = page.photometric == tifffile.PHOTOMETRIC.YCBCR
        expected = (page.tilelength, page.tilewidth, "YCbCr" if is_ycbcr else "RGB")
        tables = (page.jpegtables or b"")[2:-2]  # of all tiles, without their own start and end
        head = START + ADOBE + bytes([is_ycbcr]) + tables

        # It does not know self: no cycle of references keeps the cache alive.
        @functools.lru_cache(CACHE_BYTES // (4 * page.tilewidth * page.tilelength))
        def tile(i: int) -> np.ndarray:
            found = os.pread(file.fileno(), page.databytecounts[i], page.dataoffsets[i])
            jpeg = head + found[2:]
            if found[:2] != START or simplejpeg.decode_jpeg_header(jpeg)[:3] != expected:
                raise ValueError("no JPEG picture of the size and colours that the page says")
            return simplejpeg.decode_jpeg(jpeg, "RGBA")  # (h, w, 4) uint8

        self.tile = tile

    def region(self, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        """(bottom - top, right - left, 4) uint8 RGBA of a rectangle inside the level."""
        width, height = self.tile_size
        pixels = np.empty((bottom - top, right - left, 4), np.uint8)
        for y in range(top - top % height, bottom, height):
            for x in range(left - left % width, right, width):
                tile = self.tile(y // height * self.tiles_across + x // width)
                part = tile[max(0, top - y) : bottom - y, max(0, left - x) : right - x]
                row = max(0, y - top)
                column = max(0, x - left)
                pixels[row : row + part.shape[0], column : column + part.shape[1]] = part
        return pixels


def tiled_pages(reader: Reader, pages: list) -> dict:
    """{level: page} of the levels that have one page, of tiles. Raises SlideReadError for tiles so
    large that OpenSlide would end the process for want of memory, for more or fewer than the level
    has, and for a macro in the scan's place."""
    found: dict = {}
    sizes = [(page.imagewidth, page.imagelength) for page in pages]
    largest = max(sizes, key=math.prod)
    if math.prod(largest) > math.prod(reader.size):
        sides = f"its first picture has {reader.size} px, a later one {largest}"
        raise SlideReadError(f"{reader.path}: {sides}; save the scan as the first")
    for page, size in zip(pages, sizes, strict=True):
        if not page.is_tiled or size not in reader.level_sizes:
            continue
        most_bytes = max(4 * page.tilewidth * page.tilelength, *page.databytecounts)
        if most_bytes > MAX_TILE_BYTES or len(page.dataoffsets) != math.prod(page.chunked):
            raise SlideReadError(f"{reader.path} is damaged: its tiles do not make {size} px")
        if 0 in page.databytecounts:  # OpenSlide draws an absent tile in ways of its own
            return {}
        if sizes.count(size) == 1:  # of two, either may be OpenSlide's
            found[reader.level_sizes.index(size)] = page
    return found


def jpeg_levels(reader: Reader) -> dict[int, JpegLevel]:
    """{level: itself} of those that can be read without OpenSlide: their first tile is a JPEG
    picture of which it makes the same. Raises SlideReadError as tiled_pages."""
    levels: dict = {}
    if reader.properties["openslide.vendor"] not in ("aperio", "generic-tiff"):
        return levels
    try:
        with tifffile.TiffFile(reader.path) as tiff:
            pages = tiled_pages(reader, [page.aspage() for page in tiff.pages])
            ours = {level: JpegLevel(reader.path, page) for level, page in pages.items()}
    except SlideReadError:
        raise
    except Exception:  # tifffile has all kinds for tags that OpenSlide does not look at
        return levels
    for level, jpeg in ours.items():
        right, bottom = np.minimum(reader.level_sizes[level], jpeg.tile_size).tolist()
        with contextlib.suppress(ValueError, OSError, SlideReadError):
            first = jpeg.region(0, 0, right, bottom)
            if np.array_equal(first, reader.region(level, 0, 0, right, bottom)):
                levels[level] = jpeg
    return levels


# --------------------------------------------------------------------------------- tissue and masks

TISSUE_UM = 16.0  # um per pixel of thumbnail and mask; all that follows was set at it
TISSUE_CHROMA = (30, 60)  # assumed: haze is below, stained tissue above, Otsu decides between
DETAIL = 4  # parts of a pixel's side: nuclei, which 16 um average away, are texture at 4 um
TEXTURE = 4.0  # assumed: glass and haze vary less within 80 um, pale tissue and fat more
SPECK = 25  # mask pixels (0.006 mm2): smaller pieces are dropped
HOLE = 200  # mask pixels (0.05 mm2): smaller holes are filled
STROKE = 8  # mask pixels: half of the least width of a pen
RIM = 2  # mask pixels that are cut around ink
HALO = 32  # mask pixels over which ink may fade


def otsu(values: np.ndarray) -> int:
    """Of uint8 values (Otsu 1979); the upper class is > threshold. 0 if all values are the same."""
    count = np.bincount(values.reshape(-1), minlength=256)
    below = count.cumsum() / values.size
    total = (count * np.arange(256)).cumsum() / values.size
    spread = below * (1 - below)
    between = np.divide((below * total[-1] - total) ** 2, spread, np.zeros(256), where=spread > 0)
    return int(between.argmax())


def thumbnail(reader: Reader, mpp: float) -> tuple:
    """The whole slide at TISSUE_UM, (h, w, 3) uint8 box-averaged over white; the variance of green
    inside its pixels; (h, w) bool: unreadable."""
    w, h = (max(1, round(side * mpp / TISSUE_UM)) for side in reader.size)
    scale = np.divide(reader.size, (w, h))
    level = reader.level_for(1.25 * TISSUE_UM / DETAIL / mpp)  # scanners' 4 um/px are 3.7 to 4.3
    step = max(1, int(1024 * reader.downsamples[level] * mpp / TISSUE_UM))
    rgb = np.full((h, w, 3), 255, np.uint8)
    variance = np.zeros((h, w), np.float32)
    unread = np.ones((h, w), bool)
    for y, x in itertools.product(range(0, h, step), range(0, w, step)):
        stop_if_asked()
        block = np.s_[y : y + step, x : x + step]
        rows, cols = unread[block].shape
        box = (*(x, y) * scale, *(x + cols, y + rows) * scale)
        with contextlib.suppress(SlideReadError):
            picture, within = reader.read(level, box)
            rgb[block] = picture.resize((cols, rows), Image.Resampling.BOX, within)
            size = (cols * DETAIL, rows * DETAIL)
            fine = picture.getchannel("G").resize(size, Image.Resampling.BOX, within)
            parts = np.asarray(fine, np.float32).reshape(rows, DETAIL, cols, DETAIL)
            variance[block] = parts.var(axis=(1, 3))
            unread[block] = False
    return rgb, variance, unread


def ink_mask(colour: np.ndarray, textured: np.ndarray) -> np.ndarray:
    """Pens and black borders. colour (3, h, w) on white glass, textured (h, w) -> (h, w) bool.
    Over a stroke's width H&E and DAB are never so coloured, and ink on bare glass is smooth."""
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
    labels, _ = ndimage.label(mask)
    return mask & (np.bincount(labels.reshape(-1))[labels] >= least)


def on_white_glass(colour: np.ndarray) -> np.ndarray:
    """(3, h, w) with its colours scaled so that glass, if there is any, is white. Pure white is
    where nothing was scanned; the brightest of what looks like glass is no pale tissue."""
    low = colour.min(0)
    glass = colour[:, (low >= 180) & (low < 254) & (colour.max(0) - low < 40)]
    if glass.shape[1] <= 0.01 * low.size:
        return colour
    white = np.quantile(glass, 0.95, axis=1)
    return np.minimum(colour * (255 / white[:, None, None]), 255)


def find_tissue(rgb: np.ndarray, inside: np.ndarray | float = 0.0) -> np.ndarray:
    """(h, w, 3) uint8 at TISSUE_UM, the variance inside its pixels -> (h, w) bool, for H&E and DAB.
    Tissue is coloured more than haze, or coloured and textured (pale, fat). No ink, no speck."""
    colour = on_white_glass(rgb.transpose(2, 0, 1).astype(np.float32, order="C"))  # (3, h, w)
    chroma = colour.max(0) - colour.min(0)
    drop = 255 - colour.min(0)
    mean = functools.partial(ndimage.uniform_filter, size=5)
    coloured = mean(chroma) > 4
    between = mean(drop**2) - mean(drop) ** 2
    ink = ink_mask(colour, coloured & (between > TEXTURE**2))  # it may have grain inside pixels
    textured = coloured & (between + mean(inside) > TEXTURE**2)
    chroma[ink] = 0
    # Edges of haze are textured, but thin.
    inner = ndimage.binary_erosion(textured & ~ink, np.ones((5, 5)), border_value=1)
    threshold = np.clip(otsu(chroma.astype(np.uint8)), *TISSUE_CHROMA)
    mask = large_components(inner | (chroma > threshold), SPECK)
    holes = ndimage.binary_fill_holes(mask) & ~mask
    return (mask | holes & ~large_components(holes, HOLE)) & ~ink


def read_mask(path, reader: Reader, shape: tuple) -> np.ndarray:
    """A picture of the whole slide, whose non-zero pixels are tissue -> (h, w) bool. Raises
    MixmagError for one that does not fit."""
    try:
        with Image.open(path) as image:
            colours = [band != "A" for band in image.getbands()]
            pixels = np.asarray(image).reshape(image.height, image.width, -1)
    except Exception as error:  # Pillow has half a dozen types for what is no picture
        enough = f"{shape[1]} x {shape[0]} px are enough"
        raise MixmagError(f"{path}: cannot be read as a mask ({error!r}); {enough}") from None
    if abs(np.divide(*image.size) / np.divide(*reader.size) - 1) > 0.02:
        raise MixmagError(f"{path}: {image.size} is another shape than the slide's {reader.size}")
    tissue = Image.fromarray(pixels[..., colours].any(axis=2).astype(np.uint8) * 255)
    mask = np.asarray(tissue.resize(shape[::-1], Image.Resampling.BOX)) > 127
    if not mask.any():
        raise MixmagError(f"{path}: holds no tissue")
    return mask


def tissue_mask(reader: Reader, mpp: float, own: str | Path | None = None) -> tuple:
    """The thumbnail, (h, w, 3) uint8 at TISSUE_UM, and where tissue is, (h, w) bool."""
    picture, variance, unread = thumbnail(reader, mpp)
    # What cannot be read counts as tissue, so that its windows are tried and counted as unreadable.
    mask = read_mask(own, reader, unread.shape) if own else find_tissue(picture, variance) | unread
    picture[unread] = 128
    return picture, mask


# ------------------------------------------------------ the plan of a slide, its cells, its picture

MAX_STRETCH = 1.02  # assumed: a mpp is not known better than this, so 0.51 um/px are still 20x
MAX_LOST = 0.01  # share of a cell that may be missing where the mask sees tissue (assumed)
QC_SIDE = 1000  # px of the picture for quality control


class TilePlan:
    """What will be read of a slide: one lattice of cells, in exact mpp, from the corner of the
    slide's bounds. Its lines are rounded once, to whole pixels of the one level that is read. A
    tile is an equal part of its cell, so that children tile their parent whatever the mpp. Windows
    are (col, row, cols, rows) in cells. Raises MixmagError for a slide that would be upsampled."""

    def __init__(self, reader: Reader, settings: TileSettings):
        self.mpp, self.mpp_source = slide_mpp(reader.properties, settings.mpp)
        self.magnifications = settings.magnifications
        highest = self.magnifications[-1]
        finest = 10.0 / highest  # 20x is 0.5 um/px, 5x is 2.0
        if self.mpp > MAX_STRETCH * finest:
            coarser = f"its {self.mpp:.4g} um/px are coarser than {highest}x ({finest:g} um/px)"
            raise MixmagError(f"{coarser}; give lower --magnifications")
        self.cell_px = TILE_PX * 10.0 / self.magnifications[0] / self.mpp
        bounds = reader.bounds
        self.origin = (float(bounds[0]), float(bounds[1]))
        self.level = reader.level_for(finest / self.mpp)
        self.downsample = reader.downsamples[self.level]
        # The level's pixels, rounded, along a pixel of the finest magnification.
        self.shrink = max(1, round(finest / self.mpp / self.downsample))
        self.lines = []  # (cols + 1,), (rows + 1,) int: the lattice in the level's pixels
        level_size = reader.level_sizes[self.level]
        for start, side, size in zip(bounds[:2], bounds[2:], level_size, strict=True):
            cells = int((side + 1) / self.cell_px)  # a last line may be rounded, too
            if cells == 0:
                raise MixmagError(f"its {side} px are less than one cell of {self.cell_px:g} px")
            exact = (start + self.cell_px * np.arange(cells + 1)) / self.downsample
            rounded = np.round(exact).clip(max=size).astype(int)
            if np.abs(rounded - exact).max() * self.downsample * self.mpp > finest:
                raise MixmagError(f"level {self.level} does not fit level 0 of {reader.size} px")
            self.lines.append(rounded)
        self.thumbnail, self.mask = tissue_mask(reader, self.mpp, settings.mask)
        self.mask_scale = np.divide(self.mask.shape[::-1], reader.size)  # its px per level-0 px
        self.choose_windows(settings.region, settings.min_tissue)
        self.unscanned: set = set()  # cells read so far with pixels that do not exist

    def choose_windows(self, R: int, min_tissue: float) -> None:
        """Those of R x R cells, or at the border what is left of them, with enough tissue."""
        self.windows: list = []
        self.cells: list = []  # (number of its window, (col, row)) of each cell in them
        self.shares: list = []  # of tissue in each window looked at
        held = 0
        cols, rows = (len(lines) - 1 for lines in self.lines)
        for row, col in itertools.product(range(0, rows, R), range(0, cols, R)):
            window = (col, row, min(R, cols - col), min(R, rows - row))
            tissue = self.patch(self.mask, *window)
            self.shares.append(tissue.mean())
            if tissue.mean() >= min_tissue:
                places = itertools.product(range(row, row + window[3]), range(col, col + window[2]))
                self.cells += [(len(self.windows), (c, r)) for r, c in places]
                self.windows.append(window)
                held += tissue.sum()
        self.tissue_held = held / max(1, self.mask.sum())  # share of all tissue

    def box(self, col: int, row: int, cols: int = 1, rows: int = 1) -> list:
        """[left, top, right, bottom] of cells in pixels of the mask."""
        corners = np.array([[col, row], [col + cols, row + rows]]) * self.cell_px + self.origin
        return np.round(corners * self.mask_scale).astype(int).reshape(-1).tolist()

    def patch(self, mask: np.ndarray, *cells) -> np.ndarray:
        """The part of a mask that these cells cover, at least one pixel of it."""
        left, top, right, bottom = self.box(*cells)
        return mask[top : max(bottom, top + 1), left : max(right, left + 1)]

    @functools.cached_property
    def inside(self) -> np.ndarray:
        """(h, w) where tissue is for certain: the mask without its rim, and with its small holes,
        as a lost tile makes them, but not with large ones, which are lumen or were not scanned."""
        holes = ndimage.binary_fill_holes(self.mask) & ~self.mask
        small_holes = holes & ~large_components(holes, 4 * HOLE)
        return ndimage.binary_erosion(self.mask | small_holes, iterations=2)


def read_cell(reader: Reader, plan: TilePlan, col: int, row: int) -> np.ndarray:
    """(T, 224, 224, 3) uint8: a cell's tiles in the slide file's token order. Pixels are resampled
    once, by a factor near 1; means of whole pixels do the rest, so that a tile is the mean of its
    children. SlideReadError: pixels cannot be read, or are missing where there was tissue."""
    left, right = plan.lines[0][col : col + 2].tolist()
    top, bottom = plan.lines[1][row : row + 2].tolist()
    # Four bytes a pixel: torch and Pillow work faster on them than on three.
    pixels = reader.region(plan.level, left, top, right, bottom)  # (h, w, 4)
    least_alpha = pixels[..., 3].min()
    if least_alpha == 0:  # the file does not have all
        plan.unscanned.add((col, row))
        inside = plan.patch(plan.inside, col, row)
        alpha = Image.fromarray(pixels[..., 3]).resize(inside.shape[::-1], Image.Resampling.BOX)
        if (inside & (np.asarray(alpha) == 0)).mean() > MAX_LOST:
            raise SlideReadError(f"cell ({col}, {row}) lacks pixels where there is tissue")
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
    if plan.shrink > 1:
        picture = picture.reduce(plan.shrink)
    tiles = np.empty(((4**K - 1) // 3, TILE_PX, TILE_PX, 3), np.uint8)
    for k in reversed(range(K)):
        n = 2**k
        rgb = np.frombuffer(picture.tobytes("raw", "RGB"), np.uint8)
        rgb = rgb.reshape(n, TILE_PX, n, TILE_PX, 3).swapaxes(1, 2)  # (n, n, 224, 224, 3)
        tiles[magnification_entries(k)].reshape(rgb.shape)[:] = rgb
        picture = picture.reduce(2)
    return tiles


def read_cells(reader: Reader, plan: TilePlan):
    """Yields (number of the window, (col, row), tiles or the SlideReadError) in the plan's order,
    while threads read ahead."""

    def read(item):
        number, cell = item
        try:
            return number, cell, read_cell(reader, plan, *cell)
        except SlideReadError as error:
            return number, cell, error

    return prefetch(read, plan.cells, torch.get_num_threads())


def draw_qc(path, reader: Reader, plan: TilePlan) -> None:
    """A PNG to look at: the thumbnail with its tissue's contours and the kept windows, below a
    legend."""
    picture = ImageOps.contain(Image.fromarray(plan.thumbnail), (QC_SIDE, QC_SIDE))
    mask = np.asarray(Image.fromarray(plan.mask).resize(picture.size))
    inner = ndimage.binary_erosion(mask, iterations=2)
    picture.paste("green", mask=Image.fromarray(mask & ~inner))
    draw = ImageDraw.Draw(picture)
    zoom = picture.width / plan.mask.shape[1]
    for window in plan.windows:
        draw.rectangle([zoom * edge for edge in plan.box(*window)], outline="blue")
    sheet = Image.new("RGB", (QC_SIDE, picture.height + 60), "white")
    sheet.paste(picture, (0, 60))
    draw = ImageDraw.Draw(sheet)
    draw.text((4, 0), composed(reader.path.stem), "black", font_size=16)
    draw.text((4, 20), "tissue", "green", font_size=16)
    side = f"{plan.cell_px * plan.mpp:.4g} um"
    held = f"windows that are read, of cells of {side}: {plan.tissue_held:.0%} of the tissue"
    draw.text((4, 40), held, "blue", font_size=16)
    with whole_file(path) as temporary:
        sheet.save(temporary, "PNG")


# ------------------------------------------------------------------------------------ tile encoders


def texture(tiles: torch.Tensor) -> torch.Tensor:
    """A stand-in for a tile foundation model, and no substitute: 39 fixed statistics of optical
    density, the same for a turned tile. tiles (B, 224, 224, 3) uint8 RGB -> (B, 39) float32."""
    rgb = tiles.permute(0, 3, 1, 2).float()  # (B, 3, 224, 224)
    density = -torch.log10((rgb + 1) / 256)  # Beer-Lambert
    features = [density.mean((2, 3))]
    for scale in (1, 2, 4, 8, 16, 32):  # how much varies, and between neighbours, at each scale
        coarse = F.avg_pool2d(density, scale)
        down = coarse.diff(dim=2).abs().mean((2, 3))
        across = coarse.diff(dim=3).abs().mean((2, 3))
        features += [coarse.std((2, 3)), down + across]
    return torch.cat(features, dim=1)


def tile_encoder(name: str, device, weights=None):
    """The callable (B, 224, 224, 3) uint8, on `device`, -> (B, D). Raises MixmagError."""
    if weights and name != "virchow2":
        raise MixmagError(f"--weights {weights}: only --encoder virchow2 takes them, not {name}")
    if name == "texture":
        return texture
    if name == "virchow2":
        hub = "hf-hub:paige-ai/Virchow2"
        model = virchow2_of_file(weights) if weights else create_virchow2(hub, pretrained=True)
        return Virchow2(model).to(device).eval()
    sys.path.insert(0, os.getcwd())
    try:
        encoder = pkgutil.resolve_name(name)()
    except Exception as error:  # whatever the user's module raises
        expected = "expected texture, virchow2 or module:factory"
        raise MixmagError(f"--encoder {name}: {one_line(error)}; {expected}") from None
    if isinstance(encoder, torch.nn.Module):
        return encoder.to(device).eval()
    if not callable(encoder):
        raise MixmagError(f"--encoder {name}: it returned {encoder!r}, no callable")
    return encoder


def encode_tiles(encoder, tiles: np.ndarray, batch_size: int, device) -> np.ndarray:
    """tiles (..., 224, 224, 3) uint8 -> (..., D) float16. Raises MixmagError for an output that is
    no (B, D) of finite floats in float16's range."""
    made = []
    with torch.inference_mode():
        for batch in torch.from_numpy(tiles.reshape(-1, *tiles.shape[-3:])).split(batch_size):
            out = encoder(batch.to(device))
            shape = tuple(getattr(out, "shape", ()))
            floats = isinstance(out, torch.Tensor) and out.is_floating_point()
            if not floats or shape[:-1] != (len(batch),):
                expected = f"a tensor ({len(batch)}, D) of floats"
                raise MixmagError(f"the encoder returned {type(out)} {shape}, expected {expected}")
            made.append(out.half().cpu())
    half = torch.cat(made)
    if not half.isfinite().all():
        raise MixmagError("the encoder returned NaN, or values beyond float16")
    return half.numpy().reshape(*tiles.shape[:-3], -1)


class Virchow2(torch.nn.Module):
    """tiles (B, 224, 224, 3) uint8 -> (B, 1280) float32: the class token (paper 4.1) of Virchow2
    (Zimmermann et al. 2024), a ViT-H/14 of 631 M parameters; fp16 autocast on a GPU."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation of R, G, B
        mean, std = torch.tensor(imagenet, device=tiles.device)
        pictures = ((tiles / 255 - mean) / std).permute(0, 3, 1, 2)
        with torch.autocast(tiles.device.type, torch.float16, enabled=tiles.is_cuda):
            return self.model(pictures)[:, 0].float()


def create_virchow2(name: str, **settings) -> torch.nn.Module:
    """timm's model of this name, with Virchow2's kinds of layers. Raises MixmagError."""
    try:
        import timm
        from timm.layers import SwiGLUPacked
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision for another torch
        advice = "pip install timm torchvision==0.28.0 (the one for torch 2.13)"
        raise MixmagError(f"--encoder virchow2 needs timm ({error}): {advice}") from None
    layers = {"mlp_layer": SwiGLUPacked, "act_layer": torch.nn.SiLU}
    try:
        return timm.create_model(name, **layers, **settings)
    except OSError as error:  # all that the hub and the network raise
        reason = error.strerror or type(error).__name__  # the full text may hold a token
        advice = "accept its terms on huggingface.co and set HF_TOKEN, or give --weights FILE"
        raise MixmagError(f"Virchow2 cannot be fetched ({reason}): {advice}") from None


def empty_virchow2() -> torch.nn.Module:
    """Its architecture, without memory for the weights: 2.5 GB that need not be drawn first."""
    shape = {"reg_tokens": 4, "mlp_ratio": 5.3375, "init_values": 1e-5}
    with torch.device("meta"):
        return create_virchow2("vit_huge_patch14_224", num_classes=0, global_pool="", **shape)


def virchow2_of_file(path) -> torch.nn.Module:
    """With all weights of a file, and no others, as fp32. Raises MixmagError."""
    model = empty_virchow2()
    try:
        if str(path).endswith(".safetensors"):
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, "cpu", weights_only=True, mmap=True)
        state = {name: tensor.float() for name, tensor in state.items()}
        model.load_state_dict(state, strict=True, assign=True)
    except Exception as error:  # each of the two libraries has half a dozen ways to say it
        reason = one_line(error)[:500]
        raise MixmagError(f"--weights {path}: no weights of Virchow2 ({reason})") from None
    return model


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
    magnifications: tuple = (5, 10, 20)
    region: int = 3
    min_tissue: float = 0.25
    mask: str | Path | None = None  # a file, or a folder of <slide_id>.png
    batch_size: int = 256
    device: torch.device = torch.device("cpu")
    dry_run: bool = False


def already_done(path, wanted: dict, mpp: float | None) -> bool:
    """Whether a slide's file exists. Raises OtherSettings if it was made with others.
    wanted: metadata that it must have; None stands for any value. mpp: the user's, if given."""
    if not Path(path).exists():
        return False
    slide = read_slide(path)
    wanted = {name: value for name, value in wanted.items() if value is not None}
    if mpp is not None and not math.isclose(mpp, slide.meta["mpp"], rel_tol=MPP_TOLERANCE):
        wanted["mpp"] = mpp
    if differing := differences({name: slide.meta.get(name) for name in wanted}, wanted):
        raise OtherSettings(f"{path} has {differing}; give another --out, or remove it")
    return True


def tile_slide(reader: Reader, plan: TilePlan, encoder, dim: int, settings: TileSettings) -> tuple:
    """features (C, T, D) float16, cells (C, 2) int32, and the number of unreadable windows."""
    T = Geometry(1, plan.magnifications).tokens_per_cell
    cells_per_batch = max(1, settings.batch_size // T)
    features = [np.zeros((0, T, dim), np.float16)]
    done = []  # (window, col, row) of each cell, in the order of the features
    bad: dict = {}  # window -> why a cell of it cannot be read
    reads = iter(progress(read_cells(reader, plan), total=len(plan.cells)))
    while batch := list(itertools.islice(reads, cells_per_batch)):
        bad |= {window: tiles for window, _, tiles in batch if isinstance(tiles, SlideReadError)}
        if len(bad) > MAX_BAD_WINDOWS * len(plan.windows):
            share = f"{len(bad)} of {plural(len(plan.windows), 'window')} cannot be read"
            raise MixmagError(f"{share}, more than 1%: {list(bad.values())[-1]}")
        good = [read for read in batch if read[0] not in bad]
        if good:
            done += [(window, *cell) for window, cell, _ in good]
            stack = np.stack([tiles for _, _, tiles in good])  # (n, T, 224, 224, 3)
            features.append(encode_tiles(encoder, stack, settings.batch_size, settings.device))
    cells = np.array(done, np.int32).reshape(-1, 3)
    kept = ~np.isin(cells[:, 0], list(bad))
    return np.concatenate(features)[kept], cells[kept, 1:], len(bad)


def find_slide_files(places) -> list[Path]:
    """Slide files, named or below folders, also by links, but not hidden ones."""
    paths = []
    for place in map(Path, places):
        if not place.is_dir():
            paths.append(place)
            continue
        below = glob.glob("**", root_dir=place, recursive=True)
        paths += [place / name for name in below if Path(name).suffix.lower() in SLIDE_SUFFIXES]
    if not paths:
        raise MixmagError(f"no slides in {places}, expected files of {SLIDE_SUFFIXES}")
    # One file may be found by several links.
    return list(files_by_id({path.parent.resolve() / path.name for path in paths}).values())


def plan_report(reader: Reader, plan: TilePlan, dim: int, min_tissue: float) -> str:
    source = plan.mpp_source
    power = number(reader.properties.get("openslide.objective-power"))
    if power > 0 and abs(power * plan.mpp - 10) > 4:  # assumed; a 40x scan has 0.2 to 0.3 um/px
        source += f", not its objective power of {power:g}"
    windows = f"{len(plan.windows)} of {plural(len(plan.shares), 'window')}"
    windows += f" (--min-tissue {min_tissue:.0%}"
    if not plan.windows:
        windows += f", the fullest holds {max(plan.shares):.1%}"
    tokens = len(plan.cells) * Geometry(1, plan.magnifications).tokens_per_cell
    return (
        f"{composed(reader.path.stem)}: {plan.mpp:.4g} um/px ({source}), "
        f"level {plan.level}, {windows}) with {plan.tissue_held:.0%} of the tissue: "
        f"{plural(len(plan.cells), 'cell')}, {tokens} tokens, {tokens * dim / 5e5:.2f} MB"
    )


def tile_one(path: Path, encoder, dim: int, settings: TileSettings) -> str:
    """Tile one slide into its file. Returns a report. Raises MixmagError."""
    slide_id = composed(path.stem)
    slide_id.encode("utf-8")  # a name in another encoding is refused now, not at the end
    out = settings.out / "slides" / f"{slide_id}.safetensors"
    mask = Path(settings.mask) if settings.mask else None
    if mask and mask.is_dir():
        mask /= f"{path.stem}.png"
    settings = replace(settings, mask=mask, mpp=settings.manifest.get(slide_id, settings.mpp))
    meta: dict[str, Any] = {
        "encoder": settings.encoder,
        "magnifications": list(settings.magnifications),
        "settings": {
            "region": settings.region,
            "min_tissue": settings.min_tissue,
            "source_bytes": path.stat().st_size,
            "mask": file_sha256(mask) if mask else None,
            "weights": settings.weights_sha256,
        },
    }
    if already_done(out, meta, settings.mpp):
        return f"{slide_id}: done before"
    reader = Reader(path)
    plan = TilePlan(reader, settings)
    report = plan_report(reader, plan, dim, settings.min_tissue)
    if settings.dry_run:
        return report
    draw_qc(settings.out / "qc" / f"{slide_id}.png", reader, plan)
    features, cells, bad = tile_slide(reader, plan, encoder, dim, settings)
    meta |= {
        "slide_id": slide_id,
        "tile_px": TILE_PX,
        "mpp": plan.mpp,
        "cell_px": plan.cell_px,
        "origin": plan.origin,
        "width": reader.size[0],
        "height": reader.size[1],
        "n_bad": bad,
        "n_unscanned": len(plan.unscanned),
    }
    write_slide(out, features, cells, np.ones(features.shape[:2], bool), meta)
    if bad:
        report += f"; {plural(bad, 'window')} unreadable"
    if plan.unscanned:
        report += f"; {plural(len(plan.unscanned), 'cell')} partly not scanned"
    return report


def tile_all(paths: list, encoder, dim: int, settings: TileSettings) -> list[tuple]:
    """As `each_slide`. Slides that were tiled before come first: with other settings no new one is
    begun."""
    done = slide_files(settings.out)
    done_first = sorted(paths, key=lambda path: composed(path.stem) not in done)
    items = {path.stem: path for path in done_first}
    return each_slide(lambda path: tile_one(path, encoder, dim, settings), items, "tile")


def each_slide(function, items: dict, stage: str) -> list[tuple]:
    """Show what the function reports of each item. items: slide id -> item.
    Returns (slide_id, stage, reason) of each that fails. Raises OtherSettings."""
    failed = []
    for slide_id, item in progress(items.items(), desc="slides"):
        try:
            show(function(item))
        except (Stopped, BrokenPipeError, OtherSettings):
            raise
        except Exception as error:  # whatever a slide, its files or the user's encoder raise
            failed.append((slide_id, stage, one_line(error)))
            log(f"{slide_id}: FAILED: {one_line(error)}")
    return failed


def tile_command(args) -> int:
    share, shares = args.shard
    paths = find_slide_files(args.slides)
    if args.mask and Path(args.mask).is_file() and len(paths) > 1:
        raise MixmagError(f"--mask {args.mask} is one file for {len(paths)} slides; give a folder")
    manifest = read_manifest(args.manifest, {composed(path.stem) for path in paths})
    device = find_device(args.device)
    encoder = tile_encoder(args.encoder, device, args.weights)
    white = np.full((1, TILE_PX, TILE_PX, 3), 255, np.uint8)
    dim = encode_tiles(encoder, white, 1, device).shape[1]
    out = Path(args.out).resolve()
    flags = {**vars(args), "out": out, "manifest": manifest, "device": device}
    flags["weights_sha256"] = file_sha256(args.weights) if args.weights else None
    settings = TileSettings(**{name: flags[name] for name in TileSettings.__dataclass_fields__})
    paths = paths[share::shares]
    failed = tile_all(paths, encoder, dim, settings)
    print(f"{plural(len(paths) - len(failed), 'slide')} done, {len(failed)} failed")
    if args.dry_run:
        return 3 if failed else 0
    name = "failed.csv" if shares == 1 else f"failed-{share}-of-{shares}.csv"
    return report_failed(out / name, failed)


# --------------------------------------------------------------------- import of other tools' files

IMPORT_SECONDS = 600  # assumed: no slide takes longer, unless a file hangs the HDF5 library
STAMP_SNAP = 0.1  # assumed: how far STAMP's tiles may be off their lattice, in tiles
MAX_RATIO = 1032  # gzip cannot shrink more, so arrays have at most this many times their file


def whole_if_possible(value: float) -> int | float:
    """5 for 5.0, and 2.5 for 2.5."""
    return int(value) if value == int(value) else value


@dataclass
class FeatureFile:
    """One slide at one magnification. Lengths are level-0 pixels (TRIDENT) or um (STAMP)."""

    features: np.ndarray  # (n, D)
    corners: np.ndarray  # (n, 2): x, y of the tiles' top-left corners
    side: float  # of a tile
    tile_px: int
    magnification: float
    encoder: str | None
    slide_size: tuple = (0, 0)  # width, height; 0 if the file does not say


def read_trident(file: h5py.File) -> FeatureFile:
    """Layout: trident/IO.py of mahmoodlab/TRIDENT."""
    facts = file["coords"].attrs
    return FeatureFile(
        file["features"][...],
        file["coords"][...],
        side=float(facts["patch_size_level0"]),
        tile_px=int(facts["patch_size"]),
        magnification=float(facts["target_magnification"]),
        encoder=file["features"].attrs.get("encoder"),
        slide_size=tuple(int(facts.get(f"level0_{side}", 0)) for side in ("width", "height")),
    )


def read_stamp(file: h5py.File) -> FeatureFile:
    """Layout: src/stamp/preprocessing/__init__.py of KatherLab/STAMP, from version 2.1 on."""
    features = file["feats"][...]
    corners = file["coords"][...]
    side = float(file.attrs["tile_size_um"])
    tile_px = int(file.attrs["tile_size_px"])
    # Up to version 2.3 a hash of STAMP's own code ends it (KatherLab/STAMP#57).
    encoder = re.sub("-[0-9a-f]{8}$", "", file.attrs.get("extractor", ""))
    return FeatureFile(features, corners, side, tile_px, round(10 * tile_px / side, 6), encoder)


def read_feature_file(path: Path, tool: str) -> FeatureFile:
    read = {"trident": read_trident, "stamp": read_stamp}[tool]
    try:
        with h5py.File(path, locking=False) as file:  # some disks know no locks
            claimed = sum(getattr(part, "nbytes", 0) for part in file.values())
            if claimed > MAX_RATIO * path.stat().st_size:
                raise ValueError(f"its arrays claim {claimed} bytes that it does not hold")
            found = read(file)
    except Exception as error:  # damage raises a dozen types
        raise MixmagError(f"{path}: {error}") from None
    with np.errstate(over="ignore"):
        found.features = found.features.astype(np.float16)
    if found.features.shape == (0,):  # TRIDENT has no width where there is no tile
        found.features = found.features.reshape(0, 0)
    good = np.isfinite(found.features).all(axis=1)
    good &= found.features.any(axis=1)  # HDF5 reads zeros where a row was never written
    if not good.all():
        raise MixmagError(f"{path}: NaN, infinite or zero: {sum(~good)} of {len(good)} tiles")
    return found


def settle_trident_sides(files: list[FeatureFile]) -> None:
    """TRIDENT cuts tiles of a rounded side but states its floor: one more may be the true side."""
    for more in (0, 1):
        if not any((file.corners % (file.side + more)).any() for file in files):
            for file in files:
                file.side += more
            return


def check_same_slide(files: list[FeatureFile]) -> None:
    if not files[0].encoder:
        raise MixmagError("its files name no encoder; give the name with --encoder")
    for low, high in itertools.pairwise(files):
        doubled = high.magnification == 2 * low.magnification and high.side == low.side / 2
        if not doubled or (high.slide_size, high.encoder) != (low.slide_size, low.encoder):
            facts = [f"{f.magnification:g}x {f.side:g} {f.slide_size} {f.encoder}" for f in files]
            expected = "expected doublings with half the side each, of one slide, by one --encoder"
            raise MixmagError(f"{expected}, found {', '.join(facts)}")


def import_mpp(files: list[FeatureFile], tool: str, given: float | None) -> tuple[float, str]:
    """um per level-0 pixel, and who says so. STAMP's files know no pixels of the slide."""
    nominal = 10 / files[-1].magnification
    if tool == "trident":
        nominal *= files[-1].tile_px / files[-1].side
    if given is None:
        return nominal, "nominal"
    # TRIDENT cuts slides of 0.2 to 0.3 um/px as if they were 0.25.
    if tool == "trident" and abs(given - nominal) > 0.2 * nominal:
        raise MixmagError(f"{GIVEN} says {given:g}, its tiles say {nominal:.4g} um/px")
    return given, GIVEN


def lattice_positions(file: FeatureFile, tool: str) -> np.ndarray:
    """(n, 2) int64: col, row of the tiles on the lattice of their side (px, of STAMP um)."""
    exact = file.corners / file.side
    position = np.rint(exact)
    tolerance = np.zeros_like(exact)
    if tool == "stamp":  # its tiles are up to 1 px too far apart
        tolerance = STAMP_SNAP + position / file.tile_px
    fits = (np.abs(exact - position) <= tolerance) & (position >= 0) & (position < 2**31)
    if not fits.all():
        off = f"{(~fits).any(axis=1).sum()} of {len(fits)} tiles at {file.magnification:g}x"
        raise MixmagError(f"off the lattice of {file.side:g}: {off}")
    return position.astype(np.int64)


def assemble_cells(files: list, positions: list) -> tuple:
    """features (C, T, D), cells (C, 2), valid (C, T). A cell exists where any of its tiles does."""
    keys = [(position >> k) @ [1, 2**32] for k, position in enumerate(positions)]
    cells = np.unique(np.concatenate(keys))
    T = magnification_entries(len(files)).start
    width = max(file.features.shape[1] for file in files)
    features = np.zeros((len(cells), T, width), np.float16)
    valid = np.zeros((len(cells), T), bool)
    for k, file in enumerate(files):
        if not len(file.features):  # of any width
            continue
        row = np.searchsorted(cells, keys[k])
        col_inside, row_inside = (positions[k] % 2**k).T
        entry = magnification_entries(k).start + row_inside * 2**k + col_inside
        features[row, entry] = file.features
        valid[row, entry] = True
    if np.count_nonzero(valid) < sum(map(len, positions)):
        raise MixmagError("some tiles stand where another does")
    return features, np.stack([cells % 2**32, cells >> 32], axis=1).astype(np.int32), valid


def import_slide(paths: list, out: Path, tool: str, encoder=None, mpp=None) -> str:
    """Join a slide's files, one for each magnification from low to high. Returns a report."""
    settings = {"tool": tool, "sources": [file_sha256(path) for path in paths]}
    if already_done(out, {"encoder": encoder, "settings": settings}, mpp):
        return f"{out.stem}: done before"
    files = [read_feature_file(path, tool) for path in paths]
    if tool == "trident":
        settle_trident_sides(files)
    for file in files:
        file.encoder = encoder or file.encoder
    check_same_slide(files)
    positions = [lattice_positions(file, tool) for file in files]
    features, cells, valid = assemble_cells(files, positions)
    if not features.shape[2]:
        raise MixmagError("its files hold no tile, and no width of an embedding")
    first = files[0]
    if first.encoder == "virchow2" and features.shape[2] == 2560:
        features = features[..., :1280]  # the class token; the rest is the mean patch token
    mpp, mpp_source = import_mpp(files, tool, mpp)
    cell_px = first.side / mpp if tool == "stamp" else first.side
    size = first.slide_size
    if 0 in size:
        size = (cells.max(axis=0, initial=-1) + 1) * cell_px
    meta = {
        "slide_id": out.stem,
        "encoder": first.encoder,
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
        "size_known": 0 not in first.slide_size,
    }
    write_slide(out, features, cells, valid, meta)
    report = f"{out.stem}: {mpp:.4g} um/px ({mpp_source}), {plural(len(cells), 'cell')}"
    tiles = [f"{len(file.features)} tiles at {file.magnification:g}x" for file in files]
    return ", ".join([report, *tiles])


def import_worker(*job) -> str:
    """`import_slide` in a process of its own, which a file may end, or hang until the alarm."""
    for signum in SIGNALS:  # the parent receives them too, and lets the slide be finished
        signal.signal(signum, signal.SIG_IGN)
    signal.alarm(IMPORT_SECONDS)
    return import_slide(*job)


def import_command(args) -> int:
    tool = "trident" if args.trident else "stamp"
    folders = getattr(args, tool)
    found = {folder: files_by_id(Path(folder).glob("**/[!.]*.h5")) for folder in folders}
    if not all(found.values()):
        raise MixmagError(f"no feature files (*.h5) in one of {', '.join(found)}")
    slide_ids = sorted(set().union(*found.values()))
    manifest = read_manifest(args.manifest, set(slide_ids))
    jobs = {}
    for i in slide_ids:
        paths = [files.get(i, Path(folder, f"{i}.h5")) for folder, files in found.items()]
        out = Path(args.out, "slides", f"{i}.safetensors")
        jobs[i] = (paths, out, tool, args.encoder, manifest.get(i, args.mpp))
    spawn = multiprocessing.get_context("spawn")  # a fork inherits torch's threads
    pool = ProcessPoolExecutor(1, spawn)

    def in_its_process(job) -> str:
        nonlocal pool
        try:
            return pool.submit(import_worker, *job).result()
        except BrokenExecutor:
            stop_if_asked()  # then a signal ended it
            pool = ProcessPoolExecutor(1, spawn)
            raise MixmagError("its files bring the HDF5 library down, or hang it") from None

    try:
        failed = each_slide(in_its_process, jobs, "import")
    finally:
        pool.shutdown()
    print(f"{plural(len(jobs) - len(failed), 'slide')} imported, {len(failed)} failed")
    return report_failed(Path(args.out, "failed.csv"), failed)


# ----------------------------------------------------------------------------- the synthetic cohort

# A tile has a latent vector: its slide's shift (site, stain), its tissue (a smooth random field
# that all magnifications see), noise, and perhaps a planted pattern. Its embedding is the square of
# what rises above zero, after a bias for each dimension, like real ones. Patterns carry the label:
#     alone      positive slides hold a pattern, negative slides do not;
#     together   positive slides hold two patterns in the same cells. Negative slides hold the
#                first, and half of them the second, as often but in other regions;
#     adjacent   the same with two patterns of one magnification, in tiles side by side.
# How many cells show them, and how strongly, differs from slide to slide. STRENGTH was set before
# any mixing encoder was run. At quick scale (seeds 1, 2) AB-MIL on the best magnification has a
# test AUROC of .77 to .88 (alone) or .56 to .69; one who knows all but noise and label has .975.
MECHANISMS = {  # rule, (magnification index, pattern), (magnification index, pattern), in words
    "breast_cdh1": ("alone", (2, 0), (2, 0), "a 20x pattern: visible at 20x only"),
    "bladder_fgfr": ("alone", (1, 0), (1, 0), "a 10x pattern: visible at 10x only"),
    "colon_msi": ("alone", (0, 0), (0, 0), "a 5x pattern: visible at 5x only"),
    "endometrial_pten": ("together", (0, 1), (2, 2), "a 5x and a 20x pattern in the same cell"),
    "gastric_her2": ("together", (1, 1), (2, 3), "a 10x and a 20x pattern in the same cell"),
    "lung_egfr": ("adjacent", (1, 2), (1, 3), "two 10x patterns in tiles side by side"),
    "skin_braf": ("together", (0, 3), (2, 1), "a 5x and a 20x pattern in the same cell"),
}
CASES = {  # paper, supplementary table: cases, slides, fraction of positive cases of each split
    "breast_cdh1": ((648, 673, 0.15), (214, 219, 0.14), (214, 228, 0.15)),
    "colon_msi": ((2008, 2268, 0.10), (335, 381, 0.12), (331, 373, 0.13)),
    "bladder_fgfr": ((518, 540, 0.26), (255, 271, 0.31), (254, 265, 0.28)),
    "endometrial_pten": ((975, 1027, 0.48), (162, 168, 0.43), (164, 178, 0.41)),
    "lung_egfr": ((2129, 2773, 0.28), (345, 437, 0.30), (352, 446, 0.28)),
    "gastric_her2": ((967, 967, 0.19), (169, 169, 0.23), (160, 160, 0.18)),
    "skin_braf": ((320, 343, 0.23), (55, 58, 0.11), (54, 62, 0.13)),
}
COHORT = {task: dict(zip(SPLITS, counts, strict=True)) for task, counts in CASES.items()}
QUICK_FLOORS = {"train": (120, 40), "tune": (60, 20), "test": (200, 60)}  # cases, positive ones
SYNTHETIC = 3  # version of what follows
WRONG_LABELS = 0.015  # so many cases of a class, in each split, have slides of the other class
BIAS = 0.8  # its standard deviation over dimensions
SHIFT, TISSUE, NOISE = 0.22, 0.46, 0.32  # shares of a latent vector's variance
SCALE = 0.15  # of an embedding
STRENGTH = {"alone": (1.5, 5.5), "together": (3.0, 9.0), "adjacent": (3.0, 9.0)}  # least, most
CELLS = (1, 7)  # a region that holds a pattern shows it in at least 1 and less than 7 of 9 cells


def synth_world(dim: int, seed: int) -> dict:
    """What all slides of a cohort share: bias (3, D), and patterns of length 1 (3, 4, D)."""
    rng = np.random.default_rng([seed, 0])
    quantiles = special.ndtri((np.arange(dim) + 0.5) / dim)  # standard normal, the same each time
    bias = BIAS * (0.97 * quantiles + 0.25 * rng.standard_normal((3, dim)))
    pattern = rng.standard_normal((3, 4, dim), np.float32)
    pattern /= np.linalg.norm(pattern, axis=-1, keepdims=True)
    return {"bias": bias.astype(np.float32), "pattern": pattern}


def synth_cells(rng, regions: int) -> np.ndarray:
    """(C, 2) row, col, region by region: one connected piece of tissue of 3 x 3 regions."""
    grown = {(0, 0)}
    while len(grown) < regions:
        row, col = sorted(grown)[rng.integers(len(grown))]
        down, right = ((0, 1), (1, 0), (0, -1), (-1, 0))[rng.integers(4)]
        grown.add((row + down, col + right))
    corners = 3 * (np.array(sorted(grown)) - np.min(list(grown), axis=0))
    return (corners[:, None] + np.argwhere(np.ones((3, 3)))).reshape(-1, 2)


def planted_tokens(rng, regions: int, task: str, positive: bool) -> np.ndarray:
    """(2, C, 21) bool: the tokens that show the task's first pattern, and its second."""
    rule, (k1, _), (k2, _), _ = MECHANISMS[task]
    chosen = rng.permutation(regions)[:4, None]  # at most, so in a large slide patterns are rare
    place = rng.permuted(np.tile(np.arange(9), (len(chosen), 1)), axis=1)
    cells = 9 * chosen + place[:, : rng.integers(*CELLS)]
    half = len(cells) // 2
    first, second = cells[: 2 * half].reshape(2, -1)
    if rule == "alone" or rng.integers(2):  # half of the negative slides hold no second pattern
        second = second[:0]
    if positive:
        second = first
    shown = np.zeros((2, 9 * regions, 21), bool)
    shown[0, first, magnification_entries(k1)] = rule != "alone"
    shown[1, second, magnification_entries(k2)] = True
    if rule == "adjacent":  # one 10x tile of a cell, and the one beside, above or below it
        corner = rng.integers(4, size=(9 * regions, 1))
        other = corner ^ rng.integers(1, 3, size=corner.shape)
        shown &= np.arange(21) == 1 + np.stack([corner, other])
    return shown


def smooth_fields(coarse: np.ndarray, height: int, width: int) -> torch.Tensor:
    """(count, h, w) -> (count, height, width)."""
    x = torch.from_numpy(coarse)[None]
    return F.interpolate(x, size=(height, width), mode="bicubic", align_corners=True)[0]


def known_latents(world: dict, rng, task: str, positive: bool, regions: int) -> tuple:
    """cells (C, 2) row, col, and (C, 21, D): the latent vectors and the bias, but not the noise.
    A positive and a negative slide draw the same numbers: they are twins."""
    cells = synth_cells(rng, regions)
    rows, cols = cells.max(axis=0) + 1
    D = world["bias"].shape[1]
    shift = SHIFT**0.5 * rng.standard_normal(D, np.float32)
    knots = rng.standard_normal((D, 2 + 2 * rows // 3, 2 + 2 * cols // 3), np.float32)
    tissue = TISSUE**0.5 * smooth_fields(knots, 4 * rows, 4 * cols)  # (D, 4 rows, 4 cols)
    tokens = []
    for k in range(3):
        side = 2**k
        x = F.avg_pool2d(tissue, 4 // side).permute(1, 2, 0).numpy()  # (rows s, cols s, D)
        x = x.reshape(rows, side, cols, side, D).swapaxes(1, 2)[tuple(cells.T)]  # (C, s, s, D)
        tokens.append(world["bias"][k] + x.reshape(len(cells), -1, D))
    known = shift + np.concatenate(tokens, axis=1)
    strength = rng.uniform(*STRENGTH[MECHANISMS[task][0]])
    planted = planted_tokens(rng, regions, task, positive)
    for (k, number), shown in zip(MECHANISMS[task][1:3], planted, strict=True):
        known[shown] += strength * world["pattern"][k, number]
    return cells, known


def synth_slide(world: dict, rng, task: str, positive: bool, regions: int) -> tuple:
    """features (C, 21, D) float16, cells (C, 2) int32, and (3,) the least MEM loss of each
    magnification: who knows all but a tile's noise predicts the mean embedding of such tiles."""
    cells, known = known_latents(world, rng, task, positive, regions)
    noise = NOISE**0.5 * rng.standard_normal(known.shape, np.float32)
    features = SCALE * (known + noise).clip(min=0) ** 2
    z = known / NOISE**0.5
    mean = (z**2 + 1) * special.ndtr(z) + z * np.exp(-(z**2) / 2) / math.tau**0.5  # of features
    lengths = np.linalg.norm(mean, axis=-1) * np.linalg.norm(features, axis=-1)
    loss = 1 - (mean * features).sum(-1) / lengths  # (C, 21)
    least = [loss[:, magnification_entries(k)].mean() for k in range(3)]
    return features.astype(np.float16), cells[:, ::-1].astype(np.int32), np.array(least)


def plan_split(rng, task: str, split: str, scale: str) -> list[tuple]:
    cases, slides, positive = COHORT[task][split]
    least, least_positives = QUICK_FLOORS[split] if scale == "quick" else (cases, 0)
    count = max(least, round(cases / 20))
    positives = max(least_positives, round(positive * count))
    labels = rng.permutation([1] * positives + [0] * (count - positives))
    truth = labels.copy()
    for label in (0, 1):
        members = np.flatnonzero(labels == label)
        truth[members[: round(WRONG_LABELS * len(members))]] = 1 - label
    two = rng.permutation(count)[: round(count * (slides / cases - 1))]  # cases with two slides
    rows = []
    for i, label in enumerate(labels.tolist()):
        case_id = f"{task}-{split}-{i:04d}"
        letters = "ab" if i in two else "a"
        shown_by = letters[rng.integers(len(letters))]  # the slide that shows a positive case
        for letter in letters:
            shows = bool(truth[i]) and letter == shown_by
            rows.append((case_id, f"{case_id}-{letter}", label, split, shows))
    return rows


def synth_plan(scale: str, seed: int) -> dict:
    """task -> [(case_id, slide_id, label, split, whether this slide is like a positive one)]."""
    plan = {}
    for number, task in enumerate(COHORT):
        rng = np.random.default_rng([seed, 1, number])
        plan[task] = sum((plan_split(rng, task, split, scale) for split in COHORT[task]), [])
    return plan


def synthetic_facts(path) -> dict:
    """What synthetic.json says of a synthetic cohort; empty for any other data."""
    about = Path(path) / "synthetic.json"
    return read_json(about) if about.exists() else {}


def synth_cohort(out, scale="quick", dim=64, regions=4, seed=0) -> None:
    """Write DATA/slides, DATA/tasks and DATA/synthetic.json, which says `complete` at the end.
    Raises OtherSettings where there is other data."""
    out = Path(out)
    settings = {"synthetic": SYNTHETIC, "scale": scale}
    settings |= {"dim": dim, "regions": regions, "seed": seed}
    world = synth_world(dim, seed)
    facts = synthetic_facts(out)
    if facts | settings != facts:
        if facts or (out / "slides").exists() or (out / "tasks").exists():
            raise OtherSettings(f"{out}: its data is no cohort of {settings}; give another --out")
        write_json(out / "synthetic.json", {**settings, "complete": False})
    losses = []
    for number, (task, rows) in enumerate(synth_plan(scale, seed).items()):
        for i, (_, slide_id, _, _, shows) in enumerate(progress(rows, desc=f"synthetic {task}")):
            rng = np.random.default_rng([seed, 2, number, i])
            count = max(2, regions + int(rng.integers(-1, 2)))
            features, cells, loss = synth_slide(world, rng, task, shows, count)
            write_synthetic_slide(out, slide_id, features, cells, seed)
            losses.append(loss)
        table = [row[:4] for row in rows]
        write_csv(out / f"tasks/{task}.csv", ("case_id", "slide_id", "label", "split"), table)
    least = dict(zip(("5", "10", "20"), np.mean(losses, axis=0).tolist(), strict=True))
    write_json(out / "synthetic.json", {**settings, "complete": True, "least_mem_loss": least})


def write_synthetic_slide(out: Path, slide_id: str, features, cells, seed: int) -> None:
    width, height = (896 * (cells.max(axis=0) + 1)).tolist()
    meta = {
        "slide_id": slide_id,
        "encoder": f"synthetic-{SYNTHETIC}-{seed}",
        "magnifications": [5, 10, 20],
        "tile_px": TILE_PX,
        "mpp": 0.5,
        "cell_px": 896.0,
        "origin": [0.0, 0.0],
        "width": width,
        "height": height,
        "n_bad": 0,
        "created": "2000-01-01T00:00:00+00:00",  # the same seed gives the same checksum
    }
    path = out / "slides" / f"{slide_id}.safetensors"
    write_slide(path, features, cells, np.ones(features.shape[:2], bool), meta)


def synth_picture(rng, height: int, width: int) -> np.ndarray:
    """(height, width, 3) uint8: purple nuclei in pink tissue on white glass, like H&E."""

    def smooth(px):  # a random field with features of about px pixels
        coarse = rng.standard_normal((1, height // px + 4, width // px + 4), np.float32)
        return smooth_fields(coarse, height, width)[0].numpy()

    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, width, dtype=np.float32)
    tissue = x**2 + y**2 + 0.25 * smooth(700) < 0.75
    nuclei = smooth(12) + 0.6 * smooth(300) > 1.1
    hematoxylin = tissue * (0.03 + ndimage.uniform_filter(nuclei.astype(np.float32), 5))
    eosin = tissue * (0.4 + 0.15 * smooth(120) + 0.1 * smooth(24)).clip(min=0.02)
    purple = np.array([[[1.25]], [[1.35]], [[0.55]]], np.float32)  # absorbs red, green, blue
    pink = np.array([[[0.12]], [[0.95]], [[0.45]]], np.float32)
    light = 240 * np.exp(-purple * hematoxylin - pink * eosin)  # (3, height, width), Beer-Lambert
    light += 2 * rng.standard_normal(light.shape, np.float32)
    return light.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


def synth_images(out, count: int, seed: int) -> None:
    """Write `count` pyramidal TIFFs (tiled, deflate, box-averaged levels, 0.5 um/px)."""
    settings: dict[str, Any] = {"tile": (256, 256), "photometric": "rgb", "compression": "zlib"}
    settings |= {"compressionargs": {"level": 1}, "resolutionunit": "CENTIMETER"}
    for i in progress(range(count), desc="synthetic images"):
        rng = np.random.default_rng([seed, 3, i])
        height, width = (256 * rng.integers(14, 22, size=2)).tolist()
        picture = Image.fromarray(synth_picture(rng, height, width))
        path = Path(out) / f"synthetic-{i:03d}.tiff"
        with whole_file(path) as temporary, tifffile.TiffWriter(temporary) as tiff:
            for level in range(4):
                settings["subfiletype"] = int(level > 0)
                settings["resolution"] = (2e4 / 2**level, 2e4 / 2**level)
                tiff.write(np.asarray(picture), **settings)
                picture = picture.reduce(2)


def synth_command(args) -> int:
    if args.images:
        synth_images(args.out, args.images, args.seed)
        print(f"{args.images} synthetic images in {args.out}")
    else:
        synth_cohort(args.out, args.scale, args.dim, args.regions, args.seed)
        print(f"synthetic cohort, {args.scale} scale, in {args.out}: {', '.join(COHORT)}")
    return 0


# ---------------------------------------------------------------------------- splits of one's own


def clam_folds(rows: list[dict], folder: Path) -> None:
    """As CLAM's splits_0.csv, ... say, which list slides under train, val and test."""
    known = {row["slide_id"] for row in rows}
    words = ("train", "val", "test")
    for fold in itertools.count():
        path = folder / f"splits_{fold}.csv"
        if fold and not path.exists():
            return
        pairs = itertools.product(read_csv(path, words), words)
        listed = [(line[word], word) for line, word in pairs if line[word]]
        split_of = dict(listed)
        counts = Counter([*known, *(slide_id for slide_id, _ in listed)])
        if wrong := [slide_id for slide_id, count in counts.items() if count != 2]:
            names = ", ".join(sorted(wrong)[:3])
            raise MixmagError(f"{path}: not once there and in the table: slide {names}")
        for row in rows:
            row[f"fold_{fold}"] = split_of[row["slide_id"]].replace("val", "tune")


def split_command(args) -> int:
    """Write a task table: with the splits that it has, with CLAM's, or with new folds."""
    rows = read_csv(args.table, ("case_id", "slide_id", args.label))
    found = split_columns(args.table, rows)
    if found and (args.clam or args.folds):
        raise MixmagError(f"{args.table} has {', '.join(found)}; leave --clam and --folds out")
    for row in rows:
        row["label"] = row[args.label]
        row.update({name: {"val": "tune"}.get(row[name], row[name]) for name in found})
    if args.clam:
        clam_folds(rows, Path(args.clam))
    table = parse_table(args.table, rows)
    if table.findings or not rows:
        raise MixmagError("; ".join(table.findings[:1]) or f"{args.table} has no rows")
    if not table.columns:
        folds = args.folds or 5
        ordered = shuffled(table.cases, args.seed)
        fold_of = {case.case_id: i % folds for i, case in enumerate(ordered)}
        for row, fold in itertools.product(rows, range(folds)):
            tests = fold_of[row["case_id"]] == fold
            row[f"fold_{fold}"] = "test" if tests else "train"
    header = [name for name in rows[0] if name != "line"]
    write_csv(args.out, header, [[row[name] for name in header] for row in rows])
    labels = [case.label for case in table.cases]
    counts = [f"{labels.count(k)} of class {name}" for k, name in enumerate(table.classes)]
    columns = ", ".join(split_columns(args.out, rows))
    print(f"{args.out}: {plural(len(labels), 'case')} ({', '.join(counts)}), {columns}")
    return 0


# ------------------------------------------------------------------------------------------- verify


@contextlib.contextmanager
def listed_in(findings: list[str]):
    """Where something is refused, the reason is a finding."""
    try:
        yield
    except MixmagError as error:
        findings.append(str(error))


def slide_findings(slide: Slide) -> list[str]:
    """What is wrong inside a slide file that can be opened."""
    findings = []
    with safetensors.safe_open(slide.path, "numpy") as file:
        text = file.metadata()
    if checksum(slide.features, slide.cells, slide.valid, text) != text["sha256"]:
        findings.append(f"{slide.path}: checksum differs: the file changed after it was written")
    bad = ~np.isfinite(slide.features) & slide.valid[..., None]  # (C, T, D)
    if cells := slide.cells[bad.any(axis=(1, 2))].tolist():
        findings.append(f"{slide.path}: NaN or infinite features in cells {reprlib.repr(cells)}")
    return findings


def table_findings(table: TaskTable) -> list[str]:
    """Its faulty rows, and the classes that a split lacks."""
    findings = table.findings
    for column, fold in itertools.zip_longest(table.columns, table.folds):
        found = {(case.split, case.label) for case in table.in_fold(fold)}
        for split in SPLITS:
            absent = [name for k, name in enumerate(table.classes) if (split, k) not in found]
            if absent:
                words = f"{split} has no case of class {', '.join(absent)}"
                findings.append(f"{table.path}: {column}: {words}")
    return findings


def verify(data) -> list[str]:
    """Every finding in DATA, one line each: slide files, task tables, leakage.
    Raises MixmagError for a folder with neither slides nor tables."""
    data = Path(data)
    files = slide_files(data)
    names = task_names(data)
    if not files and not names:
        raise MixmagError(f"{data} is no DATA folder: neither slides/ nor tasks/ holds anything")
    findings: list[str] = []
    made: dict[str, list] = defaultdict(list)  # how -> the slides made so
    copies: dict[str, list] = defaultdict(list)  # sha256 of all features -> the slides with these
    for slide_id, path in progress(files.items(), desc="slides"):
        with listed_in(findings):
            slide = read_slide(path)
            findings += slide_findings(slide)
            made[embedding_signature(slide)].append(slide_id)
            if len(slide.cells):
                copies[hashlib.sha256(slide.features.data).hexdigest()].append(slide_id)
    for how, ids in made.items():
        if len(made) > 1:
            findings.append(f"{data}: {plural(len(ids), 'slide')}, such as {ids[0]}, with {how}")
    for ids in copies.values():
        if len(ids) > 1:
            findings.append(f"{data}: one slide under several ids: {', '.join(ids)}")
    tasks = {}
    for task in names:
        with listed_in(findings):
            table = any_table(data / "tasks" / f"{task}.csv")
            findings += table_findings(table)
            tasks[task] = table.cases
            check_present(table.slide_ids, files, table.path)
    with listed_in(findings):
        listed = pretraining_ids(data, tasks)
        evaluated = set().union(*evaluation_slides(tasks).values())
        for slide_id in sorted(evaluated.intersection(listed)):
            findings.append(f"pretrain.csv: slide {slide_id!r} belongs to a tune or test case")
        check_present(listed, files, "pretrain.csv")
    return findings


def verify_command(args) -> int:
    findings = verify(args.data)
    for line in findings:
        print(line)
    slides = plural(len(slide_files(args.data)), "slide")
    tables = plural(len(task_names(args.data)), "task table")
    print(f"{args.data}: {slides}, {tables}, {plural(len(findings), 'finding')}")
    return 1 if findings else 0


# -------------------------------------------------------------------------- files, errors, progress


class MixmagError(Exception):
    """An input is refused: the command prints this one line and ends with exit code 1."""


class SlideReadError(MixmagError):
    """A slide, or some of its pixels, cannot be read."""


class OtherSettings(MixmagError):
    """The output folder holds what was made with other settings, or another process works there."""


class Stopped(Exception):
    """A signal asked for the end, and everything worth keeping is saved."""


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STOP_SIGNALS: list[int] = []  # those received so far


def catch_signals() -> None:
    """From now on a first signal is only noted, for `stop_if_asked`; a second one acts at once.
    Of several processes none acts at once: a second signal there is often the first, passed on."""
    alone = process_rank()[1] == 1

    def note(number, frame):
        STOP_SIGNALS.append(number)
        for each in SIGNALS if alone else ():
            signal.signal(each, signal.SIG_DFL)

    for each in SIGNALS:
        signal.signal(each, note)


def stop_if_asked() -> None:
    """Raises Stopped when a signal was received."""
    if STOP_SIGNALS:
        raise Stopped


def run_command(function, *args, **kwargs) -> int:
    """Call the function and turn its end into the exit code that README promises."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may not know every letter of a name
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        catch_signals()
        return function(*args, **kwargs) or 0
    except Stopped:
        log("stopped by a signal; the same command goes on from what is saved")
        return 130 if signal.SIGINT in STOP_SIGNALS else 75
    except BrokenPipeError:  # `| head` closed our stdout: there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE  # what a shell reports for a program that does not catch it
    except (MixmagError, OSError, MemoryError) as error:
        tqdm.write(f"error: {one_line(error)}", file=sys.stderr)
        return 1


def find_device(name: str) -> torch.device:
    """`auto` is this process's GPU or the CPU. Raises MixmagError for a device that is missing."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # as torchrun says
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name not in devices:
        raise MixmagError(f"--device {name}: expected auto, {', '.join(devices)}")
    return torch.device(name)


def process_rank() -> tuple[int, int]:
    """This process's number and how many there are, as torchrun says."""
    rank = int(os.environ.get("RANK") or 0)  # a job may set it to nothing
    world = int(os.environ.get("WORLD_SIZE") or 1)
    if rank >= world:  # it would work, say nothing and write nothing
        raise MixmagError(f"RANK is {rank} of {world}: start with torchrun, or unset RANK")
    return rank, world


def log(text: str) -> None:
    """To stderr, above any progress bar, from the first of several processes only."""
    if process_rank()[0] == 0:
        tqdm.write(text, file=sys.stderr)


def show(text: str) -> None:
    """A result, to stdout at once, above any progress bar."""
    tqdm.write(text)
    sys.stdout.flush()


def one_line(error: Exception) -> str:
    """What is no refusal of ours comes with its type."""
    text = " ".join(str(error).split())
    if isinstance(error, MixmagError):
        return text
    if "No such device" in text:
        text += "; this disk takes no memory maps: copy the files to another"
    return f"{type(error).__name__}: {text}"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def composed(text: str) -> str:
    """Text in one form: macOS decomposes letters such as é in file names, spreadsheets do not."""
    return unicodedata.normalize("NFC", text)


def differences(found: dict, wanted: dict) -> str:
    """The keys whose values differ, also of dictionaries inside, with both values; else empty."""
    differing = []
    for key in sorted(found.keys() | wanted.keys()):
        there = found.get(key)
        now = wanted.get(key)
        if isinstance(there, dict) and isinstance(now, dict) and there != now:
            differing.append(differences(there, now))
        elif there != now:
            differing.append(f"{key} {reprlib.repr(there)} there, {reprlib.repr(now)} now")
    return ", ".join(differing)


def progress(items=None, **settings):
    """A tqdm bar on stderr, if that is a terminal and this is the first process.
    Over items it ends at a signal."""
    hidden = True if process_rank()[0] else None  # None: tqdm looks whether it is a terminal
    bar = tqdm(items, leave=False, disable=hidden, dynamic_ncols=True, **settings)
    return bar if items is None else until_stopped(bar)


def until_stopped(items):
    for item in items:
        stop_if_asked()
        yield item


def prefetch(function, items, threads: int):
    """function(item) of each item, in order, while threads work on the next 2 * threads items."""
    pool = ThreadPoolExecutor(max(threads, 1))
    waiting: deque = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def whole_file(path):
    """Write a file whole or not at all: yields a temporary name, which is renamed at the end.
    Raises MixmagError where that fails; an older file of that name is then still there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        if temporary.stat().st_mode != mode:  # safetensors' files are for their owner only
            temporary.chmod(mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    # torch.save reports a full disk as a RuntimeError.
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise MixmagError(f"{path}: cannot be written ({one_line(error)})") from None
    finally:
        temporary.unlink(missing_ok=True)


def file_sha256(path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path, text: str) -> None:
    """As UTF-8, with bytes of a file name that are none escaped."""
    with whole_file(path) as temporary:
        temporary.write_text(text, "utf-8", "backslashreplace", newline="")


def write_json(path, value) -> None:
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path) -> dict:
    """Raises MixmagError for a file that is missing or is no JSON."""
    try:
        return json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise MixmagError(f"{path}: cannot be read as JSON ({error})") from None


def write_csv(path, header, rows) -> None:
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    write_text(path, text.getvalue())


def read_csv(path, columns) -> list[dict]:
    """Rows as dicts of stripped, composed text, and under "line" the line where each ends.
    Empty rows are skipped. Raises MixmagError for a file that is missing or no such table."""
    mark = "\t" if Path(path).suffix == ".tsv" else ","
    rows = []
    try:
        raw = Path(path).read_bytes()
        if b"\0" in raw:
            raise ValueError("it is UTF-16")
        text = composed(raw.decode("utf-8-sig"))
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark)
        header = [name.strip() for name in next(reader, [])]
        for cells in reader:
            texts = [cell.strip() for cell in cells]
            if any(texts):
                row = dict(itertools.zip_longest(header, texts[: len(header)], fillvalue=""))
                rows.append(row | {"line": reader.line_num})
    except (OSError, ValueError, csv.Error) as error:
        raise MixmagError(f"{path}: cannot be read as 'CSV UTF-8' ({error})") from None
    if missing := ", ".join(name for name in columns if header.count(name) != 1):
        other = " (with semicolons: save it with commas)" if ";" in "".join(header) else ""
        found = f"found {header}, separated by {mark!r}{other}"
        raise MixmagError(f"{path}: column {missing} is missing or twice; {found}")
    return rows


def report_failed(path, failed: list) -> int:
    """Write the table of (slide_id, stage, reason), if any failed. Returns the exit code."""
    Path(path).unlink(missing_ok=True)
    if failed:
        write_csv(path, ("slide_id", "stage", "reason"), failed)
    return 3 if failed else 0


# --------------------------------------------------------------------------------- the command line


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of each flag that has one."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def number_in(kind, low, high):
    """The type of a flag: a number of this kind from low to high."""

    def number(text):
        value = kind(text)
        if not low <= value <= high:  # NaN is not
            raise argparse.ArgumentTypeError(f"{text} is not within {low:g} to {high:g}")
        return value

    return number


def share_of_slides(text: str) -> tuple[int, int]:
    """The type of a flag: i/n."""
    share, shares = map(int, text.split("/"))
    if not 0 <= share < shares:
        raise argparse.ArgumentTypeError(f"{text}: expected i/n with 0 <= i < n")
    return share, shares


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


def add_synth_flags(parser) -> None:
    """make a synthetic cohort: embeddings with seven planted biomarkers"""
    parser.epilog = "example: python data.py synth --out data/synthetic --scale quick"
    add = parser.add_argument
    add("--out", default="data/synthetic", help="folder to write")
    add("--scale", choices=("quick", "full"), default="quick", help="full: the paper's cases")
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
    slides = {"nargs": "+", "metavar": "DIR|FILE", "required": True}
    add("--slides", help="slides, or their folders; of a DICOM series name one file", **slides)
    add_output_flags(parser)
    add("--region", type=POSITIVE, default=3, help="cells per side of a window")
    add("--encoder", default="texture", help="texture, virchow2, or module:factory (see README)")
    add("--weights", help="virchow2's weights, .safetensors or .pt; else from the Hugging Face hub")
    mpp = number_in(float, 0.1, 4)
    add("--mpp", type=mpp, help="um per level-0 pixel, for slides that do not say it")
    run = {"nargs": "+", "type": number_in(float, 0.01, 1000), "action": Doublings}
    add("--magnifications", default=[5, 10, 20], help="each twice the one before", **run)
    share = number_in(float, 0, 1)
    add("--min-tissue", type=share, default=0.25, help="share of a window (assumed)")
    add("--mask", metavar="FILE|DIR", help="a tissue mask, a PNG; DIR: one per slide id")
    add("--shard", type=share_of_slides, default="0/1", metavar="i/n", help="share i < n of slides")
    add("--batch-size", type=POSITIVE, default=256, help="tiles per call of the encoder")
    add("--device", default="auto", help="auto, cpu or cuda[:i]")
    add("--dry-run", action="store_true", help="only say mpp, windows, tokens, bytes of each slide")


def add_import_flags(parser) -> None:
    """join the embeddings that TRIDENT or STAMP made at each magnification into slide files"""
    parser.epilog = "example: python data.py import --stamp 5x 10x 20x --mpp 0.25 --out data/mine"
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    for tool in ("--trident", "--stamp"):
        words = "folders of its files, low magnification first"
        source.add_argument(tool, nargs="+", metavar="DIR", help=words)
    add_output_flags(parser)
    add("--encoder", help="its name, where the files say none; of virchow2 the class token is kept")
    add("--mpp", type=number_in(float, 0.1, 4), help="um per level-0 pixel; STAMP does not say it")


def add_split_flags(parser) -> None:
    """write a task table with folds: new ones, CLAM's, or those of Patho-Bench's k=all.tsv"""
    parser.epilog = "example: python data.py split labels.csv --out data/mine/tasks/msi.csv"
    add = parser.add_argument
    add("table", help="CSV or .tsv with columns case_id, slide_id, label; with its splits, if any")
    add("--out", required=True, help="DATA/tasks/<task>.csv")
    add("--label", default="label", metavar="COLUMN", help="the column that holds the label")
    add("--folds", type=number_in(int, 2, 1000), help="new folds, stratified by label (default: 5)")
    add("--clam", metavar="DIR", help="CLAM's folder of splits_0.csv, ...")
    add("--seed", type=NATURAL, default=0, help="new folds follow from it")


def add_verify_flags(parser) -> None:
    """check slide files and task tables; print every finding; exit 1 if there is any"""
    parser.epilog = "example: python data.py verify data/mine"
    parser.add_argument("data", help="DATA folder")


COMMANDS = {
    "synth": (synth_command, add_synth_flags),
    "tile": (tile_command, add_tile_flags),
    "import": (import_command, add_import_flags),
    "split": (split_command, add_split_flags),
    "verify": (verify_command, add_verify_flags),
}


def parse_command(argv, script: str, summary, commands: dict) -> argparse.Namespace:
    """The flags of a command.
    commands: name -> its function, and what adds its flags, whose docstring --help shows."""
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
