"""Every drafter and every rule beside plain decoding: how much faster, and why.

    python tests/bench.py                          # less than a minute on two CPU cores
    python tests/bench.py --drafter heads -k 8     # one drafter, and each of its eight guesses
    python tests/bench.py --sweep                  # what a pass costs; speed-up against k and batch
    python tests/bench.py --drafter model --drafter my.py:Mine

--drafter and --rule take FILE.py:NAME for your own. A drafter is a class, or a function that makes
one, called with the draft model, or with nothing if it needs nothing; a rule is like `verify`, and
if it is not exact, the table says so.
"""

import itertools
import math
import shutil
import signal
import statistics
import sys
import textwrap
import time
from collections import Counter
from copy import copy
from functools import partial
from pathlib import Path
from unittest import mock

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it quietly

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import specdec
from kvcache import FixedKVCache
from model import capture, check_memory, has_graphs, need, now
from options import DRAFTERS, Progress, contenders, load, name_of, new_file, new_parser
from options import one_of, positive, prompt_of, write_whole
from specdec import ModelDrafter, NGramDrafter, Stats, TreeDrafter, expected_tokens, run_script
from train_tiny import seconds_of_calls

PROMPTS = (
    "import os\nimport sys\n\n"
    "def main(argv=None):\n    if argv is None:\n        argv = sys.argv[1:]\n",
    "def binary_search(items, wanted):\n"
    '    """Return the index of wanted in the sorted list items, or -1."""\n',
    'class Stack:\n    """A last-in, first-out container."""\n\n    def __init__(self):\n',
)
WHO = "model, ngram, heads, tree, or FILE.py:NAME; may be repeated (default: all)"
TEST = "    def test_{0}(self):\n        self.assertEqual(parse('{0}'), '{0}')\n\n"
REPEATING = "".join(map(TEST.format, ("red", "green", "blue", "black")))
GLOSSARY = """\
*          the fastest; ! is not known to keep the target's distribution: it cannot win
tok/s      tokens per second, after the prompt: plain decoding's median, times speed-up
speed-up   over plain decoding: the median of all turns, and their quartiles
predicted  tau (T(1) + plain decoding's rest) / (T(k+1) + draft + rest); T(n): a pass over n tokens
alpha      acceptance rate: of the guesses that were judged, the fraction accepted
tau        tokens per pass of the target, its own token included
1 2 3 ..   acceptance rate of the first, second, third .. guess of a round, in %
draft ..   % of the time: guessing, passes of the target (verify), everything else"""

def expected_speed_up(alpha, k, c):
    """Leviathan et al. 2022, Theorem 3.8.

    c: time of a draft pass / time of a target pass, the latter free of extra tokens.
    """
    return expected_tokens(alpha, k) / (k * c + 1)

def best_k(alpha, c, most=64):
    """The k with the largest expected speed-up; 0 if no guess pays."""
    return max(range(most + 1), key=lambda k: expected_speed_up(alpha, k, c))

# ---- measuring -----------------------------------------------------------------------------------

class Row:
    """A row of the table: who guesses (None: nobody), how many, who judges; and what came of it."""

    def __init__(self, name, drafter=None, k=1, rule="rejection", exact=True):
        self.name, self.drafter, self.k, self.rule, self.exact = name, drafter, k, rule, exact
        self.stats, self.judged, self.accepted = Stats(), Counter(), Counter()  # by position
        self.turns = []  # of each: {seconds, tokens, passes, ..}, {tokens of a pass: how often}
        self.alone = []  # of each, of replays: {tokens of a pass: seconds of a round}

    def begin(self, target, prompt, n, **options):
        """Begin a turn. The clock is outside: it times methods of copies of target and drafter.
        No clock can look into a CUDA graph. So where rounds are replayed, replays are timed alone,
        at the end of a turn, when they add nothing any more.
        """
        self.n_rounds, self.emitted, drafter = 0, 0, copy(self.drafter)
        self.turns.append((Counter(), Counter()))
        self.launches, self.most = [], n * len(prompt)
        self.in_parts = not has_graphs(prompt.device)
        self.alone += [] if self.in_parts else [{}]
        if self.in_parts:
            target = copy(target)
            target.forward = self.timed("verify", target.forward)
            for name in ("propose", "commit") if drafter is not None else ():
                setattr(drafter, name, self.timed("draft", getattr(drafter, name)))
        self.rounds = specdec.rounds(target, prompt, n, drafter, self.k, self.rule, **options)

    def timed(self, part, call):
        def timed_call(first, *args):
            start = now()
            out = call(first, *args)
            self.parts[part] += now() - start
            if part == "verify":
                self.size = first.shape[1]
            return out
        return timed_call

    def captured(self, call, generator):
        launch, result = capture(call, generator)
        self.launches.append(launch)
        return launch, result

    @torch.inference_mode()
    def replays_alone(self):
        """{tokens that a pass reads: seconds of a round}, the host not looking at any."""
        def many(launch):
            for _ in range(10):
                launch()
        sizes = (5, 1) if self.k == "auto" else [*self.turns[-1][1]]
        calls = dict(zip(sizes, (partial(many, launch) for launch in self.launches)))
        return {size: t / 10 for size, t in seconds_of_calls(calls, 1).items()}

    def advance(self, n_tokens):
        """Decode so many tokens more. -> whether there may be others."""
        # To wait for a GPU after each round would hide that it goes on while the host looks at one.
        goal, clock = self.emitted + n_tokens, now if self.in_parts else time.perf_counter
        start = now()
        while self.emitted < goal:
            self.parts, self.size = Counter(), 0
            start = clock() if self.in_parts else start
            r = next(self.rounds, None)
            if r is None:
                return False
            n_new = r.n_new.sum().item()
            end = clock() if self.emitted + n_new < goal else now()
            start, seconds = end, end - start
            self.n_rounds, self.emitted = self.n_rounds + 1, self.emitted + n_new
            # In the first round the prompt is read. In the next ones graphs are recorded.
            if self.n_rounds > (1 if self.in_parts else 4):
                spent, sizes = self.turns[-1]
                spent.update(self.parts, seconds=seconds, tokens=n_new, passes=1)
                sizes[self.size or r.guesses.shape[1] + 1] += 1
            if self.launches and self.emitted == self.most:
                self.alone[-1] = self.replays_alone()
            self.stats.add(r)
            judged = torch.minimum(r.n_accepted + (r.n_accepted < r.n_guessed), r.n_new)
            for n, m in zip(judged.tolist(), torch.minimum(r.n_accepted, r.n_new).tolist()):
                self.judged.update(range(n))
                self.accepted.update(range(m))
        return True

    def speeds(self):
        return [rate(spent["tokens"], spent["seconds"]) for spent, _ in self.turns]

    def figures(self, plain, T, B):
        """What is known, given the row of plain decoding, and T: {n: seconds of a pass over n}."""
        speed_up, low, high = quartiles([a / b for a, b in zip(self.speeds(), plain.speeds())])
        total, predicted = sum((spent for spent, _ in self.turns), Counter()), []
        in_parts = self.in_parts and self.drafter is not None
        for (spent, sizes), (theirs, _) in zip(self.turns, plain.turns) if in_parts else ():
            seconds = spent["seconds"] - spent["verify"] + sum(T[n] * m for n, m in sizes.items())
            one = T[1] + rate(theirs["seconds"] - theirs["verify"], theirs["passes"])
            predicted.append(rate(spent["tokens"] / B * one, seconds))
        for (spent, sizes), ours, theirs in zip(self.turns, self.alone, plain.alone):
            if self.drafter is not None and {*sizes} <= {*ours} and 1 in theirs:
                seconds = sum(ours[n] * m for n, m in sizes.items())
                predicted.append(rate(spent["tokens"] / B * theirs[1], seconds))
        whole = total["seconds"] if self.in_parts else 0
        return {
            "name": self.name, "exact": self.exact,
            "tokens_per_second": speed_up * quartiles(plain.speeds())[0],
            "speed_up": speed_up, "low": low, "high": high, "predicted": quartiles(predicted)[0],
            "alpha": rate(self.stats.accepted, self.stats.evaluated),
            "tau": self.stats.tokens_per_pass,
            "at_position": [self.accepted[i] / n for i, n in sorted(self.judged.items())],
            "draft": rate(total["draft"], whole), "verify": rate(total["verify"], whole),
            "rest": rate(total["seconds"] - total["draft"] - total["verify"], whole),
            "seconds_per_pass": rate(total["seconds"], total["passes"]),
            "turns": len(self.turns), "stats": vars(self.stats),
        }  # fmt: skip

def rate(part, whole):
    return part / whole if whole else math.nan

def quartiles(numbers):
    """The median, which lies between, and the lower and the upper quartile. NaN is left out."""
    numbers = [x for x in numbers if not math.isnan(x)] or [math.nan]
    where = torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64)
    return torch.tensor(numbers, dtype=torch.float64).quantile(where).tolist()

def compare(target, rows, prompts, n, seconds, say, seed=0, **filters):
    """Decode n tokens after each of the prompts (B, T), by all rows, plain decoding first, in whole
    cycles: as many as so many seconds are enough for, from one to five. -> figures of each row
    """
    times, start, per_turn, cycle, (B, length) = {}, now(), 0, len(prompts), prompts[0].shape
    for turn in itertools.count():
        if turn % cycle == 0 < turn and (turn == 5 * cycle or (turn + cycle) * per_turn > seconds):
            break
        for row in rows:
            row.begin(target, prompts[turn % cycle], n, seed=(seed + turn) % 2**63, **filters)
        active = list(rows)
        while active:
            # In alternation, 16 tokens at a time: what the machine does meanwhile hits all alike.
            row = min(active, key=lambda row: row.emitted)
            with mock.patch.object(specdec, "capture", row.captured):
                if not row.advance(16 * B):
                    active.remove(row)
            if row.in_parts and (row is rows[0] or not active):  # and passes alone as well
                sizes = {1}.union(*(sizes for row in rows for _, sizes in row.turns))
                calls = passes(target, B, length + n // 2, sizes)
                for size, t in seconds_of_calls(calls, 1).items():
                    times.setdefault(size, []).append(t)
            done = turn + sum(row.emitted for row in rows) / (len(rows) * B * n)
            per_turn = (now() - start) / done
            turns = cycle * min(5, max(turn // cycle + 1, seconds // (per_turn * cycle)))
            words = f"turn {turn + 1}, {len(rows) - len(active)} of {len(rows)} rows done"
            say(words, (turns - done) * per_turn)
    T = {size: statistics.median(some) for size, some in times.items()}
    return [row.figures(rows[0], T, B) for row in rows]

def passes(model, B, length, sizes):
    """{n: a function that passes n tokens of B rows through the model, after `length` others}."""
    device, most = model.wte.weight.device, length + max(sizes)
    tokens = torch.zeros(B, most, dtype=torch.int64, device=device)
    graphs, cache = has_graphs(device), model.new_cache(B, most)

    @torch.inference_mode()
    def one_pass(n):
        out = model(tokens[:, :n], cache)
        cache.rollback(length)
        return out

    def replayed(n):
        one_pass(n)  # what is recorded has to have run before
        launch, _ = capture(partial(one_pass, n))
        return lambda memory=(tokens, cache): launch()

    one_pass(length)
    cache = FixedKVCache(cache) if graphs else cache
    return {n: replayed(n) if graphs else partial(one_pass, n) for n in sizes}

# ---- showing -------------------------------------------------------------------------------------

def show(x, form=".2f", factor=1):
    return "-" if math.isnan(x) else format(factor * x, form)

def print_table(title, figures, n_positions):
    """A line for each row. Where the terminal is narrow, the least important columns go."""
    width, rows = min(100, shutil.get_terminal_size((100, 24)).columns), []
    best = max((f for f in figures if f["exact"]), key=lambda f: max(0, f["speed_up"]))
    positions = {str(i + 1): i for i in range(n_positions)}
    for f in figures:
        mark = "*" if f is best else " " if f["exact"] else "!"
        spread = "" if f is figures[0] else f" {show(f['low'])}-{show(f['high'])}"
        at = f["at_position"] + n_positions * [math.nan]
        row = {title: f"{mark} {f['name']}", "tok/s": show(f["tokens_per_second"], ".0f")}
        row |= {"speed-up": show(f["speed_up"]) + spread}
        row |= {name: show(f[name]) for name in ("predicted", "alpha", "tau")}
        row |= {name: show(at[i], ".0f", 100) for name, i in positions.items()}
        row |= {name: show(f[name], ".0f", 100) for name in ("draft", "verify", "rest")}
        rows.append(row)
    wide = {name: max(map(len, (name, *(row[name] for row in rows)))) for name in rows[0]}
    for name in (*list(positions)[::-1], "rest", "verify", "draft", "alpha", "predicted", "tok/s"):
        if sum(wide.values()) + len(wide) - 1 > width:
            del wide[name]
    for row in ({name: name for name in wide}, *rows):
        sides = {name: "<" if name in (title, "speed-up") else ">" for name in wide}
        print(" ".join(f"{row[name]:{sides[name]}{n}}" for name, n in wide.items()).rstrip())
    for f in figures[1:] if n_positions == 0 else ():
        at = ", ".join(show(x, ".0f", 100) for x in f["at_position"])
        words = f"  {f['name']}, % of the first, second, .. guess accepted: {at}"
        print(textwrap.fill(words, width, subsequent_indent="    "))
    print()

def plot(figures):
    """A bar for each row, 20 columns for plain decoding: # measured, | predicted. -> figures"""
    for f in figures:
        measured, end = (min(74, round(20 * max(0, f[name]))) for name in ("speed_up", "predicted"))
        bar = "#" * measured
        if end > 0:
            bar = f"{bar[: end - 1]:{end - 1}}|{bar[end:]}"
        print(f"  {f['name']:9} {show(f['speed_up'])} {show(f['predicted'])}  {bar}")
    return figures

def sweep(target, draft, row, prompts, n, progress, **options):
    """What passes cost, and the speed-up of a row against k and batch size. -> all the figures"""
    length, tree = prompts[0].shape[1] + n // 2, isinstance(row.drafter, TreeDrafter)
    calls = [passes(model, 1, length, range(1, 17)) for model in (target, draft)]
    ours, theirs = [seconds_of_calls(some, 5) for some in calls]
    print("milliseconds of a pass over n tokens (and in passes over one token)\n")
    print("   n          target           draft")
    for i in range(1, 17):
        times = [f"{1000 * t[i]:9.2f} ({t[i] / t[1]:.2f})" for t in (ours, theirs)]
        print(f"  {i:2}" + "".join(times))
    weights = sum(w.nbytes for w in target.parameters())
    block, other = torch.zeros(2, 2**25, device=prompts[0].device)
    speed = 2 * block.nbytes / seconds_of_calls({"copy": lambda: other.copy_(block)}, 5)["copy"]
    words = f"{weights / 1e6:.1f} MB of weights; memory moves {speed / 1e9:.1f} GB/s"
    print(f"\nThe target has {words}. So to read them takes")
    floor = f"{1000 * weights / speed:.2f} ms"
    print(f"{floor}: no pass is faster, unless a cache of the processor holds them.")
    out = {"target": ours, "draft": theirs, "bytes_per_second": speed, "by_batch_size": {}}

    def measure(title, prompts, k_of):
        rows, say = [Row("plain decoding")], partial(progress, title, 0)
        rows += [Row(name, row.drafter, k, row.rule, row.exact) for name, k in k_of.items()]
        figures = compare(target, rows, prompts, n, 0, say, **options)
        progress.clear()
        return plot(figures[1:])

    if not tree:
        print(f"\nspeed-up against k: {row.name.split(' k=')[0]} (# measured, | predicted)\n")
        k_of = {f"k = {k}": k for k in (1, 2, 3, 4, 5, 6, 8)}
        out["by_k"] = measure("against k", prompts, k_of)
        f = out["by_k"][3]
        alpha, c = f["alpha"], f["draft"] * f["seconds_per_pass"] / 4 / ours[1]
        c = theirs[1] / ours[1] if type(row.drafter) is ModelDrafter else c
        if alpha >= 0 and c >= 0:
            k = best_k(alpha, c)
            ideal = expected_speed_up(alpha, k, c)
            print(f"\nLeviathan's best k for alpha {alpha:.2f} and c {c:.2f} is {k}: a speed-up of")
            print(f"{ideal:.2f}, if a pass over k+1 tokens took no longer than one over one token.")
    print(f"\nspeed-up against batch size: {row.name} (# measured, | predicted)\n")
    for B in (1, 2, 4, 8, 16, 32):
        k_of = {f"B = {B}": row.k} | ({} if tree or row.k == "auto" else {"  k=auto": "auto"})
        some = [prompt.expand(B, -1) for prompt in prompts[:2]]
        out["by_batch_size"][B] = measure(f"batch size {B}", some, k_of)
    pays = [str(B) for B, (f, *_) in out["by_batch_size"].items() if f["speed_up"] > 1]
    where = f"batch size{'s' * (len(pays) > 1)} {', '.join(pays)}" if pays else "no batch size"
    print(f"\n{row.name} pays at {where}.")
    return out

def main(argv=None):
    """-> exit status"""
    parser = new_parser("All drafters and rules beside plain decoding, in one table.")
    add = parser.add_argument
    add("--max-new-tokens", type=positive, metavar="N", help="default: 48; on a GPU 200")
    add("--drafter", type=one_of(DRAFTERS), action="append", help=WHO)
    add("--batch", type=positive, default=1, metavar="B", help="rows decoded at once (default: 1)")
    add("--sweep", action="store_true", help="what a pass costs; speed-up against k and batch size")
    add("--json", type=new_file, metavar="FILE", help="write all figures to a file")
    args = parser.parse_args(argv)
    filters, B = {"top_k": args.top_k, "top_p": args.top_p, "seed": args.seed}, args.batch
    need(B == 1 or not args.sweep, "--sweep has batch sizes of its own: leave out --batch")
    text = prompt_of(args)
    target, draft, heads, encoding = load(args, args.drafter or ())
    block = min(target.config.block_size, draft.config.block_size)
    device = target.wte.weight.device
    n = args.max_new_tokens or min(200 if has_graphs(device) else 48, block // 2)
    most = max(1, block - n)  # texts of ours are cut to that
    texts = [encoding.encode_ordinary(text)[-most:] for text in (*PROMPTS, REPEATING)]
    texts = texts if text is None else [encoding.encode_ordinary(text)]
    prompts = [torch.tensor([ids], dtype=torch.int64, device=device) for ids in texts]
    plan = {}  # {title: (temperature, prompts, seconds)}
    for T in (1.0, 0.0) if args.temperature is None else (args.temperature,):
        seconds = 20 if T > 0 else 14
        plan[f"temperature {T:g}" + " (greedy)" * (T == 0)] = T, prompts[:3], seconds
    if text is None and not args.sweep and "ngram" in (args.drafter or DRAFTERS):
        plan["text that repeats"] = T, prompts[3:], 4
    rows, length = contenders(args, draft, heads), n + max(map(len, texts))
    for prompt, (_, drafter, k, rule, _) in itertools.product(prompts, rows):
        specdec.rounds(target, prompt, n, drafter, k, rule, T, **filters)  # or ValueError
    k = max(16, *(k for _, _, k, _, _ in rows if k != "auto"))
    check_memory(target, len(rows) * (32 if args.sweep else B), length, k)
    dtype, rule = str(target.h[0].mlp.c_fc.weight.dtype)[6:], name_of(args.rule or "rejection")
    settings = {"prompts": len(prompts[:3]), "new tokens": n, "batch size": B, "rule": rule}
    settings |= {"device": str(device), "dtype": dtype, "threads": torch.get_num_threads()}
    words = "; ".join(f"{name}: {value}" for name, value in settings.items())
    print(textwrap.fill(words, 100) + "\n")
    out, progress = {"settings": settings | filters, "tables": {}}, Progress()
    prices = []
    if heads and has_graphs(device):
        words = "No heads that stop by confidence: a GPU would wait for the host at each guess."
        print(words + "\n")
    elif heads:  # a straight line from two tokens on, or chance decides; a guess: a tenth of one
        T = seconds_of_calls(passes(target, B, length - n // 2, (1, 2, 9)), 9)
        prices = [T[1], *(T[2] + (T[9] - T[2]) * i / 7 + (i + 1) * T[1] / 10 for i in range(8))]
    later = sum(seconds for *_, seconds in plan.values())
    for title, (T, some, seconds) in plan.items():
        rows = [Row(*row) for row in contenders(args, draft, heads, T == 0, prices)]
        filters["temperature"] = T
        if args.sweep:
            out["sweep"] = sweep(target, draft, rows[1], some, n, progress, **filters)
            break
        if title == "text that repeats":
            rows = [row for row in rows if type(row.drafter) in (type(None), NGramDrafter)]
        later, some = later - seconds, [prompt.expand(B, -1) for prompt in some]
        say = partial(progress, title, later)
        out["tables"][title] = compare(target, rows, some, n, seconds, say, **filters)
        progress.clear()
        print_table(title, out["tables"][title], 0 if args.drafter else 6)
    if not args.sweep:
        print(GLOSSARY)
    if args.json:
        write_whole(args.json, out)
    return 0

if __name__ == "__main__":
    run_script(main)
