"""
Measure what a recovery without labels brings, on photos that it never saw.

    python examples/research/leaderboard/recovery.py prepare --weights vit.safetensors --photos test.parquet --to DIR
    hpool-vit speed-up DIR/vit --images DIR/photos --faster 2 2.75 --recover 45m --output_dir faster
    python examples/research/leaderboard/recovery.py test faster --weights vit.safetensors --photos test.parquet

`prepare` writes the half of the photos that `leaderboard.py` chooses by as files in folders named by their class, and
the converted model with an image processor that prepares photos as `leaderboard.py` does. Nothing looks at the names.
`test` measures folders on the half that `leaderboard.py` reports on, at each of their speeds.
"""

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from photos import SPLIT_SEED, Photos, halves, load_photos, normalize
from scores import Answers, bootstrap
from torch import nn
from transformers.utils import logging

from hpool_vit import HPoolViTForImageClassification
from hpool_vit.toolkit import convert
from hpool_vit.toolkit.conversion.vit import convert_vit
from hpool_vit.toolkit.shared.files import write_json
from hpool_vit.toolkit.shared.measuring import count_macs, format_table
from hpool_vit.toolkit.speed.costs import MacsCost


# The short side of the photos, of which `load_photos` cuts out the middle 224 × 224.
SHORT_SIDE = 227
# What commands leave in a folder about a recovery.
RECORDS = ("speed_up.json", "recovery.json")


def prepare(args: argparse.Namespace) -> None:
    table = pd.read_parquet(args.photos)
    for index in halves(len(table))[0].tolist():
        row = table.iloc[index]
        folder = args.to / "photos" / str(row["label"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index}.jpg").write_bytes(row["image"]["bytes"])
    model, image_processor, _ = convert(args.weights, hvt_pool=None, pool_mode="merge")
    image_processor.size = {"shortest_edge": SHORT_SIDE}
    model.save_pretrained(args.to / "vit")
    image_processor.save_pretrained(args.to / "vit")


class Judge:
    """Compares models with the unpooled one on the same photos. What `resume` has is not computed again."""

    def __init__(self, unpooled: nn.Module, photos: Photos, batch_size: int, resume: Path | None):
        self.photos, self.batch_size, self.resume = photos, batch_size, resume
        self.reference = self.logits(unpooled, "unpooled")
        self.whole = self.answers(self.reference)
        self.macs = MacsCost(unpooled.config).unpooled

    def logits(self, model: nn.Module, name: str) -> torch.Tensor:
        kept = self.resume and self.resume / f"{name}.pt"
        if kept and kept.exists():
            return torch.load(kept, weights_only=True)
        with torch.inference_mode():
            batches = self.photos.pixels.split(self.batch_size)
            logits = torch.cat([model(normalize(batch)).logits for batch in batches])
        if kept:
            self.resume.mkdir(parents=True, exist_ok=True)
            torch.save(logits, kept)
        return logits

    def answers(self, logits: torch.Tensor) -> Answers:
        return Answers.of(logits, self.reference, self.photos.labels)

    def describe(self, model: nn.Module, folder: str, speed: float | None) -> dict[str, Any]:
        """A line of the JSON for the model at its present schedule."""
        name = folder if speed is None else f"{folder}, speed {speed:g}"
        answers = self.answers(self.logits(model, name))
        lost = 100 * (self.whole.correct - answers.correct)
        macs = count_macs(model, normalize(self.photos.pixels[:1])) if model.config.hvt_pool else self.macs
        return {
            "model": name,
            "hvt_pool": model.config.hvt_pool,
            "tokens_per_stage": model.config.tokens_per_stage(),
            "macs": macs,
            "fewer_macs": round(self.macs / macs, 3),
            **answers.summary(),
            "top1_lost": round(lost.mean().item(), 2),
            "top1_lost_interval": [round(bound, 2) for bound in bootstrap(lost)],
        }


def test(args: argparse.Namespace) -> None:
    photos = load_photos(args.photos, args.cache, SHORT_SIDE)
    photos = photos.part(halves(len(photos.labels))[1][: args.num_photos])
    unpooled, _ = convert_vit(args.weights, hvt_pool=None)
    judge = Judge(unpooled.eval(), photos, args.batch_size, args.resume)
    rows = [judge.describe(unpooled, "unpooled", None)]
    for folder in args.folders:
        model = HPoolViTForImageClassification.from_pretrained(folder).eval()
        for speed in [1.0, *model.config.speeds] if model.config.speeds else [None]:
            model.set_speed(speed) if speed is not None else None
            rows.append(judge.describe(model, folder.name, speed) | recovery_of(folder))
            print(rows[-1], flush=True)
    machine = f"{platform.machine()}, {args.num_threads} threads, PyTorch {torch.__version__}"
    about = {"half": "reporting", "num_photos": len(photos.labels), "split_seed": SPLIT_SEED, "machine": machine}
    write_json(args.output_dir / f"{args.name}.json", about | {"rows": rows})
    print(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        low, high = row["top1_lost_interval"]
        lines.append(
            [
                row["model"],
                " → ".join(map(str, row["tokens_per_stage"])),
                f"{row['macs'] / 1e9:.3f}",
                f"{row['fewer_macs']:.2f} ×",
                f"{row['top1']:.1f}",
                f"{row['top1_lost']:.1f} ({low:.1f} to {high:.1f})" if row["hvt_pool"] else "",
                f"{row['agreement']:.1f}",
                f"{row['divergence']:.4f}",
            ]
        )
    return format_table(["model", "tokens", "MACs G", "fewer", "top-1", "lost", "same answers", "KL"], lines)


def recovery_of(folder: Path) -> dict[str, Any]:
    """What the folder says about its recovery, without what was measured on the way."""
    for name in RECORDS:
        if (folder / name).is_file():
            recovery = json.loads((folder / name).read_text(encoding="utf-8")).get("recovery", {})
            return {"recovery": {key: value for key, value in recovery.items() if key != "checks"}}
    return {}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for run in (prepare, test):
        command = commands.add_parser(run.__name__)
        command.set_defaults(run=run)
        command.add_argument("--weights", required=True, help="a ViT that `hpool-vit convert` reads")
        command.add_argument("--photos", type=Path, required=True, help="Parquet file with columns image and label")
        if run is prepare:
            command.add_argument("--to", type=Path, required=True, help="folder to write")
            continue
        command.add_argument("folders", type=Path, nargs="+", help="saved models")
        command.add_argument("--output_dir", type=Path, default=Path("docs/results"), help="default: %(default)s")
        command.add_argument("--name", default="merging_recovery", help="of the JSON (default: %(default)s)")
        command.add_argument("--cache", type=Path, help="file that keeps the decoded photos for the next run")
        command.add_argument("--resume", type=Path, help="folder that keeps the answers of each model")
        command.add_argument("--num_photos", type=int, help="only the first ones of the half, for a trial")
        command.add_argument("--batch_size", type=int, default=26, help="default: %(default)s")
        command.add_argument("--num_threads", type=int, default=1, help="default: %(default)s")
    args = parser.parse_args(argv)
    logging.disable_progress_bar()
    torch.set_num_threads(getattr(args, "num_threads", 1))
    args.run(args)


if __name__ == "__main__":
    main()
