"""The rejection rule alone: by hand, and its exact law for laws that hypothesis draws."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import specdec
from enumerator import outcomes
from specdec import ratio, residual, verify


def law_of(weights):
    weights = torch.tensor(weights, dtype=torch.float64)
    return weights / weights.sum(-1, keepdim=True)


@pytest.fixture
def drawn_from(monkeypatch):
    """The laws that verify hands to categorical, in order; the likeliest token is the answer."""
    seen = []
    monkeypatch.setattr(specdec, "categorical", lambda probs, generator=None, ahead=0: seen.append(probs) or probs.argmax(-1))
    return seen


TARGET, DRAFT = law_of([[[7, 3], [1, 4]]]), law_of([[[1, 1]]])  # README's example, and a law for the bonus


def test_ratio_by_itself():
    """.7 / .5 and .3 / .5; nothing where nothing was guessed, or something broken."""
    target, draft = law_of([[7, 3]] * 4), torch.tensor([[0.5, 0.5], [0.5, 0.5], [0, 0], [float("nan")] * 2], dtype=torch.float64)
    assert ratio(target, draft, torch.tensor([0, 1, 0, 1])).tolist() == pytest.approx([1.4, 0.6, 0, 0])


def test_residual_by_itself():
    """max(0, (.7, .3) - (.5, .5)) = (.2, 0), scaled to (1, 0); of equal or broken laws nothing is left, and the target's law stays."""
    target, draft = law_of([[7, 3]] * 4), torch.tensor([[0.5, 0.5], [0, 0], [0.7, 0.3], [float("nan")] * 2], dtype=torch.float64)
    torch.testing.assert_close(residual(target, draft), torch.tensor([[1, 0], [0.7, 0.3], [0.7, 0.3], [0.7, 0.3]], dtype=torch.float64))


def test_accept_by_hand(monkeypatch):
    """Token 0 is kept with probability min(1, .7 / .5) = 1, token 1 with .3 / .5 = .6."""
    asked = []
    monkeypatch.setattr(specdec, "bernoulli", lambda probs, generator=None, ahead=0: asked.append(probs.item()) or probs > 0.5)
    assert [verify(TARGET, DRAFT, torch.tensor([[x]]))[0].item() for x in (0, 1)] == [1, 1]
    assert asked == pytest.approx([1, 0.6])


def test_accept_stops_at_the_first_rejection():
    """Guesses that are sure to be right, or sure to be wrong."""
    sure, guesses = torch.eye(3).double(), torch.tensor([[0, 0, 2], [1, 1, 2]])
    assert verify(sure[torch.tensor([[0, 1, 2, 0]] * 2)], sure[guesses], guesses)[0].tolist() == [1, 0]


def test_residual_by_hand(monkeypatch, drawn_from):
    """After a rejection: max(0, (.7, .3) - (.5, .5)) = (.2, 0), scaled to (1, 0)."""
    monkeypatch.setattr(specdec, "bernoulli", lambda probs, generator=None, ahead=0: probs > 2)
    assert verify(TARGET, DRAFT, torch.tensor([[1]]))[1].item() == 0
    assert drawn_from[0].tolist() == [[1, 0]]


def test_bonus_by_hand(monkeypatch, drawn_from):
    """After full acceptance: the target's law behind the last guess, (.2, .8), and nothing subtracted from it."""
    monkeypatch.setattr(specdec, "bernoulli", lambda probs, generator=None, ahead=0: probs > 0)
    n_accepted, token = verify(TARGET, DRAFT, torch.tensor([[1]]))
    assert (n_accepted.item(), token.item()) == (1, 1)
    torch.testing.assert_close(drawn_from[0], TARGET[:, 1], rtol=0, atol=1e-15)


def test_bonus_is_plain_sampling_where_nothing_is_guessed(drawn_from):
    """k = 0, the last round of a budget: one token, of the target's law."""
    n_accepted, _ = verify(TARGET[:, :1], DRAFT[:, :0], torch.zeros(1, 0, dtype=torch.int64))
    assert n_accepted.item() == 0 and drawn_from[0].tolist() == TARGET[:, 0].tolist()


def test_the_example_worked_by_hand():
    """Target (.7, .3), draft (.5, .5), the docstring's and README's: together the output has the law (.7, .3)."""
    law = law_of_the_round(TARGET[0], DRAFT[0]).sum(1)  # of the first token
    torch.testing.assert_close(law, law_of([7, 3]), rtol=0, atol=1e-15)


def law_of_the_round(target_probs, draft_probs, rule=verify):
    """The exact joint law of k+1 tokens, (V,) * (k+1): those that a round emits, then the target's own draws."""
    k, V = draft_probs.shape

    def round():
        guesses = specdec.categorical(draft_probs[None])
        n, token = rule(target_probs[None], draft_probs[None], guesses)
        return (*guesses[0, : n[0]].tolist(), token.item())

    out = torch.zeros((V,) * (k + 1), dtype=torch.float64)
    for tokens, probability in outcomes(round):
        out[tokens] += probability * product(target_probs[len(tokens) :])
    return out


def product(laws):
    """The joint law of independent tokens: (n, V) -> (V,) * n."""
    out = torch.tensor(1.0, dtype=torch.float64)
    for law in laws:
        out = out[..., None] * law
    return out


laws = st.lists(st.integers(0, 20), min_size=3, max_size=3).filter(any)
cases = st.integers(0, 3).flatmap(lambda k: st.tuples(st.lists(laws, min_size=k + 1, max_size=k + 1), st.lists(laws, min_size=k, max_size=k)))


@given(cases)
def test_the_law_of_a_round_is_the_targets(case):
    """For any target and draft laws, zeros and one-hots among them: joint law of k+1 tokens, error under 1e-12."""
    target, draft = law_of(case[0]), law_of(case[1]) if case[1] else torch.zeros(0, 3).double()
    torch.testing.assert_close(law_of_the_round(target, draft), product(target), rtol=0, atol=1e-12)


@given(laws, laws)
def test_a_guess_is_kept_with_probability_1_minus_tv(p, q):
    """Leviathan et al. 2022, Corollary 3.6: E[kept] = sum min(target_probs, draft_probs)."""
    target, draft = law_of([p, p]), law_of([q])

    def kept():
        return verify(target[None], draft[None], specdec.categorical(draft[None]))[0].item()

    assert sum(n * probability for n, probability in outcomes(kept)) == pytest.approx(torch.minimum(target[0], draft[0]).sum().item(), abs=1e-12)


def test_inputs_are_left_alone():
    """mutants.py B7: zeroing the rejected token in place damages the law that is used next."""
    target, draft = torch.rand(4, 4, 5).softmax(-1), torch.rand(4, 3, 5).softmax(-1)
    tokens = torch.randint(5, (4, 3))
    before = target.clone(), draft.clone(), tokens.clone()
    verify(target, draft, tokens, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(before, (target, draft, tokens)))


def test_nothing_impossible_passes_even_when_u_is_0(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.zeros(shape, dtype=torch.float64))
    target, draft = law_of([[[0, 1], [1, 1]]]), law_of([[[1, 0]]])
    n, token = verify(target, draft, torch.tensor([[0]]))
    assert (n.item(), token.item()) == (0, 1)


def test_equal_laws_keep_everything_and_need_no_residual(monkeypatch, drawn_from):
    """Should rounding say no all the same, the residual is empty, and the target's law takes its place (mutants.py K2)."""
    target = law_of([[[1, 2], [3, 1]]])
    monkeypatch.setattr(specdec, "bernoulli", lambda probs, generator=None, ahead=0: probs != 1)
    n, _ = verify(target, target[:, :1], torch.tensor([[1]]))
    assert n.item() == 0 and torch.equal(drawn_from[0], target[:, 0])


def test_a_draft_of_nan_is_rejected_in_favour_of_the_targets_law(drawn_from):
    target = law_of([[[1, 2], [3, 1]]])
    n, _ = verify(target, torch.full((1, 1, 2), float("nan")).double(), torch.tensor([[1]]))
    assert n.item() == 0 and torch.equal(drawn_from[0], target[:, 0])


def test_zero_rows_mean_no_guess():
    """Rows that guess fewer tokens than others: the round ends there with the target's own law, whatever the token says."""
    target = law_of([[[0, 1], [1, 0], [0, 1]]]).expand(2, 3, 2)
    draft = torch.zeros(2, 2, 2).double()
    draft[1, 0] = torch.tensor([0, 1])
    n, token = verify(target, draft, torch.tensor([[1, 0], [1, 0]]))
    assert n.tolist() == [0, 1] and token.tolist() == [1, 0]


def test_rows_do_not_mix():
    """One row keeps everything, one nothing, one the first guess."""
    sure = torch.eye(3).double()
    target = sure[torch.tensor([[0, 1, 2], [0, 1, 2], [0, 1, 2]])]
    guesses = torch.tensor([[0, 1], [1, 1], [0, 0]])
    n, token = verify(target, sure[guesses], guesses)
    assert n.tolist() == [2, 0, 1] and token.tolist() == [2, 0, 1]
    assert n.dtype == token.dtype == torch.int64
