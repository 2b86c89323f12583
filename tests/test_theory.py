"""The formulas of Leviathan et al. 2022, against the numbers that the paper prints."""

import pytest

from bench import best_k, expected_speed_up
from specdec import expected_tokens

TABLE_1 = [
    (0.6, 2, 1.96), (0.7, 3, 2.53), (0.8, 2, 2.44), (0.8, 5, 3.69), (0.9, 2, 2.71), (0.9, 10, 6.86),
]  # fmt: skip


@pytest.mark.parametrize("alpha, k, speed", TABLE_1)
def test_table_1(alpha, k, speed):
    """Their Table 1, where a guess costs nothing: the speed-up is then the tokens per pass."""
    assert round(expected_tokens(alpha, k), 2) == speed
    assert expected_tokens(alpha, k) == pytest.approx((1 - alpha ** (k + 1)) / (1 - alpha))
    assert round(expected_speed_up(alpha, k, 0), 2) == speed


def test_the_ends():
    assert expected_tokens(0, 5) == expected_tokens(0.7, 0) == 1 and expected_tokens(1, 5) == 6
    assert expected_speed_up(1, 5, 1) == 1  # a draft as slow as the target gains nothing


@pytest.mark.parametrize("alpha, k", [(0.5, 3), (0.6, 4), (0.7, 6), (0.8, 8), (0.9, 13)])
def test_best_k(alpha, k):
    assert best_k(alpha, 0.05) == k


def test_some_guess_pays_exactly_if_alpha_exceeds_c():
    """Corollary 3.9."""
    assert best_k(0.3, 0.31) == 0 and best_k(0.3, 0.29) >= 1
