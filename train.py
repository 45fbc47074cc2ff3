"""mixmag training: masked pretraining of the mixing encoder, fine-tuning to AUROC, and the tables.

    python train.py demo                             the whole story on a synthetic cohort, in minutes
    python train.py pretrain --mask 0.5              masked embedding modelling (MEM); with --source 7 contrastive too (CMEM)
    python train.py finetune --task skin_braf        gated attention MIL on the encoder's outputs
    python train.py table                            every row of the paper's tables 1 and 2

Shape letters as in mixmag.py. Results go to stdout, everything else to stderr. A run folder holds config.json, metrics.jsonl,
last.pt and prev.pt (checkpoints), what came out, and result.json once it is finished.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import sys
import time
import uuid
from contextlib import ExitStack, nullcontext
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import distributed

import data
import mixmag
from data import (
    MixmagError,
    OtherSettings,
    Stopped,
    process_rank,
    progress,
    report_failed,
    whole_file,
    write_csv,
    write_json,
    write_text,
)

# -------------------------------------------------------- schedule, parameter groups, AMP, one step

DEFAULT_DATA = "data/synthetic"
PRESETS = {  # what a flag that is not given means; `paper` numbers are the assumed ones of README
    "small": {
        "pretrain": {"batch_size": 16, "blr": 0.032, "weight_decay": 0.05, "steps": 3000},
        "finetune": {
            "batch_size": 16,
            "lr": 1e-2,
            "encoder_rate": 0.3,
            "weight_decay": 1.0,
            "hidden": 64,
            "epochs": 20,
        },
        "abmil": {"epochs": 60},
    },
    "paper": {
        "pretrain": {"batch_size": 4096, "blr": 1.5e-4, "weight_decay": 0.05, "epochs": 100},
        "finetune": {
            "batch_size": 32,
            "lr": 1e-3,
            "encoder_rate": 0.1,
            "weight_decay": 0.05,
            "hidden": 256,
            "epochs": 20,
        },
        "abmil": {},
    },  # what differs without an encoder: few tokens learn late, in cheap epochs
}


def lr_at(step: int, total: int, warmup: int) -> float:
    """The factor on the peak rate at a step: 1. a linear rise whose first step is not zero, 2. a cosine to zero. A pure function
    of the step, so there is no scheduler to save. Source: paper 4.2, SGDR."""
    if step < warmup:
        return (step + 1) / warmup  # 1
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))  # 2


def layer_of(name: str, depth: int) -> int:
    """0 for what stands before the blocks, i + 1 for block i, depth + 1 for what follows. ValueError for an unknown name."""
    for pattern, layer in (
        (r"encoder\.(cls|pos)$|encoder\.input\.", 0),
        (r"encoder\.blocks\.(\d+)\.", None),
        (r"encoder\.norm\.|(decoder|projector|pool|head)\.", depth + 1),
    ):
        if found := re.match(pattern, name):
            return int(found[1]) + 1 if layer is None else layer
    raise ValueError(f"parameter {name!r} belongs to no layer: say in layer_of where it stands")


def parameter_groups(
    model: torch.nn.Module, weight_decay: float, layer_decay: float = 1.0, encoder_rate: float = 1.0
) -> list[dict]:
    """AdamW groups with `lr_scale` = layer_decay ** (layers above), times encoder_rate inside the encoder. No decay on norms and biases
    (paper 4.2), nor on class and mask tokens and positions (assumed, as MAE). Every parameter is in exactly one group. Source: paper 4.3,
    BEiT, MAE."""
    groups, depth = {}, model.config.depth
    for name, parameter in model.named_parameters():
        decays = parameter.ndim > 1 and not name.endswith((".cls", ".pos"))
        scale = layer_decay ** (depth + 1 - layer_of(name, depth)) * (
            encoder_rate if name.startswith("encoder.") else 1.0
        )
        group = groups.setdefault(
            (scale, decays),
            {"params": [], "lr_scale": scale, "weight_decay": weight_decay * decays},
        )
        group["params"].append(parameter)
    return list(groups.values())


def amp_dtype(mode: str, device: torch.device, width: int) -> torch.dtype | None:
    """The precision of autocast, None for full. auto: bf16 on a GPU that has it, fp16 on an older one (the paper's V100); on a CPU
    bf16 where the processor has the instructions and the model is wide enough to gain by it (at small widths it loses)."""
    if mode != "auto":
        return {"off": None, "fp16": torch.float16, "bf16": torch.bfloat16}[mode]
    if device.type == "cuda":
        return (
            torch.bfloat16
            if torch.cuda.is_bf16_supported(including_emulation=False)
            else torch.float16
        )
    return torch.bfloat16 if width >= 512 and torch.cpu._is_avx512_bf16_supported() else None


def optimizer_step(model, optimizer, scaler, rate: float, clip: float) -> torch.Tensor:
    """Unscale, clip, step at `rate` times each group's lr_scale, update the scale, clear. Returns the gradient's norm, left on its
    device so that nothing waits for it; under fp16 a step with an infinite one is skipped and the scale halved."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm


def scaling(compute, optimizer, steps: int) -> dict:
    """For the metrics: fp16's scale, and how many of all steps it skipped; nothing in another precision."""
    if not compute.scaler.is_enabled():
        return {}
    taken = max((int(s["step"]) for s in optimizer.state.values()), default=0)
    return {"scale": compute.scaler.get_scale(), "skipped": steps - taken}


def usable_scale(compute) -> bool:
    """Whether fp16's scaler may go on skipping steps: below 1 it is not the scale that makes gradients overflow."""
    return compute.scaler.is_enabled() and compute.scaler.get_scale() >= 1


# -------------------------------------------------------------------------------------- pretraining


def model_config(args, slides) -> mixmag.Config:
    return getattr(mixmag.Config, args.preset)(
        slides[0].dim, region=args.region, magnifications=tuple(slides[0].meta["magnifications"])
    )


def schedule(args, windows: int) -> tuple[int, int, float]:
    """Steps in all, steps of warm-up, peak rate."""
    total = args.steps or math.ceil(args.epochs * windows / args.batch_size)
    peak = args.blr * args.batch_size / 256 if args.lr is None else args.lr  # linear scaling rule
    if args.lr is None and peak > HIGHEST_RATE:
        raise MixmagError(
            f"--batch-size {args.batch_size}: linear scaling makes a peak rate of {peak:.2g} of a base rate of {args.blr:g}, at which "
            "nothing is learned; give --lr, a smaller --blr, or --preset paper"
        )
    return total, round(args.warmup * total), peak


LOG_EVERY = 10  # steps
LOAD = 256  # regions that are loaded at once, so that a large batch need not fit into memory
HIGHEST_RATE = 0.02  # assumed: ten times what the small preset learns at


def in_parts(batch: dict, micro: int) -> list[tuple]:
    """(x, removed, valid) of at most `micro` regions each; with two views the regions are on axis 1."""
    axis = batch["x"].ndim - 3
    return list(
        zip(
            *(
                itertools.repeat(None) if batch[k] is None else batch[k].split(micro, axis)
                for k in ("x", "removed", "valid")
            )
        )
    )


def pretrain_step(model, loads, share: int, micro: int, compute) -> dict:
    """Forward and backward over this process's share of the global batch, which comes in `loads`, at most `micro` regions at a time; gradients add
    up to those of the whole batch's mean. Returns sums to log, left on the device: loss, per level and for CMEM its two terms.

    The negatives of NT-Xent are the whole global batch. Where that does not go through in one pass, all projections are made first,
    without a graph, and each part then goes back with its slice of the loss's gradient by them (GradCache, Gao et al. 2021)."""
    parts = (part for batch in loads for part in in_parts(batch, micro))
    contrastive, pulls, logged = None, itertools.repeat(None), {}
    if isinstance(model, mixmag.ContrastiveEmbeddingModel):
        parts = list(parts)
        if len(parts) > 1 or compute.world > 1:
            contrastive, pulls = projection_gradients(model, parts, compute)
    for part, pull in zip(parts, pulls):
        weight = part[0].shape[-3] / (share * compute.world)
        with compute.autocast():
            out = model(*part)
        if pull is not None:  # the same gradient as that of .contrastive over the whole batch
            out.contrastive = contrastive
            out.loss = out.mem + model.config.contrastive_weight * contrastive
            scaled = (
                out.mem * weight + model.config.contrastive_weight * (out.z.float() * pull).sum()
            )
        else:
            scaled = out.loss * weight
        compute.scaler.scale(scaled).backward()
        terms = {
            name: term.detach() * weight
            for name in ("loss", "mem", "contrastive")
            if (term := getattr(out, name)) is not None
        }
        terms["levels"] = torch.stack(
            [(out.per_level * out.per_level_count).nan_to_num(), out.per_level_count]
        )
        logged = {name: logged.get(name, 0) + value for name, value in terms.items()}
    return logged


def projection_gradients(model, parts: list, compute) -> tuple[torch.Tensor, tuple]:
    """NT-Xent of the global batch, and its gradient by the projections of each of this process's parts (2, micro, P)."""
    with torch.no_grad(), compute.autocast():
        mine = torch.cat([model.project(*part) for part in parts], dim=1).float()  # (2, B, P)
    everyone = mine.new_zeros(2, compute.world, *mine.shape[1:])
    everyone[:, compute.rank] = mine
    z = sum_over_processes(everyone, compute).flatten(1, 2).requires_grad_()  # (2, world * B, P)
    loss = mixmag.nt_xent(*z, model.config.temperature)
    (gradient,) = torch.autograd.grad(loss, z)
    own = gradient.unflatten(1, (compute.world, -1))[:, compute.rank]  # (2, B, P)
    return loss.detach(), own.split([part[0].shape[1] for part in parts], dim=1)


def pretraining_split(path: Path, holdout: float) -> tuple[list, list]:
    """Slide ids to train on and to measure on. Whole cases are held out, chosen by a hash of their name: the choice moves with
    nothing else."""
    case_of = {
        s: c.case_id
        for task in data.task_names(path)
        for c in data.read_task(path, task)
        for s in c.slide_ids
    }
    ids = data.pretraining_ids(path)
    cases = sorted(
        {case_of.get(i, i) for i in ids}, key=lambda c: hashlib.sha256(c.encode("utf-8")).digest()
    )
    held = set(cases[: round(holdout * len(cases))])
    return [i for i in ids if case_of.get(i, i) not in held], [
        i for i in ids if case_of.get(i, i) in held
    ]


def pretrain(args) -> dict:
    """MEM or CMEM (paper 3.1) on every slide that is in no tune or test split. Returns result.json."""
    apply_preset(args, "pretrain")
    compute = machine(args)
    path = ensure_data(args.data, compute)
    ids, held_ids = pretraining_split(path, args.holdout)
    if not ids and data.visible_files(path / "slides", "*.safetensors"):
        raise MixmagError(
            f"{path}: every slide is of a tune or test case, or held out (--holdout {args.holdout:g}): none is left to train on"
        )
    slides = data.read_slides(path, ids)
    config = model_config(args, slides)
    geometry = config.geometry()
    try:
        mixmag.removal_count(geometry.num_tokens, args.mask)
    except ValueError as error:
        raise MixmagError(f"--mask: {error}") from None
    if args.source is not None and args.source < args.region:
        raise MixmagError(
            f"--source {args.source} is smaller than the region of {args.region} cells"
        )
    views = 1 if args.source is None else 2
    if args.batch_size % compute.world:
        raise MixmagError(
            f"--batch-size {args.batch_size} is the global one and does not divide into {compute.world} processes"
        )
    dataset = data.RegionDataset(
        slides, geometry, args.seed, args.mask, views, args.source or 0, min_cover=args.min_cover
    )
    if not len(dataset):
        raise MixmagError(
            f"no window of {args.region} x {args.region} cells is {args.min_cover:.0%} covered in any of {len(slides)} slides "
            f"(the largest has {max(len(s.cells) for s in slides)} cells); try --min-cover 0.5 or --region {max(1, args.region - 1)}"
        )
    plan = schedule(args, len(dataset))
    run = Run(
        args.out or Path("runs") / default_run(args),
        {"kind": "pretrain", **settings(args, slides), "model": config.to_dict()},
        args.resume,
        compute,
    )
    if run.result():
        log(f"{run.folder}: done before")
        return run.result()
    torch.manual_seed(args.seed)
    model = (mixmag.MaskedEmbeddingModel if views == 1 else mixmag.ContrastiveEmbeddingModel)(
        config
    )
    mean, std, directions = data.feature_statistics(slides)
    model.encoder.standardize.fit(mean, std)
    facts = pretrain_loop(args, run, model.to(compute.device), dataset, compute, *plan)
    if run.writes:
        export_encoder(
            run,
            model.encoder,
            slides[0],
            args.preset,
            [(i, "train") for i in ids] + [(i, "held-out") for i in held_ids],
        )
        finish_pretraining(run, model, path, held_ids, directions, args, facts)
    barrier(compute)
    return run.result()


def pretrain_loop(
    args, run: Run, model, dataset, compute, total: int, warmup: int, peak: float
) -> dict:
    """All optimizer steps, from the last checkpoint on. Returns how many there were and how long they took."""
    config = model.config
    optimizer = torch.optim.AdamW(
        parameter_groups(model, args.weight_decay), lr=peak, betas=(0.9, 0.95), fused=True
    )  # assumed
    share = args.batch_size // compute.world  # of each process
    load = (
        share if args.source else min(share, max(1, LOAD // args.micro_batch) * args.micro_batch)
    )  # NT-Xent wants all of it at once
    if args.in_memory:
        dataset.hold(compute.device)
    if args.compile:
        model.compile(dynamic=False)  # all parts are of one shape but for a last smaller one
    log(
        f"{run.folder}: {parameters(model)}, {len(dataset.slides)} slides with {len(dataset)} windows, batch {args.batch_size} in parts of "
        f"{min(args.micro_batch, share)}, {total} steps, peak rate {peak:.2e}, {compute.world} x {compute.device.type}, {compute.dtype or 'fp32'}"
    )
    start = run.load(model, optimizer)["done"]
    firsts = range(
        start * args.batch_size + compute.rank * share, total * args.batch_size, args.batch_size
    )
    batches = [
        [range(i, min(i + load, first + share)) for i in range(first, first + share, load)]
        for first in firsts
    ]
    loads = dataset.batches(list(itertools.chain(*batches)), args.workers, compute.device)
    began, recent = time.time(), []
    bar = progress(total=total, initial=start, desc="pretrain")
    for step, batch in enumerate(batches, start=start):
        rate = peak * lr_at(step, total, warmup)
        logged = pretrain_step(
            model, itertools.islice(loads, len(batch)), share, args.micro_batch, compute
        )
        sum_gradients(model, compute)
        recent.append(
            (
                step,
                batch,
                logged["loss"],
                optimizer_step(model, optimizer, compute.scaler, rate, args.clip),
            )
        )
        last, stop = step + 1 == total, stopping(compute)
        saves = (step + 1) % args.save_every == 0 or last or stop
        if saves or (step + 1) % LOG_EVERY == 0:  # only here does anything wait for the device
            norm = check_finite(run, recent, dataset)
            recent.clear()
            if (step + 1) % LOG_EVERY == 0 or last:
                note_pretraining(
                    run,
                    step + 1,
                    logged,
                    rate,
                    norm,
                    config,
                    bar,
                    scaling(compute, optimizer, step + 1),
                )
        bar.update()
        if saves:
            run.save(step + 1, model, optimizer)
        if stop:
            raise Stopped
    bar.close()
    seconds = time.time() - began
    tokens = (total - start) * args.batch_size * dataset.views * config.geometry().num_tokens
    log(f"{tokens / max(seconds, 1e-9):,.0f} tokens per second over {seconds:.0f} s")
    return {"steps": total, "seconds": round(seconds, 1)}


def check_finite(run: Run, recent: list, dataset) -> float | None:
    """recent: (step, indices of its loads, loss, norm of the gradient) of the steps since the last call. The last norm, None where fp16's scaler
    skipped that step. Raises MixmagError for a loss, or without a scaler a gradient, that is not finite."""
    losses, norms = (torch.stack([r[i].float() for r in recent]).tolist() for i in (2, 3))
    for (step, loads, *_), loss, norm in zip(recent, losses, norms):
        if not math.isfinite(loss) or not (math.isfinite(norm) or usable_scale(run.compute)):
            seen, bad = set(), set()
            for indices in loads:
                batch = dataset.fetch(dataset.__getitems__(indices), run.compute.device)
                seen.update(batch["slide"].flatten().tolist())
                bad.update(batch["slide"][~batch["x"].isfinite().flatten(-2).all(-1)].tolist())
            names = ", ".join(sorted(dataset.slides[i].slide_id for i in bad or seen)[:5])
            raise MixmagError(
                f"{run.folder}: at step {step} the loss is {loss:.4g} and its gradient's norm {norm:.4g}; "
                + (
                    f"the embeddings of {names} are not finite (see data.py verify)"
                    if bad
                    else f"all embeddings are finite (slides {names}, ...): try a smaller --lr"
                )
                + "; the last good checkpoint stays"
            )
    return norms[-1] if math.isfinite(norms[-1]) else None


def note_pretraining(
    run: Run, step: int, logged: dict, rate: float, norm, config, bar, scaled: dict
) -> None:
    """One line of metrics: what this step's sums say over all processes."""
    logged = {
        name: sum_over_processes(value.double().cpu(), run.compute)
        for name, value in logged.items()
    }
    sums, counts = logged.pop("levels")
    logged = {name: value.item() for name, value in logged.items()}
    run.note(
        step=step,
        **logged,
        rate=rate,
        norm=norm,
        **scaled,
        **{
            f"{m}x": v if math.isfinite(v) else None
            for m, v in zip(config.magnifications, (sums / counts).tolist())
        },
    )
    bar.set_postfix(loss=f"{logged['loss']:.3f}")


def default_run(args) -> str:
    name = f"mem-{args.mask:.2f}" if args.source is None else f"cmem-{args.source}-{args.mask:.2f}"
    return (
        name
        + (f"-r{args.region}" if args.region != 3 else "")
        + (f"-s{args.seed}" if args.seed else "")
    )


def pretrain_command(args) -> int:
    pretrain(args)
    return 0


# -------------------------------------------------------------------------------------- fine-tuning


def auroc(labels, scores) -> float:
    """Area under the ROC curve by scikit-learn. Raises MixmagError where only one class is present."""
    if len(set(labels)) < 2:
        raise MixmagError(
            f"AUROC needs both classes, found {len(labels)} cases all labelled {set(labels)}"
        )
    return float(roc_auc_score(labels, scores))


def bootstrap_aurocs(labels, scores, seed: int, resamples: int = 1000) -> np.ndarray | None:
    """(resamples,) AUROCs of cases drawn with replacement within each class; None with fewer than two cases of a class."""
    labels, scores = np.asarray(labels), np.asarray(scores)
    positive, negative = scores[labels == 1], scores[labels == 0]
    if min(len(positive), len(negative)) < 2:
        return None

    def area(p, n, axis):  # the Mann-Whitney form of the AUROC, over many resamples at once
        return stats.mannwhitneyu(p, n, axis=axis, method="asymptotic").statistic / (
            p.shape[axis] * n.shape[axis]
        )

    return stats.bootstrap(
        (positive, negative),
        area,
        n_resamples=resamples,
        batch=100,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).bootstrap_distribution


def interval(samples) -> list | None:
    return None if samples is None else [float(v) for v in np.percentile(samples, [2.5, 97.5])]


def newest_pretraining() -> Path:
    done = [
        p.parent
        for p in Path("runs").glob("*/result.json")
        if data.read_json(p).get("kind") == "pretrain"
    ]
    if not done:
        raise MixmagError(
            "no finished pretraining run under runs/: make one with `python train.py pretrain --mask 0.5`, or say --init random "
            "or --init none"
        )
    return max(done, key=lambda p: (p / "result.json").stat().st_mtime)


def encoder_folder(run) -> Path:
    """The exported encoder of a run, or the folder itself where it is one."""
    for folder in (Path(run) / "encoder", Path(run)):
        if (folder / "model.safetensors").exists() and (folder / "config.json").exists():
            if "kind" in data.read_json(folder / "config.json"):
                raise MixmagError(
                    f"{folder} is a fine-tuning run; --init wants a pretraining run, or its encoder folder"
                )
            return folder
    raise MixmagError(
        f"{run}: no exported encoder (encoder/model.safetensors and encoder/config.json); the run may not be finished"
    )


def read_encoder(run, slides) -> mixmag.MixingEncoder:
    """The pretrained encoder, refused where it was trained on another tile encoder's embeddings than the slides hold."""
    folder = encoder_folder(run)
    try:
        encoder = mixmag.load_encoder(folder)
        trained_on = data.read_json(folder / "config.json")["tile_encoder"]
    except (ValueError, KeyError, RuntimeError) as error:
        raise MixmagError(f"{folder}: {' '.join(str(error).split())}") from None
    check_same_encoder(folder, trained_on, encoder.config, slides[0])
    return encoder


def check_same_encoder(run, tile_encoder: str, config: mixmag.Config, slide) -> None:
    """A model says nothing of other embeddings than those it was trained on."""
    wanted, found = (
        (tile_encoder, config.dim, config.magnifications),
        (slide.meta["encoder"], slide.dim, tuple(slide.meta["magnifications"])),
    )
    if wanted != found:
        raise MixmagError(f"{run} was trained on {wanted}, the slides hold {found}")


def is_run(init: str) -> bool:
    """Whether --init names an encoder on disk."""
    return init not in ("none", "random")


def adopt_encoder_settings(args) -> None:
    """What the encoder of --init decides where its flag was left out: the preset, and the region's size, which cannot be another."""
    known = data.read_json(encoder_folder(args.init) / "config.json") if is_run(args.init) else {}
    region = known.get("model", {}).get("region", args.region or 3)
    if args.region not in (None, region):
        raise MixmagError(
            f"--region {args.region}: the encoder of {args.init} reads regions of {region} x {region} cells"
        )
    args.preset, args.region = args.preset or known.get("preset", "small"), region


def check_no_leakage(run, path, cases) -> None:
    """An encoder that in pretraining saw a tune or test case of this task, be it by a slide of another task, gives scores that mean nothing."""
    if not is_run(run):
        return
    listed = encoder_folder(run) / "slides.csv"
    if not listed.exists():
        log(
            f"WARNING: {listed} is not there, so whether this encoder saw the tune or test slides cannot be told"
        )
        return
    seen = {
        row["slide_id"]
        for row in data.read_csv(listed, ("slide_id", "role"))
        if row["role"] == "train"
    }
    held = {c.case_id for c in cases if c.split != "train"}
    known = [
        c
        for task in data.task_names(path)
        for c in data.task_findings(Path(path) / "tasks" / f"{task}.csv")[0]
        if c.case_id in held
    ]
    leaked = sorted({s for c in known for s in c.slide_ids} & seen)
    if leaked:
        raise MixmagError(
            f"{run} was pretrained on {len(leaked)} slides of tune or test cases of this task, such as {leaked[0]!r}; "
            "pretrain without them"
        )


def make_classifier(args, slides, train_slides, compute) -> mixmag.SlideClassifier:
    """Encoder from `args.init` (a run, random or none) under a fresh AB-MIL. Constants of the inputs come from the training slides, of those
    tokens that are read and without an encoder for each magnification by itself, unless the encoder brings its own."""
    torch.manual_seed(args.seed)
    if not is_run(args.init):
        config = model_config(args, slides)
        encoder = mixmag.MixingEncoder(config) if args.init == "random" else None
    else:
        encoder = read_encoder(args.init, slides)
        config = encoder.config
    try:
        model = mixmag.SlideClassifier(
            config, encoder, args.tokens, args.magnification, args.hidden, args.dropout
        )
    except ValueError as error:
        raise MixmagError(
            f"--tokens {args.tokens} --magnification {args.magnification} --init {args.init}: {error}"
        ) from None
    if not is_run(args.init):
        levels, which = (
            config.geometry().level()[model.index].unique(return_inverse=True)
        )  # (K,), (n,) in 0..K-1
        if encoder:
            encoder.standardize.fit(*data.feature_statistics(train_slides, levels.tolist())[:2])
        else:
            mean, std, _ = map(
                torch.stack,
                zip(*(data.feature_statistics(train_slides, [k]) for k in levels.tolist())),
            )  # (K, D)
            model.standardize.fit(mean[which], std[which])  # (n, D)
    model.to(compute.device)
    share_state(model, compute)
    return model


def fit_whitening(model, dataset, compute, limit: int = 4000) -> None:
    """Mean of each held output's place and the covariance around it, over about `limit` regions, evenly spread over every slide of the train split."""
    share, count, total, square = (
        max(1, -(-sum(map(len, dataset.rows.values())) // limit)),
        0.0,
        0.0,
        0.0,
    )
    for h, valid in progress(dataset.held.values(), desc="whitening", leave=False):
        h, valid = (
            torch.from_numpy(h[::share]).to(compute.device).double(),
            valid[::share],
        )  # (W, n or 1, d)
        there = torch.from_numpy(
            valid if model.tokens == "patch" else np.ones(h.shape[:2], bool)
        ).to(compute.device)[..., None]
        h = h.where(there, 0)
        count, total, square = (
            count + there.sum(0),
            total + h.sum(0),
            square + torch.einsum("wnd,wne->de", h, h),
        )
    mean = total / count.clamp(min=1)  # (n, d)
    model.whiten.fit(
        mean.float(),
        ((square - torch.einsum("nd,ne->de", mean * count, mean)) / count.sum()).float(),
    )
    share_state(model.whiten, compute)


def encoded(model, dataset, slide_id: str, compute) -> tuple[np.ndarray, np.ndarray]:
    """A slide of data.CaseDataset through the encoder as it is -> (W, n or 1, d) float32 and valid (W, n)."""
    x, valid = data.gather(dataset.slides[slide_id], dataset.rows[slide_id], dataset.entries)
    with torch.no_grad(), compute.autocast():
        return model.outputs(*data.as_batch(x, valid, compute.device)).float().cpu().numpy(), valid


def cache_encoder_outputs(model, dataset, compute) -> None:
    """From now on the data set gives the frozen encoder's outputs, made here once, in place of embeddings."""
    dataset.held = {
        i: encoded(model, dataset, i, compute)
        for i in progress(dataset.rows, desc="outputs", leave=False)
    }


def slide_logits(model, batch: dict) -> torch.Tensor:
    """(S,) of a batch of data.CaseDataset, which may bring a frozen encoder's outputs in place of embeddings."""
    return (model.aggregate if batch["held"] else model)(
        batch["x"], batch["regions"], batch["valid"]
    )[0]


def score_cases(model, dataset, compute, batch_size: int) -> list[np.ndarray]:
    """The probability of each slide, case by case; no label is looked at. Processes share the cases."""
    model.eval()
    scores = {}
    for start in range(0, len(dataset), batch_size * compute.world):
        mine = range(start, min(start + batch_size * compute.world, len(dataset)))[
            compute.rank :: compute.world
        ]
        if mine:
            batch = data.to_device(dataset.__getitems__(mine), compute.device)
            with torch.no_grad(), compute.autocast():
                logit = slide_logits(model, batch)
            probability, case = (
                torch.sigmoid(logit.cpu().double()).numpy(),
                batch["case"].cpu().numpy(),
            )  # fp32 would tie them at 1
            scores.update({i: probability[case == c] for c, i in enumerate(mine)})
        if stopping(compute):
            raise Stopped
    if compute.world > 1:
        parts = [None] * compute.world
        distributed.all_gather_object(parts, scores)
        scores = {i: s for part in parts for i, s in part.items()}
    model.train()
    return [scores[i] for i in range(len(dataset))]


CASE_SCORES = {
    "max": np.max,
    "mean": np.mean,
}  # Eq. 9 needs the label, so it cannot choose a slide at test time


def best_case_score(labels, slide_scores, wanted: str) -> tuple[str, float]:
    """The label-free rule that makes a case's score of its slides' and its AUROC; auto takes the better one, max on a tie."""
    rules = CASE_SCORES if wanted == "auto" else {wanted: CASE_SCORES[wanted]}
    found = {name: auroc(labels, [rule(s) for s in slide_scores]) for name, rule in rules.items()}
    return max(found.items(), key=lambda item: item[1])


def finite_scores(model, dataset, compute, batch_size: int) -> list[np.ndarray]:
    """score_cases, all of them finite. Raises MixmagError naming the first case that is not."""
    scores = score_cases(model, dataset, compute, batch_size)
    for case, s in zip(dataset.cases, scores):
        if not np.isfinite(s).all():
            raise MixmagError(
                f"case {case.case_id} with slides {', '.join(case.slide_ids)} scores {s.tolist()}; data.py verify says which "
                "features are not finite"
            )
    return scores


def finetune_epoch(
    model, optimizer, dataset, compute, args, epoch: int, bar
) -> tuple[float, float]:
    """One pass over the training cases in an order that follows from the seed and the epoch; processes share the cases of a batch.
    Returns the mean loss and the norm of the last gradient."""
    order, total = (
        np.random.default_rng([args.seed, 4, epoch]).permutation(len(dataset)),
        torch.zeros(()),
    )
    batches = [order[i : i + args.batch_size] for i in range(0, len(order), args.batch_size)]
    mine, steps = [b[compute.rank :: compute.world] for b in batches], args.epochs * len(batches)
    for i, batch in enumerate(
        data.prefetch(
            lambda indices: data.pinned(dataset.__getitems__(indices), compute.device),
            mine,
            args.workers,
        )
    ):
        step = epoch * len(batches) + i
        torch.manual_seed(
            (1_000_003 * args.seed + step) * compute.world + compute.rank
        )  # for dropout: so a resumed run has the same
        if batch:
            loss = finetune_step(
                model,
                data.to_device(batch, compute.device),
                args.smoothing,
                compute,
                len(batches[i]),
                step,
            )
        else:  # no case is left for this process, whose scaler is to know its device all the same
            loss = compute.scaler.scale(torch.zeros((), device=compute.device)).cpu()
        sum_gradients(model, compute)
        norm = optimizer_step(
            model,
            optimizer,
            compute.scaler,
            args.lr * lr_at(step, steps, round(args.warmup * steps)),
            args.clip,
        ).item()
        if not math.isfinite(norm) and not usable_scale(compute):
            raise MixmagError(
                f"the gradient's norm is {norm} at step {step}, slides {', '.join(batch.get('slide_ids', [])[:5])}, ...; "
                "a smaller --lr, or --amp off, may help"
            )
        total += loss * len(batches[i])
        bar.update()
        if stopping(compute):
            raise Stopped
    return sum_over_processes(total, compute).item() / len(dataset), norm


def slide_losses(model, batch: dict, smoothing: float, compute) -> torch.Tensor:
    """(S,) of the slides of a batch, each against its case's label."""
    with compute.autocast():
        logit = slide_logits(model, batch)
    target = batch["label"] * (1 - smoothing) + smoothing / 2  # (cases,)
    return F.binary_cross_entropy_with_logits(logit, target[batch["case"]], reduction="none")


def chosen_slides(batch: dict, chosen: torch.Tensor) -> dict:
    """The batch with the slides of `chosen` (S,) alone."""
    rows = torch.repeat_interleave(chosen, batch["regions"])  # (W,)
    return {
        **batch,
        "x": batch["x"][rows],
        "valid": None if batch["valid"] is None else batch["valid"][rows],
        "regions": batch["regions"][chosen],
        "case": batch["case"][chosen],
        "slide_ids": [i for i, c in zip(batch["slide_ids"], chosen.tolist()) if c],
    }


def least_slides(model, batch: dict, smoothing: float, compute) -> dict:
    """The batch without the slides that lose in Eq. 9, found without a graph, so that none is ever kept for them; and without dropout, so
    that a case's slide is not chosen by chance and cases of one slide draw what they would draw alone."""
    several = torch.bincount(batch["case"])[batch["case"]] > 1  # (S,)
    part = chosen_slides(batch, several)
    model.eval()
    with torch.no_grad():
        loss = slide_losses(model, part, smoothing, compute)
    model.train()
    won = ~several
    won[several] = ~(
        loss > mixmag.min_slide_loss(loss, part["case"])[part["case"]]
    )  # a loss that is not finite wins too
    return chosen_slides(batch, won)


def finetune_step(
    model, batch: dict, smoothing: float, compute, cases: int, step: int
) -> torch.Tensor:
    """Forward and backward over this process's share of a batch of `cases` cases; returns its part of the mean loss, on the CPU."""
    if len(batch["case"]) > len(batch["label"]):  # some case has several slides
        batch = least_slides(model, batch, smoothing, compute)
    loss = slide_losses(model, batch, smoothing, compute)  # (S,)
    loss = mixmag.min_slide_loss(loss, batch["case"]).sum() / cases  # Eq. 9
    compute.scaler.scale(loss).backward()
    if not math.isfinite(loss.item()):
        raise MixmagError(
            f"the loss is {loss.item()} at step {step}, slides {', '.join(batch['slide_ids'][:5])}, ...; data.py verify, or a "
            "smaller --lr, may help"
        )
    return loss.detach().cpu()


def finetune(args) -> dict:
    """Train on the train split, keep the epoch that ranks the tune split best, score the test split once (paper 4.3). Returns
    result.json."""
    args.init = args.init or str(newest_pretraining())
    adopt_encoder_settings(args)
    apply_preset(args, "finetune")
    compute = machine(args)
    path = ensure_data(args.data, compute)
    cases = data.read_task(path, args.task)
    by_id = {s.slide_id: s for s in data.read_slides(path, {i for c in cases for i in c.slide_ids})}
    slides = list(by_id.values())
    check_no_leakage(args.init, path, cases)
    model = make_classifier(
        args, slides, [by_id[i] for c in cases if c.split == "train" for i in c.slide_ids], compute
    )
    sets = {
        split: data.CaseDataset(
            by_id,
            [c for c in cases if c.split == split],
            model.config.geometry(),
            model.index.cpu(),
            args.min_cover,
        )
        for split in data.SPLITS
    }
    for split in ("train", "tune"):
        if len(set(labels := sets[split].labels)) < 2:
            raise MixmagError(
                f"task {args.task}: the {split} split has {len(labels)} usable cases with labels {sorted(set(labels))}; both classes "
                "are needed"
            )
    if args.dry_run:
        print(finetuning_plan(model, sets, args) if compute.rank == 0 else "", end="")
        return {}
    name = (
        f"abmil-{args.magnification}"
        if args.init == "none"
        else f"{Path(args.init).name}-{args.tokens}-{args.magnification}"
    )
    files = [path / "tasks" / f"{args.task}.csv"] + (
        [encoder_folder(args.init) / "model.safetensors"] if is_run(args.init) else []
    )
    run = Run(
        args.out or Path("runs") / f"{args.task}-{name}{f'-s{args.seed}' if args.seed else ''}",
        {"kind": "finetune", **settings(args, slides, *files), "model": model.config.to_dict()},
        args.resume,
        compute,
    )
    if run.result():
        log(f"{run.folder}: done before")
        return run.result()
    best = finetune_loop(args, run, model, sets, compute)
    finish_finetuning(run, model, sets, best, args)
    barrier(compute)
    return run.result()


def finetune_loop(args, run: Run, model, sets: dict, compute) -> dict:
    """All epochs, from the last checkpoint on. Returns what `keep_best` knows of the best one."""
    optimizer = torch.optim.AdamW(
        parameter_groups(model, args.weight_decay, args.layer_decay, args.encoder_rate),
        lr=args.lr,
        fused=True,
    )
    per_epoch = math.ceil(len(sets["train"]) / args.batch_size)
    log(
        f"{run.folder}: {parameters(model)}, cases "
        + ", ".join(f"{k} {len(v)} ({sum(v.labels)} positive{v.left_out})" for k, v in sets.items())
        + f", {args.epochs} epochs of {per_epoch} steps, {compute.world} x {compute.device.type}, {compute.dtype or 'fp32'}"
    )
    best = {"best_auroc": -1.0, **run.load(model, optimizer)}
    done, starts = best.pop("done"), best.pop("starts", 0)
    if not done:
        if model.encoder is not None and max(args.frozen_epochs, args.starts) > 1:
            cache_encoder_outputs(model, sets["train"], compute)
            if (
                not starts
            ):  # an encoder that learns from the start makes large what matters by itself
                fit_whitening(model, sets["train"], compute)
        if args.starts > 1:
            best_start(args, run, model, optimizer, sets, compute, best, starts)
    bar = progress(
        total=args.epochs * per_epoch, initial=done * per_epoch, desc=f"finetune {args.task}"
    )
    for epoch in range(done, args.epochs):
        if model.encoder is not None:
            frozen = epoch < args.frozen_epochs  # for one epoch, paper 4.3
            model.encoder.requires_grad_(not frozen)
            for split in ("train", "tune"):
                if not frozen:
                    sets[split].held.clear()
                elif args.frozen_epochs > 1 and not sets[split].held:
                    cache_encoder_outputs(model, sets[split], compute)
        loss, norm = finetune_epoch(model, optimizer, sets["train"], compute, args, epoch, bar)
        rule, tune = keep_best(best, epoch, model, sets["tune"], compute, args)
        run.note(
            epoch=epoch,
            loss=loss,
            norm=norm if math.isfinite(norm) else None,
            tune_auroc=tune,
            case_score=rule,
            **scaling(compute, optimizer, (epoch + 1) * per_epoch),
        )
        bar.set_postfix(loss=f"{loss:.3f}", tune=f"{tune:.3f}")
        run.save(epoch + 1, model, optimizer, **best)
    bar.close()
    return best


def keep_best(best: dict, epoch: int, model, tune_set, compute, args) -> tuple[str, float]:
    """How well the model ranks the tune split, and by which rule. Where that is no worse than before, it becomes the best: of equals the later, which
    has learned longer."""
    rule, tune = best_case_score(
        tune_set.labels, finite_scores(model, tune_set, compute, args.batch_size), args.case_score
    )
    if tune >= best["best_auroc"]:
        best.update(
            best={k: v.cpu().clone() for k, v in model.state_dict().items()},
            best_auroc=tune,
            best_epoch=epoch,
            case_score=rule,
        )
    return rule, tune


def best_start(
    args, run: Run, model, optimizer, sets: dict, compute, best: dict, done: int
) -> None:
    """Give the aggregator the weights that rank the tune split best, of several random starts that learn on the frozen encoder's outputs. Attention
    that has to find what is rare among thousands of tokens finds it from some starts and not from others. best: as in `keep_best`; its epoch is -1,
    before the first. `done` starts were made before; optimizer is that of the epochs to come."""
    if model.encoder is not None:
        model.encoder.requires_grad_(False)
        cache_encoder_outputs(model, sets["tune"], compute)
    steps = args.epochs * math.ceil(len(sets["train"]) / args.batch_size)
    bar = progress(total=args.starts * steps, initial=done * steps, desc=f"starts {args.task}")
    for start in range(done, args.starts):
        if start:
            torch.manual_seed(1_000_003 * args.seed + start)
            model.reset_aggregator()
            share_state(model, compute)
        learner, reached = (
            torch.optim.AdamW(parameter_groups(model, args.weight_decay), lr=args.lr, fused=True),
            -1.0,
        )
        for epoch in range(args.epochs):
            finetune_epoch(model, learner, sets["train"], compute, args, epoch, bar)
            reached = max(reached, keep_best(best, -1, model, sets["tune"], compute, args)[1])
        run.note(start=start, tune_auroc=reached)
        run.save(0, model, optimizer, starts=start + 1, **best)
    bar.close()
    model.load_state_dict(best["best"])


def finish_finetuning(run: Run, model, sets, best: dict, args) -> None:
    """Save the best epoch's classifier, score tune and test with it, write predictions.csv and result.json."""
    model.load_state_dict(best["best"])
    sets["tune"].held.clear()  # as in a run that goes on here, lest rounding differ
    rule = CASE_SCORES[best["case_score"]]
    scores = {
        split: [
            float(rule(s)) for s in finite_scores(model, sets[split], run.compute, args.batch_size)
        ]
        for split in ("tune", "test")
    }
    if not run.writes:
        return
    dropped = sorted(i for s in sets.values() for i in s.dropped)
    if dropped:
        log(f"{len(dropped)} slides without a token to read were left out, such as {dropped[0]}")
    with whole_file(run.folder / "model.safetensors") as temporary:
        save_file({k: v.contiguous() for k, v in best["best"].items()}, temporary)
    write_csv(
        run.folder / "predictions.csv",
        ("case_id", "label", "score", "split"),
        (
            (c.case_id, c.label, score, split)
            for split in scores
            for c, score in zip(sets[split].cases, scores[split])
        ),
    )
    result = {
        "kind": "finetune",
        "task": args.task,
        "init": args.init,
        "tokens": args.tokens,
        "magnification": args.magnification,
        "seed": args.seed,
        "cases": {split: [len(v), sum(v.labels)] for split, v in sets.items()},
        "slides_left_out": dropped,
        "best_epoch": best["best_epoch"],
        "tune_auroc": best["best_auroc"],
        "case_score": best["case_score"],
        "auroc": None,
        "interval": None,
        "average_precision": None,
    }
    labels = sets["test"].labels
    if len(set(labels)) == 2:
        result.update(
            auroc=auroc(labels, scores["test"]),
            interval=interval(bootstrap_aurocs(labels, scores["test"], args.seed)),
            average_precision=float(average_precision_score(labels, scores["test"])),
        )
    else:
        result["reason"] = (
            f"the test split has {len(labels)} usable cases with labels {sorted(set(labels))}: no AUROC"
        )
    data.seal(run.folder, RUN_FILES, "result.json", result)


def finetuning_memory(model, windows: int, learns: bool) -> int:
    """Bytes that a batch of `windows` regions takes in fp32 on top of what the process holds already, in floats (4 bytes) but for the first:
    1. embeddings: float16, twice while they are put together      2. weights: 5 copies when learning (gradients, two moments, the best epoch's)
    3. the encoder on a chunk of regions: 3 inputs per token and, in each block that is kept for the way back, 9 widths and 4 SwiGLU widths; twice
       where chunks are computed again, because the C library keeps what one has freed while the next is made
    4. the aggregator, per pooled output: 8 widths (4 without an encoder) and 5 of its hidden layer; while 3 runs again, it is not there."""
    n, D, encoder = len(model.index), model.config.dim, model.encoder
    fixed = 2 * 2 * windows * n * D + (5 if learns else 1) * 4 * sum(
        p.numel() for p in model.parameters()
    )  # 1, 2
    pool = (
        4
        * windows
        * (1 if model.tokens == "cls" else n)
        * ((8 if encoder else 4) * model.head.in_features + 5 * model.pool.w.in_features)
    )  # 4
    if encoder is None:
        return fixed + pool
    block = 9 * encoder.config.width + 4 * encoder.blocks[0].mlp.w1.out_features
    chunk = (
        4
        * min(windows, model.chunk)
        * (n + encoder.config.cls_tokens)
        * (3 * D + block * (len(encoder.blocks) if learns else 1))
    )  # 3
    return fixed + (max(2 * chunk, pool) if learns and windows > model.chunk else chunk + pool)


def peak_memory() -> int:
    """The most bytes that this process held so far. On Linux not by getrusage, whose figure starts with the parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def finetuning_plan(model, sets: dict, args) -> str:
    """What the task asks for, before any training: cases, slides, regions, tokens, bytes read, and the memory of the largest batch."""
    n, D = len(model.index), model.config.dim
    lines, needs, read, largest = (
        [f"{'':8s}{'cases':>8s}{'slides':>8s}{'regions':>9s}{'tokens':>13s}{'GB':>9s}"],
        [],
        {},
        (0, "none"),
    )
    for split, dataset in sets.items():
        regions = sorted(
            (sum(len(dataset.rows[i]) for i in c.slide_ids), c.case_id) for c in dataset.cases
        )
        total = sum(w for w, _ in regions)
        read[split] = total * n * D * 2 / 1e9
        lines.append(
            f"{split:8s}{len(regions):8d}{len(dataset.rows):8d}{total:9d}{total * n:13,d}{read[split]:9.3f}"
        )
        needs.append(
            finetuning_memory(
                model, sum(w for w, _ in regions[-args.batch_size :]), split == "train"
            )
        )
        largest = max([largest, *regions])
    held = peak_memory()
    if (
        model.encoder is not None and max(args.frozen_epochs, args.starts) > 1
    ):  # frozen outputs: a region's are as large as their mean
        held += (
            4
            * model.whiten.mean.numel()
            * sum(len(rows) for split in ("train", "tune") for rows in sets[split].rows.values())
        )
    lines.append(
        f"largest case: {largest[1]}, {largest[0]} regions, {largest[0] * n:,d} tokens; alone in a batch it takes "
        f"{finetuning_memory(model, largest[0], True) / 1e9:.2f} GB"
    )
    lines.append(
        f"an epoch reads the train and the tune split, {read['train'] + read['tune']:.3f} GB; the test split is read once, at the end"
    )
    lines.append(
        f"memory: about {(held + max(needs)) / 1e9:.2f} GB in fp32 when the {args.batch_size} largest cases of a split meet in a batch, "
        f"{held / 1e9:.2f} of them held already"
    )
    return "\n".join(lines) + "\n"


def finetune_command(args) -> int:
    result = finetune(args)
    if process_rank()[0] or args.dry_run:
        return 0
    if result["auroc"] is None:
        print(f"{result['task']}: {result['reason']}")
    else:
        over = (
            "too few for an interval"
            if result["interval"] is None
            else "95% over cases: {:.3f} to {:.3f}".format(*result["interval"])
        )
        print(
            f"{result['task']}: test AUROC {result['auroc']:.3f} ({over}), average precision "
            f"{result['average_precision']:.3f}, {result['cases']['test'][0]} cases; tune AUROC {result['tune_auroc']:.3f} at epoch "
            f"{result['best_epoch'] + 1}"
        )
    return 0


# ======================================================================================== stop here
# Above stands what the paper needs. Below stands what a lab needs around it: run folders, several
# processes, exports, predictions, heatmaps, the tables and the command line.


# ---------------------------------------------------------------------------- run folder, processes


def log(*words) -> None:
    """To stderr, from the first of several processes only."""
    if process_rank()[0] == 0:
        print(*words, file=sys.stderr, flush=True)


def machine(args, width: int | None = None) -> SimpleNamespace:
    """Where, in which precision and as which of how many processes to compute: .device, .autocast(), .scaler (which does nothing
    unless in fp16), .rank and .world. Processes are those that torchrun started; they meet here. width: the model's, if not the preset's."""
    device, (rank, world), width = (
        data.find_device(args.device),
        process_rank(),
        width or getattr(mixmag.Config, args.preset)(1).width,
    )
    if device.index is not None:
        torch.cuda.set_device(device)  # lest every process opens the first GPU as well
    if world > 1 and not distributed.is_initialized():
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=30)
        )
    dtype = amp_dtype(getattr(args, "amp", "auto"), device, width)
    return SimpleNamespace(
        device=device,
        dtype=dtype,
        rank=rank,
        world=world,
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        autocast=lambda: torch.autocast(device.type, dtype) if dtype else nullcontext(),
    )


def barrier(compute) -> None:
    """All processes wait for each other here."""
    if compute.world > 1:
        distributed.barrier()


def sum_over_processes(values: torch.Tensor, compute) -> torch.Tensor:
    if compute.world > 1:
        distributed.all_reduce(values)
    return values


def stopping(compute) -> bool:
    """Whether any process was told to stop; asked by all of them at the same place, so that they stop together."""
    return bool(sum_over_processes(torch.tensor(len(data.STOP_SIGNALS)), compute))


def sum_gradients(model, compute) -> None:
    """Each process has its share of the gradient of the global batch's mean; together they have all of it."""
    if compute.world > 1:
        learning = [p for p in model.parameters() if p.requires_grad]
        flat = sum_over_processes(
            torch.cat(
                [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in learning]
            ),
            compute,
        )
        for p, gradient in zip(learning, flat.split([p.numel() for p in learning])):
            p.grad = gradient.view_as(p)


def share_state(module, compute) -> None:
    """All processes go on with the first one's."""
    if compute.world > 1:
        for tensor in module.state_dict().values():
            distributed.broadcast(tensor, 0)


RUN_FILES = (
    "config.json",
    "metrics.jsonl",
    "last.pt",
    "prev.pt",
    "SUMMARY.md",
    "curve.png",
    "model.safetensors",
    "predictions.csv",
    "encoder/config.json",
    "encoder/slides.csv",
    "encoder/model.safetensors",
)


class Run:
    """A run folder. Two starts with the same settings are one run; with other settings the second is refused. Of several processes
    the first one writes, the others only read."""

    def __init__(self, folder, config: dict, resume: str, compute):
        self.folder, self.compute, self.writes = Path(folder), compute, compute.rank == 0
        self.metrics = self.folder / "metrics.jsonl"
        if self.writes:
            self.claim(config, resume)
        barrier(compute)

    def claim(self, config: dict, resume: str) -> None:
        """Write config.json, after all of an earlier run is removed where `resume` is off. Raises OtherSettings for a run of other settings."""
        stored = self.folder / "config.json"
        if not stored.exists():
            if strange := [
                name for name in ("last.pt", "prev.pt") if (self.folder / name).exists()
            ]:
                raise MixmagError(
                    f"{self.folder} holds {strange[0]} but no config.json, so nobody knows of what; name another --out"
                )
        elif resume == "auto":
            found = data.read_json(stored)
            differing = sorted(
                k for k in found.keys() | config.keys() if found.get(k) != config.get(k)
            )
            if differing:
                raise OtherSettings(
                    f"{self.folder} holds a run with other settings: "
                    + ", ".join(
                        f"{k} {found.get(k)!r} there, {config.get(k)!r} now" for k in differing
                    )
                    + "; give another --out, or --resume off to begin anew"
                )
        else:
            for name in (
                "result.json",
                data.SUMS,
                "predict.csv",
                "predict-failed.csv",
                *reversed(RUN_FILES),
            ):
                (self.folder / name).unlink(
                    missing_ok=True
                )  # config.json last: until then this is the run that it was
            shutil.rmtree(self.folder / "heatmap", ignore_errors=True)
        data.sweep(self.folder, self.folder / "encoder")
        if not self.result():  # a finished one may be read-only
            write_json(stored, config)

    def result(self) -> dict | None:
        done = self.folder / "result.json"
        return data.read_json(done) if done.exists() else None

    def save(self, done: int, model, optimizer, **more) -> None:
        """Write last.pt; the one before stays as prev.pt. Plain types and tensors only."""
        if not self.writes:
            return
        state = {
            **more,
            "done": done,
            "lines": len(self.metrics.read_text("utf-8").splitlines()),
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": self.compute.scaler.state_dict(),
        }
        last = self.folder / "last.pt"
        with whole_file(last) as temporary:
            with open(
                temporary, "wb"
            ) as f:  # by its name torch would put that into the file, and equal runs would differ
                torch.save(state, f)
            if last.exists():
                os.replace(
                    last, self.folder / "prev.pt"
                )  # killed here, the run goes on from prev.pt

    def load(self, model, optimizer) -> dict:
        """Go on from the newest whole checkpoint, if any; nothing is unpickled, and the metrics are cut back to where it was written. Returns what
        `save` was given, {"done": 0} without one."""
        state = {"done": 0, "lines": 0}
        for path in (self.folder / "last.pt", self.folder / "prev.pt"):
            if path.exists() and "model" not in state:
                try:
                    found = torch.load(path, map_location="cpu", weights_only=True)
                    state = {**found, "done": found["done"], "lines": found["lines"]}
                    log(f"going on from {path}, {state['done']} done")
                except Exception as error:  # whatever a damaged file makes torch raise: say so, take the one before
                    log(
                        f"{path}: not a whole checkpoint, trying the one before ({(str(error) or type(error).__name__).splitlines()[0]})"
                    )
        lines = state.pop("lines")
        if self.writes:
            noted = (
                self.metrics.read_text("utf-8").splitlines(keepends=True)
                if self.metrics.exists()
                else []
            )
            write_text(self.metrics, "".join(noted[:lines]))
        if "model" in state:
            model.load_state_dict(state.pop("model"))
            optimizer.load_state_dict(state.pop("optimizer"))
            self.compute.scaler.load_state_dict(state.pop("scaler"))
        return state

    def note(self, **values) -> None:
        """One line of metrics, rounded so that it reads well; times are left out, so equal runs have equal files."""
        if not self.writes:
            return
        rounded = {k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}
        with open(self.metrics, "a", encoding="utf-8") as f:
            f.write(json.dumps(rounded, allow_nan=False) + "\n")


def settings(args, slides, *files) -> dict:
    """What decides a run's outcome: the arguments, and by their checksums the slides and any other files that it reads."""
    digest = hashlib.sha256("".join(s.meta["sha256"] for s in slides).encode("utf-8"))
    for path in files:
        digest.update(Path(path).read_bytes())
    chosen = {
        k: v
        for k, v in vars(args).items()
        if k
        not in (
            "out",
            "device",
            "workers",
            "resume",
            "save_every",
            "dry_run",
            "in_memory",
            "compile",
        )
    }
    chosen.update(
        {k: str(Path(chosen[k])) for k in ("data", "init") if chosen.get(k)}
    )  # the same folder is the same however it is spelt
    return {
        **chosen,
        "tile_encoder": slides[0].meta["encoder"],
        "inputs_sha256": digest.hexdigest(),
    }


def ensure_data(path, compute=None) -> Path:
    """The DATA folder; the default one is made on the spot, by the first process."""
    path = Path(path)
    if (
        str(path) == DEFAULT_DATA
        and not data.synthetic_facts(path).get("complete")
        and process_rank()[0] == 0
    ):
        log(
            f"{path} is not there: making the quick synthetic cohort first (data.py synth --out {path})"
        )
        data.synth_cohort(path)
    if compute is not None:
        barrier(compute)
    if not (path / "slides").is_dir():
        raise MixmagError(f"{path}: no slides folder; make one with data.py tile or data.py synth")
    return path


def apply_preset(args, kind: str) -> None:
    """Give the flags that were left out the preset's values. steps and epochs, and lr and blr, stand for each other."""
    values = dict(PRESETS[args.preset][kind])
    if getattr(args, "init", None) == "none":
        values.update(PRESETS[args.preset]["abmil"])
    length = getattr(args, "steps", None) or args.epochs
    given = {"steps": length, "epochs": length, "blr": args.lr}
    for name, value in values.items():
        if getattr(args, name) is None and given.get(name) is None:
            setattr(args, name, value)


def parameters(model) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters"


# ------------------------------------------------------------------------- measuring, export, curve


def level_table(model, dataset, mean, compute, batch_size: int = 64) -> dict:
    """predictor -> (K,) mean of 1 - cosine per magnification on the same removed tokens of every window of `dataset`: the model,
    and what needs no network. A parent of 5x and children of 20x do not exist: nan there."""
    geometry, sums = model.encoder.geometry, {}
    model.eval()
    for start in progress(range(0, len(dataset), batch_size), desc="held-out", leave=False):
        batch = data.to_device(
            dataset.__getitems__(range(start, min(start + batch_size, len(dataset)))),
            compute.device,
        )
        x, removed, valid = batch["x"], batch["removed"], batch["valid"]
        with torch.no_grad(), compute.autocast():
            kept, cls, tokens = model.encode_kept(x, removed, valid)
            predictions = {"model": model.decoder(cls, tokens, kept, removed, valid).float()}
        predictions.update(
            mixmag.trivial_predictions(geometry, x, removed, mean.to(compute.device), valid)
        )
        target = mixmag.take(x, removed).float()
        for name, pred in predictions.items():
            total, count = mixmag.level_losses(geometry, pred, target, removed, valid)
            sums[name] = sums.get(name, 0) + torch.stack([total, count]).double().cpu()
    model.train()
    losses = {name: (total / count).tolist() for name, (total, count) in sums.items()}
    losses["parent"][0] = losses["children"][-1] = math.nan
    return losses


def markdown(titles: list, rows: list) -> str:
    return "\n".join(
        [
            f"| {' | '.join(titles)} |",
            "|---" * len(titles) + "|",
            *(f"| {' | '.join(cells)} |" for cells in rows),
        ]
    )


def format_levels(losses: dict, magnifications, least: dict | None) -> str:
    """A Markdown table of `level_table`, the model last but for the least loss that a synthetic cohort allows."""
    names = {
        "mean": "mean embedding",
        "shift": "mean + the region's common shift",
        "parent": "visible parent",
        "children": "visible children",
        "neighbours": "visible neighbours",
        "model": "**mixing encoder**",
    }
    rows = [(title, losses[name]) for name, title in names.items()]
    if least:
        rows.append(("least possible (synthetic)", [least[str(m)] for m in magnifications]))
    return markdown(
        ["predictor of the removed tokens", *(f"{m}x" for m in magnifications), "all"],
        [
            [
                title,
                *(
                    "-" if math.isnan(v) else f"{v:.3f}"
                    for v in (*values, sum(values) / len(values))
                ),
            ]
            for title, values in rows
        ],
    )


def export_encoder(run: Run, encoder, slide, preset: str, seen: list) -> None:
    """RUN/encoder: weights and config, which mixmag.load_encoder reads, and which slides it saw. The config comes last: its presence says that it
    is whole."""
    folder = run.folder / "encoder"
    with whole_file(folder / "model.safetensors") as temporary:
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in encoder.state_dict().items()},
            temporary,
        )
    write_csv(folder / "slides.csv", ("slide_id", "role"), seen)
    write_json(
        folder / "config.json",
        {
            "model": encoder.config.to_dict(),
            "tile_encoder": slide.meta["encoder"],
            "preset": preset,
            "licence": "the terms of the tile encoder's outputs pass on to these weights (Virchow2: CC-BY-NC-ND 4.0)",
        },
    )


def finish_pretraining(run: Run, model, path, held_ids, directions, args, facts: dict) -> None:
    """Measure on the held-out slides beside what needs no network, draw the curve, write result.json."""
    config, cohort, losses = model.config, data.synthetic_facts(path), None
    least, data_words = cohort.get("least_mem_loss"), "synthetic cohort" if cohort else str(path)
    if held_ids:
        held = data.RegionDataset(
            data.read_slides(path, held_ids),
            config.geometry(),
            args.seed,
            args.mask,
            stride=config.region,
            min_cover=args.min_cover,
            turn=False,
        )
        if len(held):
            losses = level_table(model, held, directions, run.compute)
    text = (
        format_levels(losses, config.magnifications, least)
        if losses
        else "no held-out window: the loss was not measured on unseen slides"
    )
    write_text(
        run.folder / "SUMMARY.md",
        f"# {run.folder.name}: loss (1 - cosine) on held-out slides, {data_words}\n\n{text}\n",
    )
    draw_pretraining(run, losses, config.magnifications, least, data_words)
    plain = (
        {name: [None if math.isnan(v) else v for v in values] for name, values in losses.items()}
        if losses
        else None
    )
    data.seal(
        run.folder, RUN_FILES, "result.json", {"kind": "pretrain", **facts, "held_out": plain}
    )
    print(text)


def plot(width=6.4, height=3.6, **grid):
    """A figure and its axis, or its grid of them; matplotlib is imported where something is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(width, height), layout="constrained", **grid)
    for axis in np.ravel(axes):
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(figure, path) -> None:
    from matplotlib import pyplot

    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    pyplot.close(figure)


def draw_pretraining(run: Run, losses, magnifications, least, data_words: str) -> None:
    """RUN/curve.png: the loss of each magnification over the steps, and where the trivial predictors and the noise lie."""
    lines = [json.loads(line) for line in run.metrics.read_text("utf-8").splitlines()]
    figure, axis = plot()
    for m in magnifications:
        pairs = [(line["step"], line[f"{m}x"]) for line in lines if line[f"{m}x"] is not None]
        axis.plot(*zip(*pairs), lw=1, label=f"{m}x, training batches")
    if losses:
        for name, style, title in (
            ("mean", ":", "mean embedding"),
            ("shift", "-.", "mean + common shift"),
            ("neighbours", "--", "visible neighbours"),
            ("model", "-", "mixing encoder"),
        ):
            axis.axhline(
                np.mean(losses[name]), color="black", ls=style, lw=1, label=f"{title}, held out"
            )
    if least:
        axis.axhline(
            np.mean(list(least.values())), color="grey", lw=3, alpha=0.4, label="least possible"
        )
    axis.set(
        xlabel="optimizer step",
        ylabel="1 - cosine at removed tokens",
        title=f"{run.folder.name}, {data_words}",
    )
    axis.legend(fontsize=7, frameon=False, ncols=2)
    save_figure(figure, run.folder / "curve.png")


# ----------------------------------------------------------------------------------- predict, embed


def read_classifier(folder) -> tuple[mixmag.SlideClassifier, dict]:
    """The fine-tuned model of a run and its config."""
    folder = Path(folder)
    if not (folder / "result.json").exists() or not (folder / "model.safetensors").exists():
        raise MixmagError(
            f"{folder}: not a finished fine-tuning run (result.json and model.safetensors are wanted)"
        )
    try:
        config = data.read_json(folder / "config.json")
        model_settings = mixmag.Config.from_dict(config["model"])
        encoder = None if config["init"] == "none" else mixmag.MixingEncoder(model_settings)
        model = mixmag.SlideClassifier(
            model_settings, encoder, config["tokens"], config["magnification"], config["hidden"]
        )
        model.load_state_dict(mixmag.read_safetensors(folder / "model.safetensors"), strict=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise MixmagError(
            f"{folder}: not a whole fine-tuning run of this version ({' '.join(str(error).split())})"
        ) from None
    return model.eval(), config


def open_run(args, ids, failed: list | None = None) -> tuple:
    """A fine-tuned run and the slides `ids` (None: all) of DATA (None: the run's), each a case of its own -> model, the run's config, data set,
    machine. failed: as in data.read_slides."""
    model, config = read_classifier(args.run)
    folder = args.data or config["data"]
    compute = machine(SimpleNamespace(device=args.device, amp=config["amp"]), model.config.width)
    slides = {s.slide_id: s for s in data.read_slides(folder, ids, failed)}
    check_same_encoder(args.run, config["tile_encoder"], model.config, next(iter(slides.values())))
    cases = [data.Case(i, 0, "", [i]) for i in slides]
    dataset = data.CaseDataset(
        slides, cases, model.config.geometry(), model.index, config["min_cover"]
    )
    return model.to(compute.device), config, dataset, compute


def predict_command(args) -> int:
    failed = []
    model, config, dataset, compute = open_run(args, args.slides, failed)
    scores = score_cases(
        model, dataset, compute, 1
    )  # one slide at a time: memory is that of the largest
    out = Path(args.out or Path(args.run) / "predict.csv")
    scored = [(case.case_id, float(s[0])) for case, s in zip(dataset.cases, scores)]
    failed += [(i, "predict", "no cells, or no valid token") for i in dataset.dropped]
    failed += [
        (i, "predict", f"the score is {s}; data.py verify says which features are not finite")
        for i, s in scored
        if not math.isfinite(s)
    ]
    scored = [(i, s) for i, s in scored if math.isfinite(s)]
    write_csv(out, ("slide_id", "score"), scored)
    listed = out.with_name(f"{out.stem}-failed.csv")
    print(
        f"{len(scored)} slides scored in {out}{dataset.left_out}"
        + (
            f"; {len(failed)} could not be, see {listed}: {', '.join(i for i, *_ in failed[:5])}"
            if failed
            else ""
        )
    )
    return report_failed(listed, failed)


def output_boxes(meta: dict, geometry, tokens: str, index, corners: np.ndarray) -> tuple:
    """Where the outputs of windows lie, corners (W, 2) in cells -> level (n,), side (n,) in level-0 px, place (W, n, 2) col, row on the lattice of
    that side, and box (W, n, 4) left, top, right, bottom in level-0 px, int64: each edge is computed from the lattice's origin and rounded
    once, so that neighbours share it. n counts the tokens in `index`; `cls` has one output per region, of level 0 and R cells' side."""
    if tokens == "cls":
        level, side, place = (
            np.zeros(1, np.int64),
            np.full(1, geometry.region * meta["cell_px"]),
            corners[:, None] // geometry.region,
        )
    else:
        level, row, col = geometry.token_table().numpy()[index].T
        side, place = (
            meta["cell_px"] / 2.0**level,
            corners[:, None] * 2 ** level[:, None] + np.stack([col, row], axis=1),
        )
    edges = [np.round(np.array(meta["origin"]) + (place + i) * side[:, None]) for i in (0, 1)]
    return level, side, place, np.concatenate(edges, axis=-1).astype(np.int64)


def output_files(args, slide, region: int) -> list[tuple]:
    """(magnification, tile side in px, path) of a slide's feature files, one per magnification (`cls`: one), in folders as TRIDENT or CLAM
    name them."""
    meta, name = slide.meta, f"mixmag_{args.tokens}"
    sizes = [(m, meta["tile_px"]) for m in meta["magnifications"]]
    if args.tokens == "cls":
        sizes = [(meta["magnifications"][0], region * meta["tile_px"])]
    inside = f"features_{name}" if args.layout == "trident" else f"{name}/h5_files"
    return [
        (m, px, Path(args.out) / f"{m}x_{px}px_0px_overlap" / inside / f"{slide.slide_id}.h5")
        for m, px in sizes
    ]


def pt_files(targets: list, args) -> list[Path]:
    """What CLAM's main.py reads, in its layout."""
    return (
        [path.parents[1] / "pt_files" / f"{path.stem}.pt" for *_, path in targets]
        if args.layout == "clam"
        else []
    )


def rows_before(paths, made_by: dict) -> list[int] | None:
    """How many rows each file holds, None if one is missing. Raises MixmagError where one was made by other means."""
    import h5py  # wanted only where other tools' files are written

    counts = []
    for path in paths:
        if path.exists():
            try:
                with h5py.File(path) as f:
                    found = {k: f["features"].attrs.get(k) for k in made_by}
                    counts.append(len(f["features"]))
            except (OSError, KeyError) as error:
                raise MixmagError(
                    f"{path}: is no file of embeddings ({error}); remove it, or give another --out"
                ) from None
            if found != made_by:
                raise OtherSettings(
                    f"{path} was made with {found}, now asked for {made_by}; give another --out"
                )
    return counts if len(counts) == len(paths) else None


def open_output(
    files: ExitStack,
    target: tuple,
    slide,
    side: float,
    coords: np.ndarray,
    width: int,
    made_by: dict,
):
    """A file in TRIDENT's shape: coords (N, 2) int64, level-0 top-left corners, with the attributes that readers look for, and, returned to be
    filled, features (N, width) float32. In TRIDENT's layout the coordinates also stand in patches/, where torchmil looks for them."""
    import h5py

    (magnification, px, path), meta, power = target, slide.meta, 10 / slide.meta["mpp"]
    off = (
        px
        / meta["tile_px"]
        * abs(meta["tile_px"] * round(power) / meta["magnifications"][0] - meta["cell_px"])
    )
    power = (
        round(power) if off < 1 else power
    )  # so that the attributes agree, alike in all of a slide's files
    attributes = {
        "patch_size": px,
        "patch_size_level0": round(side),
        "level0_magnification": power,
        "target_magnification": magnification,
        "overlap": 0,
        "name": slide.slide_id,
        "level0_width": meta["width"],
        "level0_height": meta["height"],
    }
    patches = path.parents[1] / "patches" / f"{slide.slide_id}_patches.h5"
    if patches.exists():
        with h5py.File(patches) as f:
            if "coords" not in f or not np.array_equal(f["coords"][:], coords):
                raise MixmagError(
                    f"{patches} holds other coordinates (another tool's, or those of another --min-cover); give another --out"
                )
    for place in (path,) if path.parent.name == "h5_files" else (patches, path):
        f = files.enter_context(h5py.File(files.enter_context(whole_file(place)), "w"))
        f.create_dataset("coords", data=coords).attrs.update(
            attributes, savetodir=str(place.parent)
        )
    features = f.create_dataset("features", (len(coords), width), np.float32)
    features.attrs.update(name=slide.slide_id, savetodir=str(path.parent), **made_by)
    return features


def embed_slide(encoder, slide, targets, args, made_by: dict, compute) -> list[int]:
    """Write one slide's outputs, 64 regions at a time; how many rows each file holds. `cls`: one file, a row per region; `patch`: one file per
    magnification, a row per valid tile."""
    geometry = encoder.geometry
    rows, corners = data.covering_windows(slide.cells, geometry.region, args.min_cover)
    entries = geometry.cell_order().numpy()
    keep = data.token_index(slide, rows, entries)[1]
    keep = keep if args.tokens == "patch" else keep.any(axis=1, keepdims=True)
    level, side, _, box = output_boxes(slide.meta, geometry, args.tokens, slice(None), corners)
    width = encoder.config.width * (encoder.config.cls_tokens if args.tokens == "cls" else 1)
    data.require_room(
        Path(args.out), 4 * width * int(keep.sum())
    )  # HDF5 does not survive a disk that gets full
    with ExitStack() as files:
        columns, counts = [level == k for k in range(len(targets))], [0] * len(targets)
        outputs = [
            open_output(
                files, target, slide, side[c][0], box[:, c][keep[:, c]][:, :2], width, made_by
            )
            for target, c in zip(targets, columns)
        ]
        for i in range(0, len(rows), 64):
            x, valid = data.as_batch(*data.gather(slide, rows[i : i + 64], entries), compute.device)
            with torch.inference_mode(), compute.autocast():
                cls, contextual = encoder(x, valid=valid)
            made = (
                (cls.flatten(1)[:, None] if args.tokens == "cls" else contextual)
                .float()
                .cpu()
                .numpy()
            )  # (w, n or 1, d)
            if not np.isfinite(made[keep[i : i + 64]]).all():
                raise MixmagError(
                    f"{slide.path}: its outputs are not finite; data.py verify says which features are not"
                )
            for k, c in enumerate(columns):
                part = made[:, c][keep[i : i + 64, c]]
                outputs[k][counts[k] : counts[k] + len(part)] = part
                counts[k] += len(part)
        for path, features in zip(pt_files(targets, args), outputs):
            with (
                whole_file(path) as temporary,
                open(temporary, "wb") as f,
            ):  # not by its name, which torch would write, too
                torch.save(torch.from_numpy(features[:]), f)
    return counts


def embed_command(args) -> int:
    """What an earlier start wrote with the same encoder from the same slides stays; files made by other means are refused."""
    empty, failed, totals, used, there_are = [], [], 0, 0, 0
    slides = data.read_slides(ensure_data(args.data), args.slides, failed)
    encoder = read_encoder(args.init, slides)
    made_by = {
        "encoder": f"mixmag_{args.tokens}",
        "mixmag_encoder_sha256": data.file_sha256(encoder_folder(args.init) / "model.safetensors"),
        "mixmag_min_cover": args.min_cover,
    }
    compute, R = machine(args, encoder.config.width), encoder.geometry.region
    encoder.to(compute.device)
    for slide in progress(slides, desc="embed"):
        targets, by = (
            output_files(args, slide, R),
            {**made_by, "mixmag_slide_sha256": slide.meta["sha256"]},
        )
        try:
            counts = rows_before([path for *_, path in targets], by)
            if counts is None or not all(map(Path.exists, pt_files(targets, args))):
                counts = embed_slide(encoder, slide, targets, args, by, compute)
        except OtherSettings:
            raise
        except (MixmagError, OSError) as error:
            failed.append((slide.slide_id, "embed", str(error)))
            log(f"{slide.slide_id}: FAILED: {error}")
            continue
        totals, there_are = np.add(totals, counts), there_are + len(slide.cells)
        used += (data.covering_windows(slide.cells, R, args.min_cover)[0] >= 0).sum()
        empty += [slide.slide_id] * (not sum(counts))
    units = (
        ["regions"] if args.tokens == "cls" else [f"at {m}x" for m in encoder.config.magnifications]
    )
    shown = ", ".join(f"{n} {unit}" for n, unit in zip(np.atleast_1d(totals), units))
    print(
        f"{len(slides) - sum(stage == 'embed' for _, stage, _ in failed)} slides, {args.tokens} outputs in {args.out}: {shown}"
        + (
            f"; {len(empty)} slides have no tissue, so their files hold no rows: "
            f"{', '.join(empty[:5])}"
            if empty
            else ""
        )
        + (f"; {len(failed)} failed, see {args.out}/failed.csv" if failed else "")
        + data.describe_uncovered(used, there_are)
    )
    return report_failed(Path(args.out) / "failed.csv", failed)


# ------------------------------------------------------------------------------------------ heatmap


def attention_table(model, dataset, compute) -> tuple[SimpleNamespace, float]:
    """The only slide of `dataset` through the model -> what it pooled, in its own order, and the slide's score. Arrays of length T: level, side,
    place (T, 2), box (T, 4) as in `places`; window, region (T, 2) its place; weight, which sums to 1; rank, the share of the slide's weights of the
    same level that are no larger (ties share their mean); and .cells, (T, R*R) rows of slide.cells that each one's region holds, or -1."""
    (case,), geometry, cls = dataset.cases, model.config.geometry(), model.tokens == "cls"
    slide, batch = (
        dataset.slides[case.case_id],
        data.to_device(dataset.__getitems__([0]), compute.device),
    )
    with torch.no_grad(), compute.autocast():
        logit, attention = model(batch["x"], batch["regions"], batch["valid"])
    rows, corners = dataset.rows[case.case_id], dataset.corners[case.case_id]
    level, side, place, box = output_boxes(
        slide.meta, geometry, model.tokens, model.index.cpu().numpy(), corners
    )
    keep = (
        np.ones((len(rows), 1), bool) if cls else data.token_index(slide, rows, dataset.entries)[1]
    )
    window, token = keep.nonzero()  # window by window, as the model pools them
    weight, rank, level = attention.double().cpu().numpy(), np.empty(len(window)), level[token]
    if not np.isfinite(weight).all():
        raise MixmagError(
            f"{slide.path}: the attention is not finite; data.py verify says which features are not"
        )
    for k in np.unique(level):
        rank[level == k] = stats.rankdata(weight[level == k]) / (level == k).sum()
    return SimpleNamespace(
        level=level,
        side=side[token],
        place=place[keep],
        box=box[keep],
        window=window,
        region=corners[window] // geometry.region,
        weight=weight,
        rank=rank,
        cells=rows[window],
    ), float(torch.sigmoid(logit.double()))


def slide_picture(reader, box, width: int) -> np.ndarray:
    """(h, width, 3) uint8 of a box of a slide, in level-0 px, over white; read in bands, so that memory does not grow with the slide."""
    left, top, right, bottom = box
    height, level = (
        max(1, round(width * (bottom - top) / (right - left))),
        reader.level_for((right - left) / width),
    )
    step, bands = max(1, round(512 * reader.downsamples[level] * width / (right - left))), []
    for start in range(0, height, step):
        rows = min(step, height - start)
        band = (
            left,
            top + (bottom - top) * start / height,
            right,
            top + (bottom - top) * (start + rows) / height,
        )
        try:
            part, within = reader.read(level, band)
            bands.append(
                np.asarray(part.resize((width, rows), data.Image.Resampling.BOX, box=within))
            )
        except data.openslide.OpenSlideError as error:
            log(
                f"{reader.path}: rows {band[1]:.0f} to {band[3]:.0f} cannot be read and are drawn grey ({error})"
            )
            bands.append(np.full((rows, width, 3), 128, np.uint8))
    return np.concatenate(bands)


def lattice(
    meta: dict, place: np.ndarray, side: float, value, empty: float
) -> tuple[np.ndarray, tuple]:
    """A picture of one pixel per place (n, 2) of a lattice, `empty` elsewhere, and its extent (left, right, bottom, top) in level-0 px."""
    first = place.min(axis=0)
    grid = np.full((place.max(axis=0) - first + 1)[::-1], empty)
    grid[tuple((place - first).T[::-1])] = value
    left, top = np.array(meta["origin"]) + first * side
    return grid, (left, left + grid.shape[1] * side, top + grid.shape[0] * side, top)


def draw_attention(path, table, level: int, slide, ground: tuple, view, title: str) -> None:
    """One map: the rank of each token of a level (of each region, on its cells) over `ground`, a grey picture and its extent. No blur, and nothing
    where the slide has no cell."""
    here, meta, um = table.level == level, slide.meta, slide.meta["mpp"]  # axes in um
    place, side, rank = table.place[here], table.side[here][0], table.rank[here]
    if side > meta["cell_px"]:
        inside = table.cells >= 0
        place, side, rank = (
            slide.cells[table.cells[inside]],
            meta["cell_px"],
            np.repeat(rank, inside.sum(axis=1)),
        )
    (left, top, right, bottom), size = np.array(view) * um, np.array(view[2:]) - view[:2]
    inches = (
        np.clip(4 * size.max() / side / 130, 6, 24) * size / size.max()
    )  # about four pixels per token, within reason
    figure, axis = plot(max(inches[0] + 1.2, 5), inches[1] + 1)
    axis.imshow(
        ground[0], cmap="gray", vmin=-255, vmax=255, extent=np.array(ground[1]) * um
    )  # pale, so that the colours keep their meaning
    grid, extent = lattice(meta, place, side, rank, np.nan)
    shown = axis.imshow(
        grid,
        cmap="inferno",
        vmin=0,
        vmax=1,
        alpha=0.7,
        interpolation="nearest",
        extent=np.array(extent) * um,
    )
    figure.colorbar(shown, shrink=0.8, label="rank percentile of attention")
    axis.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[])
    data.scale_bar(axis, right - left)
    axis.set_title(title, fontsize=8, parse_math=False)
    figure.supxlabel(REMARK, fontsize=7)
    save_figure(figure, path)


def draw_regions(path, table, labels: list, slide, reader, side: float) -> None:
    """The six regions of the highest summed attention, a column each: the region, and for each magnification its tile of most attention, marked
    in the region. side: of a region, level-0 px."""
    total = np.bincount(table.window, table.weight)
    best = np.argsort(-total, kind="stable")[:6]
    levels = np.unique(table.level) if labels else []
    figure, axes = plot(
        2.3 * len(best) + 0.3,
        2.5 * (len(levels) + 1),
        nrows=len(levels) + 1,
        ncols=len(best),
        squeeze=False,
    )

    def show(axis, box, title, colour):
        box = np.clip(box, 0, [slide.meta["width"], slide.meta["height"]] * 2)
        axis.imshow(slide_picture(reader, box, 400), extent=(box[0], box[2], box[3], box[1]))
        axis.set(xticks=[], yticks=[])
        axis.set_title(title, fontsize=8, parse_math=False)
        axis.spines[:].set(visible=True, color=colour, linewidth=2)

    for column, window in zip(axes.T, best):
        here = np.flatnonzero(table.window == window)
        start = np.array(slide.meta["origin"]) + table.region[here[0]] * side
        show(
            column[0],
            np.round([*start, *(start + side)]),
            f"region {table.region[here[0]].tolist()}: {total[window]:.2%} of attention",
            "grey",
        )
        for axis, level, colour in zip(
            column[1:], levels, itertools.cycle(("tab:cyan", "yellow", "black", "white"))
        ):
            tokens = here[table.level[here] == level]
            if not len(tokens):
                axis.axis("off")
                continue
            token = tokens[table.weight[tokens].argmax()]
            left, top, right, bottom = table.box[token]
            show(axis, table.box[token], f"{labels[level]}: {table.weight[token]:.3%}", colour)
            column[0].plot(
                [left, right, right, left, left],
                [top, top, bottom, bottom, top],
                color=colour,
                lw=1.5,
            )
    save_figure(figure, path)


def qupath_features(table, level: int, label: str, slide_id: str, run: str, offset) -> dict:
    """GeoJSON that QuPath draws as detections: one closed rectangle per token, in pixels of the image less `offset`, because QuPath cuts a slide
    to its openslide.bounds; weight and rank as measurements and the rank as colour. Ids follow from run, slide and place."""
    import matplotlib

    colours = (255 * matplotlib.colormaps["inferno"](table.rank)[:, :3]).round().astype(int)
    features = []
    for i in np.flatnonzero(table.level == level):
        (left, top, right, bottom), (col, row) = (
            (table.box[i] - [*offset, *offset]).tolist(),
            table.place[i].tolist(),
        )
        features.append(
            {
                "type": "Feature",
                "id": str(
                    uuid.uuid5(uuid.NAMESPACE_URL, f"mixmag:{run}:{slide_id}:{label}:{col}:{row}")
                ),
                "geometry": {
                    "type": "Polygon",
                    "coordinates": [
                        [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
                    ],
                },
                "properties": {
                    "objectType": "detection",
                    "name": f"{label} {col}, {row}",
                    "color": colours[i].tolist(),
                    "classification": {"name": f"mixmag {label}", "color": [128, 128, 128]},
                    "measurements": {
                        "attention": float(table.weight[i]),
                        "attention rank": float(table.rank[i]),
                        "region column": int(table.region[i, 0]),
                        "region row": int(table.region[i, 1]),
                    },
                },
            }
        )
    return {
        "type": "FeatureCollection",
        "features": features,
        "metadata": {
            "made_by": "mixmag heatmap",
            "run": run,
            "slide_id": slide_id,
            "map": label,
            "bounds_subtracted": list(offset),
            "coordinates": "level-0 pixels less bounds_subtracted (openslide.bounds-x, -y)",
            "remark": REMARK,
        },
    }


REMARK = "attention says what the model weighed in its sum, not why: it is no evidence of causality"


def draw_maps(
    out: Path, table, slide, labels: list, reader, bounds: tuple, side: float, title: str
) -> None:
    """A picture per magnification, and of the top regions where the slide itself (`reader`) is at hand. bounds: what is drawn, side: of a
    region, level-0 px. labels: the names of the levels, "regions" where regions were pooled."""
    left, top, right, bottom = bounds
    tokens = labels != ["regions"]
    ground = lattice(slide.meta, slide.cells, slide.meta["cell_px"], 120, 255)
    if reader:
        ground = slide_picture(reader, bounds, 1600).mean(axis=2), (left, right, bottom, top)
    for k in np.unique(table.level):
        draw_attention(
            out / f"attention-{labels[k]}.png",
            table,
            k,
            slide,
            ground,
            bounds,
            f"{slide.slide_id}\n{labels[k]}: rank percentile of attention within slide{' and magnification' * tokens}\n{title}",
        )
    if reader:
        draw_regions(out / "regions.png", table, labels if tokens else [], slide, reader, side)


def check_same_image(reader, slide, table) -> None:
    """Raises MixmagError for an image that cannot be this slide's; a log line for another file that may be."""
    meta, size, (mpp, *_, words) = (
        slide.meta,
        reader.slide.dimensions,
        data.stated_mpp(reader.slide.properties),
    )
    made_by, said = (
        meta.get("settings", {}),
        f"--image {reader.path} has {size} pixels, {slide.slide_id} ",
    )
    if meta.get("size_known", True):
        if size != (meta["width"], meta["height"]):
            raise MixmagError(
                f"{said}was tiled from {(meta['width'], meta['height'])}: not the same slide"
            )
    elif (table.box[:, :2] >= size).any():
        raise MixmagError(
            f"{said}has a tile at {table.box[:, :2].max(axis=0).tolist()}: not the same slide, or imported with another --mpp"
        )
    if (
        made_by.get("tool") == "stamp" and mpp and abs(mpp - meta["mpp"]) > 0.02 * mpp
    ):  # micrometres became pixels by it
        raise MixmagError(
            f"{said}was imported at {meta['mpp']:.4g} um/px, the image says {words}: import it with --mpp {mpp:.4g}"
        )
    if made_by.get("source_bytes", reader.path.stat().st_size) != reader.path.stat().st_size:
        log(
            f"WARNING: {reader.path} has the right size but is another file than {slide.slide_id} was tiled from: a copy, or another slide"
        )


def heatmap_command(args) -> int:
    """CSV and GeoJSON come first: they need no pixel, so that an image that cannot be read costs nothing but the pictures."""
    model, config, dataset, compute = open_run(args, [args.slide])
    if dataset.dropped:
        raise MixmagError(
            f"{args.slide} has no cells (no tissue, or in no window as much as --min-tissue asks): there is nothing to draw"
        )
    slide, run, out = (
        dataset.slides[args.slide],
        Path(args.run).resolve().name,
        Path(args.out or Path(args.run) / "heatmap" / args.slide),
    )
    meta, reader = slide.meta, data.Reader(args.image) if args.image else None
    table, score = attention_table(model, dataset, compute)
    if reader:
        check_same_image(reader, slide, table)
        meta["width"], meta["height"] = reader.slide.dimensions  # import may not have known them
    whole, said = (0, 0, meta["width"], meta["height"]), reader.slide.properties if reader else {}
    x, y, width, height = (
        int(said.get(f"openslide.bounds-{k}", v))
        for k, v in zip(("x", "y", "width", "height"), whole)
    )
    names = [config["magnification"]] if config["tokens"] == "cls" else meta["magnifications"]
    labels, levels = (
        ["regions"] if config["tokens"] == "cls" else [f"{m}x" for m in names],
        np.unique(table.level),
    )
    write_csv(
        out / "attention.csv",
        (
            "magnification",
            "col",
            "row",
            "x",
            "y",
            "side",
            "region_col",
            "region_row",
            "attention",
            "rank",
        ),
        (
            (names[k], *place, *box[:2], side, *region, weight, rank)
            for k, place, box, side, region, weight, rank in zip(
                table.level,
                table.place,
                table.box,
                table.side,
                table.region,
                table.weight,
                table.rank,
            )
        ),
    )
    for k in levels:
        features = qupath_features(
            table,
            k,
            labels[k],
            args.slide,
            run,
            (x, y) if reader else [round(v) for v in meta["origin"]],
        )
        write_text(out / f"attention-{labels[k]}.geojson", json.dumps(features, allow_nan=False))
    rule = data.read_json(Path(args.run) / "result.json")["case_score"]
    print(
        f"{args.slide}: score {score:.4f}; a case's score is the {rule} over its slides\n"
        f"{len(table.weight)} weights in {out}/attention.csv; .geojson and .png of "
        + ", ".join(labels[k] for k in levels)
        + ("" if reader else "; no --image, so no top regions")
        + f"\n{REMARK}"
    )
    draw_maps(
        out,
        table,
        slide,
        labels,
        reader,
        (x, y, x + width, y + height),
        model.config.region * meta["cell_px"],
        f"run {run}, score {score:.3f}",
    )
    return 0


# ------------------------------------------------------------------------------------- tables, demo

TASK_TITLES = {
    "breast_cdh1": "Breast CDH1",
    "bladder_fgfr": "Bladder FGFR",
    "colon_msi": "Colon MSI",
    "endometrial_pten": "Endo PTEN",
    "gastric_her2": "Gastric HER2",
    "lung_egfr": "Lung EGFR",
    "skin_braf": "Skin BRAF",
}
PAPER = {  # AUROC x 100 as printed in tables 1 (Patch, and AB-MIL) and 2 (CLS): seven tasks in TASK_TITLES' order, and the average
    "abmil-5": (94.7, 82.8, 96.6, 81.9, 79.5, 79.2, 86.5, 85.9),
    "abmil-10": (95.7, 84.4, 97.3, 81.6, 82.5, 80.0, 63.4, 83.6),
    "abmil-20": (93.1, 83.0, 97.8, 83.6, 82.3, 79.2, 85.5, 86.3),
    "abmil-all": (90.9, 84.7, 98.0, 82.1, 83.1, 78.6, 88.9, 86.6),
    "random-5-patch": (94.3, 86.9, 95.8, 85.0, 78.2, 76.8, 85.3, 86.0),
    "random-10-patch": (91.9, 86.6, 96.1, 86.3, 74.9, 78.3, 89.1, 86.2),
    "random-20-patch": (97.3, 86.3, 96.8, 85.8, 66.5, 78.5, 95.8, 86.7),
    "random-all-patch": (96.6, 81.5, 97.8, 85.4, 75.0, 78.4, 94.1, 87.0),
    "mem-0.25-patch": (97.4, 88.9, 98.2, 85.9, 81.7, 84.4, 94.5, 90.1),
    "mem-0.50-patch": (96.1, 88.3, 98.7, 86.0, 86.9, 82.1, 93.3, 90.2),
    "mem-0.75-patch": (97.4, 88.8, 98.2, 85.5, 82.3, 81.6, 93.9, 89.7),
    "cmem-3-patch": (97.0, 88.6, 97.7, 84.7, 82.6, 83.7, 93.7, 89.7),
    "cmem-7-patch": (96.8, 89.3, 98.2, 85.9, 86.7, 81.4, 95.6, 90.5),
    "cmem-11-patch": (97.0, 88.6, 98.2, 86.0, 79.0, 81.2, 95.6, 89.4),
    "random-5-cls": (89.1, 86.5, 95.5, 86.5, 78.7, 76.3, 85.5, 85.4),
    "random-10-cls": (93.1, 83.4, 96.5, 84.2, 78.5, 78.3, 91.5, 86.5),
    "random-20-cls": (95.6, 85.5, 97.5, 84.2, 80.5, 77.5, 94.7, 87.9),
    "random-all-cls": (96.1, 82.9, 95.3, 83.8, 80.6, 77.9, 95.2, 87.4),
    "mem-0.25-cls": (94.7, 87.9, 98.2, 85.4, 85.8, 83.5, 95.2, 90.1),
    "mem-0.50-cls": (95.5, 89.5, 96.5, 84.9, 84.8, 82.6, 89.9, 89.1),
    "mem-0.75-cls": (95.8, 88.2, 97.9, 85.7, 77.0, 79.6, 94.3, 88.4),
    "cmem-3-cls": (72.9, 77.9, 97.0, 77.9, 61.9, 75.0, 86.7, 78.5),
    "cmem-7-cls": (95.0, 83.4, 98.3, 85.4, 76.5, 80.1, 83.2, 86.0),
    "cmem-11-cls": (91.8, 83.7, 97.2, 85.7, 74.7, 80.4, 89.5, 86.1),
}


def train_row(row: str, task: str, seed: int, args) -> dict:
    """One cell of a table: the two commands that make it, run here, each skipped where it is done. Returns finetune's result."""

    def flag(name):  # where the table was given one
        return (
            []
            if getattr(args, name) is None
            else [f"--{name.replace('_', '-')}", str(getattr(args, name))]
        )

    method, setting, *tokens = row.split("-")
    base = [
        "--data",
        args.data,
        "--seed",
        str(seed),
        "--device",
        args.device,
        "--preset",
        args.preset,
    ]
    seed_folder, init, magnification = Path(args.out) / f"seed-{seed}", method, "all"
    if method in ("mem", "cmem"):
        init = str(seed_folder / f"{method}-{setting}")
        mask = ["--mask", setting] if method == "mem" else ["--mask", "0.5", "--source", setting]
        pretrain(parse(["pretrain", *base, *mask, "--out", init, *flag("steps")]))
    else:
        init, magnification = ("none" if method == "abmil" else "random"), setting
    return finetune(
        parse(
            [
                "finetune",
                *base,
                "--task",
                task,
                "--init",
                init,
                "--magnification",
                magnification,
                "--tokens",
                *(tokens or ["patch"]),
                "--out",
                str(seed_folder / f"{task}-{row}"),
                *flag("epochs"),
                *flag("frozen_epochs"),
                *flag("starts"),
            ]
        )
    )


def full_title(row: str) -> str:
    return row_title(row) + {"cls": ", CLS", "patch": ", Patch"}.get(row.split("-")[-1], "")


def row_title(row: str) -> str:
    method, setting, *_ = row.split("-")
    x = "" if setting == "all" else "x"
    return {
        "abmil": f"AB-MIL {setting}{x}",
        "random": f"Random {setting}{x}",
        "mem": f"MEM {setting}",
        "cmem": f"CMEM {setting}x{setting}",
    }[method]


def read_results(folder) -> SimpleNamespace:
    """What `table` wrote: .rows, .tasks, .seeds, .runs {(row, task): results.csv's lines, by seed}, .labels {task: (cases,)}, .scores {(row, task):
    (seeds, cases)} of the test cases, nan where a run left one out, .machine. Everything that the tables say follows from these."""
    folder = Path(folder)
    lines = [
        {
            **line,
            "auroc": float(line["auroc"]) if line["auroc"] else None,
            "seed": int(line["seed"]),
        }
        for line in data.read_csv(folder / "results.csv", RESULTS)
    ]
    rows, tasks, seeds = (
        list(dict.fromkeys(line[k] for line in lines)) for k in ("row", "task", "seed")
    )
    runs = {
        (row, task): [line for line in lines if (line["row"], line["task"]) == (row, task)]
        for row in rows
        for task in tasks
    }
    columns = [f"{row} {seed}" for row in rows for seed in seeds]
    cases = data.read_csv(folder / "scores.csv", ("task", "label", *columns))
    labels = {
        task: np.array([int(c["label"]) for c in cases if c["task"] == task]) for task in tasks
    }
    scores = {
        (row, task): np.array(
            [
                [float(c[f"{row} {seed}"] or "nan") for c in cases if c["task"] == task]
                for seed in seeds
            ]
        )
        for row in rows
        for task in tasks
    }
    machine = data.read_json(folder / "machine.json")
    return SimpleNamespace(
        rows=rows,
        tasks=tasks,
        seeds=seeds,
        runs=runs,
        labels=labels,
        scores=scores,
        machine=machine,
    )


def resampled(labels, scores, number: int) -> tuple:
    """labels (cases,), scores (seeds, cases) of a row on a task -> the mean AUROC over seeds, (resamples,) times with the cases drawn again,
    and which cases have a score. Seeded by the task's number, so that all rows and seeds share the resamples and differences are paired.
    None for no AUROC."""
    known = ~np.isnan(scores).any(axis=0)
    samples = [bootstrap_aurocs(labels[known], s[known], number) for s in scores]
    return (None if any(s is None for s in samples) else np.mean(samples, axis=0)), known.tolist()


def format_table(rows, tasks, runs: dict, draws: dict) -> str:
    """A Markdown table of mean AUROC x 100 over seeds; runs as in `read_results`, draws[row, task] of `resampled`."""
    titles = [
        "",
        *(TASK_TITLES.get(t, t) for t in tasks),
        "average, 95 % over cases",
        "spread over seeds",
        "average precision",
        "tasks",
        "paper, these tasks",
    ]
    lines = []
    title = (
        row_title if len({row.endswith("-cls") for row in rows}) == 1 else full_title
    )  # say the outputs where they differ
    for row in rows:
        found = {t: [r["auroc"] for r in runs[row, t]] for t in tasks}
        known = {t: v for t, v in found.items() if None not in v}
        values, drawn = (
            100 * np.array(list(known.values())),
            [draws[row, t][0] for t in known],
        )  # (tasks, seeds)
        average = f"**{values.mean():.1f}**" if known else "n/a"
        if known and all(d is not None for d in drawn):
            average += " ({:.1f} to {:.1f})".format(
                *(100 * v for v in interval(np.mean(drawn, axis=0)))
            )
        spread = f"{values.mean(axis=0).std(ddof=1):.1f}" if known and values.shape[1] > 1 else "-"
        precision = [100 * float(r["average_precision"]) for t in known for r in runs[row, t]]
        printed = [PAPER[row][list(TASK_TITLES).index(t)] for t in tasks if t in TASK_TITLES]
        lines.append(
            [
                title(row),
                *(f"{100 * np.mean(known[t]):.1f}" if t in known else "n/a" for t in tasks),
                average,
                spread,
                f"{np.mean(precision):.1f}" if precision else "n/a",
                f"{len(known)} of {len(tasks)}",
                f"{np.mean(printed):.1f}" if len(printed) == len(tasks) else "-",
            ]
        )
    return markdown(titles, lines)


PAIRS = (
    ("mem-0.50-patch", "abmil-20"),
    ("mem-0.50-patch", "random-all-patch"),
    ("mem-0.50-cls", "abmil-20"),
    ("mem-0.50-cls", "random-all-cls"),
    ("mem-0.50-patch", "mem-0.50-cls"),
    ("cmem-7-patch", "mem-0.50-patch"),
    ("random-all-patch", "abmil-20"),
    ("abmil-all", "abmil-20"),
)


def two_sided(differences: np.ndarray) -> float:
    """The chance, by bootstrap, of a difference this far from nothing."""
    return min(
        1.0,
        2 * (1 + min((differences <= 0).sum(), (differences >= 0).sum())) / (1 + len(differences)),
    )


def holm(p: dict) -> dict:
    """The p-values of a family, corrected for its size (Holm 1979)."""
    corrected, limit = {}, 0.0
    for place, i in enumerate(sorted(p, key=p.get)):
        limit = corrected[i] = max(limit, min(1.0, p[i] * (len(p) - place)))
    return corrected


def mean_auroc(runs: list) -> float:
    """Over the seeds."""
    return np.mean([r["auroc"] for r in runs])


def format_pairs(rows, tasks, runs: dict, draws: dict) -> str:
    """A Markdown table of differences in AUROC x 100 between rows on the same test cases, by paired bootstrap over cases; p-values of a pair are
    corrected over its tasks by Holm's method. A star says that the two can be told apart."""
    titles = [
        "difference",
        *(TASK_TITLES.get(t, t) for t in tasks),
        "mean, 95 % over cases",
        "told apart",
    ]
    lines = []
    for one, other in PAIRS:
        pairs = (
            {t: (draws[one, t], draws[other, t]) for t in tasks}
            if {one, other} <= set(rows)
            else {}
        )
        drawn = {
            t: 100 * (a - b)
            for t, ((a, cases), (b, same)) in pairs.items()
            if a is not None and b is not None and cases == same
        }
        if drawn:
            p = holm({t: two_sided(d) for t, d in drawn.items()})
            found = {
                t: 100 * (mean_auroc(runs[one, t]) - mean_auroc(runs[other, t])) for t in drawn
            }
            cells = [
                f"{found[t]:+.1f}" + ("*" if p[t] < 0.05 else "") if t in p else "n/a"
                for t in tasks
            ]
            mean = np.mean(list(drawn.values()), axis=0)
            low, high = interval(mean)
            average = f"{np.mean(list(found.values())):+.1f} ({low:+.1f} to {high:+.1f})"
            told = f"on {sum(v < 0.05 for v in p.values())} of {len(p)} tasks; the mean: "
            told += "yes" if two_sided(mean) < 0.05 else "not distinguishable"
            lines.append([f"{full_title(one)} - {full_title(other)}", *cells, average, told])
    return markdown(titles, lines) if lines else ""


RESULTS = (
    "row",
    "task",
    "seed",
    "auroc",
    "low",
    "high",
    "average_precision",
    "tune_auroc",
    "best_epoch",
    "case_score",
)


def tables(args, rows, tasks) -> tuple[str, int]:
    """Run what is missing, write OUT/results.csv, scores.csv and machine.json -> what they say as Markdown, and how many cells there is nothing of.
    Raises MixmagError, and writes nothing, where runs of other settings are in the way, or no cell could be had."""
    path, out, began = Path(args.data), Path(args.out), time.time()
    results, scores, rows, tasks, refused = (
        [],
        {},
        list(dict.fromkeys(rows)),
        list(dict.fromkeys(tasks)),
        None,
    )
    for seed, row, task in itertools.product(range(args.seed, args.seed + args.seeds), rows, tasks):
        try:
            result = train_row(row, task, seed, args)
        except (
            MixmagError
        ) as error:  # the other cells do not suffer for this one, which the table shows as n/a
            if (
                isinstance(error, OtherSettings) or process_rank()[1] > 1
            ):  # of several processes some may have gone on
                raise
            log(f"{task} {row}: {error}")
            result, refused = {}, error
        low, high = result.get("interval") or (None, None)
        results.append({**result, "row": row, "task": task, "seed": seed, "low": low, "high": high})
        if result and process_rank()[0] == 0:
            for case in data.read_csv(
                out / f"seed-{seed}" / f"{task}-{row}" / "predictions.csv",
                ("case_id", "label", "score", "split"),
            ):
                if case["split"] == "test":
                    scores.setdefault((task, case["case_id"], case["label"]), {})[
                        f"{row} {seed}"
                    ] = f"{float(case['score']):.9g}"
    missing = sum("kind" not in r for r in results)
    if process_rank()[0]:
        return "", 0  # the first one says it
    if not scores:
        raise MixmagError(
            f"no cell of the table could be had; the last one: {refused or 'its test split has no case'}"
        )
    write_csv(out / "results.csv", RESULTS, [[r.get(k) for k in RESULTS] for r in results])
    columns = list(dict.fromkeys(f"{r['row']} {r['seed']}" for r in results))
    write_csv(
        out / "scores.csv",
        ("task", "case_id", "label", *columns),
        [(*case, *(found.get(c) for c in columns)) for case, found in scores.items()],
    )
    earlier = (
        data.read_json(out / "machine.json")["seconds"] if (out / "machine.json").exists() else 0
    )  # of starts before this one
    write_json(
        out / "machine.json",
        {**machine_facts(args, path), "seconds": round(time.time() - began + earlier)},
    )
    return format_results(out), missing


def machine_facts(args, path) -> dict:
    """Where a table's figures come from."""
    import platform
    import subprocess

    asked = ["git", "rev-parse", "--short", "HEAD"]
    commit = (
        subprocess.run(
            asked, cwd=Path(__file__).parent, capture_output=True, text=True
        ).stdout.strip()
        if shutil.which("git")
        else ""
    )
    cpu = (
        re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        if Path("/proc/cpuinfo").exists()
        else None
    )
    facts = data.synthetic_facts(path)
    return {
        "data": f"synthetic cohort, seed {facts['seed']}" if facts else str(path),
        "preset": args.preset,
        "steps": args.steps,
        "epochs": args.epochs,
        "frozen_epochs": args.frozen_epochs,
        "starts": args.starts,
        "commit": commit or None,
        "processor": cpu[1] if cpu else platform.processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
    }


def format_results(folder) -> str:
    """Both tables and their paired comparisons as Markdown, from the files that `tables` wrote."""
    found = read_results(folder)
    draws = {
        (row, task): resampled(found.labels[task], found.scores[row, task], i)
        for row in found.rows
        for i, task in enumerate(found.tasks)
    }
    count, m = len(found.seeds), found.machine
    text = (
        f"AUROC x 100 on the test cases, {m['data']}, {m['preset']} preset, mean over {count} seed{'s' * (count > 1)}. "
        "The last column is the paper's, on its own (private) data."
    )
    for title, wanted in (
        (
            "Table 1: contextualized outputs (Patch)",
            [r for r in found.rows if not r.endswith("-cls")],
        ),
        ("Table 2: compressed outputs (CLS)", [r for r in found.rows if r.endswith("-cls")]),
    ):
        if wanted:
            text += f"\n\n## {title}\n\n" + format_table(wanted, found.tasks, found.runs, draws)
    if pairs := format_pairs(found.rows, found.tasks, found.runs, draws):
        text += (
            "\n\n## Differences on the same test cases\n\nPaired bootstrap over cases; * told apart at 0.05 after Holm's correction over "
            f"the tasks.\n\n{pairs}"
        )
    return text + "\n"


def table_command(args) -> int:
    path = ensure_data(args.data, machine(args))
    here = {"all", *map(str, data.read_slides(path)[0].meta["magnifications"])}
    rows = args.rows or [
        r for r in PAPER if not r.startswith(("abmil", "random")) or r.split("-")[1] in here
    ]
    tasks = args.tasks or sorted(
        data.task_names(path), key=lambda t: [*TASK_TITLES, t].index(t)
    )  # the paper's in its order, then others
    if unknown := [r for r in rows if r not in PAPER] or [
        t for t in tasks if t not in data.task_names(path)
    ]:
        raise MixmagError(
            f"{unknown[0]}: no such row or task; rows are {', '.join(PAPER)}; tasks are {', '.join(data.task_names(path))}"
        )
    text, missing = tables(args, rows, tasks)
    if process_rank()[0] == 0:
        write_text(Path(args.out) / "SUMMARY.md", "# The paper's tables, run here\n\n" + text)
        print(text)
    return 3 if missing else 0


DEMO_ROWS, DEMO_TASK = (
    ("abmil-20", "abmil-all", "random-all-patch", "mem-0.50-patch", "mem-0.50-cls"),
    "gastric_her2",
)  # learned in 1400 steps


def demo_command(args) -> int:
    """The story in small: a cohort, one pretraining run, five rows of the tables on one task, a table and a figure."""
    began, out = time.time(), Path(args.out)
    args = parse(
        [
            "table",
            "--data",
            args.data,
            "--out",
            args.out,
            "--seed",
            str(args.seed),
            "--device",
            args.device,
            "--steps",
            "1400",
            "--epochs",
            "14",
        ]
    )
    data.read_task(ensure_data(args.data, machine(args)), DEMO_TASK)
    text, _ = tables(args, DEMO_ROWS, [DEMO_TASK])
    if process_rank()[0]:
        return 0
    pretraining = (out / f"seed-{args.seed}" / "mem-0.50" / "SUMMARY.md").read_text("utf-8")
    write_text(out / "SUMMARY.md", f"# Demo\n\n{text}\n{pretraining.replace('# ', '## ', 1)}")
    draw_demo(out)
    print(text)
    print(
        f"{pretraining}\nin {time.time() - began:.0f} s; see {out}/SUMMARY.md, {out}/demo.png and {out}/seed-{args.seed}/mem-0.50/curve.png"
    )
    return 0


def draw_demo(out: Path) -> None:
    """demo.png: test AUROC and its interval over cases, method by method."""
    (figure, axis), runs = plot(6.8, 2.6), read_results(out).runs
    known = [
        line for row in DEMO_ROWS for line in runs[row, DEMO_TASK] if line["low"]
    ]  # few test cases have no interval
    value, low, high = (
        np.array([[float(line[k]) for k in ("auroc", "low", "high")] for line in known])
        .reshape(-1, 3)
        .T
    )
    axis.errorbar(value, range(len(value)), xerr=[value - low, high - value], fmt="o", capsize=3)
    axis.set(
        yticks=range(len(known)),
        yticklabels=[full_title(line["row"]) for line in known],
        xlabel="test AUROC, 95 % interval over cases",
        title=f"{TASK_TITLES[DEMO_TASK]}, synthetic cohort, one seed",
    )
    axis.axvline(0.5, color="grey", lw=1, ls=":")
    axis.invert_yaxis()
    save_figure(figure, out / "demo.png")


# ------------------------------------------------------------------------------------------- doctor


def packages() -> list[str]:
    """A line for each package that the project needs, a WARNING for one that is not there."""
    import importlib.metadata

    lines = []
    for package in (
        "torch",
        "numpy",
        "openslide-python",
        "openslide-bin",
        "scikit-learn",
        "scipy",
        "safetensors",
        "h5py",
        "tifffile",
        "simplejpeg",
        "matplotlib",
        "tqdm",
    ):
        try:
            lines.append(f"{package:18s} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(
                f"WARNING            {package} is not installed: pip install -r requirements.txt"
            )
    return lines


def doctor_command(args) -> int:
    """What there is, one line each; a line that starts with WARNING says what will go wrong and what mends it."""
    print("\n".join(packages()))
    library = data.openslide.__library_version__
    print(f"{'python':18s} {sys.version.split()[0]}\n{'OpenSlide library':18s} {library}")
    if tuple(map(int, library.split(".")[:3])) < (4, 0, 1):
        print(
            "WARNING            OpenSlide below 4.0.1 has known security faults: pip install -U openslide-bin"
        )
    native = torch.cpu._is_avx512_bf16_supported()
    print(
        f"{'processor':18s} {os.cpu_count()} cores, {torch.get_num_threads()} threads in use, bf16 instructions {'yes' if native else 'no'}"
    )
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            print(
                f"{f'GPU {i}':18s} {torch.cuda.get_device_name(i)}, {torch.cuda.get_device_properties(i).total_memory / 2**30:.0f} GiB"
            )
    else:
        print(f"{'GPU':18s} none that torch sees: training runs on the processor")
    for preset in PRESETS:
        dtype = amp_dtype(
            "auto", data.find_device("auto"), getattr(mixmag.Config, preset)(64).width
        )
        print(f"{'precision, ' + preset:18s} {dtype or 'fp32'}")
    free = shutil.disk_usage(".").free / 2**30
    print(
        f"{'free disk':18s} {free:.1f} GiB"
        if free >= 2
        else f"WARNING            only {free:.1f} GiB of disk are free: checkpoints and slide files may not fit"
    )
    shared = Path("/dev/shm")
    if shared.exists() and shutil.disk_usage(shared).total < 2**30:
        print(
            "WARNING            /dev/shm is below 1 GiB: several GPUs under torchrun may fail, for NCCL talks through it"
        )
    if not os.access(".", os.W_OK):
        print("WARNING            this folder is not writable: give --out elsewhere")
    return 0


# --------------------------------------------------------------------------------- the command line


def parse(argv=None) -> argparse.Namespace:
    def within(kind, low, high):
        def number(text):
            if not low <= kind(text) <= high:  # NaN is not
                raise argparse.ArgumentTypeError(f"{text} is not within {low:g} to {high:g}")
            return kind(text)

        return number

    natural, positive, share, rate = (
        within(int, 0, 2**32 - 1),
        within(int, 1, 2**32 - 1),
        within(float, 0, 1),
        within(float, 1e-30, 1e3),
    )

    def magnification(text):  # STAMP's may be 8.75
        return text if text == "all" else float(text) if float(text) % 1 else positive(text)

    class Help(argparse.ArgumentDefaultsHelpFormatter):
        def _get_help_string(self, action):
            return action.help if action.default is None else super()._get_help_string(action)

    parser = argparse.ArgumentParser(
        prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, summary, example):
        p = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"example: {example}",
            formatter_class=Help,
        )
        p.add_argument("--seed", type=natural, default=0, help="everything random follows from it")
        p.add_argument("--device", default="auto", help="auto, cpu or cuda[:i]")
        return p

    def training(p, steps, taken_over=""):
        p.add_argument(
            "--data",
            default=DEFAULT_DATA,
            help="DATA folder; the default is made first if it is not there",
        )
        p.add_argument(
            "--out", help="run folder (default: a name made of the settings, under runs/)"
        )
        p.add_argument(
            "--preset",
            choices=PRESETS,
            default="small",
            help="small: 1 M parameters, for two CPU cores; "
            f"paper: its sizes, as assumed in README{taken_over}",
        )
        p.add_argument(
            "--region",
            type=positive,
            default=3,
            help=f"cells per region side (assumed: 3){taken_over}",
        )
        p.add_argument(
            "--batch-size", type=positive, help="global batch size (default: the preset's)"
        )
        p.add_argument(
            "--epochs", type=positive, help="passes over the data (default: the preset's)"
        )
        if steps:
            p.add_argument(
                "--steps",
                type=positive,
                help="optimizer steps, instead of epochs (default: the preset's)",
            )
        p.add_argument("--lr", type=rate, help="peak learning rate (default: the preset's)")
        if steps:
            p.add_argument(
                "--blr",
                type=rate,
                help="base rate, instead of lr: lr = blr * batch / 256 (default: the preset's)",
            )
        p.add_argument(
            "--warmup",
            type=share,
            default=0.05,
            help="share of the steps in which the rate rises (assumed)",
        )
        p.add_argument(
            "--weight-decay",
            type=within(float, 0, 1e3),
            help="on matrices only (default: the preset's)",
        )
        p.add_argument("--clip", type=rate, default=1.0, help="largest gradient norm (assumed)")
        p.add_argument(
            "--amp",
            choices=("auto", "off", "fp16", "bf16"),
            default="auto",
            help="auto: bf16 where the device computes it, else fp16 on a GPU",
        )
        p.add_argument(
            "--workers", type=natural, default=1, help="threads that load the next batches"
        )
        p.add_argument(
            "--resume",
            choices=("auto", "off"),
            default="auto",
            help="auto: go on where a run of the same settings stopped",
        )

    p = command(
        "pretrain",
        "masked embedding modelling, without labels",
        "python train.py pretrain --mask 0.5 --source 7",
    )
    training(p, steps=True)
    p.add_argument(
        "--mask", type=share, default=0.5, help="removal ratio (paper: 0.25, 0.50, 0.75)"
    )
    p.add_argument(
        "--source",
        type=positive,
        metavar="S",
        help="add the contrastive term on two views of an S x S source window (paper: 3, 7, 11)",
    )
    p.add_argument(
        "--micro-batch",
        type=positive,
        default=64,
        help="regions per forward pass; gradients accumulate to the batch",
    )
    p.add_argument(
        "--min-cover", type=share, default=1.0, help="share of its cells that a window must hold"
    )
    p.add_argument(
        "--holdout",
        type=within(float, 0, 0.9),
        default=0.05,
        help="share of cases kept out, to measure the loss on",
    )
    p.add_argument("--save-every", type=positive, default=100, help="steps between checkpoints")
    p.add_argument(
        "--in-memory",
        action="store_true",
        help="hold all embeddings in the device's memory and gather there",
    )
    p.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile the model; the first step then takes minutes",
    )

    p = command(
        "finetune",
        "train slide-level prediction of a biomarker and score its test set once",
        "python train.py finetune --task skin_braf --init runs/mem-0.50 --tokens cls",
    )
    training(p, steps=False, taken_over=" (default: the encoder's)")
    p.set_defaults(preset=None, region=None)
    p.add_argument("--task", required=True, help="name of a table in DATA/tasks")
    p.add_argument(
        "--init",
        metavar="RUN|random|none",
        help="pretraining run, random weights, or none: AB-MIL on the tile embeddings "
        "(default: the newest pretraining run)",
    )
    p.add_argument(
        "--tokens",
        choices=("patch", "cls"),
        default="patch",
        help="contextualized (table 1) or compressed (table 2) outputs",
    )
    p.add_argument(
        "--magnification",
        type=magnification,
        default="all",
        help="all, or the only one whose embeddings are read",
    )
    p.add_argument(
        "--hidden", type=positive, help="width of the AB-MIL attention (default: the preset's)"
    )
    p.add_argument(
        "--dropout",
        type=within(float, 0, 0.99),
        default=0.2,
        help="on what is pooled and on the pooled vector (assumed)",
    )
    p.add_argument("--smoothing", type=share, default=0.1, help="label smoothing (assumed)")
    p.add_argument(
        "--layer-decay",
        type=share,
        default=0.75,
        help="each layer's rate against the one above (paper 4.3)",
    )
    p.add_argument(
        "--frozen-epochs",
        type=natural,
        default=1,
        help="epochs before the encoder learns (paper 4.3: 1); with more than one its outputs are held in memory meanwhile",
    )
    p.add_argument(
        "--starts",
        type=positive,
        default=1,
        help="random starts of the aggregator, each tried for all epochs on the frozen encoder's "
        "outputs; the tune split chooses with which to go on",
    )
    p.add_argument(
        "--encoder-rate",
        type=share,
        help="the encoder's rate against the aggregator's (assumed) (default: the preset's)",
    )
    p.add_argument(
        "--case-score",
        choices=("auto", "max", "mean"),
        default="auto",
        help="a case's score from its slides'; auto: whichever ranks the tune split better, max on a tie",
    )
    p.add_argument(
        "--min-cover", type=share, default=0.5, help="share of its cells that a region must hold"
    )
    p.add_argument(
        "--dry-run",
        action="store_true",
        help="plan only: cases, tokens, bytes per epoch and the memory that the largest batch will take",
    )

    p = command(
        "predict",
        "score slides with a fine-tuned run",
        "python train.py predict --run runs/skin_braf-mem-0.50-patch-all --data data/mine",
    )
    p.add_argument("--run", required=True, help="fine-tuning run")
    p.add_argument("--data", required=True, help="DATA folder")
    p.add_argument("--slides", nargs="+", metavar="ID", help="slide ids (default: all)")
    p.add_argument("--out", help="CSV to write (default: RUN/predict.csv)")

    p = command(
        "embed",
        "write contextualized or compressed outputs as HDF5 that MIL tools read",
        "python train.py embed --init runs/mem-0.50 --tokens cls --out embeddings",
    )
    p.add_argument(
        "--init",
        required=True,
        metavar="RUN",
        help="pretraining run, or an exported encoder folder",
    )
    p.add_argument(
        "--tokens",
        choices=("patch", "cls"),
        default="cls",
        help="contextualized: one row per tile; compressed: one row per region",
    )
    p.add_argument("--data", default=DEFAULT_DATA, help="DATA folder")
    p.add_argument("--slides", nargs="+", metavar="ID", help="slide ids (default: all)")
    p.add_argument("--out", required=True, help="folder to write")
    p.add_argument(
        "--layout",
        choices=("trident", "clam"),
        default="trident",
        help="folders as TRIDENT names them, or CLAM's h5_files/ and pt_files/",
    )
    p.add_argument(
        "--min-cover", type=share, default=0.5, help="share of its cells that a region must hold"
    )

    p = command(
        "heatmap",
        "where a fine-tuned run looks on a slide: a picture per magnification, CSV, GeoJSON for QuPath",
        "python train.py heatmap --run runs/skin_braf-mem-0.50-patch-all --slide S1 --image slides/S1.svs",
    )
    p.add_argument("--run", required=True, help="fine-tuning run")
    p.add_argument("--slide", required=True, metavar="ID", help="slide id")
    p.add_argument("--data", help="DATA folder (default: the run's)")
    p.add_argument(
        "--image",
        metavar="SLIDE",
        help="the slide itself, to draw on and to cut the top regions from (default: a grey ground)",
    )
    p.add_argument("--out", help="folder to write (default: RUN/heatmap/ID)")

    p = command(
        "table",
        "run rows x tasks x seeds of the paper's tables 1 and 2, skipping what is done",
        "python train.py table --rows abmil-20 mem-0.50-patch --tasks skin_braf",
    )
    p.add_argument(
        "--data",
        default=DEFAULT_DATA,
        help="DATA folder; the default is made first if it is not there",
    )
    p.add_argument("--out", default="runs/table", help="folder of the runs and of SUMMARY.md")
    p.add_argument(
        "--rows",
        nargs="+",
        help="such as abmil-20, random-all-patch, mem-0.50-cls, cmem-7-patch (default: all 24)",
    )
    p.add_argument("--tasks", nargs="+", help="tables in DATA/tasks (default: all)")
    p.add_argument("--seeds", type=positive, default=1, help="number of seeds, from --seed on")
    p.add_argument("--preset", choices=PRESETS, default="small", help="for every run")
    p.add_argument("--steps", type=positive, help="pretraining steps (default: the preset's)")
    p.add_argument("--epochs", type=positive, help="fine-tuning epochs (default: the preset's)")
    p.add_argument(
        "--frozen-epochs",
        type=natural,
        default=1,
        help="as in finetune; as many as --epochs is quickest",
    )
    p.add_argument("--starts", type=positive, default=1, help="as in finetune")

    p = command(
        "demo",
        "a synthetic cohort, MEM pretraining, fine-tuning, a small table and a figure, in minutes on two cores",
        "python train.py demo",
    )
    p.add_argument(
        "--data",
        default=DEFAULT_DATA,
        help="DATA folder; the default is made first if it is not there",
    )
    p.add_argument("--out", default="runs/demo", help="folder of the runs, SUMMARY.md and demo.png")

    command(
        "doctor",
        "versions, device, threads, bf16, disk: what this machine offers and what will go wrong",
        "python train.py doctor",
    )
    return parser.parse_args(argv)


COMMANDS = {
    "pretrain": pretrain_command,
    "finetune": finetune_command,
    "predict": predict_command,
    "embed": embed_command,
    "heatmap": heatmap_command,
    "table": table_command,
    "demo": demo_command,
    "doctor": doctor_command,
}


def main() -> int:
    args = parse()
    return data.run_command(COMMANDS[args.command], args)


if __name__ == "__main__":
    sys.exit(main())
