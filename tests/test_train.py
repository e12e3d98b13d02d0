"""The run: the loop, LET in it, resuming, killing, several ranks, signals, what is logged and saved."""
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, flags_of, run_python

import train as t
from model import load_checkpoint, model_from_checkpoint
from teacher import LET


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(history):
    return {(h["step"], k): h[k] for h in history for k in ("train_loss", "val_loss", "let_cosine") if k in h}


def same(a, b):
    """Bitwise equality of nested checkpoints, tensors included."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def state(path):
    """What must not depend on how a run came to its step: all but the clock, the flags and the provenance."""
    ckpt = load_checkpoint(path)
    return {k: v for k, v in ckpt.items() if k not in ("config", "seconds", "provenance")}


@pytest.fixture
def small_teacher(tiny, tmp_path):
    """A checkpoint of ours, narrower than the student, on the same tokens."""
    return t.train(tiny(n_embd=16, n_layer=1, steps=20, seed=9, out_dir=str(tmp_path / "teacher")))["checkpoint"]


def test_loss_falls_and_everything_is_written(tiny):
    result = t.train(tiny(steps=60, eval_every=20, lr=0.02))
    out = t.Path(result["out_dir"])
    assert sorted(p.name for p in out.iterdir()) == ["ckpt.pt", "config.json", "metrics.jsonl"]
    evals = [h["val_loss"] for h in lines(out) if "val_loss" in h]
    assert evals[0] == pytest.approx(math.log(257), rel=0.01)
    assert evals[0] > evals[1] > evals[-1] and evals[-1] < 0.6 * evals[0]
    assert lines(out) == result["history"]
    config = json.loads((out / "config.json").read_text())
    assert config["lr"] == 0.02 and len(config["provenance"]["source_sha256"]) == 64
    steps = [h for h in lines(out) if "train_loss" in h]
    assert [h["tokens"] for h in steps] == [256 * s for s in range(1, 61)]
    assert {"lr", "seconds", "flops", "tokens_per_second", "mfu", "grad_norm"} <= steps[0].keys()


@pytest.mark.parametrize("accumulate", [1, 2, 8])
def test_gradient_accumulation_does_not_change_the_run(tiny, tmp_path, accumulate):
    one = t.train(tiny(micro_batch=8, out_dir=str(tmp_path / "one")))
    more = t.train(tiny(micro_batch=8 // accumulate, out_dir=str(tmp_path / "more")))
    a, b = losses(one["history"]), losses(more["history"])
    assert a.keys() == b.keys() and all(abs(a[k] - b[k]) < 1e-4 for k in a)


def test_logged_train_loss_is_the_loss_of_the_whole_batch_before_the_step(tiny):
    """Step 1 is taken from the initial weights, which the seed gives."""
    c = tiny(steps=1, warmup_steps=0)
    result, data = t.train(c), t.load_data(c)
    torch.manual_seed(c.seed)
    model = t.GPT(t.model_config(c, 257))
    idx, targets = data.train.batch(t.block_numbers(c.seed, 0, 8, len(data.train)))
    logits, _ = model(idx)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    assert losses(result["history"])[1, "train_loss"] == pytest.approx(expected, abs=1e-5)


def test_evaluating_more_often_does_not_change_the_run(tiny, tmp_path):
    a = t.train(tiny(eval_every=1, save_every=1, out_dir=str(tmp_path / "a")))
    b = t.train(tiny(eval_every=10, save_every=10, out_dir=str(tmp_path / "b")))
    assert same(state(a["checkpoint"])["model"], state(b["checkpoint"])["model"])


# LET in the loop


def test_first_loss_with_let_is_nll_plus_weight_times_projection(tiny, small_teacher):
    """By hand, from the parts: the student's state after block 1, the teacher's last normed state, the cosine."""
    c = tiny(teacher=small_teacher, let_weight=2.0, let_stop=5, let_student_layer=1, steps=5, micro_batch=8)
    first = next(h for h in t.train(c)["history"] if "train_loss" in h)
    data = t.load_data(c)
    torch.manual_seed(c.seed)
    student, teacher = t.GPT(t.model_config(c, 257)), model_from_checkpoint(load_checkpoint(small_teacher))
    idx, _ = data.train.batch(t.block_numbers(c.seed, 0, 8, len(data.train)))
    _, (h_M,) = student(idx, hidden=(1,))
    _, (h_T,) = teacher(idx, hidden=(1,))
    h_T = torch.nn.functional.interpolate(teacher.norm(h_T), size=32, mode="linear")
    cosine = torch.nn.functional.cosine_similarity(h_M, h_T, dim=-1).mean().item()
    assert first["let_weight"] == 2.0
    assert first["let_cosine"] == pytest.approx(cosine, abs=1e-5)
    assert first["let_loss"] == pytest.approx(-cosine, abs=1e-5)


def test_let_weight_is_logged_as_the_formula_has_it(tiny, small_teacher):
    history = t.train(tiny(teacher=small_teacher, let_weight=0.8, let_stop=0.4, let_student_layer=1))["history"]
    logged = [h.get("let_weight") for h in history if "train_loss" in h]
    assert logged == pytest.approx([0.8, 0.6, 0.4, 0.2] + [None] * 6)


@pytest.mark.parametrize("stop, steps, step", [(0.25, 40, 10), (1.0, 40, 1), (2.0, 40, 2), (40.0, 40, 40), (1 / 40, 40, 1)])
def test_a_stop_below_1_is_a_share_of_the_run_and_from_1_on_steps(tiny, stop, steps, step):
    assert t.stop_of(tiny(let_stop=stop), steps) == step
    assert t.stop_of(tiny(distill="salt", distill_stop=stop), steps) == step


@pytest.mark.parametrize("resize", ["interpolate", "project"])
def test_after_let_stop_the_run_is_bitwise_one_that_never_had_a_teacher(tiny, small_teacher, tmp_path, resize):
    let = dict(teacher=small_teacher, let_weight=1.0, let_stop=5, let_student_layer=1, let_resize=resize)
    whole = t.train(tiny(**let, out_dir=str(tmp_path / "whole")))
    # The state at let_stop, from a run of the same length stopped there; then on without any teacher flag.
    stopped = stop_at(tiny(**let, out_dir=str(tmp_path / "stopped")), 5)
    plain = t.train(tiny(resume=stopped, out_dir=str(tmp_path / "plain")))
    assert same(state(whole["checkpoint"]), state(plain["checkpoint"]))
    after = {k: v for k, v in losses(whole["history"]).items() if k[0] > 5}
    assert after and after.items() <= losses(plain["history"]).items()


def test_the_teacher_is_called_once_a_micro_batch_until_let_stop_and_then_let_go(tiny, small_teacher, monkeypatch):
    import gc
    import weakref
    calls, alive = [], []
    teach, evaluate = LET.teach, t.evaluate

    def counted(self, idx, place):
        calls.append(weakref.ref(self._teacher[0]))
        return teach(self, idx, place)

    def watched(*args):
        gc.collect()
        alive.append(bool(calls) and calls[0]() is not None)
        return evaluate(*args)

    monkeypatch.setattr(LET, "teach", counted)
    monkeypatch.setattr(t, "evaluate", watched)
    t.train(tiny(teacher=small_teacher, let_stop=6, let_student_layer=1, eval_every=2))
    assert len(calls) == 6 * 2  # two micro-batches a step
    assert alive == [False, True, True, True, False, False]


def test_teacher_is_unchanged_and_outside_the_checkpoint(tiny, small_teacher):
    before = state(small_teacher)
    result = t.train(tiny(teacher=small_teacher, let_student_layer=1, let_weight=1.0))
    assert same(before, state(small_teacher))
    assert state(result["checkpoint"])["model"].keys() == t.GPT(t.model_config(tiny(), 257)).state_dict().keys()


def test_let_costs_its_flops_and_no_more(tiny, small_teacher):
    a = t.train(tiny(teacher=small_teacher, let_stop=4, let_student_layer=1))
    teacher = model_from_checkpoint(load_checkpoint(small_teacher))
    n = sum(p.numel() for p in teacher.blocks.parameters() if p.ndim == 2)
    plain = model_from_checkpoint(load_checkpoint(a["checkpoint"])).flops_per_token() * 256 * 10
    assert a["flops"] - plain == 4 * 256 * (2 * n + 4 * 1 * 16 * 32)


def test_auto_teacher_is_small_sees_more_tokens_and_is_kept(tiny, tmp_path):
    c = tiny(teacher="auto", n_embd=64, n_layer=4, let_student_layer=1, out_dir=str(tmp_path / "a"))
    a = t.train(c)
    kept, = (t.cache_dir() / "teachers").glob("*/ckpt.pt")
    teacher, time_made = load_checkpoint(kept), kept.stat().st_mtime_ns
    student = load_checkpoint(a["checkpoint"])
    size = [sum(v.numel() for v in ckpt["model"].values()) for ckpt in (teacher, student)]
    assert size[0] <= size[1] / 4 and teacher["tokens"] > student["tokens"]
    t.train(t.replace(c, seed=1, lr=1e-3, out_dir=str(tmp_path / "b")))
    assert kept.stat().st_mtime_ns == time_made and len(list((t.cache_dir() / "teachers").iterdir())) == 1


# Resuming


def stop_at(c, step):
    """Run c in this process and have it stopped by a signal at `step`; returns the checkpoint."""
    save, seen = t.save_checkpoint, []

    def saving(path, s):
        save(path, s)
        if s["step"] == step:
            seen.append(step)
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as m:
        m.setattr(t, "save_checkpoint", saving)
        with pytest.raises(KeyboardInterrupt):
            t.train(c)
    assert seen
    return f"{c.out_dir}/ckpt.pt"


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("flags", [{}, dict(let_student_layer=1), dict(let_student_layer=1, let_resize="project",
                                                                     let_stop=8), dict(multipliers="vector")],
                         ids=["plain", "let", "let-project", "multipliers"])
def test_ten_steps_straight_equal_five_and_five_in_a_new_process(tiny, small_teacher, tmp_path, optimizer, flags):
    flags = dict(flags, optimizer=optimizer, **(dict(teacher=small_teacher) if "let_student_layer" in flags else {}))
    if "multipliers" in flags and optimizer == "muon":
        flags |= dict(normuon=True, muon_coefficients="polar_express", momentum_warmup=8)
    straight = t.train(tiny(**flags, out_dir=str(tmp_path / "straight")))
    halved = tiny(**flags, out_dir=str(tmp_path / "halved"))
    ckpt = stop_at(halved, 5)
    done = run_python(ROOT / "train.py", f"--resume={ckpt}", env={"OMP_NUM_THREADS": str(torch.get_num_threads())})
    assert done.returncode == 0, done.stderr
    assert same(state(straight["checkpoint"]), state(ckpt))
    assert losses(straight["history"]) == losses(lines(tmp_path / "halved"))


def test_killed_at_random_moments_a_loadable_checkpoint_stands_and_the_end_is_the_same(tiny, tmp_path):
    """kill -9, 30 times, of a run that saves at every step; resumed from where it was killed each time."""
    flags = dict(steps=60, save_every=1, eval_every=60, log_every=5)
    straight = t.train(tiny(**flags, out_dir=str(tmp_path / "straight")))
    c, rng, kills = tiny(**flags, out_dir=str(tmp_path / "killed")), random.Random(0), 0
    out = tmp_path / "killed"
    # One process that forks a run, so that Python and torch are imported once and not 30 times.
    code = ("import os, sys, signal, time; sys.path.insert(0, sys.argv[1]); import train as t\n"
            "t.torch.set_num_threads(1)\n"
            "for line in sys.stdin:\n"
            "    pid = os.fork()\n"
            "    if pid == 0:\n"
            "        try: t.train(t.parse_flags(line.split())); os._exit(0)\n"
            "        except BaseException as e: print(repr(e), file=sys.stderr); os._exit(1)\n"
            "    print(pid, flush=True); print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)\n")
    server = subprocess.Popen([sys.executable, "-c", code, str(ROOT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def answer(of=int):
        while True:
            line = server.stdout.readline()
            assert line, "the server died"
            if line.strip().lstrip("-").isdigit():
                return int(line)

    try:
        first = True
        while True:
            words = flags_of(c) if first or not (out / "ckpt.pt").exists() else [f"--resume={out}/ckpt.pt"]
            first = False
            server.stdin.write(" ".join(words) + "\n")
            server.stdin.flush()
            pid = answer()
            if kills < 30:
                time.sleep(rng.uniform(0.02, 0.35))
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            code = answer()
            assert code in (0, -signal.SIGKILL)
            if (out / "ckpt.pt").exists():
                load_checkpoint(out / "ckpt.pt")
            if code == -signal.SIGKILL:
                kills += 1
            elif kills < 30:  # it came to its end: start over, until 30 have been killed
                assert same(state(straight["checkpoint"])["model"], state(out / "ckpt.pt")["model"])
                for path in out.iterdir():
                    path.unlink()
                first = True
            else:
                break
    finally:
        server.kill()
    assert kills == 30
    assert same(state(straight["checkpoint"]), state(out / "ckpt.pt"))
    assert losses(straight["history"]) == losses(lines(out))


@pytest.mark.parametrize("change", [dict(n_layer=3), dict(n_embd=64), dict(mlp="gelu"), dict(block_size=16),
                                    dict(tie_embeddings=True), dict(optimizer="adamw"),
                                    dict(tokenizer="bpe", vocab_size=300)])
def test_resuming_with_a_changed_model_is_refused(tiny, tmp_path, change):
    ckpt = t.train(tiny(steps=2))["checkpoint"]
    before = open(ckpt, "rb").read()
    with pytest.raises(t.BadInput, match="--resume=.*changed"):
        t.train(tiny(steps=4, resume=ckpt, **change))
    assert open(ckpt, "rb").read() == before


def test_resume_takes_the_checkpoints_flags_and_folder(tiny):
    ckpt = t.train(tiny(steps=4, lr=0.003))["checkpoint"]
    c = t.parse_flags([f"--resume={ckpt}", "--steps=6"])
    assert (c.lr, c.steps, c.out_dir, c.n_embd) == (0.003, 6, str(t.Path(ckpt).parent), 32)
    assert t.parse_flags([f"--out_dir={t.Path(ckpt).parent}", "--resume=auto"]).lr == 0.003
    assert t.parse_flags([f"--out_dir={t.Path(ckpt).parent}/none", "--resume=auto"]).resume == ""


def test_resuming_past_the_last_step_is_refused(tiny):
    ckpt = t.train(tiny(steps=4))["checkpoint"]
    with pytest.raises(t.BadInput, match="--steps=3: the checkpoint is at step 4"):
        t.train(tiny(steps=3, resume=ckpt))


def test_resuming_with_other_optimizer_settings_uses_them(tiny, tmp_path):
    """After one step from the same state the weights differ by the decay of that step alone."""
    ckpt = t.train(tiny(steps=5, schedule="constant"))["checkpoint"]
    ends = {}
    for decay in (0.0, 0.5):
        c = tiny(steps=6, schedule="constant", resume=ckpt, weight_decay=decay, out_dir=str(tmp_path / str(decay)))
        ends[decay] = load_checkpoint(t.train(c)["checkpoint"])["model"]["blocks.0.mlp.up.weight"]
    start = load_checkpoint(ckpt)["model"]["blocks.0.mlp.up.weight"]
    torch.testing.assert_close(ends[0.0] - ends[0.5], t.Config().lr * 0.5 * start, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("before, after", [("none", "vector"), ("vector", "none"), ("scalar", "vector"), ("vector", "scalar")])
def test_multipliers_can_come_and_go_without_a_change_of_the_model(tiny, tmp_path, before, after, optimizer):
    ckpt = t.train(tiny(steps=5, multipliers=before, optimizer=optimizer))["checkpoint"]
    stored = load_checkpoint(ckpt)
    c = t.parse_flags([f"--resume={ckpt}", "--steps=9", f"--multipliers={after}", f"--out_dir={tmp_path}/after"])
    history = t.train(c)["history"]
    first = {h["step"]: h["val_loss"] for h in t.train(tiny(steps=5, resume=ckpt, multipliers=before, optimizer=optimizer,
                                                           out_dir=str(tmp_path / "same")))["history"] if "val_loss" in h}
    assert next(h["val_loss"] for h in history if h["step"] == 5) == first[5]
    end = load_checkpoint(tmp_path / "after" / "ckpt.pt")
    assert (end["multipliers"] is None) == (after == "none")
    assert not any(torch.equal(end["model"][n], p) for n, p in stored["model"].items() if n.startswith("blocks."))


def test_the_model_of_a_checkpoint_is_the_folded_matrices(tiny):
    ckpt = torch.load(t.train(tiny(multipliers="vector", multiplier_lr=0.1))["checkpoint"], weights_only=True)
    kept, model = ckpt["multipliers"], ckpt["model"]
    q, k = (kept[f"blocks.1.mixer.qkv.weight:{piece}.r"] for piece in "qk")
    assert (q - 1).abs().max() > 0.01 and not torch.equal(q, k)
    W, c = kept["blocks.1.mixer.qkv.weight"], kept["blocks.1.mixer.qkv.weight:k.c"]
    torch.testing.assert_close(model["blocks.1.mixer.qkv.weight"][32:64], torch.diag(k) @ W[32:64] @ torch.diag(c))
    assert model["head.weight"].shape == (320, 32) and not any("head" in name for name in kept)


def test_scales_are_logged_at_each_evaluation(tiny):
    history = t.train(tiny(multipliers="vector"))["history"]
    seen = [h for h in history if "weights" in h]
    assert [h["step"] for h in seen] == [0, 5, 10]
    assert set(seen[0]["drift"]) == {"q/k", "v/o", "up/down"} and set(seen[0]["drift"].values()) == {0.0}
    assert seen[0]["weights"]["q"]["rms"] == seen[0]["weights"]["q"]["rms_effective"]
    assert seen[-1]["weights"]["q"]["rms"] != seen[-1]["weights"]["q"]["rms_effective"]
    assert seen[0]["weights"]["down"]["spread"] is None, "down starts at 0"


def test_frozen_gains_stay_at_1(tiny, tmp_path):
    for which, frozen in (("final", {"norm.weight"}), ("blocks", {f"blocks.{i}.{m}_norm.weight" for i in range(2)
                                                                for m in ("mixer", "mlp")})):
        c = tiny(steps=3, frozen_gains=which, out_dir=str(tmp_path / which))
        model = load_checkpoint(t.train(c)["checkpoint"])["model"]
        assert {n for n, p in model.items() if n.endswith("norm.weight") and (p == 1).all()} == frozen


def test_module_factors_act_on_their_module_alone(tiny, tmp_path):
    """A step from 0 gradient history: the head moves twice as far, and all else as it did."""
    ends = [load_checkpoint(t.train(tiny(steps=1, warmup_steps=0, weight_decay=0.0, optimizer="adamw", out_dir=str(
        tmp_path / str(i)), module_lr=factors))["checkpoint"])["model"] for i, factors in enumerate(("", "head=2,mlp=0.5"))]
    torch.manual_seed(0)
    start = t.GPT(t.model_config(tiny(), 257)).state_dict()
    for name, p in start.items():
        factor = 2.0 if name == "head.weight" else 0.5 if ".mlp." in name else 1.0
        torch.testing.assert_close(ends[1][name] - p, factor * (ends[0][name] - p), rtol=1e-3, atol=1e-6)


def test_a_decay_branches_off_and_is_the_run_planned_to_that_length(tiny, tmp_path):
    """From step 5 of a long run: with decay_fraction 0.5 it ends at 10, as a run of 10 steps that decays from 5 does."""
    flags = dict(teacher="none", decay_fraction=0.5, decay_shape="sqrt")
    trunk = stop_at(tiny(**flags, steps=40, out_dir=str(tmp_path / "trunk")), 5)
    kept = open(trunk, "rb").read()
    planned = t.train(tiny(**flags, steps=10, out_dir=str(tmp_path / "planned")))
    c = t.parse_flags([f"--resume={trunk}", "--decay_now", f"--out_dir={tmp_path}/branch"])
    assert c.steps == 10
    assert t.train(c)["step"] == 10 and open(trunk, "rb").read() == kept
    assert same(state(planned["checkpoint"]), state(tmp_path / "branch" / "ckpt.pt"))
    lr = [h["lr"] for h in lines(tmp_path / "branch") if "lr" in h]
    assert lr == pytest.approx([0.006 * (1 - (i / 5) ** 0.5) for i in range(5)], rel=1e-9)
    longer = t.train(t.parse_flags([f"--resume={trunk}", "--decay_now", "--steps=25", f"--out_dir={tmp_path}/longer"]))
    assert [h["lr"] for h in longer["history"] if "lr" in h][4] == pytest.approx(0.006 * (1 - 0.2**0.5))
    again = t.parse_flags([f"--resume={tmp_path}/branch/ckpt.pt", "--steps=10"])
    assert not again.decay_now, "a branch is resumed as any run"


@pytest.mark.parametrize("share, stop", [(0.2, 8), (0.025, 1)])
def test_a_decay_keeps_the_trunks_let_stop(tiny, small_teacher, tmp_path, share, stop):
    flags = dict(teacher=small_teacher, let_student_layer=1, let_stop=share, decay_fraction=0.5)
    trunk = stop_at(tiny(**flags, steps=40, out_dir=str(tmp_path / "trunk")), 5)
    branch = t.train(t.parse_flags([f"--resume={trunk}", "--decay_now", f"--out_dir={tmp_path}/branch"]))
    assert {h["step"]: h["let_weight"] for h in branch["history"] if "let_weight" in h} == pytest.approx(
        {s + 1: 0.1 * (8 - s) / 8 for s in range(5, stop)})
    kept = t.Config(**load_checkpoint(tmp_path / "branch/ckpt.pt")["config"])
    assert t.stop_of(kept, kept.steps) == stop


@pytest.mark.parametrize("flags, words, message", [
    (dict(steps=8), [], "step 5 of a wsd schedule is not in its stable phase, steps 2 to 3"),
    (dict(steps=40, schedule="cosine"), ["--schedule=wsd"], "step 5 of a cosine schedule is not in its stable phase"),
    (dict(steps=40), ["--steps=5"], "--steps=5: the decay would begin at step 5"),
    (dict(steps=40), ["--out_dir=TRUNK"], "holds a run already"),
    (dict(steps=40, schedule="constant"), [], "is a setting of wsd")])
def test_a_decay_that_cannot_branch_off_is_refused(tiny, tmp_path, flags, words, message):
    trunk = stop_at(tiny(**flags, out_dir=str(tmp_path / "trunk")), 5)
    words = [w.replace("TRUNK", str(tmp_path / "trunk")) for w in words]
    with pytest.raises(t.BadInput, match=re.escape(message)):
        t.train(t.parse_flags([f"--resume={trunk}", "--decay_now", *words]))


def test_every_optimizer_flag_reaches_the_optimizer(tiny, tmp_path):
    """Each makes another run than the one without it; and what is stored of it is what was asked for."""
    base = dict(steps=4, warmup_steps=0, multipliers="vector", clip=0.1)
    ends = []
    for i, change in enumerate(({}, dict(muon_coefficients="polar_express"), dict(normuon=True), dict(momentum_warmup=8),
                                dict(clip_multipliers=True), dict(multiplier_weight_decay=1.0), dict(multiplier_lr=0.1),
                                dict(multiplier_placement="symmetry_free"), dict(multiplier_modules="mlp"),
                                dict(decay_shape="sqrt"))):
        end = load_checkpoint(t.train(tiny(**{**base, **change}, out_dir=str(tmp_path / str(i))))["checkpoint"])
        assert not any(torch.equal(end["model"]["blocks.0.mlp.up.weight"], other) for other in ends), change
        ends.append(end["model"]["blocks.0.mlp.up.weight"])
        if change.get("momentum_warmup"):
            assert end["optimizers"][0]["param_groups"][0]["momentum"] == pytest.approx(0.85 + 3 / 8 * 0.1)
        if change.get("multiplier_weight_decay"):
            assert end["optimizers"][2]["param_groups"][0]["weight_decay"] == 1.0


@pytest.mark.parametrize("before, after, refused", [("", "mlp=2", True), ("mlp=2", "mlp=3", False), ("mlp=2", "head=2", True)])
def test_the_groups_of_the_optimizer_stay_what_they_were(tiny, tmp_path, before, after, refused):
    ckpt = t.train(tiny(steps=2, module_lr=before))["checkpoint"]
    c = t.parse_flags([f"--resume={ckpt}", "--steps=3", f"--module_lr={after}", f"--out_dir={tmp_path}/after"])
    if refused:
        with pytest.raises(t.BadInput, match="modules named by --module_lr"):
            t.train(c)
    else:
        t.train(c)


def test_contradicting_optimizer_flags_are_listed_at_once(tiny, tmp_path):
    words = ["--multiplier_lr=-0.1", "--multiplier_weight_decay=-1", "--multiplier_placement=nowhere", "--clip_multipliers",
             "--optimizer=adamw", "--normuon", "--muon_coefficients=polar_express", "--momentum_warmup=5", "--decay_now",
             "--module_lr=heads=2", "--module_decay=head=-1", "--schedule=cosine", "--decay_shape=sqrt",
             "--multiplier_modules=mlp,heads", "--muon_scale=original"]
    done = run_python(ROOT / "train.py", *words, f"--out_dir={tmp_path}/run")
    assert done.returncode == 2 and "Traceback" not in done.stderr and not (tmp_path / "run").exists()
    for expected in ("--multiplier_lr=-0.1: must be positive", "--multiplier_lr=-0.1: has no effect without --multipliers",
                     "--multiplier_weight_decay=-1.0: must not be negative", "--multiplier_placement=nowhere: one of all, symm",
                     "--clip_multipliers=True: has no effect", "--normuon=True --optimizer=adamw: is a setting of Muon",
                     "--muon_coefficients=polar_express --optimizer=adamw", "--momentum_warmup=5 --optimizer=adamw",
                     "--decay_now=True: needs --resume", "--module_lr=heads=2: heads: no such module",
                     "--module_decay=head=-1: head=-1: a number from 0 on", "--decay_shape=sqrt --schedule=cosine",
                     "--multiplier_modules=mlp,heads: out of", "--muon_scale=original --optimizer=adamw"):
        assert expected in done.stderr, expected
    with pytest.raises(t.BadInput, match="--multiplier_modules=head --tie_embeddings=True: a tied head"):
        t.check(tiny(multipliers="scalar", multiplier_modules="head", tie_embeddings=True))


def test_a_longer_run_keeps_the_stop_that_it_had(tiny, small_teacher, tmp_path):
    ckpt = t.train(tiny(teacher=small_teacher, let_student_layer=1, let_stop=0.4))["checkpoint"]
    assert [t.stop_of(c := t.parse_flags([f"--resume={ckpt}", *more]), c.steps) for more in (
        [], ["--steps=40"], ["--steps=40", "--let_stop=0.4"])] == [4, 4, 16]
    history = t.train(t.parse_flags([f"--resume={ckpt}", "--steps=14"]))["history"]
    assert not any("let_weight" in h for h in history if h["step"] > 4)


def test_a_run_is_not_resumed_into_the_folder_of_another(tiny, tmp_path):
    a, b = (t.train(tiny(steps=2, save_every=1, keep_checkpoints=True, out_dir=str(tmp_path / name)))["checkpoint"] for name in "ab")
    before = {p: p.read_bytes() for p in (tmp_path / "b").iterdir()}
    for words in ([f"--resume={a}", f"--out_dir={tmp_path}/b"], [f"--resume={tmp_path}/b/step-0000001.pt"]):
        with pytest.raises(t.BadInput, match=f"--out_dir={re.escape(str(tmp_path))}/b: holds a run already"):
            t.train(t.parse_flags([*words, "--steps=3"]))
    assert {p: p.read_bytes() for p in (tmp_path / "b").iterdir()} == before
    assert t.train(t.parse_flags([f"--resume={b}", "--steps=3"]))["step"] == 3


def test_a_projection_of_the_other_side_is_not_resumed(tiny, small_teacher, tmp_path):
    ckpt = t.train(tiny(teacher=small_teacher, let_student_layer=1, let_resize="project", let_stop=8, steps=4))["checkpoint"]
    before = Path(ckpt).read_bytes()
    with pytest.raises(t.BadInput, match=r"its learned projection, \(32, 16\), is of the teacher's .*=student with .* needs \(16, 32\)"):
        t.train(t.parse_flags([f"--resume={ckpt}", "--steps=6", "--let_resize_side=student"]))
    assert Path(ckpt).read_bytes() == before


def test_teachers_of_other_texts_are_others(tiny, tmp_path):
    keys = set()
    for text in ("one line\n", "another line\n"):
        (tmp_path / "input.txt").write_text("".join(f"{text}{i}" for i in range(3000)))
        c = tiny(data=str(tmp_path / "input.txt"), tokenizer="bytes", teacher="auto", n_embd=64, n_layer=4, let_student_layer=1)
        data = t.load_data(c)
        keys.add(t.auto_teacher(c, data.tokenizer, t.tokens_id(data)).out_dir)
        assert t.tokens_id(data) == t.tokens_id(t.load_data(c))
    assert len(keys) == 2


@pytest.mark.parametrize("name, peak", [("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA RTX A1000", None), ("NVIDIA L40", None),
                                        ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA L4", 121e12), ("NVIDIA RTX A4000", None)])
def test_peak_of_a_gpu_is_its_own_or_none(name, peak, monkeypatch):
    devices = t.Devices(torch.device("cpu"))
    monkeypatch.setattr(devices, "name", lambda: name)
    assert devices.peak_flops() == peak


# Several ranks


def test_ranks_and_their_gpus(tiny, monkeypatch):
    with pytest.raises(t.BadInput, match="--device=cpu:0: of several processes each takes one of its own"):
        t.check(tiny(device="cpu:0"), 2)
    monkeypatch.setattr(t, "check", lambda *a: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(t.BadInput, match="--nproc_per_node=8: this machine has 2 GPUs"):
        t.run(tiny(device="cuda"), None)


@pytest.mark.parametrize("rank, error, said", [
    ("0", t.BadInput("x"), "error: x\n"), ("1", t.BadInput("x"), ""), ("1", t.NonFinite("x"), ""),
    ("1", FileNotFoundError(2, "No such file", "tokens"), "error of rank 1: tokens: No such file\n"),
    ("0", FileNotFoundError(2, "No such file", "tokens"), "error: tokens: No such file\n")])
def test_a_rank_speaks_of_what_it_met_alone(rank, error, said, monkeypatch, capsys):
    def main(argv):
        raise error

    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as left:
        t.command(main)
    assert capsys.readouterr().err == said and left.value.code == (2 if isinstance(error, t.BadInput) else 1)


@pytest.fixture
def let_flags(small_teacher):
    return dict(teacher=small_teacher, let_weight=1.0, let_stop=6, let_student_layer=1, let_resize="project")


def test_the_projection_learns_at_the_laws_rate_and_at_the_rate_of_now_when_resumed(tiny, small_teacher, tmp_path):
    law = {"version": t.LAW_VERSION, "units": "parameters, tokens", "a": math.log(0.01), "b": 0.0, "c": 0.0, "N": [1, 2],
           "D": [1, 2], "draws": [[0.0, 0.0, 0.0]]}
    (tmp_path / "law.json").write_text(json.dumps(law))
    flags = dict(teacher=small_teacher, let_student_layer=1, let_resize="project", let_stop=8)
    ckpt = t.train(tiny(**flags, steps=4, lr=0.0, lr_law=str(tmp_path / "law.json")))["checkpoint"]
    assert load_checkpoint(ckpt)["let_optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.01)
    ckpt = t.train(t.parse_flags([f"--resume={ckpt}", "--steps=6", "--lr=0.002"]))["checkpoint"]
    assert load_checkpoint(ckpt)["let_optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.002)


def test_a_teacher_without_a_name_is_refused(tiny):
    with pytest.raises(t.BadInput, match="--teacher=: a name is needed"):
        t.check(tiny(teacher=""))


@pytest.mark.parametrize("extra", [{}, dict(multipliers="vector", normuon=True), dict(optimizer="adamw",
                                   multipliers="scalar", tie_embeddings=True)], ids=["plain", "muon", "adamw"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_reach_the_same_losses(tiny, tmp_path, let_flags, ranks, extra):
    let_flags |= extra
    one = t.train(tiny(**let_flags, micro_batch=2, eval_tokens=1100, out_dir=str(tmp_path / "one")))
    c = tiny(**let_flags, micro_batch=2, eval_tokens=1100, out_dir=str(tmp_path / "more"))
    done = run_python(ROOT / "train.py", *flags_of(c), ranks=ranks)
    assert done.returncode == 0, done.stderr
    a, b = losses(one["history"]), losses(lines(tmp_path / "more"))
    assert a.keys() == b.keys() and max(abs(a[k] - b[k]) for k in a) < 1e-4
    assert json.loads((tmp_path / "more" / "config.json").read_text())["provenance"]["world_size"] == ranks
    a, b = (load_checkpoint(tmp_path / name / "ckpt.pt") for name in ("one", "more"))
    for i, packed in enumerate(a["optimizers"]):  # the state is whole, and does not show the number of ranks
        for index, kept in packed["state"].items():
            for key, value in kept.items():
                assert (b["optimizers"][i]["state"][index][key] - value).norm() <= 2e-2 * value.norm()


@pytest.mark.parametrize("before,after", [(2, 1), (1, 2)])
def test_a_checkpoint_moves_between_numbers_of_ranks(tiny, tmp_path, before, after):
    """With a schedule that does not depend on the number of steps, a run of 5 is the first half of a run of 10."""
    flags = dict(schedule="constant", multipliers="vector", normuon=True)
    reference = t.train(tiny(**flags, out_dir=str(tmp_path / "reference")))
    c = tiny(**flags, steps=5)
    for words, ranks in ((flags_of(c), before), ([f"--resume={c.out_dir}/ckpt.pt", "--steps=10"], after)):
        done = run_python(ROOT / "train.py", *words, ranks=ranks)
        assert done.returncode == 0, done.stderr
    a, b = losses(reference["history"]), losses(lines(tmp_path / "run"))
    assert a.keys() == b.keys() and max(abs(a[k] - b[k]) for k in a) < 1e-4


# Signals, failures


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def children(pid):
    out = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(p) for p in out.split()]


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_at_the_next_step_and_exits_0(tiny, tmp_path, number):
    c = tiny(steps=10**6, save_every=10**6, eval_every=10**6)
    run = subprocess.Popen([sys.executable, ROOT / "train.py", *flags_of(c)], stdout=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and "train_loss" in metrics.read_text())
    run.send_signal(number)
    out, _ = run.communicate(timeout=60)
    assert run.returncode == 0 and "--resume=" in out
    ckpt = load_checkpoint(tmp_path / "run" / "ckpt.pt")
    assert ckpt["step"] == lines(tmp_path / "run")[-1]["step"] > 0


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
def test_a_signal_to_one_rank_stops_all_with_0(tiny, tmp_path):
    c = tiny(steps=10**6, save_every=10**6, eval_every=10**6)
    run = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                            ROOT / "train.py", *flags_of(c)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and "train_loss" in metrics.read_text())
    os.kill(children(run.pid)[-1], signal.SIGTERM)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 0, err
    assert load_checkpoint(tmp_path / "run" / "ckpt.pt")["step"] > 0


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
def test_the_second_signal_aborts(tiny, monkeypatch):
    signals = t.StopSignals()
    with signals:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # torchrun's echo of a Ctrl-C: another signal, the same wish
        with pytest.raises(SystemExit) as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
    assert stop.value.code == 128 + signal.SIGTERM


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_value_that_is_not_finite_stops_before_the_weights_are_touched(tiny, monkeypatch, what):
    c, clip, taken = tiny(save_every=1), t.clip_gradients, []

    def poisoned(params, max_norm):
        params = list(params)
        if len(taken) == 6:
            if what == "loss":
                raise AssertionError("not reached")
            params[0].grad[0] = math.nan
        taken.append(1)
        return clip(params, max_norm)

    if what == "gradient":
        monkeypatch.setattr(t, "clip_gradients", poisoned)
    else:
        forward = t.GPT.forward

        def broken(self, idx, targets=None, **kw):
            loss, states = forward(self, idx, targets, **kw)
            if torch.is_grad_enabled():
                taken.append(1)
            return (loss * math.inf if len(taken) > 12 else loss), states  # two micro-batches a step
        monkeypatch.setattr(t.GPT, "forward", broken)
    with pytest.raises(t.NonFinite, match="step 6: .*ckpt.pt holds step 6"):
        t.train(c)
    weights = load_checkpoint(f"{c.out_dir}/ckpt.pt")
    assert weights["step"] == 6 and all(torch.isfinite(v).all() for v in weights["model"].values())


def test_a_diverging_run_exits_with_1_and_one_line(tiny):
    done = run_python(ROOT / "train.py", *flags_of(tiny(lr=1e30, clip=0.0, optimizer="adamw", steps=30)))
    assert done.returncode == 1
    assert done.stderr.count("error:") == 1 and "before the weights were touched" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="a file size limit stands in for a full disk")
def test_a_full_disk_exits_with_1_and_leaves_the_last_checkpoint(tiny, tmp_path):
    ckpt = t.train(tiny(steps=5))["checkpoint"]
    size = os.path.getsize(ckpt)
    code = ("import resource, signal, sys, runpy; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size // 2}, {size // 2}));"
            f"sys.argv = ['train.py', '--resume={ckpt}', '--steps=10']; sys.path.insert(0, {str(ROOT)!r});"
            "runpy.run_path(sys.path[0] + '/train.py', run_name='__main__')")
    done = run_python("-c", code)
    assert done.returncode == 1, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error:") and "ckpt.pt" in done.stderr
    assert load_checkpoint(ckpt)["step"] == 5
    assert not list(tmp_path.rglob("*.tmp"))


def test_dry_run_prints_the_plan_and_writes_nothing(tiny, capsys):
    c = tiny(dry_run=True)
    t.train(c)
    out = capsys.readouterr().out
    n = t.GPT(t.model_config(c, 257)).num_params()
    assert f"{n:,}" in out and "2,560 tokens" in out and not t.Path(c.out_dir).exists()


def test_the_commands_of_the_readme_are_understood():
    """A shell runs them all, with a stand-in for train.py that prints its flags: each exists, has the right type, agrees."""
    blocks = re.findall(r"(?:^(?:    .*)?\n)*^    .*train\.py.*\n(?:^(?:    .*)?\n)*", (ROOT / "README.md").read_text(), re.MULTILINE)
    script = """python() { if [ "$1" = train.py ]; then shift; printf '%s\\x1f' "$@"; echo; elif [ "$1" = -c ]; then command python3 "$@"; fi; }
        torchrun() { while [[ $1 == --* ]]; do shift; done; python "$@"; }; pip() { :; }; pytest() { :; }
        """ + "\n".join(line for line in "\n".join(blocks).splitlines() if not re.match(r"    (teacher:|step |student:)", line))
    done = subprocess.run(["bash", "-ec", script], text=True, capture_output=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    commands = [line.split("\x1f")[:-1] for line in done.stdout.splitlines()]
    assert len(commands) > 80
    for words in {tuple(words) for words in commands}:
        if words and words != ("--help",) and not words[0].startswith("--resume"):
            t.check(t.parse_flags(words))


def test_bf16_autocast_stays_near_fp32(tiny, tmp_path):
    a = t.train(tiny(steps=30, eval_every=30, out_dir=str(tmp_path / "a")))
    b = t.train(tiny(steps=30, eval_every=30, dtype="bf16", out_dir=str(tmp_path / "b")))
    assert a["val_loss"] != b["val_loss"] and abs(a["val_loss"] - b["val_loss"]) < 0.05


SSM = dict(d_state=16, ssm_head_dim=16, chunk_size=8)


@pytest.mark.gpu
@pytest.mark.parametrize("flags", [{}, dict(multipliers="vector", normuon=True, muon_coefficients="polar_express"),
                                   dict(SSM, mixer="mamba2"), dict(SSM, mixer="hybrid", n_experts=4)],
                         ids=["default", "multipliers", "mamba2", "hybrid-experts"])
def test_cuda_run_in_bf16_compiled(tiny, flags):
    result = t.train(tiny(device="cuda", dtype="auto", compile="true", steps=60, eval_every=20, lr=0.02, **flags))
    evals = [h["val_loss"] for h in result["history"] if "val_loss" in h]
    assert evals[-1] < 0.6 * evals[0]
