"""The demo page without a browser: what it computes, what it refuses, and what it keeps in or out."""

import os
import sys
import threading

import gradio as gr
import PIL.Image
import pytest
import torch
from helpers import save_with_processor, tiny_config, tiny_model
from huggingface_hub import constants
from image_files import BAD_FILES, encoded, picture, write_folder
from transformers import pipeline

from hpool_vit import HPoolViTForImageClassification, HPoolViTForSemanticSegmentation, HPoolViTImageProcessor
from hpool_vit.toolkit import command
from hpool_vit.toolkit.demo.app import serve
from hpool_vit.toolkit.demo.files import (
    MAX_EXAMPLES,
    MAX_FILE_MEGABYTES,
    MAX_FILES,
    MAX_MEGAPIXELS,
    find_examples,
    open_image,
    read_images,
    thumbnail,
)
from hpool_vit.toolkit.demo.markup import draw_schedule, format_messages
from hpool_vit.toolkit.demo.models import ServedModel, distinct_labels, find_models, load_models
from hpool_vit.toolkit.demo.page import LAUNCH, Page, build_demo
from hpool_vit.toolkit.shared.images import BadImageError, DataError
from hpool_vit.toolkit.shared.saved_model import SavedModelError


LABELS = {0: "ant", 1: "bee", 2: "cat"}
CHOICES = [[1, 3], [1], [], [0, 1, 3]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with four schedules."""
    folder = tmp_path_factory.mktemp("models") / "elastic"
    model = tiny_model(hvt_pool_choices=CHOICES, id2label=LABELS, label2id={"ant": 0, "bee": 1, "cat": 2})
    model.save_pretrained(folder)
    HPoolViTImageProcessor.for_config(model.config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return ServedModel(folder)


@pytest.fixture
def page(model):
    return Page({"elastic": model}, {"elastic": []})


@pytest.fixture
def photos(tmp_path):
    """Three image files."""
    files = [tmp_path / f"{name}.png" for name in "abc"]
    for seed, file in enumerate(files):
        file.write_bytes(encoded(picture(seed, (40, 36))))
    return list(map(str, files))


def event(index):
    return gr.SelectData(None, {"index": index, "value": None})


class TestTheModels:
    def test_schedules_are_ordered_by_what_they_cost_and_start_at_the_saved_one(self, model):
        assert [list(schedule.hvt_pool) for schedule in model.schedules] == [[0, 1, 3], [1, 3], [1], []]
        macs = [schedule.macs for schedule in model.schedules]
        assert macs == sorted(macs) and macs[-1] == model.macs_without_pooling
        assert model.schedules[model.saved_position].tokens == (64, 31, 15)

    def test_the_answer_is_that_of_the_pipeline_under_every_schedule(self, model, folder, photos):
        for position, schedule in enumerate(model.schedules):
            answer = model.classify(torch.cat([model.prepare(open_image(file)) for file in photos]), position)
            pooled = HPoolViTForImageClassification.from_pretrained(folder, hvt_pool=list(schedule.hvt_pool))
            classifier = pipeline("image-classification", model=pooled, image_processor=model.image_processor)
            for probabilities, expected in zip(answer.probabilities, classifier(photos), strict=True):
                top = model.top(probabilities, 5)
                assert list(top) == [entry["label"] for entry in expected]
                assert list(top.values()) == pytest.approx([entry["score"] for entry in expected], abs=1e-4)

    def test_the_panels_belong_to_the_same_answer(self, model, photos):
        image = open_image(photos[0])
        for position in (0, 3):
            probabilities, panels = model.explain(image, position)
            answer = model.classify(model.prepare(image), position)
            torch.testing.assert_close(probabilities, answer.probabilities[0], atol=1e-4, rtol=0)
            assert min(panels.size) > 300

    def test_visitors_with_different_schedules_do_not_disturb_each_other(self, model, photos):
        inputs = model.prepare(open_image(photos[0]))
        expected = [model.classify(inputs, position).probabilities for position in range(4)]
        assert not any(torch.equal(expected[0], other) for other in expected[1:])
        wrong = []

        def visit(position):
            for _ in range(10):
                if not torch.equal(model.classify(inputs, position).probabilities, expected[position]):
                    wrong.append(position)

        threads = [threading.Thread(target=visit, args=(position,)) for position in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong

    def test_a_merging_model_with_a_ratio_per_stage_is_compared_with_itself_without_merging(self, tmp_path):
        merging = tiny_model(pool_mode="merge", merge_ratio=[0.5, 0.25])
        merging.save_pretrained(tmp_path / "merging")
        HPoolViTImageProcessor.for_config(merging.config).save_pretrained(tmp_path / "merging")
        model = ServedModel(tmp_path / "merging")
        assert [schedule.tokens for schedule in model.schedules] == [(64, 32, 24), (64,)]
        assert model.schedules[0].macs < model.schedules[1].macs == model.macs_without_pooling

    def test_a_merging_model_can_be_tried_with_fewer_merges(self, tmp_path, photos):
        merging = tiny_model(pool_mode="merge", merge_ratio=0.5)
        merging.save_pretrained(tmp_path / "merging")
        HPoolViTImageProcessor.for_config(merging.config).save_pretrained(tmp_path / "merging")
        model = ServedModel(tmp_path / "merging")
        assert [schedule.hvt_pool for schedule in model.schedules] == [(1, 3), (3,), ()]
        inputs = model.prepare(open_image(photos[0]))
        for position, schedule in enumerate(model.schedules):
            merging.set_hvt_pool(list(schedule.hvt_pool))
            expected = merging(inputs).logits.softmax(-1)
            torch.testing.assert_close(model.classify(inputs, position).probabilities, expected)

    def test_classes_that_share_a_name_are_told_apart(self):
        config = tiny_config(num_labels=3, id2label={0: "crane", 1: "bee", 2: "crane"})
        assert distinct_labels(config) == ["crane (0)", "bee", "crane (2)"]

    def test_models_are_found_two_levels_deep_without_checkpoints_and_models_of_other_types(self, folder, tmp_path):
        for name in ("one", "a/two", "a/b/three", "one/checkpoint-5"):
            (tmp_path / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / name / "config.json").write_text('{"model_type": "hpool_vit"}')
        for name, content in (("vit", '{"model_type": "vit"}'), ("broken", "{"), ("list", "[]")):
            (tmp_path / name).mkdir()
            (tmp_path / name / "config.json").write_text(content)
        assert find_models(tmp_path) == [tmp_path / "a/two", tmp_path / "one"]
        assert find_models(folder) == [folder]

    def test_folders_of_the_same_name_are_offered_by_their_paths(self, folder, tmp_path):
        (tmp_path / "elastic").symlink_to(folder)
        assert list(load_models([folder])) == ["elastic"]
        assert list(load_models([folder, tmp_path / "elastic"])) == [folder.as_posix(), f"{tmp_path}/elastic"]

    def test_a_bad_folder_among_those_found_is_reported_and_left_out(self, folder, tmp_path, capsys):
        (tmp_path / "config.json").write_text('{"model_type": "hpool_vit"}')
        assert list(load_models([folder, tmp_path], skip_bad=True)) == ["elastic"]
        reported = capsys.readouterr().err
        assert reported.startswith("skipped: ") and str(tmp_path) in reported
        with pytest.raises(SavedModelError, match="cannot be loaded"):
            load_models([tmp_path], skip_bad=True)

    def test_a_segmenter_is_refused_as_what_it_is(self, tmp_path):
        segmenter = save_with_processor(
            tmp_path / "streets", HPoolViTForSemanticSegmentation(tiny_config(hvt_pool=None))
        )
        with pytest.raises(SavedModelError, match=r"streets segments images, and the page shows only classifiers\.$"):
            ServedModel(segmenter)

    def test_a_model_computes_on_the_named_device_or_on_any_accelerator(self, folder, monkeypatch):
        [served] = load_models([folder], device="meta").values()
        assert served.model.device.type == "meta"
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
        assert ServedModel(folder).model.device.type == "meta"
        assert ServedModel(folder, "cpu").model.device.type == "cpu"


class TestTheFiles:
    @pytest.mark.parametrize("name", BAD_FILES)
    def test_every_bad_file_gets_a_message_and_no_answer(self, page, name, tmp_path):
        data, reason = BAD_FILES[name]
        (tmp_path / name).write_bytes(data)
        shown, messages, costs, gallery, classes, panels = page.answer("elastic", 0, [str(tmp_path / name)], "")
        assert shown == [] and f"{name} cannot be shown: {reason}" in messages.value
        assert costs == "" and classes is None and not gallery.visible and not panels.visible

    def test_bad_files_do_not_keep_the_good_ones_from_their_answers(self, page, photos, tmp_path):
        (tmp_path / "bad.png").write_bytes(b"This is no picture.")
        files = [photos[0], str(tmp_path / "bad.png"), str(tmp_path / "gone.png"), photos[1]]
        shown, messages, costs, gallery, classes, _ = page.answer("elastic", 0, files, "")
        assert shown == [photos[0], photos[1]] and len(gallery.value) == 2
        assert "bad.png cannot be shown: unreadable" in messages.value
        assert "gone.png cannot be shown: no longer there: upload it again" in messages.value
        assert set(classes) == {"ant", "bee", "cat"} and "in a batch of 2" in costs

    def test_too_many_files_are_cut_off_with_a_message(self, photos):
        messages = []
        assert len(list(read_images(photos * 6, messages))) == MAX_FILES
        assert messages == [f"You gave 18 files. These are the first {MAX_FILES}."]

    def test_a_file_over_the_limit_is_refused_unread(self, tmp_path):
        with (tmp_path / "large.png").open("wb") as file:
            file.truncate((MAX_FILE_MEGABYTES + 1) * 2**20)
        with pytest.raises(BadImageError, match=f"^too large: 21 MB, but the limit is {MAX_FILE_MEGABYTES} MB$"):
            open_image(tmp_path / "large.png")

    def test_text_from_a_visitor_is_not_markup(self):
        assert "<script>" not in format_messages(["<script>alert(1)</script>.png cannot be shown"])
        assert format_messages([]) == ""

    def test_tiny_images_are_enlarged_to_squares_and_large_ones_shrunk(self):
        assert thumbnail(PIL.Image.new("RGB", (8, 8))).size == (384, 384)
        assert thumbnail(picture(size=(768, 20))).size == (384, 10)
        assert thumbnail(PIL.Image.new("RGB", (1000, 2))).size == (384, 1)

    def test_examples_are_digits_for_digits_and_spread_over_the_folder_for_others(self, tmp_path):
        digits = find_examples([str(digit) for digit in range(10)], None, tmp_path)
        assert [PIL.Image.open(file).size for file, _ in digits] == [(8, 8)] * 10
        assert find_examples(["ant"], None, tmp_path) == []
        write_folder(tmp_path / "photos")
        (tmp_path / "photos" / "notes.txt").write_text("no picture")
        files = [file for file, _ in find_examples(["ant"], tmp_path / "photos", tmp_path)]
        assert len(files) == MAX_EXAMPLES and {file.split("/")[-2] for file in files} == {"ant", "bee", "cat"}

    def test_examples_are_real_images_each_once(self, tmp_path):
        folder = write_folder(tmp_path / "photos", per_class=2)
        (folder / "ant" / "up").symlink_to(folder)
        (folder / "bee" / "again.png").symlink_to(folder / "ant" / "0.png")
        for name in ("__MACOSX/._0.png", "@eaDir/0.png", "cat/._0.png"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(encoded(picture()))
        files = [file for file, _ in find_examples(["ant"], folder, tmp_path)]
        assert files == [f"{folder}/{label}/{number}.png" for label in ("ant", "bee", "cat") for number in range(2)]

    def test_a_page_without_the_packages_of_the_digits_has_no_examples(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        assert find_examples([str(digit) for digit in range(10)], None, tmp_path) == []

    @pytest.mark.parametrize(("name", "problem"), [("missing", "is not a folder"), ("empty", "holds no images")])
    def test_a_folder_without_examples_is_refused(self, name, problem, tmp_path):
        (tmp_path / "empty").mkdir()
        with pytest.raises(DataError, match=problem):
            find_examples(["ant"], tmp_path / name, tmp_path)


class TestThePage:
    def test_only_a_model_with_several_schedules_has_a_slider(self, page, model, saved_folder):
        slider, schedule, _, _ = page.choose_model("elastic", [])
        assert slider.visible and (slider.maximum, slider.value) == (3, model.saved_position)
        assert schedule == draw_schedule(model.schedules[1])
        page.models["fixed"], page.examples["fixed"] = ServedModel(saved_folder), []
        assert not page.choose_model("fixed", [])[0].visible

    def test_another_position_is_another_schedule_and_one_too_far_is_the_last(self, page):
        assert "<b>31</b>" in page.describe("elastic", 2.0) and "<b>15</b>" not in page.describe("elastic", 2.0)
        assert page.describe("elastic", 9) == page.describe("elastic", 3)
        assert "No pooling" in page.describe("elastic", 3)

    def test_a_model_starts_with_its_example_unless_a_visitor_gave_images(self, page, photos):
        page.models["other"] = page.models["elastic"]
        page.examples["elastic"] = [(photos[0], open_image(photos[0]))]
        page.examples["other"] = [(photos[1], open_image(photos[1]))]
        assert page.choose_model("elastic", [])[-1] == [photos[0]]
        assert page.choose_model("other", [photos[0]])[-1] == [photos[1]]
        assert page.choose_model("other", [photos[2]])[-1] == [photos[2]]
        assert page.take_example("other", event(0)) == [photos[1]]

    def test_the_chosen_image_is_explained_also_after_the_schedule_changed(self, page, photos):
        file, classes, _ = page.choose_image("elastic", 0, photos, event(1))
        assert file == photos[1]
        assert page.answer("elastic", 0, photos, file)[4] == classes
        assert page.answer("elastic", 0, photos, "another")[4] != classes

    def test_choosing_an_image_that_was_deleted_is_an_error_in_one_line(self, page, tmp_path):
        with pytest.raises(gr.Error, match=r"gone\.png cannot be shown: no longer there"):
            page.choose_image("elastic", 0, [str(tmp_path / "gone.png")], event(0))

    def test_the_page_has_no_interface_for_programs_and_no_fonts_from_elsewhere(self, page):
        demo = build_demo(page.models, page.examples)
        assert demo.get_api_info()["named_endpoints"] == {} and not demo.analytics_enabled
        assert LAUNCH["theme"]._stylesheets == [] and not LAUNCH["share"]
        assert not LAUNCH.get("run_history")


class TestTheCommand:
    @pytest.mark.parametrize(
        ("arguments", "problem"),
        [
            (["--models_dir", "{tmp}"], "--models_dir {tmp} holds no saved model: make one with"),
            (["{tmp}/missing"], "{tmp}/missing is not the folder of a saved HPool-ViT"),
            (["{folder}", "--examples_dir", "{tmp}/missing"], "--examples_dir {tmp}/missing is not a folder"),
            (["{folder}", "--device", "toaster"], "--device toaster cannot be used: "),
        ],
    )
    def test_wrong_input_is_reported_in_one_line(self, arguments, problem, folder, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(command, "quiet", lambda: None)
        with pytest.raises(SystemExit) as stopped:
            command.main(["demo", *(argument.format(tmp=tmp_path, folder=folder) for argument in arguments)])
        [line] = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 1 and line.startswith(f"error: {problem.format(tmp=tmp_path)}")

    def test_the_limits_of_the_page_end_with_it(self, folder, tmp_path, monkeypatch):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "True")
        pixels, during = PIL.Image.MAX_IMAGE_PIXELS, []

        def interrupt(demo, **keywords):
            limits = PIL.Image.MAX_IMAGE_PIXELS, constants.HF_HUB_OFFLINE, os.environ["GRADIO_ANALYTICS_ENABLED"]
            during.append(limits)
            raise KeyboardInterrupt

        monkeypatch.setattr(gr.Blocks, "launch", interrupt)
        with pytest.raises(KeyboardInterrupt):
            serve([folder])
        assert during == [(MAX_MEGAPIXELS * 1_000_000, True, "False")]
        assert pixels == PIL.Image.MAX_IMAGE_PIXELS and not constants.HF_HUB_OFFLINE
        assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "True"

    def test_a_missing_gradio_is_reported_with_the_line_that_installs_it(self, folder, monkeypatch):
        monkeypatch.setitem(sys.modules, "gradio", None)
        monkeypatch.delitem(sys.modules, "hpool_vit.toolkit.demo.page")
        with pytest.raises(ImportError, match=r'gradio is missing.* pip install "hpool-vit\[demo\]"$'):
            serve([folder])
