"""An export that the disk refuses."""

import pytest
from helpers import run_python


# In a process of its own, which PyTorch's writer would end.
EXPORT = """
import resource, sys
from hpool_vit.toolkit.export.export import export_model

limits = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
try:
    export_model(sys.argv[1], sys.argv[2], format=sys.argv[3])
except OSError as error:
    print("refused:", error)
"""


@pytest.mark.parametrize("file_format", ["onnx", "torch_export"])
def test_an_export_on_a_full_disk_is_an_error_and_leaves_nothing(file_format, saved_folder, tmp_path):
    printed = run_python("-c", EXPORT, saved_folder, tmp_path / "out", file_format).stdout
    assert "refused: " in printed and "File too large" in printed
    assert not list(tmp_path.iterdir())
