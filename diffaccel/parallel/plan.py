"""Which part of one image belongs to which rank: bands of rows of a UNet, ranges of tokens of a transformer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from ..errors import OptionError


class Split(Protocol):
    """How the image is shared among `ranks`."""

    ranks: int

    def tokens(self, rank: int, own: int) -> list[int]:
        """Image tokens of every rank in a layer where `rank` has at most `own` tokens, image and text together."""


@dataclass(frozen=True)
class Bands:
    """Bands of rows. Every inner border is a multiple of 2^levels, so that strided convolutions stay in phase.

    Args:
        height, width: of the latent, any size; the last band takes what is over.
        levels: how often the network halves the image.
        ranks: number of bands.

    Raises:
        OptionError: if there are more ranks than multiples of 2^levels rows.
    """

    height: int
    width: int
    levels: int
    ranks: int

    def __post_init__(self) -> None:
        align = 2**self.levels
        units = self.height // align
        if units < self.ranks:
            raise OptionError(
                f"a latent of {self.height} rows cannot be shared among {self.ranks} ranks: bands are multiples of "
                f"{align} rows here, so {max(units, 1)} ranks is the most, and {self.ranks} ranks need "
                f"{self.ranks * align} rows"
            )

    def rows(self, rank: int, level: int = 0) -> tuple[int, int]:
        """First row, and one past the last row, of a rank's band, at full size or after `level` halvings."""
        return self._border(rank, level), self._border(rank + 1, level)

    def size(self, level: int) -> tuple[int, int]:
        """Height and width of the whole image after `level` halvings, which round up."""
        return _halved(self.height, level), _halved(self.width, level)

    def level_of(self, height: int, width: int) -> int | None:
        """The level at which the whole image has this size; None if there is none."""
        return next((k for k in range(self.levels + 1) if self.size(k) == (height, width)), None)

    def tokens(self, rank: int, own: int) -> list[int]:
        for level in range(self.levels + 1):
            counts = [(b - a) * self.size(level)[1] for a, b in (self.rows(r, level) for r in range(self.ranks))]
            if counts[rank] == own:
                return counts
        raise OptionError(
            f"a self-attention layer sees {own} tokens on rank {rank}, which is its band of "
            f"{self.height} x {self.width} at none of {self.levels + 1} sizes; this model cannot be shared by rows"
        )

    def _border(self, rank: int, level: int) -> int:
        if rank == self.ranks:
            return _halved(self.height, level)
        align = 2**self.levels
        return align * (self.height // align * rank // self.ranks) >> level


@dataclass(frozen=True)
class Ranges:
    """Ranges of the image's tokens, as even as they can be; text tokens are computed by every rank.

    Args:
        total: image tokens.
        ranks: number of ranges.

    Raises:
        OptionError: if there are more ranks than tokens.
    """

    total: int
    ranks: int

    def __post_init__(self) -> None:
        if self.total < self.ranks:
            raise OptionError(f"{self.total} image tokens cannot be shared among {self.ranks} ranks")

    def range(self, rank: int) -> tuple[int, int]:
        """First token, and one past the last, of a rank."""
        size, more = divmod(self.total, self.ranks)
        begin = rank * size + min(rank, more)
        return begin, begin + size + (rank < more)

    def tokens(self, rank: int, own: int) -> list[int]:
        return [b - a for a, b in (self.range(r) for r in range(self.ranks))]


@dataclass(frozen=True)
class Group:
    """The ranks that share one image, and those that do the same part of the other half of the batch.

    Args:
        rank: in the world.
        world: its size.
        halves: 2 if the batch (the two halves of guidance) is split over two groups of ranks, else 1.
    """

    rank: int
    world: int
    halves: int = 1

    @property
    def patches(self) -> int:
        """Ranks of one image."""
        return self.world // self.halves

    @property
    def index(self) -> int:
        """Which patch this rank has."""
        return self.rank % self.patches

    @property
    def half(self) -> int:
        """Which half of the batch this rank has."""
        return self.rank // self.patches

    def ranks(self) -> list[int]:
        """Ranks in the world that have the patches of this rank's image, in order."""
        return [self.half * self.patches + i for i in range(self.patches)]

    def others(self) -> list[int]:
        """For each half, the rank that has the same patch of it."""
        return [h * self.patches + self.index for h in range(self.halves)]


def part(tokens: int, ratio: float) -> int:
    """Tokens that a neighbour is sent of `tokens`, by PCPP's ratio in (0, 1]."""
    return min(tokens, math.ceil(tokens * ratio - 1e-9))  # 0.1 * 30 is a little more than 3


def halo(kernel: int, stride: int, padding: int, dilation: int) -> tuple[int, int]:
    """Rows that a convolution needs from the band above and from the band below."""
    return padding, max(0, dilation * (kernel - 1) + 1 - stride - padding)


def _halved(size: int, times: int) -> int:
    return -(-size >> times)
