"""mixmag training: pretraining of the mixing encoder, fine-tuning to AUROC, and the tables.

    python train.py demo                      the whole story on a synthetic cohort, in minutes
    python train.py pretrain --mask 0.5       masked embedding modelling (MEM); --source 7: CMEM
    python train.py finetune --task skin_braf gated attention MIL on the encoder's outputs
    python train.py table                     every row of the paper's tables 1 and 2

Shape letters as in mixmag.py. Results go to stdout, everything else to stderr. A run folder holds
config.json, metrics.jsonl, last.pt and prev.pt (checkpoints), and when it is done result.json.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import io
import itertools
import json
import math
import os
import re
import shutil
import sys
import textwrap
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import h5py
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import distributed
from torch.utils.flop_counter import FlopCounterMode

import data
import mixmag
from data import (
    NATURAL,
    OUTCOME,
    POSITIVE,
    MixmagError,
    OtherSettings,
    Stopped,
    log,
    one_line,
    plural,
    progress,
    whole_file,
)

# ------------------------------------------------------ schedule, parameter groups, AMP, one step


def lr_at(step: int, total: int, warmup: int) -> float:
    """The factor on the peak rate: a linear rise, whose first step is not zero, then a cosine to 0.
    A function of the step alone, so there is no scheduler to save. Source: paper 4.2, SGDR."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def layer_of(name: str, depth: int) -> int:
    """A parameter's layer: 0 before the blocks, i + 1 in block i, depth + 1 after the blocks.
    Raises ValueError for a name that it does not know."""
    if re.match(r"encoder\.(cls|pos)$|encoder\.input\.", name):
        return 0
    if block := re.match(r"encoder\.blocks\.(\d+)\.", name):
        return int(block[1]) + 1
    if re.match(r"encoder\.norm\.|(decoder|projector|pool|head)\.", name):
        return depth + 1
    raise ValueError(f"parameter {name!r} belongs to no layer; say in layer_of where it stands")


def parameter_groups(
    model, weight_decay: float, layer_decay: float = 1.0, encoder_rate: float = 1.0
) -> list[dict]:
    """AdamW groups. `lr_scale` is layer_decay ** (layers above), times encoder_rate in the encoder.
    Norms and biases do not decay (paper 4.2), nor do class and mask tokens and positions (assumed:
    as MAE). Every parameter is in exactly one group. Source: paper 4.3, BEiT, MAE."""
    groups = defaultdict(list)
    depth = model.config.depth
    for name, parameter in model.named_parameters():
        scale = layer_decay ** (depth + 1 - layer_of(name, depth))
        if name.startswith("encoder."):
            scale *= encoder_rate
        decays = parameter.ndim > 1 and not name.endswith((".cls", ".pos"))
        groups[scale, weight_decay if decays else 0.0].append(parameter)
    return [
        {"params": parameters, "lr_scale": scale, "weight_decay": decay}
        for (scale, decay), parameters in groups.items()
    ]


def amp_dtype(mode: str, device: torch.device, width: int) -> torch.dtype | None:
    """The precision of autocast, None for fp32.
    auto: on a GPU bf16, or fp16 where it lacks bf16 (the paper's V100); on a CPU bf16 where it has
    the instructions and the model is wide enough to gain by them."""
    if mode != "auto":
        return {"off": None, "fp16": torch.float16, "bf16": torch.bfloat16}[mode]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    gains = width >= 512 and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if gains else None


def optimizer_step(model, optimizer, machine, rate: float, clip: float) -> torch.Tensor:
    """Add up the processes' gradients, clip, step at `rate` times each group's lr_scale, and clear.
    Returns the gradient's norm, left on its device so that nothing waits for it. In fp16, a step
    whose norm is infinite is skipped, and the factor on the loss is halved."""
    for p in model.parameters():
        if p.requires_grad and machine.world > 1:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            machine.sum(p.grad)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
    machine.scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    machine.scaler.step(optimizer)
    machine.scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm


def setting(default, help: str, small=None, paper=None, **flag):
    """A config's field and its flag. small, paper: the value that replaces None in that preset."""
    return field(default=default, metadata={"help": help, "small": small, "paper": paper, **flag})


SHARE = data.number_in(float, 0, 1)
BELOW_ONE = data.number_in(float, 0, 0.99)
RATE = data.number_in(float, 1e-30, 1e3)
DECAY = data.number_in(float, 0, 1e3)
DEFAULT_DATA = "data/synthetic"
PRESETS = ("small", "paper")  # small: about a million parameters; paper: the sizes as assumed


@dataclass(kw_only=True)
class TrainingConfig:
    """Settings of every training. Numbers that the paper does not give are assumed.
    None stands for the preset's number, or for what the help names."""

    data: str = setting(DEFAULT_DATA, "DATA folder; the default one is made where it is missing")
    out: str = setting(None, "run folder (default: a name made of the settings, in runs/)")
    fold: int = setting(None, "of tables with columns fold_0, fold_1, ...", type=NATURAL)
    seed: int = setting(0, "everything random follows from it", type=NATURAL)
    device: str = setting("auto", "auto, cpu or cuda[:i]")
    warmup: float = setting(0.05, "share of the steps in which the rate rises", type=SHARE)
    clip: float = setting(1.0, "largest norm of the gradient", type=RATE)
    amp: str = setting("auto", "precision", choices=("auto", "off", "fp16", "bf16"))
    workers: int = setting(1, "threads that load the next batches", type=NATURAL)
    resume: str = setting("auto", "auto: go on; off: begin the run anew", choices=("auto", "off"))


# ---------------------------------------------------------------------------------- pretraining


def auto_or_positive(text: str) -> str | int:
    return text if text == "auto" else POSITIVE(text)


@dataclass(kw_only=True)
class PretrainConfig(TrainingConfig):
    """Settings of masked embedding modelling; each is a flag of `train.py pretrain`."""

    preset: str = setting("small", "sizes of model and training", choices=PRESETS)
    region: int = setting(3, "cells per side of a region (assumed: 3)", type=POSITIVE)
    mask: float = setting(0.5, "removal ratio (paper: 0.25, 0.50, 0.75)", type=SHARE)
    source: int = setting(None, "CMEM: side of the source window, 3, 7, 11", type=POSITIVE)
    batch_size: int = setting(None, "global batch size", small=16, paper=4096, type=POSITIVE)
    micro_batch: int | str = setting(
        "auto",
        "regions of one pass; auto: as many as fit the GPU, 64 on a CPU",
        type=auto_or_positive,
    )
    steps: int = setting(None, "optimizer steps", small=3000, type=POSITIVE)
    epochs: int = setting(None, "passes over all windows", paper=100, type=POSITIVE)
    lr: float = setting(None, "peak rate, instead of the base rate", type=RATE)
    blr: float = setting(None, "lr = blr * batch / 256", small=0.032, paper=1.5e-4, type=RATE)
    weight_decay: float = setting(None, "on matrices", small=0.3, paper=0.05, type=DECAY)
    kept_weight: float = setting(None, "of the loss at kept tokens", small=0.5, paper=0, type=SHARE)
    swap: float = setting(None, "share given another slide's mean", small=0.5, paper=0, type=SHARE)
    min_cover: float = setting(1.0, "share of its cells that a window must hold", type=SHARE)
    holdout: float = setting(0.05, "share of cases to measure the loss on", type=BELOW_ONE)
    save_every: int = setting(100, "steps between checkpoints", type=POSITIVE)
    compile: bool = setting(False, "torch.compile the blocks; the first step then takes a minute")


HIGHEST_RATE = 0.02  # assumed: ten times the rate of the small preset
LOG_EVERY = 10  # steps
HELD_OUT_CASES = 4  # at least, where there are enough
MEASUREMENTS = 12  # of the held-out loss in a run


def pretrain(config: PretrainConfig) -> dict:
    """MEM or CMEM on all slides that no task tunes or tests on, or on those of pretrain.csv.
    Returns what result.json holds. Raises MixmagError for settings or data that cannot be used.
    Source: paper section 3.1."""
    if config.steps and config.epochs:
        raise MixmagError("--steps and --epochs: give one of them")
    config = apply_preset(config)
    machine = start_machine(config.device, config.amp, preset_width(config.preset))
    folder = ensure_data(config.data, machine)
    tasks = data.read_tasks(folder, config.fold, config.seed)
    ids = data.pretraining_ids(folder, tasks)
    used = used_slides(folder, tasks, ids)
    train_ids, held_out_ids = pretraining_split(ids, tasks, config.holdout)
    if not train_ids:
        raise MixmagError(f"no slide is left to train on: {used}")
    slides = data.read_slides(folder, train_ids)
    model_config = make_model_config(config, slides[0])
    dataset = pretraining_windows(config, slides, model_config.geometry(), machine)
    total, peak = pretraining_length(config, len(dataset))
    run = Run(config, run_settings("pretrain", config, model_config, slides), machine)
    if run.result():
        return run.result()
    log(used)
    torch.manual_seed(config.seed)
    kind = mixmag.ContrastiveEmbeddingModel if config.source else mixmag.MaskedEmbeddingModel
    model = kind(model_config, config.kept_weight)
    mean, std, directions = data.feature_statistics(slides)
    model.encoder.standardize.fit(mean, std)
    model.decoder.standardize.fit(mean, std)
    model.to(machine.device)
    held_out = None
    if held_out_ids:
        unseen = data.read_slides(folder, held_out_ids)
        fixed: dict = {"stride": config.region, "min_cover": config.min_cover, "turn": False}
        held_out = data.RegionDataset(unseen, dataset.geometry, config.seed, config.mask, **fixed)
    pretrain_loop(config, run, model, dataset, held_out, total, peak)
    if run.writes:
        export_encoder(run, model.encoder, slides[0], config.preset, train_ids, held_out_ids)
        finish_pretraining(config, run, model, slides, directions, held_out, total)
    machine.barrier()
    return run.result()


def pretraining_windows(config, slides, geometry, machine) -> data.RegionDataset:
    """The windows to train on. Raises MixmagError for settings that do not fit them."""
    if config.source and config.source < config.region:
        raise MixmagError(f"--source {config.source} is smaller than --region {config.region}")
    if config.batch_size % machine.world:
        raise MixmagError(f"--batch-size does not divide into {machine.world} processes")
    more = {"min_cover": config.min_cover, "swap": config.swap, "source": config.source or 0}
    try:
        mixmag.removal_count(geometry.num_tokens, config.mask)
    except ValueError as error:
        raise MixmagError(f"--mask: {error}") from None
    dataset = data.RegionDataset(slides, geometry, config.seed, config.mask, **more)
    if len(dataset) == 0:
        raise MixmagError(
            f"no slide has a window of {config.region} x {config.region} cells that is "
            f"{config.min_cover:.0%} covered; try --min-cover 0.5 or a smaller --region"
        )
    return dataset


def pretraining_length(config: PretrainConfig, windows: int) -> tuple[int, float]:
    """How many steps there are, and the peak rate."""
    total = config.steps or math.ceil(config.epochs * windows / config.batch_size)
    peak = config.lr or config.blr * config.batch_size / 256  # linear scaling rule, paper 4.2
    if not config.lr and peak > HIGHEST_RATE:
        raise MixmagError(
            f"--batch-size {config.batch_size} and the base rate {config.blr:g} make a peak rate "
            f"of {peak:.2g}, too high to learn; give --lr, a smaller --blr or --preset paper"
        )
    return total, peak


def pretrain_loop(config, run: Run, model, dataset, held_out, total: int, peak: float) -> None:
    """All optimizer steps, from the last checkpoint on."""
    machine = run.machine
    groups = parameter_groups(model, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=True)  # assumed: MAE
    train_step = cmem_step if config.source else mem_step
    if config.compile:
        compile_blocks(model)
    log(f"{run.folder}: {parameter_count(model)}, {machine}")
    slide_count = f"{len(np.unique(dataset.slide_of))} of {plural(len(dataset.slides), 'slide')}"
    log(f"{len(dataset)} windows in {slide_count}, with --min-cover {config.min_cover:g}")
    log(f"{total} steps of {config.batch_size}, peak rate {peak:.2e}")
    start = run.load(model, optimizer)["done"]
    own_regions = config.batch_size // machine.world  # of each batch
    micro_batch = micro_batch_size(config, model, dataset, machine)
    loads = data.prefetch(
        lambda indices: data.pinned(dataset.batch(indices), machine.device),
        micro_batches(config, start, total, own_regions, machine.rank, micro_batch),
        config.workers,
    )
    began = time.time()
    measure_every = config.save_every * math.ceil(total / config.save_every / MEASUREMENTS)
    bar = progress(total=total, initial=start, desc="pretrain")
    for done in range(start + 1, total + 1):
        parts = itertools.islice(loads, math.ceil(own_regions / micro_batch))
        sums = train_step(model, parts, config.batch_size, machine)
        rate = peak * lr_at(done - 1, total, round(config.warmup * total))
        norm = optimizer_step(model, optimizer, machine, rate, config.clip)
        stop = machine.stop_asked()
        last = done == total
        saves = stop or last or done % config.save_every == 0
        logs = last or done % LOG_EVERY == 0
        if saves or logs:  # only here does anything wait for the device
            check_finite(run, done, sums["loss"].item(), norm.item(), slide_count)
        if logs:
            note_pretraining(run, done, sums, rate, norm, model.config.magnifications, bar)
        if held_out and (last or done % measure_every == 0):
            run.note(step=done, held_out=float(np.mean(model_losses(model, held_out, machine))))
        bar.update()
        if saves:
            run.save(done, model, optimizer)
        if stop:
            raise Stopped
    bar.close()
    regions = (total - start) * own_regions
    log_speed(model.config, dataset, regions, time.time() - began, machine)


def mem_step(model, parts: Iterable[dict], batch_size: int, machine) -> dict:
    """Forward and backward over this process's parts of a global batch of `batch_size` regions.
    Gradients add up to those of the mean over the batch. Returns sums to log, on the device."""
    sums: dict = {}
    for part in parts:
        part = data.to_device(part, machine.device)
        weight = part["removed"].shape[-2] / batch_size  # (b, M), or (2, b, M) for two views
        with machine.autocast():
            out = model(part["x"], part["removed"], part["valid"])
        machine.scaler.scale(out.loss * weight).backward()
        add_to_sums(sums, out, weight)
    return sums


def add_to_sums(sums: dict, out: mixmag.Outputs, weight: float) -> None:
    """Add a part's share to what a step logs: the loss, CMEM's two terms, the loss by level."""
    terms = {"loss": out.loss, "mem": out.mem, "contrastive": out.contrastive}
    added = {name: term.detach() * weight for name, term in terms.items() if term is not None}
    of_level = (out.per_level * out.per_level_count).nan_to_num()
    added["levels"] = torch.stack([of_level, out.per_level_count])  # (2, K)
    for name, value in added.items():
        sums[name] = sums.get(name, 0) + value


# ---------------------------------------------------------------------------------- fine-tuning


def parse_magnification(text: str) -> str | float:
    """all, or a number; STAMP's may be 8.75."""
    return text if text == "all" else data.whole_if_possible(float(text))


@dataclass(kw_only=True)
class FinetuneConfig(TrainingConfig):
    """Settings of supervised aggregation; each is a flag of `train.py finetune`."""

    task: str = setting(dataclasses.MISSING, "name of a table in DATA/tasks")
    init: str = setting(None, "RUN, random or none (default: the newest pretraining run)")
    tokens: str = setting("patch", "table 1 or table 2", choices=("patch", "cls"))
    magnification: str | float = setting("all", "all, or one of them", type=parse_magnification)
    preset: str = setting(None, "sizes (default: the encoder's)", choices=PRESETS)
    region: int = setting(None, "cells per side (default: the encoder's)", type=POSITIVE)
    batch_size: int = setting(None, "global batch size", small=16, paper=32, type=POSITIVE)
    epochs: int = setting(None, "passes over the train split", small=20, paper=20, type=POSITIVE)
    frozen_epochs: int = setting(1, "epochs before the encoder learns (paper: 1)", type=NATURAL)
    lr: float = setting(None, "the aggregator's peak rate", small=1e-2, paper=1e-3, type=RATE)
    encoder_rate: float = setting(None, "encoder's rate / lr", small=0.3, paper=0.1, type=SHARE)
    layer_decay: float = setting(0.75, "rate of a layer / of the layer above it", type=SHARE)
    weight_decay: float = setting(None, "on matrices", small=1.0, paper=0.05, type=DECAY)
    hidden: int = setting(None, "width of AB-MIL's attention", small=64, paper=256, type=POSITIVE)
    dropout: float = setting(0.2, "before and after pooling", type=BELOW_ONE)
    smoothing: float = setting(0.1, "label smoothing", type=SHARE)
    case_score: str = setting("auto", "of a case's slides", choices=("auto", "max", "mean"))
    min_cover: float = setting(0.5, "share of its cells that a region must hold", type=SHARE)
    dry_run: bool = setting(False, "only count cases, regions and tokens")


# Eq. 9 needs the label, so it cannot choose a slide at test time
CASE_SCORES: dict[str, Callable] = {"max": np.max, "mean": np.mean}
ABMIL_EPOCHS = {"small": 60, "paper": 20}  # AB-MIL without an encoder learns late, and is cheap


def finetune(config: FinetuneConfig) -> dict:
    """Train on the train split, keep the best epoch by the tune split, score the test split once.
    Returns what result.json holds; {} for a dry run. Raises MixmagError for data that does not fit
    the encoder, and for one that saw tune or test cases. Source: paper section 4.3."""
    config = apply_preset(adopt_encoder_settings(config))
    machine = start_machine(config.device, config.amp, preset_width(config.preset))
    folder = ensure_data(config.data, machine)
    table = data.read_table(folder, config.task)
    cases = table.in_fold(config.fold, config.seed)
    text = f"{config.task}: classes {', '.join(table.classes)}"
    if len(table.classes) == 2:
        text += f"; the score is the probability of {table.classes[1]}"
    log(text)
    slides = {slide.slide_id: slide for slide in data.read_slides(folder, table.slide_ids)}
    check_no_copies(slides, cases)
    files = [folder / "tasks" / f"{config.task}.csv"]
    if is_pretrained(config.init):
        check_no_leakage(config.init, folder, cases)
        files.append(encoder_folder(config.init) / "model.safetensors")
    model = make_classifier(config, slides, cases, machine, table.classes)
    sets = split_cases(config, model, slides, cases, table.classes)
    plan = finetuning_plan(model, sets)
    if config.dry_run:
        data.show(plan)
        return {}
    settings = run_settings("finetune", config, model.config, list(slides.values()), files)
    settings["pool"] = type(model.pool).__name__
    run = Run(config, settings, machine)
    if run.result():
        return run.result()
    log(plan)
    best = finetune_loop(config, run, model, sets)
    finish_finetuning(config, run, model, sets, best, table.classes)
    machine.barrier()
    return run.result()


def make_classifier(config, slides: dict, cases: list, machine, classes) -> mixmag.SlideClassifier:
    """The encoder of `config.init` under a new AB-MIL. A pretrained one brings the constants that
    standardise its inputs; a random one gets those of the training slides; without an encoder each
    magnification has its own."""
    torch.manual_seed(config.seed)
    any_slide = next(iter(slides.values()))
    model_config = make_model_config(config, any_slide)
    encoder = None
    if is_pretrained(config.init):
        encoder = read_encoder(config.init, any_slide)
        model_config = encoder.config
    elif config.init == "random":
        encoder = mixmag.MixingEncoder(model_config)
    settings = (config.tokens, config.magnification, config.hidden, config.dropout)
    outputs = len(OUTCOME.columns(classes))
    try:
        model = mixmag.SlideClassifier(model_config, encoder, *settings, outputs=outputs)
    except ValueError as error:
        raise MixmagError(f"--tokens or --magnification: {error}") from None
    train = [slides[i] for case in cases if case.split == "train" for i in case.slide_ids]
    if train and not is_pretrained(config.init):  # split_cases refuses a task without any
        fit_standardization(model, train)
    return model.to(machine.device)


def fit_standardization(model: mixmag.SlideClassifier, slides: list) -> None:
    level = model.config.geometry().level()[model.index]  # (n,)
    levels, which = level.unique(return_inverse=True)
    if model.encoder is not None:
        mean, std, _ = data.feature_statistics(slides, levels.tolist())
        model.encoder.standardize.fit(mean, std)
        return
    of_levels = [data.feature_statistics(slides, [k])[:2] for k in levels.tolist()]
    mean = torch.stack([mean for mean, _ in of_levels])  # (K, D)
    std = torch.stack([std for _, std in of_levels])
    model.standardize.fit(mean[which], std[which])  # (n, D)


def split_cases(config, model, slides: dict, cases: list, classes) -> dict[str, data.CaseDataset]:
    """The cases of each split. Raises MixmagError where train or tune lacks a class."""
    geometry = model.config.geometry()
    sets = {}
    for split in data.SPLITS:
        of_split = [case for case in cases if case.split == split]
        dataset = data.CaseDataset(slides, of_split, geometry, model.index, config.min_cover)
        if dataset.dropped:
            count = plural(len(dataset.dropped), "slide")
            log(f"{split}: {count} without a token to read: {', '.join(dataset.dropped[:5])}")
        labels = sorted(set(dataset.labels))
        if split != "test" and len(labels) < max(2, len(classes)):
            found = [classes[label] for label in labels]
            wanted = f"expected two classes or more, and all of {classes}"
            raise MixmagError(f"task {config.task}: {split} has usable cases of {found}; {wanted}")
        sets[split] = dataset
    return sets


def finetune_loop(config, run: Run, model, sets: dict) -> dict:
    """All epochs, from the last checkpoint on. Returns the best epoch by the tune split."""
    groups = parameter_groups(model, config.weight_decay, config.layer_decay, config.encoder_rate)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, fused=True)
    steps = math.ceil(len(sets["train"]) / config.batch_size)
    length = f"{plural(config.epochs, 'epoch')} of {plural(steps, 'step')}"
    log(f"{run.folder}: {parameter_count(model)}, {length}")
    best = {"tune_auroc": -math.inf, **run.load(model, optimizer)}
    start = best.pop("done")
    bar = progress(total=config.epochs * steps, initial=start * steps, desc="finetune")
    for epoch in range(start, config.epochs):
        if model.encoder is not None:
            freeze_encoder(config, model, sets, epoch < config.frozen_epochs, run.machine)
        loss, norm = finetune_epoch(config, model, optimizer, sets["train"], epoch, run, bar)
        scores = score_cases(model, sets["tune"], run.machine, config.batch_size)
        rule, tune = choose_case_score(sets["tune"], scores, config.case_score)
        if tune >= best["tune_auroc"]:  # of equally good epochs the last has learned longest
            state = {name: value.cpu().clone() for name, value in model.state_dict().items()}
            best = {"model_state": state, "best_epoch": epoch + 1}
            best |= {"tune_auroc": tune, "case_score": rule}
        run.note(epoch=epoch + 1, loss=loss, norm=norm, tune_auroc=tune, case_score=rule)
        bar.set_postfix(loss=f"{loss:.3f}", tune=f"{tune:.3f}")
        run.save(epoch + 1, model, optimizer, **best)
    bar.close()
    return best


def freeze_encoder(config, model, sets: dict, frozen: bool, machine) -> None:
    """Freeze the encoder (paper 4.3: for one epoch), or let it learn. While it is frozen for
    several epochs its outputs are computed once and kept in memory."""
    model.encoder.requires_grad_(not frozen)
    for dataset in (sets["train"], sets["tune"]):
        if not frozen:
            dataset.cached.clear()
        elif config.frozen_epochs > 1 and not dataset.cached:
            slide_ids = progress(dataset.corners, desc="encoder outputs")
            dataset.cached |= {i: slide_outputs(model, dataset, i, machine) for i in slide_ids}


def slide_outputs(model, dataset, slide_id: str, machine) -> tuple[np.ndarray, np.ndarray]:
    """A slide's encoder outputs (W, n or 1, d), and which tokens are valid (W, n)."""
    x, valid = dataset.read(slide_id)
    with torch.no_grad(), machine.autocast():
        h = model.encode_chunks(**data.as_batch(x, valid, machine.device))
    return h.float().cpu().numpy(), valid


def finetune_epoch(config, model, optimizer, dataset, epoch: int, run, bar) -> tuple[float, float]:
    """One pass over the training cases, in an order that follows from seed and epoch. Processes
    share the cases of a batch. Returns the mean loss and the last gradient's norm."""
    machine = run.machine
    # the 4 makes it differ from the streams 0 to 3, with which data.py makes the synthetic cohort
    order = np.random.default_rng([config.seed, 4, epoch]).permutation(len(dataset))
    batches = [order[i : i + config.batch_size] for i in range(0, len(order), config.batch_size)]
    steps = config.epochs * len(batches)
    total = 0.0
    loads = data.prefetch(
        lambda indices: data.pinned(dataset.batch(indices), machine.device),
        [batch[machine.rank :: machine.world] for batch in batches],
        config.workers,
    )
    for i, batch in enumerate(loads):
        step = epoch * len(batches) + i
        # dropout follows from seed, step and process: a resumed run draws the same
        torch.manual_seed((1_000_003 * config.seed + step) * machine.world + machine.rank)
        part = finetune_step(model, batch, config.smoothing, len(batches[i]), machine)
        loss = machine.sum(torch.tensor(part)).item()
        rate = config.lr * lr_at(step, steps, round(config.warmup * steps))
        norm = optimizer_step(model, optimizer, machine, rate, config.clip).item()
        names = ", ".join(batch.get("slide_ids", [])[:5])
        check_finite(run, step + 1, loss, norm, f"slides {names}")
        total += loss * len(batches[i])
        bar.update()
        if machine.stop_asked():
            raise Stopped
    return total / len(dataset), norm


def finetune_step(model, batch: dict, smoothing: float, cases: int, machine) -> float:
    """Forward and backward over this process's cases of a batch of `cases`. Returns its part of the
    mean loss. A process without a case adds nothing to the gradient."""
    if not batch:
        machine.scaler.scale(torch.zeros((), device=machine.device))  # else unscale_ fails
        return 0.0
    batch = data.to_device(batch, machine.device)
    with machine.autocast():
        logit = slide_logits(model, batch)  # (S,) or (S, G)
    label = batch["label"][batch["case"]]  # (S,)
    loss = OUTCOME.loss(logit, label, smoothing)
    loss = mixmag.min_slide_loss(loss, batch["case"]).sum() / cases  # Eq. 9, of smoothed losses
    machine.scaler.scale(loss).backward()
    return loss.item()


def slide_logits(model, batch: dict) -> torch.Tensor:
    """(S,) or (S, G) of a batch that holds embeddings, or cached outputs of a frozen encoder."""
    classify = model.aggregate if batch["cached"] else model
    logit, _ = classify(batch["x"], batch["regions"], batch["valid"])
    return logit


def score_cases(model, dataset, machine, batch_size: int) -> list[np.ndarray]:
    """The score of each slide, case by case. No label is looked at. Processes share the cases."""
    model.eval()
    scores = {}
    at_once = batch_size * machine.world
    for start in range(0, len(dataset), at_once):
        of_all = range(start, min(start + at_once, len(dataset)))
        chosen = of_all[machine.rank :: machine.world]
        if chosen:
            batch = data.to_device(dataset.batch(chosen), machine.device)
            with torch.no_grad(), machine.autocast():
                score = OUTCOME.score(slide_logits(model, batch)).numpy()  # (S,) or (S, G)
            case = batch["case"].cpu().numpy()
            for position, index in enumerate(chosen):
                scores[index] = score[case == position]
        if machine.stop_asked():
            raise Stopped
    model.train()
    for part in machine.gather(scores):
        scores.update(part)
    return [scores[i] for i in range(len(dataset))]


def choose_case_score(dataset, slide_scores: list, wanted: str) -> tuple[str, float]:
    """The rule with the highest AUROC, max on a tie; and its AUROC. `wanted`: the rule, or auto."""
    found = {}
    for rule in CASE_SCORES:
        if wanted in ("auto", rule):
            found[rule] = OUTCOME.metric(dataset.labels, case_scores(dataset, slide_scores, rule))
    best = max(found, key=found.__getitem__)
    return best, found[best]


def case_scores(dataset, slide_scores: list, rule: str) -> list:
    """A number for each case; for more than two classes G numbers, which add up to 1."""
    scores = []
    for case, of_slides in zip(dataset.cases, slide_scores, strict=True):
        score = CASE_SCORES[rule](of_slides, axis=0)  # () or (G,)
        if not np.isfinite(score).all():
            found = f"case {case.case_id}, slides {case.slide_ids}: score {score}"
            raise MixmagError(f"{found}; see data.py verify")
        if score.ndim:
            score = score / score.sum()
        scores.append(score.tolist())
    return scores


# ======================================================================================== stop here
# Above stands what the paper needs. Below stands what a lab needs around it: run folders, several
# processes, batches in parts, exports, predictions, heatmaps, tables and the command line.


# ---------------------------------------------------------------------------- run folder, processes


@dataclass
class Machine:
    """Where and in which precision this process computes, and which of how many it is."""

    device: torch.device
    dtype: torch.dtype | None  # of autocast; None: fp32
    rank: int
    world: int
    scaler: torch.amp.GradScaler  # does nothing unless in fp16

    def __str__(self) -> str:
        return f"{self.world} x {self.device.type}, {self.dtype or 'fp32'}"

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def barrier(self) -> None:
        if self.world > 1:
            distributed.barrier()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over processes, in place."""
        if self.world > 1:
            distributed.all_reduce(values)
        return values

    def gather(self, value) -> list:
        """What each process has, in the order of their ranks."""
        parts = [value] * self.world
        if self.world > 1:
            distributed.all_gather_object(parts, value)
        return parts

    def stop_asked(self) -> bool:
        """Whether any process received a signal; all ask at one place and stop together."""
        return bool(self.sum(torch.tensor(len(data.STOP_SIGNALS))))


def preset_width(preset: str) -> int:
    return getattr(mixmag.Config, preset)(1).width


def start_machine(device: str = "auto", amp: str = "auto", width: int = 96) -> Machine:
    """Join the processes that torchrun started, if any. `width` is the model's."""
    rank, world = data.process_rank()
    found = data.find_device(device)
    if found.type == "cuda":
        torch.cuda.set_device(found)  # otherwise each process also opens the first GPU
    if world > 1 and not distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if found.type == "cuda" else "gloo"
        distributed.init_process_group(backend, timeout=timedelta(minutes=30))
    dtype = amp_dtype(amp, found, width)
    scaler = torch.amp.GradScaler(found.type, enabled=dtype == torch.float16)
    return Machine(found, dtype, rank, world, scaler)


class Run:
    """A run folder. Two starts with the same settings are one run; other settings are refused.
    The first of several processes writes, the others only read."""

    def __init__(self, config: TrainingConfig, settings: dict, machine: Machine):
        self.folder = Path(config.out or Path("runs") / run_name(config))
        self.machine = machine
        self.writes = machine.rank == 0
        self.metrics: list[dict] = []  # the lines of metrics.jsonl
        if self.writes:
            self.claim(settings, config.resume)
        machine.barrier()

    def claim(self, settings: dict, resume: str) -> None:
        """Write config.json. Raises OtherSettings for another run, or one that is going on."""
        stored = self.folder / "config.json"
        if resume == "auto" and (stored.exists() or (self.folder / "last.pt").exists()):
            found = data.read_json(stored)
            if differing := data.differences(without_places(found), without_places(settings)):
                fault = f"{self.folder} holds a run with other settings: {differing}"
                raise OtherSettings(f"{fault}; give another --out, or --resume off to begin anew")
            if self.result():
                log(f"{self.folder}: this run is finished")
                return
        self.lock = lock(self.folder / "lock")  # held until this run is forgotten
        if resume == "off":  # all other files are written over when the run is done
            for name in ("result.json", "encoder/config.json", "predict.csv", "prev.pt", "last.pt"):
                (self.folder / name).unlink(missing_ok=True)
            shutil.rmtree(self.folder / "heatmap", ignore_errors=True)
        data.write_json(stored, settings)

    def result(self) -> dict:
        """result.json, or {} while the run is not finished."""
        path = self.folder / "result.json"
        return data.read_json(path) if path.exists() else {}

    def note(self, **values) -> None:
        """One line of metrics. It holds no times, so equal runs have equal files."""
        if not self.writes:
            return
        for name, value in values.items():
            if isinstance(value, float):
                values[name] = round(value, 6) if math.isfinite(value) else None
        self.metrics.append(values)
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def curve(self, name: str) -> tuple[list, list]:
        """The steps and the values of a metric."""
        noted = [line for line in self.metrics if name in line]
        return [line["step"] for line in noted], [line[name] for line in noted]

    def save(self, done: int, model, optimizer, **more) -> None:
        """Write last.pt; the one before stays as prev.pt. Plain types and tensors only."""
        if not self.writes:
            return
        state = {
            **more,
            "done": done,
            "metrics": self.metrics,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": self.machine.scaler.state_dict(),
        }
        last = self.folder / "last.pt"
        with whole_file(last) as temporary:
            with open(temporary, "wb") as file:  # given a name, torch would store that name
                torch.save(state, file)
            if last.exists():
                os.replace(last, self.folder / "prev.pt")  # killed here, a run resumes from prev.pt

    def load(self, model, optimizer) -> dict:
        """Go on from the newest whole checkpoint, with the metrics up to it.
        Returns what `save` was given. Raises MixmagError where all checkpoints are damaged."""
        checkpoints = [self.folder / "last.pt", self.folder / "prev.pt"]
        existing = [path for path in checkpoints if path.exists()]
        state: dict = {"done": 0, "metrics": []}
        for path in existing:
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
                break
            except Exception as error:  # torch raises many types for a damaged file
                log(f"{path} is damaged ({type(error).__name__})")
        if state["done"]:
            log(f"going on from {path}, {state['done']} done")
            model.load_state_dict(state.pop("model"))
            optimizer.load_state_dict(state.pop("optimizer"))
            self.machine.scaler.load_state_dict(state.pop("scaler"))
        elif existing:
            raise MixmagError(f"{self.folder}: no checkpoint can be read; --resume off begins anew")
        self.metrics = state.pop("metrics")
        if self.writes:
            lines = [json.dumps(line) + "\n" for line in self.metrics]
            data.write_text(self.folder / "metrics.jsonl", "".join(lines))
        return state


def lock(path: Path) -> io.FileIO:
    """An open file that no other process can lock while this one lives.
    With flock a notebook that failed could not start the same run again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = io.FileIO(path, "a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise OtherSettings(f"{path.parent}: another process works on this run") from None
    except OSError as error:
        log(f"WARNING: {path.parent} knows no locks ({error}); start this run only once at a time")
    return file


def without_places(settings: dict) -> dict:
    """The settings without paths: the content of what lies there counts, as inputs_sha256 says."""
    pretrained = is_pretrained(settings.get("init", "none"))
    return {**settings, "data": "", "init": "RUN" if pretrained else settings.get("init")}


def run_settings(kind: str, config, model_config, slides: list, files=()) -> dict:
    """What decides a run's outcome: the settings, and the content of the files that it reads."""
    settings = {"kind": kind, **dataclasses.asdict(config), "model": model_config.to_dict()}
    for name in ("out", "device", "workers", "resume", "save_every", "dry_run", "compile"):
        settings.pop(name, None)
    digest = hashlib.sha256()
    for slide in slides:
        digest.update(slide.meta["sha256"].encode("utf-8"))
    for path in files:
        digest.update(Path(path).read_bytes())
    content = {"tile_encoder": slides[0].meta["encoder"], "inputs_sha256": digest.hexdigest()}
    return {**settings, **content}


def run_name(config) -> str:
    """The name of a run folder, made of the settings that a user varies most."""
    seed = f"-s{config.seed}" if config.seed else ""
    if config.fold is not None:
        seed = f"-f{config.fold}{seed}"
    if isinstance(config, FinetuneConfig):
        encoder = "abmil" if config.init == "none" else f"{Path(config.init).name}-{config.tokens}"
        return f"{config.task}-{encoder}-{config.magnification}{seed}"
    method = f"cmem-{config.source}" if config.source else "mem"
    region = f"-r{config.region}" if config.region != 3 else ""
    return f"{method}-{config.mask:.2f}{region}{seed}"


def apply_preset(config):
    """The config with the preset's numbers in place of None."""
    numbers = {}
    for setting in dataclasses.fields(config):
        number = setting.metadata.get(config.preset)
        if number is not None and getattr(config, setting.name) is None:
            numbers[setting.name] = number
    if config.epochs:
        numbers.pop("steps", None)
    elif getattr(config, "init", None) == "none":
        numbers["epochs"] = ABMIL_EPOCHS[config.preset]
    return dataclasses.replace(config, **numbers)


def is_pretrained(init: str) -> bool:
    return init not in ("none", "random")


def adopt_encoder_settings(config: FinetuneConfig) -> FinetuneConfig:
    """The config with an encoder, and with the preset and region of that encoder."""
    init = config.init or newest_pretraining()
    known: dict = {}
    if is_pretrained(init):
        known = data.read_json(encoder_folder(init) / "config.json")
    region = known.get("model", {}).get("region", config.region or 3)
    if config.region not in (None, region):
        raise MixmagError(f"--region {config.region}: {init} reads {region} x {region} cells")
    preset = config.preset or known.get("preset", "small")
    return dataclasses.replace(config, init=init, preset=preset, region=region)


def make_model_config(config: PretrainConfig | FinetuneConfig, slide) -> mixmag.Config:
    of_preset = getattr(mixmag.Config, config.preset)
    return of_preset(slide.dim, region=config.region, magnifications=slide.meta["magnifications"])


def parameter_count(model) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters"


def ensure_data(path, machine: Machine) -> Path:
    """The DATA folder. The first process makes the default one where it is missing."""
    folder = Path(path)
    missing = str(folder) == DEFAULT_DATA and not data.synthetic_facts(folder).get("complete")
    if missing and machine.rank == 0:
        log(f"making the quick synthetic cohort first (data.py synth --out {folder})")
        data.synth_cohort(folder)
    machine.barrier()
    if not (folder / "slides").is_dir():
        raise MixmagError(f"{folder} has no slides folder; make one with data.py tile or import")
    return folder


def newest_pretraining() -> str:
    """The run under runs/ whose encoder was exported last."""
    exported = Path("runs").glob("*/encoder/config.json")
    newest = max(exported, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        advice = "run `python train.py pretrain`, or give --init RUN, --init random or --init none"
        raise MixmagError(f"no finished pretraining run under runs/; {advice}")
    run = newest.parents[1]
    log(f"--init {run}: the newest pretraining run")
    return str(run)


# --------------------------------------------------------------------------------- a batch in parts


def region_bytes(config: mixmag.Config, M: int, size: int) -> float:
    """Memory that MEM keeps of a region for backward. size: bytes of a number in autocast.
    Of a token a block keeps its two sums in fp32, six vectors of its width (two norms, q, k, v,
    attention) and the gated layer's four, which are 8/3 as wide."""
    N = config.geometry().num_tokens
    n = N - M + config.cls_tokens
    of_blocks = n * config.depth * config.width
    of_blocks += (n + M) * config.decoder_depth * config.decoder_width
    of_blocks *= 8 + size * (6 + 4 * 8 / 3)
    return of_blocks + 4 * config.dim * (N + n + 6 * M)  # inputs, and the cosine's vectors


def micro_batch_size(config, model, dataset, machine) -> int:
    """auto: as many regions as a GPU holds."""
    if config.micro_batch != "auto":
        return config.micro_batch
    if machine.device.type != "cuda":
        return 64
    free, _ = torch.cuda.mem_get_info(machine.device)
    free -= 12 * sum(p.numel() for p in model.parameters())  # gradients, AdamW's two moments
    size = 2 if machine.dtype else 4
    of_region = dataset.views * region_bytes(model.config, dataset.removed_tokens, size)
    fits = int(0.8 * free / of_region)  # a fifth stays free
    return max(1, fits // 64 * 64 or fits)


def micro_batches(config, start: int, total: int, own_regions: int, rank: int, most: int):
    """The samples of this process, step by step, in parts of at most `most`."""
    for step in range(start, total):
        first = step * config.batch_size + rank * own_regions
        for i in range(0, own_regions, most):
            yield range(first + i, first + min(i + most, own_regions))


def compile_blocks(model) -> None:
    """Equal blocks share one compiled graph: much sooner ready than the whole model."""
    for block in [*model.encoder.blocks, *model.decoder.blocks]:
        block.compile(dynamic=False)


def cmem_step(model, parts: Iterable[dict], batch_size: int, machine) -> dict:
    """As mem_step, with NT-Xent over the whole global batch, also when it comes in parts.
    NT-Xent needs all projections, but their graphs together may not fit in memory. So 1. compute
    all projections without a graph, 2. compute the gradient of NT-Xent at each of them, 3. send
    each part forward again and backward with its slice of it. Source: GradCache (Gao, 2021)."""
    parts = [data.to_device(part, machine.device) for part in parts]
    if len(parts) == 1 and machine.world == 1:
        return mem_step(model, parts, batch_size, machine)
    contrastive, gradients = projection_gradients(model, parts, machine)
    factor = model.config.contrastive_weight
    sums: dict = {}
    for part, gradient in zip(parts, gradients, strict=True):
        weight = part["removed"].shape[-2] / batch_size
        with machine.autocast():
            out = model(part["x"], part["removed"], part["valid"])
        # Eq. 5: the derivative of this sum by the projection is NT-Xent's gradient at it
        surrogate = (out.projection.float() * gradient).sum()
        # a term added to the loss in ContrastiveEmbeddingModel.forward belongs here too
        machine.scaler.scale(out.mem * weight + factor * surrogate).backward()
        out.contrastive = contrastive
        out.loss = out.mem + factor * contrastive
        add_to_sums(sums, out, weight)
    return sums


def projection_gradients(model, parts: list[dict], machine) -> tuple[torch.Tensor, list]:
    """NT-Xent of the global batch; for each part, its gradient at the projections (2, b, P)."""
    projections = []
    for part in parts:
        valid = None if part["valid"] is None else part["valid"].flatten(0, 1)
        with torch.no_grad(), machine.autocast():
            _, cls, _ = model.encode_kept(
                part["x"].flatten(0, 1), part["removed"].flatten(0, 1), valid
            )
            projections.append(model.project(cls).float())
    projection = torch.cat(projections, dim=1)  # (2, B / world, P)
    of_all = projection.new_zeros(machine.world, *projection.shape)
    of_all[machine.rank] = projection  # the sum over processes gathers them
    z = machine.sum(of_all).transpose(0, 1).flatten(1, 2)  # (2, B, P)
    z.requires_grad_()
    loss = mixmag.nt_xent(z[0], z[1], model.config.temperature)
    (gradient,) = torch.autograd.grad(loss, z)
    gradient = gradient.chunk(machine.world, dim=1)[machine.rank]  # (2, B / world, P)
    return loss.detach(), list(gradient.split([part["x"].shape[1] for part in parts], dim=1))


# ------------------------------------------------------------------------- measuring, export, curve


def pretraining_split(ids: list[str], tasks: dict, holdout: float) -> tuple[list, list]:
    """Slide ids to train on, and those that are held out to measure the loss on.
    Whole cases are held out, a share of `holdout`: at least four, but no more than a fifth. They
    are those whose hashed names come first, so that new cases hardly change the choice."""
    case_of = {}
    for case in itertools.chain(*tasks.values()):
        case_of.update(dict.fromkeys(case.slide_ids, case.case_id))
    cases = {case_of.get(i, i) for i in ids}
    ordered = sorted(cases, key=lambda case: hashlib.sha256(case.encode("utf-8")).digest())
    count = min(max(HELD_OUT_CASES, round(holdout * len(cases))), len(cases) // 5)
    held_out = set(ordered[: count if holdout else 0])
    train_ids = [i for i in ids if case_of.get(i, i) not in held_out]
    held_out_ids = [i for i in ids if case_of.get(i, i) in held_out]
    return train_ids, held_out_ids


def check_no_leakage(init: str, folder: Path, cases: list) -> None:
    """Refuse an encoder that was pretrained on any slide of the tune and test cases among `cases`.
    Any task's table may name further slides of such a case."""
    listed = encoder_folder(init) / "slides.csv"
    if not listed.exists():
        log(f"WARNING: {listed} is missing; nobody can tell which slides this encoder saw")
        return
    rows = data.read_csv(listed, ("slide_id", "role"))
    seen = {row["slide_id"] for row in rows if row["role"] == "train"}
    tasks = {name: data.read_table(folder, name).cases for name in data.task_names(folder)}
    tasks["this"] = cases
    if leaked := seen & data.evaluation_slides(tasks)["this"]:
        found = f"{plural(len(leaked), 'slide')} of its tune or test cases, such as {min(leaked)!r}"
        advice = "pretrain without them, with the same --fold and --seed"
        raise MixmagError(f"{init} was pretrained on {found}; {advice}")


def check_no_copies(slides: dict, cases: list) -> None:
    """Refuse one slide under two ids in two splits, by 16 of its cells; verify compares all."""
    seen: dict = {}
    for case in cases:
        for slide in (slides[i] for i in case.slide_ids):
            if len(slide.cells) == 0:
                continue
            some = slide.features[:: math.ceil(len(slide.cells) / 16)]  # glass alone may be equal
            digest = hashlib.sha256(slide.cells.tobytes() + some.tobytes()).digest()
            other, split = seen.setdefault(digest, (slide.slide_id, case.split))
            if split != case.split:
                found = f"in split {case.split}, and a copy of it, {other!r}, in split {split}"
                raise MixmagError(f"{slide.path}: it is {found}; data.py verify lists all copies")


def used_slides(folder: Path, tasks: dict, ids: list[str]) -> str:
    """How many slides pretraining sees, and what each table leaves out or will be refused for."""
    used = set(ids)
    slides = plural(len(data.slide_files(folder)), "slide")
    text = f"{folder}: pretraining uses {len(used)} of {slides}"
    if not tasks:
        text += "; no table in tasks/: finetune will refuse tasks that tune or test on them"
    for task, evaluated in data.evaluation_slides(tasks).items():
        if left_out := sorted(evaluated - used):
            text += f"\n{task}.csv leaves out {len(left_out)}, such as {left_out[0]}"
        if seen := evaluated & used:
            text += f"\nfinetune will refuse {task}: it tunes or tests on {len(seen)} of these"
    return text


def finetuning_plan(model, sets: dict) -> str:
    """What the task asks for: cases, slides, regions and tokens of each split."""
    lines = [f"{'':8s}{'cases':>8s}{'slides':>8s}{'regions':>9s}{'tokens':>13s}"]
    for split, dataset in sets.items():
        regions = sum(map(len, dataset.corners.values()))
        tokens = regions * len(model.index)
        line = f"{split:8s}{len(dataset):8d}{len(dataset.corners):8d}{regions:9d}{tokens:13,d}"
        lines.append(line + dataset.uncovered)
    return "\n".join(lines)


def region_flops(config: mixmag.Config, M: int) -> int:
    """FLOPs of the matrix products of MEM on a region, forward and backward, as torch counts."""
    with torch.device("meta"):
        model = mixmag.MaskedEmbeddingModel(config)
        x = torch.empty(1, config.geometry().num_tokens, config.dim)
        removed = torch.empty(1, M, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(x, removed).loss.backward()
    return counter.get_total_flops()


def matrix_rate(machine) -> float:
    """FLOPs per second of plain matrix products in the run's precision."""
    from torch.utils.benchmark import Timer  # its import takes a quarter of a second

    side = 8192 if machine.device.type == "cuda" else 1024
    a = torch.randn(side, side, device=machine.device, dtype=machine.dtype)
    timer = Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())
    return 2 * side**3 / timer.timeit(8).mean


def log_speed(config, dataset, regions: int, seconds: float, machine) -> None:
    """Tokens per second, and the useful FLOPs as a share of what this device can do at most."""
    rate = regions * dataset.views / max(seconds, 1e-9)
    share = rate * region_flops(config, dataset.removed_tokens) / matrix_rate(machine)
    text = f"{rate * config.geometry().num_tokens:,.0f} tokens per second over {seconds:.0f} s, "
    text += f"{share:.0%} of the rate of plain matrix products on this device"
    if machine.device.type == "cuda":
        text += f", peak memory {torch.cuda.max_memory_allocated(machine.device) / 1e9:.1f} GB"
    log(text)


def bootstrap_aurocs(labels, scores, seed: int, resamples: int = 1000) -> np.ndarray | None:
    """(resamples,) `Outcome.metric` of cases drawn with replacement within each class.
    scores (cases,) or (cases, G). None with fewer than two cases of a class."""
    from scipy.stats import mannwhitneyu  # its import takes a second

    labels = np.asarray(labels)
    ranked = OUTCOME.of_class(scores)
    members = {k: np.flatnonzero(labels == k) for k in range(max(ranked), -1, -1)}
    if min(map(len, members.values())) < 2:
        return None
    rng = np.random.default_rng(seed)
    drawn = {k: rng.choice(cases, (resamples, len(cases))) for k, cases in members.items()}
    aurocs = []
    for k, column in ranked.items():
        rest = np.hstack([drawn[other] for other in drawn if other != k])
        U = mannwhitneyu(column[drawn[k]], column[rest], axis=1, method="asymptotic").statistic
        aurocs.append(U / (drawn[k].shape[1] * rest.shape[1]))  # of all pairs of cases
    return np.mean(aurocs, axis=0)


def interval(samples: np.ndarray | None) -> list[float] | None:
    return None if samples is None else np.percentile(samples, [2.5, 97.5]).tolist()


def finish_finetuning(config, run: Run, model, sets: dict, best: dict, classes) -> None:
    """Score tune and test with the best epoch; write weights, predictions.csv and result.json."""
    state = best.pop("model_state")
    model.load_state_dict(state)
    sets["tune"].cached.clear()
    lines = []
    scores = {}
    for split in ("tune", "test"):
        slide_scores = score_cases(model, sets[split], run.machine, config.batch_size)
        scores[split] = case_scores(sets[split], slide_scores, best["case_score"])
        for case, score in zip(sets[split].cases, scores[split], strict=True):
            lines.append((case.case_id, classes[case.label], *np.ravel(score).tolist(), split))
    if not run.writes:
        return
    with whole_file(run.folder / "model.safetensors") as temporary:
        save_file(state, temporary)
    header = ("case_id", "label", *OUTCOME.columns(classes), "split")
    data.write_csv(run.folder / "predictions.csv", header, lines)
    names = ("task", "init", "tokens", "magnification", "seed")
    result = {"kind": "finetune", **{name: getattr(config, name) for name in names}}
    result["cases"] = {split: len(dataset) for split, dataset in sets.items()}
    result["slides_left_out"] = sorted(i for dataset in sets.values() for i in dataset.dropped)
    result |= {**best, "classes": classes}
    result |= measure_tests(sets["test"].labels, scores["test"], classes, config.seed)
    data.write_json(run.folder / "result.json", result)


def measure_tests(labels: list, scores, classes: list, seed: int) -> dict:
    """AUROC of the test cases and its 95 % interval over cases. Empty if a class is absent."""
    if len(set(labels)) < len(classes):
        return {}
    samples = bootstrap_aurocs(labels, scores, seed)
    return {"auroc": OUTCOME.metric(labels, scores), "interval": interval(samples)}


def check_finite(run: Run, step: int, loss: float, norm: float, slides: str) -> None:
    """Refuse a loss or a gradient's norm that is not finite.
    In fp16 steps of infinite norm are skipped and the scale falls; below 1 it is not to blame."""
    scaler = run.machine.scaler
    skipped = scaler.is_enabled() and scaler.get_scale() >= 1
    if not math.isfinite(loss) or not (math.isfinite(norm) or skipped):
        found = f"the loss is {loss:.4g}, the gradient's norm {norm:.4g}, with {slides}"
        advice = "try data.py verify, a smaller --lr or --amp off"
        raise MixmagError(f"{run.folder}: at step {step} {found}; {advice}")


def note_pretraining(run: Run, step, sums: dict, rate, norm, magnifications, bar) -> None:
    """One line of metrics: the sums of a step over all processes."""
    total = {name: run.machine.sum(value.double().cpu()) for name, value in sums.items()}
    of_level, count = total.pop("levels")
    values = {name: value.item() for name, value in total.items()}
    for magnification, loss in zip(magnifications, (of_level / count).tolist(), strict=True):
        values[f"{magnification}x"] = loss
    run.note(step=step, **values, rate=rate, norm=norm.item())
    bar.set_postfix(loss=f"{values['loss']:.3f}")


LEGEND = (
    "mean: the mean embedding of a magnification. shift, parent, children, neighbours: the mean "
    "and how these visible tokens (shift: all) deviate from theirs. mixture, kriging: weighted "
    "deviations, fitted on the training slides. least: known is all but a synthetic tile's noise."
)


class Yardsticks:
    """Predictions of removed tokens that need no network: what an encoder has to beat.
    All start from the mean embedding of a magnification (each scaled to length 1) and add what
    LEGEND says. "mixture" weighs five mean deviations. "kriging" is the conditional mean of a
    Gaussian with a covariance of places for each of the first principal directions (the rest as the
    mixture)."""

    def __init__(self, dataset, mean: torch.Tensor, windows: int = 1024, directions: int = 96):
        """mean (K, D). dataset: RegionDataset of the training slides."""
        self.mean = mean
        self.level = dataset.geometry.level()
        same = self.level[:, None] == self.level
        related = [*dataset.geometry.relatives().values(), same, torch.ones_like(same)]
        self.related = torch.stack(related).float()  # (5, N, N)
        count = min(windows, 4 * len(dataset))
        self.fit_mixture(dataset, min(count, 256), directions)
        self.fit_kriging(dataset, count)

    def deviations(self, x, removed, valid=None) -> tuple[torch.Tensor, torch.Tensor]:
        """y (B, N, D), 0 at invalid tokens, and visible (B, N): 1 where a token is given."""
        y = torch.nn.functional.normalize(x.float(), dim=-1) - self.mean[self.level]
        valid = torch.ones_like(y[..., 0]) if valid is None else valid.float()
        return y * valid[..., None], valid.scatter(1, removed, 0.0)

    def read(self, dataset, count: int):
        """Yields y, visible and removed of the first `count` windows, 16 at a time."""
        for i in progress(range(0, count, 16), desc="yardsticks"):
            batch = dataset.batch(range(i, min(i + 16, count)))
            y, visible = self.deviations(batch["x"], batch["removed"], batch["valid"])
            yield y, visible, batch["removed"]

    def relative_means(self, y, visible, removed) -> torch.Tensor:
        """(5, B, M, D): mean deviations of the visible parent, children, neighbours, tokens of the
        same magnification, and all; 0 where none is visible."""
        weight = self.related[:, removed] * visible[:, None]  # (5, B, M, N)
        return weight @ y / weight.sum(-1, keepdim=True).clamp(min=1)

    def fit_mixture(self, dataset, count: int, directions: int) -> None:
        """weights (K, 5) by least squares, and basis (D, P), the first principal directions."""
        gram = torch.zeros(len(self.mean), 6, 6)
        sample = []
        for y, visible, removed in self.read(dataset, count):
            means = self.relative_means(y, visible, removed)
            columns = torch.cat([means, mixmag.take(y, removed)[None]])  # (6, B, M, D)
            for k in range(len(gram)):
                a = columns[:, self.level[removed] == k].flatten(1)  # (6, tokens * D)
                gram[k] += a @ a.T
            sample.append(y.flatten(0, 1)[::7])
        inner = gram[:, :5, :5]
        # one relative may tell nothing new, such as the only token of a magnification
        ridge = 1e-6 * inner.diagonal(dim1=1, dim2=2).mean() * torch.eye(5)
        self.weights = torch.linalg.solve(inner + ridge, gram[:, :5, 5])
        tokens = torch.cat(sample)
        self.basis = torch.pca_lowrank(tokens, min(directions, *tokens.shape), center=False)[2]

    def fit_kriging(self, dataset, count: int) -> None:
        """covariance (P, N, N) of places along each direction, equal for all turns."""
        N = len(self.level)
        total = torch.zeros(self.basis.shape[1], N, N)
        for y, _, _ in self.read(dataset, count):
            z = (y @ self.basis).permute(2, 1, 0)  # (P, N, B)
            total += z @ z.transpose(1, 2)
        turned = [total[:, turn][:, :, turn] for turn in dataset.geometry.dihedral()]
        covariance = torch.stack(turned).mean(0) / count
        noise = 0.01 * covariance.diagonal(dim1=1, dim2=2).mean(1)  # (P,)
        self.covariance = covariance + noise[:, None, None] * torch.eye(N)

    def predict(self, x, removed, valid=None) -> dict[str, torch.Tensor]:
        """name -> (B, M, D)."""
        y, visible = self.deviations(x, removed, valid)
        means = self.relative_means(y, visible, removed)
        parent, children, neighbours, _, shift = means
        level = self.level[removed]
        mixture = torch.einsum("bmw,wbmd->bmd", self.weights[level], means)
        added = {"mean": torch.zeros_like(shift), "shift": shift, "parent": parent}
        added |= {"children": children, "neighbours": neighbours, "mixture": mixture}
        added["kriging"] = mixture + self.krige(y, visible, removed, mixture)
        return {name: self.mean[level] + part for name, part in added.items()}

    def krige(self, y, visible, removed, start) -> torch.Tensor:
        """(B, M, D): from `start` to the conditional mean along the principal directions."""
        predicted = []
        for z, given, wanted in zip(y @ self.basis, visible, removed, strict=True):  # z (N, P)
            seen = given.nonzero().flatten()  # (n,)
            inner = self.covariance[:, seen][:, :, seen]
            across = self.covariance[:, wanted][:, :, seen]  # (P, M, n)
            solved = torch.linalg.solve(inner, z[seen].T)  # (P, n)
            predicted.append(torch.einsum("pmn,pn->mp", across, solved))
        return (torch.stack(predicted) - start @ self.basis) @ self.basis.T


HELD_OUT_WINDOWS = 512  # at most so many are measured, evenly spread


def held_out_losses(dataset, predict) -> dict[str, list]:
    """predictor -> (K,) mean of 1 - cosine on the removed tokens of the windows of `dataset`.
    predict: a function of x, removed, valid that gives predictor -> (B, M, D)."""
    sums: dict = defaultdict(float)
    count = min(len(dataset), HELD_OUT_WINDOWS)
    chosen = np.linspace(0, len(dataset) - 1, count).astype(int)
    for start in range(0, count, 16):  # short, so no signal interrupts it
        batch = dataset.batch(chosen[start : start + 16])
        given = batch["x"], batch["removed"], batch["valid"]
        target = mixmag.take(batch["x"], batch["removed"])
        for name, pred in predict(*given).items():
            found = mixmag.level_losses(dataset.geometry, pred, target, *given[1:])
            sums[name] += torch.stack(found).double()
    return {name: (total / count).tolist() for name, (total, count) in sums.items()}


def model_losses(model, dataset, machine) -> list[float]:
    """(K,) as `held_out_losses`, of a model."""

    def predict(*given) -> dict:
        moved = [t if t is None else t.to(machine.device) for t in given]
        with torch.no_grad(), machine.autocast():
            out = mixmag.MaskedEmbeddingModel.forward(model, *moved)
        return {"model": out.pred.float().cpu()}

    model.eval()
    losses = held_out_losses(dataset, predict)["model"]
    model.train()
    return losses


def markdown(titles: list, rows: list) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def export_encoder(run: Run, encoder, slide, preset: str, train_ids, held_out_ids) -> None:
    """RUN/encoder: weights, config, the slides it saw. config.json comes last: then it is whole."""
    folder = run.folder / "encoder"
    state = {name: value.cpu().contiguous() for name, value in encoder.state_dict().items()}
    with whole_file(folder / "model.safetensors") as temporary:
        save_file(state, temporary)
    roles = [(i, "train") for i in train_ids] + [(i, "held-out") for i in held_out_ids]
    data.write_csv(folder / "slides.csv", ("slide_id", "role"), roles)
    facts = {
        "model": encoder.config.to_dict(),
        "tile_encoder": slide.meta["encoder"],
        "preset": preset,
        "licence": "that of the tile encoder's outputs (Virchow2: CC-BY-NC-ND 4.0)",
    }
    data.write_json(folder / "config.json", facts)


def encoder_folder(run) -> Path:
    """The exported encoder of a run, or the folder itself where it is one."""
    for folder in (Path(run) / "encoder", Path(run)):
        if (folder / "config.json").exists() and not (folder / "metrics.jsonl").exists():
            return folder
    raise MixmagError(f"{run}: no exported encoder; give a finished pretraining run")


def read_encoder(run, slide) -> mixmag.MixingEncoder:
    """The pretrained encoder of a run. Raises MixmagError where it does not fit the slide."""
    folder = encoder_folder(run)
    try:
        encoder = mixmag.load_encoder(folder)
        tile_encoder = data.read_json(folder / "config.json")["tile_encoder"]
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise MixmagError(f"{folder}: {one_line(error)}") from None
    check_same_encoder(folder, tile_encoder, encoder.config, slide)
    return encoder


def check_same_encoder(run, tile_encoder: str, config: mixmag.Config, slide) -> None:
    """Refuse a model that was trained on other embeddings than the slide's."""
    trained_on = data.signature(tile_encoder, config.dim, config.magnifications)
    found = data.embedding_signature(slide)
    if trained_on != found:
        fault = f"{run} was trained on {trained_on}; --data holds {found}"
        raise MixmagError(f"{fault}; give another of the two")


def finish_pretraining(config, run: Run, model, slides, directions, held_out, steps) -> None:
    """Measure the loss on held-out slides, draw the curve, write SUMMARY.md and result.json.
    The yardsticks are fitted on `slides`, those of training, with their `directions` (K, D)."""
    cohort = data.synthetic_facts(config.data)
    title = f"{config.data}, synthetic" if cohort else config.data
    text = "Too few cases to hold one out: the loss was not measured on unseen slides."
    losses: dict = {}
    magnifications = model.config.magnifications
    if held_out:
        trained = dataclasses.replace(held_out, slides=slides, stride=1, turn=True)
        losses = held_out_losses(held_out, Yardsticks(trained, directions).predict)
        losses["model"] = model_losses(model, held_out, run.machine)
        words = verdict(run, losses, magnifications)
        if cohort:
            losses["least"] = list(cohort["least_mem_loss"].values())
        windows = plural(min(len(held_out), HELD_OUT_WINDOWS), "region")
        measured = f"Measured on {windows} of {plural(len(held_out.slides), 'slide')}."
        rows = []
        for name, values in losses.items():
            numbers = [f"{value:.3f}" for value in (*values, np.mean(values))]
            rows.append([name, *numbers])
        titles = ["predictor of the removed tokens", *(f"{m}x" for m in magnifications), "all"]
        text = f"{markdown(titles, rows)}\n\n{measured} {words}\n\n{LEGEND}"
        if not data.task_names(config.data):
            text += "\n\nNo task table says which slides are of one patient: some may be in both."
    heading = f"# {run.folder.name}: loss (1 - cosine) on held-out slides of {title}"
    data.write_text(run.folder / "SUMMARY.md", f"{heading}\n\n{text}\n")
    result = {"kind": "pretrain", "steps": steps, "held_out": losses or None}
    data.write_json(run.folder / "result.json", result)
    print(text)
    draw_curve(run, losses, magnifications, title)  # last: a picture never costs a result


def verdict(run: Run, losses: dict, magnifications) -> str:
    """In words: what the model is not better than, and whether it overfits."""
    sentences = []
    for i, magnification in enumerate(magnifications):
        as_good = [name for name, values in losses.items() if values[i] <= losses["model"][i]]
        as_good.remove("model")
        beaten = f"does not beat {', '.join(as_good)}" if as_good else "beats all others"
        sentences.append(f"At {magnification}x the model {beaten}.")
    steps, curve = run.curve("held_out")
    best = int(np.argmin(curve))
    if curve[-1] > 1.01 * curve[best]:
        sentences.append(f"It overfits: at step {steps[best]} its loss was {curve[best]:.3f}.")
    return " ".join(sentences)


@contextlib.contextmanager
def saved_figure(path, width: float = 6.4, height: float = 3.6, **grid):
    """Yields a figure and its axis, or its grid of axes, and then writes the figure as PNG.
    In matplotlib's own settings: a user's matplotlibrc may ask for LaTeX."""
    from matplotlib import style
    from matplotlib.figure import Figure  # without pyplot: no display and nothing global

    with style.context(["default", {"axes.spines.top": False, "axes.spines.right": False}]):
        figure = Figure((width, height), layout="constrained")
        yield figure, figure.subplots(**grid)
        with whole_file(path) as temporary:
            figure.savefig(temporary, dpi=130, format="png")


def draw_curve(run: Run, losses: dict, magnifications, title: str) -> None:
    """RUN/curve.png: the loss of each magnification, and the predictors that need no network."""
    with saved_figure(run.folder / "curve.png") as (_, axis):
        for m in magnifications:
            axis.plot(*run.curve(f"{m}x"), lw=1, label=f"{m}x, training batches")
        styles: dict = {"shift": ":", "neighbours": "-.", "mixture": "--", "kriging": "-"}
        styles["least"] = (0, (1, 4))
        for name, style in styles.items():
            if name in losses:
                label = f"{name}, held out"
                axis.axhline(np.mean(losses[name]), color="black", ls=style, lw=1, label=label)
        if losses:
            axis.plot(*run.curve("held_out"), "o-", color="crimson", label="encoder, held out")
        axis.set(xlabel="optimizer step", ylabel="1 - cosine at removed tokens")
        axis.set_title(f"{run.folder.name}, {title}", parse_math=False)
        axis.legend(fontsize=7, frameon=False, ncols=2)


# ----------------------------------------------------------------------------------- predict, embed


def read_classifier(folder) -> tuple[mixmag.SlideClassifier, dict]:
    """The model of a finished fine-tuning run, and what the run's config and result say."""
    try:
        facts = data.read_json(Path(folder) / "config.json")
        facts |= data.read_json(Path(folder) / "result.json")
        model_config = mixmag.Config.from_dict(facts["model"])
        encoder = None
        if facts["init"] != "none":
            encoder = mixmag.MixingEncoder(model_config)
        settings = {name: facts[name] for name in ("tokens", "magnification", "hidden")}
        outputs = len(OUTCOME.columns(facts["classes"]))
        model = mixmag.SlideClassifier(model_config, encoder, **settings, outputs=outputs)
        model.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    except (MixmagError, OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise MixmagError(f"{folder}: not a finished fine-tuning run ({one_line(error)})") from None
    return model.eval(), facts


def one_case_per_slide(model, slides: list, min_cover: float) -> data.CaseDataset:
    by_id = {slide.slide_id: slide for slide in slides}
    cases = [data.Case(slide_id, 0, "", [slide_id]) for slide_id in by_id]
    return data.CaseDataset(by_id, cases, model.config.geometry(), model.index, min_cover)


def open_run(run, folder, slide_ids, device: str, failed: list | None = None) -> tuple:
    """A run's model and facts, its or other slides without labels, and the machine."""
    model, facts = read_classifier(run)
    machine = start_machine(device, facts["amp"], model.config.width)
    slides = data.read_slides(folder or facts["data"], slide_ids, failed)
    check_same_encoder(run, facts["tile_encoder"], model.config, slides[0])
    dataset = one_case_per_slide(model, slides, facts["min_cover"])
    return model.to(machine.device), facts, dataset, machine


def predict(run, folder=None, slides=None, out=None, device: str = "auto") -> int:
    """Score slides, each by itself, and write a CSV of slide_id and score."""
    failed: list = []
    model, facts, dataset, machine = open_run(run, folder, slides, device, failed)
    failed += [(i, "predict", "no cells, or no valid token") for i in dataset.dropped]
    rows = []
    scores = score_cases(model, dataset, machine, 1)  # one by one: memory for the largest slide
    for case, score in zip(dataset.cases, scores, strict=True):  # score (1,) or (1, G)
        if np.isfinite(score).all():
            rows.append((case.case_id, *score.ravel().tolist()))
        else:
            failed.append((case.case_id, "predict", "its score is not finite; see data.py verify"))
    path = Path(out or Path(run) / "predict.csv")
    data.write_csv(path, ("slide_id", *OUTCOME.columns(facts["classes"])), rows)
    print(f"{plural(len(rows), 'slide')} scored in {path}, {len(failed)} failed{dataset.uncovered}")
    return data.report_failed(path.with_name(f"{path.stem}-failed.csv"), failed)


@dataclass
class OutputPlaces:
    """Where the L outputs of a slide lie: its valid tokens, or its regions for `cls`."""

    slide: data.Slide
    labels: list[str]  # names of the magnifications; "regions" for `cls`
    window: np.ndarray  # (L,)
    token: np.ndarray  # (L,) which of the window's outputs
    region: np.ndarray  # (L, 2) the window's col, row on the lattice of regions
    frame: np.ndarray  # (L, 4) the window's box
    k: np.ndarray  # (L,) index of the magnification
    side: np.ndarray  # (L,) level-0 px, not rounded
    place: np.ndarray  # (L, 2) col, row on the lattice of this side
    box: np.ndarray  # (L, 4) left, top, right, bottom in level-0 px
    weights: dict = field(default_factory=dict)  # name -> (L,), of a heatmap


def output_places(model, dataset, slide_id: str) -> OutputPlaces:
    """In the order in which a model pools the outputs: window by window."""
    R = model.config.region
    slide = dataset.slides[slide_id]
    corners = dataset.corners[slide_id]  # in cells
    _, valid = data.token_index(slide, dataset.window_cells[slide_id], dataset.entries)  # (W, n)
    outputs = model.config.geometry().token_table()[model.index.cpu()].numpy()  # (n, 3)
    labels = [f"{m}x" for m in slide.meta["magnifications"]]
    cells = 1  # per side of an output at the lowest magnification
    if model.tokens == "cls":
        valid = np.ones((len(corners), 1), bool)
        outputs = np.zeros((1, 3), np.int64)
        labels = ["regions"]
        cells = R
    window, token = valid.nonzero()
    region = corners[window] // R
    frame = lattice_boxes(slide, region, R * slide.meta["cell_px"])
    k, row, col = outputs[token].T
    side = cells * slide.meta["cell_px"] / 2.0**k
    place = corners[window] // cells * 2 ** k[:, None] + np.stack([col, row], axis=1)
    box = lattice_boxes(slide, place, side[:, None])
    return OutputPlaces(slide, labels, window, token, region, frame, k, side, place, box)


def lattice_boxes(slide, place: np.ndarray, side) -> np.ndarray:
    """(L, 4) level-0 px of the places (L, 2) on a lattice of this side. Each edge is computed from
    the lattice's origin and rounded once, so neighbours share it."""
    edges = np.hstack([place, place + 1]) * side + slide.meta["origin"] * 2
    return edges.round().astype(np.int64)


def embed(init, out, folder=DEFAULT_DATA, tokens="cls", slides=None, min_cover=0.5, device="auto"):
    """Write an encoder's outputs as HDF5 files in TRIDENT's shape. What is there already stays."""
    failed: list = []
    found = data.read_slides(ensure_data(folder, start_machine(device)), slides, failed)
    encoder = read_encoder(init, found[0])
    machine = start_machine(device, width=encoder.config.width)
    model = mixmag.SlideClassifier(encoder.config, encoder, tokens).eval().to(machine.device)
    dataset = one_case_per_slide(model, found, min_cover)
    made_by = {
        "encoder": f"mixmag_{tokens}",
        "mixmag_encoder_sha256": data.file_sha256(encoder_folder(init) / "model.safetensors"),
        "mixmag_min_cover": min_cover,
    }
    for slide in progress(found, desc="embed"):
        try:
            embed_slide(model, dataset, slide, Path(out), made_by, machine)
        except OtherSettings:
            raise
        except MixmagError as error:
            failed.append((slide.slide_id, "embed", str(error)))
    print(f"{plural(len(found), 'slide')} in {out}, {len(failed)} failed{dataset.uncovered}")
    return data.report_failed(Path(out) / "failed.csv", failed)


def embed_slide(model, dataset, slide, out: Path, made_by: dict, machine) -> None:
    """Write a file per magnification, or one for `cls`: features (N, d) float32, coords (N, 2)."""
    if slide.slide_id in dataset.dropped:
        raise MixmagError("no cells, or no valid token")
    made_by = {**made_by, "mixmag_slide_sha256": slide.meta["sha256"]}
    files = list(output_files(out, model, slide.meta, made_by))
    written = [is_written(path, made_by) for path, _ in files]
    if all(written):
        return
    h, _ = slide_outputs(model, dataset, slide.slide_id, machine)
    places = output_places(model, dataset, slide.slide_id)
    outputs = h[places.window, places.token]  # (L, d)
    if not np.isfinite(outputs).all():
        raise MixmagError("its outputs are not finite; see data.py verify")
    for k, (path, attributes) in enumerate(files):
        here = places.k == k
        content = io.BytesIO()  # HDF5 itself would end the process where the disk gets full
        with h5py.File(content, "w") as file:
            file.create_dataset("coords", data=places.box[here, :2]).attrs.update(attributes)
            file.create_dataset("features", data=outputs[here]).attrs.update(attributes)
        with whole_file(path) as temporary:
            temporary.write_bytes(content.getbuffer())


def output_files(out: Path, model, meta: dict, made_by: dict):
    """Yields a slide's files and the attributes of their data sets, both as TRIDENT has them."""
    sizes = dict.fromkeys(meta["magnifications"], meta["tile_px"])
    if model.tokens == "cls":
        sizes = {meta["magnifications"][0]: model.config.region * meta["tile_px"]}
    for magnification, px in sizes.items():
        folder = out / f"{magnification}x_{px}px_0px_overlap" / f"features_mixmag_{model.tokens}"
        attributes = {
            **made_by,
            "patch_size": px,
            "patch_size_level0": round(px * 10 / (magnification * meta["mpp"])),
            "level0_magnification": 10 / meta["mpp"],
            "target_magnification": magnification,
            "overlap": 0,
            "name": meta["slide_id"],
            "savetodir": str(folder),
            "level0_width": meta["width"],
            "level0_height": meta["height"],
        }
        yield folder / f"{meta['slide_id']}.h5", attributes


def is_written(path: Path, made_by: dict) -> bool:
    """Whether an earlier start wrote this file. OtherSettings where it was made otherwise."""
    try:
        with h5py.File(path, locking=False) as file:
            found = dict(file["features"].attrs)
    except (OSError, KeyError):
        return False  # missing, or damaged
    if differing := data.differences({name: found.get(name) for name in made_by}, made_by):
        raise OtherSettings(f"{path} was made otherwise: {differing}; give another --out")
    return True


# ------------------------------------------------------------------------------------------ heatmap

REMARK = "attention says what the model weighed in its sum, not why: it is no evidence of causality"
UNREAD = "tissue outside the frames was not read; see tile --min-tissue and finetune --min-cover"
COLOURS = ("tab:cyan", "yellow", "black", "white")  # of the magnifications' tiles


def attention_places(model, dataset, machine) -> tuple[OutputPlaces, np.ndarray]:
    """What a model pools of the only slide of `dataset`, and the slide's score, () or (G,).
    Its weights: attention, which sums to 1; the ratio to the mean of the magnification; the rank,
    which is the share of the magnification's weights that are no larger."""
    from scipy.stats import rankdata  # its import takes a second

    batch = data.to_device(dataset.batch([0]), machine.device)
    with torch.no_grad(), machine.autocast():
        logit, attention = model(batch["x"], batch["regions"], batch["valid"])
    places = output_places(model, dataset, dataset.cases[0].case_id)
    weight = attention.double().cpu().numpy()
    if not np.isfinite(weight).all():
        raise MixmagError(f"{places.slide.path}: its attention is not finite; see data.py verify")
    ratio, rank = np.empty((2, len(weight)))
    for k in np.unique(places.k):
        here = places.k == k
        ratio[here] = weight[here] / max(weight[here].mean(), 1e-300)  # all may be 0
        rank[here] = rankdata(weight[here]) / here.sum()  # equal weights share their mean
    places.weights = {"attention": weight, "ratio": ratio, "rank": rank}
    return places, OUTCOME.score(logit)[0].numpy()


def outlines(box: np.ndarray) -> np.ndarray:
    """(L, 5, 2): a closed polygon around each box (L, 4)."""
    return box[:, [0, 1, 2, 1, 2, 3, 0, 3, 0, 1]].reshape(-1, 5, 2)


def attention_colours():
    """A norm of ratios, and its colours: clear up to 1, so that glass stays white. It ends at 10,
    whatever the weights are, so that nearly even ones look nearly even."""
    from matplotlib import colors

    steps = [(1, 0.8, 0, 0), (1, 0.4, 0, 0.5), (0.7, 0, 0, 0.7)]
    scale = colors.LinearSegmentedColormap.from_list("attention", steps)
    return colors.LogNorm(1, 10, clip=True), scale


def write_tables(folder: Path, places: OutputPlaces, offset) -> None:
    """attention.csv, with a row per token; for each magnification detections for QuPath: rectangles
    in the colours of the picture. QuPath counts pixels from the corner of a slide's bounds, so
    `offset` (x, y) is subtracted."""
    columns: dict = {"magnification": [places.labels[k].removesuffix("x") for k in places.k]}
    columns["col"], columns["row"] = places.place.T
    columns["x"], columns["y"] = places.box[:, :2].T
    columns["side"] = places.side
    columns["region_col"], columns["region_row"] = places.region.T
    columns |= places.weights
    data.write_csv(folder / "attention.csv", columns, zip(*columns.values(), strict=True))
    corners = outlines(places.box) - offset
    norm, scale = attention_colours()
    colours = (255 * scale(norm(places.weights["ratio"]))[:, :3]).round().astype(int)
    features = defaultdict(list)
    for i, k in enumerate(places.k):
        name = f"{places.labels[k]} {places.place[i, 0]}, {places.place[i, 1]}"
        properties = {"objectType": "detection", "name": name, "color": colours[i].tolist()}
        properties["measurements"] = {n: values[i].item() for n, values in places.weights.items()}
        shape = {"type": "Polygon", "coordinates": [corners[i].tolist()]}
        features[k].append({"type": "Feature", "geometry": shape, "properties": properties})
    for k, of_k in features.items():
        text = json.dumps({"type": "FeatureCollection", "features": of_k}, allow_nan=False)
        data.write_text(folder / f"attention-{places.labels[k]}.geojson", text)


def check_same_image(reader, places: OutputPlaces) -> None:
    """Refuse an image that is not the slide's. Files of some tools do not say the slide's size."""
    meta = places.slide.meta
    differs = meta.get("size_known", True) and reader.size != (meta["width"], meta["height"])
    if differs or (places.box[:, :2] >= reader.size).any():
        found = f"{reader.size} pixels, {meta['slide_id']} another size or tiles outside"
        advice = "it is not the same slide, or that was imported with another --mpp"
        raise MixmagError(f"--image {reader.path} has {found}: {advice}")


def scale_bar(axis, across: float) -> None:
    """A bar of a round length at the lower left of a picture in um that shows `across`."""
    lengths = [n * 10.0**k for n in (1, 2, 5) for k in range(6)]
    length = max(n for n in lengths if n <= max(across / 3, 1))
    label = f"{length:g} um" if length < 1000 else f"{length / 1000:g} mm"
    ends = (0.04, 0.04 + length / across)  # in parts of the picture
    axis.plot(ends, (0.04, 0.04), "black", lw=3, solid_capstyle="butt", transform=axis.transAxes)
    axis.text(0.04, 0.045, label, va="bottom", fontsize=8, transform=axis.transAxes)


def draw_attention(path, places: OutputPlaces, k: int, picture, size, bounds, title: str) -> None:
    """A map of magnification k: the ratio of each token, in its place on a slide of `size`.
    picture: of the whole slide, or None. bounds: what is shown. Nothing is smoothed."""
    from matplotlib.collections import PolyCollection

    um = places.slide.meta["mpp"]  # the axes are in um, for the scale bar
    left, top, width, height = np.array(bounds) * um
    inches = 7 / max(width, height)
    here = places.k == k
    ratio = places.weights["ratio"][here]
    norm, scale = attention_colours()
    squares = outlines(places.box[here]) * um
    tiles = PolyCollection(squares, array=ratio, cmap=scale, norm=norm, lw=0, antialiased=False)
    share = f"{places.weights['attention'][here].sum():.1%} of all attention"
    title += f"\n{places.labels[k]}: {share}, up to {ratio.max():.2f} times its mean"
    with saved_figure(path, max(5, inches * width + 1.2), inches * height + 1.4) as (figure, axis):
        if picture is not None:  # pale, so that the colours keep their meaning
            extent = (0, size[0] * um, size[1] * um, 0)
            axis.imshow(picture, cmap="gray", vmin=-80, vmax=240, extent=extent)
        axis.add_collection(tiles)
        axis.plot(*(outlines(np.unique(places.frame, axis=0)) * um).T, color="tab:blue", lw=0.6)
        axis.set(xlim=(left, left + width), ylim=(top + height, top), aspect="equal")
        axis.set(xticks=[], yticks=[])
        bar = figure.colorbar(tiles, label="times the magnification's mean weight", shrink=0.8)
        bar.set_ticks((1, 2, 5, 10), labels=("1", "2", "5", "10"), minor=False)
        scale_bar(axis, width)
        figure.suptitle(title, fontsize=8, parse_math=False)
        figure.supxlabel(f"{UNREAD}\n{REMARK}", fontsize=7)


def draw_regions(path, places: OutputPlaces, reader) -> None:
    """The six regions of most attention, and in each its tile of most at each magnification."""
    attention = places.weights["attention"]
    total = np.bincount(places.window, attention)
    best = np.argsort(-total, kind="stable")[:6]
    width = min(4.5 * len(best), 14)
    size = (width, width / len(best) + 1.1)
    with saved_figure(path, *size, ncols=len(best), squeeze=False) as (_, axes):
        for axis, window in zip(axes[0], best, strict=True):
            here = places.window == window
            left, top, right, bottom = places.frame[here][0].clip(0, reader.size * 2)
            level = reader.level_for((right - left) / 600)
            picture, within = reader.read(level, (left, top, right, bottom))
            axis.imshow(picture.crop(within), extent=(left, right, bottom, top))
            for k in np.unique(places.k[here]):
                tokens = np.flatnonzero(here & (places.k == k))
                most = tokens[[attention[tokens].argmax()]]
                line = {"color": COLOURS[k % len(COLOURS)], "label": f"most at {places.labels[k]}"}
                axis.plot(*outlines(places.box[most])[0].T, lw=1.5, **line)
            axis.set(xticks=[], yticks=[], xlim=(left, right), ylim=(bottom, top))
            share = total[window]
            title = f"region {places.region[here][0].tolist()}: {share:.2%} of the attention"
            axis.set_title(f"{title}\n{share / here.mean():.2f} times an equal share", fontsize=8)
        below = {"loc": "upper left", "bbox_to_anchor": (0, 0)}
        axes[0, 0].legend(**below, fontsize=8, facecolor="lightgrey")


def heatmap(run, slide, folder=None, image=None, out=None, device: str = "auto") -> int:
    """Where a fine-tuned model looks on a slide: a CSV, GeoJSON for QuPath, and pictures."""
    model, facts, dataset, machine = open_run(run, folder, [slide], device)
    if dataset.dropped:
        raise MixmagError(f"{slide}: no cells, or no valid token")
    places, scores = attention_places(model, dataset, machine)
    score = scores.max()  # of more than two classes that of the predicted one
    if scores.ndim:
        print(f"{slide}: predicted class {facts['classes'][scores.argmax()]}")
    meta = places.slide.meta
    size = (meta["width"], meta["height"])
    bounds = (0, 0, *size)
    offset = np.round(meta["origin"]).astype(int)  # the lattice begins where the bounds do
    if image:
        reader = data.Reader(image)
        check_same_image(reader, places)
        size = reader.size
        bounds = reader.bounds
        offset = np.array(bounds[:2])
    path = Path(out or Path(run) / "heatmap" / slide)
    write_tables(path, places, offset)  # first, whatever the pictures bring
    rule = facts["case_score"]
    print(f"{slide}: score {score:.4f}; a case's score is the {rule} over its slides")
    weights = f"{len(places.k)} weights in {path}/attention.csv, with .geojson and .png"
    print(f"{weights}{dataset.uncovered}\n{REMARK}")
    picture = None
    if image:  # 1600 px long
        colours, _, _ = data.thumbnail(reader, 1600 * data.TISSUE_UM / max(bounds[2:]))
        picture = colours.mean(axis=2)
        draw_regions(path / "regions.png", places, reader)
    title = f"{textwrap.fill(slide, 60)}\nrun {Path(run).resolve().name}, score {score:.3f}"
    for k in np.unique(places.k):
        map_path = path / f"attention-{places.labels[k]}.png"
        draw_attention(map_path, places, k, picture, size, bounds, title)
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
PAPER = {  # AUROC x 100 as printed: the tasks in the order of TASK_TITLES, then their average
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
ROW_WORDS = {"abmil": "AB-MIL", "random": "Random", "mem": "MEM", "cmem": "CMEM", "cls": "CLS"}
ROW_WORDS |= {"5": "5x", "10": "10x", "20": "20x", "3": "3x3", "7": "7x7", "11": "11x11"}
RESULTS = ("row", "task", "seed", "low", "high", "auroc", "tune_auroc")


def row_title(row: str) -> str:
    return " ".join(ROW_WORDS.get(word, word) for word in row.split("-"))


def table(folder, out, rows, tasks, seeds, preset, steps, epochs, frozen_epochs, device, seed):
    """Run rows x tasks x seeds of the paper's tables and sum up. Exit code 3: some were refused."""
    ensure_data(folder, start_machine(device))
    begun = time.time()
    names = data.task_names(folder)
    rows = rows or list(PAPER)
    tasks = tasks or sorted(names, key=[*TASK_TITLES, *names].index)
    if unknown := {*rows, *tasks} - {*PAPER, *names}:
        raise MixmagError(f"{unknown}: no such row or task; there are {[*PAPER, *names]}")
    common = {"data": str(folder), "device": device, "preset": preset}
    pretraining = PretrainConfig(steps=steps, **common)
    finetuning = FinetuneConfig(task="", epochs=epochs, frozen_epochs=frozen_epochs, **common)
    plan = list(itertools.product(range(seed, seed + seeds), rows, tasks))
    costs = cell_costs(plan, pretraining, finetuning)
    cells: dict = {}
    for number, cell in enumerate(plan, 1):
        step = f"step {number} of {len(plan)}: {row_title(cell[1])}, {cell[2]}"
        if number > 1:
            ahead = sum(costs[number - 1 :]) / sum(costs[: number - 1])
            minutes = max(1, round(ahead * (time.time() - begun) / 60))
            step += f", about {plural(minutes, 'minute')} left"
        log(step)
        try:
            cells[cell] = train_cell(*cell, Path(out), pretraining, finetuning)
        except MixmagError as error:
            if isinstance(error, OtherSettings) or data.process_rank()[1] > 1:
                raise  # of several processes some may have gone on
            log(f"{cell}: {error}")
            cells[cell] = []
    if data.process_rank()[0] == 0:
        write_results(Path(out), cells)
        facts = {"preset": preset, "steps": steps, "epochs": epochs, "frozen_epochs": frozen_epochs}
        facts |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
        facts["seconds"] = round(time.time() - begun)
        cohort = data.synthetic_facts(folder)
        facts["data"] = f"synthetic cohort, seed {cohort['seed']}" if cohort else str(folder)
        if any(len(folders) > 1 for folders in cells.values()):
            facts["data"] += ", those of all folds together"
        data.write_json(Path(out) / "machine.json", facts)
        text = format_results(Results(out))
        data.write_text(Path(out) / "SUMMARY.md", text)
        print(text)
    return 0 if all(cells.values()) else 3


def cell_costs(plan: list, pretraining, finetuning) -> list[int]:
    """What each cell costs on two cores, in epochs of AB-MIL. A step of pretraining costs about as
    much as one, an epoch with an encoder as twelve."""
    of_init = {i: dataclasses.replace(finetuning, init=i) for i in ("none", "random")}
    epochs = {init: apply_preset(config).epochs for init, config in of_init.items()}
    costs = []
    pretrained = set()
    for seed, row, _ in plan:
        method, setting, *_ = row.split("-")
        costs.append(epochs["none"] if method == "abmil" else 12 * epochs["random"])
        encoder = (seed, method, setting)
        if method in ("mem", "cmem") and encoder not in pretrained:
            costs[-1] += apply_preset(pretraining).steps or 0
            pretrained.add(encoder)
    return costs


def train_cell(seed: int, row: str, task: str, out: Path, pretraining, finetuning) -> list[Path]:
    """Pretrain where the row needs it, then fine-tune; for each fold where the task has folds.
    Returns the folders of the fine-tuning runs."""
    method, setting, *tokens = row.split("-")
    runs = out / f"seed-{seed}"
    folders = []
    folds: list = data.read_table(finetuning.data, task).folds
    for fold in folds or [None]:
        end = "" if fold is None else f"-fold-{fold}"
        folders.append(runs / f"{task}-{row}{end}")
        of_cell: dict = {"seed": seed, "fold": fold}
        tuning = dataclasses.replace(finetuning, task=task, out=str(folders[-1]), **of_cell)
        if tokens:
            tuning.tokens = tokens[0]
        if method in ("abmil", "random"):
            tuning.init = "none" if method == "abmil" else "random"
            tuning.magnification = parse_magnification(setting)
        else:
            tuning.init = str(runs / f"{method}-{setting}{end}")
            pretraining = dataclasses.replace(pretraining, out=tuning.init, **of_cell)
            if method == "mem":
                pretraining.mask = float(setting)
            else:
                pretraining.source = int(setting)
            pretrain(pretraining)
        finetune(tuning)
    return folders


def write_results(out: Path, cells: dict) -> None:
    """results.csv, and scores.csv of the test cases. cells: (seed, row, task) -> run folders."""
    lines = []
    scores: dict = defaultdict(dict)  # (task, case, label) -> column -> score
    for (seed, row, task), folders in cells.items():
        line = {"row": row, "task": task, "seed": seed}
        results = [data.read_json(folder / "result.json") for folder in folders]
        if results:
            classes = results[0]["classes"]
            cases = tested_cases(folders, classes)
            for case, score in cases.items():
                scores[task, *case][f"{row} {seed}"] = " ".join(map(str, score.tolist()))
            labels = [label for _, label in cases]
            line |= measure_tests(labels, np.squeeze(list(cases.values())), classes, seed)
            line["low"], line["high"] = line.get("interval") or ("", "")
            line["tune_auroc"] = np.mean([result["tune_auroc"] for result in results])
        lines.append([line.get(name, "") for name in RESULTS])
    if not scores:
        raise MixmagError(f"{out}: no cell of the table has a score of a test case")
    data.write_csv(out / "results.csv", RESULTS, lines)
    columns = list(dict.fromkeys(f"{row} {seed}" for seed, row, _ in cells))
    lines = [[*case, *(found.get(c, "nan") for c in columns)] for case, found in scores.items()]
    data.write_csv(out / "scores.csv", ("task", "case_id", "label", *columns), lines)


def tested_cases(folders: list[Path], classes: list[str]) -> dict[tuple, np.ndarray]:
    """(case_id, label) -> scores (1,) or (G,) of the test cases of all folds. A case that several
    folds test on has their mean."""
    columns = OUTCOME.columns(classes)
    scores = defaultdict(list)
    for folder in folders:
        lines = data.read_csv(folder / "predictions.csv", ("case_id", "label", *columns, "split"))
        for line in lines:
            if line["split"] == "test":
                case = (line["case_id"], classes.index(line["label"]))
                scores[case].append([float(line[name]) for name in columns])
    return {case: np.mean(of_folds, axis=0) for case, of_folds in scores.items()}


class Results:
    """What `table` wrote to a folder. NaN stands for a score or an AUROC that is missing."""

    def __init__(self, folder):
        lines = data.read_csv(Path(folder) / "results.csv", ("row", "task", "seed", "auroc"))
        self.rows = list(dict.fromkeys(line["row"] for line in lines))
        self.tasks = list(dict.fromkeys(line["task"] for line in lines))
        self.seeds = list(dict.fromkeys(line["seed"] for line in lines))
        self.aurocs = defaultdict(list)  # (row, task) -> (seeds,)
        self.labels = defaultdict(list)  # task -> (cases,), of the test cases
        self.scores = defaultdict(list)  # (row, task) -> (cases, seeds) or (cases, seeds, G)
        self.machine = data.read_json(Path(folder) / "machine.json")
        for line in lines:
            self.aurocs[line["row"], line["task"]].append(float(line["auroc"] or "nan"))
        columns = [f"{row} {seed}" for row in self.rows for seed in self.seeds]
        for case in data.read_csv(Path(folder) / "scores.csv", ("task", "label", *columns)):
            self.labels[case["task"]].append(int(case["label"]))
            for row in self.rows:
                texts = [case[f"{row} {seed}"].split() for seed in self.seeds]
                of_seeds = [np.squeeze(np.array(numbers, float)) for numbers in texts]
                self.scores[row, case["task"]].append(of_seeds)


def resampled_average(results: Results, row: str) -> np.ndarray | None:
    """(resamples,) averages over tasks and seeds, or None. All rows share the drawn test cases."""
    samples = []
    for number, task in enumerate(results.tasks):
        for of_seed in zip(*results.scores[row, task], strict=True):
            known = [np.isfinite(score).all() for score in of_seed]  # (cases,)
            scores = np.array(list(itertools.compress(of_seed, known)))  # (known,) or (known, G)
            labels = np.array(results.labels[task])[known]
            drawn = bootstrap_aurocs(labels, scores, number)
            if drawn is None:
                return None
            samples.append(drawn)
    return np.mean(samples, axis=0)


def format_table(results: Results, rows: list[str]) -> str:
    """Markdown of AUROC x 100, mean over seeds. An average is over all tasks, or n/a."""
    tasks = [TASK_TITLES.get(task, task) for task in results.tasks]
    titles = ["", *tasks, "average, 95 % over cases", "spread over seeds", "paper, these tasks"]
    lines = []
    for row in rows:
        aurocs = np.array([results.aurocs[row, task] for task in results.tasks])  # (tasks, seeds)
        average = f"**{100 * aurocs.mean():.1f}**"
        if bounds := interval(resampled_average(results, row)):
            average += f" ({100 * bounds[0]:.1f} to {100 * bounds[1]:.1f})"
        spread = "-"
        if len(results.seeds) > 1:
            spread = f"{100 * aurocs.mean(axis=0).std(ddof=1):.1f}"
        printed = dict(zip(TASK_TITLES, PAPER[row][:-1], strict=True))
        paper = np.mean([printed.get(task, math.nan) for task in results.tasks])
        of_tasks = [f"{100 * value:.1f}" for value in aurocs.mean(axis=1)]
        lines.append([row_title(row), *of_tasks, average, spread, f"{paper:.1f}"])
    return markdown(titles, lines).replace("nan", "n/a")


def format_results(results: Results) -> str:
    text = f"AUROC x 100 on the test cases of {results.machine['data']}, mean over seeds "
    text += f"{', '.join(results.seeds)}. The last column is the paper's, on its private data.\n"
    for compressed, title in enumerate(("1: contextualized", "2: compressed")):
        rows = [row for row in results.rows if row.endswith("-cls") == compressed]
        if rows:
            text += f"\n## Table {title} outputs\n\n{format_table(results, rows)}\n"
    return text


def demo(folder, out, seed: int, device: str) -> int:
    """The quick cohort, one pretraining of 1400 steps, and five rows of one task."""
    task = "gastric_her2"  # where, on tune splits, 1400 steps of pretraining gain most
    rows = ["abmil-20", "abmil-all", "random-all-patch", "mem-0.50-patch", "mem-0.50-cls"]
    code = table(folder, out, rows, [task], 1, "small", 1400, 14, 1, device, seed)
    auroc = {row: of_seeds[0] for (row, _), of_seeds in Results(out).aurocs.items()}
    encoders = f"{auroc['mem-0.50-patch']:.2f}, an untrained one {auroc['random-all-patch']:.2f}"
    print(f"\nOn unseen cases of {task} a pretrained encoder has an AUROC of {encoders}.")
    print("It is one synthetic task and one seed: nothing here says how tissue behaves.")
    print("Next: python train.py pretrain --mask 0.5; for your own slides data.py tile --help")
    return code


# ------------------------------------------------------------------------------------------- doctor


def doctor() -> None:
    """Versions, device, threads, precision, free disk. A WARNING says what to mend."""
    facts: dict = {"python": sys.version.split()[0], "OpenSlide library": data.OPENSLIDE_VERSION}
    requirements = Path(__file__).with_name("requirements.txt").read_text("utf-8")
    for package in re.findall(r"^[\w-]+", requirements, re.MULTILINE):
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "WARNING: missing; pip install -r requirements.txt"
    for preset in PRESETS:
        machine = start_machine(width=preset_width(preset))
        facts[f"preset {preset}"] = f"{machine}, {torch.get_num_threads()} threads"
    facts["bf16 instructions"] = torch.cpu._is_avx512_bf16_supported()
    for i in range(torch.cuda.device_count()):
        facts[f"cuda:{i}"] = torch.cuda.get_device_name(i)
        try:
            torch.ones(1, device=f"cuda:{i}").add(1).item()
        except RuntimeError as error:  # this torch has no code for this card, for instance
            facts[f"cuda:{i}"] += f" WARNING: {one_line(error)}; install another build of torch"
    if shutil.which("nvidia-smi") and not torch.cuda.is_available():
        facts["cuda"] = "WARNING: torch sees no GPU here; it may be of another CUDA"
    facts["free disk"] = f"{shutil.disk_usage(Path.cwd()).free / 2**30:.1f} GiB"
    for name, value in facts.items():
        print(f"{name:18s} {value}")
    warnings = sum("WARNING" in str(value) for value in facts.values())
    print(plural(warnings, "warning") if warnings else "ready")


# --------------------------------------------------------------------------------- the command line


def pretrain_command(**options) -> None:
    pretrain(PretrainConfig(**options))


def finetune_command(**options) -> None:
    result = finetune(FinetuneConfig(**options))
    if not result or data.process_rank()[0] > 0:
        return
    text = "no AUROC, because the test split lacks a class"
    if "auroc" in result:
        text = f"test AUROC {result['auroc']:.3f}"
    if result.get("interval"):
        text += " (95 % over cases: {:.3f} to {:.3f})".format(*result["interval"])
    print(f"{result['task']}: {text}, {result['cases']['test']} cases")


def add_config_flags(parser, config_class) -> None:
    """A flag for each field of a config."""
    for setting in dataclasses.fields(config_class):
        flag = dict(setting.metadata)
        for preset in PRESETS:
            number = flag.pop(preset)
            if number is not None:
                flag["help"] += f" ({preset}: {number:g})"
        flag["required"] = setting.default is dataclasses.MISSING
        if setting.default is False:
            flag["action"] = "store_true"
        elif not flag["required"]:
            flag["default"] = setting.default
        parser.add_argument("--" + setting.name.replace("_", "-"), **flag)


def add_pretrain_flags(parser) -> None:
    """masked embedding modelling, without labels"""
    parser.epilog = "example: python train.py pretrain --mask 0.5 --source 7"
    add_config_flags(parser, PretrainConfig)


def add_finetune_flags(parser) -> None:
    """train the prediction of a biomarker, and score its test split once"""
    parser.epilog = "example: python train.py finetune --task skin_braf --init runs/mem-0.50"
    add_config_flags(parser, FinetuneConfig)


def add_data_flags(parser, out: str, folder=DEFAULT_DATA, **more) -> None:
    add = parser.add_argument
    add("--data", dest="folder", metavar="DATA", default=folder, help="DATA folder")
    add("--out", help=out, **more)
    add("--device", default="auto", help="auto, cpu or cuda[:i]")


def add_predict_flags(parser) -> None:
    """score slides (of the run's DATA, or --data) with a fine-tuned run, into RUN/predict.csv"""
    parser.epilog = "example: python train.py predict --run runs/msi --data data/mine"
    parser.add_argument("--run", required=True, help="fine-tuning run")
    add_data_flags(parser, "CSV to write (default: RUN/predict.csv)", folder=None)
    parser.add_argument("--slides", nargs="+", metavar="ID", help="slide ids (default: all)")


def add_embed_flags(parser) -> None:
    """write contextualized or compressed outputs as HDF5 files that MIL tools read"""
    parser.epilog = "example: python train.py embed --init runs/mem-0.50 --out embeddings"
    add = parser.add_argument
    add("--init", required=True, metavar="RUN", help="pretraining run or encoder folder")
    add_data_flags(parser, "folder to write", required=True)
    add("--tokens", choices=("patch", "cls"), default="cls", help="a row per tile, or per region")
    add("--slides", nargs="+", metavar="ID", help="slide ids (default: all)")
    add("--min-cover", type=SHARE, default=0.5, help="share of its cells that a region must hold")


def add_heatmap_flags(parser) -> None:
    """where a fine-tuned run looks on a slide: RUN/heatmap/ID has pictures, CSV, GeoJSON"""
    parser.epilog = (
        "ratio: to the mean attention at a magnification; rank: the share that is no larger. "
        "example: python train.py heatmap --run runs/msi --slide S1 --image S1.svs"
    )
    add = parser.add_argument
    add("--run", required=True, help="fine-tuning run")
    add("--slide", required=True, metavar="ID", help="slide id")
    add_data_flags(parser, "folder to write (default: RUN/heatmap/ID)", folder=None)
    add("--image", metavar="SLIDE", help="the slide itself, to draw on (default: a white ground)")


def add_table_flags(parser) -> None:
    """run rows x tasks x seeds of the paper's tables 1 and 2, skipping what is done"""
    parser.epilog = "example: python train.py table --rows abmil-20 mem-0.50-patch"
    add = parser.add_argument
    add_data_flags(parser, "folder of all runs", default="runs/table")
    add("--rows", nargs="+", help="such as abmil-20, cmem-7-patch (default: all 24)")
    add("--tasks", nargs="+", help="tables in DATA/tasks (default: all)")
    add("--seeds", type=POSITIVE, default=1, help="number of seeds, from --seed on")
    add("--seed", type=NATURAL, default=0, help="the first seed")
    add("--preset", choices=PRESETS, default="small", help="sizes of every run")
    add("--steps", type=POSITIVE, help="pretraining steps (default: the preset's)")
    add("--epochs", type=POSITIVE, help="fine-tuning epochs (default: the preset's)")
    add("--frozen-epochs", type=NATURAL, default=1, help="as in finetune")


def add_demo_flags(parser) -> None:
    """a synthetic cohort, MEM pretraining, fine-tuning, a small table, in minutes"""
    add_data_flags(parser, "folder of all runs", default="runs/demo")
    parser.add_argument("--seed", type=NATURAL, default=0, help="everything random follows from it")


def add_doctor_flags(parser) -> None:
    """what this machine offers, and what will go wrong"""


COMMANDS: dict[str, tuple] = {
    "pretrain": (pretrain_command, add_pretrain_flags),
    "finetune": (finetune_command, add_finetune_flags),
    "predict": (predict, add_predict_flags),
    "embed": (embed, add_embed_flags),
    "heatmap": (heatmap, add_heatmap_flags),
    "table": (table, add_table_flags),
    "demo": (demo, add_demo_flags),
    "doctor": (doctor, add_doctor_flags),
}


def main(argv=None) -> int:
    options = vars(data.parse_command(argv, "train.py", __doc__, COMMANDS))
    return data.run_command(**options)


if __name__ == "__main__":
    sys.exit(main())
