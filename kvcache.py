"""The KV cache: the keys and values of every token that a model has read, so that none is computed twice.

A transformer reads token t through the keys and values of tokens 0..t, and those never change once written. Plain decoding
only ever appends to them. Speculative decoding also takes back: the guesses that the target rejected must disappear, and a
batch loses a different number of them in each row. Hence the one idea of this file: memory is allocated once, each row has a
`length`, and to forget is to make `length` smaller. What lies beyond it is stale, hidden by the mask, and overwritten later.
"""

import torch


class KVCache:
    """Keys and values of B rows, each filled up to its own length.

    k, v:    (n_layer, B, n_head, max_length, head_dim); slot t of row b belongs to the token at position t
    length:  (B,) int64, the number of tokens that each row holds

    One pass of a model over T new tokens calls `extend(T)` once, then `write` once per layer.
    """

    def __init__(self, n_layer, batch_size, n_head, max_length, head_dim, device=None, dtype=None):
        self.k = torch.zeros(n_layer, batch_size, n_head, max_length, head_dim, device=device, dtype=dtype)
        self.v = torch.zeros_like(self.k)
        self.length = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self._slot = torch.arange(max_length, device=device)
        self._row = torch.arange(batch_size, device=device)[:, None]

    def extend(self, T):
        """Give every row T more slots, to be filled by `write`.

        Returns positions (B, T), where the T tokens of each row stand, and mask, (B or 1, 1, T, S) bool: True where a token
        may look. S covers the longest row. The mask is aligned at the bottom right: the last of the T tokens sees its whole
        row. It is None when everything may be seen. ValueError: a row would outgrow max_length.
        """
        shortest, longest = self.length.min().item(), self.length.max().item()
        if longest + T > len(self._slot):
            raise ValueError(f"the cache holds {len(self._slot)} tokens a row; {longest} + {T} do not fit")
        self._level = shortest == longest  # then one slice serves all rows, twice as fast as an index per row
        self._end = longest + T
        self._positions = self.length[:, None] + self._slot[:T]
        self.length = self.length + T
        if self._level:
            mask = None if T == 1 else self._slot[: self._end] <= self._positions[:1, None, :, None]
        else:
            mask = self._slot[: self._end] <= self._positions[:, None, :, None]
            # Hidden slots get weight 0, but 0 * NaN is NaN: whatever a shorter row has beyond its end becomes 0 as well.
            stale = self._slot[shortest + T : self._end] >= self.length[:, None]
            for buffer in (self.k, self.v):
                buffer[:, :, :, shortest + T : self._end].masked_fill_(stale[None, :, None, :, None], 0)
        return self._positions, mask

    def write(self, layer, k, v):
        """Store k and v, (B, n_head, T, head_dim), in the slots given by `extend`. Returns all up to S: (B, n_head, S, head_dim)."""
        for buffer, new in ((self.k[layer], k), (self.v[layer], v)):
            if self._level:
                buffer[:, :, self._end - new.shape[2] : self._end] = new
            else:
                buffer[self._row, :, self._positions] = new.transpose(1, 2)
        return self.k[layer, :, :, : self._end], self.v[layer, :, :, : self._end]

    def rollback(self, length):
        """Forget everything from position `length` on: an int for all rows, or (B,) int64. Nothing is copied.

        ValueError: a length is negative, or longer than what the row holds.
        """
        length = torch.as_tensor(length, dtype=torch.int64, device=self.length.device).expand_as(self.length)
        if ((length < 0) | (length > self.length)).any():
            raise ValueError(f"cannot roll back from {self.length.tolist()} to {length.tolist()} tokens")
        self.length = length.clone()
