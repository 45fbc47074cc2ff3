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
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import textwrap
import time
from collections import Counter, defaultdict, deque
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import h5py
import numpy as np
import openslide
import safetensors
import safetensors.torch
import simplejpeg
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
SLIDE_SUFFIXES = (
    ".svs",
    ".tif",
    ".tiff",
    ".ndpi",
    ".vms",
    ".vmu",
    ".scn",
    ".mrxs",
    ".svslide",
    ".bif",
    ".dcm",
    ".czi",
)


class Reader:
    """A slide behind OpenSlide, for any number of threads. Raises MixmagError where the file is no slide."""

    def __init__(self, path):
        self.path, self.cache = Path(path), openslide.OpenSlideCache(CACHE_BYTES)
        if not self.path.is_file() or self.path.stat().st_size == 0:
            raise MixmagError(
                f"{path}: " + ("is empty (0 bytes)" if self.path.is_file() else "no such file")
            )
        try:
            if openslide.OpenSlide.detect_format(self.path) is None:
                raise MixmagError(
                    f"{path}: OpenSlide knows no slide in its {self.path.stat().st_size} bytes: another format, cut short, a "
                    "TIFF in strips or big-endian, or an index without the files that it names"
                )
            self.slide = self.open()
            self.downsamples, self.sizes = (
                self.slide.level_downsamples,
                self.slide.level_dimensions,
            )  # a failed handle would not even tell these
            self.jpeg = jpeg_levels(self)
        except openslide.OpenSlideError as error:
            raise MixmagError(f"{path}: OpenSlide cannot open it ({error})") from None

    def open(self) -> openslide.OpenSlide:
        slide = openslide.OpenSlide(self.path)
        slide.set_cache(self.cache)
        return slide

    def fits(self, level: int) -> bool:
        """Whether a level is level 0 shrunk by a whole number, to two of its pixels. One that is padded to whole tiles is not, and OpenSlide's
        downsample, the mean of the sides' ratios, is wrong for it."""
        d = self.downsamples[level]
        return all(
            abs(side * round(d) - whole) <= 2 * d
            for side, whole in zip(self.sizes[level], self.sizes[0])
        )

    def level_for(self, downsample: float) -> int:
        """The coarsest level that is still at least as fine, and fits; pyramids are often 4.0001 or 3.9998 where 4 is meant."""
        return max(
            i
            for i, d in enumerate(self.downsamples)
            if i == 0 or (d <= downsample * 1.001 and self.fits(i))
        )

    def region(self, level: int, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        """(h, w, 4) uint8 RGBA of a rectangle in the level's own pixels. After a failed read OpenSlide refuses every other one on that
        handle, in whichever thread: so all go on with a new handle, and a last one of its own tells whether these pixels are
        to blame. Raises openslide.OpenSlideError if they are."""
        if level in self.jpeg:
            with contextlib.suppress(ValueError, OSError):
                return self.jpeg[level].region(left, top, right, bottom)
        scale = self.downsamples[level]
        place = (round(left * scale), round(top * scale)), level, (right - left, bottom - top)
        try:
            return np.asarray(self.slide.read_region(*place))
        except openslide.OpenSlideError:
            self.slide = self.open()
            return np.asarray(self.open().read_region(*place))

    def read(self, level: int, box: tuple) -> tuple[Image.Image, tuple]:
        """box (left, top, right, bottom) in level-0 px, floats -> the RGB picture of the level's pixels that cover it, over
        white, and where in that picture the box lies. Raises openslide.OpenSlideError if it cannot be read."""
        scale = self.downsamples[level]
        left, top = int(box[0] / scale), int(box[1] / scale)
        right, bottom = (
            min(-int(-edge // scale), size) for edge, size in zip(box[2:], self.sizes[level])
        )
        rgb = over_white(self.region(level, left, top, right, bottom))
        within = np.divide(box, scale) - (left, top, left, top)
        return rgb, tuple(within.clip(0, (*rgb.size, *rgb.size)))


def over_white(rgba: np.ndarray) -> Image.Image:
    """(h, w, 4) uint8 RGBA -> the RGB picture over white glass."""
    picture = Image.fromarray(rgba)
    rgb = Image.new("RGB", picture.size, "white")
    rgb.paste(picture, mask=picture.getchannel("A"))
    return rgb


RESOLUTION_UM = {
    "inch": 25400.0,
    "centimeter": 10000.0,
}  # what tiff.ResolutionUnit says; "none" is no scale


def number(text) -> float:
    """The number that a text holds, with a decimal point or comma; NaN where it holds none."""
    try:
        return float(str(text).replace(",", "."))
    except ValueError:
        return float("nan")


def stated_mpp(properties) -> tuple:
    """What a slide says of itself: um/px in x and y (NaN where that is no number), the property's name, and its words; all None where
    it says nothing. TIFF resolution counts only where OpenSlide makes no mpp of it."""
    names = openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y
    unit = (
        None
        if any(n in properties for n in names)
        else RESOLUTION_UM.get(properties.get("tiff.ResolutionUnit"))
    )
    names = ("tiff.XResolution", "tiff.YResolution") if unit else names
    texts = [properties.get(n) for n in names]
    if texts == [None, None]:
        return None, None, None, None
    x, y = (unit / (number(t) or float("nan")) if unit else number(t) for t in texts)
    words = ", ".join(f"{n} {t!r}" for n, t in zip(names, texts))
    return (
        x,
        y,
        names[0],
        words
        + (
            f" per {properties['tiff.ResolutionUnit']}, which is {x:.4g} and {y:.4g} um/px"
            if unit
            else ""
        ),
    )


def slide_mpp(
    slide, given: float | None = None, giver: str = "--mpp", from_power: bool = False
) -> tuple[float, str]:
    """Micrometres per level-0 pixel and who says so: what the user gives, else the slide's mpp, else its TIFF resolution, else, only
    with from_power, 10 / objective power. A given value mends an implausible one of the slide, and never overrules a plausible
    one. Raises MixmagError: nothing is guessed."""

    def plausible(x, y):
        return (
            min(x, y) >= 0.1 and max(x, y) <= 4 and abs(x - y) <= 0.02 * (x + y) / 2
        )  # False for NaN

    x, y, name, words = stated_mpp(slide.properties)
    if given is not None:
        if not plausible(given, given):
            raise MixmagError(f"{giver} says {given:g} um/px, expected 0.1 to 4; correct it there")
        if name and plausible(x, y) and abs(given - (x + y) / 2) > 0.02 * (x + y) / 2:
            raise MixmagError(
                f"{giver} says {given:g} um/px, the slide says {words}, more than 2 % apart; leave {giver} out for this slide"
            )
        return given, giver
    if name:
        if not plausible(x, y):
            raise MixmagError(
                f"the slide says {words}; expected 0.1 to 4 um/px and the same in x and y (2 %); give the true value with "
                "--mpp or --manifest"
            )
        return (x + y) / 2, name
    power = slide.properties.get(openslide.PROPERTY_NAME_OBJECTIVE_POWER)
    mpp = 10 / (number(power) or float("nan"))
    if from_power and plausible(mpp, mpp):
        return mpp, openslide.PROPERTY_NAME_OBJECTIVE_POWER
    raise MixmagError(
        f"the slide says no mpp ({openslide.PROPERTY_NAME_MPP_X} and the TIFF resolution are missing; "
        f"{openslide.PROPERTY_NAME_OBJECTIVE_POWER} is {power!r}); give the true value with --mpp or --manifest"
        + ("" if power is None or from_power else ", or take 10 / power with --mpp-from-power")
    )


def read_manifest(path) -> dict:
    """{slide: mpp} from a CSV with columns slide (file name or id) and mpp; an empty mpp leaves the slide to its own properties. Nothing without a
    path. Raises MixmagError listing every row that is no number or comes twice."""
    if path is None:
        return {}
    rows = [(Path(r["slide"]).name, r["mpp"]) for r in read_csv(path, ("slide", "mpp")) if r["mpp"]]
    count = Counter(name for name, _ in rows)
    bad = [
        f"{name!r} {mpp!r}" + " (more than one row)" * (count[name] > 1)
        for name, mpp in rows
        if count[name] > 1 or np.isnan(number(mpp))
    ]
    if bad:
        raise MixmagError(
            f"{path}: expected one number of um/px for each slide; found {', '.join(bad)}"
        )
    return {name: number(mpp) for name, mpp in rows}


def possible_slide_ids(name: str) -> set:
    """The slides that a row of a manifest may mean: an id may have dots in it."""
    return {name, Path(name).stem} if Path(name).suffix.lower() in SLIDE_SUFFIXES else {name}


def warn_unmatched_rows(manifest: dict, slide_ids: set) -> None:
    strangers = [name for name in manifest if not possible_slide_ids(name) & slide_ids]
    if strangers:
        print(
            f"--manifest: {len(strangers)} of {len(manifest)} rows name no slide here, such as {min(strangers)}",
            file=sys.stderr,
        )


def user_mpp(slide_id: str, manifest: dict, mpp: float | None) -> tuple[float | None, str]:
    """What the user says of a slide, and where: its row of the manifest, by its id or its file's name, else --mpp."""
    rows = sorted(name for name in manifest if slide_id in possible_slide_ids(name))
    if len(rows) > 1:
        raise MixmagError(f"--manifest has two rows for this slide, {' and '.join(rows)}; keep one")
    if rows:
        return manifest[rows[0]], f"--manifest row {rows[0]}"
    return mpp, "--mpp"


# ------------------------------------------------------------------------- JPEG tiles read directly

MAX_TILE_BYTES = 2**30  # that a TIFF may claim for one of its tiles (assumed)
ADOBE = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0"  # by this marker and the byte after it libjpeg knows YCbCr (1) from RGB (0)


class JpegLevel:
    """A level of a TIFF (a page of tifffile's) whose tiles are JPEG pictures, for any number of threads. OpenSlide spends most of such a read
    on drawing in floating point what it has decoded (its issue 440), where laying the tiles side by side is enough. A tile that is absent, or
    anything but a sound picture of the page's size and colours, raises ValueError and is OpenSlide's to judge."""

    def __init__(self, path, page):
        self.size, w, h = (page.imagewidth, page.imagelength), page.tilewidth, page.tilelength
        self.tile_size, self.across, self.starts, self.lengths = (
            (w, h),
            -(-page.imagewidth // w),
            page.dataoffsets,
            page.databytecounts,
        )
        file, wanted = open(path, "rb"), (h, w, "YCbCr" if page.photometric == 6 else "RGB")
        head = (
            b"\xff\xd8" + ADOBE + bytes([page.photometric == 6]) + (page.jpegtables or b"")[2:-2]
        )  # the tables without their start and end

        @functools.lru_cache(CACHE_BYTES // (4 * w * h))
        def tile(start: int, length: int) -> np.ndarray:
            """(h, w, 4) uint8 RGBA. It knows nothing of self, so that no cycle of references keeps the cache alive."""
            found = os.pread(file.fileno(), length, start)
            jpeg = head + found[2:]
            if found[:2] != head[:2] or simplejpeg.decode_jpeg_header(jpeg)[:3] != wanted:
                raise ValueError
            return simplejpeg.decode_jpeg(jpeg, "RGBA")

        self.tile = tile

    def region(self, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        """(bottom - top, right - left, 4) uint8 RGBA of a rectangle inside the level."""
        (w, h), pixels = self.tile_size, np.empty((bottom - top, right - left, 4), np.uint8)
        for y in range(top - top % h, bottom, h):
            for x in range(left - left % w, right, w):
                i = y // h * self.across + x // w
                part = self.tile(self.starts[i], self.lengths[i])[
                    max(0, top - y) : bottom - y, max(0, left - x) : right - x
                ]
                pixels[max(0, y - top) : y - top + h, max(0, x - left) : x - left + w] = (
                    part  # numpy cuts what ends beyond the end
                )
        return pixels

    def agrees(self, slide: openslide.OpenSlide, level: int) -> bool:
        """Whether OpenSlide makes the same of its first tile; may break the handle."""
        corner = [min(pair) for pair in zip(self.size, self.tile_size)]
        try:
            return np.array_equal(
                self.region(0, 0, *corner), slide.read_region((0, 0), level, corner)
            )
        except (ValueError, OSError, openslide.OpenSlideError):
            return False


def jpeg_levels(reader) -> dict[int, JpegLevel]:
    """Those of a slide's levels, by number, that can be read without OpenSlide. Raises MixmagError for a level with a tile so large that
    OpenSlide would end the process for want of memory, or with more or fewer tiles than its size wants, which it would mix up."""
    vendor, pages, damage, absent = reader.slide.properties["openslide.vendor"], {}, None, False
    if vendor not in ("aperio", "generic-tiff"):
        return {}
    import tifffile

    try:
        with tifffile.TiffFile(reader.path) as tiff:
            for page in [page for page in tiff.pages if page.is_tiled]:
                size, (w, h), lengths = (
                    (page.imagewidth, page.imagelength),
                    (page.tilewidth, page.tilelength),
                    page.databytecounts,
                )
                absent, most, grid = (
                    absent or 0 in lengths,
                    max(4 * w * h, *lengths),
                    -(-size[0] // w) * -(-size[1] // h),
                )
                one_plane = page.planarconfig == tifffile.PLANARCONFIG.CONTIG
                if size in reader.sizes and most > MAX_TILE_BYTES:
                    damage = f"one of its tiles would have {most} bytes"
                elif size in reader.sizes and one_plane and len(page.dataoffsets) != grid:
                    damage = f"its {len(page.dataoffsets)} tiles of {w} x {h} px do not make a level of {size[0]} x {size[1]} px"
                usual = (
                    one_plane
                    and (page.compression, page.bitspersample, page.samplesperpixel)
                    == (tifffile.COMPRESSION.JPEG, 8, 3)
                    and len(page.dataoffsets) == len(lengths) == grid
                    and 4 * w * h <= CACHE_BYTES
                    and max(map(sum, zip(page.dataoffsets, lengths))) <= tiff.filehandle.size
                    and b"\xff\xdd" not in (page.jpegtables or b"")
                )  # a restart interval, which holds for the tables alone
                pages[size] = (
                    JpegLevel(reader.path, page) if usual and size not in pages else None
                )  # which of two is OpenSlide's?
    except Exception:  # of all kinds, where a file has tags that OpenSlide does not look at
        pages = {}
    if damage:
        raise MixmagError(f"{reader.path}: is damaged: {damage}")
    if (
        vendor == "aperio" and absent
    ):  # OpenSlide draws what lies over an absent tile from the finer level
        return {}
    return {
        i: level
        for i, size in enumerate(reader.sizes)
        if (level := pages.get(size)) and level.agrees(reader.open(), i)
    }


# --------------------------------------------------------------------------------- tissue and masks


def otsu(values: np.ndarray) -> int:
    """The threshold of uint8 values that parts them into two classes of the largest variance between (Otsu 1979): the upper
    class is > threshold. 0 where all values are the same."""
    count = np.bincount(values.reshape(-1), minlength=256).astype(np.float64)
    below, total = count.cumsum(), (count * np.arange(256)).cumsum()
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (total / below - (total[-1] - total) / above) ** 2
    return int(np.nan_to_num(between).argmax())


TISSUE_UM = 16.0  # resolution of thumbnail and mask; all that follows was set at it
TISSUE_CHROMA = (40, 60)  # assumed: haze is below, stained tissue above, Otsu decides between
TEXTURE = 4.0  # assumed: glass and haze vary less within 80 um, pale tissue and fat more
SPECK, HOLE = 25, 200  # mask pixels (0.006 and 0.05 mm2) below which they are dropped and filled
STROKE, RIM, HALO = (
    8,
    2,
    32,
)  # mask pixels: half a pen's least width, what is cut around it, how far it fades


def thumbnail(reader: Reader, mpp: float) -> tuple[np.ndarray, np.ndarray]:
    """(h, w, 3) uint8 of the whole slide at TISSUE_UM, box-averaged over white, and (h, w) bool where it could not be read. Read in
    blocks, so memory does not grow with the slide; a block that fails is quartered, down to 1/64 of it, and then read from a finer level."""
    width, height = reader.slide.dimensions
    w, h = (max(1, round(side * mpp / TISSUE_UM)) for side in (width, height))
    coarsest = reader.level_for(TISSUE_UM / mpp)
    step = max(1, int(2048 * reader.downsamples[coarsest] * mpp / TISSUE_UM))
    rgb, unread = np.full((h, w, 3), 255, np.uint8), np.zeros((h, w), bool)
    blocks = [(x, y, step, coarsest) for y in range(0, h, step) for x in range(0, w, step)]
    while blocks:
        if STOP_SIGNALS:
            raise Stopped
        x, y, side, level = blocks.pop()
        right, bottom = min(x + side, w), min(y + side, h)
        try:
            picture, within = reader.read(
                level, (x * width / w, y * height / h, right * width / w, bottom * height / h)
            )
            rgb[y:bottom, x:right] = picture.resize(
                (right - x, bottom - y), Image.Resampling.BOX, box=within
            )
        except openslide.OpenSlideError:
            half = -(-side // 2)
            if side > max(1, step // 8):
                blocks += [
                    (a, b, half, level)
                    for a in (x, x + half)
                    for b in (y, y + half)
                    if a < right and b < bottom
                ]
            elif level:
                blocks.append((x, y, side, level - 1))
            else:
                unread[y:bottom, x:right] = True
    return rgb, unread


def ink_mask(colour: np.ndarray, textured: np.ndarray) -> np.ndarray:
    """Pens and black borders. colour (3, h, w) on white glass, textured (h, w) -> (h, w) bool.

    At 16 um a pixel averages nuclei with what lies between them, so over a stroke's width (a quarter of a millimetre) H&E and DAB are
    never green, as blue or as red as ink, or black. Ink on bare glass is smooth besides: there less colour is enough.
    """
    red, green, blue = colour = ndimage.uniform_filter(colour, (1, 5, 5))
    high = colour.max(0)
    saturation = 1 - colour.min(0) / high.clip(min=1)
    hue = np.degrees(np.arctan2(3**0.5 * (green - blue), 2 * red - green - blue)) % 360
    cool, warm = (hue > 60) & (hue < 245), (hue > 340) | (hue < 10)
    strong = (high < 90) | (red < 80) & (
        (blue - red > 40) | (green - red > 15)
    )  # black; ink over tissue
    strong |= cool & (
        saturation > np.where(hue < 190, 0.2, np.where(textured, 0.5, 0.25))
    )  # green; blue
    strong |= (
        warm & (saturation > np.where(textured, 0.78, np.where(high > 200, 0.5, 0.65)))
        | (hue > 345) & (saturation > 0.3) & ~textured
    )
    core = ndimage.distance_transform_edt(strong) > STROKE
    if not core.any():
        return core
    away = ndimage.distance_transform_edt(~core) - STROKE
    return (away <= RIM) | (away <= HALO) & (cool & (saturation > 0.1) | warm & (saturation > 0.35))


def large_components(mask: np.ndarray, least: int) -> np.ndarray:
    """Those connected pieces of a mask that have at least so many pixels."""
    labels, _ = ndimage.label(mask)
    return mask & (np.bincount(labels.reshape(-1))[labels] >= least)


def find_tissue(rgb: np.ndarray) -> np.ndarray:
    """(h, w, 3) uint8 at TISSUE_UM -> (h, w) bool, for H&E and DAB. Tissue is what is coloured more strongly than haze, or coloured and
    textured (pale stains; fat, which is tissue, by its walls); it is no ink, not black and no speck. Grey (dust, shadow) has no colour."""
    colour = rgb.transpose(2, 0, 1).astype(np.float32, order="C")  # (3, h, w)
    high, low = colour.max(0), colour.min(0)
    glass = colour[
        :, (low >= 180) & (low < 254) & (high - low < 40)
    ]  # pure white is where nothing was scanned
    if glass.shape[1] > 0.01 * low.size:
        white = np.median(glass[:, glass.min(0) >= np.quantile(glass.min(0), 0.75)], axis=1)
        colour = np.minimum(colour * (255 / white[:, None, None]), 255)
    chroma, drop = colour.max(0) - colour.min(0), 255 - colour.min(0)
    mean = functools.partial(ndimage.uniform_filter, size=5)
    textured = (mean(drop**2) - mean(drop) ** 2 > TEXTURE**2) & (mean(chroma) > 5)
    ink = ink_mask(colour, textured)
    chroma[ink] = 0
    inner = ndimage.binary_erosion(
        textured & ~ink, np.ones((5, 5)), border_value=1
    )  # no edges of haze, which are thinner
    mask = inner | (chroma > np.clip(otsu(chroma.astype(np.uint8)), *TISSUE_CHROMA))
    mask = large_components(mask, SPECK)
    holes = ndimage.binary_fill_holes(mask) & ~mask
    return (mask | holes & ~large_components(holes, HOLE)) & ~ink


def find_mask(path: Path, place) -> Path | None:
    """The user's own mask of a slide: the file that --mask names, or <slide_id>.png or .geojson in the folder that it names."""
    if place is None:
        return None
    place = Path(place)
    files = (
        [place / f"{path.stem}{suffix}" for suffix in (".png", ".geojson")]
        if place.is_dir()
        else [place]
    )
    found = [f for f in files if f.is_file()]
    if len(found) != 1:
        raise MixmagError(
            f"--mask: expected one of {' or '.join(map(str, files))}; found {len(found)} of them"
        )
    return found[0]


def polygon_rings(node) -> list:
    """The rings of every polygon of a GeoJSON text: [[outer ring, hole, ...], ...]."""
    if node is None:  # a feature without a geometry
        return []
    if isinstance(node, list):
        return [p for part in node for p in polygon_rings(part)]
    inside = {
        "FeatureCollection": "features",
        "Feature": "geometry",
        "GeometryCollection": "geometries",
    }
    if node["type"] in inside:
        return polygon_rings(node[inside[node["type"]]])
    if node["type"] not in (
        "Polygon",
        "MultiPolygon",
    ):  # points and lines, which annotations hold beside them, have no area
        return []
    return [node["coordinates"]] if node["type"] == "Polygon" else node["coordinates"]


def read_mask(path: Path, slide, shape: tuple) -> np.ndarray:
    """(h, w) bool from one's own mask: a PNG of any size over the whole slide, non-zero is tissue; or GeoJSON polygons in level-0
    pixels, counted from the corner of the slide's bounds as QuPath does (for most formats the slide's corner), or from the slide's own corner
    where the file has a `crs`, as TRIDENT's have.
    Raises MixmagError for a file that is neither, has another shape than the slide or leaves it (2 %), or holds no tissue."""
    (width, height), (h, w) = slide.dimensions, shape
    try:
        if path.suffix.lower() == ".png":
            with Image.open(path) as image:
                colours = [band != "A" for band in image.getbands()]
                pixels = (
                    np.asarray(image)
                    .reshape(image.height, image.width, -1)[..., colours]
                    .any(axis=2)
                )
            if abs(pixels.shape[1] / pixels.shape[0] / (width / height) - 1) > 0.02:
                raise MixmagError(
                    f"{path}: {pixels.shape[1]} x {pixels.shape[0]} is another shape than the slide's {width} x {height}"
                )
            mask = (
                np.asarray(
                    Image.fromarray(pixels.astype(np.uint8) * 255).resize(
                        (w, h), Image.Resampling.BOX
                    )
                )
                > 127
            )
        else:
            drawn, canvas = json.loads(path.read_text("utf-8-sig")), Image.new("1", (w, h))
            corner = [
                0 if "crs" in drawn else int(slide.properties.get(f"openslide.bounds-{k}", 0))
                for k in "xy"
            ]
            for rings in polygon_rings(drawn):
                layer = (
                    Image.new("1", (w, h)) if len(rings) > 1 else canvas
                )  # a hole cuts its own polygon only
                for i, ring in enumerate(rings):
                    points = (np.array(ring, float)[:, :2] + corner) * (w / width, h / height)
                    if (np.abs(points - (w / 2, h / 2)) > np.array([w, h]) * 0.52 + 1).any():
                        raise MixmagError(
                            f"{path}: a polygon leaves the slide's {width} x {height} px; expected level-0 pixels"
                        )
                    ImageDraw.Draw(layer).polygon(points.reshape(-1).tolist(), fill=int(i == 0))
                canvas.paste(layer, mask=layer)
            mask = np.asarray(canvas)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        IndexError,
        Image.DecompressionBombError,
    ) as error:
        raise MixmagError(
            f"{path}: cannot be read as a mask, PNG or GeoJSON ({type(error).__name__}: {error})"
        ) from None
    if not mask.any():
        raise MixmagError(f"{path}: holds no tissue")
    return mask


def tissue_mask(
    reader: Reader, mpp: float, own: Path | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(h, w, 3) uint8 and (h, w) bool at TISSUE_UM: the thumbnail and where tissue is, by the user's mask or by its looks. What cannot
    be read counts as tissue (grey in the picture), so that its windows are tried, found unreadable and counted."""
    picture, unread = thumbnail(reader, mpp)
    mask = (
        find_tissue(picture) | unread if own is None else read_mask(own, reader.slide, unread.shape)
    )
    picture[unread] = 128
    return picture, mask


# ------------------------------------------------------ the plan of a slide, its cells, its picture

MAX_STRETCH = 1.02  # assumed: a mpp is not known better than this, so 0.51 um/px are still 20x
MAX_DRIFT = 1.0  # px of the finest magnification that an edge may lie off the lattice


@dataclass
class TilePlan:
    """What will be read of a slide: one lattice of cells, float in level-0 pixels, whose lines are rounded once, to whole pixels of the
    one level that is read. A tile is an equal part of its cell, so children tile their parent whatever the mpp."""

    mpp: float
    mpp_source: str
    magnifications: list
    cell_px: float
    origin: tuple
    level: int  # the coarsest one that is fine enough for every magnification
    downsample: float
    lines: tuple  # (cols + 1,), (rows + 1,) int: the lattice in the level's pixels
    windows: list  # (col, row, cols, rows) in cells
    candidates: int  # windows looked at
    thumbnail: np.ndarray  # (h, w, 3) at TISSUE_UM
    mask: np.ndarray  # (h, w) where its tissue is
    share: np.ndarray  # (2,) pixels of the mask per level-0 pixel, in x and y
    unscanned: set = field(
        default_factory=set
    )  # cells (col, row) read so far that hold pixels which the file does not have

    @property
    def cells(self) -> int:
        return sum(w[2] * w[3] for w in self.windows)

    @property
    def held(self) -> float:
        """The share of the mask's tissue that lies in the windows; the rest is in windows with too little of it, or beyond the last whole cell."""
        return sum(self.patch(self.mask, *w).sum() for w in self.windows) / max(1, self.mask.sum())

    @property
    def shrink(self) -> int:
        """How many of the level's pixels, to the nearest whole number, a pixel of the finest magnification is the mean of."""
        return max(1, round(10.0 / self.magnifications[-1] / self.mpp / self.downsample))

    def patch(
        self, mask: np.ndarray, col: int, row: int, cols: int = 1, rows: int = 1
    ) -> np.ndarray:
        """The part of a mask that these cells cover, at least one pixel of it."""
        corners = np.array([[col, row], [col + cols, row + rows]]) * self.cell_px + self.origin
        (x0, y0), (x1, y1) = np.round(corners * self.share).astype(int)
        return mask[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]

    @functools.cached_property
    def inside(self) -> np.ndarray:
        """Where tissue is for certain: the mask without its rim, with its small holes, which a lost tile makes, but without its large ones, which
        are lumen or were not scanned."""
        holes = ndimage.binary_fill_holes(self.mask) & ~self.mask
        return ndimage.binary_erosion(
            self.mask | holes & ~large_components(holes, 4 * HOLE), iterations=2
        )


def tile_edges(lines: np.ndarray, k: int) -> np.ndarray:
    """Where the tiles of magnification k (0 is the lowest) begin and end: every interval of the lattice in 2^k equal parts."""
    return np.interp(np.arange((len(lines) - 1) * 2**k + 1) / 2**k, np.arange(len(lines)), lines)


def lattice_error(plan: TilePlan) -> tuple[float, float, list]:
    """How well the tiles keep to the lattice: the largest difference between a parent's and its children's edges, and between any
    edge and the unrounded lattice, in um; and for each magnification the (smallest, largest) um/px of its tiles."""
    nesting, off, sizes = [0.0], [], []
    for lines, start in zip(plan.lines, plan.origin):
        edges = [
            tile_edges(lines, k) * plan.downsample * plan.mpp
            for k in range(len(plan.magnifications))
        ]  # um
        nesting += [np.abs(child[::2] - parent).max() for parent, child in zip(edges, edges[1:])]
        off += [
            np.abs(e - (start + plan.cell_px / 2**k * np.arange(len(e))) * plan.mpp).max()
            for k, e in enumerate(edges)
        ]
        sizes.append([np.diff(e) / TILE_PX for e in edges])
    return (
        max(nesting),
        max(off),
        [(min(x.min(), y.min()), max(x.max(), y.max())) for x, y in zip(*sizes)],
    )


def plan_slide(reader: Reader, args) -> TilePlan:
    """Lattice of cells in exact mpp from the slide's (or its bounds') corner; windows of region x region cells on a lattice of
    that stride; a window is accepted by its tissue, with those of its cells that lie wholly on the slide."""
    slide, R, finest = (
        reader.slide,
        args.region,
        10.0 / args.magnifications[-1],
    )  # 20x is 0.5 um/px, 5x is 2.0
    given, giver = user_mpp(reader.path.stem, args.manifest, args.mpp)
    mpp, source = slide_mpp(slide, given, giver, args.mpp_from_power)
    if mpp > MAX_STRETCH * finest:
        coarser = [str(m) for m in args.magnifications if mpp <= MAX_STRETCH * 10.0 / m]
        raise MixmagError(
            f"its {mpp:g} um/px are coarser than {args.magnifications[-1]}x ({finest:g} um/px), and nothing is upsampled; "
            + (
                f"--magnifications {' '.join(coarser)} tiles it at what it has"
                if coarser
                else "it has none of the magnifications"
            )
        )
    cell_px = TILE_PX * 10.0 / args.magnifications[0] / mpp
    left, top, width, height = (
        int(slide.properties.get(f"openslide.bounds-{k}", default))
        for k, default in zip(("x", "y", "width", "height"), (0, 0, *slide.dimensions))
    )
    cols, rows = (
        int((width + 1) / cell_px),
        int((height + 1) / cell_px),
    )  # a last line may be rounded, too
    if not cols or not rows:
        raise MixmagError(
            f"its {width} x {height} px are less than one cell of {cell_px:g} px ({cell_px * mpp:g} um)"
        )
    level = reader.level_for(finest / mpp)
    downsample = reader.downsamples[level]
    lines = tuple(
        np.round((start + cell_px * np.arange(count + 1)) / downsample).clip(max=size).astype(int)
        for start, count, size in zip((left, top), (cols, rows), reader.sizes[level])
    )
    picture, mask = tissue_mask(reader, mpp, find_mask(reader.path, args.mask))
    candidates = [
        (col, row, min(R, cols - col), min(R, rows - row))
        for row in range(0, rows, R)
        for col in range(0, cols, R)
    ]
    plan = TilePlan(
        mpp,
        source,
        args.magnifications,
        cell_px,
        (float(left), float(top)),
        level,
        downsample,
        lines,
        [],
        len(candidates),
        picture,
        mask,
        np.array(mask.shape[::-1]) / reader.sizes[0],
    )
    off = lattice_error(plan)[1]
    if off > MAX_DRIFT * finest:
        raise MixmagError(
            f"level {level} ({reader.sizes[level]} px) does not fit level 0 ({reader.sizes[0]} px): edges would lie "
            f"{off:.3g} um off, more than {MAX_DRIFT * finest:g} um"
        )
    plan.windows = [
        window for window in candidates if plan.patch(mask, *window).mean() >= args.min_tissue
    ]
    return plan


MAX_LOST = 0.01  # share of a cell that may be missing where the mask sees tissue (assumed)


def read_cell(reader: Reader, plan: TilePlan, col: int, row: int) -> np.ndarray:
    """(T, 224, 224, 3) uint8: a cell's tiles in the slide file's token order. Its pixels are decoded once. They are resampled once, by
    a factor near 1; means of whole pixels do the rest, which together is area averaging: a tile is the mean of its children.
    Raises openslide.OpenSlideError or MixmagError for pixels that cannot be read, or are missing where there was tissue."""
    (left, right), (top, bottom) = (
        lines[i : i + 2].tolist() for lines, i in zip(plan.lines, (col, row))
    )
    pixels = reader.region(
        plan.level, left, top, right, bottom
    )  # (h, w, 4): torch and Pillow work faster on four bytes a pixel than on three
    least = (
        pixels.view(np.uint32).min() >> 24
    )  # the least alpha: the highest byte of a little-endian word
    if least == 0:
        plan.unscanned.add((col, row))
        inside = plan.patch(plan.inside, col, row)
        lost = (
            inside
            & (
                np.asarray(
                    Image.fromarray(pixels[..., 3]).resize(inside.shape[::-1], Image.Resampling.BOX)
                )
                == 0
            )
        ).mean()
        if lost > MAX_LOST:
            raise MixmagError(
                f"level {plan.level} has no pixels for {lost:.0%} of the cell at (col, row) ({col}, {row}), where the thumbnail "
                "shows tissue"
            )
    if least < 255:
        pixels = np.asarray(over_white(pixels).convert("RGBX"))
    K = len(plan.magnifications)
    side = TILE_PX * 2 ** (K - 1) * plan.shrink
    if pixels.shape[:2] != (side, side):
        planes = torch.from_numpy(np.require(pixels, requirements="W"))[None].permute(0, 3, 1, 2)
        pixels = (
            F.interpolate(planes, size=(side, side), mode="bilinear", antialias=True)[0]
            .permute(1, 2, 0)
            .numpy()
        )
    picture, tiles = (
        Image.frombuffer("RGBX", (side, side), pixels, "raw", "RGBX", 0, 1),
        np.empty(((4**K - 1) // 3, TILE_PX, TILE_PX, 3), np.uint8),
    )
    for k, shrink in zip(range(K - 1, -1, -1), (plan.shrink, *[2] * K)):
        picture, n = picture.reduce(shrink) if shrink > 1 else picture, 2**k
        rgb = np.frombuffer(picture.tobytes("raw", "RGB"), np.uint8).reshape(
            n, TILE_PX, n, TILE_PX, 3
        )
        tiles[magnification_entries(k)].reshape(n, n, TILE_PX, TILE_PX, 3)[:] = rgb.swapaxes(1, 2)
    return tiles


def read_window(reader: Reader, plan: TilePlan, window: tuple) -> np.ndarray:
    """(cells, T, 224, 224, 3) uint8: the tiles of a window, cell-major."""
    col, row, cols, rows = window
    return np.stack(
        [read_cell(reader, plan, col + c, row + r) for r in range(rows) for c in range(cols)]
    )


def read_cells(reader: Reader, plan: TilePlan):
    """Yields (number of the window, (col, row), tiles or the error that says why there are none) in the plan's order, while threads
    read a few cells ahead."""

    def read(place):
        try:
            return *place, read_cell(reader, plan, *place[1])
        except (openslide.OpenSlideError, MixmagError) as error:
            return *place, error

    cells = [
        (i, (col + c, row + r))
        for i, (col, row, cols, rows) in enumerate(plan.windows)
        for r in range(rows)
        for c in range(cols)
    ]
    return prefetch(read, cells, torch.get_num_threads())


def scale_bar(axis, across: float) -> None:
    """A bar of a round length at the lower left of a picture whose axis is in um and shows `across` of them."""
    length = max(
        n * 10.0**k for n in (1, 2, 5) for k in range(6) if n * 10.0**k <= max(across / 3, 1)
    )
    (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    x, y = left + 0.04 * (right - left), bottom + 0.04 * (top - bottom)
    for colour, thick in (("white", 5), ("black", 3)):
        axis.plot([x, x + length], [y, y], color=colour, lw=thick, solid_capstyle="butt")
    axis.annotate(
        f"{length:g} um" if length < 1000 else f"{length / 1000:g} mm",
        (x, y),
        (0, 5),
        textcoords="offset points",
        fontsize=8,
        bbox={"facecolor": "white", "alpha": 0.7, "lw": 0, "pad": 1},
    )


def draw_qc(path, reader: Reader, plan: TilePlan) -> None:
    """A PNG to look at: the thumbnail with the contours of its tissue and the kept windows; and of the window that holds most tissue (red)
    and of the fullest cell in it the tiles, as they go to the encoder, each magnification at the same physical size."""
    from matplotlib.collections import PatchCollection
    from matplotlib.figure import Figure  # without pyplot: nothing global, no display
    from matplotlib.patches import Rectangle

    (width, height), K, mpp = reader.slide.dimensions, len(plan.magnifications), plan.mpp
    figure = Figure((5 + 2.6 * K, 5.8), dpi=130, layout="constrained")
    grid = figure.add_gridspec(2, K + 2)
    axis = figure.add_subplot(grid[:, : 2 if plan.windows else K + 2])
    shrink = -(-max(plan.mask.shape) // 1500)
    extent = 0, width * mpp, height * mpp, 0  # of the slide in um: left, right, bottom, top
    axis.imshow(Image.fromarray(plan.thumbnail).reduce(shrink), extent=extent)
    if plan.mask.any() and not plan.mask.all():
        axis.contour(
            plan.mask[::shrink, ::shrink],
            levels=[0.5],
            colors="lime",
            linewidths=0.7,
            origin="upper",
            extent=extent,
        )
    (left, top), side = np.array(plan.origin) * mpp, plan.cell_px * mpp
    frames = [
        Rectangle((left + col * side, top + row * side), cols * side, rows * side)
        for col, row, cols, rows in plan.windows
    ]
    axis.add_collection(PatchCollection(frames, facecolor="none", edgecolor="tab:blue", lw=0.7))
    axis.set_title(
        "\n".join(
            [
                *textwrap.wrap(reader.path.stem, 60),
                f"{mpp:.4g} um/px ({plan.mpp_source}); tissue {plan.mask.mean():.1%}",
                f"{len(frames)} of {plan.candidates} windows kept, {plan.held:.0%} of the tissue",
            ]
        ),
        fontsize=9,
        parse_math=False,
    )
    axis.set(xticks=[], yticks=[])
    scale_bar(axis, width * mpp)
    if plan.windows:
        col, row, cols, rows = best = max(
            plan.windows, key=lambda window: plan.patch(plan.mask, *window).sum()
        )
        axis.add_collection(
            PatchCollection(
                [frames[plan.windows.index(best)]], facecolor="none", edgecolor="red", lw=1.5
            )
        )
        fullest = max(
            ((c, r) for r in range(rows) for c in range(cols)),
            key=lambda cell: plan.patch(plan.mask, col + cell[0], row + cell[1]).sum(),
        )
        draw_window(figure, grid, reader, plan, best, fullest)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png")


def draw_window(figure, grid, reader: Reader, plan: TilePlan, window: tuple, cell: tuple) -> None:
    """The right part of draw_qc: a window's tiles above, those of one of its cells (col, row) below; white lines are the tiles' edges."""
    try:
        tiles = read_window(reader, plan, window)
    except (openslide.OpenSlideError, MixmagError) as error:
        axis = figure.add_subplot(grid[:, 2:], frame_on=False, xticks=[], yticks=[])
        axis.text(
            0.5,
            0.5,
            f"the window with most tissue cannot be read:\n{error}",
            ha="center",
            wrap=True,
            parse_math=False,
        ).set_in_layout(False)
        return
    tiles, side = (
        tiles.reshape(window[3], window[2], *tiles.shape[1:]),
        plan.cell_px * plan.mpp,
    )  # (rows, cols, T, 224, 224, 3), um
    for line, (name, part) in enumerate(
        (("window", tiles), ("one cell", tiles[cell[1] : cell[1] + 1, cell[0] : cell[0] + 1]))
    ):
        for k, m in enumerate(plan.magnifications):
            rows, cols, n = *part.shape[:2], 2**k
            picture = (
                part[:, :, magnification_entries(k)]
                .reshape(rows, cols, n, n, TILE_PX, TILE_PX, 3)
                .transpose(0, 2, 4, 1, 3, 5, 6)
            )
            picture = Image.fromarray(picture.reshape(rows * n * TILE_PX, cols * n * TILE_PX, 3))
            axis = figure.add_subplot(grid[line, 2 + k])
            axis.imshow(
                picture.reduce(max(1, max(picture.size) // 900)),
                extent=(0, cols * side, rows * side, 0),
            )
            axis.vlines(np.arange(1, cols * n) * side / n, 0, rows * side, color="white", lw=0.4)
            axis.hlines(np.arange(1, rows * n) * side / n, 0, cols * side, color="white", lw=0.4)
            axis.set(xticks=[], yticks=[])
            axis.set_title(f"{name}, {m}x: {cols * n} x {rows * n} tiles", fontsize=8)
            scale_bar(axis, cols * side)


def plan_report(reader: Reader, plan: TilePlan, region: int) -> str:
    """Two lines about what will be read, and how exactly."""
    whole = sum(w[2] * w[3] == region**2 for w in plan.windows)
    nesting, off, kept = lattice_error(plan)
    tokens = [plan.cells * 4**k for k in range(len(kept))]
    finest, native = 10.0 / plan.magnifications[-1], plan.mpp * plan.downsample
    return (
        f"{reader.path.stem}: {plan.mpp:.4g} um/px ({plan.mpp_source}), level {plan.level} of {len(reader.sizes)} "
        f"(downsample {plan.downsample:.6g}), {len(plan.windows)} of {plan.candidates} windows hold tissue "
        f"({whole} with all {region**2} cells) and {plan.held:.0%} of it, {plan.cells} cells, {sum(tokens)} tokens ("
        + ", ".join(f"{m}x {n}" for m, n in zip(plan.magnifications, tokens))
        + ")\n"
        f"    drift: children meet their parents within {nesting:.2g} um, edges keep to the lattice within {off:.2g} um; "
        "um/px asked (effective): "
        + ", ".join(
            f"{m}x {10 / m:g} ({low:.4g} to {high:.4g})"
            for m, (low, high) in zip(plan.magnifications, kept)
        )
        + (
            f"; the slide's {native:.4g} um/px are interpolated by {native / finest - 1:.1%}"
            if native > 1.0005 * finest
            else ""
        )
    )


# ------------------------------------------------------------------------------------ tile encoders


def texture(tiles: torch.Tensor) -> torch.Tensor:
    """A stand-in for a tile foundation model: 46 fixed colour and texture statistics, no weights, the same for a turned tile.

    tiles (B, 224, 224, 3) uint8 RGB -> (B, 46) float32: it makes the whole chain runnable anywhere; it is no substitute for a
    trained encoder.
    """
    rgb = tiles.permute(0, 3, 1, 2).float()  # (B, 3, 224, 224)
    density = -torch.log10((rgb + 1) / 256)  # optical density, Beer-Lambert
    stains = torch.tensor(
        [[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]]
    )  # Ruifrok & Johnston 2001
    stained = torch.einsum("sc,bchw->bshw", stains.to(density), density)  # (B, 3, 224, 224)
    flat = stained.flatten(2)
    ordered = F.avg_pool2d(stained, 4).flatten(2).sort().values  # (B, 3, 56 * 56)
    quantiles = ordered[
        ..., (torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]) * ordered.shape[-1]).long()
    ]  # (B, 3, 5)
    features = [flat.mean(2), flat.std(2), quantiles.flatten(1)]  # 3 + 3 + 15
    for scale in (1, 2, 4, 8, 16):  # how much varies between neighbours, and within, at each scale
        coarse = F.avg_pool2d(stained[:, :2], scale)
        steps = coarse.diff(dim=2).abs().mean((2, 3)) + coarse.diff(dim=3).abs().mean(
            (2, 3)
        )  # (B, 2)
        features += [2 * steps, coarse.std((2, 3))]  # 5 * 4
    chroma = (rgb.amax(1) - rgb.amin(1)) / 255
    features += [chroma.mean((1, 2))[:, None], chroma.std((1, 2))[:, None]]  # 2
    centred = flat[:, :2] - flat[:, :2].mean(2, keepdim=True)
    features += [
        10 * centred.prod(1).mean(1, keepdim=True),
        (rgb.mean(1) > 220).float().mean((1, 2))[:, None],
        rgb.mean((2, 3))[:, :1] / 255,
    ]  # 3
    return torch.cat(features, dim=1)


def tile_encoder(name: str, device, weights=None):
    """The callable (B, 224, 224, 3) uint8 -> (B, D) that `name` stands for; tiles come to it on `device`. Raises MixmagError if there is none."""
    if weights and name != "virchow2":
        raise MixmagError(
            f"--weights {weights}: only --encoder virchow2 takes weights from a file, not {name}"
        )
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
        raise MixmagError(
            f"--encoder {name}: {factory}() returned {type(encoder).__name__}, expected a callable (B, 224, 224, 3) uint8 -> (B, D)"
        )
    return encoder.to(device).eval() if isinstance(encoder, torch.nn.Module) else encoder


def encode_tiles(
    encoder, tiles: np.ndarray, batch_size: int, device, dim: int | None = None
) -> np.ndarray:
    """tiles (..., 224, 224, 3) uint8 -> (..., D) float16. Raises MixmagError for an output that is no (B, D) of finite floating-point
    numbers in float16's range, or whose width is not the same in every batch (and `dim`, if given)."""
    flat, made = torch.from_numpy(tiles.reshape(-1, *tiles.shape[-3:])), []
    with torch.inference_mode():
        for batch in flat.split(batch_size):
            out = encoder(batch.to(device))
            is_tensor = isinstance(out, torch.Tensor)
            if (
                not is_tensor
                or not out.is_floating_point()
                or out.ndim != 2
                or len(out) != len(batch)
                or out.shape[1] != (dim or out.shape[1])
            ):
                raise MixmagError(
                    f"the encoder made {f'{out.dtype} {tuple(out.shape)}' if is_tensor else type(out).__name__} of {len(batch)} tiles, "
                    f"expected floating-point numbers ({len(batch)}, {dim or 'D'})"
                )
            dim = out.shape[1]
            made.append(out.half().cpu())
    half = torch.cat(made)
    if not torch.isfinite(half).all():
        raise MixmagError(
            f"the encoder returned NaN, or values beyond float16, for {int((~half.isfinite()).any(1).sum())} of {len(half)} tiles"
        )
    return half.numpy().reshape(*tiles.shape[:-3], -1)


class Virchow2(torch.nn.Module):
    """tiles (B, 224, 224, 3) uint8 -> (B, 1280) float32: the class token of Virchow2 (Zimmermann et al. 2024), a ViT-H/14 of 631 M
    parameters; fp16 autocast on a GPU.

    The model's tokens are class, 4 registers, 256 patches; paper 4.1 uses the class token alone. The constants are ImageNet's, written
    out: the configuration that timm attaches to a locally built model says 0.5. At 224 px nothing is resized or cropped.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]))

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        pictures = ((tiles / 255 - self.mean) / self.std).permute(0, 3, 1, 2)
        with torch.autocast(tiles.device.type, torch.float16, enabled=tiles.device.type == "cuda"):
            return self.model(pictures)[:, 0].float()


def load_virchow2(device, weights=None) -> Virchow2:
    """With the weights of the file, else of the Hugging Face hub. Raises MixmagError saying what to do where it cannot be had."""
    try:
        import timm
        from timm.layers import SwiGLUPacked
    except (
        ImportError,
        RuntimeError,
    ) as error:  # RuntimeError: a torchvision that was built for another torch
        absent = isinstance(error, ModuleNotFoundError) and error.name == "timm"
        raise MixmagError(
            "--encoder virchow2 needs timm, and "
            + (
                "it is not installed"
                if absent
                else f"the torchvision beside it does not match torch {torch.__version__} ({error})"
            )
            + ": pip install timm torchvision==0.28.0, the one that matches torch 2.13, "
            "for the same device (CPU or CUDA) as torch"
        ) from None
    layers = {
        "mlp_layer": SwiGLUPacked,
        "act_layer": torch.nn.SiLU,
    }  # no configuration file can say these
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
        except (
            OSError
        ) as error:  # all that the hub and the network raise; its text may hold a token
            refused = getattr(getattr(error, "response", None), "status_code", None) in (401, 403)
            raise MixmagError(
                "Virchow2 is a gated repository that refused: accept its terms at huggingface.co/paige-ai/Virchow2 and set "
                "HF_TOKEN to a token of that account, or give --weights FILE"
                if refused
                else f"Virchow2 cannot be fetched ({error.strerror or type(error).__name__}): without a network give "
                "--weights FILE"
            ) from None
    encoder = Virchow2(model).to(device).eval()
    encode_tiles(encoder, np.full((2, TILE_PX, TILE_PX, 3), 200, np.uint8), 2, device, 1280)
    return encoder


def load_weights(model: torch.nn.Module, path) -> None:
    """Give a model on the meta device the weights of a file, all of them and no others, as fp32. Raises MixmagError naming what does not fit."""
    try:
        state = (
            safetensors.torch.load_file(path)
            if str(path).endswith(".safetensors")
            else torch.load(path, "cpu", weights_only=True, mmap=True)
        )
        found = {k: tuple(v.shape) for k, v in state.items()}
    except Exception as error:  # each of the two libraries has half a dozen ways to say it
        raise MixmagError(
            f"--weights {path}: cannot be read as a file of named tensors ({type(error).__name__})"
        ) from None
    wanted = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    wrong = {
        "missing": wanted.keys() - found.keys(),
        "unexpected": found.keys() - wanted.keys(),
        "of another shape": {k for k in wanted.keys() & found.keys() if wanted[k] != found[k]},
    }
    if any(wrong.values()):
        said = "; ".join(
            f"{len(keys)} {what}, such as {', '.join(sorted(keys)[:3])}"
            for what, keys in wrong.items()
            if keys
        )
        raise MixmagError(f"--weights {path}: does not fit Virchow2: {said}")
    model.load_state_dict({k: v.float() for k, v in state.items()}, strict=True, assign=True)


# --------------------------------------------------------------------------------- the tile command

MAX_BAD_WINDOWS = 0.01  # a slide of which more cannot be read has failed


def tile_slide(reader: Reader, plan: TilePlan, encoder, dim: int, args) -> tuple:
    """features (C, T, D), cells (C, 2), and how many windows were dropped because their pixels could not be read."""
    kept, bad = [], set()  # (window, cell) of what was read, in its order; windows that are dropped

    def readable():
        for i, cell, tiles in progress(
            read_cells(reader, plan), total=plan.cells, desc=reader.path.stem[:24], leave=False
        ):
            if isinstance(tiles, Exception):
                bad.add(i)
                if len(bad) > MAX_BAD_WINDOWS * len(plan.windows):
                    raise MixmagError(
                        f"{len(bad)} of {len(plan.windows)} windows cannot be read, more than {MAX_BAD_WINDOWS:.0%}: {tiles}"
                    )
            elif i not in bad:
                kept.append((i, cell))
                yield tiles

    T, cells = Geometry(1, args.magnifications).tokens_per_cell, readable()
    groups = iter(
        lambda: list(itertools.islice(cells, max(1, args.batch_size // T))), []
    )  # as many whole cells as a batch holds
    features = [
        encode_tiles(encoder, np.stack(group), args.batch_size, args.device, dim)
        for group in groups
    ]  # each (cells, T, D)
    features = np.concatenate([np.zeros((0, T, dim), np.float16), *features])
    good = np.array([i not in bad for i, _ in kept], bool)
    cells = np.array([cell for _, cell in kept], np.int32).reshape(-1, 2)
    return (features[good], cells[good], len(bad)) if bad else (features, cells, 0)


def slide_files_below(folder: Path):
    """Slide files in a folder and those below it, also by links, but not in hidden ones; each folder once."""
    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(place))
        folders[:] = sorted(
            f
            for f in folders
            if not f.startswith(".") and os.path.realpath(os.path.join(place, f)) not in seen
        )
        yield from (
            Path(place, f)
            for f in sorted(files)
            if not f.startswith(".") and Path(f).suffix.lower() in SLIDE_SUFFIXES
        )


def one_per_series(paths: list) -> list:
    """Without the further files of a DICOM slide: any of a series opens all of it."""
    seen, kept = {}, []
    for path in paths:
        try:
            series = (
                path.parent,
                openslide.OpenSlide(path).properties["openslide.quickhash-1"]
                if path.suffix.lower() == ".dcm"
                else path.name,
            )
        except (openslide.OpenSlideError, OSError, KeyError):
            series = path.parent, path.name  # what cannot be opened says so when its turn comes
        if seen.setdefault(series, path) == path:
            kept.append(path)
        else:
            print(f"{path}: the same DICOM series as {seen[series].name}", file=sys.stderr)
    return kept


def find_slide_files(places) -> list[Path]:
    """Slide files, named or found in folders. Raises MixmagError where two would have the same slide id."""
    paths = [
        path
        for place in map(Path, places)
        for path in (slide_files_below(place) if place.is_dir() else [place])
    ]
    paths, by_id = (
        one_per_series(list({(path.resolve(), path.name): path for path in paths}.values())),
        defaultdict(list),
    )
    for path in paths:
        by_id[path.stem.lower()].append(str(path))
    clashes = [" and ".join(same) for same in by_id.values() if len(same) > 1]
    if clashes or not paths:
        raise MixmagError(
            f"slides with one id: {'; '.join(clashes)}: rename them"
            if clashes
            else f"no slides in {', '.join(map(str, places))} (suffixes: {' '.join(SLIDE_SUFFIXES)})"
        )
    return paths


def tile_one(path: Path, encoder, dim: int, args) -> tuple[str, int]:
    """Tile one slide into its file; the report, and the bytes that it takes. Raises MixmagError if it cannot be done."""
    if not path.exists():
        raise MixmagError(f"{path}: no such file")
    if path.stem.encode("utf-8", "ignore").decode("utf-8") != path.stem:
        raise MixmagError(f"{ascii(path.stem)}: the name is no UTF-8; rename the file")
    out = Path(args.out).resolve() / "slides" / f"{path.stem}.safetensors"
    mask = find_mask(path, args.mask)
    settings = {
        "region": args.region,
        "min_tissue": args.min_tissue,
        "source_bytes": path.stat().st_size,
        "mask": mask and file_sha256(mask),
        "weights": args.weights_sha256,
    }
    if already_done(
        out,
        {"encoder": args.encoder, "magnifications": args.magnifications, "settings": settings},
        user_mpp(path.stem, args.manifest, args.mpp)[0],
    ):
        return f"{path.stem}: done before", 0
    reader = Reader(path)
    plan = plan_slide(reader, args)
    size = plan.cells * Geometry(1, args.magnifications).tokens_per_cell * dim * 2
    report = plan_report(reader, plan, args.region) + f"; {size / 1e6:.2f} MB"
    if not args.dry_run:
        require_room(out, size)
        draw_qc(out.parents[1] / "qc" / f"{path.stem}.png", reader, plan)
        features, cells, bad = tile_slide(reader, plan, encoder, dim, args)
        width, height = reader.slide.dimensions
        write_slide(
            out,
            features,
            cells,
            np.ones(features.shape[:2], bool),
            {
                "slide_id": path.stem,
                "encoder": args.encoder,
                "magnifications": args.magnifications,
                "tile_px": TILE_PX,
                "mpp": plan.mpp,
                "cell_px": plan.cell_px,
                "origin": plan.origin,
                "width": width,
                "height": height,
                "n_bad": bad,
                "n_unscanned": len(plan.unscanned),
                "settings": settings,
            },
        )
        report += f"; {bad} windows dropped as unreadable" if bad else ""
        report += (
            f"; {len(plan.unscanned)} cells hold pixels that the file does not have, taken for glass"
            if plan.unscanned
            else ""
        )
    nothing = f"; nothing to embed: tissue is {plan.mask.mean():.1%} of the slide, and of no window as much as --min-tissue {args.min_tissue:.0%}"
    return report + ("" if plan.windows else nothing), size


def slides_to_tile(args) -> tuple[list[Path], Path]:
    """The slides of this share, after everything that can be refused before any work, and where those that fail are to be listed. args.manifest
    becomes what it says."""
    try:
        Geometry(args.region, args.magnifications)
    except ValueError as error:
        raise MixmagError(str(error)) from None
    if args.shard and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise MixmagError(
            f"--shard {args.shard}: torchrun shares the slides out already; leave out one of the two"
        )
    shard = args.shard or f"{os.environ.get('RANK', 0)}/{os.environ.get('WORLD_SIZE', 1)}"
    share, shares = (
        (int(part) for part in shard.split("/")) if re.fullmatch(r"\d+/\d+", shard) else (1, 0)
    )
    if share >= shares:
        raise MixmagError(f"--shard {shard}: expected i/n with 0 <= i < n")
    paths, args.manifest = find_slide_files(args.slides), read_manifest(args.manifest)
    warn_unmatched_rows(args.manifest, {path.stem for path in paths})
    if args.mask and not Path(args.mask).exists():
        raise MixmagError(f"--mask {args.mask}: no such file or folder")
    if args.mask and Path(args.mask).is_file() and len(paths) > 1:
        raise MixmagError(
            f"--mask {args.mask} is one file for {len(paths)} slides; give a folder of <slide_id>.png or .geojson"
        )
    paths, out = paths[share::shares], Path(args.out).resolve()
    if any(path.resolve().parent in (out, out / "slides") for path in paths):
        raise MixmagError(
            f"--out {args.out} would write among the slides themselves; name another folder"
        )
    return paths, out / ("failed.csv" if shares == 1 else f"failed-{share}-of-{shares}.csv")


def tile_command(args) -> int:
    paths, listed = slides_to_tile(args)
    args.device = find_device(args.device)
    encoder = tile_encoder(args.encoder, args.device, args.weights)
    dim = encode_tiles(
        encoder, np.full((1, TILE_PX, TILE_PX, 3), 255, np.uint8), 1, args.device
    ).shape[1]
    args.weights_sha256 = args.weights and file_sha256(args.weights)
    failed, needed = [], 0
    sweep(listed.parent / "slides")
    for path in progress(paths, desc="slides"):
        try:
            report, size = tile_one(path, encoder, dim, args)
        except Stopped:
            raise
        except Exception as error:  # whatever a slide, or the user's encoder, raises
            reason = " ".join(
                (
                    str(error)
                    if isinstance(error, MixmagError)
                    else f"{type(error).__name__}: {error}"
                ).split()
            )
            failed.append((path.stem, "tile", reason))
            print(f"{path.stem}: FAILED: {reason}", file=sys.stderr)
        else:
            needed += size
            print(report, flush=True)
    if (
        int(os.environ.get("WORLD_SIZE", 1)) > 1
    ):  # torchrun ends all processes with the first that ends with a code such as 3
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if args.dry_run:
        free = free_bytes(listed.parent)
        print(
            f"{len(paths) - len(failed)} slides can be tiled, {len(failed)} cannot; {needed / 1e9:.3f} GB are needed, {free / 1e9:.3f} GB free "
            f"under {args.out}"
        )
        if needed > free:
            raise MixmagError(f"the slides do not fit under --out {args.out}")
        return 3 if failed else 0
    print(
        f"{len(paths) - len(failed)} slides done, {len(failed)} failed"
        + (f" (see {listed})" if failed else "")
    )
    for old in (
        listed.parent.glob("failed-*-of-*.csv") if listed.name == "failed.csv" else ()
    ):  # of shares, done again as a whole
        old.unlink()
    return report_failed(listed, failed)


# --------------------------------------------------------------------- import of other tools' files

IMPORT_SECONDS = 60  # assumed: a slide that takes longer, and longer than 1 s per MiB, hangs
STAMP_SNAP = 0.1  # assumed: how far STAMP's tiles may be off their lattice, in tiles
MAX_RATIO = 1032  # gzip cannot shrink more, so an array is at most this many times its file


def whole_if_possible(value: float) -> int | float:
    """5 for 5.0, and 2.5 for 2.5."""
    return int(value) if value == int(value) else value


@dataclass
class ImportJob:
    """A slide to import, and what the user says of it."""

    slide_id: str
    paths: list[Path]  # one file for each magnification, from low to high
    out: Path
    tool: str  # trident or stamp
    encoder: str | None = None
    class_token: bool | None = None
    mpp: float | None = None
    mpp_source: str = "--mpp"
    region: int = 3


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


def read_array(file: h5py.File, name: str, columns: int | None = None) -> np.ndarray:
    """Numbers (n, columns) that lie in this very file. Anything else is refused unread."""
    array = file[name]
    shape: tuple = getattr(array, "shape", ())  # a group has none
    if len(shape) != 2 or columns not in (None, shape[1]) or array.dtype.kind not in "iuf":
        raise MixmagError(f"{array} is no array of numbers (n, {columns or 'D'})")
    size = math.prod(shape) * array.dtype.itemsize
    elsewhere = array.file != file or array.is_virtual or array.external
    if elsewhere or size > MAX_RATIO * os.path.getsize(file.filename):
        raise MixmagError(f"{name} claims {size} bytes that its file does not hold")
    return array[...]


def read_trident(file: h5py.File) -> FeatureFile:
    """Layout: trident/IO.py of mahmoodlab/TRIDENT."""
    features = read_array(file, "features")
    corners = read_array(file, "coords", columns=2)
    facts = file["coords"].attrs
    return FeatureFile(
        features,
        corners,
        side=float(facts["patch_size_level0"]),
        tile_px=int(facts["patch_size"]),
        magnification=float(facts["target_magnification"]),
        encoder=file["features"].attrs.get("encoder"),
        slide_size=(facts.get("level0_width"), facts.get("level0_height")),
    )


def read_stamp(file: h5py.File) -> FeatureFile:
    """Layout: src/stamp/preprocessing/__init__.py of KatherLab/STAMP, from version 2.1 on."""
    features = read_array(file, "feats")
    corners = read_array(file, "coords", columns=2)
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
    except Exception as error:  # damage raises a dozen types, and names hold control characters
        raise MixmagError(f"{path}: {re.sub('[^ -~]', '?', str(error))}") from None
    with np.errstate(over="ignore"):
        found.features = found.features.astype(np.float16)
    good = np.isfinite(found.features).all(axis=1)
    good &= found.features.any(axis=1)  # HDF5 reads zeros where a row was never written
    if not good.all():
        bad = len(good) - np.count_nonzero(good)
        raise MixmagError(f"{path}: {bad} of {len(good)} tiles are NaN, beyond float16 or zero")
    return found


def check_same_slide(files: list[FeatureFile]) -> None:
    """Raises MixmagError unless the files are of one slide, one encoder and a run of doublings."""
    for low, high in itertools.pairwise(files):
        if low.encoder != high.encoder:
            raise MixmagError(f"its files are of two encoders: {low.encoder}, {high.encoder}")
        if low.slide_size != high.slide_size:
            raise MixmagError(f"its files are of two sizes: {low.slide_size}, {high.slide_size}")
        if high.magnification != 2 * low.magnification or high.side != low.side / 2:
            raise MixmagError(
                f"{low.magnification:g}x has tiles of {low.side:g}, {high.magnification:g}x of "
                f"{high.side:g}; expected doublings in the folders' order, and half the side"
            )


def embedding_width(width: int, encoder: str, class_token: bool | None) -> int:
    """How many numbers to keep. Virchow2's 2560 are its class token, then the mean patch token."""
    unclear = class_token is None and width == 2560 and encoder != "virchow2"
    if unclear or (class_token and width != 2560):
        raise MixmagError(
            f"its embeddings hold {width} numbers of {encoder!r}: --class-token keeps the first "
            "1280 of 2560, --no-class-token keeps all"
        )
    return 1280 if width == 2560 and class_token is not False else width


def import_mpp(files: list[FeatureFile], job: ImportJob) -> tuple[float, str]:
    """um per level-0 pixel, and who says so: the user, else the size of TRIDENT's tiles. STAMP's
    files know no pixels: there a pixel is by default one of the finest magnification."""
    nominal = 10 / files[-1].magnification
    if job.tool == "trident":
        nominal *= files[-1].tile_px / files[-1].side
    mpp, source = (nominal, "nominal") if job.mpp is None else (job.mpp, job.mpp_source)
    if not 0.1 <= mpp <= 4:
        raise MixmagError(f"{source} mpp is {mpp:g} um/px, expected 0.1 to 4; give it with --mpp")
    # TRIDENT cuts slides of 0.2 to 0.3 um/px as if they were 0.25.
    if job.tool == "trident" and abs(mpp - nominal) > 0.2 * nominal:
        raise MixmagError(f"{source} says {mpp:g}, its tiles were cut as if it were {nominal:.4g}")
    return mpp, source


def lattice_positions(file: FeatureFile, tool: str) -> np.ndarray:
    """(n, 2) int64: col, row of the tiles on the lattice of their side."""
    exact = file.corners / file.side
    position = np.rint(exact)
    tolerance = np.zeros_like(exact)
    if tool == "stamp":  # its tiles are up to 1 px too far apart
        tolerance = STAMP_SNAP + position / file.tile_px
    fits = np.abs(exact - position) <= tolerance
    fits &= (position >= 0) & (position < 2**31)
    if not fits.all():
        off = file.corners[~fits.all(axis=1)]
        raise MixmagError(
            f"{file.magnification:g}x: {len(off)} of {len(fits)} tiles are off the lattice of "
            f"{file.side:g}, first {off[0].tolist()}; expected tiles without overlap"
        )
    return position.astype(np.int64)


def assemble_cells(files: list, positions: list) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """features (C, T, D), cells (C, 2), valid (C, T). A cell exists where any of its tiles does."""
    keys = [(position >> k) @ [1, 2**32] for k, position in enumerate(positions)]
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
        doubles = len(row) - np.count_nonzero(valid[:, magnification_entries(k)])
        if doubles:
            raise MixmagError(f"{file.magnification:g}x: {doubles} tiles stand where another does")
    return features, np.stack([cells % 2**32, cells >> 32], axis=1).astype(np.int32), valid


def import_slide(job: ImportJob) -> str:
    """Writes the slide file. Returns what was done."""
    sources = [file_sha256(path) for path in job.paths]
    settings = {"tool": job.tool, "class_token": job.class_token, "sources": sources}
    if already_done(job.out, {"encoder": job.encoder, "settings": settings}, job.mpp):
        return "done before"
    files = [read_feature_file(path, job.tool) for path in job.paths]
    check_same_slide(files)
    first = files[0]
    encoder = job.encoder if first.encoder is None else first.encoder
    if encoder is None or job.encoder not in (None, encoder):
        raise MixmagError(
            f"its files say that the encoder is {first.encoder}, --encoder says {job.encoder}"
        )
    width = embedding_width(first.features.shape[1], encoder, job.class_token)
    mpp, mpp_source = import_mpp(files, job)
    cell_px = first.side / mpp if job.tool == "stamp" else first.side
    positions = [lattice_positions(file, job.tool) for file in files]
    residual = 0.0  # um; TRIDENT's tiles have none
    for file, position in zip(files, positions, strict=True):
        residual = np.abs(file.corners - position * file.side).max(initial=residual)
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
        "residual_um": round(residual, 2),
        "settings": settings,
        "size_known": None not in first.slide_size,
    }
    write_slide(job.out, features[..., :width], cells, valid, meta)
    return "imported"


def import_facts(slide: Slide, region: int) -> dict:
    """What import.csv says of a slide file: its tiles, and those that have no partner."""
    facts: dict = {"dim": slide.dim, "cells": len(slide.cells)}
    for name in ("encoder", "magnifications", "mpp", "mpp_source", "residual_um"):
        facts[name] = slide.meta[name]
    magnifications = slide.meta["magnifications"]
    entries = [magnification_entries(k) for k in range(len(magnifications))]
    facts["tiles"] = [int(slide.valid[:, entry].sum()) for entry in entries]
    children = slide.valid[:, 1:]  # (C, T - 1)
    parent_of = Geometry(1, magnifications).relatives()["parent"].int().argmax(dim=1)  # (T,)
    parents = slide.valid[:, parent_of[1:]]  # (C, T - 1)
    facts["without_parent"] = int((children & ~parents).sum())
    facts["missing_children"] = int((parents & ~children).sum())
    facts["whole_windows"] = len(windows(slide.cells, region, region, 1.0)[0])
    return facts


def import_worker(job: ImportJob) -> dict:
    """Imports a slide in a process of its own. Returns its row of import.csv."""
    for signum in SIGNALS:  # the parent receives them too, and lets the slide be finished
        signal.signal(signum, signal.SIG_IGN)
    size = sum(path.stat().st_size for path in job.paths)
    signal.alarm(IMPORT_SECONDS + size // 2**20)  # ends this process if a file hangs it
    try:
        status = import_slide(job)
        return {"status": status, **import_facts(read_slide(job.out), job.region)}
    finally:
        signal.alarm(3600)  # ends this process if the parent was killed


def import_slides(jobs: list[ImportJob]):
    """Yields each slide's row. A file that ends or hangs the HDF5 library costs its slide only."""
    pool = None
    with contextlib.ExitStack() as pools:
        for job in progress(jobs, desc="slides"):
            if pool is None:  # spawned, because a fork inherits torch's threads
                pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
                pools.enter_context(pool)
            row = {"slide_id": job.slide_id, "status": "failed", "reason": ""}
            try:
                row.update(pool.submit(import_worker, job).result())
            except BrokenExecutor:
                stop_if_asked()  # then a signal ended it
                pool = None
                row["reason"] = "its files bring the HDF5 library down, or hang it"
            except MixmagError as error:
                row["reason"] = str(error)
            except Exception as error:  # no such file, a full disk, no memory
                row["reason"] = f"{type(error).__name__}: {error}"
            yield row


def find_feature_files(folder: Path, pattern: str) -> dict[str, Path]:
    """slide id -> file."""
    files: dict[str, Path] = {}
    for path in visible_files(folder, pattern):
        if not path.stem.isprintable():  # such as bytes that are no UTF-8
            raise MixmagError(f"{path.stem!r} in {folder} is not a printable name; rename it")
        same = files.setdefault(path.stem, path)
        if same != path:
            raise MixmagError(f"two files of one slide: {same}, {path}; rename one")
    if not files:
        raise MixmagError(f"{folder}: no feature files (*.h5)")
    return files


def import_jobs(args) -> list[ImportJob]:
    tool = "trident" if args.trident else "stamp"
    pattern = "*.h5" if args.trident else "**/*.h5"  # STAMP repeats the folders of the slides
    folders = [Path(folder) for folder in getattr(args, tool)]
    found = {folder: find_feature_files(folder, pattern) for folder in folders}
    slide_ids = sorted(set().union(*found.values()))
    manifest = read_manifest(args.manifest)
    warn_unmatched_rows(manifest, set(slide_ids))
    jobs = []
    for i in slide_ids:
        paths = [files.get(i, folder / f"{i}.h5") for folder, files in found.items()]
        out = Path(args.out) / "slides" / f"{i}.safetensors"
        job = ImportJob(i, paths, out, tool, args.encoder, args.class_token, region=args.region)
        job.mpp, job.mpp_source = user_mpp(i, manifest, args.mpp)
        jobs.append(job)
    return jobs


def import_command(args) -> int:
    rows = []
    failed = []
    for row in import_slides(import_jobs(args)):
        rows.append(row)
        if row["status"] == "failed":
            failed.append((row["slide_id"], "import", row["reason"]))
            print(f"{row['slide_id']}: FAILED: {row['reason']}", file=sys.stderr)
        else:
            facts = [f"{name} {value}" for name, value in list(row.items())[3:]]
            print(f"{row['slide_id']}: {row['status']}, {', '.join(facts)}", flush=True)
    out = Path(args.out)
    columns = max(rows, key=len)  # a failed slide's row is short
    write_csv(out / "import.csv", columns, [[row.get(name) for name in columns] for row in rows])
    print(f"{len(rows) - len(failed)} slides imported, {len(failed)} failed; see {out}/import.csv")
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
        magnifications = [whole_if_possible(value) for value in values]
        try:
            Geometry(1, magnifications)
        except ValueError:
            raise argparse.ArgumentError(self, f"{magnifications} is no run of doublings") from None
        namespace.magnifications = magnifications


NATURAL = number_in(int, 0, 2**32 - 1)
POSITIVE = number_in(int, 1, 2**32 - 1)


# The docstrings of these functions are the summaries that --help shows.


def add_synth_flags(parser) -> None:
    """make a synthetic cohort: embeddings with seven planted biomarkers"""
    parser.epilog = "example: python data.py synth --out data/synthetic --scale quick"
    add = parser.add_argument
    add("--out", default="data/synthetic", help="folder to write")
    scales = "full: the paper's numbers of cases and slides; quick: a twentieth, and at least some"
    add("--scale", choices=("quick", "full"), default="quick", help=scales)
    add("--dim", type=POSITIVE, default=64, help="width of an embedding (Virchow2 has 1280)")
    add("--regions", type=POSITIVE, default=4, help="3 x 3 regions a slide on average, at least 2")
    add("--images", type=NATURAL, default=0, help="write so many H&E-like slides for tile instead")
    add("--seed", type=NATURAL, default=0, help="everything follows from it")


def add_output_flags(parser) -> None:
    add = parser.add_argument
    add("--out", required=True, help="DATA folder; slides go to DATA/slides/<slide_id>.safetensors")
    add("--manifest", help="CSV with columns slide (file name or id) and mpp; goes before --mpp")
    add("--region", type=POSITIVE, default=3, help="cells per side of a window")


def add_tile_flags(parser) -> None:
    """turn whole-slide images into slide files: tissue, cells on one lattice, embeddings"""
    parser.epilog = "example: python data.py tile --slides slides/ --out data/mine --mpp 0.5"
    add = parser.add_argument
    add("--slides", nargs="+", required=True, metavar="DIR|FILE", help="slides, or their folders")
    add_output_flags(parser)
    encoder = "texture (a stand-in without weights), virchow2, or module:factory, where factory() "
    encoder += "returns a callable (B, 224, 224, 3) uint8 -> (B, D)"
    add("--encoder", default="texture", help=encoder)
    add("--weights", help="virchow2's weights, .safetensors or .pt; else from the Hugging Face hub")
    add("--mpp", type=float, help="um per level-0 pixel, for slides that do not say it")
    power = "for slides that say no mpp at all: 10 / objective power"
    add("--mpp-from-power", action="store_true", help=power)
    run = "from low to high, each twice the one before, such as 2.5 5 10 20"
    number = number_in(float, 0.01, 1000)
    default = [5, 10, 20]
    add("--magnifications", type=number, nargs="+", action=Doublings, default=default, help=run)
    tissue = "least share of tissue in a window (assumed); biopsies and smears want less"
    add("--min-tissue", type=number_in(float, 0, 1), default=0.25, help=tissue)
    mask = "your own tissue mask: a PNG over the whole slide, or GeoJSON as QuPath and TRIDENT "
    mask += "write it; DIR holds <slide_id>.png or .geojson of each slide"
    add("--mask", metavar="FILE|DIR", help=mask)
    add("--shard", metavar="i/n", help="do the i-th of n shares of the slides, from 0 on")
    add("--batch-size", type=POSITIVE, default=256, help="tiles per call of the encoder")
    add("--device", default="auto", help="auto, cpu or cuda[:i]")
    add("--dry-run", action="store_true", help="only say mpp, windows, tokens, bytes of each slide")


def add_import_flags(parser) -> None:
    """join the embeddings that TRIDENT or STAMP made at each magnification into slide files"""
    parser.description += """. Each magnification is twice the one before, with the same patch size
        in pixels and no overlap. import.csv says which tiles have no parent or children."""
    parser.epilog = "example: python data.py import --stamp 5x 10x 20x --mpp 0.25 --out data/mine"
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    trident = "TRIDENT's features_<encoder> folders, one per magnification, from low to high"
    source.add_argument("--trident", nargs="+", metavar="DIR", help=trident)
    stamp = "STAMP's folders of feature files, one per magnification, from low to high"
    source.add_argument("--stamp", nargs="+", metavar="DIR", help=stamp)
    add_output_flags(parser)
    add("--encoder", help="the encoder's name, for files that do not say it")
    token = "keep Virchow2's class token only, the first 1280 of 2560 numbers, or all of them "
    token += "(default: the class token where the files say virchow2)"
    add("--class-token", action=argparse.BooleanOptionalAction, help=token)
    mpp = (
        "um per level-0 pixel (default: as TRIDENT cut the tiles, which must agree within 20 %%); "
    )
    mpp += "STAMP's files know no pixels, so give it to place their tiles on the slide"
    add("--mpp", type=float, help=mpp)


def add_verify_flags(parser) -> None:
    """check slide files and task tables; print every finding; exit 1 if there is any"""
    parser.epilog = "example: python data.py verify data/mine"
    parser.add_argument("data", help="DATA folder")


COMMANDS = {
    "synth": synth_command,
    "tile": tile_command,
    "import": import_command,
    "verify": verify_command,
}
FLAGS = (add_synth_flags, add_tile_flags, add_import_flags, add_verify_flags)


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="data.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, add_flags in zip(COMMANDS, FLAGS, strict=True):
        summary = add_flags.__doc__
        command = commands.add_parser(
            name, help=summary, description=summary, formatter_class=HelpFormatter
        )
        add_flags(command)
    return parser.parse_args(argv)


def main() -> int:
    args = parse()
    return run_command(COMMANDS[args.command], args)


if __name__ == "__main__":
    sys.exit(main())
