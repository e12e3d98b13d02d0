"""teacher.py: the losses and the resizing against their formulas, LET against hooks, what load_teacher refuses."""
import math

import numpy as np
import pytest
import tiktoken
import torch
from conftest import tiny_model

import train as train_module
from model import BadInput, load_checkpoint, tokenizer_to_dict
from teacher import LET, cosine_loss, gather_neighbours, interpolate, let_weight, load_teacher, logsum_loss

torch.set_num_threads(1)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_tokens(*shape, seed=1):
    return torch.randint(97, shape, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------------------------------------
# The losses and the resizing


def plain_cosine(student, teacher):
    """Minus the mean over (b, t) of <s, t> / |s| |t|, one token after the other."""
    B, T, _ = student.shape
    total = 0.0
    for b in range(B):
        for t in range(T):
            s, h = student[b, t], teacher[b, t]
            total = total + (s * h).sum() / (s * s).sum().sqrt() / (h * h).sum().sqrt()
    return -total / (B * T)


def plain_logsum(student, teacher, power=4.0, eps=1e-5):
    """log of the mean of |difference|^power, each feature first brought to mean 0 and variance 1 over all tokens."""
    normed = []
    for h in (student, teacher):
        columns = []
        for column in h.reshape(-1, h.shape[-1]).unbind(1):
            centred = column - column.sum() / len(column)
            columns.append(centred / ((centred * centred).sum() / len(column) + eps).sqrt())
        normed.append(torch.stack(columns, 1))
    return torch.log(((normed[0] - normed[1]).abs() ** power).mean())


@pytest.mark.parametrize("loss, plain", [(cosine_loss, plain_cosine), (logsum_loss, plain_logsum)])
def test_loss_and_gradient_equal_the_plain_formula(loss, plain):
    student, teacher = 3 * randn(2, 5, 7) + 1, randn(2, 5, 7, seed=1) - 0.5
    student.requires_grad_()
    exact = student.detach().double().requires_grad_()
    value, cosine = loss(student, teacher)
    expected = plain(exact, teacher.double())
    assert value.shape == cosine.shape == ()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    assert cosine.item() == pytest.approx(-plain_cosine(exact, teacher.double()).item(), abs=1e-6)
    gradient, = torch.autograd.grad(value, student)
    torch.testing.assert_close(gradient.double(), torch.autograd.grad(expected, exact)[0], atol=1e-6, rtol=1e-4)


def test_logsum_loss_equals_a_numpy_loop():
    student, teacher = 2 * randn(3, 4, 5, seed=2), randn(3, 4, 5, seed=3)
    for power in (2.0, 4.0, 5.0):
        total, n = 0.0, 12
        for j in range(5):
            a, b = (h.numpy().astype(np.float64).reshape(n, 5)[:, j] for h in (student, teacher))
            a, b = ((x - x.mean()) / math.sqrt(x.var() + 1e-5) for x in (a, b))
            for i in range(n):
                total += abs(a[i] - b[i]) ** power
        assert logsum_loss(student, teacher, power)[0].item() == pytest.approx(math.log(total / (n * 5)), rel=1e-5)


@pytest.mark.parametrize("student, teacher, expected", [
    ([[1.0, 0.0]], [[5.0, 0.0]], -1.0), ([[1.0, 0.0]], [[0.0, 2.0]], 0.0), ([[1.0, 1.0]], [[-3.0, -3.0]], 1.0),
    ([[1.0, 0.0], [1.0, 0.0]], [[9.0, 0.0], [0.0, 0.1]], -0.5)])  # every token counts the same, whatever its length
def test_cosine_loss_by_hand(student, teacher, expected):
    loss, cosine = cosine_loss(torch.tensor([student]), torch.tensor([teacher]))
    assert loss.item() == pytest.approx(expected, abs=1e-6) and cosine.item() == pytest.approx(-expected, abs=1e-6)


@pytest.mark.parametrize("loss, plain", [(cosine_loss, plain_cosine), (logsum_loss, plain_logsum)])
def test_losses_of_bf16_states_are_taken_in_float32(loss, plain):
    """Under autocast as the training loop has it. In bf16 they would be off by about 0.003."""
    student, teacher = (3 * randn(4, 16, 32) + 1).bfloat16(), (randn(4, 16, 32, seed=1) + 1).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        values = loss(student, teacher)
    assert values[0].dtype == values[1].dtype == torch.float32
    assert values[0].item() == pytest.approx(plain(student.double(), teacher.double()).item(), abs=2e-5)
    assert values[1].item() == pytest.approx(-plain_cosine(student.double(), teacher.double()).item(), abs=2e-5)


def interpolation_matrix(d, width):
    """(width, d): row j reads x_j = max(0, (j + 0.5) d / width - 0.5) between its neighbours i and i + 1."""
    matrix = torch.zeros(width, d, dtype=torch.float64)
    for j in range(width):
        x = max(0.0, (j + 0.5) * d / width - 0.5)
        i = math.floor(x)
        matrix[j, i] += 1 - (x - i)
        matrix[j, min(i + 1, d - 1)] += x - i
    return matrix


@pytest.mark.parametrize("d, width", [(12, 7), (7, 12), (16, 4), (16, 8), (5, 64), (64, 5), (8, 8), (1, 3), (3, 1)])
@pytest.mark.parametrize("form", [interpolate, gather_neighbours])
def test_interpolation_and_its_gradient_equal_the_formula(form, d, width):
    h, matrix = randn(2, 3, d, dtype=torch.float64).requires_grad_(), interpolation_matrix(d, width)
    out, g = form(h, width), randn(2, 3, width, seed=1, dtype=torch.float64)
    torch.testing.assert_close(out, h @ matrix.T)
    torch.testing.assert_close(torch.autograd.grad(out, h, g)[0], g @ matrix)


@pytest.mark.parametrize("step, weight, stop, expected", [
    (0, 0.1, 100, 0.1), (25, 0.1, 100, 0.075), (50, 0.1, 100, 0.05), (99, 0.1, 100, 0.001), (100, 0.1, 100, 0.0),
    (101, 0.1, 100, 0.0), (10_000, 3.0, 100, 0.0), (1, 3.0, 3, 2.0), (0, 0.7, 1, 0.7), (1, 0.7, 1, 0.0),
    (0, 0.1, 0, 0.0), (5, 0.1, 0, 0.0), (0, 0.0, 100, 0.0)])
def test_let_weight(step, weight, stop, expected):
    assert let_weight(step, weight, stop) == pytest.approx(expected, rel=1e-12, abs=0)


# ----------------------------------------------------------------------------------------------------------------------
# LET


def small_teacher(**kw):
    """Three blocks of width 24; the students here have width 32."""
    return tiny_model(seed=5, **{**dict(n_embd=24, n_head=2, n_kv_head=1), **kw})


@pytest.mark.parametrize("loss, plain", [("cosine", plain_cosine), ("logsum", plain_logsum)])
@pytest.mark.parametrize("side", ["teacher", "student"])
@pytest.mark.parametrize("resize", ["interpolate", "project"])
def test_let_equals_its_formula_and_teaches_the_student_only(resize, side, loss, plain):
    """The teacher is not even frozen here: teach() alone must keep gradients from it."""
    student, teacher, idx = tiny_model(), small_teacher(), random_tokens(2, 12)
    let = LET(teacher, 32, loss=loss, resize=resize, side=side)
    _, (h_M,) = student(idx, hidden=(1,))
    h_T = let.teach(idx)
    assert h_T.shape == (2, 12, 24) and not h_T.requires_grad
    h_M.retain_grad()
    value, cosine = let(h_M, h_T)

    matrix = interpolation_matrix(24, 32) if side == "teacher" else interpolation_matrix(32, 24)
    if resize == "project":
        matrix = let.projection.weight.detach().double()
    matrix, a, b = matrix.requires_grad_(), h_M.detach().double().requires_grad_(), h_T.double()
    resized = (a, b @ matrix.T) if side == "teacher" else (a @ matrix.T, b)
    expected = plain(*resized)
    assert value.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)
    assert cosine.item() == pytest.approx(-plain_cosine(*resized).item(), abs=1e-5)

    value.backward()
    expected.backward()
    torch.testing.assert_close(h_M.grad.double(), a.grad, atol=1e-5, rtol=1e-3)
    assert all(p.grad is None for p in teacher.parameters())
    assert student.embed.weight.grad.abs().sum() > 0 and student.blocks[0].mixer.qkv.weight.grad.abs().sum() > 0
    assert student.blocks[1].mixer.qkv.weight.grad is None, "blocks after the guided one are not touched"
    if resize == "project":
        assert let.projection.weight.shape == ((32, 24) if side == "teacher" else (24, 32))
        torch.testing.assert_close(let.projection.weight.grad.double(), matrix.grad, atol=1e-5, rtol=1e-3)
    else:
        assert not list(let.parameters())


def test_equal_widths_are_compared_as_they_are():
    h_M, h_T = randn(2, 5, 24), randn(2, 5, 24, seed=1)
    for side in ("teacher", "student"):
        value = LET(small_teacher(), 24, side=side)(h_M, h_T)[0]
        assert value.item() == pytest.approx(plain_cosine(h_M.double(), h_T.double()).item(), abs=1e-6)


@pytest.mark.parametrize("layer, block", [(0, 0), (1, 1), (2, 2), (3, 3), (-1, 3), (-2, 2), (-3, 1)])
@torch.no_grad()
def test_teacher_state_is_that_of_a_full_pass_and_later_blocks_are_not_run(layer, block):
    teacher, idx, seen = small_teacher(), random_tokens(2, 12), []
    for module in (teacher.embed, *teacher.blocks, teacher.norm, teacher.head):
        module.register_forward_hook(lambda module, args, out: seen.append(out))
    teacher(idx)
    full = list(seen)
    seen.clear()
    raw = LET(teacher, 32, layer, norm=False).teach(idx)
    assert len(seen) == block + 1, "the embedding and the blocks up to this one; no norm, no head"
    assert torch.equal(raw, full[block])
    normed = LET(teacher, 32, layer, norm=True).teach(idx)
    rms = full[block].square().mean(-1, keepdim=True).add(1e-6).sqrt()
    torch.testing.assert_close(normed, full[block] / rms * teacher.norm.weight)
    assert (normed - raw).abs().max() > 0.01


@pytest.mark.parametrize("layer", [4, -5, 100])
def test_a_layer_that_the_teacher_lacks_is_refused(layer):
    with pytest.raises(BadInput, match=f"--let_teacher_layer={layer}.* 3"):
        LET(small_teacher(), 32, layer)


@pytest.mark.parametrize("resize, side, kept", [
    ("interpolate", "teacher", {}), ("project", "teacher", {"projection.weight": (32, 24)}),
    ("project", "student", {"projection.weight": (24, 32)})])
def test_the_teacher_is_no_part_of_the_module(resize, side, kept):
    let = LET(small_teacher(), 32, resize=resize, side=side)
    assert {name: tuple(p.shape) for name, p in let.named_parameters()} == kept
    assert {name: tuple(p.shape) for name, p in let.state_dict().items()} == kept
    assert not list(let.buffers())


@pytest.mark.parametrize("layer, resize, expected", [
    # Per block, C = 24, H_kv D = 12, mlp 64 inside, T = 32: 2 (C (C + 12 + 12) + C C + 3 C 64) and 4 T C
    (-1, "interpolate", 3 * (2 * (24 * 48 + 24 * 24 + 3 * 24 * 64) + 4 * 32 * 24)),
    (2, "interpolate", 2 * (2 * (24 * 48 + 24 * 24 + 3 * 24 * 64) + 4 * 32 * 24)),
    (0, "interpolate", 0),
    (1, "project", 2 * (24 * 48 + 24 * 24 + 3 * 24 * 64) + 4 * 32 * 24 + 6 * 24 * 32)])
def test_let_flops_per_token(layer, resize, expected):
    assert LET(small_teacher(), 32, layer, resize=resize).flops_per_token(32) == expected


# ----------------------------------------------------------------------------------------------------------------------
# Loading


def other_tokenizer(tokenizer):
    """The same name and special token, but two byte tokens swapped."""
    ranks = {bytes([i]): i for i in range(256)} | {b"a": ord("b"), b"b": ord("a")}
    return tokenizer_to_dict(tiktoken.Encoding(tokenizer["name"], pat_str=tokenizer["pattern"], mergeable_ranks=ranks,
                                               special_tokens=tokenizer["special"]))


@pytest.fixture
def checkpoint(tiny):
    return train_module.train(tiny(steps=1, warmup_steps=1, eval_tokens=64))["checkpoint"]


@pytest.mark.parametrize("block_size", [32, 16])
def test_a_loaded_teacher_is_the_stored_model_frozen(checkpoint, block_size):
    stored = load_checkpoint(checkpoint)
    teacher = load_teacher(checkpoint, stored["tokenizer"], block_size)
    assert not teacher.training and not any(m.training for m in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    for name, p in teacher.named_parameters():
        assert torch.equal(p, stored["model"][name])


def test_a_teacher_of_a_shorter_context_is_refused(checkpoint):
    with pytest.raises(BadInput, match="--teacher=.*ckpt.pt.* 32 .*--block_size=33"):
        load_teacher(checkpoint, load_checkpoint(checkpoint)["tokenizer"], 33)


def test_a_teacher_of_another_tokenizer_is_refused(checkpoint):
    tokenizer = load_checkpoint(checkpoint)["tokenizer"]
    with pytest.raises(BadInput, match="--teacher=.*ckpt.pt.*tokenizer"):
        load_teacher(checkpoint, other_tokenizer(tokenizer), 32)
    load_teacher(checkpoint, {**tokenizer, "name": "renamed"}, 32)


def test_a_teacher_that_is_no_checkpoint_is_refused(tmp_path, checkpoint):
    (tmp_path / "text.pt").write_text("not a checkpoint")
    for name in ("none.pt", "text.pt"):
        with pytest.raises(BadInput, match=name):
            load_teacher(tmp_path / name, load_checkpoint(checkpoint)["tokenizer"], 32)
