"""optim.py: how weights change. AdamW, Muon, learnable multipliers, gradient clipping, learning-rate schedules.

AdamW is torch's. Muon is here: momentum, then the nearest (semi-)orthogonal matrix to it, as the update of every
weight matrix inside the blocks. Embedding, head and all vectors stay with AdamW: a row of the embedding is a token's own
vector, not a map between two spaces, so the spectral argument for Muon does not apply to it.

Learnable multipliers (Velikanov et al. 2026, arXiv 2601.04890) are here too. A matrix that is trained with weight decay
settles where the noise of its updates and the decay balance, at RMS ||W|| ~ sqrt(eta / lambda): its scale is set by
two settings, not by the data. With W~ = diag(r) W diag(c) in its place, W still settles there, but r and c, whose
gradients are averages over whole rows and columns and so carry little noise, give W~ the scale that the data wants.
(The embedding gets r and c too, though without weight decay no such equilibrium holds it.) The model holds W~ alone and
knows nothing of this; W, r and c live beside the optimizer: class Multipliers.

Names and symbols (the papers' own)
    W           a weight matrix (out, in) as the optimizer moves it
    W~, G       the matrix that the forward pass uses, and dL/dW~; without multipliers W~ is W itself
    r, c, s     multipliers of W's rows (out,) and columns (in,), or of all of it (1,): W~_ij = r_i W_ij c_j, or s W_ij
    m           momentum buffer, an exponential moving average of dL/dW with factor mu (Jordan et al. 2024, muon.py)
    u           what is orthogonalised: Nesterov's g + mu (m - g) with g = dL/dW, or m itself
    O           the orthogonalised update: U V^T of the singular value decomposition u = U S V^T, approximately
    eta, lambda learning rate and weight decay; decay is decoupled, W <- (1 - eta lambda) W (Loshchilov & Hutter 2019)
    kappa       the factor on O that depends on the shape: `--muon_scale`, see muon_scale()
    piece       a logical matrix within a stored one: q, k and v of the tensor qkv are three pieces
"""
import math

import torch
import torch.distributed as dist
from torch import nn

from model import param_factor

# ----------------------------------------------------------------------------------------------------------------------
# Where each parameter goes


def place_parameters(model: nn.Module) -> dict[str, list[str]]:
    """Names of the parameters by the way they are treated, each exactly once.

    matrix     weights inside the blocks, stacks of experts too: Muon or AdamW, with weight decay
    embedding  token vectors: AdamW, no decay (a rare token's vector would decay for want of gradients)
    head       the output matrix: AdamW, with decay
    vector     gains, biases, and of Mamba-2 the convolution, A, D and the bias of dt: AdamW, no decay
    Raises ValueError when a parameter has no place or two."""
    places = {"matrix": [], "embedding": [], "head": [], "vector": []}
    for name, p in model.named_parameters():
        if name == "embed.weight":  # tied: the head is this very parameter
            places["embedding"].append(name)
        elif name == "head.weight":
            places["head"].append(name)
        elif p.ndim == 1 or name.endswith(".conv.weight"):
            places["vector"].append(name)
        elif p.ndim in (2, 3) and name.startswith("blocks."):
            places["matrix"].append(name)
        else:
            raise ValueError(f"no optimizer group for the parameter {name} of shape {tuple(p.shape)}")
    placed = [name for names in places.values() for name in names]
    assert sorted(placed) == sorted(dict(model.named_parameters())), "every parameter is placed exactly once"
    return places


def logical_pieces(model: nn.Module) -> dict[str, list[tuple[str, int]]]:
    """(piece, rows) of each logical matrix in a weight, by the weight's name: {"blocks.0.mixer.qkv.weight": [("q", 64),
    ("k", 32), ("v", 32)], "blocks.0.mixer.o.weight": [("o", 64)], ...}. In a stack of experts they follow each
    other."""
    pieces = {"embed.weight": [("embed", model.embed.weight.shape[0])]}
    for name, m in model.named_modules():
        if isinstance(m, nn.Linear):
            pieces[f"{name}.weight"] = [*getattr(m, "pieces", {name.rpartition(".")[2]: m.out_features}).items()]
        elif hasattr(m, "router"):
            pieces |= {f"{name}.{weight}": [*rows.items()] * len(m.load) for weight, rows in m.pieces.items()}
    return pieces


def flat(p):
    """A weight as (rows, in), a stack of experts one below the other: a view."""
    return p.view(-1, p.shape[-1])


MODULES = {"embedding": ("embed",), "attention": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down"),
           "ssm": ("z", "x", "B", "C", "dt", "out"), "affine": ("affine",), "router": ("router",), "head": ("head",)}


FIXED_ROWS = ("router", "B", "C")  # as many at any width: experts, numbers of state


def module_of(piece: str) -> str:
    """Which of MODULES a logical matrix belongs to."""
    return next(module for module, pieces in MODULES.items() if piece in pieces)


def rule_of(name: str, kind: str, tied: bool) -> str:
    """The line of model.PARAM_RULES that holds for a parameter that place_parameters calls a `kind`."""
    if kind == "matrix":
        return "router" if name.endswith(".router.weight") else "hidden"
    if kind == "vector":
        return "final" if name == "norm.weight" else "vector"
    return "head" if tied else kind


def make_optimizers(model: nn.Module, multipliers=None, optimizer="muon", lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95),
                    embedding_lr=30.0, module_lr=None, module_decay=None, multiplier_lr=1e-2, multiplier_decay=2e-3,
                    eps=1e-10, **muon) -> list[torch.optim.Optimizer]:
    """The optimizers of a run: [AdamW] or [Muon, AdamW], and with multipliers one more AdamW for them.

    Every group remembers its peak rate, as a factor on lr, in `lr_factor`: embedding_lr for an embedding of its own,
    whose rows start at RMS 1 and see a gradient only when their token comes up (nanochat and modded-nanogpt likewise),
    1 for all else; times module_lr[module], as weight decay is times module_decay[module]; and times the factors of
    model.PARAM_RULES, which Muon has in its muon_scale instead. muon: settings of Muon."""
    module_lr, module_decay = module_lr or {}, module_decay or {}
    places, pieces = place_parameters(model), logical_pieces(model)
    params = {n: multipliers.W.get(n, p) if multipliers else p for n, p in model.named_parameters()}
    decay = {"matrix": weight_decay, "embedding": 0.0, "head": weight_decay, "vector": 0.0}
    groups, c = {}, model.config
    for kind, names in places.items():
        for n in names:
            module = module_of(pieces[n][0][0]) if n in pieces else ""
            own_group = module in module_lr or module in module_decay
            factor = embedding_lr if kind == "embedding" and places["head"] else 1.0  # a tied matrix is the head too
            by_size = (1.0, 1.0, 1.0) if kind == "matrix" and optimizer == "muon" else tuple(
                param_factor(c, rule_of(n, kind, not places["head"]), what) for what in ("lr", "decay", "eps"))
            group = groups.setdefault((kind, module if own_group else "", by_size), {
                "params": [], "pieces": [], "growth": [],
                "weight_decay": decay[kind] * module_decay.get(module, 1.0) * by_size[1],
                "lr_factor": factor * module_lr.get(module, 1.0) * by_size[0], "eps": eps * by_size[2]})
            group["params"].append(params[n])
            group["pieces"].append(tuple(rows for _, rows in pieces.get(n, ())))
            group["growth"].append(tuple((1.0 if piece in FIXED_ROWS else c.width_ratio, c.width_ratio)
                                         for piece, _ in pieces.get(n, ())))
    made, adamw = [], dict(lr=lr, betas=betas, eps=eps)
    adamw["fused"] = all(p.device.type in ("cuda", "cpu") for p in params.values())
    if optimizer == "muon":
        made.append(Muon([g for (kind, *_), g in groups.items() if kind == "matrix"], lr=lr, **muon))
        groups = {key: g for key, g in groups.items() if key[0] != "matrix"}
    made.append(torch.optim.AdamW([{k: v for k, v in g.items() if k not in ("pieces", "growth")} for g in groups.values()],
                                  **adamw))
    if multipliers:
        made.append(torch.optim.AdamW([{"params": multipliers.parameters(), "weight_decay": multiplier_decay,
                                        "lr_factor": multiplier_lr / lr, "eps": eps * param_factor(c, "vector", "eps")}],
                                      **adamw))
    set_lr(made, lr)
    return made


# ----------------------------------------------------------------------------------------------------------------------
# Muon

# What a step makes of a singular value s: a s + b s^3 + c s^5. One triple a step; the last is repeated.
NS_COEFFICIENTS = {
    # Jordan et al. 2024: steep at 0, not convergent on purpose, lands in about [0.68, 1.13] from [0.01, 1]
    "quintic": [(3.4445, -4.7750, 2.0315)],
    # Amsel et al. 2025 (arXiv 2505.16932): each step the best odd quintic for the interval that the last one left,
    # made for [1e-3, 1]; lands in about [0.86, 1.14] from [0.01, 1]. The five-step table, with a safety factor of 1.02.
    "polar_express": [(8.156554524902461, -22.48329292557795, 15.878769915207462),
                      (4.042929935166739, -2.808917465908714, 0.5000178451051316),
                      (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
                      (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
                      (2.3465413258596377, -1.7097828382687081, 0.42323551169305323)],
}


def newton_schulz(G, coefficients="quintic", steps: int = 5, dtype=torch.bfloat16):
    """The nearest semi-orthogonal matrix to each of a stack, roughly: singular values go to about 1, vectors stay.

    G: (..., m, n). Each step maps every singular value s (of G over its Frobenius norm) to a s + b s^3 + c s^5, by
    products alone: with A = X X^T, X <- a X + (b A + c A A) X. 4 m^2 n + 2 m^3 FLOPs a step for m <= n.
    Returns the same shape in `dtype`. A zero matrix stays zero."""
    table = NS_COEFFICIENTS[coefficients]
    X = G.to(dtype).view(-1, *G.shape[-2:])
    tall = G.shape[-2] > G.shape[-1]
    if tall:  # X X^T is then the smaller of the two Gram matrices
        X = X.mT
    margin = 1.02 if coefficients == "polar_express" else 1.0  # rounding must not push s above 1
    X = X / (margin * X.norm(dim=(-2, -1), keepdim=True)).clamp(min=1e-7)
    for a, b, c in (table + table[-1:] * steps)[:steps]:
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)  # b A + c A A in one pass
        X = torch.baddbmm(X, B, X, beta=a)
    return (X.mT if tall else X).view(G.shape)


def muon_scale(rows: int, cols: int, kind: str, growth=(1.0, 1.0)) -> float:
    """kappa, the factor on the orthogonalised update of a (rows = out, cols = in) matrix.

    growth: rows and cols over those of the base model, under --param=mup and completep. Features that move as much at any
    width need an update whose spectral norm goes as sqrt(out / in) (Yang, Simon & Bernstein 2023, arXiv 2310.17813). So
    kappa is the base matrix', by the convention below, times the growth of that root. Of a matrix that grows on both sides
    it is the base's: `original` and `spectral` have that by themselves, and match_rms_adamw, which grows with the root of
    the width, is held back by m_N^-1/2. A router, of fixed rows, has m_N^-1/2 by `spectral` itself, and gets it in the
    others. As this is no factor on the rate, weight decay stays as it is, times the rate the same at any width.

    match_rms_adamw  0.2 sqrt(max(out, in)): update RMS 0.2, about AdamW's, so its learning rate and decay carry over
                     (Liu et al. 2025, arXiv 2502.16982)
    original         sqrt(max(1, out / in)) (Jordan et al. 2024; torch.optim.Muon's default)
    spectral         sqrt(out / in): RMS-to-RMS operator norm 1 (Bernstein & Newhouse 2024; the dion repository)"""
    if growth != (1.0, 1.0):
        return muon_scale(rows / growth[0], cols / growth[1], kind) * math.sqrt(growth[0] / growth[1])
    if kind == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, cols))
    if kind == "original":
        return math.sqrt(max(1.0, rows / cols))
    if kind == "spectral":
        return math.sqrt(rows / cols)
    raise ValueError(f"unknown muon scale {kind}")


def normalize_rows(O, v, beta2: float = 0.95):
    """NorMuon (Li et al. 2025, arXiv 2510.05491): give every row of the update the same long-run RMS, then the whole
    its Frobenius norm back. O: (..., m, n); v: (..., m, 1), the rows' running mean square, changed in place."""
    v.lerp_(O.square().mean(-1, keepdim=True), 1 - beta2)
    N = O / (v.sqrt() + 1e-10)
    return N * (O.norm(dim=(-2, -1), keepdim=True) / N.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-10))


def momentum_at(step: int, momentum: float, warmup: int, start: float = 0.85) -> float:
    """mu rises from `start` to `momentum` over the first `warmup` steps (modded-nanogpt): old gradients, from weights
    that moved fast, are forgotten sooner."""
    return momentum if step >= warmup else min(start, momentum) + step / warmup * (momentum - min(start, momentum))


def share_work(costs: list[float], world: int) -> list[int]:
    """The rank that does each task, so that the busiest rank has little more than its share: longest processing time
    first (LPT, Graham 1969), i.e. dearest first, each to the rank with the least so far."""
    load, owner = [0.0] * world, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owner[i] = min(range(world), key=load.__getitem__)
        load[owner[i]] += costs[i]
    return owner


class Muon(torch.optim.Optimizer):
    """MomentUm Orthogonalised by Newton-Schulz (Jordan et al. 2024).

        m <- m + (1 - mu) (g - m);  u = g + mu (m - g)  (Nesterov);  O = newton_schulz(u)
        W <- (1 - eta lambda) W - eta kappa O

    params: matrices and stacks of them (E, out, in), or groups of such with, under "pieces", the rows of each one's
    logical matrices (default: one, or E, each) and, under "growth", theirs (see muon_scale; default: 1, 1). All logical
    matrices of a group that have one shape go through Newton-Schulz as one stack, in dtype.

    With several ranks each owns a share of the logical matrices, of about equal FLOPs: it alone keeps their momentum,
    moves them and sends them to all others. The sending goes on until finish(), so that other optimizers can step
    meanwhile. What state_dict() gives and load_state_dict() takes is whole on every rank, and the same for any number
    of ranks. State: one buffer the size of W, divided by the number of ranks."""

    def __init__(self, params, pieces=None, lr=1e-2, weight_decay=0.1, momentum=0.95, nesterov=True,
                 coefficients="quintic", ns_steps=5, scale="match_rms_adamw", normuon=False, dtype=torch.bfloat16):
        params = list(params)
        groups = params if isinstance(params[0], dict) else [{"params": params, "pieces": pieces}]
        for group in groups:
            if any(p.ndim not in (2, 3) for p in group["params"]):
                raise ValueError("Muon takes matrices and stacks of them; give vectors and others to AdamW")
            group["pieces"] = group.get("pieces") or [(p.shape[-2],) * (p.numel() // p.shape[-2] // p.shape[-1])
                                                      for p in group["params"]]
            group["growth"] = group.get("growth") or [((1.0, 1.0),) * len(rows) for rows in group["pieces"]]
        super().__init__(groups, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov,
                                      coefficients=coefficients, ns_steps=ns_steps, scale=scale, normuon=normuon))
        self.dtype, self.sending = dtype, []
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        shapes = [(rows, p.shape[-1]) for g in self.param_groups for p, pieces in zip(g["params"], g["pieces"])
                  for rows in pieces]
        owners = iter(share_work([4 * m * n * min(m, n) + 2 * min(m, n) ** 3 for m, n in shapes], self.world))
        self.owners = {p: [next(owners) for _ in pieces] for g in self.param_groups
                       for p, pieces in zip(g["params"], g["pieces"])}

    @torch.no_grad()
    def step(self):
        self.finish()
        for group in self.param_groups:
            moved, stacks = [], {}  # (matrix, its owner); (shape, growth) -> [(w, g, its state)] of what this rank owns
            for p, pieces, growths in zip(group["params"], group["pieces"], group["growth"]):
                if p.grad is None:
                    continue
                for k, (w, g, growth) in enumerate(zip(flat(p).split(pieces), flat(p.grad).split(pieces), growths)):
                    moved.append((w, self.owners[p][k]))
                    if self.owners[p][k] == self.rank:
                        stacks.setdefault((w.shape, growth), []).append((w, g, self.piece_state(p, k, w, group["normuon"])))
            for (shape, growth), stack in stacks.items():
                W, G, state = zip(*stack)
                m = [s["momentum_buffer"] for s in state]
                torch._foreach_lerp_(m, G, 1 - group["momentum"])
                u = torch._foreach_lerp(G, m, group["momentum"]) if group["nesterov"] else m
                O = newton_schulz(torch.stack(u), group["coefficients"], group["ns_steps"], self.dtype).to(W[0].dtype)
                if group["normuon"]:
                    v = [s["row_mean_square"] for s in state]
                    O = normalize_rows(O, stacked := torch.stack(v))
                    torch._foreach_copy_(v, list(stacked))
                torch._foreach_mul_(W, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(W, list(O), alpha=-group["lr"] * muon_scale(*shape, group["scale"], growth))
            if self.world > 1:
                self.sending += [dist.broadcast(w, owner, async_op=True) for w, owner in moved]

    def finish(self):
        """Wait until every matrix has come from its owner."""
        while self.sending:
            self.sending.pop(0).wait()

    def piece_state(self, p, k: int, w, normuon: bool) -> dict:
        """The state of logical matrix k of p, made of zeros at first use."""
        state = self.state[p].setdefault(k, {})
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(w)
        if normuon and "row_mean_square" not in state:
            state["row_mean_square"] = torch.zeros_like(w[:, :1])
        return state

    def state_dict(self):
        """Whole tensors for every parameter. With several ranks all have to call it."""
        self.finish()
        packed, index = super().state_dict(), 0
        for group in self.param_groups:
            keys = ["momentum_buffer", "row_mean_square"] if group["normuon"] else ["momentum_buffer"]
            for p, pieces in zip(group["params"], group["pieces"]):
                if packed["state"].pop(index, None) or self.world > 1:
                    views = list(enumerate(flat(p.detach()).split(pieces)))
                    packed["state"][index] = {key: torch.cat([self.whole_piece(p, k, w, key) for k, w in views])
                                              for key in keys}
                index += 1
        return packed

    def whole_piece(self, p, k: int, w, key: str):
        """Of logical matrix k of p, the state that its owner keeps; zeros where it has not moved yet."""
        zeros = torch.zeros_like(w if key == "momentum_buffer" else w[:, :1])
        part = self.state.get(p, {}).get(k, {}).get(key, zeros)
        if self.world > 1:
            part = part.clone()
            dist.broadcast(part, self.owners[p][k])
            part = part.cpu()  # or all ranks' shares would stand side by side on every GPU
        return part

    def load_state_dict(self, packed):
        """Of whole tensors, keep this rank's share."""
        super().load_state_dict(packed)
        for group in self.param_groups:
            for p, pieces in zip(group["params"], group["pieces"]):
                whole, kept = self.state.pop(p, {}), {}
                for key, tensor in whole.items():
                    for k, part in enumerate(tensor.split(pieces)):
                        if self.owners[p][k] == self.rank:
                            kept.setdefault(k, {})[key] = part.clone()
                if kept:
                    self.state[p] = kept


# ----------------------------------------------------------------------------------------------------------------------
# Learnable multipliers

# (row multiplier, column multiplier) of each logical matrix without the redundant ones, as in the paper's Appendix C: of
# two that scale the same numbers one is kept, on q and not k, o and not v, down and not up. (With qk_norm q's and k's gains
# do it again.) It is not what the paper ran: that was both on every matrix, with weight decay on the multipliers against
# drift along the symmetries.
SYMMETRY_FREE = {"embed": (True, True), "q": (True, False), "k": (False, False), "v": (False, False), "o": (True, True),
                 "gate": (True, False), "up": (False, False), "down": (True, True), "z": (True, False), "dt": (True, False),
                 "x": (False, False), "B": (False, False), "C": (False, False), "out": (True, False)}


def place_multipliers(piece: str, placement="all", tied=False, mlp="swiglu", ssm_norm=True) -> tuple[bool, bool]:
    """(row multiplier?, column multiplier?) of a logical matrix.

    all: both. symmetry_free: SYMMETRY_FREE, where `up` gets rows if a GELU follows, whose input scale is its own (after
    relu2 it is a factor on the output, which down's columns give), and `out` columns if no gated norm with a gain of
    its own stands before it. A tied embedding gets no rows: they would act on the logits. Head and router, which
    Multipliers leaves out unless asked, get both in `all`; the paper has none on the head, as the final norm's gain is
    its columns."""
    row, column = (True, True) if placement == "all" else SYMMETRY_FREE.get(piece, (False, False))
    if placement != "all":
        row, column = row or piece == "up" and mlp == "gelu", column or piece == "out" and not ssm_norm
    return row and not (piece == "embed" and tied), column


def multiplier_gradients(G, W, r=None, c=None):
    """(dL/dW, dL/dr, dL/dc) for W~ = diag(r) W diag(c), from G = dL/dW~ (the paper's eq. 4). Overwrites G with dL/dW.

        dL/dW_ij = r_i c_j G_ij,  dL/dr_i = sum_j W_ij c_j G_ij,  dL/dc_j = sum_i r_i W_ij G_ij

    G, W: (..., out, in), a stack of matrices; r: (..., out), or (..., 1) for a scalar s, then dL/ds = sum_ij W_ij G_ij; c:
    (..., in). None: no such one."""
    P = W * G
    dr = None if r is None else P.sum(-1) if c is None else (P @ c[..., None])[..., 0]
    if r is not None and r.shape[-1] == 1:
        dr = dr.sum(-1, keepdim=True)
    dc = None if c is None else P.sum(-2) if r is None else (r[..., None, :] @ P)[..., 0, :]
    if r is not None:
        G.mul_(r[..., None])
    if c is not None:
        G.mul_(c[..., None, :])
    return G, dr, dc


def effective_weight(W, r=None, c=None, out=None):
    """W~_ij = r_i W_ij c_j, or s W_ij for an r of one element; shapes as in multiplier_gradients. Written to `out`."""
    out = torch.mul(W, 1.0 if r is None else r[..., None], out=out)
    return out if c is None else out.mul_(c[..., None, :])


class Multipliers:
    """W, r and c of every matrix that has multipliers, in its dtype (train.py: float32); the model itself holds W~.

    Around the optimizers' step: split_gradients() makes of the gradients of W~ those of W, r, c; fold() writes W~ back.

    kind: `scalar` or `vector`; placement: see place_multipliers; modules: names out of MODULES. Each logical piece of a
    fused tensor has its own (the paper is silent on columns there). At the start W = W~ and r = c = 1, so the function
    that the model computes is not changed by giving it multipliers, nor by leaving them off again."""

    def __init__(self, model, kind="vector", placement="all", modules=("embedding", "attention", "mlp", "ssm")):
        config, params = model.config, dict(model.named_parameters())
        # By the parameter's name: W~, W, [(piece, rows, r, c)], and of stretches of pieces alike [(pieces, rows, r, c)], of
        # which the r and c of a piece are rows; so q, k and v of one size are worked on as one stack.
        self.p, self.W, self.pieces, self.stacks = {}, {}, {}, {}
        for name, pieces in logical_pieces(model).items():
            if name not in params or module_of(pieces[0][0]) not in modules:
                continue
            alike = []
            for piece, rows in pieces:
                row, column = place_multipliers(piece, placement, config.tie_embeddings, config.mlp, config.ssm_norm)
                n_r, n_c = (int(row or column), 0) if kind == "scalar" else (row * rows, column * params[name].shape[-1])
                if alike and alike[-1][1:] == (rows, n_r, n_c):
                    alike[-1][0].append(piece)
                else:
                    alike.append(([piece], rows, n_r, n_c))
            if not any(n_r or n_c for _, _, n_r, n_c in alike):
                continue
            self.p[name], self.W[name] = params[name], nn.Parameter(params[name].detach().clone())
            self.stacks[name] = [(len(found), rows, *(nn.Parameter(params[name].new_ones(len(found), size)) if size else None
                                                      for size in (n_r, n_c))) for found, rows, n_r, n_c in alike]
            self.pieces[name] = [(piece, rows, *(None if v is None else v.detach()[k] for v in stack[2:]))
                                 for (found, rows, _, _), stack in zip(alike, self.stacks[name])
                                 for k, piece in enumerate(found)]

    def parameters(self) -> list[nn.Parameter]:
        """All r and c (s is an r of one element)."""
        return [v for made in self.stacks.values() for _, _, *rc in made for v in rc if v is not None]

    def matrices(self, name: str, *tensors):
        """For each stack of alike pieces of a weight: its r, its c, and of each tensor its part, (pieces, rows, in)."""
        sizes = [n * rows for n, rows, _, _ in self.stacks[name]]
        for (n, rows, r, c), *parts in zip(self.stacks[name], *(flat(t).split(sizes) for t in tensors)):
            yield r, c, *(part.view(n, rows, -1) for part in parts)

    @torch.no_grad()
    def split_gradients(self):
        """From the gradient of each W~ make those of its W, r and c; W~'s own is used up."""
        for name, p in self.p.items():
            if p.grad is None:
                continue
            for r, c, G, W in self.matrices(name, p.grad, self.W[name]):
                _, dr, dc = multiplier_gradients(G, W, r, c)
                if r is not None:
                    r.grad = dr
                if c is not None:
                    c.grad = dc
            self.W[name].grad, p.grad = p.grad, None

    @torch.no_grad()
    def fold(self):
        """W~ = diag(r) W diag(c), into the model."""
        for name, p in self.p.items():
            for r, c, out, W in self.matrices(name, p.detach(), self.W[name]):
                effective_weight(W, r, c, out)

    def named(self) -> dict[str, torch.Tensor]:
        """What there is to save, by name: every W, and r and c as NAME:PIECE.r, or NAME:PIECE.E.r of expert E."""
        named = dict(self.W)
        for name, made in self.pieces.items():
            first = [piece for piece, *_ in made]
            for i, (piece, _, *rc) in enumerate(made):
                label = piece if first.count(piece) == 1 else f"{piece}.{first[:i].count(piece)}"
                named |= {f"{name}:{label}.{k}": v for k, v in zip("rc", rc) if v is not None}
        return named

    def state_dict(self):
        return {name: t.detach() for name, t in self.named().items()}

    @torch.no_grad()
    def load_state_dict(self, state) -> bool:
        """Take over W, r and c of the same kind and placement, and return True; of others nothing, and return False."""
        named = self.named()
        if {n: t.shape for n, t in named.items()} != {n: t.shape for n, t in (state or {}).items()}:
            return False
        for name, t in named.items():
            t.copy_(state[name])
        return True


@torch.no_grad()
def weight_scales(model, multipliers=None) -> dict:
    """What is worth watching of the weights' scale, by kind of logical matrix and over all blocks.

    weights: rms and rms_effective, the root mean square of W and of W~; spread, the standard deviation of log(RMS of a
    row of W~ over its matrix' mean of those), the paper's feature-scale diversity (section 3.1) in one number, without
    rows of zeros. drift, with multipliers: by symmetric pair, log of RMS r of q, v, up over that of the partner k, o,
    down (rows of k, columns of o and down), mean over blocks: q times t and k over t are the same model, so nothing but
    weight decay holds this. After relu2 up's counts twice, as t^2 comes out; after gelu, and under qk_norm, it is no
    symmetry."""
    params, weights, logs = dict(model.named_parameters()), {}, {}
    for name, pieces in logical_pieces(model).items():
        if name not in params:  # a tied head
            continue
        rows = [n for _, n in pieces]
        W = multipliers.W.get(name, params[name]) if multipliers else params[name]
        for (piece, _), own, effective in zip(pieces, flat(W).split(rows), flat(params[name]).split(rows)):
            norms = effective.square().mean(1).sqrt()
            weights.setdefault(piece, []).append((own.square().mean(), effective.square().mean(), (
                norms[norms > 0] / norms[norms > 0].mean()).log()))
        for piece, _, r, c in multipliers.pieces.get(name, ()) if multipliers else ():
            for side, v in (("r", r), ("c", c)):
                if v is not None:
                    logs.setdefault((piece, side), []).append(v.square().mean().sqrt().clamp(min=1e-30).log())
    drift = {}
    c = model.config
    for piece, partner, side, power in (("q", "k", "r", 0 if c.qk_norm else 1), ("v", "o", "c", 1),
                                        ("up", "down", "c", {"swiglu": 1, "relu2": 2, "gelu": 0}[c.mlp])):
        other = logs.get((partner, side)) or logs.get((partner, "r"))  # a scalar counts as r
        if (piece, "r") in logs and other and power:
            drift[f"{piece}/{partner}"] = (power * torch.stack(logs[piece, "r"]).mean() - torch.stack(other).mean()).item()
    out = {}
    for piece, seen in weights.items():
        own, effective, spread = zip(*seen)
        spread = torch.cat(spread)
        out[piece] = {"rms": torch.stack(own).mean().sqrt().item(),
                      "rms_effective": torch.stack(effective).mean().sqrt().item(),
                      "spread": spread.std().item() if len(spread) > 1 else None}
    return {"weights": out, **({"drift": drift} if drift else {})}


# ----------------------------------------------------------------------------------------------------------------------
# Clipping and schedules


def clipped_parameters(model, multipliers=None, clip_multipliers=False) -> list[nn.Parameter]:
    """What clipping looks at: every parameter of the model, with W in place of each W~ that has multipliers.

    The multipliers themselves are left out of the norm, and of the scaling: each of their gradients sums over a row, a
    column or a whole matrix, so that early on they alone would set the norm and everything else would be shrunk. With
    them in (clip_multipliers), the paper's gain was gone (section 4.3)."""
    params = [multipliers.W.get(name, p) if multipliers else p for name, p in model.named_parameters()]
    return params + (multipliers.parameters() if multipliers and clip_multipliers else [])


def clip_gradients(params, max_norm: float):
    """Scale all gradients by max_norm / norm where their joint L2 norm is larger; 0 only measures.
    Returns the norm before, a 0-d tensor."""
    return nn.utils.clip_grad_norm_(params, max_norm if max_norm > 0 else math.inf)


DECAY_SHAPES = {  # t: the part of the decay that is over, from 0 to 1
    "linear": lambda t: 1 - t,
    "sqrt": lambda t: 1 - math.sqrt(t),  # 1-sqrt: falls fast, ends slowly (Hägele et al. 2024, arXiv 2405.18392)
    "exponential": lambda t: 32 ** -t,  # down to 1/32, as Falcon-H1's long runs
}


def wsd(step: int, steps: int, warmup: int, decay_fraction: float, decay_shape="linear") -> float:
    """Warm-up, stable, decay (Hu et al. 2024, arXiv 2404.06395): linear up over `warmup` steps, 1, then down over the
    last decay_fraction of the steps. Step counts from 0. Returns the factor on the peak rate."""
    decay = decay_fraction * steps
    t = min(1.0, max(0.0, 1 - (steps - step) / decay)) if decay > 0 else 0.0
    return min(1.0, (step + 1) / max(1, warmup), DECAY_SHAPES[decay_shape](t))


def cosine(step: int, steps: int, warmup: int, *_, floor: float = 0.1) -> float:
    """Linear up over `warmup` steps, then half a cosine from 1 down to `floor` at step == steps."""
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def constant(step: int, steps: int, warmup: int, *_) -> float:
    """Linear up over `warmup` steps, then 1."""
    return min(1.0, (step + 1) / max(1, warmup))


SCHEDULES = {"wsd": wsd, "cosine": cosine, "constant": constant}


def set_lr(optimizers, lr: float):
    """Every group's rate becomes lr times its own factor."""
    for group in (g for o in optimizers for g in o.param_groups):
        group["lr"] = lr * group["lr_factor"]


def set_momentum(muon: Muon, momentum: float):
    """Every group's mu."""
    for group in muon.param_groups:
        group["momentum"] = momentum
