"""The GPT is GPT-2: names, shapes and numbers, against a calculation that shares no code with it. And its file."""

import math

import numpy as np
import pytest
import torch

from conftest import make_gpt, make_heads
from model import GPT, GPTConfig, has_float16, load_checkpoint, make_encoding, save_checkpoint


def gpt2_in_numpy(weights, tokens, n_head):
    """GPT-2 on one text, token by token and head by head, from published weights: logits (T, V)."""

    def layer_norm(x, name):
        return (x - x.mean()) / math.sqrt(x.var() + 1e-5) * weights[f"{name}.weight"] + weights[f"{name}.bias"]

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
                scores = np.array([q @ qkv[s][D + i * d : D + (i + 1) * d] / math.sqrt(d) for s in range(t + 1)])
                probs = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
                heads.append(sum(p * qkv[s][2 * D + i * d : 2 * D + (i + 1) * d] for s, p in enumerate(probs)))
            x = xs[t] + linear(np.concatenate(heads), f"{h}.attn.c_proj")
            xs[t] = x + linear(gelu(linear(layer_norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc")), f"{h}.mlp.c_proj")
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
        model = GPT(GPTConfig(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert sum(p.numel() for p in model.parameters()) == 124_439_808
    block = {
        "ln_1.weight": (768,), "ln_1.bias": (768,), "attn.c_attn.weight": (768, 2304), "attn.c_attn.bias": (2304,),
        "attn.c_proj.weight": (768, 768), "attn.c_proj.bias": (768,), "ln_2.weight": (768,), "ln_2.bias": (768,),
        "mlp.c_fc.weight": (768, 3072), "mlp.c_fc.bias": (3072,), "mlp.c_proj.weight": (3072, 768), "mlp.c_proj.bias": (768,),
    }  # fmt: skip
    expected = {f"h.{i}.{name}": shape for i in range(12) for name, shape in block.items()}
    expected |= {"wte.weight": (50257, 768), "wpe.weight": (1024, 768), "ln_f.weight": (768,), "ln_f.bias": (768,)}
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


def test_heads_add_state_and_embedding_folded_or_not():
    """The block's input is what the docstring of `DraftHeads` says: with everything folded once, as in decoding, and not, as in training."""
    state, tokens, seen = torch.randn(2, 3, 8).double(), torch.tensor([[0, 1, 19], [7, 7, 2]]), []
    for heads in (make_heads(2, 20, 8), make_heads(3, 20, 8, markov=False)):
        heads.h[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        told = (heads.wte.weight[tokens],) if heads.wte is not None else ()
        expected = state + torch.cat((state, *told), -1) @ heads.c_in.weight + heads.c_in.bias
        for folded in (heads.fold(), None):
            heads(state, tokens, heads.new_cache(2, 3), folded=folded)
            torch.testing.assert_close(seen.pop(), expected.flatten(0, 1))


# -- checkpoints


@pytest.fixture
def encoding():
    return make_encoding(r"\S+|\s+", {bytes([i]): i for i in range(256)} | {b"ab": 256, "é".encode(): 257})


def test_checkpoint_keeps_weights_config_and_tokenizer(tmp_path, encoding):
    model = make_gpt(4, vocab_size=259).float()
    model.h[0].mlp.c_fc.weight.data[:, :2] *= torch.tensor([0, 1e-38])
    save_checkpoint(tmp_path / "m.pt", model, encoding)
    loaded, same = load_checkpoint(tmp_path / "m.pt")
    assert loaded.config == model.config and not loaded.training and loaded.wte.weight.dtype == torch.float32
    for name, weight in model.state_dict().items():
        if "c_" in name and weight.ndim == 2:  # 8 bits, of which the largest of a column uses all, or all but one
            assert ((loaded.state_dict()[name] - weight).abs() <= (weight.abs().amax(0) / 127.5).clamp(min=2**-24)).all()
        else:
            assert torch.equal(loaded.state_dict()[name], weight.bfloat16().float())
    save_checkpoint(tmp_path / "m.pt", loaded, encoding)
    again = load_checkpoint(tmp_path / "m.pt", dtype=torch.bfloat16)[0].state_dict()
    assert all(torch.equal(again[name].float(), weight) for name, weight in loaded.state_dict().items())
    assert same.encode("cab é", allowed_special="all") == encoding.encode("cab é") == [99, 256, 32, 257]
    assert same.eot_token == 258
    assert [f.name for f in tmp_path.iterdir()] == ["m.pt"]
    assert again["wte.weight"].dtype == torch.bfloat16


@pytest.mark.skipif(not has_float16(), reason="this processor has no fbgemm")
def test_float16_is_about_storage_not_arithmetic(tmp_path, encoding):
    """The weights are 16 bits each, those of a file lose nothing by it, and what they are multiplied with stays float32."""
    save_checkpoint(tmp_path / "m.pt", make_gpt(4, vocab_size=259), encoding)
    (packed, _), (plain, _) = (load_checkpoint(tmp_path / "m.pt", dtype=dtype) for dtype in (torch.float16, torch.float32))
    for layer in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        ours, theirs = (model.h[1].get_submodule(layer).weight for model in (packed, plain))
        assert ours.dtype == torch.float16 and torch.equal(ours.float(), theirs)
    tokens = torch.randint(259, (3, 20))
    with torch.no_grad():
        logits, expected = packed(tokens)[0], plain(tokens)[0]
    assert logits.dtype == packed.wte.weight.dtype == packed.new_cache(1).k.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-4)


def test_float16_without_fbgemm_is_refused(tmp_path, encoding, monkeypatch):
    save_checkpoint(tmp_path / "m.pt", make_gpt(4, vocab_size=259), encoding)
    monkeypatch.setattr(torch.backends.quantized.__class__, "supported_engines", ["none"], raising=False)
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
    for name in ("foreign", "half", "byte", "incomplete", "vocabulary"):
        with pytest.raises(ValueError, match="damaged, or not a checkpoint"):
            load_checkpoint(tmp_path / f"{name}.pt")
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "missing.pt")
