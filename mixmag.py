"""mixmag: a region mixing encoder for mixed-magnification tile embeddings, losses, pooling.

Follows "Mixed Magnification Aggregation for Generalizable Region-Level Representations in
Computational Pathology" (the paper). Each equation number stands at the lines that implement it.
Numbers that the paper's text does not give are marked `assumed`. The file can be copied into
another project: it needs torch >= 2.6 alone, and safetensors in `load_encoder`.

Shape letters:
    B  regions in a batch        N  tokens of a region          n  tokens given, n <= N
    M  tokens removed            D  width of a tile embedding   d  width of the encoder
    K  magnifications            R  cells per region side       T  tokens of a cell
    S  slides in a batch         W  regions of these slides     L  pooled tokens of these slides
    P  width of the projection

A *cell* is one tile of the lowest magnification and all tiles beneath it. A *region* is a window of
R x R cells. *Removed* tokens are hidden from the encoder, *kept* tokens are read by it. `valid` is
True where a token is real. A *level* is the index of a magnification; 0 is the lowest.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# -------------------------------------------------------------------------------- geometry, config


class Geometry:
    """Where each token of a region lies: level by level from low to high, row by row in each level.

    region: cells per side (R). magnifications: successive doublings, such as (5, 10, 20) or (20,).
    Raises ValueError for anything else. Source: paper section 3.
    """

    def __init__(self, region: int = 3, magnifications: tuple = (5, 10, 20)):
        self.region = int(region)
        self.magnifications = tuple(magnifications)
        pairs = zip(self.magnifications, self.magnifications[1:], strict=False)
        doubling = all(high == 2 * low for low, high in pairs)
        if region < 1 or not self.magnifications or self.magnifications[0] <= 0 or not doubling:
            raise ValueError(
                "a region needs at least one cell per side and magnifications that double; "
                f"found region={region}, magnifications={self.magnifications}"
            )
        self.levels = len(self.magnifications)  # K
        self.sides = [self.region * 2**k for k in range(self.levels)]
        self.tokens_per_cell = sum(4**k for k in range(self.levels))  # T
        self.num_tokens = sum(side**2 for side in self.sides)  # Eq. 1; R^2 (1 + 4 + 16) for K = 3
        self._level_on: dict = {}

    def token_table(self) -> Tensor:
        """(N, 3) long: level, row and column on the grid of that level."""
        grids = []
        for k, side in enumerate(self.sides):
            place = torch.arange(side)
            grids.append(F.pad(torch.cartesian_prod(place, place), (1, 0), value=k))
        return torch.cat(grids)

    def level(self, device=None) -> Tensor:
        """(N,) long: the level of each token. It is copied to each device only once."""
        if device not in self._level_on:
            self._level_on[device] = self.token_table()[:, 0].to(device)
        return self._level_on[device]

    def cell_order(self) -> Tensor:
        """(N,) long. With a region's tokens cell by cell: x = by_cell[:, g.cell_order()]."""
        level, row, col = self.token_table().unbind(1)
        side = 2**level  # tokens per cell side
        cell = (row // side) * self.region + col // side
        lower = (4**level - 1) // 3  # tokens of lower levels in the cell
        return cell * self.tokens_per_cell + lower + (row % side) * side + col % side

    def dihedral(self) -> Tensor:
        """(8, N) long: four rotations, then four of the mirror image. Row 0 is the identity.

        With g = dihedral(), x[:, g[j]] turns the region as torch.rot90(picture, j % 4) turns a
        picture. For j >= 4 the picture is flipped left to right first. Tokens move; the pixels
        inside a tile stay. Source: paper section 4.2.
        """
        ids = torch.arange(self.num_tokens).split([side**2 for side in self.sides])
        grids = [i.view(side, side) for i, side in zip(ids, self.sides, strict=True)]
        mirrored = [grid.flip(1) for grid in grids]
        rows = []
        for picture in (grids, mirrored):
            for turns in range(4):
                rows.append(torch.cat([torch.rot90(grid, turns).flatten() for grid in picture]))
        return torch.stack(rows)

    def level_weights(self) -> Tensor:
        """(N,) with sum 1: the tokens of each magnification share 1/K. Source: section 3.1.1."""
        count = torch.bincount(self.level())  # (K,)
        return (1 / (self.levels * count))[self.level()]

    def select(self, magnification="all") -> Tensor:
        """(n,) long: the tokens of one magnification, or of all. ValueError for an unknown one."""
        if magnification == "all":
            return torch.arange(self.num_tokens)
        if magnification not in self.magnifications:
            raise ValueError(f"magnification {magnification} is not among {self.magnifications}")
        return (self.level() == self.magnifications.index(magnification)).nonzero().flatten()

    def relatives(self) -> dict[str, Tensor]:
        """name -> (N, N) bool: True where token j is a parent, child or neighbour of token i."""
        level, row, col = self.token_table().unbind(1)
        is_child = level[:, None] + 1 == level[None]
        is_child &= row[:, None] == row[None] // 2
        is_child &= col[:, None] == col[None] // 2
        row_distance = (row[:, None] - row[None]).abs()
        col_distance = (col[:, None] - col[None]).abs()
        is_neighbour = torch.maximum(row_distance, col_distance) == 1
        is_neighbour &= level[:, None] == level[None]
        return {"parent": is_child.T, "children": is_child, "neighbours": is_neighbour}


@dataclass
class Config:
    """Every number that shapes the model. Raises ValueError for sizes that cannot work."""

    dim: int  # D; 1280 for Virchow2's class token (paper 4.1)
    region: int = 3  # assumed
    magnifications: tuple = (5, 10, 20)
    width: int = 768  # assumed: as other slide encoders
    depth: int = 6  # assumed
    heads: int = 12  # assumed
    cls_tokens: int = 4  # paper 4.2
    decoder_width: int = 1024  # assumed: wider than the encoder (paper 4.2)
    decoder_depth: int = 2  # paper 4.2
    decoder_heads: int = 16  # assumed
    projector_hidden: int = 2048  # assumed: SimCLR
    projector_dim: int = 256  # assumed
    temperature: float = 0.1  # assumed: SimCLR
    contrastive_weight: float = 1.0  # assumed: CMEM = MEM + 1.0 * NT-Xent

    @classmethod
    def paper(cls, dim: int = 1280, **changes) -> Config:
        return cls(dim, **changes)  # the defaults

    @classmethod
    def small(cls, dim: int, **changes) -> Config:
        """About one million parameters, so that every command is usable on two CPU cores."""
        sizes = {"width": 96, "depth": 4, "heads": 4, "decoder_width": 128, "decoder_heads": 4}
        return cls(dim, **{**sizes, "projector_hidden": 256, "projector_dim": 64, **changes})

    def __post_init__(self):
        self.magnifications = tuple(self.magnifications)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type in (int, "int") and not (isinstance(value, int) and value > 0):
                raise ValueError(f"config: {field.name} is {value!r}, expected a whole number > 0")
        if self.width % self.heads or self.decoder_width % self.decoder_heads:
            raise ValueError(
                f"config: widths {self.width} and {self.decoder_width} do not divide into "
                f"{self.heads} and {self.decoder_heads} heads"
            )

    def geometry(self) -> Geometry:
        return Geometry(self.region, self.magnifications)

    def to_dict(self) -> dict:
        return {**dataclasses.asdict(self), "magnifications": list(self.magnifications)}

    @classmethod
    def from_dict(cls, values: dict) -> Config:
        known = {field.name for field in dataclasses.fields(cls)}
        if set(values) != known:
            unknown = sorted(set(values) - known)
            missing = sorted(known - set(values))
            raise ValueError(f"config: unknown keys {unknown}, missing keys {missing}")
        return cls(**values)


# ------------------------------------------------------------------------------------- transformer


def check_shape(x: Tensor | None, *expected: int) -> None:
    if x is not None and tuple(x.shape) != expected:
        raise ValueError(f"expected a tensor of {expected}, found {tuple(x.shape)}")


def at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def without_autocast(function, *tensors: Tensor) -> Tensor:
    """function(*tensors) in fp32 or better, also inside autocast."""
    with torch.autocast(tensors[0].device.type, enabled=False):
        return function(*[at_least_fp32(t) for t in tensors])


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k' / sqrt(d/h)) v. q, k, v (B, h, n, d/h), mask (B, 1, 1, n) bool or None.

    In bf16 on a CPU, torch's fused kernel is three to five times slower than the plain formula.
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    score = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)  # (B, h, n, n)
    if mask is not None:
        score = score.masked_fill(~mask, -math.inf)
    return score.softmax(-1) @ v


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None, first: int = 0) -> Tensor:
        """x (B, n, d), mask (B, 1, 1, n) -> (B, n - first, d): outputs from token `first` on."""
        parts = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in parts)
        q = q[:, :, first:]
        out = attend(q, k, v, mask)  # (B, h, n - first, d/h)
        return self.proj(out.transpose(1, 2).flatten(2))  # (B, n - first, d)


def swiglu_width(width: int) -> int:
    return 64 * max(1, round(8 * width / 3 / 64))  # assumed: 2/3 * 4 * width, multiple of 64


class SwiGLU(nn.Module):
    """Gated feed-forward layer W3 (silu(W1 x) * W2 x). Source: paper section 4.2."""

    def __init__(self, width: int):
        super().__init__()
        hidden = swiglu_width(width)
        self.w1 = nn.Linear(width, hidden)
        self.w2 = nn.Linear(width, hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class Block(nn.Module):
    """Pre-norm transformer block. It reads all tokens and returns those from `first` on."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = SwiGLU(width)

    def forward(self, x: Tensor, mask: Tensor | None = None, first: int = 0) -> Tensor:
        x = x[:, first:] + self.attn(self.norm1(x), mask, first)
        return x + self.mlp(self.norm2(x))


def init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)  # assumed: as MAE
        nn.init.zeros_(module.bias)


def attention_mask(valid: Tensor | None, cls_tokens: int) -> Tensor | None:
    """valid (B, n) -> (B, 1, 1, cls + n). Class tokens are always attended to."""
    if valid is None:
        return None
    return F.pad(valid, (cls_tokens, 0), value=True)[:, None, None, :]


class Standardize(nn.Module):
    """(x - mean) / std with constants of the training data; 0 and 1 until `fit` sets them.

    shape: (D,), or (n, D) where each place of the region has constants of its own.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, *shape: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.ones(shape))

    def fit(self, mean: Tensor, std: Tensor) -> None:
        """A dimension that hardly varies is divided by the median std: its noise stays small."""
        varying = torch.where(std > 0, std, math.nan)
        median = varying.nanmedian(-1, keepdim=True).values.nan_to_num(1.0)
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std < 1e-2 * median, median, std))

    def forward(self, x: Tensor) -> Tensor:
        return ((at_least_fp32(x) - self.mean) / self.std).to(self.mean)  # the model's dtype

    def inverse(self, x: Tensor) -> Tensor:
        return at_least_fp32(x) * self.std + self.mean


POSITION_SIZE = 0.5  # assumed: root mean square of the waves


def initial_positions(geometry: Geometry, width: int) -> Tensor:
    """(N, width): where the learned positions start.

    Waves over the token's centre in the region, plus a random vector of its level: a tile, its
    parent and its children start alike. From random positions MEM needs several times the steps.
    """
    level, row, col = geometry.token_table().unbind(1)
    side = torch.tensor(geometry.sides)[level]
    centre = (torch.stack([row, col], dim=1) + 0.5) / side[:, None]  # (N, 2) in 0..1
    count = math.ceil(width / 4)
    # from half a wave per region to half a wave per tile
    frequency = math.pi * torch.logspace(0, math.log10(geometry.sides[-1]), count)
    phase = centre[..., None] * frequency  # (N, 2, count)
    waves = torch.cat([phase.sin(), phase.cos()], dim=1).flatten(1)[:, :width]
    level_vector = torch.randn(geometry.levels, width)[level]
    return POSITION_SIZE * (math.sqrt(2) * waves + 0.5 * level_vector)


class MixingEncoder(nn.Module):
    """A vision transformer whose patches are tile embeddings. Source: paper section 4.2."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.geometry = config.geometry()
        self.standardize = Standardize(config.dim)
        self.input = nn.Linear(config.dim, config.width)  # in place of the ViT's convolution
        self.cls = nn.Parameter(torch.empty(config.cls_tokens, config.width))
        self.pos = nn.Parameter(initial_positions(self.geometry, config.width))
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.apply(init_linear)
        nn.init.normal_(self.cls, std=POSITION_SIZE)

    def forward(self, x, index=None, valid=None) -> tuple[Tensor, Tensor]:
        """x (B, n, D): any tokens of the region. index (B, n): which ones; None: all N in order.

        valid (B, n) bool; None: all. Returns cls (B, 4, d), the compressed output, and tokens
        (B, n, d), the contextualized output. Outputs at invalid tokens have no meaning.
        Raises ValueError for shapes that do not fit.
        """
        B, n = (x.shape[0], self.geometry.num_tokens) if index is None else index.shape
        check_shape(x, B, n, self.config.dim)
        check_shape(valid, B, n)
        if valid is not None:
            x = x.masked_fill(~valid[..., None], 0)  # NaN in an invalid token would spread
        pos = self.pos if index is None else F.embedding(index, self.pos)
        x = self.input(self.standardize(x)) + pos  # (B, n, d)
        cls = self.cls.expand(B, -1, -1).to(x)
        x = torch.cat([cls, x], dim=1)  # (B, 4 + n, d)
        mask = attention_mask(valid, self.config.cls_tokens)
        for block in self.blocks:
            x = block(x, mask)
        cls, tokens = self.norm(x).split([self.config.cls_tokens, n], dim=1)
        return cls, tokens


class Decoder(nn.Module):
    """Predicts removed embeddings from the encoder's outputs. Source: paper sections 3.1.1, 4.2."""

    def __init__(self, config: Config):
        super().__init__()
        width = config.decoder_width
        self.input = nn.Linear(config.width, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.pos = nn.Parameter(initial_positions(config.geometry(), width))
        heads = config.decoder_heads
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(config.decoder_depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, config.dim)
        self.standardize = Standardize(config.dim)
        self.apply(init_linear)
        nn.init.normal_(self.mask_token, std=0.02)  # assumed: as MAE

    def forward(self, cls, tokens, kept, removed, valid=None, predict_kept=False) -> Tensor:
        """cls (B, 4, d), tokens (B, N - M, d) at kept (B, N - M), removed (B, M) -> (B, M, D).

        valid (B, N) or None. predict_kept: also predict the kept tokens. The output is then
        (B, N, D): kept tokens, then removed ones.
        """
        unread = cls.shape[1] if predict_kept else cls.shape[1] + kept.shape[1]
        # Eq. 4: kept outputs and mask tokens, each with its position, go through the decoder
        tokens = self.input(tokens) + F.embedding(kept, self.pos)
        masked = self.mask_token + F.embedding(removed, self.pos)  # (B, M, d')
        x = torch.cat([self.input(cls), tokens, masked], dim=1)  # (B, 4 + N, d')
        order = torch.cat([kept, removed], dim=1)
        mask = attention_mask(None if valid is None else valid.gather(1, order), cls.shape[1])
        for block in self.blocks[:-1]:
            x = block(x, mask)
        x = self.blocks[-1](x, mask, unread)  # the last block computes only what is read
        return self.standardize.inverse(self.head(self.norm(x)))  # un-standardising is ours


# ------------------------------------------------------------------------------------------- MEM


def removal_count(N: int, mask: float) -> int:
    """M = round(mask * N). Raises ValueError unless 0 < M < N."""
    M = round(mask * N)
    if not 0 < M < N:
        raise ValueError(f"removal ratio {mask} removes {M} of {N} tokens, expected 1 to {N - 1}")
    return M


def random_removal(B: int, N: int, mask: float, generator=None, device=None) -> Tensor:
    """(B, M) long: M distinct tokens of each region, uniform over all."""
    chance = torch.rand(B, N, generator=generator, device=device, dtype=torch.float32)
    return chance.argsort(dim=1)[:, : removal_count(N, mask)]


def complement(removed: Tensor, N: int) -> Tensor:
    """removed (B, M) -> kept (B, N - M), ascending. nonzero() would force a GPU sync."""
    B, M = removed.shape
    is_removed = torch.zeros(B, N, dtype=torch.uint8, device=removed.device).scatter(1, removed, 1)
    return is_removed.argsort(dim=1, stable=True)[:, : N - M]


def take(x: Tensor, index: Tensor) -> Tensor:
    """x (B, N, D), index (B, n) -> (B, n, D)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def removal_weights(geometry: Geometry, removed: Tensor, valid: Tensor | None = None) -> Tensor:
    """removed (B, M), valid (B, N) or None -> (B, M): w_i = 1 / (K m N_k) with m = M / N.

    The weights of Eq. 2. A token is removed with probability m, so each magnification weighs 1/K in
    expectation. N_k counts valid tokens, K magnifications with any. Source: paper section 3.1.1.
    """
    B, M = removed.shape
    N = geometry.num_tokens
    level = geometry.level(removed.device)
    if valid is None:
        valid = torch.ones(B, N, dtype=torch.bool, device=removed.device)
    zeros = torch.zeros(B, geometry.levels, device=removed.device, dtype=torch.float32)
    count = zeros.index_add(1, level, valid.float())  # N_k  (B, K)
    present = (count > 0).sum(1, keepdim=True).clamp(min=1)  # K  (B, 1)
    share = 1 / (present * count.clamp(min=1))  # (B, K)
    weight = valid * share[:, level] * (N / M)  # (B, N)
    return weight.gather(1, removed)


def cosine_loss(pred: Tensor, target: Tensor) -> Tensor:
    """pred, target (B, M, D) -> 1 - cosine (B, M), in fp32 or better."""
    return 1 - F.cosine_similarity(at_least_fp32(pred), at_least_fp32(target), dim=-1)  # Eq. 3


def mem_loss(pred: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """pred, target (B, M, D), weight (B, M) -> scalar in fp32 or better. Source: paper 3.1.1."""
    return (weight * cosine_loss(pred, target)).sum(1).mean()  # Eq. 2, mean over regions


def level_losses(geometry, pred, target, removed, valid=None) -> tuple[Tensor, Tensor]:
    """pred, target (B, M, D) at removed (B, M) -> (K,) sums, (K,) counts of their valid tokens."""
    level = geometry.level(removed.device)[removed].flatten()  # (B M,)
    loss = cosine_loss(pred, target)  # (B, M)
    scored = torch.ones_like(loss) if valid is None else valid.gather(1, removed).to(loss)
    zeros = loss.new_zeros(geometry.levels)
    total = zeros.index_add(0, level, (loss * scored).flatten())
    return total, zeros.index_add(0, level, scored.flatten())


@dataclass
class Outputs:
    """What MEM returns. CMEM returns it for the 2B regions of its views, with three fields more."""

    loss: Tensor  # scalar: Eq. 2, in training plus kept_weight times the same at kept tokens
    pred: Tensor  # (B, M, D)
    removed: Tensor  # (B, M)
    cls: Tensor  # (B, 4, d)
    per_level: Tensor  # (K,) mean of 1 - cosine, NaN where no token was removed
    per_level_count: Tensor  # (K,)
    mem: Tensor | None = None  # MEM's loss; then loss = mem + contrastive_weight * contrastive
    contrastive: Tensor | None = None
    projection: Tensor | None = None  # (2, B, P)


class MaskedEmbeddingModel(nn.Module):
    """MEM: encode the kept tokens, predict the removed ones. Source: paper 3.1.1, figure 2a.

    kept_weight: weight of the same loss at the kept tokens, which the paper does not have. It makes
    the encoder's outputs hold what they were given.
    """

    def __init__(self, config: Config, kept_weight: float = 0.0):
        super().__init__()
        self.config = config
        self.kept_weight = kept_weight
        self.encoder = MixingEncoder(config)
        self.decoder = Decoder(config)

    def forward(self, x, mask=0.5, valid=None, generator=None) -> Outputs:
        """x (B, N, D), valid (B, N) or None; mask: the removal ratio, or the removed (B, M)."""
        geometry = self.encoder.geometry
        B, N, _ = x.shape
        check_shape(x, B, geometry.num_tokens, self.config.dim)
        check_shape(valid, B, N)
        if isinstance(mask, Tensor):
            removed = mask
            check_shape(removed, B, removal_count(N, mask.shape[-1] / N))  # so 0 < M < N
        else:
            removed = random_removal(B, N, mask, generator, x.device)
        kept, cls, tokens = self.encode_kept(x, removed, valid)
        if valid is not None:
            x = x.masked_fill(~valid[..., None], 0)
        predict_kept = self.training and self.kept_weight > 0
        pred = self.decoder(cls, tokens, kept, removed, valid, predict_kept)  # (B, M or N, D)
        pred_kept, pred = pred.tensor_split([pred.shape[1] - removed.shape[1]], dim=1)
        target = take(x, removed)  # (B, M, D) raw embeddings, as pred is un-standardised
        loss = mem_loss(pred, target, removal_weights(geometry, removed, valid))
        if predict_kept:
            weight = removal_weights(geometry, kept, valid)
            loss = loss + self.kept_weight * mem_loss(pred_kept, take(x, kept), weight)
        total, count = level_losses(geometry, pred.detach(), target, removed, valid)
        return Outputs(loss, pred, removed, cls, total / count, count)

    def encode_kept(self, x, removed, valid=None) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, N, D), removed (B, M) -> kept (B, N - M), cls (B, 4, d), tokens (B, N - M, d)."""
        kept = complement(removed, x.shape[1])
        kept_valid = None if valid is None else valid.gather(1, kept)
        cls, tokens = self.encoder(take(x, kept), kept, kept_valid)
        return kept, cls, tokens


# ------------------------------------------------------------------------------------- contrastive


def nt_xent(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """NT-Xent over the pairs (a_i, b_i); a, b (B, P) -> scalar in fp32 or better.

    Each of the 2B projections has to find its partner among the others. Source: 3.1.2, SimCLR.
    """
    B = a.shape[0]
    z = F.normalize(at_least_fp32(torch.cat([a, b])), dim=-1)  # (2B, P)
    similarity = without_autocast(torch.mm, z, z.T) / temperature  # (2B, 2B)
    itself = torch.eye(2 * B, dtype=torch.bool, device=z.device)
    partner = torch.arange(2 * B, device=z.device).roll(B)
    return F.cross_entropy(similarity.masked_fill(itself, -math.inf), partner)  # Eq. 5


class ContrastiveEmbeddingModel(MaskedEmbeddingModel):
    """CMEM: MEM on two nearby views, whose class tokens are aligned. Source: 3.1.2, figure 2b."""

    def __init__(self, config: Config, kept_weight: float = 0.0):
        super().__init__(config, kept_weight)
        self.projector = nn.Sequential(
            nn.Linear(config.cls_tokens * config.width, config.projector_hidden),
            nn.GELU(),
            nn.Linear(config.projector_hidden, config.projector_dim),
        )
        self.projector.apply(init_linear)

    def forward(self, x, mask=0.5, valid=None, generator=None) -> Outputs:
        """As MEM, with a leading axis of two views: x (2, B, N, D), mask and valid likewise."""
        check_shape(x, 2, x.shape[1], self.encoder.geometry.num_tokens, self.config.dim)
        if isinstance(mask, Tensor):
            mask = mask.flatten(0, 1)  # (2B, M)
        flat_valid = None if valid is None else valid.flatten(0, 1)  # (2B, N)
        out = super().forward(x.flatten(0, 1), mask, flat_valid, generator)
        out.projection = self.project(out.cls)
        a, b = out.projection
        out.mem = out.loss
        out.contrastive = nt_xent(a, b, self.config.temperature)
        # a term added here belongs in train.cmem_step too, for a batch that comes in parts
        out.loss = out.mem + self.config.contrastive_weight * out.contrastive
        return out

    def project(self, cls: Tensor) -> Tensor:
        """cls (2B, 4, d) -> (2, B, P): the projector reads the class tokens side by side."""
        return self.projector(cls.flatten(1)).unflatten(0, (2, -1))  # Eq. 6


# ------------------------------------------------------------------------------------- aggregation


class GatedABMIL(nn.Module):
    """Gated attention pooling over ragged bags. Source: paper section 3.2; Ilse et al. 2018."""

    def __init__(self, dim: int, hidden: int = 256):  # assumed
        super().__init__()
        self.V = nn.Linear(dim, hidden)
        self.U = nn.Linear(dim, hidden)
        self.w = nn.Linear(hidden, 1)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """x (L, d): all bags, one after the other; lengths (bags,) long, each at least 1, sum L.

        Returns pooled (bags, d) and attention (L,), which sums to 1 in each bag.
        Raises ValueError for an empty bag, or lengths that do not add up to L.
        """
        L, bags = x.shape[0], lengths.shape[0]
        fits = bags > 0 and ((lengths.min() >= 1) & (lengths.sum() == L)).item()
        # unlike an `if` on numbers, torch.export can follow this
        torch._check_value(fits, lambda: f"bags of one token or more, {L} in all: {lengths}")
        bag = torch.arange(bags, device=x.device).repeat_interleave(lengths, output_size=L)  # (L,)
        # Eq. 8: a gated score, then a softmax over each bag; in half precision scores would tie
        gated = torch.tanh(self.V(x)) * torch.sigmoid(self.U(x))  # (L, hidden)
        score = without_autocast(F.linear, gated, self.w.weight, self.w.bias).squeeze(1)  # (L,)
        highest = score.new_full((bags,), -math.inf).scatter_reduce(0, bag, score.detach(), "amax")
        exponential = (score - highest[bag]).exp()
        denominator = exponential.new_zeros(bags).index_add(0, bag, exponential)
        attention = exponential / denominator[bag]  # (L,)
        pooled = F.embedding_bag(  # Eq. 7: the sum of attention * x of each bag  (bags, d)
            torch.arange(L, device=x.device),
            x.to(attention),
            lengths.cumsum(0) - lengths,
            mode="sum",
            per_sample_weights=attention,
        )
        return pooled, attention


def min_slide_loss(loss: Tensor, case: Tensor) -> Tensor:
    """loss (S,), case (S,) long in 0..cases-1 -> (cases,): the smallest slide loss of each case."""
    cases = int(case.max()) + 1
    return loss.new_full((cases,), math.inf).scatter_reduce(0, case, loss, "amin")  # Eq. 9


class SlideClassifier(nn.Module):
    """Encoder (or none), pooling over all outputs of a slide, one linear layer. Source: paper 3.2.

    encoder: None pools the tile embeddings themselves. tokens: "patch" pools the contextualized
    tokens (table 1), "cls" the class tokens of each region as one vector (table 2). magnification:
    "all", or the only one to read. pool: a module (x (L, d), lengths (bags,)) -> pooled (bags, d),
    attention (L,); None: gated AB-MIL with `hidden` units. outputs: numbers per slide. Raises
    ValueError for "cls" without an encoder, and for an unknown magnification.
    """

    def __init__(
        self,
        config: Config,
        encoder: MixingEncoder | None,
        tokens: str = "patch",
        magnification="all",
        hidden: int = 256,  # assumed
        dropout: float = 0.0,
        pool: nn.Module | None = None,
        outputs: int = 1,
    ):
        super().__init__()
        if tokens not in ("patch", "cls") or (tokens == "cls" and encoder is None):
            raise ValueError(f"tokens must be patch, or cls with an encoder; found {tokens!r}")
        self.config = config
        self.encoder = encoder
        self.tokens = tokens
        with torch.device("cpu"):  # the model itself may be made on "meta"
            self.index = config.geometry().select(magnification)  # (n,)
        n = len(self.index)
        # regions at a time: as many activations as 256 of 189 tokens have at width 96, about 2 GB
        self.chunk = max(1, 256 * 189 * 96 // (n * config.width))
        if encoder is None:
            self.standardize = Standardize(n, config.dim)
            width = config.dim
        else:
            width = config.width * (config.cls_tokens if tokens == "cls" else 1)
        self.dropout = nn.Dropout(dropout)
        self.pool = GatedABMIL(width, hidden).apply(init_linear) if pool is None else pool
        self.head = nn.Linear(width, outputs)
        init_linear(self.head)

    def forward(self, x, regions, valid=None) -> tuple[Tensor, Tensor]:
        """x (W, n, D): slide after slide; regions (S,) long: how many regions each slide has.

        valid (W, n) bool or None. Returns logit (S,), or (S, outputs) for more than one output, and
        the attention (L,) over all pooled tokens.
        """
        return self.aggregate(self.encode_chunks(x, valid), regions, valid)

    def encode(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """x (W, n, D) -> contextualized (W, n, d) or compressed (W, 1, 4d) outputs.

        Raises ValueError for another n or D than this classifier reads.
        """
        check_shape(x, len(x), len(self.index), self.config.dim)
        if self.encoder is None:
            return self.standardize(x)
        cls, tokens = self.encoder(x, self.index.to(x.device).expand(len(x), -1), valid)
        return cls.flatten(1)[:, None] if self.tokens == "cls" else tokens

    def encode_chunks(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """As `encode`, chunk by chunk; backward computes each again, to hold one at a time."""
        learns = self.encoder is not None and self.encoder.pos.requires_grad
        recompute = learns and torch.is_grad_enabled() and len(x) > self.chunk
        encoded = []
        for i in range(0, len(x), self.chunk):
            part = x[i : i + self.chunk]
            part_valid = None if valid is None else valid[i : i + self.chunk]
            if recompute:
                encoded.append(checkpoint(self.encode, part, part_valid, use_reentrant=False))
            else:
                encoded.append(self.encode(part, part_valid))
        return torch.cat(encoded)

    def aggregate(self, h, regions, valid=None) -> tuple[Tensor, Tensor]:
        """h (W, n or 1, d): what `encode` returns. The rest is as in `forward`."""
        if valid is None:
            lengths = regions * h.shape[1]  # (S,)
            h = h.flatten(0, 1)  # (L, d)
        else:
            if self.tokens == "cls":
                valid = valid.any(1, keepdim=True)
            slide = torch.repeat_interleave(torch.arange(len(regions), device=h.device), regions)
            lengths = torch.zeros_like(regions).index_add(0, slide, valid.sum(1))  # (S,)
            h = h[valid]  # (L, d)
        pooled, attention = self.pool(self.dropout(h), lengths)
        pooled = self.dropout(pooled)
        logit = without_autocast(F.linear, pooled, self.head.weight, self.head.bias)  # (S, outputs)
        return logit.squeeze(-1), attention


# ------------------------------------------------------------------------------------ load_encoder


def load_encoder(path) -> MixingEncoder:
    """The encoder of an exported folder (config.json, model.safetensors), in eval mode.

    Raises FileNotFoundError for a missing file, ValueError, KeyError or SafetensorError for a
    damaged one, and RuntimeError for a weight that is missing, unexpected or of another shape.
    """
    from safetensors.torch import load_file

    folder = Path(path)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    encoder = MixingEncoder(Config.from_dict(config["model"]))
    encoder.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return encoder.eval()
