"""`python specdec.py` as a user meets it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import specdec
from conftest import make_gpt
from model import GPT, GPTConfig, make_encoding, save_checkpoint

ROOT = Path(__file__).parent.parent
BYTES = {bytes([i]): i for i in range(256)}


def write_pair(folder, vocab_size=257, draft_vocab_size=257, draft_ranks=BYTES, draft_block_size=256):
    save_checkpoint(folder / "large.pt", make_gpt(1, vocab_size, 256), make_encoding(r"\S+|\s+", BYTES))
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
    result = run("--checkpoints", pair, "--max-new-tokens", 12, "-k", 3, "--prompt", "ab")
    assert (result.returncode, result.stderr) == (0, "")
    out = result.stdout
    for words in ("large.pt", "tiny.pt", "float32 on cpu", "accepted guess", "12 tokens in", "temperature 1\n", "temperature 0 (greedy)"):
        assert words in out or words.replace("float32", "bfloat16") in out
    assert "\033" not in out  # no colours where there is no terminal
    assert out.count("plain decoding  ") == out.count("draft model, k=3") == 2
    for word in ("tokens/s", "speed-up", "predicted", "alpha", "tau", "draft", "verify", "rest"):
        assert len(re.findall(rf"{word}", out)) >= 2, f"{word} is in the table, and explained below it"


def test_the_numbers_of_the_table_add_up(pair, capsys):
    specdec.main(["--checkpoints", str(pair), "--max-new-tokens", "20", "-k", "3", "--temperature", "0.7", "--dtype", "float32"])
    out = capsys.readouterr().out
    row = re.search(r"draft model, k=3 +(\d+) +([\d.]+) \(([\d.]+)-([\d.]+)\) +([\d.]+) +([\d.]+) ([\d.]+) +([\d.]+) +([\d.]+)% +([\d.]+)% +([\d.]+)%", out)
    speed, median, low, high, predicted, alpha, expected, tau, *shares = map(float, row.groups())
    assert low <= median <= high
    assert abs(sum(shares) - 100) < 0.2
    assert 0 <= alpha <= 1 and 0 <= expected <= 1 and 1 <= tau <= 4
    tau2, one, many, k, guess, rest = map(float, re.search(r"predicted: ([\d.]+) x ([\d.]+) ms / \(([\d.]+) \+ (\d) x ([\d.]+) \+ ([\d.]+) ms\)", out).groups())
    assert tau2 == tau and predicted == pytest.approx(tau * one / (many + k * guess + rest), rel=0.1)
    assert out.count("temperature") == 1


def test_output_is_marked_by_origin(pair, capsys):
    """Without its marks the story is the text that the same seed generates; the marks count what the statistics count."""
    target, draft, encoding = specdec.load_pair(pair, torch.device("cpu"), torch.float32)
    prompt = torch.tensor([[1, 2, 3]])
    expected = specdec.generate(target, prompt, 30, drafter=specdec.ModelDrafter(draft), k=3, seed=5)
    stats = specdec.tell(specdec.rounds(target, prompt, 30, specdec.ModelDrafter(draft), 3, seed=5), encoding)
    legend, story = capsys.readouterr().out.split("\n\n", 1)
    assert stats.emitted == 30 and stats.accepted == expected.stats.accepted
    assert story.count("[-") + story.count("[+") >= stats.rounds
    assert legend == "accepted guess   [-correction]   [+bonus]"


def test_batch_dtype_and_filters(pair, capsys):
    options = ["--batch", "3", "--dtype", "bfloat16", "--top-k", "50", "--top-p", "0.9", "--temperature", "1", "--seed", "3"]
    specdec.main(["--checkpoints", str(pair), "--max-new-tokens", "5", "--prompt", "x", *options])
    out = capsys.readouterr().out
    assert "bfloat16 on cpu" in out and "draft model, k=4" in out


@pytest.mark.parametrize(
    "options, message",
    [
        (["-k", "0"], "k is 0"),
        (["--temperature", "-1"], "temperature is -1"),
        (["--top-p", "0"], "top-p is 0"),
        (["--top-p", "1.5"], "top-p is 1.5"),
        (["--top-k", "0"], "top-k is 0"),
        (["--prompt", ""], "prompt is empty"),
        (["--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["--max-new-tokens", "256"], "block_size is 256"),
        (["--batch", "0"], "--batch is 0"),
        (["--device", "abacus"], "no device 'abacus'"),
        (["--checkpoints", "/nowhere"], "/nowhere/large.pt"),
        (["--temperature", "warm"], "invalid float value: 'warm'"),
        (["--beam"], "unrecognized arguments: --beam"),
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
    (tmp_path / "tiny.pt").write_bytes(b"")
    with pytest.raises(SystemExit):
        specdec.main(["--checkpoints", str(tmp_path), "--prompt", "x"])
    assert "damaged, or not a checkpoint" in capsys.readouterr().err


def test_from_a_shell_without_a_traceback(tmp_path):
    result = run("--checkpoints", tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and "large.pt" in result.stderr
