"""Rounds as CUDA graphs, on a CPU: there a recording of operations stands in for the graph, with a graph's rules.

A graph holds kernels and addresses. Whatever the host decided or looked up while it was recorded is frozen in it; recording computes
nothing; a replay writes where the recorded run wrote; and only generators that it was told of give it new numbers.
"""

import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import specdec
import test_law
from model import now, pass_times
from specdec import FixedK, ModelDrafter, NGramDrafter, TreeDrafter, generate, rounds
from test_decoding import DRAFT, DRAFTERS, PROMPTS, TARGET, heads_drafter

GRAPHS = []
LOOKS = ("aten.item", "aten.is_nonzero", "aten._local_scalar_dense", "aten.resolve_conj")  # the last: tolist
COPIES = ("aten.lift_fresh",)  # from the host: how torch.tensor and torch.as_tensor begin


def tensors(*args):
    return [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]


def memory(x):
    return x.untyped_storage().data_ptr()


class Graph:
    """In place of torch.cuda.CUDAGraph."""

    def __init__(self):
        self.operations, self.generators, self.replays, self.stream = [], [], 0, None
        GRAPHS.append(self)

    def register_generator_state(self, generator):
        self.generators.append(generator)

    def replay(self):
        self.replays += 1
        for function, args, kwargs, out in self.operations:
            new = function(*args, **kwargs)
            used = {memory(x) for x in tensors(args, kwargs)}
            for old, new in zip(tensors(out), tensors(new)):
                if memory(old) not in used:  # else it is a view, or was changed in place
                    old.copy_(new)


class Recording(TorchDispatchMode):
    """In place of torch.cuda.graph: what is done inside goes into the graph, and when it ends nothing has happened."""

    def __init__(self, graph, stream):
        super().__init__()
        assert all(stream is not other.stream for other in GRAPHS if other is not graph), "two living graphs on one stream"
        self.graph, graph.stream, self.before = graph, stream, {}

    def __enter__(self):
        self.states = [generator.get_state() for generator in self.graph.generators]
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert not str(function).startswith(LOOKS), "the host looks at a result inside a graph"
        assert not str(function).startswith(COPIES), "a number is copied from the host inside a graph"
        if kwargs.get("generator") is not None:
            known = [generator._cdata for generator in self.graph.generators]
            assert kwargs["generator"]._cdata in known, "a generator that the graph does not know"
        for changed, x in zip(function._schema.arguments, args):
            if changed.is_write:
                self.before.setdefault(memory(x), (x.untyped_storage(), x.untyped_storage().clone()))
        out = function(*args, **kwargs)
        self.graph.operations.append((function, args, kwargs, out))
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
    monkeypatch.setattr(torch.cuda, "Stream", object)
    for module in ("model", "specdec"):
        monkeypatch.setattr(f"{module}.has_graphs", lambda device: True)
    GRAPHS.clear()


def eager(*args, **options):
    """The same without graphs."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(specdec, "has_graphs", lambda device: False)
        return generate(*args, **options)


ALL = DRAFTERS["small_model"], DRAFTERS["always_right"], NGramDrafter, heads_drafter


@pytest.mark.parametrize("make", [lambda: None, *ALL], ids=["plain", "small_model", "always_right", "ngram", "heads"])
@pytest.mark.parametrize("prompts, temperature", [(PROMPTS, 0), (PROMPTS, 1), (PROMPTS[:, :1], 0)], ids=["greedy", "sampled", "from_one_token"])
def test_replayed_rounds_are_the_rounds(make, prompts, temperature):
    """A round is recorded once, and its replays, with new coins each, are what the loop would have done."""
    for eos in (None, 2):
        options = {"k": 3, "temperature": temperature, "eos": eos, "seed": 5, "top_p": 0.95}
        result = generate(TARGET, prompts, 20, drafter=make(), **options)
        if temperature == 0:
            assert result.tokens == eager(TARGET, prompts, 20, drafter=make(), **options).tokens
    assert len(GRAPHS) == 2 and GRAPHS[0].replays > 2


@pytest.mark.parametrize("rule", ["rejection", "block", "lossy-typical"])
@pytest.mark.parametrize("drafter", [ModelDrafter(DRAFT), heads_drafter()], ids=["model", "heads"])
def test_the_same_coins_give_the_same_text(drafter, rule):
    """Up to the last rounds, where a graph goes on guessing k tokens, though fewer are wanted."""
    options = {"k": 3, "rule": rule, "seed": 5}
    one, other = (run(TARGET, PROMPTS[:1], 40, drafter=drafter, **options) for run in (generate, eager))
    assert one.tokens[0][:36] == other.tokens[0][:36]
    assert [len(row) for row in one.tokens] == [40]


def test_the_coupled_rule_yields_plain_decoding_with_graphs_and_without():
    options = {"rule": "coupled", "seed": 3}
    expected = eager(TARGET, PROMPTS, 30, **options).tokens
    for drafter in (None, *(make() for make in ALL)):
        every = list(rounds(TARGET, PROMPTS, 30, drafter=drafter, k=2, **options))  # they stay what they are while others follow
        texts = [sum((r.tokens[b, : r.n_new[b]].tolist() for r in every), []) for b in range(3)]
        assert texts == expected


class Schedule(FixedK):
    """k by a list, as `AutoK` might choose it, with stretches of plain decoding."""

    def __init__(self):
        super().__init__(3)
        self.ks = iter([3, 3, 3, *[0] * 9, 3, 3, 0, 3] + [1] * 50)

    def choose(self, room):
        return next(self.ks)


@pytest.mark.parametrize("make", ALL)
def test_every_k_has_a_graph_of_its_own(make):
    """After plain rounds, of which a graph of guesses would know nothing, the drafter reads what it has missed."""
    options = {"rule": "coupled", "seed": 3}
    expected = eager(TARGET, PROMPTS, 40, **options)
    result, other = (run(TARGET, PROMPTS, 40, drafter=make(), k=Schedule(), **options) for run in (generate, eager))
    assert result.tokens == expected.tokens
    assert 2 <= len([graph for graph in GRAPHS if graph.replays])
    if make is DRAFTERS["always_right"]:
        assert result.stats.acceptance_rate == 1
    assert result.stats.acceptance_rate == pytest.approx(other.stats.acceptance_rate, abs=0.1)  # it knows all that it should


def test_a_graph_reads_all_that_the_draft_may_lack():
    result = generate(TARGET, PROMPTS, 40, drafter=ModelDrafter(TARGET), k=1, seed=0)
    assert result.stats.acceptance_rate == 1


def test_what_follows_from_results_is_no_graph():
    for drafter in (heads_drafter(times=[1, 1.1, 1.2, 1.5]), TreeDrafter(ModelDrafter(DRAFT), (2, 1))):
        generate(TARGET, PROMPTS, 10, drafter=drafter, k=3, seed=0)
    assert not GRAPHS


@pytest.mark.parametrize("drafter", [None, ModelDrafter(DRAFT)], ids=["plain", "model"])
def test_to_record_is_not_part_of_a_round(drafter, monkeypatch):
    class Slow(Recording):
        def __enter__(self):
            time.sleep(0.5)
            return super().__enter__()

    monkeypatch.setattr(torch.cuda, "graph", Slow)
    times = [sum(r.seconds.values()) for r in rounds(TARGET, PROMPTS, 10, drafter, 2, seed=0)]
    assert len(GRAPHS) == 1 and max(times) < 0.5


@pytest.mark.parametrize("look", [lambda x: int(x.sum()), lambda x: x.sum().item(), lambda x: x.tolist(), lambda x: bool(x.any())])
def test_a_round_that_looks_at_its_results_is_refused(look, monkeypatch):
    monkeypatch.setattr(specdec, "leading", lambda kept: look(kept) and None or kept.cumprod(-1).sum(-1))
    with pytest.raises(AssertionError, match="host looks"):
        generate(TARGET, PROMPTS, 10, drafter=ModelDrafter(DRAFT))


def test_coins_of_an_unknown_generator_are_refused(monkeypatch):
    monkeypatch.setattr(Graph, "register_generator_state", lambda *_: None)
    with pytest.raises(AssertionError, match="does not know"):
        generate(TARGET, PROMPTS, 10, drafter=ModelDrafter(DRAFT))


def test_timed_passes_are_replays():
    times = pass_times(TARGET, 2, 9, 4)
    assert len(times) == 5 and min(times) > 0
    assert len([graph for graph in GRAPHS if graph.replays > 30]) == 3


def test_the_exact_law_with_fixed_shapes(monkeypatch):
    """The same operations as in a graph, but with every outcome tried: that needs a host that looks."""
    monkeypatch.setattr(specdec, "capture", lambda call, generator=None: lambda: (*call(), 0.0))
    test_law.test_with_an_eos(2, 2, 4)
    after = torch.tensor([[[0.7, 0.3], [1.0, 0.0]], [[0.4, 0.6], [1.0, 0.0]]])  # laws after token 0 and after 1, of target and draft
    target, draft = (test_law.TableModel(law.expand(8, 2, 2)) for law in after)
    test_law.assert_same_law(target, draft, [[0], [1]], 3, 1)


def test_moments_of_a_gpu(monkeypatch):
    """Events of CUDA, which count in milliseconds and must be waited for."""
    clock = [1000.0, 1250.0]

    class Event:
        def __init__(self, enable_timing, external):
            assert enable_timing and external

        def record(self):
            self.time = clock.pop(0)

        def synchronize(self):
            self.reached = True

        def elapsed_time(self, end):
            assert end.reached
            return end.time - self.time

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    start, end = now(), now()
    assert end - start == 0.25
