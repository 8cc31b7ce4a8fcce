"""
Fine-tune a trained ViT on your classes: as it is, and pooled in every way at two speeds, each with and without a
recovery first, equally long and with three seeds.

    python examples/research/pooled_fine_tuning.py --vit deit_tiny.safetensors \
        --train_dir flowers/train --validation_dir flowers/test --output_dir outputs/flowers

`--vit` is a ViT that `hpool-vit convert` reads. The recovery sees the photos of `--train_dir` without their labels.
What is finished is not repeated, and `--dry_run` prints the commands. At the end compare_runs.py writes the table and
the curves to OUTPUT_DIR/comparison. What follows `--` goes to `hpool-vit train`: on a CPU with units for bfloat16,
`-- --bf16 true --use_cpu true` is faster.
"""

import argparse
from itertools import pairwise
from pathlib import Path
from typing import Any

from training_runs import Step, add_common_arguments, comparison, hpool_vit, run_all, training


UNPOOLED, RECOVERED = "unpooled", "-recovered"
# The merging schedules are those that `hpool-vit speed-up --faster 2.3 3` found on 128 photos for training of
# flowers. Windows of the paper lie along the row of tokens; a window of the grid has 2 × 2 patches.
MERGE: dict[str, dict[str, Any]] = {
    "2.3": {"hvt_pool": "1,2,3,4,5,6", "tokens": (196, 179, 146, 129, 96, 64, 37)},
    "3": {"hvt_pool": "0,2,3,4,5,6,7,8", "tokens": (196, 158, 131, 104, 77, 51, 26, 15, 11)},
}
ROW = {"pool_kernel_size": "3", "pool_stride": "2", "use_class_token": "false"}
GRID = {"pool_kernel_size": "2,2", "pool_stride": "2,2", "use_class_token": "false"}
# What `hpool-vit convert` is told, for each model.
MODELS: dict[str, dict[str, Any]] = {
    UNPOOLED: {"hvt_pool": "none"},
    **{
        f"merge-{speed}": {
            "pool_mode": "merge",
            "hvt_pool": schedule["hvt_pool"],
            "merge_ratio": ",".join(str((before - after) / before) for before, after in pairwise(schedule["tokens"])),
        }
        for speed, schedule in MERGE.items()
    },
    **{
        f"{mode}-{kind}-{speed}": {"pool_mode": mode, **windows, "hvt_pool": blocks}
        for kind, windows, schedules in (
            ("grid", GRID, {"2.3": "3", "3": "2,9"}),
            ("row", ROW, {"2.3": "2,6", "3": "1,5,9"}),
        )
        for speed, blocks in schedules.items()
        for mode in ("avg", "max")
    },
}
SETTINGS = {
    "recipe": "finetune",
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "eval_strategy": "epoch",
    "logging_steps": 20,
}


def plan(args: argparse.Namespace) -> list[Step]:
    """The models are converted and recovered, then trained seed by seed, so that a stop leaves whole seeds."""
    starts = args.output_dir / "starts"

    def start(name: str, *words: Any, **flags: Any) -> Step:
        folder = starts / name
        return Step(hpool_vit(*words, **flags, output_dir=folder), folder / "config.json")

    sources = dict.fromkeys(name.removesuffix(RECOVERED) for name in args.models)
    steps = [start(name, "convert", args.vit, **MODELS[name]) for name in sources]
    for name in args.models:
        if name.endswith(RECOVERED):
            taught = {"teacher": args.vit, "images": args.train_dir, "effort": args.effort}
            steps.append(start(name, "recover", starts / name.removesuffix(RECOVERED), **taught))
    settings = {**SETTINGS, "num_train_epochs": args.num_train_epochs}
    settings |= {"train_dir": args.train_dir, "validation_dir": args.validation_dir}
    return steps + [
        training(args.output_dir, name, seed, *args.further, **settings, model_name_or_path=starts / name)
        for seed in args.seeds
        for name in args.models
    ]


def main(argv: list[str] | None = None) -> None:
    names = [*MODELS, *(name + RECOVERED for name in MODELS if name != UNPOOLED)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vit", required=True, help="a ViT that `hpool-vit convert` reads")
    parser.add_argument("--train_dir", type=Path, required=True, help="photos in folders named by their class")
    parser.add_argument("--validation_dir", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=names, default=names, metavar="NAME", help="default: all")
    parser.add_argument("--effort", default="6", help="of each recovery (default: %(default)s epochs)")
    parser.add_argument("--num_train_epochs", type=int, default=3, help="default: %(default)s")
    add_common_arguments(parser)
    parser.add_argument("further", nargs="*", metavar="FLAG", help="after `--`: flags of `hpool-vit train`")
    args = parser.parse_args(argv)
    steps = plan(args)
    run_all(steps, comparison(args.output_dir, steps, args.models[0]), args.dry_run)


if __name__ == "__main__":
    main()
