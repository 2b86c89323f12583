"""The exercises: each line of EXERCISES.md runs, grades what it says, and needs nothing later."""

import importlib.util
import inspect
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from mutants import run_pytest
from starter import EXERCISES, SPECDEC, functions_of, starter

ROOT = Path(__file__).parent.parent
NOT_DONE = r"exercise [\w.]+ is not done yet"
SOURCE = SPECDEC.read_text(encoding="utf-8")
TEXT = (ROOT / "tests" / "EXERCISES.md").read_text(encoding="utf-8").replace(" \\\n       ", "")
OTHER_WAYS = (ROOT / "tests" / "other_ways.py").read_text(encoding="utf-8")
START = "python tests/starter.py > my_specdec.py"
WHOLE = "python -m pytest --impl=my_specdec.py -x --tb=short"
SHOW = "python my_specdec.py"


def read_exercises():
    """EXERCISES.md -> [(name, its functions, functions that must be done for it, its lines)]"""
    exercises, done = [], {}
    for part in TEXT.split("\n## ")[1:]:
        title, *sections = part.split("\n### ")
        kind = title.split(":")[0].split("\n")[0]
        done[kind] = list(done.get("Part 1", ()))
        for section in sections:
            heading, rest = section.split("\n", 1)
            functions = re.findall(r"`([\w.]+)`", heading)
            lines = re.findall(r"^    (python .+)$", rest, re.MULTILINE)
            earlier = re.findall(r"Do exercise (\d+) first", rest)
            needs = done[kind] + sum([exercises[int(n) - 1][1] for n in earlier], functions)
            exercises.append((heading.split(" (")[0], functions, needs, lines))
            if kind != "Variations":  # of these each needs Part 1, and what it says
                done[kind] = needs
    return exercises


ALL = read_exercises()
PART_1 = [needs for _, _, needs, _ in ALL[:9]]
LINES = [(name, needs, line) for name, _, needs, lines in ALL for line in lines]
IDS = [line.split("my_specdec.py ")[1].replace(" -x --tb=short", "") for *_, line in LINES]


def run_line(line, impl, *more):
    """-> exit status, output."""
    return run_pytest([*shlex.split(line.replace("my_specdec.py", str(impl)))[3:], *more], ROOT)


def with_exercises_left(line, left, *more, source=SOURCE):
    """What comes of a line when these exercises are not done yet."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "my_specdec.py"
        file.write_text(starter(source, left), encoding="utf-8")
        return run_line(line, file, *more)


def in_other_ways(source):
    """The source, with the functions of other_ways.py in the place of its own."""
    lines, new, old = source.splitlines(), OTHER_WAYS.splitlines(), functions_of(source)
    theirs = functions_of(OTHER_WAYS)
    for name in sorted(theirs, key=lambda name: -old[name].lineno):
        function = new[theirs[name].lineno - 1 : theirs[name].end_lineno]
        lines[old[name].lineno - 1 : old[name].end_lineno] = function
    return "\n".join(lines) + "\n"


FEW = "--hypothesis-profile=few", "-p", "test_exercises"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """With `-p test_exercises`: one case of each test, to save time. The suite runs the others."""
    items[:] = {item.function: item for item in items}.values()


def run(words, **options):
    return subprocess.run([sys.executable, *words], cwd=ROOT, encoding="utf-8", **options)


# -- the starter


def test_the_starter_keeps_docstrings_and_drops_bodies():
    text = starter(SOURCE)
    for name in EXERCISES:
        assert f'NotImplementedError("exercise {name} is not done yet")' in text
    assert "Worked by hand" in text and "# 3. Judge" in text
    assert "mass_before" not in text and "before_eos" not in text
    with pytest.raises(ValueError, match="has no function to_probs, "):
        starter("def verify():\n    pass\n")


def test_an_unfinished_function_names_itself_when_it_is_called(tmp_path):
    """However it is decorated: as a generator, a static method, a cached function."""
    (tmp_path / "unfinished.py").write_text(starter(SOURCE), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("unfinished", tmp_path / "unfinished.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in EXERCISES:
        function = module
        for part in name.split("."):
            function = getattr(function, part)
        with pytest.raises(NotImplementedError, match=f"exercise {name} is not done yet"):
            function(*[None] * len(inspect.signature(function).parameters))


def test_the_starter_on_the_command_line():
    script = shlex.split(START)[1]
    assert run([script], capture_output=True).stdout == starter(SOURCE)
    one = run([script, "verify", "verify"], capture_output=True).stdout
    assert re.findall(NOT_DONE, one) == ["exercise verify is not done yet"]
    shown = run([script, "--help"], capture_output=True)
    assert shown.returncode == 0 and "python tests/starter.py" in shown.stdout
    assert "TreeDrafter.own_round" in shown.stdout
    for wrong in ("verfy", "--impl"):
        wrong = run([script, wrong], capture_output=True)
        assert wrong.returncode == 2 and wrong.stdout == "" and wrong.stderr.count("\n") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_the_starter_says_that_it_cannot_write():
    with open("/dev/full", "w") as full:
        failed = run([shlex.split(START)[1]], stdout=full, stderr=subprocess.PIPE)
    assert failed.returncode == 1 and failed.stderr.count("\n") == 1
    assert "No space left" in failed.stderr


# -- EXERCISES.md


def test_the_exercises_are_those_of_the_starter_in_its_order():
    assert sum([functions for _, functions, _, _ in ALL], []) == list(EXERCISES)
    assert [name.split(".")[0] for name, *_ in ALL] == [str(i + 1) for i in range(len(ALL))]
    assert all(lines for *_, lines in ALL)


def test_every_code_block_is_run_by_a_test_below():
    known = [START, WHOLE, SHOW] + [line for _, _, line in LINES]
    assert re.findall(r"^    (.+)$", TEXT, re.MULTILINE) == known
    assert "```" not in TEXT


@pytest.mark.parametrize("name, needs, line", LINES, ids=IDS)
def test_an_unfinished_exercise_fails_with_its_name(name, needs, line):
    """All exercises before it are done: so what is named is its own function."""
    own = next(functions for exercise, functions, *_ in ALL if exercise == name)
    left = [f for f in EXERCISES if f not in needs or f in own] if own else EXERCISES
    status, out = with_exercises_left(line, left, *FEW)
    named = re.search(f"NotImplementedError: {NOT_DONE}", out)
    assert status == 1 and named, out
    assert not own or named[0].split()[2] in own, out


@pytest.mark.parametrize("name, needs, line", LINES, ids=IDS)
def test_a_line_passes_once_the_exercises_up_to_it_are_done(name, needs, line):
    """No later exercise is needed for an earlier line. And Part 1 may be written in another way
    than ours, which the rest of the suite tests."""
    left = [f for f in EXERCISES if f not in needs]
    source = in_other_ways(SOURCE) if needs in PART_1 else SOURCE
    status, out = with_exercises_left(line, left, *FEW, source=source)
    assert status == 0, out


def test_all_of_part_1_is_written_in_another_way():
    assert list(functions_of(OTHER_WAYS)) == PART_1[-1]


STEPS = ["0 * token", "(n < draft_tokens.shape[1]) * token", "token"]


@pytest.mark.parametrize("step", range(3))
def test_verify_in_three_steps(step, tmp_path):
    """Its first line needs no token, its second no bonus; and each sees what is missing still."""
    wrapped = f"""
complete = verify
def verify(target_probs, draft_probs, draft_tokens, generator=None):
    n, token = complete(target_probs, draft_probs, draft_tokens, generator)
    return n, {STEPS[step]}
"""
    file = tmp_path / "my_specdec.py"
    file.write_text(SOURCE.split("# ---- Part 4")[0] + wrapped, encoding="utf-8")
    lines = next(lines for _, functions, _, lines in ALL if functions == ["verify"])
    assert len(lines) == 3
    for i, line in enumerate(lines[: step + 2]):
        status, out = run_line(line, file, *FEW)
        assert status == (i > step), out


def test_the_whole_suite_runs_on_a_file():
    """Without the name of a test file, pytest knows --impl only in the form with `=`."""
    status, out = with_exercises_left(WHOLE, EXERCISES)
    assert status == 1 and re.search(NOT_DONE, out) and "unrecognized" not in out, out
    status, out = with_exercises_left(WHOLE, (), "--collect-only", "-q")
    assert status == 0, out
    collected = set(re.findall(r"^tests/(\w+)\.py", out, re.MULTILINE))
    assert collected >= set(re.findall(r"tests/(test_\w+)\.py", TEXT)) | {"test_sampled_law"}
    assert not collected & {"test_exercises", "test_mutants", "test_training", "test_graphs"}


@pytest.mark.parametrize("ready", [False, True])
def test_the_demonstration_runs_on_a_file(ready, tmp_path):
    """From the exercise on that is said; before, it ends with the name of what is missing."""
    exercise = int(re.search(r"from exercise (\d+) on", TEXT)[1])
    done = ALL[exercise - 1][2] if ready else ()
    file = tmp_path / "my_specdec.py"
    file.write_text(starter(SOURCE, [f for f in EXERCISES if f not in done]), encoding="utf-8")
    words = "--max-new-tokens 2 --temperature 0 --threads 1".split()
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    shown = run([file, *words], capture_output=True, env=env)
    if ready:
        assert shown.returncode == 0 and shown.stderr == "", shown.stderr
    else:
        assert shown.returncode != 0 and re.search(NOT_DONE, shown.stderr.splitlines()[-1])


def test_a_missing_file_is_said_to_be_missing():
    status, out = run_line(LINES[0][-1], "nowhere.py")
    assert status == 4 and "no file nowhere.py" in out
