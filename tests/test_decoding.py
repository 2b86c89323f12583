"""The loop: against plain decoding, at every edge, and what it leaves in both caches."""

import itertools
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import specdec
from conftest import fresh_logits, make_gpt, make_heads
from extras import ConfidentHeadsDrafter, accept_typical_lossy
from model import DraftHeads
from specdec import (
    AutoK, HeadsDrafter, ModelDrafter, NGramDrafter, NoDrafter, Rows, Stats, TreeDrafter, generate,
    rounds,
)  # fmt: skip
from test_kvcache import poison

TARGET, DRAFT = make_gpt(1), make_gpt(2, n_layer=1, n_embd=4)
PROMPT = torch.tensor([3, 1, 4, 1, 5])
PROMPTS = torch.tensor([[3, 1, 4], [0, 2, 6], [5, 5, 5]])
RAGGED = [[3, 1, 4], [0], [5, 5, 5, 1, 2, 5], [6, 2]]
batches = PROMPTS[:1], PROMPTS
one_row_and_batch = pytest.mark.parametrize("prompts", batches, ids=["one_row", "batch"])


class NoisyDrafter(ModelDrafter):
    """A drafter that is right as often as we like.

    Its distribution is the model's own at most positions, a random one at the others. (Logits may
    be (B, V), or (B, 1, V): that is up to `propose`.)
    """

    def __init__(self, model, wrong, seed=0):
        super().__init__(model)
        self.wrong, self.generator = wrong, torch.Generator().manual_seed(seed)

    def propose(self, rows, k, probs_of, generator):
        def noisy(logits):
            bad = torch.rand(*logits.shape[:-1], 1, generator=self.generator) < self.wrong
            noise = torch.randn(logits.shape, generator=self.generator).double()
            return probs_of(torch.where(bad, noise, logits))

        return super().propose(rows, k, noisy, generator)


class Sometimes:
    """Another drafter, asked for as many guesses as a list says, over and over; often for none."""

    def __init__(self, drafter, ks):
        self.drafter, self.none, self.ks = drafter, NoDrafter(), itertools.cycle(ks)

    def start(self, *args):
        self.none.start(*args)
        self.drafter.start(*args)

    def propose(self, rows, k, probs_of, generator):
        n = min(k, next(self.ks))
        return (self.drafter if n else self.none).propose(rows, n, probs_of, generator)

    def commit(self, rows, hidden):
        self.drafter.commit(rows, hidden)


class Varying(Sometimes):
    """Looks back: one more guess after a round in which all were accepted, none after others."""

    def __init__(self, drafter):
        super().__init__(drafter, [0])

    def start(self, target, cache, rows, hidden):
        super().start(target, cache, rows, hidden)
        self.n, self.length = 0, rows.length - 1

    def propose(self, rows, k, probs_of, generator):
        all_accepted = (rows.length - self.length > self.n) | (rows.room() == 0)
        self.n = min(self.n + 1, k) if all_accepted.all() else 0
        self.length = rows.length.clone()
        return (self.drafter if self.n else self.none).propose(rows, self.n, probs_of, generator)


DRAFTERS = {
    "always_right": lambda: ModelDrafter(TARGET),
    "small_model": lambda: ModelDrafter(DRAFT),
    "half_wrong": lambda: NoisyDrafter(TARGET, 0.5),
}


@pytest.fixture(params=DRAFTERS)
def drafter(request):
    return DRAFTERS[request.param]()


def heads_drafter(markov=True, seed=0):
    return HeadsDrafter(make_heads(seed, 7, 16, markov))


def confident_heads(times, seed=0):
    return ConfidentHeadsDrafter(make_heads(seed, 7, 16), times)


OTHERS = {
    "ngram": NGramDrafter,
    "heads": heads_drafter,
    "confident_heads": lambda: confident_heads([1, 1.1, 1.2, 1.5, 2, 3, 4]),
    "tree": lambda: TreeDrafter(ModelDrafter(TARGET), (2, 1, 2)),
}
ALL = DRAFTERS | OTHERS
any_drafter = pytest.mark.parametrize("make", ALL.values(), ids=ALL)
NO_TREE = {name: make for name, make in ALL.items() if name != "tree"}
any_chain = pytest.mark.parametrize("make", NO_TREE.values(), ids=NO_TREE)


PLAIN = {}  # what is asked for again and again


def greedy(prompt, n, **options):
    if options.get("drafter"):
        return generate(TARGET, prompt, n, temperature=0, **options).tokens
    key = str((prompt, n, options))
    if key not in PLAIN:
        PLAIN[key] = generate(TARGET, prompt, n, temperature=0, **options).tokens
    return PLAIN[key]


def cut_at(eos, rows):
    """Each row up to its first end token."""
    cut = []
    for row in rows:
        ends = [i for i, token in enumerate(row) if token in eos]
        cut.append(row[: ends[0] + 1] if ends else row)
    return cut


# -- rows of text


four_tokens = st.lists(st.integers(0, 3), min_size=4, max_size=4)
appended = st.lists(st.tuples(four_tokens, st.integers(0, 4)), min_size=3, max_size=3)


@given(st.integers(0, 9), st.sets(st.integers(0, 3)), st.lists(appended, max_size=4))
def test_rows_append_as_far_as_room_and_end_tokens_allow(budget, eos, calls):
    """Several tokens at once, as a round of speculation will. In another order than the cut at the
    budget, an end token that is not reached would count."""
    texts, left = [[5], [6, 4, 5], [5, 5]], [budget] * 3
    prompts = [torch.tensor(text) for text in texts]
    rows = Rows(prompts, budget, spare=4, eos=torch.tensor(sorted(eos)) if eos else None)
    for call in calls:
        expected = []
        for b, (tokens, n) in enumerate(call):
            new = tokens[: min(n, left[b])]
            ends = [i for i, token in enumerate(new) if token in eos]
            new = new[: ends[0] + 1] if ends else new
            texts[b] += new
            left[b] = 0 if ends else left[b] - len(new)
            expected.append(len(new))
        added = rows.append(*(torch.tensor(x) for x in zip(*call)))
        assert added.tolist() == expected, "n tokens, but no more than room, up to the first end"
        assert rows.length.tolist() == [len(text) for text in texts]
        assert rows.room().tolist() == left, "no room behind an end token that was added"
        for row, text in zip(rows.tokens.tolist(), texts):
            assert row[: len(text)] == text, "tokens belong behind the text of their own row"


def test_rows_tell_their_newest_tokens():
    """Each row its own, in their order. Where a row has fewer than n, anything takes their place:
    a drafter asks all rows for as many as one of them needs."""
    rows = Rows([torch.tensor(row) for row in RAGGED], 5, spare=3)
    assert rows.newest().tolist() == [[4], [0], [5], [2]]
    for n in range(1, 7):
        newest = rows.newest(n).tolist()
        for got, row in zip(newest, RAGGED):
            assert len(got) == n, f"(B, n) tokens, also of a row of {len(row)} if n is {n}"
            assert got[-len(row) :] == row[-n:], "the last n of each row, the newest last"


def test_before_plain_decoding_prompts_are_read_but_for_their_newest_token():
    """What is returned are hidden states, which a drafter may look at. (Those behind the end of a
    shorter prompt mean nothing.)"""
    rows = Rows([torch.tensor(row) for row in RAGGED], 5, spare=3)
    cache = TARGET.new_cache(*rows.tokens.shape)
    hidden = specdec.read_prompts(TARGET, cache, rows)
    assert cache.length.tolist() == [len(row) - 1 for row in RAGGED]
    for b, row in enumerate(RAGGED):
        expected = TARGET(torch.tensor([row]))[1][0, :-1]
        torch.testing.assert_close(hidden[b, : len(row) - 1], expected, rtol=0, atol=1e-10)


# -- the same output


@pytest.mark.parametrize("k", range(1, 7))
@any_drafter
@one_row_and_batch
def test_greedy_speculation_is_greedy_decoding(make, k, prompts):
    drafter = make()
    for prompt in (prompts, prompts[:, :1]):
        assert greedy(prompt, 24, drafter=drafter, k=k) == greedy(prompt, 24)


@pytest.mark.parametrize("rule", ["block", "coupled", accept_typical_lossy])
def test_greedy_speculation_is_greedy_decoding_under_every_rule(drafter, rule):
    assert greedy(PROMPTS, 40, drafter=drafter, rule=rule) == greedy(PROMPTS, 40)


two_tokens = st.lists(st.integers(0, 6), min_size=2, max_size=2)
seeds = st.integers(0, 10**6)


@given(seeds, seeds, st.integers(1, 5), st.lists(two_tokens, min_size=1, max_size=4))
def test_greedy_speculation_is_greedy_decoding_for_any_pair(seed, other, k, prompts):
    target, drafter = make_gpt(seed), NoisyDrafter(make_gpt(other), 0.2)
    prompts = torch.tensor(prompts)
    expected = generate(target, prompts, 20, temperature=0).tokens
    assert generate(target, prompts, 20, drafter=drafter, k=k, temperature=0).tokens == expected


@any_drafter
def test_a_row_of_a_batch_is_what_it_is_alone(make):
    """Rows accept different numbers of tokens, end at different times, and do not interact."""
    drafter = make()
    for eos in (None, 2):
        together = greedy(PROMPTS, 30, drafter=drafter, k=3, eos=eos)
        alone = [greedy(prompt, 30, drafter=drafter, k=3, eos=eos)[0] for prompt in PROMPTS]
        assert together == alone


@pytest.mark.parametrize("k", [1, 4])
@any_drafter
def test_a_row_of_a_ragged_batch_is_what_it_is_alone(make, k):
    """Prompts of 1 to 6 tokens, in any order, each with a whole budget of its own."""
    plain = [greedy(prompt, 30)[0] for prompt in RAGGED]
    for order in (RAGGED, RAGGED[::-1]):
        expected = plain if order is RAGGED else plain[::-1]
        for eos in (None, 2, [2, 4]):
            cut = cut_at([] if eos is None else [eos] if eos == 2 else eos, expected)
            result = generate(TARGET, order, 30, drafter=make(), k=k, temperature=0, eos=eos)
            assert result.tokens == cut
            assert result.stats.emitted == sum(map(len, cut))


def test_ragged_batches_in_plain_decoding():
    plain = [greedy(prompt, 30)[0] for prompt in RAGGED]
    assert greedy(RAGGED, 30) == plain
    assert greedy([torch.tensor(prompt) for prompt in RAGGED], 30) == plain
    assert greedy(tuple(map(tuple, RAGGED)), 30) == plain
    for eos in range(7):
        assert greedy(RAGGED, 30, eos=eos) == cut_at([eos], plain)


ragged = st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=9), min_size=2, max_size=5)
makers, end_tokens = st.sampled_from(list(ALL.values())), st.sets(st.integers(0, 6))


@given(ragged, makers, st.integers(1, 5), end_tokens)
def test_any_ragged_batch_is_its_rows(prompts, make, k, eos):
    expected = cut_at(eos, [greedy(prompt, 20)[0] for prompt in prompts])
    assert greedy(prompts, 20, drafter=make(), k=k, eos=eos or None) == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
@pytest.mark.parametrize("temperature", [0, 1])
def test_a_broken_draft_costs_speed_and_nothing_else(value, temperature, request):
    if value and temperature:
        request.getfixturevalue("ours")  # which token is drawn from NaN, if any, is nobody's duty
    broken = make_gpt(2)
    broken.wte.weight.fill_(value)
    drafter = ModelDrafter(broken)
    result = generate(TARGET, PROMPTS, 20, drafter=drafter, temperature=temperature, seed=0)
    assert [len(row) for row in result.tokens] == [20] * 3
    if temperature == 0:
        assert result.tokens == greedy(PROMPTS, 20)


def test_a_rule_may_be_any_function(drafter):
    """It is given what `verify` is given; what it says is done."""
    calls = []

    def never(target_probs, draft_probs, draft_tokens, generator):
        assert isinstance(generator, torch.Generator)
        B, n = draft_tokens.shape
        assert draft_probs.shape == (B, n, 7) and target_probs.shape == (B, n + 1, 7)
        calls.append(n)
        return torch.zeros(B, dtype=torch.int64), target_probs[:, 0].argmax(-1)

    result = generate(TARGET, PROMPTS, 10, drafter=drafter, k=3, rule=never, temperature=0)
    assert result.tokens == greedy(PROMPTS, 10)
    assert calls == [3] * 8 + [2, 1] and result.stats.accepted == 0
    by_name = generate(TARGET, PROMPTS, 20, drafter=ModelDrafter(DRAFT), seed=3)
    by_function = generate(
        TARGET, PROMPTS, 20, drafter=ModelDrafter(DRAFT), rule=specdec.verify, seed=3
    )
    assert by_name == by_function


# -- the right length


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("at_the_edge", [False, True])
@any_drafter
@one_row_and_batch
def test_every_budget(make, k, at_the_edge, prompts):
    """Exactly the budget, also where prompt and budget fill the block_size to the last position."""
    drafter, block_size = make(), TARGET.config.block_size
    for budget in range(k + 3):
        prompt = prompts.repeat(1, 16)[:, : block_size - budget] if at_the_edge else prompts
        tokens = greedy(prompt, budget, drafter=drafter, k=k)
        assert tokens == greedy(prompt, budget)
        assert [len(row) for row in tokens] == [budget] * len(prompts)


@any_drafter
def test_every_budget_of_a_ragged_batch(make):
    """Where the longest row fills the block_size."""
    drafter, longest = make(), PROMPTS.repeat(1, 16)[0].tolist()
    for budget in range(6):
        prompts = [[4], longest[: TARGET.config.block_size - budget], [5, 5]]
        expected = [greedy(prompt, budget)[0] for prompt in prompts]
        assert greedy(prompts, budget, drafter=drafter, k=3) == expected
        assert [len(row) for row in expected] == [budget] * 3


@pytest.mark.parametrize("k", [1, 3, 5])
def test_a_round_guesses_k_tokens_or_as_many_as_there_is_room_for(drafter, k):
    for budget in range(1, k + 3):
        room = torch.full((3,), budget)
        for r in rounds(TARGET, PROMPTS, budget, drafter, k, seed=1):
            hint = "a round guesses k tokens, or as many as the row with the most room has room for"
            assert r.guesses.shape == (3, min(k, room.max())), hint
            assert r.draft_probs.shape == (*r.guesses.shape, 7)
            assert r.target_probs.shape == (3, r.guesses.shape[1] + 1, 7)
            assert r.tokens.shape == (3, r.guesses.shape[1] + 1)
            room -= r.n_new
        assert room.tolist() == [0] * 3


def test_a_round_tells_what_was_guessed_scored_and_judged_one_row():
    """The rule, the drafter and the reader of the rounds see the same."""
    judged, hiddens, n_rounds = [], [], 0

    class Noting(ModelDrafter):
        def start(self, target, cache, rows, hidden):
            hint = "the prompt is read before the drafter starts, which is given the hidden states"
            assert cache.length.tolist() == [4] and hidden.shape == (1, 4, 8), hint
            super().start(target, cache, rows, hidden)

        def commit(self, rows, hidden):
            hiddens.append(hidden)
            super().commit(rows, hidden)

    def noting(target_probs, draft_probs, guesses, generator):
        assert isinstance(generator, torch.Generator), "hand the generator on to the rule"
        out = specdec.verify(target_probs, draft_probs, guesses, generator)
        judged.append(dict(target_probs=target_probs, draft_probs=draft_probs, guesses=guesses))
        judged[-1] |= dict(n_accepted=out[0], token=out[1])
        return out

    filters = {"temperature": 0.7, "top_k": 3, "seed": 1}
    for r in rounds(TARGET, PROMPT, 20, Noting(DRAFT), 3, noting, **filters):
        n_rounds += 1
        assert len(judged) == len(hiddens) == n_rounds, "each round asks the rule it is given, once"
        token, n = judged[-1].pop("token").item(), r.n_accepted.item()
        for name, seen in judged[-1].items():
            assert torch.equal(getattr(r, name), seen), f"{name} of the Round: as the rule saw it"
        assert r.tokens[0, : n + 1].tolist() == [*r.guesses[0, :n].tolist(), token]
        hint = "commit is given the target's hidden states of this pass"
        assert hiddens[-1] is not None and hiddens[-1].shape == (1, r.tokens.shape[1], 8), hint


def test_eos_as_guess_as_correction_and_as_bonus_one_row(drafter):
    """The output ends at the first EOS, wherever in a round that is.

    Nothing after it is output or counted.
    """
    plain = greedy(PROMPT, 30)[0]
    seen = set()
    for eos in set(plain):
        expected = plain[: plain.index(eos) + 1]
        for k in (1, 2, 3, 4, 5):
            assert greedy(PROMPT, 30, eos=eos) == [expected]
            assert greedy(PROMPT, 30, drafter=drafter, k=k, eos=eos) == [expected]
            stats = Stats()
            for r in rounds(TARGET, PROMPT, 30, drafter, k, temperature=0, eos=eos):
                stats.add(r)
            is_guess = (r.n_new <= r.n_accepted).item()
            assert stats.emitted == len(expected) == stats.accepted + stats.rounds - is_guess
            assert stats.evaluated - stats.accepted <= stats.rounds
            if is_guess:
                seen.add(("guess", r.n_new.item()))
            else:
                seen.add("bonus" if r.n_accepted == r.n_guessed else "correction")
    if drafter.model is TARGET:
        assert {("guess", 1), ("guess", 2), ("guess", 3), "bonus"} <= seen
        assert type(drafter) is ModelDrafter or "correction" in seen


@any_drafter
@one_row_and_batch
def test_several_end_tokens(make, prompts):
    """The first of any of them ends a row, given as a list, a tuple, a set or a tensor."""
    plain = greedy(prompts, 30)
    collections = itertools.cycle((list, set, tuple, torch.tensor))
    for i, collection in zip(range(7), collections):
        pair = i, (i + 3) % 7
        eos, expected = collection(pair), cut_at(pair, plain)
        assert greedy(prompts, 30, drafter=make(), k=3, eos=eos) == expected


def test_several_end_tokens_in_plain_decoding():
    plain = greedy(PROMPTS, 30)
    for n in (2, 6, 7):
        for eos in itertools.combinations(range(7), n):
            assert greedy(PROMPTS, 30, eos=eos) == cut_at(eos, plain)


def test_two_end_tokens_by_hand():
    """FAULTS: ipex-llm#11896."""
    prompt = torch.tensor([1, 2, 3, 1, 2])
    plain = greedy(prompt, 6)[0]
    assert plain == [4, 4, 4, 4, 0, 4]
    for drafter in (None, ModelDrafter(DRAFT)):
        assert greedy(prompt, 6, drafter=drafter, eos=[4, 0]) == [[4]]
        assert greedy(prompt, 6, drafter=drafter, eos=[0, 6]) == [[4, 4, 4, 4, 0]]


def test_plain_decoding_ends_each_row_at_its_own_eos():
    plain = greedy(PROMPTS, 30)
    for eos in range(7):
        result = generate(TARGET, PROMPTS, 30, temperature=0, eos=eos)
        assert result.tokens == cut_at([eos], plain)
        assert result.stats.emitted == sum(map(len, result.tokens))


def test_a_row_that_has_ended_has_no_say_in_how_much_is_guessed():
    """Rounds that are for one row alone have as many guesses as when it is alone from the start."""
    prompts, sizes = PROMPTS[[1, 0]], set()
    for seed, eos in itertools.product(range(6), range(7)):
        drafter, decoded = confident_heads([1, 1.2, 1.4, 1.6, 1.8], seed), []
        for p in (prompts[:1], prompts):
            decoding = rounds(TARGET, p, 40, drafter, 4, temperature=0, eos=eos)
            decoded.append([(r.n_new.tolist(), r.guesses.shape[1]) for r in decoding])
        alone, together = decoded
        last = [size for (n_new, *other), size in together if n_new and other == [0]]
        assert last == [size for _, size in alone][len(alone) - len(last) :]
        sizes.update(last)
    assert len(sizes) > 1


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_rows_end_at_their_own_eos_whoever_guesses(make):
    plain = greedy(PROMPTS, 30)
    for eos in range(7):
        result = generate(TARGET, PROMPTS, 30, drafter=make(), k=3, temperature=0, eos=eos)
        assert result.tokens == cut_at([eos], plain)
        assert result.stats.emitted == sum(map(len, result.tokens))


def test_rows_end_at_their_own_eos():
    plain = greedy(PROMPTS, 30)
    for eos in range(7):
        expected = cut_at([eos], plain)
        for k in (1, 3):
            drafter = NoisyDrafter(TARGET, 0.3)
            result = generate(TARGET, PROMPTS, 30, drafter=drafter, k=k, temperature=0, eos=eos)
            assert result.tokens == expected
            assert result.stats.emitted == sum(map(len, expected))


# -- the draft's side, which no test of the output can see


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("prompts", [PROMPTS, RAGGED], ids=["batch", "ragged"])
def test_a_draft_that_is_the_target_is_always_right(k, temperature, prompts):
    """mutants.py E1, D2, D3.

    A hole or a stray token in the draft's cache makes it guess wrong a round later.
    """
    n, drafter = 41, ModelDrafter(TARGET)
    s = generate(TARGET, prompts, n, drafter=drafter, k=k, temperature=temperature, seed=1).stats
    assert s.accepted == s.evaluated == s.drafted
    # Every round but the last emits k + 1 tokens.
    assert s.rounds == len(prompts) * -(-n // (k + 1))


def cached(model, tokens):
    cache = model.new_cache(1)
    model(tokens[None], cache)
    return cache


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("prompts", [PROMPTS.tolist(), RAGGED], ids=["batch", "ragged"])
def test_after_every_round_both_caches_are_those_of_a_fresh_forward(
    monkeypatch, drafter, k, temperature, prompts
):
    """Also when all was accepted, nothing was, or rows differ.

    Whatever else lies in the buffers is NaN and is never read.
    """
    made, new_cache = [], type(TARGET).new_cache

    def remember(*args):
        made.append(new_cache(TARGET, *args))
        return made[-1]

    monkeypatch.setattr(TARGET, "new_cache", remember)
    texts, histories = [list(prompt) for prompt in prompts], set()
    length = torch.tensor([len(text) for text in texts])
    for r in rounds(TARGET, prompts, 30, drafter, k, temperature=temperature, seed=2):
        before, length = length, length + r.n_new
        assert torch.equal(made[0].length, length - 1)
        # The draft has read its guesses but for the last.
        n = r.draft_probs.shape[1]
        assert n > 0 and torch.equal(drafter.cache.length, (length - 1).minimum(before + n - 1))
        histories.update(r.n_accepted.tolist())
        for b, (tokens, n) in enumerate(zip(r.tokens.tolist(), r.n_new.tolist())):
            texts[b] += tokens[:n]
            for model, cache in ((TARGET, made[0]), (drafter.model, drafter.cache)):
                S = cache.length[b].item()
                fresh = cached(model, torch.tensor(texts[b][:S]))
                ours, theirs = cache.kv[:, :, b, :, :S], fresh.kv[:, :, 0, :, :S]
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
        poison(made[0]), poison(drafter.cache)
    assert [len(text) for text in texts] == [len(prompt) + 30 for prompt in prompts]
    if drafter.model is TARGET:
        assert k in histories and (0 in histories or type(drafter) is ModelDrafter)


@any_drafter
def test_a_drafter_serves_one_prompt_after_another(make):
    """Nothing is left of the text before, whatever its rows and its length, even of half of one."""
    drafter = make()
    for prompts in (PROMPTS, [[2, 2]], RAGGED):
        unfinished = rounds(TARGET, prompts, 20, drafter, 3, temperature=0)
        next(unfinished), next(unfinished)
        assert greedy(prompts, 20, drafter=drafter, k=3) == greedy(prompts, 20)


# -- counting


def test_counters_add_up(drafter):
    for k in (1, 2, 4):
        stats, rejected, last = Stats(), 0, 0
        for r in rounds(TARGET, PROMPTS, 30, drafter, k, seed=3):
            stats.add(r)
            # cut: by the budget, or ended before
            active, cut = r.n_new > 0, r.n_new <= r.n_accepted
            assert (r.n_new[~cut] == r.n_accepted[~cut] + 1).all()
            assert (r.n_accepted <= r.n_guessed)[active].all() and (r.n_guessed <= k * active).all()
            rejected += (~cut & (r.n_accepted < r.n_guessed)).sum().item()
            last += (active & cut).sum().item()
        assert stats.emitted == stats.accepted + stats.rounds - last == 90 and last <= 3
        assert stats.evaluated == stats.accepted + rejected <= stats.drafted
        assert stats.tokens_per_pass == 90 / stats.rounds


def test_stats_by_hand():
    """Two guesses in each of six rows: the second is rejected; both are accepted; both are, and the
    first is an end token; the row had ended; nothing was guessed; one guess only, accepted."""
    draft_probs = torch.full((6, 2, 2), 0.5)
    draft_probs[4] = draft_probs[5, 1] = 0
    target_probs = torch.tensor([[0.75, 0.25], [1.0, 0.0], [0.5, 0.5]]).expand(6, 3, 2)
    tokens = torch.zeros(6, 3, dtype=torch.int64)
    n_accepted, n_new = torch.tensor([1, 2, 2, 2, 0, 1]), torch.tensor([2, 3, 1, 0, 1, 2])
    r = specdec.Round(tokens[:, 1:], draft_probs, target_probs, n_accepted, tokens, n_new)
    assert r.n_guessed.tolist() == [2, 2, 2, 0, 0, 1]
    s = Stats()
    assert (s.acceptance_rate, s.expected_acceptance_rate, s.tokens_per_pass) == (0, 0, 0)
    s.add(r)
    assert (s.rounds, s.drafted, s.evaluated, s.accepted, s.emitted) == (5, 7, 6, 5, 9)
    assert s.overlap == 4 * 0.75 + 2 * 0.5  # at the first guesses, and at the second of two rows
    assert (s.acceptance_rate, s.expected_acceptance_rate) == (5 / 6, 4 / 6)
    s.add(r)
    assert (s.rounds, s.evaluated, s.overlap, s.tokens_per_pass) == (10, 12, 8.0, 9 / 5)


@pytest.mark.parametrize("eos", [None, 2])
def test_a_round_reports_what_the_rule_saw_and_said(eos):
    """What the target says after the newest token and after each guess; what each guess was drawn
    from; and how many were accepted, before an end token or the budget cut the output."""
    texts, said, n_cut = PROMPTS.tolist(), [], 0

    def generous(target_probs, draft_probs, draft_tokens, generator):
        said.append(torch.full((3,), draft_tokens.shape[1]))
        return said[-1], target_probs[:, -1].argmax(-1)

    for r in rounds(TARGET, PROMPTS, 20, ModelDrafter(DRAFT), 4, generous, eos=eos, seed=0):
        k = r.guesses.shape[1]
        assert torch.equal(r.n_accepted, said[-1])
        n_cut += (r.n_new <= r.n_accepted).sum()
        for b in r.n_new.nonzero()[:, 0].tolist():
            text = torch.tensor(texts[b] + r.guesses[b].tolist())
            target, draft = (fresh_logits(m, text)[-k - 1 :].softmax(-1) for m in (TARGET, DRAFT))
            torch.testing.assert_close(r.target_probs[b], target, rtol=0, atol=1e-12)
            torch.testing.assert_close(r.draft_probs[b], draft[:-1], rtol=0, atol=1e-12)
            texts[b] += r.tokens[b, : r.n_new[b]].tolist()
    assert (n_cut > 0) == (eos is not None)


@pytest.mark.parametrize("rule", ["rejection", "coupled"])
def test_a_round_without_guesses_has_the_shapes_of_k_0(rule):
    r = next(rounds(TARGET, PROMPTS, 5, rule=rule, seed=0))
    assert r.guesses.shape == (3, 0) and r.guesses.dtype == torch.int64
    assert r.draft_probs.shape == (3, 0, 7) and r.target_probs.shape == (3, 1, 7)
    assert r.tokens.shape == (3, 1) and r.n_accepted.tolist() == [0] * 3
    assert r.n_guessed.tolist() == [0] * 3 and r.n_new.tolist() == [1] * 3


def test_plain_decoding_counts_one_token_a_pass():
    s = generate(TARGET, PROMPTS, 10, seed=0).stats
    assert (s.emitted, s.rounds, s.drafted, s.evaluated, s.accepted) == (30, 30, 0, 0, 0)
    assert s.tokens_per_pass == 1


@pytest.mark.parametrize("prompts", [PROMPTS, RAGGED], ids=["batch", "ragged"])
def test_plain_decoding_reads_every_token_once(prompts):
    read = []
    hook = TARGET.register_forward_pre_hook(lambda model, args: read.append(args[0].numel()))
    generate(TARGET, prompts, 10)
    hook.remove()
    least, most = sum(map(len, prompts)), len(prompts) * max(map(len, prompts))  # with padding
    rest = len(prompts) * (10 - 1)  # nobody needs to read the last
    hint = "read all of a prompt but its last token, then one token per pass, with the cache"
    assert least + rest <= sum(read) <= most + rest, hint


def test_both_estimates_of_alpha_agree_and_predict_tau():
    """4000 rows: the coins and the distributions estimate one number.

    The draft is neither right nor wrong all the time.
    """
    prompts, drafter = PROMPT.expand(4000, -1), ModelDrafter(DRAFT)
    stats = generate(TARGET, prompts, 12, drafter=drafter, k=3, seed=0).stats
    alpha = stats.expected_acceptance_rate
    assert 0.2 < alpha < 0.8
    error = (alpha * (1 - alpha) / stats.evaluated) ** 0.5
    assert abs(stats.acceptance_rate - alpha) < 5 * error


# -- chance


@pytest.mark.parametrize("make", [lambda: None, lambda: ModelDrafter(DRAFT)])
def test_seeds(make):
    def text(seed):
        return generate(TARGET, PROMPTS, 30, drafter=make(), seed=seed).tokens

    state = torch.get_rng_state()
    assert text(0) == text(0) != text(1)
    assert text(None) != text(None)
    assert torch.equal(torch.get_rng_state(), state)


# -- k that changes from round to round


@pytest.mark.parametrize("k", [4, "tree"])
def test_short_rows_beside_rows_that_accept_much(k):
    """Prompts of one token: heads read a round's tokens again.

    A row that got one must not be read from before its beginning.
    """
    drafter, prompts = heads_drafter(), torch.arange(210)[:, None] % 7
    drafter, k = (TreeDrafter(drafter, (3, 2, 1, 1)), 1) if k == "tree" else (drafter, k)
    rows = list(rounds(TARGET, prompts, 12, drafter, k, temperature=3.0, seed=0))
    assert rows[0].n_new.min() == 1 and rows[0].n_new.max() >= 4
    assert greedy(prompts[:7], 12, drafter=drafter, k=k) == greedy(prompts[:7], 12)


@any_chain
def test_rows_that_ended_early_do_not_matter_to_a_long_backlog(make):
    """Eleven rounds without guesses: a backlog longer than the rows that have ended early."""
    drafter = make()
    for eos in range(7):
        seldom = Sometimes(drafter, 11 * [0] + [3])
        for prompts in (PROMPTS[:, :2], RAGGED):
            assert greedy(prompts, 40, drafter=seldom, k=3, eos=eos) == greedy(prompts, 40, eos=eos)


@any_chain
@pytest.mark.parametrize("how", ["auto", "sometimes", "varying"])
def test_greedy_speculation_is_greedy_decoding_for_changing_k(make, how):
    """A draft that is not asked for some rounds still reads all that it missed (mutants.py E3)."""
    drafter = make()
    if how != "auto":
        drafter = Varying(drafter) if how == "varying" else Sometimes(drafter, [3, 0, 1, 0, 0, 2])
    k = "auto" if how == "auto" else 3
    for prompts in (PROMPTS, RAGGED):
        assert greedy(prompts, 40, drafter=drafter, k=k) == greedy(prompts, 40)


@pytest.mark.parametrize("prompts", [PROMPTS, RAGGED], ids=["batch", "ragged"])
def test_a_draft_that_is_the_target_stays_right_for_changing_k(prompts):
    for rest in range(4):
        right = ModelDrafter(TARGET)
        for drafter in (Varying(right), Sometimes(right, [3, 0, 1, 0])):
            s = generate(TARGET, prompts, 37 + rest, drafter=drafter, k=3, seed=1).stats
            hint = "after rounds without guesses a draft has more than two tokens still to read"
            assert s.accepted == s.drafted > 0, hint


# -- k="auto", by a clock of our own


class Asked:
    """A drafter that notes how many guesses it is asked for, and makes none."""

    def start(self, *args):
        pass

    def propose(self, rows, k, probs_of, generator):
        self.n = k
        return rows.tokens[:, :0], None

    def commit(self, rows, hidden):
        pass


def play(monkeypatch, seconds, tokens, n_rounds=400, plain=lambda i: 1.0):
    """[(guesses, seconds, tokens)] of rounds by AutoK.

    seconds and tokens are functions of round and number of guesses, plain is one of the round:
    seconds of a round without guesses, which yields one token.
    """
    clock = [0.0]
    monkeypatch.setattr(specdec, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    asked, played = Asked(), []
    auto, rows = AutoK(asked), Rows([torch.tensor([1])], 9 * n_rounds, spare=9)
    auto.start(TARGET, None, rows, None)
    for i in range(n_rounds):
        asked.n = 0
        auto.propose(rows, 8, None, None)
        n = asked.n
        assert 0 <= n <= 8
        played.append((n, seconds(i, n), tokens(i, n)) if n else (0, plain(i), 1))
        clock[0] += played[-1][1]
        rows.length += played[-1][2]
        auto.commit(rows, None)
    return played


def guessing(played):
    """The fraction of these rounds in which something was guessed."""
    return sum(n > 0 for n, _, _ in played) / len(played)


def lost(played):
    """Seconds that were lost against plain rounds."""
    return sum(seconds - tokens for _, seconds, tokens in played)


def all_accepted(i, n):
    return n + 1


def none_accepted(i, n):
    return 1


def cheap(i, n):
    return 1.1 + 0.1 * n


def accepted_with(alpha, seed):
    """tokens of `play`, where each guess is accepted with this probability."""
    coin = random.Random(seed)

    def tokens(i, n):
        accepted = [coin.random() < alpha for _ in range(n)] + [False]
        return 1 + accepted.index(False)

    return tokens


def test_auto_guesses_while_it_pays(monkeypatch):
    played = play(monkeypatch, cheap, all_accepted)
    assert guessing(played) > 0.98
    assert {n for n, _, _ in played[20:]} == {8}  # as much as it may, where all is accepted
    assert lost(played) < -0.6 * sum(tokens for _, _, tokens in played)


@pytest.mark.parametrize("alpha", [0.5, 0.7, 0.9])
def test_unlucky_rounds_do_not_end_guessing(monkeypatch, alpha):
    for seed in range(10):
        played = play(monkeypatch, cheap, accepted_with(alpha, seed))
        assert guessing(played) > 0.9
        assert lost(played) < -0.1 * sum(tokens for _, _, tokens in played)


HOPELESS = {
    "little": lambda i, n: 1.2,
    "half": lambda i, n: 1.5,
    "double": lambda i, n: 2.0,
    "by_guess": lambda i, n: 1 + 0.3 * n,
    "by_guess_much": lambda i, n: 1 + 0.6 * n,
}


@pytest.mark.parametrize("seconds", HOPELESS.values(), ids=HOPELESS)
def test_auto_loses_little_where_guessing_is_hopeless(monkeypatch, seconds):
    """No guess is accepted: rounds that are 1.2 to 2 times as long as plain ones are lost time."""
    played = play(monkeypatch, seconds, none_accepted)
    assert 0 < lost(played) < 0.03 * 400
    assert guessing(played[100:]) < 0.15


def test_auto_tries_again(monkeypatch):
    """Where it was hopeless for 200 rounds and then is not, that is found out; and the reverse."""
    played = play(monkeypatch, cheap, lambda i, n: 1 if i < 200 else n + 1, 600)
    assert guessing(played[50:200]) < 0.2
    assert 0 < guessing(played[50:200])
    assert guessing(played[350:]) > 0.9
    played = play(monkeypatch, cheap, lambda i, n: 1 if i >= 200 else n + 1, 600)
    assert guessing(played[:200]) > 0.95
    assert guessing(played[300:]) < 0.2 and lost(played[200:]) < 0.05 * 400


@pytest.mark.parametrize("which", [0, 1, 30])
def test_one_slow_round_does_not_end_guessing(monkeypatch, which):
    """The first guess finds all caches cold, and anything may disturb a later one."""
    tries = itertools.count()

    def one_is_slow(i, n):
        return 25.0 if next(tries) == which else cheap(i, n)

    played = play(monkeypatch, one_is_slow, all_accepted)
    assert sum(seconds == 25 for _, seconds, _ in played) == 1
    assert guessing(played) > 0.9


@pytest.mark.parametrize("which", [0, 1, 30])
def test_one_slow_plain_round_is_no_reason_to_guess(monkeypatch, which):
    def plain(i):
        return 25.0 if i == which else 1.0

    played = play(monkeypatch, HOPELESS["half"], none_accepted, plain=plain)
    assert lost(played) - 24 < 0.03 * 400


def test_many_slow_rounds_end_guessing_but_not_for_good(monkeypatch):
    def slow_for_a_while(i, n):
        return 30.0 if 50 <= i < 80 else cheap(i, n)

    played = play(monkeypatch, slow_for_a_while, all_accepted, 600)
    assert guessing(played[:50]) > 0.9
    assert guessing(played[65:80]) < 0.5
    assert guessing(played[300:]) > 0.9


def test_auto_counts_the_row_that_has_most_to_write(monkeypatch):
    """A batch ends with its slowest row: neither the fastest row counts, nor all rows together.

    Three plain rounds of a second, then one with guesses, in which that row gets one token. So
    fewer guesses are asked for next; and after a round in which all were accepted, more.
    """
    seconds, learnt, heard = iter(range(99)), [], []
    monkeypatch.setattr(specdec, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    stub = SimpleNamespace(propose=lambda rows, n, *_: n, start=lambda *_: None)
    stub.commit = lambda *args: heard.append(args)
    auto = AutoK(stub)
    auto.none, auto.last, learn = stub, None, auto.learn
    auto.learn = lambda *args: learnt.append(args) or learn(*args)
    asked = []
    for room in [9, 5], [8, 4], [7, 3], [6, 2], [5, 0], [1, 0], [1, 0]:
        rows = SimpleNamespace(room=lambda: torch.tensor(room))
        asked.append(auto.propose(rows, 8, None, None))
        auto.commit(rows, "hidden")
        assert heard.pop() == (rows, "hidden")  # also of rounds without guesses
    assert learnt == [(0, 1, 1)] * 3 + [(4, 1, 1), (3, 1, 4), (5, 1, 0)]
    assert asked == [0, 0, 0, 4, 3, 5, 4]


def test_auto_goes_by_what_plain_rounds_take_now():
    auto = AutoK(None)
    for seconds in [1.0] * 20 + [5.0] * 9:
        auto.learn(0, seconds, 1)
    before = auto.credit
    auto.learn(4, 5.0, 1)
    assert auto.credit == before


def test_the_account_of_auto_by_hand():
    """In plain rounds, here of two seconds. What all rounds but the last cost is known before."""
    auto = AutoK(None)
    assert auto.credit == 3
    for _ in range(3):
        auto.learn(0, 2.0, 1)
    assert auto.credit == pytest.approx(3.03)  # 1% of each
    for seconds, tokens, credit in (
        (6.0, 5, 5.03),  # five tokens in the time of three
        (3.0, 1, 4.53),  # one in the time of one and a half
        (100.0, 1, 2.53),  # a slow one costs two
        (6.0, 5, 4.53),
        (6.0, 5, 6.0),  # six is the most
        (100.0, 1, 4.0), (100.0, 1, 2.0), (3.0, 1, 1.5), (3.0, 1, 1.0), (3.0, 1, 0.5),
    ):  # fmt: skip
        auto.learn(4, seconds, tokens)
        assert auto.credit == pytest.approx(credit)
    rows, auto.none, auto.last = Rows([torch.tensor([1])], 9, spare=9), Asked(), None
    auto.drafter = Asked()
    for credit, guesses in ((0.5, True), (0.001, True), (0.0, False), (-1.0, False)):
        auto.credit, auto.none.n, auto.drafter.n, auto.last = credit, 0, 0, None
        auto.propose(rows, 8, None, None)
        assert (auto.drafter.n > 0) == guesses


def test_auto_in_generate(monkeypatch):
    """Passes of the target take a second, of the draft a tenth: a good draft is used, a bad is not.

    Also with the coupled rule. Its text, and greedy text, is that of plain decoding.
    """
    target, clock = make_gpt(1, block_size=300), [0.0]
    monkeypatch.setattr(specdec, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def takes(model, seconds):
        def tick(*args):
            clock[0] += seconds

        model.register_forward_hook(tick)
        return model

    good, bad = takes(make_gpt(1, block_size=300), 0.1), takes(make_gpt(9, block_size=300), 0.1)
    takes(target, 1.0)
    for options in ({"temperature": 0}, {"rule": "coupled", "seed": 1}):
        expected = generate(target, PROMPT, 250, **options).tokens
        for draft, is_good in ((good, True), (bad, False)):
            drafter = ModelDrafter(draft)
            start = clock[0]
            result = generate(target, PROMPT, 250, drafter=drafter, k="auto", **options)
            assert result.tokens == expected
            seconds = clock[0] - start
            assert seconds < 80 if is_good else seconds < 1.05 * 250


# -- bad arguments


@pytest.mark.parametrize("options", [
    {"k": 1}, {"k": 47}, {"top_k": 1}, {"top_k": 99}, {"top_p": 1}, {"top_p": 1e-9},
    {"temperature": 0}, {"temperature": 1e-9}, {"temperature": 1e9}, {"seed": 0},
    {"seed": 2**63 - 1}, {"eos": 0}, {"eos": 6}, {"prompt": [0, 6]}, {"max_new_tokens": 43},
    {"drafter": TreeDrafter(ModelDrafter(DRAFT), (48,))},
])  # fmt: skip
def test_arguments_at_the_edge_of_what_is_allowed(options):
    first = {"prompt": PROMPT, "max_new_tokens": 2, "drafter": ModelDrafter(DRAFT), "seed": 3}
    options = first | options
    n, stop = options["max_new_tokens"], "eos" in options
    for options in (options, options | {"drafter": None}):
        (tokens,), _ = generate(TARGET, **options)
        assert len(tokens) == n or stop and tokens[-1] == options["eos"]
        assert all(type(token) is int for token in tokens)


def test_plain_decoding_has_no_k_to_check():
    assert len(generate(make_gpt(1, block_size=3), PROMPT[:1], 2).tokens[0]) == 2


BAD = [
    ({"k": 0}, "k is 0"),
    ({"k": 48}, "k is 48"),
    ({"k": "many"}, "k is 'many'"),
    ({"drafter": HeadsDrafter(DraftHeads(7, 8, 8))}, "another shape"),
    ({"drafter": HeadsDrafter(DraftHeads(7, 16, 8))}, "float32.*, not .* torch.float64"),
    ({"drafter": TreeDrafter(NGramDrafter(), (2,))}, "token by token"),
    ({"drafter": TreeDrafter(ModelDrafter(DRAFT), (9, 9))}, "a tree of 90 guesses"),
    ({"k": 2.0}, "k is 2.0; it must be a whole number from 1 to 47"),
    ({"k": "3"}, "k is '3'; it must be a whole number"),
    ({"k": torch.tensor(2.5)}, "it must be a whole number"),
    ({"k": torch.tensor([2, 3])}, "it must be a whole number"),
    ({"k": np.array([2, 3])}, "it must be a whole number"),
    ({"seed": 0.5}, "seed is 0.5; it must be a whole number"),
    ({"seed": "3"}, "seed is '3'"),
    ({"max_new_tokens": 2.0}, "max_new_tokens is 2.0; it must be a whole number"),
    ({"seed": -1}, "seed is -1"),
    ({"seed": 2**63}, "seed is"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": float("inf")}, "temperature"),
    ({"top_k": 0}, "top-k"),
    ({"top_p": 0.0}, "top-p"),
    ({"top_p": 1.1}, "top-p"),
    ({"rule": "optimism"}, "unknown rule 'optimism'"),
    ({"prompt": torch.zeros(0, dtype=torch.int64)}, "prompt is empty"),
    ({"prompt": torch.zeros(2, 0, dtype=torch.int64)}, "prompt is empty"),
    ({"prompt": torch.zeros(0, 2, dtype=torch.int64)}, "prompt is empty"),
    ({"prompt": []}, "prompt is empty"),
    ({"prompt": [[1, 2], []]}, "prompt is empty"),
    ({"prompt": torch.tensor([1.5])}, "int64"),
    ({"prompt": torch.tensor(3)}, "int64"),
    ({"prompt": torch.ones(1, 2, 3, dtype=torch.int64)}, "int64"),
    ({"prompt": torch.tensor([7])}, "outside"),
    ({"prompt": torch.tensor([-1])}, "outside"),
    ({"prompt": torch.tensor([1, -1])}, "outside"),
    ({"prompt": torch.tensor([1, 2], dtype=torch.int32)}, "int64"),
    ({"prompt": torch.tensor([True, False])}, "int64"),
    ({"prompt": [[1, 2], [3, 7]]}, "outside"),
    ({"prompt": "text"}, "prompt must be token ids; it is a str"),
    ({"prompt": ["text", "more"]}, "prompt must be token ids"),
    ({"prompt": [[0.5]]}, "prompt must be token ids"),
    ({"prompt": None}, "prompt must be token ids; it is a NoneType"),
    ({"max_new_tokens": -1}, "max_new_tokens is -1; it must be a whole number"),
    ({"max_new_tokens": 44}, "target's block_size"),
    ({"prompt": [[1], [2] * 44]}, "target's block_size"),
    ({"eos": -1}, "eos has tokens outside 0..6"),
    ({"eos": 7}, "eos has tokens outside 0..6"),
    ({"eos": [4, 7]}, "eos has tokens outside 0..6"),
    ({"eos": "x"}, "eos must be token ids"),
    ({"eos": 0.5}, "eos must be token ids"),
    ({"eos": []}, "eos is empty"),
    ({"drafter": ModelDrafter(make_gpt(0, vocab_size=6))}, "6 tokens, the target 7"),
    ({"drafter": ModelDrafter(make_gpt(0, block_size=9))}, "draft's block_size"),
    ({"drafter": DRAFT}, "a drafter has start, propose and commit"),
    ({"drafter": ModelDrafter}, "a drafter has start, propose and commit"),
    ({"drafter": "ngram"}, "a drafter has start, propose and commit"),
    ({"drafter": HeadsDrafter(DRAFT)}, "HeadsDrafter takes heads"),
    ({"drafter": TreeDrafter(DRAFT, (2,))}, "token by token"),
    ({"drafter": HeadsDrafter(DraftHeads(6, 16, 8).double())}, "another shape"),
    ({"drafter": TreeDrafter(HeadsDrafter(DraftHeads(6, 16, 8).double()), (2,))}, "another shape"),
    ({"drafter": TreeDrafter(ModelDrafter(make_gpt(0, vocab_size=6)), (2,))}, "the draft knows 6"),
    ({"drafter": TreeDrafter(ModelDrafter(make_gpt(0, block_size=9)), (2,))}, "draft's block_size"),
    ({"drafter": SimpleNamespace(propose=len, commit=len)}, "a drafter has start"),
    ({"drafter": SimpleNamespace(start=len, commit=len)}, "a drafter has start"),
    ({"drafter": SimpleNamespace(start=len, propose=len)}, "a drafter has start"),
    ({"drafter": SimpleNamespace(start=len, propose=len, commit=True)}, "a drafter has start"),
]


@pytest.mark.parametrize("options, message", BAD)
def test_bad_arguments_are_refused_at_once(options, message):
    options = {"prompt": PROMPT, "max_new_tokens": 5, "drafter": ModelDrafter(DRAFT)} | options
    with pytest.raises(ValueError, match=message) as error:
        generate(TARGET, **options)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=message):
        rounds(TARGET, **options)  # before the first round


def test_numbers_of_numpy_are_numbers():
    """As in `for k in np.arange(1, 9)`."""
    options = {"k": 2, "max_new_tokens": 9, "seed": 1, "top_k": 5, "eos": 3}
    texts = []
    for kind in (int, np.int64, np.int32):
        numbers = {name: kind(x) for name, x in options.items()}
        texts.append(generate(TARGET, PROMPT, drafter=ModelDrafter(DRAFT), **numbers))
    assert all(text == texts[0] for text in texts)


SHARED = {
    "model": lambda: ModelDrafter(DRAFT),
    "heads": lambda: HeadsDrafter(make_heads(2, 7, 16)),
    "tree": lambda: TreeDrafter(ModelDrafter(DRAFT), (2, 1)),
    "tree of heads": lambda: TreeDrafter(HeadsDrafter(make_heads(2, 7, 16)), (2, 1)),
}


@pytest.mark.parametrize("name, options", [
    *((name, {}) for name in SHARED), ("model", {"k": "auto"}), ("heads", {"k": "auto"}),
    ("model", {"rule": "coupled"}), ("heads", {"rule": "coupled"}),
])  # fmt: skip
def test_a_drafter_in_use_says_so(name, options, ours):
    """Two generations in turns on one drafter: the first is told, the second goes on."""
    make = SHARED[name]
    drafter = make()
    first, second = (rounds(TARGET, p, 30, drafter, **options, seed=0) for p in (PROMPT, PROMPTS))
    for _ in range(5):  # in which k="auto" begins to guess
        next(first)
    next(second)
    with pytest.raises(ValueError, match="in use by another generation"):
        for _ in first:
            pass
    assert sum(r.n_new for r in second).min() > 0
    expected = generate(TARGET, PROMPT, 9, drafter=make(), **options, seed=0).tokens
    if "k" not in options:  # and after that it can be used again
        assert generate(TARGET, PROMPT, 9, drafter=drafter, **options, seed=0).tokens == expected


def test_an_ngram_drafter_serves_two_generations_in_turns():
    drafter, prompts, texts = NGramDrafter(), (PROMPT, PROMPT[:3]), ([], [])
    both = [rounds(TARGET, prompt, 9, drafter, seed=0) for prompt in prompts]
    for turn in itertools.zip_longest(*both):
        for text, r in zip(texts, turn):
            text.extend(r.tokens[0, : r.n_new[0]].tolist() if r else [])
    for text, prompt in zip(texts, prompts):
        assert [text] == generate(TARGET, prompt, 9, drafter=NGramDrafter(), seed=0).tokens


def test_batches_too_large_for_memory_are_refused_at_once(monkeypatch):
    """35 tokens of 56 logits and 2 x 16 keys and values, 8 bytes each, in every row, and a tenth."""
    prompts = PROMPT.expand(50_000, -1)
    for free, word in ((1_000_000, "take about 1.2 GB of memory; 1.0 GB are free"), (10**9, None)):
        lines = f"MemTotal: 9 kB\nMemFree: 7 kB\nMemAvailable:  {free} kB\nBuffers: 1 kB\n"
        monkeypatch.setattr(Path, "read_text", lambda self: lines)
        if word:
            with pytest.raises(ValueError, match=word):
                rounds(TARGET, prompts, 30, ModelDrafter(DRAFT), k=40)
        else:
            rounds(TARGET, prompts, 30, ModelDrafter(DRAFT), k=40)


@pytest.mark.parametrize("eos", [-1, 7, "x", [], [9]])
def test_bad_end_tokens_are_refused_in_plain_decoding(eos):
    with pytest.raises(ValueError, match="eos"):
        rounds(TARGET, PROMPT, 5, eos=eos)
