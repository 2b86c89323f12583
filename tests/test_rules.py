"""The block rule, the coupled rule and the lossy one, alone. (tests/test_law.py has each of them inside the loop.)"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import specdec
from conftest import make_gpt, make_heads
from enumerator import outcomes
from extras import accept_typical_lossy
from specdec import (
    RULES, Coupled, HeadsDrafter, ModelDrafter, NGramDrafter, Rows, generate, verify, verify_block,
)  # fmt: skip
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


def coupled(B, n, V, probs_of=lambda logits: logits, seed=0):
    """A `Coupled` for B rows of n new tokens each. Distributions take the place of logits."""
    rows = Rows([torch.tensor([0, 0, 0])[: 1 + b % 3] for b in range(B)], n, 1)
    target = type("", (), {"config": type("", (), {"vocab_size": V})})
    noise = Coupled(NGramDrafter())
    noise.drafter.rounds = lambda *args: None  # no loop: only the table of random numbers
    noise.rounds(target, rows, 1, verify, probs_of, torch.Generator().manual_seed(seed))
    return noise


def test_coupled_guesses_agree_as_often_as_the_theory_says():
    """Pr[match] = sum_i 1 / sum_j max(P_j / P_i, Q_j / Q_i), Daliri et al. 2024: between
    (1 - TV) / (1 + TV) and 1 - TV."""
    n, target, draft = 200_000, law_of([5, 3, 2]), law_of([2, 3, 5])
    noise = coupled(n, 1, 3)
    draft_probs = noise(draft.expand(n, 3))[:, None]
    guess = draft_probs.argmax(-1)
    n_accepted, _ = verify(noise(target.expand(n, 2, 3)), draft_probs, guess)
    expected = sum(1 / torch.maximum(target / target[i], draft / draft[i]).sum().item() for i in range(3))
    assert 0.7 / 1.3 <= expected <= 0.7
    assert abs(n_accepted.double().mean() - expected) < 5 * (expected * (1 - expected) / n) ** 0.5


def test_coupled_tokens_have_the_distribution_that_they_are_drawn_from():
    """By what the table gives alone: every row of it is a new race."""
    n, target = 200_000, law_of([5, 3, 2])
    counts = coupled(n, 1, 3)(target.expand(n, 1, 3)).sum((0, 1))
    assert ((counts / n - target).abs() < 5 * (target * (1 - target) / n) ** 0.5).all()


def test_coupled_numbers_are_new_for_every_row_position_and_token():
    """And as fine as float64: among many rare tokens the winner's u is close to 1."""
    table = coupled(2, 5, 7).log_u
    assert table.shape == (6, 2, 7) and len(table.unique()) == table.numel()
    assert table.dtype == torch.float64 and not torch.equal(table, table.float().double())


def test_coupled_target_and_guesses_look_at_the_same_numbers_at_the_same_position():
    """Whatever the rows have written, and wherever their prompts ended."""
    seen, noise = [], coupled(2, 5, 7)
    noise.draw = lambda probs, position: seen.append(position.tolist()) or position * 0
    noise.rows.length += torch.tensor([1, 3])
    for n in (0, 2):
        for _ in range(n):
            noise(torch.rand(2, 7))
        noise(torch.rand(2, n + 1, 7))
    assert seen == [[[1], [3]], [[1], [3]], [[2], [4]], [[1, 2, 3], [3, 4, 5]]]


def test_coupled_draws_what_the_table_says():
    noise, probs = coupled(2, 5, 7), torch.rand(2, 3, 7)
    position = torch.tensor([[0, 1, 2], [3, 4, 9]])
    token = noise.draw(probs, position)
    for b in range(2):
        for i in range(3):
            log_u = noise.log_u[min(position[b, i], 5), b]
            assert token[b, i] == (-log_u / probs[b, i]).argmin()


def test_coupled_accepts_no_guess_that_was_not_made():
    """Where draft_probs is 0 the token means nothing, even if it is what the target draws."""
    sure = law_of([[[0, 1]] * 3])
    n_accepted, token = verify(coupled(1, 3, 2)(sure), torch.zeros(1, 2, 2), torch.ones(1, 2, dtype=torch.int64))
    assert (n_accepted.item(), token.item()) == (0, 1)


def test_coupled_rounds_report_certain_distributions():
    """One token of probability 1, which is the one written: nothing else is left of the noise."""
    options = {"rule": "coupled", "seed": 3}
    for r in specdec.rounds(TARGET, torch.tensor([[1, 2], [3, 4]]), 20, ModelDrafter(DRAFT), 3, **options):
        for probs in (r.target_probs, r.draft_probs):
            assert torch.equal(probs.sort(-1).values[..., -2:].flatten(0, 1).unique(dim=0), torch.tensor([[0, 1]]).double())
        for b, n in enumerate(r.n_new.tolist()):
            assert r.tokens[b, :n].tolist() == r.target_probs[b, :n].argmax(-1).tolist()


def test_coupled_accepts_everything_from_the_target_itself():
    stats = generate(TARGET, torch.tensor([[1, 2], [3, 4]]), 41, drafter=ModelDrafter(TARGET), k=3, rule="coupled", seed=1).stats
    assert stats.accepted == stats.drafted == stats.evaluated


# -- lossy


def test_the_lossy_rule_is_not_exact():
    assert accept_typical_lossy not in RULES.values()
    laws = law_of([[7, 3], [1, 4]]), law_of([[1, 1]])
    off = (law_of_the_round(*laws, accept_typical_lossy) - product(laws[0])).abs().sum() / 2
    assert off > 0.1
    assert expected_accepted(accept_typical_lossy, *laws) > expected_accepted(verify, *laws)
