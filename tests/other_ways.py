"""Part 1 of specdec.py in other right ways: loops, torch's own chance, float64, two tokens re-read.

No module: test_exercises.py puts each of these functions in the place of the one of its name. The
lines of EXERCISES.md must pass, for they grade what comes out and not how.
"""


def to_probs(logits, temperature=1.0, top_k=None, top_p=None):
    x = logits.double()
    rank = x.argsort(dim=-1, descending=True).argsort(dim=-1)
    if temperature == 0:
        return (rank == 0).to(x.dtype)
    x = (x - x.max(dim=-1, keepdim=True).values) / temperature
    if top_k is not None:
        x = x.masked_fill(rank >= top_k, float("-inf"))
    probs = torch.softmax(x, -1)
    if top_p is not None:
        best, order = torch.sort(probs, dim=-1, descending=True)
        drop = torch.zeros_like(best, dtype=torch.bool)
        drop[..., 1:] = best.cumsum(-1)[..., :-1] >= top_p
        probs = probs.masked_fill(drop.gather(-1, order.argsort(-1)), 0)
    return probs / probs.sum(-1, keepdim=True)


def bernoulli(probs, generator=None):
    return torch.bernoulli(probs.double(), generator=generator).bool()


def categorical(probs, generator=None):
    cdf = probs.double().cumsum(-1)
    u = torch.rand((*probs.shape[:-1], 1), generator=generator, dtype=torch.float64)
    return (u * cdf[..., -1:] >= cdf).sum(-1)


class Rows:
    def newest(self, n=1):
        out = []
        for text, length in zip(self.tokens.tolist(), self.length.tolist()):
            out.append([0] * (n - length) + text[max(0, length - n) : length])
        return torch.tensor(out)

    def append(self, tokens, n):
        eos, added = [] if self.eos is None else self.eos.tolist(), []
        texts, length, end = self.tokens.tolist(), self.length.tolist(), self.end.tolist()
        for b, (new, m) in enumerate(zip(tokens.tolist(), n.tolist())):
            new = new[: min(m, end[b] - length[b])]
            stops = [i for i, token in enumerate(new) if token in eos]
            if stops:
                new = new[: stops[0] + 1]
                end[b] = length[b] + len(new)
            texts[b][length[b] : length[b] + len(new)] = new
            length[b] += len(new)
            added.append(len(new))
        self.tokens, self.length, self.end = map(torch.tensor, (texts, length, end))
        return torch.tensor(added)


def read_prompts(model, cache, rows):
    hidden = [model(rows.tokens[:, :0], cache)[1]]
    for t in range(max(rows.length.tolist()) - 1):
        hidden.append(model(rows.tokens[:, t : t + 1], cache)[1])
    for b, length in enumerate(rows.length.tolist()):
        cache.length[b] = length - 1
    return torch.cat(hidden, 1)


def plain_rounds(target, rows, probs_of, generator):
    B, L = rows.tokens.shape
    caches = [target.new_cache(1, L) for _ in range(B)]  # each row has one of its own
    for row, cache, length in zip(rows.tokens, caches, rows.length.tolist()):
        target(row[None, : length - 1], cache)
    while any(rows.room().tolist()):
        probs = []
        for row, cache, length in zip(rows.tokens, caches, rows.length.tolist()):
            cache.rollback(length - 1)  # of a row that has ended the last is read once more
            probs.append(probs_of(target(row[None, length - 1 : length], cache)[0]))
        token = torch.cat([categorical(p, generator) for p in probs])
        n_new = rows.append(token, torch.ones(B, dtype=torch.int64))
        probs, none = torch.cat(probs), torch.zeros(B, dtype=torch.int64)
        yield Round(token[:, :0], probs[:, :0], probs, none, token, n_new)


def verify(target_probs, draft_probs, draft_tokens, generator=None):
    B, k = draft_tokens.shape
    n_accepted, next_token = [], []
    for b in range(B):
        n, left = 0, target_probs[b, k]  # the bonus, unless a guess is rejected
        while n < k:
            x = draft_tokens[b, n]
            p, q = target_probs[b, n, x], draft_probs[b, n, x].item()
            if q > 0 and bernoulli((p / q).clamp(max=1), generator):
                n += 1
                continue
            left = (target_probs[b, n] - draft_probs[b, n]).clamp(min=0)
            left = left / left.sum() if left.sum() > 0 else target_probs[b, n]
            break
        n_accepted.append(n)
        next_token.append(categorical(left, generator).item())
    return torch.tensor(n_accepted), torch.tensor(next_token)


class ModelDrafter:
    def propose(self, rows, k, probs_of, generator):
        tokens, guesses, all_probs = self.unread(rows), [], []
        for _ in range(k):
            probs = probs_of(self.model(tokens, self.cache)[0][:, -1])
            guesses.append(torch.stack([categorical(p, generator) for p in probs]))
            all_probs.append(probs)
            tokens = guesses[-1][:, None]
        return torch.stack(guesses, 1), torch.stack(all_probs, 1)

    def unread(self, rows):
        lacks = max((rows.length - self.cache.length).tolist())
        n = max(lacks, min(2, *rows.length.tolist()))  # two, where there are two, needed or not
        self.cache.rollback(torch.tensor([max(0, length - n) for length in rows.length.tolist()]))
        return rows.newest(n)

    def commit(self, rows, hidden):
        pairs = zip(rows.length.tolist(), self.cache.length.tolist())
        self.cache.rollback(torch.tensor([min(text - 1, read) for text, read in pairs]))


def speculative_round(target, cache, drafter, rows, k, rule, probs_of, generator):
    guesses, draft_probs = drafter.propose(rows, k, probs_of, generator)
    logits, hidden = target(torch.cat([rows.newest(), guesses], dim=1), cache)
    target_probs = probs_of(logits)
    n, token = rule(target_probs, draft_probs, guesses, generator)
    lists = [g[:m] + [t] + [-1] * (len(g) - m) for g, m, t in zip(*(
        x.tolist() for x in (guesses, n, token)))]  # fmt: skip
    tokens = torch.tensor(lists)
    n_new = rows.append(tokens, n + 1)
    drafter.commit(rows, hidden)
    for b in range(len(n)):
        cache.length[b] = rows.length[b] - 1
    return Round(guesses, draft_probs, target_probs, n, tokens, n_new)


def speculative_rounds(target, drafter, rows, k, rule, probs_of, generator):
    cache = target.new_cache(len(rows.tokens), rows.tokens.shape[1])
    hidden = read_prompts(target, cache, rows)
    drafter.start(target, cache, rows, hidden)
    step = drafter.own_round if hasattr(drafter, "own_round") else speculative_round
    while True:
        room = max(rows.room().tolist())
        if room == 0:
            return
        yield step(target, cache, drafter, rows, min(k, room), rule, probs_of, generator)


def expected_tokens(alpha, k):
    return k + 1 if alpha == 1 else (1 - alpha ** (k + 1)) / (1 - alpha)
