"""--param: the standard model at the base size; its factors against the papers' tables, against the same model with its scales
folded into the weights, and against what they are for: activations that move as much at every width and depth."""
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import optim
import train
from lr_law import coordinate_check, main, slope
from model import GPT, BadInput, ModelConfig, load_checkpoint, model_from_checkpoint
from optim import make_optimizers, muon_scale

torch.set_num_threads(1)
MIXED = dict(mixer="hybrid", n_experts=4, d_state=8, ssm_head_dim=16, chunk_size=8)


def config(**kw) -> ModelConfig:
    return ModelConfig(**{**dict(vocab_size=61, block_size=16, n_layer=2, n_embd=32, n_head=2, n_kv_head=2), **kw})


def randomised(c: ModelConfig, seed=0) -> GPT:
    """Double, and no zero weights, so that every scale matters."""
    torch.manual_seed(seed)
    model = GPT(c).double()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2) if p.ndim > 1 else p.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize("flags", [{}, dict(optimizer="adamw", multipliers="vector", weight_decay=0.5, **{
    k: v for k, v in MIXED.items() if k != "chunk_size"})], ids=["muon", "all"])
def test_at_the_base_size_every_parametrisation_is_the_standard_model(tiny, tmp_path, flags):
    seen = []
    for param, base in (("standard", {}), ("mup", dict(base_n_embd=32)), ("completep", dict(base_n_embd=32, base_n_layer=2))):
        out = train.train(tiny(param=param, steps=4, eval_every=4, out_dir=str(tmp_path / param), **base, **flags))
        ckpt = load_checkpoint(out["checkpoint"])
        seen.append((out["val_loss"], [h.get("train_loss") for h in out["history"]], ckpt["model"], ckpt["optimizers"][0]["param_groups"]))
    for val_loss, losses, weights, groups in seen[1:]:
        assert (val_loss, losses, groups) == (seen[0][0], seen[0][1], seen[0][3])
        assert all(torch.equal(w, seen[0][2][name]) for name, w in weights.items())


def folded(model: GPT) -> GPT:
    """The standard model that computes the same: 1 / m_L in what writes into the stream, m_D^-1/2 in q, 1 / m_N in the
    head."""
    c = model.config
    twin = GPT(replace(c, width_ratio=1.0, depth_ratio=1.0, head_ratio=1.0)).double()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, p in twin.named_parameters():
            if name.endswith((".o.weight", ".down.weight", ".out.weight", ".mlp.down")):
                p /= c.depth_ratio
            elif name.endswith(".qkv.weight"):
                p[:c.n_embd] /= c.head_ratio ** 0.5
            elif name == "head.weight":
                p /= c.width_ratio
    return twin


@pytest.mark.parametrize("kw", [dict(), MIXED, dict(layer_pattern="MA", d_state=8, ssm_head_dim=16)], ids=str)
def test_the_forward_pass_is_that_of_a_standard_model_with_the_scales_in_its_weights(kw):
    model = randomised(config(width_ratio=4.0, depth_ratio=3.0, head_ratio=2.0, qk_norm=False, **kw)).eval()
    idx = torch.randint(61, (2, 17), generator=torch.Generator().manual_seed(1))
    twin = folded(model).eval()
    torch.testing.assert_close(model(idx[:, :-1])[0], twin(idx[:, :-1])[0], atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(model(idx[:, :-1], idx[:, 1:])[0], twin(idx[:, :-1], idx[:, 1:])[0])
    assert not torch.allclose(model(idx[:, :-1])[0], GPT.forward(randomised(config(qk_norm=False, **kw)).eval(), idx[:, :-1])[0])


def test_adam_walks_as_in_the_other_form_of_the_same_parametrisation():
    """A factor on the output, or a head whose values, rate and weight decay have it (Yang et al. 2022, lemma J.1: values and
    rate over c, decay and epsilon times c); likewise 1 / m_L. Rates of the other form as its papers tabulate them; an
    epsilon of the size of the gradients, so that it counts."""
    m_N, m_L, lr, decay, eps = 4.0, 3.0, 0.01, 0.3, 0.02
    model = randomised(config(width_ratio=m_N, depth_ratio=m_L, qk_norm=False))
    twin, idx = folded(model), torch.randint(61, (20, 2, 17), generator=torch.Generator().manual_seed(1))
    optimizers = make_optimizers(model, optimizer="adamw", lr=lr, weight_decay=decay, embedding_lr=5.0, eps=eps)

    def settings(name):
        if name == "embed.weight":
            return 5 * lr, 0.0, eps / m_N
        if name == "head.weight":
            return lr / m_N, decay * m_N, eps
        if name == "norm.weight":
            return lr, 0.0, eps / m_N
        if "norm" in name:
            return lr, 0.0, eps / m_N / m_L
        if name.endswith((".o.weight", ".down.weight")):
            return lr / m_N / m_L, decay * m_N * m_L, eps / m_N
        return lr / m_N, decay * m_N, eps / m_N / m_L

    other = torch.optim.AdamW([dict(zip(("params", "lr", "weight_decay", "eps"), ([p], *settings(name))))
                               for name, p in twin.named_parameters()], betas=(0.9, 0.95))
    before = {name: p.detach().clone() for name, p in twin.named_parameters()}
    for batch in idx:
        for net, some in ((model, optimizers), (twin, [other])):
            logits, _ = net(batch[:, :-1])
            F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
            for o in some:
                o.step()
                o.zero_grad()
    expected = dict(folded(model).named_parameters())
    for name, p in twin.named_parameters():
        torch.testing.assert_close(p, expected[name], atol=1e-10, rtol=1e-7, msg=name)
        assert (p - before[name]).abs().max() > 1e-3, name


def test_initialisation_by_width():
    """Standard deviations at 8 times the base's width of 16, each as muP has it, with our 0.1 on head and router."""
    for tied in (False, True):
        torch.manual_seed(0)
        model = GPT(config(n_embd=128, width_ratio=8.0, depth_ratio=5.0, head_ratio=8.0, tie_embeddings=tied, vocab_size=500,
                           **MIXED | dict(d_state=32)))
        std = {name: p.std().item() for name, p in model.named_parameters()}
        block = {name.removeprefix("blocks.0."): s for name, s in std.items()}
        assert std["embed.weight"] == pytest.approx(0.1 * 16**-0.5 if tied else 1.0, rel=0.02)
        assert tied or std["head.weight"] == pytest.approx(0.1 * 16**-0.5, rel=0.02)
        assert (block["mixer.qkv.weight"], block["mlp.up"]) == pytest.approx((128**-0.5, 128**-0.5), rel=0.03)
        assert block["mlp.router.weight"] == pytest.approx(0.1 * 16**-0.5 / 8, rel=0.1)
        assert block["mixer.o.weight"] == block["ssm.out.weight"] == block["mlp.down"] == 0
        z, x, B, C, dt = model.blocks[0].ssm.in_proj.weight.split(tuple(model.blocks[0].ssm.in_proj.pieces.values()))
        for part in (z, x, dt):
            assert part.std().item() == pytest.approx(128**-0.5, rel=0.08)
        for part in (B, C):
            assert part.std().item() == pytest.approx(16**-0.5 / 8, rel=0.05)


def test_adams_rates_decays_and_epsilons_by_size():
    """Every tensor of a model with everything in it, against the papers' factors by its name."""
    model = GPT(config(n_embd=64, width_ratio=4.0, depth_ratio=3.0, **MIXED))
    groups = [g for o in make_optimizers(model, optimizer="adamw", lr=0.01, weight_decay=0.1, embedding_lr=2.0, eps=1e-8)
              for g in o.param_groups]
    of = {id(p): g for g in groups for p in g["params"]}
    assert sum(len(g["params"]) for g in groups) == len(of) == len([*model.parameters()]), "placed exactly once"
    for name, p in model.named_parameters():
        lr, decay, eps = of[id(p)]["lr"], of[id(p)]["weight_decay"], of[id(p)]["eps"]
        if name.startswith("blocks.") and p.ndim in (2, 3) and "conv" not in name:
            assert (lr, decay) == pytest.approx((0.01 / 4, 0.1 * 4)), name
            assert eps == pytest.approx(1e-8 / 3 if "router" in name else 1e-8 / 12), name
        else:
            assert lr == pytest.approx(0.02 if name == "embed.weight" else 0.01), name
            assert decay == (0.1 if name == "head.weight" else 0.0), name
            assert eps == pytest.approx(1e-8 / 12 if name.startswith("blocks.") else 1e-8 / 4), name


@pytest.mark.parametrize("scale", ["match_rms_adamw", "original", "spectral"])
def test_muons_update_has_the_norm_of_the_spectral_condition(scale, monkeypatch):
    """At 4 times the width every hidden matrix moves by a spectral norm of the base's, a matrix of fixed rows by 4^-1/2 of
    it, whatever the convention; with an exact polar factor in place of Newton-Schulz. The decay is the same."""
    def polar(G, *_):
        U, _, V = torch.linalg.svd(G, full_matrices=False)
        return U @ V

    monkeypatch.setattr(optim, "newton_schulz", polar)
    norms = []
    for width, ratio in ((32, 1.0), (128, 4.0)):
        torch.manual_seed(0)
        model = GPT(config(n_embd=width, width_ratio=ratio, mlp_hidden=3 * width, **MIXED))
        muon = make_optimizers(model, lr=0.1, weight_decay=0.5, scale=scale)[0]
        names, found = {id(p): n for n, p in model.named_parameters()}, {}
        for g in muon.param_groups:
            for p, pieces in zip(g["params"], g["pieces"]):
                before = p.detach().clone()
                p.grad = torch.randn_like(p)
                labels = [piece for piece, _ in optim.logical_pieces(model)[names[id(p)]]]
                found[p] = before, labels, pieces
        muon.step()
        one = {}
        for p, (before, labels, pieces) in found.items():
            change = (p.detach() - (1 - 0.1 * 0.5) * before).view(-1, p.shape[-1]).split(pieces)
            for label, part in zip(labels, change):
                one[label] = torch.linalg.matrix_norm(part, 2).item(), part.shape
        norms.append(one)
    assert set(norms[0]) == {"q", "k", "v", "o", "z", "x", "B", "C", "dt", "out", "router", "up", "gate", "down"}
    for label, (norm, shape) in norms[0].items():
        by_hand = {"match_rms_adamw": 0.2 * max(shape) ** 0.5, "original": max(1, shape[0] / shape[1]) ** 0.5,
                   "spectral": (shape[0] / shape[1]) ** 0.5}[scale]
        assert norm == pytest.approx(0.1 * by_hand, rel=1e-3), label
        assert norms[1][label][0] == pytest.approx(norm / 2 if label in ("router", "B", "C") else norm, rel=1e-3), label
        assert norms[1][label][1] == ((shape[0] if label in ("router", "B", "C") else 4 * shape[0]), 4 * shape[1])


def test_muon_scale_at_the_base_is_the_convention():
    for kind in ("match_rms_adamw", "original", "spectral"):
        assert muon_scale(48, 16, kind, (1.0, 1.0)) == muon_scale(48, 16, kind)
        assert muon_scale(96, 32, kind, (2.0, 2.0)) == muon_scale(48, 16, kind)
    assert muon_scale(4, 64, "spectral", (1.0, 16.0)) == pytest.approx((4 / 64) ** 0.5)


def test_multipliers_keep_their_rate_at_any_size():
    model = GPT(config(width_ratio=4.0, depth_ratio=2.0))
    multipliers = optim.Multipliers(model)
    group = make_optimizers(model, multipliers, "adamw", lr=0.01, multiplier_lr=0.03, eps=1e-8)[-1].param_groups[0]
    assert group["lr"] == pytest.approx(0.03) and group["eps"] == pytest.approx(1e-8 / 8)


def moves(sizes, **flags):
    c = train.Config(tokenizer="bytes", n_head=2, **flags)
    return [coordinate_check(replace(c, n_layer=layers, n_embd=width), steps=4) for layers, width in sizes]


@pytest.mark.parametrize("flags, steep", [
    (dict(optimizer="adamw", lr=3e-3), ("attention", "mlp", "logits")), (dict(lr=1e-2), ("attention", "mlp", "logits")),
    (dict(lr=0.05, muon_scale="original"), ("logits",)),  # whose hidden matrices need no rule
    (dict(lr=0.02, mixer="hybrid", ssm_head_dim=16, d_state=8), ("attention", "ssm", "logits"))],
    ids=["adamw", "muon", "muon-original", "hybrid"])
def test_activations_move_alike_at_every_width(flags, steep):
    """From 32 to 128: flat under muP, and not in the standard model."""
    mup, standard = (moves([(2, 32), (2, 128)], **flags, **more) for more in (dict(param="mup", base_n_embd=32), {}))
    for kind in mup[0]:
        assert abs(slope([32, 128], [m[kind] for m in mup])) < 0.25, kind
    for kind in steep:
        assert slope([32, 128], [m[kind] for m in standard]) > 0.4, kind


def test_activations_move_alike_at_every_depth():
    """From 2 to 8 blocks: flat under CompleteP; under muP alone the stream moves the more, the deeper."""
    flags = dict(optimizer="adamw", lr=3e-3, base_n_embd=32)
    completep, mup = (moves([(2, 32), (8, 32)], **flags, **more) for more in (
        dict(param="completep", base_n_layer=2), dict(param="mup")))
    for kind in completep[0]:
        assert abs(slope([2, 8], [m[kind] for m in completep])) < 0.15, kind
    assert slope([2, 8], [m["stream"] for m in mup]) > 0.25


def test_coordcheck_prints_a_table_and_draws_it(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    main(["coordcheck", "--widths=16,32", "--depths=1,2", "--params=mup,completep", "--seeds=1", "--steps=3", f"--plot={tmp_path}/check.png", "--", "--lr=0.01"])
    out = capsys.readouterr().out
    assert "over width (1 blocks)" in out and "over depth (width 16)" in out
    assert sum(line.split()[:2] == ["completep", "logits"] for line in out.splitlines()) == 2
    assert (tmp_path / "check.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("words, message", [
    (["--widths=a"], "--widths=a"), (["--widths=64", "--depths="], "two of one at least"), (["--steps=2"], "--steps=2"),
    (["--params=mu"], "--param=mu: one of standard, mup, completep"), (["--widths=15,30"], "--n_embd=15 --n_head=2"),
    (["--", "--stepz=1"], "--stepz: no such flag")])
def test_coordcheck_refuses_what_cannot_be(words, message):
    with pytest.raises(BadInput) as error:
        main(["coordcheck", *words])
    assert message in str(error.value)


def test_a_run_goes_on_with_its_parametrisation_and_no_other(tiny, tmp_path, capsys):
    flags = dict(param="completep", base_n_embd=16, base_n_layer=1, steps=6, eval_every=3, save_every=3, multipliers="scalar")
    whole = train.train(tiny(**flags, out_dir=str(tmp_path / "whole")))
    half = train.train(tiny(**flags | dict(steps=3), decay_fraction=0.0, out_dir=str(tmp_path / "half")))
    path = half["checkpoint"]
    for words, message in ((["--param=standard", "--base_n_embd=192", "--base_n_layer=4"], "--param=completep there, standard here"),
                           (["--base_n_embd=32"], "--base_n_embd=16 there, 32 here")):
        with pytest.raises(BadInput, match=message):
            train.train(train.parse_flags([f"--resume={path}", "--steps=6", *words]))
    rest = train.train(train.parse_flags([f"--resume={path}", "--steps=6", "--decay_fraction=0.6"]))
    assert rest["step"] == whole["step"] == 6
    model = model_from_checkpoint(load_checkpoint(whole["checkpoint"]))
    assert (model.config.width_ratio, model.config.depth_ratio, model.config.head_ratio) == (2.0, 2.0, 2.0)
    assert (model.norm.scale, model.blocks[0].scale, model.blocks[0].mixer.scale) == (0.5, 0.5, (16 * 2) ** -0.5)


@pytest.mark.parametrize("flags, message", [
    (dict(base_n_embd=64), "--base_n_embd=64 --param=standard: has no effect"),
    (dict(param="mup", base_n_layer=2), "--base_n_layer=2 --param=mup: has no effect"),
    (dict(param="mup", base_n_embd=0), "--base_n_embd=0 --base_n_layer=4 --base_n_head=0: the size of a model"),
    (dict(param="mu"), "--param=mu: one of standard, mup, completep"), (dict(adam_eps=0.0), "--adam_eps=0.0: must be positive")])
def test_parametrisations_that_cannot_be_are_refused(tiny, flags, message):
    with pytest.raises(BadInput) as error:
        train.check(tiny(**flags))
    assert message in str(error.value)
