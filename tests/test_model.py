"""The GPT is GPT-2: names, shapes and numbers, against a calculation that shares no code with it.

And its file.
"""

import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import make_gpt, make_heads
from model import (
    GPT, GPTConfig, Packed, as_prompts, check_memory, find_device, fingerprint, has_float16,
    load_checkpoint, load_heads, load_pair, make_encoding, now, pack, save_checkpoint, save_heads,
    save_whole,
)  # fmt: skip


def gpt2_in_numpy(weights, tokens, n_head):
    """GPT-2 on one text, token by token and head by head: logits (T, V)."""

    def layer_norm(x, name):
        x = (x - x.mean()) / math.sqrt(x.var() + 1e-5)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x, name):
        return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    xs = [weights["wte.weight"][token] + weights["wpe.weight"][t] for t, token in enumerate(tokens)]
    layer = 0
    while f"h.{layer}.ln_1.weight" in weights:
        h = f"h.{layer}"
        qkv = [linear(layer_norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn") for x in xs]
        D = len(xs[0])
        d = D // n_head
        for t in range(len(xs)):
            heads = []
            for i in range(n_head):
                q = qkv[t][i * d : (i + 1) * d]
                keys = [qkv[s][D + i * d : D + (i + 1) * d] for s in range(t + 1)]
                values = [qkv[s][2 * D + i * d : 2 * D + (i + 1) * d] for s in range(t + 1)]
                scores = np.array([q @ k / math.sqrt(d) for k in keys])
                probs = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
                heads.append(sum(p * v for p, v in zip(probs, values)))
            x = xs[t] + linear(np.concatenate(heads), f"{h}.attn.c_proj")
            wide = gelu(linear(layer_norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc"))
            xs[t] = x + linear(wide, f"{h}.mlp.c_proj")
        layer += 1
    return np.array([layer_norm(x, "ln_f") @ weights["wte.weight"].T for x in xs])


def test_against_an_independent_calculation():
    model = make_gpt(3, n_layer=3, n_head=2, n_embd=8)
    tokens = torch.randint(7, (11,))
    weights = {name: weight.numpy() for name, weight in model.state_dict().items()}
    expected = gpt2_in_numpy(weights, tokens.tolist(), n_head=2)
    np.testing.assert_allclose(model(tokens[None])[0][0], expected, rtol=0, atol=1e-12)


def test_parameters_are_those_of_the_published_gpt2():
    with torch.device("meta"):
        model = GPT(GPTConfig(50257, block_size=1024, n_layer=12, n_head=12, n_embd=768))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert sum(p.numel() for p in model.parameters()) == 124_439_808
    block = {
        "ln_1.weight": (768,), "ln_1.bias": (768,),
        "attn.c_attn.weight": (768, 2304), "attn.c_attn.bias": (2304,),
        "attn.c_proj.weight": (768, 768), "attn.c_proj.bias": (768,),
        "ln_2.weight": (768,), "ln_2.bias": (768,),
        "mlp.c_fc.weight": (768, 3072), "mlp.c_fc.bias": (3072,),
        "mlp.c_proj.weight": (3072, 768), "mlp.c_proj.bias": (768,),
    }  # fmt: skip
    expected = {f"h.{i}.{name}": shape for i in range(12) for name, shape in block.items()}
    expected |= {"wte.weight": (50257, 768), "wpe.weight": (1024, 768)}
    expected |= {"ln_f.weight": (768,), "ln_f.bias": (768,)}
    assert shapes == expected


def test_hidden_state_is_what_the_logits_come_from(target):
    logits, hidden = target(torch.randint(7, (2, 5)))
    assert hidden.shape == (2, 5, 8)
    torch.testing.assert_close(hidden @ target.wte.weight.T, logits)


def test_more_tokens_than_positions_are_refused(target):
    with pytest.raises(ValueError, match="block_size"):
        target(torch.zeros(1, 49, dtype=torch.int64))
    with pytest.raises(ValueError, match="multiple"):
        GPT(GPTConfig(7, 8, 1, 3, 8))


@pytest.mark.parametrize("markov", [True, False])
def test_heads_add_state_and_embedding(markov):
    """The block's input is c_in(state) + embedding, as `DraftHeads` says."""
    heads, seen = make_heads(2, 20, 8, markov), []
    heads.h[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    state, tokens = torch.randn(2, 3, 8).double(), torch.tensor([[0, 1, 19], [7, 7, 2]])
    after = heads(state, tokens, heads.new_cache(2, 3))
    expected = state @ heads.c_in.weight + heads.c_in.bias
    expected += heads.wte.weight[tokens] if markov else 0
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=1e-12)
    assert after.shape == state.shape and len(seen) == 1
    chance = 1 / (1 + (-after @ heads.confidence.weight[0] - heads.confidence.bias).exp())
    torch.testing.assert_close(heads.confidence(after)[..., 0].sigmoid(), chance)


# -- checkpoints


@pytest.fixture
def encoding():
    ranks = {bytes([i]): i for i in range(256)} | {b"ab": 256, "é".encode(): 257}
    return make_encoding(r"\S+|\s+", ranks)


def test_checkpoint_keeps_weights_config_and_tokenizer(tmp_path, encoding):
    model = make_gpt(4, vocab_size=259).float()
    model.h[0].mlp.c_fc.weight.data[:, :2] *= torch.tensor([0, 1e-38])
    save_checkpoint(tmp_path / "m.pt", model, encoding)
    loaded, same = load_checkpoint(tmp_path / "m.pt")
    assert loaded.config == model.config and not loaded.training
    assert loaded.wte.weight.dtype == torch.float32
    for name, weight in model.state_dict().items():
        if "c_" in name and weight.ndim == 2:
            # 8 bits, of which the largest of a column uses all, or all but one
            error = (loaded.state_dict()[name] - weight).abs()
            assert (error <= (weight.abs().amax(0) / 127.5).clamp(min=2**-24)).all()
        else:
            assert torch.equal(loaded.state_dict()[name], weight.bfloat16().float())
    save_checkpoint(tmp_path / "m.pt", loaded, encoding)
    again = load_checkpoint(tmp_path / "m.pt", dtype=torch.bfloat16)[0].state_dict()
    for name, weight in loaded.state_dict().items():
        assert torch.equal(again[name].float(), weight)
    expected = [99, 256, 32, 257]
    assert same.encode("cab é", allowed_special="all") == encoding.encode("cab é") == expected
    assert same.eot_token == 258 and same._pat_str == encoding._pat_str
    assert [f.name for f in tmp_path.iterdir()] == ["m.pt"]
    assert again["wte.weight"].dtype == torch.bfloat16


def test_no_largest_number_of_a_column_leaves_the_8_bits(tmp_path, encoding):
    """Codes end at 127: the largest numbers around 127.5 steps, with both signs."""
    model = make_gpt(4, vocab_size=259).float()
    largest = torch.tensor([127.4, 127.5, 127.6, 127.7, 128.0, 128.5, 254.9, 255.1])
    weight = model.h[1].attn.c_proj.weight.data  # (8, 8)
    weight[0], weight[1] = largest, -largest
    weight[2:] = 1.0
    save_checkpoint(tmp_path / "m.pt", model, encoding)
    loaded = load_checkpoint(tmp_path / "m.pt")[0].h[1].attn.c_proj.weight
    assert ((loaded - weight).abs() <= weight.abs().amax(0) / 127.5).all()


def test_a_file_keeps_its_name_until_the_new_one_is_complete(tmp_path, monkeypatch):
    """A crash while it is written, or just before it takes its name, does not lose the old one."""
    file = tmp_path / "x.pt"
    save_whole(file, {"a": 1})

    def interrupted(*args):
        assert torch.load(file) == {"a": 1}
        raise KeyboardInterrupt

    for module, name in ((torch, "save"), (os, "replace")):
        with monkeypatch.context() as m:
            m.setattr(module, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                save_whole(file, {"a": 2})
        assert torch.load(file) == {"a": 1}
    save_whole(file, {"a": 2})
    assert torch.load(file) == {"a": 2} and [f.name for f in tmp_path.iterdir()] == ["x.pt"]


needs_fbgemm = pytest.mark.skipif(not has_float16(), reason="this processor has no fbgemm")
PACKED = "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"


def assert_packed_is_plain(packed, plain):
    tokens = torch.randint(259, (3, 20))
    with torch.no_grad():
        logits, expected = packed(tokens)[0], plain(tokens)[0]
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-4)


@needs_fbgemm
def test_float16_is_about_storage_not_arithmetic(tmp_path, encoding):
    """The weights are 16 bits each, and those of a file lose nothing by it.

    What they are multiplied with stays float32.
    """
    save_checkpoint(tmp_path / "m.pt", make_gpt(4, vocab_size=259), encoding)
    dtypes = torch.float16, torch.float32
    packed, plain = (load_checkpoint(tmp_path / "m.pt", dtype=dtype)[0] for dtype in dtypes)
    for block, other in zip(packed.h, plain.h):
        for layer in PACKED:
            ours, theirs = block.get_submodule(layer), other.get_submodule(layer)
            assert isinstance(ours, Packed) and ours.weight.dtype == torch.float16
            assert torch.equal(ours.weight.float(), theirs.weight)
            assert torch.equal(ours.bias, theirs.bias)
    assert packed.wte.weight.dtype == packed.new_cache(1).k.dtype == torch.float32
    assert_packed_is_plain(packed, plain)
    assert not packed.training


@needs_fbgemm
def test_new_weights_reach_what_a_packed_model_multiplies_with(tmp_path, encoding):
    """It has the names of a plain model, takes its weights, and can be saved like one."""
    for seed in (4, 5):
        save_checkpoint(tmp_path / f"{seed}.pt", make_gpt(seed, vocab_size=259), encoding)
    packed, _ = load_checkpoint(tmp_path / "4.pt", dtype=torch.float16)
    other, _ = load_checkpoint(tmp_path / "5.pt")
    packed.load_state_dict(other.state_dict())
    assert_packed_is_plain(packed, other)
    packed.load_state_dict({name: weight.clone() for name, weight in packed.state_dict().items()})
    assert_packed_is_plain(packed, other)
    save_checkpoint(tmp_path / "6.pt", packed, encoding)
    again, _ = load_checkpoint(tmp_path / "6.pt")
    for name, weight in other.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)


def test_float16_without_fbgemm_is_refused(tmp_path, encoding, monkeypatch):
    save_checkpoint(tmp_path / "m.pt", make_gpt(4, vocab_size=259), encoding)
    quantized = torch.backends.quantized.__class__
    monkeypatch.setattr(quantized, "supported_engines", ["none"], raising=False)
    with pytest.raises(ValueError, match="with fbgemm"):
        load_checkpoint(tmp_path / "m.pt", dtype=torch.float16)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 broken zip"])
def test_damaged_checkpoint_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "m.pt").write_bytes(content)
    with pytest.raises(ValueError, match="damaged, or not a checkpoint") as error:
        load_checkpoint(tmp_path / "m.pt")
    assert "\n" not in str(error.value)


def test_foreign_and_truncated_and_missing_checkpoints_are_refused(tmp_path, encoding):
    torch.save({"weights": {}}, tmp_path / "foreign.pt")
    save_checkpoint(tmp_path / "whole.pt", make_gpt(4, vocab_size=259), encoding)
    whole = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[:5000])
    (tmp_path / "byte.pt").write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    content = torch.load(tmp_path / "whole.pt")
    content["weights"].pop("ln_f.bias")
    torch.save(content, tmp_path / "incomplete.pt")
    save_checkpoint(tmp_path / "vocabulary.pt", make_gpt(4, vocab_size=258), encoding)
    save_checkpoint(tmp_path / "padded.pt", make_gpt(4, vocab_size=264), encoding)
    for name in ("foreign", "half", "byte", "incomplete", "vocabulary", "padded"):
        with pytest.raises(ValueError, match="damaged, or not a checkpoint"):
            load_checkpoint(tmp_path / f"{name}.pt")
    with pytest.raises(IsADirectoryError):  # it is no damaged file, since it cannot be read
        load_checkpoint(tmp_path)


def test_what_is_missing_can_be_made_or_restored(tmp_path):
    """In the folder that was named; where a run was interrupted there, it goes on."""
    with pytest.raises(FileNotFoundError) as error:
        load_checkpoint(tmp_path / "missing.pt")
    train = f"`python train_tiny.py --checkpoints {tmp_path}` makes it, or goes on"
    assert f"missing.pt is missing; {train}; `git checkout checkpoints`: ours" in str(error.value)


# -- the pair and its heads


def save_pair(folder, encoding, other=None, sizes=(259, 259)):
    save_checkpoint(folder / "large.pt", make_gpt(4, sizes[0]), encoding)
    save_checkpoint(folder / "tiny.pt", make_gpt(5, sizes[1], n_layer=1), other or encoding)


@pytest.mark.parametrize("fbgemm", [pytest.param(True, marks=needs_fbgemm), False])
def test_a_pair_is_loaded_the_same_way_every_time(tmp_path, encoding, monkeypatch, fbgemm):
    """Its dtype follows from the device alone, so equal seeds give equal text in every process."""
    monkeypatch.setattr("model.has_float16", lambda device=None: fbgemm)
    save_pair(tmp_path, encoding)
    n_threads = torch.get_num_threads()
    for _ in range(2):
        target, draft, same = load_pair(tmp_path, "cpu")
        for model in (target, draft):
            assert isinstance(model.h[0].mlp.c_fc, Packed) is fbgemm
            assert model.wte.weight.dtype == torch.float32
        assert not target.training and not draft.training and same.n_vocab == 259
        assert (len(target.h), len(draft.h)) == (2, 1)
    assert torch.get_num_threads() == n_threads
    for dtype in (torch.float32, torch.bfloat16):
        target, draft, _ = load_pair(tmp_path, "cpu", dtype)
        assert {w.dtype for m in (target, draft) for w in m.parameters()} == {dtype}


def test_on_a_gpu_a_pair_is_in_bfloat16(tmp_path, encoding, monkeypatch):
    asked, gpu = [], torch.device("cuda", 0)

    def load(path, device, dtype):
        asked.append((path.name, device, dtype))
        return make_gpt(4).to(dtype), encoding

    monkeypatch.setattr("model.find_device", lambda name: gpu)
    monkeypatch.setattr("model.load_checkpoint", load)
    load_pair(tmp_path)
    assert asked == [(f"{name}.pt", gpu, torch.bfloat16) for name in ("large", "tiny")]


def test_a_pair_of_two_tokenizers_is_refused(tmp_path, encoding):
    ranks = encoding._mergeable_ranks
    swapped = ranks | {b"ab": 257, "é".encode(): 256}
    for other in (make_encoding(encoding._pat_str, swapped), make_encoding(r"\S|\s+", ranks)):
        save_pair(tmp_path, encoding, other)
        with pytest.raises(ValueError, match="different tokenizers"):
            load_pair(tmp_path, "cpu")


@pytest.mark.parametrize("sizes", [(264, 264), (264, 259), (259, 264)])
def test_a_pair_with_ids_that_the_tokenizer_lacks_is_refused(tmp_path, encoding, sizes):
    """Embeddings are often padded to a round number. A token drawn there could not be shown."""
    save_pair(tmp_path, encoding, sizes=sizes)
    with pytest.raises(ValueError, match="damaged, or not a checkpoint") as error:
        load_pair(tmp_path, "cpu")
    assert "\n" not in str(error.value)
    assert ("large.pt" if sizes[0] == 264 else "tiny.pt") in str(error.value)


def test_heads_belong_to_one_target(tmp_path):
    """Whatever its dtype; but any other embedding of any token is another target."""
    target, file = make_gpt(4).float(), tmp_path / "heads.pt"
    heads = [make_heads(seed, 7, 8, markov).float() for seed, markov in ((1, True), (2, False))]
    save_heads(file, target, *heads)
    for loaded, kept in zip(load_heads(file, target), heads):
        assert not loaded.training and loaded.config == kept.config
        x = torch.randn(1, 3, 8)
        torch.testing.assert_close(loaded.confidence(x), kept.confidence(x), rtol=0.05, atol=0.05)
    assert load_heads(file, make_gpt(4).bfloat16())[0].lm_head.weight.dtype == torch.bfloat16
    assert fingerprint(target) == fingerprint(make_gpt(4).bfloat16())
    if has_float16():  # only matrices in a target's layers are in float16
        assert load_heads(file, pack(make_gpt(4).float()))[0].lm_head.weight.dtype == torch.float32
    for token in range(7):
        other = make_gpt(4).float()
        other.wte.weight[token, token] += 0.5
        with pytest.raises(ValueError, match="belong to another target"):
            load_heads(file, other)


# -- devices


def test_the_device_is_a_gpu_where_there_is_one(monkeypatch):
    """And graphs belong to it from then on."""
    chosen, gpu = [], torch.device("cuda", 1)
    assert find_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device() == torch.device("cpu")
    probe = SimpleNamespace(is_cuda=True, device=gpu, item=lambda: 0.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "zeros", lambda *shape, **options: probe)
    assert find_device() == torch.device("cuda") and chosen == [gpu]


def test_what_is_loaded_is_on_the_device_asked_for(tmp_path, encoding, monkeypatch):
    """As if on a GPU: "meta" is a device that has shapes and no numbers."""
    save_checkpoint(tmp_path / "m.pt", make_gpt(4, vocab_size=259), encoding)
    target, _ = load_checkpoint(tmp_path / "m.pt", "meta")
    monkeypatch.setattr("model.fingerprint", lambda model: 7)
    save_heads(tmp_path / "h.pt", target, make_heads(1, 7, 8), make_heads(2, 7, 8, False))
    for model in (target, *load_heads(tmp_path / "h.pt", target)):
        assert {weight.device.type for weight in model.parameters()} == {"meta"}
    for prompt in ([1, 2], [[1, 2], [3]], torch.tensor([[1, 2], [3, 4]])):
        assert {row.device.type for row in as_prompts(prompt, 7, "meta")} == {"meta"}


def test_a_device_without_results_or_float64_is_refused(monkeypatch):
    """On "meta" there is nothing to look at; on Apple's GPUs there is no float64."""
    with pytest.raises(ValueError, match="no device 'meta' here"):
        find_device("meta")

    def zeros(*shape, dtype=torch.float32, device=None):
        if dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return torch.ones(*shape, dtype=dtype)

    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.raises(ValueError, match="no device 'mps' here"):
        find_device("mps")


def test_the_clock_is_read_when_a_gpu_is_done(monkeypatch):
    did = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: did.append("done"))
    monkeypatch.setattr("time.perf_counter", lambda: did.append("read") or 7.0)
    assert now() == 7.0 and did == ["done", "read"]


def test_memory_is_that_of_the_gpu_where_the_model_is(monkeypatch):
    """1.1 x 9 million rows of 10 tokens, each 2 x 2 x 8 keys and values and 7 x 2 logits, 4 bytes
    each. What PyTorch has taken from the device and does not use, 3 GB here, is free, too."""
    model = make_gpt(1)
    weight = SimpleNamespace(is_cuda=True, itemsize=4, device=torch.device("cuda", 0))
    target = SimpleNamespace(config=model.config, wte=SimpleNamespace(weight=weight))
    B, wanted = 9_000_000, 1.1 * 9_000_000 * 10 * (2 * 2 * 8 * 4 + 7 * 8)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 8e9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5e9)
    for free in (wanted + 1000, wanted - 1000):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free - 3e9, 1e12))
        if free > wanted:
            check_memory(target, B, 10, 0)
        else:
            with pytest.raises(ValueError, match="9000000 rows of 10 tokens take"):
                check_memory(target, B, 10, 0)
