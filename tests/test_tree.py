"""Token trees: the mask, the cache, the rule. (tests/test_law.py has their law inside the loop.)"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import specdec
from conftest import fresh_logits, heads_logits, make_gpt, make_heads
from enumerator import outcomes
from specdec import HeadsDrafter, ModelDrafter, TreeDrafter, ancestors, generate, rounds, verify_tree
from test_kvcache import poison
from test_verify import law_of

TARGET, DRAFT = make_gpt(1), make_gpt(2, n_layer=1, n_embd=4)
PROMPTS = torch.tensor([[3, 1, 4], [0, 2, 6], [5, 5, 5]])
shapes = st.lists(st.integers(1, 3), min_size=1, max_size=4).map(tuple)


def test_ancestors_by_hand():
    """Widths 2,2: the root 0; its children 1, 2; theirs 3, 4 and 5, 6."""
    paths = [[0], [0, 1], [0, 2], [0, 1, 3], [0, 1, 4], [0, 2, 5], [0, 2, 6]]
    assert [row.nonzero()[:, 0].tolist() for row in ancestors((2, 2), "cpu")] == paths


@given(shapes, st.lists(st.integers(0, 6), min_size=3, max_size=3), st.randoms(use_true_random=False))
def test_a_tree_pass_equals_a_chain_pass_for_every_path(widths, undone, random):
    """In a ragged batch, with NaN in every slot that nobody should read."""
    tree = ancestors(widths, "cpu")
    N = len(tree)
    cache = TARGET.new_cache(3, 160)
    texts = [[random.randrange(7) for _ in range(9)] for _ in range(3)]
    TARGET(torch.tensor(texts), cache)
    texts = [text[: 9 - n] for text, n in zip(texts, undone)]
    cache.rollback(torch.tensor([len(text) for text in texts]))
    poison(cache)
    nodes = torch.tensor([[random.randrange(7) for _ in range(N)] for _ in range(3)])
    logits, _ = TARGET(nodes, cache, tree)
    for b in range(3):
        for node in {0, N - 1, random.randrange(N), random.randrange(N)}:
            chain = torch.tensor(texts[b] + nodes[b, tree[node]].tolist())
            torch.testing.assert_close(logits[b, node], fresh_logits(TARGET, chain)[-1], rtol=0, atol=1e-12)


@given(shapes, st.randoms(use_true_random=False))
def test_after_compaction_the_cache_is_that_of_a_fresh_forward(widths, random):
    """mutants.py I4: the accepted nodes are scattered among the rejected ones, and each row has its own."""
    tree = ancestors(widths, "cpu")
    cache = TARGET.new_cache(2, 160)
    texts = [[random.randrange(7) for _ in range(5)] for _ in range(2)]
    TARGET(torch.tensor(texts), cache)
    nodes = torch.tensor([[random.randrange(7) for _ in range(len(tree))] for _ in range(2)])
    TARGET(nodes, cache, tree)
    leaves = [random.randrange(len(tree) - int(torch.tensor(widths).prod()), len(tree)) for _ in range(2)]
    path = torch.stack([tree[leaf].nonzero()[:, 0] for leaf in leaves])
    cache.keep(torch.tensor([5, 5]), path)
    n = [random.randrange(1, path.shape[1] + 1) for _ in range(2)]  # rows accept different depths
    cache.rollback(5 + torch.tensor(n))
    poison(cache)
    new = torch.randint(7, (2, 3))
    logits, _ = TARGET(new, cache)
    for b in range(2):
        text = torch.cat((torch.tensor(texts[b]), nodes[b, path[b, : n[b]]], new[b]))
        torch.testing.assert_close(logits[b], fresh_logits(TARGET, text)[-3:], rtol=0, atol=1e-12)


def drafters():
    return {"model": ModelDrafter(DRAFT), "target": ModelDrafter(TARGET), "heads": HeadsDrafter(make_heads(0, 7, 16))}


@pytest.mark.parametrize("drafter", drafters())
@pytest.mark.parametrize("widths", [(1, 1, 1), (3, 2, 1), (2, 2, 2), (7,), (9, 1)])
@pytest.mark.parametrize("top", [False, True])
def test_greedy_text_is_the_targets(drafter, widths, top):
    """For every budget around the depth, and beyond it; more children than tokens are no harm."""
    drafter = TreeDrafter(drafters()[drafter], widths, top)
    for n in (*range(6), 30):
        assert generate(TARGET, PROMPTS, n, drafter=drafter, temperature=0).tokens == generate(TARGET, PROMPTS, n, temperature=0).tokens


@pytest.mark.parametrize("widths", [(1, 1, 1), (2, 2), (3, 1, 2)])
@pytest.mark.parametrize("temperature", [0, 1])
def test_a_draft_that_is_the_target_is_always_right(widths, temperature):
    s = generate(TARGET, PROMPTS, 36, drafter=TreeDrafter(ModelDrafter(TARGET), widths), temperature=temperature, seed=1).stats
    assert s.accepted == s.evaluated == s.drafted and s.rounds == 3 * 36 // (len(widths) + 1)


@pytest.mark.parametrize("temperature", [0, 1])
def test_after_every_round_both_caches_are_those_of_a_fresh_forward(monkeypatch, temperature):
    made = []
    monkeypatch.setattr(TARGET, "new_cache", lambda *args: made.append(type(TARGET).new_cache(TARGET, *args)) or made[-1])
    drafter = TreeDrafter(ModelDrafter(DRAFT), (3, 2, 2), top=temperature == 0)
    texts, depths = PROMPTS.tolist(), set()
    for r in rounds(TARGET, PROMPTS, 30, drafter, temperature=temperature, seed=2):
        depths.update(r.n_accepted.tolist())
        for b, (tokens, n) in enumerate(zip(r.tokens.tolist(), r.n_new.tolist())):
            assert r.size == 1 or n == 0 or drafter.drafter.cache.length[b] == len(texts[b])  # all but the path just accepted, which is read again
            texts[b] += tokens[:n]
            assert made[0].length[b] == len(texts[b]) - 1
            for model, cache in ((TARGET, made[0]), (DRAFT, drafter.drafter.cache)):
                S = cache.length[b].item()
                fresh = model.new_cache(1) if model is DRAFT else type(TARGET).new_cache(TARGET, 1)
                model(torch.tensor([texts[b][:S]]), fresh)
                torch.testing.assert_close(cache._kv[:, :, b, :, :S], fresh._kv[:, :, 0, :, :S], rtol=0, atol=1e-10)
        poison(made[0]), poison(drafter.drafter.cache)
    assert {0, 1, 2} <= depths


@pytest.mark.parametrize("drafter", ["model", "heads"])
def test_every_node_continues_its_own_parent(drafter):
    """The law of each first child is the drafter's law after the tokens on the path to its parent. (No test of the output sees it.)"""
    inner, text, length = drafters()[drafter], torch.randint(7, (2, 30)), torch.tensor([6, 6])
    tree = TreeDrafter(inner, (2, 3, 2))
    tree.check(TARGET, 40)
    cache = TARGET.new_cache(2)
    tree.start(text[:, :6], 80, TARGET(text[:, :5], cache)[1], cache)
    tokens, probs = tree.propose(text, length, 3, lambda logits: logits.softmax(-1), torch.Generator().manual_seed(0))
    sees = ancestors((2, 3, 2), "cpu")
    for b in range(2):
        for node in (1, 3, 6, 9, 11, 13, 15, 17, 19):  # the first children of nodes 0 to 8
            path = [tokens[b, i - 1].item() for i in sees[node].nonzero()[:-1, 0].tolist() if i]
            if drafter == "model":
                expected = fresh_logits(DRAFT, torch.tensor(text[b, :6].tolist() + path))[-1]
            else:
                expected = heads_logits(inner.heads, TARGET, text[b, :6].tolist(), path)[-1]
            torch.testing.assert_close(probs[b, node - 1], expected.softmax(-1), rtol=0, atol=1e-12)


def accepted(target, draft_laws, widths):
    """The chance that some child of the root is accepted; draft_laws: of each child, in order."""

    def run():
        tokens = torch.stack([specdec.categorical(law[None])[0] for law in draft_laws])[None]
        return verify_tree(target.expand(1, 3, -1), torch.stack(draft_laws)[None], tokens, widths)[0].item()

    return sum(p * n for n, p in outcomes(run))


def test_two_children_with_and_without_replacement():
    """Target (1, 0), draft (.5, .5): .75 with replacement, 1 without, since the second child is the other token."""
    target, even = law_of([1, 0]), law_of([1, 1])
    assert accepted(target, [even, even], (2,)) == pytest.approx(0.75)

    class Even(specdec.Drafter):
        def begin(self, text, length):
            return torch.zeros(len(text), 1, 2).double()

    def run():
        drafter = TreeDrafter(Even(), (2,))
        tokens, probs = drafter.propose(torch.zeros(1, 1, dtype=torch.int64), torch.tensor([1]), 1, lambda logits: logits.softmax(-1), None)
        assert sorted(tokens[0].tolist()) == [0, 1]
        return verify_tree(target.expand(1, 3, -1), probs, tokens, (2,))[0].item()

    assert sum(p * n for n, p in outcomes(run)) == pytest.approx(1)


@given(st.lists(st.integers(0, 20), min_size=4, max_size=4).filter(any), st.permutations(range(4)), st.integers(1, 4))
def test_certain_children_are_accepted_with_the_targets_own_mass(weights, order, m):
    """Deterministic children: one of them is accepted with the probability that the target gives to all of them."""
    target = law_of(weights)
    laws = [torch.eye(4).double()[token] for token in order[:m]]

    def run():
        tokens = torch.tensor([order[:m]])
        n, token, path = verify_tree(target.expand(1, m + 1, -1), torch.stack(laws)[None], tokens, (m,))
        return (n.item(), tokens[0, path[0, 1] - 1].item() if n else token.item())

    law = torch.zeros(4).double()
    kept = 0.0
    for (n, token), p in outcomes(run):
        kept += n * p
        law[token] += p
    assert kept == pytest.approx(target[list(order[:m])].sum().item(), abs=1e-12)
    torch.testing.assert_close(law, target, rtol=0, atol=1e-12)


@pytest.mark.parametrize("widths", [(), (0,), (2, -1)])
def test_widths_must_be_positive(widths):
    with pytest.raises(ValueError, match="widths of a tree"):
        TreeDrafter(ModelDrafter(DRAFT), widths)


@pytest.mark.parametrize("options", [{"rule": "block"}, {"rule": "coupled"}, {"k": "auto"}])
def test_a_tree_has_its_own_rule_and_shape(options):
    with pytest.raises(ValueError, match="rule of its own"):
        rounds(TARGET, PROMPTS, 5, TreeDrafter(ModelDrafter(DRAFT), (2,)), **options)
