"""The page on the configuration names what there is."""

import re

from documentation import ROOT

from hpool_vit import HPoolViTConfig


PAGE = ROOT / "docs" / "configuration.md"


def test_the_table_of_fields_names_every_field_with_its_default():
    rows = re.findall(r"^\| (`.+?`) \|(.*?)\| (.+?) \|", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    defaults = {}
    for names, _, values in rows:
        names, values = re.findall(r"`(\w+)`", names), values.replace("`", "")
        values = [values] if len(names) == 1 else values.split(", ")
        defaults |= dict(zip(names, values, strict=False))
    config = HPoolViTConfig()
    fields = [name.removeprefix("_") for name in HPoolViTConfig.__annotations__]
    for name in [*fields, "num_labels"]:
        expected = getattr(config, name)
        assert defaults[name] in (str(expected), f'"{expected}"', "1e-6" if expected == 1e-6 else ""), name
    aliases = {name for _, cell, _ in rows for name in re.findall(r"`(\w+)", cell)}
    assert set(HPoolViTConfig.attribute_map) <= aliases
