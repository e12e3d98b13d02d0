"""lr_law.py: the best learning rate as a function of model size and training tokens.

The method is that of Zhou et al. 2026 (arXiv 2601.05049), three fits by least squares:
    L(lr) = L_min + C (ln lr - ln lr*)^2     a parabola, at one N and one D            (their eq. 2)
    L(D)  = L_0 + A D^-gamma                 a power law, at one N and one lr          (their eq. 4)
    lr*   = exp(a) N^b D^c                   the law, over the lr* of all parabolas    (their eq. 6)
The paper itself was not available to us, only summaries of it. Docstrings say what they leave open.

    L        loss in nats per token
    N        parameters without the embedding
    D        training tokens, the horizon
    lr       peak learning rate; lr* is the one with the lowest loss
    L_min, C, L_0, A, gamma, a, b, c    the constants that are fitted

    run      a training by train.py. Its loss is read at one or several horizons
    point    a dict of N, D, lr, loss and group: one row of a table
    group    other settings that tell points apart, as text, such as the batch size
    slice    the points of one (N, D, group), which differ in lr (and seed) alone
    optimum  an (N, D) and its lr*, mostly from the parabola of a slice

Commands, in the order of use:

    python lr_law.py plan --sizes=2x64,2x128,4x128 --lrs=1e-3:3e-2:5 --tokens=2e5,4e5,8e5
    python lr_law.py sweep --sizes=2x64,2x128,4x128 --lrs=1e-3:3e-2:5 --tokens=2e5,4e5,8e5 runs.csv
    python lr_law.py fit runs.csv -o law.json --plot=law.png
    python lr_law.py fit runs.csv -o law.json --extrapolate=1.6e6
    python lr_law.py predict --law=law.json --n_params=4e9 --tokens=1.2e11
    python lr_law.py predict --law=step --n_params=4e9 --tokens=1.2e11       # a published law
    python lr_law.py transfer runs.csv --proxy=2x64 --target=8x256           # muTransfer, the rival
    python lr_law.py coordcheck                                              # a test of its rules

Flags of train.py follow after `--`, for example `sweep ... runs.csv -- --vocab_size=1024`. A law
holds for the optimizer, schedule and data of its runs, and law.json does not name them.
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
from collections import defaultdict
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
    """The share of the variance of y that the fitted values explain. Both: (n,). 1.0 if all of y is
    equal."""
    total = ((y - y.mean()) ** 2).sum()
    return float(1 - ((y - fitted) ** 2).sum() / total) if total > 0 else 1.0


def fit_parabola(lr, loss) -> dict:
    """Fits L = L_min + C (ln lr - ln lr*)^2 (eq. 2). lr, loss: (n,), with 3 or more different lr.

    Returns a dict of floats: lr, the lr* of the vertex; L_min; C; r2, see r_squared. The vertex is
    a minimum if C > 0. ln lr* is clipped to [-700, 700], so that lr* is a float; it is nan if C is
    0. The base of the paper's logarithm is unknown. Another base changes C alone."""
    x, y = np.log(lr), np.asarray(loss, float)
    z = x - x.mean()  # centered, for precision
    c2, c1, c0 = np.polyfit(z, y, 2)
    vertex = -c1 / (2 * c2) if c2 else math.nan
    return {"lr": float(np.exp(np.clip(x.mean() + vertex, -700, 700))),
            "L_min": float(c0 - c2 * vertex**2), "C": float(c2),
            "r2": r_squared(y, np.polyval((c2, c1, c0), z))}


def basin(loss, tolerance: float = 0.05) -> slice:
    """The points near the minimum, which a parabola can describe. loss: (n,), in order of lr.

    Returns their Python slice: the unbroken stretch around the lowest loss where loss is at most
    (1 + tolerance) times the lowest, and at least one neighbor on each side of the lowest, if there
    is one. Further out, runs begin to diverge."""
    first = end = best = int(np.argmin(loss))
    limit = (1 + tolerance) * loss[best]
    while first > 0 and loss[first - 1] <= limit:
        first -= 1
    while end < len(loss) and loss[end] <= limit:
        end += 1
    return slice(max(min(first, best - 1), 0), max(end, best + 2))


def fit_horizon(D, loss) -> dict:
    """Fits L(D) = L_0 + A D^-gamma with L_0 >= 0, A >= 0 and 0.01 <= gamma <= 3 (eq. 4).

    D, loss: (n,), with 3 or more different D. For a given gamma, L_0 and A are a linear problem,
    see linear_horizon. gamma comes from 6 grid searches. The first spans all of its range, each
    later one the two neighbors of the best gamma before. Returns a dict of floats: L_0, A, gamma.
    """
    D, y = np.asarray(D, float), np.asarray(loss, float)
    low, high = 0.01, 3.0
    for _ in range(6):
        grid = np.geomspace(low, high, 101)
        best = int(np.argmin([linear_horizon(D**-gamma, y)[2] for gamma in grid]))
        gamma, low, high = grid[best], grid[max(best - 1, 0)], grid[min(best + 1, 100)]
    L_0, A, _ = linear_horizon(D**-gamma, y)
    return {"L_0": float(L_0), "A": float(A), "gamma": float(gamma)}


def linear_horizon(p, y) -> tuple[float, float, float]:
    """Fits y = L_0 + A p with L_0 >= 0 and A >= 0. p = D^-gamma and y > 0, the losses: (n,).

    Returns L_0, A and the sum of squared residuals. That sum is convex: if a constant would be
    negative, it is 0 at the constrained minimum, and the other one is fitted alone. They cannot
    both be negative, as y is positive."""
    A = max(0.0, ((p - p.mean()) @ y) / ((p - p.mean()) @ p))
    L_0 = y.mean() - A * p.mean()
    if L_0 < 0:
        L_0, A = 0.0, (p @ y) / (p @ p)
    return L_0, A, ((y - L_0 - A * p) ** 2).sum()


def fit_law(N, D, lr) -> dict:
    """Fits ln lr* = a + b ln N + c ln D to n optima (eq. 6). N, D, lr: (n,); n may be 0.

    Returns a dict:
        a, b, c     where all N are equal, b cannot be known: it is None; likewise c and D
        covariance  of (a, b, c), lists (3, 3): s^2 (X^T X)^-1, and 0 for an exponent that is None
        dof         n minus the number of constants that are not None
        n, r2       the number of optima; r_squared of ln lr*
        N, D        the [least, most] of the data
    X, (n, 3), has a row (1, ln N, ln D) for each optimum, and a column of zeros for an exponent
    that is None. s^2 is the sum of squared residuals over dof.
    Raises BadInput, with n in the message, if dof is below 1 or the columns are not independent."""
    y = np.log(lr)
    X = np.stack([np.ones_like(y), np.log(N), np.log(D)], 1)
    known = np.array([True, len(set(N)) > 1, len(set(D)) > 1])
    X = X * known
    dof = len(y) - sum(known)
    if dof < 1 or np.linalg.matrix_rank(X) < sum(known):
        raise BadInput(f"{len(y)} optima inside the swept learning rates are too few, or all on "
                       f"one line, for a law with {sum(known)} constants; a wider sweep finds more")
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


def half_width(law: dict, x) -> float:
    """Half the width of the 90 % t-interval of x . (a, b, c), whose variance is x^T covariance x.
    x: (3,)."""
    variance = x @ np.array(law["covariance"]) @ x
    return student_t(0.9, law["dof"]) * math.sqrt(max(variance, 0.0))  # rounding can make it < 0


def law_rate(law: dict, N: float, D: float) -> float:
    """lr* = exp(a) N^b D^c. An exponent that is None counts as 0."""
    return math.exp(law["a"]) * N ** (law["b"] or 0.0) * D ** (law["c"] or 0.0)


def predict_law(law: dict, N: float, D: float) -> dict:
    """lr* at (N, D), its interval, and how far (N, D) is from the data. law: from fit_law.

    Returns a dict:
        lr        see law_rate
        interval  [low, high], the 90 % interval of the law's value: ln lr minus and plus the
                  half_width at x = (1, ln N, ln D). Single optima scatter more widely
        decades   log10 of the factor by which N or D is outside the range in the law, the larger
                  of the two; 0 inside
        unknown   a list of those of "N" and "D" whose exponent is None and whose value here is not
                  within 1 % of that of the data"""
    lr = law_rate(law, N, D)
    factor = math.exp(half_width(law, np.array([1.0, math.log(N), math.log(D)])))
    decades, unknown = 0.0, []
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

    anchor = (N, D, lr), a known optimum: the result is its lr times the ratio of the law's value
    at (N, D) to that at the anchor. Raises BadInput if a value of the law is not positive."""
    _, law = LAWS[name]
    if name == "zhou" and not anchor:
        raise BadInput(f"--law={name}: its units are unknown, so --anchor=N,D,LR is needed")
    here = law(N, D)
    anchor_N, anchor_D, anchor_lr = anchor or (N, D, here)
    there = law(anchor_N, anchor_D)
    if min(here, there) <= 0:
        raise BadInput(f"--law={name} --n_params={N:g}: the law gives no positive learning rate "
                       "here or at the anchor, far outside the range that it was fitted on")
    return anchor_lr * here / there


# --------------------------------------------------------------------------------------------------
# From the points of a table to optima


def slices_of(points) -> dict[tuple, tuple[np.ndarray, np.ndarray]]:
    """(N, D, group) -> (learning rates in order, their losses), both (n,), in order of the keys. A
    loss is the mean over the points of one learning rate, which are its seeds."""
    losses, slices = defaultdict(lambda: defaultdict(list)), {}
    for point in points:
        losses[point["N"], point["D"], point["group"]][point["lr"]].append(point["loss"])
    for key, by_lr in sorted(losses.items()):
        lrs = sorted(by_lr)
        slices[key] = np.array(lrs), np.array([np.mean(by_lr[lr]) for lr in lrs])
    return slices


def fit_slices(points, tolerance: float = 0.05) -> list[SimpleNamespace]:
    """Fits a parabola to every slice with at least 3 learning rates in its basin.

    Each result has
        N, D, group       those of the slice
        lr, L_min, C, r2  see fit_parabola
        lrs, losses       the whole slice, in order of lr
        near, n           the basin, as a Python slice of lrs; the number of points in it
        inside            whether the vertex is a minimum within the learning rates of the basin"""
    fitted = []
    for (N, D, group), (lrs, losses) in slices_of(points).items():
        near = basin(losses, tolerance)
        x = lrs[near]
        if len(x) >= 3:
            fit = fit_parabola(x, losses[near])
            inside = fit["C"] > 0 and x[0] <= fit["lr"] <= x[-1]
            fitted.append(SimpleNamespace(N=N, D=D, group=group, **fit, lrs=lrs, losses=losses,
                                          near=near, n=len(x), inside=bool(inside)))
    return fitted


def extrapolate(points, D: float) -> list[dict]:
    """Predicts points at a horizon D from those at shorter horizons, by fit_horizon.

    There is one for each size, group and learning rate with at least 3 horizons below D. Learning
    rates less than 1 % apart count as one, since tables round them. It is unknown whether the paper
    reads its horizons at a constant learning rate or after a decay; both kinds of tables can be
    used."""
    by_size, predicted = defaultdict(list), []
    for (N, horizon, group), (lrs, losses) in slices_of(points).items():
        if horizon < D:
            by_size[N, group] += [(lr, horizon, loss) for lr, loss in zip(lrs, losses)]
    for (N, group), rows in by_size.items():
        rows = np.array(sorted(rows))
        starts = np.flatnonzero(rows[1:, 0] > 1.01 * rows[:-1, 0]) + 1  # of the next learning rate
        for curve in np.split(rows, starts):
            lrs, horizons, losses = curve.T
            if len(set(horizons)) >= 3:
                fit = fit_horizon(horizons, losses)
                loss = fit["L_0"] + fit["A"] * D ** -fit["gamma"]
                predicted.append({"N": N, "D": D, "lr": lrs[0], "loss": loss, "group": group})
    return predicted


def near_optima(points) -> list[SimpleNamespace]:
    """Optima over all groups together, for a joint fit of learning rate and batch size. Each has N,
    D and lr: the geometric mean of lr over the points of this (N, D) whose loss is within 0.25 % of
    the lowest. DeepSeek LLM (arXiv 2401.02954) calls such points near-optimal."""
    optima, points_at = [], defaultdict(list)
    for point in points:
        points_at[point["N"], point["D"]].append(point)
    for (N, D), found in sorted(points_at.items()):
        limit = 1.0025 * min(point["loss"] for point in found)
        good = [math.log(point["lr"]) for point in found if point["loss"] <= limit]
        optima.append(SimpleNamespace(N=N, D=D, lr=math.exp(np.mean(good))))
    return optima


def law_of(optima) -> dict:
    """fit_law of these optima. Raises BadInput."""
    return fit_law([o.N for o in optima], [o.D for o in optima], [o.lr for o in optima])


def group_laws(optima, joint: dict) -> dict[str, dict]:
    """The law of each group by itself. joint: a law of all groups. Groups whose optima are too few,
    or do not determine an exponent that `joint` has, are left out."""
    laws = {}
    by_length = sorted({o.group for o in optima}, key=lambda name: (len(name), name))  # 32 < 128
    for group in by_length:
        try:
            law = law_of([o for o in optima if o.group == group])
        except BadInput:
            continue
        if all(law[k] is not None or joint[k] is None for k in "bc"):
            laws[group] = law
    return laws


def by_group(optima):
    """A function of a slice: the learning rate by the law of its group, or by that of all groups
    if its group has none."""
    joint = law_of(optima)
    laws = group_laws(optima, joint)
    return lambda f: law_rate(laws.get(f.group, joint), f.N, f.D)


# --------------------------------------------------------------------------------------------------
# What a law costs on slices that it was not fitted to


def costs(held, optima, others: dict) -> dict[str, np.ndarray]:
    """The costs of several choices of the learning rate on the slices `held`. A cost, (slices,), is
    in nats above the lowest loss of each slice, by the slice's parabola.

    The choices: the law of a slice's group, and one learning rate for all slices, both from
    `optima`, which are of other slices; Step Law as published; and `others`, {name: function of a
    slice that gives lr}. The one learning rate is the one with the lowest total cost on `optima`.
    """
    same = math.exp(np.average([math.log(f.lr) for f in optima], weights=[f.C for f in optima]))
    choices = {"its group's law": by_group(optima), **others,
               "Step Law, published": lambda f: published("step", f.N, f.D),
               f"always {same:.3g}": lambda f: same}
    return {name: np.array([f.C * math.log(choose(f) / f.lr) ** 2 for f in held])
            for name, choose in choices.items()}


def hold_out(points, tolerance: float = 0.05) -> dict[str, np.ndarray]:
    """The costs at the largest N of laws that are fitted without it; with several groups also that
    of the joint law, see near_optima. Raises BadInput if there are too few optima for a law."""
    largest = max(point["N"] for point in points)
    optima = [f for f in fit_slices(points, tolerance) if f.inside]
    held = [f for f in optima if f.N == largest]
    rest = [f for f in optima if f.N != largest]
    if not held or len({f.N for f in rest}) < 2:
        raise BadInput(f"slices with their optimum inside are needed at N = {largest:g} and at two "
                       "smaller sizes")
    others = {}
    if len({f.group for f in optima}) > 1:
        joint = law_of(near_optima([point for point in points if point["N"] != largest]))
        others["the joint law"] = lambda f: law_rate(joint, f.N, f.D)
    return costs(held, rest, others)


def check_horizon(optima, points, D: float, tolerance: float) -> dict[str, np.ndarray]:
    """Checks `extrapolate` against real runs at its horizon D: the costs there of learning rates
    that are chosen by shorter runs only.

    optima: those of the shorter runs and of the predicted losses, in order of D. points: the table.
    Returns {} if the table has no optima at D, or the shorter runs have too few for a law."""
    shorter = [f for f in optima if f.D < D]
    longest = {(f.N, f.group): f.lr for f in shorter}  # a longer horizon replaces a shorter one
    predicted = {(f.N, f.group): f.lr for f in optima if f.D == D}
    real = fit_slices([point for point in points if point["D"] == D], tolerance)
    sizes = predicted.keys() & longest.keys()
    held = [f for f in real if f.inside and (f.N, f.group) in sizes]
    if not held:
        return {}
    try:
        return costs(held, shorter, {
            "that law with predictions": by_group(optima),
            "the predicted losses": lambda f: predicted[f.N, f.group],
            "the longest run's lr*": lambda f: longest[f.N, f.group]})
    except BadInput:
        return {}


# --------------------------------------------------------------------------------------------------
# Plan and sweep: the runs that make a table of points


def planned_runs(sizes, lrs, tokens, seeds: int, flags: list[str]) -> list[SimpleNamespace]:
    """The runs of a sweep, cheapest first: one for each size (blocks, width), learning rate and
    seed. tokens: the horizons; flags: of train.py.

    Each has c, its train.Config; N; steps, a list of those at which its loss is read; and flops, of
    all of its training. The learning rate is constant after warm-up, so that a run up to the
    longest horizon gives the points of all shorter ones too. That the paper reads its horizons in
    this way is an inference from its summaries."""
    import train
    base, runs = train_config(flags), []
    if base.teacher == "auto":
        raise BadInput("--teacher=auto: depends on the length of a run, and these are read at "
                       "several; name a checkpoint")
    vocab_size = base.vocab_size  # of a bpe tokenizer, trained or not yet
    if base.tokenizer != "bpe":
        vocab_size = tokenizer_from_dict(train.make_tokenizer_for(base, ())).n_vocab
    steps = sorted({max(1, round(D / base.batch_tokens)) for D in tokens})
    grid = itertools.product(dict.fromkeys(sizes), dict.fromkeys(lrs), range(seeds))
    for (n_layer, n_embd), lr, seed in grid:
        c = replace(base, n_layer=n_layer, n_embd=n_embd, lr=lr, seed=seed, steps=steps[-1],
                    warmup_steps=min(base.warmup_steps, steps[0]), sample_tokens=0,
                    schedule="constant")
        train.check(c)
        c = train.with_stop_in_steps(c)  # a share of all steps would change from horizon to horizon
        with torch.device("meta"):  # shapes alone, no memory
            model = GPT(train.model_config(c, vocab_size))
        runs.append(SimpleNamespace(
            c=c, N=model.num_params() - model.embed.weight.numel(), steps=steps,
            flops=model.flops_per_token() * steps[-1] * c.batch_tokens))
    return sorted(runs, key=lambda run: (run.flops, run.N, run.c.seed, run.c.lr))


def plan_command(args) -> str:
    """What a sweep costs, beside a full grid, which has a run for each horizon."""
    runs = planned_runs(args.sizes, args.lrs, args.tokens, args.seeds, args.flags)
    steps, batch = runs[0].steps, runs[0].c.batch_tokens  # the same for all runs
    horizons = ", ".join(f"{step * batch:,}" for step in steps)
    each = len(runs) // len(set(args.sizes))  # the runs of one size, which follow each other
    lines = [f"  N {run.N:>12,} ({run.c.n_layer} x {run.c.n_embd})  {each} runs, read at "
             f"{horizons} tokens: {each * run.flops:.3g} FLOPs" for run in runs[::each]]
    points, total = len(runs) * len(steps), sum(run.flops for run in runs)
    full = total * sum(steps) / steps[-1]
    speed = args.flops_per_second
    return "\n".join([*lines, f"{len(runs)} runs, {points} points, {total:.3g} FLOPs, "
                      f"{total / speed / 3600:.2f} hours at {speed:.3g} FLOP/s; the full grid: "
                      f"{points} runs, {full:.3g} FLOPs, {full / speed / 3600:.2f} hours"])


def sweep_command(args) -> str:
    """Trains the runs of a sweep, and appends a point to a CSV at each horizon.

    Points that the table has and runs of another shard are left out. The runs of a table NAME.csv
    have their folders in NAME."""
    runs = planned_runs(args.sizes, args.lrs, args.tokens, args.seeds, args.flags)
    if not os.access(Path(args.csv).parent, os.W_OK):
        raise BadInput(f"{args.csv}: cannot be written")
    rows = sweep_rows(args.csv) if os.path.exists(args.csv) else {}
    for stored in rows.values():
        refuse_settings(args.csv, stored, runs[0].c)
    for run in runs[args.shard]:
        train_run(run, args.csv, rows)
    return f"written to {args.csv}"


DIVERGED = {"val_loss": math.inf, "flops": 0, "seconds": 0}  # stands for train.train's result


def train_run(run, path, rows):
    """Trains one of the planned runs from horizon to horizon, and appends a row to the table `path`
    at each that is not in `rows`, see sweep_rows. The loss of a run that diverges is inf at this
    horizon and at all later ones."""
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
# muTransfer: tune a small proxy, and carry its learning rate over by rules (model.PARAM_RULES). The
# paper compares its law with such rules. Its own rules are unknown, so these are our baseline.


def target_flags(c, lr: float, ratio: float) -> dict:
    """The flags of c that change with the number of steps, as {name: value}. lr: the proxy's lr*;
    ratio: the target's optimizer steps over the proxy's.

    lr and weight decay are proportional to ratio^-1/2, 1 - beta to 1 / ratio (Complete(d)P, arXiv
    2512.22382, as summaries give it; eps, proportional to ratio^1/2, has no flag). A batch k times
    as large at the same tokens has ratio = 1 / k, so lr grows with sqrt(k); for the betas then, the
    summaries give no rule. Muon's momentum changes as AdamW's betas do: it too averages gradients.
    """
    flags = {"lr": lr, "weight_decay": c.weight_decay}
    if c.multipliers != "none":
        flags["multiplier_lr"] = c.multiplier_lr
        flags["multiplier_weight_decay"] = c.multiplier_weight_decay
    flags = {name: float(f"{value * ratio**-0.5:.4g}") for name, value in flags.items()}
    betas = ["beta1", "beta2"]
    if c.optimizer == "muon":
        betas.append("momentum")
    for name in betas:
        flags[name] = max(0.0, 1 - float(f"{(1 - getattr(c, name)) / ratio:.4g}"))
    return flags


def at_size(c, param: str, size: tuple[int, int], base: tuple[int, int]):
    """c with the parametrization `param`, and with this size and base size, both (blocks, width).
    Raises BadInput."""
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
    """The parabola of the proxy at its longest horizon, see fit_slices. path: a table of `sweep`;
    size: (blocks, width); c: the Config whose settings its runs must have. Raises BadInput."""
    for stored in set(sweep_rows(path).values()):
        refuse_settings(path, stored, c,  # a sweep shortens warm-ups, and counts stops in steps
                        ignored=("--warmup_steps", "--let_stop", "--distill_stop"))
    n_layer, n_embd = size
    table, _ = read_points(path, group="n_layer,n_embd")
    points = [point for point in table if point["group"] == f"{n_layer},{n_embd}"]
    if not points:
        raise BadInput(f"{path}: no runs of --proxy={n_layer}x{n_embd} in it")
    D = max(point["D"] for point in points)
    found = fit_slices([point for point in points if point["D"] == D])
    if not found or not found[0].inside:
        raise BadInput(f"{path}: at {D:,.0f} tokens the best learning rate of --proxy={n_layer}x"
                       f"{n_embd} is not inside the swept ones; at least 3 around it are needed")
    return found[0]


def transfer_command(args) -> str:
    """muTransfer: the best learning rate of a proxy, and what the rules make of it at the target.

    The proxy has the base size, where every parametrization is the standard model."""
    import train
    c = train_config(args.flags)
    if c.param != "standard":
        raise BadInput(f"--param={c.param}: goes before the --, as the proxy is the standard model")
    best = proxy_optimum(args.csv, args.proxy, c)
    tokens, batch = args.target_tokens or best.D, args.target_batch_tokens or c.batch_tokens
    if tokens < batch:
        raise BadInput(f"--target_tokens={tokens:g} --target_batch_tokens={batch}: at least one "
                       "step is needed")
    ratio = tokens / best.D * c.batch_tokens / batch
    target = replace(c, batch_tokens=batch, steps=round(tokens / batch),
                     **target_flags(c, best.lr, ratio))
    target = at_size(target, args.param, args.target, args.proxy)
    config = train.model_config(target, target.vocab_size)
    return "\n".join([
        f"proxy, {best.D:,.0f} tokens: lr* {best.lr:.4g}, loss {best.L_min:.4f}, R^2 {best.r2:.3f} "
        f"of {best.n} points",
        f"target, {tokens:,.0f} tokens, {ratio:.3g} times the steps: {args.param} with m_N "
        f"{config.width_ratio:g}, m_L {config.depth_ratio:g}, m_D {config.head_ratio:g}",
        f"python train.py {settings(target, ignored=())}"])


# --------------------------------------------------------------------------------------------------
# Coordinate check: do activations move as much at every size?

ACTIVATIONS = ("embed", "attention", "ssm", "router", "mlp")  # names of modules


def activations(model: GPT, idx) -> dict[str, list[torch.Tensor]]:
    """The outputs for idx, (B, T), of all modules with a name in ACTIVATIONS, by that name, one
    tensor a block; "stream": the residual stream after the last block; "logits"."""
    seen, hooks = defaultdict(list), []
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if name in ACTIVATIONS:
            hooks.append(module.register_forward_hook(
                lambda module, inputs, output, name=name: seen[name].append(output)))
    with torch.no_grad():
        x, (stream,) = model(idx, hidden=(len(model.blocks),))
        logits = model.logits(x)
    for hook in hooks:
        hook.remove()
    return {**seen, "stream": [stream], "logits": [logits]}


def coordinate_check(c, steps: int = 5, seeds: int = 1) -> dict[str, float]:
    """How far each kind of activation moves in `steps` steps at the constant learning rate c.lr:
    the RMS of its change over all elements and blocks, mean over seeds.

    Under a parametrization that transfers it is the same at every size (Yang et al. 2022, appendix
    D.1). The text is 4 sequences of 32 random tokens out of 256, the same at every step and size.
    Matrices that write into the stream start at 0, so the whole model moves only from step 3 on."""
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
            change = torch.stack(after) - torch.stack(before[kind])
            moved[kind] += change.square().mean().sqrt().item() / seeds
    return dict(moved)


def slope(sizes, values) -> float:
    """The exponent k of values ~ sizes^k by least squares in the logarithms; nan if a value is 0.
    Both: (n,)."""
    if min(values) <= 0:
        return math.nan
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def coordcheck_command(args) -> str:
    """How far activations move over widths and over depths (coordinate_check)."""
    c = train_config(args.flags)
    if args.steps < 3 or min(len(args.widths), len(args.depths)) < 2:
        raise BadInput(f"--widths={args.widths} --depths={args.depths} --steps={args.steps}: two "
                       "widths, two depths and 3 steps are needed at least")
    depth, width = base = args.depths[0], args.widths[0]
    tables = {f"over width ({depth} blocks)": {n: (depth, n) for n in args.widths},
              f"over depth (width {width})": {n: (n, width) for n in args.depths}}
    configs = {(param, size): at_size(c, param, size, base) for param in args.params
               for sizes in tables.values() for size in sizes.values()}
    moved = {key: coordinate_check(config, args.steps, args.seeds)
             for key, config in configs.items()}
    lines = [f"RMS of the change after {args.steps} steps with {c.optimizer} at lr {c.lr:g}"]
    for title, sizes in tables.items():
        lines.append(f"{title:<23}" + "".join(f"{n:>10}" for n in sizes) + "     slope")
        for param in args.params:
            for kind in moved[param, base]:
                values = [moved[param, size][kind] for size in sizes.values()]
                cells = "".join(f"{value:>10.3g}" for value in values)
                exponent = slope([*sizes], values)
                lines.append(f"  {param:<10} {kind:<10}{cells}{exponent:>+10.2f}")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# The flags of runs

# Flags that a row states itself, that `sweep` sets, or that do not change the loss.
NOT_SETTINGS = {"n_layer", "n_embd", "lr", "seed", "steps", "schedule", "micro_batch", "device",
                "compile", "out_dir", "resume", "sample_tokens", "eval_every", "log_every",
                "save_every", "keep_checkpoints"}


def settings(c, ignored=NOT_SETTINGS) -> str:
    """The flags of the Config c that are not at their defaults, as on a command line. They are the
    column "flags" of a table. What is not UTF-8 in them, as in names of files, is escaped."""
    text = shlex.join(f"--{f.name}={getattr(c, f.name)}" for f in fields(c)
                      if f.name not in ignored and getattr(c, f.name) != f.default)
    return text.encode(errors="backslashreplace").decode()


def refuse_settings(where: str, stored: str, c, ignored=()):
    """Raises BadInput, with the flags that differ, if `stored` is not settings(c). where: the table
    or folder that holds it; ignored: flags that may differ, such as "--warmup_steps"."""
    differ = {*shlex.split(stored)} ^ {*shlex.split(settings(c))}
    differ = sorted(flag for flag in differ if flag.partition("=")[0] not in ignored)
    if differ:
        raise BadInput(f"{where}: holds runs with other flags (not in both: {' '.join(differ)}); "
                       "name another")


def train_config(flags: list[str]):
    """The train.Config of these flags. Raises BadInput for flags that cannot be used here. Flags
    that a command sets for each run, such as --n_layer, have no effect."""
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


def read_points(path, names=("N", "D", "lr", "loss"), group="") -> tuple[list[dict], int]:
    """Reads points from a CSV with a header. names: the columns of N, D, lr and loss; group: names
    of the columns that make up the group, separated by commas.

    Returns the points, and how many are left out: those that diverged (their loss is inf, nan or an
    empty cell), and other seeds of the same N, D, lr and group, whose mean would hide that it can
    diverge. Raises BadInput."""
    groups = group.split(",") if group else []

    def to_point(row):
        N, D, lr, loss = (float(row[name] or "nan") for name in names)  # empty: it diverged
        if not all(0 < value < math.inf for value in (N, D, lr)) or loss <= 0:
            raise BadInput("N, D, lr and loss must be positive")
        return {"N": N, "D": D, "lr": lr, "loss": loss, "flags": row.get("flags"),
                "group": ",".join(row[name] for name in groups)}

    points = read_table(path, [*names, *groups], to_point)
    flags = {point.pop("flags") for point in points}
    if len(flags) > 1 and "flags" not in groups:
        raise BadInput(f"{path}: runs with different flags, which do not compare; --group=flags "
                       "keeps them apart")
    setting = operator.itemgetter("N", "D", "lr", "group")
    diverged = {setting(point) for point in points if not math.isfinite(point["loss"])}
    kept = [point for point in points if setting(point) not in diverged]
    return kept, len(points) - len(kept)


COLUMNS = ("N", "D", "lr", "loss", "seed", "n_layer", "n_embd", "flops", "seconds", "flags")


def sweep_rows(path) -> dict[tuple, str]:
    """Reads a table of `sweep`: (N, D, lr, seed) -> flags of each row; nothing of an empty file.
    Raises BadInput."""
    text, header = read_text(path), ",".join(COLUMNS)
    if not text:
        return {}
    if not text.startswith(header) or not text.endswith("\n"):  # rows are appended
        raise BadInput(f"{path}: not a table of `sweep`: columns {header}, and a line end after "
                       "each row, are needed")
    return dict(read_table(path, COLUMNS, lambda row: (
        (int(row["N"]), int(row["D"]), float(row["lr"]), int(row["seed"])), row["flags"])))


def append_row(path, row: dict):
    """Appends a row to a table of `sweep`, and first the header if the file is new. Several
    processes can append to one table: the file is locked, and written to once."""
    with open(path, "a", encoding="utf-8") as file:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX)
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if file.seek(0, os.SEEK_END) == 0:  # still empty now that it is locked
            writer.writeheader()
        writer.writerow(row)
        file.flush()
        os.fsync(file.fileno())


LAW_VERSION = "nanolet-law-2"  # of the file's format


def load_law(path, flag: str) -> dict:
    """Reads a law that `fit` wrote. flag: what names the file on the command line. Raises BadInput
    unless the law gives finite intervals at the least and the greatest N and D of its data."""
    text = read_text(path, f"{flag}=")
    with reading(f"{flag}={path}"):
        law = json.loads(text)
        if law["version"] != LAW_VERSION or law["dof"] < 1:
            raise ValueError(f"{LAW_VERSION} is needed, with at least one degree of freedom")
        for i in (0, 1):
            if not np.isfinite(predict_law(law, law["N"][i], law["D"][i])["interval"]).all():
                raise ValueError("no finite learning rate at the N and D of its data")
    return law


# --------------------------------------------------------------------------------------------------
# Fit and predict: reports and the plot


def report(law: dict, fitted: list[SimpleNamespace], left_out: int) -> list[str]:
    """The lines that say what a fit found: the slices (if they are few), the law, and the law of
    each group by itself. fitted: see fit_slices; left_out: see read_points."""
    inside = [f for f in fitted if f.inside]
    lines = [f"{len(fitted)} slices with a parabola, {len(inside)} with the optimum inside the "
             f"swept learning rates; {left_out} diverged runs left out"]
    if fitted:
        lines.append(f"R^2 of the parabolas: median {np.median([f.r2 for f in fitted]):.3f}")
    shown = fitted if len(fitted) <= 40 else []
    for f in shown:
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
    """A table, as lines, of what `costs` returned."""
    slices = len(next(iter(found.values())))
    lines = [f"{title}: nats above the lowest loss of {slices} slices, by their parabolas",
             f"{'':<26}{'median':>9}{'max':>9}"]
    return lines + [f"  {name:<24}{np.median(values):>9.4f}{values.max():>9.4f}"
                    for name, values in found.items()]


def plot_fit(fitted, law, path):
    """Writes a picture to `path`. Left: losses over lr, with their parabolas. Right: optima and the
    law over D. Each N has a color, and each learning rate and horizon of the table has a tick.
    fitted: see fit_slices; law: see fit_law."""
    from probes import plotting, save_figure
    figure, (left, right) = plotting(path).subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    D = np.geomspace(law["D"][0], 3 * law["D"][1], 30)
    for i, N in enumerate(sorted({f.N for f in fitted})):
        color = f"C{i}"
        for f in [f for f in fitted if f.N == N]:
            lr = f.lrs[f.near]
            left.semilogx(lr, f.losses[f.near], ".", color=color)
            lr = np.geomspace(lr[0], lr[-1], 50)
            left.semilogx(lr, f.L_min + f.C * np.log(lr / f.lr) ** 2, color=color, linewidth=0.8)
            if f.inside:
                right.loglog(f.D, f.lr, "o", color=color)
        right.loglog(D, law_rate(law, N, D), color=color, label=f"N = {N:.3g}")
        low, high = np.transpose([predict_law(law, N, horizon)["interval"] for horizon in D])
        right.fill_between(D, low, high, color=color, alpha=0.15)
    lrs = {lr for f in fitted for lr in f.lrs}
    horizons = {f.D for f in fitted}
    for axis, ticks in ((left, sorted(lrs)), (right, sorted(horizons))):
        axis.set_xticks(ticks, [f"{value:.3g}" for value in ticks], rotation=45)
        axis.set_xticks([], minor=True)
    left.set(xlabel="learning rate", ylabel="loss, nats", title="slices and their parabolas")
    right.set(xlabel="D, tokens", ylabel="lr*", title="optima and the law, 90 % interval")
    right.legend(fontsize="small")
    save_figure(figure, path)


def fit_command(args) -> str:
    """Parabolas and the law from a table of runs."""
    columns = (args.N, args.D, args.lr, args.loss)
    table, left_out = read_points(args.runs, columns, args.group)
    points, D = table, args.extrapolate  # a D of 0: predict no losses
    if D:
        predicted = extrapolate(table, D)
        points = [point for point in table if point["D"] < D] + predicted
    fitted = fit_slices(points, args.basin)
    optima = [f for f in fitted if f.inside]
    with reading(args.runs):
        law = law_of(near_optima(points) if args.joint else optima)
    lines = report(law, fitted, left_out)
    if D:
        lines.append(f"{len(predicted)} losses at D = {D:g} are predicted by L(D)")
        if found := check_horizon(optima, table, D, args.basin):
            lines += cost_lines(f"real runs at D = {D:g}", found)
    if args.hold_out:
        with reading(f"{args.runs} --hold_out"):
            lines += cost_lines("held out, the largest N", hold_out(table, args.basin))
    if args.plot:
        plot_fit(fitted, law, args.plot)
    if args.output:
        if Path(args.output).exists():
            load_law(args.output, "--output")  # refuses to overwrite what is not a law
        with written_whole(args.output) as new:
            new.write_text(json.dumps(
                {"version": LAW_VERSION, "units": "parameters, tokens", **law}, indent=1))
        lines.append(f"written to {args.output}")
    return "\n".join(lines)


def describe_prediction(at: dict) -> str:
    """What predict_law returned, as text."""
    low, high = at["interval"]
    text = f"lr {at['lr']:.4g}   90 % interval {low:.4g} to {high:.4g}"
    if at["decades"] > 0:
        far = ": do not trust it far" if at["decades"] > 1 else ""
        text += f"\n{at['decades']:.2f} decades beyond the data{far}"
    for name in at["unknown"]:
        text += f"\nthe data have one {name}: lr* is taken not to change with it"
    return text


def predict_command(args) -> str:
    """The learning rate at a size and a horizon."""
    N, D = args.n_params, args.tokens
    if args.law in LAWS:
        lr = published(args.law, N, D, args.anchor)
        ratio = "; as a ratio to the anchor" if args.anchor else ""
        return f"lr {lr:.4g}   ({args.law}: {LAWS[args.law][0]}{ratio})"
    if args.anchor:
        raise BadInput(f"--law={args.law} --anchor: only published laws take an anchor")
    return describe_prediction(predict_law(load_law(args.law, "--law"), N, D))


# --------------------------------------------------------------------------------------------------
# Command line


def numbers(text: str) -> list[float]:
    """Positive numbers of "1,2,3", or of "LOW:HIGH:COUNT", evenly spaced in the logarithm.

    This function and the next two are types for argparse: it reports a ValueError with the flag and
    the value."""
    if ":" not in text:
        return listed(positive(1.0))(text)
    *ends, count = text.split(":")
    low, high = map(positive(1.0), ends)
    return np.geomspace(low, high, between(int, 1, 10_000)(count)).tolist()


def layers_x_width(text: str) -> tuple[int, int]:
    """(blocks, width) of "4x128"."""
    n_layer, n_embd = map(int, text.split("x"))
    return n_layer, n_embd


def shard(text: str) -> slice:
    """The Python slice that "I/N" stands for: every N-th from the I-th, counted from 1."""
    i, n = map(int, text.split("/"))
    if not 1 <= i <= n:
        raise ValueError
    return slice(i - 1, None, n)


# {flag: (default, help, type)}. A flag without a type takes text, or a positive number if its
# default is a number. A default of None: the flag is required. False: the flag takes no value.
GRID = {
    "--sizes": (None, "LAYERSxWIDTH, separated by commas", listed(layers_x_width)),
    "--lrs": (None, "1e-3,3e-3 or LOW:HIGH:COUNT", numbers),
    "--tokens": (None, "horizons at which each run is read, likewise", numbers),
    "--seeds": ("1", "number of seeds: 0, 1, ...", between(int, 1, 10_000))}
COMMANDS = {
    fit_command: {
        "runs": (None, "a CSV with a header"),
        "--N": ("N", "name of the column"), "--D": ("D", "name of the column"),
        "--lr": ("lr", "name of the column"), "--loss": ("loss", "name of the column"),
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
    """Adds an entry of COMMANDS to an argparse parser. names: such as "-o --output"; default, text
    and kind: the entry's default, help and type."""
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
    end = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:end])
    args.flags = argv[end + 1:]  # of train.py
    if args.flags and args.function in WITHOUT_TRAIN_FLAGS:
        raise BadInput(f"{argv[0]} takes no flags of train.py after --: {args.flags}")
    print(args.function(args))


if __name__ == "__main__":
    command(main)
