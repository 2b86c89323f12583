"""train_tiny.py: a whole run in a second, interrupted and not; and its parts."""

import contextlib
import functools
import io
import itertools
import math
import os
import re
import shutil
import signal
import sys
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import train_tiny
from conftest import fresh_states, heads_logits, make_gpt, make_heads
from model import BadInput, DraftHeads, load_checkpoint, load_heads
from train_tiny import (
    PRESETS, STAGES, Preset, Progress, Run, agreement_loss, distillation_loss, encode,
    faster_dtype, grow, heads_alpha, heads_loss, held_out_windows, main, make_optimizers, measure,
    new_heads, read, read_corpus, split_corpus, text_loss, ticking, train_tokenizer,
    write,
)  # fmt: skip

SMALL = Preset(264, 16, (4, 2, 8), (1, 1, 8), 8, 4, 4, (2, 128), (3, 6, 4, 5, 3, 2), 3000)
EXPECT = Run.expect
STEPS = dict(zip(("shallow", "large", "tiny", "distil", "markov", "blind"), SMALL.steps))


def make_corpus(folder):
    folder.mkdir()
    for i in range(120):
        (folder / f"{i}.txt").write_text(f"line {i} of the text, and {i * i} words more\n" * 5)
    return folder


def weights(folder):
    """Of all that a run writes: [{name: tensor}]"""
    large, tiny = (load_checkpoint(folder / f"{name}.pt")[0] for name in ("large", "tiny"))
    modules = large, tiny, *load_heads(folder / "heads.pt", large)
    return [module.state_dict() for module in modules]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus") / "texts")


@pytest.fixture(scope="module")
def run(corpus):
    """run(folder, options): main, with a preset that takes a second."""

    def run(folder, *options):
        paths = ["--data", str(corpus), "--checkpoints", str(folder)]
        main(["--preset", "small", "--dtype", "float32", *paths, *options])
        return weights(folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "small", SMALL)
        yield run


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    """finished(options) -> the folder of a complete run, its weights, and what it printed.

    Each is made once. --distill goes on from a copy of the run without it.
    """

    @functools.cache
    def finished(*options):
        folder = tmp_path_factory.mktemp("runs") / "out"
        if "--distill" in options:
            shutil.copytree(finished()[0], folder)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Run, "expect", EXPECT)
            with contextlib.redirect_stdout(io.StringIO()) as out:
                pair = run(folder, *options)
        return folder, pair, out.getvalue()

    return finished


@pytest.fixture
def train(run, tmp_path, monkeypatch):
    """train(folder, options): the same without timing a step of each stage first.

    What happens in place of that draws random numbers, of which nothing later may depend.
    """
    monkeypatch.setattr(Run, "expect", lambda *_: torch.rand(9))
    return lambda folder, *options: run(tmp_path / folder, *options)


def same(pairs, others):
    return all(torch.equal(a[name], b[name]) for a, b in zip(pairs, others) for name in a)


def press_ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


class Says(torch.nn.Module):
    """A model of two tokens, whose distributions are written down: {token: what follows it}."""

    def __init__(self, *probs):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(probs).log())
        self.wte = SimpleNamespace(weight=self.logits)

    def forward(self, tokens):
        return self.logits[tokens], None


def test_a_run_writes_a_pair_and_reports_it(finished):
    folder, (large, tiny, markov, blind), out = finished()
    assert len(large) > len(tiny) and len(markov) > len(blind)
    files = sorted(f.name for f in folder.iterdir())
    assert files == ["heads.pt", "large.pt", "tiny.pt"]
    for words in (
        "held-out loss of large", "held-out loss of tiny", "after distillation",
        "large, half of its layers: 3 steps", "large, all layers: 6 steps", "step     6/6",
        "tokens/s", "min", "left in all", "tiny, on text: 4 steps", "large writes: 256 texts",
        "tiny, distilled: 5 steps", "heads that see the token just guessed: 3 steps",
        "blind heads: 2 steps", "rate there of heads that see the token just guessed,",
        "rate there of blind heads,",
    ):  # fmt: skip
        assert words in out, words
    assert max(map(len, out.replace(str(folder), "").splitlines())) <= 100
    rates = re.findall(r"acceptance rate on .*: (.*), after distillation (.*)", out)
    assert len(rates) == 2 and all(before != after for before, after in rates)
    encoding = load_checkpoint(folder / "tiny.pt")[1]
    text = "line 7 of the text,\n"
    tokens = encoding.encode_ordinary(text)
    assert encoding.decode(tokens) == text and len(tokens) < len(text)


def test_a_run_tells_what_it_does_before_it_does_it(finished):
    """Every stage by its name, first in the plan and then when it comes."""
    _, _, out = finished()
    plan = [f"\n  {title} " for title, _ in STAGES.values()]
    stages = [f"\n{title}" for title, _ in STAGES.values()]
    first = ["reading the corpus", "training the tokenizer", "making tokens", "time that each"]
    at = 0
    for words in (*first, *plan, "\n  in all ", *stages):
        assert words in out[at:], words
        at = out.index(words, at) + 1


def test_seeds(finished, train):
    """Equal seeds repeat a run, also where no step was timed: the timing leaves no trace."""
    assert same(train("a"), finished()[1])
    assert not same(finished()[1], finished("--seed", "1")[1])


def test_ctrl_c_loses_nothing(finished, train, tmp_path, monkeypatch, capsys):
    """Interrupted in each stage and continued, a run ends with the weights of one that was not.

    No step is done twice. A pair that was there stays till then. Once, in the middle of a stage,
    the steps are timed again: that leaves no trace either.
    """
    no_expect = Run.expect
    _, expected, out = finished()
    words = "acceptance rate", "held-out loss", " +- "
    report = [line for line in out.splitlines() if any(w in line for w in words)]
    assert len(report) == 8
    shutil.copytree(finished("--seed", "1")[0], tmp_path / "out")
    progress, show, save_whole = Run.progress, Progress.show, train_tiny.save_whole
    where = pressed = None
    shown = {stage: [] for stage in STAGES}

    def named_progress(self, stage, *args):
        line = progress(self, stage, *args)
        line.stage = stage
        return line

    def show_and_press(self, *args):
        nonlocal pressed
        show(self, *args)
        if hasattr(self, "stage"):
            shown[self.stage].append(self.done)
            if (self.stage, self.done) == where:
                pressed = True
                press_ctrl_c()

    def save_and_press(path, state):
        """An impatient user presses again while the file is written."""
        if pressed or where in state["finished"] or where == len(state["written"]):
            press_ctrl_c()
        save_whole(path, state)

    monkeypatch.setattr(Run, "progress", named_progress)
    monkeypatch.setattr(Progress, "show", show_and_press)
    monkeypatch.setattr(train_tiny, "save_whole", save_and_press)
    steps = ("shallow", 1), ("large", 3), ("tiny", 4), ("distil", 2), ("blind", 1)
    ends = "large", 1, "markov"  # when such a stage is saved, or the first batch of texts
    for where in (*steps[:2], *ends[:1], steps[2], *ends[1:2], ("write", 20), ("read", 30),
                  steps[3], *ends[2:], steps[4], ("measure", 3)):  # fmt: skip
        pressed = False
        monkeypatch.setattr(Run, "expect", EXPECT if where == "large" else no_expect)
        with pytest.raises(SystemExit) as exit:
            train("out")
        err = capsys.readouterr().err
        assert exit.value.code == 130 and err.count("\n") == 1
        if where in steps:
            stage, step = where
            assert f"stopped after step {step} of {STEPS[stage]} of {STAGES[stage][0]};" in err
        else:
            assert err == f"interrupted; {tmp_path / 'out' / 'partial.pt'} is kept\n"
        assert (tmp_path / "out" / "partial.pt").exists()
        assert same(weights(tmp_path / "out"), finished("--seed", "1")[1])

    where, pressed = None, False
    for options in (("--seed", "9"), ("--dtype", "bfloat16")):
        with pytest.raises(BadInput, match="other settings"):
            train("out", *options)
    with monkeypatch.context() as patch:
        patch.setitem(PRESETS, "small", replace(SMALL, steps=(3, 7, 4, 5, 3, 2)))
        with pytest.raises(BadInput, match="other settings"):
            train("out")
    capsys.readouterr()
    assert same(train("out"), expected)
    assert capsys.readouterr().out.count("\n".join(report)) == 1
    assert not (tmp_path / "out" / "partial.pt").exists()
    assert {stage: shown[stage] for stage in STEPS} == {
        stage: list(range(1, n + 1)) for stage, n in STEPS.items()
    }
    assert shown["write"][:35] == [*range(1, 21), *range(16, 31)]  # of two batches by 15 passes


def test_ctrl_c_before_anything_is_saved_says_so(train, tmp_path, monkeypatch, capsys):
    def interrupted(path):
        press_ctrl_c()

    monkeypatch.setattr(train_tiny, "read_corpus", interrupted)
    partial = tmp_path / "out" / "partial.pt"
    for words in (f"there is no {partial} to go on from", f"{partial} is kept"):
        with pytest.raises(SystemExit) as exit:
            train("out")
        assert exit.value.code == 130
        assert capsys.readouterr().err == f"interrupted; {words}\n"
        partial.parent.mkdir(exist_ok=True)
        partial.write_text("")


@pytest.mark.parametrize("steps", [100, 300])
def test_the_learning_rate_warms_up_once_and_falls_to_zero(tmp_path, monkeypatch, steps):
    """Also in a run that is interrupted in its warm-up, and in one after it."""
    rates = []

    class Recorder(torch.optim.SGD):
        def step(self):
            rates.append(self.param_groups[0]["lr"])

    monkeypatch.setattr(train_tiny, "make_optimizers", lambda m: [Recorder(m.parameters(), lr=9)])

    def loss_of(model, generator):
        if len(rates) in (0, 50):
            press_ctrl_c()
        return model.logits.sum()

    for interrupted in (True, True, False):
        stages = Run(tmp_path, {}, torch.device("cpu"), "float32")
        stages.state["steps"] = {"tiny": steps}
        stops = pytest.raises(train_tiny.Interrupted) if interrupted else contextlib.nullcontext()
        with stops:
            stages.train("tiny", Says([0.5, 0.5], [0.5, 0.5]), loss_of, 4e-3, 0, 1)
    i = torch.arange(steps, dtype=torch.float64)
    cosine = (1 + torch.cos(torch.pi * i / steps)) / 2
    expected = 4e-3 * torch.minimum((i + 1) / (steps / 50), cosine)
    torch.testing.assert_close(torch.tensor(rates, dtype=torch.float64), expected)


def test_which_optimizer_has_what():
    model = make_gpt(1)
    muon, adam = make_optimizers(model)
    shapes = [tuple(p.shape) for p in muon.param_groups[0]["params"]]
    assert shapes == [(8, 24), (8, 8), (8, 32), (32, 8)] * 2
    n = sum(len(o.param_groups[0]["params"]) for o in (muon, adam))
    assert n == len(list(model.parameters()))


def test_a_stage_is_expected_to_take_as_long_as_its_steps(tmp_path, monkeypatch, capsys):
    def two_seconds(calls, repeats):
        return dict.fromkeys(calls, 2)

    monkeypatch.setattr(train_tiny, "seconds_of_calls", two_seconds)
    stages = Run(tmp_path, {}, torch.device("cpu"), "float32")
    for n, stage in enumerate(STAGES):
        stages.expect(stage, 10**n, lambda: None)
    assert "  tiny, on text                           3 min 20 s\n" in capsys.readouterr().out
    assert stages.progress("write", "pass", 9).later == 2 * 111110000
    assert stages.progress("measure", "pass", 9).later == 0


def test_steps_by_time(run, corpus, tmp_path, monkeypatch, capsys):
    """Stages of some seconds, on a machine of 2 s a step. To go on there takes no other number, even
    if a step takes longer then. And a preset's own learning rates are used.
    """
    seconds, rates = [2], []

    def clock(calls, repeats):
        for call in calls.values():
            call()
        return dict.fromkeys(calls, seconds[0])

    def stop(path, state):
        save_whole(path, state)
        if "tiny" in state["finished"] and seconds[0] == 2:
            press_ctrl_c()

    class Recorder(torch.optim.SGD):
        def step(self):
            rates.append(self.param_groups[0]["lr"])

    save_whole = train_tiny.save_whole
    monkeypatch.setattr(train_tiny, "make_optimizers", lambda m: [Recorder(m.parameters(), lr=0)])
    monkeypatch.setattr(train_tiny, "seconds_of_calls", clock)
    monkeypatch.setattr(train_tiny, "save_whole", stop)
    preset = replace(SMALL, steps=(6, 12, 8, 11, 1, 4), by_time=True, peaks=(("shallow", 7),))
    monkeypatch.setitem(PRESETS, "small", preset)
    with pytest.raises(SystemExit):
        run(tmp_path / "out")
    seconds[0] = 3
    assert max(rates) == 7
    run(tmp_path / "out")
    out = capsys.readouterr().out
    titles = [(STAGES[stage][0], n) for stage, n in zip(STEPS, (3, 6, 4, 6, 1, 2))]
    assert all(f"{title}: {n} steps\n" in out for title, n in titles)
    assert re.findall(r"tiny, distilled +0 min (\d+) s", out) == ["12", "18"]  # 6 steps


def test_large_is_compiled_while_it_is_trained_and_at_no_other_time(finished, train, monkeypatch, capsys):
    """As on a GPU. The weights are the same but for rounding; texts are written by what is not compiled."""
    def is_compiled(stages, stage):
        return stage in ("shallow", "large")

    def compile(block):
        compiled.append(block)
        return torch.nn.Module.compile(block, backend="eager")

    def write_and_look(large, *args):
        assert all(block._compiled_call_impl is None for block in large.h)
        return write(large, *args)

    compiled = []
    monkeypatch.setattr(Run, "is_compiled", is_compiled)
    monkeypatch.setattr("model.Block.compile", compile, raising=False)
    monkeypatch.setattr(train_tiny, "write", write_and_look)
    monkeypatch.setattr(Run, "expect", EXPECT)
    pairs = zip(train("out"), finished()[1])
    assert len(compiled) == 2 * (2 + 4)  # layers, when a step is timed and when they are trained
    for ours, theirs in pairs:
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0.05)
    assert capsys.readouterr().out.count("compiling\n") == 2


@pytest.mark.parametrize("terminal, shown", [(True, range(11, 21)), (False, range(12, 21, 2))])
def test_the_time_left_is_that_of_the_whole_run(monkeypatch, capsys, terminal, shown):
    """Ten steps of 2 s, then 100 s of later stages. Ten steps were done before."""
    clock = itertools.count(step=2)
    monkeypatch.setattr(train_tiny.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    with Progress("step", 20, done=10, later=100) as progress:
        for _ in range(10):
            progress.show(lambda seconds: f"  {seconds} s each")
    lines = capsys.readouterr().out.split("\r" if terminal else "\n")
    assert len(lines.pop().strip()) == 0
    assert [line.strip() for line in lines] == [
        f"step    {n}/20  2.0 s each  {minutes} min {seconds:02d} s left in all"
        for n in shown
        for minutes, seconds in [divmod(100 + 2 * (20 - n), 60)]
    ]


def test_progress_comes_soon_and_then_ever_more_rarely(monkeypatch, capsys):
    """Not in a terminal: a thousand steps of a second are told in forty lines, from 3 s on."""
    clock = itertools.count()
    monkeypatch.setattr(train_tiny.time, "perf_counter", lambda: next(clock))
    with Progress("step", 1000) as progress:
        list(progress.watch(range(1000)))
    lines = capsys.readouterr().out.splitlines()
    assert 20 < len(lines) < 60 and lines[:2] == ["  step     3/1000", "  step     6/1000"]


BAD_CORPORA = {
    "missing": "{}",
    "empty folder": "no UTF-8 text in {}; files passed over: 0",
    "binary": "no UTF-8 text in {}; files passed over: 1",
    "binary folder": "no UTF-8 text in {}; files passed over: 2",
    "too short": "corpus too small: it does not yield 264 different tokens",
    "few tokens": "3 to train on, 2 held out; two windows of 17 are the least",
    "nothing": "the path of --data is empty",
    "not a folder": "out is a file; it must be a folder",
}


@pytest.mark.parametrize("what", BAD_CORPORA)
def test_bad_corpus_is_refused_in_words(train, tmp_path, what):
    data = tmp_path / "data"
    if what in ("empty folder", "binary folder"):
        data.mkdir()
        for name in ("a", "b") * (what == "binary folder"):
            (data / name).write_bytes(b"\xff")
    elif what == "too short":
        data.write_text("Oh.")
    elif what == "few tokens":
        data.write_text("Too short.")
    elif what == "binary":
        data.write_bytes(bytes(range(256)))
    options = ["--data", str(data) if what != "nothing" else ""]
    if what == "not a folder":
        (tmp_path / "out").write_text("")  # noticed first: the corpus is missing, too
    with pytest.raises((BadInput, OSError)) as error:
        train("out", *options)
    assert BAD_CORPORA[what].format(data) in str(error.value)
    assert not (tmp_path / "out").is_dir()


def test_corpus_is_utf8_text(tmp_path):
    (tmp_path / "b.txt").write_text("é", encoding="utf-8")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "c.py").write_text("c")
    (tmp_path / "image").write_bytes(b"\xff\xfe\x00")
    assert read_corpus(tmp_path) == ([("a/c.py", "c"), ("b.txt", "é")], 1)
    assert [text for _, text in read_corpus(tmp_path / "b.txt")[0]] == ["é"]


def test_the_corpus_by_default_is_the_library_and_the_packages_of_the_project():
    """With what they need: pluggy for pytest, regex for tiktoken; not what an extra of theirs needs, nor pip."""
    files = train_tiny.default_files()
    assert all(path.is_file() and path.suffix == ".py" for path in files.values())
    tops = {name.split("/")[0] for name in files}
    assert {"json", "torch", "numpy", "tiktoken", "pytest", "hypothesis", "pluggy", "regex"} <= tops
    assert not {"pip", "site-packages"} & tops
    found = train_tiny.packages(["# a comment", "", "pytest==1.0", "Typing_Extensions>=4", "no-such-package"])
    assert {"pytest", "pluggy", "iniconfig", "typing-extensions"} <= set(found)
    assert not {"hypothesis", "no-such-package"} & set(found)  # hypothesis: pytest's extra, "dev"


def test_the_tokenizer_sees_the_whole_corpus():
    sampled = train_tokenizer(["aaab " * 3000, "cccd " * 3000], 260, 4000)
    assert {b"aa", b"cc"} <= set(sampled._mergeable_ranks)


def test_what_cannot_tell_how_far_it_is_tells_how_long_it_has_taken(capsys):
    with ticking(every=0.01):
        time.sleep(0.1)
    assert re.fullmatch(r"(  0 min 00 s so far\n)+", capsys.readouterr().out)
    time.sleep(0.03)
    assert capsys.readouterr().out == ""


def test_each_text_ends_with_the_separator(corpus):
    encoding = train_tokenizer([text for _, text in read_corpus(corpus)[0]], 280, 3000)
    texts = [f"text {i}" for i in range(150)]
    tokens = encode(encoding, texts)
    assert tokens.dtype == torch.int32
    assert encoding.decode(tokens.tolist()).split("<|endoftext|>") == [*texts, ""]


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


def test_held_out_text_is_used_for_the_report_and_for_nothing_else(
    finished, train, tmp_path, capsys, monkeypatch
):
    """Held-out texts full of characters that no training text has: they look worse.

    No token is made of them, and large writes after them once: what the report is about.
    """
    texts, writes = make_corpus(tmp_path / "texts"), []
    held_out = split_corpus(read_corpus(texts)[0])[1]
    for file in texts.iterdir():
        if file.read_text() in held_out:
            file.write_text("\u4e16\u754c" * 200, encoding="utf-8")

    (texts / "image").write_bytes(b"\xff")

    def recorded(large, tokens, n, temperature, *args):
        writes.append((set(tokens.tolist()), n, temperature))
        return write(large, tokens, n, temperature, *args)

    monkeypatch.setattr(train_tiny, "write", recorded)
    steps = 1, 60, 1, 1, 1, 1
    preset = replace(SMALL, steps=steps, written=(4, 128), sample=10**5)
    monkeypatch.setitem(PRESETS, "small", preset)
    train("out", "--data", str(texts))
    out = capsys.readouterr().out
    assert "117 training texts" in out and "3 held out; passed over, as not UTF-8: 1\n" in out
    training = float(re.findall(r"60/60  loss ([\d.]+)", out)[0])
    assert float(re.search(r"loss of large: ([\d.]+)", out)[1]) > training + 0.5
    encoding = load_checkpoint(tmp_path / "out" / "tiny.pt")[1]
    foreign = set(encoding.encode_ordinary("\u4e16\u754c"))
    assert len(foreign) == 6
    assert [bool(foreign & tokens) for tokens, _, _ in writes] == [False] * 4 + [True]
    assert [(n, t) for _, n, t in writes] == [(128, 1), (128, 1), (128, 0), (128, 1), (64, 1)]


def test_what_is_measured_on_text():
    """After token 0 the target says (.7, .3) and a draft (.5, .5): alpha is .8; after 1 it is 1."""
    target, draft = Says([0.7, 0.3], [0.5, 0.5]), Says([0.5, 0.5], [0.5, 0.5])
    windows = torch.tensor([[0, 0, 0, 1], [0, 1, 1, 1], [1, 1, 1, 1]] * 2)
    losses, alphas, errors = measure(target, [draft, target], windows, contextlib.nullcontext)
    log = torch.tensor([0.7, 0.3, 0.5]).log()
    of_each = torch.tensor([(2 * log[0] + log[1]) / 3, (log[1] + 2 * log[2]) / 3, log[2]])
    torch.testing.assert_close(losses, -torch.stack([of_each.mean(), log[2], of_each.mean()]))
    alpha = torch.tensor([0.8, 1 - 0.2 / 3, 1] * 2)
    torch.testing.assert_close(alphas, torch.stack([alpha.mean(), torch.tensor(1.0)]))
    torch.testing.assert_close(errors, torch.stack([alpha.std() / 6**0.5, torch.tensor(0.0)]))
    one = text_loss(target, windows[:1])
    torch.testing.assert_close(one, -of_each[0])


def test_heads_are_measured_text_by_text():
    """The standard error is that of six texts, not of their tokens."""
    target, heads, texts = make_gpt(1), make_heads(2, 7, 16), torch.randint(7, (6, 32))
    states, start = fresh_states(target, texts), torch.arange(2, 28)[None]
    wte = target.wte.weight
    means = [
        heads_loss(heads, wte, texts[i : i + 1], states[i : i + 1], start)[1].mean(1)
        for i in range(6)
    ]
    means = torch.stack(means)
    alphas, errors = heads_alpha(heads, wte, texts, states)
    torch.testing.assert_close(alphas, means.mean(0))
    torch.testing.assert_close(errors, means.std(0) / 6**0.5)


def test_the_loss_of_distillation_in_figures():
    """0.9 of the distance at temperature 1, and 0.1 of the cross-entropy of the next token."""
    draft, windows = Says([0.5, 0.5], [0.9, 0.1]), torch.tensor([[0, 1, 1, 0]])
    target = torch.tensor([[0.7, 0.3], [0.2, 0.8]])
    distance = torch.tensor([0.4, 1.4, 1.4])  # after 0, 1, 1
    log = -torch.tensor([0.5, 0.1, 0.9]).log()  # of 1, 1, 0
    expected = 0.9 * distance.mean() + 0.1 * log.mean()
    states = target.log()[windows]  # of a target whose output matrix is 1
    torch.testing.assert_close(distillation_loss(draft, torch.eye(2), windows, states), expected)
    _, alpha = agreement_loss(draft.logits, target.log(), torch.tensor([0, 0]))
    torch.testing.assert_close(alpha, torch.tensor([0.8, 0.3]))


def test_the_faster_type_wins_and_the_race_leaves_no_gradient(monkeypatch):
    model, calls = make_gpt(1).float().requires_grad_(True), []

    def seconds_of_calls(race, repeats):
        for name, call in race.items():
            calls.append(name)
            call()
        return {"float32": seconds, "bfloat16": 2}

    monkeypatch.setattr(train_tiny, "seconds_of_calls", seconds_of_calls)
    for seconds, faster in ((1, "float32"), (3, "bfloat16")):
        assert faster_dtype(model, torch.randint(7, (2, 9))) == faster
    assert calls == ["float32", "bfloat16"] * 2
    assert all(weight.grad is None for weight in model.parameters())


def test_distillation_raises_the_acceptance_rate():
    """A hundred steps on its loss bring the draft closer to the target.

    With draft = target alpha is 1 without an error.
    """
    large, tiny = make_gpt(1).float(), make_gpt(2).float().requires_grad_(True)
    windows = torch.randint(7, (16, 17), generator=torch.Generator().manual_seed(0))
    hidden = large(windows)[1]
    before = deepcopy(tiny)
    optimizer = torch.optim.Adam(tiny.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        distillation_loss(tiny, large.wte.weight, windows, hidden).backward()
        optimizer.step()
    _, alphas, errors = measure(large, [before, tiny, large], windows, torch.no_grad)
    assert 0 < errors[0] < 0.1 and alphas[1] > alphas[0] + 0.1
    assert (alphas[2].item(), errors[2].item()) == pytest.approx((1, 0), abs=1e-6)


def test_heads_learn_to_count():
    """0 1 2 .. 6 0 1 ..: guess i after token t is t + i + 1, also where they were not trained."""
    torch.manual_seed(0)
    wte, heads = 5 * torch.eye(7), DraftHeads(7, 7, 32)
    texts = (torch.arange(7)[:, None] + torch.arange(40)) % 7
    hidden = wte[(texts + 1) % 7]  # a target that is sure of the next token
    start = torch.arange(0, 30, 3).expand(7, -1)
    optimizer = torch.optim.Adam(heads.parameters(), lr=0.02)
    before, error = heads_alpha(heads, wte, texts, hidden)
    for _ in range(80):
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
    assert (heads.confidence(state).sigmoid() > 0.8).all()  # and they know that they are right


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


def test_the_loss_of_heads_in_figures():
    """Of guess i the distance, the cross-entropy of the text's own token, and the confidence's.

    Heads that expect .3 at every guess, after token 4 of a text: exp(-(i - 1) / 4) weighs guess i.
    """
    target, heads, texts = make_gpt(1), make_heads(2, 7, 16), torch.randint(7, (1, 12))
    heads.confidence.weight.zero_()
    heads.confidence.bias.fill_(math.log(0.3 / 0.7))
    states, (text,) = fresh_states(target, texts), texts.tolist()
    draft = heads_logits(heads, target, text[:5], text[5:8]).softmax(-1)
    probs = target(texts)[0][0, 4:8].softmax(-1)
    expected = 0.0
    for i in range(4):
        distance = (probs[i] - draft[i]).abs().sum()
        alpha = torch.minimum(probs[i], draft[i]).sum()
        error = -alpha * math.log(0.3) - (1 - alpha) * math.log(0.7)
        loss = 0.9 * distance - 0.1 * draft[i, text[5 + i]].log() + error
        expected += math.exp(-i / 4) * loss
    loss, _ = heads_loss(heads, target.wte.weight, texts, states, torch.tensor([[4]]))
    torch.testing.assert_close(loss.double(), expected, rtol=0, atol=1e-5)


def test_the_confidence_changes_no_guess():
    """Its weights have gradients of their own; those of all others are as if they were 0."""
    target, texts = make_gpt(1), torch.randint(7, (2, 12))
    heads = make_heads(2, 7, 16).requires_grad_(True)
    states, start = fresh_states(target, texts), torch.tensor([[1, 5], [3, 7]])
    gradients = []
    for _ in range(2):
        heads.zero_grad()
        heads_loss(heads, target.wte.weight, texts, states, start)[0].backward()
        gradients.append({name: weight.grad for name, weight in heads.named_parameters()})
        heads.confidence.weight.data.zero_()
    assert gradients[0].pop("confidence.weight").abs().max() > 0
    assert gradients[0].pop("confidence.bias").abs().max() > 0
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())


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
    """As wide as the target, they see all of it; they are never wider; narrower, they see most.
    Their tokens weigh as much as the state to which they are added."""
    torch.manual_seed(0)
    target, tokens = make_gpt(1, vocab_size=20).float(), torch.randint(20, (8, 12))
    states = torch.randn(1, 5, 16)
    for n_embd in (8, 12, 4):
        heads = new_heads(target, n_embd, True)
        assert heads.config.n_embd == min(n_embd, 8)
        with torch.no_grad():
            ours = heads.lm_head(heads.c_state(states))
            theirs = states[..., :8] @ target.wte.weight.T
        error = ((ours - theirs).norm() / theirs.norm()).item()
        assert error < 1e-5 if n_embd >= 8 else 1e-2 < error < 0.7
        with torch.no_grad():
            state = heads.c_state(F.pad(target(tokens)[1], (0, 8))).std()
        assert 0.7 < heads.wte.weight.std() / state < 1.4
        assert torch.equal(heads.c_in.weight, torch.eye(min(n_embd, 8)))


def test_the_confidence_learns_how_often_guesses_are_accepted():
    """A target as good as a coin, and heads that cannot know: half of the guesses are accepted."""
    torch.manual_seed(0)
    wte, heads = 20 * torch.eye(2), DraftHeads(2, 2, 8, markov=False)
    texts = torch.randint(2, (16, 20))
    hidden, start = wte[texts.roll(-1, 1)].float(), torch.arange(0, 14, 2).expand(16, -1)
    optimizer = torch.optim.Adam(heads.parameters(), lr=0.02)
    for _ in range(50):
        optimizer.zero_grad()
        heads_loss(heads, wte, texts, hidden, start)[0].backward()
        optimizer.step()
    heads.requires_grad_(False)
    before = heads.c_state(F.pad(hidden, (0, 0, 1, -1)))
    state = heads(before, texts, heads.new_cache(16, 20))
    assert 0.35 < heads.confidence(state).sigmoid().mean() < 0.65


def test_large_writes_after_prompts_of_the_corpus():
    large, tokens = make_gpt(1).float(), torch.arange(100, dtype=torch.int32) % 7
    texts = write(large, tokens, 5, 1.0, seed=3)
    assert texts.shape == (5, 48) and texts.dtype == torch.int32
    assert all(((text[1:3] - text[:2]) % 7 == 1).all() for text in texts)
    assert torch.equal(texts, write(large, tokens, 5, 1.0, seed=3))
    assert not torch.equal(texts, write(large, tokens, 5, 1.0, seed=4))


def test_distill_keeps_large_and_goes_on_with_tiny(finished, train):
    _, (large, tiny, *heads), _ = finished()
    folder, (large2, tiny2, *heads2), out = finished("--distill")
    assert same([large], [large2]) and not same([tiny], [tiny2]) and not same(heads, heads2)
    assert "after distillation" in out and "tiny, distilled: 5 steps" in out
    for stage in ("shallow", "large", "tiny"):
        assert STAGES[stage][0] not in out
    assert not (folder / "partial.pt").exists()
    with pytest.raises(OSError, match="large.pt"):
        train("nowhere", "--distill")


@pytest.mark.parametrize("options", [(), ("--distill",)])
def test_an_end_that_is_interrupted_can_be_repeated(
    finished, train, tmp_path, monkeypatch, capsys, options
):
    """When the report is made, and when the names are taken, as if the process were killed.

    With --distill the run belongs to the pair that was there: both files of it.
    """
    expected = finished(*options)[1]
    out, other = tmp_path / "out", finished("--seed", "1")[0]
    shutil.copytree((finished() if options else finished("--seed", "1"))[0], out)

    def killed(*_):
        raise KeyboardInterrupt

    def replace_and(stop, name, replace=os.replace):
        def replace_and_stop(new, path):
            replace(new, path)
            if Path(path).name == name:
                stop()

        return replace_and_stop

    kills = (train_tiny, "measure", killed), (os, "replace", replace_and(killed, "large.pt"))
    for kill in kills:
        with monkeypatch.context() as patch:
            patch.setattr(*kill)
            with pytest.raises(SystemExit):
                train("out", *options)
        assert "partial.pt is kept" in capsys.readouterr().err
        assert (out / "partial.pt").exists()
    for name in ("large.pt", "tiny.pt") * bool(options):
        own = (out / name).read_bytes()
        shutil.copy(other / name, out)
        with pytest.raises(BadInput, match="other settings"):
            train("out", *options)
        (out / name).write_bytes(own)
    with monkeypatch.context() as patch:  # Ctrl-C is too late, as the pair is complete
        patch.setattr(os, "replace", replace_and(press_ctrl_c, "large.pt"))
        assert same(train("out", *options), expected)
    assert not (out / "partial.pt").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk is always full here")
def test_a_full_disk_is_found_out_at_once(train, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "partial.pt.new").symlink_to("/dev/full")
    with pytest.raises(OSError, match="partial.pt cannot be written"):
        train("out")
    assert "step" not in capsys.readouterr().out
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("content", [b"PK half", {"config": 1}, [1]])
def test_a_damaged_partial_run_is_refused(train, tmp_path, content):
    (tmp_path / "out").mkdir()
    file = tmp_path / "out" / "partial.pt"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(BadInput, match="partial.pt is damaged: delete it"):
        train("out")
