"""Proof, part 5: bugs that public speculative decoders really had, and slips that anyone can make, planted one at a time.

A test must fail for each.

    python tests/mutants.py            # all of them
    python tests/mutants.py A2 E1      # some

A mutant replaces one piece of the real source, which must occur there exactly once: a patch that no longer applies is an error.
"""

import multiprocessing
import os
import re
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

# A pytest of its own for each bug, forked where that is possible from a process that has imported torch once and for all.
PROCESSES = multiprocessing.get_context("forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn")
PROCESSES.set_forkserver_preload(["torch", "hypothesis.strategies"])

ROOT = Path(__file__).parent.parent
FILES = ("kvcache.py", "model.py", "specdec.py", "train_tiny.py")


@dataclass(frozen=True)
class Mutant:
    id: str
    bug: str
    seen: str  # owner/repository#issue, or "-" for a slip that anyone can make
    file: str
    old: str
    new: str
    tests: str  # the files that should notice, the quickest first


LAW = "verify law"
LOOP = "decoding law"
CATALOGUE = [
    # -- A: acceptance
    Mutant("A1", "all guesses kept, whatever the coins say", "huggingface/transformers#28508", "specdec.py",
           '    n_accepted = leading(bernoulli(ratio(target_probs[:, :-1], draft_probs, draft_tokens).clamp(max=1), generator))\n',
           '    n_accepted = leading(1 | bernoulli(ratio(target_probs[:, :-1], draft_probs, draft_tokens).clamp(max=1), generator))\n', LAW),
    Mutant("A2", "acceptance ratio upside down", "feifeibear/LLMSpeculativeSampling@9f5d2e5", "specdec.py",
           'target_x / draft_x, 0)', 'draft_x / target_x, 0)', LAW),
    Mutant("A3", "guesses by argmax, judged as if sampled", "jaymody/speculative-sampling#3", "specdec.py",
           'tokens.append(categorical(probs[-1], generator, len(probs) - 1)[:, None])',
           'tokens.append(probs[-1].argmax(-1)[:, None])', "law"),
    Mutant("A4", "no correction once a guess was accepted", "jaymody/speculative-sampling@803de30", "specdec.py",
           'residual(at(target_probs, n_accepted), at(draft_probs, n_accepted)), generator)',
           'residual(at(target_probs, n_accepted), at(draft_probs, n_accepted) * (n_accepted == 0)[:, None]), generator)', LAW),
    Mutant("A5", "the first guess is never judged", "ohdearquant/lattice#243", "specdec.py",
           '    return kept.cumprod(-1).sum(-1)\n',
           '    return kept.index_fill(-1, torch.arange(min(1, kept.shape[-1])), True).cumprod(-1).sum(-1)\n', LAW),
    Mutant("A6", "tokens looked up from the prompt's end, not from the text's", "romsto/Speculative-Decoding@41668c8", "specdec.py",
           "tokens = torch.cat((text.gather(1, length[:, None] - 1), draft_tokens), 1)",
           "tokens = torch.cat((text[:, T - 1 : T], draft_tokens), 1)", LOOP),
    Mutant("A7", "a guess is kept although an earlier one was rejected", "-", "specdec.py",
           '    return kept.cumprod(-1).sum(-1)\n',
           '    return kept.long().sum(-1)\n', LAW),
    Mutant("A8", "u <= p: a token of probability 0 passes when u is 0", "-", "specdec.py",
           "dtype=probs.dtype) < probs", "dtype=probs.dtype) <= probs", "sampling"),
    Mutant("A9", "greedy where sampling was asked for", "sgl-project/sglang#31214", "specdec.py",
           'return n_accepted, categorical(residual(at(target_probs, n_accepted), at(draft_probs, n_accepted)), generator)',
           'return n_accepted, residual(at(target_probs, n_accepted), at(draft_probs, n_accepted)).argmax(-1)', LAW),
    # -- B: residual
    Mutant("B1", "softmax of the residual instead of scaling it", "huggingface/transformers#28508", "specdec.py",
           'torch.where(mass > 0, left / mass,',
           'torch.where(mass > 0, left.softmax(-1),', LAW),
    Mutant("B2", "residual of the last row", "romsto/Speculative-Decoding@53922df", "specdec.py",
           'residual(at(target_probs, n_accepted), at(draft_probs, n_accepted)), generator)',
           'residual(target_probs[:, -1], at(draft_probs, n_accepted)), generator)', LAW),
    Mutant("B3", "correction from the target's law", "romsto/Speculative-Decoding@53922df", "specdec.py",
           'residual(at(target_probs, n_accepted), at(draft_probs, n_accepted)), generator)',
           'at(target_probs, n_accepted), generator)', LAW),
    Mutant("B4", "correction one row late", "openvinotoolkit/openvino.genai#4190", "specdec.py",
           'residual(at(target_probs, n_accepted), at(draft_probs, n_accepted)), generator)',
           'residual(target_probs[row, (n_accepted + 1).clamp(max=draft_tokens.shape[1])], at(draft_probs, n_accepted)), generator)', LAW),
    Mutant("B5", "only the rejected token taken out, not the draft's law", "xLLM-AI/xllm#2175", "specdec.py",
           'residual(at(target_probs, n_accepted), at(draft_probs, n_accepted)), generator)',
           'residual(at(target_probs, n_accepted), at(target_probs, n_accepted) * (F.pad(draft_tokens, (0, 1), value=-1)[row, n_accepted][:, None] == torch.arange(target_probs.shape[-1]))), generator)', LAW),
    Mutant("B6", "residual sent through the softmax once more", "feifeibear/LLMSpeculativeSampling@3505d00", "specdec.py",
           'return n_accepted, categorical(residual(at(target_probs, n_accepted), at(draft_probs, n_accepted)), generator)',
           'return n_accepted, categorical(to_probs(residual(at(target_probs, n_accepted), at(draft_probs, n_accepted))), generator)', LAW),
    Mutant("B7", "the target's law damaged in place", "vllm-project/vllm-ascend#2881", "specdec.py",
           '    n_accepted = leading(bernoulli(ratio(target_probs[:, :-1], draft_probs, draft_tokens).clamp(max=1), generator))\n',
           '    n_accepted = leading(bernoulli(ratio(target_probs[:, :-1], draft_probs, draft_tokens).clamp(max=1), generator))\n    target_probs[:, :-1].scatter_(-1, draft_tokens[..., None], 0)\n', LAW),
    Mutant("B8", "negative parts of the residual kept", "-", "specdec.py",
           'left = (target_probs - draft_probs).clamp_(min=0)',
           'left = (target_probs - draft_probs).abs()', LAW),
    # -- C: the draft's law is not the one drawn from
    Mutant("C1", "drawn with filters, reported without", "huggingface/transformers#47932", "specdec.py",
           '            probs.append(law(logits[:, -1]))\n            tokens.append(categorical(probs[-1], generator, len(probs) - 1)[:, None])\n',
           '            probs.append(to_probs(logits[:, -1]))\n            tokens.append(categorical(law(logits[:, -1]), generator, len(probs) - 1)[:, None])\n', "law"),
    Mutant("C5", "target judged without filters", "vllm-project/vllm#9834", "specdec.py",
           "target_probs = law(logits)", "target_probs = to_probs(logits)", LOOP),
    Mutant("C7", "drawn in bfloat16, judged in float", "deepseek-ai/DeepSpec#31", "specdec.py",
           'categorical(probs[-1], generator, len(probs) - 1)',
           'categorical(probs[-1].bfloat16(), generator, len(probs) - 1)', "law"),
    Mutant("C8", "drawn at another temperature", "mlx-node/mlx-node#11", "specdec.py",
           'categorical(probs[-1], generator, len(probs) - 1)',
           'categorical(probs[-1] ** 2 / (probs[-1] ** 2).sum(-1, keepdim=True), generator, len(probs) - 1)', "law"),
    Mutant("C12", "top-p of a law that is not scaled after top-k", "ml-explore/mlx-lm#388", "specdec.py",
           "    probs = logits.softmax(-1)\n", "    probs = logits.softmax(-1) * (1 if top_k is None else 0.9)\n", "sampling"),
    Mutant("C13", "top-p loses the token that reaches the mass", "-", "specdec.py",
           "best.cumsum(-1) - best >= max(top_p, 1e-37)", "best.cumsum(-1) > max(top_p, 1e-37)", "sampling"),
    # -- D: bonus
    Mutant("D1", "bonus from the residual of the last guess", "SafeAILab/EAGLE#47", "specdec.py",
           'residual(at(target_probs, n_accepted), at(draft_probs, n_accepted)), generator)',
           'residual(at(target_probs, n_accepted), draft_probs[row, n_accepted.clamp(max=max(0, draft_tokens.shape[1] - 1))]), generator)', LAW),
    Mutant("D2", "the rejected guess stays in the draft's cache in place of the correction", "vllm-project/vllm#9730", "specdec.py",
           'drafter.commit(length, n_new, hidden)',
           'drafter.commit(length + 1, n_new, hidden)', "decoding"),
    Mutant("D4", "no bonus after full acceptance", "ohdearquant/lattice#509", "specdec.py",
           "n_new = torch.minimum(n_accepted + 1, room)", "n_new = torch.minimum((n_accepted + 1).clamp(max=max(n, 1)), room)", "decoding"),
    Mutant("D5", "the prompt's newest token is read twice", "Lightning-AI/litgpt#2307", "specdec.py",
           '    _, hidden = target(prompt[:, :-1], cache)',
           '    _, hidden = target(prompt, cache)', LOOP),
    # -- E: caches and positions
    Mutant("E1", "the draft never reads its own last guess", "vllm-project/vllm#5765", "specdec.py",
           "    n = unread or (length - cache.length).max().item()\n", "    cache.length, n = length - 1, 1\n", "drafter"),
    Mutant("E2", "the target forgets one token too few", "lablup/mlxcel#994", "specdec.py",
           'length.add_(n_new)\n        cache.rollback(length - 1)\n',
           'length.add_(n_new)\n        cache.rollback(torch.minimum(length, cache.length))\n', LOOP),
    Mutant("E2b", "the draft forgets one token too many", "lablup/mlxcel#994", "specdec.py",
           'drafter.commit(length, n_new, hidden)',
           'drafter.commit(length - 1, n_new, hidden)', "decoding"),
    Mutant("E4", "only the newest token is fed", "lucidrains/speculative-decoding@88641c0", "specdec.py",
           "lambda where: self.model(text.gather(1, where)", "lambda where: self.model(text.gather(1, length[:, None] - 1).expand_as(where)", "drafter"),
    Mutant("E4b", "a short row of a batch is read from before its beginning", "-", "specdec.py", "start = (length - n).clamp(min=0)", "start = length - n", "decoding -k short_rows"),
    Mutant("E5", "all guesses emitted, then the correction", "lucidrains/speculative-decoding#3", "specdec.py",
           "n_new = torch.minimum(n_accepted + 1, room)", "n_new = torch.minimum(torch.full_like(room, n + 1), room)", LOOP),
    Mutant("E6", "the draft's cache is kept for the next prompt", "ggml-org/llama.cpp#27852", "specdec.py",
           "        self.cache = self.model.new_cache(len(prompt), max_length, target_cache.fixed)\n",
           "        self.cache = self.__dict__.get('cache') or self.model.new_cache(len(prompt), max_length)\n", "decoding"),
    Mutant("E7", "the cache is emptied instead of rolled back", "paiml/aprender#2014", "specdec.py",
           "        cache.rollback(length - 1)\n        return", "        cache.rollback(0)\n        return", LOOP),
    Mutant("E9", "the position moves by 1 a round", "huggingface/transformers#30042", "specdec.py",
           "        cache.rollback(length - 1)\n        return", "        cache.rollback(cache.length - n)\n        return", LOOP),
    Mutant("E11", "no rollback if only the last guess was rejected (k = 1)", "openvinotoolkit/openvino.genai#4190", "specdec.py",
           "        cache.rollback(length - 1)\n        return", "        cache.rollback(length - 1 if n > 1 else cache.length)\n        return", LOOP),
    Mutant("E17", "every guess at the same position", "vllm-project/vllm#26498", "specdec.py",
           '        return self.model(tokens, self.cache, tree)[0]\n',
           '        self.cache.rollback(self.cache.length - 1)\n        return self.model(tokens, self.cache, tree)[0]\n', "decoding"),
    Mutant("E20", "positions start at 0 in every pass", "ml-explore/mlx-lm#93", "kvcache.py",
           "positions = self._slot[longest:S]", "positions = self._slot[:T]", "kvcache"),
    Mutant("E21", "mask aligned at the top left", "-", "kvcache.py",
           "self._causal[longest:S, :S]", "self._causal[:T, :S]", "kvcache"),
    Mutant("E22", "all rows masked as if they were the longest", "-", "kvcache.py",
           "mask = self._causal[positions, :S][:, None]", "mask = self._causal[longest:S, :S]", "kvcache"),
    Mutant("E23", "stale slots are masked, but NaN in them spreads", "-", "kvcache.py",
           "                self._kv[..., shortest + T : S, :].masked_fill_(stale[:, None, :, None], 0)\n", "", "kvcache"),
    Mutant("E24", "one row's tokens written where the longest row's go", "-", "kvcache.py",
           'self._visible[layer][:, self._row, :, self._slots] = kv.permute(1, 3, 0, 2, 4)',
           'self._visible[layer][..., -kv.shape[3] :, :] = kv', "kvcache"),
    Mutant("E25", "a rollback to more than there is", "-", "kvcache.py",
           "not all(0 <= new <= old for", "not all(0 <= new for", "kvcache"),
    # -- F: where the output ends
    Mutant("F1", "only a round's last token is tested for EOS", "huggingface/transformers#47912", "specdec.py",
           "before_eos = leading(tokens != eos)", "before_eos = torch.where(at(tokens, n_new - 1) == eos, n_new - 1, n + 1)", "decoding -k eos"),
    Mutant("F2", "EOS ends the round, not the row", "ggml-org/llama.cpp#28049", "specdec.py",
           "            end.copy_(torch.where(before_eos < n_new, length + before_eos + 1, end))\n", "", "decoding"),
    Mutant("F5", "EOS among rejected guesses counts", "sgl-project/sglang#31599", "specdec.py",
           "torch.where(before_eos < n_new, length", "torch.where(before_eos <= n, length", "decoding"),
    Mutant("F7", "a round may exceed the budget", "huggingface/transformers#46993", "specdec.py",
           "n_new = torch.minimum(n_accepted + 1, room)", "n_new = n_accepted + 1", "decoding"),
    Mutant("F9", "guesses beyond the last position", "turboderp-org/exllamav2#274", "model.py",
           "            positions = positions.clamp(max=self.config.block_size - 1)\n", "", "decoding"),
    Mutant("F10", "only the target's context is checked", "vllm-project/vllm#57941", "specdec.py",
           "if length > self.model.config.block_size:", "if False:", "decoding"),
    Mutant("F13", "guesses behind an accepted EOS are counted", "vllm-project/vllm#56101", "specdec.py",
           "torch.minimum(r.n_accepted, r.n_new).sum()", "r.n_accepted.sum()", "decoding"),
    # -- G: random numbers
    Mutant("G1", "acceptance and correction share their noise", "vllm-project/vllm#54282", "specdec.py",
           '    n_accepted = leading(bernoulli(ratio(target_probs[:, :-1], draft_probs, draft_tokens).clamp(max=1), generator))\n',
           '    n_accepted = leading(bernoulli(ratio(target_probs[:, :-1], draft_probs, draft_tokens).clamp(max=1), generator and generator.clone_state()))\n', "coins"),
    Mutant("G3", "reseeded in every round", "feifeibear/LLMSpeculativeSampling", "specdec.py",
           "        room = end - length\n", "        room = end - length\n        generator.manual_seed(0)\n", "coins"),
    Mutant("G3b", "one coin for all guesses", "feifeibear/LLMSpeculativeSampling", "specdec.py",
           "return torch.rand(probs.shape,", "return torch.rand(probs.shape[:1] + (1,) * (probs.ndim - 1),", "coins"),
    Mutant("G4", "coins from the global generator", "vllm-project/vllm#6038", "specdec.py",
           "return torch.rand(probs.shape, generator=generator,", "return torch.rand(probs.shape,", "coins decoding"),
    Mutant("G6", "one generator for all calls", "NVIDIA/TensorRT-LLM#17599", "specdec.py",
           "    generator = torch.Generator(prompt.device)\n    generator.seed() if seed is None else generator.manual_seed(seed)\n",
           "    generator = rounds.__dict__.setdefault('generator', torch.Generator().manual_seed(seed or 0))\n", "coins"),
    Mutant("G7", "the seed is ignored", "vllm-project/vllm#13196", "specdec.py",
           "generator.manual_seed(seed)", "generator.manual_seed(1)", "coins"),
    Mutant("G8", "seed 0 means no seed", "feifeibear/LLMSpeculativeSampling", "specdec.py",
           "generator.seed() if seed is None else", "generator.seed() if not seed else", "coins"),
    # -- H: rows of a batch
    Mutant("H2", "rows change places", "HabanaAI/vllm-fork#1780", "specdec.py",
           "        cache.rollback(length - 1)\n        return", "        cache.rollback((length - 1).flip(0))\n        return", "decoding"),
    Mutant("H4", "the newest token is read at the longest row's end", "lucidrains/speculative-decoding@ef0467c", "specdec.py",
           'tokens = torch.cat((text.gather(1, length[:, None] - 1), draft_tokens), 1)',
           'tokens = torch.cat((text[:, length.max() - 1][:, None], draft_tokens), 1)', "decoding"),
    Mutant("H5", "rows wait for the one that accepts least", "-", "specdec.py",
           "n_new = torch.minimum(n_accepted + 1, room)", "n_new = torch.minimum(n_accepted.min() + 1, room)", "decoding"),
    Mutant("I8", "the last guess is never accepted", "hao-ai-lab/LookaheadDecoding@0e9f02d", "specdec.py",
           '    return kept.cumprod(-1).sum(-1)\n',
           '    return kept.cumprod(-1).sum(-1).clamp(max=max(0, kept.shape[1] - 1))\n', "verify decoding"),
    # -- X: the block rule and the coupled rule
    Mutant("X1", "the block rule stops at the first no", "-", "specdec.py",
           "n_accepted = (kept * torch.arange(len(weights), device=kept.device)).amax(1)", "n_accepted = kept[:, 1:].cumprod(1).sum(1)", "rules"),
    Mutant("X2", "the block rule with the token rule's residual", "-", "specdec.py",
           'residual(at(weighted, n_accepted), at(draft',
           'residual(at(target_probs, n_accepted), at(draft', "rules"),
    Mutant("X3", "block weights that exceed 1", "-", "specdec.py", "weights.append((weights[-1] * r).clamp(max=1))", "weights.append(weights[-1] * r)", "rules"),
    Mutant("X4", "block: a broken guess bends the law before it", "-", "specdec.py", "draft_probs.nan_to_num(0)", "draft_probs", "rules"),
    Mutant("X5", "noise by round, not by position", "-", "specdec.py",
           "generator.here = length - T", "generator.here = torch.zeros_like(length)", "rules"),
    Mutant("X6", "all rows share their noise", "-", "specdec.py",
           "self.row = torch.arange(B, device=device)", "self.row = torch.zeros(B, dtype=torch.int64, device=device)", "rules"),
    Mutant("X7", "the draft draws with noise of its own", "-", "specdec.py",
           "tokens.append(categorical(probs[-1], generator, len(probs) - 1)", "tokens.append(categorical(probs[-1], None)", "rules"),
    Mutant("X8", "a coupled guess judged by the rejection rule as well", "-", "specdec.py",
           'leading((own[:, :k] == draft_tokens) &',
           'leading((own[:, :k] == draft_tokens) & (target_probs[:, :k] >= draft_probs).all(-1) &', "rules"),
    Mutant("X9", "coupled: a token that nobody guessed counts as accepted", "-", "specdec.py",
           'leading((own[:, :k] == draft_tokens) & guessed(draft_probs))', 'leading(own[:, :k] == draft_tokens)', "rules"),
    # -- Q: graphs
    Mutant("Q1", "a graph writes to memory that the next replay does not read", "-", "kvcache.py", "self.length += T", "self.length = self.length + T", "graphs"),
    Mutant("Q2", "a graph of guesses knows nothing of the plain rounds before it", "-", "specdec.py", "if fixed and not (n and behind) else", "if fixed else", "graphs"),
    Mutant("Q3", "every replay with the coins of the first", "-", "model.py", "        graph.register_generator_state(generator)\n", "        pass\n", "graphs"),
    Mutant("Q4", "a replay overwrites what the last one returned", "-", "model.py", "x.clone() if isinstance(x, torch.Tensor) else x for x in recorded", "x for x in recorded", "graphs"),
    Mutant("Q5", "coupled: every replay with the noise of the first position", "-", "specdec.py", "generator.here = cache.length - T", "generator.here = torch.zeros_like(generator.row)", "graphs"),
    Mutant("Q6", "a number copied from the host inside a graph", "-", "model.py", "cache.rollback(start)", "cache.rollback(length)", "graphs"),
    Mutant("Q7", "with fixed shapes the drafter reads too little", "-", "specdec.py", "drafter.unread = k.most + 1 if", "drafter.unread = k.most if", "graphs"),
    Mutant("Q8", "to record a graph is part of a round's time", "-", "model.py", "return *out, done", "return *out, now()", "graphs"),
    Mutant("Q9", "heads that stop by confidence in a graph", "-", "specdec.py", "heads, times, times is None", "heads, times, True", "graphs"),
    Mutant("Q10", "two living graphs recorded on one stream", "pytorch/pytorch#193402", "model.py", "_spare.pop() if _spare else torch.cuda.Stream()", "None", "graphs"),
    # -- J: n-gram lookup
    Mutant("J2", "the last tokens match themselves", "-", "specdec.py", "(end < length[:, None])", "(end <= length[:, None])", "drafter"),
    Mutant("J3", "guesses from behind the end of the text", "-", "specdec.py", "[None] % (length - behind)[:, None]", "[None] + 0 * behind[:, None]", "drafter"),
    Mutant("J4", "the shortest match wins", "-", "specdec.py", "for n in range(1, min(self.max_n, text.shape[1]) + 1):", "for n in range(min(self.max_n, text.shape[1]), 0, -1):", "drafter"),
    Mutant("J5", "a lookup that found nothing still guesses", "openvinotoolkit/openvino.genai#2331", "specdec.py",
           "device=text.device)) & found[..., None]\n", "device=text.device))\n", "drafter"),
    # -- I: trees
    Mutant("I2", "the best tokens judged as if they were sampled", "NVIDIA/TensorRT-LLM#15098", "specdec.py",
           "end : width] = sibling", "end : width] = law(logits) if self.top else sibling", "law"),
    Mutant("I3", "the second sibling judged against the whole law", "SafeAILab/EAGLE#74", "specdec.py",
           "left[:, parent] = residual(before, draft_law)", "pass", "tree"),
    Mutant("I3b", "without replacement, but not scaled to what is left", "SafeAILab/EAGLE#171", "specdec.py",
           "end : width] = sibling", "end : width] = sibling * mass if child else sibling", "law"),
    Mutant("I3c", "siblings drawn with replacement", "-", "specdec.py",
           "sibling, logits = sibling.scatter(-1, elder, 0),", "sibling, logits = sibling,", "tree"),
    Mutant("I4", "the accepted path is cut off, not gathered", "sgl-project/sglang#15360", "kvcache.py",
           "index_select(-2, kept)", "narrow(-2, 0, n)", "tree"),
    Mutant("I6", "a causal mask inside the tree", "vllm-project/vllm#17560", "kvcache.py",
           "visible = F.pad(F.pad(tree,", "visible = F.pad(F.pad(torch.ones_like(tree).tril(M - T),", "tree"),
    Mutant("I7", "siblings at positions one after the other", "-", "kvcache.py", "positions = root + tree.sum(1) - 1", "positions = root + self._slot[M - T : M]", "tree"),
    Mutant("I9", "a younger sibling is accepted beside its elder", "-", "specdec.py",
           "chosen = kept & ~(kept[:, None] & elder).any(-1)", "chosen = kept", "tree"),
    Mutant("I9b", "a node is accepted, its parent is not", "-", "specdec.py",
           "(chosen[:, None] | ~ancestors(widths, left.device)).all(-1)", "chosen", "tree"),
    Mutant("I10", "the draft keeps the tree as it was", "-", "specdec.py", "self.drafter.commit(length, torch.ones_like(n_new), hidden)", "self.drafter.commit(length, n_new, hidden)", "tree"),
    Mutant("I10b", "after a tree the draft reads the whole text again", "-", "specdec.py", "torch.ones_like(n_new), hidden)", "1 - length, hidden)", "tree"),
    Mutant("I11", "in a ragged batch the tree begins at the longest row's end", "-", "kvcache.py",
           "root = self.length[:, None] + T - M", "root = self.length.max().expand_as(self.length)[:, None] + T - M", "tree"),
    # -- P: heads
    Mutant("P1", "heads read each token with the state after it", "-", "specdec.py",
           "self.hidden[self.row, where] = ", "self.hidden[self.row, where - 1] = ", "drafter"),
    Mutant("P1d", "heads see the values of the token after", "-", "specdec.py", "self.target_cache, where - 1)", "self.target_cache, where)", "drafter"),
    Mutant("P1e", "heads see layers that they were not trained on", "-", "model.py", "return slice(third, None, third)", "return slice(third - 1, n_layer - 1, third)", "drafter"),
    Mutant("P1f", "heads see the states of a tree before its path is known", "-", "specdec.py", "target_probs[row, path], hidden[row, path]", "target_probs[row, path], hidden", "drafter"),
    Mutant("P1b", "heads keep what they read with states of their own", "-", "specdec.py",
           "        self.cache.rollback(torch.minimum(length, self.cache.length))\n", "        self.cache.rollback(torch.minimum(length + n_new - 1, self.cache.length))\n", "drafter"),
    Mutant("P1g", "heads read the whole text again in every round", "-", "specdec.py",
           "        self.cache.rollback(torch.minimum(length, self.cache.length))\n", "        self.cache.rollback(0)\n", "drafter"),
    Mutant("P1h", "heads look at what others have left in the target's cache", "-", "specdec.py", ".minimum(length[:, None] - 1))", ")", "drafter"),
    Mutant("P1c", "in training a chain sees its neighbours", "-", "train_tiny.py", "own = (t == t[:, None])", "own = (t <= t[:, None])", "training -k heads"),
    Mutant("P1i", "folded, the heads forget their own state", "-", "model.py", "return own + torch.eye(", "return own + 0 * torch.eye(", "model"),
    Mutant("P1j", "heads are folded once, whatever they learn later", "-", "specdec.py", "self.folded = self.heads.fold()",
           'self.folded = vars(self.heads).setdefault("folded", self.heads.fold())', "drafter"),
    Mutant("P2", "nodes of a tree continue another node's state", "-", "specdec.py",
           'self.state.repeat_interleave(tokens.shape[1] // self.state.shape[1], 1)',
           'self.state.repeat(1, tokens.shape[1] // self.state.shape[1], 1)', "tree law"),
    Mutant("P3", "the length is chosen by the guess in question", "-", "specdec.py",
           "            probs.append(law(logits[:, -1]))\n            tokens.append(categorical(probs[-1], generator, len(probs) - 1)[:, None])\n",
           "            probs.append(law(logits[:, -1]))\n            tokens.append(categorical(probs[-1], generator, len(probs) - 1)[:, None])\n            if (tokens[-1] == 0).all():\n                return torch.cat(tokens[:-1], 1), torch.stack(probs[:-1], 1) if probs[:-1] else probs[-1][:, None][:, :0]\n", "law"),
    Mutant("P4", "heads of another target are taken", "-", "model.py", "if whose != fingerprint(target):", "if False:", "command_line"),
    Mutant("P5", "confidence that ignores what came before", "-", "specdec.py",
           "self.survival = self.survival * likely", "self.survival = likely", "drafter"),
    Mutant("P9", "rows that have ended decide how much is guessed", "-", "specdec.py",
           "drafter.going, drafter.tree, drafter.spans = room > 0, None, ()", "drafter.tree, drafter.spans = None, ()", "decoding"),
    Mutant("P9b", "a lookup for rows that have ended", "-", "specdec.py", "((behind > 0) & self.going)", "(behind > 0)", "drafter"),
    Mutant("P10", "the block rule takes NaN for a yes", "-", "specdec.py",
           ".clamp(max=1e30)", "", "rules"),
    Mutant("P6", "heads learn the law one token too late", "-", "train_tiny.py",
           "logits_of(states[row, start + i - 1], wte)", "logits_of(states[row, start + i], wte)", "training"),
    Mutant("P7", "auto: plain decoding is no choice", "-", "specdec.py", "return seconds.index(min(seconds))", "return seconds.index(min(seconds[1:]))", "decoding"),
    Mutant("P7c", "auto: a draw is enough to go on guessing", "-", "specdec.py", "0.95 * self.times[0]", "self.times[0]", "decoding -k auto"),
    Mutant("P7b", "auto: the slowest row of a batch is forgotten", "-", "specdec.py", "math.sqrt(2 * math.log(len(going)))", "0", "decoding -k auto"),
    Mutant("P8b", "auto: one slow round ends guessing for good", "-", "specdec.py", "map(statistics.median, zip(*self.costs))", "map(statistics.mean, zip(*self.costs))", "decoding -k slow"),
    Mutant("P8c", "auto: a slow minute ends guessing for good", "-", "specdec.py", "self.guess += 0.05 * (self.times[0] / 10 - self.guess)", "pass", "decoding -k slow"),
    Mutant("P8d", "auto: the price of a round is taken for that of a guess", "-", "specdec.py", 'r.seconds["draft"] / (r.size - 1)', 'r.seconds["draft"]', "decoding -k slow"),
    Mutant("P8e", "passes are timed against the line's wrong end", "-", "model.py", "(last - two) * i / (most - 1)", "(last - two) * i / most", "decoding -k pass_times"),
    Mutant("P8", "auto: the past never fades", "-", "specdec.py",
           "        self.evaluated += 0.05 * (5.0 - self.evaluated)\n", "", "decoding"),
    # -- K: numbers
    Mutant("K2", "an empty residual is divided by zero", "youssofal/MTPLX#82", "specdec.py",
           'torch.where(mass > 0, left / mass,',
           'torch.where(~(mass <= -1), left / mass,', LAW),
    Mutant("K2b", "`<= 0` is False for NaN", "youssofal/MTPLX#82", "specdec.py",
           'torch.where(mass > 0, left',
           'torch.where(~(mass <= 0), left', LAW),
    Mutant("K5", "division by a tiny temperature overflows", "anarchy-ai/LLM-VM#239", "specdec.py",
           "(logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-37)", "logits / max(temperature, 1e-37)", "sampling"),
    Mutant("K6", "laws in the model's bfloat16", "-", "specdec.py",
           "logits = logits if logits.dtype == torch.float64 else logits.float()", "logits = logits", "sampling"),
    Mutant("K7", "u = 0 lets any token win the race", "-", "specdec.py",
           "log_u.clamp_(min=-1e3)", "log_u", "coins"),
    Mutant("L1", "tokenizers are not compared", "sgl-project/sglang#24051", "model.py",
           "if other._mergeable_ranks != encoding._mergeable_ranks or", "if", "command_line"),
    Mutant("L1b", "vocabularies are not compared", "ggml-org/llama.cpp#3812", "specdec.py",
           "if self.model.config.vocab_size != target.config.vocab_size:", "if False:", "decoding"),
    Mutant("L2", "checksums are not looked at", "-", "model.py", "if file.testzip():", "if False:", "model"),
    Mutant("L3", "weights in 8 bits are cut off, not rounded", "-", "model.py", "ldexp(-exponent).round()", "ldexp(-exponent)", "model"),
    Mutant("L4", "an exponent that int8 cannot hold", "-", "model.py", ".clamp(min=-24)", "", "model"),
    # -- the model, the figures, the training
    Mutant("M1", "GELU in its exact form", "-", "model.py",
           'return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))',
           'return self.c_proj(F.gelu(self.c_fc(x), approximate="none"))', "model"),
    Mutant("M2", "heads and values in another order than GPT-2's", "-", "model.py",
           ".view(B, T, 3, self.n_head, D // self.n_head).permute(2, 0, 3, 1, 4)",
           ".view(B, T, self.n_head, 3, D // self.n_head).permute(3, 0, 2, 1, 4)", "model"),
    Mutant("N1", "acceptance rate over guesses that nobody judged", "-", "specdec.py",
           "return self.accepted / max(1, self.evaluated)", "return self.accepted / max(1, self.drafted)", "decoding"),
    Mutant("N2", "the figure tau counts only accepted guesses", "-", "specdec.py",
           "return self.emitted / max(1, self.rounds)", "return self.accepted / max(1, self.rounds)", "decoding"),
    Mutant("N3", "rows of a table that decode in alternation share a drafter", "-", "specdec.py", "(copy(drafter), ", "(drafter, ",
           "command_line -k alternation"),
    Mutant("N4", "a table ends in the middle of its prompts", "-", "specdec.py", "i == 0 or i % cycle or (", "i < cycle or (", "command_line -k counts"),
    Mutant("N5", "more threads for nothing", "-", "model.py", " if n == min(n for _, n in choices)", "", "command_line -k race"),
    Mutant("T1", "a resumed run sees the first batches again", "-", "train_tiny.py",
           '            generator.set_state(self.state["generator"])\n', "", "training"),
    Mutant("T2", "distillation changes the undistilled draft kept for the report", "-", "train_tiny.py",
           "{name: weight.clone() for name, weight in model.state_dict().items()}", "model.state_dict()", "training"),
    Mutant("T3", "held-out texts are trained on", "-", "train_tiny.py",
           "return [t for (_, t), h in zip(documents, held_out) if not h],", "return [t for t in (t for _, t in documents)],", "training"),
    Mutant("T4", "an end that was interrupted belongs to another run", "-", "train_tiny.py", '("heads", "large", "tiny")', '("tiny", "large", "heads")', "training"),
    Mutant("T5", "the layers that a model grows speak before they have learnt", "-", "train_tiny.py", "            c_proj.bias.zero_()\n", "", "training -k grown"),
]  # fmt: skip
FAST = ("A2", "B3", "E1", "F1", "G1", "X2", "I4")  # one of each kind, for the ordinary test command


def patched(mutant):
    """The source of the mutant's file with the bug in it. ValueError: the patch does not apply exactly once."""
    source = (ROOT / mutant.file).read_text()
    if source.count(mutant.old) != 1:
        raise ValueError(f"mutant {mutant.id}: its text occurs {source.count(mutant.old)} times in {mutant.file}, not once")
    return source.replace(mutant.old, mutant.new)


def caught_by(mutant):
    """The name of the first test that fails with this bug planted, or None if all pass."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "tests", Path(folder) / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        for file in FILES:
            shutil.copy(ROOT / file, folder)
        (Path(folder) / mutant.file).write_text(patched(mutant))
        names, _, words = mutant.tests.partition(" -k ")
        files = [f"tests/test_{name}.py" for name in names.split()] + ["-k", words] * bool(words)
        status, out = run_pytest(["-x", "-q", "--tb=no", "--hypothesis-profile=mutants", *files], folder)
        if status == 0:
            return None
        failed = re.search(r"^(?:FAILED|ERROR) tests/(.+?)(?: - .*)?$", out, re.MULTILINE)
        if status != 1 or not failed:
            raise RuntimeError(f"mutant {mutant.id}: the tests did not run\n{out}")
        return failed[1]


def run_pytest(words, folder):
    """`python -m pytest words` in this folder -> exit status, and what it printed."""
    with tempfile.TemporaryDirectory() as private:
        child = PROCESSES.Process(target=_run_pytest, args=(words, folder, f"{private}/out"))
        child.start()
        child.join(600)
        child.kill()
        child.join()
        return child.exitcode, Path(private, "out").read_text()


def _run_pytest(words, folder, out):
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    out = os.open(out, os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.exit(pytest.main([*words, "-p", "no:cacheprovider"]))


def main(ids):
    chosen = [m for m in CATALOGUE if m.id in ids] if ids else CATALOGUE
    for mutant in CATALOGUE:
        patched(mutant)  # all must apply before any is run
    missed = 0
    with ThreadPoolExecutor(2) as pool:
        for mutant, test in zip(chosen, pool.map(caught_by, chosen)):
            missed += test is None
            print(f"{mutant.id:4} {mutant.bug:70} {mutant.seen:42} {test or 'NOT CAUGHT'}", flush=True)
    print(f"{len(chosen) - missed} caught, {missed} not")
    return missed > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
