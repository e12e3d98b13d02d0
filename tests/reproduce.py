"""tests/reproduce.py: one command for each claim of a paper: the runs, the seeds, the table.

    python tests/reproduce.py list                      # every claim, its verdict, its minutes
    python tests/reproduce.py let-own --jobs=2          # make what is missing, measure, write
    python tests/reproduce.py all --shard=1/2           # this machine makes every other run
    python tests/reproduce.py readme                    # write the table of claims into README.md

A claim is an entry of CLAIMS in claims.py: a question, the paper's figure, the runs as {name: flags
of train.py}, what is measured on each run (`columns`) and the rules that decide. The command writes
tests/results/CLAIM.md, CLAIM.json and sometimes CLAIM.png.

Runs. A run has a folder KEY-SEED in --out; KEY is a hash of its flags, so that claims share runs
and a changed flag makes a new one. In flags, {NAME} is what another run of the claim made: its
checkpoint, or the folder of a command. done.json marks a finished run. A run that was killed
continues from its checkpoint. A lock on the folder keeps a run from being made twice at once, also
by processes of several machines that share --out.

Statistics. A rule compares numbers with a bound: `COLUMN: A - B < 0` takes the differences of the
runs A and B of the same seed, `COLUMN: A / B < 1` their ratios, `COLUMN: A < 0.01` the numbers of
A. It holds if the 95 % t-interval of their mean lies wholly on that side of the bound, does not
hold if it lies wholly on the other side, and cannot be told otherwise. Fewer than 3 seeds give no
verdict. The claim's verdict is that of its first rule.
"""
import argparse
import fcntl
import functools
import hashlib
import itertools
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from claims import CLAIMS, GPU_TEACHER, HEADINGS, NOTES, Claim  # noqa: E402
from tqdm import tqdm  # noqa: E402

import lr_law  # noqa: E402
import probes  # noqa: E402
import train  # noqa: E402
from model import GPT, BadInput, Failed, command, written_whole  # noqa: E402

RESULTS = ROOT / "tests" / "results"
README = ROOT / "README.md"
HOLDS, FAILS, OPEN = "holds here", "does not hold here", "cannot be told at this size"

# --------------------------------------------------------------------------------------------------
# Statistics


def interval(values, level: float = 0.95) -> tuple[float, float]:
    """The t-interval of the mean of independent values; infinite if they are not finite."""
    n = len(values)
    if n < 2 or not all(map(math.isfinite, values)):
        return -math.inf, math.inf
    half = lr_law.student_t(level, n - 1) * statistics.stdev(values) / math.sqrt(n)
    return statistics.mean(values) - half, statistics.mean(values) + half


def paired(a: dict, b: dict, operation: str) -> list[float]:
    """a - b or a / b at the seeds that both have. a, b: {seed: value}."""
    seeds = [seed for seed in a if seed in b]
    return [a[s] - b[s] if operation == "-" else a[s] / b[s] for s in seeds]


def decide(values, side: str, bound: float) -> str | None:
    """The verdict on `mean < bound` or `mean > bound`; None with fewer than 3 values."""
    if len(values) < 3:
        return None
    low, high = interval(values)
    if side == ">":
        low, high, bound = -high, -low, -bound
    if high < bound:
        return HOLDS
    return FAILS if low > bound else OPEN


def apply_rule(rule: str, results: dict) -> dict:
    """A rule's numbers and verdict. results: {run: {column: {seed: value}}}."""
    parts = re.fullmatch(r"(\S+): (\S+)(?: ([-/]) (\S+))? ([<>]) (\S+)", rule)
    column, a, operation, b, side, bound = parts.groups()
    values = [*results[a][column].values()]
    if b:
        values = paired(results[a][column], results[b][column], operation)
    low, high = interval(values)
    mean = statistics.mean(values) if values else math.nan
    return {"rule": rule, "mean": mean, "low": low, "high": high, "n": len(values),
            "verdict": decide(values, side, float(bound))}


def best_of(results: dict, pattern: str) -> dict:
    """The columns of the best run that matches `pattern`. For each seed it is the one with the
    lowest mean loss over the other seeds, so that the choice does not flatter the number."""
    group = [name for name in results if fnmatch(name, pattern)]
    seeds = [s for s in results[group[0]]["loss"] if all(s in results[g]["loss"] for g in group)]
    best = {column: {} for column in results[group[0]]}
    for seed in seeds:
        others = [s for s in seeds if s != seed] or seeds
        chosen = min(group, key=lambda g: sum(results[g]["loss"][s] for s in others))
        for column, values in best.items():
            if seed in results[chosen][column]:
                values[seed] = results[chosen][column][seed]
    return best


# --------------------------------------------------------------------------------------------------
# Runs


@dataclass(frozen=True)
class Run:
    """words: train.py's flags, or a command of one of the files and its arguments, with {out} for
    the folder to write. seed: None for a run that all seeds share."""

    name: str
    words: tuple
    seed: int | None
    needs: tuple
    key: str
    root: Path

    @property
    def folder(self) -> Path:
        return self.root / (self.key if self.seed is None else f"{self.key}-{self.seed}")

    @property
    def trains(self) -> bool:
        return self.words[0].startswith("--")

    @property
    def pretrained(self) -> bool:
        return self.words[0] == "pretrained"

    @property
    def made(self) -> str:
        """What other runs see of it: the name of a model, or a folder."""
        if self.pretrained:
            return self.words[1]
        return str(self.folder / ("ckpt.pt" if self.trains else "out"))

    def finished(self) -> bool:
        return self.pretrained or (self.folder / "done.json").exists()

    def done(self) -> dict:
        return {"seconds": 0, "diverged": False} if self.pretrained else json.loads(
            (self.folder / "done.json").read_text())


def last_flags(text: str, more: str = "") -> str:
    """The words of a run, with the flags of `more`. Of two flags with one name the last counts;
    --steps=x3 means 3 times the steps before it."""
    words = {}
    for word in f"{text} {more}".split():
        name, _, value = word.partition("=")
        if name == "--steps" and value.startswith("x"):
            before = int(words[name].partition("=")[2])
            word = f"--steps={round(float(value[1:]) * before)}"
        words[name] = word
    return " ".join(words.values())


def resolve(runs: dict, name: str, seed: int, root: Path) -> Run:
    """The run `name` of a claim at a seed, with the runs that it needs."""
    text = runs[name]
    trains = text.startswith("--")
    others = {o for o in re.findall(r"{([\w-]+)}", text) if o not in ("seed", "out")}
    needs = {other: resolve(runs, other, seed, root) for other in sorted(others)}
    seeded = "{seed}" in text or trains and "--seed=" not in text
    if trains:
        text = " ".join(sorted(last_flags(text).split()))  # their order makes no other run
    hashed = functools.reduce(lambda t, o: t.replace(f"{{{o}}}", needs[o].key), needs, text)
    key = hashlib.sha256(hashed.encode()).hexdigest()[:12]
    text = functools.reduce(lambda t, o: t.replace(f"{{{o}}}", needs[o].made), needs, text)
    words = text.replace("{seed}", str(seed)).split()
    if seeded and trains:
        words.append(f"--seed={seed}")
    return Run(name, tuple(words), seed if seeded else None, tuple(needs.values()), key, root)


def closure(runs) -> list[Run]:
    """The runs and all that they need, each once, needed ones first."""
    found = {}
    for run in runs:
        for one in (*closure(run.needs), run):
            found.setdefault(one.folder, one)
    return [*found.values()]


def minutes(run: Run) -> float:
    """A run's minutes: measured, or estimated for one thread from its FLOPs and steps."""
    if run.finished():
        return run.done()["seconds"] / 60
    apart = "--init_from", "--module_decay", "--seed"
    return estimate(tuple(w for w in run.words if not w.startswith(apart))) if run.trains else 1.0


@functools.cache
def estimate(words: tuple) -> float:
    c = train.parse_flags(words)
    vocabulary = 49_152 if c.teacher == "smollm2" else c.vocab_size
    with torch.device("meta"):
        model = GPT(train.model_config(c, vocabulary))
    per_token = model.flops_per_token()
    if c.teacher == "smollm2":
        taught = {"let": c.let_stop * (c.let_weight > 0), "salt": 0.17}.get(c.distill, 1)
        per_token += 2.7e8 * taught
    slow = 2.5 if {*train.ModelConfig.kinds(c)} & {*"MH"} else 1
    step = 0.03 + 0.006 * c.n_layer + c.batch_tokens * per_token / 1.3e11
    evaluations = 1 + c.steps // c.eval_every
    evaluation = evaluations * c.eval_tokens * per_token / 4e11
    return (15 + slow * (c.steps * step + evaluation)) / 60


def start(run: Run, threads: int):
    """(process, lock, time) of a run that begins; None if another process is making it. The lock
    is inherited by the process and ends with it, even if this one is killed."""
    run.folder.mkdir(parents=True, exist_ok=True)
    lock = open(run.folder / "lock", "w")  # noqa: SIM115
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        return None
    if run.finished():
        lock.close()
        return None
    script = [str(ROOT / "train.py")]
    if any(word.startswith("--module_decay=") for word in run.words):
        script = [__file__, "train"]
    words = [*script, *run.words, f"--out_dir={run.folder}", "--resume=auto"]
    if not run.trains:
        out = run.folder / "out"
        words = [str(ROOT / run.words[0]), *(w.replace("{out}", str(out)) for w in run.words[1:])]
    with open(run.folder / "log.txt", "a") as log:
        process = subprocess.Popen(
            [sys.executable, *words], stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            pass_fds=[lock.fileno()], env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    return process, lock, time.time()


def finish(run: Run, process, lock, began: float):
    """Marks a run as finished. A diverged run is finished too. Raises Failed for any other end."""
    log = (run.folder / "log.txt").read_text()[-2000:]
    diverged = "this step has not changed the weights" in log
    if process.returncode and not diverged:
        raise Failed(f"{run.name}, {run.folder}: exit code {process.returncode}\n{log}")
    with written_whole(run.folder / "done.json") as tmp:
        tmp.write_text(json.dumps({"seconds": round(time.time() - began, 1), "diverged": diverged}))
    for path in run.folder.glob("*.pt"):  # nobody goes on from here: only the weights are kept
        checkpoint = torch.load(path, weights_only=True)
        with written_whole(path) as tmp:
            torch.save(checkpoint | {"optimizers": {}, "terms": {}}, tmp)
    lock.close()


def make(runs, jobs: int):
    """Makes the runs that are not finished, `jobs` at a time; those that other processes are making
    are waited for."""
    waiting, working = [run for run in closure(runs) if not run.finished()], {}
    threads = os.cpu_count() or 1 if jobs == 1 else 1
    cost, n = {run: max(0.01, minutes(run)) for run in waiting}, len(waiting)
    bar = tqdm(total=sum(cost.values()), disable=None, dynamic_ncols=True,
               bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left")
    try:
        while waiting or working:
            for run, job in [*working.items()]:
                if job[0].poll() is not None:
                    finish(run, *working.pop(run))
                    waiting.append(run)
            for run in [*waiting]:
                if run.finished():
                    waiting.remove(run)
                    bar.update(cost[run])
                elif len(working) < jobs and all(need.finished() for need in run.needs):
                    if job := start(run, threads):
                        working[run] = job
                        waiting.remove(run)
            bar.set_description_str(f"{n - len(waiting) - len(working)} of {n} runs", refresh=False)
            time.sleep(0.2)
    finally:
        for process, _, _ in working.values():  # they save and stop
            process.terminate()
        for process, _, _ in working.values():
            process.wait()
        bar.close()


def train_with_module_decay(argv):
    """train.py with a factor on the weight decay by module, for which it has no flag."""
    factors = [word for word in argv if word.startswith("--module_decay=")]
    decay = train.module_factors(factors[0].split("=", 1)[1])
    train.Optimizers = functools.partial(train.Optimizers, module_decay=decay)
    train.main([word for word in argv if word not in factors])


def write_sums(folder):
    """Records for --distill=step_by_step: sums of four numbers modulo 100, the rationale the
    partial sums. Ours; the paper's data sets are not here."""
    rng, folder = random.Random(0), Path(folder)
    with written_whole(folder) as tmp:
        tmp.mkdir()
        with open(tmp / "sums.jsonl", "w") as file:
            for _ in range(20_000):
                numbers = [rng.randrange(100) for _ in range(4)]
                sums = [sum(numbers[:i]) % 100 for i in (2, 3, 4)]
                file.write(json.dumps({"input": " + ".join(map(str, numbers)),
                                       "rationale": ", ".join(map(str, sums)),
                                       "label": str(sums[-1])}) + "\n")


def write_real_text(folder, seed: int, n: int = 400, size: int = 475):
    """n pieces of `size` characters of the training part, as a control for a teacher's text."""
    rng, folder = random.Random(seed), Path(folder)
    documents, _ = train.split_documents(train.read_documents(*train.find_files("stdlib"),
                                                              "stdlib"))
    pieces = [text[i:i + size] for _, text in rng.choices(documents, k=n)
              for i in [rng.randrange(max(1, len(text) - size))]]
    with written_whole(folder) as tmp:
        tmp.mkdir()
        (tmp / "text.txt").write_text(train.END_OF_TEXT.join(pieces), encoding="utf-8")


# --------------------------------------------------------------------------------------------------
# A claim's results


def of_size(claim: Claim, size: str) -> Claim:
    """The claim with the runs that it has at --scale, and the rules and best rows of these."""
    if size == "cpu":
        return claim
    runs = {name: last_flags(flags, GPU_TEACHER if name == "teacher" else claim.gpu)
            for name, flags in claim.runs.items()
            if any(fnmatch(name, pattern) for pattern in claim.gpu_runs.split())}
    best = {row: pattern for row, pattern in claim.best.items()
            if any(fnmatch(name, pattern) for name in runs)}
    gone = (claim.runs.keys() | claim.best) - (runs.keys() | best)
    rules = {sentence: rule for sentence, rule in claim.rules.items() if not gone & {*rule.split()}}
    return replace(claim, runs=runs, best=best, rules=rules)


def runs_of(claim: Claim, seeds, root: Path) -> dict:
    """{name: {seed: Run}}; a run that all seeds share stands under the first seed alone."""
    found = {name: {seed: resolve(claim.runs, name, seed, root) for seed in seeds}
             for name in claim.runs}
    return {name: {s: r for i, (s, r) in enumerate(by_seed.items()) if i == 0 or r.seed is not None}
            for name, by_seed in found.items()}


def measure(claim: Claim, runs: dict) -> dict:
    """{name: {column: {seed: value}}} of all runs that train, and the rows made from them."""
    results, reference = {}, claim.reference or next(iter(runs))
    rows = {name: by_seed for name, by_seed in runs.items()
            if all(run.trains or run.pretrained for run in by_seed.values())}
    for name, by_seed in tqdm(rows.items(), "measuring", unit="run", leave=False, disable=None):
        results[name] = {column: {} for column in claim.columns}
        for (column, function), (seed, run) in itertools.product(claim.columns.items(),
                                                                 by_seed.items()):
            value = function(run, runs[reference].get(seed))
            if value is not None:
                results[name][column][seed] = value
    results |= {row: best_of(results, pattern) for row, pattern in claim.best.items()}
    if claim.derive:
        claim.derive(results)
    return results


def conclude(name: str, claim: Claim, results: dict, spent: float, size: str, seeds) -> dict:
    """What goes into CLAIM.json."""
    tests = {sentence: apply_rule(rule, results) for sentence, rule in claim.rules.items()}
    return {"claim": name, "question": claim.question, "paper": claim.paper, "scale": size,
            "seeds": list(seeds), "minutes": round(spent, 1), "tests": tests,
            "verdict": next(iter(tests.values()))["verdict"], "results": results}


def number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.4g}"


def mean_sd(values) -> str:
    values = [*values]
    if unfinished := sum(not math.isfinite(v) for v in values):
        return f"{unfinished} of {len(values)} diverged"
    if not values:
        return ""
    equal = len({*values}) == 1  # one seed, or a number that no seed changes
    sd = "" if equal else f" ± {number(statistics.stdev(values))}"
    return number(statistics.mean(values)) + sd


def describe(test: dict) -> str:
    """A rule's number with its interval."""
    if test["n"] < 2 or not math.isfinite(test["low"]):
        return f"{number(test['mean'])} (n = {test['n']})"
    return (f"{number(test['mean'])} [{number(test['low'])}, {number(test['high'])}] "
            f"(n = {test['n']})")


def table_of_results(claim: Claim, results: dict) -> str:
    """A row for each run: n, mean and standard deviation of each column, and the paired difference
    of the first column from the reference, with its 95 % t-interval."""
    reference = claim.reference or next(iter(claim.runs))
    columns = [*dict.fromkeys(c for row in results.values() for c in row if any(row.values()))]
    first = columns[0]
    heading = ["run", "n", *(HEADINGS.get(c, c) for c in columns), f"{first} minus {reference}"]
    rows = []
    for name, row in results.items():
        difference = ""
        if name != reference and first in row:
            values = paired(row[first], results[reference][first], "-")
            if len(values) > 1:
                low, high = interval(values)
                difference = describe({"mean": statistics.mean(values), "low": low, "high": high,
                                       "n": len(values)})
        n = max((len(values) for values in row.values()), default=0)
        rows.append([name, n, *(mean_sd(row.get(c, {}).values()) for c in columns), difference])
    return probes.table(heading, *rows)


MODULE_DECAY = """
`--module_decay`, a factor on a module's weight decay, is known to reproduce.py alone.
"""


def notes(claim: Claim, results: dict) -> str:
    """A line for each kind of column and row that its name does not explain."""
    columns = dict.fromkeys(column for row in results.values() for column in row)
    lines = []
    for patterns, text in NOTES.items():
        shown = [HEADINGS.get(c, c) for c in columns
                 if any(fnmatch(c, pattern) for pattern in patterns.split())]
        if shown:
            lines.append(f"- {', '.join(f'`{heading}`' for heading in shown)}: {text}.")
    if claim.best:
        lines.append(f"- {', '.join(claim.best)}: for each seed the run that the other seeds "
                     "choose, so that no seed is reported on a choice of its own.")
    if claim.note:
        lines.append(f"- {claim.note}")
    return "\n".join(lines)


def write(name: str, claim: Claim, found: dict, stem: Path, picture: str):
    """stem.md and stem.json."""
    tests = [f"- {sentence}: {describe(t)}; `{t['rule']}`: "
             f"**{t['verdict'] or 'no verdict: fewer than 3 seeds'}**"
             for sentence, t in found["tests"].items()]
    scale = " --scale=gpu" if found["scale"] == "gpu" else ""
    seeds = ",".join(map(str, found["seeds"]))
    text = f"""# {name}

{claim.question}

The paper: {claim.paper}.

**Verdict: {found['verdict'] or 'none, fewer than 3 seeds'}.**

{chr(10).join(tests)}

A rule holds if the 95 % t-interval over seeds, in brackets, lies on its side of the bound; it does
not hold if the interval lies on the other side. Differences and ratios are paired by seed.

    python tests/reproduce.py {name} --seeds={seeds}{scale}

{table_of_results(claim, found['results'])}

Mean ± standard deviation over n seeds. {found['minutes']:.0f} minutes of runs, {found['device']}.
The runs shared the machine with other work: their seconds are a rough guide.

{notes(claim, found['results'])}
{picture}
Flags of the runs:

{chr(10).join(f'    {run}: {last_flags(flags)}' for run, flags in claim.runs.items())}
{MODULE_DECAY if any("--module_decay" in flags for flags in claim.runs.values()) else ""}"""
    for ending, content in ((".md", text), (".json", json.dumps(found, indent=1))):
        with written_whole(Path(f"{stem}{ending}")) as tmp:
            tmp.write_text(content)


def reproduce(name: str, a) -> str:
    """Makes, measures and writes a claim; returns a line that says what came out."""
    claim = of_size(CLAIMS[name], a.scale)
    if a.scale == "gpu" and not claim.gpu:
        return f"{name}: has no size for --scale=gpu"
    seeds = a.seeds or list(range(claim.seeds))
    runs = runs_of(claim, seeds, a.out)
    every = closure(run for by_seed in runs.values() for run in by_seed.values())
    i, n = a.shard
    last_ones = [run for run in every if not any(run in other.needs for other in every)]
    make(last_ones[i - 1::n], a.jobs)
    if missing := [run for run in every if not run.finished()]:
        return f"{name}: {len(missing)} of {len(every)} runs are missing, of other shards"
    results = measure(claim, runs)
    spent = sum(minutes(run) for run in every)
    found = conclude(name, claim, results, spent, a.scale, seeds)
    found["device"] = f"torch {torch.__version__} on {devices_of(every)}"
    RESULTS.mkdir(exist_ok=True)
    stem = name + ("-gpu" if a.scale == "gpu" else "")
    picture = ""
    if claim.picture:
        try:
            claim.picture(runs, results, str(RESULTS / f"{stem}.png"))
            picture = f"\n![{claim.question}]({stem}.png)\n"
        except BadInput as e:
            print(e, file=sys.stderr)
    write(name, claim, found, RESULTS / stem, picture)
    return f"{name}: {found['verdict'] or 'no verdict: fewer than 3 seeds'}"


def devices_of(runs) -> str:
    found = set()
    for run in runs:
        config = run.folder / "config.json"
        if run.trains and config.exists():
            found.add(json.loads(config.read_text())["provenance"]["device"])
    return ", ".join(sorted(found))


# --------------------------------------------------------------------------------------------------
# The list, the README and the command line


def known_result(name: str) -> dict | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def list_claims(root: Path) -> str:
    """Every claim, its verdict and its cost in minutes of one thread: measured where it has been
    run. Claims share runs: the total counts each once."""
    rows, every = [], []
    for name, claim in CLAIMS.items():
        runs = runs_of(claim, range(claim.seeds), root)
        runs = closure(run for by_seed in runs.values() for run in by_seed.values())
        every += runs
        found = known_result(name)
        cost = found["minutes"] if found else sum(map(minutes, runs))
        verdict = (found["verdict"] or "no verdict: fewer than 3 seeds") if found else "not run"
        rows.append((name, verdict, f"{cost:.0f}" if found else f"about {cost:.0f}", len(runs)))
    every = closure(every)
    rows.append(("all", "", f"about {sum(map(minutes, every)):.0f}", len(every)))
    return probes.table(("claim", "verdict", "minutes", "runs"), *rows)


def brief(test: dict) -> str:
    """A rule's number with its interval, to two digits, and the number of seeds."""
    return f"{test['mean']:.2g} [{test['low']:.2g}, {test['high']:.2g}], n = {test['n']}"


def claims_table() -> str:
    """The README's table of the claims that have been run. All numbers come from CLAIM.json."""
    rows = []
    for name in CLAIMS:
        found = known_result(name)
        if not found:
            continue
        tests = [*found["tests"].values()]
        held = [test["verdict"] for test in tests].count(HOLDS)
        verdict = (found["verdict"] or "no verdict").removesuffix(" at this size")
        rows.append((f"[{name}](tests/results/{name}.md)", next(iter(found["tests"])),
                     brief(tests[0]), f"{verdict.removesuffix(' here')}, {held}/{len(tests)}"))
    table = probes.table(("claim", "first rule", "measured", "verdict"), *rows)
    left = [name for name in CLAIMS if not known_result(name)]
    return table + (f"\n\nNot run yet: {', '.join(left)}." if left else "")


MARKERS = "<!-- claims: written by tests/reproduce.py readme -->", "<!-- end of claims -->"


def write_readme(path: Path) -> str:
    text = path.read_text()
    if not all(text.count(marker) == 1 for marker in MARKERS):
        raise BadInput(f"{path}: the lines {' and '.join(MARKERS)} are needed, once each")
    before, rest = text.split(MARKERS[0])
    after = rest.split(MARKERS[1])[1]
    with written_whole(path) as tmp:
        tmp.write_text(f"{before}{MARKERS[0]}\n{claims_table()}\n{MARKERS[1]}{after}")
    return f"{path}: {len(CLAIMS)} claims"


def shard(text: str) -> tuple[int, int]:
    i, n = map(int, text.split("/"))
    if not 1 <= i <= n:
        raise ValueError(text)
    return i, n


def main(argv):
    if argv[:1] == ["train"]:
        return train_with_module_decay(argv[1:])
    if argv[:1] == ["sums"]:
        return write_sums(argv[1])
    if argv[:1] == ["real_text"]:
        return write_real_text(argv[1], int(argv[2]))
    parser = argparse.ArgumentParser(prog="reproduce.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("claims", nargs="+", help="names of claims, or all, list, readme",
                        choices=[*CLAIMS, "all", "list", "readme"], metavar="CLAIM")
    parser.add_argument("--seeds", type=lambda text: [int(s) for s in text.split(",")],
                        help="such as 0,1,2; default: as many as the claim needs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--scale", choices=("cpu", "gpu"), default="cpu", help="size of the runs")
    parser.add_argument("--shard", type=shard, default=(1, 1),
                        help="I/N: every N-th run from the I-th, for machines that share no disk")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "reproduce",
                        help="folder of the runs; machines may share it")
    a = parser.parse_args(argv)
    if a.claims == ["list"]:
        print(list_claims(a.out))
    elif a.claims == ["readme"]:
        print(write_readme(README))
    else:
        failed = 0
        for name in CLAIMS if a.claims == ["all"] else a.claims:
            try:
                print(reproduce(name, a), flush=True)
            except (Failed, BadInput) as e:
                failed = 1
                print(f"error: {name}: {e}", file=sys.stderr)
        return failed


if __name__ == "__main__":
    command(main)
