"""probes.py against definitions, dense matrices, plain loops and values by hand."""
import argparse
import builtins
import dis
import io
import json
import math
import textwrap
import tokenize
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import conftest
import numpy as np
import pytest
import tiktoken
import torch
import torch.nn.functional as F
from conftest import flags_of, random_tokens, tiny_model
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import model as lib
import probes
import teacher
import train as train_module
from model import GPT, IGNORE, BadInput, load_checkpoint

SSM = dict(d_state=8, ssm_head_dim=16)
MIXERS = {"attention": dict(n_kv_head=1), "swiglu": dict(mlp="swiglu", qk_norm=True),
          "mamba2": dict(mixer="mamba2"), "hybrid": dict(mixer="hybrid", n_groups=2),
          "experts": dict(n_experts=3, mlp="gelu")}
KINDS = {"hybrid": dict(SSM, mixer="hybrid"), "experts": dict(n_experts=4),
         "letters": dict(SSM, mixer="MALH", n_layer=4)}


randn = partial(conftest.randn, dtype=torch.float64)


def token_batches(count=8, rows=4, length=24):
    return [random_tokens(rows, length, seed=i) for i in range(count)]


def table_cells(text):
    """The cells of the Markdown tables in a command's output, without rules."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    return [row for row in rows if row and not row[0].startswith("---")]


# Linearity: the score
def r_squared(x, y, x2=None, y2=None):
    """By numpy's least squares with an intercept, on the same rows or on others."""
    x2, y2 = (x, y) if x2 is None else (x2, y2)
    design, design2 = (np.c_[t.numpy(), np.ones(len(t))] for t in (x, x2))
    A = np.linalg.lstsq(design, y.numpy(), rcond=None)[0]
    error = ((design2 @ A - y2.numpy()) ** 2).sum()
    return 1 - error / ((y2.numpy() - y2.numpy().mean(0)) ** 2).sum()


def block(x):
    """Partly linear in x, partly not."""
    return x + 0.5 * (x @ randn(x.shape[1], x.shape[1], seed=5) / x.shape[1] ** 0.5).tanh() + 0.3


@pytest.mark.exercise("linearity_score")
def test_the_scores_are_the_r_squared_of_a_regression_on_the_same_tokens_and_on_others():
    x, x2 = randn(403, 12) @ randn(12, 12, seed=1) + 100, randn(50, 12, seed=1) * 1.3 + 100
    y, y2 = (block(t - 100) + 100 + 0.3 * randn(*t.shape, seed=2) for t in (x, x2))
    d = y - x
    got = probes.linearity((x, y), (x2, y2))
    assert got["rank"] == 12 and got["n"] == 403
    for name, target, target2 in (("full", y, y2), ("free", d, y2 - x2)):
        in_sample = pytest.approx(r_squared(x, target), abs=1e-10)
        assert got[name] == in_sample and probes.linearity_score(x, target) == in_sample
        held_out = r_squared(x, target, x2, target2)
        assert got[f"{name}_held_out"] == pytest.approx(held_out, abs=1e-9)
    assert got["ratio_mean"] == pytest.approx((d.norm(dim=1) / y.norm(dim=1)).mean().item())
    assert got["cosine"] == pytest.approx(F.cosine_similarity(x, y, dim=1).mean().item())


@pytest.mark.exercise("linearity_score")
def test_rank_deficient_and_ill_conditioned_states_are_solved():
    few = randn(200, 256)[torch.randint(200, (4000,), generator=torch.Generator().manual_seed(0))]
    normed = F.layer_norm(randn(500, 10), (10,))
    U, turn = torch.linalg.qr(randn(500, 10)).Q, torch.linalg.qr(randn(10, 10, seed=1)).Q
    spread = U @ torch.diag(torch.logspace(0, -6, 10, dtype=torch.float64)) @ turn
    for x, rank, noise in ((few, 199, 0.1), (normed, 9, 0.1), (spread, 10, 0)):
        y = block(x) + noise * randn(*x.shape, seed=3)
        got = probes.linearity((x, y), (x, y))
        assert got["rank"] == rank and got["full"] == pytest.approx(r_squared(x, y), abs=1e-9)
        assert probes.linearity_score(x, y) == pytest.approx(r_squared(x, y), abs=1e-9)
    few = randn(10, 30), randn(10, 30, seed=1)
    assert probes.linearity(few, few)["full"] == pytest.approx(1.0), "n <= d"


def test_the_profile_reads_the_states_of_each_block_and_can_leave_position_0_out():
    model, batches = tiny_model(n_layer=3), token_batches(6, length=32)
    with torch.no_grad():  # this block adds nothing
        for p in (model.blocks[1].attention.o.weight, model.blocks[1].mlp.down.weight):
            p.zero_()
    for first in (0, 1):
        got = probes.linearity_profile(model, batches, skip_first=first == 1)
        assert [p["block"] for p in got] == [1, 2, 3] and got[1]["full"] == pytest.approx(1.0)
        assert math.isnan(got[1]["free"]) and got[1]["cosine"] == pytest.approx(1.0)
        _, states = model.trunk(torch.cat(batches[::2]), hidden=(0, 1))
        x, y = (h[:, first:].flatten(0, 1).detach().double() for h in states)
        assert got[0]["n"] == 3 * 4 * (32 - first)
        assert got[0]["full"] == pytest.approx(r_squared(x, y), abs=1e-6)


# Linearity: the regularizer
@pytest.mark.exercise("linearity_penalty")
@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_the_penalty_and_its_gradient_are_those_of_the_formula(kind):
    states, same = ([randn(2, 3, 4, seed=i).requires_grad_() for i in range(3)] for _ in range(2))
    terms = []
    for a, b in zip(same, same[1:]):
        terms += [1 - x @ y / x.norm() / y.norm() if kind == "cosine" else (x - y) @ (x - y)
                  for x, y in zip(a.flatten(0, 1), b.flatten(0, 1))]
    expected = sum(terms) / 6
    got = probes.linearity_penalty(states, kind)
    assert got.item() == pytest.approx(expected.item())
    got.backward()
    expected.backward()
    for h, other in zip(states, same):
        torch.testing.assert_close(h.grad, other.grad, rtol=1e-5, atol=1e-6)


def test_the_term_adds_its_weight_times_the_penalty_and_nothing_at_weight_0():
    model, idx = tiny_model(n_layer=3), token_batches(1)[0]
    term, none = probes.Linearity("cosine", 0.5, 3), probes.Linearity("mse", 0.0, 3)
    assert term.hidden == none.hidden == (0, 1, 2, 3)
    x, states = model(idx, hidden=term.hidden)
    p = lib.Pass(model, idx, idx, x, dict(zip(term.hidden, states)), [idx.numel()], 0)
    loss, named = lib.total([term, none], p)
    expected = sum(1 - F.cosine_similarity(a, b, dim=-1).mean() for a, b in zip(states, states[1:]))
    assert loss.item() == pytest.approx(0.5 * expected.item(), rel=1e-5)
    assert named["linearity_loss"].item() == pytest.approx(expected.item(), rel=1e-5)


# Pruning
def test_order_is_by_falling_score():
    rows = [(0.5, 0.9, 0.1), (0.99, 0.2, 0.2), (1.0, math.nan, 1.0), (0.7, 0.5, 0.3)]
    profile = [{"block": k, "full": full, "free": free, "cosine": cosine}
               for k, (full, free, cosine) in enumerate(rows, 1)]
    assert probes.prune_order(profile, "full") == [3, 2, 4, 1]
    assert probes.prune_order(profile, "free") == [3, 1, 4, 2]  # it adds nothing
    assert probes.prune_order(profile, "cosine") == [3, 4, 2, 1]
    orders = {tuple(probes.prune_order(profile, "random", seed=seed)) for seed in range(20)}
    assert len(orders) > 5 and all(sorted(order) == [1, 2, 3, 4] for order in orders)


def ridge_by_lstsq(x, y, ridge):
    """(B, b) of y = x + x B + b by least squares on rows stacked with sqrt(ridge) I."""
    d, mean_x, mean_d = x.shape[1], x.mean(0), (y - x).mean(0)
    xc, dc, zero = x - mean_x, y - x - mean_d, torch.zeros(x.shape[1], x.shape[1]).double()
    root = (ridge * torch.linalg.eigvalsh(xc.mT @ xc)[-1]).sqrt()
    rows = torch.cat((xc, root * torch.eye(d).double())), torch.cat((dc, zero))
    B = zero if math.isinf(ridge) else torch.linalg.lstsq(*rows).solution
    return B, mean_d - mean_x @ B


@pytest.mark.exercise("fit_affine")
@pytest.mark.parametrize("size, noise, most", [(1.0, 0.1, 1.0), (1e-3, 1e-3, 1e-3)])
def test_the_fit_is_ridge_regression_on_the_difference_with_the_ridge_best_on_other_tokens(
        size, noise, most):
    d, n = 60, 80
    mixing = randn(d, d, seed=9) @ torch.diag(torch.logspace(0, -1.5, d, dtype=torch.float64))

    def tokens(n, seed):
        x = size * (randn(n, d, seed=seed) @ mixing + 1)
        error = noise * randn(n, d, seed=seed + 1) * x.std()
        return x, x + 0.03 * x @ randn(d, d, seed=8) / d**0.5 + error - 0.2

    (x, y), other = tokens(n, 20), tokens(n, 30)

    def error_on_others(ridge):
        B, b = ridge_by_lstsq(x, y, ridge)
        return (other[0] + other[0] @ B + b - other[1]).square().sum().item()

    ridge = min((math.inf, *(10.0 ** -j for j in range(13))), key=error_on_others)
    W, b = probes.fit_affine((x, y), other)
    B, bias = ridge_by_lstsq(x, y, ridge)
    torch.testing.assert_close(W, B.mT, atol=1e-8, rtol=1e-6)
    torch.testing.assert_close(b, bias, atol=1e-7, rtol=1e-6)
    assert 1e-12 < ridge <= most


@pytest.mark.parametrize("kind", KINDS)
def test_removing_is_a_loop_over_the_blocks_left_and_replacing_leaves_less_error(kind):
    model, idx = tiny_model(**KINDS[kind]), token_batches(1)[0]
    before, x = model(idx)[0].clone(), model.embed(idx)
    removed = probes.remove_blocks(model, [2])
    replaced = probes.replace_blocks(model, [2], token_batches())
    for k, one in enumerate(model.blocks):
        x = one(x, model.cos[:24], model.sin[:24]) if k != 1 else x
    assert torch.equal(removed.trunk(idx)[0], x)
    assert removed.config.n_layer == len(removed.blocks) == model.config.n_layer - 1
    assert torch.equal(model(idx)[0], before), "the model itself is not touched"
    assert replaced.config.kinds()[1] == "L" and replaced.config.n_layer == model.config.n_layer
    tuned = torch.cat(token_batches()[3::4])  # removal is on the ridge's grid, without b
    _, (x, y) = model.trunk(tuned, hidden=(1, 2))
    _, (z,) = replaced.trunk(tuned, hidden=(2,))
    assert (z - y).square().sum() < (x - y).square().sum()
    for pruned in (removed, replaced):
        found = [lib.generate(pruned, idx, 12, use_cache=use) for use in (True, False)]
        assert torch.equal(*found)


def test_maps_are_fitted_in_depth_order_on_the_output_of_those_before():
    model, parts = tiny_model(n_layer=4).requires_grad_(False), []
    batches = token_batches()
    replaced = probes.replace_blocks(model, [3, 1], batches, skip_first=True)
    assert replaced.config.kinds() == "LALA"
    for idx in (torch.cat(batches[:3] + batches[4:7]), torch.cat(batches[3::4])):
        x = replaced.blocks[0](model.embed(idx), None, None).detach()
        x = model.blocks[1](x, model.cos[:24], model.sin[:24])
        _, (y,) = model.trunk(idx, hidden=(3,))
        parts.append([h[:, 1:].flatten(0, 1).double() for h in (x, y)])
    W, b = probes.fit_affine(*parts)
    affine = replaced.blocks[2].affine
    torch.testing.assert_close(affine.weight.double(), W, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(affine.bias.double(), b, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("everything", [False, True])
def test_distilling_comes_nearer_to_the_whole_model_and_moves_only_what_it_may(everything):
    model = tiny_model(n_layer=4)
    replaced = probes.replace_blocks(model, [2], token_batches())
    before = {k: v.clone() for k, v in replaced.state_dict().items()}
    distilled = probes.distill_states(replaced, model, token_batches(), 30, 3e-3, everything)
    wanted, *found = (m.trunk(torch.cat(token_batches()), hidden=(2, 3, 4))[1]
                      for m in (model, replaced, distilled))
    far, near = (sum(((a - b).norm() / b.norm()).square() for a, b in zip(states, wanted))
                 for states in found)
    assert near < 0.97 * far
    assert all(torch.equal(v, before[k]) for k, v in replaced.state_dict().items()), "a copy moves"
    moved = {k for k, v in distilled.state_dict().items() if not torch.equal(v, before[k])}
    if everything:
        assert {"embed.weight", "blocks.0.attention.o.weight", "blocks.3.mlp.down.weight"} < moved
    else:
        assert moved == {"blocks.1.affine.weight", "blocks.1.affine.bias"}


def test_the_loss_is_the_mean_over_all_tokens_also_of_batches_of_unequal_size():
    model = tiny_model()
    parts = [*torch.cat(token_batches(2, rows=3)).split(4)]
    losses = [F.cross_entropy(model.logits(model(idx)[0])[:, :-1].flatten(0, 1),
                              idx[:, 1:].flatten(), reduction="sum") for idx in parts]
    assert probes.mean_loss(model, parts) == pytest.approx(sum(losses).item() / (6 * 23), rel=1e-5)


@pytest.fixture(scope="module")
def foreign():
    """A GPT-NeoX of transformers, whose architecture is not ours."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return teacher.HFModel(transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(
        vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, initializer_range=0.3)).eval(), 512)


@pytest.fixture
def text(tmp_path, corpus):
    path = tmp_path / "text.txt"
    path.write_text("".join(p.read_text() for p in sorted(corpus.iterdir()))[:12_000])
    return str(path)


@pytest.fixture
def folder(tiny, tmp_path):
    """A run's folder with an untrained checkpoint of three blocks over bytes."""
    path, model, config = tmp_path / "run", tiny_model(vocab_size=257), tiny()
    path.mkdir()
    torch.save({"format": "nanolet-3", "model": model.state_dict(), "step": 0,
                "model_config": vars(model.config), "config": vars(config),
                "tokenizer": train_module.make_tokenizer_for(config, ())}, path / "ckpt.pt")
    return path


@pytest.mark.parametrize("flags, arm, letters", [
    (dict(n_experts=3), "remove", "A"), (dict(n_layer=3), "distill_all", None),
    (dict(SSM, mixer="hybrid", n_layer=3), "distill", None),
    (dict(SSM, mixer="MAM", n_layer=3, param="completep", base_n_embd=16, base_n_layer=1),
     "replace", None)])
def test_a_pruned_checkpoint_is_read_and_trained_on(tiny, text, capsys, flags, arm, letters):
    run = train_module.train(tiny(**flags))
    probes.main(["prune", run["checkpoint"], f"--text={text}", f"--arms={arm}", "--orders", "full",
                 "random", "--distill_steps=3", "--tokens=2000", "--device=cpu"])
    rows = table_cells(capsys.readouterr().out)
    assert [row[:2] for row in rows[1:]] == [["", "whole"], ["full", arm], ["random", arm]]
    pruned = f"{run['out_dir']}/pruned/ckpt.pt"
    made = load_checkpoint(pruned)
    kinds = made["model_config"]["mixer"]
    assert kinds == letters if letters else kinds.count("L") == 1
    assert int(rows[2][4].replace(",", "")) == lib.model_from_checkpoint(made).num_params()
    assert made["pruned"]["arm"] == arm and len(made["pruned"]["blocks"]) == 1
    probes.main(["linearity", pruned, f"--text={text}", "--tokens=500", "--device=cpu"])
    flags = [flag for flag in flags_of(tiny(out_dir="more"))
             if not flag.startswith(("--n_", "--tokenizer"))]  # these are the model's
    more = train_module.train(train_module.parse_flags(
        [*flags, f"--init_from={pruned}", "--tokenizer=teacher"]))
    losses = [line["val_loss"] for line in probes.read_evaluations(more["out_dir"])]
    assert losses[-1] < losses[0] and more["step"] == 10


def test_the_model_saved_is_chosen_on_other_tokens_than_reported(folder, text, capsys, monkeypatch):
    asked, profiled, mean_loss, profile = [], [], probes.mean_loss, probes.linearity_profile

    def rows(batches):
        return {tuple(row) for idx in batches for row in idx.tolist()}

    def loss(model, batches):
        asked.append((model, rows(batches)))
        return mean_loss(model, batches)

    monkeypatch.setattr(probes, "mean_loss", loss)
    monkeypatch.setattr(probes, "linearity_profile", lambda model, batches, skip: (
        profiled.extend(batches), profile(model, batches))[1])
    probes.main(["prune", str(folder), f"--text={text}", "--arms", "remove", "replace",
                 "--orders", "random", "full", "--tokens=2000", "--device=cpu"])
    reported, chosen = asked[0][1], asked[2][1]
    assert [tokens for _, tokens in asked] == [reported] + [reported, chosen] * 4
    assert not reported & chosen and not rows(profiled) & (reported | chosen)
    made = load_checkpoint(folder / "pruned" / "ckpt.pt")
    best = min(asked[2::2], key=lambda one: mean_loss(one[0], [torch.tensor(sorted(chosen))]))[0]
    assert len(table_cells(capsys.readouterr().out)) == 6
    assert made["model_config"]["mixer"] == best.config.mixer
    assert conftest.same(made["model"], best.state_dict())


def test_a_foreign_architecture_is_measured_but_not_pruned(foreign, folder, text, monkeypatch):
    tokenizer = load_checkpoint(folder / "ckpt.pt")["tokenizer"]
    monkeypatch.setattr(teacher, "load_pretrained", lambda *args, **kw: (foreign, tokenizer))
    flags = ["neox", f"--text={text}", "--tokens=2000", "--device=cpu"]
    probes.main(["linearity", *flags])
    with pytest.raises(BadInput, match="neox"):
        probes.main(["prune", *flags])


# How a text is read
def test_every_command_reads_an_end_of_text_token_then_the_text(folder, text, monkeypatch):
    """So does training before each document."""
    whole, seen = [256, *open(text, "rb").read()], []
    trunk = GPT.trunk
    monkeypatch.setattr(GPT, "trunk", lambda self, idx, *args, **kw: (
        seen.extend(idx.tolist()), trunk(self, idx, *args, **kw))[1])
    for command, more in (("linearity", ["--tokens=256"]), ("eval", ["--tokens=64"]),
                          ("curvature", ["--steps=2", "--probes=1", "--tokens=64"]),
                          ("prune", ["--tokens=512", "--arms=remove"])):
        seen.clear()
        probes.main([command, str(folder), f"--text={text}", "--device=cpu", *more])
        first = [row for row in seen if row[0] == 256]
        assert first and all(row == whole[:len(row)] for row in first), command
        assert any(row == whole[32:32 + len(row)] for row in seen), command
    seen.clear()
    probes.main(["linearity", str(folder), f"--text={text}", "--tokens=300", "--characters=20"])
    assert seen == [[256, *whole[1 + 20 * k:21 + 20 * k]] for k in range(15)]


def test_what_is_measured_is_a_table_and_linearity_a_picture_too(
        folder, tmp_path, capsys, text, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(probes, "python_pairs", lambda *args, **kw: [
        probes.Pair("name", "def f(x):\n", "    return x\n", "    return y\n")])
    task = tmp_path / "a.jsonl"
    task.write_text("\n".join(map(json.dumps, handwritten())))

    def cells(command, *words):
        probes.main([command, str(folder), *map(str, words), f"--text={text}", "--device=cpu"])
        return table_cells(capsys.readouterr().out)

    heading, *rows = cells("linearity", "--tokens=2000", f"--plot={tmp_path / 'a.png'}")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "free_held_out" in heading and [row[0] for row in rows] == ["1", "2", "3"]
    _, first, second = cells("curvature", folder / "ckpt.pt", "--tokens=96", "--steps=6")
    assert first[0] == str(folder) and first[1:] == second[1:] and len(first[1].split(",")) == 3
    _, *rows = cells("eval", "--tokens=600", "--task", task, "python", "--items=5")
    assert [row[:2] for row in rows] == [[str(task), "5"], ["python name", "1"]]


# Curvature
def pair(rows=3, seed=1):
    ids = random_tokens(rows, 13, vocab=13, seed=seed)
    return ids[:, :-1], ids[:, 1:]


class Toy(torch.nn.Module):
    """A model of 13 tokens whose logits are not linear in its weights."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Parameter(randn(13, 3))
        self.head = torch.nn.Parameter(randn(3, 13, seed=1))

    def forward(self, idx):
        return self.embed[idx].cumsum(1).tanh(), ()

    def logits(self, x):
        return x @ self.head


@pytest.fixture(scope="module")
def toy():
    """(a model, batches of unequal size, the whole Hessian of the mean loss over their tokens)."""
    model, data = Toy(), [pair(3), pair(2, seed=2)]
    idx, targets = (torch.cat(t) for t in zip(*data))

    def loss(w):
        embed, head = w[:39].view(13, 3), w[39:].view(3, 13)
        logits = embed[idx].cumsum(1).tanh() @ head
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    w = parameters_to_vector(model.parameters()).detach()
    return model, data, torch.autograd.functional.hessian(loss, w)


@pytest.mark.exercise("hessian_product")
def test_the_hessian_product_is_that_of_the_dense_hessian_over_all_batches(toy):
    model, data, H = toy
    product = probes.hessian_product(model, data)
    for seed in (7, 8):
        v = randn(len(H), seed=seed)
        torch.testing.assert_close(product(v), H @ v)


@pytest.mark.parametrize("kind", MIXERS)
def test_the_hessian_product_is_the_difference_of_training_gradients(kind):
    """Of about 400 parameters, none of them 0."""
    sizes = dict(vocab_size=13, block_size=12, n_layer=1, n_embd=4, n_head=2, n_kv_head=2,
                 mlp_hidden=8, tie_embeddings=True, d_state=4, ssm_head_dim=2, chunk_size=5)
    model, data = tiny_model(**{**sizes, **MIXERS[kind]}).double(), [pair(3), pair(2, seed=2)]
    params, (idx, targets) = list(model.parameters()), (torch.cat(t) for t in zip(*data))
    w = parameters_to_vector(params).detach()
    v = F.normalize(randn(len(w)), dim=0)
    got = probes.hessian_product(model, data)(v)

    def gradient(shift):
        vector_to_parameters(w + shift * v, params)
        found = torch.autograd.grad(model.loss(model(idx)[0], targets), params)
        return torch.cat([g.flatten() for g in found])

    eps, close = (1e-2, 1e-2) if kind == "experts" else (1e-5, 1e-7)  # a router is float32
    expected = (gradient(eps) - gradient(-eps)) / (2 * eps)
    assert got.norm() > 1e-2 and (got - expected).norm() < close * expected.norm()


def test_extreme_eigenvalues_trace_and_rms_are_those_of_the_dense_hessian(toy):
    model, data, H = toy
    exact = torch.linalg.eigvalsh(H)
    got = probes.spectrum(model, data, steps=80, probes=1)
    assert got["parameters"] == len(H) and exact[0] < -1e-3 < exact[-1]
    top = torch.tensor(got["top"]).double()
    torch.testing.assert_close(top, exact.flip(0)[:3], rtol=1e-6, atol=0)
    assert got["least"] == pytest.approx(exact[0].item(), rel=1e-6)
    assert got["residual"] < 1e-6 * exact[-1].item()
    got = probes.spectrum(model, data, steps=6, probes=10)
    deviation = (2 / 10 * (H.square().sum() - H.diag().square().sum())).sqrt().item()
    assert got["trace"] == pytest.approx(H.trace().item(), abs=3 * deviation)
    assert deviation < 0.1 * len(H) * got["rms"], "the comparison would mean little"
    assert got["rms"] == pytest.approx((H.square().sum() / len(H)).sqrt().item(), rel=0.2)


@pytest.mark.exercise("lanczos")
def test_lanczos_weights_give_the_moments_of_the_start_vector():
    H = randn(60, 60)
    H = (H + H.mT) / 20
    v, asked = randn(len(H), seed=3), []
    theta, weights, bounds = probes.lanczos(lambda u: (asked.append(u), H @ u)[1], v, 12)
    assert len(asked) == len(theta) == 12 and theta.dtype == torch.float64
    assert (theta.diff() > 0).all()
    for k in range(24):  # Gauss quadrature of 12 nodes is exact up to here
        moment = (v @ torch.linalg.matrix_power(H, k) @ v / (v @ v)).item()
        assert (weights * theta**k).sum().item() == pytest.approx(moment, rel=1e-8), k
    Q = torch.linalg.qr(torch.stack([torch.linalg.matrix_power(H, k) @ v for k in range(12)], 1)).Q
    ritz, S = torch.linalg.eigh(Q.mT @ H @ Q)  # the bound is the norm of the residual
    torch.testing.assert_close(bounds, (H @ Q @ S - Q @ S * ritz).norm(dim=0), rtol=1e-4, atol=1e-9)


@pytest.mark.exercise("lanczos")
def test_lanczos_stops_where_all_is_seen_and_does_not_repeat_what_has_converged():
    e = torch.tensor([3.0, 3.0, 1.0, -2.0, 0.5] + [0.0] * 20, dtype=torch.float64)
    U = torch.linalg.qr(randn(25, 25)).Q
    theta, _, _ = probes.lanczos(lambda u: U @ (e * (U.mT @ u)), randn(25, seed=1), 25)
    distinct = torch.tensor([-2.0, 0.0, 0.5, 1.0, 3.0]).double()
    torch.testing.assert_close(theta, distinct, atol=1e-10, rtol=0)
    spread = torch.logspace(-8, 3, 300, dtype=torch.float64)  # the largest converge in few steps
    theta, _, _ = probes.lanczos(lambda u: spread * u, randn(300), 100)
    assert (theta[-12:] - spread[-12:]).abs().max() < 1e-6


# Evaluation
WORDS = ("the cat sat on a mat and then it ran to see some old red dogs that were not there before "
         "noon").split()


def handwritten() -> list[dict]:
    """18 items of all three forms: contexts of 0 to 20 words, two to four choices."""
    items = []
    for i in range(6):
        endings = [" ".join(WORDS[k:k + n]) for k, n in ((i, 2), (i + 3, 7), (2, 1), (9, i + 1))]
        choices = ["home", "to the red mat", "not there", "nowhere, it sat"][:2 + i % 3]
        context = f"Question {i}: where did the old cat run?\nAnswer:" + "  " * (i % 2)
        items += [{"ctx": " ".join((WORDS * 3)[i:5 * i]), "label": str(i % 4), "endings": endings},
                  {"context": context, "choices": choices, "label": i % 2},
                  {"sentence_good": " ".join(WORDS[i:]), "sentence_bad": " ".join(WORDS[:i:-1])}]
    return items


@pytest.fixture(scope="module")
def enc():
    """Bytes and the beginnings of words, which join words to the blank before them."""
    ranks = {bytes([b]): b for b in range(256)}
    for word in [*WORDS, *(f" {word}" for word in WORDS)]:
        for n in range(2, len(word) + 1):
            ranks.setdefault(word[:n].encode(), len(ranks))
    return tiktoken.Encoding("test", pat_str=train_module.PATTERN, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": len(ranks)})


@torch.no_grad()
def test_scores_and_accuracies_are_those_of_a_loop_over_the_logits(enc, foreign):
    """The boundary between context and choice is found here."""
    task = [*map(probes.read_item, handwritten())]
    expected = [[] for _ in task]
    for totals, (context, choices, _) in zip(expected, task):
        for choice in choices:
            blank = "" if not context or context.endswith(" ") else " "
            n = len(enc.encode_ordinary(context.rstrip(" ")))
            ids = [enc.eot_token] + enc.encode_ordinary(context + blank + choice)
            log_p = foreign.logits(foreign(torch.tensor([ids]))[0])[0].double().log_softmax(-1)
            totals.append(sum(log_p[t - 1, ids[t]].item() for t in range(1 + n, len(ids))))
    got = probes.evaluate_task(foreign, enc, task)
    assert len(task) == got["items"] == 18 and got["cut"] == 0
    for found, totals in zip(got["scores"], expected, strict=True):
        assert found == pytest.approx(totals, rel=1e-5, abs=1e-4)
    labels = [label for _, _, label in task]
    each = [[s / len(c) for s, c in zip(scores, choices)]
            for scores, (_, choices, _) in zip(expected, task)]
    by_sum, by_length = ([int(np.argmax(s)) == label for s, label in zip(scores, labels)]
                         for scores in (expected, each))
    assert by_sum != by_length
    assert got["sum"] == pytest.approx(sum(by_sum) / 18)
    assert got["per_character"] == pytest.approx(sum(by_length) / 18)
    assert got["sum_se"] == pytest.approx(np.std(by_sum, ddof=1) / 18**0.5)
    assert got["chance"] == pytest.approx((6 / 4 + 2 * (1 / 2 + 1 / 3 + 1 / 4) + 6 / 2) / 18)


@pytest.mark.exercise("encode_pair")
def test_the_boundary_between_context_and_choice(enc):
    for context, choice, ours in (("the cat", "sat", " sat"), ("the red cat ", "sat", " sat"),
                                  ("the cat", " sat", " sat"), ("the cat\n", "sat", "\nsat"),
                                  ("", "sat", "sat")):
        ids, start = probes.encode_pair(enc, context, choice)
        assert ids[0] == enc.eot_token and enc.decode(ids[start:]) == ours
        assert enc.decode(ids[1:start]) == context.rstrip()
    one_token = SimpleNamespace(eot_token=9, encode_ordinary=lambda text: [len(text)])
    assert probes.encode_pair(one_token, "the cat", "sat") == ([9, 11], 1), "a choice has a token"


@pytest.mark.exercise("credit")
def test_ties_share_the_point():
    assert probes.credit([-3.0, -4.0, -5.0], 0) == 1 and probes.credit([-3.0, -4.0], 1) == 0
    assert probes.credit([-3.0, -3.0, -5.0, -3.0], 3) == pytest.approx(1 / 3)
    assert probes.credit([-3.0, -3.0, -5.0, -3.0], 2) == 0
    assert probes.credit([-3.0, -2.9999, -5.0], 1) == 1
    assert probes.credit([-3.0, -3.0 + 1e-7], 0) == 0.5, "rounding"
    assert probes.credit([-1000.0, -1000.005], 1) == 0.5 and not probes.credit([-1e3, -1000.015], 1)
    assert probes.credit([0.0, -1.0], 0) == 1


@torch.no_grad()
def test_long_contexts_lose_their_beginning_and_are_counted(enc):
    model, text = tiny_model(vocab_size=512, block_size=16), " ".join(WORDS)
    task = [(text, ["home", "there"], 0), ("the cat", ["sat", "ran"], 1)]
    got = probes.evaluate_task(model, enc, task)
    assert (got["items"], got["cut"]) == (2, 1)
    for k, choice in enumerate(task[0][1]):
        ids = enc.encode_ordinary(f"{text} {choice}")[-17:]
        n = len(enc.encode_ordinary(f" {choice}"))
        log_p = model.logits(model(torch.tensor([ids[:-1]]))[0])[0].log_softmax(-1)
        expected = sum(log_p[t, ids[t + 1]].item() for t in range(16 - n, 16))
        assert got["scores"][0][k] == pytest.approx(expected, rel=1e-5)
    recurrent = tiny_model(vocab_size=512, block_size=16, mixer="mamba2", ssm_head_dim=16)
    got = probes.evaluate_task(recurrent, enc, task)
    assert (got["items"], got["cut"]) == (2, 0), "no longest context"


@pytest.mark.exercise("evaluate_text")
@pytest.mark.parametrize("stride", [8, 3, 1])
@pytest.mark.parametrize("length", [5, 9, 26])
def test_perplexity_reads_every_token_once_with_the_context_of_its_window(
        length, stride, monkeypatch):
    """Here token i has a loss of i / 10 nats. A window ends at a multiple of the stride."""
    read, ids = [], [*range(length)]

    def log_likelihoods(model, windows, at_once):
        assert at_once == 64 * 301
        scored = [[(t, token) for t, token in enumerate(targets) if token != IGNORE]
                  for _, targets in windows]
        read.extend((inputs[:t + 1], token) for (inputs, _), found in zip(windows, scored)
                    for t, token in found)
        return [(-sum(token for _, token in found) / 10, len(found)) for found in scored]

    monkeypatch.setattr(probes, "log_likelihoods", log_likelihoods)
    model = SimpleNamespace(config=SimpleNamespace(block_size=8, vocab_size=301))
    got = probes.evaluate_text(model, ids, 40, stride, 64)
    ends = [min(-(-t // stride) * stride, length - 1) for t in ids]
    assert read == [(ids[max(0, ends[t] - 8):t], t) for t in ids[1:]]
    nats = length / 20  # the mean of 1 to length - 1, over 10
    assert got == pytest.approx({"nats": nats, "perplexity": math.exp(nats), "bits_per_byte":
                                 nats * (length - 1) / math.log(2) / 40})


# Scale of the weights
def test_weight_scales_are_root_mean_squares_by_piece_expert_by_expert():
    model = tiny_model(n_layer=2, n_experts=3, tie_embeddings=True)
    W = {name: 2 * p.detach() for name, p in model.named_parameters() if "qkv" in name}
    got = probes.weight_scales(model, SimpleNamespace(W=W))
    assert {*got} == {"embed", "q", "k", "v", "o", "router", "up", "down"}  # no tied head
    q, up = [b.attention.qkv.weight[:32] for b in model.blocks], [b.mlp.up for b in model.blocks]
    for piece, parts, factor in (("q", torch.stack(q), 2), ("up", torch.cat(up), 1)):
        squares = (parts.detach().double().numpy() ** 2).mean(2)  # of each matrix and row
        rms, sizes = np.sqrt(squares.mean()), np.sqrt(squares)
        spread = np.log(sizes / sizes.mean(1, keepdims=True)).std(ddof=1)
        assert got[piece]["rms_effective"] == pytest.approx(rms, rel=1e-5)
        assert got[piece]["rms"] == pytest.approx(factor * rms, rel=1e-5)
        assert got[piece]["spread"] == pytest.approx(spread, rel=1e-4)


# Tables and plots over runs
def write_run(folder, losses, seconds_per_step=2.0, **more):
    folder.mkdir(parents=True)
    lines = [{"step": 10 * i, "tokens": 1, "flops": 1000 * i, "seconds": 10 * i * seconds_per_step,
              "val_loss": loss, "bits_per_byte": loss / 2, **more} for i, loss in enumerate(losses)]
    lines.append({"step": 1, "tokens": 1, "flops": 1, "seconds": 1})  # of a step, not evaluated
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    return str(folder)


def test_compare_finds_where_a_run_reaches_the_reference_and_which_did_not_finish(
        tmp_path, capsys):
    """By hand: the plain runs end at 3.0 and 4.0 after 30 steps. let-0 passes 3.0 half-way from
    step 10 (3.5) to 20 (2.5), at step 15 of 30, 50 %; let-1 reaches 4.0 at step 20, 66.7 %. A step
    of theirs takes 1.5 times as long. wild-0 ends before its last step."""
    runs = [write_run(tmp_path / name, losses, seconds) for name, losses, seconds in (
        ("plain-0", [8, 5, 4, 3], 2), ("plain-1", [8, 6, 5, 4], 2), ("let-0", [8, 3.5, 2.5, 2], 3),
        ("let-1", [8, 5, 4, 3.5], 3), ("worse-1", [8, 7, 6, 5], 2), ("early-0", [3, 3.5, 2], 2),
        ("wild-0", [8, 5, 4, 3], 2))]
    for name, steps in (("plain", 30), ("wild", 40)):
        (tmp_path / f"{name}-0" / "config.json").write_text(json.dumps({"steps": steps}))
    with open(tmp_path / "plain-0" / "metrics.jsonl", "a") as file:
        file.write('{"step": 20, "val_l')  # a line cut short by a kill is left out
    probes.main(["compare", *runs])
    _, plain, let, worse, early, wild = table_cells(capsys.readouterr().out)
    assert let == ["let", "2", "2.7500 ± 1.0607", "-0.7500 ± 0.3536", "1.3750 ± 0.5303",
                   "2", "58.3 ± 11.8", "58.3 ± 11.8", "87.5 ± 17.7"]
    assert plain[6:] == ["100.0 ± 0.0"] * 3 and worse[5:] == ["0", "", "", ""]
    assert early[5:] == ["1", "0.0", "0.0", "0.0"], "it begins below the reference"
    assert wild[2] == "did not finish" and wild[5] == "0"
    probes.main(["compare", runs[-1], runs[0]])
    _, wild, plain = table_cells(capsys.readouterr().out)
    assert plain[2] == "3.0000" and plain[3] == "did not finish" and plain[5] == "0"
    probes.main(["compare", write_run(tmp_path / "free-0", [8, 3], 0, flops=0, step=0)])
    _, free = table_cells(capsys.readouterr().out)
    assert free[5:] == ["1", "", "", ""], "no share of 0 steps, FLOPs or seconds"


def test_runs_of_every_kind_are_drawn(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes
    drawn = []
    monkeypatch.setattr(Axes, "plot", lambda self, *args, **kw: drawn.append(kw.get("label")))
    monkeypatch.setattr(Axes, "legend", lambda self, **kw: None)
    scales = {"head": {"rms": 1.0, "rms_effective": 2.0, "spread": None}}
    runs = [write_run(tmp_path / name, [3, 2], **more) for name, more in (
        ("a-0", {}), ("a-1", {}), ("3", {"let_cosine": 0.5}), ("b-0", {"weights": scales}))]
    probes.main(["plot", *runs, f"--plot={tmp_path / 'p.png'}"])
    assert drawn == ["a 0", "a 1", "3 ", "b 0"] * 8  # losses, cosine, three scales
    assert (tmp_path / "p.png").exists()


# Minimal pairs from Python files
DOCUMENTS = [Path(module.__file__).read_text() for module in (argparse, textwrap, dis, tokenize)]


def globals_read(text: str) -> set[str] | None:
    """By the bytecode: names that the text reads as globals. None if it does not compile."""
    try:
        codes = [compile(text, "text", "exec", dont_inherit=True)]
    except SyntaxError:
        return None
    for code in codes:
        codes += [const for const in code.co_consts if hasattr(const, "co_code")]
    return {i.argval for code in codes for i in dis.get_instructions(code)
            if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")} - {*dir(builtins)}


@pytest.fixture(scope="module")
def pairs():
    return probes.python_pairs(DOCUMENTS, 0, 50)


def test_the_right_side_parses_and_the_wrong_one_breaks_the_rule_of_its_kind_by_one_token(pairs):
    for kind, context, right, wrong in pairs:
        before, after = globals_read(context + right), globals_read(context + wrong)
        assert before is not None and context.endswith("\n") and wrong != right
        document = next(document for document in DOCUMENTS if context + right in document)
        assert (after is not None) == (kind == "name")
        if kind == "name":
            (new,) = after - before
            tokens = (tokenize.generate_tokens(io.StringIO(side.lstrip()).readline)
                      for side in (right, wrong))
            assert new not in document
            assert sum(a.string != b.string for a, b in zip(*tokens, strict=True)) == 1
        elif kind == "indent":
            assert right.lstrip() == wrong.lstrip()
        elif kind == "bracket":  # an unbalanced line has no tokens
            assert sum(a != b for a, b in zip(right, wrong, strict=True)) == 1


def test_kinds_are_equally_many_and_a_seed_gives_the_same_pairs(pairs):
    counts = [sum(kind == one for one, *_ in pairs) for kind in probes.PYTHON_KINDS]
    assert max(counts) == 10 and min(counts) >= 6
    assert pairs == probes.python_pairs(DOCUMENTS, 0, 50) != probes.python_pairs(DOCUMENTS, 1, 50)
    equal = probes.python_pairs(DOCUMENTS, 0, 40, length=lambda text: len(text.split(" ")))
    assert len(equal) >= 30
    assert all(right.count(" ") == wrong.count(" ") for _, _, right, wrong in equal)


# What bad input is answered with
NUMBERS = {"linearity": "tokens characters", "curvature": "tokens steps probes",
           "prune": "tokens distill_steps distill_lr blocks",
           "eval": "items tokens stride batch_tokens"}
REFUSED = """
    prune run --text=text.txt --blocks=3 > --blocks=3 run
    prune run --text=text.txt --arms remove cut > --arms cut
    prune run --text=text.txt --tokens=100 > --text=text.txt --tokens=100
    prune run --text=text.txt --out_dir=run > --out_dir=run
    prune run --text= > --text=
    eval run > --text
    eval run --text=text.txt --stride=33 > --stride=33
    curvature run --text=text.txt --tokens=9 > --text=text.txt --tokens=9
    plot let-0 --plot=x.txt > --plot=x.txt
    linearity run --text=text.txt --plot=x.txt > --plot=x.txt
    linearity run --text=text.txt --characters=9999 > --text=text.txt --characters=9999
    linearity run --text=text.txt --characters=40 --tokens=79 > --tokens=79 --characters=40
    plot let-0 --plot=nowhere/x.png > --plot=nowhere
    compare plain-0 let-1 > let-1
    compare plain-0 x/plain-0 > x/plain-0
"""  # command lines, and what the message must name
LINE = '{"step": 1, "tokens": 1, "flops": %s, "seconds": 1, "val_loss": 1, "bits_per_byte": %s}'
SPOILT = [  # a file, its contents, and what the message must name beside it
    *(("let-0/metrics.jsonl", text, "") for text in (
        "", '{"step": 1}', '{"val_loss": 1}', LINE % ("null", 1), LINE % (1, '""'))),
    *(("let-0/config.json", text, "") for text in ("{", "[]", '{"steps": "x"}')),
    ("task", "", ""), ("task", '{"ctx": "a", "label": 1}', "endings"),
    ("task", '{"ctx": "a", "endings": ["b", "c"], "label": 2}', "label"),
    ("task", '{"ctx": "a", "endings": ["b", "c"], "label": ""}', "line 1"),
    ("task", '{"ctx": "a", "endings": ["b"], "label": 0}', "choices"),
    ("task", '{"ctx": "a", "endings": ["b", " "], "label": 0}', "choice"),
    ("task", '{"context": "a", "choices": "bc", "label": 0}', "choices"),
    ("task", '{"context": 1, "choices": ["b", "c"], "label": 0}', "texts")]


def test_values_that_cannot_be_are_refused_by_flag_file_and_value(folder, text, refused, tmp_path):
    for name in ("plain-0", "let-0", "let-1", "x/plain-0"):
        write_run(tmp_path / name, [8, 5])
    for line in REFUSED.strip().splitlines():
        words, named = line.split(" > ")
        said = refused(probes.main, *words.split())
        assert all(word in said for word in named.split()), line
    for command, names in NUMBERS.items():
        for name in names.split():
            for value in ("x", "", "nan", "-1e300", "1e999", "1" * 5000):
                assert f"--{name}" in refused(probes.main, command, "none.pt", f"--{name}={value}")
        for flag in ("--device=tpu", "--odd=1"):
            assert flag in refused(probes.main, command, "run", "--text=text.txt", flag)


@pytest.mark.parametrize("file, content, named", SPOILT)
def test_a_file_of_other_contents_is_refused_by_name(
        file, content, named, folder, refused, tmp_path):
    runs = [write_run(tmp_path / name, [8, 5]) for name in ("plain-0", "let-0")]
    (tmp_path / file).write_text(content)
    words = ["eval", folder, "--task=task"] if file == "task" else ["compare", *runs]
    said = refused(probes.main, *words)
    assert file in said and named in said


def test_a_file_of_another_kind_is_refused_by_name(folder, text, refused, wrong_files, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for file in wrong_files:
        assert file in refused(probes.main, "eval", folder, f"--task={file}")
        for command in ("compare", "plot"):
            assert file in refused(probes.main, command, file)
        for command in NUMBERS:
            assert file in refused(probes.main, command, file, f"--text={text}")
            if file != "deep" and (command != "eval" or file not in ("text", "null")):  # texts
                assert file in refused(probes.main, command, folder, f"--text={file}")
