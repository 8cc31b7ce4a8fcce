"""
Fine-tune an HPool-ViT for semantic segmentation with the Trainer. Copy this program and change it.

    python examples/run_semantic_segmentation.py --train photos/train --validation photos/validation \
        --class_names road,sky,tree --model_name_or_path facebook/deit-tiny-patch16-224 --output_dir outputs/streets

A folder holds `images` and `masks`, files of the same names, and a pixel of a mask is the number of its class; Parquet
files with two columns of images do as well. Run the same command again to resume after a kill.
"""

import argparse
from pathlib import Path

from transformers import Trainer, TrainingArguments

from hpool_vit.toolkit.dense.augmentation import train_pair_transform, validation_pair_transform
from hpool_vit.toolkit.dense.data import MaskedImages, SegmentationDataset, load_masked_images, read_class_names
from hpool_vit.toolkit.dense.evaluation import count_batch
from hpool_vit.toolkit.dense.model import HEADS, start_segmenter
from hpool_vit.toolkit.dense.training import (
    last_checkpoint,
    make_segmenter_optimizer,
    segmentation_metrics,
    write_segmentation_report,
)
from hpool_vit.toolkit.shared.console import parse_value


# What each way to pool is in the configuration. `max` pools the grid too, and needs more training than `avg`.
POOLINGS = {
    "none": {"hvt_pool": None},
    "merge": {"pool_mode": "merge"},
    "avg": {"pool_mode": "avg", "pool_kernel_size": (2, 2), "pool_stride": (2, 2), "hvt_pool": [9]},
    "max": {"pool_mode": "max", "pool_kernel_size": (2, 2), "pool_stride": (2, 2), "hvt_pool": [9]},
}


def load_model(args: argparse.Namespace):
    overrides = dict(POOLINGS[args.pooling]) if args.pooling else {}
    if args.hvt_pool is not None:
        overrides["hvt_pool"] = parse_value("hvt_pool", args.hvt_pool)
    model, image_processor, notes = start_segmenter(
        args.model_name_or_path,
        args.head,
        args.class_names,
        args.image_size,
        out_indices=args.out_indices,
        **overrides,
    )
    print("\n".join(notes))
    return model, image_processor


def make_trainer(args: argparse.Namespace, train: MaskedImages, validation: MaskedImages) -> Trainer:
    model, image_processor = load_model(args)
    training = TrainingArguments(
        output_dir=args.output_dir,
        num_train_epochs=args.num_train_epochs,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="polynomial",
        warmup_steps=0.05,
        max_grad_norm=1.0,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        logging_steps=10,
        dataloader_num_workers=args.num_workers,
        remove_unused_columns=False,
        report_to="none",
        seed=args.seed,
        use_cpu=args.use_cpu,
    )
    return Trainer(
        model=model,
        args=training,
        train_dataset=SegmentationDataset(train, train_pair_transform(image_processor)),
        eval_dataset=SegmentationDataset(validation, validation_pair_transform(image_processor)),
        processing_class=image_processor,
        compute_metrics=segmentation_metrics,
        # Of each batch only the counts of pixels are kept, whatever the size of the images.
        preprocess_logits_for_metrics=count_batch,
        optimizers=(make_segmenter_optimizer(model, args.learning_rate, args.weight_decay), None),
    )


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="folder with images and masks, or Parquet files")
    parser.add_argument("--validation", required=True, help="the same for validation")
    parser.add_argument("--class_names", required=True, type=read_class_names, help="names with commas, or a file")
    parser.add_argument("--ignored", type=int, nargs="*", default=[], help="numbers in masks that do not count")
    parser.add_argument("--image_column", help="column of Parquet files; default: the one that holds images")
    parser.add_argument("--mask_column", help="column of Parquet files; default: annotation, mask or label")
    parser.add_argument("--model_name_or_path", required=True, help="HPool-ViT or ViT to start from")
    parser.add_argument("--head", choices=HEADS, default="linear")
    parser.add_argument("--pooling", choices=POOLINGS, help="default: the model's own; a ViT needs one of them")
    parser.add_argument("--hvt_pool", help="blocks that pool their input, such as 3,9")
    parser.add_argument(
        "--out_indices",
        type=int,
        nargs="+",
        metavar="BLOCKS",
        help="after how many blocks the head reads a map; default: the middle and the last for the linear head, four "
        "for UperNet, and the last of each resolution if the grid is pooled",
    )
    parser.add_argument("--image_size", type=int, nargs=2, default=(512, 512), help="height and width in pixels")
    parser.add_argument("--output_dir", required=True, help="gets the model, checkpoints, pictures and model card")
    parser.add_argument("--num_train_epochs", type=float, default=30)
    parser.add_argument("--batch_size", type=int, default=8, help="images per step and device")
    parser.add_argument("--learning_rate", type=float, default=1e-4, help="of the trunk; the head's is 10 times that")
    parser.add_argument("--weight_decay", type=float, default=0.05)
    parser.add_argument("--num_workers", type=int, default=0, help="processes that read images")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--use_cpu", action="store_true")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None):
    args = parse_args(argv)
    columns = {"image_column": args.image_column, "mask_column": args.mask_column}
    train, validation = (
        load_masked_images(source, args.class_names, ignored=tuple(args.ignored), **columns)
        for source in (args.train, args.validation)
    )
    trainer = make_trainer(args, train, validation)
    checkpoint = last_checkpoint(args.output_dir)
    if checkpoint:
        print(f"resuming from {checkpoint}", flush=True)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    if args.head != "linear" and trainer.is_world_process_zero():
        # For people without the package: a head's folder has no code of its backbone.
        trainer.model.backbone.save_pretrained(Path(args.output_dir) / "backbone")
    data = {
        "training": f"{len(train)} images of {Path(args.train).name}",
        "validation": f"{len(validation)} of {Path(args.validation).name}",
    }
    results = write_segmentation_report(trainer, validation, args.class_names, vars(args), data)
    print(f"mean IoU {results['mean_iou']:.2%} on {len(validation)} images, saved in {args.output_dir}")


if __name__ == "__main__":
    main()
