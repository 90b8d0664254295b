"""The training loop, and everything that a run needs to go on where it was stopped as if it had not been."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

import peftlite
from examples.minbert_multitask.controllers import controller_state, load_controller_state, make_controller, saving
from examples.minbert_multitask.data import TaskData, batches, collate
from examples.minbert_multitask.environment import environment
from examples.minbert_multitask.evaluate import autocast, first_examples, load_data, scores, task_outputs, token_cache
from examples.minbert_multitask.network import (
    adapted_parameters,
    build_network,
    layer_count,
    parameter_counts,
    prepare_training,
)
from examples.minbert_multitask.optimizer import load_optimizer_tensors, make_optimizer, optimizer_tensors
from examples.minbert_multitask.progress import Progress
from examples.minbert_multitask.run_folder import BEST, RunFolder
from examples.minbert_multitask.schedule import lr_factor, plan_steps, release
from examples.minbert_multitask.settings import Settings, differing
from examples.minbert_multitask.tasks import leaderboard_score, task_loss


class TrainingStoppedError(Exception):
    """Training was asked to stop (Ctrl-C, SIGTERM); its state has been saved."""


class BatchStream:
    """The endless sequence of a task's batches, reshuffled in each pass; batch k is a function of (seed, k)."""

    def __init__(self, data: TaskData, settings: Settings) -> None:
        self.data, self.settings, self.epoch = data, settings, -1
        self.order: list[list[int]] = []
        self.per_pass = len(self._pass(0))

    def _pass(self, epoch: int) -> list[list[int]]:
        if epoch != self.epoch:
            cross = self.settings.cross_encoder
            size, seed = self.settings.batch_size, self.settings.seed
            self.order = batches(self.data, size, seed=seed, epoch=epoch, cross_encoder=cross)
            self.epoch = epoch
        return self.order

    def __getitem__(self, k: int) -> list[int]:
        return self._pass(k // self.per_pass)[k % self.per_pass]


class Trainer:
    """A run: built new or from its saved state, then driven by `run()`.

    Args:
        settings: What to do. Resolved here.
        resume: Go on with the run in `settings.output`, whose settings must be the same.
        quiet: Print nothing.

    Raises:
        ValueError: A wrong setting, data that cannot be used, or settings that differ from those of the run.
        FileExistsError: Not resuming, and the folder is not empty.
        FileNotFoundError: Missing data, or resuming where there is no run.
    """

    def __init__(self, settings: Settings, *, resume: bool = False, quiet: bool = False) -> None:
        self.settings = settings = settings.resolved()
        self.folder = RunFolder(settings.output)
        if resume and (difference := differing(self.folder.read_settings(), dataclasses.asdict(settings))):
            raise ValueError(
                f"{self.folder.path} cannot go on with other settings: {difference}; give the same ones, or start anew"
            )
        if not resume:
            self.folder.check_free()
        torch.set_num_threads(settings.threads)
        torch.manual_seed(settings.seed)
        self.network, tokenizer_folder = build_network(settings)
        prepare_training(self.network, settings)
        self.network.to(settings.device).train()
        cache = token_cache(self.folder)
        self.train_data = load_data(settings, "train", tokenizer_folder, cache)
        self.dev_data = load_data(settings, "dev", tokenizer_folder, cache)
        for task, data in self.dev_data.items():
            self.dev_data[task] = first_examples(data, settings.eval_limit)
        self.streams = {task: BatchStream(data, settings) for task, data in self.train_data.items()}
        sizes = {task: math.ceil(stream.per_pass / settings.accumulate) for task, stream in self.streams.items()}
        self.steps_per_epoch = sum(sizes.values())
        length = {"steps": settings.steps} if settings.steps else {"epochs": settings.epochs}
        self.plan = plan_steps(sizes, sampling=settings.sampling, seed=settings.seed, **length)
        self.eval_every = settings.eval_every or self.steps_per_epoch
        self.multipliers = settings.multipliers()

        self.step = 0  # optimizer steps done
        self.optimizer = make_optimizer(self.network, settings)
        self.scaler = torch.amp.GradScaler(settings.device, enabled=settings.amp == "fp16")
        self.trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.parameters = parameter_counts(self.network, self.trained)
        self.protected = adapted_parameters(self.network)
        self.controller = make_controller(self.network.backbones, self.optimizer, settings, len(self.plan))
        self._release()

        self.evaluated = -1  # the step that was evaluated last
        self.best_step, self.best_score, self.stale = -1, -math.inf, 0
        self.metrics_rows = 0
        self.seconds = dict.fromkeys(self.train_data, 0.0)  # training alone, without evaluation and saving
        self.loss_sums = {task: torch.zeros((), device=settings.device) for task in self.train_data}
        self.loss_counts = dict.fromkeys(self.train_data, 0)
        self.stop_requested = False
        if resume:
            self._load_state()
        else:
            self.folder.create(dataclasses.asdict(settings), environment())
        self.progress = Progress(len(self.plan), self.step, quiet=quiet)

    def run(self, on_step: Callable[[int], None] | None = None) -> None:
        """Train to the end, or until patience runs out.

        Args:
            on_step: Called with the number of steps done after each.

        Raises:
            TrainingStoppedError: After `stop()`, once the state has been saved.
        """
        try:
            while True:
                due = self.step % self.eval_every == 0 or self.step == len(self.plan)
                if due and self.evaluated != self.step:
                    self._evaluate()
                    self.save_state()
                if self.step == len(self.plan) or self._out_of_patience():
                    return
                self._train_step()
                if self.step % self.settings.save_every == 0:
                    self.save_state()
                if on_step is not None:
                    on_step(self.step)
                self._check_stop()
        except TrainingStoppedError:
            self.save_state()
            raise
        finally:
            self.progress.close()

    def stop(self) -> None:
        """Ask a running `run()` to save its state and stop, after the step or the evaluation batch that it is at."""
        self.stop_requested = True

    def _check_stop(self) -> None:
        if self.stop_requested:
            raise TrainingStoppedError

    def _out_of_patience(self) -> bool:
        return 0 < self.settings.patience <= self.stale

    def _train_step(self) -> None:
        """One optimizer step: forward and backward over `accumulate` batches of the planned task, then the update."""
        began = time.perf_counter()
        settings, planned = self.settings, self.plan[self.step]
        task, stream = planned.task, self.streams[planned.task]
        if self.step % self.steps_per_epoch == 0:
            self._release()
        first = planned.number * settings.accumulate
        indices = [stream[first + i] for i in range(settings.accumulate)]
        examples = sum(map(len, indices))
        for index in indices:
            batch = collate(stream.data, index, cross_encoder=settings.cross_encoder, max_length=settings.max_length)
            batch = batch.to(settings.device)
            with autocast(settings):
                logits = self.network(task, batch)
            # Weighted by size, so that accumulating gives the gradient of one large batch
            loss = task_loss(task, logits, batch.labels, sts_loss=settings.sts_loss) * (len(index) / examples)
            self.scaler.scale(loss).backward()
            self.loss_sums[task] += loss.detach()
        self.loss_counts[task] += 1
        factor = lr_factor(self.step, len(self.plan), warmup=settings.warmup, schedule=settings.lr_schedule)
        for group in self.optimizer.param_groups:
            # The multiplier scales the rate: Adam's step would not notice a scaled loss
            group["lr"] = group["peak_lr"] * factor * self.multipliers[task]
        if settings.clip:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.trained, settings.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if settings.device == "cuda":
            torch.cuda.synchronize()  # or the seconds below would be those of the launches
        self.seconds[task] += time.perf_counter() - began
        self.step += 1
        losses = None
        if self.step % settings.log_every == 0 or self.step == len(self.plan):
            losses = self._log_losses(factor)
        self.progress.step(losses)

    def _release(self, step: int | None = None) -> None:
        """Let train what progressive unfreezing has reached at `step` (default: the next one)."""
        if self.settings.unfreeze == "progressive":
            epoch = (self.step if step is None else step) // self.steps_per_epoch
            release(self.network.backbones, self.protected, epoch, layer_count(self.network))

    def _log_losses(self, factor: float) -> dict[str, float]:
        """Write the mean training losses since the last time.

        Raises:
            FloatingPointError: If one is not finite.
        """
        losses = {t: float(self.loss_sums[t]) / n for t, n in self.loss_counts.items() if n}
        for task, loss in losses.items():
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the training loss of task {task!r} is {loss} after step {self.step}; lower --lr or --head-lr, "
                    "or use --amp bf16 in place of fp16"
                )
        row = {"kind": "train", "step": self.step, "epoch": self.step / self.steps_per_epoch}
        self._write_metrics({**row, "lr": self.settings.lr * factor, "loss": losses})
        for task in self.loss_sums:
            self.loss_sums[task].zero_()
            self.loss_counts[task] = 0
        return losses

    def _evaluate(self) -> None:
        """Score the dev examples, note the scores, and keep the network if it is the best so far."""
        outputs = {
            task: task_outputs(self.network, data, self.settings, on_batch=self._check_stop)
            for task, data in self.dev_data.items()
        }
        found = scores(outputs, {task: data.labels for task, data in self.dev_data.items()})
        score = leaderboard_score(found)
        better = score > self.best_score
        if better:
            with saving(self.controller):
                peftlite.save_adapters(self.network, self.folder / BEST)
            self.best_step, self.best_score, self.stale = self.step, score, 0
        else:
            self.stale += 1
        row = {"kind": "dev", "step": self.step, "epoch": self.step / self.steps_per_epoch}
        self._write_metrics({**row, "scores": found, "score": score, "best": better})
        self.evaluated = self.step
        shown = ", ".join(f"{task} {value:.4f}" for task, value in found.items())
        self.progress.say(f"step {self.step}: dev {shown}, score {score:.4f}{' (best)' if better else ''}")

    def _write_metrics(self, row: dict) -> None:
        self.folder.append_metrics({**row, "seconds": sum(self.seconds.values())})
        self.metrics_rows += 1

    def save_state(self) -> None:
        """Write all that the rest of the run depends on."""
        tensors = optimizer_tensors(self.optimizer)
        tensors |= {f"network.{name}": value for name, value in self._changing().items()}
        tensors |= {f"loss_sum.{task}": value for task, value in self.loss_sums.items()}
        tensors["rng.cpu"] = torch.get_rng_state()
        if self.settings.device == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state()
        values = {name: getattr(self, name) for name in _STATE_VALUES}
        if self.best_step < 0:
            values["best_score"] = None  # JSON has no infinity
        own, plain = controller_state(self.controller)
        self.folder.save_state(tensors | own, {**values, "scaler": self.scaler.state_dict(), "controller": plain})

    def _changing(self) -> dict[str, Tensor]:
        """The network's trained parameters and all its buffers: what training changes."""
        trained = {id(p) for p in self.trained}
        changing = {name: p.data for name, p in self.network.named_parameters() if id(p) in trained}
        return changing | dict(self.network.named_buffers())

    def _load_state(self) -> None:
        """Put back what `save_state` wrote; a run that was killed before its first save starts at the beginning."""
        self.folder.remove_leftovers()
        found = self.folder.load_state()
        if found is None:
            self.folder.truncate_metrics(0)
            return
        tensors, values = found
        # By the network itself, since adapters may have grown in the run
        self.network.load_state_dict({name: tensors[f"network.{name}"] for name in self._changing()}, strict=False)
        load_optimizer_tensors(self.optimizer, tensors)
        for task, value in self.loss_sums.items():
            value.copy_(tensors[f"loss_sum.{task}"])
        self.scaler.load_state_dict(values.pop("scaler"))
        load_controller_state(self.controller, tensors, values.pop("controller"))
        for name in _STATE_VALUES:
            setattr(self, name, values[name])
        if self.best_score is None:
            self.best_score = -math.inf
        self._release(max(0, self.step - 1))  # as at the last step done; the next one releases for itself
        self.folder.truncate_metrics(self.metrics_rows)
        torch.set_rng_state(tensors["rng.cpu"])
        if self.settings.device == "cuda":
            torch.cuda.set_rng_state(tensors["rng.cuda"])


_STATE_VALUES = ("step", "evaluated", "best_step", "best_score", "stale", "metrics_rows", "seconds", "loss_counts")
