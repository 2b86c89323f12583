"""What a reader was promised: short files, narrow lines, code blocks that run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import specdec

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SPECDEC = (ROOT / "specdec.py").read_text()
LATER = r"graph|clock|tree|\bheads?\b|noise|statistic|auto|coupled|time\.|ngram|n-gram"
BUDGETS = {"kvcache.py": 110, "model.py": 510, "specdec.py": 800, "README.md": 200}


def parts():
    """The four parts of specdec.py."""
    banners = [m.start() for m in re.finditer(r"^# -+ Part \d: .* -+$", SPECDEC, re.MULTILINE)]
    assert len(banners) == 4
    return [SPECDEC[: banners[1]], SPECDEC[banners[1] : banners[2]], SPECDEC[banners[2] : banners[3]], SPECDEC[banners[3] :]]


def lines_of(name):
    """How many lines of code a function has, without its signature, docstring and comments."""
    body = re.search(rf"^def {name}\(.*?(?=^\S|\Z)", SPECDEC, re.MULTILINE | re.DOTALL)[0]
    body = re.sub(r'""".*?"""', "", body, flags=re.DOTALL)
    lines = [line for line in body.split("\n") if line.strip() and not line.strip().startswith("#")]
    return len(lines) - 1


@pytest.mark.parametrize("file", BUDGETS)
def test_budgets_of_the_reading_order(file):
    assert len((ROOT / file).read_text().splitlines()) <= BUDGETS[file]
    assert len(README.split()) <= 2000


@pytest.mark.parametrize("file", ["kvcache.py", "model.py", "specdec.py", "train_tiny.py"])
def test_no_line_is_wider_than_100(file):
    assert max(map(len, (ROOT / file).read_text().splitlines())) <= 100


def test_part_1_is_short_and_complete_and_ends_by_saying_so():
    one, _, _, four = parts()
    before, after = one.split("# You now know speculative decoding.")
    assert len(before.splitlines()) <= 220 and after.count("\n") <= 2
    assert len(four.splitlines()) <= 150
    for name in ("to_probs", "bernoulli", "categorical", "Rows", "plain_rounds", "verify", "ModelDrafter", "generate"):
        assert re.search(rf"^(?:def|class) {name}\b", one, re.MULTILINE), name


def test_part_1_speaks_of_nothing_that_comes_later():
    one = parts()[0].replace("stats", "")  # what generate returns
    assert not re.findall(LATER, one, re.IGNORECASE)


@pytest.mark.parametrize("name, most", [("plain_rounds", 12), ("verify", 15), ("speculative_round", 20), ("speculative_rounds", 12)])
def test_the_loop_is_short(name, most):
    assert 0 < lines_of(name) <= most


def blocks(kind):
    return re.findall(rf"^```{kind}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_the_loop_in_readme_is_the_loop():
    loop, own = blocks("python")
    without_gaps = re.sub(r"\n\n", "\n", SPECDEC)
    assert loop in without_gaps
    assert "def speculative_round(" in loop


def test_readmes_own_drafter_and_rule_run(tmp_path):
    """As a reader would run them, in a file in the project's folder. The rule is exact."""
    _, own = blocks("python")
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", own]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr
    numbers = [float(x) for x in re.findall(r"\d\.\d+", result.stdout.split("tensor")[1])]
    assert numbers == pytest.approx([0.14, 0.56, 0.06, 0.24], abs=1e-4)


def test_the_round_worked_by_hand_in_readme(monkeypatch):
    """Three guesses, 0 1 0, with the coins of the table: the third is rejected, and becomes 1."""
    import torch

    target = torch.tensor([[[0.7, 0.3], [0.6, 0.4], [0.1, 0.9], [0.5, 0.5]]])
    draft = torch.full((1, 3, 2), 0.5)
    coins = torch.tensor([[0.90, 0.35, 0.62]])
    monkeypatch.setattr(specdec, "bernoulli", lambda probs, generator=None: coins < probs)
    n_accepted, token = specdec.verify(target, draft, torch.tensor([[0, 1, 0]]))
    assert (n_accepted.item(), token.item()) == (2, 1)


def test_the_curve_in_readme():
    """tau / (1 + k / 10 + 1 / 10), as its title says."""
    (chart,) = blocks("mermaid")
    ks, *curves = (re.findall(r"[\d.]+", values) for values in re.findall(r"\[(.*)\]", chart))
    for alpha, curve in zip((0.8, 0.6), curves):
        for k, speed_up in zip(ks, curve):
            tau = specdec.expected_tokens(alpha, int(k))
            assert float(speed_up) == pytest.approx(tau / (1.1 + 0.1 * int(k)), abs=0.01)


def test_links_in_readme_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
