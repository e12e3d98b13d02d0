"""teacher.py export: transformers reads the folder to the same logits, the same greedy text and the same token ids."""
import errno
import json
import random
import unicodedata
from dataclasses import asdict

import pytest
import tiktoken
import torch
from conftest import tiny_model

import train as train_module
from model import BadInput, generate, tokenizer_from_dict, tokenizer_id, tokenizer_to_dict
from teacher import export, load_pretrained, main, oniguruma, tokenizer_to_hf

transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)
SSM = dict(mixer="mamba2", d_state=8, ssm_head_dim=16, n_groups=2, chunk_size=8)
HYBRID = {**SSM, "mixer": "hybrid", "qk_norm": False}
V = 300  # no multiple of 64
MODELS = {
    "Llama": dict(qk_norm=False), "Llama, tied": dict(qk_norm=False, tie_embeddings=True, rope_base=50.0, norm_eps=1e-2),
    "Qwen3": dict(), "Qwen3, one kv head": dict(n_kv_head=1, mlp_hidden=40),
    "Arcee, relu2": dict(qk_norm=False, mlp="relu2"), "Arcee, gelu": dict(qk_norm=False, mlp="gelu", tie_embeddings=True),
    "Qwen3Moe": dict(n_experts=4), "Mixtral": dict(n_experts=3, experts_per_token=1, qk_norm=False, expert_hidden=24),
    "Mamba2": SSM, "Mamba2, tied": {**SSM, "n_groups": 1, "tie_embeddings": True, "norm_eps": 1e-3, "expand": 1, "d_conv": 2},
    "FalconH1": HYBRID, "FalconH1, no norm": {**HYBRID, "ssm_norm": False, "tie_embeddings": True}}
RATIOS = dict(width_ratio=1.5, depth_ratio=2.0, head_ratio=3.0)  # --param=completep
MODELS |= {f"{name}, completep": {**MODELS[name], **RATIOS} for name in ("Llama, tied", "Qwen3", "Qwen3Moe", "FalconH1")}


@pytest.fixture(scope="module")
def tokenizer(corpus):
    ranks = train_module.train_bpe((p.read_text() for p in corpus.iterdir()), V - 1)
    return train_module.make_tokenizer("bpe", ranks, train_module.PATTERN)


@pytest.fixture
def checkpoint(tokenizer, tmp_path):
    def make(name="ckpt.pt", tokenizer=tokenizer, **kw):
        model = tiny_model(vocab_size=V, **kw)
        torch.save({"format": "nanolet-1", "model": model.state_dict(), "model_config": asdict(model.config),
                    "tokenizer": tokenizer}, tmp_path / name)
        return model, tmp_path / name

    return make


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_transformers_gives_the_same_logits_and_greedy_text(name, checkpoint, tmp_path):
    model, path = checkpoint(**MODELS[name])
    export(path, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(theirs).__name__ == name.split(",")[0] + "ForCausalLM" and theirs.dtype == torch.float32
    idx = torch.randint(V, (2, 27), generator=torch.Generator().manual_seed(1))
    logits = model(idx)[0]
    assert logits.std() > 0.3, "the comparison would mean little"
    torch.testing.assert_close(theirs(idx).logits, logits, rtol=1e-4, atol=1e-4)
    greedy = theirs.generate(idx[:, :5], attention_mask=torch.ones(2, 5, dtype=torch.int64), max_new_tokens=10, do_sample=False,
                             eos_token_id=None)
    assert torch.equal(greedy, generate(model, idx[:, :5], 10, temperature=0))


@pytest.mark.parametrize("kw, flags", [
    (dict(layer_pattern="ALA"), "other letters than L"), (dict(mlp="relu2"), "--mlp=swiglu or --qk_norm=false"),
    (dict(mlp="gelu", n_experts=2), "--mlp=swiglu"),
    (dict(layer_pattern="AMA", **{k: v for k, v in SSM.items() if k != "mixer"}), "one --mixer"),
    ({**SSM, "ssm_norm": False}, "--ssm_norm=true"), ({**HYBRID, "qk_norm": True}, "--qk_norm=false"),
    ({**HYBRID, "n_experts": 2}, "--n_experts=0"), ({**HYBRID, "mlp": "relu2"}, "--mlp=swiglu")])
def test_what_no_model_there_computes_is_refused_with_the_flags_to_train_with(kw, flags, checkpoint, tmp_path):
    _, path = checkpoint(**kw)
    with pytest.raises(BadInput, match=f"ckpt.pt: .*transformers.*{flags}"):
        export(path, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"]


@pytest.mark.parametrize("name", ["Llama, tied", "Qwen3", "Qwen3Moe", "Mamba2"])
def test_an_exported_student_can_be_a_teacher(name, checkpoint, tokenizer, tmp_path):
    model, path = checkpoint(**MODELS[name])
    export(path, tmp_path / "out")
    again, its = load_pretrained(tmp_path / "out")
    assert tokenizer_id(its) == tokenizer_id(tokenizer)
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    for key, w in ours.items():
        rows = V if key in ("embed.weight", "head.weight") else None
        assert torch.equal(theirs[key][:rows], w[:rows]), key


def mixed_text(corpus):
    """Source code, every assigned character in turn, runs of blanks and signs, joiners, words of random letters."""
    rng = random.Random(0)
    characters = [chr(i) for i in range(0x110000) if unicodedata.category(chr(i)) not in ("Cs", "Cn", "Co")][::13]
    runs = "".join(rng.choice(" \n\t\r=-#_'\"1a\u200d\u200c\u0301²½ⓐ\u00a0\u2028") * rng.choice((1, 1, 2, 3, 7)) for _ in range(3_000))
    words = " ".join("".join(rng.choices("alphbetgm_", k=rng.randrange(1, 12))) for _ in range(2_000))
    return "".join(p.read_text() for p in sorted(corpus.iterdir())) + "".join(characters) + " x".join(characters[::20]) + runs + words


CL100K = (r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s""")
GPT2 = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


@pytest.mark.parametrize("pattern", [train_module.PATTERN, train_module.BYTES_PATTERN, GPT2, CL100K],
                         ids=["ours", "bytes", "gpt2", "cl100k"])
def test_token_ids_are_tiktokens_on_every_kind_of_text(pattern, tokenizer, corpus, tmp_path):
    ranks = {bytes.fromhex(t): rank for t, rank in tokenizer["ranks"].items()}
    d = tokenizer_to_dict(tiktoken.Encoding("t", pat_str=pattern, mergeable_ranks=ranks, special_tokens={
        "<|endoftext|>": V - 1, "<|other|>": V + 5}))  # ids may have holes
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_to_hf(d)))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    text = "<|endoftext|>a <|other|>\n\n" + mixed_text(corpus) + " <|other|>  <|endoftext|>   "
    ids = tokenizer_from_dict(d).encode(text, allowed_special="all")
    assert len(set(ids)) > 150 and theirs(text)["input_ids"] == ids
    assert theirs.decode(ids) == text


@torch.no_grad()
def test_exported_tokenizer_and_settings_as_auto_classes_read_them(checkpoint, corpus, tmp_path):
    model, path = checkpoint()
    export(path, tmp_path / "out", "bf16")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = mixed_text(corpus)[:50_000] + "<|endoftext|>"
    ours = tokenizer_from_dict(torch.load(path)["tokenizer"])
    assert tokenizer(text)["input_ids"] == ours.encode(text, allowed_special="all")
    assert len(tokenizer) == V and tokenizer.eos_token_id == tokenizer.bos_token_id == ours.eot_token
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.dtype == torch.bfloat16 and theirs.config.max_position_embeddings == 32
    assert theirs.generation_config.eos_token_id == ours.eot_token
    assert torch.equal(theirs.lm_head.weight, model.head.weight[:V].bfloat16())


def test_dollar_and_counts_of_a_pattern_keep_their_meaning_in_the_other_engine():
    assert oniguruma(r"\s++$|[$\]]\$|\p{N}{1,3}+x") == r"\s++\z|[$\]]\$|(?>\p{N}{1,3})x"


def test_a_folder_with_something_in_it_is_left_alone_and_a_failure_leaves_none(checkpoint, tmp_path, monkeypatch):
    _, path = checkpoint()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    for folder in ("full", "ckpt.pt"):
        with pytest.raises(BadInput, match=f"{folder}: .*not empty"):
            export(path, tmp_path / folder)
    import safetensors.torch

    def full(*_):
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    (tmp_path / "empty").mkdir()
    for folder in ("new", "empty"):
        with pytest.raises(OSError) as e:
            export(path, tmp_path / folder)
        assert e.value.errno == errno.ENOSPC and folder in e.value.filename
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt.pt", "empty", "full"]
    assert not list((tmp_path / "empty").iterdir()) and (tmp_path / "full" / "notes").read_text() == "mine"


def test_the_command_and_what_it_needs(checkpoint, tmp_path, monkeypatch, capsys):
    _, path = checkpoint()
    main(["export", str(path), str(tmp_path / "a" / "out")])
    assert "Qwen3ForCausalLM" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "a" / "out").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    with pytest.raises(BadInput, match="pip install safetensors"):
        main(["export", str(path), str(tmp_path / "b")])
