import re

from documentation import ROOT, read_blocks

from hpool_vit import HPoolViTConfig


README = ROOT / "README.md"


def test_the_readme_shows_what_every_user_does():
    python = "\n".join(block.text for block in read_blocks(README) if block.language == "python")
    for call in ("from_pretrained(", "pipeline(", "trainer.train()", "from_preset("):
        assert call in python, call


def test_the_table_of_the_readme_names_every_field_with_its_default():
    rows = re.findall(r"^\| (`.+?`) \|(.*?)\| (.+?) \|", README.read_text(encoding="utf-8"), flags=re.MULTILINE)
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
