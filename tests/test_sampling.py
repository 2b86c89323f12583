"""From logits to distributions (`hand`, `temperature`), and from distributions to tokens."""

import math

import pytest
import torch
from hypothesis import assume, given
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
        # After top-k the best token has 2/3; before, .5 (mutants.py C12).
        ({"top_k": 2, "top_p": 0.66}, [1, 0, 0, 0]),
        # Squared the best token has 16/22 = .73, unsquared .5; and top-k keeps 16/20 and 4/20.
        ({"temperature": 0.5, "top_p": 0.7}, [1, 0, 0, 0]),
        ({"temperature": 0.5, "top_k": 2}, [0.8, 0.2, 0, 0]),
        ({"temperature": 0.5, "top_k": 2, "top_p": 0.79}, [1, 0, 0, 0]),
        ({"temperature": 0, "top_k": 2, "top_p": 0.9}, [1, 0, 0, 0]),
    ],
)
def test_distributions_by_hand(options, expected):
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(to_probs(LOGITS, **options), expected)


def slow_to_probs(logits, temperature, top_k, top_p):
    """The same for one list of different numbers, step by step, without a tensor."""
    ranked = sorted(range(len(logits)), key=lambda token: -logits[token])
    if temperature == 0:
        kept = {ranked[0]: 1.0}
    else:
        best = logits[ranked[0]]
        kept = {token: math.exp((logits[token] - best) / temperature) for token in ranked}
    if top_k is not None:
        kept = {token: kept[token] for token in list(kept)[:top_k]}
    total = math.fsum(kept.values())
    kept = {token: weight / total for token, weight in kept.items()}
    if top_p is not None:
        before, few = 0.0, {}
        for token, weight in kept.items():
            if before >= top_p:
                break
            few[token] = weight
            before += weight
            # Where a sum is the threshold itself, up to rounding, either answer is right.
            assume(abs(before - top_p) > 1e-9 or before > 1 - 1e-9)
        kept = few
    total = math.fsum(kept.values())
    return [kept.get(token, 0.0) / total for token in range(len(logits))]


temperatures = st.sampled_from([0, 0.25, 0.5, 1.0, 2.0, 5.0])


@given(
    st.lists(st.integers(-20, 20), min_size=2, max_size=9, unique=True),
    temperatures,
    st.none() | st.integers(1, 10),
    st.none() | st.floats(0.01, 0.99) | st.just(1.0),
)
def test_temperature_then_top_k_then_top_p(numbers, temperature, top_k, top_p):
    """Against a slow one, in every combination and in a batch. In another order it is another
    distribution: a temperature changes which tokens reach top_p, and so does top_k."""
    logits = [number / 4 for number in numbers]
    expected = slow_to_probs(logits, temperature, top_k, top_p)
    rows = torch.tensor([logits, [9.0] * len(logits), logits], dtype=torch.float64)
    rows[1, 0] = 10
    got = to_probs(rows, temperature, top_k, top_p)
    for row in got[0], got[2]:
        assert row.tolist() == pytest.approx(expected, abs=1e-12), "temperature, top_k, top_p"
    assert ((got[0] > 0) == torch.tensor([p > 0 for p in expected])).all()


@given(
    st.lists(st.floats(-1e4, 1e4), min_size=2, max_size=9),
    st.sampled_from([0, 1e-300, 1e-30, 1e-3, 0.7, 1.0, 3.0, 1e6]),
    st.none() | st.integers(1, 10),
    st.none() | st.floats(1e-6, 1),
)
def test_at_any_temperature_it_is_a_distribution(logits, temperature, top_k, top_p):
    logits = torch.tensor([logits])
    probs = to_probs(logits, temperature, top_k, top_p)
    assert probs.dtype in (torch.float32, torch.float64)
    hint = "if numbers overflow: subtract the best logit before you divide by a tiny temperature"
    hint += "; and 1e-300 is 0 in float32"
    assert (probs >= 0).all() and probs.sum().item() == pytest.approx(1, abs=1e-5), hint
    assert logits[0, probs.argmax()] == logits.max()  # the best token, or one as good
    assert (probs > 0).sum() <= (top_k or 10), "no more than top_k, also where some are equal"


def test_a_tiny_temperature_is_nearly_greedy_and_not_nan():
    """mutants.py K5: logits / 1e-38 overflows to inf, and inf - inf is NaN. So make the best logit
    0 before you divide."""
    hint = "1e-300 is 0 in float32; yet the best token stays, and nothing is divided by 0"
    for temperature in (1e-38, 1e-300):
        assert to_probs(torch.tensor([1e4, 9e3, 9e3]), temperature).tolist() == [1, 0, 0], hint
    assert to_probs(torch.tensor([1.0, 3.0, 2.0]), top_p=1e-300).tolist() == [0, 1, 0], hint


def test_a_small_temperature_is_not_greedy():
    probs = to_probs(torch.tensor([0.0, 1e-4]).double(), temperature=5e-4)
    torch.testing.assert_close(probs, torch.tensor([0.0, 0.2]).double().softmax(-1))


def test_a_huge_temperature_divides_like_any_other():
    probs = to_probs(torch.tensor([1e6, 0.0]).double(), temperature=1e6)
    torch.testing.assert_close(probs, torch.tensor([1.0, 0.0]).double().softmax(-1))


def test_a_top_p_of_1_is_no_filter(ours):
    """Also where the best token has all the mass, but for the rounding of float32."""
    logits = torch.tensor([0.0, -30.0])
    probs = to_probs(logits, top_p=1.0)
    assert probs[0] == 1 and probs[1] > 0 and torch.equal(probs, to_probs(logits))


def test_equal_tokens_up_to_the_mass_by_hand():
    """Of eight equal tokens six reach .75, and no fewer: no more than six are kept."""
    for n in range(1, 9):
        probs = to_probs(torch.zeros(3, 8), top_p=n / 8)
        assert ((probs > 0).sum(-1) == n).all()
        torch.testing.assert_close(probs.amax(-1), torch.full((3,), 1 / n), check_dtype=False)


def test_the_fewest_tokens_by_hand_also_where_sums_are_rounded(ours):
    """huggingface/transformers#18976: of ten equal tokens six reach .6. To sum with a token, and
    subtract it again, rounds to less than what stands before it."""
    assert (to_probs(torch.zeros(10), top_p=0.6) > 0).sum() == 6
    assert (to_probs(torch.zeros(10, dtype=torch.float64), top_p=0.6) > 0).sum() == 6


def test_at_any_temperature_float32_or_better_and_the_logits_left_alone():
    logits = torch.randn(2, 3, 50)
    before = logits.clone()
    filters = {"temperature": 0.5, "top_k": 3, "top_p": 0.8}
    for options in ({}, {"temperature": 0}, filters):
        assert to_probs(logits, **options).shape == logits.shape
        for narrow in (logits.bfloat16(), logits.half()):
            assert to_probs(narrow, **options).dtype in (torch.float32, torch.float64)
        assert to_probs(logits.double(), **options).dtype == torch.float64
    assert torch.equal(logits, before)


def test_float32_is_enough_for_logits_that_are_no_better(ours):
    """float64 would be right, too, but there is twice as much of it to read and to write."""
    for options in ({}, {"temperature": 0}, {"temperature": 0.5, "top_k": 3, "top_p": 0.8}):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            assert to_probs(torch.randn(3, 9, dtype=dtype), **options).dtype == torch.float32


# -- chance


def all_the_same(number):
    """In place of torch.rand: this number, rounded down to what it can return in a dtype."""

    def rand(*shape, generator=None, dtype=None, **_):
        steps = 2.0 ** (53 if dtype == torch.float64 else 24)
        return torch.full(torch.empty(*shape).shape, int(number * steps) / steps, dtype=dtype)

    return rand


def test_a_coin_with_u_0_is_still_strict(monkeypatch):
    """u = 0 does come up. `u <= prob` would then let an impossible token pass, and log u is not
    finite."""
    monkeypatch.setattr(torch, "rand", all_the_same(0))
    assert bernoulli(torch.tensor([0.0, 1.0])).tolist() == [False, True]
    assert categorical(torch.tensor([0.0, 0.5, 0.5])) > 0
    assert (categorical(torch.tensor([[0.0, 0.5, 0.5]] * 3)) > 0).all()


def test_a_coin_with_u_0_says_yes_to_all_that_is_possible(monkeypatch, ours):
    monkeypatch.setattr(torch, "rand", all_the_same(0))
    assert bernoulli(torch.tensor([0.0, 1e-9, 1.0])).tolist() == [False, True, True]


def test_coins_are_finer_than_float32(monkeypatch, ours):
    """vllm-project/vllm-ascend#13470: torch.rand in float32 is a multiple of 2^-24, so 0 comes up
    that often, and every coin with it, were its probability 1e-12."""
    monkeypatch.setattr(torch, "rand", all_the_same(2.0**-30))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        probs = torch.tensor([1e-12, 1e-9, 1e-8], dtype=dtype)
        assert bernoulli(probs).tolist() == [False, True, True]
    tokens = categorical(torch.tensor([[1e-12, 1.0], [1.0, 1e-12]]))
    assert tokens.tolist() == [1, 0]


def test_coins_have_no_floor():
    """10^6 coins of 2^-40: a yes at all is a matter of 1e-6, but the seed is fixed anyway."""
    probs = torch.full((10**6,), 2.0**-40)
    assert not bernoulli(probs, torch.Generator().manual_seed(0)).any()


def test_shapes_and_dtypes_of_draws():
    generator = torch.Generator().manual_seed(0)
    for shape in (5,), (2, 5), (2, 3, 5), (0, 5), (2, 0, 5):
        probs = torch.full(shape, 0.2)
        coins, tokens = bernoulli(probs, generator), categorical(probs, generator)
        assert coins.shape == shape and coins.dtype == torch.bool
        assert tokens.shape == shape[:-1] and tokens.dtype == torch.int64
        assert ((tokens >= 0) & (tokens < 5)).all()


def test_frequencies():
    """10^6 draws: every frequency within 6 standard errors. A false alarm is a matter of 1e-8, but
    the seed is fixed anyway."""
    n, probs = 10**6, torch.tensor([0.0, 0.6, 0.3, 0.0, 0.1])
    generator = torch.Generator().manual_seed(0)
    tokens = categorical(probs.expand(n, 5), generator)
    coins = bernoulli(probs.expand(n, 5), generator).double().mean(0)
    for v, p in enumerate(probs.tolist()):
        error = 6 * (p * (1 - p) / n) ** 0.5
        assert abs((tokens == v).double().mean() - p) <= error
        assert abs(coins[v] - p) <= error


def test_draws_are_independent():
    """Of rows, of places in a row, and of one call and the next: a pair has the product of the two
    probabilities, within 6 standard errors. One number for a whole row would be right alone."""
    n, probs = 10**5, torch.tensor([0.2, 0.3, 0.5])
    generator = torch.Generator().manual_seed(0)
    calls = [bernoulli(torch.full((2, n), 0.3), generator) for _ in range(2)]
    calls += [bernoulli(torch.full((n, 2), 0.3), generator).T]
    calls += [categorical(probs.expand(2, n, 3), generator) == 1 for _ in range(2)]
    calls += [(categorical(probs.expand(n, 2, 3), generator) == 1).T]
    for call in calls:
        assert abs(call.double().mean() - 0.3) < 6 * (0.3 * 0.7 / (2 * n)) ** 0.5
        neighbours = [(call[0], call[1]), (call[0], call[0].roll(1)), (call[1], call[1].roll(7))]
        for one, other in neighbours + [(one[0], call[1]) for one in calls if one is not call]:
            both = (one & other).double().mean()
            assert abs(both - 0.09) < 6 * (0.09 * 0.91 / n) ** 0.5


def test_a_token_of_probability_0_never_wins():
    probs = torch.zeros(1000, 1000)
    probs[:, 1::2] = 1 / 500
    assert (categorical(probs, torch.Generator().manual_seed(0)) % 2 == 1).all()


def test_a_token_of_probability_0_never_wins_against_tiny_ones(ours):
    probs = torch.full((1000, 1000), 1e-30)
    probs[:, ::2] = 0
    assert (categorical(probs, torch.Generator().manual_seed(0)) % 2 == 1).all()


def test_drawing_leaves_its_input_alone_and_uses_no_global_state():
    probs = torch.rand(3, 4).softmax(-1)
    before, state = probs.clone(), torch.get_rng_state()
    for draw in (categorical, bernoulli):
        first = draw(probs, torch.Generator().manual_seed(0))
        assert torch.equal(first, draw(probs, torch.Generator().manual_seed(0)))
    assert torch.equal(probs, before) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("draw", [bernoulli, categorical])
def test_random_numbers_are_as_fine_as_float64(draw, monkeypatch, ours):
    """In float32 a chance of 1e-12 would come true at 2^-24; rare tokens would win too rarely."""
    asked, rand = [], torch.rand
    monkeypatch.setattr(torch, "rand", lambda *a, **o: asked.append(o["dtype"]) or rand(*a, **o))
    draw(torch.full((3, 4), 0.25))
    assert asked == [torch.float64]
