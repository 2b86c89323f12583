"""OpenAI's GPT-2, from folders as the hub keeps them. Nothing here is downloaded."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from tiktoken._educational import SimpleBytePairEncoding, bpe_train
from tiktoken_ext.openai_public import r50k_pat_str

import bench
import options
import specdec
from conftest import make_gpt
from model import GPT2, has_float16, load_gpt2, load_pair
from specdec import generate
from test_model import gpt2_in_numpy

TEXT = "def naïve(x):\n    return 'x' * 12345  # naïve, isn't it?\n\n\n日本語 \U0001f600\n" * 3
KINDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
KINDS |= {torch.int64: "I64", torch.uint8: "U8"}


def printable():
    """GPT-2 writes bytes as characters: those that can be seen as they are, others from 256 on."""
    seen = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    hidden = [b for b in range(256) if b not in seen]
    return {b: chr(b) for b in seen} | {b: chr(256 + i) for i, b in enumerate(hidden)}


def write_tokenizer(folder, text=TEXT, n=40):
    """A byte-level BPE of 256 + n tokens, and <|endoftext|>, as vocab.json and merges.txt."""
    shown = printable()
    learnt = [t for t in bpe_train(text, 256 + n, r50k_pat_str, visualise=None) if len(t) > 1]
    ranks = {bytes([b]): i for i, b in enumerate(shown)}
    merges = ["#version: 0.2"]
    for token in learnt:
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:  # until the last merge, as an encoder would
            i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], 10**9))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ranks[token] = len(ranks)
        merges.append(" ".join("".join(shown[b] for b in part) for part in parts))
    vocab = {"".join(shown[b] for b in token): i for token, i in ranks.items()}
    vocab["<|endoftext|>"] = len(ranks)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(merges) + "\n")
    return ranks


def safetensors(weights, offset=0, length=None):
    """The bytes of such a file; with lies about its offsets, or the length of its header."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, w in weights.items():
        raw = w.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        place = [len(data) + offset, len(data) + len(raw) + offset]
        header[name] = {"dtype": KINDS[w.dtype], "shape": list(w.shape), "data_offsets": place}
        data += raw
    header = json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def write_gpt2(
    folder, seed=3, kind="safetensors", prefix="transformer.", dtype=torch.float32, **other
):
    """A folder with random weights. -> the model, in float32; all that is in its file."""
    folder.mkdir(exist_ok=True)
    ranks = write_tokenizer(folder)
    model = make_gpt(seed, len(ranks) + 1, 128, n_layer=3).to(dtype).float()
    weights = {prefix + name: w.to(dtype) for name, w in model.state_dict().items()}
    for layer in range(3):  # what old files have beside weights
        weights[f"{prefix}h.{layer}.attn.bias"] = torch.ones(1, 1, 4, 4, dtype=torch.uint8)
        weights[f"{prefix}h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    if prefix:
        weights["lm_head.weight"] = weights[f"{prefix}wte.weight"]
    c = model.config
    config = {"model_type": "gpt2", "vocab_size": c.vocab_size, "n_positions": c.block_size}
    config |= {"n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd, "n_ctx": 1} | other
    (folder / "config.json").write_text(json.dumps(config))
    if kind == "safetensors":
        (folder / "model.safetensors").write_bytes(safetensors(weights))
    else:
        new = kind == "bin"
        torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=new)
    return model, weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind, prefix", [
    ("safetensors", "transformer."), ("safetensors", ""), ("bin", ""), ("old bin", "transformer."),
])  # fmt: skip
def test_both_formats_of_the_hub(tmp_path, kind, prefix, dtype):
    """With and without the prefix, in three dtypes: the same weights, the logits of NumPy."""
    expected, _ = write_gpt2(tmp_path, kind=kind, prefix=prefix, dtype=dtype)
    model, encoding = load_gpt2(tmp_path)
    assert model.config == expected.config and not model.training
    for name, weight in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)
    tokens = encoding.encode_ordinary("def naïve")
    weights = {name: w.double().numpy() for name, w in expected.state_dict().items()}
    logits = gpt2_in_numpy(weights, tokens, expected.config.n_head)
    np.testing.assert_allclose(model(torch.tensor([tokens]))[0][0].detach(), logits, atol=1e-3)


def test_other_dtypes(tmp_path):
    expected, _ = write_gpt2(tmp_path)
    tokens = torch.tensor([[1, 2, 3]])
    model, _ = load_gpt2(str(tmp_path), "cpu", torch.bfloat16)
    assert model.wte.weight.dtype == torch.bfloat16
    dtypes = [torch.bfloat16] + [torch.float16] * has_float16()
    for dtype in dtypes:
        ours, theirs = load_gpt2(tmp_path, dtype=dtype)[0](tokens)[0], expected(tokens)[0]
        assert (ours - theirs).norm() < 0.1 * theirs.norm()


def test_weights_are_the_files_own_memory(tmp_path):
    """Mapped, not copied: they are as far from each other as in the file; nobody writes to it."""
    _, weights = write_gpt2(tmp_path, prefix="")
    before = (tmp_path / "model.safetensors").read_bytes()
    model, _ = load_gpt2(tmp_path)
    names = list(model.state_dict())
    header = json.loads(before[8 : 8 + struct.unpack("<Q", before[:8])[0]])
    place = {name: header[name]["data_offsets"][0] for name in names}
    where = {name: w.data_ptr() for name, w in model.state_dict().items()}
    assert len({where[name] - place[name] for name in names}) == 1
    model.wte.weight.data.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_header_of_any_length(tmp_path):
    """The numbers of old files begin at odd addresses."""
    expected, weights = write_gpt2(tmp_path)
    file = safetensors(weights)
    n = struct.unpack("<Q", file[:8])[0]
    for i in range(4):
        spaces = struct.pack("<Q", n + i) + file[8 : 8 + n] + b" " * i + file[8 + n :]
        (tmp_path / "model.safetensors").write_bytes(spaces)
        model, _ = load_gpt2(tmp_path)
        assert torch.equal(model.wpe.weight, expected.wpe.weight)


@pytest.mark.parametrize("text", [
    TEXT, "", " ", "  two  spaces ", "\r\n\t", "I'll I'LL it's 'tis", "ﬁ²½Ⅷ", "\u00a0\u3000x", "1a2b",
    "<|endoftext|>", "".join(map(chr, range(300))),
])  # fmt: skip
def test_tokens_are_those_of_tiktokens_educational_encoder(tmp_path, text):
    ranks = write_tokenizer(tmp_path)
    write_gpt2(tmp_path)
    _, encoding = load_gpt2(tmp_path)
    slow = SimpleBytePairEncoding(pat_str=r50k_pat_str, mergeable_ranks=ranks)
    tokens = encoding.encode_ordinary(text)
    assert tokens == slow.encode(text, visualise=None)
    assert encoding.decode(tokens) == text
    end = encoding.encode("<|endoftext|>", allowed_special="all")
    assert end == [len(ranks)] == [encoding.eot_token]


def test_a_tokenizer_that_has_changed_is_read_again(tmp_path):
    """tiktoken keeps copies of the files that it reads: of a file in this folder, never."""
    write_gpt2(tmp_path)
    before = load_gpt2(tmp_path)[1].encode_ordinary("xyzxyz")
    ranks = write_tokenizer(tmp_path, "xyz " * 50 + TEXT)
    assert len(ranks) == 296
    assert load_gpt2(tmp_path)[1].encode_ordinary("xyzxyz") != before


def damaged(folder, what):
    """Break one thing of a folder."""
    _, weights = write_gpt2(folder)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    name = "transformer.h.1.mlp.c_fc.weight"
    files = {
        "truncated": whole[:-10],
        "half a header": whole[:500],
        "empty": b"",
        "a few bytes": b"abc",
        "a long header": safetensors(weights, length=10**12),
        "no JSON": struct.pack("<Q", 4) + b"{{{{",
        "offsets before the data": safetensors(weights, offset=-4),
        "offsets behind the data": safetensors(weights, offset=4),
        "missing": safetensors({n: w for n, w in weights.items() if n != name}),
        "extra": safetensors(weights | {"transformer.h.9.ln_1.bias": torch.zeros(8)}),
        "misshapen": safetensors(weights | {name: weights[name].T.contiguous()}),
        "integers": safetensors(weights | {name: weights[name].long()}),
    }
    if what in files:
        file.write_bytes(files[what])
    elif what == "a damaged .bin":
        file.unlink()
        (folder / "pytorch_model.bin").write_bytes(whole)
    elif what == "a program in .bin":
        file.unlink()
        torch.save({"wte.weight": Path("x")}, folder / "pytorch_model.bin")
    elif what == "no config":
        (folder / "config.json").write_text("[")
    elif what == "a shorter config":
        (folder / "config.json").write_text("{}")
    elif what == "other merges":
        (folder / "merges.txt").write_text("#version: 0.2\nx y\n")
    elif what == "too small a vocabulary":
        write_tokenizer(folder, n=39)


@pytest.mark.parametrize("what, words", [
    ("truncated", "lies outside of model.safetensors"), ("half a header", ""), ("empty", ""),
    ("a few bytes", ""), ("a long header", ""), ("no JSON", ""),
    ("offsets before the data", "lies outside"), ("offsets behind the data", "lies outside"),
    ("missing", 'Missing key.*"h.1.mlp.c_fc.weight"'), ("extra", 'Unexpected key.*"h.9.ln_1.bias"'),
    ("misshapen", "size mismatch for h.1.mlp.c_fc.weight"), ("integers", "invalid for input"),
    ("a damaged .bin", ""), ("a program in .bin", ""), ("no config", ""),
    ("a shorter config", "vocab_size"), ("other merges", ""),
    ("too small a vocabulary", "not an embedding for each token"),
])  # fmt: skip
def test_what_is_damaged_is_refused_in_one_line(tmp_path, what, words):
    damaged(tmp_path, what)
    with pytest.raises(ValueError, match=f"damaged, or not a GPT-2.*{words}") as error:
        load_gpt2(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize("name, value", [
    ("model_type", "gpt_bigcode"), ("activation_function", "relu"),
    ("layer_norm_epsilon", 1e-6), ("scale_attn_weights", False),
    ("tie_word_embeddings", False), ("scale_attn_by_inverse_layer_idx", True),
])  # fmt: skip
def test_a_model_that_calculates_otherwise_is_refused(tmp_path, name, value):
    write_gpt2(tmp_path, **{name: value})
    with pytest.raises(ValueError, match=f"its {name} is {value!r}"):
        load_gpt2(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "vocab.json", "merges.txt"])
def test_what_is_missing_is_named(tmp_path, file):
    write_gpt2(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(FileNotFoundError, match=file.replace("model.safetensors", "pytorch_model")):
        load_gpt2(tmp_path)


def test_neither_a_folder_nor_a_name(tmp_path, monkeypatch):
    """A folder of that name comes first; a file, or a mistyped name, is no such thing."""
    (tmp_path / "file").write_text("x")
    for where in (tmp_path / "gtp2", tmp_path / "file"):
        with pytest.raises(ValueError, match="is no folder, and none of the names gpt2, gpt2-me"):
            load_gpt2(where)
    write_gpt2(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    assert load_gpt2("gpt2")[0].config.n_layer == 3


@pytest.mark.parametrize("n_head", [0, -4, 3])
def test_heads_that_do_not_divide_the_width_are_refused(tmp_path, n_head):
    write_gpt2(tmp_path, n_head=n_head)
    with pytest.raises(ValueError, match="multiple of n_head"):
        load_gpt2(tmp_path)


def test_a_name_is_downloaded_once(tmp_path, monkeypatch):
    """Into torch.hub's folder; what an interrupted download left out is fetched the next time."""
    write_gpt2(tmp_path / "source")
    urls = []

    def download(url, path):
        urls.append(url)
        name = url.rsplit("/", 1)[1]
        if name == "merges.txt" and len(urls) < 4:
            raise OSError("no network")
        Path(path).write_bytes((tmp_path / "source" / name).read_bytes())

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(OSError, match="no network"):
        load_gpt2("gpt2-xl")
    for _ in range(2):
        assert load_gpt2("gpt2-xl")[0].config.n_layer == 3
    files = ["config.json", "vocab.json", "merges.txt", "merges.txt", "model.safetensors"]
    assert urls == [f"https://huggingface.co/gpt2-xl/resolve/main/{file}" for file in files]
    file = tmp_path / "hub" / "gpt2-xl" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])  # as when a server breaks off
    with pytest.raises(ValueError, match="damaged, or not a GPT-2; delete it"):
        load_gpt2("gpt2-xl")
    assert set(GPT2) == {"gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2"}


def test_what_takes_long_tells_how_far_it_is(tmp_path, monkeypatch, capsys):
    write_gpt2(tmp_path)
    clock = iter(range(10**6))
    monkeypatch.setattr("model.time.time", lambda: next(clock))
    load_gpt2(tmp_path)
    err = capsys.readouterr().err
    assert "weights read: 40 of " in err and "weights read: 1 of " not in err


@pytest.fixture
def two(tmp_path):
    write_gpt2(tmp_path / "target", 3)
    write_gpt2(tmp_path / "draft", 4)
    return "--target", tmp_path / "target", "--draft", tmp_path / "draft"


def test_a_pair_of_them_tells_the_same_story(two, capsys, monkeypatch):
    clock = iter(range(10**9))
    monkeypatch.setattr(specdec, "now", lambda: next(clock) / 100)
    for more in ((), ("--drafter", "ngram"), ("--dtype", "bfloat16"), ("--drafter", "tree")):
        words = *two, "--prompt", "def naïve", "--max-new-tokens", "8", "--temperature", "0", *more
        specdec.main([*map(str, words)])
        out = capsys.readouterr().out
        assert "The prompt: 'def naïve'" in out and "same text: yes" in out
    specdec.main([*map(str, two), "--max-new-tokens", "1", "--temperature", "0"])
    assert "The prompt: 'It was the best of times" in capsys.readouterr().out


def test_bench_takes_them_too(two, tmp_path, capsys):
    words = *two, "--prompt", "x", "--max-new-tokens", "4", "--temperature", "1", "--threads", "1"
    bench.main([*map(str, words), "--drafter", "model", "--drafter", "ngram"])
    out = capsys.readouterr().out
    assert "draft model k=4" in out and "n-gram" in out
    (tmp_path / "heads.pt").touch()  # heads belong to large.pt, so this file is not opened
    args = options.new_parser("").parse_args([*map(str, two), "--checkpoints", str(tmp_path)])
    assert options.load(args)[2] == []


def test_pairs_that_do_not_fit_are_refused(two, tmp_path, refusal):
    short = *two, "--prompt", "x", "--max-new-tokens", "4"
    for script in specdec, bench:
        assert "a target needs a draft" in refusal(script.main, two[:2])
        assert "heads" in refusal(script.main, [*short, "--drafter", "heads"])
    write_tokenizer(tmp_path / "draft", "xyz " * 50 + TEXT)
    for script in specdec, bench:
        assert "different tokenizers" in refusal(script.main, short)
    target, draft, _ = load_pair(target=two[1], draft=two[1])
    assert generate(target, [1, 2], 4, temperature=0).tokens
