"""model.py: the architecture, i.e. what one forward pass computes; and the sampler.

    python model.py runs/1/ckpt.pt --prompt "def " --tokens 200

A decoder-only model in the style of Llama and Qwen3: pre-norm RMSNorm, rotary positions, grouped-query attention, an
MLP (squared ReLU, gated or GELU), no biases but in Mamba-2 and in AffineBlock. In place of attention, or beside it,
Mamba-2 (`--mixer`); in place of the MLP, a mixture of experts (`--n_experts`). Read it from `GPT.forward` upwards or
from the top downwards.

Names and symbols
    B, T, C     sequences in a batch, tokens in a sequence, width of the residual stream (n_embd, d_model in papers)
    H, H_kv, D  query heads, key/value heads, channels of one head (head_dim, C / H where nothing else is asked for)
    mixer       what moves information between tokens: attention, Mamba-2, or both side by side
    E, k        experts, and experts that each token goes to (experts_per_token)
    P, N, G, Q  Mamba-2: channels of a head, numbers of state per channel, groups, tokens of a chunk
    V           vocabulary size; V_pad is V rounded up to a multiple of 64, which matrix units like
    x           the residual stream, (B, T, C)
    state k     x after block k; blocks are numbered from 1 and state 0 is the output of the embedding
    rope        rotary position embedding (Su et al. 2021, arXiv 2104.09864), halves paired as in Llama
    nats        the unit of the loss: mean negative log-likelihood per token, natural logarithm
"""
import argparse
import hashlib
import json
import math
import os
import pickle
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F

END_OF_TEXT = "<|endoftext|>"
IGNORE = -100  # a target with this value is not counted in the loss
MIXERS = {"attention": "A", "mamba2": "M", "hybrid": "H"}  # kinds of block, by their letter in layer_pattern


class BadInput(ValueError):
    """Something the user gave is wrong. Every command prints the message as it stands and exits with code 2."""


class Failed(RuntimeError):
    """What was asked for was right and failed all the same: as BadInput, but the exit code is 1."""


# ----------------------------------------------------------------------------------------------------------------------
# The model


@dataclass
class ModelConfig:
    """What fixes the shapes and the function of a GPT. train.py makes it from the flags of the same names."""

    vocab_size: int
    block_size: int  # longest sequence, in tokens
    n_layer: int
    n_embd: int
    n_head: int
    n_kv_head: int  # heads of keys and values; each serves n_head / n_kv_head query heads
    head_dim: int = 0  # channels of one head; 0 means C / H
    mlp: str = "swiglu"  # swiglu | relu2 | gelu
    mlp_hidden: int = 0  # width inside the MLP; 0 means 8/3 C for swiglu and 4 C for the others: equal parameters
    qk_norm: bool = True  # RMSNorm on queries and keys, per head, as Qwen3
    tie_embeddings: bool = False
    rope_base: float = 10_000.0
    norm_eps: float = 1e-6
    mixer: str = "attention"  # attention | mamba2 | hybrid (both, side by side on one normed input)
    layer_pattern: str = ""  # a letter a block, A, M or H for these three, L for an affine map; empty: all of one kind
    d_state: int = 64  # Mamba-2: N, numbers of state per channel
    ssm_head_dim: int = 64  # Mamba-2: P, channels of one head
    expand: int = 2  # Mamba-2: width inside it over C
    n_groups: int = 1  # Mamba-2: heads of one group share B and C, as query heads share keys
    chunk_size: int = 64  # Mamba-2: Q, tokens whose interactions are written out as a square matrix
    d_conv: int = 4  # Mamba-2: width of the causal convolution
    ssm_norm: bool = True  # Mamba-2: gated RMSNorm before the output projection
    n_experts: int = 0  # 0: a dense MLP
    experts_per_token: int = 2
    expert_hidden: int = 0  # width inside an expert; 0 means mlp_hidden / k: as many active weights as the dense MLP
    width_ratio: float = 1.0  # m_N: width over the base's, see PARAM_RULES; the standard model has 1, 1 and 1
    depth_ratio: float = 1.0  # m_L: blocks over the base's
    head_ratio: float = 1.0  # m_D: channels of a head over the base's

    def __post_init__(self):
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        if self.mlp_hidden == 0:
            swiglu = max(1, round(8 / 3 * self.n_embd / 64)) * 64
            self.mlp_hidden = swiglu if self.mlp == "swiglu" else 4 * self.n_embd
        if self.expert_hidden == 0:
            self.expert_hidden = max(1, self.mlp_hidden // self.experts_per_token)

    def kinds(self) -> str:
        """A letter a block: A attention and MLP, M Mamba-2 alone, H attention beside Mamba-2, and MLP, L AffineBlock."""
        return self.layer_pattern or MIXERS[self.mixer] * self.n_layer


# What --param=mup and completep change when a model is m_N times as wide and m_L times as deep as its base, where it is the
# standard model: factors on the standard initialisation (its standard deviation; for hidden matrices it is fan_in^-1/2
# already), on Adam's rate, its decoupled weight decay and its epsilon, as (power of m_N, power of m_L). And in the forward pass:
# logits times 1 / m_N, every residual branch times 1 / m_L, q k^T over D in place of sqrt(D), times the base's sqrt(D).
# standard is m_N = m_L = 1; mup has m_N alone (Yang et al. 2022, arXiv 2203.03466, table 8); completep both (Dey et al.
# 2025, arXiv 2505.01618, with alpha = 1, so that no rate depends on depth). The output matrix is muP's with a multiplier,
# not the equivalent one with a smaller matrix, since a tied one can be no other. A router is an output matrix in the second
# form, after muP for mixtures of experts (arXiv 2508.09752), an expert a hidden matrix. Ours, where we know of no source:
# Mamba's B and C, whose rows do not grow in number, are initialised like a router (they share the rate of in_proj).
# Matrices that write into the stream start at 0 at every size. MLPs and experts are taken to be as wide, over n_embd, as
# the base's. For Muon see `muon_scale` in optim.py: it needs no rates by width, only an update of the right norm.
PARAM_RULES = {
    "embedding": {"init": (0, 0), "lr": (0, 0), "decay": (0, 0), "eps": (-1, 0)},
    "head": {"init": (0.5, 0), "lr": (0, 0), "decay": (0, 0), "eps": (-1, 0)},  # and an embedding that is tied to it
    "hidden": {"init": (0, 0), "lr": (-1, 0), "decay": (1, 0), "eps": (-1, -1)},  # lr times decay is the same at any width
    "router": {"init": (-0.5, 0), "lr": (-1, 0), "decay": (1, 0), "eps": (0, -1)},
    "vector": {"init": (0, 0), "lr": (0, 0), "decay": (0, 0), "eps": (-1, -1)},  # in the blocks, multipliers too
    "final": {"init": (0, 0), "lr": (0, 0), "decay": (0, 0), "eps": (-1, 0)},  # the last norm's gain
}


def param_factor(c: ModelConfig, kind: str, what: str) -> float:
    """The factor of PARAM_RULES on `what` (init, lr, decay, eps) of a kind of tensor, for a model of this size."""
    n, l = PARAM_RULES[kind][what]
    return c.width_ratio ** n * c.depth_ratio ** l


class RMSNormOnCPU(torch.autograd.Function):
    """RMSNorm in few passes over memory: torch's own has no fused kernel on CPUs and takes more than twice as long.

    With r = 1 / rms(x) and n = x r:  y = n w,  dw = sum of dy n over tokens,  dx = r (dy w - n mean(dy w n)).
    r is formed again in the backward pass, so that a second derivative sees that it depends on x."""

    @staticmethod
    def inverse_rms(x, eps):
        return (torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1] + eps).rsqrt()

    @staticmethod
    def forward(ctx, x, weight, eps):
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return (x * RMSNormOnCPU.inverse_rms(x, eps)).mul_(weight)

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        r = RMSNormOnCPU.inverse_rms(x, ctx.eps)
        n = x * r
        dyn = (dy * n).flatten(0, -2)  # (tokens, C)
        mean = (dyn @ w).view(r.shape) / x.shape[-1]
        return torch.addcmul(dy * w, n, mean, value=-1) * r, dyn.sum(0), None


class RMSNorm(nn.Module):
    """x / rms(x) * gain over the last axis, in the dtype of x (Zhang & Sennrich 2019). scale: a constant on the gain."""

    def __init__(self, dim: int, eps: float, scale: float = 1.0):
        super().__init__()
        self.weight, self.eps, self.scale = nn.Parameter(torch.ones(dim)), eps, scale

    def forward(self, x):
        gain = self.weight if self.scale == 1 else self.weight * self.scale
        if x.device.type in ("cpu", "meta") and x.dtype == gain.dtype and not torch.compiler.is_compiling():
            return RMSNormOnCPU.apply(x, gain, self.eps)
        return F.rms_norm(x, x.shape[-1:], gain.to(x.dtype), self.eps)


class Fused(nn.Linear):
    """Several matrices on the same input, stored as one: `Fused(C, q=512, k=128, v=128)(x)` gives q, k, v.

    One large product is faster than three small ones. The optimizer sees the pieces (`self.pieces`) apart."""

    def __init__(self, d_in: int, **pieces: int):
        super().__init__(d_in, sum(pieces.values()), bias=False)
        self.pieces = pieces

    def forward(self, x):
        return super().forward(x).split(tuple(self.pieces.values()), dim=-1)


def rotate(x, cos, sin):
    """Turn each pair (x_j, x_{j+D/2}) by its position's angle: (a, b) -> (a cos - b sin, b cos + a sin).
    x: (B, T, heads, D); cos, sin: (T, 1, D) from rope_tables, where the minus sign is part of sin."""
    return x * cos.to(x.dtype) + x.roll(x.shape[-1] // 2, dims=-1) * sin.to(x.dtype)


class Cache:
    """What one block keeps of the tokens read so far, `length` of them. Attention: their keys and values, each
    (B, H_kv, length, D). Mamba-2, whatever the length: the last d_conv - 1 inputs of its convolution and its state."""

    def __init__(self):
        self.length, self.k, self.v, self.conv, self.state = 0, None, None, None, None

    def append(self, k, v):
        if self.k is not None:
            k, v = torch.cat((self.k, k), dim=2), torch.cat((self.v, v), dim=2)
        self.k, self.v = k, v
        return k, v


class Attention(nn.Module):
    """Causal grouped-query attention. softmax(q k^T / sqrt(D)) v, each query head with its group's k and v; the scores
    over sqrt(m_D) besides, see PARAM_RULES."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = c.n_head, c.n_kv_head, c.head_dim
        self.scale = None if c.head_ratio == 1 else (self.head_dim * c.head_ratio) ** -0.5  # None: 1 / sqrt(D)
        inner, kv = c.n_head * self.head_dim, c.n_kv_head * self.head_dim
        self.qkv = Fused(c.n_embd, q=inner, k=kv, v=kv)
        self.o = nn.Linear(inner, c.n_embd, bias=False)
        self.q_norm = RMSNorm(self.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x, cos, sin, cache=None):
        B, T, _ = x.shape
        q, k, v = self.qkv(x)
        q = rotate(self.q_norm(q.view(B, T, self.n_head, self.head_dim)), cos, sin).transpose(1, 2)  # (B, H, T, D)
        k = rotate(self.k_norm(k.view(B, T, self.n_kv_head, self.head_dim)), cos, sin).transpose(1, 2)
        v = v.view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)  # (B, H_kv, T, D), as k
        if cache is not None:
            k, v = cache.append(k, v)
        # New queries are the last T of the T_all keys. Without a past that is the plain causal mask; one new
        # token sees everything; only several new tokens after a past need a mask of their own.
        T_all = k.shape[2]
        mask = None
        if T not in (1, T_all):
            mask = torch.ones(T, T_all, dtype=torch.bool, device=x.device).tril(T_all - T)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=T == T_all and T > 1, scale=self.scale,
            enable_gqa=self.n_kv_head != self.n_head)
        return self.o(y.transpose(1, 2).reshape(B, T, -1))


# Mamba-2 (Dao & Gu 2024, arXiv 2405.21060): each head carries a state h (P, N) from token to token,
#
#     h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T,    y_t = h_t C_t + D x_t,
#
# where x_t (P,), B_t (N,), C_t (N,) and dt_t > 0 come from the token and A < 0 is learned. Read as one linear map from all
# x to all y this is y = (L o C B^T) (dt x), attention without softmax under a mask L of decays: L_ts = exp(sum of dt A from
# s+1 to t). State-space duality: within chunks of Q tokens use the second form, matrix products; between chunks the first.


def ssd(x, dt, A, B, C, chunk: int, state=None):
    """The state-space dual form in chunks (the paper's section 6), without D x. Any length.

    x: (b, T, H, P); dt: (b, T, H), positive; A: (H,), negative; B, C: (b, T, G, N), H a multiple of G; state: (b, H, P,
    N) before the first token, None for 0. Returns y (b, T, H, P) and the state after the last token. Decays are formed
    in the dtype of dt, which should be float32; the products run in the dtype of x or under autocast. b T (2 Q N G + 2
    Q P H + 4 P N H) FLOPs."""
    b, T, H, P = x.shape
    G, N = B.shape[2:]
    Q, R = min(chunk, T), H // G
    K = -(-T // Q)  # chunks; the last is filled up with tokens of dt = 0, which leave the state alone
    if K * Q > T:
        x, dt, B, C = (F.pad(t, (0, 0) * (t.ndim - 2) + (0, K * Q - T)) for t in (x, dt, B, C))
    x, dt = x.view(b, K, Q, G, R, P), dt.view(b, K, Q, G, R)
    B, C = (t.view(b, K, Q, G, N).transpose(2, 3) for t in (B, C))  # (b, K, G, Q, N)
    a = (dt * A.view(G, R)).cumsum(2)  # (b, K, Q, G, R): log of the decay from the chunk's beginning
    w = dt.clamp_min(torch.finfo(dt.dtype).tiny).log() - a  # e^(a_t + w_s) is the decay from s to t, times dt_s

    # Within a chunk: scores C B^T once a group, times each head's mask of decays, times x
    future = torch.full((Q, Q), -math.inf, dtype=a.dtype, device=x.device).triu(1)
    a_t, w_s = (v.permute(0, 1, 3, 4, 2) for v in (a, w))
    L = (a_t[..., :, None] + w_s[..., None, :]).add_(future).exp_()  # (b, K, G, R, Q, Q)
    y = ((C @ B.mT)[:, :, :, None] * L).to(x.dtype) @ x.permute(0, 1, 3, 4, 2, 5)  # (b, K, G, R, Q, P)

    # What each chunk adds to the state at its end, and the state carried from chunk to chunk
    to_end = (a[:, :, -1:] + w).exp()[..., None].to(x.dtype)
    added = (x * to_end).transpose(2, 3).flatten(4).mT @ B  # (b, K, G, R P, N)
    added = added.view(b, K, G, R, P, N).to(a.dtype)
    h = a.new_zeros(b, G, R, P, N) if state is None else state.view(b, G, R, P, N)
    decay, before = a[:, :, -1].exp()[..., None, None], []
    for one_decay, one_added in zip(decay.unbind(1), added.unbind(1)):  # unbind: its gradient is formed once, not K times
        before.append(h)
        h = one_decay * h + one_added

    # Between chunks: what the state before the chunk gives to each of its tokens
    carried = torch.stack(before, 1).to(x.dtype).flatten(3, 4)  # (b, K, G, R P, N)
    off = (C @ carried.mT).view(b, K, G, Q, R, P).transpose(2, 3)  # (b, K, Q, G, R, P)
    y = y.permute(0, 1, 4, 2, 3, 5) + off * a.exp()[..., None].to(x.dtype)
    return y.reshape(b, K * Q, H, P)[:, :T], h.view(b, H, P, N)


def ssd_step(x, dt, A, B, C, state):
    """One token by the recurrence: x (b, H, P), dt (b, H), B, C (b, G, N), state (b, H, P, N) -> (y (b, H, P),
    state)."""
    heads = x.shape[1] // B.shape[1]
    B, C = (t.repeat_interleave(heads, dim=1).to(state.dtype) for t in (B, C))  # (b, H, N)
    state = (dt * A).exp()[..., None, None] * state + (dt[..., None] * x)[..., None] * B[:, :, None]
    return (state @ C[..., None])[..., 0].to(x.dtype), state


class CausalConv(nn.Module):
    """Depthwise convolution over time: y_t = bias + sum_j w_j x_{t - d_conv + 1 + j}, per channel, as shifts and
    products. past: the d_conv - 1 inputs before the first, (B, d_conv - 1, channels), None for 0."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(channels, 1, width)), nn.Parameter(torch.empty(channels))

    def forward(self, x, past=None):
        width, T, w = self.weight.shape[-1], x.shape[1], self.weight.to(x.dtype)
        x = F.pad(x, (0, 0, width - 1, 0)) if past is None else torch.cat((past, x), dim=1)
        return sum((x[:, j:j + T] * w[:, 0, j] for j in range(width)), self.bias.to(x.dtype)), x[:, T:]


class Mamba2(nn.Module):
    """z, x, B, C, dt = in_proj(u); x, B, C = silu(conv(x, B, C)); y = ssd(x, ...) + D x; out(norm(y silu(z)))."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        inner = c.expand * c.n_embd
        self.heads, self.head_dim, self.groups, self.chunk = inner // c.ssm_head_dim, c.ssm_head_dim, c.n_groups, c.chunk_size
        self.sizes = inner, c.n_groups * c.d_state, c.n_groups * c.d_state  # channels of x, B, C
        self.in_proj = Fused(c.n_embd, z=inner, x=inner, B=self.sizes[1], C=self.sizes[2], dt=self.heads)
        self.conv = CausalConv(sum(self.sizes), c.d_conv)
        self.A_log, self.D, self.dt_bias = (nn.Parameter(torch.empty(self.heads)) for _ in range(3))
        self.norm = RMSNorm(inner, c.norm_eps) if c.ssm_norm else None  # in n_groups parts
        self.out = nn.Linear(inner, c.n_embd, bias=False)

    def forward(self, u, cache=None):
        b, T, _ = u.shape
        z, x, B, C, dt = self.in_proj(u)
        xBC, past = self.conv(torch.cat((x, B, C), dim=-1), None if cache is None else cache.conv)
        x, B, C = F.silu(xBC).split(self.sizes, dim=-1)
        x, B, C = x.view(b, T, self.heads, -1), B.view(b, T, self.groups, -1), C.view(b, T, self.groups, -1)
        full = torch.promote_types(self.A_log.dtype, torch.float32)  # decays need it, whatever the autocast or the weights
        dt = F.softplus(dt.to(full) + self.dt_bias.to(full))  # (b, T, H)
        A = -self.A_log.to(full).exp()
        if cache is not None and cache.state is not None and T == 1:
            y, state = ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], cache.state)
            y = y[:, None]
        else:
            y, state = ssd(x, dt, A, B, C, self.chunk, None if cache is None else cache.state)
        if cache is not None:
            cache.conv, cache.state = past, state
        y = (y + x * self.D[:, None].to(x.dtype)).reshape(b, T, -1) * F.silu(z)
        if self.norm is not None:  # the mean square is a group's own
            parts = y.view(b, T, self.groups, -1)
            y = F.rms_norm(parts, parts.shape[-1:], None, self.norm.eps).view(b, T, -1) * self.norm.weight.to(y.dtype)
        return self.out(y)

    def flops_per_token(self) -> int:
        """Of the scan, forward, beside those of the projections; see ssd."""
        Q, P, H, GN = self.chunk, self.head_dim, self.heads, self.sizes[1]
        return 2 * Q * GN + 2 * Q * P * H + 4 * P * H * (GN // self.groups)


class MLP(nn.Module):
    """Position-wise network. swiglu: down(silu(gate x) * up x); relu2: down(relu(up x)^2); gelu: down(gelu(up x))."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.kind = c.mlp
        gate = {"gate": c.mlp_hidden} if c.mlp == "swiglu" else {}
        self.up = Fused(c.n_embd, **gate, up=c.mlp_hidden)
        self.down = nn.Linear(c.mlp_hidden, c.n_embd, bias=False)

    def forward(self, x):
        h = self.up(x)
        if self.kind == "swiglu":
            return self.down(F.silu(h[0]) * h[1])
        return self.down(F.relu(h[0]).square() if self.kind == "relu2" else F.gelu(h[0]))


def expert_products(x, weight, counts, grouped: bool):
    """Rows of x, sorted by expert, times their expert's matrix: x (rows, in), weight (E, out, in), counts (E,) rows of
    each. grouped: one kernel for all experts, on CUDA; else a loop. Returns (rows, out)."""
    if grouped:
        return F.grouped_mm(x, weight.to(x.dtype).mT, offs=counts.cumsum(0).to(torch.int32))
    return expert_loop(x, weight, counts)


def expert_loop(x, weight, counts):
    """expert_products, one expert after the other; on the meta device as if all got equally many rows."""
    parts = x.tensor_split(len(weight)) if x.is_meta else x.split(counts.tolist())
    # Filled up to a multiple of 128 rows: a CPU's library makes a kernel for every new shape, at a cost that shows.
    padded = [F.pad(part, (0, 0, 0, -len(part) % 128)) for part in parts]
    return torch.cat([(full @ w.T)[:len(part)] for full, part, w in zip(padded, parts, weight.to(x.dtype))])


class MoE(nn.Module):
    """Mixture of experts in place of the MLP: y = sum over the k experts e that the router likes best of w_e
    expert_e(x).

    As Qwen3-MoE: p = softmax(router x) in float32, w the k largest p over their sum, no shared expert, no token
    dropped. After a forward pass in training, `losses` holds the load-balancing loss and the router z-loss, `counts`
    the tokens that each expert got. load: the share of tokens that each expert got in the last step, over all devices:
    train.py keeps it. Balance is thus asked of the whole batch and not of each micro-batch, and no device waits for
    another."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.kind, self.k = c.mlp, c.experts_per_token
        self.router = nn.Linear(c.n_embd, c.n_experts, bias=False)
        rows = {"gate": c.expert_hidden, "up": c.expert_hidden} if c.mlp == "swiglu" else {"up": c.expert_hidden}
        self.pieces = {"up": rows, "down": {"down": c.n_embd}}  # rows of the matrices of one expert
        self.up = nn.Parameter(torch.empty(c.n_experts, sum(rows.values()), c.n_embd))
        self.down = nn.Parameter(torch.empty(c.n_experts, c.n_embd, c.expert_hidden))
        self.register_buffer("load", torch.full((c.n_experts,), 1 / c.n_experts))
        self.losses, self.counts = None, None

    def forward(self, x):
        shape, x = x.shape, x.flatten(0, 1)  # (tokens, C)
        logits = self.router(x).float()
        p = logits.softmax(-1)
        w, chosen = p.topk(self.k, dim=-1)  # (tokens, k)
        w = w / w.sum(-1, keepdim=True)
        self.counts = counts = torch.zeros_like(self.load, dtype=torch.int64).scatter_add_(
            0, chosen.flatten(), torch.ones_like(chosen).flatten())
        self.losses = load_balancing_loss(p, self.load), logits.logsumexp(-1).square().mean()
        order = chosen.flatten().argsort(stable=True)  # (token, choice) pairs, those of one expert together
        rows = x[order // self.k]
        device = "cpu" if x.is_meta else x.device.type
        if torch.is_autocast_enabled(device):
            rows = rows.to(torch.get_autocast_dtype(device))
        strides = (n for weight in (self.up, self.down) for n in weight.shape[1:])  # grouped_mm wants rows of 16 bytes
        grouped = x.is_cuda and rows.dtype == torch.bfloat16 and hasattr(F, "grouped_mm") and not any(n % 8 for n in strides)
        h = expert_products(rows, self.up, counts, grouped)
        if self.kind == "swiglu":
            gate, up = h.chunk(2, dim=-1)
            h = F.silu(gate) * up
        else:
            h = F.relu(h).square() if self.kind == "relu2" else F.gelu(h)
        y = expert_products(h, self.down, counts, grouped) * w.flatten()[order, None].to(h.dtype)
        return torch.zeros_like(x, dtype=y.dtype).index_add(0, order // self.k, y).view(shape)


def load_balancing_loss(p, load):
    """E sum_e f_e P_e (Fedus et al. 2022, arXiv 2101.03961, eq. 4): p (tokens, E) router probabilities, P_e their mean;
    load: f_e, each expert's share of the tokens, without gradient. 1 where both are uniform, more where both lean the
    same way."""
    return len(load) * (load * p.mean(0)).sum()


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)): the mixer moves information between tokens, the MLP within one.
    kind: A, attention; M, Mamba-2, which brings its own gate and has no MLP after it; H, the sum of both mixers. Each
    branch is added 1 / m_L times, see PARAM_RULES."""

    def __init__(self, c: ModelConfig, kind: str):
        super().__init__()
        self.scale = 1 / c.depth_ratio
        self.mixer_norm = RMSNorm(c.n_embd, c.norm_eps)
        self.mixer = Attention(c) if kind in "AH" else None
        self.ssm = Mamba2(c) if kind in "MH" else None
        self.mlp_norm = RMSNorm(c.n_embd, c.norm_eps) if kind in "AH" else None
        self.mlp = (MoE(c) if c.n_experts else MLP(c)) if kind in "AH" else None

    def forward(self, x, cos, sin, cache=None):
        u = self.mixer_norm(x)
        if self.mixer is not None:
            x = torch.add(x, self.mixer(u, cos, sin, cache), alpha=self.scale)
        if self.ssm is not None:
            x = torch.add(x, self.ssm(u, cache), alpha=self.scale)
        if cache is not None:
            cache.length += u.shape[1]
        return x if self.mlp is None else torch.add(x, self.mlp(self.mlp_norm(x)), alpha=self.scale)


class AffineBlock(nn.Module):
    """x + (W x + b) / m_L, each token by itself: what `probes.py prune` puts in a block's place. W = 0 is no block at
    all, so weight decay pulls it towards removal."""

    mixer = ssm = mlp = None  # of the parts of a Block it has none

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.affine, self.scale = nn.Linear(c.n_embd, c.n_embd), 1 / c.depth_ratio

    def forward(self, x, cos, sin, cache=None):
        if cache is not None:
            cache.length += x.shape[1]
        return torch.add(x, self.affine(x), alpha=self.scale)


class GPT(nn.Module):
    """Tokens to next-token logits, or to the loss; and, when asked, the residual states on the way.

    Initialisation is by name, and a parameter that no rule names raises ValueError: see `init_weights`."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.config = c
        V_pad = -(-c.vocab_size // 64) * 64
        self.embed = nn.Embedding(V_pad, c.n_embd)
        self.blocks = nn.ModuleList(AffineBlock(c) if kind == "L" else Block(c, kind) for kind in c.kinds())
        self.norm = RMSNorm(c.n_embd, c.norm_eps, 1 / c.width_ratio)  # the factor on the logits
        self.head = nn.Linear(c.n_embd, V_pad, bias=False)
        if c.tie_embeddings:
            self.head.weight = self.embed.weight
        self.has_attention = bool({*c.kinds()} & {*"AH"})  # else any length will do, in constant memory
        for name, table in zip(("cos", "sin"), rope_tables(c.block_size, c.head_dim, c.rope_base)):
            self.register_buffer(name, table, persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Gains 1; what writes into the residual stream 0, so that every block starts as the identity; matrices that
        read it N(0, 1/fan_in); the embedding N(0, 1), near the scale the norms give anyway; the head small, so that the
        first loss is ln V: logits of standard deviation s add s^2 / 2 to it, and s is 0.1 here; the router small too,
        so that all experts begin alike. Mamba-2 as its authors' code: D 1, A from -16 to -1, and dt log-uniform in
        [1e-3, 1e-1], as which softplus(dt_bias) comes out; the convolution as torch's Conv1d, uniform. Times the factors of
        PARAM_RULES."""
        c = self.config
        head, router = (param_factor(c, kind, "init") for kind in ("head", "router"))
        for name, p in self.named_parameters():
            if name.endswith(("norm.weight", ".D")):
                p.fill_(1.0)
            elif name.endswith((".o.weight", ".down.weight", ".out.weight", ".mlp.down", ".affine.weight", ".affine.bias")):
                p.zero_()
            elif name.endswith((".qkv.weight", ".up.weight", ".in_proj.weight", ".mlp.up")):
                p.normal_(std=p.shape[-1] ** -0.5)
                if name.endswith(".in_proj.weight"):
                    _, _, B, C, _ = p.split(tuple(self.get_submodule(name.removesuffix(".weight")).pieces.values()))
                    B.mul_(router)
                    C.mul_(router)
            elif name.endswith(".router.weight"):
                p.normal_(std=0.1 * p.shape[1] ** -0.5 * router)
            elif name.endswith((".conv.weight", ".conv.bias")):
                p.uniform_(-(self.config.d_conv ** -0.5), self.config.d_conv ** -0.5)
            elif name.endswith(".A_log"):
                p.uniform_(1.0, 16.0).log_()
            elif name.endswith(".dt_bias"):
                dt = p.uniform_(math.log(1e-3), math.log(1e-1)).exp()
                p.copy_(dt + (-(-dt).expm1()).log())  # the inverse of softplus: log(e^dt - 1)
            elif name == "embed.weight":
                p.normal_(std=0.1 * p.shape[1] ** -0.5 * head if self.config.tie_embeddings else 1.0)
            elif name == "head.weight":
                p.normal_(std=0.1 * p.shape[1] ** -0.5 * head)
            else:
                raise ValueError(f"no initialisation rule for the parameter {name}")

    def compile(self, *args, **kw):
        """As nn.Module's, but for the loop over experts: its shapes are the data's, and it would be compiled anew again and
        again."""
        global expert_loop
        expert_loop = torch.compiler.disable(expert_loop)
        super().compile(*args, **kw)

    def trunk(self, idx, hidden=(), caches=None, blocks=None):
        """The residual stream without the head.

        idx: (B, T) token ids; hidden: numbers of the states to keep; caches: one Cache a block, filled in place;
        blocks: run only so many of the blocks. Returns x (B, T, C) before the final norm, and the tuple of states."""
        past = 0 if caches is None else caches[0].length
        T = idx.shape[1]
        if past + T > self.config.block_size and self.has_attention:
            raise ValueError(f"{past + T} tokens, but block_size is {self.config.block_size}")
        cos, sin = self.cos[past:past + T], self.sin[past:past + T]  # (T, 1, D)
        x = self.embed(idx)
        states = {0: x}
        for k, block in enumerate(self.blocks[:blocks], start=1):
            x = block(x, cos, sin, None if caches is None else caches[k - 1])
            states[k] = x
        return x, tuple(states[k] for k in hidden)

    def forward(self, idx, targets=None, hidden=(), caches=None, head=True):
        """idx: (B, T). Returns (logits (B, T, V), states) without targets, (mean loss in nats, states) with them, and
        without the head (x (B, T, C) after the final norm, states).

        states is the tuple of residual streams (B, T, C) after the blocks numbered in `hidden` (0: the embedding),
        before any norm. Targets equal to -100 are not counted."""
        x, states = self.trunk(idx, hidden, caches)
        x = self.norm(x)
        V = self.config.vocab_size
        if not head:
            return x, states
        if targets is None:
            return self.head(x)[..., :V], states
        return linear_cross_entropy(x.flatten(0, 1), self.head.weight, targets.flatten(), V), states

    def moes(self) -> list[MoE]:
        return [b.mlp for b in self.blocks if isinstance(b.mlp, MoE)]

    def router_losses(self):
        """(load-balancing loss, z-loss) of the last forward pass, each the mean over the blocks with experts, 0-d."""
        return tuple(torch.stack(losses).mean() for losses in zip(*(m.losses for m in self.moes())))

    def num_params(self, active=False) -> int:
        """All parameters; a tied matrix counts once. active: those that a token meets, k of E experts."""
        idle = sum((1 - m.k / len(m.load)) * (m.up.numel() + m.down.numel()) for m in self.moes())
        return sum(p.numel() for p in self.parameters()) - (round(idle) if active else 0)

    def flops_per_token(self, backward=True, head=True, blocks=None, length=None) -> int:
        """Floating-point operations per token in sequences of `length` (block_size): 2 a weight in each matrix product,
        4 T H D a block with attention (the full square, as nanoGPT and PaLM count it), the scan of Mamba-2 (see ssd), and
        twice as much again for the backward pass. Of experts, those that a token goes to. The embedding is a look-up
        and costs none. So 6 N + 12 L C T for a GPT, with N without the embedding."""
        c, forward = self.config, 2 * self.head.weight.numel() if head else 0
        for b in self.blocks[:blocks]:
            forward += 2 * sum(p.numel() for p in b.parameters() if p.ndim == 2)
            if b.mixer is not None:
                forward += 4 * c.n_head * c.head_dim * (length or c.block_size)
            if b.ssm is not None:
                forward += b.ssm.flops_per_token() + 2 * b.ssm.conv.weight.numel()
            if isinstance(b.mlp, MoE):
                forward += 2 * (b.mlp.up.numel() + b.mlp.down.numel()) * b.mlp.k // len(b.mlp.load)
        return 3 * forward if backward else forward


def rope_tables(length: int, head_dim: int, base: float):
    """cos and sin of the angle t * base^(-2j/D) of position t and pair j, laid out for `rotate`: cos twice, and sin
    with a minus for the first half of the channels. Returns two of (length, 1, D), float32."""
    frequency = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle = torch.arange(length, dtype=torch.float32)[:, None, None] * frequency  # (length, 1, D/2)
    return torch.cat((angle.cos(), angle.cos()), -1), torch.cat((-angle.sin(), angle.sin()), -1)


# ----------------------------------------------------------------------------------------------------------------------
# The loss


class LinearCrossEntropy(torch.autograd.Function):
    """Cross entropy of x W^T without ever holding all its logits: chunk by chunk, gradients formed on the way.

    With p = softmax(x W^T) the gradient of the summed loss is p - onehot(target) at the logits, so each chunk can be
    turned into its share of dx and dW while its logits are at hand, and then forgotten. Same FLOPs as the plain
    form, and memory for `chunk` rows of fp32 logits in place of all."""

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size, chunk, dtype, need_grad):
        x_low, w_low = x.to(dtype), weight.to(dtype)
        counted = targets != IGNORE
        n = counted.sum().clamp(min=1)
        loss = x.new_zeros((), dtype=torch.promote_types(dtype, torch.float32))
        dx = torch.empty_like(x_low) if need_grad else None
        dw = torch.zeros_like(weight) if need_grad else None
        for i in range(0, len(x), chunk):
            rows, keep = slice(i, i + chunk), counted[i:i + chunk, None]
            target = targets[rows, None].clamp(min=0)
            logits = (x_low[rows] @ w_low.T).to(loss.dtype)  # (chunk, V_pad)
            logits[:, vocab_size:] = -math.inf  # rows that only pad the matrix are no tokens
            log_p = logits.log_softmax(-1)
            loss -= (log_p.gather(1, target) * keep).sum()
            if need_grad:
                dlogits = log_p.exp_()
                dlogits.scatter_add_(1, target, -torch.ones_like(target, dtype=dlogits.dtype))
                dlogits = dlogits.to(dtype)
                dx[rows] = (dlogits @ w_low) * keep  # a target that does not count has no gradient
                dw += dlogits.T @ (x_low[rows] * keep)
        if need_grad:
            ctx.save_for_backward(dx, dw, n)
            ctx.dtype = x.dtype
        return loss / n

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        dx, dw, n = ctx.saved_tensors
        scale = grad / n
        return dx.to(ctx.dtype) * scale.to(ctx.dtype), dw * scale, None, None, None, None, None


def linear_cross_entropy(x, weight, targets, vocab_size: int, chunk: int = 1024):
    """Mean over counted targets of -log softmax(x W^T)[target], in nats.

    x: (N, C); weight: (V_pad, C), of which the first vocab_size rows are tokens; targets: (N,) int64, -100 not counted.
    The products run in the autocast dtype where autocast is on, the softmax in float32. Not twice differentiable:
    curvature needs the plain form, `F.cross_entropy(model(idx)[0].flatten(0, 1), targets.flatten())`."""
    device = "cpu" if x.is_meta else x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    need_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    with torch.autocast(device, enabled=False):
        return LinearCrossEntropy.apply(x, weight, targets, vocab_size, chunk, dtype, need_grad)


# ----------------------------------------------------------------------------------------------------------------------
# Sampling


def pick(logits, temperature: float, top_k: int, top_p: float, generator):
    """One token a row. logits: (B, V). Temperature 0 is greedy. top_k keeps the k likeliest; top_p keeps the fewest
    of the likeliest whose probabilities add up to p (nucleus sampling, Holtzman et al. 2019). Returns (B, 1)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    if top_p < 1:
        p, order = logits.softmax(-1).sort(-1, descending=True)
        drop = p.cumsum(-1) - p >= top_p  # the likelier ones before it already add up to p
        logits = logits.masked_fill(drop.gather(1, order.argsort(-1)), -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)


@torch.no_grad()
def generate(model, idx, n_tokens: int, temperature=1.0, top_k=0, top_p=1.0, seed=0, use_cache=True):
    """Append n_tokens sampled tokens to idx (B, T). Returns (B, T + n_tokens).

    When the context is full, and attention needs one, it starts anew from its last half: one long prefill every
    block_size / 2 tokens. With and without the cache the same context is seen, so the same tokens come out; without,
    each costs a whole pass."""
    generator = torch.Generator(idx.device).manual_seed(seed)
    block_size = model.config.block_size if model.has_attention else math.inf
    start, caches = max(0, idx.shape[1] - block_size), None  # the context is idx[:, start:]
    for _ in range(n_tokens):
        if idx.shape[1] - start > block_size:
            start, caches = idx.shape[1] - max(1, block_size // 2), None
        if not use_cache:
            caches = None
        new = idx[:, start:] if caches is None else idx[:, -1:]
        caches = caches or [Cache() for _ in model.blocks]
        logits, _ = model.forward(new, caches=caches)  # .forward: lengths vary, so never the compiled call
        idx = torch.cat((idx, pick(logits[:, -1], temperature, top_k, top_p, generator)), dim=1)
    return idx


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers and checkpoints, as far as reading them back goes


def tokenizer_to_dict(enc: tiktoken.Encoding) -> dict:
    """All that makes an encoding, in plain types, so that a checkpoint can be read with nothing else at hand."""
    return {"name": enc.name, "pattern": enc._pat_str, "special": dict(enc._special_tokens),
            "ranks": {token.hex(): rank for token, rank in enc._mergeable_ranks.items()}}


class HFEncoding:
    """A tokenizer that tiktoken cannot express (SentencePiece, text that is normalised first, ids in another order than
    the merges), run by Hugging Face's `tokenizers`; with the part of tiktoken.Encoding that is used here."""

    def __init__(self, d: dict):
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise BadInput(f"the tokenizer {d['name']} needs the package tokenizers; pip install tokenizers") from None
        self.name, self._special_tokens, self.eot_token = d["name"], d["special"], d["special"][END_OF_TEXT]
        self.all, self.ordinary = Tokenizer.from_str(d["json"]), Tokenizer.from_str(d["json"])
        self.ordinary.encode_special_tokens = True  # as any other text
        self.n_vocab = max(self.all.get_vocab().values()) + 1

    def lengths(self):
        """(token id, bytes of text that it stands for), of all tokens but the special ones."""
        added = self.all.get_added_tokens_decoder()  # spelt as they are
        byte_level = "ByteLevel" in repr(self.all.decoder)
        for token, i in self.all.get_vocab().items():
            if re.fullmatch("<0x[0-9A-F]{2}>", token):
                yield i, 1
            elif i not in added:  # a character of GPT-2's spelling is a byte; SentencePiece writes a blank as U+2581
                yield i, len(token) if byte_level else len(token.replace("\u2581", " ").encode())
            elif not added[i].special:
                yield i, len(token.encode())

    def encode_ordinary(self, text):
        return self.ordinary.encode(text, add_special_tokens=False).ids

    def encode_ordinary_batch(self, texts, num_threads=0):
        return [e.ids for e in self.ordinary.encode_batch(texts, add_special_tokens=False)]

    def encode(self, text, allowed_special="all"):
        return self.all.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.all.decode(ids, skip_special_tokens=False)

    def decode_bytes(self, ids):
        return self.decode(ids).encode()


def tokenizer_from_dict(d: dict):
    """The inverse of tokenizer_to_dict: a tiktoken.Encoding, or an HFEncoding of a dict that holds one (`json`)."""
    if "json" in d:
        return HFEncoding(d)
    ranks = {bytes.fromhex(token): rank for token, rank in d["ranks"].items()}
    return tiktoken.Encoding(d["name"], pat_str=d["pattern"], mergeable_ranks=ranks, special_tokens=d["special"])


def tokenizer_id(d: dict) -> str:
    """A hash of what the tokenizer does (not of its name): equal ids give equal tokens."""
    rules = json.dumps([d["pattern"], sorted(d["special"].items()), sorted(d["ranks"].items()),
                        *([d["json"]] if "json" in d else [])])
    return hashlib.sha256(rules.encode()).hexdigest()[:16]


def checkpoint_file(name) -> str:
    """The checkpoint in a run's folder, for the folder's name; any other name as it is."""
    inside = Path(name, "ckpt.pt")
    return str(inside if inside.is_file() else name)


def load_checkpoint(path, device="cpu", flag="") -> dict:
    """Read a checkpoint that train.py wrote. Raises BadInput, naming the file, when it is no such thing; `flag` is what
    the user wrote before its name, such as `--resume=`."""
    where = f"{flag}{path}"
    if not Path(path).is_file():
        raise BadInput(f"{where}: no such checkpoint file")
    try:
        ckpt = torch.load(path, map_location=device, weights_only=True)
    except Exception as e:  # damaged bytes fail in the unpickler in every way there is
        if isinstance(e, pickle.UnpicklingError) and "Unsupported" in str(e):
            raise BadInput(f"{where}: holds pickled objects beyond tensors and plain values; not read, as they could run "
                           "code") from None
        reason = (str(e).splitlines() or [type(e).__name__])[0][:100]
        raise BadInput(f"{where}: truncated, or no checkpoint at all ({reason})") from None
    if not isinstance(ckpt, dict) or ckpt.get("format") != "nanolet-1":
        raise BadInput(f"{where}: not a nanolet checkpoint (another program's?)")
    if missing := {"model", "model_config", "tokenizer"} - {*ckpt}:
        raise BadInput(f"{where}: damaged, without {', '.join(sorted(missing))}")
    return ckpt


def model_from_checkpoint(ckpt: dict, device="cpu", where="the checkpoint") -> GPT:
    """The model of a loaded checkpoint, with its weights. Raises BadInput, naming `where`, when they are not its own."""
    names = {f.name for f in fields(ModelConfig)}
    try:
        model = GPT(ModelConfig(**{k: v for k, v in ckpt["model_config"].items() if k in names}))
        model.load_state_dict(ckpt["model"])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as e:
        reason = " ".join(str(e).split())[:200]
        raise BadInput(f"{where}: damaged, its weights do not fit its settings ({reason})") from None
    if not all(p.isfinite().all() for p in model.parameters()):
        raise BadInput(f"{where}: has weights that are not finite")
    return model.to(device)


def device_exists(name: str) -> bool:
    """Whether `name` (cpu, cuda, cuda:1, mps) can hold a tensor on this machine."""
    try:
        device = torch.device(name)
        if device.type == "cuda":  # a tensor there would be a context on that GPU, for as long as this process lives
            return (device.index or 0) < torch.cuda.device_count()
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        return False
    return True


def command(main):
    """Run a command line: bad input is one message and exit code 2; a run that failed, or a full disk, 1. Of torchrun's
    processes rank 0 speaks for all, and each other one of what it alone may have met: `alone`, or its disk's errors."""
    try:
        sys.exit(main(sys.argv[1:]))
    except BadInput as e:
        message, code, alone = str(e), 2, False
    except Failed as e:
        message, code, alone = str(e), 1, getattr(e, "alone", False)
    except OSError as e:
        message, code, alone = f"{e.filename or 'the disk'}: {e.strerror or e}", 1, getattr(e, "alone", True)
    rank = os.environ.get("RANK", "0")
    if alone or rank == "0":
        print(f"error{f' of rank {rank}' if rank != '0' else ''}: {message}", file=sys.stderr)
    sys.exit(code)


def main(argv):
    parser = argparse.ArgumentParser(prog="model.py", description="Sample text from a checkpoint of train.py.")
    parser.add_argument("checkpoint")
    parser.add_argument("--prompt", default="", help="text to continue; empty: start a new document")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to sample")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
    parser.add_argument("--top_k", type=int, default=0, help="keep the k likeliest tokens; 0: all")
    parser.add_argument("--top_p", type=float, default=1.0, help="keep the likeliest tokens up to this probability")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=1, help="continuations of the prompt")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = parser.parse_args(argv)
    problems = [text for bad, text in (
        (a.tokens < 1, f"--tokens={a.tokens}: at least 1"),
        (a.samples < 1, f"--samples={a.samples}: at least 1"),
        (not (a.temperature == 0 or 1e-3 <= a.temperature < math.inf),
         f"--temperature={a.temperature}: 0, or at least 0.001"),
        (not 0 <= a.seed < 2**63, f"--seed={a.seed}: from 0 to 2^63 - 1"),
        (not device_exists(a.device), f"--device={a.device}: no such device here"),
        (a.top_k < 0, f"--top_k={a.top_k}: not negative"),
        (not 0 < a.top_p <= 1, f"--top_p={a.top_p}: above 0, at most 1")) if bad]
    if problems:
        raise BadInput("\n       ".join(problems))
    ckpt = load_checkpoint(checkpoint_file(a.checkpoint))
    enc = tokenizer_from_dict(ckpt["tokenizer"])
    model = model_from_checkpoint(ckpt, a.device, a.checkpoint).eval()
    ids = [enc.eot_token] + enc.encode_ordinary(a.prompt)
    out = generate(model, torch.tensor([ids] * a.samples, device=a.device), a.tokens, a.temperature, a.top_k, a.top_p,
                   a.seed)
    for row in out.tolist():
        print(enc.decode(row[1:]))
        if a.samples > 1:
            print("-" * 80)


if __name__ == "__main__":
    command(main)
