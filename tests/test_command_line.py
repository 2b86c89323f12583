"""`python specdec.py` as a reader meets it."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import specdec
from conftest import make_gpt
from model import BadInput, DraftHeads, make_encoding, save_checkpoint, save_heads
from specdec import HeadsDrafter, ModelDrafter, NGramDrafter, Result, Stats, TreeDrafter, generate
from train_tiny import PRESETS

ROOT = Path(__file__).parent.parent
BYTES = {bytes([i]): i for i in range(256)}
ROW = r" +(\d+) +(\d+) +([\d.]+)\n +"
TIMES = f"plain decoding{ROW}speculative{ROW}([\\d.]+) times"


def write_pair(folder, vocab_size=257, draft_vocab_size=257, draft_ranks=BYTES, draft_block=256):
    target = make_gpt(1, vocab_size, 256)
    draft = make_gpt(2, draft_vocab_size, draft_block, n_layer=1)
    save_checkpoint(folder / "large.pt", target, make_encoding(r"\S+|\s+", BYTES))
    heads = DraftHeads(vocab_size, 16, 16), DraftHeads(vocab_size, 16, 16, markov=False)
    save_heads(folder / "heads.pt", target, *heads)
    save_checkpoint(folder / "tiny.pt", draft, make_encoding(r"\S+|\s+", draft_ranks))
    return folder


@pytest.fixture
def pair(tmp_path):
    return write_pair(tmp_path)


def run(*args, **env):
    command = [sys.executable, "specdec.py", *map(str, args)]
    env = {**os.environ, **env}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env, input="ab")


@pytest.fixture
def story(pair, capsys, monkeypatch):
    """story(options) runs main with random models, and a clock that makes two seconds short."""
    clock = iter(range(10**9))
    monkeypatch.setattr(specdec, "now", lambda: next(clock) / 100)

    def story(*options):
        first = ["--checkpoints", str(pair), "--max-new-tokens", "12", "--prompt", "abab"]
        specdec.main([*first, "--threads", "1", *options])
        return capsys.readouterr().out

    return story


def test_the_whole_story_from_a_shell(pair):
    words = "--max-new-tokens", 6, "-k", 3, "--prompt-file", "-", "--temperature", 0
    result = run("--checkpoints", pair, *words)
    assert (result.returncode, result.stderr) == (0, "")
    assert "The prompt: 'ab'" in result.stdout  # from standard input
    assert "\033" not in result.stdout  # no colours where there is no terminal


def test_the_whole_story(story):
    out = story()
    assert out.startswith("The target: ")
    for words in ("\nGreedy: ", "\nTemperature 1: ", "acceptance rate", " tokens per pass x ", "\nNext: "):
        assert words in out
    assert "same text: yes" in out.split("Temperature 1")[0]
    assert max(map(len, out.splitlines())) <= 100


def test_every_round_is_told(story, monkeypatch):
    """The lines of a story are the rounds: together they accept and add what was to be written."""
    out = story("--temperature", "0")
    accepted = [int(n) for n in re.findall(r"accepts (\d+)", out)]
    written = sum(accepted) + len(re.findall(r"accepts \d+, (?:adds|corrects)", out))
    assert written == 12 and len(accepted) > 1
    emitted, passes, _, ours, rounds, *_ = re.search(TIMES, out).groups()
    assert emitted == passes == ours == "12" and int(rounds) == len(accepted)


def test_the_numbers_add_up(story):
    out = story("--temperature", "0.7", "--max-new-tokens", "40")
    slow, fast, speed_up = (float(re.search(TIMES, out)[i]) for i in (3, 6, 7))
    assert speed_up == pytest.approx(slow / fast, abs=0.02)
    x = r"([\d.]+)"
    numbers = rf"  {x} = {x} tokens per pass x {x} ms / \({x} ms to check \+ {x}"
    same, tau, one, check, rest = map(float, re.search(numbers, out).groups())
    assert same == pytest.approx(tau * one / (check + rest), rel=0.02)
    assert same == pytest.approx(speed_up, abs=0.02)
    rate, accepted, judged = re.search(r"acceptance rate ([\d.]+): (\d+) of (\d+)", out).groups()
    assert float(rate) == pytest.approx(int(accepted) / int(judged), abs=0.01)
    assert tau == pytest.approx(40 / int(re.search(TIMES, out)[5]), abs=0.01)
    assert out.count("Temperature") == 1 and "Greedy" not in out


def test_the_prompts_pass_is_not_in_a_timed_run(monkeypatch):
    """The target's pass takes 10 seconds over the prompt, else one; the draft's takes a quarter."""
    target, draft, clock, n_draft = make_gpt(1), make_gpt(2), [0.0], [0]
    monkeypatch.setattr(specdec, "now", lambda: clock[0])

    def of_target(block, args):
        clock[0] += 10 if args[0].shape[1] == 11 else 1

    def of_draft(block, args):
        clock[0] += 0.25
        n_draft[0] += 1

    target.h[0].register_forward_pre_hook(of_target)
    draft.h[0].register_forward_pre_hook(of_draft)
    prompts = torch.arange(24).view(2, 12) % 7
    for options in ({"temperature": 0}, {"temperature": 0, "drafter": ModelDrafter(draft), "k": 3}):
        n_draft[0] = 0
        ms, result, passes = specdec.timed_run(target, prompts, 8, **options)
        assert set(passes) == {1000} and ms == 1000 * len(passes) + 250 * n_draft[0]
        assert len(passes) == 8 or len(passes) < 8 and "drafter" in options
        assert result == generate(make_gpt(1), prompts, 8, **options)


def test_times_are_those_of_the_median_runs_of_two_seconds(monkeypatch, capsys):
    """Runs of .4 seconds in turns: three pairs of them are begun in that time."""
    runs, clock = [], [0.0]
    plain, fast = iter([9000, 1000, 5000]), iter([1000, 9000, 2000])

    def timed_run(target, prompts, n, drafter=None, **options):
        clock[0] += 0.4
        runs.append(drafter)
        return next(plain if drafter is None else fast), Result([[1]], Stats(emitted=1)), []

    monkeypatch.setattr(specdec, "now", lambda: clock[0])
    monkeypatch.setattr(specdec, "timed_run", timed_run)
    specdec.show_times(None, [[1]], 1, "drafter", 4, "rejection", temperature=0)
    assert runs == [None, "drafter"] * 3
    slow, quick, speed_up = re.search(TIMES, capsys.readouterr().out).group(3, 6, 7)
    assert (slow, quick, speed_up) == ("5.000", "2.000", "2.50")


@pytest.mark.parametrize("drafter", ["model", "ngram", "heads", "tree"])
@pytest.mark.parametrize("options", ["", "--batch 3", "--top-k 5 --top-p 0.9 --seed 7"])
def test_every_drafter_tells_its_story(story, drafter, options):
    out = story("--drafter", drafter, *options.split())
    assert "same text: yes" in out.split("Temperature 1")[0] and out.count("times as fast") == 2
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize("rule", ["block", "coupled"])
def test_every_rule_tells_its_story(story, rule):
    out = story("--rule", rule, "-k", "3")
    assert ("same text: yes" in out.split("Temperature 1")[1]) is (rule == "coupled")


def test_k_chosen_for_you_and_another_tree_and_dtype(story):
    assert "Greedy" in story("-k", "auto")
    assert "Greedy" in story("--drafter", "tree", "--tree", "3,2")
    assert "Greedy" in story("--dtype", "bfloat16")


@pytest.fixture
def asked(pair, capsys, monkeypatch):
    """asked(options): what main asks of `rounds`, and of `show_times`; nothing is decoded."""

    def asked(words):
        told, timed = [], []
        with monkeypatch.context() as m:
            m.setattr(specdec, "rounds", lambda *a, **filters: told.append((a, filters)) or [])
            m.setattr(specdec, "show_times", lambda *args, **options: timed.append((args, options)))
            m.setattr(torch, "set_num_threads", lambda n: told.append(n))
            specdec.main(["--checkpoints", str(pair), *words.split()])
        return told, timed

    return asked


def test_the_defaults_are_those_that_help_tells(asked):
    (n_threads, *told), timed = asked("")
    assert n_threads == 1 and [args[6] for args, _ in told] == [0, 1]
    for (args, filters), (others, options) in zip(told, timed):
        target, prompts, n, drafter, k, rule, temperature = args
        assert (len(target.h), len(drafter.model.h), type(drafter)) == (2, 1, ModelDrafter)
        assert bytes(prompts[0].tolist()).decode() == specdec.PROMPT and len(prompts) == 1
        assert (n, k, rule, filters) == (48, 4, "rejection", dict(top_k=None, top_p=None, seed=0))
        assert others == args[:6] and options == filters | {"temperature": temperature}
    ngram, heads, tree = (
        asked(f"--temperature 0 --drafter {name}")[0][1][0] for name in ("ngram", "heads", "tree")
    )
    assert type(ngram[3]) is NGramDrafter and ngram[4] == 10
    assert type(heads[3]) is HeadsDrafter and heads[4] == 6 and heads[3].heads.wte is not None
    assert type(tree[3]) is TreeDrafter and tree[3].widths == (2, 1, 1, 1)


def test_every_option_is_heard(asked):
    words = "--prompt ab --max-new-tokens 9 -k 2 --rule block --temperature 0.5 --batch 3"
    words += " --top-k 5 --top-p 0.9 --seed 7 --dtype bfloat16 --threads 1"
    (_, (args, filters)), ((others, options),) = asked(words)
    target, prompts, n, drafter, k, rule, temperature = args
    assert target.wte.weight.dtype == drafter.model.wte.weight.dtype == torch.bfloat16
    assert prompts.tolist() == [[97, 98]] * 3 and (n, k, rule, temperature) == (9, 2, "block", 0.5)
    assert filters == {"top_k": 5, "top_p": 0.9, "seed": 7}
    assert others == args[:6] and options == filters | {"temperature": 0.5}
    (_, (args, _)), ((others, _),) = asked("--trace --temperature 0")
    assert callable(args[5]) and others[5] == "rejection"  # what is timed shows no coins


def test_prompts_from_files(story, tmp_path, monkeypatch):
    (tmp_path / "text").write_text("héllo\n", encoding="utf-8")
    out = story("--temperature", "0", "--prompt-file", str(tmp_path / "text"))
    assert "The prompt: 'héllo\\n'" in out


def test_trace_shows_the_very_coins(story, monkeypatch):
    """The coin, both probabilities and the verdict of every guess that was judged; the residual."""
    drawn, bernoulli = [], specdec.bernoulli

    def watched(probs, generator):
        state = generator.get_state()
        out = bernoulli(probs, generator)
        again = torch.Generator().set_state(state)
        drawn.append(torch.rand(probs.shape, generator=again, dtype=torch.float64))
        return out

    monkeypatch.setattr(specdec, "bernoulli", watched)
    out = story("--trace", "--temperature", "1", "--max-new-tokens", "30")
    pattern = r"coin ([\d.]+) (<|>=) target / draft = ([\d.]+) / ([\d.]+): (\w+)"
    lines = re.findall(pattern, out)
    coins = [f"{u:.3f}" for row in drawn for u in row[0].tolist()]
    assert lines and {coin for coin, *_ in lines} <= set(coins)
    for coin, sign, target, draft, verdict in lines:
        assert (sign == "<") is (verdict == "accepted")
        if float(draft) > 0.05 and abs(float(coin) - float(target) / float(draft)) > 0.01:
            assert (float(coin) < float(target) / float(draft)) is (verdict == "accepted")
    assert out.count("then of the ") == out.count("accepts ")
    assert {"accepted", "rejected"} == {verdict for *_, verdict in lines}


def a_round(guesses, tokens, n_accepted, n_new):
    probs = torch.ones(1, len(guesses) + 1, 257)
    numbers = (torch.tensor([x]) for x in (n_accepted, tokens, n_new))
    return specdec.Round(torch.tensor([guesses]), probs[:, 1:], probs, *numbers)


@pytest.mark.parametrize("terminal, no_color", [(False, ""), (True, "1"), (True, "")])
def test_a_round_is_told_in_marks_or_colours(capsys, monkeypatch, terminal, no_color):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setenv("NO_COLOR", no_color)
    specdec.tell(a_round([97, 98, 99], [97, 100, 0, 0], 1, 2), chr, tree=False)
    specdec.tell(a_round([97, 98], [97, 98, 101], 2, 3), chr, tree=False)
    specdec.tell(a_round([97, 98], [97, 98, 0], 2, 1), chr, tree=False)
    wrong, right, ends = capsys.readouterr().out.splitlines()
    if terminal and not no_color:
        assert wrong.startswith("  \033[32ma\033[0m \033[31m[b]\033[0m \033[90m(c)\033[0m ")
        assert wrong.endswith("accepts 1, corrects b to \033[33md\033[0m")
        assert right.endswith("adds \033[36me\033[0m")
        assert len(re.sub(r"\033\[\d*m", "", wrong).split("accepts")[0]) == 52
    else:
        assert wrong == f"  {'a [b] (c)':50}accepts 1, corrects b to d"
        assert right == f"  {'a b':50}accepts 2, adds e"
    assert ends.endswith("accepts 1: the text is complete")


def test_a_tree_shows_the_path_that_was_accepted(capsys):
    specdec.tell(a_round([97, 98, 99], [97, 100, 0, 0], 1, 2), chr, tree=True)
    assert capsys.readouterr().out == f"  {'a':50}accepts 1, adds d\n"


def test_something_is_there_within_seconds():
    """With the shipped pair, the first line comes soon; the default story does not end early."""
    command = [sys.executable, "-u", "specdec.py", "--temperature", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        start = time.perf_counter()
        assert process.stdout.readline().startswith("The target: ")
        assert time.perf_counter() - start < 20  # 3 seconds, on a machine that does nothing else
        out = process.stdout.read()
    assert process.returncode == 0 and out.count(" 48      48 ") == 1
    assert max(map(len, out.splitlines())) <= 100


BEFORE = [  # before anything is loaded
    (["--temperature", "-1"], "temperature is -1"),
    (["--temperature", "nan"], "temperature is nan"),
    (["--temperature", "warm"], "invalid float value: 'warm'"),
    (["--top-p", "0"], "top-p is 0"),
    (["--top-p", "1.5"], "top-p is 1.5"),
    (["--top-k", "0"], "top-k is 0"),
    (["--seed", "-1"], "seed is -1"),
    (["--seed", str(2**70)], "seed is"),
    (["--max-new-tokens", "0"], "--max-new-tokens at least 1"),
    (["--batch", "0"], "--batch must be 1 to 10000"),
    (["--batch", "1" + 20 * "0"], "--batch must be 1 to 10000"),
    (["--threads", "0"], "argument --threads: invalid choice: 0"),
    (["--threads", "100000"], "argument --threads: invalid choice: 100000"),
    (["--prompt-file", "/nowhere"], "No such file or directory: '/nowhere'"),
    (["--checkpoints", "/nowhere"], "`python train_tiny.py --checkpoints /nowhere` makes it"),
    (["--beam"], "unrecognized arguments: --beam"),
    (["--drafter", "oracle"], "invalid choice: 'oracle'"),
    (["--rule", "optimism"], "invalid choice: 'optimism'"),
    (["--tree", "2,2"], "--tree is for trees"),
    (["--drafter", "tree", "-k", "3"], "-k for all others"),
    (["--trace", "--rule", "block"], "--trace is for the rejection rule"),
    (["--trace", "--batch", "2"], "one row"),
]
AFTER = [
    (["-k", "0"], "k is 0"),
    (["-k", "100000"], "k is 100000"),
    (["-k", "many"], "k is 'many'"),
    (["--prompt", ""], "prompt is empty"),
    (["--max-new-tokens", "256"], "block_size is 256"),
    (["--device", "abacus"], "no device 'abacus'"),
    (["--drafter", "tree", "--tree", "2,0"], "widths of a tree are 2,0"),
    (["--drafter", "tree", "--tree", "2,x"], "widths of a tree are 2,x"),
    (["--drafter", "tree", "--tree", "500,500"], "a tree of 250500 guesses"),
    (["--drafter", "tree", "--rule", "block"], "rule of its own"),
]


@pytest.mark.parametrize("options, message", BEFORE + AFTER)
def test_bad_input_is_refused(pair, refusal, options, message):
    first = ["--checkpoints", pair, "--prompt", "x", "--max-new-tokens", "4", "--threads", "1"]
    assert message in refusal(specdec.main, [*first, *options])


def test_numbers_are_refused_before_anything_is_loaded(refusal):
    """There is no such pair, and nobody notices."""
    for words, message in BEFORE:
        assert message in refusal(specdec.main, ["--checkpoints", "/nowhere", *words])


def test_pairs_that_do_not_fit_are_refused(tmp_path, refusal):
    def refused(message, *options):
        first = ["--checkpoints", tmp_path, "--prompt", "x", "--max-new-tokens", "9"]
        assert message in refusal(specdec.main, [*first, "--threads", "1", *options])

    permuted = dict(zip(BYTES, list(range(1, 256)) + [0]))
    for options, message in (
        ({"draft_vocab_size": 300}, "tiny.pt is damaged"),
        ({"draft_ranks": permuted}, "different tokenizers"),
        ({"draft_block": 8}, "draft's block_size"),
    ):
        write_pair(tmp_path, **options)
        refused(message)
    write_pair(tmp_path)
    heads = DraftHeads(257, 16, 16), DraftHeads(257, 16, 16, markov=False)
    save_heads(tmp_path / "heads.pt", make_gpt(9, 257, 256), *heads)
    refused("belong to another target", "--drafter", "heads")
    (tmp_path / "heads.pt").unlink()
    refused("heads.pt is missing", "--drafter", "heads")
    (tmp_path / "tiny.pt").write_bytes(b"")
    refused("damaged, or not a checkpoint")


def test_from_a_shell_without_a_traceback(pair, tmp_path):
    result = run("--checkpoints", tmp_path / "nothing")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and "large.pt" in result.stderr
    short = f"{sys.executable} specdec.py --checkpoints {pair} --max-new-tokens 2 --temperature 0"
    for where, words in (("/dev/full", "No space left"), ("&-", "standard output is closed")):
        if where == "&-" or Path(where).exists():
            options = {"shell": True, "cwd": ROOT, "capture_output": True, "text": True}
            result = subprocess.run(f"{short} > {where}".replace("> &", ">&"), **options)
            assert result.returncode == 2 and words in result.stderr
            assert result.stderr.count("\n") == 1 and result.stderr.startswith("specdec.py: error:")


def test_a_script_makes_a_line_of_what_a_user_can_mend_and_of_nothing_else(monkeypatch, capsys):
    def script(error):
        def main():
            raise error

        return main

    handled = {}
    monkeypatch.setattr(signal, "signal", handled.__setitem__)
    for error in (BadInput("two\nlines"), OSError("disk"), UnicodeDecodeError("x", b"", 0, 1, "y")):
        with pytest.raises(SystemExit, match="2"):
            specdec.run_script(script(error))
        assert capsys.readouterr().err.count("\n") == 1
    for error in (ValueError, KeyError, RuntimeError, NotImplementedError, MemoryError):
        with pytest.raises(error):
            specdec.run_script(script(error("ours")))
    with pytest.raises(SystemExit) as exit:
        specdec.run_script(lambda: 1)
    assert exit.value.code == 1
    # Ctrl-C and `| head`: the system's own way to end, without a traceback
    names = {"SIGINT", "SIGPIPE"} & set(dir(signal))
    assert handled == {getattr(signal, name): signal.SIG_DFL for name in names}


def test_the_default_prompt_fits_every_preset():
    """A token is at least one byte, so this many tokens are the most."""
    shortest = min(preset.block_size for preset in PRESETS.values())
    assert len(specdec.PROMPT.encode()) + 48 <= shortest
