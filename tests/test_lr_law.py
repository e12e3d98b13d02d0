"""lr_law.py: each fit gives its constants back; against numpy's and scipy's; what it refuses."""
import csv
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT, run_python

import train
from lr_law import (COLUMNS, LAWS, RATIOS, basin, fit_horizon, fit_law, fit_parabola, fit_slices, hold_out, horizon_factors,
                    interval, loss_horizons, main, near_optima, planned_runs, predict_law, published, read_runs,
                    shape_statistics)
from model import BadInput
from train import load_law

LR = np.geomspace(1e-3, 1e-1, 7)


def test_parabola_returns_its_constants():
    got = fit_parabola(LR, 2.5 + 0.03 * np.log(LR / 0.013) ** 2)
    assert (got["lr"], got["L_min"], got["C"]) == pytest.approx((0.013, 2.5, 0.03), rel=1e-6)
    assert got["r2"] == pytest.approx(1.0) and got["inside"] and got["n"] == 7


def test_parabola_is_numpys_polyfit_with_weights():
    rng = np.random.default_rng(0)
    loss, w = 3 + 0.02 * np.log(LR / 0.01) ** 2 + 0.003 * rng.standard_normal(7), rng.uniform(0.2, 3, 7)
    c2, c1, c0 = np.polyfit(np.log(LR), loss, 2, w=np.sqrt(w))
    got = fit_parabola(LR, loss, w)
    assert (got["C"], math.log(got["lr"])) == pytest.approx((c2, -c1 / (2 * c2)), rel=1e-9)
    assert got["L_min"] == pytest.approx(c0 - c1**2 / (4 * c2), rel=1e-9)
    fitted = np.polyval((c2, c1, c0), np.log(LR))
    mean = np.average(loss, weights=w)
    assert got["r2"] == pytest.approx(1 - (w * (loss - fitted) ** 2).sum() / (w * (loss - mean) ** 2).sum(), rel=1e-9)


@pytest.mark.parametrize("loss", [3 - np.log(LR), 3 - 0.1 * np.log(LR / 0.01) ** 2, 3 + 0.1 * np.log(LR / 5.0) ** 2])
def test_a_parabola_without_a_minimum_in_the_sweep_says_so(loss):
    assert not fit_parabola(LR, loss)["inside"]


def test_basin_is_the_unbroken_valley():
    loss = [2.09, 2.2, 2.08, 2.0, 2.05, 2.3, 2.01]
    assert basin(loss) == slice(2, 5) and basin([3.0, 2.0, 2.05]) == slice(1, 3) and basin(loss, 1.0) == slice(0, 7)


@pytest.mark.parametrize("L_0, A, gamma", [(1.7, 400.0, 0.32), (0.5, 12.0, 0.08), (2.0, 3e4, 0.9)])
def test_horizon_returns_its_constants_and_predicts(L_0, A, gamma):
    D = np.geomspace(1e7, 1e9, 6)
    got = fit_horizon(D, L_0 + A * D**-gamma)
    assert (got["L_0"], got["A"], got["gamma"]) == pytest.approx((L_0, A, gamma), rel=1e-6)
    assert got["predict"](1e11) == pytest.approx(L_0 + A * 1e11**-gamma, rel=1e-6)


def test_the_longest_horizon_follows_from_the_shorter_ones():
    D = np.array([1e5, 2e5, 4e5, 8e5, 16e5])
    runs = [{"N": N, "D": d, "lr": lr, "group": g, "loss": 2 + N / 1e6 + 40 * d**-0.35 + 0.02 * math.log(lr / 0.01) ** 2}
            for N, g, n in ((1e5, "a", 5), (1e5, "b", 3), (2e5, "a", 2)) for d in D[:n] for lr in LR]
    long, short = loss_horizons(fit_slices(runs, 10.0))  # two horizons are not enough
    assert (long["group"], short["group"], "longest" in short) == ("a", "b", False)
    assert [long["L_0"], long["A"], long["gamma"]] == pytest.approx([2.1, 40, 0.35], rel=1e-6)
    assert long["predicted"] == pytest.approx(long["loss"], rel=1e-9)
    for r in runs:
        r["loss"] += 0.1 * (r["D"] == D[-1] and r["group"] == "a")  # the longest is not looked at by its prediction
    long = loss_horizons(fit_slices(runs, 10.0))[0]
    assert long["loss"] - long["predicted"] == pytest.approx(0.1, rel=1e-6)


def test_horizon_is_scipys_curve_fit():
    optimize = pytest.importorskip("scipy.optimize")
    rng, D = np.random.default_rng(0), np.geomspace(1e7, 1e9, 12)
    loss, w = 1.7 + 400 * D**-0.32 + 0.004 * rng.standard_normal(12), rng.uniform(0.3, 2, 12)
    (L_0, A, gamma), _ = optimize.curve_fit(lambda d, L_0, A, g: L_0 + A * (d / 1e8) ** -g, D, loss, (1.0, 1.0, 0.3),
                                            sigma=w**-0.5, bounds=(0, (9, 99, 3)), xtol=1e-14, ftol=1e-14, gtol=1e-14)
    got = fit_horizon(D, loss, w)
    assert (got["L_0"], got["A"] * 1e8 ** -got["gamma"], got["gamma"]) == pytest.approx((L_0, A, gamma), rel=1e-4)


def test_horizon_keeps_its_bounds():
    D = np.geomspace(1e7, 1e9, 5)
    rising, steep = fit_horizon(D, 2 + 0.1 * np.log(D / 1e7)), fit_horizon(D, 5e8 * D**-1.1)
    assert rising["A"] == 0.0 and steep["L_0"] == pytest.approx(0.0, abs=1e-6) and steep["gamma"] == pytest.approx(1.1, rel=1e-6)


def grid(noise=0.0, rng=None, n=5):
    N, D = (v.flatten() for v in np.meshgrid(np.geomspace(1e6, 1e8, n), np.geomspace(1e8, 1e10, n)))
    lr = 38.4588 * N**-0.2219 * D**-0.3509
    return N, D, lr * np.exp(noise * rng.standard_normal(len(lr))) if noise else lr


def test_law_returns_its_constants_and_predicts():
    law = fit_law(*grid())
    assert (math.exp(law["a"]), law["b"], law["c"]) == pytest.approx((38.4588, -0.2219, -0.3509), rel=1e-6)
    at = predict_law(law, 1e9, 1e12)
    assert at["lr"] == pytest.approx(38.4588 * 1e9**-0.2219 * 1e12**-0.3509, rel=1e-6) and at["decades"] == pytest.approx(2.0)
    assert predict_law(law, 1e5, 1e9)["decades"] == pytest.approx(1.0) and predict_law(law, 1e7, 1e9)["decades"] == 0


@pytest.mark.parametrize("n", [3, 5])
def test_intervals_cover_the_truth_about_nine_times_in_ten(n):
    rng, covered = np.random.default_rng(1), np.zeros(4)
    for _ in range(200):
        law = fit_law(*grid(0.1, rng, n), draws=400, seed=int(rng.integers(1 << 30)))
        truth = math.log(38.4588), -0.2219, -0.3509
        covered[:3] += [low <= v <= high for v, (low, high) in zip(truth, map(interval, law["draws"].T))]
        low, high = predict_law(law, 1e9, 1e11)["interval"]
        covered[3] += low <= 38.4588 * 1e9**-0.2219 * 1e11**-0.3509 <= high
    assert ((0.85 <= covered / 200) & (covered / 200 <= 0.95)).all(), covered / 200


def test_a_published_law_far_from_home_is_refused_from_an_anchor_too():
    for at, anchor in (((1e9, 1e9), (1e11, 1e9, 1e-3)), ((1e12, 1e9), (1e9, 1e9, 1e-3))):
        with pytest.raises(BadInput, match="--law=kaplan: gives -.* far beyond"):
            published("kaplan", *at, anchor)


def test_one_size_leaves_its_exponent_open():
    D = np.geomspace(1e8, 1e10, 5)
    law = fit_law(np.full(5, 1e7), D, 0.5 * D**-0.2)
    assert law["b"] is None and law["c"] == pytest.approx(-0.2, rel=1e-6)
    assert predict_law(law, 1e8, 1e9)["unknown"] == ["N"] and predict_law(law, 1e7, 1e9)["unknown"] == []


def test_published_laws_have_their_published_values():
    """papers' own points: the ratio of 1.2; Step Law at 1B, 100B tokens; Bjorck at 1B, 1B."""
    assert published("step", 1e9, 1e11) == pytest.approx(1.79 * 1e9**-0.713 * 1e11**0.307, rel=1e-9)
    assert published("step", 4e9, 1.2e11) == pytest.approx(6.4e-4, rel=0.02)
    assert published("bjorck", 4e9, 1.2e11) == pytest.approx(2.4e-4, rel=0.05)
    assert published("bjorck", 1e9, 1e9) == pytest.approx(1.55e-3)
    assert published("zhou", 12e9, 5e11, anchor=(4e9, 1.2e11, 1.0)) == pytest.approx(0.475, abs=0.001)
    assert published("step", 4e9, 1.2e11, anchor=(4e9, 1.2e11, 0.5)) == pytest.approx(0.5)
    assert published("bjorck", 1e9, 1e9, batch=2e6) == pytest.approx(2 * 1.55e-3)  # four times its 0.5M: the root of it
    own = {"step": 0.58 * 1e11**0.571, "deepseek": 0.2920 * (6 * 1e9 * 1e11) ** 0.3271, "porian": 0.00037 * 1e9**0.703 * 2048}
    for name, batch in own.items():
        assert published(name, 1e9, 1e11, batch=batch) == pytest.approx(published(name, 1e9, 1e11), rel=1e-3), name
        assert published(name, 1e9, 1e11, (1e9, 1e11, 0.3), 4096) == pytest.approx(0.3)
    by_hand = {"kaplan": 3.481e-4, "deepseek": 9.638e-4, "porian": 2.129e-3, "minicpm": 0.01, "ling": 9.850e-4}
    for name, rate in by_hand.items():
        assert published(name, 1e9, 2e10) == pytest.approx(rate, rel=1e-3), name
    for name in LAWS:
        assert 1e-5 < published(name, 1e9, 2e10) < 2e-2, name
    for name in RATIOS:
        with pytest.raises(BadInput, match="--anchor"):
            published(name, 1e9, 2e10)


# The table and the command line


def write_table(path, rows, header="N,D,lr,loss,bs"):
    path.write_text(header + "\n" + "\n".join(",".join(map(str, row)) for row in rows) + "\n")
    return str(path)


def sweep_rows(batch="64"):
    N, D, best = grid(n=3)
    return [(n, d, f * b, 2 + 0.05 * math.log(f) ** 2, batch) for n, d, b in zip(N, D, best) for f in (0.25, 0.5, 1, 2, 4)]


def test_from_a_table_to_a_law_to_a_rate(tmp_path, capsys):
    table = write_table(tmp_path / "runs.csv", sweep_rows() + [(1e6, 1e8, 5.0, "nan", "64"), (1e6, 1e8, 9.0, "inf", "64")])
    runs, diverged = read_runs(table, dict(N="N", D="D", lr="lr", loss="loss", group="bs"))
    assert len(runs) == 45 and diverged == 2 and {r["group"] for r in runs} == {"64"}
    assert all(f["inside"] and f["n"] == 5 for f in fit_slices(runs))
    main(["fit", table, "--group=bs", "-o", str(tmp_path / "law.json")])
    out = capsys.readouterr().out
    assert "2 diverged runs left out" in out and "N^-0.222" in out and "D^-0.351" in out
    main(["predict", "--law", str(tmp_path / "law.json"), "--n_params", "1e7", "--tokens", "1e12"])
    out = capsys.readouterr().out
    assert float(out.split()[1]) == pytest.approx(38.4588 * 1e7**-0.2219 * 1e12**-0.3509, rel=1e-3)
    assert "2.00 decades beyond the data: do not trust it far" in out


def test_a_run_takes_its_rate_from_a_law(tmp_path, tiny, capsys):
    table = write_table(tmp_path / "runs.csv", sweep_rows())
    main(["fit", table, "-o", str(tmp_path / "law.json")])
    flags = [f"--{k}={v}" for k, v in vars(tiny(steps=4)).items() if v != train.FLAGS[k].default and k != "lr"]
    result = train.train(train.parse_flags([*flags, "--lr=law", f"--lr_law={tmp_path}/law.json"]))
    N = train.load_checkpoint(result["checkpoint"])["model"]["embed.weight"].numel()
    N = train.GPT(train.model_config(tiny(), 257)).num_params() - N
    lr = 38.4588 * N**-0.2219 * (4 * 256) ** -0.3509
    assert train.load_checkpoint(result["checkpoint"])["config"]["lr"] == pytest.approx(lr, rel=1e-4)
    assert f"by {tmp_path}/law.json at N = {N:,} and D = 1,024" in capsys.readouterr().out
    for words, message in (([], "`law` with a file"), (["--lr_law=none.json"], "--lr_law=none.json: not a law file")):
        with pytest.raises(BadInput, match=message):
            train.train(train.parse_flags([*flags, "--lr=law", f"--out_dir={tmp_path}/other", *words]))
    with pytest.raises(BadInput, match="has no effect without --lr=law"):
        train.check(tiny(lr_law="law.json"))
    assert not (tmp_path / "other").exists()


def test_near_optima_take_the_best_group():
    rows = [dict(N=1.0, D=1.0, lr=lr, loss=loss, group=g) for lr, loss, g in (
        (1.0, 2.0, "a"), (4.0, 2.001, "b"), (64.0, 2.5, "a"), (0.1, 3.0, "b"))]
    assert near_optima(rows) == [{"N": 1.0, "D": 1.0, "lr": pytest.approx(2.0), "n": 2}]


def runs_of(rows):
    return [dict(zip(("N", "D", "lr", "loss", "group"), row)) for row in rows]


def test_holding_out_the_largest_size_costs_what_it_should():
    """Two batches, each with a law of its own: its law, fitted on the smaller sizes, costs nothing at the largest; what Step
    Law and a constant cost is known by hand, and so is the interpolated loss."""
    def best(N, D, group):
        return {"a": 0.02, "b": 0.05}[group] * (N / 1e6) ** -0.2 * (D / 1e8) ** {"a": -0.3, "b": 0.2}[group]

    rows = [(N, D, f * best(N, D, g), 2 + 0.05 * math.log(f) ** 2, g) for g in "ab" for N in (1e6, 2e6, 4e6)
            for D in (1e8, 2e8, 4e8) for f in (0.25, 0.5, 1, 2, 4)]
    rows += [(4e6, 8e8, f * 0.01, 2 - 0.1 * math.log(f), "a") for f in (1, 2, 4)]  # no optimum inside: not counted
    held = hold_out(runs_of(rows))
    costs = {name: np.array(c) for name, c in held["costs"].items()}
    slices = [(D, g) for D in (1e8, 2e8, 4e8) for g in "ab"]
    assert held["N"] == 4e6 and held["slices"] == 6 and [*costs][:3] == ["its group's law", "the joint law", "Step Law, published"]
    assert np.abs(costs["its group's law"]).max() < 1e-12 and costs["the joint law"][:, 0].min() > 1e-3
    off = [math.log(published("step", 4e6, D) / best(4e6, D, g)) for D, g in slices]
    assert costs["Step Law, published"][:, 0] == pytest.approx([0.05 * o**2 for o in off], rel=1e-6)
    ends = [0.05 * np.interp(o, np.log([0.25, 0.5, 1, 2, 4]), np.log([0.25, 0.5, 1, 2, 4]) ** 2) for o in off]
    assert costs["Step Law, published"][:, 1] == pytest.approx(ends, rel=1e-6)
    middle = math.exp(np.mean([math.log(best(N, D, g)) for N in (1e6, 2e6) for D, g in slices]))  # all C are equal
    assert costs[f"always {middle:.3g}"][:, 0] == pytest.approx([0.05 * math.log(middle / best(4e6, D, g)) ** 2 for D, g in slices])
    with pytest.raises(BadInput, match="--hold_out: the largest N, 1e.06, has 6 slices with their optimum inside, the others 0"):
        hold_out(runs_of([row for row in rows if row[0] == 1e6]))
    alone = hold_out(runs_of([row for row in rows if row[4] == "a" or row[0] == 4e6]))  # b has the largest size alone
    law_of_a = [math.log(best(4e6, D, "a") / best(4e6, D, "b")) for D in (1e8, 2e8, 4e8)]
    assert np.array(alone["costs"]["its group's law"])[1::2, 0] == pytest.approx([0.05 * o**2 for o in law_of_a], rel=1e-6)


def test_shape_statistics_against_values_by_hand():
    lr = np.geomspace(0.001, 0.064, 7)  # an octave apart
    curve = 2 + 0.02 * np.log2(lr / 0.008) ** 2
    bumpy, late, steep = curve.copy(), curve.copy(), 2 + 0.02 * np.log2(lr / 0.064) ** 2
    bumpy[1] -= 0.15  # rises after it has fallen, in the basin too
    late[-1] = 9.0  # diverging, and then better again: outside the basin
    late = np.append(late, 3.0)
    rows = [(1.0, D, r, loss, "") for D, losses in enumerate((curve, bumpy, late, steep), start=1)
            for r, loss in zip(np.append(lr, 0.128), losses)]
    s = shape_statistics(runs_of(rows + [(2.0, 1.0, r, 2.0, "") for r in lr[:4]]))  # four rates are too few
    assert (s["slices"], s["unimodal"], s["unimodal_basin"], s["interior"]) == (4, 2, 3, 3)
    assert s["r2_995"] == 2 and s["high"] == pytest.approx(0.02) and s["low"] == pytest.approx(0.02)
    only = shape_statistics(runs_of(rows[:7]))
    assert only["r2"] == only["r2_all"] == pytest.approx(1.0) and only["octaves"] == pytest.approx(0.0, abs=1e-9)
    assert shape_statistics([])["slices"] == 0


def test_one_size_or_one_horizon_needs_saying(tmp_path, capsys):
    one_N = write_table(tmp_path / "N.csv", [r for r in sweep_rows() if r[0] == 1e6])
    one_D = write_table(tmp_path / "D.csv", [r for r in sweep_rows() if r[1] == 1e8])
    for table, name in ((one_N, "N"), (one_D, "D")):
        with pytest.raises(BadInput, match=f"all optima have one {name}"):
            main(["fit", table, "-o", str(tmp_path / "law.json")])
        assert not (tmp_path / "law.json").exists()
    main(["fit", one_N, "--fixed=N"])
    assert "D^-0.351" in capsys.readouterr().out
    with pytest.raises(BadInput, match="--fixed=D, but D is not the same"):
        main(["fit", write_table(tmp_path / "both.csv", sweep_rows()), "--fixed=D"])


@pytest.mark.parametrize("rows, words, message", [
    ([], [], "no runs in it"), (sweep_rows(), ["--loss=smooth"], "no such column: --loss=smooth; there are N, D, lr, loss, bs"),
    ([(1e6, 1e8, 0.1, "much", 1)], [], "line 2: N, D, lr and loss must be numbers"),
    ([(1e6, -1e8, 0.1, 2.0, 1)], [], "line 2: N, D and lr must be positive"),
    (sweep_rows(), ["--basin=0"], "--basin=0.0: must be positive"),
    (sweep_rows()[:2], [], "no slice has its optimum inside the swept rates"),
    (sweep_rows()[:5], [], "too few, or all on one line"),
    ([(1e6, 1e8, lr, 3 - lr, 1) for lr in (0.1, 0.2, 0.3, 0.4)], [], "no slice has its optimum inside")])
def test_tables_that_make_no_law_are_refused(tmp_path, rows, words, message):
    table = write_table(tmp_path / "runs.csv", rows)
    with pytest.raises(BadInput) as error:
        main(["fit", table, *words, "-o", str(tmp_path / "law.json")])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "law.json").exists()


def test_bad_input_is_one_line_and_exit_code_2(tmp_path):
    done = run_python(ROOT / "lr_law.py", "fit", write_table(tmp_path / "runs.csv", sweep_rows()[:2]))
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("words", [["-o", "none/law.json"], ["-o", "."], ["--plot=none/law.png"]])
def test_results_that_could_not_be_written_are_refused_first(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=r"--(output|plot)=.*: cannot be written to"):
        main(["fit", write_table(tmp_path / "runs.csv", sweep_rows()), *words])


@pytest.mark.parametrize("text, message", [("{", "not a law file"), ("[]", "of version None"),
                                           (json.dumps({"version": "other"}), "of version other"),
                                           (json.dumps({"version": "nanolet-law-1", "units": "billions"}), "in units of billions"),
                                           (json.dumps({"version": "nanolet-law-1", "units": "parameters, tokens", "a": 1}),
                                            "damaged, without D, N, b, c, draws")])
def test_foreign_law_files_are_refused(tmp_path, text, message):
    (tmp_path / "law.json").write_text(text)
    with pytest.raises(BadInput, match=message):
        load_law(tmp_path / "law.json", "--law")


@pytest.mark.parametrize("words, message", [
    (["--law=nobody", "--n_params=1e9", "--tokens=1e9"], "no file and no published law"),
    (["--law=zhou", "--n_params=1e9", "--tokens=1e9"], "--anchor"),
    (["--law=step", "--n_params=-1", "--tokens=1e9"], "both must be positive"),
    (["--law=step", "--n_params=1e9", "--tokens=1e9", "--anchor=1,2"], "--anchor=1,2"),
    (["--law=step", "--n_params=1e9", "--tokens=1e9", "--batch_tokens=-1"], "--batch_tokens=-1: must not be negative"),
    (["--law=kaplan", "--n_params=1e9", "--tokens=1e9", "--batch_tokens=5e5"], "--batch_tokens=500000: its own batch is not known"),
    (["--law=kaplan", "--n_params=1e11", "--tokens=1e9"], "far beyond where it was made")])
def test_rates_that_cannot_be_given_are_refused(words, message):
    with pytest.raises(BadInput, match=message):
        main(["predict", *words])


def test_a_fit_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    main(["fit", write_table(tmp_path / "runs.csv", sweep_rows()), "--plot", str(tmp_path / "law.png")])
    assert (tmp_path / "law.png").read_bytes().startswith(b"\x89PNG")


# Plan and sweep


def test_plan_counts_runs_and_flops(capsys):
    main(["plan", "--sizes=2x64,4x128", "--lrs=1e-3:1e-1:5", "--tokens=204800,409600", "--flops_per_second=1e12", "--",
          "--vocab_size=1024", "--block_size=128"])
    out = capsys.readouterr().out
    flops = {}
    for n_layer, n_embd in ((2, 64), (4, 128)):
        model = train.GPT(train.model_config(train.Config(n_layer=n_layer, n_embd=n_embd, block_size=128), 1024))
        flops[n_embd] = 5 * model.flops_per_token() * 409_600
        assert f"N {model.num_params() - 1024 * n_embd:>12,}" in out
    total = sum(flops.values())
    assert f"10 runs, 20 points, {total:.3g} FLOPs, {total / 3.6e15:.2f} hours at 1e+12" in out
    assert f"the full grid: 20 runs, {1.5 * total:.3g} FLOPs" in out


@pytest.fixture
def tiny_sweep(corpus):
    """The flags of runs of a second."""
    return ["--", f"--data={corpus}", "--tokenizer=bytes", "--block_size=32", "--batch_tokens=256", "--micro_batch=4",
            "--eval_tokens=1024", "--warmup_steps=2", "--dtype=fp32", "--device=cpu"]


def table(path):
    return [{k: float(v) for k, v in row.items() if k != "method"} for row in csv.DictReader(open(path))]


def test_sweep_reads_a_run_at_each_number_of_tokens_and_goes_on_after_a_kill(tmp_path, tiny_sweep, monkeypatch):
    words = ["--sizes=1x16,2x32", "--lrs=0.003,0.01", "--tokens=1280,2560", *tiny_sweep]
    main(["sweep", str(tmp_path / "whole.csv"), *words])
    whole = table(tmp_path / "whole.csv")
    assert len(whole) == 8 and {r["D"] for r in whole} == {1280, 2560} and len({r["N"] for r in whole}) == 2
    c = train.parse_flags(tiny_sweep[1:])
    for row in whole:  # as a run of that many steps gives it
        if row["n_embd"] == 32 and row["lr"] == 0.01:
            alone = train.train(replace(c, n_layer=2, n_embd=32, lr=0.01, steps=int(row["D"]) // 256, schedule="constant",
                                        sample_tokens=0, out_dir=str(tmp_path / f"alone{row['D']}")))
            assert row["loss"] == pytest.approx(alone["val_loss"], abs=1e-9)

    class Killed(BaseException):
        pass

    calls, original = [], train.train
    monkeypatch.setattr(train, "train", lambda c: calls.append(c) or (_ for _ in ()).throw(Killed) if len(calls) == 3
                        else calls.append(c) or original(c))
    with pytest.raises(Killed):
        main(["sweep", str(tmp_path / "halved.csv"), *words])
    with open(tmp_path / "halved.csv", "a") as file:
        file.write("123,45")  # half a row
    monkeypatch.setattr(train, "train", original)
    main(["sweep", str(tmp_path / "halved.csv"), *words])
    halved = table(tmp_path / "halved.csv")
    strip = [{k: v for k, v in r.items() if k != "seconds"} for r in whole]
    assert [{k: v for k, v in r.items() if k != "seconds"} for r in halved] == strip
    before = (tmp_path / "halved.csv").read_bytes()
    main(["sweep", str(tmp_path / "halved.csv"), *words])
    assert (tmp_path / "halved.csv").read_bytes() == before, "nothing left to do"


def test_sweep_by_decays_shards_and_jobs(tmp_path, tiny_sweep):
    words = ["--sizes=1x16", "--lrs=0.003,0.01", "--tokens=1280,2560", "--method=decay", "--decay_share=0.4", *tiny_sweep]
    for shard in ("1/2", "2/2"):
        main(["sweep", str(tmp_path / "shards.csv"), f"--shard={shard}", *words])
    main(["sweep", str(tmp_path / "jobs.csv"), "--jobs=2", *words])
    shards, jobs = ({(r["lr"], r["D"]): r["loss"] for r in table(tmp_path / n)} for n in ("shards.csv", "jobs.csv"))
    assert len(shards) == 4 and shards == pytest.approx(jobs, abs=1e-5)
    c = train.parse_flags(tiny_sweep[1:])
    planned = train.train(replace(c, n_layer=1, n_embd=16, lr=0.01, steps=10, decay_fraction=0.4, sample_tokens=0,
                                  out_dir=str(tmp_path / "planned")))
    assert shards[0.01, 2560] == pytest.approx(planned["val_loss"], abs=1e-9), "a decay from a stable phase is the planned run"


def test_a_sweep_killed_within_a_decay_goes_on(tmp_path, tiny_sweep, monkeypatch):
    words = ["--sizes=1x16", "--lrs=0.01", "--tokens=1280,2560", "--method=decay", "--decay_share=0.4", *tiny_sweep]
    main(["sweep", str(tmp_path / "whole.csv"), *words])
    original = train.train

    def killed_in_the_second_decay(c):
        result = original(c)
        if "decay-10" in c.out_dir:
            raise InterruptedError
        return result

    monkeypatch.setattr(train, "train", killed_in_the_second_decay)
    with pytest.raises(InterruptedError):
        main(["sweep", str(tmp_path / "halved.csv"), *words])
    monkeypatch.setattr(train, "train", original)
    main(["sweep", str(tmp_path / "halved.csv"), *words])
    assert [r["loss"] for r in table(tmp_path / "halved.csv")] == [r["loss"] for r in table(tmp_path / "whole.csv")]


def test_runs_of_a_sweep_keep_the_teachers_stop_of_the_longest(tiny_sweep):
    run, = planned_runs("2x16", "0.01", "1280,2560", "0", [*tiny_sweep[1:], "--teacher=small.pt", "--let_stop=0.5",
                                                          "--let_student_layer=1"])
    assert run["steps"] == [5, 10] and [train.stop_of(replace(run["c"], steps=n), n) for n in (5, 10)] == [5, 5]
    with pytest.raises(BadInput, match="--teacher=auto: depends on the length"):
        planned_runs("2x16", "0.01", "1280,2560", "0", [*tiny_sweep[1:], "--teacher=auto", "--let_student_layer=1"])


def test_a_diverged_run_is_in_the_table_as_such(tmp_path, tiny_sweep):
    main(["sweep", str(tmp_path / "runs.csv"), "--sizes=1x16", "--lrs=0.01,1e30", "--tokens=1280,2560", *tiny_sweep])
    losses = {(r["lr"], r["D"]): r["loss"] for r in table(tmp_path / "runs.csv")}
    assert math.isinf(losses[1e30, 1280]) and math.isinf(losses[1e30, 2560]) and losses[0.01, 2560] < 6


@pytest.mark.parametrize("words, message", [
    (["--sizes=64", "--lrs=1", "--tokens=1e6"], "--sizes=64: LAYERSxWIDTH"),
    (["--sizes=1x16", "--lrs=1:2", "--tokens=1e6"], "--lrs=1:2: positive numbers"),
    (["--sizes=1x16", "--lrs=0", "--tokens=1e6"], "--lrs=0: positive numbers"),
    (["--sizes=1x16", "--lrs=1", "--tokens=1e6", "--seeds=a"], "--seeds=a"),
    (["--sizes=1x16", "--lrs=1", "--tokens=1e6", "--decay_share=1"], "--decay_share=1.0"),
    (["--sizes=1x15", "--lrs=1", "--tokens=1e6"], "--n_embd=15 --n_head=2"),
    (["--sizes=1x16", "--lrs=1", "--tokens=1e6", "--", "--stepz=3"], "--stepz: no such flag")])
def test_sweeps_that_cannot_be_are_refused(tmp_path, words, message):
    with pytest.raises(BadInput) as error:
        main(["sweep", str(tmp_path / "runs.csv"), *words])
    assert message in str(error.value) and not (tmp_path / "runs.csv").exists()


def test_a_foreign_or_unwritable_table_is_refused_and_kept(tmp_path, tiny_sweep, monkeypatch):
    words = ["--sizes=1x16", "--lrs=0.01", "--tokens=1280", *tiny_sweep]
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(BadInput, match="not a table of `sweep`"):
        main(["sweep", str(tmp_path / "other.csv"), *words])
    assert (tmp_path / "other.csv").read_text() == "a,b\n1,2\n"
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe")
    (tmp_path / "unended.csv").write_text("a,b\n1,2")
    (tmp_path / "odd.csv").write_text(",".join(COLUMNS) + "\n1,2\n")
    for name in ("bytes", "unended", "odd"):
        before = (tmp_path / f"{name}.csv").read_bytes()
        with pytest.raises(BadInput, match="not a table of `sweep`"):
            main(["sweep", str(tmp_path / f"{name}.csv"), *words])
        assert (tmp_path / f"{name}.csv").read_bytes() == before
    monkeypatch.setattr(train, "train", lambda c: pytest.fail("a run began whose row could not be kept"))
    for path in (tmp_path / "none" / "runs.csv", tmp_path):
        with pytest.raises(BadInput, match="cannot be written to"):
            main(["sweep", str(path), f"--folder={tmp_path}/f", *words])


# Transfer


@pytest.mark.parametrize("rule, steps, tokens, lr, decay, beta, eps", [
    ("sqrt", 4, 4, 0.5, 0.5, 0.25, 2.0), ("sqrt", 0.25, 1, 2.0, 2.0, 4.0, 0.5),  # longer; a batch 4 times as large: sqrt(4)
    ("bjorck", 10, 10, 10**-0.32, 1, 1, 1), ("none", 4, 4, 1, 1, 1, 1)])
def test_rules_of_horizon_and_batch(rule, steps, tokens, lr, decay, beta, eps):
    assert horizon_factors(steps, tokens, rule) == pytest.approx(dict(lr=lr, decay=decay, beta=beta, eps=eps))


def test_stable_and_decayed_readings_of_one_table_neither_share_a_run_nor_a_fit(tmp_path, tiny_sweep):
    words = ["sweep", str(tmp_path / "runs.csv"), "--sizes=1x16", "--lrs=0.003", *tiny_sweep]
    at = words.index("--")
    main([*words[:at], "--tokens=2560", *words[at:]])
    main([*words[:at], "--tokens=2560", "--method=decay", *words[at:]])
    assert {r["method"] for r in csv.DictReader(open(tmp_path / "runs.csv"))} == {"stable", "decay"}
    with pytest.raises(BadInput, match="--tokens=1280: the run in .* is past step 5.*--folder"):
        main([*words[:at], "--tokens=1280", *words[at:]])
    with pytest.raises(BadInput, match="2 methods, decay and stable.*--group=method"):
        read_runs(tmp_path / "runs.csv", {k: k for k in ("N", "D", "lr", "loss", "group")})


def test_a_rate_at_which_one_seed_diverged_is_not_scored_by_the_others(tmp_path):
    path = write_table(tmp_path / "runs.csv", [(1e6, 1e8, 0.01, 2, "a"), (1e6, 1e8, 0.02, 1, "a"), (1e6, 1e8, 0.02, "inf", "a"),
                                               (1e6, 1e8, 0.02, 3, "b"), (1e6, 2e8, 0.02, 4, "a")])
    runs, diverged = read_runs(path, dict(N="N", D="D", lr="lr", loss="loss", group="bs"))
    assert [r["loss"] for r in runs] == [2, 3, 4] and diverged == 2


def proxy_table(path, best=0.02, method="stable"):
    rows = [(1000, D, f * best, 3 - D / 1e5 + 0.05 * math.log(f) ** 2, seed, 2, 32, 0, 0, method)
            for D in (2560, 5120) for f in (0.25, 0.5, 1, 2, 4) for seed in (0, 1)]
    return write_table(path, rows, ",".join(COLUMNS))


def test_transfer_gives_the_flags_of_the_target(tmp_path, tiny_sweep, capsys):
    words = ["transfer", proxy_table(tmp_path / "proxy.csv"), "--proxy=2x32", "--target=4x128"]
    main([*words, *tiny_sweep, "--optimizer=adamw"])
    out = capsys.readouterr().out
    assert "lr* 0.02" in out and "m_N 4, m_L 2, m_D 4" in out
    assert re.search(r"hidden +lr 0.005 +weight decay 0.4 +AdamW, eps 1.25e-11", out), out
    assert re.search(r"head +lr 0.02 +weight decay 0.1 +AdamW, eps 2.5e-11", out)
    c = train.parse_flags(out.splitlines()[-1].removeprefix("python train.py ").split())
    assert (c.param, c.base_n_embd, c.base_n_layer, c.n_layer, c.n_embd, c.lr, c.steps) == ("completep", 32, 2, 4, 128, 0.02, 20)
    assert "multiplier" not in out, "there are none"
    main([*words, "--param=mup", "--target_n_head=8", "--target_tokens=40960", "--target_batch_tokens=512", *tiny_sweep,
          "--multipliers=vector"])
    out = capsys.readouterr().out
    c = train.parse_flags(out.splitlines()[-1].removeprefix("python train.py ").split())
    assert (c.param, c.base_n_head, c.n_head, c.steps, c.batch_tokens) == ("mup", 2, 8, 80, 512)  # 4 times the steps
    assert (c.lr, c.weight_decay, c.beta1, c.beta2, c.adam_eps) == pytest.approx((0.01, 0.05, 0.975, 0.9875, 2e-10))
    assert (c.multiplier_lr, c.multiplier_weight_decay) == (0.005, 0.001)
    assert "m_D 1" in out and re.search(r"hidden +lr 0.01 .*Muon, its update times 0.5 ", out)


def test_transfer_sweeps_its_proxy_and_goes_on(tmp_path, tiny_sweep, capsys, monkeypatch):
    monkeypatch.setattr(train, "train", lambda c: {"val_loss": 2 + 0.05 * math.log(c.lr / 0.01) ** 2, "interrupted": False, "flops": 1,
                                                   "seconds": 1.0})
    words = ["transfer", str(tmp_path / "proxy.csv"), "--proxy=2x32", "--target=2x64", "--lrs=0.005:0.02:3", "--tokens=1280"]
    main([*words, *tiny_sweep])
    assert "lr* 0.01," in capsys.readouterr().out and len(table(tmp_path / "proxy.csv")) == 3
    monkeypatch.setattr(train, "train", lambda c: pytest.fail("all rows are there"))
    main([*words, *tiny_sweep])


@pytest.mark.parametrize("words, message", [
    (["--proxy=3x32"], "no runs of --proxy=3x32 by --method=stable"), (["--method=decay"], "by --method=decay"),
    (["--target=128"], "--target=128: LAYERSxWIDTH"), (["--lrs=1"], "--lrs=1 --tokens="), (["--target_tokens=-1"], "--target_tokens=-1"),
    (["--target_tokens=nan"], "--target_tokens=nan"), (["--jobs=0"], "--jobs=0"), (["--", "--param=mup"], "--param=mup: goes before")])
def test_transfers_that_cannot_be_are_refused(tmp_path, words, message):
    with pytest.raises(BadInput) as error:
        main(["transfer", proxy_table(tmp_path / "proxy.csv"), "--proxy=2x32", "--target=4x128", *words])
    assert message in str(error.value)


def test_a_proxy_whose_optimum_is_not_inside_is_refused(tmp_path):
    rows = [(1000, 2560, lr, 3 - lr, 0, 2, 32, 0, 0, "stable") for lr in (0.1, 0.2, 0.3, 0.4)]
    with pytest.raises(BadInput, match="is not inside the swept ones"):
        main(["transfer", write_table(tmp_path / "proxy.csv", rows, ",".join(COLUMNS)), "--proxy=2x32", "--target=4x128"])
