"""Flags, tokenizers, tokens, shards, downloads, and what bad input is answered with."""
import hashlib
import json
import math
import os
import random
import re
import socket
import socketserver
import struct
import threading
import zipfile
from collections import Counter
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import requests
import tiktoken
import torch
import torch.nn.functional as F
from conftest import ROOT, flags_of, run_python, tiny_model

import train
from model import BadInput, tokenizer_from_dict, tokenizer_id, tokenizer_to_dict

EOT = "<|endoftext|>"
ODD = [" ", "  ", "\n", "\r\n", "\r", "\t", "\v", "\f", "\x00", "\x1c", "\x1f", "\x85", "\xa0", "\u2003", "\u2028",
       "\u2029", "\u3000", "\ufeff", "\u200b", "\u200d", "e\u0301", "\u0301", "\u094d", "²", "½", "Ⅷ", "①", "٣", "७",
       "_", "__", "‿", "ß", "ſ", "İ", "Ω", "北京", "안녕", "👩‍🚀", "🏳️‍🌈", "\U0001d7d8", "\U000e0041", "\U0010ffff", "'",
       '"', "“", "€", "a", "Z", "09"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache that no other test shares."""
    monkeypatch.setenv("NANOLET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "data"
    path.mkdir()
    return path


def random_text(seed: int, pieces: int = 300) -> str:
    """Odd characters, ASCII, and any character that is no surrogate."""
    rng = random.Random(seed)

    def piece():
        kind = rng.random()
        if kind < 0.5:
            return rng.choice(ODD)
        if kind < 0.8:
            return chr(rng.randrange(128))
        return chr(rng.choice((rng.randrange(0xd800), rng.randrange(0xe000, 0x110000))))

    return "".join(piece() for _ in range(pieces))


def write_text(folder: Path, texts: dict[str, str]):
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode())


def files_below(folder: Path) -> dict:
    return {p: p.stat().st_mtime_ns for p in sorted(folder.rglob("*")) if p.is_file()}


def ids_of(part: train.Blocks) -> list[int]:
    return [int(i) for array in part.arrays for i in array]


def texts_of(part: train.Blocks, enc: tiktoken.Encoding) -> list[str]:
    """The texts between the end-of-text tokens of a part."""
    ids, texts = ids_of(part), []
    starts = [i for i, token in enumerate(ids) if token == enc.eot_token]
    assert starts[0] == 0
    for start, end in zip(starts, starts[1:] + [len(ids)]):
        texts.append(enc.decode(ids[start + 1:end], errors="strict"))
    return texts


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers


def merge(word, pair, new):
    out = []
    for token in word:
        if out and (out[-1], token) == pair:
            out[-1] = new
        else:
            out.append(token)
    return out


def naive_bpe(texts, vocab_size):
    """(tokens, merges): count all pairs of all words anew before every merge; ties go to the pair of lowest ids."""
    words = [list(word.encode()) for text in texts for word in re.findall(train.PATTERN, text)]
    tokens, merges = [bytes([i]) for i in range(256)], []
    while len(tokens) < vocab_size:
        counts = Counter(pair for word in words for pair in zip(word, word[1:]))
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        words = [merge(word, best, len(tokens)) for word in words]
        tokens.append(tokens[best[0]] + tokens[best[1]])
        merges.append(best)
    return tokens, merges


def few_letters(seed, letters):
    rng = random.Random(seed)
    return ["".join(rng.choice(letters) for _ in range(rng.randrange(1, 12))) + " " for _ in range(60)]


BPE_TEXTS = {
    "one letter": ["aaaaaaaaaaaaa aaa aaaa aaaaa a"],
    "ties": ["ab cd ef gh ba dc fe hg"],
    "two letters": few_letters(1, "ab"),
    "three letters": few_letters(2, "abc"),
    "code": ["def f(x):\n    return x + 1\n\n\ndef g(y):\n    return f(y) * 100000\n" * 3, "    if x:\n\treturn\r\n"],
    "not ascii": ["naïve café, Größe größer; Straße ß 北京 北京市 京北 नमस्ते नमस्ते 👩‍🚀👩‍🚀 ёлка ёлки e\u0301e\u0301"] * 2,
    "odd characters": [random_text(3, 400), random_text(4, 400)],
    "words in two texts": ["the cat the hat", "the rat", "", "that cat"],
}


@pytest.mark.parametrize("name", BPE_TEXTS)
def test_train_bpe_finds_the_merges_of_a_naive_trainer(name):
    texts = BPE_TEXTS[name]
    for vocab_size in (256, 257, 280, 400):  # some of these texts run out of pairs before 400
        tokens, _ = naive_bpe(texts, vocab_size)
        ranks = train.train_bpe(texts, vocab_size)
        assert list(ranks.items()) == [(token, i) for i, token in enumerate(tokens)]


def test_train_bpe_ranks_are_the_bytes_and_then_gapless():
    ranks = train.train_bpe(BPE_TEXTS["three letters"], 300)
    assert list(ranks)[:256] == [bytes([i]) for i in range(256)]
    assert list(ranks.values()) == list(range(300)) and len(set(ranks)) == 300


def test_train_bpe_does_not_depend_on_the_order_of_the_texts():
    texts = few_letters(5, "abcd")
    shuffled = random.Random(0).sample(texts, len(texts))
    assert shuffled != texts
    ranks = [list(train.train_bpe(t, 330)) for t in (texts, shuffled, texts)]
    assert ranks[0] == ranks[1] == ranks[2]


def test_tiktoken_encodes_with_the_merges_in_the_order_of_training():
    texts = BPE_TEXTS["code"] + few_letters(6, "abc")
    tokens, merges = naive_bpe(texts, 340)
    enc = tokenizer_from_dict(train.make_tokenizer("bpe", train.train_bpe(texts, 340), train.PATTERN))
    for text in texts + ["def abc(cab):\n    return bacab + 12345\n"]:
        expected = []
        for word in re.findall(train.PATTERN, text):
            word = list(word.encode())
            for i, pair in enumerate(merges):
                word = merge(word, pair, 256 + i)
            expected += word
        assert enc.encode_ordinary(text) == expected


def tiktoken_words(text: str) -> list[str]:
    """How tiktoken's own regular expressions split a text: with every substring a token, each word is one token."""
    substrings = {text[i:j].encode() for i in range(len(text)) for j in range(i + 1, len(text) + 1)}
    rest = sorted(substrings - {bytes([i]) for i in range(256)}, key=lambda s: (len(s), s))
    ranks = {token: i for i, token in enumerate([bytes([i]) for i in range(256)] + rest)}
    enc = tiktoken.Encoding("every substring", pat_str=train.PATTERN, mergeable_ranks=ranks, special_tokens={})
    return [enc.decode_bytes([i]).decode() for i in enc.encode_ordinary(text)]


@pytest.mark.parametrize("text, words", [
    ("def foo_bar(x):", ["def", " foo", "_bar", "(x", "):"]),
    ("x = 12345\n    y", ["x", " =", " ", "123", "45", "\n", "   ", " y"]),
    ("a.b, 'c' __init__", ["a", ".b", ",", " '", "c", "'", " __", "init", "__"]),
    ("):\n\n\tif", ["):\n\n", "\tif"]),
    ("  \n  \r\n  z", ["  \n  \r\n", " ", " z"]),
    ("größe 北京!", ["größe", " 北京", "!"]),
    (" \t", [" \t"]),
])
def test_pattern_splits_as_described_in_python_and_in_tiktoken(text, words):
    assert re.findall(train.PATTERN, text) == words
    assert tiktoken_words(text) == words


def test_pattern_reads_alike_in_python_and_in_tiktoken_beyond_ascii():
    """Training counts the words of Python's re, encoding uses those of Rust's: where they differ, merges are trained
    on words that never come. (They do differ among combining marks, which the comment at PATTERN says.)"""
    texts = ["éa straße", "北京 안녕", "Ωμέγα, ок", "٣७ 12345", "\u3000\u3000b", "\x85b", "x – y", "naïve_café(ß)"]
    assert {text: re.findall(train.PATTERN, text) for text in texts} == {text: tiktoken_words(text) for text in texts}


@pytest.mark.parametrize("pattern", [train.PATTERN, train.BYTES_PATTERN])
def test_patterns_leave_out_no_character(pattern):
    every = "".join(map(chr, [*range(0xd800), *range(0xe000, 0x110000)]))
    assert "".join(re.findall(pattern, every)) == every
    for seed in range(20):
        text = random_text(seed)
        assert "".join(re.findall(pattern, text)) == text


@pytest.fixture(scope="module", params=["bpe", "bytes"])
def tokenizer(request):
    if request.param == "bytes":
        return train.named_tokenizer("bytes")
    ranks = train.train_bpe([t for texts in BPE_TEXTS.values() for t in texts], 600)
    return train.make_tokenizer("bpe", ranks, train.PATTERN)


def test_text_survives_encoding(tokenizer):
    enc = tokenizer_from_dict(tokenizer)
    every = "".join(map(chr, [*range(0xd800), *range(0xe000, 0x110000)]))
    assert enc.decode(enc.encode_ordinary(every), errors="strict") == every
    for seed in range(30):
        text = random_text(seed)
        ids = enc.encode_ordinary(text)
        assert enc.decode_bytes(ids) == text.encode()
        assert max(ids) < enc.eot_token == enc.n_vocab - 1


def test_end_of_text_written_in_a_text_is_encoded_as_plain_characters(tokenizer):
    enc = tokenizer_from_dict(tokenizer)
    ids = enc.encode_ordinary(f"a{EOT}b")
    assert enc.eot_token not in ids and enc.decode(ids) == f"a{EOT}b"


def test_arbitrary_bytes_survive_encoding(tokenizer):
    enc, rng = tokenizer_from_dict(tokenizer), random.Random(0)
    for raw in [bytes(range(256)), *(rng.randbytes(rng.randrange(1, 200)) for _ in range(50))]:
        assert enc.decode_bytes(enc._encode_bytes(raw)) == raw


def test_bytes_tokenizer_is_one_token_a_byte_and_one_more():
    enc = tokenizer_from_dict(train.named_tokenizer("bytes"))
    assert enc.n_vocab == 257 and enc.eot_token == 256
    for seed in range(10):
        assert enc.encode_ordinary(random_text(seed)) == list(random_text(seed).encode())


def test_tokenizer_stored_as_json_gives_equal_tokens(tokenizer):
    enc = tokenizer_from_dict(tokenizer)
    again = json.loads(json.dumps(tokenizer_to_dict(enc)))
    other = tokenizer_from_dict(again)
    assert tokenizer_id(again) == tokenizer_id(tokenizer) and other.n_vocab == enc.n_vocab
    for seed in range(10):
        text = random_text(seed)
        assert other.encode(text + EOT, allowed_special="all") == enc.encode_ordinary(text) + [enc.eot_token]


def test_tokenizer_id_depends_on_the_merges_and_not_on_the_name():
    ranks = train.train_bpe(["abab cdcd"], 258)
    a, b = (train.make_tokenizer(name, ranks, train.PATTERN) for name in ("a", "b"))
    c = train.make_tokenizer("a", train.train_bpe(["cdcd cdcd"], 258), train.PATTERN)
    d = train.make_tokenizer("a", ranks, train.BYTES_PATTERN)
    assert tokenizer_id(a) == tokenizer_id(b) and len({tokenizer_id(t) for t in (a, c, d)}) == 3


def test_token_lengths_are_the_bytes_of_each_token(tokenizer):
    enc = tokenizer_from_dict(tokenizer)
    lengths = train.token_lengths(enc)
    assert lengths[enc.eot_token] == 0
    assert lengths[:-1].tolist() == [len(enc.decode_single_token_bytes(i)) for i in range(enc.n_vocab - 1)]


# ----------------------------------------------------------------------------------------------------------------------
# Text to tokens


def many_texts(n=40):
    rng = random.Random(9)
    return {f"{'ab'[i % 2]}/doc{i}.txt":
            f"document {i}\r\n\tnaïve 北京 {EOT[:5]}\n" + random_text(i, rng.randrange(50, 300)) for i in range(n)}


@pytest.mark.parametrize("flags", [{"tokenizer": "bytes"}, {"tokenizer": "bpe", "vocab_size": 300}])
def test_tokens_on_disk_are_the_documents_each_after_an_end_of_text_token(flags, folder, tiny, cache):
    texts = many_texts()
    write_text(folder, texts)
    data = train.load_data(tiny(data=str(folder), **flags))
    enc = tokenizer_from_dict(data.tokenizer)
    assert enc.n_vocab == flags.get("vocab_size", 257)
    trained, held_out = texts_of(data.train, enc), texts_of(data.val, enc)
    assert sorted(trained + held_out) == sorted(texts.values())  # all are different, so this says disjoint as well
    for part in (data.train, data.val):
        raw = Path(part.arrays[0].filename).read_bytes()
        assert list(struct.unpack(f"<{len(raw) // 2}H", raw)) == ids_of(part)


def test_tokenizer_is_trained_on_the_training_documents_alone(folder, tiny, cache):
    write_text(folder, {f"{i}.txt": " ".join(few_letters(i, "abcde")) for i in range(30)})
    data = train.load_data(tiny(data=str(folder), tokenizer="bpe", vocab_size=300))
    enc = tokenizer_from_dict(data.tokenizer)
    tokens, _ = naive_bpe(texts_of(data.train, enc), 299)
    assert [enc.decode_single_token_bytes(i) for i in range(299)] == tokens
    with_held_out, _ = naive_bpe(texts_of(data.train, enc) + texts_of(data.val, enc), 299)
    assert tokens != with_held_out  # else this test could not tell


def test_held_out_are_as_few_whole_documents_as_make_up_their_share():
    documents = [(f"doc{i}#0", random_text(i, 20 + i)) for i in range(100)]
    trained, held_out = train.split_documents(documents)
    assert sorted(trained + held_out) == sorted(documents)
    sizes, total = [len(text) for _, text in held_out], sum(len(text) for _, text in documents)
    assert sum(sizes) >= train.HELD_OUT * total > sum(sizes) - max(sizes)


def test_split_depends_on_names_and_not_on_the_order_of_the_documents():
    documents = [(f"doc{i}#0", f"text {i}" * 10) for i in range(60)]
    split = train.split_documents(documents)
    assert train.split_documents(random.Random(0).sample(documents, 60)) == split
    renamed = train.split_documents([(f"other{name}", text) for name, text in documents])
    assert {text for _, text in renamed[1]} != {text for _, text in split[1]}


def test_at_least_one_document_stays_for_training():
    for names in ("ab", "xy", "pq"):
        trained, held_out = train.split_documents([(names[0], "x"), (names[1], "y" * 1000)])
        assert len(trained) == len(held_out) == 1


def test_single_document_is_cut_at_a_line_end():
    rng = random.Random(0)
    text = "".join("x" * rng.randrange(1, 60) + "\n" for _ in range(400))
    ((_, head),), ((_, tail),) = train.split_documents([("a", text)])
    assert head + tail == text and head.endswith("\n")
    assert 0 <= len(tail) - train.HELD_OUT * len(text) <= 60


def test_single_document_without_line_ends_is_cut_all_the_same():
    ((_, head),), ((_, tail),) = train.split_documents([("a", "x" * 1000)])
    assert head + tail == "x" * 1000 and len(tail) == pytest.approx(1000 * train.HELD_OUT, abs=1)


def test_single_document_of_one_long_line_under_a_title_is_not_held_out_whole():
    text = "a title\n" + "x" * 10_000
    ((_, head),), ((_, tail),) = train.split_documents([("a", text)])
    assert head + tail == text
    assert len(tail) < 0.2 * len(text)


def test_end_of_text_in_a_file_separates_documents(folder, tiny, cache):
    parts = [f"\nstory {i}\n" + "word " * 20 for i in range(50)]
    (folder / "stories.txt").write_text(EOT.join(parts[:30]) + EOT + " \n" + EOT + EOT.join(parts[30:]) + EOT)
    data = train.load_data(tiny(data=str(folder / "stories.txt")))
    enc = tokenizer_from_dict(data.tokenizer)
    assert sorted(texts_of(data.train, enc) + texts_of(data.val, enc)) == sorted(parts)


def two_byte_ranks(n: int) -> dict[bytes, int]:
    """n ranks, of which the last is `ab`: the bytes, and pairs of them."""
    pairs = [bytes([i // 256, i % 256]) for i in range(256 * 256)]
    pairs.remove(b"ab")
    tokens = [bytes([i]) for i in range(256)] + pairs[:n - 257] + [b"ab"]
    return {token: i for i, token in enumerate(tokens)}


@pytest.mark.parametrize("n_vocab, code", [(257 + 20, "H"), (2**16, "H"), (2**16 + 1, "I")])
def test_tokens_take_two_bytes_where_the_vocabulary_fits_and_else_four(n_vocab, code, folder, tiny, cache, monkeypatch):
    made = train.make_tokenizer("pairs", two_byte_ranks(n_vocab - 1), train.PATTERN)
    monkeypatch.setattr(train, "named_tokenizer", lambda *_: made)
    (folder / "a.txt").write_text("ab\nx\n" * 400)
    data = train.load_data(tiny(data=str(folder / "a.txt")))
    raw = Path(data.train.arrays[0].filename).read_bytes()
    ids = list(struct.unpack(f"<{len(raw) // struct.calcsize('<' + code)}{code}", raw))
    assert ids[0] == n_vocab - 1  # end of text, the highest
    assert ids[1:5] == [n_vocab - 2, 10, ord("x"), 10]
    assert ids_of(data.train) == ids and data.train.batch([0])[0][0, :2].tolist() == [n_vocab - 1, n_vocab - 2]


@pytest.mark.parametrize("text", ["line of text äöü\n" * 40_000, "\n".join(random_text(i, 3000) for i in range(150)),
                                  "no line end " * 30_000], ids=["lines", "odd", "one line"])
def test_long_documents_lose_nothing_where_they_are_taken_in_pieces(text, tmp_path):
    enc = tokenizer_from_dict(train.named_tokenizer("bytes"))
    train.encode_to_file([("a", text), ("b", "end")], enc, tmp_path / "x.bin", "")
    ids = np.fromfile(tmp_path / "x.bin", "<u2")
    assert len(text) > 2**18 and ids.tolist() == [256, *text.encode(), 256, *b"end"]


def test_text_is_found_in_a_folder_but_not_what_is_hidden(folder):
    write_text(folder, {"b.txt": "b", "sub/a.md": "a", ".git/x": "x", "sub/.hidden": "h"})
    root, files = train.find_files(str(folder))
    assert [p.relative_to(root).as_posix() for p in files] == ["b.txt", "sub/a.md"]
    for pattern, names in (("*.txt", ["b.txt"]), ("**/*.md", ["a.md"]), ("*/a.*", ["a.md"]), ("b.txt", ["b.txt"])):
        assert [p.name for p in train.find_files(str(folder / pattern))[1]] == names


def test_stdlib_is_python_files_without_their_tests():
    root, files = train.find_files("stdlib")
    names = [p.relative_to(root) for p in files]
    assert Path("argparse.py") in names and Path("json/decoder.py") in names and names == sorted(names)
    assert all(p.suffix == ".py" for p in names)
    assert not any({"test", "site-packages", "__pycache__"} & set(p.parts) for p in names)


# ----------------------------------------------------------------------------------------------------------------------
# The cache


def test_tokens_are_made_once(folder, tiny, cache):
    write_text(folder, many_texts(10))
    for flags in ({"tokenizer": "bytes"}, {"tokenizer": "bpe", "vocab_size": 270}):
        c = tiny(data=str(folder), **flags)
        first = train.load_data(c)
        made = files_below(cache)
        again = train.load_data(c)
        assert files_below(cache) == made
        assert ids_of(again.train) == ids_of(first.train) and ids_of(again.val) == ids_of(first.val)
        assert again.tokenizer == first.tokenizer


def change_content(folder):
    path = next(folder.rglob("doc3.txt"))
    text = path.read_text()
    path.write_text("D" + text[1:])
    os.utime(path, ns=(1, 1))  # whatever the clock's grain, another time than before


def change_size(folder):
    path = next(folder.rglob("doc3.txt"))
    time = path.stat().st_mtime_ns
    path.write_text(path.read_text() + "!")
    os.utime(path, ns=(time, time))


def add_file(folder):
    (folder / "new.txt").write_text("a new file")


def rename_file(folder):
    path = next(folder.rglob("doc3.txt"))
    path.rename(path.with_name("renamed.txt"))


@pytest.mark.parametrize("change", [change_content, change_size, add_file, rename_file])
def test_changed_files_are_tokenized_again(change, folder, tiny, cache):
    write_text(folder, {name: text.replace("\r", "") for name, text in many_texts(10).items()})
    c = tiny(data=str(folder))
    train.load_data(c)
    made = files_below(cache)
    change(folder)
    data = train.load_data(c)
    assert set(files_below(cache)) > set(made) and made.items() <= files_below(cache).items()
    enc = tokenizer_from_dict(data.tokenizer)
    expected = [p.read_bytes().decode() for p in folder.rglob("*.txt")]
    assert sorted(texts_of(data.train, enc) + texts_of(data.val, enc)) == sorted(expected)


def test_changed_vocab_size_makes_tokens_of_its_own(folder, tiny, cache):
    write_text(folder, many_texts(10))
    configs = [tiny(data=str(folder), tokenizer="bpe", vocab_size=v) for v in (257, 280, 320)]
    sizes = [len(ids_of(train.load_data(c).train)) for c in configs]
    assert sizes[0] > sizes[1] > sizes[2]


def test_two_data_do_not_share_tokens(tmp_path, tiny, cache):
    loaded = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "input.txt").write_text(f"this is text {name}\n" * 100)
        loaded.append(train.load_data(tiny(data=str(tmp_path / name))))
    for name, data in zip(("one", "two"), loaded):
        text = tokenizer_from_dict(data.tokenizer).decode(ids_of(data.train))
        assert text.startswith(f"{EOT}this is text {name}\n")


def test_two_data_with_files_of_one_name_size_and_time_do_not_share_tokens(tmp_path, tiny, cache):
    """Archives and reproducible builds give all files one time."""
    loaded = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "input.txt").write_text(f"this is text {name}\n" * 100)
        os.utime(tmp_path / name / "input.txt", ns=(0, 0))
        loaded.append(ids_of(train.load_data(tiny(data=str(tmp_path / name))).train))
    assert loaded[0] != loaded[1]


def test_tokens_left_unfinished_by_a_kill_are_made_again(folder, tiny, cache):
    write_text(folder, many_texts(10))
    c = tiny(data=str(folder))
    expected = ids_of(train.load_data(c).train)
    (made,) = cache.rglob("train.bin")
    (made.parent / "tokenizer.json").unlink()  # it is written last, so a kill leaves none
    os.truncate(made, 100)
    assert ids_of(train.load_data(c).train) == expected


# ----------------------------------------------------------------------------------------------------------------------
# Shards


def raw_uint16(tokens) -> bytes:
    """nanoGPT: nothing but little-endian uint16."""
    return struct.pack(f"<{len(tokens)}H", *tokens)


def llm_c(tokens, magic=20240520, version=1, count=None, code="H") -> bytes:
    """llm.c: 256 int32, of which the first three are magic, version and number of tokens; then the tokens."""
    count = len(tokens) if count is None else count
    return struct.pack("<256i", magic, version, count, *[0] * 253) + struct.pack(f"<{len(tokens)}{code}", *tokens)


def npy(array) -> bytes:
    """NumPy's format 1.0: magic, version, length of the header, header padded to a multiple of 64, the array."""
    array = np.asarray(array)
    header = repr({"descr": array.dtype.str, "fortran_order": False, "shape": array.shape}).encode()
    header += b" " * (-(10 + len(header) + 1) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + array.tobytes()


WRITERS = {
    "nanogpt": (".bin", raw_uint16),
    "llm.c uint16": (".bin", llm_c),
    "llm.c uint32": (".bin", lambda tokens: llm_c(tokens, magic=20240801, code="I")),
    "npy uint16": (".npy", lambda tokens: npy(np.array(tokens, np.uint16))),
    "npy uint32": (".npy", lambda tokens: npy(np.array(tokens, np.uint32))),
}


def random_tokens(seed, n, top=256):
    rng = random.Random(seed)
    return [rng.randint(0, top) for _ in range(n)]


@pytest.mark.parametrize("form", WRITERS)
def test_shards_of_each_format_are_read_as_written(form, folder, tiny):
    suffix, write = WRITERS[form]
    shards = {name: random_tokens(i, 700 + i) for i, name in enumerate(("train_1", "train_0", "val_0"))}
    for name, tokens in shards.items():
        (folder / (name + suffix)).write_bytes(write(tokens))
    (folder / "readme.md").write_text("not a shard")
    data = train.load_data(tiny(data=str(folder)))
    assert [a.tolist() for a in data.train.arrays] == [shards["train_0"], shards["train_1"]]
    assert [a.tolist() for a in data.val.arrays] == [shards["val_0"]]
    assert tokenizer_from_dict(data.tokenizer).n_vocab == 257


def test_nanogpt_pair_of_files(folder, tiny):
    shards = {"train.bin": random_tokens(0, 2000), "val.bin": random_tokens(1, 100)}
    for name, tokens in shards.items():
        (folder / name).write_bytes(raw_uint16(tokens))
    data = train.load_data(tiny(data=str(folder)))
    assert ids_of(data.train) == shards["train.bin"] and ids_of(data.val) == shards["val.bin"]


def test_a_glob_of_shards(folder, tiny):
    for i in range(3):
        (folder / f"a{i}.bin").write_bytes(raw_uint16(random_tokens(i, 200)))
    (folder / "b.bin").write_bytes(b"odd")
    data = train.load_data(tiny(data=str(folder / "a*.bin")))
    assert len(data.train.arrays) == 2 and ids_of(data.val) == random_tokens(0, 200)


def test_without_val_in_a_name_the_first_shard_is_held_out(folder, tiny):
    for i in (2, 0, 1):
        (folder / f"shard_{i}.bin").write_bytes(llm_c(random_tokens(i, 300)))
    data = train.load_data(tiny(data=str(folder)))
    assert ids_of(data.val) == random_tokens(0, 300)
    assert ids_of(data.train) == random_tokens(1, 300) + random_tokens(2, 300)


@pytest.mark.parametrize("form", WRITERS)
def test_end_of_a_single_shard_is_held_out(form, folder, tiny):
    suffix, write = WRITERS[form]
    tokens = random_tokens(0, 4000)
    (folder / ("all" + suffix)).write_bytes(write(tokens))
    for data in (str(folder), str(folder / ("all" + suffix))):
        data = train.load_data(tiny(data=data))
        assert ids_of(data.train) + ids_of(data.val) == tokens
        assert len(ids_of(data.val)) == pytest.approx(4000 * train.HELD_OUT, abs=1)


def test_tokens_beyond_two_bytes_survive(folder, tiny, monkeypatch):
    made = train.make_tokenizer("pairs", two_byte_ranks(65_790), train.PATTERN)
    monkeypatch.setattr(train, "named_tokenizer", lambda *_: made)
    tokens = random_tokens(0, 2000, top=65_790)
    assert max(tokens) > 2**16
    (folder / "a.bin").write_bytes(llm_c(tokens, magic=20240801, code="I"))
    data = train.load_data(tiny(data=str(folder)))
    assert ids_of(data.train) + ids_of(data.val) == tokens
    assert data.train.batch([3])[0][0].tolist() == tokens[96:128]


# ----------------------------------------------------------------------------------------------------------------------
# Blocks


@pytest.mark.parametrize("lengths, block_size", [((50,), 7), ((10, 3, 0, 17, 1, 4, 5, 9), 4), ((8, 9), 8), ((9, 9), 1)])
def test_blocks_are_the_tokens_at_their_places_in_every_shard(lengths, block_size):
    arrays = [np.arange(n, dtype=np.uint16) + 1000 * i for i, n in enumerate(lengths)]
    expected = []
    for array in arrays:
        start = 0
        while start + block_size + 1 <= len(array):
            expected.append(array[start:start + block_size + 1].tolist())
            start += block_size
    blocks = train.Blocks(arrays, block_size)
    assert len(blocks) == len(expected)
    numbers = random.Random(0).choices(range(len(expected)), k=30)
    idx, targets = blocks.batch(numbers)
    assert idx.dtype == targets.dtype == torch.int64 and idx.shape == targets.shape == (30, block_size)
    assert idx.tolist() == [expected[i][:-1] for i in numbers]
    assert targets.tolist() == [expected[i][1:] for i in numbers]


def test_each_target_of_a_shard_is_in_one_block():
    array = np.arange(1 + 6 * 8, dtype=np.uint16)
    blocks = train.Blocks([array], 8)
    _, targets = blocks.batch(range(len(blocks)))
    assert targets.flatten().tolist() == list(range(1, 49))


@pytest.mark.parametrize("seed, n", [(0, 1), (0, 7), (3, 64), (3, 1000)])
def test_each_epoch_is_a_permutation_of_all_blocks(seed, n):
    stream = train.block_numbers(seed, 0, 4 * n, n)
    epochs = [stream[i * n:(i + 1) * n] for i in range(4)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert n < 64 or len({tuple(epoch) for epoch in epochs}) == 4
    assert all(type(i) is int for i in stream)


def test_order_depends_on_the_seed():
    orders = {tuple(train.block_numbers(seed, 0, 50, 50)) for seed in range(6)}
    assert len(orders) == 6
    assert train.block_numbers(0, 50, 50, 50) != train.block_numbers(1, 0, 50, 50)  # not seed + epoch


def test_block_numbers_is_a_pure_function_of_the_place_also_across_epochs():
    n, stream = 13, train.block_numbers(5, 0, 200, 13)
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    rng = random.Random(0)
    for _ in range(100):
        first, count = rng.randrange(150), rng.randrange(40)
        train.block_numbers(rng.randrange(9), rng.randrange(99), 5, rng.randrange(1, 50))  # another stream in between
        assert train.block_numbers(5, first, count, n) == stream[first:first + count]
    assert (state[0], state[1]) == (random.getstate(), np.random.get_state()[1].tolist())
    assert torch.equal(state[2], torch.get_rng_state())


@pytest.mark.parametrize("step", [0, 1, 5, 6])
def test_global_batch_is_the_same_for_any_number_of_ranks(step):
    """Steps 5 and 6 of 8 sequences lie across and after the end of an epoch of 45 blocks."""
    sequences, n = 8, 45
    whole = train.block_numbers(2, step * sequences, sequences, n)
    for world in (2, 4, 8):
        mine = sequences // world
        parts = [train.block_numbers(2, step * sequences + rank * mine, mine, n) for rank in range(world)]
        assert sum(parts, []) == whole


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


@pytest.fixture
def evaluation(tokenizer):
    """evaluation(eval_tokens) -> (model in float64, Data, Config, (nats per token, bits per byte) by hand)."""
    enc, rng, T = tokenizer_from_dict(tokenizer), random.Random(1), 32
    ids = [rng.choice([enc.eot_token, rng.randrange(256), rng.randrange(enc.n_vocab)]) for _ in range(700)]
    shards = [np.array(ids[:400], np.uint16), np.array(ids[400:], np.uint16)]  # 12 and 9 blocks
    data = train.Data(None, train.Blocks(shards, T), tokenizer)
    model = tiny_model(vocab_size=enc.n_vocab, block_size=T).double()
    blocks = [shard[i:i + T + 1].astype(np.int64) for shard in shards for i in range(0, len(shard) - T, T)]
    assert len(blocks) == 21

    def make(eval_tokens):
        n = max(1, min(21, eval_tokens // T))
        nats = n_bytes = 0
        for block in (torch.from_numpy(blocks[i * 21 // n]) for i in range(n)):
            with torch.no_grad():
                logits, _ = model(block[None, :-1])
            nats += F.cross_entropy(logits[0], block[1:], reduction="sum").item()
            n_bytes += len(enc.decode_bytes([i for i in block[1:].tolist() if i != enc.eot_token]))
        c = train.Config(block_size=T, eval_tokens=eval_tokens)
        return model, data, c, (nats / (n * T), nats / math.log(2) / n_bytes)

    return make


@pytest.mark.parametrize("eval_tokens", [1, 32, 7 * 32, 8 * 32 + 31, 21 * 32, 10**6])
def test_evaluate_is_the_plain_mean_over_its_blocks_whatever_the_rows(evaluation, eval_tokens):
    model, data, c, expected = evaluation(eval_tokens)
    lengths = train.token_lengths(tokenizer_from_dict(data.tokenizer))
    for rows in (1, 2, 4, 16, 64):
        got = train.evaluate(model, data, c, rows, train.Devices(torch.device("cpu")), lengths)
        assert got == pytest.approx(expected, rel=2e-7)


def test_evaluate_in_the_shares_of_ranks_counts_each_block_once(evaluation, monkeypatch):
    model, data, c, expected = evaluation(11 * 32)
    lengths, totals = train.token_lengths(tokenizer_from_dict(data.tokenizer)), []
    monkeypatch.setattr(train, "all_mean", lambda values: totals.append(values.tolist()) or [1.0, 1.0, 1.0])
    for rank in range(3):
        train.evaluate(model, data, c, 2, train.Devices(torch.device("cpu"), rank, 3), lengths)
    nats, tokens, n_bytes = (sum(column) for column in zip(*totals))
    assert tokens == 11 * 32
    assert (nats / tokens, nats / math.log(2) / n_bytes) == pytest.approx(expected, rel=2e-7)


def test_evaluate_touches_no_generator_and_no_gradient(evaluation):
    model, data, c, _ = evaluation(5 * 32)
    lengths = train.token_lengths(tokenizer_from_dict(data.tokenizer))
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    train.evaluate(model, data, c, 4, train.Devices(torch.device("cpu")), lengths)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    assert all(p.grad is None for p in model.parameters())


# ----------------------------------------------------------------------------------------------------------------------
# Flags


@pytest.mark.parametrize("argv, expected", [
    ([], {}),
    (["--steps=7"], {"steps": 7}),
    (["--steps", "7", "--lr", "1e-3"], {"steps": 7, "lr": 0.001}),
    (["--dry_run"], {"dry_run": True}),
    (["--dry_run", "--steps=7", "--tie_embeddings"], {"dry_run": True, "steps": 7, "tie_embeddings": True}),
    (["--qk_norm"], {"qk_norm": True}),
    (["--qk_norm=false"], {"qk_norm": False}),
    (["--qk_norm=1"], {"qk_norm": True}),
    (["--qk_norm", "0", "--dry_run", "True"], {"qk_norm": False, "dry_run": True}),
    (["--data=a=b=c"], {"data": "a=b=c"}),
    (["--data", "a=b"], {"data": "a=b"}),
    (["--data=--odd"], {"data": "--odd"}),
    (["--let_teacher_layer=-2"], {"let_teacher_layer": -2}),
    (["--let_teacher_layer", "-2", "--lr", "-0.5"], {"let_teacher_layer": -2, "lr": -0.5}),
    (["--out_dir="], {}),
    (["--steps=1", "--steps=2"], {"steps": 2}),
])
def test_flags_are_read(argv, expected):
    assert train.parse_flags(argv) == train.Config(**expected)


def random_config(seed):
    rng = random.Random(seed)

    def value(f):
        if f.metadata["choices"]:
            return rng.choice(f.metadata["choices"])
        return {bool: lambda: rng.random() < 0.5, int: lambda: rng.randint(-10**6, 10**6),
                float: lambda: rng.choice([rng.uniform(-1, 1), rng.random() * 10.0 ** rng.randint(-300, 300), 0.0]),
                str: lambda: "".join(rng.choices("az09 =-_/.*'\"\\éß北\n", k=rng.randrange(1, 12)))}[f.type]()

    return train.Config(**{name: value(f) for name, f in train.FLAGS.items() if name != "resume"})


@pytest.mark.parametrize("seed", range(20))
def test_any_config_survives_its_command_line(seed):
    config = random_config(seed)
    assert train.parse_flags(flags_of(config)) == config
    apart = [word for name, value in vars(config).items() if not str(value).startswith("--")
             for word in (f"--{name}", str(value))]
    together = [f"--{name}={value}" for name, value in vars(config).items() if str(value).startswith("--")]
    assert train.parse_flags(apart + together) == config


def test_help_names_every_flag_with_its_default_and_choices():
    lines = train.help_text().splitlines()
    for name, f in train.FLAGS.items():
        (line,) = [line for line in lines if line.startswith(f"  --{name}=")]
        assert line.startswith(f"  --{name}={f.default if f.default != '' else '...'} ")
        assert f.metadata["help"] in line and all(choice in line for choice in f.metadata["choices"] or ())


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--steps=5", "--help"]])
def test_help_is_printed_and_is_no_error(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        train.parse_flags(argv)
    assert not stop.value.code and capsys.readouterr().out.strip() == train.help_text().strip()


@pytest.mark.parametrize("argv, fragments", [
    (["--n_layers=3"], ["--n_layers: no such flag", "did you mean --n_layer?"]),
    (["--learning-rate", "3"], ["--learning-rate: no such flag"]),
    (["--Steps=3"], ["did you mean --steps?"]),
    (["steps=3"], ["steps"]),
    (["-steps", "3"], ["-steps"]),
    (["--steps=1.5"], ["--steps=1.5", "whole number"]),
    (["--steps=many"], ["--steps=many", "whole number"]),
    (["--steps="], ["--steps=", "whole number"]),
    (["--lr=fast"], ["--lr=fast", "a number"]),
    (["--lr", "nan"], ["--lr=nan", "finite"]),
    (["--lr=inf"], ["--lr=inf", "finite"]),
    (["--clip=-Infinity"], ["--clip=-Infinity", "finite"]),
    (["--lr=1e999"], ["--lr=1e999", "finite"]),
    (["--qk_norm=maybe"], ["--qk_norm=maybe", "true or false"]),
    (["--steps"], ["--steps", "missing"]),
    (["--steps", "--lr=1"], ["--steps", "missing"]),
    (["--resume=auto"], ["--resume=auto", "--out_dir"]),
    (["--resume=nowhere/ckpt.pt"], ["nowhere/ckpt.pt"]),
])
def test_bad_flags_are_refused(argv, fragments):
    with pytest.raises(BadInput) as error:
        train.parse_flags(argv)
    assert all(fragment in str(error.value) for fragment in fragments) and "\n" not in str(error.value)


def test_bad_flags_are_listed_together():
    with pytest.raises(BadInput) as error:
        train.parse_flags(["--n_layers", "3", "--steps=x", "--lr=nan", "--qk_norm=5", "--seed"])
    lines = [line.strip() for line in str(error.value).splitlines()]
    assert [re.match(r"--\w+", line)[0] for line in lines] == ["--n_layers", "--steps", "--lr", "--qk_norm", "--seed"]


def test_resume_auto_in_a_folder_without_a_run_begins_one(tmp_path):
    assert train.parse_flags(["--resume=auto", f"--out_dir={tmp_path}"]) == train.Config(out_dir=str(tmp_path))


def sound(**flags):
    """A Config that passes the checks, whatever the default sizes are, with these flags changed."""
    base = dict(block_size=256, batch_tokens=4096, micro_batch=16, n_layer=6, n_embd=256, n_head=2, n_kv_head=0,
                steps=400, warmup_steps=20, optimizer="muon", schedule="wsd", tokenizer="bpe", teacher="none")
    return train.Config(**{**base, **flags})


def test_defaults_pass():
    train.check(train.Config())


@pytest.mark.parametrize("flags", [
    {}, {"n_head": 4, "n_kv_head": 2}, {"micro_batch": 64}, {"batch_tokens": 256, "micro_batch": 1},
    {"tokenizer": "bytes"}, {"tokenizer": "gpt2"}, {"vocab_size": 257}, {"optimizer": "adamw"},
    {"teacher": "auto", "let_weight": 1.0, "let_stop": 50.0}, {"warmup_steps": 500, "schedule": "constant"},
    {"device": "cpu"}, {"clip": 0.0},
    {"sample_tokens": 0}, {"teacher": "some.pt", "let_student_layer": 0}, {"warmup_steps": 0, "decay_fraction": 1.0},
    {"out_dir": "not/yet/there"},
])
def test_sound_flags_pass(flags):
    train.check(sound(**flags))


def other(name):
    """Another value of the flag than its default, and a sound one."""
    f = train.FLAGS[name]
    if f.metadata["choices"]:
        return next(choice for choice in f.metadata["choices"] if choice != f.default)
    return not f.default if f.type is bool else f.type(f.default * 0.5 if f.type is float else f.default + 1)


BAD = [
    *(({name: 0}, [f"--{name}=0"])
      for name in ("block_size", "batch_tokens", "micro_batch", "eval_tokens", "n_layer", "n_embd", "n_head", "steps",
                   "eval_every", "log_every", "save_every", "lr", "embedding_lr")),
    *(({name: -1}, [f"--{name}=-1"])
      for name in ("n_kv_head", "warmup_steps", "weight_decay", "clip", "seed", "steps", "lr", "sample_tokens")),
    *(({name: value}, [f"--{name}={value}"]) for name in ("beta1", "beta2", "momentum") for value in (1.0, -0.1)),
    *(({name: "odd"}, [f"--{name}=odd", *f.metadata["choices"]])
      for name, f in train.FLAGS.items() if f.metadata["choices"]),
    *(({name: other(name)}, [f"--{name}={other(name)}", "--teacher"])
      for name in train.FLAGS if name.startswith("let_")),
    *(({"optimizer": "adamw", name: other(name)}, [f"--{name}={other(name)}", "--optimizer=adamw", "Muon"])
      for name in ("momentum", "muon_scale")),
    ({"decay_fraction": 1.1}, ["--decay_fraction=1.1"]),
    ({"batch_tokens": 1000}, ["--batch_tokens=1000", "--block_size=256", "multiple"]),
    ({"micro_batch": 5}, ["--micro_batch=5", "16"]),
    ({"n_embd": 256, "n_head": 3}, ["--n_embd=256", "--n_head=3"]),
    ({"n_embd": 6, "n_head": 2}, ["--n_embd=6", "--n_head=2", "even"]),
    ({"n_head": 4, "n_kv_head": 3}, ["--n_head=4", "--n_kv_head=3", "multiple"]),
    ({"n_head": 2, "n_kv_head": 4}, ["--n_head=2", "--n_kv_head=4"]),
    ({"vocab_size": 256}, ["--vocab_size=256", "257"]),
    ({"tokenizer": "bytes", "vocab_size": 300}, ["--vocab_size=300", "--tokenizer=bytes"]),
    ({"tokenizer": "gpt2", "vocab_size": 50257}, ["--vocab_size=50257", "--tokenizer=gpt2"]),
    ({"steps": 10, "warmup_steps": 11}, ["--steps=10", "--warmup_steps=11"]),
    ({"teacher": "auto", "n_layer": 2, "let_student_layer": 3}, ["--let_student_layer=3", "--n_layer=2"]),
    ({"teacher": "auto", "let_student_layer": -1}, ["--let_student_layer=-1"]),
    ({"teacher": "auto", "let_stop": 0.0}, ["--let_stop=0.0"]),
    ({"teacher": "auto", "distill": "kd", "distill_weight": 0.0, "distill_beta": 0.5}, ["--distill_weight=0.0 --distill_beta=0.5"]),
    ({"tie_embeddings": True, "embedding_lr": 10.0}, ["--embedding_lr=10.0 --tie_embeddings=True"]),
    ({"multipliers": "vector", "multiplier_modules": "ssm,mlp"}, ["--multiplier_modules=ssm,mlp", "no ssm"]),
    ({"module_lr": "router=2"}, ["--module_lr=router=2", "no router"]),
    ({"mixer": "mamba2", "module_decay": "mlp=2"}, ["--module_decay=mlp=2", "no mlp"]),
    ({"mixer": "mamba2", "qk_norm": True}, ["--qk_norm=True", "no block has attention"]),
    ({"teacher": "auto", "let_stop": 2.5}, ["--let_stop=2.5", "whole"]),
    ({"teacher": "auto", "let_weight": -1.0}, ["--let_weight=-1.0"]),
    ({"device": "tpu"}, ["--device=tpu"]),
    ({"device": "cuda:x"}, ["--device=cuda:x"]),
]


@pytest.mark.parametrize("flags, fragments", BAD, ids=[",".join(f"{k}={v}" for k, v in bad[0].items()) for bad in BAD])
def test_values_out_of_range_and_contradictions_are_refused(flags, fragments):
    with pytest.raises(BadInput) as error:
        train.check(sound(**flags))
    assert all(fragment in str(error.value) for fragment in fragments), str(error.value)


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "mps"])
def test_device_that_is_not_there_is_refused(device):
    if torch.cuda.is_available() if device != "mps" else torch.backends.mps.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(BadInput, match=f"--device={device}: no such device"):
        train.check(sound(device=device))


def test_sequences_must_split_over_the_ranks():
    c = sound(batch_tokens=256 * 8, micro_batch=4)
    for world in (1, 2, 4, 8):
        train.check(c, world)
    for world in (3, 16):
        with pytest.raises(BadInput, match=f"8 sequences do not split over {world} ranks"):
            train.check(c, world)
    with pytest.raises(BadInput, match="--micro_batch=4"):
        train.check(sound(batch_tokens=256 * 12, micro_batch=4), 2)  # six sequences a rank


def test_contradictions_are_listed_together():
    with pytest.raises(BadInput) as error:
        train.check(sound(steps=0, n_head=3, let_weight=0.5, mlp="relu", optimizer="adamw", momentum=0.5))
    text = str(error.value)
    assert all(part in text for part in ("--steps=0", "--n_head=3", "--let_weight=0.5", "--mlp=relu", "--momentum=0.5"))
    assert len(text.splitlines()) >= 5 and len(text.splitlines()) == len(set(text.splitlines()))


@pytest.mark.parametrize("seed", [2**64, 10**30])
def test_seed_that_no_generator_takes_is_refused(seed, tiny):
    with pytest.raises(BadInput, match="--seed"):
        train.train(tiny(seed=seed))


# ----------------------------------------------------------------------------------------------------------------------
# Bad data

FINE = random_tokens(0, 2000)
BAD_DATA = {  # name -> files, --data below their folder, other flags, what the message must name
    "missing": ({}, "nothing.txt", {}, ["nothing.txt", "no such file"]),
    "glob without a file": ({"a.txt": b"x"}, "*.md", {}, ["*.md"]),
    "empty folder": ({}, "", {}, ["no file"]),
    "only hidden files": ({".a": b"x" * 999}, "", {}, ["no file"]),
    "empty file": ({"a.txt": b""}, "", {}, ["no text"]),
    "blank file": ({"a.txt": b" \n\n" + EOT.encode() + b"\n"}, "a.txt", {}, ["no text"]),
    "not UTF-8": ({"a.txt": b"fine\n" * 99, "b.txt": b"caf\xe9 \n"}, "", {}, ["b.txt", "UTF-8", "byte 3"]),
    "UTF-16": ({"a.txt": "text\n".encode("utf-16") * 99}, "a.txt", {}, ["a.txt", "UTF-8"]),
    "held-out part too short": ({"a.txt": b"short line\n" * 20}, "a.txt", {}, ["held-out", "--block_size=32"]),
    "training part too short": ({"train.bin": raw_uint16(FINE[:32]), "val.bin": raw_uint16(FINE)}, "", {},
                                ["training", "32 tokens", "--block_size=32"]),
    "too few pairs for the vocabulary": ({"a.txt": b"ab\n" * 99}, "", {"tokenizer": "bpe", "vocab_size": 300},
                                         ["--vocab_size=300", "258 tokens"]),
    "unknown tokenizer": ({"a.txt": b"x\n" * 999}, "", {"tokenizer": "gpt-2"},
                          ["--tokenizer=gpt-2", "bpe", "bytes", "gpt2"]),
    "unknown tokenizer of shards": ({"a.bin": raw_uint16(FINE)}, "", {"tokenizer": "gpt-2"}, ["--tokenizer=gpt-2"]),
    "shards and bpe": ({"a.bin": raw_uint16(FINE)}, "", {"tokenizer": "bpe"}, ["--tokenizer=bpe", "shards"]),
    "wrong magic": ({"a.bin": llm_c(FINE, magic=12345)}, "", {}, ["a.bin", "magic", "12345", "20240520", "20240801"]),
    "wrong magic, four bytes": ({"a.bin": llm_c(FINE, magic=777, code="I")}, "", {}, ["a.bin", "magic", "777"]),
    "truncated": ({"a.bin": llm_c(FINE[:1500], count=2000)}, "", {}, ["a.bin", "2000", "1500"]),
    "too long": ({"a.bin": llm_c(FINE, count=1500)}, "a.bin", {}, ["a.bin", "1500", "2000"]),
    "half of the promised width": ({"a.bin": llm_c(FINE, magic=20240801)}, "", {}, ["a.bin", "2000", "1000"]),
    "negative count": ({"a.bin": llm_c(FINE, count=-1)}, "", {}, ["a.bin"]),
    "no tokens under the header": ({"a.bin": llm_c([])}, "", {}, ["0 tokens"]),
    "odd number of bytes": ({"a.bin": raw_uint16(FINE) + b"x"}, "", {}, ["a.bin", "4001"]),
    "empty bin": ({"a.bin": raw_uint16(FINE), "b.bin": b""}, "", {}, ["b.bin"]),
    "token beyond the vocabulary": ({"a.bin": raw_uint16(FINE), "b.bin": llm_c(FINE + [300])}, "", {},
                                    ["b.bin", "300", "257"]),
    "first token beyond the vocabulary": ({"a.npy": npy(np.array([257] + FINE, np.uint16))}, "", {}, ["a.npy", "257"]),
    "held-out token beyond the vocabulary": ({"a.bin": raw_uint16(FINE), "val.bin": raw_uint16(FINE + [999])}, "", {},
                                             ["val.bin", "999", "257"]),
    "four-byte token beyond": ({"a.bin": llm_c(FINE + [2**32 - 1], magic=20240801, code="I")}, "", {},
                               ["a.bin", str(2**32 - 1)]),
    "2-D npy": ({"a.npy": npy(np.zeros((100, 20), np.uint16))}, "", {}, ["a.npy", "(100, 20)"]),
    "0-D npy": ({"a.npy": npy(np.uint16(5))}, "", {}, ["a.npy"]),
    "int64 npy": ({"a.npy": npy(np.zeros(2000, np.int64))}, "", {}, ["a.npy", "int64", "uint16"]),
    "float npy": ({"a.npy": npy(np.zeros(2000, np.float32))}, "", {}, ["a.npy", "float32"]),
    "big-endian npy": ({"a.npy": npy(np.zeros(2000, ">u2"))}, "", {}, ["a.npy"]),
    "truncated npy": ({"a.npy": npy(np.zeros(2000, np.uint16))[:1000]}, "", {}, ["a.npy"]),
    "npy cut in its header": ({"a.npy": npy(np.zeros(2000, np.uint16))[:40]}, "", {}, ["a.npy"]),
    "npy of no tokens": ({"a.npy": npy(np.zeros(0, np.uint16))}, "", {}, ["0 tokens"]),
    "npy that is text": ({"a.npy": b"not an array\n" * 99}, "", {}, ["a.npy"]),
    "empty npy": ({"a.npy": b""}, "", {}, ["a.npy"]),
    "only a held-out shard": ({"fineweb_val_000000.bin": llm_c(FINE)}, "", {}, ["training"]),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_is_refused_by_name_before_anything_is_written(name, folder, tiny, cache):
    files, data, flags, fragments = BAD_DATA[name]
    for file, content in files.items():
        (folder / file).write_bytes(content)
    c = tiny(data=str(folder / data), **flags)
    with pytest.raises(BadInput) as error:
        train.train(c)
    assert all(fragment in str(error.value) for fragment in fragments), str(error.value)
    assert not Path(c.out_dir).exists()


def test_npz_under_the_name_of_npy_is_refused(folder, tiny):
    with zipfile.ZipFile(folder / "a.npy", "w") as z:
        z.writestr("arr_0.npy", npy(np.array(FINE, np.uint16)))
    with pytest.raises(BadInput, match="a.npy"):
        train.train(tiny(data=str(folder)))


class Touch:
    """Unpickling one of these makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_npy_of_pickled_objects_is_refused_and_not_unpickled(folder, tmp_path, tiny):
    np.save(folder / "a.npy", np.array([Touch(tmp_path / "ran")] * 2, object), allow_pickle=True)
    c = tiny(data=str(folder))
    with pytest.raises(BadInput, match="a.npy"):
        train.train(c)
    assert not (tmp_path / "ran").exists() and not Path(c.out_dir).exists()
    np.load(folder / "a.npy", allow_pickle=True)
    assert (tmp_path / "ran").exists()  # the file was as dangerous as it should be


def test_highest_token_of_the_vocabulary_is_fine(folder, tiny):
    (folder / "a.bin").write_bytes(raw_uint16([256] * 2000))
    assert set(ids_of(train.load_data(tiny(data=str(folder))).train)) == {256}


def test_tokenizer_that_cannot_be_fetched_is_refused_and_found_later(folder, tiny, cache, monkeypatch):
    def no_network(name):
        raise requests.exceptions.ConnectionError("no route")

    write_text(folder, many_texts(10))
    (folder / "shard").mkdir()
    (folder / "shard" / "a.bin").write_bytes(raw_uint16(FINE))
    text, shards = tiny(data=str(folder / "a"), tokenizer="gpt2"), tiny(data=str(folder / "shard"), tokenizer="gpt2")
    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    for c in (text, shards):
        with pytest.raises(BadInput) as error:
            train.train(c)
        assert all(part in str(error.value) for part in ("--tokenizer=gpt2", "ConnectionError", "TIKTOKEN_CACHE_DIR"))
        assert not Path(c.out_dir).exists()
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: tokenizer_from_dict(train.named_tokenizer("bytes")))
    assert len(train.load_data(text).train) > 0 and len(train.load_data(shards).train) > 0


def out_dir_is_a_file(tmp_path):
    (tmp_path / "run").write_text("a file")


def out_dir_is_below_a_file(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "file").write_text("a file")
    return tmp_path / "run" / "file" / "deeper" / "run"


def out_dir_holds_a_run(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "ckpt.pt").write_bytes(b"a checkpoint")


@pytest.mark.parametrize("prepare", [out_dir_is_a_file, out_dir_is_below_a_file, out_dir_holds_a_run])
def test_out_dir_that_cannot_be_used_is_refused_and_left_as_it_is(prepare, tmp_path, tiny):
    out_dir = prepare(tmp_path) or tmp_path / "run"
    before = files_below(tmp_path)
    with pytest.raises(BadInput, match=f"--out_dir={re.escape(str(out_dir))}: "):
        train.train(tiny(out_dir=str(out_dir)))
    assert files_below(tmp_path) == before


@pytest.mark.parametrize("argv, fragments", [
    (["--n_layers=3", "--steps=x"], ["did you mean --n_layer?", "--steps=x"]),
    (["--data={data}/nothing.txt", "--out_dir={out}"], ["nothing.txt"]),
    (["--data={data}/bad.bin", "--tokenizer=bytes"], ["bad.bin", "magic"]),
])
def test_command_says_one_error_and_exits_with_2_and_writes_nothing(argv, fragments, tmp_path, folder):
    (folder / "bad.bin").write_bytes(llm_c(FINE, magic=1))
    (tmp_path / "here").mkdir()
    argv = [word.format(data=folder, out=tmp_path / "out") for word in argv]
    done = run_python(ROOT / "train.py", "--device=cpu", *argv, cwd=tmp_path / "here")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("error:") == 1 and "Traceback" not in done.stderr
    assert all(fragment in done.stderr for fragment in fragments)
    assert list((tmp_path / "here").iterdir()) == [] and not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Downloads


@pytest.fixture
def site(monkeypatch):
    """A web server on this machine: site.pages[path] is called with the request; site.asked lists what was asked."""
    pages, asked = {}, []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.command, self.path))
            pages[self.path](self)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield SimpleNamespace(url=f"http://127.0.0.1:{server.server_address[1]}", pages=pages, asked=asked)
        server.shutdown()


def answer(body=b"", status=200, **headers):
    def page(request):
        request.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            request.send_header(name.replace("_", "-"), str(value))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)

    return page


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


BODY = b"First Citizen:\nBefore we proceed any further, hear me speak.\n\n" * 60_000  # above 3 MB: several reads


def test_download_arrives_once_and_whole(site, cache, monkeypatch):
    site.pages["/a/input.txt"] = answer(BODY)
    monkeypatch.setitem(train.DOWNLOADS, "shakespeare", [(site.url + "/a/input.txt", sha256(BODY))])
    (path,) = train.download("shakespeare")
    assert path.name == "input.txt" and path.read_bytes() == BODY and cache in path.parents
    assert train.download("shakespeare") == [path] and site.asked == [("GET", "/a/input.txt")]
    assert list(files_below(cache)) == [path]


def test_downloaded_text_becomes_tokens(site, cache, tiny, monkeypatch):
    body = BODY[:63 * 200]
    site.pages["/input.txt"] = answer(body)
    monkeypatch.setitem(train.DOWNLOADS, "shakespeare", [(site.url + "/input.txt", sha256(body))])
    data = train.load_data(tiny(data="shakespeare"))
    assert bytes(ids_of(data.train)[1:] + ids_of(data.val)[1:]) == body


def test_downloaded_shards_become_tokens(site, cache, tiny, monkeypatch):
    files = {"f_val_000000.bin": llm_c(random_tokens(0, 500)), "f_train_000001.bin": llm_c(random_tokens(1, 500))}
    site.pages.update({f"/{name}": answer(content) for name, content in files.items()})
    monkeypatch.setitem(train.DOWNLOADS, "fineweb", [(f"{site.url}/{name}", sha256(b)) for name, b in files.items()])
    data = train.load_data(tiny(data="fineweb"))
    assert ids_of(data.val) == random_tokens(0, 500) and ids_of(data.train) == random_tokens(1, 500)


def test_download_of_another_content_is_refused_and_not_kept(site, cache, tiny, monkeypatch):
    site.pages["/input.txt"] = answer(BODY + b"!")
    monkeypatch.setitem(train.DOWNLOADS, "shakespeare", [(site.url + "/input.txt", sha256(BODY))])
    c = tiny(data="shakespeare")
    with pytest.raises(BadInput) as error:
        train.train(c)
    assert sha256(BODY) in str(error.value) and sha256(BODY + b"!") in str(error.value)
    assert files_below(cache) == {} and not Path(c.out_dir).exists()


def cut_off(request):
    request.send_response(200)
    request.send_header("Content-Length", str(len(BODY)))
    request.end_headers()
    request.wfile.write(BODY[:2_000_000])


def cut_off_in_a_chunk(request):
    request.send_response(200)
    request.send_header("Transfer-Encoding", "chunked")
    request.end_headers()
    request.wfile.write(b"%x\r\n" % len(BODY) + BODY[:2_000_000])


def no_answer(request):
    request.close_connection = True


def no_http(request):
    request.wfile.write(b"what?\r\n\r\n")


@pytest.mark.parametrize("page", [
    cut_off, cut_off_in_a_chunk, no_answer, no_http, answer(status=404), answer(status=503),
], ids=["length", "chunk", "no answer", "no http", "404", "503"])
def test_download_that_fails_leaves_nothing_and_works_later(page, site, cache, monkeypatch):
    site.pages["/input.txt"] = page
    monkeypatch.setitem(train.DOWNLOADS, "shakespeare", [(site.url + "/input.txt", sha256(BODY))])
    with pytest.raises(BadInput, match=re.escape(site.url + "/input.txt")):
        train.download("shakespeare")
    assert files_below(cache) == {}
    site.pages["/input.txt"] = answer(BODY)
    assert train.download("shakespeare")[0].read_bytes() == BODY


@pytest.mark.parametrize("digest", ["0" * 64, None], ids=["known checksum", "hub"])
def test_no_network_names_the_address_and_where_to_put_the_file(digest, cache, monkeypatch):
    url = f"http://127.0.0.1:{free_port()}/some/where/input.txt"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setitem(train.DOWNLOADS, "shakespeare", [(url, digest)])
    with pytest.raises(BadInput) as error:
        train.download("shakespeare")
    (target,) = [word for word in str(error.value).split() if word.startswith(str(cache))]
    assert url in str(error.value) and files_below(cache) == {}
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    Path(target).write_bytes(BODY)  # as the message says
    assert train.download("shakespeare")[0].read_bytes() == BODY


def test_all_files_of_a_download_are_fetched_and_those_that_are_there_kept(site, cache, monkeypatch):
    files = {"a.bin": b"aaa", "b.bin": b"bbb", "c.bin": b"ccc"}
    site.pages.update({f"/{name}": answer(content) for name, content in files.items()})
    monkeypatch.setitem(train.DOWNLOADS, "fineweb", [(f"{site.url}/{name}", sha256(b)) for name, b in files.items()])
    site.pages["/b.bin"] = answer(b"wrong")
    with pytest.raises(BadInput, match="b.bin"):
        train.download("fineweb")
    site.pages["/b.bin"] = answer(b"bbb")
    assert [path.read_bytes() for path in train.download("fineweb")] == list(files.values())
    assert site.asked.count(("GET", "/a.bin")) == 1


@pytest.mark.parametrize("etag", ['"{}"', "{}"])
def test_hub_file_is_checked_by_the_hash_in_its_redirect(etag, site, cache, monkeypatch):
    """The hub redirects to a storage, and only the redirect itself names the SHA-256."""
    headers = {"Location": site.url + "/storage", "X-Linked-Etag": etag.format(sha256(BODY))}
    site.pages["/resolve/big.bin"] = answer(status=302, **headers)
    site.pages["/storage"] = answer(BODY, ETag='"something else"')
    monkeypatch.setitem(train.DOWNLOADS, "tinystories", [(site.url + "/resolve/big.bin", None)])
    (path,) = train.download("tinystories")
    assert path.name == "big.bin" and path.read_bytes() == BODY
    assert site.asked == [("HEAD", "/resolve/big.bin"), ("GET", "/resolve/big.bin"), ("GET", "/storage")]


@pytest.mark.parametrize("headers", [{"X_Linked_Etag": f'"{sha256(b"other")}"'}, {}], ids=["other hash", "no hash"])
def test_hub_file_that_its_hash_does_not_confirm_is_refused(headers, site, cache, monkeypatch):
    site.pages["/big.bin"] = answer(status=302, Location=site.url + "/storage", **headers)
    site.pages["/storage"] = answer(BODY)
    monkeypatch.setitem(train.DOWNLOADS, "tinystories", [(site.url + "/big.bin", None)])
    with pytest.raises(BadInput, match=sha256(BODY)):
        train.download("tinystories")
    assert files_below(cache) == {}


# ----------------------------------------------------------------------------------------------------------------------
# Files written whole or not at all


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("old", [b"old", None])
def test_failure_while_writing_leaves_what_was_there(error, old, tmp_path):
    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)
    before = files_below(tmp_path)
    with pytest.raises(error):
        with train.written_whole(path) as tmp:
            tmp.write_bytes(b"half of the n")
            assert tmp != path and tmp.parent == path.parent
            raise error("stop")
    assert files_below(tmp_path) == before and (old is None or path.read_bytes() == old)


def test_file_written_whole_replaces_the_old_one_only_at_the_end(tmp_path):
    path = tmp_path / "new folder" / "file"
    for old, new in ((None, b"first"), (b"first", b"second, longer"), (b"second, longer", b"")):
        with train.written_whole(path) as tmp:
            tmp.write_bytes(new)
            number = tmp.stat().st_ino
            assert (path.read_bytes() if path.exists() else None) == old
        assert path.read_bytes() == new and list(path.parent.iterdir()) == [path]
        assert path.stat().st_ino == number  # renamed: a copy could be interrupted half-way


def test_failure_before_anything_is_written_is_not_hidden(tmp_path):
    with pytest.raises(FileNotFoundError):
        with train.written_whole(tmp_path / "file"):
            pass
    assert list(tmp_path.iterdir()) == []
