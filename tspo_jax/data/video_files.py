"""Which files of a folder are videos: one list of suffixes for the whole project."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".3gp", ".3g2", ".mkv", ".webm", ".avi", ".flv", ".f4v", ".wmv", ".asf", ".ogv", ".ogm"),
    *(".mpg", ".mpeg", ".m2v", ".mpv", ".vob", ".ts", ".mts", ".m2ts", ".m2t", ".mxf", ".divx", ".rm", ".rmvb", ".gif"),
)
_SHOWN = 5  # names in one message


def is_video_name(name: str | Path) -> bool:
    return Path(name).suffix.lower() in VIDEO_SUFFIXES


def without_video_suffix(name: str) -> str:
    return Path(name).stem if is_video_name(name) else name


def videos_below(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Name (path below the folder) -> file of its videos, sorted, and the names of everything else in it that was not
    taken: files without a video's suffix, folders that cannot be read. Frame stores in it are passed over."""
    videos, others = {}, []
    for path, is_readable in _below(folder):
        name = path.relative_to(folder).as_posix()
        if is_readable and is_video_name(path):
            videos[name] = path
        else:
            others.append(name)
    return {name: videos[name] for name in sorted(videos)}, sorted(others)


def not_taken(folder: Path, others: Sequence[str]) -> str:
    """One line about what `videos_below` left; "" where that is nothing."""
    if not others:
        return ""
    more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
    files = "1 file is" if len(others) == 1 else f"{len(others)} files are"
    return f"{folder}: {files} not taken for videos: {', '.join(others[:_SHOWN])}{more}"


def _below(folder: Path, above: tuple[str, ...] = ()) -> Iterator[tuple[Path, bool]]:
    """The files below, also behind links to other folders, which may lead in a circle; with False, what cannot be
    read."""
    real = os.path.realpath(folder)
    if real in above or (above and (folder / "store.json").is_file()):
        return
    try:
        entries = list(os.scandir(folder))
    except OSError:
        yield folder, False
        return
    for entry in entries:
        path = Path(entry)
        try:
            is_folder = entry.is_dir()
        except OSError:  # such as a link to itself: what it is will show when it is opened
            is_folder = False
        if is_folder:
            yield from _below(path, (*above, real))
        else:
            yield path, True
