"""One run of a training program: its setup before the loop, and what the loop does between its steps."""

import contextlib
import errno
import math
import shutil
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import set_seed
from transformers.utils import logging

from ..data.features import FeatureImages, make_feature_loader
from ..data.loaders import BatchRecords, make_train_loader, make_validation_loader, set_epoch
from ..data.sources import ImageData, load_image_data
from ..shared.console import StoppedError, needs
from ..shared.files import written_whole
from ..shared.images import DataError
from .arguments import RECORD, Arguments, check_same_run, full_record, parse_arguments
from .checkpoints import CheckpointError, check_finite_weights, remove_earlier, write_checkpoint, write_results
from .evaluation import Evaluator
from .model import Teacher, build_model, config_overrides, freeze_trunk, resize_for
from .optimization import RecipeLoss, WeightAverage, learning_rate_of
from .recipes import augmentations, batch_mixing, train_transform, validation_transform
from .report import BAD_IMAGES, SpeedMeter
from .schedules import ScheduleSampler


with needs("train"):
    from accelerate import Accelerator


FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class TrainingStopped(RuntimeError):
    """The training cannot go on. The message says why, and what to do."""


class TrainingRun:
    """
    A run that is set up: data, model, teacher and loaders. Its methods are what both training programs share.

    Args:
        args: the flags.

    Raises:
        ValueError, OSError: for data, a model or settings that cannot be used.
    """

    def __init__(self, args: Arguments):
        self.args, training = args, args.training
        self.output_dir = Path(training.output_dir)
        self.is_main_process = training.process_index == 0
        self.is_quiet = training.disable_tqdm or not self.is_main_process
        self.keep_checkpoints = training.save_total_limit
        check_same_run(args, self.output_dir)
        with training.main_process_first(desc="reading the data"):
            self.data = load_image_data(args.data, training.seed)
        set_seed(training.seed)
        self.model, self.image_processor, notes = build_model(args.model, args.recipe, self.data.class_names)
        self.notes = [*self.data.notes, *notes]
        if "eval_crop_ratio" in args.given:
            size, asked = dict(self.image_processor.size), resize_for(self.model.config, args.recipe)["size"]
            if size != asked:
                self.notes.append(
                    f"--eval_crop_ratio has no effect: the image processor of the model resizes to {size}"
                )
        if args.recipe.freeze_trunk:
            freeze_trunk(self.model)
        self.teacher = None
        if args.recipe.teacher:
            self.teacher = Teacher(args.model, args.recipe, self.model, self.image_processor).to(training.device)
        self.train_loader, self.validation_loader = make_loaders(
            args, self.data, self.image_processor, self.model.num_labels
        )
        if args.recipe.freeze_trunk and args.recipe.cache_features:
            if reason := self.changes_every_epoch():
                self.notes.append(f"the features are computed in every epoch, because of {reason}")
            else:
                self.train_loader = make_feature_loader(self.train_loader)
        self.loss = RecipeLoss(args.recipe, training.label_smoothing_factor)
        self.average: WeightAverage | None = None
        self.schedules = ScheduleSampler(
            self.model, config_overrides(args.model).get("hvt_pool_choices"), training.seed
        )
        self.records = BatchRecords(args.data.max_bad_images)
        self.evaluator = Evaluator(
            self.validation_loader, self.model.config, self.records.take_names, is_quiet=self.is_quiet
        )
        self.speed = SpeedMeter(self.images_per_step, training.device)
        self.grown_epochs = 0

    def changes_every_epoch(self) -> str:
        """What keeps the images of one epoch from being those of the next: flags, or nothing."""
        streaming = ["streaming"] if self.data.train.is_stream else []
        return ", ".join(f"--{name}" for name in augmentations(self.args.recipe) + streaming)

    def compute_features(self, accelerator: Accelerator):
        """Computes the features of all training images, if the run trains on them. Every process calls this."""
        images = self.train_loader.dataset
        if isinstance(images, FeatureImages) and not images.features:
            trunk = accelerator.unwrap_model(self.model, keep_torch_compile=False).hpool_vit

            @torch.no_grad()
            def features_of(pixel_values: torch.Tensor) -> torch.Tensor:
                with accelerator.autocast():
                    return trunk(pixel_values.to(accelerator.device)).pooler_output.cpu()

            images.compute(features_of, self.records.take_names, self.args.training, is_quiet=self.is_quiet)

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

    def start(self, checkpoint: Path | None):
        """Prints and saves the settings, and gives each process its own random numbers."""
        set_seed(self.args.training.seed + self.args.training.process_index)
        if not self.is_main_process:
            return
        self.output_dir.mkdir(parents=True, exist_ok=True)
        record = yaml.safe_dump(full_record(self.args), sort_keys=False, allow_unicode=True)
        with written_whole(self.output_dir / RECORD) as part:
            part.write_text(record, encoding="utf-8")
        print(record + "\n".join(self.notes), flush=True)
        print(
            f"{self.model.num_parameters() / 1e6:.2f} M parameters, tokens {self.model.config.tokens_per_stage()}, "
            f"{self.images_per_step} images per step, {self.steps_per_epoch} steps per epoch, peak learning rate "
            f"{self.learning_rate:.3g}",
            flush=True,
        )
        if checkpoint is not None:
            print(f"resuming from {checkpoint}", flush=True)
            # A run that was killed right after it wrote this one has not come to it.
            remove_earlier(checkpoint, self.keep_checkpoints)
            self.records.read(checkpoint / BAD_IMAGES)

    def start_average(self, model: nn.Module, checkpoint: Path | None):
        """Starts the moving average of the weights, or continues that of a checkpoint."""
        if not self.args.recipe.ema_decay:
            return
        self.average = WeightAverage(model, self.args.recipe.ema_decay)
        if checkpoint is not None:
            self.average.load_state_dict(load_file(checkpoint / "ema" / "model.safetensors"))

    def begin_epoch(self, epoch: int):
        """Shuffles the images for this epoch, counted from 0, and increases the stochastic depth rate."""
        set_epoch(self.train_loader, epoch)
        growth = self.args.recipe.drop_path_growth
        # One epoch at a time also in a resumed run: a sum of rounded steps differs from one rounded product.
        while growth and self.grown_epochs < epoch:
            self.model.update_stochastic_depth_rate(growth)
            self.grown_epochs += 1

    def begin_step(self, step: int):
        """Call this before each step of the optimizer; `step` is the number of steps so far."""
        self.schedules.draw(step)

    def end_step(self):
        """Call this after each step of the optimizer."""
        self.schedules.restore()
        if self.average:
            self.average.update()

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
            f"{', '.join(names)}. The last checkpoint in {self.output_dir} is from an earlier step. Lower the "
            "learning rate, clip gradients with `max_grad_norm=1`, or check these files."
        )

    def final_weights(self) -> contextlib.AbstractContextManager:
        """Inside the block the model has the weights that are saved: the moving average, if there is one."""
        return self.average.applied() if self.average else contextlib.nullcontext()

    def results(self, accelerator: Accelerator) -> contextlib.AbstractContextManager[Path]:
        """The block writes model and report into the folder that it gets, and then they are in the output folder."""
        return write_results(
            self.output_dir, is_main_process=self.is_main_process, wait_for_everyone=accelerator.wait_for_everyone
        )

    @contextlib.contextmanager
    def checkpoint(self, step: int, accelerator: Accelerator) -> Iterator[Path]:
        """The block writes the checkpoint of this step into the folder that it gets."""
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
            self.records.write(folder / BAD_IMAGES, self.is_main_process)
            if self.is_main_process:
                shutil.copyfile(self.output_dir / RECORD, folder / RECORD)


def make_loaders(args: Arguments, data: ImageData, image_processor, num_labels: int) -> tuple[DataLoader, DataLoader]:
    """The training and the validation loader of this process."""
    training, recipe = args.training, args.recipe
    common = {
        "rank": training.process_index,
        "world_size": training.world_size,
        "num_workers": training.dataloader_num_workers,
        "pin_memory": training.dataloader_pin_memory and training.device.type == "cuda",
    }
    train_loader = make_train_loader(
        data,
        args.data,
        train_transform(recipe, image_processor),
        batch_size=training.per_device_train_batch_size,
        seed=training.seed if training.data_seed is None else training.data_seed,
        repeats=recipe.repeated_augmentation,
        mix=batch_mixing(recipe, num_labels),
        **common,
    )
    validation_loader = make_validation_loader(
        data,
        args.data,
        validation_transform(image_processor),
        batch_size=training.per_device_eval_batch_size,
        **common,
    )
    return train_loader, validation_loader


def run_program(
    train: Callable[[TrainingRun], None],
    argv: list[str] | None = None,
    *,
    introduction: str | None = None,
    prog: str | None = None,
):
    """
    Reads the flags, sets a run up and trains.

    Args:
        train: the training program.
        argv, introduction, prog: as for `parse_arguments`.

    Raises:
        ValueError: in one line, for whatever is wrong with flags, data or model.
        StoppedError: in one line, for what stops the training, such as a full disk.
        OSError: for a file that cannot be read.
    """
    args = parse_arguments(argv, introduction, prog)
    logging.set_verbosity(args.training.get_process_log_level())
    run = TrainingRun(args)
    try:
        train(run)
    except (TrainingStopped, CheckpointError, DataError) as error:
        # Without the traceback, which keeps the workers of the loader alive for seconds.
        raise StoppedError(str(error)) from error.with_traceback(None)
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno in FULL_DISK:
            message = f"{error.filename or run.output_dir} cannot be written: {error.strerror}. Free some disk space"
            raise StoppedError(f"{message} and run the same command again.") from error.with_traceback(None)
        # Nobody foresaw this error, and its message alone does not say where it comes from.
        traceback.print_exc()
        raise


def is_due(strategy: str, every: float, step: int, steps_per_epoch: int) -> bool:
    """Whether a custom loop saves, evaluates or logs after this step, by the Trainer's names of strategies."""
    if strategy == "epoch":
        return step % steps_per_epoch == 0
    return strategy == "steps" and step % int(every) == 0
