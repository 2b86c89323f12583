"""The shipped pair against its exact distribution: the first two tokens, sampled many times.

    python tests/check.py                                 # plain decoding, and the draft model
    python tests/check.py --drafter heads --rule block
    python tests/check.py --rule tests/extras.py:accept_typical_lossy     # not exact, so it fails

--drafter and --rule take FILE.py:NAME for your own. A drafter is a class, or a function that makes
one, called with the draft model, or with nothing if it needs nothing; a rule is like `verify`.
Exit status: 0, all agree; 1, one does not; 2, bad input.
"""

import math
import signal
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it quietly

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import specdec
from model import need
from options import DRAFTERS, Progress, contenders, load, name_of, number
from options import new_parser, one_of, prompt_of
from specdec import run_script, to_probs

def pearson(observed, expected):
    """Pearson's X2 of counts against expected counts, both (cells,).

    Rare cells would spoil the chi-square distribution, so all that expect fewer than 10 are pooled,
    without a look at their counts. -> X2, number of cells left, p-value, total variation between
    the two, and what of it chance alone would give.
    """
    order = expected.argsort()
    observed, expected = observed[order].double(), expected[order].double()
    impossible = observed[expected == 0].sum() > 0
    n_ten = torch.searchsorted(expected.cumsum(0), 10).item() + 1
    n = max((expected < 10).sum().item(), n_ten)
    observed, expected = (torch.cat((x[:n].sum()[None], x[n:])) for x in (observed, expected))
    total, cells = expected.sum(), len(expected)
    x2 = math.inf if impossible else ((observed - expected) ** 2 / expected).sum().item()
    half = torch.tensor([(cells - 1) / 2, x2 / 2], dtype=torch.float64)
    p = torch.special.gammaincc(*half).item() if cells > 1 else float(not impossible)
    tv = (observed - expected).abs().sum() / 2 / total
    variance = (expected * (1 - expected / total)).clamp(min=0)
    chance = (variance / (2 * math.pi)).sqrt().sum() / total  # E|normal deviation| / 2, summed
    return x2, cells, p, tv.item(), chance.item()

def batch_size(prompt):
    """How many copies of the prompt fit into little memory."""
    return max(1, min(500, 16_000 // len(prompt)))

@torch.no_grad()
def exact_pairs(target, prompt, filters):
    """The distribution of the two tokens after prompt (T,), from whole texts: (V, V) float64."""
    first = to_probs(target(prompt[None])[0][0, -1], **filters).double()
    tokens = torch.arange(len(first), device=prompt.device)[:, None]
    texts = torch.cat((prompt.expand(len(first), -1), tokens), 1)
    batches = texts.split(batch_size(prompt))
    second = torch.cat([to_probs(target(some)[0][:, -1], **filters) for some in batches])
    return (first[:, None] * second).cpu()

def sampled_pairs(target, prompt, n, seed, decoder, filters, say):
    """How often which two tokens followed the prompt, in n samples: (V, V)."""
    (drafter, k, rule), V, B = decoder, target.config.vocab_size, batch_size(prompt)
    counts = torch.zeros(V, V, dtype=torch.float64)
    for done in range(0, n, B):
        texts, seed = [[] for _ in range(min(B, n - done))], (seed + 1) % 2**63
        prompts = prompt.expand(len(texts), -1)
        # With a budget of k+1 tokens the first round has all its k guesses.
        for r in specdec.rounds(target, prompts, k + 1, drafter, k, rule, seed=seed, **filters):
            for text, tokens, n_new in zip(texts, r.tokens.tolist(), r.n_new.tolist()):
                text.extend(tokens[:n_new])
            if min(map(len, texts)) >= 2:
                break
        for one, two, *_ in texts:
            counts[one, two] += 1
        say(done + len(texts))
    return counts

def check(target, decoders, encoding, prompt, seed=0, n=10_000, level=1e-6, **filters):
    """Sample by every decoder, {name: (drafter, k, rule)}; print how that compares with the exact
    distribution. -> whether all agree, p > level: one run in half a million is a false alarm.
    """
    start, total, progress, wrong = time.time(), n * len(decoders), Progress(), []
    columns = {"exact": n * exact_pairs(target, prompt, filters)}
    print(f"{n:,} times the two tokens after {encoding.decode(prompt.tolist())[-50:]!r}\n")
    print(f"  {'':40}{'X2':>10}  cells   p-value     TV  TV by chance")
    for i, (name, decoder) in enumerate(decoders.items()):
        def say(done):
            left = (time.time() - start) * (total / (i * n + done) - 1)
            progress(name, 0, f"{done:,} of {n:,} samples", left)

        columns[name] = sampled_pairs(target, prompt, n, seed, decoder, filters, say)
        x2, cells, p, tv, chance = pearson(columns[name].flatten(), columns["exact"].flatten())
        progress.clear()
        print(f"  {name[:40]:40}{x2:10.1f} {cells:6} {p:9.2g} {tv:6.3f} {chance:13.3f}")
        wrong += [name] * (not p > level)
    print("\nThe likeliest pairs, first as they should be:\n")
    V, most = len(columns["exact"]), columns["exact"].max().item()
    for pair in columns["exact"].flatten().argsort(descending=True)[:6].tolist():
        word = repr(encoding.decode(divmod(pair, V)))[:30]
        for counts in columns.values():
            count = counts.flatten()[pair].item()
            print(f"  {word:>30} {count / n:6.2%} {'#' * min(59, round(40 * count / most))}")
            word = ""
    print("\nX2: squared differences from the expected counts, summed; p-value: how often chance")
    print("makes it larger; TV: total variation; cells: pairs of tokens, the rare ones pooled.\n")
    for name in wrong:
        print(f"MISMATCH: {name} does not follow the target's distribution")
    if not wrong:
        print(f"{' and '.join(decoders)}: both follow the target's distribution")
    return not wrong

def main(argv=None):
    """-> exit status."""
    parser = new_parser("Sample two tokens many times; compare with their distribution.")
    who, many = one_of(DRAFTERS), number(int, 1000, 2**40, "a number from 1000 on")
    parser.add_argument("--drafter", type=who, default="model", help="default: model")
    parser.add_argument("-n", type=many, default=10_000, metavar="N", help="default: 10000 samples")
    parser.set_defaults(dtype="float32")
    args = parser.parse_args(argv)
    args.drafter = [args.drafter]
    why = "in bfloat16 probabilities depend on how many tokens share a pass: leave out --dtype"
    need(args.dtype != "bfloat16", why)
    need(args.k != "auto", "-k auto follows the clock: take a number")
    text = prompt_of(args)
    target, draft, heads, encoding = load(args, args.drafter)
    name, drafter, k, rule, _ = contenders(args, draft, heads)[1]
    ids = encoding.encode_ordinary("for i in " if text is None else text)
    prompt = torch.tensor(ids, dtype=torch.int64, device=target.wte.weight.device)
    filters = {"top_k": args.top_k, "top_p": args.top_p}
    filters["temperature"] = 1.0 if args.temperature is None else args.temperature
    specdec.rounds(target, prompt, k + 1, drafter, k, rule, **filters)  # or ValueError
    decoders = {"plain decoding": (None, k, "rejection")}
    decoders[f"{name}, {name_of(rule)}"] = drafter, k, rule
    return int(not check(target, decoders, encoding, prompt, args.seed, args.n, **filters))

if __name__ == "__main__":
    run_script(main)
