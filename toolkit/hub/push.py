"""Sharing a trained HPool-ViT on the Hugging Face Hub: the repository is prepared, shown, and uploaded."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from huggingface_hub import HfApi, get_token
from tqdm import tqdm

from ..shared.console import command_line_names, name_flags, needs, one_line


def show(folder: Path):
    """Prints the files with their sizes, and the card."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for file in files:
        print(f"{tqdm.format_sizeof(file.stat().st_size, 'B'):>8}  {file.relative_to(folder).as_posix()}")
    total = sum(file.stat().st_size for file in files)
    print(f"{tqdm.format_sizeof(total, 'B'):>8}  in {len(files)} files")
    print(f"\n--- README.md ---\n{(folder / 'README.md').read_text(encoding='utf-8')}--- end of README.md ---\n")


def upload_repository(
    folder: str | Path, repo_id: str, *, private: bool = False, commit_message: str = "Upload HPool-ViT"
) -> str:
    """
    Uploads a folder in one commit, and creates the repository on the Hub if it does not exist.

    Args:
        folder: a folder as [`prepare_repository`] writes it.
        repo_id: `owner/name` on the Hub.
        private: whether only you and your organization may see the repository.
        commit_message: the first line of the commit.

    Returns:
        The address of the repository.

    Raises:
        ValueError: in one line, for any failure. Also if `private` is requested for a repository that is public.
    """
    api = HfApi()
    try:
        address = str(api.create_repo(repo_id, private=private or None, exist_ok=True))
        is_public = not api.model_info(repo_id).private
        if not (private and is_public):
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)
    # The client's errors have no common class.
    except Exception as error:
        raise ValueError(f"{repo_id} was not uploaded: {one_line(error) or type(error).__name__}") from error
    if private and is_public:
        raise ValueError(
            f"`private` is requested, but {repo_id} exists and is public. Nothing was uploaded: make it private first."
        )
    return address


def command(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of the model and its image processor.")],
    repo_id: Annotated[str, typer.Option(help="Where to upload to: owner/name on the Hub.")],
    dry_run: Annotated[bool, typer.Option(help="Prepare and show the repository, but upload nothing.")] = False,
    output_dir: Annotated[
        Path | None,
        typer.Option(help="Keep the prepared repository in this folder. With --dry_run: outputs/hub/NAME."),
    ] = None,
    private: Annotated[bool, typer.Option(help="Only you and your organization can see the repository.")] = False,
    license: Annotated[
        str | None,
        typer.Option(help="License of the weights, as the Hub spells it: apache-2.0, cc-by-4.0, other, …"),
    ] = None,
    results: Annotated[
        list[Path] | None,
        typer.Option(help="JSON file with metrics or a comparison to show in the card. Repeat it for several files."),
    ] = None,
    examples: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[TITLE=]FILE", help="Image to try on the model's page, with its title. Repeat it for several."
        ),
    ] = None,
    commit_message: Annotated[str, typer.Option(help="First line of the commit on the Hub.")] = "Upload HPool-ViT",
) -> None:
    """
    Write a complete model repository and upload it to the Hugging Face Hub.

    The repository holds the weights, the code, the image processor, a model card, the license of the code, and example
    images with the model's answers. If MODEL has a card, its results, training, data, hardware and pictures and all
    sections that you wrote are kept; otherwise the records of the training are read (training.yaml,
    all_results.json). Checkpoints, optimizer states, logs, other files, the folders in absolute paths, and the data
    that cameras store in photos are left out.

    Look at the repository first with --dry_run. To upload, log in with `hf auth login` or set HF_TOKEN.
    """
    if not dry_run and get_token() is None:
        raise ValueError("There is no token for the Hub: run `hf auth login`, set HF_TOKEN, or use `dry_run`.")
    if dry_run and output_dir is None:
        output_dir = Path("outputs", "hub", repo_id.rpartition("/")[2])
    with needs("predict"), tempfile.TemporaryDirectory() as scratch:
        from .repository import prepare_repository

        folder = output_dir or Path(scratch) / "repository"
        notes = prepare_repository(
            model, repo_id, folder, license=license, results=results or [], examples=examples or []
        )
        show(folder)
        names = command_line_names(context.command.params)
        for note in notes:
            print(f"note: {name_flags(note, names)}")
        if dry_run:
            print(f"{repo_id} is prepared in {folder}. Nothing was uploaded.")
        else:
            address = upload_repository(folder, repo_id, private=private, commit_message=commit_message)
            print(f"uploaded: {address}")
