"""
Train or fine-tune an HPool-ViT for image classification with a plain Accelerate loop that you can change.

    python examples/run_image_classification_no_trainer.py examples/configs/digits.yaml
    accelerate launch examples/run_image_classification_no_trainer.py --train_dir photos --preset hvt-s-1

Flags, recipes, data and results are those of `hpool-vit train`. The same command resumes from the last complete
checkpoint in --output_dir.
"""

import contextlib
import itertools
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, skip_first_batches
from tqdm.auto import tqdm
from transformers import get_scheduler

from hpool_vit.toolkit.shared.console import run as run_script
from hpool_vit.toolkit.training.arguments import DEFAULTS
from hpool_vit.toolkit.training.checkpoints import find_last_checkpoint
from hpool_vit.toolkit.training.optimization import make_optimizer
from hpool_vit.toolkit.training.report import write_report
from hpool_vit.toolkit.training.run import TrainingRun, TrainingStopped, is_due, run_program


# The fields of `TrainingArguments` that this loop uses. It refuses the others instead of ignoring them.
USED = {
    "adam_beta1", "adam_beta2", "adam_epsilon", "bf16", "data_seed", "dataloader_num_workers", "dataloader_pin_memory",
    "ddp_backend", "ddp_timeout",
    "disable_tqdm", "eval_steps", "eval_strategy", "fp16", "gradient_accumulation_steps", "label_smoothing_factor",
    "learning_rate", "log_level", "logging_steps", "lr_scheduler_kwargs", "lr_scheduler_type", "max_grad_norm",
    "max_steps", "num_train_epochs", "output_dir", "per_device_eval_batch_size", "per_device_train_batch_size",
    "report_to", "save_steps", "save_strategy", "save_total_limit", "seed", "tf32", "torch_compile",
    "torch_compile_backend", "torch_compile_mode", "use_cpu", "warmup_steps", "weight_decay",
}  # fmt: skip


@dataclass
class Progress:
    """How far the training is. Every checkpoint contains it."""

    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        return vars(self).copy()

    def load_state_dict(self, state: dict[str, Any]):
        vars(self).update(state)


class Loop:
    """The training loop of a run."""

    def __init__(self, run: TrainingRun):
        self.run, self.training = run, run.args.training
        # With None, `accelerate launch` decides.
        precision = "bf16" if self.training.bf16 else "fp16" if self.training.fp16 else None
        trackers = [name for name in self.training.report_to if name != "none"]
        self.accelerator = Accelerator(
            cpu=self.training.use_cpu,
            mixed_precision=precision,
            log_with=trackers or None,
            project_dir=self.training.output_dir,
        )
        optimizer = make_optimizer(run.model, run.learning_rate, run.args.recipe, self.training)
        self.model, self.optimizer = self.accelerator.prepare(run.model, optimizer)
        run.model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        self.max_steps = self.training.max_steps
        if self.max_steps <= 0:
            self.max_steps = round(self.training.num_train_epochs * run.steps_per_epoch)
        self.scheduler = get_scheduler(
            self.training.lr_scheduler_type,
            self.optimizer,
            num_warmup_steps=self.training.get_warmup_steps(self.max_steps),
            num_training_steps=self.max_steps,
            scheduler_specific_kwargs=self.training.lr_scheduler_kwargs,
        )
        self.progress = Progress()
        self.accelerator.register_for_checkpointing(self.scheduler, self.progress)
        self.losses: list[torch.Tensor] = []

    def train(self, checkpoint: Path | None) -> dict[str, float]:
        """Trains to the end, and returns the results of the last evaluation."""
        run = self.run
        self.accelerator.init_trackers("logs")
        if checkpoint is not None:
            self.accelerator.load_state(str(checkpoint))
        run.compute_features(self.accelerator)
        run.start_average(run.model, checkpoint)
        run.speed.measure(self.progress.step)
        start, first_step = time.perf_counter(), self.progress.step
        progress_bar = tqdm(total=self.max_steps, initial=first_step, desc="training", disable=run.is_quiet)
        while self.progress.step < self.max_steps:
            for micro_batches in self.epoch():
                self.step(micro_batches)
                progress_bar.update()
                self.log_evaluate_save()
                if self.progress.step >= self.max_steps:
                    break
        progress_bar.close()
        seconds = time.perf_counter() - start
        images = (self.progress.step - first_step) * run.images_per_step
        return {
            **self.evaluate(),
            "train_runtime": round(seconds, 1),
            "train_samples_per_second": round(images / seconds, 1),
        }

    def epoch(self) -> Iterator[list[dict[str, Any]]]:
        """The rest of the current epoch: the batches of each step of the optimizer."""
        epoch, done = divmod(self.progress.step, self.run.steps_per_epoch)
        self.run.begin_epoch(epoch)
        accumulated = self.training.gradient_accumulation_steps
        loader = self.run.train_loader
        return groups_of(skip_first_batches(loader, done * accumulated) if done else loader, accumulated)

    def step(self, micro_batches: list[dict[str, Any]]):
        self.model.train()
        self.run.begin_step(self.progress.step)
        for number, batch in enumerate(micro_batches, start=1):
            names = self.run.records.take_names(batch)
            batch = {name: tensor.to(self.accelerator.device, non_blocking=True) for name, tensor in batch.items()}
            is_last = number == len(micro_batches)
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.model):
                loss = self.run.batch_loss(self.model, batch, self.accelerator.autocast)
                self.accelerator.backward(loss / len(micro_batches))
            self.run.check_loss(loss.detach(), self.progress.step + 1, self.scheduler.get_last_lr()[0], names)
            self.losses.append(loss.detach())
        if self.training.max_grad_norm > 0:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.training.max_grad_norm)
        self.optimizer.step()
        if not self.accelerator.optimizer_step_was_skipped:
            self.scheduler.step()
        self.optimizer.zero_grad()
        self.progress.step += 1
        self.run.end_step()

    def log_evaluate_save(self):
        training, step, is_last = self.training, self.progress.step, self.progress.step == self.max_steps
        per_epoch = self.run.steps_per_epoch
        if is_due("steps", training.logging_steps, step, per_epoch) or is_last:
            loss = self.accelerator.reduce(torch.stack(self.losses).mean(), "mean").item()
            self.losses.clear()
            rate = self.scheduler.get_last_lr()[0]
            self.log({"loss": loss, "learning_rate": rate, **self.run.speed.measure(step)})
        # After the last step, `train` evaluates.
        if (
            is_due(training.eval_strategy, training.eval_steps or training.logging_steps, step, per_epoch)
            and not is_last
        ):
            self.evaluate()
        if is_due(training.save_strategy, training.save_steps, step, per_epoch) or is_last:
            self.save_checkpoint()

    def log(self, values: dict[str, float]):
        step = self.progress.step
        self.accelerator.log(values, step=step)
        self.progress.history.append({**values, "epoch": step / self.run.steps_per_epoch, "step": step})
        if not self.run.is_quiet:
            tqdm.write(json.dumps(self.progress.history[-1]))

    def evaluate(self) -> dict[str, float]:
        evaluate, average = self.run.evaluator.evaluate, self.run.average
        metrics = {f"eval_{name}": value for name, value in evaluate(self.model, self.accelerator).items()}
        if average:
            with average.applied():
                averaged = evaluate(self.model, self.accelerator)
            metrics |= {f"eval_ema_{name}": value for name, value in averaged.items()}
        self.log(metrics)
        return metrics

    def save_checkpoint(self):
        with self.run.checkpoint(self.progress.step, self.accelerator) as folder:
            self.accelerator.save_state(str(folder))
            self.save_model(folder)
            if self.run.average:
                with self.run.average.applied():
                    self.save_model(folder / "ema")

    def save_model(self, folder: Path):
        """A folder that `from_pretrained` and the pipelines load."""
        state = self.accelerator.get_state_dict(self.model)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        model.save_pretrained(folder, state_dict=state, is_main_process=self.run.is_main_process)
        if self.run.is_main_process:
            self.run.image_processor.save_pretrained(folder)


def groups_of(batches: Iterable[Any], number: int) -> Iterator[list[Any]]:
    iterator = iter(batches)
    while group := list(itertools.islice(iterator, number)):
        yield group


def refuse_unused(run: TrainingRun):
    """Raises `TrainingStopped` for a flag of `TrainingArguments` that only the Trainer uses."""
    for name, value in run.args.given.items():
        if hasattr(run.args.training, name) and name not in USED and value != DEFAULTS.get(name):
            raise TrainingStopped(f"--{name} works only with the Trainer: use `hpool-vit train`, or leave it out.")


def train(run: TrainingRun):
    refuse_unused(run)
    checkpoint = find_last_checkpoint(run.output_dir)
    run.start(checkpoint)
    loop = Loop(run)
    metrics = loop.train(checkpoint)
    with run.final_weights(), run.results(loop.accelerator) as folder:
        loop.save_model(folder)
        write_report(run, folder, loop.model, loop.accelerator, metrics, loop.progress.history)
    loop.accelerator.wait_for_everyone()
    loop.accelerator.end_training()


def main(argv: list[str] | None = None):
    run_script(lambda: run_program(train, argv, introduction=__doc__.strip()))


if __name__ == "__main__":
    main()
