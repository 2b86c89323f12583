"""train_tiny.py: a whole run in seconds, interrupted and not; and its parts."""

import functools
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import train_tiny
from conftest import fresh_states, heads_logits, make_gpt, make_heads
from model import DraftHeads, load_checkpoint, load_heads
from train_tiny import (
    PRESETS, STAGES, Preset, distillation_loss, grow, heads_alpha, heads_loss, held_out_alpha,
    held_out_windows, main, new_heads, read, read_corpus, split_corpus, text_loss, write,
)  # fmt: skip

SMALL = Preset(280, 16, (4, 2, 8), (1, 1, 8), 8, 4, 2, (3, 6, 4, 5, 3), 3000)


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(120):
        (folder / f"{i}.txt").write_text(f"line {i} of the text, and {i * i} words more\n" * 5)
    return folder


def weights(folder):
    """Of all that a run writes: [{name: tensor}]"""
    large, tiny = (load_checkpoint(folder / f"{name}.pt")[0] for name in ("large", "tiny"))
    modules = large, tiny, *load_heads(folder / "heads.pt", large)
    return [module.state_dict() for module in modules]


@pytest.fixture
def train(monkeypatch, tmp_path, corpus):
    """train(folder, options) runs main with a preset that takes a second."""
    monkeypatch.setitem(PRESETS, "small", SMALL)

    def train(folder, *options):
        paths = ["--data", str(corpus), "--checkpoints", str(tmp_path / folder)]
        main(["--preset", "small", "--dtype", "float32", *paths, *options])
        return weights(tmp_path / folder)

    return train


def same(pairs, others):
    return all(torch.equal(a[name], b[name]) for a, b in zip(pairs, others) for name in a)


def test_a_run_writes_a_pair_and_reports_it(train, tmp_path, capsys):
    large, tiny, markov, blind = train("out")
    assert len(large) > len(tiny) and len(markov) > len(blind)
    files = sorted(f.name for f in (tmp_path / "out").iterdir())
    assert files == ["heads.pt", "large.pt", "tiny.pt"]
    out = capsys.readouterr().out
    for words in (
        "held-out loss of large", "held-out loss of tiny", "after distillation",
        "large, half of its layers: 3 steps", "large, all layers: 6 steps", "step     6/6",
        "tokens/s", "min", "left", "tiny, on text: 4 steps", "2/2 batches",
        "tiny, distilled: 5 steps", "heads that see the token just guessed: 3 steps",
        "blind heads: 3 steps", "rate there of heads that see the token just guessed,",
        "rate there of blind heads,",
    ):  # fmt: skip
        assert words in out, words
    assert max(map(len, out.replace(str(tmp_path), "").splitlines())) <= 100
    encoding = load_checkpoint(tmp_path / "out" / "tiny.pt")[1]
    text = "line 7 of the text,\n"
    tokens = encoding.encode_ordinary(text)
    assert encoding.decode(tokens) == text and len(tokens) < len(text)


def test_seeds(train):
    assert same(train("a"), train("b"))
    assert not same(train("a"), train("c", "--seed", "1"))


def test_ctrl_c_loses_nothing(train, tmp_path, monkeypatch, capsys):
    """Interrupted in five stages and continued, a run ends with the weights of one that was not.

    A pair that was there stays till then.
    """
    expected = train("whole")
    words = "acceptance rate", "held-out loss", " +- "
    lines = capsys.readouterr().out.splitlines()
    report = [line for line in lines if any(w in line for w in words)]
    assert len(report) == 8
    other = train("out", "--seed", "9")
    show = train_tiny.Progress.show
    for stage, step in (("shallow", 1), ("large", 3), ("tiny", 1), ("distil", 2), ("blind", 1)):

        def interrupt(self, done, loss):
            show(self, done, loss)
            if (self.stage, done) == (stage, step):
                os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr(train_tiny.Progress, "show", interrupt)
        with pytest.raises(SystemExit) as exit:
            train("out")
        err = capsys.readouterr().err
        assert exit.value.code == 130 and f"step {step} of " in err
        assert f" of {STAGES[stage][0]};" in err
        assert (tmp_path / "out" / "partial.pt").exists()
        assert same(weights(tmp_path / "out"), other)

    monkeypatch.setattr(train_tiny.Progress, "show", show)
    monkeypatch.setitem(PRESETS, "small", replace(SMALL, steps=(3, 7, 4, 5, 3)))
    with pytest.raises(SystemExit):
        train("out")
    assert "other settings" in capsys.readouterr().err
    monkeypatch.setitem(PRESETS, "small", SMALL)
    for other in (("--seed", "9"), ("--dtype", "bfloat16")):
        with pytest.raises(SystemExit) as exit:
            train("out", *other)
        assert exit.value.code == 2 and "other settings" in capsys.readouterr().err
    assert same(train("out"), expected)
    assert capsys.readouterr().out.count("\n".join(report)) == 1
    assert not (tmp_path / "out" / "partial.pt").exists()


@pytest.mark.parametrize("what", ["missing", "empty folder", "too short", "binary", "not a folder"])
def test_bad_corpus_gets_one_line_and_status_2(train, tmp_path, capsys, what):
    data = tmp_path / "data"
    if what == "empty folder":
        data.mkdir()
    elif what == "too short":
        data.write_text("Too short.")
    elif what == "binary":
        data.write_bytes(bytes(range(256)))
    options = ["--data", str(data)]
    if what == "not a folder":
        (tmp_path / "out").write_text("")
        options = []
    with pytest.raises(SystemExit) as exit:
        train("out", *options)
    err = capsys.readouterr().err
    assert exit.value.code == 2 and err.count("\n") == 1 and "error: " in err
    assert not (tmp_path / "out").is_dir()


def test_corpus_is_utf8_text_and_the_standard_library_by_default(tmp_path):
    (tmp_path / "b.txt").write_text("é")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "c.py").write_text("c")
    (tmp_path / "image").write_bytes(b"\xff\xfe\x00")
    assert read_corpus(tmp_path) == [("a/c.py", "c"), ("b.txt", "é")]
    assert [text for _, text in read_corpus(tmp_path / "b.txt")] == ["é"]


def test_the_split_is_by_file_and_stays_when_files_are_added():
    documents = [(f"{i}.py", f"text {i}") for i in range(1000)]
    train, held_out = split_corpus(documents)
    assert 30 <= len(held_out) <= 70
    assert sorted(train + held_out) == sorted(text for _, text in documents)
    assert set(held_out) <= set(split_corpus(documents + [("new.py", "new")])[1])
    few = [("one.txt", "x" * 100), ("two.txt", "y" * 20)]
    assert split_corpus(few) == (["x" * 95, "y" * 19], ["x" * 5, "y"])


def test_held_out_windows_are_spread_over_all_held_out_tokens():
    windows = held_out_windows(torch.arange(1000), 9, most=4)
    assert windows.shape == (4, 10) and windows[:, 0].tolist() == [0, 330, 660, 990]
    assert held_out_windows(torch.arange(25), 9).tolist() == [list(range(10)), list(range(15, 25))]


def test_the_report_is_about_held_out_text(train, corpus, capsys, monkeypatch):
    """Held-out texts full of characters that no training text has must look worse."""

    def loss_of_large(out):
        return float(re.search(r"loss of large: ([\d.]+)", out)[1])

    monkeypatch.setitem(PRESETS, "small", replace(SMALL, steps=(1, 60, 1, 1, 1)))
    train("a")
    before = loss_of_large(capsys.readouterr().out)
    held_out = split_corpus(read_corpus(corpus))[1]
    for file in corpus.iterdir():
        if file.read_text() in held_out:
            file.write_text("\u4e16\u754c" * 200)
    train("b")
    assert loss_of_large(capsys.readouterr().out) > before + 0.5


def test_distillation_raises_the_acceptance_rate():
    """A hundred steps on its loss bring the draft closer to the target.

    With draft = target alpha is 1 without an error.
    """
    large, tiny = make_gpt(1).float(), make_gpt(2).float().requires_grad_(True)
    windows = torch.randint(7, (16, 17), generator=torch.Generator().manual_seed(0))
    hidden = large(windows)[1]
    context = torch.no_grad
    before, error = held_out_alpha(large, tiny, windows, "cpu", context)
    optimizer = torch.optim.Adam(tiny.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        distillation_loss(tiny, large.wte.weight, windows, hidden).backward()
        optimizer.step()
    after, _ = held_out_alpha(large, tiny, windows, "cpu", context)
    assert 0 < error < 0.1 and after > before + 0.1
    same = held_out_alpha(large, large, windows, "cpu", context)
    assert same == pytest.approx((1, 0), abs=1e-6)


def test_heads_learn_to_count():
    """0 1 2 .. 6 0 1 ..: guess i after token t is t + i + 1, also where they were not trained."""
    torch.manual_seed(0)
    wte, heads = 5 * torch.eye(7), DraftHeads(7, 7, 32)
    texts = (torch.arange(7)[:, None] + torch.arange(40)) % 7
    hidden = wte[(texts + 1) % 7]  # a target that is sure of the next token
    start = torch.arange(30).expand(7, -1)
    optimizer = torch.optim.Adam(heads.parameters(), lr=0.01)
    before, error = heads_alpha(heads, wte, texts, hidden)
    for _ in range(150):
        optimizer.zero_grad()
        heads_loss(heads, wte, texts, hidden, start)[0].backward()
        optimizer.step()
    after, _ = heads_alpha(heads, wte, texts, hidden)
    assert before.shape == error.shape == (4,) and (before < 0.4).all() and (after > 0.9).all()
    heads.requires_grad_(False)
    cache, guesses = heads.new_cache(1, 20), []
    state = heads.c_state(F.pad(wte[[1, 2, 3]], (0, 0, 1, 0))[None])  # before tokens 0 to 3
    state = heads(state, torch.tensor([[0, 1, 2, 3]]), cache)[:, -1:]
    for _ in range(6):
        guesses.append(heads.lm_head(state).argmax().item())
        state = heads(state, torch.tensor([guesses[-1:]]), cache)
    assert guesses == [4, 5, 6, 0, 1, 2]
    assert (heads.acceptance(state) > 0.8).all()  # and they know that they are right


@pytest.mark.parametrize("markov", [True, False])
def test_heads_are_trained_on_what_they_do_when_decoding(markov):
    """The acceptance that the loss sees is that of heads that read the text up to `start`.

    They then guess on with states of their own.
    """
    target, heads, texts = make_gpt(1), make_heads(2, 7, 16, markov), torch.randint(7, (2, 12))
    start = torch.tensor([[0, 3, 7], [5, 2, 7]])
    logits = target(texts)[0]
    states = fresh_states(target, texts)
    alphas = heads_loss(heads, target.wte.weight, texts, states, start)[1].view(4, 2, 3)
    for b in range(2):
        for m, s in enumerate(start[b].tolist()):
            text, guesses = texts[b, : s + 1].tolist(), texts[b, s + 1 : s + 4].tolist()
            draft = heads_logits(heads, target, text, guesses).softmax(-1)
            expected = torch.minimum(draft, logits[b, s : s + 4].softmax(-1)).sum(-1)
            torch.testing.assert_close(alphas[:, b, m].double(), expected, rtol=0, atol=1e-5)


def test_grown_it_says_the_same_and_the_new_layers_learn():
    small, tokens = make_gpt(1, n_layer=2).float().requires_grad_(True), torch.randint(7, (3, 12))
    for name, weight in small.named_parameters():
        if name.endswith("bias"):
            weight.data.normal_()
    grown = grow(small)
    assert grown.config == replace(small.config, n_layer=4) and len(grown.h) == 4
    memory = [weight.data_ptr() for model in (small, grown) for weight in model.parameters()]
    assert len(set(memory)) == len(memory)
    assert torch.equal(grown(tokens)[0], small(tokens)[0])
    text_loss(grown, tokens).backward()
    assert all(block.mlp.c_proj.weight.grad.abs().max() > 0 for block in grown.h)


def test_large_reads_texts_for_their_states():
    """Those of a pass without a cache, to 8 bits of bfloat16; six texts, as it reads by fours."""
    target, texts = make_gpt(1, n_layer=7).float(), torch.randint(7, (6, 12))
    expected = fresh_states(target, texts)
    for enabled in (False, True):
        autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16, enabled=enabled)
        states = read(target, texts.int(), autocast)
        assert states.shape == (6, 12, 24)
        error = (states.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert error.max() < (0.1 if enabled else 0.01)


def test_heads_begin_as_the_targets_own_output_layer():
    """As wide as the target, they see all of it; they are never wider; narrower, they see most."""
    target = make_gpt(1, vocab_size=20).float()
    states = torch.randn(1, 5, 16)
    for n_embd in (8, 12, 4):
        heads = new_heads(target, n_embd, True)
        assert heads.config.n_embd == min(n_embd, 8)
        with torch.no_grad():
            ours = heads.lm_head(heads.c_state(states))
            theirs = states[..., :8] @ target.wte.weight.T
        error = ((ours - theirs).norm() / theirs.norm()).item()
        assert error < 1e-5 if n_embd >= 8 else 1e-2 < error < 0.7


def test_the_confidence_learns_how_often_guesses_are_accepted():
    """A target as good as a coin, and heads that cannot know: half of the guesses are accepted."""
    torch.manual_seed(0)
    wte, heads = 20 * torch.eye(2), DraftHeads(2, 2, 8, markov=False)
    texts = torch.randint(2, (16, 20))
    hidden, start = wte[texts.roll(-1, 1)].float(), torch.arange(14).expand(16, -1)
    optimizer = torch.optim.Adam(heads.parameters(), lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        heads_loss(heads, wte, texts, hidden, start)[0].backward()
        optimizer.step()
    heads.requires_grad_(False)
    before = heads.c_state(F.pad(hidden, (0, 0, 1, -1)))
    state = heads(before, texts, heads.new_cache(16, 20))
    assert 0.35 < heads.acceptance(state).mean() < 0.65


def test_large_writes_after_prompts_of_the_corpus():
    large, tokens = make_gpt(1).float(), torch.arange(100, dtype=torch.int32) % 7
    texts = write(large, tokens, 5, 1.0, seed=3)
    assert texts.shape == (5, 48) and texts.dtype == torch.int32
    assert all(((text[1:3] - text[:2]) % 7 == 1).all() for text in texts)
    assert torch.equal(texts, write(large, tokens, 5, 1.0, seed=3))
    assert not torch.equal(texts, write(large, tokens, 5, 1.0, seed=4))


def test_distill_keeps_large_and_goes_on_with_tiny(train, tmp_path, capsys):
    large, tiny, *heads = train("out")
    capsys.readouterr()
    large2, tiny2, *heads2 = train("out", "--distill")
    assert same([large], [large2]) and not same([tiny], [tiny2]) and not same(heads, heads2)
    out = capsys.readouterr().out
    assert "after distillation" in out and "tiny, distilled: 5 steps" in out
    for stage in ("shallow", "large", "tiny"):
        assert STAGES[stage][0] not in out
    assert not (tmp_path / "out" / "partial.pt").exists()
    with pytest.raises(SystemExit) as exit:
        train("nowhere", "--distill")
    assert exit.value.code == 2 and "large.pt" in capsys.readouterr().err


def test_ctrl_c_while_large_writes_keeps_what_is_written(train, tmp_path, monkeypatch, capsys):
    expected = train("whole")
    calls = []

    def write_once(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write(*args)

    monkeypatch.setattr(train_tiny, "write", write_once)
    with pytest.raises(SystemExit) as exit:
        train("out")
    assert exit.value.code == 130
    assert same(train("out"), expected)
    assert len(calls) == 4  # one batch, the interrupted one, the same again, and the held-out one


@pytest.mark.parametrize("when", ["the names are taken", "the report is made"])
@pytest.mark.parametrize("options", [(), ("--distill",)])
def test_an_end_that_is_interrupted_can_be_repeated(
    train, tmp_path, monkeypatch, capsys, when, options
):
    for folder in ("whole", "out"):
        train(folder, "--seed", "5")
    expected = train("whole", *options)
    capsys.readouterr()

    def interrupted(*args):
        raise KeyboardInterrupt

    def replace_and_stop(new, path, replace=os.replace):
        replace(new, path)
        if Path(path).name == "large.pt":
            raise KeyboardInterrupt

    with monkeypatch.context() as m:
        if when == "the names are taken":
            m.setattr(os, "replace", replace_and_stop)
        else:
            m.setattr(train_tiny, "held_out_loss", interrupted)
        with pytest.raises(SystemExit):
            train("out", *options)
    assert "partial.pt is kept" in capsys.readouterr().err
    assert (tmp_path / "out" / "partial.pt").exists()
    assert same(train("out", *options), expected)
    assert not (tmp_path / "out" / "partial.pt").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk is always full here")
def test_a_full_disk_is_found_out_at_once(train, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "partial.pt.new").symlink_to("/dev/full")
    with pytest.raises(SystemExit) as exit:
        train("out")
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and "partial.pt cannot be written" in err
    assert err.count("\n") == 1 and "step" not in out
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("content", [b"PK half", {"config": 1}, [1]])
def test_a_damaged_partial_run_is_refused(train, tmp_path, capsys, content):
    (tmp_path / "out").mkdir()
    file = tmp_path / "out" / "partial.pt"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(SystemExit) as exit:
        train("out")
    assert exit.value.code == 2 and "partial.pt is damaged: delete it" in capsys.readouterr().err
