"""teacher.py: what a frozen, already trained model can teach. Loading teachers, LET, and its rivals.

Late-to-early training (LET, Zhao et al. 2026, arXiv 2602.05393): a small pretrained teacher T reads the same tokens as
the larger student M. T's *late* state guides one of M's *early* blocks, and only *early* in training:

    L(s) = L_NLL + lambda(s) * L_proj,    L_proj = -mean over tokens of cos(h_M^(k), h_T^(L_T)),
    lambda(s) = lambda_0 * max(0, (S_stop - s) / S_stop)

Only texts derived from the paper could be read. Where they are silent or disagree, the choice is a flag of train.py and
its docstring here says so.

Names and symbols
    M, T                student and teacher; d_M, d_T their widths
    h_M^(k)             let_student_layer: M's residual stream after block k, before any norm; (B, T, d_M)
    h_T^(L_T)           let_teacher_layer: T's state after its last block; -1 counts from the end; (B, T, d_T)
    lambda_0, S_stop    let_weight, let_stop (in optimizer steps here; train.py also takes a fraction of the run)
    s                   optimizer steps taken so far, from 0
    L_proj              let_loss: `cosine`, or `logsum` (Miles & Mikolajczyk 2023, arXiv 2303.11098)
    v, z                teacher's and student's logits; P = softmax(v / tau), Q = softmax(z / tau), tau the temperature
    beta                direction of a divergence: 0 is KL(P || Q), forward; 1 is KL(Q || P), reverse; see `divergence`
"""
import math
import random
from dataclasses import dataclass, fields, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from model import IGNORE, BadInput, generate, load_checkpoint, model_from_checkpoint, tokenizer_id


def load_teacher(path, tokenizer: dict, block_size: int, device="cpu"):
    """A checkpoint of ours as a frozen model in eval mode. Raises BadInput when it reads other tokens than the
    student's `tokenizer`, or when its context is shorter than the student's block_size: position t of one could then
    not be held against position t of the other."""
    ckpt = load_checkpoint(path, flag="--teacher=")
    if tokenizer_id(ckpt["tokenizer"]) != tokenizer_id(tokenizer):
        raise BadInput(f"--teacher={path}: its tokenizer ({ckpt['tokenizer']['name']}, {tokenizer_id(ckpt['tokenizer'])}) "
                       f"is not the student's ({tokenizer['name']}, {tokenizer_id(tokenizer)}); LET matches token by token")
    if ckpt["model_config"]["block_size"] < block_size:
        raise BadInput(f"--teacher={path}: its context of {ckpt['model_config']['block_size']} tokens is shorter than the "
                       f"student's --block_size={block_size}")
    return model_from_checkpoint(ckpt, device).eval().requires_grad_(False)


def let_weight(step: int, weight: float, stop: int) -> float:
    """lambda(s) = lambda_0 * max(0, (S_stop - s) / S_stop): falls linearly, is 0 from step S_stop on."""
    return weight * max(0, stop - step) / stop if stop > 0 else 0.0


def interpolate(h, width: int):
    """Resize the feature axis by linear interpolation, without parameters. h: (..., d) -> (..., width).

    Output j reads position x_j = max(0, (j + 0.5) d / width - 0.5), between its two neighbours in proportion. That
    features next to each other mean anything is not claimed: it is what the paper is reported to do."""
    if h.shape[-1] == width:
        return h
    return F.interpolate(h.flatten(0, -2)[:, None], size=width, mode="linear", align_corners=False).view(
        *h.shape[:-1], width)


def cosine_loss(student, teacher):
    """(L_proj, cosine), both 0-d: minus the mean cosine over tokens, in float32. student, teacher: (B, T, d)."""
    cos = F.cosine_similarity(student.float(), teacher.float(), dim=-1).mean()
    return -cos, cos


def logsum_loss(student, teacher, power: float = 4.0, eps: float = 1e-5):
    """(L_proj, cosine): log of the mean of |BN(student) - BN(teacher)|^power over tokens and features, in float32.

    BN is batch norm without gain or bias, over all tokens of the micro-batch. The paper's own normalisation is not
    known; this is the cited authors', but for the mean in place of the sum, which only shifts the log."""
    normed = [F.batch_norm(h.float().flatten(0, -2), None, None, training=True, eps=eps) for h in (student, teacher)]
    loss = ((normed[0] - normed[1]).abs() ** power).mean().log()
    return loss, cosine_loss(student.detach(), teacher)[1]


LET_LOSSES = {"cosine": cosine_loss, "logsum": logsum_loss}


class LET(nn.Module):
    """The teacher's side of late-to-early training, and the learned projection where one is asked for.

    teacher: a frozen GPT. teacher_layer: a block number, negative from the end. norm: pass its state through its
    final norm (what Hugging Face calls the last hidden state; the paper does not say). resize: how the widths are
    brought together when they differ, `interpolate` or `project` (a learned linear map, trained along with the
    student and dropped with the teacher); side: which of the two is resized, `teacher` (what is reported of
    the paper) or `student` (where a learned map cannot collapse the target)."""

    def __init__(self, teacher, student_width: int, teacher_layer=-1, norm=True, loss="cosine", resize="interpolate",
                 side="teacher"):
        super().__init__()
        # In a list, so that the teacher is no submodule: its weights are neither trained nor saved with the run.
        self._teacher = [teacher]
        n_layer, d_T = teacher.config.n_layer, teacher.config.n_embd
        self.teacher_layer = teacher_layer + n_layer + 1 if teacher_layer < 0 else teacher_layer
        if not 0 <= self.teacher_layer <= n_layer:
            raise BadInput(f"--let_teacher_layer={teacher_layer}: the teacher has blocks 1 to {n_layer}")
        self.norm, self.side, self.loss = norm, side, LET_LOSSES[loss]
        self.width = student_width if side == "teacher" else d_T
        self.projection = None
        if resize == "project":
            self.projection = nn.Linear(*((d_T, student_width) if side == "teacher" else (student_width, d_T)),
                                        bias=False)

    @torch.no_grad()
    def teach(self, idx):
        """h_T: (B, T, d_T) for token ids idx (B, T). Blocks after the asked one, and the head, are not run."""
        teacher = self._teacher[0]
        h, _ = teacher.trunk(idx, blocks=self.teacher_layer)
        return teacher.norm(h) if self.norm else h

    def forward(self, h_M, h_T):
        """(L_proj, mean cosine), 0-d each. h_M: (B, T, d_M) from the student, h_T: (B, T, d_T) from teach()."""
        resized = (lambda h: self.projection(h)) if self.projection else (lambda h: interpolate(h, self.width))
        if self.side == "teacher":
            return self.loss(h_M, resized(h_T))
        return self.loss(resized(h_M), h_T)

    def compile_teacher(self):
        self._teacher[0].trunk = torch.compile(self._teacher[0].trunk, dynamic=False)

    def average_gradients(self):
        """The projection is no part of the model that DDP looks after: its gradients are averaged here."""
        if dist.is_initialized():
            for p in self.parameters():
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()

    def flops_per_token(self, length: int) -> int:
        """The teacher's forward pass on sequences of this length, and the projection's forward and backward."""
        forward = self._teacher[0].flops_per_token(backward=False, head=False, blocks=self.teacher_layer, length=length)
        return forward + (6 * self.projection.weight.numel() if self.projection else 0)


# ----------------------------------------------------------------------------------------------------------------------
# LET's rivals: learning from the teacher's probabilities


@dataclass
class Recipe:
    """What a way of distilling minimises, per token:

        hard_weight * nll  +  weight * tau^2 D_beta(P || Q)  +  cosine_weight * (1 - cos(h_M, h_T))

    D_beta: see `divergence`; the cosine is of the last states, after the final norms. tau^2 keeps the soft term's
    gradient level with the hard one's, whatever tau (Hinton et al. 2015, section 2); GKD goes without it. Each field is
    a flag of train.py, `--distill_` and its name, where -1 stands for the method's own value."""

    weight: float  # of the soft term
    hard_weight: float = -1.0  # of the next-token loss; -1: 1 - weight
    cosine_weight: float = 0.0
    temperature: float = 1.0
    beta: float = 0.0
    on_policy: float = 0.0  # share of the steps that train on the student's own continuations
    stop: float = 0.0  # where plain training takes over: steps, or a share of the run if below 1; 0: never

    def teaches(self) -> bool:
        return self.weight > 0 or self.cosine_weight > 0


# Where the papers are silent: the weights of rkd, salt and kd (Hinton's has a "considerably lower" one for the hard
# term), the temperatures of rkd and salt, kd's among those between 1 and 20 that the paper uses.
RECIPES = {
    "rkd": Recipe(0.5),  # reverse KD: a smaller teacher, all along (Rawat et al. 2024, arXiv 2410.18779)
    "salt": Recipe(0.5, stop=0.17),  # the same, then plain: 36K of some 209K steps there
    "kd": Recipe(0.9, temperature=2.0),  # Hinton et al. 2015, arXiv 1503.02531
    "distilbert": Recipe(5.0, 2.0, 1.0, temperature=2.0),  # Sanh et al. 2019, arXiv 1910.01108, and its code
    "reverse_kl": Recipe(0.5, beta=1.0),  # the exact, single-step term of MiniLLM (Gu et al. 2023, arXiv 2306.08543),
    # beside the paper's language-modelling loss; its policy gradient over whole answers is not here
    "gkd": Recipe(1.0, temperature=0.9, beta=0.5, on_policy=0.5),  # Agarwal et al. 2024, arXiv 2306.13649; TRL's values
    "step_by_step": Recipe(0.5),  # Hsieh et al. 2023, arXiv 2305.02301: the teacher's text; weight is the rationale's
}


def make_recipe(method: str, given: dict) -> Recipe:
    """The method's recipe with the values of `given`, by name, that are not -1. A weight of 0 turns the teacher off:
    what is left is the plain loss, unless a cosine weight is asked for too."""
    r = replace(RECIPES[method], **{name: value for name, value in given.items() if value != -1})
    if r.weight == 0 and given.get("cosine_weight", -1) == -1:
        r = replace(r, cosine_weight=0.0, hard_weight=1.0)
    return r if r.hard_weight != -1 else replace(r, hard_weight=1 - r.weight)


def divergence(log_p, log_q, beta: float):
    """(D, dD/dz) row by row: the generalised Jensen-Shannon divergence of P from Q and its gradient at the logits z of
    Q = softmax(z), which log_p does not depend on. log_p, log_q: (n, V), finite, float32. Returns (n,) and (n, V).

        D = beta KL(P || M) + (1 - beta) KL(Q || M),  M = beta P + (1 - beta) Q
        dD/dz = (1 - beta) Q (log Q/M - KL(Q || M))

    (GKD, eq. 1). It tends to 0 at both ends of beta, so there it stands for the exact KL, as in TRL: KL(P || Q) at 0,
    gradient Q - P; KL(Q || P) at 1, gradient Q (log Q/P - KL(Q || P)). Between them it is smaller by some four times:
    mind the learning rate."""
    q = log_q.exp()
    if beta == 0:
        p = log_p.exp()
        return (p * (log_p - log_q)).sum(-1), q.sub_(p)
    if beta == 1:
        ratio = log_q - log_p
        d = (q * ratio).sum(-1)
        return d, q.mul_(ratio.sub_(d[:, None]))
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
    ratio = log_q - log_m
    kl_q = (q * ratio).sum(-1)
    kl_p = (log_p.exp() * (log_p - log_m)).sum(-1)
    return beta * kl_p + (1 - beta) * kl_q, q.mul_(ratio.sub_(kl_q[:, None])).mul_(1 - beta)


def with_rest_bucket(log_p, log_q, k: int):
    """log_p, but outside its k likeliest tokens it takes the proportions of Q, with the same mass in all.

    So a divergence from Q becomes that of k + 1 outcomes, the k tokens and `any other`, as the outcomes of one bucket
    all have the ratio of the bucket; its gradient too. Dropping the rest would bias it. log_p, log_q: (n, V)."""
    top = log_p.topk(k).indices
    outside = torch.ones_like(log_p, dtype=torch.bool).scatter_(-1, top, False)
    rest = [h.masked_fill(~outside, -math.inf).logsumexp(-1, keepdim=True) for h in (log_p, log_q)]
    return torch.where(outside, log_q + (rest[0] - rest[1]), log_p)


class LinearDistillation(torch.autograd.Function):
    """Next-token loss and divergence from the teacher in one pass over the logits, chunk by chunk: see
    `linear_distillation`, and model.LinearCrossEntropy, whose plan this is."""

    @staticmethod
    def forward(ctx, x, weight, targets, x_T, head_T, bias_T, vocab_size, r, tau_squared, top_k, chunk, dtype,
                need_grad):
        x_low, w_low, x_T, head_T = x.to(dtype), weight.to(dtype), x_T.to(dtype), head_T.to(dtype)
        V = min(vocab_size, len(head_T))  # tokens that both know
        counted = targets != IGNORE
        n = counted.sum().clamp(min=1)
        full = torch.promote_types(dtype, torch.float32)
        nll, soft, agree = x.new_zeros(3, dtype=full)
        dx = torch.empty_like(x_low) if need_grad else None
        dw = torch.zeros_like(weight) if need_grad else None
        soft_scale = r.weight * (r.temperature if tau_squared else 1 / r.temperature)  # tau^2, and 1 / tau of z / tau
        for i in range(0, len(x), chunk):
            rows, keep = slice(i, i + chunk), counted[i:i + chunk, None]
            target = targets[rows, None].clamp(min=0)
            z = (x_low[rows] @ w_low[:vocab_size].T).to(full)  # (chunk, vocab_size)
            v = F.linear(x_T[rows], head_T[:V], bias_T).to(full)  # (chunk, V)
            log_q1 = z.log_softmax(-1)
            log_q = log_q1 if r.temperature == 1 and V == vocab_size else (z[:, :V] / r.temperature).log_softmax(-1)
            log_p = (v / r.temperature).log_softmax(-1)
            if 0 < top_k < V:
                log_p = with_rest_bucket(log_p, log_q, top_k)
            d, soft_dz = divergence(log_p, log_q, r.beta)
            nll -= (log_q1.gather(1, target) * keep).sum()
            soft += (d * keep[:, 0]).sum()
            agree += ((log_q.gather(1, v.argmax(-1, keepdim=True)) == log_q.amax(-1, keepdim=True)) & keep).sum()
            if need_grad:
                if r.hard_weight:
                    dz = log_q1.exp_().mul_(r.hard_weight)
                    dz.scatter_add_(1, target, torch.full_like(target, -r.hard_weight, dtype=dz.dtype))
                    dz[:, :V].add_(soft_dz, alpha=soft_scale)
                else:
                    dz = F.pad(soft_dz.mul_(soft_scale), (0, vocab_size - V))
                dz = dz.to(dtype)
                dx[rows] = (dz @ w_low[:vocab_size]) * keep
                dw[:vocab_size] += dz.T @ (x_low[rows] * keep)
        nll, soft, agree = nll / n, soft * (r.temperature**2 if tau_squared else 1) / n, agree / n
        loss = r.hard_weight * nll + r.weight * soft
        if need_grad:
            ctx.save_for_backward(dx, dw, n)
            ctx.dtype = x.dtype
        ctx.mark_non_differentiable(nll, soft, agree)
        return loss, nll, soft, agree

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        dx, dw, n = ctx.saved_tensors
        scale = grad / n
        return dx.to(ctx.dtype) * scale.to(ctx.dtype), dw * scale, *[None] * 11


def linear_distillation(x, weight, targets, x_T, head_T, vocab_size: int, recipe: Recipe, tau_squared=True, top_k=0,
                        bias_T=None, chunk: int = 0):
    """(loss, nll, soft, agreement), 0-d, each a mean over the tokens whose target is not -100; only the first has a
    gradient: loss = hard_weight * nll + weight * soft, soft = tau^2 D_beta(P || Q), in nats.

    x: (N, C) and weight: (V_pad, C) make the student's logits, x_T: (N, C_T) and head_T: (V_T, C_T), bias_T: (V_T,) or
    None the teacher's. Rows past vocab_size are no tokens. Where the teacher has another number of tokens the soft term
    is over those that both have, each side renormalised. agreement: how often both like the same token best.

    Neither's logits ever exist whole: a chunk's are turned into its share of the gradients and forgotten. chunk: rows
    at a time; 0: as many as a CPU's cache holds (256 K logits) or keep a GPU busy (8 M), at least 64. FLOPs per token:
    6 C V, which the plain loss takes too, and 2 C_T V for the teacher's. Memory: up to ten arrays of (chunk, V)
    float32, 330 MB for 8 M logits; a single one of 8,192 tokens and V = 49,152 would be 1.6 GB."""
    chunk = chunk or max(64, (2**18 if x.device.type == "cpu" else 2**23) // vocab_size)
    device = "cpu" if x.is_meta else x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    need_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    with torch.autocast(device, enabled=False):
        bias_T = None if bias_T is None else bias_T.to(dtype)[:min(vocab_size, len(head_T))]
        return LinearDistillation.apply(x, weight, targets, x_T, head_T, bias_T, vocab_size, recipe, tau_squared, top_k,
                                        chunk, dtype, need_grad)


class Rival:
    """The teacher's side of the other ways of learning from it, as LET is of its own.

    teacher: a frozen model with trunk, norm and head. new_tokens: length of an on-policy continuation. The cosine term
    of unequal widths resizes the teacher's state by `interpolate`; DistilBERT's own has equal ones."""

    def __init__(self, teacher, method: str, recipe: Recipe, top_k=0, new_tokens=128, seed=0):
        self.teacher, self.recipe, self.tau_squared = teacher, recipe, method != "gkd"
        self.top_k, self.new_tokens, self.seed = top_k, new_tokens, seed

    @torch.no_grad()
    def teach(self, idx):
        """The teacher's last state after its final norm, (B, T, d_T), for token ids idx (B, T)."""
        return self.teacher.norm(self.teacher.trunk(idx)[0])

    def loss(self, x, head, targets, x_T, vocab_size: int, hard=True):
        """(loss, nll, soft, cosine, agreement), 0-d. x: (B, T, C), the student's state after its final norm; head:
        (V_pad, C); targets: (B, T); x_T from teach(). hard: with the next-token loss."""
        r = self.recipe if hard else replace(self.recipe, hard_weight=0.0)
        loss, nll, soft, agreement = linear_distillation(
            x.flatten(0, 1), head, targets.flatten(), x_T.flatten(0, 1),
            self.teacher.head.weight[:self.teacher.config.vocab_size], vocab_size, r, self.tau_squared, self.top_k,
            self.teacher.head.bias)
        cosine = torch.zeros_like(nll)
        if r.cosine_weight:
            counted = targets != IGNORE
            cosine = cosine_loss(x[counted], interpolate(x_T[counted], x.shape[-1]))[1]
            loss = loss + r.cosine_weight * (1 - cosine)
        return loss, nll, soft, cosine, agreement

    def on_policy(self, step: int) -> bool:
        """Whether this step trains on the student's own text: a function of the seed and the step, on every rank."""
        return random.Random(f"{self.seed} {step}").random() < self.recipe.on_policy

    def continued(self, model, idx, targets, place: int):
        """(idx, targets) with the last new_tokens tokens sampled from the student at the recipe's temperature, and only
        those counted; no gradient passes through the sampling. place: a number of this micro-batch and no other."""
        n = min(self.new_tokens, idx.shape[1])
        row = torch.cat((idx, targets[:, -1:]), dim=1)
        row = generate(model, row[:, :-n], n, self.recipe.temperature, seed=hash((self.seed, place)) % 2**63)
        targets = row[:, 1:].clone()
        targets[:, :-n] = IGNORE
        return row[:, :-1], targets

    def logged(self, soft, cosine, agreement, on_policy) -> dict:
        """Keys of metrics.jsonl. In a step on the student's own text train_loss is that of its own tokens."""
        return {"distill_weight": self.recipe.weight, "distill_loss": soft, "teacher_agreement": agreement,
                **({"distill_cosine": cosine} if self.recipe.cosine_weight else {}),
                **({"on_policy": on_policy} if self.recipe.on_policy else {})}

    def compile_teacher(self):
        self.teacher.trunk = torch.compile(self.teacher.trunk, dynamic=False)

    def flops_per_token(self, length: int) -> int:
        """The teacher's forward pass with its head, on sequences of this length."""
        return self.teacher.flops_per_token(backward=False, length=length)


# ----------------------------------------------------------------------------------------------------------------------
# A student that begins as some of its teacher's blocks


def spaced_blocks(n_teacher: int, n_student: int) -> list[int]:
    """Numbers, from 0, of the teacher's blocks that the student's begin as: evenly spaced, the first and the last among
    them. 6 of 12: 0, 2, 4, 7, 9, 11, those of DistilBERT's code."""
    return [round(i * (n_teacher - 1) / max(1, n_student - 1)) for i in range(n_student)]


def init_from_teacher(student, teacher):
    """Copy spaced_blocks of a larger teacher of ours, its embedding, final norm and head. Raises BadInput where the two
    differ in more than their blocks' number and the context."""
    here, there = student.config, getattr(teacher, "config", None)
    free = ("n_layer", "block_size", "layer_pattern", "chunk_size")
    differ = [f"{f.name} {getattr(there, f.name, None)} there, {getattr(here, f.name)} here" for f in fields(here)
              if f.name not in free and getattr(there, f.name, None) != getattr(here, f.name)]
    if differ or there.n_layer < here.n_layer:
        differ = differ or [f"{there.n_layer} blocks there, {here.n_layer} here"]
        raise BadInput(f"--init_from_teacher: the teacher is no deeper copy of the student ({'; '.join(differ)})")
    chosen = spaced_blocks(there.n_layer, here.n_layer)
    if [there.kinds()[k] for k in chosen] != [*here.kinds()]:
        raise BadInput(f"--init_from_teacher: the teacher's blocks {[k + 1 for k in chosen]} are of the kinds "
                       f"{''.join(there.kinds()[k] for k in chosen)}, the student's {here.kinds()}")
    for block, k in zip(student.blocks, chosen):
        block.load_state_dict(teacher.blocks[k].state_dict())
    for part in ("embed", "norm", "head"):  # a tied head stays tied: the values are copied, not the tensor
        getattr(student, part).load_state_dict(getattr(teacher, part).state_dict())
