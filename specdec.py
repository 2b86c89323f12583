"""Speculative decoding, from scratch: the same text as the large model alone would write, in a fraction of the time.

A large language model (the *target*) writes one token per pass, and a pass over five tokens costs little more than over one:
its time goes into fetching weights and launching operations, not into arithmetic. So a small model (the *draft*) guesses k
tokens, and the target checks all of them in one pass. A rule then keeps a prefix of the guesses and adds one token, with
coins chosen so that the output has *exactly* the law of the target's own output. Good guesses make it fast; bad ones cannot
make it wrong.

    prompt -> both models read it
    repeat:  1. a DRAFTER guesses k tokens, and says from which law it drew each
             2. the TARGET scores the newest token and all k guesses in ONE pass: k+1 laws
             3. a RULE judges: keep a prefix of the guesses, then one more token (correction or bonus)
             4. commit 1..k+1 tokens; roll both caches back to what was committed

Read on from here to the command line at the bottom: sampling, plain decoding, the rules, the drafters, the loop. On a first
reading, `verify` is rule enough and `ModelDrafter` drafter enough; the others are variations, and the loop knows none by name.

Leviathan, Kalman, Matias 2022 (arXiv 2211.17192); Chen et al. 2023 (arXiv 2302.01318). The two papers use p and q the opposite
way round, so the laws are called target_probs and draft_probs here, always.
Letters in shapes: B rows of a batch, k guesses, V = vocab_size.
"""

import argparse
import codecs
import functools
import math
import os
import signal
import statistics
import sys
from collections import Counter, deque
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

from model import CHECKPOINTS, find_device, load_heads, load_pair
from model import capture, has_graphs, now, pass_times, passes, target_state_size, target_states, time_calls

# -- sampling ----------------------------------------------------------------------------------------------------------------


def to_probs(logits, temperature=1.0, top_k=None, top_p=None):
    """Logits (..., V) -> the law that tokens are drawn from: same shape, sums to 1, float32 (float64 if the logits are).

    temperature 0 puts everything on the best token; any other works, however small. top_k keeps the k best tokens (of equals,
    any), top_p the fewest best tokens that together reach that mass (Holtzman et al. 2019, arXiv 1904.09751); in this order,
    each renormalised.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    if temperature != 1:
        # The largest logit becomes 0 first: divided by a tiny temperature, any other number would overflow.
        logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-37)  # what is smaller may be 0 in float32
    if top_k is not None and top_k < logits.shape[-1]:
        best, token = logits.topk(top_k)
        logits = torch.full_like(logits, -torch.inf).scatter_(-1, token, best)
    probs = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        best, token = probs.sort(-1, descending=True)
        # The mass *before* a token decides, so the best one always stays (also where top_p would be 0 in float32).
        best.masked_fill_(best.cumsum(-1) - best >= max(top_p, 1e-37), 0)
        probs = torch.zeros_like(probs).scatter_(-1, token, best / best.sum(-1, keepdim=True))
    return probs


# All chance comes from these two functions, and theirs from `torch.rand`. (In the tests they are replaced, and every outcome is tried.)


def bernoulli(probs, generator=None):
    """One coin per element: True with that probability. bool, same shape.

    Strictly u < prob, with u in [0, 1): what has probability 0 never happens, not even for u = 0.
    """
    return torch.rand(probs.shape, generator=generator, device=probs.device, dtype=probs.dtype) < probs


def categorical(probs, generator=None, ahead=0):
    """One token per law: (..., V) -> (...) int64.

    A race: token v arrives at time Exponential(1) / probs[v], where Exponential(1) = -log u, and the first to arrive is v with
    exactly probability probs[v]. (torch.multinomial runs the same race, more slowly.)
    ahead: which new token this is, counted from `Noise.here`. Only `Noise` asks, which then takes the generator's place.
    """
    if isinstance(generator, Noise):
        return (probs / generator.log_u(ahead).view_as(probs)).argmin(-1)
    # float64: among many rare tokens the winner's u is close to 1, where float32 has few numbers. Clamped for u = 0: p / -inf
    # is 0, and would put a token level with the impossible ones.
    log_u = torch.rand(probs.shape, generator=generator, device=probs.device, dtype=torch.float64).log_()
    return (probs / log_u.clamp_(min=-1e3)).argmin(-1)


class Noise:
    """For the coupled rule: in the place of a generator, a table with one log u for each row, position and token.

    So whoever runs the race for some position of a row, and however often, it is the same race. The table follows from the
    seed, and from the sizes: with another number of rows, or another budget, it is another one.
    """

    def __init__(self, generator, B, max_new_tokens, V):
        device = generator.device
        self.table = torch.rand(max_new_tokens, B, V, generator=generator, device=device, dtype=torch.float64).log_().clamp_(min=-1e3)
        self.row = torch.arange(B, device=device)
        self.here = torch.zeros_like(self.row)  # how many tokens each row has written: kept up to date by both ways of decoding

    def log_u(self, ahead):
        """(B, n, V) for the new tokens here + ahead, ahead (n,); for a number, n = 1."""
        position = (self.here[:, None] + ahead).clamp(max=len(self.table) - 1)  # what is drawn past the budget is never emitted
        return self.table[position, self.row[:, None]]


# -- plain decoding ----------------------------------------------------------------------------------------------------------


@dataclass
class Round:
    """What one pass of the target came to, in each of B rows. Plain decoding is the case of no guesses, k = 0.

    Of a token tree only the accepted path is in it: k is the tree's depth, and what lies behind the accepted nodes is arbitrary.
    """

    tokens: torch.Tensor  # (B, k+1) int64: accepted guesses, then the rule's own token; the rest has no meaning
    n_new: torch.Tensor  # (B,) how many of them are output: 0 in a row that has ended
    n_accepted: torch.Tensor  # (B,) how many guesses the rule accepted, before output was cut at EOS or at the budget
    target_probs: torch.Tensor  # (B, k+1, V)
    draft_probs: torch.Tensor  # (B, k, V); a row of zeros is no guess
    size: int  # tokens per row in the target's pass
    seconds: dict  # spent in passes of the drafter ("draft"), in passes of the target ("verify"), and on the "rest"

    @property
    def n_guessed(self):
        """(B,) guesses that the target was shown; none in a row that has ended."""
        return guessed(self.draft_probs).sum(1) * (self.n_new > 0)


@torch.inference_mode()
def plain_rounds(target, prompt, max_new_tokens, law, eos, generator):
    """Decode with the target alone, a token per pass: the baseline, and the law that speculation must reproduce.

    Yields a `Round` per token. A row that has ended emits no more; the batch ends with its last row. `Noise` is told `here`.
    """
    B, T = prompt.shape
    fixed = has_graphs(prompt.device)
    cache = target.new_cache(B, T + max_new_tokens, fixed)
    target(prompt[:, :-1], cache)
    newest, going = prompt[:, -1:].clone(), torch.ones_like(prompt[:, 0])

    def one_round():
        ready = now()
        logits, _ = target(newest, cache)
        passed = now()
        probs = law(logits)
        if isinstance(generator, Noise):
            generator.here = cache.length - T
        token = categorical(probs[:, 0], generator)[:, None]
        newest.copy_(token)
        return token, probs, (ready, passed)

    run = capture(one_round, generator) if fixed else lambda: (*one_round(), now())
    for _ in range(max_new_tokens):
        start = now()
        token, probs, times, end = run()
        yield Round(token, going, torch.zeros_like(going), probs, probs[:, :0], 1, spent(start, *times, end))
        if eos is not None:
            going = going * (token[:, 0] != eos)
            if not going.any():
                return


def spent(start, ready, scored, end, drafting=()):
    """The seconds of a `Round`, from its moments; drafting: pairs of them."""
    total, verify, draft = end - start, scored - ready, sum(end - start for start, end in drafting)
    return {"draft": draft, "verify": verify, "rest": total - verify - draft}


# -- the rules ---------------------------------------------------------------------------------------------------------------
# target_probs (B, k+1, V), draft_probs (B, k, V), draft_tokens (B, k) int64 -> n_accepted (B,), next_token (B,), int64.
# draft_probs[b, i] must be the law that draft_tokens[b, i] was drawn from. A row of zeros there means: no guess from here on.


def verify(target_probs, draft_probs, draft_tokens, generator=None):
    """Judge k guesses by rejection sampling: Leviathan et al. 2022, Algorithm 1. Shapes: above.

    Worked by hand, for two tokens, one guess, target law (.7, .3) and draft law (.5, .5):
        token 0 is guessed half of the time, and always kept, since .7 / .5 > 1: the output is 0 with probability .5;
        token 1 is guessed half of the time, and kept with probability .3 / .5 = .6: the output is 1 with probability .3;
        else, with probability .5 * .4 = .2, the residual max(0, target - draft) = (.2, 0), scaled to (1, 0), gives token 0.
        Together (.5 + .2, .3) = (.7, .3): the target's law. The guess is kept with probability .8 = min(.7,.5) + min(.3,.5).
    """
    # Keep x_i with probability min(1, target / draft), up to the first rejection.
    n_accepted = leading(bernoulli(ratio(target_probs[:, :-1], draft_probs, draft_tokens).clamp(max=1), generator))
    # Then the residual there. Behind the last guess nothing is subtracted: with a draft law of zeros, the bonus is no special case.
    draft_probs = F.pad(draft_probs, (0, 0, 0, 1))
    return n_accepted, categorical(residual(at(target_probs, n_accepted), at(draft_probs, n_accepted)), generator)


def guessed(draft_probs):
    """Where there is a guess: (B, k, V) -> (B, k) bool."""
    return (draft_probs != 0).any(-1)


def leading(kept):
    """How many come before the first False: (B, k) bool -> (B,)."""
    return kept.cumprod(-1).sum(-1)


def at(x, i):
    """x[b, i[b]] for every row b: (B, n, ..), (B,) -> (B, ..)."""
    return x[torch.arange(len(i), device=i.device), i]


def ratio(target_probs, draft_probs, tokens):
    """target / draft at the tokens: laws (..., V), tokens (...). 0 where there was no guess, or a broken one (NaN)."""
    target_x, draft_x = (probs.gather(-1, tokens[..., None])[..., 0] for probs in (target_probs, draft_probs))
    return torch.where(draft_x > 0, target_x / draft_x, 0)


def residual(target_probs, draft_probs):
    """norm(max(0, target - draft)), (..., V): what the target has and the draft did not offer. Nothing left, or NaN: the target's law."""
    left = (target_probs - draft_probs).clamp_(min=0)
    mass = left.sum(-1, keepdim=True)
    # No mass (NaN is not > 0 either): the laws are equal up to rounding, and any of their tokens is right.
    return torch.where(mass > 0, left / mass, target_probs)


def verify_block(target_probs, draft_probs, draft_tokens, generator=None):
    """Judge the k guesses as one block: Sun et al. 2024 (arXiv 2403.10444), Algorithm 2. Never keeps fewer than `verify` on average.

    A guess that the target likes more than the draft does (ratio > 1) makes up for an earlier one that it likes less. With
    target_i and draft_i the laws after i guesses, ratio_i that of guess i, and no draft_k (it is 0, as where a law is broken):
        w_0 = 1,  w_i = min(1, w_{i-1} ratio_i),  Z_i = sum max(0, w_i target_i - draft_i),  h_i = Z_i / (Z_i + 1 - w_i)
    A coin for each of h_1 .. h_k. Kept are the guesses up to the *last* yes, n of them; then one of norm(max(0, w_n target_n - draft_n)).
    """
    ratios = ratio(target_probs[:, :-1], draft_probs, draft_tokens).clamp(max=1e30)  # finite, for 0 times infinity is no number
    weights = [torch.ones_like(target_probs[:, 0, 0])]
    for r in ratios.unbind(1):
        weights.append((weights[-1] * r).clamp(max=1))
    weight = torch.stack(weights, 1)  # (B, k+1): w_0 .. w_k
    draft_probs = F.pad(draft_probs.nan_to_num(0), (0, 0, 0, 1))  # no guess, or a broken one: then h_i = w_i, as for i = k
    weighted = weight[..., None] * target_probs
    mass = (weighted - draft_probs).clamp_(min=0).sum(-1)  # Z_i, (B, k+1)
    h = torch.where(weight < 1, mass / (mass + 1 - weight), 1)  # of equal laws after w_i = 1: 0 / 0
    kept = F.pad(bernoulli(h[:, 1:], generator), (1, 0), value=True)
    n_accepted = (kept * torch.arange(len(weights), device=kept.device)).amax(1)
    return n_accepted, categorical(residual(at(weighted, n_accepted), at(draft_probs, n_accepted)), generator)


def verify_coupled(target_probs, draft_probs, draft_tokens, noise=None):
    """The target's own draws, kept as long as they are what was guessed: Daliri, Musco, Suresh 2024 (arXiv 2408.07978).

    Drafter and target run the same races (`Noise`), so mostly the same token wins. What is emitted is what plain decoding
    emits with this seed, token for token: the guesses decide only how much of it one pass yields.
    """
    k = draft_tokens.shape[1]
    own = categorical(target_probs, noise, torch.arange(k + 1, device=draft_tokens.device))
    n_accepted = leading((own[:, :k] == draft_tokens) & guessed(draft_probs))
    return n_accepted, at(own, n_accepted)


def accept_typical_lossy(target_probs, draft_probs, draft_tokens, generator=None):
    """NOT exact, for contrast: Medusa's typical acceptance (arXiv 2401.10774). Keep what is not too unlikely: above min(.09, .3 e^-H)."""
    entropy = torch.special.entr(target_probs[:, :-1]).sum(-1)
    target_x = target_probs[:, :-1].gather(-1, draft_tokens[..., None])[..., 0]
    n_accepted = leading((target_x > (0.3 * (-entropy).exp()).clamp(max=0.09)) & guessed(draft_probs))
    return n_accepted, categorical(at(target_probs, n_accepted), generator)


RULES = {"rejection": verify, "block": verify_block, "coupled": verify_coupled, "lossy-typical": accept_typical_lossy}


def verify_tree(target_probs, draft_probs, draft_tokens, widths, generator=None):
    """Judge a tree of guesses by recursive rejection: SpecInfer, Miao et al. 2023 (arXiv 2305.09781); without replacement, Jeon
    et al. 2024 (arXiv 2402.14160).

    Nodes in breadth-first order, 0 being the newest token: target_probs (B, N+1, V) after each, draft_probs (B, N, V) and
    draft_tokens (B, N) of nodes 1..N. widths, a tuple: children per node at each level. draft_probs must be the law that the
    node was drawn from *given its elder siblings*. -> n_accepted (B,), next_token (B,), and the path, (B, len(widths) + 1)
    int64: the accepted nodes from node 0 on; behind the last, any.
    All nodes are judged, also those that no path reaches: for a small tree that is faster than to follow the path of each row.
    """
    left = target_probs.clone()  # of the target's law after each node, once the children judged so far have been refused
    chance = torch.ones_like(left[..., 0])  # of each node, to be kept
    elder, births = siblings(widths, left.device)
    for parent, child in births:
        before, draft_law = left[:, parent], draft_probs[:, child - 1].to(left.dtype)  # node 0 is no guess
        chance[:, child] = ratio(before, draft_law, draft_tokens[:, child - 1])
        left[:, parent] = residual(before, draft_law)
    kept = bernoulli(chance.clamp(max=1), generator)
    chosen = kept & ~(kept[:, None] & elder).any(-1)  # the first that is kept of its siblings
    accepted = (chosen[:, None] | ~ancestors(widths, left.device)).all(-1)  # chosen, and so are all its ancestors
    path = accepted.int().argsort(dim=1, descending=True, stable=True)[:, : len(widths) + 1]
    n_accepted = accepted.sum(1) - 1
    return n_accepted, categorical(at(left, at(path, n_accepted)), generator), path


# -- the drafters ------------------------------------------------------------------------------------------------------------


class Drafter:
    """What the loop asks of a drafter: check, start, propose, commit; for one prompt at a time. Most know one token's law at a time,
    and share `propose`.

    Such a one has `begin(text, length)`, which reads all that it has not read of those tokens: logits (B, 1, V) after the newest;
    and `step(tokens, tree)`, which reads the tokens just guessed, (B, n): logits (B, n, V) after each.
    """

    extra = 0  # nodes of a tree, for which the caches need room
    graphs = False  # whether all rounds of k guesses are the same operations, given caches of fixed shapes
    tree = None  # of this round's guesses, (N+1, N+1), see `ancestors`; None, as before each round: they are a chain
    # Kept up to date by the loop:
    going = True  # (B,) bool, rows that have not ended
    unread = None  # where shapes are fixed: how many tokens the drafter's cache lacks, at most. The host must not look then
    spans = ()  # when passes were made in this round: pairs of moments

    def check(self, target, length):
        """ValueError, unless guesses for this target, in texts of up to `length` tokens, are possible."""

    def start(self, prompt, max_length, hidden, target_cache):
        """Read prompt (B, T) but for its newest token. hidden (B, T-1, D): the target's states there; its cache stays the same one."""

    def propose(self, text, length, k, law, generator):
        """Guess up to k >= 1 tokens after the first `length` (B,) ones of each row of text: draft_tokens (B, k), draft_probs (B, k, V).

        The first by `begin`, the others by `step`, if `go_on` allows, each of them `timed`; for `categorical` they are `ahead` by
        0, 1, ..
        """
        logits, tokens, probs = self.timed(self.begin, text, length), [], []
        while True:
            probs.append(law(logits[:, -1]))
            tokens.append(categorical(probs[-1], generator, len(probs) - 1)[:, None])
            if len(probs) == k or not self.go_on(len(probs)):
                return torch.cat(tokens, 1), torch.stack(probs, 1)
            logits = self.timed(self.step, tokens[-1])

    def go_on(self, n):
        """Whether to guess another token after n >= 1. Those n may decide it, the token in question may not: that would bend the law."""
        return True

    def timed(self, call, *args):
        """call(*args), and a note of when that was, in `spans`."""
        start = now()
        out = call(*args)
        self.spans = [*self.spans, (start, now())]
        return out

    def commit(self, length, n_new, hidden):
        """n_new (B,) tokens now follow the first `length` (B,): forget what else was guessed.

        hidden (B, n, D): the target's states at the newest of those `length` tokens, and at the guesses; its cache holds the same
        tokens, in the same order, from slot length - 1 on.
        """


def catch_up(cache, length, unread, read):
    """Let read(positions (B, n)) read what the cache lacks of the first `length` (B,) tokens. -> what it says at the last one, (B, 1, ..).

    A draft model lacks the newest token, and the last guess of the round before if all were accepted, since nobody has read
    that one yet. All rows read as many as the one that lacks most: a row that lacks fewer reads some again. A row that does not
    have so many reads its newest several times, and the cache forgets the copies. `unread`, if given, is how many, needed or not.
    """
    n = unread or (length - cache.length).max().item()
    start = (length - n).clamp(min=0)
    cache.rollback(start)
    out = read((start[:, None] + torch.arange(n, device=length.device)).minimum(length[:, None] - 1))
    cache.rollback(length)
    return at(out, length - 1 - start)[:, None]


class ModelDrafter(Drafter):
    """Guesses with a small GPT of the same vocabulary."""

    graphs = True

    def __init__(self, model):
        self.model = model

    def check(self, target, length):
        if self.model.config.vocab_size != target.config.vocab_size:
            raise ValueError(f"the draft knows {self.model.config.vocab_size} tokens, the target {target.config.vocab_size}")
        if length > self.model.config.block_size:
            raise ValueError(f"prompt and budget are {length} tokens; the draft's block_size is {self.model.config.block_size}")

    def start(self, prompt, max_length, hidden, target_cache):
        self.cache = self.model.new_cache(len(prompt), max_length, target_cache.fixed)
        self.model(prompt[:, :-1], self.cache)

    def begin(self, text, length):
        return catch_up(self.cache, length, self.unread, lambda where: self.model(text.gather(1, where), self.cache)[0])

    def step(self, tokens, tree=None):
        return self.model(tokens, self.cache, tree)[0]

    def commit(self, length, n_new, hidden):
        self.cache.rollback(torch.minimum(length + n_new - 1, self.cache.length))


class NGramDrafter(Drafter):
    """Guesses what followed the last few tokens when they stood in the text before: prompt lookup, Saxena 2023. No model at all.

    The longest match wins, of up to max_n tokens, and of these the latest; where there is none, there is no guess. Its law is
    certainty, so a guess x is accepted with probability target(x), and the residual is the target's law without x.
    """

    graphs = True

    def __init__(self, max_n=3):
        if max_n < 1:
            raise ValueError(f"max_n is {max_n}; it must be at least 1")
        self.max_n = max_n

    def check(self, target, length):
        self.vocab_size = target.config.vocab_size

    def propose(self, text, length, k, law, generator):
        """As `Drafter.propose`. Where fewer than k tokens follow the match, they go on as a loop would. A row without a match, or that
        has ended, gets draft_probs of 0; if no row has a guess, k is 0. (`unread` set: k stays.)"""
        start = now()
        behind = torch.zeros_like(length)  # where the longest, latest match so far ends
        for n in range(1, min(self.max_n, text.shape[1]) + 1):
            last = text.gather(1, (length[:, None] - n + torch.arange(n, device=text.device)).clamp(min=0))
            windows = text.unfold(1, n, 1)  # (B, L - n + 1, n)
            end = torch.arange(n, text.shape[1] + 1, device=text.device)  # of each window; it must end before the text does
            match = (windows == last[:, None]).all(-1) & (end < length[:, None])
            behind = torch.where(match.any(1), (match * end).amax(1), behind)
        found = ((behind > 0) & self.going)[:, None]
        k = k if self.unread or found.any() else 0
        step = torch.arange(k, device=text.device)[None] % (length - behind)[:, None]
        tokens = text.gather(1, behind[:, None] + step) * found
        probs = (tokens[..., None] == torch.arange(self.vocab_size, device=text.device)) & found[..., None]
        self.spans = [*self.spans, (start, now())]
        return tokens, probs.float()


class HeadsDrafter(Drafter):
    """Guesses with `DraftHeads`: a draft model of one block that sees the target's states as well.

    times: what the passes of a round with 0, 1, 2, .. guesses cost, in any unit. With them the number of guesses, one at least,
    follows the heads' own confidence, as in DSpark (arXiv 2607.05147): stop where (1 + a_1 + a_1 a_2 + ..) / time stops growing.
    The chance of a guess is known once its state is, and that costs a pass; so the next one is taken to be as likely as the last.
    """

    def __init__(self, heads, times=None):
        self.heads, self.times, self.graphs = heads, times, times is None

    def check(self, target, length):
        ours = f"{self.heads.config.vocab_size} x {len(self.heads.c_state.weight)} {self.heads.lm_head.weight.dtype}"
        theirs = f"{target.config.vocab_size} x {target_state_size(target.config)} {target.wte.weight.dtype}"
        if ours != theirs:
            raise ValueError(f"heads for a target of another shape, {ours}, not {theirs}; `python train_tiny.py --distill` trains new ones")

    def start(self, prompt, max_length, hidden, target_cache):
        self.target_cache = target_cache
        self.cache = self.heads.new_cache(len(prompt), max_length, target_cache.fixed)
        self.folded = self.heads.fold()
        self.row = torch.arange(len(prompt), device=prompt.device)[:, None]
        self.hidden = F.pad(hidden, (0, 0, 1, max_length - prompt.shape[1]))  # [:, t]: the target's last hidden state before token t
        self.read(prompt, torch.arange(prompt.shape[1] - 1, device=prompt.device).expand(len(prompt), -1))

    def read(self, text, where):
        """Read the tokens of text at `where` (B, n), each with what the target knew before it: before the first, at slot -1, nothing."""
        states = target_states(self.hidden[self.row, where], self.target_cache, where - 1).masked_fill(where[..., None] == 0, 0)
        return self.heads(self.heads.state(states), text.gather(1, where), self.cache, folded=self.folded)

    def begin(self, text, length):
        self.state = catch_up(self.cache, length, self.unread, functools.partial(self.read, text))
        return self.heads.logits(self.state)

    def step(self, tokens, tree=None):
        state = self.state.repeat_interleave(tokens.shape[1] // self.state.shape[1], 1)
        self.state = self.heads(state, tokens, self.cache, tree, self.folded)
        return self.heads.logits(self.state)

    def go_on(self, n):
        if self.times is None:
            return True
        if n == 1:
            self.survival = self.expected = torch.ones_like(self.state[:, 0, 0]) * self.going
        # Rows of a batch share a pass, so they decide together; each by what it has guessed already.
        likely = self.timed(self.heads.acceptance, self.state)[:, 0]  # a_n
        self.survival = self.survival * likely
        self.expected = self.expected + self.survival
        further = self.expected + self.survival * likely
        return n + 1 < len(self.times) and (further.sum() / self.times[n + 1] > self.expected.sum() / self.times[n]).item()

    def commit(self, length, n_new, hidden):
        # Guesses were read with the heads' own idea of the target's states. Those are known now, so what stays is read again.
        self.cache.rollback(torch.minimum(length, self.cache.length))
        where = length[:, None] + torch.arange(hidden.shape[1], device=length.device)
        self.hidden[self.row, where] = hidden


class TreeDrafter(Drafter):
    """A tree of guesses instead of a chain, by any drafter that knows a token's law: widths[i] children of every node at level i.

    Siblings are drawn without replacement. Where a law has no mass left for another child, as at temperature 0 after the
    first, the best untried token follows with certainty; top=True does that from the first child on.
    """

    def __init__(self, drafter, widths, top=False):
        self.drafter, self.shape, self.top = drafter, tuple(widths), top
        if not self.shape or min(self.shape) < 1:
            raise ValueError(f"the widths of a tree are {','.join(map(str, widths)) or 'missing'}; each must be at least 1")
        self.extra = sum(math.prod(self.shape[: i + 1]) for i in range(len(self.shape)))

    def check(self, target, length):
        if not hasattr(self.drafter, "step"):
            raise ValueError("a tree is for drafters that guess token by token: a model or heads")
        if self.extra > target.config.block_size:
            raise ValueError(f"a tree of {self.extra} guesses; the target's block_size is {target.config.block_size}")
        self.drafter.check(target, length)

    def start(self, *args):
        self.drafter.start(*args)

    def commit(self, length, n_new, hidden):
        self.drafter.commit(length, torch.ones_like(n_new), hidden)  # as if nothing had been guessed: the path is read again

    def propose(self, text, length, k, law, generator):
        self.widths = self.shape[:k]
        self.tree = ancestors(self.widths, text.device)
        logits, first, end = self.timed(self.drafter.begin, text, length), 0, 0
        tokens = text.new_zeros(len(text), len(self.tree) - 1)
        laws = logits.new_zeros(*tokens.shape, logits.shape[-1], dtype=torch.promote_types(logits.dtype, torch.float32))
        for width in self.widths:
            if end:  # first..end is the level above
                logits = self.timed(self.drafter.step, tokens[:, first:end], self.tree[first + 1 : end + 1, 1 : end + 1])
            first, end = end, end + logits.shape[1] * width
            sibling = to_probs(logits, 0) if self.top else law(logits)
            for child in range(width):
                if child:  # not the elder one again
                    elder = token[..., None]
                    sibling, logits = sibling.scatter(-1, elder, 0), logits.scatter(-1, elder, -torch.inf)
                    mass = sibling.sum(-1, keepdim=True)
                    sibling = torch.where(mass > 0, sibling / mass, to_probs(logits, 0))
                tokens[:, first + child : end : width] = token = categorical(sibling, generator)
                laws[:, first + child : end : width] = sibling
        return tokens, laws


@functools.cache
def ancestors(widths, device):
    """(N+1, N+1) bool: [i, j], whether node j of a tree is an ancestor of node i, or i itself. Breadth-first; node 0 is the root."""
    tree = torch.eye(sum(math.prod(widths[:i]) for i in range(len(widths) + 1)), dtype=torch.bool)
    first, end = 0, 1
    for width in widths:
        level = tree[first:end]
        first, end = end, end + len(level) * width
        tree[first:end] |= level.repeat_interleave(width, 0)
    return tree.to(device)


@functools.cache
def siblings(widths, device):
    """-> elder (N+1, N+1) bool: [i, j], whether node j is an elder sibling of node i; and births, [(parents (n,), children (n,))]: the
    eldest child of every node that has one, then the second, and so on."""
    tree = ancestors(widths, "cpu")
    parent = (tree.tril(-1) * torch.arange(1, len(tree) + 1)).amax(1) - 1  # the last of the ancestors before it; of the root, -1
    elder = (parent[:, None] == parent).tril(-1)
    births = [((elder.sum(1) == i) & (parent >= 0)).nonzero()[:, 0] for i in range(max(widths))]
    return elder.to(device), [(parent[child].to(device), child.to(device)) for child in births]


# -- the loop ----------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def speculative_rounds(target, drafter, prompt, max_new_tokens, k, rule, law, eos, generator):
    """Decode with any drafter and any rule. Rows of a batch go at their own pace; a row that has ended has no room left.

    After each round both caches hold prompt and output but for the newest token, and no model can see anything else. (The drafter's
    may hold less, as after a full acceptance, or a tree, or where heads read with the target's states: `catch_up` reads the rest.)
    k chooses the number of guesses before each round: `FixedK`, `AutoK`. On a GPU a round is replayed as a whole (`capture`);
    `fixed`, `graph`, `behind` and `unread` are about that, and a first reading may skip them.
    """
    B, T = prompt.shape
    text = F.pad(prompt, (0, max_new_tokens + k.most + 1))  # output is written here, with room for guesses that are not kept
    length = torch.full((B,), T, device=prompt.device)  # of the text in each row
    end = length + max_new_tokens  # where it will stop
    step, row = torch.arange(k.most + 1, device=prompt.device)[None], torch.arange(B, device=prompt.device)[:, None]
    nothing = text[:, :0], torch.zeros(B, 0, target.config.vocab_size, device=prompt.device)
    fixed = has_graphs(prompt.device) and drafter.graphs
    cache = target.new_cache(B, text.shape[1] + drafter.extra, fixed)
    _, hidden = target(prompt[:, :-1], cache)
    drafter.start(prompt, text.shape[1] + drafter.extra, hidden, cache)
    kept = vars(drafter).copy()  # a graph writes to these buffers, even if the drafter meanwhile starts elsewhere

    def one_round(n_guesses):
        room = end - length
        if isinstance(generator, Noise):
            generator.here = length - T
        drafter.going, drafter.tree, drafter.spans = room > 0, None, ()

        # 1. Guess.
        draft_tokens, draft_probs = drafter.propose(text, length, n_guesses, law, generator) if n_guesses else nothing

        # 2. Score: target_probs[:, i] is the law after guess i; at 0, after the newest token.
        tokens = torch.cat((text.gather(1, length[:, None] - 1), draft_tokens), 1)
        ready = now()
        logits, hidden = target(tokens, cache, drafter.tree)
        scored = now()
        target_probs = law(logits)

        # 3. Judge. Of a tree, go on with the path that was accepted.
        if draft_tokens.shape[1] == 0:  # every rule for chains comes to this, at several times the cost
            n_accepted, next_token = torch.zeros_like(length), categorical(target_probs[:, 0], generator)
        elif drafter.tree is None:
            n_accepted, next_token = rule(target_probs, draft_probs, draft_tokens, generator)
        else:
            n_accepted, next_token, path = verify_tree(target_probs, draft_probs, draft_tokens, drafter.widths, generator)
            cache.keep(length - 1, path)
            guess = path[:, 1:] - 1
            draft_tokens, draft_probs = draft_tokens[row, guess], draft_probs[row, guess]
            target_probs, hidden = target_probs[row, path], hidden[row, path]

        # 4. Commit up to the budget, or to the first EOS, and forget the rest.
        n, size = draft_tokens.shape[1], tokens.shape[1]
        tokens = torch.cat((draft_tokens, next_token[:, None]), 1).scatter_(1, n_accepted[:, None], next_token[:, None])
        n_new = torch.minimum(n_accepted + 1, room)
        if eos is not None:
            before_eos = leading(tokens != eos)
            end.copy_(torch.where(before_eos < n_new, length + before_eos + 1, end))
            n_new = torch.minimum(n_new, before_eos + 1)
        text.scatter_(1, length[:, None] + step[:, : n + 1], tokens)
        drafter.commit(length, n_new, hidden)
        length.add_(n_new)
        cache.rollback(length - 1)
        return tokens, n_new, n_accepted, target_probs, draft_probs, size, (ready, scored), drafter.spans

    graph = functools.cache(lambda n_guesses: capture(functools.partial(one_round, n_guesses), generator))
    behind, start = False, now()  # behind: after rounds without guesses the drafter may lack more than a graph would read
    while (most := (room := end - length).max().item()) > 0:
        n = k.choose(room)
        drafter.unread = k.most + 1 if fixed and not (n and behind) else None
        # The rule adds one token, so no row has room for more than most - 1 guesses. (A graph has one shape, and guesses in vain.)
        *out, times, drafting, done = graph(n)() if drafter.unread else (*one_round(min(n, most - 1)), now())
        behind = n == 0
        r = Round(*out, spent(start, *times, done, drafting))
        k.add(r)
        yield r
        start = now()


@dataclass
class Stats:
    """Sums over all rows and rounds. A row that has ended counts no more."""

    rounds: int = 0  # passes of the target, each counted once for every row that was still going
    drafted: int = 0  # guesses that the target was shown; of a tree, those on one path
    evaluated: int = 0  # of these, judged: the accepted ones, and the first rejected one of a round
    accepted: int = 0
    emitted: int = 0
    overlap: float = 0.0  # sum over the evaluated of sum_v min(target_probs, draft_probs)
    seconds: Counter = field(default_factory=Counter)
    sizes: Counter = field(default_factory=Counter)  # {tokens per row in a pass: number of passes}

    def add(self, r):
        n_guessed = r.n_guessed
        judged = torch.minimum(r.n_accepted + (r.n_accepted < n_guessed), r.n_new)
        overlap = torch.minimum(r.target_probs[:, : r.draft_probs.shape[1]], r.draft_probs).sum(-1)
        self.sizes[r.size] += 1
        self.rounds += (r.n_new > 0).sum().item()
        self.drafted += n_guessed.sum().item()
        self.evaluated += judged.sum().item()
        self.accepted += torch.minimum(r.n_accepted, r.n_new).sum().item()
        self.emitted += r.n_new.sum().item()
        self.overlap += overlap[torch.arange(overlap.shape[1], device=overlap.device) < judged[:, None]].sum().item()
        self.seconds.update(r.seconds)

    @property
    def acceptance_rate(self):
        """alpha: of the guesses that were judged, the fraction accepted."""
        return self.accepted / max(1, self.evaluated)

    @property
    def expected_acceptance_rate(self):
        """alpha again, from the laws instead of the coins: the mean of sum min(target_probs, draft_probs). Less noise.

        Of a chain under the rejection rule, that is: the other rules accept more or less than that.
        """
        return self.overlap / max(1, self.evaluated)

    @property
    def tokens_per_pass(self):
        """tau: what a round emits, its correction or bonus included."""
        return self.emitted / max(1, self.rounds)

    @property
    def tokens_per_second(self):
        return self.emitted / (sum(self.seconds.values()) or 1)


def expected_tokens(alpha, k):
    """tau by theory, if every guess is accepted with probability alpha: (1 - alpha^(k+1)) / (1 - alpha), Leviathan (1)."""
    return sum(alpha**i for i in range(k + 1))


def expected_speed_up(alpha, k, c):
    """Leviathan et al. 2022, Theorem 3.8. c: time of a draft pass / time of a target pass, the latter free of extra tokens."""
    return expected_tokens(alpha, k) / (k * c + 1)


def best_k(alpha, c, most=64):
    """The k with the largest expected speed-up; 0 if no guess pays."""
    return max(range(most + 1), key=lambda k: expected_speed_up(alpha, k, c))


class FixedK:
    """The same k in every round."""

    def __init__(self, k):
        self.most = k

    def choose(self, room):
        """room (B,): how many tokens each row has yet to write."""
        return self.most

    def add(self, r):
        pass


class AutoK(FixedK):
    """Before each round, the k with which the batch promises to end first, at T(k+1) + k * guess + rest a round.

    alpha, and what a guess and the rest of a round cost, come from the rounds behind; k = 0, plain decoding, is one of the
    choices, and the right one where speculation loses. What lies ahead is not looked at, so the law stays the target's. The
    past counts less and less, and what is believed drifts back to where it started: so guessing is tried again now and then,
    but, lest that be too often where it is hopeless, only if it promises 5%.
    A batch ends with its slowest row. The tokens of n rounds, tau each on average with variance v, have a standard deviation of
    sqrt(n v), and the unluckiest of B rows falls short by about sqrt(2 log B) of those; in plain decoding all end at once.
    times: the seconds of the target's pass over 1, 2, .., most+1 tokens, as from `pass_times`.
    """

    def __init__(self, times):
        super().__init__(len(times) - 1)
        self.times = times
        # What is believed before anything is known, as if five guesses, and the costs of three rounds, had been seen.
        self.accepted, self.evaluated, self.guess, self.rest = 3.0, 5.0, times[0] / 10, times[0] / 10
        self.costs = deque([(self.guess, self.rest)] * 3, maxlen=15)

    def choose(self, room):
        going = [tokens for tokens in room.tolist() if tokens]
        alpha, most, unlucky = self.accepted / self.evaluated, max(going), math.sqrt(2 * math.log(len(going)))
        seconds, square = [], 0.0
        for k in range(self.most + 1):
            # Tokens N of a round: P(N > i) = alpha^i for i <= k, so tau = E[N] = sum P(N > i), and E[N^2] = sum (2i + 1) P(N > i).
            tau, square = expected_tokens(alpha, k), square + (2 * k + 1) * alpha**k
            n_rounds = most / tau + unlucky * math.sqrt(most / tau * max(0, square - tau**2)) / tau
            seconds.append(n_rounds * (self.times[k] + k * self.guess + self.rest if k else 0.95 * self.times[0]))
        return seconds.index(min(seconds))

    def add(self, r):
        self.accepted += 0.05 * (3.0 - self.accepted)
        self.evaluated += 0.05 * (5.0 - self.evaluated)
        if r.size > 1:
            n_guessed = r.n_guessed
            accepted = torch.minimum(r.n_accepted, n_guessed)
            self.accepted += accepted.sum().item()
            self.evaluated += (accepted + (r.n_accepted < n_guessed)).sum().item()
            self.costs.append((r.seconds["draft"] / (r.size - 1), r.seconds["rest"]))
            self.guess, self.rest = map(statistics.median, zip(*self.costs))  # one slow round must not end guessing
        else:  # nor may a slow minute end it for good
            self.guess += 0.05 * (self.times[0] / 10 - self.guess)
            self.rest += 0.05 * (self.times[0] / 10 - self.rest)


@dataclass
class Result:
    tokens: list  # B lists of new token ids
    stats: Stats


def generate(target, prompt, max_new_tokens, *, drafter=None, k=4, rule="rejection", temperature=1.0, top_k=None,
             top_p=None, eos=None, seed=None):  # fmt: skip
    """Continue prompt, (T,) or (B, T) int64, by max_new_tokens tokens a row, or up to and including the first eos.

    drafter None is plain decoding; with a drafter the output has the same law, whatever the drafter and the rule, but for the
    rule that has "lossy" in its name. A drafter serves one call at a time. k: guesses per round, or "auto", which times 120
    passes first (a second here: for many prompts, give them an `AutoK` to share); for a tree its depth, whatever k is.
    temperature, top_k, top_p: see `to_probs`. seed: equal seeds give equal output, but for k="auto", which follows the clock;
    None takes a new one from the system. With rule="coupled" the output is, up to rounding, the same for every drafter, every
    k, and for None.
    ValueError: an argument is out of range, does not fit the target, or prompt and budget exceed a block_size.
    """
    result = Result([[] for _ in torch.atleast_2d(torch.as_tensor(prompt))], Stats())
    for r in rounds(target, prompt, max_new_tokens, drafter, k, rule, temperature, top_k, top_p, eos, seed):
        result.stats.add(r)
        for row, tokens, n in zip(result.tokens, r.tokens.tolist(), r.n_new.tolist()):
            row.extend(tokens[:n])
    return result


def rounds(target, prompt, max_new_tokens, drafter=None, k=4, rule="rejection", temperature=1.0, top_k=None, top_p=None,
           eos=None, seed=None):  # fmt: skip
    """The same, round by round: check all arguments at once, then return an iterator of `Round`."""
    prompt = torch.atleast_2d(torch.as_tensor(prompt, device=target.wte.weight.device))
    if prompt.numel() == 0:
        raise ValueError("the prompt is empty")
    if prompt.ndim != 2 or prompt.dtype != torch.int64:
        raise ValueError(f"the prompt must be token ids, (T,) or (B, T) int64; it is {tuple(prompt.shape)} {prompt.dtype}")
    length, c, tree = prompt.shape[1] + max_new_tokens, target.config, isinstance(drafter, TreeDrafter)
    n_guesses = k.most if isinstance(k, FixedK) else k if isinstance(k, int) else 0
    known_k = drafter is None or k == "auto" or 1 <= n_guesses < c.block_size
    for right, message in (
        (0 <= prompt.min() <= prompt.max() < c.vocab_size, f"the prompt has tokens outside 0..{c.vocab_size - 1}"),
        (max_new_tokens >= 0, f"max_new_tokens is {max_new_tokens}; it cannot be negative"),
        (length <= c.block_size, f"prompt and budget are {length} tokens; the target's block_size is {c.block_size}"),
        (0 <= temperature < float("inf"), f"temperature is {temperature}; it must be 0 (greedy) or more"),
        (top_k is None or top_k >= 1, f"top-k is {top_k}; it must be at least 1"),
        (top_p is None or 0 < top_p <= 1, f"top-p is {top_p}; it must be above 0 and at most 1"),
        (known_k, f'k is {k}; it must be at least 1 and below the block_size, {c.block_size}, or "auto"'),
        (seed is None or 0 <= seed < 2**63, f"seed is {seed}; it must be 0 or more and below 2^63"),
        (rule in RULES, f"unknown rule {rule!r}; there is: {', '.join(RULES)}"),
        (not tree or rule == "rejection" and isinstance(k, int), "a tree has a rule of its own, recursive rejection, and a fixed shape"),
    ):
        if not right:
            raise ValueError(message)
    law = functools.partial(to_probs, temperature=temperature, top_k=top_k, top_p=top_p)
    generator = torch.Generator(prompt.device)
    generator.seed() if seed is None else generator.manual_seed(seed)
    if rule == "coupled":
        generator = Noise(generator, len(prompt), max_new_tokens, c.vocab_size)
    if drafter is None:
        return plain_rounds(target, prompt, max_new_tokens, law, eos, generator)
    drafter.check(target, length)
    if k == "auto":
        k = AutoK(pass_times(target, len(prompt), length // 2, 6))
    elif isinstance(k, int):
        k = FixedK(len(drafter.shape) if tree else k)
    return speculative_rounds(target, drafter, prompt, max_new_tokens, k, RULES[rule], law, eos, generator)


# -- the command line --------------------------------------------------------------------------------------------------------

PROMPTS = (
    "import os\nimport sys\n\ndef main(argv=None):\n    if argv is None:\n        argv = sys.argv[1:]\n",
    "def binary_search(items, wanted):\n    \"\"\"Return the index of wanted in the sorted list items, or -1.\"\"\"\n",
    "class Stack:\n    \"\"\"A last-in, first-out container.\"\"\"\n\n    def __init__(self):\n",
)
REPEATING = "".join(f"    def test_{x}(self):\n        self.assertEqual(parse('{x}'), '{x}')\n\n" for x in "red green blue black".split())


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def tell(story, encoding, prompt=""):
    """Print prompt and the first row of its continuation as it comes, each token marked by its origin. Returns the Stats."""
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        marks = {"accepted guess": ("\033[32m", "\033[0m"), "correction": ("\033[31m", "\033[0m"), "bonus": ("\033[36m", "\033[0m")}
    else:
        marks = {"accepted guess": ("", ""), "correction": ("[-", "]"), "bonus": ("[+", "]")}
    legend = {"accepted guess": "", "correction": " of a rejected one", "bonus": " after all were accepted"}
    print("   ".join(before + origin + after + legend[origin] for origin, (before, after) in marks.items()) + "\n")
    print(prompt, end="")
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a token may end inside a character
    stats = Stats()
    for r in story:
        stats.add(r)
        last = "bonus" if r.n_accepted[0] == r.n_guessed[0] else "correction"  # without any guess: a bonus
        for i, token in enumerate(r.tokens[0, : r.n_new[0]].tolist()):
            before, after = marks["accepted guess" if i < r.n_accepted[0] else last]
            print(before + decoder.decode(encoding.decode_single_token_bytes(token)) + after, end="", flush=True)
    print(decoder.decode(b"", final=True))
    return stats


def contenders(draft, heads, drafter, rule, k, tree):
    """{name: (drafter or None, k, rule)}, plain decoding first: the rows of the table. None as drafter, rule or k: all of them."""
    # Heads guess more than the draft model, since more of their guesses are good; a lookup still more, since it costs next to nothing.
    judge, k, heads_k, ngram_k = rule or "rejection", *((4, 6, 10) if k is None else (k, k, k))
    shape = ",".join(map(str, tree))
    rows = {"plain decoding": (None, 1, "rejection")}
    if drafter in (None, "model"):
        rows[f"draft model, k={k}"] = (ModelDrafter(draft), k, judge)
        if rule is None:
            rows |= {f"  {other} rule": (ModelDrafter(draft), k, other) for other in ("block", "coupled")}
        if k != "auto":
            rows["  k=auto"] = (ModelDrafter(draft), "auto", judge)
    if drafter in (None, "ngram"):
        rows[f"n-gram lookup, k={ngram_k}"] = (NGramDrafter(), ngram_k, judge)
    if heads and drafter in (None, "heads"):
        rows[f"heads, k={heads_k}"] = (HeadsDrafter(heads[0]), heads_k, judge)
        if rule is None:
            rows["  block rule (heads)"] = (HeadsDrafter(heads[0]), heads_k, "block")
        rows["  blind, as Medusa's"] = (HeadsDrafter(heads[1]), heads_k, judge)
        rows["  k by confidence"] = (HeadsDrafter(heads[0], "measure"), 8, judge)
    if judge == "rejection" and drafter in (None, "tree"):
        rows[f"tree {shape}, model"] = (TreeDrafter(ModelDrafter(draft), tree), 1, judge)
        if heads:
            rows[f"tree {shape}, heads"] = (TreeDrafter(HeadsDrafter(heads[0]), tree, top=True), 1, judge)
    return rows


def compare(target, rows, prompts, max_new_tokens, seed, seconds=15, **options):
    """Decode all prompts by every row, once, and up to five times if that fits into so many seconds; meanwhile, time passes of the target.

    -> {name: Stats}, {name: [speed-up in each turn]}, {name: as `predict` says}. Of the time of a pass the median is taken, but
    over one token the mean in plain decoding, which is the first row.
    """
    B, middle = len(prompts[0]), len(prompts[0][0]) + max_new_tokens // 2
    prices = functools.cache(lambda: pass_times(target, B, middle, 8))  # asked only where k follows from them
    rows = {name: (copy(drafter), AutoK(prices()) if k == "auto" else k, rule) for name, (drafter, k, rule) in rows.items()}
    for drafter, *_ in rows.values():
        if getattr(drafter, "times", None):
            drafter.times = [t + n * prices()[0] / 10 for n, t in enumerate(prices())]  # a guess is taken for a tenth of a pass
    stats, speed_ups, seconds_of = {name: Stats() for name in rows}, {name: [] for name in rows}, {}
    one_pass = functools.cache(functools.partial(passes, target, B, middle))
    start, i, cycle = now(), 0, len(prompts)
    # Every prompt counts the same: so, whole cycles, and none that would end too late if it took as long as those before it.
    while i == 0 or i % cycle or ((now() - start) * (i + cycle) / i < seconds and i < 5 * cycle):
        # All at once, 16 tokens at a time: what the machine does meanwhile, it does to all of them.
        options |= {"seed": (seed + i) % 2**63}
        turn = {name: Stats() for name in rows}
        going = {name: rounds(target, prompts[i % cycle], max_new_tokens, *row, **options) for name, row in rows.items()}
        while going:
            name = min(going, key=lambda name: turn[name].emitted)
            goal = turn[name].emitted + 16 * B
            for r in going[name]:
                turn[name].add(r)
                stats[name].add(r)
                if turn[name].emitted >= goal:
                    break
            else:
                del going[name]
            if rows[name][0] is None or not going:  # now and then, and once all sizes are known
                sizes = set().union(*(s.sizes for s in stats.values())) - {1}
                for size, t in time_calls({size: one_pass(max(sizes))[size] for size in sizes}, 1).items():
                    seconds_of.setdefault(size, []).append(t)
        plain, *_ = speeds = [s.tokens_per_second for s in turn.values()]
        for name, speed in zip(rows, speeds):
            speed_ups[name].append(speed / plain)
        i += 1
    plain, *_ = stats.values()
    times = {size: statistics.median(t) for size, t in seconds_of.items()} | {1: plain.seconds["verify"] / plain.sizes.total()}
    return stats, speed_ups, {name: predict(s, times, B) for name, s in stats.items()}


def predict(stats, times, B):
    """tau x T(1) / (T(size of a pass) + draft + rest), all per pass: the number, and the same in words."""
    n = stats.sizes.total()
    tau = stats.emitted / n / B  # a batch goes on until its slowest row has ended
    costs = sum(times[size] * count for size, count in stats.sizes.items()) / n, stats.seconds["draft"] / n, stats.seconds["rest"] / n
    words = f"{tau:.2f} x {1000 * times[1]:.2f} ms / ({' + '.join(f'{1000 * t:.2f}' for t in costs)} ms)"
    return tau * times[1] / sum(costs), words


def print_table(target, rows, prompts, max_new_tokens, title, **options):
    stats, speed_ups, predicted = compare(target, rows, prompts, max_new_tokens, **options)
    speeds = {name: s.tokens_per_second for name, s in stats.items()}
    exact = [name for name, (_, _, rule) in rows.items() if "lossy" not in rule]
    best = max(exact, key=speeds.get)
    plain, first, *_ = rows
    print(f"{title:26} tokens/s  speed-up         predicted  alpha        tau   draft  verify   rest")
    for name, s in stats.items():
        label = name + " (NOT the target's law)" * (name not in exact)
        shares = "  ".join(f"{part / sum(s.seconds.values()):6.1%}" for part in s.seconds.values())
        columns = f"1{'':40}"
        if name != plain:
            low, high = torch.tensor(speed_ups[name]).quantile(torch.tensor([0.25, 0.75])).tolist()
            chain = rows[name][2] == "rejection" and not isinstance(rows[name][0], TreeDrafter)
            laws = f"{s.expected_acceptance_rate:.3f}" if chain else "  -  "
            columns = f"{speeds[name] / speeds[plain]:.2f} ({low:.2f}-{high:.2f}) {predicted[name][0]:9.2f}  {s.acceptance_rate:.3f} {laws}"
        print(f"{'*' if name == best else ' '} {label:24} {speeds[name]:8.0f}  {columns}  {s.tokens_per_pass:.2f}  {shares}")
    print(f"  {first}: predicted {predicted[first][1]}\n")


def same_text(target, drafter, prompt, max_new_tokens, k, encoding, seed, temperature, **options):
    """Tell whether the coupled rule yields the very text of plain decoding with the same seed; if not, how close the decision was."""
    options |= {"seed": seed, "temperature": temperature, "rule": "coupled"}
    one, other = (generate(target, prompt[:1], max_new_tokens, drafter=d, k=k, **options).tokens[0] for d in (None, drafter))
    first = next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), None)
    if first is None:
        return f"coupled rule, seed {seed}: {len(one)} tokens, identical text to plain decoding with that seed"
    a, b = one[first], other[first]
    logits = target(torch.cat((prompt[0], prompt.new_tensor(one[:first])))[None])[0][0, -1].double()
    noise = Noise(torch.Generator(prompt.device).manual_seed(seed), 1, max_new_tokens, len(logits))
    score = logits / temperature - (-noise.table[first, 0]).log() if temperature else logits  # log P + Gumbel noise
    words, margin = f"{encoding.decode([a])!r} or {encoding.decode([b])!r}", abs(score[a] - score[b]).item()
    why = f"the race was decided by {margin:.1e},\nand a pass over more tokens rounds differently"
    return f"coupled rule, seed {seed}: the texts part at token {first}, {words}: {why}"


GLOSSARY = """the rows             who guesses, how many tokens a round, and (below it) other rules: README, "Who guesses, and who judges";
                     blind: not told the token just guessed; tree: the children of a node at each level
tokens/s             after the prompt is read; of a batch, all texts together; * marks the fastest
speed-up             over plain decoding: the ratio of the two tokens/s (and the quartiles of that ratio in single turns)
predicted            tau x T(1) / (T(tokens in a pass) + draft + rest); T(n) = time of a target's pass over n tokens: T(1) as in plain
                     decoding, the others timed alone, at other moments
alpha                acceptance rate: accepted / judged guesses; and, for a chain and the rejection rule, what the laws let expect:
                     the mean of sum min(target, draft)
tau                  tokens per pass of the target; theory, if every round has k guesses: (1 - alpha^(k+1)) / (1 - alpha)
draft, verify, rest  where the time goes: guessing, passes of the target, everything else"""


def pearson(observed, expected):
    """Pearson's X2 of counts against expected counts, both (cells,).

    Rare cells would spoil the chi-square law, so all that expect fewer than 10 are pooled, without a look at their counts.
    -> X2, number of cells left, p-value, total variation between the two, and what of it chance alone would give.
    """
    order = expected.argsort()
    observed, expected = observed[order].double(), expected[order].double()
    impossible = observed[expected == 0].sum() > 0
    n_rare = max((expected < 10).sum().item(), torch.searchsorted(expected.cumsum(0), 10).item() + 1)
    observed, expected = (torch.cat((x[:n_rare].sum()[None], x[n_rare:])) for x in (observed, expected))
    n, cells = expected.sum(), len(expected)
    x2 = torch.inf if impossible else ((observed - expected) ** 2 / expected).sum().item()
    half = torch.tensor([(cells - 1) / 2, x2 / 2], dtype=torch.float64)
    p = torch.special.gammaincc(*half).item() if cells > 1 else float(not impossible)
    tv = (observed - expected).abs().sum() / 2 / n
    chance = (expected * (1 - expected / n) / (2 * torch.pi)).clamp(min=0).sqrt().sum() / n  # E|normal deviation| / 2, summed
    return x2, cells, p, tv.item(), chance.item()


@torch.no_grad()
def check(target, rows, encoding, prompt, seed, n_samples=10_000, B=500, level=1e-6, **options):
    """Sample the first two tokens after prompt (T,) many times, by the first two rows of the table, and compare with their exact law.

    Prints the comparison; returns whether both agree: p > level. At 1e-6, one run in half a million raises a false alarm.
    """
    law = functools.partial(to_probs, **options)
    first = law(target(prompt[None])[0][0, -1]).double()
    texts = torch.cat((prompt.expand(len(first), -1), torch.arange(len(first), device=prompt.device)[:, None]), 1)
    second = torch.cat([law(target(some)[0][:, -1]) for some in texts.split(B)])
    expected = n_samples * (first[:, None] * second).cpu()

    counts, agree = {}, True
    print(f"{n_samples:,} times the two tokens after {encoding.decode(prompt.tolist())!r}\n")
    print(f"{'':24}{'X2':>9}  cells  p-value     TV  TV by chance  seconds")
    for name, (drafter, k, rule) in list(rows.items())[:2]:
        counts[name], start = torch.zeros_like(expected), now()
        for batch in range(n_samples // B):
            text = [[] for _ in range(B)]
            for r in rounds(target, prompt.expand(B, -1), 5, drafter, k, rule, seed=(2 * (seed + batch) + len(counts)) % 2**63, **options):
                for row, tokens, n in zip(text, r.tokens.tolist(), r.n_new.tolist()):
                    row.extend(tokens[:n])
                if min(map(len, text)) >= 2:
                    break
            for one, two, *_ in text:
                counts[name][one, two] += 1
        x2, cells, p, tv, chance = pearson(counts[name].flatten(), expected.flatten())
        agree &= p > level
        print(f"  {name:22}{x2:9.1f} {cells:6} {p:8.2g} {tv:6.3f} {chance:13.3f} {now() - start:8.1f}")

    print("\nthe likeliest pairs: exact, and by each of the two")
    most = expected.max().item()
    for cell in expected.flatten().argsort(descending=True)[:8].tolist():
        words = repr(encoding.decode(divmod(cell, len(first))))
        for label, count in ((words, expected), *(("", count) for count in counts.values())):
            count = count.flatten()[cell].item()
            print(f"{label:>20} {count / n_samples:6.2%} {'#' * round(50 * count / most)}")
    print("\nX2 adds up the squared differences between counts and law; p-value: how often chance alone makes it larger;")
    print("TV: the total variation between the two; cells: pairs of tokens, the rare ones pooled.")
    print("both follow the target's law" if agree else "MISMATCH: at least one does not follow the target's law")
    return agree


def sweep(target, draft, rows, prompts, max_new_tokens, **options):
    """Print what a pass costs, the floor that memory sets, and the speed-up against k and against batch size, as text plots."""
    models, length = {"target": target, "draft": draft}, len(prompts[0][0]) + max_new_tokens // 2
    print("\nmilliseconds of a pass over n tokens, and in passes over one token")
    times = {name: list(time_calls(passes(model, 1, length, 16), 5).values()) for name, model in models.items()}
    for n in range(1, 17):
        print(f"  n = {n:2}   " + "   ".join(f"{name} {1000 * t[n - 1]:6.2f} ({t[n - 1] / t[0]:.2f})" for name, t in times.items()))
    size = {name: sum(p.numel() * p.element_size() for p in model.parameters()) for name, model in models.items()}
    cache = {name: 2 * model.new_cache(1).k.nbytes for name, model in models.items()}
    print("\nmemory: " + "; ".join(f"{name} {size[name] / 1e6:.1f} MB, its cache {cache[name] / 1e6:.1f} MB a row" for name in models))
    block, other = torch.zeros(2, 2**26, device=target.wte.weight.device)  # not `clone`, which spends its time on getting memory
    bandwidth = 2 * block.nbytes / time_calls({"copy": lambda: other.copy_(block)}, 7)["copy"]
    floor = 1000 * size["target"] / bandwidth
    print(f"a large copy moves {bandwidth / 1e9:.1f} GB/s; to read the target's weights at that speed takes {floor:.2f} ms: the floor")
    print(f"under T(1), which is {1000 * times['target'][0]:.2f} ms, as long as no cache of the processor holds them\n")

    name, (drafter, k, rule) = list(rows.items())[1]
    plain, tree = rows["plain decoding"], isinstance(drafter, TreeDrafter)
    if not tree:
        print(f"speed-up against k: {name.rsplit(', k=', 1)[0]}, {rule} rule (# measured, | predicted)")
        contest = {f"k = {k}": (drafter, k, rule) for k in (1, 2, 3, 4, 5, 6, 8)} | {"k=auto": (drafter, "auto", rule)}
        plot(target, {"plain": plain} | contest, prompts, max_new_tokens, **options)
    print(f"speed-up against batch size: {name}, {rule} rule (# measured, | predicted)")
    pays = []
    for B in (1, 2, 4, 8, 16, 32):
        contest = {"plain": plain, f"B = {B:2}": (drafter, k, rule)}
        contest |= {} if tree or k == "auto" else {"  k=auto": (drafter, "auto", rule)}
        speed_up = plot(target, contest, [p[:1].expand(B, -1) for p in prompts[:2]], max_new_tokens, **options)
        pays += [B] * (speed_up >= 1)
    print(f"speculation pays at batch size {', '.join(map(str, pays)) or 'none of these'}")


def plot(target, contest, prompts, max_new_tokens, **options):
    """A bar for every row of the contest but the first, which is plain decoding. Returns the first bar's speed-up."""
    stats, _, predicted = compare(target, contest, prompts, max_new_tokens, seconds=0, **options)
    plain, *speeds = [s.tokens_per_second for s in stats.values()]
    for (name, (expected, _)), speed in zip(list(predicted.items())[1:], speeds):
        end = round(20 * expected)
        bar = f"{'#' * round(20 * speed / plain):{max(1, end)}}"
        print(f"  {name:8} {speed / plain:.2f} {expected:.2f}  {bar[:end]}|{bar[end + 1:]}")
    return speeds[0] / plain


def widths(text):
    return tuple(int(width) for width in text.split(","))


def main(argv=None):
    parser = Parser(description="Speculative decoding beside plain decoding, with the pair of models in checkpoints/.")
    parser.add_argument("--prompt", help="text to continue (default: three beginnings of Python code)")
    parser.add_argument("--max-new-tokens", type=int, default=48, metavar="N", help="default: 48")
    parser.add_argument("-k", metavar="K", help='guesses per round, or "auto" (default: 4, for heads 6, for n-gram lookup 10)')
    parser.add_argument("--drafter", choices=("model", "ngram", "heads", "tree"), help="who guesses (default: each in turn)")
    parser.add_argument("--rule", choices=RULES, help="who judges (default: rejection, and for the draft model each in turn)")
    parser.add_argument("--tree", type=widths, default=(2, 1, 1, 1), metavar="W,W,..", help="children per node at each level (default: 2,1,1,1)")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (default: first 1, then 0)")
    parser.add_argument("--top-k", type=int, metavar="K", help="sample from the K best tokens only")
    parser.add_argument("--top-p", type=float, metavar="P", help="sample from the fewest best tokens that together reach P")
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="rows decoded at once (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: by a short race in plain decoding")
    parser.add_argument("--threads", type=int, metavar="N", help="of the processor (default: 1, 2, 4, .., chosen in the same race)")
    parser.add_argument("--checkpoints", metavar="DIR", default=CHECKPOINTS, type=Path, help="the folder of large.pt, tiny.pt, heads.pt")
    face = parser.add_mutually_exclusive_group()
    face.add_argument("--sweep", action="store_true", help="measure: what a pass costs, and the speed-up against k and batch size")
    face.add_argument("--check", action="store_true", help="sample many times, compare with the exact law, exit 1 if it is off")
    args = parser.parse_args(argv)
    try:
        if min(args.max_new_tokens, args.batch, 1 if args.threads is None else args.threads) < 1:
            raise ValueError("--max-new-tokens, --batch and --threads must be at least 1")
        if args.threads and args.threads > os.cpu_count():
            raise ValueError(f"--threads is {args.threads}; this machine has {os.cpu_count()} processors")
        if args.drafter == "tree" and ((args.rule or "rejection") != "rejection" or args.k is not None):
            raise ValueError("a tree has a rule of its own, recursive rejection, and a shape of its own: leave out --rule and -k")
        if args.check and args.k == "auto":
            raise ValueError("--check needs a fixed k")
        if args.check and args.dtype == "bfloat16":
            raise ValueError("--check needs float32 or float16: in bfloat16 the law depends on how many tokens share a pass")
        dtype = args.dtype or ("float32" if args.check else None)
        device, dtype = find_device(args.device), dtype and getattr(torch, dtype)
        most = torch.get_num_threads()
        powers = sorted({2**i for i in range(most.bit_length())} | {most}) if device.type == "cpu" else ()
        target, draft, encoding = load_pair(args.checkpoints, device, dtype, [args.threads] if args.threads else powers)
        wanted = args.drafter == "heads" or args.drafter != "ngram" and (args.checkpoints / "heads.pt").exists()
        heads = load_heads(args.checkpoints / "heads.pt", target) if wanted else []
        texts = (args.prompt,) if args.prompt is not None else ("for i in ",) if args.check else PROMPTS
        repeats = texts is PROMPTS and args.drafter in (None, "ngram") and not args.sweep
        temperatures = (1.0, 0.0) if args.temperature is None else (args.temperature,)
        options = {"temperature": temperatures[0], "top_k": args.top_k, "top_p": args.top_p, "seed": args.seed}
        k = int(args.k) if args.k and args.k.isdecimal() else args.k
        rows = contenders(draft, heads, args.drafter, args.rule, k, args.tree)
        try:
            prompts = [torch.tensor([encoding.encode_ordinary(t)] * args.batch, device=device) for t in texts + (REPEATING,) * repeats]
            for prompt in prompts:  # refuses what cannot be decoded
                for drafter, k, rule in rows.values():
                    k = 1 if k == "auto" else k  # without measuring anything yet
                    rounds(target, prompt, 5 if args.check else args.max_new_tokens, drafter, k, rule, **options)
        except (MemoryError, OverflowError, RuntimeError) as error:  # PyTorch's allocators raise the last
            raise ValueError(f"there is no room for a batch of {args.batch} ({type(error).__name__})") from error
        repeating = prompts.pop() if repeats else None
    except FileNotFoundError as error:
        parser.error(f"{error.filename} is missing; `python train_tiny.py` makes it")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    sys.stdout.reconfigure(errors="replace")
    who, (drafter, k, rule) = list(rows.items())[1]  # who tells the story
    if args.check:
        sys.exit(not check(target, rows, encoding, prompts[0][0], **options))

    where = f"{device}, {torch.get_num_threads()} thread(s)" if device.type == "cpu" else f"{device}"
    for name, model in zip(("large.pt, the target:", "tiny.pt, the draft:", "heads.pt, draft heads:"), (target, draft, *heads)):
        shape = f"{model.config.n_layer} x {model.config.n_embd}"
        weights, dtype = sum(w.numel() for w in model.parameters()), model.h[0].mlp.c_fc.weight.dtype
        print(f"{name:22} {weights:10,} weights in {shape}, {str(dtype)[6:]} on {where}")
    if args.sweep:
        return sweep(target, draft, rows, prompts, args.max_new_tokens, **options)
    print(f"\nThe prompt, then up to {args.max_new_tokens} new tokens, each marked by where it comes from ({who}, T={temperatures[0]:g}):")
    story = rounds(target, prompts[0][:1], args.max_new_tokens, drafter, k, rule, eos=encoding.eot_token, **options)
    stats = tell(story, encoding, texts[0])
    print(f"\n{stats.emitted} tokens in {stats.rounds} passes of the target.\n")
    if rule == "coupled" or "  coupled rule" in rows:
        print(same_text(target, drafter, prompts[0], args.max_new_tokens, k, encoding, **options) + "\n")
    print(f"Now {len(prompts)} prompts, {args.max_new_tokens} new tokens each, by everyone in turns:\n")
    for temperature in temperatures:
        # At temperature 0 the exact rules are one and the same.
        some = {name: row for name, row in rows.items() if temperature or args.rule or row[2] == "rejection"}
        title = f"temperature {temperature:g}" + " (greedy)" * (temperature == 0)
        options |= {"temperature": temperature}
        print_table(target, some, prompts, args.max_new_tokens, title, **options)
    if repeating is not None:
        some = {name: row for name, row in rows.items() if row[0] is None or isinstance(row[0], NGramDrafter)}
        print_table(target, some, [repeating] * 2, args.max_new_tokens, f"text that repeats, T={temperature:g}", seconds=3, **options)
    print(GLOSSARY)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it quietly,
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # and so does `| head`
    main()
