"""Proof, part 2: what is sampled through the real loop, in large numbers, against the exact
distribution and against plain decoding.

All p-values of the suite share one budget of false alarms, FALSE_ALARM in conftest.py. What this
file would miss is stated too: `visible_tv` is the total variation that one test detects with 99%
probability.
"""

import itertools
import math
from statistics import NormalDist

import pytest
import torch

from check import pearson
from conftest import FALSE_ALARM, N_P_VALUES, make_gpt, make_heads, wrong_rule
from extras import accept_typical_lossy
from specdec import HeadsDrafter, ModelDrafter, NGramDrafter, TreeDrafter, generate, to_probs

LEVEL = FALSE_ALARM / N_P_VALUES
N, BATCH = 150_000, 7500
V, LENGTH = 3, 4  # 81 cells
TARGET, DRAFT = make_gpt(0, V, 16, 1, 1, 8, 3.0), make_gpt(1, V, 16, 1, 1, 4, 3.0)
PROMPT = torch.tensor([1, 0])


def visible_tv(cells, n):
    """The total variation seen with 99% probability, by n samples, at LEVEL.

    The noncentrality of X2 is at least 4 n TV^2.
    """
    df, z = cells - 1, NormalDist().inv_cdf(1 - LEVEL)
    # Wilson and Hilferty 1931
    critical = df * (1 - 2 / (9 * df) + z * math.sqrt(2 / (9 * df))) ** 3

    def seen(x):
        return df + x - 2.33 * math.sqrt(2 * (df + 2 * x)) > critical

    noncentrality = next(filter(seen, itertools.count(0.0, 0.5)))
    return math.sqrt(noncentrality / (4 * n))


def make_drafters():
    heads = make_heads(3, V, 8, n_state=8)
    return {
        "model": ModelDrafter(DRAFT),
        "ngram": NGramDrafter(),
        "heads": HeadsDrafter(heads),
        "tree": TreeDrafter(ModelDrafter(DRAFT), (2, 1, 2)),
        "tree of heads": TreeDrafter(HeadsDrafter(heads), (2, 2), top=True),
    }


def sample(k, seed, n=N, drafter="model", **options):
    """Counts (V ** LENGTH,) of the texts that n rows emit, and the acceptance rate.

    k = 0: plain decoding.
    """
    drafter, counts, alphas = make_drafters()[drafter] if k else None, 0, []
    prompts = PROMPT.expand(BATCH, -1)
    for i in range(n // BATCH):
        options |= {"drafter": drafter, "k": k or 1, "seed": 1000 * seed + i}
        result = generate(TARGET, prompts, LENGTH, **options)
        codes = torch.tensor(result.tokens) @ V ** torch.arange(LENGTH - 1, -1, -1)
        counts = counts + torch.bincount(codes, minlength=V**LENGTH).double()
        alphas.append(result.stats.acceptance_rate)
    return counts, sum(alphas) / len(alphas)


def exact(**options):
    """The target's joint distribution of LENGTH tokens, (V ** LENGTH,), from whole texts without a
    cache."""
    texts = torch.tensor(list(itertools.product(range(V), repeat=LENGTH)))
    whole = torch.cat((PROMPT.expand(len(texts), -1), texts), 1)
    logits = TARGET(whole[:, :-1])[0][:, len(PROMPT) - 1 :]
    return to_probs(logits, **options).gather(-1, texts[..., None]).prod(1)[:, 0]


def test_what_this_file_can_see():
    assert visible_tv(V**LENGTH, N) < 0.016


def assert_exact(counts, n, **options):
    _, cells, p, tv, chance = pearson(counts, exact(**options) * n)
    visible = visible_tv(cells, n)
    assert p > LEVEL, f"TV {tv:.4f}, by chance {chance:.4f}, visible from {visible:.4f}"


def test_samples_follow_the_exact_distribution():
    counts, alpha = sample(4, seed=4)
    assert_exact(counts, N)
    assert 0.3 < alpha < 0.8  # guesses were rejected, so the residual was drawn from


def test_plain_decoding_and_speculation_follow_it_and_agree_with_each_other():
    """Two samples of equal size: sum (a - b)^2 / (a + b) is chi-square with one degree of freedom
    less than there are cells."""
    (plain, _), (speculative, alpha) = sample(0, seed=0), sample(3, seed=3)
    assert_exact(plain, N)
    assert_exact(speculative, N)
    assert 0.3 < alpha < 0.8
    rare = exact() * N < 10  # pooled
    a, b = (torch.cat((x[~rare], x[rare].sum()[None])) for x in (plain, speculative))
    x2 = ((a - b) ** 2 / (a + b).clamp(min=1)).sum()
    assert torch.special.gammaincc(torch.tensor((len(a) - 1) / 2).double(), x2 / 2) > LEVEL


@pytest.mark.parametrize("drafter, rule, options", [
    ("model", "rejection", {"temperature": 0.7, "top_k": 2}),
    ("model", "rejection", {"top_p": 0.8}),
    ("model", "block", {}), ("model", "coupled", {}), ("ngram", "rejection", {}),
    ("ngram", "block", {}), ("ngram", "coupled", {}), ("heads", "rejection", {}),
    ("heads", "block", {}), ("heads", "coupled", {}), ("tree", "rejection", {}),
    ("tree of heads", "rejection", {}),
])  # fmt: skip
def test_samples_by_every_drafter_rule_and_filter_follow_it_too(drafter, rule, options):
    """A quarter of the samples for each: half as sharp an eye, on what test_law.py has proved."""
    counts, alpha = sample(3, 50, N // 4, drafter, rule=rule, **options)
    assert_exact(counts, N // 4, **options)
    assert 0.1 < alpha < 0.9


def test_the_lossy_rule_is_caught():
    counts, _ = sample(2, 5, N // 4, rule=accept_typical_lossy)
    _, cells, p, tv, chance = pearson(counts, exact() * (N // 4))
    assert p < 1e-9 and tv > 3 * chance


def test_a_subtly_wrong_rule_is_caught():
    counts, _ = sample(2, 5, N // 4, rule=wrong_rule)
    _, cells, p, tv, chance = pearson(counts, exact() * (N // 4))
    assert p < 1e-9 and tv > 3 * chance


# -- the statistic itself


def test_pearson_by_hand():
    x2, cells, p, tv, _ = pearson(torch.tensor([18.0, 32, 50]), torch.tensor([20.0, 30, 50]))
    assert x2 == pytest.approx(0.2 + 4 / 30) and cells == 3
    assert p == pytest.approx(math.exp(-x2 / 2))  # two degrees of freedom
    assert tv == pytest.approx(0.02)


def test_pearson_pools_rare_cells_and_condemns_impossible_ones():
    expected = torch.tensor([3.0, 4, 5, 88])
    assert pearson(torch.tensor([4.0, 3, 5, 88]), expected)[:2] == (0, 2)
    assert pearson(torch.tensor([0.0, 0, 1, 99]), torch.tensor([0.0, 3, 3, 94]))[1] == 1
    x2, _, p, *_ = pearson(torch.tensor([1.0, 99]), torch.tensor([0.0, 100]))
    assert x2 == math.inf and p == 0
    assert pearson(torch.tensor([0.0, 100]), torch.tensor([0.0, 100]))[2] == 1


def test_p_values_are_uniform_under_the_right_distribution():
    """2000 samples of it: 1% of the p-values below .01, within 5 standard errors (the seed is
    fixed)."""
    generator = torch.Generator().manual_seed(0)
    probs = exact()
    tokens = torch.multinomial(probs.expand(2000, -1), 3000, replacement=True, generator=generator)
    counts = [torch.bincount(row, minlength=len(probs)).double() for row in tokens]
    ps = [pearson(row, probs * 3000)[2] for row in counts]
    share = sum(p < 0.01 for p in ps) / 2000
    assert abs(share - 0.01) < 5 * math.sqrt(0.01 * 0.99 / 2000)
