"""Shared by all tests: the import path, a private cache, a tiny corpus, tiny models and runs, and
comparison of runs. No test uses a network."""
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, os.environ.get("NANOLET_SOURCES", str(ROOT)))  # exercises.py sets it to grade

import train  # noqa: E402
from model import GPT, ModelConfig, command, load_checkpoint  # noqa: E402

torch.set_num_threads(1)  # the models are so small that more threads only wait for each other


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """One cache for the whole test run, and never the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOLET_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of 24 small text files, about 60 kB, with enough structure that a loss can fall."""
    folder, rng = tmp_path_factory.mktemp("corpus"), random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
    for i in range(24):
        lines = [f"def {rng.choice(words)}_{rng.randrange(9)}({rng.choice(words)}):\n"
                 f"    return {rng.choice(words)} + {rng.randrange(100)}\n" for _ in range(50)]
        (folder / f"file{i:02}.txt").write_text("\n".join(lines))
    return folder


def tiny_config(corpus, folder, out_dir="run", **flags) -> "train.Config":
    """A run of about a quarter of a second: bytes, 2 blocks of width 32, fp32, no sample. It is
    written to folder / out_dir."""
    base = dict(data=str(corpus), tokenizer="bytes", block_size=32, batch_tokens=256, micro_batch=4,
                eval_tokens=1024, n_layer=2, n_embd=32, n_head=2, steps=10, warmup_steps=2,
                eval_every=5, log_every=1, save_every=5, dtype="fp32", device="cpu",
                sample_tokens=0, out_dir=str(folder / out_dir))
    return train.Config(**{**base, **flags})


@pytest.fixture
def tiny(corpus, tmp_path):
    """tiny(**flags) is tiny_config on the corpus, in the test's own folder."""
    return lambda **flags: tiny_config(corpus, tmp_path, **flags)


def tiny_model(seed=0, **kw) -> GPT:
    """A small GPT with no zero weights, so that every path of the network matters to its output."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=97, block_size=32, n_layer=3, n_embd=32, n_head=4, n_kv_head=2)
    model = GPT(ModelConfig(**{**sizes, **kw}))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2) if p.ndim == 2 else p.uniform_(0.5, 1.5)
    return model.eval()


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


ODD = [" ", "  ", "\n", "\r\n", "\r", "\t", "\v", "\f", "\x00", "\x1c", "\x85", "\xa0", "\u2003",
       "\u2028", "\u3000", "\ufeff", "\u200b", "\u200d", "e\u0301", "\u0301", "\u094d", "²", "½",
       "①", "٣", "_", "__", "‿", "ß", "ſ", "İ", "Ω", "北京", "안녕", "👩‍🚀", "🏳️‍🌈", "\U0001d7d8",
       "\U000e0041", "\U0010ffff", "'", '"', "“", "€", "a", "Z", "09"]  # for tokenizers


def random_tokens(*shape, vocab=97, seed=1):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def flags_of(config) -> list[str]:
    """The command line that makes this Config."""
    return [f"--{name}={value}" for name, value in vars(config).items()
            if value != train.FLAGS[name].default]


def run_python(*args, ranks=1, **kw):
    """Runs a command of the project in a process of its own, under torchrun for several ranks."""
    launcher = []
    if ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **kw.pop("env", {})}
    return subprocess.run([sys.executable, *launcher, *map(str, args)], cwd=kw.pop("cwd", ROOT),
                          env=env, text=True, capture_output=True, timeout=300, **kw)


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """refused(main, *words) runs a command in this process, in a folder of its own, and checks how
    it refuses: in less than 10 seconds of the processor, with exit code 2 and one line, which it
    returns, and with nothing written."""
    def run(main, *words):
        before, begin = sorted(tmp_path.rglob("*")), time.process_time()
        monkeypatch.setattr(sys, "argv", ["", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            command(main)
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
        assert time.process_time() - begin < 10 and sorted(tmp_path.rglob("*")) == before
        return said

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("signal.signal", lambda *_: None)  # pytest keeps its own handlers
    return run


WRONG_FILES = {"empty": b"", "noise": random.Random(0).randbytes(999), "text": b"a b c\n",
               "deep": b"[" * 100_000, "null": b"null", "latin": b"caf\xe9\n"}


@pytest.fixture
def wrong_files(tmp_path):
    """Names of files that are not what a command needs: a missing one, a folder, and others."""
    (tmp_path / "folder").mkdir()
    for name, content in WRONG_FILES.items():
        (tmp_path / name).write_bytes(content)
    return ["nowhere.pt", "folder/none", "text/none", "n" * 300, *WRONG_FILES]


def lines(run_dir) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def figures(history) -> dict:
    """{(step, name): number} of all that was logged and does not depend on the machine."""
    machine = ("seconds", "tokens_per_second", "mfu", "peak_memory_bytes")
    return {(line["step"], name): value for line in history for name, value in line.items()
            if isinstance(value, (int, float)) and name not in machine}


def same(a, b) -> bool:
    """Bitwise equality of nested checkpoints, tensors included."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def state(path) -> dict:
    """What must not depend on how a run came to its step: a checkpoint without the clock, the flags
    and the provenance."""
    return {k: v for k, v in load_checkpoint(path).items()
            if k not in ("config", "seconds", "provenance")}


def stop_at(config, step) -> str:
    """Runs the config in this process and breaks it off at `step`, where it saves; returns the
    checkpoint."""
    save = train.save_checkpoint

    def saving(path, checkpoint):
        save(path, checkpoint)
        if checkpoint["step"] == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "save_checkpoint", saving)
        with pytest.raises(KeyboardInterrupt):
            train.train(config)
    return f"{config.out_dir}/ckpt.pt"
