"""The site of `docs/`: it builds without a warning, its links lead on, and it loads nothing from the internet."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from documentation import PAGES, ROOT, without_code

import hpool_vit
from hpool_vit import HPoolViTConfig


LINK = re.compile(r"\]\(([^)\s]+)\)")


class Page(HTMLParser):
    """What a page loads, and its text."""

    def __init__(self, html: str):
        super().__init__()
        self.loaded: list[str] = []
        self.code: list[str] = []
        self.text = ""
        self.inside: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag in ("script", "img", "iframe", "source"):
            self.loaded.append(attrs.get("src") or "")
        elif tag == "link" and attrs.get("rel") not in ("canonical", "prev", "next", "alternate"):
            self.loaded.append(attrs.get("href") or "")
        if tag in ("script", "style", "pre", "code"):
            self.inside.append(tag)

    def handle_endtag(self, tag):
        if self.inside and self.inside[-1] == tag:
            self.inside.pop()

    def handle_data(self, data):
        if not self.inside:
            self.text += data
        elif self.inside == ["code"]:
            self.code.append(data)


# They build the site, which takes half a minute.
builds_site = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site as `make docs` builds it. A link or an anchor that leads nowhere is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return folder


def built(page: Path) -> str:
    return page.relative_to(ROOT / "docs").with_suffix(".html").as_posix()


@builds_site
def test_every_page_is_in_the_navigation(site):
    navigation = (site / "index.html").read_text()
    for page in PAGES[1:]:
        assert (site / built(page)).is_file()
        assert f'href="{built(page)}"' in navigation, page


@builds_site
def test_the_site_loads_nothing_from_elsewhere(site):
    for path in site.rglob("*.html"):
        for address in Page(path.read_text()).loaded:
            assert urlsplit(address).scheme in ("", "data") and not address.startswith("//"), (path, address)
    for path in site.rglob("*.css"):
        # Addresses within `data:` name XML's own vocabulary.
        assert not re.findall(r"""(?:url\(|@import )\s*["']?https?:""", path.read_text()), path


@builds_site
def test_links_out_of_the_documentation_lead_to_pages_that_show_the_file(site):
    training = (site / "training.html").read_text()
    for link, name, shown in (
        ("source/examples/run_image_classification.py.html", "run_image_classification.py", "TrainingArguments"),
        ("source/examples/accelerate.html", "one_gpu.yaml", "mixed_precision"),
    ):
        assert f'href="{link}"' in training
        html = (site / link).read_text()
        assert name in Page(html).text and shown in html
    # Markdown is shown as a page, whose own links lead on.
    assert 'href="source/CONTRIBUTING.md.html"' in (site / "index.html").read_text()
    contributing = (site / "source/CONTRIBUTING.md.html").read_text()
    assert 'href="../how_it_works.html#how-the-pictures-were-made"' in contributing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_of_a_page_work_on_github(page):
    for link in LINK.findall(without_code(page)):
        address = urlsplit(link)
        if address.scheme or address.netloc:
            assert address.scheme == "https" and "." in address.netloc, link
            continue
        target = (page.parent / address.path).resolve() if address.path else page
        assert target.exists() and target.is_relative_to(ROOT), link
        if address.fragment and target.name != "api.md":  # whose headings are made from the docstrings
            assert address.fragment in headings(target), link


def headings(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@builds_site
def test_the_reference_documents_every_public_class_and_every_field(site):
    html = (site / "api.html").read_text()
    anchors = {anchor.rpartition(".")[2] for anchor in re.findall(r'id="([\w.]+)"', html)}
    names = set(hpool_vit.__all__) - {"HPoolViTPreTrainedModel"}
    functions = {"convert_hvt", "convert_vit", "model_stats", "trace_pooling"}
    assert names | functions <= anchors
    for name, default in vars(HPoolViTConfig()).items():
        if name in HPoolViTConfig.__annotations__ and not name.startswith("_"):
            row = re.search(rf"<tr[^>]*>\s*<td>\s*<code>[^<]*\b{name}\b.*?</tr>", html, flags=re.DOTALL)
            assert row, name
            shown = Page(row[0]).code[-1].replace("&#34;", '"')
            assert shown in (str(default), f'"{default}"', "1e-6", "3 and 2"), (name, shown)


@builds_site
def test_the_reference_shows_no_markup(site):
    page = Page((site / "api.html").read_text())
    assert not re.findall(r"\[`|`\]|\*optional\*|Args:", page.text)
    assert not [code for code in page.code if "`" in code]


@builds_site
def test_the_reference_has_what_decorators_add_to_the_models(site):
    text = Page((site / "api.html").read_text()).text
    assert "HPool-ViT without a head" in text and "HPool-ViT with an image classification head" in text
    assert "Whether to resize the position embeddings to the images" in text
