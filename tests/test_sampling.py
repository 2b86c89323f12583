"""From logits to laws, and from laws to tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specdec import bernoulli, categorical, to_probs

LOGITS = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64).log()


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, [0.5, 0.25, 0.125, 0.125]),
        ({"temperature": 0.5}, [16 / 22, 4 / 22, 1 / 22, 1 / 22]),  # squares: 1/4, 1/16, 1/64, 1/64
        ({"temperature": 0}, [1, 0, 0, 0]),
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_k": 9}, [0.5, 0.25, 0.125, 0.125]),
        ({"top_p": 0.5}, [1, 0, 0, 0]),  # the best token reaches the mass alone
        ({"top_p": 0.51}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_p": 1e-9}, [1, 0, 0, 0]),
        ({"top_p": 1}, [0.5, 0.25, 0.125, 0.125]),
        ({"top_k": 2, "top_p": 0.66}, [1, 0, 0, 0]),  # after top-k the best token has 2/3; before, .5 (mutants.py C12)
    ],
)
def test_laws_by_hand(options, expected):
    torch.testing.assert_close(to_probs(LOGITS, **options), torch.tensor(expected, dtype=torch.float64))


@given(
    st.lists(st.floats(-1e4, 1e4), min_size=2, max_size=9),
    st.sampled_from([0, 1e-300, 1e-30, 1e-3, 0.7, 1.0, 3.0, 1e6]),
    st.one_of(st.none(), st.integers(1, 10)),
    st.one_of(st.none(), st.floats(1e-6, 1)),
)
def test_every_law_is_a_law(logits, temperature, top_k, top_p):
    probs = to_probs(torch.tensor([logits]), temperature, top_k, top_p)
    assert probs.dtype == torch.float32 and (probs >= 0).all()
    assert probs.sum().item() == pytest.approx(1, abs=1e-5)
    assert probs[0, torch.tensor(logits).argmax()] == probs.max()
    assert (probs > 0).sum() <= (top_k or 10)


def test_a_tiny_temperature_is_nearly_greedy_and_not_nan():
    """mutants.py K5: logits / 1e-38 overflows to inf, and inf - inf is NaN."""
    for temperature in (1e-38, 1e-300):  # the latter is 0 in float32
        assert to_probs(torch.tensor([1e4, 9e3, 9e3]), temperature).tolist() == [1, 0, 0]
    assert to_probs(torch.tensor([1.0, 3.0, 2.0]), top_p=1e-300).tolist() == [0, 1, 0]


def test_a_law_is_float32_or_better_and_leaves_the_logits_alone():
    logits = torch.randn(2, 3, 50)
    before = logits.clone()
    for options in ({}, {"temperature": 0}, {"temperature": 0.5, "top_k": 3, "top_p": 0.8}):
        assert to_probs(logits, **options).shape == logits.shape
        assert to_probs(logits.bfloat16(), **options).dtype == torch.float32
        assert to_probs(logits.double(), **options).dtype == torch.float64
    assert torch.equal(logits, before)


def test_a_coin_with_u_0_is_still_strict(monkeypatch):
    """u = 0 does come up, once in 2^24 float32 draws: `u <= prob` would then let an impossible token pass, and log u is not finite."""
    monkeypatch.setattr(torch, "rand", lambda shape, dtype=None, **_: torch.zeros(shape, dtype=dtype))
    assert bernoulli(torch.tensor([0.0, 1e-9, 1.0])).tolist() == [False, True, True]
    assert categorical(torch.tensor([0.0, 0.5, 0.5])) > 0


def test_frequencies():
    """10^6 draws: every frequency within 6 standard errors. A false alarm is a matter of 1e-8, but the seed is fixed anyway."""
    n, probs = 10**6, torch.tensor([0.0, 0.6, 0.3, 0.0, 0.1])
    generator = torch.Generator().manual_seed(0)
    tokens = categorical(probs.expand(n, 5), generator)
    coins = bernoulli(probs.expand(n, 5), generator).double().mean(0)
    for v, p in enumerate(probs.tolist()):
        error = 6 * (p * (1 - p) / n) ** 0.5
        assert abs((tokens == v).double().mean() - p) <= error
        assert abs(coins[v] - p) <= error


def test_a_token_of_probability_0_never_wins():
    probs = torch.full((1000, 1000), 1e-30)
    probs[:, ::2] = 0
    assert (categorical(probs, torch.Generator().manual_seed(0)) % 2 == 1).all()


def test_drawing_leaves_its_input_alone_and_uses_no_global_state():
    probs = torch.rand(3, 4)
    before, state = probs.clone(), torch.get_rng_state()
    categorical(probs, torch.Generator().manual_seed(0)), bernoulli(probs, torch.Generator().manual_seed(0))
    assert torch.equal(probs, before) and torch.equal(torch.get_rng_state(), state)
