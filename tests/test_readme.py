import re
import shutil

import numpy as np
import pytest
from helpers import EXAMPLES
from PIL import Image


README = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_readme_has_a_snippet_for_each_thing_that_every_user_does():
    assert len(SNIPPETS) == 4


@pytest.mark.parametrize("snippet", SNIPPETS, ids=["load", "classify", "fine-tune", "build"])
def test_the_snippets_of_the_readme_run(snippet, saved_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("outputs/quickstart", "my-hpool-vit"):
        shutil.copytree(saved_folder, folder)
    pixels = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("photo.jpg")
    for name in ("ant", "bee"):
        for index in range(10):
            (tmp_path / "images" / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.roll(pixels, index)).save(f"images/{name}/{index}.jpg")
    exec(compile(snippet, "README.md", "exec"), {})


def test_the_table_of_the_readme_names_every_field_with_its_default():
    from hpool_vit import HPoolViTConfig

    rows = re.findall(r"^\| (`.+?`) \|(.*?)\| (.+?) \|", README, flags=re.MULTILINE)
    defaults = {}
    for names, _, values in rows:
        names, values = re.findall(r"`(\w+)`", names), values.replace("`", "")
        values = [values] if len(names) == 1 else values.split(", ")
        defaults |= dict(zip(names, values, strict=False))
    config = HPoolViTConfig()
    for name in [*HPoolViTConfig.__annotations__, "num_labels"]:
        expected = getattr(config, name)
        assert defaults[name] in (str(expected), f'"{expected}"', "1e-6" if expected == 1e-6 else ""), name
    aliases = {name for _, cell, _ in rows for name in re.findall(r"`(\w+)", cell)}
    assert set(HPoolViTConfig.attribute_map) <= aliases
