"""What the tests share: small models in float64, which differ enough that guesses get rejected."""

import importlib.util
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, settings

from model import GPT, BadInput, DraftHeads, GPTConfig

FALSE_ALARM = 1e-6  # the chance that the whole suite raises a false alarm, were all its seeds new:
N_P_VALUES = 18  # it is divided among as many p-values, 16 in test_sampled_law.py and 2 in test_shipped_pair.py

PHASES = set(Phase) - {Phase.explain}  # whose lines of PyTorch's insides help nobody
settings.register_profile("default", deadline=None, derandomize=True, max_examples=50, phases=PHASES)
settings.register_profile("mutants", settings.get_profile("default"), phases=(Phase.generate,))  # a failure will do, however large
settings.register_profile("few", settings.get_profile("default"), max_examples=5)  # the rest is tried elsewhere
settings.load_profile("default")
torch.set_num_threads(1)  # the models here are too small to share


def pytest_addoption(parser):
    parser.addoption("--impl", metavar="FILE", help="test this file in place of specdec.py (see tests/EXERCISES.md)")
    parser.addoption("--device", help="where test_gpu.py runs, cpu for instance (default: a GPU; without one it is skipped)")


def pytest_configure(config):
    """Before any test imports it, `specdec` is the file given by --impl."""
    if file := config.getoption("--impl"):
        if not Path(file).is_file():
            raise pytest.UsageError(f"--impl: there is no file {file}")
        spec = importlib.util.spec_from_file_location("specdec", Path(file).resolve())
        sys.modules["specdec"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["specdec"])


def pytest_runtestloop(session):
    """Two processes share the whole suite: this one begins with the first test, a second pytest with the last.

    A test is run by whichever of them first makes the file that has its number. The second writes its reports into it.
    """
    items, config, folder = session.items, session.config, os.environ.pop("SPECDEC_SHARED_TESTS", None)
    words = config.invocation_params.args
    whole = "PYTEST_ADDOPTS" not in os.environ and all(w.startswith("--durations=") or not w.strip("-qv") for w in words)
    if session.testsfailed or not (folder or whole):
        return None  # with any other option, or a file that cannot be imported: pytest's own loop

    def share(folder, order, done=lambda file: None):
        """Run the tests in this order, up to the first that the other process has. -> how many"""
        for n, i in enumerate(order):
            try:
                with open(f"{folder}/{i}", "xb") as file:
                    config.hook.pytest_runtest_protocol(item=items[i], nextitem=items[order[n + 1]] if n + 1 < len(order) else None)
                    done(file)
            except FileExistsError:
                return n
        return len(order)

    if folder:

        class Reports(list):
            def pytest_runtest_logreport(self, report):
                self.append(report)

        config.pluginmanager.register(reports := Reports())
        share(folder, range(len(items))[::-1], lambda file: (pickle.dump(list(reports), file), reports.clear()))
        return True
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"SPECDEC_SHARED_TESTS": folder}
        second = subprocess.Popen([sys.executable, "-m", "pytest", *words], env=env, stdout=subprocess.DEVNULL)
        try:
            n = share(folder, range(len(items)))
            second.wait()
            for i in range(n, len(items)):
                if not (reports := Path(folder, str(i)).read_bytes()):
                    pytest.exit(f"the second process ended, with status {second.returncode}, in {items[i].nodeid}", 1)
                for report in pickle.loads(reports):
                    config.hook.pytest_runtest_logreport(report=report)
        finally:
            second.kill()
            second.wait()
    return True


def pytest_ignore_collect(collection_path, config):
    """Under --impl, leave out what tests the files of this project and not the implementation of a student.

    Nor need that be fit for a CUDA graph, in which nothing may look at a result, as a loop over rows does.
    """
    names = ("command_line", "exercises", "mutants", "training", "bench", "shipped_pair", "reading", "graphs", "gpu")
    return True if config.getoption("--impl") and collection_path.stem[5:] in names else None


def make_gpt(seed, vocab_size=7, block_size=48, n_layer=2, n_head=2, n_embd=8, sharpness=6.0):
    """A random GPT in float64. Untrained models are all nearly uniform, so they agree: `sharpness` scales the logits apart."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPT(GPTConfig(vocab_size, block_size, n_layer, n_head, n_embd)).double().requires_grad_(False)
        for name, weight in model.named_parameters():
            if "ln_" not in name:
                weight.normal_(std=0.4)
        model.ln_f.weight.mul_(sharpness / n_embd**0.5)
    return model.eval()


def make_heads(seed, vocab_size, n_embd, markov=True, n_state=16):
    """Random draft heads in float64 for the targets of make_gpt (of one layer: n_state=8)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        heads = DraftHeads(vocab_size, n_state, n_embd, markov).double().requires_grad_(False)
        for weight in heads.parameters():
            weight.normal_()
    return heads


def fresh_states(target, tokens):
    """What `target_states` should be in whole texts (B, T), from a pass without a cache: (B, T, n_state)."""
    values, D = [], target.config.n_embd
    seen = {1: (), 2: (1,), 3: (1, 2), 4: (2,), 6: (2, 4), 7: (3, 6)}[target.config.n_layer]
    hooks = [target.h[i].attn.c_attn.register_forward_hook(lambda module, x, qkv: values.append(qkv[..., 2 * D :])) for i in seen]
    _, hidden = target(tokens)
    for hook in hooks:
        hook.remove()
    return torch.cat([hidden] + values, -1)


def heads_logits(heads, target, text, guesses=()):
    """What heads say after a text, and after each guess behind it, every pass from an empty cache: (1 + len(guesses), V)."""
    states, logits = heads.c_state(F.pad(fresh_states(target, torch.tensor([text])), (0, 0, 1, -1))), []
    for i in range(len(guesses) + 1):
        tokens = torch.tensor([[*text, *guesses[:i]]])
        state = heads(states, tokens, heads.new_cache(1, tokens.shape[1]))[:, -1:]
        states = torch.cat((states, state), 1)
        logits.append(heads.lm_head(state)[0, 0])
    return torch.stack(logits)


def fresh_logits(model, tokens):
    """What the model says about a whole text, read at once without a cache: (T,) -> (T, V)."""
    return model(tokens[None])[0][0]


@pytest.fixture(scope="session")
def target():
    return make_gpt(1)


@pytest.fixture
def refusal(capsys):
    """refusal(main, words) -> the line that a script says of bad input. It says, and does, nothing else."""

    def refusal(main, words):
        with pytest.raises((BadInput, OSError, UnicodeError, SystemExit)) as error:
            main([*map(str, words)])
        out, err = capsys.readouterr()
        assert out == ""
        if error.type is SystemExit:  # argparse's own
            assert error.value.code == 2 and err.count("\n") == 1
            return err
        assert err == ""  # `run_script` makes a line of it, and status 2: tested from a shell
        return str(error.value)

    return refusal


@pytest.fixture
def ours(pytestconfig):
    """For tests of how this project does something. There are other right ways: --impl skips them."""
    if pytestconfig.getoption("--impl"):
        pytest.skip("a test of how specdec.py does it; other ways are as good")


def wrong_rule(target_probs, draft_probs, draft_tokens, generator):
    """mutants.py B3: the correction is drawn from the target's distribution, not from the residual.

    A small error, which tests must see.
    """
    import specdec

    n_accepted, _ = specdec.verify(target_probs, draft_probs, draft_tokens, generator)
    return n_accepted, specdec.categorical(target_probs[torch.arange(len(n_accepted)), n_accepted], generator)
