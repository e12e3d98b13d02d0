"""optim.py: how weights change. AdamW, Muon, where each parameter goes, gradient clipping, learning-rate schedules.

AdamW is torch's. Muon is here: momentum, then the nearest (semi-)orthogonal matrix to it, as the update of every
weight matrix inside the blocks. Embedding, head and gains stay with AdamW: a row of the embedding is a token's own
vector, not a map between two spaces, so the spectral argument for Muon does not apply to it.

Names and symbols (the papers' own)
    W, G        a weight matrix (out, in) and the gradient of the loss with respect to it
    m           momentum buffer, an exponential moving average of G with factor mu (Jordan et al. 2024, muon.py)
    O           the orthogonalised update: U V^T of the singular value decomposition m = U S V^T, approximately
    eta, lambda learning rate and weight decay; decay is decoupled, W <- (1 - eta lambda) W (Loshchilov & Hutter 2019)
    kappa       the factor on O that depends on the shape: `--muon_scale`, see muon_scale()
"""
import math

import torch
from torch import nn

# ----------------------------------------------------------------------------------------------------------------------
# Where each parameter goes


def place_parameters(model: nn.Module) -> dict[str, list[str]]:
    """Names of the parameters by the way they are treated, each exactly once.

    matrix     2-D weights inside the blocks: Muon or AdamW, with weight decay
    embedding  token vectors: AdamW, no decay (a rare token's vector would decay for want of gradients)
    head       the output matrix: AdamW, with decay
    vector     gains: AdamW, no decay
    Raises ValueError when a parameter has no place or two. (Learnable multipliers will be made from `matrix`,
    `embedding` and, as the paper has it, not from `head`.)"""
    places = {"matrix": [], "embedding": [], "head": [], "vector": []}
    for name, p in model.named_parameters():
        if name == "embed.weight":  # tied: the head is this very parameter
            places["embedding"].append(name)
        elif name == "head.weight":
            places["head"].append(name)
        elif p.ndim == 1:
            places["vector"].append(name)
        elif p.ndim == 2 and name.startswith("blocks."):
            places["matrix"].append(name)
        else:
            raise ValueError(f"no optimizer group for the parameter {name} of shape {tuple(p.shape)}")
    placed = [name for names in places.values() for name in names]
    assert sorted(placed) == sorted(dict(model.named_parameters())), "every parameter is placed exactly once"
    return places


def logical_pieces(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Rows of each logical matrix in a weight, by the weight's name: q, k, v of one fused tensor are three."""
    return {f"{name}.weight": tuple(m.pieces.values()) if hasattr(m, "pieces") else (m.out_features,)
            for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def make_optimizers(model: nn.Module, optimizer="muon", lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95), momentum=0.95,
                    muon_scale="match_rms_adamw", embedding_lr=30.0, dtype=torch.bfloat16) -> list[torch.optim.Optimizer]:
    """The optimizers of a run: [AdamW] or [Muon, AdamW]. Every group remembers its peak rate, as a factor on lr, in
    `lr_factor`: embedding_lr for an embedding of its own, whose rows start at RMS 1 and see a gradient only when their
    token comes up (nanochat and modded-nanogpt likewise); 1 for all else. dtype: of Muon's products."""
    params, places = dict(model.named_parameters()), place_parameters(model)
    made = []
    adamw = ["matrix", "embedding", "head", "vector"]
    if optimizer == "muon":
        pieces = logical_pieces(model)
        made.append(Muon([params[n] for n in places["matrix"]], [pieces[n] for n in places["matrix"]], lr=lr,
                         weight_decay=weight_decay, momentum=momentum, scale=muon_scale, dtype=dtype))
        adamw.remove("matrix")
    decay = {"matrix": weight_decay, "embedding": 0.0, "head": weight_decay, "vector": 0.0}
    factor = {"embedding": embedding_lr if places["head"] else 1.0}
    groups = [{"params": [params[n] for n in places[kind]], "weight_decay": decay[kind],
               "lr_factor": factor.get(kind, 1.0)} for kind in adamw if places[kind]]
    fused = all(p.device.type in ("cuda", "cpu") for p in params.values())
    made.append(torch.optim.AdamW(groups, lr=lr, betas=betas, eps=1e-10, fused=fused))
    made[0].param_groups[0].setdefault("lr_factor", 1.0)  # Muon's
    set_lr(made, lr)
    return made


# ----------------------------------------------------------------------------------------------------------------------
# Muon

QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024: steepest at 0, not convergent, lands in about [0.7, 1.2]


def newton_schulz(G, steps: int = 5, dtype=torch.bfloat16):
    """The nearest semi-orthogonal matrix to each of a stack, roughly: singular values go to about 1, vectors stay.

    G: (..., m, n). Each step maps every singular value s (of G over its Frobenius norm) to a s + b s^3 + c s^5, by
    products alone: with A = X X^T, X <- a X + (b A + c A A) X. 4 m^2 n + 2 m^3 FLOPs a step for m <= n.
    Returns the same shape in `dtype`. A zero matrix stays zero."""
    a, b, c = QUINTIC
    X = G.to(dtype).view(-1, *G.shape[-2:])
    tall = G.shape[-2] > G.shape[-1]
    if tall:  # X X^T is then the smaller of the two Gram matrices
        X = X.mT
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)  # b A + c A A in one pass
        X = torch.baddbmm(X, B, X, beta=a)
    return (X.mT if tall else X).view(G.shape)


def muon_scale(rows: int, cols: int, kind: str) -> float:
    """kappa, the factor on the orthogonalised update of a (rows = out, cols = in) matrix.

    match_rms_adamw  0.2 sqrt(max(out, in)): update RMS 0.2, about AdamW's, so its learning rate and decay carry over
                     (Liu et al. 2025, arXiv 2502.16982)
    original         sqrt(max(1, out / in)) (Jordan et al. 2024; torch.optim.Muon's default)
    spectral         sqrt(out / in): RMS-to-RMS operator norm 1 (Bernstein & Newhouse 2024; the dion repository)"""
    if kind == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, cols))
    if kind == "original":
        return math.sqrt(max(1.0, rows / cols))
    if kind == "spectral":
        return math.sqrt(rows / cols)
    raise ValueError(f"unknown muon scale {kind}")


class Muon(torch.optim.Optimizer):
    """MomentUm Orthogonalised by Newton-Schulz (Jordan et al. 2024).

        m <- m + (1 - mu) (G - m);  u = G + mu (m - G)  (Nesterov);  O = newton_schulz(u)
        W <- (1 - eta lambda) W - eta kappa O

    params: 2-D parameters; pieces: for each, the rows of its logical matrices (default: one matrix each).
    dtype: of the Newton-Schulz products. All logical matrices of one shape go through them as one stack.
    State: one buffer the size of W."""

    def __init__(self, params, pieces=None, lr=1e-2, weight_decay=0.1, momentum=0.95, nesterov=True, ns_steps=5,
                 scale="match_rms_adamw", dtype=torch.bfloat16):
        params = list(params)
        if any(p.ndim != 2 for p in params):
            raise ValueError("Muon takes matrices alone; give vectors and others to AdamW")
        pieces = pieces or [(p.shape[0],) for p in params]
        super().__init__([{"params": params, "pieces": pieces}], dict(
            lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov, ns_steps=ns_steps, scale=scale))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            used = [(p, rows) for p, rows in zip(group["params"], group["pieces"]) if p.grad is not None]
            if not used:
                continue
            W, G = [p for p, _ in used], [p.grad for p, _ in used]
            for p in W:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            m = [self.state[p]["momentum_buffer"] for p in W]
            torch._foreach_lerp_(m, G, 1 - group["momentum"])
            u = torch._foreach_lerp(G, m, group["momentum"]) if group["nesterov"] else m
            torch._foreach_mul_(W, 1 - group["lr"] * group["weight_decay"])
            stacks = {}  # shape of a logical matrix -> its updates and the weights they belong to
            for (p, rows), update in zip(used, u):
                for w, g in zip(p.split(rows), update.split(rows)):
                    stacks.setdefault(w.shape, []).append((w, g))
            for shape, pairs in stacks.items():
                O = newton_schulz(torch.stack([g for _, g in pairs]), group["ns_steps"], self.dtype)
                rate = group["lr"] * muon_scale(*shape, group["scale"])
                torch._foreach_add_([w for w, _ in pairs], list(O.to(pairs[0][0].dtype)), alpha=-rate)


# ----------------------------------------------------------------------------------------------------------------------
# Clipping and schedules


def clip_gradients(params, max_norm: float):
    """Scale all gradients by max_norm / norm where their joint L2 norm is larger; 0 only measures.
    Returns the norm before, a 0-d tensor."""
    return nn.utils.clip_grad_norm_(params, max_norm if max_norm > 0 else math.inf)


def wsd(step: int, steps: int, warmup: int, decay_fraction: float) -> float:
    """Warm-up, stable, decay (Hu et al. 2024, arXiv 2404.06395): linear up over `warmup` steps, 1, then linear down
    to 0 over the last decay_fraction of the steps. Step counts from 0. Returns the factor on the peak rate."""
    decay = decay_fraction * steps
    return min(1.0, (step + 1) / max(1, warmup), (steps - step) / decay if decay > 0 else 1.0)


def cosine(step: int, steps: int, warmup: int, decay_fraction: float = 0.0, floor: float = 0.1) -> float:
    """Linear up over `warmup` steps, then half a cosine from 1 down to `floor` at step == steps."""
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def constant(step: int, steps: int, warmup: int, decay_fraction: float = 0.0) -> float:
    """Linear up over `warmup` steps, then 1."""
    return min(1.0, (step + 1) / max(1, warmup))


SCHEDULES = {"wsd": wsd, "cosine": cosine, "constant": constant}


def set_lr(optimizers, lr: float):
    """Every group's rate becomes lr times its own factor."""
    for group in (g for o in optimizers for g in o.param_groups):
        group["lr"] = lr * group["lr_factor"]
