"""Drafters without a loop around them.

Whatever was accepted before, each guess comes from the distribution that it should.
"""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import specdec
from conftest import fresh_logits, heads_logits, make_gpt, make_heads
from extras import ConfidentHeadsDrafter
from kvcache import FixedKVCache
from specdec import HeadsDrafter, ModelDrafter, NGramDrafter, Rows, TreeDrafter, generate, rounds
from test_kvcache import poison

MODEL, DRAFT = make_gpt(1), make_gpt(2)
B, T, ROOM = 3, 4, 50


def probs_of(logits):
    return (logits / 2).softmax(-1)  # of the test's own, so that its use can be seen


def make_rows(texts, room=ROOM, generator=None):
    """Rows that hold these texts, with room for more. What lies behind them is any tokens."""
    rows = Rows([torch.tensor(text) for text in texts], room, spare=6)
    for row, text in zip(rows.tokens, texts):
        row[len(text) :] = torch.randint(7, (len(row) - len(text),), generator=generator)
    return rows


def random_rows(lengths, generator=None):
    return make_rows([torch.randint(7, (n,), generator=generator).tolist() for n in lengths])


def start(drafter, rows, fixed=False):
    """-> the target's cache."""
    cache = MODEL.new_cache(*rows.tokens.shape)
    drafter.start(MODEL, cache, rows, specdec.read_prompts(MODEL, cache, rows))
    if fixed:
        drafter.cache = FixedKVCache(drafter.cache)
    return cache


accepted_of_each = st.lists(st.integers(0, 4), min_size=B, max_size=B)
histories = st.lists(st.tuples(st.integers(1, 4), accepted_of_each), min_size=1, max_size=6)
three_lengths = st.lists(st.integers(1, 6), min_size=B, max_size=B)


@given(histories, three_lengths, st.booleans(), st.booleans(), st.integers(0, 10**6))
def test_guesses_come_from_the_distributions_of_a_fresh_forward(
    history, lengths, heads, fixed, seed
):
    """Each round guesses k tokens; each row then accepts some of them, up to all.

    It adds a token that the draft did not guess: the one that lies behind the row already. With
    fixed shapes a drafter reads as much as it may lack, needed or not, from the second round on.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = random_rows(lengths, generator)
    drafter = HeadsDrafter(make_heads(0, 7, 16)) if heads else ModelDrafter(DRAFT)
    cache = start(drafter, rows, fixed)
    assert drafter.cache.length.tolist() == ([0] * B if heads else [n - 1 for n in lengths])
    before = "the prompt"
    for k, accepted in history:
        poison(drafter.cache)
        poison(cache)
        old = rows.length.clone()
        guesses, draft_probs = drafter.propose(rows, k, probs_of, generator)
        assert guesses.shape == (B, k) and guesses.dtype == torch.int64
        assert draft_probs.shape == (B, k, 7)
        for b, n in enumerate(old.tolist()):
            text, guessed = rows.tokens[b, :n].tolist(), guesses[b].tolist()
            if heads:
                logits = heads_logits(drafter.heads, MODEL, text, guessed[:-1])
            else:
                logits = fresh_logits(DRAFT, torch.tensor(text + guessed))[n - 1 : n - 1 + k]
            wrong = f"row {b} after {before}: of {k} guesses, these distributions are wrong: "
            torch.testing.assert_close(
                draft_probs[b], probs_of(logits), rtol=0, atol=1e-12, msg=wrong.__add__
            )
            n_kept = min(accepted[b], k)
            rows.tokens[b, n : n + n_kept] = guesses[b, :n_kept]
        read = rows.tokens.gather(1, old[:, None] - 1)
        _, hidden = MODEL(torch.cat((read, guesses), 1), cache)
        rows.length += torch.tensor(accepted).clamp(max=k) + 1
        cache.rollback(rows.length - 1)
        drafter.commit(rows, hidden)
        # Heads keep what they read with the target's states; a model all but its last guess.
        kept = old if heads else torch.minimum(rows.length - 1, old + k - 1)
        hint = "commit keeps what was read of the text, but for its newest token, and nothing else"
        assert drafter.cache.length.tolist() == kept.tolist(), hint
        before = f"a round in which the rows accepted {accepted} of {k} guesses"
        if heads:
            drafter.unread = partial(type(drafter).unread, drafter, n=5 if fixed else None)


MAKERS = {
    "model": lambda: ModelDrafter(DRAFT),
    "heads": lambda: HeadsDrafter(make_heads(0, 7, 16)),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_guesses_are_drawn_from_the_reported_distributions(monkeypatch, make):
    """The very numbers that are returned are those drawn from (mutants.py C1-C8), whether all rows
    are drawn in one call or each in its own."""
    drawn = []

    def categorical(probs, generator=None):
        drawn.extend(probs.reshape(-1, 7).tolist())
        return probs.argmax(-1)

    monkeypatch.setattr(specdec, "categorical", categorical)
    rows, drafter = random_rows([T] * B), make()
    start(drafter, rows)
    tokens, probs = drafter.propose(rows, 3, probs_of, None)
    hint = "draw each guess with `categorical`, from the distribution that you return for it"
    assert sorted(drawn) == sorted(probs.flatten(0, 1).tolist()), hint
    assert torch.equal(tokens, probs.argmax(-1)), hint


def test_guesses_are_drawn_with_the_generator():
    def guesses(seed):
        rows, drafter = make_rows([[1, 2, 3]] * 8), ModelDrafter(DRAFT)
        start(drafter, rows)
        generator = torch.Generator().manual_seed(seed)
        return drafter.propose(rows, 3, probs_of, generator)[0].tolist()

    hint = "hand the generator on to `categorical`: equal seeds, equal guesses"
    assert guesses(0) == guesses(0) != guesses(1), hint


def test_rollback_forgets_what_was_not_accepted():
    rows, drafter = random_rows([T] * B), ModelDrafter(DRAFT)
    start(drafter, rows)
    drafter.propose(rows, 3, probs_of, torch.Generator().manual_seed(0))
    rows.length += torch.tensor([1, 2, 4])  # after 0, 1 and all 3 accepted guesses
    drafter.commit(rows, None)
    assert drafter.cache.length.tolist() == [T, T + 1, T + 2]  # nobody has read the third


# -- n-gram lookup


def lookup(text, k, max_n=3):
    """What followed the last n tokens when they stood in the text before.

    n is as large as possible, then the match as late as possible.
    """
    for n in range(min(max_n, len(text) - 1), 0, -1):
        for end in range(len(text) - 1, n - 1, -1):
            if text[end - n : end] == text[-n:]:
                followed = text[end:]
                return [followed[i % len(followed)] for i in range(k)]
    return None


def ngram(texts, k, max_n=3, ended=(), always=False):
    """propose, on texts of different lengths, with other tokens behind each."""
    rows, drafter = make_rows(texts), NGramDrafter(max_n)
    start(drafter, rows)
    for b in ended:
        rows.end[b] = rows.length[b]
    drafter.always = always
    return drafter.propose(rows, k, probs_of, None)


def test_ngram_by_hand():
    texts = [[1, 2, 3, 4, 1, 2], [5, 1, 5, 2, 5], [1, 2, 3, 4], [6, 6, 6]]
    tokens, probs = ngram(texts, 3)
    assert tokens[[0, 1, 3]].tolist() == [[3, 4, 1], [2, 5, 2], [6, 6, 6]]
    assert probs[2].sum() == 0, "no match, no guess"
    assert probs[0].argmax(-1).tolist() == [3, 4, 1] and probs[0].sum(-1).tolist() == [1, 1, 1]


def test_the_longest_match_wins_then_the_latest():
    text = [1, 2, 3, 2, 4, 1, 2]
    assert ngram([text], 1)[0].item() == 3  # after 1 2, although 2 alone was last followed by 4
    assert ngram([text], 1, max_n=1)[0].item() == 4


def test_patterns_longer_than_the_text_are_no_harm():
    for max_n in (40, 1000):
        assert ngram([[1, 2, 1]], 1, max_n=max_n)[0].item() == 2


def test_patterns_have_at_least_one_token():
    with pytest.raises(ValueError, match="max_n is 0"):
        NGramDrafter(0)


def test_without_any_match_there_is_nothing_to_verify():
    tokens, probs = ngram([[1, 2, 3], [4]], 3)
    assert tokens.shape == (2, 0) and probs.shape == (2, 0, 7)


def test_where_shapes_are_fixed_there_are_always_k_places():
    """Of which those of a row without a match are no guesses."""
    tokens, probs = ngram([[1, 2, 3], [4]], 3, always=True)
    assert tokens.shape == (2, 3) and probs.shape == (2, 3, 7) and probs.sum() == 0


several_texts = st.lists(
    st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=4
)


@given(several_texts, st.integers(1, 4), st.integers(1, 4), st.booleans())
def test_ngram_equals_a_plain_search_of_each_row(texts, k, max_n, always):
    """It never matches its own end, and never looks at what lies behind it."""
    tokens, probs = ngram(texts, k, max_n, always=always)
    found = [lookup(text, k, max_n) for text in texts]
    assert tokens.shape[1] == probs.shape[1] == (k if always or any(found) else 0)
    for row, p, expected in zip(tokens, probs, found):
        if expected is None:
            assert p.sum() == 0
        else:
            assert row.tolist() == expected == p.argmax(-1).tolist()
            assert p.sum(-1).tolist() == [1] * k and p.max() == 1


def test_ngram_guesses_nothing_for_a_row_that_has_ended():
    texts = [[1, 2, 3], [1, 2, 1]]
    assert ngram(texts, 2)[0].shape == (2, 2)
    tokens, _ = ngram(texts, 2, ended=[1])
    assert tokens.shape == (2, 0)


def test_ngram_forgets_the_prompt_before():
    """Nothing is kept from one text to the next."""
    drafter = NGramDrafter()
    for text, n in (([1, 2, 1, 2], 1), ([3, 1, 2], 0)):
        rows = make_rows([text])
        start(drafter, rows)
        assert drafter.propose(rows, 1, probs_of, None)[0].shape == (1, n)


# -- heads


N_STATE = {1: 8, 2: 16, 3: 24, 4: 16, 6: 24, 7: 24}  # by n_layer: see `fresh_states`


@pytest.mark.parametrize(
    "markov, n_layer, n_state",
    [(False, 2, 16), *((True, n_layer, n_state) for n_layer, n_state in N_STATE.items())],
)
def test_heads_guess_from_the_targets_states(markov, n_layer, n_state):
    """Whatever was accepted.

    The distributions are those of heads that read the text with the states of a fresh forward, then
    their own.
    """
    heads, target = make_heads(0, 7, 16, markov, n_state), make_gpt(2, n_layer=n_layer)
    assert_heads_guess_right(heads, target, [[3, 1, 4], [0, 2, 6]], k=3)


def test_heads_in_rows_shorter_than_what_another_row_lacks():
    for seed in range(8):  # with some heads and coins no row ever lacks more than another has
        heads = make_heads(seed, 7, 16)
        assert_heads_guess_right(heads, DRAFT, [[3], [5], [1]], k=4, temperature=3.0, seed=seed)


def test_heads_after_prompts_of_different_lengths():
    for seed in range(3):
        texts = [[3, 1, 4, 1, 5, 2, 6, 5], [5], [1, 2]]
        assert_heads_guess_right(make_heads(seed, 7, 16), DRAFT, texts, k=4, seed=seed)


def assert_heads_guess_right(heads, model, texts, k, temperature=1.0, seed=1):
    drafter, texts = HeadsDrafter(heads), [list(text) for text in texts]
    prompts = [list(text) for text in texts]
    for r in rounds(model, prompts, 25, drafter, k, temperature=temperature, seed=seed):
        for b, text in enumerate(texts):
            if r.n_new[b]:
                # What was read with the target's states stays, and nothing else.
                assert drafter.cache.length[b] == len(text)
                logits = heads_logits(heads, model, text, r.guesses[b, :-1].tolist())
                expected = (logits / temperature).softmax(-1)
                torch.testing.assert_close(r.draft_probs[b], expected, rtol=0, atol=1e-10)
            text += r.tokens[b, : r.n_new[b]].tolist()
        poison(drafter.cache), poison(drafter.target_cache)


def test_heads_that_learnt_more_guess_by_what_they_know_now():
    heads = make_heads(0, 7, 16)
    for seed in (0, 1):
        heads.load_state_dict(make_heads(seed, 7, 16).state_dict())
        assert_heads_guess_right(heads, DRAFT, [[3, 1, 4]], k=3)


def test_heads_may_guess_for_a_batch_and_then_in_a_tree_for_another():
    drafter = HeadsDrafter(make_heads(0, 7, 16))
    for n_rows, outer in ((2, drafter), (3, TreeDrafter(drafter, (2, 2)))):
        prompts = torch.tensor([[3, 1, 4]] * n_rows)
        stats = generate(MODEL, prompts, 5, drafter=outer, seed=0).stats
        assert stats.emitted == 5 * n_rows


def test_heads_see_the_states_of_the_path_that_was_accepted():
    """Of a tree, too. Otherwise the guesses are worse, and nothing else.

    (The values lie in the target's cache: see test_tree.py.)
    """
    tree, depths = TreeDrafter(HeadsDrafter(make_heads(0, 7, 16)), (2, 2)), set()
    texts = [[3, 1, 4], [0, 2, 6]]
    for r in rounds(DRAFT, torch.tensor(texts), 40, tree, seed=0):
        depths.update(r.n_accepted.tolist())
        for b, text in enumerate(texts):
            text += r.tokens[b, : r.n_new[b]].tolist()
            expected = DRAFT(torch.tensor([text]))[1][0, :-1]
            hidden = tree.drafter.hidden[b, 1 : len(text)]
            torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-10)
    assert {0, 2} <= depths


def test_blind_heads_do_not_hear_of_the_guess_before():
    state, tokens = torch.randn(1, 2, 16).double(), torch.tensor([[1, 2]])
    for markov in (True, False):
        heads = make_heads(0, 7, 16, markov)
        one, other = (heads(state, t, heads.new_cache(1, 2)) for t in (tokens, tokens.flip(1)))
        assert torch.equal(one, other) is not markov


def test_confidence_decides_how_many_guesses(monkeypatch):
    """Rounds that cost 1, 1.3, 1.6, 1.9 units, guesses accepted with .8, .7.

    After one guess there are 1.8 tokens, 1.38 per unit, and 2.44, or 1.53, promised by another like
    it; after two 2.36, or 1.475, and 2.75, or 1.45: so two. With a row beside it whose guesses are
    hopeless 2.8 tokens, or 2.154 per unit, after one guess, and 3.44, or 2.15, promised: so one.
    If that row has ended, it has no say: two again. At a flat price: all.
    """
    good, hopeless = [0.8, 0.7, 0.7, 0.7], [0, 0, 0, 0]
    cases = (([good], [], 2), ([good, hopeless], [], 1), ([good, hopeless], [1], 2))
    for times, n_flat in (([1, 1.3, 1.6, 1.9, 2.2], None), ([1, 1, 1, 1, 1], 4)):
        for chances, ended, n in cases:
            chance = iter(torch.tensor(chances).T)
            heads = make_heads(0, 7, 16)
            say = torch.nn.Identity()
            say.forward = lambda state: next(chance).logit()[:, None, None]
            heads.confidence = say
            drafter = ConfidentHeadsDrafter(heads, times)
            rows = make_rows([[1, 1, 1]] * len(chances))
            start(drafter, rows)
            for b in ended:
                rows.end[b] = rows.length[b]
            tokens, probs = drafter.propose(rows, 4, probs_of, torch.Generator())
            assert tokens.shape[1] == probs.shape[1] == (n_flat or n)
