"""optim.py: Muon against torch's and against the SVD, the groups, schedules and clipping against values by hand."""
import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model
from torch.utils.flop_counter import FlopCounterMode

from optim import (NS_COEFFICIENTS, SCHEDULES, Multipliers, Muon, clip_gradients, clipped_parameters,
                   effective_weight, logical_pieces, make_optimizers, module_of, momentum_at, multiplier_gradients, muon_scale, newton_schulz, normalize_rows,
                   place_multipliers, place_parameters, set_lr, share_work, weight_scales, wsd)

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


@pytest.mark.parametrize("coefficients, low, high, at_1e_3", [("quintic", 0.68, 1.13, 0.47),
                                                             ("polar_express", 0.86, 1.14, 0.85)])
@pytest.mark.parametrize("rows, cols", [(40, 40), (30, 70), (70, 30)], ids=["square", "wide", "tall"])
def test_singular_values_land_in_the_published_band(coefficients, low, high, at_1e_3, rows, cols):
    """Relative singular values from 0.01 to 1 (of the Frobenius norm); one more at 1e-3."""
    s = torch.linspace(math.log(0.01), 0, 29, dtype=torch.float64).exp()
    s = torch.cat((s, s.new_tensor([1e-3])))
    for first in range(0, 30, 1):  # one at a time, beside a large one that is no more than needed to set the norm
        pair = torch.stack((s[first], (1 - s[first].square()).clamp(min=0).sqrt()))
        G, U, V = with_singular_values(pair, rows, cols, seed=first)
        got = (U.T @ newton_schulz(G, coefficients, dtype=torch.float64) @ V)[0, 0].item()
        if first == 29:
            assert got == pytest.approx(at_1e_3, abs=0.01)
        else:
            assert low - 0.01 < got < high + 0.01


@pytest.mark.parametrize("coefficients", NS_COEFFICIENTS)
@pytest.mark.parametrize("rows, cols", [(64, 64), (48, 96), (96, 48)], ids=["square", "wide", "tall"])
def test_newton_schulz_in_bf16_is_near_the_svd(coefficients, rows, cols):
    G = randn(4, rows, cols, dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    O = newton_schulz(G, coefficients).double()
    error = ((O - U @ Vh).norm(dim=(-2, -1)) / (U @ Vh).norm(dim=(-2, -1))).max()
    assert error < {"quintic": 0.35, "polar_express": 0.15}[coefficients]


@pytest.mark.parametrize("coefficients", NS_COEFFICIENTS)
def test_zero_and_rank_one_gradients(coefficients):
    assert not newton_schulz(torch.zeros(2, 8, 12), coefficients).any()
    u, v = randn(8, 1, dtype=torch.float64), randn(1, 12, dtype=torch.float64)
    got = newton_schulz(1e-6 * u @ v, coefficients, dtype=torch.float64)
    gain = (got / (u / u.norm() @ v / v.norm())).flatten()
    assert 0.65 < gain.min() and gain.max() < 1.15 and gain.std() < 1e-6


def test_polar_express_is_its_published_table():
    s = x = torch.tensor([0.3, 0.9, 0.05], dtype=torch.float64)
    x = s / s.norm() / 1.02
    for a, b, c in [(8.156554524902461, -22.48329292557795, 15.878769915207462),
                    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
                    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
                    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
                    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323)]:
        x = a * x + b * x**3 + c * x**5
    G, U, V = with_singular_values(s, 10, 6)
    torch.testing.assert_close(newton_schulz(G, "polar_express", dtype=torch.float64), U * x @ V.T, rtol=1e-9, atol=1e-9)


def test_normuon_against_a_loop_over_rows():
    """The authors' code (arXiv 2510.05491), row by row; and the Frobenius norm is kept."""
    v = torch.zeros(2, 5, 1, dtype=torch.float64)
    by_hand = [[0.0] * 5 for _ in range(2)]
    for step in range(4):
        O = randn(2, 5, 9, seed=step, dtype=torch.float64) * torch.arange(1, 6)[:, None]
        got = normalize_rows(O.clone(), v)
        for b in range(2):
            rows = []
            for i in range(5):
                by_hand[b][i] = 0.95 * by_hand[b][i] + 0.05 * sum(x.item() ** 2 for x in O[b, i]) / 9
                rows.append(O[b, i] / (by_hand[b][i] ** 0.5 + 1e-10))
            expected = torch.stack(rows)
            torch.testing.assert_close(got[b], expected * O[b].norm() / expected.norm(), rtol=1e-9, atol=0)


def test_normuon_of_a_zero_update_is_zero():
    assert not normalize_rows(torch.zeros(2, 3, 4), torch.zeros(2, 3, 1)).any()


def test_newton_schulz_takes_its_steps_and_repeats_the_last():
    s = torch.tensor([0.8, 0.6], dtype=torch.float64)
    G, U, V = with_singular_values(s, 6, 9)
    for coefficients, table in NS_COEFFICIENTS.items():
        for steps in (0, 2, 7):
            x = s / s.norm() / (1.02 if coefficients == "polar_express" else 1.0)
            for i in range(steps):
                a, b, c = table[i] if i < len(table) else table[-1]
                x = a * x + b * x**3 + c * x**5
            torch.testing.assert_close(newton_schulz(G, coefficients, steps, torch.float64), U * x @ V.T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("normuon", [False, True])
def test_two_steps_of_muon_by_hand(normuon):
    """In fp64, with everything on: decay before the update, Nesterov, the row state carried on."""
    p = torch.nn.Parameter(randn(4, 6, dtype=torch.float64))
    W, m, v = p.detach().clone(), torch.zeros(4, 6, dtype=torch.float64), torch.zeros(4, 1, dtype=torch.float64)
    optimizer = Muon([p], lr=0.1, weight_decay=0.5, momentum=0.8, coefficients="polar_express", scale="spectral",
                     normuon=normuon, dtype=torch.float64)
    for step in range(2):
        p.grad = randn(4, 6, seed=step, dtype=torch.float64)
        m = 0.8 * m + 0.2 * p.grad
        O = newton_schulz(0.2 * p.grad + 0.8 * m, "polar_express", dtype=torch.float64)
        if normuon:
            v = 0.95 * v + 0.05 * O.square().mean(1, keepdim=True)
            O = O / v.sqrt() * (O.norm() / (O / v.sqrt()).norm())
        W = 0.95 * W - 0.1 * math.sqrt(4 / 6) * O
        optimizer.step()
    torch.testing.assert_close(p.detach(), W, rtol=1e-8, atol=1e-8)


def test_normuon_gives_rows_of_very_different_gradients_equal_updates():
    p = parameter(8, 24)
    start, optimizer = p.detach().clone(), Muon([p], lr=0.1, weight_decay=0.0, normuon=True, dtype=torch.float32)
    for step in range(60):
        p.grad = randn(8, 24, seed=step) * torch.tensor([1.0] * 7 + [1e-3])[:, None]
        before = p.detach().clone()
        optimizer.step()
    rows = (p - before).detach().norm(dim=1)
    assert rows.max() < 2.0 * rows.min() and not torch.equal(p, start)


def test_momentum_warms_up_linearly():
    assert [momentum_at(s, 0.95, 100) for s in (0, 50, 100, 500)] == pytest.approx([0.85, 0.90, 0.95, 0.95])
    assert momentum_at(0, 0.95, 0) == 0.95
    assert [momentum_at(s, 0.6, 10) for s in (0, 5, 10)] == [0.6] * 3, "it never starts above its end"


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
def test_work_is_shared_by_cost_and_not_by_count(world):
    costs = [1.0] * 8 + [10.0] * 12 + [90.0] * 4 + [10.0] * 24
    owners = share_work(costs, world)
    load = [sum(c for c, o in zip(costs, owners) if o == rank) for rank in range(world)]
    assert len(owners) == len(costs) and set(owners) == set(range(world))
    assert max(load) - min(load) <= {1: 0, 2: 2, 3: 10, 4: 10, 7: 30}[world], load


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


@pytest.mark.parametrize("shape", [(4,), (2, 2, 3, 4), ()])
def test_muon_refuses_what_is_no_matrix(shape):
    with pytest.raises(ValueError, match="matrices"):
        Muon([parameter(4, 4), parameter(*shape)])


# ----------------------------------------------------------------------------------------------------------------------
# Learnable multipliers


def plain_multipliers(model, kind, placement, optimizer, modules, **kw):
    """The plain way: leaves W, r, c for every matrix, W~ = r * W * c formed in the forward, gradients by autograd.
    Returns (a function (idx, targets) -> loss, the leaves by our names, the optimizers)."""
    W, mult = {}, {}
    for name, pieces in logical_pieces(model).items():
        if name not in dict(model.named_parameters()) or module_of(pieces[0][0]) not in modules:
            continue
        p = model.get_parameter(name)
        W[name] = torch.nn.Parameter(p.detach().clone())
        for piece, rows in pieces:
            row, column = place_multipliers(piece, placement, model.config.tie_embeddings, model.config.mlp)
            if kind == "scalar" and (row or column):
                mult[f"{name}:{piece}.r"] = torch.nn.Parameter(torch.ones(1, dtype=p.dtype))
            elif kind == "vector":
                if row:
                    mult[f"{name}:{piece}.r"] = torch.nn.Parameter(torch.ones(rows, dtype=p.dtype))
                if column:
                    mult[f"{name}:{piece}.c"] = torch.nn.Parameter(torch.ones(p.shape[1], dtype=p.dtype))

    def loss(idx, targets):
        effective = {}
        for name, w in W.items():
            parts = []
            pieces = logical_pieces(model)[name]
            for (piece, _), part in zip(pieces, w.split([rows for _, rows in pieces])):
                one = torch.ones(1, dtype=w.dtype)
                parts.append(mult.get(f"{name}:{piece}.r", one)[:, None] * part * mult.get(f"{name}:{piece}.c", one))
            effective[name] = torch.cat(parts)
        logits, _ = torch.func.functional_call(model, effective, (idx,))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    other = {n: W.get(n, p) for n, p in model.named_parameters()}
    places = place_parameters(model)
    decay = {"matrix": 0.1, "embedding": 0.0, "head": 0.1, "vector": 0.0}
    groups = [{"params": [other[n] for n in names], "weight_decay": decay[kind_],
               "lr": 0.003 * (2.0 if kind_ == "embedding" and places["head"] else 1.0)} for kind_, names in places.items() if names]
    made = []
    if optimizer == "muon":
        group = groups.pop(0)
        rows = [tuple(rows for _, rows in logical_pieces(model)[n]) for n in places["matrix"]]
        made.append(Muon(group["params"], rows, lr=0.003, weight_decay=0.1, dtype=torch.float64))
    made.append(torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-10))
    made.append(torch.optim.AdamW(list(mult.values()), lr=0.01, betas=(0.9, 0.95), eps=1e-10, weight_decay=2e-3))
    return loss, {**W, **mult}, other, made


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("kind, placement, model_kw, modules", [
    ("vector", "all", {}, ("embedding", "attention", "mlp")),
    ("scalar", "all", {}, ("embedding", "attention", "mlp")),
    ("vector", "symmetry_free", dict(mlp="gelu"), ("embedding", "attention", "mlp")),
    ("vector", "all", dict(tie_embeddings=True, mlp="relu2"), ("embedding", "mlp")),
    ("scalar", "symmetry_free", {}, ("attention",)),
    ("scalar", "all", {}, ("head", "mlp")),
    ("vector", "all", dict(mixer="hybrid", d_state=8, ssm_head_dim=16, chunk_size=8), ("attention", "mlp", "ssm")),
    ("vector", "symmetry_free", dict(mixer="mamba2", d_state=8, ssm_head_dim=16), ("embedding", "ssm")),
    ("scalar", "all", dict(mixer="mamba2", d_state=8, ssm_head_dim=16), ("embedding", "ssm"))], ids=str)
def test_multipliers_go_where_the_plain_form_goes(kind, placement, model_kw, modules, optimizer):
    """50 steps with clipping in fp64: r * W * c in the forward and autograd, against the optimizer-side form. (At ten times
    the rate the two still agree at first, but Mamba-2's path is chaotic and rounding grows past 1e-9 in 50 steps.)"""
    model = tiny_model(n_layer=2, **model_kw).double()
    twin = copy.deepcopy(model)
    loss_of, leaves, others, made = plain_multipliers(twin, kind, placement, optimizer, modules)
    multipliers = Multipliers(model, kind, placement, modules)
    optimizers = make_optimizers(model, multipliers, optimizer, lr=0.003, embedding_lr=2.0, multiplier_lr=0.01,
                                 **(dict(dtype=torch.float64) if optimizer == "muon" else {}))
    trained = clipped_parameters(model, multipliers)
    start = {name: t.detach().clone() for name, t in multipliers.named().items()}
    tokens = torch.randint(97, (50, 2, 9), generator=torch.Generator().manual_seed(0))
    for step, batch in enumerate(tokens):
        loss_of(batch[:, :-1], batch[:, 1:]).backward()
        clip_gradients(others.values(), 0.5)
        for o in made:
            o.step()
            o.zero_grad()
        loss, _ = model(batch[:, :-1], batch[:, 1:])
        loss.backward()
        multipliers.split_gradients()
        clip_gradients(trained, 0.5)
        for o in optimizers:
            o.step()
            o.zero_grad()
        multipliers.fold()
    named = multipliers.named()
    assert set(named) == set(leaves)
    for name, t in named.items():
        assert (t - leaves[name]).norm() < 1e-9 * t.norm(), name
        assert (t - start[name]).norm() > 1e-3 * t.norm(), f"{name} has not moved"
    for name, p in model.named_parameters():
        if name not in multipliers.W:
            assert (p - others[name]).norm() < 1e-9 * p.norm(), name


@pytest.mark.parametrize("r, c", [(5, 7), (5, 0), (0, 7), (1, 0)], ids=["both", "rows", "columns", "scalar"])
def test_multiplier_gradients_against_finite_differences(r, c):
    """Of L = sum sin(A * W~), whose gradient at W~ is A cos(A W~)."""
    g = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(shape, dtype=torch.float64, generator=g)  # noqa: E731
    W, A = make(5, 7), make(5, 7)
    r, c = make(r) if r else None, make(c) if c else None

    def loss():
        return (A * effective_weight(W, r, c)).sin().sum()

    got = multiplier_gradients(A * (A * effective_weight(W, r, c)).cos(), W, r, c)
    for t, d in zip((W, r, c), got):
        assert (t is None) == (d is None)
        if t is None:
            continue
        assert d.shape == t.shape
        for i in range(t.numel()):
            ends = []
            for h in (1e-6, -2e-6):
                t.view(-1)[i] += h
                ends.append(loss())
            t.view(-1)[i] += 1e-6
            assert d.reshape(-1)[i] == pytest.approx((ends[0] - ends[1]).item() / 2e-6, abs=1e-8)


def test_effective_weight_and_its_scalar_form():
    W = randn(3, 4)
    r, c, s = randn(3, seed=1), randn(4, seed=2), torch.tensor([2.5])
    torch.testing.assert_close(effective_weight(W, r, c), torch.diag(r) @ W @ torch.diag(c))
    assert torch.equal(effective_weight(W, s), 2.5 * W)
    assert torch.equal(effective_weight(W), W)


@pytest.mark.parametrize("piece, placement, kw, expected", [
    ("q", "all", {}, (True, True)), ("up", "all", {}, (True, True)), ("embed", "all", {}, (True, True)),
    ("embed", "all", dict(tied=True), (False, True)), ("embed", "symmetry_free", dict(tied=True), (False, True)),
    ("embed", "symmetry_free", {}, (True, True)), ("q", "symmetry_free", {}, (True, False)),
    ("k", "symmetry_free", {}, (False, False)), ("v", "symmetry_free", {}, (False, False)),
    ("o", "symmetry_free", {}, (True, True)), ("gate", "symmetry_free", {}, (True, False)),
    ("up", "symmetry_free", {}, (False, False)), ("up", "symmetry_free", dict(mlp="relu2"), (False, False)),
    ("up", "symmetry_free", dict(mlp="gelu"), (True, False)), ("down", "symmetry_free", {}, (True, True)),
    ("q", "all", dict(tied=True), (True, True)), ("o", "symmetry_free", dict(tied=True), (True, True)),
    ("head", "symmetry_free", {}, (False, False)), ("x", "symmetry_free", {}, (False, False)),
    ("z", "symmetry_free", {}, (True, False)), ("dt", "symmetry_free", {}, (True, False)),
    ("B", "symmetry_free", {}, (False, False)), ("C", "symmetry_free", {}, (False, False)),
    ("out", "symmetry_free", {}, (True, False)), ("out", "symmetry_free", dict(ssm_norm=False), (True, True))])
def test_placement_of_multipliers_is_that_of_appendix_c(piece, placement, kw, expected):
    assert place_multipliers(piece, placement, **kw) == expected


@pytest.mark.parametrize("mlp, power", [("swiglu", 1), ("relu2", 2)])
def test_of_two_multipliers_that_do_the_same_symmetry_free_keeps_one(mlp, power):
    """Rows of one times t and rows or columns of its partner over t give the same model: so only one of them is kept."""
    model = tiny_model(mlp=mlp, n_kv_head=4, qk_norm=False)
    idx = torch.randint(97, (2, 8), generator=torch.Generator().manual_seed(0))
    before, block = model(idx)[0], model.blocks[1]
    q, k, v = block.mixer.qkv.weight.detach().split(32)
    up, down, o = block.mlp.up.weight.detach()[-block.mlp.down.in_features:], block.mlp.down.weight.detach(), block.mixer.o.weight
    t, per_head = torch.rand(len(up)) + 0.5, (torch.rand(4) + 0.5).repeat_interleave(8)
    for rows, row_piece, partner, partner_piece, side, factor, back in (
            (q, "q", k.T, "k", 0, per_head, per_head), (v, "v", o.detach(), "o", 1, per_head, per_head),
            (up, "up", down, "down", 1, t, t**power)):
        rows *= factor[:, None]
        partner /= back
        torch.testing.assert_close(model(idx)[0], before, rtol=1e-4, atol=1e-4)
        kept = [place_multipliers(row_piece, "symmetry_free", mlp=mlp)[0],
                place_multipliers(partner_piece, "symmetry_free", mlp=mlp)[side]]
        assert kept.count(True) == 1, (row_piece, partner_piece)


def test_the_head_and_gains_have_no_multipliers_and_a_tied_matrix_no_rows():
    names = set(Multipliers(tiny_model()).named())
    assert not any(name.startswith(("head", "norm")) or "norm" in name for name in names)
    assert {"embed.weight:embed.r", "embed.weight:embed.c", "blocks.2.mixer.qkv.weight:v.c"} <= names
    tied = set(Multipliers(tiny_model(tie_embeddings=True)).named())
    assert "embed.weight:embed.r" not in tied and "embed.weight:embed.c" in tied


@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_multipliers_start_and_fold_without_a_change_of_the_model(kind):
    model = tiny_model()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    multipliers = Multipliers(model, kind)
    multipliers.fold()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    for v in multipliers.parameters():
        v.data.uniform_(0.5, 2.0)
    multipliers.fold()
    for name, W in multipliers.W.items():  # by another route: diagonal matrices
        parts = []
        for (_, rows, r, c), w in zip(multipliers.pieces[name], W.split([n for _, n, _, _ in multipliers.pieces[name]])):
            diag_r = torch.diag(r) if r.numel() == rows else r * torch.eye(rows)
            parts.append(diag_r @ w @ (torch.eye(w.shape[1]) if c is None else torch.diag(c)))
        torch.testing.assert_close(model.get_parameter(name), torch.cat(parts))
    again = Multipliers(model, kind)
    assert again.load_state_dict(multipliers.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(multipliers.named().values(), again.named().values()))
    other = Multipliers(model, "scalar" if kind == "vector" else "vector")
    assert not other.load_state_dict(multipliers.state_dict()) and not other.load_state_dict(None)
    assert all((v == 1).all() for v in other.parameters())


def test_the_clip_norm_is_that_of_w_without_the_multipliers():
    model = tiny_model()
    multipliers = Multipliers(model)
    for v in multipliers.parameters():
        v.data.uniform_(0.5, 2.0)
    multipliers.fold()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    expected = sum(p.grad.square().sum() for n, p in model.named_parameters() if n not in multipliers.W)
    for name, W in multipliers.W.items():  # dL/dW = r c G, and W~ = r c W
        expected += (model.get_parameter(name).grad * model.get_parameter(name) / W).square().sum()
    multipliers.split_gradients()
    norm = clip_gradients(clipped_parameters(model, multipliers), 0.0)
    assert norm.item() == pytest.approx(expected.sqrt().item(), rel=1e-4)
    expected += sum(v.grad.square().sum() for v in multipliers.parameters())
    wrong = clip_gradients(clipped_parameters(model, multipliers, clip_multipliers=True), 0.0)
    assert wrong.item() == pytest.approx(expected.sqrt().item(), rel=1e-4) and wrong > 1.01 * norm
    kept = [v.grad.clone() for v in multipliers.parameters()]
    clip_gradients(clipped_parameters(model, multipliers), 0.5)
    assert all(torch.equal(v.grad, k) for v, k in zip(multipliers.parameters(), kept)), "nor are they scaled"


@pytest.mark.parametrize("kind, times", [(None, 1), (None, 4), ("vector", 4), ("scalar", 4)])
@pytest.mark.parametrize("optimizer, low, high", [("adamw", 0.65, 0.72), ("muon", 0.53, 0.73)])
def test_equilibrium_of_noise_and_weight_decay(optimizer, low, high, times, kind):
    """Gradients of W~ that are nothing but N(0, 1): RMS W rises to 0.7 sqrt(lr / wd), whatever they are; r, c move on."""
    model = tiny_model(n_layer=1, n_embd=32, n_kv_head=4, mlp="relu2", vocab_size=60)
    lr, wd, steps = 0.002 * times, 0.1 * times, 2500 // times  # 1 / (2 lr wd) steps forget 63 % of the start's square
    for name, p in model.named_parameters():
        if name.startswith("blocks.") and p.ndim == 2:  # from below the band
            p.data *= (low - 0.03) * math.sqrt(lr / wd) / p.data.square().mean().sqrt()
    multipliers = Multipliers(model, kind, modules=("attention", "mlp")) if kind else None
    optimizers = make_optimizers(model, multipliers, optimizer, lr=lr, weight_decay=wd, embedding_lr=1.0, multiplier_lr=0.01,
                                 **(dict(dtype=torch.float32) if optimizer == "muon" else {}))
    matrices = place_parameters(model)["matrix"]
    W = multipliers.W if multipliers else {n: model.get_parameter(n) for n in matrices}
    g, sums = torch.Generator().manual_seed(0), dict.fromkeys(matrices, 0.0)
    for step in range(steps):
        for name in matrices:
            model.get_parameter(name).grad = torch.randn(W[name].shape, generator=g)
        if multipliers:
            multipliers.split_gradients()
        for o in optimizers:
            o.step()
        if multipliers:
            multipliers.fold()
        if step >= steps - 100:
            for name in matrices:
                sums[name] += W[name].detach().square().mean() / 100
    for name, total in sums.items():
        assert low < total.sqrt() / math.sqrt(lr / wd) < high, name
    if multipliers:
        assert all((v - 1).abs().max() > 0.05 for v in multipliers.parameters())


def test_weight_scales_against_values_by_hand():
    model = tiny_model(n_layer=2, mlp="swiglu", qk_norm=False)
    multipliers = Multipliers(model)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for v in multipliers.parameters():
            v.uniform_(0.5, 2.0, generator=g)
        multipliers.W["blocks.0.mixer.o.weight"] *= torch.linspace(-3, 3, 32).exp()[:, None]
        multipliers.W["blocks.1.mixer.o.weight"] *= 100.0
        multipliers.W["blocks.1.mixer.o.weight"][5] = 0.0
    multipliers.fold()
    got = weight_scales(model, multipliers)
    size = {(i, piece, side): v.square().mean().sqrt().item() for i in range(2) for made in (
        multipliers.pieces[f"blocks.{i}.{n}.weight"] for n in ("mixer.qkv", "mixer.o", "mlp.up", "mlp.down"))
        for piece, _, r, c in made for side, v in (("r", r), ("c", c))}
    for a, b, side in (("q", "k", "r"), ("v", "o", "c"), ("up", "down", "c")):
        drift = sum(math.log(size[i, a, "r"] / size[i, b, side]) for i in range(2)) / 2
        assert got["drift"][f"{a}/{b}"] == pytest.approx(drift, rel=1e-4) and drift != 0
    q = torch.stack([multipliers.W[f"blocks.{i}.mixer.qkv.weight"][:32] for i in range(2)]).detach()
    assert got["weights"]["q"]["rms"] == pytest.approx(q.square().mean().sqrt().item(), rel=1e-5)
    q = torch.stack([model.get_parameter(f"blocks.{i}.mixer.qkv.weight")[:32] for i in range(2)]).detach()
    assert got["weights"]["q"]["rms_effective"] == pytest.approx(q.square().mean().sqrt().item(), rel=1e-5)
    logs = []
    for i in range(2):
        rows = [row.norm().item() for row in model.get_parameter(f"blocks.{i}.mixer.o.weight").detach() if row.any()]
        logs += [math.log(n / (sum(rows) / len(rows))) for n in rows]
    assert len(logs) == 63 and got["weights"]["o"]["spread"] == pytest.approx(torch.tensor(logs).std().item(), rel=1e-4)
    plain = weight_scales(model)
    assert "drift" not in plain and plain["weights"]["q"]["rms"] == pytest.approx(got["weights"]["q"]["rms_effective"])
    relu2 = tiny_model(n_layer=1, mlp="relu2")
    multipliers = Multipliers(relu2)
    dict(zip("rc", multipliers.pieces["blocks.0.mlp.up.weight"][0][2:]))["r"].data.fill_(3.0)
    assert weight_scales(relu2, multipliers)["drift"] == pytest.approx({"v/o": 0.0, "up/down": 2 * math.log(3)})
    assert "up/down" not in weight_scales(tiny_model(mlp="gelu"), Multipliers(tiny_model(mlp="gelu")))["drift"]


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


@pytest.mark.parametrize("where, shape", [("", (4, 4)), ("blocks.0", (2, 2, 3, 4)), ("blocks.1.mlp", ())])
def test_a_parameter_without_a_place_is_refused(where, shape):
    model = tiny_model()
    model.get_submodule(where).odd = torch.nn.Parameter(torch.zeros(shape))
    for place in (place_parameters, make_optimizers):
        with pytest.raises(ValueError, match="odd"):
            place(model)


@pytest.mark.parametrize("mlp, inside", [("swiglu", [("gate", 64), ("up", 64)]), ("gelu", [("up", 128)])])
def test_logical_pieces_are_the_matrices_in_each_weight(mlp, inside):
    model = tiny_model(mlp=mlp)
    pieces = logical_pieces(model)
    for i in range(3):
        assert pieces[f"blocks.{i}.mixer.qkv.weight"] == [("q", 32), ("k", 16), ("v", 16)]
        assert pieces[f"blocks.{i}.mixer.o.weight"] == [("o", 32)]
        assert pieces[f"blocks.{i}.mlp.down.weight"] == [("down", 32)]
        assert pieces[f"blocks.{i}.mlp.up.weight"] == inside
    for name in place_parameters(model)["matrix"]:
        assert sum(rows for _, rows in pieces[name]) == model.get_parameter(name).shape[0]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("optimizer, kinds", [("muon", [Muon, torch.optim.AdamW]), ("adamw", [torch.optim.AdamW])])
def test_optimizers_hold_every_parameter_once_and_decay_matrices_and_head(optimizer, kinds, tied):
    """Without gradients to speak of, a step shows the decay alone."""
    model = tiny_model(tie_embeddings=tied)
    optimizers = make_optimizers(model, optimizer=optimizer, lr=0.1, weight_decay=0.5, embedding_lr=3.0)
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
    muon, adamw = make_optimizers(tiny_model(), lr=0.3, betas=(0.8, 0.7), momentum=0.6, scale="spectral")
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


@pytest.mark.parametrize("shape, table", [
    ("linear", {60: 1, 70: 0.75, 100: 0}), ("sqrt", {4: 0.5, 60: 1, 70: 0.5, 96: 1 - 0.9**0.5, 100: 0}),
    ("exponential", {4: 0.5, 60: 1, 68: 0.5, 76: 0.25, 100: 1 / 32})])
def test_shapes_of_the_decay(shape, table):
    for step, factor in table.items():
        assert wsd(step, 100, 10, 0.4, shape) == pytest.approx(factor, abs=1e-12), step


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
