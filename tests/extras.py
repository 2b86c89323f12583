"""A drafter and a rule that plug in from outside, as a reader's own would.

The drafter chooses its number of guesses by itself. The rule is not exact: it is here so that the
tests, and `python tests/check.py --rule tests/extras.py:accept_typical_lossy`, have something to reject.
"""

import torch

import specdec
from specdec import HeadsDrafter


class ConfidentHeadsDrafter(HeadsDrafter):
    """Heads that stop guessing by their own confidence, as in DSpark (arXiv 2607.05147).

    times: what rounds with 0, 1, 2, .. guesses cost, in any unit. They stop where
    (1 + a_1 + a_1 a_2 + ..) / time stops growing; a_i is the expected chance of guess i, and that of
    the next guess is taken to be that of the last. Only guesses already made decide whether another
    is made: a look at the next one would bend the distribution.
    """

    def __init__(self, heads, times):
        super().__init__(heads)
        self.times = times

    def propose(self, rows, k, probs_of, generator):
        tokens, guesses, draft_probs = self.unread(rows), [], []
        survival = expected = (rows.room() > 0).double()  # rows share a pass: they decide together
        for n in range(1, k + 1):
            logits, state = self.model(tokens, self.cache)
            draft_probs.append(probs_of(logits[:, -1]))
            tokens = specdec.categorical(draft_probs[-1], generator)[:, None]
            guesses.append(tokens)
            chance = self.heads.confidence(state)[:, 0, 0].sigmoid()
            survival = survival * chance
            expected = expected + survival
            further = expected + survival * chance
            if n + 1 >= len(self.times):
                break
            if further.sum() / self.times[n + 1] <= expected.sum() / self.times[n]:
                break
        return torch.cat(guesses, 1), torch.stack(draft_probs, 1)


def accept_typical_lossy(target_probs, draft_probs, draft_tokens, generator=None):
    """NOT exact: Medusa's typical acceptance (Cai et al. 2024, arXiv 2401.10774).

    Accept what is not too unlikely: above min(.09, .3 exp(-entropy)).
    """
    entropy = torch.special.entr(target_probs[:, :-1]).sum(-1)
    target_x = target_probs[:, :-1].gather(-1, draft_tokens[..., None])[..., 0]
    likely = target_x > (0.3 * (-entropy).exp()).clamp(max=0.09)
    n_accepted = (likely & (draft_probs != 0).any(-1)).cumprod(1).sum(1)
    return n_accepted, specdec.categorical(specdec.at(target_probs, n_accepted), generator)
