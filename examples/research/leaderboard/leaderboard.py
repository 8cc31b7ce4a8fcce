"""
Compare ways to make a trained Vision Transformer faster without training it, with one counter of MACs and one table.

    python examples/research/leaderboard/leaderboard.py leaderboard --weights vit.safetensors --photos test.parquet
    python examples/research/leaderboard/leaderboard.py ingredients --weights vit.safetensors --photos test.parquet
    python examples/research/leaderboard/leaderboard.py schedules --weights vit.safetensors --photos test.parquet

`leaderboard` sets the rivals beside our rule, `ingredients` adds and leaves out the parts of the rule,
`schedules` compares blocks and numbers of tokens. `--weights` is any ViT with 12 blocks and 196 patches that
`hpool-vit convert` reads, with ImageNet's 1000 classes. `--photos` is a Parquet file with the columns `image` and
`label`.

A random half of the photos is for choosing (`--half choosing`), the other for reporting, the default of `leaderboard`
and `ingredients`. `schedules` sees only the half for choosing. Of photos by which nothing was chosen, `--half all`
reports on all. If their labels are numbers of their own, `--classes` translates them:

    python examples/research/leaderboard/leaderboard.py leaderboard --weights vit.safetensors --photos ants_bees \
        --half all --classes 310 309 --short_side 248 --name merging_ants_bees
"""

import argparse
import functools
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from network import Method
from photos import SPLIT_SEED, Photos, halves, load_photos, normalize
from rivals import ATC, DiffRate, ImportanceToMe, PiToMe, SizeRanked, ToMe
from rules import RULE, VERSION_01, Merging, Rule
from scores import Answers, Judge, bootstrap, interpolate
from torch import nn
from transformers.utils import logging

from hpool_vit.toolkit.conversion.vit import convert_vit
from hpool_vit.toolkit.shared.files import write_json
from hpool_vit.toolkit.shared.measuring import count_macs, format_table, measure_speed


OURS, OURS_IN_FEW, BEFORE, UNPOOLED = "ours", "ours, four stages", "version 0.1", "unpooled"
NUM_BLOCKS, NUM_PATCHES = 12, 196
# In the order of `halves`.
HALVES = ("choosing", "reporting")

# Blocks and the number of tokens that merge at each. In four stages, as in version 0.1 …
FEW_STAGES = [
    dict.fromkeys(blocks, number)
    for blocks, number in (
        ((3, 5, 7, 9), 23),
        ((3, 5, 7, 9), 37),
        ((2, 4, 6, 8), 39),
        ((1, 3, 5, 7), 37),
        ((1, 3, 5, 7), 42),
    )
]
# … and in seven or eight smaller ones, which the half for choosing prefers.
MANY_STAGES = [
    *(dict.fromkeys(range(3, 10), number) for number in (10, 16, 21)),
    *(dict.fromkeys(range(1, 9), number) for number in (17, 20, 22, 23)),
]

# DiffRate's published schedules for DeiT-Tiny, by GMACs: tokens left after pruning and after merging in each block.
DIFFRATE = {
    "0.6 G": (
        [197, 196, 180, 157, 130, 107, 86, 73, 63, 51, 40, 3],
        [197, 187, 167, 139, 114, 90, 76, 66, 57, 45, 37, 3],
    ),
    "0.7 G": (
        [197, 196, 194, 180, 150, 123, 98, 82, 68, 60, 52, 3],
        [197, 196, 192, 158, 133, 103, 88, 72, 64, 58, 49, 3],
    ),
    "0.9 G": (
        [197, 197, 196, 190, 182, 166, 141, 125, 113, 105, 99, 3],
        [197, 196, 194, 188, 172, 147, 129, 115, 107, 103, 96, 3],
    ),
}

# By method, how many tokens merge in every block; and for ATC, at each of three.
IN_EVERY_BLOCK = {
    "ToMe": (ToMe, (8, 12, 16, 18)),
    "ToMe, class importance": (ImportanceToMe, (12, 16)),
    "PiToMe": (PiToMe, (12, 16)),
    "size-ranked (ATM)": (SizeRanked, (12, 16)),
}
NUMBERS_OF_ATC = (40, 56)

# The ingredients of the rule, added one after the other to version 0.1 …
ADDED = {
    "version 0.1": VERSION_01,
    "+ Ward's factor": VERSION_01._replace(ward=True),
    "+ four rounds": VERSION_01._replace(ward=True, num_rounds=4),
    "+ length of merged tokens": VERSION_01._replace(ward=True, num_rounds=4, keeps_norm=True),
    "+ importance in the distance": RULE._replace(mean_power=0.0),
    "+ importance in the mean": RULE,
}
# … and changed, one at a time.
WITHOUT = {
    "without the length of merged tokens": RULE._replace(keeps_norm=False),
    "with one round": RULE._replace(num_rounds=1),
    "with the last block for the class token alone": RULE._replace(class_token_only=True),
}
INGREDIENT_SCHEDULES = {
    "37 at 3, 5, 7, 9": dict.fromkeys((3, 5, 7, 9), 37),
    "37 at 1, 3, 5, 7": dict.fromkeys((1, 3, 5, 7), 37),
}


class Row(NamedTuple):
    """One line of a table: a setting of a family of methods."""

    family: str
    setting: str
    build: Callable[[nn.Module], Method]


def merging_row(family: str, schedule: dict[int, int], rule: Rule) -> Row:
    numbers = [str(number) for number in schedule.values()]
    numbers = numbers[:1] if len(set(numbers)) == 1 else numbers
    setting = f"{', '.join(numbers)} at {', '.join(map(str, schedule))}"
    return Row(family, setting, functools.partial(Merging, num_merged=schedule, rule=rule))


def in_every_block(family: str, method: type[Method], number: int) -> Row:
    numbers = dict.fromkeys(range(NUM_BLOCKS), number)
    return Row(family, f"r = {number}", functools.partial(method, num_merged=numbers))


def leaderboard_rows() -> list[Row]:
    rows = [Row(UNPOOLED, "", Method)]
    rows += [merging_row(OURS, schedule, RULE) for schedule in MANY_STAGES]
    rows += [merging_row(OURS_IN_FEW, schedule, RULE) for schedule in FEW_STAGES]
    rows += [merging_row(BEFORE, schedule, VERSION_01) for schedule in FEW_STAGES]
    for family, (method, numbers) in IN_EVERY_BLOCK.items():
        rows += [in_every_block(family, method, number) for number in numbers]
    for number in NUMBERS_OF_ATC:
        schedule = dict.fromkeys((3, 6, 9), number)
        rows.append(Row("ATC", f"{number} at 3, 6, 9", functools.partial(ATC, num_merged=schedule)))
    for name, (pruned, merged) in DIFFRATE.items():
        rows.append(Row("DiffRate", name, functools.partial(DiffRate, pruned=pruned, merged=merged)))
    return rows


class Result(NamedTuple):
    row: Row
    macs: int
    answers: Answers


def measure(rows: list[Row], model: nn.Module, judge: Judge, resume: Path | None) -> list[Result]:
    """MACs and answers of each row. Answers in the folder `resume` are not computed again."""
    results, image = [], normalize(judge.photos.pixels[:1])
    for row in rows:
        method, kept = row.build(model).eval(), resume and resume / f"{row.family} {row.setting}.pt"
        if kept and kept.exists():
            answers = Answers(*torch.load(kept, weights_only=True))
        else:
            answers = judge.answers(method)
            if kept:
                resume.mkdir(parents=True, exist_ok=True)
                torch.save(tuple(answers), kept)
        results.append(Result(row, count_macs(method, image), answers))
        print(row.family, row.setting, results[-1].macs, answers.summary(), flush=True)
    return results


def describe(result: Result, unpooled_macs: int) -> dict[str, Any]:
    """A line of the JSON."""
    names = {"family": result.row.family, "setting": result.row.setting}
    macs = {"macs": result.macs, "fewer_macs": round(unpooled_macs / result.macs, 3)}
    return names | macs | result.answers.summary()


def compare_with(curve: list[Result], result: Result) -> dict[str, Any]:
    """
    What `result` has more than the method of `curve` at equal MACs, with 95 % intervals over the photos: KL in nats,
    top-1 in points. Empty outside the curve.
    """
    ours = interpolate(result.macs, [(point.macs, point.answers) for point in curve])
    if ours is None:
        return {}
    divergence = result.answers.divergence - ours.divergence
    correct = 100 * (result.answers.correct - ours.correct)
    return {
        "divergence_over_ours": round(divergence.mean().item(), 5),
        "divergence_interval": [round(bound, 5) for bound in bootstrap(divergence)],
        "top1_over_ours": round(correct.mean().item(), 2),
        "top1_interval": [round(bound, 2) for bound in bootstrap(correct)],
    }


def run_leaderboard(model: nn.Module, judge: Judge, args: argparse.Namespace) -> dict[str, Any]:
    results = measure(leaderboard_rows(), model, judge, args.resume)
    curve = [result for result in results if result.row.family in (OURS, UNPOOLED)]
    lines = [describe(result, results[0].macs) for result in results]
    for line, result in zip(lines, results, strict=True):
        if result not in curve:
            line |= compare_with(curve, result)
    if args.time:
        methods = [result.row.build(model).eval() for result in results]
        images = normalize(judge.photos.pixels[: args.batch_size])
        for line, speed in zip(lines, measure_speed(methods, images, args.rounds), strict=True):
            line["images_per_second"] = round(speed, 1)
    return {"rows": lines}


def run_ingredients(model: nn.Module, judge: Judge, args: argparse.Namespace) -> dict[str, Any]:
    tables = {}
    for name, schedule in INGREDIENT_SCHEDULES.items():
        rows = [merging_row(ingredient, schedule, rule) for ingredient, rule in (ADDED | WITHOUT).items()]
        results = measure([Row(UNPOOLED, "", Method), *rows], model, judge, args.resume)
        tables[name] = [describe(result, results[0].macs) for result in results[1:]]
    return {"schedules": tables}


def run_schedules(model: nn.Module, judge: Judge, args: argparse.Namespace) -> dict[str, Any]:
    rows = [merging_row(OURS, schedule, RULE) for schedule in schedules_to_compare()]
    results = measure([Row(UNPOOLED, "", Method), *rows], model, judge, args.resume)
    return {"rows": [describe(result, results[0].macs) for result in results[1:]]}


def schedules_to_compare() -> list[dict[int, int]]:
    """Equal numbers at several sets of blocks."""
    chosen = [(3, 5, 7, 9), (2, 4, 6, 8), (1, 3, 5, 7), (1, 3, 5, 7, 9), (2, 4, 6, 8, 10)]
    chosen += [tuple(range(start, end)) for start, end in ((3, 10), (2, 10), (1, 9), (1, 11))]
    return [dict.fromkeys(blocks, total // len(blocks)) for blocks in chosen for total in (148, 172)]


def print_table(lines: list[dict[str, Any]]) -> None:
    header = ["method", "setting", "MACs G", "fewer", "top-1", "same answers", "KL"]
    rows = []
    for line in lines:
        macs = [f"{line['macs'] / 1e9:.3f}", f"{line['fewer_macs']:.2f} ×"]
        scores = [f"{line['top1']:.1f}", f"{line['agreement']:.1f}", f"{line['divergence']:.4f}"]
        rows.append([line["family"], line["setting"], *macs, *scores])
    if any("divergence_over_ours" in line for line in lines):
        header += ["KL over ours", "top-1 over ours"]
        rows = [row + differences(line) for row, line in zip(rows, lines, strict=True)]
    print(format_table(header, rows))


def differences(line: dict[str, Any]) -> list[str]:
    if "divergence_over_ours" not in line:
        return ["", ""]
    low, high = line["divergence_interval"]
    worst, best = line["top1_interval"]
    return [
        f"{line['divergence_over_ours']:+.4f} ({low:+.4f} to {high:+.4f})",
        f"{line['top1_over_ours']:+.1f} ({worst:+.1f} to {best:+.1f})",
    ]


def choose_photos(photos: Photos, half: str, classes: list[int] | None, num_photos: int | None) -> Photos:
    """The first photos of a half, or of all, with the labels that the model has for them."""
    numbers = torch.arange(len(photos.labels))
    if half in HALVES:
        numbers = halves(len(numbers))[HALVES.index(half)]
    photos = photos.part(numbers[:num_photos])
    return photos._replace(labels=torch.tensor(classes)[photos.labels]) if classes else photos


PROGRAMS = {"leaderboard": run_leaderboard, "ingredients": run_ingredients, "schedules": run_schedules}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measurement", choices=PROGRAMS)
    parser.add_argument("--weights", required=True, help="a ViT that `hpool-vit convert` reads")
    parser.add_argument("--photos", type=Path, required=True, help="Parquet file with the columns image and label")
    parser.add_argument(
        "--classes", type=int, nargs="+", help="the ImageNet class of label 0, 1, …, if it is not that"
    )
    parser.add_argument("--short_side", type=int, default=227, help="to resize photos to (default: %(default)s)")
    parser.add_argument("--name", help="of the JSON (default: merging_MEASUREMENT)")
    parser.add_argument("--output_dir", type=Path, default=Path("docs/results"), help="default: %(default)s")
    parser.add_argument("--half", choices=(*HALVES, "all"), help="which photos")
    parser.add_argument("--num_photos", type=int, help="only the first ones of the half, for a trial")
    parser.add_argument("--cache", type=Path, help="file that keeps the decoded photos for the next run")
    parser.add_argument("--resume", type=Path, help="folder that keeps the answers of each row of this half")
    parser.add_argument("--time", action="store_true", help="measure images per second too, in turns")
    parser.add_argument("--batch_size", type=int, default=26, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="of the timing (default: %(default)s)")
    parser.add_argument("--num_threads", type=int, default=1, help="default: %(default)s")
    args = parser.parse_args(argv)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.set_num_threads(args.num_threads)
    half = args.half or ("choosing" if args.measurement == "schedules" else "reporting")
    photos = choose_photos(load_photos(args.photos, args.cache, args.short_side), half, args.classes, args.num_photos)
    model, _ = convert_vit(args.weights, hvt_pool=None)
    judge = Judge(model, photos, args.batch_size)
    content = PROGRAMS[args.measurement](model, judge, args)
    about = {
        "half": half,
        "num_photos": len(photos.labels),
        "split_seed": SPLIT_SEED,
        "machine": f"{platform.machine()}, {args.num_threads} threads, PyTorch {torch.__version__}",
    }
    write_json(args.output_dir / f"{args.name or f'merging_{args.measurement}'}.json", about | content)
    tables = (
        [content["rows"]] if "rows" in content else [table for part in content.values() for table in part.values()]
    )
    for table in tables:
        print_table(table)


if __name__ == "__main__":
    main()
