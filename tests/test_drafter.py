"""ModelDrafter without a loop around it: whatever was accepted before, each guess comes from the law of a fresh forward pass."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import fresh_logits, make_gpt
from specdec import ModelDrafter
from test_kvcache import poison

MODEL = make_gpt(2)
B, T, ROOM = 3, 4, 60


def law(logits):
    return (logits / 2).softmax(-1)  # of the test's own, so that its use can be seen


@given(st.lists(st.tuples(st.integers(0, 4), st.lists(st.integers(0, 4), min_size=B, max_size=B)), min_size=1, max_size=6), st.integers(0, 10**6))
def test_guesses_come_from_the_laws_of_a_fresh_forward(history, seed):
    """Each round guesses k tokens; each row then accepts some of them, up to all, and adds a token that the draft did not guess."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(7, (B, ROOM), generator=generator)
    length = torch.full((B,), T)
    drafter = ModelDrafter(MODEL)
    drafter.check(MODEL, 48)
    drafter.start(text[:, :T], ROOM, None)
    assert drafter.cache.length.tolist() == [T - 1] * B
    for k, accepted in history:
        poison(drafter.cache)
        draft_tokens, draft_probs = drafter.propose(text, length, k, law, generator)
        assert draft_tokens.shape == (B, k) and draft_probs.shape == (B, k, 7) and draft_tokens.dtype == torch.int64
        for b in range(B):
            whole = torch.cat((text[b, : length[b]], draft_tokens[b]))
            expected = law(fresh_logits(MODEL, whole)[length[b] - 1 : length[b] - 1 + k])
            torch.testing.assert_close(draft_probs[b], expected.view(k, 7), rtol=0, atol=1e-12, check_dtype=k > 0)
            n = min(accepted[b], k)
            text[b, length[b] : length[b] + n] = draft_tokens[b, :n]
            length[b] += n + 1  # text already holds a random token there: the correction
        drafter.commit(length - 1, None)
        assert (drafter.cache.length < length).all()


def test_guesses_are_drawn_from_the_reported_laws(monkeypatch):
    """The very tensor that is returned is the one drawn from (BUGS C1-C8)."""
    import specdec

    drawn = []
    monkeypatch.setattr(specdec, "categorical", lambda probs, generator=None, ahead=0: drawn.append(probs) or probs.argmax(-1))
    text = torch.randint(7, (B, ROOM))
    drafter = ModelDrafter(MODEL)
    drafter.start(text[:, :T], ROOM, None)
    tokens, probs = drafter.propose(text, torch.full((B,), T), 3, law, None)
    assert torch.equal(torch.stack(drawn, 1), probs) and torch.equal(tokens, probs.argmax(-1))


def test_rollback_forgets_what_was_not_accepted():
    text = torch.randint(7, (B, ROOM))
    drafter = ModelDrafter(MODEL)
    drafter.start(text[:, :T], ROOM, None)
    drafter.propose(text, torch.full((B,), T), 3, law, torch.Generator().manual_seed(0))
    drafter.commit(torch.tensor([T, T + 1, T + 3]), None)  # after 0, 1 and all 3 accepted guesses
    assert drafter.cache.length.tolist() == [T, T + 1, T + 2]  # nobody has read the third
