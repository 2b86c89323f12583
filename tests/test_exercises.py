"""The exercises: the starter is made from specdec.py itself, and README's lines run the tests that grade it."""

import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from starter import EXERCISES, SPECDEC, starter

ROOT = Path(__file__).parent.parent
LINES = re.findall(r"^ *(python -m pytest --impl my_specdec\.py .*)$", (ROOT / "README.md").read_text(), re.MULTILINE)


def pytest_line(line, impl):
    words = [str(impl) if word == "my_specdec.py" else word for word in shlex.split(line)[1:]]
    return subprocess.run([sys.executable, *words, "-q", "-p", "no:cacheprovider"], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def my_specdec(tmp_path_factory):
    file = tmp_path_factory.mktemp("exercise") / "my_specdec.py"
    file.write_text(starter(SPECDEC.read_text()))
    return file


def test_the_starter_keeps_docstrings_and_drops_bodies():
    text = starter(SPECDEC.read_text())
    compile(text, "my_specdec.py", "exec")
    for name in EXERCISES:
        assert f'NotImplementedError("exercise {name} is not done yet")' in text
    assert "Worked by hand" in text and "mass = left" not in text and "lacking = " not in text
    with pytest.raises(ValueError, match="no longer has the exercises"):
        starter("def verify():\n    pass\n")


def test_there_are_enough_of_them():
    assert len(LINES) >= 8


@pytest.fixture(scope="module")
def unfinished(my_specdec):
    """{line: what came of it}, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(LINES, pool.map(lambda line: pytest_line(line + " -x", my_specdec), LINES)))


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.split("my_specdec.py ")[1])
def test_an_unfinished_exercise_fails_with_its_name(line, unfinished):
    result = unfinished[line]
    assert result.returncode == 1 and re.search(r"NotImplementedError: exercise [\w.]+ is not done yet", result.stdout), result.stdout


DONE = (["to_probs"], ["bernoulli", "categorical"], ["plain_rounds"], ["ratio", "residual"], ["verify"], [], ["expected_tokens", "expected_speed_up", "best_k"],
        ["Drafter.propose", "ModelDrafter.begin", "ModelDrafter.commit"], ["speculative_rounds"], [], ["NGramDrafter.propose"], ["verify_block"],
        ["verify_coupled"], ["ancestors"])  # fmt: skip
SLOW = (9,)  # nearly the whole of a file that the ordinary test command runs anyway


QUICK = [i for i in range(len(DONE)) if i not in SLOW]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """{i: what comes of line i once the exercises up to it are done}, two at a time."""

    def run(i):
        left = [name for name in EXERCISES if name not in sum(DONE[: i + 1], [])]
        file = tmp_path_factory.mktemp("done") / "my_specdec.py"
        file.write_text(starter(SPECDEC.read_text(), left))
        return pytest_line(LINES[i], file)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(QUICK, pool.map(run, QUICK)))


@pytest.mark.parametrize("i", QUICK)
def test_each_line_passes_once_the_exercises_up_to_it_are_done(i, done):
    """In README's order, and no later exercise is needed for an earlier line."""
    assert done[i].returncode == 0, done[i].stdout


def test_a_missing_file_is_said_to_be_missing():
    result = pytest_line("python -m pytest --impl my_specdec.py tests/test_theory.py", "nowhere.py")
    assert result.returncode == 4 and "no file nowhere.py" in result.stdout + result.stderr
