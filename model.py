"""GPT-2, whole, in raw PyTorch, with an explicit KV cache; then the trained pair and its files.

The architecture is that of Radford et al. 2019 to the letter: LayerNorm before each sub-layer and
once at the end, learned positions, biases everywhere, GELU in its tanh form, the output layer tied
to the token embedding. Parameters have the names and shapes of OpenAI's published weights.

Letters in shapes: B rows, T new tokens, S tokens to look at, D = n_embd, V = vocab_size.
"""

import json
import math
import os
import sys
import time
import weakref
import zipfile
import zlib
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str

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

    nn.Linear stores the transpose. In this layout published weights load as they are.
    """

    def __init__(self, n_in, n_out, std=0.02):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_in, n_out) * std)
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x):
        return F.linear(x, self.weight.t(), self.bias)

class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        D, std = config.n_embd, 0.02 / (2 * config.n_layer) ** 0.5
        self.n_head = config.n_head
        self.c_attn = Conv1D(D, 3 * D)
        self.c_proj = Conv1D(D, D, std)

    def forward(self, x, mask, cache, layer):
        B, T, D = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, D // self.n_head)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, n_head, T, head_dim)
        q, kv = qkv[0], qkv[1:]
        if cache is not None:
            kv = cache.write(layer, kv)  # of all tokens so far: (2, B, n_head, S, head_dim)
        k, v = kv
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=cache is None)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, D))

class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        D, std = config.n_embd, 0.02 / (2 * config.n_layer) ** 0.5
        self.c_fc = Conv1D(D, 4 * D)
        self.c_proj = Conv1D(4 * D, D, std)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))

class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, mask, cache, layer):
        x = x + self.attn(self.ln_1(x), mask, cache, layer)
        return x + self.mlp(self.ln_2(x))

class GPT(nn.Module):
    """A GPT-2 of any size."""

    def __init__(self, config):
        super().__init__()
        need(0 < config.n_head and config.n_embd % config.n_head == 0, "no multiple of n_head")
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        nn.init.normal_(self.wte.weight, std=0.02)
        nn.init.normal_(self.wpe.weight, std=0.02)

    def forward(self, tokens, cache=None):
        """tokens (B, T) int64 -> logits (B, T, V); last hidden state (B, T, D), after ln_f.

        Without a cache the T tokens are the whole text. With one they follow what each row of the
        cache holds, and are added to it. ValueError: there is no room for so many.
        """
        B, T = tokens.shape
        if cache is None:
            block = self.config.block_size
            need(T <= block, f"{T} tokens are more than the block_size, {block}")
            positions, mask = torch.arange(T, device=tokens.device), None
        else:
            positions, mask = cache.extend(T)
            # A row that is about to end may have guesses past block_size: they do not matter.
            positions = positions.clamp(max=self.config.block_size - 1)
        x = self.wte(tokens) + self.wpe(positions)  # (B, T, D)
        for layer, block in enumerate(self.h):
            x = block(x, mask, cache, layer)
        hidden = self.ln_f(x)
        return F.linear(hidden, self.wte.weight), hidden

    def new_cache(self, batch_size, max_length=None):
        """An empty cache for B rows of up to max_length tokens (default: block_size)."""
        c, weight = self.config, self.ln_f.weight
        shape = c.n_layer, batch_size, c.n_head, max_length or c.block_size, c.n_embd // c.n_head
        return KVCache(*shape, weight.device, weight.dtype)

# -- loading and saving ----------------------------------------------------------------------------

CHECKPOINTS = Path(__file__).parent / "checkpoints"

def load_pair(folder=CHECKPOINTS, device=None, dtype=None, target=None, draft=None):
    """-> target, draft, encoding: large.pt and tiny.pt, or two GPT-2, see `load_gpt2`.

    device None: the GPU where there is one. dtype None: bfloat16 on a GPU; on a CPU float16 for the
    matrices of the layers where there is fbgemm, see `Packed`, else float32.
    OSError, ValueError: as `load_checkpoint`; or the two have different tokenizers.
    """
    need(bool(target) == bool(draft), "a target needs a draft, and a draft a target")
    folder, device = Path(folder), find_device(device)
    default = torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype = dtype or (torch.float16 if has_float16(device) else default)
    if target:
        (target, encoding), (draft, other) = (load_gpt2(x, device, dtype) for x in (target, draft))
    else:
        target, encoding = load_checkpoint(folder / "large.pt", device, dtype)
        draft, other = load_checkpoint(folder / "tiny.pt", device, dtype)
    one, two = ((e._mergeable_ranks, e._pat_str) for e in (encoding, other))
    need(one == two, "target and draft have different tokenizers")
    return target, draft, encoding

def find_device(name=None):
    """A device by name; without one, a GPU if there is one. ValueError: it cannot be used here."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        probe = torch.zeros(1, dtype=torch.float64, device=device)  # in which `categorical` draws
        if probe.is_cuda:
            torch.cuda.set_device(probe.device)  # graphs belong to the current one
        probe.item()
        return device
    except (RuntimeError, AssertionError, TypeError, ImportError):
        raise BadInput(f"there is no device {name!r} here") from None

class BadInput(ValueError):
    """What a user can mend. (Any other ValueError is a mistake of ours.)"""

def need(right, message):
    """BadInput with this message, unless all is right."""
    if not right:
        raise BadInput(message)

def as_rows(prompt):
    """One prompt, or several -> a list of prompts."""
    kind = type(prompt).__name__
    need(kind in ("Tensor", "list", "tuple"), f"the prompt must be token ids; it is a {kind}")
    one = kind == "Tensor" and prompt.ndim < 2 or not len(prompt) or isinstance(prompt[0], int)
    return [prompt] if one else prompt

def as_prompts(prompt, vocab_size, device):
    """A prompt, or several -> B tensors (T,) int64. ValueError: they are no tokens of the model."""
    rows = as_rows(prompt)
    if isinstance(rows, torch.Tensor):
        return as_tokens(rows, "the prompt", vocab_size, device, ndim=2).unbind()
    return [as_tokens(row, "the prompt", vocab_size, device) for row in rows]

def as_tokens(tokens, name, vocab_size, device, ndim=1):
    """(n,) int64, n >= 1, of ids that a model has; of ndim 2, (B, n). ValueError: they are not."""
    try:
        tokens = torch.as_tensor(tokens if isinstance(tokens, torch.Tensor) else list(tokens))
    except (TypeError, ValueError, RuntimeError):
        need(False, f"{name} must be token ids, int64; it is {tokens!r}")
    need(tokens.numel() > 0, f"{name} is empty")
    right = tokens.ndim == ndim and tokens.dtype == torch.int64
    need(right, f"{name} must be token ids, int64; it is {tuple(tokens.shape)} {tokens.dtype}")
    right = 0 <= tokens.min() and tokens.max() < vocab_size
    need(right, f"{name} has tokens outside 0..{vocab_size - 1}")
    return tokens.to(device)

def make_encoding(pattern, ranks):
    """A tiktoken.Encoding of {token bytes: id}, and the next id for <|endoftext|>: `eot_token`."""
    parts = {"pat_str": pattern, "mergeable_ranks": ranks}
    return tiktoken.Encoding("specdec", **parts, special_tokens={"<|endoftext|>": len(ranks)})

def save_checkpoint(path, model, encoding):
    """Write config, weights and tokenizer to one file, which appears complete or not at all."""
    ranks = sorted(encoding._mergeable_ranks, key=encoding._mergeable_ranks.get)
    tokens = [token.decode("latin-1") for token in ranks]
    tokenizer = {"pattern": encoding._pat_str, "tokens": tokens}
    content = {"config": asdict(model.config), "weights": _compact(model), "tokenizer": tokenizer}
    save_whole(path, content)

def load_checkpoint(path, device=None, dtype=None):
    """-> (GPT in evaluation mode, tiktoken.Encoding). dtype None is float32.

    float16 means the matrices of the layers; all else stays float32, see `Packed`.
    OSError: no such file. ValueError: not a checkpoint of this project, or damaged; or no float16
    on this device.
    """
    with _load(path) as content:
        model = GPT(GPTConfig(**content["config"]))
        model.load_state_dict(_exact(content["weights"]))
        tokenizer = content["tokenizer"]
        ranks = {token.encode("latin-1"): i for i, token in enumerate(tokenizer["tokens"])}
        encoding = make_encoding(tokenizer["pattern"], ranks)
        need(encoding.n_vocab == model.config.vocab_size, "not an embedding for each token")
    if dtype == torch.float16:
        return pack(model.to(device)).eval(), encoding
    return model.to(device=device, dtype=dtype or torch.float32).eval(), encoding

def save_whole(path, content):
    """Write a file that appears complete or not at all. OSError: it cannot be written."""
    new = Path(f"{path}.new")
    try:
        torch.save(content, new)
        os.replace(new, path)
    except (OSError, RuntimeError) as error:  # torch.save raises the latter, on a full disk
        new.unlink(missing_ok=True)
        reason, *_ = str(error).split("\n")
        raise OSError(f"{path} cannot be written: {reason}") from error

def load_whole(path):
    """What `save_whole` wrote. OSError: it cannot be read. Any other exception: it is damaged."""
    if not Path(path).exists():
        train = f"`python train_tiny.py --checkpoints {Path(path).parent}` makes it, or goes on"
        raise FileNotFoundError(f"{path} is missing; {train}; `git checkout checkpoints`: ours")
    with zipfile.ZipFile(path) as file:
        need(not file.testzip(), "a checksum is wrong")  # torch.load does not look at them
    return torch.load(path, map_location="cpu", weights_only=True)

@contextmanager
def _load(path, read=load_whole, what="a checkpoint of this project"):
    """What is read, for a block that makes something of it. One line if that fails."""
    try:
        yield read(path)
    except OSError:
        raise
    except Exception as error:
        words = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise BadInput(f"{path} is damaged, or not {what} ({words})") from error

def _compact(module):
    """Weights as a file keeps them: bfloat16, but matrices of the layers in 8 bits.

    Such a matrix (m, n) becomes int8 codes (m, n) and an int8 exponent for each column, (n,), with
    weight = codes * 2^exponent. To load that in bfloat16 or float16 loses nothing more, and to save
    it again changes nothing.
    """
    compact = {}
    for name, weight in module.state_dict().items():
        if "c_" in name and weight.ndim == 2:
            # The largest code of a column is 64..127, or less where float16 has no smaller step.
            exponent = (weight.float().abs().amax(0) / 127.5).frexp().exponent.clamp(min=-24)
            codes = weight.float().ldexp(-exponent).round()
            compact[name] = codes.to(torch.int8), exponent.to(torch.int8)
        else:
            compact[name] = weight.to(torch.bfloat16)
    return compact

def _exact(compact):
    pairs = (name for name, w in compact.items() if isinstance(w, tuple))
    return compact | {name: compact[name][0].float().ldexp(compact[name][1]) for name in pairs}

# -- not for a first reading: 16 bits, draft heads, GPT-2, memory, CUDA graphs ---------------------

class Packed(nn.Module):
    """A Conv1D that multiplies with a copy of its matrix in 16 bits, laid out for fbgemm,
    PyTorch's library for that on x86. The arithmetic stays in float32."""
    def __init__(self, conv):
        super().__init__()
        self.weight = nn.Parameter(conv.weight.detach().half(), requires_grad=False)
        self.bias = nn.Parameter(conv.bias.detach().float(), requires_grad=False)
        self.register_load_state_dict_post_hook(lambda module, keys: module.pack())
        self.pack()
    def pack(self):
        weight = self.weight.float().t().contiguous()
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight, self.bias.data)
    def forward(self, x):
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)

def pack(model):
    """Replace every Conv1D in the layers of a GPT by a `Packed` one. ValueError: not here."""
    need(has_float16(model.wte.weight.device), "float16 is for processors with fbgemm")
    for block in watched(model.h, "layers packed"):
        for part, names in (block.attn, ("c_attn", "c_proj")), (block.mlp, ("c_fc", "c_proj")):
            for name in names:
                setattr(part, name, Packed(getattr(part, name)))
    return model

def has_float16(device=None):
    """Whether `Packed` works there. (On a GPU bfloat16 is as fast, and cannot overflow.)"""
    engines = torch.backends.quantized.supported_engines
    return torch.device(device or "cpu").type == "cpu" and "fbgemm" in engines

class DraftHeads(nn.Module):
    """Guesses from the target's own states: one transformer block, applied once per guess.

        state = c_state(`target_states` at token t-1), or, where the target has not read that far,
                the block's own
        x = c_in(state) + embedding of token t
        x -> block, LayerNorm -> the next state -> distribution of token t+1

    The block has a KV cache of its own, but no position embeddings: the target's state tells it
    where a token stands. One block serves every position: EAGLE (Li et al. 2024, arXiv 2401.15077).
    It sees the token just guessed, so its guesses follow from each other: the idea of DSpark's
    Markov head (arXiv 2607.05147). Without the embedding (markov=False) it is blind: it does not
    know what the guess before became, as Medusa's heads (Cai et al. 2024, arXiv 2401.10774)."""
    def __init__(self, vocab_size, n_state, n_embd, markov=True):
        super().__init__()
        self.config = GPTConfig(vocab_size, block_size=0, n_layer=1, n_head=4, n_embd=n_embd)
        self.c_state = Conv1D(n_state, n_embd)
        self.wte = nn.Embedding(vocab_size, n_embd) if markov else None
        self.c_in = Conv1D(n_embd, n_embd)
        self.h = nn.ModuleList([Block(self.config)])
        self.ln_f = nn.LayerNorm(n_embd)
        self.lm_head = Conv1D(n_embd, vocab_size)
        self.confidence = nn.Linear(n_embd, 1)  # log odds that a guess from a state is accepted
    def forward(self, state, tokens, cache):
        """state (B, T, n_embd) before each of the tokens (B, T) int64 -> the state after it."""
        _, mask = cache.extend(tokens.shape[1])
        x = self.c_in(state)
        x = x if self.wte is None else x + self.wte(tokens)
        return self.ln_f(self.h[0](x, mask, cache, 0))
    new_cache = GPT.new_cache

def target_states(hidden, cache, slots):
    """What heads see of a target at the tokens in these slots (B, T) of its cache: (B, T, n_state).

    The last hidden state there, (B, T, D), and the attention's values in the layers at one and two
    thirds of the depth. The last state is made to tell the next token; layers below know more of
    what led to it: EAGLE-3 (Li et al. 2025, arXiv 2503.01840). Their values lie in the cache."""
    row = torch.arange(len(slots), device=slots.device)[:, None]
    values = cache.v[_thirds(len(cache.v))][:, row, :, slots]
    return torch.cat((hidden, values.flatten(2)), -1)

def target_state_size(config):
    """n_state of `target_states`: D for the hidden state, and D for each layer seen."""
    return config.n_embd * (1 + len(range(config.n_layer)[_thirds(config.n_layer)]))

def _thirds(n_layer):
    third = math.ceil(n_layer / 3)
    return slice(third, None, third)

def save_heads(path, target, markov, blind):
    """Write both kinds of draft heads, and whose they are, to one file."""
    heads = {"markov": _compact(markov), "blind": _compact(blind)}
    save_whole(path, {"target": fingerprint(target)} | heads)

def load_heads(path, target):
    """-> the two DraftHeads, seeing and blind, where and in what dtype the target is.

    OSError: no such file. ValueError: damaged, or trained on another target, whose hidden states
    mean something else."""
    heads = []
    with _load(path) as content:
        for kind in ("markov", "blind"):
            weights = _exact(content[kind])
            (n_state, n_embd), V = weights["c_state.weight"].shape, len(weights["lm_head.bias"])
            heads.append(DraftHeads(V, n_state, n_embd, markov=kind == "markov"))
            heads[-1].load_state_dict(weights)
        right = content["target"] == fingerprint(target)
    need(right, f"the heads in {path} belong to another target: see `train_tiny.py --distill`")
    return [h.to(target.wte.weight).eval() for h in heads]

def fingerprint(model):
    """A number that tells one trained model from another, the same in float32 and in bfloat16."""
    weight = model.wte.weight.detach().to("cpu", torch.bfloat16)
    return zlib.crc32(weight.view(torch.int16).numpy().tobytes())

def check_memory(target, B, length, k):
    """BadInput, unless B rows of this length fit into memory: keys, values, logits, and a tenth."""
    c, weight, free = target.config, target.wte.weight, math.inf
    kv, logits = 2 * c.n_layer * c.n_embd * weight.itemsize, 8 * c.vocab_size
    wanted = 1.1 * B * (length * (kv + logits) + 5 * k * logits)
    if wanted > 1e9 and weight.is_cuda:  # what PyTorch holds and does not use is free as well
        own = torch.cuda.memory_reserved(weight.device) - torch.cuda.memory_allocated(weight.device)
        free = torch.cuda.mem_get_info(weight.device)[0] + own
    elif wanted > 1e9 and os.path.exists("/proc/meminfo"):
        free = 1024 * int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0])
    sizes = f"about {wanted / 1e9:.1f} GB of memory; {free / 1e9:.1f} GB are free"
    need(wanted < free, f"{B} rows of {length} tokens take {sizes}")

GPT2 = "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2"
USUAL = dict(model_type="gpt2", activation_function="gelu_new", layer_norm_epsilon=1e-5,
           scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, tie_word_embeddings=True)

def load_gpt2(where, device=None, dtype=None):
    """OpenAI's GPT-2 -> (GPT in evaluation mode, tiktoken.Encoding). dtype: as `load_checkpoint`.

    where: a folder as the hub keeps them (config.json; model.safetensors or pytorch_model.bin;
    vocab.json and merges.txt), or a name in GPT2, downloaded once into torch.hub's folder.
    OSError: a file is missing, or cannot be downloaded. ValueError: damaged, or not a GPT-2.
    """
    device, folder, weights = find_device(device), Path(where), {}
    if where in GPT2 and not folder.exists():
        folder = Path(torch.hub.get_dir(), where)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "vocab.json", "merges.txt", "model.safetensors"):
            url = f"https://huggingface.co/{where}/resolve/main/{name}"
            if not (folder / name).exists():
                torch.hub.download_url_to_file(url, folder / name)
    need(folder.is_dir(), f"{where} is no folder, and none of the names {', '.join(GPT2)}")
    with _load(folder, _tensors, "a GPT-2" + "; delete it" * (folder != Path(where))) as tensors:
        config = json.loads((folder / "config.json").read_text())
        for name, value in USUAL.items():  # with others, the same weights mean something else
            need(config.get(name, value) == value, f"its {name} is {config.get(name)!r}")
        names = "vocab_size", "n_positions", "n_layer", "n_head", "n_embd"
        with torch.device("meta"):  # no memory: the tensors of the file become the weights
            model = GPT(GPTConfig(*(config[name] for name in names)))
        kind = torch.float32 if dtype in (None, torch.float16) else dtype
        for name, weight in watched(tensors.items(), "weights read"):
            if not name.endswith((".attn.bias", ".attn.masked_bias", "lm_head.weight")):
                weights[name.removeprefix("transformer.")] = weight.to(device, kind)
        model.load_state_dict(weights, assign=True)
        with mock.patch.dict(os.environ, TIKTOKEN_CACHE_DIR=""):  # or it keeps copies of the files
            ranks = data_gym_to_mergeable_bpe_ranks(f"{folder}/merges.txt", f"{folder}/vocab.json")
        encoding = make_encoding(r50k_pat_str, ranks)
        need(encoding.n_vocab == model.config.vocab_size, "not an embedding for each token")
    return (pack(model) if dtype == torch.float16 else model).eval(), encoding

def _tensors(folder):
    """{name: tensor}. A safetensors file is a length in 8 bytes, a JSON header, and raw bytes."""
    file, other = folder / "model.safetensors", folder / "pytorch_model.bin"
    if not file.exists():
        return torch.load(other, "cpu", weights_only=True, mmap=zipfile.is_zipfile(other))
    data = np.memmap(file, mode="c")  # read when it is needed, not copied
    start, tensors = 8 + int.from_bytes(data[:8].tobytes(), "little"), {}
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    for name, entry in json.loads(data[8:start].tobytes()).items():
        if name != "__metadata__":
            kind, (begin, end) = kinds.get(entry["dtype"], torch.uint8), entry["data_offsets"]
            need(0 <= begin < end <= len(data) - start, f"{name} lies outside of {file.name}")
            place = {"offset": start + begin, "count": (end - begin) // kind.itemsize}
            tensors[name] = torch.frombuffer(data, dtype=kind, **place).view(entry["shape"])
    return tensors

def watched(items, what):  # on stderr, once they take over three seconds
    start = time.time()
    for i, item in enumerate(items):
        yield item
        if time.time() > start + 3:
            print(f"{what}: {i + 1} of {len(items)}".ljust(40), end="\r", file=sys.stderr)

def has_graphs(device):
    return device.type == "cuda" and device.index == torch.cuda.current_device()

# cuDNN's attention would compile a plan for every new length, 40 to 60 ms each.
torch.backends.cuda.enable_cudnn_sdp(False)

_spare = []  # streams of graphs that no longer exist, to be used again
def capture(call, generator=None):
    """-> launch, result: call() as a CUDA graph, one launch for hundreds of kernels.

    call() is recorded; it must have run once. launch() replays it: the same kernels, at the same
    addresses. So shapes must be fixed, the host must not look at any result, and state must be
    changed in place. The coins of every replay are new, since the graph knows the generator.
    result(), before the next launch: copies of the tensors that call() returned. Who looks at them
    waits for the last replay, but not for the next one: replays have a stream of their own.
    """
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    # No two living graphs on one stream (of the 32 that PyTorch has): when one dies,
    # PyTorch 2.13 frees what cuBLAS needs on that stream for both (its issue 193402).
    stream = _spare.pop() if _spare else torch.cuda.Stream()
    weakref.finalize(graph, _spare.append, stream)
    with torch.cuda.graph(graph, stream=stream):
        recorded = call()  # nothing happens yet
    def launch():
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            graph.replay()
    def result():
        torch.cuda.current_stream().wait_stream(stream)
        return [x.clone() for x in recorded]
    return launch, result

def now():
    """Seconds, once all that was queued for a GPU is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
