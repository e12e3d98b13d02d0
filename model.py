"""model.py: the architectures, the loss over the vocabulary, and the sampler.

    python model.py runs/1/ckpt.pt --prompt "def " --tokens 200

The model is a decoder-only transformer in the style of Llama and Qwen3: RMSNorm before each branch,
rotary positions, grouped-query attention, an MLP (squared ReLU, gated or GELU), no biases. Mamba-2
can take the place of attention or stand beside it (`mixer`). A mixture of experts can take the
place of the MLP (`n_experts`).

The file in order: attention, MLP, block, GPT; Mamba-2; experts; initialization and muP; the loss
over the vocabulary; the terms of a training loss; scoring and sampling; then what all files of the
project share: tokenizers, checkpoints, errors, files and the command line.

Names and symbols
    B, T, C     sequences in a batch, tokens in a sequence, width of the residual stream (n_embd;
                d_model in papers)
    H, H_kv, D  query heads, key/value heads, channels of one head (head_dim; C / H by default)
    mixer       the part of a block that moves information between tokens: attention, Mamba-2, or
                both side by side
    E, k        experts, and experts that each token goes to (experts_per_token)
    P, N, G, Q  Mamba-2: channels of a head, state size per channel, groups, tokens of a chunk. The
                code of Mamba-2 writes b for the batch, as B and C are the paper's B_t and C_t there
    m_N, m_L, m_D  width, blocks and channels of a head over those of a base model (muP), see
                PARAM_RULES
    V, V_pad    vocabulary size, and V rounded up to a multiple of 64, for faster products on GPUs
    x           the residual stream, (B, T, C)
    state k     x after block k; blocks are numbered from 1, state 0 is the output of the embedding
    nats        the unit of the loss: negative log-likelihood with the natural logarithm
"""
import argparse
import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import signal
import sys
import time
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path

import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

IGNORE = -100  # a target with this value is not counted in the loss
MIXERS = {"attention": "A", "mamba2": "M", "hybrid": "H"}  # the letter of each kind of block


# --------------------------------------------------------------------------------------------------
# The transformer


@dataclass
class ModelConfig:
    """All that defines a GPT but its weights, with every default of the architecture. Raises
    BadInput (by `need`) for values that do not fit together.

    A new field that users set is also a flag of the same name in train.Config. If it changes what
    the model computes, an export must refuse it (teacher.hf_kind) or express it
    (teacher.standard_weights)."""

    vocab_size: int
    block_size: int = 256  # longest sequence, in tokens
    n_layer: int = 4
    n_embd: int = 192
    n_head: int = 2
    n_kv_head: int = 0  # key/value heads, each for n_head / n_kv_head query heads; 0: n_head
    head_dim: int = 0  # channels of one head; 0: C / H
    mlp: str = "relu2"  # swiglu | relu2 | gelu
    mlp_hidden: int = 0  # width inside the MLP; 0: 4 C, for swiglu 8/3 C: as many parameters
    qk_norm: bool = False  # RMSNorm on queries and keys, per head, as in Qwen3
    tie_embeddings: bool = False
    rope_base: float = 10_000.0
    norm_eps: float = 1e-6
    mixer: str = "attention"  # attention | mamba2 | hybrid, or one letter per block, see kinds()
    d_state: int = 64  # Mamba-2: N, state size per channel
    ssm_head_dim: int = 64  # Mamba-2: P, channels of one head
    expand: int = 2  # Mamba-2: width inside it over C
    n_groups: int = 1  # Mamba-2: heads of one group share B and C, as query heads share keys
    chunk_size: int = 64  # Mamba-2: Q, tokens whose interactions are written out as a matrix
    d_conv: int = 4  # Mamba-2: width of the causal convolution
    ssm_norm: bool = True  # Mamba-2: gated RMSNorm before the output projection
    n_experts: int = 0  # 0: a dense MLP
    experts_per_token: int = 2
    expert_hidden: int = 0  # width inside an expert; 0: mlp_hidden / k
    width_ratio: float = 1.0  # m_N: width over that of the base model, see PARAM_RULES
    depth_ratio: float = 1.0  # m_L: blocks over those of the base model
    head_ratio: float = 1.0  # m_D: channels of a head over those of the base model

    def __post_init__(self):
        need(self.mlp in ("swiglu", "relu2", "gelu"), self, "mlp", "no such kind")
        self.n_kv_head = self.n_kv_head or self.n_head
        if self.head_dim == 0:
            need(self.n_embd % (2 * self.n_head) == 0, self, "n_embd n_head",
                 "each head needs the same even number of channels")
            self.head_dim = self.n_embd // self.n_head
        if self.mlp_hidden == 0:
            swiglu = max(1, round(8 / 3 * self.n_embd / 64)) * 64
            self.mlp_hidden = swiglu if self.mlp == "swiglu" else 4 * self.n_embd
        if self.expert_hidden == 0:
            self.expert_hidden = max(1, self.mlp_hidden // self.experts_per_token)
        need(self.n_head % self.n_kv_head == 0, self, "n_head n_kv_head",
             "the first must be a multiple of the second")
        need(self.n_experts == 0 or self.experts_per_token <= self.n_experts, self,
             "experts_per_token n_experts", "a token goes to more experts than there are")
        if {"M", "H"} & {*self.kinds()}:
            need(self.expand * self.n_embd % (self.ssm_head_dim * self.n_groups) == 0, self,
                 "n_embd ssm_head_dim", f"{self.expand} * n_embd must be a multiple of "
                 f"{self.n_groups} * ssm_head_dim")

    def kinds(self) -> str:
        """The kind of each block, one letter per block, such as "MMAMM". A: attention and MLP;
        M: Mamba-2, no MLP; H: attention beside Mamba-2, and MLP; L: a linear map with a bias
        (AffineBlock)."""
        kinds = MIXERS[self.mixer] * self.n_layer if self.mixer in MIXERS else self.mixer
        need({*kinds} <= {*"AMHL"}, self, "mixer",
             f"one of {', '.join(MIXERS)}, or letters A, M, H, L")
        need(len(kinds) == self.n_layer, self, "mixer n_layer", f"{len(kinds)} letters")
        return kinds


class RMSNorm(nn.Module):
    """x / rms(x) * gain over the last axis, in the dtype of x (Zhang & Sennrich 2019, arXiv
    1910.07467), where rms(x) = sqrt(mean(x^2) + eps). scale: a constant factor on the gain."""

    def __init__(self, dim: int, eps: float, scale: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps, self.scale = eps, scale

    def forward(self, x):
        gain = self.weight if self.scale == 1 else self.weight * self.scale
        on_cpu = x.device.type == "cpu" and x.dtype == gain.dtype
        if on_cpu and not torch.compiler.is_compiling():
            return RMSNormOnCPU.apply(x, gain, self.eps)  # at the end of this section
        return F.rms_norm(x, x.shape[-1:], gain.to(x.dtype), self.eps)


class Fused(nn.Linear):
    """Several matrices on the same input, stored as one: `Fused(C, q=512, k=128, v=128)(x)` returns
    the tuple (q, k, v). One large product is faster than three small ones. The optimizer treats the
    pieces (`self.pieces`, {name: rows}) as separate matrices."""

    def __init__(self, d_in: int, **pieces: int):
        super().__init__(d_in, sum(pieces.values()), bias=False)
        self.pieces = pieces

    def forward(self, x):
        return super().forward(x).split(tuple(self.pieces.values()), dim=-1)


def rope_tables(length: int, head_dim: int, base: float):
    """Tables for `rotate`, two of (length, 1, D) in float32: cos and sin of the angle
    t * base^(-2j/D) of position t and pair j. Rotary position embedding, Su et al. 2021, arXiv
    2104.09864. Channels j and j + D/2 form pair j: both have its cosine; channel j has its sine
    negated, as `rotate` needs it."""
    frequency = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle = torch.arange(length, dtype=torch.float32)[:, None, None] * frequency  # (length, 1, D/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x, cos, sin):
    """Rotates each pair (a, b) = (x_j, x_{j+D/2}), paired as in Llama, by the angle of its position
    to (a cos - b sin, b cos + a sin), in the dtype of x. x: (B, T, heads, D); cos, sin: (T, 1, D)
    from rope_tables, whose sin is negated in the first half of the channels."""
    return x * cos.to(x.dtype) + x.roll(x.shape[-1] // 2, dims=-1) * sin.to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention: softmax(q k^T / sqrt(D m_D)) v, each query head with the k
    and v of its group. m_D is 1 without muP, see PARAM_RULES."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = c.n_head, c.n_kv_head, c.head_dim
        self.scale = (self.head_dim * c.head_ratio) ** -0.5
        inner, kv = c.n_head * self.head_dim, c.n_kv_head * self.head_dim
        self.qkv = Fused(c.n_embd, q=inner, k=kv, v=kv)
        self.o = nn.Linear(inner, c.n_embd, bias=False)
        self.q_norm = RMSNorm(self.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x, cos, sin, cache=None):
        """Grouped-query attention from x (B, T, C) to (B, T, C), through self.qkv and self.o.

        q and k, in heads of D channels, go through q_norm and k_norm, then through `rotate` with
        cos, sin (T, 1, D). Query head h reads key/value head h // (n_head / n_kv_head); scores have
        the factor self.scale; a token sees itself and those before it. With a cache,
        cache.append(k, v), each (B, H_kv, T, D), adds these tokens and returns the keys and values
        of all tokens so far. The queries are then those of the last T tokens."""
        B, T, _ = x.shape
        q, k, v = self.qkv(x)
        heads = B, T, -1, self.head_dim
        q = rotate(self.q_norm(q.view(heads)), cos, sin).transpose(1, 2)  # (B, H, T, D)
        k = rotate(self.k_norm(k.view(heads)), cos, sin).transpose(1, 2)  # (B, H_kv, T, D)
        v = v.view(heads).transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v)
        # The queries are the last T of T_all positions. T = T_all is the plain causal mask, a
        # single query sees every key, and several queries after a past need a mask of their own.
        T_all = k.shape[2]
        mask = None
        if T not in (1, T_all):
            mask = torch.ones(T, T_all, dtype=torch.bool, device=x.device).tril(T_all - T)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=T == T_all, scale=self.scale,
            enable_gqa=self.n_kv_head != self.n_head)
        return self.o(y.transpose(1, 2).reshape(B, T, -1))


def activation(kind: str, h):
    """swiglu: silu(gate) * up of h = (gate, up). relu2: relu(up)^2, gelu: gelu(up) of h = (up,).
    Each is elementwise."""
    if kind == "swiglu":
        gate, up = h
        return F.silu(gate) * up
    if kind == "gelu":
        return F.gelu(h[0])
    up = F.relu(h[0])
    return up * up  # not up.square(), which autocast on CUDA computes in float32


def up_pieces(kind: str, hidden: int) -> dict[str, int]:
    """{name: rows} of the matrices before the activation: `up`, and for swiglu `gate` before it."""
    names = ["gate", "up"] if kind == "swiglu" else ["up"]
    return dict.fromkeys(names, hidden)


class MLP(nn.Module):
    """The network that acts on each token by itself: down(activation(up(x)))."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.kind = c.mlp
        self.up = Fused(c.n_embd, **up_pieces(c.mlp, c.mlp_hidden))
        self.down = nn.Linear(c.mlp_hidden, c.n_embd, bias=False)

    def forward(self, x):
        return self.down(activation(self.kind, self.up(x)))


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)): the mixer moves information between tokens, the
    MLP acts on each token by itself.

    kind: A, the mixer is attention; M, it is Mamba-2, which has a gate of its own and no MLP after
    it; H, it is the sum of both on the same input. Attention is `self.attention`, Mamba-2 is
    `self.ssm`, and what a block lacks is None. Each branch has the factor 1 / m_L, see PARAM_RULES.
    """

    def __init__(self, c: ModelConfig, kind: str):
        super().__init__()
        self.kind = kind
        self.scale = 1 / c.depth_ratio
        self.mixer_norm = RMSNorm(c.n_embd, c.norm_eps)
        self.attention = Attention(c) if kind in "AH" else None
        self.ssm = Mamba2(c) if kind in "MH" else None
        self.mlp_norm = RMSNorm(c.n_embd, c.norm_eps) if kind in "AH" else None
        self.mlp = (MoE(c) if c.n_experts else MLP(c)) if kind in "AH" else None

    def forward(self, x, cos, sin, cache=None):
        u = self.mixer_norm(x)
        if self.attention is not None:
            x = torch.add(x, self.attention(u, cos, sin, cache), alpha=self.scale)
        if self.ssm is not None:
            x = torch.add(x, self.ssm(u, cache), alpha=self.scale)
        if self.mlp is not None:
            x = torch.add(x, self.mlp(self.mlp_norm(x)), alpha=self.scale)
        return x


class AffineBlock(nn.Module):
    """x + (W x + b) / m_L for each token by itself: a linear block, kind L. `probes.py prune` puts
    it in the place of a block that is nearly linear. It starts at W = 0 and b = 0, the identity,
    and weight decay pulls W back there."""

    kind = "L"
    attention = ssm = mlp = None  # as a Block that has none of them

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.affine = nn.Linear(c.n_embd, c.n_embd)
        self.scale = 1 / c.depth_ratio

    def forward(self, x, cos, sin, cache=None):
        return torch.add(x, self.affine(x), alpha=self.scale)


class GPT(nn.Module):
    """Embedding, blocks, final norm, and the head that turns the residual stream into logits.

    `forward` stops before the head: the loss forms the logits in chunks (see chunked_loss), and
    sampling needs those of the last token alone."""

    compiled = False  # whether compile() was called

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.config = c
        V_pad = math.ceil(c.vocab_size / 64) * 64
        self.embed = nn.Embedding(V_pad, c.n_embd)
        self.blocks = nn.ModuleList(
            AffineBlock(c) if kind == "L" else Block(c, kind) for kind in c.kinds())
        self.norm = RMSNorm(c.n_embd, c.norm_eps, 1 / c.width_ratio)  # muP's factor on the logits
        self.head = nn.Linear(c.n_embd, V_pad, bias=False)
        if c.tie_embeddings:
            self.head.weight = self.embed.weight
        cos, sin = rope_tables(c.block_size, c.head_dim, c.rope_base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        init_weights(self)

    @property
    def context_limit(self):
        """The longest context, in tokens: block_size, or infinity where no block has attention."""
        attends = any(block.attention is not None for block in self.blocks)
        return self.config.block_size if attends else math.inf

    def trunk(self, idx, hidden=(), caches=None, blocks=None):
        """Embedding and blocks, without the final norm.

        idx: (B, T) token ids. hidden: numbers of the states to return. caches: one Cache per block,
        which holds the tokens before idx and is extended in place. blocks: run only this many
        blocks, the first ones. Returns (x (B, T, C), states): states is a tuple with one (B, T, C)
        for each number in `hidden`. Raises ValueError for a context longer than block_size."""
        past = caches[0].length if caches else 0  # tokens before idx
        T = idx.shape[1]
        if past + T > self.context_limit:
            raise ValueError(f"{past + T} tokens, but block_size is {self.config.block_size}")
        cos, sin = self.cos[past:past + T], self.sin[past:past + T]  # (T, 1, D)
        x = self.embed(idx)
        states = {0: x}
        for k, block in enumerate(self.blocks[:blocks], start=1):
            cache = caches[k - 1] if caches else None
            x = block(x, cos, sin, cache)
            if cache:
                cache.length += T
            states[k] = x
        return x, tuple(states[k] for k in hidden)

    def forward(self, idx, hidden=(), caches=None):
        """The trunk and the final norm. Returns (x, states): x (B, T, C) is after the final norm,
        the states are before it."""
        x, states = self.trunk(idx, hidden, caches)
        return self.norm(x), states

    def logits(self, x):
        """x (..., C) after the final norm -> logits (..., V), without the padding."""
        return self.head(x)[..., :self.config.vocab_size]

    def loss(self, x, targets, divisor=None):
        """The next-token loss in nats, 0-d: the sum over the counted targets (B, T) by `divisor`,
        which is their number by default. x: (B, T, C) from forward.

        Its gradient cannot be differentiated again. Where a second derivative is needed, take
        `next_token_loss` of `logits(x)`."""
        summed, _ = chunked_loss(next_token_loss, x.flatten(0, 1), self.head.weight,
                                 targets.flatten(), vocab_size=self.config.vocab_size,
                                 compiled=self.compiled)
        if divisor is None:
            divisor = (targets != IGNORE).sum().clamp(min=1)
        return summed / divisor

    def compile(self, *args, **kw):
        """Compile the forward pass in place, and the loss on logits with it. The loop over experts
        stays uncompiled: its shapes depend on the data, and each would be compiled anew."""
        self.compiled = True
        for moe in self.moes():
            moe.loop = torch.compiler.disable(expert_loop)
        super().compile(*args, **kw)

    def moes(self) -> list["MoE"]:
        """The mixtures of experts, one for each block that has one."""
        return [b.mlp for b in self.blocks if isinstance(b.mlp, MoE)]

    def num_params(self, active=False) -> int:
        """Number of parameters; a tied matrix counts once. active: only those that one token uses,
        with k of the E experts."""
        total = sum(p.numel() for p in self.parameters())
        if active:
            total -= sum(m.up.numel() + m.down.numel() - m.active_params() for m in self.moes())
        return total

    def flops_per_token(self, backward=True, head=True, blocks=None, length=None) -> int:
        """Floating-point operations (FLOPs) per token, in sequences of `length` tokens (default
        block_size). backward: of the backward pass too; head: of the head too; blocks: of the first
        blocks alone.

        Each weight in a matrix product counts 2. Each block with attention counts 4 T H D (the full
        T x T square, as nanoGPT and PaLM count it), and each with Mamba-2 its convolution and scan
        (see ssd). Of the experts, those that a token goes to count. The embedding is a look-up and
        costs nothing. The backward pass costs twice the forward pass. With attention in n_layer
        blocks and H D = C this gives 6 N + 12 n_layer C T, where N is the number of parameters
        without the embedding."""
        c = self.config
        forward = 2 * self.head.weight.numel() if head else 0
        for b in self.blocks[:blocks]:
            forward += 2 * sum(p.numel() for p in b.parameters() if p.ndim == 2)
            if b.attention is not None:
                forward += 4 * c.n_head * c.head_dim * (length or c.block_size)
            if b.ssm is not None:
                forward += b.ssm.flops_per_token()
            if isinstance(b.mlp, MoE):
                forward += 2 * b.mlp.active_params()
        return 3 * forward if backward else forward


def logical_pieces(model: nn.Module) -> dict[str, list[tuple[str, int]]]:
    """The logical matrices that each weight holds, as {name of the weight: [(piece, rows)]}:
    {"blocks.0.attention.qkv.weight": [("q", 64), ("k", 32), ("v", 32)],
     "blocks.0.attention.o.weight": [("o", 64)], ...}. A stack of experts lists the pieces of
    expert 0, then those of expert 1, ... A tied head is listed as the embedding alone."""
    pieces = {"embed.weight": [("embed", model.embed.weight.shape[0])]}
    for name, m in model.named_modules():
        if isinstance(m, Fused):
            pieces[f"{name}.weight"] = [*m.pieces.items()]
        elif isinstance(m, nn.Linear) and m.weight is not model.embed.weight:
            pieces[f"{name}.weight"] = [(name.rpartition(".")[2], m.out_features)]
        elif isinstance(m, MoE):
            for weight, rows in m.pieces.items():
                pieces[f"{name}.{weight}"] = [*rows.items()] * len(m.up)
    return pieces


def inverse_rms(x, eps: float):
    """1 / rms(x) over the last axis, which is kept with length 1."""
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square()
    return (squares / x.shape[-1] + eps).rsqrt()


class RMSNormOnCPU(torch.autograd.Function):
    """RMSNorm with few passes over memory: torch's own has no fused kernel on CPUs and takes more
    than twice as long.

    With r = 1 / rms(x) and n = x r: y = n w; dw = sum of dy n over tokens; dx = r (dy w - n m),
    where m is the mean of dy w n over channels. The backward pass forms r again, so that a second
    derivative sees that r depends on x."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return (x * inverse_rms(x, eps)).mul_(weight)

    @staticmethod
    def backward(ctx, dy):
        """The gradients (dx, dw, None) of y = x r w with respect to x (..., C), weight w (C,) and
        eps, from dy (..., C): see the class. ctx.saved_tensors are x and w; ctx.eps is eps."""
        x, w = ctx.saved_tensors
        r = inverse_rms(x, ctx.eps)
        n = x * r
        dyn = (dy * n).flatten(0, -2)  # (tokens, C)
        mean = (dyn @ w).view(r.shape) / x.shape[-1]
        return torch.addcmul(dy * w, n, mean, value=-1) * r, dyn.sum(0), None


# --------------------------------------------------------------------------------------------------
# Mamba-2 (Dao & Gu 2024, arXiv 2405.21060). Each head carries a state h (P, N) from token to token:
#
#     h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T,    y_t = h_t C_t + D x_t,
#
# where x_t (P,), B_t (N,), C_t (N,) and dt_t > 0 come from the token, and A < 0 and D are learned.
# As one linear map from all x to all y, without D, this is y = (L o C B^T) (dt x), with o the
# elementwise product: attention without softmax, under a mask of decays L_ts = exp(sum of dt A from
# s + 1 to t) for s <= t, else 0. The first form takes one step after the other; the second is large
# products of matrices, whose work grows with T^2. State-space duality uses the second within chunks
# of Q tokens, and the first between chunks.


def ssd_recurrence(x, dt, A, B, C, state=None):
    """The recurrence of Mamba-2, token by token, in each head: h_t = exp(dt_t A) h_{t-1} + dt_t x_t
    B_t^T and y_t = h_t C_t. The caller adds the skip D x_t.

    x: (b, T, H, P); dt: (b, T, H), positive; A: (H,), negative; B, C: (b, T, G, N): the first H / G
    heads use group 0, the next ones group 1, and so on; state: h before the first token, (b, H, P,
    N), None for 0. x, B and C may have a lower dtype than dt and A. Returns (y (b, T, H, P) in the
    dtype of x, h after the last token in the dtype of dt)."""
    heads = x.shape[2] // B.shape[2]
    B, C = (t.repeat_interleave(heads, dim=2).to(dt.dtype) for t in (B, C))  # (b, T, H, N)
    h = 0.0 if state is None else state
    ys = []
    for t in range(x.shape[1]):
        decay = (dt[:, t] * A).exp()[..., None, None]
        h = decay * h + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        ys.append((h @ C[:, t, ..., None])[..., 0])
    return torch.stack(ys, 1).to(x.dtype), h


def ssd(x, dt, A, B, C, chunk: int, state=None):
    """The recurrence of Mamba-2 by matrix products within chunks (section 6 of the paper), without
    D x. Any length.

    Within a chunk of Q tokens y = (L o C B^T)(dt x), with the decays L_ts = exp(sum of dt A from
    s + 1 to t) for s <= t, else 0. Each chunk adds to the state at its end. A loop over the chunks
    carries the state h from chunk to chunk; h C_t, decayed from the chunk's start to t, is added to
    y_t.

    x: (b, T, H, P); dt: (b, T, H), positive; A: (H,), negative; B, C: (b, T, G, N), H a multiple of
    G; state: (b, H, P, N) before the first token, None for 0. Returns (y (b, T, H, P), the state
    after the last token). Decays are formed in the dtype of dt, which should be float32; the
    products run in the dtype of x or under autocast. FLOPs: b T (2 Q N G + 2 Q P H + 4 P N H)."""
    b, T, H, P = x.shape
    G, N = B.shape[2:]
    R = H // G  # heads of a group
    Q = min(chunk, T)
    K = -(-T // Q)  # chunks; the last one is filled up with tokens of dt = 0, which change no state
    if K * Q > T:
        x, dt, B, C = (F.pad(t, (0, 0) * (t.ndim - 2) + (0, K * Q - T)) for t in (x, dt, B, C))
    x, dt = x.view(b, K, Q, G, R, P), dt.view(b, K, Q, G, R)
    B, C = (t.view(b, K, Q, G, N).transpose(2, 3) for t in (B, C))  # (b, K, G, Q, N)
    a = (dt * A.view(G, R)).cumsum(2)  # (b, K, Q, G, R): log of the decay since the chunk's start
    # exp(a_t + w_s) = L_ts dt_s. The clamp keeps the gradient of the logarithm at dt = 0 finite
    w = dt.clamp_min(torch.finfo(dt.dtype).tiny).log() - a

    # Within a chunk: scores C B^T once a group, times each head's mask of decays, times x
    future = torch.full((Q, Q), -math.inf, dtype=a.dtype, device=x.device).triu(1)
    a_t, w_s = (v.permute(0, 1, 3, 4, 2) for v in (a, w))
    L = (a_t[..., :, None] + w_s[..., None, :]).add_(future).exp_()  # (b, K, G, R, Q, Q)
    scores = (C @ B.mT)[:, :, :, None] * L
    y = scores.to(x.dtype) @ x.permute(0, 1, 3, 4, 2, 5)  # (b, K, G, R, Q, P)

    # What each chunk adds to the state at its end, and the state before each chunk
    to_end = (a[:, :, -1:] + w).exp()[..., None].to(x.dtype)
    added = (x * to_end).transpose(2, 3).flatten(4).mT @ B  # (b, K, G, R P, N)
    added = added.view(b, K, G, R, P, N).to(a.dtype)
    h = a.new_zeros(b, G, R, P, N) if state is None else state.view(b, G, R, P, N)
    decay = a[:, :, -1].exp()[..., None, None]  # over a whole chunk, (b, K, G, R, 1, 1)
    before = []
    # unbind has one gradient in all, where indexing would have one of full size for each chunk
    for one_decay, one_added in zip(decay.unbind(1), added.unbind(1), strict=True):
        before.append(h)
        h = one_decay * h + one_added

    # Between chunks: what the state before a chunk gives to each of its tokens
    carried = torch.stack(before, 1).to(x.dtype).flatten(3, 4)  # (b, K, G, R P, N)
    off = (C @ carried.mT).view(b, K, G, Q, R, P).transpose(2, 3)  # (b, K, Q, G, R, P)
    y = y.permute(0, 1, 4, 2, 3, 5) + off * a.exp()[..., None].to(x.dtype)
    return y.reshape(b, K * Q, H, P)[:, :T], h.view(b, H, P, N)


class CausalConv(nn.Module):
    """Depthwise convolution over time: y_t = bias + sum_j w_j x_{t - width + 1 + j}, per channel,
    j from 0 to width - 1. x: (B, T, channels). past: the width - 1 inputs before the first,
    (B, width - 1, channels); None for 0. Returns (y (B, T, channels), the last width - 1 inputs).
    """

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, x, past=None):
        width, T = self.weight.shape[-1], x.shape[1]
        w = self.weight.to(x.dtype)
        x = F.pad(x, (0, 0, width - 1, 0)) if past is None else torch.cat((past, x), dim=1)
        shifted = (x[:, j:j + T] * w[:, 0, j] for j in range(width))
        return sum(shifted, self.bias.to(x.dtype)), x[:, T:]


class Mamba2(nn.Module):
    """z, x, B, C, dt = in_proj(u); x, B, C = silu(conv(x, B, C)); y = ssd(x, ...) + D x; the output
    is out(norm(y silu(z))). From u (B, T, C) to (B, T, C); inside, the width is expand * C. The
    norm divides by the rms over the channels of a group, and has a gain for each channel."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        inner, BC = c.expand * c.n_embd, c.n_groups * c.d_state
        self.heads, self.head_dim = inner // c.ssm_head_dim, c.ssm_head_dim
        self.groups, self.chunk = c.n_groups, c.chunk_size
        self.sizes = inner, BC, BC  # channels of x, B, C
        self.in_proj = Fused(c.n_embd, z=inner, x=inner, B=BC, C=BC, dt=self.heads)
        self.conv = CausalConv(sum(self.sizes), c.d_conv)
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.D = nn.Parameter(torch.empty(self.heads))
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.norm = RMSNorm(inner, c.norm_eps) if c.ssm_norm else None
        self.out = nn.Linear(inner, c.n_embd, bias=False)

    def forward(self, u, cache=None):
        b, T, _ = u.shape
        cache = cache or Cache()  # a new one: no tokens before these
        z, x, B, C, dt = self.in_proj(u)
        xBC, cache.conv = self.conv(torch.cat((x, B, C), dim=-1), cache.conv)
        x, B, C = F.silu(xBC).split(self.sizes, dim=-1)
        x = x.view(b, T, self.heads, -1)
        B, C = (t.view(b, T, self.groups, -1) for t in (B, C))
        full = torch.promote_types(self.A_log.dtype, torch.float32)  # bf16 is too coarse for decays
        dt = F.softplus(dt.to(full) + self.dt_bias.to(full))  # (b, T, H)
        A = -self.A_log.to(full).exp()
        if cache.state is not None and T == 1:
            y, cache.state = ssd_recurrence(x, dt, A, B, C, cache.state)
        else:
            y, cache.state = ssd(x, dt, A, B, C, self.chunk, cache.state)
        y = (y + x * self.D[:, None].to(x.dtype)).reshape(b, T, -1) * F.silu(z)
        if self.norm is not None:
            parts = y.view(b, T, self.groups, -1)
            y = F.rms_norm(parts, parts.shape[-1:], None, self.norm.eps).view(b, T, -1)
            y = y * self.norm.weight.to(y.dtype)
        return self.out(y)

    def flops_per_token(self) -> int:
        """FLOPs per token of the forward pass in the convolution and the scan (see ssd)."""
        Q, P, H, GN = self.chunk, self.head_dim, self.heads, self.sizes[1]
        scan = 2 * Q * GN + 2 * Q * P * H + 4 * P * H * (GN // self.groups)
        return scan + 2 * self.conv.weight.numel()


# --------------------------------------------------------------------------------------------------
# Mixture of experts


class MoE(nn.Module):
    """Mixture of experts in place of the MLP: the sum of w_e expert_e(x) over the k experts e with
    the largest router probabilities.

    As in Qwen3-MoE: p = softmax(router x) in float32, w the k largest p over their sum, no shared
    expert, and no token is dropped. A forward pass leaves `balance_loss`, `z_loss` (the mean of
    logsumexp(router x)^2, which keeps the router's logits small) and `counts`, the number of tokens
    of each expert, (E,). `load` is each expert's share of the tokens of the last step, over all
    devices (class Router sets it). So the balance is that of a whole batch, not of a micro-batch,
    and no device waits for another."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.kind, self.k = c.mlp, c.experts_per_token
        self.router = nn.Linear(c.n_embd, c.n_experts, bias=False)
        rows = up_pieces(c.mlp, c.expert_hidden)
        self.pieces = {"up": rows, "down": {"down": c.n_embd}}  # rows of one expert's matrices
        self.up = nn.Parameter(torch.empty(c.n_experts, sum(rows.values()), c.n_embd))
        self.down = nn.Parameter(torch.empty(c.n_experts, c.n_embd, c.expert_hidden))
        self.register_buffer("load", torch.full((c.n_experts,), 1 / c.n_experts))
        self.balance_loss = self.z_loss = self.counts = None
        self.loop = expert_loop

    def forward(self, x):
        shape = x.shape
        x = x.flatten(0, 1)  # (tokens, C)
        logits = self.router(x).float()
        p = logits.softmax(-1)
        w, chosen = p.topk(self.k, dim=-1)  # (tokens, k)
        w = w / w.sum(-1, keepdim=True)
        chosen = chosen.flatten()  # the experts of all (token, choice) pairs
        # The same as chosen.bincount(minlength=E), in a form whose size the compiler knows
        self.counts = torch.zeros_like(self.load, dtype=torch.int64).scatter_add_(
            0, chosen, torch.ones_like(chosen))
        self.balance_loss = load_balancing_loss(p, self.load)
        self.z_loss = logits.logsumexp(-1).square().mean()
        order = chosen.argsort(stable=True)  # the pairs, sorted by expert
        token = order // self.k
        rows = x[token].to(product_dtype(x))
        width, hidden = self.down.shape[1:]
        aligned = width % 8 == hidden % 8 == 0  # the kernel needs rows of whole 16 bytes
        grouped = x.is_cuda and rows.dtype == torch.bfloat16 and aligned
        products = grouped_products if grouped else self.loop
        h = products(rows, self.up, self.counts).chunk(len(self.pieces["up"]), dim=-1)
        y = products(activation(self.kind, h), self.down, self.counts)
        y = y * w.flatten()[order, None].to(y.dtype)
        return torch.zeros_like(x, dtype=y.dtype).index_add(0, token, y).view(shape)

    def active_params(self) -> int:
        """Weights of the k experts that one token goes to."""
        return self.k * (self.up[0].numel() + self.down[0].numel())


def load_balancing_loss(p, load):
    """The load-balancing loss E sum_e f_e P_e (Fedus et al. 2022, arXiv 2101.03961, eq. 4).

    p: (tokens, E), the router's probabilities, P_e their means; load: f_e, each expert's share of
    the tokens, without gradient. It is 1 if both are uniform, and larger if both prefer the same
    experts."""
    return len(load) * (load * p.mean(0)).sum()


def product_dtype(x):
    """The dtype in which matrix products of x run: that of autocast where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def grouped_products(x, weight, counts):
    """Each row of x times the matrix of its expert, in one kernel (CUDA). x: (rows, in), sorted by
    expert; weight: (E, out, in); counts: (E,), the rows of each expert. Returns (rows, out)."""
    return F.grouped_mm(x, weight.to(x.dtype).mT, offs=counts.cumsum(0).to(torch.int32))


def expert_loop(x, weight, counts):
    """The same as grouped_products, by a loop over experts, for any device and dtype."""
    ys = []
    for part, w in zip(x.split(counts.tolist()), weight.to(x.dtype), strict=True):
        # Padded to a multiple of 128 rows: on a CPU the first product of each new shape is slow.
        padded = F.pad(part, (0, 0, 0, -len(part) % 128))
        ys.append((padded @ w.T)[:len(part)])
    return torch.cat(ys)


# --------------------------------------------------------------------------------------------------
# Initialization, and how it and AdamW depend on the size of the model (--param)
#
# m_N, m_L, m_D: width, number of blocks and channels of a head over those of a base model, for
# which the settings were chosen. An entry (a, b) below is a factor m_N^a m_L^b on the base model's
# value: `init` on the standard deviation of the initial weights, `lr`, `decay` and `eps` on Adam's
# learning rate, decoupled weight decay and epsilon. What is not listed does not change. In the
# forward pass the logits have the factor 1 / m_N, each residual branch 1 / m_L, and the attention
# scores m_D^-1/2: they are then q k^T / (sqrt(D) sqrt(m_D)), which falls as 1 / D.
#
#   standard    m_N = m_L = m_D = 1
#   mup         m_N and m_D: Yang et al. 2022, arXiv 2203.03466, table 8
#   completep   m_L too: Dey et al. 2025, arXiv 2505.01618, with alpha = 1, where no learning rate
#               depends on depth
#
# muP has two equivalent forms of an output matrix: a factor on its output, or other initial weights
# and learning rates. The head has the first, the only one possible for a tied matrix; a router has
# the second. An expert is a hidden matrix (muP for mixtures of experts, arXiv 2508.09752). We know
# of no source for Mamba's B and C, whose number of rows does not grow with the width: they are
# initialized like a router and have the learning rate of in_proj. The width of MLPs and experts is
# taken to grow with n_embd. The standard deviation of hidden matrices is fan_in^-1/2 already. Muon
# needs no learning rates by width, only an update of the right norm: see optim.py.

PARAM_RULES = {
    "embedding": {"eps": (-1, 0)},
    "head": {"init": (0.5, 0), "eps": (-1, 0)},  # and an embedding that is tied to it
    "hidden": {"lr": (-1, 0), "decay": (1, 0), "eps": (-1, -1)},  # lr decay is the same at any size
    "router": {"init": (-0.5, 0), "lr": (-1, 0), "decay": (1, 0), "eps": (0, -1)},
    "vector": {"eps": (-1, -1)},  # vectors in the blocks, and multipliers
    "final": {"eps": (-1, 0)},  # the gain of the final norm
}


def param_factor(c: ModelConfig, kind: str, what: str) -> float:
    """The factor m_N^a m_L^b of PARAM_RULES on `what` (init, lr, decay, eps) of a kind of tensor;
    1 for what is not listed. m_N is c.width_ratio, m_L is c.depth_ratio."""
    a, b = PARAM_RULES[kind].get(what, (0, 0))
    return c.width_ratio ** a * c.depth_ratio ** b


@torch.no_grad()
def init_weights(model: GPT):
    """Initialize every parameter by its name; one without a rule raises ValueError.

    Matrices that write into the residual stream are 0, so that every block starts as the identity.
    Those that read it are N(0, 1 / fan_in). The embedding is N(0, 1), near the scale that the norms
    give. The head is small, so that the first loss is near ln V: logits of standard deviation s add
    s^2 / 2 to it, and s = 0.1. The router is as small, so that all experts begin alike. Mamba-2
    starts as in its authors' code: D = 1, A from -16 to -1, dt = softplus(dt_bias) log-uniform in
    [1e-3, 1e-1], the convolution uniform as torch's Conv1d."""
    c = model.config
    small = 0.1 * c.n_embd ** -0.5
    for name, p in model.named_parameters():
        path = name.removesuffix(".weight").removesuffix(".bias")
        match path.rpartition(".")[2]:
            case "norm" | "mixer_norm" | "mlp_norm" | "q_norm" | "k_norm" | "D":
                p.fill_(1.0)
            case "o" | "down" | "out" | "affine":
                p.zero_()
            case "qkv" | "up":
                p.normal_(std=p.shape[-1] ** -0.5)
            case "in_proj":
                p.normal_(std=p.shape[-1] ** -0.5)
                _, _, B, C, _ = p.split(tuple(model.get_submodule(path).pieces.values()))
                B.mul_(param_factor(c, "router", "init"))
                C.mul_(param_factor(c, "router", "init"))
            case "router" | "head" as kind:
                p.normal_(std=small * param_factor(c, kind, "init"))
            case "embed":
                p.normal_(std=small * param_factor(c, "head", "init") if c.tie_embeddings else 1.0)
            case "conv":
                p.uniform_(-(c.d_conv ** -0.5), c.d_conv ** -0.5)
            case "A_log":
                p.uniform_(1.0, 16.0).log_()
            case "dt_bias":
                dt = p.uniform_(math.log(1e-3), math.log(1e-1)).exp()
                p.copy_(dt + (-(-dt).expm1()).log())  # the inverse of softplus: log(e^dt - 1)
            case _:
                raise ValueError(f"no initialization rule for {name}")


# --------------------------------------------------------------------------------------------------
# The loss over the vocabulary


def next_token_loss(logits, targets):
    """Sum over counted targets of -log softmax(logits)[target], in nats, 0-d. logits: (n, V);
    targets: (n,) int64, of which those equal to IGNORE are not counted."""
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")


def loss_of_logits(loss, logits, vocab_size: int, dtype, per_token):
    """(sum, {name: sum}), all 0-d: what `loss` returns for logits (n, V_pad) without their padding,
    in `dtype`. loss, per_token: see chunked_loss."""
    value = loss(logits[:, :vocab_size].to(dtype), *per_token)
    return value if isinstance(value, tuple) else (value, {})


@functools.cache  # made at its first use: the compiler takes seconds to import
def compiled_loss_of_logits():
    return torch.compile(loss_of_logits, dynamic=False)


class KnownGradients(torch.autograd.Function):
    """Returns `value`, whose gradients dx and dw at x and weight have been computed already."""

    @staticmethod
    def forward(ctx, value, x, weight, dx, dw):
        ctx.save_for_backward(dx, dw)
        ctx.dtype = x.dtype
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        return None, dx.to(ctx.dtype) * grad, dw * grad, None, None


def chunk_sizes(weight, compiled: bool) -> tuple[int, int]:
    """(tokens of a chunk, tokens whose gradient is computed at a time), for chunked_loss. They
    change its speed and memory, and its result by rounding alone.

    On a CPU the second number gives 1 MB of float32 logits, which stays in the caches. On a GPU
    many tokens at a time need fewer kernels and fewer additions to dW. Compiled code does not write
    float32 logits to memory, so its chunks can be larger. The speed on a GPU is not measured."""
    if weight.device.type == "cpu":
        return 1024, max(32, 2**18 // len(weight))
    chunk = 4096 if compiled else 1024
    return chunk, chunk


def chunked_loss(loss, x, weight, *per_token, vocab_size: int, chunk=None, compiled=False):
    """The sum over N tokens of a loss on their logits x W^T, without holding all logits at once.

    x: (N, C); weight: W, (V_pad, C), of which the first vocab_size rows are tokens; per_token:
    further tensors (N, ...), such as targets. loss: a function of the logits (n, V) of some tokens,
    in float32 (float64 if x is), and of the same n rows of per_token. It returns its sum over these
    tokens, 0-d, or that and a dict of further 0-d sums, which get no gradient. Returns (the sum,
    the dict). The gradients have the dtypes of x and weight.

    One product forms the logits of `chunk` tokens (default: see chunk_sizes). Autograd computes the
    gradient at these logits at once, on a CPU for a few tokens at a time. The gradient takes the
    place of the logits, and two products give the chunk's share of dx and dW, which KnownGradients
    hands on. So nothing is computed twice, and the loss cannot be differentiated twice. The
    products run in the autocast dtype where autocast is on.

    compiled: torch.compile the loss with its gradient, one graph for each loss and shape."""
    device, dtype = x.device.type, product_dtype(x)
    full = torch.promote_types(dtype, torch.float32)
    need_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    default, part = chunk_sizes(weight, compiled)
    chunk = chunk or default
    loss_of_part = compiled_loss_of_logits() if compiled else loss_of_logits
    total = x.new_zeros((), dtype=full)
    sums = {}
    with torch.no_grad(), torch.autocast(device, enabled=False):
        x_low, w_low = x.to(dtype), weight.to(dtype)
        if need_grad:
            dx, dw = torch.empty_like(x_low), torch.zeros_like(weight)
        for i in range(0, len(x), chunk):
            x_chunk = x_low[i:i + chunk]
            logits = x_chunk @ w_low.T  # (chunk, V_pad)
            for j in range(0, len(logits), part):
                z = logits[j:j + part].detach().requires_grad_(need_grad)
                of_part = [t[i + j:i + j + len(z)] for t in per_token]
                with torch.set_grad_enabled(need_grad):
                    value, named = loss_of_part(loss, z, vocab_size, full, of_part)
                total += value
                sums = {name: sums.get(name, 0) + v for name, v in named.items()}
                if need_grad:
                    gradient, = torch.autograd.grad(value, z)
                    if len(z) == len(logits):
                        logits = gradient  # without a copy
                    else:
                        logits[j:j + part] = gradient
            if need_grad:
                dx[i:i + chunk] = logits @ w_low
                dw += logits.T @ x_chunk
    if need_grad:
        total = KnownGradients.apply(total, x, weight, dx, dw)
    return total, sums


# --------------------------------------------------------------------------------------------------
# Terms of the training loss. A step minimizes the sum of weight(step) * term(p) over its terms.


@dataclass
class Pass:
    """One forward pass, as the terms of the loss see it. A step has several, over micro-batches and
    ranks, and averages their losses.

    A term divides its sum over the counted targets of this pass by `counted`. This is the mean
    number of counted targets in the passes of the step, not the number in this pass. The average
    over the passes is then the loss per counted token of the step, although passes differ in their
    numbers. The list has one entry for ordinary data. Where a record has several sequences (see
    teacher.Records), it has one for each of them."""

    model: nn.Module
    idx: torch.Tensor  # (B, T)
    targets: torch.Tensor  # (B, T), IGNORE where not counted
    x: torch.Tensor  # (B, T, C), after the final norm
    states: dict  # {number: (B, T, C)}, the residual states that the terms need
    counted: list  # the mean number of counted targets in a pass
    step: int  # optimizer steps taken so far


class Term:
    """A term of the loss. A new term sets `name`, `hidden` if it reads residual states, and
    `__call__`, and overrides what else differs.

    A term on targets sums over the counted targets of a pass and divides by sum(p.counted), see
    Pass; a term on one sequence of each record divides by that sequence's entry of p.counted. A
    term on states alone takes the mean over all tokens: passes are equally large."""

    name = ""
    hidden = ()  # numbers of the residual states that it needs

    def weight(self, step: int) -> float:
        return 1.0

    def over(self, step: int) -> bool:
        """Whether the weight is 0 from this step on. The term is then dropped, and its memory is
        freed."""
        return False

    def batch(self, model, idx, targets, step: int, first: int):
        """The (idx, targets), (B, T) each, to train on in place of these. first: number of their
        first sequence in the order of training."""
        return idx, targets

    def __call__(self, p: Pass):
        """(loss, {name: value}), all 0-d tensors. The values go into metrics.jsonl, averaged over
        the passes of a step."""
        raise NotImplementedError

    def after_step(self):
        """Called once a step, after the weights have changed."""

    def logged(self, step: int) -> dict:
        """Further plain values for a line of metrics.jsonl."""
        return {}

    def flops_per_token(self, length: int, step: int) -> int:
        """FLOPs beside those of the model, on sequences of this length."""
        return 0

    def parameters(self) -> list:
        """Parameters that are trained along with the model."""
        return []

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict):
        """Restore what state_dict returned."""

    def compile(self):
        """Compile what the term runs at every step."""


class NextToken(Term):
    """The next-token loss. Its weight is 0 before step `begins`, while a distillation term, which
    contains it, takes its place."""

    name = "next_token"

    def __init__(self, begins: int = 0):
        self.begins = begins

    def weight(self, step):
        return 1.0 if step >= self.begins else 0.0

    def __call__(self, p):
        loss = p.model.loss(p.x, p.targets, sum(p.counted))
        return loss, {"train_loss": loss.detach()}


class Router(Term):
    """What a mixture of experts adds to the loss: balance * load-balancing loss + z * router
    z-loss, each the mean over the blocks with experts. After each step it gives every MoE the load
    of its experts in that step, over all ranks."""

    name = "router"

    def __init__(self, model, balance: float = 0.01, z: float = 1e-3):
        self.moes, self.balance, self.z = model.moes(), balance, z
        self.counts = 0  # tokens of each expert so far in this step, (blocks, E)

    def __call__(self, p):
        balance = torch.stack([m.balance_loss for m in self.moes]).mean()
        z = torch.stack([m.z_loss for m in self.moes]).mean()
        self.counts = self.counts + torch.stack([m.counts for m in self.moes])
        loss = self.balance * balance + self.z * z
        return loss, {"balance_loss": balance.detach(), "router_z": z.detach()}

    @torch.no_grad()
    def after_step(self):
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.counts)
        for m, counts in zip(self.moes, self.counts, strict=True):
            m.load.copy_(counts / counts.sum())
        self.counts = 0

    def logged(self, step):
        load = [m.load.tolist() for m in self.moes]
        return {"experts_unused": sum(row.count(0) for row in load), "expert_load": load}


def total(terms, p: Pass):
    """(the sum of weight(step) * term(p), all named values). A term of weight 0 is not computed."""
    loss, named = 0.0, {}
    for term in terms:
        weight = term.weight(p.step)
        if weight:
            value, values = term(p)
            loss = loss + weight * value
            named |= values
    return loss, named


# --------------------------------------------------------------------------------------------------
# Scoring and sampling


@torch.no_grad()
def log_likelihoods(model, sequences, at_once: int = 1 << 25) -> list[tuple[float, int]]:
    """(sum of log p of the counted targets in nats, their number) of each sequence (ids, targets),
    two lists of equal length.

    Sequences of similar length share a forward pass, of at most at_once / V tokens: all its logits
    would be `at_once` numbers. The head runs only where a target counts."""
    found = {}
    device = model.head.weight.device
    pad = functools.partial(nn.utils.rnn.pad_sequence, batch_first=True)
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i][0]), reverse=True)
    while order:
        longest = len(sequences[order[0]][0])
        n = max(1, at_once // model.config.vocab_size // longest)
        batch, order = order[:n], order[n:]
        idx = pad([torch.tensor(sequences[i][0]) for i in batch]).to(device)
        targets = [torch.tensor(sequences[i][1]) for i in batch]
        targets = pad(targets, padding_value=IGNORE).to(device)
        x, _ = model.forward(idx)
        counted = targets != IGNORE
        nats = F.cross_entropy(model.logits(x[counted]).float(), targets[counted], reduction="none")
        for i, own in zip(batch, nats.cpu().double().split(counted.sum(1).tolist()), strict=True):
            found[i] = -own.sum().item(), len(own)
    return [found[i] for i in range(len(sequences))]


@dataclass
class Cache:
    """What one block keeps of the `length` tokens read so far. Attention: their keys and values,
    (B, H_kv, length, D) each. Mamba-2: the last d_conv - 1 inputs of its convolution and its state,
    whatever the length."""

    length: int = 0
    k: torch.Tensor | None = None
    v: torch.Tensor | None = None
    conv: torch.Tensor | None = None
    state: torch.Tensor | None = None

    def append(self, k, v):
        if self.k is not None:
            k = torch.cat((self.k, k), dim=2)
            v = torch.cat((self.v, v), dim=2)
        self.k, self.v = k, v
        return k, v


def pick(logits, temperature: float, top_k: int, top_p: float, uniform):
    """Samples one token per row. logits: (B, V); uniform: (B, 1), random numbers in [0, 1). Returns
    (B, 1). Logits are divided by the temperature; below 0.001 the likeliest token is taken. top_k
    keeps the k likeliest; 0: all. top_p keeps the fewest of the likeliest whose probabilities add
    up to p (nucleus sampling, Holtzman et al. 2019, arXiv 1904.09751).

    The token is found by inversion: the first whose cumulated probability exceeds `uniform`."""
    if temperature < 1e-3:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    if top_p < 1:
        p, order = logits.softmax(-1).sort(-1, descending=True)
        drop = p.cumsum(-1) - p >= top_p  # the likelier tokens before it add up to p already
        logits = logits.masked_fill(drop.gather(1, order.argsort(-1)), -math.inf)
    cumulated = logits.softmax(-1).cumsum(-1)
    return torch.searchsorted(cumulated, uniform * cumulated[:, -1:], right=True)


@torch.no_grad()
def generate(model, idx, n_tokens: int, temperature=1.0, top_k=0, top_p=1.0, seed=0,
             use_cache=True):
    """Appends n_tokens sampled tokens to each row of idx (B, T). Returns (B, T + n_tokens).
    temperature, top_k, top_p: see pick.

    seed: a list with a seed for each row, or the first row's seed, to which the others add 1, 2,
    ... A row depends on its own prompt and seed, not on the rows beside it.

    When the context has reached the model's limit, it starts anew with its last half: one long
    forward pass every limit / 2 tokens. With and without the cache the same tokens come out;
    without it, each of them costs a forward pass over the whole context."""
    seeds = range(seed, seed + len(idx)) if isinstance(seed, int) else seed
    uniform = torch.stack([torch.rand(n_tokens, 1, generator=torch.Generator().manual_seed(own))
                           for own in seeds], dim=1).to(idx.device)  # (n_tokens, B, 1)
    limit = model.context_limit
    start = max(0, idx.shape[1] - limit)  # the context is idx[:, start:]
    caches = None
    for numbers in uniform:
        if idx.shape[1] - start > limit:
            start = idx.shape[1] - max(1, limit // 2)
            caches = None
        new = idx[:, -1:]
        if caches is None or not use_cache:
            new = idx[:, start:]
            caches = [Cache() for _ in model.blocks]
        x, _ = model.forward(new, caches=caches)  # not the compiled call: lengths vary
        token = pick(model.logits(x[:, -1]), temperature, top_k, top_p, numbers)
        idx = torch.cat((idx, token), dim=1)
    return idx


# --------------------------------------------------------------------------------------------------
# Tokenizers


END_OF_TEXT = "<|endoftext|>"


def tokenizer_to_dict(enc: tiktoken.Encoding) -> dict:
    """What defines an encoding, in plain types: {name, pattern, special, ranks}. Every checkpoint
    holds such a dict, and needs no other file. ranks: {token in hex: id}. special: {text: id}; the
    ids that an encoding leaves out are added to it, because a model can sample them.

    A tokenizer of Hugging Face has the text of its tokenizer.json under `json` too, and an empty
    pattern and empty ranks (teacher.tokenizer_from_hf)."""
    ranks, special = enc._mergeable_ranks, enc._special_tokens
    left_out = {*range(enc.n_vocab)} - {*ranks.values(), *special.values()}
    return {"name": enc.name, "pattern": enc._pat_str,
            "special": {**special, **{f"<|unused_{i}|>": i for i in left_out}},
            "ranks": {token.hex(): rank for token, rank in ranks.items()}}


def tokenizer_from_dict(d: dict):
    """The inverse of tokenizer_to_dict; an HFEncoding where the dict holds one (`json`)."""
    if "json" in d:
        return HFEncoding(d)
    ranks = {bytes.fromhex(token): rank for token, rank in d["ranks"].items()}
    return tiktoken.Encoding(d["name"], pat_str=d["pattern"], mergeable_ranks=ranks,
                             special_tokens=d["special"])


def tokenizer_id(d: dict) -> str:
    """A hash of what a tokenizer does (not of its name): equal ids mean equal tokens."""
    rules = [d["pattern"], sorted(d["special"].items()), sorted(d["ranks"].items())]
    if "json" in d:
        rules.append(d["json"])
    return hashlib.sha256(json.dumps(rules).encode()).hexdigest()[:16]


UNBROKEN = re.compile(r"\s*|\w*|[^\s\w]*")  # blanks, letters and digits, or signs


def cut_text(text: str, width: int = 128) -> list[str]:
    """Cuts a text into pieces for a tokenizer, whose time grows with the square of the longest
    word. It is cut at each multiple of `width` before which `width` characters are all blanks, all
    letters and digits, or all signs. Ordinary text stays whole. A lone surrogate, which stands for
    no character, becomes a question mark."""
    text = text.encode(errors="replace").decode()
    pieces = []
    start = 0
    for end in range(width, len(text), width):
        if UNBROKEN.fullmatch(text, end - width, end):
            pieces.append(text[start:end])
            start = end
    return [*pieces, text[start:]]


def encode(enc, text: str) -> list[int]:
    """The token ids of a text. Special tokens in it are encoded as any other text."""
    ids = []
    for piece in cut_text(text):
        ids += enc.encode_ordinary(piece)
    return ids


class HFEncoding:
    """The tokenizer of a pretrained model, run by Hugging Face's `tokenizers`, with the part of
    tiktoken.Encoding's interface that is used here. d: see tokenizer_to_dict."""

    def __init__(self, d: dict):
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise BadInput(f"the tokenizer {d['name']} needs the package tokenizers; "
                           "pip install tokenizers") from None
        self._special_tokens = d["special"]
        self.eot_token = d["special"][END_OF_TEXT]
        self.tokenizer = Tokenizer.from_str(d["json"])
        self.tokenizer.encode_special_tokens = True  # in a text they are read as any other text
        self.n_vocab = max(self.tokenizer.get_vocab().values()) + 1

    def lengths(self):
        """Yields (token id, bytes of text that it stands for); the bytes are 0 for special tokens.
        """
        added = self.tokenizer.get_added_tokens_decoder()  # these are not in a byte-level spelling
        byte_level = "ByteLevel" in repr(self.tokenizer.decoder)
        for token, i in self.tokenizer.get_vocab().items():
            if re.fullmatch("<0x[0-9A-F]{2}>", token):
                yield i, 1
            elif i in added:
                yield i, 0 if added[i].special else len(token.encode())
            elif byte_level:  # GPT-2's spelling, one character a byte
                yield i, len(token)
            else:  # SentencePiece writes a blank as U+2581
                yield i, len(token.replace("\u2581", " ").encode())

    def encode_ordinary(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_ordinary_batch(self, texts, num_threads=0):
        return [e.ids for e in self.tokenizer.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def decode_bytes(self, ids):
        return self.decode(ids).encode()


# --------------------------------------------------------------------------------------------------
# Checkpoints


CHECKPOINT_FORMAT = "nanolet-3"  # changes when older checkpoints can no longer be read


def checkpoint_file(name) -> str:
    """The checkpoint in a run's folder when `name` is such a folder; any other name as it is."""
    inside = Path(name, "ckpt.pt")
    return str(inside if inside.is_file() else name)


def load_checkpoint(path, flag="") -> dict:
    """Reads a checkpoint that train.py wrote. Raises BadInput with the file's name if the file is
    damaged, if a weight is not finite, or if weights, settings and tokenizer do not fit together.
    flag: what the user wrote before the name, such as `--resume=`."""
    with reading(f"{flag}{path}"):
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch.load does not look at the checksums
                raise ValueError("a checksum is wrong")
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
        if ckpt.get("format") != CHECKPOINT_FORMAT:
            raise BadInput("not a checkpoint of this version of nanolet")
        weights, settings, tokenizer = ckpt["model"], ckpt["model_config"], ckpt["tokenizer"]
        blocks = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
        if blocks != settings["n_layer"] or settings["block_size"] > 2**24:  # before memory is used
            raise ValueError(f"weights of {blocks} blocks, or a block_size above 2^24")
        for f in fields(ModelConfig):
            if f.type is not str and not 0 <= settings.get(f.name, 0) < math.inf:
                raise ValueError(f"{f.name}={settings[f.name]}")
        with torch.device("meta"):  # compares names and shapes, and needs no memory
            # (a copy: torch would remember `assign` for the next load of the same dict)
            GPT(ModelConfig(**settings)).load_state_dict({**weights}, assign=True)
        if not all(w.isfinite().all() for w in weights.values()):
            raise ValueError("weights that are not finite")
        ranks = tokenizer["ranks"]
        lacking = {f"{byte:02x}" for byte in range(256)} - ranks.keys()
        if ranks and (lacking or len({*ranks.values()}) < len(ranks)):  # tiktoken would panic
            raise ValueError("the tokenizer lacks a byte, or has a number twice")
        enc = tokenizer_from_dict(tokenizer)
        end = enc.eot_token
        if end in ranks.values() or not 0 <= end < enc.n_vocab <= settings["vocab_size"]:
            raise ValueError(f"a tokenizer of {enc.n_vocab} tokens does not fit the model")
    return ckpt


def model_from_checkpoint(ckpt: dict) -> GPT:
    """The model of a checkpoint from load_checkpoint, with its weights, on the CPU."""
    model = GPT(ModelConfig(**ckpt["model_config"]))
    model.load_state_dict(ckpt["model"])
    return model


def save_checkpoint(path, state: dict):
    """Writes a checkpoint, whole or not at all. state: model, model_config and tokenizer, which
    load_checkpoint checks, and what else a run needs. Raises OSError, for example when the disk is
    full."""
    with written_whole(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save({"format": CHECKPOINT_FORMAT, **state}, file)
        except RuntimeError as e:  # of torch, which could not close its archive after an OSError
            raise e.__context__ or e from None


# --------------------------------------------------------------------------------------------------
# Errors


class BadInput(ValueError):
    """The user gave a wrong value. Commands print the message and exit with code 2."""


class Failed(RuntimeError):
    """The input was right and the work failed. Commands print the message and exit with code 1."""


def need(holds: bool, settings, names: str, why: str):
    """Raises BadInput unless the condition holds. names: the settings to show, such as "n_embd
    n_head"; each is an attribute of `settings`."""
    if not holds:
        values = " ".join(f"--{name}={getattr(settings, name)}" for name in names.split())
        raise BadInput(f"{values}: {why}")


def one_line(e: Exception) -> str:
    """The kind and the message of an error, at most 200 characters in one line."""
    return " ".join(f"{type(e).__name__}: {e}".split())[:200]


def out_of_memory(e: Exception) -> bool:
    """Whether an error means that no memory is left; on a CPU torch raises RuntimeError."""
    return (isinstance(e, (MemoryError, torch.OutOfMemoryError))
            or "DefaultCPUAllocator" in str(e))


# --------------------------------------------------------------------------------------------------
# Files


@contextlib.contextmanager
def reading(where: str):
    """Turns any error inside its `with` into BadInput. where: the flag and the file that are read,
    which the message names."""
    try:
        yield
    except BadInput as e:
        raise BadInput(f"{where}: {e}") from None
    except Exception as e:  # damaged bytes raise errors of many kinds
        if out_of_memory(e):
            raise
        what = "cannot be read" if isinstance(e, OSError) else "damaged, or not what is needed"
        raise BadInput(f"{where}: {what} ({one_line(e)})") from None


def read_text(path, flag="") -> str:
    """The text of a UTF-8 file, without a byte order mark. flag: what the user wrote before the
    name. Raises BadInput."""
    with reading(f"{flag}{path}"):
        return Path(path).read_bytes().decode("utf-8-sig")


def read_json_lines(path, read, flag="", cut=False) -> list:
    """read(object) of each line of a file of JSON lines. Blank lines are left out. cut: leave out
    a last line without a line end too, which a killed process can leave. Raises BadInput with the
    number of the line."""
    found = []
    text = read_text(path, flag)
    if cut:
        text = text.rpartition("\n")[0]
    for number, line in enumerate(text.split("\n"), 1):  # splitlines also cuts within strings
        if line.strip():
            with reading(f"{flag}{path}, line {number}"):
                found.append(read(json.loads(line)))
    return found


def new_folder(name, flag="") -> Path:
    """A path to write a folder to. Raises BadInput where there is something already."""
    folder = Path(name)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(f"{flag}{folder}: already exists and is not empty; name a new folder")
    return folder


HELD = set()  # the folders that this process has locked


@contextlib.contextmanager
def locked(folder, wait=False, flag=""):
    """Makes a folder if needed, locks it for this process alone, and removes the temporary files
    that killed processes have left in it. The system releases the lock when the process ends in any
    way. A process may lock a folder again that it has locked. Where the system or the disk has no
    locks, there is none.

    If another process has locked the folder: waits for it if `wait`, else raises BadInput. flag:
    what the user wrote before the name."""
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if not fcntl or folder in HELD:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise BadInput(f"{flag}{folder}: another process writes to this folder") from None
            print(f"waiting for the process that holds {folder}", file=sys.stderr)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:  # a disk without locks on folders, such as NFS
            yield
            return
        for dead in folder.glob(".*.tmp"):
            remove(dead)
        HELD.add(folder)
        yield
    finally:
        HELD.discard(folder)
        os.close(handle)


def remove(path: Path):
    """Removes a file or a folder, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path):
    """Puts the file's name into an OSError inside its `with`: a full disk is reported without one.
    """
    try:
        yield
    except OSError as e:
        e.filename = str(path)
        raise


@contextlib.contextmanager
def written_whole(path):
    """Yields a temporary path beside `path`, to write a file or a folder of files to. After the
    `with` it is renamed to `path`, when all of it is on the disk. So a process that is killed, or a
    computer that fails, leaves the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with naming(path):
            yield temporary
            files = temporary.iterdir() if temporary.is_dir() else [temporary]
            for file in files:
                with open(file, "rb+") as f:
                    os.fsync(f.fileno())
            os.replace(temporary, path)
    finally:
        remove(temporary)


# --------------------------------------------------------------------------------------------------
# Command line


def device_exists(name: str) -> bool:
    """Whether this machine has the device `name` (cpu, cuda, cuda:1, mps)."""
    names = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.cuda.is_available():
        names.append("cuda")
    if torch.backends.mps.is_available():
        names.append("mps")
    return name in names


class Parser(argparse.ArgumentParser):
    """A parser whose errors are BadInput: one line, without the usage."""

    def error(self, message):
        raise BadInput(message.removeprefix("argument "))


WRONG_PATH = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES,
              errno.ENAMETOOLONG)


def command(main):
    """Runs main(arguments) as a command. An error is printed as one line. The exit code is 2 for
    bad input and wrong paths, 1 for a run that failed or an error of the disk, 130 after SIGINT and
    143 after SIGTERM. Other errors are bugs, and end with their traceback.

    Under torchrun, ranks other than 0 print their error after two seconds. If rank 0 has met the
    same error, it has printed it, and torchrun has ended the other ranks by then."""
    rank = os.environ.get("RANK", "0")
    sys.stdout.reconfigure(errors="replace")
    if "RANK" not in os.environ:  # with ranks: torchrun's signal must end one that waits for others
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as e:
        if out_of_memory(e):
            message = f"out of memory; for training, try a lower --micro_batch ({one_line(e)})"
        elif isinstance(e, OSError):
            message = f"{e.filename or 'the disk'}: {e.strerror or e}"
        elif isinstance(e, (BadInput, Failed)):
            message = str(e)
        else:
            raise
        start = "error"
        if rank != "0":
            time.sleep(2)
            start = f"error of rank {rank}"
        message = message.replace("\n", " ")  # in the name of a file
        print(f"{start}: {message}", file=sys.stderr)
        wrong = isinstance(e, BadInput) or getattr(e, "errno", 0) in WRONG_PATH
        sys.exit(2 if wrong else 1)


def between(kind, least, most):
    """A type for argparse: a number of this kind (int, float), from least to most."""
    def read(text):
        value = kind(text)
        if not least <= value <= most:
            raise ValueError
        return value
    read.__name__ = f"{kind.__name__} from {least:,} to {most:,}"  # shown for a wrong value
    return read


def positive(default):
    """A type for argparse: a number above 0, of the type of the default; 0 too, if it is the
    default."""
    least = 1 if isinstance(default, int) else 1e-30
    return between(type(default), least if default else 0, 1e30)


def listed(kind, count: int | None = None):
    """A type for argparse: a list of values of this type, separated by commas; `count` of them, if
    it is given."""
    def read(text):
        values = [kind(value) for value in text.split(",")]
        if count and len(values) != count:
            raise ValueError
        return values

    read.__name__ = f"list of {kind.__name__}"
    return read


def main(argv):
    parser = Parser(prog="model.py", description="Sample text from a checkpoint of train.py.")
    add = parser.add_argument
    add("checkpoint")
    add("--prompt", default="", help="text to continue; empty: start a new document")
    add("--tokens", type=between(int, 1, 10**6), default=200, help="tokens to sample")
    add("--temperature", type=between(float, 0, 1e6), default=0.8,
        help="0: the likeliest token")
    add("--top_k", type=between(int, 0, 10**9), default=0,
        help="keep the k likeliest tokens; 0: all")
    add("--top_p", type=between(float, 1e-9, 1), default=1.0,
        help="keep the likeliest up to this probability")
    add("--seed", type=between(int, 0, 2**62), default=0,
        help="of the first sample; the others add 1, 2, ...")
    add("--samples", type=between(int, 1, 10**6), default=1, help="continuations of the prompt")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = parser.parse_args(argv)
    need(device_exists(a.device), a, "device", "no such device here")
    ckpt = load_checkpoint(checkpoint_file(a.checkpoint))
    enc = tokenizer_from_dict(ckpt["tokenizer"])
    model = model_from_checkpoint(ckpt).to(a.device).eval()
    ids = [enc.eot_token] + encode(enc, a.prompt)
    prompts = torch.tensor([ids] * a.samples, device=a.device)
    out = generate(model, prompts, a.tokens, a.temperature, a.top_k, a.top_p, a.seed)
    for row in out.tolist():
        print(enc.decode(row[1:]))
        if a.samples > 1:
            print("-" * 80)


if __name__ == "__main__":
    command(main)
