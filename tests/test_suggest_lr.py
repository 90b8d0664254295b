"""suggest_lr: ten times full fine-tuning's, fifteen in short runs."""

import pytest

from peftlite import suggest_lr


def test_ten_and_fifteen_times() -> None:
    assert suggest_lr(1.0) == suggest_lr(1.0, steps=101) == 10
    assert suggest_lr(1.0, steps=100) == suggest_lr(1.0, steps=1) == 15


@pytest.mark.parametrize(("lr", "steps", "match"), [(0.0, 1, "full_lr must be positive"), (1.0, 0, "steps must be at least 1")])
def test_out_of_range(lr: float, steps: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        suggest_lr(lr, steps=steps)
