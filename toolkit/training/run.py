"""
What the two training programs do alike around their loops: setting a run up, the loss of a batch, when to stop, the
evaluation, and the report at the end.
"""

import contextlib
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import set_seed
from transformers.utils import logging

from ..data.loaders import make_train_loader, make_validation_loader, set_epoch
from ..data.sources import load_image_data
from ..hub.card import write_model_card
from ..shared.images import BadImages, DataError
from .arguments import RECORD, Arguments, check_same_run, full_record, parse_arguments
from .checkpoints import CheckpointError, check_finite_weights, write_checkpoint
from .model import Teacher, build_model, config_overrides
from .recipes import (
    RecipeLoss,
    WeightAverage,
    batch_mixing,
    learning_rate_of,
    parameter_groups,
    train_transform,
    validation_transform,
)
from .report import compute_metrics, describe_hardware, draw_curves, final_report, memory_gb
from .schedules import ScheduleSampler


BAD_IMAGES = "bad_images.json"
LOG = "log.json"
CURVES = "curves.png"
CONFUSION = "confusion_matrix.png"
SCHEDULES = "schedules.json"


class TrainingStopped(RuntimeError):
    """The training cannot go on; the message says why, and what to do."""


class TrainingRun:
    """
    A run that has been set up: data, model, teacher, and what has happened so far.

    Args:
        args: the flags.

    Raises:
        ValueError, OSError: for data, a model or settings that cannot be used.
    """

    def __init__(self, args: Arguments):
        self.args, training = args, args.training
        self.output_dir = Path(training.output_dir)
        self.is_main_process = training.process_index == 0
        check_same_run(args, self.output_dir)
        with training.main_process_first(desc="reading the data"):
            self.data = load_image_data(args.data, training.seed)
        set_seed(training.seed)
        self.model, self.image_processor, self.notes = build_model(args.model, args.recipe, self.data.class_names)
        self.teacher = None
        if args.recipe.teacher:
            self.teacher = Teacher(args.model, args.recipe, self.model, self.image_processor).to(training.device)
        self.train_loader, self.validation_loader = self._make_loaders()
        self.loss = RecipeLoss(args.recipe, training.label_smoothing_factor)
        self.average: WeightAverage | None = None
        self.bad_images = BadImages()
        self.grown_epochs = 0
        self.schedules = ScheduleSampler(
            self.model, config_overrides(args.model).get("hvt_pool_choices"), training.seed
        )
        self.last_log = (time.perf_counter(), None)

    def _make_loaders(self) -> tuple[DataLoader, DataLoader]:
        args, training = self.args, self.args.training
        common = {
            "rank": training.process_index,
            "world_size": training.world_size,
            "num_workers": training.dataloader_num_workers,
            "pin_memory": training.dataloader_pin_memory and training.device.type == "cuda",
        }
        train_loader = make_train_loader(
            self.data,
            args.data,
            train_transform(args.recipe, self.image_processor),
            batch_size=training.per_device_train_batch_size,
            seed=training.seed if training.data_seed is None else training.data_seed,
            repeats=args.recipe.repeated_augmentation,
            mix=batch_mixing(args.recipe, self.model.num_labels),
            **common,
        )
        validation_loader = make_validation_loader(
            self.data,
            args.data,
            validation_transform(self.image_processor),
            batch_size=training.per_device_eval_batch_size,
            **common,
        )
        return train_loader, validation_loader

    # Steps and rates.

    @property
    def images_per_step(self) -> int:
        training = self.args.training
        return training.per_device_train_batch_size * training.world_size * training.gradient_accumulation_steps

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.train_loader) / self.args.training.gradient_accumulation_steps)

    @property
    def learning_rate(self) -> float:
        return learning_rate_of(self.args.recipe, self.args.training.learning_rate, self.images_per_step)

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """AdamW on the recipe's groups of parameters."""
        training = self.args.training
        groups = parameter_groups(model, self.learning_rate, training.weight_decay, self.args.recipe.layer_decay)
        betas = (training.adam_beta1, training.adam_beta2)
        return torch.optim.AdamW(groups, lr=self.learning_rate, betas=betas, eps=training.adam_epsilon)

    # In the loop.

    def start(self):
        """Prints and saves what this run will do, and gives each process random numbers of its own."""
        set_seed(self.args.training.seed + self.args.training.process_index)
        if not self.is_main_process:
            return
        self.output_dir.mkdir(parents=True, exist_ok=True)
        record = yaml.safe_dump(full_record(self.args), sort_keys=False, allow_unicode=True)
        (self.output_dir / RECORD).write_text(record)
        tokens = self.model.config.tokens_per_stage()
        print(record + "\n".join(self.notes), flush=True)
        print(
            f"{self.model.num_parameters() / 1e6:.2f} M parameters, tokens {tokens}, {self.images_per_step} images "
            f"per step, {self.steps_per_epoch} steps per epoch, peak learning rate {self.learning_rate:.3g}",
            flush=True,
        )

    def begin_epoch(self, epoch: int):
        """Shuffles for this epoch, counted from 0, and lets the stochastic depth rate grow."""
        set_epoch(self.train_loader, epoch)
        growth = self.args.recipe.drop_path_growth
        # Step by step also when a run goes on: the sum of the rounded steps differs from one rounded product.
        while growth and self.grown_epochs < epoch:
            self.model.update_stochastic_depth_rate(growth)
            self.grown_epochs += 1

    def begin_step(self, step: int):
        """To be called before the step that follows `step` steps of the optimiser."""
        self.schedules.draw(step)

    def end_step(self):
        """To be called after each step of the optimiser."""
        self.schedules.restore()
        if self.average:
            self.average.update()

    def take_names(self, batch: dict[str, Any]) -> list[str]:
        """Takes what is no tensor out of a batch: returns the files' names, and keeps a record of bad images."""
        self.bad_images.add(batch.pop("bad_images"))
        self.bad_images.check(self.args.data.max_bad_images)
        return batch.pop("names")

    def batch_loss(self, model: nn.Module, batch: dict[str, torch.Tensor], autocast: Callable) -> torch.Tensor:
        logits = model(pixel_values=batch["pixel_values"]).logits
        teacher_logits = None
        if self.teacher is not None:
            with autocast():
                teacher_logits = self.teacher(batch["pixel_values"])
        return self.loss(logits, batch["labels"], teacher_logits)

    def check_loss(self, loss: torch.Tensor, step: int, learning_rate: float, names: list[str]):
        """Raises `TrainingStopped` for a loss that is not finite."""
        if torch.isfinite(loss):
            return
        raise TrainingStopped(
            f"The loss is {loss.item()} at step {step} with learning rate {learning_rate:.3g}; the batch's files: "
            f"{', '.join(names)}. The last checkpoint in {self.output_dir} is from before. Lower the learning rate, "
            "clip gradients (--max_grad_norm 1), or look at these files."
        )

    def start_average(self, model: nn.Module, checkpoint: Path | None):
        """Begins the moving average of the weights, or goes on with a checkpoint's."""
        if not self.args.recipe.ema_decay:
            return
        self.average = WeightAverage(model, self.args.recipe.ema_decay)
        if checkpoint is not None:
            from safetensors.torch import load_file

            self.average.load_state_dict(load_file(checkpoint / "ema" / "model.safetensors"))

    def final_weights(self) -> contextlib.AbstractContextManager:
        """The model has the moving average as its weights in the block, if there is one."""
        return self.average.applied() if self.average else contextlib.nullcontext()

    @contextlib.contextmanager
    def checkpoint(self, step: int, accelerator: Accelerator) -> Iterator[Path]:
        """The block writes the checkpoint of this step into the folder it gets."""
        try:
            check_finite_weights(self.model, step)
        except FloatingPointError as error:
            raise TrainingStopped(f"{error}. Lower the learning rate, or clip gradients.") from error
        folder = self.output_dir / f"checkpoint-{step}"
        with write_checkpoint(
            folder,
            is_main_process=self.is_main_process,
            wait_for_everyone=accelerator.wait_for_everyone,
            keep=self.keep_checkpoints,
        ):
            yield folder
            self.write_bad_images(folder)
            if self.is_main_process:
                (folder / RECORD).write_text((self.output_dir / RECORD).read_text())

    @property
    def keep_checkpoints(self) -> int | None:
        return self.args.record.get("save_total_limit")

    def resume(self, checkpoint: Path | None):
        """Says from where the run goes on, and recalls the bad images of before."""
        if checkpoint is None:
            return
        if self.is_main_process:
            print(f"going on from {checkpoint}", flush=True)
            self.bad_images = BadImages.read(checkpoint / BAD_IMAGES)

    def write_bad_images(self, folder: Path):
        """Collects the records of all processes into one file."""
        records = gather_object(list(self.bad_images.records.values()))
        if self.is_main_process:
            self.bad_images.add(records)
            self.bad_images.write(folder / BAD_IMAGES)

    def speed(self, step: int) -> dict[str, float]:
        """Images per second since the last call, and memory, for the log."""
        now, (then, last_step) = time.perf_counter(), self.last_log
        self.last_log = (now, step)
        logs = memory_gb(self.args.training.device)
        if last_step is not None and step > last_step:
            logs["images_per_second"] = round((step - last_step) * self.images_per_step / (now - then), 1)
        return logs

    # Evaluation and report.

    @torch.no_grad()
    def predict(self, model: nn.Module, accelerator: Accelerator) -> tuple[np.ndarray, np.ndarray]:
        """
        Scores of shape (num_images, num_labels) and labels of shape (num_images,) of every validation image, each
        once, on every process.
        """
        model = accelerator.unwrap_model(model)
        model.eval()
        scores, labels = [], []
        for batch in self._validation_batches(accelerator):
            self.take_names(batch)
            logits = model(pixel_values=batch["pixel_values"].to(accelerator.device)).logits
            kept = batch["labels"] >= 0
            scores.append(logits.float().cpu()[kept].numpy())
            labels.append(batch["labels"][kept].numpy())
        parts = gather_object([(np.concatenate(scores), np.concatenate(labels))])
        scores, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
        if not len(labels):
            raise TrainingStopped("No validation image could be read: see the bad images above.")
        return scores, labels

    def _validation_batches(self, accelerator: Accelerator) -> Iterator[dict[str, Any]]:
        """
        The batches of this process, and then empty ones until every process is done: the weights of a sharded model
        are gathered in every forward, by all processes or by none.
        """
        channels, shape = self.model.config.num_channels, self.model.config.image_shape
        empty = {"pixel_values": torch.zeros(1, channels, *shape), "labels": torch.tensor([-100])}
        batches = iter(self.validation_loader)
        progress = tqdm(desc="evaluating", unit="batch", leave=False, disable=self.is_quiet)
        while True:
            batch = next(batches, None)
            missing = torch.tensor(float(batch is None), device=accelerator.device)
            if accelerator.reduce(missing, "mean").item() == 1.0:
                break
            progress.update()
            yield batch or {**empty, "names": [], "bad_images": []}
        progress.close()

    @property
    def is_quiet(self) -> bool:
        return self.args.training.disable_tqdm or not self.is_main_process

    def evaluate(self, model: nn.Module, accelerator: Accelerator) -> dict[str, float]:
        """Top-1, top-5 and mean cross-entropy (in nats) over the validation images."""
        scores, labels = self.predict(model, accelerator)
        loss = nn.functional.cross_entropy(torch.from_numpy(scores), torch.from_numpy(labels)).item()
        return {"loss": loss, **compute_metrics(scores, labels), "images": len(labels)}

    def evaluate_schedules(self, model: nn.Module, accelerator: Accelerator) -> dict[str, float]:
        """Top-1 for each of `--hvt_pool_choices`."""
        return {name: compute_metrics(*self.predict(model, accelerator))["top1"] for name in self.schedules.each()}

    def report(self, model: nn.Module, accelerator: Accelerator, results: dict[str, Any], log: list[dict[str, Any]]):
        """Per-class accuracy, pictures, bad images and the model card, of the model with its final weights."""
        scores, labels = self.predict(model, accelerator)
        by_schedule = self.evaluate_schedules(model, accelerator)
        self.write_bad_images(self.output_dir)
        if not self.is_main_process:
            return
        if by_schedule:
            (self.output_dir / SCHEDULES).write_text(json.dumps(by_schedule, indent=2) + "\n")
            results |= {f"top-1 with schedule {name}": f"{top1:.2%}" for name, top1 in by_schedule.items()}
        results = {**results, **final_report(scores, labels, self.data.class_names, self.output_dir)}
        (self.output_dir / LOG).write_text(json.dumps(log, indent=2) + "\n")
        draw_curves(log, self.output_dir / CURVES)
        print(self.bad_images.summary(), flush=True)
        self.write_card(results)

    def write_card(self, results: dict[str, Any]):
        args, training = self.args, self.args.training
        saved = "eval_ema_" if self.average else "eval_"
        scores = {name: results[saved + name] for name in ("top1", "top5", "loss")}
        scores |= {name: value for name, value in results.items() if name.startswith("top-1 with schedule ")}
        source = args.data.dataset_name or args.data.train_dir or ", ".join(args.data.train_files)
        write_model_card(
            self.output_dir,
            model=self.model,
            label_names=self.data.class_names,
            recipe=full_record(args),
            data={"name": source, **{k: v for k, v in self.data.describe().items() if k != "class_names"}},
            results=scores | {name: results[name] for name in ("num_images", "mean_class_accuracy")},
            hardware=describe_hardware(training.world_size),
            training={
                "seconds": results["train_runtime"],
                "images_per_second": results["train_samples_per_second"],
                "epochs": training.num_train_epochs,
                "seed": training.seed,
                "weights": "moving average" if self.average else "of the last step",
                "command": shlex.join(["python", *sys.argv]),
            },
            base_model=args.model.model_name_or_path,
            teacher=args.recipe.teacher,
            pictures={"Curves": CURVES, "Confusion matrix": CONFUSION},
            bad_images=self.bad_images.summary(),
        )


def run_program(description: str, train: Callable[[TrainingRun], None], argv: list[str] | None = None):
    """Reads the flags, sets a run up and trains; what is wrong with flags, data or disk is one line, no traceback."""
    args = parse_arguments(argv, description)
    logging.set_verbosity(args.training.get_process_log_level())
    try:
        run = TrainingRun(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    try:
        train(run)
    except (TrainingStopped, CheckpointError, DataError) as error:
        # Without the traceback, which keeps the loader's workers alive for seconds.
        sys.exit(f"error: {error.with_traceback(None)}")


def is_due(strategy: str, every: float, step: int, steps_per_epoch: int) -> bool:
    """Whether a loop of one's own saves, evaluates or logs behind this step, by Trainer's names of strategies."""
    if strategy == "epoch":
        return step % steps_per_epoch == 0
    return strategy == "steps" and step % int(every) == 0
