"""
Fine-tune an HPool-ViT on a folder of images with the Trainer. Copy this program and change it.

    python examples/run_image_classification.py --train_dir photos \
        --model_name_or_path facebook/deit-small-patch16-224 --hvt_pool 1,5,9 --output_dir outputs/photos

`hpool-vit train` has many more flags and needs no program. This one is for what no flag does: it builds on the same
data, recipes and metrics, and everything else is plain Transformers.
"""

import argparse

from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import EvalPrediction

from hpool_vit import HPoolViTConfig
from hpool_vit.configuration_hpool_vit import PRESETS
from hpool_vit.toolkit import (
    DataArguments,
    compute_metrics,
    final_report,
    load_image_data,
    make_optimizer,
    recipe_arguments,
    train_transform,
    training_settings,
    validation_transform,
    write_model_card,
)
from hpool_vit.toolkit.data.sources import ImageData, ImageSource
from hpool_vit.toolkit.shared.console import parse_value
from hpool_vit.toolkit.shared.images import decode_image, read_image
from hpool_vit.toolkit.training.model import labels_of, new_model, start_from
from hpool_vit.toolkit.training.recipes import RecipeArguments


RECIPE = "finetune"


class Images(Dataset):
    """The images of a folder as the Trainer takes them."""

    def __init__(self, source: ImageSource, transform):
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return self.source.num_images

    def __getitem__(self, index: int) -> dict:
        example = self.source.dataset[int(self.source.rows[index])]
        image, _ = decode_image(read_image(self.source.image(example)))
        return {"pixel_values": self.transform(image), "labels": int(self.source.labels[index])}


def load_model(name: str, hvt_pool: str | None, recipe: RecipeArguments, label_names: list[str]):
    """A preset with new weights, a trained HPool-ViT, or a converted ViT, with its image processor."""
    overrides = labels_of(label_names)
    if hvt_pool is not None:
        overrides["hvt_pool"] = parse_value("hvt_pool", hvt_pool)
    if name in PRESETS:
        return new_model(HPoolViTConfig.from_preset(name, **overrides), recipe)
    model, image_processor, notes = start_from(name, recipe, overrides)
    print("\n".join(notes))
    return model, image_processor


def make_trainer(args: argparse.Namespace, data: ImageData) -> Trainer:
    recipe = recipe_arguments(RECIPE)
    model, image_processor = load_model(args.model_name_or_path, args.hvt_pool, recipe, data.class_names)
    settings = training_settings(RECIPE) | {
        "lr_scheduler_type": "cosine",
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "save_total_limit": 1,
        "report_to": "none",
    }
    if args.num_train_epochs is not None:
        settings["num_train_epochs"] = args.num_train_epochs
    training = TrainingArguments(output_dir=args.output_dir, seed=args.seed, use_cpu=args.use_cpu, **settings)
    return Trainer(
        model=model,
        args=training,
        train_dataset=Images(data.train, train_transform(recipe, image_processor)),
        eval_dataset=Images(data.validation, validation_transform(image_processor)),
        processing_class=image_processor,
        compute_metrics=metrics_of,
        # The learning rate falls from the head to the embeddings, and norms and biases are not decayed.
        optimizers=(make_optimizer(model, training.learning_rate, recipe, training), None),
    )


def metrics_of(prediction: EvalPrediction) -> dict[str, float]:
    return compute_metrics(prediction.predictions, prediction.label_ids)


def report(trainer: Trainer, data: ImageData, settings: dict):
    """Evaluates the final weights, and writes the confusion matrix and the model card into the output folder."""
    prediction = trainer.predict(trainer.eval_dataset, metric_key_prefix="eval")
    if not trainer.is_world_process_zero():
        return
    output_dir = trainer.args.output_dir
    results = final_report(prediction.predictions, prediction.label_ids, data.class_names, output_dir)
    write_model_card(
        output_dir,
        model=trainer.model,
        label_names=data.class_names,
        recipe=settings,
        data={"name": data.train.description, "validation": data.validation.description},
        results={name: prediction.metrics[f"eval_{name}"] for name in ("top1", "top5")},
        pictures={"Confusion matrix": "confusion_matrix.png"},
    )
    print(f"top-1 {prediction.metrics['eval_top1']:.2%} on {results['num_images']} images, saved in {output_dir}")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_dir", required=True, help="folder with one sub-folder of images per class")
    parser.add_argument("--validation_dir", help="the same for validation; default: a tenth of the training images")
    parser.add_argument("--model_name_or_path", required=True, help="preset, or HPool-ViT or ViT to start from")
    parser.add_argument("--hvt_pool", help="blocks that pool their input, such as 1,5,9; default: the model's own")
    parser.add_argument("--output_dir", required=True, help="gets the model, checkpoints and model card")
    parser.add_argument("--num_train_epochs", type=float, help=f"default: that of the recipe {RECIPE}")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--use_cpu", action="store_true")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None):
    args = parse_args(argv)
    data = load_image_data(DataArguments(train_dir=args.train_dir, validation_dir=args.validation_dir), args.seed)
    trainer = make_trainer(args, data)
    trainer.train()
    trainer.save_model()
    report(trainer, data, vars(args) | {"recipe": RECIPE})


if __name__ == "__main__":
    main()
