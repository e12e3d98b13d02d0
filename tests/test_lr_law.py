"""lr_law.py: each fit gives its constants back; against numpy's and scipy's; what it refuses."""
import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT, run_python

import train
from lr_law import (LAWS, RATIOS, basin, fit_horizon, fit_law, fit_parabola, fit_slices, interval, main, near_optima,
                    predict_law, published, read_runs)
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


@pytest.mark.parametrize("rows, words, message", [
    ([], [], "no runs in it"), (sweep_rows(), ["--loss=smooth"], "no such column: --loss=smooth; there are N, D, lr, loss, bs"),
    ([(1e6, 1e8, 0.1, "much", 1)], [], "line 2: N, D, lr and loss must be numbers"),
    ([(1e6, -1e8, 0.1, 2.0, 1)], [], "line 2: N, D and lr must be positive"),
    (sweep_rows()[:2], [], "no slice has its optimum inside the swept rates"),
    (sweep_rows()[:5], [], "too few, or all on one line"),
    ([(1e6, 1e8, lr, 3 - lr, 1) for lr in (0.1, 0.2, 0.3, 0.4)], [], "no slice has its optimum inside")])
def test_tables_that_make_no_law_are_refused(tmp_path, rows, words, message):
    table = write_table(tmp_path / "runs.csv", rows)
    done = run_python(ROOT / "lr_law.py", "fit", table, *words, "-o", tmp_path / "law.json")
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "law.json").exists()


@pytest.mark.parametrize("text, message", [("{", "not a law file"), ("[]", "of version None"),
                                           (json.dumps({"version": "other"}), "of version other"),
                                           (json.dumps({"version": "nanolet-law-1", "units": "billions"}), "in units of billions")])
def test_foreign_law_files_are_refused(tmp_path, text, message):
    (tmp_path / "law.json").write_text(text)
    with pytest.raises(BadInput, match=message):
        load_law(tmp_path / "law.json", "--law")


@pytest.mark.parametrize("words, message", [
    (["--law=nobody", "--n_params=1e9", "--tokens=1e9"], "no file and no published law"),
    (["--law=zhou", "--n_params=1e9", "--tokens=1e9"], "--anchor"),
    (["--law=step", "--n_params=-1", "--tokens=1e9"], "both must be positive"),
    (["--law=step", "--n_params=1e9", "--tokens=1e9", "--anchor=1,2"], "--anchor=1,2"),
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


def test_a_foreign_or_unwritable_table_is_refused_and_kept(tmp_path, tiny_sweep):
    words = ["--sizes=1x16", "--lrs=0.01", "--tokens=1280", *tiny_sweep]
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(BadInput, match="not a table of `sweep`"):
        main(["sweep", str(tmp_path / "other.csv"), *words])
    assert (tmp_path / "other.csv").read_text() == "a,b\n1,2\n"
    with pytest.raises(BadInput, match="cannot be written to"):
        main(["sweep", str(tmp_path / "none" / "runs.csv"), f"--folder={tmp_path}/f", *words])
