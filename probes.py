"""probes.py: what can be measured on trained models and read from their runs, and the linearity
regulariser.

    python probes.py linearity runs/1 --text notes.txt --plot=profile.png    # of each block
    python probes.py prune runs/1 --text notes.txt --blocks=1,2,3    # remove or replace blocks
    python probes.py curvature runs/plain-? runs/let-? --text notes.txt    # of the loss
    python probes.py eval runs/1 --task hellaswag.jsonl --text notes.txt   # accuracy; perplexity
    python probes.py compare runs/plain-? runs/let-?    # folders NAME-SEED, against the first NAME
    python probes.py plot runs/plain-? runs/let-? -o runs.png    # losses, scales of the weights

Linearity is from "Your Transformer is Secretly Linear" (Razzhigaev et al. 2024, arXiv 2405.12250).
Section numbers below are that paper's.

How a text is read. Every command reads its text as training reads a document: an end-of-text token,
then the tokens of the text. Contexts are cut from this one sequence, so position 0 of a later
context holds whatever token comes there. --characters=512 is the paper's way: the text is cut into
pieces of 512 characters, and each is a context of its own that begins with an end-of-text token.

Names and symbols
    X, Y        (n, d) states of n tokens before and after a block; D = Y - X, what the block adds
    full, free  the linearity scores of (X, Y) and of (X, D); the second is called residual-free
    H           the Hessian of the mean loss; N parameters; theta: its Ritz values (see lanczos)
    W, W~       a weight matrix as the optimizer moves it, and as the model uses it (optim.py)
    piece       a kind of logical matrix: q, k, v, o, gate, up, down, embed, head, ...
    run         a folder that train.py wrote; runs NAME-SEED that differ in the seed form a group
"""
import argparse
import ast
import builtins
import copy
import io
import itertools
import json
import math
import random
import statistics
import symtable
import time
import tokenize
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from model import (
    GPT,
    IGNORE,
    AffineBlock,
    BadInput,
    Failed,
    ModelConfig,
    Term,
    checkpoint_file,
    command,
    device_exists,
    load_checkpoint,
    log_likelihoods,
    logical_pieces,
    next_token_loss,
    tokenizer_from_dict,
    written_whole,
)

# --------------------------------------------------------------------------------------------------
# Linearity: the score


def linearity_score(X, Y) -> float:
    """How well an affine map predicts Y from X, both (n, d), a row a token: 1 is perfectly
    (section 3.1).

        1 - min over A of ||X A - Y||^2, with X and Y centred and of Frobenius norm 1

    A is any (d, d) matrix. This is the R^2 of linear regression with an intercept, pooled over
    channels. The pseudo-inverse counts singular values below max(n, d) * eps * largest as 0."""
    X = X.double() - X.double().mean(0)
    Y = Y.double() - Y.double().mean(0)
    X = X / X.norm()
    Y = Y / Y.norm()
    A = torch.linalg.pinv(X) @ Y
    return 1 - (X @ A - Y).square().sum().item()


class Moments:
    """Sums over any number of tokens that a linear fit of D on X needs: 2 d^2 numbers, float64.

    n: tokens. mean (2 d,): of X and D side by side; products (d, 2 d): X^T X and X^T D; dd:
    ||D||^2; both with X and D centred. Batches are merged by the update of Chan, Golub & LeVeque
    (1983), which keeps digits where a mean is large. ratio, cosine: sums over tokens of ||D_i|| /
    ||Y_i|| and of cos(X_i, Y_i), uncentred."""

    def __init__(self, width: int, device="cpu"):
        self.width, self.n, self.dd, self.ratio, self.cosine = width, 0, 0.0, 0.0, 0.0
        self.mean = torch.zeros(2 * width, dtype=torch.float64, device=device)
        self.products = torch.zeros(width, 2 * width, dtype=torch.float64, device=device)

    def add(self, x, y):
        """x, y: (tokens, d) before and after a block."""
        x, y, d, n = x.double(), y.double(), self.width, self.n + len(x)
        both = torch.cat((x, y - x), dim=1)
        self.ratio += (both[:, d:].norm(dim=1) / y.norm(dim=1).clamp(min=1e-300)).sum().item()
        self.cosine += F.cosine_similarity(x, y, dim=1).sum().item()
        mean = both.mean(0)
        both -= mean
        self.products.addmm_(both[:, :d].mT, both)
        self.dd += both[:, d:].square().sum().item()
        self.products, self.dd = self.about(mean, self.n * len(x) / n)
        self.mean += (mean - self.mean) * (len(x) / n)
        self.n = n

    def about(self, mean, n: float):
        """(products, dd) with n times those of the distance to `mean` added: for n of all tokens,
        the sums about `mean`."""
        gap, d = self.mean - mean, self.width
        products = self.products.addr(gap[:d], gap, alpha=n)
        return products, self.dd + n * gap[d:].square().sum().item()

    def yy(self) -> float:
        """||Y||^2, centred."""
        xx, xd = self.products.split(self.width, dim=1)
        return self.dd + (2 * xd + xx).trace().item()


def linearity(fit: Moments, held_out: Moments) -> dict:
    """The scores of one block from tokens to fit on and others to check on.

    full, free: in the sample of the fit, as the paper computes them: linearity_score of (X, Y),
    (X, D).
    *_adjusted: corrected for the fit's rank, 1 - (1 - S) (n - 1) / (n - 1 - rank).
    *_held_out: R^2 of the fitted affine map on the other tokens; it can be negative.
    ratio_mean: mean over tokens of ||D_i|| / ||Y_i||. ratio: ||D|| / ||Y||, centred. cosine: mean
    of cos(X_i, Y_i).

    One fit, of D on X, serves both scores: with the same error, 1 - full = (1 - free) ratio^2. X
    is often rank-deficient (few distinct tokens): eigenvalues of X^T X below d eps times the
    largest count as 0. A block that adds nothing has no residual-free score (nan)."""
    xx, xd = fit.products.split(fit.width, dim=1)
    e, V = torch.linalg.eigh(xx)
    kept = e > len(e) * torch.finfo(e.dtype).eps * e[-1].clamp(min=1e-300)
    e, V = e[kept], V[:, kept]
    A = V @ ((V.mT @ xd) / e[:, None])  # D is predicted as its mean + (X - its mean) A
    n, rank, yy = fit.n, len(e), fit.yy()
    out = {"n": n, "rank": rank, "cosine": fit.cosine / n, "ratio_mean": fit.ratio / n,
           "ratio": math.sqrt(fit.dd / yy)}
    error = fit.dd - (A * xd).sum().item()
    products, other_error = held_out.about(fit.mean, held_out.n)
    xx, xd = products.split(fit.width, dim=1)
    other_error += (A * (xx @ A - 2 * xd)).sum().item()
    for name, size, other_size in (("full", yy, held_out.yy()), ("free", fit.dd, held_out.dd)):
        score = 1 - error / size if size > 1e-24 * yy else math.nan
        by_chance = (n - 1) / (n - 1 - rank) if n - 1 > rank else math.nan
        out |= {name: score, f"{name}_adjusted": 1 - (1 - score) * by_chance,
                f"{name}_held_out": 1 - other_error / other_size if other_size > 0 else math.nan}
    return out


@torch.no_grad()
def linearity_profile(model, batches, skip_first=False) -> list[dict]:
    """linearity() of every block over batches of token ids (B, T): even ones to fit, odd ones
    held out.
    skip_first: leave position 0 out. Attention parks there what it has no use for, with states
    that can be a hundred times as large as others and then carry nearly all of the variance."""
    states = range(model.config.n_layer + 1)
    fit, held_out = ([Moments(model.config.n_embd, batches[0].device) for _ in states[1:]]
                     for _ in range(2))
    for i, idx in enumerate(tqdm(batches, "linearity", unit="batch", disable=None, leave=False)):
        _, found = model.trunk(idx, hidden=tuple(states))
        found = [h[:, int(skip_first):].flatten(0, 1) for h in found]
        for sums, x, y in zip(held_out if i % 2 else fit, found, found[1:]):
            sums.add(x, y)
    return [{"block": k, **linearity(*pair)} for k, pair in enumerate(zip(fit, held_out), start=1)]


# --------------------------------------------------------------------------------------------------
# Linearity: the regulariser


def linearity_penalty(states, kind="cosine", reduction="sum", stop_gradient="none"):
    """The pretraining regulariser (section 4), 0-d float32. It pulls neighbouring states
    together; the paper reports that the residual-free score then falls.

        cosine: sum_i mean over tokens of 1 - cos(h_i, h_{i-1})
        mse:    sum_i mean over tokens of ||h_i - h_{i-1}||^2

    states: h_0, ..., h_L, each (B, T, C). The paper does not say what is averaged, where the sum
    begins or what is held fixed. Ours: the mean over all tokens; reduction `sum` or `mean` over
    blocks;
    stop_gradient: the state of a pair that gets no gradient, `none`, `lower` or `upper`."""
    def held(t, side):
        return t.detach() if side == stop_gradient else t

    states, terms = [h.float() for h in states], []
    if kind == "cosine":  # each norm once: F.cosine_similarity of pairs takes three times as long
        norms = [torch.linalg.vector_norm(h, dim=-1).clamp_min(1e-8) for h in states]
    for i in range(1, len(states)):
        a, b = held(states[i - 1], "lower"), held(states[i], "upper")
        if kind == "cosine":
            lengths = held(norms[i - 1], "lower") * held(norms[i], "upper")
            terms.append(1 - ((a * b).sum(-1) / lengths).mean())
        else:
            terms.append((b - a).square().sum(-1).mean())
    return torch.stack(terms).sum() if reduction == "sum" else torch.stack(terms).mean()


class Linearity(Term):
    """weight * linearity_penalty of the states first, ..., n_layer. The paper's weights: cosine
    0.5; mse 0.5 and 2."""

    name = "linearity"

    def __init__(self, kind: str, weight: float, n_layer: int, first=0, reduction="sum",
                 stop_gradient="none"):
        self.options = kind, reduction, stop_gradient
        self.constant = weight
        self.hidden = tuple(range(first, n_layer + 1))

    def weight(self, step):
        return self.constant

    def over(self, step):
        return self.constant == 0

    def __call__(self, p):
        states = [p.states[k] for k in self.hidden]
        self.last = [h.detach() for h in states]
        loss = linearity_penalty(states, *self.options)
        return loss, {"linearity_loss": loss.detach()}

    def logged(self, step):
        return {"stream": stream_scales(self.last)}


@torch.no_grad()
def stream_scales(states) -> dict[str, list[float]]:
    """Of each block, means over tokens: cosine of the states before and after; norm of the state
    after; ratio, the norm of what the block adds over that norm. They show whether a penalty was
    met cheaply: mse by a shrinking stream, cosine by a growing one."""
    found = {"cosine": [], "norm": [], "ratio": []}
    for lower, upper in itertools.pairwise(h.float() for h in states):
        norm = upper.norm(dim=-1)
        found["cosine"].append(F.cosine_similarity(upper, lower, dim=-1).mean().item())
        found["norm"].append(norm.mean().item())
        found["ratio"].append(((upper - lower).norm(dim=-1) / norm.clamp(min=1e-30)).mean().item())
    return found


# --------------------------------------------------------------------------------------------------
# Pruning (section 5). The most linear blocks are removed; better, an affine map replaces each;
# better still, the maps are then trained to give the states of the whole model. The paper says no
# more. Ours: blocks are scored once, on the whole model; a map has a bias and replaces the residual
# connection too; maps are fitted in depth order, each on the output of those before it, to the
# whole model's states; distillation compares the states after the first map and each later block.

ORDERS = ("full", "free", "cosine", "random")
ARMS = ("remove", "replace", "distil", "distil_all")
OF_MAMBA = ("d_state", "ssm_head_dim", "expand", "n_groups", "chunk_size", "d_conv", "ssm_norm")
OF_EXPERTS = ("n_experts", "experts_per_token", "expert_hidden")


def prune_order(profile, order: str, protect=(), seed=0) -> list[int]:
    """Numbers of blocks, the first to go first: by falling in-sample score `full` or `free`, by
    falling `cosine` of the states before and after (ShortGPT's Block Influence, arXiv
    2403.03853), or `random`.
    profile: of linearity_profile; protect: blocks that stay. A block that adds nothing goes
    first."""
    blocks = [p["block"] for p in profile if p["block"] not in protect]
    if order == "random":
        random.Random(seed).shuffle(blocks)
        return blocks
    scores = {p["block"]: math.inf if math.isnan(p[order]) else p[order] for p in profile}
    return sorted(blocks, key=scores.get, reverse=True)


def with_blocks(model: GPT, blocks, kinds: str) -> GPT:
    """The model with these blocks in place of its own. Parameters are shared, not copied.
    Settings of kinds of block that are gone return to their defaults."""
    idle = (() if {*kinds} & {*"MH"} else OF_MAMBA) + (() if {*kinds} & {*"AH"} else OF_EXPERTS)
    settings = {**asdict(model.config), "n_layer": len(kinds), "mixer": kinds}
    new = copy.copy(model)
    new.config = ModelConfig(**{k: v for k, v in settings.items() if k not in idle})
    new.has_attention = bool({*kinds} & {*"AH"})
    new._modules = {**model._modules, "blocks": torch.nn.ModuleList(blocks)}
    return new


def remove_blocks(model: GPT, chosen) -> GPT:
    """The model without the blocks of these numbers."""
    left = [k for k in range(model.config.n_layer) if k + 1 not in chosen]
    kinds = "".join(model.config.kinds()[k] for k in left)
    return with_blocks(model, [model.blocks[k] for k in left], kinds)


def fit_affine(fit: Moments, held_out: Moments):
    """(W (d, d), b (d,), ridge) of y = x + W x + b, float64.

    Ridge regression on W, not on I + W, as a block is near the identity: min over B = W^T of ||X
    B - D||^2 + ridge ||B||^2, X and D centred. The ridge, in units of the largest eigenvalue of
    X^T X, is the one of a grid with the least error on the other tokens; inf is W = 0, a constant
    b."""
    xx, xd = fit.products.split(fit.width, dim=1)
    other_xx, other_xd = held_out.about(fit.mean, held_out.n)[0].split(fit.width, dim=1)
    e, V = torch.linalg.eigh(xx)
    P, Q, H = V.mT @ xd, V.mT @ other_xd, V.mT @ other_xx @ V  # in the axes of X^T X

    def solve(ridge):
        return P / (e.clamp(min=0) + ridge * e[-1])[:, None]

    def error(ridge):  # on the other tokens, without their ||D||^2
        R = solve(ridge)
        return (R * (H @ R - 2 * Q)).sum().item()

    ridge = min((math.inf, *(10.0 ** -j for j in range(13))), key=error)
    B = V @ solve(ridge)
    mean_x, mean_d = fit.mean.split(fit.width)
    return B.mT, mean_d - mean_x @ B, ridge


@torch.no_grad()
def replace_blocks(model: GPT, chosen, batches, skip_first=False) -> GPT:
    """The model with an affine map in place of each chosen block. batches: token ids (B, T),
    every fourth one to choose the ridge."""
    c, first = model.config, int(skip_first)
    kinds, blocks, new = [*c.kinds()], [*model.blocks], model
    for k in sorted(chosen):
        fit, held_out = (Moments(c.n_embd, batches[0].device) for _ in range(2))
        for i, idx in enumerate(batches):
            x, _ = new.trunk(idx, blocks=k - 1)
            y, _ = model.trunk(idx, blocks=k)
            part = held_out if i % 4 == 3 else fit
            part.add(x[:, first:].flatten(0, 1), y[:, first:].flatten(0, 1))
        W, b, _ = fit_affine(fit, held_out)
        block = AffineBlock(c).to(batches[0].device)
        block.affine.weight.copy_(W * c.depth_ratio)  # the block divides by it
        block.affine.bias.copy_(b * c.depth_ratio)
        blocks[k - 1], kinds[k - 1] = block, "L"
        new = with_blocks(model, blocks, "".join(kinds))
    return new


def distil(model: GPT, whole: GPT, batches, steps: int, lr: float, everything=False) -> GPT:
    """A copy of the model, trained to give the whole model's states. Only the affine maps are
    trained, or all parameters with `everything`. AdamW; the learning rate falls linearly to 0.
    The loss is the mean over states, from the first map on, of ||h - h*||^2 / ||h*||^2, norms
    over all tokens."""
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
        errors = [(h - h0).square().sum() / h0.square().sum() for h, h0 in zip(found, wanted)]
        loss = sum(errors) / len(states)
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model.requires_grad_(False)


@torch.no_grad()
def mean_loss(model, batches) -> float:
    """Nats per token over batches of token ids (B, T); positions 1 to T - 1 are predicted."""
    counts = [idx[:, 1:].numel() for idx in batches]
    losses = [model.loss(model(idx[:, :-1])[0], idx[:, 1:]).item() for idx in batches]
    return sum(loss * n for loss, n in zip(losses, counts)) / sum(counts)


@torch.no_grad()
def seconds_per_pass(models, idx, rounds=9) -> list[float]:
    """Median seconds of each model's forward pass over idx (B, T), head included. The models take
    turns, so that other work on the machine slows all alike; the first round is a warm-up."""
    times = [[] for _ in models]
    for _ in range(rounds + 1):
        for model, seen in zip(models, times):
            start = time.perf_counter()
            model.logits(model(idx)[0])[0, 0, 0].item()  # waits for the device
            seen.append(time.perf_counter() - start)
    return [statistics.median(seen[1:]) for seen in times]


def pruned_checkpoint(ckpt: dict, model: GPT, **how) -> dict:
    """`ckpt` with the pruned model in place of its own, at the same step; optimizers and terms
    begin anew. Of the run's flags only those change whose field of ModelConfig changed."""
    state, made, config = model.state_dict(), asdict(model.config), ckpt["config"]
    if config.get("param") == "completep":  # train.py takes m_L from the number of blocks
        made["depth_ratio"] = made["n_layer"] / config["base_n_layer"]
        growth = made["depth_ratio"] / model.config.depth_ratio
        writes = (".o.weight", ".down.weight", ".out.weight", ".mlp.down", ".affine.weight",
                  ".affine.bias")  # into the stream, divided by m_L there
        state = {k: v * growth if k.endswith(writes) else v for k, v in state.items()}
    before = ckpt["model_config"]
    changed = {k: v for k, v in made.items() if k in config and before.get(k) != v}
    return {**ckpt, "model": state, "model_config": made, "config": config | changed,
            "optimizers": {}, "terms": {}, "best_val_loss": math.inf, "pruned": how}


# --------------------------------------------------------------------------------------------------
# Curvature


def plain_loss(model, idx, targets):
    """Mean next-token loss in nats, 0-d, in a form that has second derivatives: all logits at
    once, attention as plain products. idx, targets: (B, T)."""
    with sdpa_kernel(SDPBackend.MATH):
        logits = model.logits(model(idx)[0])
    return next_token_loss(logits.flatten(0, 1), targets.flatten()) / targets.numel()


def hessian_product(model, batches):
    """The function v -> H v for the Hessian of the mean loss over `batches`, pairs (idx, targets)
    of (B, T), with respect to all parameters as one vector (N,): H v = d/dw (dL/dw . v)
    (Pearlmutter 1994). The choices of a router count as fixed: where they change there is no
    derivative."""
    params, tokens = list(model.parameters()), sum(idx.numel() for idx, _ in batches)
    sizes = [p.numel() for p in params]

    def product(v):
        total = torch.zeros_like(v)
        for idx, targets in batches:
            gradient = torch.autograd.grad(plain_loss(model, idx, targets), params,
                                           create_graph=True)
            parts = zip(gradient, v.split(sizes))
            along = sum((g * part.view_as(g)).sum() for g, part in parts)
            second = torch.autograd.grad(along, params, materialize_grads=True)
            total += torch.cat([h.flatten() for h in second]) * (idx.numel() / tokens)
        return total

    return product


def lanczos(product, v, steps: int):
    """Eigenvalues of a symmetric matrix H, given as v -> H v, that `steps` products show.

    Builds an orthonormal basis of v, H v, H^2 v, ... and the tridiagonal matrix T of H in it.
    Each new vector is orthogonalised against all before, twice; else rounding gives copies of
    eigenvalues that have converged. Memory: `steps` vectors.

    Returns three float64 vectors (m,), m <= steps: the Ritz values theta, which are T's
    eigenvalues, rising (the extreme ones converge first); weights w, the squared first components
    of T's eigenvectors, with sum_i w_i theta_i^k = v^T H^k v / v^T v for all k < 2 m (Gauss
    quadrature); bounds on the distance of each theta to the nearest eigenvalue of H."""
    Q, alpha, beta = v.new_empty(steps, len(v)), [], []
    Q[0] = v / v.norm()
    for k in tqdm(range(steps), "Lanczos", unit="product", disable=None, leave=False):
        w = product(Q[k])
        alpha.append((w @ Q[k]).item())
        for _ in range(2):
            w = w - (Q[:k + 1] @ w) @ Q[:k + 1]
        beta.append(w.norm().item())
        nothing_left = beta[-1] <= 100 * torch.finfo(v.dtype).eps * max(map(abs, alpha + beta))
        if k + 1 == steps or nothing_left:
            break
        Q[k + 1] = w / beta[-1]
    side = torch.tensor(beta[:-1], dtype=torch.float64)
    T = torch.tensor(alpha, dtype=torch.float64).diag() + side.diag(1) + side.diag(-1)
    theta, S = torch.linalg.eigh(T)
    return theta, S[0].square(), beta[-1] * S[-1].abs()


def spectrum(model, batches, steps=32, probes=2, seed=0, top=3) -> dict:
    """The Hessian's spectrum by Lanczos from `probes` random vectors of signs.

    loss: nats. top: the largest eigenvalues, falling; least: the most negative one; each the
    extreme over the vectors, as a Ritz value never lies beyond its eigenvalue. residual: the
    largest bound on their error. trace, and trace_se over the vectors; rms: root mean square of
    all N eigenvalues. ritz: [(theta, w)], for density(). All in the dtype of the model."""
    params = list(model.requires_grad_(True).parameters())
    N, generator = sum(p.numel() for p in params), torch.Generator().manual_seed(seed)
    product, found = hessian_product(model, batches), []
    for _ in range(probes):
        v = (torch.randint(2, (N,), generator=generator) * 2 - 1).to(params[0])
        found.append(lanczos(product, v, steps))
    ends = [list(zip(theta.tolist(), bound.tolist())) for theta, _, bound in found]
    largest = [max(end[-k] for end in ends if k <= len(end))
               for k in range(1, 1 + min(top, max(map(len, ends))))]
    least = min(end[0] for end in ends)
    traces = [N * (w @ theta).item() for theta, w, _ in found]
    squares = [(w @ theta.square()).item() for theta, w, _ in found]
    with torch.no_grad():
        losses = [plain_loss(model, *batch).item() * batch[0].numel() for batch in batches]
    tokens = sum(idx.numel() for idx, _ in batches)
    return {"loss": sum(losses) / tokens, "tokens": tokens, "parameters": N,
            "top": [value for value, _ in largest], "least": least[0],
            "residual": max(bound for _, bound in [*largest, least]),
            "trace": mean(traces), "trace_se": standard_error(traces), "rms": mean(squares) ** 0.5,
            "ritz": [(theta, w) for theta, w, _ in found]}


def density(ritz, x, sigma: float):
    """The density of eigenvalues at x (n,), each seen as a normal of standard deviation sigma;
    its integral is 1. Stochastic Lanczos quadrature (Lin, Saad & Yang 2016; for networks Ghorbani
    et al. 2019, arXiv 1901.10159)."""
    normal = [(w * torch.exp(-0.5 * ((x[:, None] - t) / sigma) ** 2)).sum(1) for t, w in ritz]
    return torch.stack(normal).mean(0) / (sigma * math.sqrt(2 * math.pi))


def mean(values) -> float:
    return statistics.mean(values) if values else math.nan


def standard_error(values) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


# --------------------------------------------------------------------------------------------------
# Evaluation: multiple choice, minimal pairs, perplexity


def read_task(path) -> list[tuple[str, list[str], int]]:
    """(context, choices, number of the right one) of each line of a file of JSON objects:
    HellaSwag's ctx, endings, label; context, choices, label; or BLiMP's sentence_good,
    sentence_bad, which are two choices without a context. Raises BadInput with the file and the
    line."""
    items = []
    lines = read_text(path, "--task").split("\n")  # splitlines cuts at more
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                items.append(read_item(json.loads(line)))
            except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as e:
                raise BadInput(f"--task={path}, line {number}: {e!r}") from None
    need(items, f"--task={path}: no line in it")
    return items


def read_item(record: dict) -> tuple[str, list[str], int]:
    """One record of read_task. Raises an error that says what is wrong."""
    if "sentence_good" in record:
        context, choices, label = "", [record["sentence_good"], record["sentence_bad"]], 0
    else:
        names = ("ctx", "endings") if "ctx" in record else ("context", "choices")
        context, choices = (record[name] for name in names)
        label = int(str(record["label"])[:9])  # HellaSwag has "3"
    texts = [context, *choices] if isinstance(choices, list) else []
    if len(texts) < 3 or not all(isinstance(text, str) for text in texts):
        raise ValueError("a context and two choices or more are needed, all texts")
    if not all(choice.strip() for choice in choices):
        raise ValueError("a choice without a letter")
    if not 0 <= label < len(choices):
        raise ValueError(f"label: a number from 0 to {len(choices) - 1} is needed")
    return context, choices, label


def encode_pair(enc, context: str, choice: str) -> tuple[list[int], int]:
    """(token ids of context and choice after an end-of-text token, number of the choice's first).
    The boundary is lm-evaluation-harness's: one space between the two, which belongs to the
    choice, as do all blanks at the end of the context. Both are encoded together and cut where
    the context encoded alone ends."""
    if context and not (context[-1].isspace() or choice[0].isspace()):
        choice = " " + choice
    whole = enc.encode_ordinary(context + choice)
    start = len(enc.encode_ordinary(context.rstrip()))
    return [enc.eot_token, *whole], 1 + min(start, len(whole) - 1)


def scored(ids, start: int, limit=math.inf):
    """The (ids, targets) of a sequence of tokens of which those from `start` on are scored. One
    longer than `limit` loses its beginning. None if that leaves no token before the first scored
    one."""
    cut = int(max(0, len(ids) - limit))
    ids, start = ids[cut:], start - cut
    return (ids[:-1], [IGNORE] * (start - 1) + ids[start:]) if start >= 1 else None


def right(scores, label: int) -> tuple[float, bool]:
    """(1 if the label's score is the highest, its share of 1 in a tie, else 0; whether there is a
    tie). Scores that differ by less than 1e-5 of themselves, which is rounding, are equal."""
    best = max(scores)
    top = [k for k, s in enumerate(scores) if best - s <= 1e-5 * abs(best)]
    return (1 / len(top) if label in top else 0.0), len(top) > 1


def evaluate_task(model, enc, task, batch_tokens=1024) -> dict:
    """Multiple choice over (context, choices, label).

    sum, per_character: accuracy by summed log-likelihood, and by that over the characters of the
    choice (the harness's acc and acc_norm), with standard errors *_se and *_ties, the items with
    several best choices; chance; items; cut: those of them whose context lost its beginning to
    fit the model's; left_out: further ones, of which a choice alone is too long; scores: each
    item's log-likelihoods in nats, None where left out."""
    limit = model.config.block_size + 1 if getattr(model, "has_attention", True) else math.inf
    pairs = [[encode_pair(enc, context, choice) for choice in choices]
             for context, choices, _ in task]
    items = [[scored(ids, start, limit) for ids, start in pair] for pair in pairs]
    kept = [i for i, item in enumerate(items) if None not in item]
    sequences = [sequence for i in kept for sequence in items[i]]
    totals = iter(log_likelihoods(model, sequences, batch_tokens * model.config.vocab_size))
    found = {i: [next(totals)[0] for _ in items[i]] for i in kept}
    cut = sum(any(len(ids) > limit for ids, _ in pairs[i]) for i in kept)
    out = {"items": len(kept), "cut": cut, "left_out": len(task) - len(kept),
           "scores": [found.get(i) for i in range(len(task))],
           "chance": mean([1 / len(task[i][1]) for i in kept])}
    for name, size in (("sum", lambda choice: 1), ("per_character", len)):
        results = [right([s / size(choice) for s, choice in zip(found[i], task[i][1])], task[i][2])
                   for i in kept]
        got = [credit for credit, _ in results]
        out |= {name: mean(got), f"{name}_se": standard_error(got),
                f"{name}_ties": sum(tie for _, tie in results)}
    return out


def evaluate_text(model, ids, n_bytes: int, stride: int, batch_tokens=1024) -> dict:
    """Perplexity of a text of n_bytes; ids: its tokens after an end-of-text token. Windows of
    block_size inputs each score their last `stride` tokens. nats: mean per token; nats_se over
    windows."""
    T, windows = model.config.block_size, []
    for begin in range(1, len(ids), stride):
        end = min(begin + stride, len(ids))
        first = max(0, end - T - 1)
        windows.append(scored(ids[first:end], begin - first))
    found = log_likelihoods(model, windows, batch_tokens * model.config.vocab_size)
    total = -sum(value for value, _ in found)
    nats = total / (len(ids) - 1)
    return {"tokens": len(ids) - 1, "nats": nats, "perplexity": math.exp(nats),
            "nats_se": standard_error([value / n for value, n in found]),
            "bits_per_byte": total / math.log(2) / n_bytes}


# Minimal pairs from Python files, for a downstream task that needs no download.

# Tokens that stand for one another, by kind. The fifth kind, `name`, draws from other documents.
BRACKETS = tuple("()[]{}")
OPERATORS = ("=", "==", "!=", "<", ">", "+", "-", "*", "/", ".", ",", ":", "%", "+=", "|", "&")
KEYWORDS = ("if", "in", "is", "not", "and", "or", "for", "else", "return", "import", "from", "as",
            "del", "lambda", "raise", "assert", "yield", "while", "with", "def")
PYTHON_KINDS = ("bracket", "operator", "keyword", "indent", "name")


def python_pairs(documents, seed: int, n: int, length=None, longest=900):
    """n minimal pairs [(kind, context, right, wrong)] from the texts of Python files.

    context is the beginning of a function or class of the file, up to the end of a line; right is
    the file's next statement, one whole line; wrong differs from it in one token:

        bracket     a bracket became another one
        operator    an operator became another one
        keyword     a keyword became another one
        indent      the line begins at a depth at which no line can begin here
        name        a local name or parameter became a name that is never bound

    context + right parses, and binds every local name that it uses. With the first four kinds
    context + wrong does not parse (ast); with `name` it does, and uses a global that neither the
    whole file nor Python binds (symtable). The five kinds are equally many as far as the documents
    allow, and no document gives more than 5 % of the pairs (or twice its share).

    A wrong token is not to be recognized by being rare: as often as token a became b, b became a.
    Indents become deeper as often as shallower, names more frequent as often as rarer.

    length: function of a text. Pairs are left out where length(context + right) and
    length(context + wrong) differ: with the number of tokens, a model that knows nothing is right
    in half of the pairs, for it does not prefer the shorter side. longest: characters of context
    and right. Fewer than n pairs are returned if the documents have no more."""
    rng = random.Random(seed)
    names = [node.id for text in documents for node in nodes_of(text, ast.Name)]
    counts, changes = Counter(names), Counter()
    statements = [(d, context, right) for d, text in enumerate(documents)
                  for context, right in statements_of(text, longest)]
    rng.shuffle(statements)
    pairs, of_kind, of_document = [], dict.fromkeys(PYTHON_KINDS, 0), [0] * len(documents)
    most = max(5, n / 20, 2 * n / len(documents))
    for d, context, right in statements:
        foreign = [name for name in rng.choices(names, k=60) if name not in documents[d]]
        open_kinds = [kind for kind in sorted(PYTHON_KINDS, key=of_kind.get)
                      if of_kind[kind] < n / len(PYTHON_KINDS) and of_document[d] < most]
        candidates = ((kind, *one) for kind in open_kinds
                      for one in spoiled(kind, context, right, foreign, counts, rng))
        for kind, wrong, old, new in candidates:
            balanced = changes[old, new] <= changes[new, old]
            if balanced and (not length or length(context + wrong) == length(context + right)):
                pairs.append((kind, context, right, wrong))
                changes[old, new] += 1
                of_kind[kind] += 1
                of_document[d] += 1
                break
    return pairs[:n]


def parsed(text: str):
    """The syntax tree of a text, or None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def nodes_of(text: str, kind):
    tree = parsed(text)
    return [node for node in ast.walk(tree) if isinstance(node, kind)] if tree else []


def statements_of(text: str, longest: int):
    """(context, statement) for each statement of one line inside a function or class of the file,
    of `longest` characters together, below the line after the head."""
    tree, lines = parsed(text), text.split("\n")
    for top in tree.body if tree and text.isascii() and "\f" not in text else ():
        if not isinstance(top, ast.FunctionDef | ast.ClassDef):
            continue
        for node in ast.walk(top):
            simple = isinstance(node, ast.stmt) and not hasattr(node, "body")
            if not simple or node.lineno != node.end_lineno or node.lineno < top.lineno + 2:
                continue
            right = lines[node.lineno - 1] + "\n"
            context = "\n".join(lines[top.lineno - 1:node.lineno - 1]) + "\n"
            alone = right.strip() == right[node.col_offset:node.end_col_offset]
            text_alone = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if alone and not text_alone and len(context + right) <= longest:
                yield context, right


def spoiled(kind: str, context: str, right: str, foreign, counts, rng):
    """(line, old, new) of the lines that differ from `right` in one token as `kind` says, in random
    order; old and new: what became what. foreign: names that are not in the document."""
    if parsed(context + right) is None:
        return
    if kind == "name":
        yield from with_unbound_name(context, right, foreign, counts, rng)
        return
    if kind == "indent":
        depth, line = len(right) - len(right.lstrip()), right.lstrip()
        choices = [(" " * d + line, "less", "more") for d in (depth + 4, depth + 8)]
        choices += [(" " * d + line, "more", "less") for d in range(0, depth, 4)]
    else:
        group = {"bracket": BRACKETS, "operator": OPERATORS, "keyword": KEYWORDS}[kind]
        choices = [(replaced(right, token.start[1], token.string, other), token.string, other)
                   for token in tokens_of(right) if token.string in group
                   for other in group if other != token.string]
    rng.shuffle(choices)
    yield from (choice for choice in choices if parsed(context + choice[0]) is None)


def tokens_of(line: str) -> list:
    """The tokens of a line that is one statement; columns are those of the line."""
    depth = len(line) - len(line.lstrip())
    found = tokenize.generate_tokens(io.StringIO(line.lstrip()).readline)
    return [t._replace(start=(1, t.start[1] + depth)) for t in found]


def replaced(line: str, column: int, old: str, new: str) -> str:
    return line[:column] + new + line[column + len(old):]


def with_unbound_name(context: str, right: str, foreign, counts, rng):
    """(line, old, new) of the lines in which one name that the context binds locally is a foreign
    name instead."""
    unbound, number = unbound_names(context + right), context.count("\n") + 1
    used = [node for node in nodes_of(context + right, ast.Name)
            if node.lineno == number and isinstance(node.ctx, ast.Load)
            and node.id not in unbound and not hasattr(builtins, node.id)]
    if used:
        node = rng.choice(used)
        for name in foreign:
            wrong = replaced(right, node.col_offset, node.id, name)
            if unbound_names(context + wrong) - unbound == {name}:
                change = ("rare", "frequent") if counts[name] > counts[node.id] else (
                    "frequent", "rare")
                yield wrong, *change


def unbound_names(text: str) -> set[str]:
    """Names that a text uses as globals and does not bind; none if it does not parse."""
    if parsed(text) is None:
        return set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        top = symtable.symtable(text, "text", "exec")
    scopes, found = [top], set()
    for scope in scopes:  # grows
        scopes += scope.get_children()
        found |= {s.get_name() for s in scope.get_symbols()
                  if s.is_referenced() and (s.is_global() or scope is top)}
    bound = {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported()}
    return {name for name in found - bound if not hasattr(builtins, name)}


# --------------------------------------------------------------------------------------------------
# Scale of the weights


def weight_scales(model, multipliers=None) -> dict:
    """Scales of the weights by piece, over all blocks, for metrics.jsonl.

    weights: {piece: {rms, rms_effective, spread}}: root mean square of W and of W~; spread is the
    standard deviation of log(RMS of a row of W~ over its matrix' mean of these), rows of zeros
    left out: the feature-scale diversity of the multipliers' paper (section 3.1) as one number.
    drift, with multipliers: of each symmetric pair, log of RMS r of q, v, up over that of the
    partner k, o, down (rows of k, columns of o and down), mean over blocks: q times t and k over
    t are the same model, so weight decay alone holds this. After relu2 up's counts twice, as t^2
    comes out; after gelu, and under qk_norm, there is no symmetry."""
    params, found = dict(model.named_parameters()), {}
    for name, pieces in logical_pieces(model).items():
        if name in params:  # a tied head is not
            p, sizes = params[name].detach(), [rows for _, rows in pieces]
            W = multipliers.W.get(name, p).detach() if multipliers else p
            squares = (t.flatten(0, -2).square().mean(1).split(sizes) for t in (W, p))
            for (piece, _), *rows in zip(pieces, *squares):
                found.setdefault(piece, []).append(rows)
    out = {"weights": {}}
    for piece, matrices in found.items():
        rms, effective = (torch.stack([rows.mean() for rows in side]).mean().sqrt().item()
                          for side in zip(*matrices))
        norms = [rows[rows > 0].sqrt() for _, rows in matrices]
        logs = torch.cat([(v / v.mean()).log() for v in norms])
        spread = logs.std().item() if len(logs) > 1 else None
        out["weights"][piece] = {"rms": rms, "rms_effective": effective, "spread": spread}
    if multipliers and (drift := multiplier_drift(model.config, multipliers)):
        out["drift"] = drift
    return out


def multiplier_drift(c, multipliers) -> dict[str, float]:
    """{pair: drift}, see weight_scales."""
    logs, drift = {}, {}  # {(piece, side): log RMS of the multipliers, one a matrix}
    for piece, _, *sides in itertools.chain(*multipliers.pieces.values()):
        for side, v in zip("rc", sides):
            if v is not None:
                rms = v.detach().square().mean().sqrt().clamp(min=1e-30)
                logs.setdefault((piece, side), []).append(rms.log().item())
    powers = {("q", "k", "r"): int(not c.qk_norm), ("v", "o", "c"): 1,
              ("up", "down", "c"): {"swiglu": 1, "relu2": 2, "gelu": 0}[c.mlp]}
    for (piece, partner, side), power in powers.items():
        other = logs.get((partner, side)) or logs.get((partner, "r"))  # a scalar counts as r
        if (piece, "r") in logs and other and power:
            drift[f"{piece}/{partner}"] = power * mean(logs[piece, "r"]) - mean(other)
    return drift


# --------------------------------------------------------------------------------------------------
# Runs: what train.py wrote into metrics.jsonl


def read_metrics(run) -> list[dict]:
    """The lines of a run's metrics.jsonl, {"a": {"b": 1}} as {"a b": 1}. A kill can leave half a
    line, which is left out."""
    path, lines = Path(run) / "metrics.jsonl", []
    try:
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(flat(json.loads(text)))
            except json.JSONDecodeError:
                if not lines:
                    raise
    except (OSError, AttributeError, ValueError) as e:
        raise BadInput(f"{path}: not the metrics of a run ({e})") from None
    for line in lines:
        sound = all(isinstance(line.get(key, 0), (int, float))
                    for key in ("val_loss", "bits_per_byte", "tokens", "flops", "seconds"))
        need(sound and isinstance(line.get("step"), int),
             f"{path}: not the metrics of a run (no step, or text for a number)")
    return lines


def flat(line: dict) -> dict:
    """{"a": {"b": {"c": 1}}} as {"a b c": 1}."""
    made = {}
    for key, value in line.items():
        inside = flat(value) if isinstance(value, dict) else {"": value}
        made |= {f"{key} {name}".strip(): v for name, v in inside.items()}
    return made


def read_evaluations(run) -> list[dict]:
    """The lines of a run's metrics.jsonl with a held-out loss. If the run stopped before its last
    step, as a diverged one does, the last loss is infinite."""
    lines = [line for line in read_metrics(run) if "val_loss" in line]
    need(lines, f"{Path(run) / 'metrics.jsonl'}: no evaluation in it")
    config = Path(run) / "config.json"
    try:
        unfinished = config.exists() and lines[-1]["step"] < json.loads(config.read_text())["steps"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise BadInput(f"{config}: not the settings of a run ({e!r})") from None
    if unfinished:
        lines[-1] = {**lines[-1], "val_loss": math.inf, "bits_per_byte": math.inf}
    return lines


def name_and_seed(run) -> tuple[str, str]:
    """("plain", "0") of a folder plain-0; ("", "") of a name without a seed."""
    name, _, seed = Path(run).resolve().name.rpartition("-")
    return (name, seed) if name else ("", "")


def first_reached(lines, loss: float) -> dict | None:
    """Where the held-out loss first comes down to `loss`: step, flops and seconds, on the
    straight line between the evaluations around it. None if it never does."""
    if lines[0]["val_loss"] <= loss:
        return lines[0]
    for before, after in itertools.pairwise(lines):
        if after["val_loss"] <= loss < before["val_loss"]:
            part = (before["val_loss"] - loss) / (before["val_loss"] - after["val_loss"])
            return {k: before[k] + part * (after[k] - before[k])
                    for k in ("step", "flops", "seconds")}
    return None


def mean_sd(values, digits: int, none="") -> str:
    """Mean ± standard deviation; or the number of runs that did not finish, of infinite value."""
    if unfinished := sum(not math.isfinite(v) for v in values):
        return f"{unfinished} of {len(values)} did not finish"
    sd = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{sd}" if values else none


def compare(runs, piece="") -> str:
    """A table over groups of runs (folders NAME-SEED), mean ± standard deviation over seeds: the
    final held-out loss, and where each run comes down to the final loss of the first group's run
    of the same seed, in steps, FLOPs and seconds as a share of that run's own. Paired by seed:
    two runs of a seed share their initial weights and the order of their data. piece: also the
    RMS of its W and W~."""
    groups = {}  # {name: {seed: evaluations}}
    for run in dict.fromkeys(str(Path(run)) for run in runs):  # once each
        name, seed = name_and_seed(run)
        need(name, f"{run}: the folder's name has to end in -SEED")
        need(seed not in groups.setdefault(name, {}), f"{run}: the second folder of this name")
        groups[name][seed] = read_evaluations(run)
    reference = next(iter(groups.values()))
    heading = ["run", "seeds", "held-out nats", "minus the first", "bits per byte", "steps to it",
               "FLOPs to it", "seconds to it"] + ([f"RMS of {piece}: W", "W~"] if piece else [])
    return table(heading, *(compare_row(name, group, reference, piece)
                            for name, group in groups.items()))


def compare_row(name: str, group: dict, reference: dict, piece: str) -> list[str]:
    """The cells of a group of runs in compare's table. group, reference: {seed: evaluations}."""
    differences, shares = [], {"step": [], "flops": [], "seconds": []}
    for seed, lines in group.items():
        need(seed in reference, f"{name}-{seed}: the first group has no run of this seed")
        target = reference[seed][-1]
        if math.isfinite(target["val_loss"]):
            differences.append(lines[-1]["val_loss"] - target["val_loss"])
            if found := first_reached(lines, target["val_loss"]):
                for k, share in shares.items():
                    share.append(100 * found[k] / target[k] if target[k] else 0.0)
    final, reached = [lines[-1] for lines in group.values()], len(shares["step"])
    note = " %" if reached == len(group) else f" % ({reached} of {len(group)} seeds)"
    cells = [mean_sd([line["val_loss"] for line in final], 4),
             mean_sd(differences, 4, none="the first did not finish"),
             mean_sd([line["bits_per_byte"] for line in final], 4)]
    cells += [mean_sd(share, 1) + note if share else "never" for share in shares.values()]
    for key in ("rms", "rms_effective") if piece else ():
        scales = [line.get(f"weights {piece} {key}") for line in final]
        need(None not in scales, f"--piece={piece}: no such kind of matrix in the runs {name}-*")
        cells.append(mean_sd(scales, 4))
    return [name, str(len(group)), *cells]


def over_seeds(group, key: str) -> tuple[list[dict], list[float], list[float]]:
    """The values of `key` by step over the runs of a group (lists of lines), where they are
    finite numbers: the step and the mean tokens, flops and seconds there; means over seeds;
    standard deviations, 0 of a single one."""
    by_step = {}
    for line in itertools.chain(*group):
        value = line.get(key)
        if value is not None and math.isfinite(value):
            by_step.setdefault(line["step"], []).append(line)
    at = [{k: mean([line.get(k, math.nan) for line in lines])
           for k in ("step", "tokens", "flops", "seconds")} for _, lines in sorted(by_step.items())]
    values = [[line[key] for line in lines] for _, lines in sorted(by_step.items())]
    deviations = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
    return at, [mean(v) for v in values], deviations


def plot_runs(runs, path: str) -> str:
    """Held-out loss over steps, tokens, FLOPs and seconds, and where runs have them cosine(T, M),
    drift of multipliers and scales of the weights (weight_scales) over steps: mean and a band of
    one standard deviation over seeds. Folders NAME-SEED with a number for a seed are one line a
    NAME; other folders one each."""
    pyplot, groups = plotting(path), {}
    for run in runs:
        name, seed = name_and_seed(run)
        key = name if seed.isdecimal() else Path(run).resolve().name
        groups.setdefault(key, []).append(read_metrics(run))
    lines = itertools.chain(*itertools.chain(*groups.values()))
    keys = dict.fromkeys(itertools.chain(*lines))
    need("val_loss" in keys, f"{runs[0]}/metrics.jsonl: no evaluation in it")
    panels = {("val_loss", x): ["val_loss"] for x in ("step", "tokens", "flops", "seconds")}
    for key in keys:
        first, *rest = key.split()
        if first in ("let_cosine", "drift", "weights"):  # all of "weights head" in one panel
            panels.setdefault((" ".join([first, *rest[:-1]]), "step"), []).append(key)
    rows = math.ceil(len(panels) / 4)
    figure, axes = pyplot.subplots(rows, 4, figsize=(18, 3.6 * rows), layout="constrained")
    for axis, ((title, x), shown) in zip(axes.flat, panels.items()):
        plot_panel(axis, groups, x, shown)
        axis.set(title=title, xlabel=x)
    for axis in axes.flat[len(panels):]:
        axis.remove()
    figure.savefig(path, dpi=120)
    return path


def plot_panel(axis, groups: dict, x: str, keys):
    """The values of these keys over x: a color a group, a style a key."""
    tops = []  # of losses, after a tenth of each run: the fall from ln V would flatten the rest
    for i, (name, group) in enumerate(groups.items()):
        for key, style in zip(keys, ("-", "--", ":", "-.")):
            at, means, deviations = over_seeds(group, key)
            if at:
                xs, last = [point[x] for point in at], key.split()[-1]
                low, high = ([m + side * s for m, s in zip(means, deviations)] for side in (-1, 1))
                label = f"{name}, {len(group)} seeds" if key == last else f"{name} {last}"
                axis.plot(xs, means, style, color=f"C{i}", label=label)
                axis.fill_between(xs, low, high, color=f"C{i}", alpha=0.2, lw=0)
                after = at[-1]["step"] / 10
                tops.append(next(v for point, v in zip(at, high) if point["step"] >= after))
    if keys == ["val_loss"]:
        axis.set_ylim(top=max(tops))
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")


# --------------------------------------------------------------------------------------------------
# Input and output, shared by the commands


def need(ok, message: str):
    if not ok:
        raise BadInput(message)


def open_model(name, device: str, dtype=torch.float32):
    """(model, encoding, tokenizer as a checkpoint holds it) of anything that
    teacher.load_pretrained reads, frozen, in eval mode, its parameters in `dtype`."""
    from teacher import load_pretrained

    need(device_exists(device), f"--device={device}: no such device here")
    model, tokenizer = load_pretrained(name, device, dtype, flag="")
    for p in model.parameters():  # not the tables of rotary positions
        p.data = p.data.to(dtype)
        need(p.isfinite().all(), f"{name}: has weights that are not finite")
    return model, tokenizer_from_dict(tokenizer), tokenizer


def read_text(path, flag="--text") -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise BadInput(f"{flag}={path}: cannot be read as UTF-8 text ({e})") from None


def read_ids(path, enc, tokens=0) -> list[int]:
    """An end-of-text token and the first `tokens` (0: all) of a text file."""
    return [enc.eot_token, *enc.encode_ordinary(read_text(path))[:tokens or None]]


def read_contexts(a, model, enc, least: int) -> list:
    """--text as contexts of token ids, (T,) each; see the top of this file. There have to be
    `least` of them, with at least four tokens a dimension of the width in all."""
    limit, width = model.config.block_size, model.config.n_embd
    length = a.context or min(512, limit)
    need(2 <= length <= limit, f"--context={a.context}: from 2 to the model's {limit}")
    if a.characters:
        text, contexts, room = read_text(a.text), [], a.tokens or math.inf
        while len(text) >= a.characters and room > 0:
            ids = [enc.eot_token, *enc.encode_ordinary(text[:a.characters])][:length]
            text, room = text[a.characters:], room - len(ids)
            contexts.append(torch.tensor(ids))
    else:
        ids = torch.tensor(read_ids(a.text, enc, a.tokens))
        contexts = [*ids[:len(ids) // length * length].view(-1, length)]
    tokens = sum(map(len, contexts))
    need(len(contexts) >= least and tokens >= 4 * width,
         f"--text={a.text} --tokens={a.tokens}: {tokens:,} tokens in {len(contexts)} contexts; at "
         f"least {max(4 * width, least * length):,} in {least} contexts are needed")
    return contexts


def batched(contexts, rows: int, device) -> list:
    """Contexts (T,) as batches (B, T) of one length each, B at most `rows`."""
    made = []
    for _, alike in itertools.groupby(sorted(contexts, key=len), key=len):
        made += torch.stack([*alike]).to(device).split(rows)
    return made


def table(*rows) -> str:
    """Rows of cells as a Markdown table; the first row is the heading."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def plotting(path: str):
    """matplotlib.pyplot without a screen. Refuses a name that no picture can be written to."""
    need(Path(path).suffix in (".png", ".pdf", ".svg"),
         f"--plot={path}: has to end in .png, .pdf or .svg")
    need(Path(path).parent.is_dir() and not Path(path).is_dir(), f"--plot={path}: no folder for it")
    try:
        import matplotlib
    except ImportError:
        raise BadInput("--plot: needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


# --------------------------------------------------------------------------------------------------
# Commands


def bars(values, low: float, high: float) -> str:
    """A row of bars, one a value; the full height is `high`; nan leaves a blank."""
    heights = [min(7, max(0, int(8 * (v - low) / (high - low)))) if v == v else -1 for v in values]
    return "".join("▁▂▃▄▅▆▇█ "[h] for h in heights)


def linearity_command(a) -> str:
    """Show how linear each block of a model is."""
    model, enc, _ = open_model(a.checkpoint, a.device)
    contexts = read_contexts(a, model, enc, 2)
    batches = batched(contexts, min(16, len(contexts) // 2), a.device)
    profile = linearity_profile(model, batches, a.skip_first)
    keys = ("full", "full_adjusted", "full_held_out", "free", "free_adjusted", "free_held_out",
            "ratio_mean")
    rows = [(p["block"], *(f"{p[key]:.4f}" for key in keys), p["rank"]) for p in profile]
    n = profile[0]["n"]
    lines = [f"{n:,} tokens to fit on, {n / model.config.n_embd:.1f} times the width", "",
             table(("block", *keys, "rank"), *rows), ""]
    for key, low in (("full_held_out", 0.8), ("free_held_out", 0.0)):
        heights = bars([p[key] for p in profile], low, 1)
        lines.append(f"{key:<14} {heights}  from {low} to 1, block 1 to {len(profile)}")
    if a.plot:
        figure, axis = plotting(a.plot).subplots(figsize=(6, 4), layout="constrained")
        depth = [p["block"] / len(profile) for p in profile]
        for key in ("full", "full_held_out", "free", "free_held_out"):
            axis.plot(depth, [p[key] for p in profile], "--" if "held" in key else "-", marker="o",
                      color="C0" if "full" in key else "C1", label=key.replace("_", " "))
        axis.set(xlabel="depth, block over blocks", ylabel="linearity score",
                 title="linearity of each block")
        figure.legend(loc="outside lower center", ncols=4)
        figure.savefig(a.plot, dpi=120)
    return "\n".join(lines)


@dataclass
class Pruned:
    """A pruned model, by which order and which arm, and the numbers of the blocks that went."""

    order: str
    arm: str
    blocks: list
    model: GPT


def pruned_models(whole: GPT, profile, batches, a):
    """All that is asked for, one Pruned after the other; the whole model first."""
    yield Pruned("", "whole", [], whole)
    for order, count in itertools.product(a.orders, a.blocks):
        chosen, replaced = sorted(prune_order(profile, order, a.protect, a.seed)[:count]), None
        for arm in a.arms:
            if arm == "remove":
                model = remove_blocks(whole, chosen)
            else:
                replaced = replaced or replace_blocks(whole, chosen, batches, a.skip_first)
                model = replaced
            if arm.startswith("distil"):
                model = distil(replaced, whole, batches, a.distil_steps, a.distil_lr,
                               everything=arm == "distil_all")
            yield Pruned(order, arm, chosen, model)


def prune_command(a) -> str:
    """Remove the most linear blocks, or replace them by affine maps.

    A row for every order, number of blocks and arm. Three quarters of the contexts are fitted on.
    Of the models with the most blocks gone, the one with the least loss on the next eighth is
    written. The table reports the loss on the last eighth, which chooses nothing."""
    whole, enc, tokenizer = open_model(a.checkpoint, a.device)
    need(isinstance(whole, GPT), f"{a.checkpoint}: {NOT_OURS}")
    n_layer = whole.config.n_layer
    most = min(n_layer - 1, n_layer - len({*a.protect}))
    need(max(a.protect) <= n_layer, f"--protect={numbers(a.protect)}: there are {n_layer} blocks")
    need(1 <= min(a.blocks) <= max(a.blocks) <= most,
         f"--blocks={numbers(a.blocks)}: of {a.checkpoint}'s {n_layer} blocks 1 to {most} can go")
    source = Path(checkpoint_file(a.checkpoint))
    ours = source.suffix == ".pt"
    folder = a.out_dir or (source.parent if ours else Path("runs", source.name)) / "pruned"
    out = Path(folder, "ckpt.pt")
    need(not out.exists(), f"--out_dir={folder}: holds a checkpoint already")
    contexts = read_contexts(a, whole, enc, 16)
    judged = contexts[-(len(contexts) // 4):]
    fitted = contexts[:-len(judged)]
    batches = batched(fitted, min(8, len(fitted) // 8), a.device)
    choosing, reported = (batched(part, 8, a.device)
                          for part in (judged[:len(judged) // 2], judged[len(judged) // 2:]))
    rows, kinds, shapes, least, best = [], [], {}, math.inf, None
    profile = linearity_profile(whole, batches, a.skip_first)
    for found in pruned_models(whole, profile, batches, a):
        loss, n = mean_loss(found.model, reported), found.model.num_params()
        rows.append([found.order, found.arm, numbers(found.blocks), f"{loss:.4f}",
                     f"{math.exp(loss):.2f}", f"{n:,}", f"{100 * n / whole.num_params():.1f} %"])
        kinds.append("".join(sorted(found.model.config.kinds())))  # the time is that of any order
        shapes.setdefault(kinds[-1], found.model)
        if len(found.blocks) == max(a.blocks):
            loss = mean_loss(found.model, choosing)
            least, best = (loss, found) if loss < least else (least, best)
    if best is None:
        raise Failed(f"--arms={','.join(a.arms)} --distil_lr={a.distil_lr:g}: no finite loss")
    seconds = dict(zip(shapes, seconds_per_pass(shapes.values(), batches[0])))
    for row, kind in zip(rows, kinds):
        row.append(f"{seconds[kinds[0]] / seconds[kind]:.2f}")
    how = {"order": best.order, "arm": best.arm, "blocks": best.blocks}
    ckpt = load_checkpoint(source) if ours else {
        "format": "nanolet-2", "tokenizer": tokenizer, "step": 0, "config": {}, "model_config": {}}
    with written_whole(out) as tmp, open(tmp, "wb") as file:  # torch's own writer hides a full disk
        torch.save(pruned_checkpoint(ckpt, best.model, source=str(source), **how), file)
    heading = ("order", "arm", "blocks", "held-out nats", "perplexity", "parameters",
               "of the whole", "speed over the whole")
    return (f"{table(heading, *rows)}\n\n{out}: {best.order}, {best.arm}, blocks "
            f"{numbers(best.blocks)}, chosen by {least:.4f} nats on other tokens")


def numbers(values) -> str:
    return ", ".join(map(str, values))


def checkpoints_of(names) -> list[str]:
    """The step-*.pt of each run's folder (train.py's --keep_checkpoints), or else its ckpt.pt;
    other names as they are."""
    found = []
    for name in names:
        found += sorted(map(str, Path(name).glob("step-*.pt"))) or [checkpoint_file(name)]
    return found


def curvature_command(a) -> str:
    """Show the extreme eigenvalues of the loss' Hessian, a row a checkpoint.

    Where the folders are NAME-SEED, also each NAME's eigenvalues over those of the first NAME at
    the same step and seed."""
    found = []
    for name in checkpoints_of(a.checkpoints):
        model, enc, _ = open_model(name, a.device, DTYPES[a.dtype])
        need(isinstance(model, GPT), f"{name}: {NOT_OURS}")
        T = min(model.config.block_size, a.tokens or math.inf)
        ids = torch.tensor(read_ids(a.text, enc, a.tokens), device=a.device)
        n = (len(ids) - 1) // T * T
        need(n, f"--text={a.text}: {len(ids) - 1} tokens; a context of {T} is needed")
        parts = (part.view(-1, T).split(a.micro_batch) for part in (ids[:n], ids[1:n + 1]))
        step = load_checkpoint(name).get("step", 0) if name.endswith(".pt") else 0
        s = spectrum(model, [*zip(*parts)], a.steps, a.probes, a.seed, a.top)
        found.append({"name": name, "step": step, **s})
    cells = [(s["name"], s["step"], f"{s['loss']:.4f}", ", ".join(f"{v:.4g}" for v in s["top"]),
              f"{s['least']:.4g}", f"{s['top'][0] / abs(s['least']):.3g}", f"{s['residual']:.1g}",
              f"{s['trace']:.4g} ± {s['trace_se']:.2g}", f"{s['rms']:.3g}") for s in found]
    heading = ("checkpoint", "step", "loss", "largest eigenvalues", "most negative", "their ratio",
               "error below", "trace", "rms")
    if a.plot:
        plot_spectra(found, a.plot)
    return (f"{found[-1]['tokens']:,} tokens, {found[-1]['parameters']:,} parameters, {a.dtype}\n\n"
            f"{table(heading, *cells)}{spectra_over_the_first(found)}")


def spectra_over_the_first(found) -> str:
    """A table of ratios to the first group of runs at the same step and seed, if there are
    groups."""
    groups = {}  # {(name, step): {seed: spectrum}}
    for s in found:
        name, seed = name_and_seed(Path(s["name"]).parent)
        groups.setdefault((name, s["step"]), {})[seed] = s
    names, rows = [*dict.fromkeys(name for name, _ in groups)], []
    if "" in names or len(names) == 1:
        return ""
    for (name, step), by_seed in groups.items():
        same = groups.get((names[0], step), {})
        pairs = [(s, same[seed]) for seed, s in by_seed.items() if seed in same]
        if name != names[0] and pairs:
            top = [s["top"][0] / r["top"][0] for s, r in pairs]
            least = [s["least"] / r["least"] for s, r in pairs]
            columns = (top, least, [t / m for t, m in zip(top, least)],
                       [s["trace"] / r["trace"] for s, r in pairs])
            rows.append((name, step, len(pairs), *(mean_sd(values, 3) for values in columns)))
    heading = (f"over {names[0]}", "step", "seeds", "largest eigenvalue", "most negative",
               "their ratio", "trace")
    return f"\n\n{table(heading, *rows)}"


def plot_spectra(found, path: str):
    """Density of the eigenvalues of each checkpoint."""
    figure, axis = plotting(path).subplots(figsize=(6, 4), layout="constrained")
    low, high = min(s["least"] for s in found), max(s["top"][0] for s in found)
    margin = 0.05 * (high - low)
    x = torch.linspace(low - margin, high + margin, 2000, dtype=torch.float64)
    for s in found:
        label = f"{Path(s['name']).parent.name} step {s['step']}"
        axis.semilogy(x, density(s["ritz"], x, 0.01 * (high - low)), label=label)
    axis.set(xlabel="eigenvalue", ylabel="density", title="Hessian of the loss", ylim=(1e-10, None))
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def eval_command(a) -> str:
    """Show the accuracy on multiple choice and minimal pairs, and the perplexity of a text."""
    need(a.task or a.text, "eval: --task=FILE.jsonl or --text=FILE is needed")
    tasks = {Path(path).stem: read_task(path)[:a.items or None] for path in a.task
             if path != "python"}
    model, enc, _ = open_model(a.checkpoint, a.device, DTYPES[a.dtype])
    if "python" in a.task:
        tasks |= python_tasks(enc, a.items or 2000)
    limit = model.config.block_size
    need(a.stride <= limit, f"--stride={a.stride}: at most the context of {limit}")
    batch_tokens = a.batch_tokens or (1024 if a.device == "cpu" else 32_768)
    found = {name: evaluate_task(model, enc, task, batch_tokens)
             for name, task in tqdm(tasks.items(), "tasks", disable=None, leave=False)}
    lines, rows = [], []
    for name, r in found.items():
        accuracy = (f"{100 * r[key]:.2f} ± {100 * r[f'{key}_se']:.2f}"
                    for key in ("sum", "per_character"))
        rows.append((name, f"{r['items']:,}", *accuracy, f"{100 * r['chance']:.1f}",
                     f"{r['sum_ties']}, {r['per_character_ties']}", r["cut"], r["left_out"]))
    if len(found) > 1:
        means = (f"{100 * mean([r[key] for r in found.values()]):.2f}"
                 for key in ("sum", "per_character", "chance"))
        rows.append(("mean", sum(r["items"] for r in found.values()), *means, "", "", ""))
    if rows:
        heading = ("task", "items", "accuracy by sum, %", "per character, %", "chance", "ties",
                   "context cut", "left out")
        lines.append(table(heading, *rows))
    if a.text:
        ids = read_ids(a.text, enc, a.tokens)
        need(len(ids) > 1, f"--text={a.text}: no text in it")
        n_bytes = len(enc.decode_bytes(ids[1:]))
        r = evaluate_text(model, ids, n_bytes, a.stride or limit, batch_tokens)
        lines.append(f"{a.text}: {r['nats']:.4f} ± {r['nats_se']:.4f} nats per token, perplexity "
                     f"{r['perplexity']:.3f}, {r['bits_per_byte']:.4f} bits per byte, over "
                     f"{r['tokens']:,} tokens")
    return "\n".join(lines)


def python_tasks(enc, n: int) -> dict[str, list[tuple[str, list[str], int]]]:
    """n python_pairs from the held-out part of the standard library, a task for each kind."""
    from train import find_files, read_documents, split_documents  # a command may look upwards

    _, held_out = split_documents(read_documents(*find_files("stdlib"), "stdlib"))
    pairs = python_pairs([text for _, text in held_out], 0, n,
                         length=lambda text: len(enc.encode_ordinary(text)))
    return {f"python {kind}": [(context, [right, wrong], 0) for k, context, right, wrong in pairs
                               if k == kind] for kind in PYTHON_KINDS}


def compare_command(a) -> str:
    """Show final losses, and where each run reaches the first one's."""
    return compare(a.runs, a.piece)


def plot_command(a) -> str:
    """Draw losses, scales of weights and drift of multipliers of runs."""
    return plot_runs(a.runs, a.plot)


# --------------------------------------------------------------------------------------------------
# The command line

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
NOT_OURS = "its architecture is not one of model.py's, which this command needs"
DEVICE = {"device": ("", "cpu, cuda, cuda:1, mps; empty: cuda where there is one")}
CONTEXTS = {"context": (0, "tokens in a context; 0: the model's, at most 512"),
            "characters": (0, "cut the text into pieces of so many characters, each a context of "
                           "its own after an end-of-text token; the paper: 512; 0: one sequence"),
            "skip_first": (False, "leave the first position of each context out"), **DEVICE}
PICTURE = {"plot": ("", "also draw a picture to this file")}
POSITIVE = ("distil_steps", "distil_lr", "steps", "probes", "top", "micro_batch")  # others may be 0
# {command: (function, its files, {flag: (default, help, *choices)})}; None: it is required
COMMANDS = {
    "linearity": (linearity_command, "checkpoint", {
        "text": (None, "a text file to read"),
        "tokens": (40_000, "how many of its tokens; 0: all"), **CONTEXTS, **PICTURE}),
    "prune": (prune_command, "checkpoint", {
        "text": (None, "a text file: 3/4 to fit, 1/8 to choose the model to save, 1/8 to report"),
        "tokens": (80_000, "how many of its tokens; 0: all"), **CONTEXTS,
        "blocks": ([1], "how many go, such as 3, or several, such as 1,2,3"),
        "orders": (["full"], "which go first: one or more of " + ", ".join(ORDERS), *ORDERS),
        "arms": ([*ARMS[:3]], "one or more of " + ", ".join(ARMS), *ARMS),
        "protect": ([0], "numbers of blocks that stay, such as 1,12; 0: none"),
        "distil_steps": (200, "steps of distillation"), "distil_lr": (1e-3, "its learning rate"),
        "seed": (0, "of the random order"),
        "out_dir": ("", "folder of the new checkpoint; empty: `pruned` beside the old one")}),
    "curvature": (curvature_command, "checkpoints", {
        "text": (None, "a text file to take the loss on"),
        "tokens": (2048, "how many of its tokens; 0: all"),
        "steps": (32, "Hessian-vector products from each random vector"),
        "probes": (2, "random vectors"), "seed": (0, "of the random vectors"),
        "top": (3, "how many of the largest eigenvalues are shown"),
        "micro_batch": (8, "sequences differentiated at a time"),
        "dtype": ("fp32", "of the weights", "fp32", "fp64"), **DEVICE, **PICTURE}),
    "eval": (eval_command, "checkpoint", {
        "task": ((), "files of JSON lines: ctx, endings, label; or context, choices, label; or "
                 "sentence_good, sentence_bad"),
        "items": (0, "how many items of each file; 0: all"),
        "text": ("", "a text file to take the perplexity of"),
        "tokens": (0, "how many of its tokens; 0: all"),
        "stride": (0, "tokens from window to window; 0: a context, no overlap"),
        "batch_tokens": (0, "tokens in one forward pass; 0: 1,024 on a CPU, else 32,768"),
        "dtype": ("fp32", "of the weights", *DTYPES), **DEVICE}),
    "compare": (compare_command, "runs", {
        "piece": ("", "also the RMS of this kind of matrix, such as head")}),
    "plot": (plot_command, "runs", {
        "plot": ("runs.png", "file to draw to")})}


def main(argv):
    parser = argparse.ArgumentParser(prog="probes.py", description="Measure models; compare runs.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (function, files, flags) in COMMANDS.items():
        what = function.__doc__.split("\n")[0]
        sub = commands.add_parser(name, help=what, description=what)
        sub.add_argument(files, nargs="+" if files.endswith("s") else None)
        for flag, (default, text, *_) in flags.items():
            kind = {"type": str if default is None else type(default)}
            if default is False:
                kind = {"action": "store_true"}
            elif isinstance(default, list):  # separated by commas
                one = type(default[0])
                kind = {"type": lambda text, one=one: [one(word) for word in text.split(",")]}
            elif default == ():
                kind = {"nargs": "+"}
            sub.add_argument(*["-o"] * (flag == "plot"), f"--{flag}", default=default, help=text,
                             required=default is None, **kind)
    a = parser.parse_args(argv)
    check_flags(a)
    if getattr(a, "device", None) == "":
        a.device = "cuda" if torch.cuda.is_available() else "cpu"
    if getattr(a, "plot", ""):
        plotting(a.plot)
    print(COMMANDS[a.command][0](a))


def check_flags(a):
    """Numbers are 0 or more, those of POSITIVE more; where there are choices, the value is of
    them."""
    for flag, (_, _, *choices) in COMMANDS[a.command][2].items():
        value = getattr(a, flag)
        for one in value if isinstance(value, list) else [value]:
            where = f"--{flag}={one}"
            if isinstance(one, (int, float)):
                need(0 <= one < math.inf, f"{where}: has to be 0 or more")
                need(one > 0 or flag not in POSITIVE, f"{where}: has to be more than 0")
            need(not choices or one in choices, f"{where}: one of {', '.join(choices)} is needed")


if __name__ == "__main__":
    command(main)
