"""exercises.py: makes, grades and checks course assignments.

    python tests/exercises.py list
    python tests/exercises.py make newton_schulz let_weight -o FOLDER
    python tests/exercises.py grade FOLDER
    python tests/exercises.py check

An exercise is a function of a source file whose body is to be written. The marker on its tests,
`@pytest.mark.exercise("newton_schulz")` or `("Muon.move")`, is all that declares it: the tests of
optim.py are in tests/test_optim.py, and the task is the function's docstring.

The tests of an exercise need no other exercise, so that a course can set them in any order. Where a
function calls another exercise, its tests put a stand-in into that one's place.
"""
import argparse
import ast
import concurrent.futures
import copy
import difflib
import gc
import importlib.util
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("model.py", "optim.py", "teacher.py", "probes.py", "lr_law.py", "train.py")
OTHER_FILES = ("pyproject.toml", "README.md", "LICENSE")
LIMIT = 120  # seconds for the tests of one exercise


class BadInput(ValueError):
    """A wrong value on the command line: one line, exit code 2."""


@dataclass
class Exercise:
    """name: of the function, or Class.method. file: its source file. tests: the names of its test
    functions, in tests/test_FILE. function: its syntax tree."""

    name: str
    file: str
    function: ast.FunctionDef
    tests: list[str] = field(default_factory=list)

    def docstring(self) -> str:
        return ast.get_docstring(self.function)

    def task(self) -> str:
        """The first sentence of the docstring."""
        paragraph = " ".join(self.docstring().split("\n\n")[0].split())
        return re.split(r"(?<!al)(?<!eq)(?<! \.)\. ", paragraph)[0].rstrip(":.")

    def lines(self) -> int:
        """Lines of the solution, which say how difficult the exercise is."""
        return self.function.end_lineno - self.function.body[0].end_lineno

    def node_ids(self) -> list[str]:
        return [f"tests/test_{self.file}::{test}" for test in self.tests]


def functions_of(text: str) -> dict[str, ast.FunctionDef]:
    """The functions and methods of a source text by name, or by Class.method."""
    found = {}
    for node in ast.parse(text).body:
        inside = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        found |= {prefix + f.name: f for f in inside if isinstance(f, ast.FunctionDef)}
    return found


def find_exercises() -> dict[str, Exercise]:
    """All exercises by name, in the order of the source files and of their functions."""
    found = {}
    for file in SOURCES:
        functions = functions_of((ROOT / file).read_text())
        marked = {}
        tests = functions_of((ROOT / "tests" / f"test_{file}").read_text())
        for test, node in tests.items():
            for mark in node.decorator_list:
                if getattr(getattr(mark, "func", None), "attr", "") == "exercise":
                    name = mark.args[0].value
                    marked.setdefault(name, Exercise(name, file, functions[name]))
                    marked[name].tests.append(test)
        found |= {name: marked[name] for name in functions if name in marked}
    return found


def chosen(names, exercises) -> list[Exercise]:
    """The exercises of these names, each once. Raises BadInput with the nearest name."""
    for name in names:
        if name not in exercises:
            near = difflib.get_close_matches(name, exercises, 1)
            hint = f"the nearest name is {near[0]}" if near else "`list` shows their names"
            raise BadInput(f"{name}: no such exercise; {hint}")
    return [exercises[name] for name in dict.fromkeys(names)]


def table(rows) -> str:
    """Rows of cells in columns; the first row is the heading."""
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]) - 1)]
    return "\n".join("  ".join([*(str(cell).ljust(width) for cell, width in zip(row, widths)),
                                str(row[-1])]) for row in rows)


# --------------------------------------------------------------------------------------------------
# list and make


def list_command(a):
    rows = [("exercise", "file", "tests", "lines", "task")]
    for e in find_exercises().values():
        rows.append((e.name, e.file, len(e.tests), e.lines(), e.task()))
    print(table(rows))


def blanked(text: str, functions) -> str:
    """A source text in which the bodies of these functions are their docstring and a raise."""
    lines = text.splitlines(keepends=True)
    for function in sorted(functions, key=lambda f: -f.lineno):
        indent = " " * function.body[0].col_offset
        lines[function.body[0].end_lineno:function.end_lineno] = [
            f"{indent}raise NotImplementedError\n"]
    return "".join(lines)


def assignment(exercises, with_tests: bool) -> str:
    """The text of ASSIGNMENT.md."""
    where, folder = "the repository that made this folder", " FOLDER"
    if with_tests:
        where, folder = "this folder", ""
    parts = [f"""# Assignment

Write the bodies of these functions. Each now raises NotImplementedError. They can be done in any
order. The functions and the comments around each in its file belong to the task. A letter means
what the docstring says, and else what the tables of symbols at the end say.

To grade them, run this in {where}:

    python tests/exercises.py grade{folder}

`--only NAME ...` grades some of them. Every source file must parse.
"""]
    for e in exercises:
        lines = (ROOT / e.file).read_text().splitlines()
        head = "\n".join(lines[e.function.lineno - 1:e.function.body[0].lineno - 1])
        code = f"{inspect.cleandoc(head)}\n\n{e.docstring()}"
        parts.append(f"## {e.name}\n\nFile: {e.file}. Lines of the original: {e.lines()}. Tests: "
                     f"{len(e.tests)}.\n\n```\n{code}\n```\n")
    for file in dict.fromkeys(e.file for e in exercises):
        docstring = ast.get_docstring(ast.parse((ROOT / file).read_text()))
        if "ymbols\n" in docstring:
            symbols = docstring[docstring.index("ymbols"):].split("\n", 1)[1]
            parts.append(f"## Symbols of {file}\n\n```\n{symbols}\n```\n")
    return "\n".join(parts)


def make_command(a):
    """Write a copy of the project without the solutions. It is written whole or not at all."""
    exercises, folder = chosen(a.names, find_exercises()), Path(a.output).resolve()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise BadInput(f"-o {a.output}: exists and is not an empty folder")
    if not folder.parent.is_dir():
        raise BadInput(f"-o {a.output}: {folder.parent} is no folder")
    new = Path(tempfile.mkdtemp(prefix=".exercises-", dir=folder.parent))
    try:
        for file in SOURCES:
            own = [e.function for e in exercises if e.file == file]
            (new / file).write_text(blanked((ROOT / file).read_text(), own))
        for file in OTHER_FILES:
            shutil.copy(ROOT / file, new)
        if a.tests:
            (new / "tests").mkdir()
            for path in (ROOT / "tests").glob("*.py"):
                shutil.copy(path, new / "tests")
        (new / "ASSIGNMENT.md").write_text(assignment(exercises, a.tests))
        new.chmod(0o755)
        os.replace(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    print(f"{folder}: {', '.join(e.name for e in exercises)}; see ASSIGNMENT.md")


# --------------------------------------------------------------------------------------------------
# grade


def need_pytest():
    if importlib.util.find_spec("pytest") is None:
        raise BadInput("the tests need pytest; pip install -e '.[test]'")


def grade(exercise: Exercise, sources: Path, limit: float) -> dict:
    """Run the tests of one exercise on the source files in a folder, in a process of its own.

    A test passes if all of its cases do. failed: the first test that did not pass, as a sentence;
    why: the first line of the error."""
    with tempfile.TemporaryDirectory() as made:
        report = Path(made, "report.xml")
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}",
             f"--basetemp={made}/tests", *exercise.node_ids()],
            cwd=ROOT, env={**os.environ, "NANOLET_SOURCES": str(sources), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            start_new_session=True)
        try:
            output, _ = process.communicate(timeout=limit)
            why = ([line for line in output.splitlines() if line.strip()] or [""])[-1]
        except subprocess.TimeoutExpired:
            why = f"stopped after {limit:g} seconds"
        finally:
            kill_group(process.pid)
            process.wait()
        cases = [*ElementTree.parse(report).iter("testcase")] if report.exists() else []
    errors = dict.fromkeys((case.get("name").partition("[")[0] for case in cases), "")
    for case in cases:
        test, _, parameters = case.get("name").partition("[")
        for problem in (*case.findall("failure"), *case.findall("error")):
            case_of = f"with {parameters[:-1]}: " if parameters else ""
            errors[test] = errors[test] or case_of + (problem.get("message") or "failed")
    missing = exercise.tests if not cases else [t for t in exercise.tests if t not in errors]
    wrong = {test: error for test, error in errors.items() if error} | dict.fromkeys(missing, why)
    first = next((test for test in exercise.tests if test in wrong), None)
    return {"exercise": exercise.name, "passed": len(exercise.tests) - len(wrong),
            "tests": len(exercise.tests),
            "failed": first and first.removeprefix("test_").replace("_", " "),
            "why": first and wrong[first].split("\n")[0][:200]}


def kill_group(pid: int):
    """End a process with all that it started."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def grade_command(a) -> bool:
    """Print a table of results. True if every test passed. Only the six source files are taken
    from the folder: the tests are those of this repository."""
    need_pytest()
    folder, exercises = Path(a.folder), find_exercises()
    for file in SOURCES:
        try:
            ast.parse((folder / file).read_text())
        except FileNotFoundError:
            raise BadInput(f"{folder / file}: no such file") from None
        except (SyntaxError, ValueError) as e:
            raise BadInput(f"{folder / file}, line {getattr(e, 'lineno', '?')}: does not parse "
                           f"({getattr(e, 'msg', e)})") from None
    names = a.only
    if not names and (folder / "ASSIGNMENT.md").exists():
        names = re.findall(r"^## ([\w.]+)$", (folder / "ASSIGNMENT.md").read_text(), re.M)
    todo = chosen(names or exercises, exercises)
    with tempfile.TemporaryDirectory() as sources:
        for file in SOURCES:
            shutil.copy(folder / file, sources)
        with concurrent.futures.ThreadPoolExecutor(a.jobs) as pool:
            results = [*pool.map(lambda e: grade(e, Path(sources), a.limit), todo)]
    if a.json:
        print(json.dumps(results, indent=1))
    else:
        rows = [(r["exercise"], f"{r['passed']} of {r['tests']}",
                 f"{r['failed']} ({r['why']})" if r["failed"] else "") for r in results]
        print(table([("exercise", "passed", "first failed"), *rows]))
    return all(r["passed"] == r["tests"] for r in results)


# --------------------------------------------------------------------------------------------------
# check: are the tests of each exercise good enough to grade with?

OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.MatMult: ast.Mult, ast.Lt: ast.LtE,
    ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or,
    ast.Or: ast.And, ast.USub: ast.UAdd, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd}
NAMES = {"min": "max", "sum": "mean", "ceil": "floor", "cos": "sin", "argmin": "argmax",
         "amin": "amax", "zeros": "ones", "exp": "log", "triu": "tril", "sqrt": "square"}
SYMMETRIC = ("min", "max", "transpose", "promote_types", "logaddexp", "cosine_similarity")
NAMES |= {new: old for old, new in NAMES.items()}


def edits(node) -> list:
    """Functions that change one thing in a node of a syntax tree: a sign, a constant, an operator,
    a comparison, an axis, a name, the order of two operands or arguments, a condition."""
    made = []
    operator = getattr(node, "op", None)
    if type(operator) in OPERATORS:
        made.append(lambda: vars(node).update(op=OPERATORS[type(operator)]()))
    for i, comparison in enumerate(getattr(node, "ops", ())):
        other = OPERATORS[type(comparison)]()
        made.append(lambda i=i, other=other: node.ops.__setitem__(i, other))
    if isinstance(operator, ast.Div | ast.MatMult | ast.Sub) and hasattr(node, "left"):
        made.append(lambda: vars(node).update(left=node.right, right=node.left))
    same = isinstance(getattr(node, "test", None), ast.Compare) and isinstance(
        node.test.ops[0], ast.Eq | ast.NotEq | ast.Is | ast.IsNot | ast.In | ast.NotIn)
    if isinstance(node, ast.If | ast.While | ast.IfExp) and not same:
        made.append(lambda: vars(node).update(test=ast.UnaryOp(ast.Not(), node.test)))
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        value = node.value
        new = not value if isinstance(value, bool) else value + 1
        if isinstance(value, float):
            new = 2 * value or 1.0
        made.append(lambda: vars(node).update(value=new))
    if (isinstance(node, ast.Call) and len(node.args) > 1
            and ast.unparse(node.func).split(".")[-1] not in SYMMETRIC
            and ast.unparse(node.args[0]) != ast.unparse(node.args[1])):
        made.append(lambda: node.args.insert(0, node.args.pop(1)))
    for attribute in ("id", "attr"):
        if getattr(node, attribute, None) in NAMES:
            made.append(lambda a=attribute: vars(node).update({a: NAMES[getattr(node, a)]}))
    return made


def mutants(function: ast.FunctionDef):
    """Yields (changed statement, changed function): the function with one edit in its body."""
    nodes = [*ast.walk(function)]
    arguments = {id(node) for node in ast.walk(function.args)}
    decorators = {id(node) for d in function.decorator_list for node in ast.walk(d)}
    messages = {id(node) for r in nodes if isinstance(r, ast.Raise) for node in ast.walk(r)}
    checks = {id(node.value) for node in nodes if getattr(node, "arg", "") == "strict"}
    for i, node in enumerate(nodes):
        if id(node) in arguments | decorators | messages | checks:
            continue
        for k in range(len(edits(node))):
            new = copy.deepcopy(function)
            changed = [*ast.walk(new)][i]
            edits(changed)[k]()
            statements = [s for s in ast.walk(new) if isinstance(s, ast.stmt)
                          and any(part is changed for part in ast.walk(s))]
            ast.fix_missing_locations(new)
            yield ast.unparse(statements[-1]).split("\n")[0], new


def code_of(function: ast.FunctionDef, blank=False) -> CodeType:
    """The code object of a function's syntax tree; blank: of one that is not written yet."""
    function = copy.copy(function)
    function.decorator_list = []
    if blank:
        raising = ast.parse("raise NotImplementedError").body[0]
        function.body = [ast.copy_location(raising, function)]
    tree = ast.fix_missing_locations(ast.Module([function], []))
    return next(constant for constant in compile(tree, "<changed>", "exec").co_consts
                if isinstance(constant, CodeType) and constant.co_name == function.name)


# Survivors that are right: (exercise, a part of the changed statement): why
EQUIVALENT = {
    ("Attention.forward", "T >= 1"): "one query and one key: causal or not is the same",
    ("RMSNormOnCPU.backward", "flatten("): "autograd sums the gradient over what is left",
    ("ssd", "K * Q >= T"): "fills up with no tokens",
    ("chunked_loss", "if not compiled"): "the same loss, compiled",
    ("pick", "+1"): "there are two axes, of which the last is axis 1",
    ("pick", "top_k <= "): "keeps all tokens",
    ("pick", "if top_p <"): "keeps all tokens",
    ("pick", "uniform / cum"): "the last of the sums is 1, up to rounding",
    ("newton_schulz", "shape[-2] >= "): "a square matrix may be transposed or not",
    ("newton_schulz", "min=2e-07"): "concerns norms below 2e-7 alone",
    ("Muon.move", "W[1].dtype"): "all W of a stack have one dtype",
    ("divergence", "+1"): "there are two axes, of which the last is axis 1",
    ("distillation_loss", "+1"): "there are two axes, of which the last is axis 1",
    ("distillation_loss", "V <= "): "computes the same probabilities again",
    ("linearity_score", "mean(0) - X"): "the score does not depend on the sign of X",
    ("linearity_score", "mean(0) - Y"): "the score does not depend on the sign of Y",
    ("linearity_score", "X * X.norm"): "the score does not depend on the scale of X",
    ("linearity_score", "(Y - X @ A)"): "its square is the same",
    ("linearity_penalty", "eps=2e-08"): "concerns norms below 2e-8 alone",
    ("linearity_penalty", "(lower - upper)"): "its square is the same",
    ("fit_affine", "(other_y - "): "its norm is the same",
    ("fit_affine", "range(14)"): "a ridge of 1e-13 is as good as one of 1e-12",
    ("hessian_product", "zip(v.split"): "a product in the other order",
    ("hessian_product", "=False"): "concerns parameters without a second derivative",
    ("lanczos", "side.diag(-1)"): "eigenvalues and squared components have no such sign",
    ("lanczos", "@ Q[:k + 1] - w"): "the sign changes twice",
    ("lanczos", "Q[k] @ w"): "a product in the other order",
    ("lanczos", "range(3)"): "orthogonal already",
    ("lanczos", "nothing_left"): "a threshold of rounding",
    ("fit_parabola", "np.clip(-700, x"): "the two bounds in the other order",
    ("fit_horizon", "range(7)"): "finer than needed",
    ("fit_horizon", "geomspace(high"): "the grid in falling order",
    ("fit_horizon", "best - 2"): "a wider search",
    ("fit_horizon", "best + 2"): "a wider search",
    ("fit_law", "(X @ beta - y)"): "its square is the same",
    ("predict_law", "0.99 <"): "concerns two numbers at the edge",
    ("train_bpe", "difference >= 0"): "looks at more words than needed",
    ("block_numbers", "(place // n, seed, n)"): "other permutations, as good as these",
}


@dataclass
class Variant:
    """One run of an exercise's tests. kind: solution, blank, others blank or mutant. changes:
    (exercise, its code) to put in place. statement: what a mutant changed. killer: the test that
    failed, or the time limit, or "" for none."""

    exercise: Exercise
    kind: str
    changes: list
    statement: str = ""
    killer: str = ""

    def equivalent(self) -> bool:
        return not self.killer and any(
            name == self.exercise.name and part in self.statement for name, part in EQUIVALENT)


def variants_of(exercise: Exercise, exercises):
    others = [e for e in exercises.values() if e is not exercise]
    yield Variant(exercise, "solution", [])
    yield Variant(exercise, "blank", [(exercise, code_of(exercise.function, blank=True))])
    yield Variant(exercise, "others blank", [(e, code_of(e.function, True)) for e in others])
    for statement, function in mutants(exercise.function):
        yield Variant(exercise, "mutant", [(exercise, code_of(function))], statement)


class Checker:
    """A pytest plugin. pytest collects the tests and runs them on the solutions. Then each variant
    runs in a fork of this process, which by then has imported everything, with the changed code in
    the function's place."""

    def __init__(self, variants, jobs: int, limit: float):
        self.variants, self.jobs, self.limit, self.failed = variants, jobs, limit, ""

    def pytest_runtest_logreport(self, report):
        if report.failed and not self.failed:
            self.failed = report.nodeid.partition("::")[2]

    def pytest_runtestloop(self, session):
        items = defaultdict(list)
        for item in session.items:
            items[item.get_closest_marker("exercise").args[0]].append(item)
        limits = {}  # a mutant may take 10 times as long as the solution
        for variant in self.variants:
            if variant.kind == "solution":
                start, name = time.monotonic(), variant.exercise.name
                variant.killer = self.run(items[name])
                limits[name] = min(self.limit, 5 + 10 * (time.monotonic() - start))
        gc.freeze()  # else a collection in a fork copies the memory of all that is imported
        waiting, running = [v for v in self.variants[::-1] if v.kind != "solution"], {}
        while waiting or running:
            while waiting and len(running) < self.jobs:
                variant = waiting.pop()
                reader, writer = os.pipe()
                pid = os.fork()
                if pid == 0:
                    self.run_changed(variant, items[variant.exercise.name], writer)
                os.close(writer)
                running[pid] = variant, reader, time.monotonic() + limits[variant.exercise.name]
            for pid, (variant, reader, deadline) in [*running.items()]:
                late = time.monotonic() > deadline
                if late:
                    kill_group(pid)
                ended, status = os.waitpid(pid, 0 if late else os.WNOHANG)
                if ended:
                    said = os.read(reader, 10_000).decode()
                    variant.killer = said.strip() if status == 0 else "time limit or crash"
                    os.close(reader)
                    del running[pid]
            time.sleep(0.005)
        return True

    def run(self, items) -> str:
        """Run tests up to the first that fails, and return its name, or ""."""
        self.failed = ""
        for item, following in zip(items, [*items[1:], None]):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if self.failed:
                break
        return self.failed

    def run_changed(self, variant, items, writer: int):
        """In the forked process: put the changed code in place, run, write the result."""
        os.setpgid(0, 0)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for descriptor in (1, 2):
            os.dup2(nowhere, descriptor)
        for exercise, code in variant.changes:
            target = importlib.import_module(exercise.file.removesuffix(".py"))
            for part in exercise.name.split("."):
                target = getattr(target, part)
            inspect.unwrap(target).__code__ = code
        os.write(writer, self.run(items).encode())
        os._exit(0)


def check_command(a) -> bool:
    """Print what the tests of each exercise find. True if they are good enough."""
    need_pytest()
    import pytest

    start = time.monotonic()
    exercises = find_exercises()
    todo = chosen(a.names or exercises, exercises)
    variants = [v for e in todo for v in variants_of(e, exercises)]
    os.environ["OMP_NUM_THREADS"] = "1"
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["PYTEST_DEBUG_TEMPROOT"] = temporary
        ids = [test for e in todo for test in e.node_ids()]
        code = pytest.main(["-s", "-o", "addopts=", "-p", "no:terminal", "-p", "no:cacheprovider",
                            *ids], plugins=[Checker(variants, a.jobs, a.limit)])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise BadInput(f"the tests could not be collected: pytest tests, {code!r}")
    rows = [("exercise", "mutants", "equivalent", "killed", "solution, blank, others blank")]
    good, killed, made = True, 0, 0
    for e in todo:
        own = [v for v in variants if v.exercise is e]
        found = {v.kind: v.killer for v in own if v.kind != "mutant"}
        wrong = [f"{kind}: {found[kind]} fails" for kind in ("solution", "others blank")
                 if found[kind]] + ["blank: passes"] * (not found["blank"])
        counted = [v for v in own if v.kind == "mutant" and not v.equivalent()]
        killers = Counter(v.killer.partition("[")[0] for v in counted if v.killer)
        killed, made = killed + killers.total(), made + len(counted)
        good = good and not wrong and killers.total() >= 0.85 * len(counted)
        rows.append((e.name, len(counted), sum(v.equivalent() for v in own), killers.total(),
                     "; ".join(wrong) or "ok"))
        rows += [("", "", "", "", f"survives: {v.statement}") for v in counted if not v.killer]
        if a.verbose:
            rows += [("", "", "", n, f"by {test}") for test, n in killers.most_common()]
    print(table(rows))
    print(f"{killed} of {made} mutants killed, {100 * killed / max(1, made):.1f} %, in "
          f"{time.monotonic() - start:.0f} s")
    return good and killed >= 0.95 * made


# --------------------------------------------------------------------------------------------------
# The command line


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(message)


def main(argv) -> int:
    parser = Parser(prog="exercises.py", description="Course assignments.")
    commands = parser.add_subparsers(required=True, metavar="list | make | grade | check")
    add = commands.add_parser("list", help="show all exercises")
    add.set_defaults(run=list_command)
    add = commands.add_parser("make", help="write a copy of the project without some solutions")
    add.set_defaults(run=make_command)
    add.add_argument("names", nargs="+", metavar="NAME")
    add.add_argument("-o", dest="output", required=True, metavar="FOLDER", help="new or empty")
    add.add_argument("--tests", action="store_true", help="copy the tests too, so that students "
                     "can grade by themselves; the oracles in them are solutions of another form")
    add = commands.add_parser("grade", help="run the tests of a submission's exercises")
    add.set_defaults(run=grade_command)
    add.add_argument("folder", nargs="?", default=str(ROOT), metavar="FOLDER")
    add.add_argument("--only", nargs="+", action="extend", metavar="NAME", help="these exercises; "
                     "else those of ASSIGNMENT.md in the folder, or all")
    add.add_argument("--json", action="store_true", help="print JSON")
    check = commands.add_parser("check", help="measure how well the tests tell right from wrong")
    check.set_defaults(run=check_command)
    check.add_argument("names", nargs="*", metavar="NAME", help="these exercises; else all")
    check.add_argument("-v", "--verbose", action="store_true", help="say which tests kill")
    for one in (add, check):
        one.add_argument("--jobs", type=int, default=2, help="processes at a time")
        one.add_argument("--limit", type=float, default=LIMIT, help="seconds for an exercise")
    try:
        a = parser.parse_args(argv)
        return 1 if a.run(a) is False else 0
    except BadInput as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except OSError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
