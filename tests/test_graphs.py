"""Rounds as CUDA graphs, on a CPU: there a recording of operations stands in for the graph.

It has a graph's rules. A graph holds kernels and addresses. Whatever the host decided or looked up
while it was recorded is frozen in it; recording computes nothing; a replay writes where the
recorded run wrote, and keeps no memory alive but its own; and only generators that it was told of
give it new numbers. A launched replay runs at any time until somebody waits for its stream: here by
the toss of a coin at once, or as late as can be.
"""

import gc
import itertools
import weakref
from contextlib import contextmanager
from random import Random

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

import specdec
import test_law
from extras import accept_typical_lossy
from kvcache import FixedKVCache
from model import capture
from specdec import RULES, ModelDrafter, NGramDrafter, TreeDrafter, generate, rounds, verify
from test_decoding import (
    DRAFT, DRAFTERS, PROMPTS, RAGGED, TARGET, NoisyDrafter, Sometimes, confident_heads, cut_at,
    heads_drafter,
)  # fmt: skip

GRAPHS = []
# The host sees a number by these; the last is how tolist begins.
LOOKS = "aten.item", "aten.is_nonzero", "aten._local_scalar_dense", "aten.resolve_conj"
COPIES = ("aten.lift_fresh",)  # from the host: how torch.tensor and torch.as_tensor begin


def tensors(*args):
    return [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]


def memory(x):
    return x.untyped_storage().data_ptr()


class Foreign:
    """A tensor in memory that is not the graph's own: an address, which keeps nothing alive."""

    def __init__(self, x):
        self.storage = StorageWeakRef(x.untyped_storage())
        self.dtype, self.shape = x.dtype, (x.storage_offset(), x.shape, x.stride())

    def tensor(self):
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        assert storage is not None, "a graph uses memory that is no longer there"
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.shape)


class Operation:
    """One call of an operator. own: addresses of the memory that the graph has by now."""

    def __init__(self, function, args, kwargs, out, own):
        self.function = function
        self.args, self.form = tree_flatten((args, kwargs))
        used = {memory(x) for x in tensors(args, kwargs)}
        self.out = [x.numel() > 0 and memory(x) not in used and x for x in tensors(out)]
        own |= {memory(x) for x in self.out if x is not False}
        for i, x in enumerate(self.args):
            if isinstance(x, torch.Tensor) and x.numel() and memory(x) not in own:
                self.args[i] = Foreign(x)

    def repeat(self):
        args = [x.tensor() if isinstance(x, Foreign) else x for x in self.args]
        args, kwargs = tree_unflatten(args, self.form)
        for old, new in zip(self.out, tensors(self.function(*args, **kwargs))):
            if old is not False:  # else it is a view, or was changed in place
                old.copy_(new)


class Graph:
    """In place of torch.cuda.CUDAGraph."""

    def __init__(self):
        self.operations, self.generators, self.replays, self.stream = [], [], 0, None
        self.own = set()
        GRAPHS.append(self)

    def register_generator_state(self, generator):
        self.generators.append(generator)

    def replay(self):
        self.replays += 1
        stream = torch.cuda.current_stream()
        assert stream is not HOST, "the host would wait for it"
        assert stream.waited, "somebody may still be reading what the last replay wrote"
        stream.waited = False
        stream.add(self.run)

    def run(self):
        for operation in self.operations:
            operation.repeat()


class Stream:
    """In place of torch.cuda.Stream: what was put there, and has not run yet."""

    late = Random(0)

    def __init__(self):
        self.queue, self.waited = [], False
        STREAMS.append(self)

    def add(self, call):
        self.queue.append(call)
        if self.late.random() < 0.5:
            self.run()

    def run(self):
        while self.queue:
            self.queue.pop(0)()

    def wait_stream(self, other):
        assert self is not other
        self.waited = other is HOST
        other.run()


STREAMS = []
HOST = Stream()
CURRENT = [HOST]


@contextmanager
def on_stream(stream):
    """In place of torch.cuda.stream."""
    CURRENT.append(stream)
    try:
        yield
    finally:
        CURRENT.pop()


class Recording(TorchDispatchMode):
    """In place of torch.cuda.graph.

    What is done inside goes into the graph, and when it ends nothing has happened.
    """

    def __init__(self, graph, stream):
        super().__init__()
        others = [other.stream for other in GRAPHS if other is not graph]
        assert all(stream is not other for other in others), "two living graphs on one stream"
        self.graph, graph.stream, self.before = graph, stream, {}

    def __enter__(self):
        self.states = [generator.get_state() for generator in self.graph.generators]
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert not str(function).startswith(LOOKS), "the host looks at a result inside a graph"
        assert not str(function).startswith(COPIES), "a number is copied from the host in a graph"
        if kwargs.get("generator") is not None:
            known = [generator._cdata for generator in self.graph.generators]
            is_known = kwargs["generator"]._cdata in known
            assert is_known, "a generator that the graph does not know"
        for changed, x in zip(function._schema.arguments, args):
            if changed.is_write and memory(x) not in self.graph.own:
                storage = x.untyped_storage()
                self.before.setdefault(memory(x), (storage, storage.clone()))
        out = function(*args, **kwargs)
        operation = Operation(function, args, kwargs, out, self.graph.own)
        self.graph.operations.append(operation)
        return out

    def __exit__(self, *error):
        super().__exit__(*error)
        for storage, before in self.before.values():
            storage.copy_(before)
        for generator, state in zip(self.graph.generators, self.states):
            generator.set_state(state)


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Recording)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", on_stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: CURRENT[-1])
    monkeypatch.setattr(Stream, "late", Random(0))
    monkeypatch.setattr("model._spare", [])
    monkeypatch.setattr(specdec, "now", lambda: [stream.run() for stream in STREAMS])
    for module in ("model", "specdec"):
        monkeypatch.setattr(f"{module}.has_graphs", lambda device: True)
    GRAPHS.clear()
    STREAMS.clear()
    yield
    assert not any(stream.queue for stream in STREAMS), "nobody waits for a replay: its memory may be gone"


def eager(function, *args, **options):
    """The same without graphs."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(specdec, "has_graphs", lambda device: False)
        return function(*args, **options)


ALL = {
    "small_model": DRAFTERS["small_model"],
    "always_right": DRAFTERS["always_right"],
    "ngram": NGramDrafter,
    "heads": heads_drafter,
}
TREES = {
    "tree": lambda: TreeDrafter(ModelDrafter(DRAFT), (2, 1, 2)),
    "tree_of_heads": lambda: TreeDrafter(heads_drafter(), (3, 2), top=True),
}
PLAIN = {"plain": lambda: None}


def each(drafters):
    return pytest.mark.parametrize("make", drafters.values(), ids=drafters)


with_or_without = each(PLAIN | ALL | TREES)
any_drafter = each(ALL)
BATCHES = {
    "greedy": (PROMPTS, 0),
    "sampled": (PROMPTS, 1),
    "from_one_token": (PROMPTS[:, :1], 0),
    "ragged": (RAGGED, 0),
}


# -- the stand-in


def test_the_stand_in_has_the_rules_of_a_graph():
    """To record a call computes nothing. A replay is a call, with coins of its own."""
    state, generator = torch.zeros(2, dtype=torch.int64), torch.Generator().manual_seed(0)
    calls, every = [], []

    def call():
        calls.append(1)
        state.add_(1)
        return state * 10, torch.rand(3, generator=generator)

    launch, result = capture(call, generator)
    assert state.tolist() == [0, 0]
    for n in range(1, 5):
        launch()
        every.append(result())
        assert state.tolist() == [n, n] and len(calls) == 1
    assert [x.tolist() for x, _ in every] == [[10 * n] * 2 for n in range(1, 5)]
    other = torch.Generator().manual_seed(0)
    for _, u in every:
        assert torch.equal(u, torch.rand(3, generator=other))
    assert GRAPHS[0].replays == 4


def test_a_result_stays_whenever_the_next_replay_comes():
    state, seen, every = torch.zeros(1), set(), []
    launch, result = capture(lambda: (state.add_(1) * 10,))
    launch()
    for i in range(1, 9):
        every += result()
        launch()
        seen.add(state.item() - i)  # whether it has run already
    assert [x.item() for x in every] == [*range(10, 90, 10)] and seen == {0, 1}
    result()


def test_the_stand_in_keeps_nothing_alive():
    memory = [torch.zeros(3)]
    launch, result = capture(lambda: (memory[0] + 1,))
    for _ in range(3):
        launch()
        assert result()[0].tolist() == [1, 1, 1]
    memory[0] = torch.zeros(3)
    with pytest.raises(AssertionError, match="no longer there"):
        launch()
        result()


def test_a_stream_is_used_again_once_its_graph_is_gone():
    """PyTorch has 32 of them."""
    memory, streams = torch.zeros(3), []
    for _ in range(3):
        parts = capture(lambda: (memory + 1,))
        streams.append(GRAPHS[-1].stream)
        del parts
        GRAPHS.clear()
    assert streams[0] is streams[1] is streams[2]


# -- replays are rounds


@with_or_without
@pytest.mark.parametrize("prompts, temperature", BATCHES.values(), ids=BATCHES)
def test_replayed_rounds_are_the_rounds(make, prompts, temperature):
    """A round is recorded once, and its replays are what the loop would have done.

    The first round is for itself, the second is as it is recorded; one is replayed in vain.
    """
    for eos in (None, [4, 2]):
        GRAPHS.clear()
        options = {"k": 3, "temperature": temperature, "eos": eos, "seed": 5, "top_p": 0.95}
        every = list(rounds(TARGET, prompts, 20, drafter=make(), **options))
        texts = specdec.collect(every, len(prompts)).tokens
        assert sum(graph.replays for graph in GRAPHS) == (len(every) - 1 if len(every) > 2 else 0)
        assert len(every) > 4 or eos is not None
        if temperature == 0:
            assert texts == eager(generate, TARGET, prompts, 20, drafter=make(), **options).tokens
        elif eos is None:
            assert [len(text) for text in texts] == [20] * len(prompts)


@any_drafter
@pytest.mark.parametrize("rule", ["rejection", "block", "coupled"])
@pytest.mark.parametrize("prompts", [PROMPTS, RAGGED], ids=["batch", "ragged"])
def test_the_same_coins_give_the_same_rounds(make, rule, prompts):
    """Up to the last rounds, where a graph goes on guessing k tokens, though fewer are wanted.

    Guesses and distributions as well: a draft that lacks something would make others.
    """
    options = {"k": 3, "rule": rule, "seed": 5}
    ours = list(rounds(TARGET, prompts, 40, drafter=make(), **options))
    drafter = make()
    decoding = eager(rounds, TARGET, prompts, 40, drafter=drafter, **options)
    theirs = [next(decoding)]
    drafter.always = True  # n-grams: k places also without a match, as in a graph
    theirs += decoding
    room, compared = torch.full((len(prompts),), 40), 0
    for one, other in zip(ours, theirs):
        if room.max() < 3:
            break
        active = room > 0
        room -= one.n_new
        compared += 1
        assert torch.equal(one.n_new, other.n_new)
        n = one.n_accepted[active]
        assert torch.equal(n, other.n_accepted[active])
        for b in active.nonzero()[:, 0].tolist():
            m = one.n_accepted[b] + 1
            assert torch.equal(one.tokens[b, :m], other.tokens[b, :m])
            for name in ("target_probs", "draft_probs", "guesses"):
                x, y = (getattr(r, name)[b] for r in (one, other))
                torch.testing.assert_close(x, y, rtol=0, atol=1e-10)
    assert compared >= 8


@each(TREES)
@pytest.mark.parametrize("prompts", [PROMPTS, RAGGED], ids=["batch", "ragged"])
def test_the_same_coins_give_the_same_trees(make, prompts):
    test_the_same_coins_give_the_same_rounds(make, "rejection", prompts)


@with_or_without
def test_the_next_replay_is_launched_before_anybody_looks(make, monkeypatch):
    """And who looks at a round does not wait for the next one."""
    monkeypatch.setattr(Stream, "add", lambda stream, call: stream.queue.append(call))
    for i, r in enumerate(rounds(TARGET, PROMPTS, 30, drafter=make(), k=3, seed=0)):
        assert r.n_new.max() > 0 and r.tokens.tolist()
        if i >= 2:
            assert GRAPHS[0].replays == i and len(GRAPHS[0].stream.queue) == 1
    assert i > 5 and len(GRAPHS) == 1


def test_plain_decoding_draws_the_same_tokens():
    for prompts in (PROMPTS, RAGGED):
        options = {"seed": 5, "temperature": 1.3, "eos": 3}
        expected = eager(generate, TARGET, prompts, 40, **options)
        assert generate(TARGET, prompts, 40, **options) == expected


@with_or_without
def test_every_budget(make):
    """Also none, and those that end with the first round or the second."""
    for budget in range(7):
        expected = eager(generate, TARGET, RAGGED, budget, temperature=0)
        result = generate(TARGET, RAGGED, budget, drafter=make(), k=3, temperature=0)
        assert result.tokens == expected.tokens
        assert result.stats.emitted == 4 * budget


@with_or_without
def test_several_end_tokens(make):
    plain = eager(generate, TARGET, RAGGED, 30, temperature=0).tokens
    for eos in ([2, 5, 6], 4):
        options = {"k": 2, "temperature": 0, "eos": eos}
        result = generate(TARGET, RAGGED, 30, drafter=make(), **options)
        assert result.tokens == cut_at([4] if eos == 4 else eos, plain)
        assert result.stats.emitted == sum(map(len, result.tokens))


@each(PLAIN | ALL)
def test_the_coupled_rule_yields_plain_decoding_with_graphs_and_without(make):
    options = {"rule": "coupled", "seed": 3}
    expected = eager(generate, TARGET, PROMPTS, 30, **options).tokens
    assert eager(generate, TARGET, PROMPTS, 30, drafter=make(), k=2, **options).tokens == expected
    # They stay what they are while others follow.
    every = list(rounds(TARGET, PROMPTS, 30, drafter=make(), k=2, **options))
    texts = specdec.collect(every, 3).tokens
    assert texts == expected and GRAPHS[0].replays == len(every) - 1


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("prompts", [PROMPTS, RAGGED], ids=["batch", "ragged"])
def test_a_graph_reads_all_that_the_draft_may_lack(k, temperature, prompts):
    drafter = ModelDrafter(TARGET)
    s = generate(TARGET, prompts, 40, drafter=drafter, k=k, temperature=temperature, seed=0).stats
    assert s.acceptance_rate == 1
    assert s.rounds == len(prompts) * 40 // (k + 1)


@with_or_without
def test_a_drafter_may_be_in_another_generation_meanwhile(make):
    """Each graph writes to memory that is for its own text alone, and that stays.

    Two generations in turns on one drafter; then a third, while the first is not finished.
    """
    drafter = make()
    prompts = PROMPTS, [[2, 2], [1]], RAGGED
    expected = [eager(generate, TARGET, p, 30, temperature=0).tokens for p in prompts]
    texts = [[[] for _ in p] for p in prompts]

    def go_on(i, n=100):
        for _, r in zip(range(n), running[i]):
            for text, tokens, m in zip(texts[i], r.tokens.tolist(), r.n_new.tolist()):
                text += tokens[:m]

    options = {"drafter": drafter, "k": 2, "temperature": 0}
    running = [rounds(TARGET, p, 30, **options) for p in prompts]
    for _ in range(5):
        go_on(0, 1)
        go_on(1, 1)
    go_on(2)
    go_on(0, 2)
    # All that the graphs do not use themselves may be given back, and written to by others.
    litter = [torch.full((n,), 1e9) for n in range(1, 3000, 7) for _ in range(2)]
    go_on(1)
    go_on(0)
    assert texts == expected and len(GRAPHS) == 3 and len(litter) > 0


# -- what is replayed, and what is not


UNKNOWN = {
    "confident_heads": lambda: confident_heads([1, 1.1, 1.2, 1.5]),
    "of_ones_own": lambda: NoisyDrafter(DRAFT, 0.5),
    "another_of_ones_own": lambda: Sometimes(ModelDrafter(DRAFT), [1, 0, 2]),
    "tree_of_ones_own": lambda: TreeDrafter(NoisyDrafter(DRAFT, 0.5), (2, 1)),
}


@pytest.mark.parametrize("make", UNKNOWN.values(), ids=UNKNOWN)
def test_a_drafter_that_may_look_at_results_is_not_replayed(make):
    result = generate(TARGET, PROMPTS, 20, drafter=make(), k=3, temperature=0)
    assert result.tokens == eager(generate, TARGET, PROMPTS, 20, temperature=0).tokens
    assert not GRAPHS
    if "tree" not in str(type(make())).lower():
        generate(TARGET, PROMPTS, 20, drafter=make(), k=3, rule="coupled")
        assert not GRAPHS


def test_a_rule_of_ones_own_is_not_replayed():
    def own(*args):
        n_accepted, token = verify(*args)
        assert n_accepted.tolist() and (token >= 0).all()  # it looks
        return n_accepted, token

    for rule in (own, accept_typical_lossy):
        for drafter in (ModelDrafter(DRAFT), NGramDrafter()):
            options = {"drafter": drafter, "k": 3, "rule": rule, "temperature": 0}
            result = generate(TARGET, PROMPTS, 20, **options)
            assert result.tokens == eager(generate, TARGET, PROMPTS, 20, temperature=0).tokens
    assert not GRAPHS


def test_a_rule_of_ours_is_replayed_by_name_or_as_a_function():
    for rule in ("rejection", verify):
        generate(TARGET, PROMPTS, 20, drafter=ModelDrafter(DRAFT), rule=rule, seed=0)
    assert [graph.replays > 2 for graph in GRAPHS] == [True, True]


@any_drafter
@pytest.mark.parametrize("credit, prompts", [("never", PROMPTS), ("always", PROMPTS), ("at_times", RAGGED)])
def test_auto_guesses_four_or_none(make, prompts, credit, monkeypatch):
    """Two graphs in turns, as the account says. Greedy, the text is that of plain decoding; and the
    drafter guesses what it would have guessed, also after rounds in which it was not asked.
    """
    credits = itertools.cycle({"never": [0], "at_times": [0, 1, 0, 0, 1, 1], "always": [1]}[credit])

    def learn(auto, n, seconds, tokens):
        auto.plain, auto.credit = [1, 1, 1], next(credits)

    monkeypatch.setattr(specdec.AutoK, "learn", learn)
    prompts = [torch.as_tensor(prompt) for prompt in prompts]
    every = list(rounds(TARGET, prompts, 30, drafter=make(), k="auto", temperature=0))
    texts = specdec.collect(every, len(prompts)).tokens
    assert texts == eager(generate, TARGET, prompts, 30, temperature=0).tokens
    assert len(GRAPHS) == 2 and sum(graph.replays for graph in GRAPHS) == len(every) - 2
    ks = {r.guesses.shape[1] for r in every[5:]}
    assert ks == {"never": {0}, "at_times": {0, 4}, "always": {4}}[credit]
    for i, r in enumerate(every):
        if r.guesses.shape[1] == 4 and r.n_new.min() > 0:  # by a drafter that begins anew here
            before = [[x.tokens[b, : x.n_new[b]] for x in every[:i]] for b in range(len(prompts))]
            so_far = [torch.cat([prompt, *new]) for prompt, new in zip(prompts, before)]
            other = next(eager(rounds, TARGET, so_far, 5, drafter=make(), k=4, temperature=0))
            expected = other.draft_probs if other.guesses.shape[1] else 0 * r.draft_probs
            torch.testing.assert_close(r.draft_probs, expected, rtol=0, atol=1e-9)


def test_auto_learns_of_a_round_what_came_of_it(monkeypatch):
    """Although the next one was launched before."""
    learnt, learn = [], specdec.AutoK.learn

    def watched(auto, n, seconds, tokens):
        learnt.append((n > 0, tokens))
        auto.credit = 1 - len(learnt) // 3 % 2  # guesses, and none, in turns
        learn(auto, n, 1e-3, tokens)

    monkeypatch.setattr(specdec.AutoK, "learn", watched)
    every = list(rounds(TARGET, [1, 2], 46, drafter=ModelDrafter(DRAFT), k="auto", seed=0))
    happened = [(r.guesses.shape[1] > 0, r.n_new.item()) for r in every[3:]]
    assert learnt == happened[: len(learnt)] and len(happened) - len(learnt) <= 1
    assert {asked for asked, _ in learnt} == {False, True}


def test_many_end_tokens_are_not_for_graphs():
    """torch.isin sorts ten or more of them, and looks at what comes out."""
    probs = torch.tensor([1 / 3] * 3 + [0] * 10).expand(8, 13, 13)
    for n in (9, 10):
        GRAPHS.clear()
        generate(test_law.TableModel(probs), [[0]], 5, eos=[*range(3, 3 + n)], seed=0)
        assert bool(GRAPHS) == (n < 10)


@each(PLAIN | ALL | TREES | {"auto": lambda: ModelDrafter(DRAFT)})
def test_no_memory_is_kept_afterwards(make, request, monkeypatch):
    """Not even until the garbage collector comes: it knows nothing of a GPU's memory."""
    k, made = "auto" if "auto" in request.node.name else 3, []

    class Watched(FixedKVCache):
        def __init__(self, cache):
            super().__init__(cache)
            made.append(weakref.ref(self))

    monkeypatch.setattr(specdec, "FixedKVCache", Watched)
    gc.disable()
    try:
        for n in (1, 2, 5, 99):
            decoding = rounds(TARGET, RAGGED, 40, drafter=make(), k=k, seed=0)
            for _ in zip(range(n), decoding):
                pass
            decoding.close()
            del decoding
            assert made and not any(cache() for cache in made)
    finally:
        gc.enable()


@each(PLAIN | ALL | TREES | {"auto": lambda: ModelDrafter(DRAFT)})
def test_what_is_left_in_the_middle(make, request):
    """A replay runs when nobody wants the text any more: its memory stays until it is done."""
    k = "auto" if "auto" in request.node.name else 3
    for n in range(1, 8):
        decoding = rounds(TARGET, RAGGED, 40, drafter=make(), k=k, seed=0)
        for _ in range(n):
            next(decoding)
        decoding.close()
        assert not any(stream.queue for stream in STREAMS)
    del decoding, _
    assert sum(graph.replays for graph in GRAPHS) >= 5


def test_cudnns_attention_is_off():
    """It would compile a plan for every new length, 40 to 60 ms each (on an H200)."""
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_another_device_than_the_current_one_has_no_graphs(monkeypatch):
    monkeypatch.undo()
    assert generate(TARGET, PROMPTS, 5, seed=0).stats.emitted == 15
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    devices = torch.device("cuda", 1), torch.device("cuda", 0), torch.device("cpu")
    assert [specdec.has_graphs(device) for device in devices] == [True, False, False]


# -- devices


class OnADevice(TorchFunctionMode):
    """Every new tensor is made on a device that is named: on a GPU the default is another."""

    makes = {getattr(torch, name) for name in "arange empty full ones rand tensor zeros".split()}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        named = (kwargs or {}).get("device") is not None
        assert named or function not in self.makes, f"torch.{function.__name__} without a device"
        return function(*args, **(kwargs or {}))


def test_what_names_no_device_is_seen():
    with OnADevice(), pytest.raises(AssertionError, match="torch.rand without a device"):
        torch.rand(3)


@pytest.mark.parametrize("rule", RULES)
@each(PLAIN | ALL)
def test_everything_is_made_on_the_device_of_the_model(make, rule, ours):
    """In the first rounds, which are not replayed, and without graphs in all."""
    options = {"drafter": make(), "k": 3, "rule": rule, "eos": [2, 5]}
    with OnADevice():
        for _ in zip(range(2), rounds(TARGET, RAGGED, 9, **options)):
            pass
        eager(generate, TARGET, RAGGED, 9, **options)


@pytest.mark.parametrize("k", [3, "auto"])
def test_everything_else_is_made_there_as_well(k, ours):
    drafter = ModelDrafter(DRAFT) if k == "auto" else TreeDrafter(ModelDrafter(DRAFT), (2, 1))
    with OnADevice():
        eager(generate, TARGET, RAGGED, 9, drafter=drafter, k=k)


# -- what a graph must not do


LOOKING = {
    "int": lambda x: int(x.sum()),
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "bool": lambda x: bool(x.any()),
}


@pytest.mark.parametrize("look", LOOKING.values(), ids=LOOKING)
def test_a_round_that_looks_at_its_results_is_refused(look, monkeypatch):
    bernoulli = specdec.bernoulli

    def looking(probs, generator=None):
        coins = bernoulli(probs, generator)
        look(coins)
        return coins

    monkeypatch.setattr(specdec, "bernoulli", looking)
    with pytest.raises(AssertionError, match="host looks"):
        generate(TARGET, PROMPTS, 10, drafter=ModelDrafter(DRAFT), k=2)


def test_a_round_that_copies_from_the_host_is_refused(monkeypatch):
    bernoulli = specdec.bernoulli

    def copying(probs, generator=None):
        return bernoulli(probs * torch.tensor(1.0), generator)

    monkeypatch.setattr(specdec, "bernoulli", copying)
    with pytest.raises(AssertionError, match="copied from the host"):
        generate(TARGET, PROMPTS, 10, drafter=ModelDrafter(DRAFT), k=2)


@with_or_without
def test_coins_of_an_unknown_generator_are_refused(make, monkeypatch):
    monkeypatch.setattr(Graph, "register_generator_state", lambda *_: None)
    with pytest.raises(AssertionError, match="does not know"):
        generate(TARGET, PROMPTS, 10, drafter=make(), k=2)


# -- the distribution


def test_the_exact_distribution_with_fixed_shapes(monkeypatch):
    """The operations of a graph, but with every outcome tried: that needs a host that looks."""

    def capture(call, generator=None):
        """A replay in vain is left out: its coins change nothing, but they would all be tried."""
        out = [None]

        def result():
            if out[-1] is None or out[-1].any():
                out[:] = call()
            return [x.clone() for x in out]

        return lambda: None, result

    monkeypatch.setattr(specdec, "capture", capture)
    test_law.test_with_an_eos(2, 2, 4)
    # After token 0 and after token 1, of target and draft.
    after = torch.tensor([[[0.7, 0.3], [1.0, 0.0]], [[0.4, 0.6], [1.0, 0.0]]])
    target, draft = (test_law.TableModel(probs.expand(8, 2, 2)) for probs in after)
    test_law.assert_exact(target, draft, [[0], [1]], 3, 1)
    test_law.assert_exact(target, draft, [[0], [1, 0, 0]], 3, 1)
    for rule in ("block", "coupled"):
        test_law.assert_exact(target, draft, [[0]], 3, 1, rule=rule)
    test_law.assert_exact(target, None, [[0], [1, 0]], 3, 1)
