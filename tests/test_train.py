"""Training, tables and runs.     python -m pytest tests/test_train.py"""

import argparse
import csv
import itertools
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, Command, run
from sklearn.metrics import roc_auc_score

import data
import mixmag
import train
from data import MixmagError

QUICK_PRETRAIN = ("--steps", 12, "--batch-size", 4, "--save-every", 4)


QUICK_FINETUNE = ("--epochs", 3, "--batch-size", 8)


# ------------------------------------------------------------------------------------------------------------ the parts
def test_rate_equals_torchs_schedulers():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        milestones=[5],
        schedulers=[
            torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 5, total_iters=4),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=15),
        ],
    )
    for step in range(20):
        assert train.lr_at(step, 20, 5) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        scheduler.step()
    assert (
        train.lr_at(0, 100, 10) > 0 and train.lr_at(9, 100, 10) == 1 and train.lr_at(0, 1, 0) == 1
    )


def test_every_parameter_is_in_exactly_one_group():
    config = mixmag.Config.small(16)
    for model in (
        mixmag.ContrastiveEmbeddingModel(config),
        mixmag.SlideClassifier(config, mixmag.MixingEncoder(config)),
    ):
        groups = train.parameter_groups(model, 0.05, 0.75)
        ids = [id(p) for g in groups for p in g["params"]]
        assert sorted(ids) == sorted(map(id, model.parameters())) and len(set(ids)) == len(ids)
        where = {id(p): g for g in groups for p in g["params"]}
        for name, p in model.named_parameters():
            plain = (
                name.endswith("bias")
                or "norm" in name
                or name.split(".")[-1] in ("cls", "pos", "mask_token")
            )
            assert where[id(p)]["weight_decay"] == (0 if plain else 0.05), name


def test_layer_decay_follows_the_depth():
    config = mixmag.Config.small(16)
    model = mixmag.SlideClassifier(config, mixmag.MixingEncoder(config))
    where = {
        id(p): g["lr_scale"] for g in train.parameter_groups(model, 0.05, 0.75) for p in g["params"]
    }
    e = model.encoder
    assert [where[id(b.attn.qkv.weight)] for b in e.blocks] == pytest.approx(
        [0.75**4, 0.75**3, 0.75**2, 0.75]
    )
    assert (
        where[id(e.pos)] == where[id(e.cls)] == where[id(e.input.weight)] == pytest.approx(0.75**5)
    )
    assert (
        where[id(e.norm.weight)]
        == where[id(model.head.weight)]
        == where[id(model.pool.w.weight)]
        == 1
    )


@pytest.mark.parametrize(
    "name", ["encoder.surprise", "encoder.blockss.0.x", "teacher.weight", "xencoder.norm.weight"]
)
def test_unknown_names_raise(name):
    with pytest.raises(ValueError, match="belongs to no layer"):
        train.layer_of(name, 4)


def compute(dtype=None, scale=2.0**10):
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=dtype == torch.float16)
    return train.SimpleNamespace(
        device=torch.device("cpu"),
        dtype=dtype,
        scaler=scaler,
        rank=0,
        world=1,
        autocast=lambda: torch.autocast("cpu", dtype) if dtype else train.nullcontext(),
    )


def a_batch(views=1, B=6):
    torch.manual_seed(1)
    x = torch.randn(B, 84, 8) if views == 1 else torch.randn(2, B, 84, 8)
    removed = mixmag.random_removal(views * B, 84, 0.5).view(*x.shape[:-2], -1)
    return {"x": x, "removed": removed, "valid": None}


def model_and_optimizer(cls=mixmag.MaskedEmbeddingModel):
    torch.manual_seed(0)
    config = mixmag.Config.small(8, region=2, depth=2)
    model = cls(config)
    return model, torch.optim.AdamW(train.parameter_groups(model, 0.05), lr=1e-3)


@pytest.mark.parametrize("views", [1, 2])
def test_accumulated_gradient_equals_the_whole(views):
    """For CMEM too, whose negatives are the whole batch however it is cut; and however it is loaded."""
    model, _ = model_and_optimizer(
        mixmag.MaskedEmbeddingModel if views == 1 else mixmag.ContrastiveEmbeddingModel
    )
    gradients = []
    loaded = [
        dict(zip(("x", "removed", "valid"), part)) for part in train.in_parts(a_batch(views), 4)
    ]
    for micro, loads in (
        (6, [a_batch(views)]),
        (4, [a_batch(views)]),
        (1, [a_batch(views)]),
        (6, loaded),
        (3, iter(loaded)),
    ):
        model.zero_grad()
        logged = train.pretrain_step(model, loads, 6, micro, compute())
        gradients.append([p.grad.clone() for p in model.parameters()] + list(logged.values()))
    for other in gradients[1:]:
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(gradients[0], other))
    if views == 2:
        assert (
            logged["loss"].item()
            == pytest.approx((logged["mem"] + logged["contrastive"]).item(), abs=1e-5)
            and logged["contrastive"] > 1
        )


def test_a_batch_is_the_same_however_much_of_it_is_loaded_at_once(cohort, tmp_path, monkeypatch):
    """Loads of 8 of 10 windows in parts of 4, or all 10 in one: bit for bit, and no more than a load is ever made at once."""
    held, weights, make = set(), [], data.RegionDataset.batches
    monkeypatch.setattr(
        data.RegionDataset,
        "batches",
        lambda self, loads, *rest: held.update(map(len, loads)) or make(self, loads, *rest),
    )
    for load in (256, 8):
        monkeypatch.setattr(train, "LOAD", load)
        train.pretrain(
            train.parse(
                [
                    "pretrain",
                    "--data",
                    str(cohort),
                    "--out",
                    str(tmp_path / str(load)),
                    "--steps",
                    "3",
                    "--batch-size",
                    "10",
                    "--micro-batch",
                    "4",
                ]
            )
        )
        weights.append((tmp_path / str(load) / "encoder" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] and held == {10, 8, 2}


def test_losing_slides_are_left_out_and_change_no_gradient():
    """Eq. 9 with and without a graph for them: the same loss and gradients, also with a mask; which slide wins is found by a loop."""
    torch.manual_seed(0)
    config = mixmag.Config.small(8, region=2, depth=2)
    model = mixmag.SlideClassifier(config, mixmag.MixingEncoder(config), dropout=0.5)
    regions, case, label = (
        torch.tensor([2, 1, 3, 1, 2]),
        torch.tensor([0, 0, 0, 1, 2]),
        torch.tensor([1.0, 0.0, 1.0]),
    )
    batch = {
        "x": torch.randn(9, 84, 8),
        "valid": torch.rand(9, 84) > 0.2,
        "held": False,
        "regions": regions,
        "case": case,
        "label": label,
        "slide_ids": list("abcde"),
    }
    ends = [sum(regions[: s + 1].tolist()) for s in range(5)]
    alone = [
        {
            **batch,
            "x": batch["x"][b - r : b],
            "valid": batch["valid"][b - r : b],
            "regions": torch.tensor([r]),
            "case": torch.tensor([0]),
            "label": label[c : c + 1],
        }
        for r, b, c in zip(regions.tolist(), ends, case.tolist())
    ]
    model.eval()
    losses = [train.slide_losses(model, one, 0.1, compute()).item() for one in alone]
    left = train.least_slides(model, batch, 0.1, compute())
    best = min(range(3), key=losses.__getitem__)
    assert (
        left["slide_ids"] == [list("abc")[best], "d", "e"]
        and left["case"].tolist() == [0, 1, 2]
        and model.training
    )
    assert torch.equal(left["x"], torch.cat([alone[s]["x"] for s in (best, 3, 4)])) and torch.equal(
        left["valid"], torch.cat([alone[s]["valid"] for s in (best, 3, 4)])
    )
    model.dropout.p, gradients = 0.0, []
    for step in (
        lambda: train.finetune_step(model, batch, 0.1, compute(), 3, 0),
        lambda: mixmag.min_slide_loss(
            train.slide_losses(model, batch, 0.1, compute()), case
        ).mean(),
    ):
        model.zero_grad()
        loss = step()
        if loss.requires_grad:
            loss.backward()
        gradients.append([loss.detach()] + [p.grad.clone() for p in model.parameters()])
    assert (
        all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients))
        and max(g.abs().max() for g in gradients[0]) > 1e-2
    )


def test_the_model_can_be_captured_for_compilation():
    """As --compile does, but run by torch itself: generating code takes minutes on a processor."""
    gradients = []
    for compiled in (False, True):
        model, _ = model_and_optimizer()
        if compiled:
            model.compile(dynamic=False, backend="aot_eager")
        train.pretrain_step(model, [a_batch()], 6, 6, compute())
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(
        torch.allclose(gradients[0][name], gradients[1][name], atol=1e-5) for name in gradients[0]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_agrees_with_full_precision(dtype):
    model, _ = model_and_optimizer()
    full, half = (
        train.pretrain_step(model, [a_batch()], 6, 6, compute(d))["loss"].item()
        for d in (None, dtype)
    )
    assert half == pytest.approx(full, rel=0.02)


def test_scaled_step_equals_the_plain_one_and_skips_infinities():
    plain, plain_optimizer = model_and_optimizer()
    scaled, scaled_optimizer = model_and_optimizer()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=True)
    for model, optimizer, s in (
        (plain, plain_optimizer, torch.amp.GradScaler("cpu", enabled=False)),
        (scaled, scaled_optimizer, scaler),
    ):
        s.scale(model(a_batch()["x"], a_batch()["removed"]).loss).backward()
        train.optimizer_step(model, optimizer, s, 1e-3, 0.1)
    for a, b in zip(plain.parameters(), scaled.parameters()):
        assert torch.allclose(a, b, atol=1e-6)
    before = [p.clone() for p in scaled.parameters()]
    scaler.scale(scaled(a_batch()["x"], a_batch()["removed"]).loss).backward()
    next(scaled.parameters()).grad.view(-1)[0] = math.inf
    norm = train.optimizer_step(scaled, scaled_optimizer, scaler, 1e-3, 0.1).item()
    assert (
        not math.isfinite(norm)
        and scaler.get_scale() == 512.0
        and all(torch.equal(a, b) for a, b in zip(before, scaled.parameters()))
    )


def test_a_process_without_a_case_takes_its_step_too(cohort, monkeypatch):
    """The second of two processes, and a single case: under fp16 its scaler has seen no loss, and the step is the other process's."""
    monkeypatch.setattr(train, "sum_over_processes", lambda values, compute: values)
    slides = {s.slide_id: s for s in data.read_slides(cohort)}
    dataset = data.CaseDataset(
        slides,
        data.read_task(cohort, "skin_braf")[:1],
        mixmag.Geometry(3),
        mixmag.Geometry(3).select(),
    )
    model = mixmag.SlideClassifier(mixmag.Config.small(64), None, hidden=8)
    optimizer = torch.optim.AdamW(train.parameter_groups(model, 0.0))
    args = SimpleNamespace(
        seed=0, batch_size=4, epochs=1, workers=0, smoothing=0.1, lr=1e-3, warmup=0, clip=1
    )
    machine = SimpleNamespace(**{**vars(compute(torch.float16)), "rank": 1, "world": 2})
    assert train.finetune_epoch(
        model, optimizer, dataset, machine, args, 0, train.progress(total=1)
    ) == (0.0, 0.0)
    assert all(state["step"] == 1 for state in optimizer.state.values()) and len(
        optimizer.state
    ) == len(list(model.parameters()))


def test_a_run_begun_anew_is_never_a_mixture(tmp_path, monkeypatch):
    """Killed while --resume off clears the folder: until nothing of the old run is left, its config.json says whose it is."""
    (tmp_path / "encoder").mkdir()
    names = [
        *train.RUN_FILES,
        "result.json",
        data.SUMS,
        "predict.csv",
        "predict-failed.csv",
        "heatmap/S1/attention.csv",
    ]
    (tmp_path / "heatmap" / "S1").mkdir(parents=True)
    for name in names:
        (tmp_path / name).write_text("{}")
    unlink, gone = Path.unlink, []
    monkeypatch.setattr(
        Path,
        "unlink",
        lambda path, missing_ok=False: (
            gone.append(path.name),
            unlink(path, missing_ok=missing_ok),
        ),
    )
    train.Run(tmp_path, {"lr": 1}, "off", compute())
    assert (
        gone[len(names) - 2] == "config.json"
        and [p.name for p in tmp_path.iterdir()]
        in (["encoder", "config.json"], ["config.json", "encoder"])
        and json.loads((tmp_path / "config.json").read_text()) == {"lr": 1}
    )


def test_precision_is_chosen_by_width_on_a_processor():
    cpu = torch.device("cpu")
    assert (
        train.amp_dtype("auto", cpu, 96) is None
        and train.amp_dtype("off", cpu, 4096) is None
        and train.amp_dtype("fp16", cpu, 96) == torch.float16
    )
    assert train.amp_dtype("auto", cpu, 768) == (
        torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else None
    )


# ------------------------------------------------------------------------------------------------------------- statistics
def test_bootstrap_is_centred_and_covers():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(60):
        labels = np.repeat([0, 1], [60, 30])
        scores = rng.standard_normal(90) + labels  # true AUROC: Phi(1 / sqrt 2)
        samples = train.bootstrap_aurocs(labels, scores, trial, 400)
        low, high = train.interval(samples)
        assert low <= roc_auc_score(labels, scores) <= high
        covered += low <= 0.7602 <= high
    assert covered >= 50  # 95 % of 60 is 57; below 50 has a chance of about 1e-4


def test_bootstrap_areas_equal_scikit_learn():
    """With few cases every resample can be listed: each bootstrapped area must be one that scikit-learn computes of a resample."""
    labels, scores = np.array([1, 0, 0, 1, 0]), np.array([0.9, 0.1, 0.5, 0.5, 0.7])
    samples = train.bootstrap_aurocs(labels, scores, 0, 200)
    possible = {
        round(float(roc_auc_score([1] * 2 + [0] * 3, [*p, *n])), 9)
        for p in itertools.product([0.9, 0.5], repeat=2)
        for n in itertools.product([0.1, 0.5, 0.7], repeat=3)
    }
    assert {round(float(s), 9) for s in samples} <= possible and len(set(samples)) > 4


def test_pairs_are_told_apart_only_where_they_differ():
    """Two rows of equal skill and one that is better on one task of two: the star, the pairing and Holm's correction against a loop of its own."""
    rng, labels = np.random.default_rng(0), np.repeat([1, 0], [30, 60])
    area, draws, rows, tasks = (
        {},
        {},
        ("mem-0.50-patch", "random-all-patch", "abmil-20"),
        ("skin_braf", "lung_egfr"),
    )
    for number, task in enumerate(tasks):
        noise = rng.standard_normal(90)
        for row in rows:
            scores = (
                noise
                + 0.1 * rng.standard_normal(90)
                + labels * (3.0 if (row, task) == (rows[0], "skin_braf") else 0.5)
            )
            area[row, task], draws[row, task] = (
                roc_auc_score(labels, scores),
                train.resampled(labels, scores[None], number),
            )
    runs = {key: [{"auroc": value}] for key, value in area.items()}
    lines = {
        line.split(" | ")[0]: line
        for line in train.format_pairs(rows, tasks, runs, draws).splitlines()
    }
    cells = lines["| MEM 0.50, Patch - Random all, Patch"].split(" | ")
    expected = 100 * (area[rows[0], "skin_braf"] - area[rows[1], "skin_braf"])
    assert (
        cells[1].endswith("*")
        and not cells[2].endswith("*")
        and float(cells[1][:-1]) == pytest.approx(expected, abs=0.051)
        and "on 1 of 2 tasks" in cells[-1]
    )
    assert (
        "not distinguishable" in lines["| Random all, Patch - AB-MIL 20x"]
        and "on 0 of 2" in lines["| Random all, Patch - AB-MIL 20x"]
    )
    assert train.two_sided(np.array([1.0, 2.0, -1.0])) == 1.0 and train.two_sided(
        np.ones(999)
    ) == pytest.approx(0.002)


@pytest.mark.parametrize("tokens", ("patch", "cls"))
def test_held_outputs_stand_for_the_encoder(cohort, tokens):
    """A slide's outputs made once give the logits that the encoder gives, also where tokens are invalid."""
    cases = data.read_task(cohort, "skin_braf")[:6]
    slides = {
        s.slide_id: s for s in data.read_slides(cohort, [i for c in cases for i in c.slide_ids])
    }
    next(iter(slides.values())).valid = (
        np.random.default_rng(0).random(next(iter(slides.values())).valid.shape) > 0.3
    )
    torch.manual_seed(0)
    config, compute = mixmag.Config.small(64), train.machine(argparse.Namespace(device="cpu"), 96)
    model = mixmag.SlideClassifier(config, mixmag.MixingEncoder(config), tokens, hidden=8).eval()
    dataset = data.CaseDataset(slides, cases, config.geometry(), model.index)
    batch = dataset.__getitems__(range(6))
    train.cache_encoder_outputs(model, dataset, compute)
    train.fit_whitening(model, dataset, compute)
    held = dataset.__getitems__(range(6))
    assert (
        held["held"]
        and not batch["held"]
        and torch.allclose(
            train.slide_logits(model, held), train.slide_logits(model, batch), atol=1e-5
        )
    )


def test_one_class_has_no_auroc():
    with pytest.raises(MixmagError, match="both classes"):
        train.auroc([1, 1], [0.2, 0.3])
    assert train.bootstrap_aurocs([1, 0, 0], [0.1, 0.2, 0.3], 0) is None


def test_case_score_rule_is_chosen_by_the_tune_split():
    labels, slides = [1, 1, 0, 0], [[0.9, 0.1], [0.8, 0.2], [0.6, 0.6], [0.7, 0.5]]
    assert train.best_case_score(labels, slides, "auto") == ("max", 1.0)
    assert train.best_case_score(labels, slides, "mean") == ("mean", 0.0)
    assert train.best_case_score([1, 0], [[0.5], [0.4]], "auto")[0] == "max"


def test_the_papers_average_rows():
    """All rows of the paper recompute from their columns but two, which are printed otherwise than their columns say."""
    differ = {
        row for row, values in train.PAPER.items() if abs(np.mean(values[:7]) - values[7]) > 0.051
    }
    assert len(train.PAPER) == 24 and len(differ) == 2, differ


# ---------------------------------------------------------------------------------------------------------- the commands
@pytest.fixture(scope="module")
def runs(cohort, tmp_path_factory):
    """A folder with a finished pretraining run and a finished fine-tuning run on it."""
    folder = tmp_path_factory.mktemp("runs")
    run(
        "train.py",
        "pretrain",
        "--mask",
        0.5,
        "--data",
        cohort,
        "--holdout",
        0.2,
        *QUICK_PRETRAIN,
        cwd=folder,
    )
    run(
        "train.py", "finetune", "--task", "skin_braf", "--data", cohort, *QUICK_FINETUNE, cwd=folder
    )
    return folder


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_pretrain_leaves_a_whole_run(runs, cohort):
    folder = runs / "runs" / "mem-0.50"
    result = json.loads((folder / "result.json").read_text())
    assert result["steps"] == 12 and set(result["held_out"]) == {
        "model",
        "mean",
        "shift",
        "parent",
        "children",
        "neighbours",
    }
    assert result["held_out"]["parent"][0] is None and result["held_out"]["children"][2] is None
    encoder = mixmag.load_encoder(folder / "encoder")
    state = torch.load(folder / "last.pt", weights_only=True)
    assert all(
        torch.equal(v, state["model"][f"encoder.{k}"]) for k, v in encoder.state_dict().items()
    )
    assert (folder / "curve.png").stat().st_size > 5000 and "mixing encoder" in (
        folder / "SUMMARY.md"
    ).read_text()
    with open(folder / "encoder" / "slides.csv", newline="") as f:
        roles = {row["slide_id"]: row["role"] for row in csv.DictReader(f)}
    assert not set(roles) & data.evaluation_slides(cohort) and set(roles.values()) == {
        "train",
        "held-out",
    }
    assert [line["step"] for line in lines(folder / "metrics.jsonl")] == [10, 12]


def test_embeddings_in_memory_change_nothing(cohort, tmp_path):
    for flag in ("--resume=auto", "--in-memory"):
        run(
            "train.py",
            "pretrain",
            "--data",
            cohort,
            "--out",
            tmp_path / flag,
            "--steps",
            3,
            "--batch-size",
            4,
            "--holdout",
            0,
            flag,
            cwd=tmp_path,
        )
    files, held = (
        torch.load(tmp_path / flag / "last.pt", weights_only=True)["model"]
        for flag in ("--resume=auto", "--in-memory")
    )
    assert all(torch.equal(files[k], held[k]) for k in files)


def test_finetune_result_is_what_scikit_learn_says(runs):
    folder = next((runs / "runs").glob("skin_braf-*"))
    result = json.loads((folder / "result.json").read_text())
    with open(folder / "predictions.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    for split, key in (("test", "auroc"), ("tune", "tune_auroc")):
        mine = [r for r in rows if r["split"] == split]
        assert len({r["case_id"] for r in mine}) == len(mine) == result["cases"][split][0]
        assert roc_auc_score(
            [int(r["label"]) for r in mine], [float(r["score"]) for r in mine]
        ) == pytest.approx(result[key], abs=1e-12)
    tuned = [line["tune_auroc"] for line in lines(folder / "metrics.jsonl")]
    assert (
        result["best_epoch"] == int(np.argmax(tuned))
        and result["interval"][0] <= result["auroc"] <= result["interval"][1]
    )


def test_predict_gives_the_same_scores_and_looks_at_no_label(runs, cohort, tmp_path):
    folder = next((runs / "runs").glob("skin_braf-*"))
    run(
        "train.py",
        "predict",
        "--run",
        folder,
        "--data",
        cohort,
        "--out",
        tmp_path / "p.csv",
        cwd=runs,
    )
    with open(tmp_path / "p.csv", newline="") as f:
        scores = {row["slide_id"]: float(row["score"]) for row in csv.DictReader(f)}
    cases = {c.case_id: c for c in data.read_task(cohort, "skin_braf")}
    rule = train.CASE_SCORES[json.loads((folder / "result.json").read_text())["case_score"]]
    with open(folder / "predictions.csv", newline="") as f:
        for row in csv.DictReader(f):
            assert float(row["score"]) == pytest.approx(
                rule([scores[i] for i in cases[row["case_id"]].slide_ids]), abs=1e-5
            )


def test_test_labels_decide_nothing(cohort, tmp_path):
    """The same run with the test labels turned round: identical weights, epochs and scores."""
    other = tmp_path / "turned"
    (other / "tasks").mkdir(parents=True)
    os.symlink(cohort / "slides", other / "slides")
    with open(cohort / "tasks" / "skin_braf.csv", newline="") as f:
        rows = [
            (
                r["case_id"],
                r["slide_id"],
                1 - int(r["label"]) if r["split"] == "test" else r["label"],
                r["split"],
            )
            for r in csv.DictReader(f)
        ]
    data.write_csv(
        other / "tasks" / "skin_braf.csv", ("case_id", "slide_id", "label", "split"), rows
    )
    scores = []
    for place in (cohort, other):
        run(
            "train.py",
            "finetune",
            "--task",
            "skin_braf",
            "--init",
            "random",
            "--data",
            place,
            "--out",
            tmp_path / place.name,
            *QUICK_FINETUNE,
            cwd=tmp_path,
        )
        with open(tmp_path / place.name / "predictions.csv", newline="") as f:
            scores.append([(r["case_id"], r["score"]) for r in csv.DictReader(f)])
    assert scores[0] == scores[1]


@pytest.mark.parametrize(
    "flags",
    [
        ("--init", "none", "--magnification", 5),
        ("--init", "none"),
        ("--init", "random", "--magnification", 20, "--tokens", "cls"),
        ("--tokens", "cls"),
    ],
)
def test_every_kind_of_row_trains(runs, cohort, flags):
    out, _ = run(
        "train.py",
        "finetune",
        "--task",
        "gastric_her2",
        "--data",
        cohort,
        *flags,
        "--epochs",
        1,
        "--batch-size",
        16,
        cwd=runs,
    )
    assert "gastric_her2: test AUROC 0." in out


def test_cmem_trains(runs, cohort):
    run(
        "train.py",
        "pretrain",
        "--source",
        5,
        "--data",
        cohort,
        "--steps",
        10,
        "--batch-size",
        4,
        cwd=runs,
    )
    line = lines(runs / "runs" / "cmem-5-0.50" / "metrics.jsonl")[-1]
    assert line["loss"] == pytest.approx(line["mem"] + line["contrastive"], abs=1e-4)


@pytest.mark.parametrize("empty", [False, True])
def test_a_damaged_checkpoint_falls_back_and_runs_nothing(cohort, tmp_path, empty):
    flags = [
        "pretrain",
        "--data",
        cohort,
        "--batch-size",
        4,
        "--save-every",
        4,
        "--holdout",
        0,
        "--out",
        "r",
    ]
    run("train.py", *flags, "--steps", 12, cwd=tmp_path)
    before = (tmp_path / "r" / "encoder" / "model.safetensors").read_bytes()

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'evil'}",)

    torch.save({"model": Evil()}, tmp_path / "r" / "last.pt")
    if empty:
        (tmp_path / "r" / "last.pt").write_bytes(b"")
    (tmp_path / "r" / "result.json").unlink()
    _, err = run("train.py", *flags, "--steps", 12, cwd=tmp_path)
    assert (
        "not a whole checkpoint" in err
        and "prev.pt, 8 done" in err
        and not (tmp_path / "evil").exists()
    )
    assert (tmp_path / "r" / "encoder" / "model.safetensors").read_bytes() == before


def test_other_settings_are_refused_and_named(runs, cohort):
    _, err = run(
        "train.py",
        "pretrain",
        "--data",
        cohort,
        *QUICK_PRETRAIN,
        "--out",
        "runs/mem-0.50",
        "--lr",
        0.5,
        cwd=runs,
        code=1,
    )
    assert "lr None there, 0.5 now" in err and "--resume off" in err
    _, err = run(
        "train.py",
        "pretrain",
        "--mask",
        0.5,
        "--data",
        cohort,
        "--holdout",
        0.2,
        *QUICK_PRETRAIN,
        cwd=runs,
    )
    assert "done before" in err


def test_faults_end_in_one_clear_line(runs, cohort, tmp_path):
    def error(*args, code=1, cwd=runs):
        _, err = run("train.py", *args, cwd=cwd, code=code)
        return err

    assert "no finished pretraining run" in error(
        "finetune", "--task", "skin_braf", "--data", cohort, cwd=tmp_path
    )
    assert "no such task; found gastric_her2, skin_braf" in error(
        "finetune", "--task", "nothing", "--data", cohort
    )
    assert "cls with an encoder" in error(
        "finetune",
        "--task",
        "skin_braf",
        "--data",
        cohort,
        "--init",
        "none",
        "--tokens",
        "cls",
        "--out",
        "x1",
    )
    assert "40 is not among" in error(
        "finetune",
        "--task",
        "skin_braf",
        "--data",
        cohort,
        "--init",
        "random",
        "--magnification",
        40,
        "--out",
        "x2",
    )
    error("finetune", "--task", "skin_braf", "--magnification", "20x", code=2)
    assert "no slides folder" in error("pretrain", "--data", tmp_path)
    assert "no exported encoder" in error(
        "embed", "--init", tmp_path, "--data", cohort, "--out", "x3"
    )
    assert "--region 4" in error(
        "pretrain", "--data", cohort, "--region", 5, "--out", "x4", "--holdout", 0
    )
    assert "some must stay" in error("pretrain", "--data", cohort, "--mask", 1.0, "--out", "x5")
    error("finetune", code=2)
    leaky = tmp_path / "leaky"
    leaky.mkdir()
    os.symlink(cohort / "slides", leaky / "slides")
    os.symlink(cohort / "tasks", leaky / "tasks")
    data.write_csv(
        leaky / "pretrain.csv", ("slide_id",), [(p.stem,) for p in (cohort / "slides").iterdir()]
    )
    run(
        "train.py",
        "pretrain",
        "--data",
        leaky,
        "--steps",
        2,
        "--batch-size",
        2,
        "--out",
        "saw-it-all",
        cwd=tmp_path,
    )
    for init in (tmp_path / "saw-it-all", tmp_path / "saw-it-all" / "encoder"):
        assert "slides of tune or test cases" in error(
            "finetune", "--task", "skin_braf", "--data", cohort, "--init", init
        )


def test_one_class_in_the_test_split_is_said(cohort, tmp_path):
    other = tmp_path / "one"
    (other / "tasks").mkdir(parents=True)
    os.symlink(cohort / "slides", other / "slides")
    with open(cohort / "tasks" / "skin_braf.csv", newline="") as f:
        rows = [
            (r["case_id"], r["slide_id"], r["label"], r["split"])
            for r in csv.DictReader(f)
            if r["split"] != "test" or r["label"] == "0"
        ]
    data.write_csv(
        other / "tasks" / "skin_braf.csv", ("case_id", "slide_id", "label", "split"), rows
    )
    out, _ = run(
        "train.py",
        "finetune",
        "--task",
        "skin_braf",
        "--init",
        "none",
        "--data",
        other,
        "--epochs",
        1,
        cwd=tmp_path,
    )
    assert (
        "no AUROC" in out
        and json.loads(next(tmp_path.glob("runs/*/result.json")).read_text())["auroc"] is None
    )
    out, _ = run(
        "train.py", "table", "--data", other, "--rows", "abmil-20", "--epochs", 1, cwd=tmp_path
    )
    assert "n/a" in out and "0 of 1" in out


def test_table_runs_skips_and_prints(runs, cohort):
    args = (
        "table",
        "--data",
        cohort,
        "--rows",
        "abmil-20",
        "random-all-cls",
        "mem-0.25-patch",
        "--steps",
        4,
        "--epochs",
        1,
        "--seeds",
        2,
    )
    out, _ = run("train.py", *args, cwd=runs)
    assert (
        "## Table 1" in out
        and "## Table 2" in out
        and "| MEM 0.25 |" in out
        and "2 of 2" in out
        and "mean over 2 seeds" in out
    )
    paper = np.mean(
        [
            train.PAPER["abmil-20"][list(train.TASK_TITLES).index(task)]
            for task in ("gastric_her2", "skin_braf")
        ]
    )
    assert f"| {paper:.1f} |" in out and (runs / "runs/table/SUMMARY.md").exists()
    found = train.read_results(runs / "runs/table")
    for (row, task), lines in found.runs.items():
        for line, scores in zip(lines, found.scores[row, task], strict=True):
            assert line["auroc"] == pytest.approx(
                roc_auc_score(found.labels[task], scores), abs=1e-12
            )
    again, err = run("train.py", *args, cwd=runs)
    assert out.endswith(again) and err.count("done before") >= 12


def test_doctor_names_what_is_installed(tmp_path):
    out, _ = run("train.py", "doctor", cwd=tmp_path)
    assert torch.__version__.split("+")[0] in out and "free disk" in out


def test_doctor_names_what_is_missing(tmp_path):
    """In place of the traceback that importing it would be."""
    (tmp_path / "sitecustomize.py").write_text("""import importlib.metadata as m
version = m.version
def absent(name):
    if name == "h5py":
        raise m.PackageNotFoundError(name)
    return version(name)
m.version = absent
""")
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "doctor"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert (
        done.returncode == 1
        and "WARNING            h5py is not installed: pip install -r requirements.txt"
        in done.stderr
        and "Traceback" not in done.stderr
    )


def test_demo_wants_its_own_task(cohort, tmp_path):
    (tmp_path / "d" / "tasks").mkdir(parents=True)
    os.symlink(cohort / "slides", tmp_path / "d" / "slides")
    shutil.copy(cohort / "tasks" / "skin_braf.csv", tmp_path / "d" / "tasks")
    _, err = run("train.py", "demo", "--data", "d", cwd=tmp_path, code=1)
    assert (
        "gastric_her2.csv: no such task; found skin_braf" in err
        and not (tmp_path / "runs").exists()
    )


def several(ranks, *args, cwd):
    """The command in processes that find each other as those of torchrun do, with gloo."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        place = {
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(probe.getsockname()[1]),
            "WORLD_SIZE": str(ranks),
        }
    for process in [
        Command("train.py", *args, cwd=cwd, environment={**place, "RANK": str(r)})
        for r in range(ranks)
    ]:
        code, out, err = process.end()
        assert code == 0, out + err


def torchrun(ranks, *args, cwd):
    """The command under torchrun itself, one thread a process."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(ranks),
            str(ROOT / "train.py"),
            *map(str, args),
        ],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr


def untrained(flags, cohort, tmp_path) -> dict:
    """The weights that those commands start from: a run of one step at no rate."""
    once = ("--epochs", 1) if flags[0] == "finetune" else ("--steps", 1)
    run("train.py", *flags, *once, "--data", cohort, "--out", "0", "--lr", 1e-30, cwd=tmp_path)
    return torch.load(tmp_path / "0" / "last.pt", weights_only=True)["model"]


@pytest.mark.parametrize(
    "flags, ranks, start",
    [
        (("pretrain", "--batch-size", 8, "--steps", 6, "--holdout", 0.2), (2, 4), several),
        (
            ("pretrain", "--source", 5, "--batch-size", 8, "--steps", 6, "--holdout", 0.2),
            (2, 4),
            several,
        ),
        (
            (
                "finetune",
                "--task",
                "skin_braf",
                "--init",
                "random",
                "--magnification",
                10,
                "--dropout",
                0,
                "--epochs",
                2,
                "--batch-size",
                10,
            ),
            (2,),
            torchrun,
        ),
    ],
)
def test_many_processes_give_what_one_gives(cohort, tmp_path, flags, ranks, start):
    """The same parameters after several steps at the same global batch; one of the batches of finetune does not divide."""
    run("train.py", *flags, "--data", cohort, "--out", "1", cwd=tmp_path)
    one, before = (
        torch.load(tmp_path / "1" / "last.pt", weights_only=True),
        untrained(flags, cohort, tmp_path),
    )
    for n in ranks:
        start(n, *flags, "--data", cohort, "--out", n, cwd=tmp_path)
        other = torch.load(tmp_path / str(n) / "last.pt", weights_only=True)
        a, b, c = (
            torch.cat([v.flatten() for k, v in m.items() if "standardize" not in k])
            for m in (one["model"], other["model"], before)
        )
        assert (a - b).norm() < 1e-2 * (
            a - c
        ).norm()  # AdamW divides by sqrt(v), which blows up rounding where gradients are small
        first, other = (
            lines(tmp_path / "1" / "metrics.jsonl"),
            lines(tmp_path / str(n) / "metrics.jsonl"),
        )
        assert [set(line) for line in first] == [set(line) for line in other] and all(
            other[-1][k] == pytest.approx(first[-1][k], rel=2e-3) for k in ("loss", "norm")
        )
    if flags[0] == "finetune":
        scores = [
            [
                (r["case_id"], float(r["score"]))
                for r in data.read_csv(tmp_path / n / "predictions.csv", ("case_id", "score"))
            ]
            for n in ("1", "2")
        ]
        assert [c for c, _ in scores[0]] == [c for c, _ in scores[1]] and np.allclose(
            [s for _, s in scores[0]], [s for _, s in scores[1]], atol=1e-4
        )


def test_real_slides_go_all_the_way(real, tmp_path):
    """Tile, pretrain, embed; where there is nothing to do, that is said."""
    run(
        "data.py",
        "tile",
        "--slides",
        real / "slides" / "TCGA-CR-7395-01A-01-TS1.svs",
        "--mpp",
        0.5,
        "--out",
        "d",
        cwd=tmp_path,
    )
    run(
        "data.py",
        "tile",
        "--slides",
        real / "slides" / "CMU-1-Small-Region.svs",
        real / "slides" / "luna-1065626.svs",
        "--out",
        "d",
        cwd=tmp_path,
    )
    _, err = run("train.py", "pretrain", "--data", "d", *QUICK_PRETRAIN, cwd=tmp_path)
    assert "3 slides with 2 windows" in err
    out, _ = run(
        "train.py",
        "embed",
        "--init",
        "runs/mem-0.50",
        "--tokens",
        "cls",
        "--data",
        "d",
        "--out",
        "e",
        cwd=tmp_path,
    )
    assert "2 regions" in out and "luna-1065626" in out


# --------------------------------------------------------------------------------- embed, heatmap, the plan: other people's tools


def test_finetune_plans_before_work(cohort, tmp_path):
    """Counts against a loop, no run folder, the same settings as the run itself, and the memory within a factor of two of the measured peak."""
    flags = [
        "finetune",
        "--task",
        "skin_braf",
        "--init",
        "random",
        "--data",
        str(cohort),
        "--batch-size",
        "24",
        "--epochs",
        "1",
        "--region",
        "2",
        "--out",
        "r",
    ]
    planned, _ = run("train.py", *flags, "--dry-run", cwd=tmp_path)
    assert not list(tmp_path.iterdir())
    slides, bytes_read, most = {s.slide_id: s for s in data.read_slides(cohort)}, 0, 0
    for split in data.SPLITS:
        cases = [c for c in data.read_task(cohort, "skin_braf") if c.split == split]
        from test_inference import brute_force

        regions = [sum(len(brute_force(slides[i])[1]) for i in c.slide_ids) for c in cases]
        row = next(line for line in planned.splitlines() if line.startswith(split)).split()
        assert row[1:5] == [
            str(len(cases)),
            str(sum(len(c.slide_ids) for c in cases)),
            str(sum(regions)),
            f"{84 * sum(regions):,d}",
        ]
        bytes_read += (split != "test") * sum(regions) * 84 * 64 * 2
        most = sum(sorted(regions)[-24:]) if split == "train" else most
    assert (
        f"an epoch reads the train and the tune split, {bytes_read / 1e9:.3f} GB" in planned
        and "largest case: " in planned
    )
    code = (
        "import sys, train; train.finetune(train.parse(sys.argv[1:])); "
        "print(int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) * 1024)"
    )  # ru_maxrss would count the parent's
    done = subprocess.run(
        [sys.executable, "-c", code, *flags],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    predicted, measured = (
        float(planned.split("memory: about ")[1].split()[0]),
        int(done.stdout.split()[-1]) / 1e9,
    )
    assert 0.5 < predicted / measured < 2, (predicted, measured)
    config = mixmag.Config.small(64, region=2)
    model = mixmag.SlideClassifier(
        config, mixmag.MixingEncoder(config), hidden=train.PRESETS["small"]["finetune"]["hidden"]
    )
    assert predicted - float(planned.split(" of them held")[0].split()[-1]) == pytest.approx(
        train.finetuning_memory(model, most, True) / 1e9, abs=0.011
    )
    assert "dry_run" not in json.loads((tmp_path / "r/config.json").read_text())


def test_a_table_of_several_processes(runs, cohort):
    """torchrun makes the table that one process makes, and a cell that is refused ends all of them, in one line, with nothing written."""
    args = (
        "table",
        "--data",
        cohort,
        "--rows",
        "abmil-20",
        "random-10-patch",
        "--tasks",
        "skin_braf",
        "--epochs",
        1,
    )
    torchrun(2, *args, "--out", "several", cwd=runs)
    assert len(train.read_results(runs / "several").runs) == 2
    before = {p: p.read_bytes() for p in (runs / "several").iterdir() if p.is_file()}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            str(ROOT / "train.py"),
            *map(str, args[:-1]),
            "2",
            "--out",
            "several",
        ],
        cwd=runs,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode and "holds a run with other settings" in done.stderr
    assert {p: p.read_bytes() for p in (runs / "several").iterdir() if p.is_file()} == before


def test_a_table_of_other_settings_replaces_nothing(runs, cohort):
    """What a table's folder holds stays when it is asked for with other settings, or nothing can be had; what could not be had costs exit code 3."""
    args = ("table", "--data", cohort, "--rows", "abmil-20", "--tasks", "skin_braf", "--out", "t")
    run("train.py", *args, "--epochs", 1, cwd=runs)
    before = {p: p.read_bytes() for p in (runs / "t").iterdir() if p.is_file()}
    _, err = run("train.py", *args, "--epochs", 2, cwd=runs, code=1)
    assert (
        "holds a run with other settings: epochs 1 there, 2 now" in err
        and {p: p.read_bytes() for p in (runs / "t").iterdir() if p.is_file()} == before
    )
    (runs / "one-class" / "tasks").mkdir(parents=True)
    os.symlink(cohort / "slides", runs / "one-class" / "slides")
    shutil.copy(cohort / "tasks" / "gastric_her2.csv", runs / "one-class" / "tasks")
    rows = [
        (r["case_id"], r["slide_id"], 0, r["split"])
        for r in data.read_csv(cohort / "tasks" / "skin_braf.csv", ("case_id", "slide_id", "split"))
    ]
    data.write_csv(
        runs / "one-class" / "tasks" / "skin_braf.csv",
        ("case_id", "slide_id", "label", "split"),
        rows,
    )
    args = (
        "table",
        "--data",
        "one-class",
        "--rows",
        "abmil-20",
        "abmil-20",
        "--epochs",
        1,
        "--out",
    )
    out, _ = run("train.py", *args, "u", cwd=runs, code=3)
    assert out.count("| AB-MIL 20x |") == 1 and "| n/a | **" in out and "1 of 2" in out
    _, err = run("train.py", *args, "v", "--tasks", "skin_braf", cwd=runs, code=1)
    assert "no cell of the table could be had" in err and not (runs / "v" / "results.csv").exists()


def test_a_case_seen_by_another_tasks_slide_is_a_leak(runs, cohort, tmp_path):
    seen = next(
        r["slide_id"]
        for r in data.read_csv(runs / "runs/mem-0.50/encoder/slides.csv", ("slide_id", "role"))
        if r["role"] == "train"
    )
    shutil.copytree(cohort / "tasks", tmp_path / "d" / "tasks")
    os.symlink(cohort / "slides", tmp_path / "d" / "slides")
    path = tmp_path / "d" / "tasks" / "skin_braf.csv"
    columns = ("case_id", "slide_id", "label", "split")
    case = next(r["case_id"] for r in data.read_csv(path, columns) if r["split"] == "test")
    data.write_csv(path.with_name("other.csv"), columns, [(case, seen, 1, "train")])
    for name in ("gastric_her2", "skin_braf"):  # where that slide has been so far
        rows = [
            tuple(r.values())
            for r in data.read_csv(path.with_name(f"{name}.csv"), columns)
            if r["slide_id"] != seen
        ]
        data.write_csv(path.with_name(f"{name}.csv"), columns, rows)
    _, err = run(
        "train.py",
        "finetune",
        "--task",
        "skin_braf",
        "--data",
        tmp_path / "d",
        "--init",
        "runs/mem-0.50",
        "--out",
        tmp_path / "f",
        cwd=runs,
        code=1,
    )
    assert f"was pretrained on 1 slides of tune or test cases of this task, such as '{seen}'" in err


def test_the_encoder_brings_preset_and_region(runs, cohort):
    args = train.parse(["finetune", "--task", "x", "--init", str(runs / "runs/mem-0.50")])
    train.adopt_encoder_settings(args)
    assert (args.preset, args.region) == ("small", 3)
    about = json.loads((runs / "runs/mem-0.50/encoder/config.json").read_text())
    (runs / "other").mkdir()
    shutil.copy(runs / "runs/mem-0.50/encoder/model.safetensors", runs / "other")
    data.write_json(
        runs / "other" / "config.json",
        {**about, "preset": "paper", "model": {**about["model"], "region": 2}},
    )
    for flags, expected in (((), ("paper", 2)), (("--preset", "small"), ("small", 2))):
        args = train.parse(["finetune", "--task", "x", "--init", str(runs / "other"), *flags])
        train.adopt_encoder_settings(args)
        assert (args.preset, args.region) == expected
    with pytest.raises(MixmagError, match="--region 4: the encoder of .* reads regions of 2 x 2"):
        train.adopt_encoder_settings(
            train.parse(["finetune", "--task", "x", "--init", str(runs / "other"), "--region", "4"])
        )
    with pytest.raises(MixmagError, match="is a fine-tuning run"):
        train.encoder_folder(next((runs / "runs").glob("skin_braf-*")))


@pytest.mark.parametrize(
    "flags",
    [
        ("--lr", "nan"),
        ("--lr", -1),
        ("--clip", 0),
        ("--smoothing", 5),
        ("--warmup", -1),
        ("--layer-decay", 2),
        ("--weight-decay", "inf"),
        ("--dropout", 1.5),
        ("--seed", 2**40),
        ("--min-cover", "x"),
        ("--batch-size", 0),
    ],
)
def test_flags_out_of_range_are_usage_errors(flags, capsys):
    with pytest.raises(SystemExit) as end:
        train.parse(["finetune", "--task", "x", *map(str, flags)])
    assert end.value.code == 2 and f"argument {flags[0]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags", [("--mask", "inf"), ("--mask", -1), ("--blr", 0), ("--source", 0)]
)
def test_pretraining_flags_out_of_range_are_usage_errors(flags, capsys):
    with pytest.raises(SystemExit) as end:
        train.parse(["pretrain", *map(str, flags)])
    assert end.value.code == 2 and f"argument {flags[-2]}" in capsys.readouterr().err
    assert train.parse(["finetune", "--task", "x", "--magnification", "8.75"]).magnification == 8.75


def test_what_scales_to_nonsense_is_refused(cohort, tmp_path):
    _, err = run(
        "train.py",
        "pretrain",
        "--data",
        cohort,
        "--batch-size",
        4096,
        "--steps",
        1,
        "--out",
        "x",
        cwd=tmp_path,
        code=1,
    )
    assert "makes a peak rate of 0.51" in err and "--preset paper" in err
    _, err = run(
        "train.py",
        "pretrain",
        "--data",
        cohort,
        "--device",
        "gpu",
        "--out",
        "x",
        cwd=tmp_path,
        code=1,
    )
    assert "--device gpu: expected auto, cpu or cuda[:i]" in err


def test_one_damaged_slide_costs_itself(runs, cohort, tmp_path):
    """predict and embed go on without it; a damaged earlier output of embed costs its slide."""
    ids = [c.slide_ids[0] for c in data.read_task(cohort, "skin_braf")][:3]
    (tmp_path / "slides").mkdir()
    for i in ids:
        shutil.copy(cohort / "slides" / f"{i}.safetensors", tmp_path / "slides")
    (tmp_path / "slides" / f"{ids[0]}.safetensors").write_bytes(
        (tmp_path / "slides" / f"{ids[0]}.safetensors").read_bytes()[:5000]
    )
    tuned = next(p.parent for p in (runs / "runs").glob("skin_braf-*/result.json"))
    out, _ = run(
        "train.py",
        "predict",
        "--run",
        tuned,
        "--data",
        tmp_path,
        "--out",
        tmp_path / "p.csv",
        cwd=runs,
        code=3,
    )
    assert "2 slides scored" in out and [
        r["slide_id"] for r in data.read_csv(tmp_path / "p-failed.csv", ("slide_id",))
    ] == [ids[0]]
    embed = ("embed", "--init", "runs/mem-0.50", "--data", tmp_path, "--out", tmp_path / "e")
    out, _ = run("train.py", *embed, cwd=runs, code=3)
    path = next((tmp_path / "e").rglob(f"features_*/{ids[1]}.h5"))
    path.write_bytes(path.read_bytes()[:300])
    out, err = run("train.py", *embed, cwd=runs, code=3)
    assert "1 slides, cls outputs" in out and f"{path}: is no file of embeddings" in err


def test_weights_without_a_config_are_not_taken_up(runs, cohort, tmp_path):
    (tmp_path / "r").mkdir()
    shutil.copy(runs / "runs/mem-0.50/last.pt", tmp_path / "r")
    for resume in ("auto", "off"):
        _, err = run(
            "train.py",
            "pretrain",
            "--data",
            cohort,
            *QUICK_PRETRAIN,
            "--out",
            tmp_path / "r",
            "--resume",
            resume,
            cwd=tmp_path,
            code=1,
        )
        assert "holds last.pt but no config.json" in err


def test_of_several_starts_tune_chooses(runs, cohort, tmp_path):
    """Each start is noted, the result ranks tune at least as well as the best of them, and the same command gives the same again."""
    flags = (
        "finetune",
        "--task",
        "skin_braf",
        "--data",
        cohort,
        "--init",
        runs / "runs/mem-0.50",
        "--epochs",
        2,
        "--starts",
        3,
        "--out",
    )
    for out in "ab":
        run("train.py", *flags, tmp_path / out, cwd=tmp_path)
    noted = lines(tmp_path / "a" / "metrics.jsonl")
    starts = [line["tune_auroc"] for line in noted if "start" in line]
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    assert (
        len(starts) == 3
        and len(set(starts)) > 1
        and [line["epoch"] for line in noted[3:]] == [0, 1]
    )
    assert result["tune_auroc"] == max(starts + [line["tune_auroc"] for line in noted[3:]])
    assert all(
        (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        for name in ("predictions.csv", "metrics.jsonl")
    )


def test_abmil_reads_each_magnification_by_its_own_constants(cohort):
    """What tiles of a magnification have in common is no news: the inputs of AB-MIL have mean 0 and standard deviation 1 in each."""
    cases = [c for c in data.read_task(cohort, "skin_braf") if c.split == "train"]
    slides = data.read_slides(cohort, {i for c in cases for i in c.slide_ids})
    for magnification in (10, "all"):
        args = train.parse(
            [
                "finetune",
                "--task",
                "skin_braf",
                "--init",
                "none",
                "--magnification",
                str(magnification),
            ]
        )
        train.adopt_encoder_settings(args)
        train.apply_preset(args, "finetune")
        model = train.make_classifier(args, slides, slides, train.machine(args, 96))
        dataset = data.CaseDataset(
            {s.slide_id: s for s in slides}, cases, model.config.geometry(), model.index
        )
        x = model.encode(dataset.__getitems__(range(len(dataset)))["x"])  # (W, n, D)
        level = model.config.geometry().level()[model.index]
        for k in level.unique():
            assert (
                x[:, level == k].mean((0, 1)).abs().max() < 1e-3
                and (x[:, level == k].std((0, 1)) - 1).abs().max() < 1e-2
            )


def test_what_is_left_to_train_on_and_how_is_said_before_a_run_begins(cohort, tmp_path):
    """A refusal that follows from the flags leaves no run folder behind that would refuse the mended command."""
    _, err = run(
        "train.py",
        "pretrain",
        "--data",
        cohort,
        "--out",
        "r",
        "--batch-size",
        4096,
        "--steps",
        1,
        cwd=tmp_path,
        code=1,
    )
    assert "give --lr" in err and not (tmp_path / "r").exists()
    os.mkdir(tmp_path / "d")
    os.symlink(cohort / "slides", tmp_path / "d" / "slides")
    rows = [(i, p.stem, i % 2, "test") for i, p in enumerate(sorted((cohort / "slides").iterdir()))]
    data.write_csv(
        tmp_path / "d" / "tasks" / "t.csv", ("case_id", "slide_id", "label", "split"), rows
    )
    _, err = run("train.py", "pretrain", "--data", "d", cwd=tmp_path, code=1)
    assert "every slide is of a tune or test case, or held out" in err


def test_machine_facts_want_no_git(cohort, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert train.machine_facts(train.parse(["table"]), cohort)["commit"] is None


def test_ones_own_tasks_stand_beside_the_papers(runs, cohort):
    """By default a table is of every task; one without test cases is said to be that."""
    (runs / "own" / "tasks").mkdir(parents=True)
    os.symlink(cohort / "slides", runs / "own" / "slides")
    shutil.copy(cohort / "tasks" / "skin_braf.csv", runs / "own" / "tasks")
    shutil.copy(cohort / "tasks" / "skin_braf.csv", runs / "own" / "tasks" / "a_task.csv")
    (runs / "own" / "tasks" / "._b.csv").write_bytes(
        b"\0\5\x16\7"
    )  # what macOS leaves on other disks
    out, _ = run(
        "train.py",
        "table",
        "--data",
        "own",
        "--rows",
        "abmil-20",
        "--epochs",
        1,
        "--out",
        "own-table",
        cwd=runs,
    )
    assert (
        train.read_results(runs / "own-table").tasks == ["skin_braf", "a_task"]
        and "| Skin BRAF | a_task |" in out
    )
    with open(cohort / "tasks" / "skin_braf.csv", newline="") as f:
        rows = [
            (r["case_id"], r["slide_id"], r["label"], r["split"])
            for r in csv.DictReader(f)
            if r["split"] != "test"
        ]
    data.write_csv(
        runs / "own" / "tasks" / "c.csv", ("case_id", "slide_id", "label", "split"), rows
    )
    _, err = run(
        "train.py",
        "table",
        "--data",
        "own",
        "--rows",
        "abmil-20",
        "--tasks",
        "c",
        "--epochs",
        1,
        "--out",
        "none",
        cwd=runs,
        code=1,
    )
    assert "no cell of the table could be had; the last one: its test split has no case" in err


def test_whitening_is_of_every_training_slide(cohort, monkeypatch):
    """Where there are too many regions it takes some of each slide, not all of some: by a loop."""
    slides = {s.slide_id: s for s in data.read_slides(cohort)}
    cases = [c for c in data.read_task(cohort, "skin_braf") if c.split == "train"]
    torch.manual_seed(0)
    model = mixmag.SlideClassifier(
        mixmag.Config.small(64), mixmag.MixingEncoder(mixmag.Config.small(64))
    )
    dataset = data.CaseDataset(slides, cases, model.config.geometry(), model.index)
    regions = sum(map(len, dataset.rows.values()))
    train.cache_encoder_outputs(model, dataset, compute())
    train.fit_whitening(model, dataset, compute(), limit=regions // 2)
    share = -(-regions // (regions // 2))
    h = torch.cat(
        [
            torch.from_numpy(train.encoded(model, dataset, i, compute())[0])[::share]
            for i in dataset.rows
        ]
    ).double()
    assert len(dataset.rows) > 20 and torch.allclose(
        model.whiten.mean, h.mean(0).float(), atol=1e-5
    )


@pytest.mark.parametrize("frozen, whitened", [(1, False), (2, True)])
def test_only_a_frozen_encoders_outputs_are_whitened(cohort, tmp_path, frozen, whitened):
    train.finetune(
        train.parse(
            [
                "finetune",
                "--data",
                str(cohort),
                "--task",
                "skin_braf",
                "--init",
                "random",
                "--tokens",
                "cls",
                "--epochs",
                "2",
                "--frozen-epochs",
                str(frozen),
                "--out",
                str(tmp_path / "r"),
            ]
        )
    )
    matrix = train.read_classifier(tmp_path / "r")[0].whiten.matrix
    assert torch.equal(matrix, torch.eye(len(matrix))) != whitened


def test_scores_are_not_rounded_by_autocast():
    """The attention's and the head's last products are in full precision whatever the rest is in."""
    torch.manual_seed(0)
    model = mixmag.SlideClassifier(mixmag.Config.small(64), None, dropout=0.0)
    x = torch.randn(400, 189, 64) * 0.02
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logit, attention = model(x, torch.ones(400, dtype=torch.long))
    assert logit.dtype == attention.dtype == torch.float32 and len(logit.unique()) > 390


def test_several_starts_go_on_where_they_stopped(cohort, tmp_path, monkeypatch):
    """After each start what was reached is saved: a run stopped in the third ends bit for bit as the whole one, and makes two starts again."""
    flags = [
        "finetune",
        "--data",
        str(cohort),
        "--task",
        "skin_braf",
        "--init",
        "random",
        "--epochs",
        "2",
        "--starts",
        "4",
        "--out",
    ]
    train.finetune(train.parse([*flags, str(tmp_path / "whole")]))
    begun, epoch = [], train.finetune_epoch

    def stopped(*args):
        begun.append(args[5])
        if len(begun) == 6:
            raise data.Stopped
        return epoch(*args)

    monkeypatch.setattr(train, "finetune_epoch", stopped)
    with pytest.raises(data.Stopped):
        train.finetune(train.parse([*flags, str(tmp_path / "broken")]))
    train.finetune(train.parse([*flags, str(tmp_path / "broken")]))
    assert len(begun) == 6 + 4 + 2
    for name in ("predictions.csv", "model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()
