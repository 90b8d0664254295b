"""Progress on the terminal: a tqdm bar with rate and time left, or sparse lines where there is no terminal."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

LINE_EVERY = 20.0  # seconds between lines without a terminal


class Progress:
    """Counts steps of a whole run; a resumed run starts at its step."""

    def __init__(self, total: int, start: int, *, quiet: bool = False) -> None:
        self.total, self.done, self.quiet = total, start, quiet
        self.bar = None
        if sys.stderr.isatty() and not quiet:
            self.bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True)
        self.line_time, self.line_step = time.monotonic(), start

    def step(self, losses: dict[str, float] | None = None) -> None:
        """Count one step; `losses` are shown beside the bar."""
        self.done += 1
        if self.bar is not None:
            self.bar.update()
            if losses:
                self.bar.set_postfix({task: f"{loss:.3f}" for task, loss in losses.items()}, refresh=False)
        elif not self.quiet and (passed := time.monotonic() - self.line_time) > LINE_EVERY:
            rate = (self.done - self.line_step) / passed  # of late, since evaluations would blur a mean over all
            self.line_time, self.line_step = time.monotonic(), self.done
            left = (self.total - self.done) / rate
            print(f"step {self.done}/{self.total}, {rate:.1f} steps/s, {left / 60:.1f} min left", flush=True)

    def say(self, text: str) -> None:
        """Print a line without tearing the bar."""
        if self.bar is not None:
            self.bar.write(text)
        elif not self.quiet:
            print(text, flush=True)
            self.line_time, self.line_step = time.monotonic(), self.done  # what comes before a line was no training

    def close(self) -> None:
        """End the bar."""
        if self.bar is not None:
            self.bar.close()
