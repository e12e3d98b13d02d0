"""probes.py: what can be measured on trained models and on their runs, and the linearity
regularizer.

    python probes.py linearity runs/1 --text notes.txt           # how linear each block is
    python probes.py prune runs/1 --text notes.txt --blocks 1 2  # remove or replace one block, two
    python probes.py curvature runs/1 runs/2 --text notes.txt    # eigenvalues of the Hessian
    python probes.py eval runs/1 --task python hellaswag.jsonl --text notes.txt    # accuracy
    python probes.py compare runs/plain-? runs/let-?    # final losses, against the first group
    python probes.py plot runs/plain-? runs/let-? --plot=runs.png    # losses, scales of the weights

Linearity is from "Your Transformer is Secretly Linear" (Razzhigaev et al. 2024, arXiv 2405.12250).
Section numbers below are that paper's.

Names and symbols
    B, T        a batch is (B, T) token ids: B contexts of T tokens
    state       the residual stream of a token: state 0 is the embedding output, state k the output
                of block k, before any final norm
    d           the width of a state; model.py calls it C
    X, Y        (n, d) states of n tokens before and after a block; D = Y - X is what the block adds
    full, free  the linearity scores of (X, Y) and of (X, D); `free` is the paper's residual-free
    N, H        the number of parameters; the (N, N) Hessian of the mean loss
    W, W~       a weight matrix that the optimizer changes, and the one that the model uses: with
                multipliers r and c, W~ = diag(r) W diag(c) (optim.py)
    piece       a kind of weight matrix: q, k, v, o, gate, up, down, embed, head, ...
    run         a folder that train.py wrote. Runs NAME-SEED that differ in the seed form a group
"""
import argparse
import ast
import builtins
import contextlib
import copy
import functools
import io
import itertools
import json
import math
import random
import statistics
import tokenize
import warnings
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

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
    Parser,
    Term,
    checkpoint_file,
    command,
    device_exists,
    encode,
    log_likelihoods,
    logical_pieces,
    new_folder,
    next_token_loss,
    positive,
    read_json_lines,
    read_text,
    reading,
    save_checkpoint,
    tokenizer_from_dict,
    written_whole,
)

# --------------------------------------------------------------------------------------------------
# Linearity: the score


def linearity_score(X, Y) -> float:
    """How well an affine map predicts Y from X, both (n, d), one row a token: from 0 to 1, a
    perfect prediction (section 3.1).

        1 - min over A of ||X A - Y||^2, with X and Y centered and of Frobenius norm 1

    A is any (d, d) matrix. The score is the R^2 of linear regression with an intercept, pooled over
    channels. The pseudo-inverse takes singular values below max(n, d) * eps * largest as 0."""
    X = X.double() - X.double().mean(0)
    Y = Y.double() - Y.double().mean(0)
    X = X / X.norm()
    Y = Y / Y.norm()
    A = torch.linalg.pinv(X) @ Y
    return 1 - (X @ A - Y).square().sum().item()


def joined(batches):
    """[x, y], the states of all tokens before and after a block, each (n, d) in float64. batches:
    such a pair for each batch, each (..., d)."""
    return [torch.cat([h.flatten(0, -2) for h in states]).double() for states in zip(*batches)]


def linearity(fit, held_out) -> dict:
    """The scores of one block. fit, held_out: pairs (x, y) of the states before and after it, each
    (n, d) in float64. An affine map is fitted on the tokens of `fit`. Returns
        n, rank: the number of these tokens, and the rank of their states before the block
        full, free: linearity_score of (x, y) and of (x, y - x) on these tokens, as the authors
            compute them. They are too high where n is not many times d
        full_held_out, free_held_out: R^2 of the fitted map on `held_out`. It can be negative
        ratio_mean: mean over tokens of ||D_i|| / ||Y_i||: how much the block adds (figure 3)
        cosine: mean over tokens of cos(X_i, Y_i)

    One fit, of D on X, serves both scores. As Y = X + D, both have the same error, and
    1 - full = (1 - free) ||D||^2 / ||Y||^2, with D and Y centered. A block that adds little thus
    has a high full score, however nonlinear D is. A block that adds nothing has no residual-free
    score (nan). X often has less than full rank, as where few tokens are distinct: eigenvalues of
    X^T X below d * eps * largest count as 0, the default of torch."""
    x, y = fit
    mean_x, mean_d = x.mean(0), (y - x).mean(0)
    X = x - mean_x
    XX = X.mT @ X
    A = torch.linalg.pinv(XX, hermitian=True) @ (X.mT @ (y - x))  # X is centered: D need not be
    scores = {"n": len(x), "rank": torch.linalg.matrix_rank(XX, hermitian=True).item(),
              "cosine": F.cosine_similarity(x, y, dim=1).mean().item(),
              "ratio_mean": ((y - x).norm(dim=1) / y.norm(dim=1)).mean().item()}
    for (before, after), suffix in ((fit, ""), (held_out, "_held_out")):
        D = after - before
        error = ((before - mean_x) @ A - (D - mean_d)).square().sum().item()
        for name, target in (("full", after), ("free", D)):
            size = (target - target.mean(0)).square().sum().item()
            scores[name + suffix] = 1 - error / size if size > 0 else math.nan
    return scores


@torch.no_grad()
def linearity_profile(model, batches, skip_first=False) -> list[dict]:
    """linearity() of every block over batches of token ids (B, T): the even ones to fit, the odd
    ones held out. The authors leave the last block out, as its state in transformers has the final
    norm; here it has not. All states are kept, on the CPU: 4 bytes * tokens * d * (blocks + 1).
    skip_first: leave position 0 out. Its states can be a hundred times as large as others (an
    attention sink) and then carry nearly all of the variance."""
    numbers = tuple(range(model.config.n_layer + 1))  # of the states
    kept = []
    for idx in progress(batches, "linearity", unit="batch"):
        _, states = model.trunk(idx, hidden=numbers)
        kept.append([h[:, int(skip_first):].cpu() for h in states])
    profile = []
    for k in numbers[1:]:
        pairs = [states[k - 1:k + 1] for states in kept]
        profile.append({"block": k, **linearity(joined(pairs[::2]), joined(pairs[1::2]))})
    return profile


# --------------------------------------------------------------------------------------------------
# Linearity: the regularizer


def linearity_penalty(states, kind="cosine"):
    """The pretraining regularizer (section 4), 0-d float32. It pulls neighboring states together,
    which looks like a way to more linear blocks. The paper reports the opposite: the residual-free
    score falls.

        cosine: sum_i mean over tokens of 1 - cos(h_i, h_{i-1})
        mse:    sum_i mean over tokens of ||h_i - h_{i-1}||^2

    The first is half of the second on normalized states, as ||a - b||^2 = 2 - 2 cos(a, b) for unit
    vectors. states: h_0, ..., h_L, each (B, T, d). The paper does not say whether tokens and blocks
    are summed or averaged, whether the sum begins at h_0, nor which of two states gets the
    gradient. Here tokens are averaged, blocks are summed, and both states get it."""
    states = [h.float() for h in states]
    if kind == "cosine":
        states = [F.normalize(h, dim=-1, eps=1e-8) for h in states]
    penalty = sum((upper - lower).square().sum(-1).mean()
                  for lower, upper in itertools.pairwise(states))
    return penalty / 2 if kind == "cosine" else penalty


# The values of --linearity. A new regularizer is a new entry: its name, and a function of
# [h_0, ..., h_L], each (B, T, d).
PENALTIES = {
    "cosine": linearity_penalty,
    "mse": functools.partial(linearity_penalty, kind="mse"),
}


class Linearity(Term):
    """The term of the loss: one of PENALTIES, of all states, times a weight that does not change.
    The paper's weights: cosine 0.5; mse 0.5 and 2."""

    name = "linearity"

    def __init__(self, penalty: str, weight: float, n_layer: int):
        self.penalty = PENALTIES[penalty]
        self.constant = weight
        self.hidden = tuple(range(n_layer + 1))

    def weight(self, step):
        return self.constant

    def __call__(self, p):
        loss = self.penalty([p.states[k] for k in self.hidden])
        return loss, {"linearity_loss": loss.detach()}


# --------------------------------------------------------------------------------------------------
# Pruning (section 5). The most linear blocks are removed. According to the paper it is better to
# replace each of them by an affine map, and better still to train these maps until they give the
# states of the whole model. The paper gives no details. Here blocks are scored once, on the whole
# model. A map has a bias and replaces the residual connection too. Maps are fitted from the first
# block to the last, each on the output of those before it, to the states of the whole model.

ORDERS = ("full", "free", "cosine", "random")  # which blocks go first: see prune_order
# What happens to them. remove: they are left out. replace: an affine map takes the place of each.
# distill: these maps are trained. distill_all: all parameters are trained.
ARMS = ("remove", "replace", "distill", "distill_all")


def prune_order(profile, order: str, seed=0) -> list[int]:
    """Numbers of the blocks in the order of their removal: by falling score `full` or `free`, by
    falling `cosine` of the states before and after (rising Block Influence, 1 - cosine, of
    ShortGPT, arXiv 2403.03853), or `random`. profile: from linearity_profile. A block that adds
    nothing has a `free` of nan and is removed first."""
    ordered = [*profile]
    if order == "random":
        random.Random(seed).shuffle(ordered)
    else:
        ordered.sort(key=lambda p: -math.inf if math.isnan(p[order]) else -p[order])
    return [p["block"] for p in ordered]


def with_blocks(model: GPT, blocks) -> GPT:
    """The model with other blocks, a list of modules. All parameters are shared with `model`, not
    copied."""
    new = copy.copy(model)
    new.config = replace(model.config, n_layer=len(blocks), mixer="".join(b.kind for b in blocks))
    modules = torch.nn.ModuleList(blocks)
    new._modules = {**model._modules, "blocks": modules}  # a new dict: the copy shares the old one
    return new


def remove_blocks(model: GPT, chosen) -> GPT:
    """The model without the blocks of these numbers."""
    left = [block for k, block in enumerate(model.blocks, start=1) if k not in chosen]
    return with_blocks(model, left)


def fit_affine(fit, held_out):
    """(W (d, d), b (d,)) of the map y = x + W x + b, float64. fit, held_out: pairs (x, y) of
    states, (n, d) each.

    Ridge regression on W, not on I + W, because a block is near the identity: min over B = W^T of
    ||X B - D||^2 + ridge ||B||^2, X and D = Y - X centered on `fit`. The ridge, in units of the
    largest eigenvalue of X^T X, is the one of inf, 1, 0.1, ..., 1e-12 with the smallest error of
    the map on `held_out`. A ridge of inf gives W = 0, a constant b."""
    (x, y), (other_x, other_y) = fit, held_out
    mean_x, mean_d = x.mean(0), (y - x).mean(0)
    X = x - mean_x
    e, V = torch.linalg.eigh(X.mT @ X)
    projected = V.mT @ (X.mT @ (y - x))  # X is centered: D need not be

    def solve(ridge):
        B = V @ (projected / (e.clamp(min=0) + ridge * e[-1])[:, None])
        return B, mean_d - mean_x @ B

    def error(solution):
        B, b = solution
        return (other_x + other_x @ B + b - other_y).norm().item()

    ridges = (math.inf, *(10.0 ** -j for j in range(13)))
    B, b = min(map(solve, ridges), key=error)
    return B.mT, b


@torch.no_grad()
def replace_blocks(model: GPT, chosen, batches, skip_first=False) -> GPT:
    """The model with an affine map in place of each chosen block. batches: 4 or more, of token ids
    (B, T); every fourth one chooses the ridge."""
    first = int(skip_first)
    blocks = [*model.blocks]
    new = model
    for k in sorted(chosen):
        pairs = []
        for idx in batches:
            x, _ = new.trunk(idx, blocks=k - 1)
            y, _ = model.trunk(idx, blocks=k)
            pairs.append((x[:, first:].cpu(), y[:, first:].cpu()))
        held_out = joined(pairs[3::4])
        del pairs[3::4]
        W, b = fit_affine(joined(pairs), held_out)
        block = AffineBlock(model.config).to(batches[0].device)
        block.affine.weight.copy_(W / block.scale)  # the block multiplies by it
        block.affine.bias.copy_(b / block.scale)
        blocks[k - 1] = block
        new = with_blocks(model, blocks)
    return new


def distill_states(model: GPT, whole: GPT, batches, steps: int, lr: float, everything=False) -> GPT:
    """A copy of the model, trained to give the states of the whole model on batches of token ids
    (B, T): the affine maps alone, or with `everything` all parameters. AdamW; the learning rate
    falls linearly to 0. The loss is the mean of ||h - h*||^2 / ||h*||^2 over the states h from the
    first affine map on, with norms over all tokens; h* is the state of the whole model."""
    model = copy.deepcopy(model).requires_grad_(everything)
    for block in model.blocks:
        if isinstance(block, AffineBlock):
            block.requires_grad_(True)
    first = model.config.kinds().index("L") + 1
    numbers = tuple(range(first, model.config.n_layer + 1))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.95), weight_decay=0.0)
    for step in progress(range(steps), "distilling", unit="step"):
        idx = batches[step % len(batches)]
        with torch.no_grad():
            _, wanted = whole.trunk(idx, hidden=numbers)
        _, states = model.trunk(idx, hidden=numbers)
        errors = [(h - w).square().sum() / w.square().sum() for h, w in zip(states, wanted)]
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        (sum(errors) / len(errors)).backward()
        optimizer.step()
    return model.requires_grad_(False)


@torch.no_grad()
def mean_loss(model, batches) -> float:
    """Nats per token over batches of token ids (B, T), T the same in all; positions 1 to T - 1 are
    predicted."""
    losses = [model.loss(model(idx[:, :-1])[0], idx[:, 1:]).item() * len(idx) for idx in batches]
    return sum(losses) / sum(map(len, batches))


# --------------------------------------------------------------------------------------------------
# Curvature: the eigenvalues of the Hessian of the loss, from products of it with vectors. A summary
# of the LET paper (arXiv 2602.05393) says that LET makes them less dispersed, and not how they were
# measured.


def hessian_product(model, batches):
    """The function v -> H v, both (N,), where H is the Hessian of the loss L with respect to the
    vector w of all parameters: H v = d/dw (dL/dw . v) (Pearlmutter 1994). L is the mean over all
    tokens of `batches`, pairs (idx, targets) of (B, T). It has a form that can be differentiated
    twice: all logits at once, attention as plain products. The choices of a router count as fixed:
    where they change there is no derivative."""
    params = list(model.parameters())
    sizes = [p.numel() for p in params]
    tokens = sum(idx.numel() for idx, _ in batches)

    def product(v):
        total = torch.zeros_like(v)
        for idx, targets in batches:
            with sdpa_kernel(SDPBackend.MATH):
                logits = model.logits(model(idx)[0])
            loss = next_token_loss(logits.flatten(0, 1), targets.flatten()) / tokens
            gradient = torch.autograd.grad(loss, params, create_graph=True)
            slope = sum((g * part.view_as(g)).sum() for g, part in zip(gradient, v.split(sizes)))
            second = torch.autograd.grad(slope, params, materialize_grads=True)
            total += torch.cat([h.flatten() for h in second])
        return total

    return product


def lanczos(product, v, steps: int):
    """Estimates of the eigenvalues of a symmetric matrix H, given as the function v -> H v, from
    `steps` products.

    v: (N,), the first vector, of any norm. Builds an orthonormal basis of v, H v, H^2 v, ... and
    the tridiagonal matrix T of H in it. Each new vector is orthogonalized twice against all before
    it; otherwise rounding would give copies of eigenvalues that have converged. It stops early
    where nothing is left: where the norm of the new vector is rounding, at most 100 eps times the
    largest of T. Memory: `steps` vectors.

    Returns three float64 vectors (m,), m <= steps: the eigenvalues theta of T, rising, called Ritz
    values, of which the extreme ones converge first; weights w, the squared first components of T's
    eigenvectors, with sum_i w_i theta_i^k = v^T H^k v / v^T v for all k < 2 m (Gauss quadrature);
    bounds on the distance of each theta to the nearest eigenvalue of H: the norm of the vector that
    would come next, times the last component of T's eigenvector."""
    Q = v.new_empty(steps, len(v))
    alpha = []
    beta = []
    Q[0] = v / v.norm()
    for k in progress(range(steps), "Lanczos", unit="product"):
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


def spectrum(model, batches, steps=32, probes=2) -> dict:
    """Eigenvalues of the Hessian, and means over all of them, by `steps` steps of Lanczos from each
    of `probes` random vectors of signs. batches: as in hessian_product. Computes in the dtype of
    the model, and lets all its parameters require gradients. Returns
        parameters: N
        top, least: the three largest eigenvalues, falling, and the most negative one, all from the
            first vector
        residual: a bound on the error of each of these
        trace, rms: the sum of all N eigenvalues, and their root mean square. With w and theta of
            lanczos, sum_i w_i theta_i^k estimates the mean of the k-th powers of all eigenvalues;
            here averaged over the vectors (stochastic Lanczos quadrature; for networks Ghorbani et
            al. 2019, arXiv 1901.10159)"""
    params = list(model.requires_grad_(True).parameters())
    N = sum(p.numel() for p in params)
    product = hessian_product(model, batches)
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(probes):
        signs = torch.randint(2, (N,), generator=generator) * 2 - 1
        found.append(lanczos(product, signs.to(params[0]), steps))  # to its device and dtype
    theta, _, bounds = found[0]
    return {"parameters": N, "top": theta.flip(0)[:3].tolist(), "least": theta[0].item(),
            "residual": max(bounds[0], bounds[-3:].max()).item(),
            "trace": N * statistics.fmean((w @ theta).item() for theta, w, _ in found),
            "rms": statistics.fmean((w @ theta.square()).item() for theta, w, _ in found) ** 0.5}


# --------------------------------------------------------------------------------------------------
# Evaluation: multiple choice and minimal pairs by the log-likelihood of each choice; perplexity


def read_task(path) -> list[tuple[str, list[str], int]]:
    """(context, choices, number of the right one) of each line of a file of JSON objects:
    HellaSwag's ctx, endings, label; context, choices, label; or BLiMP's sentence_good,
    sentence_bad, which are two choices without a context. Raises BadInput with the file and the
    line."""
    items = read_json_lines(path, read_item, "--task=")
    require(items, f"--task={path}: no line in it")
    return items


def read_item(record: dict) -> tuple[str, list[str], int]:
    """One record of read_task. Raises an error that says what is wrong."""
    if "sentence_good" in record:
        context, choices, label = "", [record["sentence_good"], record["sentence_bad"]], 0
    elif "ctx" in record:
        context, choices, label = record["ctx"], record["endings"], record["label"]
    else:
        context, choices, label = record["context"], record["choices"], record["label"]
    label = int(str(label))  # HellaSwag has "3"
    if not (isinstance(choices, list) and len(choices) > 1 and isinstance(context, str)
            and all(isinstance(choice, str) and choice.strip() for choice in choices)):
        raise ValueError("context: a text, and choices: two or more texts, are needed")
    if not 0 <= label < len(choices):
        raise ValueError(f"label: a number from 0 to {len(choices) - 1} is needed")
    return context, choices, label


def encode_pair(enc, context: str, choice: str) -> tuple[list[int], int]:
    """(token ids: end of text, context, choice; position of the choice's first token). The boundary
    is lm-evaluation-harness's: one space between the two, if the context is not empty and neither
    has a blank there. It belongs to the choice, as do all blanks at the end of the context. Both
    are encoded together and cut where the context encoded alone ends. A choice has at least one
    token."""
    if context and not (context[-1].isspace() or choice[0].isspace()):
        choice = " " + choice
    ids = encode(enc, context + choice)
    start = len(encode(enc, context.rstrip()))
    return [enc.eot_token, *ids], 1 + min(start, len(ids) - 1)


def with_targets(ids, start: int, limit=math.inf):
    """(inputs, targets), two lists of equal length, of token ids of which those from position
    `start` on are scored. Of a sequence longer than `limit` the beginning is left out."""
    cut = max(0, len(ids) - limit)
    ids = ids[cut:]
    start = max(1, start - cut)
    return ids[:-1], [IGNORE] * (start - 1) + ids[start:]


def credit(scores, label: int) -> float:
    """1 if the label's score is the highest, its share of 1 in a tie, else 0. Scores that differ by
    less than 1e-5 of themselves, which is rounding, are a tie."""
    best = max(scores)
    top = [k for k, score in enumerate(scores) if best - score <= 1e-5 * abs(best)]
    return (label in top) / len(top)


def evaluate_task(model, enc, task, batch_tokens=1024) -> dict:
    """Accuracy of multiple choice on a task, [(context, choices, label)]. Returns
        items: their number
        scores: for each item the summed log-likelihood of each choice, in nats
        sum, per_character: accuracy by these sums, and by the sums over the characters of the
            choice (the harness's acc and acc_norm)
        sum_se, per_character_se: their standard errors
        chance: the accuracy of guessing
        cut: how many items lost the beginning of a context to fit the model's"""
    limit = model.context_limit + 1
    encoded = [[encode_pair(enc, context, choice) for choice in choices]
               for context, choices, _ in task]
    sequences = [with_targets(ids, start, limit) for pairs in encoded for ids, start in pairs]
    found = iter(log_likelihoods(model, sequences, batch_tokens * model.config.vocab_size))
    scores = []
    by_sum = []
    by_character = []
    for _, choices, label in task:
        sums = [total for total, _ in itertools.islice(found, len(choices))]
        scores.append(sums)
        by_sum.append(credit(sums, label))
        each = [total / len(choice) for total, choice in zip(sums, choices)]
        by_character.append(credit(each, label))
    return {"items": len(task), "scores": scores,
            "sum": statistics.fmean(by_sum), "sum_se": standard_error(by_sum),
            "per_character": statistics.fmean(by_character),
            "per_character_se": standard_error(by_character),
            "chance": statistics.fmean(1 / len(choices) for _, choices, _ in task),
            "cut": sum(any(len(ids) > limit for ids, _ in pairs) for pairs in encoded)}


def standard_error(values) -> float:
    """The standard error of the mean; nan for a single value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def evaluate_text(model, ids, n_bytes: int, stride: int, batch_tokens=1024) -> dict:
    """Perplexity and bits per byte of a text of n_bytes bytes. ids: a list, an end-of-text token
    and then the text's tokens. All but the first are scored, each once.

    A window scores the next `stride` tokens; the last window scores those that are left. Its inputs
    are the block_size tokens before its last scored token, or fewer where the text begins later.
    Make the windows by with_targets, and score all by model.log_likelihoods with at_once =
    batch_tokens * vocab_size. Returns a dict: nats, the mean per scored token; perplexity,
    exp(nats); bits_per_byte, the sum in bits over n_bytes."""
    windows = []
    for begin in range(1, len(ids), stride):
        end = min(begin + stride, len(ids))
        first = max(0, end - model.config.block_size - 1)
        windows.append(with_targets(ids[first:end], begin - first))
    found = log_likelihoods(model, windows, batch_tokens * model.config.vocab_size)
    total = -sum(value for value, _ in found)
    nats = total / (len(ids) - 1)
    return {"nats": nats, "perplexity": math.exp(nats),
            "bits_per_byte": total / math.log(2) / n_bytes}


# --------------------------------------------------------------------------------------------------
# Minimal pairs from Python files: a downstream task that needs no download. Of two lines that may
# follow the same code, one is the file's and the other differs from it in one token.

SWAPS = {  # tokens that replace one another
    "bracket": "( ) [ ] { }".split(),
    "operator": "= == != < > + - * / . , : % += | &".split(),
    "keyword": "if in is not and or for else return import from as del lambda raise assert yield "
               "while with def".split()}
PYTHON_KINDS = (*SWAPS, "indent", "name")


class Pair(NamedTuple):
    kind: str
    context: str
    right: str
    wrong: str


def python_pairs(documents, seed: int, n: int, length=lambda text: 0) -> list[Pair]:
    """n minimal pairs from documents, the texts of Python files. Fewer than n are returned if the
    documents have no more.

    context is the beginning of a function or class of the file, up to the end of a line; right is
    the file's next statement, one whole line; wrong differs from it in one token:

        bracket     a bracket became another one
        operator    an operator became another one
        keyword     a keyword became another one
        indent      the line begins at a depth at which no line can begin here
        name        a local name or parameter became a name that the file does not contain

    context + right parses. context + wrong does not parse with the first four kinds; with `name` it
    does, and reads a name that nothing has bound. The five kinds are equally many as far as the
    documents allow, and no document gives more than 5 % of the pairs (or twice its share).

    The wrong token must not be recognizable by being rare: token a becomes b as often as b becomes
    a. Indents become deeper as often as shallower, names more frequent as often as rarer.

    length: a function of a text. Pairs are left out where length(context + right) and
    length(context + wrong) differ. With the number of tokens as length, a model that only prefers
    the shorter side is right in half of the pairs."""
    rng = random.Random(seed)
    names = [node.id for text in documents for node in nodes_of(text, ast.Name)]
    counts = Counter(names)
    statements = [(text, *found) for text in documents for found in statements_of(text)]
    rng.shuffle(statements)
    pairs = []
    changes = Counter()  # how often a became b, by (a, b)
    of_kind = Counter()
    of_document = Counter()
    most = max(5, n / 20, 2 * n / len(documents))
    for text, context, right in statements:
        if of_document[text] >= most:
            continue
        foreign = [name for name in rng.choices(names, k=60)
                   if name not in text and not hasattr(builtins, name)]
        kinds = [kind for kind in PYTHON_KINDS if of_kind[kind] < n / len(PYTHON_KINDS)]
        kinds.sort(key=of_kind.__getitem__)  # the one with the fewest pairs first
        candidates = (found for kind in kinds
                      for found in spoiled(kind, context, right, foreign, counts, rng))
        for pair, old, new in candidates:
            balanced = changes[old, new] <= changes[new, old]
            if balanced and length(context + right) == length(context + pair.wrong):
                pairs.append(pair)
                changes[old, new] += 1
                of_kind[pair.kind] += 1
                of_document[text] += 1
                break
    return pairs[:n]


def parsed(text: str):
    """The syntax tree of a text, or None."""
    with warnings.catch_warnings(), contextlib.suppress(SyntaxError, ValueError, RecursionError):
        warnings.simplefilter("ignore")
        return ast.parse(text)


def nodes_of(text: str, node_class) -> list:
    """The nodes of this class in the syntax tree of a text; none if it does not parse."""
    tree = parsed(text)
    return [node for node in ast.walk(tree) if isinstance(node, node_class)] if tree else []


def statements_of(text: str):
    """(context, statement) for each statement that has a line to itself, inside a function or class
    at the top level of the file. Statements of the first two lines and docstrings are left out.
    Context and statement together have fewer than 900 characters."""
    tree = parsed(text)
    lines = text.split("\n")
    body = tree.body if tree else []
    for top in [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]:
        for node in ast.walk(top):
            if not isinstance(node, ast.stmt) or node.lineno < top.lineno + 2:
                continue
            right = lines[node.lineno - 1]
            context = "\n".join([*lines[top.lineno - 1:node.lineno - 1], ""])
            alone = (node.lineno == node.end_lineno
                     and right.strip() == right[node.col_offset:node.end_col_offset])
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if alone and not docstring and len(context + right) < 900:
                yield context, right + "\n"


def spoiled(kind: str, context: str, right: str, foreign, counts, rng):
    """(pair, old, new) for the lines that differ from `right` in one token as `kind` says, in
    random order. old became new: a token another one; with `indent` less became more, or the other
    way round; with `name` likewise rare and frequent. foreign: names that the file does not
    contain; counts: how often each name occurs in all files."""
    line = right.lstrip()
    depth = len(right) - len(line)
    found = []  # (wrong line, old, new)
    if kind == "indent":
        for new in (*range(0, depth, 4), depth + 4, depth + 8):
            sides = ("less", "more") if new > depth else ("more", "less")
            found.append((" " * new + line, *sides))
    else:
        arguments = {node.arg for node in nodes_of(context + right, ast.arg)}
        old_tokens = SWAPS.get(kind) or arguments | names_in(context + right, ast.Store)
        for token in tokenize.generate_tokens(io.StringIO(line).readline):
            old = token.string
            start = depth + token.start[1]
            if old in old_tokens:
                found += [(right[:start] + new + right[start + len(old):], old, new)
                          for new in SWAPS.get(kind, foreign) if new != old]
    rng.shuffle(found)
    if not parsed(context + right):
        return
    for wrong, old, new in found:
        if kind == "name":
            broken = new in names_in(context + wrong, ast.Load)
            rarer = counts[new] < counts[old]
            old, new = ("frequent", "rare") if rarer else ("rare", "frequent")
        else:
            broken = parsed(context + wrong) is None
        if broken:
            yield Pair(kind, context, right, wrong), old, new


def names_in(text: str, use) -> set[str]:
    """The variables that a text reads (use: ast.Load) or assigns to (ast.Store)."""
    return {node.id for node in nodes_of(text, ast.Name) if isinstance(node.ctx, use)}


# --------------------------------------------------------------------------------------------------
# Scales of the weights


@torch.no_grad()
def weight_scales(model, multipliers=None) -> dict:
    """{piece: {rms, rms_effective, spread}} over all blocks, for metrics.jsonl. multipliers: of
    optim.py, which holds W; without it W is W~.

    rms, rms_effective: root mean squares of W and of W~. spread: the standard deviation of log(RMS
    of a row of W~ over the mean of these in its matrix), without rows of zeros. The multipliers'
    paper (arXiv 2601.04890, section 3.1) draws these ratios as histograms, and calls them the
    diversity of feature scales; one number is ours."""
    stored = multipliers.W if multipliers else {}
    found = {}  # {piece: [(mean squares of the rows of W, of W~) of each matrix]}
    for name, pieces in logical_pieces(model).items():
        used = model.get_parameter(name)
        sizes = [rows for _, rows in pieces]
        squares = (w.flatten(0, -2).square().mean(1).split(sizes)
                   for w in (stored.get(name, used), used))
        for (piece, _), of_W, of_used in zip(pieces, *squares):
            found.setdefault(piece, []).append((of_W, of_used))
    weights = {}
    for piece, matrices in found.items():
        rms, effective = (torch.cat(rows).mean().sqrt().item() for rows in zip(*matrices))
        norms = [rows[rows > 0].sqrt() for _, rows in matrices]
        logs = torch.cat([(norm / norm.mean()).log() for norm in norms])
        spread = logs.std().item() if len(logs) > 1 else None
        weights[piece] = {"rms": rms, "rms_effective": effective, "spread": spread}
    return weights


# --------------------------------------------------------------------------------------------------
# Runs: what train.py wrote into metrics.jsonl, as tables and plots over seeds


def read_lines(run) -> list[dict]:
    """The lines of a run's metrics.jsonl. A killed run can leave half a line, which is left out.
    Raises BadInput."""
    return read_json_lines(Path(run, "metrics.jsonl"), checked_line, cut=True)


def checked_line(line: dict) -> dict:
    """A line of metrics.jsonl as it is. Raises an error if it lacks numbers that every line has."""
    names = ["step", "tokens", "flops", "seconds"]
    if "val_loss" in line:
        names += ["val_loss", "bits_per_byte"]
    if not all(isinstance(line[name], (int, float)) for name in names):
        raise ValueError(f"{', '.join(names)}: must be numbers")
    return line


def flat(line: dict) -> dict:
    """{"a": {"b": {"c": 1}}} as {"a b c": 1}."""
    made = {}
    for key, value in line.items():
        if isinstance(value, dict):
            made |= {f"{key} {name}": inside for name, inside in flat(value).items()}
        else:
            made[key] = value
    return made


def read_evaluations(run) -> list[dict]:
    """The lines of a run's metrics.jsonl with a held-out loss. If the run stopped before its last
    step, as a diverged one does, the last loss is infinite."""
    lines = [line for line in read_lines(run) if "val_loss" in line]
    require(lines, f"{Path(run, 'metrics.jsonl')}: no evaluation in it")
    config = Path(run, "config.json")
    with reading(config):
        unfinished = config.exists() and lines[-1]["step"] < json.loads(config.read_text())["steps"]
    if unfinished:
        lines[-1] |= {"val_loss": math.inf, "bits_per_byte": math.inf}
    return lines


def grouped(runs, read) -> dict[str, dict]:
    """{NAME: {SEED: read(folder)}} of folders NAME-SEED; one without a dash has an empty seed.
    Raises BadInput for a second folder of the same name and seed."""
    groups = {}
    for run in runs:
        head, dash, tail = Path(run).resolve().name.rpartition("-")
        name, seed = (head, tail) if dash else (tail, "")
        group = groups.setdefault(name, {})
        require(seed not in group, f"{run}: the second run {name} of this seed")
        group[seed] = read(run)
    return groups


COSTS = ("step", "flops", "seconds")


def first_reached(lines, loss: float) -> dict | None:
    """The COSTS at which the held-out loss first comes down to `loss`, on the straight line between
    the evaluations around it. None if it never does."""
    if lines[0]["val_loss"] <= loss:
        return lines[0]
    for before, after in itertools.pairwise(lines):
        if after["val_loss"] <= loss < before["val_loss"]:
            fraction = (before["val_loss"] - loss) / (before["val_loss"] - after["val_loss"])
            return {cost: before[cost] + fraction * (after[cost] - before[cost]) for cost in COSTS}
    return None


def mean_sd(values, digits: int) -> str:
    """Mean ± standard deviation, as text; empty without values. A value that is not finite is of a
    run that did not finish."""
    if not values:
        return ""
    if not all(map(math.isfinite, values)):
        return "did not finish"
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def compare_command(a) -> str:
    """Show final losses, and where each run reaches the first one's.

    A table over groups of runs (folders NAME-SEED), mean ± standard deviation over seeds: the
    final held-out loss, and the steps, FLOPs and seconds at which a run reaches the reference. The
    reference is the final loss of the first group's run of the same seed. These costs are given as
    shares of what the reference run took. Two runs of a seed share their initial weights and the
    order of their data; so they are compared in pairs."""
    groups = grouped(a.runs, read_evaluations)
    reference = next(iter(groups.values()))
    heading = ("run", "seeds", "held-out nats", "minus the first", "bits per byte",
               "seeds that reach the first", "steps to it, %", "FLOPs, %", "seconds, %")
    return table(heading, *(compare_row(name, group, reference) for name, group in groups.items()))


def compare_row(name: str, group: dict, reference: dict) -> list:
    """The cells of a group of runs in compare's table. group, reference: {seed: evaluations}. A
    cost of 0 has no shares."""
    differences = []
    reached = []  # (where a run reaches the reference, where the reference ends)
    for seed, lines in group.items():
        require(seed in reference, f"{name}-{seed}: the first group has no run of this seed")
        target = reference[seed][-1]
        differences.append(lines[-1]["val_loss"] - target["val_loss"])
        found = math.isfinite(target["val_loss"]) and first_reached(lines, target["val_loss"])
        if found:
            reached.append((found, target))
    final = [lines[-1] for lines in group.values()]
    shares = ([100 * found[cost] / target[cost] for found, target in reached if target[cost]]
              for cost in COSTS)
    return [name, len(group), mean_sd([line["val_loss"] for line in final], 4),
            mean_sd(differences, 4), mean_sd([line["bits_per_byte"] for line in final], 4),
            len(reached), *(mean_sd(share, 1) for share in shares)]


def plot_command(a) -> str:
    """Draw losses and scales of the weights of runs.

    Held-out loss over steps, tokens, FLOPs and seconds. Over steps also the cosine of LET and the
    scales of the weights (weight_scales), if runs have them. Each run is a line, and each group of
    runs NAME-SEED has a color. The first tenth of a line is left out."""
    pyplot = plotting(a.plot)
    groups = grouped(a.runs, lambda run: [flat(line) for line in read_lines(run)])
    every = [line for group in groups.values() for lines in group.values() for line in lines]
    keys = dict.fromkeys(itertools.chain(*every))  # in the order in which they appear
    require("val_loss" in keys, f"{a.runs[0]}/metrics.jsonl: no evaluation in it")
    panels = [("val_loss", x) for x in ("step", "tokens", "flops", "seconds")]
    panels += [(key, "step") for key in keys if key.startswith(("let_cosine", "weights"))]
    rows = math.ceil(len(panels) / 4)
    figure, axes = pyplot.subplots(rows, 4, figsize=(18, 3.6 * rows), layout="constrained")
    for axis, (key, x) in zip(axes.flat, panels):
        for color, (name, group) in enumerate(groups.items()):
            for seed, lines in group.items():
                points = [(line[x], line[key]) for line in lines if line.get(key) is not None]
                first = len(points) // 10  # the fall of the loss from ln V would flatten the rest
                axis.plot(*zip(*points[first:]), color=f"C{color}", label=f"{name} {seed}")
        axis.set(title=key, xlabel=x)
        axis.legend(fontsize="small")
    for axis in axes.flat[len(panels):]:
        axis.remove()
    save_figure(figure, a.plot)
    return a.plot


# --------------------------------------------------------------------------------------------------
# Input and output, shared by the commands

progress = functools.partial(tqdm, disable=None, leave=False)  # a bar, shown on a terminal alone


def require(ok, message: str):
    """Raises BadInput with this message unless `ok`."""
    if not ok:
        raise BadInput(message)


def open_model(name, device: str, ours=False):
    """(model, encoding, tokenizer as a checkpoint holds it) of anything that
    teacher.load_pretrained reads, such as a run's folder. The model is frozen and in eval mode.
    ours: refuse what is not a GPT of model.py; for commands that need its blocks or its second
    derivatives."""
    from teacher import load_pretrained

    require(device_exists(device), f"--device={device}: no such device here")
    model, tokenizer = load_pretrained(name, device, flag="")
    require(isinstance(model, GPT) or not ours,
            f"{name}: its architecture is not one of model.py's")
    return model, tokenizer_from_dict(tokenizer), tokenizer


def read_ids(a, enc) -> list[int]:
    """An end-of-text token and the first --tokens tokens (0: all) of --text. Training reads a
    document in the same way. a: the parsed command line, here and below."""
    return [enc.eot_token, *encode(enc, read_text(a.text, "--text="))[:a.tokens or None]]


def read_batches(a, model, enc, n: int, characters=0) -> list:
    """--text as n or more batches of token ids (B, T), B at most 8.

    With `characters`, pieces of so many characters are each read alone after an end-of-text token,
    and a batch is of pieces of equal length T. The authors of the linearity paper read 512
    characters. Else contexts of at most 512 tokens are cut from one sequence, so position 0 of all
    but the first holds whatever token comes there. Raises BadInput if the text is too short: a fit
    to fewer tokens than dimensions is exact and says nothing."""
    ids = read_ids(a, enc)
    longest = model.config.block_size
    where = f"--text={a.text} --tokens={a.tokens}"
    if characters:
        where += f" --characters={characters}"
        text = enc.decode(ids[1:])
        starts = range(0, len(text) - characters + 1, characters)
        contexts = [[enc.eot_token, *encode(enc, text[i:i + characters])][:longest] for i in starts]
    else:
        T = min(512, longest)
        contexts = [ids[i:i + T] for i in range(0, len(ids) - T + 1, T)]
    tokens = sum(map(len, contexts))
    needed = 4 * model.config.n_embd  # 4 a dimension, as some of them are held out
    require(tokens >= needed and len(contexts) >= n, f"{where}: {tokens:,} tokens in "
            f"{len(contexts)} contexts; at least {needed:,} in {n} contexts are needed")
    size = min(8, len(contexts) // n)
    batches = []
    for _, equally_long in itertools.groupby(sorted(contexts, key=len), key=len):
        batches += torch.tensor([*equally_long], device=a.device).split(size)
    return batches


def table(*rows) -> str:
    """Rows of cells as a Markdown table; the first row is the heading."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def plotting(path: str):
    """matplotlib.pyplot without a screen. Raises BadInput if no picture can be written to the path
    or matplotlib is missing."""
    require(Path(path).suffix in (".png", ".pdf", ".svg") and Path(path).parent.is_dir(),
            f"--plot={path}: a .png, .pdf or .svg in a folder that exists is needed")
    try:
        import matplotlib
    except ImportError:
        raise BadInput("--plot: needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


def save_figure(figure, path: str):
    """Written whole or not at all, in the format that the path's suffix names."""
    with written_whole(path) as tmp:
        figure.savefig(tmp, format=Path(path).suffix[1:], dpi=120)


# --------------------------------------------------------------------------------------------------
# Commands


def linearity_command(a) -> str:
    """Show how linear each block of a model is.

    The columns are scores of linearity(). Half of the batches are fitted on."""
    pyplot = plotting(a.plot) if a.plot else None  # a wrong path is refused before the work
    model, enc, _ = open_model(a.checkpoint, a.device)
    batches = read_batches(a, model, enc, 2, a.characters)
    profile = linearity_profile(model, batches, a.skip_first)
    keys = ("full", "full_held_out", "free", "free_held_out", "ratio_mean")
    rows = [(p["block"], *(f"{p[key]:.4f}" for key in keys), p["rank"]) for p in profile]
    if pyplot:
        figure, axis = pyplot.subplots(layout="constrained")
        for key in keys[:4]:
            axis.plot([p["block"] for p in profile], [p[key] for p in profile], "o-", label=key)
        axis.set(xlabel="block", ylabel="linearity score")
        axis.legend()
        save_figure(figure, a.plot)
    n = profile[0]["n"]
    return (f"{n:,} tokens to fit on, {n / model.config.n_embd:.1f} times the width\n\n"
            + table(("block", *keys, "rank"), *rows))


def pruned_models(whole: GPT, fitted, a):
    """(order, arm, numbers of the blocks that went, model): first the whole model, then one for
    each order, number of blocks and arm that is asked for. fitted: the batches to fit on."""
    yield "", "whole", [], whole
    profile = linearity_profile(whole, fitted, a.skip_first)
    for order, count in itertools.product(a.orders, a.blocks):
        chosen = sorted(prune_order(profile, order)[:count])
        replaced = replace_blocks(whole, chosen, fitted, a.skip_first)
        for arm in a.arms:
            if arm == "remove":
                model = remove_blocks(whole, chosen)
            elif arm == "replace":
                model = replaced
            else:
                model = distill_states(replaced, whole, fitted, a.distill_steps, a.distill_lr,
                                       everything=arm == "distill_all")
            yield order, arm, chosen, model


def prune_command(a) -> str:
    """Remove the most linear blocks, or replace them by affine maps.

    A row for every order, number of blocks and arm. Three quarters of the batches are fitted on. Of
    the models with the most blocks gone, the one with the lowest loss on the next eighth is
    written. The table reports the loss on the last eighth, which chooses nothing. What is written
    is read like any other checkpoint; training goes on by train.py --init_from."""
    whole, enc, tokenizer = open_model(a.checkpoint, a.device, ours=True)
    n_layer = whole.config.n_layer
    require(max(a.blocks) < n_layer, f"--blocks={max(a.blocks)}: {a.checkpoint} has {n_layer} "
            "blocks, of which one has to stay")
    out = new_folder(a.out_dir or Path(checkpoint_file(a.checkpoint)).with_name("pruned"),
                     "--out_dir=") / "ckpt.pt"
    batches = read_batches(a, whole, enc, 8)
    eighth = len(batches) // 8
    fitted = batches[:-2 * eighth]
    choosing = batches[-2 * eighth:-eighth]
    reported = batches[-eighth:]
    rows = [("order", "arm", "blocks", "held-out nats", "parameters")]
    lowest = math.inf
    for order, arm, blocks, model in pruned_models(whole, fitted, a):
        rows.append((order, arm, ", ".join(map(str, blocks)), f"{mean_loss(model, reported):.4f}",
                     f"{model.num_params():,}"))
        if len(blocks) == max(a.blocks):
            loss = mean_loss(model, choosing)
            if loss < lowest:
                lowest = loss
                best = order, arm, blocks, model
    if lowest == math.inf:
        raise Failed(f"--arms={','.join(a.arms)} --distill_lr={a.distill_lr:g}: no finite loss")
    order, arm, blocks, model = best
    save_checkpoint(out, {"model": model.state_dict(),
                          "pruned": {"order": order, "arm": arm, "blocks": blocks},
                          "model_config": asdict(model.config), "tokenizer": tokenizer, "step": 0,
                          "config": {}})
    return (f"{table(*rows)}\n\n{out}: {order}, {arm}, blocks {blocks}, chosen by {lowest:.4f} "
            "nats on other tokens")


def curvature_command(a) -> str:
    """Show the extreme eigenvalues of the loss' Hessian, a row a checkpoint.

    The loss is that of --text, on whole contexts of the model. See spectrum."""
    rows = [("checkpoint", "largest eigenvalues", "most negative", "error below", "trace", "rms")]
    for name in a.checkpoints:
        model, enc, _ = open_model(name, a.device, ours=True)
        T = model.config.block_size
        ids = torch.tensor(read_ids(a, enc), device=a.device)
        require(len(ids) > T, f"--text={a.text} --tokens={a.tokens}: {len(ids) - 1} tokens; a "
                f"context of {T} is needed")
        contexts = ids.unfold(0, T + 1, T)  # each begins with the last token of the one before
        batches = [(part[:, :-1], part[:, 1:]) for part in contexts.split(8)]
        found = spectrum(model, batches, a.steps, a.probes)
        rows.append((name, ", ".join(f"{value:.4g}" for value in found["top"]),
                     *(f"{found[key]:.4g}" for key in ("least", "residual", "trace", "rms"))))
    return table(*rows)


def eval_command(a) -> str:
    """Show the accuracy on multiple choice and minimal pairs, and the perplexity of a text."""
    require(a.task or a.text, "eval: --task=FILE.jsonl or --text=FILE is needed")
    model, enc, _ = open_model(a.checkpoint, a.device)
    limit = model.config.block_size
    require(a.stride <= limit, f"--stride={a.stride}: at most the context of {limit}")
    tasks = {}
    for path in a.task:
        if path == "python":
            tasks |= python_tasks(enc, a.items or 2000)
        else:
            tasks[path] = read_task(path)
    rows = [("task", "items", "accuracy by sum, %", "±", "per character, %", "±", "chance, %",
             "context cut")]
    for name, task in tasks.items():
        found = evaluate_task(model, enc, task[:a.items or None], a.batch_tokens)
        percent = (f"{100 * found[key]:.2f}" for key in (
            "sum", "sum_se", "per_character", "per_character_se", "chance"))
        rows.append((name, found["items"], *percent, found["cut"]))
    parts = [table(*rows)] if tasks else []
    if a.text:
        ids = read_ids(a, enc)
        require(len(ids) > 1, f"--text={a.text}: no text in it")
        n_bytes = len(enc.decode_bytes(ids[1:]))
        found = evaluate_text(model, ids, n_bytes, a.stride or limit, a.batch_tokens)
        values = (f"{value:.4f} {key.replace('_', ' ')}" for key, value in found.items())
        parts.append(f"{a.text}: {len(ids) - 1:,} tokens, {', '.join(values)}")
    return "\n".join(parts)


def python_tasks(enc, n: int) -> dict[str, list]:
    """n python_pairs from the held-out part of the standard library as tasks of evaluate_task, one
    for each kind. Both sides of a pair have the same number of tokens."""
    from train import find_files, read_documents, split_documents  # a command may look upwards

    _, held_out = split_documents(read_documents(*find_files("stdlib"), "stdlib"))
    pairs = python_pairs([text for _, text in held_out], 0, n,
                         length=lambda text: len(encode(enc, text)))
    tasks = {}
    for pair in pairs:
        item = (pair.context, [pair.right, pair.wrong], 0)
        tasks.setdefault(f"python {pair.kind}", []).append(item)
    return tasks


# --------------------------------------------------------------------------------------------------
# The command line


def add_command(commands, function, files: str, **numbers):
    """Add the parser of a command, and return it. files: the name of its positional argument, which
    takes several values if it ends in s. numbers: flags of positive numbers, name=(default, help).
    """
    new = commands.add_parser(function.__name__.removesuffix("_command"),
                              help=function.__doc__.split("\n")[0],
                              formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    new.set_defaults(function=function)
    new.add_argument(files, nargs="+" if files.endswith("s") else None)
    for name, (default, text) in numbers.items():
        new.add_argument(f"--{name}", default=default, help=text, type=positive(default))
    return new


def main(argv):
    parser = Parser(prog="probes.py", description="Measure models; compare runs.")
    commands = parser.add_subparsers(required=True)
    linear = add_command(commands, linearity_command, "checkpoint",
                         tokens=(40_000, "how many of the text's tokens"),
                         characters=(0, "read pieces of so many characters, each alone (512: the "
                                     "authors' way); 0: contexts cut from one sequence"))
    linear.add_argument("--plot", help="file to draw the scores to")
    prune = add_command(commands, prune_command, "checkpoint",
                        tokens=(80_000, "how many of the text's tokens"),
                        distill_steps=(200, "steps of distillation"),
                        distill_lr=(1e-3, "its learning rate"))
    curvature = add_command(commands, curvature_command, "checkpoints",
                            tokens=(2048, "how many of the text's tokens"),
                            steps=(32, "Hessian-vector products from each random vector"),
                            probes=(2, "random vectors"))
    evaluate = add_command(commands, eval_command, "checkpoint",
                           items=(0, "how many items of a task; 0: all, 2,000 of `python`"),
                           tokens=(0, "how many of the text's tokens; 0: all"),
                           stride=(0, "tokens from window to window; 0: no overlap"),
                           batch_tokens=(1024, "tokens in one forward pass; a GPU takes 32,768"))
    evaluate.add_argument("--task", nargs="+", default=(), help="`python`, or files of JSON lines: "
                          "see read_task")
    add_command(commands, compare_command, "runs")
    plot = add_command(commands, plot_command, "runs")
    plot.add_argument("--plot", default="runs.png", help="file to draw to")
    for one in (linear, prune, curvature, evaluate):
        one.add_argument("--text", required=one is not evaluate, help="a text file to read")
        one.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                         help="such as cpu or cuda:1")
    for one in (linear, prune):
        one.add_argument("--skip_first", action="store_true",
                         help="leave the first position of each context out")
    prune.add_argument("--blocks", nargs="+", type=positive(1), default=[1],
                       help="how many blocks go; 1 2: models without one and without two")
    prune.add_argument("--orders", nargs="+", choices=ORDERS, default=["full"],
                       help="by what the blocks that go are chosen: see prune_order")
    prune.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS[:3],
                       help="what happens to them; distill_all trains all parameters")
    prune.add_argument("--out_dir", default="", help="folder of the new "
                       "checkpoint; empty: `pruned` beside the old")
    a = parser.parse_args(argv)
    print(a.function(a))


if __name__ == "__main__":
    command(main)
