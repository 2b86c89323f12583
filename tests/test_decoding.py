"""The loop: against plain decoding, at every edge, and what it leaves in both caches."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import make_gpt, make_heads
from model import DraftHeads, pass_times
from specdec import AutoK, FixedK, HeadsDrafter, ModelDrafter, NGramDrafter, Stats, TreeDrafter, generate, rounds
from test_kvcache import poison

TARGET, DRAFT = make_gpt(1), make_gpt(2, n_layer=1, n_embd=4)
PROMPT = torch.tensor([3, 1, 4, 1, 5])
PROMPTS = torch.tensor([[3, 1, 4], [0, 2, 6], [5, 5, 5]])
one_row_and_batch = pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one_row", "batch"])


class NoisyDrafter(ModelDrafter):
    """A drafter that is right as often as we like: the model's own law at most positions, a random one at the others."""

    def __init__(self, model, wrong, seed=0):
        super().__init__(model)
        self.wrong, self.generator = wrong, torch.Generator().manual_seed(seed)

    def propose(self, text, length, k, law, generator):
        def noisy(logits):
            bad = torch.rand(len(logits), 1, generator=self.generator) < self.wrong
            return law(torch.where(bad, torch.randn(logits.shape, generator=self.generator).double(), logits))

        return super().propose(text, length, k, noisy, generator)


DRAFTERS = {"always_right": lambda: ModelDrafter(TARGET), "small_model": lambda: ModelDrafter(DRAFT), "half_wrong": lambda: NoisyDrafter(TARGET, 0.5)}


@pytest.fixture(params=DRAFTERS)
def drafter(request):
    return DRAFTERS[request.param]()


def heads_drafter(markov=True, times=None, seed=0):
    return HeadsDrafter(make_heads(seed, 7, 16, markov), times)


OTHERS = {"ngram": NGramDrafter, "heads": heads_drafter, "confident_heads": lambda: heads_drafter(times=[1, 1.1, 1.2, 1.5, 2, 3, 4]),
          "tree": lambda: TreeDrafter(ModelDrafter(TARGET), (2, 1, 2))}  # fmt: skip
any_drafter = pytest.mark.parametrize("make", [*DRAFTERS.values(), *OTHERS.values()], ids=[*DRAFTERS, *OTHERS])


def greedy(prompt, n, **options):
    return generate(TARGET, prompt, n, temperature=0, **options).tokens


# -- the same output


@pytest.mark.parametrize("k", range(1, 7))
@any_drafter
@one_row_and_batch
def test_greedy_speculation_is_greedy_decoding(make, k, prompts):
    drafter = make()
    for prompt in (prompts, prompts[:, :1]):
        assert greedy(prompt, 24, drafter=drafter, k=k) == greedy(prompt, 24)


@pytest.mark.parametrize("rule", ["block", "coupled", "lossy-typical"])
def test_greedy_speculation_is_greedy_decoding_under_every_rule(drafter, rule):
    assert greedy(PROMPTS, 40, drafter=drafter, rule=rule) == greedy(PROMPTS, 40)


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(1, 5), st.lists(st.lists(st.integers(0, 6), min_size=2, max_size=2), min_size=1, max_size=4))
def test_greedy_speculation_is_greedy_decoding_for_any_pair(seed, other, k, prompts):
    target, drafter = make_gpt(seed), NoisyDrafter(make_gpt(other), 0.2)
    expected = generate(target, torch.tensor(prompts), 20, temperature=0)
    assert generate(target, torch.tensor(prompts), 20, drafter=drafter, k=k, temperature=0).tokens == expected.tokens


@any_drafter
def test_a_row_of_a_batch_is_what_it_is_alone(make):
    """Rows accept different numbers of tokens, end at different times, and do not notice each other."""
    drafter = make()
    for eos in (None, 2):
        together = greedy(PROMPTS, 30, drafter=drafter, k=3, eos=eos)
        alone = [greedy(prompt, 30, drafter=drafter, k=3, eos=eos)[0] for prompt in PROMPTS]
        assert together == alone


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
@pytest.mark.parametrize("temperature", [0, 1])
def test_a_broken_draft_costs_speed_and_nothing_else(value, temperature):
    broken = make_gpt(2)
    broken.wte.weight.fill_(value)
    result = generate(TARGET, PROMPTS, 20, drafter=ModelDrafter(broken), temperature=temperature, seed=0)
    assert [len(row) for row in result.tokens] == [20] * 3
    if temperature == 0:
        assert result.tokens == greedy(PROMPTS, 20)


# -- the right length


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("at_the_edge", [False, True])
@any_drafter
@one_row_and_batch
def test_every_budget(make, k, at_the_edge, prompts):
    """Exactly the budget, also where prompt and budget fill the block_size to the last position."""
    drafter = make()
    for budget in range(k + 3):
        prompt = prompts.repeat(1, 16)[:, : TARGET.config.block_size - budget] if at_the_edge else prompts
        tokens = greedy(prompt, budget, drafter=drafter, k=k)
        assert tokens == greedy(prompt, budget)
        assert [len(row) for row in tokens] == [budget] * len(prompts)


def test_eos_as_guess_as_correction_and_as_bonus_one_row(drafter):
    """The output ends at the first EOS, wherever in a round that is, and nothing after it is emitted or counted."""
    plain = greedy(PROMPT, 30)[0]
    seen = set()
    for eos in set(plain):
        expected = plain[: plain.index(eos) + 1]
        for k in (1, 2, 3, 4, 5):
            assert greedy(PROMPT, 30, eos=eos) == greedy(PROMPT, 30, drafter=drafter, k=k, eos=eos) == [expected]
            stats = Stats()
            for r in rounds(TARGET, PROMPT, 30, drafter, k, temperature=0, eos=eos):
                stats.add(r)
            assert stats.emitted == len(expected) == stats.accepted + stats.rounds - (r.n_new <= r.n_accepted).item()
            assert stats.evaluated - stats.accepted <= stats.rounds
            if r.n_new <= r.n_accepted:
                seen.add(("guess", r.n_new.item()))
            else:
                seen.add("bonus" if r.n_accepted == r.n_guessed else "correction")
    if drafter.model is TARGET:
        assert {("guess", 1), ("guess", 2), ("guess", 3)} <= seen
        assert ("bonus" in seen) if type(drafter) is ModelDrafter else {"bonus", "correction"} <= seen


def cut_at(eos, rows):
    return [row[: row.index(eos) + 1] if eos in row else row for row in rows]


def test_plain_decoding_ends_each_row_at_its_own_eos():
    plain = greedy(PROMPTS, 30)
    for eos in range(7):
        result = generate(TARGET, PROMPTS, 30, temperature=0, eos=eos)
        assert result.tokens == cut_at(eos, plain) and result.stats.emitted == sum(map(len, result.tokens))


def test_a_row_that_has_ended_has_no_say_in_how_much_is_guessed():
    """The passes that go on for one row have the sizes that they have when it is alone."""
    prompts, sizes = PROMPTS[[1, 0]], set()
    for seed, eos in itertools.product(range(3), range(7)):
        drafter = heads_drafter(times=[1, 1.2, 1.4, 1.6, 1.8], seed=seed)
        alone, together = ([(r.n_new.tolist(), r.size) for r in rounds(TARGET, p, 40, drafter, 4, temperature=0, eos=eos)] for p in (prompts[:1], prompts))
        last = [size for (n_new, *other), size in together if n_new and other == [0]]
        assert last == [size for _, size in alone][len(alone) - len(last) :]
        sizes.update(last)
    assert len(sizes) > 1


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_rows_end_at_their_own_eos_whoever_guesses(make):
    plain = greedy(PROMPTS, 30)
    for eos in range(7):
        result = generate(TARGET, PROMPTS, 30, drafter=make(), k=3, temperature=0, eos=eos)
        assert result.tokens == cut_at(eos, plain) and result.stats.emitted == sum(map(len, result.tokens))


def test_rows_end_at_their_own_eos():
    plain = greedy(PROMPTS, 30)
    for eos in range(7):
        expected = cut_at(eos, plain)
        for k in (1, 3):
            result = generate(TARGET, PROMPTS, 30, drafter=NoisyDrafter(TARGET, 0.3), k=k, temperature=0, eos=eos)
            assert result.tokens == expected and result.stats.emitted == sum(map(len, expected))


# -- the draft's side, which no test of the output can see


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("temperature", [0, 1])
def test_a_draft_that_is_the_target_is_always_right(k, temperature):
    """mutants.py E1, D2, D3: a hole or a stray token in the draft's cache makes it guess wrong a round later."""
    n = 41
    result = generate(TARGET, PROMPTS, n, drafter=ModelDrafter(TARGET), k=k, temperature=temperature, seed=1)
    s = result.stats
    assert s.accepted == s.evaluated == s.drafted
    assert s.rounds == 3 * -(-n // (k + 1))  # every round but the last emits k + 1 tokens


def cached(model, tokens):
    cache = model.new_cache(1)
    model(tokens[None], cache)
    return cache


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("temperature", [0, 1])
def test_after_every_round_both_caches_are_those_of_a_fresh_forward(monkeypatch, drafter, k, temperature):
    """Also when all was accepted, nothing was, or rows differ; whatever else lies in the buffers is NaN and is never read."""
    made = []
    monkeypatch.setattr(TARGET, "new_cache", lambda *args: made.append(type(TARGET).new_cache(TARGET, *args)) or made[-1])
    texts = PROMPTS.tolist()
    histories = set()
    length = torch.full((3,), 3)
    for r in rounds(TARGET, PROMPTS, 30, drafter, k, temperature=temperature, seed=2):
        before, length = length, length + r.n_new
        assert torch.equal(made[0].length, length - 1)
        if n := r.draft_probs.shape[1]:  # the draft has read its guesses but for the last
            assert torch.equal(drafter.cache.length, torch.minimum(length - 1, before + n - 1))
        histories.update(r.n_accepted.tolist())
        for b, (tokens, n) in enumerate(zip(r.tokens.tolist(), r.n_new.tolist())):
            texts[b] += tokens[:n]
            for model, cache in ((TARGET, made[0]), (drafter.model, drafter.cache)):
                S = cache.length[b].item()
                fresh = cached(model, torch.tensor(texts[b][:S]))
                for one, other in ((cache.k, fresh.k), (cache.v, fresh.v)):
                    torch.testing.assert_close(one[:, b, :, :S], other[:, 0, :, :S], rtol=0, atol=1e-10)
        poison(made[0]), poison(drafter.cache)
    assert [len(text) for text in texts] == [33] * 3
    if drafter.model is TARGET:
        assert k in histories and (0 in histories or type(drafter) is ModelDrafter)


# -- counting


def test_counters_add_up(drafter):
    for k in (1, 2, 4):
        stats, rejected, last = Stats(), 0, 0
        for r in rounds(TARGET, PROMPTS, 30, drafter, k, seed=3):
            stats.add(r)
            going, cut = r.n_new > 0, r.n_new <= r.n_accepted  # cut by the budget, or ended before
            assert (r.n_new[~cut] == r.n_accepted[~cut] + 1).all()
            assert (r.n_accepted <= r.n_guessed)[going].all() and (r.n_guessed <= k * going).all()
            rejected += (~cut & (r.n_accepted < r.n_guessed)).sum().item()
            last += (going & cut).sum().item()
        assert stats.emitted == stats.accepted + stats.rounds - last == 90 and last <= 3
        assert stats.evaluated == stats.accepted + rejected <= stats.drafted
        assert stats.tokens_per_pass == 90 / stats.rounds
        assert min(stats.seconds.values()) > 0


def test_plain_decoding_counts_one_token_a_pass():
    stats = generate(TARGET, PROMPTS, 10, seed=0).stats
    assert (stats.emitted, stats.rounds, stats.drafted, stats.evaluated, stats.accepted) == (30, 30, 0, 0, 0)
    assert stats.tokens_per_pass == 1


def test_plain_decoding_reads_every_token_once():
    read = []
    hook = TARGET.register_forward_pre_hook(lambda model, args: read.append(args[0].shape[1]))
    generate(TARGET, PROMPTS, 10)
    hook.remove()
    assert sum(read) == 3 + 10 - 1  # nobody needs to read the last


def test_both_estimates_of_alpha_agree_and_predict_tau():
    """4000 rows: the coins and the laws estimate one number, and the draft is neither right nor wrong all the time."""
    k = 3
    stats = generate(TARGET, PROMPT.expand(4000, -1), 12, drafter=ModelDrafter(DRAFT), k=k, seed=0).stats
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


# -- k that is chosen before each round


def auto(times, guess, rest, accepted, evaluated):
    k = AutoK(times)
    k.guess, k.rest, k.accepted, k.evaluated = guess, rest, accepted, evaluated
    return k


ONE_ROW = torch.tensor([100])


def test_auto_k_by_hand():
    """Flat passes: guess as much as alpha is worth. Passes that cost by the token, as in large batches: do not guess at all."""
    assert auto([1.0] * 9, 0.05, 0, 80, 100).choose(ONE_ROW) == 8
    assert auto([1.0] * 9, 0.05, 0, 50, 100).choose(ONE_ROW) == 3  # Leviathan's best k for alpha = .5, c = .05
    assert auto([1.0] * 9, 0.6, 0, 50, 100).choose(ONE_ROW) == 0
    assert auto([1.0 * n for n in range(1, 10)], 0.01, 0, 90, 100).choose(ONE_ROW) == 0
    assert auto([1.0] * 9, 0.05, 5, 80, 100).choose(ONE_ROW) == 0  # the rest of a round counts, too
    assert [auto([1.0, t], 0, 0, 50, 100).choose(ONE_ROW) for t in (1.46, 1.38)] == [0, 1]  # 1.5 tokens, 3% and 9% faster


def test_auto_k_knows_that_a_batch_ends_with_its_slowest_row():
    """alpha .5, k = 1: tau 1.5 at a price of 1.3; alone a gain. 16 rows of 25 tokens: 16.7 rounds, and the slowest row's sqrt(2 log 16 * 16.7 * .25) / 1.5
    = 3.2 more, 25.9 in all at that price, against 25 passes of plain decoding. Of 400 tokens each: 267 + 13 rounds, 364 against 400."""
    k = auto([1.0, 1.3, 9.0], 0, 0, 50, 100)
    assert [k.choose(room) for room in (torch.tensor([25]), torch.full((16,), 25), torch.full((16,), 400))] == [1, 0, 1]
    assert k.choose(torch.tensor([25] + 15 * [0])) == 1  # rows that have ended are waited for no more


def test_auto_k_learns_from_the_rounds_behind():
    for drafter, more in ((ModelDrafter(TARGET), True), (NoisyDrafter(TARGET, 1.0), False)):
        k, before = AutoK([1.0] * 7), 0.6
        for r in rounds(TARGET, PROMPTS, 40, drafter, k, seed=0):
            pass
        assert (k.accepted / k.evaluated > 0.9) if more else (k.accepted / k.evaluated < before)
        assert 0 < k.guess < 0.1 and k.rest > 0


def plain_round_and(drafted):
    """Two rounds to tell an `AutoK` about: without guesses, and with so many."""
    return next(rounds(TARGET, PROMPT, 5, seed=0)), next(rounds(TARGET, PROMPT, 5, ModelDrafter(DRAFT), drafted, seed=0))


def waits(k, plain):
    """How many plain rounds until the next guess."""
    for n in range(200):
        if k.choose(ONE_ROW) > 0:
            break
        k.add(plain)
    return n


@pytest.mark.parametrize("before", [0, 30])
def test_one_slow_round_does_not_end_guessing(before):
    """The first guess finds all caches cold, and anything may disturb a later one. Were that believed, no other would ever correct it."""
    k, (_, r) = AutoK([1.0] * 7), plain_round_and(1)
    for slow in [False] * before + [True]:
        r.seconds = {"draft": 25.0, "verify": 1.0, "rest": 25.0} if slow else {"draft": 0.1, "verify": 1.0, "rest": 0.1}
        k.add(r)
    k.accepted, k.evaluated = 3.0, 5.0
    assert k.choose(ONE_ROW) > 0


def test_many_slow_rounds_end_guessing_but_not_for_good():
    k, (plain, r) = AutoK([1.0] * 7), plain_round_and(3)
    for n in range(60):
        r.seconds = {"draft": 0.3 if n < 50 else 30.0, "verify": 1.0, "rest": 0.1 if n < 50 else 10.0}
        k.add(r)
        if n == 49:
            assert k.guess == pytest.approx(0.1) and k.rest == pytest.approx(0.1)  # three guesses at .3
    k.accepted, k.evaluated = 3.0, 5.0
    assert k.guess == pytest.approx(10) and k.rest == pytest.approx(10) and k.choose(ONE_ROW) == 0
    assert 10 < waits(k, plain) < 150


def test_auto_k_tries_again_after_a_while():
    """Without new guesses alpha drifts back to where it started."""
    k, (plain, _) = auto([1.0] * 7, 0.1, 0, 0, 50), plain_round_and(1)
    assert 10 < waits(k, plain) < 150


def test_pass_times_by_hand(monkeypatch):
    """Over one token 2 at the median of the turns, over two 1.5 times that, over seven twice; between those a straight line."""
    turns = {1: [1.0, 2, 4], 2: [1.5, 3, 6], 7: [2.0, 4, 20]}
    monkeypatch.setattr("model.time_calls", lambda calls, *_: {n: turns[n] for n in calls})
    assert pass_times(TARGET, 1, 5, 6) == pytest.approx([2, 3, 3.2, 3.4, 3.6, 3.8, 4])


@pytest.mark.parametrize("k", [4, "tree"])
def test_short_rows_beside_rows_that_accept_much(k):
    """Prompts of one token: heads read a round's tokens again, and a row that got one must not be read from before its beginning."""
    drafter, prompts = heads_drafter(), torch.arange(210)[:, None] % 7
    drafter, k = (TreeDrafter(drafter, (3, 2, 1, 1)), 1) if k == "tree" else (drafter, k)
    rows = list(rounds(TARGET, prompts, 12, drafter, k, temperature=3.0, seed=0))
    assert rows[0].n_new.min() == 1 and rows[0].n_new.max() >= 4
    assert greedy(prompts[:7], 12, drafter=drafter, k=k) == greedy(prompts[:7], 12)


class Seldom(FixedK):
    """Eleven rounds without guesses, then one with: a backlog as long as the rows that have ended early."""

    n = 0

    def __init__(self):
        super().__init__(3)

    def choose(self, room):
        return self.most if self.n % 12 == 11 else 0

    def add(self, r):
        self.n += 1


@any_drafter
def test_rows_that_ended_early_do_not_matter_to_a_long_backlog(make):
    drafter, prompts = make(), PROMPTS[:, :2]
    if isinstance(drafter, TreeDrafter):
        return
    for eos in range(7):
        assert greedy(prompts, 40, drafter=drafter, k=Seldom(), eos=eos) == greedy(prompts, 40, eos=eos)


class Varying(FixedK):
    """Looks back: one more guess after a full acceptance, down to none after a rejection."""

    now = 1

    def __init__(self):
        super().__init__(3)

    def choose(self, room):
        return self.now

    def add(self, r):
        self.now = min(self.now + 1, 3) if (r.n_accepted >= r.size - 1).all() else 0


@any_drafter
@pytest.mark.parametrize("k", ["auto", Varying])
def test_greedy_speculation_is_greedy_decoding_for_changing_k(make, k):
    """A draft whose turn does not come for some rounds still reads all that it missed (mutants.py E3)."""
    drafter = make()
    if isinstance(drafter, TreeDrafter):
        return
    assert greedy(PROMPTS, 40, drafter=drafter, k=k if k == "auto" else k()) == greedy(PROMPTS, 40)


def test_a_draft_that_is_the_target_stays_right_for_changing_k():
    for rest in range(4):
        s = generate(TARGET, PROMPTS, 37 + rest, drafter=ModelDrafter(TARGET), k=Varying(), seed=1).stats
        assert s.accepted == s.drafted > 0


# -- bad arguments


def test_plain_decoding_has_no_k_to_check():
    assert len(generate(make_gpt(1, block_size=3), PROMPT[:1], 2).tokens[0]) == 2



@pytest.mark.parametrize(
    "options, message",
    [
        ({"k": 0}, "k is 0"),
        ({"k": 48}, "k is 48"),
        ({"k": "many"}, "k is many"),
        ({"drafter": HeadsDrafter(DraftHeads(7, 8, 8))}, "another shape"),
        ({"drafter": HeadsDrafter(DraftHeads(7, 16, 8))}, "float32, not .* torch.float64"),
        ({"drafter": TreeDrafter(NGramDrafter(), (2,))}, "token by token"),
        ({"drafter": TreeDrafter(ModelDrafter(DRAFT), (9, 9))}, "a tree of 90 guesses"),
        ({"k": FixedK(48)}, "it must be at least 1"),
        ({"seed": -1}, "seed is -1"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top-k"),
        ({"top_p": 0.0}, "top-p"),
        ({"top_p": 1.1}, "top-p"),
        ({"rule": "optimism"}, "unknown rule 'optimism'"),
        ({"prompt": torch.zeros(0, dtype=torch.int64)}, "prompt is empty"),
        ({"prompt": torch.tensor([1.5])}, "int64"),
        ({"prompt": torch.ones(1, 2, 3, dtype=torch.int64)}, "int64"),
        ({"prompt": torch.tensor([7])}, "outside"),
        ({"prompt": torch.tensor([-1])}, "outside"),
        ({"max_new_tokens": -1}, "negative"),
        ({"max_new_tokens": 44}, "target's block_size"),
        ({"drafter": ModelDrafter(make_gpt(0, vocab_size=6))}, "6 tokens, the target 7"),
        ({"drafter": ModelDrafter(make_gpt(0, block_size=9))}, "draft's block_size"),
    ],
)
def test_bad_arguments_are_refused_at_once(options, message):
    options = {"prompt": PROMPT, "max_new_tokens": 5, "drafter": ModelDrafter(DRAFT)} | options
    with pytest.raises(ValueError, match=message):
        generate(TARGET, **options)
    with pytest.raises(ValueError, match=message):
        rounds(TARGET, **options)  # before the first round
