"""Chance replaced by all its outcomes: the exact law of anything that draws through `bernoulli` and `categorical`."""

import torch

import specdec


def outcomes(run):
    """Yield (result of run(), probability) for every way that the coins and draws inside can fall.

    run is called once per way. The first call takes the first possible outcome everywhere; each later one repeats the choices
    of the call before it up to the last one that has an untried outcome. Impossible outcomes (probability 0) are not tried.
    """
    script = []  # [[outcome taken, number of outcomes], ...], one entry per choice
    while True:
        depth, weight = 0, 1.0

        def choose(probs):
            """An index into probs, the next one that is due."""
            nonlocal depth, weight
            possible = [i for i, p in enumerate(probs) if p > 0]
            if depth == len(script):
                script.append([0, len(possible)])
            i = possible[script[depth][0]]
            depth += 1
            weight *= probs[i]
            return i

        def bernoulli(probs, generator=None):
            flat = [choose([p, 1 - p]) == 0 for p in probs.flatten().tolist()]
            return torch.tensor(flat, dtype=torch.bool).view(probs.shape)

        def categorical(probs, generator=None, ahead=0):
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
