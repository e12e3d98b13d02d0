"""tests/reproduce.py: its statistics, its verdicts, and runs that are made once."""
import json
import math
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import claims
import pytest
import reproduce as r
from conftest import lines

TINY = ("--data={data} --tokenizer=bytes --block_size=32 --batch_tokens=64 --micro_batch=2 "
        "--eval_tokens=64 --n_layer=1 --n_embd=16 --n_head=1 --warmup_steps=1 --sample_tokens=0 "
        "--steps=3 --eval_every=1 --save_every=1 --device=cpu --dtype=fp32 ")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The data and the runs of toy, which tests share."""
    folder = tmp_path_factory.mktemp("reproduce")
    (folder / "data.txt").write_text("\n".join(f"x = {i % 7} + {i % 5}" for i in range(400)))
    return folder


@pytest.fixture
def toy(folder, tmp_path, monkeypatch):
    """A claim of two runs of 3 steps: plain, and a faster one that learns from plain's model."""
    tiny = TINY.replace("{data}", f"{folder}/data.txt")
    fast = tiny + "--teacher={plain} --let_student_layer=1 --lr=0.03"
    claim = r.Claim("Does it?", "yes", {"plain": tiny, "fast": fast},
                    {"fast is lower": "loss: fast - plain < 0"}, claims.LOSS)
    monkeypatch.setattr(r, "CLAIMS", {"toy": claim})
    monkeypatch.setattr(r, "RESULTS", tmp_path / "results")
    return claim


@pytest.mark.parametrize("n", [2, 3, 5, 20])
def test_the_interval_of_paired_differences_is_scipys_over_the_common_seeds(n):
    stats, rng = pytest.importorskip("scipy.stats"), random.Random(0)
    a, b = ({seed: rng.gauss(1, 2) for seed in range(n + extra)} for extra in (1, 0))
    pairs = [(a[seed], b[seed]) for seed in b]
    expected = stats.ttest_rel(*zip(*pairs)).confidence_interval(0.95)
    assert r.interval(r.paired(a, b, "-")) == pytest.approx(tuple(expected), rel=1e-6)
    assert r.paired(a, b, "/") == pytest.approx([x / y for x, y in pairs])


@pytest.mark.parametrize("values, side, bound, verdict", [
    ((1.0, 1.1, 0.9), "<", 0, r.FAILS), ((1.0, 1.1, 0.9), "<", 2, r.HOLDS),
    ((1.0, 1.1, 0.9), ">", 0, r.HOLDS), ((1.0, 1.1, 0.9), ">", 2, r.FAILS),
    ((-1.0, 1.0, 0.1), "<", 0, r.OPEN), ((-1.0, -1.1, math.inf), "<", 0, r.OPEN),
    ((-1.0, -1.1), "<", 0, None), ((), "<", 0, None)])
def test_a_verdict_needs_three_seeds_and_an_interval_on_one_side(values, side, bound, verdict):
    assert r.decide(values, side, bound) == verdict


def test_the_best_run_is_chosen_without_the_seed_that_it_is_reported_on():
    results = {"a@1": {"loss": {0: 1.0, 1: 5.0, 2: 5.0}}, "a@2": {"loss": {0: 4.0, 1: 2.0, 2: 4.0}}}
    assert r.best_of(results, "a@*")["loss"] == {0: 4.0, 1: 5.0, 2: 5.0}


def test_the_law_of_a_planted_sweep_is_found_with_its_extrapolation():
    def loss(N, D, lr):
        best = 100 * N**-0.45 * D**-0.3
        return 3 + 20 * N**-0.3 + 200 * D**-0.4 + 0.15 * math.log(lr / best) ** 2

    results = {f"{size}@{lr}": {"loss": {0: 1.0}, "N": {0: N},
                                **{f"D{D}": {0: loss(N, D, lr)} for D in claims.HORIZONS}}
               for size, N in (("2x48", 1e5), ("2x64", 1.6e5), ("3x96", 4.3e5), ("4x128", 9.2e5))
               for lr in claims.RATES}
    for held_out in ("4x128", claims.HORIZONS[-1]):
        claims.fit_laws(claims.SMALL, held_out)(results)
        law = results["law"]
        assert (law["b"][0], law["c"][0]) == pytest.approx((-0.45, -0.3), abs=0.01)
        assert law["cost"][0] < 1e-3 and law["parabola_r2"][0] > 0.999
    assert law["extrapolation"][0] < 0.01


def test_a_changed_flag_makes_another_run_and_order_or_claim_do_not(tmp_path):
    def key(**runs):
        return r.resolve(runs, "x", 0, tmp_path).key

    assert key(x="--lr=1 --steps=2") == key(x="--steps=2 --lr=1")
    assert key(x="--lr=3 --lr=1") == key(x="--lr=1")
    assert key(x="--lr=1") != key(x="--lr=2")
    student = "--teacher={t} --lr=1"  # a teacher with other flags is another teacher
    assert key(x=student, t="--n_layer=1") != key(x=student, t="--n_layer=2")
    assert key(x=student, t="--n_layer=1") == key(x="--teacher={u} --lr=1", u="--n_layer=1")
    assert r.resolve({"x": "--lr=1"}, "x", 3, tmp_path).folder.name.endswith("-3")
    assert r.resolve({"x": "--seed=9"}, "x", 3, tmp_path).seed is None


def test_every_claim_has_sound_flags_and_rules(tmp_path):
    for size, name in r.itertools.product(("cpu", "gpu"), r.CLAIMS):
        claim = r.of_size(r.CLAIMS[name], size)
        assert claim.rules and claim.reference in {"", *claim.runs}, name
        made_later = {*claim.best} | {"law", "let", "plain", "none", "scalar", "total", "active",
                                      "at_0.024", "at_0.006", "law_rate", "mup_rate",
                                      "unchanged_rate", "completep_rate"}
        for rule in claim.rules.values():
            a, b = r.re.fullmatch(r"\S+: (\S+)(?: [-/] (\S+))? [<>] \S+", rule).groups()
            assert {a, b or a} <= {*claim.runs} | made_later, (name, rule)
        for run in claim.runs:
            for word in r.resolve(claim.runs, run, 0, tmp_path).words:
                flag = word.partition("=")[0].lstrip("-")
                known = flag in r.train.FLAGS or flag == "module_decay"
                assert known or not claim.runs[run].startswith("--"), (name, run, word)


def test_killed_and_restarted_every_run_is_made_once(toy, folder):
    script = f"""import sys; sys.path.insert(0, {str(Path(r.__file__).parent)!r})
import reproduce as r
claim = r.Claim("", "", {toy.runs!r}, {{}}, {{}})
runs = r.runs_of(claim, [0], r.Path({str(folder)!r}))
r.make([by_seed[0] for by_seed in runs.values()], 1)"""
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    while not list(folder.glob("*/log.txt")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)  # its run goes on, and keeps its lock
    process.wait()
    runs = [by_seed[0] for by_seed in r.runs_of(toy, [0], folder).values()]
    r.make(runs, 2)
    logs = [run.folder / "log.txt" for run in runs]
    before = [log.stat().st_mtime_ns for log in logs]
    r.make(runs, 2)
    assert [log.stat().st_mtime_ns for log in logs] == before
    for run in runs:
        assert [line["step"] for line in lines(run.folder) if "val_loss" in line] == [0, 1, 2, 3]


def test_a_diverged_run_is_finished_and_has_an_infinite_loss(toy, folder):
    flags = toy.runs["plain"] + "--lr=1e6 --weight_decay=1e38"
    claim = r.Claim("", "", {"diverges": flags}, {}, claims.ONE)
    runs = r.runs_of(claim, [0], folder)
    r.make([runs["diverges"][0]], 1)
    assert r.measure(claim, runs)["diverges"]["loss"] == {0: math.inf}


def test_one_seed_gives_a_table_and_no_verdict(toy, folder, tmp_path, capsys):
    r.main(["toy", "--seeds=0", f"--out={folder}", "--jobs=2"])
    assert "no verdict" in capsys.readouterr().out
    found = json.loads((tmp_path / "results" / "toy.json").read_text())
    text = (tmp_path / "results" / "toy.md").read_text()
    assert found["verdict"] is None and "fast is lower" in text and "| plain |" in text
    assert found["results"]["fast"]["loss"].keys() == {"0"}


def test_the_readme_has_the_table_that_the_results_give(tmp_path):
    readme, text = tmp_path / "README.md", r.README.read_text()
    begin, end = (text.index(marker) for marker in r.MARKERS)
    readme.write_text(text[:begin] + r.MARKERS[0] + "\nold\n" + text[end:])
    r.write_readme(readme)
    assert readme.read_text() == text
