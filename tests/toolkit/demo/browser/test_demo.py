"""The demo page in a real browser, as a visitor uses it."""

import os
import re
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from helpers import TOOLKIT, run_command
from image_files import BAD_FILES, encoded, picture
from PIL import Image
from playwright.sync_api import expect
from transformers import pipeline


pytestmark = pytest.mark.demo
TIMEOUT = 60_000


@pytest.fixture(scope="session")
def scans(digits, tmp_path_factory) -> list[Path]:
    """Files of handwritten digits that the page does not offer as examples."""
    folder = tmp_path_factory.mktemp("scans")
    files = [folder / f"scan{number}.png" for number in range(3)]
    for number, file in enumerate(files):
        digits["test"][300 + number]["image"].save(file)
    return files


@pytest.fixture(scope="session")
def classifier(digits_folder):
    return pipeline("image-classification", model=str(digits_folder))


def upload(page, *files):
    page.locator("#upload input[type=file]").set_input_files(files)


def clear(page):
    """Removes the files, to which the next upload would be added."""
    page.locator("#upload").get_by_label("Clear").click()


def wait_for_caption(page, caption):
    """Waits until the gallery shows this answer."""
    expect(page.locator("#images .caption-label").first).to_have_text(caption)


def classes(page) -> dict[str, int]:
    """The names and percentages beside the bars, from the top."""
    lines = page.locator("#classes .confidence-set").all_inner_texts()
    return {line.split("\n")[0].strip(): int(re.search(r"(\d+)%", line)[1]) for line in lines}


def check_classes(page, expected):
    """Waits for the answer: that to the image before may have the same caption."""
    deadline = time.monotonic() + TIMEOUT / 1000
    while classes(page) != expected and time.monotonic() < deadline:
        page.wait_for_timeout(100)
    assert classes(page) == expected


def expected_classes(classifier, file) -> dict[str, float]:
    """The classes and percentages of the pipeline. The page rounds to whole percent."""
    scores = {entry["label"]: 100 * entry["score"] for entry in classifier(str(file), top_k=5)}
    return pytest.approx(scores, abs=0.51)


def expected_caption(classifier, file) -> str:
    [best] = classifier(str(file), top_k=1)
    return f"{best['label']} {best['score']:.0%}"


def test_the_page_opens_with_an_example_answered(page):
    expect(page.locator("#images .caption-label")).to_have_count(1)
    expect(page.locator("#examples .thumbnail-item")).to_have_count(10)
    expect(page.locator("#classes .confidence-set")).to_have_count(5)
    expect(page.locator("#panels img")).to_be_visible()


def test_a_photo_gets_the_answer_of_the_pipeline_and_what_it_costs(page, classifier, scans):
    upload(page, scans[0])
    wait_for_caption(page, expected_caption(classifier, scans[0]))
    check_classes(page, expected_classes(classifier, scans[0]))
    assert re.fullmatch(r"[\d.]+ ms\nper image, .*", page.locator("#latency").inner_text())
    assert re.fullmatch(r"[\d,]+ / s\nimages, one by one", page.locator("#rate").inner_text())
    assert page.locator("#tokens-per-stage b").inner_text() == "64 → 31 → 15"
    assert re.match(r"[\d.]+ M MACs\n\d+% of the MACs", page.locator("#macs").inner_text())
    expect(page.locator("#panels img")).to_have_js_property("complete", True)
    assert page.locator("#panels img").evaluate("image => image.naturalWidth") > 600


def test_an_example_is_answered_when_it_is_chosen(page):
    before = page.locator("#images img").get_attribute("src")
    page.locator("#examples .thumbnail-item").nth(6).click()
    expect(page.locator("#images img")).not_to_have_attribute("src", before)
    expect(page.locator("#classes .confidence-set")).to_have_count(5)


def classes_other_than(before: dict, page) -> dict:
    """The answer, once it has changed: it comes after the numbers of tokens."""
    start = time.monotonic()
    while (answer := classes(page)) == before and time.monotonic() - start < 20:
        page.wait_for_timeout(50)
    return answer


def test_the_slider_changes_schedule_costs_and_answer(page, classifier, scans):
    upload(page, scans[0])
    wait_for_caption(page, expected_caption(classifier, scans[0]))
    slider = page.locator("#schedule input[type=range]")
    macs, answers = [], [classes(page)]
    for key, tokens in (("Home", "64 → 31 → 15 → 7"), ("ArrowRight", "64 → 31 → 15"), ("ArrowRight", "64 → 31")):
        slider.press(key)
        expect(page.locator("#tokens-per-stage b")).to_have_text(tokens)
        expect(page.locator("#tokens figure")).to_have_count(tokens.count("→") + 1)
        macs.append(float(page.locator("#macs b").inner_text().split()[0]))
        answers.append(classes_other_than(answers[-1], page))
    _, *answers = answers
    assert macs == sorted(macs) and macs[0] < macs[2]
    assert answers[1] == expected_classes(classifier, scans[0])
    # Two of them may agree to the percent.
    assert len({str(answer) for answer in answers}) > 1


def test_several_images_are_answered_together_and_explained_one_by_one(page, classifier, scans):
    upload(page, *scans)
    expect(page.locator("#images .caption-label")).to_have_count(3)
    captions = page.locator("#images .caption-label").all_inner_texts()
    assert captions == [expected_caption(classifier, file) for file in scans]
    assert page.locator("#rate").inner_text().endswith("in a batch of 3")
    check_classes(page, expected_classes(classifier, scans[0]))
    page.locator("#images .thumbnail-item").nth(2).click()
    expect(page.locator("#classes .confidence-set").first).to_contain_text(captions[2].split()[0])
    check_classes(page, expected_classes(classifier, scans[2]))


@pytest.mark.parametrize("name", ["cut_off.jpg", "text.jpg", "moving.gif", "enormous.png", "dot.png", "empty.jpg"])
def test_a_wrong_file_gets_a_message_and_the_page_goes_on(page, classifier, scans, name, tmp_path):
    data, reason = BAD_FILES[name]
    (tmp_path / name).write_bytes(data)
    upload(page, tmp_path / name)
    expect(page.locator("#messages")).to_contain_text(f"{name} cannot be shown: {reason}")
    expect(page.locator("#images .caption-label")).to_have_count(0)
    assert "Traceback" not in page.inner_text("body")
    clear(page)
    expect(page.locator("#messages .message")).to_have_count(0)
    upload(page, scans[0])
    wait_for_caption(page, expected_caption(classifier, scans[0]))


def test_a_wrong_file_among_others_does_not_stop_them(page, scans, tmp_path):
    (tmp_path / "<b>notes.txt").write_text("no picture")
    upload(page, scans[0], tmp_path / "<b>notes.txt", scans[1])
    expect(page.locator("#messages")).to_contain_text("notes.txt cannot be shown: unreadable")
    expect(page.locator("#images .caption-label")).to_have_count(2)
    expect(page.locator("#messages b")).to_have_count(0)


def test_a_file_that_is_too_large_is_refused_before_it_is_sent(page, classifier, scans, tmp_path):
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(21 * 2**20)
    upload(page, tmp_path / "large.png")
    expect(page.get_by_text("exceed the maximum allowed size of 20")).to_be_visible()
    upload(page, scans[1])
    wait_for_caption(page, expected_caption(classifier, scans[1]))


def test_of_too_many_files_the_first_are_answered(page, tmp_path):
    files = [tmp_path / f"{number}.png" for number in range(18)]
    for number, file in enumerate(files):
        file.write_bytes(encoded(picture(number)))
    upload(page, *files)
    expect(page.locator("#messages")).to_contain_text("You gave 18 files. These are the first 16.")
    expect(page.locator("#images .caption-label")).to_have_count(16)


def test_another_model_answers_the_same_images_and_hides_the_slider(page, scans):
    upload(page, scans[0])
    expect(page.locator("#schedule")).to_be_visible()
    page.locator("#model input").click()
    page.get_by_role("option", name="tiny-hpool-vit").click()
    expect(page.locator("#classes .confidence-set")).to_have_count(3)
    assert set(classes(page)) == {"ant", "bee", "cat"}
    expect(page.locator("#images .caption-label")).to_have_count(1)
    expect(page.locator("#schedule")).to_have_count(0)
    expect(page.locator("#examples .thumbnail-item")).to_have_count(0)


def test_two_visitors_have_each_their_own_schedule(page, browser, app, classifier, scans):
    other = browser.new_page()
    other.goto(app.url)
    for visitor in (page, other):
        upload(visitor, scans[0])
        wait_for_caption(visitor, expected_caption(classifier, scans[0]))
    other.locator("#schedule input[type=range]").press("End")
    expect(other.locator("#tokens-per-stage b")).to_have_text("64 → 31")
    clear(page)
    upload(page, scans[1])
    wait_for_caption(page, expected_caption(classifier, scans[1]))
    assert page.locator("#tokens-per-stage b").inner_text() == "64 → 31 → 15"
    other.close()


def test_no_file_of_the_machine_and_no_interface_for_programs_is_served(app, digits_folder):
    for path in (digits_folder / "config.json", TOOLKIT / "demo" / "app.py", "/etc/passwd"):
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"{app.url}gradio_api/file={path}")
    with urllib.request.urlopen(f"{app.url}gradio_api/info") as answer:
        assert b'"named_endpoints":{}' in answer.read()


def test_the_command_ends_in_one_line_when_its_port_is_taken(app, saved_folder):
    port = re.search(r":(\d+)", app.url.removeprefix("http://"))[1]
    result = run_command("demo", saved_folder, "--server_port", port, check=False)
    assert result.returncode == 1 and re.fullmatch(r"error: .*port.*\n", result.stderr)


def test_the_page_as_a_picture(page, tmp_path):
    """`HPOOL_VIT_SCREENSHOT` names the file of the picture in the README."""
    page.locator("#examples .thumbnail-item").nth(3).click()
    expect(page.locator("#images .caption-label")).to_have_text(re.compile(r"^3 \d+%$"))
    file = Path(os.environ.get("HPOOL_VIT_SCREENSHOT") or tmp_path / "demo.png")
    file.parent.mkdir(parents=True, exist_ok=True)
    page.mouse.move(0, 0)
    expect(page.locator("#panels img")).to_have_js_property("complete", True)
    page.screenshot(path=file, full_page=True, animations="disabled")
    screenshot = Image.open(file).convert("RGB")
    left, top, width, height = page.locator("#panels img").bounding_box().values()
    panels = screenshot.crop((left, top, left + width, top + height))
    assert screenshot.width == 1240 and len(panels.getcolors(panels.width * panels.height)) > 100
