"""Find the images in a folder: each real file once, without what systems leave there, and with notes on the rest."""

import os
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from .console import one_line
from .images import readable_endings


# What archives, network drives and systems leave beside images. Names that begin with a dot are left out anyway.
SYSTEM_NAMES = {
    "__macosx", "__pycache__", "@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "desktop.ini",
    "ehthumbs.db", "lost+found", "system volume information", "thumbs.db",
}  # fmt: skip


@dataclass
class FolderListing:
    """
    What [`list_images`] finds.

    Attributes:
        folder: the folder, as it was given.
        files: the image files at any depth; those of a folder are sorted and stand before those of its sub-folders.
        subfolders: the names of the folders directly in `folder`, sorted, whether they hold images or not.
        other_endings: how many files were left out, by their ending.
        links: the links that were left out, because what they lead to is listed at another path or holds `folder`.
        not_regular: pipes, sockets and devices, which were left out.
        unreadable: folders that cannot be read, with the reason.
    """

    folder: str
    files: list[str] = field(default_factory=list)
    subfolders: list[str] = field(default_factory=list)
    other_endings: Counter[str] = field(default_factory=Counter)
    links: list[str] = field(default_factory=list)
    not_regular: list[str] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)

    def by_subfolder(self) -> dict[str, list[str]]:
        """The files of each folder directly in `folder`; the files of a sub-folder may be none."""
        found: dict[str, list[str]] = {name: [] for name in self.subfolders}
        start = len(os.path.join(self.folder, ""))
        for file in self.files:
            name, separator, _ = file[start:].partition(os.sep)
            if separator:
                found[name].append(file)
        return found

    def notes(self) -> list[str]:
        """One line for each kind of entry that was left out."""
        notes = [f"{path} cannot be read: {reason}" for path, reason in self.unreadable.items()]
        if number := self.other_endings.total():
            endings = self.other_endings.most_common()
            shown = [ending if len(endings) == 1 else f"{ending} ({count})" for ending, count in endings]
            notes.append(f"{counted(number, 'file')} with other endings {were(number)} left out: {some(shown)}")
        for paths, one, several in (
            (self.links, "link to files that are listed elsewhere", "links to files that are listed elsewhere"),
            (self.not_regular, "pipe or device", "pipes or devices"),
        ):
            if paths:
                names = [os.path.relpath(path, self.folder) for path in paths]
                number = len(names)
                notes.append(f"{number} {one if number == 1 else several} {were(number)} left out: {some(names)}")
        return [f"{escaped(self.folder)}: {escaped(note)}" for note in notes]


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def were(number: int) -> str:
    return "was" if number == 1 else "were"


def list_images(folder: str | os.PathLike[str]) -> FolderListing:
    """
    Lists the image files in a folder, at any depth. Hidden entries and those in `SYSTEM_NAMES` are left out. Links are
    followed, but each file and folder is listed once: where it lies, if that is in `folder` too. A link that leads
    nowhere is listed like a file, so that it is reported with the files that cannot be read.
    """
    walk = _Walk(os.fspath(folder))
    walk.read_folders()
    walk.add_linked_files()
    listing = walk.listing
    listing.subfolders.sort()
    listing.links.sort()
    listing.files.sort(key=lambda file: (os.path.dirname(file).split(os.sep), os.path.basename(file)))
    return listing


class _Walk:
    """The state of [`list_images`]."""

    def __init__(self, folder: str):
        self.listing = FolderListing(folder)
        self.endings = readable_endings()
        # A link to a folder that holds this one would bring in its neighbours, and this one again.
        self.above = {_identity(parent) for parent in Path(os.path.realpath(folder)).parents if parent.exists()}
        self.visited: set[tuple[int, int]] = set()
        # To be read, each with its depth.
        self.folders = deque([(folder, 0)])
        self.links = deque[tuple[str, int]]()
        self.linked_files: list[str] = []

    def read_folders(self) -> None:
        """Reads all real folders before the first link: what lies in the folder keeps its own place."""
        while self.folders or self.links:
            path, depth = self.folders.popleft() if self.folders else self.links.popleft()
            try:
                identity = _identity(path)
                if identity in self.above or identity in self.visited:
                    self.listing.links.append(path)
                    continue
                self.visited.add(identity)
                if depth == 1:
                    self.listing.subfolders.append(os.path.basename(path))
                with os.scandir(path) as entries:
                    for entry in sorted(entries, key=lambda entry: entry.name):
                        self.take(entry, depth)
            except OSError as error:
                self.listing.unreadable[path] = error.strerror or str(error)

    def take(self, entry: os.DirEntry[str], depth: int) -> None:
        if not is_visible(entry.name):
            return
        if _is_folder(entry):
            (self.links if entry.is_symlink() else self.folders).append((entry.path, depth + 1))
        elif self.has_image_ending(entry.name):
            if entry.is_symlink():
                self.linked_files.append(entry.path)
            elif entry.is_file():
                self.listing.files.append(entry.path)
            else:
                self.listing.not_regular.append(entry.path)

    def has_image_ending(self, name: str) -> bool:
        ending = os.path.splitext(name)[1].lower()
        if ending in self.endings:
            return True
        self.listing.other_endings[ending or "no ending"] += 1
        return False

    def add_linked_files(self) -> None:
        taken = set()
        for path in sorted(self.linked_files):
            target = os.path.realpath(path)
            if target in taken or self.is_listed(target):
                self.listing.links.append(path)
            elif os.path.exists(target) and not os.path.isfile(target):
                self.listing.not_regular.append(path)
            else:
                taken.add(target)
                self.listing.files.append(path)

    def is_listed(self, file: str) -> bool:
        """Whether a real file lies in a folder that was read, and was not left out there."""
        name = os.path.basename(file)
        if not os.path.isfile(file) or not is_visible(name) or os.path.splitext(name)[1].lower() not in self.endings:
            return False
        try:
            return _identity(os.path.dirname(file)) in self.visited
        except OSError:
            return False


def is_visible(name: str) -> bool:
    """Whether an entry of a folder is neither hidden nor left there by a system."""
    return not name.startswith(".") and name.lower() not in SYSTEM_NAMES


def as_utf8(name: str) -> str:
    """A name that any file can hold: bytes that are not UTF-8 become `\\xe9`. Other names stay as they are."""
    return os.fsencode(name).decode(errors="backslashreplace")


def escaped(name: str) -> str:
    """A name for a message: UTF-8, and on one line."""
    return one_line(as_utf8(name))


def some(values: Iterable[object], most: int = 10) -> str:
    """The first values, for a message of one line."""
    values = [str(value) for value in values]
    return ", ".join(values[:most]) + (f", … ({len(values)} in all)" if len(values) > most else "")


def _identity(path: str | os.PathLike[str]) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
