"""An export that the disk refuses."""

from helpers import run_python


# In a process of its own, which PyTorch's writer would end.
EXPORT = """
import resource, sys
from hpool_vit.toolkit.export.export import export_model

limits = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
for file_format in sys.argv[3:]:
    try:
        export_model(sys.argv[1], sys.argv[2], format=file_format)
    except OSError as error:
        print(file_format, "refused:", error)
"""


def test_an_export_on_a_full_disk_is_an_error_and_leaves_nothing(saved_folder, tmp_path):
    formats = ("onnx", "torch_export")
    lines = run_python("-c", EXPORT, saved_folder, tmp_path / "out", *formats).stdout.splitlines()
    refused = [line for line in lines if " refused: " in line and "File too large" in line]
    assert [line.partition(" ")[0] for line in refused] == list(formats)
    assert not list(tmp_path.iterdir())
