"""Train the pair: `large`, the target, on text; `tiny`, the draft, on the same text; then tiny again, distilled from large.

    python train_tiny.py                      # corpus: the Python standard library of this machine
    python train_tiny.py --data my_texts/     # any text file or folder
    python train_tiny.py --preset tiny-cpu    # a smoke run, under 2 minutes on 2 cores

Ctrl-C saves everything to checkpoints/partial.pt, and the same command goes on from there. large.pt and tiny.pt are replaced
only when the new pair is complete. Why distil: the draft is judged by nothing but its agreement with the target. The
acceptance rate at a position is 1 - TV = sum min(target_probs, draft_probs), so that is what its last training maximises
(DistillSpec, Zhou et al. 2023, arXiv 2310.08461).
"""

import math
import os
import signal
import sys
import sysconfig
import time
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tiktoken._educational import bpe_train

from model import GPT, GPTConfig, make_encoding, save_checkpoint
from specdec import CHECKPOINTS, Parser, find_device, median_seconds


@dataclass(frozen=True)
class Preset:
    vocab_size: int  # the document separator included
    block_size: int  # length of a training window, and the longest text that the pair will decode
    large: tuple  # n_layer, n_head, n_embd
    tiny: tuple
    batch_size: int  # windows per step
    steps: tuple  # of large, of tiny, of distillation
    sample: int  # characters of the corpus that the tokenizer is trained on


PRESETS = {
    "tiny-cpu": Preset(512, 128, (4, 4, 128), (1, 2, 64), 16, (200, 200, 200), 60_000),
    "cpu": Preset(1024, 512, (12, 4, 224), (1, 4, 144), 8, (4000, 2500, 4000), 200_000),
    "gpu": Preset(1024, 1024, (12, 12, 768), (2, 4, 128), 64, (3000, 2000, 4000), 200_000),
}
PEAK_LR = {"large": 2e-3, "tiny": 4e-3, "distil": 2e-3}

# GPT-2's: a word keeps the space before it; letters, digits and signs never share a token.
SPLIT_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


# -- the corpus --------------------------------------------------------------------------------------------------------------


def read_corpus(path=None):
    """[(name, text)] of a text file, of all text files in a folder, or of the Python standard library.

    Files that are not UTF-8 are passed over. OSError: path cannot be read.
    """
    if path is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [f for f in root.rglob("*.py") if not {"site-packages", "dist-packages"} & set(f.parts)]
    else:
        root = Path(path)
        files = [root] if not root.is_dir() else [f for f in root.rglob("*") if f.is_file()]
    documents = []
    for file in sorted(files):
        try:
            documents.append((file.relative_to(root).as_posix(), file.read_text(encoding="utf-8")))
        except UnicodeDecodeError:
            pass
    return documents


def split_corpus(documents):
    """Training texts and held-out texts, about 19 : 1.

    By a hash of the file's name, so that adding a file moves no other one; where files are few, the end of each is held out.
    """
    if len(documents) < 100:
        return [t[: len(t) * 19 // 20] for _, t in documents], [t[len(t) * 19 // 20 :] for _, t in documents]
    held_out = [zlib.crc32(name.encode()) % 20 == 0 for name, _ in documents]
    return [t for (_, t), h in zip(documents, held_out) if not h], [t for (_, t), h in zip(documents, held_out) if h]


def train_tokenizer(texts, vocab_size, sample):
    """Byte-pair encoding of the training texts: tiktoken's own trainer, on `sample` characters taken evenly from all of them."""
    text = "".join(texts)
    n_pieces = max(1, sample // 2000)
    step = max(1, len(text) // n_pieces)
    pieces = "".join(text[i : i + 2000] for i in range(0, len(text), step))[:sample]
    try:
        ranks = bpe_train(pieces, vocab_size - 1, SPLIT_PATTERN, visualise=None)
    except ValueError:  # no pair is left to merge
        raise ValueError(f"corpus too small: it does not yield {vocab_size} different tokens") from None
    return make_encoding(SPLIT_PATTERN, ranks)


def encode(encoding, texts):
    """All texts in one (N,) int32 tensor, each ended by the separator."""
    end = [encoding.eot_token]
    return torch.tensor([t for tokens in encoding.encode_ordinary_batch(texts) for t in tokens + end], dtype=torch.int32)


# -- training ----------------------------------------------------------------------------------------------------------------


def text_loss(model, windows):
    """Mean cross-entropy of the next token, in nats. windows: (B, T + 1) int64."""
    logits, _ = model(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


def distillation_loss(tiny, large, windows):
    """0.9 sum |target_probs - draft_probs| + 0.1 cross-entropy: twice 1 - alpha, and a little text to keep gradients alive.

    The weights are DSpark's (DeepSpec, arXiv 2607.05147). The softmax is that of temperature 1, in float32.
    """
    with torch.no_grad():
        target_probs = large(windows[:, :-1])[0].float().softmax(-1)
    logits = tiny(windows[:, :-1])[0].float()
    distance = (target_probs - logits.softmax(-1)).abs().sum(-1).mean()
    return 0.9 * distance + 0.1 * F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def make_optimizers(model):
    """Muon for the matrices inside the layers, AdamW for the rest; one learning rate serves both.

    Muon (Jordan et al. 2024) makes each step's update near-orthogonal. After 250 steps on the default corpus, held-out loss
    was 3.89 with it and 4.45 with AdamW alone, in about the same time.
    """
    matrices = [p for p in model.h.parameters() if p.ndim == 2]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or not name.startswith("h.")]
    return (
        torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0),
    )


class Interrupted(Exception):
    pass


class Run:
    """The stages of one training run, and partial.pt, from which an interrupted run goes on exactly where it stopped."""

    def __init__(self, folder, settings, preset, device, dtype):
        self.path = Path(folder) / "partial.pt"
        self.preset, self.device = preset, device
        self.state = {"settings": settings, "dtype": dtype, "finished": {}, "stage": None}
        if self.path.exists():
            try:
                state = torch.load(self.path, map_location=device, weights_only=True)
            except Exception as error:  # torch.load raises many kinds
                raise ValueError(f"{self.path} is damaged: delete it") from error
            if state["settings"] != settings:
                raise ValueError(f"{self.path} belongs to a run with other settings: finish that, or delete the file")
            self.state = state
            print(f"going on from {self.path}")

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.state["dtype"] == "bfloat16")

    def save(self):
        torch.save(self.state, f"{self.path}.new")
        os.replace(f"{self.path}.new", self.path)

    def windows(self, tokens, generator):
        """A batch of random stretches of the training tokens, (B, block_size + 1) int64."""
        T = self.preset.block_size + 1
        start = torch.randint(len(tokens) - T + 1, (self.preset.batch_size, 1), generator=generator)
        return tokens[start + torch.arange(T)].long().to(self.device, non_blocking=True)

    def train(self, stage, model, loss_of, tokens, steps, seed):
        """Train model in place for `steps` batches, the learning rate warming up, then a cosine down to zero. Returns it."""
        if stage in self.state["finished"]:
            model.load_state_dict(self.state["finished"][stage])
            return model
        optimizers = make_optimizers(model)
        generator = torch.Generator().manual_seed(seed)
        first = 0
        if self.state["stage"] == stage:
            first = self.state["step"]
            model.load_state_dict(self.state["model"])
            for optimizer, saved in zip(optimizers, self.state["optimizers"]):
                optimizer.load_state_dict(saved)
            generator.set_state(self.state["generator"].cpu())

        interrupted = False

        def interrupt(*_):  # Ctrl-C waits for the end of the step; a second one does not wait
            nonlocal interrupted
            interrupted = True
            signal.signal(signal.SIGINT, signal.default_int_handler)

        signal.signal(signal.SIGINT, interrupt)
        progress = Progress(stage, first, steps, self.preset.batch_size * self.preset.block_size)
        try:
            for step in range(first, steps):
                warm_up = max(1, steps // 50)
                fraction = min((step + 1) / warm_up, (1 + math.cos(math.pi * step / steps)) / 2)
                for optimizer in optimizers:
                    optimizer.param_groups[0]["lr"] = PEAK_LR[stage] * fraction
                with self.autocast():
                    loss = loss_of(model, self.windows(tokens, generator))
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
                progress.show(step + 1, loss)
                if interrupted or (step + 1) % 500 == 0:
                    self.state |= {"stage": stage, "step": step + 1, "model": model.state_dict()}
                    self.state |= {"optimizers": [o.state_dict() for o in optimizers], "generator": generator.get_state()}
                    self.save()
                if interrupted:
                    raise Interrupted(f"stopped after step {step + 1} of {steps} of {stage}; the same command goes on there")
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            progress.close()
        # A copy, since distillation goes on with the same model.
        self.state["finished"][stage] = {name: weight.clone() for name, weight in model.state_dict().items()}
        self.save()
        return model


class Progress:
    """One line that tells step, loss, speed and time left: rewritten in a terminal, once in 30 seconds elsewhere."""

    def __init__(self, stage, first, steps, tokens_per_step):
        self.stage, self.first, self.steps, self.tokens_per_step = stage, first, steps, tokens_per_step
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
        line = f"{self.stage:7} step {step:5}/{self.steps}  loss {self.mean.item():.3f}  {self.tokens_per_step / seconds:7,.0f} tokens/s"
        print(f"{line}  {left // 60:3d} min {left % 60:02d} s left", end="\r" if sys.stdout.isatty() else "\n", flush=True)

    def close(self):
        if sys.stdout.isatty():
            print()


# -- what it came to ---------------------------------------------------------------------------------------------------------


def held_out_windows(tokens, block_size, most=128):
    """Stretches of the held-out tokens, (B, block_size + 1) int64: not overlapping, and spaced evenly over all texts."""
    T = block_size + 1
    n = min(most, len(tokens) // T)
    start = torch.arange(n) * (len(tokens) - T) // max(1, n - 1)
    return tokens[start[:, None] + torch.arange(T)].long()


@torch.no_grad()
def held_out_loss(model, windows, device, autocast):
    """Cross-entropy in nats per token."""
    with autocast():
        return sum(text_loss(model, w.to(device)[None]).item() for w in windows) / len(windows)


@torch.no_grad()
def held_out_alpha(large, tiny, windows, device, autocast):
    """Acceptance rate at temperature 1 on held-out text, E[sum min(target_probs, draft_probs)], and its standard error.

    Tokens of one window are alike, so windows, not tokens, are counted as independent.
    """
    means = []
    for window in windows.to(device):
        with autocast():
            target, draft = large(window[None, :-1])[0], tiny(window[None, :-1])[0]
        means.append(torch.minimum(target.float().softmax(-1), draft.float().softmax(-1)).sum(-1).mean().item())
    means = torch.tensor(means)
    return means.mean().item(), (means.std() / len(means) ** 0.5).item()


def faster_dtype(model, windows):
    """float32 or bfloat16, by a short race: some processors have bfloat16 arithmetic, others imitate it."""

    def step(enabled):
        with torch.autocast(windows.device.type, torch.bfloat16, enabled=enabled):
            text_loss(model, windows).backward()
        model.zero_grad()

    seconds = median_seconds({"float32": lambda: step(False), "bfloat16": lambda: step(True)}, repeats=3)
    return min(seconds, key=seconds.get)


def main(argv=None):
    parser = Parser(description="Train large and tiny on text, then distil tiny from large.")
    parser.add_argument("--data", metavar="PATH", help="a text file or a folder of them (default: the Python standard library)")
    parser.add_argument("--preset", choices=PRESETS, help="default: gpu where there is one, else cpu")
    parser.add_argument("--checkpoints", metavar="DIR", default=CHECKPOINTS, type=Path, help="where the pair goes (default: checkpoints/)")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the arithmetic (default: the faster, by a short race)")
    parser.add_argument("--seed", type=int, default=0, help="equal seeds repeat a run, if --dtype is given as well")
    args = parser.parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except (Interrupted, KeyboardInterrupt) as error:
        print(str(error) or "interrupted", file=sys.stderr)
        sys.exit(130)


def run(args):
    device = find_device(args.device)
    name = args.preset or ("gpu" if device.type == "cuda" else "cpu")
    preset = PRESETS[name]
    start = time.perf_counter()

    texts, held_out_texts = split_corpus(read_corpus(args.data))
    print(f"corpus: {len(texts)} training texts of {sum(map(len, texts)):,} characters, {len(held_out_texts)} held out", flush=True)
    encoding = train_tokenizer(texts, preset.vocab_size, preset.sample)
    tokens, held_out = encode(encoding, texts), encode(encoding, held_out_texts)
    if min(len(tokens), len(held_out)) < 2 * (preset.block_size + 1):
        sizes = f"{len(tokens)} tokens to train on, {len(held_out)} held out"
        raise ValueError(f"corpus too small: {sizes}; two windows of {preset.block_size + 1} are the least")
    args.checkpoints.mkdir(parents=True, exist_ok=True)
    print(f"tokenizer: {encoding.n_vocab} tokens; {len(tokens):,} to train on, {len(held_out):,} held out", flush=True)

    torch.manual_seed(args.seed)
    large = GPT(GPTConfig(preset.vocab_size, preset.block_size, *preset.large)).to(device)
    tiny = GPT(GPTConfig(preset.vocab_size, preset.block_size, *preset.tiny)).to(device)
    windows = held_out_windows(held_out, preset.block_size)
    settings = {"preset": asdict(preset), "seed": args.seed, "corpus": zlib.crc32(tokens.numpy().tobytes())}
    stages = Run(args.checkpoints, settings, preset, device, args.dtype)
    autocast = stages.autocast
    if stages.state["dtype"] is None:
        stages.state["dtype"] = faster_dtype(large, windows[: preset.batch_size].to(device))
    for model, title in ((large, "large"), (tiny, "tiny")):
        print(f"{title}: {sum(p.numel() for p in model.parameters()):,} weights, on {device}, in {stages.state['dtype']}", flush=True)
    large = stages.train("large", large, text_loss, tokens, preset.steps[0], args.seed + 1)
    tiny = stages.train("tiny", tiny, text_loss, tokens, preset.steps[1], args.seed + 2)
    before = held_out_alpha(large, tiny, windows, device, autocast)
    tiny = stages.train("distil", tiny, lambda t, w: distillation_loss(t, large, w), tokens, preset.steps[2], args.seed + 3)
    after = held_out_alpha(large, tiny, windows, device, autocast)

    # Both files are complete before either name is taken. A run that dies in between still has partial.pt to go on from.
    for title, model in (("large", large), ("tiny", tiny)):
        save_checkpoint(args.checkpoints / f"{title}.pt.complete", model, encoding)
    for title in ("large", "tiny"):
        os.replace(args.checkpoints / f"{title}.pt.complete", args.checkpoints / f"{title}.pt")
    stages.path.unlink()

    for title, model in (("large", large), ("tiny", tiny)):
        print(f"held-out loss of {title}: {held_out_loss(model, windows, device, autocast):.3f} nats per token")
    alphas = " before distillation, ".join(f"{alpha:.3f} +- {error:.3f}" for alpha, error in (before, after))
    print(f"acceptance rate on held-out text: {alphas} after")
    print(f"wrote large.pt and tiny.pt to {args.checkpoints} after {(time.perf_counter() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
