"""lr_law.py: many runs: plan and run a sweep, fit the optimum learning rate over model size and tokens, predict it.

    python lr_law.py plan --sizes=2x64,2x128,4x128 --lrs=1e-3:3e-2:5 --tokens=2e5,4e5,8e5
    python lr_law.py sweep --sizes=2x64,2x128,4x128 --lrs=1e-3:3e-2:5 --tokens=2e5,4e5,8e5 runs.csv -- --vocab_size=1024
    python lr_law.py fit runs.csv -o law.json --plot law.png
    python lr_law.py predict --law law.json --n_params 4e9 --tokens 1.2e11
    python lr_law.py predict --law step --n_params 4e9 --tokens 1.2e11        # a published law
    python lr_law.py transfer runs.csv --proxy=2x64 --target=8x256 -- --vocab_size=1024  # the rival: muTransfer
    python lr_law.py coordcheck --plot=check.png                              # that its activations move alike at every size

The procedure of Zhou et al. 2026 (arXiv 2601.05049): at each size N and number of tokens D the loss is a parabola in
the log of the learning rate, whose lowest point is found from a few rates; at each size the least loss falls with D as
a power law, so that longer runs can be guessed from shorter ones; and the lowest points lie on a plane in ln N and ln D,
which is the law. Only texts derived from the paper could be read: see each docstring for what it leaves open.

Names and symbols
    N, D        parameters of a model (without its embedding, where `sweep` counts them), tokens that it was trained on:
                two columns of a table of runs
    eta, lr     peak learning rate; eta* the one of least loss
    L           loss in nats per token
    group       what else tells runs apart, such as the batch: only runs of one group are held against each other
    slice       the runs of one (N, D, group), which differ in lr alone
    C           curvature of the parabola in ln lr: 0.5 d^2 L / d(ln lr)^2
"""
import argparse
import csv
import itertools
import json
import math
import os
import shlex
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import train
from model import GPT, BadInput, command, load_checkpoint
from optim import Multipliers, Muon, make_optimizers, muon_scale, place_parameters, rule_of
from probes import plotting
from train import LAW_VERSION, law_rate, load_law

# ----------------------------------------------------------------------------------------------------------------------
# Plan and sweep

COLUMNS = ("N", "D", "lr", "loss", "seed", "n_layer", "n_embd", "flops", "seconds", "method")


def numbers(flag: str, text: str) -> list[float]:
    """"1,2,3", or "low:high:count" spaced evenly in the log. Raises BadInput, naming the flag, for anything else."""
    try:
        if ":" in text:
            low, high, count = text.split(":")
            values = np.geomspace(float(low), float(high), int(count)).tolist() if int(count) <= 1000 else []
        else:
            values = [float(v) for v in text.split(",")]
        if not values or not all(0 < v < math.inf for v in values):
            raise ValueError
    except ValueError:
        raise BadInput(f"{flag}={text}: positive numbers, as 1,2,3 or as LOW:HIGH:COUNT, are needed") from None
    return sorted(set(values))


def parse_size(flag: str, text: str) -> tuple[int, int]:
    """(blocks, width) of "4x128"."""
    try:
        n_layer, n_embd = map(int, text.split("x"))
    except ValueError:
        raise BadInput(f"{flag}={text}: LAYERSxWIDTH is needed, such as 4x128") from None
    return n_layer, n_embd


def planned_runs(sizes: str, lrs: str, tokens: str, seeds: str, flags: list[str]) -> list[dict]:
    """The runs of a sweep, cheapest first: {c: a Config without steps, N, steps: [at which it is read], seed, flops}.

    One run a (size, rate, seed): it is read at each number of tokens on the way. That makes O(n C_eta) runs for n sizes
    and C_eta rates where the full grid has O(n^3), the paper's saving. N counts all parameters but the embedding's."""
    base, runs = train.parse_flags(flags), []
    for size in dict.fromkeys(sizes.split(",")):
        n_layer, n_embd = parse_size("--sizes", size)
        for lr, seed in itertools.product(numbers("--lrs", lrs), dict.fromkeys(seeds.split(","))):
            if not (seed.isascii() and seed.isdigit() and len(seed) < 10):
                raise BadInput(f"--seeds={seeds}: whole numbers separated by commas are needed")
            c = replace(base, n_layer=n_layer, n_embd=n_embd, lr=lr, seed=int(seed), sample_tokens=0)
            steps = sorted({max(1, round(D / c.batch_tokens)) for D in numbers("--tokens", tokens)})
            c = replace(c, steps=steps[-1], warmup_steps=min(c.warmup_steps, steps[0]))
            train.check(c)
            if c.teacher == "auto":
                raise BadInput("--teacher=auto: depends on the length of a run, which here is read at several; name a checkpoint")
            c = train.with_stop_in_steps(c, c.steps)
            with torch.device("meta"):
                model = GPT(train.model_config(c, c.vocab_size))
            runs.append({"c": c, "N": model.num_params() - model.embed.weight.numel(), "steps": steps, "seed": int(seed),
                         "flops": model.flops_per_token() * steps[-1] * c.batch_tokens})
    return sorted(runs, key=lambda r: (r["flops"], r["seed"], r["c"].lr))


def plan(runs: list[dict], method: str, share: float, speed: float) -> str:
    """What a sweep costs, beside the full grid with a run of its own for each number of tokens."""
    def cost(r):  # a decay branches off at (1 - share) of each reading
        return r["flops"] + (share * sum(r["flops"] * s / r["steps"][-1] for s in r["steps"][:-1]) if method == "decay" else 0)

    sizes = {}
    for r in runs:
        sizes.setdefault((r["N"], r["c"].n_layer, r["c"].n_embd), []).append(r)
    lines = [f"  N {N:>12,} ({layers} x {width})  {len(found)} runs, read at "
             + ", ".join(f"{s * found[0]['c'].batch_tokens:,}" for s in found[0]["steps"]) + f" tokens: {sum(map(cost, found)):.3g} FLOPs"
             for (N, layers, width), found in sorted(sizes.items())]
    total = sum(map(cost, runs))
    grid = sum(r["flops"] * s / r["steps"][-1] for r in runs for s in r["steps"])
    return "\n".join([*lines, f"{len(runs)} runs, {sum(len(r['steps']) for r in runs)} points, {total:.3g} FLOPs, "
                      f"{total / speed / 3600:.2f} hours at {speed:.3g} FLOP/s; the full grid: "
                      f"{sum(len(r['steps']) for r in runs)} runs, {grid:.3g} FLOPs, {grid / speed / 3600:.2f} hours"])


def need_writable(path, flag: str = ""):
    """Raises BadInput, early, where a file of this name could not be written."""
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        reason = "a folder" if path.is_dir() else "no permission" if path.parent.is_dir() else f"no folder {path.parent}"
        raise BadInput(f"{flag}{path}: cannot be written to ({reason})")


def append_row(path, row: dict):
    """One line at the end of the CSV, on disk before this returns; the header first in a new file."""
    try:
        with open(path, "a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)
            file.flush()
            os.fsync(file.fileno())
    except OSError as e:
        raise BadInput(f"{path}: cannot be written to ({e.strerror})") from None


def rows_done(path) -> set:
    """(N, D, lr, seed, method) of the rows that a CSV of ours holds already. A half row at its end, from a kill, is cut
    off."""
    need_writable(path)
    if not Path(path).exists():
        return set()
    foreign = BadInput(f"{path}: not a table of `sweep`, whose columns are {', '.join(COLUMNS)}")
    try:
        text = Path(path).read_text()
    except UnicodeDecodeError:
        raise foreign from None
    first, ended, _ = text.partition("\n")
    if first != ",".join(COLUMNS) if ended else not ",".join(COLUMNS).startswith(first):
        raise foreign
    if not text.endswith("\n"):
        text = text[:text.rfind("\n") + 1]
        os.truncate(path, Path(path).read_bytes().rfind(b"\n") + 1)
    try:
        return {(int(r["N"]), int(r["D"]), float(r["lr"]), int(r["seed"]), r["method"])
                for r in csv.DictReader(text.splitlines())}
    except (TypeError, ValueError):
        raise foreign from None


def run_one(run: dict, path, folder, method: str, share: float):
    """One run of a sweep, a stretch at a time: up to each reading with a constant rate, and there either read as it is
    (`stable`) or after a decay of `share` of its length that branches off (`decay`). A row is appended as each point is
    known. What a kill leaves behind is gone on with. A run that diverges has the loss inf there and at all later points."""
    c, done = replace(run["c"], schedule="constant", decay_fraction=train.FLAGS["decay_fraction"].default), rows_done(path)
    out = Path(folder, f"{c.n_layer}x{c.n_embd}-{c.lr:.3e}-{c.seed}" + ("-decay" if method == "decay" else ""))
    key = {"N": run["N"], "lr": c.lr, "seed": c.seed, "n_layer": c.n_layer, "n_embd": c.n_embd, "method": method}
    diverged = False
    for steps in run["steps"]:
        D = steps * c.batch_tokens
        if (run["N"], D, c.lr, c.seed, method) in done:
            continue
        point = {"loss": math.inf, "flops": 0, "seconds": 0}
        until = steps if method == "stable" else max(c.warmup_steps, round((1 - share) * steps))
        trunk = str(out / "ckpt.pt") if (out / "ckpt.pt").exists() else ""
        if trunk and not diverged and load_checkpoint(trunk)["step"] > until:
            raise BadInput(f"--tokens={D}: the run in {out} is past step {until}, where that would be read; name another --folder")
        try:
            if not diverged:
                stretch = replace(c, steps=until, eval_every=until, save_every=until, out_dir=str(out), resume=trunk)
                point = train.train(stretch)
                if method == "decay" and not point["interrupted"]:
                    shutil.rmtree(out / f"decay-{steps}", ignore_errors=True)  # what a kill left of it
                    point = train.train(replace(stretch, resume=point["checkpoint"], decay_now=True, schedule="wsd", steps=steps,
                                                eval_every=steps, out_dir=str(out / f"decay-{steps}")))
        except train.NonFinite:
            diverged = True
        else:
            if not diverged and point["interrupted"]:
                raise KeyboardInterrupt
            diverged = diverged or not math.isfinite(point["val_loss"])
        append_row(path, {**key, "D": D, "loss": math.inf if diverged else point["val_loss"], "flops": point["flops"],
                          "seconds": round(point["seconds"], 1)})


def sweep(runs: list[dict], path, folder, method: str, share: float, jobs: int = 1, shard: str = "1/1"):
    """Every run of this shard that the CSV does not hold yet; jobs of them at a time, each with its part of the cores."""
    try:
        i, n = map(int, shard.split("/"))
        if not 1 <= i <= n:
            raise ValueError
    except ValueError:
        raise BadInput(f"--shard={shard}: I/N with 1 <= I <= N is needed") from None
    rows_done(path)  # says early what is wrong with it
    mine = runs[i - 1::n]
    if jobs <= 1:
        for run in mine:
            run_one(run, path, folder, method, share)
        return
    threads = max(1, torch.get_num_threads() // jobs)
    context = torch.multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        for waiting in [pool.submit(run_one, run, path, folder, method, share) for run in mine]:
            waiting.result()


# ----------------------------------------------------------------------------------------------------------------------
# Fits


def basin(loss, tolerance: float = 0.05):
    """Which points, in the order of their learning rates, lie in the valley around the least loss: the unbroken stretch
    of points with loss <= (1 + tolerance) times the least. Beyond it runs diverge, and no parabola describes that."""
    loss = np.asarray(loss, float)
    low = loss <= (1 + tolerance) * np.nanmin(loss)
    first = last = int(np.nanargmin(loss))
    while first > 0 and low[first - 1]:
        first -= 1
    while last + 1 < len(loss) and low[last + 1]:
        last += 1
    return slice(first, last + 1)


def fit_parabola(lr, loss, weights=None) -> dict:
    """L = L_min + C (ln lr - ln lr*)^2 by weighted least squares (the paper's eq. 2; the base of its log is unknown and
    only rescales C). lr, loss: (n,), n >= 3. Returns lr, L_min, C, r2, n, and inside: C > 0 and lr* within the swept
    rates; a fit that is not inside says no more than on which side the optimum lies."""
    x, y = np.log(np.asarray(lr, float)), np.asarray(loss, float)
    w = np.ones_like(y) if weights is None else np.asarray(weights, float)
    if len(np.unique(x)) < 3:
        raise BadInput(f"a parabola needs at least 3 learning rates, here are {len(np.unique(x))}")
    middle = x.mean()
    X = np.stack([np.ones_like(x), x - middle, (x - middle) ** 2], 1)
    c0, c1, c2 = np.linalg.lstsq(X * np.sqrt(w)[:, None], y * np.sqrt(w), rcond=None)[0]
    residual, total = (w * (y - X @ (c0, c1, c2)) ** 2).sum(), (w * (y - np.average(y, weights=w)) ** 2).sum()
    vertex = middle - c1 / (2 * c2) if c2 != 0 else math.inf
    inside = c2 > 0 and x.min() <= vertex <= x.max()
    return {"lr": float(np.exp(np.clip(vertex, -700, 700))), "L_min": float(c0 - c1**2 / (4 * c2)) if c2 else math.nan,
            "C": float(c2), "r2": float(1 - residual / total) if total > 0 else 1.0, "n": len(x), "inside": bool(inside)}


def fit_horizon(D, loss, weights=None, gammas=(0.01, 3.0)) -> dict:
    """L(D) = L_0 + A D^-gamma with L_0, A >= 0 and gamma in `gammas` (the paper's eq. 4), by least squares. D, loss:
    (n,), n >= 3. For each gamma the best L_0 and A are a linear problem; gamma is found on a grid, and then by
    Gauss-Newton on all three. Returns L_0, A, gamma, and predict, a function of D."""
    D, y = np.asarray(D, float), np.asarray(loss, float)
    w = np.sqrt(np.ones_like(y) if weights is None else np.asarray(weights, float))
    if len(np.unique(D)) < 3:
        raise BadInput(f"a power law with a floor needs at least 3 numbers of tokens, here are {len(np.unique(D))}")
    unit = np.exp(np.log(D).mean())  # so that A is of the size of the losses
    d = np.log(D / unit)

    def linear(gamma):
        """(least sum of squares, L_0, A) for this gamma, neither negative."""
        p = np.exp(-gamma * d)
        best = np.linalg.lstsq(np.stack([w, w * p], 1), w * y, rcond=None)[0]
        if best[0] < 0:
            best = np.array([0.0, (w**2 * p * y).sum() / (w**2 * p * p).sum()])
        if best[1] < 0:
            best = np.array([np.average(y, weights=w**2), 0.0])
        return ((w * (y - best[0] - best[1] * p)) ** 2).sum(), *best

    grid = np.geomspace(*gammas, 400)
    gamma = grid[int(np.argmin([linear(g)[0] for g in grid]))]
    _, L_0, A = linear(gamma)
    for _ in range(50):
        p = np.exp(-gamma * d)
        jacobian = np.stack([np.ones_like(d), p, -A * d * p], 1) * w[:, None]
        step = np.linalg.lstsq(jacobian, w * (y - L_0 - A * p), rcond=None)[0]
        new = float(np.clip(gamma + step[2], *gammas))
        if linear(new)[0] > linear(gamma)[0] or abs(new - gamma) < 1e-14:
            break
        gamma = new
        _, L_0, A = linear(gamma)
    return {"L_0": float(L_0), "A": float(A * unit**gamma), "gamma": float(gamma),
            "predict": lambda D: L_0 + A * np.exp(-gamma * np.log(np.asarray(D, float) / unit))}


def fit_law(N, D, lr, weights=None, draws: int = 1000, seed: int = 0) -> dict:
    """lr*(N, D) = exp(a) N^b D^c (the paper's eq. 6), by least squares in the logs, with a bootstrap of the residuals.

    Where all N (or all D) are equal, b (or c) cannot be known and is left out, as None. Each draw puts the residuals,
    drawn with replacement and freed of the shrinkage of fitting (divided by sqrt(1 - leverage)), onto the fitted values
    and fits again; with few points its spread is widened as Student's t is. Returns a, b, c, r2, sd (of a residual, in
    ln lr), draws (k, 3), the ranges of N and D."""
    if not len(lr):
        raise BadInput("0 optima are too few for a law")
    N, D, y = (np.log(np.asarray(v, float)) for v in (N, D, lr))
    w = np.sqrt(np.ones_like(y) if weights is None else np.asarray(weights, float))
    center = np.array([N.mean(), D.mean()])
    used = [bool(np.ptp(v) > 1e-9) for v in (N, D)]
    X = np.stack([np.ones_like(y)] + [v - m for v, m, u in zip((N, D), center, used) if u], 1)
    if len(y) < X.shape[1] + 1 or np.linalg.matrix_rank(X) < X.shape[1]:
        raise BadInput(f"{len(y)} optima are too few, or all on one line, for a law with {X.shape[1]} constants")
    solve = np.linalg.pinv(X * w[:, None])  # (constants, n)
    beta = solve @ (w * y)
    residual = w * (y - X @ beta)
    free = residual / np.sqrt(np.clip(1 - np.einsum("ij,ji->i", X * w[:, None], solve), 1e-3, None))
    rng = np.random.default_rng(seed)
    dof = len(y) - X.shape[1]
    unsure = np.sqrt(dof / rng.chisquare(dof, (draws, 1)))  # few residuals do not tell their own size: normal to Student's t
    betas = beta + unsure * (rng.choice(free - free.mean(), (draws, len(y))) @ solve.T)

    def constants(betas):
        """Rows (a, b, c) from rows of centred constants; nan where left out."""
        out = np.full((len(betas), 3), np.nan)
        out[:, 0], column = betas[:, 0], 1
        for i, u in enumerate(used):
            if u:
                out[:, 1 + i] = betas[:, column]
                out[:, 0] -= betas[:, column] * center[i]
                column += 1
        return out

    total = ((w * (y - np.average(y, weights=w**2))) ** 2).sum()
    a, b, c = constants(beta[None])[0]
    return {"a": a, "b": b if used[0] else None, "c": c if used[1] else None, "n": len(y),
            "r2": float(1 - (residual**2).sum() / total) if total > 0 else 1.0, "sd": float(np.sqrt((residual**2).sum() / dof)),
            "draws": constants(betas), "N": [float(np.exp(N.min())), float(np.exp(N.max()))],
            "D": [float(np.exp(D.min())), float(np.exp(D.max()))]}


def interval(values, level: float = 0.9) -> list[float]:
    """The middle `level` of the values."""
    return [float(v) for v in np.quantile(values, [(1 - level) / 2, (1 + level) / 2])]


def predict_law(law: dict, N, D, level: float = 0.9) -> dict:
    """lr* at one (N, D), its interval from the bootstrap, and how many decades (N, D) lies outside the data, at
    most."""
    x = np.array([1.0, math.log(N), math.log(D)])
    draws = np.exp(np.nan_to_num(np.asarray(law["draws"], float)) @ x)
    beyond = [max(math.log10(v / high), math.log10(low / v), 0.0) for v, (low, high) in ((N, law["N"]), (D, law["D"]))]
    return {"lr": law_rate(law, N, D), "interval": interval(draws, level), "decades": max(beyond),
            "unknown": [name for name, k, v in (("N", "b", N), ("D", "c", D)) if law[k] is None
                        and not 0.99 < v / law[name][0] < 1.01]}


# ----------------------------------------------------------------------------------------------------------------------
# A table of runs


def read_runs(path, columns: dict[str, str]) -> tuple[list[dict], int]:
    """Rows of a CSV with a header as dicts of N, D, lr, loss (numbers) and group (a text), and how many were left out
    as diverged (a loss that is inf or nan) or as another seed of what diverged, whose survivors alone would flatter that
    rate. columns: the names in the file; group may be several, separated by commas."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            table = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise BadInput(f"{path}: not a table of runs ({e})") from None
    if not table:
        raise BadInput(f"{path}: no runs in it")
    groups = [g for g in columns["group"].split(",") if g and (g in table[0] or g != "group")]
    if missing := [f"--{k}={columns[k]}" for k in ("N", "D", "lr", "loss") if columns[k] not in table[0]] + [
            f"--group={g}" for g in groups if g not in table[0]]:
        raise BadInput(f"{path}: no such column: {', '.join(missing)}; there are {', '.join(filter(None, table[0]))}")
    methods = {row["method"] for row in table if row.get("method")}
    if len(methods) > 1 and "method" not in groups:
        raise BadInput(f"{path}: runs of {len(methods)} methods, {' and '.join(sorted(methods))}, whose losses do not compare; "
                       "--group=method keeps them apart")
    runs, diverged = [], set()
    for i, row in enumerate(table, start=2):
        try:
            run = {k: float(row[columns[k]]) for k in ("N", "D", "lr", "loss")}
        except (TypeError, ValueError):
            raise BadInput(f"{path}, line {i}: {columns['N']}, {columns['D']}, {columns['lr']} and {columns['loss']} must be "
                           "numbers") from None
        if None in row.values():
            raise BadInput(f"{path}, line {i}: fewer columns than the header")
        run["group"] = ",".join(row[g] for g in groups)
        if not math.isfinite(run["loss"]):
            diverged.add(tuple(run[k] for k in ("N", "D", "lr", "group")))
        elif not all(0 < run[k] < math.inf for k in ("N", "D", "lr")):
            raise BadInput(f"{path}, line {i}: {columns['N']}, {columns['D']} and {columns['lr']} must be positive")
        runs.append(run)
    kept = [r for r in runs if math.isfinite(r["loss"]) and tuple(r[k] for k in ("N", "D", "lr", "group")) not in diverged]
    return kept, len(runs) - len(kept)


def slices_of(runs) -> dict[tuple, tuple[np.ndarray, np.ndarray]]:
    """(N, D, group) -> its (rates, losses), in the order of the rates; runs of one rate, as of several seeds, by their
    mean."""
    slices = {}
    for run in runs:
        slices.setdefault((run["N"], run["D"], run["group"]), {}).setdefault(run["lr"], []).append(run["loss"])
    return {key: tuple(np.array([(lr, np.mean(losses)) for lr, losses in sorted(rates.items())]).T)
            for key, rates in sorted(slices.items())}


def fit_slices(runs, tolerance: float = 0.05) -> list[dict]:
    """A parabola for every (N, D, group) with at least 3 rates in its basin: {N, D, group, ...fit_parabola}."""
    fitted = []
    for (N, D, group), (lr, loss) in slices_of(runs).items():
        valley = basin(loss, tolerance)
        if len(np.unique(lr[valley])) >= 3:
            fitted.append({"N": N, "D": D, "group": group, **fit_parabola(lr[valley], loss[valley])})
    return fitted


def loss_horizons(fitted) -> list[dict]:
    """Of each N and group with at least 3 horizons, its best losses over D: {N, group, L_0, A, gamma, n}, and with 4 or more
    also longest, the largest D; predicted, its loss by a fit on the shorter ones alone; and loss, what it is."""
    rows = []
    for N, group in sorted({(f["N"], f["group"]) for f in fitted}):
        mine = sorted((f["D"], f["L_min"]) for f in fitted if (f["N"], f["group"]) == (N, group))
        D, loss = np.array(mine, float).T
        if len(D) >= 3:
            fit = fit_horizon(D, loss)
            rows.append({"N": N, "group": group, "n": len(D), **{k: fit[k] for k in ("L_0", "A", "gamma")}})
            if len(D) >= 4:
                shorter = fit_horizon(D[:-1], loss[:-1])["predict"]
                rows[-1] |= {"longest": D[-1], "loss": loss[-1], "predicted": float(shorter(D[-1]))}
    return rows


def near_optima(runs, within: float = 0.0025) -> list[dict]:
    """The middle (mean of ln lr) of all runs of an (N, D), over all groups, whose loss is within that share of the
    least: what remains when the batch is chosen together with the rate."""
    slices = {}
    for run in runs:
        slices.setdefault((run["N"], run["D"]), []).append(run)
    optima = []
    for (N, D), found in sorted(slices.items()):
        least = min(r["loss"] for r in found)
        good = [math.log(r["lr"]) for r in found if r["loss"] <= (1 + within) * least]
        optima.append({"N": N, "D": D, "lr": math.exp(sum(good) / len(good)), "n": len(good)})
    return optima


def shape_statistics(runs, tolerance: float = 0.05, slack: float = 0.002) -> dict:
    """How well a parabola in ln lr describes slices of at least 5 rates. Counts: slices; unimodal (falling, then rising,
    but for `slack` nats) over all rates, and in the basin; interior, least loss at neither end. Medians: r2 of a parabola
    through the 7 rates around the least loss, and through all; the distance of its vertex from the rate of least loss, in
    octaves; high and low, nats lost by a rate twice too high or low, of slices that have it."""
    def unimodal(loss):
        best = int(np.argmin(loss))
        steps = np.diff(loss)
        return bool((steps[:best] <= slack).all() and (steps[best:] >= -slack).all())

    rows = []
    for lr, loss in slices_of(runs).values():
        if len(lr) < 5:
            continue
        best = int(np.argmin(loss))
        around = slice(max(0, best - 3), best + 4)
        near, ln = fit_parabola(lr[around], loss[around]), np.log(lr)
        lost = [np.interp(ln[best] + d, ln, loss, left=np.nan, right=np.nan) - loss[best] for d in (math.log(2), -math.log(2))]
        rows.append((unimodal(loss), unimodal(loss[basin(loss, tolerance)]), 0 < best < len(lr) - 1, near["r2"],
                     near["r2"] >= 0.995, fit_parabola(lr, loss)["r2"], abs(math.log2(near["lr"] / lr[best])), *lost))
    columns = np.array(rows, float).reshape(len(rows), 9).T
    names = ("unimodal", "unimodal_basin", "interior", "r2", "r2_995", "r2_all", "octaves", "high", "low")
    counts = ("unimodal", "unimodal_basin", "interior", "r2_995")
    return {"slices": len(rows)} | {k: int(v.sum()) if k in counts else float(np.nanmedian(v)) if len(v) else math.nan
                                    for k, v in zip(names, columns)}


def hold_out(runs, tolerance: float = 0.05) -> dict:
    """Fit without the largest N, and what following the fit there costs: {N, slices, costs}; costs has, by the name of what
    gave the rate, nats above a slice's own best, one row (by its parabola, by its losses interpolated in ln lr, the swept
    rates' ends beyond them) for each slice of that N with its optimum inside.

    The rates: each group's own law (the law of all groups where one alone is too few); with several groups the joint law of
    near_optima; the published Step Law, which knows the same N and D; the one rate best on average for what was fitted."""
    largest = max(run["N"] for run in runs)
    fitted = [f for f in fit_slices(runs, tolerance) if f["inside"]]
    held, rest = ([f for f in fitted if (f["N"] == largest) == is_held] for is_held in (True, False))
    if not held or not rest:
        raise BadInput(f"--hold_out: the largest N, {largest:g}, has {len(held)} slices with their optimum inside, the others "
                       f"{len(rest)}; some of both are needed")

    def law_of(optima):
        return fit_law(*([o[k] for o in optima] for k in ("N", "D", "lr")), draws=1)

    laws, everywhere = {}, law_of(rest)
    if everywhere["b"] is None:
        raise BadInput(f"--hold_out: without N = {largest:g} one size is left, which does not tell how lr* changes with N")
    for group in {f["group"] for f in held}:
        own = [f for f in rest if f["group"] == group]
        try:
            laws[group] = law_of(own)
            if any(laws[group][k] is None and everywhere[k] is not None for k in "bc"):  # one size or length alone
                laws[group] = everywhere
        except BadInput:
            laws[group] = everywhere
    rates = {"its group's law": lambda f: law_rate(laws[f["group"]], f["N"], f["D"])}
    if len({f["group"] for f in fitted}) > 1:
        joint = law_of(near_optima([r for r in runs if r["N"] != largest]))
        rates["the joint law"] = lambda f: law_rate(joint, f["N"], f["D"])
    weights = [f["C"] for f in rest]
    constant = math.exp(np.average([math.log(f["lr"]) for f in rest], weights=weights))
    rates |= {"Step Law, published": lambda f: published("step", f["N"], f["D"]), f"always {constant:.3g}": lambda f: constant}
    points, costs = slices_of(runs), {}
    for name, rate in rates.items():
        costs[name] = []
        for f in held:
            lr, loss = points[f["N"], f["D"], f["group"]]
            costs[name].append((f["C"] * math.log(rate(f) / f["lr"]) ** 2,
                                float(np.interp(math.log(rate(f)), np.log(lr), loss) - loss.min())))
    return {"N": largest, "slices": len(held), "costs": costs}


# ----------------------------------------------------------------------------------------------------------------------
# Published laws

# Each: what N counts, the batch policy under which it was found, its source, and lr(N, D). Units: parameters and tokens.
LAWS = {
    "step": ("non-embedding parameters", "batch grown with D: 0.58 D^0.571 tokens", "Step Law, arXiv 2503.04715",
             lambda N, D: 1.79 * N**-0.713 * D**0.307),
    "bjorck": ("parameters", "0.5M tokens; the constant is disputed, this one for N and D in billions", "arXiv 2409.19913",
               lambda N, D: 1.55e-3 * (N / 1e9) ** -0.23 * (D / 1e9) ** -0.32),
    "deepseek": ("non-embedding FLOPs per token / 6", "0.2920 C^0.3271 tokens; C = 6 N D here", "DeepSeek LLM, arXiv 2401.02954",
                 lambda N, D: 0.3118 * (6 * N * D) ** -0.1250),
    "porian": ("parameters with the head", "0.7576 N^0.703 tokens", "arXiv 2406.19146", lambda N, D: 3.7 * N**-0.36),
    "kaplan": ("non-embedding parameters", "grows as the loss falls", "arXiv 2001.08361, as Step Law tabulates it",
               lambda N, D: 3.239e-3 - 1.395e-4 * math.log(N)),
    "minicpm": ("non-embedding parameters", "grows as the loss falls; constant under its own muP", "arXiv 2404.06395",
                lambda N, D: 0.01),
    "ling": ("non-embedding FLOPs per token / 6, of the active experts", "0.0694 C^0.3644", "Ling MoE, arXiv 2507.17702",
             lambda N, D: 1.1576 * (6 * N * D) ** -0.1529),
}
# Known as ratios alone: the units of N and D behind the constant are not known (papers' digests disagree by a factor of 20).
RATIOS = {"zhou": ("unknown; MoE models", "unknown", "arXiv 2601.05049", lambda N, D: N**-0.2219 * D**-0.3509)}


# Their batches in tokens per step, where these are known in numbers.
BATCHES = {"step": lambda N, D: 0.58 * D**0.571, "bjorck": lambda N, D: 5e5, "porian": lambda N, D: 0.7576 * N**0.703,
           "deepseek": lambda N, D: 0.2920 * (6 * N * D) ** 0.3271, "ling": lambda N, D: 0.0694 * (6 * N * D) ** 0.3644}


def published(name: str, N: float, D: float, anchor=None, batch=0.0) -> float:
    """The rate of a published law at (N, D); from a point of yours, anchor = (N, D, lr), it takes the ratio alone. batch:
    yours in tokens, to which its rates are carried from its own batches by the square-root rule of horizon_factors."""
    if name not in LAWS | RATIOS:
        raise BadInput(f"--law={name}: no file and no published law; those are {', '.join(LAWS | RATIOS)}")
    if batch and name not in BATCHES:
        raise BadInput(f"--law={name} --batch_tokens={batch:g}: its own batch is not known in numbers; {', '.join(BATCHES)} have one")
    as_published = (LAWS | RATIOS)[name][3]

    def rate(N, D):
        return as_published(N, D) * (horizon_factors(BATCHES[name](N, D) / batch, 1, "sqrt")["lr"] if batch else 1)

    if name in RATIOS and not anchor:
        raise BadInput(f"--law={name}: its units are not known, so it gives ratios only: --anchor=N,D,LR, a point of yours, is "
                       "needed")
    for n, d in [(N, D)] + ([anchor[:2]] if anchor else []):
        if rate(n, d) <= 0:
            raise BadInput(f"--law={name}: gives {rate(n, d):.3g} at {n:g} parameters, far beyond where it was made")
    return anchor[2] * rate(N, D) / rate(*anchor[:2]) if anchor else rate(N, D)


# ----------------------------------------------------------------------------------------------------------------------
# The rival: rates found at a small size and carried over by rules (model.PARAM_RULES)

ACTIVATIONS = {"embed": "embedding", "mixer": "attention", "ssm": "ssm", "router": "router", "mlp": "mlp"}  # by module


def activations(model: GPT, idx) -> dict[str, list[torch.Tensor]]:
    """What the modules of each kind give for idx (B, T), one tensor a block; stream: x after the last block; logits."""
    seen, hooks = {}, []
    for name, module in model.named_modules():
        if kind := ACTIVATIONS.get(name.rpartition(".")[2]):
            hooks.append(module.register_forward_hook(lambda m, x, y, kind=kind: seen.setdefault(kind, []).append(y)))
    with torch.no_grad():
        logits, (stream,) = model(idx, hidden=(len(model.blocks),))
    for hook in hooks:
        hook.remove()
    return seen | {"stream": [stream], "logits": [logits]}


def coordinate_check(c: train.Config, steps: int = 5, seeds: int = 1) -> dict[str, float]:
    """RMS over all elements of how far each kind of activation has moved after `steps` steps at the constant rate c.lr,
    mean over seeds. Under a parametrisation that transfers it is the same at every size (Yang et al. 2022, appendix D.1).

    The text is 4 sequences of 32 random tokens out of 256, the same ones at every step and size. Matrices that write into
    the stream start at 0, so that at least 3 steps are needed before all of the model moves."""
    moved = {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        idx = torch.randint(256, (4, 33))
        model = GPT(train.model_config(replace(c, block_size=32), 256))
        multipliers = Multipliers(model, c.multipliers, c.multiplier_placement, c.multiplier_modules.split(",")) \
            if c.multipliers != "none" else None
        muon = dict(momentum=c.momentum, coefficients=c.muon_coefficients, scale=c.muon_scale, normuon=c.normuon)
        optimizers = make_optimizers(
            model, multipliers, c.optimizer, c.lr, c.weight_decay, (c.beta1, c.beta2), c.embedding_lr,
            train.module_factors(c.module_lr), train.module_factors(c.module_decay), c.multiplier_lr,
            c.multiplier_weight_decay, c.adam_eps, **muon, dtype=torch.float32)
        before = activations(model, idx[:, :-1])
        for _ in range(steps):
            model(idx[:, :-1], idx[:, 1:])[0].backward()
            if multipliers:
                multipliers.split_gradients()
            for optimizer in optimizers:
                optimizer.step()
            if multipliers:
                multipliers.fold()
            model.zero_grad()
        for kind, now in activations(model, idx[:, :-1]).items():
            change = torch.stack([(a - b).square().mean() for a, b in zip(now, before[kind])]).mean().sqrt().item()
            moved[kind] = moved.get(kind, 0.0) + change / seeds
    return moved


def slope(sizes, values) -> float:
    """The exponent k of values ~ sizes^k, by least squares in the logs; nan where a value is 0 or not finite."""
    x, y = np.log(np.asarray(sizes, float)), np.asarray(values, float)
    y = np.log(y, where=y > 0, out=np.full_like(y, np.nan))
    return float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())


def coordcheck_command(a, flags) -> str:
    try:
        widths, depths = ([int(v) for v in text.split(",") if v] for text in (a.widths, a.depths))
        if min(widths + depths) < 1 or not widths or len(widths) < 2 and len(depths) < 2:
            raise ValueError
    except ValueError:
        raise BadInput(f"--widths={a.widths} --depths={a.depths}: whole numbers separated by commas are needed, two of one "
                       "at least") from None
    if a.steps < 3 or a.seeds < 1:
        raise BadInput(f"--steps={a.steps} --seeds={a.seeds}: at least 3 steps and 1 seed are needed")
    c, params = train.parse_flags(flags), a.params.split(",")
    if c.lr == 0:
        raise BadInput("--lr=law: a number is needed here")
    depths = depths or [c.n_layer]
    base = dict(base_n_embd=widths[0], base_n_layer=depths[0])
    axes = {"width": [(depths[0], w) for w in widths], "depth": [(d, widths[0]) for d in depths]}
    axes = {axis: sizes for axis, sizes in axes.items() if len(sizes) > 1}
    settings = {(param, size): replace(c, param=param, n_layer=size[0], n_embd=size[1], **{
        k: v for k, v in base.items() if param == "completep" or param == "mup" and k == "base_n_embd"})
        for param in params for sizes in axes.values() for size in sizes}
    for setting in settings.values():
        train.check(setting)
    plt = plotting(a.plot) if a.plot else None
    if a.plot:
        need_writable(a.plot, "--plot=")
    moved, same = {}, {}  # at the base's width mup is the standard model, at its depth completep is mup: once will do
    with train.bar(len(settings), "coordinate check", "size") as progress:
        for key, setting in settings.items():
            model = str(train.model_config(setting, 256))
            moved[key] = same[model] = same.get(model) or coordinate_check(setting, a.steps, a.seeds)
            progress.update()
    lines = []
    for axis, sizes in axes.items():
        numbers = [size[axis == "width"] for size in sizes]
        lines.append(f"RMS of the change after {a.steps} steps with {c.optimizer} at lr {c.lr:g}, over {axis} ("
                     + (f"{depths[0]} blocks" if axis == "width" else f"width {widths[0]}") + ")")
        lines.append(f"  {'':<10} {'':<10}" + "".join(f"{n:>10}" for n in numbers) + "     slope")
        for param in params:
            for kind in moved[param, sizes[0]]:
                values = [moved[param, size][kind] for size in sizes]
                lines.append(f"  {param:<10} {kind:<10}" + "".join(f"{v:>10.3g}" for v in values)
                             + f"{slope(numbers, values):>+10.2f}")
    if plt:
        figure, panels = plt.subplots(len(axes), len(params), figsize=(3.6 * len(params), 3.2 * len(axes)), squeeze=False,
                                      layout="constrained", sharey="row")
        for row, (axis, sizes) in zip(panels, axes.items()):
            numbers = [size[axis == "width"] for size in sizes]
            for panel, param in zip(row, params):
                for kind in moved[param, sizes[0]]:
                    panel.plot(numbers, [moved[param, size][kind] for size in sizes], "o-", markersize=3, label=kind)
                panel.set(xscale="log", yscale="log", xlabel=axis, title=param, xticks=numbers, xticklabels=numbers)
                panel.minorticks_off()
            row[0].set_ylabel(f"RMS of the change, {a.steps} steps")
        panels[0, 0].legend(fontsize="x-small")
        figure.savefig(a.plot, dpi=120)
    return "\n".join(lines)


def horizon_factors(steps: float, tokens: float, rule: str) -> dict[str, float]:
    """Factors on lr, decay, 1 - beta and eps from one run to another of `steps` times the optimizer steps and `tokens` times
    the tokens (their quotient is the batch's growth).

    sqrt   lr and decay steps^-1/2, 1 - beta steps^-1, eps steps^1/2 (Complete(d)P, arXiv 2512.22382, as digests give it): the
           noise of Adam's walk is the same. A batch k times as large at the same tokens is steps = 1 / k, so sqrt(k).
    bjorck lr tokens^-0.32 at one batch (arXiv 2409.19913), what was found rather than derived
    none   1"""
    lr = {"sqrt": steps**-0.5, "bjorck": tokens**-0.32, "none": 1.0}[rule]
    same = rule != "sqrt"
    return {"lr": lr, "decay": 1.0 if same else lr, "beta": 1.0 if same else 1 / steps, "eps": 1.0 if same else steps**0.5}


def group_table(c: train.Config) -> list[str]:
    """A line for each kind of parameter of c's model: its optimizer, peak rate, weight decay, and Adam's epsilon or what the
    parametrisation makes of Muon's update."""
    with torch.device("meta"):
        model = GPT(train.model_config(c, c.vocab_size))
    muon = dict(scale=c.muon_scale) if c.optimizer == "muon" else {}
    optimizers = make_optimizers(model, None, c.optimizer, c.lr, c.weight_decay, (c.beta1, c.beta2), c.embedding_lr,
                                 train.module_factors(c.module_lr), train.module_factors(c.module_decay), eps=c.adam_eps, **muon)
    at = {id(p): (o, g, i) for o in optimizers for g in o.param_groups for i, p in enumerate(g["params"])}
    params, found = dict(model.named_parameters()), {}
    for kind, names in place_parameters(model).items():
        for name in names:
            optimizer, group, i = at[id(params[name])]
            text = f"lr {group['lr']:<10.4g} weight decay {group['weight_decay']:<8.4g}"
            if isinstance(optimizer, Muon):
                times = {muon_scale(rows, params[name].shape[-1], c.muon_scale, growth)
                         / muon_scale(rows, params[name].shape[-1], c.muon_scale)
                         for rows, growth in zip(group["pieces"][i], group["growth"][i])}
                text += f" Muon, its update times {', '.join(f'{t:.4g}' for t in sorted(times))}"
            else:
                text += f" AdamW, eps {group['eps']:.3g}"
            found.setdefault((rule_of(name, kind, c.tie_embeddings), text), []).append(name)
    return [f"  {rule:<10} {text}   ({len(names)} tensors)" for (rule, text), names in found.items()]


def transfer_command(a, flags) -> str:
    """muTransfer: the best rate of a proxy, out of a sweep of it, and what the rules make of it at the target. At the base
    size, which is the proxy's, every parametrisation is the standard model: a standard sweep serves as it is."""
    c = train.parse_flags(flags)
    (layers, width), (to_layers, to_width) = parse_size("--proxy", a.proxy), parse_size("--target", a.target)
    if c.param != "standard":
        raise BadInput(f"--param={c.param}: goes before the --, as the proxy is the standard model")
    if bool(a.lrs) != bool(a.tokens):
        raise BadInput(f"--lrs={a.lrs} --tokens={a.tokens}: a sweep of the proxy needs both; neither: take the table as it is")
    if a.lrs:
        runs = planned_runs(a.proxy, a.lrs, a.tokens, a.seeds, flags)
        sweep(runs, a.csv, a.folder or str(Path(a.csv).with_suffix("")), a.method, a.decay_share, a.jobs)
    runs, diverged = read_runs(a.csv, {"N": "N", "D": "D", "lr": "lr", "loss": "loss", "group": "n_layer,n_embd,method"})
    runs = [r for r in runs if r["group"] == f"{layers},{width},{a.method}"]
    if not runs:
        raise BadInput(f"{a.csv}: no runs of --proxy={a.proxy} by --method={a.method} in it")
    D = max(r["D"] for r in runs)
    found = fit_slices([r for r in runs if r["D"] == D])
    if not found or not found[0]["inside"]:
        raise BadInput(f"{a.csv}: at {D:,.0f} tokens the best rate of --proxy={a.proxy} is not inside the swept ones; at least 3 "
                       "around it are needed")
    tokens, batch = a.target_tokens or D, a.target_batch_tokens or c.batch_tokens
    if not math.inf > tokens >= batch > 0:
        raise BadInput(f"--target_tokens={tokens:g} --target_batch_tokens={batch}: at least one step of at least one token is needed")
    by_steps = horizon_factors(tokens / D * c.batch_tokens / batch, tokens / D, a.horizon)
    base = {"base_n_embd": width, "base_n_head": c.n_head if a.target_n_head not in (0, c.n_head) else 0}
    if a.param == "completep":
        base["base_n_layer"] = layers

    def rounded(value):
        return float(f"{value:.4g}")

    target = replace(
        c, param=a.param, **base, n_layer=to_layers, n_embd=to_width, n_head=a.target_n_head or c.n_head, batch_tokens=batch,
        n_kv_head=c.n_kv_head, steps=round(tokens / batch), lr=rounded(found[0]["lr"] * by_steps["lr"]),
        weight_decay=rounded(c.weight_decay * by_steps["decay"]), adam_eps=rounded(c.adam_eps * by_steps["eps"]),
        **{n: rounded(getattr(c, n) * by_steps[k]) for n, k in (("multiplier_lr", "lr"), ("multiplier_weight_decay", "decay"))
           if c.multipliers != "none"},
        **{n: max(0.0, 1 - rounded((1 - getattr(c, n)) * by_steps["beta"])) for n in ("beta1", "beta2")})
    train.check(target)
    ratios = train.param_ratios(target)
    line = " ".join(shlex.quote(f"--{name}={value}") for name, value in vars(target).items() if value != train.FLAGS[name].default)
    return "\n".join([
        f"proxy {a.proxy}, {D:,.0f} tokens: lr* {found[0]['lr']:.4g}, loss {found[0]['L_min']:.4f}, R^2 {found[0]['r2']:.3f} of "
        f"{found[0]['n']} points; {diverged} diverged runs in the table",
        f"target {a.target}, {tokens:,.0f} tokens: {a.param} with m_N {ratios['width_ratio']:g}, m_L {ratios['depth_ratio']:g}, "
        f"m_D {ratios['head_ratio']:g}; by horizon and batch ({a.horizon}) lr times {by_steps['lr']:.3g}",
        *group_table(target), f"python train.py {line}"])


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def report(law: dict, fitted: list[dict], diverged: int) -> str:
    lines = [f"{len(fitted)} slices with a parabola, {sum(f['inside'] for f in fitted)} with the optimum inside the swept "
             f"rates; {diverged} diverged runs left out"]
    if fitted:
        lines.append(f"R^2 of the parabolas: median {np.median([f['r2'] for f in fitted]):.3f}")
    for f in fitted if len(fitted) <= 40 else []:
        note = "" if f["inside"] else "   <- no minimum inside the sweep: widen it" if f["C"] > 0 else "   <- bends downwards"
        lines.append(f"  N {f['N']:.3g}  D {f['D']:.3g}  {f['group']:>8}  lr* {f['lr']:.3g}  loss {f['L_min']:.4f}  "
                     f"C {f['C']:.4f}  R^2 {f['r2']:.3f}  {f['n']} rates{note}")
    draws = np.asarray(law["draws"], float)
    text = f"lr* = {math.exp(law['a']):.4g}"
    for name, k, column in (("N", "b", 1), ("D", "c", 2)):
        if law[k] is None:
            lines.append(f"all optima have one {name}, so nothing is known of how lr* changes with it")
        else:
            low, high = interval(draws[:, column])
            text += f" * {name}^{law[k]:.3f} [{low:.3f}, {high:.3f}]"
    lines.append(f"{text}   R^2 {law['r2']:.3f}, {law['n']} optima; 90 % bootstrap intervals")
    groups = sorted({f["group"] for f in fitted}, key=lambda g: (len(g), g))
    for group in groups if len(groups) > 1 else []:
        mine = [f for f in fitted if f["group"] == group and f["inside"]]
        try:
            one = fit_law(*([f[k] for f in mine] for k in ("N", "D", "lr")), draws=10)
        except BadInput:
            continue
        lines.append(f"  group {group:>8} alone: " + " ".join(f"{n}^{one[k]:+.3f}" for n, k in (("N", "b"), ("D", "c"))
                                                              if one[k] is not None) + f"   R^2 {one['r2']:.3f}, {len(mine)} optima")
    horizons = loss_horizons([f for f in fitted if f["inside"]])
    for h in horizons if len(horizons) <= 10 else []:
        lines.append(f"  N {h['N']:.3g}  {h['group']:>8}  best loss L(D) = {h['L_0']:.4g} + {h['A']:.4g} D^-{h['gamma']:.3f}, "
                     f"{h['n']} horizons")
    if held := [h for h in horizons if "longest" in h]:
        error = np.median([abs(h["predicted"] - h["loss"]) for h in held])
        lines.append(f"best loss at the longest of 4 or more horizons, from the shorter ones: median error {error:.4f} nats over "
                     f"{len(held)} sizes and groups")
    return "\n".join(lines)


def plot_fit(runs, fitted, law, path):
    """Left: losses over lr with their parabolas. Right: optima over D by N with the law and its interval."""
    plt = plotting(path)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    sizes, slices = sorted({f["N"] for f in fitted}), slices_of(runs)
    for f in fitted:
        color = f"C{sizes.index(f['N'])}"
        lr, loss = slices[f["N"], f["D"], f["group"]]
        valley = basin(loss)
        left.plot(lr[valley], loss[valley], ".", color=color)
        fine = np.geomspace(lr[valley].min(), lr[valley].max(), 50)
        left.plot(fine, f["L_min"] + f["C"] * np.log(fine / f["lr"]) ** 2, "-", color=color, linewidth=0.8)
    for i, N in enumerate(sizes):
        mine = [f for f in fitted if f["N"] == N and f["inside"]]
        right.plot([f["D"] for f in mine], [f["lr"] for f in mine], "o", color=f"C{i}", label=f"N = {N:.3g}")
        if mine:
            Ds = np.geomspace(min(f["D"] for f in fitted), 3 * max(f["D"] for f in fitted), 30)
            at = [predict_law(law, N, D) for D in Ds]
            right.plot(Ds, [p["lr"] for p in at], "-", color=f"C{i}")
            right.fill_between(Ds, *np.array([p["interval"] for p in at]).T, color=f"C{i}", alpha=0.15)
    left.set(xscale="log", xlabel="learning rate", ylabel="loss, nats", title="slices and their parabolas")
    right.set(xscale="log", yscale="log", xlabel="D, tokens", ylabel="lr*", title="optima and the law, 90 % interval")
    right.legend(fontsize="small")
    for panel, name in ((left, "lr"), (right, "D")):  # matplotlib's own labels of a log axis overlap
        values, ticks = sorted({r[name] for r in runs}), []
        for v in values:
            if not ticks or v > ticks[-1] * (values[-1] / values[0]) ** (1 / 6):
                ticks.append(v)
        panel.tick_params(axis="x", which="minor", labelbottom=False)
        panel.set_xticks(ticks, [f"{v:.2g}" for v in ticks])
    figure.savefig(path, dpi=120)


def fit_command(a) -> str:
    if not 0 < a.basin < math.inf:
        raise BadInput(f"--basin={a.basin}: must be positive")
    for flag in ("output", "plot"):
        if getattr(a, flag):
            need_writable(getattr(a, flag), f"--{flag}=")
    runs, diverged = read_runs(a.runs, {k: getattr(a, k) for k in ("N", "D", "lr", "loss", "group")})
    fitted = fit_slices(runs, a.basin)
    optima = near_optima(runs) if a.joint else [f for f in fitted if f["inside"]]
    if not optima:
        raise BadInput(f"{a.runs}: no slice has its optimum inside the swept rates; at least 3 rates around it are needed")
    try:
        law = fit_law(*([o[k] for o in optima] for k in ("N", "D", "lr")))
    except BadInput as e:
        raise BadInput(f"{a.runs}: {e}") from None
    for name, k in (("N", "b"), ("D", "c")):
        if (law[k] is None) != (a.fixed == name):
            raise BadInput(f"{a.runs}: --fixed={name}, but {name} is not the same in all optima" if a.fixed == name else
                           f"{a.runs}: all optima have one {name}, {law[name][0]:g}: how lr* changes with it cannot be known; add "
                           f"runs of another, or take a law without it by --fixed={name}")
    law |= {"version": LAW_VERSION, "units": "parameters, tokens", "draws": law["draws"].round(12).tolist()}
    text = report(law, fitted, diverged)
    if (s := shape_statistics(runs, a.basin))["slices"]:
        n = s["slices"]
        text += (f"\nof {n} slices with 5 rates or more: unimodal {s['unimodal']}, in the basin {s['unimodal_basin']}; least loss "
                 f"not at an end {s['interior']}\n  parabola through the 7 rates around it: R^2 median {s['r2']:.3f}, at least 0.995 in "
                 f"{s['r2_995']}; through all rates {s['r2_all']:.3f}\n  its vertex is {s['octaves']:.2f} octaves from the least loss; "
                 f"a rate twice too high costs {s['high']:.4f} nats, twice too low {s['low']:.4f} (medians)")
    if a.hold_out:
        held = hold_out(runs, a.basin)
        text += (f"\nheld out, N {held['N']:.3g}: nats above the own best of {held['slices']} slices, by their parabolas, and by "
                 f"their losses interpolated\n  {'':<24}{'median':>9}{'max':>9}{'median':>11}{'max':>9}")
        for name, costs in held["costs"].items():
            (m, i), (M, I) = np.median(costs, axis=0), np.max(costs, axis=0)
            text += f"\n  {name:<24}{m:>9.4f}{M:>9.4f}{i:>11.4f}{I:>9.4f}"
    if a.plot:
        plot_fit(runs, fitted, law, a.plot)
    if a.output:
        tmp = Path(f"{a.output}.tmp")
        tmp.write_text(json.dumps(law).replace("NaN", "null"))
        tmp.replace(a.output)
        text += f"\nwritten to {a.output}"
    return text


def predict_command(a) -> str:
    if not (0 < a.n_params < math.inf and 0 < a.tokens < math.inf):
        raise BadInput(f"--n_params={a.n_params:g} --tokens={a.tokens:g}: both must be positive")
    if not 0 <= a.batch_tokens < math.inf:
        raise BadInput(f"--batch_tokens={a.batch_tokens:g}: must not be negative")
    anchor = None
    if a.anchor:
        try:
            anchor = tuple(map(float, a.anchor.split(",")))
            if len(anchor) != 3 or not all(0 < v < math.inf for v in anchor):
                raise ValueError
        except ValueError:
            raise BadInput(f"--anchor={a.anchor}: N,D,LR, three positive numbers, are needed") from None
    if a.law in LAWS | RATIOS:
        counts, batch, source, _ = (LAWS | RATIOS)[a.law]
        rate = published(a.law, a.n_params, a.tokens, anchor, a.batch_tokens)
        carried = (f"; carried to yours by the square-root rule, from {BATCHES[a.law](a.n_params, a.tokens):,.0f} tokens"
                   if a.batch_tokens else "")
        return (f"lr {rate:.4g}   ({a.law}: {source}; N: {counts}; batch: {batch}{carried}"
                + ("; as a ratio from your point)" if anchor else ")"))
    if not Path(a.law).exists():
        published(a.law, a.n_params, a.tokens)  # says what there is
    if a.batch_tokens:
        raise BadInput(f"--law={a.law} --batch_tokens={a.batch_tokens:g}: a law of yours is for the batch of its runs")
    at = predict_law(load_law(a.law, "--law"), a.n_params, a.tokens)
    text = f"lr {at['lr']:.4g}   90 % interval {at['interval'][0]:.4g} to {at['interval'][1]:.4g}"
    if at["decades"] > 0:
        text += f"\n{at['decades']:.2f} decades beyond the data" + (": do not trust it far" if at["decades"] > 1 else "")
    for name in at["unknown"]:
        text += f"\nthe data have one {name} only: how lr* changes with it is not known, and taken as not at all"
    return text


def add_sweep_flags(parser):
    parser.add_argument("--seeds", default="0", help="separated by commas")
    parser.add_argument("--method", choices=("stable", "decay"), default="stable", help="read the loss at a constant rate, or "
                        "after a decay that branches off")
    parser.add_argument("--decay_share", type=float, default=0.2, help="of decay: its share of the steps")
    parser.add_argument("--folder", default="", help="of the runs; default: the table's name without .csv")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")


def main(argv):
    parser = argparse.ArgumentParser(prog="lr_law.py", description="Fit and predict the optimum learning rate.")
    commands = parser.add_subparsers(dest="command", required=True)
    f = commands.add_parser("fit", help="parabolas and the law from a table of runs")
    f.add_argument("runs", help="a CSV with a header")
    for column in ("N", "D", "lr", "loss", "group"):
        f.add_argument(f"--{column}", default=column, help=f"name of the column (default: {column})")
    f.add_argument("--basin", type=float, default=0.05, help="points above (1 + this) times the least loss are left out")
    f.add_argument("--joint", action="store_true", help="take the best rate over all groups of an (N, D)")
    f.add_argument("--fixed", choices=("N", "D"), default="", help="what is the same in all runs, and left out of the law")
    f.add_argument("--hold_out", action="store_true", help="fit without the largest N too, and say what that costs there")
    f.add_argument("-o", "--output", default="", help="write the law to this file")
    f.add_argument("--plot", default="", help="write a picture to this file")
    p = commands.add_parser("predict", help="the rate at a size and a number of tokens")
    p.add_argument("--law", required=True, help=f"a file of `fit`, or one of {', '.join(LAWS | RATIOS)}")
    p.add_argument("--n_params", type=float, required=True)
    p.add_argument("--tokens", type=float, required=True)
    p.add_argument("--batch_tokens", type=float, default=0, help="of a step of yours: a published law's rate is carried to it, by "
                   "its square root; 0: as published, for its own batch")
    p.add_argument("--anchor", default="", help="N,D,LR: a point of yours from which a published law gives the ratio")
    for name, text in (("plan", "what a sweep costs"), ("sweep", "run it, one row of a CSV after the other")):
        s = commands.add_parser(name, help=text, epilog="flags of train.py follow after --")
        if name == "sweep":
            s.add_argument("csv", help="the table of runs, made or gone on with")
            s.add_argument("--shard", default="1/1", help="I/N: every N-th run from the I-th, for job arrays")
        s.add_argument("--sizes", required=True, help="LAYERSxWIDTH, separated by commas")
        s.add_argument("--lrs", required=True, help="1e-3,3e-3 or LOW:HIGH:COUNT")
        s.add_argument("--tokens", required=True, help="at which each run is read: 1e6,2e6 or LOW:HIGH:COUNT")
        add_sweep_flags(s)
        if name == "plan":
            s.add_argument("--flops_per_second", type=float, default=1e11, help="of the machine, as train.py reaches it")
    t = commands.add_parser("transfer", help="the rates of a target from a sweep of a small proxy (muTransfer)",
                            epilog="flags of train.py for both follow after --")
    t.add_argument("csv", help="the proxy's table of runs, made by `sweep` or here")
    t.add_argument("--proxy", required=True, help="LAYERSxWIDTH, the base size")
    t.add_argument("--target", required=True, help="LAYERSxWIDTH")
    t.add_argument("--param", choices=("mup", "completep"), default="completep")
    t.add_argument("--lrs", default="", help="tune the proxy first, at these rates, as `sweep` does")
    t.add_argument("--tokens", default="", help="at which its runs are read; the most counts")
    t.add_argument("--target_tokens", type=float, default=0, help="0: the proxy's")
    t.add_argument("--target_batch_tokens", type=int, default=0, help="0: the proxy's")
    t.add_argument("--target_n_head", type=int, default=0, help="0: the proxy's, wider ones")
    t.add_argument("--horizon", choices=("sqrt", "bjorck", "none"), default="sqrt", help="rule for another number of steps")
    add_sweep_flags(t)
    k = commands.add_parser("coordcheck", help="how far activations move, over width and depth, by parametrisation",
                            epilog="flags of train.py follow after --")
    k.add_argument("--widths", default="64,128,256,512,1024", help="the first is the base")
    k.add_argument("--depths", default="2,4,8,16,32", help="the first is the base; empty: over width alone")
    k.add_argument("--params", default="standard,mup,completep")
    k.add_argument("--steps", type=int, default=5)
    k.add_argument("--seeds", type=int, default=2)
    k.add_argument("--plot", default="", help="write a picture to this file")
    at = argv.index("--") if "--" in argv else len(argv)
    a = parser.parse_args(argv[:at])
    if a.command in ("plan", "sweep", "transfer") and not 0 < a.decay_share < 1:
        raise BadInput(f"--decay_share={a.decay_share}: above 0 and below 1 is needed")
    for name in ("jobs", "flops_per_second"):
        if not 0 < getattr(a, name, 1) < math.inf:
            raise BadInput(f"--{name}={getattr(a, name):g}: must be positive")
    if (a.command == "sweep" or a.command == "transfer" and a.lrs) and not (a.folder or Path(a.csv).suffix):
        raise BadInput(f"{a.csv}: a name such as runs.csv is needed; the runs go to the folder of that name without its end")
    if a.command in ("plan", "sweep"):
        runs = planned_runs(a.sizes, a.lrs, a.tokens, a.seeds, argv[at + 1:])
        if a.command == "plan":
            print(plan(runs, a.method, a.decay_share, a.flops_per_second))
        else:
            sweep(runs, a.csv, a.folder or str(Path(a.csv).with_suffix("")), a.method, a.decay_share, a.jobs, a.shard)
        return
    if a.command in ("coordcheck", "transfer"):
        print((coordcheck_command if a.command == "coordcheck" else transfer_command)(a, argv[at + 1:]))
        return
    print(fit_command(a) if a.command == "fit" else predict_command(a))


if __name__ == "__main__":
    command(main)
