"""optim.py: Muon against torch's and against the SVD, the groups, schedules and clipping against values by hand."""
import io
import math

import pytest
import torch
from conftest import tiny_model
from torch.utils.flop_counter import FlopCounterMode

from optim import (SCHEDULES, Muon, clip_gradients, logical_pieces, make_optimizers, muon_scale, newton_schulz,
                   place_parameters, set_lr)

torch.set_num_threads(1)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def parameter(*shape, seed=0):
    return torch.nn.Parameter(randn(*shape, seed=seed))


def run(optimizer, params, steps=20, seed=100):
    """Steps with random gradients, the same ones for the same seed."""
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = randn(*p.shape, seed=seed + 1000 * step + i)
        optimizer.step()


# ----------------------------------------------------------------------------------------------------------------------
# Newton-Schulz


def quintic(s):
    """What five steps make of a singular value; the coefficients are those of Jordan et al. 2024."""
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return s


def with_singular_values(values, rows, cols, seed=0):
    """(matrix, U, V) in fp64 of the given singular values and random vectors."""
    U = torch.linalg.qr(randn(rows, len(values), seed=seed, dtype=torch.float64)).Q
    V = torch.linalg.qr(randn(cols, len(values), seed=seed + 1, dtype=torch.float64)).Q
    return U * torch.as_tensor(values, dtype=torch.float64) @ V.T, U, V


SHAPES = [(8, 40), (40, 8), (24, 24)]


@pytest.mark.parametrize("shape", SHAPES)
def test_newton_schulz_is_the_quintic_on_the_singular_values(shape):
    G = randn(*shape, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    expected = U * quintic(S / S.square().sum().sqrt()) @ Vh
    torch.testing.assert_close(newton_schulz(G, dtype=torch.float64), expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("dtype, slack", [(torch.float64, 0.005), (torch.bfloat16, 0.04)], ids=["fp64", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_newton_schulz_brings_singular_values_near_1_and_keeps_the_vectors(shape, dtype, slack):
    """Values from 0.01 to 1 of the Frobenius norm land in [0.68, 1.13]."""
    values = torch.logspace(-2, 0, min(shape), dtype=torch.float64)
    values = values.clamp(min=0.0102 * values.norm())
    assert 0.01 < values.min() / values.norm() < 0.0103
    G, U, V = with_singular_values(values, *shape)
    O = newton_schulz(G.float(), dtype=dtype)
    assert O.dtype == dtype and O.shape == shape
    found = torch.linalg.svdvals(O.double())
    assert 0.68 - slack < found.min() and found.max() < 1.13 + slack
    core = U.T @ O.double() @ V  # diagonal if the vectors are kept
    assert (core - core.diag().diag()).abs().max() < 2 * slack
    assert (O.double() - U @ V.T).norm() < 0.25 * (U @ V.T).norm(), "near the exact polar factor"


def test_newton_schulz_keeps_zero_finite():
    O = newton_schulz(torch.stack((torch.zeros(6, 9), randn(6, 9))))
    assert (O[0] == 0).all() and O.isfinite().all() and (O[1] != 0).any()


def test_newton_schulz_of_rank_one_stays_of_rank_one():
    """Entries of one size, so that bf16 rounds them alike: what rounding adds to the rank would grow 500-fold."""
    u, v = randn(20, 1).sign(), randn(1, 30, seed=1).sign()
    O = newton_schulz(5 * u @ v).double()
    assert (O - quintic(1.0) * (u @ v) / math.sqrt(600)).norm() < 0.05


@pytest.mark.parametrize("shape", SHAPES)
def test_newton_schulz_of_a_stack_is_that_of_each(shape):
    stack = torch.stack([randn(*shape, seed=i) * 10.0**i for i in range(4)])
    for G, O in zip(stack, newton_schulz(stack)):
        alone = newton_schulz(G)
        assert (O - alone).norm() < 0.01 * alone.norm()


@pytest.mark.parametrize("shape", [(8, 40), (40, 8)])
def test_newton_schulz_works_on_the_smaller_gram_matrix(shape):
    G = randn(3, *shape)
    with FlopCounterMode(display=False) as counter:
        newton_schulz(G)
    assert counter.get_total_flops() == 3 * 5 * (4 * 8 * 8 * 40 + 2 * 8**3)


@pytest.mark.parametrize("scale", [1e-4, 3e5])
def test_newton_schulz_does_not_depend_on_scale(scale):
    G = randn(16, 24, dtype=torch.float64)
    torch.testing.assert_close(newton_schulz(scale * G, dtype=torch.float64), newton_schulz(G, dtype=torch.float64))
    low, base = newton_schulz(scale * G), newton_schulz(G)
    assert (low - base).norm() < 0.05 * base.norm()


@pytest.mark.parametrize("kind, rows, cols, expected", [
    ("match_rms_adamw", 64, 256, 3.2), ("match_rms_adamw", 256, 64, 3.2), ("match_rms_adamw", 100, 100, 2.0),
    ("original", 64, 256, 1.0), ("original", 256, 64, 2.0), ("original", 100, 100, 1.0),
    ("spectral", 64, 256, 0.5), ("spectral", 256, 64, 2.0), ("spectral", 100, 100, 1.0)])
def test_muon_scale(kind, rows, cols, expected):
    assert muon_scale(rows, cols, kind) == pytest.approx(expected, rel=1e-12)


def test_unknown_muon_scale_is_refused():
    with pytest.raises(ValueError, match="nonsense"):
        muon_scale(2, 2, "nonsense")


# ----------------------------------------------------------------------------------------------------------------------
# Muon


@pytest.mark.parametrize("nesterov", [True, False], ids=["nesterov", "plain"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
def test_muon_goes_where_that_of_torch_goes(scale, weight_decay, nesterov):
    """Wide, tall and square. Products in bf16, in batches here and one by one there: 1 % of the way at most."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has none")
    shapes = [(16, 48), (48, 16), (32, 32), (16, 48)]
    ours, theirs = ([parameter(*s, seed=i) for i, s in enumerate(shapes)] for _ in range(2))
    start = [p.detach().clone() for p in ours]
    kw = dict(lr=0.02, weight_decay=weight_decay, momentum=0.9, nesterov=nesterov)
    run(Muon(ours, scale=scale, **kw), ours)
    run(torch.optim.Muon(theirs, adjust_lr_fn=scale, **kw), theirs)
    for a, b, w in zip(ours, theirs, start):
        assert (a - b).norm() < 0.01 * (b - w).norm()


def test_muon_update_has_an_rms_of_a_fifth_of_the_rate():
    """An exactly orthogonal update would give 0.2 lr; Newton-Schulz ends at 0.7 to 1.2 of that."""
    for shape in ((16, 48), (48, 16), (32, 32)):
        p = parameter(*shape)
        start = p.detach().clone()
        run(Muon([p], lr=0.1, weight_decay=0.0), [p], steps=1)
        assert 0.15 < (p - start).square().mean().sqrt() / 0.1 < 0.23


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw", "spectral"])
def test_pieces_of_a_fused_matrix_move_as_separate_matrices_do(scale):
    rows = (32, 8, 8)
    fused, whole = parameter(48, 32), parameter(48, 32)
    separate = [torch.nn.Parameter(w.detach().clone()) for w in fused.split(rows)]
    start, kw = fused.detach().clone(), dict(lr=0.02, weight_decay=0.1, scale=scale)
    optimizers = Muon([fused], [rows], **kw), Muon(separate, **kw), Muon([whole], **kw)
    for step in range(10):
        fused.grad = whole.grad = randn(48, 32, seed=step)
        for p, g in zip(separate, fused.grad.split(rows)):
            p.grad = g.clone()
        for optimizer in optimizers:
            optimizer.step()
    way = (fused - start).norm()
    assert (fused - torch.cat(separate)).norm() < 1e-3 * way
    assert (fused - whole).norm() > 0.1 * way, "as one matrix it would go elsewhere"


@pytest.mark.parametrize("other", [0.0, 1e6, math.nan])
def test_equal_shapes_in_a_stack_do_not_influence_each_other(other):
    alone, together, neighbour = parameter(12, 20), parameter(12, 20), parameter(12, 20, seed=1)
    start, one, two = alone.detach().clone(), Muon([alone]), Muon([neighbour, together])
    for step in range(5):
        alone.grad = randn(12, 20, seed=step)
        together.grad, neighbour.grad = alone.grad.clone(), other * randn(12, 20, seed=50 + step)
        one.step()
        two.step()
    assert (alone - together).norm() < 1e-3 * (alone - start).norm()


def test_muon_leaves_parameters_without_a_gradient_alone():
    used, unused = parameter(8, 8), parameter(8, 8, seed=1)
    before, optimizer = unused.detach().clone(), Muon([unused, used], lr=0.1, weight_decay=0.5)
    optimizer.step()
    used.grad = randn(8, 8)
    optimizer.step()
    assert torch.equal(unused, before) and not optimizer.state[unused]
    assert not torch.equal(used, randn(8, 8))
    unused.grad = torch.zeros(8, 8)
    optimizer.step()
    torch.testing.assert_close(unused.detach(), 0.95 * before)


def test_muon_goes_on_bit_for_bit_from_a_stored_state():
    params = [parameter(8, 24), parameter(24, 8, seed=1)]
    first = Muon(params, [(4, 4), (24,)], lr=0.03)
    run(first, params, steps=3)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    second = Muon(copies, [(4, 4), (24,)], lr=9.0)
    second.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    run(first, params, steps=3, seed=7)
    run(second, copies, steps=3, seed=7)
    for a, b in zip(params, copies):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), ()])
def test_muon_refuses_what_is_no_matrix(shape):
    with pytest.raises(ValueError, match="matrices"):
        Muon([parameter(4, 4), parameter(*shape)])


# ----------------------------------------------------------------------------------------------------------------------
# Where each parameter goes


@pytest.mark.parametrize("kw", [{}, dict(tie_embeddings=True), dict(mlp="relu2", qk_norm=False)], ids=str)
def test_every_parameter_is_placed_once(kw):
    model = tiny_model(**kw)
    places = place_parameters(model)
    assert set(places) == {"matrix", "embedding", "head", "vector"}
    assert sorted(sum(places.values(), [])) == sorted(name for name, _ in model.named_parameters())
    assert places["embedding"] == ["embed.weight"]
    assert places["head"] == ([] if kw.get("tie_embeddings") else ["head.weight"])
    ends = (".qkv.weight", ".o.weight", ".up.weight", ".down.weight")
    assert len(places["matrix"]) == 3 * 4 and all(name.endswith(ends) for name in places["matrix"])
    assert all("norm" in name for name in places["vector"])


@pytest.mark.parametrize("where, shape", [("", (4, 4)), ("blocks.0", (2, 3, 4)), ("blocks.1.mlp", ())])
def test_a_parameter_without_a_place_is_refused(where, shape):
    model = tiny_model()
    model.get_submodule(where).odd = torch.nn.Parameter(torch.zeros(shape))
    for place in (place_parameters, make_optimizers):
        with pytest.raises(ValueError, match="odd"):
            place(model)


@pytest.mark.parametrize("mlp, inside", [("swiglu", (64, 64)), ("gelu", (128,))])
def test_logical_pieces_are_the_matrices_in_each_weight(mlp, inside):
    model = tiny_model(mlp=mlp)
    pieces = logical_pieces(model)
    for i in range(3):
        assert pieces[f"blocks.{i}.mixer.qkv.weight"] == (32, 16, 16)
        assert pieces[f"blocks.{i}.mixer.o.weight"] == pieces[f"blocks.{i}.mlp.down.weight"] == (32,)
        assert pieces[f"blocks.{i}.mlp.up.weight"] == inside
    for name in place_parameters(model)["matrix"]:
        assert sum(pieces[name]) == model.get_parameter(name).shape[0]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("optimizer, kinds", [("muon", [Muon, torch.optim.AdamW]), ("adamw", [torch.optim.AdamW])])
def test_optimizers_hold_every_parameter_once_and_decay_matrices_and_head(optimizer, kinds, tied):
    """Without gradients to speak of, a step shows the decay alone."""
    model = tiny_model(tie_embeddings=tied)
    optimizers = make_optimizers(model, optimizer, lr=0.1, weight_decay=0.5, embedding_lr=3.0)
    groups = [group for o in optimizers for group in o.param_groups]
    assert [type(o) for o in optimizers] == kinds
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in model.parameters())
    lr = {id(p): g["lr"] for g in groups for p in g["params"]}
    for name, p in model.named_parameters():  # a tied embedding is the head too, and moves at the head's rate
        assert lr[id(p)] == pytest.approx(0.3 if name == "embed.weight" and not tied else 0.1), name
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for o in optimizers:
        o.step()
    for name, p in model.named_parameters():
        kept = 1.0 if p.ndim == 1 or name == "embed.weight" else 0.95
        torch.testing.assert_close(p.detach(), kept * before[name], msg=name)


def test_optimizers_take_their_settings():
    muon, adamw = make_optimizers(tiny_model(), lr=0.3, betas=(0.8, 0.7), momentum=0.6, muon_scale="spectral")
    assert (muon.param_groups[0]["momentum"], muon.param_groups[0]["scale"]) == (0.6, "spectral")
    assert all(g["betas"] == (0.8, 0.7) for g in adamw.param_groups)
    assert {(tuple(p.shape), rows) for p, rows in zip(muon.param_groups[0]["params"], muon.param_groups[0]["pieces"])} == {
        ((64, 32), (32, 16, 16)), ((32, 32), (32,)), ((128, 32), (64, 64)), ((32, 64), (32,))}


# ----------------------------------------------------------------------------------------------------------------------
# Schedules and clipping


@pytest.mark.parametrize("name, steps, warmup, decay_fraction, table", [
    ("wsd", 100, 10, 0.4, {0: 0.1, 4: 0.5, 9: 1, 10: 1, 59: 1, 60: 1, 61: 0.975, 80: 0.5, 99: 0.025, 100: 0}),
    ("wsd", 100, 0, 0.4, {0: 1, 1: 1, 60: 1, 90: 0.25}),
    ("wsd", 100, 10, 0.0, {0: 0.1, 9: 1, 50: 1, 99: 1}),
    ("wsd", 100, 0, 1.0, {0: 1, 25: 0.75, 99: 0.01}),
    ("wsd", 10, 8, 1.0, {0: 0.125, 4: 0.6, 9: 0.1}),  # the smaller of the two where they overlap
    ("wsd", 10, 0, 0.25, {7: 1, 8: 0.8, 9: 0.4}),  # a decay of 2.5 steps
    ("constant", 100, 10, 0.4, {0: 0.1, 4: 0.5, 9: 1, 10: 1, 99: 1}),
    ("constant", 100, 0, 0.4, {0: 1, 99: 1}),
    ("cosine", 100, 10, 0.4, {0: 0.1, 4: 0.5, 9: 1, 10: 1, 40: 0.775, 55: 0.55, 70: 0.325, 100: 0.1}),
    ("cosine", 100, 0, 0.4, {0: 1, 50: 0.55, 100: 0.1}),
    ("cosine", 90, 0, 0.0, {0: 1, 30: 0.775, 60: 0.325})])
def test_schedule(name, steps, warmup, decay_fraction, table):
    for step, factor in table.items():
        assert SCHEDULES[name](step, steps, warmup, decay_fraction) == pytest.approx(factor, abs=1e-12), step


def test_cosine_ends_at_its_floor():
    for floor in (0.0, 0.1, 0.5):
        assert SCHEDULES["cosine"](9_999, 10_000, 100, floor=floor) == pytest.approx(floor, abs=1e-6)


def test_set_lr_keeps_the_factor_of_each_group():
    optimizers = make_optimizers(tiny_model(), lr=0.2, embedding_lr=1.0)
    groups = [g for o in optimizers for g in o.param_groups]
    groups[-1]["lr_factor"] = 15.0
    for lr in (0.5, 0.1):
        set_lr(optimizers, lr)
        assert [g["lr"] for g in groups] == pytest.approx([lr] * (len(groups) - 1) + [15 * lr])


@pytest.mark.parametrize("max_norm, scale", [(1.0, 1 / 13), (6.5, 0.5), (20.0, 1.0), (0.0, 1.0)])
def test_clipping_scales_to_the_norm_and_0_only_measures(max_norm, scale):
    a, b, without = parameter(2), parameter(1, 1), parameter(3)
    a.grad, b.grad = torch.tensor([3.0, 4.0]), torch.tensor([[12.0]])  # 9 + 16 + 144 = 169
    norm = clip_gradients([a, b, without], max_norm)
    assert norm.shape == () and norm.item() == pytest.approx(13)
    assert torch.cat((a.grad, b.grad[0])).tolist() == pytest.approx([3 * scale, 4 * scale, 12 * scale], rel=1e-5)
    assert without.grad is None
