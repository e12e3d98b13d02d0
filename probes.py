"""probes.py: what can be measured on trained models and read from their runs; and the linearity regulariser.

    python probes.py linearity runs/1/ckpt.pt --text notes.txt --plot=profile.png        # how linear is each block?
    python probes.py prune runs/1/ckpt.pt --text notes.txt --blocks=1,2,3        # leave blocks out, or an affine map for each
    python probes.py curvature runs/plain-? runs/let-? --text notes.txt      # extreme eigenvalues of the loss' Hessian
    python probes.py norms runs/1 --plot=norms.png              # how large each matrix is, and would be by noise alone
    python probes.py eval runs/1/ckpt.pt --task hellaswag.jsonl --text notes.txt      # accuracy; perplexity
    python probes.py plot runs/plain-? runs/let-? -o runs.png   # losses, cosine(T, M), drift of multipliers
    python probes.py compare runs/plain-? runs/let-?            # folders NAME-SEED; the first NAME is the reference
    python probes.py sweep runs/fixed@*-? runs/scalar@*-? --piece=head --plot=sweep.png        # folders NAME@X-SEED

Linearity ("Your Transformer is Secretly Linear", Razzhigaev et al. 2024, arXiv 2405.12250): how well an affine map
predicts a block's output from its input, over many tokens.

Names and symbols
    X, Y        (n, d) states of n tokens before and after a block, each column centred; D = Y - X, what the block adds
    full, free  1 - min_A ||X A - Y||^2 / ||Y||^2, and the same with D in place of Y (residual-free)
    H           the Hessian of the mean loss; N parameters; sharpness: its largest eigenvalue
    theta       Ritz values: eigenvalues of H as Lanczos sees them
    W, W~       a weight matrix as the optimizer moves it, and as the model uses it (optim.py)
    run         a folder that train.py wrote; its metrics.jsonl is what is read here
    seed        what follows the last dash of its name; runs that differ in it alone are one row of a table
    x           of a sweep: the number between @ and the seed, such as a factor on a learning rate
    piece       a kind of logical matrix: q, k, v, o, gate, up, down, embed, head, router, affine; z, x, B, C, dt, out of Mamba-2
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

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from model import (GPT, AffineBlock, BadInput, Cache, Failed, ModelConfig, checkpoint_file, command, device_exists,
                   load_checkpoint, model_from_checkpoint, param_factor, tokenizer_from_dict)

# ----------------------------------------------------------------------------------------------------------------------
# Linearity


def linearity_penalty(states, kind: str = "cosine", reduction: str = "sum", stop_gradient: str = "none"):
    """The pretraining regulariser (the paper's section 4): it pulls neighbouring states together, and the residual-free
    score is reported to fall, as blocks do more of their work off the line. 0-d, float32.

        cosine: sum_i mean over tokens of 1 - cos(h_i, h_{i-1});    mse: sum_i mean over tokens of ||h_i - h_{i-1}||^2

    states: h_0, ..., h_L, (B, T, C) each. The paper does not say what is averaged, where the sum begins, or what is
    held fixed: tokens are averaged here as the loss is; reduction: over blocks, `sum` or `mean`; stop_gradient: which
    of the two states of a pair gets no gradient, `none`, `lower` or `upper`; train.py's --linearity_from says where it
    begins."""
    def held(t, side):
        return t.detach() if side == stop_gradient else t

    states, terms = [h.float() for h in states], []
    if kind == "cosine":  # each norm once: F.cosine_similarity on every pair takes three times as long
        norms = [torch.linalg.vector_norm(h, dim=-1).clamp_min(1e-8) for h in states]
    for i in range(1, len(states)):
        a, b = held(states[i - 1], "lower"), held(states[i], "upper")
        if kind == "cosine":
            terms.append(1 - ((a * b).sum(-1) / (held(norms[i - 1], "lower") * held(norms[i], "upper"))).mean())
        else:
            terms.append((b - a).square().sum(-1).mean())
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


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def open_model(name, device="cpu", dtype=torch.float32):
    """(model, frozen, its tiktoken.Encoding, the checkpoint) of a checkpoint of ours; of anything else that
    teacher.load_pretrained reads with what a checkpoint of it would hold beside the model."""
    from teacher import is_checkpoint, load_pretrained  # here alone: nothing but the measuring of models needs it
    if not device_exists(device):
        raise BadInput(f"--device={device}: no such device here")
    name = checkpoint_file(name)
    if is_checkpoint(name):
        ckpt = load_checkpoint(name)
        model, tokenizer = model_from_checkpoint(ckpt, device, name).eval().requires_grad_(False), ckpt["tokenizer"]
    else:
        model, tokenizer = load_pretrained(name, device, dtype, flag="")
        ckpt = {"format": "nanolet-1", "tokenizer": tokenizer, "step": 0, "config": {"optimizer": "muon"}}
    for p in model.parameters():  # not the tables of rotary positions
        p.data = p.data.to(dtype)
        if not p.isfinite().all():
            raise BadInput(f"{name}: has weights that are not finite")
    return model, tokenizer_from_dict(tokenizer), ckpt


def read_ids(path, enc, tokens=0) -> list[int]:
    """The first `tokens` (0: all) of a text file."""
    if tokens < 0:
        raise BadInput(f"--tokens={tokens}: must not be negative")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise BadInput(f"--text={path}: cannot be read as UTF-8 text ({e})") from None
    return enc.encode_ordinary(text)[:tokens or None]


def read_contexts(a, model, enc, least: int):
    """The text of --text as token ids (contexts, length): --tokens of its tokens, in whole contexts of --context. Raises
    BadInput when it is no text, or has fewer than `least` contexts or than four tokens a dimension of the width."""
    length = a.context or min(512, model.config.block_size)
    if not 2 <= length <= model.config.block_size:
        raise BadInput(f"--context={a.context}: from 2 to the model's {model.config.block_size}")
    ids = torch.tensor(read_ids(a.text, enc, a.tokens))
    rows, width = len(ids) // length, model.config.n_embd
    if rows < max(least, -(-4 * width // length)):
        needed = max((least * length, f"{least} contexts"), (-(-4 * width // length) * length, "four times the width"))
        raise BadInput(f"--text={a.text} --tokens={a.tokens}: {rows * length:,} tokens in whole contexts of {length}; at "
                       f"least {needed[0]:,}, {needed[1]}, are needed")
    return ids[:rows * length].view(rows, length).to(a.device)


def bars(values, low: float, high: float) -> str:
    """A row of blocks, one a value, the full height being `high`."""
    return "".join("▁▂▃▄▅▆▇█"[min(7, max(0, int(8 * (v - low) / (high - low))))] if v == v else " " for v in values)


def linearity_command(a) -> str:
    model, enc, _ = open_model(a.checkpoint, a.device)
    ids = read_contexts(a, model, enc, 2)
    with tqdm(total=ids.numel(), unit="token", disable=None) as progress:
        profile = linearity_profile(model, ids.split(min(16, len(ids) // 2)), a.skip_first, progress)
    keys = ("full", "full_adjusted", "full_held_out", "free", "free_adjusted", "free_held_out", "ratio_mean", "rank")
    lines = [f"{profile[0]['n']:,} tokens to fit on, {profile[0]['n_over_d']:.1f} times the width",
             "block " + " ".join(f"{k:>14}" for k in keys)]
    lines += [f"{p['block']:>5} " + " ".join(f"{p[k]:>14.4f}" if k != "rank" else f"{p[k]:>14}" for k in keys) for p in profile]
    lines += [f"{key:<14} {bars([p[key] for p in profile], low, 1)}  from {low} to 1, block 1 to {len(profile)}"
              for key, low in (("full_held_out", 0.8), ("free_held_out", 0.0))]
    if a.plot:
        pyplot = plotting(a.plot)
        figure, axis = pyplot.subplots(figsize=(6, 4), layout="constrained")
        depth = [p["block"] / len(profile) for p in profile]
        for key, style in (("full", "-"), ("full_held_out", "--"), ("free", "-"), ("free_held_out", "--")):
            axis.plot(depth, [p[key] for p in profile], style, marker="o", color="C0" if "full" in key else "C1",
                      label=key.replace("_", " "))
        axis.set(xlabel="depth, block over blocks", ylabel="linearity score", title="linearity of each block")
        figure.legend(loc="outside lower center", ncols=4)
        figure.savefig(a.plot, dpi=120)
    return "\n".join(lines)


def plotting(path: str):
    """matplotlib.pyplot without a screen; refuses names that make no picture."""
    if Path(path).suffix not in (".png", ".pdf", ".svg"):
        raise BadInput(f"--plot={path}: a name that ends in .png, .pdf or .svg is needed")
    if not Path(path).absolute().parent.is_dir() or Path(path).is_dir():
        raise BadInput(f"--plot={path}: " + ("is a folder" if Path(path).is_dir() else f"no folder {Path(path).parent}"))
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
        blocks[k - 1].affine.weight.copy_(W * model.config.depth_ratio)  # the block divides by it
        blocks[k - 1].affine.bias.copy_(b * model.config.depth_ratio)
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
    state, made = model.state_dict(), asdict(model.config)
    if config.get("param") == "completep":  # train.py takes m_L from the blocks left; what writes into the stream makes up
        made["depth_ratio"] = len(kinds) / config["base_n_layer"]
        by = made["depth_ratio"] / model.config.depth_ratio
        writes = (".o.weight", ".down.weight", ".out.weight", ".mlp.down", ".affine.weight", ".affine.bias")
        state = {k: v * by if k.endswith(writes) else v for k, v in state.items()}
    return {**ckpt, "model": state, "model_config": made, "config": config, "optimizers": [],
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
    whole, enc, ckpt = open_model(a.checkpoint, a.device)
    if not isinstance(whole, GPT):
        raise BadInput(f"{a.checkpoint}: its architecture is not one of model.py's, whose blocks alone can be pruned")
    c = whole.config
    if any(k > c.n_layer for k in protect):
        raise BadInput(f"--protect={a.protect}: {a.checkpoint} has blocks 1 to {c.n_layer}")
    most = min(c.n_layer - 1, c.n_layer - len({*protect}))
    if not (orders and arms and counts) or max(counts) > most:
        raise BadInput(f"--blocks={a.blocks}: {a.checkpoint} has {c.n_layer} blocks, of which 1 to {most} can go")
    ids = read_contexts(a, whole, enc, 16)
    source = Path(checkpoint_file(a.checkpoint))
    out = Path(a.out_dir or (source.parent if is_checkpoint(source) else Path("runs", source.name)) / "pruned") / "ckpt.pt"
    if out.exists():
        raise BadInput(f"--out_dir={out.parent}: holds a checkpoint already; name another folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise BadInput(f"--out_dir={out.parent}: no folder can be made there ({e.strerror})") from None
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
    if len(best) == 1:
        raise Failed(f"--arms={a.arms} --distil_lr={a.distil_lr:g}: no model with {max(counts)} blocks gone has a finite loss")
    seconds = dict(zip(shapes, seconds_per_pass(shapes.values(), batches[0])))
    rows = ["| order | arm | blocks | held-out nats | perplexity | parameters | of the whole | speed over the whole |",
            "|---|---|---|---|---|---|---|---|"]
    for order, arm, chosen, loss, n, parts in made:
        rows.append(f"| {order} | {arm} | {', '.join(map(str, chosen))} | {loss:.4f} | {math.exp(loss):.2f} | {n:,} | "
                    f"{100 * n / made[0][4]:.1f} % | {seconds[made[0][5]] / seconds[parts]:.2f} |")
    _, order, arm, chosen, model = best
    tmp = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with open(tmp, "wb") as file:  # torch's own writer does not say when the disk is full
            torch.save(pruned_checkpoint(ckpt, model, source=str(source), order=order, arm=arm, blocks=chosen), file)
        os.replace(tmp, out)
    finally:
        tmp.unlink(missing_ok=True)
    return "\n".join([*rows, "", f"{out}: {order}, {arm}, blocks {', '.join(map(str, chosen))}"])


# ----------------------------------------------------------------------------------------------------------------------
# Curvature


def next_token_loss(model, idx, targets):
    """What model(idx, targets) gives, mean nats, in a form that has second derivatives: all logits at once, and
    attention as plain products. idx, targets: (B, T)."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.cross_entropy(model(idx)[0].flatten(0, 1), targets.flatten())


def hessian_product(model, batches):
    """The function v -> H v of the Hessian H of the mean loss over the tokens of `batches`, pairs of (B, T) ids, with
    respect to all parameters, joined into one vector (N,): H v = d/dw (dL/dw . v) (Pearlmutter 1994). Where the router
    of a mixture of experts would change its mind there is no second derivative; H is that of the choice made."""
    params, tokens = list(model.parameters()), sum(idx.numel() for idx, _ in batches)
    sizes = [p.numel() for p in params]

    def product(v):
        total = torch.zeros_like(v)
        for idx, targets in batches:
            gradient = torch.autograd.grad(next_token_loss(model, idx, targets), params, create_graph=True)
            along = sum((g * part.view_as(g)).sum() for g, part in zip(gradient, v.split(sizes)))
            parts = torch.autograd.grad(along, params, materialize_grads=True)
            total += torch.cat([h.flatten() for h in parts]) * (idx.numel() / tokens)
        return total

    return product


def lanczos(product, v, steps: int):
    """Eigenvalues of a symmetric matrix, known by its products with vectors, as far as `steps` products from v show.

    Builds an orthonormal basis of v, H v, H^2 v, ... and the tridiagonal matrix T of H in it; every new vector is
    orthogonalised against all before, twice, as rounding would else give copies of what has converged. Memory: steps
    vectors. Returns three float64 vectors (m,), m <= steps: eigenvalues of T (Ritz values, rising), of which the
    extreme ones come to those of H first; their weights, the squared first components of T's eigenvectors: sum_i w_i
    theta_i^k = v^T H^k v / v^T v for all k < 2 m (Gauss quadrature); and for each how far, at most, the nearest
    eigenvalue of H lies."""
    Q, alpha, beta = v.new_empty(steps, len(v)), [], []
    Q[0] = v / v.norm()
    for k in range(steps):
        w = product(Q[k])
        alpha.append((w @ Q[k]).item())
        for _ in range(2):
            w = w - (Q[:k + 1] @ w) @ Q[:k + 1]
        beta.append(w.norm().item())
        if k + 1 == steps or beta[-1] <= 100 * torch.finfo(v.dtype).eps * max(map(abs, alpha + beta)):
            break  # all that v reaches has been seen
        Q[k + 1] = w / beta[-1]
    T = torch.tensor(alpha, dtype=torch.float64).diag()
    T += sum(torch.tensor(beta[:-1], dtype=torch.float64).diag(side) for side in (1, -1)) if len(beta) > 1 else 0
    theta, S = torch.linalg.eigh(T)
    return theta, S[0].square(), beta[-1] * S[-1].abs()


def spectrum(model, batches, steps=32, probes=2, seed=0, top=3, progress=None) -> dict:
    """What Lanczos from so many random vectors of signs shows of the Hessian (hessian_product) of a model.

    loss in nats; top: its largest eigenvalues, falling, and least, its most negative one, each the extreme over the
    vectors (a Ritz value never lies beyond its eigenvalue), with `residual`, the largest bound on their error; trace,
    and trace_se over the vectors; rms, the root mean square of all N eigenvalues; ritz: [(values, weights)], from which
    density() is made. In the dtype of the model."""
    params = list(model.requires_grad_(True).parameters())
    N, runs = sum(p.numel() for p in params), []
    product, generator = hessian_product(model, batches), torch.Generator().manual_seed(seed)
    for _ in range(probes):
        v = (torch.randint(2, (N,), generator=generator) * 2 - 1).to(params[0])
        runs.append(lanczos(lambda u: (progress and progress.update(), product(u))[1], v, steps))
    largest = [max((t[-1 - k].item(), r[-1 - k].item()) for t, _, r in runs if k < len(t))
               for k in range(min(top, max(len(t) for t, _, _ in runs)))]
    least = min((t[0].item(), r[0].item()) for t, _, r in runs)
    traces = [N * (w * t).sum().item() for t, w, _ in runs]
    with torch.no_grad():
        losses = [(next_token_loss(model, *b).item(), b[0].numel()) for b in batches]
    return {"loss": sum(x * n for x, n in losses) / sum(n for _, n in losses), "parameters": N,
            "top": [value for value, _ in largest], "least": least[0],
            "residual": max(r for _, r in [*largest, least]), "trace": statistics.mean(traces),
            "trace_se": statistics.stdev(traces) / math.sqrt(probes) if probes > 1 else math.nan,
            "rms": math.sqrt(statistics.mean((w * t.square()).sum().item() for t, w, _ in runs)),
            "ritz": [(t, w) for t, w, _ in runs]}


def density(ritz, x, sigma: float):
    """The density of eigenvalues at x (n,), each seen as a normal of standard deviation sigma: stochastic Lanczos
    quadrature (Lin, Saad & Yang 2016; for networks Ghorbani et al. 2019, arXiv 1901.10159). Its integral is 1."""
    normal = [(w * torch.exp(-0.5 * ((x[:, None] - t) / sigma) ** 2)).sum(1) for t, w in ritz]
    return torch.stack(normal).mean(0) / (sigma * math.sqrt(2 * math.pi))


def run_checkpoints(names) -> list[str]:
    """Of a run's folder its step-*.pt (train.py's --keep_checkpoints), or else its ckpt.pt; other names as they are."""
    found = []
    for name in names:
        kept = sorted(map(str, Path(name).glob("step-*.pt")))
        found += kept or [checkpoint_file(name)]
    return found


def curvature_command(a) -> str:
    """A row a checkpoint; where the folders are NAME-SEED, also each NAME's eigenvalues over those of the first NAME at
    the same step and seed."""
    if min(a.tokens, a.steps - 1, a.probes, a.micro_batch, a.top) < 1 or a.steps > 10_000 or not 0 <= a.seed < 2**63:
        raise BadInput("--tokens, --probes, --top and --micro_batch have to be at least 1, --steps from 2 to 10,000, --seed "
                       "from 0 to 2^63 - 1")
    rows, found, dtype = [], [], DTYPES[a.dtype]
    names = run_checkpoints(a.checkpoints)
    with tqdm(total=len(names) * a.probes * a.steps, unit="product", disable=None) as progress:
        for name in names:
            model, enc, ckpt = open_model(name, a.device, dtype)
            if not isinstance(model, GPT):
                raise BadInput(f"{name}: its architecture is not one of model.py's, whose loss alone has second derivatives here")
            T = min(model.config.block_size, a.tokens)
            ids = torch.tensor([enc.eot_token, *read_ids(a.text, enc, a.tokens)], device=a.device)
            n = (len(ids) - 1) // T * T
            if n == 0:
                raise BadInput(f"--text={a.text}: {len(ids) - 1} tokens; a context of {T} is needed")
            batches = list(zip(*(t.view(-1, T).split(a.micro_batch) for t in (ids[:n], ids[1:n + 1]))))
            s = spectrum(model, batches, a.steps, a.probes, a.seed, a.top, progress)
            found.append((name, ckpt.get("step", 0), s))
            rows.append(" | ".join((
                f"| {name}", f"{ckpt.get('step', '')}", f"{s['loss']:.4f}", ", ".join(f"{v:.4g}" for v in s["top"]),
                f"{s['least']:.4g}", f"{s['top'][0] / abs(s['least']):.3g}", f"{s['residual']:.1g}",
                f"{s['trace']:.4g}" + (f" ± {s['trace_se']:.2g}" if a.probes > 1 else ""), f"{s['rms']:.3g}")) + " |")
    lines = [f"{n:,} tokens, {s['parameters']:,} parameters, {a.dtype}", "",
             "| checkpoint | step | loss | largest eigenvalues | most negative | their ratio | error below | trace | rms |",
             "|---" * 9 + "|", *rows]
    groups = {}  # {(name, step): {seed: spectrum}}
    for name, step, s in found:
        group, _, seed = Path(name).parent.name.rpartition("-")
        groups.setdefault((group, step), {})[seed] = s
    first = next(iter(groups))[0]
    if all(group for group, _ in groups) and len({group for group, _ in groups}) > 1:
        lines += ["", f"| over {first} | step | seeds | largest eigenvalue | most negative | their ratio | trace |",
                  "|---" * 7 + "|"]
        for (group, step), by_seed in groups.items():
            same = groups.get((first, step), {})
            pairs = [(s, same[seed]) for seed, s in by_seed.items() if seed in same]
            if group != first and pairs:
                big, small, trace = zip(*((s["top"][0] / r["top"][0], s["least"] / r["least"], s["trace"] / r["trace"])
                                          for s, r in pairs))
                both = [b / m for b, m in zip(big, small)]
                lines.append(" | ".join((f"| {group}", f"{step}", f"{len(pairs)}", *(
                    mean_sd(values, 3) for values in (big, small, both, trace)))) + " |")
    if a.plot:
        plot_spectra(found, a.plot)
    return "\n".join(lines)


def plot_spectra(found, path: str):
    """Density of eigenvalues by checkpoint; beside it the extreme ones over steps, a line for each run, if there are
    several steps."""
    pyplot = plotting(path)
    runs = {}
    for name, step, s in found:
        runs.setdefault(str(Path(name).parent), []).append((step, s["top"][0], s["least"]))
    along = any(len(lines) > 1 for lines in runs.values())
    figure, axes = pyplot.subplots(1, 1 + along, figsize=(6 + 5 * along, 4), layout="constrained", squeeze=False)
    low, high = min(s["least"] for _, _, s in found), max(s["top"][0] for _, _, s in found)
    margin = 0.05 * (high - low)
    x = torch.linspace(low - margin, high + margin, 2000, dtype=torch.float64)
    for name, step, s in found:
        label = f"{Path(name).parent.name} step {step}" if len(found) <= 12 else None
        axes[0, 0].semilogy(x, density(s["ritz"], x, 0.01 * (high - low)), label=label)
    axes[0, 0].set(xlabel="eigenvalue", ylabel="density", title="Hessian of the loss", ylim=(1e-10, None))
    axes[0, 0].legend(fontsize="small") if len(found) <= 12 else None
    if along:
        for i, (run, lines) in enumerate(runs.items()):
            steps, top, least = zip(*sorted(lines))
            axes[0, 1].plot(steps, top, "o-", color=f"C{i}", label=f"{Path(run).name}, largest")
            axes[0, 1].plot(steps, least, "o--", color=f"C{i}", label=f"{Path(run).name}, most negative")
        axes[0, 1].set(xlabel="step", ylabel="eigenvalue", title="sharpness along training", yscale="symlog")
        axes[0, 1].legend(fontsize="small")
    figure.savefig(path, dpi=120)


# ----------------------------------------------------------------------------------------------------------------------
# Scale


def matrix_scales(model, own=None) -> list[dict]:
    """Of every logical matrix: block (0: embedding and head), piece, name of its parameter, rms of W and rms_effective
    of W~, the norms of the multipliers' paper; rows: RMS of each row of W~ over the matrix' mean of those, rows of zeros
    left out; spread: the standard deviation of their logarithms. own: {parameter: W} where it is not W~."""
    from optim import flat, logical_pieces
    params, found = dict(model.named_parameters()), []
    made = logical_pieces(model) if isinstance(model, GPT) else {
        n: [(n.split(".")[-2], len(p))] for n, p in params.items() if p.ndim == 2}
    for name, pieces in made.items():
        if name not in params:  # a tied head
            continue
        sizes, numbers = [n for _, n in pieces], [part for part in name.split(".") if part.isdecimal()]
        block = int(numbers[0]) + 1 if numbers else 0
        W = (own or {}).get(name, params[name]).detach()
        for (piece, _), w, effective in zip(pieces, flat(W).split(sizes), flat(params[name].detach()).split(sizes)):
            norms = effective.float().square().mean(1).sqrt()
            norms = norms[norms > 0] / norms[norms > 0].mean()
            found.append({"block": block, "piece": piece, "name": name, "rms": w.float().square().mean().sqrt().item(),
                          "rms_effective": effective.float().square().mean().sqrt().item(), "rows": norms,
                          "spread": norms.log().std().item() if len(norms) > 1 else 0.0, "shape": tuple(w.shape)})
    return found


def brownian_motion(lrs, decay: float, make_optimizer, shape, seed=0):
    """RMS ||W|| after each step when an optimizer that starts from W = 0 sees nothing but N(0, 1) noise for gradients:
    the paper's Adam Brownian motion (section 3), under the learning rates lrs and the weight decay. (steps + 1,), float64.

    With decoupled decay W_t = a_t W_0 + W'_t, W' the motion from 0 and a_t the product of 1 - lr decay: from W_0 it is
    sqrt(a_t^2 ||W_0||^2 + ||W'_t||^2). make_optimizer: parameters -> torch.optim.Optimizer."""
    W, generator = torch.nn.Parameter(torch.zeros(shape)), torch.Generator().manual_seed(seed)
    optimizer, path = make_optimizer([W]), [0.0]
    for lr in lrs:
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = lr, decay
        W.grad = torch.randn(shape, generator=generator)
        optimizer.step()
        path.append(W.detach().square().mean().sqrt().item())
    return torch.tensor(path, dtype=torch.float64)


def noise_curves(config: dict, model, lrs) -> dict[str, tuple]:
    """By piece, (W'_t, a_t) of brownian_motion under the flags of a run (`config`, of its checkpoint) and its learning
    rates: with its own optimizer, AdamW or Muon. (Muon's motion, over the scale of its update, hardly depends on a
    matrix' size at a given ratio of its sides: for one beyond 128 a smaller one stands in, right to some 5 %.)"""
    from optim import FIXED_ROWS, Muon, flat, logical_pieces, module_of, muon_scale, rule_of

    def factor(flag, module):
        named = dict(part.split("=") for part in config.get(flag, "").split(",") if part)
        return float(named.get(module, 1.0))

    lrs, params, curves, seen = torch.as_tensor(lrs, dtype=torch.float64), dict(model.named_parameters()), {}, {}
    for name, pieces in logical_pieces(model).items():
        for piece, rows in pieces if name in params else ():
            if piece in curves:
                continue
            module = module_of(piece)
            free = piece == "embed"  # of weight decay
            decay = 0.0 if free else config["weight_decay"] * factor("module_decay", module)
            own = free and not config["tie_embeddings"]
            peak = factor("module_lr", module) * (config["embedding_lr"] if own else 1.0)
            by_muon = config["optimizer"] == "muon" and piece not in ("embed", "head")
            growth = (1.0 if piece in FIXED_ROWS else model.config.width_ratio, model.config.width_ratio)
            if not by_muon:  # AdamW's rates and decays follow --param
                rule = rule_of(name, {"embed": "embedding", "head": "head"}.get(piece, "matrix"), config["tie_embeddings"])
                decay *= param_factor(model.config, rule, "decay")
                peak *= param_factor(model.config, rule, "lr")
            if by_muon:
                true, scale = (rows, flat(params[name]).shape[1]), config["muon_scale"]
                shape = tuple(max(1, round(n * min(1, 128 / max(true)))) for n in true)
                size = muon_scale(*true, scale, growth) / max(true) ** 0.5 / (muon_scale(*shape, scale) / max(shape) ** 0.5)
                make = lambda p: Muon(p, momentum=config["momentum"], coefficients=config["muon_coefficients"],
                                      scale=config["muon_scale"], normuon=config["normuon"], dtype=torch.float32)
            else:
                make = lambda p: torch.optim.AdamW(p, betas=(config["beta1"], config["beta2"]), eps=1e-10)
                shape, size = (4096,), 1.0
            key = (shape, decay, peak)
            if key not in seen:
                seen[key] = brownian_motion((lrs * peak).tolist(), decay, make, shape)
            shrink = torch.cat((torch.ones(1, dtype=torch.float64), (1 - lrs * peak * decay).cumprod(0)))
            curves[piece] = (size * seen[key], shrink)
    return curves


def norms_command(a) -> str:
    """RMS of W and W~ by matrix and block, row spread, and, where the run's metrics lie beside the checkpoint, the RMS
    that noise alone would have given W by now."""
    path = Path(a.run, "ckpt.pt") if Path(a.run).is_dir() else Path(a.run)
    path = path if path.exists() else Path(a.run)  # a folder of transformers
    model, _, ckpt = open_model(str(path))
    found = matrix_scales(model, ckpt.get("multipliers"))
    curves, lines, steps = {}, [], ckpt.get("step", 0)
    if steps and (path.parent / "metrics.jsonl").exists():
        lines = [line for line in read_metrics(path.parent) if line["step"] <= steps]
        logged = [(line["step"] - 1, line["lr"]) for line in lines if "lr" in line]
        lines = [line for line in lines if "weights" in line]
        if logged and lines and lines[0]["step"] == 0:
            lrs = np.interp(range(steps), *zip(*logged))
            curves = {piece: torch.sqrt((shrink * lines[0]["weights"][piece]["rms"]) ** 2 + noise**2)
                      for piece, (noise, shrink) in noise_curves(ckpt["config"], model, lrs).items()}
    out = [f"{path}, step {steps}; rows: RMS of W~'s rows over their mean, 5 %, 95 % and spread of the logarithm", "",
           "| block | matrix | shape | RMS W | RMS W~ | noise alone | W over noise | rows 5 % | rows 95 % | spread |",
           "|---" * 10 + "|"]
    for m in sorted(found, key=lambda m: m["block"] or (math.inf if m["piece"] == "head" else 0)):
        noise = curves[m["piece"]][-1].item() if m["piece"] in curves else None
        low, high = np.quantile(m["rows"].numpy(), (0.05, 0.95)) if len(m["rows"]) else (1.0, 1.0)
        out.append(" | ".join((
            f"| {m['block'] or ''}", m["piece"], "{} x {}".format(*m["shape"]), f"{m['rms']:.4f}",
            f"{m['rms_effective']:.4f}", *((f"{noise:.4f}", f"{m['rms'] / noise:.2f}") if noise else ("", "")), f"{low:.2f}", f"{high:.2f}",
            f"{m['spread']:.3f}")) + " |")
    if a.plot:
        plot_norms(found, curves, lines, a.plot)
    return "\n".join(out)


def plot_norms(found, curves, lines, path: str):
    """RMS W and W~ over steps beside what noise alone gives, a panel a kind of matrix; last, the rows' histogram."""
    pyplot = plotting(path)
    pieces = [piece for piece in dict.fromkeys(m["piece"] for m in found) if piece in curves]
    columns = math.ceil(math.sqrt(len(pieces) + 1))
    figure, axes = pyplot.subplots(-(-(len(pieces) + 1) // columns), columns, squeeze=False, layout="constrained",
                                   figsize=(3.4 * columns, 2.8 * -(-(len(pieces) + 1) // columns)))
    for axis, piece in zip(axes.flat, pieces):
        at = [line["step"] for line in lines]
        for key, label, style in (("rms", "W", "o-"), ("rms_effective", "W~", "s--")):
            axis.plot(at, [line["weights"][piece][key] for line in lines], style, ms=3, label=label)
        axis.plot(curves[piece], "k:", label="noise alone")
        axis.set(title=piece, ylim=(0, None))
    if pieces:
        axes.flat[0].legend(fontsize="small")
        axes[0, 0].set(ylabel="RMS", xlabel="step")
    histogram, bins = axes.flat[len(pieces)], np.logspace(-1, 1, 81)  # the paper's axis
    kinds = {}
    for m in found:
        if m["block"] and m["piece"] in ("q", "k", "v", "gate", "up", "z", "x"):  # what reads the stream, as there
            kind = {"gate": "mlp", "up": "mlp", "z": "ssm", "x": "ssm"}.get(m["piece"], "attention")
            kinds.setdefault(kind, []).append(m["rows"])
    for kind, rows in kinds.items():
        histogram.hist(torch.cat(rows).clamp(0.1, 10).numpy(), bins, histtype="step", density=True, label=kind)
    histogram.set(xscale="log", xlabel="row norm of W~ over its matrix' mean", title="rows of all blocks", yticks=[])
    histogram.legend(fontsize="small")
    for axis in axes.flat[len(pieces) + 1:]:
        axis.remove()
    figure.savefig(path, dpi=120)


# ----------------------------------------------------------------------------------------------------------------------
# Downstream

TASK_FIELDS = (("ctx", "endings", "label"), ("context", "choices", "label"), ("sentence_good", "sentence_bad"))


def read_task(path) -> list[tuple[str, list[str], int]]:
    """(context, choices, number of the right one) of each line of a file of JSON objects: HellaSwag's ctx, endings,
    label; context, choices, label; or BLiMP's sentence_good, sentence_bad, which is two choices without a context.
    Texts are taken as they stand. Raises BadInput with the file and the line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # splitlines cuts at more
    except (OSError, UnicodeDecodeError) as e:
        raise BadInput(f"--task={path}: cannot be read as UTF-8 text ({e})") from None
    items = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue

        def need(ok, why):
            if not ok:
                raise BadInput(f"--task={path}, line {number}: {why}")

        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as e:
            need(False, f"not JSON ({e})")
        need(isinstance(record, dict), "not a JSON object")
        names = max(TASK_FIELDS, key=lambda names: sum(n in record for n in names if n != "label"))
        for n in names:
            need(n in record, f"no field `{n}`; the fields {', or '.join(', '.join(f) for f in TASK_FIELDS)} are needed")
        context, choices, label = ("", [record[n] for n in names], 0) if len(names) == 2 else [record[n] for n in names]
        need(isinstance(context, str), f"`{names[0]}` is no text")
        need(isinstance(choices, list) and len(choices) > 1 and all(isinstance(t, str) and t.strip() for t in choices),
             f"`{names[1]}`: two texts or more are needed" if len(names) == 3 else "two sentences are needed")
        label = int(label) if isinstance(label, str) and label.isdecimal() and len(label) < 10 else label  # HellaSwag has "3"
        need(type(label) is int and 0 <= label < len(choices),
             f"`label` {label!r}: a number from 0 to {len(choices) - 1} is needed")
        items.append((context, choices, label))
    if not items:
        raise BadInput(f"--task={path}: no line in it")
    return items


def encode_pair(enc, context: str, choice: str) -> tuple[list[int], int]:
    """(token ids of context and choice, number of the first that is the choice's), after an end-of-text token, as every
    document had one in training. The boundary is lm-evaluation-harness's: one space between the two, which belongs to
    the choice, as all blanks at the end of the context do; both are encoded together, and cut where the context encoded
    alone ends."""
    if context and not (context[-1].isspace() or choice[0].isspace()):
        choice = " " + choice
    stripped = context.rstrip()
    whole = enc.encode_ordinary(context + choice)
    start = len(enc.encode_ordinary(stripped))
    return [enc.eot_token, *whole], 1 + min(start, len(whole) - 1)


def cut_to(length: int, ids, start: int):
    """The end of a sequence that is longer than `length`: (ids, start), with start below 1 where it does not hold all
    of the choice and a token before it."""
    gone = max(0, len(ids) - length)
    return ids[gone:], start - gone


def rows_of(cache: Cache, rows) -> Cache:
    """A cache for these rows, in this order and as often as they stand there."""
    picked = Cache()
    picked.length = cache.length
    for name in ("k", "v", "conv", "state"):
        kept = getattr(cache, name)
        setattr(picked, name, None if kept is None else kept[rows])
    return picked


@torch.no_grad()
def log_likelihoods(model, items, batch_tokens=1024, progress=None) -> list[list[float]]:
    """Of every sequence of every item, the sum over tokens i >= start of log p(token i | tokens before it), in nats.

    items: lists of sequences (token ids, start), 1 <= start < len(ids) <= block_size + 1. What the sequences of an item
    have in common before their starts, a long context with several endings, goes through the model once, and its
    caches serve all of them: items with contexts of about one length together, all cut at the shortest, so that no
    filling stands before a token. batch_tokens: in one forward pass; a CPU is fastest where their states fit in its
    caches. The rest goes in order of length, filled up at the end, where a causal model does
    not see it; the head runs only where a token is scored."""
    V, device = model.config.vocab_size, next(model.parameters()).device
    totals = [[0.0] * len(item) for item in items]
    common = [min(start for _, start in item) - 1 for item in items]  # the last context token's state is needed
    for i, item in enumerate(items):
        same = all(ids[:common[i]] == item[0][0][:common[i]] for ids, _ in item)
        if len(item) < 2 or not same or not isinstance(model, GPT):
            common[i] = 0
    order = sorted(range(len(items)), key=lambda i: -common[i])
    while order:
        longest, n = common[order[0]], 1
        if longest < 8:  # does not pay
            n = len(order)
        while n < len(order) and common[order[n]] >= 0.75 * longest and (n + 1) * longest <= batch_tokens:
            n += 1
        group, order = order[:n], order[n:]
        P, caches = common[group[-1]] if longest >= 8 else 0, None
        if P:
            caches = [Cache() for _ in model.blocks]
            model.trunk(torch.tensor([items[i][0][0][:P] for i in group], device=device), caches=caches)
        rows = sorted(((len(ids) - 1 - P, g, k, i) for g, i in enumerate(group) for k, (ids, _) in enumerate(items[i])),
                      reverse=True)
        while rows:
            width = rows[0][0]
            n = max(1, batch_tokens // (width + (P if device.type != "cpu" else 0)))  # a GPU's memory holds every row's cache
            batch, rows = rows[:n], rows[n:]
            idx, picked = torch.zeros(len(batch), width, dtype=torch.int64), []  # (row, place, token) of what is scored
            for row, (size, _, k, i) in enumerate(batch):
                ids, start = items[i][k]
                idx[row, :size] = torch.tensor(ids[P:-1])
                picked += [(row, t - 1 - P, ids[t]) for t in range(start, len(ids))]
            chosen = torch.tensor([g for _, g, _, _ in batch], device=device)
            idx, (at, place, token) = idx.to(device), torch.tensor(picked, device=device).T
            x, _ = model.trunk(idx, **({"caches": [rows_of(c, chosen) for c in caches]} if P else {}))
            scored = []
            for some, ids in zip(x[at, place].split(1024), token.split(1024)):  # not all logits at once
                logits = model.head(model.norm(some))[:, :V]
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                scored.append(-F.cross_entropy(logits, ids, reduction="none").double().cpu())
            sums = torch.zeros(len(batch), dtype=torch.float64).index_add(0, at.cpu(), torch.cat(scored))
            for total, (_, _, k, i) in zip(sums.tolist(), batch):
                totals[i][k] = total
            if progress:
                progress.update(len(batch))
    return totals


def right(scores, label: int) -> tuple[float, bool]:
    """(1 if the label's score is the highest, its share of 1 in a tie, else 0; whether there is a tie at the top).
    Scores that differ by less than 1e-5 of themselves, which is rounding, are equal."""
    best = max(scores)
    top = [k for k, s in enumerate(scores) if best - s <= 1e-5 * abs(best)]
    return (1 / len(top) if label in top else 0.0), len(top) > 1


def evaluate_task(model, enc, task, batch_tokens=1024, progress=None) -> dict:
    """Multiple choice over (context, choices, label): `sum` and `per_character`, the accuracies by summed
    log-likelihood and by that over the characters of the choice (the harness's acc and acc_norm), with standard errors
    *_se and *_ties, items with several best choices; chance; items; cut: of these, those that lost the beginning of
    their context, as they are longer than the model's; left_out: further ones, where a choice alone is longer. scores:
    each item's log-likelihoods in nats, None where left out."""
    limit = model.config.block_size + 1 if getattr(model, "has_attention", True) else math.inf
    items, cut = [], 0
    for context, choices, _ in task:
        whole = [encode_pair(enc, context, choice) for choice in choices]
        item = [cut_to(limit, *pair) for pair in whole] if limit < math.inf else whole
        items.append(item if all(start >= 1 for _, start in item) else None)
        cut += items[-1] is not None and any(len(ids) > limit for ids, _ in whole)
    kept = [i for i, item in enumerate(items) if item]
    found = dict(zip(kept, log_likelihoods(model, [items[i] for i in kept], batch_tokens, progress)))
    out = {"items": len(kept), "cut": cut, "left_out": len(items) - len(kept),
           "scores": [found.get(i) for i in range(len(items))],
           "chance": statistics.mean(1 / len(task[i][1]) for i in kept) if kept else math.nan}
    for name, size in (("sum", lambda choice: 1), ("per_character", len)):
        results = [right([s / size(c) for s, c in zip(found[i], task[i][1])], task[i][2]) for i in kept]
        got = [credit for credit, _ in results]
        out |= {name: statistics.mean(got) if got else math.nan, f"{name}_ties": sum(tie for _, tie in results),
                f"{name}_se": statistics.stdev(got) / math.sqrt(len(got)) if len(got) > 1 else math.nan}
    return out


def evaluate_text(model, ids, n_bytes: int, stride: int, batch_tokens=1024, progress=None) -> dict:
    """nats, mean per token of a text of n_bytes, with nats_se over windows; perplexity; bits_per_byte; tokens.
    ids: its tokens after an end-of-text token. Every window of block_size inputs scores its last `stride` tokens."""
    T = model.config.block_size
    ends = [(begin, min(begin + stride, len(ids))) for begin in range(1, len(ids), stride)]
    windows = [(ids[max(0, end - T - 1):end], begin - max(0, end - T - 1)) for begin, end in ends]
    totals = [total for total, in log_likelihoods(model, [[w] for w in windows], batch_tokens, progress)]
    means = [-total / (len(w) - start) for total, (w, start) in zip(totals, windows)]
    nats = -sum(totals) / (len(ids) - 1)
    return {"tokens": len(ids) - 1, "nats": nats, "perplexity": math.exp(nats),
            "bits_per_byte": -sum(totals) / math.log(2) / n_bytes,
            "nats_se": statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else math.nan}


def eval_command(a) -> str:
    if not (a.task or a.text):
        raise BadInput("eval: --task=FILE.jsonl or --text=FILE is needed")
    tasks = [(path, read_task(path)[:a.items or None]) for path in a.task]
    model, enc, _ = open_model(a.checkpoint, a.device, DTYPES[a.dtype])
    stride = a.stride or model.config.block_size
    if not (0 < stride <= model.config.block_size and a.batch_tokens >= 0 and a.items >= 0):
        raise BadInput(f"--stride={a.stride} --batch_tokens={a.batch_tokens} --items={a.items}: a stride from 1 to the "
                       f"context of {model.config.block_size}, a batch and items not negative are needed")
    batch_tokens = a.batch_tokens or (1024 if a.device == "cpu" else 32_768)
    ids = [enc.eot_token, *read_ids(a.text, enc, a.tokens)] if a.text else []  # as in training
    if len(ids) == 1:
        raise BadInput(f"--text={a.text}: no text in it")
    lines, done = [], []
    for path, task in tasks:
        texts = sum(len(choices) for _, choices, _ in task)
        with tqdm(total=texts, unit="text", desc=Path(path).name, disable=None) as progress:
            done.append((Path(path).stem, evaluate_task(model, enc, task, batch_tokens, progress)))
    if done:
        lines += ["| task | items | accuracy by sum, % | per character, % | chance | ties | context cut | left out |",
                  "|---" * 8 + "|"]
    for name, r in done:
        accuracies = [f"{100 * r[key]:.2f} ± {100 * r[f'{key}_se']:.2f}" for key in ("sum", "per_character")]
        lines.append(" | ".join((f"| {name}", f"{r['items']:,}", *accuracies, f"{100 * r['chance']:.1f}",
                                 f"{r['sum_ties']}, {r['per_character_ties']}", f"{r['cut']}", f"{r['left_out']}")) + " |")
    if len(done) > 1:
        means = [f"{100 * statistics.mean(r[key] for _, r in done):.2f}" for key in ("sum", "per_character", "chance")]
        lines.append(" | ".join(("| mean", f"{sum(r['items'] for _, r in done):,}", *means, "", "", "")) + " |")
    if ids:
        with tqdm(total=-(-(len(ids) - 1) // stride), unit="window", disable=None) as progress:
            r = evaluate_text(model, ids, len(enc.decode_bytes(ids[1:])), stride, batch_tokens, progress)
        lines += [f"{a.text}: {r['nats']:.4f} ± {r['nats_se']:.4f} nats per token, perplexity {r['perplexity']:.3f}, "
                  f"{r['bits_per_byte']:.4f} bits per byte, over {r['tokens']:,} tokens"]
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# Tables over runs


def read_metrics(run) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
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
    lines, numbers = [line for line in lines if isinstance(line, dict)], ("step", "val_loss", "flops", "seconds")
    if not all("step" in line and all(isinstance(line[k], (int, float)) for k in numbers if k in line) for line in lines):
        raise BadInput(f"{path}: not the metrics of a run (a line without a step, or with a text for a number)")
    return lines


def read_evaluations(run) -> list[dict]:
    """The lines of a run's metrics.jsonl that hold an evaluation. A run that stopped before its last step, as a
    diverged one does, has an infinite loss in the last."""
    lines = [line for line in read_metrics(run) if "val_loss" in line]
    if not lines:
        raise BadInput(f"{Path(run) / 'metrics.jsonl'}: no evaluation in it")
    config = Path(run) / "config.json"
    try:
        unfinished = config.exists() and lines[-1]["step"] < json.loads(config.read_text())["steps"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise BadInput(f"{config}: not the settings of a run ({e!r})") from None
    if unfinished:
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
    for run in dict.fromkeys(str(Path(run)) for run in runs):  # once each: the patterns of a shell overlap
        name, dash, seed = Path(run).name.rpartition("-")
        if not dash or not name:
            raise BadInput(f"{run}: the folder's name has to end in -SEED")
        if seed in groups.setdefault(name, {}):
            raise BadInput(f"{run}: the second folder of this name")
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
            if math.isfinite(target["val_loss"]) and (found := first_reached(lines, target["val_loss"])):
                for k, share in shares.items():
                    share.append(100 * found[k] / target[k] if target[k] else 0.0)
        beyond = [f["val_loss"] - reference[seed][-1]["val_loss"] for seed, f in final.items()
                  if math.isfinite(reference[seed][-1]["val_loss"])]
        reached = len(shares["step"])
        note = "" if reached == len(group) else f" ({reached} of {len(group)} seeds)"
        rows.append(" | ".join((
            f"| {name}", str(len(group)), mean_sd([f["val_loss"] for f in final.values()], 4),
            mean_sd(beyond, 4) if beyond else "the first did not finish",
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


def over_seeds(group, value) -> tuple[list[dict], list[float], list[float]]:
    """What value(line) gives, by step, over the runs of a group (lists of lines) where it is a finite number: (step,
    tokens, flops and seconds there, means over the seeds; its means; its standard deviations, 0 of a single one)."""
    by_step = {}
    for line in (line for lines in group for line in lines):
        if "step" in line and (v := value(line)) is not None and math.isfinite(v):
            by_step.setdefault(line["step"], []).append((line, v))
    found = [found for _, found in sorted(by_step.items())]
    at = [{k: statistics.mean(line.get(k, math.nan) for line, _ in lines) for k in ("step", "tokens", "flops", "seconds")}
          for lines in found]
    values = [[v for _, v in lines] for lines in found]
    return at, [statistics.mean(v) for v in values], [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]


def plot_runs(runs, path: str) -> str:
    """Held-out loss over steps, tokens, FLOPs and seconds, and, where runs have them, cosine(T, M) and the drift of the
    multipliers: mean and band of ± one standard deviation over seeds. Folders NAME-SEED are one line a NAME; any other
    name is a line of its own."""
    pyplot, groups = plotting(path), {}
    for run in runs:
        name, _, seed = Path(run).resolve().name.rpartition("-")
        groups.setdefault(name if name and seed.isdecimal() else Path(run).resolve().name, []).append(read_metrics(run))
    every = [line for group in groups.values() for lines in group for line in lines]
    if not any("val_loss" in line for line in every):
        raise BadInput(f"{runs[0]}: no evaluation in its metrics.jsonl")

    pairs = sorted({pair for line in every for pair in line.get("drift", ())})
    panels = [("held-out loss, nats", x, [("", lambda line: line.get("val_loss"))])
              for x in ("step", "tokens", "flops", "seconds")]
    if any("let_cosine" in line for line in every):
        panels.append(("cosine(T, M)", "step", [("", lambda line: line.get("let_cosine"))]))
    if pairs:
        panels.append(("multiplier drift, log of the ratio", "step", [
            (pair, lambda line, pair=pair: line.get("drift", {}).get(pair)) for pair in pairs]))
    columns = 2 if len(panels) == 4 else 3
    figure, axes = pyplot.subplots(2, columns, figsize=(4.6 * columns, 7.2), layout="constrained")
    for axis, (title, x, lines) in zip(axes.flat, panels):
        start = []  # the losses after a tenth of each run; above is the fall from ln V, which would flatten the rest
        for i, (name, group) in enumerate(groups.items()):
            for (pair, value), style in zip(lines, ("-", "--", ":", "-.")):
                at, mean, sd = over_seeds(group, value)
                xs = [point[x] for point in at]
                if not xs:
                    continue
                label = name + (f" ({len(group)} seeds)" if len(group) > 1 else "") + (f" {pair}" if pair else "")
                axis.plot(xs, mean, style, color=f"C{i}", marker="o" if len(xs) < 15 else None, ms=3, label=label)
                low, high = ([m + sign * s for m, s in zip(mean, sd)] for sign in (-1, 1))
                axis.fill_between(xs, low, high, color=f"C{i}", alpha=0.2, lw=0)
                start += [m + s for point, m, s in zip(at, mean, sd) if point["step"] >= 0.1 * at[-1]["step"]][:1]
        axis.set(title=title if x == "step" else None, xlabel={"step": "steps", "flops": "FLOPs"}.get(x, x), ylabel=title)
        if title.startswith("held-out") and start:
            axis.set_ylim(top=max(start))
        axis.grid(alpha=0.3)
        axis.ticklabel_format(axis="x", scilimits=(-3, 5))
        if x == "step":
            axis.legend(fontsize="small")
    for axis in axes.flat[len(panels):]:
        axis.remove()
    figure.savefig(path, dpi=120)
    return path


def sweep_command(a) -> str:
    if a.plot:
        plot_sweep(a.runs, a.piece, a.plot)
    return sweep(a.runs, a.piece)


COMMANDS = {"linearity": linearity_command, "prune": prune_command, "curvature": curvature_command,
            "norms": norms_command, "eval": eval_command, "compare": lambda a: compare(a.runs), "sweep": sweep_command,
            "plot": lambda a: plot_runs(a.runs, a.plot)}


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
    h = commands.add_parser("curvature", help="extreme eigenvalues and density of the loss' Hessian")
    h.add_argument("checkpoints", nargs="+", help="checkpoints, or folders of runs (--keep_checkpoints keeps them all)")
    h.add_argument("--text", required=True, help="a text file to take the loss on")
    h.add_argument("--tokens", type=int, default=2048, help="how many of its tokens")
    h.add_argument("--steps", type=int, default=32, help="Hessian-vector products from each random vector")
    h.add_argument("--probes", type=int, default=2, help="random vectors")
    h.add_argument("--top", type=int, default=3, help="how many of the largest eigenvalues are shown")
    h.add_argument("--micro_batch", type=int, default=8, help="sequences differentiated at a time")
    h.add_argument("--dtype", default="fp32", choices=("fp32", "fp64"))
    h.add_argument("--seed", type=int, default=0, help="of the random vectors")
    h.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    h.add_argument("--plot", default="", help="also draw the density to this file")
    n = commands.add_parser("norms", help="norms of W and W~ by matrix and block, against those of pure noise")
    n.add_argument("run", help="a run's folder, or a checkpoint")
    n.add_argument("--plot", default="", help="also draw them over steps, and the rows' histogram, to this file")
    e = commands.add_parser("eval", help="accuracy on multiple choice and minimal pairs; perplexity of a text")
    e.add_argument("checkpoint")
    e.add_argument("--task", nargs="+", default=[], help="files of JSON lines: ctx, endings, label; context, choices, "
                   "label; or sentence_good, sentence_bad")
    e.add_argument("--items", type=int, default=0, help="how many items of each file; 0: all")
    e.add_argument("--text", default="", help="a text file to take the perplexity of")
    e.add_argument("--tokens", type=int, default=0, help="how many of its tokens; 0: all")
    e.add_argument("--stride", type=int, default=0, help="tokens from window to window; 0: a context, no overlap")
    e.add_argument("--batch_tokens", type=int, default=0, help="tokens in one forward pass; 0: 1,024 on a CPU, else 32,768")
    e.add_argument("--dtype", default="fp32", choices=("fp32", "bf16", "fp64"))
    e.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    o = commands.add_parser("plot", help="losses, cosine(T, M) and multiplier drift of runs in one picture")
    o.add_argument("runs", nargs="+", help="folders of runs; those named NAME-SEED are one line with a band")
    o.add_argument("-o", "--plot", default="runs.png", help="file to draw to")
    a = parser.parse_args(argv)
    if getattr(a, "plot", ""):
        plotting(a.plot)
    print(COMMANDS[a.command](a))


if __name__ == "__main__":
    command(main)
