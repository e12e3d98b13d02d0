"""Benchmarks: what a training step costs. Nothing here asserts; it prints.

    python tests/bench.py                              # every part that this machine can run
    python tests/bench.py gpt --json                   # one part, one JSON object a line
    python tests/bench.py nanogpt --nanogpt=PATH       # against a checkout of nanoGPT; without PATH, its operations

Parts: gpt (AdamW against Muon), let (a step with the teacher, by LET and by RKD, or with the linearity regulariser,
against a plain one), loss (the chunked loss against torch's), eval (scoring in batches against one text per forward
pass), optim (Muon against torch's, multipliers, the split over ranks), mixers (attention against Mamba-2 by length, the
scan against one einsum), nanogpt, 124m (CUDA: GPT-2's shape, compiled and eager, with MFU). The variants of a part take
turns, step by step, so that a noisy machine slows all of them; the figure is the median over the steps. FLOPs as
GPT.flops_per_token counts them.
"""
import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import train as t  # noqa: E402
from model import GPT, Cache, ModelConfig, linear_cross_entropy, ssd  # noqa: E402
from optim import Muon, newton_schulz  # noqa: E402
from probes import linearity_penalty, log_likelihoods  # noqa: E402
from teacher import LET, RECIPES, Rival  # noqa: E402

DEFAULT = t.Config()
NANO = dict(vocab_size=4096, block_size=256, n_layer=6, n_embd=256, n_head=4, n_kv_head=4, mlp="gelu", qk_norm=False)
GPT2 = dict(vocab_size=50257, block_size=1024, n_layer=12, n_embd=768, n_head=12, n_kv_head=12)


def shape_of(c: t.Config) -> ModelConfig:
    return t.model_config(c, c.vocab_size)


def random_batch(config, rows, device):
    ids = torch.randint(config.vocab_size, (rows, config.block_size + 1), device=device)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def training_step(config: ModelConfig, rows: int, devices: t.Devices, optimizer="muon", compile=False, teacher=None,
                  distill="let", multipliers=None, linearity=""):
    """(a function that makes one training step, the model, FLOPs of the step)."""
    torch.manual_seed(0)
    model = GPT(config).to(devices.device)
    multipliers = t.Multipliers(model, multipliers) if multipliers else None
    optimizers = t.make_optimizers(model, multipliers, optimizer, 1e-3,
                                   dtype=torch.bfloat16 if devices.bf16 else torch.float32)
    clipped = t.clipped_parameters(model, multipliers)
    idx, targets = random_batch(config, rows, devices.device)
    flops = model.flops_per_token() * idx.numel()
    let = rival = None
    if teacher is not None:
        teacher = GPT(teacher).to(devices.device).eval().requires_grad_(False)
        let = LET(teacher, config.n_embd).to(devices.device) if distill == "let" else None
        rival = Rival(teacher, distill, RECIPES[distill]) if distill != "let" else None
        flops += (let or rival).flops_per_token(config.block_size) * idx.numel()
    if compile:
        model.compile(dynamic=False)
        if let or rival:
            (let or rival).compile_teacher()

    def step():
        with devices.autocast():
            if rival:
                loss = rival.loss(model(idx, head=False)[0], model.head.weight, targets, rival.teach(idx), config.vocab_size)[0]
            else:
                hidden = (3,) if let else tuple(range(config.n_layer + 1)) if linearity else ()
                loss, states = model(idx, targets, hidden=hidden)
            if let:
                loss = loss + let(states[0], let.teach(idx))[0]
            if linearity:
                loss = loss + 0.5 * linearity_penalty(states, linearity)
        loss.backward()
        if multipliers:
            multipliers.split_gradients()
        t.clip_gradients(clipped, 1.0)
        for o in optimizers:
            o.step()
        if multipliers:
            multipliers.fold()
        for o in optimizers:
            o.zero_grad(set_to_none=True)
        return loss.item()

    return step, model, flops


def take_turns(steps: dict, seconds: float, devices: t.Devices, warm_up=3) -> dict[str, float]:
    """Median seconds of each function, called in turn for about so many seconds in all."""
    times = {name: [] for name in steps}
    for _ in range(warm_up):
        for step in steps.values():
            step()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, step in steps.items():
            devices.sync()
            start = time.perf_counter()
            step()
            devices.sync()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(ts) for name, ts in times.items()}


CASES = {  # name -> (shape, rows, optimizer), each also measured for memory in a process of its own
    "default, AdamW": (shape_of(DEFAULT), DEFAULT.micro_batch, "adamw"),
    "default, Muon": (shape_of(DEFAULT), DEFAULT.micro_batch, "muon"),
    "nanoGPT-sized, AdamW": (ModelConfig(**NANO), 8, "adamw"),
    "nanoGPT-sized, Muon": (ModelConfig(**NANO), 8, "muon"),
}


def peak_memory(name: str, devices: t.Devices) -> int:
    """Bytes that three steps of a case add at the peak, to the process on a CPU, on the device with CUDA."""
    before = 0 if devices.device.type == "cuda" else devices.peak_memory()
    config, rows, optimizer = CASES[name]
    step, _, _ = training_step(config, rows, devices, optimizer)
    for _ in range(3):
        step()
    return devices.peak_memory() - before


def bench_gpt(a, devices, report):
    for size in ("default", "nanoGPT-sized"):
        names = [n for n in CASES if n.startswith(size)]
        made = {n: training_step(*CASES[n][:2], devices, CASES[n][2]) for n in names}
        seconds = take_turns({n: made[n][0] for n in names}, a.seconds, devices)
        for n in names:
            config, rows, _ = CASES[n]
            memory = int(subprocess.run([sys.executable, __file__, "--memory", n, "--device", a.device], text=True,
                                        capture_output=True, check=True).stdout.split()[-1])
            tokens = rows * config.block_size
            report(name=n, parameters=made[n][1].num_params(), ms_per_step=1e3 * seconds[n],
                   tokens_per_second=tokens / seconds[n], flops_per_token=made[n][2] // tokens,
                   peak_memory_mb=memory / 1e6, time_over_first=seconds[n] / seconds[names[0]])


def bench_let(a, devices, report):
    """A step while the teacher runs, by LET and by RKD, and one with the linearity regulariser, over a plain one; beside it
    the same ratio in FLOPs."""
    config = shape_of(DEFAULT)
    strings = [bytes([i]) for i in range(256)] + [bytes([i // 256, i % 256]) for i in range(DEFAULT.vocab_size - 257)]
    tokenizer = t.make_tokenizer("bench", {token: rank for rank, token in enumerate(strings)}, t.PATTERN)
    teacher = t.model_config(t.auto_teacher(DEFAULT, tokenizer, ""), config.vocab_size)
    made = {"plain": training_step(config, DEFAULT.micro_batch, devices)}
    made |= {n: training_step(config, DEFAULT.micro_batch, devices, teacher=teacher, distill=n) for n in ("let", "rkd")}
    made |= {n: training_step(config, DEFAULT.micro_batch, devices, linearity=n) for n in ("cosine", "mse")}
    seconds = take_turns({n: m[0] for n, m in made.items()}, 2 * a.seconds, devices)
    for n in ("let", "rkd", "cosine", "mse"):
        report(name=f"{n} over plain", ms_plain=1e3 * seconds["plain"], ms=1e3 * seconds[n],
               time_ratio=seconds[n] / seconds["plain"], flops_ratio=made[n][2] / made["plain"][2])


def bench_loss(a, devices, report):
    """Head and cross entropy, forward and backward, at the default shape: ours, torch's chunked one, the plain form."""
    c = shape_of(DEFAULT)
    N, dtype = DEFAULT.batch_tokens, torch.bfloat16 if devices.bf16 else torch.float32
    x = torch.randn(N, c.n_embd, device=devices.device, requires_grad=True)
    w = (torch.randn(c.vocab_size, c.n_embd, device=devices.device) * 0.02).requires_grad_()
    y = torch.randint(c.vocab_size, (N,), device=devices.device)

    def ours():
        with devices.autocast():
            loss = linear_cross_entropy(x, w, y, c.vocab_size)
        loss.backward()

    steps = {"ours": ours, "plain": lambda: F.cross_entropy((x.to(dtype) @ w.to(dtype).T).float(), y).backward()}
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()
        steps["torch chunked"] = lambda: F.linear_cross_entropy(x.to(dtype), w.to(dtype), y, options=options).backward()
    seconds = take_turns(steps, a.seconds, devices)
    for n, s in seconds.items():
        report(name=f"loss, {n}", ms=1e3 * s, time_over_ours=s / seconds["ours"])


def bench_eval(a, devices, report):
    """64 items of HellaSwag's shape (contexts of 30 to 90 tokens, 4 endings of 10 to 40) and 256 minimal pairs of BLiMP's (8
    to 16 tokens): batched and with shared contexts, against one text and against one item (filled up) per forward pass."""
    torch.manual_seed(0)
    c = shape_of(DEFAULT)
    model = GPT(c).to(devices.device).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02) if p.ndim == 2 and not p.any() else None

    def item(context, n_choices, choice):
        start = int(torch.randint(*context, ()))
        first = torch.randint(c.vocab_size, (start,)).tolist()
        lengths = torch.randint(*choice, (n_choices,)).tolist()
        return [(first + torch.randint(c.vocab_size, (n,)).tolist(), start) for n in lengths]

    @torch.no_grad()
    def plain(texts):
        idx = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids, _ in texts], batch_first=True).to(devices.device)
        log_p = model(idx)[0].float().log_softmax(-1)
        return [log_p[row, range(start - 1, len(ids) - 1), ids[start:]].sum().item() for row, (ids, start) in enumerate(texts)]

    shapes = (("choices", [item((30, 91), 4, (10, 41)) for _ in range(64)]), ("pairs", [item((1, 2), 2, (8, 17)) for _ in range(256)]))
    for dtype, (shape, items) in itertools.product((torch.float32, torch.bfloat16) if devices.bf16 else (torch.float32,), shapes):
        model.to(dtype)
        ours = log_likelihoods(model, items)
        error = max(abs(x - y) for item, scores in zip(items, ours) for x, y in zip(plain(item), scores))
        ways = {"batched": lambda: log_likelihoods(model, items),
                "one item a pass": lambda: [plain(item) for item in items],
                "one text a pass": lambda: [plain([text]) for item in items for text in item]}
        seconds = take_turns(ways, a.seconds / 2, devices, warm_up=1)
        for n, s in seconds.items():
            report(name=f"{shape}, {n}, {dtype}", texts_per_second=sum(map(len, items)) / s,
                   time_over_ours=s / seconds["batched"], largest_difference=error)


def kept_for_backward(loss_of) -> int:
    """Bytes that autograd keeps of what loss_of() computes, weights included."""
    seen = {}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of()
    return sum(seen.values())


def ssd_by_einsum(x, dt, A, B, C, chunk):
    """The same scan as model.ssd, with the part within chunks as one einsum of four operands, B and C expanded to heads."""
    b, T, H, P = x.shape
    N, K = B.shape[-1], T // chunk
    x, a = (x * dt[..., None]).view(b, K, chunk, H, P), (dt * A).view(b, K, chunk, H).permute(0, 3, 1, 2).cumsum(-1)
    B, C = (t.repeat_interleave(H // t.shape[2], dim=2).view(b, K, chunk, H, N) for t in (B, C))
    mask = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
    L = (a[..., :, None] - a[..., None, :]).masked_fill(~mask, -torch.inf).exp()
    y = torch.einsum("bclhn,bcshn,bhcls,bcshp->bclhp", C, B, L, x)
    states = torch.einsum("bclhn,bhcl,bclhp->bchpn", B, (a[..., -1:] - a).exp(), x)
    h, before = torch.zeros_like(states[:, 0]), []
    for decay, added in zip(a[..., -1].exp()[..., None, None].unbind(2), states.unbind(1)):
        before.append(h)
        h = decay * h + added
    return (y + torch.einsum("bclhn,bchpn,bhcl->bclhp", C, torch.stack(before, 1), a.exp())).reshape(b, T, H, P)


def bench_mixers(a, devices, report):
    """Two blocks of attention and MLP against four of Mamba-2, of nearly equal parameters, without embedding and head."""
    shape = dict(vocab_size=64, block_size=8192, n_embd=512, n_head=8, n_kv_head=8, mlp="relu2", qk_norm=False)
    models = {"attention": GPT(ModelConfig(**shape, n_layer=2)), "mamba2": GPT(ModelConfig(**shape, n_layer=4, mixer="mamba2"))}
    for m in models.values():
        m.to(devices.device)
        for p in m.parameters():
            torch.nn.init.normal_(p, std=0.02) if p.ndim == 2 and not p.any() else None
    first = {}
    for length in (256, 512, 1024, 2048, 4096, 8192):
        idx = torch.randint(64, (8192 // length, length), device=devices.device)

        def step(m):
            with devices.autocast():
                m.trunk(idx)[0].float().square().mean().backward()
            m.zero_grad(set_to_none=True)

        seconds = take_turns({n: lambda m=m: step(m) for n, m in models.items()}, a.seconds / 2, devices, warm_up=1)
        for n, m in models.items():
            with devices.autocast():
                kept = kept_for_backward(lambda: m.trunk(idx)) - sum(4 * p.numel() for p in m.blocks.parameters())
            us = 1e6 * seconds[n] / 8192
            if length == 512:
                first[n] = us
            report(name=f"{n}, length {length}", parameters=sum(p.numel() for p in m.blocks.parameters()), us_per_token=us,
                   over_attention=seconds[n] / seconds["attention"], kept_kb_per_token=kept / 8192 / 1e3,
                   **({"over_length_512": us / first[n]} if first.get(n) else {}))

    for dtype in (torch.float32, torch.bfloat16) if devices.bf16 else (torch.float32,):
        torch.manual_seed(0)  # 16 heads of 64 channels: what a block of width 512 scans
        x = torch.randn(4, 1024, 16, 64, device=devices.device, dtype=dtype)
        dt = torch.rand(4, 1024, 16, device=devices.device) / 10
        A = -torch.rand(16, device=devices.device) * 16
        B, C = torch.randn(2, 4, 1024, 1, 64, device=devices.device, dtype=dtype)
        args = [t.requires_grad_() for t in (x, dt, A, B, C)]
        dy = torch.randn_like(x)  # a gradient as training has it: that of a plain sum has stride 0, on which products crawl

        def scan(form):
            with devices.autocast() if dtype == torch.bfloat16 else contextlib.nullcontext():
                y = form(*args, 64)
            torch.autograd.grad(y, args, dy.to(y.dtype))
            return y

        forms = {"split products": lambda: scan(lambda *a: ssd(*a)[0]), "four-operand einsum": lambda: scan(ssd_by_einsum)}
        error = (forms["split products"]().float() - forms["four-operand einsum"]().float()).abs().max().item()
        seconds = take_turns(forms, a.seconds / 2, devices, warm_up=1)
        for n, s in seconds.items():
            report(name=f"scan, {n}, {dtype}", ms=1e3 * s, time_over_split=s / seconds["split products"],
                   largest_difference=error)

    model = models["mamba2"].eval()
    with torch.no_grad():
        caches, token = [Cache() for _ in model.blocks], torch.zeros(1, 1, dtype=torch.int64, device=devices.device)
        model.forward(token.expand(1, 64), caches=caches)
        for until in (256, 1024, 4096):
            start, times = caches[0].length, []
            for _ in range(until - start):
                now = time.perf_counter()
                model.forward(token, caches=caches)
                devices.sync()
                times.append(time.perf_counter() - now)
            report(name=f"mamba2 decodes to {until}", ms_per_token=1e3 * statistics.median(times[-100:]))


def gpt2_matrices(device, layers=12) -> list[torch.nn.Parameter]:
    """The matrices in GPT-2 124M's blocks, each logical one alone, with gradients."""
    shapes = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
    made = [torch.nn.Parameter(torch.randn(s, device=device) * 0.02) for _ in range(layers) for s in shapes]
    for p in made:
        p.grad = torch.randn_like(p)
    return made


def bench_optim(a, devices, report):
    made = {"Muon, quintic": Muon(gpt2_matrices(devices.device)),
            "Muon, polar_express": Muon(gpt2_matrices(devices.device), coefficients="polar_express"),
            "Muon, quintic, normuon": Muon(gpt2_matrices(devices.device), normuon=True),
            "torch.optim.Muon": torch.optim.Muon(gpt2_matrices(devices.device)),
            "AdamW, fused": torch.optim.AdamW(gpt2_matrices(devices.device), fused=True)}
    seconds = take_turns({n: o.step for n, o in made.items()}, a.seconds, devices, warm_up=1)
    for n, o in made.items():
        state = [v for s in o.state_dict()["state"].values() for v in s.values() if v.numel() > 1]
        report(name=n, ms=1e3 * seconds[n], time_over_torch=seconds[n] / seconds["torch.optim.Muon"],
               state_bytes_per_parameter=sum(v.nbytes for v in state) / sum(
                   p.numel() for g in o.param_groups for p in g["params"]))
    del made

    for shape in ((768, 768), (768, 3072)):
        G = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        U, _, Vh = torch.linalg.svd(G, full_matrices=False)
        for coefficients in ("quintic", "polar_express"):
            O = newton_schulz(G.to(devices.device), coefficients).double().cpu()
            s = torch.linalg.svdvals(O)
            report(name=f"{coefficients}, {shape[0]} x {shape[1]}", least=s.min().item(), largest=s.max().item(),
                   relative_error=((O - U @ Vh).norm() / (U @ Vh).norm()).item())

    cuda = devices.device.type == "cuda"
    sizes = {"default": (shape_of(DEFAULT), DEFAULT.micro_batch, ("vector", "scalar")),
             "124M": (ModelConfig(**GPT2), 32 if cuda else 1, ("vector",))}
    for size, (config, rows, kinds) in sizes.items():
        for optimizer in ("muon", "adamw"):
            steps = {str(kind): training_step(config, rows, devices, optimizer, cuda, multipliers=kind)[0]
                     for kind in (None, *kinds)}
            seconds = take_turns(steps, a.seconds, devices, warm_up=1)
            for kind in kinds:  # what they cost a step does not grow with its tokens, what the step costs does
                extra, tokens = seconds[kind] - seconds["None"], rows * config.block_size
                report(name=f"{kind} multipliers, {size}, {optimizer}", tokens=tokens, ms_without=1e3 * seconds["None"],
                       extra_ms=1e3 * extra, extra_share=extra / seconds["None"],
                       extra_share_at_32k_tokens=extra / (seconds["None"] * 32768 / tokens))
            del steps

    for ranks in (1, 2, 4):
        if cuda and ranks > torch.cuda.device_count():
            break
        out = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}",
                              __file__, "--split", "--device", a.device], text=True, capture_output=True, check=True,
                             env={**os.environ, "OMP_NUM_THREADS": "1"}).stdout.split()[-3:]
        report(name=f"Muon's step, {ranks} ranks", ms=float(out[0]), cpu_ms_of_a_rank=float(out[1]),
               state_mb_of_a_rank=float(out[2]))


def split_step(devices):
    """On every rank, a step of Muon on four of GPT-2's twelve blocks: rank 0 prints ms, its CPU ms, its state in MB."""
    muon = Muon(gpt2_matrices(devices.device, layers=4))
    walls, cpus = [], []
    for _ in range(5):
        if devices.world > 1:
            torch.distributed.barrier()
        devices.sync()
        wall, cpu = time.perf_counter(), time.process_time()
        muon.step()
        muon.finish()
        devices.sync()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    if devices.rank == 0:
        print(1e3 * statistics.median(walls[1:]), 1e3 * statistics.median(cpus[1:]),
              sum(v.nbytes for s in muon.state.values() for kept in s.values() for v in kept.values()) / 1e6)


class NanoGPT(torch.nn.Module):
    """The operations of nanoGPT's model, in its order: LayerNorm without bias, GELU, learned positions, one matrix for the
    embedding and the head, all logits at once. For where no checkout of it is at hand."""

    def __init__(self, block_size, vocab_size, n_layer, n_head, n_embd, bias=False, **_):
        super().__init__()
        self.n_head, linear = n_head, partial(torch.nn.Linear, bias=bias)
        self.wte, self.wpe = torch.nn.Embedding(vocab_size, n_embd), torch.nn.Embedding(block_size, n_embd)
        self.blocks = torch.nn.ModuleList(torch.nn.ModuleDict({
            "norm_1": torch.nn.LayerNorm(n_embd, bias=bias), "qkv": linear(n_embd, 3 * n_embd), "proj": linear(n_embd, n_embd),
            "norm_2": torch.nn.LayerNorm(n_embd, bias=bias), "up": linear(n_embd, 4 * n_embd), "down": linear(4 * n_embd, n_embd),
        }) for _ in range(n_layer))
        self.norm, self.head = torch.nn.LayerNorm(n_embd, bias=bias), linear(n_embd, vocab_size)
        for p in self.parameters():
            torch.nn.init.normal_(p, std=0.02) if p.ndim > 1 else None
        self.wte.weight = self.head.weight

    def forward(self, idx, targets):
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        for b in self.blocks:
            q, k, v = (t.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for t in b["qkv"](b["norm_1"](x)).chunk(3, dim=-1))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + b["proj"](y.transpose(1, 2).flatten(2))
            x = x + b["down"](F.gelu(b["up"](b["norm_2"](x))))
        logits = self.head(self.norm(x))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self, weight_decay, lr, betas, device):
        groups = [{"params": [p for p in self.parameters() if p.ndim > 1], "weight_decay": weight_decay},
                  {"params": [p for p in self.parameters() if p.ndim < 2], "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=device == "cuda")


def bench_nanogpt(a, devices, report):
    """nanoGPT's model and optimizer (AdamW, fused where it asks for that) at its small shape against ours: of the checkout
    at --nanogpt, or else written out again, above."""
    make = NanoGPT
    if a.nanogpt:
        spec = importlib.util.spec_from_file_location("nanogpt_model", Path(a.nanogpt) / "model.py")
        nanogpt = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(nanogpt)
        make = lambda **shape: nanogpt.GPT(nanogpt.GPTConfig(**shape))  # noqa: E731

    def theirs(bf16):
        torch.manual_seed(0)
        model = make(block_size=256, vocab_size=4096, n_layer=6, n_head=4, n_embd=256, dropout=0.0, bias=False).to(devices.device)
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), devices.device.type)
        idx, targets = random_batch(ModelConfig(**NANO), 8, devices.device)

        def step():
            with torch.autocast(devices.device.type, torch.bfloat16, enabled=bf16):
                _, loss = model(idx, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.item()

        return step

    plain = t.Devices(devices.device, bf16=False)
    steps = {"nanoGPT, fp32": theirs(False),
             "ours, fp32, AdamW": training_step(ModelConfig(**NANO), 8, plain, "adamw")[0],
             "ours, fp32, Muon": training_step(ModelConfig(**NANO), 8, plain, "muon")[0]}
    if devices.bf16:
        steps |= {"nanoGPT, bf16": theirs(True),
                  "ours, bf16, AdamW": training_step(ModelConfig(**NANO), 8, devices, "adamw")[0],
                  "ours, bf16, Muon": training_step(ModelConfig(**NANO), 8, devices, "muon")[0]}
    seconds = take_turns(steps, 2 * a.seconds, devices)
    for n, s in seconds.items():
        report(name=n, ms_per_step=1e3 * s, tokens_per_second=8 * 256 / s,
               time_over_nanogpt=s / seconds["nanoGPT, bf16" if "bf16" in n else "nanoGPT, fp32"])


def bench_124m(a, devices, report):
    if devices.device.type != "cuda":
        return
    for compile in (True, False):
        for optimizer in ("muon", "adamw"):
            torch.cuda.reset_peak_memory_stats()
            rows = 32
            step, model, flops = training_step(ModelConfig(**GPT2), rows, devices, optimizer, compile=compile)
            seconds = take_turns({"124m": step}, a.seconds, devices, warm_up=10)["124m"]
            peak = devices.peak_flops()
            report(name=f"124M, {optimizer}, {'compiled' if compile else 'eager'}", ms_per_step=1e3 * seconds,
                   tokens_per_second=rows * 1024 / seconds, mfu=flops / seconds / peak if peak else None,
                   peak_memory_mb=devices.peak_memory() / 1e6)
            del step, model
            torch._dynamo.reset()


PARTS = {"gpt": bench_gpt, "let": bench_let, "loss": bench_loss, "eval": bench_eval, "optim": bench_optim,
         "mixers": bench_mixers, "nanogpt": bench_nanogpt, "124m": bench_124m}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seconds", type=float, default=20, help="of measuring, for each comparison")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--nanogpt", help="folder of a checkout of nanoGPT")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    parser.add_argument("--split", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args()
    devices = t.set_up_devices(t.Config(device=a.device))
    if a.memory:
        return print(peak_memory(a.memory, devices))
    if a.split:
        return split_step(devices)

    def report(**row):
        row |= {"device": devices.name(), "torch": str(torch.__version__)}
        if a.json:
            print(json.dumps(row), flush=True)
        else:
            print(f"{row['name']:<24}" + "  ".join(
                f"{k} {v:,.3f}" if isinstance(v, float) and v < 100 else f"{k} {v:,.0f}" if isinstance(v, (int, float))
                else f"{k} {v}" for k, v in row.items() if k not in ("name", "device", "torch")), flush=True)

    if not a.json:
        print(f"{devices.name()}, {torch.get_num_threads()} threads, {'bf16' if devices.bf16 else 'fp32'}, torch "
              f"{torch.__version__}")
    for part in a.parts or PARTS:
        PARTS[part](a, devices, report)


if __name__ == "__main__":
    main()
