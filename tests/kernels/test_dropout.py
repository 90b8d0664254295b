import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftlite.kernels import dropout, native_library
from peftlite.kernels.dropout import draw_keep_mask, drop_threshold, keep_probability, kept


@pytest.mark.parametrize("probability", [0.05, 0.3, 0.5, 0.95])
def test_the_mask_keeps_the_share_that_was_asked_for(probability):
    x = torch.empty(1003, 997)
    torch.manual_seed(0)
    mask, keep = draw_keep_mask(x, probability)
    assert (mask.dtype, mask.shape) == (torch.uint8, (-(-x.numel() // 8),))
    assert abs(keep - (1 - probability)) <= 2**-17
    survives = kept(mask, x.shape, torch.float64)
    assert survives.shape == x.shape
    assert ((survives == 0) | (survives == 1)).all()
    # Six standard deviations of the mean of so many independent draws, of all and of each of the eight that share a byte.
    deviation = 6 * (keep * (1 - keep) / x.numel()) ** 0.5
    assert abs(survives.mean() - keep) < deviation
    lanes = survives.flatten()[: x.numel() // 8 * 8].view(-1, 8)
    assert ((lanes.mean(0) - keep).abs() < 3 * deviation).all()
    assert ((lanes.T.cov() / (keep * (1 - keep)) - torch.eye(8)).abs() < 12 / len(lanes) ** 0.5).all()
    torch.manual_seed(0)
    assert torch.equal(draw_keep_mask(x, probability)[0], mask)


def test_probabilities_are_rounded_to_what_is_drawn():
    assert drop_threshold(0.0) == 0
    assert keep_probability(0.0) == 1.0
    assert keep_probability(0.5) == 0.5
    assert keep_probability(0.05) == 1 - 3277 / 65536
    assert keep_probability(1 - 1e-9) == 1 / 65536
    for wrong in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\)"):
            drop_threshold(wrong)


@pytest.mark.parametrize(("probability", "drops"), [(0.0, 0), (1e-6, 0), (2.0**-16, 1), (1 - 1e-9, 2**16 - 1)])
def test_dropout_is_a_multiple_of_a_power_of_two(probability, drops):
    mask, keep = draw_keep_mask(torch.empty(3), probability)
    assert keep == 1 - drops / 2**16
    assert (mask is None) == (drops == 0)
    assert draw_keep_mask(torch.empty(0, 3), 0.5)[0].shape == (0,)


@given(st.lists(st.integers(0, 255), max_size=9), st.integers(0, 7), st.sampled_from([torch.float64, torch.bfloat16]))
def test_bits_are_read_in_their_order(bytes_, unused, dtype):
    mask = torch.tensor(bytes_, dtype=torch.uint8)
    count = max(0, 8 * len(bytes_) - unused)
    expected = [byte >> bit & 1 for byte in bytes_ for bit in range(8)][:count]
    numbers = kept(mask, (1, count), dtype)
    assert numbers.dtype == dtype
    assert numbers.tolist() == [expected]


@given(st.integers(0, 70), st.integers(0, 99))
def test_bits_are_the_decisions(count, seed):
    torch.manual_seed(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_library, "library", lambda: None)
        mask, _ = draw_keep_mask(torch.empty(count), 0.25)
    torch.manual_seed(seed)
    numbers = torch.empty(2 * len(mask), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    assert torch.equal(kept(mask, (count,), torch.float32), (numbers >= -(2**14)).float()[:count])


def test_masks_drawn_one_after_the_other_are_independent():
    torch.manual_seed(0)
    masks = torch.stack([kept(draw_keep_mask(torch.empty(9999), 0.5)[0], (9999,), torch.float64) for _ in range(20)])
    assert ((4 * masks.cov() - torch.eye(20)).abs() < 6 / 9999**0.5).all()


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # inductor's own imports
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_code_draws_the_same_masks(backend):
    def draw_twice(x):
        return [kept(draw_keep_mask(x, 0.3)[0], x.shape, x.dtype) for _ in range(2)]

    compiled = torch.compile(draw_twice, fullgraph=True, backend=backend)
    for rows in (13, 37):
        torch.manual_seed(rows)
        expected = draw_twice(torch.empty(rows, 41))
        torch.manual_seed(rows)
        actual = compiled(torch.empty(rows, 41))
        assert not torch.equal(*actual)
        for mine, theirs in zip(actual, expected, strict=True):
            assert torch.equal(mine, theirs)


def test_opcheck():
    for shape in ((13, 5), (0, 5)):
        torch.library.opcheck(dropout._draw_op, (torch.empty(shape), 9999))
