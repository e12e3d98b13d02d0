"""lr_law.py: fits, intervals and sweeps against values by hand, transfer against the papers."""
import csv
import json
import math
import multiprocessing
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import flags_of

import lr_law
import train
from lr_law import COLUMNS, fit_horizon, fit_law, fit_parabola, fit_slices, main, published
from model import GPT, BadInput, ModelConfig, load_checkpoint

LR = np.geomspace(1e-3, 1e-1, 7)


@pytest.mark.exercise("fit_parabola")
def test_a_parabola_is_the_least_squares_fit_in_the_log_of_the_rate():
    """Its residuals are orthogonal to the powers 0, 1 and 2 of ln lr - ln lr*."""
    x = np.log(LR)
    loss = 3 + 0.02 * (x + 4.6) ** 2 + 0.006 * np.random.default_rng(0).standard_normal(7)
    got = fit_parabola(LR, loss)
    u = x - math.log(got["lr"])
    left = loss - got["L_min"] - got["C"] * u**2
    assert [(left * u**power).sum() for power in range(3)] == pytest.approx([0, 0, 0], abs=1e-9)
    assert got["r2"] == pytest.approx(1 - left.var() / loss.var(), abs=1e-6)
    assert got["C"] == pytest.approx(0.02, rel=0.5) and 0.9 < got["r2"] < 0.999


@pytest.mark.exercise("fit_parabola")
def test_a_parabola_is_found_from_three_points_and_its_rate_is_held_within_floats():
    lr = np.array([0.01, 0.02, 0.08])
    for C, best in ((0.3, 0.03), (0.3, 5.0), (-0.2, 1e-5)):  # its vertex may be far outside
        got = fit_parabola(lr, [2 + C * math.log(rate / best) ** 2 for rate in lr])
        expected = {"lr": best, "L_min": 2, "C": C, "r2": 1}
        assert got == pytest.approx(expected, rel=1e-6)
    for sign in (1, -1):
        nearly_straight = fit_parabola(lr, sign * np.log(lr) + 1e-7 * np.log(lr) ** 2)
        assert math.log(nearly_straight["lr"]) == pytest.approx(-700 * sign)
    assert math.isnan(fit_parabola(lr, [0, 0, 0])["lr"])


@pytest.mark.parametrize("loss", [3 - np.log(LR), 3 - 0.1 * np.log(LR / 0.01) ** 2,
                                  3 + 0.1 * np.log(LR / 5.0) ** 2, np.full(7, 3.0)])
def test_a_slice_without_a_minimum_in_the_sweep_says_so(loss):
    runs = runs_of((1.0, 1.0, lr, value, "") for lr, value in zip(LR, loss, strict=True))
    assert not fit_slices(runs, 10.0)[0].inside


def test_the_basin_is_the_unbroken_valley_and_a_neighbor_on_each_side_of_the_lowest_loss():
    assert lr_law.basin([2.09, 2.2, 2.08, 2.0, 2.05, 2.3, 2.01]) == slice(2, 5)
    assert lr_law.basin([3.0, 2.0, 2.05], 1.0) == slice(0, 3) == lr_law.basin([2.0, 2.05, 2.04])
    steep = [9.0, 2.0, 7.0, 8.0]  # as of few rates, far apart
    assert lr_law.basin(steep) == slice(0, 3) and lr_law.basin(steep[1:]) == slice(0, 2)
    lr, loss = np.array([1, 2, 4, 8, 16]) * 1e-3, np.array([2.25, 2.10, 2.03, 2.00, 2.12])
    found, = fit_slices(runs_of((1.0, 1.0, *point, "") for point in zip(lr, loss, strict=True)))
    c2, c1, _ = np.polyfit(np.log(lr[1:]), loss[1:], 2)
    assert found.inside and found.lr == pytest.approx(math.exp(-c1 / (2 * c2)), rel=1e-9)


@pytest.mark.exercise("fit_horizon")
@pytest.mark.parametrize("L_0, A, gamma", [(1.7, 400.0, 0.32), (0.5, 12.0, 0.08), (2.0, 3e4, 0.9)])
def test_a_horizon_fit_gives_its_constants_back_and_keeps_gamma_within_bounds(L_0, A, gamma):
    D = np.geomspace(1e7, 1e9, 6)
    loss = L_0 + A * D**-gamma
    assert tuple(fit_horizon(D, loss).values()) == pytest.approx((L_0, A, gamma), rel=1e-5)
    for outside, bound in ((1e-3, 0.01), (5.0, 3.0)):
        found = fit_horizon(D, L_0 + (D / 1e7) ** -outside)["gamma"]
        assert found == pytest.approx(bound, rel=1e-9)


@pytest.mark.exercise("fit_horizon")
@pytest.mark.parametrize("L_0", [0.0, 1.7])
def test_a_horizon_fit_of_noisy_losses_cannot_be_bettered_nearby(L_0):
    rng, D = np.random.default_rng(0), np.geomspace(1e7, 1e9, 6)
    for _ in range(5):
        y = L_0 + 3 * (D / 1e8) ** -0.5 + 0.05 * rng.standard_normal(6)

        def cost(L_0, A, gamma, y=y):
            return ((L_0 + A * D**-gamma - y) ** 2).sum()

        got = fit_horizon(D, y)
        assert got["L_0"] >= 0 and got["A"] >= 0
        for size in (1e-4, 1e-2, 0.3):
            for k in rng.standard_normal((50, 3)):
                other = [value * math.exp(size * e) for value, e in zip(got.values(), k)]
                other[0] += abs(k[2]) * size * (got["L_0"] == 0)
                assert cost(*other) >= (1 - 1e-9) * cost(**got)


def moving(D, lr):
    """A loss whose optimum falls with the horizon, exactly L_0 + A D^-gamma at each rate."""
    u = np.log(lr / 0.01)
    return 2 + 0.05 * u**2 + (40 - 3 * u) * (D / 1e5) ** -0.5 / 40


def runs_of(rows):
    return [dict(zip(("N", "D", "lr", "loss", "group"), row, strict=True)) for row in rows]


def test_an_extrapolated_horizon_has_the_losses_and_the_optimum_of_runs_there(tmp_path, capsys):
    """What other choices of the learning rate cost on these runs is computed by hand."""
    rows = [(N, d, lr * (1 + 4e-3 * (d == 2e5)), N / 1e6 + moving(d, lr), "") for N in (1e5, 2e5)
            for d in (1e5, 2e5, 4e5, 3.2e6) for lr in LR]  # rates of one horizon are rounded
    runs = runs_of(rows)
    predicted = lr_law.extrapolate(runs, 3.2e6)
    assert len(predicted) == 14 and {run["D"] for run in predicted} == {3.2e6}
    for run in predicted:
        assert run["loss"] == pytest.approx(run["N"] / 1e6 + moving(3.2e6, run["lr"]), abs=1e-4)
    assert not lr_law.extrapolate(runs, 4e5), "two shorter horizons are too few"
    path, law = write_table(tmp_path / "runs.csv", rows), tmp_path / "law.json"
    main(["fit", path, "--extrapolate=3.2e6", "-o", str(law), "--basin=9"])
    assert "14 losses at D = 3.2e+06" in capsys.readouterr().out
    assert lr_law.load_law(law, "--law")["D"] == [1e5, 3.2e6]
    fitted = fit_slices([r for r in runs if r["D"] < 3e6] + predicted, 9)
    costs = lr_law.check_horizon(fitted, runs, 3.2e6, 9)
    assert costs["the predicted losses"].shape == (2,)
    assert costs["the predicted losses"].max() < 1e-7
    (c2, c1, _), (d2, d1, _) = (np.polyfit(np.log(LR), moving(d, LR), 2) for d in (3.2e6, 4e5))
    expected = c2 * (c1 / (2 * c2) - d1 / (2 * d2)) ** 2
    assert costs["the longest run's lr*"] == pytest.approx([expected, expected], rel=1e-6)
    assert not lr_law.check_horizon([f for f in fitted if f.D > 3e5], runs, 3.2e6, 9), "too few"


@pytest.mark.exercise("fit_law")
def test_a_law_and_its_covariance_by_hand():
    """ln N and ln D take 1 - 1 and 1 + 1, each pair twice. About their means the columns are
    orthogonal: b has variance s^2 / 8, and a = (mean of ln lr*) - b - c."""
    signs = np.array([(1, 1), (1, -1), (-1, 1), (-1, -1)] * 2)
    e = np.array([1, -1, -1, 1, -2, 2, 2, -2]) * 0.1  # orthogonal to 1 and to both columns
    law = fit_law(*np.exp(1 + signs).T, np.exp(0.5 - 0.2 * signs[:, 0] + 0.3 * signs[:, 1] + e))
    assert [law[k] for k in "abc"] == pytest.approx([0.5 + 0.2 - 0.3, -0.2, 0.3])
    v = (e**2).sum() / 5 / 8
    expected = v * np.array([[3, -1, -1], [-1, 1, 0], [-1, 0, 1]])
    np.testing.assert_allclose(law["covariance"], expected, atol=1e-12)
    assert (law["n"], law["dof"]) == (8, 5)
    assert law["N"] == law["D"] == pytest.approx([1, math.exp(2)])
    assert law["r2"] == pytest.approx(1 - 0.2 / (0.2 + 8 * 0.13))


@pytest.mark.exercise("fit_law")
def test_a_law_of_one_size_or_one_horizon_has_no_exponent_for_it():
    x, e = np.array([0.0, 1.0, 2.0]), np.array([0.1, -0.2, 0.1])
    same = np.full(3, 7.0)
    for key, other, where, args in (("b", "c", 2, (same, np.exp(x))),
                                    ("c", "b", 1, (np.exp(x), same))):
        law = fit_law(*args, np.exp(1 - 0.5 * x + e))
        assert law[key] is None and law["dof"] == 1
        assert (law["a"], law[other]) == pytest.approx((1, -0.5))
        covariance = np.array(law["covariance"])
        assert covariance[where, where] == pytest.approx(0.06 / 2)  # s^2 / sum (x - mean)^2
        assert not covariance[3 - where].any() and not covariance[:, 3 - where].any()
    law = fit_law(same[:2], same[:2], np.array([1.0, 4.0]))
    assert (law["b"], law["c"], law["a"]) == (None, None, pytest.approx(math.log(2)))


@pytest.mark.exercise("fit_law")
@pytest.mark.parametrize("points", [
    [], [(1, 1)], [(1, 1), (2, 1), (2, 3)], [(1, 2), (2, 4), (4, 8), (8, 16)]])
def test_points_that_are_too_few_or_on_one_line_make_no_law(points):
    N, D = np.array(points, float).reshape(-1, 2).T
    with pytest.raises(BadInput, match=str(len(points))):
        fit_law(N, D, np.ones(len(points)))


def hand_law(**changes):
    return {"a": -1.0, "b": -0.2, "c": 0.5, "dof": 2, "N": [1e6, 1e8], "D": [1e8, 1e9],
            "covariance": np.diag([0.01, 0.0004, 0.0]).tolist(), **changes}


@pytest.mark.exercise("predict_law")
@pytest.mark.parametrize("N, D, decades", [
    (1e7, 2e8, 0.0), (1e9, 1e9, 1.0), (1e5, 5e8, 1.0), (1e7, 1e11, 2.0), (1e10, 1e7, 2.0)])
def test_a_prediction_is_the_law_with_its_t_interval(N, D, decades):
    at = lr_law.predict_law(hand_law(), N, D)
    lr = math.exp(-1) * N**-0.2 * D**0.5
    half = 2.919986 * math.sqrt(0.01 + 0.0004 * math.log(N) ** 2)  # of Student's t, 2 dof, 90 %
    assert at["lr"] == pytest.approx(lr) and at["decades"] == pytest.approx(decades, abs=1e-9)
    assert at["interval"] == pytest.approx([lr * math.exp(-half), lr * math.exp(half)], rel=1e-5)
    assert at["unknown"] == []
    wide = lr_law.predict_law(hand_law(dof=1), N, D)["interval"]  # t = 6.313752
    assert wide[1] / lr == pytest.approx(math.exp(half * 6.313752 / 2.919986), rel=1e-5)
    correlated = hand_law(covariance=[[0, 0, 0.001], [0, 0, 0], [0.001, 0, 0.01]])
    at = lr_law.predict_law(correlated, N, D)
    half = 2.919986 * math.sqrt(0.002 * math.log(D) + 0.01 * math.log(D) ** 2)
    assert math.log(at["interval"][1] / lr) == pytest.approx(half, rel=1e-5)


@pytest.mark.exercise("predict_law")
def test_a_prediction_names_what_its_law_does_not_know():
    law = hand_law(b=None, N=[1e6, 1e6])
    for N, unknown in ((1e6, []), (1.005e6, []), (0.995e6, []), (1.02e6, ["N"]), (1e5, ["N"])):
        at = lr_law.predict_law(law, N, 2e8)
        assert at["unknown"] == unknown and at["lr"] == pytest.approx(math.exp(-1) * 2e8**0.5)
    both = hand_law(b=None, c=None, N=[1e6, 1e6], D=[1e8, 1e8])
    assert lr_law.predict_law(both, 1e7, 1e9)["unknown"] == ["N", "D"]


def test_an_interval_covers_the_truth_nine_times_in_ten():
    """Four optima at two sizes and two horizons, which scatter by 10 % around a law."""
    N, D = np.array([1e6, 1e6, 1e8, 1e8]), np.array([1e8, 1e10, 1e8, 1e10])
    rng, covered = np.random.default_rng(1), 0
    for _ in range(1000):
        law = fit_law(N, D, true_rate(N, D) * np.exp(0.1 * rng.standard_normal(4)))
        low, high = lr_law.predict_law(law, 1e9, 1e11)["interval"]
        covered += low <= true_rate(1e9, 1e11) <= high
    assert 870 <= covered <= 930


def test_near_optima_take_the_best_group():
    rows = [(1.0, 1.0, lr, loss, g) for lr, loss, g in (
        (1.0, 2.0, "a"), (4.0, 2.001, "b"), (64.0, 2.5, "a"), (0.1, 3.0, "b"))]
    found, = lr_law.near_optima(runs_of(rows))
    assert (found.N, found.D, found.lr) == pytest.approx((1.0, 1.0, 2.0))


def test_holding_out_the_largest_size_costs_what_it_should(tmp_path):
    """Two batches, each with a law of its own, fitted on the smaller sizes: it costs nothing at the
    largest. What Step Law costs there is computed by hand."""
    def best(N, D, group):
        first, power = {"a": (0.02, -0.3), "b": (0.05, 0.2)}[group]
        return first * (N / 1e6) ** -0.2 * (D / 1e8) ** power

    factors = np.array([0.25, 0.5, 1, 2, 4])
    slices = [(D, g) for D in (1e8, 2e8, 4e8) for g in "ab"]
    rows = [(N, D, f * best(N, D, g), 2 + 0.05 * math.log(f) ** 2, g) for N in (1e6, 2e6, 4e6)
            for D, g in slices for f in factors]
    edge = [(4e6, 8e8, f * 0.01, 2 - 0.1 * math.log(f), "a") for f in (1, 2, 4)]  # does not count
    costs = lr_law.hold_out(runs_of(rows + edge))
    assert np.abs(costs["its group's law"]).max() < 1e-12
    assert costs["the joint law"].min() > 1e-3
    off = np.array([math.log(published("step", 4e6, D) / best(4e6, D, g)) for D, g in slices])
    np.testing.assert_allclose(costs["Step Law, published"], 0.05 * off**2, rtol=1e-6)
    one_size = write_table(tmp_path / "one.csv", [row for row in rows if row[0] == 1e6])
    with pytest.raises(BadInput, match="one.csv.*--hold_out.*1e.06"):
        main(["fit", one_size, "--group=bs", "--hold_out"])
    said = lr_law.report(hand_law(r2=1.0, n=4), fit_slices(runs_of(rows))[::7], 0)
    assert "alone" not in "".join(said), "3 optima give neither group a law"


def test_published_laws_have_their_published_values():
    """Values and ratios of the papers' notes; those at 1B parameters and 20B tokens by hand."""
    assert published("step", 4e9, 1.2e11) == pytest.approx(6.4e-4, rel=0.02)
    assert published("bjorck", 4e9, 1.2e11) == pytest.approx(2.4e-4, rel=0.05)
    assert published("bjorck", 1e9, 1e9) == pytest.approx(1.55e-3)
    ratio = published("zhou", 12e9, 5e11, anchor=(4e9, 1.2e11, 1.0))
    assert ratio == pytest.approx(0.475, abs=0.001)
    for name, rate in {"kaplan": 3.481e-4, "deepseek": 9.638e-4, "porian": 2.129e-3,
                       "minicpm": 0.01, "ling": 9.850e-4}.items():
        assert published(name, 1e9, 2e10) == pytest.approx(rate, rel=1e-3), name


def write_table(path, rows, header="N,D,lr,loss,bs"):
    with open(path, "w", newline="") as file:
        file.write(header + "\n")
        csv.writer(file).writerows(rows)
    return str(path)


def true_rate(N, D):
    """The law of Zhou et al. 2026."""
    return 38.4588 * N**-0.2219 * D**-0.3509


SWEPT = [(N, D, f * true_rate(N, D), 2 + 0.05 * math.log(f) ** 2, "64")
         for D in (1e8, 1e9, 1e10) for N in (1e6, 1e7, 1e8) for f in (0.25, 0.5, 1, 2, 4)]


def test_from_a_table_to_a_law_to_a_rate(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    diverged = [(1e6, 1e8, 5.0, "nan", "64"), (1e6, 1e8, 9.0, "inf", "64")]
    table = write_table(tmp_path / "runs.csv", SWEPT + diverged)
    law, picture = tmp_path / "law.json", tmp_path / "law.png"
    main(["fit", table, "--group=bs", "--joint", "-o", str(law), f"--plot={picture}"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "2 diverged" in out and "N^-0.222" in out and "D^-0.351" in out
    main(["predict", f"--law={law}", "--n_params=1e7", "--tokens=1e12"])
    out = capsys.readouterr().out
    assert float(out.split()[1]) == pytest.approx(true_rate(1e7, 1e12), rel=1e-3)
    assert "2.00 decades" in out
    table = write_table(tmp_path / "one.csv", [row for row in SWEPT if row[0] == 1e6])
    main(["fit", table, "-o", str(law)])
    out = capsys.readouterr().out
    assert "D^-0.351" in out and "N^" not in out and "leaves N out" in out
    assert lr_law.load_law(law, "--law")["b"] is None


def test_a_rate_at_which_one_seed_diverged_is_not_scored_by_the_others(tmp_path):
    rows = [(1e6, 1e8, 0.01, 2, "a"), (1e6, 1e8, 0.02, 1, "a"), (1e6, 1e8, 0.02, "inf", "a"),
            (1e6, 1e8, 0.02, 3, "b"), (1e6, 2e8, 0.02, 4, "a")]
    runs, left_out = lr_law.read_points(write_table(tmp_path / "runs.csv", rows), group="bs")
    assert [run["loss"] for run in runs] == [2, 3, 4] and left_out == 2


@pytest.mark.parametrize("end", ["\n", "\n\n", "\r\n"], ids=repr)
def test_a_table_saved_by_a_spreadsheet_is_the_same_table_to_every_command(end, tmp_path):
    """A byte order mark, blank lines, other line ends; an empty loss is a run that diverged."""
    rows = [[1000, 2560, lr, loss, 0, 2, 32, 0, 0, SMALL] for lr, loss in ((0.1, 3), (0.2, ""))]
    text = end.join(",".join(map(str, row)) for row in [COLUMNS, *rows]) + end
    path = tmp_path / "runs.csv"
    path.write_text(text, newline="", encoding="utf-8-sig")
    runs, left_out = lr_law.read_points(path, group="seed,n_layer")
    assert runs == runs_of([(1000, 2560, 0.1, 3, "0,2")]) and left_out == 1
    before = path.read_bytes()
    assert lr_law.sweep_rows(path) == {(1000, 2560, lr, 0): SMALL for lr in (0.1, 0.2)}
    assert path.read_bytes() == before
    path.write_bytes(before.replace(b"seed", b"loss"))
    with pytest.raises(BadInput, match=r"runs.csv\W.*\bloss\b"):
        lr_law.read_points(path)
    path.write_bytes(before + b"1,2,3\n")
    number = 7 if end == "\n\n" else 4
    for read in (lr_law.read_points, lr_law.sweep_rows):
        with pytest.raises(BadInput, match=rf"runs.csv\W+line {number}\b"):
            read(path)


@pytest.mark.parametrize("change", [
    {"version": "nanolet-law-1"}, {"a": None}, {"a": math.nan}, {"a": "1"}, {"a": 10**400},
    {"b": math.inf}, {"N": [0, 1]}, {"N": [1]}, {"N": []}, {"D": [[1, 2]]}, {"dof": 0},
    {"dof": None}, {"covariance": [[1.0]]}, {"covariance": [[math.nan] * 3] * 3}],
    ids=lambda v: str(v)[:40])
def test_a_file_that_is_no_sound_law_is_refused(tmp_path, change):
    path, good = tmp_path / "law.json", hand_law(version="nanolet-law-2")
    path.write_text(json.dumps(good))
    assert lr_law.load_law(path, "--law") == good
    path.write_text(json.dumps(good | change))
    with pytest.raises(BadInput, match=f"--law={path}"):
        lr_law.load_law(path, "--law")


def test_plan_counts_runs_and_flops(capsys):
    main(["plan", "--sizes=2x64,4x128", "--lrs=1e-3:1e-1:5", "--tokens=204800,409600",
          "--flops_per_second=1e12", "--", "--vocab_size=1024", "--block_size=128"])
    out, total = capsys.readouterr().out, 0.0
    for n_layer, n_embd in ((2, 64), (4, 128)):
        model = GPT(ModelConfig(1024, n_layer=n_layer, n_embd=n_embd, block_size=128))
        total += 5 * model.flops_per_token() * 409_600
        assert f"N {model.num_params() - 1024 * n_embd:>12,}" in out
    assert f"10 runs, 20 points, {total:.3g} FLOPs, {total / 3.6e15:.2f} hours" in out
    assert f"20 runs, {1.5 * total:.3g} FLOPs" in out


@pytest.fixture
def tiny_sweep(tiny):
    """The train.py flags of runs of a tenth of a second."""
    return ["--", *(flag for flag in flags_of(tiny()) if not flag.startswith("--out_dir"))]


@pytest.fixture
def fake_train(monkeypatch):
    """train.train without training: a parabola with its minimum at 0.01. Returns the calls."""
    calls = []
    monkeypatch.setattr(train, "train", lambda c: calls.append(c) or {
        "val_loss": 2 + 0.05 * math.log(c.lr / 0.01) ** 2, "interrupted": False, "flops": 1,
        "seconds": 1.0})
    return calls


def table(path, *names):
    with open(path, newline="") as file:
        return [tuple(float(row[name]) for name in names) for row in csv.DictReader(file)]


def test_a_reading_is_a_run_of_that_length_also_after_a_signal(tmp_path, tiny_sweep, monkeypatch):
    path, original = tmp_path / "runs.csv", train.train
    words = ["sweep", str(path), "--sizes=1x16,2x32", "--lrs=0.01", "--tokens=1280,2560"]

    def stopped_at_the_longer_horizon(c):
        return original(c) | {"interrupted": signal.SIGTERM if c.steps == 10 else 0}

    main([*words, "--shard=2/2", *tiny_sweep])
    monkeypatch.setattr(train, "train", stopped_at_the_longer_horizon)
    with pytest.raises(SystemExit, match="143"):
        main([*words, *tiny_sweep])
    monkeypatch.setattr(train, "train", original)
    main([*words, *tiny_sweep])
    rows, data = table(path, "N", "n_layer", "n_embd", "D", "loss"), path.read_bytes()
    assert len(rows) == 4
    for N, n_layer, n_embd, D, loss in rows:
        c = replace(train.parse_flags(tiny_sweep[1:]), n_layer=int(n_layer), n_embd=int(n_embd),
                    lr=0.01, steps=int(D) // 256, sample_tokens=0, schedule="constant",
                    out_dir=f"{tmp_path}/alone{n_embd}-{D}")
        result = original(c)
        assert loss == pytest.approx(result["val_loss"], abs=1e-6)
        weights = load_checkpoint(result["checkpoint"])["model"]
        assert N == sum(w.numel() for name, w in weights.items() if name != "embed.weight")
    main([*words, *tiny_sweep])
    assert path.read_bytes() == data, "nothing is left to do"


def test_a_run_that_diverges_has_an_infinite_loss_from_there_on(tmp_path, tiny_sweep, monkeypatch):
    monkeypatch.setattr(train, "train", lambda c: (_ for _ in ()).throw(train.NonFinite("nan")))
    main(["sweep", f"{tmp_path}/r.csv", "--sizes=1x16", "--lrs=1", "--tokens=256,512", *tiny_sweep])
    assert table(tmp_path / "r.csv", "D", "loss") == [(256, math.inf), (512, math.inf)]


def test_a_table_knows_the_flags_of_its_runs(tmp_path, tiny_sweep, fake_train, capsys):
    path = f"{tmp_path}/runs.csv"
    words = ["--sizes=1x16", "--lrs=0.005:0.02:3", "--tokens=1280", "--seeds=2", *tiny_sweep]
    size = ["--proxy=1x16", "--target=2x32"]
    main(["sweep", path, *words, "--optimizer=adamw"])
    main(["sweep", path, *words, "--optimizer=adamw", "--log_every=3"])  # does not change a loss
    assert len(fake_train) == 6 and {c.seed for c in fake_train} == {0, 1}
    _, c = transfer([path, *size, *tiny_sweep, "--optimizer=adamw"], capsys)
    assert c.lr == pytest.approx(0.01)
    for other in (["--optimizer=muon", "--weight_decay=1.0"], ["--optimizer=adamw", "--beta2=0.9"]):
        name = other[-1].partition("=")[0]
        with pytest.raises(BadInput, match=f"{path}.*{name}"):
            main(["sweep", path, *words, *other])
        with pytest.raises(BadInput, match=f"{path}.*{name}"):
            main(["transfer", path, *size, *tiny_sweep, *other])
    main(["sweep", f"{tmp_path}/other.csv", *words])
    with open(path, "a") as both, open(f"{tmp_path}/other.csv") as other:
        both.writelines(other.readlines()[1:])
    with pytest.raises(BadInput, match="--group=flags"):
        main(["fit", path])


def test_a_sweep_on_a_file_whose_name_is_not_utf_8_continues(tmp_path, tiny_sweep, fake_train):
    words = [f"{tmp_path}/runs.csv", "--sizes=1x16", "--lrs=0.01", "--tokens=1280", *tiny_sweep]
    for _ in range(2):
        main(["sweep", *words, "--data=caf\udce9"])
    assert len(fake_train) == 1


def test_a_folder_of_runs_with_other_flags_is_refused(tmp_path, tiny_sweep):
    words = ["sweep", f"{tmp_path}/runs.csv", "--sizes=1x16", "--lrs=0.01", "--tokens=1280"]
    main([*words, *tiny_sweep])
    (tmp_path / "runs.csv").unlink()
    with pytest.raises(BadInput, match=f"{tmp_path}/runs.*--weight_decay"):
        main([*words, *tiny_sweep, "--weight_decay=0.5"])
    with pytest.raises(BadInput, match=f"{tmp_path}/runs.*step 5"):
        main([*words[:-1], "--tokens=512", *tiny_sweep])


def begin(_, folder, barrier):
    for i in range(40):
        barrier.wait()
        lr_law.append_row(f"{folder}/{i}.csv", dict.fromkeys(COLUMNS, 1))


def test_processes_that_begin_one_table_together_write_one_header(tmp_path):
    barrier = multiprocessing.get_context("fork").Barrier(4)
    torch.multiprocessing.start_processes(begin, (tmp_path, barrier), 4, start_method="fork")
    row = ",".join("1" * len(COLUMNS))
    for path in tmp_path.iterdir():
        assert path.read_text().splitlines() == [",".join(COLUMNS), *[row] * 4]


def test_runs_of_a_sweep_keep_the_teachers_stop_of_the_longest(tiny_sweep):
    flags = [*tiny_sweep[1:], "--let_student_layer=1", "--let_stop=0.5"]
    flags.append("--teacher=small.pt")
    run, = lr_law.planned_runs([(2, 16)], [0.01], [1280, 2560], 1, flags)
    assert run.steps == [5, 10] and run.c.let_stop == 5


def test_a_foreign_or_unwritable_table_is_refused_before_a_run(
        tmp_path, tiny_sweep, fake_train, refused):
    foreign = {"other": b"a,b\n1,2\n", "utf16": b"\xff\xfe", "cut": b"a,b",
               "short": ",".join(COLUMNS).encode() + b"\n1,2\n",
               "unended": ",".join(COLUMNS).encode()}
    for name, data in foreign.items():
        (tmp_path / name).write_bytes(data)
    for path in (*foreign, "none/runs.csv", "."):
        words = ["--sizes=1x16", "--lrs=0.01", "--tokens=1280", *tiny_sweep]
        assert path in refused(main, "sweep", path, *words)
    assert all((tmp_path / name).read_bytes() == data for name, data in foreign.items())
    assert not fake_train


SMALL = "--batch_tokens=256"


def proxy_table(path, flags="", more=()):
    flags = f"{SMALL} {flags}".strip()
    rows = [(1000, D, f * 0.02, 3 - D / 1e5 + 0.05 * math.log(f) ** 2, seed, 2, 32, 0, 0, flags)
            for D in (2560, 5120) for f in (0.25, 0.5, 1, 2, 4) for seed in (0, 1)]
    return write_table(path, [*rows, *more], ",".join(COLUMNS))


def transfer(words, capsys):
    """The output of the command and the Config of the train.py command in its last line."""
    main(["transfer", *words, SMALL, "--warmup_steps=2"])
    out = capsys.readouterr().out
    return out, train.parse_flags(out.splitlines()[-1].removeprefix("python train.py ").split())


@pytest.mark.parametrize("flag, words, expected", [
    ("--optimizer=adamw", "--target=4x128", dict(
        param="completep", n_layer=4, n_embd=128, base_n_layer=2, base_n_embd=32, steps=20,
        lr=0.02)),
    ("--optimizer=adamw", "--target=2x32 --target_tokens=20480", dict(
        lr=0.01, beta1=0.975, momentum=0.95)),  # AdamW has no momentum
    # 8 times the tokens in 4 times the steps; 1 - momentum goes as 1 / steps, as 1 - beta does
    ("--multipliers=vector", "--target=4x128 --param=mup --target_tokens=40960 "
     "--target_batch_tokens=512", dict(
        param="mup", steps=80, lr=0.01, weight_decay=0.05, beta1=0.975, beta2=0.9875,
        momentum=0.9875, multiplier_lr=0.005, multiplier_weight_decay=0.001))])
def test_transfer_gives_the_flags_of_the_target(flag, words, expected, tmp_path, capsys):
    stored = "" if flag == "--optimizer=muon" else flag  # the default
    path = proxy_table(tmp_path / "proxy.csv", stored)
    out, c = transfer([path, "--proxy=2x32", *words.split(), "--", flag], capsys)
    assert "lr* 0.02" in out and ("m_N 4" in out) == ("4x128" in words)
    for name, value in expected.items():
        found = getattr(c, name)
        assert found == (value if isinstance(value, str) else pytest.approx(value, rel=1e-3)), name


MUP = dict(param="mup", base_n_embd=32)
WIDER, DEEPER = [(2, 32), (2, 128)], [(2, 32), (8, 32)]  # each 4 times as large


@pytest.mark.parametrize("sizes, rules, other, flags, steep", [
    (WIDER, MUP, {}, dict(optimizer="adamw", lr=3e-3), "attention mlp logits"),
    (WIDER, MUP, {}, dict(lr=1e-2), "attention mlp logits"),
    (WIDER, MUP, {}, dict(lr=0.05, muon_scale="original"), "logits"),
    (WIDER, MUP, {}, dict(lr=0.02, mixer="hybrid", ssm_head_dim=16, d_state=8),
     "attention ssm logits"),
    (DEEPER, dict(MUP, param="completep", base_n_layer=2), MUP, dict(optimizer="adamw", lr=3e-3),
     "stream")], ids=["adamw", "muon", "muon-original", "hybrid", "depth"])
def test_activations_move_alike_at_every_size_under_the_rules(sizes, rules, other, flags, steep):
    """muP by width, CompleteP by depth. Without them those named in `steep` move more."""
    base = train.Config(tokenizer="bytes", n_head=2, **flags)
    flat, not_flat = ([lr_law.coordinate_check(replace(base, **way, n_layer=n_layer, n_embd=n_embd),
                                               steps=4) for n_layer, n_embd in sizes]
                      for way in (rules, other))
    for kind in flat[0]:
        assert abs(lr_law.slope([1, 4], [m[kind] for m in flat])) < 0.25, kind
    for kind in steep.split():
        assert lr_law.slope([1, 4], [m[kind] for m in not_flat]) > 0.25, kind


def test_coordcheck_prints_a_table(capsys):
    main(["coordcheck", "--widths=16,32", "--depths=1,2", "--params=mup,completep", "--seeds=1",
          "--steps=3", "--", "--lr=0.01"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    logits = [row for row in rows if row[:2] == ["completep", "logits"]]
    assert len(logits) == 2, "over width and over depth"
    for *_, first, second, exponent in logits:
        assert float(exponent) == pytest.approx(math.log2(float(second) / float(first)), abs=0.02)


TABLES = {
    "edge": [(1e6, 1e8, lr, 3 - lr, 1) for lr in (0.1, 0.2, 0.3, 0.4)],  # the best rate is the last
    "empty": [], "text": [(1e6, 1e8, 0.1, "much", 1)], "negative": [(1e6, -1e8, 0.1, 2.0, 1)],
    "loss": [(1e6, 1e8, 0.1, -2.0, 1)], "short": [(1e6, 1e8, 0.1)], "two": SWEPT[:2],
    "five": SWEPT[:5], "runs": SWEPT}
BASE = {  # the flags that a command needs
    "fit": "-o law.json", "predict": "--n_params=1e9 --tokens=1e9", "coordcheck": "",
    "plan": "--sizes=1x16 --lrs=1 --tokens=1e6",
    "sweep": "new.csv --sizes=1x16 --lrs=1 --tokens=1e6",
    "transfer": "proxy.csv --proxy=2x32 --target=4x128"}
REFUSED = [  # a command line, and what the message names; more of the line goes behind the --
    ("fit empty.csv", "empty.csv"), ("fit runs.csv --loss=s", "runs.csv s N D lr loss bs"),
    ("fit text.csv", "text.csv 2"), ("fit negative.csv", "negative.csv 2"),
    ("fit loss.csv", "loss.csv 2"), ("fit short.csv", "short.csv 2"),
    ("fit two.csv", "two.csv 0"), ("fit five.csv", "five.csv 1"), ("fit edge.csv", "edge.csv 0"),
    ("predict --law=nobody", "--law=nobody"), ("predict --law=zhou", "--anchor"),
    ("predict --law=step --anchor=1,2", "--anchor 1,2"),
    ("predict --law=kaplan --n_params=1e11", "--law=kaplan -"),
    ("predict --law=kaplan --n_params=2e11 --anchor=1e11,1e9,0.01", "--law=kaplan --n_params"),
    ("predict --law=law.json --anchor=1,2,3", "--law=law.json --anchor"),
    ("sweep --sizes=1x15", "--n_embd=15"), ("sweep -- --tokenizer=nobody", "--tokenizer=nobody"),
    ("sweep -- --stepz=3", "--stepz"), ("sweep -- --lr_law=law.json", "--lr_law=law.json"),
    ("sweep -- --schedule=cosine", "--schedule=cosine"),
    ("sweep -- --teacher=auto", "--teacher=auto"), ("sweep -- --dry_run=true", "--dry_run=True"),
    ("sweep -- --data=nowhere", "--data=no"), ("transfer --proxy=3x32", "--proxy=3x32 proxy.csv"),
    ("transfer --proxy=1x16", "--proxy=1x16 proxy.csv 2,560"),
    ("transfer --target=128", "--target 128"), ("transfer --target_tokens=1", "--target_tokens=1"),
    ("fit runs.csv -- --lr=1", "fit --lr=1"), ("predict --law=step -- --lr=1", "predict --lr=1"),
    ("transfer --param=x", "--param=x"), ("transfer -- --param=mup", "--param=mup"),
    ("coordcheck --widths=64", "--widths 64"),
    ("coordcheck --params=mup,x", "--param=x"),
    ("coordcheck --widths=15,30", "--n_embd=15"), ("coordcheck -- --lr_law=x", "--lr_law=x"),
    ("fit", "runs"), ("odd", "odd"), ("fit runs.csv -o runs.csv", "runs.csv"),
    ("plan --sizes=0x16", "--n_layer=0"), ("plan --sizes=1x0", "--n_embd=0"),
    ("plan --tokens=1e29", "--steps=")]
VALUES = {  # command -> {flag: values that it refuses}
    "predict --law=step": dict.fromkeys(
        ("n_params", "tokens", "anchor"), "x nan inf -1 1e999 1:2:0"),
    "fit runs.csv": dict.fromkeys(("basin", "extrapolate"), "x nan -1") | {"extrapolate": "inf"},
    "plan": {"sizes": "x 1 1x 1x2x3 1e3x2 1x16,", "seeds": "x 0 -1 nan 99999999",
             "lrs": "x 0 -1 nan inf 1:2 1:2:x 1:2:0 1:0:3 1:2:-3 ,",
             "tokens": "x 0 -1 nan inf 1:2:3:4", "flops_per_second": "0 nan inf"},
    "sweep": {"shard": "x 1 0/1 2/1 1/0 -1/2"}, "transfer": {"target_tokens": "-1 nan"},
    "coordcheck --widths=16,32 --depths=1,2": {
        "widths": "x 0 -1 nan", "depths": "x 0 -1", "steps": "x 0 2 nan", "seeds": "x 0 -1"}}
REFUSED += [(f"{command} --{flag}={value}", f"--{flag}") for command, flags in VALUES.items()
            for flag, values in flags.items() for value in values.split()]


@pytest.fixture
def refused_words(refused, tmp_path):
    """refused_words(line): the message of a command line that lacks its BASE."""
    small = [(1000, 2560, lr, 3 - lr, 0, 1, 16, 0, 0, SMALL) for lr in (0.1, 0.2, 0.3)]
    proxy_table(tmp_path / "proxy.csv", more=small)
    for name, rows in TABLES.items():
        write_table(tmp_path / f"{name}.csv", rows)

    def run(line):
        first, _, last = line.partition(" -- ")
        command, *words = first.split()
        base = BASE.get(command, "").split() if words or last else []
        flags = last.split() if command in ("fit", "predict") else [*last.split(), SMALL]
        return refused(main, command, *base, *words, "--", *flags)

    return run


@pytest.mark.parametrize("line, names", REFUSED, ids=[line for line, _ in REFUSED])
def test_command_lines_that_cannot_be_are_refused(line, names, refused_words):
    said = refused_words(line)
    assert all(name in said for name in names.split()), said


def test_files_that_cannot_be_are_refused(refused, wrong_files):
    for file in wrong_files:
        for words in (["fit", file], ["transfer", file, "--proxy=2x32", "--target=4x64"],
                      ["predict", f"--law={file}", "--n_params=1", "--tokens=1"]):
            assert file in refused(main, *words)
