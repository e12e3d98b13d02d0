"""exercises.py: what it makes, what it lets pass, and what it refuses."""
import ast
import json

import exercises
import pytest
from conftest import ROOT, run_python

COMMAND = ROOT / "tests" / "exercises.py"
BLANK = ["let_weight", "teaches_at", "wsd", "credit"]


@pytest.fixture
def copy(tmp_path):
    """A folder of these exercises."""
    assert exercises.main(["make", *BLANK, "-o", str(tmp_path / "new")]) == 0
    return tmp_path / "new"


def solve(folder, name, body):
    """Put a body in the place of the raise."""
    path = folder / exercises.find_exercises()[name].file
    lines = path.read_text().splitlines(keepends=True)
    lines[exercises.functions_of("".join(lines))[name].end_lineno - 1] = f"    {body}\n"
    path.write_text("".join(lines))


def test_an_exercise_has_a_docstring_and_the_list_names_it_with_its_first_sentence(capsys):
    found = exercises.find_exercises()
    exercises.main(["list"])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) == len(found) >= 24
    for e, line in zip(found.values(), lines, strict=True):
        assert line.split()[:4] == [e.name, e.file, str(len(e.tests)), str(e.lines())]
        assert len(e.docstring()) > 60 and line.endswith(e.task())


def test_a_copy_lacks_the_bodies_and_nothing_else_and_has_no_tests(copy):
    assert {path.name for path in copy.iterdir()} == {
        *exercises.SOURCES, *exercises.OTHER_FILES, "ASSIGNMENT.md"}
    assignment = (copy / "ASSIGNMENT.md").read_text()
    for file in exercises.SOURCES:
        ours, theirs = (ast.parse((folder / file).read_text()) for folder in (ROOT, copy))
        for node in ours.body:
            if getattr(node, "name", "") in BLANK:
                solution = [ast.unparse(statement) for statement in node.body[1:]]
                node.body[1:] = ast.parse("raise NotImplementedError").body
                assert ast.get_docstring(node) in assignment
                assert not any(line in assignment for line in solution)
        assert ast.dump(ours) == ast.dump(theirs)


def test_a_submission_is_graded_exercise_by_exercise(copy):
    """One is right, one wrong, one ends the process, one is blank."""
    solve(copy, "let_weight", "return weight * max(0, stop - step) / max(stop, 1)")
    solve(copy, "teaches_at", "return stop is None or step <= stop")
    solve(copy, "wsd", "__import__('os')._exit(0)")
    done = run_python(COMMAND, "grade", copy, "--json")
    found = {r["exercise"]: r for r in json.loads(done.stdout)}
    assert done.returncode == 1 and {name: r["passed"] for name, r in found.items()} == {
        "let_weight": 1, "teaches_at": 0, "wsd": 0, "credit": 0}
    assert found["let_weight"]["failed"] is None
    assert "switch of salt" in found["teaches_at"]["failed"]
    assert "NotImplementedError" in found["credit"]["why"]


def test_a_time_limit_fails_an_exercise_and_a_right_solution_passes(copy):
    solve(copy, "teaches_at", "return stop is None or step < stop")
    for limit, code, passed in ((0.1, 1, "0 of 1"), (100, 0, "1 of 1")):
        done = run_python(COMMAND, "grade", copy, "--only", "teaches_at", f"--limit={limit}")
        assert done.returncode == code and passed in done.stdout, done.stdout


def test_the_check_finds_a_mutant_of_every_kind_and_the_tests_kill_them():
    source = "def f(a, b): x = -a[1:, -1] @ g(a, b); return x if b > 0.5 else a.sum(0)"
    found = {statement for statement, _ in exercises.mutants(ast.parse(source).body[0])}
    assert found >= {
        "x = +a[1:, -1] @ g(a, b)", "x = -a[2:, -1] @ g(a, b)", "x = -a[1:, -2] @ g(a, b)",
        "x = -a[1:, -1] * g(a, b)", "x = g(a, b) @ -a[1:, -1]", "x = -a[1:, -1] @ g(b, a)",
        "return x if b >= 0.5 else a.sum(0)", "return x if b > 1.0 else a.sum(0)",
        "return x if not b > 0.5 else a.sum(0)", "return x if b > 0.5 else a.mean(0)"}
    done = run_python(COMMAND, "check", "teaches_at", "credit")
    assert done.returncode == 0 and "100.0 %" in done.stdout, done.stdout


@pytest.mark.parametrize("command, said", [
    (["make", "newton_shulz", "-o", "NEW"], ["newton_shulz", "newton_schulz"]),
    (["make", "wsd", "-o", "FULL"], ["FULL"]), (["make", "wsd", "-o", "FULL/file"], ["FULL/file"]),
    (["make", "wsd", "-o", "NONE/new"], ["NONE"]), (["make", "wsd"], ["-o"]),
    (["grade", "NONE"], ["NONE", "model.py"]), (["grade", "BROKEN"], ["optim.py", "line 2"]),
    (["grade", "--only", "newton"], ["newton", "newton_schulz"]),
    (["check", "lanczo"], ["lanczo", "lanczos"]), ([], ["list | make"])], ids=str)
def test_bad_input_is_refused_in_one_line_and_nothing_is_overwritten(
        command, said, tmp_path, capsys):
    for file in ("FULL/file", *(f"BROKEN/{name}" for name in exercises.SOURCES)):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("x = 1\n" + "def (:\n" * (file == "BROKEN/optim.py"))
    before = sorted(tmp_path.rglob("*"))
    command = [str(tmp_path / word) if word[:1].isupper() else word for word in command]
    assert exercises.main(command) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and all(word in message for word in said)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "FULL" / "file").read_text() == "x = 1\n"
