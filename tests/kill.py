"""Kills runs at bad moments, and compares what they come to with runs that nobody disturbed.

    python tests/kill.py --kills=1000

Each process is forked from this one, which has imported everything; a kill costs a fraction of a
second. `pytest -m slow` does a few kills of each kind."""
import argparse
import csv
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
from conftest import figures, lines, same, state

import lr_law
import train

BASE = ("--tokenizer=bpe --vocab_size=300 --block_size=32 --batch_tokens=256 --micro_batch=4 "
        "--eval_tokens=512 --n_layer=2 --n_embd=32 --n_head=2 --warmup_steps=2 --dtype=fp32 "
        "--device=cpu").split()
RUN = "--steps=12 --eval_every=5 --log_every=1 --save_every=3 --sample_tokens=0".split()
KINDS = {
    "plain": [], "multipliers": ["--multipliers=vector", "--optimizer=adamw"],
    "mamba2": ["--mixer=mamba2", "--d_state=8", "--ssm_head_dim=16"],
    "experts": ["--n_experts=4"], "sweep": None,
    "let": ["--teacher=auto", "--let_student_layer=1", "--let_resize=project", "--let_stop=20"]}


def command(kind: str, folder: Path):
    """The function and the flags of a run of this kind, whose files are all below `folder`."""
    data = f"--data={folder.parent / 'corpus'}"
    if kind == "sweep":
        return lr_law.main, ["sweep", str(folder / "t.csv"), "--sizes=1x16,2x32", "--lrs=0.01",
                             "--tokens=512,1536", "--", data, *BASE]
    out = f"--out_dir={folder / 'run'}"
    return train.main, [data, *BASE, *RUN, *KINDS[kind], out, "--resume=auto"]


def die_in_a_save(rng):
    """Lets this process kill itself at a random moment of a random save or other whole write: with
    half of a checkpoint written, before and after its bytes are on the disk, before and after it
    gets its name."""
    left = [rng.randrange(30)]

    def dying(function):
        def call(*args, **kw):
            left[0] -= 1
            if left[0] == 0 and rng.random() < 0.5:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kw)
            if left[0] == 0:
                if function is save:
                    args[1].truncate(rng.randrange(args[1].tell()))
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        return call

    save = torch.save
    torch.save, os.fsync, os.replace = dying(torch.save), dying(os.fsync), dying(os.replace)


def start(kind: str, folder: Path, rng=None) -> int:
    """Forks a process that runs the command; its output goes to folder.log. rng: that of a process
    that dies in a save. Returns the process' id."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ["NANOLET_CACHE"] = str(folder / "cache")
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
        if rng:
            die_in_a_save(rng)
        main, flags = command(kind, folder)
        main(flags)
        code = 0
    except SystemExit as e:
        code = e.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def run_through(kind: str, folder: Path) -> float:
    """Runs the command to its end. Returns the seconds that it took."""
    begin = time.monotonic()
    status = os.waitstatus_to_exitcode(os.waitpid(start(kind, folder), 0)[1])
    assert status == 0, folder.with_suffix(".log").read_text()
    return time.monotonic() - begin


def wait_and_kill(pid: int, seconds: float, number) -> int:
    """The exit code of a process that gets this signal after so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(pid, number)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def results(kind: str, folder: Path):
    """What must not depend on kills: checkpoints with parameters, optimizer states and position in
    the data, metrics, and the rows of a sweep's table."""
    runs = sorted(path.parent for path in folder.rglob("ckpt.pt"))
    found = {str(run.relative_to(folder)): (state(run / "ckpt.pt"), figures(lines(run)))
             for run in runs}
    if kind == "sweep":
        with open(folder / "t.csv", newline="") as file:
            found["t.csv"] = [{**row, "seconds": ""} for row in csv.DictReader(file)]
    return found


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def attack(kind: str, kills: int, folder: Path, seed=0) -> dict:
    """Kills runs of this kind until there are so many kills. A run is killed up to 8 times and then
    left to its end. Returns the numbers of kills, of runs, of results that differ, and of files
    that an undisturbed run does not have."""
    rng, base = random.Random(f"{seed} {kind}"), Path(folder) / f"{kind}-base"
    base.mkdir()
    seconds = run_through(kind, base)
    expected, expected_files = results(kind, base), files(base)
    found = {"kills": 0, "runs": 0, "lost": 0, "files left": 0}
    while found["kills"] < kills:
        trial = Path(folder) / f"{kind}-{found['runs']}"
        trial.mkdir()
        for _ in range(min(8, kills - found["kills"])):
            moment = rng.choice(("random", "preparation", "save", "signal"))
            pid = start(kind, trial, random.Random(rng.random()) if moment == "save" else None)
            after = {"random": seconds, "preparation": seconds / 5, "signal": seconds}.get(moment)
            number = signal.SIGKILL
            if moment == "signal":
                number = rng.choice((signal.SIGINT, signal.SIGTERM))
            code = wait_and_kill(pid, rng.uniform(0, after) if after else 600, number)
            if code == 0:
                break
            assert code in (-signal.SIGKILL, 1, 130, 143), (code, trial)
            found["kills"] += 1
        run_through(kind, trial)
        found["runs"] += 1
        found["lost"] += not same(results(kind, trial), expected)
        found["files left"] += len({*files(trial)} - {*expected_files})
        shutil.rmtree(trial)
    return found


def write_corpus(folder: Path):
    folder.mkdir()
    rng = random.Random(0)
    for i in range(6):
        words = [f"{rng.choice('abcdefg')}x{rng.randrange(90)}" for _ in range(400)]
        (folder / f"{i}.txt").write_text("\n".join(map(" ".join, zip(*[iter(words)] * 5))))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[*KINDS])
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder) / "corpus")
        for kind in a.kinds:
            begin, kills = time.monotonic(), -(-a.kills // len(a.kinds))
            print(kind, attack(kind, kills, Path(folder), a.seed),
                  f"{time.monotonic() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
