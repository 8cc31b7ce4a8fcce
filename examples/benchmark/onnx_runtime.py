"""
Compare models that pool or merge with the same models without, as graphs in ONNX Runtime on the CPU: how many times as
fast they are, and how many times fewer multiply-accumulates they need.

    python examples/benchmark/onnx_runtime.py --short
    python examples/benchmark/onnx_runtime.py --models hvt-s-3 merge-s my-model --output outputs/onnx_runtime

All graphs, of models with and without pooling, in float32 and int8, take turns in every round. The program also says
what share of its time each graph spends outside matrix products, and how many scatters, loops and branches it has,
which some of ONNX Runtime's devices leave to the CPU. Models are named as for benchmark.py (see models.py). It writes
OUTPUT.json after every batch size, and OUTPUT.md at the end.
"""

import argparse
import json
import os
import shlex
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from benchmark import Group, describe_machine, positive
from models import find_model, load_config, own_image_size, split_name
from modes import Row, export_onnx, parse_mode, random_images
from report import spread
from results import ResultsFile, add_rerun_flags

from hpool_vit.toolkit.shared.console import needs, run
from hpool_vit.toolkit.shared.measuring import format_table, quartiles


with needs("export"):
    import onnx
    import onnxruntime


MODES = {"float32": "onnx", "int8": "onnx-int8"}
UNPOOLED = "@hvt_pool=none"
# Fields that change nothing in a model that neither pools nor merges, and where it came from.
POOLING_FIELDS = (
    "_name_or_path",
    "stages",
    "hvt_pool",
    "pool_mode",
    "pool_kernel_size",
    "pool_stride",
    "merge_ratio",
    "merge_rule",
    "proportional_attention",
)
# Nodes by the names with which their types begin.
KINDS = {"scatters": ("Scatter",), "loops": ("Loop", "Scan"), "branches": ("If",)}
PRODUCTS = ("MatMul", "FusedMatMul", "Gemm", "Conv", "DynamicQuantizeMatMul", "ConvInteger", "QLinear")
SHORT = {"models": ["hvt-ti-1", "merge-ti"], "batch_sizes": [1], "rounds": 3, "min_turn_seconds": 0.0, "warm_up": 1}

NOTES = """\
Ratios: median over the rounds (quartiles), each taken within a round, to the same model without pooling in the same
type. *fewer MACs*: how many times fewer multiply-accumulates than without pooling. *of it*: the gain in speed as a
share of that. *outside products*: share of the time, by ONNX Runtime's profiler; in parentheses, that of the model
without pooling. *scatters, loops, branches*: nodes of the graph."""


def pair_models(names: list[str]) -> dict[str, str]:
    """
    For each model the name of the same model without pooling. Models that are the same then share one.

    Raises:
        ValueError: if a model is unknown, does not pool, or is not an HPool-ViT.
    """
    pairs, known = {}, {}
    for name in names:
        find_model(name)
        base, fields = split_name(name)
        config = load_config(base, fields).to_dict()
        if config["model_type"] != "hpool_vit" or not config["hvt_pool"]:
            raise ValueError(f"--models {name}: give HPool-ViTs that pool or merge.")
        key = json.dumps([config[field] for field in sorted(config) if field not in POOLING_FIELDS], default=str)
        pairs[name] = known.setdefault(key, name + UNPOOLED)
    return pairs


def measure(args: argparse.Namespace, pairs: dict[str, str], file: ResultsFile) -> None:
    """Measures all batch sizes that the file does not have yet."""
    file.start(
        command=shlex.join(["python", *sys.argv]),
        machine=describe_machine(),
        load_average=[round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
    )
    # What a group of benchmark.py needs to know.
    models = [*dict.fromkeys(pairs.values()), *pairs]
    settings = {**vars(args), "models": models, "modes": [MODES[name] for name in args.types], "memory": False}
    settings |= {"dtype": "float32", "device": "cpu", "reference": models[0]}
    with tempfile.TemporaryDirectory() as scratch:
        for batch_size in args.batch_sizes:
            if file.has("inference", args.image_size, batch_size):
                continue
            group = Group(
                argparse.Namespace(**settings), "inference", args.image_size, batch_size, None, Path(scratch)
            )
            record = group.measure()
            for row in record["rows"]:
                if "not_run" not in row:
                    row |= describe_graph(row, args, batch_size, Path(scratch))
            compare_pairs(record["rows"], pairs)
            file.add(record)
    file.finish()


def describe_graph(record: dict[str, Any], args: argparse.Namespace, batch_size: int, scratch: Path) -> dict[str, Any]:
    """Nodes of the graph by kind, and the milliseconds that each type of node takes in ONNX Runtime."""
    row = Row(record["model"], parse_mode(record["mode"]), "inference", args.image_size, batch_size)
    file = export_onnx(row, scratch)
    milliseconds = profile(file, random_images(row).numpy(), args.threads, scratch)
    return {
        "nodes": count_nodes(file),
        "ms_by_operator": milliseconds,
        "outside_products": outside_products(milliseconds),
    }


def count_nodes(file: Path) -> dict[str, int]:
    """The number of nodes, and of those of each kind in [`KINDS`]."""
    types = [node.op_type for node in onnx.load(file, load_external_data=False).graph.node]
    counts = {kind: sum(name.startswith(begins) for name in types) for kind, begins in KINDS.items()}
    return {"all": len(types), **counts}


def profile(file: Path, images: Any, threads: int, scratch: Path, calls: int = 5) -> dict[str, float]:
    """The milliseconds that one call spends in each type of node, the largest first."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.enable_profiling = True
    options.profile_file_prefix = str(scratch / "profile")
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    for _ in range(calls + 1):
        session.run(None, {"pixel_values": images})
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    nodes = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
    totals: Counter[str] = Counter()
    for event in nodes[len(nodes) // (calls + 1) :]:  # the first call is the warm-up
        totals[event["args"]["op_name"]] += event["dur"] / 1e3 / calls
    return {name: float(f"{value:.3g}") for name, value in totals.most_common()}


def outside_products(milliseconds: dict[str, float]) -> float:
    """The share of the time outside matrix products and convolutions."""
    products = sum(value for name, value in milliseconds.items() if name.startswith(PRODUCTS))
    return round(1 - products / sum(milliseconds.values()), 4)


def compare_pairs(rows: list[dict[str, Any]], pairs: dict[str, str]) -> None:
    """Puts into the rows of pooled models what they gain over the same model without pooling."""
    by_name = {(row["model"], row["mode"]): row for row in rows if "not_run" not in row}
    for row in rows:
        row.pop("faster", None)  # than a model that may be another one
        row.pop("fewer_macs", None)
        base = by_name.get((pairs.get(row["model"]), row["mode"]))
        if base and "not_run" not in row:
            ratios = [rate / other for rate, other in zip(row["rates"], base["rates"], strict=True)]
            fewer = base["macs"] / row["macs"]
            row |= {
                "unpooled": base["model"],
                "faster": quartiles(ratios),
                "fewer_macs": round(fewer, 4),
                "of_macs": quartiles([ratio / fewer for ratio in ratios]),
                "outside_products_unpooled": base["outside_products"],
            }


def format_results(results: dict[str, Any]) -> str:
    machine, settings = results["machine"], results["settings"]
    lines = [
        "# In ONNX Runtime",
        "",
        f"- command: `{results['command']}`",
        f"- machine: {machine['machine']}, {machine['cpu']}, {machine['cpu_cores']} cores, {machine['ram_gb']} GB",
        f"- {settings['threads']} threads, {settings['rounds']} rounds, load average at the start "
        f"{results['load_average']}",
        "- versions: " + ", ".join(f"{name} {version}" for name, version in machine["versions"].items()),
        *([] if results["complete"] else ["- **unfinished**: batch sizes are missing"]),
        "",
        format_rows(results["groups"]),
        "",
        NOTES,
        "",
    ]
    return "\n".join(lines)


def format_rows(groups: list[dict[str, Any]]) -> str:
    """One table for all batch sizes, with a row for each pooled model and type."""
    types = {mode: name for name, mode in MODES.items()}
    header = ["model", "type", "batch", "fewer MACs", "times as fast", "of it", "p50 ms", "outside products"]
    table = []
    for group in groups:
        for row in group["rows"]:
            if "not_run" in row:
                table.append([row["model"], types[row["mode"]], str(group["batch_size"]), row["not_run"], *[""] * 5])
            elif "faster" in row:
                outside = f"{row['outside_products']:.0%} ({row['outside_products_unpooled']:.0%})"
                table.append(
                    [
                        f"`{row['model']}`",
                        types[row["mode"]],
                        str(group["batch_size"]),
                        f"{row['fewer_macs']:.2f} ×",
                        spread(row["faster"], "{:.2f}", " ×"),
                        f"{row['of_macs'][1]:.2f}",
                        f"{row['latency_ms']['p50']:.4g}",
                        outside,
                        ", ".join(str(row["nodes"][kind]) for kind in KINDS),
                    ]
                )
    return format_table([*header, ", ".join(KINDS)], table)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    default = ["hvt-s-1", "hvt-s-3", "hvt-s-4", "merge-s", "merge-s@merge_rule=importance"]
    add("--models", nargs="+", default=default, metavar="NAME", help=f"default: {' '.join(default)}")
    add("--types", nargs="+", choices=MODES, default=list(MODES), help="of the weights; default: float32 int8")
    add("--batch_sizes", type=positive, nargs="+", default=[1, 8], help="default: 1 8")
    add("--image_size", type=positive, help="default: that of the first model")
    add("--threads", type=positive, default=torch.get_num_threads(), help="default: %(default)s")
    add("--rounds", type=positive, default=11, help="default: %(default)s")
    add("--warm_up", type=positive, default=3, help="calls before the first round (default: %(default)s)")
    add("--min_turn_seconds", type=float, default=0.2, help="how long a graph runs in each round (default: 0.2)")
    add("--output", type=Path, default=Path("outputs/onnx_runtime"), help="path of the files, without suffix")
    add("--short", action="store_true", help="two small models, one image at a time, three rounds")
    add_rerun_flags(parser)
    if parser.parse_known_args(argv)[0].short:
        parser.set_defaults(**SHORT)
    args = parser.parse_args(argv)
    for name in ("models", "types", "batch_sizes"):
        setattr(args, name, list(dict.fromkeys(getattr(args, name))))
    args.image_size = args.image_size or own_image_size(args.models[0])
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    pairs = pair_models(args.models)
    torch.set_num_threads(args.threads)
    file = ResultsFile(args.output, args)
    try:
        measure(args, pairs, file)
    except KeyboardInterrupt:
        sys.exit(f"error: interrupted; run the same command with --resume to continue {file.path}.")
    text = format_results(file.results)
    args.output.with_name(f"{args.output.name}.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    run(main)
