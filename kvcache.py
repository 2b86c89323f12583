"""The KV cache: keys and values of what a model has read, so that none is computed twice.

A transformer reads token t through the keys and values of tokens 0..t, and those never change once
written. Plain decoding only ever appends to them. Speculative decoding also takes back: the guesses
that the target rejected must disappear, and each row of a batch loses a different number of them.
Hence the one idea of this file: memory is allocated once, each row has a `length`, and to forget is
to make `length` smaller. What lies beyond it is stale, hidden by the mask, and overwritten later.
"""

import torch

class KVCache:
    """Keys and values of B rows, each filled up to its own length.

    k, v:    (n_layer, B, n_head, max_length, head_dim); slot t of a row belongs to its token t
    length:  (B,) int64, how many tokens each row holds; changed in place, so clone it to keep it

    One pass of a model over T new tokens calls `extend(T)` once, then `write` once per layer.
    """

    @torch.inference_mode(False)  # ordinary tensors wherever it is made, so that anyone may write
    def __init__(self, n_layer, batch_size, n_head, max_length, head_dim, device=None, dtype=None):
        shape = 2, n_layer, batch_size, n_head, max_length, head_dim
        self.kv = torch.zeros(shape, device=device, dtype=dtype)
        self.k, self.v = self.kv
        self.length = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.row = torch.arange(batch_size, device=device)[:, None]
        self.slot = torch.arange(max_length, device=device)

    def extend(self, T):
        """Give every row T more slots, to be filled by `write`. ValueError: there are not so many.

        Returns positions, (B, T), where the T tokens stand, and mask, (B, 1, T, S), to be added to
        attention scores: 0 where token t may look, else -inf; None: anywhere. S: the longest row's.
        """
        lengths = self.length.tolist()
        start, S = max(lengths), max(lengths) + T
        if S > len(self.slot):
            raise ValueError(f"a row of {start} + {T} tokens; the cache holds {len(self.slot)}")
        self.positions = self.length[:, None] + self.slot[:T]
        self.visible = self.kv[..., :S, :].unbind(1)  # per layer: (2, B, n_head, S, head_dim)
        self.new = self.kv[..., start:S, :].unbind(1)  # one slice for all rows, if equally long
        self.length += T
        if min(lengths) < start:
            self.new = None
            # Stale slots have weight 0 in attention, but were one NaN, 0 * NaN is NaN: make them 0.
            stale = self.slot[min(lengths) + T : S] >= self.length[:, None]
            self.kv[..., min(lengths) + T : S, :].masked_fill_(stale[:, None, :, None], 0)
        elif T == 1:
            return self.positions, None
        return self.positions, self.mask(self.slot[:S] <= self.positions[..., None])

    def mask(self, visible):
        """From (B, T, S) bool, whether token t may look at slot s. -> (B, 1, T, S), as above."""
        return torch.where(visible, 0.0, -torch.inf).to(self.kv.dtype)[:, None]

    def write(self, layer, kv):
        """Store the T tokens' keys and values, (2, B, n_head, T, head_dim). -> those of all S."""
        if self.new:
            self.new[layer].copy_(kv)
        else:
            self.visible[layer][:, self.row, :, self.positions] = kv.permute(1, 3, 0, 2, 4)
        return self.visible[layer]

    def rollback(self, length):
        """Forget everything from position `length` on, an int or (B,) int64: nothing is copied.
        ValueError: a length is negative, or longer than what the row holds."""
        length = torch.as_tensor(length, device=self.length.device).expand_as(self.length)
        if ((length < 0) | (length > self.length)).any():
            raise ValueError(f"cannot roll back from {self.length.tolist()} to {length.tolist()}")
        self.length.copy_(length)

# -- not for a first reading: a tree of guesses, and shapes that never change ----------------------

class TreeView:
    """A cache as the nodes of a token tree see it: the text, their ancestors and themselves.

    tree (T, M) bool: the T new tokens are the last of M nodes; is node m an ancestor of t, or t?
    Every node has its own slot; its position is its depth in the tree, so siblings share one.
    """
    def __init__(self, cache, tree):
        self.cache, self.tree, self.write = cache, tree, cache.write
    def extend(self, T):
        self.cache.extend(T)
        M, S = self.tree.shape[1], self.cache.visible[0].shape[-2]
        root = self.cache.length[:, None] - M  # (B, 1), where the tree begins
        node = self.cache.slot[:S] - root  # (B, S), the node in each slot; in the text, negative
        sees = self.tree[:, node.clamp(0, M - 1)].transpose(0, 1)  # (B, T, S)
        visible = (node < 0)[:, None] | sees & (node < M)[:, None]
        return root + self.tree.sum(1) - 1, self.cache.mask(visible)
    def keep(self, path):
        """Of the M nodes keep those on the path, (B, n) int64, as if read one after the other."""
        start, n = self.cache.length[:, None] - self.tree.shape[1], path.shape[1]
        kept = self.cache.kv[:, :, self.cache.row, :, start + path]
        self.cache.kv[:, :, self.cache.row, :, start + self.cache.slot[:n]] = kept
        self.cache.length.copy_(start[:, 0] + n)

class FixedKVCache(KVCache):
    """A cache's memory, used so that all passes over T tokens are the same operations, which a GPU
    can replay: every slot is looked at, most are masked, nothing is checked."""
    def __init__(self, cache):
        vars(self).update(vars(cache))
    def extend(self, T):
        self.positions = self.length[:, None] + self.slot[:T]
        self.visible, self.new = self.kv.unbind(1), None
        self.length += T
        return self.positions, self.mask(self.slot <= self.positions[..., None])
    def rollback(self, length):
        self.length.copy_(length)
