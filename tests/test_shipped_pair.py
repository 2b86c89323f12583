"""The pair in checkpoints/: its size, that draft and target fit, and what they write together."""

import pytest
import torch

from check import check
from conftest import FALSE_ALARM, N_P_VALUES, wrong_rule
from model import CHECKPOINTS, load_heads, load_pair
from specdec import HeadsDrafter, ModelDrafter, generate

PROMPT = "class Stack:\n    def __init__(self):\n"


@pytest.fixture(scope="module")
def pair():
    return load_pair(device="cpu", dtype=torch.float32)


def test_sizes(pair):
    large, tiny = (sum(p.numel() for p in model.parameters()) for model in pair[:2])
    assert 14e6 < large < 16e6 and 1.1e6 < tiny < 1.3e6
    files = [file for file in CHECKPOINTS.iterdir() if file.name != "partial.pt"]
    assert sum(file.stat().st_size for file in files) < 20e6


@pytest.mark.parametrize("temperature, floor", [(0, 0.72), (1, 0.62)])
def test_the_draft_is_good(pair, temperature, floor):
    """A floor under alpha, which is .77 and .65 here.

    A draft that is broken, or distilled from another target (.60 at temperature 1), stays right and
    gets slow.
    """
    target, draft, encoding = pair
    prompt = torch.tensor(encoding.encode_ordinary(PROMPT)).expand(12, -1)
    options = {"drafter": ModelDrafter(draft), "k": 4, "temperature": temperature, "seed": 0}
    assert generate(target, prompt, 60, **options).stats.expected_acceptance_rate > floor


def test_the_heads_are_good_and_better_when_they_see(pair):
    """Acceptance at temperature 1: .75 for heads that see the token just guessed, .33 for blind."""
    target, _, encoding = pair
    prompt, alpha = torch.tensor(encoding.encode_ordinary(PROMPT)).expand(12, -1), []
    for heads in load_heads(CHECKPOINTS / "heads.pt", target):
        stats = generate(target, prompt, 60, drafter=HeadsDrafter(heads), k=4, seed=0).stats
        alpha.append(stats.expected_acceptance_rate)
    seeing, blind = alpha
    assert seeing > 0.73 and seeing > blind + 0.3


def test_greedy_text_is_the_targets(pair):
    """In float32 a near tie may fall either way; up to the first difference it is the same text."""
    target, draft, encoding = pair
    prompt = torch.tensor(encoding.encode_ordinary(PROMPT))
    plain = generate(target, prompt, 80, temperature=0).tokens[0]
    ours = generate(target, prompt, 80, drafter=ModelDrafter(draft), temperature=0).tokens[0]
    same = next((i for i, (a, b) in enumerate(zip(plain, ours)) if a != b), len(plain))
    if same < len(plain):
        logits = target(torch.cat((prompt, torch.tensor(plain[:same])))[None])[0][0, -1]
        assert abs(logits[plain[same]] - logits[ours[same]]) < 1e-3


def test_samples_follow_the_targets_own_distribution(pair, capsys):
    """check.py with fewer samples: two tokens' joint distribution, for both ways of decoding."""
    target, draft, encoding = pair
    prompt = torch.tensor(encoding.encode_ordinary("\n    "))
    decoders = {"plain": (None, 1, "rejection"), "draft": (ModelDrafter(draft), 2, "rejection")}
    level = FALSE_ALARM / N_P_VALUES
    assert check(target, decoders, encoding, prompt, seed=1, n=2000, level=level)
    assert "plain and draft: both follow the target's distribution" in capsys.readouterr().out


def test_check_finds_a_wrong_rule(pair, capsys):
    target, draft, encoding = pair
    prompt = torch.tensor(encoding.encode_ordinary("\n    "))
    decoders = {"draft": (ModelDrafter(draft), 2, wrong_rule)}
    assert not check(target, decoders, encoding, prompt, seed=1, n=2000)
    assert "MISMATCH: draft does not follow" in capsys.readouterr().out
