"""Recipes and targets: in the working directory first, then as they came with the package."""

from pathlib import Path

from edgekit.errors import EdgekitError, nearest

_PACKAGE = Path(__file__).parent
# A wheel carries them in edgekit/shipped; in a checkout they stand beside the package.
_ROOTS = (_PACKAGE / "shipped", _PACKAGE.parent)


def find(name: str | Path, folder: str) -> Path:
    """The file that `name` means: a path as typed, else the same path among those that ship with edgekit.

    Args:
        name: `recipes/mobilenet.toml`, or any path.
        folder: "recipes" or "export"; where the shipped ones of this kind stand.
    Raises:
        EdgekitError: there is no such file.
    """
    path = Path(name)
    candidates = [path] if path.is_absolute() else [path, *(root / path for root in _ROOTS)]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise EdgekitError("there is no such file", where=path, mend=nearest(str(path), names(folder)))


def names(folder: str) -> list[str]:
    """What ships under `folder`, as the user would type it: `recipes/cifar10/mobilenet.toml`."""
    for root in _ROOTS:
        if (root / folder).is_dir():
            return sorted(str(path.relative_to(root)) for path in (root / folder).rglob("*.toml"))
    return []
