"""The block rule, the coupled rule and a lossy one, alone; and broken numbers, under every rule.

(tests/test_law.py has each of them inside the loop.)
"""

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import specdec
from conftest import make_gpt, make_heads
from enumerator import exact_distribution, joint, outcomes
from extras import accept_typical_lossy
from specdec import RULES, Coupled, HeadsDrafter, ModelDrafter, NGramDrafter, NoDrafter, Rows
from specdec import generate, to_probs, verify, verify_block, verify_tree
from test_verify import cases, chance_of_n, distribution, judged

# The papers' toy: target (1/3, 2/3), draft (2/3, 1/3), k = 2.
THIRDS = distribution([[1, 2], [1, 2], [1, 2]]), distribution([[2, 1], [2, 1]])
NAN, INF = float("nan"), float("inf")


def expected_accepted(rule, target, draft):
    """E[n_accepted] of one round, exactly."""

    def accepted():
        guesses = specdec.categorical(draft[None])
        return rule(target[None], draft[None], guesses, None)[0].item()

    return sum(n * probability for n, probability in outcomes(accepted))


# -- block


def test_block_accepts_11_ninths_where_rejection_accepts_10():
    assert expected_accepted(verify, *THIRDS) == pytest.approx(10 / 9, abs=1e-12)
    assert expected_accepted(verify_block, *THIRDS) == pytest.approx(11 / 9, abs=1e-12)


def test_block_by_hand():
    """Guesses 0, 1 of the toy. w_1 = 1/2, Z_1 = max(0, 1/6 - 2/3) + max(0, 1/3 - 1/3) = 0, so
    h_1 = 0; w_2 = min(1, 1/2 * 2) = 1 = h_2: the first guess alone is never accepted, with the
    second it always is. Guesses 1, 0: w_1 = 1, Z_1 = 1/3, h_1 = 1; w_2 = 1/2 = h_2."""
    target, draft = THIRDS[0][None], THIRDS[1][None]
    chances = [
        chance_of_n(target, draft, torch.tensor([guesses]), rule=verify_block)
        for guesses in ([0, 1], [1, 0])
    ]
    assert chances[0] == pytest.approx({2: 1}) and chances[1] == pytest.approx({1: 0.5, 2: 0.5})


def test_block_by_hand_where_the_first_guess_may_stand_alone():
    """Target (.5, .5) then (.9, .1), draft (.8, .2) then (.5, .5); guesses 0, 1.
    w_1 = 5/8, Z_1 = max(0, .5625 - .5) + max(0, .0625 - .5) = 1/16, so h_1 = (1/16) / (7/16) = 1/7;
    w_2 = 5/8 * .1 / .5 = 1/8 = h_2. So 2 with 1/8, 1 with 7/8 * 1/7 = 1/8, else none."""
    target = distribution([[[1, 1], [9, 1], [1, 1]]])
    draft = distribution([[[4, 1], [1, 1]]])
    chances = chance_of_n(target, draft, torch.tensor([[0, 1]]), rule=verify_block)
    assert chances == pytest.approx({0: 0.75, 1: 0.125, 2: 0.125})


def test_block_accepts_up_to_the_last_yes(monkeypatch, ours):
    """Not up to the first no: a later guess that is accepted takes the earlier ones with it."""
    coins = torch.tensor([[False, True, False], [False, False, False]])
    monkeypatch.setattr(specdec, "bernoulli", lambda probs, generator=None: coins)
    probs = torch.full((2, 4, 5), 0.2)
    n_accepted, _ = verify_block(probs, probs[:, :3], torch.zeros(2, 3, dtype=torch.int64))
    assert n_accepted.tolist() == [2, 0]


@given(cases)
def test_block_has_the_targets_distribution_and_accepts_no_fewer(case):
    """The joint distribution of k+1 tokens: with the residual of `verify` that of the first token
    alone would still be right."""
    target = distribution(case[0])
    draft = distribution(case[1]) if case[1] else torch.zeros(0, 3).double()
    exact = exact_distribution(verify_block, target, draft)
    torch.testing.assert_close(exact, joint(target), rtol=0, atol=1e-12)
    fewer = expected_accepted(verify, target, draft) - 1e-12
    assert expected_accepted(verify_block, target, draft) > fewer


def test_block_is_plain_sampling_where_nothing_is_guessed():
    target, none = distribution([[[7, 3]]]), torch.zeros(1, 0, dtype=torch.int64)
    after = judged(target, torch.zeros(1, 0, 2), none, verify_block)
    assert after == pytest.approx({(0, 0): 0.7, (0, 1): 0.3}, abs=1e-15)


def test_block_takes_zero_rows_for_no_guess():
    target = distribution([[[0, 1], [1, 0], [0, 1]]]).expand(2, 3, 2)
    draft = torch.zeros(2, 2, 2).double()
    draft[1, 0] = torch.tensor([0, 1])
    n, token = verify_block(target, draft, torch.tensor([[1, 0], [1, 0]]))
    assert n.tolist() == [0, 1] and token.tolist() == [1, 0]


def test_block_takes_nan_for_no_guess(ours):
    target = distribution([[[0, 1], [1, 0], [0, 1]]])
    draft = torch.tensor([[[0, 1], [NAN, NAN]]], dtype=torch.float64)
    n, token = verify_block(target, draft, torch.tensor([[1, 0]]))
    assert (n.item(), token.item()) == (1, 0)


def test_block_never_accepts_the_impossible_not_even_after_a_ratio_beyond_all_numbers():
    """0 * inf is NaN, and NaN compared with anything is False: neither may turn into a yes."""
    target = torch.tensor([[[0, 0.5, 0.5], [0.5, 0.5, 0], [1, 0, 0]]])
    draft = torch.tensor([[[1, 0, 0], [1e-40, 1, 0]]])
    assert verify_block(target, draft, torch.tensor([[0, 0]]))[0].item() == 0


def test_block_with_a_guess_that_is_broken_keeps_the_distribution_of_the_one_before(ours):
    target, even = distribution([[[7, 3], [1, 4], [1, 1]]]), distribution([1, 1])
    draft = torch.stack((even, torch.full((2,), NAN).double()))[None]
    first = torch.zeros(2).double()

    def first_token():
        guesses = torch.stack((specdec.categorical(even[None])[0], torch.tensor(0)))[None]
        n, token = verify_block(target, draft, guesses)
        return guesses[0, 0].item() if n else token.item()

    for token, p in outcomes(first_token):
        first[token] += p
    torch.testing.assert_close(first, target[0, 0], rtol=0, atol=1e-12)


# -- coupled


TARGET, DRAFT = make_gpt(1), make_gpt(2, n_layer=1, n_embd=4)
prompt_lists = st.lists(
    st.lists(st.integers(0, 6), min_size=1, max_size=4), min_size=1, max_size=3
)


@given(
    st.integers(0, 10**6), st.integers(0, 10**6), prompt_lists, st.integers(1, 6),
    st.sampled_from(["model", "ngram", "heads"]), st.sampled_from([0, 0.5, 1, 2]),
    st.sampled_from([None, 3, [0, 5]]), st.integers(0, 2**63 - 1),
)  # fmt: skip
def test_coupled_text_is_the_text_of_plain_decoding(
    model, other, prompts, k, drafter, temperature, eos, seed
):
    """Token for token, for any models, seeds and k, prompts of any lengths, at any temperature,
    with any drafter."""
    target = make_gpt(model)
    if drafter == "ngram":
        drafter = NGramDrafter()
    elif drafter == "heads":
        drafter = HeadsDrafter(make_heads(0, 7, 16))
    else:
        drafter = ModelDrafter(make_gpt(other))
    options = {"rule": "coupled", "temperature": temperature, "eos": eos, "seed": seed}
    plain = generate(target, prompts, 20, **options)
    assert generate(target, prompts, 20, drafter=drafter, k=k, **options).tokens == plain.tokens


@pytest.mark.parametrize("drafter", [ModelDrafter(DRAFT), NGramDrafter()])
def test_coupled_text_is_that_of_plain_decoding_when_k_varies(drafter):
    """Drafters that guess less than they are asked, or nothing, and k chosen by the clock."""

    class Moody:
        start, commit = drafter.start, drafter.commit
        none = NoDrafter()

        def propose(self, rows, k, probs_of, generator):
            self.none.start(TARGET, None, rows, None)
            k = min(k, rows.length.sum().item() % 4)
            return (drafter if k else self.none).propose(rows, k, probs_of, generator)

    prompts = [[1, 2, 1, 2], [3]]
    for seed in range(5):
        options = {"rule": "coupled", "seed": seed}
        plain = generate(TARGET, prompts, 30, **options).tokens
        assert generate(TARGET, prompts, 30, drafter=Moody(), k=3, **options).tokens == plain
        assert generate(TARGET, prompts, 30, drafter=drafter, k="auto", **options).tokens == plain


def coupled_over(prompts, max_new_tokens, V=7):
    """A `Coupled` whose random numbers are drawn, and the rows that they are for."""
    rows = Rows(list(map(torch.tensor, prompts)), max_new_tokens, 1)
    coupled, target = Coupled(None), SimpleNamespace(config=SimpleNamespace(vocab_size=V))
    coupled.own_rounds(target, rows, 0, verify, to_probs, torch.Generator().manual_seed(0))
    return coupled, rows


def test_coupled_guesses_agree_as_often_as_the_theory_says():
    """Pr[match] = sum_i 1 / sum_j max(P_j / P_i, Q_j / Q_i), Daliri et al. 2024: between
    (1 - TV) / (1 + TV) and 1 - TV. In 200 rows, at 1000 positions of each."""
    n, target, draft = 200_000, distribution([5, 3, 2]), distribution([2, 3, 5])
    coupled, _ = coupled_over([[0]] * 200, 1000, 3)
    position = torch.arange(1000).expand(200, -1)
    own, guesses = (
        coupled.draw(probs.expand(200, 1000, 3), position).flatten() for probs in (target, draft)
    )
    sure = torch.eye(3).double()
    n_accepted, token = verify(
        sure[own][:, None].expand(n, 2, 3), sure[guesses][:, None], guesses[:, None]
    )
    assert torch.equal(n_accepted == 1, own == guesses) and torch.equal(token, own)
    expected = sum(
        1 / torch.maximum(target / target[i], draft / draft[i]).sum().item() for i in range(3)
    )
    assert 0.7 / 1.3 <= expected <= 0.7
    error = 5 * (expected * (1 - expected) / n) ** 0.5
    assert abs(n_accepted.double().mean() - expected) < error


def test_coupled_noise_is_new_for_every_row_position_and_token():
    """Wherever a row has got to, its position begins at its own prompt's end."""
    coupled, rows = coupled_over([[1, 2, 3], [4]], 4)
    assert len(coupled.log_u.unique()) == coupled.log_u.numel() == 5 * 2 * 7
    even = torch.full((2, 3, 7), 1 / 7, dtype=torch.float64)
    winners = coupled.log_u.argmax(-1)  # the shortest time, all rates being equal
    position = torch.tensor([[0, 1, 2], [2, 3, 4]])
    expected = torch.stack((winners[:3, 0], winners[2:, 1]))
    assert torch.equal(coupled.draw(even, position), expected)
    rows.length += torch.tensor([0, 2])
    assert torch.equal(coupled(even.log()).argmax(-1), expected)  # the target's, all at once
    for i in range(3):  # a draft's, one after the other
        assert torch.equal(coupled(even[:, 0].log()).argmax(-1), expected[:, i])
    assert torch.equal(coupled(even.log()).argmax(-1), expected)  # and then the target's again
    assert torch.equal(coupled(even[:, 0].log()).argmax(-1), expected[:, 0])


def test_coupled_noise_is_as_fine_as_float64():
    """In float32 no rare token would ever win: the shortest time would be 2^-24."""
    assert coupled_over([[0]], 1)[0].log_u.dtype == torch.float64


def test_coupled_noise_of_0_lets_nothing_impossible_win(monkeypatch):
    """A time of infinity would be as long as that of an impossible token."""
    monkeypatch.setattr(torch, "rand", lambda *a, generator, **o: torch.zeros(*a, **o))
    coupled, _ = coupled_over([[0]], 1, 3)
    probs = torch.tensor([[[0.0, 0.0, 1.0]]], dtype=torch.float64)
    assert coupled.draw(probs, torch.tensor([[0]])).item() == 2


def test_coupled_draws_are_certain():
    """What it returns is one-hot, in the shape of the logits."""
    coupled, _ = coupled_over([[1, 2, 3], [4]], 4)
    for shape in (2, 7), (2, 3, 7):
        probs = coupled(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
        assert probs.shape == shape and torch.equal(probs, (probs == 1).float())
        assert (probs.sum(-1) == 1).all()


def test_coupled_draws_from_the_distribution():
    """100,000 draws: every frequency within 5 standard errors, that of pairs included."""
    n, probs = 10**5, distribution([5, 3, 0, 2])
    coupled, _ = coupled_over([[0]] * 100, 1000, 4)
    tokens = coupled.draw(probs.expand(100, 1000, 4), torch.arange(1000).expand(100, -1))
    share = torch.bincount(tokens.flatten(), minlength=4) / n
    assert ((share - probs).abs() <= 5 * (probs * (1 - probs) / n).sqrt()).all()
    for neighbour in (tokens.roll(1, 0), tokens.roll(1, 1)):  # of the row, and of the position
        both = ((tokens == 0) & (neighbour == 0)).double().mean()
        assert abs(both - 0.25) < 5 * (0.25 * 0.75 / n) ** 0.5


def test_coupled_accepts_no_guess_that_was_not_made():
    """Where draft_probs is 0 the token means nothing, even if it is what the target draws."""
    sure = distribution([[[0, 1]] * 3])
    n_accepted, token = verify(sure, torch.zeros(1, 2, 2), torch.ones(1, 2, dtype=torch.int64))
    hint = "where draft_probs is 0 nothing was guessed: it cannot be accepted"
    assert (n_accepted.item(), token.item()) == (0, 1), hint

    class Silent(NoDrafter):
        """Knows the text, and does not guess it."""

        def propose(self, rows, k, probs_of, generator):
            done = rows.length[0].item() - 2
            tokens = torch.tensor([[*text[done:], 0, 0, 0][:k]])
            return tokens, torch.zeros(1, k, 7)

    prompt = torch.tensor([1, 2])
    text = generate(TARGET, prompt, 20, rule="coupled", seed=1).tokens[0]
    result = generate(TARGET, prompt, 20, drafter=Silent(), k=3, rule="coupled", seed=1)
    assert result.tokens == [text] and result.stats.accepted == 0


def test_coupled_accepts_everything_from_the_target_itself():
    prompts, drafter = torch.tensor([[1, 2], [3, 4]]), ModelDrafter(TARGET)
    stats = generate(TARGET, prompts, 41, drafter=drafter, k=3, rule="coupled", seed=1).stats
    assert stats.accepted == stats.drafted == stats.evaluated


# -- lossy


def test_the_lossy_rule_is_no_rule_of_ours_and_not_exact():
    assert accept_typical_lossy not in RULES.values()
    target, draft = distribution([[7, 3], [1, 4]]), distribution([[1, 1]])
    off = exact_distribution(accept_typical_lossy, target, draft) - joint(target)
    assert off.abs().sum() / 2 > 0.1
    better = expected_accepted(verify, target, draft)
    assert expected_accepted(accept_typical_lossy, target, draft) > better


# -- NaN and inf, under every rule and in trees


def tree_rule(widths):
    def rule(target_probs, draft_probs, draft_tokens, generator=None):
        n, token, _ = verify_tree(target_probs, draft_probs, draft_tokens, widths, generator)
        return n, token

    return rule


def chain_case():
    """Three guesses; the second is impossible. The rows of the target and draft behind it."""
    target = distribution([[[5, 3, 2], [1, 0, 1], [2, 1, 3], [1, 1, 1]]])
    draft = distribution([[[2, 3, 5], [1, 2, 1], [4, 1, 1]]])
    return target, draft, torch.tensor([[2, 1, 0]]), [2, 3], [2]


def tree_case():
    """Two children of the root, two of each child. The first child is impossible, and so is the
    first one below the second. The rows of the target and draft behind these."""
    target = [[0, 3, 2], [1, 1, 1], [1, 2, 0], [1, 0, 1], [5, 3, 2], [1, 1, 2], [3, 1, 0]]
    draft = [[1, 2, 1], [0, 3, 1], [1, 1, 2], [2, 1, 1], [1, 1, 1], [1, 1, 0]]
    guesses = torch.tensor([[0, 1, 2, 0, 2, 1]])
    return distribution([target]), distribution([draft]), guesses, [1, 3, 4, 5], [2, 3]


BROKEN_CASES = {
    "rejection": (verify, chain_case()),
    "block": (verify_block, chain_case()),
    "chain as a tree": (tree_rule((1, 1, 1)), chain_case()),
    "tree": (tree_rule((2, 2)), tree_case()),
}


@pytest.mark.parametrize("broken", [NAN, INF, -INF])
@pytest.mark.parametrize("name", BROKEN_CASES)
def test_what_stands_behind_an_impossible_guess_may_be_broken(name, broken, ours):
    """NaN or inf in any one row that cannot be reached changes nothing."""
    rule, (target, draft, guesses, of_target, of_draft) = BROKEN_CASES[name]
    clean = judged(target, draft, guesses, rule)
    for place, rows in ((0, of_target), (1, of_draft)):
        for row in rows:
            for columns in (slice(None), slice(0, 1), slice(1, 2), slice(2, 3)):
                probs = [target.clone(), draft.clone()]
                probs[place][0, row, columns] = broken
                assert judged(*probs, guesses, rule) == pytest.approx(clean, abs=1e-15)


def test_block_with_a_target_that_breaks_after_the_first_token(ours):
    """vllm-project/vllm#53029: both guesses were accepted, and a token of probability 0 written."""
    target = torch.tensor([[[1.0, 0.0], [NAN, NAN], [NAN, NAN]]])
    draft = torch.tensor([[[0.5, 0.5], [0.5, 0.5]]])
    for rule in (verify, verify_block, tree_rule((1, 1))):
        for seed in range(20):
            generator = torch.Generator().manual_seed(seed)
            n, token = rule(target, draft, torch.tensor([[1, 0]]), generator)
            assert (n.item(), token.item()) == (0, 0)


@pytest.mark.parametrize("broken, name", [
    *itertools.product((NAN, INF), BROKEN_CASES),
    *((-INF, name) for name in BROKEN_CASES if name != "rejection"),
])  # fmt: skip
def test_a_broken_draft_lets_nothing_impossible_pass(name, broken, ours):
    """In any one row of the draft, reachable or not. The chances of what comes may be others.

    (`verify` itself takes a draft of -inf as it comes: no softmax makes one.)
    """
    rule, (target, draft, guesses, *_) = BROKEN_CASES[name]
    for row in range(draft.shape[1]):
        for columns in (slice(None), slice(0, 1), slice(1, 2), slice(2, 3)):
            probs = draft.clone()
            probs[0, row, columns] = broken
            assert sum(judged(target, probs, guesses, rule).values()) == pytest.approx(1)
            assert_possible(target, probs, guesses, rule, name)


def assert_possible(target, draft, guesses, rule, name):
    """No accepted guess and no next token has probability 0 in the target."""
    if name == "tree":
        for (n, token, path), _ in outcomes(lambda: verify_tree(target, draft, guesses, (2, 2))):
            nodes = path[0, : n.item() + 1].tolist()
            tokens = [*(guesses[0, node - 1].item() for node in nodes[1:]), token.item()]
            assert all(target[0, node, x] > 0 for node, x in zip(nodes, tokens))
    else:
        for n, token in judged(target, draft, guesses, rule):
            tokens = [*guesses[0, :n].tolist(), token]
            assert all(target[0, i, x] > 0 for i, x in enumerate(tokens))
