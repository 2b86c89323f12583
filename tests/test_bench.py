"""`python tests/bench.py` and `python tests/check.py` as a user meets them, on a tiny pair."""

import io
import itertools
import json
import math
import re
import subprocess
import sys
import time
from collections import Counter
from copy import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bench
import check
import options
import specdec
from conftest import make_gpt
from model import DraftHeads, load_heads, load_pair, make_encoding, save_checkpoint, save_heads
from specdec import HeadsDrafter, ModelDrafter, NGramDrafter, TreeDrafter, generate
from train_tiny import seconds_of_calls

ROOT = Path(__file__).parent.parent
BYTES = {bytes([i]): i for i in range(256)}
OWN = '''
import torch
from specdec import ModelDrafter, categorical, verify

class Mine(ModelDrafter):
    pass

class Repeats:
    """Guesses that the newest token is repeated; it needs no draft model."""
    def start(self, target, cache, rows, hidden):
        self.V = target.config.vocab_size
    def propose(self, rows, k, probs_of, generator):
        guesses = rows.newest().expand(-1, k)
        return guesses, torch.nn.functional.one_hot(guesses, self.V).float()
    def commit(self, rows, hidden):
        pass

def right(target_probs, draft_probs, draft_tokens, generator=None):
    return verify(target_probs, draft_probs, draft_tokens, generator)

def wrong(target_probs, draft_probs, draft_tokens, generator=None):
    """After a rejection the target's own distribution takes the place of the residual."""
    n, _ = verify(target_probs, draft_probs, draft_tokens, generator)
    return n, categorical(target_probs[torch.arange(len(n)), n], generator)

def no_rule(target_probs):
    pass

def needs_two(a, b):
    pass

class NoDrafter:
    pass

number = 1
'''


def write_pair(folder, draft_block_size=256):
    """A target, a draft that is the target with some noise, and heads that know nothing."""
    encoding, generator = make_encoding(r"\S+|\s+", BYTES), torch.Generator().manual_seed(0)
    target, draft = make_gpt(1, 257, 256), make_gpt(1, 257, draft_block_size)
    for ours, theirs in zip(draft.parameters(), target.parameters()):
        noise = torch.randn(theirs.shape, generator=generator, dtype=torch.float64)
        ours.copy_((theirs + 0.15 * noise)[: len(ours)])
    save_checkpoint(folder / "large.pt", target, encoding)
    save_checkpoint(folder / "tiny.pt", draft, encoding)
    heads = DraftHeads(257, 16, 16), DraftHeads(257, 16, 16, markov=False)
    save_heads(folder / "heads.pt", target, *heads)
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    return f"{tmp_path / 'own.py'}:"


@pytest.fixture
def table(pair, capsys):
    """Runs bench.py -> what it prints."""
    def run(*words):
        short = ["--checkpoints", pair, "--dtype", "float32", "--max-new-tokens", 6]
        assert bench.main([str(word) for word in (*short, *words)]) == 0
        out, err = capsys.readouterr()
        assert err == "" and max(map(len, out.splitlines())) <= 100
        return out
    return run


def lines_of(out, name):
    """The cells of the lines that begin with this name, after its mark."""
    return [line[2 + len(name) :].split() for line in out.splitlines() if line[2:].startswith(name)]


# ---- the table -----------------------------------------------------------------------------------


def test_all_drafters_and_rules_are_in_the_table(table):
    out = table("--prompt", "abab", "-k", 3)
    twice = ("plain decoding", "draft model k=3", "draft model, k=auto", "n-gram k=3", "heads k=3")
    twice += ("heads, blind", "heads, confident", "tree 2,1,1,1, model", "tree 2,1,1,1, heads")
    for name in twice:
        assert len(lines_of(out, name + " ")) == 2, name
    for name in ("draft model, block", "draft model, coupled", "heads, block"):
        assert len(lines_of(out, name)) == 1, name  # greedy, they are one rule
    assert out.count("\n* ") == 2 + 1  # the fastest of each table; and in the glossary
    tables, glossary = out.split("*          the fastest")
    for word in "tok/s speed-up predicted alpha tau 1 draft verify rest".split():
        assert word in glossary
    assert glossary.count("\n") <= 8 and tables.count("\n1 2 3") == 0
    heading = re.search("^temperature 1 .*", tables, re.MULTILINE)[0].split()
    assert heading[2:9] == ["tok/s", "speed-up", "predicted", "alpha", "tau", "1", "2"]
    assert heading[-3:] == ["draft", "verify", "rest"]


def test_the_numbers_of_the_table_add_up(table, tmp_path):
    file = tmp_path / "figures.json"
    out = table("--prompt", "abab", "--max-new-tokens", 16, "--temperature", 0.7, "--json", file)
    (title, figures), = json.loads(file.read_text())["tables"].items()
    assert title == "temperature 0.7" and len(figures) == 12
    plain = figures[0]
    for f in figures:
        assert f["tokens_per_second"] == pytest.approx(plain["tokens_per_second"] * f["speed_up"])
        assert f["low"] <= f["speed_up"] <= f["high"]
        assert f["draft"] + f["verify"] + f["rest"] == pytest.approx(1)
        s = f["stats"]
        assert s["emitted"] == 16 * f["turns"] and f["tau"] == s["emitted"] / s["rounds"]
        cells, = lines_of(out, f["name"] + " ")
        printed = [f"{f['tokens_per_second']:.0f}", f"{f['speed_up']:.2f}"]
        if f is not plain:
            assert f["alpha"] == s["accepted"] / s["evaluated"]
            printed.append(f"{f['low']:.2f}-{f['high']:.2f}")
            printed += [f"{f[name]:.2f}" for name in ("predicted", "alpha", "tau")]
            at = [f"{100 * x:.0f}" for x in f["at_position"]] + 6 * ["-"]
            assert cells[6:-3] == at[: len(cells) - 9]
        assert cells[: len(printed)] == printed
        assert cells[-3:] == [f"{100 * f[part]:.0f}" for part in ("draft", "verify", "rest")]
    best = max(figures, key=lambda f: f["speed_up"])
    assert re.findall(r"^\* (\S.*?)  ", out, re.MULTILINE) == [best["name"]]


def test_rows_that_decode_in_alternation_are_what_they_are_alone(pair):
    target, draft, _ = load_pair(pair, dtype=torch.float32)
    heads = HeadsDrafter(load_heads(pair / "heads.pt", target)[0])
    model = ModelDrafter(draft)  # shared by two rows
    rows = [
        bench.Row("plain"), bench.Row("a", model, 3), bench.Row("b", model, 2, "block"),
        bench.Row("c", heads, 3, "coupled"), bench.Row("d", heads, 1),
        bench.Row("e", NGramDrafter(), 8), bench.Row("f", TreeDrafter(ModelDrafter(draft), (2, 1))),
    ]  # fmt: skip
    prompts = [torch.tensor([[97, 98, 97]] * 2), torch.tensor([[99, 97, 98]] * 2)]
    bench.compare(target, rows, prompts, 37, 0, lambda *words: None, seed=5, temperature=1.0)
    for row in rows:
        options = {"drafter": row.drafter, "k": row.k, "rule": row.rule}
        alone = [generate(target, p, 37, seed=s, **options).stats for s, p in enumerate(prompts, 5)]
        for what in ("rounds", "drafted", "evaluated", "accepted", "emitted"):
            assert getattr(row.stats, what) == sum(getattr(s, what) for s in alone), row.name
        assert sum(row.judged.values()) == row.stats.evaluated
        assert sum(row.accepted.values()) == row.stats.accepted
        assert len(row.turns) == 2


def test_every_prompt_counts_the_same(pair, monkeypatch):
    """By a clock that ticks whenever someone looks: whole cycles, one to five, as time allows."""
    target, _, _ = load_pair(pair, "cpu", torch.float32)
    prompts = [torch.tensor([ids]) for ids in ([97, 98], [99, 97], [98, 99])]
    n_turns = []
    for seconds in (0, 100, 150, 200, 250, 300, 350, 400, 600, 1e6):
        ticks, row = itertools.count(), bench.Row("plain")
        monkeypatch.setattr(bench, "now", lambda: next(ticks))
        bench.compare(target, [row], prompts, 10, seconds, lambda *words: None)
        n_turns.append(len(row.turns))
        assert n_turns[-1] == 3 or next(ticks) < seconds + 20
    assert n_turns == sorted(n_turns) and n_turns[0] == 3 and n_turns[-1] == 15
    assert len(set(n_turns)) > 2 and all(n % 3 == 0 for n in n_turns)


def test_the_time_is_split_as_it_was_spent(pair, monkeypatch):
    """By a clock that runs only where it is known to: in a round, 4 s in guessing, 4 s in the
    target's pass (1000 in the prompt's), and 2 s in the rule.
    """
    target, _, _ = load_pair(pair, "cpu", torch.float32)
    draft, seconds, forward = copy(target), [0.0], target.forward

    class Slow(ModelDrafter):
        def propose(self, *args):
            seconds[0] += 3
            return super().propose(*args)

        def commit(self, *args):
            seconds[0] += 1
            super().commit(*args)

    def slow_forward(tokens, cache):
        seconds[0] += 4 if tokens.shape[1] < 8 else 1000
        return forward(tokens, cache)

    def slow_rule(*args):
        seconds[0] += 2
        return specdec.verify(*args)

    alone = lambda calls, repeats: {size: 10.0 + size for size in calls}
    monkeypatch.setattr(bench, "now", lambda: seconds[0])
    monkeypatch.setattr(bench, "seconds_of_calls", alone)
    target.forward = slow_forward
    rows = [bench.Row("plain"), bench.Row("slow", Slow(draft), 3, slow_rule)]
    prompt = torch.tensor([[97] * 9])
    plain, slow = bench.compare(target, rows, [prompt], 33, 0, lambda *words: None)
    assert (plain["draft"], plain["verify"], plain["rest"]) == (0, 1, 0)
    assert plain["tokens_per_second"] == 1 / 4 and plain["seconds_per_pass"] == 4
    # Guesses of the target itself are accepted: four tokens a round, one in the last, of 10 s each.
    # The first round does not count.
    assert slow["alpha"] == 1 and slow["at_position"] == [1, 1, 1]
    assert (slow["draft"], slow["verify"], slow["rest"]) == pytest.approx((0.4, 0.4, 0.2))
    assert slow["speed_up"] == pytest.approx((7 * 4 + 1) / 80 * 4)
    # tau T(1) / (T(4) + draft + rest), as plain decoding has no rest; but T(2) in the last round,
    # where one guess has room
    assert slow["predicted"] == pytest.approx(29 * 11 / (7 * (14 + 6) + (12 + 6)))


def test_what_plain_decoding_does_besides_its_passes_is_predicted_too():
    """A fifth of a second a round. 20 tokens x (T(1) + this) / (draft and rest + 5 x T(5))."""
    plain, other = bench.Row("plain"), bench.Row("other", "a drafter")
    plain.in_parts = other.in_parts = True
    plain.turns = [(Counter(seconds=12, verify=10, passes=10, tokens=10), Counter({1: 10}))]
    other.turns = [(Counter(seconds=20, verify=14, passes=5, tokens=20), Counter({5: 5}))]
    figures = other.figures(plain, {1: 1.0, 5: 3.0}, 1)
    assert figures["predicted"] == pytest.approx((1 + 0.2) * 20 / (6 + 15))


def known(name, speeds, exact=True, in_parts=True):
    """A row whose turns have these speeds."""
    row = bench.Row(name, None if name == "plain" else "a drafter", exact=exact)
    row.turns = [(Counter(tokens=100 * x, seconds=100, passes=1), Counter()) for x in speeds]
    row.in_parts = in_parts
    return row


def test_speed_up_is_the_median_of_the_turns_and_its_spread_their_quartiles(capsys):
    plain = known("plain", [2] * 9)
    row = known("row", [2 * x for x in (5, 1, 9, 3, 7, 2, 8, 4, 6)])
    figures = [r.figures(plain, {1: 1.0}, 1) for r in (plain, row)]
    assert [figures[1][name] for name in ("speed_up", "low", "high")] == [5, 3, 7]
    assert figures[1]["tokens_per_second"] == 10
    bench.print_table("title", figures, 6)
    assert "* row" in (out := capsys.readouterr().out) and "5.00 3.00-7.00" in out


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=20))
def test_a_spread_contains_what_it_is_the_spread_of(numbers):
    """Also as it is printed."""
    median, low, high = (float(bench.show(x)) for x in bench.quartiles(numbers))
    assert low <= median <= high and min(numbers) - 0.01 < low and high < max(numbers) + 0.01


def test_what_is_not_exact_is_marked_and_cannot_win(table, own, capsys):
    plain, fast, cheat = known("plain", [1]), known("fast", [2]), known("cheat", [9], exact=False)
    bench.print_table("title", [row.figures(plain, {1: 1.0}, 1) for row in (plain, fast, cheat)], 6)
    marked = re.findall("^[*!] [a-z]+", capsys.readouterr().out, re.MULTILINE)
    assert marked == ["* fast", "! cheat"]
    short = ("--prompt", "abab", "--temperature", 1, "--drafter", "model")
    for rule in (f"{ROOT / 'tests' / 'extras.py'}:accept_typical_lossy", own + "wrong"):
        out = table(*short, "--rule", rule)
        assert "\n* plain" in out and out.count("\n! draft model") == 2
    for rule in (own + "right", "block", "coupled"):
        assert "\n! " not in table(*short, "--rule", rule)


class FakeGPU:
    """What is launched takes 2 s with guesses, 1 s without. The host needs .3 s to launch it. Who
    looks at a result waits for it, and who asks for the time with `now` for all that was launched.
    """

    def __init__(self):
        self.host = self.free = self.ready = self.n_graphs = 0.0

    def capture(self, call, generator=None):
        self.n_graphs += 1
        out = []

        def launch():
            assert torch.is_inference_mode_enabled()  # as when it was recorded
            out[:] = call()
            self.host += 0.3
            self.free = max(self.host, self.free) + (2 if call.args[0] else 1)

        def result():
            self.clock()  # whoever launched this has looked at the one before
            self.ready = self.free
            return [x.clone() for x in out]

        return launch, result

    def clock(self):
        self.host = max(self.host, self.ready)
        return self.host

    def now(self):
        self.host = max(self.host, self.free)
        return self.host


@pytest.mark.parametrize("k", [3, "auto"])
def test_rounds_in_a_graph_are_timed_from_outside(pair, monkeypatch, k):
    """Nothing is wrapped, and four rounds are left out. When a text is complete, its graphs are
    timed alone: that is the prediction, and comes true, as a replay does not wait for the host.
    """
    gpu = FakeGPU()
    target, draft, _ = load_pair(pair, "cpu", torch.float32)
    for module in (bench, specdec):
        monkeypatch.setattr(module, "has_graphs", lambda device: True)
        monkeypatch.setattr(module, "capture", gpu.capture)
    for name in ("bench.now", "train_tiny.now", "specdec.now"):
        monkeypatch.setattr(name, gpu.now)
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=gpu.clock))
    monkeypatch.setattr(specdec, "time", SimpleNamespace(perf_counter=lambda: gpu.host))
    monkeypatch.setattr(bench, "passes", None)
    rows = [bench.Row("plain"), bench.Row("model", ModelDrafter(draft), k)]
    figures = bench.compare(target, rows, [torch.tensor([[97, 98]])], 100, 0, lambda *words: None)
    n = len(rows[0].turns)
    assert gpu.n_graphs == (2 if k == 3 else 3) * n
    timed = [sum(spent["passes"] for spent, _ in row.turns) for row in rows]
    assert timed == [96 * n, rows[1].stats.rounds - 4 * n]
    assert rows[0].alone[0] == pytest.approx({1: 1}, rel=0.04)
    assert rows[1].alone[0] == pytest.approx({4: 2} if k == 3 else {5: 2, 1: 1}, rel=0.04)
    assert figures[1]["speed_up"] == pytest.approx(figures[1]["predicted"], rel=0.05)
    if k == 3:
        spent, _ = rows[1].turns[0]
        tau = spent["tokens"] / spent["passes"]
        assert figures[1]["predicted"] == pytest.approx(tau / 2, rel=0.04)
    assert all(math.isnan(figures[1][name]) for name in ("draft", "verify", "rest"))


def test_a_text_that_ends_in_the_first_round_has_no_speed(table, tmp_path):
    file = tmp_path / "figures.json"
    out = table("--prompt", "a", "--max-new-tokens", 1, "--drafter", "ngram", "--json", file)
    cells, *_ = lines_of(out, "n-gram k=10 ")
    assert cells[:2] == ["-", "-"] and '"speed_up": null' in file.read_text()


def test_a_narrow_terminal_loses_the_least_important_columns(monkeypatch, capsys):
    plain, row = known("plain", [2]), known("row" * 5, [4])
    row.judged.update(range(6))
    figures, left = [r.figures(plain, {1: 1.0}, 1) for r in (plain, row)], []
    for columns in (120, 90, 85, 75, 65, 60, 50, 40):
        monkeypatch.setenv("COLUMNS", str(columns))
        bench.print_table("title", figures, 6)
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= min(columns, 100)
        left.append(lines[0].split())
        assert {"title", "speed-up", "tau"} < set(left[-1]) | {"."}
    everything = "title tok/s speed-up predicted alpha tau 1 2 3 4 5 6 draft verify rest"
    assert left[0] == everything.split()
    assert "1" in left[1] and "6" not in left[2] and "rest" in left[2]
    assert all(set(b) <= set(a) for a, b in itertools.pairwise(left))
    assert len(set(map(len, left))) > 5


@pytest.mark.parametrize("drafter, names", [
    ("model", [f"draft model{x}" for x in (" k=9", ", block", ", coupled", ", k=auto")]),
    ("ngram", ["n-gram k=9"]),
    ("heads", ["heads k=9", "heads, block", "heads, blind", "heads, confident"]),
    ("tree", ["tree 2,1,1,1, model", "tree 2,1,1,1, heads"]),
])  # fmt: skip
def test_one_drafter_alone_shows_every_guess(table, drafter, names):
    words = "--prompt", "abab", "--drafter", drafter, "--temperature", 1, "--max-new-tokens", 20
    out = table(*words, *(() if drafter == "tree" else ("-k", 9)))
    rows = re.findall(r"^[*! ] ([a-z].*?)  ", out.split("*  ")[0], re.MULTILINE)
    assert rows[: len(names) + 1] == ["plain decoding", *names]
    assert " 1 2 3" not in out.split("*  ")[0]  # no columns for them
    for name in names:
        words = re.search(rf"  {re.escape(name)}, % of the first, .* accepted: ([\d, \n]+)", out)[1]
        n = len(words.split(","))
        assert 1 <= n <= (4 if drafter == "tree" else 9)


def test_one_rule_for_all(table):
    out = table("--prompt", "abab", "--rule", "block", "--temperature", 1)
    assert "; rule: block;" in out
    assert not lines_of(out, "tree") and not lines_of(out, "heads, block")
    assert len(lines_of(out, "draft model k=4 ")) == len(lines_of(out, "heads k=6 ")) == 1


def test_drafters_and_a_rule_of_a_readers_own(table, own):
    words = "--drafter", own + "Mine", "--drafter", own + "Repeats", "--drafter", "model"
    out = table("--prompt", "abab", *words, "--rule", own + "right", "--temperature", 1)
    for name in ("plain decoding", "Mine k=4", "Repeats k=4", "draft model k=4"):
        assert len(lines_of(out, name + " ")) == 1
    assert "; rule: right;" in out and not lines_of(out, "n-gram")


def test_the_default_prompts_fit_any_pair(tmp_path, capsys, monkeypatch):
    """Of a small pair: they are cut, and half of what there is room for is decoded."""
    for name, size in (("large", 64), ("tiny", 60)):
        model = make_gpt(1, 257, size, n_layer=1)
        save_checkpoint(tmp_path / f"{name}.pt", model, make_encoding(r"\S+|\s+", BYTES))
    words = ["--checkpoints", str(tmp_path), "--dtype", "float32", "--drafter", "ngram"]
    assert bench.main(words) == 0
    out = capsys.readouterr().out
    assert "prompts: 3; new tokens: 30;" in out
    for title in ("temperature 1 ", "temperature 0 (greedy)", "text that repeats"):
        assert title in out
    assert len(lines_of(out, "n-gram k=10 ")) == 3
    words += ["--temperature", "0.5", "--max-new-tokens", "3", "--prompt", "x"]
    assert bench.main(words) == 0
    out = capsys.readouterr().out
    assert "prompts: 1; new tokens: 3;" in out and "text that repeats" not in out


def test_a_prompt_from_a_file_or_standard_input(table, tmp_path, monkeypatch):
    (tmp_path / "prompt").write_text("abab", encoding="utf-8")
    file, short = tmp_path / "figures.json", ("--drafter", "ngram", "--seed", 2**63 - 1)
    stats = []
    monkeypatch.setattr(sys, "stdin", io.StringIO("abab"))
    for option, value in ("", "abab"), ("-file", tmp_path / "prompt"), ("-file", "-"):
        table(f"--prompt{option}", value, *short, "--json", file)
        tables = json.loads(file.read_text())["tables"].values()
        stats.append([f["stats"] | {"turns": 0} for figures in tables for f in figures])
    assert stats[0] == stats[1] == stats[2] and stats[0][0]["emitted"] == 30


def test_json_appears_whole_or_not_at_all(table, tmp_path, monkeypatch):
    file = tmp_path / "figures.json"
    words = "--prompt", "abab", "--drafter", "ngram", "--json", file
    table(*words)
    content = json.loads(file.read_text())
    assert content["settings"]["new tokens"] == 6
    assert list(content["tables"]) == ["temperature 1", "temperature 0 (greedy)"]
    names = [f["name"] for f in content["tables"]["temperature 1"]]
    assert names == ["plain decoding", "n-gram k=10"]
    before = file.read_text()

    def full(path, text, **options):
        with open(path, "w") as half:
            half.write(text[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError):
        options.write_whole(file, {"a": 1})
    assert file.read_text() == before and list(tmp_path.iterdir()) == [file]


# ---- the sweep -----------------------------------------------------------------------------------


@pytest.mark.parametrize("drafter, by_k, auto", [("model", 7, 6), ("ngram", 7, 6), ("tree", 0, 0)])
def test_sweep(table, tmp_path, drafter, by_k, auto):
    file = tmp_path / "figures.json"
    words = "--sweep", "--drafter", drafter, "--prompt", "ab", "--max-new-tokens", 4
    out = table(*words, "--json", file)
    time = r" +[\d.]+ \([\d.]+\)"
    assert len(re.findall(rf"^ +\d+{time}{time}$", out, re.MULTILINE)) == 16
    bar = r" += +\d+ +(?:[\d.]+|-) (?:[\d.]+|-)  [#| ]*$"
    assert len(re.findall("^  k" + bar, out, re.MULTILINE)) == by_k
    assert len(re.findall("^  B" + bar, out, re.MULTILINE)) == 6
    assert out.count("k=auto") == auto
    assert "GB/s" in out and "MB of weights" in out and out.count(" pays at ") == 1
    figures = json.loads(file.read_text())["sweep"]
    known = by_k > 0 and figures["by_k"][3]["alpha"] is not None
    assert ("Leviathan's best k" in out) is known
    assert list(figures["by_batch_size"]) == ["1", "2", "4", "8", "16", "32"]
    assert len(figures["target"]) == len(figures["draft"]) == 16
    names = [f"k = {k}" for k in (1, 2, 3, 4, 5, 6, 8)]
    assert [f["name"] for f in figures.get("by_k", ())] == names[:by_k]


def test_sentences_of_the_sweep_fit_its_numbers(table, monkeypatch):
    def fake(target, rows, prompts, *rest, **options):
        B = len(prompts[0])
        f = {"alpha": 0.8, "draft": 0.2, "seconds_per_pass": 0.05, "predicted": 1.5}
        return [f | {"name": row.name, "speed_up": speed_up(B)} for row in rows]

    monkeypatch.setattr(bench, "compare", fake)
    monkeypatch.setattr(bench, "seconds_of_calls", lambda calls, n: dict.fromkeys(calls, 0.05))
    words = "--sweep", "--drafter", "ngram", "--prompt", "ab"
    for speed_up, end in (
        (lambda B: 0.9, "n-gram k=10 pays at no batch size.\n"),
        (lambda B: 1.5 if B == 4 else 0.5, "n-gram k=10 pays at batch size 4.\n"),
        (lambda B: 2 / B + 0.4, "n-gram k=10 pays at batch sizes 1, 2.\n"),
    ):
        out = table(*words)
        assert out.endswith(end)
        # A guess costs .2 of .05 s, a quarter of that as there are four, so c is .05.
        assert "best k for alpha 0.80 and c 0.05 is 8: a speed-up of\n3.09, if" in out
    assert f"  B = 1     2.40 1.50  {'#' * 29}|{'#' * 18}\n" in out
    assert f"  B = 4     0.90 1.50  {'#' * 18}{' ' * 11}|\n" in out


# ---- while it works, and when it does not --------------------------------------------------------


def test_progress_in_a_terminal_and_elsewhere(monkeypatch, capsys):
    moment = [100.0]
    monkeypatch.setattr(time, "time", lambda: moment[0])
    for terminal, written in (
        (True, "\r\033[Ktitle: 1 row done; about 7 s left\r\033[K"),
        (False, "title: 1 row done; about 7 s left\n"),
    ):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
        progress = options.Progress()
        progress("title", 2, "no row done", 6)  # too early for a word
        assert capsys.readouterr().err == ""
        moment[0] += 11
        progress("title", 2, "1 row done", 5)
        progress("title", 2, "2 rows done", 4)
        progress.clear()
        assert capsys.readouterr().err == written
    monkeypatch.setattr(sys, "stderr", None)
    options.Progress()("title", 0, "", 0)


def test_progress_tells_of_rows_and_of_the_time_left(pair):
    target, draft, _ = load_pair(pair, "cpu", torch.float32)
    rows, said = [bench.Row("plain"), bench.Row("model", ModelDrafter(draft), 3)], []
    prompts = [torch.tensor([[97, 98]]), torch.tensor([[98, 97]])]
    bench.compare(target, rows, prompts, 20, 0, lambda words, left: said.append((words, left)))
    assert {words for words, _ in said} >= {"turn 1, 0 of 2 rows done", "turn 2, 2 of 2 rows done"}
    assert said[-1][1] == pytest.approx(0) and all(left > 0 for _, left in said[:-1])


BAD = [
    (["-k", "0"], "argument -k: 0 is not a number from 1 on"),
    (["-k", "many"], "argument -k: many is not a number"),
    (["--temperature", "-1"], "temperature is -1.0; it must be 0 or more"),
    (["--temperature", "nan"], "temperature is nan"),
    (["--temperature", "inf"], "temperature is inf"),
    (["--temperature", "warm"], "argument --temperature: invalid float value: 'warm'"),
    (["--top-p", "0"], "top-p is 0.0; it must be above 0, at most 1"),
    (["--top-p", "1.5"], "top-p is 1.5"),
    (["--top-k", "0"], "top-k is 0; it must be at least 1"),
    (["--seed", "-1"], "seed is -1; it must be a whole number from 0 on"),
    (["--seed", str(2**70)], "below 2^63"),
    (["--threads", "0"], "argument --threads: 0 is not between 1 and"),
    (["--threads", "100000"], "argument --threads: 100000 is not"),
    (["--tree", "2,0"], "argument --tree: 0 is not"),
    (["--tree", "2,x"], "argument --tree: x is not"),
    (["--tree", "500,500"], "argument --tree: 500,500 is a tree of more than 1000"),
    (["--drafter", "tree", "--rule", "block"], "a tree has a rule and a shape of its own"),
    (["--drafter", "tree", "-k", "3"], "a tree has a rule and a shape of its own"),
    (["--drafter", "ngram", "--tree", "2,2"], "--tree is for --drafter tree"),
    (["--drafter", "oracle"], "there is no 'oracle': take model, ngram, heads, tree, or FILE.py:"),
    (["--rule", "optimism"], "there is no 'optimism': take rejection, block, coupled, or FILE"),
    (["--rule", "nowhere.py:rule"], "argument --rule: 'rule' of 'nowhere.py': FileNotFoundError"),
    (["--rule", "OWN:nothing"], "has no attribute 'nothing'"),
    (["--rule", "OWN:number"], "it is neither a function nor a class"),
    (["--rule", "OWN:no_rule"], "no_rule is no rule: no_rule() takes 1 positional argument"),
    (["--drafter", "OWN:NoDrafter"], "a drafter has start, propose and commit"),
    (["--drafter", "OWN:needs_two"], "needs_two makes no drafter: needs_two() missing 1 required"),
    (["--prompt", ""], "the prompt is empty"),
    (["--prompt-file", "/nowhere"], "No such file or directory: '/nowhere'"),
    (["--prompt", "x", "--prompt-file", "y"], "not allowed with argument --prompt"),
    (["--device", "abacus"], "no device 'abacus'"),
    (["--checkpoints", "/nowhere"], "/nowhere/large.pt is missing; `python train_tiny.py"),
    (["--beam"], "unrecognized arguments: --beam"),
]
BAD_BENCH = [
    (["-k", "100000", "--drafter", "model"], "k is 100000"),
    (["--max-new-tokens", "0"], "argument --max-new-tokens: 0 is not a number from 1 on"),
    (["--max-new-tokens", "256"], "block_size is 256"),
    (["--batch", "0"], "argument --batch: 0 is not"),
    (["--batch", "1" + 12 * "0"], "000000000000 rows of "),
    (["--sweep", "--batch", "2"], "--sweep has batch sizes of its own"),
    (["--json", "/nowhere/x.json"], "argument --json: /nowhere/x.json cannot be written"),
    (["--json", "/tmp"], "argument --json: /tmp cannot be written"),
    (["--json", "/dev/null"], "argument --json: /dev/null cannot be written"),
]
BAD_CHECK = [
    (["-k", "auto"], "-k auto follows the clock"),
    (["--dtype", "bfloat16"], "in bfloat16 probabilities depend on how many tokens share a pass"),
    (["-n", "10"], "argument -n: 10 is not a number from 1000 on"),
    (["--prompt", "\x01" * 253], "block_size is 256"),
]


@pytest.mark.parametrize("script, words, message", [
    *((script, *bad) for bad in BAD for script in (bench, check)),
    *((bench, *bad) for bad in BAD_BENCH), *((check, *bad) for bad in BAD_CHECK),
])  # fmt: skip
def test_bad_input_is_refused(pair, own, refusal, script, words, message):
    words = [word.replace("OWN:", own) for word in words]
    prompt = [] if any(word.startswith("--prompt") for word in words) else ["--prompt", "x"]
    words = ["--checkpoints", pair, "--dtype", "float32", *prompt, *words]
    assert message in refusal(script.main, words)


def test_numbers_are_refused_before_anything_is_loaded(own, refusal):
    """There is no such pair, and nobody notices."""
    for words, message in BAD[:24] + BAD_BENCH[1:2] + BAD_BENCH[3:4] + BAD_BENCH[5:]:
        words = [word.replace("OWN:", own) for word in words]
        assert message in refusal(bench.main, ["--checkpoints", "/nowhere", *words])


def test_pairs_that_do_not_fit_are_refused(tmp_path, refusal):
    def refused(message, *words):
        for script in bench, check:
            short = ["--checkpoints", tmp_path, "--dtype", "float32", "--prompt", "xxxxxx"]
            assert message in refusal(script.main, [*short, *words])

    write_pair(tmp_path, draft_block_size=4)
    refused("draft's block_size", "-k", "6")
    write_pair(tmp_path)
    heads = DraftHeads(257, 16, 16), DraftHeads(257, 16, 16, markov=False)
    save_heads(tmp_path / "heads.pt", make_gpt(9, 257, 256), *heads)
    refused("belong to another target", "--drafter", "heads")
    (tmp_path / "heads.pt").unlink()
    refused("heads.pt", "--drafter", "heads")
    (tmp_path / "tiny.pt").write_bytes(b"")
    refused("damaged, or not a checkpoint")


def shell(*words, **options):
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, **options)


@pytest.mark.parametrize("script", ["bench.py", "check.py"])
def test_from_a_shell_without_a_traceback(tmp_path, script):
    """From any folder; and where nothing can be written."""
    result = shell(ROOT / "tests" / script, "--checkpoints", tmp_path, cwd=tmp_path)
    assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1
    write_pair(tmp_path)
    words = [ROOT / "tests" / script, "--checkpoints", tmp_path, "--prompt", "x"]
    words += ["--max-new-tokens", "2"] if script == "bench.py" else ["-n", "1000"]
    words += ["--drafter", "ngram"]
    if Path("/dev/full").exists():
        command = f"{sys.executable} {' '.join(map(str, words))} > /dev/full"
        result = subprocess.run(command, shell=True, capture_output=True, text=True)
        assert result.returncode == 2 and result.stderr.count("\n") == 1
        assert "No space left on device" in result.stderr


def test_seconds_of_calls_by_hand(monkeypatch):
    """Each is called twice at its turn and timed the second time; of several turns, the median."""
    clock, called = [0.0], []
    times = {"a": iter([9, 1, 9, 5, 9, 3]), "b": iter([9, 4, 9, 2, 9, 9])}

    def call(name):
        called.append(name)
        clock[0] += next(times[name])

    monkeypatch.setattr("train_tiny.now", lambda: clock[0])
    seconds = seconds_of_calls({name: lambda name=name: call(name) for name in times}, repeats=3)
    assert seconds == {"a": 3, "b": 4} and "".join(called) == "aabb" * 3


# ---- check.py ------------------------------------------------------------------------------------


@pytest.fixture
def verdict(pair, capsys):
    """Runs check.py on the tiny pair -> status, p-values by row, and all that it prints."""
    def run(*words):
        short = ["--checkpoints", pair, "--prompt", "ab", "-n", 2000]
        status = check.main([str(word) for word in (*short, *words)])
        out, err = capsys.readouterr()
        columns = r"^  (\S.*?)  +(?:[\d.]+|inf) +(\d+) +(\S+) +\S+ +\S+$"
        rows = re.findall(columns, out, re.MULTILINE)
        assert err == "" and len(rows) == 2 and all(int(cells) > 20 for _, cells, _ in rows)
        assert max(map(len, out.splitlines())) <= 100
        return status, {name: float(p) for name, _, p in rows}, out
    return run


def test_check_finds_right_what_is_right(verdict, own):
    for words, name in (
        ((), "draft model k=4, rejection"),
        (("--rule", "coupled", "-k", 1), "draft model k=1, coupled"),
        (("--drafter", "heads", "--rule", "block", "--top-k", 40), "heads k=6, block"),
        (("--drafter", "tree", "--tree", "2,2"), "tree 2,2, model, rejection"),
        (("--drafter", own + "Repeats", "--rule", own + "right"), "Repeats k=4, right"),
        (("--drafter", "ngram", "--temperature", 0.7, "--top-p", 0.95), "n-gram k=10, rejection"),
    ):  # fmt: skip
        status, p, out = verdict(*words)
        assert status == 0 and min(p.values()) > 1e-6 and list(p) == ["plain decoding", name]
        assert f"plain decoding and {name}: both follow the target's distribution" in out


def test_check_finds_a_wrong_rule(verdict, own):
    """What is wrong is the rule that was asked for, not plain decoding, and not `verify`."""
    for rule in (own + "wrong", f"{ROOT / 'tests' / 'extras.py'}:accept_typical_lossy"):
        status, p, out = verdict("--rule", rule)
        plain, other = p.values()
        assert status == 1 and plain > 1e-6 > other
        name = f"draft model k=4, {rule.rpartition(':')[2]}"
        assert f"MISMATCH: {name} does not follow" in out and out.count("MISMATCH") == 1


def test_check_looks_at_the_rule_of_that_name(verdict, monkeypatch):
    """A wrong "block" is seen with --rule block, and only then."""
    def wrong(target_probs, draft_probs, draft_tokens, generator=None):
        n, _ = specdec.verify(target_probs, draft_probs, draft_tokens, generator)
        return n, specdec.categorical(specdec.at(target_probs, n), generator)

    monkeypatch.setitem(specdec.RULES, "block", wrong)
    assert [verdict("--rule", rule)[0] for rule in ("block", "rejection")] == [1, 0]


def test_check_looks_at_plain_decoding(verdict, monkeypatch):
    plain = specdec.plain_rounds

    def warmer(target, rows, probs_of, generator):
        return plain(target, rows, lambda logits: probs_of(logits / 1.2), generator)

    monkeypatch.setattr(specdec, "plain_rounds", warmer)
    status, p, out = verdict()
    assert status == 1 and "MISMATCH: plain decoding does not follow" in out
    assert p["plain decoding"] < 1e-6 < p["draft model k=4, rejection"]


def test_check_looks_at_filters_in_the_samples(verdict, monkeypatch):
    """Samples of another temperature, or of other filters, than what they are compared with."""
    rounds = specdec.rounds
    one, two = (("--temperature", 0.8), {"temperature": 1.0}), (("--top-k", 30), {"top_k": 40})
    for words, other in one, two:
        monkeypatch.setattr(specdec, "rounds", lambda *a, **options: rounds(*a, **options | other))
        assert verdict(*words)[0] == 1
        monkeypatch.undo()


def test_check_of_nearly_uniform_distributions(pair, capsys):
    """No token stands out, nearly all cells are pooled: still a verdict, and no crash."""
    target, draft, encoding = load_pair(pair, "cpu", torch.float32)
    decoders = {"plain": (None, 1, "rejection"), "model": (ModelDrafter(draft), 2, "rejection")}
    prompt = torch.tensor([1, 2])
    assert check.check(target, decoders, encoding, prompt, 0, n=1000, temperature=1000.0)
