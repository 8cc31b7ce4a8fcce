"""
Classifies images: files, folders at any depth, and addresses.

    python predict.py --model_name_or_path DIR photos cat.jpg https://example.org/dog.jpg
    find photos -name '*.jpg' | python predict.py --model_name_or_path DIR - --output answers.csv
    python predict.py --model_name_or_path DIR photos --contact_sheet sheet.html
    torchrun --nproc_per_node 8 predict.py --model_name_or_path DIR photos --output answers.jsonl

A file that is named twice, such as one that also lies in a folder, is classified once, at its first place. Bad files
(missing, no image, truncated, animated, enormous, an address that does not answer) stand in the result with the
reason, are counted and listed at the end, and stop nothing. Under torchrun or `accelerate launch` the processes share
the files, which all must see, and the first one writes the result, in the order of the names. Result and sheet appear
when they are complete; a run that is killed leaves at most a `.part` file.

The exit status is 0 if every file was classified; 1 if one was bad, if there was none, or if the run broke off; 2 if
it did not start, because of the flags or the model (a launcher makes 1 of that).
"""

import argparse
import contextlib
import math
import os
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image
from tqdm import tqdm
from transformers import Pipeline, pipeline

from ..shared.console import one_line, parse_value
from ..shared.files import written_whole
from ..shared.images import BadImageError, BadImages
from ..shared.saved_model import load_saved_classifier
from .inputs import is_address, list_files, read_image, read_names
from .outputs import FORMATS, SHEET_ENDINGS, WRITERS, Prediction, make_thumbnail, write_contact_sheet


# Processes exchange their answers after so many batches each.
BATCHES_PER_ROUND = 8


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        stop(message, status=2)


def stop(message: Any, status: int) -> NoReturn:
    """Ends the program with one line, from the first process alone."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {one_line(message)}", file=sys.stderr)
    sys.exit(status)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", help="files, folders, http(s) addresses; -: names on standard input")
    parser.add_argument("--model_name_or_path", required=True, help="a saved folder, or an id on the Hub")
    parser.add_argument("--output", type=Path, help="file for the answers (default: standard output)")
    parser.add_argument("--format", choices=WRITERS, help="default: by the ending of --output, else table")
    parser.add_argument("--contact_sheet", type=Path, help="FILE.html or FILE.png with small pictures and answers")
    parser.add_argument(
        "--max_contact_sheet", type=int, default=500, help="files on the sheet, the first ones (default: 500)"
    )
    parser.add_argument("--top_k", type=int, default=5, help="answers per file (default: 5)")
    parser.add_argument("--batch_size", type=int, default=16, help="images at once, per process (default: 16)")
    parser.add_argument("--num_workers", type=int, default=4, help="files read ahead, each in a thread (default: 4)")
    parser.add_argument("--timeout", type=float, default=20, help="seconds for an address to answer (default: 20)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, … (default: an accelerator if there is one)")
    parser.add_argument("--hvt_pool", help="another pooling schedule of the model, such as 1,5 or none")
    parser.add_argument(
        "--merge_ratio", help="of a model that merges: another share, or one per block, such as 0.3,0.2"
    )
    parser.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="run the code of another model's folder; HPool-ViTs need it not",
    )
    parser.add_argument("--disable_tqdm", action="store_true", help="no progress bar on standard error")
    args = parser.parse_intermixed_args(argv)
    try:
        check_arguments(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def check_arguments(args: argparse.Namespace):
    for name in ("top_k", "batch_size", "num_workers", "max_contact_sheet"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least 1.")
    if not args.timeout > 0:
        raise ValueError(f"--timeout {args.timeout} must be more than 0 seconds.")
    if args.format is None:
        if args.output is not None and args.output.suffix.lower() not in FORMATS:
            raise ValueError(f"--output {args.output} ends in none of {', '.join(FORMATS)}: give --format too.")
        args.format = FORMATS[args.output.suffix.lower()] if args.output else "table"
    if args.contact_sheet is not None and args.contact_sheet.suffix.lower() not in SHEET_ENDINGS:
        raise ValueError(f"--contact_sheet {args.contact_sheet} must end in {', '.join(SHEET_ENDINGS)}.")
    for name in ("output", "contact_sheet"):
        path = getattr(args, name)
        if path is None:
            continue
        if path.exists() and not path.is_file():
            raise ValueError(f"--{name} {path} is no file that can be replaced: give another name.")
        if not path.absolute().parent.is_dir():
            raise ValueError(f"--{name} {path}: there is no folder {path.absolute().parent}: make it first.")
    if args.output and args.contact_sheet and args.output.absolute() == args.contact_sheet.absolute():
        raise ValueError(f"--output and --contact_sheet are both {args.output}: give two names.")


def choose_device(name: str | None) -> torch.device | None:
    """The device that was asked for, if any."""
    if name is None:
        return None
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    # Without CUDA, PyTorch raises an AssertionError.
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def find_files(args: argparse.Namespace, state: PartialState) -> list[str]:
    """The files in order, found by the first process: standard input can be read only once."""
    message: list[Any] = [None, None]
    if state.is_main_process:
        try:
            message[0] = list_inputs(args)
        except (ValueError, OSError) as error:
            message[1] = str(error)
    if state.num_processes > 1:
        broadcast_object_list(message)
    files, problem = message
    if problem:
        raise ValueError(problem)
    return files


def list_inputs(args: argparse.Namespace) -> list[str]:
    names = []
    for name in args.inputs:
        names += read_names(sys.stdin.buffer) if name == "-" else [name]
    files, again = list_files(names)
    if again:
        print(f"note: named again, and classified once: {again} of the files.", file=sys.stderr)
    targets = {str(path.absolute()) for path in (args.output, args.contact_sheet) if path}
    if overwritten := [file for file in files if not is_address(file) and os.path.abspath(file) in targets]:
        raise ValueError(f"{overwritten[0]} is to be classified and to be written: write to another file.")
    return files


def load_file(file: str, timeout: float, with_thumbnail: bool) -> tuple[Prediction, Image.Image | None]:
    prediction = Prediction(file)
    try:
        image, prediction.note = read_image(file, timeout)
    except BadImageError as error:
        prediction.reason = str(error)
        return prediction, None
    if with_thumbnail:
        prediction.thumbnail = make_thumbnail(image)
    return prediction, image


def load_ahead(files: list[str], load: Callable[[str], Any], num_workers: int) -> Iterator[Any]:
    """What `load` gives for each file, in order, of which threads load only the next few."""
    waiting: deque[Future] = deque()
    with ThreadPoolExecutor(num_workers) as pool:
        try:
            for file in files:
                waiting.append(pool.submit(load, file))
                if len(waiting) > num_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def classify(
    classifier: Pipeline, files: list[str], args: argparse.Namespace, with_thumbnails: bool = False
) -> Iterator[Prediction]:
    """
    A prediction for each file, in order. Of the images themselves only the few that are read ahead are in memory, and
    one batch at the model's size.
    """
    waiting: deque[Prediction] = deque()
    load = partial(load_file, timeout=args.timeout, with_thumbnail=with_thumbnails)

    def images() -> Iterator[Image.Image]:
        for prediction, image in load_ahead(files, load, args.num_workers):
            waiting.append(prediction)
            if image is not None:
                yield image

    # The answers come in the order of the images; the bad files between them have theirs already.
    for answers in classifier(images(), batch_size=args.batch_size, top_k=args.top_k):
        while waiting[0].reason:
            yield waiting.popleft()
        if all(math.isfinite(answer["score"]) for answer in answers):
            waiting[0].answers = answers
        else:
            waiting[0].reason = "the model's answer is no number"
        yield waiting.popleft()
    yield from waiting


def classify_together(
    classifier: Pipeline, files: list[str], args: argparse.Namespace, state: PartialState
) -> Iterator[Prediction]:
    """The predictions for all files, in order, on every process; each file is classified by one of them."""
    size = args.batch_size * BATCHES_PER_ROUND * state.num_processes
    hidden = args.disable_tqdm or not state.is_main_process
    with tqdm(total=len(files), desc="classifying", unit="file", disable=hidden) as progress:
        for start in range(0, len(files), size):
            round_files = files[start : start + size]
            with_thumbnails = args.contact_sheet is not None and start < args.max_contact_sheet
            with state.split_between_processes(round_files) as own:
                done = []
                for prediction in classify(classifier, own, args, with_thumbnails):
                    done.append(prediction)
                    progress.update()
            everyones = gather_object(done)
            progress.update(len(everyones) - len(done))
            yield from everyones


@contextlib.contextmanager
def open_output(path: Path | None) -> Iterator[Callable[[str], Any]]:
    """A function that writes text: to a file that appears when it is complete, or to standard output."""
    if path is None:
        # Whatever is in names must not stop the program in a terminal that lacks the letter.
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")
        # In a terminal, above the progress bar.
        yield partial(tqdm.write, end="") if sys.stdout.isatty() else sys.stdout.write
        sys.stdout.flush()
        return
    # Bytes of a name that are no UTF-8 become \udc.., which is how JSON writes them.
    text = {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
    with written_whole(path) as part, open(part, "w", **text) as file:
        yield file.write


def predict(classifier: Pipeline, files: list[str], args: argparse.Namespace, state: PartialState) -> int:
    """Classifies and writes; returns how many files could not be classified."""
    start = time.perf_counter()
    bad, num_classified = BadImages(), 0
    writer = WRITERS[args.format](files, min(args.top_k, classifier.model.config.num_labels))
    shown: list[Prediction] = []
    predictions = classify_together(classifier, files, args, state)
    with open_output(args.output) if state.is_main_process else contextlib.nullcontext(drop) as write:
        write(writer.header())
        for prediction in predictions:
            write(writer.row(prediction))
            num_classified += prediction.reason is None
            bad.add(records_of(prediction))
            if len(shown) < args.max_contact_sheet:
                shown.append(prediction)
        if state.is_main_process and args.contact_sheet:
            write_sheet(args, shown, len(files), num_classified)
    if state.is_main_process:
        seconds = time.perf_counter() - start
        print(f"{num_classified} of {len(files)} files classified in {seconds:.1f} s", file=sys.stderr)
        print(bad.summary(), file=sys.stderr)
    return len(files) - num_classified


def drop(text: str):
    """Writes nothing: what processes other than the main one do."""


def records_of(prediction: Prediction) -> list[dict[str, str]]:
    reason = prediction.reason or prediction.note
    kind = "skipped" if prediction.reason else "converted"
    return [{"name": one_line(prediction.file), "kind": kind, "reason": one_line(reason)}] if reason else []


def write_sheet(args: argparse.Namespace, shown: list[Prediction], num_files: int, num_classified: int):
    name = Path(args.model_name_or_path).name
    summary = f"{num_classified} of {num_files} files classified"
    if len(shown) < num_files:
        summary += f"; the first {len(shown)} are shown"
    write_contact_sheet(args.contact_sheet, shown, name, summary)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    args = parse_arguments(argv)
    # Pillow warns of images that are too large. `decode_image` makes an error of that for as long as it runs, which
    # threads that run side by side would undo for each other.
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    try:
        device = choose_device(args.device)
        on_cpu = device.type == "cpu" if device else not torch.accelerator.is_available()
        state = PartialState(cpu=on_cpu)
        if device is None or device == torch.device(state.device.type):
            # Each process has one of its own.
            device = state.device
        given = {"hvt_pool": args.hvt_pool, "merge_ratio": args.merge_ratio}
        overrides = {name: parse_value(name, value) for name, value in given.items() if value is not None}
        files = find_files(args, state)
        model, image_processor, notes = load_saved_classifier(
            args.model_name_or_path, trust_remote_code=args.trust_remote_code, **overrides
        )
    except ValueError as error:
        stop(error, status=2)
    if state.is_main_process and notes:
        print("\n".join(notes), file=sys.stderr)
    classifier = pipeline("image-classification", model=model, image_processor=image_processor, device=device)
    try:
        num_bad = predict(classifier, files, args, state)
    except BrokenPipeError:
        # Whoever read has read enough; Python would complain once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except torch.OutOfMemoryError:
        stop(f"out of memory: lower --batch_size {args.batch_size}.", status=1)
    except (OSError, RuntimeError) as error:
        stop(error, status=1)
    if state.num_processes > 1:
        state.wait_for_everyone()
        state.destroy_process_group()
    return 1 if num_bad or not files else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("error: interrupted; no file was written.")
