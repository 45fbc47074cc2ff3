"""The model, its losses and its pooling, against plain oracles.     python -m pytest tests/test_mixmag.py"""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from safetensors.torch import save_file
from torch import nn

import mixmag
from mixmag import Config, GatedABMIL, Geometry, MaskedEmbeddingModel, MixingEncoder

GEOMETRIES = [(3, (5, 10, 20)), (2, (5, 10, 20)), (1, (20,)), (4, (10, 20)), (2, (5, 10, 20, 40))]
TINY = dict(
    width=32,
    depth=2,
    heads=4,
    decoder_width=48,
    decoder_depth=2,
    decoder_heads=4,
    projector_hidden=24,
    projector_dim=8,
)


def tiny(dim=10, region=2, magnifications=(5, 10, 20)):
    torch.manual_seed(0)
    return Config(dim, region, magnifications, **TINY)


# ------------------------------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize("region, magnifications", GEOMETRIES)
def test_tokens_are_counted_and_placed(region, magnifications):
    g = Geometry(region, magnifications)
    assert g.num_tokens == region**2 * sum(4**k for k in range(len(magnifications)))  # Eq. 1
    expected = [
        (k, r, c)
        for k in range(len(magnifications))
        for r in range(region * 2**k)
        for c in range(region * 2**k)
    ]
    assert g.token_table().tolist() == [list(t) for t in expected]


def test_three_by_three_region_has_189_tokens():
    assert Geometry(3).num_tokens == 189 and Geometry(3).tokens_per_cell == 21


@pytest.mark.parametrize("region, magnifications", GEOMETRIES)
def test_cell_order_follows_the_definition(region, magnifications):
    """Cell-major entries labelled with where they lie must come out in the region's row-major order."""
    g, entries = Geometry(region, magnifications), []
    for cell_row in range(region):
        for cell_col in range(region):
            for k in range(g.levels):
                entries += [
                    (k, cell_row * 2**k + r, cell_col * 2**k + c)
                    for r in range(2**k)
                    for c in range(2**k)
                ]
    assert [list(entries[i]) for i in g.cell_order()] == g.token_table().tolist()


@pytest.mark.parametrize("region, magnifications", GEOMETRIES)
def test_dihedral_agrees_with_turning_the_picture(region, magnifications):
    """Turn a picture whose every finest tile has its own value, then tile it at each magnification: the tokens must have moved
    exactly as the permutation says."""
    g = Geometry(region, magnifications)
    side = g.sides[-1]
    picture = torch.rand(side, side, dtype=torch.float64)

    def tokens(p):
        return torch.cat([F.avg_pool2d(p[None], side // s)[0].flatten() for s in g.sides])

    for i, permutation in enumerate(g.dihedral()):
        turned = torch.rot90(picture.flip(1) if i >= 4 else picture, i % 4)
        assert torch.allclose(tokens(turned), tokens(picture)[permutation], atol=1e-12)


@pytest.mark.parametrize("region, magnifications", GEOMETRIES)
def test_dihedral_is_a_group(region, magnifications):
    rows = {tuple(p.tolist()) for p in Geometry(region, magnifications).dihedral()}
    assert tuple(range(Geometry(region, magnifications).num_tokens)) == tuple(
        Geometry(region, magnifications).dihedral()[0].tolist()
    )
    for p in rows:
        assert sorted(p) == list(range(len(p)))
        for q in rows:
            assert tuple(p[i] for i in q) in rows


@pytest.mark.parametrize("region, magnifications", GEOMETRIES)
def test_level_weights_share_equally(region, magnifications):
    g = Geometry(region, magnifications)
    w, level = g.level_weights(), g.token_table()[:, 0]
    assert w.sum().item() == pytest.approx(1)
    for k in range(g.levels):
        assert w[level == k].sum().item() == pytest.approx(1 / g.levels)


@pytest.mark.parametrize("mask", [0.25, 0.5, 0.75])
def test_each_magnification_weighs_one_kth_in_expectation(mask):
    g = Geometry(3)
    removed = mixmag.random_removal(20000, g.num_tokens, mask, torch.Generator().manual_seed(0))
    weight, level = mixmag.removal_weights(g, removed), g.token_table()[:, 0][removed]
    for k in range(3):
        per_region = (weight * (level == k)).sum(1)
        error = per_region.std() / math.sqrt(len(per_region))
        assert abs(per_region.mean() - 1 / 3) < 4 * error


def test_removal_weights_count_only_valid_tokens():
    """Averaged over every token being removed once, the weights of valid tokens give each magnification that is there its share."""
    g = Geometry(2)
    valid = torch.ones(1, g.num_tokens, dtype=torch.bool)
    valid[0, g.select(5)] = False  # no 5x at all
    valid[0, g.select(20)[:30]] = False
    removed = torch.arange(g.num_tokens)[None]
    weight = mixmag.removal_weights(g, removed, valid)[0]
    assert (weight[~valid[0]] == 0).all()
    for m, share in ((5, 0), (10, 0.5), (20, 0.5)):
        assert weight[g.select(m)].sum().item() == pytest.approx(share)
    everything = torch.ones(3, g.num_tokens, dtype=torch.bool)
    removed = mixmag.random_removal(3, g.num_tokens, 0.5)
    assert torch.allclose(
        mixmag.removal_weights(g, removed, everything), mixmag.removal_weights(g, removed)
    )


def test_relatives_are_mutual_and_counted():
    r = Geometry(3).relatives()
    assert torch.equal(r["parent"], r["children"].T) and torch.equal(
        r["neighbours"], r["neighbours"].T
    )
    level = Geometry(3).token_table()[:, 0]
    assert r["parent"].sum(1).tolist() == [0 if k == 0 else 1 for k in level]
    assert r["children"].sum(1).tolist() == [0 if k == 2 else 4 for k in level]
    assert sorted(set(r["neighbours"].sum(1).tolist())) == [3, 5, 8]


@pytest.mark.parametrize(
    "arguments", [(0, (5, 10, 20)), (3, (5, 20)), (3, ()), (3, (20, 10)), (2, (-5, -10))]
)
def test_geometry_refuses_what_does_not_nest(arguments):
    with pytest.raises(ValueError, match="double"):
        Geometry(*arguments)


# -------------------------------------------------------------------------------------------------------------- encoder


class ReferenceEncoder(nn.Module):
    """The mixing encoder written from torch.nn parts: nn.MultiheadAttention and functions, on the same weights."""

    def __init__(self, encoder):
        super().__init__()
        self.e, c = encoder, encoder.config
        self.attention = nn.ModuleList(
            nn.MultiheadAttention(c.width, c.heads, batch_first=True) for _ in range(c.depth)
        )
        for mine, block in zip(self.attention, encoder.blocks):
            mine.in_proj_weight.data, mine.in_proj_bias.data = (
                block.attn.qkv.weight.data,
                block.attn.qkv.bias.data,
            )
            mine.out_proj.weight.data, mine.out_proj.bias.data = (
                block.attn.proj.weight.data,
                block.attn.proj.bias.data,
            )

    def forward(self, x, index, valid):
        e = self.e
        x = F.linear(x, e.input.weight, e.input.bias) + torch.stack([e.pos[i] for i in index])
        x = torch.cat([e.cls[None].repeat(len(x), 1, 1), x], 1)
        ignore = torch.cat([torch.zeros(len(x), len(e.cls), dtype=torch.bool), ~valid], 1)
        for attention, block in zip(self.attention, e.blocks):
            h = F.layer_norm(x, x.shape[-1:], block.norm1.weight, block.norm1.bias)
            x = x + attention(h, h, h, key_padding_mask=ignore, need_weights=False)[0]
            h = F.layer_norm(x, x.shape[-1:], block.norm2.weight, block.norm2.bias)
            m = block.mlp
            x = x + F.linear(
                F.silu(F.linear(h, m.w1.weight, m.w1.bias)) * F.linear(h, m.w2.weight, m.w2.bias),
                m.w3.weight,
                m.w3.bias,
            )
        return F.layer_norm(x, x.shape[-1:], e.norm.weight, e.norm.bias)


def test_encoder_equals_a_reference_of_torch_parts():
    encoder = MixingEncoder(tiny()).eval()
    for p in encoder.parameters():
        nn.init.normal_(p, std=0.3)
    x, index = torch.randn(3, 40, 10), torch.rand(3, 84).argsort(1)[:, :40]
    valid = torch.rand(3, 40) > 0.3
    expected = ReferenceEncoder(encoder).eval()(x, index, valid)
    cls, tokens = encoder(x, index, valid)
    assert torch.allclose(cls, expected[:, :4], atol=1e-5)
    assert torch.allclose(tokens[valid], expected[:, 4:][valid], atol=1e-5)


def test_encoder_takes_any_subset_and_its_order_means_nothing():
    encoder = MixingEncoder(tiny()).eval()
    x = torch.randn(2, 84, 10)
    cls, tokens = encoder(x)
    shuffled = torch.rand(2, 84).argsort(1)
    cls2, tokens2 = encoder(mixmag.take(x, shuffled), shuffled)
    assert torch.allclose(cls, cls2, atol=1e-5) and torch.allclose(
        mixmag.take(tokens, shuffled), tokens2, atol=1e-5
    )
    assert [t.shape for t in encoder(x[:, :5], shuffled[:, :5])] == [(2, 4, 32), (2, 5, 32)]


def test_invalid_tokens_change_no_valid_output():
    encoder = MixingEncoder(tiny()).eval()
    x, valid = torch.randn(2, 84, 10), torch.rand(2, 84) > 0.4
    cls, tokens = encoder(x, valid=valid)
    spoiled = x.masked_fill(~valid[..., None], math.nan)
    cls2, tokens2 = encoder(spoiled, valid=valid)
    assert torch.equal(cls, cls2) and torch.equal(tokens[valid], tokens2[valid])
    without, index = x[:1, valid[0]], valid[0].nonzero().T
    cls3, tokens3 = encoder(without, index)  # leaving them out is the same as masking them
    assert torch.allclose(cls3, cls[:1], atol=1e-5) and torch.allclose(
        tokens3[0], tokens[0, valid[0]], atol=1e-5
    )


@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_bf16_equals_torchs_and_a_part_the_whole(masked):
    """The formula written out, forward and backward, is as near to fp64 as the fused kernel is; the tokens that are wanted alone come out as of all."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 17, 8).bfloat16() for _ in range(3))
    mask = (torch.rand(2, 1, 1, 17) > 0.4) | (torch.arange(17) < 1) if masked else None

    def results(function, dtype):
        parts = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        out = function(*parts, mask)
        return [t.double() for t in (out, *torch.autograd.grad(out.square().sum(), parts))]

    exact, fused, ours = (
        results(f, d)
        for f, d in (
            (F.scaled_dot_product_attention, torch.float64),
            (F.scaled_dot_product_attention, torch.bfloat16),
            (mixmag.attend, torch.bfloat16),
        )
    )
    for e, f, o in zip(exact, fused, ours):
        assert (o - e).norm() < max(1.5 * (f - e).norm(), 0.01 * e.norm()) and e.norm() > 1
    block, x = mixmag.Block(16, 4), torch.randn(2, 17, 16)
    assert torch.allclose(block(x, mask, first=5), block(x, mask)[:, 5:], atol=1e-6)


def test_encoder_refuses_wrong_shapes():
    with pytest.raises(ValueError, match="expected"):
        MixingEncoder(tiny())(torch.randn(2, 83, 10))
    with pytest.raises(ValueError, match="expected"):
        MixingEncoder(tiny())(torch.randn(2, 84, 11))
    with pytest.raises(ValueError, match="expected"):
        MixingEncoder(tiny())(torch.randn(2, 4, 10), torch.zeros(2, 1, dtype=torch.long))


def test_standardize_survives_a_constant_dimension():
    s = mixmag.Standardize(4)
    x = torch.randn(1000, 4) * torch.tensor([1.0, 2.0, 3.0, 0.0]) + 5
    s.fit(x.mean(0), x.std(0))
    assert torch.isfinite(s(x)).all() and s(x)[:, :3].std(0).tolist() == pytest.approx([1, 1, 1])


def test_positions_start_close_in_a_family():
    """Of all tokens one magnification up, the one whose initial position is nearest is the parent."""
    g = Geometry(3)
    torch.manual_seed(0)
    pos, level = mixmag.initial_positions(g, 96), g.token_table()[:, 0]
    distance, parent = torch.cdist(pos, pos), g.relatives()["parent"]
    for k in (1, 2):
        above = (level == k - 1).nonzero().flatten()
        nearest = above[distance[level == k][:, above].argmin(dim=1)]
        assert parent[(level == k).nonzero().flatten(), nearest].float().mean() > 0.9
    assert pos.square().mean().sqrt().item() == pytest.approx(mixmag.POSITION_SIZE, rel=0.3)


# --------------------------------------------------------------------------------------------------------------- losses


def test_mem_loss_equals_the_loop():
    torch.manual_seed(1)
    pred, target, weight = (
        torch.randn(3, 7, 5, dtype=torch.float64, requires_grad=True),
        torch.randn(3, 7, 5, dtype=torch.float64),
        torch.rand(3, 7, dtype=torch.float64),
    )
    total = 0.0
    for b in range(3):
        for i in range(7):
            p, t = pred[b, i].tolist(), target[b, i].tolist()
            cosine = (
                sum(u * v for u, v in zip(p, t))
                / math.sqrt(sum(u * u for u in p))
                / math.sqrt(sum(v * v for v in t))
            )
            total += weight[b, i].item() * (1 - cosine) / 3
    assert mixmag.mem_loss(pred, target, weight).item() == pytest.approx(total, abs=1e-12)
    assert torch.autograd.gradcheck(lambda p: mixmag.mem_loss(p, target, weight), pred)


def test_nt_xent_equals_the_loop():
    torch.manual_seed(2)
    a, b = (torch.randn(4, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    z = [v / v.norm() for v in torch.cat([a, b])]
    total = 0.0
    for i in range(8):
        j = (i + 4) % 8
        others = sum(math.exp((z[i] @ z[k]).item() / 0.2) for k in range(8) if k != i)
        total -= math.log(math.exp((z[i] @ z[j]).item() / 0.2) / others) / 8
    assert mixmag.nt_xent(a, b, 0.2).item() == pytest.approx(total, abs=1e-12)
    assert torch.autograd.gradcheck(lambda a, b: mixmag.nt_xent(a, b, 0.2), (a, b))


def test_losses_are_in_full_precision_under_autocast():
    """Half-precision products would round similarities / temperature, and the counts of valid tokens above 256."""
    torch.manual_seed(0)
    a, b, g = torch.randn(64, 16), torch.randn(64, 16), Geometry(5)
    removed, valid = mixmag.random_removal(2, g.num_tokens, 0.5), torch.rand(2, g.num_tokens) > 0.2
    plain = mixmag.nt_xent(a, b, 0.1), mixmag.removal_weights(g, removed, valid)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(
            torch.equal(x, y)
            for x, y in zip(
                plain, (mixmag.nt_xent(a, b, 0.1), mixmag.removal_weights(g, removed, valid))
            )
        )


def test_gated_abmil_equals_the_loop_over_ragged_bags():
    torch.manual_seed(3)
    pool = GatedABMIL(5, 7).double()
    x, lengths = (
        torch.randn(11, 5, dtype=torch.float64, requires_grad=True),
        torch.tensor([4, 1, 6]),
    )
    pooled, attention = pool(x, lengths)
    start = 0
    for bag, length in enumerate(lengths.tolist()):
        scores = []
        for h in x[start : start + length]:
            gate = [
                math.tanh((v @ h + c).item()) / (1 + math.exp(-(u @ h + d).item()))
                for v, c, u, d in zip(pool.V.weight, pool.V.bias, pool.U.weight, pool.U.bias)
            ]
            scores.append(
                sum(w.item() * g for w, g in zip(pool.w.weight[0], gate)) + pool.w.bias.item()
            )
        total = sum(math.exp(s) for s in scores)
        weights = [math.exp(s) / total for s in scores]
        assert attention[start : start + length].tolist() == pytest.approx(weights, abs=1e-12)
        expected = sum(w * h for w, h in zip(weights, x[start : start + length]))
        assert torch.allclose(pooled[bag], expected, atol=1e-12)
        start += length
    assert torch.autograd.gradcheck(lambda x: pool(x, lengths)[0], x)


def test_gated_abmil_stays_finite_where_a_plain_softmax_would_not():
    pool = GatedABMIL(2, 4)
    pool.w.weight.data.fill_(1e5)
    pooled, attention = pool(torch.randn(50, 2), torch.tensor([49, 1]))
    assert (
        torch.isfinite(pooled).all()
        and attention[-1] == 1
        and attention[:49].sum().item() == pytest.approx(1)
    )


@pytest.mark.parametrize("lengths", [[5, 0, 6], [5, 5], [12]])
def test_gated_abmil_refuses_empty_or_misfit_bags(lengths):
    with pytest.raises(ValueError, match="at least one token"):
        GatedABMIL(5, 7)(torch.randn(11, 5), torch.tensor(lengths))


def test_min_slide_loss_equals_the_loop_and_sends_the_gradient_to_one_slide():
    torch.manual_seed(4)
    loss, case = (
        torch.rand(9, dtype=torch.float64, requires_grad=True),
        torch.tensor([0, 1, 1, 2, 2, 2, 3, 0, 3]),
    )
    expected = [min(loss[i].item() for i in range(9) if case[i] == c) for c in range(4)]
    assert mixmag.min_slide_loss(loss, case).tolist() == expected
    gradient = torch.autograd.grad(mixmag.min_slide_loss(loss, case).sum(), loss)[0]
    assert gradient.tolist() == [
        1.0 if loss[i].item() == expected[case[i]] else 0.0 for i in range(9)
    ]
    assert torch.autograd.gradcheck(lambda x: mixmag.min_slide_loss(x, case), loss)


# ---------------------------------------------------------------------------------------------------------- MEM and CMEM


def test_mem_decodes_what_was_removed_and_touches_nothing_else():
    model = MaskedEmbeddingModel(tiny()).eval()
    x = torch.randn(3, 84, 10)
    out = model(x, 0.5, generator=torch.Generator().manual_seed(0))
    assert (
        out.pred.shape == (3, 42, 10)
        and out.removed.shape == (3, 42)
        and out.per_level.shape == (3,)
    )
    spoiled = x.scatter(1, out.removed[..., None].expand(-1, -1, 10), math.nan)
    assert torch.equal(
        model(spoiled, out.removed).pred, out.pred
    )  # the encoder never sees a removed token
    expected = mixmag.mem_loss(
        out.pred,
        mixmag.take(x, out.removed),
        mixmag.removal_weights(model.encoder.geometry, out.removed),
    )
    assert torch.equal(out.loss, expected)


def test_mem_encoder_projects_kept_tokens_only():
    model, seen = MaskedEmbeddingModel(tiny()), []
    model.encoder.input.register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
    model.decoder.head.register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
    model(torch.randn(3, 84, 10), 0.75)
    assert seen == [(3, 21, 10), (3, 63, 48)]


def test_mem_loss_ignores_invalid_tokens():
    model = MaskedEmbeddingModel(tiny()).eval()
    x, valid = torch.randn(3, 84, 10), torch.rand(3, 84) > 0.3
    removed = mixmag.random_removal(3, 84, 0.5)
    out = model(x, removed, valid)
    spoiled = model(x.masked_fill(~valid[..., None], math.nan), removed, valid)
    assert torch.equal(out.loss, spoiled.loss) and torch.equal(out.per_level, spoiled.per_level)
    spoiled.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("mask", [0.0, 1.0, 0.001])
def test_mem_refuses_to_remove_nothing_or_everything(mask):
    with pytest.raises(ValueError, match="some must go"):
        MaskedEmbeddingModel(tiny())(torch.randn(2, 84, 10), mask)


def test_trivial_predictions_equal_the_loop():
    g = Geometry(2)
    torch.manual_seed(5)
    x, mean, removed = torch.randn(2, 84, 6), torch.randn(3, 6), mixmag.random_removal(2, 84, 0.6)
    valid = torch.rand(2, 84) > 0.2
    found, table = mixmag.trivial_predictions(g, x, removed, mean, valid), g.token_table().tolist()
    for b in range(2):
        visible = [i for i in range(84) if i not in removed[b].tolist() and valid[b, i]]
        shift = torch.stack([x[b, i] / x[b, i].norm() - mean[table[i][0]] for i in visible]).mean(0)
        for j, i in enumerate(removed[b].tolist()):
            k, r, c = table[i]
            assert torch.allclose(found["shift"][b, j], mean[k] + shift, atol=1e-5)
            parent = [v for v in visible if table[v] == [k - 1, r // 2, c // 2]]
            children = [
                v
                for v in visible
                if table[v][0] == k + 1 and (table[v][1] // 2, table[v][2] // 2) == (r, c)
            ]
            near = [
                v
                for v in visible
                if table[v][0] == k
                and v != i
                and max(abs(table[v][1] - r), abs(table[v][2] - c)) == 1
            ]
            for name, which in (
                ("mean", []),
                ("parent", parent),
                ("children", children),
                ("neighbours", near),
            ):
                expected = x[b, which].mean(0) if which else mean[k]
                assert torch.allclose(found[name][b, j], expected, atol=1e-5)


def test_cmem_is_mem_on_both_views_and_nt_xent_between_them():
    model = mixmag.ContrastiveEmbeddingModel(tiny()).eval()
    views, removed = torch.randn(2, 5, 84, 10), mixmag.random_removal(10, 84, 0.5).view(2, 5, -1)
    out = model(views, removed)
    separate = [MaskedEmbeddingModel.forward(model, views[v], removed[v]) for v in (0, 1)]
    assert out.mem.item() == pytest.approx(
        (separate[0].loss + separate[1].loss).item() / 2, abs=1e-6
    )
    z = [model.projector(s.cls.flatten(1)) for s in separate]
    assert out.contrastive.item() == pytest.approx(mixmag.nt_xent(*z, 0.1).item(), abs=1e-5)
    assert out.loss.item() == pytest.approx((out.mem + out.contrastive).item(), abs=1e-6)


def test_mem_learns_a_region_whose_tokens_repeat():
    """Convergence: where every token of a region is the same vector, the loss must fall far below the mean's."""
    torch.manual_seed(0)
    model = MaskedEmbeddingModel(tiny())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(150):
        loss = model(torch.randn(16, 1, 10).expand(16, 84, 10), 0.5).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3  # predicting the mean (nothing) leaves it at 1


# ------------------------------------------------------------------------------------------------------ slide classifier


@pytest.mark.parametrize(
    "encoder, tokens, magnification",
    [
        (False, "patch", 20),
        (False, "patch", "all"),
        (True, "patch", 5),
        (True, "patch", "all"),
        (True, "cls", 10),
        (True, "cls", "all"),
    ],
)
def test_classifier_serves_every_row(encoder, tokens, magnification):
    """One pass over ragged slides equals slide by slide, in chunks or whole, and invalid tokens are as good as absent."""
    config = tiny()
    model = mixmag.SlideClassifier(
        config, MixingEncoder(config) if encoder else None, tokens, magnification, 16, chunk=2
    ).eval()
    n, regions = len(model.index), torch.tensor([3, 1, 2])
    x, valid = torch.randn(6, n, 10), torch.rand(6, n) > 0.3
    logit, attention = model(x, regions, valid)
    assert logit.shape == (3,) and attention.sum().item() == pytest.approx(3, abs=1e-5)
    model.chunk = 64
    start = 0
    for s, r in enumerate(regions.tolist()):
        alone, _ = model(x[start : start + r], torch.tensor([r]), valid[start : start + r])
        assert alone.item() == pytest.approx(logit[s].item(), abs=1e-5)
        start += r


def test_one_token_a_region_is_still_no_class_token():
    """R = 1 at the lowest magnification: an invalid token must not be pooled."""
    config = tiny(region=1)
    model = mixmag.SlideClassifier(config, MixingEncoder(config), "patch", 5, 16).eval()
    x, valid = torch.randn(3, 1, 10), torch.tensor([[True], [False], [True]])
    assert len(model(x, torch.tensor([3]), valid)[1]) == 2


def test_chunked_gradient_equals_the_whole():
    config = tiny()
    model = mixmag.SlideClassifier(config, MixingEncoder(config), chunk=100)
    x, regions = torch.randn(7, 84, 10), torch.tensor([3, 4])

    def gradients(chunk):
        model.chunk = chunk
        model.zero_grad()
        model(x, regions)[0].square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    for whole, parts in zip(gradients(100), gradients(2)):
        assert torch.allclose(whole, parts, atol=1e-5)


def test_classifier_refuses_class_tokens_without_an_encoder():
    with pytest.raises(ValueError, match="cls with an encoder"):
        mixmag.SlideClassifier(tiny(), None, "cls")


# -------------------------------------------------------------------------------------------------------------- config, disk


def export(folder, encoder):
    save_file(
        {k: v.contiguous() for k, v in encoder.state_dict().items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps({"model": encoder.config.to_dict()}))


def test_encoder_round_trip(tmp_path):
    encoder = MixingEncoder(tiny()).eval()
    encoder.standardize.fit(torch.randn(10), torch.rand(10) + 1)
    export(tmp_path, encoder)
    x = torch.randn(2, 84, 10)
    for a, b in zip(encoder(x), mixmag.load_encoder(tmp_path)(x)):
        assert torch.equal(a, b)


def test_load_encoder_is_strict(tmp_path):
    encoder = MixingEncoder(tiny())
    export(tmp_path, encoder)
    whole = (tmp_path / "model.safetensors").read_bytes()
    weights = {k: v for k, v in encoder.state_dict().items() if k != "norm.bias"}
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match="norm.bias"):
        mixmag.load_encoder(tmp_path)
    for broken in (
        b"",
        whole[:5],
        whole[:200],
        whole[:-100],
        b"\xff" * 100,
        whole[:8] + b"?" + whole[9:],
    ):
        (tmp_path / "model.safetensors").write_bytes(broken)
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            mixmag.load_encoder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        mixmag.load_encoder(tmp_path)


def test_config_round_trip_and_strictness():
    config = Config.small(64, region=2)
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="unknown keys"):
        Config.from_dict({**config.to_dict(), "colour": 1})
    with pytest.raises(ValueError, match="missing keys"):
        Config.from_dict({"dim": 3})


def test_presets_have_the_sizes_they_promise():
    assert (
        0.7e6 < sum(p.numel() for p in MaskedEmbeddingModel(Config.small(64)).parameters()) < 1.3e6
    )
    paper = Config.paper()
    assert (
        paper.dim,
        paper.width,
        paper.depth,
        paper.heads,
        paper.decoder_width,
        paper.decoder_depth,
        paper.cls_tokens,
    ) == (1280, 768, 6, 12, 1024, 2, 4)


def test_mixmag_imports_torch_and_the_standard_library_only():
    code = (
        "import sys; before = set(sys.modules); import torch; torch_too = set(sys.modules); import mixmag; "
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - torch_too} - set(sys.stdlib_module_names) - {'torch', 'mixmag'}))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert out.strip() == "[]"


def test_float64_is_kept_where_it_is_given():
    assert (
        mixmag.mem_loss(
            torch.randn(1, 2, 3).double(), torch.randn(1, 2, 3).double(), torch.rand(1, 2).double()
        ).dtype
        == torch.float64
    )
    assert np.isfinite(
        mixmag.nt_xent(torch.randn(2, 3).half(), torch.randn(2, 3).half(), 0.1).item()
    )


def test_classifiers_read_regions_of_their_own_size():
    """A baseline on one magnification refuses the tokens of all; a region without a valid token is pooled by neither kind of output."""
    config = mixmag.Config(8, region=1, width=16, depth=1, heads=2)
    x, regions = torch.randn(4, 21, 8), torch.tensor([4])
    for encoder in (None, mixmag.MixingEncoder(config)):
        with pytest.raises(ValueError, match=r"expected regions of \(16, 8\), found \(21, 8\)"):
            mixmag.SlideClassifier(config, encoder, magnification=20)(x, regions)
    valid = torch.ones(4, 21, dtype=torch.bool)
    valid[2] = False
    for tokens in ("patch", "cls"):
        model = mixmag.SlideClassifier(config, mixmag.MixingEncoder(config), tokens).eval()
        kept = valid.any(1)
        logit, attention = model(x, regions, valid)
        expected, other = model(x[kept], regions - 1)
        assert torch.allclose(logit, expected, atol=1e-6) and torch.allclose(
            attention, other, atol=1e-6
        )


def test_dimensions_that_hardly_vary_keep_the_typical_scale():
    layer = mixmag.Standardize(4)
    layer.fit(torch.zeros(4), torch.tensor([2.0, 2.0, 2.0, 0.0]))
    assert layer(torch.ones(1, 4)).tolist() == [[0.5] * 4]
    layer.fit(torch.zeros(4), torch.zeros(4))
    assert layer(torch.ones(1, 4, dtype=torch.float64)).dtype == torch.float64 and layer(
        torch.ones(1, 4)
    ).tolist() == [[1.0] * 4]


@pytest.mark.parametrize("changes", [{"width": "96"}, {"heads": 0}, {"depth": 1.5}])
def test_sizes_are_whole_numbers(changes):
    with pytest.raises(ValueError, match=f"config: {next(iter(changes))} is"):
        mixmag.Config.from_dict({**mixmag.Config.small(8).to_dict(), **changes})
