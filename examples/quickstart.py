"""
From nothing to a classified image: train a small HPool-ViT on handwritten digits with the Trainer and save it. Then a
new process, which has only the saved folder, classifies the test images with a pipeline.

    python examples/quickstart.py [--output_dir outputs/quickstart]
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd

from hpool_vit.toolkit import load_digits_dataset


RESULTS_NAME = "quickstart.json"
SHEET_NAME = "test_images.png"


def claim_output_dir(output_dir: Path):
    """Makes the folder, or reuses one that an earlier run made. Any other folder is left alone."""
    is_empty = output_dir.is_dir() and not any(output_dir.iterdir())
    if output_dir.exists() and not is_empty and not (output_dir / RESULTS_NAME).is_file():
        sys.exit(
            f"--output_dir {output_dir} exists and was not made by this script (it has no {RESULTS_NAME}): choose "
            "another folder, or remove it."
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / RESULTS_NAME).write_text("{}\n")


def compute_metrics(prediction) -> dict[str, float]:
    import evaluate

    from hpool_vit.toolkit.training.evaluation import METRICS

    metric = evaluate.load(str(METRICS / "topk_accuracy"))
    return metric.compute(predictions=prediction.predictions, references=prediction.label_ids)


def train(output_dir: Path, num_train_epochs: float, seed: int) -> dict:
    """Trains on the training digits, saves model and image processor, and returns the results on the test digits."""
    import torch
    from torchvision.transforms import v2
    from transformers import DefaultDataCollator, Trainer, TrainingArguments, set_seed

    from hpool_vit import HPoolViTConfig, HPoolViTForImageClassification, HPoolViTImageProcessor

    # At every small product each thread waits for the others: with more than one, training takes a little less time on
    # an idle machine, and several times as long while another process computes.
    torch.set_num_threads(1)
    set_seed(seed)
    digits = load_digits_dataset()
    names = digits["train"].features["label"].names
    config = HPoolViTConfig(
        image_size=32,
        patch_size=4,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        hvt_pool=[1, 3],
        ln_order="pre",
        drop_path_rate=0.1,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    model = HPoolViTForImageClassification(config)
    # The scans have no margin to crop, so they fill the whole input of the model.
    image_processor = HPoolViTImageProcessor.for_config(config, size={"height": 32, "width": 32}, do_center_crop=False)
    # Digits keep their meaning when they are turned, shifted and scaled a little, but not when they are flipped.
    augment = v2.RandomAffine(degrees=10, translate=(0.1, 0.1), scale=(0.85, 1.15))

    def prepare(batch, augment=None):
        images = batch["image"] if augment is None else [augment(image) for image in batch["image"]]
        return {"pixel_values": image_processor(images, return_tensors="pt").pixel_values, "labels": batch["label"]}

    arguments = TrainingArguments(
        output_dir=str(output_dir),
        num_train_epochs=num_train_epochs,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=180,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        weight_decay=0.05,
        eval_strategy="epoch",
        save_strategy="no",
        logging_strategy="epoch",
        report_to="none",
        remove_unused_columns=False,
        seed=seed,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=digits["train"].with_transform(lambda batch: prepare(batch, augment)),
        eval_dataset=digits["test"].with_transform(prepare),
        processing_class=image_processor,
        data_collator=DefaultDataCollator(),
        compute_metrics=compute_metrics,
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    metrics = trainer.evaluate()
    trainer.save_model()
    return {
        "top1": metrics["eval_top1"],
        "top5": metrics["eval_top5"],
        "train_seconds": round(seconds, 1),
        "train_images_per_second": round(len(digits["train"]) * num_train_epochs / seconds, 1),
        "parameters": model.num_parameters(),
        "tokens_per_stage": config.tokens_per_stage(),
        "torch": torch.__version__,
    }


def classify(output_dir: Path) -> dict:
    """Classifies the test digits with only the saved folder, and draws them. It runs in a new process."""
    import torch
    from transformers import pipeline

    torch.set_num_threads(1)

    classifier = pipeline("image-classification", model=str(output_dir), trust_remote_code=True)
    test = load_digits_dataset()["test"]
    answers = classifier(list(test["image"]), batch_size=64, top_k=1)
    labels = [test.features["label"].int2str(label) for label in test["label"]]
    table = pd.DataFrame(
        {
            "digit": labels,
            "predicted": [answer[0]["label"] for answer in answers],
            "confidence": [answer[0]["score"] for answer in answers],
        }
    )
    table["right"] = table["digit"] == table["predicted"]
    per_digit = table.groupby("digit").agg(images=("right", "size"), right=("right", "sum"), share=("right", "mean"))
    print(per_digit.assign(share=per_digit["share"].map("{:.1%}".format)).to_string())
    draw_sheet(test["image"], table, output_dir / SHEET_NAME)
    return {"pipeline_top1": float(table["right"].mean()), "wrong": int((~table["right"]).sum())}


def draw_sheet(images, table: pd.DataFrame, file: Path, rows: int = 6, columns: int = 10):
    """Draws test images with the predicted label and its confidence: the wrong ones first, in red."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    order = np.argsort(table["right"].to_numpy(), kind="stable")[: rows * columns]
    figure, axes = plt.subplots(rows, columns, figsize=(columns * 1.1, rows * 1.35))
    for axis, index in zip(axes.flat, order, strict=False):
        row = table.iloc[index]
        axis.imshow(images[int(index)], cmap="gray")
        title = f"{row.predicted}  {row.confidence:.0%}" + ("" if row.right else f"\n(is {row.digit})")
        axis.set_title(title, fontsize=8, color="black" if row.right else "red")
        if not row.right:
            axis.add_patch(plt.Rectangle((-0.5, -0.5), 8, 8, fill=False, edgecolor="red", linewidth=4))
    for axis in axes.flat:
        axis.axis("off")
    figure.suptitle(f"Predicted digit and confidence; wrong in red: {(~table['right']).sum()} of {len(table)}")
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--num_train_epochs", type=float, default=22)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--classify_only", action="store_true", help="classify with the folder of an earlier run")
    args = parser.parse_args()
    results_file = args.output_dir / RESULTS_NAME

    if args.classify_only:
        if not results_file.is_file():
            sys.exit(
                f"--output_dir {args.output_dir} has no model of this script: run it without --classify_only first."
            )
        results = {**json.loads(results_file.read_text()), **classify(args.output_dir)}
        results_file.write_text(json.dumps(results, indent=2) + "\n")
        return

    claim_output_dir(args.output_dir)
    results = train(args.output_dir, args.num_train_epochs, args.seed)
    results_file.write_text(json.dumps(results, indent=2) + "\n")
    # A new process that never imports the package: what it can do, every user of the folder can do.
    subprocess.run([sys.executable, __file__, "--classify_only", "--output_dir", args.output_dir], check=True)
    results = json.loads(results_file.read_text())
    print(f"\ntop-1 {results['top1']:.2%}, top-5 {results['top5']:.2%} on 360 test images (Trainer)")
    print(f"top-1 {results['pipeline_top1']:.2%} in a fresh process through the pipeline, {results['wrong']} wrong")
    print(f"tokens per stage {results['tokens_per_stage']}, trained in {results['train_seconds']} s")
    print(f"model: {args.output_dir}\npicture: {args.output_dir / SHEET_NAME}")


if __name__ == "__main__":
    main()
