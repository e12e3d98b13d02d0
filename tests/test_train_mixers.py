"""Every kind of block with every optimizer, with multipliers and a teacher, on one rank and on two."""
import pytest
import torch
from conftest import ROOT, flags_of, run_python
from test_train import lines, losses, same, state, stop_at

import train as t
from model import generate, load_checkpoint, model_from_checkpoint

SSM = dict(d_state=8, ssm_head_dim=16, chunk_size=8)
KINDS = {"attention": {}, "mamba2": dict(SSM, mixer="mamba2"), "hybrid": dict(SSM, mixer="hybrid"),
         "pattern": dict(SSM, layer_pattern="MA"), "experts": dict(n_experts=4, mlp="swiglu"),
         "hybrid-experts": dict(SSM, mixer="hybrid", n_experts=3, experts_per_token=1, n_groups=2)}
# All pairs of kind, optimizer, multipliers, teacher and ranks are in here.
PAIRS = [("attention", "muon", "scalar", True, 2), ("attention", "adamw", "none", False, 1),
         ("mamba2", "muon", "none", False, 1), ("mamba2", "adamw", "vector", True, 2), ("mamba2", "muon", "scalar", True, 1),
         ("hybrid", "muon", "vector", False, 2), ("hybrid", "adamw", "scalar", True, 1),
         ("pattern", "adamw", "none", True, 2), ("pattern", "muon", "vector", False, 1),
         ("experts", "muon", "none", True, 2), ("experts", "adamw", "scalar", False, 1), ("experts", "muon", "vector", True, 1),
         ("hybrid-experts", "muon", "scalar", False, 2), ("hybrid-experts", "adamw", "vector", True, 1)]


@pytest.mark.parametrize("kind, optimizer, multipliers, teacher, ranks", PAIRS)
def test_all_kinds_train_save_resume_and_sample(tiny, tmp_path, kind, optimizer, multipliers, teacher, ranks):
    flags = dict(KINDS[kind], optimizer=optimizer, multipliers=multipliers, micro_batch=2, lr=0.01)
    if teacher:
        path = t.train(tiny(n_embd=16, n_layer=1, n_head=1, steps=5, seed=9, out_dir=str(tmp_path / "teacher")))["checkpoint"]
        flags |= dict(teacher=path, let_student_layer=1, let_weight=1.0, let_stop=8)
    if (len(kind) + ranks + teacher) % 2:
        flags |= dict(linearity="cosine" if teacher else "mse", linearity_weight=0.01)
    straight = t.train(tiny(**flags, out_dir=str(tmp_path / "straight")))
    history = losses(straight["history"])
    assert history[10, "val_loss"] < history[0, "val_loss"] - 0.1
    halved = tiny(**flags, out_dir=str(tmp_path / "halved"))
    ckpt = stop_at(halved, 5)
    t.train(t.parse_flags([f"--resume={ckpt}"]))
    assert same(state(straight["checkpoint"]), state(ckpt))
    if ranks > 1:
        c = tiny(**flags, out_dir=str(tmp_path / "ranks"))
        done = run_python(ROOT / "train.py", *flags_of(c), ranks=ranks)
        assert done.returncode == 0, done.stderr
        other = losses(lines(tmp_path / "ranks"))
        assert max(abs(history[k] - other[k]) for k in history) < 1e-4
    model = model_from_checkpoint(load_checkpoint(ckpt)).eval()
    idx = torch.tensor([[256, 100, 101]])
    assert torch.equal(generate(model, idx, 8), generate(model, idx, 8, use_cache=False))


def test_experts_are_logged_and_their_load_is_the_whole_batchs(tiny, tmp_path):
    one = t.train(tiny(**KINDS["experts"], micro_batch=2, out_dir=str(tmp_path / "one")))
    whole = t.train(tiny(**KINDS["experts"], micro_batch=8, out_dir=str(tmp_path / "whole")))
    for a, b in zip(one["history"], whole["history"]):
        if "expert_load" in a:
            assert len(a["expert_load"]) == 2 and all(sum(load) == pytest.approx(1.0) for load in a["expert_load"])
            assert torch.allclose(torch.tensor(a["expert_load"]), torch.tensor(b["expert_load"]), atol=0.01)
            assert a["balance_loss"] > 0.9 and a["experts_unused"] == sum(x == 0 for load in a["expert_load"] for x in load)


def test_a_large_balance_weight_evens_the_load(tiny, tmp_path):
    ends = []
    for weight in (0.0, 1.0):
        history = t.train(tiny(**KINDS["experts"], steps=40, eval_every=40, balance_weight=weight, router_z_weight=0.0,
                               lr=0.02, out_dir=str(tmp_path / str(weight))))["history"]
        ends.append([h for h in history if "expert_load" in h][-1]["expert_load"])
    assert torch.tensor(ends[1]).std() < 0.5 * torch.tensor(ends[0]).std()


@pytest.mark.parametrize("flags, message", [
    (dict(mixer="mamba2", ssm_head_dim=24), "--n_embd=32 --expand=2 --ssm_head_dim=24: n_embd * expand must be a multiple"),
    (dict(mixer="mamba2", ssm_head_dim=16, n_groups=3), "--n_groups=3: does not divide the 4 heads of Mamba-2"),
    (dict(n_experts=4, experts_per_token=5), "--experts_per_token=5 --n_experts=4: more than there are"),
    (dict(layer_pattern="MAX", n_layer=3), "--layer_pattern=MAX: letters A (attention), M (mamba2) and H (hybrid)"),
    (dict(layer_pattern="MA", n_layer=3), "--layer_pattern=MA --n_layer=3: 2 letters for 3 blocks"),
    (dict(layer_pattern="MA", mixer="hybrid"), "--layer_pattern=MA --mixer=hybrid: each says what the blocks are"),
    (dict(mixer="mamba2", ssm_head_dim=16, n_experts=4), "experts stand in place of MLPs"),
    (dict(d_state=128), "--d_state=128: is a setting of Mamba-2, and no block has it"),
    (dict(experts_per_token=3), "--experts_per_token=3: has no effect without --n_experts"),
    (dict(mixer="mamba2", d_state=0), "--d_state=0: at least 1"), (dict(n_experts=-1), "--n_experts=-1: must not be negative")])
def test_shapes_that_do_not_fit_are_refused(tiny, flags, message):
    with pytest.raises(t.BadInput) as error:
        t.check(tiny(**flags))
    assert message in str(error.value)
