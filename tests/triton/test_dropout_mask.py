"""Dropout bits: the same as in plain torch, whatever the tiles, and as often set as asked."""

import pytest
import torch
from guarded import Guards, draw_mask

from peftlite.kernels import row_shrink_triton
from peftlite.kernels.dropout_triton import keep_mask_reference, philox_reference, unpack_mask
from peftlite.kernels.row_shrink_triton import row_shrink

SEED = 0x1234_5678_9ABC_DEF


@pytest.mark.parametrize(
    ("rows", "columns", "seed"), [(1, 1, 0), (7, 8, -1), (33, 72, SEED), (75, 100, 1), (9, 257, -(2**63))]
)
def test_bits_equal_the_torch_form(rows, columns, seed):
    mask = draw_mask(torch.tensor([seed]), rows, columns, 0.3)
    assert mask.shape == (rows, -(-columns // 8))
    assert mask.dtype == torch.uint8
    assert torch.equal(unpack_mask(mask, columns), keep_mask_reference(seed, rows, columns, 0.3))


def test_a_mask_depends_on_seed_and_position_alone(monkeypatch):
    seed = torch.tensor([SEED])
    first = draw_mask(seed, 20, 100, 0.5)
    original = row_shrink_triton.config
    monkeypatch.setattr(row_shrink_triton, "config", lambda *a, **k: original(*a, **k) | {"BLOCK_M": 16, "BLOCK_C": 16})
    assert torch.equal(draw_mask(seed, 20, 100, 0.5), first)
    assert torch.equal(draw_mask(seed, 25, 140, 0.5)[:20, :12], first[:, :12])
    assert not torch.equal(draw_mask(seed + 1, 20, 100, 0.5), first)


@pytest.mark.parametrize(
    ("word", "expected"),
    [(0, [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]), (0xFFFFFFFF, [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662])],
)
def test_the_draws_are_philox(word, expected):
    """Known answers of Philox 4x32-7 that its authors publish, for counter and key of zeros and of ones."""
    seed = -1 if word else 0
    assert [w.item() for w in philox_reference(seed, [torch.tensor(word)] * 4)] == expected


@pytest.mark.parametrize("dropout", [0.0, 0.05, 0.5, 0.9])
def test_as_many_are_dropped_as_asked(dropout):
    mask = keep_mask_reference(3, 256, 512, dropout)
    deviation = (dropout * (1 - dropout) / mask.numel()) ** 0.5
    assert abs(1 - mask.double().mean().item() - dropout) <= 5 * deviation + 2.0**-17
    for axis in (0, 1):  # no rows or columns that are dropped together
        shares = mask.double().mean(axis)
        assert (shares - shares.mean()).abs().max() <= 6 * (dropout * (1 - dropout) / mask.shape[axis]) ** 0.5


@pytest.mark.parametrize("columns", [8, 100])
def test_the_shrink_draws_the_same_bits(columns):
    guards, rows, rank = Guards(), 33, 80  # two tiles of ranks, of which one writes the bits
    x, a = torch.randn(rows, columns), guards.copy(torch.randn(rank, columns))
    h, drawn = row_shrink([x], [a], [1.0], by_rank=True, seed=torch.tensor([SEED]), dropout=0.4)
    expected = keep_mask_reference(SEED, rows, columns, 0.4)
    assert torch.equal(unpack_mask(drawn, columns), expected)
    again, same = row_shrink([x], [a], [1.0], by_rank=True, mask=drawn)
    assert same is drawn
    assert torch.equal(again, h)
    assert torch.equal(h, row_shrink([x * expected], [a], [1.0], by_rank=True)[0])


def test_no_rows_no_bits():
    assert draw_mask(torch.tensor([1]), 0, 9, 0.5).shape == (0, 2)
