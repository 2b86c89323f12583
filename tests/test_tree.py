"""Token trees: the mask, the cache, the rule.

(tests/test_law.py has their distribution inside the loop.)
"""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import specdec
from conftest import fresh_logits, heads_logits, make_gpt, make_heads
from enumerator import outcomes
from kvcache import TreeView
from specdec import (
    HeadsDrafter, ModelDrafter, Rows, TreeDrafter, ancestors, generate, levels, rounds, to_probs,
    verify_tree,
)  # fmt: skip
from test_kvcache import poison

TARGET, DRAFT = make_gpt(1), make_gpt(2, n_layer=1, n_embd=4)
PROMPTS = torch.tensor([[3, 1, 4], [0, 2, 6], [5, 5, 5]])
two_lengths = st.lists(st.integers(1, 6), min_size=2, max_size=2)
shapes = st.lists(st.integers(1, 3), min_size=1, max_size=4).map(tuple)


def test_ancestors_by_hand():
    """Widths 2,2: the root 0; its children 1, 2; theirs 3, 4 and 5, 6."""
    paths = [[0], [0, 1], [0, 2], [0, 1, 3], [0, 1, 4], [0, 2, 5], [0, 2, 6]]
    assert [row.nonzero()[:, 0].tolist() for row in ancestors((2, 2), "cpu")] == paths


def test_ancestors_are_on_the_device_of_the_guesses(ours):
    """The device "meta" has shapes and no numbers."""
    assert ancestors((2, 2), torch.device("meta")).device.type == "meta"


def test_levels_by_hand():
    """Widths 2,3: from node 0 on, nodes 1 and 2; from node 1 on, nodes 3 to 8."""
    assert list(levels((2, 3))) == [(0, 1, 3, 2), (1, 3, 9, 3)]


def test_a_tree_that_is_kept_for_the_next_call_is_an_ordinary_tensor():
    ancestors.cache_clear()
    with torch.inference_mode():
        tree = ancestors((2, 3), "cpu")
    assert ancestors((2, 3), "cpu") is tree and not tree.is_inference()


three_lengths = st.lists(st.integers(0, 6), min_size=3, max_size=3)


@given(shapes, three_lengths, st.randoms(use_true_random=False))
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
    logits, _ = TARGET(nodes, TreeView(cache, tree))
    for b in range(3):
        for node in {0, N - 1, random.randrange(N), random.randrange(N)}:
            chain = torch.tensor(texts[b] + nodes[b, tree[node]].tolist())
            expected = fresh_logits(TARGET, chain)[-1]
            torch.testing.assert_close(logits[b, node], expected, rtol=0, atol=1e-12)


@given(shapes, two_lengths, st.randoms(use_true_random=False))
def test_after_compaction_the_cache_is_that_of_a_fresh_forward(widths, lengths, random):
    """mutants.py I4: the accepted nodes lie among the rejected ones, and each row has its own."""
    tree = ancestors(widths, "cpu")
    cache = TARGET.new_cache(2, 160)
    texts = [[random.randrange(7) for _ in range(6)] for _ in range(2)]
    TARGET(torch.tensor(texts), cache)
    texts = [text[:n] for text, n in zip(texts, lengths)]
    cache.rollback(torch.tensor(lengths))
    nodes = torch.tensor([[random.randrange(7) for _ in range(len(tree))] for _ in range(2)])
    view = TreeView(cache, tree)
    TARGET(nodes, view)
    first_leaf = len(tree) - torch.tensor(widths).prod().item()
    leaves = [random.randrange(first_leaf, len(tree)) for _ in range(2)]
    path = torch.stack([tree[leaf].nonzero()[:, 0] for leaf in leaves])
    view.keep(path)
    assert cache.length.tolist() == [n + path.shape[1] for n in lengths]
    n = [random.randrange(1, path.shape[1] + 1) for _ in range(2)]  # rows accept different depths
    cache.rollback(torch.tensor(lengths) + torch.tensor(n))
    poison(cache)
    new = torch.randint(7, (2, 3))
    logits, _ = TARGET(new, cache)
    for b in range(2):
        text = torch.cat((torch.tensor(texts[b]), nodes[b, path[b, : n[b]]], new[b]))
        expected = fresh_logits(TARGET, text)[-3:]
        torch.testing.assert_close(logits[b], expected, rtol=0, atol=1e-12)


@given(shapes, two_lengths, st.randoms(use_true_random=False))
def test_a_tree_read_level_by_level_is_the_tree_read_at_once(widths, lengths, random):
    """As a drafter reads it: each time the new nodes are the last of those in the cache."""
    tree = ancestors(widths, "cpu")
    nodes = torch.tensor([[random.randrange(7) for _ in range(len(tree))] for _ in range(2)])
    text = torch.randint(7, (2, 6))
    whole, parts = TARGET.new_cache(2, 160), TARGET.new_cache(2, 160)
    for cache in (whole, parts):
        TARGET(text, cache)
        cache.rollback(torch.tensor(lengths))
    poison(parts)
    expected, _ = TARGET(nodes, TreeView(whole, tree))
    logits = [TARGET(nodes[:, :1], parts)[0]]
    for _, first, end, _ in levels(widths):
        view = TreeView(parts, tree[first:end, 1:end])  # the root counts as text
        logits.append(TARGET(nodes[:, first:end], view)[0])
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=0, atol=1e-12)


def drafters():
    return {
        "model": ModelDrafter(DRAFT),
        "target": ModelDrafter(TARGET),
        "heads": HeadsDrafter(make_heads(0, 7, 16)),
    }


@pytest.mark.parametrize("drafter", drafters())
@pytest.mark.parametrize("widths", [(1, 1, 1), (3, 2, 1), (2, 2, 2), (7,), (9, 1)])
@pytest.mark.parametrize("top", [False, True])
def test_greedy_text_is_the_targets(drafter, widths, top):
    """For every budget around the depth, and beyond it; more children than tokens are no harm."""
    drafter = TreeDrafter(drafters()[drafter], widths, top)
    for n in (*range(6), 30):
        expected = generate(TARGET, PROMPTS, n, temperature=0).tokens
        assert generate(TARGET, PROMPTS, n, drafter=drafter, temperature=0).tokens == expected


@pytest.mark.parametrize("widths", [(1, 1, 1), (2, 2), (3, 1, 2)])
@pytest.mark.parametrize("temperature", [0, 1])
def test_a_draft_that_is_the_target_is_always_right(widths, temperature):
    drafter = TreeDrafter(ModelDrafter(TARGET), widths)
    s = generate(TARGET, PROMPTS, 36, drafter=drafter, temperature=temperature, seed=1).stats
    assert s.accepted == s.evaluated == s.drafted and s.rounds == 3 * 36 // (len(widths) + 1)


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("ragged", [False, True])
def test_after_every_round_both_caches_are_those_of_a_fresh_forward(
    monkeypatch, temperature, ragged
):
    """The draft keeps what it has read of the accepted path: all but the last level of the tree."""
    made, new_cache = [], type(TARGET).new_cache

    def remember(*args):
        made.append(new_cache(TARGET, *args))
        return made[-1]

    monkeypatch.setattr(TARGET, "new_cache", remember)
    drafter = TreeDrafter(ModelDrafter(DRAFT), (3, 2, 2), top=temperature == 0)
    texts, depths, kept = PROMPTS.tolist(), set(), set()
    if ragged:
        texts[1:] = [[0], [5, 5, 5, 1, 2]]
    prompts = [list(text) for text in texts]
    for r in rounds(TARGET, prompts, 30, drafter, temperature=temperature, seed=2):
        depths.update(r.n_accepted.tolist())
        depth = r.guesses.shape[1]
        for b, (tokens, n) in enumerate(zip(r.tokens.tolist(), r.n_new.tolist())):
            read = len(texts[b]) + depth - 1
            texts[b] += tokens[:n]
            assert made[0].length[b] == len(texts[b]) - 1
            assert drafter.drafter.cache.length[b] == min(len(texts[b]) - 1, read)
            kept.add(len(texts[b]) - drafter.drafter.cache.length[b].item())
            for model, cache in ((TARGET, made[0]), (DRAFT, drafter.drafter.cache)):
                S = cache.length[b].item()
                fresh = new_cache(model, 1)
                model(torch.tensor([texts[b][:S]]), fresh)
                ours, theirs = cache.kv[:, :, b, :, :S], fresh.kv[:, :, 0, :, :S]
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
        poison(made[0]), poison(drafter.drafter.cache)
    assert {0, 1, 2} <= depths
    assert kept == {1, 2}  # what the draft lacks: the newest token, or one guess more


@pytest.mark.parametrize("drafter", ["model", "heads"])
def test_every_node_continues_its_own_parent(drafter):
    """The distribution of each first child is the drafter's after the path to its parent.

    No test of the output sees it.
    """
    inner, texts = drafters()[drafter], [[1, 2, 3, 4, 5, 6], [6, 0, 1]]
    tree, rows = TreeDrafter(inner, (2, 3, 2)), Rows([torch.tensor(text) for text in texts], 30, 21)
    cache = TARGET.new_cache(*rows.tokens.shape)
    tree.start(TARGET, cache, rows, specdec.read_prompts(TARGET, cache, rows))
    generator = torch.Generator().manual_seed(0)
    tokens, probs = tree.propose(rows, (2, 3, 2), lambda logits: logits.softmax(-1), generator)
    assert tokens.shape == (2, 20) and probs.shape == (2, 20, 7)
    sees = ancestors((2, 3, 2), "cpu")
    for b, text in enumerate(texts):
        for node in (1, 3, 6, 9, 11, 13, 15, 17, 19):  # the first children of nodes 0 to 8
            parents = sees[node].nonzero()[:-1, 0].tolist()
            path = [tokens[b, i - 1].item() for i in parents if i]
            if drafter == "model":
                expected = fresh_logits(DRAFT, torch.tensor(text + path))[-1]
            else:
                expected = heads_logits(inner.heads, TARGET, text, path)[-1]
            expected = expected.softmax(-1)
            torch.testing.assert_close(probs[b, node - 1], expected, rtol=0, atol=1e-12)


def distribution(weights):
    weights = torch.tensor(weights).double()
    return weights / weights.sum()


def accepted(target, draft_probs, widths):
    """The chance that some child of the root is accepted; draft_probs: of each child, in order."""

    def run():
        tokens = torch.stack([specdec.categorical(probs[None])[0] for probs in draft_probs])[None]
        target_probs = target.expand(1, 3, -1)
        return verify_tree(target_probs, torch.stack(draft_probs)[None], tokens, widths)[0].item()

    return sum(p * n for n, p in outcomes(run))


class Even:
    """For TreeDrafter: a model to which both tokens are always alike."""

    cache = None

    def unread(self, rows):
        return rows.newest()

    def model(self, tokens, cache):
        return torch.zeros(*tokens.shape, 2).double(), None


def test_two_children_with_and_without_replacement():
    """Target (1, 0), draft (.5, .5): .75 with replacement, 1 without.

    Then the second child is the other token.
    """
    target, even = distribution([1, 0]), distribution([1, 1])
    assert accepted(target, [even, even], (2,)) == pytest.approx(0.75)
    rows, drafter = Rows([torch.tensor([0])], 1, spare=3), TreeDrafter(Even(), (2,))

    def run():
        tokens, probs = drafter.propose(rows, (2,), lambda logits: logits.softmax(-1), None)
        assert sorted(tokens[0].tolist()) == [0, 1]
        return verify_tree(target.expand(1, 3, -1), probs, tokens, (2,))[0].item()

    assert sum(p * n for n, p in outcomes(run)) == pytest.approx(1)


class Always:
    """For TreeDrafter: a model to which token 1 is the best and token 0 the worst of three."""

    cache = SimpleNamespace(write=None)

    def unread(self, rows):
        return rows.newest()

    def model(self, tokens, cache):
        return torch.tensor([0.2, 0.5, 0.3]).double().log().expand(*tokens.shape, 3), None


@pytest.mark.parametrize("temperature, top", [(0, False), (0, True), (1, True)])
def test_certain_children_are_the_best_tokens_that_are_untried(temperature, top):
    """At temperature 0, and with top=True at any: of every node on every level."""
    rows, drafter = Rows([torch.tensor([0])], 2, spare=10), TreeDrafter(Always(), (3, 2), top)
    tokens, probs = drafter.propose(rows, (3, 2), lambda x: to_probs(x, temperature), None)
    assert tokens.tolist() == [[1, 2, 0, *(1, 2), *(1, 2), *(1, 2)]]
    assert torch.equal(probs, torch.eye(3).double()[tokens])


def test_a_child_is_certain_once_no_mass_is_left():
    """Of three children two are drawn from the best two tokens; then there is but one."""
    rows, drafter, orders = Rows([torch.tensor([0])], 1, spare=4), TreeDrafter(Always(), (3,)), {}

    def run():
        tokens, probs = drafter.propose(rows, (3,), lambda x: to_probs(x, top_k=2), None)
        torch.testing.assert_close(probs[0, 0], torch.tensor([0, 5 / 8, 3 / 8]).double())
        assert torch.equal(probs[0, 1:], torch.eye(3).double()[tokens[0, 1:]])
        return tuple(tokens[0].tolist())

    for order, p in outcomes(run):
        orders[order] = p
    assert orders == pytest.approx({(1, 2, 0): 5 / 8, (2, 1, 0): 3 / 8})


four_weights = st.lists(st.integers(0, 20), min_size=4, max_size=4).filter(any)


@given(four_weights, st.permutations(range(4)), st.integers(1, 4))
def test_certain_children_are_accepted_with_the_targets_own_mass(weights, order, m):
    """Deterministic children.

    One of them is accepted with the probability that the target gives to all of them.
    """
    target = distribution(weights)
    draft_probs = torch.eye(4).double()[order[:m]][None]

    def run():
        tokens = torch.tensor([order[:m]])
        target_probs = target.expand(1, m + 1, -1)
        n, token, path = verify_tree(target_probs, draft_probs, tokens, (m,))
        return (n.item(), tokens[0, path[0, 1] - 1].item() if n else token.item())

    probs = torch.zeros(4).double()
    n_accepted = 0.0
    for (n, token), p in outcomes(run):
        n_accepted += n * p
        probs[token] += p
    assert n_accepted == pytest.approx(target[list(order[:m])].sum().item(), abs=1e-12)
    torch.testing.assert_close(probs, target, rtol=0, atol=1e-12)


@pytest.mark.parametrize("widths", [(), (0,), (2, -1)])
def test_widths_must_be_positive(widths):
    with pytest.raises(ValueError, match="widths of a tree"):
        TreeDrafter(ModelDrafter(DRAFT), widths)


@pytest.mark.parametrize(
    "options",
    [{"rule": "block"}, {"rule": "coupled"}, {"k": "auto"}, {"rule": lambda *args: None}],
)
def test_a_tree_has_its_own_rule_and_shape(options):
    with pytest.raises(ValueError, match="rule of its own"):
        rounds(TARGET, PROMPTS, 5, TreeDrafter(ModelDrafter(DRAFT), (2,)), **options)


def test_a_tree_is_as_deep_as_there_is_room_for_and_all_accepted_nodes_are_reported():
    """Also those behind an end token, which are no longer output."""
    for eos, is_cut in ((None, False), (2, True)):
        room, n_cut = torch.full((3,), 22), 0  # five rounds, and one with a shallower tree
        options = {"drafter": TreeDrafter(ModelDrafter(TARGET), (2, 2, 1)), "eos": eos, "seed": 0}
        for r in rounds(TARGET, PROMPTS, 22, **options):
            active, depth = r.n_new > 0, r.guesses.shape[1]
            assert eos or depth == min(3, room.max())
            assert (r.n_accepted == depth)[active].all()
            n_cut += (active & (r.n_new <= depth)).sum() if depth == 3 else 0
            room -= r.n_new
        assert (n_cut > 0) == is_cut


def test_a_round_reports_the_distributions_of_the_path_that_was_accepted():
    """After each accepted node the target's own; of each, what it was drawn from: the draft's own,
    perhaps without an elder sibling."""
    texts, depths = PROMPTS.tolist(), set()
    for r in rounds(TARGET, PROMPTS, 30, TreeDrafter(ModelDrafter(DRAFT), (2, 2)), seed=3):
        for b, n in enumerate(r.n_accepted.tolist()):
            if r.n_new[b] == 0:
                continue
            depths.add(n)
            text = torch.tensor(texts[b] + r.tokens[b, :n].tolist())
            target, draft = (fresh_logits(m, text)[len(texts[b]) - 1 :].softmax(-1) for m in (TARGET, DRAFT))
            torch.testing.assert_close(r.target_probs[b, : n + 1], target, rtol=0, atol=1e-10)
            for i in range(n):
                ours = r.draft_probs[b, i]
                drawn = torch.where(ours > 0, draft[i], 0)
                assert (ours > 0).sum() >= 6 and ours[r.guesses[b, i]] > 0
                torch.testing.assert_close(ours, drawn / drawn.sum(), rtol=0, atol=1e-10)
            texts[b] += r.tokens[b, : r.n_new[b]].tolist()
    assert {0, 1, 2} <= depths
