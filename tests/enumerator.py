"""Chance replaced by all its outcomes: the exact law of anything that draws through `bernoulli` and `categorical`.

The coupled rule asks the same noise more than once. For two tokens that noise is one number, r = the ratio of the two
exponentials, and what each draw tells about it is an interval: the odds of the next draw follow exactly.
"""

import torch

import specdec


def outcomes(run):
    """Yield (result of run(), probability) for every way that the coins and draws inside can fall.

    run is called once per way. The first call takes the first possible outcome everywhere; each later one repeats the choices
    of the call before it up to the last one that has an untried outcome. Impossible outcomes (probability 0) are not tried.
    """
    script = []  # [[outcome taken, number of outcomes], ...], one entry per choice
    while True:
        depth, weight, intervals = 0, 1.0, {}

        def choose(probs):
            """An index into probs, the next one that is due."""
            nonlocal depth, weight
            possible = [i for i, p in enumerate(probs) if p > 0]
            assert possible, f"no law, but {probs}: a draw has no possible outcome"
            if depth == len(script):
                script.append([0, len(possible)])
            i = possible[script[depth][0]]
            depth += 1
            weight *= probs[i]
            return i

        def bernoulli(probs, generator=None):
            flat = [choose([p, 1 - p]) == 0 for p in probs.flatten().tolist()]
            return torch.tensor(flat, dtype=torch.bool).view(probs.shape)

        def race(law, row, position):
            """The winner of one race between two tokens: token 1 arrives first if r < law[1] / law[0]. P(r < x) = x / (1 + x)."""
            low, high = intervals.get((row, position), (0.0, 1.0))  # in terms of P(r < x), uniform on (0, 1)
            cut = min(max(law[1] / (law[0] + law[1]), low), high)
            one = choose([(high - cut) / (high - low), (cut - low) / (high - low)]) == 1
            intervals[row, position] = (low, cut) if one else (cut, high)
            return int(one)

        def categorical(probs, generator=None, ahead=0):
            if isinstance(generator, specdec.Noise):
                steps = [ahead] if isinstance(ahead, int) else ahead.tolist()
                laws, here = probs.reshape(len(probs), len(steps), 2).tolist(), generator.here.tolist()
                flat = [[race(law, b, here[b] + i) for i, law in zip(steps, laws[b])] for b in range(len(laws))]
                return torch.tensor(flat, dtype=torch.int64).view(probs.shape[:-1])
            flat = [choose(law) for law in probs.reshape(-1, probs.shape[-1]).tolist()]
            return torch.tensor(flat, dtype=torch.int64).view(probs.shape[:-1])

        originals = specdec.bernoulli, specdec.categorical
        specdec.bernoulli, specdec.categorical = bernoulli, categorical
        try:
            result = run()
        finally:
            specdec.bernoulli, specdec.categorical = originals
        yield result, weight

        while script and script[-1][0] + 1 == script[-1][1]:
            script.pop()
        if not script:
            return
        script[-1][0] += 1
