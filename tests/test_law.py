"""Proof, part 1: the exact joint distribution of what `generate` emits is the target's own.

Exact means to 1e-12, over every way that the coins and draws inside can fall.
"""

import functools
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import specdec
from conftest import make_gpt, make_heads
from enumerator import outcomes
from extras import ConfidentHeadsDrafter, accept_typical_lossy
from kvcache import KVCache
from model import GPTConfig
from specdec import HeadsDrafter, ModelDrafter, NGramDrafter, NoDrafter, TreeDrafter
from specdec import generate, rounds, to_probs


class TableModel:
    """The smallest thing that `generate` takes for a GPT: it reads from a table what comes next.

    probs (L, V, V): row [t, x] is the distribution after token x at position t. The cache holds
    nothing but its lengths.
    """

    def __init__(self, probs):
        self.table = torch.as_tensor(probs, dtype=torch.float64).log()
        self.config = GPTConfig(self.table.shape[-1], len(self.table), 1, 1, 1)
        self.wte = torch.nn.Embedding(self.table.shape[-1], 1)

    def new_cache(self, batch_size, max_length=None):
        return KVCache(1, batch_size, 1, max_length or len(self.table), 1)

    def __call__(self, tokens, cache):
        """cache: a KVCache, or a TreeView of one."""
        positions, _ = cache.extend(tokens.shape[1])
        positions = positions.clamp(max=len(self.table) - 1)
        return self.table[positions, tokens], torch.zeros(*tokens.shape, 1)


class Sparing:
    """Any drafter, asked for no guess at what may be the last token of the longest text.

    It takes the place of the drafter where such guesses would multiply the outcomes, tenfold in
    some cases. They are tried in smaller cases.
    """

    def __init__(self, drafter):
        self.drafter, self.none = drafter, NoDrafter()

    def start(self, *args):
        self.none.start(*args), self.drafter.start(*args)

    def propose(self, rows, k, probs_of, generator):
        k = min(k, rows.room().max().item() - 1)
        return (self.drafter if k > 0 else self.none).propose(rows, k, probs_of, generator)

    def commit(self, rows, hidden):
        self.drafter.commit(rows, hidden)


def texts_of(model, prompt, n, probs_of, eos=()):
    """{n tokens, or up to the first eos: probability} of the target alone, each text read whole."""
    out = {}
    for tokens in itertools.product(range(model.config.vocab_size), repeat=n):
        text = torch.tensor([[*prompt, *tokens]])
        logits = model(text[:, :-1], model.new_cache(1, 64))[0][0, len(prompt) - 1 :]
        end = next((i + 1 for i, token in enumerate(tokens) if token in eos), n)
        probs = probs_of(logits).gather(-1, text[0, len(prompt) :, None])
        out[tokens[:end]] = probs[:end].prod().item()
    return out


def assert_exact(
    target, draft, prompts, n, k, eos=None, drafter=None, rule="rejection", spare=False,
    alone=None, **options,
):  # fmt: skip
    """The joint distribution of n tokens in each row is the product of the rows' own, those of the
    target alone. Returns alpha, exactly.

    spare: see `Sparing`. alone: a model with the target's distributions, to be read alone.
    """
    drafter = ModelDrafter(draft) if draft else drafter
    drafter = Sparing(drafter) if spare else drafter
    prompt = torch.tensor(prompts) if len({len(p) for p in prompts}) == 1 else prompts
    got, evaluated, accepted = {}, 0.0, 0.0

    def run():
        return generate(
            target, prompt, n, drafter=drafter, k=k, rule=rule, eos=eos, seed=0, **options
        )

    for result, probability in outcomes(run):
        texts = tuple(map(tuple, result.tokens))
        got[texts] = got.get(texts, 0) + probability
        evaluated += probability * result.stats.evaluated
        accepted += probability * result.stats.accepted

    ends = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    probs_of = functools.partial(to_probs, **options)
    rows = [texts_of(alone or target, p, n, probs_of, ends) for p in prompts]
    for texts in itertools.product(*rows):
        expected = math.prod(row[text] for row, text in zip(rows, texts))
        assert abs(got.pop(texts, 0.0) - expected) < 1e-12, texts
    assert not got  # nothing of another length
    return accepted / evaluated if evaluated else None


def gpts(seed, V):
    return make_gpt(seed, V, 16, 1, 1, 8, 3.0), make_gpt(seed + 1, V, 16, 1, 1, 4, 3.0)


# Seeds whose pairs have alpha near .5: where all is accepted, or nothing is, a test proves little.
AGREE_HALFWAY = {2: 12, 3: 0}


@pytest.mark.parametrize("V, k, n", [(2, 1, 4), (2, 2, 4), (2, 3, 4), (3, 1, 3), (3, 2, 3)])
def test_small_gpts(V, k, n):
    assert 0.3 < assert_exact(*gpts(AGREE_HALFWAY[V], V), [[1, 0]], n, k, spare=True) < 0.8


@settings(max_examples=8)
@given(st.integers(0, 10**6), st.sampled_from([(2, 1, 3), (2, 2, 4), (3, 1, 3)]))
def test_any_small_gpts(seed, case):
    V, k, n = case
    assert_exact(*gpts(seed, V), [[1, 0, 1]], n, k, spare=True)


def test_a_ragged_batch():
    """The joint distribution of two rows is the product of their own: neither waits for the other,
    nor hears of it."""
    assert 0.3 < assert_exact(*gpts(AGREE_HALFWAY[2], 2), [[1, 0], [0, 0]], 3, 1, spare=True) < 0.8


def half_sure():
    """After token 0 there is a choice, after token 1 none: that keeps the outcomes few."""
    tables = [[0.7, 0.3], [1.0, 0.0]], [[0.4, 0.6], [1.0, 0.0]]
    return [TableModel(torch.tensor(t, dtype=torch.float64).expand(12, 2, 2)) for t in tables]


@pytest.mark.parametrize("eos", [None, 1])
def test_a_ragged_batch_over_several_rounds(eos):
    """k = 2, four tokens in each of two rows."""
    assert 0.3 < assert_exact(*half_sure(), [[0], [1]], 4, 2, eos, spare=True) < 1


@pytest.mark.parametrize("V, k, n", [(3, 1, 3), (2, 2, 4)])
def test_with_an_eos(V, k, n):
    """Texts of every length, each with its own probability."""
    for eos in range(V):
        assert_exact(*gpts(AGREE_HALFWAY[V], V), [[1, 0]], n, k, eos)


def test_with_several_eos():
    for eos in ([0, 2], (1, 2), {0, 1}):
        assert_exact(*gpts(AGREE_HALFWAY[3], 3), [[1, 0]], 3, 2, eos, spare=True)
        assert_exact(*gpts(AGREE_HALFWAY[3], 3), [[1, 0]], 2, 2, eos)
    assert_exact(*gpts(AGREE_HALFWAY[2], 2), [[1, 0]], 3, 2, [1, 0])


@pytest.mark.parametrize("k, options", [
    (1, {"temperature": 0.5}), (1, {"temperature": 2.0}), (2, {"top_k": 2}), (2, {"top_p": 0.8}),
    (2, {"top_k": 2, "top_p": 0.7, "temperature": 1.5}),
])  # fmt: skip
def test_with_filters(k, options):
    """Temperature, top-k and top-p apply to both distributions, the one drawn from and the one
    judged by (mutants.py C1-C8)."""
    assert_exact(*gpts(AGREE_HALFWAY[3], 3), [[1, 0]], k + 2, k, spare=True, **options)


def tables(V):
    """Distributions by position and last token, with zeros and one-hots among them."""
    row = st.lists(st.sampled_from([0, 0, 1, 2, 5]), min_size=V, max_size=V).filter(any)
    table = st.lists(st.lists(row, min_size=V, max_size=V), min_size=8, max_size=8)
    return table.map(lambda t: torch.tensor(t).double()).map(
        lambda t: TableModel(t / t.sum(-1, keepdim=True))
    )


@settings(max_examples=25)
@given(tables(2), tables(2), st.integers(1, 3))
def test_any_distributions(target, draft, k):
    assert_exact(target, draft, [[0]], k + 1 + (k < 3), k, spare=True)


@settings(max_examples=15)
@given(tables(3), tables(3), st.integers(1, 2))
def test_any_distributions_of_three_tokens(target, draft, k):
    assert_exact(target, draft, [[0]], k + 2, k, spare=True)


def test_equal_and_disjoint_distributions():
    even = TableModel(torch.full((8, 2, 2), 0.5))
    ones = TableModel(torch.tensor([0.0, 1.0]).expand(8, 2, 2))
    zeros = TableModel(torch.tensor([1.0, 0.0]).expand(8, 2, 2))
    for k in (1, 2, 3):
        assert assert_exact(even, even, [[0]], k + 2, k, spare=True) == pytest.approx(1)
        assert assert_exact(ones, zeros, [[0]], k + 2, k, spare=True) == 0
        assert_exact(even, ones, [[0]], k + 2, k, spare=True)
        assert_exact(ones, even, [[0]], k + 2, k, spare=True)


def test_plain_decoding():
    assert_exact(gpts(5, 3)[0], None, [[1, 0], [2, 2]], 2, 1)
    assert_exact(gpts(5, 3)[0], None, [[1, 0], [2, 2, 1, 0]], 2, 1, eos=[0, 2])


def test_plain_decoding_reports_the_distributions_and_draws_from_the_generator():
    """A round reports no guess, and what its token was drawn from. The seed decides all."""
    target, prompts = gpts(5, 3)[0], [[1, 0], [2, 2, 1, 0]]
    torch.manual_seed(1)
    before = torch.get_rng_state()

    def texts(seed):
        texts = [list(prompt) for prompt in prompts]
        for r in rounds(target, prompts, 6, seed=seed):
            assert r.guesses.shape == (2, 0) and r.draft_probs.shape == (2, 0, 3)
            assert r.n_accepted.tolist() == [0, 0] and r.n_new.tolist() == [1, 1]
            for row, text in enumerate(texts):
                expected = to_probs(target(torch.tensor([text]))[0][0, -1:])
                torch.testing.assert_close(r.target_probs[row], expected, rtol=0, atol=1e-12)
                text.append(r.tokens[row, 0].item())
        return texts

    assert texts(0) == texts(0)
    assert len({str(texts(seed)) for seed in range(10)}) > 5
    assert torch.equal(torch.get_rng_state(), before)


# -- every drafter with every rule


def make_drafters(V):
    """{name: drafter} for the target of gpts(AGREE_HALFWAY[V], V)."""
    draft, heads = gpts(AGREE_HALFWAY[V], V)[1], make_heads(3, V, 8, n_state=8)
    return {
        "model": ModelDrafter(draft),
        "ngram": NGramDrafter(),
        "heads": HeadsDrafter(heads),
        "blind": HeadsDrafter(make_heads(4, V, 8, markov=False, n_state=8)),
        "confident": ConfidentHeadsDrafter(heads, [1, 1.1, 1.3, 1.6]),
    }


@pytest.mark.parametrize("drafter", make_drafters(2))
@pytest.mark.parametrize("rule", ["rejection", "block", "coupled"])
@pytest.mark.parametrize("k", [1, 2])
def test_every_drafter_with_every_rule(drafter, rule, k):
    """Two tokens, several rounds; a prompt in which n-grams repeat."""
    target, drafter = gpts(AGREE_HALFWAY[2], 2)[0], make_drafters(2)[drafter]
    prompt = [[1, 0, 1]]
    alpha = assert_exact(target, None, prompt, k + 2, k, drafter=drafter, rule=rule, spare=True)
    assert 0.1 < alpha < 0.95


@pytest.mark.parametrize("drafter", make_drafters(2))
@pytest.mark.parametrize("rule", ["rejection", "block", "coupled"])
def test_every_drafter_with_every_rule_up_to_the_last_token(drafter, rule):
    """The last guesses, or the bonus, may be more than the budget has room for."""
    target, drafter = gpts(AGREE_HALFWAY[2], 2)[0], make_drafters(2)[drafter]
    assert_exact(target, None, [[1, 0, 1]], 2, 2, drafter=drafter, rule=rule)


@settings(max_examples=25)
@given(tables(2), tables(2), st.integers(1, 3), st.sampled_from(["rejection", "block", "coupled"]))
def test_any_distributions_up_to_the_last_token(target, draft, k, rule):
    assert_exact(target, draft, [[0]], 2, k, rule=rule)
    assert_exact(target, draft, [[0], [1, 1]], 1, k, rule=rule)
    assert_exact(target, draft, [[0]], 3, 1, eos=1, rule=rule)


@pytest.mark.parametrize("drafter", ["ngram", "heads"])
@pytest.mark.parametrize("rule", ["rejection", "block"])
def test_every_drafter_with_three_tokens(drafter, rule):
    target, drafter = gpts(AGREE_HALFWAY[3], 3)[0], make_drafters(3)[drafter]
    assert_exact(target, None, [[1, 0, 1]], 3, 2, drafter=drafter, rule=rule, spare=True)


@pytest.mark.parametrize("rule", ["block", "coupled"])
def test_ragged_batches_end_of_text_and_filters_under_the_other_rules(rule):
    target, draft = gpts(AGREE_HALFWAY[2], 2)
    assert_exact(target, draft, [[1, 0], [0, 0]], 3, 1, rule=rule, spare=True)
    assert_exact(target, draft, [[1, 0]], 4, 2, eos=1, rule=rule, spare=True)
    assert_exact(target, draft, [[1, 0]], 4, 2, temperature=0.5, rule=rule, spare=True)


@pytest.mark.parametrize("drafter", ["model", "ngram", "heads"])
@pytest.mark.parametrize("rule", ["rejection", "block", "coupled"])
def test_prompts_of_different_lengths(drafter, rule):
    """Each row has the distribution that it has alone, also where one ends early."""
    target, drafter = gpts(AGREE_HALFWAY[2], 2)[0], make_drafters(2)[drafter]
    assert_exact(target, None, [[1, 0, 1], [0]], 2, 2, drafter=drafter, rule=rule, spare=True)
    options = {"drafter": drafter, "rule": rule, "spare": rule != "rejection"}
    assert_exact(target, None, [[0], [1, 0, 1, 1]], 2, 1, 1, **options)


@pytest.mark.parametrize("rule", ["rejection", "block", "coupled"])
def test_prompts_of_different_lengths_over_several_rounds(rule):
    assert_exact(*half_sure(), [[0, 1, 1], [1]], 4, 2, rule=rule, spare=True)
    assert_exact(*half_sure(), [[1], [0, 1, 1, 0]], 3, 2, 1, rule=rule, spare=True)


@pytest.mark.parametrize("drafter", ["model", "ngram", "heads"])
@pytest.mark.parametrize("rule", ["rejection", "block"])
def test_prompts_of_different_lengths_with_several_eos(drafter, rule):
    """Three tokens, two of which end a text."""
    target, drafter = gpts(AGREE_HALFWAY[3], 3)[0], make_drafters(3)[drafter]
    prompts = [[1, 2, 1], [0]]
    assert_exact(target, None, prompts, 2, 2, [0, 2], drafter=drafter, rule=rule, spare=True)


@settings(max_examples=25)
@given(tables(2), tables(2), st.integers(1, 3), st.sampled_from(["block", "coupled"]))
def test_any_distributions_under_the_other_rules(target, draft, k, rule):
    assert_exact(target, draft, [[0]], k + 2, k, rule=rule, spare=True)


@settings(max_examples=10)
@given(tables(3), tables(3))
def test_any_distributions_of_three_tokens_under_the_block_rule(target, draft):
    assert_exact(target, draft, [[0]], 4, 2, rule="block", spare=True)


TREES = {"2,1": (2, 1), "1,2": (1, 2), "2,2": (2, 2), "3": (3,)}


@pytest.mark.parametrize("widths", TREES.values(), ids=TREES)
@pytest.mark.parametrize("drafter", ["model", "heads"])
@pytest.mark.parametrize("top", [False, True])
def test_trees(widths, drafter, top):
    """Children drawn without replacement, or the best ones; also when they outnumber the tokens."""
    for V, n in ((2, 3), (3, 2)) if widths in ((3,), (1, 2)) else ((2, 3),):
        tree = TreeDrafter(make_drafters(V)[drafter], widths, top)
        assert_exact(gpts(AGREE_HALFWAY[V], V)[0], None, [[1, 0]], n, 1, drafter=tree)


@settings(max_examples=15)
@given(tables(2), tables(2), st.sampled_from([(2, 1), (2, 2), (3,)]), st.booleans())
def test_trees_of_any_distributions(target, draft, widths, top):
    tree = TreeDrafter(ModelDrafter(draft), widths, top)
    assert_exact(target, None, [[0]], len(widths) + 1, 1, drafter=tree)


def test_trees_in_a_ragged_batch():
    target, draft = gpts(AGREE_HALFWAY[2], 2)
    tree = TreeDrafter(ModelDrafter(draft), (2,))
    assert_exact(target, None, [[1, 0], [0, 0]], 2, 1, drafter=tree)
    assert_exact(target, None, [[1, 0, 1], [0]], 2, 1, [1], drafter=tree)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rule", ["rejection", "block", "coupled", "tree"])
def test_what_follows_an_impossible_token_may_be_broken(rule, broken):
    """Nobody ever writes token 1 after token 0 at an even position, though the draft guesses it. So
    it does not matter what the target says behind that guess, be it NaN or inf."""
    probs = torch.tensor([[[1.0, 0.0], [0.4, 0.6]], [[0.7, 0.3], [0.2, 0.8]]])
    target, alone = (TableModel(probs.double().repeat(4, 1, 1)) for _ in range(2))
    draft = TableModel(torch.full((8, 2, 2), 0.5))
    options = {"drafter": ModelDrafter(draft), "rule": rule}
    if rule == "tree":
        options = {"drafter": TreeDrafter(ModelDrafter(draft), (2, 1))}
    # Token 1 at position 1: only ever a guess, if the text begins with 0 at position 0.
    target.table[1, 1] = broken
    assert_exact(target, None, [[0]], 3, 2, alone=alone, **options)
    target.table[1, 1, 0] = 0.5
    assert_exact(target, None, [[0]], 3, 2, alone=alone, **options)


# -- k chosen by the clock


class Noting(ModelDrafter):
    """texts: of each text, the number of guesses wanted in each round."""

    def __init__(self, model):
        super().__init__(model)
        self.texts = []

    def start(self, *args):
        super().start(*args)
        self.texts.append([])
        self.wanted = 0

    def propose(self, rows, k, probs_of, generator):
        self.wanted = k
        return super().propose(rows, k, probs_of, generator)

    def commit(self, rows, hidden):
        super().commit(rows, hidden)
        self.texts[-1].append(self.wanted)
        self.wanted = 0


def clock(monkeypatch, readings):
    """Replace the clock that AutoK reads. It begins anew with each generation, as AutoK does."""
    start, left = specdec.AutoK.start, iter(readings)

    def start_both(self, *args):
        nonlocal left
        left = itertools.chain(readings, itertools.count(readings[-1]))
        start(self, *args)

    monkeypatch.setattr(specdec.AutoK, "start", start_both)
    names = "perf_counter", "monotonic", "time"
    fake = SimpleNamespace(**dict.fromkeys(names, lambda: next(left)))
    monkeypatch.setattr(specdec, "time", fake)


@pytest.mark.parametrize("rule", ["rejection", "block", "coupled"])
def test_auto_k(monkeypatch, rule, ours):
    """Three rounds without guesses, at 1 second each; then guesses, for good if they are cheap. If
    they are dear, rounds without guesses come again."""
    target, draft = half_sure()
    for readings in [0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 99, 199, 299]:
        clock(monkeypatch, readings)
        drafter = Noting(draft)
        assert 0.3 < assert_exact(target, None, [[0]], 6, "auto", None, drafter, rule) < 1
        assert all(text[:4] == [0, 0, 0, 3] for text in drafter.texts)
        again = any(0 in text[4:] for text in drafter.texts)
        assert again == (readings[-1] == 299)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example([5.0] * 8, *half_sure())  # it stands still
@given(st.lists(st.floats(0, 100), min_size=8, max_size=8), tables(2), tables(2))
def test_auto_k_whatever_the_clock_says(monkeypatch, times, target, draft):
    with monkeypatch.context() as patch:
        clock(patch, times)
        assert_exact(target, draft, [[0]], 5, "auto")


def test_auto_k_in_a_batch_with_end_tokens(monkeypatch):
    """Both rows guess, or none does; the rows stay independent."""
    clock(monkeypatch, range(9))
    target, draft = half_sure()
    draft = Noting(draft)
    assert_exact(target, None, [[0, 1], [1]], 4, "auto", None, draft)
    assert_exact(target, None, [[0], [1, 0, 0]], 5, "auto", 1, draft)
    assert any(map(any, draft.texts)), "no guess was tried in five tokens"


# -- what must fail


def test_a_lossy_rule_fails_this_very_test():
    """Medusa's typical acceptance is fast, and has another distribution: what this file is for."""
    with pytest.raises(AssertionError):
        assert_exact(*gpts(AGREE_HALFWAY[2], 2), [[1, 0]], 4, 2, rule=accept_typical_lossy)


def test_a_length_that_looks_at_the_guess_in_question_fails_it_too():
    """Drop the guess if it is token 1, and (.7, .3) becomes (.85, .15)."""

    class Peeking(ModelDrafter):
        def propose(self, *args):
            tokens, probs = super().propose(*args)
            return tokens, probs * (tokens == 0)[..., None]

    target, draft = (TableModel(torch.tensor(p).expand(8, 2, 2)) for p in ([0.7, 0.3], [0.5, 0.5]))
    with pytest.raises(AssertionError):
        assert_exact(target, None, [[0]], 2, 1, drafter=Peeking(draft))
