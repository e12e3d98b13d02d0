"""train.py: tokenizers, tokens, order of the data, evaluation, the run, resuming, several ranks,
signals and failures, flags."""
import contextlib
import io
import json
import math
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import conftest
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import figures, flags_of, lines, run_python, same, state, stop_at, tiny_config

import train as t
from model import cut_text, encode, generate, load_checkpoint, model_from_checkpoint

EOT = "<|endoftext|>"
EVERY = "".join(map(chr, [*range(0xd800), *range(0xe000, 0x110000)]))  # all but surrogates


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache that no other test shares."""
    monkeypatch.setenv("NANOLET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def random_text(seed: int, pieces: int = 300) -> str:
    rng = random.Random(seed)
    kinds = conftest.ODD, EVERY[:128], EVERY
    return "".join(rng.choice(rng.choices(kinds, (5, 3, 2))[0]) for _ in range(pieces))


def random_letters(letters: str, n: int) -> str:
    return "".join(random.Random(0).choices(letters, k=n))


def write_text(folder: Path, texts: dict[str, str]):
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode())


def many_texts(n=40) -> dict[str, str]:
    return {f"{'ab'[i % 2]}/doc{i}.txt": f"document {i}\r\n\tnaïve 北京 {EOT[:5]}\n"
            + random_text(i, 50 + 5 * i) for i in range(n)}


def files_below(folder: Path) -> dict:
    return {p: p.stat().st_mtime_ns for p in sorted(folder.rglob("*")) if p.is_file()}


def ids_of(part: t.Blocks) -> list[int]:
    return [int(i) for array in part.arrays for i in array]


def texts_of(part: t.Blocks, enc) -> list[str]:
    """The texts between the end-of-text tokens of a part."""
    ids = ids_of(part)
    starts = [i for i, token in enumerate(ids) if token == enc.eot_token]
    assert starts[0] == 0
    return [enc.decode(ids[start + 1:end], errors="strict")
            for start, end in zip(starts, starts[1:] + [len(ids)])]


def rejoined(trained, held_out, texts) -> list[str]:
    """All documents, sorted, where at most one of these texts was cut in two."""
    cut = [(head, tail) for head in trained for tail in held_out if head + tail in texts]
    assert len(cut) <= 1
    whole = [text for text in trained + held_out if all(text not in pair for pair in cut)]
    return sorted(whole + [head + tail for head, tail in cut])


def documents_of(data: t.Data, texts) -> list[str]:
    """The documents that the tokens of both parts spell."""
    enc = t.tokenizer_from_dict(data.tokenizer)
    return rejoined(texts_of(data.train, enc), texts_of(data.val, enc), texts)


# Tokenizers
def replace_pair(word, pair, new):
    out = []
    for token in word:
        if out and (out[-1], token) == pair:
            out[-1] = new
        else:
            out.append(token)
    return out


def naive_bpe(texts, vocab_size):
    """(tokens, words as their ids): counts all pairs of all words anew before every merge; ties go
    to the pair of lowest ids."""
    words = [list(word.encode()) for text in texts for piece in cut_text(text)
             for word in re.findall(t.PATTERN, piece)]
    tokens = [bytes([i]) for i in range(256)]
    while len(tokens) < vocab_size:
        counts = Counter(pair for word in words for pair in zip(word, word[1:]))
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        words = [replace_pair(word, best, len(tokens)) for word in words]
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return tokens, words


BPE_TEXTS = {
    "one letter": ["aaaaaaaaaaaaa aaa aaaa aaaaa a"],
    "ties": ["ab cd ef gh ba dc fe hg"],
    "two letters": [random_letters("ab ", 400), random_letters("ba ", 99)],
    "three letters": [random_letters("abc    ", 600)],
    "code": ["def f(x):\n    return x + 1\n\n\ndef g(y):\n    return f(y) * 100000\n" * 3,
             "    if x:\n\treturn\r\n"],
    "not ascii": ["naïve café, Größe größer; Straße 北京 北京市 नमस्ते 👩‍🚀👩‍🚀 ёлка e\u0301"] * 2,
    "odd characters": [random_text(3, 400), random_text(4, 400)],
    "several texts": ["the cat the hat", "the rat", "", "that cat"],
    "no blanks": [random_letters("ACGT", 1000)],  # 8 pieces
}


@pytest.mark.exercise("train_bpe")
@pytest.mark.parametrize("name", BPE_TEXTS)
def test_bpe_training_finds_the_merges_of_a_naive_trainer_in_their_order(name):
    texts = BPE_TEXTS[name]
    for vocab_size in (256, 257, 280, 400):  # some of these texts run out of pairs before 400
        tokens, _ = naive_bpe(texts, vocab_size)
        for order in (texts, texts[::-1]):
            ranks = t.train_bpe(order, vocab_size)
            assert list(ranks.items()) == [(token, i) for i, token in enumerate(tokens)]


def test_tiktoken_encodes_with_the_trained_merges_in_the_order_of_training():
    texts = [*BPE_TEXTS["code"], random_letters("abc  ", 400), "größe 北京! Ωμέγα – 12345 \n\n y"]
    _, words = naive_bpe(texts, 340)
    enc = t.tokenizer_from_dict(t.tokenizer_from_ranks("bpe", t.train_bpe(texts, 340), t.PATTERN))
    assert [i for text in texts for i in enc.encode_ordinary(text)] == sum(words, [])


@pytest.fixture(scope="module", params=["bpe", "bytes"])
def tokenizer(request):
    if request.param == "bytes":
        return t.make_tokenizer_for(t.Config(tokenizer="bytes"), ())
    texts = [text for texts in BPE_TEXTS.values() for text in texts]
    return t.tokenizer_from_ranks("bpe", t.train_bpe(texts, 600), t.PATTERN)


def test_every_text_survives_encoding_with_end_of_text_as_plain_characters(tokenizer):
    """Ordinary text is encoded whole. A lone surrogate becomes a question mark."""
    enc = t.tokenizer_from_dict(tokenizer)
    lengths = t.token_lengths(enc)
    assert enc.eot_token == enc.n_vocab - 1 and lengths[enc.eot_token] == 0
    for text in ["", EVERY, f"a{EOT}b", "=" * 100 + "\n" + "-" * 128, *map(random_text, range(20))]:
        ids = enc.encode_ordinary(text)
        assert enc.decode(ids, errors="strict") == text and enc.eot_token not in ids
        assert lengths[ids].sum() == len(text.encode())
        assert tokenizer["name"] == "bpe" or ids == list(text.encode())
        assert text == EVERY or encode(enc, text) == ids
    assert enc.decode(encode(enc, "caf\xe9 \ud83d. \udcff")) == "caf\xe9 ?. ?"
    assert t.train_bpe(["\ud83d\ud83d \ud83d\ud83d"], 258) == t.train_bpe(["?? ??"], 258)
    assert [len(piece) for piece in cut_text("-" * 300)] == [128, 128, 44]


@pytest.mark.parametrize("run", [" ", "\xa0", "a", "-", "ACGTTGCA", "\u5317", "line of \xe4\xf6\n"])
def test_a_run_of_a_million_characters_is_trained_on_and_encoded_whole(run, tokenizer, tmp_path):
    """Also where a document is cut into pieces to be encoded, at line ends if there are some."""
    enc = t.tokenizer_from_dict(tokenizer)
    text = f"x = 1\n{run * (10**6 // len(run))}\nend\n"
    assert enc.decode(encode(enc, text), errors="strict") == text
    t.write_shard(tmp_path / "x.bin", [("a", text), ("b", text[-9:])], enc)
    ids = t.open_shard(tmp_path / "x.bin", enc.n_vocab).tolist()
    assert ids == [enc.eot_token, *encode(enc, text), enc.eot_token, *encode(enc, text[-9:])]
    assert [*t.train_bpe([text], 258)] == [*t.train_bpe([text[:6], run * 999], 258)]


# Text to tokens, and their cache
@pytest.mark.parametrize("flags", [{"tokenizer": "bytes"}, {"tokenizer": "bpe", "vocab_size": 300}])
def test_tokens_are_the_documents_each_after_an_end_of_text_token(flags, folder, tiny, cache):
    """A tokenizer is trained on the training documents alone."""
    texts = many_texts()
    write_text(folder, texts)
    data = t.load_data(tiny(data=str(folder), **flags))
    assert documents_of(data, texts.values()) == sorted(texts.values())
    enc = t.tokenizer_from_dict(data.tokenizer)
    assert enc.n_vocab == flags.get("vocab_size", 257)
    if flags["tokenizer"] == "bpe":
        trained, held_out = texts_of(data.train, enc), texts_of(data.val, enc)
        tokens = [enc.decode_single_token_bytes(i) for i in range(299)]
        assert tokens == naive_bpe(trained, 299)[0] != naive_bpe(trained + held_out, 299)[0]


@pytest.mark.parametrize("texts", [
    *([f"{i} ".ljust(n, "x") for i, n in enumerate(sizes)] for sizes in (
        range(20, 120), [19_000, 200_000], [500] * 30 + [300_000], [100_000, 7], [1000])),
    ["a title\n" + "x" * 10_000], ["".join("x" * (i * 7 % 60) + "\n" for i in range(400))]])
def test_a_tenth_of_the_characters_is_held_out_up_to_a_line_end_whatever_the_documents(texts):
    documents = [(f"doc{i}#0", text) for i, text in enumerate(texts)]
    split = t.split_documents(documents)
    trained, held_out = ([text for _, text in part] for part in split)
    assert rejoined(trained, held_out, texts) == sorted(texts)
    assert 0.09 <= sum(map(len, held_out)) / sum(map(len, texts)) <= 0.11
    assert trained[0].endswith("\n") or texts[0].count("\n") < 2
    assert t.split_documents(random.Random(0).sample(documents, len(documents))) == split


def test_a_line_of_end_of_text_separates_documents_and_elsewhere_it_is_text(folder, tiny, cache):
    parts = [f"story {i} {EOT} {EOT}\nits end{EOT}\n" + "word " * 20 for i in range(50)]
    line = f"\n{EOT}\n"
    text = line.join(parts[:30]) + f"\r\n{EOT} \r{line}{EOT}\n" + line.join(parts[30:]) + line
    write_text(folder, {"stories.txt": text})
    data = t.load_data(tiny(data=str(folder / "stories.txt")))
    assert [text.rstrip("\r") for text in documents_of(data, parts)] == sorted(parts)


def test_names_and_records_that_are_not_unicode_are_read(folder, tiny, cache, tmp_path):
    for name in (b"caf\xe9.txt", b"ok.txt"):
        Path(os.fsdecode(bytes(folder) + b"/" + name)).write_text("def f(x):\n    return x\n" * 99)
    data = t.load_data(tiny(data=str(folder)))
    assert len(ids_of(data.train)) + len(ids_of(data.val)) == 2 * 99 * 23 + 3
    records = tmp_path / "records.jsonl"
    line = r'{"input": "how %d \ud83d?", "label": "yes", "rationale": "so \udc00"}'
    records.write_text("\n".join(line % i for i in range(20)))
    data = t.load_data(tiny(data=str(records), distill="step_by_step"))
    assert len(data.val) == 2
    text = t.tokenizer_from_dict(data.tokenizer).decode(data.train.batch([0])[0][0].tolist())
    assert " ??\nyes" in text


@pytest.mark.parametrize("n_vocab, dtype", [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_a_token_takes_two_bytes_where_the_vocabulary_fits_and_else_four(n_vocab, dtype, tmp_path):
    enc = SimpleNamespace(n_vocab=n_vocab, eot_token=n_vocab - 1,
                          encode_ordinary_batch=lambda texts, num_threads: [[n_vocab - 2, 5]] * 2)
    t.write_shard(tmp_path / "x.bin", [("a", "text")], enc)
    tokens = t.open_shard(tmp_path / "x.bin", n_vocab)
    assert tokens.dtype == dtype and tokens.tolist() == [n_vocab - 1, n_vocab - 2, 5]


def test_text_is_found_by_folder_glob_and_name_but_not_what_is_hidden(folder):
    write_text(folder, {"b.txt": "b", "sub/a.md": "a", ".git/x": "x", "sub/.hidden": "h"})
    for data, names in (("", ["b.txt", "sub/a.md"]), ("*.txt", ["b.txt"]), ("**/*.md", ["a.md"]),
                        ("*/a.*", ["a.md"]), ("b.txt", ["b.txt"])):
        root, files = t.find_files(str(folder / data))
        assert [p.relative_to(root).as_posix() for p in files] == names
    for link, target in (("sub/up", ""), ("up", ""), ("same.txt", "b.txt"), ("far", "../far")):
        (folder / link).symlink_to(folder / target)  # the first two would never end
    write_text(folder.parent / "far", {"f.txt": "f", "deep/g.txt": "g"})
    names = ["b.txt", "far/deep/g.txt", "far/f.txt", "sub/a.md"]
    root, files = t.find_files(str(folder))
    assert [p.relative_to(root).as_posix() for p in files] == names
    assert t.find_files(f"{folder}/*.txt")[1] == [folder / "b.txt"]
    root, files = t.find_files("stdlib")
    names = [p.relative_to(root) for p in files]
    assert {Path("argparse.py"), Path("json/decoder.py")} <= {*names} and names == sorted(names)
    assert not any({"test", "site-packages", "__pycache__"} & {*p.parts} for p in names)


@pytest.mark.parametrize("damage", [
    Path.unlink, lambda path: os.truncate(path, path.stat().st_size - 1),
    lambda path: path.write_bytes(path.read_bytes().replace(b"5", b"6", 1)),
    lambda path: path.write_bytes(b"[" * 100_000)], ids=["missing", "cut", "other", "deep"])
def test_tokens_are_made_once_and_a_damaged_cache_is_named_and_made_again(
        damage, folder, tiny, cache, capsys):
    write_text(folder, {f"{i}.txt": f"document {i} of 5\n" * 30 for i in range(9)})
    c = tiny(data=str(folder), tokenizer="bpe", vocab_size=260)
    before = t.load_data(c)
    expected = ids_of(before.train), ids_of(before.val), before.tokenizer
    for name in ("train.bin", "val.bin", "tokenizer.json", "checksums.json"):
        file, = cache.rglob(name)
        (file.parent / ".train.bin.0123456789abcdef.tmp").write_bytes(b"of a killed process")
        damage(file)
        capsys.readouterr()
        data = t.load_data(c)
        assert (ids_of(data.train), ids_of(data.val), data.tokenizer) == expected
        said, made = capsys.readouterr().out, files_below(cache)
        assert str(file.parent) in said and said.count("\n") == 1 and len(made) == 4
        data = t.load_data(c)
        assert (ids_of(data.train), ids_of(data.val), data.tokenizer) == expected
        assert files_below(cache) == made and capsys.readouterr().out == ""


@pytest.mark.skipif(os.name != "posix", reason="limits as POSIX has them")
def test_tokens_that_the_disk_does_not_hold_are_an_error_that_says_why(folder, tiny, cache):
    import resource
    write_text(folder, {"a.txt": "some text\n" * 2000})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))  # bytes of a file
    try:
        with pytest.raises(OSError, match="too large.*train.bin"):
            t.load_data(tiny(data=str(folder)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not files_below(cache)


def test_two_processes_with_one_process_id_share_a_cache(folder, tiny, cache):
    """As in two containers. The second waits for the first, or finds what it made."""
    texts = many_texts(200)
    write_text(folder, texts)
    flags = flags_of(tiny(data=str(folder), tokenizer="bpe", vocab_size=600))
    code = ("import os, sys, train\nos.getpid = lambda: 1\n"
            "train.load_data(train.parse_flags(sys.argv[1:]))")
    with ThreadPoolExecutor() as pool:
        runs = [*pool.map(lambda _: run_python("-c", code, *flags), range(2))]
    made = files_below(cache)
    assert [run.returncode for run in runs] == [0, 0] and len(made) == 4
    assert documents_of(t.load_data(t.parse_flags(flags)), texts.values()) == sorted(texts.values())
    assert files_below(cache) == made


@pytest.mark.parametrize("change", [
    lambda path: path.write_text("D" + path.read_text()[1:]),
    lambda path: path.with_name("new.txt").write_text("a new file"),
    lambda path: path.rename(path.with_name("renamed.txt"))],
    ids=["content", "new file", "name"])
def test_changed_files_are_tokenized_again(change, folder, tiny, cache):
    write_text(folder, {name: text.replace("\r", "") for name, text in many_texts(10).items()})
    c = tiny(data=str(folder))
    t.load_data(c)
    change(next(folder.rglob("doc3.txt")))
    expected = [p.read_text() for p in folder.rglob("*.txt")]
    assert documents_of(t.load_data(c), expected) == sorted(expected)


def test_data_in_two_folders_share_no_tokens(tmp_path, tiny, cache):
    """Archives and reproducible builds give all files one time."""
    for name in ("one", "two"):
        text = f"this is text {name}\n" * 100
        write_text(tmp_path / name, {"input.txt": text})
        os.utime(tmp_path / name / "input.txt", ns=(0, 0))
        assert documents_of(t.load_data(tiny(data=str(tmp_path / name))), [text]) == [text]


def test_a_download_is_fetched_once_or_put_in_place_by_hand(tmp_path, tiny, cache, monkeypatch):
    text = "First Citizen:\nBefore we proceed any further, hear me speak.\n" * 200
    monkeypatch.setattr(t, "SHAKESPEARE", (tmp_path / "site" / "input.txt").as_uri())
    with pytest.raises(t.BadInput) as error:
        t.load_data(tiny(data="shakespeare"))
    assert t.SHAKESPEARE in str(error.value) and files_below(cache) == {}
    target, = re.findall(rf"{re.escape(str(cache))}\S+", str(error.value))
    write_text(tmp_path / "site", {"input.txt": text})
    assert [str(p) for p in t.download("shakespeare")] == [target]
    (tmp_path / "site" / "input.txt").unlink()
    data = t.load_data(tiny(data="shakespeare"))
    assert bytes(ids_of(data.train)[1:] + ids_of(data.val)[1:]).decode() == text


def raw(tokens, dtype="<u2") -> bytes:
    """nanoGPT: nothing but the tokens, little-endian."""
    return np.array(tokens, dtype).tobytes()


def llm_c(tokens, magic=20240520, count=None, dtype="<u2") -> bytes:
    """llm.c: 256 int32, of which the first are magic, version and number of tokens; the tokens."""
    count = len(tokens) if count is None else count
    return raw([magic, 1, count, *[0] * 253], "<i4") + raw(tokens, dtype)


def npy(tokens, dtype=None) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array(tokens, dtype))
    return file.getvalue()


WRITERS = {
    "nanogpt": (".bin", raw),
    "llm.c uint16": (".bin", llm_c),
    "llm.c uint32": (".bin", lambda tokens: llm_c(tokens, magic=20240801, dtype="<u4")),
    "bare uint32": (".bin", lambda tokens: raw(tokens, "<u4")),
    "npy uint16": (".npy", lambda tokens: npy(tokens, np.uint16)),
    "npy uint32": (".npy", lambda tokens: npy(tokens, np.uint32)),
}


def random_tokens(n, seed=0, vocab=257) -> list[int]:
    return conftest.random_tokens(n, seed=seed, vocab=vocab).tolist()


@pytest.mark.parametrize("form", WRITERS)
def test_shards_of_each_format_are_read_as_written(form, folder, tiny):
    """Tokens of 4 bytes are read as such with any tokenizer; a tokenizer of over 65,536 tokens has
    not made tokens of 2 bytes."""
    suffix, write = WRITERS[form]
    shards = {name: random_tokens(700, i) for i, name in enumerate(["train_1", "train_0", "val"])}
    for name, tokens in shards.items():
        (folder / (name + suffix)).write_bytes(write(tokens))
    (folder / "readme.md").write_text("not a shard")
    data = t.load_data(tiny(data=str(folder)))
    assert [a.tolist() for a in data.train.arrays] == [shards["train_0"], shards["train_1"]]
    assert ids_of(data.val) == shards["val"]
    path, tokens = folder / f"train_0{suffix}", random_tokens(1000, vocab=50_001)
    single = t.load_data(tiny(data=str(path)))  # its end is held out
    assert ids_of(single.train) + ids_of(single.val) == shards["train_0"]
    assert len(ids_of(single.val)) == pytest.approx(70, abs=1)
    path.write_bytes(write(tokens))
    assert t.open_shard(path, 50_257).tolist() == tokens
    if "uint32" in form:
        path.write_bytes(write([*tokens, 100_000]))
        assert t.open_shard(path, 100_277).tolist() == [*tokens, 100_000]
    else:
        with pytest.raises(t.BadInput, match=r"--x: .*uint16.*100,277"):
            t.open_shard(path, 100_277, "--x")


@pytest.mark.parametrize("held_out, trained, pattern", [
    ("val/000", "train/000 train/001", ""), ("wiki_val_0", "medieval_0 wiki_0", ""),
    ("retrieval-VAL", "retrieval-train", ""), ("validation0 x/valid.1", "valley latest x/1", ""),
    ("test.0", "0", ""), ("shard_0", "shard_1 shard_2", "shard_*"),
    ("val/000", "val/001", "val")])  # the folder that is named does not decide
def test_a_word_in_a_shards_name_decides_what_is_held_out_and_else_the_first_is(
        held_out, trained, pattern, folder, tiny, capsys):
    shards = {name: random_tokens(300, i)
              for i, name in enumerate(f"{held_out} {trained}".split())}
    for name, tokens in shards.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.bin").write_bytes(llm_c(tokens))
    if pattern == "shard_*":
        (folder / "other.bin").write_bytes(b"odd")
    data = t.load_data(tiny(data=str(folder / pattern)))
    for part, names in ((data.val, held_out), (data.train, trained)):
        assert sorted(a.tolist() for a in part.arrays) == sorted(shards[n] for n in names.split())
    said = capsys.readouterr().out
    assert all(Path(name).name + ".bin" in said for name in held_out.split()), said


# The order of the data
@pytest.mark.parametrize("lengths, block_size", [
    ((50,), 7), ((10, 3, 0, 17, 1, 4, 5, 9), 4), ((8, 9), 8), ((9, 9), 1)])
def test_blocks_are_the_tokens_at_their_places_in_every_shard(lengths, block_size):
    arrays = [np.arange(n, dtype=np.uint16) + 1000 * i for i, n in enumerate(lengths)]
    expected = [array[i:i + block_size + 1].tolist() for array in arrays
                for i in range(0, len(array) - block_size, block_size)]
    blocks = t.Blocks(arrays, block_size)
    assert len(blocks) == len(expected)
    numbers = random.Random(0).choices(range(len(expected)), k=30)
    idx, targets = blocks.batch(numbers)
    assert idx.dtype == targets.dtype == torch.int64
    assert idx.tolist() == [expected[i][:-1] for i in numbers]
    assert targets.tolist() == [expected[i][1:] for i in numbers]


@pytest.mark.exercise("block_numbers")
@pytest.mark.parametrize("seed, n", [(0, 1), (0, 7), (3, 64), (3, 1000)])
def test_each_epoch_is_a_permutation_of_all_blocks_and_another_one(seed, n):
    stream = t.block_numbers(seed, 0, 4 * n, n)
    epochs = [tuple(stream[i * n:(i + 1) * n]) for i in range(4)]
    assert all(sorted(epoch) == [*range(n)] for epoch in epochs)
    assert n < 64 or len({*epochs}) == 4
    for first, count in ((0, 3), (n // 2, n), (2 * n + 1, 5), (n - 1, 2 * n)):
        assert t.block_numbers(seed, first, count, n) == (stream * 8)[first:first + count] or n < 3
    orders = {tuple(t.block_numbers(s, n, n, n)) for s in range(6)} | {*epochs}
    assert n < 64 or len(orders) == 9  # nor is one seed's second epoch another seed's first


def sequences_read(world, micro_batch, batch_tokens, tokens_before, steps):
    """[(number of the block, place in the order of training)] of all ranks, step by step."""
    T, n = 8, 45
    data = SimpleNamespace(train=t.Blocks([np.arange(n * T + 1, dtype=np.uint16)], T))
    c = t.Config(seed=2, block_size=T, micro_batch=micro_batch, batch_tokens=batch_tokens)
    read = [[] for _ in range(steps)]
    for rank in range(world):
        devices = t.Devices(torch.device("cpu"), rank, world)
        per_rank = batch_tokens // T // world
        run = SimpleNamespace(
            c=c, data=data, devices=devices, state=t.State(tokens=tokens_before),
            records_per_rank=per_rank, records_per_pass=min(micro_batch, per_rank),
            accumulation=max(1, per_rank // micro_batch))
        batches = t.Run.batches(run)
        for step in range(steps):
            for batch in (next(batches) for _ in range(run.accumulation)):
                assert sum(batch.counted) == batch.targets.numel()
                numbers = (batch.idx[:, 0] // T).tolist()
                read[step] += [(number, batch.first + i) for i, number in enumerate(numbers)]
    return [pair for step in read for pair in step]


@pytest.mark.parametrize("world, micro_batch", [(1, 8), (1, 2), (2, 4), (2, 1), (4, 2), (8, 1)])
def test_ranks_and_micro_batches_read_one_order_across_epochs_and_batch_sizes(world, micro_batch):
    """The last steps are those of a run that is resumed with another batch size."""
    read = sequences_read(world, micro_batch, 64, 0, 12)
    read += sequences_read(2, 2, 32, 12 * 64, 2) + sequences_read(1, 2, 128, 13 * 64, 2)
    assert read == [*zip(t.block_numbers(2, 0, len(read), 45), range(len(read)))]


@pytest.mark.parametrize("eval_tokens", [1, 32, 7 * 32, 8 * 32 + 31, 21 * 32, 10**6])
def test_evaluation_is_the_plain_mean_over_its_blocks_whatever_the_rows(eval_tokens, tokenizer):
    """Nats per token and bits per byte, of up to 21 blocks in two shards."""
    enc, rng, T = t.tokenizer_from_dict(tokenizer), random.Random(1), 32
    ids = [rng.choice([enc.eot_token, rng.randrange(256), rng.randrange(enc.n_vocab)])
           for _ in range(700)]
    shards = [np.array(ids[:400], np.uint16), np.array(ids[400:], np.uint16)]  # 12 and 9 blocks
    blocks = [shard[i:i + T + 1] for shard in shards for i in range(0, len(shard) - T, T)]
    model = conftest.tiny_model(vocab_size=enc.n_vocab, block_size=T).double()
    n, nats, n_bytes = max(1, min(21, eval_tokens // T)), 0, 0
    for i in range(n):
        block = torch.from_numpy(blocks[i * 21 // n].astype(np.int64))
        with torch.no_grad():
            logits = model.logits(model(block[None, :-1])[0])[0]
        nats += F.cross_entropy(logits, block[1:], reduction="sum").item()
        n_bytes += len(enc.decode_bytes([i for i in block[1:].tolist() if i != enc.eot_token]))
    expected = nats / (n * T), nats / math.log(2) / n_bytes
    before = torch.get_rng_state()
    for rows in (1, 2, 4, 16, 64):
        run = SimpleNamespace(
            c=t.Config(block_size=T, eval_tokens=eval_tokens), records_per_pass=rows, model=model,
            data=t.Data(None, t.Blocks(shards, T), tokenizer), token_bytes=t.token_lengths(enc),
            devices=t.Devices(torch.device("cpu"), 0, 1))
        assert t.evaluate(run) == pytest.approx(expected, rel=1e-6)
    assert torch.equal(before, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())


# A run
@pytest.fixture(scope="module")
def teacher(corpus, tmp_path_factory):
    """A checkpoint of ours, narrower than the student, on the same tokens."""
    folder = tmp_path_factory.mktemp("teacher")
    c = tiny_config(corpus, folder, n_embd=16, n_layer=1, steps=20, seed=9)
    return t.train(c)["checkpoint"]


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Records of very unequal length for step_by_step."""
    rng = random.Random(0)
    pairs = [(rng.randrange(9 ** rng.randrange(1, 9)), rng.randrange(99)) for _ in range(80)]
    path = tmp_path_factory.mktemp("records") / "records.jsonl"
    path.write_text("".join(json.dumps({
        "input": f"{a}+{b}", "label": str(a + b), "rationale": f"{a} and {b} are {a + b}"}) + "\n"
        for a, b in pairs))
    return str(path)


LET = dict(let_weight=1.0, let_stop=6.0, let_student_layer=1)
STEP_BY_STEP = dict(distill="step_by_step", block_size=64, batch_tokens=512)
SSM = dict(d_state=16, ssm_head_dim=16)


def with_file(flags: dict, teacher, records) -> dict:
    """These flags with the teacher or the records that they need."""
    if flags.get("distill") == "step_by_step":
        return {"data": records, **flags}
    return {"teacher": teacher, **flags} if {"let_student_layer", "distill"} & {*flags} else flags


@pytest.fixture
def tiny(tiny, teacher, records):
    return lambda **flags: tiny(**with_file(flags, teacher, records))


def test_the_loss_falls_and_everything_is_written(tiny):
    result = t.train(tiny(steps=60, eval_every=20, lr=0.02))
    out = Path(result["out_dir"])
    assert sorted(p.name for p in out.iterdir()) == ["ckpt.pt", "config.json", "metrics.jsonl"]
    assert lines(out) == result["history"]
    evals = [h["val_loss"] for h in lines(out) if "val_loss" in h]
    assert evals[0] == pytest.approx(math.log(257), rel=0.01)
    assert evals[0] > evals[1] > evals[-1] and evals[-1] < 0.6 * evals[0]
    config = json.loads((out / "config.json").read_text())
    assert config["lr"] == 0.02 and len(config["provenance"]["source_sha256"]) == 64
    steps = [h for h in lines(out) if "train_loss" in h]
    assert [h["tokens"] for h in steps] == [256 * s for s in range(1, 61)]
    assert {"lr", "seconds", "flops", "tokens_per_second", "mfu", "grad_norm"} <= steps[0].keys()


@pytest.mark.parametrize("flags", [
    {}, dict(n_experts=4), dict(linearity="cosine"), dict(LET, let_resize="project"),
    dict(distill="gkd", distill_on_policy=1.0), STEP_BY_STEP], ids=str)
def test_a_run_does_not_depend_on_its_micro_batches(flags, tiny):
    one, more = (t.train(tiny(**flags, micro_batch=size, out_dir=str(size))) for size in (8, 2))
    assert figures(more["history"]) == pytest.approx(figures(one["history"]), abs=3e-4, rel=3e-4)


@pytest.mark.parametrize("flags", [
    dict(mixer="mamba2", multipliers="vector", optimizer="adamw", **SSM),
    dict(mixer="hybrid", n_experts=3, **SSM),
    dict(mixer="MA", multipliers="scalar", linearity="mse", linearity_weight=0.01, **SSM),
    dict(n_experts=4, mlp="swiglu", param="completep", base_n_embd=16)], ids=str)
def test_all_kinds_of_blocks_train_resume_bitwise_and_sample(flags, tiny):
    flags = dict(flags, lr=0.01, let_resize="project", **LET)
    straight = t.train(tiny(**flags, out_dir="straight"))
    history = figures(straight["history"])
    assert history[10, "val_loss"] < history[0, "val_loss"] - 0.1
    checkpoint = stop_at(tiny(**flags), 5)
    t.train(t.parse_flags([f"--resume={checkpoint}"]))
    assert same(state(straight["checkpoint"]), state(checkpoint))
    model = model_from_checkpoint(load_checkpoint(checkpoint)).eval()
    idx = torch.tensor([[256, 100, 101]])
    assert torch.equal(generate(model, idx, 8), generate(model, idx, 8, use_cache=False))


def test_frozen_gains_stay_at_1(tiny):
    blocks = {f"blocks.{i}.{m}_norm.weight" for i in range(2) for m in ("mixer", "mlp")}
    for which, frozen in (("final", {"norm.weight"}), ("blocks", blocks),
                          ("all", blocks | {"norm.weight"})):
        c = tiny(steps=3, frozen_gains=which, out_dir=which)
        model = load_checkpoint(t.train(c)["checkpoint"])["model"]
        gains = {name: p for name, p in model.items() if name.endswith("norm.weight")}
        assert {name for name, p in gains.items() if (p == 1).all()} == frozen


def test_every_setting_of_the_optimizer_reaches_it(tiny):
    """Each makes another run than the one without it."""
    base, ends = dict(steps=4, warmup_steps=0, multipliers="vector", clip=0.1), {}
    for name, value in {
            "seed": 0, "lr": 0.01, "weight_decay": 0.5, "clip": 0.0, "beta1": 0.5, "beta2": 0.5,
            "momentum": 0.5, "muon_scale": "spectral", "optimizer": "adamw", "embedding_lr": 3.0,
            "module_lr": "mlp=2", "schedule": "wsd_sqrt", "decay_fraction": 0.9,
            "clip_multipliers": True, "multipliers": "scalar", "multiplier_lr": 0.1,
            "multiplier_weight_decay": 1.0, "multiplier_placement": "symmetry_free",
            "multiplier_modules": "mlp"}.items():
        c = tiny(**{**base, name: value}, out_dir=name)
        model = load_checkpoint(t.train(c)["checkpoint"])["model"]
        ends[name] = model["blocks.0.mlp.up.weight"], model["embed.weight"], model["head.weight"]
    for name, end in ends.items():
        assert not any(same(end, other) for key, other in ends.items() if key != name), name


def test_the_plan_names_the_size_and_writes_nothing(tiny, cache, capsys):
    c = tiny(dry_run=True)
    plan, out = t.train(c), capsys.readouterr().out
    model = t.GPT(t.model_config(c, 257))
    assert plan["parameters"] == sum(p.numel() for p in model.parameters())
    assert plan["flops"] == model.flops_per_token() * 2560
    assert f"{plan['parameters']:,}" in out and "2,560" in out
    taught = t.train(tiny(dry_run=True, teacher="auto", let_student_layer=1, let_stop=5.0,
                          let_resize="project"))
    assert taught["flops"] > plan["flops"]
    assert not Path(c.out_dir).exists() and not (cache / "teachers").exists()


ON_A_GPU = {
    "default": {}, "adamw": dict(optimizer="adamw"), "multipliers": dict(multipliers="vector"),
    "mamba2": dict(mixer="mamba2", **SSM), "hybrid": dict(mixer="hybrid", n_experts=4, **SSM),
    "linearity": dict(linearity="cosine"), "let": LET, "project": dict(LET, let_resize="project"),
    **{name: dict(distill=name) for name in ("rkd", "salt", "kd", "distilbert", "reverse_kl")}}


def losses(tiny, name, **flags):
    """The losses of 4 steps of a run of ON_A_GPU, and the last held-out loss."""
    run = t.train(tiny(steps=4, **ON_A_GPU[name], **flags, out_dir=f"{name} {flags}"))
    return [*(h["loss"] for h in run["history"] if "loss" in h), run["val_loss"]]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_A_GPU)
def test_a_run_on_a_gpu_has_the_losses_of_one_on_a_cpu(tiny, name):
    """In fp32; products in TF32 on the GPU."""
    cpu, gpu = (losses(tiny, name, device=device, compile="false") for device in ("cpu", "cuda"))
    assert gpu == pytest.approx(cpu, rel=2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["default", "multipliers", "let", "rkd", "hybrid"])
def test_a_compiled_run_on_a_gpu_has_the_losses_of_an_eager_one(tiny, name):
    """In bf16: the compiler rounds in other places."""
    eager, compiled = (losses(tiny, name, device="cuda", dtype="bf16", compile=compile)
                       for compile in ("false", "true"))
    assert compiled == pytest.approx(eager, rel=1e-2)


def test_the_first_loss_with_let_is_the_sum_of_its_parts(tiny, teacher):
    """From the student's state after block 1, the teacher's last normed state and the cosine."""
    c = tiny(**LET, steps=6)
    first = next(h for h in t.train(c)["history"] if "train_loss" in h)
    data = t.load_data(c)
    idx, targets = data.train.batch(t.block_numbers(c.seed, 0, 8, len(data.train)))
    torch.manual_seed(c.seed)
    student, T = t.GPT(t.model_config(c, 257)), model_from_checkpoint(load_checkpoint(teacher))
    x, (h_M,) = student(idx, hidden=(1,))
    h_T = F.interpolate(T(idx)[0], size=32, mode="linear")
    cosine = F.cosine_similarity(h_M, h_T, dim=-1).mean().item()
    nll = F.cross_entropy(student.logits(x).flatten(0, 1), targets.flatten()).item()
    assert first["let_weight"] == 1.0
    assert first["let_cosine"] == pytest.approx(cosine, abs=1e-5)
    assert first["loss"] == pytest.approx(nll - cosine, abs=1e-5)


def test_step_by_step_weighs_the_two_tasks_as_it_is_told(tiny):
    history = t.train(tiny(**STEP_BY_STEP, distill_weight=0.25, steps=2))["history"]
    for line in (line for line in history if "train_loss" in line):
        expected = 0.75 * line["train_loss"] + 0.25 * line["rationale_loss"]
        assert line["loss"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("flags", [
    dict(LET, let_stop=5.0), dict(LET, let_stop=5.0, let_resize="project"),
    dict(distill="salt", distill_stop=5.0)], ids=str)
def test_after_the_stop_a_run_is_bitwise_one_that_never_had_a_teacher(flags, tiny):
    """The other goes on from the stop, without any flag of a teacher."""
    whole = t.train(tiny(**flags, out_dir="whole"))
    stopped = stop_at(tiny(**flags, out_dir="stopped"), 5)
    plain = t.train(tiny(resume=stopped, out_dir="plain"))
    assert same(state(whole["checkpoint"])["model"], state(plain["checkpoint"])["model"])
    a, b = figures(whole["history"]), figures(plain["history"])
    after = {k: v for k, v in a.items() if k[0] > 5}
    assert after and after.items() <= b.items()


def test_the_teacher_is_called_once_a_pass_until_its_stop_and_then_leaves_memory(tiny, monkeypatch):
    calls, alive = [], []
    call, evaluate = t.LET.__call__, t.evaluate

    def counted(self, p):
        calls.append(weakref.ref(self.teacher))
        return call(self, p)

    def watched(run):
        alive.append(bool(calls) and calls[0]() is not None)
        return evaluate(run)

    monkeypatch.setattr(t.LET, "__call__", counted)
    monkeypatch.setattr(t, "evaluate", watched)
    t.train(tiny(**LET, eval_every=2))
    assert len(calls) == 6 * 2  # two passes a step
    assert alive == [False, True, True, True, False, False]


def test_the_automatic_teacher_is_small_sees_more_tokens_and_is_made_once(tiny, tmp_path, cache):
    c = tiny(teacher="auto", n_embd=64, n_layer=4, let_student_layer=1)
    result = t.train(c)
    kept, = (cache / "teachers").glob("*/ckpt.pt")
    made, time_made = load_checkpoint(kept), kept.stat().st_mtime_ns
    student = load_checkpoint(result["checkpoint"])
    sizes = [sum(v.numel() for v in ckpt["model"].values()) for ckpt in (made, student)]
    assert sizes[0] <= sizes[1] / 4 and made["tokens"] > student["tokens"]
    t.train(t.replace(c, seed=1, lr=1e-3, optimizer="adamw", out_dir=str(tmp_path / "b")))
    assert kept.stat().st_mtime_ns == time_made
    write_text(tmp_path / "other", {"input.txt": "other text\n" * 2000})
    t.train(t.replace(c, data=str(tmp_path / "other"), out_dir=str(tmp_path / "c")))
    assert len([*(cache / "teachers").glob("*/ckpt.pt")]) == 2


@pytest.mark.parametrize("flags, kinds", [
    (dict(n_layer=4), "AA"), (dict(n_layer=4, tie_embeddings=True), "AAAA"),
    (dict(n_layer=4, mixer="MAAH", **SSM), "MH"), (dict(mixer="mamba2", **SSM), "MM")], ids=str)
def test_a_run_starts_from_a_checkpoints_weights_and_architecture(flags, kinds, tiny):
    source = t.train(tiny(**flags, out_dir="source"))
    words = [word for word in flags_of(tiny(lr=1e-30, steps=1, warmup_steps=0)) if not re.match(
        "--(n_layer|n_embd|n_head|tokenizer)=", word)] + [f"--init_from={source['checkpoint']}"]
    c = t.parse_flags(words + [f"--n_layer={len(kinds)}"])
    assert (c.n_embd, c.n_head, c.tokenizer) == (32, 2, "teacher")
    result = t.train(c)
    a, b = (load_checkpoint(run["checkpoint"]) for run in (source, result))
    assert model_from_checkpoint(b).config.kinds() == kinds
    assert same(b["model"], t.init_from(model_from_checkpoint(a), len(kinds)).state_dict())
    if len(kinds) == flags.get("n_layer", 2):
        assert result["history"][0]["val_loss"] == pytest.approx(source["val_loss"], abs=1e-6)
    again = t.train(t.parse_flags([f"--resume={result['checkpoint']}", "--steps=2"]))
    assert again["step"] == 2


def test_a_resumed_run_takes_the_checkpoints_flags_and_folder(tiny, tmp_path):
    t.train(tiny(steps=4, lr=0.003))
    c = t.parse_flags([f"--resume={tmp_path}/run", "--steps=6"])
    assert (c.lr, c.steps, c.out_dir, c.n_embd) == (0.003, 6, str(tmp_path / "run"), 32)
    assert t.parse_flags([f"--out_dir={tmp_path}/run", "--resume=auto"]).lr == 0.003
    assert t.parse_flags([f"--out_dir={tmp_path}", "--resume=auto"]) == t.Config(
        out_dir=str(tmp_path))


@pytest.mark.skipif(os.name != "posix", reason="locks as POSIX has them")
def test_a_checkpoint_is_not_read_for_resuming_while_another_process_holds_its_folder(tiny):
    import fcntl
    c = tiny()
    checkpoint = Path(c.out_dir, "ckpt.pt")
    checkpoint.parent.mkdir()
    checkpoint.write_bytes(b"of the other process, which will replace it")
    handle = os.open(c.out_dir, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(t.BadInput, match=f"--out_dir={c.out_dir}: another process"):
        t.train(t.replace(c, resume=str(checkpoint)))
    os.close(handle)


DECAY = dict(schedule="wsd_sqrt", decay_fraction=0.5)


@pytest.mark.parametrize("flags, words", [
    (DECAY, []), (dict(schedule="constant"), ["--schedule=wsd_sqrt"])])
def test_a_decay_branches_off_and_is_the_run_planned_to_that_length(flags, words, tiny, tmp_path):
    """From step 5 of a long run, with a decay of half of the steps: the run of 10 steps."""
    trunk = stop_at(tiny(**flags, steps=40, out_dir="trunk"), 5)
    kept = Path(trunk).read_bytes()
    planned = t.train(tiny(**DECAY, out_dir="planned"))
    for steps in (5, 20):
        branch = t.parse_flags([f"--resume={trunk}", *words, f"--steps={5 + steps}",
                                f"--decay_fraction={steps / (5 + steps)}",
                                f"--out_dir={tmp_path}/{steps}"])
        lr = [h["lr"] for h in t.train(branch)["history"] if "lr" in h]
        assert lr == pytest.approx([0.006 * (1 - (i / steps) ** 0.5) for i in range(steps)])
    assert same(state(planned["checkpoint"]), state(tmp_path / "5" / "ckpt.pt"))
    assert Path(trunk).read_bytes() == kept


@pytest.mark.parametrize("words, last", [
    (["--steps=10"], 8), (["--steps=60"], 8),
    (["--steps=60", "--let_stop=0.2"], 12)])
def test_a_teacher_stops_where_it_did_in_a_branch_and_in_a_longer_run(words, last, tiny, tmp_path):
    flags = {**LET, "let_stop": 0.2, "decay_fraction": 0.5}
    trunk = stop_at(tiny(**flags, steps=40, out_dir="trunk"), 5)
    words = [f"--resume={trunk}", *words, f"--out_dir={tmp_path}/more"]
    history = t.train(t.parse_flags(words))["history"]
    weights = {h["step"] - 1: h["let_weight"] for h in history if h.get("let_weight")}
    end = min(last, history[-1]["step"])
    assert weights == pytest.approx({s: (last - s) / last for s in range(5, end)})


# Several ranks, in one process group for all runs
RANKS = """
import gc, json, sys, train
for words in json.load(open(sys.argv[1])):
    train.train(train.parse_flags(words))
gc.collect()  # models that communicate go before their process group
train.dist.barrier()
train.dist.destroy_process_group()
"""


ON_RANKS = {
    "let and multipliers": dict(LET, let_resize="project", multipliers="vector"),
    "tied adamw": dict(optimizer="adamw", tie_embeddings=True, n_experts=4),
    "gkd": dict(distill="gkd", distill_on_policy=0.5), "step_by_step": STEP_BY_STEP,
    "from one rank to two": dict(schedule="constant"),
    "from two ranks to one": dict(schedule="constant")}


@pytest.fixture(scope="module")
def on_ranks(corpus, teacher, records, tmp_path_factory):
    """{name: (the run in one process, the folder of the run on two ranks)}."""
    folder = tmp_path_factory.mktemp("ranks")
    one, two = ({name: tiny_config(corpus, folder, f"{world} {name}", micro_batch=2,
                                   eval_tokens=1100, **with_file(flags, teacher, records))
                 for name, flags in ON_RANKS.items()} for world in (1, 2))
    words = {name: flags_of(c) for name, c in two.items()}
    halves = [t.replace(two[name], steps=5) for name in [*ON_RANKS][-2:]]
    resumed = [[f"--resume={c.out_dir}/ckpt.pt", "--steps=10"] for c in halves]
    words["from one rank to two"], words["from two ranks to one"] = resumed[0], flags_of(halves[1])
    t.train(halves[0])
    (folder / "runs.json").write_text(json.dumps([*words.values()]))
    (folder / "ranks.py").write_text(RANKS)
    done = run_python(folder / "ranks.py", folder / "runs.json", ranks=2,
                      env={"PYTHONPATH": str(conftest.ROOT)})
    assert done.returncode == 0, done.stderr
    t.train(t.parse_flags(resumed[1]))
    return {name: (t.train(one[name]), Path(two[name].out_dir)) for name in ON_RANKS}


@pytest.mark.parametrize("name", ON_RANKS)
def test_two_ranks_write_the_same_metrics_and_checkpoint_as_one(name, on_ranks):
    one, folder = on_ranks[name]
    assert figures(lines(folder)) == pytest.approx(figures(one["history"]), abs=3e-4, rel=1e-3)
    a, b = load_checkpoint(one["checkpoint"]), load_checkpoint(folder / "ckpt.pt")
    for name, p in a["optimizers"]["adamw"].items():  # whole, whatever the number of ranks
        for key, value in p.items():
            other = b["optimizers"]["adamw"][name][key]
            assert (other - value).norm() <= 2e-2 * value.norm() + 1e-6
    assert a["optimizers"].keys() == b["optimizers"].keys()


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
@pytest.mark.parametrize("number, ranks", [(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_a_signal_saves_at_the_next_step_on_all_ranks_and_exits_with_its_code(
        number, ranks, tiny, tmp_path):
    c = tiny(steps=10**6, save_every=10**6, eval_every=10**6)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] * (ranks > 1)
    run = subprocess.Popen([sys.executable, *launcher, conftest.ROOT / "train.py", *flags_of(c)],
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics, end = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 300
    while not (metrics.exists() and "train_loss" in metrics.read_text()):
        assert time.monotonic() < end and run.poll() is None
        time.sleep(0.02)
    asked = run.pid
    if ranks > 1:
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(run.pid)], text=True,
                                  capture_output=True).stdout.split()
        asked = int(children[-1])
    os.kill(asked, number)
    out, err = run.communicate(timeout=300)
    assert run.returncode == (128 + number if ranks == 1 else 1), err
    assert f"--resume={c.out_dir}/ckpt.pt" in out and (ranks > 1 or "Traceback" not in err)
    assert load_checkpoint(f"{c.out_dir}/ckpt.pt")["step"] == lines(c.out_dir)[-1]["step"] > 0


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
def test_the_same_signal_twice_aborts():
    with t.stop_signals() as seen:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # torchrun's echo of a Ctrl-C: another, the same wish
        assert seen == {signal.SIGTERM, signal.SIGINT}
        with pytest.raises(SystemExit) as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
    assert stop.value.code == 143


def test_a_loss_that_is_not_finite_stops_a_run_before_its_weights_are_touched(tiny, monkeypatch):
    """The message has the value that was trained on: here a term other than the next-token loss."""
    c, runs, loop = tiny(save_every=1, linearity="cosine"), [], t.loop

    class Broken(t.Linearity):
        def __call__(self, p):
            loss, named = super().__call__(p)
            return (loss - math.inf if p.step == 6 else loss), named

    monkeypatch.setattr(t, "Linearity", Broken)
    monkeypatch.setattr(t, "loop", lambda run, signals: runs.append(run) or loop(run, signals))
    with pytest.raises(t.NonFinite) as error:
        t.train(c)
    assert all(part in str(error.value) for part in ("step 6", "-inf", f"{c.out_dir}/ckpt.pt"))
    kept = load_checkpoint(f"{c.out_dir}/ckpt.pt")
    assert kept["step"] == 6 and same(kept["model"], dict(runs[0].model.state_dict()))


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(tiny, tmp_path, monkeypatch):
    checkpoint = t.train(tiny(steps=5))["checkpoint"]

    def full_disk(state, file):
        file.write(b"half of the file")
        raise OSError(28, "no space")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError) as error:
        t.train(t.parse_flags([f"--resume={checkpoint}", "--steps=10"]))
    assert error.value.filename == checkpoint and load_checkpoint(checkpoint)["step"] == 5
    assert len([*(tmp_path / "run").iterdir()]) == 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("kind, kills", [("plain", 4)] + [
    pytest.param(kind, 10, marks=pytest.mark.slow)
    for kind in ("plain", "multipliers", "mamba2", "experts", "sweep", "let")])
def test_kills_lose_nothing_and_leave_nothing(kind, kills):
    """Some of the kills of tests/kill.py. In a process of its own: one that has trained must not
    fork."""
    done = run_python(conftest.ROOT / "tests" / "kill.py", f"--kills={kills}", f"--kinds={kind}")
    assert "'lost': 0, 'files left': 0" in done.stdout, done.stdout + done.stderr


# Flags, and what bad input is answered with
@pytest.mark.parametrize("line, expected", [
    ("", {}), ("--steps 7 --lr 1e-3", {"steps": 7, "lr": 0.001}), ("--out_dir=", {}),
    ("--dry_run --steps=7 --qk_norm", {"dry_run": True, "steps": 7, "qk_norm": True}),
    ("--qk_norm 0 --dry_run True", {"dry_run": True}), ("--steps=1 --steps=2", {"steps": 2}),
    ("--data=a=b=c", {"data": "a=b=c"}), ("--data=--odd", {"data": "--odd"}),
    ("--let_teacher_layer -2", {"let_teacher_layer": -2}),
    ("--data=~/text", {"data": os.path.expanduser("~/text")})])
def test_flags_are_read(line, expected):
    assert t.parse_flags(line.split()) == t.Config(**expected)


def test_sound_flags_pass_and_help_is_no_error(tiny, capsys):
    for flags in (dict(n_kv_head=1), dict(micro_batch=64), dict(clip=0.0, decay_fraction=1.0),
                  dict(warmup_steps=500, schedule="constant"), dict(mixer="MA", d_state=32),
                  dict(STEP_BY_STEP, micro_batch=1, distill_weight=0.0)):
        t.check(tiny(**flags))
    t.check(t.Config())
    t.check(tiny(micro_batch=1), world=8)
    with pytest.raises(SystemExit) as stop:
        t.parse_flags(["--steps=5", "--help"])
    out = capsys.readouterr().out
    assert not stop.value.code and all(f"--{name}" in out for name in t.FLAGS)


@pytest.fixture(scope="module")
def finished(corpus, teacher, tmp_path_factory):
    """A folder with a finished run of 10 steps, its checkpoint of step 5, and a bare model."""
    folder = tmp_path_factory.mktemp("finished")
    t.train(tiny_config(corpus, folder, keep_checkpoints=True, module_lr="mlp=2"))
    t.train(tiny_config(corpus, folder, "cosine", schedule="cosine", steps=5))
    model = load_checkpoint(teacher)
    bare = {k: model[k] for k in ("format", "model", "model_config", "tokenizer")}
    torch.save(bare, folder / "bare.pt")
    for name, step in {"negative": -5, "word": "x", "nothing": None, "part": 1.5}.items():
        torch.save({**model, "step": step}, folder / f"{name}.pt")
    torch.save({**model, "seconds": math.nan}, folder / "nan.pt")
    for name, flags in {"odd": {"schedule": "odd"}, "five": {"data": 5}, "half": {"steps": 7.5},
                        "maybe": {"tie_embeddings": "x"}, "list": {"lr": [1.0]}}.items():
        torch.save({**model, "config": {**model["config"], **flags}}, folder / f"{name}.pt")
    (folder / "file").write_text("a file")
    return folder


WRONG_VALUES = {int: ["x", "", "1.5", "nan", "-9", "1" * 5000],
                float: ["x", "", "nan", "1e999", "-9"], bool: ["maybe", ""], str: []}


@pytest.mark.parametrize("name", t.FLAGS)
def test_a_value_that_a_flag_cannot_have_is_refused_by_name(name, tiny, refused):
    f = t.FLAGS[name]
    for value in WRONG_VALUES[f.type] + (["odd", ""] if f.metadata["choices"] else []):
        if (name, value) != ("let_teacher_layer", "-9"):
            said = refused(t.main, *flags_of(tiny()), f"--{name}={value}")
            assert f"--{name}" in said and value[:9] in said


@pytest.mark.parametrize("flag", ["resume", "init_from", "teacher", "data", "lr_law", "out_dir"])
def test_a_file_that_is_not_what_a_flag_needs_is_refused_by_name(
        flag, tiny, refused, wrong_files, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    given = {"teacher": ["--let_student_layer=1"], "data": ["--distill=step_by_step"]}
    for name in wrong_files:
        if flag != "out_dir" or name not in ("nowhere.pt", "folder/none"):
            said = refused(t.main, *flags_of(tiny()), *given.get(flag, []), f"--{flag}={name}")
            assert name in said and (f"--{flag}" in said or name == "n" * 300)


# Command lines. The message must have the name and value of each flag that is not in brackets.
REFUSED = """
    --block_size=0 | --batch_tokens=0 | --micro_batch=0 | --eval_tokens=0 | --n_layer=0
    --n_embd=0 | --n_head=0 | --steps=0 | --eval_every=0 | --log_every=0 | --save_every=0
    --embedding_lr=0.0 | --lr=0.0 | --beta1=1.0 | --beta2=1.0 | --momentum=1.0 | --mlp=relu
    --seed=18446744073709551616 | (--mixer=mamba2) --n_experts=4
    --n_layers | --Steps | -steps | steps | --resume=auto | --steps | --qk_norm=maybe
    --batch_tokens=100 (--block_size=32) | --micro_batch=3 | --n_head=3 | --n_embd=6 | --mixer=MMA
    --n_kv_head=4 | --mixer=MAX | (--mixer=mamba2) --qk_norm=True | --device=tpu | --d_state=32
    --experts_per_token=3 | --base_n_embd=64 | --vocab_size=300 | --multiplier_lr=0.1
    --linearity_weight=2.0 | --let_weight=2.0 | (--n_experts=4) --experts_per_token=5
    (--tokenizer=bpe) --vocab_size=256 | --tokenizer=teacher | --tokenizer=gpt-2 | --lr_law=x
    --steps=10 --warmup_steps=11 | --lr=1.0 --lr_law=x | --module_lr=heads=2 | --module_lr=head=-1
    (--optimizer=adamw) --momentum=0.5 | (--optimizer=adamw) --muon_scale=spectral
    (--tie_embeddings) --embedding_lr=3.0 | (--teacher=auto) --tokenizer=teacher
    (--teacher=auto --let_student_layer=1) --let_teacher_layer=-3
    (--schedule=cosine) --decay_fraction=0.5 | (--multipliers=scalar) --multiplier_modules=all
    (--multipliers=scalar) --multiplier_modules=ssm | --distill=kd
    (--multipliers=scalar --tie_embeddings) --multiplier_modules=mlp,head
    (--multipliers=scalar) --multiplier_modules=head --multiplier_placement=symmetry_free
    (--multipliers=scalar) --clip_multipliers=True --clip=0.0 | TAUGHT --let_teacher_layer=2
    (--teacher=auto) --let_student_layer=3 | (--teacher=auto) --distill_temperature=2.0
    (--teacher=auto --distill=kd) --distill_weight=2.0 | (--mixer=mamba2) --ssm_head_dim=24
    TAUGHT --let_stop=0.0 | TAUGHT --let_stop=2.5 | TAUGHT --let_loss=logsum
    (--teacher=AT/bare.pt --distill=kd) --distill_temperature=0.0
    (--teacher=AT/bare.pt --distill=kd) --distill_cosine_weight=-0.5
    (--let_student_layer=1) --teacher=AT/bare.pt --block_size=64
    (--let_student_layer=1) --teacher=AT/file | (--distill=step_by_step) --data=AT/run
    --init_from=AT/bare.pt --n_embd=64 | (--dry_run) --init_from=AT/bare.pt --n_embd=64
    --init_from=AT/file | --device=cuda:99 | (--dry_run) --lr_law=x
    --device=meta | --data= | --out_dir=AT/run | --out_dir=AT/file | --out_dir=AT/file/deeper/run
    (--resume=AT/cosine/ckpt.pt --steps=8) --out_dir=AT/run | (--resume=AT/run/step-0000005.pt)
    --resume=AT/run/ckpt.pt --steps=9 | --resume=AT/bare.pt | RUN --optimizer=adamw
    RUN --n_layer=3 | RUN --mlp=gelu | RUN --block_size=16 | RUN --tie_embeddings=True
    (--steps=12 --vocab_size=300) --resume=AT/run/ckpt.pt --tokenizer=bpe
    --resume=AT/odd.pt | --resume=AT/negative.pt | --resume=AT/word.pt | --resume=AT/nothing.pt
    --resume=AT/part.pt | --resume=AT/nan.pt
    --resume=AT/five.pt | --resume=AT/half.pt | --resume=AT/maybe.pt | --resume=AT/list.pt
""".strip().replace("\n", "|").split("|")
PLACES = {"TAUGHT": "(--teacher=AT/bare.pt --let_student_layer=1)",
          "RUN": "(--steps=12) --resume=AT/run/ckpt.pt"}


@pytest.mark.parametrize("line", [line.strip() for line in REFUSED])
def test_bad_flags_are_refused_by_name_before_anything_is_written(line, tiny, finished, tmp_path):
    for name, words in {**PLACES, "AT": str(finished)}.items():
        line = re.sub(rf"\b{name}\b", words, line)
    before = files_below(finished)
    given = [] if "--resume" in line else flags_of(tiny())
    with pytest.raises(t.BadInput) as error:
        t.train(t.parse_flags(given + re.sub("[()]", "", line).split()))
    for word in re.sub(r"\(.*?\)", "", line).split():
        assert all(part in str(error.value) for part in word.lstrip("-").split("=", 1))
    assert files_below(finished) == before and not [*tmp_path.iterdir()]


FINE = random_tokens(2000)
BAD_DATA = {  # files; --data below their folder and further flags; words of the message
    "no file": ({"a.txt": b"x"}, "*.md", "*.md"),
    "blank file": ({"a.txt": b" \n\n" + EOT.encode() + b"\n"}, "a.txt", "a.txt"),
    **{f"unreadable {name}": ({"b.txt": b"fine\n" * 99, name: None}, "", f"{name} cannot")
       for name in ("a.txt", "a.npy")},  # an error of the disk
    "not UTF-8": ({"a.txt": b"fine\n" * 99, "b.txt": b"caf\xe9 \n"}, "", "b.txt 3"),
    "too short": ({"a.txt": b"short line\n" * 20}, "a.txt", "held-out --block_size=32"),
    "too few pairs": ({"a.txt": b"ab\n" * 99}, " --tokenizer=bpe --vocab_size=300", "=300 258"),
    "shards and bpe": ({"a.bin": raw(FINE)}, " --tokenizer=bpe", "--tokenizer=bpe"),
    "wrong magic": ({"a.bin": llm_c(FINE, magic=123)}, "", "a.bin 123 20240801"),
    "truncated": ({"a.bin": llm_c(FINE[:1500], count=2000)}, "", "a.bin 2000 1500"),
    "tokens of 64 bits": ({"a.bin": raw(FINE, "<i8")}, "", "a.bin 64"),
    "odd number of bytes": ({"a.bin": raw(FINE) + b"x"}, "", "a.bin"),
    "empty shard": ({"a.bin": raw(FINE), "b.bin": b""}, "", "b.bin"),
    "token beyond": ({"a.bin": raw(FINE), "b.bin": llm_c(FINE + [300])}, "", "b.bin 300 257"),
    **{f"npy of {array.dtype} {array.shape}": ({"a.npy": npy(array)}, "", "a.npy") for array in (
        np.zeros((100, 20), np.uint16), np.zeros(2000, np.int64), np.zeros(2000, ">u2"),
        np.zeros((), np.uint16), np.array([257] + FINE, np.uint16), np.zeros(9, object))},
    **{f"npy cut at {n}": ({"a.npy": npy(FINE, np.uint16)[:n]}, "", "a.npy")
       for n in (0, 40, 1000)},
    "only held out": ({"fineweb_val_000000.bin": llm_c(FINE)}, "", "held-out")}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_is_refused_by_name_before_anything_is_written(name, folder, tiny, cache):
    files, data, names = BAD_DATA[name]
    for file, content in files.items():
        if content is None:
            (folder / file).symlink_to("/proc/self/mem")
        else:
            (folder / file).write_bytes(content)
    data, *flags = data.split(" ")
    with pytest.raises(t.BadInput) as error:
        t.train(t.parse_flags([*flags_of(tiny()), f"--data={folder / data}", *flags]))
    assert all(word in str(error.value) for word in names.split()), str(error.value)
    assert not Path(tiny().out_dir).exists()


@pytest.mark.parametrize("flags, modules", [
    ({}, "attention mlp head"), (dict(tie_embeddings=True), "attention mlp"),
    (dict(n_experts=4), "attention mlp router head"), (dict(mixer="LM", **SSM), "affine ssm head"),
    (dict(mixer="hybrid", **SSM), "attention mlp ssm head"),
    (dict(init_from="a model", tokenizer="teacher", mixer="MAM"), "attention mlp ssm head")])
def test_modules_that_the_model_lacks_are_refused_before_any_work(flags, modules, tiny):
    for name in [*t.MODULES, "heads"]:
        for given in ({"module_lr": f"{name}=2"},
                      {"multipliers": "scalar", "multiplier_modules": name}):
            known = name in ["embedding", *modules.split()]
            with contextlib.nullcontext() if known else pytest.raises(t.BadInput, match=name):
                t.check(tiny(**flags, **given))


def test_a_start_from_an_architecture_that_is_not_ours_is_refused(monkeypatch):
    foreign = SimpleNamespace(config=SimpleNamespace(n_layer=2, n_embd=8))
    monkeypatch.setattr(t, "load_pretrained", lambda *a, **kw: (foreign, {}))
    with pytest.raises(t.BadInput, match="--init_from=foreign"):
        t.parse_flags(["--init_from=foreign"])


@pytest.mark.parametrize("flags, world, names", [
    ({}, 3, "--batch_tokens 3"), ({}, 16, "16"), ({"device": "cuda:0"}, 2, "--device=cuda:0"),
    ({"batch_tokens": 12 * 32}, 2, "--micro_batch=4 6"),
    ({**STEP_BY_STEP, "micro_batch": 1}, 1, "--micro_batch=1"),
    ({**LET, "teacher": "x", "let_loss": "logsum", "micro_batch": 8}, 2, "--let_loss=logsum 2")])
def test_ranks_must_share_the_sequences_and_have_a_gpu_each(flags, world, names, tiny):
    """Of a record's pair of sequences no rank has one alone."""
    with pytest.raises(t.BadInput) as error:
        t.check(tiny(**flags), world)
    assert all(name in str(error.value) for name in names.split())


def test_a_rank_that_resumes_another_file_is_named(tiny, tmp_path, monkeypatch):
    torch.save(0, path := tmp_path / "0.pt")
    monkeypatch.setattr(t.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(t.dist, "all_gather_object", lambda found, own: found.__setitem__(
        slice(None), [own, own | {str(path): [1]}]))
    with pytest.raises(t.BadInput, match="0.pt: .* on rank 1"):
        t.compare_ranks(tiny(resume=str(path)), SimpleNamespace(world=2, bf16=False, name=str))


def test_the_commands_of_the_readme_are_understood(monkeypatch):
    monkeypatch.setattr(t, "load_pretrained", lambda *_, **__: (conftest.tiny_model(), {}))
    text = (conftest.ROOT / "README.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^    (?:python|torchrun .*?) ?train\.py(.*)", text, re.MULTILINE)
    assert len(commands) > 5
    for command in commands:
        words = shlex.split(command, comments=True)
        if "--help" not in words and not any(word.startswith("--resume") for word in words):
            t.check(t.parse_flags(words))


# The house
def test_the_idea_files_import_model_alone_and_train_imports_them_all():
    rooms = {"optim", "teacher", "probes", "lr_law"}
    for name, needed in {"model": set(), **dict.fromkeys(rooms, {"model"}),
                         "train": rooms | {"model"}}.items():
        text = (conftest.ROOT / f"{name}.py").read_text()
        found = {*re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE)}
        assert found & (rooms | {"model", "train"}) == needed, name
