"""Images by their digest: read again from where they came, or kept in a folder where that is not possible."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mmpo import media
from mmpo.errors import DataError
from mmpo.pair import Block


@dataclass(frozen=True)
class MediaStore:
    """What a pool of images is made of: `keep` gives a key for a block, `load` the block again, byte for byte.

    folder: where images are kept, or of files under `root` their names only, so that nothing stays in memory. root: the folder
    that paths of the source start from. A store may be sent to another process that sees the same files.
    """

    folder: Path
    root: Path

    def keep(self, block: Block) -> str:
        """The key of an image block with bytes: its digest. Raises ValueError for other blocks."""
        if block.kind != "image" or not isinstance(block.data, bytes):
            raise ValueError(f"media store: expected an image as bytes, found {block.kind} as {type(block.data).__name__}")
        key = Block("image", block.data).digest  # whoever says it, it is one image
        content, name = self._files(key)
        if not (content.exists() or name.exists()):
            content.parent.mkdir(parents=True, exist_ok=True)
            if not self._is_file(block):
                content.write_bytes(block.data)
            if block.path is not None:
                name.write_text(block.path, encoding="utf-8")
        return key

    def load(self, key: str) -> Block:
        """The block of a key. Raises DataError when its file is gone or is another one by now."""
        content, name = self._files(key)
        path = name.read_text(encoding="utf-8") if name.exists() else None
        if path is None or content.exists():
            found = Block("image", media.read(self.folder, content.relative_to(self.folder).as_posix()), path)
        else:
            found = Block("image", media.read(self.root, path), path)
        if found.digest != key:
            raise DataError(f"image {path or key}: is not what it was when the data were read first")
        return found

    def _is_file(self, block: Block) -> bool:
        try:
            return block.path is not None and media.read(self.root, block.path) == block.data
        except DataError:
            return False

    def _files(self, key: str) -> tuple[Path, Path]:
        return self.folder / key[:2] / key, self.folder / key[:2] / f"{key}.name"
