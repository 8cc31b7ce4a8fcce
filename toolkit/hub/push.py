"""
Shares a trained HPool-ViT on the Hugging Face Hub: prepares a complete model repository, shows it, and uploads it.

    python push_to_hub.py --model_name_or_path DIR --repo_id owner/name --license cc-by-4.0 \
        --results docs/results/training_digits.json --examples "a bee=photos/bee.jpg" photos/ant.jpg --dry_run

The repository has the weights, the code, the image processor, a card with metadata, results and citation, the licence
of the code, and examples for the page's widget with the model's answers. A card that DIR has, such as the one that the
training programs write, is kept: results, training, data, hardware, pictures and whatever was written by hand. How to
use, licence, examples and citation are written anew. Without a card the training's records (`all_results.json`,
`training.yaml`) are read. Left out are checkpoints, optimizer states, logs, whatever else lies in DIR, the folders in
absolute paths, and what cameras write into photos.

With --dry_run the repository is left in --output_dir and nothing is sent. To upload, log in first: `hf auth login`,
or HF_TOKEN. The exit status is 0, or 1 with one line that says what is wrong.
"""

import argparse
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, get_token
from tqdm import tqdm

from ..shared.console import one_line, run
from .repository import prepare_repository


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", type=Path, required=True, help="folder of the trained model")
    parser.add_argument("--repo_id", required=True, help="owner/name on the Hub")
    parser.add_argument("--dry_run", action="store_true", help="prepare and show, upload nothing")
    parser.add_argument(
        "--output_dir", type=Path, help="where the repository is prepared (default of --dry_run: outputs/hub/<name>)"
    )
    parser.add_argument("--private", action="store_true", help="only you and your organisation can see it")
    parser.add_argument("--license", help="licence of the weights, as the Hub names it, such as apache-2.0 or other")
    parser.add_argument("--results", type=Path, nargs="+", default=[], help="JSON files with metrics or comparisons")
    parser.add_argument("--examples", nargs="+", default=[], help="images for the page, each FILE or TITLE=FILE")
    parser.add_argument("--commit_message", default="Upload HPool-ViT")
    return parser.parse_args(argv)


def show(folder: Path):
    """Prints the files with their sizes, and the card."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for file in files:
        print(f"{tqdm.format_sizeof(file.stat().st_size, 'B'):>8}  {file.relative_to(folder).as_posix()}")
    total = sum(file.stat().st_size for file in files)
    print(f"{tqdm.format_sizeof(total, 'B'):>8}  in {len(files)} files")
    print(f"\n--- README.md ---\n{(folder / 'README.md').read_text(encoding='utf-8')}--- end of README.md ---\n")


def upload(folder: Path, repo_id: str, private: bool, commit_message: str) -> str:
    """
    Makes the repository on the Hub if it is not there, and uploads the folder in one commit.

    Returns:
        The address of the repository.

    Raises:
        ValueError: in one line, whatever goes wrong; also if `private` is asked of a repository that is public.
    """
    api = HfApi()
    try:
        address = str(api.create_repo(repo_id, private=private or None, exist_ok=True))
        is_public = not api.model_info(repo_id).private
        if not (private and is_public):
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)
    # The client's errors have no class in common.
    except Exception as error:
        raise ValueError(f"{repo_id} was not uploaded: {one_line(error) or type(error).__name__}") from error
    if private and is_public:
        raise ValueError(f"--private: {repo_id} exists and is public. Nothing was uploaded: make it private first.")
    return address


def share(args: argparse.Namespace, output_dir: Path):
    notes = prepare_repository(
        args.model_name_or_path,
        args.repo_id,
        output_dir,
        license=args.license,
        results=args.results,
        examples=args.examples,
    )
    show(output_dir)
    for note in notes:
        print(f"note: {note}.")
    if args.dry_run:
        print(f"{args.repo_id} is prepared in {output_dir}; nothing was uploaded.")
    else:
        print("uploaded: " + upload(output_dir, args.repo_id, args.private, args.commit_message))


def main(argv: list[str] | None = None):
    args = parse_arguments(argv)
    if not args.dry_run and get_token() is None:
        raise ValueError("There is no token for the Hub: run `hf auth login`, set HF_TOKEN, or give --dry_run.")
    if args.output_dir is not None:
        share(args, args.output_dir)
    elif args.dry_run:
        share(args, Path("outputs", "hub", args.repo_id.rpartition("/")[2]))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            share(args, Path(scratch) / "repository")


if __name__ == "__main__":
    run(main)
