"""Trains saved models, one by one, on fixed random images with the Trainer, and prints the loss of every step.

    python train.py OUTPUT STEPS FOLDER… [--remote] [--batch_size N] [--resume]

OUTPUT gets a folder for each. `--remote` loads the code in the folders instead of the package. Runs in one process, or
in many under torchrun.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments


class RandomImages(torch.utils.data.Dataset):
    """Images whose class can be told from their brightness."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.randn(3, 32, 32, generator=generator) + index % 3, "labels": index % 3}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("steps", type=int)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--remote", action="store_true")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    if not args.remote:
        import hpool_vit  # noqa: F401 - registers the classes

    for folder in args.folders:
        trainer = train(folder, args)
    # A process that ends while its peers' threads still talk to it may abort.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def train(folder: Path, args: argparse.Namespace) -> Trainer:
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=args.remote)
    assert type(model).__module__.startswith("transformers_modules") == args.remote
    arguments = TrainingArguments(
        output_dir=str(args.output / folder.name),
        max_steps=args.steps,
        save_steps=2,
        logging_steps=1,
        per_device_train_batch_size=args.batch_size,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=RandomImages(),
        processing_class=AutoImageProcessor.from_pretrained(folder, trust_remote_code=args.remote),
    )
    trainer.train(resume_from_checkpoint=args.resume or None)
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        weights = sum(parameter.double().abs().sum().item() for parameter in model.parameters())
        print("RESULT " + json.dumps({"losses": losses, "weights": weights, "processes": arguments.world_size}))
    return trainer


main()
