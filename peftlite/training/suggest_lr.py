"""A learning rate for adapters, from one that is known to be good for full fine-tuning."""

SHORT_RUN = 100  # steps


def suggest_lr(full_lr: float, *, steps: int | None = None) -> float:
    """Suggest ``10 full_lr`` for LoRA, or ``15 full_lr`` for a run of no more than about 100 steps.

    `full_lr` is a good learning rate for full fine-tuning with Adam. Thinking Machines (Schulman et al. 2025, "LoRA
    Without Regret") found the best rate of LoRA to be about ten times that of full fine-tuning, a little more in short
    runs, and nearly the same for every rank as long as the scale is ``alpha / rank`` with one `alpha` for all. They
    used ``alpha = 32``; with another one the best rate shifts. In the same experiments LoRA kept up with full fine-tuning
    where all linear layers were adapted (``targets="all-linear"``), the feed-forward ones above all, and not in the
    attention alone; it bore large batches less well.

    It is a place to begin a search, and holds for LoRA and its near relatives. For others see their pages: TT-LoRA's and
    (IA)³'s authors give rates of their own, and PaCA trains weights of the base at nearly full fine-tuning's.

    Args:
        full_lr: learning rate for full fine-tuning.
        steps: number of optimizer steps of the run, where known.

    Raises:
        ValueError: if `full_lr` is not positive or `steps` is less than 1.

    Example:
        >>> suggest_lr(1e-4), suggest_lr(1e-4, steps=80)
        (0.001, 0.0015)
    """
    if not full_lr > 0:
        raise ValueError(f"full_lr must be positive, got {full_lr!r}.")
    if steps is not None and steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps!r}.")
    return (15 if steps is not None and steps <= SHORT_RUN else 10) * full_lr
