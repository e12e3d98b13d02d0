"""teacher.py generate: sampling by inversion, batches, resuming, scores and filters, each against a plain form."""
import json
import math
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model

import train as train_module
from model import BadInput, Cache, generate, tokenizer_from_dict
from teacher import (RoomyCache, continue_prompts, distinct, draw_prompts, log_likelihood, main, pick_by, read_corpus,
                     read_samples, select)

torch.set_num_threads(1)
SSM = dict(d_state=8, ssm_head_dim=16, chunk_size=8)
KINDS = {"attention": {}, "mamba2": {**SSM, "mixer": "mamba2"}, "hybrid": {**SSM, "mixer": "hybrid"}, "experts": dict(n_experts=3)}
V = 257  # bytes and the end of text


@pytest.fixture
def checkpoint(tmp_path):
    def make(name="teacher.pt", seed=0, **kw):
        model = tiny_model(seed, vocab_size=V, block_size=64, **kw)
        torch.save({"format": "nanolet-1", "model": model.state_dict(), "model_config": asdict(model.config),
                    "tokenizer": train_module.named_tokenizer("bytes")}, tmp_path / name)
        return model, tmp_path / name

    return make


ENC = tokenizer_from_dict(train_module.named_tokenizer("bytes"))
NO_END, NONE = torch.zeros(V, dtype=torch.bool), torch.zeros(0, dtype=torch.int64)


# Prompts


@pytest.mark.parametrize("kind", ["folder", "glob", "file", "one document", "stdlib"])
def test_prompts_come_from_what_train_trains_on_and_never_from_what_it_holds_out(kind, corpus, tmp_path):
    (tmp_path / "two.txt").write_text("".join(f"line {i}\n" for i in range(99)) + "<|endoftext|>b\n" * 30)
    (tmp_path / "one.txt").write_text("".join(f"line {i}\n" for i in range(999)))
    data = {"folder": str(corpus), "glob": f"{corpus}/file1*.txt", "file": str(tmp_path / "two.txt"),
            "one document": str(tmp_path / "one.txt"), "stdlib": "stdlib"}[kind]
    train, held_out = train_module.split_documents(train_module.read_documents(*train_module.find_files(data), data))
    assert read_corpus(data) == [text for _, text in train] and held_out


def test_prompts_are_beginnings_of_lines_all_different_and_the_seeds(corpus):
    documents = ["héllo\nwörld\n\nlast line", "日本語\nx"]
    prompts = draw_prompts(documents, ENC, 6, 4, 0)
    lines = {line + "\n" for d in documents for line in d.split("\n")}
    texts = [bytes(ids).decode() for ids in prompts]  # whole characters
    assert len({*texts}) == 6 and all(any((line + "x").startswith(t) or t.startswith(line) for line in lines) for t in texts)
    assert max(map(len, prompts)) == 4 and [3] == [len(p) for p in prompts if bytes(p).decode() == "日"]
    assert draw_prompts(documents, ENC, 6, 4, 0) == prompts
    with pytest.raises(BadInput, match="--n_prompts=7"):
        draw_prompts(documents, ENC, 7, 4, 0)


# Sampling


@pytest.mark.parametrize("top_p", [1.0, 0.8])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_picks_have_the_probabilities_that_the_formula_gives(temperature, top_p):
    """Uniform numbers spread evenly over [0, 1): each token comes as often as its probability, to one in all."""
    n, logits = 4096, torch.tensor([0.3, -1.0, 2.0, 1.5, -math.inf, 0.0])
    p = (logits.double() / temperature).softmax(-1)
    order = sorted(range(6), key=lambda i: -p[i])
    kept, total = [], 0.0
    for i in order:
        if total < top_p:
            kept.append(i)
        total += p[i].item()
    nucleus = torch.tensor([p[i].item() if i in kept else 0.0 for i in range(6)])
    uniform = (torch.arange(n) + 0.5) / n
    got = pick_by(uniform, logits.expand(n, 6), torch.full((n,), temperature), top_p).bincount(minlength=6)
    assert (got - n * nucleus / nucleus.sum()).abs().max() <= 1.01
    ends = pick_by(torch.tensor([0.0, 1 - 2**-24, 1.0]), logits.expand(3, 6), torch.full((3,), temperature), top_p)
    assert all(i in kept and i != 4 for i in ends.tolist())


def test_top_p_among_more_tokens_than_are_sorted_first():
    logits, uniform = torch.zeros(2, 5000), torch.tensor([0.0, 0.999])
    a = pick_by(uniform, logits + torch.arange(5000) * -1e-6, torch.ones(2), 0.9)
    assert a[0] == 0 and abs(a[1].item() - 4500) < 20


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_rows_are_those_of_model_generate_and_a_row_does_not_see_the_others(kind):
    model = tiny_model(vocab_size=V, block_size=64, **KINDS[kind])
    idx = torch.randint(V, (5, 7), generator=torch.Generator().manual_seed(1))
    uniform = torch.rand(5, 30, generator=torch.Generator().manual_seed(2))
    temperature = torch.tensor([0.0, 1.0, 0.5, 0.0, 2.0])
    together = continue_prompts(model, idx, 30, temperature, 0.95, uniform, NONE, NO_END)
    greedy = generate(model, idx, 30, temperature=0)[:, 7:].tolist()
    assert together[0] == greedy[0] and together[3] == greedy[3] and together[1] != greedy[1]
    for i in range(5):
        one = continue_prompts(model, idx[i:i + 1], 30, temperature[i:i + 1], 0.95, uniform[i:i + 1], NONE, NO_END)
        assert one[0] == together[i]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_end_are_cut_there_and_leave_the_others_as_they_were(kind):
    model = tiny_model(vocab_size=V, block_size=64, **KINDS[kind])
    idx = torch.randint(V, (8, 5), generator=torch.Generator().manual_seed(1))
    uniform = torch.rand(8, 40, generator=torch.Generator().manual_seed(2))
    args = (40, torch.ones(8), 1.0, uniform, torch.tensor([3, 4]))
    full = continue_prompts(model, idx, *args, NO_END)
    assert not {3, 4} & {token for row in full for token in row}, "banned"
    ending = NO_END.clone()
    ending[[row[k] for row, k in zip(full[:5], (0, 3, 6, 7, 9))]] = True
    cut = continue_prompts(model, idx, *args, ending)
    assert cut == [row[:next((i for i, t in enumerate(row) if ending[t]), 39) + 1] for row in full]
    assert min(map(len, cut)) < 8 < 16 < max(map(len, cut)) or kind != "attention"


def test_the_cache_with_room_holds_what_the_plain_one_does():
    plain, roomy, g = Cache(), RoomyCache(), torch.Generator().manual_seed(0)
    for n in (3, 1, 1, 2, 9, 1, 1):
        k, v = torch.randn(2, 2, 3, n, 4, generator=g)
        for a, b in zip(plain.append(k, v), roomy.append(k, v)):
            assert torch.equal(a, b)
        roomy.length += n


# Scores and filters


def test_likelihood_is_that_of_one_text_at_a_time():
    judge = tiny_model(vocab_size=V, block_size=16)
    prompts, texts = ["a", "", "longer prompt", "é"], ["bcd", "x" * 40, "", "füür" * 9]
    got = log_likelihood(judge, ENC, prompts, texts, logits_at_once=3 * V * 16)
    assert got[2] is None
    for prompt, text, score in zip(prompts, texts, got):
        before, ids, total = [256, *prompt.encode()], list(text.encode()), 0.0
        for i, token in enumerate(ids):
            place = len(before) + i - 1  # of the token before, in windows of 16
            window = (before + ids)[place // 16 * 16:place + 1]
            with torch.no_grad():
                total += F.log_softmax(judge(torch.tensor([window]))[0][0, -1].double(), -1)[token].item()
        assert not ids or score == pytest.approx(total / len(ids), abs=1e-4)


@pytest.mark.parametrize("ids, n, expected", [([1, 2, 1, 2, 1], 2, 0.5), ([1] * 9, 3, 1 / 7), ([1, 2], 3, 1.0), ([], 1, 1.0)])
def test_distinct_n_by_hand(ids, n, expected):
    assert distinct(ids, n) == pytest.approx(expected)


def test_filters_by_hand():
    rows = [("p", "one two", -1.0), ("p", "one two", -1.0), ("p", "one  two", -0.5), ("p", "aaaaaaaaaa", -0.1), ("p", " \n", 0.0),
            ("p", "three", -9.0), ("p", "four", -0.7), ("q", "five", -2.0)]
    records = [{"sample": i, "prompt": p, "text": t, "score": s} for i, (p, t, s) in enumerate(rows)]
    kept, dropped = select(records, ENC, min_score=-3.0, best=1, min_distinct=0.5, distinct_n=2)
    assert [r["sample"] for r in kept] == [6, 7]
    assert dropped == {"empty": 1, "duplicate": 1, "near-duplicate": 1, "repetitive": 1, "low score": 1, "not best": 1}
    assert [r["sample"] for r in select(records, ENC)[0]] == [0, 3, 5, 6, 7]


# The command


def run(path, folder, corpus, *flags):
    main(["generate", str(path), str(folder), f"--prompts={corpus}", "--n_prompts=5", "--prompt_tokens=6", "--tokens=12",
          "--temperatures=1,0.5", "--seeds=0,3", "--top_p=0.9", "--device=cpu", *flags])
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_samples_do_not_depend_on_the_batch_and_a_killed_run_goes_on(checkpoint, corpus, tmp_path, capsys):
    _, path = checkpoint()
    whole = run(path, tmp_path / "a", corpus)
    assert [r["sample"] for r in whole] == [*range(20)] and len({r["text"] for r in whole}) > 15
    assert {(r["temperature"], r["seed"], r["top_p"]) for r in whole} == {(t, s, 0.9) for t in (1.0, 0.5) for s in (0, 3)}
    assert len({r["prompt"] for r in whole}) == 5 and all(r["score"] < 0 for r in whole)
    close = lambda rows: [{**r, "score": round(r["score"], 3)} for r in sorted(rows, key=lambda r: r["sample"])]  # noqa: E731
    assert close(run(path, tmp_path / "b", corpus, "--batch=3")) == close(whole)

    text = (tmp_path / "a" / "text.txt").read_bytes()
    lines = (tmp_path / "a" / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "a" / "text.txt").unlink()
    (tmp_path / "a" / "samples.jsonl").write_bytes(b"".join(lines[3:9]) + lines[9][:20])  # torn
    again = run(path, tmp_path / "a", corpus, "--batch=4")
    assert [r["sample"] for r in again[:6]] == [*range(3, 9)] and close(again) == close(whole)
    assert (tmp_path / "a" / "text.txt").read_bytes() == text
    before = (tmp_path / "a" / "samples.jsonl").read_bytes()
    capsys.readouterr()
    run(path, tmp_path / "a", corpus, "--best=1")  # another filter samples nothing anew
    assert (tmp_path / "a" / "samples.jsonl").read_bytes() == before and "5 of 20 samples" in capsys.readouterr().out
    for flags, what in ((["--tokens=13"], "tokens"), (["--temperatures=1"], "temperatures"), (["--score=none"], "score, judge")):
        with pytest.raises(BadInput, match=f"holds samples of other {what}; name another folder"):
            main(["generate", str(path), str(tmp_path / "a"), f"--prompts={corpus}", "--n_prompts=5", "--prompt_tokens=6",
                  "--tokens=12", "--temperatures=1,0.5", "--seeds=0,3", "--top_p=0.9", "--device=cpu", *flags])


def test_the_text_is_what_train_reads_one_document_a_sample(checkpoint, corpus, tmp_path):
    _, path = checkpoint()
    rows = run(path, tmp_path / "a", corpus, "--score=none")
    assert all(r["score"] is None for r in rows)
    documents = train_module.read_documents(*train_module.find_files(str(tmp_path / "a" / "text.txt")), "")
    assert [text for _, text in documents] == [r["prompt"] + r["text"] for r in select(rows, ENC)[0]]


def test_a_reward_function_and_a_judge_of_ones_own(checkpoint, corpus, tmp_path, monkeypatch):
    _, path = checkpoint()
    _, judge = checkpoint("judge.pt", seed=7)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_reward.py").write_text(
        "def length(prompts, completions, **_):\n    return [len(p) - len(c) for p, c in zip(prompts, completions)]\n"
        "def bad(prompts, completions):\n    return [float('nan')] * len(prompts)\n")
    rows = run(path, tmp_path / "a", corpus, "--score=my_reward:length", "--best=2")
    assert all(r["score"] == len(r["prompt"]) - len(r["text"]) for r in rows)
    judged = run(path, tmp_path / "b", corpus, f"--judge={judge}")
    model = tiny_model(7, vocab_size=V, block_size=64)
    expected = log_likelihood(model, ENC, [r["prompt"] for r in judged], [r["text"] for r in judged])
    assert [r["score"] for r in judged] == pytest.approx(expected, abs=1e-4)
    for name in ("my_reward:bad", "my_reward:none", "no_such_module:f", "likely"):
        with pytest.raises(BadInput, match=f"--score={name}"):
            run(path, tmp_path / name[:4], corpus, f"--score={name}")


@pytest.mark.parametrize("flags, message", [
    (["--tokens=90"], "--prompt_tokens=16 --tokens=90: .* 64 tokens"), (["--temperatures=1,-1", "--batch=0"], "--batch=0.*\n.*--temp"),
    (["--prompts=nowhere/*.txt"], "--prompts=nowhere"), (["--judge=nothing.pt"], "--judge=nothing.pt: no such"),
    (["--best=1", "--score=none"], "--best=1: there is no score"), (["--seeds=1,1"], "--seeds=.*twice")])
def test_bad_input_is_one_message_and_writes_nothing(flags, message, checkpoint, corpus, tmp_path):
    _, path = checkpoint()
    with pytest.raises(BadInput, match=message):
        main(["generate", str(path), str(tmp_path / "out"), f"--prompts={corpus}", "--tokens=8", "--device=cpu", *flags])
    assert not (tmp_path / "out").exists()


def test_damaged_samples_and_a_folder_of_other_things_are_refused(checkpoint, corpus, tmp_path):
    _, path = checkpoint()
    (tmp_path / "s.jsonl").write_text('{"sample": 0}\nnot json\n{"sample": 1}\n')
    with pytest.raises(BadInput, match="s.jsonl: damaged"):
        read_samples(tmp_path / "s.jsonl")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("mine")
    with pytest.raises(BadInput, match="mine: is there already, with other things"):
        run(path, tmp_path / "mine", corpus)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes"]
    (tmp_path / "mine" / "samples.jsonl").write_text('{"mine": 1}')  # without a line's end, as after a kill
    with pytest.raises(BadInput, match="mine: is there already, with other things"):
        run(path, tmp_path / "mine", corpus)
    assert (tmp_path / "mine" / "samples.jsonl").read_text() == '{"mine": 1}'


def test_a_model_with_affine_blocks_writes_in_bf16(checkpoint, corpus, tmp_path):
    _, path = checkpoint(layer_pattern="ALA")
    run(path, tmp_path / "out", corpus, "--dtype=bf16", "--score=none")
    assert len((tmp_path / "out" / "samples.jsonl").read_text().splitlines()) > 1
