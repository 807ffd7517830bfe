"""A folder of images with a folder for each class: timm's reader, with an eye on what it leaves out."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from timm.data import get_img_extensions
from timm.data.readers.reader_image_folder import ReaderImageFolder

from timm_synermix.data.classes import some


@dataclass
class Walk:
    """What is in a folder of images.

    Args:
        images: The images, each with its class, the name of the folder that it lies in.
        folders: The folders of each class, from the root.
        ignored: How many files there are of each other ending (of the name itself, if it has none).
        empty: Folders without images and without folders.
        odd: What is left out because reading it might never end: links to a folder above, pipes, sockets, devices.
    """

    images: list[tuple[str, str]] = field(default_factory=list)
    folders: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    ignored: Counter[str] = field(default_factory=Counter)
    empty: list[str] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)


def walk_images(root: str, endings: set[str]) -> Walk:
    """Find the images below a folder, through links too, as timm does; but not for ever.

    A link to a folder that it lies in is left out; and below a folder that was linked to, one to any that was seen.

    Args:
        root: The folder.
        endings: Endings of images in small letters, as '.png'.

    Raises:
        ValueError: A folder cannot be read.
    """
    walk = Walk()
    status = os.stat(root)
    seen = {(status.st_dev, status.st_ino)}
    waiting: list[tuple[str, frozenset[Any], bool]] = [('', frozenset(seen), False)]
    while waiting:
        folder, above, linked = waiting.pop()
        label = os.path.basename(folder)
        nothing_here, before = True, len(walk.images)
        for entry in _entries(root, folder):
            ending = os.path.splitext(entry.name)[1].lower()
            if _is(entry.is_dir):
                nothing_here = False
                path = os.path.join(folder, entry.name)
                status = entry.stat()
                key = (status.st_dev, status.st_ino)
                if entry.is_symlink() and key in (seen if linked else above):
                    walk.odd.append(path)
                    continue
                seen.add(key)
                waiting.append((path, above | {key}, linked or entry.is_symlink()))
            elif ending not in endings:
                walk.ignored[ending or entry.name] += 1
            elif _is(entry.is_file) or not os.path.exists(entry.path):  # a dead link is an image that cannot be read
                nothing_here = False
                walk.images.append((entry.path, label))
            else:
                walk.odd.append(os.path.join(folder, entry.name))
        if len(walk.images) > before:
            walk.folders[label].add(folder)
        if nothing_here and folder:
            walk.empty.append(folder)
    return walk


def _entries(root: str, folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(os.path.join(root, folder)) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise ValueError(f"--data-dir: the folder '{folder}' in '{root}' cannot be read: {error.strerror}.") from error


def _is(kind: Any) -> bool:
    try:
        return bool(kind())
    except OSError:  # a link to itself
        return False


def natural_order(name: str) -> tuple[list[Any], str]:
    """A key that sorts as timm does, 'img9' before 'img10', and what is equal to timm ('a' and 'A') by letter."""
    return _natural_parts(name), name


def _natural_parts(name: str) -> list[Any]:
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r'(\d+)', name.lower()))]


class FolderReader(ReaderImageFolder):
    """timm's reader of an image folder, with one order of the classes for all times and what it leaves out noted.

    Args:
        root: The folder.
        class_map: Number of each class by name; None for those in the folder, in natural order.
        input_key: Endings of images, separated by ';'. None for those of timm.
        labelled: False also takes images that lie in no folder of a class.

    Raises:
        ValueError: There are no images, not even one of the class map; a name of a class is not UTF-8; or images lie in
            no folder of a class.
    """

    def __init__(
        self,
        root: str,
        class_map: Mapping[str, int] | None = None,
        input_key: str | None = None,
        labelled: bool = True,
    ) -> None:
        self.root = root
        self.endings = set(get_img_extensions(as_set=True))
        if input_key:
            self.endings = {'.' + ending.strip().lstrip('.').lower() for ending in input_key.split(';') if ending}
        self.walk = walk_images(root, self.endings)
        self._check(labelled)
        names = sorted(self.walk.folders, key=natural_order)
        self.class_to_idx = {name: i for i, name in enumerate(names)} if class_map is None else dict(class_map)
        self.left_out = Counter(name for _, name in self.walk.images if name not in self.class_to_idx)
        if len(self.walk.images) == self.left_out.total():
            raise ValueError(f"--class-map has none of the classes in '{root}': {some(names)}.")
        images = [(path, self.class_to_idx[name]) for path, name in self.walk.images if name in self.class_to_idx]
        self.samples = sorted(sorted(images), key=lambda image: _natural_parts(image[0]))  # by natural_order, faster

    def _check(self, labelled: bool) -> None:
        walk, root = self.walk, self.root
        if not walk.images:
            other = f', but {endings_text(walk.ignored)} (--input-key)' if walk.ignored else ''
            raise ValueError(f"--data-dir: there are no images ({some(self.endings)}) in '{root}'{other}.")
        for name in walk.folders:
            if os.fsencode(name).decode(errors='replace') != name:
                raise ValueError(
                    f"--data-dir: names of classes must be UTF-8, got the folder {os.fsencode(name)!r} in '{root}': "
                    'rename it (as with convmv -f latin1 -t utf8 --notest).'
                )
        if labelled and '' in walk.folders:
            flat = sorted(os.path.basename(path) for path, name in walk.images if not name)
            classes = [name for name in walk.folders if name]
            found = f'besides the folders {some(classes)}' if classes else 'and no folders'
            raise ValueError(
                f"--data-dir: expected a folder for each class in '{root}', found images that lie in none, "
                f'{some(flat, 3)}, {found}: without one they have no class.'
            )


def endings_text(ignored: Mapping[str, int]) -> str:
    """The most frequent endings of files, with their numbers."""
    common = Counter(ignored).most_common(5)
    return ', '.join(f'{count} {ending}' for ending, count in common) + (', ...' if len(ignored) > 5 else '')
