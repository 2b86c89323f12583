"""What bench.py and check.py share: options, who takes part, progress."""

import argparse
import importlib.util
import inspect
import itertools
import json
import math
import operator
import os
import sys
import time
from functools import partial
from pathlib import Path

import torch

from enumerator import HINT, exact_distribution, joint
from extras import ConfidentHeadsDrafter
from model import CHECKPOINTS, BadInput, load_heads, load_pair, need
from specdec import RULES, HeadsDrafter, ModelDrafter, NGramDrafter, TreeDrafter, check_numbers
from train_tiny import seconds_of_calls

DRAFTERS = ("model", "ngram", "heads", "tree")

def number(kind, low, high, words):
    """A type for argparse: numbers from low to high, described in words."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not {words}")
        return value
    return parse

positive = number(int, 1, 2**62, "a number from 1 on")

def guesses(text):
    """A type for argparse: k."""
    return text if text == "auto" else positive(text)

def one_of(names):
    """A type for argparse: one of the names, or FILE.py:NAME, which becomes what is called so."""
    def parse(text):
        file, colon, name = text.rpartition(":")
        if not colon and text not in names:
            words = f"there is no {text!r}: take {', '.join(names)}, or FILE.py:NAME"
            raise argparse.ArgumentTypeError(words)
        return own(file, name) if colon else text
    return parse

def own(file, name):
    """A function or class from a reader's file. ArgumentTypeError: there is none."""
    try:
        spec = importlib.util.spec_from_file_location(f"own_{Path(file).stem}", file)
        need(spec is not None, "it is no Python file")
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        need(callable(getattr(module, name)), "it is neither a function nor a class")
        return getattr(module, name)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise argparse.ArgumentTypeError(f"{name!r} of {file!r}: {reason}") from error

def widths(text):
    """A type for argparse: the widths of a tree."""
    widths = [positive(width) for width in text.split(",")]
    if sum(itertools.accumulate(widths, operator.mul)) > 1000:
        raise argparse.ArgumentTypeError(f"{text} is a tree of more than 1000 guesses")
    return widths

def new_file(text):
    """A type for argparse: where a file can be written."""
    path = Path(text)
    if path.exists() and not path.is_file() or not os.access(path.absolute().parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} cannot be written")
    return path

def new_parser(description):
    """With the options that both scripts take."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=description)
    cores, add = os.cpu_count(), parser.add_argument
    threads = number(int, 1, cores, f"between 1 and {cores}, the number of processors")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", help="text to continue (default: some Python code)")
    source.add_argument("--prompt-file", metavar="FILE", help="the same in a file, or - for stdin")
    add("-k", type=guesses, metavar="K", help="guesses per round (default: 4, heads 6, ngram 10)")
    add("--rule", type=one_of(RULES), help=f"who judges: {', '.join(RULES)}, or FILE.py:NAME")
    add("--tree", type=widths, metavar="W,W,..", help="children per node (default: 2,1,1,1)")
    add("--temperature", type=float, metavar="T", help="0 is greedy")
    add("--top-k", type=int, metavar="K", help="sample from the K best tokens only")
    add("--top-p", type=float, metavar="P", help="from the fewest best ones that together reach P")
    add("--seed", type=int, default=0, help="default: 0")
    add("--device", help="default: cuda where there is one, else cpu")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: by the device")
    add("--threads", type=threads, metavar="N", help="default: 1, or all if faster")
    add("--target", metavar="NAME", help="gpt2-xl or the like, or a folder (default: large.pt)")
    add("--draft", metavar="NAME", help="the same (default: tiny.pt)")
    add("--checkpoints", default=CHECKPOINTS, type=Path, metavar="DIR", help="of large.pt, ..")
    return parser

def prompt_of(args):
    """The text that was given, or None. OSError, ValueError: there is none to be read."""
    if args.prompt_file == "-":
        return sys.stdin.read()
    return Path(args.prompt_file).read_text(encoding="utf-8") if args.prompt_file else args.prompt

def name_of(choice):
    return getattr(choice, "__name__", str(choice))

def load(args, drafters=()):
    """-> target, draft, heads (where they are wanted, and there), encoding. drafters (): all."""
    check_numbers(0, args.temperature or 0, args.top_k, args.top_p, args.seed)
    need(not drafters or "tree" in drafters or args.tree is None, "--tree is for --drafter tree")
    right = "tree" not in drafters or args.k is None and args.rule in (None, "rejection")
    need(right, "a tree has a rule and a shape of its own: leave out --rule and -k")
    right = not args.target or "heads" not in drafters
    need(right, "the heads belong to large.pt: leave out --target and --draft")
    args.tree = args.tree or [2, 1, 1, 1]
    dtype = args.dtype and getattr(torch, args.dtype)
    folder, pair = args.checkpoints, (args.target, args.draft)
    target, draft, encoding = load_pair(folder, args.device, dtype, *pair)
    torch.set_num_threads(args.threads or best_threads(target))
    file, wanted = folder / "heads.pt", not drafters or "tree" in drafters
    heads = []  # they belong to large.pt
    if "heads" in drafters or wanted and file.exists() and not args.target:
        heads = load_heads(file, target)
    return target, draft, heads, encoding

def best_threads(target):
    """One, unless all are clearly faster: on a busy machine threads wait for each other."""
    def one_pass(n):
        torch.set_num_threads(n)
        target(torch.zeros(1, 1, dtype=torch.int64, device=target.wte.weight.device))

    most = torch.get_num_threads()
    times = seconds_of_calls({n: partial(one_pass, n) for n in {1, most}}, 5)
    return most if times[most] < 0.8 * times[1] else 1

def contenders(args, draft, heads, greedy=False, prices=None):
    """Those that args ask for, plain decoding first: [(name, drafter, k, rule, whether exact)].

    prices: what rounds with 0, 1, 2, .. guesses cost, for heads that choose how many.
    """
    rule, k, who = args.rule or "rejection", args.k, args.drafter or DRAFTERS
    rows, exact = [("plain decoding", None, 1, "rejection", True)], is_exact(rule)
    others = () if args.rule or greedy else ("block", "coupled")  # greedy, all rules are one

    def add(name, drafter, k, rule=rule):
        rows.append((name, drafter, k, rule, exact))

    if "model" in who:
        add(f"draft model k={k or 4}", ModelDrafter(draft), k or 4)
        for other in others:
            add(f"draft model, {other}", ModelDrafter(draft), k or 4, other)
        if k != "auto":
            add("draft model, k=auto", ModelDrafter(draft), "auto")
    if "ngram" in who:
        add(f"n-gram k={k or 10}", NGramDrafter(), k or 10)
    if "heads" in who and heads:
        add(f"heads k={k or 6}", HeadsDrafter(heads[0]), k or 6)
        for other in others[:1]:
            add(f"heads, {other}", HeadsDrafter(heads[0]), k or 6, other)
        add("heads, blind", HeadsDrafter(heads[1]), k or 6)
        if prices:
            add("heads, confident", ConfidentHeadsDrafter(heads[0], prices), len(prices) - 1)
    if "tree" in who and rule == "rejection":
        shape, depth = ",".join(map(str, args.tree)), len(args.tree)
        add(f"tree {shape}, model", TreeDrafter(ModelDrafter(draft), args.tree), depth)
        if heads:
            add(f"tree {shape}, heads", TreeDrafter(HeadsDrafter(heads[0]), args.tree, True), depth)
    for make in filter(callable, who):
        add(f"{name_of(make)} k={k or 4}", build(make, draft), k or 4)
    return rows

def build(make, draft):
    """The drafter that a reader's class or function makes. ValueError: it makes none."""
    try:
        inputs = inspect.signature(make).parameters.values()
        return make(draft) if any(p.default is p.empty for p in inputs) else make()
    except Exception as error:
        raise BadInput(f"{name_of(make)} makes no drafter: {error}") from error

def is_exact(rule):
    """Whether a rule keeps a small distribution, as far as is known. ValueError: it is no rule."""
    target_probs, draft_probs = [[0.7, 0.3], [0.2, 0.8], [0.4, 0.6]], [[0.5, 0.5], [0.6, 0.4]]
    if rule in RULES:
        return True
    try:
        error = exact_distribution(rule, target_probs, draft_probs) - joint(target_probs)
    except Exception as reason:
        need(str(reason) == HINT, f"{name_of(rule)} is no rule: {reason}")
        return False  # it draws in a way of its own
    return error.abs().max().item() < 1e-9

def write_whole(path, content):
    """A JSON file that appears complete or not at all; NaN becomes null."""
    content = json.loads(json.dumps(content), parse_constant=lambda name: None)
    new = Path(f"{path}.new")
    try:
        new.write_text(json.dumps(content, indent=1), encoding="utf-8")
        os.replace(new, path)
    except OSError:
        new.unlink(missing_ok=True)
        raise

class Progress:
    """On stderr: what is being measured, how much is done, and the time left. In a terminal it is
    a line that is written anew, elsewhere one every ten seconds.
    """

    def __init__(self):
        self.terminal, self.said = sys.stderr is not None and sys.stderr.isatty(), time.time()

    def __call__(self, title, later, words, left):
        if sys.stderr is not None and time.time() - self.said >= (0.2 if self.terminal else 10):
            self.said, left = time.time(), max(0, left) + later
            self.write(f"{title}: {words}; about {left:.0f} s left", "\n")

    def write(self, line, end=""):
        """In a terminal, in place of the last line."""
        before, end = ("\r\033[K", "") if self.terminal else ("", end)
        print(before + line, end=end, file=sys.stderr, flush=True)

    def clear(self):
        if self.terminal:
            self.write("")
