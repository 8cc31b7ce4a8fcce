"""
Compare windows on the grid of patches with windows along the row of tokens: the same training, the same number of
tokens after the same block, so the same MACs, three seeds.

    python examples/research/grid_against_sequence.py cifar10 --train_files cifar10/train.parquet \
        --validation_files cifar10/test.parquet --output_dir outputs/cifar10-windows
    python examples/research/grid_against_sequence.py flowers --model_name_or_path deit_tiny.safetensors \
        --train_files flowers/train.parquet --validation_files flowers/test.parquet \
        --output_dir outputs/flowers-windows

A window has four patches: four in a row, or 2 × 2. The paper's windows, three in a row with step 2, come with a
schedule of about as many MACs. Runs that are finished are not repeated, and `--dry_run` prints the commands. At the
end compare_runs.py writes the table and the curves to OUTPUT_DIR/comparison.
"""

import argparse
from pathlib import Path
from typing import Any

from training_runs import Step, add_common_arguments, comparison, run_all, training


CONFIGS = Path(__file__).resolve().parents[1] / "configs"
WINDOWS = {
    "row": {"pool_kernel_size": "4", "pool_stride": "4"},
    "grid": {"pool_kernel_size": "2,2", "pool_stride": "2,2"},
    "paper": {"pool_kernel_size": "3", "pool_stride": "2"},
}
POOL_MODES = ("max", "avg")
# The settings of hpool-vit train, and where each kind of windows pools. Tokens: 64 and 16 of the row and the grid, and
# 64, 31 and 15 of the paper's windows; for flowers 196 and 49, and 196, 97 and 48.
DATA: dict[str, dict[str, Any]] = {
    "cifar10": {
        "config": CONFIGS / "cifar10.yaml",
        "schedules": {"row": "1", "grid": "1", "paper": "1,2"},
        "settings": {"num_train_epochs": 32},
    },
    "flowers": {
        "config": CONFIGS / "ants_bees.yaml",
        "schedules": {"row": "4", "grid": "4", "paper": "3,6"},
        "settings": {"num_train_epochs": 10, "use_class_token": "false"},
    },
}


def models(data: str) -> dict[str, dict[str, str]]:
    """The fields of the configuration that tell the models apart, by name."""
    schedules = DATA[data]["schedules"]
    return {
        f"{mode}-{kind}": {"pool_mode": mode, **windows, "hvt_pool": schedules[kind]}
        for mode in POOL_MODES
        for kind, windows in WINDOWS.items()
    }


def trainings(args: argparse.Namespace) -> list[Step]:
    """Seed by seed, so that every model has as many when the program is stopped."""
    data = DATA[args.data]
    settings = {**data["settings"], "train_files": args.train_files, "validation_files": args.validation_files}
    settings["model_name_or_path"] = args.model_name_or_path
    settings |= {"num_train_epochs": args.num_train_epochs} if args.num_train_epochs else {}
    return [
        training(args.output_dir, name, seed, data["config"], **settings, **fields)
        for seed in args.seeds
        for name, fields in models(args.data).items()
    ]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=DATA)
    parser.add_argument("--train_files", required=True)
    parser.add_argument("--validation_files", required=True)
    parser.add_argument("--model_name_or_path", help="ViT to start from; needed for flowers")
    parser.add_argument("--num_train_epochs", type=int, help="default: as in the results of other trainings")
    add_common_arguments(parser)
    args = parser.parse_args(argv)
    if args.data == "flowers" and not args.model_name_or_path:
        parser.error("flowers needs --model_name_or_path: the photos are too few to train on from scratch")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    steps = trainings(args)
    run_all(steps, comparison(args.output_dir, steps, f"{POOL_MODES[0]}-row"), args.dry_run)


if __name__ == "__main__":
    main()
