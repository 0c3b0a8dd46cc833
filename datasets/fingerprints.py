"""What pairs are made by, as digests: code and files, so that one build never holds the work of two models.

A path says where a model was, not which one: weights are trained anew in the same folder, and code is edited between two
commands. So a build is held to their content, beside the words in which the model was named: a copy under another path is given
another folder of pairs.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import mmpo

ROOT = Path(mmpo.__file__).parent


def code_of(modules: Iterable[str]) -> str:
    """sha256 of all sources that modules are made of, as `sources_of` finds them."""
    h = hashlib.sha256()
    for name, digest in sorted(sources_of(modules).items()):
        h.update(f"{name}\0".encode() + digest)
    return h.hexdigest()


def sources_of(modules: Iterable[str]) -> dict[str, bytes]:
    """The sha256 of each source, by module: of modules and of all of mmpo that they import, directly or through others.

    modules: names, e.g. "mmpo.datasets.builders.collage", or those of plugins, of whose imports only mmpo's are followed; the
    packages that a plugin is in are imported.
    """
    waiting, found = list(modules), dict[str, bytes]()
    while waiting:
        if (name := waiting.pop()) not in found and (path := _path(name)) is not None:
            found[name], imported = _read(path)
            waiting += imported
    return found


def files_of(path: Path) -> dict[str, str]:
    """sha256 of a file, or of each of a folder's by its place there.

    Nothing for what is not there, or what no file can be called (a template given as text); hidden files do not count.
    """
    if os.path.isfile(path):
        return {path.name: _sha256(path)}
    places = {p.relative_to(path): p for p in sorted(path.rglob("*")) if p.is_file()} if os.path.isdir(path) else {}
    return {at.as_posix(): _sha256(p) for at, p in places.items() if not any(part.startswith(".") for part in at.parts)}


def found_at(path: str) -> Path:
    """A local file or folder, or else where the hub's cache has something of that name; where neither is, the path."""
    place = Path(path)
    return place if place.exists() else hub_folder(path) or place


def hub_folder(name: str) -> Path | None:
    """Where a model or tokenizer of the hub is kept on this machine; None where it is not, or `name` is none of the hub's."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = [try_to_load_from_cache(name, file) for file in ("config.json", "tokenizer_config.json", "tokenizer.json")]
    except HFValidationError:
        return None
    return next((Path(path).parent for path in found if isinstance(path, str)), None)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _path(module: str) -> Path | None:
    """The source of a module; of mmpo's without importing anything."""
    first, *rest = module.split(".")
    if first == "mmpo":
        path = ROOT.joinpath(*rest).with_suffix(".py") if rest else ROOT / "__init__.py"
        return path if path.is_file() else None
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # `find` says it better
        return None
    return Path(spec.origin) if spec is not None and spec.origin and spec.origin.endswith(".py") else None


@functools.cache
def _read(path: Path) -> tuple[bytes, tuple[str, ...]]:
    """The digest of a source, and the names in mmpo that it imports; some are no modules but what stands in one."""
    source = path.read_bytes()
    return hashlib.sha256(source).digest(), tuple(_imported(ast.parse(source)))


def _imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "mmpo")
