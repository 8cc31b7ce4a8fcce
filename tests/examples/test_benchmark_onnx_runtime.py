import json

import onnx
import pytest
from helpers import EXAMPLES, run_python, tiny_model
from onnx import helper
from onnx_runtime import compare_pairs, count_nodes, format_rows, outside_products, pair_models


@pytest.mark.slow
def test_the_program_compares_graphs_with_those_of_the_same_models_unpooled(tmp_path):
    names = {"pooled": {"pool_mode": "max"}, "merging": {"pool_mode": "merge"}}
    for name, fields in names.items():
        tiny_model(num_hidden_layers=2, hvt_pool=[1], **fields).save_pretrained(tmp_path / name)
    models = [str(tmp_path / name) for name in names]
    output = tmp_path / "new" / "results"
    flags = ["--batch_sizes", 2, "--rounds", 2, "--warm_up", 1, "--min_turn_seconds", 0, "--threads", 1]
    program = EXAMPLES / "benchmark" / "onnx_runtime.py"
    result = run_python(program, "--models", *models, *flags, "--output", output, cwd=tmp_path)
    results = json.loads(output.with_suffix(".json").read_text())
    assert results["complete"] and results["machine"]["versions"]["onnxruntime"] and "load_average" in results
    (group,) = results["groups"]
    unpooled = f"{models[0]}@hvt_pool=none"
    # Both are the same model without pooling.
    assert [row["model"] for row in group["rows"]] == [name for name in (unpooled, *models) for _ in range(2)]
    for row in group["rows"][2:]:
        assert row["unpooled"] == unpooled and row["fewer_macs"] > 1 and len(row["rates"]) == 2
        assert row["nodes"]["loops"] == row["nodes"]["branches"] == 0 < row["nodes"]["all"]
        assert 0 < row["outside_products"] < 1 and any("MatMul" in name for name in row["ms_by_operator"])
    report = output.with_suffix(".md").read_text()
    assert report in result.stdout and "--batch_sizes 2" in report and f"`{models[1]}` | int8 | 2" in report


def test_folders_that_differ_only_in_pooling_share_the_unpooled_one(tmp_path):
    for mode in ("max", "merge"):
        tiny_model(hvt_pool=[1], pool_mode=mode).save_pretrained(tmp_path / mode)
    names = [str(tmp_path / mode) for mode in ("max", "merge")]
    assert pair_models(names) == dict.fromkeys(names, f"{names[0]}@hvt_pool=none")


def test_models_that_differ_only_in_pooling_share_the_unpooled_one():
    names = ["hvt-s-1", "hvt-s-4", "merge-s", "merge-s@merge_rule=importance", "hvt-ti-1"]
    pairs = pair_models(names)
    assert list(pairs) == names
    flat = {name: f"{name}@hvt_pool=none" for name in names}
    # The merging models have a class token.
    assert [pairs[name] for name in names] == [
        flat[name] for name in ("hvt-s-1", "hvt-s-1", "merge-s", "merge-s", "hvt-ti-1")
    ]


@pytest.mark.parametrize("name", ["vit-ti", "hvt-s-0"])
def test_a_model_without_pooling_is_refused(name):
    with pytest.raises(ValueError, match=f"--models {name}: give HPool-ViTs that pool or merge"):
        pair_models(["hvt-s-1", name])


def test_nodes_are_counted_by_kind(tmp_path):
    names = ["ScatterND", "ScatterElements", "Loop", "Scan", "If", "MatMul", "Identity"]
    graph = helper.make_graph([helper.make_node(name, ["x"], [f"y{name}"]) for name in names], "graph", [], [])
    onnx.save(helper.make_model(graph), tmp_path / "model.onnx")
    assert count_nodes(tmp_path / "model.onnx") == {"all": 7, "scatters": 2, "loops": 2, "branches": 1}


def test_products_are_told_from_the_rest_of_the_time():
    assert outside_products({"MatMul": 4, "FusedMatMul": 1, "Conv": 1, "Add": 3, "TopK": 1}) == 0.4
    assert outside_products({"DynamicQuantizeMatMul": 6, "DynamicQuantizeLinear": 2}) == 0.25


def test_each_model_is_compared_round_by_round_with_its_own_unpooled_one():
    common = {"mode": "onnx", "latency_ms": {"p50": 10.0}, "outside_products": 0.25}
    common["nodes"] = {"all": 9, "scatters": 2, "loops": 0, "branches": 0}
    rows = [
        {"model": "flat", "macs": 100, "rates": [10, 20, 40], "faster": [1, 1, 1], **common},
        {"model": "other", "macs": 100, "rates": [1, 1, 1], **common},
        {"model": "pooled", "macs": 40, "rates": [20, 30, 80], "faster": [9, 9, 9], "fewer_macs": 9, **common},
        {"model": "broken", "mode": "onnx", "macs": 40, "not_run": "no memory"},
    ]
    compare_pairs(rows, {"pooled": "flat", "broken": "flat"})
    assert "faster" not in rows[0] and "faster" not in rows[3]
    assert rows[2]["faster"] == [1.75, 2, 2] and rows[2]["fewer_macs"] == 2.5 and rows[2]["of_macs"] == [0.7, 0.8, 0.8]
    header, _, pooled, broken = format_rows([{"batch_size": 8, "rows": rows}]).splitlines()
    assert pooled == "| `pooled` | float32 | 8 | 2.50 × | 2.00 × (1.75–2.00) | 0.80 | 10 | 25% (25%) | 2, 0, 0 |"
    assert "no memory" in broken and broken.count("|") == header.count("|")
