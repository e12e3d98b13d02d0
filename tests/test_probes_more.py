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
from model import GPT, BadInput, ModelConfig, load_checkpoint
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
    with pytest.raises(BadInput, match="a context of 32 is needed"):
        probes.main(["curvature", str(tmp_path / "let-0"), f"--text={tmp_path / 'text.txt'}", "--tokens=9"])
