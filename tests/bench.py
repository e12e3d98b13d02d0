"""Benchmarks: what a training step costs, beside a peer. Nothing here asserts; it prints.

    python tests/bench.py [PART ...] [--json]          # every part but tests and gpu
    python tests/bench.py nanogpt let race --write     # and write tests/results/cpu.md
    python tests/bench.py gpu [--scale=cpu]            # the script for a GPU, or its toy on a CPU

Parts
    gpt      a step with AdamW and with Muon
    let      a step with LET, RKD or the linearity regularizer, over a plain one
    loss     head and cross entropy: ours in chunks, the plain form, F.linear_cross_entropy
    eval     log-likelihoods in batches, against one item and one text per forward pass
    optim    Muon against torch.optim.Muon and fused AdamW; the share of multipliers in a step
    mixers   attention against Mamba-2 by length; decoding
    nanogpt  a step of nanoGPT's model and optimizer (of --nanogpt=CHECKOUT, or as below), and ours
    race     the time to the loss that nanoGPT reaches with its own recipe for a CPU, on --data
    ranks    a step, and Muon in it, on 1, 2 and 4 processes (gloo; with CUDA the small model, all
             ranks on one GPU)
    124m     CUDA: GPT-2's shape: tokens/s, MFU, compiled and eager, micro-batches, a profile
    tests    pytest -m gpu
    gpu      CUDA: the parts of GPU_PARTS, each in a process of its own that is stopped at its time
             limit, 7 minutes in all; writes tests/results/gpu.md

Functions to compare take turns, call by call, so that a noisy machine slows all of them alike. A
figure is the median over the calls: ms of wall time, cpu_ms of this process on all its threads;
ratio and cpu_ratio are over the first function. FLOPs as GPT.flops_per_token counts them.
"""
import argparse
import contextlib
import importlib.util
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import model as ours  # noqa: E402
import train  # noqa: E402
from optim import Muon  # noqa: E402

SCALES = {  # flags of train.py: its defaults, 124M, a toy
    "small": {},
    "gpu": dict(vocab_size=50257, block_size=1024, n_layer=12, n_embd=768, n_head=12,
                micro_batch=32, batch_tokens=32 * 1024),
    "cpu": dict(vocab_size=512, block_size=64, n_embd=64, micro_batch=2, batch_tokens=128),
}
SECONDS = {"small": 20, "gpu": 3, "cpu": 0.2}  # of measuring, for each comparison
NANO = dict(vocab_size=4096, block_size=256, n_layer=6, n_embd=256, n_head=4)  # nanoGPT's small
GPU_PARTS = {"tests": 100, "124m": 130, "loss": 40, "optim": 50, "let": 80, "mixers": 50,
             "ranks": 40}  # in the order of their worth, with limits in seconds
GPU_SECONDS = {"gpu": 410, "cpu": 110}  # of all parts together

# --------------------------------------------------------------------------------------------------
# Measuring


class Training:
    """A run's model, terms and optimizers as train.py makes them of these flags, on random tokens.

    One pass a step. The step's number stays the same: past the warm-up, while the teacher teaches.
    The teacher of --teacher=auto has the size that train.py gives it; it is untrained."""

    def __init__(self, devices, compile=False, **flags):
        self.devices, self.c = devices, train.Config(**flags)
        c, device = self.c, devices.device
        self.state = train.State(step=c.warmup_steps)
        torch.manual_seed(0)
        ids = torch.randint(c.vocab_size, (c.micro_batch, c.block_size + 1))
        ids = ids[devices.rank::devices.world].to(device)
        self.tokens = ids[:, 1:].numel()
        self.batch = train.Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(),
                                 [float(self.tokens)], 0)
        self.model = self.net = ours.GPT(train.model_config(c, c.vocab_size)).to(device)
        teacher = None
        if c.teacher == "auto":
            half = {name: getattr(c, name) // 2 for name in ("n_layer", "n_embd", "n_head")}
            shape = train.Config(**flags | half, tie_embeddings=True)
            teacher = ours.GPT(train.model_config(shape, c.vocab_size)).to(device)
            teacher.eval().requires_grad_(False)
        self.terms = train.make_terms(c, self.model, teacher)
        self.hidden = train.states_of(self.terms)
        self.optimizers = train.make_optimizers(c, self.model, self.terms, devices)
        if compile:
            self.model.compile(dynamic=False)
            for term in self.terms:
                term.compile()

    def gradients(self) -> dict:
        """Forward and backward pass, as in train.loop. Returns the loss and the named values."""
        p = train.forward(self, self.batch, synchronize=True)
        with self.devices.autocast():
            loss, values = ours.total(self.terms, p)
        loss.backward()
        return {"loss": loss.detach(), **values}

    def step(self) -> float:
        """One step; its loss. It waits for the device once, as train.loop does."""
        values = self.gradients()
        norm = self.optimizers.clip(self.c.clip)
        means = train.mean_over_ranks(self.devices, values | {"grad_norm": norm})
        self.optimizers.step(self.state.step)
        for term in self.terms:
            term.after_step()
        return means["loss"]

    def flops(self) -> int:
        """Of a step, the teacher's included."""
        terms = sum(t.flops_per_token(self.c.block_size, self.state.step) for t in self.terms)
        return (self.model.flops_per_token() + terms) * self.tokens


class Bench:
    """The device, the scale and its flags; measures, and reports rows."""

    def __init__(self, args, devices):
        self.args, self.devices, self.scale = args, devices, args.scale
        self.flags, self.compiles = SCALES[args.scale], args.scale != "small"
        self.cuda, self.part, self.rows = devices.device.type == "cuda", "", []

    def report(self, **row):
        self.rows.append({"part": self.part, **row})
        if self.args.json:
            versions = {"device": self.devices.name(), "torch": str(torch.__version__)}
            print(json.dumps(self.rows[-1] | versions), flush=True)
        else:
            values = (f"{k} {readable(v)}" for k, v in row.items() if k != "name")
            print(f"{self.part:<8} {row['name']:<36} {'  '.join(values)}", flush=True)

    @contextlib.contextmanager
    def guard(self, name: str):
        """For one case of a part: begins without compiled code, and an error becomes a row."""
        if self.cuda:  # else torch.compile gives up after some shapes of the same function
            torch._dynamo.reset()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            yield
        except Exception as e:  # out of memory, a kernel that is missing, a compiler's error
            self.report(name=name, error=f"{type(e).__name__}: {' '.join(str(e).split())[:200]}")

    def take_turns(self, functions: dict, share=1.0, warm_up=3) -> dict:
        """{name: (wall, CPU)}: median seconds of each function, called in turn for a share of
        --seconds."""
        times = {name: [] for name in functions}
        for _ in range(warm_up):
            for function in functions.values():
                function()
        end = time.perf_counter() + share * self.args.seconds
        while time.perf_counter() < end or len(next(iter(times.values()))) < 3:
            for name, function in functions.items():
                self.devices.synchronize()
                wall, cpu = time.perf_counter(), time.process_time()
                function()
                self.devices.synchronize()
                times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
        return {name: tuple(map(statistics.median, zip(*t))) for name, t in times.items()}

    def compare(self, functions: dict, columns=None, share=1.0, warm_up=3):
        """Times functions in turn and reports each. columns: a function of a name and its wall
        seconds that returns further columns."""
        times = self.take_turns(functions, share, warm_up)
        first = next(iter(times.values()))
        for name, (wall, cpu) in times.items():
            self.report(name=name, ms=1e3 * wall, cpu_ms=1e3 * cpu, ratio=wall / first[0],
                        cpu_ratio=cpu / max(first[1], 1e-9),
                        **(columns(name, wall) if columns else {}))

    def memory(self, function) -> dict:
        """As a column: bytes that a call adds at the peak on a GPU; on a CPU, where that cannot be
        told, bytes that autograd keeps of it for the backward pass, weights included."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            function()
            return {"peak_mb": (torch.cuda.max_memory_allocated() - before) / 1e6}
        seen = {}

        def pack(tensor):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            function()
        return {"kept_mb": sum(seen.values()) / 1e6}


def readable(value) -> str:
    if isinstance(value, float):
        return f"{value:,.3f}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if type(value) is int else str(value)


def filled(model):
    """The model without matrices of zeros, as after some training."""
    for p in model.parameters():
        if p.ndim == 2 and not p.any():
            torch.nn.init.normal_(p, std=0.02)
    return model


# --------------------------------------------------------------------------------------------------
# Parts


def bench_gpt(bench):
    made = {name: Training(bench.devices, optimizer=name, **bench.flags)
            for name in ("adamw", "muon")}
    bench.compare({name: training.step for name, training in made.items()}, lambda name, wall: {
        "tokens_per_second": round(made[name].tokens / wall),
        "gflops_per_second": made[name].flops() / wall / 1e9, **bench.memory(made[name].step)})


def bench_let(bench):
    """Beside each ratio that of the FLOPs. Compiled, with the teacher, where the scale says so."""
    ways = {"let": dict(teacher="auto"), "rkd": dict(teacher="auto", distill="rkd"),
            "linearity cosine": dict(linearity="cosine"), "linearity mse": dict(linearity="mse")}
    sizes = {bench.flags.get("vocab_size", 4096): ways}
    if bench.scale == "small":
        sizes[49152] = {name: ways[name] for name in ("let", "rkd")}
    for V, ways_here in sizes.items():
        flags = {**bench.flags, "vocab_size": V}
        for name, more in ways_here.items():
            with bench.guard(name):
                made = {f"plain, V {V}": Training(bench.devices, bench.compiles, **flags),
                        f"{name}, V {V}": Training(bench.devices, bench.compiles, **flags, **more)}
                plain, other = (training.flops() for training in made.values())
                bench.compare({n: training.step for n, training in made.items()},
                              lambda n, _, k=name, r=other / plain: {
                                  "flops_ratio": r if n.startswith(k) else 1.0})


def bench_loss(bench):
    """Forward and backward at the scale's shape, on the tokens of a pass."""
    c, devices = train.Config(**bench.flags), bench.devices
    N, V, device = c.micro_batch * c.block_size, c.vocab_size, devices.device
    low = torch.bfloat16 if devices.bf16 else torch.float32
    x = torch.randn(N, c.n_embd, device=device, requires_grad=True)
    w = (torch.randn(-(-V // 64) * 64, c.n_embd, device=device) * 0.02).requires_grad_()
    y = torch.randint(V, (N,), device=device)

    def chunked(**options):
        with devices.autocast():
            loss, _ = ours.chunked_loss(ours.next_token_loss, x, w, y, vocab_size=V, **options)
        return loss / N

    def plain():
        return F.cross_entropy((x.to(low) @ w.to(low).T)[:, :V].float(), y)

    def of_torch():
        options = torch.nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(x.to(low), w[:V].to(low), y, options=options)

    ways = {"ours": chunked, "plain": plain}
    if hasattr(F, "linear_cross_entropy"):  # from torch 2.13 on
        ways["torch's"] = of_torch
    if bench.compiles:
        ways["plain, compiled"] = torch.compile(plain, dynamic=False)
        for chunk in (1024, 4096):
            ways[f"ours, compiled, chunk {chunk}"] = partial(chunked, compiled=True, chunk=chunk)
    memory = {}
    for name, way in ways.items():
        with bench.guard(name):
            memory[name] = bench.memory(lambda way=way: way().backward())
    bench.compare({name: lambda way=ways[name]: way().backward() for name in memory},
                  lambda name, _: memory[name])


def bench_eval(bench):
    """64 items of HellaSwag's shape (contexts of 30 to 90 tokens, 4 endings of 10 to 40) and 256
    minimal pairs of BLiMP's (8 to 16 tokens)."""
    torch.manual_seed(0)
    c = train.Config(**bench.flags)
    model = filled(ours.GPT(train.model_config(c, c.vocab_size)).to(bench.devices.device).eval())

    def item(context, endings, ending):
        start, texts = int(torch.randint(*context, ())), []
        first = torch.randint(c.vocab_size, (start,)).tolist()
        for n in torch.randint(*ending, (endings,)).tolist():
            ids = first + torch.randint(c.vocab_size, (n,)).tolist()
            texts.append((ids[:-1], [ours.IGNORE] * (start - 1) + ids[start:]))
        return texts

    def score(groups):
        return [value for group in groups for value, _ in ours.log_likelihoods(model, group)]

    for shape, items in {"choices": [item((30, 91), 4, (10, 41)) for _ in range(64)],
                         "pairs": [item((1, 2), 2, (8, 17)) for _ in range(256)]}.items():
        texts = [text for item in items for text in item]
        ways = {f"{shape}, batched": [texts], f"{shape}, one item a pass": items,
                f"{shape}, one text a pass": [[text] for text in texts]}
        scores = [score(groups) for groups in ways.values()]
        error = max(abs(a - b) for a, b in zip(scores[0], scores[2]))
        bench.report(name=shape, texts=len(texts), largest_difference=error)
        bench.compare({way: partial(score, groups) for way, groups in ways.items()}, warm_up=0)


def bench_optim(bench):
    """Muon on the matrices of GPT-2 124M's blocks, each logical one alone; then clipping and step
    with and without multipliers, as a share of a step (of 524,288 tokens at the scale gpu)."""
    layers, C = (2, 64) if bench.scale == "cpu" else (12, 768)

    def matrices():
        shapes = ([(C, C)] * 4 + [(4 * C, C), (C, 4 * C)]) * layers
        made = [torch.nn.Parameter(torch.randn(s, device=bench.devices.device)) for s in shapes]
        for p in made:
            p.grad = torch.randn_like(p)
        return made

    made = {"torch.optim.Muon": torch.optim.Muon(matrices()), "Muon": Muon(matrices()),
            "AdamW, fused": torch.optim.AdamW(matrices(), fused=True)}
    bench.compare({name: optimizer.step for name, optimizer in made.items()}, warm_up=1)
    del made
    for name in ("muon", "adamw"):
        with bench.guard(name):
            flags = {**bench.flags, "optimizer": name}
            training = Training(bench.devices, bench.compiles, **flags)
            kinds = ("none", "scalar", "vector")
            updates = [update_alone(Training(bench.devices, **flags, multipliers=kind))
                       for kind in kinds]
            times = bench.take_turns({"pass": training.gradients, **dict(zip(kinds, updates))})
            wall, plain, *others = (wall for wall, _ in times.values())
            tokens = 2**19 if bench.scale == "gpu" else training.tokens
            whole = wall * tokens / training.tokens + plain
            bench.report(name=f"step, {name}", tokens=tokens, pass_ms=1e3 * wall,
                         update_ms=1e3 * plain, update_share=plain / whole)
            for kind, seconds in zip(kinds[1:], others):
                bench.report(name=f"{kind} multipliers, {name}", extra_ms=1e3 * (seconds - plain),
                             extra_share=(seconds - plain) / whole)


def update_alone(training):
    """A function that clips and steps, with the same gradients at each call."""
    training.gradients()
    gradients = [(p, p.grad) for p in training.model.parameters()]

    def update():
        for p, gradient in gradients:
            p.grad = gradient
        training.optimizers.clip(training.c.clip)
        training.optimizers.step(training.state.step)

    return update


def bench_mixers(bench):
    """Two blocks of attention and MLP against four of Mamba-2, of nearly equal parameters, without
    embedding and head, forward and backward on the same number of tokens at every length."""
    device = bench.devices.device
    tokens, C = {"cpu": (256, 64), "gpu": (16384, 768), "small": (8192, 512)}[bench.scale]
    chunk = 128 if bench.scale == "gpu" else 64  # torch 2.11 cannot compile 256 for CUDA
    shape = dict(vocab_size=64, block_size=tokens, n_embd=C, n_head=C // 64, chunk_size=chunk)
    models = {"attention": ours.GPT(ours.ModelConfig(**shape, n_layer=2)),
              "mamba2": ours.GPT(ours.ModelConfig(**shape, n_layer=4, mixer="mamba2"))}
    models = {name: filled(model).to(device) for name, model in models.items()}

    for name, model in models.items():
        with bench.guard(f"{name} decodes"), torch.no_grad():
            caches = [ours.Cache() for _ in model.blocks]
            token = torch.zeros(1, 1, dtype=torch.int64, device=device)
            for until in (64, 128) if bench.scale == "cpu" else (256, 1024):
                while caches[0].length < until - 3:
                    model.forward(token, caches=caches)
                [(wall, _)] = bench.take_turns(
                    {name: partial(model.forward, token, caches=caches)}, 0, 0).values()
                bench.report(name=f"{name} decodes token {until}", ms=1e3 * wall)

    def step(model, trunk, idx):
        with bench.devices.autocast():
            trunk(idx)[0].float().square().mean().backward()
        model.zero_grad()

    lengths = [n for n in (64, 512, 1024, 2048, 4096, 8192, 16384) if tokens // 32 <= n <= tokens]
    for how in ("eager", "compiled") if bench.compiles else ("eager",):
        for length in lengths if how == "eager" else lengths[::2]:
            idx, steps = torch.randint(64, (tokens // length, length), device=device), {}
            with bench.guard(f"length {length}, {how}"):
                for name, m in models.items():
                    trunk = torch.compile(m.trunk, dynamic=False) if how != "eager" else m.trunk
                    steps[f"{name}, length {length}, {how}"] = partial(step, m, trunk, idx)
                bench.compare(steps, lambda name, wall, steps=steps: {
                    "us_per_token": 1e6 * wall / tokens, **bench.memory(steps[name])}, 0.5, 1)


# --------------------------------------------------------------------------------------------------
# nanoGPT


class NanoGPT(torch.nn.Module):
    """The operations of nanoGPT's model, in its order: LayerNorm without bias, GELU, learned
    positions, one matrix for embedding and head, all logits at once."""

    def __init__(self, block_size, vocab_size, n_layer, n_head, n_embd, bias=False, **_):
        super().__init__()
        self.n_head = n_head
        linear = partial(torch.nn.Linear, bias=bias)
        norm = partial(torch.nn.LayerNorm, n_embd, bias=bias)
        self.wte = torch.nn.Embedding(vocab_size, n_embd)
        self.wpe = torch.nn.Embedding(block_size, n_embd)
        self.blocks = torch.nn.ModuleList(torch.nn.ModuleDict({
            "norm_1": norm(), "qkv": linear(n_embd, 3 * n_embd), "proj": linear(n_embd, n_embd),
            "norm_2": norm(), "up": linear(n_embd, 4 * n_embd), "down": linear(4 * n_embd, n_embd),
        }) for _ in range(n_layer))
        self.norm, self.head = norm(), linear(n_embd, vocab_size)
        for name, p in self.named_parameters():
            if p.ndim > 1:
                out = name.endswith(("proj.weight", "down.weight"))
                torch.nn.init.normal_(p, std=0.02 / math.sqrt(2 * n_layer) if out else 0.02)
        self.wte.weight = self.head.weight

    def forward(self, idx, targets):
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        for b in self.blocks:
            heads = (t.unflatten(-1, (self.n_head, -1)).transpose(1, 2)
                     for t in b["qkv"](b["norm_1"](x)).chunk(3, dim=-1))
            y = F.scaled_dot_product_attention(*heads, is_causal=True)
            x = x + b["proj"](y.transpose(1, 2).flatten(2))
            x = x + b["down"](F.gelu(b["up"](b["norm_2"](x))))
        logits = self.head(self.norm(x))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self, weight_decay, lr, betas, device):
        groups = [{"params": [p for p in self.parameters() if p.ndim > 1],
                   "weight_decay": weight_decay},
                  {"params": [p for p in self.parameters() if p.ndim < 2], "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=device == "cuda")


class NanoTraining:
    """nanoGPT's model (of the checkout at --nanogpt if given) and its step."""

    def __init__(self, bench, bf16: bool, betas=(0.9, 0.95), **shape):
        torch.manual_seed(0)
        self.device, self.bf16 = bench.devices.device, bf16
        if bench.args.nanogpt:
            path = Path(bench.args.nanogpt) / "model.py"
            spec = importlib.util.spec_from_file_location("nanogpt_model", path)
            nanogpt = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(nanogpt)
            model = nanogpt.GPT(nanogpt.GPTConfig(**shape, dropout=0.0, bias=False))
        else:
            model = NanoGPT(**shape)
        self.model = model.to(self.device)
        self.optimizer = model.configure_optimizers(0.1, 1e-3, betas, self.device.type)

    def step(self, idx, targets) -> float:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            _, loss = self.model(idx.to(self.device), targets.to(self.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


def bench_nanogpt(bench):
    for bf16 in (False, True) if bench.devices.bf16 else (False,):
        devices, dtype = train.Devices(bench.devices.device, bf16=bf16), "bf16" if bf16 else "fp32"
        made = {f"ours, {dtype}, {name}": Training(devices, **NANO, mlp="gelu", optimizer=name)
                for name in ("adamw", "muon")}
        batch = made[f"ours, {dtype}, muon"].batch
        nano = NanoTraining(bench, bf16, **NANO)
        steps = {f"nanoGPT, {dtype}": partial(nano.step, batch.idx, batch.targets)}
        steps |= {name: training.step for name, training in made.items()}
        bench.compare(steps, lambda name, _, steps=steps: bench.memory(steps[name]))


def bench_race(bench):
    """nanoGPT's recipe: 4 blocks of width 128, 4 heads, context 64, 12 sequences, 2,000 steps of
    AdamW (0.9, 0.99), warm-up 100, cosine from 1e-3 to 1e-4, fp32. Ours: train.py's defaults with
    --tokenizer=bytes, for the fewest steps (bisected) whose run ends at or below its loss. Losses
    are nats per byte of the same held-out text, each model with its own context, ours with a
    context of 64 too. A time is steps times the median of a step, the two taking turns."""
    steps = 30 if bench.scale == "cpu" else 2000
    data = train.load_data(train.Config(data=bench.args.data, tokenizer="bytes", block_size=64))
    nano = NanoTraining(bench, False, (0.9, 0.99), block_size=64, vocab_size=257, n_layer=4,
                        n_head=4, n_embd=128)
    for step in range(steps):
        share = max(0.0, (step - 100) / max(1, steps - 100))
        cosine = 1e-4 + 9e-4 * (1 + math.cos(math.pi * share)) / 2
        nano.optimizer.param_groups[0]["lr"] = min(1e-3 * (step + 1) / 101, cosine)
        nano.optimizer.param_groups[1]["lr"] = nano.optimizer.param_groups[0]["lr"]
        batch = data.train.batch(train.block_numbers(0, 12 * step, 12, len(data.train)))
        nano.step(*batch)
    target = held_out_loss(lambda *batch: nano.model(*batch)[1], data.val, nano.device)
    bench.report(name="nanoGPT's recipe", steps=steps, loss=target)

    low, high = 16, 32  # the warm-up is 20 steps
    while race_run(bench, data.val, high) > target and high < 2048:
        low, high = high, 2 * high
    while high - low > max(4, high // 16):
        middle = (low + high) // 2
        reached = race_run(bench, data.val, middle) <= target
        low, high = (low, middle) if reached else (middle, high)
    count = {"nanoGPT": steps, "ours": high}
    default = Training(bench.devices, vocab_size=257)
    times = bench.take_turns({"nanoGPT": partial(nano.step, *batch), "ours": default.step})
    first = [steps * seconds for seconds in times["nanoGPT"]]
    for name, (wall, cpu) in times.items():
        n = count[name]
        bench.report(name=f"{name}, time to the loss", steps=n, ms_per_step=1e3 * wall,
                     seconds=n * wall, cpu_seconds=n * cpu, ratio=n * wall / first[0],
                     cpu_ratio=n * cpu / first[1])


def race_run(bench, held_out, steps: int) -> float:
    """The held-out loss at the end of our run of so many steps."""
    device = bench.devices.device
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        result = train.train(train.Config(
            data=bench.args.data, tokenizer="bytes", steps=steps, eval_every=steps, sample_tokens=0,
            save_every=steps, device=bench.args.device, out_dir=f"{folder}/run"))
        model = ours.model_from_checkpoint(ours.load_checkpoint(result["checkpoint"])).to(device)
    short = held_out_loss(lambda idx, y: model.loss(model(idx)[0], y), held_out, device)
    bench.report(name=f"ours, {steps} steps", loss=result["val_loss"], loss_at_context_64=short,
                 seconds=result["seconds"])
    return result["val_loss"]


@torch.no_grad()
def held_out_loss(loss_of, blocks, device, tokens=32_768) -> float:
    """Mean nats over so many tokens in blocks spread evenly over the held-out text."""
    n = max(1, min(len(blocks), tokens // blocks.block_size))
    batches = (blocks.batch([i * len(blocks) // n]) for i in range(n))
    return statistics.mean(loss_of(*(t.to(device) for t in batch)).item() for batch in batches)


# --------------------------------------------------------------------------------------------------
# Several processes, and the script for a GPU


def bench_ranks(bench):
    """The global batch is the same on every number of ranks, so the third loss is too, up to
    rounding. muon_ms: its step alone, the exchange between ranks included."""
    if "RANK" not in os.environ:
        for ranks in (1, 2, 4) if bench.scale == "small" else (1, 2):
            if error := run_part(bench, "ranks", 100, ranks):
                bench.report(name=f"{ranks} ranks", error=error)
        return
    training = Training(bench.devices, **SCALES["small"] if bench.cuda else bench.flags)
    training.net = torch.nn.parallel.DistributedDataParallel(
        training.model, gradient_as_bucket_view=True, broadcast_buffers=False)
    losses = [training.step() for _ in range(3)]
    muon = training.optimizers.optimizers["muon"]

    def step_of_muon():
        for p in (p for group in muon.param_groups for p in group["params"]):
            p.grad = torch.ones_like(p)
        muon.step()
        muon.zero_grad()

    # share=0: the same number of calls on every rank
    times = bench.take_turns({"step": training.step, "muon": step_of_muon}, share=0)
    if bench.devices.rank == 0:
        bench.report(name=f"{bench.devices.world} ranks", third_loss=losses[2],
                     **{f"{name}_ms": 1e3 * wall for name, (wall, _) in times.items()},
                     cpu_ms_of_a_rank=1e3 * times["step"][1])
    dist.destroy_process_group()


def bench_124m(bench):
    """GPT-2's shape, or the toy's. first_s: seconds of the first step, compilation included."""
    if bench.scale == "small":
        return bench.report(name="124m", skipped="needs CUDA")
    rows = bench.flags["micro_batch"]
    cases = [("muon", rows, True), ("adamw", rows, True), ("muon", rows, False),
             ("adamw", rows, False), ("muon", 2 * rows, True), ("muon", rows // 2, True)]
    for optimizer, micro_batch, compile in cases:
        name = f"{optimizer}, {micro_batch} sequences, {'compiled' if compile else 'eager'}"
        with bench.guard(name):
            training = Training(bench.devices, compile, **bench.flags | {
                "optimizer": optimizer, "micro_batch": micro_batch})
            start = time.perf_counter()
            training.step()
            first, peak = time.perf_counter() - start, bench.devices.peak_flops()
            wall, cpu = bench.take_turns({name: training.step})[name]
            bench.report(name=name, tokens_per_second=round(training.tokens / wall),
                         mfu=training.flops() / wall / peak if peak else None, ms=1e3 * wall,
                         cpu_ms=1e3 * cpu, first_s=first,
                         peak_mb=bench.devices.peak_memory() / 1e6)
            del training
    with bench.guard("profile"):  # last, as an error of the profiler can end the process
        training = Training(bench.devices, True, **bench.flags)
        training.step()
        profile(bench, training)


def profile(bench, training, most=12):
    """The kernels, or on a CPU the operations, that take most of three steps."""
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if bench.cuda else activity.CPU]) as p:
        for _ in range(3):
            training.step()
        bench.devices.synchronize()
    kind = "self_device_time_total" if bench.cuda else "self_cpu_time_total"
    found = sorted(((getattr(e, kind), e.count, e.key) for e in p.key_averages()), reverse=True)
    whole = sum(us for us, _, _ in found)
    for us, count, key in found[:most]:
        bench.report(name=f"kernel {key[:80]}", ms_per_step=us / 3e3, calls_per_step=count / 3,
                     share=us / max(whole, 1e-9))


def bench_tests(bench):
    run = subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu", "-rfE", "--tb=line", "-p",
                          "no:cacheprovider", "tests"], capture_output=True, text=True, cwd=ROOT,
                         env={**os.environ, "COLUMNS": "300"})  # room for what went wrong
    lines = (run.stdout.strip() or run.stderr.strip() or "no output").splitlines()
    bench.report(name="pytest -m gpu", exit_code=run.returncode, result=lines[-1])
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            bench.report(name=line[:300])


def bench_gpu(bench):
    """Each part in a process of its own: an error of CUDA in one spoils no other."""
    if not bench.cuda and bench.scale != "cpu":
        raise ours.BadInput("gpu needs CUDA; --scale=cpu runs it at toy size")
    end = time.perf_counter() + GPU_SECONDS["gpu" if bench.cuda else "cpu"]
    for part, limit in GPU_PARTS.items():
        bench.part, start = part, time.perf_counter()
        limit = min(limit, end - start)
        error = run_part(bench, part, limit) if limit > 5 else "no time left"
        bench.report(name=f"the part {part}", seconds=time.perf_counter() - start,
                     **({"error": error} if error else {}))
        if bench.cuda:
            write_results(bench)


def run_part(bench, part: str, limit: float, ranks=0) -> str:
    """Reports the rows of a part that runs in a process of its own, or in so many ranks, as they
    come. Returns what went wrong, or an empty string."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *(launcher if ranks else []), __file__, part, "--json",
               f"--scale={bench.scale}", f"--seconds={bench.args.seconds}",
               f"--device={bench.args.device}"]
    with tempfile.TemporaryFile("w+") as errors:
        run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True,
                               start_new_session=not ranks)
        stop = run.terminate if ranks else partial(os.killpg, run.pid, signal.SIGTERM)
        timer = threading.Timer(limit, stop)
        timer.start()
        for line in run.stdout:
            with contextlib.suppress(json.JSONDecodeError):
                row = json.loads(line)
                bench.report(**{k: v for k, v in row.items()
                                if k not in ("part", "device", "torch")})
        code = run.wait()
        timer.cancel()
        errors.seek(0)
        last = (errors.read().strip().splitlines() or [f"exit code {code}"])[-1]
    if code in (-signal.SIGTERM, 128 + signal.SIGTERM):
        return f"stopped after {limit:.0f} s"
    return last if code else ""


def processor(devices) -> str:
    info = Path("/proc/cpuinfo")
    if devices.device.type != "cpu" or not info.exists():
        return devices.name()
    found = re.search(r"model name\s*: (.*)", info.read_text())
    return f"{found[1] if found else 'a CPU'}, {torch.get_num_threads()} thread(s)"


def write_results(bench):
    """tests/results/gpu.md or cpu.md: a table for each kind of row of each part."""
    name = "gpu" if bench.cuda else "cpu"
    text = [f"""# Speed on a {name.upper()}

{processor(bench.devices)}, torch {torch.__version__}, Python {sys.version.split()[0]}; written by
`{' '.join(['python tests/bench.py', *sys.argv[1:]])}`. Medians.
ms: wall time; cpu_ms: CPU time, of all threads; ratio: over the first row of a comparison, whose
functions took turns.
"""]
    tables = {}
    for row in bench.rows:
        tables.setdefault((row["part"], *row), []).append(row)
    for (part, _, *columns), rows in tables.items():
        table = [columns, ["---"] * len(columns), *(
            [readable(row[k]).replace("|", "\\|") for k in columns] for row in rows)]
        text += [f"## {part}", ""] + [f"| {' | '.join(cells)} |" for cells in table] + [""]
    path = ROOT / "tests" / "results" / f"{name}.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(text))


PARTS = {"gpt": bench_gpt, "let": bench_let, "loss": bench_loss, "eval": bench_eval,
         "optim": bench_optim, "mixers": bench_mixers, "nanogpt": bench_nanogpt,
         "race": bench_race, "ranks": bench_ranks, "124m": bench_124m, "tests": bench_tests,
         "gpu": bench_gpu}


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help="default: all but tests and gpu")
    add("--json", action="store_true", help="one object a line")
    add("--write", action="store_true", help="also write tests/results/cpu.md, on a GPU gpu.md")
    add("--seconds", type=float, help="of measuring, for each comparison")
    add("--scale", choices=SCALES, help="train.py's defaults, 124M (default with CUDA), or a toy")
    add("--device", default="auto")
    add("--data", default="stdlib", help="text of the race, as train.py's --data")
    add("--nanogpt", help="folder of a checkout of nanoGPT")
    args = parser.parse_args(argv)
    if unknown := {*args.parts} - {*PARTS}:
        parser.error(f"{', '.join(unknown)}: the parts are {', '.join(PARTS)}")
    if args.scale == "cpu":  # on a CPU, torch.compile needs minutes
        args.device, os.environ["TORCHDYNAMO_DISABLE"] = "cpu", "1"
    if "RANK" in os.environ:  # not as train.py: the ranks share one GPU, by gloo
        dist.init_process_group("gloo")
        device = torch.device("cuda:0" if args.scale == "gpu" else "cpu")
        devices = train.Devices(device, dist.get_rank(), dist.get_world_size(),
                                train.has_fast_bf16(device))
    else:
        devices = train.set_up_devices(train.Config(device=args.device))
    args.scale = args.scale or ("gpu" if devices.device.type == "cuda" else "small")
    args.seconds = SECONDS[args.scale] if args.seconds is None else args.seconds
    bench = Bench(args, devices)
    if not args.json:
        print(f"{devices.name()}, {torch.get_num_threads()} threads, "
              f"{'bf16' if devices.bf16 else 'fp32'}, torch {torch.__version__}")
    for part in args.parts or [part for part in PARTS if part not in ("tests", "gpu")]:
        bench.part = part
        PARTS[part](bench)
    if args.write:
        write_results(bench)


if __name__ == "__main__":
    ours.command(main)
