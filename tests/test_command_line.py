"""`python specdec.py` as a user meets it."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import model
import specdec
from conftest import make_gpt
from model import DraftHeads, has_float16, make_encoding, save_checkpoint, save_heads

ROOT = Path(__file__).parent.parent
BYTES = {bytes([i]): i for i in range(256)}


def write_pair(folder, vocab_size=257, draft_vocab_size=257, draft_ranks=BYTES, draft_block_size=256):
    target = make_gpt(1, vocab_size, 256)
    save_checkpoint(folder / "large.pt", target, make_encoding(r"\S+|\s+", BYTES))
    save_heads(folder / "heads.pt", target, DraftHeads(vocab_size, 16, 16), DraftHeads(vocab_size, 16, 16, markov=False))
    save_checkpoint(folder / "tiny.pt", make_gpt(2, draft_vocab_size, draft_block_size, n_layer=1), make_encoding(r"\S+|\s+", draft_ranks))
    return folder


@pytest.fixture
def pair(tmp_path):
    return write_pair(tmp_path)


def run(*args, **env):
    return subprocess.run(
        [sys.executable, "specdec.py", *map(str, args)], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **env}
    )


def test_the_whole_story_in_one_run(pair):
    result = run("--checkpoints", pair, "--max-new-tokens", 6, "-k", 3, "--prompt", "ab")
    assert (result.returncode, result.stderr) == (0, "")
    out = result.stdout
    for words in ("large.pt", "tiny.pt", "heads.pt", " on cpu, ", "accepted guess", "6 tokens in", "temperature 1 ", "temperature 0 (greedy)"):
        assert words in out
    assert "\033" not in out  # no colours where there is no terminal
    for row in ("plain decoding", "draft model, k=3", "k=auto", "n-gram lookup, k=", "heads, k=3", "blind", "k by confidence", "tree 2,1,1,1, model", "tree 2,1,1,1, heads"):
        assert len(re.findall(rf"^[* ] +{re.escape(row)}.* \d+ .*%$", out, re.MULTILINE)) == 2, row
    assert len(re.findall("block rule  .*%", out)) == len(re.findall("coupled rule  .*%", out)) == 1  # greedy, they are one rule
    assert out.count("\n* ") == 2  # the fastest of each table
    for word in ("tokens/s", "speed-up", "predicted", "alpha", "tau", "draft", "verify", "rest"):
        assert len(re.findall(rf"{word}", out)) >= 2, f"{word} is in the table, and explained below it"


def test_threads_are_tried_or_told(pair, monkeypatch, capsys):
    tried = []
    monkeypatch.setattr(model, "race", lambda targets, choices, n, turns: tried.extend(choices) or dict.fromkeys(choices, 1.0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    options = ["--checkpoints", str(pair), "--max-new-tokens", "4", "--dtype", "float32", "--drafter", "ngram", "--prompt", "ab"]
    specdec.main(options)
    assert tried[:4] == [(torch.float32, n) for n in (1, 2, 4, 6)]
    monkeypatch.undo()
    specdec.main([*options, "--threads", "1"])
    assert "float32 on cpu, 1 thread(s)\n" in capsys.readouterr().out


def test_the_numbers_of_the_table_add_up(pair, capsys):
    specdec.main(["--checkpoints", str(pair), "--max-new-tokens", "20", "-k", "3", "--temperature", "0.7", "--dtype", "float32", "--drafter", "model"])
    out = capsys.readouterr().out
    row = re.search(r"draft model, k=3 +(\d+) +([\d.]+) \(([\d.]+)-([\d.]+)\) +([\d.]+) +([\d.]+) ([\d.]+) +([\d.]+) +([\d.]+)% +([\d.]+)% +([\d.]+)%", out)
    speed, speed_up, low, high, predicted, alpha, expected, tau, *shares = map(float, row.groups())
    plain_speed = float(re.search(r"plain decoding +(\d+)", out)[1])
    assert speed_up == pytest.approx(speed / plain_speed, abs=0.01)
    assert low <= high and low / 2 < speed_up < 2 * high
    assert abs(sum(shares) - 100) < 0.2
    assert 0 <= alpha <= 1 and 0 <= expected <= 1 and 1 <= tau <= 4
    tau2, one, many, guess, rest = map(float, re.search(r"predicted ([\d.]+) x ([\d.]+) ms / \(([\d.]+) \+ ([\d.]+) \+ ([\d.]+) ms\)", out).groups())
    assert tau2 == tau and predicted == pytest.approx(tau * one / (many + guess + rest), rel=0.1)
    assert out.count("temperature") == 1


def test_rows_that_decode_in_alternation_are_what_they_are_alone(pair):
    """Whoever shares a drafter object, and however often they are interrupted: each row has a copy of its own."""
    target, draft, _ = specdec.load_pair(pair, dtype=torch.float32)
    model, heads = specdec.ModelDrafter(draft), specdec.HeadsDrafter(specdec.load_heads(pair / "heads.pt", target)[0])
    rows = {"plain": (None, 1, "rejection"), "a": (model, 3, "rejection"), "b": (model, 2, "block"), "c": (heads, 3, "coupled"), "d": (heads, 1, "rejection"),
            "e": (specdec.NGramDrafter(), 8, "rejection"), "f": (specdec.TreeDrafter(specdec.ModelDrafter(draft), (2, 1)), 1, "rejection")}  # fmt: skip
    prompts = [torch.tensor([[97, 98, 97]] * 2), torch.tensor([[99, 97, 98]] * 2)]
    stats, _, predicted = specdec.compare(target, rows, prompts, 37, seed=5, seconds=0, temperature=1.0)
    for name, row in rows.items():
        alone = [specdec.generate(target, prompt, 37, drafter=row[0], k=row[1], rule=row[2], seed=5 + i).stats for i, prompt in enumerate(prompts)]
        for what in ("sizes", "rounds", "drafted", "evaluated", "accepted", "emitted"):
            assert getattr(stats[name], what) == sum((getattr(s, what) for s in alone), type(getattr(stats[name], what))()), (name, what)
        assert predicted[name][0] > 0


def test_every_prompt_counts_the_same(pair, monkeypatch):
    """By a clock that ticks whenever someone looks: as many cycles through the prompts as there is time for, one at least, five at most."""
    target, _, _ = specdec.load_pair(pair, "cpu", torch.float32)
    prompts, turns = [torch.tensor([[97, 98]]), torch.tensor([[99, 97]]), torch.tensor([[98, 99]])], []
    for seconds in (0, 100, 150, 200, 250, 300, 350, 400, 1e6):  # a cycle takes some 120 ticks
        clock = itertools.count()
        monkeypatch.setattr(specdec, "now", lambda: next(clock))
        _, speed_ups, _ = specdec.compare(target, {"plain": (None, 1, "rejection")}, prompts, 10, seed=0, seconds=seconds)
        turns.append(len(speed_ups["plain"]))
        assert turns[-1] == 3 or next(clock) < seconds + 10
    assert turns == sorted(turns) and turns[0] == 3 and turns[-1] == 15 and len(set(turns)) > 2
    assert all(n % 3 == 0 for n in turns)


@pytest.mark.parametrize("drafter", ["model", "ngram", "heads", "tree"])
def test_one_drafter_alone(pair, capsys, drafter):
    specdec.main(["--checkpoints", str(pair), "--max-new-tokens", "6", "--prompt", "abab", "--drafter", drafter, "--tree", "2,2", "--temperature", "1", "--dtype", "float32"])
    out = capsys.readouterr().out
    name = {"model": "draft model, k=4", "ngram": "n-gram lookup, k=", "heads": "heads, k=6", "tree": "tree 2,2, model"}[drafter]
    assert name in out and sum(words in out for words in ("draft model, k", "n-gram lookup, k", "heads, k", "tree 2,2, m")) == 1


@pytest.mark.parametrize("rule", ["block", "coupled", "lossy-typical"])
def test_one_rule_for_all(pair, capsys, rule):
    specdec.main(["--checkpoints", str(pair), "--max-new-tokens", "6", "--prompt", "abab", "--rule", rule, "--temperature", "1", "--dtype", "float32"])
    out = capsys.readouterr().out
    assert "\n  tree" not in out  # which has its own
    assert ("identical text" in out or "the texts part at" in out) is (rule == "coupled")
    assert ("NOT the target's law" in out) is (rule == "lossy-typical")
    assert "\n* plain decoding" in out if rule == "lossy-typical" else "\n* " in out  # what is not exact cannot win


def test_a_text_that_is_not_the_same_is_explained(pair):
    """Of another target, for once, in place of rounding: where the texts part, the words, and the margin."""
    target, draft, encoding = specdec.load_pair(pair, dtype=torch.float64)
    prompt, options = torch.tensor([[97, 98]]), {"seed": 1, "temperature": 1.0}
    assert "identical text" in specdec.same_text(target, specdec.ModelDrafter(draft), prompt, 10, 3, encoding, **options)

    class Damaged(specdec.ModelDrafter):
        def start(self, *args):
            super().start(*args)
            target.wte.weight[:] = target.wte.weight.flip(0)

    assert re.search(r"the texts part at token \d+, .+ or .+: the race was decided by \d\.\de[+-]\d\d", specdec.same_text(target, Damaged(draft), prompt, 10, 3, encoding, **options))


def test_the_default_prompts_and_the_largest_seed(pair, capsys):
    """Every prompt is checked before the first word, the one that repeats as well; and the seeds of later turns stay in range."""
    options = ["--checkpoints", str(pair), "--dtype", "float32", "--drafter", "ngram", "--temperature", "1", "--seed", str(2**63 - 1)]
    with pytest.raises(SystemExit) as exit:
        specdec.main([*options, "--max-new-tokens", "4"])
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and out == "" and "block_size is 256" in err and err.count("\n") == 1


def test_text_that_repeats_has_its_own_table(pair, capsys, monkeypatch):
    monkeypatch.setattr(specdec, "REPEATING", "ab" * 20)
    options = ["--checkpoints", str(pair), "--dtype", "float32", "--drafter", "ngram", "--temperature", "1", "--seed", str(2**63 - 1)]
    specdec.main([*options, "--max-new-tokens", "4"])
    out = capsys.readouterr().out
    assert "text that repeats" in out and out.count("\n* n-gram lookup, k=10 ") + out.count("\n  n-gram lookup, k=10 ") == 2
    specdec.main([*options, "--max-new-tokens", "4", "--prompt", specdec.REPEATING])
    assert "text that repeats" not in capsys.readouterr().out


def test_sweep(pair, capsys):
    specdec.main(["--checkpoints", str(pair), "--max-new-tokens", "4", "--prompt", "ab", "--sweep", "--dtype", "float32", "-k", "2"])
    out = capsys.readouterr().out
    assert len(re.findall(r"n = +\d+ +target +[\d.]+ \([\d.]+\) +draft +[\d.]+ \([\d.]+\)", out)) == 16
    for words in ("GB/s", "MB", "the floor", "k = 8", "B = 32", "k=auto", "batch size"):
        assert words in out
    assert len(re.findall(r"^  (?:k|B) += +\d+ +[\d.]+ [\d.]+  [# ]*\|#*$", out, re.MULTILINE)) == 7 + 6


def a_round(tokens, n_new, n_accepted, n_guessed):
    """One row's round; what does not matter to the story is left out."""
    laws = torch.ones(1, 3, 257)
    laws[:, n_guessed:] = 0
    return specdec.Round(torch.tensor([tokens]), torch.tensor([n_new]), torch.tensor([n_accepted]), torch.ones(1, 4, 257), laws, 4, {"draft": 0, "verify": 0, "rest": 0})


@pytest.mark.parametrize("terminal, no_color, marks", [
    (False, "", ("", "", "[-", "]", "[+", "]")),
    (True, "1", ("", "", "[-", "]", "[+", "]")),
    (True, "", ("\033[32m", "\033[0m", "\033[31m", "\033[0m", "\033[36m", "\033[0m")),
])  # fmt: skip
def test_output_is_marked_by_origin(pair, capsys, monkeypatch, terminal, no_color, marks):
    """Guesses, then a correction or a bonus; a character in two tokens; a round cut at EOS; a last half character."""
    encoding = make_encoding(r"\S+|\s+", BYTES)
    passes = [a_round(list(b"abcd"), 3, 2, 3), a_round(list(b"ef\xc3g"), 3, 3, 3), a_round(list(b"\xa9hij"), 4, 3, 3), a_round([0xC3, 0, 0, 0], 1, 0, 3)]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setenv("NO_COLOR", no_color)
    stats = specdec.tell(passes, encoding, "prompt")
    legend, story = capsys.readouterr().out.split("\n\n", 1)
    g, g_end, c, c_end, b, b_end = marks
    assert legend == f"{g}accepted guess{g_end}   {c}correction{c_end} of a rejected one   {b}bonus{b_end} after all were accepted"
    cut = f"{g}a{g_end}{g}b{g_end}{c}c{c_end}" f"{g}e{g_end}{g}f{g_end}{g}{g_end}" f"{g}é{g_end}{g}h{g_end}{g}i{g_end}{b}j{b_end}" f"{c}{c_end}\ufffd\n"
    assert story == "prompt" + cut and stats.emitted == 11


def test_the_race_for_the_baseline(pair, monkeypatch):
    """Plain decoding decides; where that is within 10%, the fewest threads, and then a pass over five tokens."""
    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
    if not has_float16():
        f16 = bf16
    for one, five, winner in (
        ({f32: 1.0, bf16: 1.3, f16: 1.3}, {f32: 1.0}, f32),
        ({f32: 1.3, bf16: 1.0, f16: 1.3}, {bf16: 1.0}, bf16),
        ({f32: 1.0, bf16: 1.3, f16: 1.08}, {f32: 2.0, f16: 1.5}, f16),
        ({f32: 1.08, bf16: 1.3, f16: 1.0}, {f32: 1.5, f16: 2.0}, f32),
        ({f32: 1.12, bf16: 1.3, f16: 1.0}, {f16: 2.0}, f16),
    ):
        monkeypatch.setattr(model, "race", lambda targets, choices, n, turns: {c: {1: one, 5: five}[n][c[0]] for c in choices})
        target, draft, _ = specdec.load_pair(pair)
        assert target.h[0].mlp.c_fc.weight.dtype == winner
        assert draft.wte.weight.dtype == (bf16 if winner == bf16 else f32)
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    for two, winner in (0.95, 1), (0.88, 2):
        monkeypatch.setattr(model, "race", lambda targets, choices, n, turns: {c: two if c[1] == 2 else 1.0 for c in choices})
        specdec.load_pair(pair, dtype=f32, threads=(1, 2))
        assert chosen[-1] == winner


@pytest.mark.parametrize("agree, status", [(True, 0), (False, 1)])
def test_check_exits_1_on_a_mismatch(pair, monkeypatch, agree, status):
    monkeypatch.setattr(specdec, "check", lambda *args, **options: agree)
    with pytest.raises(SystemExit) as exit:
        specdec.main(["--checkpoints", str(pair), "--check"])
    assert exit.value.code == status


def test_check_of_nearly_uniform_laws(pair, capsys, monkeypatch):
    """No token stands out, nearly all cells are pooled: still a verdict, and no crash."""
    target, draft, encoding = specdec.load_pair(pair)
    assert specdec.check(target, {"plain": (None, 1, "rejection"), "model": (specdec.ModelDrafter(draft), 2, "rejection")}, encoding, torch.tensor([1, 2]), 0, n_samples=1000, temperature=1000.0)


def test_batch_dtype_and_filters(pair, capsys):
    options = ["--batch", "3", "--dtype", "bfloat16", "--top-k", "50", "--top-p", "0.9", "--temperature", "1", "--seed", "3"]
    specdec.main(["--checkpoints", str(pair), "--max-new-tokens", "5", "--prompt", "x", *options])
    out = capsys.readouterr().out
    assert "bfloat16 on cpu" in out and "draft model, k=4" in out
    assert "\n5 tokens in " in out  # the story is one row's


@pytest.mark.parametrize(
    "options, message",
    [
        (["-k", "0"], "k is 0"),
        (["--temperature", "-1"], "temperature is -1"),
        (["--top-p", "0"], "top-p is 0"),
        (["--top-p", "1.5"], "top-p is 1.5"),
        (["--top-k", "0"], "top-k is 0"),
        (["--prompt", ""], "prompt is empty"),
        (["--max-new-tokens", "0"], "--max-new-tokens, --batch and --threads must be at least 1"),
        (["-k", "100000"], "k is 100000"),
        (["--seed", "-1"], "seed is -1"),
        (["--seed", str(2**70)], "seed is"),
        (["--max-new-tokens", "256"], "block_size is 256"),
        (["--check", "--prompt", "\x01" * 253, "--max-new-tokens", "1"], "block_size is 256"),
        (["--batch", "0"], "--batch and --threads must be at least 1"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--threads", "100000"], "--threads is 100000; this machine has"),
        (["--device", "abacus"], "no device 'abacus'"),
        (["--checkpoints", "/nowhere"], "/nowhere/large.pt is missing; `python train_tiny.py` makes it"),
        (["--temperature", "warm"], "invalid float value: 'warm'"),
        (["--beam"], "unrecognized arguments: --beam"),
        (["-k", "many"], "k is many"),
        (["--drafter", "oracle"], "invalid choice: 'oracle'"),
        (["--rule", "optimism"], "invalid choice: 'optimism'"),
        (["--tree", "2,0"], "widths of a tree are 2,0"),
        (["--tree", "2,x"], "--tree: invalid"),
        (["--drafter", "tree", "--rule", "block"], "rule of its own"),
        (["--drafter", "tree", "-k", "3"], "shape of its own"),
        (["--tree", "500,500"], "a tree of 250500 guesses"),
        (["--check", "-k", "auto"], "--check needs a fixed k"),
        (["--check", "--dtype", "bfloat16"], "--check needs float32 or float16"),
        (["--batch", "1" + 20 * "0"], "no room for a batch of 1000"),
        (["--sweep", "--check"], "not allowed with"),
    ],
)
def test_bad_input_gets_one_line_and_status_2(pair, capsys, options, message):
    with pytest.raises(SystemExit) as exit:
        specdec.main(["--checkpoints", str(pair), "--prompt", "x", "--max-new-tokens", "4", *options])
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and out == ""
    assert message in err and err.count("\n") == 1


def test_pairs_that_do_not_fit_are_refused(tmp_path, capsys):
    permuted = dict(zip(BYTES, list(range(1, 256)) + [0]))
    cases = [({"draft_vocab_size": 300}, "300 tokens, the target 257"), ({"draft_ranks": permuted}, "different tokenizers"), ({"draft_block_size": 8}, "draft's block_size")]
    for options, message in cases:
        write_pair(tmp_path, **options)
        with pytest.raises(SystemExit) as exit:
            specdec.main(["--checkpoints", str(tmp_path), "--prompt", "x", "--max-new-tokens", "9", "--dtype", "float32"])
        out, err = capsys.readouterr()
        assert exit.value.code == 2 and out == "" and message in err and err.count("\n") == 1
    write_pair(tmp_path)
    save_heads(tmp_path / "heads.pt", make_gpt(9, 257, 256), DraftHeads(257, 16, 16), DraftHeads(257, 16, 16, markov=False))
    with pytest.raises(SystemExit) as exit:
        specdec.main(["--checkpoints", str(tmp_path), "--prompt", "x", "--max-new-tokens", "9", "--dtype", "float32"])
    assert exit.value.code == 2 and "belong to another target" in capsys.readouterr().err
    (tmp_path / "heads.pt").unlink()
    with pytest.raises(SystemExit) as exit:
        specdec.main(["--checkpoints", str(tmp_path), "--prompt", "x", "--max-new-tokens", "9", "--dtype", "float32", "--drafter", "heads"])
    assert exit.value.code == 2 and "heads.pt is missing" in capsys.readouterr().err
    (tmp_path / "tiny.pt").write_bytes(b"")
    with pytest.raises(SystemExit):
        specdec.main(["--checkpoints", str(tmp_path), "--prompt", "x"])
    assert "damaged, or not a checkpoint" in capsys.readouterr().err


def test_from_a_shell_without_a_traceback(tmp_path):
    result = run("--checkpoints", tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and "large.pt" in result.stderr
