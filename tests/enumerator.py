"""Chance replaced by all its outcomes: the exact distribution of anything that draws at random.

For a rule of your own:  exact_distribution(my_rule, [[.7, .3], [.2, .8]], [[.5, .5]])

It sees every draw made by `bernoulli` and `categorical` of specdec, however they were imported, by
torch.bernoulli and torch.multinomial, and by comparing numbers of torch.rand.
"""

import torch

import specdec

HINT = (
    "this draw cannot be replaced by all its outcomes: use bernoulli and categorical of specdec, "
    "torch.bernoulli or torch.multinomial, or compare torch.rand(..) with probabilities"
)


def exact_distribution(rule, target_probs, draft_probs):
    """The exact joint distribution of the k+1 tokens of a round: (V,) * (k+1), float64.

    target_probs (k+1, V), draft_probs (k, V), as tensors or lists: each token's distribution is the
    same whatever came before. The tokens are those that the round emits, then draws of the target's
    own for the rest. So a rule is exact if this equals `joint(target_probs)`, up to 1e-12.
    """
    target_probs = torch.as_tensor(target_probs, dtype=torch.float64)
    k, V = len(target_probs) - 1, target_probs.shape[1]
    draft_probs = torch.as_tensor(draft_probs, dtype=torch.float64).reshape(k, V)
    target_probs = target_probs / target_probs.sum(-1, keepdim=True)  # numbers may be float32
    draft_probs = draft_probs / draft_probs.sum(-1, keepdim=True)
    generator = torch.Generator()

    def one_round():
        guesses = specdec.categorical(draft_probs[None], generator)
        n, token = rule(target_probs[None], draft_probs[None], guesses, generator)
        return (*guesses[0, : n.item()].tolist(), token.item())

    out = torch.zeros((V,) * (k + 1), dtype=torch.float64)
    before = generator.get_state(), torch.get_rng_state()
    for tokens, probability in outcomes(one_round):
        if not all(map(torch.equal, before, (generator.get_state(), torch.get_rng_state()))):
            raise TypeError(HINT)
        out[tokens] += probability * joint(target_probs[len(tokens) :])
    return out


def joint(probs):
    """The joint distribution of independent tokens: (n, V) -> (V,) * n."""
    probs = torch.as_tensor(probs, dtype=torch.float64)
    out = torch.ones((), dtype=torch.float64)
    for one in probs:
        out = out[..., None] * one
    return out


def outcomes(run):
    """Yield (result of run(), probability) for every way that the draws inside can fall.

    run is called once per way. The first call takes the first possible outcome everywhere; each
    later one repeats the choices of the call before it up to the last one that has an untried
    outcome. Impossible outcomes (probability 0) are not tried.
    """
    chance = Chance()
    while True:
        with chance:
            result = run()
        yield result, chance.weight
        while chance.script and chance.script[-1][0] + 1 == chance.script[-1][1]:
            chance.script.pop()
        if not chance.script:
            return
        chance.script[-1][0] += 1


class Chance:
    """What takes the place of each way to draw, in one call of run() after the other.

    script: [outcome taken, number of outcomes] of every choice; depth, how many of them were made
    in this call; weight, the probability of all that; known: of numbers that were compared, the
    interval where they lie.
    """

    current = None

    def __init__(self):
        self.script = []

    def __enter__(self):
        self.depth, self.weight, self.known, self.n_coins = 0, 1.0, {}, 0
        Chance.current, self.before = self, []
        for name, detour in DETOURS.items():
            function = getattr(specdec, name)
            try:  # in the function itself, so it does not matter how somebody imported it
                self.replace(function, "__code__", detour.__code__)
            except (AttributeError, ValueError):  # it is no plain function
                self.replace(specdec, name, detour)
        self.replace(specdec.Coupled, "draw", lambda coupled, probs, t: self.races(probs, t))
        self.replace(torch, "rand", self.rand)
        self.replace(torch, "bernoulli", self.torch_bernoulli)
        self.replace(torch, "multinomial", self.multinomial)
        self.replace(torch.Tensor, "bernoulli", lambda *a, **o: self.torch_bernoulli(*a, **o))
        self.replace(torch.Tensor, "multinomial", lambda *a, **o: self.multinomial(*a, **o))

    def replace(self, owner, name, replacement):
        inherited = isinstance(owner, type) and name not in vars(owner)
        original = getattr(owner, name)
        setattr(owner, name, replacement)
        self.before.append((owner, name, original, inherited))

    def __exit__(self, *_):
        for owner, name, original, inherited in self.before:
            if inherited:
                delattr(owner, name)
            else:
                setattr(owner, name, original)

    def choose(self, probs):
        """An index into probs, the next one that is due."""
        possible = [i for i, p in enumerate(probs) if p > 0]
        assert possible, f"no distribution, but {probs}: a draw has no possible outcome"
        if self.depth == len(self.script):
            self.script.append([0, len(possible)])
        i = possible[self.script[self.depth][0]]
        self.depth += 1
        self.weight *= probs[i]
        return i

    def below(self, which, bound):
        """Whether a number from [0, 1), which is not drawn yet, is below bound. False for NaN."""
        if bound != bound:
            return False
        low, high = self.known.get(which, (0.0, 1.0))
        cut = min(max(bound, low), high)
        yes = self.choose([(cut - low) / (high - low), (high - cut) / (high - low)]) == 0
        self.known[which] = (low, cut) if yes else (cut, high)
        return yes

    def bernoulli(self, probs, generator=None):
        p = probs.clamp(0, 1).nan_to_num(0).flatten().tolist()
        yes = [self.choose([p, 1 - p]) == 0 for p in p]
        return torch.tensor(yes, dtype=torch.bool).view(probs.shape)

    def categorical(self, probs, generator=None):
        rows = probs.reshape(-1, probs.shape[-1]).tolist()
        tokens = [self.choose([p / sum(row) for p in row] if sum(row) > 0 else row) for row in rows]
        return torch.tensor(tokens, dtype=torch.int64).view(probs.shape[:-1])

    def torch_bernoulli(self, probs, *, generator=None):
        if not ((probs >= 0) & (probs <= 1)).all():
            raise RuntimeError("torch.bernoulli: a probability is not between 0 and 1")
        return self.bernoulli(probs).to(probs.dtype)

    def multinomial(self, probs, num_samples, replacement=False, *, generator=None):
        columns, probs = [], probs.clone()
        for _ in range(num_samples):
            columns.append(self.categorical(probs)[..., None])
            if not replacement:
                probs = probs.scatter(-1, columns[-1], 0)
        return torch.cat(columns, -1)

    def rand(self, *shape, **options):
        shape = torch.empty(*options.get("size", shape)).shape
        ids = torch.arange(shape.numel(), dtype=torch.float64) + self.n_coins
        self.n_coins += shape.numel()
        return ids.view(shape).as_subclass(Coins)

    def races(self, probs, position):
        """In place of `Coupled.draw`: (B, n, 2), (B, n) -> (B, n). The winners, at these positions.

        A draw asks the same two random numbers as every other at its position. r being the ratio of
        the two times, token 1 arrives first if r < probs[1] / probs[0], and P(r < x) = x / (1 + x).
        """
        tokens = [
            int(self.below((row, t), p[1] / (p[0] + p[1])))
            for row, (some, positions) in enumerate(zip(probs.tolist(), position.tolist()))
            for p, t in zip(some, positions)
        ]
        return torch.tensor(tokens, dtype=torch.int64).view(position.shape)


def detour_bernoulli(probs, *_, **__):
    import enumerator  # since this runs as a function of specdec.py

    return enumerator.Chance.current.bernoulli(probs)


def detour_categorical(probs, *_, **__):
    import enumerator

    return enumerator.Chance.current.categorical(probs)


DETOURS = {"bernoulli": detour_bernoulli, "categorical": detour_categorical}


class Coins(torch.Tensor):
    """Numbers of torch.rand that are not drawn yet: a comparison tells where they lie.

    An element is the number of its coin. Coins may be moved about, and multiplied once.
    """

    scale = None  # what they were multiplied by
    may = {
        "__get__", "__getitem__", "__len__", "view", "reshape", "flatten", "unsqueeze", "squeeze",
        "unbind", "split", "expand", "to", "double", "float", "size", "dim", "numel", "transpose",
    }  # fmt: skip

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name = func.__name__.strip("_")
        if name == "item" or func.__name__ in ("log_", "clamp_"):
            return args[0]  # the latter: for the table of `Coupled`, see `Chance.races`
        if name in ("lt", "le", "gt", "ge", "mul", "rmul"):
            first = isinstance(args[0], Coins)
            coins, other = args if first else args[::-1]
            if not isinstance(other, Coins):
                other = torch.as_tensor(other, dtype=torch.float64)
                if name in ("lt", "le", "gt", "ge"):
                    return coins.compare(other, less=(name in ("lt", "le")) == first)
                if coins.scale is None:
                    return coins.times(other)
        if func.__name__ not in cls.may or getattr(args[0], "scale", None) is not None:
            raise TypeError(HINT)
        return super().__torch_function__(func, types, args, kwargs or {})

    def times(self, scale):
        ids, scale = torch.broadcast_tensors(self.as_subclass(torch.Tensor), scale)
        product = ids.as_subclass(Coins)
        product.scale = scale
        return product

    def compare(self, bound, less):
        ids, scale = self.as_subclass(torch.Tensor), self.scale
        if scale is not None:  # u * scale < bound, which for scale 0 is 0 < bound
            bound = torch.where(scale > 0, bound / scale, (bound > 0).double())
        ids, bound = torch.broadcast_tensors(ids, bound)
        pairs = zip(ids.flatten().tolist(), bound.flatten().tolist())
        yes = [b == b and Chance.current.below(int(u), b) == less for u, b in pairs]
        return torch.tensor(yes, dtype=torch.bool).view(ids.shape)
