"""probes.py: what can be measured on trained models and read from their runs; and the linearity regulariser.

    python probes.py linearity runs/1/ckpt.pt --text notes.txt --plot=profile.png        # how linear is each block?
    python probes.py prune runs/1/ckpt.pt --text notes.txt --blocks=1,2,3        # leave blocks out, or an affine map for each
    python probes.py compare runs/plain-? runs/let-?            # folders NAME-SEED; the first NAME is the reference
    python probes.py sweep runs/fixed@*-? runs/scalar@*-? --piece=head --plot=sweep.png        # folders NAME@X-SEED

Linearity ("Your Transformer is Secretly Linear", Razzhigaev et al. 2024, arXiv 2405.12250): how well an affine map
predicts a block's output from its input, over many tokens.

Names and symbols
    X, Y        (n, d) states of n tokens before and after a block, each column centred; D = Y - X, what the block adds
    full, free  1 - min_A ||X A - Y||^2 / ||Y||^2, and the same with D in place of Y (residual-free)
    run         a folder that train.py wrote; its metrics.jsonl is what is read here
    seed        what follows the last dash of its name; runs that differ in it alone are one row of a table
    x           of a sweep: the number between @ and the seed, such as a factor on a learning rate
    piece       a kind of logical matrix: q, k, v, o, gate, up, down, embed, head
"""
import argparse
import copy
import itertools
import json
import math
import os
import random
import statistics
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import (GPT, AffineBlock, BadInput, ModelConfig, command, device_exists, load_checkpoint,
                   tokenizer_from_dict)

# ----------------------------------------------------------------------------------------------------------------------
# Linearity


def linearity_penalty(states, kind: str = "cosine", reduction: str = "sum", stop_gradient: str = "none"):
    """The pretraining regulariser (the paper's section 4): it pulls neighbouring states together, and the score above
    is reported to fall, as blocks do more of their work off the line. 0-d, float32.

        cosine: sum_i mean over tokens of 1 - cos(h_i, h_{i-1});    mse: sum_i mean over tokens of ||h_i - h_{i-1}||^2

    states: h_0, ..., h_L, (B, T, C) each. The paper does not say what is averaged, where the sum begins, or what is
    held fixed: tokens are averaged here as the loss is; reduction: over blocks, `sum` or `mean`; stop_gradient: which
    of the two states of a pair gets no gradient, `none`, `lower` or `upper`; train.py's --linearity_from says where it
    begins."""
    terms = []
    for lower, upper in zip(states, states[1:]):
        lower, upper = (lower.detach() if stop_gradient == "lower" else lower).float(), (
            upper.detach() if stop_gradient == "upper" else upper).float()
        terms.append(1 - F.cosine_similarity(upper, lower, dim=-1).mean() if kind == "cosine"
                     else (upper - lower).square().sum(-1).mean())
    return torch.stack(terms).sum() if reduction == "sum" else torch.stack(terms).mean()


@torch.no_grad()
def stream_scales(states) -> dict[str, list[float]]:
    """By block: mean cosine of the states before and after, mean norm of the state after, mean over tokens of the norm
    of what the block adds over that. A penalty can be met cheaply, mse by a shrinking stream, cosine by a growing one:
    here it shows."""
    found = {"cosine": [], "norm": [], "ratio": []}
    for lower, upper in zip(states, states[1:]):
        lower, upper = lower.float(), upper.float()
        norm = upper.norm(dim=-1)
        found["cosine"].append(F.cosine_similarity(upper, lower, dim=-1).mean().item())
        found["norm"].append(norm.mean().item())
        found["ratio"].append(((upper - lower).norm(dim=-1) / norm.clamp(min=1e-30)).mean().item())
    return found


class Moments:
    """Sums over tokens of what a linear fit of Y on X needs, in float64: any number of tokens in memory for 2 d^2
    numbers.

    About a shift, the mean of the first tokens, which changes no score but keeps digits where a mean is large."""

    def __init__(self, shift_x=None, shift_y=None):
        self.n, self.shift_x, self.shift_y, self.ratio, self.cosine = 0, shift_x, shift_y, 0.0, 0.0

    def add(self, x, y):
        """x, y: (tokens, d) before and after a block."""
        x, y = x.double(), y.double()
        if self.shift_x is None:
            self.shift_x, self.shift_y = x.mean(0), y.mean(0)
        if self.n == 0:
            self.x, self.y = torch.zeros_like(self.shift_x), torch.zeros_like(self.shift_y)
            self.xx, self.xy, self.yy = x.new_zeros(x.shape[1], x.shape[1]), x.new_zeros(x.shape[1], y.shape[1]), 0.0
            self.dd, self.y2 = 0.0, 0.0
        self.ratio += ((y - x).norm(dim=1) / y.norm(dim=1).clamp(min=1e-300)).sum().item()
        self.cosine += F.cosine_similarity(x, y, dim=1).sum().item()
        self.dd, self.y2 = self.dd + (y - x).square().sum().item(), self.y2 + y.square().sum().item()
        x, y = x - self.shift_x, y - self.shift_y
        self.n += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.xx.addmm_(x.mT, x)
        self.xy.addmm_(x.mT, y)
        self.yy += y.square().sum().item()

    def centred(self, mean_x=None, mean_y=None):
        """(X^T X, X^T Y, ||Y||^2) about the means, its own or those given (both relative to the shift)."""
        mx, my = (self.x / self.n, self.y / self.n) if mean_x is None else (mean_x, mean_y)
        return (self.xx - torch.outer(self.x, mx) - torch.outer(mx, self.x) + self.n * torch.outer(mx, mx),
                self.xy - torch.outer(self.x, my) - torch.outer(mx, self.y) + self.n * torch.outer(mx, my),
                self.yy - 2 * (self.y @ my).item() + self.n * (my @ my).item())


def linearity(fit: Moments, held_out: Moments | None = None) -> dict:
    """The scores of one block, from tokens to fit on and others to check on (with the same shifts).

    full, free: in sample, as the authors do; *_adjusted: freed of what a fit of this rank gets by chance, 1 - (1 - S)(n
    - 1) / (n - 1 - rank); *_held_out: R^2 of the fitted affine map on the other tokens, which can be negative. The
    solve is by eigenvalues of X^T X, those below d eps times the largest counted as 0: X is often rank-deficient (few
    distinct tokens). rank, n, n_over_d; ratios of what the block adds to the state after it: ratio_mean over tokens of
    the norms, ratio_rms of the Frobenius norms, ratio_centred of the centred ones, for which 1 - full = (1 - free)
    ratio_centred^2 exactly; cosine, the mean over tokens of that of x and y."""
    xx, xy, yy = fit.centred()
    d = len(xx)
    e, V = torch.linalg.eigh(xx)
    kept = e > d * torch.finfo(e.dtype).eps * e[-1].clamp(min=1e-300)
    e, V = e[kept], V[:, kept]
    rank, n = len(e), fit.n
    dd = yy - 2 * xy.trace().item() + xx.trace().item()  # ||D||^2, as X^T D = X^T Y - X^T X
    out = {"n": n, "n_over_d": n / d, "rank": rank, "ratio_mean": fit.ratio / n, "ratio_rms": math.sqrt(fit.dd / fit.y2),
           "ratio_centred": math.sqrt(max(dd, 0.0) / yy), "cosine": fit.cosine / n}
    if held_out is not None:
        h_xx, h_xy, h_yy = held_out.centred(fit.x / n, fit.y / n)
        my = held_out.y / held_out.n - fit.y / n
        mx = held_out.x / held_out.n - fit.x / n
    for name, target, size in (("full", xy, yy), ("free", xy - xx, dd)):
        projected = V.mT @ target  # (rank, d)
        score = ((projected.square().sum(1) / e).sum() / size).item() if size > 1e-12 * yy else math.nan  # nothing is added
        out[name] = score
        out[f"{name}_adjusted"] = 1 - (1 - score) * (n - 1) / (n - 1 - rank) if n - 1 > rank else math.nan
        if held_out is not None:
            A = V @ (projected / e[:, None])  # the affine map is about the means of the fit
            h_target = h_xy if name == "full" else h_xy - h_xx
            h_size = h_yy if name == "full" else h_yy - 2 * h_xy.trace().item() + h_xx.trace().item()
            error = h_size - 2 * (A * h_target).sum().item() + (A * (h_xx @ A)).sum().item()
            mean = my if name == "full" else my - mx
            total = h_size - held_out.n * (mean @ mean).item()
            out[f"{name}_held_out"] = 1 - error / total if total > 0 else math.nan
    return out


@torch.no_grad()
def linearity_profile(model, batches, skip_first=False, progress=None) -> list[dict]:
    """linearity() of every block over batches of token ids (B, T): the even ones to fit, the odd ones held out.
    skip_first: leave position 0 out, where attention parks what it has no use for, with states a hundred times as
    large."""
    blocks = model.config.n_layer
    fit, held_out = [Moments() for _ in range(blocks)], [None] * blocks
    for i, idx in enumerate(batches):
        _, states = model.trunk(idx, hidden=tuple(range(blocks + 1)))
        states = [h[:, 1 if skip_first else 0:].flatten(0, 1) for h in states]
        for k in range(blocks):
            if i % 2 == 0:
                fit[k].add(states[k], states[k + 1])
            else:
                held_out[k] = held_out[k] or Moments(fit[k].shift_x, fit[k].shift_y)
                held_out[k].add(states[k], states[k + 1])
        if progress:
            progress.update(idx.numel())
    return [{"block": k + 1, **linearity(fit[k], held_out[k])} for k in range(blocks)]


def load_model(name, device):
    """(model in eval mode, frozen, its tokenizer as a dict) of a checkpoint or of whatever else teacher.load_pretrained
    reads."""
    from teacher import load_pretrained  # here alone: nothing but the measuring of models needs it
    if not device_exists(device):
        raise BadInput(f"--device={device}: no such device here")
    return load_pretrained(name, device, flag="")


def read_contexts(a, model, tokenizer, least: int):
    """The text of --text as token ids (contexts, length): --tokens of its tokens, in whole contexts of --context. Raises
    BadInput when it is no text, or has fewer than `least` contexts or than four tokens a dimension of the width."""
    try:
        text = Path(a.text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise BadInput(f"--text={a.text}: cannot be read as UTF-8 text ({e})") from None
    length = a.context or min(512, model.config.block_size)
    if not 2 <= length <= model.config.block_size:
        raise BadInput(f"--context={a.context}: from 2 to the model's {model.config.block_size}")
    ids = torch.tensor(tokenizer_from_dict(tokenizer).encode_ordinary(text)[:a.tokens or None])
    rows, width = len(ids) // length, model.config.n_embd
    if rows < max(least, -(-4 * width // length)):
        needed = max((least * length, f"{least} contexts"), (-(-4 * width // length) * length, "four times the width"))
        raise BadInput(f"--text={a.text} --tokens={a.tokens}: {rows * length:,} tokens in whole contexts of {length}; at "
                       f"least {needed[0]:,}, {needed[1]}, are needed")
    return ids[:rows * length].view(rows, length).to(a.device)


def linearity_command(a) -> str:
    model, tokenizer = load_model(a.checkpoint, a.device)
    ids = read_contexts(a, model, tokenizer, 2)
    with tqdm(total=ids.numel(), unit="token", disable=None) as progress:
        profile = linearity_profile(model, ids.split(min(16, len(ids) // 2)), a.skip_first, progress)
    keys = ("full", "full_adjusted", "full_held_out", "free", "free_adjusted", "free_held_out", "ratio_mean", "rank")
    lines = [f"{profile[0]['n']:,} tokens to fit on, {profile[0]['n_over_d']:.1f} times the width",
             "block " + " ".join(f"{k:>14}" for k in keys)]
    lines += [f"{p['block']:>5} " + " ".join(f"{p[k]:>14.4f}" if k != "rank" else f"{p[k]:>14}" for k in keys) for p in profile]
    if a.plot:
        pyplot = plotting(a.plot)
        figure, axis = pyplot.subplots(figsize=(6, 4), layout="constrained")
        depth = [p["block"] / len(profile) for p in profile]
        for key, style in (("full", "-"), ("full_held_out", "--"), ("free", "-"), ("free_held_out", "--")):
            axis.plot(depth, [p[key] for p in profile], style, marker="o", color="C0" if "full" in key else "C1",
                      label=key.replace("_", " "))
        axis.set(xlabel="depth, block over blocks", ylabel="linearity score", title="linearity of each block")
        axis.legend()
        figure.savefig(a.plot, dpi=120)
    return "\n".join(lines)


def plotting(path: str):
    """matplotlib.pyplot without a screen; refuses names that make no picture."""
    if Path(path).suffix not in (".png", ".pdf", ".svg"):
        raise BadInput(f"--plot={path}: a name that ends in .png, .pdf or .svg is needed")
    try:
        import matplotlib
    except ImportError:
        raise BadInput("--plot: needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


# ----------------------------------------------------------------------------------------------------------------------
# Pruning (the same paper's section 5): the most linear blocks go first; better, an affine map takes a block's place;
# better still, it is then trained to give the states of the whole model. No more than that is said. Chosen here: blocks
# are scored once, on the whole model, and none is safe but those of --protect; maps have a bias, as torch's Linear has,
# and take the place of the residual connection too; they are fitted in depth order, each on what the maps before it hand
# on, to the whole model's states; distillation compares the states after the first map and after each later block, each
# in units of its own mean square.

ORDERS = ("full", "free", "cosine", "random")
ARMS = ("remove", "replace", "distil", "distil_all")


def prune_order(profile, order: str, protect=(), seed=0) -> list[int]:
    """Blocks by number, the first to go first: by falling score `full` or `free`, in sample as the authors have it, by
    falling `cosine` of the states before and after (ShortGPT's Block Influence, arXiv 2403.03853, upside down), or at
    `random`. profile: of linearity_profile; protect: blocks that stay. A block that adds nothing goes first."""
    blocks = [p["block"] for p in profile if p["block"] not in protect]
    if order == "random":
        random.Random(seed).shuffle(blocks)
        return blocks
    scores = {p["block"]: math.inf if math.isnan(p[order]) else p[order] for p in profile}
    return sorted(blocks, key=scores.get, reverse=True)


def with_blocks(model: GPT, blocks, kinds: str) -> GPT:
    """The model with these blocks in place of its own; all parameters are shared with it, none copied. Settings of kinds
    of block that are gone go back to their defaults, which is where train.py wants them."""
    settings = {**asdict(model.config), "n_layer": len(kinds), "layer_pattern": kinds, "mixer": "attention"}
    new = copy.copy(model)
    new.config = ModelConfig(**{k: v for k, v in settings.items() if k not in idle_settings(kinds)})
    new.has_attention = bool({*kinds} & {*"AH"})
    new._modules = {**model._modules, "blocks": torch.nn.ModuleList(blocks)}
    return new


def idle_settings(kinds: str) -> set[str]:
    """Flags of kinds of block that are not among these letters."""
    ssm, experts = "d_state ssm_head_dim expand n_groups chunk_size ssm_norm", "n_experts experts_per_token expert_hidden"
    return {*("" if {*kinds} & {*"MH"} else ssm).split(),
            *("" if {*kinds} & {*"AH"} else f"{experts} balance_weight router_z_weight").split()}


def remove_blocks(model: GPT, chosen) -> GPT:
    """The model without the blocks of these numbers."""
    left = [k for k in range(model.config.n_layer) if k + 1 not in chosen]
    return with_blocks(model, [model.blocks[k] for k in left], "".join(model.config.kinds()[k] for k in left))


def fit_affine(fit: Moments, held_out: Moments):
    """(W (d, d), b (d,), ridge) of y = x + W x + b, in float64: least squares with a ridge on W and not on A = I + W, as
    a block is near the identity: min ||X B - D||^2 + ridge ||B||^2 with B = W^T, X and D = Y - X centred.

    The ridge, in units of the largest eigenvalue of X^T X, is the one of a grid that leaves the smallest error on the
    other tokens (Moments with the same shifts). inf is on the grid: W = 0 and a constant b."""
    xx, xy, _ = fit.centred()
    mx, my = fit.x / fit.n, fit.y / fit.n
    h_xx, h_xy, _ = held_out.centred(mx, my)
    e, V = torch.linalg.eigh(xx)
    P, Q, H = V.mT @ (xy - xx), V.mT @ (h_xy - h_xx), V.mT @ h_xx @ V  # in the axes of X^T X

    def solve(ridge):
        return P / (e.clamp(min=0) + ridge * e[-1])[:, None]

    def error(ridge):  # on the other tokens, but for their ||D||^2
        R = solve(ridge)
        return (R * (H @ R - 2 * Q)).sum().item()

    ridge = min((math.inf, *(10.0 ** -j for j in range(13))), key=error)
    B = V @ solve(ridge)
    mx, my = mx + fit.shift_x, my + fit.shift_y
    return B.mT, my - mx - mx @ B, ridge


@torch.no_grad()
def replace_blocks(model: GPT, chosen, batches, skip_first=False) -> GPT:
    """The model with an affine map in place of each chosen block. batches: token ids (B, T), every fourth one to tune
    the ridge."""
    kinds, blocks, new = [*model.config.kinds()], [*model.blocks], model
    for k in sorted(chosen):
        fit, held_out = Moments(), None
        for i, idx in enumerate(batches):
            x, y = (h[:, 1 if skip_first else 0:].flatten(0, 1) for h, _ in (
                new.trunk(idx, blocks=k - 1), model.trunk(idx, blocks=k)))
            if i % 4 == 3:
                held_out = held_out or Moments(fit.shift_x, fit.shift_y)
            (held_out if i % 4 == 3 else fit).add(x, y)
        W, b, _ = fit_affine(fit, held_out)
        blocks[k - 1], kinds[k - 1] = AffineBlock(model.config).to(batches[0].device), "L"
        blocks[k - 1].affine.weight.copy_(W)
        blocks[k - 1].affine.bias.copy_(b)
        new = with_blocks(model, blocks, "".join(kinds))
    return new


def distil(model: GPT, whole: GPT, batches, steps: int, lr: float, everything=False) -> GPT:
    """A copy of the model, of which the affine maps (or, with `everything`, all parameters) are trained by AdamW, its rate
    falling linearly to 0, to give the whole model's states: mean over the states after the first map and after each later
    block of ||h - h*||^2 / ||h*||^2, both norms over all tokens of the batch."""
    model = copy.deepcopy(model).requires_grad_(everything)
    for block in model.blocks:
        block.requires_grad_(everything or isinstance(block, AffineBlock))
    states = tuple(range(model.config.kinds().index("L") + 1, model.config.n_layer + 1))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.95), weight_decay=0.0)
    for step in tqdm(range(steps), "distilling", unit="step", disable=None, leave=False):
        idx = batches[step % len(batches)]
        with torch.no_grad():
            _, wanted = whole.trunk(idx, hidden=states)
        _, found = model.trunk(idx, hidden=states)
        loss = sum((h - h0).square().sum() / h0.square().sum() for h, h0 in zip(found, wanted)) / len(states)
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model.requires_grad_(False)


@torch.no_grad()
def mean_loss(model, batches) -> float:
    """Nats per token over batches of token ids (B, T), positions 1 to T - 1 predicted from those before."""
    losses = [(model(idx[:, :-1], idx[:, 1:])[0].item(), len(idx)) for idx in batches]
    return sum(loss * n for loss, n in losses) / sum(n for _, n in losses)


@torch.no_grad()
def seconds_per_pass(models, idx, rounds=9) -> list[float]:
    """Median seconds of each model's forward pass over idx (B, T), head included. The models take turns, so that what
    else the machine does hits all alike."""
    times = [[] for _ in models]
    for r in range(rounds + 1):
        for model, seen in zip(models, times):
            start = time.perf_counter()
            model(idx)[0][0, 0, 0].item()  # which waits for the device
            if r:  # the first is a warm-up
                seen.append(time.perf_counter() - start)
    return [statistics.median(seen) for seen in times]


def pruned_checkpoint(ckpt: dict, model: GPT, **how) -> dict:
    """`ckpt` with the pruned model in place of its own, at the same step; optimizers and multipliers begin anew. Flags that
    do not fit the model any more are changed: those of blocks that are gone, and numbers of blocks beyond the last."""
    kinds = model.config.kinds()
    config = {k: v for k, v in ckpt["config"].items() if k not in idle_settings(kinds)}
    config |= {"n_layer": len(kinds), "layer_pattern": kinds, "mixer": "attention"}
    for name, use, last in (("let_student_layer", "teacher", len(kinds)), ("linearity_from", "linearity", len(kinds) - 1)):
        if config.get(use, "none") != "none":
            config[name] = min(config[name], last)
    return {**ckpt, "model": model.state_dict(), "model_config": asdict(model.config), "config": config, "optimizers": [],
            "multipliers": None, "let": None, "let_optimizer": None, "best_val_loss": math.inf, "pruned": how}


def listed(text: str, flag: str, known=()) -> list:
    """"1,2,3" as numbers from 1 on, or as names out of `known`."""
    words = [word for word in text.split(",") if word]
    if known and not {*words} <= {*known} or not (known or all(word.isdecimal() and int(word) > 0 for word in words)):
        what = "out of " + ", ".join(known) if known else "numbers from 1 on"
        raise BadInput(f"{flag}={text}: {what}, separated by commas")
    return words if known else [int(word) for word in words]


def prune_command(a) -> str:
    """The table of every order, number of blocks and arm that is asked for. Of the models with the most blocks gone the
    best is written. (Of a pretrained model it can be sampled, measured and taught from; train.py has no flags for some
    of its settings, and does not go on with it.)"""
    from teacher import is_checkpoint

    orders, arms = listed(a.orders, "--orders", ORDERS), listed(a.arms, "--arms", ARMS)
    counts, protect = listed(a.blocks, "--blocks"), listed(a.protect, "--protect")
    if a.distil_steps < 1 or not 0 < a.distil_lr < math.inf:
        raise BadInput(f"--distil_steps={a.distil_steps} --distil_lr={a.distil_lr}: both have to be positive")
    whole, tokenizer = load_model(a.checkpoint, a.device)
    if not isinstance(whole, GPT):
        raise BadInput(f"{a.checkpoint}: its architecture is not one of model.py's, whose blocks alone can be pruned")
    c = whole.config
    if any(k > c.n_layer for k in protect):
        raise BadInput(f"--protect={a.protect}: {a.checkpoint} has blocks 1 to {c.n_layer}")
    most = min(c.n_layer - 1, c.n_layer - len({*protect}))
    if not (orders and arms and counts) or max(counts) > most:
        raise BadInput(f"--blocks={a.blocks}: {a.checkpoint} has {c.n_layer} blocks, of which 1 to {most} can go")
    ids = read_contexts(a, whole, tokenizer, 16)
    source = Path(a.checkpoint)
    ours = is_checkpoint(source)
    out = Path(a.out_dir or (source.parent if ours else Path("runs", source.name)) / "pruned") / "ckpt.pt"
    if out.exists():
        raise BadInput(f"--out_dir={out.parent}: holds a checkpoint already; name another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    ids, judged = ids[:-(len(ids) // 4)], ids[-(len(ids) // 4):]  # the last quarter is for the losses
    batches, judged = ids.split(min(8, len(ids) // 8)), judged.split(8)
    profile = linearity_profile(whole, batches, a.skip_first)
    parts = "".join(sorted(c.kinds()))  # where in the model a block stands makes no difference to the time
    made = [("", "whole", (), mean_loss(whole, judged), whole.num_params(), parts)]
    shapes, best = {parts: whole}, (math.inf,)
    with tqdm(total=len(orders) * len(counts) * len(arms), unit="model", disable=None) as progress:
        for order, count in itertools.product(orders, counts):
            chosen, replaced = sorted(prune_order(profile, order, protect, a.seed)[:count]), None
            for arm in arms:
                if arm == "remove":
                    model = remove_blocks(whole, chosen)
                else:
                    model = replaced = replaced or replace_blocks(whole, chosen, batches, a.skip_first)
                parts = "".join(sorted(model.config.kinds()))
                shapes.setdefault(parts, model)
                if arm.startswith("distil"):
                    model = distil(replaced, whole, batches, a.distil_steps, a.distil_lr, arm == "distil_all")
                loss = mean_loss(model, judged)
                made.append((order, arm, chosen, loss, model.num_params(), parts))
                if count == max(counts):
                    best = min(best, (loss, order, arm, chosen, model), key=lambda found: found[0])
                progress.update()
    seconds = dict(zip(shapes, seconds_per_pass(shapes.values(), batches[0])))
    rows = ["| order | arm | blocks | held-out nats | perplexity | parameters | of the whole | speed over the whole |",
            "|---|---|---|---|---|---|---|---|"]
    for order, arm, chosen, loss, n, parts in made:
        rows.append(f"| {order} | {arm} | {', '.join(map(str, chosen))} | {loss:.4f} | {math.exp(loss):.2f} | {n:,} | "
                    f"{100 * n / made[0][4]:.1f} % | {seconds[made[0][5]] / seconds[parts]:.2f} |")
    _, order, arm, chosen, model = best
    tmp = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    ckpt = load_checkpoint(source) if ours else {"format": "nanolet-1", "tokenizer": tokenizer, "step": 0,
                                                 "config": {"optimizer": "muon"}}
    try:
        with open(tmp, "wb") as file:  # torch's own writer does not say when the disk is full
            torch.save(pruned_checkpoint(ckpt, model, source=str(source), order=order, arm=arm, blocks=chosen), file)
        os.replace(tmp, out)
    finally:
        tmp.unlink(missing_ok=True)
    return "\n".join([*rows, "", f"{out}: {order}, {arm}, blocks {', '.join(map(str, chosen))}"])


# ----------------------------------------------------------------------------------------------------------------------
# Tables over runs


def read_evaluations(run) -> list[dict]:
    """The lines of a run's metrics.jsonl that hold an evaluation. A run that stopped before its last step, as a
    diverged one does, has an infinite loss in the last."""
    path, lines = Path(run) / "metrics.jsonl", []
    try:
        for text in path.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                if lines:  # a kill can leave half a line
                    continue
                raise
    except (OSError, ValueError) as e:
        raise BadInput(f"{path}: not the metrics of a run ({e})") from None
    lines = [line for line in lines if isinstance(line, dict) and "val_loss" in line]
    if not lines:
        raise BadInput(f"{path}: no evaluation in it")
    config = Path(run) / "config.json"
    if config.exists() and lines[-1]["step"] < json.loads(config.read_text())["steps"]:
        lines[-1] = {**lines[-1], "val_loss": math.inf, "bits_per_byte": math.inf}
    return lines


def first_reached(lines, loss: float) -> dict | None:
    """Where the held-out loss first comes down to `loss`: step, flops and seconds, each on the straight line between
    the evaluations around it. None when it never does."""
    if lines[0]["val_loss"] <= loss:
        return lines[0]
    for before, after in zip(lines, lines[1:]):
        if after["val_loss"] <= loss < before["val_loss"]:
            part = (before["val_loss"] - loss) / (before["val_loss"] - after["val_loss"])
            return {k: before[k] + part * (after[k] - before[k]) for k in ("step", "flops", "seconds")}
    return None


def mean_sd(values, digits) -> str:
    """Mean and standard deviation as text; runs that did not finish, with an infinite value, are counted instead."""
    if unfinished := sum(not math.isfinite(v) for v in values):
        return f"{unfinished} of {len(values)} did not finish"
    sd = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{sd}"


def by_name_and_seed(runs) -> dict[str, dict[str, list[dict]]]:
    """Folders NAME-SEED as {name: {seed: evaluations}}, in the order they were given."""
    groups = {}
    for run in runs:
        name, dash, seed = Path(run).name.rpartition("-")
        if not dash or not name:
            raise BadInput(f"{run}: the folder's name has to end in -SEED")
        if seed in groups.setdefault(name, {}):
            raise BadInput(f"{run}: given twice, or two folders of one name")
        groups[name][seed] = read_evaluations(run)
    return groups


def compare(runs) -> str:
    """A table over groups of runs (folders NAME-SEED): final held-out loss, mean ± sd over seeds, and where each comes
    down to the final loss of the first group's run of the same seed, in steps, FLOPs and seconds as a share of that
    run's own. Paired by seed, as two runs of a seed share their initial weights and the order of their data."""
    groups = by_name_and_seed(runs)
    reference = groups[next(iter(groups))]
    rows = ["| run | seeds | held-out nats | minus the first | bits per byte | steps to it | FLOPs to it | seconds to it |",
            "|---|---|---|---|---|---|---|---|"]
    for name, group in groups.items():
        if missing := group.keys() - reference.keys():
            raise BadInput(f"{name}-{min(missing)}: the first group has no run of this seed")
        final = {seed: lines[-1] for seed, lines in group.items()}
        shares = {k: [] for k in ("step", "flops", "seconds")}
        for seed, lines in group.items():
            target = reference[seed][-1]
            if found := first_reached(lines, target["val_loss"]):
                for k, share in shares.items():
                    share.append(100 * found[k] / target[k] if target[k] else 0.0)
        reached = len(shares["step"])
        note = "" if reached == len(group) else f" ({reached} of {len(group)} seeds)"
        rows.append(" | ".join((
            f"| {name}", str(len(group)), mean_sd([f["val_loss"] for f in final.values()], 4),
            mean_sd([f["val_loss"] - reference[seed][-1]["val_loss"] for seed, f in final.items()], 4),
            mean_sd([f["bits_per_byte"] for f in final.values()], 4),
            *((mean_sd(share, 1) + " %" + note) if share else "never" for share in shares.values()))) + " |")
    return "\n".join(rows)


def read_sweep(runs) -> dict[str, dict[float, list[dict]]]:
    """Folders NAME@X-SEED as {name: {X: last evaluations of the seeds}}, X rising."""
    lines = {}
    for name, seeds in by_name_and_seed(runs).items():
        base, at, x = name.rpartition("@")
        try:
            x = float(x)
        except ValueError:
            x = math.nan
        if not (base and 0 < x < math.inf):
            raise BadInput(f"{name}: the folder's name has to be NAME@X-SEED with a positive number X")
        lines.setdefault(base, {}).setdefault(x, []).extend(found[-1] for found in seeds.values())
    return {base: dict(sorted(by_x.items())) for base, by_x in lines.items()}


def geometric_mean(values) -> float:
    return math.exp(statistics.mean(map(math.log, values))) if all(values) else 0.0


def sweep(runs, piece: str, digits=3) -> str:
    """Two tables over X: final held-out loss in nats, mean ± sd over seeds; and RMS W -> RMS W~ of a kind of matrix,
    geometric means."""
    lines = read_sweep(runs)
    xs = sorted({x for by_x in lines.values() for x in by_x})
    head = ["| run | " + " | ".join(f"{x:g}" for x in xs) + " |", "|---" * (1 + len(xs)) + "|"]
    losses, scales = list(head), list(head)
    for base, by_x in lines.items():
        cells = {x: mean_sd([f["val_loss"] for f in finals], digits) for x, finals in by_x.items()}
        losses.append(f"| {base} | " + " | ".join(cells.get(x, "") for x in xs) + " |")
        cells = {x: " → ".join(f"{geometric_mean(weight_rms(finals, piece, key)):.3g}" for key in ("rms", "rms_effective"))
                 for x, finals in by_x.items()}
        scales.append(f"| {base} | " + " | ".join(cells.get(x, "") for x in xs) + " |")
    return "\n".join(["held-out loss", "", *losses, "", f"RMS of {piece}: W → W~", "", *scales])


def weight_rms(finals, piece: str, key: str) -> list[float]:
    try:
        return [f["weights"][piece][key] for f in finals]
    except KeyError:
        raise BadInput(f"--piece={piece}: no such kind of matrix in these runs") from None


def plot_sweep(runs, piece: str, path: str):
    """The tables of `sweep` as a picture: loss over X with the standard deviation, RMS W (dashed) and W~ over X."""
    plt = plotting(path)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for i, (base, by_x) in enumerate(read_sweep(runs).items()):
        losses = [[f["val_loss"] for f in finals] for finals in by_x.values()]
        losses = [[v for v in found if math.isfinite(v)] or [math.nan] for found in losses]
        left.errorbar(list(by_x), [statistics.mean(v) for v in losses], label=base, color=f"C{i}", marker="o", capsize=3,
                      yerr=[statistics.stdev(v) if len(v) > 1 else 0 for v in losses])
        for key, style in (("rms", "--"), ("rms_effective", "-")):
            right.plot(list(by_x), [geometric_mean(weight_rms(f, piece, key)) for f in by_x.values()], style, color=f"C{i}",
                       marker="o", label=f"{base}, {'W~' if style == '-' else 'W'}")
    left.set(xscale="log", xlabel="X", ylabel="held-out loss, nats", title="final loss, mean and sd over seeds")
    right.set(xscale="log", yscale="log", xlabel="X", ylabel=f"RMS of {piece}", title=f"{piece}: W dashed, W~ solid")
    left.legend()
    right.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main(argv):
    parser = argparse.ArgumentParser(prog="probes.py", description="Measure models, and make tables and pictures of runs.")
    commands = parser.add_subparsers(dest="command", required=True)
    c = commands.add_parser("compare", help="final losses, and where each run reaches the first one's")
    c.add_argument("runs", nargs="+", help="folders of runs, named NAME-SEED; the first NAME is the reference")
    s = commands.add_parser("sweep", help="final loss and weight scale over X")
    s.add_argument("runs", nargs="+", help="folders of runs, named NAME@X-SEED")
    s.add_argument("--piece", default="head", help="kind of matrix whose RMS is shown")
    s.add_argument("--plot", default="", help="also write a picture to this file")
    known = "a checkpoint, smollm2, a GGUF file, or a Hugging Face folder or id"
    p = commands.add_parser("linearity", help="how linear each block of a model is")
    p.add_argument("checkpoint", help=known)
    p.add_argument("--text", required=True, help="a text file to read")
    p.add_argument("--plot", default="", help="also draw the profile over depth to this file")
    r = commands.add_parser("prune", help="leave the most linear blocks out, or put affine maps in their place")
    r.add_argument("checkpoint", help=known)
    r.add_argument("--text", required=True, help="a text file: three quarters to fit on, the last one for the losses")
    r.add_argument("--blocks", default="1", help="how many go, such as 3, or several, such as 1,2,3")
    r.add_argument("--orders", default="full", help=f"which go first, out of {', '.join(ORDERS)}")
    r.add_argument("--arms", default="remove,replace,distil", help=f"out of {', '.join(ARMS)}")
    r.add_argument("--protect", default="", help="numbers of blocks that stay, such as 1,12")
    r.add_argument("--distil_steps", type=int, default=200)
    r.add_argument("--distil_lr", type=float, default=1e-3)
    r.add_argument("--seed", type=int, default=0, help="of the random order")
    r.add_argument("--out_dir", default="", help="folder of the new checkpoint; empty: `pruned` beside the old one")
    for x, tokens in ((p, 40_000), (r, 80_000)):
        x.add_argument("--tokens", type=int, default=tokens, help="how many of its tokens; 0: all")
        x.add_argument("--context", type=int, default=0, help="tokens in a context; 0: the model's, at most 512")
        x.add_argument("--skip_first", action="store_true", help="leave the first position of each context out")
        x.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = parser.parse_args(argv)
    if getattr(a, "plot", ""):
        plotting(a.plot)
    if a.command == "compare":
        print(compare(a.runs))
    elif a.command == "linearity":
        print(linearity_command(a))
    elif a.command == "prune":
        print(prune_command(a))
    else:
        print(sweep(a.runs, a.piece))
        if a.plot:
            plot_sweep(a.runs, a.piece, a.plot)


if __name__ == "__main__":
    command(main)
