"""Speculative decoding, from scratch: the text that a large model alone would write, but sooner.

A large language model, the *target*, writes one token per pass, and a pass over five tokens takes
little longer. So a small model, the *draft*, guesses k tokens, and the target checks them in one
pass. A rule accepts the first n and adds one token, in such a way that the output has *exactly* the
target's own distribution. A round:

    1. the DRAFTER guesses k tokens, and tells the distribution that each was drawn from
    2. the TARGET scores the newest token and all k guesses in ONE pass: k+1 distributions
    3. a RULE judges: it accepts n guesses, then adds one token (a correction, or a bonus)
    4. COMMIT these n+1 tokens; both caches forget the rejected guesses

Leviathan, Kalman, Matias 2022 (arXiv 2211.17192); Chen et al. 2023 (arXiv 2302.01318). Letters in
shapes: B rows of a batch, T tokens, k guesses, V = vocab_size, D = n_embd. Parts 2 to 4 can wait.
"""

import functools

import torch
import torch.nn.functional as F

# ---- Part 1: speculative decoding ----------------------------------------------------------------
# (`need`, which refuses bad input, is in model.py. Names that are not here yet: Parts 2 and 3.)

def to_probs(logits, temperature=1.0, top_k=None, top_p=None):
    """Logits (..., V) -> the distribution to draw from: same shape, sums to 1, float32 or better.
    In this order: divide by temperature (0: only the best token); keep the top_k best tokens; of
    these, rescaled, keep the fewest best that reach the mass top_p (Holtzman et al. 2019); rescale.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    if temperature != 1:  # the best logit becomes 0 first, so that no number overflows
        logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-37)
    if top_k is not None and top_k < logits.shape[-1]:
        best, token = logits.topk(top_k)
        logits = torch.full_like(logits, -torch.inf).scatter_(-1, token, best)
    probs = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        best, token = probs.sort(-1, descending=True)
        mass_before = F.pad(best.cumsum(-1), (1, -1))  # nothing before the best: it always stays
        best = best.masked_fill(mass_before >= max(top_p, 1e-37), 0)
        probs = torch.zeros_like(probs).scatter_(-1, token, best / best.sum(-1, keepdim=True))
    return probs

def bernoulli(probs, generator=None):
    """One coin per element, True with that probability: bool. Probability 0 never comes true."""
    u = torch.rand(probs.shape, generator=generator, device=probs.device, dtype=torch.float64)
    return u < probs

def categorical(probs, generator=None):
    """One token per distribution: (..., V) -> (...) int64.

    A race: token v arrives at time -log(u) / probs[v], which is exponential with rate probs[v]. So
    the first to arrive is v with probability probs[v].
    """
    u = torch.rand(probs.shape, generator=generator, device=probs.device, dtype=torch.float64)
    log_u = u.log_().clamp_(min=-1e3)  # u = 0 must not take for ever, as probability 0 does
    return (-log_u / probs).argmin(-1)

class Rows:
    """B texts that grow at their own pace, each up to its budget or to its first end token.

    tokens (B, L) int64: the texts, then room; length (B,): theirs; end (B,): where they will stop.
    """

    def __init__(self, prompts, max_new_tokens, spare, eos=None):
        lengths = [len(prompt) for prompt in prompts]
        L = max(lengths) + max_new_tokens + spare  # spare: for guesses that are not accepted
        self.tokens = torch.stack([F.pad(prompt, (0, L - len(prompt))) for prompt in prompts])
        self.length = torch.tensor(lengths, device=self.tokens.device)
        self.end, self.eos = self.length + max_new_tokens, eos

    def room(self):
        return self.end - self.length

    def newest(self, n=1):
        """The last n tokens of each row, (B, n). Before a shorter row: its first, repeated."""
        where = self.length[:, None] + torch.arange(-n, 0, device=self.length.device)
        return self.tokens.gather(1, where.clamp(min=0))

    def append(self, tokens, n):
        """Add n (B,) of tokens (B, m), as far as room and end tokens allow. -> how many, (B,)."""
        n_new = torch.minimum(n, self.room())
        if self.eos is not None:
            before_eos = torch.isin(tokens, self.eos).logical_not().cumprod(1).sum(1)
            n_new = torch.minimum(n_new, before_eos + 1)  # the end token is added, too
            self.end[:] = torch.where(before_eos < n_new, self.length + n_new, self.end)
        where = self.length[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        self.tokens.scatter_(1, where, tokens)  # all m, but what lies beyond length is no text
        self.length += n_new
        return n_new

def read_prompts(model, cache, rows):
    """Read each prompt but for its newest token. -> hidden states (B, T, D)."""
    _, hidden = model(rows.tokens[:, : rows.length.max() - 1], cache)
    cache.rollback(rows.length - 1)  # shorter prompts: forget the padding that was read as well
    return hidden

@torch.inference_mode()
def plain_rounds(target, rows, probs_of, generator):
    """The target alone, one token per pass: the baseline, and the distribution to reproduce."""
    cache = target.new_cache(*rows.tokens.shape)
    read_prompts(target, cache, rows)
    while rows.room().any():
        logits, _ = target(rows.newest(), cache)
        probs = probs_of(logits)  # (B, 1, V)
        token = categorical(probs, generator)  # (B, 1)
        n_new = rows.append(token, torch.ones_like(rows.length))
        yield Round(token[:, :0], probs[:, :0], probs, 0 * n_new, token, n_new)  # no guesses

def verify(target_probs, draft_probs, draft_tokens, generator=None):
    """Judge k guesses by rejection sampling: Leviathan et al. 2022, Algorithm 1.

    (B, k+1, V), (B, k, V), (B, k) -> n_accepted (B,), next_token (B,). Worked by hand, for one
    guess, two tokens, target (.7, .3), draft (.5, .5):
        0 is guessed with .5, and accepted, as .7 / .5 > 1: the output is 0 with .5
        1 is guessed with .5, and accepted with .3 / .5 = .6: the output is 1 with .5 * .6 = .3
        else, with .2: max(0, target - draft) = (.2, 0), rescaled to (1, 0): the output is 0
    Together (.5 + .2, .3) = (.7, .3): the target's distribution.
    """
    # Accept each guess with probability min(1, target / draft), up to the first rejection.
    x = draft_tokens[..., None]
    target_x, draft_x = target_probs[:, :-1].gather(-1, x), draft_probs.gather(-1, x)
    ratio = torch.where(draft_x > 0, target_x / draft_x, 0)[..., 0]  # (B, k); 0: no guess
    n_accepted = bernoulli(ratio.clamp(max=1), generator).cumprod(1).sum(1)
    # Then one token of the residual, max(0, target - draft). After the last guess no draft is
    # there to subtract: with zeros in its place, the bonus token is no special case.
    row = torch.arange(len(x), device=x.device)
    target_n = target_probs[row, n_accepted]
    residual = (target_n - F.pad(draft_probs, (0, 0, 0, 1))[row, n_accepted]).clamp(min=0)
    mass = residual.sum(-1, keepdim=True)  # none, if the two are equal up to rounding
    return n_accepted, categorical(torch.where(mass > 0, residual / mass, target_n), generator)

class ModelDrafter:
    """Guesses with a small GPT. Any object with `start`, `propose` and `commit` is a drafter."""

    def __init__(self, model):
        self.model = model

    def start(self, target, cache, rows, hidden):
        """Read the prompts. (The target has: some drafters look at its cache and hidden states.)"""
        self.cache, self.rows = self.model.new_cache(*rows.tokens.shape), rows
        read_prompts(self.model, self.cache, rows)

    def propose(self, rows, k, probs_of, generator):
        """Up to k guesses (B, k), and the very distributions they were drawn from, (B, k, V)."""
        tokens, guesses, draft_probs = self.unread(rows), [], []
        for _ in range(k):
            logits, _ = self.model(tokens, self.cache)
            draft_probs.append(probs_of(logits[:, -1]))
            tokens = categorical(draft_probs[-1], generator)[:, None]
            guesses.append(tokens)
        return torch.cat(guesses, 1), torch.stack(draft_probs, 1)

    def unread(self, rows):
        """What the cache lacks: the newest token, and the last guess, if all k were accepted."""
        need(rows is self.rows, "this drafter is in use by another generation")
        n = (rows.length - self.cache.length).max().item()
        self.cache.rollback((rows.length - n).clamp(min=0))  # some read some again
        return rows.newest(n)

    def commit(self, rows, hidden):
        """Forget the guesses that are not in rows now. (The last one was never read.)"""
        self.cache.rollback(torch.minimum(rows.length - 1, self.cache.length))

def speculative_round(target, cache, drafter, rows, k, rule, probs_of, generator):
    # 1. Guess k tokens.
    guesses, draft_probs = drafter.propose(rows, k, probs_of, generator)

    # 2. Score the newest token and all guesses in one pass: k+1 distributions.
    logits, hidden = target(torch.cat((rows.newest(), guesses), 1), cache)
    target_probs = probs_of(logits)

    # 3. Judge: accept n guesses, then add one token.
    n_accepted, token = rule(target_probs, draft_probs, guesses, generator)

    # 4. Commit n guesses and the token; both caches forget the rest.
    tokens = F.pad(guesses, (0, 1)).scatter(1, n_accepted[:, None], token[:, None])
    n_new = rows.append(tokens, n_accepted + 1)
    cache.rollback(rows.length - 1)
    drafter.commit(rows, hidden)
    return Round(guesses, draft_probs, target_probs, n_accepted, tokens, n_new)

@torch.inference_mode()
def speculative_rounds(target, drafter, rows, k, rule, probs_of, generator):
    """Rounds until every row has ended. A row waits for no other: each accepts what it accepts.
    Between rounds the target's cache holds all of a row but its newest token, and nothing else."""
    cache = target.new_cache(*rows.tokens.shape)
    drafter.start(target, cache, rows, read_prompts(target, cache, rows))
    one_round = getattr(drafter, "own_round", speculative_round)  # in Part 3
    while rows.room().any():
        n = min(k, rows.room().max().item())  # no more guesses than there is room for
        yield one_round(target, cache, drafter, rows, n, rule, probs_of, generator)

def generate(target, prompt, max_new_tokens, *, drafter=None, k=4, rule="rejection",
             temperature=1.0, top_k=None, top_p=None, eos=None, seed=None):  # fmt: skip
    """Continue a prompt by max_new_tokens tokens, or up to its first eos (a token, or several).

    prompt: (T,) or (B, T) int64, or a list of B lists of tokens. drafter None: plain decoding; with
    one, the same distribution. rule: a function like `verify`, or a name in RULES. Equal seeds give
    equal output if k is a number. -> Result: B lists of new tokens; stats. ValueError: bad input.
    """
    return collect(rounds(**locals()), len(as_rows(prompt)))

def rounds(target, prompt, max_new_tokens, drafter=None, k=4, rule="rejection",
           temperature=1.0, top_k=None, top_p=None, eos=None, seed=None):  # fmt: skip
    """`generate`, round by round: an iterator of `Round`, once all arguments are checked."""
    prompts, drafter, k, rule, eos, seed = check_arguments(**locals())
    rows = Rows(prompts, max_new_tokens, k + 1, eos)
    probs_of = functools.partial(to_probs, temperature=temperature, top_k=top_k, top_p=top_p)
    generator = torch.Generator(rows.tokens.device).manual_seed(seed)
    if drafter is None:
        return plain_rounds(target, rows, probs_of, generator)
    if hasattr(drafter, "own_rounds"):  # in Part 3
        return drafter.own_rounds(target, rows, k, rule, probs_of, generator)
    return speculative_rounds(target, drafter, rows, k, rule, probs_of, generator)

# You now know speculative decoding. The rest measures it, varies it, and shows it.

# ---- Part 2: how good is it? ---------------------------------------------------------------------

import math
import statistics
import time
from copy import copy
from dataclasses import dataclass
from numbers import Integral  # int, and those of NumPy
from typing import NamedTuple
from kvcache import FixedKVCache, TreeView
from model import as_prompts, as_rows, as_tokens, capture, check_memory, has_graphs, need, now
from model import target_state_size, target_states

class Round(NamedTuple):
    """What came of one pass of the target, in each of B rows. In plain decoding k is 0."""
    guesses: torch.Tensor  # (B, k) int64; of a tree, those on the accepted path
    draft_probs: torch.Tensor  # (B, k, V), what each was drawn from; all 0 where there is no guess
    target_probs: torch.Tensor  # (B, k+1, V), after the newest token, then after each guess
    n_accepted: torch.Tensor  # (B,), before output was cut at an end token or at the budget
    tokens: torch.Tensor  # (B, k+1): accepted guesses, the rule's own token; the rest means nothing
    n_new: torch.Tensor  # (B,), how many of these were output; 0 in a row that had ended
    @property
    def n_guessed(self):  # (B,) guesses that the target was shown; none in a row that had ended
        return (self.draft_probs != 0).any(-1).sum(1) * (self.n_new > 0)

@dataclass
class Stats:
    """Sums over all rows and rounds. A row that has ended counts no more."""
    rounds: int = 0  # passes of the target, each counted once for every row that was active
    drafted: int = 0  # guesses that the target was shown; of a tree, those on one path
    evaluated: int = 0  # of these, judged: the accepted ones, and the first rejected one of a round
    accepted: int = 0
    emitted: int = 0
    overlap: float = 0.0  # sum over the evaluated of sum min(target_probs, draft_probs)
    def add(self, r):
        judged = torch.minimum(r.n_accepted + (r.n_accepted < r.n_guessed), r.n_new)
        overlap = torch.minimum(r.target_probs[:, :-1], r.draft_probs).sum(-1)  # (B, k)
        is_judged = torch.arange(overlap.shape[1], device=judged.device) < judged[:, None]
        self.rounds += (r.n_new > 0).sum().item()
        self.drafted += r.n_guessed.sum().item()
        self.evaluated += judged.sum().item()
        self.accepted += torch.minimum(r.n_accepted, r.n_new).sum().item()
        self.emitted += r.n_new.sum().item()
        self.overlap += overlap.where(is_judged, 0).sum().item()
    acceptance_rate = property(lambda self: self.accepted / max(1, self.evaluated))  # alpha
    expected_acceptance_rate = property(lambda self: self.overlap / max(1, self.evaluated))
    tokens_per_pass = property(lambda self: self.emitted / max(1, self.rounds))  # tau

class Result(NamedTuple):
    tokens: list  # B lists of new token ids
    stats: Stats

def collect(rounds, B):
    result = Result([[] for _ in range(B)], Stats())
    for r in rounds:
        result.stats.add(r)
        for row, tokens, n in zip(result.tokens, r.tokens.tolist(), r.n_new.tolist()):
            row.extend(tokens[:n])
    return result

def expected_tokens(alpha, k):
    """tau, if each guess is accepted with alpha: 1 + alpha + .. + alpha^k. Leviathan et al. (1)."""
    return sum(alpha**i for i in range(k + 1))

# ---- Part 3: variations --------------------------------------------------------------------------

def ratio(target_probs, draft_probs, tokens):
    """target / draft at the tokens: (.., V), (.., V), (..) -> (..). 0 where draft is 0 or NaN."""
    x = tokens[..., None]
    target_x, draft_x = target_probs.gather(-1, x)[..., 0], draft_probs.gather(-1, x)[..., 0]
    return torch.where(draft_x > 0, target_x / draft_x, 0)

def residual(target_probs, draft_probs):
    """max(0, target - draft), rescaled, (.., V). If nothing is left, or NaN: target_probs."""
    left = (target_probs - draft_probs.clamp(min=0)).clamp(min=0)
    mass = left.sum(-1, keepdim=True)
    return torch.where(mass > 0, left / mass, target_probs)

def at(x, i):
    """x[b, i[b]] of every row b, or x[b, i[b, j]]: (B, n, ..), (B,) or (B, m) -> (B, [m,] ..)."""
    row = torch.arange(len(i), device=i.device)
    return x[row if i.ndim == 1 else row[:, None], i]

def verify_block(target_probs, draft_probs, draft_tokens, generator=None):
    """Judge the guesses as one block: Sun et al. 2024 (arXiv 2403.10444), Algorithm 2.

    A guess that the target likes more than the draft does makes up for an earlier one, so that on
    average no fewer are accepted. With target_i, draft_i after i guesses, draft_k 0:
        w_0 = 1,  w_i = min(1, w_{i-1} target / draft of guess i)
        Z_i = sum max(0, w_i target_i - draft_i),  h_i = Z_i / (Z_i + 1 - w_i), or 1 if w_i = 1
    A coin for each of h_1..h_k: the last yes, n, is the number of guesses accepted. Then comes one
    token of max(0, w_n target_n - draft_n), rescaled."""
    weights = [torch.ones_like(target_probs[:, 0, 0])]
    for r in ratio(target_probs[:, :-1], draft_probs, draft_tokens).unbind(1):
        weights.append((weights[-1] * r).clamp(max=1))  # 0 * inf is NaN, which no coin is below
    weight = torch.stack(weights, 1)  # (B, k+1): w_0 .. w_k
    weighted = weight[..., None] * target_probs
    draft_probs = F.pad(draft_probs.nan_to_num(0).clamp(min=0), (0, 0, 0, 1))
    mass = (weighted - draft_probs).clamp(min=0).sum(-1)  # Z_i, (B, k+1)
    h = torch.where(weight >= 1, 1, mass / (mass + 1 - weight))
    yes = F.pad(bernoulli(h[:, 1:], generator), (1, 0), value=True)
    n_accepted = (yes * torch.arange(len(weights), device=yes.device)).amax(1)
    probs = residual(at(weighted, n_accepted), at(draft_probs, n_accepted))
    return n_accepted, categorical(probs, generator)

RULES = {"rejection": verify, "block": verify_block, "coupled": verify}  # coupled: see `Coupled`

class NoDrafter:
    """Guesses nothing: a round is a step of plain decoding."""
    def start(self, target, cache, rows, hidden): self.vocab_size = target.config.vocab_size
    def propose(self, rows, k, probs_of, generator):
        probs = torch.zeros(len(rows.length), 0, self.vocab_size, device=rows.tokens.device)
        return rows.tokens[:, :0], probs
    def commit(self, rows, hidden): pass

class Coupled:
    """The coupled rule: Daliri, Musco, Suresh 2024 (arXiv 2408.07978). drafter: any, or None.
    Target and drafter draw with the same random numbers, one for each row, position and token. So
    mostly the same token wins both races (see `categorical`), and the text is the very text of
    plain decoding, whoever guesses. An instance takes the place of `to_probs`: it draws a token at
    once, and says that it is certain. For what is left, greedy decoding, `verify` is right."""
    def __init__(self, drafter): self.drafter = drafter or NoDrafter()
    def own_rounds(self, target, rows, k, rule, probs_of, generator):
        self.probs_of, self.rows, self.start, self.ahead = probs_of, rows, rows.length.clone(), 0
        shape = rows.room().max() + 1, len(rows.length), target.config.vocab_size
        u = torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64)
        self.log_u = u.log_().clamp_(min=-1e3)
        if hasattr(self.drafter, "own_rounds"):
            return self.drafter.own_rounds(target, rows, k, rule, self, generator)
        return speculative_rounds(target, self.drafter, rows, k, rule, self, generator)
    def __call__(self, logits):
        """A guess's logits are (B, V), one position further each time; the target's (B, n, V)."""
        first, self.ahead = (self.ahead, self.ahead + 1) if logits.ndim == 2 else (0, 0)
        probs = self.probs_of(logits[:, None] if logits.ndim == 2 else logits)
        ahead = torch.arange(first, first + probs.shape[1], device=probs.device)
        token = self.draw(probs, (self.rows.length - self.start)[:, None] + ahead)
        return torch.zeros_like(probs).scatter_(-1, token[..., None], 1.0).view(logits.shape)
    def draw(self, probs, position):
        """(B, n, V), (B, n) -> (B, n). What is drawn behind the budget is never output."""
        log_u = at(self.log_u.transpose(0, 1), position.clamp(max=len(self.log_u) - 1))
        return (-log_u / probs).argmin(-1)

class NGramDrafter(NoDrafter):
    """Guesses what followed the last few tokens where they stood in the text before: prompt lookup,
    Saxena 2023. Of matches of up to max_n tokens the longest wins, and of these the latest."""
    def __init__(self, max_n=3):
        need(max_n >= 1, f"max_n is {max_n}; it must be at least 1")
        self.max_n = max_n
    def propose(self, rows, k, probs_of, generator):
        text, length = rows.tokens, rows.length
        found = torch.zeros_like(length)  # where the longest, latest match ends; 0: nowhere
        for n in range(1, min(self.max_n, text.shape[1]) + 1):
            windows = text.unfold(1, n, 1)  # (B, L - n + 1, n)
            end = torch.arange(n, text.shape[1] + 1, device=text.device)  # of each window
            match = (windows == rows.newest(n)[:, None]).all(-1) & (end < length[:, None])
            found = torch.where(match.any(1), (match * end).amax(1), found)
        guess = ((found > 0) & (rows.room() > 0))[:, None]  # (B, 1)
        k = k if getattr(self, "always", False) or guess.any() else 0  # always: in one shape
        # Where fewer than k tokens follow the match, they are repeated.
        step = torch.arange(k, device=text.device) % (length - found)[:, None]
        tokens = text.gather(1, found[:, None] + step) * guess
        probs = tokens[..., None] == torch.arange(self.vocab_size, device=text.device)
        return tokens, (probs & guess[..., None]).float()

class HeadsDrafter(ModelDrafter):
    """Guesses with `DraftHeads` (model.py): one block, which sees what the target knew before."""
    def __init__(self, heads): self.heads = heads
    def start(self, target, cache, rows, hidden):
        self.cache, self.rows = self.heads.new_cache(*rows.tokens.shape), rows
        self.target_cache, self.length = cache, rows.length.clone()  # length: at the last commit
        self.hidden = F.pad(hidden, (0, 0, 1, rows.tokens.shape[1] - 1 - hidden.shape[1]))
    def unread(self, rows, n=None):
        """Up to k+1 tokens, or the prompt. Rows too short for so many repeat their newest."""
        need(rows is self.rows, "this drafter is in use by another generation")
        n = n or (rows.length - self.cache.length).max().item()
        start = (rows.length - n).clamp(min=0)
        self.cache.rollback(start)
        where = start[:, None] + torch.arange(n, device=start.device)
        where = where.minimum(rows.length[:, None] - 1)
        # What the target knew before each of them; before the first token, nothing.
        states = target_states(at(self.hidden, where), self.target_cache, where - 1)
        self.state = self.heads.c_state(states.masked_fill(where[..., None] == 0, 0))
        self.newest = rows.length - 1 - start
        return rows.tokens.gather(1, where)
    def model(self, tokens, cache):
        """Read tokens (B, n), given the states before them. -> logits (B, n, V), states behind."""
        n_children = tokens.shape[1] // self.state.shape[1]  # of each node of a tree; else 1
        state = self.heads(self.state.repeat_interleave(n_children, 1), tokens, cache)
        if self.newest is not None:  # the first pass of a round: forget the repetitions
            cache.rollback(cache.length - tokens.shape[1] + self.newest + 1)
            state, self.newest = at(state, self.newest)[:, None], None
        self.state = state
        return self.heads.lm_head(state), state
    def commit(self, rows, hidden):
        """Guesses were read with the heads' own states: forget them; `unread` gives them again."""
        self.cache.rollback(torch.minimum(self.length, self.cache.length))
        where = self.length[:, None] + torch.arange(hidden.shape[1], device=hidden.device)
        self.hidden.scatter_(1, where[..., None].expand_as(hidden), hidden)
        self.length.copy_(rows.length)

class AutoK:
    """Any drafter, asked for more guesses (+2) after a round in which all were accepted, for fewer
    (-1) after others, as in Hugging Face's transformers, and for none where guessing loses time:
    rounds with guesses are paid from a credit, in units of a plain round's time. It starts at 3,
    gains .01 in a plain round, and in one with guesses its tokens, less its time; 6 is the most.
    It sees the past only, by a clock: the distribution stays, but equal seeds may differ."""
    def __init__(self, drafter):
        self.drafter, self.none, self.k, self.credit = drafter, NoDrafter(), 4, 3.0
        self.plain, self.asked = [], []  # seconds of plain rounds; guesses of rounds not learnt yet
    def start(self, *args):
        self.none.start(*args)
        self.drafter.start(*args)
    def commit(self, rows, hidden):
        need(getattr(self.drafter, "rows", rows) is rows, "drafter in use by another generation")
        self.drafter.commit(rows, hidden)
    def propose(self, rows, k, probs_of, generator):
        n = self.choose(k, rows.room().max().item()) if k > 0 else 0
        return (self.drafter if n > 0 else self.none).propose(rows, n, probs_of, generator)
    def choose(self, k, room, n_ahead=0):
        """How many guesses, up to k, if the slowest row has this room, and n_ahead rounds run."""
        moment = time.perf_counter()
        if len(self.asked) > n_ahead:
            self.learn(self.asked.pop(0), moment - self.moment, self.room - room)
        self.moment, self.room, self.k = moment, room, max(1, min(self.k, k))
        self.asked.append(self.k if len(self.plain) >= 3 and self.credit > 0 else 0)
        return self.asked[-1]
    def learn(self, n, seconds, tokens):
        if n == 0:
            self.plain.append(seconds)
            self.credit += 0.01
        else:
            self.k += 2 if tokens > n else -1
            gain = tokens - seconds / max(1e-9, statistics.median(self.plain[-9:]))
            self.credit = min(6.0, self.credit + max(-2.0, gain))  # one slow round is no verdict

def levels(widths):
    """Level by level: where the one above begins, its nodes first..end, width. The root is 0."""
    first, end = 0, 1
    for width in widths:
        above, first, end = first, end, end + (end - first) * width
        yield above, first, end, width

@functools.cache
@torch.inference_mode(False)
def ancestors(widths, device):
    """(N+1, N+1) bool: [i, j], whether node j of a tree is an ancestor of node i, or i itself."""
    tree = torch.eye(1 + sum(end - first for _, first, end, _ in levels(widths)), dtype=torch.bool)
    for above, first, end, width in levels(widths):
        tree[first:end] |= tree[above:first].repeat_interleave(width, 0)
    return tree.to(device)

class TreeDrafter:
    """A tree of guesses by a model or heads: widths[i] children of every node at level i.
    Siblings are drawn without replacement. Where no token is left to draw, as at temperature 0
    after one, the best untried token is taken as certain; with top=True always."""
    def __init__(self, drafter, widths, top=False):
        names = [str(width) for width in widths]
        right = names and all(name.isdecimal() and int(name) >= 1 for name in names)
        need(right, f"the widths of a tree are {','.join(names)}; they must be numbers from 1 on")
        self.drafter, self.widths, self.top = drafter, tuple(map(int, names)), top
        self.n_nodes = [*levels(self.widths)][-1][2] - 1  # but for the root
    def start(self, *args): self.drafter.start(*args)
    def own_round(self, target, cache, _, rows, k, rule, probs_of, generator):
        widths = self.widths[:k]  # k levels at most: near the end of the text, a shallower tree
        guesses, draft_probs = self.propose(rows, widths, probs_of, generator)
        # The root is the newest token; all nodes are scored in one pass.
        tree = ancestors(widths, guesses.device)
        view = TreeView(cache, tree)
        logits, hidden = target(torch.cat((rows.newest(), guesses), 1), view)
        target_probs = probs_of(logits)
        n_accepted, token, path = verify_tree(target_probs, draft_probs, guesses, widths, generator)
        # Of the tree both caches keep the accepted path, as if it had been a chain.
        view.keep(path)
        guesses, draft_probs = at(guesses, path[:, 1:] - 1), at(draft_probs, path[:, 1:] - 1)
        tokens = F.pad(guesses, (0, 1)).scatter(1, n_accepted[:, None], token[:, None])
        n_new = rows.append(tokens, n_accepted + 1)
        cache.rollback(rows.length - 1)
        self.commit(rows, at(hidden, path), tree, path)
        return Round(guesses, draft_probs, at(target_probs, path), n_accepted, tokens, n_new)
    def propose(self, rows, widths, probs_of, generator):  # -> (B, N), (B, N, V): all but the root
        inner, tree = self.drafter, ancestors(widths, rows.tokens.device)
        tokens, draft_probs = [inner.unread(rows)], []
        for above, first, end, width in levels(widths):
            view = TreeView(inner.cache, tree[above:first, 1:first]) if above > 0 else inner.cache
            logits = inner.model(tokens[-1], view)[0][:, above - first :]
            probs = to_probs(logits, 0) if self.top else probs_of(logits)
            level = []
            for _ in range(width):
                level.append((categorical(probs, generator), probs))
                x = level[-1][0][..., None]  # not to be drawn again
                probs, logits = probs.scatter(-1, x, 0), logits.scatter(-1, x, -torch.inf)
                mass = probs.sum(-1, keepdim=True)
                probs = torch.where(mass > 0, probs / mass, to_probs(logits, 0))
            for out, x in zip((tokens, draft_probs), zip(*level)):
                out.append(torch.stack(x, 2).flatten(1, 2))
        return torch.cat(tokens[1:], 1), torch.cat(draft_probs, 1)
    def commit(self, rows, hidden, tree, path):
        """Keep what the drafter has read of the path: not the last level."""
        n = len(tree) - math.prod(self.widths[: path.shape[1] - 1])
        TreeView(self.drafter.cache, tree[1:n, 1:n]).keep(path[:, 1:-1] - 1)
        self.drafter.commit(rows, hidden)

def verify_tree(target_probs, draft_probs, draft_tokens, widths, generator=None):
    """Recursive rejection: Miao et al. 2023 (arXiv 2305.09781); Jeon et al. 2024 (2402.14160).

    target_probs (B, N+1, V) after each node; draft_probs (B, N, V) and draft_tokens (B, N) of all
    but the root. At a node, R being its target_probs: accept a child with min(1, R / draft), else
    R = max(0, R - draft), rescaled, for the next child. If none is accepted, one token of R.
    -> n_accepted (B,), next_token (B,), path (B, depth + 1): root, accepted nodes, then any."""
    left = target_probs.clone()  # R of each node
    accepted = [torch.ones_like(draft_tokens[:, :1], dtype=torch.bool)]  # level by level
    for above, first, end, width in levels(widths):
        chances = []
        for i in range(width):
            child = slice(first - 1 + i, end - 1, width)  # the i-th of every node above
            R, draft = left[:, above:first], draft_probs[:, child].to(left.dtype)
            chances.append(ratio(R, draft, draft_tokens[:, child]).clamp(max=1))
            left[:, above:first] = residual(R, draft)
        yes = bernoulli(torch.stack(chances, 2), generator)  # (B, nodes above, width)
        chosen = yes & (yes.cumsum(2) == 1)  # the first of its siblings
        accepted.append((accepted[-1][..., None] & chosen).flatten(1))
    accepted = torch.cat(accepted, 1)  # (B, N+1)
    path = accepted.int().argsort(dim=1, descending=True, stable=True)[:, : len(widths) + 1]
    n_accepted = accepted.sum(1) - 1
    return n_accepted, categorical(at(left, at(path, n_accepted)), generator), path

class Replayed:
    """A drafter, None for plain decoding, whose rounds a GPU replays as CUDA graphs.
    To launch a small model's hundreds of operations takes longer than to do them. So a round of k
    guesses is recorded, in caches whose shapes never change, and replayed with a single launch: the
    next one before the host sees whether the last has ended the text. So at the end one is replayed
    in vain; as no row has room, it adds nothing. AutoK has two graphs: of 4 guesses, of none."""
    def __init__(self, drafter): self.drafter = drafter or NoDrafter()
    @torch.inference_mode()
    def own_rounds(self, target, rows, k, rule, probs_of, generator):
        drafter = inner = copy(self.drafter)  # graphs write to its memory: it is for this one alone
        if hasattr(drafter, "drafter"):
            inner = drafter.drafter = copy(drafter.drafter)
        auto, way = isinstance(drafter, AutoK), getattr(drafter, "own_round", speculative_round)
        cache, ks = FixedKVCache(target.new_cache(*rows.tokens.shape)), (4, 0) if auto else (k,)
        drafter.start(target, cache, rows, read_prompts(target, cache, rows))
        inner.always, read_all, read = True, getattr(inner, "unread", None), None
        if read_all:  # from now on a fixed number: a model 2, heads those of a path and its root
            inner.cache = FixedKVCache(inner.cache)
            read = functools.partial(read_all, n=1 + len(getattr(drafter, "widths", range(ks[0]))))
        if type(inner) is ModelDrafter:
            read = lambda rows: inner.cache.rollback(rows.length - 2) or rows.newest(2)
        own = lambda p, *_: (torch.zeros_like(rows.length), categorical(p[:, 0], generator))
        def one_round(n):  # without a guess, every rule comes to a token of the target's own
            who, judge = (inner if auto and n > 0 else drafter), (rule if n > 0 else own)
            return *way(target, cache, who, rows, n, judge, probs_of, generator), rows.room()
        def launch(last):
            n = 4 * (drafter.choose(4, left, 1) > 0) if auto else k
            if last == 0 < n and read_all:  # plain rounds went unread: more than a graph reads
                inner.model(read_all(rows), inner.cache)
            graphs[n][0]()
            return n
        try:
            for n in (ks[0], *ks):  # one round to read the prompt; then each kind, to warm up
                if rows.room().any():
                    yield Round(*one_round(n)[:-1])
                inner.unread = read
            left = rows.room().max().item()
            if left > 0:
                graphs = {n: capture(functools.partial(one_round, n), generator) for n in ks}
                n = launch(n)
            while left > 0:
                *r, room = graphs[n][1]()
                n = launch(n)
                yield Round(*r)
                left = room.max().item()
        finally:
            inner.unread = None  # it leads back to `inner`: both would stay, with all their caches
            now()  # the last replay may still use them

def check_arguments(target, prompt, max_new_tokens, drafter, k, rule, temperature, top_k, top_p,
                    eos, seed):  # fmt: skip
    """The arguments of `generate`, as the loops want them: prompts, drafter, k, rule, eos, seed."""
    V, block, device = target.config.vocab_size, target.config.block_size, target.wte.weight.device
    check_numbers(max_new_tokens, temperature, top_k, top_p, seed)
    prompts = as_prompts(prompt, V, device)
    n = max_new_tokens + max(map(len, prompts))
    need(n <= block, f"prompt and budget are {n} tokens; the target's block_size is {block}")
    coupled, tree = rule == "coupled", isinstance(drafter, TreeDrafter)
    need(callable(rule) or str(rule) in RULES, f"unknown rule {rule!r}, not {', '.join(RULES)}")
    rule = RULES.get(rule, rule)
    if eos is not None:
        eos = as_tokens([int(eos)] if isinstance(eos, Integral) else eos, "eos", V, device)
    if drafter is not None:
        right = tree or str(k) == "auto" or isinstance(k, Integral) and 1 <= k < block
        need(right, f'k is {k!r}; it must be a whole number from 1 to {block - 1}, or "auto"')
        right = not tree or rule is verify and not coupled and k != "auto"
        need(right, "a tree has a rule of its own, recursive rejection, and a fixed shape")
        check_drafter(drafter, target, n)
    auto = drafter is not None and k == "auto"
    k = 0 if drafter is None else drafter.n_nodes if tree else 8 if auto else int(k)
    check_memory(target, len(prompts), n, k)
    ours = {type(None), ModelDrafter, NGramDrafter, HeadsDrafter, TreeDrafter}
    known = {type(drafter), type(drafter.drafter if tree else None)} <= ours
    drafter = AutoK(drafter) if auto else drafter
    if has_graphs(device) and known and rule in RULES.values() and (eos is None or len(eos) < 10):
        drafter = Replayed(drafter)  # for what looks at no result, as isin does of ten tokens
    seed = torch.Generator().seed() % 2**63 if seed is None else int(seed)
    return prompts, Coupled(drafter) if coupled else drafter, k, rule, eos, seed

def check_numbers(max_new_tokens, temperature, top_k, top_p, seed):
    for name, x in ("max_new_tokens", max_new_tokens), ("seed", 0 if seed is None else seed):
        right = isinstance(x, Integral) and 0 <= x < 2**63
        need(right, f"{name} is {x!r}; it must be a whole number from 0 on, below 2^63")
    need(0 <= temperature < math.inf, f"temperature is {temperature}; it must be 0 or more")
    need(top_k is None or top_k >= 1, f"top-k is {top_k}; it must be at least 1")
    need(top_p is None or 0 < top_p <= 1, f"top-p is {top_p}; it must be above 0, at most 1")

def check_drafter(drafter, target, length):
    """BadInput, unless it can guess for this target, in texts of up to `length` tokens."""
    methods = [getattr(drafter, name, None) for name in ("start", "propose", "commit")]
    right = all(map(callable, methods)) and not isinstance(drafter, type)
    need(right, "a drafter has start, propose and commit, as ModelDrafter(model) has; this has not")
    inner, V, block = drafter, target.config.vocab_size, target.config.block_size
    if isinstance(drafter, TreeDrafter):
        inner, n, what = drafter.drafter, drafter.n_nodes, "a model or heads, token by token"
        need(isinstance(inner, ModelDrafter), f"the guesses of a tree come from {what}")
        need(n <= block, f"a tree of {n} guesses; the target's block_size is {block}")
    if isinstance(inner, HeadsDrafter):
        heads, theirs = inner.heads, (V, target_state_size(target.config), target.wte.weight.dtype)
        need(hasattr(heads, "c_state"), "HeadsDrafter takes heads, one of those in heads.pt")
        ours = len(heads.lm_head.bias), len(heads.c_state.weight), heads.lm_head.bias.dtype
        need(ours == theirs, f"heads for a target of another shape: {ours}, not {theirs}")
    elif isinstance(inner, ModelDrafter):
        ours, n = inner.model.config.vocab_size, inner.model.config.block_size
        need(ours == V, f"the draft knows {ours} tokens, the target {V}")
        need(length <= n, f"prompt and budget: {length} tokens; the draft's block_size is {n}")

# ---- Part 4: the demonstration -------------------------------------------------------------------

import argparse
import os
import signal
import sys
from model import CHECKPOINTS, BadInput, load_heads, load_pair

ENGLISH = "It was the best of times, it was the worst of times, it was the age of wisdom, it was"
PROMPT = "import os\nimport sys\n\ndef main(argv=None):\n    if argv is None:\n        argv = "
COLOURS = {"accepted": 32, "rejected": 31, "not judged": 90, "correction": 33, "bonus": 36}

def paint(kind, word):
    colourful = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    return f"\033[{COLOURS[kind]}m{word}\033[0m" if colourful else word

def tell(r, show, tree):  # one line about the first row: the guesses, and the target's verdict
    n, n_guessed, n_new = (x[0].item() for x in (r.n_accepted, r.n_guessed, r.n_new))
    words, own = [show(x) for x in r.guesses[0, :n_guessed].tolist()], show(r.tokens[0, n].item())
    kinds = ["accepted"] * n + ["rejected"] + ["not judged"] * n_guessed
    marks = {"accepted": "{}", "rejected": "[{}]", "not judged": "({})"}
    marked = [marks[kind].format(x) for kind, x in zip(kinds, words)][: n if tree else None]
    did = f"accepts {n}, adds {paint('bonus', own)}"
    if n_new <= n:
        did = f"accepts {n_new}: the text is complete"
    elif n < len(marked):
        did = f"accepts {n}, corrects {words[n]} to {paint('correction', own)}"
    while len(" ".join(marked)) > 48:
        marked.pop()
    print(f"  {' '.join(map(paint, kinds, marked))}{' ' * (50 - len(' '.join(marked)))}{did}")

def traced(show, target_probs, draft_probs, guesses, generator):  # `verify`, showing its coins
    u = guesses.double().uniform_(generator=generator.clone_state())  # that it is about to toss
    n_accepted, token = verify(target_probs, draft_probs, guesses, generator)
    n = n_accepted[0].item()
    for i, x in enumerate(guesses[0, : n + 1].tolist()):
        sign, verdict = ("<", "accepted") if i < n else (">=", "rejected")
        probs = f"{target_probs[0, i, x]:.4f} / {draft_probs[0, i, x]:.4f}"
        print(f"    {show(x):14} coin {u[0, i]:.3f} {sign} target / draft = {probs}: {verdict}")
    best = residual(target_probs, F.pad(draft_probs, (0, 0, 0, 1)))[0, n].topk(3)
    best = ", ".join(f"{show(x.item())} {p:.3f}" for p, x in zip(*best) if p > 0)
    print(f"    then of the {'residual' if n < len(guesses[0]) else 'target'}: {best}, ..")
    return n_accepted, token

def timed_run(target, prompts, n, **options):
    """-> milliseconds without the prompt's pass, Result, and those of the target's other passes."""
    def forward(tokens, cache):
        begin, out = now(), target.forward(tokens, cache)
        passes.append(1e3 * (now() - begin))
        return out
    passes, watched, start = [], copy(target), now()
    if not has_graphs(target.wte.weight.device):  # no clock can look into a graph
        watched.forward = forward
    result = generate(watched, prompts, n, **options)
    return 1e3 * (now() - start) - sum(passes[:1]), result, passes[1:]

def show_times(target, prompts, n, drafter, k, rule, **options):
    plain, fast, end, B = [], [], now() + 2, len(prompts)
    while not fast or now() < end:  # in turns, for two seconds; of each the median run
        plain.append(timed_run(target, prompts, n, **options))
        fast.append(timed_run(target, prompts, n, drafter=drafter, k=k, rule=rule, **options))
    slow, (wanted, p), one = sorted(plain, key=lambda run: run[0])[len(plain) // 2]
    quick, (tokens, s), many = sorted(fast, key=lambda run: run[0])[len(fast) // 2]
    print(f"\n  {'':16}tokens  passes  seconds")
    for name, x, t, n in ("plain decoding", p, slow, one), ("speculative", s, quick, many):
        print(f"  {name:16}{x.emitted:6}{len(n) or x.rounds // B:8}{t / 1e3:9.3f}")
    other = "no, same distribution" if options["temperature"] else "no, a tie was rounded"
    print(f"  {slow / quick:.2f} times as fast; same text: {'yes' if tokens == wanted else other}")
    print(f"  acceptance rate {s.acceptance_rate:.2f}: {s.accepted} of {s.evaluated} judged")
    if many:
        check, rest = sum(many) / len(many), (quick - sum(many)) / len(many)
        parts = f"{slow / len(one):.1f} ms / ({check:.1f} ms to check + {rest:.1f} ms to guess ..)"
        print(f"  {slow / quick:.2f} = {s.emitted / B / len(many):.2f} tokens per pass x {parts}")

def main(argv=None):
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--target", metavar="NAME", help="gpt2-xl or the like, or a folder (default: large.pt)")
    add("--draft", metavar="NAME", help="the same (default: tiny.pt)")
    add("--prompt", help="text to continue (default: some Python code; for a GPT-2, some English)")
    add("--prompt-file", metavar="FILE", help="a file with this text, or - for standard input")
    add("--max-new-tokens", type=int, default=48, metavar="N", help="default: 48; timed on GPU 400")
    add("-k", metavar="K", help='guesses per round, or "auto" (default: 4, heads 6, ngram 10)')
    add("--drafter", choices=("model", "ngram", "heads", "tree"), default="model")
    add("--rule", choices=RULES, default="rejection")
    add("--tree", metavar="W,W,..", help="children per node (default: 2,1,1,1)")
    add("--temperature", type=float, metavar="T", help="0 is greedy (default: first 0, then 1)")
    add("--top-k", type=int, metavar="K", help="sample from the K best tokens only")
    add("--top-p", type=float, metavar="P", help="from the fewest best ones that together reach P")
    add("--seed", type=int, default=0, help="default: 0")
    add("--batch", type=int, default=1, metavar="B", help="rows decoded at once (default: 1)")
    add("--trace", action="store_true", help="show every coin of the rejection rule")
    add("--device", help="default: cuda where there is one, else cpu")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: by the device")
    add("--threads", type=int, default=1, metavar="N", choices=range(1, os.cpu_count() + 1))
    add("--checkpoints", metavar="DIR", default=CHECKPOINTS, help="where large.pt, tiny.pt .. are")
    args = parser.parse_args(argv)
    n, B, name, file = args.max_new_tokens, args.batch, args.drafter, args.prompt_file
    need(1 <= B <= 10_000 and n >= 1, "--batch must be 1 to 10000, --max-new-tokens at least 1")
    need(not (args.k if name == "tree" else args.tree), "--tree is for trees, -k for all others")
    right = not args.trace or args.rule == "rejection" and name != "tree" and B == 1
    need(right, "--trace is for the rejection rule and one row")
    check_numbers(n, args.temperature or 0, args.top_k, args.top_p, args.seed)
    text = open({"-": 0}.get(file, file), encoding="utf-8").read() if file else args.prompt
    text = (ENGLISH if args.target else PROMPT) if text is None else text
    torch.set_num_threads(args.threads)
    dtype, folder = args.dtype and getattr(torch, args.dtype), args.checkpoints
    target, draft, encoding = load_pair(folder, args.device, dtype, args.target, args.draft)
    drafter, k = {
        "model": lambda: (ModelDrafter(draft), 4),
        "ngram": lambda: (NGramDrafter(), 10),
        "heads": lambda: (HeadsDrafter(load_heads(f"{folder}/heads.pt", target)[0]), 6),
        "tree": lambda: (TreeDrafter(ModelDrafter(draft), (args.tree or "2,1,1,1").split(",")), 4),
    }[name]()
    k = int(args.k) if (args.k or "").isdecimal() else args.k or k
    prompts = torch.tensor(B * [encoding.encode_ordinary(text)], device=target.wte.weight.device)
    show = lambda x: repr(encoding.decode([x]))[1:-1].replace(" ", "·")
    rule = functools.partial(traced, show) if args.trace else args.rule
    stories, filters = {}, {"top_k": args.top_k, "top_p": args.top_p, "seed": args.seed}
    for T in (0.0, 1.0) if args.temperature is None else (args.temperature,):
        stories[T] = rounds(target, prompts, n, drafter, k, rule, T, **filters)
    n = max(n, has_graphs(prompts.device) * min(400 // B, len(draft.wpe.weight) - len(prompts[0])))
    large, tiny = (sum(p.numel() for p in model.parameters()) / 1e6 for model in (target, draft))
    print(f"The target: a GPT-2 with {large:.1f} million weights. The draft: {tiny:.1f} million.")
    print(f"The prompt: {text!r}")
    for T, story in stories.items():
        print(f"\n{'Greedy' if T == 0 else f'Temperature {T:g}'}: guesses (· is a space), verdict")
        for r in filter(lambda r: r.n_new[0] > 0, story):
            tell(r, show, name == "tree")
        show_times(target, prompts, n, drafter, k, args.rule, temperature=T, **filters)
    print("\nNext: add --trace, or --drafter heads --rule block; or try all: python tests/bench.py")

def run_script(main):  # what a user can mend becomes one line; Ctrl-C and `| head` end it quietly
    for name in {"SIGINT", "SIGPIPE"} & set(dir(signal)):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    try:
        need(sys.stdout, "standard output is closed")
        sys.stdout.reconfigure(errors="replace")
        status = main()
        sys.stdout.flush()
    except (BadInput, UnicodeError, OSError) as error:
        print(f"{sys.argv[0]}: error:", *str(error).split(), file=sys.stderr)
        sys.exit(2)
    sys.exit(status)

if __name__ == "__main__":
    run_script(main)
