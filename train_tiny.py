"""Train `large`, the target, and `tiny`, the draft; then tiny and heads on what large writes.

    python train_tiny.py                      # corpus: the Python standard library of this machine
    python train_tiny.py --data my_texts/     # any text file or folder
    python train_tiny.py --preset tiny-cpu    # a smoke run, under 2 minutes on 2 cores
    python train_tiny.py --distill            # keep large, go on with tiny, new heads

Ctrl-C saves everything to checkpoints/partial.pt, and the same command goes on from there.
large.pt, tiny.pt and heads.pt are replaced only when all are complete.

Why distil: a drafter is judged by nothing but its agreement with the target. The acceptance rate at
a position is 1 - TV = sum min(target_probs, draft_probs), so that is what its training maximises,
on the texts where it will be asked: those that the target writes (DistillSpec, Zhou et al. 2023,
arXiv 2310.08461). Large reads each of them once. Its states are kept, and its distributions follow
from them at the cost of one matrix product.
"""

import argparse
import math
import os
import signal
import statistics
import sys
import sysconfig
import time
import zlib
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tiktoken._educational import bpe_train

from model import (
    CHECKPOINTS, GPT, BadInput, DraftHeads, GPTConfig, find_device, fingerprint, load_pair,
    load_whole, make_encoding, now, save_checkpoint, save_heads, save_whole, target_state_size,
    target_states,
)  # fmt: skip
from specdec import rounds, run_script

@dataclass(frozen=True)
class Preset:
    vocab_size: int  # the document separator included
    block_size: int  # length of a training window, and the longest text that the pair will decode
    large: tuple  # n_layer (even: it is trained with half of them first), n_head, n_embd
    tiny: tuple
    n_heads_embd: int  # width of the draft heads
    batch_size: int  # windows per step
    written: int  # batches of 128 windows that large writes
    steps: tuple  # of large with half of its layers, large, tiny, distillation, each kind of heads
    sample: int  # characters of the corpus that the tokenizer is trained on

PRESETS = {
    "tiny-cpu": Preset(
        512, 128, (4, 4, 128), (1, 2, 64), 64, 16, 2, (100, 100, 200, 200, 100), 60_000
    ),
    "cpu": Preset(
        1024, 512, (24, 4, 224), (1, 4, 144), 192, 8, 18, (4000, 2500, 2500, 2500, 2800), 200_000
    ),
    "gpu": Preset(
        1024, 1024, (12, 12, 768), (2, 4, 128), 256, 64, 64,
        (1500, 1500, 2000, 10000, 5000), 200_000,
    ),
}  # fmt: skip
STAGES = {  # what is trained, and its highest learning rate
    "shallow": ("large, half of its layers", 2e-3),
    "large": ("large, all layers", 1.5e-3),
    "tiny": ("tiny, on text", 4e-3),
    "distil": ("tiny, distilled", 1e-3),
    "markov": ("heads that see the token just guessed", 5e-3),
    "blind": ("blind heads", 5e-3),
}
N_AHEAD = 4  # positions that the heads are trained on

# GPT-2's: a word keeps the space before it; letters, digits and signs never share a token.
SPLIT_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# -- the corpus ------------------------------------------------------------------------------------

def read_corpus(path=None):
    """[(name, text)] of a text file, of all in a folder, or of the Python standard library.

    Files that are not UTF-8 are passed over. OSError: path cannot be read.
    """
    if path is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        others = {"site-packages", "dist-packages"}
        files = [f for f in root.rglob("*.py") if not others & set(f.parts)]
    else:
        root = Path(path)
        files = [root] if not root.is_dir() else [f for f in root.rglob("*") if f.is_file()]
    documents = []
    for file in sorted(files):
        try:
            text = file.read_text(encoding="utf-8")
            documents.append((file.relative_to(root).as_posix(), text))
        except UnicodeDecodeError:
            pass
    return documents

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
    """Byte-pair encoding, by tiktoken's own trainer, of `sample` characters from all the texts."""
    text = "".join(texts)
    n_pieces = max(1, sample // 2000)
    step = max(1, len(text) // n_pieces)
    pieces = "".join(text[i : i + 2000] for i in range(0, len(text), step))[:sample]
    try:
        ranks = bpe_train(pieces, vocab_size - 1, SPLIT_PATTERN, visualise=None)
    except ValueError:  # no pair is left to merge
        few = f"corpus too small: it does not yield {vocab_size} different tokens"
        raise BadInput(few) from None
    return make_encoding(SPLIT_PATTERN, ranks)

def encode(encoding, texts):
    """All texts in one (N,) int32 tensor, each ended by the separator."""
    tokens = []
    for text in encoding.encode_ordinary_batch(texts):
        tokens += text + [encoding.eot_token]
    return torch.tensor(tokens, dtype=torch.int32)

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
    if markov:  # as large as the state beside which it is read
        heads.wte.weight.copy_(wte @ directions.T / wte.std())
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

class Interrupted(Exception):
    pass

class Run:
    """The stages of one training run.

    From partial.pt an interrupted run goes on exactly where it stopped.
    """

    def __init__(self, folder, settings, device, dtype):
        self.path, self.device = Path(folder) / "partial.pt", device
        self.state = {"settings": settings, "dtype": dtype}
        self.state |= {"finished": {}, "stage": None, "written": []}
        if self.path.exists():
            try:
                state = load_whole(self.path)
                same = state["settings"] == settings and dtype in (None, state["dtype"])
            except Exception as error:
                raise BadInput(f"{self.path} is damaged: delete it") from error
            if not same:
                advice = "finish that, or delete the file"
                raise BadInput(f"{self.path} belongs to a run with other settings: {advice}")
            self.state = state
            print(f"going on from {self.path}")

    def autocast(self):
        enabled = self.state["dtype"] == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def save(self):
        save_whole(self.path, self.state)

    def train(self, stage, model, loss_of, steps, seed, tokens_per_step):
        """Train model in place for `steps` steps, and return it.

        The learning rate warms up, then follows a cosine down to zero.
        loss_of(model, generator) draws a batch and returns its loss.
        """
        if stage in self.state["finished"]:
            model.load_state_dict(self.state["finished"][stage])
            return model
        title, peak = STAGES[stage]
        print(f"{title}: {steps} steps", flush=True)
        optimizers = make_optimizers(model)
        generator = torch.Generator().manual_seed(seed)
        first = 0
        if self.state["stage"] == stage:
            first = self.state["step"]
            model.load_state_dict(self.state["model"])
            for optimizer, saved in zip(optimizers, self.state["optimizers"]):
                optimizer.load_state_dict(saved)
            generator.set_state(self.state["generator"])

        interrupted = False

        def interrupt(*_):  # Ctrl-C waits for the end of the step; a second one does not wait
            nonlocal interrupted
            interrupted = True
            signal.signal(signal.SIGINT, signal.default_int_handler)

        signal.signal(signal.SIGINT, interrupt)
        progress = Progress(stage, first, steps, tokens_per_step)
        try:
            for step in range(first, steps):
                warm_up = max(1, steps // 50)
                fraction = min((step + 1) / warm_up, (1 + math.cos(math.pi * step / steps)) / 2)
                for optimizer in optimizers:
                    optimizer.param_groups[0]["lr"] = peak * fraction
                with self.autocast():
                    loss = loss_of(model, generator)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
                progress.show(step + 1, loss)
                if interrupted or (step + 1) % 500 == 0:
                    self.state |= {"stage": stage, "step": step + 1, "model": model.state_dict()}
                    self.state["optimizers"] = [o.state_dict() for o in optimizers]
                    self.state["generator"] = generator.get_state()
                    self.save()
                if interrupted:
                    where = f"step {step + 1} of {steps} of {title}"
                    raise Interrupted(f"stopped after {where}; the same command goes on there")
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            progress.close()
        # A copy, since distillation goes on with the same model.
        weights = {name: weight.clone() for name, weight in model.state_dict().items()}
        self.state["finished"][stage] = weights
        self.save()
        return model

class Progress:
    """One line with step, loss, speed and time left of a stage.

    In a terminal it is rewritten every second; elsewhere a new one comes every 30 seconds.
    """

    def __init__(self, stage, first, steps, tokens_per_step):
        self.stage, self.first, self.steps = stage, first, steps
        self.tokens_per_step = tokens_per_step
        self.start = time.perf_counter()
        self.every = 1 if sys.stdout.isatty() else 30
        self.shown = self.start
        self.mean = None

    def show(self, step, loss):
        self.mean = loss.detach() if self.mean is None else self.mean.lerp(loss.detach(), 0.05)
        now = time.perf_counter()
        if now - self.shown < self.every and step not in (self.first + 1, self.steps):
            return
        self.shown = now
        seconds = (now - self.start) / (step - self.first)
        left = round(seconds * (self.steps - step))
        speed = f"{self.tokens_per_step / seconds:7,.0f} tokens/s"
        line = f"  step {step:5}/{self.steps}  loss {self.mean.item():.3f}  {speed}"
        line += f"  {left // 60:3d} min {left % 60:02d} s left"
        print(line, end="\r" if sys.stdout.isatty() else "\n", flush=True)

    def close(self):
        if sys.stdout.isatty():
            print()

# -- what large writes -----------------------------------------------------------------------------

def write(large, tokens, n, temperature, seed):
    """n texts by large of T = block_size tokens, (n, T) int32.

    They continue random stretches of `tokens`, of T / 16 tokens each.
    """
    T = large.config.block_size
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(len(tokens) - T // 16 + 1, (n, 1), generator=generator)
    prompts = tokens[start + torch.arange(T // 16)].long().to(large.wte.weight.device)
    decoding = rounds(large, prompts, T - T // 16, temperature=temperature, seed=seed)
    return torch.cat((prompts, *(r.tokens for r in decoding)), 1).int()

@torch.no_grad()
def read(large, texts, autocast):
    """The `target_states` of large in texts (N, T): (N, T, n_state) bfloat16.

    They are kept on the CPU, for they may be many gigabytes.
    """
    states = torch.empty(*texts.shape, target_state_size(large.config), dtype=torch.bfloat16)
    with autocast():
        for some, out in zip(texts.split(4), states.split(4)):
            some = some.long().to(large.wte.weight.device)
            cache = large.new_cache(len(some))
            _, hidden = large(some, cache)
            slots = torch.arange(some.shape[1], device=some.device).expand_as(some)
            out[:] = target_states(hidden, cache, slots)
    return states

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
def held_out_loss(model, windows, device, autocast):
    """Cross-entropy in nats per token."""
    with autocast():
        losses = [text_loss(model, window.to(device)[None]).item() for window in windows]
    return sum(losses) / len(losses)

@torch.no_grad()
def held_out_alpha(large, tiny, windows, device, autocast):
    """Acceptance rate at temperature 1 on held-out text, and its standard error.

    The rate is E[sum min(target_probs, draft_probs)]. Tokens of one window are alike, so windows,
    not tokens, are counted as independent.
    """
    means = []
    for window in windows.to(device):
        with autocast():
            logits = [model(window[None, :-1])[0] for model in (large, tiny)]
        target_probs, draft_probs = (x.float().softmax(-1) for x in logits)
        means.append(torch.minimum(target_probs, draft_probs).sum(-1).mean().item())
    means = torch.tensor(means)
    return means.mean().item(), (means.std() / len(means) ** 0.5).item()

@torch.no_grad()
def heads_alpha(heads, wte, texts, states):
    """Acceptance rate at temperature 1 in texts (N, T), and its standard error.

    -> 2 x (N_AHEAD,), of guesses 1..N_AHEAD
    """
    T = texts.shape[1]
    start = torch.arange(T // 16, T - N_AHEAD, device=wte.device)[None]
    means = []
    for text, state in zip(texts.long().to(wte.device), states.to(wte.device)):
        _, alphas = heads_loss(heads, wte, text[None], state[None], start)
        means.append(alphas.mean(1))
    means = torch.stack(means)
    return means.mean(0), means.std(0) / len(means) ** 0.5

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
    """float32 or bfloat16, by a short race.

    Some processors have bfloat16 arithmetic, others imitate it.
    """

    def step(enabled):
        with torch.autocast(windows.device.type, torch.bfloat16, enabled=enabled):
            text_loss(model, windows).backward()
        model.zero_grad()

    calls = {"float32": lambda: step(False), "bfloat16": lambda: step(True)}
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
        print(str(error) or "interrupted; what is in partial.pt is kept", file=sys.stderr)
        sys.exit(130)

def run(args):
    device = find_device(args.device)
    preset = PRESETS[args.preset or ("gpu" if device.type == "cuda" else "cpu")]
    start = time.perf_counter()
    if not 0 <= args.seed < 2**62:
        raise BadInput(f"seed is {args.seed}; it must be 0 or more and below 2^62")

    # The text.
    texts, held_out_texts = split_corpus(read_corpus(args.data))
    characters = f"{sum(map(len, texts)):,} characters"
    corpus = f"{len(texts)} training texts of {characters}, {len(held_out_texts)} held out"
    print(f"corpus: {corpus}", flush=True)
    torch.manual_seed(args.seed)
    if args.distill:
        large, tiny, encoding = load_pair(args.checkpoints, device, torch.float32)
    else:
        encoding = train_tokenizer(texts, preset.vocab_size, preset.sample)
        n_layer, *widths = preset.large
        sizes = preset.vocab_size, preset.block_size
        large = GPT(GPTConfig(*sizes, n_layer // 2, *widths)).to(device)
        tiny = GPT(GPTConfig(*sizes, *preset.tiny)).to(device)
    block_size = large.config.block_size
    tokens, held_out = encode(encoding, texts), encode(encoding, held_out_texts)
    if min(len(tokens), len(held_out)) < 2 * (block_size + 1):
        sizes = f"{len(tokens)} tokens to train on, {len(held_out)} held out"
        least = f"two windows of {block_size + 1} are the least"
        raise BadInput(f"corpus too small: {sizes}; {least}")
    args.checkpoints.mkdir(parents=True, exist_ok=True)
    sizes = f"{len(tokens):,} to train on, {len(held_out):,} held out"
    print(f"tokenizer: {encoding.n_vocab} tokens; {sizes}", flush=True)

    # Large and tiny, on text.
    settings = {"preset": asdict(preset), "seed": args.seed}
    settings["corpus"] = zlib.crc32(tokens.numpy().tobytes())
    settings["distill"] = [fingerprint(large), fingerprint(tiny)] if args.distill else None
    stages = Run(args.checkpoints, settings, device, args.dtype)
    autocast = stages.autocast
    windows = held_out_windows(held_out, block_size)
    if stages.state["dtype"] is None:
        stages.state["dtype"] = faster_dtype(large, windows[: preset.batch_size].to(device))
    if not stages.path.exists():
        stages.save()  # now, not hours later, is the time to learn that it cannot
    print(f"on {device}, in {stages.state['dtype']}", flush=True)

    def text_batch(model, generator):
        first = torch.randint(len(tokens) - block_size, (preset.batch_size, 1), generator=generator)
        batch = tokens[first + torch.arange(block_size + 1)].long()
        return text_loss(model, batch.to(device, non_blocking=True))

    def train(stage, model, loss_of, steps, seed):
        n_tokens = preset.batch_size * block_size
        return stages.train(stage, model, loss_of, steps, args.seed + seed, n_tokens)

    if not args.distill:
        large = train("shallow", large, text_batch, preset.steps[0], seed=1)
        large = train("large", grow(large), text_batch, preset.steps[1], seed=5)
        tiny = train("tiny", tiny, text_batch, preset.steps[2], seed=2)
    large.eval().requires_grad_(False)
    wte = large.wte.weight
    for title, model in (("large", large), ("tiny", tiny)):
        print(f"{title}: {sum(p.numel() for p in model.parameters()):,} weights", flush=True)
    heads = {
        "markov": new_heads(large, preset.n_heads_embd, markov=True),
        "blind": new_heads(large, preset.n_heads_embd, markov=False),
    }

    # Tiny and the heads, on what large writes: of three batches two at temperature 1, one greedy.
    written = stages.state["written"]
    while len(written) < preset.written:
        i = len(written)
        written.append(write(large, tokens, 128, float(i % 3 < 2), args.seed + 100 + i).cpu())
        stages.save()
        batches = f"{i + 1}/{preset.written} batches of 128 x {block_size} tokens"
        print(f"large writes: {batches}", flush=True)
    own = torch.cat(written)
    held_out_own = write(large, held_out, 64, 1.0, args.seed + 99)
    states = read(large, own, autocast)
    held_out_states = read(large, held_out_own, autocast)

    def own_batch(loss_of):
        def batch(model, generator):
            i = torch.randint(len(own), (preset.batch_size,), generator=generator)
            return loss_of(model, wte, own[i].long().to(device), states[i].to(device), generator)

        return batch

    def some_positions(model, wte, texts, states, generator):
        start = torch.randint(block_size - N_AHEAD, (len(texts), 128), generator=generator)
        return heads_loss(model, wte, texts, states, start.to(device))[0]

    def alphas():
        return [held_out_alpha(large, tiny, t, device, autocast) for t in measured.values()]

    measured = {"held-out text": windows, "what large writes after it": held_out_own.long()}
    before = alphas()
    distil = own_batch(lambda *batch: distillation_loss(*batch[:-1]))
    tiny = train("distil", tiny, distil, preset.steps[3], seed=3)
    after = alphas()
    for kind in heads:
        train(kind, heads[kind], own_batch(some_positions), preset.steps[4], seed=4)

    for title, model in (("large", large), ("tiny", tiny)):
        loss = held_out_loss(model, windows, device, autocast)
        print(f"held-out loss of {title}: {loss:.3f} nats per token")
    for where, *two in zip(measured, before, after):
        one, other = (f"{alpha:.3f} +- {error:.3f}" for alpha, error in two)
        print(f"acceptance rate on {where}: {one}, after distillation {other}")
    for kind in heads:
        rates = zip(*heads_alpha(heads[kind], wte, held_out_own, held_out_states))
        rates = " ".join(f"{alpha:.3f} +- {error:.3f}" for alpha, error in rates)
        title, _ = STAGES[kind]
        print(f"acceptance rate there of {title}, at guesses 1 to {N_AHEAD}:\n    {rates}")

    # All files are complete before any name is taken. A run that dies in between still has
    # partial.pt to go on from.
    save_checkpoint(args.checkpoints / "large.pt.complete", large, encoding)
    save_checkpoint(args.checkpoints / "tiny.pt.complete", tiny, encoding)
    save_heads(args.checkpoints / "heads.pt.complete", large, heads["markov"], heads["blind"])
    # tiny last: with --distill, its old file is what partial.pt belongs to
    for title in ("heads", "large", "tiny"):
        os.replace(args.checkpoints / f"{title}.pt.complete", args.checkpoints / f"{title}.pt")
    stages.path.unlink()
    minutes = f"{(time.perf_counter() - start) / 60:.1f} minutes"
    print(f"wrote large.pt, tiny.pt and heads.pt to {args.checkpoints} after {minutes}")

if __name__ == "__main__":
    run_script(main)
