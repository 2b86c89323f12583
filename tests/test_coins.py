"""Proof, part 3: chance itself. Enumeration takes every coin for a new one; here it is asked
whether it is."""

import pytest
import torch

import specdec
from conftest import make_gpt
from specdec import ModelDrafter, TreeDrafter, generate

TARGET, DRAFT = make_gpt(1), make_gpt(2, n_layer=1, n_embd=4)
PROMPTS = torch.tensor([[3, 1, 4], [0, 2, 6]])


def text(seed, drafter=True, **options):
    drafter = ModelDrafter(DRAFT) if drafter else None
    return generate(TARGET, PROMPTS, 20, drafter=drafter, seed=seed, **options).tokens


@pytest.fixture
def draws(monkeypatch):
    """Every draw of random numbers: (state of its generator before, numbers)."""
    seen, rand = [], torch.rand

    def recording_rand(*shape, generator=None, **options):
        assert generator is not None, "a draw from the global generator"
        state = generator.get_state().numpy().tobytes()
        u = rand(*shape, generator=generator, **options)
        seen.extend([(state, u.clone())] if u.numel() else [])  # no guess needs no coin
        return u

    monkeypatch.setattr(torch, "rand", recording_rand)
    return seen


@pytest.mark.parametrize("options", [{}, {"rule": "block"}, {"rule": "coupled"}, {"k": "auto"}])
def test_no_coin_is_used_twice(draws, options, ours):
    """mutants.py G1, G3: draft, acceptance and correction that share noise are each right alone and
    wrong together."""
    text(0, **options)
    assert len(draws) > 20 or options.get("rule") == "coupled"  # which draws all at the start
    assert len({state for state, _ in draws}) == len(draws)
    numbers = torch.cat([u.flatten().double() for _, u in draws])
    assert len(numbers) > 200 and len(numbers.unique()) > 0.999 * len(numbers)


def test_no_coin_of_a_tree_is_used_twice(draws, ours):
    """Siblings, their verdicts and the token after them: each draw finds the generator moved on."""
    tree = TreeDrafter(ModelDrafter(DRAFT), (2, 2))
    generate(TARGET, PROMPTS, 20, drafter=tree, seed=0)
    assert len(draws) > 50 and len({state for state, _ in draws}) == len(draws)


def test_every_draw_has_a_number_for_every_row_and_guess(draws, monkeypatch, ours):
    """One u for a whole row or batch has the right distribution at each place and the wrong one
    jointly (mutants.py G3)."""
    for function in ("bernoulli", "categorical"):
        original = getattr(specdec, function)

        def watched(probs, generator=None, original=original):
            before = len(draws)
            out = original(probs, generator)
            assert [u.shape for _, u in draws[before:]] == [probs.shape] * (probs.numel() > 0)
            return out

        monkeypatch.setattr(specdec, function, watched)
    text(0)
    assert draws


@pytest.mark.parametrize("drafter", [True, False])
def test_all_draws_are_from_the_generator(monkeypatch, drafter):
    """Two texts of a seed are equal whatever else is drawn meanwhile; and the rows of a batch, who
    have the same prompt here, do not share their luck."""
    prompts = torch.tensor([[3, 1, 4]] * 8)

    def texts():
        model = ModelDrafter(DRAFT) if drafter else None
        return generate(TARGET, prompts, 20, drafter=model, seed=0).tokens

    first = texts()
    torch.rand(1)
    assert texts() == first
    assert len(set(map(tuple, first))) == 8


def test_u_0_everywhere_emits_nothing_impossible(monkeypatch):
    """`<=` for `<` shows only when a coin falls on exactly 0."""

    def zeros(*shape, generator=None, dtype=None, **_):
        return torch.zeros(*shape, dtype=dtype)

    monkeypatch.setattr(torch, "rand", zeros)
    for drafter in (True, False):
        greedy = generate(TARGET, PROMPTS, 20, temperature=0).tokens
        assert text(0, drafter, temperature=0) == greedy
        for prompt, row in zip(PROMPTS, text(0, drafter, top_k=2)):
            tokens = torch.cat((prompt, torch.tensor(row)))
            logits = TARGET(tokens[None, :-1])[0][0, len(prompt) - 1 :]
            best = logits.topk(2).indices.tolist()
            assert all(token in two for token, two in zip(row, best))


@pytest.mark.parametrize("drafter", [True, False])
def test_seeds_repeat_differ_and_leave_no_trace(drafter):
    """mutants.py G4, G6, G7: a second call in the same process is as the first; no global state is
    read or changed."""
    torch.manual_seed(123)
    before = torch.get_rng_state()
    first = text(0, drafter)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(456)
    text(7, drafter), text(None, drafter)
    assert text(0, drafter) == first  # whatever came between
    different = {str(text(seed, drafter)) for seed in range(10)}
    assert len(different) == 10  # 0 is a seed like any other
    assert text(None, drafter) != text(None, drafter)
