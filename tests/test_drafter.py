"""Drafters without a loop around them: whatever was accepted before, each guess comes from the law that it should."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import fresh_logits, heads_logits, make_gpt, make_heads
from specdec import HeadsDrafter, ModelDrafter, NGramDrafter, TreeDrafter, generate, rounds
from test_kvcache import poison

MODEL = make_gpt(2)
B, T, ROOM = 3, 4, 60


def law(logits):
    return (logits / 2).softmax(-1)  # of the test's own, so that its use can be seen


@given(st.lists(st.tuples(st.integers(1, 4), st.lists(st.integers(0, 4), min_size=B, max_size=B)), min_size=1, max_size=6), st.booleans(), st.integers(0, 10**6))
def test_guesses_come_from_the_laws_of_a_fresh_forward(history, fixed, seed):
    """Each round guesses k tokens; each row then accepts some of them, up to all, and adds a token that the draft did not guess."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(7, (B, ROOM), generator=generator)
    length = torch.full((B,), T)
    drafter = ModelDrafter(MODEL)
    drafter.check(MODEL, 48)
    drafter.start(text[:, :T], ROOM, None, MODEL.new_cache(B, ROOM, fixed))
    drafter.unread = 2 if fixed else None
    assert drafter.cache.length.tolist() == [T - 1] * B
    before = "the prompt"
    for k, accepted in history:
        poison(drafter.cache)
        draft_tokens, draft_probs = drafter.propose(text, length, k, law, generator)
        assert draft_tokens.shape == (B, k) and draft_probs.shape == (B, k, 7) and draft_tokens.dtype == torch.int64
        for b in range(B):
            whole = torch.cat((text[b, : length[b]], draft_tokens[b]))
            expected = law(fresh_logits(MODEL, whole)[length[b] - 1 : length[b] - 1 + k])
            wrong = f"row {b} after {before}: of {k} guesses, these laws are wrong: "
            torch.testing.assert_close(draft_probs[b], expected, rtol=0, atol=1e-12, msg=wrong.__add__)
            n = min(accepted[b], k)
            text[b, length[b] : length[b] + n] = draft_tokens[b, :n]  # behind them text already holds a random token: the correction
        n_new = torch.tensor(accepted).clamp(max=k) + 1
        drafter.commit(length, n_new, None)
        length += n_new
        before = f"a round in which the rows accepted {(n_new - 1).tolist()} of {k} guesses"
        assert (drafter.cache.length < length).all()


def test_guesses_are_drawn_from_the_reported_laws(monkeypatch):
    """The very tensor that is returned is the one drawn from (mutants.py C1-C8)."""
    import specdec

    drawn = []
    monkeypatch.setattr(specdec, "categorical", lambda probs, generator=None, ahead=0: drawn.append(probs) or probs.argmax(-1))
    text = torch.randint(7, (B, ROOM))
    drafter = ModelDrafter(MODEL)
    drafter.start(text[:, :T], ROOM, None, MODEL.new_cache(B, ROOM))
    tokens, probs = drafter.propose(text, torch.full((B,), T), 3, law, None)
    assert torch.equal(torch.stack(drawn, 1), probs) and torch.equal(tokens, probs.argmax(-1))


def test_rollback_forgets_what_was_not_accepted():
    text = torch.randint(7, (B, ROOM))
    drafter = ModelDrafter(MODEL)
    drafter.start(text[:, :T], ROOM, None, MODEL.new_cache(B, ROOM))
    drafter.propose(text, torch.full((B,), T), 3, law, torch.Generator().manual_seed(0))
    drafter.commit(torch.full((B,), T), torch.tensor([1, 2, 4]), None)  # after 0, 1 and all 3 accepted guesses
    assert drafter.cache.length.tolist() == [T, T + 1, T + 2]  # nobody has read the third


# -- n-gram lookup


def lookup(text, k, max_n=3):
    """What followed the last n tokens when they stood in the text before, n as large as possible, then as late as possible."""
    for n in range(min(max_n, len(text) - 1), 0, -1):
        for end in range(len(text) - 1, n - 1, -1):
            if text[end - n : end] == text[-n:]:
                followed = text[end:]
                return [followed[i % len(followed)] for i in range(k)]
    return None


def ngram(texts, k, room=5, max_n=3):
    """propose, on texts of different lengths, with other tokens behind each."""
    length = torch.tensor([len(text) for text in texts])
    rows = torch.randint(7, (len(texts), max(length) + room))
    for row, text in zip(rows, texts):
        row[: len(text)] = torch.tensor(text)
    drafter = NGramDrafter(max_n)
    drafter.check(MODEL, 48)
    return drafter.propose(rows, length, k, law, None)


def test_ngram_by_hand():
    tokens, probs = ngram([[1, 2, 3, 4, 1, 2], [5, 1, 5, 2, 5], [1, 2, 3, 4], [6, 6, 6]], 3)
    assert tokens[[0, 1, 3]].tolist() == [[3, 4, 1], [2, 5, 2], [6, 6, 6]]
    assert probs[2].sum() == 0, "no match, no guess"
    assert probs[0].argmax(-1).tolist() == [3, 4, 1] and probs[0].sum(-1).tolist() == [1, 1, 1]


def test_the_longest_match_wins_then_the_latest():
    assert ngram([[1, 2, 3, 2, 4, 1, 2]], 1)[0].item() == 3  # after 1 2, although 2 alone was last followed by 4
    assert ngram([[1, 2, 3, 2, 4, 1, 2]], 1, max_n=1)[0].item() == 4


def test_patterns_longer_than_the_text_are_no_harm():
    assert ngram([[1, 2, 1]], 1, max_n=40)[0].item() == 2


def test_patterns_have_at_least_one_token():
    with pytest.raises(ValueError, match="max_n is 0"):
        NGramDrafter(0)


def test_without_any_match_there_is_nothing_to_verify():
    tokens, probs = ngram([[1, 2, 3], [4]], 3)
    assert tokens.shape == (2, 0) and probs.shape == (2, 0, 7)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=4), st.integers(1, 4), st.integers(1, 4))
def test_ngram_equals_a_plain_search_of_each_row(texts, k, max_n):
    """It never matches its own end, and never looks at what lies behind it."""
    tokens, probs = ngram(texts, k, max_n=max_n)
    for row, p, text in zip(tokens, probs, texts):
        expected = lookup(text, k, max_n)
        if expected is None:
            assert p.sum() == 0
        else:
            assert row.tolist() == expected == p.argmax(-1).tolist()


def test_ngram_guesses_nothing_for_a_row_that_has_ended():
    drafter = NGramDrafter()
    drafter.check(MODEL, 48)
    drafter.going = torch.tensor([True, False])
    tokens, _ = drafter.propose(torch.tensor([[1, 2, 3, 0, 0], [1, 2, 1, 0, 0]]), torch.tensor([3, 3]), 2, law, None)
    assert tokens.shape == (2, 0)


def test_ngram_forgets_the_prompt_before():
    """Nothing is kept from one text to the next."""
    drafter = NGramDrafter()
    drafter.check(MODEL, 48)
    drafter.propose(torch.tensor([[1, 2, 1, 2, 0]]), torch.tensor([4]), 1, law, None)
    assert drafter.propose(torch.tensor([[3, 1, 2, 0]]), torch.tensor([3]), 1, law, None)[0].shape == (1, 0)


# -- heads


@pytest.mark.parametrize("markov, n_layer, n_state", [(True, 2, 16), (False, 2, 16), (True, 1, 8), (True, 3, 24), (True, 4, 16), (True, 6, 24), (True, 7, 24)])
def test_heads_guess_from_the_targets_states(markov, n_layer, n_state):
    """Whatever was accepted: the laws are those of heads that read the text with the states of a fresh forward, then their own."""
    assert_heads_guess_right(make_heads(0, 7, 16, markov, n_state), make_gpt(2, n_layer=n_layer), [[3, 1, 4], [0, 2, 6]], k=3)


def test_heads_in_rows_shorter_than_what_another_row_lacks():
    for seed in range(8):  # with some heads and coins no row ever lacks more than another has
        assert_heads_guess_right(make_heads(seed, 7, 16), MODEL, [[3], [5], [1]], k=4, temperature=3.0, seed=seed)


def assert_heads_guess_right(heads, model, texts, k, temperature=1.0, seed=1):
    drafter = HeadsDrafter(heads)
    for r in rounds(model, torch.tensor(texts), 25, drafter, k, temperature=temperature, seed=seed):
        for b, text in enumerate(texts):
            if k := r.draft_probs.shape[1] if r.n_new[b] else 0:
                assert drafter.cache.length[b] == len(text)  # what was read with the target's states stays, and nothing else
                guesses = r.tokens[b, : min(r.n_accepted[b].item(), k - 1)].tolist()
                expected = (heads_logits(heads, model, text, guesses) / temperature).softmax(-1)
                torch.testing.assert_close(r.draft_probs[b, : len(expected)], expected, rtol=0, atol=1e-10)
            text += r.tokens[b, : r.n_new[b]].tolist()
        poison(drafter.cache), poison(drafter.target_cache)


def test_heads_that_learnt_more_guess_by_what_they_know_now():
    heads = make_heads(0, 7, 16)
    for seed in (0, 1):
        heads.load_state_dict(make_heads(seed, 7, 16).state_dict())
        assert_heads_guess_right(heads, MODEL, [[3, 1, 4]], k=3)


def test_heads_may_guess_for_a_batch_and_then_in_a_tree_for_another():
    drafter = HeadsDrafter(make_heads(0, 7, 16))
    for rows, outer in ((2, drafter), (3, TreeDrafter(drafter, (2, 2)))):
        assert generate(MODEL, torch.tensor([[3, 1, 4]] * rows), 5, drafter=outer, seed=0).stats.emitted == 5 * rows


def test_heads_see_the_states_of_the_path_that_was_accepted():
    """Of a tree, too. (Otherwise the guesses are worse, and nothing else. The values lie in the target's cache: see test_tree.py.)"""
    tree, texts, depths = TreeDrafter(HeadsDrafter(make_heads(0, 7, 16)), (2, 2)), [[3, 1, 4], [0, 2, 6]], set()
    for r in rounds(MODEL, torch.tensor(texts), 40, tree, seed=3):
        depths.update(r.n_accepted.tolist())
        for b, text in enumerate(texts):
            text += r.tokens[b, : r.n_new[b]].tolist()
            expected = MODEL(torch.tensor([text]))[1][0, :-1]
            torch.testing.assert_close(tree.drafter.hidden[b, 1 : len(text)], expected, rtol=0, atol=1e-10)
    assert {0, 2} <= depths


def test_blind_heads_do_not_hear_of_the_guess_before():
    state, tokens = torch.randn(1, 2, 16).double(), torch.tensor([[1, 2]])
    for markov in (True, False):
        heads = make_heads(0, 7, 16, markov)
        one, other = (heads(state, t, heads.new_cache(1, 2)) for t in (tokens, tokens.flip(1)))
        assert torch.equal(one, other) is not markov


def test_confidence_decides_how_many_guesses(monkeypatch):
    """Rounds that cost 1, 1.3, 1.6, 1.9 units, guesses accepted with .8, .7: after one guess 1.8 tokens, 1.38 per unit, and 2.44, or 1.53,
    promised by another like it; after two 2.36, or 1.475, and 2.75, or 1.45: so two. With a row beside it whose guesses are
    hopeless 2.8 tokens, or 2.154 per unit, after one guess, and 3.44, or 2.15, promised: so one. At a flat price: all."""
    for times, counts in (([1, 1.3, 1.6, 1.9, 2.2], [2, 1]), ([1, 1, 1, 1, 1], [4, 4])):
        for rows, n in zip(([[0.8, 0.7, 0.7, 0.7]], [[0.8, 0.7, 0.7, 0.7], [0, 0, 0, 0]]), counts):
            chances = iter(torch.tensor(rows).T)
            heads = make_heads(0, 7, 16)
            monkeypatch.setattr(heads, "acceptance", lambda state: next(chances)[:, None])
            drafter = HeadsDrafter(heads, times)
            drafter.check(MODEL, 48)
            text = torch.ones(len(rows), 9, dtype=torch.int64)
            cache = MODEL.new_cache(len(rows))
            drafter.start(text[:, :3], 9, MODEL(text[:, :2], cache)[1], cache)
            tokens, _ = drafter.propose(text, torch.full((len(rows),), 3), 4, law, torch.Generator())
            assert tokens.shape[1] == n
