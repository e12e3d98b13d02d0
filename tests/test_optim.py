"""optim.py against independent oracles: the SVD, torch.optim.Muon, finite differences, autograd
through r * W * c in the forward pass, and values by hand."""
import copy
import io
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import randn, random_tokens, same, tiny_model
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

import optim
from model import GPT, ModelConfig, logical_pieces
from optim import Multipliers, Muon, Optimizers, place_multipliers, place_parameters, update_scale

SSM = dict(d_state=8, ssm_head_dim=16, chunk_size=8)
MIXED = dict(mixer="hybrid", n_experts=4, **SSM)
SCALES = ("match_rms_adamw", "original", "spectral")


def parameter(*shape, seed=0, dtype=torch.float32):
    return torch.nn.Parameter(randn(*shape, seed=seed, dtype=dtype))


def loss_of(model, batch):
    logits = model.logits(model(batch[:, :-1])[0])
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def train(model, optimizers, steps, first=0):
    for step in range(first, first + steps):
        loss_of(model, random_tokens(first + steps, 2, 9)[step]).backward()
        optimizers.clip(0.5)
        optimizers.step(step)


def make(model, schedule=lambda step: 1.0, **kw):
    return Optimizers(model, schedule, **{"lr": 0.01, "dtype": torch.float32, **kw})


def groups_by_name(optimizers):
    return {name: group for optimizer in optimizers.optimizers.values()
            for group in optimizer.param_groups for name in group["param_names"]}


# Newton-Schulz and what is made of its result
@pytest.mark.exercise("newton_schulz")
@pytest.mark.parametrize("shape", [(8, 40), (40, 8), (24, 24)], ids=["wide", "tall", "square"])
@pytest.mark.parametrize("steps", [0, 1, 7])
def test_newton_schulz_is_the_published_polynomial_of_singular_values(shape, steps):
    """Of each matrix of a stack, whatever its scale; in bf16 about so, at those not too small."""
    U, s, Vh = torch.linalg.svd(randn(3, *shape, dtype=torch.float64), full_matrices=False)
    G = U * s[:, None] @ Vh * torch.tensor([1e-4, 1.0, 3e5])[:, None, None]
    s = s / s.norm(dim=-1, keepdim=True)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    got, expected = optim.newton_schulz(G, steps, torch.float64), U * s[:, None] @ Vh
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9)
    low = optim.newton_schulz(G.float(), steps)
    assert low.dtype == torch.bfloat16 and (low - expected).norm() < 0.1 * expected.norm()


@pytest.mark.exercise("newton_schulz")
def test_newton_schulz_keeps_zero_and_works_on_the_smaller_gram_matrix():
    for shape in ((8, 40), (40, 8)):
        with FlopCounterMode(display=False) as counter:
            zero, *others = optim.newton_schulz(randn(3, *shape) * torch.arange(3).view(3, 1, 1))
        assert counter.get_total_flops() == 3 * 5 * (4 * 8 * 8 * 40 + 2 * 8**3)
        assert not zero.any() and all(other.isfinite().all() and other.any() for other in others)


# Muon
def run(optimizer, params, steps=20):
    """Steps with random gradients, the same ones each time."""
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = randn(*p.shape, seed=1000 * step + i)
        optimizer.step()


@pytest.mark.exercise("momentum_update")
def test_momentum_is_the_average_by_hand_and_the_gradients_are_left_alone():
    """m after t steps is the sum of (1 - mu) mu^(t - s) g_s."""
    m, seen = [torch.zeros(3, 4), torch.zeros(2, 5)], []
    for step in range(4):
        G = [randn(*part.shape, seed=10 * step + i) for i, part in enumerate(m)]
        seen.append([g.clone() for g in G])
        u = optim.momentum_update(G, m, 0.8)
        for i, g in enumerate(G):
            average = sum(0.2 * 0.8**(step - s) * old[i] for s, old in enumerate(seen))
            torch.testing.assert_close(m[i], average)
            torch.testing.assert_close(u[i], 0.2 * g + 0.8 * average)
            assert torch.equal(g, seen[-1][i])


@pytest.mark.exercise("Muon.move")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_muons_change_of_a_stack_is_decay_and_the_scaled_update(dtype):
    """O holds its values only after the wait for each of its matrices."""
    W, O = [randn(4, 6, seed=i) for i in range(3)], randn(3, 4, 6, seed=9).to(dtype)
    expected = [0.95 * w - 0.1 * 3 * o.float() for w, o in zip(W, O)]
    in_place, sending = [*W], [SimpleNamespace(wait=partial(part.copy_, values))
                               for part, values in zip(O, O.clone())]
    O.zero_()
    Muon.move(None, {"lr": 0.1, "weight_decay": 0.5}, 3.0, W, O, sending)
    torch.testing.assert_close(in_place, expected)


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
def test_muon_goes_where_that_of_torch_goes(scale, weight_decay):
    """Products in bf16, in batches here and one by one there: 1 % of the way at most. The last
    parameter has no gradient."""
    shapes = [(16, 48), (48, 16), (32, 32), (16, 48), (16, 48)]
    ours, theirs = ([parameter(*s, seed=i) for i, s in enumerate(shapes)] for _ in range(2))
    start = [p.detach().clone() for p in ours]
    kw = dict(lr=0.02, weight_decay=weight_decay, momentum=0.9)
    matrices = [[(len(p), update_scale(*p.shape, scale))] for p in ours]
    run(Muon([{"params": ours, "matrices": matrices}], **kw), ours[:-1])
    run(torch.optim.Muon(theirs, adjust_lr_fn=scale, **kw), theirs[:-1])
    for a, b, w in zip(ours, theirs, start, strict=True):
        assert (a - b).norm() <= 0.01 * (b - w).norm()
    assert torch.equal(ours[-1], start[-1])


def test_what_is_no_matrix_or_has_no_place_is_refused():
    for shape in ((4,), (2, 2, 3, 4), ()):
        with pytest.raises(ValueError, match="matrices"):
            Muon([parameter(4, 4), parameter(*shape)])
    for where, shape in (("", (4, 4)), ("blocks.0", (2, 2, 3, 4))):
        model = tiny_model()
        model.get_submodule(where).odd = parameter(*shape)
        with pytest.raises(ValueError, match="odd"):
            make(model)


def ranks(rank, world, folder):
    """What a rank of test_ranks_agree does: train on its own half of each batch."""
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world)
    torch.save(trained(rank, world), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def trained(rank=0, world=1):
    model, extra = tiny_model(**MIXED), parameter(8, seed=3)
    optimizers = make(model, multipliers=Multipliers(model), extra=[extra])
    for step, batch in enumerate(random_tokens(4, 2, 9, seed=0)):
        share = batch[rank * 2 // world:(rank + 1) * 2 // world]
        (loss_of(model, share) + (share[:, 1:].float().mean(0) @ extra).sum() / 97).backward()
        for p in model.parameters() if world > 1 else ():  # as DDP does
            if p.grad is not None:
                dist.all_reduce(p.grad)
                p.grad /= world
        norm = optimizers.clip(0.5)
        optimizers.step(step)
    return {"model": model.state_dict() | {"extra": extra.detach(), "norm": norm},
            "optimizers": optimizers.state_dict()}


def test_ranks_agree_bit_for_bit_and_go_where_one_process_goes(tmp_path):
    """Weights, the whole state of every optimizer, parameters outside DDP and the clipped norm."""
    torch.multiprocessing.start_processes(ranks, (2, tmp_path), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert same(first, second)
    torch.testing.assert_close(first, trained(), rtol=0.02, atol=2e-3)


# Learnable multipliers
class Scaled(torch.nn.Module):
    """The plain way: W~ = r * W * c formed in the forward pass, gradients by autograd."""

    def __init__(self, W, pieces, kind, placement, config):
        super().__init__()
        self.rows = [rows for _, rows in pieces]
        self.r, self.c = torch.nn.ParameterList(), torch.nn.ParameterList()
        for piece, rows in pieces:
            row, column = place_multipliers(piece, placement, config)
            if kind == "scalar":
                rows, row, column = 1, row or column, False
            self.r.append(torch.nn.Parameter(W.new_ones(rows, 1), requires_grad=row))
            self.c.append(torch.nn.Parameter(W.new_ones(W.shape[1]), requires_grad=column))

    def forward(self, W):
        return torch.cat([r * w * c for r, w, c in zip(self.r, W.split(self.rows), self.c)])


def plain_form(model, kind, placement, optimizer, modules):
    """Give the model multipliers. Returns (leaves by name, {name: Scaled}, the optimizers)."""
    places, logical, scaled = place_parameters(model), logical_pieces(model), {}
    own = dict(model.named_parameters())
    for name in own.keys() & logical.keys():
        if optim.module_of(logical[name][0][0]) in modules:
            module = model.get_submodule(name.removesuffix(".weight"))
            scaled[name] = Scaled(own[name], logical[name], kind, placement, model.config)
            parametrize.register_parametrization(module, "weight", scaled[name])
            own[name] = module.parametrizations.weight.original
    groups = [{"params": [own[n] for n in names], "lr": 0.006 if kind == "embedding" else 0.003,
               "weight_decay": 0.1 if kind in ("hidden", "head") else 0.0}
              for kind, names in places.items()]
    added, made = [v for m in scaled.values() for v in m.parameters() if v.requires_grad], []
    groups.append({"params": added, "lr": 0.01, "weight_decay": 2e-3})
    if optimizer == "muon":
        groups[0]["matrices"] = [[(rows, update_scale(rows, own[n].shape[1]))
                                  for _, rows in logical[n]] for n in places["hidden"]]
        made.append(Muon([groups.pop(0)], dtype=torch.float64))
    made.append(torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-10))
    return own, scaled, made


def pieces_of(sections):
    """A section of one piece for every piece, with its own r and c."""
    return [optim.Section(1, s.rows, *(None if v is None else v.detach()[k] for v in (s.r, s.c)))
            for s in sections for k in range(s.number)]


@pytest.mark.parametrize("optimizer, kind, placement, model_kw, modules", [
    ("adamw", "vector", "all", dict(mlp="swiglu"), ("embedding", "attention", "mlp")),
    ("muon", "vector", "all", dict(qk_norm=True), ("embedding", "attention", "mlp")),
    ("muon", "vector", "symmetry_free", dict(mlp="gelu"), ("embedding", "attention", "mlp")),
    ("adamw", "vector", "all", dict(tie_embeddings=True), ("attention", "mlp")),
    ("adamw", "scalar", "all", {}, ("attention", "head")),
    ("muon", "vector", "all", dict(mixer="hybrid", **SSM), ("attention", "mlp", "ssm")),
    ("adamw", "vector", "symmetry_free", dict(mixer="mamba2", **SSM), ("embedding", "ssm")),
    ("muon", "scalar", "all", dict(mixer="mamba2", **SSM), ("embedding", "ssm"))], ids=str)
def test_multipliers_go_where_the_plain_form_goes(optimizer, kind, placement, model_kw, modules):
    """50 steps with clipping in fp64."""
    model = tiny_model(n_layer=2, **model_kw).double()
    twin = copy.deepcopy(model)
    own, scaled, theirs = plain_form(twin, kind, placement, optimizer, modules)
    multipliers = Multipliers(model, kind, placement, modules)
    ours = make(model, optimizer=optimizer, multipliers=multipliers, lr=0.003, embedding_lr=2.0,
                dtype=torch.float64)
    train(model, ours, 50)
    for batch in random_tokens(50, 2, 9):
        loss_of(twin, batch).backward()
        torch.nn.utils.clip_grad_norm_(own.values(), 0.5)
        for optimizer in theirs:
            optimizer.step()
            optimizer.zero_grad()
    pairs = [(n, multipliers.W.get(n, p), own[n]) for n, p in model.named_parameters()]
    for name, sections in multipliers.sections.items():
        for piece, r, c in zip(pieces_of(sections), scaled[name].r, scaled[name].c, strict=True):
            pairs += [(name, a, b) for a, b in ((piece.r, r[:, 0]), (piece.c, c))
                      if a is not None or b.requires_grad]
    for name, a, b in pairs:
        assert (a - b).norm() < 1e-9 * b.norm(), name
    assert any((v - 1).abs().max() > 0.1 for v in multipliers.named_multipliers().values())


@pytest.mark.exercise("multiplier_gradients")
@pytest.mark.parametrize("number", [(), (3,)], ids=["one", "a stack"])
@pytest.mark.parametrize("rows, columns", [(5, 7), (5, 0), (0, 7), (1, 0)], ids=str)
def test_multiplier_gradients_are_those_of_autograd_and_change_nothing(rows, columns, number):
    """0: this multiplier is not there, and 1 stands in its place."""
    G, W, r, c = (randn(*number, *n, seed=i, dtype=torch.float64) if all(n) else None
                  for i, n in enumerate(((5, 7), (5, 7), (rows,), (columns,))))
    before, given = G.clone(), [t.requires_grad_() for t in (W, r, c) if t is not None]
    product = W * (1 if r is None else r[..., None]) * (1 if c is None else c[..., None, :])
    expected = torch.autograd.grad((product * G).sum(), given)
    found = [t for t in optim.multiplier_gradients(G, W, r, c) if t is not None]
    torch.testing.assert_close(tuple(found), expected)
    assert torch.equal(G, before)


@pytest.mark.parametrize("kw, change", [
    ({}, {}), (dict(mlp="swiglu"), {}), (dict(mlp="gelu"), {"up": "r"}),
    (dict(ssm_norm=False), {"out": "rc"}), (dict(tie_embeddings=True), {"embed": "c"})], ids=str)
def test_placement_of_multipliers_is_that_of_appendix_c(kw, change):
    config, free = ModelConfig(vocab_size=97, **kw), dict(
        embed="rc", q="r", o="rc", gate="r", down="rc", z="r", dt="r", out="r") | change
    for piece in "embed q k v o gate up down z x B C dt out head router affine".split():
        sides = free.get(piece, "")
        found = place_multipliers(piece, "symmetry_free", config)
        assert found == ("r" in sides, "c" in sides), piece
        rows = not (piece == "embed" and config.tie_embeddings)
        assert place_multipliers(piece, "all", config) == (rows, True), piece


@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_multipliers_start_at_the_model_and_fold_to_diagonal_products(kind):
    model = tiny_model(**MIXED)
    before, multipliers = copy.deepcopy(model.state_dict()), Multipliers(model, kind)
    assert not any("norm" in name or "head" in name for name in multipliers.W)
    multipliers.fold()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    for v in multipliers.named_multipliers().values():
        v.data.uniform_(0.5, 2.0)
    multipliers.fold()
    for name, sections in multipliers.sections.items():
        pieces = pieces_of(sections)
        W, folded = (w.view(-1, w.shape[-1]).split([p.rows for p in pieces])
                     for w in (multipliers.W[name], model.get_parameter(name)))
        for (_, rows, r, c), w, found in zip(pieces, W, folded, strict=True):
            right = torch.eye(w.shape[1]) if c is None else torch.diag(c)
            torch.testing.assert_close(found, torch.diag(r.expand(rows)) @ w @ right)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_noise_and_weight_decay_hold_a_matrix_at_the_root_of_their_ratio(optimizer):
    """With random gradients the RMS of W settles at about sqrt(eta / lambda) times a constant."""
    settled = []
    for lr in (0.01, 0.04):
        optimizers = make(model := tiny_model(), optimizer=optimizer, lr=lr, weight_decay=1.0,
                          momentum=0.0, betas=(0.0, 0.95))
        W, squares = model.blocks[0].mlp.up.weight, []
        W.data.zero_()
        for step in range(600):
            W.grad = randn(*W.shape, seed=step)
            optimizers.step(step)
            squares.append(W.detach().square().mean())
        settled.append(torch.stack(squares[300:]).mean().sqrt())
    assert settled[1] / settled[0] == pytest.approx(2, rel=0.04)


@pytest.mark.exercise("Optimizers.clip")
@pytest.mark.parametrize("world", [1, 4])
@pytest.mark.parametrize("max_norm, factor", [(6.5, 0.5), (0.0, 1.0), (13.5, 1.0), (1.0, 1 / 13)])
def test_gradients_are_scaled_together_and_those_of_multipliers_are_not(
        max_norm, factor, world, monkeypatch):
    """p counts in the norm, r does not; their gradients are there once the multipliers have split
    them. Those of `extra`, 12 here and 36 on the other ranks together, are averaged before."""
    p, r, extra, unused = (torch.nn.Parameter(torch.zeros(n)) for n in (2, 1, 1, 1))
    extra.grad = torch.tensor([12.0])

    def split_gradients():
        p.grad, r.grad = torch.tensor([3.0, 4.0]), torch.tensor([5.0])

    monkeypatch.setattr(optim, "dist", SimpleNamespace(
        is_initialized=lambda: world == 4, get_world_size=lambda: world,
        all_reduce=lambda tensor: tensor.add_(36)))
    optimizers = SimpleNamespace(clipped=[p, extra, unused], extra=[extra, unused],
                                 multipliers=SimpleNamespace(split_gradients=split_gradients))
    norm = Optimizers.clip(optimizers, max_norm)
    assert norm.shape == () and norm.item() == pytest.approx(13)
    found = *p.grad.tolist(), extra.grad.item(), r.grad.item()
    assert found == pytest.approx((3 * factor, 4 * factor, 12 * factor, 5), rel=1e-5)
    optimizers.multipliers, optimizers.extra = None, []
    assert Optimizers.clip(optimizers, 0.0).item() == pytest.approx(13 * factor, rel=1e-5)


def test_on_request_the_gradients_of_multipliers_count_in_the_norm():
    model = tiny_model()
    multipliers = Multipliers(model)
    loss_of(model, random_tokens(1, 2, 9)[0]).backward()
    without, norm = (make(model, multipliers=multipliers, clip_multipliers=both).clip(0.0).item()
                     for both in (False, True))
    added = sum(v.grad.square().sum() for v in multipliers.named_multipliers().values()).item()
    assert norm**2 == pytest.approx(without**2 + added) and added > 0.01 * without**2


# Where each parameter goes, and settings by the size of the model
@pytest.mark.parametrize("kw", [{}, dict(tie_embeddings=True), MIXED], ids=str)
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_every_parameter_has_one_place_and_only_matrices_and_head_decay(optimizer, kw):
    """Without gradients to speak of, a step shows the decay alone; modules have own factors."""
    model = tiny_model(**kw)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers = make(model, optimizer=optimizer, lr=0.1, weight_decay=0.5, embedding_lr=3.0,
                      module_lr={"mlp": 2.0}, module_decay={"attention": 0.2})
    held = [p for o in optimizers.optimizers.values() for g in o.param_groups for p in g["params"]]
    assert sorted(map(id, held)) == sorted(map(id, model.parameters()))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizers.step(0)
    groups, tied = groups_by_name(optimizers), "tie_embeddings" in kw
    for name, p in model.named_parameters():  # a tied matrix moves at the head's rate
        lr = 0.2 if ".mlp." in name and "router" not in name else 0.1
        if name == "embed.weight" and not tied:
            lr = 0.3
        assert groups[name]["lr"] == pytest.approx(lr), name
        decays = p.ndim > 1 and name != "embed.weight" and "conv" not in name
        kept = 1 - decays * lr * (0.1 if ".attention." in name else 0.5)
        torch.testing.assert_close(p.detach(), kept * before[name], msg=name)


def test_adam_walks_as_in_the_other_form_of_the_same_parametrization():
    """A factor on the output, or a head whose values, rate and decay have it (Yang et al. 2022,
    lemma J.1); likewise 1 / m_L. An epsilon of the size of the gradients, so that it counts."""
    m_N, m_L, lr, decay, eps = 4.0, 3.0, 0.01, 0.3, 0.02
    model = tiny_model(n_layer=2, width_ratio=m_N, depth_ratio=m_L, **MIXED).double()
    twin, factors, groups = tiny_model(n_layer=2, **MIXED).double(), {}, []
    for name, p in model.named_parameters():
        factor, rest = 1.0, (lr / m_N, decay * m_N, eps / m_N / m_L)
        if name == "embed.weight":
            rest = 5 * lr, 0.0, eps / m_N
        elif name == "head.weight":
            factor, rest = 1 / m_N, (lr / m_N, decay * m_N, eps)
        elif p.ndim == 1 or "conv" in name:
            rest = lr, 0.0, eps / m_N / (1 if name == "norm.weight" else m_L)
        elif "router" in name:
            rest = lr / m_N, decay * m_N, eps / m_L
        elif name.endswith((".o.weight", ".out.weight", ".mlp.down")):
            factor, rest = 1 / m_L, (lr / m_N / m_L, decay * m_N * m_L, eps / m_N)
        other, factors[name] = twin.get_parameter(name), factor
        other.data.copy_(factor * p)
        groups.append({"params": [other], "lr": rest[0], "weight_decay": rest[1], "eps": rest[2]})
    theirs = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    ours = make(model, optimizer="adamw", weight_decay=decay, embedding_lr=5.0, eps=eps)
    for step, batch in enumerate(random_tokens(20, 2, 9)):
        loss_of(model, batch).backward()
        ours.step(step)
        loss_of(twin, batch).backward()
        theirs.step()
        theirs.zero_grad()
    for name, p in twin.named_parameters():
        expected = factors[name] * model.get_parameter(name)
        torch.testing.assert_close(p, expected, atol=1e-10, rtol=1e-7, msg=name)


@pytest.mark.exercise("grown_scale")
@pytest.mark.parametrize("head_ratio, expected", [
    (1.0, (0.8, 0.5, 0.5)),  # the base has width 64, 2 heads, 2 of keys: k and v are (64, 64)
    (4.0, (1.6, 1.0, 0.5)),  # width 64, 8 heads, 2 of keys: (16, 64)
    (2.0, (1.6 * 2**-0.5, 2**-0.5, 0.5))], ids=str)  # width 64, 4 heads, 2 of keys: (32, 64)
def test_with_grouped_queries_keys_and_values_grow_as_their_own_rows_do(head_ratio, expected):
    """kappa of the base's matrix times the growth of sqrt(out / in); k and v are (64, 256) here."""
    config = ModelConfig(vocab_size=61, n_layer=1, n_embd=256, n_head=8, n_kv_head=2,
                         width_ratio=4.0, head_ratio=head_ratio)
    for convention, scale, square in zip(SCALES, expected, (1.6, 1.0, 1.0), strict=True):
        for piece, rows, kappa in (("q", 256, square), ("k", 64, scale), ("v", 64, scale)):
            found = optim.grown_scale(config, piece, rows, 256, convention)
            assert found == pytest.approx(kappa)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("base, size", [
    (dict(n_head=2, n_kv_head=2), dict(n_head=2, n_kv_head=2, head_ratio=4.0)),
    (dict(n_head=2, n_kv_head=2), dict(n_head=8, n_kv_head=4, head_ratio=1.0)),
    (dict(n_head=4, n_kv_head=2), dict(n_head=8, n_kv_head=2, head_ratio=2.0))], ids=str)
def test_muons_update_has_the_norm_of_the_spectral_condition(scale, base, size, monkeypatch):
    """At 4 times the width the spectral norm of every update grows as sqrt(out / in) over the base
    model, which is built here; with an exact polar factor in place of Newton-Schulz."""
    def polar(G, **_):
        U, _, V = torch.linalg.svd(G, full_matrices=False)
        return U @ V

    monkeypatch.setattr(optim, "newton_schulz", polar)
    norms = []
    for width, kw in ((32, base), (128, size | dict(width_ratio=4.0))):
        model = tiny_model(**MIXED, **kw, n_layer=1, n_embd=width, mlp="swiglu",
                           mlp_hidden=3 * width)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        make(model, lr=0.1, weight_decay=0.5, muon_scale=scale).step(0)
        places, found = place_parameters(model), {}
        for name in places["hidden"] + places["router"]:
            change = model.get_parameter(name).detach() - (1 - 0.1 * 0.5) * before[name]
            pieces = logical_pieces(model)[name]
            parts = change.view(-1, change.shape[-1]).split([rows for _, rows in pieces])
            found |= {piece: (torch.linalg.matrix_norm(part, 2).item(), part.shape)
                      for (piece, _), part in zip(pieces, parts, strict=True)}
        norms.append(found)
    assert set(norms[0]) == set("q k v o z x B C dt out router gate up down".split())
    for piece, (norm, (rows, columns)) in norms[0].items():
        grown, (m, n) = norms[1][piece]
        assert norm == pytest.approx(0.1 * update_scale(rows, columns, scale), rel=1e-3), piece
        assert grown / norm == pytest.approx(math.sqrt(m / n / (rows / columns)), rel=1e-3), piece


def test_factors_of_modules_are_read_or_refused_by_name():
    assert optim.module_factors("") == {}
    assert optim.module_factors("head=0.5,mlp=2") == {"head": 0.5, "mlp": 2.0}
    for text in ("nose=1", "mlp=x", "mlp", "head=-1", "head=inf", "head=nan", "head=1,mlp=1,mlp=2"):
        with pytest.raises(ValueError, match=text.split(",")[-1]):
            optim.module_factors(text)


# Schedules, clipping, and all of it in a run
@pytest.mark.exercise("wsd")
@pytest.mark.parametrize("name, steps, warmup, decay_fraction, table", [
    ("constant", 100, 10, 0.4, {0: 0.1, 4: 0.5, 9: 1, 10: 1, 99: 1}),
    ("cosine", 100, 10, 0.4, {0: 0.1, 4: 0.5, 10: 1, 40: 0.775, 55: 0.55, 70: 0.325, 100: 0.1}),
    ("cosine", 90, 0, 0.0, {0: 1, 30: 0.775, 60: 0.325}),
    ("wsd", 100, 10, 0.4, {0: 0.1, 4: 0.5, 9: 1, 60: 1, 61: 0.975, 80: 0.5, 100: 0, 150: 0}),
    ("wsd", 10, 8, 1.0, {0: 0.125, 4: 0.6, 9: 0.1}),  # the smaller of the two where they overlap
    ("wsd", 10, 0, 0.25, {7: 1, 8: 0.8, 9: 0.4}),  # a decay of 2.5 steps
    ("wsd", 10, 2, 0.0, {0: 0.5, 2: 1, 9: 1, 10: 1}),
    ("wsd", 1000, 2, 5e-4, {998: 1, 999: 1, 1000: 0}),  # a decay of half a step
    ("wsd_sqrt", 100, 10, 0.4, {4: 0.5, 60: 1, 70: 0.5, 96: 1 - 0.9**0.5, 100: 0}),
    ("wsd_exponential", 100, 10, 0.4, {4: 0.5, 60: 1, 68: 0.5, 76: 0.25, 100: 1 / 32})])
def test_a_schedule_has_the_factors_by_hand(name, steps, warmup, decay_fraction, table):
    schedule = optim.make_schedule(name, steps, warmup, decay_fraction)
    for step, factor in table.items():
        assert schedule(step) == pytest.approx(factor, abs=1e-12), step


def test_a_step_follows_the_schedule():
    """Multipliers have a learning rate of their own, which is the same at any size of the model."""
    model, extra = tiny_model(width_ratio=4.0, depth_ratio=2.0), parameter(3)
    optimizers = make(model, optim.make_schedule("wsd", 10, 2, 0.5), lr=0.2, embedding_lr=3.0,
                      multipliers=Multipliers(model), multiplier_lr=0.04, extra=[extra], eps=1e-8)
    for step, factor in enumerate((0.5, 1, 1, 1, 1, 1, 0.8, 0.6)):
        extra.grad = torch.ones(3)
        train(model, optimizers, 1, first=step)
        groups = groups_by_name(optimizers)
        assert optimizers.lr == pytest.approx(0.2 * factor)
        assert groups["head.weight"]["lr"] == groups["0"]["lr"] == optimizers.lr
        assert groups["embed.weight"]["lr"] == pytest.approx(0.6 * factor)
        made = groups["embed.weight:0.r"]
        assert (made["lr"], made["eps"]) == pytest.approx((0.04 * factor, 1e-8 / 8))
        assert extra.grad is None and all(p.grad is None for p in model.parameters())


def restarted(model, optimizers, kind=None, **kw):
    """A copy from what torch.save writes, with settings of its own; and what the loading says."""
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizers": optimizers.state_dict()}, file)
    state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    twin = GPT(model.config)
    twin.load_state_dict(state["model"])
    made = make(twin, multipliers=Multipliers(twin, kind) if kind else None, **kw)
    return twin, made, made.load_state_dict(state["optimizers"])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("kind", [None, "vector"])
def test_a_run_goes_on_bit_for_bit_from_a_stored_state(optimizer, kind):
    """By names, so parameters may be grouped otherwise now; under the settings given now."""
    model, kw = tiny_model(), dict(optimizer=optimizer)
    optimizers = make(model, multipliers=Multipliers(model, kind) if kind else None, **kw)
    train(model, optimizers, 3)
    twin, again, known = restarted(model, optimizers, kind=kind, **kw)
    _, faster, _ = restarted(model, optimizers, kind=kind, module_lr={"mlp": 2.0}, **kw)
    assert known and groups_by_name(faster)["blocks.0.mlp.up.weight"]["lr_factor"] == 2.0
    for net, made in ((model, optimizers), (twin, again)):
        train(net, made, 3, first=3)
    assert same(model.state_dict(), twin.state_dict())
    assert same(optimizers.state_dict(), again.state_dict())


def test_other_multipliers_begin_at_1_and_the_rest_goes_on():
    model = tiny_model()
    optimizers = make(model, multipliers=Multipliers(model, "vector"))
    train(model, optimizers, 3)
    twin, again, known = restarted(model, optimizers, kind="scalar")
    new = again.state_dict()
    assert not known and not new["multipliers"]
    assert new["muon"].keys() == optimizers.state_dict()["muon"].keys()
    assert all((v == 1).all() for v in again.multipliers.named_multipliers().values())
    assert all(torch.equal(W, twin.get_parameter(n)) for n, W in again.multipliers.W.items())


def test_a_state_loads_with_and_without_the_parameters_of_terms():
    model, extra = tiny_model(), parameter(4, 3)
    for before, after in (([extra], []), ([], [extra]), ([extra], [parameter(4, 3)])):
        optimizers = make(model, extra=before)
        extra.grad = torch.ones(4, 3)
        train(model, optimizers, 1)
        _, again, _ = restarted(model, optimizers, extra=after)
        kept = again.state_dict().get("extra", {})
        assert bool(kept) == bool(before and after)
        assert not kept or kept["0"]["exp_avg"].any()
