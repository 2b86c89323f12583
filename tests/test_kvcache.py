"""A model with a cache says what it says without one.

For every chunking, after every history of rollbacks, in every row. All slots that hold no token are
filled with NaN, which spreads to the logits if a single one of them is read.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves

from conftest import fresh_logits, make_gpt
from kvcache import FixedKVCache, KVCache, TreeView

MODEL = make_gpt(1)


def poison(cache):
    """NaN in every slot at or beyond its row's length.

    With fixed shapes, large numbers: there what is hidden must be finite.
    """
    unused = torch.arange(cache.k.shape[3]) >= cache.length[:, None]
    value = 1e9 if isinstance(cache, FixedKVCache) else float("nan")
    for buffer in (cache.k, cache.v):
        buffer.masked_fill_(unused[None, :, None, :, None], value)


def new_cache(batch_size, fixed):
    cache = MODEL.new_cache(batch_size)
    return FixedKVCache(cache) if fixed else cache


@given(st.lists(st.integers(1, 6), min_size=1, max_size=8), st.booleans())
def test_every_chunking_equals_one_pass(chunks, fixed):
    tokens = torch.randint(7, (sum(chunks),))
    cache = new_cache(1, fixed)
    logits = []
    for chunk in tokens.split(chunks):
        poison(cache)
        logits.append(MODEL(chunk[None], cache)[0][0])
    expected = fresh_logits(MODEL, tokens)
    torch.testing.assert_close(torch.cat(logits), expected, rtol=0, atol=1e-12)
    assert cache.length.tolist() == [len(tokens)]


undone = st.lists(st.integers(0, 5), min_size=3, max_size=3)
histories = st.lists(st.tuples(st.integers(1, 5), undone), min_size=1, max_size=8)


@given(histories, st.booleans(), st.randoms(use_true_random=False))
def test_every_history_of_rollbacks_in_a_ragged_batch(history, fixed, random):
    """Each round reads T tokens in all three rows, then takes back a different number in each.

    mutants.py E1-E20.
    """
    cache = new_cache(3, fixed)
    texts = [[], [], []]
    for T, undone in history:
        new = [[random.randrange(7) for _ in range(T)] for _ in texts]
        poison(cache)
        logits, _ = MODEL(torch.tensor(new), cache)
        for b in range(3):
            texts[b] += new[b]
            expected = fresh_logits(MODEL, torch.tensor(texts[b]))[-T:]
            torch.testing.assert_close(logits[b], expected, rtol=0, atol=1e-12)
            texts[b] = texts[b][: len(texts[b]) - min(undone[b], T)]
        cache.rollback(torch.tensor([len(text) for text in texts]))


@given(st.lists(st.integers(0, 6), min_size=1, max_size=4), st.integers(1, 4), st.booleans())
def test_positions_and_mask_of_each_row_follow_from_its_own_length(lengths, T, fixed):
    """Token t of a row of n tokens stands at n + t, and sees the slots 0 to n + t."""
    cache = KVCache(1, len(lengths), 1, 12, 1, dtype=torch.float64)
    cache = FixedKVCache(cache) if fixed else cache
    cache.length += torch.tensor(lengths)
    positions, mask = cache.extend(T)
    assert positions.tolist() == [[n + t for t in range(T)] for n in lengths]
    assert cache.length.tolist() == [n + T for n in lengths]
    S = 12 if fixed else max(lengths) + T
    sees = [[[[s <= n + t for s in range(S)] for t in range(T)]] for n in lengths]
    if mask is None:
        assert torch.tensor(sees).all() and not fixed
    else:
        expected = torch.tensor(sees).double().log()  # 0 and -inf
        assert mask.dtype == torch.float64 and torch.equal(mask, expected)


def test_a_cache_holds_nothing_that_grows_with_the_square_of_its_length():
    """Keys, values, and a few numbers per slot and per row: at most 16 bytes of each."""
    B, L = 3, 1000
    for fixed in (False, True):
        cache = KVCache(1, B, 1, L, 1)
        cache = FixedKVCache(cache) if fixed else cache
        for T in (5, 1):
            held = [x for x in tree_leaves(vars(cache)) if torch.is_tensor(x)]
            storages = [x.untyped_storage() for x in held]
            size = {storage.data_ptr(): storage.nbytes() for storage in storages}
            assert sum(size.values()) <= 2 * B * L * 4 + 16 * (L + B * T)
            cache.extend(T)
            cache.rollback(torch.tensor([1, 0, 4]))


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


def test_the_lengths_are_changed_in_place():
    """Who holds them sees them change, as a graph does; who wants to keep them clones them."""
    cache = MODEL.new_cache(2, 10)
    length = cache.length
    MODEL(torch.randint(7, (2, 4)), cache)
    cache.rollback(torch.tensor([3, 1]))
    view = TreeView(cache, torch.tensor([[True, False], [True, True]]))
    MODEL(torch.randint(7, (2, 2)), view)
    view.keep(torch.tensor([[0, 1], [0, 1]]))
    assert cache.length is length and length.tolist() == [5, 3]


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
    for length in (length, torch.tensor(length)):
        with pytest.raises(ValueError, match="roll back"):
            cache.rollback(length)
        assert cache.length.tolist() == [3, 3]


def test_a_full_cache_refuses_more():
    cache = MODEL.new_cache(1, 4)
    MODEL(torch.randint(7, (1, 3)), cache)
    with pytest.raises(ValueError, match=r"a row of 3 \+ 2 tokens; the cache holds 4"):
        MODEL(torch.randint(7, (1, 2)), cache)
    assert cache.length.tolist() == [3]
    MODEL(torch.randint(7, (1, 1)), cache)


def test_shapes_device_and_dtype():
    cache = KVCache(2, 3, 4, 5, 6, dtype=torch.bfloat16)
    assert cache.k.shape == cache.v.shape == (2, 3, 4, 5, 6)
    assert cache.k.dtype == cache.v.dtype == torch.bfloat16
    assert cache.length.tolist() == [0, 0, 0]


def test_a_cache_has_its_models_dtype_and_is_as_long_as_its_texts_may_be():
    cache = MODEL.new_cache(3)
    assert cache.k.shape == cache.v.shape == (2, 3, 2, 48, 4) and cache.k.dtype == torch.float64


def test_a_new_cache_holds_numbers():
    """With fixed shapes slots that nobody has written are looked at, with weight 0; 0 * NaN is NaN.

    Here memory that nobody has written is NaN.
    """
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan() and (MODEL.new_cache(2, 10).kv == 0).all()
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_fixed_cache_is_the_same_memory():
    """What was read before shapes were fixed stays, and both sides see one length."""
    cache, tokens = MODEL.new_cache(2, 10), torch.randint(7, (2, 6))
    MODEL(tokens[:, :4], cache)
    fixed = FixedKVCache(cache)
    logits, _ = MODEL(tokens[:, 4:], fixed)
    assert fixed.length is cache.length and fixed.k.data_ptr() == cache.k.data_ptr()
    for row, text in zip(logits, tokens):
        torch.testing.assert_close(row, fresh_logits(MODEL, text)[4:], rtol=0, atol=1e-12)


def test_a_cache_that_was_made_while_decoding_is_made_of_ordinary_tensors():
    """What may be done with it does not depend on where it was made."""
    with torch.inference_mode():
        cache = MODEL.new_cache(1, 10)
    assert not any(x.is_inference() for x in tree_leaves(vars(cache)))
    MODEL(torch.randint(7, (1, 3)), cache)
    cache.rollback(0)
    assert cache.length.tolist() == [0]
