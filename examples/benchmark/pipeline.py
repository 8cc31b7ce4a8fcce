"""
Measure where the time goes between an image file and its class, and the images per second of the whole way.

    python examples/benchmark/pipeline.py --models vit-ti hvt-ti-1 --images_dir photos --output outputs/pipeline

The ways (--ways):

    pipeline         Transformers' `pipeline("image-classification")` on file names with its defaults: one process
    pipeline-workers the same with `num_workers`: other processes decode and prepare the images
    dataloader       a DataLoader whose workers decode with Pillow and run the image processor on each batch
    dataloader-pil   the same with the image processor's Pillow backend
    device           workers only decode; the image processor runs on the whole batch on --device
    device-draft     the same, but Pillow decodes large JPEGs at a half, quarter or eighth of their size, as long as
                     that is not below the target size: much less work, with slightly different pixels

Each way is measured twice: with a clock around each step, all in one process, and as a whole with its workers. Models
and ways take turns in every round. All models get the same image processor. The program writes OUTPUT.json and
OUTPUT.md.
"""

import argparse
import os
import shlex
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from models import find_model
from torch import nn
from torchvision.transforms.v2.functional import to_pil_image
from ways import STEPS, WAYS, Clock, Way, processors_for

from hpool_vit.toolkit.export.export import random_images
from hpool_vit.toolkit.shared.console import run
from hpool_vit.toolkit.shared.files import write_json
from hpool_vit.toolkit.shared.folders import list_images
from hpool_vit.toolkit.shared.measuring import format_table, quartiles, timer


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def find_images(directory: Path, number: int) -> list[Path]:
    """The first `number` images of a folder and its sub-folders."""
    files = list_images(directory).files
    if not files:
        raise ValueError(f"--images_dir {directory} has no images.")
    return [Path(file) for file in files[:number]]


def make_photos(folder: Path, number: int) -> list[Path]:
    """Writes JPEG files of 500 × 375 pixels, landscape and portrait, with colours as smooth as a photo's."""
    generator = torch.Generator().manual_seed(0)
    files = []
    for index in range(number):
        size = (375, 500) if index % 3 else (500, 375)
        image = (0.5 + 0.2 * random_images(1, 3, size, generator)[0]).clamp(0, 1)
        files.append(folder / f"{index}.jpg")
        to_pil_image(image).save(files[-1], quality=90)
    return files


def build_models(args: argparse.Namespace) -> dict[str, nn.Module]:
    """
    The models by name.

    Raises:
        ValueError: if a model is not a Transformers model, which `pipeline` needs, or the image sizes differ.
    """
    models = {}
    for name in args.models:
        model = find_model(name)().eval().requires_grad_(False)
        if not hasattr(model, "config"):
            raise ValueError(f"--models {name}: a timm model has no pipeline; give Transformers models.")
        models[name] = model.to(args.device, DTYPES[args.dtype])
    sizes = {name: model.config.image_size for name, model in models.items()}
    if len(set(map(str, sizes.values()))) > 1:
        raise ValueError(f"--models: the models take images of different sizes, {sizes}; give models of one size.")
    return models


def measure(args: argparse.Namespace, files: list[Path]) -> list[dict[str, Any]]:
    """One record per way and model."""
    models = build_models(args)
    clock = Clock(args.device)
    processors = processors_for(next(iter(models.values())), clock)
    ways = [Way(name, files, processors, clock, args) for name in args.ways]
    turns = [(way, name) for way in ways for name in models]
    rates, seconds = defaultdict(list), defaultdict(list)
    for number in range(args.rounds + 1):
        first = number % len(turns)
        for way, name in turns[first:] + turns[:first]:
            start = timer(args.device)
            way.run(models[name], parallel=True)
            rate = len(files) / (timer(args.device) - start)
            with clock.measure() as steps:
                way.run(models[name], parallel=False)
            if number:  # the first round is the warm-up
                rates[way.name, name].append(rate)
                seconds[way.name, name].append(steps)
        print(f"round {number} of {args.rounds}", file=sys.stderr, flush=True)
    return [summarise(way.name, name, rates, seconds, args) for way, name in turns]


def summarise(way: str, name: str, rates: dict, seconds: dict, args: argparse.Namespace) -> dict[str, Any]:
    mine, base = rates[way, name], rates[way, args.reference]
    steps = {step: statistics.median(times[step] for times in seconds[way, name]) for step in STEPS}
    before = sum(steps.values()) - steps["forward"] - steps["answer"]
    return {
        "way": way,
        "model": name,
        "images_per_second": quartiles(mine),
        "faster": quartiles([rate / other for rate, other in zip(mine, base, strict=True)]),
        "ms_per_image": {step: float(f"{1e3 * value / args.num_images:.4g}") for step, value in steps.items()},
        "share": {step: round(value / sum(steps.values()), 4) for step, value in steps.items()},
        # How many times as fast as the model the steps before it are, in one process.
        "keeps_up": round(steps["forward"] / before, 3),
    }


def format_results(results: dict[str, Any]) -> str:
    machine, settings = results["machine"], results["settings"]
    header = ["way", "model", "images/s", f"faster than {settings['reference']}"]
    header += [f"{step} ms (share)" for step in STEPS] + ["before the model ÷ model"]
    rows = []
    for record in results["records"]:
        low, rate, high = record["images_per_second"]
        steps = [f"{record['ms_per_image'][step]:.3g} ({record['share'][step]:.0%})" for step in STEPS]
        faster = f"{record['faster'][1]:.2f} × ({record['faster'][0]:.2f}–{record['faster'][2]:.2f})"
        rate = f"{rate:.4g} ({low:.4g}–{high:.4g})"
        rows.append([record["way"], record["model"], rate, faster, *steps, f"{record['keeps_up']:.2f} ×"])
    lines = [
        "# From image files to classes",
        "",
        f"- command: `{results['command']}`",
        f"- machine: {machine['cpu']}, {machine['cpu_cores']} cores; GPUs: {', '.join(machine['gpus']) or 'none'}",
        f"- {settings['num_images']} images {results['images']}; batches of {settings['batch_size']}, "
        f"{settings['num_workers']} workers, {settings['threads']} threads, device {settings['device']}, "
        f"{settings['dtype']}, {settings['rounds']} rounds, load average at the start {results['load_average']}",
        "- versions: " + ", ".join(f"{name} {version}" for name, version in machine["versions"].items()),
        "",
        format_table(header, rows),
        "",
        "images/s: of the whole way with its workers, median (quartiles). The steps: ms per image and share, all in",
        "one process; *normalise* includes the crop, *other* is tensor conversion, stacking and the rest, *answer* is",
        "what the pipeline makes of the logits. The last column: speed of everything before the model as a multiple",
        "of the model's; above 1, the model is the limit.",
        "",
    ]
    return "\n".join(lines)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", default=["vit-ti", "hvt-ti-1"], metavar="NAME", help="default: vit-ti hvt-ti-1")
    add("--reference", help="the model that others are compared with (default: the first)")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="default: all")
    add("--images_dir", type=Path, help="folder of images (default: generated JPEGs of 500 × 375 pixels)")
    add("--num_images", type=int, default=128, help="the most images to use (default: %(default)s)")
    add("--batch_size", type=int, default=32, help="default: %(default)s")
    add("--num_workers", type=int, default=os.cpu_count(), help="default: one per core")
    add("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    add("--dtype", choices=DTYPES, default="float32", help="of the model (default: %(default)s)")
    add("--rounds", type=int, default=5, help="after one for warm-up (default: %(default)s)")
    add("--output", type=Path, default=Path("outputs/pipeline"), help="path of the files, without suffix")
    args = parser.parse_args(argv)
    for name in ("num_images", "batch_size", "threads", "rounds"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: give at least 1.")
    args.models, args.ways = (list(dict.fromkeys(values)) for values in (args.models, args.ways))
    args.reference = args.reference or args.models[0]
    if args.reference not in args.models:
        raise ValueError(f"--reference {args.reference} is not one of the models: {', '.join(args.models)}.")
    if args.images_dir and not args.images_dir.is_dir():
        raise ValueError(f"--images_dir {args.images_dir} is not a folder.")
    return args


def main(argv: list[str] | None = None):
    from hpool_vit.toolkit.training.report import describe_hardware

    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    load = [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None
    with tempfile.TemporaryDirectory() as scratch:
        if args.images_dir:
            files = find_images(args.images_dir, args.num_images)
        else:
            files = make_photos(Path(scratch), args.num_images)
        args.num_images = len(files)
        records = measure(args, files)
    results = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": describe_hardware(1),
        "load_average": load,
        "images": f"of {args.images_dir}" if args.images_dir else "generated, 500 × 375",
        "settings": {name: value for name, value in vars(args).items() if name not in ("images_dir", "output")},
        "records": records,
    }
    write_json(args.output.with_name(f"{args.output.name}.json"), results)
    text = format_results(results)
    args.output.with_name(f"{args.output.name}.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    run(main)
