"""mixmag data: slide files, the synthetic cohort, the tiler, and the data sets that training reads.

    python data.py synth  --out data/synthetic                                 a cohort with seven planted biomarkers
    python data.py tile   --slides slides/ --out data/mine --encoder texture   whole-slide images -> slide files
    python data.py import --trident 5x 10x 20x --out data/mine                 other tools' embeddings -> slide files
    python data.py verify data/mine                                            checksums, values, tasks, leakage

Shape letters as in mixmag.py, and C cells of a slide, W windows (regions) of it. Lengths in `_px` are level-0 pixels unless
the comment says otherwise; mpp is micrometres per pixel; a place on a lattice is (col, row).
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

import numpy as np
import openslide
import safetensors
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
FIELDS = (
    *TEXT_FIELDS,
    "magnifications",
    "tile_px",
    "mpp",
    "cell_px",
    "origin",
    "width",
    "height",
    "n_bad",
)


@dataclass
class Slide:
    """One slide file, its features left on disk. valid is True where a token holds an embedding."""

    path: Path
    meta: dict
    cells: np.ndarray  # (C, 2) int32: col, row on the lowest magnification's lattice
    valid: np.ndarray  # (C, T) bool
    dim: int
    offset: int  # of the features in the file, bytes
    stamp: tuple  # inode and time of change: a file written anew is mapped anew

    @property
    def slide_id(self) -> str:
        return self.meta["slide_id"]

    @property
    def features(self) -> np.ndarray:
        """(C, T, D) float16, a private memory map of the file: nothing is read before it is looked at, nothing is ever written back."""
        return _map_features(self.path, self.stamp, self.offset, (*self.valid.shape, self.dim))


@functools.lru_cache(maxsize=30000)  # Linux gives a process some 65,000 maps
def _map_features(path, stamp, offset, shape):
    size = offset + 2 * math.prod(shape)
    storage = torch.UntypedStorage.from_file(
        str(path), shared=False, nbytes=size
    )  # unlike numpy's, holds no file descriptor
    return torch.empty(0, dtype=torch.float16).set_(storage, offset // 2, shape).numpy()


def checksum(features, cells, valid, metadata: dict) -> str:
    """sha256 over the tensors' bytes and all metadata but itself."""
    digest = hashlib.sha256()
    for array in (features, cells, valid):
        digest.update(np.ascontiguousarray(array).reshape(-1))
    others = {k: v for k, v in metadata.items() if k != "sha256"}
    digest.update(json.dumps(others, sort_keys=True, separators=(",", ":")).encode("utf-8"))
    return digest.hexdigest()


def write_slide(path, features, cells, valid, meta: dict) -> None:
    """features (C, T, D) float16, cells (C, 2) int32, valid (C, T) bool, meta: every field but format, created and sha256."""
    C, T, _ = features.shape
    if (
        (features.dtype, cells.dtype, valid.dtype) != (np.float16, np.int32, bool)
        or cells.shape != (C, 2)
        or valid.shape != (C, T)
    ):
        raise ValueError(
            "a slide is float16 (C, T, D), int32 (C, 2) and bool (C, T); found "
            f"{features.dtype}{features.shape}, {cells.dtype}{cells.shape}, {valid.dtype}{valid.shape}"
        )
    now = float(os.environ.get("SOURCE_DATE_EPOCH", time.time()))  # reproducible-builds.org
    meta = {
        "format": FORMAT,
        "created": datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds"),
        **meta,
    }
    text = {k: v if k in TEXT_FIELDS else json.dumps(v) for k, v in meta.items()}
    text["sha256"] = checksum(features, cells, valid, text)
    arrays = (("cells", "I32", cells), ("features", "F16", features), ("valid", "BOOL", valid))
    header, end = (
        {"__metadata__": dict(sorted(text.items()))},
        0,
    )  # by hand, because the library writes metadata in random order
    for name, dtype, array in arrays:
        header[name] = {
            "dtype": dtype,
            "shape": array.shape,
            "data_offsets": (end, end := end + array.nbytes),
        }
    raw = json.dumps(header, separators=(",", ":")).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    with whole_file(path) as temporary, open(temporary, "wb") as f:
        f.write(len(raw).to_bytes(8, "little") + raw)
        for *_, array in arrays:
            f.write(np.ascontiguousarray(array).data)


def read_slide(path) -> Slide:
    """Check structure and metadata (not the checksum: `verify` does that). Raises MixmagError saying what is wrong."""
    path = Path(path)
    try:
        with safetensors.safe_open(
            path, "numpy"
        ) as f:  # validates the header against the file's size
            text, names = f.metadata() or {}, set(f.keys())
            if names != {"features", "cells", "valid"}:
                raise MixmagError(
                    f"{path}: expected tensors features, cells, valid; found {sorted(names)}"
                )
            cells, valid = f.get_tensor("cells"), f.get_tensor("valid")
        with open(path, "rb") as f:
            length, status = int.from_bytes(f.read(8), "little"), os.fstat(f.fileno())
            entry = json.loads(f.read(length))["features"]
    except (OSError, safetensors.SafetensorError) as error:
        raise MixmagError(f"{path}: cannot be read as a slide file ({error})") from None
    missing = [k for k in FIELDS if k not in text]
    if missing or text["format"] != FORMAT:
        raise MixmagError(
            f"{path}: not a {FORMAT} file (missing metadata: {missing}, format {text.get('format')!r})"
        )
    try:
        meta = {k: v if k in TEXT_FIELDS else json.loads(v) for k, v in text.items()}
        T = Geometry(1, meta["magnifications"]).tokens_per_cell
    except (ValueError, TypeError) as error:
        raise MixmagError(f"{path}: metadata cannot be read ({error})") from None
    C, shape = len(cells), entry["shape"]
    found = (
        cells.dtype,
        cells.shape,
        valid.dtype,
        valid.shape,
        entry["dtype"],
        shape[:2],
        len(shape),
    )
    if found != (np.int32, (C, 2), np.bool_, (C, T), "F16", [C, T], 3):
        raise MixmagError(
            f"{path}: {meta['magnifications']} and {C} cells ask for features F16 [{C}, {T}, D], cells int32 ({C}, 2), "
            f"valid bool ({C}, {T}); found {entry['dtype']} {shape}, {cells.dtype} {cells.shape}, {valid.dtype} {valid.shape}"
        )
    offset = 8 + length + entry["data_offsets"][0]
    if offset % 2:
        raise MixmagError(
            f"{path}: its features begin at an odd byte, {offset}, which no map of 16-bit numbers can; expected them before `valid`"
        )
    return Slide(path, meta, cells, valid, shape[2], offset, (status.st_ino, status.st_mtime_ns))


def read_slides(data, ids=None, failed: list | None = None) -> list[Slide]:
    """The slides of DATA, by id. All must agree on encoder, width and magnifications: MixmagError names the first that does not. One that
    cannot be read is refused, too, or, where `failed` is given, left out and listed there as (slide_id, stage, reason)."""
    folder = Path(data) / "slides"
    paths = (
        visible_files(folder, "*.safetensors")
        if ids is None
        else [folder / f"{i}.safetensors" for i in sorted(set(ids))]
    )
    absent = [p.stem for p in paths if p.parent != folder or not p.exists()]  # an id is no path
    if not folder.is_dir():
        raise MixmagError(f"{folder}: no such folder; --data names the one above it")
    if absent or not paths:
        raise MixmagError(
            f"{folder}: "
            + (
                f"{len(absent)} slides have no file, such as {absent[0]!r}"
                if absent
                else "no slide files (make them with data.py tile, or data.py synth)"
            )
        )
    slides = []
    for path in progress(paths, desc="slides", leave=False):
        try:
            slides.append(read_slide(path))
        except MixmagError as error:
            if failed is None or len(failed) + 1 == len(paths):
                raise
            failed.append((path.stem, "read", str(error)))
    for s in slides:
        if s.slide_id != s.path.stem:
            raise MixmagError(
                f"{s.path}: holds slide {s.slide_id!r}; a slide file is named after its slide"
            )
        if embedding_signature(s) != embedding_signature(slides[0]):
            raise MixmagError(
                f"{s.path}: made with {embedding_signature(s)}, but {slides[0].slide_id} with {embedding_signature(slides[0])}"
            )
    return slides


def already_done(path, wanted: dict, mpp: float | None) -> bool:
    """Whether this slide file is there. Raises MixmagError where it is, but its metadata are not `wanted` (an entry of None may be anything there),
    or its mpp is more than 2 % off the one that the user gives, if any."""
    if not Path(path).exists():
        return False
    found = read_slide(path).meta
    wanted = {k: v for k, v in wanted.items() if v is not None}
    there = {k: found.get(k) for k in wanted}
    if there != wanted:
        raise MixmagError(
            f"{path} was made with {there}, now asked for {wanted}; give another --out"
        )
    if mpp is not None and not abs(mpp - found["mpp"]) <= 0.02 * found["mpp"]:
        raise MixmagError(
            f"{path} was made at {found['mpp']:g} um/px, now asked for {mpp:g}; give another --out"
        )
    return True


def embedding_signature(slide: Slide) -> str:
    """What slides must share to be used together."""
    return f"encoder {slide.meta['encoder']}, width {slide.dim}, magnifications {slide.meta['magnifications']}"


# ---------------------------------------------------------------------------- windows and data sets


def magnification_entries(k: int) -> slice:
    """Where the tokens of magnification k (0 is the lowest) stand among those of a cell."""
    return slice((4**k - 1) // 3, (4 ** (k + 1) - 1) // 3)


def windows(
    cells: np.ndarray, region: int, stride: int, min_cover: float
) -> tuple[np.ndarray, np.ndarray]:
    """Windows of region x region cells that hold at least the share `min_cover` of their cells.

    cells (C, 2) -> (W, R*R) the row of each of the window's cells in `cells`, row-major, -1 where there is none, and (W, 2) the
    windows' corners (col, row), row-major. Windows lie on one lattice of `stride`, or at every cell offset with stride 1.
    """
    if not len(cells):
        return np.zeros((0, region * region), np.int64), np.zeros((0, 2), np.int64)
    cells = cells.astype(np.int64)
    inside = np.stack(
        np.divmod(np.arange(region * region), region)[::-1], axis=1
    )  # (R*R, 2) col, row

    def key(places):
        return (places[..., 1] << 32) + places[..., 0]

    corners = (cells[:, None] - inside).reshape(-1, 2)
    corners = corners[(corners % stride == 0).all(axis=1)]
    corners = corners[np.unique(key(corners), return_index=True)[1]]
    order = np.argsort(key(cells), kind="stable")
    wanted, have = key(corners[:, None] + inside), key(cells)[order]  # (W, R*R), (C,)
    at = np.searchsorted(have, wanted).clip(max=len(have) - 1)
    rows = np.where(have[at] == wanted, order[at], -1)
    kept = (rows >= 0).mean(axis=1) >= min_cover
    return rows[kept], corners[kept]


def covering_windows(
    cells: np.ndarray, region: int, min_cover: float
) -> tuple[np.ndarray, np.ndarray]:
    """`windows` side by side, as inference takes them. Where none holds `min_cover` of its cells, those that hold `min_cover` of what the fullest
    does, so that slides smaller than a window, and narrow ones, are usable."""
    rows, corners = windows(cells, region, region, 0.0)
    held = (rows >= 0).sum(axis=1)
    kept = held / region**2 >= min_cover
    if not kept.any():
        kept = held >= min_cover * held.max(initial=0)
    return rows[kept], corners[kept]


def describe_uncovered(used: int, there_are: int) -> str:
    """For the log: how many cells lie in no window that counts; nothing where all are used."""
    return (
        f"; {there_are - used} of {there_are} cells lie in windows that --min-cover leaves out"
        if used < there_are
        else ""
    )


def gather(slide: Slide, rows: np.ndarray, entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """rows (W, R*R) of `windows`, entries (n,) or (W, n): which of a window's R*R*T cell-major entries -> x (W, n, D) float16 and
    valid (W, n) bool. One gather from the memory map; nothing else is read."""
    token, valid = token_index(slide, rows, entries)
    x = slide.features.reshape(-1, slide.dim)[token]
    x[~valid] = 0
    return x, valid


def token_index(
    slide: Slide, rows: np.ndarray, entries: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The row of the slide's (C*T, D) embeddings that `gather` takes for each token (W, n), and whether it is valid."""
    token, inside = token_rows(rows, entries, slide.valid.shape[1])
    return token, inside & slide.valid.reshape(-1)[token]


def token_rows(rows: np.ndarray, entries: np.ndarray, T: int) -> tuple[np.ndarray, np.ndarray]:
    """rows (W, R*R) of `windows`, entries (n,) or (W, n) of a window -> (W, n) rows of a slide's (C*T, D) embeddings, and which of them lie in a cell
    that the slide has."""
    cell = np.take_along_axis(
        rows, np.broadcast_to(entries // T, (len(rows), entries.shape[-1])), axis=1
    )  # (W, n)
    return np.maximum(cell * T + entries % T, 0), cell >= 0


def as_batch(x: np.ndarray, valid: np.ndarray, device="cpu") -> tuple:
    """Tensors; the validity mask is None where nothing is invalid, and then no mask is ever built."""
    return torch.from_numpy(x).to(device), None if valid.all() else torch.from_numpy(valid).to(
        device
    )


def to_device(batch: dict, device) -> dict:
    return {
        k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()
    }


def pinned(batch: dict, device) -> dict:
    """In memory that a GPU copies from by itself, where the device is one."""
    return (
        {k: v.pin_memory() if torch.is_tensor(v) else v for k, v in batch.items()}
        if torch.device(device).type == "cuda"
        else batch
    )


class RegionDataset:
    """Random windows for pretraining, turned, with what is to be removed. Sample i is a function of (seed, i) alone: epoch i // W
    is a permutation of all W windows.

    views 2 draws the second window from a `source` x `source` window around the first (paper 3.1.2): of all windows inside a
    random source window that holds the first one, which is thereby a random one of them too. mask is the removal ratio.
    """

    def __init__(
        self,
        slides,
        geometry: Geometry,
        seed: int,
        mask: float,
        views: int = 1,
        source: int = 0,
        stride: int = 1,
        min_cover: float = 1.0,
        turn: bool = True,
    ):
        self.slides, self.geometry, self.seed, self.views, self.turn = (
            slides,
            geometry,
            seed,
            views,
            turn,
        )
        self.removed_tokens = removal_count(geometry.num_tokens, mask)  # M
        self.reach = (source or geometry.region) - geometry.region
        self.order, self.turns = geometry.cell_order().numpy(), geometry.dihedral().numpy()
        found = [windows(s.cells, geometry.region, stride, min_cover) for s in slides]
        self.rows, self.corners = (np.concatenate(part) for part in zip(*found))
        self.slide_of = np.repeat(np.arange(len(slides)), [len(rows) for rows, _ in found])  # (W,)
        self.first = np.searchsorted(
            self.slide_of, np.arange(len(slides) + 1)
        )  # a slide's first window
        self.all_valid = all(s.valid.all() for s in slides)
        count = len(
            self.rows
        )  # two epochs' orders are kept: threads that work ahead may be in the next one
        self.order_of = functools.lru_cache(2)(
            lambda epoch: np.random.default_rng([seed, epoch]).permutation(count)
        )
        self.store = self.gathered = None

    def hold(self, device) -> None:
        """From now on `__getitems__` says which embeddings are wanted, and `fetch` gathers them from one tensor on the device, always to the
        same place. Raises MixmagError where they do not fit."""
        counts = [s.valid.size for s in self.slides]
        try:
            self.store = torch.empty(
                sum(counts), self.slides[0].dim, dtype=torch.float16, device=device
            )
        except RuntimeError as error:  # torch's own out-of-memory error is one
            size = 2e-9 * sum(counts) * self.slides[0].dim
            raise MixmagError(
                f"out of memory: the embeddings of {len(counts)} slides take {size:.1f} GB; leave out --in-memory ({error})"
            ) from None
        for part, slide in progress(
            list(zip(self.store.split(counts), self.slides)), desc="embeddings", leave=False
        ):
            part.copy_(torch.from_numpy(slide.features.reshape(part.shape)))
        self.begins = np.cumsum([0, *counts[:-1]])  # a slide's first row in the store
        self.gathered = self.store.new_empty(0)

    def batches(self, loads: list, threads: int, device):
        """Yields `fetch` of each of the loads, lists of samples, while threads make the next ones. On a processor a batch is valid until the next
        one is asked for: it lies where an earlier one lay, for memory fresh from the system costs several times what the gather does."""
        shape = (
            self.views * max(map(len, loads), default=0),
            self.geometry.num_tokens,
            self.slides[0].dim,
        )
        reused = torch.device(device).type == "cpu" and self.store is None
        room = [
            torch.empty(shape, dtype=torch.float16) if reused else None
            for _ in range(2 * threads or 1)
        ]

        def make(numbered):
            number, indices = numbered
            return pinned(self.__getitems__(indices, room[number % len(room)]), device)

        yield from (
            self.fetch(batch, device) for batch in prefetch(make, enumerate(loads), threads)
        )

    def fetch(self, batch: dict, device) -> dict:
        """A batch of `__getitems__` on the device; embeddings come from where they are kept."""
        batch = to_device(batch, device)
        if self.store is not None:
            rows, batch["x"] = (
                batch["x"],
                self.gathered.resize_(*batch["x"].shape, self.store.shape[1]),
            )
            torch.index_select(
                self.store, 0, rows.flatten(), out=batch["x"].view(-1, self.store.shape[1])
            )
        return batch

    def __len__(self) -> int:
        return len(self.slide_of)

    def chances(self, indices: np.ndarray) -> np.ndarray:
        """Samples (B,) -> (views, B, N + 4 or a few more) numbers in 0..1. Sample i has the i-th stretch of one random stream to itself."""
        calls = -(
            -(self.geometry.num_tokens + 4) // 4
        )  # of Philox for a view; each makes four numbers
        runs = np.split(indices, np.flatnonzero(np.diff(indices) != 1) + 1)
        streams = [
            np.random.Generator(
                np.random.Philox(key=self.seed).advance(int(run[0]) * self.views * calls)
            )
            for run in runs
        ]
        return np.concatenate(
            [s.random((len(run), self.views, 4 * calls)) for s, run in zip(streams, runs)]
        ).swapaxes(0, 1)

    def partner(self, window: int, chance: np.ndarray) -> int:
        """The second view of a window; chance (3,)."""
        slide, corner = self.slide_of[window], self.corners[window]
        mine = slice(self.first[slide], self.first[slide + 1])
        start = corner - (chance[:2] * (self.reach + 1)).astype(int)  # of the source window
        inside = (
            ((self.corners[mine] >= start) & (self.corners[mine] <= start + self.reach))
            .all(axis=1)
            .nonzero()[0]
        )
        return int(self.first[slide] + inside[int(chance[2] * len(inside))])

    def draw(self, indices) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Samples (B,) -> for each view the window (views, B), how it is turned (views, B) and the tokens that go (views, B, M)."""
        indices, N = np.asarray(indices), self.geometry.num_tokens
        chance = self.chances(indices)
        first = [
            self.order_of(epoch)[position]
            for epoch, position in zip(*np.divmod(indices, len(self)))
        ]
        window = np.array(
            [
                first,
                *(
                    [self.partner(*pair) for pair in zip(first, part)]
                    for part in chance[1:, :, N + 1 : N + 4]
                ),
            ]
        )
        turn = (8 * self.turn * chance[..., N]).astype(int)
        return window, turn, chance[..., :N].argsort(axis=-1)[..., : self.removed_tokens]

    def tokens_of(self, window, turn) -> tuple[np.ndarray, np.ndarray]:
        """(B,) windows and how each is turned -> (B, N) the rows of its slide's (C*T, D) embeddings, and which of them are valid."""
        token, inside = token_rows(
            self.rows[window], self.order[self.turns[turn]], self.geometry.tokens_per_cell
        )
        if self.all_valid:
            return token, inside
        return token, inside & np.stack(
            [
                self.slides[s].valid.reshape(-1)[rows]
                for s, rows in zip(self.slide_of[window], token)
            ]
        )

    def read(self, window, token, valid, out: torch.Tensor | None) -> torch.Tensor:
        """(B, N, D) float16 from the slides' files, at the beginning of `out` where there is one."""
        D = self.slides[0].dim
        x = (
            torch.empty((*token.shape, D), dtype=torch.float16)
            if out is None
            else out[: len(token)]
        )
        for slide, rows, part in zip(self.slide_of[window], token, x.numpy()):
            np.take(
                self.slides[slide].features.reshape(-1, D), rows, axis=0, out=part, mode="clip"
            )  # clip: straight into it
        if not valid.all():
            x.numpy()[~valid] = 0
        return x

    def __getitems__(self, indices, out: torch.Tensor | None = None) -> dict:
        """x (B, N, D) float16, in `out` where it is given, or after `hold` the rows (B, N) that stand for it, removed (B, M), valid (B, N) or None,
        slide (B,); with two views each has a leading axis of 2."""
        window, turn, removed = self.draw(indices)
        axes, window = window.shape[self.views == 1 :], window.reshape(-1)
        token, valid = self.tokens_of(window, turn.reshape(-1))  # (views B, N)
        x = (
            self.read(window, token, valid, out)
            if self.store is None
            else torch.from_numpy(token + self.begins[self.slide_of[window], None])
        )
        batch = {
            "x": x,
            "removed": torch.from_numpy(removed.reshape(len(window), -1)),
            "valid": None if valid.all() else torch.from_numpy(valid),
            "slide": torch.from_numpy(self.slide_of[window]),
        }
        return {k: v if v is None else v.unflatten(0, axes) for k, v in batch.items()}


class CaseDataset:
    """The cases of a split as ragged bags: a case has slides, a slide has regions, a region the chosen tokens.

    index (n,): which of a region's tokens are read (Geometry.select). rows and corners: each slide's regions, as in `covering`, that hold a
    valid token. Slides without one, and cases without such slides, are left out and named in `dropped`; left_out says how many cells lie in none.
    labels: each case's, 0 or 1.
    held: encoder outputs made before, slide_id -> (array (W, n or 1, d), valid (W, n)), which are given in place of the slide's embeddings.
    """

    def __init__(
        self, slides: dict, cases: list, geometry: Geometry, index, min_cover: float = 0.5
    ):
        self.slides, self.entries = slides, geometry.cell_order().numpy()[np.asarray(index)]
        self.rows, self.corners, self.cases, self.dropped, self.held, used, there_are = (
            {},
            {},
            [],
            [],
            {},
            0,
            0,
        )
        for case in cases:
            for slide_id in case.slide_ids:
                rows, corners = covering_windows(slides[slide_id].cells, geometry.region, min_cover)
                there = token_index(slides[slide_id], rows, self.entries)[1].any(axis=1)
                used, there_are = (
                    used + (rows[there] >= 0).sum(),
                    there_are + len(slides[slide_id].cells),
                )
                if there.any():
                    self.rows[slide_id], self.corners[slide_id] = rows[there], corners[there]
            usable = [i for i in case.slide_ids if i in self.rows]
            self.dropped += [i for i in case.slide_ids if i not in self.rows]
            if usable:
                self.cases.append(Case(case.case_id, case.label, case.split, usable))
        self.left_out, self.labels = (
            describe_uncovered(used, there_are),
            [case.label for case in self.cases],
        )

    def __len__(self) -> int:
        return len(self.cases)

    def __getitems__(self, indices) -> dict:
        """x (W, n, D) float16, or with `held` what stands for it, valid (W, n) or None, regions (S,) of each slide, case (S,) which of the
        batch's cases it belongs to, label (cases,) float; nothing for no indices."""
        if not len(indices):
            return {}
        chosen = [self.cases[i] for i in indices]
        slide_ids = [i for case in chosen for i in case.slide_ids]
        parts = [
            self.held.get(i) or gather(self.slides[i], self.rows[i], self.entries)
            for i in slide_ids
        ]
        x, valid = as_batch(*(np.concatenate(part) for part in zip(*parts)))
        return {
            "x": x,
            "valid": valid,
            "held": bool(self.held),
            "slide_ids": slide_ids,
            "regions": torch.tensor([len(self.rows[i]) for i in slide_ids]),
            "case": torch.repeat_interleave(
                torch.arange(len(chosen)), torch.tensor([len(c.slide_ids) for c in chosen])
            ),
            "label": torch.tensor([float(case.label) for case in chosen]),
        }


def feature_statistics(
    slides, levels=None, limit: int = 20000
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """mean (D,) and std (D,) over the tokens of evenly spread cells (at most about `limit`), and (K, D) the mean direction of each
    magnification, of embeddings scaled to length 1: the constant prediction that minimises Eq. 2. levels: the only ones that count, 0 the lowest."""
    share = max(1, -(-sum(len(s.cells) for s in slides) // limit))
    count, total, squares, per_level = 0, 0.0, 0.0, 0
    starts = (
        Geometry(1, slides[0].meta["magnifications"]).cell_table()[:, 0].numpy()
    )  # (T,) level of each entry
    counted = np.isin(starts, range(len(starts)) if levels is None else levels)
    sums = np.zeros((starts.max() + 1, slides[0].dim))
    for slide in progress(slides, desc="statistics", leave=False):
        x, valid = (
            np.asarray(slide.features[::share], np.float64),
            slide.valid[::share] & counted,
        )  # (C', T, D), (C', T)
        tokens = x[valid]
        if not np.isfinite(tokens).all():
            raise MixmagError(
                f"{slide.path}: holds NaN or infinite features; data.py verify says where"
            )
        count, total, squares = (
            count + len(tokens),
            total + tokens.sum(0),
            squares + (tokens**2).sum(0),
        )
        x = np.where(valid[..., None], x, 0)
        unit = x / np.linalg.norm(x, axis=-1, keepdims=True).clip(min=1e-12)
        np.add.at(sums, starts, unit.sum(axis=0))
        per_level = per_level + np.bincount(starts, valid.sum(axis=0))
    mean = total / max(count, 1)
    std = np.sqrt((squares / max(count, 1) - mean**2).clip(min=0))
    return tuple(
        torch.from_numpy(a).float() for a in (mean, std, sums / np.maximum(per_level, 1)[:, None])
    )


# --------------------------------------------------------------------------------- tasks and splits

SPLITS = ("train", "tune", "test")


@dataclass
class Case:
    case_id: str
    label: int
    split: str
    slide_ids: list


def task_names(data) -> list[str]:
    return [p.stem for p in visible_files(Path(data) / "tasks", "*.csv")]


def task_findings(path) -> tuple[list[Case], list[str]]:
    """The cases of a task table, and everything that is wrong with it."""
    findings, cases, seen = [], {}, set()
    for row in read_csv(path, ("case_id", "slide_id", "label", "split")):
        where = f"{path}: line {row['line']}: "
        if not row["case_id"] or not row["slide_id"]:
            findings.append(f"{where}case_id or slide_id is empty")
        elif "/" in row["slide_id"] or row["slide_id"] in (".", ".."):
            findings.append(
                f"{where}slide_id {row['slide_id']!r} is a path, expected the name of a file in slides/ without its suffix"
            )
        elif row["label"] not in ("0", "1"):
            findings.append(
                f"{where}label of case {row['case_id']!r} is {row['label']!r}, expected 0 or 1"
            )
        elif row["split"] not in SPLITS:
            findings.append(
                f"{where}split of case {row['case_id']!r} is {row['split']!r}, expected one of {', '.join(SPLITS)}"
            )
        elif row["slide_id"] in seen:
            findings.append(f"{where}slide {row['slide_id']!r} stands in more than one row")
        else:
            seen.add(row["slide_id"])
            case = cases.setdefault(
                row["case_id"], Case(row["case_id"], int(row["label"]), row["split"], [])
            )
            if case.split != row["split"]:
                findings.append(
                    f"{where}case {row['case_id']!r} is in two splits, {case.split} and {row['split']}"
                )
            if case.label != int(row["label"]):
                findings.append(
                    f"{where}case {row['case_id']!r} has two labels, {case.label} and {row['label']}"
                )
            case.slide_ids.append(row["slide_id"])
    return list(cases.values()), findings


def read_task(data, task) -> list[Case]:
    """Raises MixmagError for an unknown task, or with the first of the table's faults and their number."""
    path = Path(data) / "tasks" / f"{task}.csv"
    if task not in task_names(data):
        raise MixmagError(f"{path}: no such task; found {', '.join(task_names(data)) or 'none'}")
    cases, findings = task_findings(path)
    if findings:
        raise MixmagError(
            findings[0]
            + (f" (and {len(findings) - 1} more: see data.py verify)" if findings[1:] else "")
        )
    return cases


def evaluation_slides(data) -> set:
    """All slides of the cases that are in the tune or test split of any task: pretraining sees them only where pretrain.csv names them."""
    return evaluation_slides_of([c for task in task_names(data) for c in read_task(data, task)])


def evaluation_slides_of(cases: list) -> set:
    """Those of cases that any of `cases` puts into a tune or test split, by whichever task."""
    held = {c.case_id for c in cases if c.split != "train"}
    return {s for c in cases if c.case_id in held for s in c.slide_ids}


def pretraining_ids(data) -> list[str]:
    """The slides of pretrain.csv; without it, every slide that is in no tune or test split."""
    listed = Path(data) / "pretrain.csv"
    if listed.exists():
        return list(dict.fromkeys(row["slide_id"] for row in read_csv(listed, ("slide_id",))))
    held = evaluation_slides(data)
    return [
        p.stem for p in visible_files(Path(data) / "slides", "*.safetensors") if p.stem not in held
    ]


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
            reasons = "another format, a TIFF in strips or big-endian, or cut short?"
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
    for entry in tiff.pages:
        page = entry.aspage()
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
    where it cannot be read. It is read in blocks, so that memory does not grow with the slide. A
    block that fails is quartered, down to an eighth of its side, then read from a finer level."""
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
    """The user's mask of a slide: the file `place`, or its <slide_id>.png or .geojson."""
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
    magnifications: tuple
    cell_px: float
    origin: tuple
    level: int  # the coarsest one that is fine enough for every magnification
    downsample: float
    lines: list  # (cols + 1,), (rows + 1,) int: the lattice in the level's pixels
    drift: float  # the largest distance of a line from the unrounded lattice, um
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
    downsample = reader.downsamples[level]
    lines = []
    drift = 0.0
    for start, side, size in zip(bounds[:2], bounds[2:], reader.level_sizes[level], strict=True):
        cells = int((side + 1) / cell_px)  # a last line may be rounded, too
        if cells == 0:
            cell = f"one cell of {cell_px:g} px ({cell_px * mpp:g} um)"
            raise MixmagError(f"its {bounds[2]} x {bounds[3]} px are less than {cell}")
        exact = start + cell_px * np.arange(cells + 1)
        lines.append(np.round(exact / downsample).clip(max=size).astype(int))
        drift = max(drift, np.abs(lines[-1] * downsample - exact).max() * mpp)
    if drift > MAX_DRIFT * finest:
        found = f"edges would lie {drift:.3g} um off, more than {MAX_DRIFT * finest:g} um"
        sizes = f"{reader.level_sizes[level]} px) does not fit level 0 ({reader.size} px)"
        raise MixmagError(f"level {level} ({sizes}: {found}")
    picture, mask = tissue_mask(reader, mpp, find_mask(reader.path, settings.mask))
    plan = TilePlan(
        mpp=mpp,
        mpp_source=source,
        magnifications=settings.magnifications,
        cell_px=cell_px,
        origin=(float(bounds[0]), float(bounds[1])),
        level=level,
        downsample=downsample,
        lines=lines,
        drift=drift,
        thumbnail=picture,
        mask=mask,
        mask_scale=np.divide(mask.shape[::-1], reader.size),
    )
    plan.choose_windows(settings.region, settings.min_tissue)
    return plan


def check_nothing_lost(plan: TilePlan, alpha: np.ndarray, col: int, row: int) -> None:
    """Notes a cell with pixels that the file does not have (alpha (h, w) is 0 there). Raises
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
    # The level's pixels, rounded, along a pixel of the finest magnification.
    shrink = max(1, round(10.0 / plan.magnifications[-1] / plan.mpp / plan.downsample))
    side = TILE_PX * 2 ** (K - 1) * shrink
    if pixels.shape[:2] != (side, side):
        pixels = np.require(pixels, requirements="W")  # torch takes no read-only array
        planes = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)  # (1, 4, h, w)
        planes = F.interpolate(planes, size=(side, side), mode="bilinear", antialias=True)
        pixels = planes[0].permute(1, 2, 0).numpy()
    picture = Image.frombuffer("RGBX", (side, side), pixels, "raw", "RGBX", 0, 1)
    tiles = np.empty(((4**K - 1) // 3, TILE_PX, TILE_PX, 3), np.uint8)
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
    """A bar of a round length, lower left in a picture whose axis is in um and shows `across`."""
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
            tiles = np.stack([read_cell(reader, plan, *cell) for cell in cells_of(window)])
            draw_tiles(axes[1:], plan, window, tiles)
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
        pixels = tiles[:, magnification_entries(k)]  # (C, n * n, 224, 224, 3)
        pixels = pixels.reshape(rows, cols, n, n, TILE_PX, TILE_PX, 3)
        pixels = pixels.transpose(0, 2, 4, 1, 3, 5, 6)  # (rows, n, 224, cols, n, 224, 3)
        picture = Image.fromarray(pixels.reshape(rows * n * TILE_PX, cols * n * TILE_PX, 3))
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
    sides = np.concatenate([np.diff(lines) for lines in plan.lines])
    cell_mpp = sides * plan.downsample * plan.mpp / TILE_PX  # of the lowest magnification
    for k, magnification in enumerate(plan.magnifications):
        found = f"{cell_mpp.min() / 2**k:.4g} to {cell_mpp.max() / 2**k:.4g}"
        tokens.append(f"{magnification}x {plan.cell_count * 4**k}")
        effective.append(f"{magnification}x {10 / magnification:g} ({found})")
    whole = sum(cols * rows == region**2 for _, _, cols, rows in plan.windows)
    total = plan.cell_count * (4 ** len(tokens) - 1) // 3
    report = (
        f"{reader.path.stem}: {plan.mpp:.4g} um/px ({plan.mpp_source}), level {plan.level} of "
        f"{len(reader.level_sizes)} (downsample {plan.downsample:.6g}), {len(plan.windows)} of "
        f"{plan.candidates} windows hold tissue ({whole} with all {region**2} cells) and "
        f"{plan.covered:.0%} of it, {plan.cell_count} cells, {total} tokens ({', '.join(tokens)})\n"
        f"    drift: edges keep to the lattice within {plan.drift:.2g} um; "
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
    no (B, dim) of finite floats in float16's range; without dim, of one width in all batches."""
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

    mean: torch.Tensor
    std: torch.Tensor

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
    """With the weights of a file, else of the Hugging Face hub. Raises MixmagError."""
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
    batch: list[np.ndarray] = []  # tiles of cells, each (T, 224, 224, 3)
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
    paths: list[Path] = []
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

IMPORT_SECONDS = 60  # assumed: a slide that takes longer, and longer than 1 s per MiB, hangs
SNAP = 0.1  # assumed: how far STAMP's tiles may be off their lattice, in tiles
ENOUGH_TILES = 16  # assumed: among so many tiles of a slide two are neighbours


@dataclass
class Tiles:
    """What one file of another tool holds: one slide at one magnification. Its unit is level-0 pixels (TRIDENT) or micrometres (STAMP)."""

    features: np.ndarray  # (n, D) float16
    corners: np.ndarray  # (n, 2) float64: x, y of the top-left corners
    side: float  # of a tile
    tile_px: int
    magnification: float
    encoder: str
    name: str | None  # of the slide, where the file says it
    size: tuple  # (width, height) of the slide in level-0 px, None where not said


def plain_value(item, name: str, kind=(int, float), needed: bool = False):
    """An attribute of an HDF5 item: a number >= 0, or a text where kind is str; None where it is absent."""
    value = None
    if name in item.attrs:
        value = item.attrs[name] if item.attrs.get_id(name).shape in ((), (1,)) else "an array"
        value = value.item() if hasattr(value, "item") else value
        value = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    value = None if value == "None" else value  # TRIDENT's way to write it
    fits = isinstance(value, kind) and (
        value.isprintable() if kind is str else 0 <= value < math.inf
    )
    if (needed and not value) or (value is not None and not fits):
        raise MixmagError(
            f"attribute {name} is {value!r}, expected {'a text' if kind is str else 'a number'}; "
            f"found {', '.join(item.attrs) or 'none'}"
        )
    return value


def plain_array(f, name: str, columns: int | None = None):
    """The data set (n, columns) of an open HDF5 file, unread. Raises MixmagError unless it is plain numbers that lie in this very file,
    whole and unfiltered: so what is read later is no larger than the file."""
    import h5py  # wanted only where other tools' files are read

    links, key = f.id.links, name.encode()
    if (
        not links.exists(key)
        or links.get_info(key).type != h5py.h5l.TYPE_HARD
        or not isinstance(f[name], h5py.Dataset)
    ):
        raise MixmagError(
            f"holds no data set {name!r} of its own; found {', '.join(map(str, list(f)[:9])) or 'nothing'}"
        )
    d = f[name]
    made, there, wanted = (
        d.id.get_create_plist(),
        d.id.get_storage_size(),
        math.prod(d.shape or ()) * d.dtype.itemsize,
    )
    if (
        d.dtype.kind not in ("iuf" if columns else "f")
        or d.dtype.itemsize > 8
        or d.ndim != 2
        or d.shape[1] != (columns or d.shape[1] or 1)
    ):
        raise MixmagError(
            f"{name} is {d.dtype} {d.shape}, expected {'numbers' if columns else 'floating-point numbers'} (n, {columns or 'D'})"
        )
    if made.get_nfilters():
        raise MixmagError(
            f"{name} is stored through filter {made.get_filter(0)[0]}, expected none; h5repack -f NONE rewrites the file"
        )
    if (
        made.get_layout() == h5py.h5d.VIRTUAL
        or made.get_external_count()
        or wanted > min(there, os.path.getsize(f.filename))
    ):
        raise MixmagError(
            f"{name} claims {wanted} bytes, {d.dtype} {d.shape}, of which {there} are stored here"
        )
    return d


def embeddings(d, encoder: str | None, job: dict) -> dict:
    """Tiles' features and encoder from a data set (n, D). Virchow2's 2560 numbers, class token and mean patch token, are cut to the class token."""
    asked, cut = job["encoder"], job["class_token"]
    if (not encoder and not asked) or (encoder and asked and encoder != asked):
        raise MixmagError(
            f"says its encoder is {encoder!r}, --encoder says {asked!r}"
            if encoder
            else "does not name its encoder: say it with --encoder"
        )
    if (d.shape[1] == 2560 and cut is None and encoder != "virchow2") or (
        cut and d.shape[1] != 2560
    ):
        raise MixmagError(
            f"holds {d.shape[1]} numbers a tile and says its encoder is {encoder!r}: "
            + (
                "--class-token cuts 2560"
                if cut
                else "--class-token keeps the first 1280 as for virchow2, --no-class-token all"
            )
        )
    with np.errstate(over="ignore"):
        half = (d[:, :1280] if d.shape[1] == 2560 and cut is not False else d[...]).astype(
            np.float16
        )
    bad = ~np.isfinite(half).all(axis=1) | ~half.any(
        axis=1
    )  # HDF5 reads zeros where a row was never written, or its index is damaged
    if bad.any():
        raise MixmagError(
            f"NaN, values beyond float16, or nothing but zeros in {bad.sum()} of {len(bad)} tiles, first in row {bad.argmax()}"
        )
    return {"features": half, "encoder": encoder or asked}


def read_trident(f, job: dict) -> Tiles:
    """features (n, D), coords (n, 2) in level-0 px with all attributes on it. Layout: trident/IO.py and wsi_objects/WSI.py of mahmoodlab/TRIDENT."""
    d, coords = plain_array(f, "features"), plain_array(f, "coords", 2)
    tile_px, side, magnification = (
        plain_value(coords, k, needed=True)
        for k in ("patch_size", "patch_size_level0", "target_magnification")
    )
    power, overlap, *size = (
        plain_value(coords, k)
        for k in ("level0_magnification", "overlap", "level0_width", "level0_height")
    )
    if overlap:
        raise MixmagError(
            f"overlap is {overlap:g}, expected 0: tiles that overlap are on no lattice"
        )
    if power and abs(tile_px * power / magnification - side) > 1:
        raise MixmagError(
            f"patch_size_level0 is {side:g}, but {tile_px:g} px at {magnification:g}x of {power:g}x are "
            f"{tile_px * power / magnification:g}"
        )
    return Tiles(
        **embeddings(d, plain_value(d, "encoder", str), job),
        corners=coords[...].astype(np.float64),
        side=math.floor(side),
        tile_px=tile_px,
        magnification=magnification,
        name=plain_value(coords, "name", str),
        size=tuple(size),
    )


def read_stamp(f, job: dict) -> Tiles:
    """feats (n, D), coords (n, 2) in micrometres, attributes on the file. Layout: src/stamp/preprocessing/__init__.py of KatherLab/STAMP."""
    unit, what = plain_value(f, "unit", str), plain_value(f, "feat_type", str)
    if unit != "um" or what not in (None, "tile"):
        raise MixmagError(
            f"attribute unit is {unit!r}, feat_type {what!r}, expected 'um' and 'tile': a file of STAMP before 2.1, or not of tiles"
        )
    d, coords = plain_array(f, "feats"), plain_array(f, "coords", 2)
    side, tile_px = (plain_value(f, k, needed=True) for k in ("tile_size_um", "tile_size_px"))
    return Tiles(
        **embeddings(d, plain_value(f, "extractor", str), job),
        corners=coords[...].astype(np.float64),
        side=side,
        tile_px=tile_px,
        magnification=round(10 * tile_px / side, 9),
        name=None,
        size=(None, None),
    )


def read_tiles(path: str, job: dict) -> Tiles:
    import h5py

    try:
        with h5py.File(path, "r") as f:
            tiles = {"trident": read_trident, "stamp": read_stamp}[job["tool"]](f, job)
    except (
        Exception
    ) as error:  # damage shows as any of a dozen types, and may speak in control characters
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise MixmagError(
            f"{path}: {''.join(c if c.isprintable() else '?' for c in said)}"
        ) from None
    if len(tiles.features) != len(tiles.corners) or not np.isfinite(tiles.corners).all():
        raise MixmagError(
            f"{path}: {len(tiles.features)} embeddings at {len(tiles.corners)} places, expected as many, and finite places"
        )
    tiles.magnification, tiles.tile_px = (
        int(v) if v == int(v) else v for v in (tiles.magnification, tiles.tile_px)
    )
    return tiles


def check_same_slide(levels: list) -> None:
    """Raises MixmagError where a slide's files are not of one slide, one encoder and successive doublings."""
    if any(b.magnification != 2 * a.magnification for a, b in zip(levels, levels[1:])):
        raise MixmagError(
            f"its files are at {', '.join(f'{t.magnification}x' for t in levels)}; expected doublings in the folders' order"
        )
    facts = "patch size", "encoder", "slide's name", "slide's size", "width of an embedding"
    for what, *found in zip(
        facts, *((t.tile_px, t.encoder, t.name, t.size, t.features.shape[1]) for t in levels)
    ):
        if any(value != found[0] for value in found):
            raise MixmagError(f"its files do not agree on the {what}: {', '.join(map(str, found))}")
    if all(levels[0].size) and any((t.corners >= t.size).any() for t in levels):
        raise MixmagError(
            f"it has tiles that begin beyond its {levels[0].size[0]} x {levels[0].size[1]} px"
        )


def trident_cell(levels: list) -> int:
    """A cell's side in level-0 px. TRIDENT rounds a tile's side when it cuts and floors it in the attribute (447.9 px are cut as 448, and the
    attribute says 447), so the side is the attribute or one more, whichever has the tiles on its lattice. Raises MixmagError where the
    magnifications do not nest."""
    shrink = [2 ** (len(levels) - 1 - k) for k in range(len(levels))]
    nested = [
        s
        for s in (levels[-1].side, levels[-1].side + 1)
        if all(0 <= s * b - t.side <= 1 for t, b in zip(levels, shrink))
    ]
    if not nested:
        raise MixmagError(
            f"its tiles are {', '.join(f'{t.side} px at {t.magnification}x' for t in levels)}; expected each half the one before"
        )
    return shrink[0] * min(
        nested,
        key=lambda s: sum(int((t.corners % (s * b) != 0).sum()) for t, b in zip(levels, shrink)),
    )


def lattice_positions(t: Tiles, side: float, snap: float, drift: float) -> tuple[np.ndarray, float]:
    """(n, 2) col, row of the tiles on the lattice of `side`, and the largest distance from it. Raises MixmagError for tiles further off than
    snap + drift * col or row, in sides, for two in one place, and for a spacing that is not the side."""
    exact = t.corners / side
    place = np.rint(exact)
    wrong = ((np.abs(exact - place) > snap + drift * place) | (place < 0) | (place >= 2**31)).any(
        axis=1
    )
    if wrong.any():
        raise MixmagError(
            f"{t.magnification}x: {wrong.sum()} of {len(wrong)} tiles are off the lattice of {side:g}, first "
            f"{t.corners[wrong][0].tolist()}"
        )
    place = place.astype(np.int64)
    step = int(np.gcd.reduce(place.reshape(-1))) if len(place) >= ENOUGH_TILES else 1
    twice = len(place) - len(np.unique(place, axis=0))
    if step > 1 or twice:
        raise MixmagError(
            f"{t.magnification}x: "
            + (
                f"{twice} of {len(place)} tiles stand where another one does"
                if twice
                else f"the {len(place)} tiles are {step} x {side:g} apart, so that is not their side"
            )
        )
    return place, float(np.abs(t.corners - place * side).max(initial=0))


def assemble_cells(levels: list, placed: list) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """features (C, T, D), cells (C, 2), valid (C, T) of the tiles at their places; a cell is there where any of its tiles is."""
    keys = [((place[:, 1] >> k) << 32) + (place[:, 0] >> k) for k, place in enumerate(placed)]
    cells = np.unique(np.concatenate(keys))
    features = np.zeros(
        (len(cells), sum(4**k for k in range(len(levels))), levels[0].features.shape[1]), np.float16
    )
    valid = np.zeros(features.shape[:2], bool)
    for k, (t, key, place) in enumerate(zip(levels, keys, placed)):
        at = (
            np.searchsorted(cells, key),
            magnification_entries(k).start + place[:, 1] % 2**k * 2**k + place[:, 0] % 2**k,
        )
        features[at], valid[at] = t.features, True
    return features, np.stack([cells & 0xFFFFFFFF, cells >> 32], axis=1).astype(np.int32), valid


def cell_geometry(levels: list, job: dict) -> tuple[float, float, str]:
    """A cell's side in level-0 px, mpp, and who says so: TRIDENT's files know pixels and a nominal magnification, so that mpp follows from
    the side, or is --mpp where that agrees; STAMP's know micrometres, which become pixels of --mpp, else of the finest magnification."""
    cell_um, (given, giver) = 10 * levels[0].tile_px / levels[0].magnification, job["mpp"]
    if given is not None and not 0.1 <= given <= 4:
        raise MixmagError(f"{giver} says {given:g} um/px, expected 0.1 to 4")
    if job["tool"] == "trident":
        cell_px = float(trident_cell(levels))
        mpp, source = cell_um / cell_px, "nominal, from the tiles' side"
        if (
            given and abs(given - mpp) > 0.2 * mpp
        ):  # TRIDENT cuts 0.2 to 0.3 um/px as if they were 0.25
            raise MixmagError(
                f"{giver} says {given}, but tiles of {cell_px:g} px at {levels[0].magnification}x were cut as if it were {mpp:.4g}"
            )
    else:
        mpp, source = (
            given or 10 / levels[-1].magnification,
            "none: pixels of the finest magnification",
        )
        cell_px = cell_um / mpp
        for t in levels:
            t.corners /= mpp
    if not 0.1 <= mpp <= 4:
        raise MixmagError(
            f"mpp is {mpp:.4g} ({source}), expected 0.1 to 4 um/px; give the slide's own with --mpp"
        )
    return (
        cell_px,
        given or mpp,
        f"{giver} (cut as if {mpp:.4g})"
        if given and abs(given - mpp) > 0.02 * mpp
        else giver
        if given
        else source,
    )


def import_slide(job: dict) -> str:
    """One slide's files into its slide file; what was done."""
    settings = {
        "tool": job["tool"],
        "class_token": job["class_token"],
        "sources": [file_sha256(path) for path in job["paths"]],
    }
    if already_done(job["out"], {"encoder": job["encoder"], "settings": settings}, job["mpp"][0]):
        return "done before"
    levels = [read_tiles(path, job) for path in job["paths"]]
    check_same_slide(levels)
    cell_px, mpp, source = cell_geometry(levels, job)
    snap, drift = (
        (0, 0) if job["tool"] == "trident" else (SNAP, 1 / levels[0].tile_px)
    )  # STAMP's tiles are up to 1 px too far apart
    placed, far = zip(
        *(lattice_positions(t, cell_px / 2**k, snap, drift) for k, t in enumerate(levels))
    )
    features, cells, valid = assemble_cells(levels, placed)
    width, height = (
        levels[0].size
        if all(levels[0].size)
        else np.ceil((cells.max(axis=0, initial=-1) + 1) * cell_px)
    )
    write_slide(
        job["out"],
        features,
        cells,
        valid,
        {
            "slide_id": job["slide_id"],
            "encoder": levels[0].encoder,
            "magnifications": [t.magnification for t in levels],
            "tile_px": levels[0].tile_px,
            "mpp": mpp,
            "mpp_source": source,
            "cell_px": cell_px,
            "origin": [0.0, 0.0],
            "width": int(width),
            "height": int(height),
            "n_bad": 0,
            "residual_um": max(far) * mpp,
            "settings": settings,
            "size_known": all(levels[0].size),
        },
    )
    return "imported"


def import_worker(job: dict) -> tuple[str, str]:
    """What became of a slide, and why, in a process of its own: a file that brings the HDF5 library down, or hangs it, ends that process.
    A later alarm ends a worker whose parent was killed."""
    for s in SIGNALS:  # the parent hears them, and lets the slide be finished
        signal.signal(s, signal.SIG_IGN)
    try:
        signal.alarm(IMPORT_SECONDS + sum(os.path.getsize(path) for path in job["paths"]) // 2**20)
        return import_slide(job), ""
    except MixmagError as error:
        return "failed", str(error)
    except Exception as error:  # a full disk, no memory
        return "failed", f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(3600)


def import_folder(place: str, tool: str, encoder: str | None) -> dict[str, Path]:
    """slide id -> file. TRIDENT's features_<encoder> is found inside the folder above it. Raises MixmagError where two have one id."""
    inside = sorted(Path(place).glob(f"features_{encoder or '*'}")) if tool == "trident" else []
    paths = visible_files(
        inside[0] if len(inside) == 1 else Path(place), "*.h5" if tool == "trident" else "**/*.h5"
    )
    if not paths:
        raise MixmagError(
            f"{place}: no feature files (*.h5)"
            + "".join(f"; there is {folder}" for folder in inside)
        )
    found = {}
    for path in paths:
        if not path.stem.isprintable():
            raise MixmagError(f"{path.stem!r} in {place} is not a printable name; rename it")
        if found.setdefault(path.stem.lower(), path) != path:
            raise MixmagError(
                f"two slides with one id: {found[path.stem.lower()]}, {path}; rename one"
            )
    return {path.stem: path for path in paths}


IMPORT_COLUMNS = (
    "slide_id",
    "status",
    "reason",
    "encoder",
    "dim",
    "magnifications",
    "mpp",
    "mpp_source",
    "residual_um",
    "cells",
    "tiles",
    "of",
    "without_parent",
    "missing_children",
    "whole_windows",
)


def import_row(slide: Slide, region: int) -> tuple:
    """What import.csv says of a slide file, from encoder on: the tiles that it holds at each magnification, and those that have no partner."""
    meta, C, alone, missing = slide.meta, len(slide.cells), 0, 0
    grids = [
        slide.valid[:, magnification_entries(k)].reshape(C, 2**k, 2**k)
        for k in range(len(meta["magnifications"]))
    ]
    for parent, child in zip(grids, grids[1:]):
        parent = parent.repeat(2, axis=1).repeat(2, axis=2)
        alone, missing = (
            alone + int((child & ~parent).sum()),
            missing + int((parent & ~child).sum()),
        )
    return (
        meta["encoder"],
        slide.dim,
        "/".join(f"{m}x" for m in meta["magnifications"]),
        round(meta["mpp"], 5),
        meta["mpp_source"],
        round(meta["residual_um"], 2),
        C,
        " ".join(str(g.sum()) for g in grids),
        " ".join(str(g.size) for g in grids),
        alone,
        missing,
        len(windows(slide.cells, region, region, 1.0)[0]),
    )


def import_command(args) -> int:
    tool, places, out = (
        "trident" if args.trident else "stamp",
        args.trident or args.stamp,
        Path(args.out),
    )
    folders = [import_folder(place, tool, args.encoder) for place in places]
    rows, pool, slide_ids, args.manifest = (
        [],
        None,
        sorted(set().union(*folders)),
        read_manifest(args.manifest),
    )
    warn_unmatched_rows(args.manifest, set(slide_ids))
    given = {i: user_mpp(i, args) for i in slide_ids}
    sweep(out / "slides")
    with contextlib.ExitStack() as pools:
        for i in progress(slide_ids, desc="slides"):
            job = {
                "slide_id": i,
                "paths": [str(files.get(i)) for files in folders],
                "out": str(out / "slides" / f"{i}.safetensors"),
                "tool": tool,
                "mpp": given[i],
                "encoder": args.encoder,
                "class_token": args.class_token,
            }
            absent = [place for place, files in zip(places, folders) if i not in files]
            pool = pool or pools.enter_context(
                ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
            )  # a fork inherits torch's threads
            try:
                status, reason = (
                    ("failed", f"no file in {', '.join(absent)}")
                    if absent
                    else pool.submit(import_worker, job).result()
                )
            except BrokenExecutor:
                if STOP_SIGNALS:
                    raise Stopped from None
                status, reason, pool = (
                    "failed",
                    "its files bring the HDF5 library down, or hang it",
                    None,
                )
            found = () if status == "failed" else import_row(read_slide(job["out"]), args.region)
            rows.append((i, status, reason, *found))
            said = ", ".join(
                f"{name} {value}" for name, value in zip(IMPORT_COLUMNS[6:], found[3:])
            )
            print(
                f"{i}: {status}, {said}" if found else f"{i}: FAILED: {reason}",
                file=sys.stdout if found else sys.stderr,
                flush=True,
            )
    failed = [(i, "import", reason) for i, status, reason, *_ in rows if status == "failed"]
    write_csv(out / "import.csv", IMPORT_COLUMNS, rows)
    print(
        f"{len(rows) - len(failed)} slides imported, {len(failed)} failed; {out / 'import.csv'} says what did not match"
    )
    return report_failed(out / "failed.csv", failed)


# ----------------------------------------------------------------------------- the synthetic cohort

#
# What a frozen tile encoder might see, simplified to what the method is about. The embedding of a token is
#     its magnification's mean + tissue (smooth in space, shared by parent and children, seen differently at each magnification)
#     + one of four patterns of its magnification + a site's and a stain's shift + noise of its own.
# The tiles of a cell mostly show the same pattern, and patterns of different magnifications keep company: each often comes with
# its namesake below. In every task two patterns are rare, and what they do in a handful of cells is the mechanism:
#     alone      positive slides hold the pattern, negative ones do not
#     together   positive slides hold both patterns in the same cells; negative ones hold the first, and half of them the second as
#                well, as often, but in other regions: the second alone tells a little, only the two together tell all
#     adjacent   the same with two patterns of one magnification, side by side or in different regions
# Stain shifts move along the patterns' own directions by more than a handful of cells moves a slide's mean, so a plain mean of
# a slide's tokens says little. The mechanisms were fixed before methods were compared on them.
MECHANISMS = {  # kind, (level, pattern), (level, pattern), in words
    "breast_cdh1": ("alone", (2, 0), (2, 0), "a 20x pattern: visible at 20x only"),
    "bladder_fgfr": ("alone", (1, 0), (1, 0), "a 10x pattern: visible at 10x only"),
    "colon_msi": ("alone", (0, 0), (0, 0), "a 5x pattern: visible at 5x only"),
    "endometrial_pten": ("together", (0, 1), (2, 2), "a 5x and a 20x pattern in the same cell"),
    "gastric_her2": ("together", (1, 1), (2, 3), "a 10x and a 20x pattern in the same cell"),
    "lung_egfr": (
        "adjacent",
        (1, 2),
        (1, 3),
        "two 10x patterns in tiles side by side: a spatial arrangement",
    ),
    "skin_braf": (
        "together",
        (0, 3),
        (2, 1),
        "a 5x and a 20x pattern in the same cell (other patterns than PTEN's)",
    ),
}
COHORT = {  # paper, supplementary table: split -> cases, slides, positive
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
QUICK_FLOORS = {
    "train": (120, 40),
    "tune": (60, 20),
    "test": (200, 60),
}  # least cases, least of them positive
PATTERNS, TISSUES, SITES, STAINS, LATENT = 4, 8, 4, 4, 64
PATTERN_SIZE, STAIN_SIZE, NOISE_VARIANCE = (
    2.6,
    1.2,
    0.5,
)  # lengths of the vectors; variance of the noise per dimension
RARE_CELLS, RARE_SHARE = (
    (3, 7),
    6,
)  # cells of an `alone` pattern: from, below; cells of 9 in the other kinds
KEEPS, USUAL = 0.85, 0.6  # a tile shows its cell's pattern; a cell's patterns are namesakes


def synth_world(dim: int, seed: int) -> dict:
    """The directions that everything is made of, shared by all slides of a cohort. Latent vectors of LATENT entries are carried
    into `dim` dimensions by one isometry, so that a cohort is equally hard at any width."""
    if dim < LATENT:
        raise MixmagError(f"--dim {dim}: a synthetic embedding needs at least {LATENT} dimensions")
    rng = np.random.default_rng([seed, 0])

    def directions(*shape, variance):
        v = rng.standard_normal((*shape, LATENT))
        return v / np.linalg.norm(v, axis=-1, keepdims=True) * np.sqrt(variance * LATENT)

    isometry = np.linalg.qr(rng.standard_normal((dim, LATENT)))[0].T * np.sqrt(
        dim / LATENT
    )  # (64, D)
    pattern = directions(3, PATTERNS, variance=1 / LATENT) * PATTERN_SIZE  # (3, 4, 64)
    stain = rng.standard_normal((STAINS, 3 * PATTERNS)) @ pattern.reshape(-1, LATENT)
    return {
        "mean": directions(3, variance=0.2),
        "site": directions(SITES, variance=0.04),
        "isometry": isometry,
        "tissue": directions(TISSUES, variance=0.05)
        + directions(3, TISSUES, variance=0.1),  # (3, Q, 64)
        "pattern": pattern,
        "stain": stain / np.linalg.norm(stain, axis=-1, keepdims=True) * STAIN_SIZE,
    }


def synth_cells(rng, regions: int) -> np.ndarray:
    """(C, 2) row, col: `regions` 3 x 3 windows grown into one connected piece of tissue."""
    windows = {(0, 0)}
    while len(windows) < regions:
        row, col = sorted(windows)[rng.integers(len(windows))]
        dr, dc = ((0, 1), (1, 0), (0, -1), (-1, 0))[rng.integers(4)]
        windows.add((row + dr, col + dc))
    corners = np.array(sorted(windows))
    corners = 3 * (corners - corners.min(axis=0))
    return np.concatenate([corners + (i, j) for i in range(3) for j in range(3)])


def synth_patterns(rng, cells, task: str, positive: bool) -> list:
    """The pattern of every tile: int arrays (rows, cols), (2 rows, 2 cols), (4 rows, 4 cols) for 5x, 10x, 20x."""
    mechanism, first, second, _ = MECHANISMS[task]
    rows, cols = cells.max(axis=0) + 1
    common = [[q for q in range(PATTERNS) if (k, q) not in (first, second)] for k in range(3)]
    of_cell = [rng.choice(c, size=(rows, cols), p=rng.dirichlet([2.0] * len(c))) for c in common]
    for k in (1, 2):  # patterns of different magnifications keep company
        usual = np.isin(of_cell[k - 1], common[k]) & (rng.random((rows, cols)) < USUAL)
        of_cell[k] = np.where(usual, of_cell[k - 1], of_cell[k])
    if mechanism == "alone":
        here = elsewhere = cells[rng.permutation(len(cells))[: rng.integers(*RARE_CELLS)]]
    else:  # some cells in each of a few regions, and in as many other regions
        corners = rng.permutation(np.unique(cells // 3, axis=0))
        half = len(corners) // 2
        here, elsewhere = (
            np.concatenate(
                [
                    3 * c + np.argwhere(np.ones((3, 3)))[rng.permutation(9)[:RARE_SHARE]]
                    for c in some
                ]
            )
            for some in (corners[:half], corners[half : 2 * half])
        )
        elsewhere = elsewhere[
            : len(elsewhere) * rng.integers(2)
        ]  # in half of the negative slides the second pattern is absent
    if mechanism == "alone" and positive:
        of_cell[first[0]][tuple(here.T)] = first[1]
    elif mechanism == "together":
        of_cell[first[0]][tuple(here.T)] = first[1]
        of_cell[second[0]][tuple((here if positive else elsewhere).T)] = second[1]
    tiles = [np.kron(p, np.ones((2**k, 2**k), int)) for k, p in enumerate(of_cell)]
    for k in (1, 2):
        tiles[k] = np.where(
            rng.random(tiles[k].shape) < KEEPS, tiles[k], rng.choice(common[k], size=tiles[k].shape)
        )
    if mechanism == "adjacent":
        ring = np.array(
            [(0, 0), (0, 1), (1, 1), (1, 0)]
        )  # the four 10x tiles of a cell: successive ones touch
        turn, other = rng.integers(4, size=len(here)), here if positive else elsewhere
        tiles[1][tuple((2 * here + ring[turn]).T)] = first[1]
        tiles[1][tuple((2 * other + ring[(turn + 1) % 4][: len(other)]).T)] = second[1]
    return tiles


def synth_slide(world: dict, rng, task: str, positive: bool, regions: int) -> tuple:
    """features (C, 21, D) float16, cells (C, 2) int32, and (3,) the least MEM loss per magnification that the noise allows."""
    cells = synth_cells(rng, regions)
    rows, cols = cells.max(axis=0) + 1
    smooth = torch.from_numpy(
        rng.standard_normal((1, TISSUES, 2 + 2 * rows // 3, 2 + 2 * cols // 3))
    )
    field = F.interpolate(smooth, size=(4 * rows, 4 * cols), mode="bicubic", align_corners=True)[
        0
    ].argmax(0)  # at 20x
    tissue = np.eye(TISSUES)[field.numpy()]  # (., ., Q)
    shift = (
        world["site"][rng.integers(SITES)] + rng.standard_normal(STAINS) @ world["stain"]
    )  # (64,)
    patterns, levels = synth_patterns(rng, cells, task, positive), []
    for k in range(3):
        side = 2**k
        share = tissue.reshape(rows * side, 4 // side, cols * side, 4 // side, TISSUES).mean(
            axis=(1, 3)
        )  # (., ., Q)
        x = world["mean"][k] + share @ world["tissue"][k] + world["pattern"][k][patterns[k]] + shift
        x = x.reshape(rows, side, cols, side, LATENT).transpose(
            0, 2, 1, 3, 4
        )  # (rows, cols, s, s, 64)
        levels.append(x[cells[:, 0], cells[:, 1]].reshape(len(cells), side * side, LATENT))
    clean = np.concatenate(levels, axis=1)  # (C, 21, 64)
    seen = clean + rng.standard_normal(clean.shape) * np.sqrt(NOISE_VARIANCE)
    cosine = (
        (clean * seen).sum(-1) / np.linalg.norm(clean, axis=-1) / np.linalg.norm(seen, axis=-1)
    )  # (C, 21)
    floor = 1 - np.array([cosine[:, magnification_entries(k)].mean() for k in range(3)])
    return (seen @ world["isometry"]).astype(np.float16), cells[:, ::-1].astype(np.int32), floor


def synth_plan(scale: str, seed: int) -> dict:
    """task -> [(case_id, slide_id, label, split, whether this slide shows the label)]."""
    plan = {}
    for number, (task, splits) in enumerate(COHORT.items()):
        rng, rows = np.random.default_rng([seed, 1, number]), []
        for split, (cases, slides, share) in splits.items():
            least, least_positive = QUICK_FLOORS[split] if scale == "quick" else (0, 0)
            count = cases if scale == "full" else max(least, round(cases / 20))
            positives = max(least_positive, round(share * count))
            extra = round(count * (slides / cases - 1))  # second slides
            labels = rng.permutation([1] * positives + [0] * (count - positives))
            several = set(rng.permutation(count)[:extra].tolist())
            for i, label in enumerate(labels.tolist()):
                case, shows = f"{task}-{split}-{i:04d}", rng.integers(2)  # which slide shows it
                for j in range(2 if i in several else 1):
                    rows.append(
                        (
                            case,
                            f"{case}-{'ab'[j]}",
                            label,
                            split,
                            bool(label) and (i not in several or j == shows),
                        )
                    )
        plan[task] = rows
    return plan


def synthetic_facts(path) -> dict:
    """What synthetic.json says of a synthetic cohort; empty for any other data."""
    about = Path(path) / "synthetic.json"
    return read_json(about) if about.exists() else {}


def synth_cohort(out, scale="quick", dim=64, regions=4, seed=0) -> None:
    """Write DATA/slides, DATA/tasks and DATA/synthetic.json. A function of the arguments alone; files already whole are kept."""
    out, world, plan = Path(out), synth_world(dim, seed), synth_plan(scale, seed)
    settings = {"synthetic": True, "scale": scale, "dim": dim, "regions": regions, "seed": seed}
    about, facts = out / "synthetic.json", synthetic_facts(out)
    if facts and (found := {k: facts.get(k) for k in settings}) != settings:
        raise MixmagError(
            f"{about}: holds a cohort of {found}, asked for {settings}; give another --out"
        )
    if not facts and any((out / name).exists() for name in ("slides", "tasks")):
        raise MixmagError(
            f"{out} holds slides or tasks that are no synthetic cohort's; give another --out"
        )
    if not facts:
        write_json(about, {**settings, "complete": False})
    geometry = {
        "encoder": f"synthetic-{seed}",
        "magnifications": [5, 10, 20],
        "tile_px": TILE_PX,
        "mpp": 0.5,
        "cell_px": 896.0,
        "origin": [0.0, 0.0],
        "n_bad": 0,
        "created": "2000-01-01T00:00:00+00:00",
    }  # fixed: same seed, same bytes
    floors = []
    for number, (task, rows) in enumerate(plan.items()):
        for i, (_, slide_id, _, _, shows) in enumerate(progress(rows, desc=f"synthetic {task}")):
            rng = np.random.default_rng([seed, 2, number, i])
            features, cells, floor = synth_slide(
                world, rng, task, shows, max(2, regions + int(rng.integers(-1, 2)))
            )
            floors.append(floor)
            width, height = ((cells.max(axis=0) + 1) * 896).tolist()
            path = out / "slides" / f"{slide_id}.safetensors"
            if not path.exists():
                write_slide(
                    path,
                    features,
                    cells,
                    np.ones(features.shape[:2], bool),
                    {**geometry, "slide_id": slide_id, "width": width, "height": height},
                )
        write_csv(
            out / "tasks" / f"{task}.csv",
            ("case_id", "slide_id", "label", "split"),
            [row[:4] for row in rows],
        )
    seal(
        out,
        [f"tasks/{task}.csv" for task in plan],
        about.name,
        {
            **settings,
            "complete": True,
            "mechanisms": {task: m[3] for task, m in MECHANISMS.items()},
            "least_mem_loss": dict(zip(("5", "10", "20"), np.mean(floors, axis=0).tolist())),
        },
    )


def synth_picture(rng, height: int, width: int) -> np.ndarray:
    """(height, width, 3) uint8: purple nuclei in pink stroma on white glass, in the manner of H&E at 0.5 um/px; synthetic."""

    def smooth(px):  # a random field with features of about px pixels
        small = torch.from_numpy(
            rng.standard_normal((1, 1, height // px + 4, width // px + 4)).astype(np.float32)
        )
        return F.interpolate(small, size=(height, width), mode="bicubic", align_corners=True)[0, 0]

    y, x = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)[None]
    tissue = ((y**2 + x**2) + 0.25 * smooth(700) < 0.75).float()
    crowding = torch.sigmoid(2 * smooth(300))  # where nuclei are dense
    centres = (
        torch.from_numpy(rng.random((height, width), np.float32)) < 0.004 * crowding
    ).float()[None, None]
    discs = F.max_pool2d(F.max_pool2d(centres, (13, 1), 1, (6, 0)), (1, 13), 1, (0, 6))
    nuclei = F.avg_pool2d(F.avg_pool2d(discs, 7, 1, 3), 5, 1, 2)[0, 0]
    eosin = 0.35 + 0.12 * smooth(24) + 0.15 * smooth(120)
    hematoxylin = nuclei * (0.9 + 0.2 * smooth(6)) + 0.03
    density = tissue * torch.stack(
        [
            c * hematoxylin + e * eosin.clamp(min=0.02)  # Beer-Lambert per channel
            for c, e in ((1.25, 0.12), (1.35, 0.95), (0.55, 0.45))
        ]
    )
    light = 244 * torch.exp(-density.clamp(min=0)) + 2 * torch.from_numpy(
        rng.standard_normal((3, height, width)).astype(np.float32)
    )
    return light.clamp(0, 255).byte().permute(1, 2, 0).numpy()


def synth_images(out, count: int, seed: int) -> None:
    """Write `count` pyramidal TIFFs (tiled, deflate, box-averaged levels, 0.5 um/px) that OpenSlide opens."""
    import tifffile

    for i in progress(range(count), desc="synthetic images"):
        rng = np.random.default_rng([seed, 3, i])
        picture = synth_picture(rng, *(256 * rng.integers(14, 22, size=2)).tolist())
        with (
            whole_file(Path(out) / f"synthetic-{i:03d}.tiff") as temporary,
            tifffile.TiffWriter(temporary) as tiff,
        ):
            for level in range(4):
                tiff.write(
                    picture,
                    tile=(256, 256),
                    photometric="rgb",
                    compression="zlib",
                    compressionargs={"level": 1},
                    subfiletype=int(level > 0),
                    resolution=(2e4 / 2**level, 2e4 / 2**level),
                    resolutionunit="CENTIMETER",
                )
                h, w = picture.shape[0] // 2, picture.shape[1] // 2
                picture = (
                    picture[: 2 * h, : 2 * w]
                    .reshape(h, 2, w, 2, 3)
                    .mean(axis=(1, 3))
                    .round()
                    .astype(np.uint8)
                )


def synth_command(args) -> int:
    if args.images:
        synth_images(args.out, args.images, args.seed)
        print(f"{args.images} synthetic images in {args.out}")
    else:
        synth_cohort(args.out, args.scale, args.dim, args.regions, args.seed)
        print(
            f"synthetic cohort, {args.scale} scale, in {args.out}: "
            + ", ".join(task_names(args.out))
        )
    return 0


# ------------------------------------------------------------------------------------------- verify


def slide_findings(path) -> tuple[Slide | None, list[str]]:
    """Everything that is wrong with one slide file."""
    try:
        slide = read_slide(path)
    except MixmagError as error:
        return None, [str(error)]
    findings, meta, features = [], slide.meta, slide.features
    with safetensors.safe_open(path, "numpy") as f:
        if checksum(features, slide.cells, slide.valid, f.metadata()) != meta["sha256"]:
            findings.append(f"{path}: checksum differs: the file changed after it was written")
    if slide.slide_id != Path(path).stem:
        findings.append(f"{path}: holds slide {slide.slide_id!r}")
    bad = (~np.isfinite(features) & slide.valid[..., None]).any(axis=(1, 2))
    if bad.any():
        findings.append(
            f"{path}: NaN or infinite features in {bad.sum()} of {len(bad)} cells, first at (col, row) {slide.cells[bad][0].tolist()}"
        )
    if len(np.unique(slide.cells, axis=0)) != len(slide.cells):
        findings.append(f"{path}: a cell stands in it twice")
    if (slide.cells < 0).any():
        findings.append(f"{path}: negative cell positions")
    return slide, findings


def verify(data) -> list[str]:
    """Every finding in DATA, one line each: files, values, tables, leakage; of a run, or a folder of runs, what differs from its SHA256SUMS."""
    data, slides = Path(data), {}
    paths, sealed = visible_files(data / "slides", "*.safetensors"), sorted(data.rglob(SUMS))
    findings = [finding for sums in sealed for finding in seal_findings(sums)]
    if not paths and not (sealed and not (data / "slides").exists()):
        findings.append(f"{data}: no slide files in slides/, and no {SUMS} of a finished run")
    for path in progress(paths, desc="slides"):
        slide, found = slide_findings(path)
        findings += found
        if slide:
            slides[path.stem] = slide
    kinds = Counter(map(embedding_signature, slides.values()))
    usual = max(kinds, key=kinds.get, default=None)
    findings += [
        f"{s.path}: {embedding_signature(s)}; expected {usual} as in the {kinds[usual]} others"
        for s in slides.values()
        if embedding_signature(s) != usual
    ]
    everyone = []
    for task in task_names(data):
        path = data / "tasks" / f"{task}.csv"
        try:
            cases, found = task_findings(path)
        except MixmagError as error:
            findings.append(str(error))
            continue
        findings, everyone = findings + found, everyone + cases
        content = defaultdict(dict)  # features' digest -> split -> slide
        for case in cases:
            for i in case.slide_ids:
                if i in slides and len(slides[i].cells):
                    content[hashlib.sha256(slides[i].features.tobytes()).digest()].setdefault(
                        case.split, i
                    )
                elif i not in slides and not (data / "slides" / f"{i}.safetensors").exists():
                    findings.append(
                        f"{path}: slide {i!r} of case {case.case_id!r} has no file in {data / 'slides'}"
                    )
        findings += [
            f"{path}: the same content in two splits: {splits}"
            for splits in content.values()
            if len(splits) > 1
        ]
        for split in SPLITS:
            if len({c.label for c in cases if c.split == split}) < 2:
                findings.append(
                    f"{path}: split {split} does not hold both classes, so it has no AUROC"
                )
    return findings + listed_findings(data, evaluation_slides_of(everyone))


def listed_findings(data: Path, held: set) -> list[str]:
    """What is wrong with pretrain.csv, where there is one."""
    path = data / "pretrain.csv"
    try:
        listed = pretraining_ids(data) if path.exists() else []
    except MixmagError as error:
        return [str(error)]
    return [
        f"{path}: slide {i!r} has no file"
        for i in listed
        if not (data / "slides" / f"{i}.safetensors").exists()
    ] + [
        f"{path}: slide {i!r} is in a tune or test split, itself or by its case"
        for i in listed
        if i in held
    ]


def verify_command(args) -> int:
    findings = verify(args.data)
    for line in findings:
        print(line)
    print(
        f"{len(findings)} findings in {args.data}"
        if findings
        else f"{args.data}: nothing wrong found"
    )
    return 1 if findings else 0


# -------------------------------------------------------------------------- files, errors, progress


class MixmagError(Exception):
    """An input that is refused: the command prints this one line and ends with exit code 1."""


class SlideReadError(MixmagError):
    """A slide, or some of its pixels, cannot be read."""


class OtherSettings(MixmagError):
    """What stands in the output folder was made with other settings."""


class Stopped(Exception):
    """A signal asked for the end and everything worth keeping is saved."""


SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1
STOP_SIGNALS = []  # those received so far


def catch_signals() -> None:
    """SIGTERM, SIGINT and SIGUSR1 only raise a flag that the loops poll; the second one of them acts at once, but not in one of several
    processes: there the second is often the first again, passed on by torchrun, which by itself ends those that do not end."""

    def note(signum, frame):
        STOP_SIGNALS.append(signum)
        for s in SIGNALS if "RANK" not in os.environ else ():
            signal.signal(s, signal.SIG_DFL)

    for s in SIGNALS:
        signal.signal(s, note)


TORCH_SAYS = {"allocate": "out of memory: ", "by peer": "another of the processes ended: "}


def find_device(name: str) -> torch.device:
    """Raises MixmagError for a device that is not there. `auto` is the GPU that torchrun gave this process, or the processor."""
    if name == "auto" and not torch.cuda.is_available():
        name = "cpu"
    elif name == "auto" or (name == "cuda" and "RANK" in os.environ):
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name) or (
        name != "cpu" and int(name[5:] or 0) >= torch.cuda.device_count()
    ):
        raise MixmagError(
            f"--device {name}: expected auto, cpu or cuda[:i]; torch {torch.__version__} sees {torch.cuda.device_count()} GPUs here"
        )
    return torch.device(name)


def run_command(function, args) -> int:
    """Call function(args) and turn its end into the exit code that the README promises."""
    catch_signals()
    try:
        return function(args) or 0
    except MixmagError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Stopped:
        print(
            "stopped by a signal; what was done is saved, and the same command goes on from there",
            file=sys.stderr,
        )
        return 130 if signal.SIGINT in STOP_SIGNALS else 75
    except BrokenPipeError:  # `| head` closed our stdout: there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE  # as the shell says it of a program that does not catch it
    except (OSError, MemoryError, RuntimeError) as error:
        said = (
            "out of memory: "
            if isinstance(error, MemoryError)
            else next((said for words, said in TORCH_SAYS.items() if words in str(error)), "")
        )
        if isinstance(error, RuntimeError) and not said:
            raise
        print(f"error: {said}{' '.join(str(error).split())}", file=sys.stderr)
        return 1


def progress(items=None, **settings):
    """A tqdm bar on stderr, silent where that is no terminal, and in all but the first of several processes; over items it ends at a signal."""
    bar = tqdm(
        items,
        disable=True if int(os.environ.get("RANK", 0)) else None,
        dynamic_ncols=True,
        **settings,
    )
    return bar if items is None else until_stopped(bar)


def stop_if_asked() -> None:
    """Raises Stopped when a signal was received."""
    if STOP_SIGNALS:
        raise Stopped


def until_stopped(items):
    for item in items:
        stop_if_asked()
        yield item


def process_rank() -> tuple[int, int]:
    """This process's number and how many there are, as torchrun says."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def prefetch(function, items, threads: int):
    """function(item) of each, in order, while threads work on the next ones, at most two each; without threads, each when it is asked for. Numpy,
    torch, Pillow and OpenSlide let go of the interpreter for the work on embeddings and pixels."""
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
    """Write a file whole or not at all: yields a temporary name in the same folder, which takes the final name at the end. Raises
    MixmagError where that fails; what had the final name before still has it."""
    path = Path(path)
    temporary = path.with_name(
        f".{path.name}.{os.getpid()}.tmp"
    )  # its suffix keeps a killed writer's rest out of every `*.suffix`
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(
            error
        ):  # how torch says that the disk is full
            raise
        raise MixmagError(
            f"{path}: cannot be written ({' '.join(str(error).split())}); {free_bytes(path) / 1e6:.0f} MB are free there"
        ) from None
    finally:
        with contextlib.suppress(OSError):  # there is none, or no folder for it
            temporary.unlink()


def sweep(*folders) -> None:
    """Remove what killed writers left in folders: temporary files that nobody has touched for an hour."""
    for rest in (path for folder in folders for path in Path(folder).glob(".*.*.tmp")):
        with contextlib.suppress(
            FileNotFoundError
        ):  # another process sweeps too, or a writer has just finished
            if time.time() - rest.stat().st_mtime > 3600:
                rest.unlink()


def visible_files(folder: Path, pattern: str) -> list[Path]:
    """What a folder holds, sorted, but for hidden files such as macOS leaves beside others."""
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk that will hold a folder, which need not exist yet."""
    return shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free


def require_room(folder: Path, size: int) -> None:
    """Raises MixmagError where so many bytes of a slide would not fit."""
    if size > (free := free_bytes(folder)):
        raise MixmagError(
            f"its {size / 1e6:.0f} MB do not fit into the {free / 1e6:.0f} MB that are free under {folder}"
        )


def write_text(path, text: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path, value) -> None:
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path) -> dict:
    """Raises MixmagError for a file that is missing or holds anything but names and values."""
    try:
        value = json.loads(Path(path).read_text("utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"found {type(value).__name__}, expected names and values")
        return value
    except (OSError, ValueError, RecursionError) as error:
        raise MixmagError(f"{path}: cannot be read as JSON ({error})") from None


def write_csv(path, header, rows) -> None:
    """File names that are no UTF-8 are written with their bytes escaped."""
    with (
        whole_file(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8", errors="backslashreplace") as f,
    ):
        writer = csv.writer(f)
        writer.writerow(header)
        writer.writerows(rows)


def report_failed(path, failed: list) -> int:
    """Write the table of (slide_id, stage, reason), or none where nothing failed; the exit code that goes with it."""
    Path(path).unlink(missing_ok=True)
    if failed:
        write_csv(path, ("slide_id", "stage", "reason"), failed)
    return 3 if failed else 0


def file_sha256(path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


SUMS = "SHA256SUMS"


def seal(folder, names, last: str, value) -> None:
    """Write the JSON file `last`, and before it SHA256SUMS of it and of those of `names` that are in the folder, which `verify` reads."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    sums = {
        name: file_sha256(Path(folder) / name) for name in names if (Path(folder) / name).exists()
    }
    sums[last] = hashlib.sha256(text.encode("utf-8")).hexdigest()
    write_text(Path(folder) / SUMS, "".join(f"{digest}  {name}\n" for name, digest in sums.items()))
    write_text(Path(folder) / last, text)


def seal_findings(sums: Path) -> list[str]:
    """What differs from a SHA256SUMS file, as `seal` or the program sha256sum writes it."""
    findings = []
    for line in sums.read_text("utf-8", "replace").rstrip("\n").split("\n"):
        digest, name = line[:64], line[66:]  # between them two spaces, or one and a star
        path = sums.parent / name
        if not path.is_file():
            findings.append(f"{sums}: {name!r} is not there")
        elif file_sha256(path) != digest:
            findings.append(
                f"{path}: checksum differs from {sums}: one of them changed after it was written"
            )
    return findings


def read_csv(path, columns) -> list[dict]:
    """Rows as dicts of stripped strings, and under "line" the number of the line where each ends. Raises MixmagError for a missing file or
    column."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            reader = csv.DictReader(f)
            missing = [c for c in columns if c not in (reader.fieldnames or [])]
            if missing:
                raise MixmagError(
                    f"{path}: column {', '.join(missing)} is missing; found {reader.fieldnames}"
                )
            return [
                {**{c: (row[c] or "").strip() for c in columns}, "line": reader.line_num}
                for row in reader
            ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise MixmagError(f"{path}: cannot be read as a UTF-8 CSV ({error})") from None


# --------------------------------------------------------------------------------- the command line


def parse(argv=None) -> argparse.Namespace:

    class Help(argparse.ArgumentDefaultsHelpFormatter):
        def _get_help_string(self, action):
            return action.help if action.default is None else super()._get_help_string(action)

    parser = argparse.ArgumentParser(
        prog="data.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def within(kind, low, high):
        def number(text):
            if not low <= kind(text) <= high:  # NaN is not
                raise argparse.ArgumentTypeError(f"{text} is not within {low:g} to {high:g}")
            return kind(text)

        return number

    natural, positive = within(int, 0, 2**32 - 1), within(int, 1, 2**32 - 1)

    def command(name, summary, example):
        return commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"example: {example}",
            formatter_class=Help,
        )

    p = command(
        "synth",
        "make a synthetic cohort: embedding pyramids with seven planted biomarkers",
        "python data.py synth --out data/synthetic --scale quick",
    )
    p.add_argument("--out", default="data/synthetic", help="folder to write")
    p.add_argument(
        "--scale",
        choices=("quick", "full"),
        default="quick",
        help="full: the paper's case and slide counts; quick: a twentieth, with floors that keep every split rankable",
    )
    p.add_argument(
        "--dim", type=positive, default=64, help="width of an embedding (Virchow2 has 1280)"
    )
    p.add_argument(
        "--regions",
        type=positive,
        default=4,
        help="3 x 3 regions of tissue per slide, on average; at least 2",
    )
    p.add_argument(
        "--images",
        type=natural,
        default=0,
        metavar="N",
        help="write N H&E-like pyramidal TIFFs instead, for the tiler",
    )
    p.add_argument("--seed", type=natural, default=0, help="everything follows from it")

    p = command(
        "tile",
        "turn whole-slide images into slide files: tissue, cells on one lattice in exact mpp, embeddings",
        "python data.py tile --slides slides/ --out data/mine --encoder texture --mpp 0.5",
    )
    p.add_argument(
        "--slides", nargs="+", required=True, metavar="DIR|FILE", help="slides, or folders of them"
    )
    p.add_argument(
        "--out", required=True, help="DATA folder to write slides/<slide_id>.safetensors into"
    )
    p.add_argument(
        "--encoder",
        default="texture",
        metavar="texture|virchow2|module:factory",
        help="texture is a weight-free stand-in; factory() returns a callable (B, 224, 224, 3) uint8 -> (B, D)",
    )
    p.add_argument(
        "--weights",
        metavar="FILE",
        help="virchow2's weights, .safetensors or .pt (default: from the Hugging Face hub)",
    )
    p.add_argument(
        "--mpp",
        type=float,
        help="micrometres per level-0 pixel, for slides that do not say, or nothing plausible (default: their own)",
    )
    p.add_argument(
        "--manifest",
        metavar="CSV",
        help="columns slide (file name or id) and mpp: as --mpp, for each slide; goes before it",
    )
    p.add_argument(
        "--mpp-from-power",
        action="store_true",
        help="take 10 / objective power where a slide says no mpp at all",
    )
    p.add_argument(
        "--region",
        type=positive,
        default=3,
        help="cells per side of the windows that are accepted or not as a whole",
    )
    p.add_argument(
        "--magnifications", type=positive, nargs="+", default=[5, 10, 20], help="a run of doublings"
    )
    p.add_argument(
        "--min-tissue",
        type=within(float, 0, 1),
        default=0.25,
        help="least share of tissue in a window (assumed)",
    )
    p.add_argument(
        "--mask",
        metavar="FILE|DIR",
        help="your own tissue mask, PNG or GeoJSON; DIR holds <slide_id>.png or .geojson for each slide",
    )
    p.add_argument(
        "--shard",
        metavar="i/n",
        help="do the i-th of n shares of the slides (default: all, or each process's share under torchrun)",
    )
    p.add_argument("--batch-size", type=positive, default=256, help="tiles per call of the encoder")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda[:i]")
    p.add_argument(
        "--dry-run",
        action="store_true",
        help="plan only: mpp, windows, tokens and bytes of each slide",
    )

    p = command(
        "import",
        "join the embeddings that TRIDENT or STAMP made at each magnification into slide files",
        "python data.py import --trident 5x/features_virchow2 10x/features_virchow2 20x/features_virchow2 --out data/mine",
    )
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--trident",
        nargs="+",
        metavar="DIR",
        help="one features_<encoder> folder per magnification, from low to high",
    )
    source.add_argument(
        "--stamp",
        nargs="+",
        metavar="DIR",
        help="one folder of STAMP's feature files per magnification, from low to high",
    )
    p.add_argument(
        "--out", required=True, help="DATA folder to write slides/<slide_id>.safetensors into"
    )
    p.add_argument(
        "--encoder",
        metavar="NAME",
        help="the encoder's name, for files that do not say (default: what they say)",
    )
    p.add_argument(
        "--class-token",
        action=argparse.BooleanOptionalAction,
        help="keep the first 1280 of 2560 numbers, Virchow2's class token, "
        "or all of them (default: cut where the file says virchow2)",
    )
    p.add_argument(
        "--mpp",
        type=float,
        help="the true micrometres per level-0 pixel of these slides, checked against their files; "
        "with STAMP's, which have no pixels, it places them on the slide",
    )
    p.add_argument(
        "--manifest",
        metavar="CSV",
        help="columns slide (file name or id) and mpp: as --mpp, for each slide; goes before it",
    )
    p.add_argument(
        "--region",
        type=positive,
        default=3,
        help="cells per side of the windows that are counted in import.csv",
    )

    p = command(
        "verify",
        "check slide files and task tables; print every finding; exit 1 if there is any",
        "python data.py verify data/mine",
    )
    p.add_argument("data", help="DATA folder, a finished run, or a folder of runs")
    return parser.parse_args(argv)


COMMANDS = {
    "synth": synth_command,
    "tile": tile_command,
    "import": import_command,
    "verify": verify_command,
}


def main() -> int:
    args = parse()
    return run_command(COMMANDS[args.command], args)


if __name__ == "__main__":
    sys.exit(main())
