"""probes.py against definitions, dense matrices, plain loops and values by hand."""
import argparse
import builtins
import dis
import io
import json
import math
import textwrap
import tokenize
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, run_python, tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel

import probes
import train as train_module
from model import GPT, BadInput, Pass, generate, load_checkpoint, model_from_checkpoint, total
from probes import (
    PYTHON_KINDS,
    Linearity,
    Moments,
    compare,
    density,
    distil,
    encode_pair,
    evaluate_task,
    evaluate_text,
    fit_affine,
    hessian_product,
    lanczos,
    linearity,
    linearity_penalty,
    linearity_profile,
    linearity_score,
    mean_loss,
    prune_order,
    python_pairs,
    remove_blocks,
    replace_blocks,
    spectrum,
    stream_scales,
    weight_scales,
)

torch.set_num_threads(1)
SSM = dict(d_state=8, ssm_head_dim=16)
KINDS = {"attention": {}, "mamba2": dict(SSM, mixer="mamba2"), "hybrid": dict(SSM, mixer="hybrid"),
         "letters": dict(SSM, mixer="MALH", n_layer=4), "experts": dict(n_experts=4)}


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def token_batches(count=8, rows=4, length=24):
    return [torch.randint(97, (rows, length), generator=torch.Generator().manual_seed(i))
            for i in range(count)]


def table_cells(text):
    """The cells of the Markdown tables in a command's output, without rules."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    return [row for row in rows if row and not row[0].startswith("---")]


# --------------------------------------------------------------------------------------------------
# Linearity: the score


def moments(x, y, parts=1):
    made = Moments(x.shape[1])
    for a, b in zip(x.chunk(parts), y.chunk(parts)):
        made.add(a, b)
    return made


def score(x, y, x2=None, y2=None, parts=1):
    other = moments(x if x2 is None else x2, y if y2 is None else y2)
    return linearity(moments(x, y, parts), other)


def r_squared(x, y, x2=None, y2=None):
    """By numpy's least squares with an intercept, on the same rows or on others."""
    x2, y2 = (x, y) if x2 is None else (x2, y2)
    design, design2 = (np.c_[t.numpy(), np.ones(len(t))] for t in (x, x2))
    A = np.linalg.lstsq(design, y.numpy(), rcond=None)[0]
    error = ((design2 @ A - y2.numpy()) ** 2).sum()
    return 1 - error / ((y2.numpy() - y2.numpy().mean(0)) ** 2).sum()


def block(x, strength=0.5, seed=5):
    """Partly linear in x, partly not."""
    d = x.shape[1]
    return x + strength * (x @ randn(d, d, seed=seed) / d**0.5).tanh() + 0.3


def test_the_plain_score_and_the_streaming_one_are_the_r_squared_of_a_regression():
    x = randn(403, 12) @ randn(12, 12, seed=1) + 100
    y = block(x - 100) + 100
    for parts in (1, 7):
        got = score(x, y, parts=parts)
        assert got["rank"] == 12 and got["n"] == 403
        for name, target in (("full", y), ("free", y - x)):
            assert got[name] == pytest.approx(r_squared(x, target), abs=1e-10)
            assert linearity_score(x, target) == pytest.approx(r_squared(x, target), abs=1e-10)


def test_full_and_free_are_tied_by_the_centred_ratio():
    x = randn(300, 8) + 3
    y = block(x, 0.2)
    got, d = score(x, y), y - x
    assert 1 - got["full"] == pytest.approx((1 - got["free"]) * got["ratio"] ** 2, rel=1e-9)
    assert got["ratio"] == pytest.approx(((d - d.mean(0)).norm() / (y - y.mean(0)).norm()).item())
    assert got["ratio_mean"] == pytest.approx((d.norm(dim=1) / y.norm(dim=1)).mean().item())
    assert got["cosine"] == pytest.approx(F.cosine_similarity(x, y, dim=1).mean().item())


def test_the_score_ignores_a_map_of_x_and_a_rotation_of_y_and_is_not_symmetric():
    x = randn(200, 6)
    y = block(x, 3.0).square()
    base, turn = linearity_score(x, y), torch.linalg.qr(randn(6, 6, seed=2)).Q
    stretch = torch.diag(torch.tensor([9.0, 1, 1, 1, 1, 1], dtype=torch.float64))
    assert linearity_score(x @ randn(6, 6, seed=3) + 7, y) == pytest.approx(base, abs=1e-9)
    assert linearity_score(x, 4 * y @ turn - 2) == pytest.approx(base, abs=1e-9)
    assert abs(linearity_score(x, y @ stretch) - base) > 1e-3
    assert abs(linearity_score(y, x) - base) > 1e-4


@pytest.mark.parametrize("per_dimension", [2, 3.66, 20])
def test_in_sample_scores_are_inflated_by_rank_over_tokens_and_adjusted_are_not(per_dimension):
    """True R^2 0.5: 0.5 + 0.5 rank / (n - 1) in sample, less than 0.5 on other tokens."""
    d, A = 40, randn(40, 40, seed=7) / 40**0.5
    n, got = round(per_dimension * d), []
    for seed in range(12):
        x, x2 = randn(n, d, seed=seed), randn(500, d, seed=seed + 100)
        y, y2 = (t @ A + randn(len(t), d, seed=seed + 50) for t in (x, x2))
        got.append(score(x, y, x2, y2))
    means = {k: np.mean([g[k] for g in got]) for k in ("full", "full_adjusted", "full_held_out")}
    assert means["full"] == pytest.approx(0.5 + 0.5 * d / (n - 1), abs=0.01)
    assert means["full_adjusted"] == pytest.approx(0.5, abs=0.02) and means["full_held_out"] < 0.49


def test_held_out_scores_are_of_the_fitted_map_on_other_tokens():
    x, x2 = randn(60, 7) + 2, randn(50, 7, seed=1) * 1.3 + 1
    y, y2 = block(x) + 0.3 * randn(60, 7, seed=2), block(x2) + 0.3 * randn(50, 7, seed=3)
    got = score(x, y, x2, y2)
    assert got["full_held_out"] == pytest.approx(r_squared(x, y, x2, y2), abs=1e-9)
    assert got["free_held_out"] == pytest.approx(r_squared(x, y - x, x2, y2 - x2), abs=1e-9)


def projected(x, y, rank):
    """||U^T Y||^2 / ||Y||^2 with an orthonormal basis U of the column space of X."""
    U, yc = torch.linalg.svd(x - x.mean(0), full_matrices=False).U[:, :rank], y - y.mean(0)
    return ((U.mT @ yc).norm() / yc.norm()).item() ** 2


def test_rank_deficient_and_ill_conditioned_states_are_solved():
    few = randn(200, 256)[torch.randint(200, (4000,), generator=torch.Generator().manual_seed(0))]
    normed = F.layer_norm(randn(500, 10), (10,))
    U, turn = torch.linalg.qr(randn(500, 10)).Q, torch.linalg.qr(randn(10, 10, seed=1)).Q
    spread = U @ torch.diag(torch.logspace(0, -6, 10, dtype=torch.float64)) @ turn
    for x, rank, noise in ((few, 199, 0.1), (normed, 9, 0.1), (spread, 10, 0)):
        y = block(x) + noise * randn(*x.shape, seed=3)
        got = score(x, y)
        assert got["rank"] == rank
        assert got["full"] == pytest.approx(projected(x, y, rank), abs=1e-9)
        assert linearity_score(x, y) == pytest.approx(projected(x, y, rank), abs=1e-9)
    assert score(randn(10, 30), randn(10, 30, seed=1))["full"] == pytest.approx(1.0), "n <= d"


def test_a_block_that_adds_nothing_has_no_residual_free_score():
    x = randn(100, 5) + 1e3
    got = score(x, x.clone())
    assert math.isnan(got["free"]) and got["full"] == got["cosine"] == pytest.approx(1.0)


def test_the_profile_reads_the_states_of_each_block_and_can_leave_position_0_out():
    model, batches = tiny_model(n_layer=3), token_batches(6, length=32)
    with torch.no_grad():  # this block adds nothing
        for p in (model.blocks[1].mixer.o.weight, model.blocks[1].mlp.down.weight):
            p.zero_()
    profile = linearity_profile(model, batches)
    assert [p["block"] for p in profile] == [1, 2, 3] and profile[1]["full"] == pytest.approx(1.0)
    for first, got in ((0, profile), (1, linearity_profile(model, batches, skip_first=True))):
        states = [torch.cat([model.trunk(idx, hidden=(k,))[1][0] for idx in batches[::2]]).detach()
                  for k in (0, 1)]
        x, y = (h[:, first:].flatten(0, 1).double() for h in states)
        assert got[0]["n"] == 3 * 4 * (32 - first)
        assert got[0]["full"] == pytest.approx(r_squared(x, y), abs=1e-6)


# --------------------------------------------------------------------------------------------------
# Linearity: the regulariser


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_the_penalty_is_the_formula(kind, reduction):
    states, terms = [randn(2, 3, 5, seed=i) for i in range(4)], []
    for a, b in zip(states, states[1:]):
        tokens = [*zip(a.flatten(0, 1), b.flatten(0, 1))]
        terms.append(sum(1 - x @ y / x.norm() / y.norm() if kind == "cosine" else (x - y) @ (x - y)
                         for x, y in tokens) / 6)
    expected = sum(terms) / (3 if reduction == "mean" else 1)
    assert linearity_penalty(states, kind, reduction).item() == pytest.approx(expected.item())
    scales, (_, h1, h2, h3) = stream_scales(states), states
    cosine = F.cosine_similarity(h1, h2, dim=-1).mean().item()
    assert scales["cosine"][1] == pytest.approx(cosine, rel=1e-5)
    assert scales["norm"][2] == pytest.approx(h3.norm(dim=-1).mean().item(), rel=1e-5)
    ratio = ((h2 - h1).norm(dim=-1) / h2.norm(dim=-1)).mean().item()
    assert scales["ratio"][1] == pytest.approx(ratio, rel=1e-5)


@pytest.mark.parametrize("kind", ["cosine", "mse"])
@pytest.mark.parametrize("stop, free", [("none", {0, 1, 2}), ("lower", {1, 2}), ("upper", {0, 1})])
def test_the_penalty_stops_the_gradient_where_it_is_told(stop, free, kind):
    states, same = ([randn(2, 3, 4, seed=i).requires_grad_() for i in range(3)] for _ in range(2))
    linearity_penalty(states, kind, stop_gradient=stop).backward()
    assert {i for i, h in enumerate(states) if h.grad is not None and h.grad.any()} == free
    for a, b in zip(same, same[1:]):
        a, b = a.detach() if stop == "lower" else a, b.detach() if stop == "upper" else b
        each = 1 - F.cosine_similarity(a, b, dim=-1) if kind == "cosine" else ((a - b) ** 2).sum(-1)
        each.mean().backward()
    for i in free:
        torch.testing.assert_close(states[i].grad, same[i].grad, rtol=1e-5, atol=1e-6)


def test_the_term_adds_its_weight_times_the_penalty_and_is_over_at_weight_0():
    model, idx = tiny_model(n_layer=3), token_batches(1)[0]
    term, none = Linearity("cosine", 0.5, 3, first=1), Linearity("mse", 0.0, 3)
    assert term.hidden == (1, 2, 3) and none.hidden == (0, 1, 2, 3)
    assert none.over(0) and not term.over(10**9)
    x, states = model(idx, hidden=term.hidden)
    p = Pass(model, idx, idx, x, dict(zip(term.hidden, states)), [idx.numel()], 0)
    loss, named = total([term, none], 0, p)
    expected = sum(1 - F.cosine_similarity(a, b, dim=-1).mean() for a, b in zip(states, states[1:]))
    assert loss.item() == pytest.approx(0.5 * expected.item(), rel=1e-5)
    assert named["linearity_loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    cosines = [F.cosine_similarity(a, b, dim=-1).mean().item() for a, b in zip(states, states[1:])]
    assert term.logged(0)["stream"]["cosine"] == pytest.approx(cosines, rel=1e-5)


# --------------------------------------------------------------------------------------------------
# Pruning


def test_order_is_by_falling_score_and_respects_protection():
    rows = [(0.5, 0.9, 0.1), (0.99, 0.2, 0.2), (1.0, math.nan, 1.0), (0.7, 0.5, 0.3)]
    profile = [{"block": k, "full": full, "free": free, "cosine": cosine}
               for k, (full, free, cosine) in enumerate(rows, 1)]
    assert prune_order(profile, "full") == [3, 2, 4, 1]
    assert prune_order(profile, "free") == [3, 1, 4, 2], "a block that adds nothing goes first"
    assert prune_order(profile, "cosine", protect=[3, 4]) == [2, 1]
    orders = {tuple(prune_order(profile, "random", seed=seed)) for seed in range(20)}
    assert len(orders) > 5 and all(sorted(order) == [1, 2, 3, 4] for order in orders)


def ridge_by_lstsq(x, y, ridge):
    """(B, b) of y = x + x B + b by least squares on rows stacked with sqrt(ridge) I."""
    d, mean_x, mean_d = x.shape[1], x.mean(0), (y - x).mean(0)
    xc, dc, zero = x - mean_x, y - x - mean_d, torch.zeros(x.shape[1], x.shape[1]).double()
    root = (ridge * torch.linalg.eigvalsh(xc.mT @ xc)[-1]).sqrt()
    rows = torch.cat((xc, root * torch.eye(d).double())), torch.cat((dc, zero))
    B = zero if math.isinf(ridge) else torch.linalg.lstsq(*rows).solution
    return B, mean_d - mean_x @ B


def test_the_fit_is_ridge_regression_on_the_difference_with_the_ridge_best_on_other_tokens():
    """With few tokens, n = 1.33 d, least squares is worse on new tokens than leaving the block out;
    a ridge on A - I is not."""
    d, n = 60, 80
    mixing = randn(d, d, seed=9) @ torch.diag(torch.logspace(0, -1.5, d, dtype=torch.float64))

    def tokens(n, seed):
        x = randn(n, d, seed=seed) @ mixing + 1
        noise = 0.1 * randn(n, d, seed=seed + 1) * x.std()
        return x, x + 0.03 * x @ randn(d, d, seed=8) / d**0.5 + noise - 0.2

    (x, y), other, new = tokens(n, 20), tokens(n, 30), tokens(5000, 40)
    W, b, ridge = fit_affine(moments(x, y, 3), moments(*other, 3))
    B, bias = ridge_by_lstsq(x, y, ridge)
    torch.testing.assert_close(W, B.mT, atol=1e-8, rtol=1e-6)
    torch.testing.assert_close(b, bias, atol=1e-7, rtol=1e-6)

    def error(B, b, tokens):
        x, y = tokens
        return (x + x @ B + b - y).square().sum().item()

    grid = (math.inf, *(10.0 ** -j for j in range(13)))
    assert min(grid, key=lambda r: error(*ridge_by_lstsq(x, y, r), other)) == ridge > 1e-12
    removed, plain = error(0 * B, 0 * b, new), error(*ridge_by_lstsq(x, y, 1e-12), new)
    assert plain > removed > error(W.mT, b, new)


@pytest.mark.parametrize("kind", KINDS)
def test_removing_is_a_loop_over_the_blocks_left_and_replacing_leaves_less_error(kind):
    model, idx = tiny_model(**KINDS[kind]), token_batches(1)[0]
    before, x = model(idx)[0].clone(), model.embed(idx)
    removed, replaced = remove_blocks(model, [2]), replace_blocks(model, [2], token_batches())
    for k, one in enumerate(model.blocks):
        x = one(x, model.cos[:24], model.sin[:24]) if k != 1 else x
    assert torch.equal(removed.trunk(idx)[0], x)
    assert removed.config.n_layer == model.config.n_layer - 1
    gone = sum(p.numel() for p in model.blocks[1].parameters())
    assert removed.num_params() == model.num_params() - gone
    assert torch.equal(model(idx)[0], before), "the model itself is not touched"
    assert replaced.config.kinds()[1] == "L" and replaced.config.n_layer == model.config.n_layer
    tuned = torch.cat(token_batches()[3::4])  # removal is on the ridge's grid, without b
    _, (x, y) = model.trunk(tuned, hidden=(1, 2))
    _, (z,) = replaced.trunk(tuned, hidden=(2,))
    assert (z - y).square().sum() < (x - y).square().sum()
    for pruned in (removed, replaced):
        assert torch.equal(generate(pruned, idx, 12), generate(pruned, idx, 12, use_cache=False))


def test_an_affine_block_is_replaced_by_itself():
    model = tiny_model(mixer="ALA")
    replaced = replace_blocks(model, [2], token_batches(12, rows=8))
    ours, theirs = replaced.blocks[1].affine.weight, model.blocks[1].affine.weight
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_maps_are_fitted_in_depth_order_on_the_output_of_those_before():
    model = tiny_model(n_layer=4)
    replaced, parts = replace_blocks(model, [3, 1], token_batches(), skip_first=True), ([], [])
    assert replaced.config.kinds() == "LALA"
    for i, idx in enumerate(token_batches()):
        with torch.no_grad():
            x = replaced.blocks[0](model.embed(idx), None, None)
            x = model.blocks[1](x, model.cos[:24], model.sin[:24])[:, 1:].flatten(0, 1)
            y = model.trunk(idx, hidden=(3,))[1][0][:, 1:].flatten(0, 1)
        parts[i % 4 == 3].append((x, y))
    fit, held_out = (moments(*(torch.cat(side) for side in zip(*part))) for part in parts)
    W, b, _ = fit_affine(fit, held_out)
    affine = replaced.blocks[2].affine
    torch.testing.assert_close(affine.weight.double(), W, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(affine.bias.double(), b, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("everything", [False, True])
def test_distilling_comes_nearer_to_the_whole_model_and_moves_only_what_it_may(everything):
    model = tiny_model(n_layer=4)
    replaced = replace_blocks(model, [2], token_batches())
    before = {k: v.clone() for k, v in replaced.state_dict().items()}
    distilled = distil(replaced, model, token_batches(), 30, 3e-3, everything)

    @torch.no_grad()
    def distance(other):
        _, wanted = model.trunk(torch.cat(token_batches()), hidden=(2, 3, 4))
        _, found = other.trunk(torch.cat(token_batches()), hidden=(2, 3, 4))
        return sum(((a - b).norm() / b.norm()).square().item() for a, b in zip(found, wanted))

    assert distance(distilled) < 0.97 * distance(replaced)
    assert all(torch.equal(v, before[k]) for k, v in replaced.state_dict().items()), "a copy moves"
    moved = {k for k, v in distilled.state_dict().items() if not torch.equal(v, before[k])}
    if everything:
        assert {"embed.weight", "blocks.0.mixer.o.weight", "blocks.3.mlp.down.weight"} < moved
    else:
        assert moved == {"blocks.1.affine.weight", "blocks.1.affine.bias"}


def test_the_loss_is_the_mean_over_all_tokens_also_of_batches_of_unequal_length():
    model = tiny_model()
    parts = [idx[:, :n] for idx, n in zip(token_batches(2, rows=3), (24, 9))]
    losses = [F.cross_entropy(model.logits(model(idx)[0])[:, :-1].flatten(0, 1),
                              idx[:, 1:].flatten(), reduction="sum") for idx in parts]
    assert mean_loss(model, parts) == pytest.approx(sum(losses).item() / (3 * 23 + 3 * 8), rel=1e-5)


@pytest.fixture
def text(tmp_path, corpus):
    path = tmp_path / "text.txt"
    path.write_text("".join(p.read_text() for p in sorted(corpus.iterdir()))[:12_000])
    return str(path)


RUNS = {"attention": dict(n_layer=3), "mamba2": dict(SSM, mixer="mamba2"),
        "hybrid": dict(SSM, mixer="hybrid", n_layer=3), "experts": dict(n_experts=3),
        "completep": dict(n_layer=3, param="completep", base_n_embd=16, base_n_layer=1)}


@pytest.mark.parametrize("kind, arm, letters", [
    ("attention", "remove", "AA"), ("attention", "distil_all", None), ("mamba2", "replace", None),
    ("experts", "remove", "A"), ("completep", "remove", "AA"), ("completep", "replace", None),
    ("hybrid", "distil", None)])
def test_a_pruned_checkpoint_trains_like_any_other(tiny, text, capsys, kind, arm, letters):
    run = train_module.train(tiny(**RUNS[kind]))
    ckpt = run["checkpoint"]
    before = open(ckpt, "rb").read()
    probes.main(["prune", ckpt, f"--text={text}", f"--arms={arm}", "--orders=full,random",
                 "--distil_steps=3", "--tokens=2000", "--device=cpu"])
    rows = table_cells(capsys.readouterr().out)
    assert [row[:2] for row in rows[1:]] == [["", "whole"], ["full", arm], ["random", arm]]
    assert open(ckpt, "rb").read() == before
    pruned = f"{run['out_dir']}/pruned/ckpt.pt"
    made = load_checkpoint(pruned)
    kinds = made["model_config"]["mixer"]
    assert kinds == letters if letters else kinds.count("L") == 1
    assert int(rows[2][5].replace(",", "")) == model_from_checkpoint(made).num_params()
    assert made["pruned"]["arm"] == arm and len(made["pruned"]["blocks"]) == 1
    changed = {k for k, v in made["config"].items() if load_checkpoint(ckpt)["config"][k] != v}
    assert changed <= {"mixer", "n_layer"}
    probes.main(["linearity", pruned, f"--text={text}", "--tokens=500", "--device=cpu"])
    same = train_module.train(train_module.parse_flags([f"--resume={pruned}"]))
    assert same["step"] == 10 and math.isfinite(same["val_loss"])
    after = train_module.train(train_module.parse_flags([f"--resume={pruned}", "--steps=20"]))
    assert after["val_loss"] < same["val_loss"] and after["tokens"] == 20 * 256


def test_the_model_saved_is_chosen_on_other_tokens_than_reported(tiny, text, capsys, monkeypatch):
    ckpt, asked = train_module.train(tiny(n_layer=3, steps=2))["checkpoint"], []

    def loss(model, batches):
        asked.append((model, {tuple(row) for idx in batches for row in idx.tolist()}))
        return mean_loss(model, batches)

    monkeypatch.setattr(probes, "mean_loss", loss)
    profiled = []
    monkeypatch.setattr(probes, "linearity_profile", lambda model, batches, skip: (
        profiled.extend(batches), linearity_profile(model, batches))[1])
    probes.main(["prune", ckpt, f"--text={text}", "--arms=remove,replace", "--orders=random,full",
                 "--tokens=2000", "--device=cpu"])
    reported, chosen = asked[0][1], asked[2][1]
    assert [rows for _, rows in asked] == [reported] + [reported, chosen] * 4
    fitted = {tuple(row) for idx in profiled for row in idx.tolist()}
    assert not reported & chosen and not fitted & (reported | chosen)
    made, rows = load_checkpoint(f"{ckpt[:-7]}pruned/ckpt.pt"), table_cells(capsys.readouterr().out)
    best = min(asked[2::2], key=lambda pair: mean_loss(pair[0], [torch.tensor(sorted(chosen))]))[0]
    assert len(rows) == 6 and made["model_config"]["mixer"] == best.config.mixer
    for name, weight in best.state_dict().items():
        assert torch.equal(made["model"][name], weight)


@pytest.mark.parametrize("flags, named", [
    (["--blocks=2"], "--blocks=2.*run"), (["--blocks=0"], "--blocks=0"),
    (["--protect=3"], "--protect=3"), (["--protect=1,2"], "--blocks=1"),
    (["--orders=best"], "--orders=best"), (["--arms=remove,cut"], "--arms=cut"),
    (["--tokens=100"], "--text=.*text.txt --tokens=100"), (["--context=33"], "--context=33"),
    (["--tokens=-1"], "--tokens=-1"), (["--distil_steps=0"], "--distil_steps=0"),
    (["--distil_lr=0"], "--distil_lr=0"), (["--device=abacus"], "--device=abacus"),
    (["--text=nowhere.txt"], "--text=nowhere.txt"), (["--out_dir=HERE"], "--out_dir=")])
def test_what_cannot_be_pruned_is_refused_with_nothing_written(tiny, tmp_path, text, flags, named):
    folder, model, config = tmp_path / "run", tiny_model(vocab_size=257, n_layer=2), tiny()
    folder.mkdir()
    save_untrained(model, config, folder / "ckpt.pt")
    flags = [flag.replace("HERE", str(folder)) for flag in flags]
    with pytest.raises(BadInput, match=named):
        probes.main(["prune", str(folder), f"--text={text}", "--device=cpu", *flags])
    assert [p.name for p in folder.iterdir()] == ["ckpt.pt"]


def save_untrained(model, config, path):
    torch.save({"format": "nanolet-2", "model": model.state_dict(), "step": 0,
                "model_config": vars(model.config), "config": vars(config),
                "tokenizer": train_module.make_tokenizer_for(config, ())}, path)


def test_models_of_transformers_are_measured_and_those_that_are_ours_pruned(tmp_path, text):
    """A Llama is our own GPT and can be pruned; a GPT-NeoX is not and can be measured."""
    transformers, tokenizers = map(pytest.importorskip, ("transformers", "tokenizers"))
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(letters)} | {"re": 256, "<|endoftext|>": 257}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("r", "e")]))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")
    shape = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                 num_attention_heads=2)
    torch.manual_seed(0)
    flags = [f"--text={text}", "--tokens=2000", "--context=32", "--device=cpu"]
    for name, kind in (("llama", "Llama"), ("neox", "GPTNeoX")):
        config = getattr(transformers, f"{kind}Config")(**shape)
        getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(tmp_path / name)
        fast.save_pretrained(tmp_path / name)
        probes.main(["linearity", str(tmp_path / name), *flags])
    flags += ["--arms=remove,replace", f"--out_dir={tmp_path / 'out'}"]
    probes.main(["prune", str(tmp_path / "llama"), *flags])
    made = model_from_checkpoint(load_checkpoint(tmp_path / "out" / "ckpt.pt"))
    assert {*made.config.kinds()} <= {"A", "L"}
    probes.main(["linearity", str(tmp_path / "out"), *flags[:-2]])
    with pytest.raises(BadInput, match="neox"):
        probes.main(["prune", str(tmp_path / "neox"), *flags])


# --------------------------------------------------------------------------------------------------
# How a text is read


def test_every_command_reads_an_end_of_text_token_then_the_text(tiny, tmp_path, text, monkeypatch):
    """So does training before each document. --characters is the paper's way: each piece alone."""
    folder, model, eot = tmp_path / "run", tiny_model(vocab_size=257, n_layer=2), 256
    folder.mkdir()
    save_untrained(model, tiny(), folder / "ckpt.pt")
    whole, seen = [eot, *open(text, "rb").read()], []
    trunk = GPT.trunk
    monkeypatch.setattr(GPT, "trunk", lambda self, idx, *args, **kw: (
        seen.extend(idx.tolist()), trunk(self, idx, *args, **kw))[1])
    flags = [str(folder), f"--text={text}", "--device=cpu"]
    curvature = ["--steps=2", "--probes=1", "--tokens=64"]
    for command, more in (("linearity", ["--tokens=256"]), ("curvature", curvature),
                          ("eval", ["--tokens=64"]), ("prune", ["--tokens=512", "--arms=remove"])):
        seen.clear()
        probes.main([command, *flags, *more])
        first = [row for row in seen if row[0] == eot]
        assert first and all(row == whole[:len(row)] for row in first), command
        assert any(row == whole[32:32 + len(row)] for row in seen), command
    seen.clear()
    probes.main(["linearity", *flags, "--tokens=300", "--characters=20"])
    assert seen == [[eot, *whole[1 + 20 * k:21 + 20 * k]] for k in range(15)]


def test_pieces_of_unequal_length_make_batches_of_one_length_each():
    contexts = [torch.arange(n) for n in (5, 3, 5, 5, 3)]
    batches = probes.batched(contexts, 2, "cpu")
    assert [tuple(b.shape) for b in batches] == [(2, 3), (2, 5), (1, 5)]


def test_linearity_of_a_checkpoint_from_the_command_line(tiny, tmp_path, text):
    pytest.importorskip("matplotlib")
    ckpt, picture = train_module.train(tiny(steps=3))["checkpoint"], tmp_path / "a.png"
    done = run_python(ROOT / "probes.py", "linearity", ckpt, f"--text={text}", f"--plot={picture}")
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    heading, *rows = table_cells(done.stdout)
    assert "free_held_out" in heading and [row[0] for row in rows] == ["1", "2"]
    assert probes.bars([0, 0.5, 0.999, 1, 2, -1, math.nan], 0, 1) == "▁▅███▁ "
    done = run_python(ROOT / "probes.py", "linearity", ckpt, "--text=none.txt")
    assert done.returncode == 2 and "--text=none.txt" in done.stderr


# --------------------------------------------------------------------------------------------------
# Curvature

MIXERS = {"attention": dict(n_kv_head=1), "swiglu": dict(mlp="swiglu", qk_norm=True),
          "mamba2": dict(mixer="mamba2"), "hybrid": dict(mixer="hybrid", n_groups=2),
          "experts": dict(n_experts=3, mlp="gelu")}


def small(**kw):
    """About 400 parameters in float64, none of them 0."""
    shape = dict(vocab_size=13, block_size=12, n_layer=1, n_embd=4, n_head=2, n_kv_head=2,
                 mlp="relu2", mlp_hidden=8, tie_embeddings=True, d_state=4, ssm_head_dim=2,
                 chunk_size=5)
    return tiny_model(0, **{**shape, **kw}).double()


def pair(rows=3, seed=1):
    ids = torch.randint(13, (rows, 13), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1], ids[:, 1:]


@pytest.mark.parametrize("kind", MIXERS)
def test_the_hessian_product_is_the_difference_of_training_gradients(kind):
    model, data = small(**MIXERS[kind]), [pair(3), pair(2, seed=2)]
    params = list(model.parameters())
    sizes = [p.numel() for p in params]
    v = F.normalize(randn(sum(sizes)), dim=0)

    def gradient(shift):
        with torch.no_grad():
            for p, part in zip(params, v.split(sizes)):
                p += shift * part.view_as(p)
        idx, targets = (torch.cat(t) for t in zip(*data))
        got = torch.autograd.grad(model.loss(model(idx)[0], targets), params)
        return torch.cat([g.flatten() for g in got])

    eps, close = (1e-2, 1e-2) if kind == "experts" else (1e-5, 1e-7)  # a router is float32
    expected = (gradient(eps) - gradient(-2 * eps)) / (2 * eps)
    gradient(eps)
    got = hessian_product(model, data)(v)
    assert got.norm() > 1e-2
    assert ((got - expected).norm() / expected.norm()).item() < close


@pytest.fixture(scope="module")
def dense():
    """(model, batches, its whole Hessian by differentiating every element of the gradient)."""
    model, data = small(), pair()
    params = list(model.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        logits = model.logits(model(data[0])[0])
    loss = F.cross_entropy(logits.flatten(0, 1), data[1].flatten())
    gradient = torch.autograd.grad(loss, params, create_graph=True)
    rows = [torch.autograd.grad(g, params, retain_graph=True, materialize_grads=True)
            for g in torch.cat([g.flatten() for g in gradient])]
    return model, [data], torch.stack([torch.cat([h.flatten() for h in row]) for row in rows])


def test_extreme_eigenvalues_trace_and_rms_are_those_of_the_dense_hessian(dense):
    model, data, H = dense
    exact = torch.linalg.eigvalsh(H)
    got = spectrum(model, data, steps=80, probes=1, top=4)
    assert got["parameters"] == len(H) and exact[0] < -1e-3 < exact[-1]
    top = torch.tensor(got["top"]).double()
    torch.testing.assert_close(top, exact.flip(0)[:4], rtol=1e-6, atol=0)
    assert got["least"] == pytest.approx(exact[0].item(), rel=1e-6)
    assert got["residual"] < 1e-6 * exact[-1].item()
    loss = model.loss(model(data[0][0])[0], data[0][1]).item()
    assert got["loss"] == pytest.approx(loss, rel=1e-12)
    got = spectrum(model, data, steps=6, probes=10)
    assert got["trace"] == pytest.approx(H.trace().item(), abs=4 * got["trace_se"])
    assert got["trace_se"] < 0.1 * len(H) * got["rms"], "the comparison would mean little"
    assert got["rms"] == pytest.approx((H.square().sum() / len(H)).sqrt().item(), rel=0.2)


def test_lanczos_weights_give_the_moments_of_the_start_vector(dense):
    _, _, H = dense
    v, exact = randn(len(H), seed=3), torch.linalg.eigvalsh(H)
    theta, weights, bounds = lanczos(lambda u: H @ u, v, 12)
    for k in range(24):  # Gauss quadrature of 12 nodes is exact up to here
        moment = (v @ torch.linalg.matrix_power(H, k) @ v / (v @ v)).item()
        assert (weights * theta**k).sum().item() == pytest.approx(moment, rel=1e-8), k
    for value, bound in zip(theta, bounds):
        assert (exact - value).abs().min() <= bound + 1e-12


def test_lanczos_stops_where_all_is_seen_and_does_not_repeat_what_has_converged():
    e = torch.tensor([3.0, 3.0, 1.0, -2.0, 0.5] + [0.0] * 20, dtype=torch.float64)
    U = torch.linalg.qr(randn(25, 25)).Q
    theta, _, _ = lanczos(lambda u: U @ (e * (U.mT @ u)), randn(25, seed=1), 25)
    distinct = torch.tensor([-2.0, 0.0, 0.5, 1.0, 3.0]).double()
    torch.testing.assert_close(theta, distinct, atol=1e-10, rtol=0)
    spread = torch.logspace(-8, 3, 300, dtype=torch.float64)  # the largest converge in few steps
    theta, _, _ = lanczos(lambda u: spread * u, randn(300), 100)
    assert (theta[-12:] - spread[-12:]).abs().max() < 1e-6


def test_the_density_is_that_of_the_eigenvalues(dense):
    _, _, H = dense
    exact = torch.linalg.eigvalsh(H)
    low, high = exact[0].item(), exact[-1].item()
    sigma = 0.05 * (high - low)
    x = torch.linspace(low - 5 * sigma, high + 5 * sigma, 400, dtype=torch.float64)
    whole = torch.distributions.Normal(exact, sigma).log_prob(x[:, None]).exp().mean(1)
    ritz = [lanczos(lambda u: H @ u, randn(len(H), seed=s), 60)[:2] for s in range(20)]
    got = density(ritz, x, sigma)
    assert torch.trapezoid(got, x).item() == pytest.approx(1.0, abs=1e-3)
    assert (got - whole).abs().max() < 0.06 * whole.max()


def test_curvature_along_runs_is_a_row_a_checkpoint_and_ratios_to_the_first_group(
        tiny, tmp_path, capsys, text):
    pytest.importorskip("matplotlib")
    for name, lr in (("plain", 0.01), ("let", 0.02)):
        train_module.train(tiny(steps=4, save_every=2, eval_every=4, keep_checkpoints=True, lr=lr,
                                out_dir=str(tmp_path / f"{name}-0")))
    probes.main(["curvature", str(tmp_path / "plain-0"), str(tmp_path / "let-0"), f"--text={text}",
                 "--tokens=96", "--steps=6", f"--plot={tmp_path / 'a.png'}", "--device=cpu"])
    rows = table_cells(capsys.readouterr().out)
    assert [row[1] for row in rows[1:5]] == ["2", "4", "2", "4"]
    ratio = float(rows[3][3].split(",")[0]) / float(rows[1][3].split(",")[0])
    assert rows[6][:3] == ["let", "2", "1"]
    assert float(rows[6][3]) == pytest.approx(ratio, rel=2e-3)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "text.txt").write_text("short")
    with pytest.raises(BadInput, match="--text=.*text.txt"):
        probes.main(["curvature", str(tmp_path / "let-0"), f"--text={text}", "--device=cpu"])


# --------------------------------------------------------------------------------------------------
# Evaluation

WORDS = ("the cat sat on a mat and then it ran to see some old red dogs that were not there before "
         "noon").split()


def handwritten() -> list[dict]:
    """20 items of all three forms: contexts of 0 to 30 words, two to five choices."""
    items = []
    for i in range(8):
        spans = ((i, 2), (i + 3, 7), (2, 1), (9, i + 1))
        items.append({"ctx": " ".join(WORDS[j % 20] for j in range(i, 5 * i)), "label": str(i % 4),
                      "endings": [" ".join(WORDS[k:k + n]) for k, n in spans]})
    for i in range(6):
        choices = ["home", "to the red mat", "not there", "nowhere, it sat"][:2 + i % 3]
        context = f"Question {i}: where did the old cat run?\nAnswer:" + "  " * (i % 2)
        items.append({"context": context, "choices": choices, "label": i % 2})
    for i in range(6):
        words = WORDS[i:i + 6]
        items.append({"sentence_good": " ".join(words) + ".",
                      "sentence_bad": " ".join(words[::-1]) + "."})
    return items


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    path = tmp_path_factory.mktemp("task") / "task.jsonl"
    path.write_text("\n\n".join(map(json.dumps, handwritten())))
    return probes.read_task(path)


@pytest.fixture(scope="module")
def enc():
    """Bytes and 44 merges, which join words to the blank before them."""
    import tiktoken
    ranks = {bytes([b]): b for b in range(256)}
    for word in ("th", "the", " the", " c", " ca", " cat", "at", " s", " sat", " r", " re", " red",
                 " d", " do", " dog", " dogs", "er", " o", " on", " ol", " old", " m", " mat", "ho",
                 "me", "home", " a", " an", " and", "no", "not", " not", " i", " it", "ran", " ran",
                 "ere", "there", " there", " w", " n", " no", "  ", " A"):
        ranks[word.encode()] = len(ranks)
    return tiktoken.Encoding("test", pat_str=r" ?\p{L}+|\s+(?!\S)|[^\p{L}]",
                             mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 300})


def reader(**kw):
    return tiny_model(**{**dict(vocab_size=301, block_size=256, n_layer=2), **kw})


def one_by_one(logits_of, enc, task):
    """[[log-likelihood of each choice]] by a loop over logits; the boundary is found here."""
    totals = []
    for context, choices, _ in task:
        totals.append([])
        for choice in choices:
            blank = "" if not context or context.endswith(" ") else " "
            n = len(enc.encode_ordinary(context.rstrip(" ")))
            ids = [enc.eot_token] + enc.encode_ordinary(context + blank + choice)
            log_p = logits_of(torch.tensor([ids]))[0].double().log_softmax(-1)
            scores = [log_p[t - 1, ids[t]].item() for t in range(1 + n, len(ids))]
            totals[-1].append(sum(scores))
    return totals


def assert_scores(got, expected):
    for ours, theirs in zip(got, expected):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-4)


@torch.no_grad()
def test_scores_and_accuracies_are_those_of_a_loop_over_the_logits_of_transformers(task, enc):
    from teacher import HFModel
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(
        vocab_size=301, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, initializer_range=0.3)).eval()
    expected = one_by_one(lambda idx: theirs(idx).logits, enc, task)
    got = evaluate_task(HFModel(theirs, 301), enc, task)
    assert len(task) == got["items"] == 20 and got["cut"] == got["left_out"] == 0
    assert_scores(got["scores"], expected)
    labels = [label for _, _, label in task]
    each = [[s / len(c) for s, c in zip(scores, choices)]
            for scores, (_, choices, _) in zip(expected, task)]
    by_sum, by_length = ([int(np.argmax(s)) == label for s, label in zip(scores, labels)]
                         for scores in (expected, each))
    assert by_sum != by_length
    assert got["sum"] == pytest.approx(sum(by_sum) / 20)
    assert got["per_character"] == pytest.approx(sum(by_length) / 20)
    assert got["sum_se"] == pytest.approx(np.std(by_sum, ddof=1) / 20**0.5)
    assert got["chance"] == pytest.approx((8 / 4 + 2 * (1 / 2 + 1 / 3 + 1 / 4) + 6 / 2) / 20)


@pytest.mark.parametrize("kind", ["attention", "mamba2", "hybrid", "experts"])
@torch.no_grad()
def test_order_and_batch_size_do_not_change_a_score(task, enc, kind):
    model = reader(**{**MIXERS[kind], "ssm_head_dim": 16, "d_state": 8, "chunk_size": 7})
    expected = one_by_one(lambda idx: model.logits(model(idx)[0]), enc, task)
    for batch_tokens, order in ((1, 1), (100, -1), (10**4, 1)):
        got = evaluate_task(model, enc, task[::order], batch_tokens)["scores"][::order]
        assert_scores(got, expected)


def test_contexts_with_several_choices_go_through_the_model_once(enc, monkeypatch):
    words = "the cat sat on a mat and then it ran to see some old red dogs "
    task = [(words * (2 + i % 2), ["home", "there", "not there"], 0) for i in range(6)]
    model, seen = reader(), []
    trunk = model.trunk
    monkeypatch.setattr(model, "trunk", lambda idx, *args, **kw: (
        seen.append(idx.numel()), trunk(idx, *args, **kw))[1])
    evaluate_task(model, enc, task)
    whole = [encode_pair(enc, context, c)[0] for context, choices, _ in task for c in choices]
    assert sum(seen) < 0.6 * sum(map(len, whole))


def test_the_boundary_between_context_and_choice(enc):
    for context, choice, ours in (("the cat", "sat", " sat"), ("the cat ", "sat", " sat"),
                                  ("the cat", " sat", " sat"), ("the cat\n", "sat", "\nsat"),
                                  ("", "sat", "sat")):
        ids, start = encode_pair(enc, context, choice)
        assert ids[0] == enc.eot_token and enc.decode(ids[start:]) == ours
        assert enc.decode(ids[1:start]) == context.rstrip()


def test_ties_share_the_point_and_are_counted(enc):
    task = [("the cat", ["sat on a", "sat on a", "the mat of the red dogs"], k) for k in range(3)]
    got = evaluate_task(reader(), enc, task)
    tie = got["scores"][0][2] < got["scores"][0][0]
    assert got["sum"] == pytest.approx(1 / 3) and got["sum_ties"] == 3 * tie
    assert probes.right([-3.0, -3.0, -5.0, -3.0], 3) == (pytest.approx(1 / 3), True)
    assert probes.right([-3.0, -2.9999, -5.0], 1) == (1.0, False)
    assert probes.right([-3.0, -3.0 + 1e-7], 0) == (0.5, True), "rounding"


@torch.no_grad()
def test_long_contexts_lose_their_beginning_and_are_counted(enc):
    model, text = reader(block_size=16), " ".join(WORDS)
    task = [(text, ["home", "there"], 0), ("the cat", ["sat", "ran"], 1), ("the", ["sat", text], 0)]
    got = evaluate_task(model, enc, task)
    assert (got["items"], got["cut"], got["left_out"]) == (2, 1, 1) and got["scores"][2] is None
    for k, choice in enumerate(task[0][1]):
        ids = enc.encode_ordinary(f"{text} {choice}")[-17:]
        n = len(enc.encode_ordinary(f" {choice}"))
        log_p = model.logits(model(torch.tensor([ids[:-1]]))[0])[0].log_softmax(-1)
        expected = sum(log_p[t, ids[t + 1]].item() for t in range(16 - n, 16))
        assert got["scores"][0][k] == pytest.approx(expected, rel=1e-5)
    got = evaluate_task(reader(block_size=16, mixer="mamba2", ssm_head_dim=16), enc, task)
    assert (got["items"], got["cut"], got["left_out"]) == (3, 0, 0), "no longest context"


@pytest.mark.parametrize("line, named", [
    ('{"ctx": "a", "label": 1}', "endings"), ('{"sentence_good": "a"}', "sentence_bad"),
    ('{"a": 1}', "context"), ('{"ctx": "a", "endings": ["b", "c"], "label": 2}', "label"),
    ('{"ctx": "a", "endings": ["b", "c"], "label": ""}', ""),
    ('{"ctx": "a", "endings": ["b"], "label": 0}', "choices"),
    ('{"ctx": "a", "endings": ["b", " "], "label": 0}', "choice"),
    ('{"context": "a", "choices": "bc", "label": 0}', "choices"),
    ('{"context": 1, "choices": ["b", "c"], "label": 0}', "texts"), ("[1]", ""), ('{"ctx', ""),
    ("[" * 100_000, ""), ("1" * 5000, ""),
    ('{"ctx": "a", "endings": ["b", "c"], "label": "%s"}' % ("1" * 5000), "label")],
    ids=lambda value: value[:40])
def test_a_task_that_is_none_is_refused_by_file_and_line(tmp_path, line, named):
    path = tmp_path / "t.jsonl"
    path.write_text('{"sentence_good": "a b", "sentence_bad": "b a"}\n\n' + line)
    with pytest.raises(BadInput, match=rf"t\.jsonl, line 3: .*{named}"):
        probes.read_task(path)
    path.write_text("")
    with pytest.raises(BadInput, match=r"t\.jsonl"):
        probes.read_task(path)


@pytest.mark.parametrize("stride", [32, 10])
@torch.no_grad()
def test_perplexity_reads_every_token_once_with_the_context_of_its_window(enc, stride):
    model, text, losses = reader(block_size=32), " ".join(WORDS * 7) + ".", []
    ids = [enc.eot_token] + enc.encode_ordinary(text)
    for t in range(1, len(ids)):  # the window that scores t ends at the next multiple of the stride
        end = min(-(-t // stride) * stride, len(ids) - 1)
        x = model(torch.tensor([ids[max(0, end - 32):t]]))[0]
        losses.append(-model.logits(x)[0, -1].log_softmax(-1)[ids[t]].item())
    got, n_bytes = evaluate_text(model, ids, len(text.encode()), stride, 64), len(text.encode())
    assert got["tokens"] == len(ids) - 1
    assert got["nats"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert got["perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)
    assert got["bits_per_byte"] == pytest.approx(sum(losses) / np.log(2) / n_bytes, rel=1e-5)


def test_a_run_is_evaluated_from_the_command_line(tiny, tmp_path, capsys, text):
    folder = tmp_path / "run"
    folder.mkdir()
    save_untrained(tiny_model(vocab_size=257), tiny(), folder / "ckpt.pt")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, handwritten())))
    flags = [str(folder), f"--text={text}", "--tokens=600", "--device=cpu"]
    probes.main(["eval", *flags, "--task", str(tmp_path / "a.jsonl"), str(tmp_path / "a.jsonl")])
    out = capsys.readouterr().out
    assert table_cells(out)[1][0] == "a" and "600 tokens" in out
    for wrong in (["eval", str(folder)], ["eval", *flags, "--stride=33"]):
        with pytest.raises(BadInput, match="--(text|stride)"):
            probes.main(wrong)


# --------------------------------------------------------------------------------------------------
# Scale of the weights


class Multiplied:
    """What weight_scales reads of optim.Multipliers."""

    def __init__(self, W, pieces):
        self.W, self.pieces = W, pieces


def test_weight_scales_are_root_mean_squares_by_piece_and_drift_is_of_pairs():
    model = tiny_model(n_layer=2, n_kv_head=4, mlp="swiglu")
    W = {name: 2 * p.detach() for name, p in model.named_parameters() if "qkv" in name}
    r = [torch.full((32,), 3.0), torch.full((32,), 2.0)]
    pieces = {f"blocks.{k}.mixer.qkv.weight": [("q", 32, r[0], None), ("k", 32, r[1], None)]
              for k in (0, 1)}
    got = weight_scales(model, Multiplied(W, pieces))
    assert got["drift"] == pytest.approx({"q/k": math.log(3) - math.log(2)})
    assert {*got["weights"]} == {"embed", "q", "k", "v", "o", "gate", "up", "down", "head"}
    q = [b.mixer.qkv.weight[:32].detach().double().numpy() for b in model.blocks]
    rms = np.sqrt(np.mean(np.concatenate(q) ** 2))
    assert got["weights"]["q"]["rms_effective"] == pytest.approx(rms, rel=1e-5)
    assert got["weights"]["q"]["rms"] == pytest.approx(2 * rms, rel=1e-5)
    rows = [np.sqrt((w ** 2).mean(1)) for w in q]
    logs = np.concatenate([np.log(v / v.mean()) for v in rows])
    assert got["weights"]["q"]["spread"] == pytest.approx(logs.std(ddof=1), rel=1e-4)
    assert "drift" not in weight_scales(model)


@pytest.mark.parametrize("mlp, power", [("swiglu", 1), ("relu2", 2), ("gelu", None)])
def test_drift_counts_up_as_often_as_its_scale_comes_out_of_the_mlp(mlp, power):
    model = tiny_model(mlp=mlp, qk_norm=True)
    r, c, s = torch.full((8,), 3.0), torch.full((8,), 5.0), torch.tensor([7.0])
    pieces = {"a": [("up", 8, r, None), ("down", 8, None, c), ("q", 8, r, None), ("k", 8, r, None)],
              "b": [("v", 8, r, None), ("o", 8, s, None)]}
    drift = {"v/o": math.log(3) - math.log(7)}  # a scalar counts as rows; qk_norm: no pair q/k
    if power:
        drift["up/down"] = power * math.log(3) - math.log(5)
    assert weight_scales(model, Multiplied({}, pieces))["drift"] == pytest.approx(drift)


def test_weight_scales_read_experts_one_by_one_and_a_tied_head_once():
    model = tiny_model(n_experts=3, tie_embeddings=True, n_layer=1)
    got, up = weight_scales(model)["weights"], model.blocks[0].mlp.up.detach().double().numpy()
    assert "head" not in got and got["router"]["rms"] > 0
    assert got["up"]["rms"] == pytest.approx(np.sqrt((up ** 2).mean()), rel=1e-5)
    rows = np.sqrt((up ** 2).mean(2))
    logs = np.log(rows / rows.mean(1, keepdims=True))
    assert got["up"]["spread"] == pytest.approx(logs.std(ddof=1), rel=1e-4)


# --------------------------------------------------------------------------------------------------
# Tables and plots over runs


def write_run(folder, losses, seconds_per_step=2.0, **more):
    folder.mkdir(parents=True)
    lines = [{"step": 10 * i, "tokens": 1, "flops": 1000 * i, "seconds": 10 * i * seconds_per_step,
              "val_loss": loss, "bits_per_byte": loss / 2, **more} for i, loss in enumerate(losses)]
    text = "".join(json.dumps(line) + "\n" for line in [*lines, {"step": 1}])
    (folder / "metrics.jsonl").write_text(text)
    return str(folder)


def test_compare_finds_where_a_run_reaches_the_reference(tmp_path):
    """By hand: the plain runs end at 3.0 and 4.0 after 30 steps. let-0 passes 3.0 half-way from
    step 10 (3.5) to 20 (2.5), at step 15 of 30, 50 %; let-1 reaches 4.0 at step 20, 66.7 %. A step
    of theirs takes 1.5 times as long."""
    runs = [write_run(tmp_path / name, losses, seconds) for name, losses, seconds in (
        ("plain-0", [8, 5, 4, 3], 2), ("plain-1", [8, 6, 5, 4], 2), ("let-0", [8, 3.5, 2.5, 2], 3),
        ("let-1", [8, 5, 4, 3.5], 3), ("worse-1", [8, 7, 6, 5], 2), ("early-0", [3, 3.5, 2], 2))]
    _, plain, let, worse, early = table_cells(compare(runs))
    assert let == ["let", "2", "2.7500 ± 1.0607", "-0.7500 ± 0.3536", "1.3750 ± 0.5303",
                   "58.3 ± 11.8 %", "58.3 ± 11.8 %", "87.5 ± 17.7 %"]
    assert plain[5:] == ["100.0 ± 0.0 %"] * 3 and worse[5:] == ["never"] * 3
    assert early[5:] == ["0.0 %"] * 3, "it begins below the reference"
    assert compare([*runs, runs[0], runs[1] + "/"]) == compare(runs), "named twice, counted once"


def test_compare_shows_the_scales_of_a_piece(tmp_path):
    scales = [{"q": {"rms": i, "rms_effective": 2 * i}} for i in (1, 3)]
    runs = [write_run(tmp_path / f"a-{i}", [8, 5], weights=scales[i]) for i in (0, 1)]
    assert table_cells(compare(runs, "q"))[1][-2:] == ["2.0000 ± 1.4142", "4.0000 ± 2.8284"]
    with pytest.raises(BadInput, match="--piece=tail"):
        compare(runs, "tail")


def test_a_run_that_did_not_finish_is_not_taken_for_a_final_loss(tmp_path):
    runs = [write_run(tmp_path / f"{name}-0", [8, 5, 4]) for name in ("plain", "wild")]
    for name, steps in (("plain", 20), ("wild", 30)):
        (tmp_path / f"{name}-0" / "config.json").write_text(json.dumps({"steps": steps}))
    _, plain, wild = table_cells(compare(runs))
    assert plain[2] == "4.0000" and "1 of 1" in wild[2]
    _, wild, plain = table_cells(compare(runs[::-1]))
    assert plain[2] == "4.0000" and plain[5:] == ["never"] * 3


@pytest.mark.parametrize("name, text, named", [
    ("let", None, "let"), ("let-1", None, "let-1"), ("x/plain-0", None, "plain-0"),
    *(("let-0", text, "let-0/metrics.jsonl") for text in (
        '{"step": 1}', "{", "", "[1]", '{"step": 1, "val_loss": "low"}', '{"val_loss": 1}'))])
def test_folders_that_are_no_runs_of_the_table_are_refused_by_name(tmp_path, name, text, named):
    runs = [write_run(tmp_path / "plain-0", [8, 5]), write_run(tmp_path / name, [8, 5])]
    if text is not None:
        (tmp_path / name / "metrics.jsonl").write_text(text)
    with pytest.raises(BadInput, match=named):
        compare(runs)


@pytest.mark.parametrize("text", ["{", "[]", '{"steps": "x"}'])
def test_settings_that_are_none_are_refused_by_name(tmp_path, text):
    run = write_run(tmp_path / "a-0", [8, 5])
    (tmp_path / "a-0" / "config.json").write_text(text)
    with pytest.raises(BadInput, match="a-0/config.json"):
        compare([run])


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path):
    run = write_run(tmp_path / "plain-0", [8, 5])
    with open(tmp_path / "plain-0" / "metrics.jsonl", "a") as file:
        file.write('{"step": 20, "val_l')
    assert table_cells(compare([run]))[1][2] == "5.0000"


def test_means_over_seeds_by_hand():
    zero = {"step": 0, "tokens": 0, "flops": 0, "seconds": 0}
    at_10 = {"step": 10, "tokens": 20, "flops": 30}
    group = [[{**zero, "val_loss": 5.0}, {"step": 5, "lr": 1, "val_loss": None},
              {**at_10, "seconds": 2.0, "val_loss": 3.0}],
             [{**zero, "val_loss": 5.0}, {**at_10, "seconds": 4.0, "val_loss": 2.0},
              {**zero, "step": 20, "val_loss": math.inf}]]
    at, mean, sd = probes.over_seeds(group, "val_loss")
    assert at == [zero, {**at_10, "seconds": 3.0}]
    assert mean == [5.0, 2.5] and sd == pytest.approx([0.0, 0.5**0.5])


def test_runs_of_every_kind_are_drawn(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes
    drawn = []
    monkeypatch.setattr(Axes, "plot", lambda self, *args, **kw: drawn.append(kw.get("label")))
    monkeypatch.setattr(Axes, "legend", lambda self, **kw: None)
    scales = {"head": {"rms": 1.0, "rms_effective": 2.0, "spread": None}}
    runs = [write_run(tmp_path / name, [3, 2], **more) for name, more in (
        ("a-0", {}), ("a-1", {}), ("3", {"let_cosine": 0.5}),
        ("b-x", {"drift": {"v/o": 0.1, "up/down": 0.2}, "weights": scales}))]
    probes.main(["plot", *runs, "-o", str(tmp_path / "p.png")])
    losses = ["a, 2 seeds", "3, 1 seeds", "b-x, 1 seeds"]
    assert drawn == losses * 4 + ["3, 1 seeds", "b-x v/o", "b-x up/down", "b-x rms",
                                  "b-x rms_effective"]
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "3" / "metrics.jsonl").write_text('{"step": 1}\n')
    for run, plot, named in ((runs[2], tmp_path / "a.png", "3/metrics.jsonl"),
                             (runs[0], "x.txt", "--plot=x.txt"),
                             (runs[0], tmp_path / "nowhere" / "x.png", "--plot=.*nowhere")):
        with pytest.raises(BadInput, match=named):
            probes.main(["plot", run, "-o", str(plot)])


# --------------------------------------------------------------------------------------------------
# Minimal pairs from Python files

DOCUMENTS = [Path(module.__file__).read_text() for module in (argparse, textwrap, dis, tokenize)]


def compiles(text: str) -> bool:
    try:
        compile(text, "text", "exec", dont_inherit=True)
    except SyntaxError:
        return False
    return True


def globals_read(text: str) -> set[str]:
    """By the bytecode: names that some code reads as globals and that no code binds."""
    codes, read, bound = [compile(text, "text", "exec", dont_inherit=True)], set(), set()
    for code in codes:
        codes += [const for const in code.co_consts if hasattr(const, "co_code")]
        for i in dis.get_instructions(code):
            if i.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                read.add(i.argval)
            elif i.opname in ("STORE_NAME", "STORE_GLOBAL"):
                bound.add(i.argval)
    return read - bound - {*dir(builtins), "__name__"}


def words(line: str) -> list[str]:
    return [t.string for t in tokenize.generate_tokens(io.StringIO(line.lstrip()).readline)]


@pytest.fixture(scope="module")
def pairs():
    return python_pairs(DOCUMENTS, 0, 50)


def test_the_right_side_parses_and_the_wrong_one_breaks_the_rule_of_its_kind(pairs):
    for kind, context, right, wrong in pairs:
        assert compiles(context + right) and context.endswith("\n") and wrong != right
        assert any(context + right in document for document in DOCUMENTS)
        if kind == "name":
            new = globals_read(context + wrong) - globals_read(context + right)
            assert len(new) == 1
            document = next(d for d in DOCUMENTS if context + right in d)
            assert new.pop() not in document
        else:
            assert not compiles(context + wrong)


def test_the_two_sides_differ_in_one_token(pairs):
    for kind, _, right, wrong in pairs:
        if kind == "indent":
            assert right.lstrip() == wrong.lstrip()
        elif kind == "bracket":  # an unbalanced line has no tokens
            assert sum(a != b for a, b in zip(right, wrong, strict=True)) == 1
        elif kind == "name":
            assert sum(a != b for a, b in zip(words(right), words(wrong), strict=True)) == 1


def test_kinds_are_equally_many_and_a_seed_gives_the_same_pairs(pairs):
    counts = [sum(kind == one for one, *_ in pairs) for kind in PYTHON_KINDS]
    assert max(counts) == 10 and min(counts) >= 6
    assert pairs == python_pairs(DOCUMENTS, 0, 50) != python_pairs(DOCUMENTS, 1, 50)


def test_with_a_length_both_sides_are_equally_long():
    def length(text):
        return len(text.split(" "))

    found = python_pairs(DOCUMENTS, 0, 40, length=length)
    assert len(found) >= 30
    assert all(length(context + right) == length(context + wrong)
               for _, context, right, wrong in found)
