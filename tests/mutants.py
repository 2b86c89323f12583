"""Proof, part 5: bugs that public decoders really had, and slips that anyone can make, planted.

One at a time; a test must fail for each.

    python tests/mutants.py            # all of them, in about an hour on two cores
    python tests/mutants.py A2 E1      # some

A mutant replaces one piece of the real source. It must occur there exactly once: a patch that no
longer applies is an error.
"""

import gc
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

# A pytest of its own for each bug. Where possible it is forked from a process that has imported
# torch once and for all.
METHODS = multiprocessing.get_all_start_methods()
PROCESSES = multiprocessing.get_context("forkserver" if "forkserver" in METHODS else "spawn")
PROCESSES.set_forkserver_preload(["torch", "tiktoken", "pytest", "hypothesis.strategies"])

ROOT = Path(__file__).parent.parent
FILES = ("kvcache.py", "model.py", "specdec.py", "train_tiny.py")  # and the folder tests/


@dataclass(frozen=True)
class Mutant:
    id: str
    bug: str
    seen: str  # owner/repository#issue, or "-" for a slip that anyone can make
    file: str
    old: str
    new: str
    tests: str  # the files that should notice, the quickest first; -k and words choose among tests


RULE = "verify law"
LOOP = "decoding law"
CATALOGUE = [
    # -- A: acceptance
    Mutant("A1", "all guesses kept, whatever the coins say",
           "huggingface/transformers#28508", "specdec.py",
           "bernoulli(ratio.clamp(max=1), generator)",
           "(bernoulli(ratio.clamp(max=1), generator) | True)", RULE),
    Mutant("A2", "acceptance ratio upside down",
           "feifeibear/LLMSpeculativeSampling@9f5d2e5", "specdec.py",
           "target_x / draft_x, 0)[..., 0]", "draft_x / target_x, 0)[..., 0]", RULE),
    Mutant("A2b", "the same for blocks and trees",
           "feifeibear/LLMSpeculativeSampling@9f5d2e5", "specdec.py",
           "return torch.where(draft_x > 0, target_x / draft_x, 0)",
           "return torch.where(draft_x > 0, draft_x / target_x, 0)", "verify rules"),
    Mutant("A3", "guesses by argmax, judged as if sampled",
           "jaymody/speculative-sampling#3", "specdec.py",
           "categorical(draft_probs[-1], generator)[:, None]",
           "draft_probs[-1].argmax(-1)[:, None]", "law"),
    Mutant("A4", "no correction once a guess was accepted",
           "jaymody/speculative-sampling@803de30", "specdec.py",
           "F.pad(draft_probs, (0, 0, 0, 1))[row, n_accepted])",
           "F.pad(draft_probs, (0, 0, 0, 1))[row, n_accepted] * (n_accepted == 0)[:, None])", RULE),
    Mutant("A5", "the first guess is never judged", "ohdearquant/lattice#243", "specdec.py",
           "bernoulli(ratio.clamp(max=1), generator)",
           "(bernoulli(ratio.clamp(max=1), generator) | (torch.arange(ratio.shape[1]) == 0))",
           RULE),
    Mutant("A6", "tokens looked up from the prompt's end, not from the text's",
           "romsto/Speculative-Decoding@41668c8", "specdec.py",
           "where = self.length[:, None] + torch.arange(-n, 0,",
           'where = vars(self).setdefault("start", self.length.clone())[:, None] + '
           "torch.arange(-n, 0,", LOOP),
    Mutant("A7", "a guess is kept although an earlier one was rejected", "-", "specdec.py",
           "bernoulli(ratio.clamp(max=1), generator).cumprod(1)",
           "bernoulli(ratio.clamp(max=1), generator)", RULE),
    Mutant("A8", "u <= p: a token of probability 0 passes when u is 0", "-", "specdec.py",
           "return u < probs", "return u <= probs", "sampling"),
    Mutant("A9", "greedy where sampling was asked for", "sgl-project/sglang#31214", "specdec.py",
           "categorical(torch.where(mass > 0, residual / mass, target_n), generator)",
           "torch.where(mass > 0, residual / mass, target_n).argmax(-1)", RULE),
    Mutant("X9", "a token that nobody guessed may be accepted", "-", "specdec.py",
           "torch.where(draft_x > 0, target_x / draft_x, 0)[..., 0]",
           "torch.where(draft_x >= 0, target_x / draft_x, 0)[..., 0]", "verify rules"),
    Mutant("I8", "the last guess is never accepted",
           "hao-ai-lab/LookaheadDecoding@0e9f02d", "specdec.py",
           "bernoulli(ratio.clamp(max=1), generator).cumprod(1).sum(1)",
           "bernoulli(ratio.clamp(max=1), generator).cumprod(1).sum(1).clamp(max=max(0, "
           "draft_tokens.shape[1] - 1))", "verify decoding"),
    # -- B: residual
    Mutant("B1", "softmax of the residual instead of scaling it",
           "huggingface/transformers#28508", "specdec.py",
           "residual / mass, target_n", "residual.softmax(-1), target_n", RULE),
    Mutant("B2", "residual of the last row", "romsto/Speculative-Decoding@53922df", "specdec.py",
           "target_n = target_probs[row, n_accepted]", "target_n = target_probs[:, -1]", RULE),
    Mutant("B3", "correction from the target's distribution",
           "romsto/Speculative-Decoding@53922df", "specdec.py",
           "residual / mass, target_n", "target_n, target_n", RULE),
    Mutant("B4", "correction one row late", "openvinotoolkit/openvino.genai#4190", "specdec.py",
           "target_n = target_probs[row, n_accepted]",
           "target_n = target_probs[row, (n_accepted + 1).clamp(max=draft_tokens.shape[1])]", RULE),
    Mutant("B5", "only the rejected token taken out, not the draft's distribution",
           "xLLM-AI/xllm#2175", "specdec.py",
           "F.pad(draft_probs, (0, 0, 0, 1))[row, n_accepted])",
           "target_n * (F.pad(draft_tokens, (0, 1), value=-1)[row, n_accepted][:, None] == "
           "torch.arange(target_n.shape[1])))", RULE),
    Mutant("B6", "residual sent through the softmax once more",
           "feifeibear/LLMSpeculativeSampling@3505d00", "specdec.py",
           "categorical(torch.where(mass > 0, residual / mass, target_n), generator)",
           "categorical(to_probs(torch.where(mass > 0, residual / mass, target_n)), generator)",
           RULE),
    Mutant("B7", "the target's distribution damaged in place",
           "vllm-project/vllm-ascend#2881", "specdec.py",
           "target_n = target_probs[row, n_accepted]",
           "target_probs[:, :-1].scatter_(-1, x, 0)\n"
           "    target_n = target_probs[row, n_accepted]", RULE),
    Mutant("B8", "negative parts of the residual kept", "-", "specdec.py",
           "[row, n_accepted]).clamp(min=0)", "[row, n_accepted]).abs()", RULE),
    Mutant("B8b", "the same for blocks and trees", "-", "specdec.py",
           "left = (target_probs - draft_probs.clamp(min=0)).clamp(min=0)",
           "left = (target_probs - draft_probs).abs()", "verify rules"),
    # -- C: the draft's distribution is not the one drawn from
    Mutant("C1", "drawn with filters, reported without",
           "huggingface/transformers#47932", "specdec.py",
           "draft_probs.append(probs_of(logits[:, -1]))\n"
           "            tokens = categorical(draft_probs[-1], generator)",
           "draft_probs.append(to_probs(logits[:, -1]))\n"
           "            tokens = categorical(probs_of(logits[:, -1]), generator)",
           "law -k filters"),
    Mutant("C5", "target judged without filters", "vllm-project/vllm#9834", "specdec.py",
           "target_probs = probs_of(logits)\n\n", "target_probs = to_probs(logits)\n\n", LOOP),
    Mutant("C7", "drawn in bfloat16, judged in float", "deepseek-ai/DeepSpec#31", "specdec.py",
           "categorical(draft_probs[-1], generator)[:, None]",
           "categorical(draft_probs[-1].bfloat16(), generator)[:, None]", "law"),
    Mutant("C8", "drawn at another temperature", "mlx-node/mlx-node#11", "specdec.py",
           "categorical(draft_probs[-1], generator)[:, None]",
           "categorical(to_probs(draft_probs[-1].log(), 0.5), generator)[:, None]", "law"),
    Mutant("C12", "top-p of a distribution that is not scaled after top-k",
           "ml-explore/mlx-lm#388", "specdec.py",
           "    probs = logits.softmax(-1)\n",
           "    probs = logits.softmax(-1) * (1 if top_k is None else 0.9)\n", "sampling"),
    Mutant("C13", "top-p loses the token that reaches the mass", "-", "specdec.py",
           "mass_before >= max(top_p, 1e-37)", "best.cumsum(-1) > max(top_p, 1e-37)", "sampling"),
    Mutant("C14", "the mass before a token taken for the mass up to it, less its own",
           "huggingface/transformers#18976", "specdec.py",
           "F.pad(best.cumsum(-1), (1, -1))", "best.cumsum(-1) - best", "sampling"),
    Mutant("C15", "top-p before temperature", "-", "specdec.py",
           "mass_before = F.pad(best.cumsum(-1), (1, -1))",
           "cold = best**temperature\n"
           "        mass_before = F.pad((cold / cold.sum(-1, keepdim=True)).cumsum(-1), (1, -1))",
           "sampling"),
    Mutant("C16", "temperature ignored where top-k is given", "-", "specdec.py",
           "best, token = logits.topk(top_k)",
           "best, token = (logits * temperature).topk(top_k)", "sampling"),
    # -- D: bonus
    Mutant("D1", "bonus from the residual of the last guess", "SafeAILab/EAGLE#47", "specdec.py",
           "F.pad(draft_probs, (0, 0, 0, 1))[row, n_accepted])",
           "torch.cat((draft_probs, draft_probs[:, -1:]), 1)[row, n_accepted])", RULE),
    Mutant("D2", "the rejected guess stays in the draft's cache in place of the correction",
           "vllm-project/vllm#9730", "specdec.py",
           "torch.minimum(rows.length - 1, self.cache.length)",
           "torch.minimum(rows.length, self.cache.length)", "drafter decoding"),
    Mutant("D4", "no bonus after full acceptance", "ohdearquant/lattice#509", "specdec.py",
           "\n    n_new = rows.append(tokens, n_accepted + 1)",
           "\n    n_new = rows.append(tokens, (n_accepted + 1).clamp(max=max(1, "
           "guesses.shape[1])))", "decoding -k eos"),
    Mutant("D5", "the prompt's newest token is read twice",
           "Lightning-AI/litgpt#2307", "specdec.py",
           ": rows.length.max() - 1], cache)\n    cache.rollback(rows.length - 1)",
           ": rows.length.max()], cache)\n    cache.rollback(rows.length)", LOOP),
    # -- E: caches and positions
    Mutant("E1", "the draft never reads its own last guess", "vllm-project/vllm#5765", "specdec.py",
           "self.cache.rollback((rows.length - n).clamp(min=0))",
           "self.cache.length[:], n = rows.length - 1, 1", "drafter"),
    Mutant("E2", "the target forgets one token too few", "lablup/mlxcel#994", "specdec.py",
           "cache.rollback(rows.length - 1)\n    drafter.commit(rows, hidden)",
           "cache.rollback(torch.minimum(rows.length, cache.length))\n"
           "    drafter.commit(rows, hidden)", LOOP),
    Mutant("E2b", "the draft forgets one token too many", "lablup/mlxcel#994", "specdec.py",
           "torch.minimum(rows.length - 1, self.cache.length)",
           "torch.minimum(rows.length - 2, self.cache.length)", "drafter decoding"),
    Mutant("E4", "only the newest token is fed",
           "lucidrains/speculative-decoding@88641c0", "specdec.py",
           "return rows.newest(n)", "return rows.newest().expand(-1, n)", "drafter"),
    Mutant("E4b", "a short row of a batch is read from before its beginning", "-", "specdec.py",
           "start = (rows.length - n).clamp(min=0)",
           "start = rows.length - n", "decoding -k short_rows"),
    Mutant("E4c", "a row that has ended is read from before its beginning", "-", "specdec.py",
           "self.cache.rollback((rows.length - n).clamp(min=0))",
           "self.cache.rollback(rows.length - n)", "decoding -k ended_early"),
    Mutant("E5", "all guesses emitted, then the correction",
           "lucidrains/speculative-decoding#3", "specdec.py",
           "\n    n_new = rows.append(tokens, n_accepted + 1)",
           "\n    n_new = rows.append(tokens, 0 * n_accepted + tokens.shape[1])", LOOP),
    Mutant("E6", "the draft's cache is kept for the next prompt",
           "ggml-org/llama.cpp#27852", "specdec.py",
           "self.cache, self.rows = self.model.new_cache(*rows.tokens.shape), rows",
           'self.cache = vars(self).get("cache") or self.model.new_cache(*rows.tokens.shape)'
           "; self.rows = rows",
           "decoding -k another"),
    Mutant("E7", "the cache is emptied instead of rolled back", "paiml/aprender#2014", "specdec.py",
           "cache.rollback(rows.length - 1)\n    drafter.commit(rows, hidden)",
           "cache.rollback(0)\n    drafter.commit(rows, hidden)", LOOP),
    Mutant("E9", "the position moves by 1 a round", "huggingface/transformers#30042", "specdec.py",
           "cache.rollback(rows.length - 1)\n    drafter.commit(rows, hidden)",
           "cache.rollback(cache.length - guesses.shape[1])\n    drafter.commit(rows, hidden)",
           LOOP),
    Mutant("E11", "no rollback if only the last guess was rejected (k = 1)",
           "openvinotoolkit/openvino.genai#4190", "specdec.py",
           "cache.rollback(rows.length - 1)\n    drafter.commit(rows, hidden)",
           "cache.rollback(rows.length - 1 if k > 1 else cache.length)\n"
           "    drafter.commit(rows, hidden)", LOOP),
    Mutant("E17", "every guess at the same position", "vllm-project/vllm#26498", "specdec.py",
           "logits, _ = self.model(tokens, self.cache)\n",
           "self.cache.rollback(self.cache.length - bool(guesses))\n"
           "            logits, _ = self.model(tokens, self.cache)\n", "drafter decoding"),
    Mutant("E20", "positions start at 0 in every pass", "ml-explore/mlx-lm#93", "kvcache.py",
           "return self.positions, self.mask(self.slot[:S]",
           "return 0 * self.positions + self.slot[:T], self.mask(self.slot[:S]", "kvcache"),
    Mutant("E21", "mask aligned at the top left", "-", "kvcache.py",
           "self.slot[:S] <= self.positions[..., None]",
           "self.slot[:S] <= 0 * self.positions[..., None] + self.slot[:T, None]", "kvcache"),
    Mutant("E22", "all rows masked as if they were the longest", "-", "kvcache.py",
           "self.slot[:S] <= self.positions[..., None]",
           "self.slot[:S] <= self.positions.amax(0, keepdim=True)[..., None]", "kvcache"),
    Mutant("E22b", "the same where shapes are fixed", "-", "kvcache.py",
           "self.slot <= self.positions[..., None]",
           "self.slot <= self.positions.amax(0, keepdim=True)[..., None]", "kvcache"),
    Mutant("E23", "stale slots are masked, but NaN in them spreads", "-", "kvcache.py",
           "            self.kv[..., min(lengths) + T : S, :].masked_fill_(stale[:, None, :, "
           "None], 0)\n",
           "", "kvcache"),
    Mutant("E24", "one row's tokens written where the longest row's go", "-", "kvcache.py",
           "self.visible[layer][:, self.row, :, self.positions] = kv.permute(1, 3, 0, 2, 4)",
           "self.visible[layer][..., -kv.shape[3] :, :] = kv", "kvcache"),
    Mutant("E25", "a rollback to more than there is", "-", "kvcache.py",
           "((length < 0) | (length > self.length)).any()", "(length < 0).any()", "kvcache"),
    Mutant("E25b", "a rollback to less than nothing", "-", "kvcache.py",
           "((length < 0) | (length > self.length)).any()",
           "(length > self.length).any()", "kvcache"),
    Mutant("E26", "two views of one memory, each with a length of its own", "-", "kvcache.py",
           "vars(self).update(vars(cache))",
           "vars(self).update(vars(cache), length=cache.length.clone())", "kvcache"),
    Mutant("E27", "a cache made while decoding serves nobody else",
           "sgl-project/sglang#33470", "kvcache.py",
           "@torch.inference_mode(False)", "", "kvcache"),
    # -- F: where the output ends
    Mutant("F1", "only a round's last token is tested for EOS",
           "huggingface/transformers#47912", "specdec.py",
           "before_eos = torch.isin(tokens, self.eos).logical_not().cumprod(1).sum(1)",
           "last = tokens.gather(1, (n_new - 1).clamp(min=0)[:, None])[:, 0]\n"
           "            before_eos = torch.where(torch.isin(last, self.eos), n_new - 1, "
           "tokens.shape[1])", "decoding -k eos"),
    Mutant("F2", "EOS ends the round, not the row", "ggml-org/llama.cpp#28049", "specdec.py",
           "            self.end[:] = torch.where(before_eos < n_new, self.length + n_new, "
           "self.end)\n",
           "", "decoding -k eos"),
    Mutant("F5", "EOS among rejected guesses counts", "sgl-project/sglang#31599", "specdec.py",
           "torch.where(before_eos < n_new, self.length",
           "torch.where(before_eos < tokens.shape[1], self.length", "decoding -k eos"),
    Mutant("F7", "a round may exceed the budget", "huggingface/transformers#46993", "specdec.py",
           "n_new = torch.minimum(n, self.room())",
           "n_new = n * (self.room() > 0)\n"
           "        self.end[:] = self.end.maximum(self.length + n_new)",
           "decoding -k every_budget"),
    Mutant("F9", "guesses beyond the last position", "turboderp-org/exllamav2#274", "model.py",
           "            positions = positions.clamp(max=self.config.block_size - 1)\n",
           "", "decoding -k every_budget"),
    Mutant("F10", "only the target's context is checked", "vllm-project/vllm#57941", "specdec.py",
           "need(length <= n,", "need(True,", "decoding -k bad"),
    Mutant("F13", "guesses behind an accepted EOS are counted",
           "vllm-project/vllm#56101", "specdec.py",
           "self.accepted += torch.minimum(r.n_accepted, r.n_new)",
           "self.accepted += r.n_accepted", "decoding -k eos or count"),
    Mutant("F16", "the end token itself is not output", "-", "specdec.py",
           "torch.minimum(n_new, before_eos + 1)",
           "torch.minimum(n_new, before_eos)", "decoding -k eos"),
    Mutant("F17", "more guesses than there is room for", "-", "specdec.py",
           "n = min(k, rows.room().max().item())", "n = k", "decoding -k room"),
    Mutant("F14", "of several end tokens only one ends a row",
           "intel-analytics/ipex-llm#11896", "specdec.py",
           "torch.isin(tokens, self.eos)", "(tokens == self.eos[0])", "decoding -k end_tokens"),
    Mutant("F15", "short prompts get the budget of the longest text", "-", "specdec.py",
           "self.end, self.eos = self.length + max_new_tokens",
           "self.end, self.eos = self.length.max().expand_as(self.length) + max_new_tokens",
           "decoding -k ragged"),
    # -- G: random numbers
    Mutant("G1", "acceptance and correction share their noise",
           "vllm-project/vllm#54282", "specdec.py",
           "bernoulli(ratio.clamp(max=1), generator)",
           "bernoulli(ratio.clamp(max=1), generator and generator.clone_state())", "coins"),
    Mutant("G3", "reseeded in every round", "feifeibear/LLMSpeculativeSampling", "specdec.py",
           "n = min(k, rows.room().max().item())",
           "generator.manual_seed(0)\n        n = min(k, rows.room().max().item())", "coins"),
    Mutant("G3b", "one coin for all guesses", "feifeibear/LLMSpeculativeSampling", "specdec.py",
           "u = torch.rand(probs.shape, generator=generator, device=probs.device, "
           "dtype=torch.float64)\n"
           "    return u < probs",
           "u = torch.rand(probs.shape[:1] + (1,) * (probs.ndim - 1), generator=generator, "
           "device=probs.device, dtype=torch.float64)\n"
           "    return u < probs", "coins"),
    Mutant("G3c", "all guesses judged by the coin of the first",
           "feifeibear/LLMSpeculativeSampling", "specdec.py",
           "return u < probs", "return u[..., :1] < probs", "coins sampled_law"),
    Mutant("G4", "coins from the global generator", "vllm-project/vllm#6038", "specdec.py",
           "u = torch.rand(probs.shape, generator=generator, device=probs.device, "
           "dtype=torch.float64)\n"
           "    return u < probs",
           "u = torch.rand(probs.shape, device=probs.device, dtype=torch.float64)\n"
           "    return u < probs", "coins decoding"),
    Mutant("G6", "one generator for all calls", "NVIDIA/TensorRT-LLM#17599", "specdec.py",
           "generator = torch.Generator(rows.tokens.device).manual_seed(seed)",
           "generator = torch.Generator(rows.tokens.device).manual_seed(seed)\n"
           '    generator = vars(rounds).setdefault("generator", generator)', "coins"),
    Mutant("G7", "the seed is ignored", "vllm-project/vllm#13196", "specdec.py",
           ".manual_seed(seed)", ".manual_seed(1)", "coins"),
    Mutant("G8", "seed 0 means no seed", "feifeibear/LLMSpeculativeSampling", "specdec.py",
           "if seed is None else seed", "if not seed else seed", "coins"),
    Mutant("G9", "plain decoding draws from the global generator", "-", "specdec.py",
           "token = categorical(probs, generator)", "token = categorical(probs)", "coins law"),
    # -- H: rows of a batch
    Mutant("H2", "rows change places", "HabanaAI/vllm-fork#1780", "specdec.py",
           "cache.rollback(rows.length - 1)\n    drafter.commit(rows, hidden)",
           "cache.rollback((rows.length - 1).flip(0))\n    drafter.commit(rows, hidden)",
           "decoding"),
    Mutant("H4", "the newest token is read at the longest row's end",
           "lucidrains/speculative-decoding@ef0467c", "specdec.py",
           "where = self.length[:, None] + torch.arange(-n, 0,",
           "where = 0 * self.length[:, None] + self.length.max() + torch.arange(-n, 0,",
           "decoding"),
    Mutant("H5", "rows wait for the one that accepts least", "-", "specdec.py",
           "\n    n_new = rows.append(tokens, n_accepted + 1)",
           "\n    n_new = rows.append(tokens, n_accepted.min() + 0 * n_accepted + 1)",
           "decoding -k no_say"),
    Mutant("H6", "what is new is written at the longest row's end", "-", "specdec.py",
           "where = self.length[:, None] + torch.arange(tokens.shape[1],",
           "where = 0 * self.length[:, None] + self.length.max() + torch.arange(tokens.shape[1],",
           "decoding"),
    Mutant("H7", "the padding of short prompts stays in the cache", "-", "specdec.py",
           ": rows.length.max() - 1], cache)\n    cache.rollback(rows.length - 1)",
           ": rows.length.max() - 1], cache)", "decoding -k ragged"),
    Mutant("H8", "all prompts forgotten beyond the end of the shortest", "-", "specdec.py",
           ": rows.length.max() - 1], cache)\n    cache.rollback(rows.length - 1)",
           ": rows.length.max() - 1], cache)\n    cache.rollback(rows.length.min() - 1)",
           "decoding -k ragged"),
    # -- X: the block rule and the coupled rule
    Mutant("X1", "the block rule stops at the first no", "-", "specdec.py",
           "n_accepted = (yes * torch.arange(len(weights), device=yes.device)).amax(1)",
           "n_accepted = yes[:, 1:].cumprod(1).sum(1)", "rules"),
    Mutant("X2", "the block rule with the token rule's residual", "-", "specdec.py",
           "residual(at(weighted, n_accepted),", "residual(at(target_probs, n_accepted),", "rules"),
    Mutant("X3", "block weights that exceed 1", "-", "specdec.py",
           "r.clamp(max=1e30)).clamp(max=1))", "r.clamp(max=1e30)))", "rules"),
    Mutant("X4", "block: a broken guess bends the distribution before it", "-", "specdec.py",
           "draft_probs.nan_to_num(0)", "draft_probs", "rules"),
    Mutant("P10", "the block rule takes NaN for a yes", "vllm-project/vllm#53029", "specdec.py",
           "weight >= 1, 1, mass / (mass + 1 - weight)",
           "weight < 1, mass / (mass + 1 - weight), 1", "rules verify"),
    Mutant("X5", "noise by round, not by position", "-", "specdec.py",
           "(self.rows.length - self.start)[:, None] + ahead",
           "0 * self.start[:, None] + ahead", "rules"),
    Mutant("X6", "all rows share their noise", "-", "specdec.py",
           "at(self.log_u.transpose(0, 1),",
           "at(self.log_u[:, :1].expand(-1, len(position), -1).transpose(0, 1),", "rules"),
    Mutant("X7", "the draft draws with noise of its own", "-", "specdec.py",
           "token = self.draw(probs,",
           "draw = (lambda p, _: categorical(p)) if logits.ndim == 2 else self.draw\n"
           "        token = draw(probs,", "rules"),
    Mutant("X8", "a coupled guess judged by the rejection rule as well", "-", "specdec.py",
           "        return torch.zeros_like(probs).scatter_(-1, token[..., None], "
           "1.0).view(logits.shape)",
           "        if logits.ndim == 3:\n            return probs\n"
           "        return torch.zeros_like(probs).scatter_(-1, token[..., None], "
           "1.0).view(logits.shape)", "rules"),
    Mutant("X11", "guesses are drawn with the noise of the next position", "-", "specdec.py",
           "(self.ahead, self.ahead + 1) if logits.ndim == 2",
           "(self.ahead + 1, self.ahead + 1) if logits.ndim == 2", "rules"),
    Mutant("X12", "after each round guesses are drawn with noise further ahead", "-", "specdec.py",
           "else (0, 0)\n", "else (0, self.ahead)\n", "rules"),
    # -- Q: graphs
    Mutant("Q1", "a graph writes to memory that the next replay does not read", "-", "kvcache.py",
           "self.kv.unbind(1), None\n        self.length += T",
           "self.kv.unbind(1), None\n        self.length = self.length + T", "graphs"),
    Mutant("Q3", "every replay with the coins of the first", "-", "model.py",
           "        graph.register_generator_state(generator)\n", "        pass\n", "graphs"),
    Mutant("Q4", "a replay overwrites what the last one returned", "-", "model.py",
           "x.clone() if isinstance(x, torch.Tensor) else x for x in recorded",
           "x for x in recorded", "graphs"),
    Mutant("Q5", "every replay goes on from the position of the first", "-", "specdec.py",
           "self.length += n_new", "self.length = self.length + n_new", "graphs"),
    Mutant("Q6", "numbers copied from the host inside a graph", "-", "specdec.py",
           "torch.arange(-n, 0, device=self.length.device)",
           "torch.tensor(range(-n, 0), device=self.length.device)", "graphs"),
    Mutant("Q7", "with fixed shapes heads read too little", "-", "specdec.py",
           "drafter.n_unread, drafter.always = k + 1, True",
           "drafter.n_unread, drafter.always = k, True", "graphs"),
    Mutant("Q7b", "with fixed shapes a draft model never reads its own last guess",
           "-", "specdec.py",
           "(rows.length - 2).clamp(min=0)) or rows.newest(2)",
           "(rows.length - 1).clamp(min=0)) or rows.newest(1)", "graphs"),
    Mutant("Q8", "to record a graph is part of a round's time", "-", "tests/bench.py",
           "(1 if self.in_parts else 2)", "1", "bench -k graph"),
    Mutant("Q9", "heads that stop by confidence in a graph", "-", "specdec.py",
           "known = type(drafter) in (type(None), ModelDrafter, NGramDrafter, HeadsDrafter)",
           "known = isinstance(drafter, (type(None), ModelDrafter, NGramDrafter, HeadsDrafter))",
           "graphs -k not_replayed"),
    Mutant("Q9b", "a reader's own rule in a graph", "-", "specdec.py",
           "known and rule in RULES.values()", "known", "graphs -k not_replayed"),
    Mutant("Q10", "two living graphs recorded on one stream", "pytorch/pytorch#193402", "model.py",
           "_spare.pop() if _spare else torch.cuda.Stream()", "None", "graphs"),
    Mutant("Q11", "the buffers of a graph belong to whoever starts the drafter next",
           "-", "specdec.py",
           "drafter = copy(self.drafter)",
           "drafter = self.drafter", "graphs -k another_generation"),
    Mutant("Q12", "a lookup inside a graph asks whether there is a match", "-", "specdec.py",
           "drafter.n_unread, drafter.always = k + 1, True",
           "drafter.n_unread, drafter.always = k + 1, False", "graphs"),
    # -- J: n-gram lookup
    Mutant("J2", "the last tokens match themselves", "-", "specdec.py",
           "(end < length[:, None])", "(end <= length[:, None])", "drafter"),
    Mutant("J3", "guesses from behind the end of the text", "-", "specdec.py",
           "torch.arange(k, device=text.device) % (length - found)[:, None]",
           "torch.arange(k, device=text.device) + 0 * found[:, None]", "drafter"),
    Mutant("J4", "the shortest match wins", "-", "specdec.py",
           "for n in range(1, min(self.max_n, text.shape[1]) + 1):",
           "for n in range(min(self.max_n, text.shape[1]), 0, -1):", "drafter"),
    Mutant("J5", "a lookup that found nothing still guesses",
           "openvinotoolkit/openvino.genai#2331", "specdec.py",
           "(probs & guess[..., None]).float()", "probs.float()", "drafter"),
    Mutant("P9b", "a lookup for rows that have ended", "-", "specdec.py",
           "((found > 0) & (rows.room() > 0))", "(found > 0)", "drafter"),
    # -- I: trees
    Mutant("I2", "the best tokens judged as if they were sampled",
           "NVIDIA/TensorRT-LLM#15098", "specdec.py",
           "level.append((categorical(probs, generator), probs))",
           "level.append((categorical(probs, generator), probs_of(logits) if self.top else "
           "probs))", "law -k trees"),
    Mutant("I3", "the second sibling judged against the whole distribution",
           "SafeAILab/EAGLE#74", "specdec.py",
           "left[:, above:first] = residual(R, draft)", "pass", "tree"),
    Mutant("I3b", "without replacement, but not scaled to what is left",
           "SafeAILab/EAGLE#171", "specdec.py",
           "level.append((categorical(probs, generator), probs))",
           "level.append((categorical(probs, generator), probs * mass if level else probs))",
           "law -k trees"),
    Mutant("I3c", "siblings drawn with replacement", "-", "specdec.py",
           "probs, logits = probs.scatter(-1, x, 0), logits",
           "probs, logits = probs, logits", "tree"),
    Mutant("I4", "the accepted path is cut off, not gathered",
           "sgl-project/sglang#15360", "kvcache.py",
           "start + path]", "start + self.cache.slot[:n]]", "tree"),
    Mutant("I6", "a causal mask inside the tree", "vllm-project/vllm#17560", "kvcache.py",
           "sees = self.tree[:,", "sees = torch.ones_like(self.tree).tril(M - T)[:,", "tree"),
    Mutant("I7", "siblings at positions one after the other", "-", "kvcache.py",
           "return root + self.tree.sum(1) - 1,",
           "return root + self.cache.slot[M - T : M],", "tree"),
    Mutant("I7b", "nodes of a tree one position too late", "-", "kvcache.py",
           "return root + self.tree.sum(1) - 1,", "return root + self.tree.sum(1),", "tree"),
    Mutant("I9", "a younger sibling is accepted beside its elder", "-", "specdec.py",
           "chosen = yes & (yes.cumsum(2) == 1)", "chosen = yes", "tree"),
    Mutant("I9b", "a node is accepted, its parent is not", "-", "specdec.py",
           "(accepted[-1][..., None] & chosen).flatten(1)", "chosen.flatten(1)", "tree"),
    Mutant("I10", "the draft keeps the tree as it was", "-", "specdec.py",
           "TreeView(self.drafter.cache, tree[1:n, 1:n]).keep(path[:, 1:-1] - 1)", "pass", "tree"),
    Mutant("I10b", "after a tree the draft reads the whole text again", "-", "specdec.py",
           "TreeView(self.drafter.cache, tree[1:n, 1:n]).keep(path[:, 1:-1] - 1)",
           "self.drafter.cache.rollback(0)", "tree"),
    Mutant("I10c", "the draft forgets the deepest node that it has read", "-", "specdec.py",
           ".keep(path[:, 1:-1] - 1)", ".keep(path[:, 1:-2] - 1)", "tree"),
    Mutant("I10d", "the draft keeps nodes of the path that were rejected", "-", "specdec.py",
           ".keep(path[:, 1:-1] - 1)\n        self.drafter.commit(rows, hidden)",
           ".keep(path[:, 1:-1] - 1)", "tree"),
    Mutant("I11", "in a ragged batch the tree begins at the longest row's end", "-", "kvcache.py",
           "root = self.cache.length[:, None] - M",
           "root = 0 * self.cache.length[:, None] + self.cache.length.max() - M", "tree"),
    Mutant("I12", "slots behind the tree are taken for its last node", "-", "kvcache.py",
           "| sees & (node < M)[:, None]", "| sees", "tree"),
    Mutant("I13", "nodes do not see the text before the tree", "-", "kvcache.py",
           "visible = (node < 0)[:, None] | sees & (node < M)[:, None]",
           "visible = sees & (node >= 0)[:, None] & (node < M)[:, None]", "tree"),
    Mutant("I14", "an accepted path is kept without its last node", "-", "kvcache.py",
           "self.cache.length.copy_(start[:, 0] + n)",
           "self.cache.length.copy_(start[:, 0] + n - 1)", "tree"),
    Mutant("I15", "siblings and the token after them share their noise", "-", "specdec.py",
           "yes = bernoulli(torch.stack(chances, 2), generator)",
           "yes = bernoulli(torch.stack(chances, 2), generator and generator.clone_state())",
           "coins"),
    Mutant("I16", "a round of a tree reports the distributions of other nodes", "-", "specdec.py",
           "at(draft_probs, path[:, 1:] - 1)", "draft_probs[:, : path.shape[1] - 1]", "tree"),
    Mutant("I16b", "a round of a tree reports what the target says after other nodes",
           "-", "specdec.py",
           "at(target_probs, path), n_accepted",
           "target_probs[:, : path.shape[1]], n_accepted", "tree"),
    Mutant("I17", "a tree made while decoding serves nobody else",
           "sgl-project/sglang#33470", "specdec.py",
           "@torch.inference_mode(False)\n", "", "tree"),
    # -- P: heads
    Mutant("P1", "heads read each token with the state after it", "-", "specdec.py",
           "where[..., None].expand_as(hidden)",
           "(where[..., None] - 1).expand_as(hidden)", "drafter"),
    Mutant("P1d", "heads see the values of the token after", "-", "specdec.py",
           "self.target_cache, where - 1)", "self.target_cache, where)", "drafter"),
    Mutant("P1e", "heads see layers that they were not trained on", "-", "model.py",
           "return slice(third, None, third)",
           "return slice(third - 1, n_layer - 1, third)", "drafter"),
    Mutant("P1f", "heads see the states of a tree before its path is known", "-", "specdec.py",
           "drafter.commit(rows, at(hidden, path), tree, path)",
           "drafter.commit(rows, hidden, tree, path)", "drafter"),
    Mutant("P1b", "heads keep what they read with states of their own", "-", "specdec.py",
           "torch.minimum(self.length, self.cache.length)",
           "torch.minimum(rows.length - 1, self.cache.length)", "drafter"),
    Mutant("P1g", "heads read the whole text again in every round", "-", "specdec.py",
           "torch.minimum(self.length, self.cache.length)", "0", "drafter"),
    Mutant("P1h", "heads look at what others have left in the target's cache", "-", "specdec.py",
           "        where = where.minimum(rows.length[:, None] - 1)\n", "", "drafter"),
    Mutant("P1k", "before the first token heads see the state of the last", "-", "specdec.py",
           "states.masked_fill(where[..., None] == 0, 0)", "states", "drafter"),
    Mutant("P1l", "heads go on from the state of a repetition", "-", "specdec.py",
           "state, self.newest = at(state, self.newest)[:, None], None",
           "state, self.newest = state[:, -1:], None", "drafter"),
    Mutant("P1c", "in training a chain sees its neighbours", "-", "train_tiny.py",
           "own = (t == t[:, None])", "own = (t <= t[:, None])", "training -k heads"),
    Mutant("P2", "nodes of a tree continue another node's state", "-", "specdec.py",
           "self.state.repeat_interleave(n_children, 1)",
           "self.state.repeat(1, n_children, 1)", "tree law"),
    Mutant("P3", "the length is chosen by the guess in question", "-", "specdec.py",
           "            guesses.append(tokens)\n",
           "            if (tokens == 0).all():\n"
           "                none, probs = tokens[:, :0], [p[:, None] for p in draft_probs]\n"
           "                return torch.cat([none, *guesses], 1), torch.cat([probs.pop()[:, "
           ":0], *probs], 1)\n"
           "            guesses.append(tokens)\n", "law"),
    Mutant("P4", "heads of another target are taken", "-", "model.py",
           "right = whose == fingerprint(target)", "right = True", "model"),
    Mutant("P4b", "a target is known by the embedding of one token", "-", "model.py",
           "weight = model.wte.weight.detach()", "weight = model.wte.weight[:1].detach()", "model"),
    Mutant("P5", "confidence that ignores what came before", "-", "tests/extras.py",
           "survival = survival * chance", "survival = chance", "drafter"),
    Mutant("P9", "rows that have ended decide how much is guessed", "-", "tests/extras.py",
           "(rows.room() > 0).double()", "(rows.room() >= 0).double()", "decoding -k no_say"),
    Mutant("P6", "heads learn the distribution one token too late", "-", "train_tiny.py",
           "logits_of(states[row, start + i - 1], wte)",
           "logits_of(states[row, start + i], wte)", "training -k heads"),
    # -- P: k chosen by the clock
    Mutant("P7", "auto: plain decoding is no choice, whatever guessing loses", "-", "specdec.py",
           "len(self.plain) >= 3 and self.credit > 0", "len(self.plain) >= 3", "decoding -k auto"),
    Mutant("P7b", "auto: the fastest row of a batch is counted, not the slowest", "-", "specdec.py",
           "time.perf_counter(), rows.room().max().item()",
           "time.perf_counter(), rows.room().min().item()", "decoding -k auto"),
    Mutant("P7d", "auto: the tokens of all rows are added up", "-", "specdec.py",
           "time.perf_counter(), rows.room().max().item()",
           "time.perf_counter(), rows.room().sum().item()", "decoding -k auto"),
    Mutant("P7c", "auto: a round may take twice as long as its tokens are worth", "-", "specdec.py",
           "gain = tokens - seconds", "gain = tokens - seconds / 2", "decoding -k auto"),
    Mutant("P8", "auto: what was won once can be lost for ever after", "-", "specdec.py",
           "min(6.0, self.credit + max(-2.0, gain))",
           "self.credit + max(-2.0, gain)", "decoding -k auto or slow"),
    Mutant("P8b", "auto: one slow round ends guessing", "-", "specdec.py",
           "max(-2.0, gain)", "gain", "decoding -k slow"),
    Mutant("P8h", "auto: one slow plain round is a reason to guess", "-", "specdec.py",
           "statistics.median(self.plain[-9:])",
           "statistics.mean(self.plain[-9:])", "decoding -k slow"),
    Mutant("P8j", "auto: the first plain rounds set the price for ever", "-", "specdec.py",
           "self.plain[-9:]", "self.plain", "decoding -k auto or slow"),
    Mutant("P8c", "auto: never tries again", "-", "specdec.py",
           "self.credit += 0.01", "pass", "decoding -k auto or slow"),
    Mutant("P8d", "auto: after a vain try the next one comes at once", "-", "specdec.py",
           "self.credit += 0.01", "self.credit += 1", "decoding -k auto"),
    Mutant("P8f", "auto: one unlucky round ends guessing", "-", "specdec.py",
           "NoDrafter(), 4, 3.0", "NoDrafter(), 4, 0.01", "decoding -k auto or unlucky"),
    Mutant("P8g", "auto: k never grows", "-", "specdec.py",
           "self.k += 2 if tokens > n", "self.k += 0 if tokens > n", "decoding -k auto"),
    Mutant("P8i", "auto: k never shrinks", "-", "specdec.py",
           "if tokens > n else -1", "if tokens > n else 0", "decoding -k auto"),
    Mutant("P11", "auto: drafters hear nothing of rounds without guesses", "-", "specdec.py",
           'rows) is rows, "in use by another generation")\n',
           'rows) is rows, "in use by another generation")\n        if self.last[0] > 0:\n    ',
           "decoding -k auto"),
    Mutant("P12", "auto: a drafter in use is not noticed where nothing is guessed", "-",
           "specdec.py", "getattr(self.drafter, \"rows\", rows) is rows", "True",
           "decoding -k in_use"),
    Mutant("P12b", "a drafter in use is not noticed", "Mac-MLX#68", "specdec.py",
           'generation")\n        n = (rows.length',
           'generation") if 0 else 0\n        n = (rows.length',
           "decoding -k in_use"),
    Mutant("P12c", "heads in use are not noticed", "Mac-MLX#68", "specdec.py",
           'need(rows is self.rows, "this drafter is in use by another generation")\n'
           "        n = self.n_unread", "n = self.n_unread", "decoding -k in_use"),
    # -- K: numbers
    Mutant("K2", "an empty residual is divided by zero", "youssofal/MTPLX#82", "specdec.py",
           "torch.where(mass > 0, residual / mass,",
           "torch.where(~(mass <= -1), residual / mass,", RULE),
    Mutant("K2b", "`<= 0` is False for NaN", "youssofal/MTPLX#82", "specdec.py",
           "torch.where(mass > 0, residual / mass,",
           "torch.where(~(mass <= 0), residual / mass,", RULE),
    Mutant("K2c", "the same for blocks and trees", "youssofal/MTPLX#82", "specdec.py",
           "torch.where(mass > 0, left / mass,",
           "torch.where(~(mass <= 0), left / mass,", "verify rules"),
    Mutant("K5", "division by a tiny temperature overflows", "anarchy-ai/LLM-VM#239", "specdec.py",
           "(logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-37)",
           "logits / max(temperature, 1e-37)", "sampling"),
    Mutant("K5b", "a temperature that is 0 in float32", "-", "specdec.py",
           "/ max(temperature, 1e-37)", "/ temperature", "sampling"),
    Mutant("K5c", "a top-p that is 0 in float32 keeps no token", "-", "specdec.py",
           "mass_before >= max(top_p, 1e-37)", "mass_before >= top_p", "sampling"),
    Mutant("K6", "distributions in the model's bfloat16", "-", "specdec.py",
           "logits = logits if logits.dtype == torch.float64 else logits.float()",
           "logits = logits", "sampling"),
    Mutant("K7", "u = 0 lets any token win the race", "-", "specdec.py",
           "    log_u = u.log_().clamp_(min=-1e3)", "    log_u = u.log_()", "sampling"),
    Mutant("K7b", "the same in the table of the coupled rule", "-", "specdec.py",
           "self.log_u = u.log_().clamp_(min=-1e3)", "self.log_u = u.log_()", "coins rules"),
    Mutant("K8", "temperatures under .001 count as greedy", "-", "specdec.py",
           "if temperature == 0:", "if temperature < 1e-3:", "sampling"),
    Mutant("K9", "the table of the coupled rule in float32", "-", "specdec.py",
           "device=generator.device, dtype=torch.float64)",
           "device=generator.device, dtype=torch.float32)", "rules"),
    Mutant("K10", "among rare tokens the race is run in float32", "-", "specdec.py",
           "dtype=torch.float64)\n    log_u", "dtype=torch.float32)\n    log_u", "sampling"),
    Mutant("K10b", "coins in float32: 1e-12 comes up at 2^-24",
           "vllm-project/vllm-ascend#13470", "specdec.py",
           "dtype=torch.float64)\n    return u", "dtype=torch.float32)\n    return u", "sampling"),
    Mutant("K11", "to draw damages the probabilities", "-", "specdec.py",
           "    return (-log_u / probs).argmin(-1)\n\nclass Rows",
           "    return probs.reciprocal_().mul_(-log_u).argmin(-1)\n\nclass Rows", "sampling"),
    Mutant("L1", "tokenizers are not compared", "sgl-project/sglang#24051", "model.py",
           "(e._mergeable_ranks, e._pat_str) for e", "e._pat_str for e", "model -k tokenizers"),
    Mutant("L1d", "the patterns of tokenizers are not compared", "-", "model.py",
           "(e._mergeable_ranks, e._pat_str) for e", "e._mergeable_ranks for e",
           "model -k tokenizers"),
    Mutant("L1b", "vocabularies are not compared", "ggml-org/llama.cpp#3812", "specdec.py",
           "need(ours == V,", "need(True,", "decoding -k bad"),
    Mutant("L1c", "a tokenizer without tokens for all embeddings",
           "karpathy/build-nanogpt#81", "model.py",
           "encoding.n_vocab == model", "encoding.n_vocab <= model", "model"),
    Mutant("L2", "checksums are not looked at", "-", "model.py",
           "need(not file.testzip(),", "need(True,", "model"),
    Mutant("L3", "weights in 8 bits are cut off, not rounded", "-", "model.py",
           "ldexp(-exponent).round()", "ldexp(-exponent)", "model"),
    Mutant("L4", "an exponent that int8 cannot hold", "-", "model.py",
           ".clamp(min=-24)", "", "model"),
    Mutant("L5", "a largest code of 128, which wraps to -128", "-", "model.py",
           "/ 127.5)", "/ 128)", "model"),
    Mutant("L6", "the old file is deleted before the new one takes its name", "-", "model.py",
           "os.replace(new, path)",
           "Path(path).unlink(missing_ok=True)\n        os.replace(new, path)", "model"),
    Mutant("L7", "new weights do not reach what a packed model multiplies with", "-", "model.py",
           "        self.register_load_state_dict_post_hook(lambda module, keys: "
           "module.pack())\n",
           "", "model"),
    # -- U: what a user can mend
    Mutant("U1", "mistakes of ours are shown as the user's", "-", "specdec.py",
           "except (BadInput, UnicodeError, OSError)", "except (ValueError, OSError)",
           "command_line -k of_nothing_else"),
    Mutant("U2", "numbers are checked after the pair is loaded", "-", "specdec.py",
           "    check_numbers(n, args.temperature or 0, args.top_k, args.top_p, args.seed)\n", "",
           "command_line -k before"),
    Mutant("U3", "any batch fits into memory", "-", "model.py",
           "need(wanted < free,", "need(True,", "decoding -k memory"),
    Mutant("U4", "advice to make a pair in another folder", "-", "model.py",
           "train_tiny.py --checkpoints {Path(path).parent}` {makes}",
           "train_tiny.py` {makes}", "model -k missing"),
    Mutant("U5", "an unfinished run in the folder is not mentioned", "-", "model.py",
           '.with_name("partial.pt").exists()', '.with_name("nothing").exists()',
           "model -k missing"),
    Mutant("U6", "a closed standard output is a traceback", "-", "specdec.py",
           'need(sys.stdout, "standard output is closed")', "pass", "command_line -k shell"),
    Mutant("U7", "-inf in a draft makes its residual infinite", "-", "specdec.py",
           "target_probs - draft_probs.clamp(min=0)", "target_probs - draft_probs", "rules"),
    Mutant("U8", "-inf in a draft makes a block accept what is impossible", "-", "specdec.py",
           "nan_to_num(0).clamp(min=0)", "nan_to_num(0)", "rules law"),
    # -- the model, the figures, the training
    Mutant("M1", "GELU in its exact form", "-", "model.py",
           'approximate="tanh"', 'approximate="none"', "model"),
    Mutant("M2", "heads and values in another order than GPT-2's", "-", "model.py",
           "view(B, T, 3, self.n_head, D // self.n_head)\n"
           "        qkv = qkv.permute(2, 0, 3, 1, 4)",
           "view(B, T, self.n_head, 3, D // self.n_head)\n"
           "        qkv = qkv.permute(3, 0, 2, 1, 4)", "model"),
    Mutant("N1", "acceptance rate over guesses that nobody judged", "-", "specdec.py",
           "lambda self: self.accepted / max(1, self.evaluated)",
           "lambda self: self.accepted / max(1, self.drafted)",
           "decoding -k count or eos or estimates"),
    Mutant("N2", "the figure tau counts only accepted guesses", "-", "specdec.py",
           "lambda self: self.emitted / max(1, self.rounds)",
           "lambda self: self.accepted / max(1, self.rounds)", "decoding -k count"),
    Mutant("N12", "the expected acceptance rate counts guesses that nobody judged",
           "-", "specdec.py",
           "overlap[is_judged].sum()", "overlap.sum()", "decoding -k estimates"),
    Mutant("N13", "guesses for rows that have ended are counted", "-", "specdec.py",
           "sum(1) * (self.n_new > 0)", "sum(1)", "decoding -k count or eos"),
    Mutant("N14", "the expected tau without the token that the rule adds", "-", "specdec.py",
           "for i in range(k + 1))", "for i in range(1, k + 1))", "theory"),
    Mutant("N6", "plain decoding reports no distributions", "-", "specdec.py",
           "yield Round(token[:, :0], probs[:, :0], probs,",
           "yield Round(token[:, :0], probs[:, :0], 0 * probs,", "law -k plain_decoding"),
    Mutant("N3", "rows of a table that decode in alternation share a drafter",
           "-", "tests/bench.py",
           "copy(self.drafter)", "self.drafter", "bench -k alternation"),
    Mutant("N4", "a table ends in the middle of its prompts", "-", "tests/bench.py",
           "turn % cycle == 0 < turn", "0 < turn", "bench -k alternation or every_prompt"),
    Mutant("N7", "quartiles are the 40th and 60th percentile", "-", "tests/bench.py",
           "[0.5, 0.25, 0.75]", "[0.5, 0.4, 0.6]", "bench -k quartiles"),
    Mutant("N8", "the check looks at plain decoding only", "-", "tests/check.py",
           "= drafter, k, rule\n", "= None, k, rule\n", "bench -k check"),
    Mutant("N9", "the check samples by the rejection rule, whatever --rule says",
           "-", "tests/check.py",
           "drafter, k, rule, seed=seed", 'drafter, k, "rejection", seed=seed', "bench -k check"),
    Mutant("N10", "the check's exit status is 0, whatever it found", "-", "tests/check.py",
           "return int(not check(", "return 0 * (not check(", "bench -k check"),
    Mutant("N11", "every rule is taken for an exact one", "-", "tests/options.py",
           "return error.abs().max().item() < 1e-9",
           "return error.abs().max().item() < 9", "bench -k exact"),
    Mutant("T1", "a resumed run sees the first batches again", "-", "train_tiny.py",
           '            generator.set_state(self.state["generator"])\n', "",
           "training -k ctrl_c_loses"),
    Mutant("T2", "distillation changes the undistilled draft kept for the report",
           "-", "train_tiny.py",
           'train("distil", deepcopy(tiny))', 'train("distil", tiny)', "training -k writes_a_pair"),
    Mutant("T3", "held-out texts are trained on", "-", "train_tiny.py",
           "(train if zlib.crc32(os.fsencode(name)) % 20 else held_out).append(text)",
           "train.append(text)\n"
           "        held_out += [text] * (zlib.crc32(os.fsencode(name)) % 20 == 0)",
           "training -k split"),
    Mutant("T4", "an end that was interrupted belongs to another run", "-", "train_tiny.py",
           '("heads", "large", "tiny")', '("tiny", "large", "heads")', "training -k end_that"),
    Mutant("T5", "the layers that a model grows speak before they have learnt",
           "-", "train_tiny.py",
           "            c_proj.bias.zero_()\n", "", "training -k grown"),
    Mutant("T6", "a resumed run warms up again", "-", "train_tiny.py",
           "min((step + 1) / warm_up,", "min((step - first + 1) / warm_up,",
           "training -k warms_up"),
    Mutant("T7", "held-out texts train the tokenizer", "-", "train_tiny.py",
           "train_tokenizer(texts, preset",
           "train_tokenizer(texts + held_out_texts, preset", "training -k nothing_else"),
    Mutant("T8", "what large writes after held-out text follows training text",
           "-", "train_tiny.py",
           "held_out_own = write(large, held_out,",
           "held_out_own = write(large, tokens,", "training -k nothing_else"),
    Mutant("T9", "held-out loss of a few windows instead of all", "-", "train_tiny.py",
           "return losses.mean(1), alphas.mean(1)",
           "return losses[:, :4].mean(1), alphas.mean(1)", "training -k measured"),
    Mutant("T10", "tiny is distilled at temperature 2", "-", "train_tiny.py",
           "target_logits = logits_of(states[:, :-1], wte)",
           "target_logits = logits_of(states[:, :-1], wte) / 2", "training -k figures"),
    Mutant("T11", "the text's own token in the loss of heads is one too early",
           "-", "train_tiny.py",
           "agreement_loss(logits, target_logits, next_tokens.flatten())",
           "agreement_loss(logits, target_logits, windows[row, start + i - 1].flatten())",
           "training -k figures"),
    Mutant("T12", "the text's own token in the loss of tiny is one too early", "-", "train_tiny.py",
           "next_tokens = windows[:, 1:].flatten()",
           "next_tokens = windows[:, :-1].flatten()", "training -k figures"),
    Mutant("T13", "the confidence's gradient goes into the state", "-", "train_tiny.py",
           "heads.confidence(state.detach())", "heads.confidence(state)",
           "training -k confidence"),
    Mutant("T14", "--distill is resumed although tiny.pt is another", "-", "train_tiny.py",
           "[fingerprint(large), fingerprint(tiny)]", "[fingerprint(large)]",
           "training -k end_that"),
    Mutant("T15", "the steps that are timed train the model itself", "-", "train_tiny.py",
           "copy, generator = deepcopy(model), torch.Generator()",
           "copy, generator = model, torch.Generator()", "training -k seeds"),
    Mutant("T16", "the steps that are timed draw from what comes later", "-", "train_tiny.py",
           "fork_rng(devices=[])", "fork_rng(enabled=False)", "training -k seeds"),
    Mutant("T17", "Ctrl-C breaks off the saving of a stage that is finished", "-", "train_tiny.py",
           '            self.state["finished"][stage] = model.state_dict()\n'
           "            self.save()\n        if pressed",
           '        self.state["finished"][stage] = model.state_dict()\n'
           "        self.save()\n        if pressed", "training -k ctrl_c_loses"),
    Mutant("T18", "Ctrl-C breaks off the saving of a batch of texts", "-", "train_tiny.py",
           "            with uninterrupted() as pressed:\n                written",
           "            pressed = False\n            if not pressed:\n                written",
           "training -k ctrl_c_loses"),
    Mutant("T19", "Ctrl-C leaves a new large.pt beside the old tiny.pt", "-", "train_tiny.py",
           "    with uninterrupted():\n", "    if True:\n", "training -k end_that"),
    Mutant("T20", "partial.pt is said to be kept where there is none", "-", "train_tiny.py",
           "is kept\" if partial.exists() else", "is kept\" if True else",
           "training -k before_anything"),
    Mutant("T21", "the time left is that of the stage", "-", "train_tiny.py",
           "(self.total - self.done) + self.later", "(self.total - self.done)",
           "training -k time_left"),
    Mutant("T22", "a stage itself counts among the later ones", "-", "train_tiny.py",
           "later = stages[stages.index(stage) + 1 :]", "later = stages[stages.index(stage) :]",
           "training -k expected"),
    Mutant("T23", "the tokenizer sees the beginning of the corpus only", "-", "train_tiny.py",
           "for i in range(0, len(text), step))", "for i in range(0, len(text), 2000))",
           "training -k whole_corpus"),
    Mutant("T24", "texts run into each other", "-", "train_tiny.py",
           "tokens += text + [encoding.eot_token]", "tokens += text",
           "training -k separator"),
    Mutant("T25", "tokens, not windows, count as independent", "-", "train_tiny.py",
           "alphas.std(1) / len(windows) ** 0.5", "alphas.std(1) / windows.numel() ** 0.5",
           "training -k measured"),
    Mutant("T26", "large writes nothing at temperature 0", "-", "train_tiny.py",
           "float(i % 3 < 2)", "1.0", "training -k nothing_else"),
    Mutant("T27", "the learning rate stays high", "-", "train_tiny.py",
           "(1 + math.cos(math.pi * step / steps)) / 2", "1.0", "training -k warms_up"),
    Mutant("T28", "an empty --data means the current folder", "-", "train_tiny.py",
           'need(path != "",', "need(True,", "training -k bad_corpus"),
]  # fmt: skip
FAST = ("A2", "B3", "E1", "F1", "G1", "X2", "I4")  # one of each kind, for the ordinary test command


def patched(mutant):
    """The source of the mutant's file with the bug in it.

    ValueError: the patch does not apply exactly once.
    """
    source = (ROOT / mutant.file).read_text(encoding="utf-8")
    n = source.count(mutant.old)
    if n != 1:
        raise ValueError(f"mutant {mutant.id}: its text occurs {n} times in {mutant.file}")
    return source.replace(mutant.old, mutant.new)


def caught_by(mutant):
    """The name of the first test that fails with this bug planted, or None if all pass."""
    with tempfile.TemporaryDirectory() as folder:
        no_cache = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "tests", Path(folder) / "tests", ignore=no_cache)
        for file in FILES:
            shutil.copy(ROOT / file, folder)
        (Path(folder) / mutant.file).write_text(patched(mutant), encoding="utf-8")
        names, _, words = mutant.tests.partition(" -k ")
        files = [f"tests/test_{name}.py" for name in names.split()] + ["-k", words] * bool(words)
        options = ["-x", "-q", "--tb=no", "--hypothesis-profile=mutants"]
        status, out = run_pytest([*options, *files], folder)
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
    gc.freeze()  # what PyTorch has imported is not to be searched for garbage
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
            result = test or "NOT CAUGHT"
            print(f"{mutant.id:5} {mutant.bug:72} {mutant.seen:42} {result}", flush=True)
    print(f"{len(chosen) - missed} caught, {missed} not")
    return missed > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
