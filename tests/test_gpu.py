"""The same models on a GPU and on the CPU, in float64: the same text, the same distribution.

    python -m pytest tests/test_gpu.py                  # where there is a GPU; else all is skipped
    python -m pytest tests/test_gpu.py --device cpu     # these tests themselves, tested

Rounds are replayed there as CUDA graphs. test_graphs.py tests the same code with a stand-in for them.
"""

import itertools
import statistics

import pytest
import torch

import specdec
import test_sampled_law
from check import pearson
from conftest import make_gpt, make_heads
from extras import accept_typical_lossy
from model import CHECKPOINTS, has_graphs, load_heads, load_pair, now
from specdec import HeadsDrafter, ModelDrafter, NGramDrafter, TreeDrafter
from specdec import collect, generate, rounds, to_probs

PROMPTS = torch.tensor([[1, 2, 3], [4, 5, 6], [0, 0, 0], [6, 1, 2]])
RAGGED = [[1], [4, 5, 6, 6, 1], [0, 0, 0], [6, 1]]
NAMES = "plain", "model", "self", "ngram", "heads", "tree", "tree of heads"
each = pytest.mark.parametrize("name", NAMES)
no_tree = pytest.mark.parametrize("name", NAMES[:-2])
LEVEL = 1e-7  # the chance of a false alarm of each of eight p-values, were its seeds new
V, LENGTH = test_sampled_law.V, 7  # the first rounds are not replayed: those of the last tokens are


@pytest.fixture(scope="module")
def device(pytestconfig):
    name = pytestconfig.getoption("--device") or ("cuda" if torch.cuda.is_available() else None)
    if name is None:
        pytest.skip("no GPU here; --device cpu runs these tests without")
    return torch.device("cuda", 0) if name == "cuda" else torch.device(name)


@pytest.fixture
def target(device):
    return make_gpt(1).to(device)


def make(name, device):
    model = make_gpt(1 if name == "self" else 2, n_layer=2 if name == "self" else 1).to(device)
    heads = make_heads(5, 7, 8).to(device)
    return {
        "plain": lambda: None,
        "model": lambda: ModelDrafter(model),
        "self": lambda: ModelDrafter(model),
        "ngram": NGramDrafter,
        "heads": lambda: HeadsDrafter(heads),
        "tree": lambda: TreeDrafter(ModelDrafter(model), (2, 1, 2)),
        "tree of heads": lambda: TreeDrafter(HeadsDrafter(heads), (3, 2), top=True),
    }[name]()


def test_rounds_are_replayed_on_a_gpu(device):
    assert has_graphs(device) == (device.type == "cuda")


@each
@pytest.mark.parametrize("eos", [None, 2])
@pytest.mark.parametrize("k", [1, 3, "auto"])
def test_greedy_text_is_that_of_the_cpu(target, device, name, eos, k):
    for prompts in (PROMPTS, RAGGED):
        expected = generate(make_gpt(1), prompts, 30, temperature=0, eos=eos)
        if "tree" in name and k == "auto":
            continue
        options = {"drafter": make(name, device), "k": k, "temperature": 0, "eos": eos}
        result = generate(target, prompts, 30, **options)
        assert result.tokens == expected.tokens
        assert result.stats.emitted == expected.stats.emitted
        assert name != "self" or k == "auto" or result.stats.acceptance_rate == 1


@no_tree
def test_the_coupled_rule_yields_plain_decoding(target, device, name):
    plain, ours = (
        generate(target, RAGGED, 30, drafter=drafter, k=3, rule="coupled", seed=3).tokens
        for drafter in (None, make(name, device))
    )
    assert plain == ours


@each
def test_a_target_that_guesses_for_itself_and_seeds(target, device, name):
    """Equal seeds, equal texts; and all guesses accepted, where the two are one."""
    one, two, other = (
        generate(target, PROMPTS, 40, drafter=make(name, device), k=3, seed=seed) for seed in (5, 5, 6)
    )
    assert one == two and one.tokens != other.tokens
    assert name != "self" or one.stats.acceptance_rate == 1


def sampled(device, name, rule):
    """The p-value of many texts of LENGTH tokens, against their exact distribution."""
    n = 120_000 if device.type == "cuda" else 24_000
    target, draft = (m.to(device) for m in (test_sampled_law.TARGET, test_sampled_law.DRAFT))
    drafter = {
        "plain": lambda: None,
        "model": lambda: ModelDrafter(draft),
        "ngram": NGramDrafter,
        "heads": lambda: HeadsDrafter(make_heads(3, V, 8, n_state=8).to(device)),
        "tree": lambda: TreeDrafter(ModelDrafter(draft), (2, 1)),
    }[name]()
    texts = torch.tensor(list(itertools.product(range(V), repeat=LENGTH)), device=device)
    prompt = test_sampled_law.PROMPT.to(device)
    whole = torch.cat((prompt.expand(len(texts), -1), texts), 1)
    probs = to_probs(target(whole[:, :-1])[0][:, len(prompt) - 1 :])
    exact = probs.gather(-1, texts[..., None]).prod(1)[:, 0].cpu()
    counts, B = torch.zeros(V**LENGTH, dtype=torch.float64), 6000
    for seed in range(n // B):
        options = {"drafter": drafter, "k": 2, "rule": rule, "seed": seed}
        tokens = generate(target, prompt.expand(B, -1), LENGTH, **options).tokens
        codes = torch.tensor(tokens) @ V ** torch.arange(LENGTH - 1, -1, -1)
        counts += torch.bincount(codes, minlength=V**LENGTH)
    test_sampled_law.TARGET.cpu(), test_sampled_law.DRAFT.cpu()
    return pearson(counts, exact * n)[2]


DECODERS = [
    ("plain", "rejection"), ("ngram", "rejection"), ("tree", "rejection"),
    *itertools.product(("model", "heads"), ("rejection", "block")), ("model", "coupled"),
]  # fmt: skip


@pytest.mark.parametrize("name, rule", DECODERS)
def test_samples_follow_the_exact_distribution(device, name, rule):
    assert sampled(device, name, rule) > LEVEL


def test_samples_of_a_rule_that_is_not_exact_do_not(device):
    assert sampled(device, "model", accept_typical_lossy) < LEVEL


@each
def test_two_texts_in_turns_are_those_of_each_alone(target, device, name):
    """A third is left in the middle: its last replay still runs while the others go on."""
    def start(seed):
        return rounds(target, PROMPTS, 30, make(name, device), 3, seed=seed)

    expected = [collect(start(seed), 4) for seed in (1, 2)]
    left, both = start(3), ([], [])
    for _ in range(4):
        next(left)
    for pair in itertools.zip_longest(start(1), start(2)):
        for every, r in zip(both, pair):
            every += [r] if r is not None else []
        left = None
    assert [collect(every, 4) for every in both] == expected


@each
def test_memory_does_not_grow(target, device, name):
    used = []
    for seed in range(12):
        generate(target, PROMPTS, 20, drafter=make(name, device), k=3, seed=seed)
        now()
        used.append(torch.cuda.memory_reserved() if device.type == "cuda" else 0)
    assert used[-1] <= used[4]


@pytest.mark.parametrize("name", ["plain", "model", "ngram", "heads", "tree"])
@pytest.mark.parametrize("replayed", [True, False])
def test_no_round_is_much_slower_than_the_others(device, name, replayed, monkeypatch):
    """After the first five, in which the prompt is read and graphs are recorded: at most three times
    the median. Without graphs cuDNN's attention would compile a plan for every new length.
    """
    target, draft, encoding = load_pair(device=device)
    heads, _ = load_heads(CHECKPOINTS / "heads.pt", target)
    drafter = {
        "plain": None,
        "model": ModelDrafter(draft),
        "ngram": NGramDrafter(),
        "heads": HeadsDrafter(heads),
        "tree": TreeDrafter(ModelDrafter(draft), (2, 1, 1, 1)),
    }[name]
    if not replayed:
        monkeypatch.setattr(specdec, "has_graphs", lambda device: False)
    for _ in range(3):  # a machine may have other work, once
        seconds, start = [], now()
        for _ in rounds(target, encoding.encode_ordinary("import os\n"), 120, drafter, 4, seed=0):
            seconds.append(now() - start)
            start = now()
        if max(seconds[5:]) < 3 * statistics.median(seconds[5:]):
            return
    assert device.type != "cuda"
