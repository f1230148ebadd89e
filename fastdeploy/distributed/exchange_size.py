"""How much memory the exchange between CPU ranks of one machine takes; known without torch."""

from __future__ import annotations

from dataclasses import dataclass

_MAX_BYTES = 32 << 20  # of one buffer; memory is taken only where rows were written
_ID_BYTES = 8


@dataclass(frozen=True, slots=True)
class ExchangeSize:
    """Rows of `row_bytes` with `k` experts each, between `size` ranks; an item of them takes `item_bytes`."""

    size: int
    row_bytes: int
    k: int
    item_bytes: int

    @property
    def there_bytes(self) -> int:
        """Of a row with its routing."""
        return self.row_bytes + self.k * (_ID_BYTES + self.item_bytes)

    @property
    def back_bytes(self) -> int:
        """Of what all ranks' experts gave for a row."""
        return self.size * self.row_bytes

    @property
    def max_rows(self) -> int:
        """Rows of all ranks together in one exchange."""
        return max(self.size, _MAX_BYTES // max(self.there_bytes, self.back_bytes))

    @property
    def buffer_bytes(self) -> int:
        """Of each of the two buffers."""
        return self.max_rows * max(self.there_bytes, self.back_bytes)

    def touched_bytes(self, n_rows: int) -> int:
        """Memory taken once exchanges had up to `n_rows`: rows go through one buffer, and back through the other."""
        return min(n_rows, self.max_rows) * (self.there_bytes + self.back_bytes)
