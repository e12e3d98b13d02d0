"""model.py: the network against other implementations of it, the loss, sampling, tokenizers and checkpoints."""
import json
import math
import pickle
import random

import pytest
import tiktoken
import torch
import torch.nn.functional as F
from conftest import run_python, tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train as train_module
from model import (GPT, MLP, BadInput, Cache, ModelConfig, RMSNorm, generate, linear_cross_entropy, load_checkpoint,
                   model_from_checkpoint, pick, tokenizer_from_dict, tokenizer_id, tokenizer_to_dict)

torch.set_num_threads(1)


def random_tokens(*shape, vocab=97, seed=1):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------------------------------------
# The network


def test_rms_norm_on_a_cpu_is_that_of_torch_with_its_first_and_second_derivatives():
    g = torch.Generator().manual_seed(0)
    norm = RMSNorm(6, 1e-6).double()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5, generator=g)
    x = torch.randn(2, 3, 6, dtype=torch.float64, generator=g, requires_grad=True)
    x.data[0, 0] *= 1e-4  # where eps matters
    torch.testing.assert_close(norm(x), F.rms_norm(x, (6,), norm.weight, 1e-6), rtol=1e-12, atol=0)
    assert "RMSNormOnCPU" in type(norm(x).grad_fn).__name__
    for of in (norm, lambda x: F.rms_norm(x, (6,), norm.weight, 1e-6)):
        x.grad = norm.weight.grad = None
        first = torch.autograd.grad(of(x).sin().sum(), (x, norm.weight), create_graph=True)
        torch.autograd.backward([d.square().sum() for d in first])
        got = [*first, x.grad, norm.weight.grad]
        if of is norm:
            ours = [t.detach().clone() for t in got]
    for a, b in zip(ours, got):
        torch.testing.assert_close(a, b.detach(), rtol=1e-9, atol=1e-12)


def hf_twin(model):
    """The same network in transformers, with the same weights: Qwen3 with qk_norm, Llama without."""
    transformers = pytest.importorskip("transformers")
    c, name = model.config, "Qwen3" if model.config.qk_norm else "Llama"
    config = getattr(transformers, f"{name}Config")(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.mlp_hidden, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, head_dim=c.n_embd // c.n_head,
        max_position_embeddings=c.block_size, rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tie_embeddings,
        rope_theta=c.rope_base, rope_parameters={"rope_type": "default", "rope_theta": c.rope_base})
    V, kv = c.vocab_size, c.n_embd // c.n_head * c.n_kv_head
    weights = {"model.embed_tokens.weight": model.embed.weight[:V], "model.norm.weight": model.norm.weight,
               "lm_head.weight": model.head.weight[:V]}
    for i, b in enumerate(model.blocks):
        q, k, v = b.mixer.qkv.weight.split((c.n_embd, kv, kv))
        gate, up = b.mlp.up.weight.chunk(2)
        layer = {"input_layernorm": b.mixer_norm.weight, "post_attention_layernorm": b.mlp_norm.weight,
                 "self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v,
                 "self_attn.o_proj": b.mixer.o.weight, "mlp.gate_proj": gate, "mlp.up_proj": up,
                 "mlp.down_proj": b.mlp.down.weight}
        if c.qk_norm:
            layer |= {"self_attn.q_norm": b.mixer.q_norm.weight, "self_attn.k_norm": b.mixer.k_norm.weight}
        weights |= {f"model.layers.{i}.{key}.weight": w for key, w in layer.items()}
    twin = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    twin.load_state_dict(weights)
    return twin


@pytest.mark.parametrize("kw", [dict(n_kv_head=2), dict(n_kv_head=4), dict(n_kv_head=1, tie_embeddings=True),
                                dict(n_kv_head=2, rope_base=50.0, norm_eps=1e-2, mlp_hidden=40)], ids=str)
@pytest.mark.parametrize("qk_norm", [False, True], ids=["llama", "qwen3"])
@torch.no_grad()
def test_logits_and_states_equal_those_of_transformers(qk_norm, kw):
    model = tiny_model(qk_norm=qk_norm, **kw)
    idx = random_tokens(2, 32)
    logits, states = model(idx, hidden=range(4))
    theirs = hf_twin(model)(idx, output_hidden_states=True)
    assert logits.std() > 0.3, "the comparison would mean little"
    torch.testing.assert_close(logits, theirs.logits, atol=1e-4, rtol=1e-4)
    assert len(theirs.hidden_states) == 4
    for ours, state in zip(states, theirs.hidden_states[:-1]):
        torch.testing.assert_close(ours, state, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.norm(states[-1]), theirs.hidden_states[-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind, act", [("relu2", lambda z: z.clamp(min=0) ** 2),
                                       ("gelu", lambda z: z / 2 * (1 + torch.erf(z / math.sqrt(2))))])
def test_ungated_mlp_is_its_formula(kind, act):
    c = ModelConfig(vocab_size=64, block_size=8, n_layer=1, n_embd=16, n_head=2, n_kv_head=2, mlp=kind)
    mlp, x = MLP(c), torch.randn(3, 16)
    torch.testing.assert_close(mlp(x), act(x @ mlp.up.weight.T) @ mlp.down.weight.T)


@pytest.mark.parametrize("kind, width, hidden", [("swiglu", 256, 704), ("swiglu", 768, 2048), ("swiglu", 32, 64),
                                                 ("relu2", 256, 1024), ("gelu", 32, 128)])
def test_default_width_of_the_mlp(kind, width, hidden):
    assert ModelConfig(64, 8, 1, width, 2, 2, mlp=kind).mlp_hidden == hidden


@pytest.mark.parametrize("width", [4, 8, 12, 16])
def test_narrow_models_have_an_mlp(width):
    assert ModelConfig(64, 8, 1, width, 2, 2, mlp="swiglu").mlp_hidden > 0


@pytest.mark.parametrize("t", [1, 7, 31])
@torch.no_grad()
def test_a_token_changes_no_logits_before_it(t):
    model, idx = tiny_model(), random_tokens(2, 32)
    changed = idx.clone()
    changed[:, t] = (changed[:, t] + 1) % 97
    before, after = model(idx)[0], model(changed)[0]
    torch.testing.assert_close(before[:, :t], after[:, :t], atol=1e-6, rtol=0)
    assert (before[:, t:] - after[:, t:]).abs().amax(-1).min() > 1e-3, "and every one from it on"


@pytest.mark.parametrize("hidden", [(), (0, 2), (3, 1), (1, 1)])
def test_hidden_gives_the_states_after_the_blocks_asked_for(hidden):
    model, idx, seen = tiny_model(), random_tokens(2, 9), []
    for module in (model.embed, *model.blocks):
        module.register_forward_hook(lambda module, args, out: seen.append(out))
    for targets in (None, idx):
        seen.clear()
        _, states = model(idx, targets, hidden=hidden)
        assert len(seen) == 4 and len(states) == len(hidden)
        for k, state in zip(hidden, states):
            assert torch.equal(state, seen[k]) and state.requires_grad


@torch.no_grad()
def test_grouped_heads_equal_full_attention_with_repeated_keys_and_values():
    grouped, full = tiny_model(n_kv_head=2), tiny_model(n_kv_head=4)
    weights = grouped.state_dict()
    for name in [n for n in weights if n.endswith("qkv.weight")]:
        q, k, v = weights[name].split((32, 16, 16))
        k, v = (w.view(2, 8, 32).repeat_interleave(2, 0).reshape(32, 32) for w in (k, v))
        weights[name] = torch.cat((q, k, v))
    full.load_state_dict(weights)
    idx = random_tokens(2, 20)
    torch.testing.assert_close(grouped(idx)[0], full(idx)[0], atol=1e-5, rtol=1e-5)


def test_more_tokens_than_the_context_are_refused():
    with pytest.raises(ValueError, match="33.*32"):
        tiny_model()(random_tokens(1, 33))


@pytest.mark.parametrize("tied, qk_norm, mlp, expected", [
    # V_pad = 128, C = 32, D = 8, H_kv D = 16; swiglu has width 64 inside, gelu 128
    (False, True, "swiglu", 2 * 128 * 32 + 3 * (32 * (32 + 16 + 16) + 32 * 32 + 3 * 32 * 64 + 2 * 32 + 2 * 8) + 32),
    (True, True, "swiglu", 128 * 32 + 3 * (32 * (32 + 16 + 16) + 32 * 32 + 3 * 32 * 64 + 2 * 32 + 2 * 8) + 32),
    (True, False, "gelu", 128 * 32 + 3 * (32 * (32 + 16 + 16) + 32 * 32 + 2 * 32 * 128 + 2 * 32) + 32)])
def test_num_params(tied, qk_norm, mlp, expected):
    assert tiny_model(tie_embeddings=tied, qk_norm=qk_norm, mlp=mlp).num_params() == expected


def counted_flops(run):
    """FLOPs of the matrix products in run(). Attention by plain products: not every kernel is counted on a CPU."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("kw", [{}, dict(n_kv_head=4, mlp="gelu"), dict(tie_embeddings=True)], ids=str)
def test_flops_per_token_are_those_counted(kw):
    model, idx = tiny_model(**kw), random_tokens(2, 32)
    tokens = idx.numel()
    assert model.flops_per_token(backward=False) * tokens == counted_flops(lambda: model(idx))
    assert model.flops_per_token() * tokens == counted_flops(lambda: model(idx, idx)[0].backward())
    assert model.flops_per_token() * tokens == counted_flops(
        lambda: F.cross_entropy(model(idx)[0].flatten(0, 1), idx.flatten()).backward())
    trunk = counted_flops(lambda: model.trunk(idx, blocks=2))
    assert model.flops_per_token(backward=False, head=False, blocks=2) * tokens == trunk


@torch.no_grad()
def test_a_loss_without_gradients_costs_a_forward_pass_only():
    """Evaluation computes no gradient of the head."""
    model, idx = tiny_model(), random_tokens(2, 32)
    assert counted_flops(lambda: model(idx, idx)) == model.flops_per_token(backward=False) * idx.numel()


# ----------------------------------------------------------------------------------------------------------------------
# Initialisation


@pytest.mark.parametrize("mlp", ["swiglu", "relu2", "gelu"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("width, vocab", [(32, 1001), (128, 1001), (256, 500)])
@torch.no_grad()
def test_a_fresh_model_starts_at_ln_vocab_and_as_the_identity(width, vocab, tied, mlp):
    torch.manual_seed(0)
    model = GPT(ModelConfig(vocab, 32, 2, width, 4, 2, mlp=mlp, tie_embeddings=tied))
    idx, targets = random_tokens(8, 32, vocab=vocab), random_tokens(8, 32, vocab=vocab, seed=2)
    loss, states = model(idx, targets, hidden=(0, 1, 2))
    assert loss.item() == pytest.approx(math.log(vocab), rel=0.01)
    assert states[0].std() > 0
    assert torch.equal(states[1], states[0]) and torch.equal(states[2], states[0])


@pytest.mark.parametrize("tied, embed_std", [(False, 1.0), (True, 0.1 / 16)], ids=["untied", "tied"])
def test_initial_weights_have_the_scales_promised(tied, embed_std):
    torch.manual_seed(0)
    model = GPT(ModelConfig(2000, 32, 2, 256, 4, 2, mlp="relu2", tie_embeddings=tied))
    expected = {"embed": embed_std, "head": 0.1 / 16, "qkv": 1 / 16, "up": 1 / 16, "o": 0.0, "down": 0.0}
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert (p == 1).all(), name
        else:
            assert p.std().item() == pytest.approx(expected[name.split(".")[-2]], rel=0.03), name
            assert p.mean().abs() <= 0.02 * p.std(), name


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 4), ()])
def test_a_parameter_without_an_initialisation_rule_is_refused(shape):
    model = tiny_model()
    model.blocks[0].extra = torch.nn.Parameter(torch.zeros(shape))
    with pytest.raises(ValueError, match="blocks.0.extra"):
        model.init_weights()


# ----------------------------------------------------------------------------------------------------------------------
# The loss


def loss_problem(dtype=torch.float64, seed=0, padding=31.0):
    """(x, weight, targets): 23 tokens of width 16, 97 token rows and 31 rows of padding, a third of the targets out."""
    g = torch.Generator().manual_seed(seed)
    x, w = torch.randn(23, 16, generator=g, dtype=torch.float64), torch.randn(128, 16, generator=g, dtype=torch.float64)
    w[97:] *= padding
    targets = torch.randint(97, (23,), generator=g)
    targets[::3] = -100
    return x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_(), targets


@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("padding", [0.0, 1e4])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_linear_cross_entropy_and_its_gradients_equal_the_plain_form(chunk, padding, dtype, tol):
    x, w, targets = loss_problem(dtype, padding=padding)
    loss = linear_cross_entropy(x, w, targets, 97, chunk)
    dx, dw = torch.autograd.grad(3 * loss, (x, w))
    plain = F.cross_entropy(x @ w[:97].T, targets)
    plain_dx, plain_dw = torch.autograd.grad(3 * plain, (x, w))
    assert loss.dtype == dx.dtype == dw.dtype == dtype
    torch.testing.assert_close(loss, plain, atol=tol, rtol=tol)
    torch.testing.assert_close(dx, plain_dx, atol=tol, rtol=10 * tol)
    torch.testing.assert_close(dw, plain_dw, atol=tol, rtol=10 * tol)
    assert (dw[97:] == 0).all() and (dx[targets == -100] == 0).all()


def test_linear_cross_entropy_equals_the_one_of_torch():
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("this torch has none")
    x, w, targets = loss_problem()
    ours, theirs = linear_cross_entropy(x, w, targets, 97, 7), F.linear_cross_entropy(x, w[:97], targets)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, (x, w)), torch.autograd.grad(theirs, (x, w))):
        torch.testing.assert_close(a, b)


def test_without_counted_targets_loss_and_gradients_are_0():
    x, w, targets = loss_problem()
    loss = linear_cross_entropy(x, w, torch.full_like(targets, -100), 97, 7)
    assert loss == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, (x, w)))


def test_linear_cross_entropy_in_bf16_stays_near_fp32():
    """bf16 has 8 bits: products are off by about 1 %, the loss by less. The softmax is not in bf16 and adds nothing."""
    x, w, targets = loss_problem(torch.float32)
    plain = F.cross_entropy(x @ w[:97].T, targets)
    rounded = F.cross_entropy((x.bfloat16() @ w[:97].bfloat16().T).float(), targets)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(x, w, targets, 97, 7)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(plain.item(), rel=0.01)
    assert loss.item() == pytest.approx(rounded.item(), rel=1e-4)
    assert loss != plain, "nothing ran in bf16"
    for low, exact in zip(torch.autograd.grad(loss, (x, w)), torch.autograd.grad(plain, (x, w))):
        assert low.dtype == torch.float32
        assert (low - exact).norm() < 0.02 * exact.norm()


def test_loss_of_the_model_is_the_plain_cross_entropy_of_its_logits():
    model, idx, targets = tiny_model().double(), random_tokens(2, 20), random_tokens(2, 20, seed=3)
    targets[0, :5] = -100
    plain = F.cross_entropy(model(idx)[0].flatten(0, 1), targets.flatten())
    loss = model(idx, targets)[0]
    torch.testing.assert_close(loss, plain)
    params = list(model.parameters())
    for a, b in zip(torch.autograd.grad(loss, params), torch.autograd.grad(plain, params)):
        torch.testing.assert_close(a, b)


@pytest.mark.gpu
def test_compiled_and_eager_agree_on_a_gpu_in_bf16():
    """Loosely: the compiler fuses, so intermediate results are rounded to bf16 at other places."""
    model, idx = tiny_model(vocab_size=1000, n_embd=256).cuda(), random_tokens(4, 32, vocab=1000).cuda()
    results = []
    for compiled in (False, True):
        if compiled:
            model.compile(dynamic=False)
        with torch.autocast("cuda", torch.bfloat16):
            loss, states = model(idx, idx, hidden=(2,))
        results.append((loss, states[0], *torch.autograd.grad(loss, list(model.parameters()))))
    for eager, compiled in zip(*results):
        assert (eager - compiled).norm() <= 0.05 * eager.norm()


# ----------------------------------------------------------------------------------------------------------------------
# Sampling


def plainly_generated(model, idx, n, choose):
    """Token by token, each from a forward pass over the context: all so far, or after it was full the last half."""
    size, start = model.config.block_size, max(0, idx.shape[1] - model.config.block_size)
    for _ in range(n):
        if idx.shape[1] - start > size:
            start = idx.shape[1] - size // 2
        idx = torch.cat((idx, choose(model(idx[:, start:])[0][:, -1])), dim=1)
    return idx


@pytest.mark.parametrize("prompt", [1, 5, 16, 20])
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_greedy_generation_equals_whole_forward_passes(batch, prompt):
    model, idx = tiny_model(block_size=16), random_tokens(batch, prompt)
    expected = plainly_generated(model, idx, 30, lambda logits: logits.argmax(-1, keepdim=True))
    assert torch.equal(generate(model, idx, 30, temperature=0), expected)
    assert torch.equal(generate(model, idx, 30, temperature=0, use_cache=False), expected)


@pytest.mark.parametrize("kw", [{}, dict(temperature=0.7, top_k=20), dict(top_p=0.8)], ids=str)
@torch.no_grad()
def test_sampling_with_a_seed_is_the_same_with_and_without_the_cache(kw):
    model, idx = tiny_model(block_size=16), random_tokens(3, 5)
    cached = generate(model, idx, 30, seed=5, **kw)
    assert cached.shape == (3, 35) and torch.equal(cached[:, :5], idx)
    assert torch.equal(cached, generate(model, idx, 30, seed=5, use_cache=False, **kw))
    assert not torch.equal(cached, generate(model, idx, 30, seed=6, **kw))


@torch.no_grad()
def test_a_context_of_one_token_is_enough_to_generate():
    model, idx = tiny_model(block_size=1), random_tokens(2, 1)
    expected = idx
    for _ in range(5):
        expected = torch.cat((expected, model(expected[:, -1:])[0][:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(generate(model, idx, 5, temperature=0), expected)


@pytest.mark.parametrize("chunks", [(20,), (5, 15), (1, 7, 1, 11), (19, 1)])
@torch.no_grad()
def test_logits_of_cached_chunks_equal_the_whole_forward_pass(chunks):
    model, idx = tiny_model(), random_tokens(2, 20)
    caches = [Cache() for _ in model.blocks]
    logits = torch.cat([model(part, caches=caches)[0] for part in idx.split(chunks, dim=1)], dim=1)
    torch.testing.assert_close(logits, model(idx)[0], atol=1e-5, rtol=1e-5)


def allowed(logits, temperature, top_k, top_p):
    """{token: probability} of the tokens that may be chosen, one by one in plain Python."""
    ranked = sorted(((math.exp(z / temperature), i) for i, z in enumerate(logits)), reverse=True)[:top_k or None]
    total, kept, mass = sum(p for p, _ in ranked), {}, 0.0
    for p, i in ranked:
        if mass / total < top_p:
            kept[i] = p
        mass += p
    return {i: p / sum(kept.values()) for i, p in kept.items()}


@pytest.mark.parametrize("temperature, top_k, top_p", [
    (1.0, 0, 1.0), (0.7, 0, 1.0), (2.0, 0, 1.0), (1.0, 3, 1.0), (1.0, 1, 1.0), (1.0, 99, 1.0), (1.0, 0, 0.5),
    (0.6, 0, 0.9), (1.0, 0, 1e-6), (1.3, 5, 0.6)])
def test_picked_tokens_follow_the_truncated_softmax(temperature, top_k, top_p):
    g = torch.Generator().manual_seed(0)
    rows, n = torch.randn(2, 12, generator=g, dtype=torch.float64), 20_000
    picked = pick(rows.repeat_interleave(n, 0), temperature, top_k, top_p, g)
    assert picked.shape == (2 * n, 1)
    for row, got in zip(rows.tolist(), picked.view(2, n)):
        counts, expected = got.bincount(minlength=12), allowed(row, temperature, top_k, top_p)
        assert {i for i in range(12) if counts[i]} == set(expected)
        # chi-square with up to 11 degrees of freedom; beyond 45 once in 200,000
        assert sum((counts[i].item() - n * p) ** 2 / (n * p) for i, p in expected.items()) < 45


def test_temperature_0_picks_the_likeliest():
    logits = torch.randn(50, 97, generator=torch.Generator().manual_seed(0))
    expected = [max(range(97), key=row.__getitem__) for row in logits.tolist()]
    assert pick(logits, 0, 0, 1.0, None).flatten().tolist() == expected
    assert pick(logits, 0, 5, 0.5, None).flatten().tolist() == expected


@torch.no_grad()
def test_padding_of_the_vocabulary_is_never_sampled():
    model, idx = tiny_model(), random_tokens(4, 3)
    model.head.weight[97:] *= 1e4
    assert (model.head(model.norm(model.trunk(idx)[0])).argmax(-1) >= 97).any(), "the padding would win"
    assert model(idx)[0].shape == (4, 3, 97)
    for temperature in (0, 5.0):
        assert generate(model, idx, 40, temperature=temperature).max() < 97


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers and checkpoints


def small_encoding(name="small", extra=(b"th", b"the", b" the", "é".encode())):
    ranks = {bytes([i]): i for i in range(256)} | {token: 256 + i for i, token in enumerate(extra)}
    return tiktoken.Encoding(name, pat_str=r" ?\w+|\s+|[^\w\s]+", mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": len(ranks)})


def test_tokenizer_survives_json():
    enc, text = small_encoding(), "the cat, thé\n  \u4e2d\U0001f600 the\x00 <|endoftext|>"
    d = json.loads(json.dumps(tokenizer_to_dict(enc)))
    back = tokenizer_from_dict(d)
    assert back.encode(text, allowed_special="all") == enc.encode(text, allowed_special="all")
    assert back.decode(back.encode_ordinary(text)) == text
    assert (back.name, back.n_vocab, back.eot_token) == ("small", 261, 260)
    assert tokenizer_id(d) == tokenizer_id(tokenizer_to_dict(enc)) == tokenizer_id(tokenizer_to_dict(back))


def test_tokenizer_id_is_of_what_it_does_and_not_of_its_name():
    d = tokenizer_to_dict(small_encoding())
    assert tokenizer_id(d) == tokenizer_id(tokenizer_to_dict(small_encoding("another name")))
    other = [{**d, "pattern": r"\w+|\W"}, {**d, "special": {"<|end|>": 260}},
             tokenizer_to_dict(small_encoding(extra=(b"th", b"the", "é".encode(), b" the")))]
    assert len({tokenizer_id(x) for x in (d, *other)}) == 4


@pytest.fixture
def checkpoint(tiny):
    return train_module.train(tiny(steps=2, eval_tokens=64))["checkpoint"]


def write_missing(path):
    pass


def write_empty(path):
    path.write_bytes(b"")


def write_truncated(path):
    torch.save({"format": "nanolet-1", "model": {"w": torch.zeros(1000)}}, path)
    path.write_bytes(path.read_bytes()[:2000])


def write_random(path):
    path.write_bytes(random.Random(1).randbytes(1000))


def write_object(path):
    torch.save({"format": "nanolet-1", "model": random.Random(0)}, path)


def write_foreign(path):
    torch.save({"epoch": 3, "state_dict": {"w": torch.zeros(3)}}, path)


def write_list(path):
    torch.save([torch.zeros(3)], path)


NO_CHECKPOINTS = [write_missing, write_empty, write_truncated, write_random, write_object, write_foreign, write_list]


@pytest.mark.parametrize("write", NO_CHECKPOINTS)
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, write):
    write(tmp_path / "broken.pt")
    with pytest.raises(BadInput, match="broken.pt"):
        load_checkpoint(tmp_path / "broken.pt")


def test_no_bytes_whatever_break_the_reading_of_a_checkpoint(tmp_path):
    rng, path = random.Random(0), tmp_path / "broken.pt"
    for length in (1, 2, 3, 30, 300) * 20:
        path.write_bytes(rng.randbytes(length))
        with pytest.raises(BadInput, match="broken.pt"):
            load_checkpoint(path)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    path, proof = tmp_path / "evil.pt", tmp_path / "proof"
    path.write_bytes(f"cbuiltins\nopen\n(V{proof}\nVw\ntR.".encode())
    pickle.loads(path.read_bytes()).close()
    assert proof.exists(), "the trap works"
    proof.unlink()
    with pytest.raises(BadInput, match="evil.pt.*could run code"):
        load_checkpoint(path)
    assert not proof.exists()


def test_a_checkpoint_gives_the_model_back(checkpoint):
    ckpt = load_checkpoint(checkpoint)
    model = model_from_checkpoint(ckpt)
    assert model.config.n_embd == 32 and model.config.vocab_size == 257
    assert {name for name, _ in model.named_parameters()} <= set(ckpt["model"])
    for name, p in model.named_parameters():
        assert torch.equal(p, ckpt["model"][name])


@pytest.mark.parametrize("write", [write_missing, write_truncated, write_random, write_object, write_foreign])
def test_sampler_refuses_what_is_no_checkpoint_in_one_line(tmp_path, write):
    write(tmp_path / "broken.pt")
    p = run_python("model.py", tmp_path / "broken.pt")
    assert (p.returncode, p.stdout) == (2, "")
    assert p.stderr.startswith("error: ") and "broken.pt" in p.stderr and len(p.stderr.splitlines()) == 1


def test_sampler_lists_all_bad_values(tmp_path):
    p = run_python("model.py", tmp_path / "none.pt", "--temperature=-1", "--top_p=2", "--top_k=-3", "--tokens=0")
    assert (p.returncode, p.stdout) == (2, "")
    assert all(flag in p.stderr for flag in ("--temperature=-1", "--top_p=2", "--top_k=-3", "--tokens=0"))
    assert len(p.stderr.splitlines()) == 4


def test_sampler_continues_the_prompt_and_repeats_itself_by_seed(checkpoint):
    runs = [run_python("model.py", checkpoint, "--prompt", "def é", "--tokens=40", f"--seed={seed}", "--device=cpu",
                       "--temperature=0.5") for seed in (1, 1, 2)]
    assert all(p.returncode == 0 and p.stdout.startswith("def é") and len(p.stdout) > 10 for p in runs), runs
    assert runs[0].stdout == runs[1].stdout != runs[2].stdout
