"""What goes wrong on real machines: kills, full disks, hostile files, NaN, leakage, flipped bytes; and README's commands, which must run.

python -m pytest tests/test_faults.py                 MIXMAG_LONG=1 kills and mutates ten times as often
"""

import contextlib
import csv
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

import numpy as np
import pytest
import torch
from conftest import ROOT, Command, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_data import make_slide, task
from test_import import slide_of_three
from test_tiler import pink, write_tiff

import data
import mixmag
import train
from data import MixmagError

LONG = bool(os.environ.get("MIXMAG_LONG"))
PRETRAIN = ("--steps", 12, "--batch-size", 4, "--save-every", 3, "--holdout", 0.2)
FINETUNE = (
    "--task",
    "skin_braf",
    "--init",
    "random",
    "--magnification",
    10,
    "--epochs",
    3,
    "--batch-size",
    8,
)


def relabelled(cohort, folder, change):
    """A DATA folder with the cohort's slides, whose table skin_braf has the rows that `change(row)` returns."""
    folder.mkdir()
    os.symlink(cohort / "slides", folder / "slides")
    with open(cohort / "tasks" / "skin_braf.csv", newline="") as f:
        rows = [
            row
            for r in csv.DictReader(f)
            if (row := change((r["case_id"], r["slide_id"], int(r["label"]), r["split"])))
        ]
    task(folder, rows, "skin_braf")
    return folder


def respelled(cohort, folder, slide_id, change):
    """A DATA folder like the cohort, in which `change(features)` was done to one slide."""
    folder.mkdir()
    os.symlink(cohort / "tasks", folder / "tasks")
    (folder / "slides").mkdir()
    for path in (cohort / "slides").iterdir():
        os.symlink(path, folder / "slides" / path.name)
    slide = data.read_slide(cohort / "slides" / f"{slide_id}.safetensors")
    features = change(np.array(slide.features))
    (folder / "slides" / f"{slide_id}.safetensors").unlink()
    data.write_slide(
        folder / "slides" / f"{slide_id}.safetensors",
        features,
        slide.cells,
        slide.valid,
        {k: slide.meta[k] for k in data.FIELDS if k not in ("format", "created", "sha256")},
    )
    return folder


# ------------------------------------------------------------------------------------------------------------ kill it anywhere


def plain(value):
    """A checkpoint's content as nested lists and text that == compares whole."""
    if isinstance(value, dict):
        return sorted((str(k), plain(v)) for k, v in value.items())
    if torch.is_tensor(value):
        return [str(value.dtype), list(value.shape), value.numpy().tobytes()]
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else repr(value)


def content(path):
    """What must be equal of two files: all but a checkpoint's and a picture's packing, and how long it took. Fails where the file is not whole."""
    if path.suffix == ".pt":
        return plain(torch.load(path, weights_only=True))
    if path.suffix == ".json":
        return {k: v for k, v in json.loads(path.read_text("utf-8")).items() if k != "seconds"}
    if path.suffix == ".png":
        with Image.open(path) as picture:
            return picture.size, hashlib.sha256(picture.tobytes()).digest()
    if path.parent.name == "slides":
        assert not data.slide_findings(path)[1]
    elif path.suffix == ".safetensors":
        assert mixmag.read_safetensors(path)
    else:
        assert path.read_bytes().endswith(b"\n")
    return path.read_bytes()


def whole(folder):
    """{name: content} of what stands under a final name. metrics.jsonl is written line by line, and cut back to the checkpoint by who goes on."""
    files = {
        str(p.relative_to(folder)): p
        for p in folder.rglob("*")
        if p.is_file() and not p.name.startswith(".")
    }
    return {
        name: content(p)
        for name, p in files.items()
        if p.name != "metrics.jsonl" or (p.parent / "result.json").exists()
    }


CODES = {signal.SIGKILL: -9, signal.SIGTERM: 75, signal.SIGINT: 130}


@pytest.mark.parametrize(
    "script, flags, workers",
    [
        ("data.py", ("tile", "--slides", "../slides", "--region", 1, "--batch-size", 16), False),
        ("train.py", ("pretrain", *PRETRAIN), True),
        ("train.py", ("finetune", *FINETUNE), True),
        (
            "train.py",
            (
                "table",
                "--rows",
                "abmil-20",
                "mem-0.50-cls",
                "--tasks",
                "skin_braf",
                "--steps",
                4,
                "--epochs",
                1,
            ),
            False,
        ),
    ],
    ids=["tile", "pretrain", "finetune", "table"],
)
def test_killed_anywhere_it_goes_on_and_ends_the_same(cohort, tmp_path, script, flags, workers):
    """Ended at random moments by SIGKILL, SIGTERM and Ctrl-C, and started again with other workers: what stands under a final name is whole at all
    times, the exit codes are those promised, and the end is that of the run nobody touched, bit for bit."""
    if flags[0] == "tile":
        (tmp_path / "slides").mkdir()
        for i in range(3):
            write_tiff(tmp_path / "slides" / f"{i}.tiff", pink(1000, 1000, i), 0.5)
    flags = (*flags, "--out", "out", *(() if flags[0] == "tile" else ("--data", cohort)))
    (tmp_path / "whole").mkdir()
    began = time.time()
    run(script, *flags, cwd=tmp_path / "whole")
    seconds, expected = time.time() - began, whole(tmp_path / "whole" / "out")
    rng, folder, starts = np.random.default_rng(len(flags)), None, 0
    todo = [signal.SIGKILL] * (20 if LONG else 2) + [signal.SIGTERM, signal.SIGINT] * (
        5 if LONG else 1
    )
    rng.shuffle(todo)
    while todo or folder:
        starts += 1
        folder = folder or tmp_path / f"broken-{starts}"
        folder.mkdir(exist_ok=True)
        process = Command(
            script, *flags, *(("--workers", rng.choice([0, 2])) if workers else ()), cwd=folder
        )
        while todo and not process.hears():
            time.sleep(0.01)
        if todo:
            process.process.join(rng.uniform(0, seconds))
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.process.pid, todo[-1])
        code, _, err = process.end()
        found = whole(folder / "out")
        if code == 0:
            differing = {
                k
                for k in expected.keys() | found.keys()
                if found.get(k) != expected.get(k) and not k.endswith(("prev.pt", data.SUMS))
            }
            assert not differing, differing
            folder = None
        else:
            assert code == CODES[todo.pop()] and "Traceback" not in err, (code, err)
    print(f"{flags[0]}: {starts} starts")


def test_no_loop_is_deaf(cohort, tmp_path, monkeypatch):
    """Whatever takes long asks for signals by itself: each raises Stopped at once, with nothing half-written."""
    slides, cases = (
        data.read_slides(cohort)[:6],
        [c for c in data.read_task(cohort, "skin_braf") if c.split == "tune"],
    )
    reader = data.Reader(write_tiff(tmp_path / "s.tiff", pink(1000, 1000), 0.5))
    plan, by_id = (
        data.plan_slide(reader, types.SimpleNamespace(**TILE)),
        {s.slide_id: s for s in data.read_slides(cohort)},
    )
    model = mixmag.SlideClassifier(
        mixmag.Config.small(64), mixmag.MixingEncoder(mixmag.Config.small(64))
    )
    bags = data.CaseDataset(by_id, cases, model.config.geometry(), model.index)
    regions, machine = (
        data.RegionDataset(slides, model.config.geometry(), 0, 0.5),
        train.machine(types.SimpleNamespace(device="cpu", amp="off"), 96),
    )
    optimizer = torch.optim.AdamW(train.parameter_groups(model, 0.0))
    args = types.SimpleNamespace(
        seed=0, batch_size=4, epochs=1, workers=0, smoothing=0.1, lr=1e-3, warmup=0, clip=1
    )
    monkeypatch.setattr(data, "STOP_SIGNALS", [signal.SIGTERM])
    for name, call in {
        "synth": lambda: data.synth_cohort(tmp_path / "c"),
        "images": lambda: data.synth_images(tmp_path / "i", 1, 0),
        "read": lambda: data.read_slides(cohort),
        "verify": lambda: data.verify(cohort),
        "statistics": lambda: data.feature_statistics(slides),
        "thumbnail": lambda: data.thumbnail(reader, 0.5),
        "tile": lambda: data.tile_slide(
            reader, plan, data.texture, 46, types.SimpleNamespace(**TILE)
        ),
        "hold": lambda: train.cache_encoder_outputs(model, bags, machine),
        "whitening": lambda: train.fit_whitening(
            model, types.SimpleNamespace(rows=bags.rows, held=bags.rows), machine
        ),
        "store": lambda: regions.hold("cpu"),
        "held-out": lambda: train.level_table(
            mixmag.MaskedEmbeddingModel(mixmag.Config.small(64)),
            regions,
            torch.zeros(3, 64),
            machine,
        ),
        "score": lambda: train.score_cases(model, bags, machine, 4),
        "epoch": lambda: train.finetune_epoch(
            model, optimizer, bags, machine, args, 0, train.progress(total=4)
        ),
    }.items():
        with pytest.raises(data.Stopped):
            pytest.fail(f"{name} went on: {call()}")
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["s.tiff", "synthetic.json"]


TILE = {
    "mpp": None,
    "region": 1,
    "magnifications": [5, 10, 20],
    "min_tissue": 0.25,
    "batch_size": 16,
    "device": torch.device("cpu"),
    "manifest": {},
    "mask": None,
    "mpp_from_power": False,
}


def test_a_signal_to_all_of_several_processes_is_one_signal(cohort, tmp_path):
    """Slurm and terminals signal torchrun and its processes at once, and torchrun passes it on: all the same the first process saves, and one goes on."""
    flags = [
        "pretrain",
        "--data",
        str(cohort),
        "--out",
        "r",
        "--batch-size",
        "4",
        "--steps",
        "100000",
        "--save-every",
        "100000",
        "--holdout",
        "0",
    ]
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            str(ROOT / "train.py"),
            *flags,
        ],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while process.poll() is None and not (
        (metrics := tmp_path / "r" / "metrics.jsonl").exists() and metrics.read_text()
    ):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    began, (_, err) = time.time(), process.communicate(timeout=120)
    done = torch.load(tmp_path / "r" / "last.pt", weights_only=True)["done"]
    assert (
        process.returncode
        and done >= 10
        and "stopped by a signal" in err
        and time.time() - began < 30
    )
    code, _, err = Command(
        "train.py", *flags[:-2], "--holdout", 0, "--epochs", 1, cwd=tmp_path
    ).end()
    assert code == 1 and "holds a run with other settings: epochs None there, 1 now" in err


def children(pid) -> list[int]:
    return [
        int(i)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for i in (task / "children").read_text().split()
    ]


def test_a_process_that_dies_ends_all(cohort, tmp_path):
    """One of two training processes: the other ends soon, in one line."""
    flags = [
        "pretrain",
        "--data",
        str(cohort),
        "--out",
        "r",
        "--batch-size",
        "4",
        "--steps",
        "100000",
        "--save-every",
        "10",
        "--holdout",
        "0",
    ]
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            str(ROOT / "train.py"),
            *flags,
        ],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while process.poll() is None and not (tmp_path / "r" / "last.pt").exists():
        time.sleep(0.05)
    (victim,) = (
        pid
        for pid in children(process.pid)
        if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()
    )
    os.kill(victim, signal.SIGKILL)
    began, (_, err) = time.time(), process.communicate(timeout=120)
    assert (
        process.returncode
        and time.time() - began < 60
        and ("error: another of the processes ended" in err or "stopped by a signal" in err)
    )


# ------------------------------------------------------------------------------- disk full, read-only, no memory, nobody to read


def one_error(err):
    """The last line, which is the only one that speaks of an error."""
    last = err.splitlines()[-1]
    assert last.startswith("error: ") and err.count("\nerror: ") < 2, err
    return last


def test_a_full_disk_leaves_what_was_there(cohort, tmp_path):
    """Files can have 60,000 bytes: each command ends in one line that names the file, leaves no rest and no other file changed, and goes on later."""
    full = {"RLIMIT_FSIZE": 60_000}
    for flags in (("pretrain", *PRETRAIN), ("finetune", *FINETUNE)):
        flags = (*flags, "--data", cohort, "--out", flags[0])
        out = tmp_path / flags[0]
        _, err = run("train.py", *flags, cwd=tmp_path, code=1, **full)
        assert (
            f"{flags[-1]}/last.pt: cannot be written" in one_error(err)
            and "MB are free there" in err
            and not (out / "last.pt").exists()
        )
        run("train.py", *flags, cwd=tmp_path)
        expected = whole(out)
        for name in ("result.json", "model.safetensors", "encoder/model.safetensors"):
            (out / name).unlink(missing_ok=True)
        before = whole(out)
        _, err = run("train.py", *flags, cwd=tmp_path, code=1, **full)
        assert (
            "model.safetensors: cannot be written" in one_error(err)
            and whole(out) == before
            and not list(out.rglob(".*"))
        )
        run("train.py", *flags, cwd=tmp_path)
        assert {k: v for k, v in whole(out).items() if k != data.SUMS} == {
            k: v for k, v in expected.items() if k != data.SUMS
        }
    _, err = run("data.py", "synth", "--dim", 1280, "--out", "s", cwd=tmp_path, code=1, **full)
    assert "cannot be written" in one_error(err) and not list((tmp_path / "s" / "slides").iterdir())
    write_tiff(tmp_path / "a.tiff", pink(2700, 2700), 0.5)
    _, err = run(
        "data.py",
        "tile",
        "--slides",
        "a.tiff",
        "--out",
        "d",
        cwd=tmp_path,
        code=3,
        RLIMIT_FSIZE=10_000,
    )
    assert (
        "a: FAILED" in err
        and "cannot be written" in (tmp_path / "d" / "failed.csv").read_text()
        and not list((tmp_path / "d").rglob(".*"))
    )


@pytest.mark.parametrize("place", ["/proc/mixmag", "file/out"])
def test_a_folder_that_cannot_be_written_is_said(cohort, tmp_path, place):
    (tmp_path / "file").write_text("in the way")
    for script, *flags in (
        ("train.py", "pretrain", *PRETRAIN, "--data", cohort),
        ("data.py", "synth"),
        ("train.py", "table", "--data", cohort, "--rows", "abmil-20", "--epochs", 1),
    ):
        _, err = run(script, *flags, "--out", place, cwd=tmp_path, code=1)
        assert place in err.splitlines()[-1] and err.splitlines()[-1].startswith("error: ")
    assert (tmp_path / "file").read_text() == "in the way"


def test_no_memory_is_one_line(cohort, tmp_path):
    for flags in (
        ("pretrain", "--batch-size", 100_000, "--micro-batch", 100_000, "--lr", 1e-3),
        ("finetune", *FINETUNE[:-1], 100_000, "--hidden", 10_000_000),
    ):
        _, err = run(
            "train.py",
            *flags,
            "--data",
            cohort,
            "--out",
            "r",
            "--resume",
            "off",
            cwd=tmp_path,
            code=1,
            RLIMIT_AS=10**9,
        )
        assert "out of memory" in one_error(err)
    assert not list(tmp_path.rglob("*.pt"))


def test_nobody_reads_the_output(cohort, tmp_path):
    """`| head` and no terminal: no traceback, no control characters."""
    script = f"{sys.executable} {ROOT / 'data.py'} verify {tmp_path}"
    done = subprocess.run(
        ["bash", "-c", f"{script} | true; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        env={**os.environ, "LANG": "C", "LC_ALL": "C"},
    )
    assert done.returncode in (1, 141) and not done.stderr


def test_zone_and_locale_change_nothing(tmp_path):
    """Times are UTC with their offset, and numbers have a point, also where the machine's zone is another and its decimals have a comma."""
    made = (
        subprocess.run(
            ["localedef", "-i", "de_DE", "-f", "UTF-8", tmp_path / "de_DE.UTF-8"],
            capture_output=True,
        )
        if shutil.which("localedef")
        else None
    )
    comma = (
        {"LOCPATH": str(tmp_path), "LC_ALL": "de_DE.UTF-8"}
        if made and (tmp_path / "de_DE.UTF-8").exists()
        else {}
    )
    code = (
        "import locale, sys\nif sys.argv.pop(1): locale.setlocale(locale.LC_ALL, ''); assert locale.str(0.5) == '0,5'\n"
        "import data\nsys.argv = sys.argv[1:]\nimport runpy; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    write_tiff(tmp_path / "S.tiff", pink(1000, 1000), 0.5)
    found = []
    for name, environment in (
        ("plain", {"TZ": "UTC", "LC_ALL": "C"}),
        ("other", {"TZ": "Asia/Tokyo", **comma}),
    ):
        env = (
            {k: v for k, v in os.environ.items() if k != "SOURCE_DATE_EPOCH"}
            | environment
            | {"PYTHONPATH": str(ROOT)}
        )
        began = datetime.now(UTC).replace(microsecond=0)
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                code,
                "comma" if "LOCPATH" in environment else "",
                data.__file__,
                "tile",
                "--slides",
                "S.tiff",
                "--out",
                name,
                "--mpp",
                "0.5",
                "--region",
                "1",
                "--encoder",
                "texture",
            ],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
        )
        assert "1 slides done, 0 failed" in done.stdout, done.stdout + done.stderr
        slide = data.read_slide(tmp_path / name / "slides" / "S.safetensors")
        assert slide.meta["created"].endswith("+00:00") and began <= datetime.fromisoformat(
            slide.meta["created"]
        ) <= datetime.now(UTC)
        found.append(
            (
                {k: v for k, v in slide.meta.items() if k not in ("created", "sha256")},
                slide.features.tobytes(),
                done.stdout.replace(name, ""),
            )
        )
    assert found[0] == found[1]


def test_old_rests_of_killed_writers_are_swept(tmp_path):
    data.write_text(tmp_path / "kept", "")
    for name, age in ((".a.123.tmp", 7200), (".b.123.tmp", 60), ("c.123.tmp", 7200)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    data.sweep(tmp_path, tmp_path / "absent")
    assert {p.name for p in tmp_path.iterdir()} == {"kept", ".b.123.tmp", "c.123.tmp"}


def test_two_processes_may_write_the_same_slide(tmp_path):
    write_tiff(tmp_path / "a.tiff", pink(1000, 1000), 0.5)
    both = [
        Command("data.py", "tile", "--slides", "a.tiff", "--region", 1, "--out", "d", cwd=tmp_path)
        for _ in range(2)
    ]
    assert (
        [process.end()[0] for process in both] == [0, 0]
        and data.verify(tmp_path / "d") == []
        and not list((tmp_path / "d").rglob(".*"))
    )


# -------------------------------------------------------------------------------------------------------------------- numbers


def test_values_that_are_no_numbers_are_named(cohort, tmp_path):
    """NaN in a training slide is found before the first step, in a tune slide at the first score; nothing is saved."""
    cases = data.read_task(cohort, "skin_braf")
    first = {split: next(c for c in cases if c.split == split) for split in data.SPLITS}

    def poison(value):
        def change(features):
            features[0, 7, 3] = value
            return features

        return change

    trained = data.pretraining_ids(cohort)[0]
    for slide_id, value, flags in (
        (trained, math.nan, ("pretrain", *PRETRAIN[:-1], 0)),
        (first["train"].slide_ids[0], math.inf, ("finetune", *FINETUNE[:-6])),
        (first["tune"].slide_ids[0], math.nan, ("finetune", *FINETUNE[:-6])),
        (first["test"].slide_ids[0], math.nan, ("finetune", *FINETUNE[:-6], "--epochs", 1)),
    ):
        bad = respelled(cohort, tmp_path / f"{slide_id}-data", slide_id, poison(value))
        _, err = run("train.py", *flags, "--data", bad, "--out", slide_id, cwd=tmp_path, code=1)
        assert (
            slide_id in one_error(err)
            and "data.py verify" in err
            and not (tmp_path / slide_id / "result.json").exists()
        ), err
        assert (tmp_path / slide_id / "last.pt").exists() == (slide_id in first["test"].slide_ids)
        assert any(slide_id in line and "NaN" in line for line in data.verify(bad))


@pytest.mark.parametrize(
    "amp, message",
    [
        ("off", "the gradient's norm is inf at step 1, slides "),
        ("fp16", "a smaller --lr, or --amp off, may help"),
    ],
)
def test_gradients_that_are_not_finite(cohort, tmp_path, monkeypatch, amp, message):
    """In full precision one is the end; under fp16 steps are skipped and counted, until it is clear that the scale is not to blame."""
    backward, calls = train.optimizer_step, []

    def spoiled(model, optimizer, *rest):
        calls.append(1)
        if len(calls) == 2 or (amp == "fp16" and len(calls) > 6):
            next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = math.inf
        return backward(model, optimizer, *rest)

    monkeypatch.setattr(train, "optimizer_step", spoiled)
    flags = [
        "finetune",
        *map(str, FINETUNE),
        "--data",
        str(cohort),
        "--out",
        str(tmp_path / "r"),
        "--amp",
        amp,
        "--epochs",
        "20",
        "--magnification",
        "5",
    ]
    with pytest.raises(MixmagError, match=message):
        train.finetune(train.parse(flags))
    saved = torch.load(tmp_path / "r" / "last.pt", weights_only=True) if amp == "fp16" else None
    assert (saved is None and not (tmp_path / "r" / "last.pt").exists()) or all(
        v.isfinite().all() for v in saved["model"].values()
    )
    if amp == "fp16":
        noted = [
            json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()
        ]
        assert (
            noted[0]["skipped"] == 1
            and noted[0]["scale"] == 2.0**15
            and noted[-1]["skipped"] > 5
            and 1 < len(calls) < 6 + 1 + 20
        )


@pytest.mark.parametrize("regions", [1, 50_000])
def test_bags_of_one_and_of_many_regions(regions):
    torch.manual_seed(0)
    config = mixmag.Config(8, region=1, width=16, depth=1, heads=2)
    for encoder, tokens in ((None, "patch"), (mixmag.MixingEncoder(config), "cls")):
        model = mixmag.SlideClassifier(config, encoder, tokens, 5, hidden=8)
        logit, attention = model(torch.randn(regions, 1, 8).half(), torch.tensor([regions]))
        logit.sum().backward()
        assert (
            logit.isfinite().all()
            and attention.sum().item() == pytest.approx(1, abs=1e-3)
            and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        )


def test_smallest_batches_and_splits(cohort, tmp_path):
    """A batch of one region or case, also with the contrastive term that then has no negatives; a tune split of one class."""
    for flags in (
        ("pretrain", "--batch-size", 1, "--steps", 2, "--holdout", 0),
        ("pretrain", "--source", 5, "--batch-size", 1, "--steps", 2, "--holdout", 0),
        ("finetune", *FINETUNE[:-4], "--epochs", 1, "--batch-size", 1),
    ):
        run(
            "train.py",
            *flags,
            "--data",
            cohort,
            "--out",
            "-".join(map(str, flags[:3])).replace("--", ""),
            cwd=tmp_path,
        )
    one = relabelled(
        cohort, tmp_path / "one", lambda row: row[:2] + (0, row[3]) if row[3] == "tune" else row
    )
    _, err = run(
        "train.py", "finetune", *FINETUNE, "--data", one, "--out", "x", cwd=tmp_path, code=1
    )
    assert "the tune split has" in one_error(err) and "labels [0]; both classes are needed" in err
    assert any("split tune does not hold both classes" in line for line in data.verify(one))


# -------------------------------------------------------------------------------------------------------------------- leakage


def test_an_encoder_of_unknown_slides_is_flagged(cohort, tmp_path):
    """What an encoder saw is listed beside it; without that list fine-tuning says that it cannot tell."""
    run("train.py", "pretrain", *PRETRAIN, "--data", cohort, "--out", "p", cwd=tmp_path)
    listed = {
        r["slide_id"]
        for r in data.read_csv(tmp_path / "p" / "encoder" / "slides.csv", ("slide_id",))
    }
    assert listed == set(data.pretraining_ids(cohort)) and not listed & data.evaluation_slides(
        cohort
    )
    flags = (
        "finetune",
        "--task",
        "skin_braf",
        "--data",
        cohort,
        "--epochs",
        1,
        "--magnification",
        10,
    )
    _, err = run("train.py", *flags, "--init", "p", "--out", "f", cwd=tmp_path)
    assert "WARNING" not in err
    (tmp_path / "p" / "encoder").rename(tmp_path / "e")
    _, err = run(
        "train.py", *flags, "--init", "e", "--out", "h", cwd=tmp_path
    )  # it goes with the encoder
    assert "WARNING" not in err
    (tmp_path / "e" / "slides.csv").unlink()
    _, err = run("train.py", *flags, "--init", "e", "--out", "g", cwd=tmp_path)
    assert "WARNING: e/slides.csv is not there" in err and "cannot be told" in err


# -------------------------------------------------------------------------------------------------------------- hostile input


@pytest.mark.parametrize("name", ["../b", "/etc/passwd", "a/b", "..", ".", "a/"])
def test_ids_are_no_paths(tmp_path, name):
    make_slide(tmp_path / "d", "a")
    make_slide(tmp_path / "d", "b").rename(tmp_path / "d" / "b.safetensors")
    task(tmp_path / "d", [("1", name, 0, "train")])
    with pytest.raises(MixmagError, match="is a path, expected the name of a file in slides/"):
        data.read_task(tmp_path / "d", "t")
    with pytest.raises(MixmagError, match="1 slides have no file"):
        data.read_slides(tmp_path / "d", [name])
    with pytest.raises(MixmagError, match="no such task; found t"):
        data.read_task(tmp_path / "d", name)


def test_tables_are_text(tmp_path):
    """Formulas, leading zeros, spaces, unicode, ids that differ in case only, CRLF and a byte order mark are kept as they are; a million rows are read."""
    ids = [
        "=cmd|' C calc'!A0",
        "+1",
        "@SUM(A1)",
        "001",
        "1",
        "1.0",
        "a b",
        "ü",
        "S1",
        "s1",
        "x,y",
        'q"q',
        "n\nl",
        "日本",
    ]
    text = "\ufeffcase_id,slide_id,label,split\r\n" + "".join(
        f'"{i.replace(chr(34), chr(34) * 2)}","{i.replace(chr(34), chr(34) * 2)}",{n % 2},train\r\n'
        for n, i in enumerate(ids)
    )
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "t.csv").write_bytes(text.encode("utf-8"))
    for i in ids:
        make_slide(tmp_path, i, cells=[(0, 0)])
    cases = data.read_task(tmp_path, "t")
    assert (
        [c.case_id for c in cases] == ids
        and [c.slide_ids for c in cases] == [[i] for i in ids]
        and {s.slide_id for s in data.read_slides(tmp_path, ids)} == set(ids)
    )
    data.write_csv(
        tmp_path / "tasks" / "t.csv",
        ("case_id", "slide_id", "label", "split"),
        [(i // 2, i, i // 2 % 2, data.SPLITS[i // 2 % 3]) for i in range(10**6)],
    )
    began = time.time()
    assert len(data.read_task(tmp_path, "t")) == 500_000 and time.time() - began < 60


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=12)


@settings(
    max_examples=300 if LONG else 60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.lists(
        st.tuples(
            TEXT,
            TEXT,
            st.sampled_from(["0", "1", "2", "", "yes", "1.0"]) | TEXT,
            st.sampled_from(data.SPLITS) | TEXT,
        ),
        max_size=6,
    )
)
def test_any_table_is_read_or_refused(tmp_path, rows):
    """Written by the csv module, a table comes back as it was, or each row that is wrong has its line."""
    (tmp_path / "tasks").mkdir(exist_ok=True)
    with open(tmp_path / "tasks" / "t.csv", "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([("case_id", "slide_id", "label", "split"), *rows])
    cases, findings = data.task_findings(tmp_path / "tasks" / "t.csv")
    rows = [tuple(v.strip() for v in row) for row in rows]
    good = [
        r
        for r in rows
        if r[0]
        and r[1]
        and r[2] in ("0", "1")
        and r[3] in data.SPLITS
        and "/" not in r[1]
        and r[1] not in (".", "..")
    ]
    assert {i for c in cases for i in c.slide_ids} == {r[1] for r in good}
    assert bool(findings) == (
        len(good) < len(rows)
        or len({r[1] for r in good}) < len(good)
        or len({(r[0], *r[2:]) for r in good}) > len({r[0] for r in good})
    )


@settings(
    max_examples=300 if LONG else 60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.binary(max_size=400))
def test_any_bytes_are_a_table_or_refused(tmp_path, raw):
    path = tmp_path / "t.csv"
    for head in (b"", b"case_id,slide_id,label,split\n"):
        path.write_bytes(head + raw)
        with contextlib.suppress(MixmagError):
            assert isinstance(data.task_findings(path)[0], list)


CELLS = st.lists(
    st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1)), max_size=5, unique=True
)


@settings(
    max_examples=200 if LONG else 40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    CELLS,
    st.integers(1, 40),
    st.integers(0, 2**32 - 1),
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=8), TEXT, max_size=3
    ),
)
def test_any_slide_comes_back_as_it_was_written(tmp_path, cells, dim, seed, extra):
    """Also by the library, which knows nothing of the project; equal slides are equal files."""
    import safetensors

    rng = np.random.default_rng(seed)
    features = rng.integers(0, 2**16, (len(cells), 21, dim), np.uint16).view(np.float16)
    cells, valid, path = (
        np.array(cells, np.int32).reshape(-1, 2),
        rng.random((len(cells), 21)) > 0.5,
        tmp_path / "a.safetensors",
    )
    meta = {
        **{f"x-{k}": v for k, v in extra.items()},
        "slide_id": "a",
        "encoder": "é",
        "magnifications": [5, 10, 20],
        "tile_px": 224,
        "mpp": 0.5,
        "cell_px": 896.0,
        "origin": [0.0, 0.0],
        "width": 1,
        "height": 1,
        "n_bad": 0,
    }
    data.write_slide(path, features, cells, valid, meta)
    slide, before = data.read_slide(path), path.read_bytes()
    assert (
        slide.features.tobytes() == features.tobytes()
        and np.array_equal(slide.cells, cells)
        and np.array_equal(slide.valid, valid)
    )
    assert {k: slide.meta[k] for k in meta} == meta and not [
        f for f in data.slide_findings(path)[1] if "NaN" not in f
    ]
    with safetensors.safe_open(path, "numpy") as f:
        assert (
            f.get_tensor("features").tobytes() == features.tobytes()
            and f.metadata()["encoder"] == "é"
        )
    data.write_slide(path, features, cells, valid, dict(reversed(meta.items())))
    assert path.read_bytes() == before


def test_fuzzed_slide_files_are_refused_or_right(tmp_path):
    """Bytes changed, cut out, put in or cut off, most of them in the header: an error that names the file, or the very slide; `verify` says that the file
    changed wherever what is in it did."""
    path, rng, refused = (
        make_slide(tmp_path, cells=[(0, 0), (1, 0)]),
        np.random.default_rng(0),
        Counter(),
    )
    good, raw = data.read_slide(path), path.read_bytes()
    features = good.features.tobytes()  # what is mapped changes with the file
    header, count = 8 + int.from_bytes(raw[:8], "little"), 20_000 if LONG else 500
    for i in range(count):
        mutated = bytearray(raw)
        for _ in range(rng.choice([1, 1, 3])):
            at = int(rng.integers(min(header if i % 2 else len(raw), len(mutated))))
            kind = rng.integers(10)
            if kind < 6:
                mutated[at] = rng.integers(256)
            elif kind == 6:
                mutated[at : at + int(rng.integers(1, 9))] = b""
            elif kind == 7:
                mutated[at:at] = rng.bytes(int(rng.integers(1, 9)))
            elif kind == 8:
                mutated[at : at + 1] = rng.choice(
                    [b"9", b"-", b"[", b'"', b"e9", b"null", b"{}", b"\\u0000", b"1e999", b"NaN"]
                )
            else:
                mutated = mutated[: int(rng.integers(1, len(mutated)))]
        path.write_bytes(mutated)
        try:
            slide = data.read_slide(path)
            same = (
                slide.features.tobytes() == features
                and np.array_equal(slide.cells, good.cells)
                and np.array_equal(slide.valid, good.valid)
                and slide.meta == good.meta
            )
        except MixmagError as error:
            assert str(path) in str(error)
            refused["refused"] += 1
            continue
        refused["right" if same else "found by verify"] += 1
        assert bool(data.slide_findings(path)[1]) or same, (i, slide.meta)
    print(f"{count} mutated slide files: {dict(refused)}")
    assert refused["refused"] > count // 3 and refused["found by verify"] > count // 20


# ------------------------------------------------------------------------------------------------------------ verify, determinism


def test_verify_finds_every_flipped_byte_of_data_and_runs(cohort, tmp_path):
    """In each file that a cohort and finished runs consist of, and in tables frozen by sha256sum."""
    few = {p.name for p in sorted((cohort / "slides").iterdir())[3:]}
    shutil.copytree(cohort, tmp_path / "d", ignore=lambda _, names: few & set(names))
    run("train.py", "pretrain", *PRETRAIN, "--data", cohort, "--out", "runs/p", cwd=tmp_path)
    run("train.py", "finetune", *FINETUNE, "--data", cohort, "--out", "runs/f", cwd=tmp_path)
    task(make_slide(tmp_path / "own").parents[1], [("c", "a", 0, "train")])
    subprocess.run(
        "sha256sum tasks/*.csv > SHA256SUMS", shell=True, cwd=tmp_path / "own", check=True
    )
    out, _ = run("data.py", "verify", "runs/p", cwd=tmp_path)
    assert "nothing wrong found" in out and data.verify(tmp_path / "runs") == []
    rng, tried, usual = (
        np.random.default_rng(0),
        0,
        {name: data.verify(tmp_path / name) for name in ("d", "own", "runs")},
    )
    for name, before in usual.items():
        files = [p for p in (tmp_path / name).rglob("*") if p.is_file()]
        assert {p.name for p in files} > (
            {
                "SHA256SUMS",
                "result.json",
                "last.pt",
                "config.json",
                "model.safetensors",
                "predictions.csv",
                "slides.csv",
                "metrics.jsonl",
            }
            if name == "runs"
            else {"SHA256SUMS"}
        )
        for path in files:
            raw = path.read_bytes()
            for at in {0, len(raw) - 1, *rng.integers(len(raw), size=200 if LONG else 4).tolist()}:
                path.write_bytes(
                    raw[:at] + bytes([raw[at] ^ 1 << int(rng.integers(8))]) + raw[at + 1 :]
                )
                sums = (
                    path
                    if path.name == data.SUMS
                    else next(p / data.SUMS for p in path.parents if (p / data.SUMS).exists())
                )
                found = (
                    data.slide_findings(path)[1]
                    if path.parent.name == "slides"
                    else data.seal_findings(sums)
                )
                assert found and set(found) - set(before), (path, at)
                tried += 1
            path.write_bytes(raw)
        assert data.verify(tmp_path / name) == before
        next(p for p in files if p.suffix in (".csv", ".json")).unlink()
        assert data.verify(tmp_path / name) != before
    print(f"{tried} flipped bytes")


def test_the_same_seed_twice_is_the_same_file(cohort, tmp_path, monkeypatch):
    """Slide files, checkpoints and tables, byte for byte, from one machine with one number of threads; another seed is another run."""
    write_tiff(tmp_path / "s.tiff", pink(2000, 2000), 0.5)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        run(
            "data.py",
            "tile",
            "--slides",
            tmp_path / "s.tiff",
            "--region",
            1,
            "--out",
            "d",
            cwd=tmp_path / name,
        )
        run(
            "train.py",
            "table",
            "--data",
            cohort,
            "--rows",
            "abmil-20",
            "mem-0.25-patch",
            "--tasks",
            "skin_braf",
            "--steps",
            3,
            "--epochs",
            1,
            "--seed",
            seed,
            "--out",
            "t",
            cwd=tmp_path / name,
        )
    files = {
        name: {
            str(p.relative_to(tmp_path / name)): p.read_bytes()
            for p in (tmp_path / name).rglob("*")
            if p.is_file()
        }
        for name in "abc"
    }
    differing = {
        k for k in files["a"].keys() | files["b"].keys() if files["a"].get(k) != files["b"].get(k)
    }
    assert len(files["a"]) > 20 and differing <= {
        "t/machine.json",
        "t/seed-0/mem-0.25/result.json",
        f"t/seed-0/mem-0.25/{data.SUMS}",
    }, differing  # which hold seconds
    assert (
        files["a"]["d/slides/s.safetensors"] == files["c"]["d/slides/s.safetensors"]
        and files["a"]["t/results.csv"] != files["c"]["t/results.csv"]
    )
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    assert data.read_slide(make_slide(tmp_path)).meta["created"][:10] == time.strftime(
        "%Y-%m-%d", time.gmtime()
    )


# ----------------------------------------------------------------------------------------------------------- README's commands

README = re.sub(r"(?<!`)`python\n", "`python ", (ROOT / "README.md").read_text("utf-8"))
LINES = [
    (before, script, shlex.split(rest))
    for before, script, rest in re.findall(
        r"(python|torchrun[^\n`]*?) +(data|train)\.py([^`\n#|&]*)", README
    )
]
SMALL = {
    "pretrain": ["--steps", "2", "--batch-size", "2"],
    "finetune": ["--epochs", "1"],
    "table": ["--rows", "abmil-20", "--epochs", "1"],
}


def test_every_command_of_the_readme_runs(cohort, tmp_path, monkeypatch, capsys):
    """In README's own order, at small settings, in one folder: its slides, its task, its default cohort. Where a command wants what is not here (a GPU's
    preset, processes of torchrun, another tool's folders) its flags are parsed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slides").mkdir()
    (tmp_path / "data").mkdir()
    os.symlink(cohort, tmp_path / "data" / "synthetic")
    write_tiff(tmp_path / "slides" / "S1.svs", pink(2700, 2700), 0.5)
    slide_of_three(tmp_path, "T1")
    for m in (5, 10, 20):
        (tmp_path / f"{m}x_224px_0px_overlap").rename(tmp_path / f"{m}x")
    tables, ran = train.tables, Counter()
    monkeypatch.setattr(
        train,
        "tables",
        lambda args, *rest: tables(
            types.SimpleNamespace(**{**vars(args), "steps": 2, "epochs": 1}), *rest
        ),
    )
    for before, script, flags in LINES:
        module, name = {"data": data, "train": train}[script], flags[0]
        flags = (
            [name, "--slides", "s", "--out", "d", *flags[2:]] if flags[1:2] == ["..."] else flags
        )
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags])
        args = module.parse()
        if before != "python" or {"paper", "--stamp", "--shard"} & set(flags):
            continue
        monkeypatch.setattr(
            sys,
            "argv",
            [
                f"{script}.py",
                *flags,
                *SMALL.get(name, []),
                *(["--out", "imported"] if name == "import" else []),
            ],
        )
        args = module.parse()
        code = module.COMMANDS[name](args)
        assert not code, (flags, capsys.readouterr())
        ran[name] += 1
        if name == "tile":  # the other slides that a task wants, and the task
            slide = data.read_slides("data/mine")[0]
            for i in range(5):
                data.write_slide(
                    f"data/mine/slides/S{i + 2}.safetensors",
                    slide.features + np.float16(0.1 * (i + 1)),
                    slide.cells,
                    slide.valid,
                    {
                        **{
                            k: slide.meta[k]
                            for k in data.FIELDS
                            if k not in ("format", "created", "sha256")
                        },
                        "slide_id": f"S{i + 2}",
                    },
                )
            task(
                tmp_path / "data" / "mine",
                [(f"c{i}", f"S{i}", i % 2, data.SPLITS[(6 - i) // 2]) for i in range(1, 7)],
                "msi",
            )
    assert (
        set(ran)
        >= {"demo", "pretrain", "finetune", "tile", "verify", "heatmap", "embed", "import", "table"}
        and len(LINES) >= 15
    )
    assert (
        (tmp_path / "runs" / "demo" / "demo.png").exists()
        and list(tmp_path.glob("embeddings/**/S1.h5"))
        and list(tmp_path.glob("runs/msi/heatmap/S1/*.png"))
    )


def test_every_python_block_of_the_readme_runs(monkeypatch, capsys):
    """The fenced ones as they are; the encoders with a timm that builds a model of the width that is asked for."""
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(block, {})
    assert "torch.Size([2, 94, 1280])" in capsys.readouterr().out
    timm = types.ModuleType("timm")
    timm.layers, timm.create_model = (
        types.SimpleNamespace(SwiGLUPacked=None),
        lambda name, **settings: torch.nn.Sequential(
            torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
        ),
    )
    monkeypatch.setitem(sys.modules, "timm", timm)
    (block,) = re.findall(r"    # my_encoder\.py.*?\n(?=\S)", README, re.DOTALL)
    exec(textwrap.dedent(block), module := {})
    for name in ("uni2", "optimus"):
        assert f"my_encoder:{name}" in block and data.encode_tiles(
            module[name]().eval(), np.zeros((2, 224, 224, 3), np.uint8), 2, "cpu"
        ).shape == (2, 3)
