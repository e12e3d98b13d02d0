"""LET's rivals: every divergence and its gradient against autograd through the plain formula, runs against plain runs."""
import json
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, flags_of, run_python, tiny_model
from test_train import same, state, stop_at
from torch.utils._python_dispatch import TorchDispatchMode

import train as t
from model import IGNORE, BadInput, generate, linear_cross_entropy, load_checkpoint, model_from_checkpoint
from teacher import (RECIPES, Recipe, Rival, divergence, init_from_teacher, linear_distillation, make_recipe,
                     spaced_blocks, with_rest_bucket)

torch.set_num_threads(1)
METHODS = sorted(RECIPES.keys() - {"step_by_step"})  # those that ask a model


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_tokens(*shape, n=97, seed=1):
    return torch.randint(n, shape, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------------------------------------
# The divergences


def plain_divergence(P, Q, beta):
    """As GKD writes it, over probabilities, with the exact KLs at the ends. P, Q: (n, V) -> (n,)."""
    def kl(a, b):
        return (a * (a / b).log()).sum(-1)
    if beta in (0, 1):
        return kl(P, Q) if beta == 0 else kl(Q, P)
    M = beta * P + (1 - beta) * Q
    return beta * kl(P, M) + (1 - beta) * kl(Q, M)


@pytest.mark.parametrize("beta, expected, digits", [(0, 0.184, 3), (0.5, 0.046, 3), (1, 0.192, 3)])
def test_values_of_the_three_token_example(beta, expected, digits):
    P, Q = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.4, 0.4, 0.2]])
    assert round(divergence(P.log(), Q.log(), beta)[0].item(), digits) == expected
    small = divergence(P.double().log(), Q.double().log(), 0.01)[0].item() / 0.01
    assert small == pytest.approx(0.182, abs=5e-4), "near forward KL, once divided by beta"


@pytest.mark.parametrize("beta", [0, 0.01, 0.3, 0.5, 0.9, 1])
@pytest.mark.parametrize("V", [5, 40])
def test_divergence_and_its_gradient_equal_autograd(beta, V):
    v, z = 2 * randn(7, V), (2 * randn(7, V, seed=1)).requires_grad_()
    expected = plain_divergence(v.softmax(-1), z.softmax(-1), beta)
    d, dz = divergence(v.log_softmax(-1), z.detach().log_softmax(-1), beta)
    torch.testing.assert_close(d, expected.detach())
    torch.testing.assert_close(dz, torch.autograd.grad(expected.sum(), z)[0])


@pytest.mark.parametrize("beta", [0, 0.3, 1])
def test_a_student_like_its_teacher_has_no_loss_and_no_gradient(beta):
    log_p = (3 * randn(6, 30)).log_softmax(-1)
    for p in (log_p, with_rest_bucket(log_p, log_p, 4)):
        d, dz = divergence(p, log_p.clone(), beta)
        assert d.abs().max() < 1e-12 and dz.abs().max() < 1e-12


@pytest.mark.parametrize("beta", [0, 0.5, 1])
def test_top_k_is_the_divergence_of_k_tokens_and_any_other(beta):
    v, z = 2 * randn(5, 20), (2 * randn(5, 20, seed=1)).requires_grad_()
    P, Q, buckets = v.softmax(-1), z.softmax(-1), []
    for row in range(5):
        top = sorted(range(20), key=lambda i: -v[row, i])[:3]
        rest = [i for i in range(20) if i not in top]
        buckets.append([torch.cat((h[row, top], h[row, rest].sum()[None])) for h in (P, Q)])
    expected = plain_divergence(*(torch.stack(h) for h in zip(*buckets)), beta)
    log_q = z.detach().log_softmax(-1)
    d, dz = divergence(with_rest_bucket(v.log_softmax(-1), log_q, 3), log_q, beta)
    torch.testing.assert_close(d, expected.detach())
    torch.testing.assert_close(dz, torch.autograd.grad(expected.sum(), z)[0])


# ----------------------------------------------------------------------------------------------------------------------
# The loss in one pass over the logits


def plain_loss(x, weight, targets, x_T, head_T, vocab_size, r, tau_squared=True, bias_T=0.0):
    """(loss, nll, soft, agreement) with all logits at once, and nothing left to the code under test."""
    z, v = (x @ weight.T)[:, :vocab_size], x_T @ head_T.T + bias_T
    V, counted = min(z.shape[1], v.shape[1]), targets != IGNORE
    P, Q = (v[:, :V] / r.temperature).softmax(-1), (z[:, :V] / r.temperature).softmax(-1)
    soft = plain_divergence(P, Q, r.beta)[counted].mean() * (r.temperature**2 if tau_squared else 1)
    nll = F.cross_entropy(z, targets, ignore_index=IGNORE)
    agreement = (z[:, :V].argmax(-1) == v[:, :V].argmax(-1))[counted].double().mean()
    return r.hard_weight * nll + r.weight * soft, nll, soft, agreement


def problem(N=11, C=6, C_T=4, V=20, V_pad=24, V_T=20):
    """Rows past V are no tokens; two targets do not count."""
    targets = random_tokens(N, n=V)
    targets[2] = targets[7] = IGNORE
    return (randn(N, C).requires_grad_(), randn(V_pad, C, seed=1).requires_grad_(), targets, randn(N, C_T, seed=2),
            randn(V_T, C_T, seed=3), V)


@pytest.mark.parametrize("recipe, tau_squared", [
    (Recipe(0.5, 0.5), True), (Recipe(0.9, 0.1, temperature=2.0), True), (Recipe(5.0, 2.0, temperature=4.0), True),
    (Recipe(0.5, 0.5, beta=1.0), True), (Recipe(1.0, 0.0, temperature=0.9, beta=0.5), False), (Recipe(0.0, 1.0), True)])
@pytest.mark.parametrize("V_T", [20, 17, 32], ids=lambda v: f"teacher of {v}")
@pytest.mark.parametrize("chunk", [4, 100])
def test_loss_and_gradients_equal_autograd_through_the_plain_formula(recipe, tau_squared, V_T, chunk):
    x, weight, targets, x_T, head_T, V = problem(V_T=V_T)
    values = linear_distillation(x, weight, targets, x_T, head_T, V, recipe, tau_squared, chunk=chunk)
    expected = plain_loss(x, weight, targets, x_T, head_T, V, recipe, tau_squared)
    for value, plain in zip(values, expected):
        assert value.shape == () and value.item() == pytest.approx(plain.item(), rel=1e-9)
    assert [v.requires_grad for v in values] == [True, False, False, False]
    for mine, plain in zip(torch.autograd.grad(3 * values[0], (x, weight)), torch.autograd.grad(3 * expected[0], (x, weight))):
        torch.testing.assert_close(mine, plain)
    assert linear_distillation(x.detach(), weight.detach(), targets, x_T, head_T, V, recipe, tau_squared)[0].item() == \
        pytest.approx(expected[0].item(), rel=1e-9), "without gradients too"


def test_a_teachers_bias_counts_and_a_constant_on_all_its_logits_does_not():
    x, weight, targets, x_T, head_T, V = problem(V_T=26)
    bias = randn(26, seed=5)
    r = Recipe(0.5, 0.5)
    values = [linear_distillation(x, weight, targets, x_T, head_T, V, r, bias_T=b)[0].item() for b in (bias, bias + 7.0, None)]
    expected = plain_loss(x, weight, targets, x_T, head_T, V, r, bias_T=bias)[0].item()
    assert values[0] == pytest.approx(expected, rel=1e-9) == values[1] and abs(values[2] - expected) > 1e-3


def test_top_k_in_one_pass_equals_the_pieces():
    x, weight, targets, x_T, head_T, V = problem()
    got = linear_distillation(x, weight, targets, x_T, head_T, V, Recipe(1.0, 0.0, beta=1.0), top_k=3, chunk=4)
    log_p, log_q = (x_T @ head_T.T).log_softmax(-1), (x @ weight.T)[:, :V].log_softmax(-1)
    expected = divergence(with_rest_bucket(log_p, log_q, 3), log_q.detach(), 1.0)[0][targets != IGNORE].mean()
    assert got[0].item() == pytest.approx(expected.item(), rel=1e-9)
    whole = [linear_distillation(x, weight, targets, x_T, head_T, V, Recipe(1.0, 0.0), top_k=k)[0] for k in (0, 20, 50)]
    assert whole[0] == whole[1] == whole[2], "k of all tokens keeps all"


def test_padding_at_the_end_changes_nothing():
    x, weight, targets, x_T, head_T, V = problem()
    r = Recipe(0.7, 0.3, temperature=2.0, beta=0.5)
    short = linear_distillation(x, weight, targets, x_T, head_T, V, r)
    x_long = torch.cat((x, randn(9, 6, seed=8).requires_grad_())).detach().requires_grad_()
    long = linear_distillation(x_long, weight, F.pad(targets, (0, 9), value=IGNORE), torch.cat((x_T, randn(9, 4, seed=9))),
                               head_T, V, r, chunk=5)
    for a, b in zip(short, long):
        assert a.item() == pytest.approx(b.item(), rel=1e-12)
    dx, = torch.autograd.grad(long[0], x_long)
    torch.testing.assert_close(dx[:11], torch.autograd.grad(short[0], x)[0])
    assert not dx[11:].any() and not dx[2].any() and not dx[7].any(), "what is not counted has no gradient"


def test_tau_squared_keeps_the_gradients_level():
    """tau^2 |gradient| at tau = 20 and 100 within 5 %, for logits of standard deviation 3; and its limit (z - v) / V."""
    V = 1000
    z, v = 3 * randn(8, V), 3 * randn(8, V, seed=1)
    z, v = z - z.mean(-1, keepdim=True), v - v.mean(-1, keepdim=True)
    eye, targets, gradients = torch.eye(V, dtype=torch.float64), random_tokens(8, n=V), {}
    for tau in (1, 20, 100):
        x = z.clone().requires_grad_()
        loss = linear_distillation(x, eye, targets, v, eye, V, Recipe(1.0, 0.0, temperature=tau))[0]
        gradients[tau] = 8 * torch.autograd.grad(loss, x)[0]  # of each row
    norms = {tau: g.norm(dim=-1).mean().item() for tau, g in gradients.items()}
    assert norms[20] == pytest.approx(norms[100], rel=0.05) and norms[1] > 3 * norms[100]
    limit = (z - v) / V
    assert (gradients[100] - limit).norm() < 0.06 * limit.norm()


def test_logits_never_exist_whole():
    """No tensor larger than the matrices themselves or a chunk of logits is ever made."""
    N, V, chunk = 640, 1000, 32
    x, weight = randn(N, 8).requires_grad_(), randn(V, 8, seed=1).requires_grad_()
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max([largest] + [o.numel() for o in (out if isinstance(out, (tuple, list)) else (out,))
                                       if isinstance(o, torch.Tensor)])
            return out

    with Watch():
        loss = linear_distillation(x, weight, random_tokens(N, n=V), randn(N, 4), randn(V, 4), V,
                                   Recipe(0.5, 0.5, temperature=2.0, beta=0.5), top_k=10, chunk=chunk)[0]
        loss.backward()
    assert largest == chunk * V


def test_under_autocast_the_softmax_is_taken_in_float32():
    x, weight, targets, x_T, head_T, V = problem(N=64, C=32, C_T=16, V=60, V_pad=64, V_T=60)
    low = [h.detach().bfloat16() for h in (x, weight, x_T, head_T)]
    r = Recipe(0.5, 0.5, temperature=2.0)
    z, v = (low[0].float() @ low[1].float().T).bfloat16().double()[:, :V], (low[2].float() @ low[3].float().T).bfloat16().double()
    eye = torch.eye(V, dtype=torch.float64)
    expected = plain_loss(z, eye, targets, v, eye, V, r)
    x, weight = x.detach().float().requires_grad_(), weight.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        values = linear_distillation(x, weight, targets, x_T.float(), head_T.float(), V, r)
    values[0].backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32
    for value, plain in zip(values, expected):
        assert value.dtype == torch.float32 and value.item() == pytest.approx(plain.item(), rel=1e-5)


def test_with_no_soft_weight_it_is_the_plain_loss():
    x, weight, targets, x_T, head_T, V = problem()
    a = linear_distillation(x, weight, targets, x_T, head_T, V, Recipe(0.0, 1.0), chunk=4)[0]
    b = linear_cross_entropy(x, weight, targets, V, chunk=4)
    assert a.item() == b.item()
    for mine, plain in zip(torch.autograd.grad(a, (x, weight)), torch.autograd.grad(b, (x, weight))):
        torch.testing.assert_close(mine, plain, rtol=1e-12, atol=1e-15)


# ----------------------------------------------------------------------------------------------------------------------
# Recipes and Rival


def test_recipes_are_the_papers():
    assert RECIPES["distilbert"].__dict__ == Recipe(5.0, 2.0, 1.0, 2.0).__dict__
    assert (RECIPES["gkd"].beta, RECIPES["gkd"].temperature, RECIPES["gkd"].on_policy) == (0.5, 0.9, 0.5)
    assert RECIPES["salt"].stop == pytest.approx(36 / 209, abs=0.005) and RECIPES["reverse_kl"].beta == 1


@pytest.mark.parametrize("method, given, weights", [
    ("rkd", {}, (0.5, 0.5, 0)), ("kd", {"weight": 0.7}, (0.7, 0.3, 0)), ("gkd", {}, (1, 0, 0)),
    ("distilbert", {}, (5, 2, 1)), ("distilbert", {"weight": 0.0}, (0, 1, 0)),  # plain
    ("distilbert", {"weight": 0.0, "cosine_weight": 1.0}, (0, 2, 1)),  # the paper's ablation without the soft term
    ("kd", {"weight": 2.0, "hard_weight": 0.5, "temperature": -1}, (2, 0.5, 0))])
def test_recipe_from_flags(method, given, weights):
    r = make_recipe(method, given)
    assert (r.weight, r.hard_weight, r.cosine_weight) == pytest.approx(weights)
    assert r.temperature == RECIPES[method].temperature


@pytest.mark.parametrize("method", METHODS)
def test_rival_equals_the_plain_formula_and_teaches_the_student_only(method):
    student, teacher = tiny_model(n_layer=2), tiny_model(seed=5, n_embd=24, n_head=2, n_kv_head=1)
    idx, targets = random_tokens(2, 13)[:, :-1], random_tokens(2, 13)[:, 1:].clone()
    targets[1, 5:] = IGNORE  # the second is shorter
    r = make_recipe(method, {})
    rival = Rival(teacher, method, r)
    x, _ = student(idx, head=False)
    x_T = rival.teach(idx)
    loss, nll, soft, cosine, agreement = rival.loss(x, student.head.weight, targets, x_T, 97)
    assert not x_T.requires_grad
    loss.backward()
    mine = {n: p.grad.clone() for n, p in student.named_parameters()}
    assert all(p.grad is None for p in teacher.parameters())

    student.zero_grad()
    z, v, counted = student(idx)[0].flatten(0, 1), teacher(idx)[0].detach().flatten(0, 1), targets.flatten() != IGNORE
    eye = torch.eye(97)
    expected = plain_loss(z, eye, targets.flatten(), v, eye, 97, r, method != "gkd")
    total = expected[0]
    if method == "distilbert":
        h_M = student.norm(student.trunk(idx)[0]).flatten(0, 1)[counted]
        h_T = F.interpolate(teacher.norm(teacher.trunk(idx)[0]).detach().flatten(0, 1)[counted, None], size=32, mode="linear")
        cos = F.cosine_similarity(h_M, h_T[:, 0], dim=-1).mean()
        assert cosine.item() == pytest.approx(cos.item(), abs=1e-5)
        total = total + 1.0 * (1 - cos)
    for value, plain in zip((loss, nll, soft, agreement), (total, *expected[1:])):
        assert value.item() == pytest.approx(plain.item(), rel=1e-4, abs=1e-6)
    total.backward()
    for name, p in student.named_parameters():
        torch.testing.assert_close(mine[name], p.grad, rtol=1e-3, atol=1e-5)


def test_a_student_that_is_its_teacher():
    model, idx = tiny_model(), random_tokens(2, 12)
    rival = Rival(model, "distilbert", make_recipe("distilbert", {"hard_weight": 0.0}))
    x, _ = model(idx, head=False)
    loss, _, soft, cosine, agreement = rival.loss(x, model.head.weight, idx, rival.teach(idx), 97)
    assert abs(soft.item()) < 1e-5 and cosine.item() == pytest.approx(1.0, abs=1e-5) and agreement == 1
    loss.backward()
    assert max(p.grad.abs().max() for p in model.parameters()) < 1e-4


def test_continuations_are_the_students_own_and_only_they_count():
    student, rival = tiny_model(), Rival(tiny_model(seed=5), "gkd", make_recipe("gkd", {}), new_tokens=5, seed=3)
    rows = random_tokens(3, 21)
    idx, targets = rival.continued(student, rows[:, :-1], rows[:, 1:], place=8)
    assert idx.shape == targets.shape == (3, 20)
    whole = torch.cat((idx, targets[:, -1:]), 1)
    assert torch.equal(whole[:, :16], rows[:, :16]) and not torch.equal(whole[:, 16:], rows[:, 16:])
    assert (targets[:, :15] == IGNORE).all() and torch.equal(targets[:, 15:], whole[:, 16:])
    again, other = (rival.continued(student, rows[:, :-1], rows[:, 1:], place=p)[0] for p in (8, 9))
    assert torch.equal(idx, again) and not torch.equal(idx, other)
    # As likely as the student's own distribution makes them: greedy in the limit of a low temperature
    rival.recipe.temperature = 1e-4
    greedy = rival.continued(student, rows[:, :-1], rows[:, 1:], place=8)[1]
    assert torch.equal(greedy[:, 15:], generate(student, rows[:, :16], 5, temperature=0)[:, 16:])
    assert rival.continued(student, rows[:, :4], rows[:, 1:5], place=0)[0].shape == (3, 4), "never the whole sequence"


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_share_of_on_policy_steps(share):
    rival = Rival(None, "gkd", make_recipe("gkd", {"on_policy": share}), seed=7)
    drawn = [rival.on_policy(step) for step in range(2000)]
    assert sum(drawn) / 2000 == pytest.approx(share, abs=0.04)
    assert drawn == [rival.on_policy(step) for step in range(2000)]


# ----------------------------------------------------------------------------------------------------------------------
# A student that begins as its teacher's blocks


def test_spaced_blocks_are_distilberts():
    assert spaced_blocks(12, 6) == [0, 2, 4, 7, 9, 11]
    assert spaced_blocks(5, 5) == [0, 1, 2, 3, 4] and spaced_blocks(4, 2) == [0, 3] and spaced_blocks(4, 1) == [0]


@pytest.mark.parametrize("flags", [{}, dict(tie_embeddings=True), dict(n_experts=4), dict(layer_pattern="AMAHA", ssm_head_dim=16)])
def test_init_from_teacher(flags):
    teacher = tiny_model(seed=5, n_layer=5, **flags)
    short = dict(flags, layer_pattern="AAA") if "layer_pattern" in flags else flags
    student, same = tiny_model(n_layer=3, block_size=16, **short), tiny_model(n_layer=5, **flags)
    for s in (student, same):
        init_from_teacher(s, teacher)
    idx = random_tokens(2, 12)
    assert torch.equal(same(idx)[0], teacher(idx)[0]), "as deep: the teacher itself"
    for mine, theirs in zip(student.blocks, (0, 2, 4)):
        for a, b in zip(mine.parameters(), teacher.blocks[theirs].parameters(), strict=True):
            assert torch.equal(a, b) and a.data_ptr() != b.data_ptr()
    for part in ("embed", "norm", "head"):
        assert torch.equal(getattr(student, part).weight, getattr(teacher, part).weight)
    assert (student.head.weight is student.embed.weight) == flags.get("tie_embeddings", False)


@pytest.mark.parametrize("student, words", [
    (dict(n_embd=16, n_head=2), "n_embd 32 there, 16 here"), (dict(n_layer=6), "5 blocks there, 6 here"),
    (dict(tie_embeddings=True), "tie_embeddings"), (dict(layer_pattern="AMA", ssm_head_dim=64), "kinds AAA, the student's AMA")])
def test_a_teacher_of_another_shape_is_no_beginning(student, words):
    with pytest.raises(BadInput, match=f"--init_from_teacher.*{words}"):
        init_from_teacher(tiny_model(**student), tiny_model(n_layer=5))


# ----------------------------------------------------------------------------------------------------------------------
# Runs


def lines(history, *keys):
    return {(h["step"], k): h[k] for h in history for k in keys or ("train_loss", "val_loss", "grad_norm") if k in h}


@pytest.fixture(scope="module")
def taught(corpus, tmp_path_factory):
    """The checkpoint of a teacher: 3 blocks of width 32, a little trained."""
    return t.train(t.Config(
        data=str(corpus), tokenizer="bytes", block_size=32, batch_tokens=256, micro_batch=8, eval_tokens=64, n_layer=3,
        n_embd=32, n_head=2, steps=30, warmup_steps=2, log_every=99, seed=9, dtype="fp32", device="cpu", sample_tokens=0,
        out_dir=str(tmp_path_factory.mktemp("taught"))))["checkpoint"]


def short(tiny, **flags):
    return tiny(**{**dict(steps=4, eval_every=4, eval_tokens=64, save_every=4), **flags})


@pytest.mark.parametrize("method", METHODS)
def test_weight_0_is_bitwise_plain_training(tiny, tmp_path, taught, method):
    plain = t.train(short(tiny, out_dir=str(tmp_path / "plain")))
    mine = t.train(short(tiny, teacher=taught, distill=method, distill_weight=0.0))
    assert lines(plain["history"]) == lines(mine["history"]) and plain["flops"] == mine["flops"]
    a, b = (load_checkpoint(r["checkpoint"])["model"] for r in (plain, mine))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("method", ["kd", "gkd"])
def test_first_step_is_the_formula(tiny, taught, method):
    """The logged values of a run's first step, from the parts: the student as it begins, the batch, the teacher."""
    c = short(tiny, teacher=taught, distill=method, distill_on_policy=0.0, micro_batch=8, clip=0.0, steps=1, warmup_steps=0)
    first = next(h for h in t.train(c)["history"] if "train_loss" in h)
    data = t.load_data(c)
    idx, targets = data.train.batch(t.block_numbers(c.seed, 0, 8, len(data.train)))
    torch.manual_seed(c.seed)
    student, teacher = t.GPT(t.model_config(c, 257)), model_from_checkpoint(load_checkpoint(taught))
    eye = torch.eye(257)
    loss, nll, soft, agreement = plain_loss(student(idx)[0].flatten(0, 1), eye, targets.flatten(), teacher(idx)[0].detach().
                                            flatten(0, 1), eye, 257, t.recipe_of(c), method != "gkd")
    loss.backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in student.parameters()))
    assert first["train_loss"] == pytest.approx(nll.item(), rel=1e-5)
    assert first["distill_loss"] == pytest.approx(soft.item(), rel=1e-4)
    assert first["distill_weight"] == {"kd": 0.9, "gkd": 1.0}[method]
    assert first["teacher_agreement"] == pytest.approx(agreement.item(), abs=1 / 256)
    assert first["grad_norm"] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_salt_after_its_switch_is_bitwise_plain_and_lets_its_teacher_go(tiny, tmp_path, taught, monkeypatch, optimizer):
    calls, real = [], Rival.teach

    def counting(self, idx):
        calls.append(weakref.ref(self.teacher))
        return real(self, idx)

    monkeypatch.setattr(Rival, "teach", counting)
    flags = dict(optimizer=optimizer, steps=8, eval_tokens=64, save_every=4)
    salt = t.train(tiny(**flags, teacher=taught, distill="salt", distill_stop=0.5))
    assert len(calls) == 4 * 2, "once a micro-batch, in the first half"
    assert calls[0]() is None, "nobody keeps it afterwards"
    assert {h["step"] for h in salt["history"] if "distill_loss" in h} == {1, 2, 3, 4}
    # The state at the switch, from a run of the same length stopped there; then on without any teacher.
    stopped = stop_at(tiny(**flags, teacher=taught, distill="salt", distill_stop=0.5, out_dir=str(tmp_path / "stopped")), 4)
    plain = t.train(tiny(**flags, resume=stopped, out_dir=str(tmp_path / "plain")))
    assert same(state(salt["checkpoint"]), state(plain["checkpoint"]))
    after = {k: v for k, v in lines(salt["history"]).items() if k[0] > 4}
    assert after and after.items() <= lines(plain["history"]).items()


@pytest.mark.parametrize("flags", [
    dict(distill="gkd", distill_new_tokens=8), dict(distill="distilbert", multipliers="vector", optimizer="adamw"),
    dict(distill="reverse_kl", distill_on_policy=0.5, n_experts=4, mlp="swiglu", linearity="cosine", distill_top_k=20, distill_new_tokens=3),
    dict(distill="kd", mixer="mamba2", expand=2, ssm_head_dim=16, optimizer="adamw", tie_embeddings=True)],
    ids=["gkd", "multipliers", "experts and linearity", "mamba2"])
def test_a_run_stopped_and_resumed_is_bitwise_the_whole_run(tiny, tmp_path, taught, flags):
    flags = dict(flags, teacher=taught, steps=6, eval_every=6, eval_tokens=64, save_every=3)
    whole = t.train(tiny(**flags, out_dir=str(tmp_path / "whole")))
    stopped = stop_at(tiny(**flags, out_dir=str(tmp_path / "halved")), 3)
    rest = t.train(t.parse_flags([f"--resume={stopped}"]))
    assert same(state(whole["checkpoint"]), state(rest["checkpoint"]))
    assert lines(whole["history"], "train_loss", "distill_loss") == lines(rest["history"], "train_loss", "distill_loss")
    assert whole["val_loss"] < 5.45, "it learns: ln 257 is 5.55"
    if "distill_on_policy" in flags:
        assert {h["on_policy"] for h in whole["history"] if "train_loss" in h} == {True, False}


def test_ranks_reach_the_same_losses(tiny, tmp_path, taught):
    flags = dict(teacher=taught, distill="gkd", distill_cosine_weight=0.5, distill_new_tokens=4, distill_on_policy=0.16,
                 micro_batch=2, steps=3, eval_tokens=128)
    one = t.train(tiny(**flags, out_dir=str(tmp_path / "one")))
    c = tiny(**flags, out_dir=str(tmp_path / "two"))
    done = run_python(ROOT / "train.py", *flags_of(c), ranks=2)
    assert done.returncode == 0, done.stderr
    two = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    keys = "train_loss", "val_loss", "distill_loss", "teacher_agreement", "distill_cosine", "on_policy"
    a, b = lines(one["history"], *keys), lines(two, *keys)
    assert a.keys() == b.keys() and {v for k, v in a.items() if k[1] == "on_policy"} == {True, False}
    assert max(abs(a[k] - b[k]) for k in a) < 1e-4


def test_the_teachers_flops_are_counted_with_its_head_and_so_is_sampling(tiny, tmp_path, taught):
    T, tokens = 32, 256
    matrices = 3 * (32 * 96 + 32 * 32 + 2 * 32 * 128)  # of the teacher: qkv, o, MLP
    forward = 2 * (matrices + 320 * 32) + 3 * 4 * T * 32  # 320: V_pad
    plain = t.train(short(tiny, out_dir=str(tmp_path / "plain")))["flops"]
    salt = t.train(short(tiny, teacher=taught, distill="salt", distill_stop=3.0, out_dir=str(tmp_path / "salt")))
    assert salt["flops"] - plain == 3 * tokens * forward
    gkd = t.train(short(tiny, teacher=taught, distill="gkd", distill_on_policy=1.0, out_dir=str(tmp_path / "gkd")))
    assert gkd["flops"] - plain == 4 * tokens * forward + plain // 3, "sampling is a forward pass"


def test_a_decay_keeps_the_trunks_distill_stop(tiny, tmp_path, taught):
    flags = dict(teacher=taught, distill="salt", distill_stop=0.2, decay_fraction=0.5, eval_tokens=64)
    trunk = stop_at(tiny(**flags, steps=40, out_dir=str(tmp_path / "trunk")), 5)
    history = t.train(t.parse_flags([f"--resume={trunk}", "--decay_now", f"--out_dir={tmp_path}/branch"]))["history"]
    assert {h["step"] for h in history if "distill_loss" in h} == {6, 7, 8}


@pytest.mark.parametrize("flags", [dict(distill="kd", distill_weight=0.0), dict(distill="distilbert"), dict(let_weight=0.0)])
def test_a_student_begins_better_than_chance_as_its_teachers_blocks(tiny, taught, flags):
    flags |= dict(multipliers="vector", steps=1, warmup_steps=0, let_student_layer=2) if "let_weight" in flags else {}
    history = t.train(short(tiny, teacher=taught, init_from_teacher=True, **flags))["history"]
    ours, theirs = history[0]["val_loss"], load_checkpoint(taught)["best_val_loss"]
    assert theirs < ours < 5.0 < math.log(257)
    assert ("distill_loss" in history[1]) == (flags.get("distill") == "distilbert")


def test_resuming_does_not_begin_from_the_teacher_again(tiny, tmp_path, taught):
    flags = dict(teacher=taught, distill="kd", distill_weight=0.0, init_from_teacher=True, steps=4, eval_tokens=64, save_every=2)
    whole = t.train(tiny(**flags, out_dir=str(tmp_path / "whole")))
    rest = t.train(t.parse_flags([f"--resume={stop_at(tiny(**flags, out_dir=str(tmp_path / 'halved')), 2)}"]))
    assert same(state(whole["checkpoint"]), state(rest["checkpoint"]))


def test_a_dry_run_counts_the_teacher(tiny, taught, capsys):
    totals = []
    for flags in ({}, dict(teacher=taught, distill="kd"), dict(teacher="auto", distill="kd")):
        t.train(tiny(**flags, dry_run=True))
        totals.append(float(capsys.readouterr().out.split("per token, ")[-1].split(" in all")[0]))
    assert totals[0] < totals[2] < totals[1]


@pytest.mark.parametrize("changes", [dict(distill_weight=-0.5), dict(distill_weight=2.0), dict(distill_beta=1.5),
                                     dict(distill_temperature=0.0), dict(distill_stop=1.5), dict(distill_new_tokens=0),
                                     dict(distill_new_tokens=5), dict(distill_top_k=-1), dict(distill_on_policy=2.0), dict(let_weight=0.2)])
def test_settings_that_make_no_sense_are_refused(tiny, taught, changes):
    name, value = next(iter(changes.items()))
    with pytest.raises(BadInput, match=f"--{name}={value}"):
        t.check(tiny(teacher=taught, distill="kd", **changes))


@pytest.mark.parametrize("flags, words", [
    (dict(distill="kd"), "--distill=kd --teacher=none"), (dict(distill_weight=0.5, teacher="x.pt"), "--distill_weight=0.5.*LET's rivals"),
    (dict(init_from_teacher=True), "--init_from_teacher=True --teacher=none"),
    (dict(distill="kd", teacher="x.pt", distill_weight=0.0, distill_hard_weight=0.5), "training is plain")])
def test_settings_that_contradict_each_other_are_refused(tiny, flags, words):
    with pytest.raises(BadInput, match=words):
        t.check(tiny(**flags))


# ----------------------------------------------------------------------------------------------------------------------
# Step by step: records of input, rationale and label


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    path = tmp_path_factory.mktemp("records") / "sums.jsonl"
    path.write_text("".join(json.dumps({"input": f"{a}+{b}?", "rationale": f"{a} and {b} make {a + b}", "label": str(a + b)})
                            + "\n" for a in range(7) for b in range(7)))
    return path


def stepwise(tiny, records, **flags):
    return tiny(**{**dict(data=str(records), distill="step_by_step", block_size=48, batch_tokens=8 * 48, eval_tokens=480), **flags})


def test_records_become_pairs_of_sequences_of_which_the_answers_count(tiny, records):
    data = t.load_data(stepwise(tiny, records))
    enc, end = t.tokenizer_from_dict(data.tokenizer), 256
    assert len(data.train) == 44 and len(data.val) == 5 and (data.train.rows, data.val.rows) == (2, 1)
    seen = set()
    for part, prefixes in ((data.train, ["[label] ", "[rationale] "]), (data.val, ["[label] "])):
        idx, targets = part.batch(range(len(part)))
        assert idx.shape == targets.shape == (len(prefixes) * len(part), 48)
        for row, (inputs, wanted) in enumerate(zip(idx.tolist(), targets.tolist())):
            counted = [i for i, token in enumerate(wanted) if token != IGNORE]
            assert counted == list(range(counted[0], counted[-1] + 1)) and inputs[0] == end == wanted[counted[-1]]
            assert all(inputs[i + 1] == wanted[i] for i in counted[:-1]), "shifted by one"
            question, answer = enc.decode(inputs[1:counted[0] + 1]), enc.decode([wanted[i] for i in counted[:-1]])
            prefix = prefixes[row % len(prefixes)]
            assert question.startswith(prefix) and question.endswith("?\n")
            a, b = map(int, question.removeprefix(prefix)[:-2].split("+"))
            assert answer == (str(a + b) if prefix == "[label] " else f"{a} and {b} make {a + b}")
            seen.add((a, b))
    assert len(seen) == 49


def test_each_answer_is_averaged_over_its_own_tokens(tiny, records):
    c = stepwise(tiny, records, distill_weight=0.3, steps=1, warmup_steps=0, clip=0.0, micro_batch=8)
    first = next(h for h in t.train(c)["history"] if "train_loss" in h)
    data = t.load_data(c)
    idx, targets = data.train.batch(t.block_numbers(c.seed, 0, 4, len(data.train)))
    torch.manual_seed(c.seed)
    student = t.GPT(t.model_config(c, 257))
    losses = []
    for task in (0, 1):  # a pass for each, as the paper's code has it
        logits, wanted = student(idx[task::2])[0].flatten(0, 1), targets[task::2].flatten()
        counted = [i for i, target in enumerate(wanted.tolist()) if target != IGNORE]
        losses.append(-sum(logits[i].log_softmax(-1)[wanted[i]] for i in counted) / len(counted))
    (0.7 * losses[0] + 0.3 * losses[1]).backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in student.parameters()))
    assert first["train_loss"] == pytest.approx(losses[0].item(), rel=1e-5), "of the labels"
    assert first["rationale_loss"] == pytest.approx(losses[1].item(), rel=1e-5) and first["distill_weight"] == 0.3
    assert first["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_without_weight_there_are_only_labels_and_training_is_plain(tiny, records):
    c = stepwise(tiny, records, distill_weight=0.0, steps=3)
    data = t.load_data(c)
    rows = [bytes(i for i in row if i < 256) for row in data.train.batch(range(len(data.train)))[0].tolist()]
    assert data.train.rows == 1 and all(row.startswith(b"[label] ") for row in rows)
    assert not any("rationale_loss" in h for h in t.train(c)["history"])


def test_a_student_learns_step_by_step_and_from_its_teachers_weights(tiny, records, tmp_path):
    first = t.train(stepwise(tiny, records, steps=30, eval_every=30, lr=0.02, out_dir=str(tmp_path / "first")))
    values = [h["val_loss"] for h in first["history"] if "val_loss" in h]
    assert values[-1] < 0.6 * values[0]
    second = t.train(stepwise(tiny, records, steps=1, warmup_steps=0, teacher=first["checkpoint"], init_from_teacher=True,
                              tokenizer="teacher"))
    assert second["history"][0]["val_loss"] == pytest.approx(first["val_loss"], rel=1e-6)


@pytest.mark.parametrize("line, words", [
    ("{", "line 2 is no record"), ('{"input": "a", "label": "b"}', "line 2 is no record.*'rationale'"), ("[1]", "line 2"),
    ('{"input": "a", "label": "b", "rationale": ""}', "line 2.*an empty text"), (None, "1 records"),
    ('{"input": "a", "label": 3, "rationale": "c"}', "line 2"),
    (json.dumps({"input": "a" * 99, "label": "b", "rationale": "c"}), "--block_size=48: line 2 needs 114 tokens")])
def test_bad_records_are_refused(tiny, tmp_path, line, words):
    path = tmp_path / "r.jsonl"
    path.write_text('{"input": "a", "label": "b", "rationale": "c"}\n' + (line or ""))
    with pytest.raises(BadInput, match=f"--data=.*r.jsonl.*{words}"):
        t.train(stepwise(tiny, path))


@pytest.mark.parametrize("flags, words", [
    (dict(distill_beta=0.5), "--distill_beta=0.5"), (dict(micro_batch=3, batch_tokens=6 * 48), "--micro_batch=3.*a pair"),
    (dict(batch_tokens=3 * 48, micro_batch=3), "--batch_tokens=144.*a pair"), (dict(teacher="auto"), "--teacher=auto"),
    (dict(distill_weight=1.5), "--distill_weight=1.5"), (dict(distill="let", label_prefix="x"), "--label_prefix=x")])
def test_settings_that_step_by_step_cannot_use_are_refused(tiny, records, flags, words):
    with pytest.raises(BadInput, match=words):
        t.check(stepwise(tiny, records, **flags))
