"""mixmag: a region mixing encoder over mixed-magnification tile embeddings, its losses and its aggregator.

Follows "Mixed Magnification Aggregation for Generalizable Region-Level Representations in Computational Pathology"
(the paper below); each equation number stands at the line that implements it. The file needs torch and nothing else, so
it can be copied into another project as it is. Numbers that the paper's text does not give are marked `assumed`.

Shape letters:
    B  windows (regions) in a batch     N  tokens of a region        n  tokens given, n <= N     M  tokens removed
    D  width of a tile embedding        d  width of the encoder      K  magnifications           R  cells per region side
    T  tokens of one cell               S  slides in a batch         P  width of the projection

A *cell* is one tile of the lowest magnification and all tiles below it; a *region* is an R x R window of cells. Removed
tokens are those hidden from the encoder (`removed`), kept ones those it reads; validity masks are True for real tokens.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def at_least_fp32(x: Tensor) -> Tensor:
    """In fp32, or fp64 where it is that."""
    return x if x.dtype == torch.float64 else x.float()


# ------------------------------------------------------------------------------------------------ geometry of a region


class Geometry:
    """Where each token of a region lies. Tokens are ordered magnification by magnification, row by row inside.

    region: cells per side, R. magnifications: a run of doublings from low to high, such as (5, 10, 20) or (20,).
    Raises ValueError for anything else. Source: paper section 3.
    """

    def __init__(self, region: int = 3, magnifications: tuple = (5, 10, 20)):
        self.region, self.magnifications = int(region), tuple(magnifications)
        doublings = all(b == 2 * a for a, b in zip(self.magnifications, self.magnifications[1:]))
        if region < 1 or not self.magnifications or min(self.magnifications) <= 0 or not doublings:
            raise ValueError(
                f"a region needs at least one cell a side and magnifications that double from one to the "
                f"next; found region={region}, magnifications={self.magnifications}"
            )
        self.levels = len(self.magnifications)  # K
        self.sides = [self.region * 2**k for k in range(self.levels)]
        self.tokens_per_cell = sum(4**k for k in range(self.levels))  # T
        self._level = {}  # on each device that asked for it
        self.num_tokens = sum(side**2 for side in self.sides)  # Eq. 1:  N

    def token_table(self) -> Tensor:
        """(N, 3) long: level (0 is the lowest magnification), row and column on that level's grid."""
        grids = [
            torch.cartesian_prod(torch.arange(side), torch.arange(side)) for side in self.sides
        ]
        return torch.cat([F.pad(grid, (1, 0), value=k) for k, grid in enumerate(grids)])

    def level(self, device=None) -> Tensor:
        """(N,) long: the first column of the token table, held on the device, so that no step waits for a copy of it."""
        if device not in self._level:
            self._level[device] = self.token_table()[:, 0].to(device)
        return self._level[device]

    def cell_table(self) -> Tensor:
        """(T, 3) long: the token table of a single cell."""
        return Geometry(1, self.magnifications).token_table()

    def cell_order(self) -> Tensor:
        """(N,) long: token i of the region is entry cell_order[i] of the window's (R*R*T) cell-major entries."""
        level, row, col = self.token_table().unbind(1)
        side = 2**level  # tokens per cell side on that level
        inside = (4**level - 1) // 3 + (row % side) * side + col % side
        return ((row // side) * self.region + col // side) * self.tokens_per_cell + inside

    def dihedral(self) -> Tensor:
        """(8, N) long: the four rotations, then the same of the mirror image; row 0 is the identity.

        `x[:, g[j]]` is the region turned as torch.rot90(picture, j % 4) turns the picture (after a left-right flip for
        j >= 4). Tokens move; the pixels inside a tile are not turned. Source: paper section 4.2.
        """
        ids = torch.arange(self.num_tokens).split([side**2 for side in self.sides])
        grids = [i.view(side, side) for i, side in zip(ids, self.sides)]
        return torch.stack(
            [
                torch.cat(
                    [
                        torch.rot90(grid.flip(1) if mirrored else grid, turns).flatten()
                        for grid in grids
                    ]
                )
                for mirrored in (False, True)
                for turns in range(4)
            ]
        )

    def level_weights(self) -> Tensor:
        """(N,) summing to 1: every magnification weighs 1/K, its tokens share that. Source: paper section 3.1.1."""
        return torch.cat(
            [torch.full((side**2,), 1 / (self.levels * side**2)) for side in self.sides]
        )

    def select(self, magnification="all") -> Tensor:
        """(n,) long: the tokens of one magnification, or of all. Raises ValueError for one that the region lacks."""
        if magnification == "all":
            return torch.arange(self.num_tokens)
        if magnification not in self.magnifications:
            raise ValueError(f"magnification {magnification} is not among {self.magnifications}")
        return (self.level() == self.magnifications.index(magnification)).nonzero().flatten()

    def relatives(self) -> dict:
        """name -> (N, N) bool, row = token, column = its parent / its children / its (up to eight) neighbours."""
        level, row, col = self.token_table().unbind(1)
        below = level[:, None] + 1 == level[None]
        children = below & (row[:, None] == row[None] // 2) & (col[:, None] == col[None] // 2)
        distance = torch.maximum((row[:, None] - row[None]).abs(), (col[:, None] - col[None]).abs())
        neighbours = (level[:, None] == level[None]) & (distance == 1)
        return {"parent": children.T, "children": children, "neighbours": neighbours}


# ---------------------------------------------------------------------------------------------------------- the config


@dataclass
class Config:
    """Every number that shapes the model. The paper's text lost most of them: those are `assumed`."""

    dim: int  # D, 1280 for the Virchow2 class token (paper 4.1)
    region: int = 3  # assumed
    magnifications: tuple = (5, 10, 20)
    width: int = 768  # assumed: as the slide encoders TITAN and MOOZY
    depth: int = 6  # assumed
    heads: int = 12  # assumed
    cls_tokens: int = 4  # paper 4.2
    decoder_width: int = 1024  # assumed: wider than the encoder (paper 4.2)
    decoder_depth: int = 2  # paper 4.2
    decoder_heads: int = 16  # assumed
    projector_hidden: int = 2048  # assumed: SimCLR
    projector_dim: int = 256  # assumed: P
    temperature: float = 0.1  # assumed: SimCLR
    contrastive_weight: float = 1.0  # assumed: CMEM = MEM + 1.0 * NT-Xent

    @classmethod
    def paper(cls, dim: int = 1280, **changes) -> "Config":
        return cls(dim, **changes)

    @classmethod
    def small(cls, dim: int, **changes) -> "Config":
        """About one million parameters: every command stays usable on two CPU cores."""
        sizes = dict(
            width=96,
            depth=4,
            heads=4,
            decoder_width=128,
            decoder_heads=4,
            projector_hidden=256,
            projector_dim=64,
        )
        return cls(dim, **{**sizes, **changes})

    def __post_init__(self):
        self.magnifications = tuple(self.magnifications)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and not (isinstance(value, int) and value > 0):
                raise ValueError(
                    f"config: {field.name} is {value!r}, expected a whole number above 0"
                )
        for width, heads in ((self.width, self.heads), (self.decoder_width, self.decoder_heads)):
            if width % heads:
                raise ValueError(f"a width of {width} does not divide into {heads} heads")

    def geometry(self) -> Geometry:
        return Geometry(self.region, self.magnifications)

    def to_dict(self) -> dict:
        return {**dataclasses.asdict(self), "magnifications": list(self.magnifications)}

    @classmethod
    def from_dict(cls, values: dict) -> "Config":
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(values, dict):
            raise ValueError(f"config: expected names and values, found {values!r}")
        if set(values) != known:
            raise ValueError(
                f"config: unknown keys {sorted(set(values) - known)}, missing keys {sorted(known - set(values))}"
            )
        return cls(**values)


# --------------------------------------------------------------------------------------------------------- transformer


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k' / sqrt(d/h)) v; q, k, v and the result (B, h, n, d/h), mask (B, 1, 1, n) bool or None.

    torch's fused kernel, but for bf16 on a processor: there it takes 3 to 5 times as long as the formula written out."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    score = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)  # (B, h, n, n)
    return (score if mask is None else score.masked_fill(~mask, -math.inf)).softmax(-1) @ v


class Attention(nn.Module):
    """Multi-head self-attention. x (B, n, d), mask (B, 1, 1, n) bool, True where a token may be attended to, or None,
    first: the token from which on outputs are wanted -> (B, n - first, d)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None, first: int = 0) -> Tensor:
        if first:  # queries of the wanted tokens only
            (Wq, Wkv), (bq, bkv) = (
                p.tensor_split([x.shape[-1]]) for p in (self.qkv.weight, self.qkv.bias)
            )
            qkv = F.linear(x[:, first:], Wq, bq), *F.linear(x, Wkv, bkv).chunk(2, dim=-1)
        else:
            qkv = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in qkv
        )  # each (B, h, n, d/h)
        return self.proj(attend(q, k, v, mask).transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """Gated feed-forward layer: W3 (silu(W1 x) * W2 x). Its hidden width, 2/3 * 4 * d rounded to a multiple of 64, keeps the
    parameter count of a plain MLP of ratio 4 (`assumed`)."""

    def __init__(self, width: int):
        super().__init__()
        hidden = 64 * max(1, round(8 * width / 3 / 64))
        self.w1, self.w2 = (
            nn.Linear(width, hidden),
            nn.Linear(width, hidden),
        )  # halves of one layer cost a copy more in backward
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class Block(nn.Module):
    """Pre-norm transformer block. first: the token from which on outputs are wanted; those read all tokens, and the others are not computed."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), SwiGLU(width)

    def forward(self, x: Tensor, mask: Tensor | None = None, first: int = 0) -> Tensor:
        x = x[:, first:] + self.attn(self.norm1(x), mask, first)
        return x + self.mlp(self.norm2(x))


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)  # assumed, as MAE
        nn.init.zeros_(module.bias)


def _attention_mask(valid: Tensor | None, cls_tokens: int) -> Tensor | None:
    """valid (B, n) -> (B, 1, 1, cls + n): class tokens can always be attended to."""
    return None if valid is None else F.pad(valid, (cls_tokens, 0), value=True)[:, None, None, :]


class Standardize(nn.Module):
    """(x - mean) / std per embedding dimension, with the constants of the training data (0 and 1 until they are given).
    shape: (D,), or (n, D) where each place has constants of its own."""

    def __init__(self, *shape: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.ones(shape))

    def fit(self, mean: Tensor, std: Tensor) -> None:
        """A dimension that hardly varies is left at the typical scale instead of being blown up."""
        typical = (
            torch.where(std > 0, std, math.nan).nanmedian(-1, keepdim=True).values.nan_to_num(1.0)
        )
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std < 1e-2 * typical, typical, std))

    def forward(self, x: Tensor) -> Tensor:
        return (at_least_fp32(x) - self.mean) / self.std


POSITION_SIZE = 0.5  # assumed: root mean square of an initial position; at 0.02 MEM stays longer where it predicts the mean


def initial_positions(geometry: Geometry, width: int) -> Tensor:
    """(N, width) where the learned positions start: waves of the token's centre in the region, plus a random vector of its
    magnification. A tile, its parent and its children start close to each other, so the blocks need not first learn which
    tokens are near: from purely random positions, MEM needs several times as many steps."""
    level, row, col = geometry.token_table().unbind(1)
    side = torch.tensor(geometry.sides)[level]
    centre = (torch.stack([row, col], dim=1) + 0.5) / side[:, None]  # (N, 2) in 0..1
    waves = -(-width // 4)
    frequency = (
        torch.logspace(0, math.log10(geometry.sides[-1]), waves) * math.pi
    )  # half a wave per region .. per tile
    phase = centre[..., None] * frequency  # (N, 2, waves)
    wave = torch.cat([phase.sin(), phase.cos()], dim=1).flatten(1)[:, :width]
    kind = torch.randn(geometry.levels, width)[level]
    return POSITION_SIZE * (math.sqrt(2) * wave + 0.5 * kind)


class MixingEncoder(nn.Module):
    """The region mixing encoder: a vision transformer whose patches are tile embeddings. Source: paper section 4.2."""

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
        self.apply(_init_linear)
        nn.init.normal_(self.cls, std=POSITION_SIZE)

    def forward(
        self, x: Tensor, index: Tensor | None = None, valid: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (B, n, D) any subset of the region's tokens, index (B, n) which ones (None: all N in order), valid (B, n) bool
        (None: all). Returns cls (B, 4, d), the compressed output, and tokens (B, n, d), the contextualized one; outputs
        at invalid tokens mean nothing. Raises ValueError on shapes that do not fit.
        """
        B, n, D = x.shape
        if self.config.dim != D or (
            n != self.geometry.num_tokens if index is None else index.shape != (B, n)
        ):
            raise ValueError(
                f"expected (B, {self.geometry.num_tokens}, {self.config.dim}) or fewer tokens with their index, "
                f"found {tuple(x.shape)} with index {'None' if index is None else tuple(index.shape)}"
            )
        if valid is not None:
            x = x.masked_fill(~valid[..., None], 0)  # whatever stands there, it cannot leak
        x = self.input(self.standardize(x))  # (B, n, d)
        x = x + (self.pos if index is None else F.embedding(index, self.pos))
        x = torch.cat([self.cls.expand(B, -1, -1).to(x), x], dim=1)  # (B, 4 + n, d)
        mask = _attention_mask(valid, self.config.cls_tokens)
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x).split([self.config.cls_tokens, n], dim=1)


class Decoder(nn.Module):
    """Predicts the removed embeddings from what the encoder made of the kept ones. Source: paper sections 3.1.1, 4.2."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        width = config.decoder_width
        self.input = nn.Linear(config.width, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.pos = nn.Parameter(initial_positions(config.geometry(), width))
        self.blocks = nn.ModuleList(
            Block(width, config.decoder_heads) for _ in range(config.decoder_depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, config.dim)
        self.apply(_init_linear)
        nn.init.normal_(self.mask_token, std=0.02)  # assumed, as MAE

    def forward(
        self,
        cls: Tensor,
        tokens: Tensor,
        kept: Tensor,
        removed: Tensor,
        valid: Tensor | None = None,
    ) -> Tensor:
        """cls (B, 4, d), tokens (B, n, d) at kept (B, n), removed (B, M), valid (B, N) or None -> (B, M, D).

        The order of tokens means nothing to a transformer, so the mask tokens simply follow the kept ones.
        """
        B, M = removed.shape
        cls, tokens = self.input(torch.cat([cls, tokens], dim=1)).split(
            [cls.shape[1], tokens.shape[1]], dim=1
        )
        masked = self.mask_token.expand(B, M, -1) + F.embedding(removed, self.pos)  # (B, M, d')
        x = torch.cat(
            [cls, tokens + F.embedding(kept, self.pos), masked.to(cls)], dim=1
        )  # (B, 4 + N, d')
        mask = (
            None
            if valid is None
            else _attention_mask(valid.gather(1, torch.cat([kept, removed], 1)), cls.shape[1])
        )
        for block in self.blocks[:-1]:
            x = block(x, mask)
        return self.head(
            self.norm(self.blocks[-1](x, mask, first=x.shape[1] - M))
        )  # Eq. 4, at the scored places only


# --------------------------------------------------------------------------------------------- masked embedding modelling


def removal_count(N: int, mask: float) -> int:
    """M = round(mask * N) tokens go. Raises ValueError unless 0 < M < N."""
    M = round(mask * N)
    if not 0 < M < N:
        raise ValueError(
            f"a removal ratio of {mask} takes {M} of {N} tokens: some must go and some must stay"
        )
    return M


def random_removal(
    B: int, N: int, mask: float, generator: torch.Generator | None = None, device=None
) -> Tensor:
    """(B, M) long: distinct tokens of each region, uniform over all."""
    return torch.rand(B, N, generator=generator, device=device).argsort(dim=1)[
        :, : removal_count(N, mask)
    ]


def complement(removed: Tensor, N: int) -> Tensor:
    """removed (B, M) -> (B, N - M): the other tokens, in ascending order."""
    gone = torch.zeros(removed.shape[0], N, dtype=torch.uint8, device=removed.device).scatter(
        1, removed, 1
    )
    return gone.argsort(dim=1, stable=True)[
        :, : N - removed.shape[1]
    ]  # unlike nonzero(), of known size: no GPU waits


def take(x: Tensor, index: Tensor) -> Tensor:
    """x (B, N, D), index (B, n) -> (B, n, D)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def removal_weights(geometry: Geometry, removed: Tensor, valid: Tensor | None = None) -> Tensor:
    """removed (B, M), valid (B, N) or None -> (B, M) weights w_i = 1 / (K m N_k) for a token of magnification k.

    m is the removal ratio M/N. In expectation over masks every magnification weighs 1/K. With invalid tokens, N_k and K
    count what the region really holds, and invalid ones weigh 0. Source: paper section 3.1.1.
    """
    level, N, M = geometry.level(removed.device), geometry.num_tokens, removed.shape[1]
    valid = (
        torch.ones(len(removed), N, dtype=torch.bool, device=removed.device)
        if valid is None
        else valid
    )
    count = torch.zeros(len(valid), geometry.levels, device=valid.device).index_add(
        1, level, valid.float()
    )  # (B, K): N_k
    present = (count > 0).sum(1, keepdim=True).clamp(min=1)  # (B, 1): K
    weight = valid / (present * count.clamp(min=1))[:, level] * (N / M)  # (B, N)
    return weight.gather(1, removed)


def mem_loss(pred: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Masked embedding loss. pred, target (B, M, D), weight (B, M) -> scalar, the mean over regions of Eq. 2, in fp32 or
    better. Source: paper section 3.1.1."""
    cosine = F.cosine_similarity(
        at_least_fp32(pred), at_least_fp32(target), dim=-1
    )  # Eq. 3  (B, M)
    return (weight * (1 - cosine)).sum(1).mean()  # Eq. 2


def level_losses(
    geometry: Geometry, pred: Tensor, target: Tensor, removed: Tensor, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """pred, target (B, M, D) at removed (B, M) -> (K,) sums of 1 - cosine over the valid removed tokens of each
    magnification, and (K,) how many there were."""
    level = geometry.level(removed.device)[removed]  # (B, M)
    loss = 1 - F.cosine_similarity(pred.float(), target.float(), dim=-1)  # (B, M)
    scored = torch.ones_like(loss) if valid is None else valid.gather(1, removed).to(loss)
    zero = loss.new_zeros(geometry.levels)
    return tuple(
        zero.index_add(0, level.flatten(), values.flatten()) for values in (loss * scored, scored)
    )


def trivial_predictions(
    geometry: Geometry, x: Tensor, removed: Tensor, mean: Tensor, valid: Tensor | None = None
) -> dict:
    """What needs no network: name -> (B, M, D) predictions of the removed tokens from the visible ones.

    x (B, N, D), removed (B, M), mean (K, D) the mean direction (of embeddings scaled to length 1) of each magnification.
    `mean` predicts that; `shift` adds what the region's visible tokens have in common, the mean of their deviations from it,
    such as their stain; `parent`, `children`, `neighbours` the mean of the visible ones (`mean` where none is visible).
    An encoder is worth something where its loss is below all of these.
    """
    level = geometry.level(x.device)
    visible = torch.ones(x.shape[:2], device=x.device).scatter(1, removed, 0.0)  # (B, N)
    visible = visible if valid is None else visible * valid
    x = (x if valid is None else x.masked_fill(~valid[..., None], 0)).float()
    deviation = (F.normalize(x, dim=-1) - mean[level]) * visible[..., None]  # (B, N, D)
    shift = deviation.sum(1, keepdim=True) / visible.sum(1).clamp(min=1)[:, None, None]  # (B, 1, D)
    predictions = {"mean": mean[level[removed]], "shift": mean[level[removed]] + shift}  # (B, M, D)
    for name, related in geometry.relatives().items():
        share = related.to(x.device)[removed] * visible[:, None, :]  # (B, M, N)
        count = share.sum(-1, keepdim=True)
        predictions[name] = torch.where(
            count > 0, share @ x / count.clamp(min=1), predictions["mean"]
        )
    return predictions


@dataclass
class Outputs:
    """What MEM returns, and of CMEM (on the 2B regions of its views) the last three besides."""

    loss: Tensor  # scalar
    pred: Tensor  # (B, M, D)
    removed: Tensor  # (B, M)
    cls: Tensor  # (B, 4, d)
    per_level: Tensor  # (K,) the mean loss of each magnification, nan where none was removed
    per_level_count: Tensor  # (K,)
    mem: Tensor | None = None  # CMEM: loss = mem + weight * contrastive
    contrastive: Tensor | None = None
    z: Tensor | None = None  # (2, B, P)


class MaskedEmbeddingModel(nn.Module):
    """MEM: encode the kept tokens, decode the removed ones. Source: paper section 3.1.1, figure 2a."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.encoder = MixingEncoder(config)
        self.decoder = Decoder(config)

    def forward(
        self,
        x: Tensor,
        mask: float | Tensor = 0.5,
        valid: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Outputs:
        """x (B, N, D), mask the removal ratio or the removed indices themselves (B, M), valid (B, N) bool or None.

        1. choose the removed tokens   2. encode the kept ones   3. decode at the removed places   4. score them
        """
        geometry = self.encoder.geometry
        removed = (
            mask
            if torch.is_tensor(mask)
            else random_removal(*x.shape[:2], mask, generator, x.device)
        )  # 1
        kept, cls, tokens = self.encode_kept(x, removed, valid)  # 2
        pred = self.decoder(cls, tokens, kept, removed, valid)  # 3
        target = take(x, removed)  # (B, M, D)
        if valid is not None:
            target = target.masked_fill(~valid.gather(1, removed)[..., None], 0)
        loss = mem_loss(pred, target, removal_weights(geometry, removed, valid))  # 4
        total, count = level_losses(geometry, pred.detach(), target, removed, valid)
        return Outputs(loss, pred, removed, cls, total / count, count)

    def encode_kept(
        self, x: Tensor, removed: Tensor, valid: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, N, D), removed (B, M) -> kept (B, N - M), cls (B, 4, d), tokens (B, N - M, d)."""
        kept = complement(removed, x.shape[1])
        return kept, *self.encoder(
            take(x, kept), kept, None if valid is None else valid.gather(1, kept)
        )


# ------------------------------------------------------------------------------------------------ contrastive alignment


def nt_xent(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """Normalized temperature-scaled cross-entropy over the pairs (a_i, b_i); a, b (B, P) -> scalar, in fp32 or better.

    Each of the 2B projections is to find its partner among the 2B - 1 others. Source: paper section 3.1.2, SimCLR.
    """
    B = a.shape[0]
    z = F.normalize(at_least_fp32(torch.cat([a, b])), dim=-1)  # (2B, P)
    with torch.autocast(
        z.device.type, enabled=False
    ):  # which would take the product in half precision
        similarity = (z @ z.T / temperature).masked_fill(
            torch.eye(2 * B, dtype=torch.bool, device=z.device), -math.inf
        )
    partner = torch.arange(2 * B, device=z.device).roll(B)
    return F.cross_entropy(similarity, partner)  # Eq. 5


class ContrastiveEmbeddingModel(MaskedEmbeddingModel):
    """CMEM: MEM on two windows of one source window, their class tokens aligned. Source: paper section 3.1.2, figure 2b."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.projector = nn.Sequential(
            nn.Linear(config.cls_tokens * config.width, config.projector_hidden),
            nn.GELU(),
            nn.Linear(config.projector_hidden, config.projector_dim),
        )
        self.projector.apply(_init_linear)

    def forward(
        self,
        views: Tensor,
        mask: float | Tensor = 0.5,
        valid: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Outputs:
        """views (2, B, N, D); mask a ratio or removed indices (2, B, M); valid (2, B, N) or None."""
        flat = [t.flatten(0, 1) if torch.is_tensor(t) else t for t in (views, mask, valid)]
        out = super().forward(*flat, generator)
        out.z = self.projector(out.cls.flatten(1)).unflatten(0, (2, -1))  # Eq. 6  (2, B, P)
        out.mem, out.contrastive = out.loss, nt_xent(*out.z, self.config.temperature)
        out.loss = out.mem + self.config.contrastive_weight * out.contrastive
        return out

    def project(self, views: Tensor, removed: Tensor, valid: Tensor | None = None) -> Tensor:
        """views (2, B, N, D), removed (2, B, M) -> .z (2, B, P) of `forward`, without the decoder."""
        flat = [None if t is None else t.flatten(0, 1) for t in (views, removed, valid)]
        return self.projector(self.encode_kept(*flat)[1].flatten(1)).unflatten(0, (2, -1))


# ----------------------------------------------------------------------------------------------- supervised aggregation


def without_autocast(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x) outside autocast, so that scores which differ are not rounded to the same."""
    with torch.autocast(x.device.type, enabled=False):
        return layer(at_least_fp32(x))


class GatedABMIL(nn.Module):
    """Gated attention pooling over ragged bags, all bags in one pass. Source: paper section 3.2; Ilse et al. 2018."""

    def __init__(self, dim: int, hidden: int = 256):
        super().__init__()
        self.V, self.U = nn.Linear(dim, hidden), nn.Linear(dim, hidden)
        self.w = nn.Linear(hidden, 1)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """x (T, d): the bags one after the other, lengths (bags,) long -> pooled (bags, d), attention (T,), which sums to 1
        in each bag. Raises ValueError for an empty bag or lengths that do not add up to T."""
        if not len(lengths) or int(lengths.min()) < 1 or int(lengths.sum()) != x.shape[0]:
            raise ValueError(
                f"bags must hold at least one token each and {x.shape[0]} together, found {lengths.tolist()}"
            )
        bags, bag = (
            len(lengths),
            torch.repeat_interleave(torch.arange(len(lengths), device=x.device), lengths),
        )  # (T,)
        gated = torch.tanh(self.V(x)) * torch.sigmoid(self.U(x))  # (T, hidden)
        score = without_autocast(self.w, gated).squeeze(1)  # (T,)
        top = score.new_full((bags,), -math.inf).scatter_reduce(0, bag, score.detach(), "amax")
        e = (score - top[bag]).exp()
        attention = e / e.new_zeros(bags).index_add(0, bag, e)[bag]  # Eq. 8  (T,)
        pooled = F.embedding_bag(
            torch.arange(len(x), device=x.device),
            x.to(attention),
            lengths.cumsum(0) - lengths,
            mode="sum",
            per_sample_weights=attention,
        )  # Eq. 7  (bags, d)
        return pooled, attention


def min_slide_loss(loss: Tensor, case: Tensor) -> Tensor:
    """Eq. 9: the label of a case goes to its slide of least loss. loss (S,), case (S,) long in 0..cases-1 -> (cases,)."""
    cases = int(case.max()) + 1
    return loss.new_full((cases,), math.inf).scatter_reduce(0, case, loss, "amin")  # Eq. 9


class Whiten(nn.Module):
    """(h - mean) @ matrix: subtracts the mean output of each place in the region, and gives all directions about the same size (PCA whitening,
    shrunk), with constants of the training slides. For an encoder that stays frozen: its outputs vary mostly by place and by what is
    common; what is rare, and a biomarker often is, is small beside it: attention pooling on a hundred slides would miss it.

    places: n output tokens per region (1 for "cls"). The identity until it is fitted.
    """

    SHRINK = 0.1  # assumed: no direction is blown up beyond that of a tenth of the mean variance

    def __init__(self, places: int, width: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(places, width))
        self.register_buffer("matrix", torch.eye(width))

    def fit(self, mean: Tensor, covariance: Tensor) -> None:
        """mean (n, d) of each place, covariance (d, d) around those."""
        variance, directions = torch.linalg.eigh(covariance)
        self.mean.copy_(mean)
        self.matrix.copy_(
            directions * (variance.clamp(min=0) + self.SHRINK * variance.mean()).rsqrt()
        )

    def forward(self, h: Tensor) -> Tensor:
        """h (W, n, d) -> the same shape."""
        return (at_least_fp32(h) - self.mean) @ self.matrix


class SlideClassifier(nn.Module):
    """Encoder (or none), gated AB-MIL over everything that a slide yields, one linear unit. Serves every row of both tables.

    tokens: "patch" pools the contextualized tokens (table 1), "cls" one compressed vector per region (table 2).
    magnification: "all", or the only one whose tokens are read. encoder None: the tile embeddings themselves are pooled.
    """

    def __init__(
        self,
        config: Config,
        encoder: MixingEncoder | None,
        tokens: str = "patch",
        magnification="all",
        hidden: int = 256,
        dropout: float = 0.0,
        chunk: int | None = None,
    ):
        super().__init__()
        if tokens not in ("patch", "cls") or (encoder is None and tokens == "cls"):
            raise ValueError(
                f"tokens must be patch, or cls with an encoder; found {tokens!r}, encoder={encoder is not None}"
            )
        self.config, self.encoder, self.tokens = config, encoder, tokens
        self.chunk = chunk or max(
            1, 256 * 96 // config.width
        )  # regions whose activations take about 2 GB
        self.register_buffer(
            "index", config.geometry().select(magnification), persistent=False
        )  # (n,)
        self.standardize = Standardize(len(self.index), config.dim) if encoder is None else None
        width = (
            config.dim
            if encoder is None
            else config.width * (config.cls_tokens if tokens == "cls" else 1)
        )
        self.whiten = (
            Whiten(len(self.index) if tokens == "patch" else 1, width)
            if encoder is not None
            else None
        )
        self.dropout = nn.Dropout(dropout)
        self.pool = GatedABMIL(width, hidden)  # assumed: 256
        self.head = nn.Linear(width, 1)
        self.reset_aggregator()

    def reset_aggregator(self) -> None:
        """Attention and head start anew, at random."""
        for part in (self.pool, self.head):
            part.apply(_init_linear)

    def encode_tiles(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """x (W, n, D), valid (W, n) or None -> (W, n, d) contextualized or (W, 1, 4d) compressed outputs, not whitened.
        Raises ValueError on another n or D than this classifier reads."""
        if x.shape[1:] != (len(self.index), self.config.dim):
            raise ValueError(
                f"expected regions of ({len(self.index)}, {self.config.dim}), found {tuple(x.shape[1:])}"
            )
        if self.encoder is None:
            return self.standardize(x)
        cls, tokens = self.encoder(x, self.index.expand(x.shape[0], -1), valid)
        return tokens if self.tokens == "patch" else cls.flatten(1)[:, None]

    def outputs(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """`encode`, a chunk of regions at a time. Where the encoder learns, a chunk is computed again on the way back, so that
        memory holds the outputs of a slide and the activations of one chunk."""
        again = (
            torch.is_grad_enabled()
            and self.encoder is not None
            and self.encoder.pos.requires_grad
            and x.shape[0] > self.chunk
        )
        parts = []
        for i in range(0, x.shape[0], self.chunk):
            part = (x[i : i + self.chunk], None if valid is None else valid[i : i + self.chunk])
            parts.append(
                checkpoint(self.encode, *part, use_reentrant=False) if again else self.encode(*part)
            )
        return torch.cat(parts)

    def aggregate(
        self, h: Tensor, regions: Tensor, valid: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """h (W, n or 1, d): what `outputs` made of the regions of all slides, the rest as in `forward`."""
        if self.whiten is not None:
            h = self.whiten(h)
        if valid is None:
            lengths, h = regions * h.shape[1], h.flatten(0, 1)  # (S,)
        else:
            valid = valid.any(1, keepdim=True) if self.tokens == "cls" else valid
            slide = torch.repeat_interleave(
                torch.arange(len(regions), device=h.device), regions
            )  # (W,)
            lengths, h = torch.zeros_like(regions).index_add(0, slide, valid.sum(1)), h[valid]
        pooled, attention = self.pool(self.dropout(h), lengths)
        return without_autocast(self.head, self.dropout(pooled)).squeeze(1), attention

    def forward(
        self, x: Tensor, regions: Tensor, valid: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (W, n, D): the regions of all slides one after the other, regions (S,) long how many each has, valid (W, n) bool
        or None -> logit (S,), attention over the pooled outputs, slide by slide."""
        return self.aggregate(self.outputs(x, valid), regions, valid)


# ------------------------------------------------------------------------------------------------- an encoder from disk

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "BOOL": torch.bool,
    "U8": torch.uint8,
}


def read_safetensors(path) -> dict:
    """name -> tensor. A reader of the plain format (8 bytes of header length, a JSON header, raw little-endian tensors), so
    that this file depends on torch alone. Raises ValueError on a damaged file."""
    raw = Path(path).read_bytes()
    try:
        start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:start])
        tensors = {}
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                flat = torch.frombuffer(
                    bytearray(raw[start + begin : start + end]),
                    dtype=SAFETENSORS_DTYPES[entry["dtype"]],
                )
                tensors[name] = flat.view(entry["shape"])
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from None
    return tensors


def load_encoder(path) -> MixingEncoder:
    """The encoder of an exported folder (config.json and model.safetensors), in eval mode.

    Strict: raises FileNotFoundError for a missing file, ValueError or KeyError for damage and RuntimeError naming every
    missing, unexpected or misshapen weight. Nothing is unpickled and nothing is ever left at its random initialisation.
    """
    path = Path(path)
    encoder = MixingEncoder(
        Config.from_dict(json.loads((path / "config.json").read_text("utf-8"))["model"])
    )
    encoder.load_state_dict(read_safetensors(path / "model.safetensors"), strict=True)
    return encoder.eval()
