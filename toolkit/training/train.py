"""The command `hpool-vit train`: trains or fine-tunes HPool-ViT for image classification with the Trainer."""

import inspect
from pathlib import Path
from typing import Any

import torch
import typer
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput

from ..shared.console import needs


with needs("train"):
    from .arguments import flag_names
    from .checkpoints import find_last_checkpoint
    from .optimization import make_optimizer
    from .report import write_report
    from .run import TrainingRun, run_program


class RecipeCallback(TrainerCallback):
    """What happens between the steps: shuffling, stochastic depth, schedules and the moving average."""

    def __init__(self, run: TrainingRun, checkpoint: Path | None):
        self.run, self.checkpoint = run, checkpoint

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.run.start_average(model, self.checkpoint)
        self.run.speed.measure(state.global_step)

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.run.begin_epoch(state.global_step // self.run.steps_per_epoch)

    def on_step_begin(self, args, state, control, **kwargs):
        self.run.begin_step(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        self.run.end_step()


class RecipeTrainer(Trainer):
    """The Trainer with the loaders, optimizer, loss, evaluation and checkpoints of a [`TrainingRun`]."""

    def __init__(self, run: TrainingRun, checkpoint: Path | None):
        super().__init__(
            model=run.model,
            args=run.args.training,
            train_dataset=run.train_loader.dataset,
            eval_dataset=run.validation_loader.dataset,
            processing_class=run.image_processor,
            callbacks=[RecipeCallback(run, checkpoint)],
        )
        self.run = run
        # The loss is a mean over the batch, which the Trainer divides by the number of accumulated steps.
        self.model_accepts_loss_kwargs = False

    def get_train_dataloader(self):
        self.run.compute_features(self.accelerator)
        return self.run.train_loader

    def get_eval_dataloader(self, eval_dataset=None):
        return self.run.validation_loader

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            run = self.run
            self.optimizer = make_optimizer(model or self.model, run.learning_rate, run.args.recipe, self.args)
        return self.optimizer

    def training_step(self, model, inputs: dict[str, Any], num_items_in_batch=None) -> torch.Tensor:
        names = self.run.records.take_names(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.run.check_loss(loss, self.state.global_step + 1, self._get_learning_rate(), names)
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return self.run.batch_loss(model, inputs, self.accelerator.autocast)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if self.run.average:
            with self.run.average.applied():
                metrics |= super().evaluate(eval_dataset, ignore_keys, f"{metric_key_prefix}_ema")
        return metrics

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        metrics = self.run.evaluator.evaluate(self.model_wrapped, self.accelerator)
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=named, num_samples=metrics["images"])

    def log(self, logs: dict[str, float], start_time: float | None = None):
        if "loss" in logs:
            logs |= self.run.speed.measure(self.state.global_step)
        super().log(logs, start_time)

    def _save_checkpoint(self, model, trial):
        with self.run.checkpoint(self.state.global_step, self.accelerator) as folder:
            super()._save_checkpoint(model, trial)
            if self.run.average:
                with self.run.average.applied():
                    self.save_model(str(folder / "ema"), _internal_call=True)

    def create_model_card(self, **kwargs):
        """Nothing: the report writes the card."""


def train(run: TrainingRun):
    """Trains to the end, from the last complete checkpoint if there is one, and writes model and report."""
    checkpoint = find_last_checkpoint(run.output_dir)
    # A checkpoint is removed only when a newer one is complete, which the Trainer does not ensure.
    run.args.training.save_total_limit = None
    trainer = RecipeTrainer(run, checkpoint)
    run.start(checkpoint)
    result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    metrics = {**result.metrics, **trainer.evaluate()}
    with run.final_weights():
        with run.results(trainer.accelerator) as folder:
            trainer.save_model(str(folder), _internal_call=True)
            write_report(run, folder, trainer.model_wrapped, trainer.accelerator, metrics, trainer.state.log_history)
            if run.is_main_process:
                trainer.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        # This saves the model again.
        if run.args.training.push_to_hub:
            trainer.push_to_hub()
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


# All words go to the parser of the training flags, which has its own `--help`.
COMMAND_SETTINGS = {
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
    "add_help_option": False,
}
COMMAND_FLAGS = flag_names()


def command(context: typer.Context) -> None:
    """
    Train or fine-tune an HPool-ViT on your images.

    Fine-tune a ViT from the Hub on a folder with one sub-folder of images per class:

        hpool-vit train --train_dir photos --model_name_or_path facebook/deit-small-patch16-224 --hvt_pool 1,5,9 \\
            --output_dir outputs/photos

    Train one of the paper's models from scratch on 8 GPUs:

        torchrun --nproc_per_node 8 -m hpool_vit.toolkit.command train --preset hvt-s-1 \\
            --dataset_name imagenet-1k --output_dir outputs/hvt-s-1

    The output folder holds the model, ready for from_pretrained and pipelines, its model card, the log and pictures.
    The same command resumes from the last complete checkpoint in that folder.
    """
    run_program(train, context.args, introduction=inspect.getdoc(command), prog="hpool-vit train")
