"""optim.py: how weights change. Muon, learnable multipliers, schedules, clipping, and their use.

A training loop uses only make_schedule and class Optimizers, at the end of the file:

    optimizers = Optimizers(model, make_schedule("wsd", steps, warmup, 0.4), lr=0.01)
    loss.backward()
    norm = optimizers.clip(1.0)
    optimizers.step(step)

AdamW is torch's. Muon (Jordan et al. 2024) trains the weight matrices inside the blocks. It takes
the momentum of a matrix, replaces it by about the nearest semi-orthogonal matrix (all singular
values 1), and subtracts this, times the learning rate. So every direction of the momentum moves the
matrix equally far. AdamW trains embedding, head and vectors: a row of the embedding is the vector
of one token, not a map between two spaces, so Muon's spectral argument does not apply to it.

Learnable multipliers (Velikanov et al. 2026, arXiv 2601.04890) give a matrix a scale of its own.
With weight decay, the RMS of a matrix W settles where the noise of its updates balances the decay,
in proportion to sqrt(learning rate / weight decay). So two settings fix the scale of W, not the
data. Multipliers put W~ = diag(r) W diag(c) in the place of W in the forward pass. W still settles
at that scale. The gradients of r and c are sums over rows and columns and carry little noise, so r
and c can give W~ the scale that lowers the loss. The embedding gets r and c too, although it has no
weight decay and therefore no such balance. The model holds W~; the optimizer holds W, r and c.

Symbols (those of the papers)
    W           a weight matrix (out, in) as the optimizer moves it
    W~, G       the matrix that the forward pass uses, and dL/dW~; without multipliers W~ is W
    r, c, s     multipliers of W's rows (out,), of its columns (in,), or of all of it (1,)
    g, m        dL/dW, and its exponential moving average with factor mu: the momentum
    u           Nesterov's form of the momentum, g + mu (m - g)
    O           u orthogonalized: about U V^T of the singular value decomposition u = U S V^T
    eta, lambda learning rate and weight decay; decay is decoupled: W <- (1 - eta lambda) W
    kappa       the factor on O that depends on the shape, see update_scale
    piece       a logical matrix within a stored one: q, k and v of the tensor qkv are three pieces.
                MODULES lists all names of pieces
    stack       matrices of one shape, one behind the other: (number, out, in)
    m_N         width of this model over that of the base model (model.PARAM_RULES)
"""
import math
from collections import defaultdict
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from model import BadInput, ModelConfig, logical_pieces, param_factor

# --------------------------------------------------------------------------------------------------
# Muon

# A step of Newton-Schulz maps a singular value s to a1 s + a3 s^3 + a5 s^5. With these coefficients
# (Jordan et al. 2024) a small s grows fast, by the factor a1. In return s does not converge to 1,
# but only comes near it: 5 steps take [0.01, 1] into [0.68, 1.13].
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def newton_schulz(G, steps: int = 5, dtype=torch.bfloat16):
    """About the nearest semi-orthogonal matrix: all singular values become about 1, and the
    singular vectors stay.

    G: (..., m, n), one matrix or a stack. Returns the same shape in `dtype`, in which all products
    run; a matrix of zeros stays zero. X begins as G over its Frobenius norm. Each step maps the
    singular values s to a1 s + a3 s^3 + a5 s^5, with (a1, a3, a5) = NS_COEFFICIENTS, by matrix
    products only: with A = X X^T,

        X <- a1 X + (a3 A + a5 A A) X

    A step takes 4 m^2 n + 2 m^3 FLOPs for m <= n. Where m > n, the transpose takes the place of X,
    as its A is smaller."""
    a1, a3, a5 = NS_COEFFICIENTS
    X = G.to(dtype).view(-1, *G.shape[-2:])
    tall = G.shape[-2] > G.shape[-1]
    if tall:
        X = X.mT
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=a3, alpha=a5)
        X = torch.baddbmm(X, B, X, beta=a1)
    return (X.mT if tall else X).view(G.shape)


def update_scale(rows: int, columns: int, convention="match_rms_adamw") -> float:
    """kappa, the factor on the orthogonalized update O of a matrix of shape (rows, columns), which
    is (out, in).

    match_rms_adamw  0.2 sqrt(max(out, in)): update RMS 0.2, about AdamW's, so that its
                     learning rate and decay carry over (Liu et al. 2025, arXiv 2502.16982)
    original         sqrt(max(1, out / in)) (Jordan et al. 2024; torch.optim.Muon's default)
    spectral         sqrt(out / in): RMS-to-RMS operator norm 1 (Bernstein & Newhouse 2024; the dion
                     repository)"""
    return {"match_rms_adamw": 0.2 * math.sqrt(max(rows, columns)),
            "original": math.sqrt(max(1.0, rows / columns)),
            "spectral": math.sqrt(rows / columns)}[convention]


def momentum_update(G, m, mu: float):
    """Muon's momentum: the direction u of a step, for each gradient g of the list G.

    G, m: lists of tensors of equal shapes; m holds the averages of earlier gradients. Each m is
    changed in place, m <- m + (1 - mu) (g - m). Returns a list of the u, with the new m: Nesterov's
    form, u = g + mu (m - g). G is not changed. (torch._foreach_... is one call for a whole list,
    which is faster than a call for each tensor.)"""
    torch._foreach_lerp_(m, G, 1 - mu)
    return torch._foreach_lerp(G, m, mu)


def as_matrix(p):
    """A weight as one matrix (rows, in): of experts (E, out, in) one below the other. A view."""
    return p.view(-1, p.shape[-1])


class Muon(torch.optim.Optimizer):
    """MomentUm Orthogonalized by Newton-Schulz (Jordan et al. 2024).

        m <- m + (1 - mu) (g - m);  u = g + mu (m - g);  O = newton_schulz(u)
        W <- (1 - eta lambda) W - eta kappa O

    params: matrices and stacks of them (E, out, in), or groups of such, as for every torch
    optimizer. A group may hold "matrices": a list with an entry for each parameter, the list of
    (rows, kappa) of its logical matrices. Default: the whole parameter, or its E matrices, with
    match_rms_adamw. Logical matrices of one shape and kappa go through Newton-Schulz as one stack,
    in `dtype`.

    With several ranks every rank keeps the whole momentum, so state_dict() is torch's own. The
    work is shared: logical matrix k of a step belongs to rank k mod world, which computes its O
    and sends it, in `dtype`, to the others. Meanwhile all compute the O of the next stack."""

    def __init__(self, params, lr=1e-2, weight_decay=0.1, momentum=0.95, dtype=torch.bfloat16):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum,
                                      matrices=None))
        self.dtype = dtype
        self.rank, self.world = 0, 1
        if dist.is_initialized():
            self.rank, self.world = dist.get_rank(), dist.get_world_size()
        for group in self.param_groups:
            if any(p.ndim not in (2, 3) for p in group["params"]):
                raise ValueError("Muon takes matrices and stacks of them; give the rest to AdamW")
            group["matrices"] = group["matrices"] or [
                [(p.shape[-2], update_scale(*p.shape[-2:]))] * (len(p) if p.ndim == 3 else 1)
                for p in group["params"]]

    @torch.no_grad()
    def step(self):
        count = 0  # logical matrices so far
        move_last = None  # moves the stack before this one, once its O has come
        for group in self.param_groups:
            for (_, _, kappa), stack in self.stacks(group).items():
                O, sending = self.orthogonalize(group, stack, count)
                count += len(stack["g"])
                if move_last:
                    move_last()
                move_last = partial(self.move, group, kappa, stack["W"], O, sending)
        if move_last:
            move_last()

    def stacks(self, group) -> dict[tuple, dict[str, list]]:
        """A group's logical matrices that have a gradient, by (rows, columns, kappa). A stack is
        here three lists of equal length, whose views are "W", "g" (dL/dW) and "m" (the momentum).
        """
        stacks = defaultdict(lambda: defaultdict(list))
        for p, matrices in zip(group["params"], group["matrices"], strict=True):
            if p.grad is None:
                continue
            if p not in self.state:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            m = self.state[p]["momentum_buffer"]
            for key, tensor in {"W": p, "g": p.grad, "m": m}.items():
                parts = as_matrix(tensor).split([rows for rows, _ in matrices])
                for (rows, kappa), part in zip(matrices, parts, strict=True):
                    stacks[rows, p.shape[-1], kappa][key].append(part)
        return stacks

    def orthogonalize(self, group, stack, count: int):
        """O (number, out, in) of a stack, and handles to wait for what is still being sent.

        count: the number of logical matrices before this stack in this step. Matrix i of the stack
        belongs to rank (count + i) mod world."""
        u = momentum_update(stack["g"], stack["m"], group["momentum"])
        if self.world == 1:
            return newton_schulz(torch.stack(u), dtype=self.dtype), []
        O = u[0].new_empty(len(u), *u[0].shape, dtype=self.dtype)
        own = slice((self.rank - count) % self.world, None, self.world)  # this rank's matrices
        if u[own]:  # a small stack may have none
            O[own] = newton_schulz(torch.stack(u[own]), dtype=self.dtype)
        return O, [dist.broadcast(part, (count + i) % self.world, async_op=True)
                   for i, part in enumerate(O)]

    def move(self, group, kappa, W, O, sending):
        """Muon's change of a stack: W <- (1 - eta lambda) W - eta kappa O, in place.

        group: a dict of "lr", eta, and "weight_decay", lambda. kappa: see update_scale. W: a list
        of matrices (out, in). O: (number, out, in), in a dtype of its own. sending: handles; O is
        valid after wait() of each."""
        for handle in sending:
            handle.wait()
        torch._foreach_mul_(W, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(W, list(O.to(W[0].dtype)), alpha=-group["lr"] * kappa)


# --------------------------------------------------------------------------------------------------
# Learnable multipliers


def effective_weight(W, r=None, c=None, out=None):
    """W~_ij = r_i W_ij c_j, or s W_ij for an r of one element. out: a tensor to write it to.

    W: (..., rows, columns), one matrix or a stack; r: (..., rows), or (..., 1) for s; c: (...,
    columns). None stands for a multiplier that is not there."""
    out = torch.mul(W, 1.0 if r is None else r[..., None], out=out)
    return out if c is None else out.mul_(c[..., None, :])


def multiplier_gradients(G, W, r=None, c=None):
    """The gradients (dL/dW, dL/dr, dL/dc) of W~ = diag(r) W diag(c), from G = dL/dW~ (eq. 4 of the
    paper). Shapes as in effective_weight, whose function this differentiates.

        dL/dW_ij = r_i c_j G_ij,  dL/dr_i = sum_j W_ij c_j G_ij,  dL/dc_j = sum_i r_i W_ij G_ij

    For a scalar s in place of r, an r of one element, dL/ds = sum_ij W_ij G_ij; c is then None. The
    gradient of a multiplier that is None is None. Nothing is changed in place."""
    P = W * G
    dr = dc = None
    if r is not None:
        dr = P.sum(-1) if c is None else (P @ c[..., None])[..., 0]
        if r.shape[-1] == 1:
            dr = dr.sum(-1, keepdim=True)
    if c is not None:
        dc = P.sum(-2) if r is None else (r[..., None, :] @ P)[..., 0, :]
    return effective_weight(G, r, c), dr, dc


# The pieces that have row and column multipliers in the paper's Appendix C. Where two multipliers
# scale the same numbers, only one is kept: on q and not k, on o and not v, on down and not up.
# (With qk_norm the gains of q and k scale the same numbers too.)
SYMMETRY_FREE = {
    "rows": ("embed", "q", "o", "gate", "down", "z", "dt", "out"),
    "columns": ("embed", "o", "down"),
}


def place_multipliers(piece: str, placement: str, config: ModelConfig) -> tuple[bool, bool]:
    """Whether a logical matrix has a row multiplier, and whether it has a column multiplier.

    all            Both. Head and router get both as well, if Multipliers is asked for them. (The
                   paper has none on the head: the final norm's gain is its column multiplier.)
    symmetry_free  SYMMETRY_FREE. `up` gets rows if a GELU follows. (With SwiGLU or relu2 a scale of
                   up's rows is a factor on the output, which down's columns give already.) `out`
                   gets columns if no gated norm with a gain stands before it.

    A tied embedding gets no rows: they would scale the logits of tokens. (The paper ties none.)

    The paper's runs had multipliers on rows and columns, redundant ones too, and kept the gains of
    all norms. Weight decay on the multipliers held the symmetries. The symmetry-free placement was
    slightly worse (Appendix C). The paper leaves two things open: whether a matrix that reads a
    norm's output (q, k, v, gate, up, Mamba-2's input projection) has column multipliers beside the
    norm's gain; and whether the pieces of a fused matrix share their column multipliers. With
    `all` it has them here, and each piece has its own."""
    row = column = True
    if placement != "all":
        row = piece in SYMMETRY_FREE["rows"] or (piece == "up" and config.mlp == "gelu")
        column = piece in SYMMETRY_FREE["columns"] or (piece == "out" and not config.ssm_norm)
    return row and not (piece == "embed" and config.tie_embeddings), column


# {module: its pieces}, for --module_lr and --multiplier_modules
MODULES = {
    "embedding": ("embed",), "attention": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down"),
    "ssm": ("z", "x", "B", "C", "dt", "out"), "affine": ("affine",), "router": ("router",),
    "head": ("head",),
}


def module_of(piece: str) -> str:
    """The key of MODULES to which a logical matrix belongs."""
    return next(module for module, pieces in MODULES.items() if piece in pieces)


class Section(NamedTuple):
    """Neighboring pieces of one weight with equal rows and placement, such as q, k and v of one
    size. One product of tensors then serves all of them.

    None stands for a multiplier that is not there."""

    number: int  # of pieces
    rows: int  # of each piece
    r: nn.Parameter | None  # (number, rows), or (number, 1) for s
    c: nn.Parameter | None  # (number, in)


def make_section(p, number: int, rows: int, row: bool, column: bool, kind: str) -> Section:
    """A Section of the weight p, whose multipliers are 1. row and column: which ones there are;
    a scalar takes the place of either or both."""
    r = c = None
    if kind == "scalar" and (row or column):
        r = nn.Parameter(p.new_ones(number, 1))
    if kind == "vector" and row:
        r = nn.Parameter(p.new_ones(number, rows))
    if kind == "vector" and column:
        c = nn.Parameter(p.new_ones(number, p.shape[-1]))
    return Section(number, rows, r, c)


class Multipliers:
    """W, r and c of every matrix that has multipliers, in its dtype. The model itself holds W~.

    kind: "scalar" or "vector"; placement: see place_multipliers; modules: keys of MODULES, of which
    attention, mlp and ssm may be missing in the model. At the start W = W~ and r = c = 1, so the
    function that the model computes is not changed.

    Before the optimizers' step, split_gradients() turns the gradients of W~ into those of W, r, c;
    after it, fold() writes W~ into the model.

    Three dicts by the parameter's name: `effective`, W~, which is the model's parameter; `W`; and
    `sections`, lists of Section, which hold r and c. Raises BadInput for modules that the model
    lacks, or if there would be no multiplier."""

    def __init__(self, model, kind="vector", placement="all",
                 modules=("embedding", "attention", "mlp", "ssm")):
        self.effective, self.W, self.sections = {}, {}, {}

        def rows_and_placement(piece):
            name, rows = piece
            return rows, *place_multipliers(name, placement, model.config)

        found = set()
        for name, pieces in logical_pieces(model).items():
            module = module_of(pieces[0][0])
            found.add(module)
            if module not in modules:
                continue
            p = model.get_parameter(name)
            sections = [make_section(p, len([*alike]), rows, row, column, kind)
                        for (rows, row, column), alike in groupby(pieces, rows_and_placement)]
            if any(s.r is not None or s.c is not None for s in sections):
                self.effective[name], self.sections[name] = p, sections
                self.W[name] = nn.Parameter(p.detach().clone())
        if not self.W or {*modules} - found - {"attention", "mlp", "ssm"}:
            raise BadInput(f"--multiplier_modules={','.join(modules)} "
                           f"--multiplier_placement={placement}: this model has "
                           f"{', '.join(sorted(found))}; symmetry_free has no multipliers on "
                           "affine, router and head")

    def named_multipliers(self) -> dict[str, nn.Parameter]:
        """Every r and c as NAME:NUMBER OF THE SECTION.r or .c; s is an r of one element."""
        found = {}
        for name, sections in self.sections.items():
            for i, section in enumerate(sections):
                found |= {f"{name}:{i}.r": section.r, f"{name}:{i}.c": section.c}
        return {name: v for name, v in found.items() if v is not None}

    def by_section(self, name: str, *tensors):
        """Yields each section of a weight, with its part (number, rows, in) of each tensor; these
        have the weight's shape. The parts are views."""
        sizes = [section.number * section.rows for section in self.sections[name]]
        split = (as_matrix(t).split(sizes) for t in tensors)
        for section, *parts in zip(self.sections[name], *split, strict=True):
            yield section, *(part.view(section.number, section.rows, -1) for part in parts)

    @torch.no_grad()
    def split_gradients(self):
        """Turn the gradient of each W~ into those of its W, r and c. A second call does nothing."""
        for name, p in self.effective.items():
            if p.grad is None:
                continue
            for section, G, W in self.by_section(name, p.grad, self.W[name]):
                dW, dr, dc = multiplier_gradients(G, W, section.r, section.c)
                G.copy_(dW)
                if section.r is not None:
                    section.r.grad = dr
                if section.c is not None:
                    section.c.grad = dc
            self.W[name].grad, p.grad = p.grad, None  # the memory now holds dL/dW

    @torch.no_grad()
    def fold(self):
        """Write W~ = diag(r) W diag(c) into the model."""
        for name, p in self.effective.items():
            for section, out, W in self.by_section(name, p.detach(), self.W[name]):
                effective_weight(W, section.r, section.c, out)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: v.detach() for name, v in (self.W | self.named_multipliers()).items()}

    @torch.no_grad()
    def load_state_dict(self, state) -> bool:
        """Take over W, r and c. Returns False, and changes nothing, if state is None or of another
        kind, placement or choice of modules."""
        own, stored = self.state_dict(), state or {}
        if own.keys() != stored.keys() or any(own[n].shape != stored[n].shape for n in own):
            return False
        for name, t in own.items():
            t.copy_(stored[name])
        return True


# --------------------------------------------------------------------------------------------------
# Schedules: the learning rate over the run, as a factor on its peak. Steps count from 0. All
# schedules have the same arguments, whether they need them or not.


def constant(step: int, steps: int, warmup: int, decay_fraction=0.0) -> float:
    """Linear up over `warmup` steps, then 1."""
    return min(1.0, (step + 1) / max(1, warmup))


def wsd(step: int, steps: int, warmup: int, decay_fraction: float, shape) -> float:
    """The factor on the learning rate at a step: warm-up, stable, decay (Hu et al. 2024, arXiv
    2404.06395).

    Before the decay the factor is that of `constant`. The decay takes the last decay_fraction of
    the steps, a number that need not be whole; 0: no decay. There the factor is shape(t), where t
    is the part of the decay that is over, from 0 at its start to 1 at step == steps and after it.
    Where warm-up and decay overlap, the smaller factor counts."""
    t = 0.0
    if decay_fraction > 0:
        t = 1 - (steps - step) / (decay_fraction * steps)
    return min(constant(step, steps, warmup), shape(min(1.0, max(0.0, t))))


def cosine(step: int, steps: int, warmup: int, decay_fraction=0.0, floor=0.1) -> float:
    """Linear up over `warmup` steps, then half a cosine from 1 down to `floor` at step == steps."""
    if step < warmup:
        return constant(step, steps, warmup)
    t = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * t))


# A new schedule is a function of (step, steps, warmup, decay_fraction) and an entry here: the
# factor on the learning rate of step 0, 1, ..., steps - 1.
SCHEDULES = {
    "wsd": partial(wsd, shape=lambda t: 1 - t),
    # falls fast and ends slowly (Hägele et al. 2024, arXiv 2405.18392)
    "wsd_sqrt": partial(wsd, shape=lambda t: 1 - math.sqrt(t)),
    # down to 1/32, as in Falcon-H1's long runs
    "wsd_exponential": partial(wsd, shape=lambda t: 32**-t),
    "cosine": cosine,
    "constant": constant,
}


def make_schedule(name: str, steps: int, warmup: int, decay_fraction: float):
    """The schedule as a function step -> factor on the peak learning rate."""
    return partial(SCHEDULES[name], steps=steps, warmup=warmup, decay_fraction=decay_fraction)


# --------------------------------------------------------------------------------------------------
# Where each parameter goes


def place_parameters(model: nn.Module) -> dict[str, list[str]]:
    """Names of the parameters by the way they are treated, each exactly once.

    hidden     matrices inside the blocks, stacks of experts too: Muon or AdamW, with weight decay
    router     the matrix that chooses experts: likewise
    embedding  token vectors: AdamW, no decay (the vector of a rare token would decay unseen)
    tied       an embedding that is the head too: AdamW, no decay
    head       the output matrix: AdamW, with decay
    vector     in the blocks gains, biases, and Mamba-2's convolution, A and D: AdamW, no decay
    final      the gain of the last norm: AdamW, no decay
    The keys are the rules of model.PARAM_RULES; a tied matrix follows the head's. Raises ValueError
    for a parameter that has no place."""
    places = {kind: [] for kind in
              ("hidden", "router", "embedding", "tied", "head", "vector", "final")}
    outside = {"embed.weight": "tied" if model.config.tie_embeddings else "embedding",
               "head.weight": "head", "norm.weight": "final"}
    for name, p in model.named_parameters():
        if name in outside:
            kind = outside[name]
        elif p.ndim == 1 or name.endswith(".conv.weight"):
            kind = "vector"
        elif p.ndim in (2, 3) and name.startswith("blocks."):
            kind = "router" if name.endswith(".router.weight") else "hidden"
        else:
            raise ValueError(f"no optimizer group for {name} of shape {tuple(p.shape)}")
        places[kind].append(name)
    return places


def row_growth(config: ModelConfig, piece: str) -> float:
    """Rows of a logical matrix over its rows in the base model of --param=mup and completep.

    The base model is the one that the same settings give at the base's size. With grouped-query
    attention both models have equally many key/value heads, so k and v grow as the channels of a
    head do. (kappa is the same if the base model has fewer query heads than this model has
    key/value heads, and so has fewer of these too.) Without it, both models have a key/value head
    for each query head. MLPs and experts have the same ratio to n_embd in both (see
    model.PARAM_RULES)."""
    if piece in ("router", "B", "C"):  # as many rows at every width: experts, numbers of state
        return 1.0
    if piece in ("k", "v") and config.n_kv_head < config.n_head:
        return config.head_ratio
    return config.width_ratio


def grown_scale(config: ModelConfig, piece: str, rows: int, columns: int, convention: str) -> float:
    """kappa of a logical matrix (rows, columns) of this model; at the base's size it is
    update_scale.

    Features move as much at every width if the spectral norm of the update is in proportion to
    sqrt(out / in) (Yang, Simon & Bernstein 2023, arXiv 2310.17813). So kappa is that of the base's
    matrix, times the factor by which sqrt(out / in) has grown since. The rows have grown by
    row_growth, the columns by config.width_ratio. A matrix that grows on both sides keeps the
    base's kappa. One with a fixed number of rows gets it times m_N^-1/2. kappa acts on the update
    and not on the learning rate, so weight decay does not change."""
    row_ratio, column_ratio = row_growth(config, piece), config.width_ratio
    base = update_scale(rows / row_ratio, columns / column_ratio, convention)
    return base * math.sqrt(row_ratio / column_ratio)


def parameter_groups(model, W, muon_scale, weight_decay, eps, embedding_lr, module_lr,
                     module_decay):
    """(groups for Muon, groups for AdamW) of the model's parameters: dicts as torch's optimizers
    take them, with (name, p) for each parameter. Parameters of equal settings share one.

    W: {name: parameter} to train in place of the model's own, where there are multipliers.
    muon_scale: a convention of update_scale, or None: no Muon. The others: see Optimizers. A
    group's "lr_factor" is its learning rate over that of the run. It is embedding_lr for an
    embedding that is not tied: its rows start at RMS 1 and get a gradient only when their token
    comes up (likewise in nanochat and modded-nanogpt). AdamW's settings depend on the model's size
    by model.PARAM_RULES; of Muon's only kappa does."""
    config = model.config
    logical = logical_pieces(model)
    present = {module_of(pieces[0][0]) for pieces in logical.values()}
    if unknown := {*module_lr, *module_decay} - present:
        raise BadInput(f"--module_lr={','.join(unknown)}: this model has "
                       f"{', '.join(sorted(present))}")
    muon, adamw = {}, {}  # settings -> group
    for kind, names in place_parameters(model).items():
        by_muon = muon_scale is not None and kind in ("hidden", "router")
        rule = "head" if kind == "tied" else kind
        lr_factor = embedding_lr if kind == "embedding" else 1.0
        decay = weight_decay if kind in ("hidden", "router", "head") else 0.0
        by_size = {what: 1.0 if by_muon else param_factor(config, rule, what)
                   for what in ("lr", "decay", "eps")}
        for name in names:
            p = W.get(name, model.get_parameter(name))
            pieces = logical.get(name)
            module = module_of(pieces[0][0]) if pieces else ""
            settings = {"lr_factor": lr_factor * module_lr.get(module, 1.0) * by_size["lr"],
                        "weight_decay": decay * module_decay.get(module, 1.0) * by_size["decay"],
                        "eps": eps * by_size["eps"]}
            groups = muon if by_muon else adamw
            group = groups.setdefault(tuple(settings.values()), {**settings, "params": []})
            group["params"].append((name, p))
            if by_muon:
                matrices = [(rows, grown_scale(config, piece, rows, p.shape[-1], muon_scale))
                            for piece, rows in pieces]
                group.setdefault("matrices", []).append(matrices)
    return list(muon.values()), list(adamw.values())


# --------------------------------------------------------------------------------------------------
# All of it


class Optimizers:
    """Everything that changes the weights of a run: clip(max_norm), then step(step).

    The model must hold its first weights already. multipliers: Multipliers of this model, or None.
    schedule: step -> factor on every learning rate. lr: the peak learning rate. embedding_lr is a
    factor on lr for the embedding; module_lr and module_decay are {key of MODULES: factor} on lr
    and weight_decay. multiplier_lr is a learning rate, under the same schedule. muon_scale: see
    update_scale. extra: parameters outside the model, of terms of the loss; they get AdamW without
    weight decay, the same schedule and the same clipping.

    Attributes: optimizers, a dict of those of the torch optimizers "muon", "adamw", "multipliers"
    and "extra" that are needed; lr, that of the last step; clipped, the parameters whose gradients
    clip scales. Torch gets each parameter as (name, p), so its groups hold "param_names"."""

    def __init__(self, model, schedule, *, optimizer="muon", lr, weight_decay=0.1,
                 betas=(0.9, 0.95), eps=1e-10, embedding_lr=30.0, module_lr=None, module_decay=None,
                 multipliers=None, multiplier_lr=1e-2, multiplier_weight_decay=2e-3,
                 clip_multipliers=False, momentum=0.95, muon_scale="match_rms_adamw",
                 dtype=torch.bfloat16, extra=()):
        self.schedule, self.peak_lr = schedule, lr
        self.multipliers = multipliers
        self.extra = list(extra)
        W = multipliers.W if multipliers else {}
        for_muon, for_adamw = parameter_groups(
            model, W, muon_scale if optimizer == "muon" else None, weight_decay, eps, embedding_lr,
            module_lr or {}, module_decay or {})
        self.optimizers = {}
        if for_muon:
            self.optimizers["muon"] = Muon(for_muon, lr=lr, momentum=momentum, dtype=dtype)
        adamw = partial(torch.optim.AdamW, lr=lr, betas=betas, eps=eps, fused=True)
        self.optimizers["adamw"] = adamw(for_adamw)
        if multipliers:
            self.optimizers["multipliers"] = adamw([{
                "params": list(multipliers.named_multipliers().items()),
                "weight_decay": multiplier_weight_decay, "lr_factor": multiplier_lr / lr,
                "eps": eps * param_factor(model.config, "vector", "eps")}])
        if self.extra:
            self.optimizers["extra"] = adamw([{
                "params": [(str(i), p) for i, p in enumerate(self.extra)],
                "weight_decay": 0.0, "lr_factor": 1.0}])
        self.clipped = [W.get(name, p) for name, p in model.named_parameters()] + self.extra
        if multipliers and clip_multipliers:
            self.clipped += multipliers.named_multipliers().values()

    def clip(self, max_norm: float):
        """Scale all gradients by max_norm / norm if their joint L2 norm is larger; 0 only measures.
        Returns the norm before, a 0-d tensor.

        First the gradients of W~ become those of W, r and c, if there are multipliers, and the
        gradients of `extra`, which is outside DDP, are averaged over the ranks by dist.all_reduce,
        which sums. The norm is that of the parameters in self.clipped; some may have no gradient.
        Without clip_multipliers the gradients of r and c do not count and are not scaled: each sums
        over a row, a column or a whole matrix. Early on they alone would set the norm, and shrink
        all other gradients. With them the paper's gain was gone (section 4.3)."""
        if self.multipliers:
            self.multipliers.split_gradients()
        if dist.is_initialized():
            for p in self.extra:
                if p.grad is not None:
                    dist.all_reduce(p.grad)
                    p.grad /= dist.get_world_size()
        return nn.utils.clip_grad_norm_(self.clipped, max_norm or math.inf)

    def step(self, step: int):
        """Change the weights, at the learning rate of this step, and drop the gradients. The
        learning rate of a group is that of the run times the group's own factor."""
        if self.multipliers:
            self.multipliers.split_gradients()  # clip has done it already, if it was called
        self.lr = self.peak_lr * self.schedule(step)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = self.lr * group["lr_factor"]
            optimizer.step()
            optimizer.zero_grad()
        if self.multipliers:
            self.multipliers.fold()

    def state_dict(self) -> dict:
        """For each optimizer the state of its parameters by their names; under "values" W, r and c.

        It is the same on every rank, and has the same form for any number of ranks."""
        state = {"values": self.multipliers.state_dict() if self.multipliers else None}
        for key, optimizer in self.optimizers.items():
            state[key] = {name: optimizer.state[p] for name, p in parameters_of(optimizer).items()
                          if p in optimizer.state}
        return state

    def load_state_dict(self, state: dict) -> bool:
        """Take over the stored state of each parameter of the same name. Settings, such as learning
        rates, stay those of this object.

        Returns False if this object has multipliers and `state` has none of their kind, placement
        and modules. They then begin at 1, with the model's weights as W. Raises KeyError or
        ValueError if another parameter has no state there, or one of another shape. (The parameters
        of a new term have none, and begin anew.)"""
        same = self.multipliers is None or self.multipliers.load_state_dict(state.get("values"))
        for key, optimizer in self.optimizers.items():
            if key == "multipliers" and not same:
                continue
            params = parameters_of(optimizer)
            stored = state.get(key, {})
            if key == "extra" and not stored:
                continue
            buffers = ("momentum_buffer",) if key == "muon" else ("exp_avg", "exp_avg_sq")
            for name, p in params.items():
                for buffer in buffers:
                    if p.requires_grad and stored[name][buffer].shape != p.shape:
                        raise ValueError(f"{name}: the optimizer's state has another shape")
            packed = optimizer.state_dict()  # torch's has the state by the parameter's number
            packed["state"] = {i: stored[name] for i, name in enumerate(params) if name in stored}
            optimizer.load_state_dict(packed)
        return same


def parameters_of(optimizer) -> dict[str, nn.Parameter]:
    """The parameters of a torch optimizer by name, in the order of their numbers."""
    return {name: p for group in optimizer.param_groups
            for name, p in zip(group["param_names"], group["params"], strict=True)}


def module_factors(text: str) -> dict[str, float]:
    """{"head": 0.5, "mlp": 2.0} of the text "head=0.5,mlp=2" of --module_lr. Raises BadInput."""
    factors = {}
    if not text:
        return factors
    try:
        for part in text.split(","):
            name, value = part.split("=")
            if name not in MODULES or name in factors or not 0 < float(value) < math.inf:
                raise ValueError
            factors[name] = float(value)
    except ValueError:
        raise BadInput(f"--module_lr={text}: needs MODULE=NUMBER, separated by commas, each number "
                       f"positive and each module once, out of {', '.join(MODULES)}") from None
    return factors
