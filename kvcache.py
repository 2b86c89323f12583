"""The KV cache: the keys and values of every token that a model has read, so that none is computed twice.

A transformer reads token t through the keys and values of tokens 0..t, and those never change once written. Plain decoding
only ever appends to them. Speculative decoding also takes back: the guesses that the target rejected must disappear, and a
batch loses a different number of them in each row. Hence the one idea of this file: memory is allocated once, each row has a
`length`, and to forget is to make `length` smaller. What lies beyond it is stale, hidden by the mask, and overwritten later.
A tree of guesses is read in one pass as well: then the mask says who is whose ancestor, and `keep` closes the gaps.
"""

import torch
import torch.nn.functional as F


class KVCache:
    """Keys and values of B rows, each filled up to its own length.

    k, v:    (n_layer, B, n_head, max_length, head_dim); slot t of row b belongs to the token at position t, but for the
             nodes of a tree, until `keep` has put those on the accepted path in order
    length:  (B,) int64, the number of tokens that each row holds; changed in place, so clone it to remember it
    fixed:   every pass looks at all max_length slots, most of them masked, and the host never asks for a length: then all passes
             over T tokens are the same sequence of operations, which a GPU can replay (`capture` in model.py)

    One pass of a model over T new tokens calls `extend(T)` once, then `write` once per layer.
    """

    @torch.inference_mode(False)  # made inside it or not, the buffers are ordinary tensors that anyone may write to
    def __init__(self, n_layer, batch_size, n_head, max_length, head_dim, device=None, dtype=None, fixed=False):
        self._kv = torch.zeros(2, n_layer, batch_size, n_head, max_length, head_dim, device=device, dtype=dtype)
        self.k, self.v = self._kv
        self.fixed = fixed
        self.length = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self._slot = torch.arange(max_length, device=device)
        self._row = torch.arange(batch_size, device=device)[:, None]
        # Row t is what position t may look at, as it is added to attention scores: 0 up to t, then -inf.
        self._causal = torch.full((max_length, max_length), -torch.inf, device=device, dtype=dtype).triu_(1)

    def extend(self, T, tree=None):
        """Give every row T more slots, to be filled by `write`.

        Returns positions, (T,) or (B, T), where the T tokens stand, and mask, (T, S) or (B, 1, T, S), to be added to the
        attention scores, S being the end of the longest row. Bottom-right aligned: the last of the T tokens sees its whole
        row. A mask of None: everything may be seen. ValueError: a row would outgrow max_length.

        tree (T, M) bool, if the T tokens are the last of a tree of M, of which M - T are in the cache already: [t, m], whether
        m is an ancestor of t, or t itself. Its position follows from the number of those, so siblings share one.
        """
        lengths = [0, max(0, len(self._slot) - T)] if self.fixed else self.length.tolist()
        shortest, longest = min(lengths), max(lengths)
        S = longest + T
        if S > len(self._slot):
            raise ValueError(f"the cache holds {len(self._slot)} tokens a row; {longest} + {T} do not fit")
        self._visible = self._kv[..., :S, :].unbind(1)  # of each layer: (2, B, n_head, S, head_dim)
        if shortest == longest and not self.fixed:  # then one slice serves all rows, faster than an index per row
            self._new = self._kv[..., longest:S, :].unbind(1)
        else:
            self._new, self._slots = None, self.length[:, None] + self._slot[:T]
            if not self.fixed:
                # Hidden slots get weight 0, but 0 * NaN is NaN: whatever a shorter row has beyond its end becomes 0 as well. (Of
                # fixed shapes that would be the whole cache in every pass; there what is hidden has to be finite, and is: zeros,
                # or keys and values of old.)
                stale = self._slot[shortest + T : S] >= self.length[:, None] + T
                self._kv[..., shortest + T : S, :].masked_fill_(stale[:, None, :, None], 0)
        if tree is None and self._new:
            positions = self._slot[longest:S]
            mask = None if T == 1 else self._causal[longest:S, :S]
        elif tree is None:
            positions = self._slots
            mask = self._causal[positions, :S][:, None]
        else:
            M = tree.shape[1]
            root = self.length[:, None] + T - M  # where the tree begins in each row: all before it is visible, nothing behind it
            positions = root + tree.sum(1) - 1
            visible = F.pad(F.pad(tree, (1, 0), value=True), (0, 1), value=False)
            mask = self._causal.new_zeros(visible.shape).masked_fill_(~visible, -torch.inf)
            mask = mask[:, (self._slot[:S] - root + 1).clamp(0, M + 1)].transpose(0, 1)[:, None]
        self.length += T
        return positions, mask

    def write(self, layer, kv):
        """Store keys and values, (2, B, n_head, T, head_dim), where `extend` says. -> all of them, (2, B, n_head, S, head_dim)."""
        if self._new:
            self._new[layer].copy_(kv)
        else:
            self._visible[layer][:, self._row, :, self._slots] = kv.permute(1, 3, 0, 2, 4)
        return self._visible[layer]

    def keep(self, start, path):
        """Of what each row holds from slot `start` (B,) on, keep only the tokens start + path, (B, n) int64, in this order."""
        n = path.shape[1]
        for row, (first, kept) in enumerate(zip(start.tolist(), path)):  # on a CPU half the time of one assignment for all rows
            self._kv[:, :, row, :, first : first + n] = self._kv[:, :, row, :, first:].index_select(-2, kept)
        self.length.copy_(start + n)

    def rollback(self, length):
        """Forget everything from position `length` on: an int for all rows, or (B,) int64. Nothing is copied.

        ValueError: a length is negative, or longer than what the row holds. (Of fixed shapes that is not asked.)
        """
        length = torch.as_tensor(length, dtype=torch.int64, device=self.length.device).expand_as(self.length)
        if not self.fixed and not all(0 <= new <= old for new, old in zip(length.tolist(), self.length.tolist())):
            raise ValueError(f"cannot roll back from {self.length.tolist()} to {length.tolist()} tokens")
        self.length.copy_(length)
