"""Who gets which rows and tokens."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffaccel.errors import OptionError
from diffaccel.parallel.plan import Bands, Group, Ranges, halo, part


@given(
    height=st.integers(1, 200),
    width=st.integers(1, 9),
    levels=st.integers(0, 4),
    ranks=st.integers(1, 9),
)
def test_bands_cover_the_image_at_every_level_and_stay_in_phase(height, width, levels, ranks):
    if height // 2**levels < ranks:
        with pytest.raises(OptionError, match="cannot be shared"):
            Bands(height, width, levels, ranks)
        return
    bands = Bands(height, width, levels, ranks)
    x = torch.zeros(1, 1, height, width)
    for level in range(levels + 1):
        rows = [bands.rows(r, level) for r in range(ranks)]
        assert rows[0][0] == 0 and rows[-1][1] == x.shape[2] == bands.size(level)[0]
        assert all(a[1] == b[0] for a, b in pairwise(rows)) and all(b > a for a, b in rows)
        assert bands.level_of(*x.shape[2:]) in range(level + 1)
        x = torch.nn.functional.conv2d(x, torch.zeros(1, 1, 3, 3), stride=2, padding=1)  # how UNets halve
    assert all(bands.rows(r)[0] % 2**levels == 0 for r in range(ranks))


def test_more_ranks_than_rows_is_an_error_that_says_what_would_do():
    with pytest.raises(OptionError, match=r"15 rows .* 4 ranks: .* multiples of 4 .* 3 ranks is the most.* 16 rows"):
        Bands(15, 8, 2, 4)
    with pytest.raises(OptionError, match="2 image tokens cannot be shared among 3"):
        Ranges(2, 3)


@given(total=st.integers(1, 300), ranks=st.integers(1, 9))
def test_ranges_are_those_of_tensor_split(total, ranks):
    if total >= ranks:
        found = [list(range(*Ranges(total, ranks).range(r))) for r in range(ranks)]
        assert found == [list(x) for x in torch.arange(total).tensor_split(ranks)]


def test_tokens_of_other_ranks_follow_from_their_bands_not_from_proportion():
    bands = Bands(33, 24, 2, 4)
    counts = [(b - a) * 6 for a, b in (bands.rows(r, 2) for r in range(4))]
    assert counts == [12, 12, 12, 18]
    assert all(bands.tokens(r, counts[r]) == counts for r in range(4))
    with pytest.raises(OptionError, match="13 tokens on rank 0"):
        bands.tokens(0, 13)


@given(n=st.integers(1, 10_000))
def test_a_ratio_rounds_up_to_whole_tokens(n):
    assert part(n, 0.3) == -(-3 * n // 10)
    assert part(n, 1.0) == n


def test_groups_of_guidance():
    found = [Group(r, 6, 2) for r in range(6)]
    assert [g.half for g in found] == [0, 0, 0, 1, 1, 1]
    assert [g.index for g in found] == [0, 1, 2, 0, 1, 2]
    assert found[4].ranks() == [3, 4, 5] and found[4].others() == [1, 4]


@pytest.mark.parametrize(
    "kernel, stride, padding, dilation",
    [(3, 1, 1, 1), (3, 2, 1, 1), (3, 2, 0, 1), (5, 1, 2, 1), (3, 1, 2, 2), (7, 2, 3, 1)],
)
def test_the_halo_is_what_a_convolution_sees(kernel, stride, padding, dilation):
    """Rows outside of [8, 16) that change the outputs of that band."""
    x = torch.zeros(1, 1, 32, 1, requires_grad=True)
    weight = torch.ones(1, 1, kernel, 1)
    y = torch.nn.functional.conv2d(x, weight, stride=stride, padding=(padding, 0), dilation=(dilation, 1))
    y[:, :, 8 // stride : 16 // stride].sum().backward()
    touched = x.grad[0, 0, :, 0].nonzero().flatten()
    top, bottom = halo(kernel, stride, padding, dilation)
    assert (8 - touched.min().item(), touched.max().item() - 15) == (top, bottom)
