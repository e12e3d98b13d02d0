"""probes.py: curvature against dense Hessians and finite differences; norms against plain loops; downstream scores against
logits read one by one; pictures."""
import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model

import probes
import train as train_module
from model import BadInput, load_checkpoint
from probes import density, hessian_product, lanczos, spectrum

torch.set_num_threads(1)


# ----------------------------------------------------------------------------------------------------------------------
# Curvature

MIXERS = {"attention": dict(n_kv_head=1), "swiglu": dict(mlp="swiglu", qk_norm=True), "mamba2": dict(mixer="mamba2"),
          "hybrid": dict(mixer="hybrid", n_groups=2), "experts": dict(n_experts=3, mlp="gelu")}


def small(seed=0, **kw):
    """About 400 parameters in float64, none of them 0."""
    model = tiny_model(seed, **{**dict(vocab_size=13, block_size=12, n_layer=1, n_embd=4, n_head=2, n_kv_head=2, mlp="relu2",
                                       qk_norm=False, mlp_hidden=8, tie_embeddings=True, d_state=4, ssm_head_dim=2,
                                       chunk_size=5), **kw}).double()
    return model


def batch(rows=3, length=12, seed=1):
    ids = torch.randint(13, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1], ids[:, 1:]


def randn(n, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", MIXERS)
def test_hessian_product_is_the_difference_of_gradients(kind):
    """Of the gradients that training uses: through the fused attention and the loss in chunks, once differentiable."""
    model = small(**MIXERS[kind])
    params, data = list(model.parameters()), [batch(3), batch(2, seed=2)]
    v = F.normalize(randn(sum(p.numel() for p in params)), dim=0)

    def gradient(shift):
        with torch.no_grad():
            for p, part in zip(params, v.split([p.numel() for p in params])):
                p += shift * part.view_as(p)
        idx, targets = (torch.cat(t) for t in zip(*data))
        got = torch.autograd.grad(model(idx, targets)[0], params)
        return torch.cat([g.flatten() for g in got])

    eps, coarse = (1e-2, 1e-2) if kind == "experts" else (1e-5, 1e-7)  # the router's softmax is in float32
    expected = (gradient(eps) - gradient(-2 * eps)) / (2 * eps)
    gradient(eps)
    got = hessian_product(model, data)(v)
    assert got.norm() > 1e-2
    assert ((got - expected).norm() / expected.norm()).item() < coarse


@pytest.fixture(scope="module")
def dense():
    """(model, batches, its whole Hessian by differentiating every element of the gradient)."""
    model, data = small(), batch()
    params = list(model.parameters())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        loss = F.cross_entropy(model(data[0])[0].flatten(0, 1), data[1].flatten())
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, params, create_graph=True)])
    rows = [torch.cat([h.flatten() for h in torch.autograd.grad(g, params, retain_graph=True, materialize_grads=True)])
            for g in gradient]
    return model, [data], torch.stack(rows).detach()


def test_extreme_eigenvalues_are_those_of_the_dense_hessian(dense):
    model, data, H = dense
    exact = torch.linalg.eigvalsh(H)
    got = spectrum(model, data, steps=80, probes=1, top=4)
    assert got["parameters"] == len(H) and exact[0] < -1e-3 < exact[-1]
    torch.testing.assert_close(torch.tensor(got["top"]).double(), exact.flip(0)[:4], rtol=1e-6, atol=0)
    assert got["least"] == pytest.approx(exact[0].item(), rel=1e-6)
    assert got["residual"] < 1e-6 * exact[-1].item()
    assert got["loss"] == pytest.approx(model(*data[0])[0].item(), rel=1e-12)


def test_lanczos_weights_give_the_moments_of_the_start_vector(dense):
    _, _, H = dense
    v = randn(len(H), seed=3)
    theta, weights, residual = lanczos(lambda u: H @ u, v, 12)
    for k in range(24):  # Gauss quadrature of 12 nodes is exact up to here
        exact = (v @ torch.linalg.matrix_power(H, k) @ v / (v @ v)).item()
        assert (weights * theta**k).sum().item() == pytest.approx(exact, rel=1e-8), k
    exact = torch.linalg.eigvalsh(H)
    for value, bound in zip(theta, residual):
        assert (exact - value).abs().min() <= bound + 1e-12
    assert weights.sum().item() == pytest.approx(1.0)


def test_traces_come_out_within_their_errors(dense):
    model, data, H = dense
    got = spectrum(model, data, steps=6, probes=10)
    assert got["trace"] == pytest.approx(H.trace().item(), abs=4 * got["trace_se"])
    assert got["trace_se"] < 0.1 * len(H) * got["rms"], "the comparison would mean little"
    assert got["rms"] == pytest.approx((H.square().sum() / len(H)).sqrt().item(), rel=0.2)


def test_lanczos_stops_where_all_is_seen_and_does_not_repeat_what_has_converged():
    e = torch.tensor([3.0, 3.0, 1.0, -2.0, 0.5] + [0.0] * 20, dtype=torch.float64)
    U = torch.linalg.qr(randn(625).view(25, 25)).Q
    theta, weights, _ = lanczos(lambda u: U @ (e * (U.mT @ u)), randn(25, seed=1), 25)
    torch.testing.assert_close(theta, torch.tensor([-2.0, 0.0, 0.5, 1.0, 3.0]).double(), atol=1e-10, rtol=0)
    spread = torch.logspace(-8, 3, 300, dtype=torch.float64)  # the largest ones converge in a few steps
    theta, _, _ = lanczos(lambda u: spread * u, randn(300), 100)
    assert (theta[-12:] - spread[-12:]).abs().max() < 1e-6


def test_density_is_that_of_the_eigenvalues(dense):
    _, _, H = dense
    exact = torch.linalg.eigvalsh(H)
    sigma = 0.05 * (exact[-1] - exact[0]).item()
    x = torch.linspace(exact[0].item() - 5 * sigma, exact[-1].item() + 5 * sigma, 400, dtype=torch.float64)
    whole = torch.exp(-0.5 * ((x[:, None] - exact) / sigma) ** 2).mean(1) / (sigma * math.sqrt(2 * math.pi))
    got = density([lanczos(lambda u: H @ u, randn(len(H), seed=s), 60)[:2] for s in range(20)], x, sigma)
    assert torch.trapezoid(got, x).item() == pytest.approx(1.0, abs=1e-3)
    assert (got - whole).abs().max() < 0.06 * whole.max()


def test_curvature_along_runs(tiny, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for name, extra in (("plain", {}), ("let", {"lr": 0.02})):
        train_module.train(tiny(steps=4, save_every=2, eval_every=4, keep_checkpoints=True, out_dir=str(tmp_path / f"{name}-0"), **extra))
    assert sorted(p.name for p in (tmp_path / "let-0").glob("*.pt")) == ["ckpt.pt", "step-0000002.pt", "step-0000004.pt"]
    (tmp_path / "text.txt").write_text("def alpha(beta):\n    return 1\n" * 20)
    probes.main(["curvature", str(tmp_path / "plain-0"), str(tmp_path / "let-0"), f"--text={tmp_path / 'text.txt'}", "--tokens=96",
                 "--steps=6", f"--plot={tmp_path / 'a.png'}", "--device=cpu"])
    lines = [[cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line[2] for line in lines[1:5]] == ["2", "4", "2", "4"]
    ratio = float(lines[3][4].split(",")[0]) / float(lines[1][4].split(",")[0])
    assert lines[6][1:4] == ["let", "2", "1"] and float(lines[6][4]) == pytest.approx(ratio, rel=2e-3)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "text.txt").write_text("short")
    with pytest.raises(BadInput, match="5 tokens; a context of 32 is needed"):
        probes.main(["curvature", str(tmp_path / "let-0"), f"--text={tmp_path / 'text.txt'}"])


# ----------------------------------------------------------------------------------------------------------------------
# Downstream

WORDS = "the cat sat on a mat and then it ran to see some old red dogs that were not there before noon".split()


def handwritten() -> list[dict]:
    """20 items of all three forms, contexts of 0 to 30 words, two to five choices, some alike, some longer than others."""
    items = []
    for i in range(8):
        context = " ".join(WORDS[j % 20] for j in range(i, 5 * i))
        items.append({"ctx": context, "endings": [" ".join(WORDS[k:k + n]) for k, n in ((i, 2), (i + 3, 7), (2, 1), (9, i + 1))],
                      "label": str(i % 4)})
    for i in range(6):
        items.append({"context": f"Question {i}: where did the old cat run?\nAnswer:" + "  " * (i % 2),
                      "choices": ["home", "to the red mat", "not there", "nowhere, it sat"][:2 + i % 3], "label": i % 2})
    for i in range(6):
        items.append({"sentence_good": " ".join(WORDS[i:i + 6]) + ".", "sentence_bad": " ".join(WORDS[i:i + 6][::-1]) + "."})
    return items


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    path = tmp_path_factory.mktemp("task") / "task.jsonl"
    path.write_text("\n\n".join(map(json.dumps, handwritten())))
    return probes.read_task(path)


@pytest.fixture(scope="module")
def enc():
    text = "Question 1: where did the old cat run?\nAnswer: " + " ".join(WORDS + WORDS[::-1] + WORDS[::2]) + " nowhere, home."
    return train_module.tokenizer_from_dict(train_module.make_tokenizer("bpe", train_module.train_bpe([text] * 2, 300), train_module.PATTERN))


def reader(**kw):
    return tiny_model(**{**dict(vocab_size=301, block_size=256, n_layer=2), **kw})


def one_by_one(logits_of, enc, task):
    """[[log-likelihood of each choice]] by a loop over logits, one sequence per forward pass, the boundary found here."""
    totals = []
    for context, choices, _ in task:
        totals.append([])
        for choice in choices:
            text = context + ("" if not context or context.endswith(" ") else " ") + choice
            n = len(enc.encode_ordinary(context.rstrip(" ")))
            ids = [enc.eot_token] + enc.encode_ordinary(text)
            log_p = logits_of(torch.tensor([ids]))[0].double().log_softmax(-1)
            totals[-1].append(sum(log_p[t - 1, ids[t]].item() for t in range(1 + n, len(ids))))
    return totals


@torch.no_grad()
def test_scores_are_those_of_a_loop_over_the_logits_of_transformers(task, enc):
    from teacher import HFModel
    from test_model import hf_twin
    model = reader(mlp="swiglu")
    twin = hf_twin(model)
    expected = one_by_one(lambda idx: twin(idx).logits, enc, task)
    got = probes.evaluate_task(model, enc, task)
    assert len(task) == 20 and got["items"] == 20 and got["cut"] == got["left_out"] == 0
    wrapped = probes.evaluate_task(HFModel(twin, 301), enc, task)  # has another way through log_likelihoods
    for ours, others, theirs in zip(got["scores"], wrapped["scores"], expected):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-4) and others == pytest.approx(theirs, rel=1e-5, abs=1e-4)
    by_sum = [max(range(len(s)), key=s.__getitem__) == label for s, (_, _, label) in zip(expected, task)]
    each = [[s / len(c) for s, c in zip(scores, choices)] for scores, (_, choices, _) in zip(expected, task)]
    by_length = [max(range(len(s)), key=s.__getitem__) == label for s, (_, _, label) in zip(each, task)]
    assert by_sum != by_length
    assert got["sum"] == pytest.approx(sum(by_sum) / 20) and got["per_character"] == pytest.approx(sum(by_length) / 20)
    assert got["sum_se"] == pytest.approx(torch.tensor(by_sum).double().std().item() / 20**0.5)
    assert got["chance"] == pytest.approx((8 / 4 + 2 * (1 / 2 + 1 / 3 + 1 / 4) + 6 / 2) / 20)


@pytest.mark.parametrize("kind", ["attention", "mamba2", "hybrid", "experts"])
@torch.no_grad()
def test_order_batch_size_and_filling_do_not_change_a_score(task, enc, kind):
    model = reader(**{**MIXERS[kind], "ssm_head_dim": 16, "d_state": 8, "chunk_size": 7})
    expected = one_by_one(lambda idx: model(idx)[0], enc, task)
    for batch_tokens, order in ((1, 1), (100, -1), (10**6, 1), (10**6, -1)):
        got = probes.evaluate_task(model, enc, task[::order], batch_tokens)["scores"][::order]
        for ours, theirs in zip(got, expected):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-4)


def test_shared_contexts_go_through_the_model_once(enc, monkeypatch):
    task = [("the cat sat on a mat and then it ran to see some old red dogs " * (2 + i % 2), ["home", "there", "not there"], 0)
            for i in range(6)]
    model, seen = reader(), []
    trunk = model.trunk
    monkeypatch.setattr(model, "trunk", lambda idx, **kw: seen.append(idx.numel()) or trunk(idx, **kw))
    probes.evaluate_task(model, enc, task)
    whole = sum(len(probes.encode_pair(enc, context, choice)[0]) for context, choices, _ in task for choice in choices)
    assert sum(seen) < 0.6 * whole


def test_the_boundary_between_context_and_choice(enc):
    for context, choice, ours in (("the cat", "sat", " sat"), ("the cat ", "sat", " sat"), ("the cat", " sat", " sat"),
                                  ("the cat\n", "sat", "\nsat"), ("", "sat", "sat")):
        ids, start = probes.encode_pair(enc, context, choice)
        assert ids[0] == enc.eot_token and enc.decode(ids[start:]) == ours and enc.decode(ids[1:start]) == context.rstrip()


def test_ties_share_the_point_and_are_counted(enc):
    model = reader()
    task = [("the cat", ["sat on a", "sat on a", "the mat of the red red red dogs"], k) for k in range(3)]
    got = probes.evaluate_task(model, enc, task)
    top = [0.0, 0.0, 1.0] if got["scores"][0][2] > got["scores"][0][0] else [0.5, 0.5, 0.0]
    assert got["sum"] == pytest.approx(sum(top) / 3) and got["sum_ties"] == (3 if top[0] else 0)
    assert probes.right([-3.0, -3.0, -5.0, -3.0], 3) == (pytest.approx(1 / 3), True)
    assert probes.right([-3.0, -2.9999, -5.0], 1) == (1.0, False) and probes.right([-3.0, -3.0 + 1e-7], 0) == (0.5, True)


@torch.no_grad()
def test_long_contexts_lose_their_beginning_and_are_counted(enc):
    model, text = reader(block_size=16), " ".join(WORDS)
    task = [(text, ["home", "there"], 0), ("the cat", ["sat", "ran"], 1), ("the", ["sat", text], 0)]
    got = probes.evaluate_task(model, enc, task)
    assert (got["items"], got["cut"], got["left_out"]) == (2, 1, 1) and got["scores"][2] is None
    for k, choice in enumerate(task[0][1]):
        ids, n = enc.encode_ordinary(f"{text} {choice}"), len(enc.encode_ordinary(f" {choice}"))
        log_p = model(torch.tensor([ids[-17:-1]]))[0][0].log_softmax(-1)
        assert got["scores"][0][k] == pytest.approx(sum(log_p[t, ids[-17:][t + 1]].item() for t in range(16 - n, 16)), rel=1e-5)
    long = probes.evaluate_task(reader(block_size=16, mixer="mamba2", ssm_head_dim=16), enc, task)
    assert (long["items"], long["cut"], long["left_out"]) == (3, 0, 0), "a state space has no longest context"


@pytest.mark.parametrize("line, why", [
    ('{"ctx": "a", "label": 1}', "no field `endings`"), ('{"sentence_good": "a"}', "no field `sentence_bad`"),
    ('{"a": 1}', "no field `ctx`"), ('{"ctx": "a", "endings": ["b", "c"], "label": 2}', "`label` 2: a number from 0 to 1"),
    ('{"ctx": "a", "endings": ["b", "c"], "label": ""}', "`label` ''"), ('{"ctx": "a", "endings": ["b"], "label": 0}', "two texts"),
    ('{"context": "a", "choices": "bc", "label": 0}', "two texts"), ('{"context": 1, "choices": ["b", "c"], "label": 0}', "no text"),
    ("[1]", "not a JSON object"), ('{"ctx', "not JSON"), ("[" * 100_000, "not JSON"), ("1" * 5000, "not JSON"), ("", "no line in it"),
    ('{"ctx": "a", "endings": ["b", "c"], "label": "%s"}' % ("1" * 5000), "`label`")], ids=lambda v: v[:40])
def test_a_task_that_is_none_is_refused_by_line(tmp_path, line, why):
    good = '{"sentence_good": "a b", "sentence_bad": "b a"}\n\n' if line else ""
    (tmp_path / "t.jsonl").write_text(good + line)
    with pytest.raises(BadInput, match=(r"t\.jsonl, line 3: " if line else "") + ".*" + why.replace("[", r"\[")):
        probes.read_task(tmp_path / "t.jsonl")


@pytest.mark.parametrize("stride", [32, 10])
@torch.no_grad()
def test_perplexity_reads_every_token_once_with_the_context_of_its_window(enc, stride):
    model, text = reader(block_size=32), " ".join(WORDS * 7) + "."
    ids = [enc.eot_token] + enc.encode_ordinary(text)
    total = 0.0
    for t in range(1, len(ids)):  # the window that scores t ends at the next multiple of the stride
        end = min(-(-t // stride) * stride, len(ids) - 1)
        log_p = model(torch.tensor([ids[max(0, end - 32):t]]))[0][0, -1].log_softmax(-1)
        total -= log_p[ids[t]].item()
    got = probes.evaluate_text(model, ids, len(text.encode()), stride, batch_tokens=64)
    assert got["tokens"] == len(ids) - 1 and got["nats"] == pytest.approx(total / (len(ids) - 1), rel=1e-5)
    assert got["perplexity"] == pytest.approx(math.exp(total / (len(ids) - 1)), rel=1e-4)
    assert got["bits_per_byte"] == pytest.approx(total / math.log(2) / len(text.encode()), rel=1e-5)


def test_a_run_is_evaluated_from_the_command_line(tiny, tmp_path, capsys):
    result = train_module.train(tiny(steps=3))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, handwritten())))
    (tmp_path / "text.txt").write_text("def alpha(beta):\n    return 1\n" * 20)
    probes.main(["eval", result["checkpoint"], f"--task={tmp_path / 'a.jsonl'}", f"--text={tmp_path / 'text.txt'}", "--device=cpu"])
    out = capsys.readouterr().out
    assert "| a | 1" in out and "bits per byte, over 600 tokens" in out
    with pytest.raises(BadInput, match="--task=FILE.jsonl or --text=FILE"):
        probes.main(["eval", result["checkpoint"]])


# ----------------------------------------------------------------------------------------------------------------------
# Scale


def test_scales_by_block_pool_to_those_that_a_run_logs():
    from optim import Multipliers, weight_scales
    model = tiny_model(n_layer=3, mlp="swiglu")
    multipliers = Multipliers(model)
    with torch.no_grad():
        for v in multipliers.parameters():
            v.uniform_(0.5, 2.0)
    multipliers.fold()
    found, logged = probes.matrix_scales(model, multipliers.state_dict()), weight_scales(model, multipliers)["weights"]
    assert {m["piece"] for m in found} == logged.keys() and len(found) == 3 * 7 + 2
    for piece, expected in logged.items():
        mine = [m for m in found if m["piece"] == piece]
        assert [m["block"] for m in mine] == ([1, 2, 3] if len(mine) == 3 else [0])
        for key in ("rms", "rms_effective"):
            assert math.sqrt(sum(m[key] ** 2 for m in mine) / len(mine)) == pytest.approx(expected[key], rel=1e-5)
        assert torch.cat([m["rows"] for m in mine]).log().std().item() == pytest.approx(expected["spread"], rel=1e-4)
    q = next(m for m in found if m["piece"] == "q" and m["block"] == 2)
    W, name = multipliers.W[q["name"]], q["name"]
    assert name == "blocks.1.mixer.qkv.weight" and q["rms"] == pytest.approx(W[:32].square().mean().sqrt().item())
    assert q["rms"] != pytest.approx(q["rms_effective"])


def config_of(**kw):
    return {**vars(train_module.Config()), **kw}


def test_adam_brownian_motion_is_that_of_a_plain_loop_and_comes_to_its_equilibrium():
    """From RMS 0.3 under a falling rate, by hand; and at a constant rate 0.71 sqrt(lr / decay), by the random-walk balance."""
    model, steps, decay = tiny_model(), 150, 1.0
    lrs = [0.02 * (1 - t / 200) for t in range(steps)]
    noise, shrink = probes.noise_curves(config_of(optimizer="adamw", weight_decay=decay, module_lr="mlp=0.5"), model, lrs)["up"]
    g = torch.Generator().manual_seed(1)
    w, m, v, seen = 0.3 * torch.randn(20_000, generator=g), 0.0, 0.0, [0.3]
    for t, lr in enumerate(lrs, 1):
        grad = torch.randn(20_000, generator=g)
        m, v = 0.9 * m + 0.1 * grad, 0.95 * v + 0.05 * grad**2
        w = (1 - 0.5 * lr * decay) * w - 0.5 * lr * (m / (1 - 0.9**t)) / (v / (1 - 0.95**t)).sqrt()
        seen.append(w.square().mean().sqrt().item())
    curve = torch.sqrt((0.3 * shrink) ** 2 + noise**2)
    assert len(curve) == steps + 1
    torch.testing.assert_close(curve, torch.tensor(seen).double(), rtol=0.04, atol=0)
    adamw = lambda p: torch.optim.AdamW(p, betas=(0.9, 0.95))
    path = probes.brownian_motion([0.01] * 1500, 1.0, adamw, (2000,))
    assert 0.65 < path[-500:].mean().item() / 0.1 < 0.72


@pytest.mark.parametrize("scale", ["match_rms_adamw", "original", "spectral"])
def test_a_small_matrix_stands_for_a_large_one_under_muon(scale):
    from optim import Muon
    model = tiny_model(n_embd=96, n_layer=1, mlp="relu2")  # up is (384, 96)
    lrs = [0.01] * 40
    noise, _ = probes.noise_curves(config_of(muon_scale=scale, weight_decay=0.5), model, lrs)["up"]
    true = probes.brownian_motion(lrs, 0.5, lambda p: Muon(p, scale=scale, dtype=torch.float32), (384, 96), seed=5)
    torch.testing.assert_close(noise[5:], true[5:], rtol=0.08, atol=0)


def test_norms_of_a_run_and_of_a_checkpoint_alone(tiny, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    result = train_module.train(tiny(steps=6, multipliers="vector", module_lr="mlp=0.5"))
    probes.main(["norms", result["out_dir"], f"--plot={tmp_path / 'n.png'}"])
    rows = [[cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row[2] for row in rows] == ["embed", *["q", "k", "v", "o", "up", "down"] * 2, "head"]
    state = load_checkpoint(result["checkpoint"])
    o = state["multipliers"]["blocks.1.mixer.o.weight"].square().mean().sqrt().item()
    assert float(rows[10][4]) == pytest.approx(o, abs=1e-4) and 0.3 < float(rows[10][7]) < 2
    assert (tmp_path / "n.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "alone.pt").write_bytes((tmp_path / "run" / "ckpt.pt").read_bytes())
    probes.main(["norms", str(tmp_path / "alone.pt")])
    alone = [[cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row[:6] + row[8:] for row in alone] == [row[:6] + row[8:] for row in rows] and not any(row[6] for row in alone)


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


def test_means_over_seeds_by_hand():
    group = [[{"step": 0, "tokens": 0, "flops": 0, "seconds": 0, "val_loss": 5.0}, {"step": 5, "lr": 1},
              {"step": 10, "tokens": 20, "flops": 30, "seconds": 2.0, "val_loss": 3.0}],
             [{"step": 0, "tokens": 0, "flops": 0, "seconds": 0, "val_loss": 5.0},
              {"step": 10, "tokens": 20, "flops": 30, "seconds": 4.0, "val_loss": 2.0},
              {"step": 20, "tokens": 40, "flops": 60, "seconds": 6.0, "val_loss": math.inf}]]
    at, mean, sd = probes.over_seeds(group, lambda line: line.get("val_loss"))
    assert at == [{"step": 0, "tokens": 0, "flops": 0, "seconds": 0}, {"step": 10, "tokens": 20, "flops": 30, "seconds": 3.0}]
    assert mean == [5.0, 2.5] and sd == pytest.approx([0.0, 0.5**0.5])


def test_runs_of_every_kind_are_drawn(tiny, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes
    drawn = []
    monkeypatch.setattr(Axes, "plot", lambda self, *a, **kw: drawn.append(kw.get("label")))
    monkeypatch.setattr(Axes, "legend", lambda self, **kw: None)
    line = {"flops": 1.0, "seconds": 1.0, "tokens": 1, "bits_per_byte": 1.0}
    for name, extra in (("a-0", {}), ("a-1", {}), ("3", {"let_cosine": 0.5}), ("b-x", {"drift": {"v/o": 0.1, "up/down": 0.2}})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps({**line, **extra, "step": s, "val_loss": 3.0 - s}) + "\n" for s in (0, 1)))
    probes.main(["plot", *(str(tmp_path / name) for name in ("a-0", "a-1", "3", "b-x")), "-o", str(tmp_path / "p.png")])
    assert drawn == ["a (2 seeds)", "3", "b-x"] * 4 + ["3", "b-x up/down", "b-x v/o"]
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "3" / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(BadInput, match="no evaluation"):
        probes.main(["plot", str(tmp_path / "3")])
    with pytest.raises(BadInput, match="ends in .png"):
        probes.main(["plot", str(tmp_path / "a-0"), "-o", "x.txt"])
