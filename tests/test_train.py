"""Schedules, groups, precision; the commands as real processes, killed and started again.     python -m pytest tests/test_train.py"""
import csv
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT, run
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
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, milestones=[5], schedulers=[
        torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 5, total_iters=4),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=15)])
    for step in range(20):
        assert train.lr_at(step, 20, 5) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        scheduler.step()
    assert train.lr_at(0, 100, 10) > 0 and train.lr_at(9, 100, 10) == 1 and train.lr_at(0, 1, 0) == 1


def test_every_parameter_is_in_exactly_one_group():
    config = mixmag.Config.small(16)
    for model in (mixmag.ContrastiveEmbeddingModel(config), mixmag.SlideClassifier(config, mixmag.MixingEncoder(config))):
        groups = train.parameter_groups(model, config.depth, 0.05, 0.75)
        ids = [id(p) for g in groups for p in g["params"]]
        assert sorted(ids) == sorted(map(id, model.parameters())) and len(set(ids)) == len(ids)
        where = {id(p): g for g in groups for p in g["params"]}
        for name, p in model.named_parameters():
            plain = name.endswith("bias") or "norm" in name or name.split(".")[-1] in ("cls", "pos", "mask_token")
            assert where[id(p)]["weight_decay"] == (0 if plain else 0.05), name


def test_layer_decay_follows_the_depth():
    config = mixmag.Config.small(16)
    model = mixmag.SlideClassifier(config, mixmag.MixingEncoder(config))
    where = {id(p): g["lr_scale"] for g in train.parameter_groups(model, config.depth, 0.05, 0.75) for p in g["params"]}
    e = model.encoder
    assert [where[id(b.attn.qkv.weight)] for b in e.blocks] == pytest.approx([0.75 ** 4, 0.75 ** 3, 0.75 ** 2, 0.75])
    assert where[id(e.pos)] == where[id(e.cls)] == where[id(e.input.weight)] == pytest.approx(0.75 ** 5)
    assert where[id(e.norm.weight)] == where[id(model.head.weight)] == where[id(model.pool.w.weight)] == 1


@pytest.mark.parametrize("name", ["encoder.surprise", "encoder.blockss.0.x", "teacher.weight", "xencoder.norm.weight"])
def test_unknown_names_raise(name):
    with pytest.raises(ValueError, match="belongs to no layer"):
        train.layer_of(name, 4)


def compute(dtype=None, scale=2.0 ** 10):
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=dtype == torch.float16)
    return train.SimpleNamespace(device=torch.device("cpu"), dtype=dtype, scaler=scaler, rank=0, world=1,
                                 autocast=lambda: torch.autocast("cpu", dtype) if dtype else train.nullcontext())


def a_batch(views=1, B=6):
    torch.manual_seed(1)
    x = torch.randn(B, 84, 8) if views == 1 else torch.randn(2, B, 84, 8)
    removed = mixmag.random_removal(views * B, 84, 0.5).view(*x.shape[:-2], -1)
    return {"x": x, "removed": removed, "valid": None}


def model_and_optimizer(cls=mixmag.MaskedEmbeddingModel):
    torch.manual_seed(0)
    config = mixmag.Config.small(8, region=2, depth=2)
    model = cls(config)
    return model, torch.optim.AdamW(train.parameter_groups(model, config.depth, 0.05), lr=1e-3)


@pytest.mark.parametrize("views", [1, 2])
def test_accumulated_gradient_equals_the_whole(views):
    """For CMEM too, whose negatives are the whole batch however it is cut."""
    model, _ = model_and_optimizer(mixmag.MaskedEmbeddingModel if views == 1 else mixmag.ContrastiveEmbeddingModel)
    gradients = []
    for micro in (6, 4, 1):
        model.zero_grad()
        logged = train.pretrain_step(model, a_batch(views), micro, compute())
        gradients.append([p.grad.clone() for p in model.parameters()] + list(logged.values()))
    for other in gradients[1:]:
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(gradients[0], other))
    if views == 2:
        assert logged["loss"].item() == pytest.approx((logged["mem"] + logged["contrastive"]).item(), abs=1e-5) and logged["contrastive"] > 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_agrees_with_full_precision(dtype):
    model, _ = model_and_optimizer()
    full, half = (train.pretrain_step(model, a_batch(), 6, compute(d))["loss"].item() for d in (None, dtype))
    assert half == pytest.approx(full, rel=0.02)


def test_scaled_step_equals_the_plain_one_and_skips_infinities():
    plain, plain_optimizer = model_and_optimizer()
    scaled, scaled_optimizer = model_and_optimizer()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=True)
    for model, optimizer, s in ((plain, plain_optimizer, torch.amp.GradScaler("cpu", enabled=False)), (scaled, scaled_optimizer, scaler)):
        s.scale(model(a_batch()["x"], a_batch()["removed"]).loss).backward()
        train.optimizer_step(model, optimizer, s, 1e-3, 0.1)
    for a, b in zip(plain.parameters(), scaled.parameters()):
        assert torch.allclose(a, b, atol=1e-6)
    before = [p.clone() for p in scaled.parameters()]
    scaler.scale(scaled(a_batch()["x"], a_batch()["removed"]).loss).backward()
    next(scaled.parameters()).grad.view(-1)[0] = math.inf
    norm = train.optimizer_step(scaled, scaled_optimizer, scaler, 1e-3, 0.1).item()
    assert not math.isfinite(norm) and scaler.get_scale() == 512.0 and all(torch.equal(a, b) for a, b in zip(before, scaled.parameters()))


def test_precision_is_chosen_by_width_on_a_processor():
    cpu = torch.device("cpu")
    assert train.amp_dtype("auto", cpu, 96) is None and train.amp_dtype("off", cpu, 4096) is None and train.amp_dtype("fp16", cpu, 96) == torch.float16
    assert train.amp_dtype("auto", cpu, 768) == (torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else None)


# ------------------------------------------------------------------------------------------------------------- statistics

def test_bootstrap_is_centred_and_covers():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(60):
        labels = np.repeat([0, 1], [60, 30])
        scores = rng.standard_normal(90) + labels                  # true AUROC: Phi(1 / sqrt 2)
        samples = train.bootstrap_aurocs(labels, scores, trial, 400)
        low, high = train.interval(samples)
        assert low <= roc_auc_score(labels, scores) <= high
        covered += low <= 0.7602 <= high
    assert covered >= 50                                           # 95 % of 60 is 57; below 50 has a chance of about 1e-4


def test_bootstrap_areas_equal_scikit_learn():
    """With few cases every resample can be listed: each bootstrapped area must be one that scikit-learn computes of a resample."""
    labels, scores = np.array([1, 0, 0, 1, 0]), np.array([0.9, 0.1, 0.5, 0.5, 0.7])
    samples = train.bootstrap_aurocs(labels, scores, 0, 200)
    possible = {round(float(roc_auc_score([1] * 2 + [0] * 3, [*p, *n])), 9) for p in itertools.product([0.9, 0.5], repeat=2)
                for n in itertools.product([0.1, 0.5, 0.7], repeat=3)}
    assert {round(float(s), 9) for s in samples} <= possible and len(set(samples)) > 4


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
    differ = {row for row, values in train.PAPER.items() if abs(np.mean(values[:7]) - values[7]) > 0.051}
    assert len(train.PAPER) == 24 and len(differ) == 2, differ


# ---------------------------------------------------------------------------------------------------------- the commands

@pytest.fixture(scope="module")
def runs(cohort, tmp_path_factory):
    """A folder with a finished pretraining run and a finished fine-tuning run on it."""
    folder = tmp_path_factory.mktemp("runs")
    run("train.py", "pretrain", "--mask", 0.5, "--data", cohort, "--holdout", 0.2, *QUICK_PRETRAIN, cwd=folder)
    run("train.py", "finetune", "--task", "skin_braf", "--data", cohort, *QUICK_FINETUNE, cwd=folder)
    return folder


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_pretrain_leaves_a_whole_run(runs, cohort):
    folder = runs / "runs" / "mem-0.50"
    result = json.loads((folder / "result.json").read_text())
    assert result["steps"] == 12 and set(result["held_out"]) == {"model", "mean", "parent", "children", "neighbours"}
    assert result["held_out"]["parent"][0] is None and result["held_out"]["children"][2] is None
    encoder = mixmag.load_encoder(folder / "encoder")
    state = torch.load(folder / "last.pt", weights_only=True)
    assert all(torch.equal(v, state["model"][f"encoder.{k}"]) for k, v in encoder.state_dict().items())
    assert (folder / "curve.png").stat().st_size > 5000 and "mixing encoder" in (folder / "SUMMARY.md").read_text()
    with open(folder / "slides.csv", newline="") as f:
        roles = {row["slide_id"]: row["role"] for row in csv.DictReader(f)}
    assert not set(roles) & data.evaluation_slides(cohort) and set(roles.values()) == {"train", "held-out"}
    assert [line["step"] for line in lines(folder / "metrics.jsonl")] == [10, 12]


def test_finetune_result_is_what_scikit_learn_says(runs):
    folder = next((runs / "runs").glob("skin_braf-*"))
    result = json.loads((folder / "result.json").read_text())
    with open(folder / "predictions.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    for split, key in (("test", "auroc"), ("tune", "tune_auroc")):
        mine = [r for r in rows if r["split"] == split]
        assert len({r["case_id"] for r in mine}) == len(mine) == result["cases"][split][0]
        assert roc_auc_score([int(r["label"]) for r in mine], [float(r["score"]) for r in mine]) == pytest.approx(result[key], abs=1e-12)
    tuned = [line["tune_auroc"] for line in lines(folder / "metrics.jsonl")]
    assert result["best_epoch"] == int(np.argmax(tuned)) and result["interval"][0] <= result["auroc"] <= result["interval"][1]


def test_predict_gives_the_same_scores_and_looks_at_no_label(runs, cohort, tmp_path):
    folder = next((runs / "runs").glob("skin_braf-*"))
    run("train.py", "predict", "--run", folder, "--data", cohort, "--out", tmp_path / "p.csv", cwd=runs)
    with open(tmp_path / "p.csv", newline="") as f:
        scores = {row["slide_id"]: float(row["score"]) for row in csv.DictReader(f)}
    cases = {c.case_id: c for c in data.read_task(cohort, "skin_braf")}
    rule = train.CASE_SCORES[json.loads((folder / "result.json").read_text())["case_score"]]
    with open(folder / "predictions.csv", newline="") as f:
        for row in csv.DictReader(f):
            assert float(row["score"]) == pytest.approx(rule([scores[i] for i in cases[row["case_id"]].slide_ids]), abs=1e-5)


def test_test_labels_decide_nothing(cohort, tmp_path):
    """The same run with the test labels turned round: identical weights, epochs and scores."""
    other = tmp_path / "turned"
    (other / "tasks").mkdir(parents=True)
    os.symlink(cohort / "slides", other / "slides")
    with open(cohort / "tasks" / "skin_braf.csv", newline="") as f:
        rows = [(r["case_id"], r["slide_id"], 1 - int(r["label"]) if r["split"] == "test" else r["label"], r["split"]) for r in csv.DictReader(f)]
    data.write_csv(other / "tasks" / "skin_braf.csv", ("case_id", "slide_id", "label", "split"), rows)
    scores = []
    for place in (cohort, other):
        run("train.py", "finetune", "--task", "skin_braf", "--init", "random", "--data", place, "--out", tmp_path / place.name, *QUICK_FINETUNE, cwd=tmp_path)
        with open(tmp_path / place.name / "predictions.csv", newline="") as f:
            scores.append([(r["case_id"], r["score"]) for r in csv.DictReader(f)])
    assert scores[0] == scores[1]


@pytest.mark.parametrize("flags", [("--init", "none", "--magnification", 5), ("--init", "none"), ("--init", "random", "--magnification", 20, "--tokens", "cls"), ("--tokens", "cls")])
def test_every_kind_of_row_trains(runs, cohort, flags):
    out, _ = run("train.py", "finetune", "--task", "breast_cdh1", "--data", cohort, *flags, "--epochs", 1, "--batch-size", 16, cwd=runs)
    assert "breast_cdh1: test AUROC 0." in out


def test_cmem_trains(runs, cohort):
    run("train.py", "pretrain", "--source", 5, "--data", cohort, "--steps", 10, "--batch-size", 4, cwd=runs)
    line = lines(runs / "runs" / "cmem-5-0.50" / "metrics.jsonl")[-1]
    assert line["loss"] == pytest.approx(line["mem"] + line["contrastive"], abs=1e-4)


def equal_runs(a, b, *names):
    for name in names:
        if name.endswith(".pt"):
            x, y = (torch.load(p / name, weights_only=True) for p in (a, b))
            flat = [[*s["model"].values(), *(v for q in s["optimizer"]["state"].values() for v in q.values())] for s in (x, y)]
            assert all(torch.equal(u, v) for u, v in zip(*flat)) and x["done"] == y["done"], name
        else:
            assert (a / name).read_bytes() == (b / name).read_bytes(), name


def start_and_kill(args, cwd, when, signum):
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *map(str, args)], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while not when() and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signum)
    out, err = process.communicate(timeout=120)
    return process.returncode, err


def test_killed_pretraining_ends_bit_for_bit_the_same(cohort, tmp_path):
    """kill -9 twice, SIGTERM once, go on with other workers: the end equals that of the run nobody touched."""
    flags = ["pretrain", "--data", cohort, "--steps", 60, "--batch-size", 4, "--save-every", 5, "--holdout", 0]
    run("train.py", *flags, "--out", "whole", cwd=tmp_path)
    broken = tmp_path / "broken"

    def saved(n):
        return lambda: (broken / "metrics.jsonl").exists() and len((broken / "metrics.jsonl").read_text().splitlines()) >= n

    for n, signum, code in ((1, signal.SIGKILL, -9), (3, signal.SIGKILL, -9), (4, signal.SIGTERM, 75)):
        found, err = start_and_kill([*flags, "--out", "broken"], tmp_path, saved(n), signum)
        assert found == code, err
        assert not (broken / "result.json").exists()
    _, err = run("train.py", *flags, "--out", "broken", "--workers", 2, cwd=tmp_path)
    assert "going on from" in err
    equal_runs(tmp_path / "whole", broken, "last.pt", "metrics.jsonl", "encoder/model.safetensors")


def test_killed_finetuning_ends_bit_for_bit_the_same(cohort, tmp_path):
    flags = ["finetune", "--task", "skin_braf", "--init", "random", "--data", cohort, "--epochs", 5, "--batch-size", 8, "--magnification", 10]
    run("train.py", *flags, "--out", "whole", cwd=tmp_path)
    broken = tmp_path / "broken"
    found, err = start_and_kill([*flags, "--out", "broken"], tmp_path, lambda: (broken / "last.pt").exists(), signal.SIGKILL)
    assert found == -9, err
    _, err = run("train.py", *flags, "--out", "broken", cwd=tmp_path)
    assert "going on from" in err
    equal_runs(tmp_path / "whole", broken, "last.pt", "metrics.jsonl", "model.safetensors", "predictions.csv", "result.json")


def test_a_damaged_checkpoint_falls_back_and_runs_nothing(cohort, tmp_path):
    flags = ["pretrain", "--data", cohort, "--batch-size", 4, "--save-every", 4, "--holdout", 0, "--out", "r"]
    run("train.py", *flags, "--steps", 12, cwd=tmp_path)
    before = (tmp_path / "r" / "encoder" / "model.safetensors").read_bytes()

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'evil'}",)

    torch.save({"model": Evil()}, tmp_path / "r" / "last.pt")
    (tmp_path / "r" / "result.json").unlink()
    _, err = run("train.py", *flags, "--steps", 12, cwd=tmp_path)
    assert "not a whole checkpoint" in err and "prev.pt, 8 done" in err and not (tmp_path / "evil").exists()
    assert (tmp_path / "r" / "encoder" / "model.safetensors").read_bytes() == before


def test_other_settings_are_refused_and_named(runs, cohort):
    _, err = run("train.py", "pretrain", "--data", cohort, *QUICK_PRETRAIN, "--out", "runs/mem-0.50", "--lr", 0.5, cwd=runs, code=1)
    assert "lr None there, 0.5 now" in err and "--resume off" in err
    _, err = run("train.py", "pretrain", "--mask", 0.5, "--data", cohort, "--holdout", 0.2, *QUICK_PRETRAIN, cwd=runs)
    assert "done before" in err


def test_faults_end_in_one_clear_line(runs, cohort, tmp_path):
    def error(*args, code=1, cwd=runs):
        _, err = run("train.py", *args, cwd=cwd, code=code)
        return err

    assert "no finished pretraining run" in error("finetune", "--task", "skin_braf", "--data", cohort, cwd=tmp_path)
    assert "no such task; found breast_cdh1, skin_braf" in error("finetune", "--task", "nothing", "--data", cohort)
    assert "cls with an encoder" in error("finetune", "--task", "skin_braf", "--data", cohort, "--init", "none", "--tokens", "cls", "--out", "x1")
    assert "40 is not among" in error("finetune", "--task", "skin_braf", "--data", cohort, "--init", "random", "--magnification", 40, "--out", "x2")
    error("finetune", "--task", "skin_braf", "--magnification", "20x", code=2)
    assert "no slides folder" in error("pretrain", "--data", tmp_path)
    assert "no exported encoder" in error("embed", "--init", tmp_path, "--data", cohort, "--out", "x3")
    assert "--region 4" in error("pretrain", "--data", cohort, "--region", 5, "--out", "x4", "--holdout", 0)
    assert "some must stay" in error("pretrain", "--data", cohort, "--mask", 1.0, "--out", "x5")
    error("finetune", code=2)
    leaky = tmp_path / "leaky"
    leaky.mkdir()
    os.symlink(cohort / "slides", leaky / "slides")
    os.symlink(cohort / "tasks", leaky / "tasks")
    data.write_csv(leaky / "pretrain.csv", ("slide_id",), [(p.stem,) for p in (cohort / "slides").iterdir()])
    run("train.py", "pretrain", "--data", leaky, "--steps", 2, "--batch-size", 2, "--out", "saw-it-all", cwd=tmp_path)
    for init in (tmp_path / "saw-it-all", tmp_path / "saw-it-all" / "encoder"):
        assert "tune or test slides" in error("finetune", "--task", "skin_braf", "--data", cohort, "--init", init)


def test_one_class_in_the_test_split_is_said(cohort, tmp_path):
    other = tmp_path / "one"
    (other / "tasks").mkdir(parents=True)
    os.symlink(cohort / "slides", other / "slides")
    with open(cohort / "tasks" / "skin_braf.csv", newline="") as f:
        rows = [(r["case_id"], r["slide_id"], r["label"], r["split"]) for r in csv.DictReader(f) if r["split"] != "test" or r["label"] == "0"]
    data.write_csv(other / "tasks" / "skin_braf.csv", ("case_id", "slide_id", "label", "split"), rows)
    out, _ = run("train.py", "finetune", "--task", "skin_braf", "--init", "none", "--data", other, "--epochs", 1, cwd=tmp_path)
    assert "no AUROC" in out and json.loads(next(tmp_path.glob("runs/*/result.json")).read_text())["auroc"] is None
    out, _ = run("train.py", "table", "--data", other, "--rows", "abmil-20", "--epochs", 1, cwd=tmp_path)
    assert "n/a" in out and "0 of 1" in out


def test_embed_writes_what_trident_readers_want(runs, cohort, tmp_path):
    slide = data.read_slides(cohort)[0]
    run("train.py", "embed", "--init", "runs/mem-0.50", "--tokens", "patch", "--data", cohort, "--slides", slide.slide_id, "--out", tmp_path, cwd=runs)
    run("train.py", "embed", "--init", "runs/mem-0.50", "--tokens", "cls", "--data", cohort, "--slides", slide.slide_id, "--out", tmp_path, cwd=runs)
    encoder, geometry = mixmag.load_encoder(runs / "runs/mem-0.50/encoder"), mixmag.Geometry(3)
    rows, corners = data.windows(slide.cells, 3, 3, 0.5)
    with torch.no_grad():
        cls, tokens = encoder(torch.from_numpy(data.gather(slide, rows, geometry.cell_order().numpy())[0]))
    for k, m in enumerate((5, 10, 20)):
        with h5py.File(tmp_path / f"{m}x_224px_0px_overlap" / "features_mixmag_patch" / f"{slide.slide_id}.h5") as f:
            features, coords, side = f["features"][:], f["coords"][:], f["coords"].attrs["patch_size_level0"]
        assert side == 896 / 2 ** k and len(features) == len(coords) == len(slide.cells) * 4 ** k and (coords % side == 0).all()
        assert {tuple(c) for c in coords // 896} == {tuple(c) for c in slide.cells.tolist()}
        at = {tuple(c): f for c, f in zip(coords.tolist(), features)}
        for i, (level, r, c) in enumerate(geometry.token_table().tolist()):
            if level == k:
                place = tuple(int(v) for v in corners[1] * 896 + np.array([c, r]) * side)
                assert np.allclose(at[place], tokens[1, i], atol=1e-4)
    with h5py.File(tmp_path / "5x_672px_0px_overlap" / "features_mixmag_cls" / f"{slide.slide_id}.h5") as f:
        assert np.allclose(f["features"][:], cls.flatten(1), atol=1e-4) and f["coords"].attrs["patch_size_level0"] == 3 * 896
        assert f["coords"][:].tolist() == (corners * 896).tolist()


def test_table_runs_skips_and_prints(runs, cohort):
    args = ("table", "--data", cohort, "--rows", "abmil-20", "random-all-cls", "mem-0.25-patch", "--steps", 4, "--epochs", 1, "--seeds", 2)
    out, _ = run("train.py", *args, cwd=runs)
    assert "## Table 1" in out and "## Table 2" in out and "| MEM 0.25 |" in out and "2 of 2" in out and "mean over 2 seeds" in out
    paper = np.mean([train.PAPER["abmil-20"][i] for i in (0, 6)])
    assert f"| {paper:.1f} |" in out and (runs / "runs/table/SUMMARY.md").exists()
    again, err = run("train.py", *args, cwd=runs)
    assert out.endswith(again) and err.count("done before") >= 12


def test_doctor_names_what_is_installed(tmp_path):
    out, _ = run("train.py", "doctor", cwd=tmp_path)
    assert torch.__version__.split("+")[0] in out and "free disk" in out


def torchrun(ranks, *args, cwd, code=0):
    """The command under torchrun with gloo, one thread a process."""
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), str(ROOT / "train.py"), *map(str, args)],
                          cwd=cwd, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert (done.returncode == 0) == (code == 0), done.stdout + done.stderr
    return done.stdout, done.stderr


def untrained(flags, cohort, tmp_path) -> dict:
    """The weights that those commands start from: a run of one step at no rate."""
    once = ("--epochs", 1) if flags[0] == "finetune" else ("--steps", 1)
    run("train.py", *flags, *once, "--data", cohort, "--out", "0", "--lr", 1e-30, cwd=tmp_path)
    return torch.load(tmp_path / "0" / "last.pt", weights_only=True)["model"]


@pytest.mark.parametrize("flags, ranks", [(("pretrain", "--batch-size", 8, "--steps", 6, "--holdout", 0.2), (2, 4)),
                                          (("pretrain", "--source", 5, "--batch-size", 8, "--steps", 6, "--holdout", 0.2), (2, 4)),
                                          (("finetune", "--task", "skin_braf", "--init", "random", "--magnification", 10, "--dropout", 0, "--epochs", 2, "--batch-size", 10), (2,))])
def test_many_processes_give_what_one_gives(cohort, tmp_path, flags, ranks):
    """The same parameters after several steps at the same global batch; one of the batches of finetune does not divide."""
    run("train.py", *flags, "--data", cohort, "--out", "1", cwd=tmp_path)
    one = torch.load(tmp_path / "1" / "last.pt", weights_only=True)
    for n in ranks:
        torchrun(n, *flags, "--data", cohort, "--out", n, cwd=tmp_path)
        several = torch.load(tmp_path / str(n) / "last.pt", weights_only=True)
        a, b, start = (torch.cat([v.flatten() for k, v in m.items() if "standardize" not in k]) for m in (one["model"], several["model"], untrained(flags, cohort, tmp_path)))
        assert (a - b).norm() < 1e-2 * (a - start).norm()          # AdamW divides by sqrt(v), which blows up rounding where gradients are small
        first, other = lines(tmp_path / "1" / "metrics.jsonl"), lines(tmp_path / str(n) / "metrics.jsonl")
        assert [set(line) for line in first] == [set(line) for line in other] and all(other[-1][k] == pytest.approx(first[-1][k], rel=2e-3) for k in ("loss", "norm"))
    if flags[0] == "finetune":
        scores = [[(r["case_id"], float(r["score"])) for r in data.read_csv(tmp_path / n / "predictions.csv", ("case_id", "score"))] for n in ("1", "2")]
        assert [c for c, _ in scores[0]] == [c for c, _ in scores[1]] and np.allclose([s for _, s in scores[0]], [s for _, s in scores[1]], atol=1e-4)


def test_real_slides_go_all_the_way(real, tmp_path):
    """Tile, pretrain, embed; where there is nothing to do, that is said."""
    run("data.py", "tile", "--slides", real / "slides" / "TCGA-CR-7395-01A-01-TS1.svs", "--mpp", 0.5, "--out", "d", cwd=tmp_path)
    run("data.py", "tile", "--slides", real / "slides" / "CMU-1-Small-Region.svs", real / "slides" / "luna-1065626.svs", "--out", "d", cwd=tmp_path)
    _, err = run("train.py", "pretrain", "--data", "d", *QUICK_PRETRAIN, cwd=tmp_path)
    assert "3 slides with 2 windows" in err
    out, _ = run("train.py", "embed", "--init", "runs/mem-0.50", "--tokens", "cls", "--data", "d", "--out", "e", cwd=tmp_path)
    assert "2 regions" in out and "luna-1065626" in out
