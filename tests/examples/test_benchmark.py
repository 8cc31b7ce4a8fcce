import json
import signal
import sys
from pathlib import Path

import pytest
import torch
from benchmark import Contestant, Group, main, parse_args
from helpers import EXAMPLES, TESTS, run_python, tiny_model
from meters import RaplMeter, in_fresh_process, open_energy_meter, step_memory
from models import Unavailable, find_model, own_image_size
from modes import Row, Step, count_macs_per_image, parse_mode, prepare, training_step
from PIL import Image
from plots import panels_of, plot_results, read_accuracies
from report import Measurement, format_results, summarise
from results import read_results
from roof import record_products, run_products

from hpool_vit.toolkit.shared.console import run
from hpool_vit.toolkit.shared.measuring import count_call_macs


QUICK = ["--rounds", "2", "--warm_up", "1", "--min_turn_seconds", "0", "--batch_sizes", "2", "--threads", "1"]
QUICK += ["--device", "cpu"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """A model that pools, and the same without pooling."""
    root = tmp_path_factory.mktemp("models")
    for name, schedule in {"flat": None, "pooled": [1, 3]}.items():
        tiny_model(hvt_pool=schedule).save_pretrained(root / name)
    return {name: str(root / name) for name in ("flat", "pooled")}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    """Where exported models are, which are used again."""
    return tmp_path_factory.mktemp("scratch")


def row(model: str, mode: str = "sdpa", task: str = "inference", batch_size: int = 2) -> Row:
    return Row(model, parse_mode(mode), task, image_size=32, batch_size=batch_size)


def measurement(model: str, mode: str, rates: list[float], **kwargs) -> Measurement:
    return Measurement(row(model, mode), rates=rates, seconds=[2 / rate for rate in rates], **kwargs)


@pytest.mark.slow
def test_a_run_measures_models_and_modes_side_by_side_and_says_what_could_not_run(folders, tmp_path):
    output = tmp_path / "new" / "results"
    names = [folders["flat"], folders["pooled"]]
    command = ["--models", *names, "--modes", "sdpa", "roof", "flash", "--tasks", "inference", "train"]
    result = run_python(EXAMPLES / "benchmark" / "benchmark.py", *command, *QUICK, "--output", output, cwd=tmp_path)
    results = json.loads(output.with_suffix(".json").read_text())
    assert results["complete"] and results["machine"]["versions"]["torch"] in torch.__version__
    assert results["settings"]["threads"] == results["machine"]["torch_threads"] == 1
    inference, train = results["groups"]
    for group in (inference, train):
        rows = {(row["model"], row["mode"]): row for row in group["rows"]}
        assert len(rows) == 6
        flat, pooled = (rows[name, "sdpa"] for name in names)
        assert flat["faster"] == [1, 1, 1] and flat["fewer_macs"] == 1
        assert pooled["fewer_macs"] == pytest.approx(flat["macs"] / pooled["macs"], abs=1e-4)
        assert len(pooled["rates"]) == 2 and pooled["latency_ms"]["calls"] == 2
        assert 0 < pooled["latency_ms"]["p50"] <= pooled["latency_ms"]["p95"]
        assert pooled["memory_mb"] > 0 and pooled["of_roof"][1] > 0 and pooled["of_peak"][1] > 0
        assert rows[names[1], "roof"]["memory_mb"] is None
        # On a CPU in float32 it never runs, whether its package is installed or not.
        assert rows[names[0], "flash"]["not_run"]
    assert train["rows"][0]["macs"] > 2.5 * inference["rows"][0]["macs"]
    report = output.with_suffix(".md").read_text()
    for part in ("flash: ", "of roof", "fewer MACs", "--rounds 2", "inference, 32 × 32"):
        assert part in report
    assert "## train, 32 × 32, batch 2" in result.stdout
    with Image.open(output.with_suffix(".png")) as picture:
        assert picture.width > 1000


@pytest.mark.parametrize("task", ["inference", "train"])
@pytest.mark.parametrize("model", ["pooled", "vit-ti", "pit_ti_224"])
def test_the_roof_has_the_multiply_accumulates_of_the_model_and_no_others(folders, model, task):
    name = folders.get(model, model)
    network = find_model(name)(image_size=32).train(task == "train")
    images = torch.randn(2, 3, 32, 32)

    def call():
        logits = network(images)
        logits = getattr(logits, "logits", logits)
        if task == "train":
            logits.sum().backward()

    with torch.set_grad_enabled(task == "train"):
        products = record_products(network, call)
    assert count_call_macs(lambda: run_products(products)) == 2 * count_macs_per_image(name, 32, task)


def test_the_roof_reads_the_weights_where_the_model_has_them_and_leaves_them_alone(folders):
    network = find_model(folders["pooled"])().eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    images = torch.randn(1, 3, 32, 32)
    products = record_products(network, torch.inference_mode()(lambda: network(images)))
    run_products(products)
    read = {arg.data_ptr() for product in products for arg in product.args if isinstance(arg, torch.Tensor)}
    linear = [name for name, weight in network.named_parameters() if weight.data_ptr() in read]
    assert {"classifier.weight", "hpool_vit.layers.3.mlp.fc2.weight"} <= set(linear)
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("mode", "tolerance"),
    [("eager", 1e-5), ("channels_last", 1e-5), ("bf16", 3e-2), ("onnx", 1e-5), ("onnx-int8", 0.1)],
)
def test_every_mode_times_the_same_function(folders, scratch, mode, tolerance):
    expected = prepare(row(folders["pooled"]), scratch).call()
    logits = torch.as_tensor(prepare(row(folders["pooled"], mode), scratch).call())
    assert logits.shape == (2, 3)
    torch.testing.assert_close(logits.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["aot", "compile-freezing"])
def test_every_compiler_keeps_the_function(folders, scratch, mode):
    expected = prepare(row(folders["pooled"]), scratch).call()
    call = prepare(row(folders["pooled"], mode), scratch).call
    for _ in range(2):
        torch.testing.assert_close(call(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["sdpa", "bf16"])
def test_a_training_step_updates_every_weight_and_keeps_no_gradient(mode):
    model = tiny_model().train()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    training_step(row("", mode, "train"), model, torch.randn(2, 3, 32, 32), lambda images: model(images).logits)()
    for name, weight in model.named_parameters():
        assert weight.dtype == torch.float32 and weight.grad is None
        assert not torch.equal(weight, before[name]), name


def test_names_stand_for_the_models_that_they_say():
    plain, pooled = (count_macs_per_image(name, 224, "inference") for name in ("vit-ti", "hvt-ti-1"))
    assert plain / pooled == pytest.approx(1.95, abs=0.02)
    assert plain == count_macs_per_image("deit_tiny_patch16_224", 224, "inference")
    assert plain / count_macs_per_image("merge-ti", 224, "inference") == pytest.approx(2.10, abs=0.02)
    model = find_model("hvt-ti-1@hvt_pool=2,6@pool_mode=avg")(image_size=96, attention="eager")
    assert model.config.tokens_per_stage() == [36, 17, 8] and model.config.pool_mode == "avg"
    assert model.config._attn_implementation == "eager"
    assert (own_image_size("vit-ti@image_size=96"), own_image_size("pit_ti_224")) == (96, 224)
    with pytest.raises(Unavailable, match="timm has no flex_attention"):
        find_model("pit_ti_224")(attention="flex_attention")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--models", "hvt-xl"], r"--models hvt-xl: unknown model.*hvt-s-3"),
        (["--models", "hvt-s-1@hvt_pool=1,30"], r"--models hvt-s-1@hvt_pool=1,30: cannot build this model: .*30"),
        (["--models", "vit-ti@width"], "`@width` is not `@field=value`"),
        (["--modes", "fast"], "--modes fast: 'fast' is not one of eager, sdpa"),
        (["--modes", "eager+flash"], "eager and flash exclude each other"),
        (["--modes", "onnx+compile"], "onnx cannot be combined with compile"),
        (["--reference", "vit-b"], "--reference vit-b is not one of the models: vit-ti"),
        (["--device", "tpu"], "--device tpu: give cpu, cuda"),
    ],
)
def test_what_does_not_exist_is_refused_before_anything_is_measured(flags, message):
    with pytest.raises(ValueError, match=message):
        parse_args(["--models", "vit-ti", *flags])


def test_a_short_run_can_be_changed_by_flags():
    args = parse_args(["--short", "--rounds", "1"])
    assert args.models == ["vit-s", "hvt-s-1", "hvt-s-3", "hvt-s-4"] and args.tasks == ["inference", "train"]
    assert (args.rounds, args.image_sizes, args.reference) == (1, [224], "vit-s")


def test_no_run_is_lost_and_an_unfinished_one_goes_on(folders, tmp_path):
    output = tmp_path / "results"
    command = ["--models", folders["pooled"], *QUICK, "--no_memory", "--output", str(output)]
    main(command)
    file = output.with_suffix(".json")
    finished = file.read_bytes()
    with pytest.raises(ValueError, match="holds a finished run: --overwrite replaces it"):
        main(command)
    assert file.read_bytes() == finished

    results = json.loads(finished)
    marked = results["groups"][0]["rows"][0]["images_per_second"] = [1.0, 2.0, 3.0]
    file.write_text(json.dumps({**results, "complete": False}))
    with pytest.raises(ValueError, match="holds an unfinished run: --resume continues it, --overwrite starts again"):
        main(command)
    with pytest.raises(ValueError, match="was measured with another --tasks, --rounds"):
        main([*command, "--resume", "--rounds", "3", "--tasks", "train"])
    main([*command, "--resume"])
    again = read_results(file)
    assert again["complete"] and again["groups"][0]["rows"][0]["images_per_second"] == marked
    main([*command, "--overwrite"])
    assert read_results(file)["groups"][0]["rows"][0]["images_per_second"] != marked


def test_all_rows_take_turns_and_one_that_breaks_stops_no_other(folders, tmp_path):
    turns = []

    def contestant(name: str, breaks: int = 99) -> Contestant:
        def call():
            turns.append(name)
            if turns.count(name) == breaks:
                raise RuntimeError("the device is gone\nand a long trace")

        return Contestant(row(name), Step(call), None)

    args = parse_args(["--models", folders["flat"], *QUICK])
    group = Group(args, "inference", 32, 2, None, tmp_path)
    group.contestants = [contestant("a"), contestant("b", breaks=4), contestant("c")]
    for number in range(4):
        group.run_round(number, [])
    # The first call of each turn is not timed.
    assert "".join(turns) == "aabbcc" + "bbccaa" + "aacc" + "ccaa"
    assert list(group.failed.values()) == ["RuntimeError: the device is gone"]


def test_ratios_are_taken_within_each_round():
    # The machine is at half speed in the second round, and the median of no row is from the same round.
    base = measurement("vit", "sdpa", [10.0, 5.0, 11.0], macs=300, memory_mb=100.0)
    fast = measurement("hvt", "sdpa", [20.0, 10.0, 22.0], macs=100, memory_mb=40.0)
    roof = measurement("hvt", "roof", [25.0, 12.5, 27.5], macs=100)
    other = measurement("hvt", "eager", [10.0, 5.0, 11.0], macs=100)
    peak = measurement("", "sdpa", [4.0, 2.0, 4.4], macs=1000)
    rows = summarise([base, fast, roof, other], "vit", {torch.float32: peak}, has_energy=False)
    by_mode = {(row["model"], row["mode"]): row for row in rows}
    pooled = by_mode["hvt", "sdpa"]
    assert pooled["faster"] == [2, 2, 2] and pooled["of_roof"] == [0.8, 0.8, 0.8] and pooled["of_peak"] == [0.5] * 3
    assert (pooled["fewer_macs"], pooled["memory_ratio"]) == (3, 0.4)
    assert "faster" not in by_mode["hvt", "eager"] and by_mode["hvt", "eager"]["over_first_mode"] == [0.5, 0.5, 0.5]
    named = summarise([base, fast, roof, other], "vit/sdpa", {torch.float32: peak}, has_energy=False)
    assert named[3]["faster"] == [1, 1, 1]


@pytest.mark.slow
def test_memory_is_that_of_one_step_in_a_process_of_its_own(folders, tmp_path):
    small, large = (
        in_fresh_process(step_memory, row(folders["flat"], "sdpa", "train", size), tmp_path) for size in (2, 128)
    )
    assert 0 < small < large < 2000


def test_a_process_that_is_killed_or_fails_becomes_a_reason():
    with pytest.raises(Unavailable, match="out of memory: the process was killed"):
        in_fresh_process(signal.raise_signal, 9)
    with pytest.raises(Unavailable, match="ValueError: invalid literal"):
        in_fresh_process(int, "x")


def test_energy_is_added_up_over_packages_and_over_the_end_of_a_counter(tmp_path):
    def write(package: int, microjoules: int):
        zone = tmp_path / f"intel-rapl:{package}"
        zone.mkdir(exist_ok=True)
        (zone / "energy_uj").write_text(f"{microjoules}\n")
        (zone / "max_energy_range_uj").write_text("10000000\n")

    write(0, 9_000_000)
    write(1, 1_000_000)
    (tmp_path / "intel-rapl:0:0").mkdir()  # a part of package 0, which counts it already
    meter = RaplMeter(tmp_path)
    write(0, 500_000)
    write(1, 3_000_000)
    assert meter.joules() == pytest.approx(1.5 + 2)
    assert meter.joules() == pytest.approx(3.5)
    with pytest.raises(Unavailable, match="has no energy counter"):
        RaplMeter(tmp_path / "none")
    meter, source = open_energy_meter("cpu")
    assert (meter is None) == source.startswith("not available")


def test_energy_per_image_is_reported_where_it_was_measured():
    measured = measurement("vit", "sdpa", [10.0, 10.0], macs=100, joules=6.0, calls=3)
    (record,) = summarise([measured], "vit", {torch.float32: measured}, has_energy=True)
    assert record["joules_per_image"] == 0.5  # two rounds of three calls with two images


def test_plots_show_what_was_varied(tmp_path):
    def group(batch_size: int, image_size: int) -> dict:
        measured = [measurement(name, "sdpa", [float(batch_size)], macs=1, memory_mb=1.0) for name in ("vit", "hvt")]
        rows = summarise(measured, "vit", {torch.float32: measured[0]}, has_energy=False)
        return {"task": "inference", "image_size": image_size, "batch_size": batch_size, "rows": rows}

    def titles(*sizes: tuple[int, int]) -> list[str]:
        rows = [{**size, **row} for size in [group(*pair) for pair in sizes] for row in size.pop("rows")]
        return [panel.title for panel in panels_of(rows)]

    assert titles((1, 224)) == ["inference: speed"]
    assert titles((1, 224), (8, 224)) == ["inference: throughput"]
    assert titles((1, 224), (1, 512)) == ["inference: time", "inference: memory"]
    results = {"complete": True, "settings": {}, "groups": [group(1, 224), group(8, 224), group(1, 512)]}
    published = sorted((TESTS.parent / "docs" / "results").glob("*.json"))
    path = plot_results([results], tmp_path / "all.png", published)
    with Image.open(path) as picture:
        assert picture.height > 1000
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_results([{"groups": []}], tmp_path / "none.png")


def test_accuracies_are_read_from_the_results_of_both_measuring_programs():
    results = TESTS.parent / "docs" / "results"
    trained = read_accuracies(results / "training_ants_bees.json")
    assert trained["unpooled"][1] == pytest.approx(95.42, abs=0.01) and trained["avg"][0] > trained["unpooled"][0]
    untrained = read_accuracies(results / "warm_start_training_free.json")
    assert untrained["unpooled"] == (pytest.approx(40.97, abs=0.01), pytest.approx((77.27 + 76.01) / 2, abs=0.01))
    assert read_accuracies(results / "warm_start_fine_tune.json") == {}


def test_other_files_are_not_taken_for_results(tmp_path):
    file = tmp_path / "results.json"
    for content in ("[]", "{", '{"complete": true}'):
        file.write_text(content)
        with pytest.raises(ValueError, match=r"results\.json (is not a results file of|cannot be read)"):
            read_results(file)


def test_the_report_leaves_out_columns_without_numbers():
    measured = measurement("vit", "sdpa", [10.0, 10.0], macs=100)
    rows = summarise([measured], "vit", {torch.float32: measured}, has_energy=False)
    group = {"task": "train", "image_size": 32, "batch_size": 2, "matrix_peak_tflops": {}, "rows": rows}
    machine = dict.fromkeys(("machine", "cpu", "cpu_cores", "ram_gb"), "x")
    machine |= {"gpus": [], "versions": {"torch": "2"}, "environment": {"OMP_WAIT_POLICY": "passive"}}
    report = format_results(
        {
            **{"command": "python benchmark.py", "machine": machine, "complete": False, "groups": [group]},
            **{"load_average": [0.1], "energy": "not available: no counter"},
            "settings": {"device": "cpu", "threads": 1, "rounds": 2, "reference": "vit"},
        }
    )
    header = next(line for line in report.splitlines() if line.startswith("| model"))
    assert "images/s" in header and "J/image" not in header and "of roof" not in header and "memory" not in header
    assert "environment: OMP_WAIT_POLICY=passive" in report
    assert "energy: not available: no counter" in report and "**unfinished**" in report


@pytest.mark.slow
def test_without_a_compiler_a_compiled_row_says_so(folders, tmp_path, monkeypatch, fresh_compiler):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    args = parse_args(["--models", folders["flat"], "--modes", "sdpa", "compile", *QUICK, "--no_memory"])
    # `monkeypatch` would hide the setting from all tests after this one.
    with torch._inductor.config.patch("cpp.cxx", ("no-such-compiler",)):
        plain, compiled = Group(args, "inference", 32, 2, None, tmp_path).measure()["rows"]
    assert plain["images_per_second"][1] > 0
    assert "ompiler" in compiled["not_run"] and "\n" not in compiled["not_run"]


def test_without_torchao_int8_says_what_to_install(folders, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(Unavailable, match="pip install torchao"):
        prepare(row(folders["flat"], "int8"), tmp_path)


def test_what_is_for_inference_or_for_the_cpu_is_not_measured_elsewhere():
    for mode in ("int8", "aot", "onnx", "onnx-int8", "int8+compile", "compile-freezing"):
        with pytest.raises(Unavailable, match="is only for inference"):
            row("vit-ti", mode, "train").check()
    with pytest.raises(Unavailable, match="only on the CPU"):
        Row("vit-ti", parse_mode("onnx"), "inference", 32, 2, device="cuda").check()


def test_a_users_mistake_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"^error: --models \S+none: cannot build this model: .+$"):
        run(lambda: main(["--models", str(tmp_path / "none"), "--output", str(tmp_path / "results")]))
    assert list(tmp_path.iterdir()) == []
