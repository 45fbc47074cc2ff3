"""Schedule, steps, runs and commands of training.     python -m pytest tests/test_train.py"""

import dataclasses
import json
import math
import os
import re
import shutil
import socket
import types
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from conftest import Command, run
from sklearn.metrics import roc_auc_score
from test_data import FOLDS, make_slide, task

import data
import mixmag
import train
from data import MixmagError

COLUMNS = ("case_id", "slide_id", "label", "split")
QUICK_PRETRAIN = ("--steps", 12, "--batch-size", 4, "--save-every", 4)
QUICK_FINETUNE = ("--epochs", 3, "--frozen-epochs", 2, "--batch-size", 8)
CPU = torch.device("cpu")


# -------------------------------------------------------------------------------------- the parts
def test_rate_equals_torchs_schedulers():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 5, total_iters=4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=15)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, cosine], milestones=[5])
    for step in range(20):
        assert train.lr_at(step, 20, 5) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        scheduler.step()
    assert train.lr_at(0, 1, 0) == 1


def group_of_each(model, layer_decay=0.75):
    """parameter id -> its group. Fails where a parameter is in no group or in several."""
    groups = train.parameter_groups(model, 0.05, layer_decay)
    found = {}
    for group in groups:
        for parameter in group["params"]:
            assert id(parameter) not in found
            found[id(parameter)] = group
    assert found.keys() == {id(parameter) for parameter in model.parameters()}
    return found


def test_norms_biases_tokens_and_positions_do_not_decay():
    config = mixmag.Config.small(16)
    classifier = mixmag.SlideClassifier(config, mixmag.MixingEncoder(config))
    for model in (mixmag.ContrastiveEmbeddingModel(config), classifier):
        group_of = group_of_each(model)
        for name, parameter in model.named_parameters():
            plain = name.endswith(("bias", ".cls", ".pos", "mask_token")) or "norm" in name
            assert group_of[id(parameter)]["weight_decay"] == (0 if plain else 0.05), name


def test_layer_decay_follows_the_depth():
    config = mixmag.Config.small(16)
    model = mixmag.SlideClassifier(config, mixmag.MixingEncoder(config))
    group_of = group_of_each(model)
    encoder = model.encoder
    blocks = [group_of[id(block.attn.qkv.weight)]["lr_scale"] for block in encoder.blocks]
    assert blocks == pytest.approx([0.75**4, 0.75**3, 0.75**2, 0.75])
    for first in (encoder.pos, encoder.cls, encoder.input.weight):
        assert group_of[id(first)]["lr_scale"] == pytest.approx(0.75**5)
    for last in (encoder.norm.weight, model.head.weight, model.pool.w.weight):
        assert group_of[id(last)]["lr_scale"] == 1


@pytest.mark.parametrize("name", ["encoder.surprise", "encoder.blockss.0.x", "teacher.weight"])
def test_unknown_names_raise(name):
    with pytest.raises(ValueError, match="belongs to no layer"):
        train.layer_of(name, 4)


def machine_of(dtype=None, scale=2.0**10, rank=0, world=1):
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=dtype == torch.float16)
    return train.Machine(CPU, dtype, rank, world, scaler)


def some_regions(views=1, B=6):
    generator = torch.Generator().manual_seed(1)
    shape = (B,) if views == 1 else (2, B)
    x = torch.randn(*shape, 84, 8, generator=generator)
    removed = mixmag.random_removal(views * B, 84, 0.5, generator).view(*shape, -1)
    return {"x": x, "removed": removed, "valid": None}


def cut(batch, size):
    """The batch in parts of at most `size` regions."""
    axis = batch["removed"].ndim - 2
    parts = zip(batch["x"].split(size, axis), batch["removed"].split(size, axis), strict=True)
    return [{"x": x, "removed": removed, "valid": None} for x, removed in parts]


def small_model(kind=mixmag.MaskedEmbeddingModel):
    torch.manual_seed(0)
    return kind(mixmag.Config.small(8, region=2, depth=2))


@pytest.mark.parametrize("views", [1, 2])
def test_gradients_of_parts_add_up_to_those_of_the_batch(views):
    """For CMEM too: its negatives are the whole batch, however it is cut."""
    kind = mixmag.MaskedEmbeddingModel if views == 1 else mixmag.ContrastiveEmbeddingModel
    step = train.mem_step if views == 1 else train.cmem_step
    model = small_model(kind)
    expected = None
    for size in (6, 4, 1):
        model.zero_grad()
        sums = step(model, iter(cut(some_regions(views), size)), 6, machine_of())
        found = [parameter.grad.clone() for parameter in model.parameters()] + list(sums.values())
        expected = expected or found
        for a, b in zip(expected, found, strict=True):
            assert torch.allclose(a, b, atol=1e-5)
    if views == 2:
        assert torch.allclose(sums["loss"], sums["mem"] + sums["contrastive"], atol=1e-5)
        assert sums["contrastive"] > 1


def test_the_model_can_be_captured_for_compilation():
    """As --compile does, but run by torch itself: generating code takes minutes on a CPU."""
    gradients = []
    for compiled in (False, True):
        model = small_model()
        if compiled:
            model.compile(dynamic=False, backend="aot_eager")
        train.mem_step(model, [some_regions()], 6, machine_of())
        gradients.append([parameter.grad for parameter in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_agrees_with_full_precision(dtype):
    model = small_model()
    full = train.mem_step(model, [some_regions()], 6, machine_of())["loss"]
    half = train.mem_step(model, [some_regions()], 6, machine_of(dtype))["loss"]
    assert half.item() == pytest.approx(full.item(), rel=0.02)


def test_a_scaled_step_equals_the_plain_one_and_skips_infinities():
    models = []
    for dtype in (None, torch.float16):
        model = small_model()
        optimizer = torch.optim.AdamW(train.parameter_groups(model, 0.05))
        machine = machine_of(dtype)
        scaler = machine.scaler
        batch = some_regions()
        scaler.scale(model(batch["x"], batch["removed"]).loss).backward()
        train.optimizer_step(model, optimizer, machine, 1e-3, 0.1)
        models.append(model)
    plain, scaled = models
    for a, b in zip(plain.parameters(), scaled.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    before = [parameter.clone() for parameter in scaled.parameters()]
    scaler.scale(scaled(batch["x"], batch["removed"]).loss).backward()
    next(scaled.parameters()).grad.view(-1)[0] = math.inf
    norm = train.optimizer_step(scaled, optimizer, machine, 1e-3, 0.1)
    assert not norm.isfinite()
    assert scaler.get_scale() == 512.0
    for a, b in zip(before, scaled.parameters(), strict=True):
        assert torch.equal(a, b)


def test_precision_is_chosen_by_width_on_a_cpu():
    native = torch.cpu._is_avx512_bf16_supported()
    assert train.amp_dtype("auto", CPU, 96) is None
    assert train.amp_dtype("off", CPU, 4096) is None
    assert train.amp_dtype("fp16", CPU, 96) == torch.float16
    assert train.amp_dtype("auto", CPU, 768) == (torch.bfloat16 if native else None)


def slides_by_id(folder):
    return {slide.slide_id: slide for slide in data.read_slides(folder)}


def case_dataset(cohort, cases, model):
    geometry = model.config.geometry()
    return data.CaseDataset(slides_by_id(cohort), cases, geometry, model.index)


def test_a_process_without_a_case_takes_its_step_too(cohort, monkeypatch):
    """The second of two processes, with a single case: its scaler has seen no loss under fp16."""
    monkeypatch.setattr(train.Machine, "sum", lambda self, values: values)
    model = mixmag.SlideClassifier(mixmag.Config.small(64), None, hidden=8)
    dataset = case_dataset(cohort, data.read_task(cohort, "skin_braf")[:1], model)
    optimizer = torch.optim.AdamW(train.parameter_groups(model, 0.0))
    config = train.FinetuneConfig(task="skin_braf", batch_size=4, epochs=1, workers=0, lr=1e-3)
    a_run = types.SimpleNamespace(machine=machine_of(torch.float16, rank=1, world=2), folder="run")
    bar = train.progress(total=1)
    assert train.finetune_epoch(config, model, optimizer, dataset, 0, a_run, bar) == (0.0, 0.0)
    assert len(optimizer.state) == len(list(model.parameters()))
    assert all(state["step"] == 1 for state in optimizer.state.values())


@pytest.mark.parametrize("tokens", ["patch", "cls"])
def test_cached_outputs_give_the_encoders_logits(cohort, tokens):
    """Also where tokens are invalid."""
    torch.manual_seed(0)
    config = mixmag.Config.small(64)
    model = mixmag.SlideClassifier(config, mixmag.MixingEncoder(config), tokens, hidden=8).eval()
    dataset = case_dataset(cohort, data.read_task(cohort, "skin_braf")[:6], model)
    slide = dataset.slides[dataset.cases[0].slide_ids[0]]
    slide.valid = np.random.default_rng(0).random(slide.valid.shape) > 0.3
    batch = dataset.batch(range(6))
    frozen = types.SimpleNamespace(frozen_epochs=2)
    train.freeze_encoder(frozen, model, {"train": dataset, "tune": dataset}, True, machine_of())
    cached = dataset.batch(range(6))
    assert cached["cached"]
    assert not batch["cached"]
    expected = train.slide_logits(model, batch)
    assert torch.allclose(train.slide_logits(model, cached), expected, atol=1e-5)
    train.freeze_encoder(frozen, model, {"train": dataset, "tune": dataset}, False, machine_of())
    assert not dataset.batch(range(6))["cached"]  # now the encoder learns


def test_the_case_score_is_chosen_by_the_tune_split():
    slides = [np.array(scores) for scores in ([0.9, 0.1], [0.8, 0.2], [0.6, 0.6], [0.7, 0.5])]
    labels = [1, 1, 0, 0]
    cases = [data.Case(str(i), label, "tune", []) for i, label in enumerate(labels)]
    tune = types.SimpleNamespace(labels=labels, cases=cases)
    assert train.choose_case_score(tune, slides, "auto") == ("max", 1.0)
    assert train.choose_case_score(tune, slides, "mean") == ("mean", 0.0)
    slides[0][0] = math.nan
    with pytest.raises(MixmagError, match="case 0"):
        train.choose_case_score(tune, slides, "auto")


def test_abmil_standardises_each_magnification_by_itself(cohort):
    """What all tiles of a magnification share is no news to AB-MIL."""
    cases = [case for case in data.read_task(cohort, "skin_braf") if case.split == "train"]
    for magnification in (10, "all"):
        config = train.FinetuneConfig(task="x", init="none", magnification=magnification)
        config = train.apply_preset(train.adopt_encoder_settings(config))
        some = slides_by_id(cohort)
        model = train.make_classifier(config, some, cases, machine_of(), data.BINARY)
        dataset = case_dataset(cohort, cases, model)
        x = model.encode(dataset.batch(range(len(dataset)))["x"])  # (W, n, D)
        level = model.config.geometry().level()[model.index]
        for k in level.unique():
            assert x[:, level == k].mean((0, 1)).abs().max() < 1e-3
            assert (x[:, level == k].std((0, 1)) - 1).abs().max() < 1e-2


# ----------------------------------------------------------------------------------- the commands
@pytest.fixture(scope="module")
def runs(cohort, tmp_path_factory):
    """A folder with a finished pretraining run and a finished fine-tuning run on it."""
    folder = tmp_path_factory.mktemp("runs")
    flags = ("--data", cohort, "--holdout", 0.2, *QUICK_PRETRAIN)
    run("train.py pretrain --mask 0.5", *flags, cwd=folder)
    flags = ("--data", cohort, *QUICK_FINETUNE)
    out, _ = run("train.py finetune --task skin_braf", *flags, cwd=folder)
    assert "skin_braf: test AUROC 0." in out
    return folder


@pytest.fixture
def copy_of(cohort, tmp_path):
    """A function that makes a DATA folder of the cohort's slides with other tables."""

    def make(name, splits=("split",), **tables):
        folder = tmp_path / name
        folder.mkdir()
        os.symlink(cohort / "slides", folder / "slides")
        for table, rows in tables.items():
            task(folder, rows, table, splits)
        return folder

    return make


def table_rows(path, columns=COLUMNS):
    return [tuple(row[c] for c in columns) for row in data.read_csv(path, columns)]


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_flops_are_those_of_the_formulas():
    """Forward and twice that backward; torch's count has the last block's unused queries too."""
    config = mixmag.Config.paper()
    M = 94
    n = 189 - M + config.cls_tokens
    d = config.width
    e = config.decoder_width

    def block(width, tokens, wanted):
        hidden = mixmag.swiglu_width(width)
        attention = 2 * tokens * 2 * width**2 + 2 * wanted * (2 * width**2 + 2 * tokens * width)
        return attention + 2 * wanted * 3 * width * hidden

    forward = config.depth * block(d, n, n) + block(e, n + M, n + M) + block(e, n + M, M)
    forward += 2 * n * d * e + 2 * M * e * config.dim
    expected = 3 * forward + 2 * 2 * 95 * config.dim * d  # its inputs need no gradient
    assert train.region_flops(config, M) == pytest.approx(expected, rel=0.015)


def test_micro_batch_is_what_a_gpu_holds(monkeypatch):
    """An H200 held 84.9 GB in a step of 2,048 regions, 3.2 of them weights and the batch itself."""
    config = mixmag.Config.paper()
    assert 2048 * train.region_bytes(config, 94, size=2) == pytest.approx(81.7e9, rel=0.03)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80e9, 80e9))
    model = mixmag.MaskedEmbeddingModel(mixmag.Config.small(1280))
    model.config = config
    dataset = types.SimpleNamespace(removed_tokens=94, views=1)
    machine = types.SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    auto = train.PretrainConfig()
    assert train.micro_batch_size(auto, model, dataset, machine) == 1600
    dataset.views = 2
    assert train.micro_batch_size(auto, model, dataset, machine) == 768
    assert train.micro_batch_size(train.PretrainConfig(micro_batch=7), model, dataset, machine) == 7
    assert train.micro_batch_size(auto, model, dataset, train.start_machine("cpu")) == 64


def test_yardsticks_equal_the_loop(cohort):
    slides = data.read_slides(cohort)[:8]
    geometry = mixmag.Geometry(2)
    dataset = data.RegionDataset(slides, geometry, 0, 0.5)
    _, _, mean = data.feature_statistics(slides)
    found = train.Yardsticks(dataset, mean, windows=48, directions=5)
    table = geometry.token_table().tolist()
    level = geometry.level()
    x, removed = dataset.batch(range(3))["x"], dataset.batch(range(3))["removed"]
    valid = torch.rand(3, 84) > 0.2
    predictions = found.predict(x, removed, valid)
    y = torch.nn.functional.normalize(x.float(), dim=-1) - mean[level]  # (3, N, D)
    for b in range(3):
        visible = [i for i in range(84) if i not in removed[b].tolist() and valid[b, i]]
        for j, i in enumerate(removed[b].tolist()):
            k, row, col = table[i]
            groups = {"parent": [], "children": [], "neighbours": [], "same": [], "shift": visible}
            for v in visible:
                its_level, r, c = table[v]
                if [its_level, r, c] == [k - 1, row // 2, col // 2]:
                    groups["parent"].append(v)
                if [its_level, r // 2, c // 2] == [k + 1, row, col]:
                    groups["children"].append(v)
                if its_level == k and max(abs(r - row), abs(c - col)) == 1:
                    groups["neighbours"].append(v)
                if its_level == k:
                    groups["same"].append(v)
            means = {name: y[b, at].sum(0) / max(len(at), 1) for name, at in groups.items()}
            parts = zip(found.weights[k], means.values(), strict=True)
            mixture = sum(w * part for w, part in parts)
            inner = found.covariance[:, visible][:, :, visible]
            across = found.covariance[:, i][:, visible]  # (P, n)
            kriged = torch.linalg.solve(inner, (y[b, visible] @ found.basis).T)
            kriged = (across * kriged).sum(1) @ found.basis.T
            kriging = mixture - mixture @ found.basis @ found.basis.T + kriged
            expected = {**means, "mean": torch.zeros(64), "mixture": mixture, "kriging": kriging}
            for name, pred in predictions.items():
                assert torch.allclose(pred[b, j], mean[k] + expected[name], atol=1e-4), name


def test_mixture_is_the_best_of_its_kind(cohort):
    slides = data.read_slides(cohort)[:8]
    dataset = data.RegionDataset(slides, mixmag.Geometry(2), 0, 0.5)
    _, _, mean = data.feature_statistics(slides)
    found = train.Yardsticks(dataset, mean, windows=48, directions=5)
    batch = dataset.batch(range(48))
    y, visible = found.deviations(batch["x"], batch["removed"], batch["valid"])
    means = found.relative_means(y, visible, batch["removed"])
    target = mixmag.take(y, batch["removed"])
    for k in range(3):
        of_level = found.level[batch["removed"]] == k
        a = means[:, of_level].flatten(1).T.numpy()
        best, *_ = np.linalg.lstsq(a, target[of_level].flatten().numpy(), rcond=1e-3)
        assert np.allclose(a @ found.weights[k].numpy(), a @ best, atol=2e-3)


def test_verdict_names_what_is_better():
    run = types.SimpleNamespace(curve=lambda name: ([10, 20], [0.2, 0.3]))
    losses = {"mean": [0.5, 0.6], "mixture": [0.4, 0.3], "model": [0.3, 0.35]}
    assert train.verdict(run, losses, (5, 10)) == (
        "At 5x the model beats all others. "
        "At 10x the model does not beat mixture. "
        "It overfits: at step 10 its loss was 0.200."
    )


def test_a_run_begun_anew_is_never_a_mixture(tmp_path, runs):
    """Nothing says any more that the old run is done, and no checkpoint of it is left."""
    folder = shutil.copytree(next((runs / "runs").glob("skin_braf-*")), tmp_path / "f")
    shutil.copytree(runs / "runs/mem-0.50/encoder", folder / "encoder")
    for name in ("heatmap/S1/attention.csv", "predict.csv"):
        data.write_text(folder / name, "")
    train.Run(train.PretrainConfig(out=str(folder), resume="off"), {"lr": 1}, machine_of())
    assert json.loads((folder / "config.json").read_text()) == {"lr": 1}
    assert not list(folder.glob("*.pt"))
    assert not (folder / "heatmap").exists() and not (folder / "predict.csv").exists()
    with pytest.raises(MixmagError, match="not a finished fine-tuning run .*result.json"):
        train.read_classifier(folder)
    with pytest.raises(MixmagError, match="no exported encoder"):
        train.encoder_folder(folder)


def test_pretrain_leaves_a_whole_run(runs, cohort):
    folder = runs / "runs/mem-0.50"
    result = json.loads((folder / "result.json").read_text())
    assert result["steps"] == 12
    names = "mean shift parent children neighbours mixture kriging model least"
    assert set(result["held_out"]) == set(names.split())
    summary = (folder / "SUMMARY.md").read_text()
    assert all(f"\n| {name} |" in summary for name in result["held_out"])
    assert "Measured on" in summary
    encoder = mixmag.load_encoder(folder / "encoder")
    state = torch.load(folder / "last.pt", weights_only=True)["model"]
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, state[f"encoder.{name}"])
    assert (folder / "curve.png").stat().st_size > 5000
    roles = dict(table_rows(folder / "encoder/slides.csv", ("slide_id", "role")))
    evaluation = data.evaluation_slides(data.read_tasks(cohort))
    assert not set(roles) & set().union(*evaluation.values())
    assert set(roles.values()) == {"train", "held-out"}
    metrics = lines(folder / "metrics.jsonl")
    assert [line["step"] for line in metrics if "loss" in line] == [10, 12]
    assert [line["step"] for line in metrics if "held_out" in line] == [4, 8, 12]
    assert metrics[-1]["held_out"] == pytest.approx(np.mean(result["held_out"]["model"]))


def check_scores(folder, cases, columns=("score",)):
    """Of a fine-tuning run: its AUROCs are scikit-learn's, and `predict` gives the same scores."""
    result = json.loads((folder / "result.json").read_text())
    assert train.predict(folder) == 0
    predicted = table_rows(folder / "predict.csv", ("slide_id", *columns))
    of_slide = {slide_id: np.array(scores, float) for slide_id, *scores in predicted}
    rule = train.CASE_SCORES[result["case_score"]]
    rows = table_rows(folder / "predictions.csv", ("case_id", "label", "split", *columns))
    for split, name in (("test", "auroc"), ("tune", "tune_auroc")):
        of_split = [case for case in cases if case.split == split]
        mine = [row for row in rows if row[2] == split]
        assert [row[0] for row in mine] == [case.case_id for case in of_split]
        scores = np.array([row[3:] for row in mine], float)
        labels = [row[1] for row in mine]
        by_sklearn = roc_auc_score(labels, np.squeeze(scores), multi_class="ovr")
        assert result[name] == pytest.approx(by_sklearn, abs=1e-12)
        for found, case in zip(scores, of_split, strict=True):
            expected = rule([of_slide[i] for i in case.slide_ids], axis=0)
            if len(columns) > 1:
                expected /= expected.sum()
            assert found == pytest.approx(expected, abs=1e-5)
    return of_slide


def test_finetune_and_predict_give_the_same_scores(runs, cohort):
    folder = next((runs / "runs").glob("skin_braf-*"))
    check_scores(folder, data.read_task(cohort, "skin_braf"))
    result = json.loads((folder / "result.json").read_text())
    tune = [line["tune_auroc"] for line in lines(folder / "metrics.jsonl")]
    assert tune[result["best_epoch"] - 1] == max(tune)
    assert result["interval"][0] <= result["auroc"] <= result["interval"][1]


def test_test_labels_decide_nothing(cohort, copy_of, tmp_path):
    """The same run with the test labels turned round has the same scores."""
    rows = []
    for case_id, slide_id, label, split in table_rows(cohort / "tasks/skin_braf.csv"):
        turned = 1 - int(label) if split == "test" else label
        rows.append((case_id, slide_id, turned, split))
    scores = []
    for folder in (cohort, copy_of("turned", skin_braf=rows)):
        out = tmp_path / f"run-{folder.name}"
        flags = ("--data", folder, "--out", out, *QUICK_FINETUNE)
        run("train.py finetune --task skin_braf --init random", *flags, cwd=tmp_path)
        scores.append(table_rows(out / "predictions.csv", ("case_id", "score")))
    assert scores[0] == scores[1]


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_damaged_checkpoint_falls_back_and_two_are_refused(cohort, tmp_path):
    """As are checkpoints without the settings that they were made with."""
    command = f"train.py pretrain --data {cohort} --batch-size 4 --save-every 4 --steps 12 --out r"
    run(command, cwd=tmp_path)
    folder = tmp_path / "r"
    before = (folder / "encoder/model.safetensors").read_bytes()
    metrics = (folder / "metrics.jsonl").read_text()
    torch.save({"model": Evil(tmp_path / "evil")}, folder / "last.pt")
    (folder / "result.json").unlink()
    _, err = run(command, cwd=tmp_path)
    assert "last.pt is damaged" in err
    assert "prev.pt, 8 done" in err
    assert not (tmp_path / "evil").exists()
    assert (folder / "encoder/model.safetensors").read_bytes() == before

    (folder / "result.json").unlink()
    for name in ("last.pt", "prev.pt"):
        (folder / name).write_bytes(b"")
    _, err = run(command, cwd=tmp_path, code=1)
    assert "no checkpoint can be read" in err
    assert "--resume off" in err
    (folder / "config.json").unlink()
    _, err = run(command, cwd=tmp_path, code=1)
    assert "config.json: cannot be read" in err
    assert (folder / "metrics.jsonl").read_text() == metrics


def test_the_same_data_elsewhere_is_the_same_run(runs, cohort, tmp_path):
    """Content decides, not the path: a job copies its data to a disk of its own."""
    folder = shutil.copytree(cohort, tmp_path / "d")
    flags = ("--holdout", 0.2, *QUICK_PRETRAIN)  # the default --out is that of `runs`
    _, err = run("train.py pretrain --data", folder, *flags, cwd=runs)
    assert "this run is finished" in err
    shutil.copytree(runs / "runs/mem-0.50", tmp_path / "p")
    flags = (*QUICK_FINETUNE, "--out", "runs/skin_braf-mem-0.50-patch-all", "--data", folder)
    command = "train.py finetune --task skin_braf --init"
    _, err = run(command, tmp_path / "p", *flags, cwd=runs)
    assert "this run is finished" in err
    _, err = run(command, "random", "--preset", "small", *flags, cwd=runs, code=1)
    assert "init 'RUN' there, 'random' now" in err
    some = next(iter((folder / "slides").iterdir()))
    slide = data.read_slide(some)
    data.write_slide(some, slide.features[::-1], slide.cells, slide.valid, slide.meta)
    table = (folder / "tasks/skin_braf.csv").read_text()
    (folder / "tasks/skin_braf.csv").write_text(table + "\n")
    _, err = run(command, tmp_path / "p", *flags, cwd=runs, code=1)
    assert "inputs_sha256" in err


def test_a_run_with_another_aggregator_is_another_run(cohort, tmp_path, monkeypatch):
    settings = {"init": "none", "epochs": 1, "preset": "small", "device": "cpu"}
    config = train.FinetuneConfig(
        data=str(cohort), task="skin_braf", out=str(tmp_path / "r"), **settings
    )
    train.finetune(config)
    monkeypatch.setattr(mixmag, "GatedABMIL", type("MyPooling", (mixmag.GatedABMIL,), {}))
    with pytest.raises(data.OtherSettings, match="pool 'GatedABMIL' there, 'MyPooling' now"):
        train.finetune(config)


def test_the_newest_exported_encoder_is_taken_and_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for time, name in enumerate(("old", "new", "going-on")):
        path = tmp_path / "runs" / name / "encoder/config.json"
        data.write_json(path, {})
        os.utime(path, (time, time))
    path.unlink()
    assert train.newest_pretraining() == "runs/new"
    assert "--init runs/new: the newest" in capsys.readouterr().err


def test_what_the_tables_leave_out_is_said(cohort, copy_of):
    """Three folds leave nothing; of the slides of a case another table may name more."""
    ids = sorted(data.slide_files(cohort))
    tables = {}
    for fold in range(3):
        splits = [("test", "tune", "train")[(i + fold) % 3] for i in range(len(ids))]
        rows = [(i, ids[i], i % 2, splits[i]) for i in range(len(ids))]
        tables[f"fold{fold}"] = rows

    def used_slides(folder):
        tasks = data.read_tasks(folder)
        return train.used_slides(folder, tasks, data.pretraining_ids(folder, tasks))

    folder = copy_of("all", **tables)
    text = used_slides(folder)
    assert f"pretraining uses 0 of {len(ids)} slides\nfold0.csv leaves out" in text
    assert f"fold2.csv leaves out {2 * len(ids) // 3}, such as {ids[1]}" in text
    with pytest.raises(MixmagError, match="(?s)no slide is left to train on.*fold2.csv leaves"):
        train.pretrain(train.PretrainConfig(data=str(folder)))
    text = used_slides(copy_of("none"))
    assert f"{len(ids)} of {len(ids)} slides; no table in tasks/: finetune will" in text
    folder = copy_of("listed", fold0=tables["fold0"])
    data.write_csv(folder / "pretrain.csv", ("slide_id",), [[ids[0]], [ids[2]]])
    text = used_slides(folder)
    assert f"2 of {len(ids)} slides\nfold0" in text
    assert "finetune will refuse fold0: it tunes or tests on 1 of these" in text


@pytest.fixture
def folded(cohort, copy_of):
    """DATA with a table of two folds and three classes over all slides of the cohort."""
    rows = []
    for i, slide_id in enumerate(sorted(data.slide_files(cohort))):
        grade = ["low", "medium", "high"][i // 2 % 3]
        splits = [("test", "train"), ("train", "test")][i // 6 % 2]
        rows.append((f"p{i // 2}", slide_id, grade, *splits))
    return copy_of("d", FOLDS, grade=rows)


def test_a_fold_is_pretrained_and_tuned_without_its_cases(folded, monkeypatch, capsys):
    """Three classes by name, from pretraining to predict and heatmap."""
    monkeypatch.chdir(folded.parent)
    pretraining = train.PretrainConfig(data="d", steps=2, batch_size=2)
    with pytest.raises(MixmagError, match="every case is tested; give --fold K"):
        train.pretrain(pretraining)
    train.pretrain(dataclasses.replace(pretraining, fold=1))
    cases = data.read_task(folded, "grade", 1)
    of_split = {split: [c for c in cases if c.split == split] for split in data.SPLITS}
    unseen = [i for split in ("tune", "test") for case in of_split[split] for i in case.slide_ids]
    said = f"grade.csv leaves out {len(unseen)}, such as {min(unseen)}"
    assert said in capsys.readouterr().err
    seen = table_rows("runs/mem-0.50-f1/encoder/slides.csv", ("slide_id",))
    assert {i for (i,) in seen} == {i for case in of_split["train"] for i in case.slide_ids}
    settings = {"data": "d", "task": "grade", "out": "f", "epochs": 2}
    config = train.FinetuneConfig(init="runs/mem-0.50-f1", **settings)
    for other in ({"fold": 0}, {"fold": 1, "seed": 5}):
        with pytest.raises(MixmagError, match="tune or test cases.* the same --fold and --seed"):
            train.finetune(dataclasses.replace(config, **other))
    with pytest.raises(MixmagError, match="no column split, found fold_0, fold_1; see --fold"):
        train.finetune(config)
    result = train.finetune(dataclasses.replace(config, fold=1))
    assert "grade: classes high, low, medium\n" in capsys.readouterr().err
    assert result["classes"] == ["high", "low", "medium"]
    columns = ("score_high", "score_low", "score_medium")
    of_slide = check_scores(Path("f"), cases, columns)
    slide_id = cases[0].slide_ids[0]
    train.heatmap("f", slide_id)
    best = of_slide[slide_id].argmax()
    out = capsys.readouterr().out
    assert f"{slide_id}: predicted class {result['classes'][best]}" in out
    said = float(re.search(r"score ([\d.]+);", out)[1])
    assert said == pytest.approx(of_slide[slide_id][best], abs=1e-4)


def test_a_copy_of_a_slide_in_another_split_is_refused(tmp_path):
    rows = []
    for i, split in enumerate(["train", "train", "tune", "tune", "test"]):
        make_slide(tmp_path, f"s{i}", seed=i % 4)  # s4 is a copy of s0
        rows.append((f"p{i}", f"s{i}", i % 2, split))
    task(tmp_path, rows)
    config = train.FinetuneConfig(task="t", data=str(tmp_path), init="none", out=str(tmp_path))
    said = "s4.safetensors: it is in split test, and a copy of it, 's0', in split train"
    with pytest.raises(MixmagError, match=said):
        train.finetune(config)


@pytest.mark.parametrize(
    "grades, said",
    [
        (
            {"train": "01", "tune": "0", "test": "01"},
            "tune has usable cases of .'0'.; expected two",
        ),
        ({"train": "", "tune": "01", "test": "01"}, "train has usable cases of ..; expected two"),
        ({"train": "abc", "tune": "abc", "test": "abd"}, "train .*'c'.; .* all of .*'d'"),
    ],
)
def test_a_class_that_a_split_lacks_is_named(tmp_path, grades, said):
    rows = []
    for split, labels in grades.items():
        for label in labels:
            slide_id = f"{split}-{label}"
            make_slide(tmp_path, slide_id, seed=len(rows))
            rows.append((slide_id, slide_id, label, split))
    task(tmp_path, rows)
    config = train.FinetuneConfig(data=str(tmp_path), task="t", init="none", out=str(tmp_path))
    with pytest.raises(MixmagError, match=said):
        train.finetune(config)


def test_a_picture_costs_no_result(cohort, tmp_path, monkeypatch):
    """A user's matplotlibrc may ask for LaTeX; where drawing fails, the run is done."""
    config = train.PretrainConfig(data=str(cohort), out=str(tmp_path / "a"), steps=2, batch_size=2)
    with matplotlib.rc_context({"text.usetex": True}):
        train.pretrain(config)
        assert matplotlib.rcParams["text.usetex"]
    assert (tmp_path / "a" / "curve.png").exists()
    monkeypatch.setattr(train, "saved_figure", lambda path: 1 / 0)
    again = dataclasses.replace(config, out=str(tmp_path / "b"))
    with pytest.raises(ZeroDivisionError):
        train.pretrain(again)
    assert train.pretrain(again)["steps"] == 2


@pytest.mark.parametrize(
    "command, message",
    [
        ("finetune --task skin_braf", "no finished pretraining run"),
        ("finetune --task nothing --init none", "no such task; found gastric_her2, skin_braf"),
        ("finetune --task skin_braf --init none --tokens cls", "cls with an encoder"),
        ("finetune --task skin_braf --init random --magnification 40", "40 is not among"),
        ("embed --init nowhere --out x", "no exported encoder"),
        ("pretrain --region 5 --holdout 0", "smaller --region"),
        ("pretrain --mask 1.0", "expected 1 to"),
        ("pretrain --source 2", "--source 2 is smaller"),
        ("pretrain --steps 1 --epochs 1", "--steps and --epochs: give one of them"),
        ("pretrain --batch-size 4096 --steps 1", "a peak rate of 0.51"),
        ("pretrain --device gpu", "--device gpu: expected auto, cpu"),
    ],
)
def test_a_fault_is_one_clear_line_and_leaves_no_run(cohort, tmp_path, command, message):
    _, err = run(f"train.py {command} --data {cohort}", cwd=tmp_path, code=1)
    assert message in err
    assert len([line for line in err.splitlines() if line.startswith("error")]) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "command",
    [
        *(f"finetune --task x {flag}" for flag in ("--lr nan", "--lr=-1", "--clip 0")),
        *(f"finetune --task x {flag}" for flag in ("--smoothing 5", "--layer-decay 2")),
        *(f"finetune --task x {flag}" for flag in ("--dropout 1.5", "--batch-size 0")),
        *(f"finetune --task x {flag}" for flag in ("--magnification 20x", f"--seed {2**40}")),
        *(f"pretrain {flag}" for flag in ("--mask inf", "--blr 0", "--source 0")),
        "finetune",
    ],
)
def test_flags_out_of_range_are_usage_errors(command, capsys):
    with pytest.raises(SystemExit) as end:
        train.main(command.split())
    assert end.value.code == 2
    assert "argument" in capsys.readouterr().err


def test_runs_of_cmem_have_names_of_their_own():
    assert train.run_name(train.PretrainConfig(source=5)) == "cmem-5-0.50"


def test_flags_are_the_fields_of_the_configs(monkeypatch):
    made = []
    result = {"task": "x", "cases": {"test": 2}}
    monkeypatch.setattr(train, "finetune", lambda config: made.append(config) or result)
    assert train.main(["finetune", "--task", "x", "--magnification", "8.75"]) == 0
    assert made == [train.FinetuneConfig(task="x", magnification=8.75)]


def test_one_class_in_the_test_split_is_said(cohort, copy_of, tmp_path):
    rows = table_rows(cohort / "tasks/skin_braf.csv")
    folder = copy_of("one", skin_braf=[r for r in rows if r[3] != "test" or r[2] == "0"])
    command = f"train.py finetune --task skin_braf --init none --data {folder} --epochs 1"
    out, _ = run(command, cwd=tmp_path)
    assert "no AUROC" in out
    result = json.loads(next(tmp_path.glob("runs/*/result.json")).read_text())
    assert "auroc" not in result


def test_a_seen_case_is_a_leak_also_by_another_tasks_slide(runs, cohort, copy_of, tmp_path):
    encoder = runs / "runs/mem-0.50/encoder"
    roles = table_rows(encoder / "slides.csv", ("slide_id", "role"))
    seen = next(slide_id for slide_id, role in roles if role == "train")
    rows = [r for r in table_rows(cohort / "tasks/skin_braf.csv") if r[1] != seen]
    case_id = next(r[0] for r in rows if r[3] == "test")
    folder = copy_of("leaky", skin_braf=rows, other=[(case_id, seen, 1, "train")])
    command = f"train.py finetune --task skin_braf --data {folder} --out f"
    for init in (encoder.parent, encoder):
        _, err = run(command, "--init", init, cwd=tmp_path, code=1)
        assert f"1 slide of its tune or test cases, such as '{seen}'" in err


def test_the_encoder_brings_preset_and_region(runs):
    def adopted(**settings):
        config = train.adopt_encoder_settings(train.FinetuneConfig(task="x", **settings))
        return config.preset, config.region

    assert adopted(init=str(runs / "runs/mem-0.50")) == ("small", 3)
    facts = json.loads((runs / "runs/mem-0.50/encoder/config.json").read_text())
    other = runs / "other"
    other.mkdir()
    shutil.copy(runs / "runs/mem-0.50/encoder/model.safetensors", other)
    model = {**facts["model"], "region": 2}
    data.write_json(other / "config.json", {**facts, "preset": "paper", "model": model})
    assert adopted(init=str(other)) == ("paper", 2)
    assert adopted(init=str(other), preset="small") == ("small", 2)
    with pytest.raises(MixmagError, match="--region 4: .* reads 2 x 2 cells"):
        adopted(init=str(other), region=4)
    with pytest.raises(MixmagError, match="no exported encoder"):
        train.encoder_folder(next((runs / "runs").glob("skin_braf-*")))


def test_a_dry_run_counts_and_writes_nothing(cohort, tmp_path):
    command = "train.py finetune --task skin_braf --init random --region 2 --dry-run"
    out, _ = run(command, "--data", cohort, cwd=tmp_path)
    assert not list(tmp_path.iterdir())
    slides = slides_by_id(cohort)
    counts = [line.split(";")[0].split() for line in out.splitlines()]
    planned = {split: numbers for split, *numbers in counts}
    for split in data.SPLITS:
        cases = [case for case in data.read_task(cohort, "skin_braf") if case.split == split]
        ids = [slide_id for case in cases for slide_id in case.slide_ids]
        regions = sum(len(data.covering_windows(slides[i].cells, 2, 0.5)[0]) for i in ids)
        expected = [str(len(cases)), str(len(ids)), str(regions), f"{84 * regions:,d}"]
        assert planned[split] == expected


def test_a_slide_without_a_cell_is_named(tmp_path):
    rows = [(f"c{i}", f"s{i}", i % 2, data.SPLITS[i // 2]) for i in range(6)]
    for i in range(6):
        make_slide(tmp_path, f"s{i}", seed=i)
    make_slide(tmp_path, "empty", cells=[])
    task(tmp_path, [*rows, ("c6", "empty", 0, "train")])
    command = "train.py finetune --task t --init none --region 1 --epochs 1 --data ."
    _, err = run(command, cwd=tmp_path)
    assert "1 epoch of 1 step\n" in err
    assert "train: 1 slide without a token to read: empty\n" in err


def test_real_slides_go_all_the_way(real, tmp_path):
    """Tile, pretrain, embed; a slide without a window is named."""
    slides = real / "slides"
    tcga = slides / "TCGA-CR-7395-01A-01-TS1.svs"
    others = (slides / "CMU-1-Small-Region.svs", slides / "luna-1065626.svs")
    run("data.py tile --mpp 0.5 --out d --slides", tcga, cwd=tmp_path)
    run("data.py tile --out d --slides", *others, cwd=tmp_path)
    _, err = run("train.py pretrain --data d", *QUICK_PRETRAIN, cwd=tmp_path)
    assert "2 windows" in err
    run("train.py embed --init runs/mem-0.50 --data d --out e", cwd=tmp_path, code=3)
    assert len(list(tmp_path.glob("e/**/*.h5"))) == 2
    assert "luna-1065626" in (tmp_path / "e/failed.csv").read_text()


# --------------------------------------------------------------------------------- many processes
def several(ranks, *command, cwd):
    """The command in processes that find each other as those of torchrun do, with gloo."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    processes = []
    for rank in range(ranks):
        environment = {**place, "RANK": str(rank)}
        processes.append(Command(*command, cwd=cwd, environment=environment))
    for process in processes:
        code, out, err = process.end()
        assert code == 0, out + err


def weights(path):
    """All weights of a checkpoint as one vector, without the constants of the inputs."""
    state = torch.load(path / "last.pt", weights_only=True)["model"]
    return torch.cat([v.flatten() for name, v in state.items() if "standardize" not in name])


FINETUNE_10X = "finetune --task skin_braf --init random --magnification 10"


@pytest.mark.parametrize(
    "command, once, ranks",
    [
        ("pretrain --batch-size 8 --steps 6 --holdout 0.2", "--steps 1", (2, 4)),
        ("pretrain --source 5 --batch-size 8 --steps 6 --holdout 0.2", "--steps 1", (2, 4)),
        (f"{FINETUNE_10X} --dropout 0 --batch-size 10 --epochs 2", "--epochs 1", (2,)),
    ],
)
def test_many_processes_give_what_one_gives(cohort, tmp_path, command, once, ranks):
    """The same global batch gives the same parameters; one batch of finetune does not divide."""
    command = f"train.py {command} --data {cohort}"
    run(f"{command} --out one", cwd=tmp_path)
    run(f"{command} {once} --out untrained --lr 1e-30", cwd=tmp_path)
    for n in ranks:
        several(n, f"{command} --out {n}", cwd=tmp_path)
        one = weights(tmp_path / "one")
        moved = (one - weights(tmp_path / "untrained")).norm()
        # AdamW divides by sqrt(v), which magnifies rounding where gradients are small
        assert (one - weights(tmp_path / str(n))).norm() < 1e-2 * moved
        steps = [lines(tmp_path / out / "metrics.jsonl") for out in ("one", str(n))]
        last, other = ([line for line in of_run if "loss" in line][-1] for of_run in steps)
        assert last.keys() == other.keys()
        if "--source" in command:
            assert last["loss"] == pytest.approx(last["mem"] + last["contrastive"], abs=1e-4)
        for name in ("loss", "norm"):
            assert other[name] == pytest.approx(last[name], rel=2e-3)
    if "finetune" in command:
        scores = []
        for out in ("one", "2"):
            rows = table_rows(tmp_path / out / "predictions.csv", ("case_id", "score"))
            scores.append({case_id: float(score) for case_id, score in rows})
        assert scores[0] == pytest.approx(scores[1], abs=1e-4)
