"""A model with a cache says what it says without one: for every chunking, after every history of rollbacks, in every row.

All slots that hold no token are filled with NaN, which spreads to the logits if a single one of them is read.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import fresh_logits, make_gpt
from kvcache import KVCache

MODEL = make_gpt(1)


def poison(cache):
    """NaN in every slot at or beyond its row's length. With fixed shapes, large numbers: there what is hidden must be finite."""
    unused = torch.arange(cache.k.shape[3]) >= cache.length[:, None]
    for buffer in (cache.k, cache.v):
        buffer.masked_fill_(unused[None, :, None, :, None], 1e9 if cache.fixed else float("nan"))


@given(st.lists(st.integers(1, 6), min_size=1, max_size=8), st.booleans())
def test_every_chunking_equals_one_pass(chunks, fixed):
    tokens = torch.randint(7, (sum(chunks),))
    cache = MODEL.new_cache(1, fixed=fixed)
    logits = []
    for chunk in tokens.split(chunks):
        poison(cache)
        logits.append(MODEL(chunk[None], cache)[0][0])
    torch.testing.assert_close(torch.cat(logits), fresh_logits(MODEL, tokens), rtol=0, atol=1e-12)
    assert cache.length.tolist() == [len(tokens)]


histories = st.lists(st.tuples(st.integers(1, 5), st.lists(st.integers(0, 5), min_size=3, max_size=3)), min_size=1, max_size=8)


@given(histories, st.booleans(), st.randoms(use_true_random=False))
def test_every_history_of_rollbacks_in_a_ragged_batch(history, fixed, random):
    """Each round reads T tokens in all three rows, then takes back a different number in each: mutants.py E1-E20."""
    cache = MODEL.new_cache(3, fixed=fixed)
    texts = [[], [], []]
    for T, undone in history:
        new = [[random.randrange(7) for _ in range(T)] for _ in texts]
        poison(cache)
        logits, _ = MODEL(torch.tensor(new), cache)
        for b in range(3):
            texts[b] += new[b]
            torch.testing.assert_close(logits[b], fresh_logits(MODEL, torch.tensor(texts[b]))[-T:], rtol=0, atol=1e-12)
            texts[b] = texts[b][: len(texts[b]) - min(undone[b], T)]
        cache.rollback(torch.tensor([len(text) for text in texts]))


def test_rollback_moves_the_length_and_nothing_else():
    cache = MODEL.new_cache(2, 10)
    MODEL(torch.randint(7, (2, 6)), cache)
    k, v, where = cache.k.clone(), cache.v.clone(), (cache.k.data_ptr(), cache.v.data_ptr())
    cache.rollback(torch.tensor([5, 2]))
    assert cache.length.tolist() == [5, 2] and cache.length.dtype == torch.int64
    cache.rollback(2)
    assert cache.length.tolist() == [2, 2]
    assert torch.equal(cache.k, k) and torch.equal(cache.v, v)
    MODEL(torch.randint(7, (2, 8)), cache)
    assert (cache.k.data_ptr(), cache.v.data_ptr()) == where  # nothing grew or moved


def test_rollback_keeps_no_hold_on_its_argument():
    cache = MODEL.new_cache(2, 10)
    MODEL(torch.randint(7, (2, 6)), cache)
    length = torch.tensor([5, 4])
    cache.rollback(length)
    length += 1
    assert cache.length.tolist() == [5, 4]


@pytest.mark.parametrize("length", [-1, 4, [0, 4], [-1, 0]])
def test_impossible_rollback_is_refused_and_changes_nothing(length):
    cache = MODEL.new_cache(2, 10)
    MODEL(torch.randint(7, (2, 3)), cache)
    with pytest.raises(ValueError, match="roll back"):
        cache.rollback(torch.tensor(length))
    assert cache.length.tolist() == [3, 3]


def test_a_full_cache_refuses_more():
    cache = MODEL.new_cache(1, 4)
    MODEL(torch.randint(7, (1, 3)), cache)
    with pytest.raises(ValueError, match="do not fit"):
        MODEL(torch.randint(7, (1, 2)), cache)
    assert cache.length.tolist() == [3]
    MODEL(torch.randint(7, (1, 1)), cache)


def test_shapes_device_and_dtype():
    cache = KVCache(2, 3, 4, 5, 6, dtype=torch.bfloat16)
    assert cache.k.shape == cache.v.shape == (2, 3, 4, 5, 6)
    assert cache.k.dtype == cache.v.dtype == torch.bfloat16
    assert cache.length.tolist() == [0, 0, 0]
