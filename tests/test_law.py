"""Proof, part 1: the exact joint law of what the real `generate` emits is the target's own, to 1e-12."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import make_gpt, make_heads
from enumerator import outcomes
from kvcache import KVCache
from model import GPTConfig
from specdec import HeadsDrafter, ModelDrafter, NGramDrafter, TreeDrafter, generate, to_probs


class TableModel:
    """The smallest thing that `generate` takes for a GPT: the law of the next token is read from a table.

    probs (L, V, V): row [t, x] is the law after token x at position t. The cache holds nothing but its lengths.
    """

    def __init__(self, probs):
        self.table = torch.as_tensor(probs, dtype=torch.float64).log()
        self.config = GPTConfig(self.table.shape[-1], len(self.table), 1, 1, 1)
        self.wte = torch.nn.Embedding(self.table.shape[-1], 1)

    def new_cache(self, batch_size, max_length, fixed=False):
        return KVCache(1, batch_size, 1, max_length, 1, fixed=fixed)

    def __call__(self, tokens, cache, tree=None):
        positions, _ = cache.extend(tokens.shape[1], tree)
        return self.table[positions.clamp(max=len(self.table) - 1), tokens], torch.zeros(*tokens.shape, 1)


def target_law(model, prompt, n, law, eos=None):
    """{n tokens, or up to eos: probability} of the target alone, one whole text at a time."""
    out = {}
    for tokens in itertools.product(range(model.config.vocab_size), repeat=n):
        text = torch.tensor([[*prompt, *tokens]])
        logits = model(text[:, :-1], model.new_cache(1, 64))[0][0, len(prompt) - 1 :]
        end = tokens.index(eos) + 1 if eos in tokens else n
        out[tokens[:end]] = law(logits).gather(-1, text[0, len(prompt) :, None])[:end].prod().item()
    return out


def assert_same_law(target, draft, prompts, n, k, eos=None, drafter=None, rule="rejection", **options):
    """The joint law of n tokens in each row is the product of the rows' own target laws. Returns alpha, exactly."""
    drafter = ModelDrafter(draft) if draft else drafter
    got, evaluated, accepted = {}, 0.0, 0.0

    def run():
        return generate(target, torch.tensor(prompts), n, drafter=drafter, k=k, rule=rule, eos=eos, seed=0, **options)

    for result, probability in outcomes(run):
        texts = tuple(map(tuple, result.tokens))
        got[texts] = got.get(texts, 0) + probability
        evaluated += probability * result.stats.evaluated
        accepted += probability * result.stats.accepted

    rows = [target_law(target, prompt, n, lambda logits: to_probs(logits, **options), eos) for prompt in prompts]
    for texts in itertools.product(rows[0], repeat=len(prompts)):
        expected = math.prod(row[text] for row, text in zip(rows, texts))
        assert abs(got.pop(texts, 0.0) - expected) < 1e-12, texts
    assert not got  # nothing of another length
    return accepted / evaluated if evaluated else None


def gpts(seed, V):
    return make_gpt(seed, V, 16, 1, 1, 8, 3.0), make_gpt(seed + 1, V, 16, 1, 1, 4, 3.0)


AGREE_HALFWAY = {2: 12, 3: 0}  # seeds whose pairs have alpha near .5: where all is accepted, or nothing is, a test proves little


@pytest.mark.parametrize("V, k, n", [(2, 1, 4), (2, 2, 4), (2, 3, 4), (3, 1, 3), (3, 2, 3)])
def test_small_gpts(V, k, n):
    assert 0.3 < assert_same_law(*gpts(AGREE_HALFWAY[V], V), [[1, 0]], n, k) < 0.8


@settings(max_examples=10)
@given(st.integers(0, 10**6), st.sampled_from([(2, 1, 3), (2, 2, 4), (3, 1, 3)]))
def test_any_small_gpts(seed, case):
    V, k, n = case
    assert_same_law(*gpts(seed, V), [[1, 0, 1]], n, k)


def test_a_ragged_batch():
    """The joint law of two rows is the product of their own: neither waits for the other, nor hears of it."""
    assert 0.3 < assert_same_law(*gpts(AGREE_HALFWAY[2], 2), [[1, 0], [0, 0]], 3, 1) < 0.8


@pytest.mark.parametrize("eos", [None, 1])
def test_a_ragged_batch_over_several_rounds(eos):
    """k = 2, four tokens in each of two rows, one of whose laws is always sure, to keep the number of outcomes small."""
    p = torch.tensor([[0.7, 0.3], [1.0, 0.0]])  # after token 0, after token 1
    q = torch.tensor([[0.4, 0.6], [1.0, 0.0]])
    target, draft = TableModel(p.expand(8, 2, 2)), TableModel(q.expand(8, 2, 2))
    assert 0.3 < assert_same_law(target, draft, [[0], [1]], 4, 2, eos) < 1


@pytest.mark.parametrize("V, k, n", [(3, 1, 3), (2, 2, 4)])
def test_with_an_eos(V, k, n):
    """Texts of every length, each with its own probability."""
    for eos in range(V):
        assert_same_law(*gpts(AGREE_HALFWAY[V], V), [[1, 0]], n, k, eos)


@pytest.mark.parametrize("k, options", [
    (1, {"temperature": 0.5}), (1, {"temperature": 2.0}), (2, {"top_k": 2}), (2, {"top_p": 0.8}), (2, {"top_k": 2, "top_p": 0.7, "temperature": 1.5}),
])  # fmt: skip
def test_with_filters(k, options):
    """Temperature, top-k and top-p apply to both laws, the one drawn from and the one judged by (mutants.py C1-C8)."""
    assert_same_law(*gpts(AGREE_HALFWAY[3], 3), [[1, 0]], k + 2, k, **options)


def tables(V):
    """Laws by position and last token, with zeros and one-hots among them."""
    row = st.lists(st.sampled_from([0, 0, 1, 2, 5]), min_size=V, max_size=V).filter(any)
    table = st.lists(st.lists(row, min_size=V, max_size=V), min_size=8, max_size=8)
    return table.map(lambda t: TableModel(torch.tensor(t, dtype=torch.float64) / torch.tensor(t).sum(-1, keepdim=True)))


@settings(max_examples=25)
@given(tables(2), tables(2), st.integers(1, 3))
def test_any_laws(target, draft, k):
    assert_same_law(target, draft, [[0]], k + 2, k)


@settings(max_examples=15)
@given(tables(3), tables(3), st.integers(1, 2))
def test_any_laws_of_three_tokens(target, draft, k):
    assert_same_law(target, draft, [[0]], k + 2, k)


def test_equal_and_disjoint_laws():
    even = TableModel(torch.full((8, 2, 2), 0.5))
    ones = TableModel(torch.tensor([0.0, 1.0]).expand(8, 2, 2))
    zeros = TableModel(torch.tensor([1.0, 0.0]).expand(8, 2, 2))
    for k in (1, 2, 3):
        assert assert_same_law(even, even, [[0]], k + 2, k) == pytest.approx(1)
        assert assert_same_law(ones, zeros, [[0]], k + 2, k) == 0
        assert_same_law(even, ones, [[0]], k + 2, k)
        assert_same_law(ones, even, [[0]], k + 2, k)


def test_plain_decoding():
    assert_same_law(gpts(5, 3)[0], None, [[1, 0], [2, 2]], 2, 1)


# -- every drafter with every rule


def make_drafters(V):
    """{name: drafter} for the target of gpts(AGREE_HALFWAY[V], V)."""
    draft, heads = gpts(AGREE_HALFWAY[V], V)[1], make_heads(3, V, 8, n_state=8)
    return {
        "model": ModelDrafter(draft), "ngram": NGramDrafter(), "heads": HeadsDrafter(heads), "blind": HeadsDrafter(make_heads(4, V, 8, markov=False, n_state=8)),
        "confident": HeadsDrafter(heads, [1, 1.1, 1.3, 1.6]),
    }  # fmt: skip


@pytest.mark.parametrize("drafter", make_drafters(2))
@pytest.mark.parametrize("rule", ["rejection", "block", "coupled"])
@pytest.mark.parametrize("k", [1, 2])
def test_every_drafter_with_every_rule(drafter, rule, k):
    """Two tokens, several rounds; a prompt in which n-grams repeat."""
    target = gpts(AGREE_HALFWAY[2], 2)[0]
    alpha = assert_same_law(target, None, [[1, 0, 1]], k + 2, k, drafter=make_drafters(2)[drafter], rule=rule)
    assert 0.1 < alpha < 0.95


@pytest.mark.parametrize("drafter", ["ngram", "heads"])
@pytest.mark.parametrize("rule", ["rejection", "block"])
def test_every_drafter_with_three_tokens(drafter, rule):
    assert_same_law(gpts(AGREE_HALFWAY[3], 3)[0], None, [[1, 0, 1]], 3, 2, drafter=make_drafters(3)[drafter], rule=rule)


@pytest.mark.parametrize("rule", ["block", "coupled"])
def test_ragged_batches_end_of_text_and_filters_under_the_other_rules(rule):
    target, draft = gpts(AGREE_HALFWAY[2], 2)
    assert_same_law(target, draft, [[1, 0], [0, 0]], 3, 1, rule=rule)
    assert_same_law(target, draft, [[1, 0]], 4, 2, eos=1, rule=rule)
    assert_same_law(target, draft, [[1, 0]], 4, 2, temperature=0.5, rule=rule)


@settings(max_examples=25)
@given(tables(2), tables(2), st.integers(1, 3), st.sampled_from(["block", "coupled"]))
def test_any_laws_under_the_other_rules(target, draft, k, rule):
    assert_same_law(target, draft, [[0]], k + 2, k, rule=rule)


@settings(max_examples=10)
@given(tables(3), tables(3))
def test_any_laws_of_three_tokens_under_the_block_rule(target, draft):
    assert_same_law(target, draft, [[0]], 4, 2, rule="block")


TREES = {"2,1": (2, 1), "1,2": (1, 2), "2,2": (2, 2), "3": (3,)}


@pytest.mark.parametrize("widths", TREES.values(), ids=TREES)
@pytest.mark.parametrize("drafter", ["model", "heads"])
@pytest.mark.parametrize("top", [False, True])
def test_trees(widths, drafter, top):
    """Children drawn without replacement, or the best ones; also when there are more of them than tokens."""
    for V in (2, 3) if widths in ((3,), (1, 2)) else (2,):
        target = gpts(AGREE_HALFWAY[V], V)[0]
        assert_same_law(target, None, [[1, 0]], 3, 1, drafter=TreeDrafter(make_drafters(V)[drafter], widths, top))


@settings(max_examples=15)
@given(tables(2), tables(2), st.sampled_from([(2, 1), (2, 2), (3,)]), st.booleans())
def test_trees_of_any_laws(target, draft, widths, top):
    assert_same_law(target, None, [[0]], len(widths) + 1, 1, drafter=TreeDrafter(ModelDrafter(draft), widths, top))


def test_trees_in_a_ragged_batch():
    target, draft = gpts(AGREE_HALFWAY[2], 2)
    assert_same_law(target, None, [[1, 0], [0, 0]], 2, 1, drafter=TreeDrafter(ModelDrafter(draft), (2,)))


def test_a_lossy_rule_fails_this_very_test():
    """Medusa's typical acceptance is fast, and another law: what this file is for."""
    with pytest.raises(AssertionError):
        assert_same_law(*gpts(AGREE_HALFWAY[2], 2), [[1, 0]], 4, 2, rule="lossy-typical")


def test_a_length_that_looks_at_the_guess_in_question_fails_it_too():
    """Drop the guess if it is token 1, and (.7, .3) becomes (.85, .15)."""

    class Peeking(ModelDrafter):
        def propose(self, *args):
            tokens, probs = super().propose(*args)
            return tokens, probs * (tokens == 0)[..., None]

    target, draft = (TableModel(torch.tensor(p).expand(8, 2, 2)) for p in ([0.7, 0.3], [0.5, 0.5]))
    with pytest.raises(AssertionError):
        assert_same_law(target, None, [[0]], 2, 1, drafter=Peeking(draft))
