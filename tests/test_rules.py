"""The block rule, the coupled rule and the lossy one, alone. (tests/test_law.py has each of them inside the loop.)"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import specdec
from conftest import make_gpt, make_heads
from enumerator import outcomes
from specdec import RULES, HeadsDrafter, ModelDrafter, NGramDrafter, Noise, accept_typical_lossy, generate, verify, verify_block, verify_coupled
from test_verify import cases, law_of, law_of_the_round, product

THIRDS = law_of([[1, 2], [1, 2], [1, 2]]), law_of([[2, 1], [2, 1]])  # the papers' toy: target (1/3, 2/3), draft (2/3, 1/3), k = 2


def expected_accepted(rule, target, draft):
    """E[n_accepted] of one round, exactly."""
    return sum(p * n for n, p in outcomes(lambda: rule(target[None], draft[None], specdec.categorical(draft[None]))[0].item()))


# -- block


def test_block_accepts_11_ninths_where_rejection_accepts_10():
    assert expected_accepted(verify, *THIRDS) == pytest.approx(10 / 9, abs=1e-12)
    assert expected_accepted(verify_block, *THIRDS) == pytest.approx(11 / 9, abs=1e-12)


def test_block_by_hand(monkeypatch):
    """Guesses 0, 1 of the toy. w_1 = 1/2, Z_1 = max(0, 1/6 - 2/3) + max(0, 1/3 - 1/3) = 0, so h_1 = 0; w_2 = min(1, 1/2 * 2) = 1 = h_2:
    the first guess alone is never kept, with the second it always is. Guesses 1, 0: w_1 = 1, Z_1 = 1/3, h_1 = 1; w_2 = 1/2 = h_2."""
    asked = []
    monkeypatch.setattr(specdec, "bernoulli", lambda probs, generator=None: asked.extend(probs[0].tolist()) or probs > 0.9)
    kept = [verify_block(THIRDS[0][None], THIRDS[1][None], torch.tensor([guess]))[0].item() for guess in ([0, 1], [1, 0])]
    assert asked == pytest.approx([0, 1, 1, 0.5]) and kept == [2, 1]


def test_block_keeps_up_to_the_last_yes(monkeypatch):
    """Not up to the first no: a later guess that is kept takes the earlier ones with it."""
    monkeypatch.setattr(specdec, "bernoulli", lambda probs, generator=None: torch.tensor([[False, True, False], [False, False, False]]))
    laws = torch.full((2, 4, 5), 0.2)
    assert verify_block(laws, laws[:, :3], torch.zeros(2, 3, dtype=torch.int64))[0].tolist() == [2, 0]


@given(cases)
def test_block_has_the_targets_law_and_keeps_no_fewer(case):
    """The joint law of k+1 tokens: with the token rule's residual the first token's law alone would still be right."""
    target, draft = law_of(case[0]), law_of(case[1]) if case[1] else torch.zeros(0, 3).double()
    torch.testing.assert_close(law_of_the_round(target, draft, verify_block), product(target), rtol=0, atol=1e-12)
    assert expected_accepted(verify_block, target, draft) > expected_accepted(verify, target, draft) - 1e-12


def test_block_takes_zero_rows_and_nan_for_no_guess():
    target = law_of([[[0, 1], [1, 0], [0, 1]]]).expand(3, 3, 2)
    draft = torch.zeros(3, 2, 2).double()
    draft[1:, 0] = torch.tensor([0, 1])
    draft[2, 1] = float("nan")
    n, token = verify_block(target, draft, torch.tensor([[1, 0], [1, 0], [1, 0]]))
    assert n.tolist() == [0, 1, 1] and token.tolist() == [1, 0, 0]


def test_block_never_keeps_the_impossible_not_even_after_a_ratio_beyond_all_numbers():
    """0 * inf is NaN, and NaN compared with anything is False: neither may turn into a yes."""
    target = torch.tensor([[[0, 0.5, 0.5], [0.5, 0.5, 0], [1, 0, 0]]])
    draft = torch.tensor([[[1, 0, 0], [1e-40, 1, 0]]])
    assert verify_block(target, draft, torch.tensor([[0, 0]]))[0].item() == 0


def test_block_with_a_guess_that_is_broken_keeps_the_law_of_the_one_before():
    target, even = law_of([[[7, 3], [1, 4], [1, 1]]]), law_of([1, 1])
    draft = torch.stack((even, torch.full((2,), float("nan")).double()))[None]
    law = torch.zeros(2).double()

    def first_token():
        guesses = torch.stack((specdec.categorical(even[None])[0], torch.tensor(0)))[None]
        n, token = verify_block(target, draft, guesses)
        return guesses[0, 0].item() if n else token.item()

    for token, p in outcomes(first_token):
        law[token] += p
    torch.testing.assert_close(law, target[0, 0], rtol=0, atol=1e-12)


# -- coupled


TARGET, DRAFT = make_gpt(1), make_gpt(2, n_layer=1, n_embd=4)


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.lists(st.lists(st.integers(0, 6), min_size=2, max_size=2), min_size=1, max_size=3), st.integers(1, 6),
       st.sampled_from(["model", "ngram", "heads"]), st.sampled_from([0, 0.5, 1, 2]), st.integers(0, 2**63 - 1))  # fmt: skip
def test_coupled_text_is_the_text_of_plain_decoding(model, other, prompts, k, drafter, temperature, seed):
    """Token for token, for any models, prompts, seeds and k, at any temperature, with any drafter."""
    target, prompts = make_gpt(model), torch.tensor(prompts)
    drafter = {"model": lambda: ModelDrafter(make_gpt(other)), "ngram": NGramDrafter, "heads": lambda: HeadsDrafter(make_heads(0, 7, 16))}[drafter]()
    options = {"rule": "coupled", "temperature": temperature, "seed": seed}
    assert generate(target, prompts, 20, drafter=drafter, k=k, **options).tokens == generate(target, prompts, 20, **options).tokens


def test_coupled_guesses_agree_as_often_as_the_theory_says():
    """Pr[match] = sum_i 1 / sum_j max(P_j / P_i, Q_j / Q_i), Daliri et al. 2024: between (1 - TV) / (1 + TV) and 1 - TV."""
    n, target, draft = 200_000, law_of([5, 3, 2]), law_of([2, 3, 5])
    noise = Noise(torch.Generator().manual_seed(0), n, 1, 3)
    noise.here = torch.zeros(n, dtype=torch.int64)
    guess = specdec.categorical(draft.expand(n, -1), noise, 0)
    n_accepted, _ = verify_coupled(target.expand(n, 2, 3), draft.expand(n, 1, 3), guess[:, None], noise)
    expected = sum(1 / torch.maximum(target / target[i], draft / draft[i]).sum().item() for i in range(3))
    assert 0.7 / 1.3 <= expected <= 0.7
    assert abs(n_accepted.double().mean() - expected) < 5 * (expected * (1 - expected) / n) ** 0.5


def test_coupled_noise_is_new_for_every_row_position_and_token():
    noise = Noise(torch.Generator().manual_seed(0), 2, 5, 7)
    assert len(noise.table.unique()) == noise.table.numel()
    noise.here = torch.tensor([1, 3])
    assert torch.equal(noise.log_u(1)[:, 0], torch.stack((noise.table[2, 0], noise.table[4, 1])))
    assert torch.equal(noise.log_u(torch.arange(2)), torch.stack((noise.table[1:3, 0], noise.table[3:5, 1])))


def test_coupled_accepts_no_guess_that_was_not_made():
    """Where draft_probs is 0 the token means nothing, even if it is what the target draws."""
    sure = law_of([[[0, 1]] * 3])
    noise = Noise(torch.Generator().manual_seed(0), 1, 3, 2)
    n_accepted, token = verify_coupled(sure, torch.zeros(1, 2, 2), torch.ones(1, 2, dtype=torch.int64), noise)
    assert (n_accepted.item(), token.item()) == (0, 1)


def test_coupled_accepts_everything_from_the_target_itself():
    stats = generate(TARGET, torch.tensor([[1, 2], [3, 4]]), 41, drafter=ModelDrafter(TARGET), k=3, rule="coupled", seed=1).stats
    assert stats.accepted == stats.drafted == stats.evaluated


# -- lossy


def test_the_lossy_rule_says_so_and_is_not_exact():
    assert [name for name, rule in RULES.items() if rule is accept_typical_lossy] == ["lossy-typical"]
    laws = law_of([[7, 3], [1, 4]]), law_of([[1, 1]])
    off = (law_of_the_round(*laws, accept_typical_lossy) - product(laws[0])).abs().sum() / 2
    assert off > 0.1
    assert expected_accepted(accept_typical_lossy, *laws) > expected_accepted(verify, *laws)
