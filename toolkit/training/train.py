"""
Trains or fine-tunes HPool-ViT for image classification with the Trainer.

    python run_image_classification.py configs/digits.yaml
    python run_image_classification.py --train_dir photos/train --validation_dir photos/val --recipe finetune \
        --model_name_or_path facebook/deit-small-patch16-224 --output_dir outputs/photos

The same command goes on from the last complete checkpoint in --output_dir. Under torchrun or `accelerate launch` it
runs on many processes.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from .checkpoints import find_last_checkpoint
from .run import TrainingRun, run_program


class RecipeCallback(TrainerCallback):
    """What happens between the steps: shuffling, stochastic depth, schedules and the moving average."""

    def __init__(self, run: TrainingRun, checkpoint: Path | None):
        self.run, self.checkpoint = run, checkpoint

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.run.start_average(model, self.checkpoint)
        self.run.speed(state.global_step)

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.run.begin_epoch(state.global_step // self.run.steps_per_epoch)

    def on_step_begin(self, args, state, control, **kwargs):
        self.run.begin_step(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        self.run.end_step()


class RecipeTrainer(Trainer):
    """The Trainer with the loaders, the optimiser, the loss and the checkpoints of a [`TrainingRun`]."""

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
        # The loss below is a mean over the batch, which the Trainer divides by the accumulated steps.
        self.model_accepts_loss_kwargs = False

    def get_train_dataloader(self):
        return self.run.train_loader

    def get_eval_dataloader(self, eval_dataset=None):
        return self.run.validation_loader

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            self.optimizer = self.run.make_optimizer(model or self.model)
        return self.optimizer

    def training_step(self, model, inputs: dict[str, Any], num_items_in_batch=None) -> torch.Tensor:
        names = self.run.take_names(inputs)
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
        metrics = self.run.evaluate(self.model_wrapped, self.accelerator)
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=named, num_samples=metrics["images"])

    def log(self, logs: dict[str, float], start_time: float | None = None):
        if "loss" in logs:
            logs |= self.run.speed(self.state.global_step)
        super().log(logs, start_time)

    def _save_checkpoint(self, model, trial):
        with self.run.checkpoint(self.state.global_step, self.accelerator) as folder:
            super()._save_checkpoint(model, trial)
            if self.run.average:
                with self.run.average.applied():
                    self.save_model(str(folder / "ema"), _internal_call=True)

    def create_model_card(self, **kwargs):
        """Written by the report, with recipe, data, results and hardware."""


def train(run: TrainingRun):
    checkpoint = find_last_checkpoint(run.output_dir)
    # Checkpoints are removed when the new one is complete, and not before.
    run.args.training.save_total_limit = None
    trainer = RecipeTrainer(run, checkpoint)
    run.start()
    run.resume(checkpoint)
    result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    metrics = {**result.metrics, **trainer.evaluate()}
    with run.final_weights():
        trainer.save_model()
        run.report(trainer.model_wrapped, trainer.accelerator, metrics, trainer.state.log_history)
    trainer.save_metrics("all", metrics, combined=False)
    trainer.save_state()
    if run.args.training.push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def main(argv: list[str] | None = None):
    run_program(__doc__, train, argv)


if __name__ == "__main__":
    main()
