"""The exercises: the starter is made from specdec.py itself, and README's lines run the tests that grade it."""

import re
import shlex
import tempfile
from pathlib import Path

import pytest

from mutants import run_pytest
from starter import EXERCISES, SPECDEC, starter

ROOT = Path(__file__).parent.parent
LINES = re.findall(r"^ *(python -m pytest --impl my_specdec\.py .*)$", (ROOT / "README.md").read_text(), re.MULTILINE)


def pytest_line(line, impl):
    words = [str(impl) if word == "my_specdec.py" else word for word in shlex.split(line)[3:]]
    return run_pytest([*words, "-q"], ROOT)


def with_exercises_left(line, left):
    """What comes of a line when these exercises are not done yet."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "my_specdec.py"
        file.write_text(starter(SPECDEC.read_text(), left))
        return pytest_line(line, file)


def test_the_starter_keeps_docstrings_and_drops_bodies():
    text = starter(SPECDEC.read_text())
    compile(text, "my_specdec.py", "exec")
    for name in EXERCISES:
        assert f'NotImplementedError("exercise {name} is not done yet")' in text
    assert "Worked by hand" in text and "mass = left" not in text and "length - cache.length" not in text
    with pytest.raises(ValueError, match="no longer has the exercises"):
        starter("def verify():\n    pass\n")


def test_there_are_enough_of_them():
    assert len(LINES) >= 8


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.split("my_specdec.py ")[1])
def test_an_unfinished_exercise_fails_with_its_name(line):
    status, out = with_exercises_left(line + " -x --hypothesis-profile=mutants", EXERCISES)
    assert status == 1 and re.search(r"NotImplementedError: exercise [\w.]+ is not done yet", out), out


DONE = (["to_probs"], ["bernoulli", "categorical"], ["plain_rounds"], ["ratio", "residual"], ["verify"], [], ["expected_tokens", "expected_speed_up", "best_k"],
        ["Drafter.propose", "catch_up", "ModelDrafter.commit"], ["speculative_rounds"], [], ["NGramDrafter.propose"], ["verify_block"],
        ["verify_coupled"], ["ancestors"], [])  # fmt: skip
SLOW = (9, 14)  # nearly the whole of a file that the ordinary test command runs anyway. (At 14 all are done, so it is that very run.)


def left_after(i):
    return [name for name in EXERCISES if name not in sum(DONE[: i + 1], [])]


@pytest.mark.parametrize("i", [i for i in range(len(DONE)) if i not in SLOW])
def test_each_line_passes_once_the_exercises_up_to_it_are_done(i):
    """In README's order, and no later exercise is needed for an earlier line."""
    status, out = with_exercises_left(LINES[i] + " --hypothesis-profile=few", left_after(i))
    assert status == 0, out


def test_a_missing_file_is_said_to_be_missing():
    status, out = pytest_line("python -m pytest --impl my_specdec.py tests/test_theory.py", "nowhere.py")
    assert status == 4 and "no file nowhere.py" in out
