"""Train `large`, the target, and `tiny`, the draft; then tiny and heads on what large writes.

    python train_tiny.py                      # hours on 2 cores; on a GPU it plans for 8 minutes
    python train_tiny.py --data my_texts/     # any text file or folder
    python train_tiny.py --preset tiny-cpu    # a smoke run, about a minute on 2 cores
    python train_tiny.py --distill            # keep large, go on with tiny, new heads

Ctrl-C saves everything to checkpoints/partial.pt, and the same command goes on from there.
large.pt, tiny.pt and heads.pt are replaced only when all are complete. The corpus by default: the
Python standard library, and the packages in requirements.txt with all that they need.

Why distil: a drafter is judged by nothing but its agreement with the target. The acceptance rate at
a position is sum min(target_probs, draft_probs), so that is what its training maximises,
on the texts where it will be asked: those that the target writes (DistillSpec, Zhou et al. 2023,
arXiv 2310.08461). Large reads each of them once. Its states are kept, and its distributions follow
from them at the cost of one matrix product.
"""

import argparse
import importlib.metadata
import math
import os
import re
import signal
import statistics
import sys
import sysconfig
import threading
import time
import zlib
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to lose

import torch
import torch.nn.functional as F
from tiktoken._educational import bpe_train

from model import (
    CHECKPOINTS, GPT, BadInput, DraftHeads, GPTConfig, find_device, fingerprint, load_pair,
    load_whole, make_encoding, need, now, save_checkpoint, save_heads, save_whole,
    target_state_size, target_states,
)  # fmt: skip
from specdec import rounds, run_script

@dataclass(frozen=True)
class Preset:
    vocab_size: int  # the document separator included
    block_size: int  # length of a training window, and the longest text that the pair will decode
    large: tuple  # n_layer (even: it is trained with half of them first), n_head, n_embd
    tiny: tuple
    n_heads_embd: int  # width of the draft heads
    batch_size: int  # windows of the corpus per step
    own_batch_size: int  # windows that large wrote, per step
    written: tuple  # how many batches large writes, and how many windows are in each
    steps: tuple  # of the stages that train something, in the order of STAGES
    sample: int  # characters of the corpus that the tokenizer is trained on
    by_time: bool = False  # the steps are seconds: as many as can be done in them
    peaks: tuple = ()  # learning rates that differ from those in STAGES, (stage, rate) each

PRESETS = {
    "tiny-cpu": Preset(
        512, 128, (4, 4, 64), (1, 2, 32), 32, 8, 8, (1, 128), (60, 60, 100, 100, 40, 40), 60_000
    ),
    "cpu": Preset(
        1024, 512, (24, 4, 224), (1, 4, 256), 192, 8, 8, (18, 128),
        (4000, 2500, 2500, 2500, 2800, 2800), 200_000,
    ),
    # Deep: each layer makes the target slower on a GPU, but not a guess. So guessing gains more.
    "gpu": Preset(
        1024, 512, (48, 4, 256), (1, 4, 256), 192, 128, 64, (12, 512),
        (55, 90, 15, 40, 60, 15), 100_000, True, (("shallow", 3e-3), ("large", 2.5e-3)),
    ),
}  # fmt: skip
STAGES = {  # in this order: the name, and the highest learning rate where something is trained
    "shallow": ("large, half of its layers", 2e-3),
    "large": ("large, all layers", 1.5e-3),
    "tiny": ("tiny, on text", 4e-3),
    "write": ("large writes", None),
    "read": ("large reads what it wrote", None),
    "distil": ("tiny, distilled", 1e-3),
    "markov": ("heads that see the token just guessed", 5e-3),
    "blind": ("blind heads", 5e-3),
    "measure": ("measuring", None),
}
N_AHEAD = 4  # positions that the heads are trained on

# GPT-2's: a word keeps the space before it; letters, digits and signs never share a token.
SPLIT_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# -- how far it is, and Ctrl-C ---------------------------------------------------------------------

def duration(seconds):
    """3725 -> "1 h 02 min", 65 -> "1 min 05 s"."""
    minutes, seconds = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"

class Progress:
    """One line: how much of a stage is done, and the time left of the whole run.

    In a terminal it is rewritten every second. Elsewhere a new line comes after 3 seconds, and the
    next ones ever more rarely.
    """

    def __init__(self, unit, total, done=0, later=None):
        """later: what all later stages take, in seconds. None: not known, and no time is shown."""
        self.unit, self.total, self.done, self.later = unit, total, done, later
        self.first = done
        self.start, self.shown = time.perf_counter(), 0
        self.in_place = sys.stdout.isatty()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.in_place and self.shown:
            print()

    def show(self, words=lambda seconds: ""):
        """One more is done. words: of the seconds that each took; called only if they are shown."""
        self.done += 1
        passed = time.perf_counter() - self.start
        wait = 1 if self.in_place else max(3, passed / 10)
        complete = self.done == self.total and self.later is not None
        if passed - self.shown < wait and not complete:
            return
        self.shown = passed
        seconds = passed / (self.done - self.first)
        line = f"  {self.unit} {self.done:5}/{self.total}{words(seconds)}"
        if self.later is not None:
            left = seconds * (self.total - self.done) + self.later
            line += f"  {duration(left)} left in all"
        print(line.ljust(79) + "\r" if self.in_place else line + "\n", end="", flush=True)

    def watch(self, items):
        """The same items. Each counts as done when the next one is asked for."""
        for item in items:
            yield item
            self.show()

@contextmanager
def ticking(every=5):
    """Meanwhile a line tells how long it has taken: for what cannot tell how much of it is done."""
    done, start = threading.Event(), time.perf_counter()

    def tick():
        while not done.wait(every):
            print(f"  {duration(time.perf_counter() - start)} so far", flush=True)

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()

@contextmanager
def uninterrupted():
    """Ctrl-C does not interrupt the block, but adds to a list that the block can look at."""
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)

class Interrupted(Exception):
    pass

# -- the corpus ------------------------------------------------------------------------------------

def packages(requirements):
    """Installed packages, from lines as in requirements.txt, and all that they need, by name."""
    found, left = {}, list(requirements)
    while left:
        name = re.match(r"[\w.-]*", left.pop())[0].lower().replace("_", "-")
        if name and name not in found:
            try:
                found[name] = importlib.metadata.distribution(name)
            except importlib.metadata.PackageNotFoundError:
                continue
            left += [line for line in found[name].requires or () if "extra ==" not in line]
    return found

def default_files():
    """{name: path}: of the Python standard library, and of `packages` in requirements.txt."""
    library = Path(sysconfig.get_paths()["stdlib"])
    others = {"site-packages", "dist-packages"}
    files = [file for file in library.rglob("*.py") if not others & set(file.parts)]
    named = {file.relative_to(library).as_posix(): file for file in files}
    requirements = Path(__file__).with_name("requirements.txt").read_text().splitlines()
    for package in packages(requirements).values():
        for file in package.files or ():
            if file.suffix == ".py" and file.locate().is_file():
                named[file.as_posix()] = Path(file.locate())
    return named

def read_corpus(path=None):
    """Of a text file, of all in a folder, or of `default_files`.

    -> [(name, text)], and how many files were passed over since they are not UTF-8.
    OSError: path cannot be read. ValueError: there is no text.
    """
    need(path != "", "the path of --data is empty")
    if path is None:
        files = default_files()
    elif (root := Path(path)).is_dir():
        files = {f.relative_to(root).as_posix(): f for f in root.rglob("*") if f.is_file()}
    else:
        files = {".": root}
    documents = []
    with Progress("file", len(files)) as progress:
        for name, file in progress.watch(sorted(files.items())):
            try:
                documents.append((name, file.read_text(encoding="utf-8")))
            except UnicodeDecodeError:
                pass
    n_passed_over = len(files) - len(documents)
    need(documents, f"no UTF-8 text in {path}; files passed over: {n_passed_over}")
    return documents, n_passed_over

def split_corpus(documents):
    """Training texts and held-out texts, about 19 : 1.

    By a hash of the file's name, so that adding a file moves no other one; where files are few, the
    end of each is held out.
    """
    if len(documents) < 100:
        cut = [(text, len(text) * 19 // 20) for _, text in documents]
        return [text[:n] for text, n in cut], [text[n:] for text, n in cut]
    train, held_out = [], []
    for name, text in documents:
        (train if zlib.crc32(os.fsencode(name)) % 20 else held_out).append(text)
    return train, held_out

def train_tokenizer(texts, vocab_size, sample):
    """Byte-pair encoding, by tiktoken's own trainer, of `sample` characters from all the texts.

    ValueError: the corpus is too small.
    """
    text = "".join(texts)
    n_pieces = max(1, sample // 2000)
    step = max(2000, len(text) // n_pieces)
    pieces = "".join(text[i : i + 2000] for i in range(0, len(text), step))[:sample]
    try:
        with ticking():
            ranks = bpe_train(pieces, vocab_size - 1, SPLIT_PATTERN, visualise=None)
    except ValueError:  # no pair is left to merge
        few = f"corpus too small: it does not yield {vocab_size} different tokens"
        raise BadInput(few) from None
    return make_encoding(SPLIT_PATTERN, ranks)

def encode(encoding, texts):
    """All texts in one (N,) int32 tensor, each ended by the separator."""
    tokens = [torch.empty(0, dtype=torch.int32)]  # and one for each text: lists take gigabytes
    batches = [texts[i : i + 64] for i in range(0, len(texts), 64)]
    with Progress("batch", len(batches)) as progress:
        for batch in progress.watch(batches):
            for text in encoding.encode_ordinary_batch(batch):
                tokens.append(torch.tensor(text + [encoding.eot_token], dtype=torch.int32))
    return torch.cat(tokens)

# -- training --------------------------------------------------------------------------------------

def text_loss(model, windows):
    """Mean cross-entropy of the next token, in nats. windows: (B, T + 1) int64."""
    logits, _ = model(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())

@torch.no_grad()
def grow(model):
    """A GPT of twice as many layers that says the same.

    Behind each layer comes a copy of it that adds nothing yet, since its c_proj are zero. Trained
    from a shallow model, a deep one is ready sooner (progressive stacking, Gong et al. 2019); and
    where the new layers are silent at first, nothing learnt is lost (block expansion, LLaMA Pro, Wu
    et al. 2024, arXiv 2401.02415).
    """
    grown = deepcopy(model)
    grown.config = replace(model.config, n_layer=2 * model.config.n_layer)
    grown.h = torch.nn.ModuleList(deepcopy(block) for block in model.h for _ in range(2))
    for block in grown.h[1::2]:
        for c_proj in (block.attn.c_proj, block.mlp.c_proj):
            c_proj.weight.zero_()
            c_proj.bias.zero_()
    return grown

def agreement_loss(logits, target_logits, next_tokens):
    """0.9 sum |target_probs - draft_probs| + 0.1 cross-entropy.

    That is twice 1 - alpha, and a little text to keep gradients alive; the weights are DSpark's
    (DeepSpec, arXiv 2607.05147). Temperature 1, in float32.
    logits, target_logits (N, V), next_tokens (N,) -> loss, and alpha at each position, (N,)
    """
    logits = logits.float()
    target_probs = target_logits.detach().float().softmax(-1)
    distance = (target_probs - logits.softmax(-1)).abs().sum(-1)
    loss = 0.9 * distance.mean() + 0.1 * F.cross_entropy(logits, next_tokens)
    return loss, 1 - distance.detach() / 2

def logits_of(states, wte):
    """Logits of large, from its `target_states` (.., n_state) and its output matrix (V, D).

    The first D numbers of such a state are the last hidden state.
    """
    return F.linear(states[..., : wte.shape[1]].to(wte.dtype), wte)

def distillation_loss(tiny, wte, windows, states):
    """Of tiny on windows (B, T) int64.

    Given are the states of large there, (B, T, n_state), and its output matrix, (V, D).
    """
    logits, _ = tiny(windows[:, :-1])
    target_logits = logits_of(states[:, :-1], wte)
    next_tokens = windows[:, 1:].flatten()
    return agreement_loss(logits.flatten(0, 1), target_logits.flatten(0, 1), next_tokens)[0]

class Chains:
    """Takes the place of a KVCache when draft heads are trained.

    It has T slots for a text, then M for each further guess of M chains. Chain m goes on after the
    token at start[:, m], (B, M); it sees the text up to there, and itself. Nothing is allocated
    beforehand and nothing overwritten, so that gradients pass.
    """

    def __init__(self, start):
        self.start = start
        self.kv = self.visible = None

    def extend(self, T):
        """-> None, as heads have no positions; what may be seen: (T, T), then (B, 1, M, S), bool.
        """
        t = torch.arange(T, device=self.start.device)
        if self.kv is None:  # the text
            self.visible = t <= self.start[..., None]  # (B, M, T), from each chain
            return None, t <= t[:, None]
        own = (t == t[:, None]).expand(len(self.start), T, T)  # (B, M, M)
        self.visible = torch.cat((self.visible, own), -1)
        return None, self.visible[:, None]

    def write(self, layer, kv):
        """(2, B, n_head, T, head_dim) -> those of all S."""
        self.kv = kv if self.kv is None else torch.cat((self.kv, kv), -2)
        return self.kv

def heads_loss(heads, wte, windows, states, start, n=N_AHEAD):
    """Of guesses 1..n after the tokens at start (B, M) of windows (B, T); states and wte as above.

    Later guesses count less. The heads read the true states of all tokens up to start, and behind
    them their own, as they will when decoding ("training-time test", EAGLE-3, Li et al. 2025, arXiv
    2503.01840). The loss includes the confidence: cross-entropy of the acceptance that the heads
    expect against the one that is found.
    -> loss, and alpha of each guess, (n, B * M)
    """
    row = torch.arange(len(windows), device=windows.device)[:, None]
    cache = Chains(start)
    before = F.pad(states.to(wte.dtype), (0, 0, 1, -1))  # before each token; of the first, nothing
    state = heads(heads.c_state(before), windows, cache)[row, start]  # (B, M, n_embd)
    loss, alphas = 0.0, []
    for i in range(1, n + 1):
        logits = heads.lm_head(state).flatten(0, 1)  # (B * M, V)
        target_logits = logits_of(states[row, start + i - 1], wte).flatten(0, 1)
        next_tokens = windows[row, start + i]  # (B, M)
        distance, alpha = agreement_loss(logits, target_logits, next_tokens.flatten())
        confidence = heads.confidence(state.detach()).flatten().float()
        error = F.binary_cross_entropy_with_logits(confidence, alpha)
        loss = loss + math.exp(-(i - 1) / n) * (distance + error)
        alphas.append(alpha)
        if i < n:
            state = heads(state, next_tokens, cache)
    return loss, torch.stack(alphas)

@torch.no_grad()
def new_heads(large, n_embd, markov):
    """Draft heads that begin as large's own output layer.

    It is seen in the n_embd directions that matter most to it, or in all that it has.
    """
    wte = large.wte.weight
    n_embd = min(n_embd, wte.shape[1])
    heads = DraftHeads(len(wte), target_state_size(large.config), n_embd, markov).to(wte.device)
    directions = torch.linalg.svd(wte, full_matrices=False).Vh[:n_embd]  # (n_embd, D)
    heads.c_state.weight.zero_()[: wte.shape[1]] = directions.T
    heads.lm_head.weight.copy_(directions @ wte.T)
    heads.c_in.weight.copy_(torch.eye(n_embd))
    if markov:
        # As large as the state to which they are added; in other directions, to tell them apart.
        size = large.ln_f.weight.square().mean().sqrt()
        mixed = wte @ torch.randn(wte.shape[1], n_embd).to(wte)
        heads.wte.weight.copy_(mixed / mixed.std() * size)
    return heads

def make_optimizers(model):
    """Muon for the matrices of the layers, AdamW for embeddings, output and vectors.

    One learning rate serves both. Muon (Jordan et al. 2024) makes each step's update
    near-orthogonal. After 250 steps of 12 layers on the default corpus, held-out loss was 3.89 with
    it and 4.45 with AdamW alone, in about the same time.
    """
    matrices, others = [], []
    for name, weight in model.named_parameters():
        (matrices if "c_" in name and weight.ndim == 2 else others).append(weight)
    muon = torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0)]

class Run:
    """The stages of one training run.

    From partial.pt an interrupted run goes on exactly where it stopped.
    """

    def __init__(self, folder, settings, device, dtype):
        self.path, self.device = Path(folder) / "partial.pt", device
        self.expected = {}  # seconds of each stage that is left
        self.state = {"settings": settings, "dtype": dtype}
        self.state |= {"finished": {}, "stage": None, "written": [], "steps": {}}
        if self.path.exists():
            try:
                state = load_whole(self.path)
                same = state["settings"] == settings and dtype in (None, state["dtype"])
            except (OSError, MemoryError):
                raise  # it may be as good as ever
            except Exception as error:
                raise BadInput(f"{self.path} is damaged: delete it") from error
            advice = "finish that, or delete the file"
            need(same, f"{self.path} belongs to a run with other settings: {advice}")
            self.state = state
            print(f"going on from {self.path}")

    def autocast(self):
        enabled = self.state["dtype"] == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def save(self):
        save_whole(self.path, self.state)

    def expect(self, stage, n, prepare):
        """Time one call of what prepare() returns. The stage is made of n such calls; n may be a
        function of the seconds of a call.
        """
        title, _ = STAGES[stage]
        compiled = self.is_compiled(stage)
        print(f"  {title:40}" + "compiling\n" * compiled, end="", flush=True)
        with ticking() if compiled else nullcontext():
            seconds = seconds_of_calls({stage: prepare()}, repeats=1)[stage]
        print(" " * 42 * compiled, end="")
        self.expected[stage] = seconds * (n(seconds) if callable(n) else n)
        print(duration(self.expected[stage]), flush=True)

    def is_compiled(self, stage):
        """Whether to compile: large on a GPU, where the time goes into launching operations."""
        return self.device.type == "cuda" and stage in ("shallow", "large")

    def expect_training(self, stage, model, loss_of, steps, by_time=False):
        """`expect` for a stage of training: of one step, of a copy; nothing, if it is finished.

        by_time: steps is a number of seconds. The number of steps is kept in the state.
        """

        def prepare():
            copy, generator = self.compiled(stage, deepcopy(model)), torch.Generator()
            optimizers = make_optimizers(copy)
            return lambda: self.step(copy, optimizers, loss_of, generator)

        def n_left(seconds):
            n = self.state["steps"].setdefault(stage, max(1, round(steps / seconds)))
            return n - (self.state["step"] if self.state["stage"] == stage else 0)

        if not by_time:
            self.state["steps"][stage] = steps
        if stage not in self.state["finished"]:
            self.expect(stage, n_left, prepare)

    def compiled(self, stage, model):
        """The same model, its layers compiled if the stage wants it. They share one compilation."""
        if self.is_compiled(stage):
            torch._dynamo.config.suppress_errors = True  # where it cannot, it goes on without
            for block in model.h:
                block.compile()
        return model

    def progress(self, stage, unit, total, done=0):
        stages = list(STAGES)
        later = stages[stages.index(stage) + 1 :]
        return Progress(unit, total, done, sum(self.expected.get(s, 0) for s in later))

    def step(self, model, optimizers, loss_of, generator):
        with self.autocast():
            loss = loss_of(model, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    def train(self, stage, model, loss_of, peak, seed, tokens_per_step):
        """Train model in place for as many steps as `expect_training` found, and return it.

        The learning rate warms up to `peak`, then follows a cosine down to zero.
        loss_of(model, generator) draws a batch and returns its loss.
        """
        if stage in self.state["finished"]:
            model.load_state_dict(self.state["finished"][stage])
            return model
        steps, (title, _) = self.state["steps"][stage], STAGES[stage]
        print(f"{title}: {steps} steps", flush=True)
        model = self.compiled(stage, model)
        optimizers = make_optimizers(model)
        generator = torch.Generator().manual_seed(seed + list(STAGES).index(stage) + 1)
        first = 0
        if self.state["stage"] == stage:
            first = self.state["step"]
            model.load_state_dict(self.state["model"])
            for optimizer, saved in zip(optimizers, self.state["optimizers"]):
                optimizer.load_state_dict(saved)
            generator.set_state(self.state["generator"])
        mean = None
        with uninterrupted() as pressed, self.progress(stage, "step", steps, first) as progress:
            for step in range(first, steps):
                warm_up = max(1, steps // 50)
                fraction = min((step + 1) / warm_up, (1 + math.cos(math.pi * step / steps)) / 2)
                for optimizer in optimizers:
                    optimizer.param_groups[0]["lr"] = peak * fraction
                loss = self.step(model, optimizers, loss_of, generator)
                mean = loss if mean is None else mean.lerp(loss, 0.05)
                progress.show(
                    lambda seconds: f"  loss {mean:.3f}  {tokens_per_step / seconds:,.0f} tokens/s"
                )
                if pressed or (step + 1) % 500 == 0:
                    self.state |= {"stage": stage, "step": step + 1, "model": model.state_dict()}
                    self.state["optimizers"] = [o.state_dict() for o in optimizers]
                    self.state["generator"] = generator.get_state()
                    self.save()
                    if pressed:
                        where = f"step {step + 1} of {steps} of {title}"
                        raise Interrupted(f"stopped after {where}; the same command goes on there")
            self.state["finished"][stage] = model.state_dict()
            self.save()
        if pressed:
            raise KeyboardInterrupt
        return deepcopy(model) if self.is_compiled(stage) else model  # a copy is not compiled

# -- what large writes -----------------------------------------------------------------------------

def write(large, tokens, n, temperature, seed, watch=iter):
    """n texts by large of T = block_size tokens, (n, T) int32, where large is.

    They continue random stretches of `tokens`, of T / 16 tokens each.
    watch: here and below, `Progress.watch` of a line to be shown meanwhile.
    """
    T = large.config.block_size
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(len(tokens) - T // 16 + 1, (n, 1), generator=generator)
    where = (start + torch.arange(T // 16)).to(tokens.device)
    prompts = tokens[where].long().to(large.wte.weight.device)
    decoding = rounds(large, prompts, T - T // 16, temperature=temperature, seed=seed)
    return torch.cat((prompts, *(r.tokens for r in watch(decoding))), 1).int()

def n_read(device):
    """How many texts are read at once: a GPU does more in about the same time."""
    return 64 if device.type == "cuda" else 4

@torch.no_grad()
def read(large, texts, autocast, watch=iter):
    """The `target_states` of large in texts (N, T): (N, T, n_state) bfloat16.

    They are many gigabytes: kept on a GPU if they take less than half of what is free there.
    """
    shape, device = (*texts.shape, target_state_size(large.config)), large.wte.weight.device
    fits = device.type == "cuda" and 4 * math.prod(shape) < torch.cuda.mem_get_info(device)[0]
    states = torch.empty(shape, dtype=torch.bfloat16, device=device if fits else "cpu")
    n = n_read(device)
    with autocast():
        for some, out in watch(zip(texts.split(n), states.split(n))):
            some = some.long().to(large.wte.weight.device)
            cache = large.new_cache(len(some))
            _, hidden = large(some, cache)
            slots = torch.arange(some.shape[1], device=some.device).expand_as(some)
            out[:] = target_states(hidden, cache, slots)
    return states

def writing_pass(large, n):
    """A function that does one pass of large over n texts that are half written."""
    half = large.config.block_size // 2
    cache = large.new_cache(n)
    cache.kv[..., : half + 1, :] = 1  # memory that nothing was written to is read more quickly
    cache.extend(half)
    token = torch.zeros(n, 1, dtype=torch.int64, device=cache.kv.device)

    @torch.no_grad()
    def one_pass():
        large(token, cache)
        cache.rollback(half)

    return one_pass

# -- what it came to -------------------------------------------------------------------------------

def held_out_windows(tokens, block_size, most=128):
    """Stretches of the held-out tokens, (B, block_size + 1) int64.

    They do not overlap, and are spaced evenly over all texts.
    """
    T = block_size + 1
    n = min(most, len(tokens) // T)
    start = torch.arange(n) * (len(tokens) - T) // max(1, n - 1)
    return tokens[start[:, None] + torch.arange(T)].long()

@torch.no_grad()
def measure(large, drafts, windows, autocast, watch=iter):
    """What windows (N, T + 1) int64 of text say of large and of each draft.

    -> losses (1 + drafts,), in nats per token, of large first; acceptance rates (drafts,) at
    temperature 1, E[sum min(target_probs, draft_probs)]; and their standard errors (drafts,).
    Tokens of one window are alike, so windows, not tokens, are counted as independent.
    """
    losses, alphas = [], []
    for some in watch(windows.split(n_read(large.wte.weight.device))):
        some = some.to(large.wte.weight.device)
        with autocast():
            logits = [model(some[:, :-1])[0] for model in (large, *drafts)]
        logits = torch.stack(logits).float()  # (1 + drafts, some, T, V)
        next_tokens = some[:, 1:].expand(len(logits), -1, -1)
        loss = F.cross_entropy(logits.permute(0, 3, 1, 2), next_tokens, reduction="none")
        losses.append(loss.mean(-1))
        probs = logits.softmax(-1)
        alphas.append(torch.minimum(probs[:1], probs[1:]).sum(-1).mean(-1))
    losses, alphas = torch.cat(losses, 1), torch.cat(alphas, 1)  # (.., N)
    return losses.mean(1), alphas.mean(1), alphas.std(1) / len(windows) ** 0.5

@torch.no_grad()
def heads_alpha(heads, wte, texts, states, watch=iter):
    """Acceptance rate at temperature 1 in texts (N, T), and its standard error.

    -> 2 x (N_AHEAD,), of guesses 1..N_AHEAD
    """
    T = texts.shape[1]
    start = torch.arange(T // 16, T - N_AHEAD, device=wte.device)  # (M,)
    means, n = [], n_read(wte.device)
    for some, own in watch(zip(texts.split(n), states.split(n))):
        some, own = some.long().to(wte.device), own.to(wte.device)
        _, alphas = heads_loss(heads, wte, some, own, start.expand(len(some), -1))
        means.append(alphas.unflatten(1, (len(some), -1)).mean(-1))
    means = torch.cat(means, 1)  # (N_AHEAD, N)
    return means.mean(1), means.std(1) / len(texts) ** 0.5

def report(losses, rates, of_guesses):
    """Print what `measure` found: of large, tiny, tiny distilled, in two places; and `heads_alpha`.
    """

    def show(alphas, errors):
        return [f"{alpha:.3f} +- {error:.3f}" for alpha, error in zip(alphas, errors)]

    for title, loss in (("large", losses[0]), ("tiny", losses[2])):
        print(f"held-out loss of {title}: {loss:.3f} nats per token")
    for where, two in rates.items():
        before, after = show(*two)
        print(f"acceptance rate on {where}: {before}, after distillation {after}")
    for kind, four in of_guesses.items():
        title, _ = STAGES[kind]
        print(f"acceptance rate there of {title}, at guesses 1 to {N_AHEAD}:")
        print("   ", *show(*four))

def seconds_of_calls(calls, repeats):
    """{name: function} -> {name: median seconds of a call}.

    The functions take turns, since the speed of a machine drifts. Each is called twice at its turn,
    and timed the second time: the first finds the processor's caches full of other things.
    """
    times = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            call()
            start = now()
            call()
            times[name].append(now() - start)
    return {name: statistics.median(t) for name, t in times.items()}

def faster_dtype(model, windows):
    """float32 or bfloat16: on a GPU the latter where it has it, elsewhere by a short race.

    Some processors have bfloat16 arithmetic, others imitate it.
    """
    if windows.is_cuda:
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    print("which is faster, float32 or bfloat16?", flush=True)

    def step(enabled):
        with torch.autocast(windows.device.type, torch.bfloat16, enabled=enabled):
            text_loss(model, windows).backward()
        model.zero_grad()
        progress.show()

    calls = {"float32": lambda: step(False), "bfloat16": lambda: step(True)}
    with Progress("step", 3 * 2 * len(calls)) as progress:
        seconds = seconds_of_calls(calls, repeats=3)
    return min(seconds, key=seconds.get)

def main(argv=None):
    train = "Train large and tiny on text; then tiny and the draft heads on what large writes."
    folder = "where the models go (default: checkpoints/)"
    dtypes = "of the arithmetic (default: the faster, by a short race)"
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=train)
    option = parser.add_argument
    option("--data", metavar="PATH", help="a text file or a folder (default: Python's own library)")
    option("--preset", choices=PRESETS, help="default: gpu where there is one, else cpu")
    option("--distill", action="store_true", help="take large.pt and tiny.pt, and go on from there")
    option("--checkpoints", metavar="DIR", default=CHECKPOINTS, type=Path, help=folder)
    option("--device", help="default: cuda where there is one, else cpu")
    option("--dtype", choices=("float32", "bfloat16"), help=dtypes)
    option("--seed", type=int, default=0, help="equal seeds repeat a run, if --dtype is given, too")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run(args)
    except (Interrupted, KeyboardInterrupt) as error:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # impatience shall not hide what is said
        print(str(error) or interruption(args.checkpoints / "partial.pt"), file=sys.stderr)
        sys.exit(130)

def interruption(partial):
    kept = f"{partial} is kept" if partial.exists() else f"there is no {partial} to go on from"
    return f"interrupted; {kept}"

def prepare(args, preset, device):
    """-> large, with half of its layers, tiny, encoding; tokens to train on, and held out.

    With --distill the models are those of the files.
    """
    print("reading the corpus", flush=True)
    documents, n_passed_over = read_corpus(args.data)
    texts, held_out_texts = split_corpus(documents)
    characters = f"{sum(map(len, texts)):,} characters"
    corpus = f"{len(texts)} training texts of {characters}, {len(held_out_texts)} held out"
    if n_passed_over:
        corpus += f"; passed over, as not UTF-8: {n_passed_over}"
    print(f"corpus: {corpus}", flush=True)
    torch.manual_seed(args.seed)
    if args.distill:
        large, tiny, encoding = load_pair(args.checkpoints, device, torch.float32)
    else:
        print("training the tokenizer", flush=True)
        encoding = train_tokenizer(texts, preset.vocab_size, preset.sample)
        n_layer, *widths = preset.large
        sizes = preset.vocab_size, preset.block_size
        large = GPT(GPTConfig(*sizes, n_layer // 2, *widths)).to(device)
        tiny = GPT(GPTConfig(*sizes, *preset.tiny)).to(device)
    print("making tokens of the corpus", flush=True)
    tokens, held_out = encode(encoding, texts), encode(encoding, held_out_texts)
    sizes = f"{len(tokens):,} to train on, {len(held_out):,} held out"
    window = large.config.block_size + 1
    enough = min(len(tokens), len(held_out)) >= 2 * window
    need(enough, f"corpus too small: tokens: {sizes}; two windows of {window} are the least")
    print(f"tokenizer: {encoding.n_vocab} tokens; {sizes}", flush=True)
    return large, tiny, encoding, tokens, held_out

def run(args):
    device = find_device(args.device)
    preset = PRESETS[args.preset or ("gpu" if device.type == "cuda" else "cpu")]
    start = time.perf_counter()
    need(0 <= args.seed < 2**62, f"seed is {args.seed}; it must be 0 or more and below 2^62")
    need(not args.checkpoints.is_file(), f"{args.checkpoints} is a file; it must be a folder")
    large, tiny, encoding, tokens, held_out = prepare(args, preset, device)
    block_size = large.config.block_size
    args.checkpoints.mkdir(parents=True, exist_ok=True)
    settings = {"preset": asdict(preset), "seed": args.seed}
    settings["corpus"] = zlib.crc32(tokens.numpy().tobytes())
    settings["distill"] = [fingerprint(large), fingerprint(tiny)] if args.distill else None
    tokens = tokens.to(device)
    stages = Run(args.checkpoints, settings, device, args.dtype)
    autocast = stages.autocast
    windows = held_out_windows(held_out, block_size)
    if stages.state["dtype"] is None:
        stages.state["dtype"] = faster_dtype(large, windows[:1].to(device))
    if not stages.path.exists():
        stages.save()  # now, not hours later, is the time to learn that it cannot
    print(f"on {device}, in {stages.state['dtype']}", flush=True)

    # What is trained, and on what. Until large has written, text of the corpus stands in for its
    # own, and zeros for its states, so that a step of each stage can be timed now.
    deep = large if args.distill else grow(large)
    own = windows[: n_read(device), :-1].to(device)
    shape = *own.shape, target_state_size(deep.config)
    states = torch.zeros(shape, dtype=torch.bfloat16, device=device)
    wte = deep.wte.weight.detach()

    def text_batch(model, generator):
        first = torch.randint(len(tokens) - block_size, (preset.batch_size, 1), generator=generator)
        where = first.to(device) + torch.arange(block_size + 1, device=device)
        return text_loss(model, tokens[where].long())

    def own_batch(generator):
        i = torch.randint(len(own), (preset.own_batch_size,), generator=generator)
        return own[i.to(device)].long(), states[i.to(states.device)].to(device)

    def distillation_batch(model, generator):
        return distillation_loss(model, wte, *own_batch(generator))

    def heads_batch(model, generator):
        batch = own_batch(generator)
        size = preset.own_batch_size, 128
        start = torch.randint(block_size - N_AHEAD, size, generator=generator)
        return heads_loss(model, wte, *batch, start.to(device))[0]

    losses = {"shallow": text_batch, "large": text_batch, "tiny": text_batch}
    losses |= {"distil": distillation_batch, "markov": heads_batch, "blind": heads_batch}
    steps = dict(zip(losses, preset.steps))

    def expect(stage, model):
        stages.expect_training(stage, model, losses[stage], steps[stage], preset.by_time)

    def train(stage, model):
        from_text = losses[stage] is text_batch
        size = preset.batch_size if from_text else preset.own_batch_size
        peak = dict(preset.peaks).get(stage, STAGES[stage][1])
        return stages.train(stage, model, losses[stage], peak, args.seed, size * block_size)

    def make_heads():
        sizes = deep, preset.n_heads_embd
        return {"markov": new_heads(*sizes, markov=True), "blind": new_heads(*sizes, markov=False)}

    written = stages.state["written"]
    n_passes = block_size - block_size // 16  # of large, to write a batch of texts
    n_batches, n_rows = preset.written
    n_left = n_batches - len(written) + 1  # batches; the last one follows held-out text

    def n_reads(*sizes):
        return sum(math.ceil(n / n_read(device)) for n in sizes)

    n_reading, n_measuring = n_reads(n_batches * n_rows, 64), n_reads(len(windows), 64, 64, 64)

    def reading():
        read(deep, own, autocast)

    print("time that each stage will take, by one step of it:", flush=True)
    with torch.random.fork_rng(devices=[]):  # what comes later draws as if this had not been
        if not args.distill:
            expect("shallow", large)
            expect("large", deep)
            expect("tiny", tiny)
        stages.expect("write", n_left * n_passes, lambda: writing_pass(deep, n_rows))
        stages.expect("read", n_reading, lambda: reading)
        expect("distil", tiny)
        for kind, heads in make_heads().items():
            expect(kind, heads)
        stages.expect("measure", n_measuring, lambda: reading)
    print(f"  {'in all':40}{duration(sum(stages.expected.values()))}", flush=True)

    # Large and tiny, on text.
    if not args.distill:
        deep = train("large", grow(train("shallow", large)))
        tiny = train("tiny", tiny)
    large = deep.eval().requires_grad_(False)
    wte = large.wte.weight
    for title, model in (("large", large), ("tiny", tiny)):
        print(f"{title}: {sum(p.numel() for p in model.parameters()):,} weights", flush=True)

    # Texts by large: of three batches two at temperature 1, one greedy.
    print(f"large writes: {n_batches * n_rows} texts of {block_size} tokens", flush=True)
    n, done = (n_batches + 1) * n_passes, len(written) * n_passes
    with stages.progress("write", "pass", n, done) as progress:
        for i in range(len(written), n_batches):
            seed, temperature = args.seed + 100 + i, float(i % 3 < 2)
            texts = write(large, tokens, n_rows, temperature, seed, progress.watch)
            with uninterrupted() as pressed:
                written.append(texts.cpu())
                stages.save()
            if pressed:
                raise KeyboardInterrupt
        held_out_own = write(large, held_out, 64, 1.0, args.seed + 99, progress.watch).cpu()
    own = torch.cat(written).to(device)
    print("large reads what it wrote", flush=True)
    with stages.progress("read", "batch", n_reading) as progress:
        states = read(large, own, autocast, progress.watch)
        held_out_states = read(large, held_out_own, autocast, progress.watch)

    # Tiny and the heads, on these texts.
    undistilled, tiny = tiny, train("distil", deepcopy(tiny))
    heads = {kind: train(kind, model) for kind, model in make_heads().items()}

    # What it came to.
    print("measuring", flush=True)
    drafts = undistilled, tiny
    with stages.progress("measure", "batch", n_measuring) as progress:
        losses, *rates = measure(large, drafts, windows, autocast, progress.watch)
        _, *own_rates = measure(large, drafts, held_out_own.long(), autocast, progress.watch)
        of_guesses = {
            kind: heads_alpha(model, wte, held_out_own, held_out_states, progress.watch)
            for kind, model in heads.items()
        }
    report(losses, {"held-out text": rates, "what large writes after it": own_rates}, of_guesses)

    # All files are complete before any name is taken. A run that dies in between still has
    # partial.pt to go on from.
    save_checkpoint(args.checkpoints / "large.pt.complete", large, encoding)
    save_checkpoint(args.checkpoints / "tiny.pt.complete", tiny, encoding)
    save_heads(args.checkpoints / "heads.pt.complete", large, heads["markov"], heads["blind"])
    # tiny last: with --distill, its old file is what partial.pt belongs to
    with uninterrupted():
        for title in ("heads", "large", "tiny"):
            os.replace(args.checkpoints / f"{title}.pt.complete", args.checkpoints / f"{title}.pt")
        stages.path.unlink()
        minutes = f"{(time.perf_counter() - start) / 60:.1f} minutes"
        print(f"wrote large.pt, tiny.pt and heads.pt to {args.checkpoints} after {minutes}")

if __name__ == "__main__":
    run_script(main)
