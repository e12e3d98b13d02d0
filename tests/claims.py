"""tests/claims.py: the claims of the papers, for tests/reproduce.py. CLAIMS, at the end, is the
table to read; above it stand the measurements that it names.

A column is a function (run, reference run of the same seed) -> number or None. `results` are
{run: {column: {seed: number}}}.
"""
import contextlib
import functools
import json
import math
import statistics
import time
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

import lr_law
import probes
import train
from model import BadInput, load_checkpoint, tokenizer_from_dict, written_whole
from teacher import interpolate, load_pretrained, teacher_state

# --------------------------------------------------------------------------------------------------
# Measurements


def evaluations(run) -> list[dict]:
    lines = probes.read_evaluations(run.folder)
    return lines if not run.done()["diverged"] else [*lines[:-1],
                                                     lines[-1] | {"val_loss": math.inf}]


def last(key: str):
    """The value `key` of the last evaluation; keys within keys are joined by a space."""
    return lambda run, _: None if run.pretrained else evaluations(run)[-1].get(key)


def loss_at(step: int):
    return lambda run, _: next((line["val_loss"] for line in evaluations(run)
                                if line["step"] == step), math.inf)


def reach(key: str):
    """Where the run comes down to the reference's final loss, in % of the reference's own `key`:
    step, flops or seconds."""
    def column(run, reference):
        target = evaluations(reference)[-1]
        found = probes.first_reached(evaluations(run), target["val_loss"])
        return 100 * found[key] / target[key] if found else None
    return column


def measured(run, name: str, function):
    """function(run), computed once and kept in the run's folder."""
    path = run.folder / "measured.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    if name not in known:
        known[name] = function()
        run.folder.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as tmp:
            tmp.write_text(json.dumps(known, indent=1))
    return known[name]


def step_file(run, step: int) -> str:
    """The checkpoint of a step; 0: the last one."""
    return str(run.folder / f"step-{step:07}.pt") if step else run.made


def at_step(step: int, name: str, function, key: str = ""):
    """A column: function(run) at a kept checkpoint, or the value `key` of it; None for a run that
    kept none."""
    def column(run, _):
        if step and not (run.folder / f"step-{step:07}.pt").exists():
            return None
        found = measured(run, f"{name} {step}", lambda: function(run))
        return found[key] if key else found
    return column


def config_of(run):
    """The Config of a run; of a pretrained model one that reads the default data by its tokens."""
    if run.pretrained:
        return train.Config(teacher=run.made, tokenizer="teacher", let_weight=0.0)
    known = load_checkpoint(run.made)["config"]
    return train.Config(**{k: v for k, v in known.items() if k in train.FLAGS})


def batches(run, tokens: int) -> list:
    """Held-out (inputs, targets) of 8 sequences, evenly spread over the held-out part."""
    val = train.load_data(config_of(run)).val
    n = tokens // val.block_size
    numbers = [i * len(val) // n for i in range(n)]
    return [val.batch(numbers[i:i + 8]) for i in range(0, n, 8)]


@functools.cache
def held_out_documents() -> list[str]:
    files = train.find_files("stdlib")
    return [text for _, text in train.split_documents(train.read_documents(*files, "stdlib"))[1]]


@functools.lru_cache(maxsize=4)
def pairs_of(tokenizer: str) -> list:
    """The minimal pairs of Python as a task, both sides with the same number of tokens."""
    enc = tokenizer_from_dict(json.loads(tokenizer))
    pairs = probes.python_pairs(held_out_documents(), 0, 1000,
                                length=lambda text: len(enc.encode_ordinary(text)))
    return [(context, [right, wrong], 0) for _, context, right, wrong in pairs]


def python(run, _):
    """Accuracy on the minimal pairs of Python, %."""
    def measure():
        model, enc, tokenizer = probes.open_model(run.made, "cpu")
        found = probes.evaluate_task(model, enc, pairs_of(json.dumps(tokenizer)))
        return 100 * found["sum"]
    return measured(run, "python", measure)


def corpus_bits(run, _):
    """Bits per byte of 100,000 characters of the default data's held-out part, for students of
    other text."""
    def measure():
        model, enc, _ = probes.open_model(run.made, "cpu")
        text = "\n".join(document[:1400] for document in held_out_documents())[:100_000]
        ids = [enc.eot_token, *enc.encode_ordinary(text)]
        return probes.evaluate_text(model, ids, len(text.encode()),
                                    model.config.block_size)["bits_per_byte"]
    return measured(run, "corpus_bits", measure)


def curvature(step: int, what: str):
    """Of the Hessian of the loss on 2,048 held-out tokens: its largest eigenvalue, that over the
    most negative one, or the standard deviation of all eigenvalues over their mean."""
    def measure(run):
        model, _, _ = probes.open_model(step_file(run, step), "cpu")
        found = probes.spectrum(model, batches(run, 2048), steps=20, probes=1)
        center = found["trace"] / found["parameters"]
        return {"top": found["top"][0], "ratio": found["top"][0] / abs(found["least"]),
                "dispersion": math.sqrt(max(0, found["rms"]**2 - center**2)) / abs(center)}
    return at_step(step, "curvature", measure, what)


def cosine_with_teacher(step: int):
    """Mean cosine of the student's guided state and the teacher's, on 4,096 held-out tokens. A
    plain run has its teacher in its flags, at weight 0."""
    @torch.no_grad()
    def measure(run):
        c = config_of(run)
        model, _, _ = probes.open_model(step_file(run, step), "cpu")
        teacher, _ = load_pretrained(c.teacher)
        found = []
        for idx, _ in batches(run, 4096):
            _, (h,) = model(idx, hidden=(c.let_student_layer,))
            wanted = interpolate(teacher_state(teacher, idx), c.n_embd)
            found.append(F.cosine_similarity(h, wanted, dim=-1).mean().item())
        return statistics.mean(found)
    return at_step(step, "cosine", measure)


def linearity(what: str, step: int = 0, skip_first: bool = False):
    """Mean over blocks of a linearity score on 20,480 held-out tokens: see probes.linearity."""
    def measure(run):
        model, _, _ = probes.open_model(step_file(run, step), "cpu")
        profile = probes.linearity_profile(model, [x for x, _ in batches(run, 20_480)], skip_first)
        return {key: statistics.mean(block[key] for block in profile)
                for key in ("full", "free", "full_held_out", "free_held_out", "ratio_mean")}
    return at_step(step, f"linearity {skip_first}", measure, what)


def pruning(blocks: int, arm: str, order: str):
    """Nats that removing or replacing blocks costs; a random order is the mean of three."""
    @torch.no_grad()
    def measure(run):
        model, _, _ = probes.open_model(run.made, "cpu")
        text = [x for x, _ in batches(run, 40_960)]
        fit, rest = text[:3 * len(text) // 4], text[3 * len(text) // 4:]
        profile, costs = probes.linearity_profile(model, fit), []
        for seed in range(3 if order == "random" else 1):
            chosen = probes.prune_order(profile, order, seed=seed)[:blocks]
            pruned = (probes.remove_blocks(model, chosen) if arm == "remove"
                      else probes.replace_blocks(model, chosen, fit))
            costs.append(probes.mean_loss(pruned, rest) - probes.mean_loss(model, rest))
        return statistics.mean(costs)
    name = f"pruning {blocks} {arm} {order}"
    return lambda run, _: measured(run, name, lambda: measure(run))


@torch.no_grad()
def seconds_per_pass(models, idx, rounds=9) -> list[float]:
    """Median seconds of each model's forward pass over idx (B, T), head included. The models take
    turns, so that other work on the machine slows all alike. The first round is a warm-up."""
    times = [[] for _ in models]
    for _ in range(rounds + 1):
        for model, seconds in zip(models, times):
            start = time.perf_counter()
            model.logits(model(idx)[0])[0, 0, 0].item()  # .item() waits for the device
            seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds[1:]) for seconds in times]


def over_teacher(what: str):
    """What a run has over what its teacher has: speed of a forward pass, or `python`."""
    def measure(run):
        models = [probes.open_model(one.made, "cpu")[0] for one in (run.needs[0], run)]
        slow, fast = seconds_per_pass(models, batches(run, 2048)[0][0])
        return slow / fast
    if what == "python":
        return lambda run, _: (100 * python(run, _) / python(run.needs[0], _) if run.needs
                               else None)
    return lambda run, _: (measured(run, "speed", lambda: measure(run)) if run.needs else None)


def parameters(active: bool):
    """Parameters without the embedding; of experts all or the active ones."""
    def measure(run):
        model, _, _ = probes.open_model(run.made, "cpu")
        return model.num_params(active) - model.embed.weight.numel()
    return lambda run, _: measured(run, f"parameters {active}", lambda: measure(run))


@torch.no_grad()
def logits_rms(run, _):
    def measure():
        model, _, _ = probes.open_model(run.made, "cpu")
        logits = model.logits(model(batches(run, 2048)[0][0])[0])
        return (logits - logits.mean(-1, keepdim=True)).square().mean().sqrt().item()
    return measured(run, "logits", measure)


def difference(column, other):
    """A column minus another; None where one of them is."""
    def both(run, reference):
        values = column(run, reference), other(run, reference)
        return None if None in values else values[0] - values[1]
    return both


def factor(*pieces):
    """The product over pieces of RMS W~ / RMS W, which is what scalar multipliers are."""
    def column(run, reference):
        return math.prod(last(f"weights {piece} rms_effective")(run, reference)
                         / last(f"weights {piece} rms")(run, reference) for piece in pieces)
    return column


# --------------------------------------------------------------------------------------------------
# Numbers that come from several runs: the law, the scaling with width


def slices(results, sizes, seed, active=False, horizons=None):
    """Parabolas over the learning rate of one seed's runs, named SIZE@RATE."""
    table = []
    for name, columns in results.items():
        size, _, rate = name.partition("@")
        if size in sizes and seed in columns["loss"]:
            table += [{"N": columns["active" if active else "N"][seed], "D": D, "lr": float(rate),
                       "loss": columns[f"D{D}"][seed], "group": ""}
                      for D in horizons or HORIZONS if math.isfinite(columns[f"D{D}"][seed])]
    return [f for f in lr_law.fit_slices(table) if f.inside], table


def law_numbers(results, sizes, seed, held_out, active=False):
    """A law of one seed: its exponents, R^2, the median R^2 of its parabolas, and what its rate
    costs on the slices held out, by their parabolas, in nats. held_out: a size or a horizon."""
    horizons = [D for D in HORIZONS if D != held_out]
    fitted, table = slices(results, sizes, seed, active, horizons)
    law = lr_law.law_of(fitted)
    held, _ = slices(results, [held_out] if isinstance(held_out, str) else sizes, seed, active,
                     HORIZONS[-1:])
    costs = [f.C * math.log(lr_law.law_rate(law, f.N, f.D) / f.lr) ** 2 for f in held]
    found = {"b": law["b"], "c": law["c"], "law_r2": law["r2"],
             "parabola_r2": statistics.median([f.r2 for f in fitted if f.n > 3] or [math.nan]),
             "cost": statistics.mean(costs) if costs else math.nan}
    if not isinstance(held_out, str):  # eq. 4: the loss at the longest horizon, from shorter ones
        real = {(f.N, lr): loss for f in held for lr, loss in zip(f.lrs, f.losses)}
        predicted = lr_law.extrapolate(table, held_out)
        errors = [abs(p["loss"] - real[p["N"], p["lr"]]) for p in predicted
                  if (p["N"], p["lr"]) in real]
        found["extrapolation"] = statistics.median(errors) if errors else math.nan
    return found


def fit_laws(sizes, held_out, rows=(("law", False),)):
    """Adds the row `law`, each seed a law of its own."""
    def derive(results):
        seeds = [*next(iter(results.values()))["loss"]]
        for name, active in rows:
            found = {}
            for seed in seeds:
                with contextlib.suppress(BadInput):  # too few optima inside the sweep
                    found[seed] = law_numbers(results, sizes, seed, held_out, active)
            keys = dict.fromkeys(k for numbers in found.values() for k in numbers)
            results[name] = {k: {s: v[k] for s, v in found.items() if v[k] is not None
                                 and math.isfinite(v[k])} for k in keys}
    return derive


def transfer(results):
    """Adds rows: the target's loss at the law's rate, and at the proxy's best rate unchanged, with
    muP and with CompleteP, interpolated in ln lr. shift: ln of the target's best rate over the
    proxy's."""
    for seed in [*next(iter(results.values()))["loss"]]:
        proxy, _ = slices(results, ["2x48"], seed, horizons=HORIZONS[-1:])
        fitted, _ = slices(results, SMALL, seed)
        standard, _ = slices(results, ["4x128"], seed, horizons=HORIZONS[-1:])
        if not (proxy and standard):
            continue
        rates = {"law": lr_law.law_rate(lr_law.law_of(fitted), standard[0].N, HORIZONS[-1]),
                 "unchanged": proxy[0].lr, "mup": proxy[0].lr, "completep": proxy[0].lr}
        for name, rate in rates.items():
            size = name if name in ("mup", "completep") else "4x128"
            held, table = slices(results, [size], seed, horizons=HORIZONS[-1:])
            points = sorted((math.log(r["lr"]), r["loss"]) for r in table)
            row = results.setdefault(f"{name}_rate", {"loss": {}, "shift": {}})
            row["loss"][seed] = float(np.interp(math.log(rate), *zip(*points)))
            if held and name != "law":
                row["shift"][seed] = math.log(held[0].lr / proxy[0].lr)


def width_exponents(results):
    """Adds rows `none` and `scalar`: exponents of each column over the widths of NAME@WIDTH."""
    for kind in ("none", "scalar"):
        group = {float(name.partition("@")[2]): columns for name, columns in results.items()
                 if name.startswith(f"{kind}@")}
        first = group[min(group)]
        results[kind] = {
            column: {s: lr_law.slope([*group], [group[w][column][s] for w in group])
                     for s in first[column]} for column in first if column != "loss"}


def best_rates(results):
    """Adds rows `plain` and `let`: ln of the best rate of NAME@RATE, by a parabola through its
    rates; and at_RATE: what LET gains there."""
    for kind in ("plain", "let"):
        group = {float(name.partition("@")[2]): columns["loss"] for name, columns in results.items()
                 if name.startswith(f"{kind}@")}
        losses = {seed: [values[seed] for values in group.values()] for seed in group[min(group)]}
        fits = {seed: lr_law.fit_parabola([*group], values) for seed, values in losses.items()
                if all(map(math.isfinite, values))}
        results[kind] = {"ln_rate": {s: math.log(f["lr"]) for s, f in fits.items() if f["C"] > 0}}
    for rate in (0.003, 0.006, 0.012, 0.024):
        plain, let = (results[f"{kind}@{rate}"]["loss"] for kind in ("plain", "let"))
        results[f"at_{rate}"] = {"gain": {seed: plain[seed] - let[seed] for seed in plain}}


# --------------------------------------------------------------------------------------------------
# Pictures


def curves(*names):
    """Held-out loss over steps, means over seeds."""
    def draw(runs, results, path):
        figure, axis = probes.plotting(path).subplots(figsize=(6, 4), layout="constrained")
        for name in names:
            found = [[(line["step"], line["val_loss"]) for line in evaluations(run)][1:]
                     for run in runs[name].values()]
            axis.plot(*np.array(found).mean(0).T, label=name)
        axis.set(xlabel="step", ylabel="held-out loss, nats")
        axis.legend()
        figure.savefig(path, dpi=120)
    return draw


def law_picture(runs, results, path):
    """The parabolas and the law of the means over seeds."""
    mean = {name: {column: {0: statistics.mean(values.values())}
                   for column, values in columns.items() if values}
            for name, columns in results.items() if "@" in name}
    fitted, _ = slices(mean, SMALL, 0)
    lr_law.plot_fit(fitted, lr_law.law_of(fitted), path)


# --------------------------------------------------------------------------------------------------
# The claims


@dataclass(frozen=True)
class Claim:
    """question; paper: its figure and source. runs: {name: flags}. rules: {sentence: rule}.
    columns: {name: measurement}. reference: the run that others are compared with, by default the
    first. best: {row: pattern}, see best_of. derive: a function that adds rows to the results;
    note: what they are, and what else a reader of the table needs.
    gpu: flags that --scale=gpu gives to every run but `teacher`, which gets GPU_TEACHER; empty:
    there is no such size. gpu_runs: patterns of the runs that this size has, by default all."""

    question: str
    paper: str
    runs: dict
    rules: dict
    columns: dict
    reference: str = ""
    best: dict = field(default_factory=dict)
    derive: object = None
    note: str = ""
    picture: object = None
    seeds: int = 3
    gpu: str = ""
    gpu_runs: str = "*"


ONE = {"loss": last("val_loss")}
LOSS = ONE | {"steps": reach("step"), "flops": reach("flops"), "seconds": reach("seconds")}
HEADINGS = {"loss": "held-out nats", "steps": "steps to it, %", "flops": "FLOPs to it, %",
            "seconds": "seconds to it, %", "python": "python pairs, %"}
NOTES = {  # columns, as patterns, and what they are
    "steps flops seconds": "what a run needs to reach the reference's final loss, in % of what the "
    "reference needed; the teacher's passes count, its training does not",
    "python": "share of the minimal pairs in which the right text has the higher likelihood",
    "N active": "parameters without the embedding; active: with the experts that one token uses",
    "D[0-9]*": "held-out loss after so many tokens",
    "b c": "exponents of N and D in the fitted law",
    "law_r2 parabola_r2": "R^2 of the law in ln lr*; median R^2 of the parabolas through four "
    "learning rates or more",
    "cost": "nats that the law's learning rate costs where it was not fitted, by a parabola",
    "extrapolation": "median error of the losses predicted at the longest horizon, in nats",
    "shift": "ln of the target's best learning rate over the proxy's",
    "ln_rate gain": "ln of the best learning rate, by a parabola; what LET gains at one rate",
    "cosine_*": "mean cosine of the guided state and the teacher's at a step; rise: from 50 to 300",
    "top_*": "largest eigenvalue of the Hessian at a step",
    "ratio_*": "the largest eigenvalue over the size of the most negative one",
    "dispersion_*": "standard deviation of the eigenvalues over their mean",
    "full": "linearity score of a block, mean over blocks, 1 is linear",
    "full?*": "the same without the first position of each sequence",
    "free free_[0-9]*": "the score of what a block adds to the stream, at the end or at a step",
    "free_fall": "the score at the end minus that at step 100",
    "added/stream": "mean norm of what a block adds over that of the stream",
    "remove_* replace_* random_*": "nats of held-out loss that this many blocks cost: the most "
    "linear ones removed, replaced by an affine map, or random ones removed",
    "saved order": "remove_2 minus replace_2; remove_2 minus random_2",
    "q k v up down x": "spread of the norms of a matrix's rows: standard deviation of their ln",
    "W W~ *_W *_W~": "root mean square of a matrix W, and of W~, W times its multipliers",
    "logits": "root mean square of the centered logits",
    "*_factor": "product of the scalar multipliers",
    "kept speed": "pairs solved, in % of the teacher's; its time of a forward pass over the run's",
    "bits": "bits per byte of held-out files of the default data"}
LARGER = "--batch_tokens=8192 --micro_batch=32 --steps=x3 "  # x3: 3 times the run's own steps
GPU = LARGER + "--n_layer=12 --n_embd=512 --n_head=8"
GPU_TEACHER = LARGER + "--n_layer=6 --n_embd=256 --n_head=4"  # half, as --teacher=auto makes it

# Flags that several runs share. GOOD is a teacher that is better than its students; SMALL_TEACHER,
# as --teacher=auto makes it, is not.
SHORT = "--sample_tokens=0 --save_every=100 "
DEFAULT = SHORT + "--steps=300 --eval_every=25 "
TEXT = SHORT + "--vocab_size=2048 --steps=300 "
SMALL_TEACHER = SHORT + ("--n_layer=2 --n_embd=96 --n_head=1 --tie_embeddings=true --steps=375 "
                         "--seed=1000003")
GOOD = SHORT + "--vocab_size=2048 --n_layer=6 --n_embd=192 --steps=1000 --seed=1000003"
ADAMW = "--optimizer=adamw "

LET = ("LET, arXiv 2602.05393: the baseline's score in 1/1.6 of the steps at 1.4B and 7B "
       "parameters")
SMOLLM2 = SHORT + ("--teacher=smollm2 --tokenizer=teacher --steps=150 --batch_tokens=1024 "
                   "--eval_every=15 --eval_tokens=8192 ")
OWN = DEFAULT + "--teacher={teacher} "
DEEP = TEXT + "--n_layer=12 --n_embd=96 --eval_every=50 "
PAIR = DEEP + "--teacher={teacher} --let_weight=3 --let_teacher_layer=%d --let_student_layer=%d"
EARLY = DEFAULT + "--steps=90 --schedule=constant --save_every=30 --keep_checkpoints=true "
KEPT = OWN + "--save_every=50 --keep_checkpoints=true "

CLAIMS = {}
CLAIMS["two-commands"] = Claim(
    "Does the README's second command end lower than train.py without a teacher?", LET,
    {"plain": "--steps=500", "let": "--teacher=auto --let_weight=3"},
    {"the README's command ends lower than plain training": "loss: let - plain < 0"},
    ONE | {"bits": last("bits_per_byte"), "steps": reach("step"), "flops": reach("flops")},
    note="The automatic teacher is trained once, before the runs.")
CLAIMS["let-smollm2"] = Claim(
    "Does a published teacher, SmolLM2-135M, speed up a student that reads its tokens?",
    LET + "; weight 0.1 is the best of 0.01 to 3",
    {"plain": SMOLLM2 + "--let_weight=0",
     **{f"let_{w}": SMOLLM2 + f"--let_weight={w}" for w in (0.1, 0.3, 1, 3, 10)},
     "salt": SMOLLM2 + "--distill=salt", "rkd": SMOLLM2 + "--distill=rkd",
     "plain_let_seconds": SMOLLM2 + "--let_weight=0 --steps=204",
     "plain_let_flops": SMOLLM2 + "--let_weight=0 --steps=290",
     "plain_rkd_seconds": SMOLLM2 + "--let_weight=0 --steps=615"},
    {"LET from SmolLM2, at its best weight, ends lower than plain training":
     "loss: let_best - plain < 0",
     "at weight 0.1 too": "loss: let_0.1 - plain < 0",
     "weight 10 ends higher than the best: it over-aligns": "loss: let_10 - let_best > 0",
     "LET ends lower than RKD": "loss: let_best - rkd < 0",
     "LET ends lower than plain training of its seconds": "loss: let_best - plain_let_seconds < 0",
     "LET ends lower than plain training of its FLOPs": "loss: let_best - plain_let_flops < 0",
     "RKD ends lower than plain training of its seconds": "loss: rkd - plain_rkd_seconds < 0",
     "LET solves more pairs than plain training": "python: let_best - plain > 0"},
    LOSS | {"python": python, "all seconds": last("seconds")}, best={"let_best": "let_[0-9]*"},
    picture=curves("plain", "let_1", "rkd"), seeds=5, gpu=GPU)
CLAIMS["let-own"] = Claim(
    "Does a teacher of our own, smaller than the student and no better, speed it up?",
    LET + "; LET is before RKD and SALT",
    {"plain": OWN + "--let_weight=0", "teacher": SMALL_TEACHER,
     **{f"let_{w}": OWN + f"--let_weight={w}" for w in (0.1, 1, 3, 10, 30, 100, 300)},
     **{d: OWN + f"--distill={d}" for d in ("salt", "rkd", "kd")},
     "plain_rkd_flops": OWN + "--let_weight=0 --steps=323",
     **{f"adamw_plain@{lr}": OWN + ADAMW + f"--lr={lr} --let_weight=0"
        for lr in (0.001, 0.003, 0.006)},
     **{f"adamw_let_{w}": OWN + ADAMW + f"--lr=0.003 --let_weight={w}" for w in (0.1, 3, 30)},
     **{f"adamw_{d}": OWN + ADAMW + f"--lr=0.003 --distill={d}" for d in ("salt", "rkd")}},
    {"LET from a smaller teacher, at its best weight, ends lower than plain training":
     "loss: let_best - plain < 0",
     "at weight 0.1 too": "loss: let_0.1 - plain < 0",
     "with AdamW too, plain training at the best of three learning rates":
     "loss: adamw_let_30 - adamw_plain < 0",
     "weight 300 ends higher than the best: it over-aligns": "loss: let_300 - let_best > 0",
     "LET ends lower than RKD": "loss: let_best - rkd < 0",
     "LET ends lower than SALT": "loss: let_best - salt < 0",
     "RKD ends lower than plain training of its FLOPs": "loss: rkd - plain_rkd_flops < 0"},
    LOSS, best={"let_best": "let_[0-9]*", "adamw_plain": "adamw_plain@*"},
    picture=curves("plain", "let_3", "let_30", "rkd"), gpu=GPU,
    gpu_runs="plain teacher let_3 let_30 rkd salt")
CLAIMS["let-pairs"] = Claim(
    "Which pair of layers is best? The teacher's letter comes first: Late, Middle, Early.",
    "LET, arXiv 2602.05393: L2E has the lowest perplexity of the six; every M2* is worse than L2*",
    {"plain": DEEP, "teacher": GOOD,  # early: an eighth of the blocks, rounded up; middle: half
     **{name: PAIR % layers for name, layers in {
         "L2E": (6, 2), "L2M": (6, 6), "L2L": (6, 12), "M2E": (3, 2), "M2M": (3, 6),
         "M2L": (3, 12)}.items()},
     "L2block3": PAIR % (6, 3)},
    {"guiding an early block ends lower than guiding the last one": "loss: L2E - L2L < 0",
     "late to early ends lower than late to middle": "loss: L2E - L2M < 0",
     "and lower than middle to early": "loss: L2E - M2E < 0",
     "late to early ends lower than plain training": "loss: L2E - plain < 0"}, LOSS,
    picture=curves("plain", "L2E", "L2L", "M2M"))
CLAIMS["let-stop"] = Claim(
    "Should the teacher leave early?", "LET, arXiv 2602.05393: the weight falls to 0 at step 1,500 "
    "or 3,000, early in the run; late to late has a jump in perplexity after the end",
    {"plain": DEEP, "teacher": GOOD,
     **{f"stop_{s}": PAIR % (6, 3) + f" --let_stop={s}" for s in (0.1, 0.3, 0.6, 300)}},
    {"a teacher that leaves at 0.3 of the run ends lower than one that stays":
     "loss: stop_0.3 - stop_300 < 0",
     "leaving at 0.1 ends lower than plain training": "loss: stop_0.1 - plain < 0"}, LOSS)
CLAIMS["let-rate"] = Claim(
    "Does LET bear a higher learning rate?",
    "LET, arXiv 2602.05393: better conditioning, which a summary says permits a higher rate",
    {"teacher": SMALL_TEACHER,
     **{f"{name}@{lr}": OWN + f"--let_weight={w} --lr={lr}"
        for lr in (0.003, 0.006, 0.012, 0.024) for name, w in (("plain", 0), ("let", 3))}},
    {"LET's best learning rate is higher than plain training's": "ln_rate: let - plain > 0",
     "at their own best learning rates LET ends lower": "loss: let_best - plain_best < 0",
     "the gain at 0.024 is larger than at 0.006": "gain: at_0.024 - at_0.006 > 0"},
    LOSS, reference="plain@0.006", best={"plain_best": "plain@*", "let_best": "let@*"},
    derive=best_rates, note="Rows plain and let: of the parabola through the learning rates of a "
    "seed; at_RATE: plain minus LET.", gpu=GPU)
CLAIMS["let-curvature"] = Claim(
    "Is the loss better conditioned while LET is on?",
    "LET, arXiv 2602.05393: eigenvalues of the Hessian are less spread (step and method unknown)",
    {"plain": EARLY + "--teacher={teacher} --let_weight=0", "teacher": SMALL_TEACHER,
     "let_3": EARLY + "--teacher={teacher} --let_weight=3 --let_stop=90"},
    {"LET makes the Hessian's eigenvalues less dispersed at step 60":
     "dispersion_60: let_3 / plain < 1",
     "at step 30 too": "dispersion_30: let_3 / plain < 1",
     "at step 90 too": "dispersion_90: let_3 / plain < 1",
     "at step 60 the largest eigenvalue is smaller": "top_60: let_3 / plain < 1",
     "at step 60 the largest over the most negative is smaller": "ratio_60: let_3 / plain < 1"},
    ONE | {f"{what}_{step}": curvature(step, what) for step in (30, 60, 90)
           for what in ("top", "ratio", "dispersion")}, seeds=5)
CLAIMS["let-cosine"] = Claim(
    "How does the cosine of teacher and student go over the whole run?",
    "LET, arXiv 2602.05393: it rises steadily and hardly depends on the weight",
    {"plain": KEPT + "--let_weight=0", "teacher": SMALL_TEACHER,
     "let_0.1": KEPT + "--let_weight=0.1", "let_3": KEPT + "--let_weight=3"},
    {"LET's weight hardly matters: 0.1 reaches 0.9 of the cosine of 3":
     "cosine_50: let_0.1 / let_3 > 0.9",
     "at the end the cosine is higher than at step 50": "cosine_rise: let_3 > 0",
     "at step 50 weight 0.1 has aligned the two": "cosine_50: let_0.1 - plain > 0",
     "at the end it is higher than without LET": "cosine_300: let_3 - plain > 0"},
    ONE | {f"cosine_{step}": cosine_with_teacher(step) for step in (50, 100, 200, 300)}
    | {"cosine_rise": difference(cosine_with_teacher(300), cosine_with_teacher(50))})

# Learning rates: AdamW at a constant rate, read at each horizon on the way
HORIZONS = [steps * 2048 for steps in (73, 146, 292, 584)]
SMALL = ["2x48", "2x64", "3x96"]
RATES = (0.0015, 0.003, 0.006, 0.012, 0.024, 0.048)
SWEEP = SHORT + ADAMW + ("--vocab_size=1024 --embedding_lr=1 --schedule=constant --steps=584 "
                         "--eval_every=73 ")
GLOBAL = TEXT + ADAMW + "--n_layer=2 --n_embd=64 --embedding_lr=%s --lr=%s"
LAW_ROWS = ("Each seed has a law of its own, from the parabolas of its runs whose minimum is "
            "inside the learning rates.")
READ = ONE | {"N": parameters(False)} | {f"D{D}": loss_at(D // 2048) for D in HORIZONS}


def sweep(sizes, rates=RATES, more=""):
    return {f"{size}@{lr}": SWEEP + f"--n_layer={size[0]} --n_embd={size[2:]} --lr={lr} {more}"
            for size in sizes for lr in rates}


CLAIMS["law-global"] = Claim(
    "Does a learning rate for each module gain over one global rate?",
    "LR law, arXiv 2601.05049: at most 0.01 nats (4B parameters, 120B tokens)",
    {**{f"global@{lr}": GLOBAL % (1, lr) for lr in (0.006, 0.012, 0.024, 0.048)},
     **{f"embedding30@{lr}": GLOBAL % (30, lr) for lr in (0.003, 0.006, 0.012, 0.024)},
     **{f"{module}_{factor}": GLOBAL % (1, 0.024) + f" --module_lr={module}={factor}"
        for module in ("attention", "mlp", "head") for factor in (0.5, 2)}},
    {"30 times the learning rate for the embedding gains at most 0.01 nats":
         "loss: global_best - embedding30_best < 0.01",
     "factors of 1/2 and 2 on other modules gain at most 0.01 nats":
         "loss: global_best - others_best < 0.01"},
    ONE, reference="global@0.024", seeds=5,
    best={"global_best": "global@*", "embedding30_best": "embedding30@*",
          "others_best": "[amh]*_[02]*"})
CLAIMS["law-sweep"] = Claim(
    "Does a law in N and D predict the best learning rate of a larger model?",
    "LR law, arXiv 2601.05049: lr* = 38.46 N^-0.222 D^-0.351, R^2 0.962; parabolas above 0.995",
    sweep([*SMALL, "4x128"]),
    {"the law's learning rate costs a larger model less than 0.01 nats": "cost: law < 0.01",
     "the best learning rate falls with N": "b: law < 0",
     "the best learning rate falls with D": "c: law < 0",
     "the median parabola has R^2 above 0.995": "parabola_r2: law > 0.995"},
    READ, derive=fit_laws(SMALL, "4x128"), picture=law_picture,
    note=LAW_ROWS + " The sizes 2x48, 2x64 and 3x96 make the law; 4x128 is held out.")
CLAIMS["law-horizon"] = Claim(
    "Does the law hold at a longer horizon, and can the losses there be predicted?",
    "LR law, arXiv 2601.05049: L(D) = L_0 + A D^-gamma spares the long runs",
    sweep(SMALL),
    {"the law's learning rate costs a run of twice the tokens less than 0.01 nats":
     "cost: law < 0.01",
     "the losses there are predicted to 0.02 nats": "extrapolation: law < 0.02",
     "the best learning rate falls with D": "c: law < 0"},
    READ, derive=fit_laws(SMALL, HORIZONS[-1]),
    note=LAW_ROWS + " The longest horizon is held out.")
CLAIMS["law-moe"] = Claim(
    "Is the law of mixtures of experts one in all parameters, or in the active ones?",
    "LR law, arXiv 2601.05049: fitted on mixtures alone; which N is unknown",
    sweep(SMALL, RATES[:5], "--n_experts=4"),
    {"the best learning rate falls with D": "c: active < 0",
     "the best learning rate falls with N": "b: active < 0",
     "active parameters explain more": "law_r2: active - total > 0"},
    READ | {"active": parameters(True)},
    derive=fit_laws(SMALL, HORIZONS[-1], (("total", False), ("active", True))),
    note=LAW_ROWS + " N is the total or the active parameters. The longest horizon is held out.")
CLAIMS["law-transfer"] = Claim(
    "Is a fitted law better than muTransfer from the smallest model?",
    "LR law, arXiv 2601.05049: yes, by 1.28 points of MMLU at 4B parameters",
    sweep([*SMALL, "4x128"])
    | {f"mup@{lr}": SWEEP + f"--n_layer=4 --n_embd=128 --param=mup --base_n_embd=48 --lr={lr}"
       for lr in RATES[1:]}
    | {f"completep@{lr}": SWEEP + "--n_layer=4 --n_embd=128 --param=completep --base_n_embd=48 "
       f"--base_n_layer=2 --lr={lr}" for lr in RATES[1:]},
    {"the law's learning rate ends lower than muTransfer's": "loss: law_rate - mup_rate < 0",
     "the law's learning rate ends lower than CompleteP's": "loss: law_rate - completep_rate < 0",
     "muP's best learning rate moves less than the standard one's":
         "shift: mup_rate - unchanged_rate > 0"},
    READ, derive=transfer, note="The last rows: the loss of 4x128 at the law's learning rate, and "
    "at that of 2x48 unchanged or carried over, interpolated between runs.")

# Multipliers
LRM = "Learnable multipliers, arXiv 2601.04890: "
HYBRID = TEXT + ("--mixer=hybrid --n_layer=3 --n_embd=96 --ssm_head_dim=32 --block_size=128 "
                 "--batch_tokens=1024 --weight_decay=1 --decay_fraction=0.2 ")
VECTOR = "--multipliers=vector "
TWO_BLOCKS = SHORT + ADAMW + ("--n_layer=2 --n_embd=64 --vocab_size=1024 --block_size=128 "
                              "--micro_batch=16 --steps=400 --weight_decay=1 --decay_fraction=0.2 ")
SIDES = {"none": "", "vector": VECTOR}
MUON_RATES, ADAMW_RATES = (0.003, 0.006, 0.012, 0.024), (0.003, 0.006, 0.012)
FREE = {"fixed": "--frozen_gains=final", "gain": "", "none": "--frozen_gains=blocks",
        "scalar": "--frozen_gains=final --multipliers=scalar --multiplier_modules=head",
        "scalars": "--frozen_gains=blocks --multipliers=scalar --multiplier_modules=mlp"}
AT_MUON, AT_ADAMW = HYBRID + "--lr=0.012 ", HYBRID + ADAMW + "--lr=0.006 "


def scale(module, kinds, scales):
    """The learning rate of a module times S and its weight decay over S."""
    return {f"{kind}@{S:g}": TWO_BLOCKS + f"--module_lr={module}={S} "
            f"--module_decay={module}={1 / S} {FREE[kind]}" for kind in kinds for S in scales}


CLAIMS["multipliers-gain"] = Claim(
    "Do learnable multipliers lower the loss, with both optimizers?",
    LRM + "+1.21 points with AdamW and +1.10 with Muon, 0.5B parameters, 200B tokens",
    {**{f"muon_{side}@{lr}": HYBRID + flags + f"--lr={lr}"
        for side, flags in SIDES.items() for lr in MUON_RATES},
     **{f"adamw_{side}@{lr}": HYBRID + ADAMW + flags + f"--lr={lr}"
        for side, flags in SIDES.items() for lr in ADAMW_RATES}},
    {"multipliers end lower with Muon, each at its best learning rate":
     "loss: muon_vector - muon_none < 0",
     "with AdamW, each at its best learning rate": "loss: adamw_vector - adamw_none < 0"},
    ONE, reference="muon_none@0.012", seeds=5,
    best={f"{o}_{side}": f"{o}_{side}@*" for o in ("muon", "adamw") for side in SIDES}, gpu=GPU,
    gpu_runs="muon_*@0.003 muon_*@0.006 muon_*@0.012")
CLAIMS["multipliers-features"] = Claim(
    "Do multipliers spread the norms of rows, that is, the scales of features?",
    LRM + "row norms of qkv, gate and ssm are very alike without, and broad with them",
    {"none": AT_MUON, "vector": AT_MUON + VECTOR, "adamw_none": AT_ADAMW,
     "adamw_vector": AT_ADAMW + VECTOR},
    {"multipliers spread the norms of the rows of q": "q: vector - none > 0",
     "of up": "up: vector - none > 0",
     "of Mamba's x": "x: vector - none > 0",
     "of q, with AdamW": "q: adamw_vector - adamw_none > 0"},
    ONE | {piece: last(f"weights {piece} spread") for piece in ("q", "k", "v", "up", "down", "x")},
    seeds=5)
CLAIMS["multipliers-width"] = Claim(
    "Do multipliers find the scaling with width by themselves?",
    LRM + "matrices keep their norm at all widths, logits too with multipliers; the projector's "
    "falls as 1/width, those of q and k together as 1/width^2",
    {f"{kind}@{w}": TWO_BLOCKS + f"--n_embd={w} --frozen_gains=all {flags}"
     for kind, flags in {"none": "", "scalar": "--multipliers=scalar --multiplier_modules="
                         "embedding,attention,mlp,head"}.items() for w in (32, 64, 128, 256)},
    {"with multipliers the logits grow less with width": "logits: scalar - none < 0",
     "the head's multiplier falls": "head_factor: scalar < 0",
     "that of q and k falls": "qk_factor: scalar < 0",
     "W falls by no more than width^-0.25": "head_W: scalar > -0.25"},
    ONE | {"logits": logits_rms, "head_W": last("weights head rms"),
           "up_W": last("weights up rms"), "head_W~": last("weights head rms_effective"),
           "up_W~": last("weights up rms_effective"), "head_factor": factor("head"),
           "qk_factor": factor("q", "k")}, derive=width_exponents,
    note="Rows none and scalar: exponents of the columns over the width. All gains are frozen, so "
    "that only multipliers can free a scale.")
CLAIMS["multipliers-clip"] = Claim(
    "Does the gain vanish if the multipliers' gradients count in the norm that is clipped?",
    LRM + "yes: zero or negative gain", {
        "none": AT_MUON, "vector": AT_MUON + VECTOR,
        "clipped": AT_MUON + VECTOR + "--clip_multipliers=true", "adamw_none": AT_ADAMW,
        "adamw_vector": AT_ADAMW + VECTOR,
        "adamw_clipped": AT_ADAMW + VECTOR + "--clip_multipliers=true"},
    {"counting the multipliers' gradients in the clipped norm ends higher":
     "loss: clipped - vector > 0",
     "with AdamW too": "loss: adamw_clipped - adamw_vector > 0"}, ONE, seeds=5)
CLAIMS["multipliers-projector"] = Claim(
    "Does a multiplier free the head from the scale that learning rate and weight decay set?",
    LRM + "without one the loss suffers at S = 1/64 and 64, with one it is flat",
    scale("head", ("fixed", "scalar", "gain"), (1 / 64, 1 / 8, 1, 8, 64)),
    {"where the head is held at 64 times its scale, a scalar multiplier ends lower":
     "loss: scalar@64 - fixed@64 < 0",
     "at S = 1/64 too": "loss: scalar@0.015625 - fixed@0.015625 < 0",
     "with a scalar S = 64 costs less than 0.02": "loss: scalar@64 - scalar@1 < 0.02",
     "with a scalar S = 1/64 costs less than 0.02": "loss: scalar@0.015625 - scalar@1 < 0.02"},
    ONE | {"W": last("weights head rms"), "W~": last("weights head rms_effective")},
    reference="fixed@1")
CLAIMS["multipliers-mlp"] = Claim(
    "Do multipliers free the MLPs from that scale, with the gains in the blocks frozen?",
    LRM + "without multipliers the loss suffers at large S, with them it does not",
    scale("mlp", ("none", "scalars"), (0.25, 0.5, 1, 2, 4)),
    {"where the MLPs are held at 4 times their scale, multipliers end lower":
     "loss: scalars@4 - none@4 < 0",
     "with them S = 4 costs less than 0.02": "loss: scalars@4 - scalars@1 < 0.02"},
    ONE | {"W": last("weights up rms"), "W~": last("weights up rms_effective")},
    reference="none@1")

# Linearity
LINEAR = "Linearity, arXiv 2405.12250: "
OVER_TIME = DEEP + "--steps=400 --keep_checkpoints=true"
NARROW = TEXT + "--n_embd=96 --lr=0.012 "
MAMBA = NARROW + "--mixer=mamba2 --n_layer=6 --ssm_head_dim=32 "
PRUNED = TEXT + "--n_layer=6 --n_embd=48 "
CLAIMS["linearity-profile"] = Claim(
    "How linear are blocks, and does it fall over training?",
    LINEAR + "full score 0.99 between neighboring layers; it falls over training",
    {"ours": OVER_TIME, "smollm2": "pretrained smollm2"},
    {"blocks become less linear from step 100 to 400, without the residual": "free_fall: ours < 0",
     "the full score at the end is above 0.98": "full: ours > 0.98"},
    {"loss": last("val_loss"), "full": linearity("full_held_out"),
     "full without first": linearity("full_held_out", 0, True),
     "free": linearity("free_held_out"), "free_100": linearity("free_held_out", 100),
     "free_fall": difference(linearity("free_held_out"), linearity("free_held_out", 100))},
    seeds=5)
CLAIMS["linearity-regularizer"] = Claim(
    "Does the regularizer make blocks less linear, and the model better?",
    LINEAR + "cosine 0.5: the residual-free score falls at every layer; SuperGLUE 43.3 to 46.1",
    {"none": NARROW, "cosine": NARROW + "--linearity=cosine", "mse": NARROW + "--linearity=mse",
     "mamba": MAMBA, "mamba_cosine": MAMBA + "--linearity=cosine"},
    {"the cosine regularizer makes blocks less linear, without the residual":
     "free: cosine - none < 0",
     "of Mamba-2 too": "free: mamba_cosine - mamba < 0",
     "cosine lowers the loss": "loss: cosine - none < 0",
     "cosine solves more pairs": "python: cosine - none > 0"},
    ONE | {"free": linearity("free_held_out"), "full": linearity("full_held_out"),
           "added/stream": linearity("ratio_mean"), "python": python}, seeds=5, gpu=GPU)
CLAIMS["linearity-prune"] = Claim(
    "Is a regularized model cheaper to prune?",
    LINEAR + "the press release: yes, 10 to 15 % of the blocks go; the most linear ones first",
    {"none": PRUNED, "cosine": PRUNED + "--linearity=cosine"},
    {"removing two of six blocks costs less after the cosine regularizer":
     "remove_2: cosine - none < 0",
     "removing one of them costs less after cosine": "remove_1: cosine - none < 0",
     "replacing two costs less after cosine": "replace_2: cosine - none < 0",
     "replacing costs less than removing": "saved: none > 0",
     "the most linear cost less than random ones": "order: none < 0"},
    ONE | {"remove_1": pruning(1, "remove", "full"), "remove_2": pruning(2, "remove", "full"),
           "replace_2": pruning(2, "replace", "full"),
           "random_2": pruning(2, "remove", "random"),
           "saved": difference(pruning(2, "remove", "full"), pruning(2, "replace", "full")),
           "order": difference(pruning(2, "remove", "full"), pruning(2, "remove", "random"))},
    seeds=8)
CLAIMS["python-pairs"] = Claim(
    "Do the minimal pairs of Python order models as their losses do?",
    "a control of our own task: an untrained model is at 50 %, and a published one on top",
    {"untrained": SHORT + "--steps=1 --warmup_steps=0 --lr=1e-30", "ours": SHORT,
     "smollm2": "pretrained smollm2"},
    {"training raises the accuracy on the pairs": "python: ours - untrained > 0",
     "an untrained model has less than 53 %": "python: untrained < 53",
     "and more than 47 %": "python: untrained > 47"},
    {"loss": last("val_loss"), "python": python})

# Distillation
HALF = SHORT + "--steps=300 --init_from={teacher} --n_layer=6 "
TAUGHT = "--teacher={teacher} --distill=distilbert "
STUDENT = TEXT + "--n_embd=96 --teacher={teacher} "
GENERATE = ("teacher.py generate {teacher} {out} --n_prompts=400 --tokens=112 --seeds=%s "
            "--temperatures=%s --best=%d")
READER = SHORT + ("--vocab_size=512 --n_layer=2 --n_embd=64 --block_size=128 --micro_batch=16 "
                  "--eval_tokens=2048 --steps=150 --data={%s_text}/text.txt")
SUMS = SHORT + ("--data={sums}/sums.jsonl --distill=step_by_step --tokenizer=bytes --block_size=64 "
                "--micro_batch=32 --n_layer=2 --n_embd=96 --steps=1500 --eval_every=250 ")
CLAIMS["distilbert"] = Claim(
    "Half of the blocks: what do the three terms and the initialization bring?",
    "DistilBERT, arXiv 1910.01108: GLUE points lost without: initialization 3.69, soft loss 2.96, "
    "cosine 1.46, hard loss 0.31; 97 % of the score kept, 1.6 times as fast",
    {"full": HALF + TAUGHT,
     "teacher": TEXT + "--n_layer=12 --n_embd=96 --steps=800 --seed=1000003",
     "no_init": TEXT + TAUGHT + "--n_layer=6 --n_embd=96",
     "no_soft": HALF + TAUGHT + "--distill_weight=0 --distill_hard_weight=2 "
     "--distill_cosine_weight=1",
     "no_cosine": HALF + TAUGHT + "--distill_cosine_weight=0",
     "no_hard": HALF + TAUGHT + "--distill_hard_weight=0",
     "labels": HALF,
     "scratch": TEXT + "--n_layer=6 --n_embd=96"},
    {"a start from the teacher's blocks lowers the loss": "loss: no_init - full > 0",
     "the soft loss lowers it": "loss: no_soft - full > 0",
     "the cosine lowers it": "loss: no_cosine - full > 0",
     "the hard loss lowers it": "loss: no_hard - full > 0",
     "distillation ends lower than labels with the same start": "loss: full - labels < 0",
     "95 % of the teacher's score on the pairs is kept": "kept: full > 95"},
    ONE | {"python": python, "kept": over_teacher("python"), "speed": over_teacher("speed")},
    note="A student that starts from the teacher's blocks inherits its 800 steps and takes 300 "
    "more. It can therefore end lower than its teacher.")
CLAIMS["kd-family"] = Claim(
    "Which divergence from a teacher that is better than its student?",
    "GKD, arXiv 2306.13649: 1.7 to 2.1 times the gain of KD; MiniLLM, arXiv 2306.08543: reverse KL "
    "24.6 against 22.8 Rouge-L",
    {"plain": STUDENT + "--let_weight=0", "teacher": GOOD,
     **{d: STUDENT + f"--distill={d}" for d in ("kd", "rkd", "reverse_kl", "gkd")}},
    {"distillation (kd) ends lower than plain training": "loss: kd - plain < 0",
     "gkd solves more pairs than kd": "python: gkd - kd > 0",
     "reverse_kl solves more pairs than rkd": "python: reverse_kl - rkd > 0"},
    LOSS | {"python": python})
CLAIMS["teacher-text"] = Claim(
    "Which of a teacher's texts teach best: the likeliest, any, at one temperature or several?",
    "Best-of-K (RAFT) and varied temperatures help, without figures; the control is ours",
    {"random": READER % "random", "teacher": GOOD,
     "best": READER % "best", "temperatures": READER % "temperatures", "two": READER % "two",
     "real": READER % "real",
     "random_text": GENERATE % ("{seed}", 1, 0), "best_text": GENERATE % ("{seed},1001,1002,1003",
                                                                         1, 1),
     "temperatures_text": GENERATE % ("{seed}", "0.7,1", 0),
     "two_text": GENERATE % ("{seed},1001", 1, 0),
     "real_text": "tests/reproduce.py real_text {out} {seed}"},
    {"the likeliest of 4 texts teaches better than a random one": "bits: best - random < 0",
     "two temperatures teach better than two samples at one": "bits: temperatures - two < 0",
     "real text teaches better than a teacher's": "bits: real - random < 0"},
    {"bits": corpus_bits}, reference="random", seeds=5)
CLAIMS["step-by-step"] = Claim(
    "Do rationales help a student that gives the label alone?",
    "Distilling step-by-step, arXiv 2305.02301: the same accuracy with 12.5 % of the labels",
    {"labels": SUMS + "--distill_weight=0", "both": SUMS,
     "sums": "tests/reproduce.py sums {out}"},
    {"rationales lower the loss of the labels": "loss: both - labels < 0"},
    ONE)
