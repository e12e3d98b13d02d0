"""probes.py prune: affine blocks as blocks among others, the fit against lstsq, the arms against plain loops, and the command."""
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model
from torch.utils.flop_counter import FlopCounterMode

import model as model_module
import probes
import teacher
import train as train_module
from model import GPT, BadInput, generate, load_checkpoint, model_from_checkpoint
from optim import logical_pieces, module_of, place_parameters
from probes import (Moments, distil, fit_affine, mean_loss, pruned_checkpoint, prune_order, remove_blocks, replace_blocks,
                    seconds_per_pass)

torch.set_num_threads(1)
SSM = dict(d_state=8, ssm_head_dim=16, chunk_size=8)
KINDS = {"attention": {}, "mamba2": dict(SSM, mixer="mamba2"), "hybrid": dict(SSM, mixer="hybrid"),
         "pattern": dict(SSM, layer_pattern="MALH", n_layer=4), "experts": dict(n_experts=4)}


def batches(count=8, rows=4, length=24):
    return [torch.randint(97, (rows, length), generator=torch.Generator().manual_seed(i)) for i in range(count)]


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ----------------------------------------------------------------------------------------------------------------------
# The block


def test_an_affine_block_is_its_formula_and_costs_its_matrix():
    model, idx = tiny_model(layer_pattern="ALA"), batches(1)[0]
    block = model.blocks[1].affine
    _, (before, after) = model.trunk(idx, hidden=(1, 2))
    expected = before + torch.einsum("btc,dc->btd", before, block.weight) + block.bias
    torch.testing.assert_close(after, expected)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.blocks[1](before, None, None)
    shorter = tiny_model(layer_pattern="AA", n_layer=2)
    ours = model.flops_per_token(backward=False) - shorter.flops_per_token(backward=False)
    assert ours * idx.numel() == counter.get_total_flops()
    assert model.num_params() - shorter.num_params() == 32 * 32 + 32


def test_a_fresh_affine_block_does_nothing_and_its_parameters_have_their_places():
    torch.manual_seed(0)
    model = GPT(tiny_model(layer_pattern="ALM", **SSM).config)
    assert torch.equal(model.trunk(batches(1)[0], hidden=(1,))[1][0], model.trunk(batches(1)[0], hidden=(2,))[1][0])
    places = place_parameters(model)
    assert "blocks.1.affine.weight" in places["matrix"] and "blocks.1.affine.bias" in places["vector"]
    assert logical_pieces(model)["blocks.1.affine.weight"] == [("affine", 32)] and module_of("affine") == "affine"


@pytest.mark.parametrize("pattern", ["LA", "LM", "L"])
def test_sampling_through_affine_blocks_is_the_same_with_a_cache(pattern):
    model, idx = tiny_model(layer_pattern=pattern, n_layer=len(pattern), **SSM), batches(1)[0]
    assert torch.equal(generate(model, idx, 20), generate(model, idx, 20, use_cache=False))  # past block_size = 32


@pytest.mark.parametrize("flags", [dict(optimizer="muon", multipliers="vector", multiplier_modules="affine,mlp"),
                                   dict(optimizer="adamw", module_lr="affine=0.5", linearity="cosine")])
def test_affine_blocks_train_and_resume_bit_for_bit(tiny, tmp_path, flags):
    flags = dict(flags, layer_pattern="LAL", n_layer=3, steps=8)
    straight = train_module.train(tiny(**flags, out_dir=str(tmp_path / "straight")))
    assert straight["history"][-1]["val_loss"] < straight["history"][0]["val_loss"] - 0.1
    half = train_module.train(tiny(**{**flags, "schedule": "constant", "steps": 4}, out_dir=str(tmp_path / "half")))
    whole = train_module.train(tiny(**{**flags, "schedule": "constant"}, out_dir=str(tmp_path / "whole")))
    train_module.train(train_module.parse_flags([f"--resume={half['checkpoint']}", "--steps=8"]))
    one, other = (load_checkpoint(r["checkpoint"])["model"] for r in (whole, half))
    assert all(torch.equal(one[k], other[k]) for k in one) and one["blocks.0.affine.weight"].any()


# ----------------------------------------------------------------------------------------------------------------------
# Order and fit


def test_order_is_by_falling_score_and_respects_protection():
    nan = math.nan
    profile = [{"block": k + 1, "full": f, "free": r, "cosine": c} for k, (f, r, c) in enumerate(
        [(0.5, 0.9, 0.1), (0.99, 0.2, 0.2), (1.0, nan, 1.0), (0.7, 0.5, 0.3)])]
    assert prune_order(profile, "full") == [3, 2, 4, 1]
    assert prune_order(profile, "free") == [3, 1, 4, 2], "a block that adds nothing goes first"
    assert prune_order(profile, "cosine", protect=[3, 4]) == [2, 1]
    orders = {tuple(prune_order(profile, "random", seed=seed)) for seed in range(20)}
    assert len(orders) > 5 and all(sorted(order) == [1, 2, 3, 4] for order in orders)
    assert prune_order(profile, "random", seed=3) == prune_order(profile, "random", seed=3)


def moments(x, y, shifts=None):
    m = Moments(shifts and shifts.shift_x, shifts and shifts.shift_y)
    for a, b in zip(x.chunk(3), y.chunk(3)):
        m.add(a, b)
    return m


def test_fit_recovers_an_affine_map():
    x, x2, A, b = randn(400, 10) * 3 + 7, randn(100, 10, seed=1), randn(10, 10, seed=2) / 3, randn(10, seed=3)
    W, bias, _ = fit_affine(fit := moments(x, x @ A + b), moments(x2, x2 @ A + b, fit))
    torch.testing.assert_close(W, (A - torch.eye(10, dtype=torch.float64)).mT, atol=1e-8, rtol=0)
    torch.testing.assert_close(bias, b, atol=1e-7, rtol=0)


def test_fit_is_ridge_regression_on_the_difference_with_the_ridge_that_serves_other_tokens():
    """Near the identity and with few tokens, n = 1.33 d: the least-squares map is worse on new tokens than leaving the block
    out; a ridge on A - I is not. All by lstsq on rows stacked with sqrt(ridge) I."""
    d, n = 60, 80
    mixing = randn(d, d, seed=9) @ torch.diag(torch.logspace(0, -1.5, d, dtype=torch.float64))

    def tokens(n, seed):
        x = randn(n, d, seed=seed) @ mixing + 1
        return x, x + 0.1 * x @ randn(d, d, seed=8) / d**0.5 * 0.3 + 0.1 * randn(n, d, seed=seed + 1) * x.std() - 0.2

    (x, y), (x2, y2), (x3, y3) = tokens(n, 20), tokens(n, 30), tokens(5000, 40)
    W, b, ridge = fit_affine(fit := moments(x, y), moments(x2, y2, fit))

    def by_lstsq(ridge):
        mx, my = x.mean(0), y.mean(0)
        xc, dc = x - mx, (y - x) - (my - mx)
        scale = ridge * torch.linalg.eigvalsh(xc.mT @ xc)[-1]
        if math.isinf(ridge):
            B = torch.zeros(d, d, dtype=torch.float64)
        else:
            B = torch.linalg.lstsq(torch.cat((xc, scale.sqrt() * torch.eye(d, dtype=torch.float64))),
                                   torch.cat((dc, torch.zeros(d, d, dtype=torch.float64)))).solution
        return B, my - mx - mx @ B

    def error(B, b, x, y):
        return (x + x @ B + b - y).square().sum().item()

    torch.testing.assert_close(W, by_lstsq(ridge)[0].mT, atol=1e-8, rtol=1e-6)
    torch.testing.assert_close(b, by_lstsq(ridge)[1], atol=1e-7, rtol=1e-6)
    others = {r: error(*by_lstsq(r), x2, y2) for r in (math.inf, *(10.0 ** -j for j in range(13)))}
    assert min(others, key=others.get) == ridge and 1e-12 < ridge
    removed, plain, ours = ((y3 - x3).square().sum().item(), error(*by_lstsq(1e-12), x3, y3), error(W.mT, b, x3, y3))
    assert plain > removed > ours


# ----------------------------------------------------------------------------------------------------------------------
# The arms


@pytest.mark.parametrize("kind", KINDS)
def test_removing_is_a_loop_over_the_blocks_that_are_left(kind):
    model, idx = tiny_model(**KINDS[kind]), batches(1)[0]
    before = model(idx)[0].clone()
    pruned = remove_blocks(model, [2])
    x = model.embed(idx)
    for k, block in enumerate(model.blocks):
        if k != 1:
            x = block(x, model.cos[:24], model.sin[:24])
    assert torch.equal(pruned.trunk(idx)[0], x) and pruned.config.n_layer == model.config.n_layer - 1
    assert torch.equal(generate(pruned, idx, 12), generate(pruned, idx, 12, use_cache=False))
    assert torch.equal(model(idx)[0], before), "the model itself is not touched"
    assert pruned.num_params() == model.num_params() - sum(p.numel() for p in model.blocks[1].parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_replacing_leaves_no_more_error_than_removing(kind):
    """Exactly so for the state after the block, on the tokens that tune the ridge: removal is a point of its grid, but for b."""
    model = tiny_model(**KINDS[kind])
    replaced = replace_blocks(model, [2], batches())
    assert replaced.config.kinds()[1] == "L" and replaced.config.n_layer == model.config.n_layer
    tuned = torch.cat(batches()[3::4])
    with torch.no_grad():
        _, (x, y) = model.trunk(tuned, hidden=(1, 2))
        _, (z,) = replaced.trunk(tuned, hidden=(2,))
    assert (z - y).square().sum() < (x - y).square().sum()
    assert torch.equal(generate(replaced, tuned, 12), generate(replaced, tuned, 12, use_cache=False))


def test_an_affine_block_is_replaced_by_itself():
    model = tiny_model(layer_pattern="ALA")
    replaced = replace_blocks(model, [2], batches(12, rows=8))
    torch.testing.assert_close(replaced.blocks[1].affine.weight, model.blocks[1].affine.weight, atol=1e-4, rtol=0)
    torch.testing.assert_close(replaced(batches(1)[0])[0], model(batches(1)[0])[0], atol=1e-3, rtol=1e-3)


def test_maps_are_fitted_in_depth_order_on_what_the_maps_before_hand_on():
    model = tiny_model(n_layer=4)
    replaced = replace_blocks(model, [3, 1], batches(), skip_first=True)
    assert replaced.config.kinds() == "LALA"
    fit = held_out = None
    for i, idx in enumerate(batches()):
        with torch.no_grad():
            x = replaced.blocks[0](model.embed(idx), None, None)
            x = model.blocks[1](x, model.cos[:24], model.sin[:24])[:, 1:].flatten(0, 1)
            y = model.trunk(idx, hidden=(3,))[1][0][:, 1:].flatten(0, 1)
        if i % 4 == 3:
            held_out = held_out or Moments(fit.shift_x, fit.shift_y)
            held_out.add(x, y)
        else:
            fit = fit or Moments()
            fit.add(x, y)
    W, b, _ = fit_affine(fit, held_out)
    torch.testing.assert_close(replaced.blocks[2].affine.weight.double(), W, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(replaced.blocks[2].affine.bias.double(), b, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("everything", [False, True])
def test_distilling_comes_nearer_to_the_whole_model_and_moves_only_what_it_may(everything):
    model = tiny_model(n_layer=4)
    replaced = replace_blocks(model, [2], batches())
    before = {k: v.clone() for k, v in replaced.state_dict().items()}
    distilled = distil(replaced, model, batches(), 30, 3e-3, everything)

    def distance(other):
        with torch.no_grad():
            _, wanted = model.trunk(torch.cat(batches()), hidden=(2, 3, 4))
            _, found = other.trunk(torch.cat(batches()), hidden=(2, 3, 4))
        return sum(((a - b).norm() / b.norm()).square().item() for a, b in zip(found, wanted))

    assert distance(distilled) < 0.97 * distance(replaced)
    assert all(torch.equal(v, before[k]) for k, v in replaced.state_dict().items()), "a copy is trained"
    moved = {k for k, v in distilled.state_dict().items() if not torch.equal(v, before[k])}
    if everything:
        assert {"embed.weight", "blocks.0.mixer.o.weight", "blocks.3.mlp.down.weight"} < moved
    else:
        assert moved == {"blocks.1.affine.weight", "blocks.1.affine.bias"}


def test_loss_is_the_mean_over_all_tokens_and_speed_is_measured_in_turns():
    model, parts = tiny_model(), [batches(1, rows=3)[0], batches(1, rows=1)[0]]
    idx = torch.cat(parts)
    expected = F.cross_entropy(model(idx)[0][:, :-1].flatten(0, 1), idx[:, 1:].flatten())
    assert mean_loss(model, parts) == pytest.approx(expected.item(), rel=1e-5)
    calls = []

    class Model:
        def __init__(self, name):
            self.name = name

        def __call__(self, idx):
            calls.append(self.name)
            return torch.zeros(1, 1, 1), ()

    assert len(seconds_per_pass([Model("a"), Model("b")], idx, rounds=2)) == 2 and calls == ["a", "b"] * 3


# ----------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture
def text(tmp_path, corpus):
    path = tmp_path / "text.txt"
    path.write_text("".join(p.read_text() for p in sorted(corpus.iterdir()))[:12_000])
    return str(path)


RUNS = {"attention": dict(n_layer=3, multipliers="scalar", linearity="mse", linearity_weight=0.01, linearity_from=2),
        "mamba2": dict(SSM, mixer="mamba2"), "hybrid": dict(SSM, mixer="hybrid", n_layer=3), "experts": dict(n_experts=3),
        "completep": dict(n_layer=3, param="completep", base_n_embd=16, base_n_layer=1)}


@pytest.mark.parametrize("kind, arm, pattern", [("attention", "remove", "AA"), ("attention", "distil_all", None),
                                                ("mamba2", "replace", None), ("hybrid", "distil", None), ("experts", "remove", "A"),
                                                ("completep", "remove", "AA"), ("completep", "replace", None)])
def test_a_pruned_checkpoint_samples_is_measured_and_trains_like_any_other(tiny, tmp_path, text, capsys, kind, arm, pattern):
    ckpt = train_module.train(tiny(**RUNS[kind]))["checkpoint"]
    before = open(ckpt, "rb").read()
    probes.main(["prune", ckpt, f"--text={text}", "--blocks=1", f"--arms={arm}", "--orders=full,random", "--distil_steps=3", "--tokens=2000",
                 "--device=cpu"])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines() if "|" in line]
    assert [row[:2] for row in rows[2:]] == [["", "whole"], ["full", arm], ["random", arm]]
    assert open(ckpt, "rb").read() == before
    pruned = tmp_path / "run" / "pruned" / "ckpt.pt"
    made = load_checkpoint(pruned)
    kinds = made["model_config"]["layer_pattern"]
    assert kinds == pattern if pattern else kinds.count("L") == 1
    assert int(rows[3][5].replace(",", "")) == model_from_checkpoint(made).num_params()
    best = min(rows[3:], key=lambda row: float(row[3]))
    assert made["pruned"]["blocks"] == [int(best[2])]
    model_module.main([str(pruned), "--tokens=3", "--device=cpu"])
    probes.main(["linearity", str(pruned), f"--text={text}", "--tokens=500", "--device=cpu"])
    evaluated = train_module.train(train_module.parse_flags([f"--resume={pruned}"]))
    assert evaluated["step"] == 10 and math.isfinite(evaluated["val_loss"])
    kept = load_checkpoint(pruned)["model"], load_checkpoint(evaluated["checkpoint"])["model"]
    assert all(torch.equal(kept[0][name], w) for name, w in kept[1].items() if not name.endswith(".load"))
    after = train_module.train(train_module.parse_flags([f"--resume={pruned}", "--steps=20"]))
    assert after["val_loss"] < evaluated["val_loss"] and after["tokens"] == 20 * 256


def test_a_pruned_model_forgets_flags_of_blocks_that_it_has_not():
    model = tiny_model(**dict(SSM, layer_pattern="MA", n_layer=2, n_experts=3))
    flags = {"n_layer": 2, "layer_pattern": "MA", "mixer": "attention", "d_state": 8, "n_experts": 3, "linearity_from": 1,
             "balance_weight": 0.1, "let_student_layer": 2, "teacher": "auto", "linearity": "mse"}
    for chosen, left in (([2], {"d_state": 8}), ([1], {"n_experts": 3, "balance_weight": 0.1})):
        pruned = remove_blocks(model, chosen)
        made = pruned_checkpoint({"config": flags}, pruned)
        assert made["config"] == {**left, "n_layer": 1, "layer_pattern": pruned.config.kinds(), "mixer": "attention",
                                  "linearity_from": 0, "let_student_layer": 1, "teacher": "auto", "linearity": "mse"}
        assert made["model_config"]["n_experts"] == left.get("n_experts", 0)
        assert made["model_config"]["d_state"] == left.get("d_state", 64)


@pytest.mark.parametrize("flags, message", [
    (["--blocks=2"], "--blocks=2: .*ckpt.pt has 2 blocks, of which 1 to 1 can go"),
    (["--blocks=0"], "--blocks=0: numbers from 1 on"), (["--blocks=one"], "--blocks=one: "),
    (["--protect=3"], "--protect=3: .*ckpt.pt has blocks 1 to 2"), (["--protect=1,2"], "2 blocks, of which 1 to 0 can go"),
    (["--orders=best"], "--orders=best: out of full, free, cosine, random"), (["--arms=cut"], "--arms=cut: out of remove"),
    (["--tokens=100"], "96 tokens in whole contexts of 32; at least 512, 16 contexts, are needed"),
    (["--context=33"], "--context=33: from 2 to the model's 32"), (["--distil_steps=0"], "--distil_steps=0"),
    (["--distil_lr=0"], "--distil_lr=0"), (["--device=abacus"], "--device=abacus: no such device")])
def test_what_cannot_be_pruned_is_refused_and_nothing_written(tiny, tmp_path, text, flags, message):
    folder = tmp_path / "run"
    folder.mkdir()
    model, config = tiny_model(vocab_size=257, n_layer=2), tiny()
    tokenizer = train_module.named_tokenizer("bytes")
    torch.save({"format": "nanolet-1", "model": model.state_dict(), "model_config": vars(model.config), "config": vars(config),
                "tokenizer": tokenizer}, folder / "ckpt.pt")
    with pytest.raises(BadInput, match=message):
        probes.main(["prune", str(folder / "ckpt.pt"), f"--text={text}", *flags])
    assert [p.name for p in folder.iterdir()] == ["ckpt.pt"]


@pytest.mark.parametrize("damage, message", [
    (lambda c: c.pop("tokenizer"), "ckpt.pt: damaged, without tokenizer"),
    (lambda c: c["model_config"].update(n_embd=8), "ckpt.pt: damaged, its weights do not fit"),
    (lambda c: c["model_config"].update(n_embd="wide"), "ckpt.pt: damaged, its weights do not fit"),
    (lambda c: c["model"]["head.weight"].fill_(math.nan), "ckpt.pt: has weights that are not finite")])
def test_damaged_checkpoints_are_refused_by_name(tiny, tmp_path, text, damage, message):
    model = tiny_model(vocab_size=257, n_layer=2)
    ckpt = {"format": "nanolet-1", "model": model.state_dict(), "model_config": dict(vars(model.config)), "config": vars(tiny()),
            "tokenizer": train_module.named_tokenizer("bytes")}
    damage(ckpt)
    torch.save(ckpt, tmp_path / "ckpt.pt")
    for command in (probes.main, lambda words: teacher.main(["export", words[1], str(tmp_path / "out")])):
        with pytest.raises(BadInput, match=message):
            command(["prune", str(tmp_path), f"--text={text}"])
    assert {p.name for p in tmp_path.iterdir()} == {"text.txt", "ckpt.pt"}


def test_a_folder_that_holds_a_checkpoint_is_left_alone(tiny, tmp_path, text):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "ckpt.pt").write_text("mine")
    ckpt = train_module.train(tiny(steps=2))["checkpoint"]
    with pytest.raises(BadInput, match="holds a checkpoint already"):
        probes.main(["prune", ckpt, f"--text={text}", "--arms=remove", f"--out_dir={tmp_path / 'here'}", "--device=cpu"])
    assert (tmp_path / "here" / "ckpt.pt").read_text() == "mine"


def test_models_of_transformers_are_measured_and_ours_among_them_pruned(tmp_path, text):
    """A Llama is our own GPT and can be pruned; a GPT-NeoX is not and can be measured, its text read by its own tokenizer."""
    transformers = pytest.importorskip("transformers")
    shape = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token="<|endoftext|>")
    torch.manual_seed(0)
    for name, model in (("llama", transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))),
                        ("neox", transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**shape)))):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        probes.main(["linearity", str(tmp_path / name), f"--text={text}", "--tokens=2000", "--context=32", "--device=cpu"])
    prune = ["--blocks=1", "--arms=remove,replace", f"--text={text}", "--tokens=2000", "--context=32", "--device=cpu"]
    probes.main(["prune", str(tmp_path / "llama"), *prune, f"--out_dir={tmp_path / 'out'}"])
    made = model_from_checkpoint(load_checkpoint(tmp_path / "out" / "ckpt.pt")).eval()
    assert made.config.rope_base == 10_000 and set(made.config.kinds()) <= {"A", "L"}
    model_module.main([str(tmp_path / "out" / "ckpt.pt"), "--tokens=3", "--device=cpu"])
    with pytest.raises(BadInput, match="not one of model.py's"):
        probes.main(["prune", str(tmp_path / "neox"), *prune, f"--out_dir={tmp_path / 'out2'}"])
    with pytest.raises(BadInput, match="the model has changed"):
        train_module.train(train_module.parse_flags([f"--resume={tmp_path / 'out' / 'ckpt.pt'}", "--tokenizer=bytes", "--device=cpu",
                                                     f"--data={text}", "--batch_tokens=2048"]))


def byte_level():
    """A byte-level BPE of the package tokenizers: all bytes, no merges but one."""
    import tokenizers
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(letters)} | {"re": 256, "<|endoftext|>": 257}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("r", "e")]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    return made
