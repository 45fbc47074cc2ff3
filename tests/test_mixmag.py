"""The model, its losses and its pooling, against plain oracles."""

import json
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

import mixmag
from mixmag import Config, Geometry, MaskedEmbeddingModel, MixingEncoder

GEOMETRIES = [Geometry(3), Geometry(1, (20,)), Geometry(4, (10, 20)), Geometry(2, (2.5, 5, 10, 20))]
DOUBLE = torch.float64


def tiny(region=2) -> Config:
    torch.manual_seed(0)
    return Config.small(10, region=region, width=32, depth=2, heads=4, decoder_width=48)


def spoil(x, valid):
    """x with NaN at every invalid token."""
    return x.masked_fill(~valid[..., None], math.nan)


# ---------------------------------------------------------------------------------------- geometry
@pytest.mark.parametrize("g", GEOMETRIES)
def test_tokens_are_counted_and_placed(g):
    """The table is every level's grid, row by row, and level_weights share 1 equally by level."""
    expected = []
    for k in range(len(g.magnifications)):
        side = g.region * 2**k
        expected += [[k, row, col] for row in range(side) for col in range(side)]
    assert g.token_table().tolist() == expected
    assert g.num_tokens == len(expected)  # Eq. 1
    for magnification in g.magnifications:
        weight = g.level_weights()[g.select(magnification)]
        assert weight.sum().item() == pytest.approx(1 / g.levels)
        assert weight.min() == weight.max()


@pytest.mark.parametrize("g", GEOMETRIES)
def test_cell_order_follows_the_definition(g):
    """Cell-major entries, labelled with their places, come out in the order of the token table."""
    entries = []
    for cell in range(g.region**2):
        cell_row, cell_col = divmod(cell, g.region)
        for k in range(g.levels):
            for place in range(4**k):
                row, col = divmod(place, 2**k)
                entries.append([k, cell_row * 2**k + row, cell_col * 2**k + col])
    assert [entries[i] for i in g.cell_order()] == g.token_table().tolist()


@pytest.mark.parametrize("g", GEOMETRIES)
def test_dihedral_agrees_with_turning_the_picture(g):
    """Turn a picture, then tile it at each magnification: tokens move as the permutation says."""
    side = g.sides[-1]
    picture = torch.rand(1, side, side, dtype=DOUBLE)  # each finest tile has a value of its own

    def tokens(p):
        return torch.cat([F.avg_pool2d(p, side // s).flatten() for s in g.sides])

    for i, permutation in enumerate(g.dihedral()):
        mirrored = picture.flip(2) if i >= 4 else picture
        turned = torch.rot90(mirrored, i % 4, (1, 2))
        assert torch.allclose(tokens(turned), tokens(picture)[permutation], atol=1e-12)


@pytest.mark.parametrize("magnifications", [(5, 20), (), (20, 10), (-5, -10)])
def test_geometry_refuses_what_does_not_nest(magnifications):
    with pytest.raises(ValueError, match="double"):
        Geometry(3, magnifications)
    with pytest.raises(ValueError, match="magnification 3 is not among"):
        Geometry().select(3)


# ----------------------------------------------------------------------------------------- encoder
def reference(e, x, index, valid):
    """What the encoder e gives, with attention by torch.nn."""
    x = e.input(x) + torch.stack([e.pos[i] for i in index])
    x = torch.cat([e.cls[None].repeat(len(x), 1, 1), x], 1)
    ignore = torch.cat([torch.zeros(len(x), len(e.cls), dtype=torch.bool), ~valid], 1)
    for block in e.blocks:
        attention = nn.MultiheadAttention(32, 4, batch_first=True)
        attention.in_proj_weight = block.attn.qkv.weight
        attention.in_proj_bias = block.attn.qkv.bias
        attention.out_proj = block.attn.proj
        h = block.norm1(x)
        x = x + attention(h, h, h, key_padding_mask=ignore, need_weights=False)[0]
        h = block.norm2(x)
        x = x + block.mlp.w3(F.silu(block.mlp.w1(h)) * block.mlp.w2(h))
    return e.norm(x)


def test_encoder_equals_a_reference_of_torch_parts():
    encoder = MixingEncoder(tiny()).eval()
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(3, 40, 10)
    index = torch.rand(3, 84).argsort(1)[:, :40]
    valid = torch.rand(3, 40) > 0.3
    expected = reference(encoder, x, index, valid)
    cls, tokens = encoder(x, index, valid)
    assert torch.allclose(cls, expected[:, :4], atol=1e-5)
    assert torch.allclose(tokens[valid], expected[:, 4:][valid], atol=1e-5)


def test_order_and_invalid_tokens_have_no_effect():
    encoder = MixingEncoder(tiny()).eval()
    x = torch.randn(2, 84, 10)
    valid = torch.rand(2, 84) > 0.4
    cls, tokens = encoder(x, valid=valid)
    cls2, tokens2 = encoder(spoil(x, valid), valid=valid)
    assert torch.equal(cls, cls2)
    assert torch.equal(tokens[valid], tokens2[valid])
    shuffled = valid[0].nonzero()[torch.randperm(int(valid[0].sum()))].T  # absent, not masked
    cls3, tokens3 = encoder(x[:1, shuffled[0]], shuffled)
    assert torch.allclose(cls3, cls[:1], atol=1e-5)
    assert torch.allclose(tokens3, tokens[:1, shuffled[0]], atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_bf16_is_as_exact_as_torchs(masked):
    """The formula, forward and backward, is as near to fp64 as the fused kernel is."""
    torch.manual_seed(0)
    qkv = [torch.randn(2, 3, 17, 8).bfloat16() for _ in range(3)]
    mask = None
    if masked:
        mask = torch.rand(2, 1, 1, 17) > 0.4
        mask[..., 0] = True

    def results(function, dtype):
        parts = [t.to(dtype).requires_grad_() for t in qkv]
        out = function(*parts, mask)
        return [t.double() for t in (out, *torch.autograd.grad(out.square().sum(), parts))]

    exact = results(F.scaled_dot_product_attention, DOUBLE)
    fused = results(F.scaled_dot_product_attention, torch.bfloat16)
    ours = results(mixmag.attend, torch.bfloat16)
    for e, f, o in zip(exact, fused, ours, strict=True):
        assert e.norm() > 1
        assert (o - e).norm() < max(1.5 * (f - e).norm(), 0.01 * e.norm())
    block = mixmag.Block(16, 4)
    x = torch.randn(2, 17, 16)
    assert torch.allclose(block(x, mask, first=5), block(x, mask)[:, 5:], atol=1e-6)


@pytest.mark.parametrize("shape, index", [((83, 10), None), ((84, 11), None), ((4, 10), (2, 1))])
def test_encoder_refuses_wrong_shapes(shape, index):
    if index is not None:
        index = torch.zeros(index, dtype=torch.long)
    with pytest.raises(ValueError, match="expected a tensor of .2, "):
        MixingEncoder(tiny())(torch.randn(2, *shape), index)


def test_standardize_survives_constant_dimensions():
    layer = mixmag.Standardize(4)
    layer.fit(torch.full((4,), 5.0), torch.tensor([2.0, 2.0, 2.0, 0.0]))
    assert layer(torch.full((1, 4), 6.0)).tolist() == [[0.5] * 4]
    layer.fit(torch.zeros(4), torch.zeros(4))
    assert layer(torch.ones(1, 4)).tolist() == [[1.0] * 4]
    assert layer.double()(torch.ones(1, 4)).dtype == DOUBLE


def test_positions_start_close_in_a_family():
    """Of all tokens one level up, the parent's initial position is the nearest."""
    torch.manual_seed(0)
    g = Geometry()
    position = mixmag.initial_positions(g, 96)
    distance = torch.cdist(position, position)
    parent = g.relatives()["parent"]
    for low, high in ((5, 10), (10, 20)):
        above = g.select(low)
        below = g.select(high)
        nearest = above[distance[below][:, above].argmin(dim=1)]
        assert parent[below, nearest].float().mean() > 0.9
    size = position.square().mean().sqrt().item()
    assert size == pytest.approx(mixmag.POSITION_SIZE, rel=0.3)


# ------------------------------------------------------------------------------------ MEM and CMEM
@pytest.mark.parametrize("mask", [0.25, 0.5, 0.75])
def test_each_magnification_weighs_one_kth_in_expectation(mask):
    g = Geometry()
    removed = mixmag.random_removal(20000, g.num_tokens, mask, torch.Generator().manual_seed(0))
    weight = mixmag.removal_weights(g, removed)
    level = g.level()[removed]
    for k in range(3):
        per_region = (weight * (level == k)).sum(1)
        error = per_region.std() / math.sqrt(len(per_region))
        assert abs(per_region.mean() - 1 / 3) < 4 * error


def test_removal_weights_count_only_valid_tokens():
    """With every token removed once, each magnification that is there gets its share."""
    g = Geometry(2)
    valid = torch.ones(1, g.num_tokens, dtype=torch.bool)
    valid[0, g.select(5)] = False  # no 5x at all
    valid[0, g.select(20)[:30]] = False
    weight = mixmag.removal_weights(g, torch.arange(g.num_tokens)[None], valid)[0]
    assert (weight[~valid[0]] == 0).all()
    for magnification, share in ((5, 0), (10, 0.5), (20, 0.5)):
        assert weight[g.select(magnification)].sum().item() == pytest.approx(share)


def test_mem_loss_equals_the_formula():
    torch.manual_seed(1)
    pred = torch.randn(3, 7, 5, dtype=DOUBLE, requires_grad=True)
    target = torch.randn(3, 7, 5, dtype=DOUBLE)
    weight = torch.rand(3, 7, dtype=DOUBLE)
    cosine = (pred * target).sum(2) / (pred.norm(dim=2) * target.norm(dim=2))
    expected = (weight * (1 - cosine)).sum().item() / 3
    assert mixmag.mem_loss(pred, target, weight).item() == pytest.approx(expected, abs=1e-12)
    assert torch.autograd.gradcheck(lambda p: mixmag.mem_loss(p, target, weight), pred)


def test_nt_xent_equals_the_loop():
    torch.manual_seed(2)
    a, b = (torch.randn(4, 6, dtype=DOUBLE, requires_grad=True) for _ in range(2))
    z = [v / v.norm() for v in torch.cat([a, b])]
    total = 0.0
    for i in range(8):
        others = sum(math.exp((z[i] @ z[k]).item() / 0.2) for k in range(8) if k != i)
        partner = math.exp((z[i] @ z[(i + 4) % 8]).item() / 0.2)
        total -= math.log(partner / others) / 8
    assert mixmag.nt_xent(a, b, 0.2).item() == pytest.approx(total, abs=1e-12)
    assert torch.autograd.gradcheck(lambda a, b: mixmag.nt_xent(a, b, 0.2), (a, b))


def test_losses_are_in_full_precision_under_autocast():
    """Half precision would round similarities, and the counts of valid tokens above 256."""
    torch.manual_seed(0)
    g = Geometry(5)
    a, b = torch.randn(2, 64, 16)
    removed = mixmag.random_removal(2, g.num_tokens, 0.5)
    valid = torch.rand(2, g.num_tokens) > 0.2
    loss = mixmag.nt_xent(a, b, 0.1)
    weight = mixmag.removal_weights(g, removed, valid)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss, mixmag.nt_xent(a, b, 0.1))
        assert torch.equal(weight, mixmag.removal_weights(g, removed, valid))
    assert mixmag.nt_xent(a.half(), b.half(), 0.1).dtype == torch.float32


def test_kept_tokens_may_be_scored_also():
    torch.manual_seed(0)
    model = mixmag.MaskedEmbeddingModel(Config.small(6, region=1), kept_weight=0.5)
    model.decoder.standardize.fit(torch.randn(6), torch.rand(6) + 0.5)
    x = torch.randn(3, 21, 6)
    valid = torch.rand(3, 21) > 0.2
    removed = mixmag.random_removal(3, 21, 0.5)
    kept = mixmag.complement(removed, 21)
    out = model(x, removed, valid)
    cls, tokens = model.encoder(mixmag.take(x, kept), kept, valid.gather(1, kept))
    pred = model.decoder(cls, tokens, kept, removed, valid, predict_kept=True)
    parts = pred.split([kept.shape[1], removed.shape[1]], dim=1)
    expected = 0.0
    for share, part, chosen in zip((0.5, 1.0), parts, (kept, removed), strict=True):
        weight = mixmag.removal_weights(model.encoder.geometry, chosen, valid)
        expected += share * mixmag.mem_loss(part, mixmag.take(x, chosen), weight)
    assert torch.isclose(out.loss, expected)
    model.eval()
    assert torch.allclose(model(x, removed, valid).pred, out.pred, atol=1e-6)
    assert model(x, removed, valid).loss < out.loss


def test_mem_reads_kept_tokens_and_predicts_removed_ones():
    """It reads and computes nothing else."""
    model = MaskedEmbeddingModel(tiny()).eval()
    shapes = []
    for layer in (model.encoder.input, model.decoder.head):
        layer.register_forward_hook(lambda layer, inputs, out: shapes.append(inputs[0].shape))
    x = torch.randn(3, 84, 10)
    out = model(x, 0.75, generator=torch.Generator().manual_seed(0))
    assert shapes == [(3, 21, 10), (3, 63, 48)]
    assert out.pred.shape == (3, 63, 10)
    spoiled = x.scatter(1, out.removed[..., None].expand(-1, -1, 10), math.nan)
    assert torch.equal(model(spoiled, out.removed).pred, out.pred)
    weight = mixmag.removal_weights(model.encoder.geometry, out.removed)
    expected = mixmag.mem_loss(out.pred, mixmag.take(x, out.removed), weight)
    assert torch.equal(out.loss, expected)


def test_mem_loss_ignores_invalid_tokens():
    model = MaskedEmbeddingModel(tiny()).eval()
    x = torch.randn(3, 84, 10)
    valid = torch.rand(3, 84) > 0.3
    removed = mixmag.random_removal(3, 84, 0.5)
    out = model(x, removed, valid)
    spoiled = model(spoil(x, valid), removed, valid)
    assert torch.equal(out.loss, spoiled.loss)
    assert torch.equal(out.per_level, spoiled.per_level)
    spoiled.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("mask, count", [(0.0, 0), (0.001, 0), (1.0, 84)])
def test_mem_refuses_to_remove_nothing_or_everything(mask, count):
    with pytest.raises(ValueError, match=f"removes {count} of 84 tokens, expected 1 to 83"):
        MaskedEmbeddingModel(tiny())(torch.randn(2, 84, 10), mask)


@pytest.mark.parametrize("n", [44, 83, 85])
def test_mem_refuses_what_is_no_region(n):
    """Any number of tokens but N, also of `valid`; removed tokens of another number of regions."""
    model = MaskedEmbeddingModel(tiny())
    x = torch.randn(2, 84, 10)
    with pytest.raises(ValueError, match=rf"expected a tensor of \(2, 84, 10\), found \(2, {n}"):
        model(torch.randn(2, n, 10))
    with pytest.raises(ValueError, match=rf"\(2, 84\), found \(2, {n}\)"):
        model(x, valid=torch.ones(2, n, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"\(2, 42\), found \(1, 42\)"):
        model(x, torch.arange(42)[None])
    with pytest.raises(ValueError, match="removes 84 of 84"):
        model(x, torch.arange(84).expand(2, -1))
    with pytest.raises(ValueError, match=r"\(2, 3, 84, 10\), found \(4, 3, 84, 10\)"):
        mixmag.ContrastiveEmbeddingModel(tiny())(torch.randn(4, 3, 84, 10))


def test_cmem_is_mem_on_both_views_and_nt_xent_between_them():
    model = mixmag.ContrastiveEmbeddingModel(tiny()).eval()
    views = torch.randn(2, 5, 84, 10)
    removed = mixmag.random_removal(10, 84, 0.5).view(2, 5, -1)
    out = model(views, removed)
    first, second = (MaskedEmbeddingModel.forward(model, views[v], removed[v]) for v in (0, 1))
    a, b = model.project(torch.cat([first.cls, second.cls]))
    mem = (first.loss + second.loss).item() / 2
    contrastive = mixmag.nt_xent(a, b, 0.1).item()
    assert out.mem.item() == pytest.approx(mem, abs=1e-6)
    assert out.contrastive.item() == pytest.approx(contrastive, abs=1e-5)
    assert out.loss.item() == pytest.approx(mem + contrastive, abs=1e-5)
    assert torch.allclose(out.projection, torch.stack([a, b]), atol=1e-5)


def test_mem_learns_a_region_whose_tokens_repeat():
    """Where all tokens of a region are equal, the loss falls far below 1, that of the mean."""
    torch.manual_seed(0)
    model = MaskedEmbeddingModel(tiny())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = model(torch.randn(16, 1, 10).expand(16, 84, 10), 0.5).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3


# ------------------------------------------------------------------------------------- aggregation
def test_gated_abmil_equals_the_loop_over_ragged_bags():
    torch.manual_seed(3)
    pool = mixmag.GatedABMIL(5, 7).double()
    lengths = torch.tensor([4, 1, 6])
    x = torch.randn(11, 5, dtype=DOUBLE, requires_grad=True)
    pooled, attention = pool(x, lengths)
    found = attention.split(lengths.tolist())
    for bag, h in enumerate(x.split(lengths.tolist())):
        gates = torch.tanh(pool.V(h)) * torch.sigmoid(pool.U(h))
        weights = torch.softmax(pool.w(gates).squeeze(1), 0)
        assert torch.allclose(found[bag], weights, rtol=0, atol=1e-12)
        assert torch.allclose(pooled[bag], weights @ h, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: pool(x, lengths)[0], x)


def test_gated_abmil_stays_finite_where_a_plain_softmax_would_not():
    pool = mixmag.GatedABMIL(2, 4)
    pool.w.weight.data.fill_(1e5)
    pooled, attention = pool(torch.randn(50, 2), torch.tensor([49, 1]))
    assert torch.isfinite(pooled).all()
    assert attention[-1] == 1
    assert attention[:49].sum().item() == pytest.approx(1)


@pytest.mark.parametrize("lengths", [[5, 0, 6], [5, 5], [12], []])
def test_gated_abmil_refuses_empty_or_misfit_bags(lengths):
    with pytest.raises(ValueError, match="one token or more, 11 in all"):
        mixmag.GatedABMIL(5, 7)(torch.randn(11, 5), torch.tensor(lengths, dtype=torch.long))


def test_min_slide_loss_equals_the_loop_and_sends_the_gradient_to_one_slide():
    torch.manual_seed(4)
    loss = torch.rand(9, dtype=DOUBLE, requires_grad=True)
    case = torch.tensor([0, 1, 1, 2, 2, 2, 3, 0, 3])
    expected = torch.stack([loss[case == c].min() for c in range(4)])
    found = mixmag.min_slide_loss(loss, case)
    assert torch.equal(found, expected)
    (gradient,) = torch.autograd.grad(found.sum(), loss)
    assert torch.equal(gradient, (loss == expected[case]).double())
    assert torch.autograd.gradcheck(lambda x: mixmag.min_slide_loss(x, case), loss)


def classifier(mixing=True, tokens="patch", magnification="all", region=2, **more):
    config = tiny(region)
    encoder = MixingEncoder(config) if mixing else None
    return mixmag.SlideClassifier(config, encoder, tokens, magnification, 16, **more).eval()


@pytest.mark.parametrize("region", [1, 2])
@pytest.mark.parametrize("magnification", [5, "all"])
@pytest.mark.parametrize("mixing, tokens", [(False, "patch"), (True, "patch"), (True, "cls")])
def test_classifier_serves_every_row(mixing, tokens, magnification, region):
    """One pass over ragged slides equals slide by slide. A region without a valid token is absent.
    Another number of tokens is refused."""
    model = classifier(mixing, tokens, magnification, region)
    model.chunk = 2
    n = len(model.index)
    x = torch.randn(6, n, 10)
    valid = torch.rand(6, n) > 0.3
    valid[:, 0] = True
    valid[1] = False
    logit, attention = model(x, torch.tensor([3, 1, 2]), valid)
    assert len(attention) == (5 if tokens == "cls" else valid.sum())
    model.chunk = 64
    kept = torch.tensor([0, 2, 3, 4, 5])
    expected = []
    for regions in kept.split([2, 1, 2]):
        alone, _ = model(x[regions], torch.tensor([len(regions)]), valid[regions])
        expected.append(alone.item())
    assert logit.tolist() == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match=rf"of \(6, {n}, 10\), found \(6, {n + 1}, 10\)"):
        model(torch.randn(6, n + 1, 10), torch.tensor([6]))


def test_chunked_gradient_equals_the_whole():
    model = classifier()
    x = torch.randn(7, 84, 10)

    def gradients(chunk):
        model.chunk = chunk
        model.zero_grad()
        logit, _ = model(x, torch.tensor([3, 4]))
        logit.square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    for whole, parts in zip(gradients(100), gradients(2), strict=True):
        assert torch.allclose(whole, parts, atol=1e-5)


class MeanPooling(nn.Module):
    """The plainest pool that SlideClassifier accepts."""

    def forward(self, x, lengths):
        pooled = torch.stack([bag.mean(0) for bag in x.split(lengths.tolist())])
        return pooled, torch.repeat_interleave(1 / lengths, lengths)


def test_classifier_takes_another_pool_and_more_outputs():
    model = classifier(pool=MeanPooling(), outputs=3)
    x = torch.randn(5, 84, 10)
    logit, attention = model(x, torch.tensor([2, 3]))
    assert logit.shape == (2, 3)
    assert attention.shape == (5 * 84,)
    _, tokens = model.encoder(x)
    expected = model.head(torch.stack([tokens[:2].mean((0, 1)), tokens[2:].mean((0, 1))]))
    assert torch.allclose(logit, expected, atol=1e-5)


@pytest.mark.parametrize("empty", [torch.device("meta"), None], ids=["meta", "to_empty"])
def test_a_classifier_made_without_numbers_gets_all_of_them_from_its_state(empty):
    made = classifier(magnification=10)
    with empty or torch.device("cpu"):
        filled = classifier(magnification=10)
    if empty is None:
        filled = filled.to("meta").to_empty(device="cpu")
    filled.load_state_dict(made.state_dict(), assign=True)
    x = torch.randn(3, 16, 10)
    regions = torch.tensor([1, 2])
    for expected, found in zip(made(x, regions), filled(x, regions), strict=True):
        assert torch.equal(expected, found)


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, DOUBLE])
def test_every_dtype_of_the_model_and_of_its_inputs_works(dtype):
    """Nearly as in fp32; also where it is torch's default."""
    models = [MaskedEmbeddingModel(tiny()), mixmag.ContrastiveEmbeddingModel(tiny())]
    models += [classifier(), classifier(tokens="cls"), classifier(mixing=False)]
    x = torch.randn(2, 3, 84, 10)
    removed = mixmag.random_removal(6, 84, 0.5).view(2, 3, -1)
    inputs = [(x[0], removed[0]), (x, removed), *3 * [(x[0], torch.tensor([1, 2]))]]
    for model, (x, second) in zip(models, inputs, strict=True):

        def result(x, model=model, second=second):
            out = model(x, second)
            return out.loss if isinstance(out, mixmag.Outputs) else out[0].sum()

        expected = result(x).item()
        assert result(x.to(dtype)).item() == pytest.approx(expected, abs=0.02)
        model.to(dtype)
        assert result(x).item() == pytest.approx(expected, abs=0.02)
        loss = result(x.to(dtype))
        assert loss.item() == pytest.approx(expected, abs=0.02)
        loss.backward()
    torch.set_default_dtype(dtype)
    try:
        assert MaskedEmbeddingModel(tiny())(x).loss.isfinite()
        assert classifier()(x, second)[0].isfinite().all()
    finally:
        torch.set_default_dtype(torch.float32)


def test_encoder_and_classifier_can_be_exported():
    """With another number of regions for the encoder; empty bags are still refused."""
    x = torch.randn(3, 84, 10)
    valid = torch.rand(3, 84) > 0.3
    batch = {0: torch.export.Dim("B", min=2, max=9)}
    encoder = MixingEncoder(tiny()).eval()
    exported = torch.export.export(encoder, (x,), dynamic_shapes={"x": batch}).module()
    five = torch.randn(5, 84, 10)
    for expected, found in zip(encoder(five), exported(five), strict=True):
        assert torch.allclose(expected, found, atol=1e-5)
    for model in (classifier(), classifier(tokens="cls"), classifier(mixing=False)):
        exported = torch.export.export(model, (x, torch.tensor([1, 2]), valid)).module()
        regions = torch.tensor([2, 1])
        pairs = zip(model(x, regions, valid), exported(x, regions, valid), strict=True)
        assert all(torch.allclose(expected, found, atol=1e-5) for expected, found in pairs)
    with pytest.raises(RuntimeError):
        exported(x, torch.tensor([3, 0]), valid)


# ------------------------------------------------------------------------------------ config, disk
def export(folder, encoder) -> None:
    save_file(encoder.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model": encoder.config.to_dict()}))


def test_encoder_round_trip(tmp_path):
    encoder = MixingEncoder(tiny()).eval()
    encoder.standardize.fit(torch.randn(10), torch.rand(10) + 1)
    export(tmp_path, encoder)
    loaded = mixmag.load_encoder(tmp_path)
    x = torch.randn(2, 84, 10)
    assert not loaded.training
    for ours, theirs in zip(encoder(x), loaded(x), strict=True):
        assert torch.equal(ours, theirs)


def test_load_encoder_is_strict(tmp_path):
    export(tmp_path, MixingEncoder(tiny()))
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    weights = MixingEncoder(tiny()).state_dict()
    del weights["norm.bias"]
    save_file(weights, path)
    with pytest.raises(RuntimeError, match="norm.bias"):
        mixmag.load_encoder(tmp_path)
    no_json = whole[:8] + b"?" + whole[9:]
    for broken in (b"", whole[:5], whole[:200], whole[:-100], b"\xff" * 100, no_json):
        path.write_bytes(broken)
        with pytest.raises(SafetensorError):
            mixmag.load_encoder(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        mixmag.load_encoder(tmp_path)


def test_config_round_trip():
    config = Config.small(64, region=2)
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="missing keys .*depth"):
        Config.from_dict({"dim": 3})


@pytest.mark.parametrize("name, value", [("depth", 1.5), ("heads", 0), ("heads", 5), ("hue", 1)])
def test_config_refuses_what_cannot_work(name, value):
    with pytest.raises(ValueError, match=name):
        Config.from_dict({**Config.small(8).to_dict(), name: value})


def test_presets_have_the_sizes_they_promise():
    parameters = sum(p.numel() for p in MaskedEmbeddingModel(Config.small(64)).parameters())
    assert 0.7e6 < parameters < 1.3e6
    paper = Config.paper()
    assert (paper.dim, paper.width, paper.depth, paper.heads) == (1280, 768, 6, 12)
    assert (paper.decoder_width, paper.decoder_depth, paper.cls_tokens) == (1024, 2, 4)


def test_mixmag_imports_torch_and_the_standard_library_only():
    code = """
import sys, torch
before = set(sys.modules)
import mixmag
names = {name.split(".")[0] for name in set(sys.modules) - before}
print(names - sys.stdlib_module_names - {"torch", "mixmag"})
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
