"""What the tests share: small models in float64, whose laws differ enough that guesses get rejected."""

import pytest
import torch
from hypothesis import settings

from model import GPT, GPTConfig

settings.register_profile("default", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("default")
torch.set_num_threads(1)  # the models here are too small to share


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


def fresh_logits(model, tokens):
    """What the model says about a whole text, read at once without a cache: (T,) -> (T, V)."""
    return model(tokens[None])[0][0]


@pytest.fixture(scope="session")
def target():
    return make_gpt(1)


@pytest.fixture(scope="session")
def draft():
    return make_gpt(2, n_layer=1, n_embd=4)
