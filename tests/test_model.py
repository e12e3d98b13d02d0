"""model.py: the network against other implementations of it, the loss, sampling, checkpoints."""
import copy
import functools
import json
import math
import os
import random
from dataclasses import asdict, replace
from operator import itemgetter

import pytest
import tiktoken
import torch
import torch.nn.functional as F
from conftest import randn, random_tokens, run_python, same, tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import model as lib
from model import GPT, IGNORE, BadInput, Cache, ModelConfig, chunked_loss, generate, next_token_loss
from teacher import to_hf

SSM = dict(mixer="mamba2", d_state=8, ssm_head_dim=16, n_groups=2, chunk_size=8)
HYBRID = {**SSM, "mixer": "hybrid"}
KINDS = {"mamba2": SSM, "hybrid": HYBRID, "pattern": {**SSM, "mixer": "MAH"},
         "experts": dict(n_experts=4, experts_per_token=2),
         "hybrid-experts": {**HYBRID, "n_experts": 3}}


def logits_of(model, idx, caches=None):
    return model.logits(model.forward(idx, caches=caches)[0])


def close(a, b, tolerance):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# The transformer, against the code of others
TWINS = [dict(n_kv_head=2), dict(n_kv_head=1, tie_embeddings=True), dict(mlp="relu2"),
         dict(mlp="gelu"),
         dict(qk_norm=True, n_kv_head=4, rope_base=50.0, norm_eps=1e-2, mlp_hidden=40),
         dict(qk_norm=True, n_experts=4, experts_per_token=2), SSM, {**SSM, "n_groups": 1}]


@pytest.mark.parametrize("kw", TWINS, ids=str)
@torch.no_grad()
def test_logits_and_states_equal_those_of_transformers(kw):
    """Of Llama, Arcee without a gate, Qwen3 with qk_norm, Qwen3-MoE and Mamba-2."""
    transformers = pytest.importorskip("transformers")
    model, idx = tiny_model(**{"mlp": "swiglu", "qk_norm": False, **kw}), random_tokens(2, 27)
    settings, weights = to_hf(model)
    twin = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**settings)).eval()
    twin.load_state_dict(weights)
    x, states = model(idx, hidden=range(4))
    theirs = twin(idx, output_hidden_states=True)
    assert model.logits(x).std() > 0.3, "the comparison would mean little"
    close(model.logits(x), theirs.logits, 1e-4)
    before_norm = states[1:] if "mixer" in kw else states[:-1]  # as transformers gives them
    for ours, state in zip((*before_norm, x), theirs.hidden_states, strict=True):
        close(ours, state, 1e-4)


# The transformer, by its formulas
@pytest.mark.exercise("rope_tables")
@pytest.mark.parametrize("length, D, base", [(1, 2, 10_000.0), (7, 8, 10_000.0), (40, 6, 50.0)])
def test_rope_tables_hold_the_angles_of_every_position_and_pair(length, D, base):
    cos, sin = lib.rope_tables(length, D, base)
    assert cos.shape == sin.shape == (length, 1, D) and cos.dtype == sin.dtype == torch.float32
    for t in range(length):
        for j in range(D // 2):
            angle = t / base ** (2 * j / D)
            found = *cos[t, 0, [j, j + D // 2]].tolist(), *sin[t, 0, [j, j + D // 2]].tolist()
            expected = math.cos(angle), math.cos(angle), -math.sin(angle), math.sin(angle)
            assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.exercise("rotate")
def test_a_rotation_is_a_product_of_complex_numbers():
    """Pair j of position t is a + ib, multiplied by exp(i angle)."""
    x, angle = randn(2, 5, 3, 8), 3 * randn(5, 1, 4, seed=1)
    cos = torch.cat((angle.cos(), angle.cos()), -1)
    sin = torch.cat((-angle.sin(), angle.sin()), -1)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones(5, 1, 4), angle)
    expected = torch.cat((turned.real, turned.imag), -1)
    close(lib.rotate(x, cos, sin), expected, 1e-5)
    low = lib.rotate(x.bfloat16(), cos, sin)
    assert low.dtype == torch.bfloat16
    close(low.float(), expected, 0.05)


def positioned(x, factor, shift):
    """Stands in for a rotation: x (B, T, heads, D) changed by tables (T, 1, D) of the positions."""
    return x * factor.square() + shift


@pytest.mark.exercise("Attention.forward")
@pytest.mark.parametrize("kw", [dict(n_kv_head=2), dict(n_kv_head=1, qk_norm=True),
                                dict(n_kv_head=4, head_ratio=4.0, head_dim=6)], ids=str)
@torch.no_grad()
def test_attention_is_its_formula_also_behind_a_cache(kw, monkeypatch):
    monkeypatch.setattr(lib, "rotate", positioned)
    torch.manual_seed(0)
    attention, x = lib.Attention(ModelConfig(97, n_embd=32, n_head=4, **kw)), torch.randn(2, 9, 32)
    for p in attention.parameters():
        p.normal_(std=0.4) if p.ndim == 2 else p.fill_(1.0)
    cos, sin = torch.rand(2, 9, 1, attention.head_dim) + 0.5
    q, k, v = (part.unflatten(-1, (-1, attention.head_dim)) for part in attention.qkv(x))
    if "qk_norm" in kw:
        q, k = (part / part.square().mean(-1, keepdim=True).add(1e-6).sqrt() for part in (q, k))
    q, k = positioned(q, cos, sin), positioned(k, cos, sin)
    k, v = (part.repeat_interleave(4 // attention.n_kv_head, 2) for part in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) * attention.scale
    weights = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf).softmax(-1)
    expected = torch.einsum("bhts,bshd->bthd", weights, v).flatten(2) @ attention.o.weight.T
    close(attention(x, cos, sin), expected, 1e-5)
    for cuts in ((9,), (1, 5, 1, 2), (2, 7)):
        cache, parts = Cache(), zip(x.split(cuts, 1), cos.split(cuts), sin.split(cuts))
        found = [attention(*part, cache) for part in parts]
        close(torch.cat(found, 1), expected, 1e-5)


@pytest.mark.exercise("RMSNormOnCPU.backward")
def test_rms_norm_on_a_cpu_equals_torchs_with_its_first_and_second_derivatives():
    norm = lib.RMSNorm(6, 1e-6).double()
    norm.weight.data = randn(6, dtype=torch.float64).exp()
    x = randn(2, 3, 6, dtype=torch.float64, seed=1).requires_grad_()
    x.data[0, 0] *= 1e-4  # where eps matters
    assert "RMSNormOnCPU" in type(norm(x).grad_fn).__name__
    results = []
    for of in (norm, lambda x: F.rms_norm(x, (6,), norm.weight, 1e-6)):
        x.grad = norm.weight.grad = None
        first = torch.autograd.grad(of(x).sin().sum(), (x, norm.weight), create_graph=True)
        torch.autograd.backward([d.square().sum() for d in first])
        results.append([of(x), *first, x.grad, norm.weight.grad])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_mixer_is_a_name_or_a_letter_a_block():
    assert ModelConfig(64, n_layer=3, mixer="hybrid").kinds() == "HHH"
    model = GPT(ModelConfig(64, n_layer=4, mixer="MALH", ssm_head_dim=16, n_embd=32))
    parts = [(b.attention is not None, b.ssm is not None, b.mlp is not None) for b in model.blocks]
    assert parts == [(False, True, False), (True, False, True), (False,) * 3, (True,) * 3]


def test_a_long_context_and_a_weight_without_a_rule_are_refused_by_name():
    model = tiny_model()
    with pytest.raises(ValueError, match="33.*32"):
        model(random_tokens(1, 33))
    model.blocks[0].extra = torch.nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(ValueError, match="extra"):
        lib.init_weights(model)


def counted_flops(run):
    """FLOPs of the matrix products in run(), with attention by plain products (the full square)."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", ["attention", "tied", *KINDS])
def test_flops_per_token_are_those_that_torch_counts(kind):
    model = tiny_model(**KINDS.get(kind, {}), n_kv_head=4, tie_embeddings=kind == "tied")
    idx, outside = random_tokens(2, 32), 0  # outside: what only one of the two counts
    forward = counted_flops(lambda: logits_of(model, idx))
    both = counted_flops(lambda: model.loss(model(idx)[0], idx).backward())
    for m in model.moes():  # rows that fill up to a multiple of 128
        rows = sum(-int(n) % 128 for n in m.counts)
        outside -= 2 * (m.up[0].numel() + m.down[0].numel()) * rows
    for b in model.blocks:  # elementwise, which torch does not count
        outside += 0 if b.ssm is None else 64 * 2 * b.ssm.conv.weight.numel()
    exact = 0 if outside else 1e-12
    assert forward + outside == pytest.approx(64 * model.flops_per_token(False), rel=exact or 0.01)
    assert both + 3 * outside == pytest.approx(64 * model.flops_per_token(), rel=exact or 0.05)


def test_parameters_are_counted_once_and_of_experts_only_the_active_ones():
    # V_pad = 128, C = 32, D = 8, H_kv D = 16, 128 inside the MLP
    blocks = 3 * (32 * (32 + 16 + 16) + 32 * 32 + 2 * 32 * 128 + 2 * 32)
    assert tiny_model(tie_embeddings=True).num_params() == 128 * 32 + blocks + 32
    active, routers = tiny_model(**KINDS["experts"]).num_params(active=True), 3 * 4 * 32
    assert active == tiny_model().num_params() + routers == 2 * 128 * 32 + blocks + 32 + routers


def test_logical_pieces_share_out_the_rows_of_every_matrix():
    model = tiny_model(**{**KINDS["hybrid-experts"], "mixer": "HML"}, mlp="swiglu")
    pieces, weights = lib.logical_pieces(model), dict(model.named_parameters())
    assert pieces["blocks.0.attention.qkv.weight"] == [("q", 32), ("k", 16), ("v", 16)]
    assert pieces["blocks.2.affine.weight"] == [("affine", 32)]
    assert [piece for piece, _ in pieces["blocks.0.mlp.up"]] == ["gate", "up"] * 3
    assert set(pieces) == {n for n, p in weights.items() if p.ndim > 1 and "conv" not in n}
    for name, rows in pieces.items():
        assert sum(n for _, n in rows) == weights[name].numel() // weights[name].shape[-1]


# Mamba-2
def scan_inputs(T, G, state, seed=0):
    """x, dt, A, B, C and the state before, in fp64; decays from weak to strong."""
    shapes = (2, T, 4, 3), (2, T, 4), (4,), (2, T, G, 5), (2, T, G, 5), (2, 4, 3, 5)
    x, dt, A, B, C, h = (randn(*shape, seed=seed + i, dtype=torch.float64)
                         for i, shape in enumerate(shapes))
    made = x, F.softplus(2 * dt), -(2 * A).exp(), B, C, h * state
    return [t.requires_grad_() for t in made]


def head_by_head(x, dt, A, B, C, h):
    """The recurrence with a loop over tokens and heads: h = exp(dt A) h + dt x B^T, y = h C."""
    H, heads = x.shape[2], x.shape[2] // B.shape[2]
    ys, states = [], list(h.unbind(1))
    for t in range(x.shape[1]):
        for i in range(H):
            decay = torch.exp(dt[:, t, i] * A[i])[:, None, None]
            new = torch.einsum("bp,bn->bpn", dt[:, t, i, None] * x[:, t, i], B[:, t, i // heads])
            states[i] = decay * states[i] + new
            ys.append(torch.einsum("bpn,bn->bp", states[i], C[:, t, i // heads]))
    return torch.stack(ys, 1).view(x.shape), torch.stack(states, 1)


def assert_is_the_definition(form, T, G, state, tolerance):
    """Results and gradients of form(x, dt, A, B, C, state) are those of head_by_head. With x, B and
    C in bf16 y is in bf16 too, and the state in float32 and within the tolerance."""
    weights, results = scan_inputs(T, G, True, seed=7), []
    for one in (form, head_by_head):
        inputs = scan_inputs(T, G, state)
        y, h = one(*inputs[:5], inputs[5] if state or one is head_by_head else None)
        ((y * weights[0]).sum() + (h * weights[5]).sum()).backward()
        results.append((y, h, *(t.grad for t in inputs[:5 + state])))
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 1e-9 * b.norm()
    x, dt, A, B, C, before = (t.detach().float() for t in scan_inputs(T, G, state))
    x, B, C = x.bfloat16(), B.bfloat16(), C.bfloat16()
    y, h = form(x, dt, A, B, C, before if state else None)
    right, end = head_by_head(*(t.double() for t in (x, dt, A, B, C, before)))
    assert (y.dtype, h.dtype) == (torch.bfloat16, torch.float32)
    assert (y - right).norm() < 0.02 * right.norm() and (h - end).norm() < tolerance * end.norm()


SCANS = [(1, 1, True), (3, 2, False), (8, 2, True), (9, 1, False), (47, 2, True), (47, 1, False)]


@pytest.mark.exercise("ssd_recurrence")
@pytest.mark.parametrize("T, G, state", SCANS)
def test_the_recurrence_of_mamba2_is_a_loop_over_tokens_and_heads(T, G, state):
    assert_is_the_definition(lib.ssd_recurrence, T, G, state, 1e-5)


@pytest.mark.exercise("ssd")
@pytest.mark.parametrize("T, G, state", SCANS)
def test_the_scan_in_chunks_is_a_loop_over_tokens_and_heads(T, G, state):
    assert_is_the_definition(lambda *a: lib.ssd(*a[:5], 8, a[5]), T, G, state, 0.02)


@pytest.mark.exercise("ssd")
@torch.no_grad()
def test_the_scan_in_chunks_is_made_of_the_products_that_its_docstring_counts():
    """Of about b T (2 Q N G + 2 Q P H + 4 P N H) FLOPs."""
    flops = counted_flops(lambda: lib.ssd(*scan_inputs(64, 2, False)[:5], 16))
    counted = 2 * 64 * (2 * 16 * 5 * 2 + 2 * 16 * 3 * 4 + 4 * 3 * 5 * 4)
    assert 0.5 * counted < flops < 2 * counted


@torch.no_grad()
def test_weights_in_bf16_leave_the_decays_in_float32():
    """Decays over many steps: in bf16 their logs would be off by halves, the logits by 0.37."""
    model, idx = tiny_model(**{**SSM, "chunk_size": 64, "block_size": 128}), random_tokens(2, 128)
    for block in model.blocks:
        block.ssm.A_log.copy_(torch.linspace(0, math.log(16), len(block.ssm.A_log)))
        block.ssm.dt_bias.fill_(0.5)
    rounded = copy.deepcopy(model).bfloat16()
    model.load_state_dict(rounded.state_dict())  # the same weights, in float32
    right, caches = logits_of(model, idx), [Cache() for _ in model.blocks]
    cached = [logits_of(rounded, part, caches) for part in (idx[:, :-1], idx[:, -1:])]
    for low in (logits_of(rounded, idx), torch.cat(cached, 1)):
        assert (low - right).norm() < 0.1 * right.norm()  # dt itself comes from a product in bf16


# Experts
@pytest.mark.parametrize("E, k", [(4, 2), (5, 1), (3, 3)])
def test_experts_and_their_gradients_are_those_of_a_loop_over_tokens(E, k):
    moe = tiny_model(n_experts=E, experts_per_token=k, mlp="swiglu").blocks[0].mlp.double()
    x, weights = (randn(2, 7, 32, seed=i, dtype=torch.float64) for i in range(2))
    inputs = [x.requires_grad_(), *moe.parameters()]
    got = torch.autograd.grad((moe(x) * weights).sum(), inputs)
    rows, counts = [], [0] * E
    for token in x.flatten(0, 1):
        p = (moe.router.weight @ token).float().softmax(0)
        best, y = sorted(range(E), key=lambda e: -p[e].item())[:k], 0
        for e in best:
            counts[e] += 1
            gate, up = (moe.up[e] @ token).chunk(2)
            y = y + (p[e] / p[best].sum()).double() * (moe.down[e] @ (F.silu(gate) * up))
        rows.append(y)
    expected = torch.autograd.grad((torch.stack(rows).view_as(x) * weights).sum(), inputs)
    for a, b in zip(got, expected, strict=True):
        close(a, b, 1e-4)  # the router is in float32
    assert moe.counts.tolist() == counts


@pytest.mark.exercise("load_balancing_loss")
def test_the_load_balancing_loss_is_1_where_uniform_and_more_where_both_lean_alike():
    p, uniform = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1]]), torch.full((4,), 0.25)
    loss = lib.load_balancing_loss(p, torch.tensor([0.5, 0.5, 0.0, 0.0]))
    assert loss.item() == pytest.approx(4 * (0.5 * 0.4 + 0.5 * 0.4))
    assert lib.load_balancing_loss(uniform.expand(9, 4), uniform).item() == pytest.approx(1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("expert_hidden", [64, 85])  # 85: rows that only the loop can take
def test_grouped_products_on_a_gpu_agree_with_the_loop_in_bf16(expert_hidden, monkeypatch):
    model = tiny_model(**KINDS["experts"], n_embd=64, expert_hidden=expert_hidden).cuda()
    idx = random_tokens(2, 32).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        grouped = logits_of(model, idx).float()
        monkeypatch.setattr(lib, "grouped_products", lib.expert_loop)
        looped = logits_of(model, idx).float()
    assert (grouped - looped).norm() < 0.02 * looped.norm()


# Initialization and muP
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("ratio", [1.0, 8.0], ids=["standard", "mup"])
def test_initial_weights_have_the_published_scales(tied, ratio):
    """muP at 8 times the base's width: the head like the base's, the router 1 / m_N of it."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(
        2000, 32, n_layer=2, n_embd=256, n_head=4, n_experts=4, tie_embeddings=tied,
        **{**HYBRID, "d_state": 32}, width_ratio=ratio, depth_ratio=5.0, head_ratio=ratio))
    small = 0.1 * (256 / ratio) ** -0.5
    expected = {"embed": small if tied else 1.0, "head": small, "router": small / ratio, "o": 0.0,
                "qkv": 1 / 16, "up": 1 / 16, "down": 0.0, "out": 0.0}
    for name, p in model.named_parameters():
        part = name.removesuffix(".weight").split(".")[-1]
        if part == "in_proj":  # its pieces z, x, B, C and dt
            found = [piece.std().item() for piece in p.split((512, 512, 64, 64, 32))]
            BC = 1 / 16 if ratio == 1 else 32 ** -0.5 / 8
            assert found == pytest.approx([1 / 16, 1 / 16, BC, BC, 1 / 16], rel=0.03)
        elif part in expected:
            assert p.std().item() == pytest.approx(expected[part], rel=0.06), name
            assert p.mean().abs() <= 0.1 * p.std(), name
        elif part in ("dt_bias", "A_log"):
            values, most = (p.exp(), 16) if part == "A_log" else (1e3 * F.softplus(p), 100)
            assert 0.999 <= values.min() and values.max() <= 1.001 * most
        elif "conv" in name:
            assert -0.5 <= p.min() and p.max() <= 0.5 and p.std() > 0.2
        else:
            assert part.endswith("norm") or part == "D"
            assert (p == 1).all(), name


@pytest.mark.exercise("param_factor")
def test_the_factors_of_mup_and_completep_are_those_of_the_papers():
    """At 4 times the width and 3 times the depth: 1 / m_N, m_N, 1 / m_L and so on, by hand."""
    c = ModelConfig(97, width_ratio=4.0, depth_ratio=3.0, head_ratio=5.0)
    for kind, init, lr, decay, eps in (
            ("embedding", 1, 1, 1, 1 / 4), ("head", 2, 1, 1, 1 / 4),
            ("hidden", 1, 1 / 4, 4, 1 / 12), ("router", 1 / 2, 1 / 4, 4, 1 / 3),
            ("vector", 1, 1, 1, 1 / 12), ("final", 1, 1, 1, 1 / 4)):
        found = [lib.param_factor(c, kind, what) for what in ("init", "lr", "decay", "eps")]
        assert found == pytest.approx([init, lr, decay, eps]), kind


@pytest.mark.parametrize("kw", [{}, {**HYBRID, "n_experts": 4}, {**SSM, "mixer": "MAL"}], ids=str)
@torch.no_grad()
def test_mup_is_a_standard_model_with_the_scales_in_its_weights(kw):
    """1 / m_L in what writes into the stream, m_D^-1/2 in q, 1 / m_N in the head."""
    model = tiny_model(width_ratio=4.0, depth_ratio=3.0, head_ratio=2.0, **kw).double()
    c, idx, targets = model.config, random_tokens(2, 17), random_tokens(2, 17, seed=2)
    plain = GPT(replace(c, width_ratio=1.0, depth_ratio=1.0, head_ratio=1.0)).double()
    plain.load_state_dict(model.state_dict())
    assert not torch.allclose(logits_of(model, idx), logits_of(plain, idx))
    for name, p in plain.named_parameters():
        if "affine" in name or name.endswith((".o.weight", ".down.weight", ".out.weight", ".down")):
            p /= 3
        elif name.endswith(".qkv.weight"):
            p[:c.n_embd] /= 2 ** 0.5
    plain.head.weight /= 4
    close(logits_of(model, idx), logits_of(plain, idx), 1e-10)
    loss, expected = (m.loss(m(idx)[0], targets) for m in (model, plain))
    torch.testing.assert_close(loss, expected)


# The loss over the vocabulary and its terms
def loss_problem(dtype=torch.float64, padding=31.0, rows=23, vocab=97):
    """(x, weight, targets): rows of tokens and 31 of padding, a third of targets not counted."""
    x, w = (randn(n, 16, seed=n, dtype=torch.float64) for n in (rows, vocab + 31))
    w[vocab:] *= padding
    targets = random_tokens(rows, vocab=vocab)
    targets[::3] = IGNORE
    return x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_(), targets


@pytest.mark.exercise("chunked_loss")
@pytest.mark.parametrize("dtype, autocast, tolerance", [
    (torch.float64, False, 1e-12), (torch.float32, False, 3e-6), (torch.float32, True, 0.02)])
@pytest.mark.parametrize("padding", [0.0, 1e4])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_the_chunked_loss_and_its_gradients_equal_the_plain_form(
        chunk, padding, dtype, autocast, tolerance):
    """Under autocast products are in bf16, off by about 1 %; the softmax is in float32."""
    x, w, targets = loss_problem(dtype, padding)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, named = chunked_loss(next_token_loss, x, w, targets, vocab_size=97, chunk=chunk)
    dx, dw = torch.autograd.grad(3 * loss, (x, w))
    plain = F.cross_entropy(x @ w[:97].T, targets, reduction="sum")
    assert loss.dtype == dx.dtype == dw.dtype == dtype and named == {}
    assert (loss - plain).abs() <= 0.5 * tolerance * plain
    assert autocast == ((loss - plain).abs() > 1e-5 * plain), "bf16 or not"
    for a, b in zip((dx, dw), torch.autograd.grad(3 * plain, (x, w)), strict=True):
        assert (a - b).norm() <= tolerance * b.norm()
    assert (dw[97:] == 0).all() and (dx[targets == IGNORE] == 0).all()


@pytest.mark.exercise("chunked_loss")
@pytest.mark.parametrize("rows, vocab, chunk", [(23, 97, 5), (150, 8_990, 100)])
def test_any_loss_on_logits_runs_in_chunks_with_its_further_values(rows, vocab, chunk):
    """With another tensor per token, and a value to be logged. Few logits are held at once. Where
    no gradient is asked for, no graph is built."""
    seen = []

    def loss_of(logits, weights, targets):
        seen.append((*logits.shape, logits.requires_grad))
        chosen = logits.gather(1, targets.clamp(min=0)[:, None]).sum()
        return (weights[:, None] * logits.sin()).square().sum(), {"chosen": chosen}

    x, w, targets = loss_problem(rows=rows, vocab=vocab)
    weights = torch.rand(rows, dtype=torch.float64)
    loss, named = chunked_loss(loss_of, x, w, weights, targets, vocab_size=vocab, chunk=chunk)
    assert all(n <= chunk and V == vocab for n, V, _ in seen)
    plain, expected = loss_of(x @ w[:vocab].T, weights, targets)
    torch.testing.assert_close((loss, named["chosen"]), (plain, expected["chosen"].detach()))
    with torch.no_grad():
        alone, _ = chunked_loss(loss_of, x, w, weights, targets, vocab_size=vocab, chunk=chunk)
    assert alone == loss and not alone.requires_grad and not seen[-1][2]
    both = [torch.autograd.grad(v, (x, w), retain_graph=True) for v in (loss, plain)]
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b)
    for i, (a, b) in enumerate(((x, w.detach()), (x.detach(), w))):  # one of them is frozen
        loss, _ = chunked_loss(loss_of, a, b, weights, targets, vocab_size=vocab)
        torch.testing.assert_close(torch.autograd.grad(loss, (x, w)[i])[0], both[1][i])


@pytest.mark.parametrize("kw", [{}, KINDS["experts"]], ids=["dense", "experts"])
def test_a_compiled_model_has_the_same_loss_and_gradients(kw, monkeypatch):
    """With the compiler's tracing, and without its code generation, which is slow."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    lib.compiled_loss_of_logits.cache_clear()
    model, idx, results = tiny_model(**kw), random_tokens(2, 20), []
    for compiled in (False, True):
        if compiled:
            model.compile(backend="aot_eager", dynamic=False)
        loss = model.loss(model(idx)[0], idx)
        results.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    assert lib.compiled_loss_of_logits.cache_info().misses == 1, "the loss was not compiled"
    lib.compiled_loss_of_logits.cache_clear()
    for eager, compiled in zip(*results, strict=True):
        close(eager, compiled, 1e-5)


def test_the_loss_of_a_step_is_the_mean_over_its_tokens_however_it_is_cut_into_passes():
    model, idx, targets = tiny_model().double(), random_tokens(2, 20), random_tokens(2, 20, seed=3)
    targets[0, 3:] = IGNORE
    targets[1, 17:] = IGNORE
    plain = F.cross_entropy(logits_of(model, idx).flatten(0, 1), targets.flatten())
    losses = []
    for row in (slice(0, 1), slice(1, 2)):  # 3 and 17 counted targets, 10 on average
        p = lib.Pass(model, idx[row], targets[row], model(idx[row])[0], {}, [10.0], step=4)
        losses.append(lib.total([lib.NextToken(), lib.NextToken(begins=5)], p)[0])
    for loss in (sum(losses) / 2, model.loss(model(idx)[0], targets)):
        torch.testing.assert_close(loss, plain)
        for p in model.parameters():
            a, b = (torch.autograd.grad(v, p, retain_graph=True)[0] for v in (loss, plain))
            torch.testing.assert_close(a, b)


def test_the_routers_term_has_both_losses_and_hands_on_the_load_of_the_whole_step():
    model, inside = tiny_model(**KINDS["experts"]), []
    for m in model.moes():
        m.router.register_forward_hook(lambda module, args, out: inside.append(out.detach()))
        m.load.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    router, counts = lib.Router(model, balance=0.5, z=0.25), torch.zeros(3, 4)
    for seed in (1, 2):
        inside.clear()
        idx = random_tokens(2, 9, seed=seed)
        loss, named = router(lib.Pass(model, idx, idx, model(idx)[0], {}, [18.0], 0))
        balance = sum(4 * (m.load * out.softmax(-1).mean(0)).sum()
                      for m, out in zip(model.moes(), inside, strict=True)).item() / 3
        z = sum(out.exp().sum(-1).log().square().mean() for out in inside).item() / 3
        assert named["balance_loss"].item() == pytest.approx(balance, rel=1e-5)
        assert named["router_z"].item() == pytest.approx(z, rel=1e-5)
        assert loss.item() == pytest.approx(0.5 * balance + 0.25 * z, rel=1e-5)
        for row, out in zip(counts, inside, strict=True):
            row += torch.bincount(out.topk(2).indices.flatten(), minlength=4)
    router.after_step()
    for m, row in zip(model.moes(), counts, strict=True):
        torch.testing.assert_close(m.load, row / 72)
    logged = router.logged(1)
    assert logged["experts_unused"] == (counts == 0).sum()
    assert logged["expert_load"] == [m.load.tolist() for m in model.moes()]


@pytest.mark.parametrize("kind", ["attention", *KINDS])
@torch.no_grad()
def test_log_likelihoods_in_batches_are_those_of_one_sequence_at_a_time(kind):
    model, rng, sequences = tiny_model(**KINDS.get(kind, {})), random.Random(0), []
    for length in (5, 1, 12, 30, 2, 30, 24, 22):
        ids = [rng.randrange(97) for _ in range(length + 1)]
        targets = [i if rng.random() < 0.6 else IGNORE for i in ids[1:]]
        sequences.append((ids[:-1], targets))
    for at_once in (1, 97 * 30, 1 << 25):
        for (ids, targets), (score, n) in zip(
                sequences, lib.log_likelihoods(model, sequences, at_once), strict=True):
            log_p = logits_of(model, torch.tensor([ids]))[0].log_softmax(-1)
            picked = [log_p[t, i].item() for t, i in enumerate(targets) if i != IGNORE]
            assert n == len(picked) and score == pytest.approx(sum(picked), abs=1e-4)


# Sampling
@pytest.mark.parametrize("batch, prompt", [(3, 5), (1, 16), (2, 20)])
@torch.no_grad()
def test_greedy_generation_is_the_likeliest_token_of_whole_forward_passes(batch, prompt):
    """A context of 16 tokens that is full starts anew with its last half."""
    model, idx, start = tiny_model(block_size=16), random_tokens(batch, prompt), max(0, prompt - 16)
    found = [generate(model, idx, 30, temperature=0, use_cache=use) for use in (True, False)]
    for _ in range(30):
        if idx.shape[1] - start > 16:
            start = idx.shape[1] - 8
        last = logits_of(model, idx[:, start:])[:, -1]
        idx = torch.cat((idx, last.argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(found[0], idx) and torch.equal(found[1], idx)


@pytest.mark.parametrize("kind", ["attention", *KINDS])
@torch.no_grad()
def test_reading_with_caches_equals_the_whole_forward_pass(kind):
    """Also past the block size of 32, for which Mamba-2 needs no more memory."""
    model, idx = tiny_model(**KINDS.get(kind, {})).double(), random_tokens(2, 21)
    full, sizes = logits_of(model, idx), set()
    for cuts in ((21,), (5, 16), (1, 7, 1, 12), (20, 1), (12, 1, 1, 1, 6), (20,)):
        caches = [Cache() for _ in model.blocks]
        parts = [logits_of(model, part, caches) for part in idx[:, :sum(cuts)].split(cuts, 1)]
        close(torch.cat(parts, 1), full[:, :sum(cuts)], 1e-6)
        sizes.add(sum(t.numel() for t in vars(caches[0]).values() if torch.is_tensor(t)))
    assert (len(sizes) == 1) == (model.blocks[0].attention is None)
    a, b, c = (generate(model, idx[:, :3], 40, 0.7, 20, 0.9, seed=seed, use_cache=use)
               for seed, use in ((3, True), (3, False), (4, True)))
    assert a.shape == (2, 43) and torch.equal(a, b) and not torch.equal(a, c)


def allowed(logits, temperature, top_k, top_p):
    """{token: probability} of the tokens that may be chosen, one by one in plain Python."""
    ranked = sorted(((math.exp(z / temperature), i) for i, z in enumerate(logits)), reverse=True)
    ranked, kept, mass = ranked[:top_k or None], {}, 0.0
    for p, i in ranked:
        if mass / sum(p for p, _ in ranked) < top_p:
            kept[i] = p
        mass += p
    return {i: p / sum(kept.values()) for i, p in kept.items()}


@pytest.mark.exercise("pick")
@pytest.mark.parametrize("temperature, top_k, top_p", [
    (1.0, 0, 1.0), (0.7, 0, 1.0), (2.0, 0, 1.0), (1.0, 3, 1.0), (1.0, 1, 1.0), (1.0, 99, 1.0),
    (1.0, 0, 0.5), (0.6, 0, 0.9), (1.0, 0, 1e-6), (1.3, 5, 0.6)])
def test_picked_tokens_follow_the_truncated_softmax(temperature, top_k, top_p):
    g = torch.Generator().manual_seed(0)
    rows, n = torch.randn(2, 12, generator=g, dtype=torch.float64), 20_000
    uniform = torch.rand(2 * n, 1, generator=g)
    picked = lib.pick(rows.repeat_interleave(n, 0), temperature, top_k, top_p, uniform)
    assert picked.shape == (2 * n, 1)
    for row, got in zip(rows.tolist(), picked.view(2, n), strict=True):
        counts, expected = got.bincount(minlength=12), allowed(row, temperature, top_k, top_p)
        assert {i for i in range(12) if counts[i]} == set(expected)
        # chi-square with up to 11 degrees of freedom: beyond 45 once in 200,000
        assert sum((counts[i].item() - n * p) ** 2 / (n * p) for i, p in expected.items()) < 45


@pytest.mark.exercise("pick")
def test_a_token_is_picked_by_inversion_and_at_temperature_0_it_is_the_likeliest():
    p = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]])
    for uniform, expected in ((0.0, [0, 0]), (0.05, [0, 0]), (0.15, [1, 0]), (0.45, [2, 1]),
                              (0.75, [3, 2]), (0.95, [3, 3])):
        found = lib.pick(p.log() + 7, 1.0, 0, 1.0, torch.full((2, 1), uniform))
        assert found.tolist() == [[i] for i in expected]
        assert lib.pick(p.log(), 0, 0, 1.0, torch.full((2, 1), uniform)).tolist() == [[3], [0]]
    assert lib.pick(p.log(), 1.0, 1, 1.0, torch.zeros(2, 1)).tolist() == [[3], [0]]
    halves, uniform = torch.zeros(1, 2), torch.tensor([[0.2], [0.9]])
    low, high = (lib.pick(halves, 1.0, 0, 0.5, one[None]).item() for one in uniform)
    assert low == high, "one of two halves makes up 0.5"
    near = torch.tensor([[0.0, 1e-3]])
    found = [lib.pick(near, temperature, 0, 1.0, torch.zeros(1, 1)) for temperature in (9e-4, 1e-3)]
    assert found == [1, 0], "below 0.001 the likeliest is picked"


# Tokenizers, checkpoints and the command line
def small_encoding():
    ranks = {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257, b" the": 258}
    ranks |= {"é".encode(): 259}
    return tiktoken.Encoding("small", pat_str=r" ?\w+|\s+|[^\w\s]+", mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": len(ranks)})


def test_a_tokenizer_survives_json_and_its_id_is_of_what_it_does():
    enc, text = small_encoding(), "the cat, thé\n  \u4e2d\U0001f600 the\x00 <|endoftext|>"
    d = json.loads(json.dumps(lib.tokenizer_to_dict(enc)))
    back = lib.tokenizer_from_dict(d)
    assert back.encode(text, allowed_special="all") == enc.encode(text, allowed_special="all")
    assert (back.name, back.n_vocab, back.eot_token) == ("small", 261, 260)
    assert lib.tokenizer_id(d) == lib.tokenizer_id({**d, "name": "another name"})
    swapped = {**d["ranks"], b"th".hex(): 257, b"the".hex(): 256}
    changes = ({}, {"pattern": r"\w+|\W"}, {"special": {"<|end|>": 260}}, {"ranks": swapped})
    assert len({lib.tokenizer_id({**d, **change}) for change in changes}) == 4
    d["special"][lib.END_OF_TEXT] = 300  # ids between are left out, as in cl100k_base
    gaps = lib.tokenizer_from_dict(lib.tokenizer_to_dict(lib.tokenizer_from_dict(d)))
    assert gaps.decode([280, 300]) == "<|unused_280|><|endoftext|>"


def test_json_lines_are_read_and_a_wrong_one_is_refused_by_its_number(tmp_path):
    """A byte order mark and blank lines count for nothing but the number of a line. Line ends of
    Unicode within strings do not end it, and lone surrogates are read."""
    path = tmp_path / "a.jsonl"
    for end in ("\n", "\r\n"):
        line = '{"a": "b\u2028c \\ud83d"}' + end
        text = f"{line} {end}{end}{line}"
        path.write_text(text, encoding="utf-8-sig", newline="")
        assert lib.read_json_lines(path, itemgetter("a")) == ["b\u2028c \ud83d"] * 2
        for wrong in ("{", "[1]", "{}", "1", "[" * 100_000):
            path.write_text(text + wrong, encoding="utf-8-sig", newline="")
            with pytest.raises(BadInput, match=r"--task=.*a.jsonl\W+line 5\b"):
                lib.read_json_lines(path, itemgetter("a"), "--task=")


SAVED = dict(vocab_size=261, mixer="MA", n_layer=2)


@pytest.fixture
def checkpoint(tmp_path):
    model, enc = tiny_model(**SAVED), small_encoding()
    torch.save({"format": "nanolet-3", "model": model.state_dict(),
                "model_config": asdict(model.config), "tokenizer": lib.tokenizer_to_dict(enc)},
               tmp_path / "ckpt.pt")
    return tmp_path / "ckpt.pt"


class Trap:  # read without care, it writes a file
    def __reduce__(self):
        return open, ("proof", "w")


NOT_CHECKPOINTS = {  # by an expression of the checkpoint c
    **{f"{name}={value}": f"c['model_config'].update({name}={value})" for name, values in {
        "n_embd": (64, 0, 10**9, "'x'"), "n_layer": (1, 10**9), "vocab_size": (0, 10**9),
        "block_size": (-1, 10**12), "mixer": ("'AA'", "'MAX'", 3), "n_head": (5, 0),
        "mlp": ("'gelu_'",), "n_experts": (4,), "odd": (1,), "norm_eps": ("'x'", "math.nan"),
        "depth_ratio": (-1,), "head_ratio": ("math.inf",)}.items() for value in values},
    **{f"without {name}": f"c.pop('{name}')" for name in ("model", "model_config", "tokenizer")},

    "a nan": "c['model']['norm.weight'].fill_(math.nan)",
    "a missing weight": "c['model'].pop('norm.weight')",
    "a strange weight": "c['model'].update(odd=torch.zeros(3))",
    "another shape": "c['model'].update({'norm.weight': torch.ones(33)})",
    "a token twice": "c['tokenizer']['ranks'].update({'00': 5})",
    "a billion blocks": "c['model_config'].update(n_layer=10**9, mixer='attention')",
    "no tokens": "c['tokenizer'].update(ranks={})", "no pattern": "c['tokenizer'].pop('pattern')",
    "a missing byte": "c['tokenizer']['ranks'].pop('41')",
    "a number twice": "c['tokenizer'].update(special={'<|endoftext|>': 5})",
    "no end of text": "c['tokenizer'].update(special={})",
    "a bad pattern": "c['tokenizer'].update(pattern='(')",
    "a large token": "c['tokenizer'].update(special={'<|endoftext|>': 10**6})",
    "no tokenizer.json": "c['tokenizer'].update(json='{')",
    "an older one": "c.update(format='nanolet-1')", "code that is run": "c.update(model=Trap())"}


@pytest.mark.parametrize("change", NOT_CHECKPOINTS.values(), ids=NOT_CHECKPOINTS)
def test_a_checkpoint_whose_parts_do_not_fit_is_refused_by_name(checkpoint, change, refused):
    ckpt = lib.load_checkpoint(checkpoint)
    eval(change, {"c": ckpt, "math": math, "torch": torch, "Trap": Trap})
    torch.save(ckpt, checkpoint)
    assert "ckpt.pt: " in refused(lib.main, checkpoint)


def test_a_checkpoint_gives_the_model_back_and_no_damaged_byte_goes_unseen(checkpoint):
    """In the weights, which torch.load reads without a look at the sums, and anywhere. What still
    loads is the same checkpoint: a file has some bytes of padding."""
    whole, content = lib.load_checkpoint(checkpoint), checkpoint.read_bytes()
    saved, back = tiny_model(**SAVED), lib.model_from_checkpoint(whole)
    assert back.config == saved.config and same(back.state_dict(), saved.state_dict())
    weight, rng = whole["model"]["embed.weight"].numpy().tobytes(), random.Random(0)
    begin = content.index(weight)
    places = [begin + rng.randrange(len(weight)) for _ in range(10)]
    for at in [*places, *(rng.randrange(len(content)) for _ in range(30))]:
        checkpoint.write_bytes(content[:at] + bytes([content[at] ^ 0x41]) + content[at + 1:])
        try:
            assert same(lib.load_checkpoint(checkpoint), whole) and at not in places
        except BadInput:
            pass


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "new" / "file"
    with lib.written_whole(path) as temporary:
        temporary.write_text("first")
    with pytest.raises(OSError, match="no space.*new/file"), lib.written_whole(path) as temporary:
        temporary.write_text("second")
        raise OSError(28, "no space")
    assert path.read_text() == "first" and [*path.parent.iterdir()] == [path]
    with lib.written_whole(tmp_path / "folder") as temporary:
        temporary.mkdir()
    assert (tmp_path / "folder").is_dir()


@pytest.mark.skipif(os.name != "posix", reason="limits as POSIX has them")
@pytest.mark.parametrize("n", [10, 10**6])
def test_a_checkpoint_that_the_disk_does_not_hold_is_an_error_that_names_the_file(n, tmp_path):
    """torch meets the error in the last flush, or before it and then raises another one."""
    import resource
    path, (soft, hard) = tmp_path / "ckpt.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # bytes of a file
    try:
        with pytest.raises(OSError) as error:
            lib.save_checkpoint(path, {"x": torch.zeros(n)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.filename == str(path) and not [*tmp_path.iterdir()]


@pytest.mark.parametrize("error, code, said", [
    ("BadInput('--x=a\\nb: no')", 2, "--x=a b: no"), ("Failed('it broke')", 1, "it broke"),
    ("OSError(28, 'No space left', 'a/file')", 1, "a/file"), ("MemoryError()", 1, "out of memory")])
def test_a_failed_command_ends_with_a_line_and_a_code_and_what_cannot_be_printed_is_a_question_mark(
        error, code, said):
    main = f"    print('a \\u5317\\u4eac \\udcff.')\n    raise {error}"
    p = run_python("-c", f"from model import *\ndef main(_):\n{main}\ncommand(main)",
                   env={"PYTHONIOENCODING": "ascii:strict"})
    assert (p.returncode, p.stdout) == (code, "a ?? ?.\n")
    assert said in p.stderr and len(p.stderr.splitlines()) == 1


def test_a_folder_is_held_by_one_process_and_only_its_holder_removes_dead_files(tmp_path,
                                                                                monkeypatch):
    dead = tmp_path / ".ckpt.pt.1.tmp"
    other = f"import model\nwith model.locked({str(tmp_path)!r}): pass"
    with lib.locked(tmp_path), lib.locked(tmp_path):
        dead.touch()
        p = run_python("-c", f"import model\nmodel.command(lambda _: exec({other!r}))")
        assert p.returncode == 2 and str(tmp_path) in p.stderr and dead.exists()
    assert run_python("-c", other).returncode == 0 and not dead.exists()

    monkeypatch.setattr(lib.fcntl, "flock", lambda *_: os.close(-1))  # fails, as on some disks
    dead.touch()
    with lib.locked(tmp_path):
        assert dead.exists()


def test_the_sampler_refuses_bad_values_by_flag_and_value(refused, wrong_files):
    for name in ("tokens", "temperature", "top_k", "top_p", "seed", "samples"):
        for value in ("x", "", "nan", "-7", "1e999", "99999999999999999999", "1" * 5000):
            if (name, value[:3]) not in (("top_k", "999"), ("temperature", "999")):
                assert f"--{name}" in refused(lib.main, "none.pt", f"--{name}={value}")
    for flag in ("--device=nowhere", "--device=meta", "--device=", "--odd=1"):
        assert flag in refused(lib.main, "none.pt", flag)
    for name in wrong_files:
        assert name in refused(lib.main, name)


def test_the_sampler_continues_the_prompt_and_repeats_itself_by_seed(checkpoint, capsys):
    texts = []
    for seed in (1, 1, 2):
        lib.main([str(checkpoint.parent), "--prompt=def the", "--tokens=20", f"--seed={seed}",
                  "--device=cpu", "--samples=2"])
        texts.append(capsys.readouterr().out)
    assert texts[0].count("def the") == 2 and len(texts[0]) > 200
    assert texts[0] == texts[1] != texts[2]
