"""The presets of the paper's models have as many parameters and multiply-accumulates as its tables say."""

import pytest

from hpool_vit import HPoolViTConfig
from hpool_vit.configuration_hpool_vit import PRESETS
from hpool_vit.toolkit.inspection.stats import model_stats


# Not the paper's.
OURS = {"hpool-s-grid"}

# Parameters in millions, multiply-accumulates in 10⁹ (paper, Tables 1 and 4).
PAPER = {
    "hvt-ti-1": (5.74, 0.64),
    "hvt-s-0": (22.05, 4.57),
    "hvt-s-1": (22.09, 2.40),
    "hvt-s-2": (22.11, 1.94),
    "hvt-s-3": (22.11, 1.62),
    "hvt-s-4": (22.12, 1.39),
    "scale-hvt-ti-4": (22.12, 1.39),
}


@pytest.mark.parametrize("preset", PAPER)
def test_a_preset_has_the_papers_parameters_and_macs(preset):
    parameters, macs = PAPER[preset]
    stats = model_stats(HPoolViTConfig.from_preset(preset))
    assert stats["parameters"] / 1e6 == pytest.approx(parameters, abs=0.01)
    assert stats["macs"] / 1e9 == pytest.approx(macs, abs=0.02)


def test_every_preset_is_checked_against_the_paper():
    assert set(PAPER) | OURS == set(PRESETS)
