"""probes.py: linearity against its definition and identities; tables over runs against values by hand."""
import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, run_python, tiny_model

import train as train_module
from model import BadInput
from probes import (Moments, bars, compare, linearity, linearity_penalty, linearity_profile, plot_sweep, read_sweep,
                    stream_scales, sweep)

torch.set_num_threads(1)


# ----------------------------------------------------------------------------------------------------------------------
# Linearity


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def score(x, y, *held_out, parts=1):
    """linearity() of these rows, added in so many parts."""
    fit = Moments()
    for a, b in zip(x.chunk(parts), y.chunk(parts)):
        fit.add(a, b)
    other = None
    if held_out:
        other = Moments(fit.shift_x, fit.shift_y)
        other.add(*held_out)
    return linearity(fit, other)


def by_svd(x, y):
    """The authors' definition: centre, divide by the Frobenius norm, 1 - ||X A - Y||^2 with A by the SVD of X."""
    x, y = x - x.mean(0), y - y.mean(0)
    x, y = x / x.norm(), y / y.norm()
    U, s, Vh = torch.linalg.svd(x, full_matrices=False)
    A = Vh.mT @ torch.diag(1 / s) @ U.mT @ y
    return 1 - (x @ A - y).square().sum().item()


def block(x, strength=0.5, seed=5):
    """Some of it linear in x, some not."""
    d = x.shape[1]
    return x + strength * (x @ randn(d, d, seed=seed) / d**0.5).tanh() + 0.3


def test_scores_are_those_of_the_authors_definition():
    x = randn(400, 12) @ randn(12, 12, seed=1) + 5
    y = block(x)
    got = score(x, y)
    assert got["full"] == pytest.approx(by_svd(x, y), abs=1e-10)
    assert got["free"] == pytest.approx(by_svd(x, y - x), abs=1e-10)
    U = torch.linalg.svd(x - x.mean(0), full_matrices=False).U  # the projection form
    assert got["full"] == pytest.approx(((U.mT @ (y - y.mean(0))).norm() / (y - y.mean(0)).norm()).item() ** 2, abs=1e-10)
    assert got["rank"] == 12 and got["n"] == 400 and got["n_over_d"] == pytest.approx(400 / 12)


def test_in_parts_is_as_in_one():
    x = randn(403, 9)
    x, y = x + 100, block(x) + 100
    whole, parts = score(x, y), score(x, y, parts=7)
    assert whole.keys() == parts.keys()
    for k in whole:
        assert parts[k] == pytest.approx(whole[k], rel=1e-9), k


def test_full_and_free_are_tied_by_the_centred_ratio():
    x = randn(300, 8) + 3
    got = score(x, block(x, 0.2))
    assert 1 - got["full"] == pytest.approx((1 - got["free"]) * got["ratio_centred"] ** 2, rel=1e-9)
    d, y = block(x, 0.2) - x, block(x, 0.2)
    assert got["ratio_mean"] == pytest.approx((d.norm(dim=1) / y.norm(dim=1)).mean().item(), rel=1e-9)
    assert got["ratio_rms"] == pytest.approx((d.norm() / y.norm()).item(), rel=1e-9)
    assert got["cosine"] == pytest.approx(((x / x.norm(dim=1)[:, None]) * (y / y.norm(dim=1)[:, None])).sum(1).mean().item())


def test_score_does_not_see_a_map_of_x_nor_a_turn_of_y():
    x = randn(200, 6)
    y = block(x, 3.0).square()
    base = score(x, y)["full"]
    turn = torch.linalg.qr(randn(6, 6, seed=2)).Q
    assert score(x @ randn(6, 6, seed=3) + 7, y)["full"] == pytest.approx(base, abs=1e-9)
    assert score(x, 4 * y @ turn - 2)["full"] == pytest.approx(base, abs=1e-9)
    assert abs(score(x, y @ torch.diag(torch.tensor([9.0, 1, 1, 1, 1, 1], dtype=torch.float64)))["full"] - base) > 1e-3
    assert abs(score(y, x)["full"] - base) > 1e-4, "not symmetric"


def test_unrelated_states_score_what_chance_gives_and_0_when_adjusted():
    n, d = 300, 20
    scores = [score(randn(n, d, seed=s), randn(n, d, seed=99 + s)) for s in range(20)]
    assert sum(s["full"] for s in scores) / 20 == pytest.approx(d / (n - 1), rel=0.05)
    assert sum(s["full_adjusted"] for s in scores) / 20 == pytest.approx(0.0, abs=0.01)


@pytest.mark.parametrize("ratio", [2, 3.66, 20])
def test_in_sample_a_score_is_too_high_by_rank_over_tokens_and_the_adjusted_one_is_not(ratio):
    """True R^2 0.5: in sample 0.5 + 0.5 rank / (n - 1) is expected; held-out tokens say less than 0.5, as the fit is worse."""
    d, A = 40, randn(40, 40, seed=7) / 40**0.5
    n, got = round(ratio * d), []
    for seed in range(12):
        (x, y), (x2, y2) = ((x, x @ A + randn(len(x), d, seed=seed + 50)) for x in (randn(n, d, seed=seed),
                                                                                    randn(500, d, seed=seed + 100)))
        got.append(score(x, y, x2, y2))
    mean = {k: sum(g[k] for g in got) / 12 for k in ("full", "full_adjusted", "full_held_out")}
    assert mean["full"] == pytest.approx(0.5 + 0.5 * d / (n - 1), abs=0.01)
    assert mean["full_adjusted"] == pytest.approx(0.5, abs=0.02) and mean["full_held_out"] < 0.49


@pytest.mark.parametrize("r, expected", [(0.1, 0.990), (0.2, 0.962)])
def test_a_block_that_adds_noise_of_ratio_r_scores_one_over_one_plus_r_squared(r, expected):
    x = randn(20_000, 4)
    assert score(x, x + r * randn(20_000, 4, seed=1))["full"] == pytest.approx(expected, abs=2e-3)


def test_nearly_linear_with_a_strongly_non_linear_block():
    """S_free = 0.6 and ||D|| / ||Y|| = 0.158 make S_full = 0.99: the residual connection does it."""
    x, noise = randn(50_000, 3), randn(50_000, 3, seed=1)
    y = x + 0.16 * (0.6**0.5 * x @ torch.linalg.qr(randn(3, 3, seed=2)).Q + 0.4**0.5 * noise)
    got = score(x, y)
    assert got["free"] == pytest.approx(0.6, abs=0.01) and got["full"] == pytest.approx(0.99, abs=0.002)


def test_a_final_layernorm_leaves_rank_d_minus_1_and_ill_conditioned_states_are_solved():
    x = F.layer_norm(randn(500, 10), (10,))
    y = block(x)
    got = score(x, y)
    U = torch.linalg.svd(x - x.mean(0), full_matrices=False).U[:, :9]
    yc = y - y.mean(0)
    assert got["rank"] == 9 and got["full"] == pytest.approx(((U.mT @ yc).norm() / yc.norm()).item() ** 2, abs=1e-9)
    U, turn = torch.linalg.qr(randn(500, 10)).Q, torch.linalg.qr(randn(10, 10, seed=1)).Q
    x = U @ torch.diag(torch.logspace(0, -6, 10, dtype=torch.float64)) @ turn  # condition 1e6
    y = block(x)
    assert score(x, y)["full"] == pytest.approx(by_svd(x, y), abs=1e-9)


def test_a_block_that_adds_nothing_has_no_residual_free_score():
    x = randn(100, 5) + 1e3
    got = score(x, x.clone())
    assert math.isnan(got["free"]) and got["full"] == pytest.approx(1.0) and got["cosine"] == pytest.approx(1.0)


def test_held_out_is_the_r_squared_of_the_fitted_affine_map():
    x, x2 = randn(60, 7) + 2, randn(50, 7, seed=1) * 1.3 + 1
    y, y2 = block(x) + 0.3 * randn(60, 7, seed=2), block(x2) + 0.3 * randn(50, 7, seed=3)
    got = score(x, y, x2, y2)
    ones, ones2 = torch.ones(60, 1, dtype=torch.float64), torch.ones(50, 1, dtype=torch.float64)
    for name, target, target2 in (("full", y, y2), ("free", y - x, y2 - x2)):
        A = torch.linalg.lstsq(torch.cat((x, ones), 1), target).solution
        error = (torch.cat((x2, ones2), 1) @ A - target2).square().sum()
        expected = 1 - (error / (target2 - target2.mean(0)).square().sum()).item()
        assert got[f"{name}_held_out"] == pytest.approx(expected, abs=1e-9)


def test_few_distinct_tokens_do_not_break_the_score():
    """200 distinct rows in 256 dimensions: without a cut-off on the singular values the score is garbage."""
    rows = randn(200, 256)[torch.randint(200, (4000,), generator=torch.Generator().manual_seed(0))]
    y = rows @ randn(256, 256, seed=1) / 16 + 3.2 * randn(4000, 256, seed=2) / 10
    got = score(rows, y)
    centred = rows - rows.mean(0)
    U, s, _ = torch.linalg.svd(centred, full_matrices=False)
    U = U[:, s > 1e-9 * s[0]]
    assert got["rank"] == U.shape[1] <= 199
    yc = y - y.mean(0)
    assert got["full"] == pytest.approx(((U.mT @ yc).norm() / yc.norm()).item() ** 2, abs=1e-9)
    assert score(randn(10, 30), randn(10, 30, seed=1))["full"] == pytest.approx(1.0), "as many tokens as dimensions"


def test_a_few_massive_rows_make_anything_look_linear_and_position_0_can_be_left_out():
    x, y = randn(2000, 16), randn(2000, 16, seed=1)
    x[:20, 0] += 300.0
    y[:20, 0] += 300.0
    assert score(x, y)["full"] > 0.8 and score(x[20:], y[20:])["full"] < 0.03


def test_profile_reads_the_states_of_each_block():
    model = tiny_model(n_layer=3)
    with torch.no_grad():  # a block that only rotates its input is linear
        for p in (model.blocks[1].mixer.o.weight, model.blocks[1].mlp.down.weight):
            p.zero_()
    batches = [torch.randint(97, (4, 32), generator=torch.Generator().manual_seed(i)) for i in range(6)]
    profile = linearity_profile(model, batches)
    assert [p["block"] for p in profile] == [1, 2, 3] and profile[1]["full"] == pytest.approx(1.0)
    assert profile[0]["n"] == 3 * 4 * 32 and 0 < profile[0]["free"] < 0.99
    with torch.no_grad():
        _, (h0, h1) = model.trunk(torch.cat(batches[::2]), hidden=(0, 1))
    assert profile[0]["full"] == pytest.approx(by_svd(h0.flatten(0, 1).double(), h1.flatten(0, 1).double()), abs=1e-6)
    skipped = linearity_profile(model, batches, skip_first=True)
    assert skipped[0]["n"] == 3 * 4 * 31


def test_linearity_of_a_checkpoint_from_the_command_line(tiny, tmp_path):
    ckpt = train_module.train(tiny(steps=3))["checkpoint"]
    (tmp_path / "text.txt").write_text("def alpha(beta):\n    return 1\n" * 60)
    done = run_python(ROOT / "probes.py", "linearity", ckpt, "--text", tmp_path / "text.txt", "--plot", tmp_path / "a.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG") and "free_held_out" in done.stdout
    lines = [line.split() for line in done.stdout.splitlines()[2:]]
    assert [line[0] for line in lines] == ["1", "2", "full_held_out", "free_held_out"]
    assert [len(line[1]) for line in lines[2:]] == [2, 2] and bars([0, 0.5, 0.999, 1, 2, -1], 0, 1) == "▁▅███▁"
    (tmp_path / "short.txt").write_text("too short")
    done = run_python(ROOT / "probes.py", "linearity", ckpt, "--text", tmp_path / "short.txt")
    assert done.returncode == 2 and "at least 128, four times the width, are needed" in done.stderr


@pytest.mark.parametrize("kind, reduction", [("cosine", "sum"), ("cosine", "mean"), ("mse", "sum"), ("mse", "mean")])
def test_penalty_is_the_formula(kind, reduction):
    states = [randn(2, 3, 5, seed=i) for i in range(4)]
    terms = []
    for a, b in zip(states, states[1:]):
        tokens = [(x, y) for x, y in zip(a.flatten(0, 1), b.flatten(0, 1))]
        terms.append(sum(1 - x @ y / x.norm() / y.norm() if kind == "cosine" else ((x - y) ** 2).sum() for x, y in tokens) / 6)
    expected = sum(terms) / (3 if reduction == "mean" else 1)
    assert linearity_penalty(states, kind, reduction).item() == pytest.approx(expected.item(), rel=1e-5)
    scales = stream_scales(states)
    assert scales["cosine"][0] == pytest.approx(F.cosine_similarity(states[0], states[1], dim=-1).mean().item(), rel=1e-5)
    assert scales["norm"][2] == pytest.approx(states[3].norm(dim=-1).mean().item(), rel=1e-5)
    assert scales["ratio"][1] == pytest.approx(((states[2] - states[1]).norm(dim=-1) / states[2].norm(dim=-1)).mean().item(),
                                               rel=1e-5)


@pytest.mark.parametrize("stop, free", [("none", {0, 1, 2}), ("lower", {1, 2}), ("upper", {0, 1})])
def test_penalty_stops_the_gradient_where_it_is_told(stop, free):
    states = [randn(1, 2, 4, seed=i).requires_grad_() for i in range(3)]
    linearity_penalty(states, "mse", stop_gradient=stop).backward()
    assert {i for i, h in enumerate(states) if h.grad is not None and h.grad.any()} == free
    if stop == "lower":  # state 1 is moved towards state 0 alone
        torch.testing.assert_close(states[1].grad, (2 * (states[1] - states[0]) / 2).detach(), rtol=1e-5, atol=1e-6)
    states, same = ([randn(2, 3, 4, seed=i).requires_grad_() for i in range(3)] for _ in range(2))
    linearity_penalty(states, "cosine", stop_gradient=stop).backward()
    for a, b in zip(same, same[1:]):
        (1 - F.cosine_similarity(a.detach() if stop == "lower" else a, b.detach() if stop == "upper" else b, dim=-1)).mean().backward()
    for h, other in zip(states, same):
        torch.testing.assert_close(h.grad if h.grad is not None else 0 * h, other.grad if other.grad is not None else 0 * h,
                                   rtol=1e-5, atol=1e-6)


def test_the_penalty_in_a_run_pulls_states_together_and_is_none_at_weight_0(tiny, tmp_path):
    def run(**flags):
        return train_module.train(tiny(steps=20, eval_every=20, **flags, out_dir=str(tmp_path / str(len(list(tmp_path.iterdir()))))))
    plain, zero, strong = run(), run(linearity="cosine", linearity_weight=0.0), run(linearity="cosine", linearity_weight=5.0)
    weak = run(linearity="cosine", linearity_weight=1e-6, linearity_from=1)
    assert plain["val_loss"] == zero["val_loss"]
    last = [[h for h in r["history"] if "stream" in h][-1] for r in (strong, weak)]
    assert len(last[0]["stream"]["cosine"]) == 2 and len(last[1]["stream"]["cosine"]) == 1
    assert last[0]["stream"]["cosine"][1] > last[1]["stream"]["cosine"][0]
    assert last[0]["linearity_loss"] == pytest.approx(sum(1 - c for c in last[0]["stream"]["cosine"]), rel=0.05)


# ----------------------------------------------------------------------------------------------------------------------
# Tables over runs


def write_run(folder, losses, seconds_per_step=2.0):
    folder.mkdir(parents=True)
    lines = [{"step": 10 * i, "flops": 1000 * i, "seconds": 10 * i * seconds_per_step, "val_loss": loss,
              "bits_per_byte": loss / 2} for i, loss in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 1}\n')
    return str(folder)


def test_compare_finds_where_a_run_reaches_the_reference(tmp_path):
    """By hand: the plain runs end at 3.0 and 4.0 after 30 steps. LET passes 3.0 half-way from step 10 (3.5) to 20 (2.5), so at
    step 15 of 30, 50 %; the other seed reaches 4.0 exactly at step 20, 66.7 %. Seconds run 1.5 times as fast there."""
    runs = [write_run(tmp_path / "plain-0", [8, 5, 4, 3.0]), write_run(tmp_path / "plain-1", [8, 6, 5, 4.0]),
            write_run(tmp_path / "let-0", [8, 3.5, 2.5, 2.0], 3.0), write_run(tmp_path / "let-1", [8, 5, 4.0, 3.5], 3.0),
            write_run(tmp_path / "worse-1", [8, 7, 6, 5.0])]
    header, rule, plain, let, worse = compare(runs).splitlines()
    cells = [cell.strip() for cell in let.strip("| ").split("|")]
    assert cells == ["let", "2", "2.7500 ± 1.0607", "-0.7500 ± 0.3536", "1.3750 ± 0.5303", "58.3 ± 11.8 %", "58.3 ± 11.8 %",
                     "87.5 ± 17.7 %"]
    assert plain.split("|")[6:9] == [" 100.0 ± 0.0 % "] * 3
    assert worse.count("never") == 3
    assert header.count("|") == rule.count("|") == let.count("|")


@pytest.mark.parametrize("broken,why", [("name", "has to end in -SEED"), ("empty", "no evaluation"), ("text", "not the metrics"),
                                        ("none", "not the metrics"), ("seed", "no run of this seed")])
def test_compare_refuses_what_is_no_run(tmp_path, broken, why):
    runs = [write_run(tmp_path / "plain-0", [8, 5])]
    if broken == "name":
        runs.append(write_run(tmp_path / "let", [8, 5]))
    elif broken == "seed":
        runs.append(write_run(tmp_path / "let-1", [8, 5]))
    else:
        runs.append(str(tmp_path / "let-0"))
        if broken != "none":
            (tmp_path / "let-0").mkdir()
            (tmp_path / "let-0" / "metrics.jsonl").write_text('{"step": 1}\n' if broken == "empty" else "{")
    with pytest.raises(BadInput, match=why):
        compare(runs)


def test_a_run_that_did_not_finish_is_not_taken_for_a_final_loss(tmp_path):
    runs = [write_run(tmp_path / "plain-0", [8, 5, 4]), write_run(tmp_path / "wild-0", [8, 5, 4])]
    for run, steps in zip(runs, (20, 30)):
        (tmp_path / run / "config.json").write_text(json.dumps({"steps": steps}))
    plain, wild = compare(runs).splitlines()[2:]
    assert "| 4.0000 |" in plain and "1 of 1 did not finish" in wild and "| 4.0000" not in wild


def test_a_run_that_begins_below_the_reference_reaches_it_at_once(tmp_path):
    runs = [write_run(tmp_path / "plain-0", [8, 5, 4]), write_run(tmp_path / "branch-0", [3, 3.5, 2])]
    assert compare(runs).splitlines()[3].count(" 0.0 % ") == 3


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path):
    run = write_run(tmp_path / "plain-0", [8, 5])
    with open(tmp_path / "plain-0" / "metrics.jsonl", "a") as file:
        file.write('{"step": 20, "val_l')
    assert "5.0000" in compare([run])


def test_two_folders_of_one_name_are_refused(tmp_path):
    with pytest.raises(BadInput, match="second folder of this name"):
        compare([write_run(tmp_path / "x" / "a-0", [8, 5]), write_run(tmp_path / "y" / "a-0", [8, 5])])


def test_a_folder_that_two_patterns_name_counts_once(tmp_path):
    runs = [write_run(tmp_path / "a-0", [8, 5]), write_run(tmp_path / "b-0", [8, 4])]
    assert compare([*runs, runs[0], runs[1] + "/"]) == compare(runs)


def test_nothing_is_measured_against_a_run_that_did_not_finish(tmp_path):
    runs = [write_run(tmp_path / "wild-0", [8, 5, 4]), write_run(tmp_path / "plain-0", [8, 5, 4])]
    (tmp_path / "wild-0" / "config.json").write_text('{"steps": 30}')
    assert "| 4.0000 | the first did not finish |" in compare(runs) and compare(runs).splitlines()[3].count("never") == 3


@pytest.mark.parametrize("file, text", [("metrics.jsonl", '{"step": 1, "val_loss": "low"}'), ("metrics.jsonl", '{"val_loss": 1}'),
                                        ("config.json", "{"), ("config.json", "[]"), ("config.json", '{"steps": "x"}')])
def test_files_that_are_none_of_a_run_are_refused_by_name(tmp_path, file, text):
    run = write_run(tmp_path / "a-0", [8, 5])
    (tmp_path / "a-0" / file).write_text(text)
    with pytest.raises(BadInput, match=f"a-0/{file}: not the"):
        compare([run])


def write_sweep(folder, name, scale=1.0):
    """Final losses 2 and 4 at X = 0.5, 3 and 3 at X = 8; RMS W 0.1 * scale and 0.4 * scale at the first seed and the other."""
    runs = []
    for x, losses in (("8", (3.0, 3.0)), ("0.5", (2.0, 4.0))):
        for seed, loss in enumerate(losses):
            run = folder / f"{name}@{x}-{seed}"
            write_run(run, [8, loss])
            weights = {"head": {"rms": 0.1 * 4**seed * scale, "rms_effective": 1.0}}
            line = {"step": 20, "val_loss": loss, "bits_per_byte": 1.0, "flops": 1, "seconds": 1, "weights": weights}
            with open(run / "metrics.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
            runs.append(str(run))
    return runs


def test_sweep_gives_mean_and_sd_by_x_in_order(tmp_path):
    runs = write_sweep(tmp_path, "with-dash") + write_sweep(tmp_path, "b", 10.0)[:2]
    assert list(read_sweep(runs)) == ["with-dash", "b"]
    text = sweep(runs, "head")
    assert "| run | 0.5 | 8 |" in text
    assert f"| with-dash | 3.000 ± {math.sqrt(2):.3f} | 3.000 ± 0.000 |" in text
    assert "| with-dash | 0.2 → 1 | 0.2 → 1 |" in text, "geometric mean of 0.1 and 0.4"
    assert "| b |  | 2 → 1 |" in text


def test_a_sweep_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    plot_sweep(write_sweep(tmp_path, "a"), "head", str(tmp_path / "a.png"))
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name, piece, why", [("a-0", "head", "NAME@X-SEED"), ("a@x-0", "head", "NAME@X-SEED"),
                                              ("a@-1-0", "head", "NAME@X-SEED"), ("a@2-0", "tail", "--piece=tail")])
def test_sweep_refuses_what_is_none(tmp_path, name, piece, why):
    run = write_run(tmp_path / name, [8, 5])
    with pytest.raises(BadInput, match=why):
        sweep([run], piece)
