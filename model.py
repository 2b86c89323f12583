"""GPT-2, whole, in raw PyTorch, with an explicit KV cache; its checkpoint file; how long a pass takes, on a CPU or in a CUDA graph;
and the trained pair, in the dtype and with the threads that make plain decoding fastest.

The architecture is that of Radford et al. 2019 to the letter: LayerNorm before each sub-layer and once at the end, learned
positions, biases everywhere, GELU in its tanh form, the output layer tied to the token embedding. Parameters have the names
and the shapes of OpenAI's published weights, so those fit in one by one, without transposing.

Letters in shapes: B rows, T new tokens, S tokens to look at, D = n_embd, V = vocab_size.
"""

import functools
import math
import operator
import os
import statistics
import time
import weakref
import zipfile
import zlib
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F

from kvcache import KVCache


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int
    block_size: int  # the longest text, in tokens: there are that many position embeddings
    n_layer: int
    n_head: int
    n_embd: int


class Conv1D(nn.Module):
    """y = x W + b with W of shape (n_in, n_out): OpenAI's name and layout for a linear layer.

    nn.Linear stores W transposed. The layout matters here: for a few rows of x in float32 on a CPU, as when a target checks
    guesses, a product with W as it lies costs much less than one with its transpose (README, "What was found").
    """

    def __init__(self, n_in, n_out, std=0.02):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_in, n_out) * std)
        self.bias = nn.Parameter(torch.zeros(n_out))
        self.packed = None

    def pack(self):
        """From now on multiply with a copy of the weight in 16 bits, laid out for fbgemm, PyTorch's library for that on x86.

        The arithmetic stays in float32 (README, "What was found"). `weight` is kept, in 16 bits, to be counted and saved.
        """
        self.packed = torch.ops.quantized.linear_prepack_fp16(self.weight.detach().T.contiguous(), self.bias.detach())
        self.weight.data = self.weight.data.half()

    def forward(self, x):
        if self.packed is not None:
            return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)
        return torch.addmm(self.bias, x, self.weight)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd, std=0.02 / (2 * config.n_layer) ** 0.5)

    def forward(self, x, B, layer, cache, mask):
        T, D = len(x) // B, x.shape[1]
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, D // self.n_head).permute(2, 0, 3, 1, 4)  # (3, B, n_head, T, head_dim)
        k, v = qkv[1:] if cache is None else cache.write(layer, qkv[1:])  # each (B, n_head, S, head_dim)
        y = F.scaled_dot_product_attention(qkv[0], k, v, attn_mask=mask, is_causal=cache is None)
        return self.c_proj(y.transpose(1, 2).reshape(B * T, D))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Conv1D(config.n_embd, 4 * config.n_embd)
        self.c_proj = Conv1D(4 * config.n_embd, config.n_embd, std=0.02 / (2 * config.n_layer) ** 0.5)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, B, layer, cache, mask):
        x = x + self.attn(self.ln_1(x), B, layer, cache, mask)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """A GPT-2 of any size."""

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd {config.n_embd} is not a multiple of n_head {config.n_head}")
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        nn.init.normal_(self.wte.weight, std=0.02)
        nn.init.normal_(self.wpe.weight, std=0.02)

    def forward(self, tokens, cache=None, tree=None):
        """tokens (B, T) int64 -> logits (B, T, V) and the last hidden state (B, T, D), after ln_f.

        Without a cache the T tokens are the whole text. With one they follow what each row of the cache holds, and are added
        to it. A cache longer than block_size has room for guesses there, but no positions of their own. tree: the T tokens
        are nodes of a token tree, see `KVCache.extend`.
        ValueError: more than block_size tokens without a cache, or more than the cache has room for.
        """
        if cache is None:
            if tokens.shape[1] > self.config.block_size:
                raise ValueError(f"{tokens.shape[1]} tokens are more than the block_size, {self.config.block_size}")
            positions, mask = torch.arange(tokens.shape[1], device=tokens.device), None
        else:
            positions, mask = cache.extend(tokens.shape[1], tree)
            # A row of a batch that is about to end may be given guesses past block_size. Nobody reads what comes of them.
            positions = positions.clamp(max=self.config.block_size - 1)
        B, T = tokens.shape
        x = (self.wte(tokens) + self.wpe(positions)).flatten(0, 1)
        for layer, block in enumerate(self.h):
            x = block(x, B, layer, cache, mask)
        hidden = self.ln_f(x)  # as rows still: multiplied as (1, T, D) they would take longer (README, "What was found")
        return F.linear(hidden, self.wte.weight).unflatten(0, (B, T)), hidden.unflatten(0, (B, T))

    def new_cache(self, batch_size, max_length=None, fixed=False):
        """An empty cache for B rows of up to max_length tokens (block_size unless told)."""
        c, weight = self.config, next(self.parameters())
        return KVCache(c.n_layer, batch_size, c.n_head, max_length or c.block_size, c.n_embd // c.n_head, weight.device, weight.dtype, fixed)


def target_states(hidden, cache, slots):
    """What draft heads see of a target at the tokens in these slots (B, T) of its cache: (B, T, n_state).

    The last hidden state there, (B, T, D), and beside it the attention's values in the layers at one and two thirds of the depth.
    The last state is made to tell the next token; layers below know more of what led to it. EAGLE-3 (Li et al. 2025, arXiv
    2503.01840) takes their hidden states for that. The values are those behind a LayerNorm and a matrix, and there already.
    """
    row = torch.arange(len(slots), device=slots.device)[:, None]
    return torch.cat((hidden, cache.v[_thirds(len(cache.v))][:, row, :, slots].flatten(2)), -1)


def target_state_size(config):
    """n_state of `target_states`: D for the hidden state, and D for each layer seen."""
    return config.n_embd * (1 + len(range(config.n_layer)[_thirds(config.n_layer)]))


def _thirds(n_layer):
    third = math.ceil(n_layer / 3)
    return slice(third, None, third)


class DraftHeads(nn.Module):
    """Guesses from the target's own states: one transformer block, applied once per guess.

        state = c_state(`target_states` at token t-1), or, where the target has not read that far, the block's own
        x = state + c_in([state; embedding of token t])  ->  block, LayerNorm  ->  the next state  ->  law of token t+1

    The block attends to all that it read before, so it has a KV cache, in which slot t belongs to token t. Where a token stands
    it knows from the target's state; it has no position embeddings. One block serves every position, and k is free: EAGLE (Li
    et al. 2024, arXiv 2401.15077). Told the token just guessed, its guesses follow from each other, which is the idea of
    DSpark's Markov head (arXiv 2607.05147). Without the embedding (markov=False) it is blind: it guesses on without knowing
    what the guess before became, as Medusa's heads do (Cai et al. 2024, arXiv 2401.10774). The output layer has a bias, unlike a
    GPT's, since it is a `Conv1D`.
    """

    def __init__(self, vocab_size, n_state, n_embd, markov=True):
        super().__init__()
        self.config = GPTConfig(vocab_size, block_size=0, n_layer=1, n_head=4, n_embd=n_embd)
        self.c_state = Conv1D(n_state, n_embd)
        self.wte = nn.Embedding(vocab_size, n_embd) if markov else None
        self.c_in = Conv1D((1 + markov) * n_embd, n_embd, std=((1 + markov) * n_embd) ** -0.5)
        self.h = nn.ModuleList([Block(self.config)])
        self.ln_f = nn.LayerNorm(n_embd)
        self.lm_head = Conv1D(n_embd, vocab_size)
        self.confidence = nn.Linear(n_embd, 1)

    def forward(self, state, tokens, cache, tree=None, folded=None):
        """state (B, T, n_embd) before each of the tokens (B, T) int64 -> the state after it, for `logits`.

        folded: the result of `fold`, from those who make many passes with the same weights.
        """
        _, mask = cache.extend(tokens.shape[1], tree)
        own, told = folded or self.fold()
        x = torch.addmm(F.embedding(tokens.flatten(), told), state.flatten(0, 1), own)
        return self.ln_f(self.h[0](x, len(tokens), 0, cache, mask)).view_as(state)

    def fold(self):
        """state + c_in([state; embedding]) is state @ own + told[token]: -> own (n_embd, n_embd), told (V, n_embd).

        One product of half the size, and no sum. As weights, though, these two would learn more slowly: after 700 steps .592 of
        the first guesses were accepted instead of .637.
        """
        own, *told = self.c_in.weight.split(self.config.n_embd)
        told = self.wte.weight @ told[0] if told else own.new_zeros(self.config.vocab_size, 1)
        return own + torch.eye(len(own), device=own.device, dtype=own.dtype), told + self.c_in.bias

    def state(self, states):
        """The state that follows from `target_states`: (B, T, n_state) -> (B, T, n_embd)."""
        return self.c_state(states.flatten(0, 1)).unflatten(0, states.shape[:2])

    def logits(self, state):
        """Of the next token: (B, T, n_embd) -> (B, T, V)."""
        return self.lm_head(state.flatten(0, 1)).unflatten(0, state.shape[:2])

    def acceptance(self, state):
        """The chance that a guess drawn from this state's law will be accepted, as learnt: (B, T, n_embd) -> (B, T)."""
        return self.confidence(state)[..., 0].sigmoid()

    new_cache = GPT.new_cache


# -- checkpoints -------------------------------------------------------------------------------------------------------------


def make_encoding(pattern, ranks):
    """A tiktoken.Encoding of {token bytes: id} and, as the next id, the separator <|endoftext|>: `eot_token`, our EOS."""
    return tiktoken.Encoding("specdec", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": len(ranks)})


def save_checkpoint(path, model, encoding):
    """Write config, weights and tokenizer to one file, which appears complete or not at all."""
    ranks = sorted(encoding._mergeable_ranks, key=encoding._mergeable_ranks.get)
    tokenizer = {"pattern": encoding._pat_str, "tokens": [token.decode("latin-1") for token in ranks]}
    save_whole(path, {"config": asdict(model.config), "weights": _compact(model), "tokenizer": tokenizer})


def load_checkpoint(path, device=None, dtype=None):
    """-> (GPT in evaluation mode, in dtype (float32 unless told), tiktoken.Encoding).

    float16 means the matrices of the layers; all else stays float32, see `Conv1D.pack`.
    OSError: no such file. ValueError: not a checkpoint of this project, or damaged; or no float16 on this device.
    """
    pack = dtype == torch.float16
    if pack and not has_float16(device):
        raise ValueError("float16 is for processors with fbgemm")
    with _load(path) as content:
        model = GPT(GPTConfig(**content["config"]))
        model.load_state_dict(_exact(content["weights"]))
        tokenizer = content["tokenizer"]
        ranks = {token.encode("latin-1"): i for i, token in enumerate(tokenizer["tokens"])}
        encoding = make_encoding(tokenizer["pattern"], ranks)
        if encoding.n_vocab > model.config.vocab_size:
            raise ValueError("more tokens than embeddings")
    model.to(device=device, dtype=torch.float32 if pack else dtype or torch.float32).eval()
    if pack:
        for module in model.modules():
            if isinstance(module, Conv1D):
                module.pack()
    return model, encoding


def has_float16(device=None):
    """Whether `Conv1D.pack` works there. (On a GPU bfloat16 is as fast, and cannot overflow.)"""
    return torch.device(device or "cpu").type == "cpu" and "fbgemm" in torch.backends.quantized.supported_engines


def save_heads(path, target, markov, blind):
    """Write both kinds of draft heads, and whose they are, to one file."""
    save_whole(path, {"target": fingerprint(target), "markov": _compact(markov), "blind": _compact(blind)})


def load_heads(path, target):
    """-> the two DraftHeads, told and not told the token before, where and in what dtype the target is.

    OSError: no such file. ValueError: damaged, or trained on another target, whose hidden states mean something else.
    """
    heads = []
    with _load(path) as content:
        for kind in ("markov", "blind"):
            weights = _exact(content[kind])
            n_embd, V = weights["lm_head.weight"].shape
            heads.append(DraftHeads(V, len(weights["c_state.weight"]), n_embd, markov=kind == "markov"))
            heads[-1].load_state_dict(weights)
        whose = content["target"]
    if whose != fingerprint(target):
        raise ValueError(f"the heads in {path} belong to another target; `python train_tiny.py --distill` trains new ones")
    return [h.to(target.wte.weight).eval() for h in heads]


def fingerprint(model):
    """A number that tells one trained model from another, the same in float32 and in bfloat16."""
    return zlib.crc32(model.wte.weight.detach().to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())


def _compact(module):
    """Weights as a file keeps them, in bfloat16; but each matrix between embedding and output in 8 bits: codes of the same shape (m, n)
    and an exponent for each column, (n,), both int8, with weight = codes * 2^exponent.

    To load that in bfloat16 or float16 loses nothing more, and to save it again changes nothing.
    """
    compact = {}
    for name, weight in module.state_dict().items():
        if "c_" in name and weight.ndim == 2:
            # A column's largest code is 64..127, unless all are so small that float16 has no smaller step.
            exponent = (weight.float().abs().amax(0) / 127.5).frexp().exponent.clamp(min=-24)
            compact[name] = weight.float().ldexp(-exponent).round().to(torch.int8), exponent.to(torch.int8)
        else:
            compact[name] = weight.to(torch.bfloat16)
    return compact


def _exact(compact):
    return {name: w[0].float().ldexp(w[1]) if isinstance(w, tuple) else w for name, w in compact.items()}


def save_whole(path, content):
    """Write a file that appears complete or not at all. OSError: it cannot be written."""
    new = Path(f"{path}.new")
    try:
        torch.save(content, new)
        os.replace(new, path)
    except (OSError, RuntimeError) as error:  # torch.save raises the latter, on a full disk for instance
        new.unlink(missing_ok=True)
        reason, *_ = str(error).split("\n")
        raise OSError(f"{path} cannot be written: {reason}") from error


def load_whole(path):
    """What `save_whole` wrote. OSError: it cannot be read. Any other exception: the content is wrong, or a checksum."""
    with zipfile.ZipFile(path) as file:
        if file.testzip():  # torch.load does not look at the checksums
            raise ValueError("a checksum is wrong")
    return torch.load(path, map_location="cpu", weights_only=True)


@contextmanager
def _load(path):
    """The content of a file, for a block that makes something of it; whatever goes wrong is told in one line."""
    try:
        yield load_whole(path)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is damaged, or not a checkpoint of this project ({type(error).__name__})") from error


# -- time, and CUDA graphs ----------------------------------------------------------------------------------------------------


def now():
    """A moment. One minus another gives seconds."""
    return Moment() if torch.cuda.is_initialized() else time.perf_counter()


class Moment:
    """When a GPU gets to this point of what is queued for it. Nobody waits for that until two moments are subtracted."""

    def __init__(self):
        self.event = torch.cuda.Event(enable_timing=True, external=True)  # external: in a graph, each replay sets it anew
        self.event.record()

    def __sub__(self, earlier):
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1000


def has_graphs(device):
    return device.type == "cuda" and device.index == torch.cuda.current_device()


_spare = []  # streams of graphs that no longer exist, to be used again


def capture(call, generator=None):
    """A function that does what call() does, as a CUDA graph: one launch for hundreds of kernels, each of which takes longer to
    launch than to run.

    The first call runs as it is, and is then recorded; from then on the recording is replayed: the same kernels, at the same
    addresses. So shapes must be fixed, the host must not look at any result, and state must be changed in place. The coins
    of every replay are new, since the graph knows the generator. With what call() returns comes the moment when that was done:
    to record it takes time as well, but once.
    """
    graph, recorded = torch.cuda.CUDAGraph(), None
    if isinstance(generator, torch.Generator):
        graph.register_generator_state(generator)

    @torch.inference_mode()
    def replay():
        nonlocal recorded
        if recorded is None:
            out, done = call(), now()
            # No two living graphs on one stream (of the 32 that PyTorch has): when one dies, PyTorch 2.13 frees what cuBLAS needs
            # on that stream, also for the other (its issue 193402).
            stream = _spare.pop() if _spare else torch.cuda.Stream()
            weakref.finalize(graph, _spare.append, stream)
            with torch.cuda.graph(graph, stream=stream):
                recorded = call()  # nothing happens yet
            return *out, done
        graph.replay()
        out = (x.clone() if isinstance(x, torch.Tensor) else x for x in recorded)  # the next replay overwrites them
        return *out, now()

    return replay


@torch.inference_mode()
def passes(model, B, length, most):
    """{n: a function that runs the model over n tokens in each of B rows, behind a cache that holds `length` tokens}, n = 1..most."""
    tokens = torch.zeros(B, max(most, length), dtype=torch.int64, device=model.wte.weight.device)
    fixed = has_graphs(tokens.device)
    cache = model.new_cache(B, length + most, fixed)
    model(tokens[:, :length], cache)
    start = cache.length.clone()

    @torch.inference_mode()
    def run(n):
        model(tokens[:, :n], cache)
        cache.rollback(start)
        return ()

    calls = {n: functools.partial(run, n) for n in range(1, most + 1)}
    return {n: capture(call) for n, call in calls.items()} if fixed else calls


def pass_times(model, B, length, most):
    """Seconds of a pass over 1, 2, .., most+1 tokens in each of B rows, most >= 2: a straight line from two tokens on.

    Timed one by one they would scatter by more than another token costs, and a choice of k would follow the luckiest.
    """
    run = passes(model, B, length, most + 1)
    times = time_calls({n: run[n] for n in (1, 2, most + 1)}, 20, list)
    one, two, last = (t * statistics.median(times[1]) for t in relative(times).values())
    return [one] + [two + (last - two) * i / (most - 1) for i in range(most)]


def time_calls(calls, repeats, average=statistics.median):
    """{name: function} -> {name: seconds of a call, on average}. The functions take turns, since the speed of a machine drifts.

    Each is called twice at its turn, and timed the second time: the first finds the caches full of other things.
    """
    times = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            call()
            start = now()
            call()
            times[name].append(now() - start)
    return {name: average(t) for name, t in times.items()}


def relative(times):
    """{name: [seconds, turn by turn]} -> {name: median of its time over the first name's}.

    What disturbs a turn disturbs all who run in it: so ratios within a turn vary less than times do.
    """
    first, *_ = times.values()
    return {name: statistics.median(map(operator.truediv, t, first)) for name, t in times.items()}


# -- the trained pair --------------------------------------------------------------------------------------------------------

CHECKPOINTS = Path(__file__).parent / "checkpoints"


def find_device(name=None):
    """A device by name; without one, the GPU where there is one. ValueError: it cannot be used here."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        probe = torch.zeros(1, dtype=torch.float64, device=device)  # in which `categorical` draws
        if probe.is_cuda:
            torch.cuda.set_device(probe.device)  # events and graphs belong to the current one
        probe.item()
        return device
    except (RuntimeError, AssertionError, TypeError, ImportError):
        raise ValueError(f"there is no device {name!r} here") from None


def load_pair(folder=CHECKPOINTS, device=None, dtype=None, threads=()):
    """-> target, draft, encoding. dtype None: by a short race in plain decoding.

    threads: numbers of threads to choose among in the same race (PyTorch is set to the winner); none: as many as there are. On
    a shared machine differences under 10% may be noise: among those that are so close, the fewest threads are taken, and then a pass
    over five tokens decides. The draft is in float32 where the target is in float16: it is too small to gain by that.
    OSError, ValueError: as `load_checkpoint`; or the two have different tokenizers.
    """
    folder, device = Path(folder), find_device(device)
    dtypes = (dtype,) if dtype else (torch.float32, torch.bfloat16) + (torch.float16,) * has_float16(device)
    targets = {d: load_checkpoint(folder / "large.pt", device, d) for d in dtypes}
    choices = [(d, n) for d in dtypes for n in threads or (torch.get_num_threads(),)]
    for turns, close in (3, 1.5), (20, 1.1):  # a heat, which bfloat16 survives on few processors, and the race
        cost = race(targets, choices, 1, turns)
        choices = [choice for choice in choices if cost[choice] < close * min(cost.values())]
    choices = [(d, n) for d, n in choices if n == min(n for _, n in choices)]
    cost = race(targets, choices, 5, 15)
    dtype, n_threads = min(cost, key=cost.get)
    torch.set_num_threads(n_threads)
    target, encoding = targets[dtype]
    draft, other = load_checkpoint(folder / "tiny.pt", device, target.wte.weight.dtype)
    if other._mergeable_ranks != encoding._mergeable_ranks or other._pat_str != encoding._pat_str:
        raise ValueError(f"large.pt and tiny.pt in {folder} have different tokenizers: their token ids do not mean the same")
    return target, draft, encoding


def race(targets, choices, n, turns):
    """{(dtype, threads): time of a pass over n tokens, in that of the first choice}."""
    if len(choices) == 1:
        return {choices[0]: 1.0}

    def run(dtype, threads):
        torch.set_num_threads(threads)
        one_pass[dtype][n]()

    one_pass = {dtype: passes(targets[dtype][0], 1, 64, n) for dtype in dict(choices)}
    return relative(time_calls({choice: functools.partial(run, *choice) for choice in choices}, turns, list))
