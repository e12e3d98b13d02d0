"""model.py's Mamba-2, hybrid blocks and experts: against the recurrence, plain loops and transformers' models."""
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import (GPT, MLP, Cache, CausalConv, Mamba2, ModelConfig, MoE, expert_products, generate, load_balancing_loss, ssd,
                   ssd_step)

torch.set_num_threads(1)
SSM = dict(mixer="mamba2", d_state=8, ssm_head_dim=16, n_groups=2, chunk_size=8)
KINDS = {"mamba2": SSM, "hybrid": {**SSM, "mixer": "hybrid"}, "pattern": {**SSM, "mixer": "attention", "layer_pattern": "MAH"},
         "experts": dict(n_experts=4, experts_per_token=2), "hybrid-experts": {**SSM, "mixer": "hybrid", "n_experts": 3}}


def tokens(*shape, seed=1):
    return torch.randint(97, shape, generator=torch.Generator().manual_seed(seed))


def inputs(T, G, state, b=2, H=4, P=3, N=5, seed=0):
    """x, dt, A, B, C and the state before in fp64; decays from weak to strong."""
    g = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(shape, dtype=torch.float64, generator=g)  # noqa: E731
    made = [make(b, T, H, P), F.softplus(2 * make(b, T, H)), -(2 * make(H)).exp(), make(b, T, G, N), make(b, T, G, N),
            make(b, H, P, N) if state else torch.zeros(b, H, P, N, dtype=torch.float64)]
    return [t.requires_grad_() for t in made]


def recurrence(x, dt, A, B, C, h):
    """h_t = exp(dt A) h + dt x B^T, y = h C: token by token and head by head."""
    b, T, H, P = x.shape
    share = H // B.shape[2]
    ys, states = [], [h[:, i] for i in range(H)]
    for t in range(T):
        row = []
        for i in range(H):
            decay = torch.exp(dt[:, t, i] * A[i])[:, None, None]
            added = (dt[:, t, i, None] * x[:, t, i])[:, :, None] * B[:, t, i // share][:, None, :]
            states[i] = decay * states[i] + added
            row.append((states[i] * C[:, t, i // share][:, None, :]).sum(-1))
        ys.append(torch.stack(row, 1))
    return torch.stack(ys, 1), torch.stack(states, 1)


@pytest.mark.parametrize("state", [False, True], ids=["from 0", "from a state"])
@pytest.mark.parametrize("G", [1, 2])
@pytest.mark.parametrize("T", [1, 3, 7, 8, 9, 47])
def test_scan_in_chunks_is_the_recurrence(T, G, state):
    ours, naive = inputs(T, G, state), inputs(T, G, state)
    y, h = ssd(*ours[:5], 8, ours[5] if state else None)
    y_naive, h_naive = recurrence(*naive)
    for a, b in ((y, y_naive), (h, h_naive)):
        assert (a - b).norm() <= 1e-10 * b.norm()
    weights = inputs(T, G, True, seed=7)
    for out, state_out in ((y, h), (y_naive, h_naive)):
        ((out * weights[0]).sum() + (state_out * weights[5]).sum()).backward()
    for a, b in list(zip(ours, naive))[:6 if state else 5]:
        assert (a.grad - b.grad).norm() <= 1e-9 * b.grad.norm()


def test_neither_chunk_size_nor_padding_on_the_left_changes_the_scan():
    with torch.no_grad():
        args = inputs(20, 2, False)[:5]
        y, h = ssd(*args, 20)
        for chunk in (1, 3, 8, 64):
            for a, b in zip(ssd(*args, chunk), (y, h)):
                torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
        padded = [F.pad(t, (0, 0) * (t.ndim - 2) + (5, 0)) if t.ndim > 1 else t for t in args]
        y_padded, h_padded = ssd(*padded, 8)
        torch.testing.assert_close(y_padded[:, 5:], y, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(h_padded, h, rtol=1e-11, atol=1e-11)


def test_one_step_is_the_recurrence():
    x, dt, A, B, C, h = inputs(1, 2, True)
    y, new = ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], h)
    y_naive, h_naive = recurrence(x, dt, A, B, C, h)
    torch.testing.assert_close(y, y_naive[:, 0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(new, h_naive, rtol=1e-12, atol=1e-12)


def test_convolution_is_that_of_torch_and_goes_on_from_its_past():
    conv = CausalConv(6, 4).double()
    with torch.no_grad():
        conv.weight.normal_(), conv.bias.normal_()
        x = torch.randn(2, 9, 6, dtype=torch.float64)
        y, past = conv(x)
        expected = F.conv1d(x.mT, conv.weight, conv.bias, padding=3, groups=6)[..., :9].mT
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(past, x[:, -3:])
        first, past = conv(x[:, :2])
        second, _ = conv(x[:, 2:], past)
        torch.testing.assert_close(torch.cat((first, second), 1), y, rtol=1e-12, atol=1e-12)


def test_decays_are_formed_in_float32_under_autocast():
    block = Mamba2(ModelConfig(97, 32, 1, 32, 4, 4, **SSM))
    with torch.no_grad():
        for p in block.parameters():
            p.normal_(std=0.3)
        seen = []
        original, module = ssd, __import__("model")
        module.ssd = lambda x, dt, A, *rest: seen.append((x.dtype, dt.dtype, A.dtype)) or original(x, dt, A, *rest)
        try:
            u = torch.randn(1, 20, 32)
            with torch.autocast("cpu", torch.bfloat16):
                low = block(u)
        finally:
            module.ssd = original
        assert seen == [(torch.bfloat16, torch.float32, torch.float32)]
        exact = block(u)
    assert (low - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_step_by_step_is_the_full_forward(kind):
    model, idx = tiny_model(**KINDS[kind]), tokens(2, 21)
    with torch.no_grad():
        full = model(idx)[0]
        for first in (1, 5, 12):
            caches = [Cache() for _ in model.blocks]
            parts = [model(idx[:, :first], caches=caches)[0]]
            parts += [model(idx[:, t:t + 1], caches=caches)[0] for t in range(first, 18)]
            parts.append(model(idx[:, 18:], caches=caches)[0])  # several tokens after a past
            torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-4, atol=1e-4)
    a, b = (generate(model, idx[:, :3], 20, seed=3, use_cache=use) for use in (True, False))
    assert torch.equal(a, b)


def test_mamba_decodes_past_the_block_size_in_constant_memory():
    model, idx = tiny_model(**SSM, n_layer=2), tokens(1, 5)
    out = generate(model, idx, 60, seed=1)  # block_size is 32
    assert torch.equal(out, generate(model, idx, 60, seed=1, use_cache=False))
    caches = [Cache() for _ in model.blocks]
    sizes = set()
    for t in range(40):
        model(out[:, t:t + 1], caches=caches)
        sizes.add(sum(v.numel() for c in caches for v in vars(c).values() if isinstance(v, torch.Tensor)))
    assert len(sizes) == 1


# Others' code


def hf(name, config, weights):
    """A transformers model of this config with these weights, all of which it must take."""
    transformers = pytest.importorskip("transformers")
    twin = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**config)).eval()
    missing, unexpected = twin.load_state_dict(weights, strict=False)
    assert not unexpected and not [k for k in missing if "rotary" not in k], (missing, unexpected)
    return twin


def ssm_weights(prefix, m):
    return {f"{prefix}in_proj.weight": m.in_proj.weight, f"{prefix}conv1d.weight": m.conv.weight,
            f"{prefix}conv1d.bias": m.conv.bias, f"{prefix}A_log": m.A_log, f"{prefix}D": m.D,
            f"{prefix}dt_bias": m.dt_bias, f"{prefix}out_proj.weight": m.out.weight,
            **({f"{prefix}norm.weight": m.norm.weight} if m.norm is not None else {})}


def attention_weights(prefix, m):
    q, k, v = m.qkv.weight.split(tuple(m.qkv.pieces.values()))
    return {f"{prefix}q_proj.weight": q, f"{prefix}k_proj.weight": k, f"{prefix}v_proj.weight": v,
            f"{prefix}o_proj.weight": m.o.weight}


def agree(model, twin):
    idx = tokens(2, 27)
    with torch.no_grad():
        torch.testing.assert_close(model(idx)[0], twin(idx).logits[..., :97], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2])
def test_logits_are_those_of_mamba2(groups):
    model = tiny_model(**{**SSM, "n_groups": groups})
    weights = {"backbone.embeddings.weight": model.embed.weight[:97], "backbone.norm_f.weight": model.norm.weight,
               "lm_head.weight": model.head.weight[:97]}
    for i, b in enumerate(model.blocks):
        weights |= {f"backbone.layers.{i}.norm.weight": b.mixer_norm.weight, **ssm_weights(f"backbone.layers.{i}.mixer.", b.ssm)}
    agree(model, hf("Mamba2", dict(
        vocab_size=97, hidden_size=32, num_hidden_layers=3, num_heads=4, head_dim=16, state_size=8, n_groups=groups, expand=2,
        conv_kernel=4, use_conv_bias=True, use_bias=False, chunk_size=8, tie_word_embeddings=False, residual_in_fp32=False,
        layer_norm_epsilon=1e-6), weights))


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
def test_logits_are_those_of_falcon_h1_with_its_multipliers_at_1(norm):
    model = tiny_model(**KINDS["hybrid"], qk_norm=False, ssm_norm=norm)
    weights = {"model.embed_tokens.weight": model.embed.weight[:97], "model.final_layernorm.weight": model.norm.weight,
               "lm_head.weight": model.head.weight[:97]}
    for i, b in enumerate(model.blocks):
        p = f"model.layers.{i}."
        gate, up = b.mlp.up.weight.chunk(2)
        weights |= {f"{p}input_layernorm.weight": b.mixer_norm.weight, f"{p}pre_ff_layernorm.weight": b.mlp_norm.weight,
                    f"{p}feed_forward.gate_proj.weight": gate, f"{p}feed_forward.up_proj.weight": up,
                    f"{p}feed_forward.down_proj.weight": b.mlp.down.weight, **ssm_weights(f"{p}mamba.", b.ssm),
                    **attention_weights(f"{p}self_attn.", b.mixer)}
    ones = {f"{name}_multiplier": 1.0 for name in ("attention_in", "attention_out", "embedding", "key", "lm_head", "ssm_in",
                                                  "ssm_out")}
    agree(model, hf("FalconH1", dict(
        vocab_size=97, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=model.config.mlp_hidden, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8,
        mamba_n_groups=2, mamba_d_conv=4, mamba_chunk_size=8, mamba_rms_norm=norm, mamba_norm_before_gate=False,
        mamba_conv_bias=True, mamba_proj_bias=False, projectors_bias=False, attention_bias=False, mlp_bias=False,
        rms_norm_eps=1e-6, tie_word_embeddings=False, max_position_embeddings=32, mlp_multipliers=[1.0, 1.0],
        ssm_multipliers=[1.0] * 5, rope_theta=10_000.0, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        **ones), weights))


def test_logits_are_those_of_qwen3_moe():
    model = tiny_model(**KINDS["experts"])
    c = model.config
    weights = {"model.embed_tokens.weight": model.embed.weight[:97], "model.norm.weight": model.norm.weight,
               "lm_head.weight": model.head.weight[:97]}
    for i, b in enumerate(model.blocks):
        p = f"model.layers.{i}."
        weights |= {f"{p}input_layernorm.weight": b.mixer_norm.weight, f"{p}post_attention_layernorm.weight": b.mlp_norm.weight,
                    f"{p}mlp.gate.weight": b.mlp.router.weight, f"{p}mlp.experts.gate_up_proj": b.mlp.up,
                    f"{p}mlp.experts.down_proj": b.mlp.down, **attention_weights(f"{p}self_attn.", b.mixer),
                    f"{p}self_attn.q_norm.weight": b.mixer.q_norm.weight,
                    f"{p}self_attn.k_norm.weight": b.mixer.k_norm.weight}
    agree(model, hf("Qwen3Moe", dict(
        vocab_size=97, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=64, moe_intermediate_size=c.expert_hidden, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True,
        decoder_sparse_step=1, mlp_only_layers=[], rms_norm_eps=1e-6, tie_word_embeddings=False, max_position_embeddings=32,
        attention_bias=False, rope_theta=10_000.0, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0}), weights))


# Experts


def experts(E=4, k=2, seed=0, **kw):
    torch.manual_seed(seed)
    moe = MoE(ModelConfig(97, 32, 1, 16, 2, 2, n_experts=E, experts_per_token=k, expert_hidden=24, **kw)).double()
    with torch.no_grad():
        for p in moe.parameters():
            p.normal_(std=0.4)
    return moe


@pytest.mark.parametrize("mlp", ["swiglu", "relu2", "gelu"])
def test_all_experts_equal_and_chosen_are_the_dense_mlp(mlp):
    moe = experts(E=3, k=3, mlp=mlp)
    dense = MLP(ModelConfig(97, 32, 1, 16, 2, 2, mlp_hidden=24, mlp=mlp)).double()
    with torch.no_grad():
        for name in ("up", "down"):
            getattr(moe, name)[:] = getattr(dense, name).weight
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    torch.testing.assert_close(moe(x), dense(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("E, k", [(4, 2), (5, 1), (3, 3)])
def test_experts_and_their_gradients_are_those_of_a_loop_over_tokens(E, k):
    moe, x = experts(E, k), torch.randn(2, 7, 16, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 7, 16, dtype=torch.float64)
    (moe(x) * weights).sum().backward()
    got = [x.grad.clone(), *(p.grad.clone() for p in moe.parameters())]
    x.grad = None
    moe.zero_grad()
    rows, counts = [], [0] * E
    for token in x.flatten(0, 1):
        p = (moe.router.weight @ token).float().softmax(0)
        best = sorted(range(E), key=lambda e: -p[e].item())[:k]
        y = 0
        for e in best:
            counts[e] += 1
            gate, up = (moe.up[e] @ token).chunk(2)
            y = y + (p[e] / p[best].sum()).double() * (moe.down[e] @ (F.silu(gate) * up))
        rows.append(y)
    (torch.stack(rows).view_as(x) * weights).sum().backward()
    for a, b in zip(got, [x.grad, *(p.grad for p in moe.parameters())]):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert moe.counts.tolist() == counts


def test_experts_without_a_token_have_zero_gradients_and_not_none():
    moe = experts(E=4, k=1)
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[2, 0] = 50.0
    x = torch.rand(1, 6, 16, dtype=torch.float64) + 0.1
    moe(x).sum().backward()
    assert moe.counts.tolist() == [0, 0, 6, 0]
    assert not moe.up.grad[[0, 1, 3]].any() and moe.up.grad[2].any()


def test_load_balancing_loss_has_its_closed_form_and_is_least_where_uniform():
    uniform = torch.full((4,), 0.25)
    p = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1]])
    load = torch.tensor([0.5, 0.5, 0.0, 0.0])
    assert load_balancing_loss(p, load).item() == pytest.approx(4 * (0.5 * 0.4 + 0.5 * 0.4))
    assert load_balancing_loss(uniform.expand(9, 4), uniform).item() == pytest.approx(1.0)
    for seed in range(20):  # the load follows the probabilities: E sum p^2, which is least at 1/E
        q = torch.rand(4, generator=torch.Generator().manual_seed(seed)).softmax(0)
        assert load_balancing_loss(q.expand(9, 4), q) > 1.0


@torch.no_grad()
@pytest.mark.parametrize("cached", [False, True])
def test_weights_in_bf16_leave_the_decays_in_float32(cached):
    """Decays of many steps: in bf16 their logs would be off by halves, and the logits by 0.37."""
    model = tiny_model(**{**SSM, "chunk_size": 64}, block_size=128)
    for block in model.blocks:
        block.ssm.A_log.copy_(torch.linspace(0, math.log(16), len(block.ssm.A_log)))
        block.ssm.dt_bias.fill_(0.5)
    rounded = tiny_model(**{**SSM, "chunk_size": 64}, block_size=128).bfloat16()
    rounded.load_state_dict(model.state_dict())
    model.load_state_dict(rounded.state_dict())  # the same weights, in float32
    idx = tokens(2, 128)
    right, caches = model(idx)[0], [Cache() for _ in model.blocks] if cached else None
    ours = torch.cat([rounded(part, caches=caches)[0] for part in (idx[:, :-1], idx[:, -1:])], 1) if cached else rounded(idx)[0]
    assert (ours.float() - right).norm() < 0.1 * right.norm()  # dt itself comes out of a product in bf16


def test_router_losses_are_those_of_the_logits():
    model = tiny_model(**KINDS["experts"])
    inside = []
    for m in model.moes():
        m.router.register_forward_hook(lambda module, args, out: inside.append(out.detach()))
        m.load.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    model(tokens(2, 9))
    balance, z = model.router_losses()
    expected = [(4 * (torch.tensor([0.1, 0.2, 0.3, 0.4]) * out.softmax(-1).mean(0)).sum(),
                 out.exp().sum(-1).log().square().mean()) for out in inside]
    assert balance.item() == pytest.approx(sum(e[0] for e in expected).item() / 3, rel=1e-5)
    assert z.item() == pytest.approx(sum(e[1] for e in expected).item() / 3, rel=1e-5)


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm")
def test_loop_and_grouped_products_agree():
    counts = torch.tensor([16, 0, 8, 40])
    x, w = torch.randn(64, 32, requires_grad=True), torch.randn(4, 48, 32, requires_grad=True)
    try:
        F.grouped_mm(torch.zeros(8, 8), torch.zeros(1, 8, 8), offs=torch.tensor([8], dtype=torch.int32))
    except (RuntimeError, NotImplementedError):
        pytest.skip("grouped_mm does not run on this device")
    a, b = (expert_products(x, w, counts, grouped) for grouped in (False, True))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    ga, gb = (torch.autograd.grad(y.sin().sum(), (x, w)) for y in (a, b))
    for one, other in zip(ga, gb):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("expert_hidden", [64, 85])  # 85: rows of no multiple of 16 bytes, which only the loop takes
def test_grouped_products_on_a_gpu_agree_with_the_loop_in_bf16(expert_hidden):
    model, idx = tiny_model(**KINDS["experts"], n_embd=64, expert_hidden=expert_hidden).cuda(), tokens(2, 32).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        grouped = model(idx)[0].float()
        module = __import__("model")
        original = module.expert_products
        module.expert_products = lambda x, w, counts, _: original(x, w, counts, False)
        try:
            looped = model(idx)[0].float()
        finally:
            module.expert_products = original
    assert (grouped - looped).norm() < 0.02 * looped.norm()


# Fresh models


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_model_knows_nothing_and_starts_in_the_published_ranges(kind):
    torch.manual_seed(0)
    model = GPT(ModelConfig(**{**dict(vocab_size=1000, block_size=32, n_layer=3, n_embd=64, n_head=4, n_kv_head=2),
                               **KINDS[kind]}))
    idx = torch.randint(1000, (4, 33), generator=torch.Generator().manual_seed(0))
    loss, _ = model(idx[:, :-1], idx[:, 1:])
    assert abs(loss.item() / math.log(1000) - 1) < 0.01
    for name, p in model.named_parameters():
        if name.endswith("dt_bias"):
            assert 1e-3 <= F.softplus(p).min() and F.softplus(p).max() <= 0.1 + 1e-6
        elif name.endswith("A_log"):
            assert 1.0 <= p.exp().min() and p.exp().max() <= 16.0 + 1e-5
        elif name.endswith(".D"):
            assert (p == 1).all()
        elif name.endswith((".out.weight", ".mlp.down")):
            assert not p.any()
        elif name.endswith((".in_proj.weight", ".mlp.up")):
            assert p.std().item() == pytest.approx(p.shape[-1] ** -0.5, rel=0.05)
        elif name.endswith((".conv.weight", ".conv.bias")):
            assert -0.5 <= p.min() and p.max() <= 0.5 and p.std() > 0.2


def test_flops_of_every_kind_against_torchs_counter():
    """Its counter sees every matrix product, also the scan's; of attention the math form, which is the full square."""
    for kind in ("mamba2", "experts", "pattern"):
        model = tiny_model(**KINDS[kind], n_kv_head=4)
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            model(tokens(2, 32))
        conv = sum(2 * b.ssm.conv.weight.numel() for b in model.blocks if b.ssm is not None)  # elementwise: not in the counter
        filling = sum(2 * (m.up[0].numel() + m.down[0].numel()) * (-int(n) % 128) for m in model.moes() for n in m.counts)
        assert counter.get_total_flops() - filling == pytest.approx(64 * (model.flops_per_token(backward=False) - conv), rel=0.01)


def test_active_parameters_are_those_of_k_experts():
    model = tiny_model(**KINDS["experts"])
    idle = sum(m.up[:2].numel() + m.down[:2].numel() for m in model.moes())
    assert model.num_params() - model.num_params(active=True) == idle
    dense = tiny_model()
    assert model.config.expert_hidden * 2 == dense.config.mlp_hidden
    routers = sum(m.router.weight.numel() for m in model.moes())
    assert model.num_params(active=True) == dense.num_params() + routers
