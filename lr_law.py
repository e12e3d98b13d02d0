"""lr_law.py: the optimum learning rate as a function of model size and training tokens.

    python lr_law.py plan --sizes=2x64,2x128,4x128 --lrs=1e-3:3e-2:5 --tokens=2e5,4e5,8e5
    python lr_law.py sweep --sizes=2x64,2x128,4x128 --lrs=1e-3:3e-2:5 --tokens=2e5,4e5,8e5 runs.csv
    python lr_law.py fit runs.csv -o law.json --plot=law.png
    python lr_law.py fit runs.csv -o law.json --extrapolate=1.6e6
    python lr_law.py predict --law=law.json --n_params=4e9 --tokens=1.2e11
    python lr_law.py predict --law=step --n_params=4e9 --tokens=1.2e11       # a published law
    python lr_law.py transfer runs.csv --proxy=2x64 --target=8x256           # muTransfer
    python lr_law.py coordcheck

Flags of train.py follow after `--`, for example `sweep ... runs.csv -- --vocab_size=1024`.

The method is that of Zhou et al. 2026 (arXiv 2601.05049), in three fits:
    L(lr) = L_min + C (ln lr - ln lr*)^2     at one size N and one horizon D       (their eq. 2)
    L(D)  = L_0 + A D^-gamma                 at one size and one learning rate     (their eq. 4)
    lr*   = exp(a) N^b D^c                   over all sizes and horizons           (their eq. 6)
The paper itself was not available to us, only summaries of it. Docstrings say what they leave open.

Symbols
    N        parameters without the embedding
    D        training tokens, the horizon
    lr       peak learning rate; lr* is the one with the lowest loss
    L        loss in nats per token
    group    other settings that tell runs apart, such as the batch size
    run      a dict of N, D, lr, loss and group: one point of the data, a row of a table
    slice    the runs of one (N, D, group), which differ in lr alone
    optimum  an (N, D) and its lr*, most often of the parabola through a slice
    a        in a law, its constant; in a command, its flags as argparse returns them
"""
import csv
import functools
import io
import itertools
import json
import math
import operator
import os
import shlex
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from model import (
    GPT,
    BadInput,
    Parser,
    between,
    command,
    fcntl,
    listed,
    positive,
    read_text,
    reading,
    tokenizer_from_dict,
    written_whole,
)

# --------------------------------------------------------------------------------------------------
# The three fits


def r_squared(y, fitted) -> float:
    """The share of the variance of y that the fitted values explain."""
    total = ((y - y.mean()) ** 2).sum()
    return float(1 - ((y - fitted) ** 2).sum() / total) if total > 0 else 1.0


def fit_parabola(lr, loss) -> dict:
    """Fits L = L_min + C (ln lr - ln lr*)^2 by least squares (eq. 2). lr, loss: (n,), 3 or more.

    Returns a dict of floats: lr, that of the vertex (ln lr is held within -700 and 700; nan if C is
    0), L_min, C and r2, see r_squared. The vertex is a minimum if C > 0. The base of the paper's
    logarithm is unknown; it rescales C alone."""
    x, y = np.log(lr), np.asarray(loss, float)
    z = x - x.mean()
    c2, c1, c0 = np.polyfit(z, y, 2)
    vertex = -c1 / (2 * c2) if c2 else math.nan
    return {"lr": float(np.exp(np.clip(x.mean() + vertex, -700, 700))),
            "L_min": float(c0 - c2 * vertex**2), "C": float(c2),
            "r2": r_squared(y, np.polyval((c2, c1, c0), z))}


def basin(loss, tolerance: float = 0.05) -> slice:
    """The points around the lowest loss that a parabola can describe. loss is in order of lr.

    They are the unbroken stretch around the lowest with loss <= (1 + tolerance) times the lowest,
    and at least one neighbor on each side of the lowest. Further out, runs begin to diverge."""
    first = best = int(np.argmin(loss))
    end, limit = best + 1, (1 + tolerance) * loss[best]
    while first > 0 and loss[first - 1] <= limit:
        first -= 1
    while end < len(loss) and loss[end] <= limit:
        end += 1
    return slice(min(first, max(best - 1, 0)), max(end, min(best + 2, len(loss))))


def fit_horizon(D, loss, gammas=(0.01, 3.0)) -> dict:
    """Fits L(D) = L_0 + A D^-gamma by least squares, L_0 >= 0, A >= 0, gamma in `gammas` (eq. 4).

    D, loss: (n,), 3 or more. For a given gamma, L_0 and A are a linear problem (linear_horizon).
    gamma comes from 6 grid searches: the first over `gammas`, each of the others between the
    neighbors of the best point before. Returns a dict of floats: L_0, A, gamma."""
    D, y = np.asarray(D, float), np.asarray(loss, float)
    low, high = gammas
    for _ in range(6):
        grid = np.geomspace(low, high, 101)
        best = int(np.argmin([linear_horizon(D**-gamma, y)[2] for gamma in grid]))
        gamma, low, high = grid[best], grid[max(best - 1, 0)], grid[min(best + 1, 100)]
    L_0, A, _ = linear_horizon(D**-gamma, y)
    return {"L_0": float(L_0), "A": float(A), "gamma": float(gamma)}


def linear_horizon(p, y) -> tuple[float, float, float]:
    """L_0, A >= 0 that minimize the sum of (y - L_0 - A p)^2, and that sum. p = D^-gamma; y > 0.

    The sum is convex. If a constant comes out negative, it is 0 at the constrained minimum and the
    other one is fitted alone. They cannot both be negative."""
    A = ((p - p.mean()) @ y) / ((p - p.mean()) @ p)
    L_0 = y.mean() - A * p.mean()
    if A < 0:
        L_0, A = y.mean(), 0.0
    elif L_0 < 0:
        L_0, A = 0.0, (p @ y) / (p @ p)
    return L_0, A, ((y - L_0 - A * p) ** 2).sum()


def fit_law(N, D, lr) -> dict:
    """Fits ln lr* = a + b ln N + c ln D by least squares (eq. 6). N, D, lr: (n,); n may be 0.

    X has a row (1, ln N, ln D) for each optimum. Where all N (or all D) are equal, b (or c) cannot
    be known: it is None, and its column of X is 0. Returns a dict: a, b, c; their "covariance",
    lists (3, 3); dof, n minus the number of columns that are not 0; r2 of ln lr*, see r_squared; n;
    "N" and "D", the [least, most] of the data. The covariance is s^2 (X^T X)^-1 over the columns
    that are not 0, and 0 elsewhere. s^2 is the sum of squared residuals over dof.
    Raises BadInput, with n in the message, if dof is below 1 or the columns are not independent."""
    y = np.log(lr)
    X = np.stack([np.ones_like(y), np.log(N), np.log(D)], 1)
    known = (abs(X - X[:1]) > 1e-9).any(0)
    known[0] = True
    X = X * known
    dof = len(y) - sum(known)
    if dof < 1 or np.linalg.matrix_rank(X) < sum(known):
        raise BadInput(f"{len(y)} optima inside the swept rates are too few, or all on one line, "
                       f"for a law with {sum(known)} constants; a wider sweep finds more")
    inverse = np.linalg.pinv(X)  # (X^T X)^-1 X^T; rows of zeros for columns of zeros
    beta = inverse @ y
    variance = ((y - X @ beta) ** 2).sum() / dof
    a, b, c = (float(value) if found else None for value, found in zip(beta, known))
    return {"a": a, "b": b, "c": c, "covariance": (variance * inverse @ inverse.T).tolist(),
            "dof": int(dof), "n": len(y), "r2": r_squared(y, X @ beta),
            "N": [float(min(N)), float(max(N))], "D": [float(min(D)), float(max(D))]}


@functools.cache
def student_t(level: float, dof: int) -> float:
    """t with P(|T| <= t) = level, for T of Student's distribution with dof degrees of freedom.

    With T = sqrt(dof) tan(theta) the density of theta is proportional to cos(theta)^(dof - 1),
    which is integrated by the trapezoidal rule."""
    theta = np.linspace(0, math.pi / 2, 100_001)
    density = np.cos(theta) ** (dof - 1)
    mass = np.append(0, np.cumsum(density[1:] + density[:-1]))
    return math.sqrt(dof) * math.tan(np.interp(level * mass[-1], mass, theta))


def half_width(law: dict, x, level: float = 0.9) -> float:
    """Half the width of the t-interval of x . (a, b, c), whose variance is x^T covariance x."""
    variance = x @ np.array(law["covariance"]) @ x
    return student_t(level, law["dof"]) * math.sqrt(max(variance, 0.0))


def law_rate(law: dict, N: float, D: float) -> float:
    """lr* = exp(a) N^b D^c for N parameters without the embedding and D tokens."""
    return math.exp(law["a"]) * N ** (law["b"] or 0.0) * D ** (law["c"] or 0.0)


def predict_law(law: dict, N: float, D: float, level: float = 0.9) -> dict:
    """lr* at (N, D), its interval, and the distance of (N, D) from the data in decades.

    law: from fit_law. Returns a dict:
        lr        see law_rate
        interval  [low, high] of the value of the law at this level: ln lr minus and plus the
                  half_width at x = (1, ln N, ln D). Single optima scatter more widely
        decades   log10 of the factor by which N or D is outside the range in the law, the larger
                  of the two; 0 inside
        unknown   a list of those of "N" and "D" whose exponent is None and whose value here is not
                  within 1 % of that of the data"""
    lr, decades, unknown = law_rate(law, N, D), 0.0, []
    factor = math.exp(half_width(law, np.array([1.0, math.log(N), math.log(D)]), level))
    for name, exponent, value in (("N", "b", N), ("D", "c", D)):
        low, high = law[name]
        decades = max(decades, math.log10(value / high), math.log10(low / value))
        if law[exponent] is None and not 0.99 < value / low < 1.01:
            unknown.append(name)
    return {"lr": lr, "interval": [lr / factor, lr * factor], "decades": decades,
            "unknown": unknown}


# --------------------------------------------------------------------------------------------------
# Published laws


# {name: (text, law)}. The text: source; what N counts; batch size. The law: a function of N and of
# D in tokens that gives the learning rate.
LAWS = {
    "step": (
        "Step Law, arXiv 2503.04715; N: non-embedding parameters; batch: grown with D: "
        "0.58 D^0.571 tokens",
        lambda N, D: 1.79 * N**-0.713 * D**0.307),
    "bjorck": (
        "arXiv 2409.19913; N: parameters; batch: 0.5M tokens; the constant is disputed, this one "
        "for N and D in billions",
        lambda N, D: 1.55e-3 * (N / 1e9) ** -0.23 * (D / 1e9) ** -0.32),
    "deepseek": (
        "DeepSeek LLM, arXiv 2401.02954; N: non-embedding FLOPs per token / 6; batch: "
        "0.2920 C^0.3271 tokens; C = 6 N D here",
        lambda N, D: 0.3118 * (6 * N * D) ** -0.1250),
    "porian": (
        "arXiv 2406.19146; N: parameters with the head; batch: 0.7576 N^0.703 tokens",
        lambda N, D: 3.7 * N**-0.36),
    "kaplan": (
        "arXiv 2001.08361, as Step Law tabulates it; N: non-embedding parameters; batch: grows as "
        "the loss falls",
        lambda N, D: 3.239e-3 - 1.395e-4 * math.log(N)),
    "minicpm": (
        "arXiv 2404.06395; N: non-embedding parameters; batch: grows as the loss falls; constant "
        "under its own muP",
        lambda N, D: 0.01),
    "ling": (
        "Ling MoE, arXiv 2507.17702; N: non-embedding FLOPs per token / 6, of the active experts; "
        "batch: 0.0694 C^0.3644 tokens; C = 6 N D here",
        lambda N, D: 1.1576 * (6 * N * D) ** -0.1529),
    # The units of N and D behind its constant are unknown, so only ratios of it can be used.
    "zhou": ("arXiv 2601.05049; N: unknown; MoE models; batch: unknown",
             lambda N, D: N**-0.2219 * D**-0.3509),
}


def published(name: str, N: float, D: float, anchor=None) -> float:
    """The learning rate of a published law at (N, D), at the law's own batch size.

    anchor = (N, D, lr): a known optimum; the law then gives the ratio to it."""
    _, law = LAWS[name]
    if name == "zhou" and not anchor:
        raise BadInput(f"--law={name}: its units are unknown, so --anchor=N,D,LR is needed")
    lr = anchor[2] * law(N, D) / law(*anchor[:2]) if anchor else law(N, D)
    if min(lr, law(N, D)) <= 0:
        raise BadInput(f"--law={name} --n_params={N:g}: the law gives no positive learning rate "
                       "here or at the anchor, far outside the range that it was fitted on")
    return lr


# --------------------------------------------------------------------------------------------------
# From a table of runs to optima


def slices_of(runs) -> dict[tuple, tuple[np.ndarray, np.ndarray]]:
    """(N, D, group) -> (learning rates in order, their losses). Losses are means over seeds."""
    slices = defaultdict(lambda: defaultdict(list))
    for run in runs:
        slices[run["N"], run["D"], run["group"]][run["lr"]].append(run["loss"])
    return {key: (np.array(sorted(rates)), np.array([np.mean(rates[lr]) for lr in sorted(rates)]))
            for key, rates in sorted(slices.items())}


def fit_slices(runs, tolerance: float = 0.05) -> list[SimpleNamespace]:
    """Fits a parabola to every slice with at least 3 learning rates in its basin.

    Each result has N, D, group; lr, L_min, C and r2 of fit_parabola; rates and losses, the whole
    slice; near, the basin as a Python slice; n, the number of points in it; and inside: whether the
    parabola has a minimum, within the learning rates of the basin."""
    fitted = []
    for (N, D, group), (rates, losses) in slices_of(runs).items():
        near = basin(losses, tolerance)
        x = rates[near]
        if len(x) >= 3:
            fit = fit_parabola(x, losses[near])
            fitted.append(SimpleNamespace(
                N=N, D=D, group=group, **fit, rates=rates, losses=losses, near=near, n=len(x),
                inside=bool(fit["C"] > 0 and x[0] <= fit["lr"] <= x[-1])))
    return fitted


def extrapolate(runs, D: float) -> list[dict]:
    """Predicts runs at a horizon D from the losses of shorter ones, by fit_horizon.

    One for each size, group and learning rate with at least 3 horizons below D. Learning rates less
    than 1 % apart count as one, since tables round them. It is unknown whether the paper reads its
    horizons at a constant learning rate or after a decay; tables of both kinds can be used."""
    by_size, predicted = defaultdict(list), []
    for (N, horizon, group), (rates, losses) in slices_of(runs).items():
        if horizon < D:
            by_size[N, group] += [(lr, horizon, loss) for lr, loss in zip(rates, losses)]
    for (N, group), points in by_size.items():
        points.sort()
        while points:
            lr = points[0][0]
            curve = [point for point in points if point[0] <= 1.01 * lr]
            points = points[len(curve):]
            _, horizons, losses = np.array(curve).T
            if len(np.unique(horizons)) >= 3:
                fit = fit_horizon(horizons, losses)
                loss = fit["L_0"] + fit["A"] * D ** -fit["gamma"]
                predicted.append({"N": N, "D": D, "lr": lr, "loss": loss, "group": group})
    return predicted


def near_optima(runs) -> list[SimpleNamespace]:
    """Optima over all groups together, for the joint fit of learning rate and batch size: for each
    (N, D), the mean ln lr of the runs whose loss is within 0.25 % of the lowest, as DeepSeek LLM
    has it."""
    optima, runs_at = [], defaultdict(list)
    for run in runs:
        runs_at[run["N"], run["D"]].append(run)
    for (N, D), found in sorted(runs_at.items()):
        lowest = min(run["loss"] for run in found)
        good = [math.log(run["lr"]) for run in found if run["loss"] <= 1.0025 * lowest]
        optima.append(SimpleNamespace(N=N, D=D, lr=math.exp(np.mean(good))))
    return optima


def law_of(optima) -> dict:
    """fit_law of the N, D and lr of these optima."""
    return fit_law([o.N for o in optima], [o.D for o in optima], [o.lr for o in optima])


def group_laws(optima, everywhere: dict) -> dict[str, dict]:
    """The law of each group. Left out are groups whose optima are too few, or do not determine an
    exponent that `everywhere`, a law of all groups together, has."""
    laws = {}
    for group in sorted({o.group for o in optima}, key=lambda g: (len(g), g)):
        try:
            law = law_of([o for o in optima if o.group == group])
        except BadInput:
            continue
        if all(law[k] is not None or everywhere[k] is None for k in "bc"):
            laws[group] = law
    return laws


def group_rate(optima) -> Callable:
    """A function of a slice: its learning rate by the law of its group, or of all groups together
    where its group has none."""
    everywhere = law_of(optima)
    laws = group_laws(optima, everywhere)
    return lambda f: law_rate(laws.get(f.group, everywhere), f.N, f.D)


# --------------------------------------------------------------------------------------------------
# What a fit costs on runs that it has not seen


def costs(held, rest, others: dict) -> dict[str, np.ndarray]:
    """The costs of several ways of choosing the learning rate, on the slices `held`. The cost of a
    way, (slices,), is in nats above the lowest loss of each slice, by the slice's parabola.

    The ways: the law of a slice's group, and one learning rate for all, both fitted to the optima
    `rest`; Step Law as published; and `others`, functions of a slice by their names. The one
    learning rate is the one with the lowest total cost on `rest`."""
    constant = math.exp(np.average([math.log(f.lr) for f in rest], weights=[f.C for f in rest]))
    rates = {"its group's law": group_rate(rest), **others,
             "Step Law, published": lambda f: published("step", f.N, f.D),
             f"always {constant:.3g}": lambda f: constant}
    return {name: np.array([f.C * math.log(rate(f) / f.lr) ** 2 for f in held])
            for name, rate in rates.items()}


def hold_out(runs, tolerance: float = 0.05) -> dict[str, np.ndarray]:
    """The costs at the largest N of laws that are fitted without it; with several groups also that
    of the joint law. Raises BadInput if there are too few optima for a law."""
    largest = max(run["N"] for run in runs)
    fitted = [f for f in fit_slices(runs, tolerance) if f.inside]
    held = [f for f in fitted if f.N == largest]
    rest = [f for f in fitted if f.N != largest]
    if not held or len({f.N for f in rest}) < 2:
        raise BadInput(f"slices with their optimum inside are needed at N = {largest:g} and at two "
                       "smaller sizes")
    others = {}
    if len({f.group for f in fitted}) > 1:
        joint = law_of(near_optima([run for run in runs if run["N"] != largest]))
        others["the joint law"] = lambda f: law_rate(joint, f.N, f.D)
    return costs(held, rest, others)


def check_horizon(fitted, runs, D: float, tolerance: float) -> dict[str, np.ndarray]:
    """Checks `extrapolate` where the table has real runs at its horizon D: the costs there of
    learning rates that are chosen by shorter runs only. Empty without such runs, or if the shorter
    ones have too few optima for a law. fitted: slices of the shorter runs and of the predicted
    losses; runs: the table."""
    inside = [f for f in fitted if f.inside]
    shorter = [f for f in inside if f.D < D]
    longest = {(f.N, f.group): f.lr for f in shorter}  # the last one: slices are in order of D
    predicted = {(f.N, f.group): f.lr for f in inside if f.D == D}
    real = fit_slices([run for run in runs if run["D"] == D], tolerance)
    sizes = predicted.keys() & longest.keys()
    held = [f for f in real if f.inside and (f.N, f.group) in sizes]
    if not held:
        return {}
    try:
        return costs(held, shorter, {
            "that law with predictions": group_rate(inside),
            "the predicted losses": lambda f: predicted[f.N, f.group],
            "the longest run's lr*": lambda f: longest[f.N, f.group]})
    except BadInput:
        return {}


# --------------------------------------------------------------------------------------------------
# Plan and sweep: the runs that make such a table


def planned_runs(sizes, lrs, tokens, seeds: int, flags: list[str]) -> list[SimpleNamespace]:
    """The runs of train.py that a sweep needs, cheapest first: one for each size (blocks, width),
    learning rate and seed. flags: of train.py.

    Each has c, its train.Config; N; flops; and steps, those at which its loss is read. The learning
    rate is constant after warm-up, so one run gives a row of the table for each horizon in
    `tokens`. This is the paper's saving: a full grid has a run for each horizon."""
    import train
    base, runs = train_config(flags), []
    if base.teacher == "auto":
        raise BadInput("--teacher=auto: depends on the length of a run, and these are read at "
                       "several; name a checkpoint")
    V = base.vocab_size
    if base.tokenizer != "bpe":  # a bpe tokenizer, trained or not yet, has --vocab_size tokens
        V = tokenizer_from_dict(train.make_tokenizer_for(base, ())).n_vocab
    steps = sorted({max(1, round(D / base.batch_tokens)) for D in tokens})
    for (n_layer, n_embd), lr, seed in itertools.product(dict.fromkeys(sizes), lrs, range(seeds)):
        c = replace(base, n_layer=n_layer, n_embd=n_embd, lr=lr, seed=seed, steps=steps[-1],
                    warmup_steps=min(base.warmup_steps, steps[0]), sample_tokens=0,
                    schedule="constant")
        train.check(c)
        c = train.with_stop_in_steps(c)
        with torch.device("meta"):
            model = GPT(train.model_config(c, V))
        runs.append(SimpleNamespace(
            c=c, N=model.num_params() - model.embed.weight.numel(), steps=steps,
            flops=model.flops_per_token() * steps[-1] * c.batch_tokens))
    return sorted(runs, key=lambda run: (run.flops, run.c.seed, run.c.lr))


def plan_command(a) -> str:
    """What a sweep costs, and what a full grid does, which has a run for each horizon."""
    runs = planned_runs(a.sizes, a.lrs, a.tokens, a.seeds, a.flags)
    sizes = Counter((run.N, f"{run.c.n_layer} x {run.c.n_embd}", run.flops) for run in runs)
    steps, batch = runs[0].steps, runs[0].c.batch_tokens  # the same for all runs
    horizons = ", ".join(f"{step * batch:,}" for step in steps)
    lines = [f"  N {N:>12,} ({size})  {n} runs, read at {horizons} tokens: {n * flops:.3g} FLOPs"
             for (N, size, flops), n in sorted(sizes.items())]
    total, points = sum(run.flops for run in runs), len(runs) * len(steps)
    speed = a.flops_per_second
    full = total * sum(steps) / steps[-1]
    return "\n".join([*lines, f"{len(runs)} runs, {points} points, {total:.3g} FLOPs, "
                      f"{total / speed / 3600:.2f} hours at {speed:.3g} FLOP/s; the full grid: "
                      f"{points} runs, {full:.3g} FLOPs, {full / speed / 3600:.2f} hours"])


def sweep_command(a) -> str:
    """Trains the runs of a sweep, and appends a row to a CSV at each reading.

    Runs of another shard and rows that the table has are left out. The runs of a table NAME.csv
    have their folders in NAME."""
    runs = planned_runs(a.sizes, a.lrs, a.tokens, a.seeds, a.flags)
    rows = open_table(a.csv)
    for stored in rows.values():
        refuse_settings(a.csv, stored, runs[0].c)
    for run in runs[a.shard]:
        run_one(run, a.csv, rows)
    return f"written to {a.csv}"


DIVERGED = {"val_loss": math.inf, "flops": 0, "seconds": 0}


def run_one(run, path, rows):
    """Trains one of the planned runs from reading to reading, and appends a row at each that is not
    among `rows`. A run that diverges has the loss inf there and at all later readings."""
    c, result = run.c, None
    folder = Path(path).with_suffix("") / f"{c.n_layer}x{c.n_embd}-{c.lr:.3e}-{c.seed}"
    for steps in run.steps:
        D = steps * c.batch_tokens
        if (run.N, D, c.lr, c.seed) in rows:
            continue
        if result is not DIVERGED:
            result = train_until(c, steps, folder)
        append_row(path, {
            "N": run.N, "D": D, "lr": c.lr, "loss": result["val_loss"], "seed": c.seed,
            "n_layer": c.n_layer, "n_embd": c.n_embd, "flops": result["flops"],
            "seconds": round(result["seconds"], 1), "flags": settings(c)})


def train_until(c, steps: int, folder: Path) -> dict:
    """Trains a run up to this step, from the checkpoint in its folder if there is one. Returns
    train.train's result, or DIVERGED. Exits if a signal stops the run."""
    import train
    checkpoint, resume = folder / "ckpt.pt", ""
    if checkpoint.exists():
        resume = str(checkpoint)
        refuse_settings(folder, settings(train.load_run(resume)["config"]), c)
    try:
        result = train.train(replace(c, steps=steps, eval_every=steps, save_every=steps,
                                     out_dir=str(folder), resume=resume))
    except train.NonFinite:
        return DIVERGED
    if result["interrupted"]:
        raise SystemExit(128 + result["interrupted"])
    return result


# --------------------------------------------------------------------------------------------------
# muTransfer: tune a small proxy, and carry its learning rate over by rules (model.PARAM_RULES)


def target_flags(c, lr: float, ratio: float) -> dict:
    """The flags of c that change with the number of steps. lr: the proxy's; ratio: the target's
    optimizer steps over the proxy's.

    lr and weight decay are proportional to ratio^-1/2, 1 - beta to 1 / ratio (Complete(d)P, arXiv
    2512.22382, as summaries give it; eps, proportional to ratio^1/2, has no flag). A batch k times
    as large at the same tokens has ratio = 1 / k, so lr grows with sqrt(k). Muon's momentum changes
    as AdamW's betas do, since it too averages gradients."""
    flags = {"lr": lr, "weight_decay": c.weight_decay}
    if c.multipliers != "none":
        flags["multiplier_lr"] = c.multiplier_lr
        flags["multiplier_weight_decay"] = c.multiplier_weight_decay
    flags = {name: float(f"{value * ratio**-0.5:.4g}") for name, value in flags.items()}
    for name in ("beta1", "beta2", "momentum") if c.optimizer == "muon" else ("beta1", "beta2"):
        flags[name] = max(0.0, 1 - float(f"{(1 - getattr(c, name)) / ratio:.4g}"))
    return flags


def at_size(c, param: str, size: tuple[int, int], base: tuple[int, int]):
    """c with this parametrization, and with this size and base size, both (blocks, width)."""
    import train
    flags = {"param": param, "n_layer": size[0], "n_embd": size[1]}
    if param != "standard":
        flags["base_n_embd"] = base[1]
    if param == "completep":
        flags["base_n_layer"] = base[0]
    c = replace(c, **flags)
    train.check(c)
    return c


def proxy_optimum(path, size: tuple[int, int], c) -> SimpleNamespace:
    """The parabola of the proxy's runs at their longest horizon. size: (blocks, width)."""
    for stored in {*read_table(path, ["flags"], operator.itemgetter("flags"))}:
        refuse_settings(path, stored, c,  # a sweep shortens warm-ups, and counts stops in steps
                        ignored=("--warmup_steps", "--let_stop", "--distill_stop"))
    table, _ = read_runs(path, group="n_layer,n_embd")
    runs = [run for run in table if run["group"] == "{},{}".format(*size)]
    proxy = "--proxy={}x{}".format(*size)
    if not runs:
        raise BadInput(f"{path}: no runs of {proxy} in it")
    D = max(run["D"] for run in runs)
    found = fit_slices([run for run in runs if run["D"] == D])
    if not found or not found[0].inside:
        raise BadInput(f"{path}: at {D:,.0f} tokens the best learning rate of {proxy} is not "
                       "inside the swept ones; at least 3 around it are needed")
    return found[0]


def transfer_command(a) -> str:
    """muTransfer: the best learning rate of a proxy, and what the rules make of it at the target.

    The proxy has the base size, where every parametrization is the standard model."""
    import train
    c = train_config(a.flags)
    if c.param != "standard":
        raise BadInput(f"--param={c.param}: goes before the --, as the proxy is the standard model")
    best = proxy_optimum(a.csv, a.proxy, c)
    tokens, batch = a.target_tokens or best.D, a.target_batch_tokens or c.batch_tokens
    if tokens < batch:
        raise BadInput(f"--target_tokens={tokens:g} --target_batch_tokens={batch}: at least one "
                       "step is needed")
    ratio = tokens / best.D * c.batch_tokens / batch
    target = replace(c, batch_tokens=batch, steps=round(tokens / batch),
                     **target_flags(c, best.lr, ratio))
    target = at_size(target, a.param, a.target, a.proxy)
    config = train.model_config(target, target.vocab_size)
    return "\n".join([
        f"proxy, {best.D:,.0f} tokens: lr* {best.lr:.4g}, loss {best.L_min:.4f}, R^2 {best.r2:.3f} "
        f"of {best.n} points",
        f"target, {tokens:,.0f} tokens, {ratio:.3g} times the steps: {a.param} with m_N "
        f"{config.width_ratio:g}, m_L {config.depth_ratio:g}, m_D {config.head_ratio:g}",
        f"python train.py {settings(target, ignored=())}"])


# --------------------------------------------------------------------------------------------------
# Coordinate check: do activations move as much at every size?

ACTIVATIONS = ("embed", "attention", "ssm", "router", "mlp")  # the names of their modules


def activations(model: GPT, idx) -> dict[str, list[torch.Tensor]]:
    """The outputs of the modules of each kind for idx (B, T), one tensor a block; "stream": the
    residual stream after the last block; "logits"."""
    seen, hooks = defaultdict(list), []
    for name, module in model.named_modules():
        if (kind := name.rpartition(".")[2]) in ACTIVATIONS:
            hooks.append(module.register_forward_hook(
                lambda module, inputs, output, kind=kind: seen[kind].append(output)))
    with torch.no_grad():
        x, (stream,) = model(idx, hidden=(len(model.blocks),))
        logits = model.logits(x)
    for hook in hooks:
        hook.remove()
    return {**seen, "stream": [stream], "logits": [logits]}


def coordinate_check(c, steps: int = 5, seeds: int = 1) -> dict[str, float]:
    """RMS over all elements of the change of each kind of activation after `steps` steps at the
    constant learning rate c.lr, mean over seeds.

    Under a parametrization that transfers it is the same at every size (Yang et al. 2022, appendix
    D.1). The text is 4 sequences of 32 random tokens out of 256, the same at every step and size.
    Matrices that write into the stream start at 0: all of the model moves from step 3 on."""
    import train
    c = replace(c, block_size=32, schedule="constant", warmup_steps=0)
    moved = defaultdict(float)
    for seed in range(seeds):
        torch.manual_seed(seed)
        tokens = torch.randint(256, (4, 33))
        idx, targets = tokens[:, :-1], tokens[:, 1:]
        model = GPT(train.model_config(c, 256))
        optimizers = train.make_optimizers(c, model, [], train.Devices(torch.device("cpu")))
        before = activations(model, idx)
        for step in range(steps):
            x, _ = model(idx)
            model.loss(x, targets).backward()
            optimizers.clip(0.0)
            optimizers.step(step)
        for kind, after in activations(model, idx).items():
            squares = [(a - b).square().mean() for a, b in zip(after, before[kind], strict=True)]
            moved[kind] += torch.stack(squares).mean().sqrt().item() / seeds
    return dict(moved)


def slope(sizes, values) -> float:
    """The exponent k of values ~ sizes^k by least squares in the logarithms."""
    if min(values) <= 0:
        return math.nan
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def coordcheck_command(a) -> str:
    """How far activations move over widths and over depths (coordinate_check)."""
    c = train_config(a.flags)
    if a.steps < 3 or min(len(a.widths), len(a.depths)) < 2:
        raise BadInput(f"--widths={a.widths} --depths={a.depths} --steps={a.steps}: two widths, "
                       "two depths and 3 steps are needed at least")
    depth, width = base = a.depths[0], a.widths[0]
    tables = {f"over width ({depth} blocks)": {n: (depth, n) for n in a.widths},
              f"over depth (width {width})": {n: (n, width) for n in a.depths}}
    configs = {(param, size): at_size(c, param, size, base) for param in a.params
               for sizes in tables.values() for size in sizes.values()}
    moved = {key: coordinate_check(config, a.steps, a.seeds) for key, config in configs.items()}
    lines = [f"RMS of the change after {a.steps} steps with {c.optimizer} at lr {c.lr:g}"]
    for title, sizes in tables.items():
        lines.append(f"{title:<23}" + "".join(f"{n:>10}" for n in sizes) + "     slope")
        for param, kind in itertools.product(a.params, moved[a.params[0], base]):
            values = [moved[param, size][kind] for size in sizes.values()]
            lines.append(f"  {param:<10} {kind:<10}" + "".join(f"{v:>10.3g}" for v in values)
                         + f"{slope([*sizes], values):>+10.2f}")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# The flags of runs

# Flags that a row states itself, that `sweep` sets, or that do not change the loss.
NOT_SETTINGS = {"n_layer", "n_embd", "lr", "seed", "steps", "schedule", "micro_batch", "device",
                "compile", "out_dir", "resume", "sample_tokens", "eval_every", "log_every",
                "save_every", "keep_checkpoints"}


def settings(c, ignored=NOT_SETTINGS) -> str:
    """The flags that are not at train.py's defaults, as on a command line. Rows of a table state
    them. What is not UTF-8 in them, as in names of files, is escaped."""
    text = shlex.join(f"--{f.name}={getattr(c, f.name)}" for f in fields(c)
                      if f.name not in ignored and getattr(c, f.name) != f.default)
    return text.encode(errors="backslashreplace").decode()


def refuse_settings(where: str, stored: str, c, ignored=()):
    """Raises BadInput, with the flags that differ, if stored settings are not those of c. ignored:
    flags that may differ, such as "--warmup_steps"."""
    differ = {*shlex.split(stored)} ^ {*shlex.split(settings(c))}
    differ = sorted(flag for flag in differ if flag.partition("=")[0] not in ignored)
    if differ:
        raise BadInput(f"{where}: holds runs with other flags (not in both: {' '.join(differ)}); "
                       "name another")


def train_config(flags: list[str]):
    """train.Config from flags. Those that cannot be used here are refused. Those that a command
    sets itself for each run, such as --n_layer, have no effect."""
    import train
    c = train.parse_flags(flags)
    for name in ("lr_law", "resume", "decay_fraction", "dry_run", "schedule", "out_dir"):
        if getattr(c, name) != train.FLAGS[name].default:
            raise BadInput(f"--{name}={getattr(c, name)}: cannot be used here")
    return c


# --------------------------------------------------------------------------------------------------
# Files: tables of runs, and the law


def read_table(path, needed, read) -> list:
    """read(row) of each row of a CSV file with a header, which has the needed columns. row:
    {column: text}. Blank lines are left out. Raises BadInput with the number of the line."""
    found, rows = [], csv.DictReader(io.StringIO(read_text(path), newline=""))
    with reading(path):
        names = rows.fieldnames or []
        if missing := [name for name in needed if names.count(name) != 1]:
            raise BadInput(f"no column {', '.join(missing)}, or two; there are {', '.join(names)}")
        for row in rows:
            with reading(f"line {rows.line_num}"):
                if None in row or None in row.values():
                    raise BadInput(f"{len(names)} cells are needed")
                found.append(read(row))
    return found


def read_runs(path, names=("N", "D", "lr", "loss"), group="") -> tuple[list[dict], int]:
    """Reads runs from a CSV with a header. names: those of the columns of N, D, lr and loss; group:
    names of columns that make up the group, separated by commas.

    Returns the runs, and how many are left out: those that diverged (their loss is inf, nan or an
    empty cell), and the other seeds of such a setting, whose mean would hide that it diverges."""
    groups = group.split(",") if group else []

    def read(row):
        N, D, lr, loss = (float(row[name] or "nan") for name in names)  # empty: it diverged
        if not all(0 < value < math.inf for value in (N, D, lr)) or loss <= 0:
            raise BadInput("N, D, lr and loss must be positive")
        return {"N": N, "D": D, "lr": lr, "loss": loss, "flags": row.get("flags"),
                "group": ",".join(row[name] for name in groups)}

    runs = read_table(path, [*names, *groups], read)
    flags = {run.pop("flags") for run in runs}
    if len(flags) > 1 and "flags" not in groups:
        raise BadInput(f"{path}: runs with different flags, which do not compare; --group=flags "
                       "keeps them apart")
    setting = operator.itemgetter("N", "D", "lr", "group")
    diverged = {setting(run) for run in runs if not math.isfinite(run["loss"])}
    kept = [run for run in runs if setting(run) not in diverged]
    return kept, len(runs) - len(kept)


COLUMNS = ("N", "D", "lr", "loss", "seed", "n_layer", "n_embd", "flops", "seconds", "flags")


def open_table(path) -> dict[tuple, str]:
    """Opens or begins a table of `sweep`. Returns (N, D, lr, seed) -> flags of each row. Several
    processes may begin a table at once: the one that locks the file first writes the header."""
    header = ",".join(COLUMNS)
    with open(path, "a") as file:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX)
        if file.seek(0, os.SEEK_END) == 0:  # empty now, not when it was opened
            file.write(header + "\n")
    text = read_text(path)
    if not text.startswith(header) or not text.endswith("\n"):  # rows are appended
        raise BadInput(f"{path}: not a table of `sweep`: columns {header}, and a line end after "
                       "each row, are needed")
    return dict(read_table(path, COLUMNS, lambda row: (
        (int(row["N"]), int(row["D"]), float(row["lr"]), int(row["seed"])), row["flags"])))


def append_row(path, row: dict):
    """Appends one row in a single write, so that several processes can append to one table."""
    with open(path, "a", encoding="utf-8") as file:
        csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(row)
        file.flush()
        os.fsync(file.fileno())


LAW_VERSION = "nanolet-law-2"  # of the file's format


def load_law(path, flag: str) -> dict:
    """Reads a law that `fit` wrote. Raises BadInput unless it gives finite learning rates and
    intervals at the sizes and horizons of its own data."""
    with reading(f"{flag}={path}"):
        law = json.loads(read_text(path))
        if law["version"] != LAW_VERSION:
            raise ValueError(f"{LAW_VERSION} is needed")
        found = [predict_law(law, N, D) for N, D in itertools.product(law["N"], law["D"])]
        values = [[at["lr"], *at["interval"]] for at in found]
        if law["dof"] < 1 or not values or not np.isfinite(values).all():
            raise ValueError("no finite learning rate at the N and D of its data")
    return law


# --------------------------------------------------------------------------------------------------
# Fit and predict: reports and the plot


def report(law: dict, fitted: list[SimpleNamespace], diverged: int) -> list[str]:
    """What a fit found: its slices (if there are few), the law, and that of each group alone.
    diverged: how many runs read_runs has left out."""
    inside = [f for f in fitted if f.inside]
    lines = [f"{len(fitted)} slices with a parabola, {len(inside)} with the optimum inside the "
             f"swept rates; {diverged} diverged runs left out"]
    if fitted:
        lines.append(f"R^2 of the parabolas: median {np.median([f.r2 for f in fitted]):.3f}")
    for f in fitted if len(fitted) <= 40 else []:
        note = "" if f.inside else "   <- no minimum inside the sweep: widen it"
        lines.append(f"  N {f.N:.3g}  D {f.D:.3g}  {f.group:>8}  lr* {f.lr:.3g}  loss {f.L_min:.4f}"
                     f"  C {f.C:.4f}  R^2 {f.r2:.3f}  {f.n} points{note}")
    text = f"lr* = {math.exp(law['a']):.4g}"
    for axis, name, k in ((1, "N", "b"), (2, "D", "c")):
        if law[k] is None:
            lines.append(f"all optima have {name} = {law[name][0]:g}: the law leaves {name} out")
        else:
            half = half_width(law, np.eye(3)[axis])
            text += f" * {name}^{law[k]:.3f} [{law[k] - half:.3f}, {law[k] + half:.3f}]"
    lines.append(f"{text}   R^2 {law['r2']:.3f}, {law['n']} optima; 90 % t-intervals")
    if len({f.group for f in inside}) > 1:
        for group, own in group_laws(inside, law).items():
            powers = " ".join(f"{name}^{own[k]:+.3f}" for name, k in (("N", "b"), ("D", "c"))
                              if own[k] is not None)
            lines.append(f"  group {group:>8} alone: {powers}   R^2 {own['r2']:.3f}, {own['n']} "
                         "optima")
    return lines


def cost_lines(title: str, found: dict) -> list[str]:
    """What `costs` found, as a table."""
    slices = len(next(iter(found.values())))
    lines = [f"{title}: nats above the lowest loss of {slices} slices, by their parabolas",
             f"{'':<26}{'median':>9}{'max':>9}"]
    return lines + [f"  {name:<24}{np.median(values):>9.4f}{values.max():>9.4f}"
                    for name, values in found.items()]


def plot_fit(fitted, law, path):
    """Left: losses over lr with their parabolas. Right: optima and the law over D. A color for
    each N, and a tick for each learning rate and horizon of the table."""
    from probes import plotting, save_figure
    figure, (left, right) = plotting(path).subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    D = np.geomspace(law["D"][0], 3 * law["D"][1], 30)
    colors = {N: f"C{i}" for i, N in enumerate(sorted({f.N for f in fitted}))}
    for f in fitted:
        lr = f.rates[f.near]
        left.semilogx(lr, f.losses[f.near], ".", color=colors[f.N])
        lr = np.geomspace(lr[0], lr[-1], 50)
        left.semilogx(lr, f.L_min + f.C * np.log(lr / f.lr) ** 2, color=colors[f.N], linewidth=0.8)
        if f.inside:
            right.loglog(f.D, f.lr, "o", color=colors[f.N])
    for N, color in colors.items():
        found = [predict_law(law, N, d) for d in D]
        right.loglog(D, [p["lr"] for p in found], color=color, label=f"N = {N:.3g}")
        right.fill_between(D, *zip(*[p["interval"] for p in found]), color=color, alpha=0.15)
    rates, horizons = {lr for f in fitted for lr in f.rates}, {f.D for f in fitted}
    for axis, ticks in ((left, sorted(rates)), (right, sorted(horizons))):
        axis.set_xticks(ticks, [f"{value:.3g}" for value in ticks], rotation=45)
        axis.set_xticks([], minor=True)
    left.set(xlabel="learning rate", ylabel="loss, nats", title="slices and their parabolas")
    right.set(xlabel="D, tokens", ylabel="lr*", title="optima and the law, 90 % interval")
    right.legend(fontsize="small")
    save_figure(figure, path)


def fit_command(a) -> str:
    """Parabolas and the law from a table of runs."""
    table, diverged = read_runs(a.runs, (a.N, a.D, a.lr, a.loss), a.group)
    runs = table
    if a.extrapolate:
        runs = [run for run in table if run["D"] < a.extrapolate]
        predicted = extrapolate(table, a.extrapolate)
        runs += predicted
    fitted = fit_slices(runs, a.basin)
    with reading(a.runs):
        law = law_of(near_optima(runs) if a.joint else [f for f in fitted if f.inside])
    lines = report(law, fitted, diverged)
    if a.extrapolate:
        lines.append(f"{len(predicted)} losses at D = {a.extrapolate:g} are predicted by L(D)")
        if found := check_horizon(fitted, table, a.extrapolate, a.basin):
            lines += cost_lines(f"real runs at D = {a.extrapolate:g}", found)
    if a.hold_out:
        with reading(f"{a.runs} --hold_out"):
            lines += cost_lines("held out, the largest N", hold_out(table, a.basin))
    if a.plot:
        plot_fit(fitted, law, a.plot)
    if a.output:
        if Path(a.output).exists():
            load_law(a.output, "--output")  # refuses to overwrite what is not a law
        with written_whole(a.output) as new:
            new.write_text(json.dumps(
                {"version": LAW_VERSION, "units": "parameters, tokens", **law}, indent=1))
        lines.append(f"written to {a.output}")
    return "\n".join(lines)


def describe_prediction(at: dict) -> str:
    """What predict_law returned, as text."""
    text = "lr {:.4g}   90 % interval {:.4g} to {:.4g}".format(at["lr"], *at["interval"])
    if at["decades"] > 0:
        far = ": do not trust it far" if at["decades"] > 1 else ""
        text += f"\n{at['decades']:.2f} decades beyond the data{far}"
    for name in at["unknown"]:
        text += f"\nthe data have one {name}: lr* is taken not to change with it"
    return text


def predict_command(a) -> str:
    """The learning rate at a size and a horizon."""
    N, D = a.n_params, a.tokens
    if a.law in LAWS:
        ratio = "; as a ratio to the anchor" if a.anchor else ""
        return f"lr {published(a.law, N, D, a.anchor):.4g}   ({a.law}: {LAWS[a.law][0]}{ratio})"
    if a.anchor:
        raise BadInput(f"--law={a.law} --anchor: only published laws take an anchor")
    return describe_prediction(predict_law(load_law(a.law, "--law"), N, D))


# --------------------------------------------------------------------------------------------------
# Command line


def numbers(text: str) -> list[float]:
    """Positive numbers from "1,2,3", or from "low:high:count", evenly spaced in the logarithm. This
    and the next two are types of flags: a ValueError is reported with the flag and its value."""
    if ":" in text:
        low, high, count = text.split(":")
        values = np.geomspace(float(low), float(high), min(int(count), 10_000)).tolist()
    else:
        values = [float(value) for value in text.split(",")]
    if not values or not all(0 < value < math.inf for value in values):
        raise ValueError
    return list(dict.fromkeys(values))


def layers_x_width(text: str) -> tuple[int, int]:
    """(blocks, width) of "4x128"."""
    n_layer, n_embd = map(int, text.split("x"))
    return n_layer, n_embd


def shard(text: str) -> slice:
    """The runs that "I/N" stands for: every N-th from the I-th."""
    i, n = map(int, text.split("/"))
    if not 1 <= i <= n:
        raise ValueError
    return slice(i - 1, None, n)


# {flag: (default, help, type)}. The type can be left out: numbers are then of the type of the
# default and positive. A default of None: the flag is needed. A default of False: it has no value.
GRID = {
    "--sizes": (None, "LAYERSxWIDTH, separated by commas", listed(layers_x_width)),
    "--lrs": (None, "1e-3,3e-3 or LOW:HIGH:COUNT", numbers),
    "--tokens": (None, "horizons at which each run is read, likewise", numbers),
    "--seeds": ("1", "number of seeds: 0, 1, ...", between(int, 1, 10_000))}
COMMANDS = {
    fit_command: {
        "runs": (None, "a CSV with a header"),
        **{f"--{name}": (name, "name of the column") for name in ("N", "D", "lr", "loss")},
        "--group": ("", "names of columns that tell runs apart, such as the batch size"),
        "--basin": (0.05, "losses above (1 + this) times the lowest are left out, except the "
                    "neighbors of the lowest"),
        "--extrapolate": (0.0, "a number of tokens D: losses there are predicted by L(D) and join "
                          "those of shorter runs; runs from D on are left out"),
        "--joint": (False, "take the best learning rate over all groups of an (N, D)"),
        "--hold_out": (False, "also fit without the largest N, and say what that costs there"),
        "-o --output": ("", "write the law to this file"),
        "--plot": ("", "write a picture to this file")},
    predict_command: {
        "--law": (None, f"a file of `fit`, or one of {', '.join(LAWS)}"),
        "--n_params": (None, "N", positive(1.0)), "--tokens": (None, "D", positive(1.0)),
        "--anchor": ((), "N,D,LR: a known optimum, to which a published law gives the ratio",
                     listed(positive(1.0), 3))},
    plan_command: {**GRID, "--flops_per_second": (1e11, "that train.py reaches")},
    sweep_command: {
        "csv": (None, "the table of runs, new or to be continued"), **GRID,
        "--shard": ("1/1", "I/N: every N-th run from the I-th, for job arrays", shard)},
    transfer_command: {
        "csv": (None, "the proxy's table of runs, made by `sweep`"),
        "--proxy": (None, "LAYERSxWIDTH, the base size", layers_x_width),
        "--target": (None, "LAYERSxWIDTH", layers_x_width),
        "--param": ("completep", "parametrization of the target: completep or mup"),
        "--target_tokens": (0.0, "0: the proxy's"),
        "--target_batch_tokens": (0, "0: the proxy's")},
    coordcheck_command: {
        "--widths": ("64,128,256,512,1024", "the first is the base", listed(positive(1))),
        "--depths": ("2,4,8,16,32", "the first is the base", listed(positive(1))),
        "--params": ("standard,mup,completep", "parametrizations", listed(str)),
        "--steps": (5, "of training"), "--seeds": (2, "to average over")}}

WITHOUT_TRAIN_FLAGS = (fit_command, predict_command)


def add_flag(parser, names: str, default, text: str, kind=str):
    """Adds an entry of COMMANDS to an argparse parser. names: such as "-o --output"."""
    options = {"help": text, "default": default, "type": kind}
    if default is False:
        options = {"help": text, "action": "store_true"}
    elif isinstance(default, (int, float)):
        options["type"] = positive(default)
    elif default is None and names.startswith("-"):
        options["required"] = True
    parser.add_argument(*names.split(), **options)


def main(argv):
    parser = Parser(prog="lr_law.py", description="Fit and predict the optimum learning rate.")
    commands = parser.add_subparsers(required=True)
    for function, flags in COMMANDS.items():
        one = commands.add_parser(function.__name__.removesuffix("_command"),
                                  help=function.__doc__.split("\n")[0])
        one.set_defaults(function=function)
        if function not in WITHOUT_TRAIN_FLAGS:
            one.epilog = "flags of train.py follow after --"
        for names, options in flags.items():
            add_flag(one, names, *options)
    at = argv.index("--") if "--" in argv else len(argv)
    a = parser.parse_args(argv[:at])
    a.flags = argv[at + 1:]  # of train.py
    if a.flags and a.function in WITHOUT_TRAIN_FLAGS:
        raise BadInput(f"{argv[0]} takes no flags of train.py after --: {a.flags}")
    print(a.function(a))


if __name__ == "__main__":
    command(main)
