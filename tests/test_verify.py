"""The rejection rule alone: by hand, and its exact distribution for any that hypothesis draws.

Tests named `accept` look only at the number of accepted guesses, `residual` at the token after a
rejection, `bonus` at the token after the last guess.
"""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import specdec
from enumerator import HINT, exact_distribution, joint, outcomes
from extras import accept_typical_lossy
from specdec import ratio, residual, verify
from specdec import bernoulli as coin
from specdec import categorical as draw


def distribution(weights):
    """Weights (.., V), rescaled so that each row sums to 1: float64."""
    weights = torch.as_tensor(weights, dtype=torch.float64)
    return weights / weights.sum(-1, keepdim=True)


def judged(target_probs, draft_probs, guesses, rule=verify):
    """{(n_accepted, next_token): probability} of one row, exactly."""
    out = {}
    for (n, token), probability in outcomes(lambda: rule(target_probs, draft_probs, guesses, None)):
        key = n.item(), token.item()
        out[key] = out.get(key, 0) + probability
    return out


def chance_of_n(*case, **options):
    """{n_accepted: probability}"""
    out = {}
    for (n, _), probability in judged(*case, **options).items():
        out[n] = out.get(n, 0) + probability
    return out


@pytest.fixture
def drawn_from(monkeypatch, ours):
    """What verify hands to categorical, in order; the likeliest token is the answer."""
    seen = []

    def likeliest(probs, generator=None):
        seen.append(probs)
        return probs.argmax(-1)

    monkeypatch.setattr(specdec, "categorical", likeliest)
    return seen


# README's example, and a distribution for the bonus.
TARGET, DRAFT = distribution([[[7, 3], [1, 4]]]), distribution([[[1, 1]]])
NAN = float("nan")


def test_ratio_by_itself():
    """.7 / .5 and .3 / .5; nothing where nothing was guessed, or something broken."""
    target = distribution([[7, 3]] * 4)
    draft = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0, 0], [NAN, NAN]], dtype=torch.float64)
    expected = pytest.approx([1.4, 0.6, 0, 0])
    assert ratio(target, draft, torch.tensor([0, 1, 0, 1])).tolist() == expected


def test_residual_by_itself():
    """max(0, (.7, .3) - (.5, .5)) = (.2, 0), scaled to (1, 0). Of equal or broken distributions
    nothing is left, and the target's own stays."""
    target = distribution([[7, 3]] * 4)
    draft = torch.tensor([[0.5, 0.5], [0, 0], [0.7, 0.3], [NAN, NAN]], dtype=torch.float64)
    expected = distribution([[1, 0], [7, 3], [7, 3], [7, 3]])
    torch.testing.assert_close(residual(target, draft), expected)


def test_accept_by_hand():
    """Token 0 is accepted with probability min(1, .7 / .5) = 1, token 1 with .3 / .5 = .6."""
    assert chance_of_n(TARGET, DRAFT, torch.tensor([[0]])) == pytest.approx({1: 1})
    assert chance_of_n(TARGET, DRAFT, torch.tensor([[1]])) == pytest.approx({0: 0.4, 1: 0.6})


def test_accept_two_guesses_by_hand():
    """The second guess has a chance only if the first was accepted: .6, then .2 / .8 = .25."""
    target, draft = distribution([[[7, 3], [8, 2], [1, 1]]]), distribution([[[1, 1], [2, 8]]])
    expected = pytest.approx({0: 0.4, 1: 0.6 * 0.75, 2: 0.6 * 0.25})
    assert chance_of_n(target, draft, torch.tensor([[1, 1]])) == expected


def test_accept_stops_at_the_first_rejection():
    """Guesses that are sure to be right, or sure to be wrong."""
    sure, guesses = torch.eye(3).double(), torch.tensor([[0, 0, 2], [1, 1, 2]])
    n_accepted, _ = verify(sure[torch.tensor([[0, 1, 2, 0]] * 2)], sure[guesses], guesses)
    assert n_accepted.tolist() == [1, 0]


def test_residual_by_hand():
    """After a rejection: max(0, (.7, .3) - (.5, .5)) = (.2, 0), scaled to (1, 0)."""
    after = judged(TARGET, DRAFT, torch.tensor([[1]]))
    assert {key: p for key, p in after.items() if key[0] == 0} == pytest.approx({(0, 0): 0.4})


def test_residual_of_three_tokens_by_hand():
    """(.5, .3, .2) - (.2, .2, .6) leaves (.3, .1, 0), which is (.75, .25, 0)."""
    target, draft = distribution([[[5, 3, 2], [1, 1, 1]]]), distribution([[[1, 1, 3]]])
    after = judged(target, draft, torch.tensor([[2]]))
    rejected = {token: p for (n, token), p in after.items() if n == 0}
    assert rejected == pytest.approx({0: 2 / 3 * 0.75, 1: 2 / 3 * 0.25})


def test_residual_in_real_draws():
    """The same with your own `bernoulli` and `categorical`: elsewhere all outcomes take their
    place, and it would not show if one leaves it to the other to rescale. A frequency out of 2000
    is within 6 standard errors; the seed is fixed."""
    target, draft = distribution([[[5, 3, 2], [1, 1, 1]]]), distribution([[[1, 1, 3]]])
    many = (x.expand(2000, *x.shape[1:]) for x in (target, draft, torch.tensor([[2]])))
    n, token = verify(*many, torch.Generator().manual_seed(0))
    for got, p in ((n == 0, 2 / 3), ((token[n == 0] == 0), 0.75), ((token[n == 0] == 1), 0.25)):
        assert abs(got.double().mean() - p) < 6 * (p * (1 - p) / len(got)) ** 0.5


def test_residual_is_that_of_the_first_rejected_guess():
    """Rejected at once, after one guess, after two: each place has its own residual."""
    sure = torch.eye(3).double()
    target = distribution([[1, 1, 0], [0, 1, 1], [1, 0, 1], [1, 1, 1]])[None]
    for n, expected in enumerate(({0, 1}, {1, 2}, {0, 2})):
        guesses = torch.tensor([[0, 1, 0]])
        guesses[0, n] = (2, 0, 1)[n]  # where the target has no mass; elsewhere sure to be drawn
        draft = sure[guesses]
        ones = torch.where(torch.arange(4) < n, 1.0, 0.0)[None, :, None]
        mixed = (ones * sure[torch.tensor([0, 1, 0, 0])] + (1 - ones) * target)
        assert set(judged(mixed, draft, guesses)) == {(n, token) for token in expected}


def test_bonus_by_hand():
    """After full acceptance: what the target says behind the last guess, (.2, .8), untouched."""
    after = judged(TARGET, DRAFT, torch.tensor([[1]]))
    bonus = {token: p for (n, token), p in after.items() if n == 1}
    assert bonus == pytest.approx({0: 0.6 * 0.2, 1: 0.6 * 0.8}, abs=1e-15)


def test_bonus_is_plain_sampling_where_nothing_is_guessed():
    """k = 0: one token, of the target's distribution."""
    after = judged(TARGET[:, :1], DRAFT[:, :0], torch.zeros(1, 0, dtype=torch.int64))
    assert after == pytest.approx({(0, 0): 0.7, (0, 1): 0.3}, abs=1e-15)


def test_the_example_worked_by_hand():
    """Target (.7, .3), draft (.5, .5), the docstring's and README's: the output has (.7, .3)."""
    first = exact_distribution(verify, TARGET[0], DRAFT[0]).sum(1)
    torch.testing.assert_close(first, distribution([7, 3]), rtol=0, atol=1e-15)


weights = st.lists(st.integers(0, 20), min_size=3, max_size=3).filter(any)
cases = st.integers(0, 3).flatmap(
    lambda k: st.tuples(
        st.lists(weights, min_size=k + 1, max_size=k + 1), st.lists(weights, min_size=k, max_size=k)
    )
)


@given(cases)
def test_the_distribution_of_a_round_is_the_targets(case):
    """For any target and draft, zeros and one-hots among them: joint distribution of k+1 tokens,
    error under 1e-12."""
    target, draft = case
    exact = exact_distribution(verify, target, draft)
    torch.testing.assert_close(exact, joint(distribution(target)), rtol=0, atol=1e-12)


@given(weights, weights)
def test_accepts_a_guess_with_probability_1_minus_tv(p, q):
    """Leviathan et al. 2022, Corollary 3.6: E[accepted] = sum min(target_probs, draft_probs)."""
    target, draft = distribution([p, p]), distribution([q])

    def accepted():
        return verify(target[None], draft[None], specdec.categorical(draft[None]))[0].item()

    mean = sum(n * probability for n, probability in outcomes(accepted))
    assert mean == pytest.approx(torch.minimum(target[0], draft[0]).sum().item(), abs=1e-12)


def test_inputs_are_left_alone():
    """mutants.py B7: zeroing the rejected token in place damages what is used next."""
    target, draft = torch.rand(4, 4, 5).softmax(-1), torch.rand(4, 3, 5).softmax(-1)
    tokens = torch.randint(5, (4, 3))
    before = target.clone(), draft.clone(), tokens.clone()
    verify(target, draft, tokens, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(before, (target, draft, tokens)))


def test_nothing_impossible_passes_even_when_u_is_0(monkeypatch):
    def zeros(*shape, generator=None, dtype=None, **_):
        return torch.zeros(*shape, dtype=dtype or torch.float64)

    monkeypatch.setattr(torch, "rand", zeros)
    target, draft = distribution([[[0, 1], [1, 1]]]), distribution([[[1, 0]]])
    n, token = verify(target, draft, torch.tensor([[0]]))
    assert (n.item(), token.item()) == (0, 1)


def test_equal_distributions_accept_everything():
    target = distribution([[[1, 2], [3, 1]]])
    after = judged(target, target[:, :1], torch.tensor([[1]]))
    assert after == pytest.approx({(1, 0): 0.75, (1, 1): 0.25})


def test_rounding_may_say_no_to_equals_and_leave_no_residual():
    """Every draft probability is the target's and one unit of rounding more. So a coin of 1 - 1e-16
    may say no; and nothing is left to draw from. The target's own takes its place."""
    target = distribution([[[1, 2, 3], [3, 1, 1]]])
    draft = torch.nextafter(target[:, :1], torch.tensor(2.0, dtype=torch.float64))
    after = judged(target, draft, torch.tensor([[1]]))
    rejected = torch.tensor([after[0, token] for token in range(3)], dtype=torch.float64)
    assert 0 < rejected.sum() < 1e-15
    torch.testing.assert_close(distribution(rejected), target[0, 0], rtol=1e-6, atol=0)


def test_equal_distributions_need_no_residual(monkeypatch, drawn_from):
    """The same, whatever made the coin say no (mutants.py K2)."""
    target = distribution([[[1, 2], [3, 1]]])
    monkeypatch.setattr(specdec, "bernoulli", lambda probs, generator=None: probs != 1)
    n, _ = verify(target, target[:, :1], torch.tensor([[1]]))
    assert n.item() == 0 and torch.equal(drawn_from[0], target[:, 0])


def test_a_draft_of_nan_is_rejected_in_favour_of_the_targets_distribution(drawn_from):
    target = distribution([[[1, 2], [3, 1]]])
    n, _ = verify(target, torch.full((1, 1, 2), NAN).double(), torch.tensor([[1]]))
    assert n.item() == 0 and torch.equal(drawn_from[0], target[:, 0])


def test_zero_rows_mean_no_guess():
    """Where draft_probs is 0 nothing was guessed, as in rows that guess fewer tokens than others.
    The round ends there with the target's own distribution, whatever the token says."""
    target = distribution([[[0, 1], [1, 0], [0, 1]]]).expand(2, 3, 2)
    draft = torch.zeros(2, 2, 2).double()
    draft[1, 0] = torch.tensor([0, 1])
    n, token = verify(target, draft, torch.tensor([[1, 0], [1, 0]]))
    hint = "where draft_probs is 0 nothing was guessed: it cannot be accepted"
    assert n.tolist() == [0, 1] and token.tolist() == [1, 0], hint
    after = judged(TARGET, 0 * DRAFT, torch.tensor([[0]]))
    assert after == pytest.approx({(0, 0): 0.7, (0, 1): 0.3}, abs=1e-15)


def test_all_chance_comes_from_the_generator():
    target, draft = (p.expand(128, *p.shape[1:]) for p in (TARGET, DRAFT))
    guesses = torch.arange(128)[:, None] % 2

    def judge(seed):
        n, token = verify(target, draft, guesses, torch.Generator().manual_seed(seed))
        return n.tolist(), token.tolist()

    hint = "hand the generator on to `bernoulli` and `categorical`: equal seeds, equal verdicts"
    assert judge(0) == judge(0) and judge(0)[0] != judge(1)[0] and judge(0)[1] != judge(1)[1], hint


def test_rows_do_not_mix():
    """In one row all guesses are accepted, in one none, in one the first."""
    sure = torch.eye(3).double()
    target = sure[torch.tensor([[0, 1, 2], [0, 1, 2], [0, 1, 2]])]
    guesses = torch.tensor([[0, 1], [1, 1], [0, 0]])
    n, token = verify(target, sure[guesses], guesses)
    assert n.tolist() == [2, 0, 1] and token.tolist() == [2, 0, 1]
    assert n.dtype == token.dtype == torch.int64


def test_rows_are_independent():
    """Two rows have the product of their distributions: no coin and no draw is shared."""
    target = torch.cat((TARGET, distribution([[[4, 6], [1, 1]]])))
    draft, guesses = torch.cat((DRAFT, distribution([[[9, 1]]]))), torch.tensor([[1], [0]])
    got = {}
    for (n, token), probability in outcomes(lambda: verify(target, draft, guesses)):
        key = tuple(zip(n.tolist(), token.tolist()))
        got[key] = got.get(key, 0) + probability
    cases = ([x[b : b + 1] for x in (target, draft, guesses)] for b in (0, 1))
    first, second = (judged(*case) for case in cases)
    assert got == pytest.approx({(a, b): first[a] * second[b] for a in first for b in second})


# -- the enumerator: any exact rule passes, however it draws, and no other


def in_loops(draw_coin, draw_token):
    """Algorithm 1 to the letter: a loop over rows, and over guesses up to the first rejection."""

    def rule(target_probs, draft_probs, draft_tokens, generator=None):
        n_accepted, tokens = [], []
        for target, draft, guesses in zip(target_probs, draft_probs, draft_tokens):
            n, left = 0, target[-1]
            for i, x in enumerate(guesses.tolist()):
                p, q = target[i, x].item(), draft[i, x].item()
                if q > 0 and draw_coin(p, q, generator):
                    n += 1
                    continue
                left = (target[i] - draft[i]).clamp(min=0)
                left = left if left.sum() > 0 else target[i]
                break
            n_accepted.append(n)
            tokens.append(int(draw_token(left, generator)))
        return torch.tensor(n_accepted), torch.tensor(tokens)

    return rule


def by_rand(p, q, generator):
    return torch.rand((), generator=generator) < p / q


def by_item(p, q, generator):
    return not torch.rand(1, generator=generator).item() >= min(1, p / q)


def by_product(p, q, generator):
    return p > torch.rand((), generator=generator, dtype=torch.float64) * q


def by_torch_bernoulli(p, q, generator):
    return torch.tensor(min(1, p / q), dtype=torch.float64).bernoulli(generator=generator) == 1


def by_coin(p, q, generator):
    return coin(torch.tensor(p / q, dtype=torch.float64), generator)  # may be above 1


def by_multinomial(probs, generator):
    return torch.multinomial(probs, 1, generator=generator)


def by_method(probs, generator):
    return (probs / probs.sum()).multinomial(2, replacement=True, generator=generator)[0]


def by_cumsum(probs, generator):
    u = torch.rand(1, generator=generator)
    return (u > (probs / probs.sum()).cumsum(0)[:-1]).sum()


def all_at_once(target_probs, draft_probs, draft_tokens, generator=None):
    """torch.bernoulli for all guesses in one call, and a multinomial of every residual."""
    B, k = draft_tokens.shape
    x = draft_tokens[..., None]
    r = (target_probs[:, :-1].gather(-1, x) / draft_probs.gather(-1, x))[..., 0]
    yes = torch.bernoulli(r.clamp(0, 1), generator=generator).bool()
    n = torch.where(yes.all(1), k, (~yes).int().argmax(1) if k else 0)
    padded = torch.cat((draft_probs, torch.zeros_like(target_probs[:, :1])), 1)
    left = (target_probs - padded).clamp(min=0) + 1e-300 * target_probs
    tokens = torch.multinomial(left.flatten(0, 1), 1, generator=generator).view(B, k + 1)
    return n, tokens.gather(1, n[:, None])[:, 0]


OTHER_WAYS = {
    "rand, multinomial": in_loops(by_rand, by_multinomial),
    "item, draw": in_loops(by_item, draw),
    "product, method": in_loops(by_product, by_method),
    "torch.bernoulli, cumsum": in_loops(by_torch_bernoulli, by_cumsum),
    "coin, draw": in_loops(by_coin, draw),
    "all at once": all_at_once,
    "partial": functools.partial(verify, generator=None),
}


@pytest.mark.parametrize("name", OTHER_WAYS)
def test_other_right_ways_have_the_distribution_too(name):
    """However they import `bernoulli` and `categorical`, or if they draw with torch itself."""

    def rule(target_probs, draft_probs, draft_tokens, generator=None):
        return OTHER_WAYS[name](target_probs, draft_probs, draft_tokens, generator=generator)

    for target, draft in (
        ([[0.7, 0.3], [0.2, 0.8]], [[0.5, 0.5]]),
        ([[5, 3, 2], [1, 0, 4], [0, 1, 1]], [[2, 2, 6], [0, 1, 0]]),
        (torch.tensor([[0.1, 0.9]]), []),
    ):
        exact = exact_distribution(rule, target, draft)
        torch.testing.assert_close(exact, joint(distribution(target)), rtol=0, atol=1e-12)


def test_a_rule_that_is_not_exact_shows():
    def always(target_probs, draft_probs, draft_tokens, generator):
        return torch.full((1,), draft_tokens.shape[1]), draw(target_probs[:, -1], generator)

    def from_the_target(*args):
        n_accepted, _ = verify(*args)
        return n_accepted, draw(args[0][torch.arange(1), n_accepted], args[3])

    for rule, off in (always, 0.2), (from_the_target, 0.06), (accept_typical_lossy, 0.2):
        error = exact_distribution(rule, TARGET[0], DRAFT[0]) - joint(TARGET[0])
        assert error.abs().sum() / 2 == pytest.approx(off)


def exponentials(probs, generator):
    return (probs / torch.empty_like(probs).exponential_(generator=generator)).argmax(-1)


def global_exponentials(probs, generator):
    return (probs / torch.empty_like(probs).exponential_()).argmax(-1)


def logarithms(probs, generator):
    return (-torch.rand(probs.shape, generator=generator).log() / probs).argmin(-1)


@pytest.mark.parametrize("way", [exponentials, global_exponentials, logarithms])
def test_a_draw_that_cannot_be_enumerated_is_refused_with_a_hint(way):
    def rule(target_probs, draft_probs, draft_tokens, generator):
        return torch.zeros(1, dtype=torch.int64), way(target_probs[:, 0], generator)

    with pytest.raises(TypeError) as error:
        exact_distribution(rule, [[0.7, 0.3], [0.2, 0.8]], [[0.5, 0.5]])
    assert str(error.value) == HINT


def test_outcomes_leave_everything_as_it_was():
    names = [(torch, "rand"), (torch, "bernoulli"), (torch, "multinomial"), (specdec, "bernoulli"),
             (specdec, "categorical"), (specdec.Coupled, "draw")]  # fmt: skip
    before = [getattr(owner, name) for owner, name in names]
    methods = set(vars(torch.Tensor))
    with pytest.raises(ZeroDivisionError):
        list(outcomes(lambda: 1 / 0))
    exact_distribution(verify, TARGET[0], DRAFT[0])
    assert [getattr(owner, name) for owner, name in names] == before
    assert set(vars(torch.Tensor)) == methods and (coin, draw) == tuple(before[3:5])
