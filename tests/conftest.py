"""Shared by all tests: the import path, a private cache, a tiny corpus and tiny models. No test uses a network."""
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train as train_module  # noqa: E402
from model import GPT, ModelConfig  # noqa: E402


if "PYTEST_XDIST_WORKER" in os.environ:  # one thread for each of the processes that share the cores
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """One cache for the whole test run, and never the user's."""
    monkeypatch.setenv("NANOLET_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of 24 small text files, about 60 kB, with structure enough that a loss can fall."""
    folder, rng = tmp_path_factory.mktemp("corpus"), random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
    for i in range(24):
        lines = [f"def {rng.choice(words)}_{rng.randrange(9)}({rng.choice(words)}):\n    return {rng.choice(words)} + "
                 f"{rng.randrange(100)}\n" for _ in range(50)]
        (folder / f"file{i:02}.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture
def tiny(corpus, tmp_path):
    """tiny(**flags): the Config of a run that takes about a second: bytes, 2 blocks of width 32, fp32, no sample."""

    def make(**flags):
        base = dict(data=str(corpus), tokenizer="bytes", block_size=32, batch_tokens=256, micro_batch=4, eval_tokens=1024,
                    n_layer=2, n_embd=32, n_head=2, steps=10, warmup_steps=2, eval_every=5, log_every=1, save_every=5,
                    dtype="fp32", device="cpu", sample_tokens=0, out_dir=str(tmp_path / "run"))
        return train_module.Config(**{**base, **flags})

    return make


def tiny_model(seed=0, **kw) -> GPT:
    """A small GPT with no zero weights, so that every path of the network matters to its output."""
    torch.manual_seed(seed)
    model = GPT(ModelConfig(**{**dict(vocab_size=97, block_size=32, n_layer=3, n_embd=32, n_head=4, n_kv_head=2), **kw}))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2) if p.ndim == 2 else p.uniform_(0.5, 1.5)
    return model.eval()


def flags_of(config) -> list[str]:
    """The command line that makes this Config."""
    return [f"--{name}={value}" for name, value in vars(config).items()
            if value != train_module.FLAGS[name].default]


def run_python(*args, ranks=1, **kw):
    """Run a command of the project in a process of its own, under torchrun for several ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    env = {**os.environ, "OMP_NUM_THREADS": "1", **kw.pop("env", {})}
    return subprocess.run([sys.executable, *launcher, *map(str, args)], cwd=kw.pop("cwd", ROOT), env=env, text=True,
                          capture_output=True, timeout=300, **kw)
