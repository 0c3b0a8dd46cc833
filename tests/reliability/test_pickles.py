"""T17, S1, S2: no file that mmpo loads can run code. Thirty live attacks in every place where a file of a stranger goes."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import pickle
import shutil
import sqlite3
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from blake3 import blake3

from mmpo import checkpoint
from mmpo import recipe as recipes
from mmpo.cache import Cache, key
from mmpo.clip import load_clip
from mmpo.datasets.load import load as load_data
from mmpo.errors import RunFailed
from mmpo.export import open_run
from mmpo.find import find
from mmpo.modalities import families, lora
from mmpo.modalities.diffusion_config import LoraConfig
from tests import tiny_run
from tests.judges.test_judges import TINY, write_transformers_clip
from tests.modalities import tiny
from tests.reliability.counters import FULL, counter


class Reduce:
    """An object whose pickle calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


class Build:
    """An object whose pickle calls its __setstate__, which is a BUILD on a class of choice."""

    def __reduce__(self) -> Any:
        return (Reduce.__new__, (Reduce,), {"x": Reduce(os.system, f"touch {_MARKER}")})


_MARKER = ""


def attacks(marker: Path) -> dict[str, bytes]:
    """Thirty pickles, bare and in the containers that frameworks wrap them in; each creates the marker when it is loaded."""
    global _MARKER
    _MARKER = str(marker)
    touch, python = f"touch {marker}", f"open({str(marker)!r}, 'w').close()"
    calls: dict[str, Any] = {
        "os.system": Reduce(os.system, touch),
        "os.popen": Reduce(os.popen, touch),
        "eval": Reduce(eval, python),
        "exec": Reduce(exec, python),
        "open": Reduce(open, str(marker), "w"),
        "Path.touch": Reduce(Path.touch, marker),
        "mknod": Reduce(os.mknod, str(marker)),
        "shutil": Reduce(shutil.copy, __file__, str(marker)),
        "build": Build(),
        "nested": [{"state_dict": (1, Reduce(os.system, touch))}],
    }
    found = {f"{name} protocol {p}": pickle.dumps(o, p) for (name, o), p in zip(calls.items(), [0, 1, 2, 3, 4, 5] * 2)}  # noqa: B905
    text = touch.encode()
    found |= {
        "GLOBAL": b"cos\nsystem\n(S'" + text + b"'\ntR.",
        "GLOBAL posix": b"cposix\nsystem\n(S'" + text + b"'\ntR.",
        "INST": b"(S'" + text + b"'\nios\nsystem\n.",
        "OBJ": b"(cos\nsystem\nS'" + text + b"'\no.",
        "eval GLOBAL": b"c__builtin__\neval\n(S'" + python.replace("'", '"').encode() + b"'\ntR.",
        "memoised": b"cos\nsystem\np0\n0g0\n(S'" + text + b"'\ntR.",
        "junk behind": pickle.dumps(calls["os.system"]) + bytes(4096),
        "extension": b"\x80\x02]q\x00" + b"cos\nsystem\n(S'" + text + b"'\ntRa.",
    }
    evil = calls["os.system"]
    found["torch zip"] = _torch({"weight": torch.ones(2), "x": evil})
    found["torch zip bare"] = _torch(evil)
    found["torch legacy"] = _torch({"weight": torch.ones(2), "x": evil}, _use_new_zipfile_serialization=False)
    found["torch tar"] = _tar({"storages": pickle.dumps(1), "tensors": pickle.dumps(1), "pickle": pickle.dumps(evil)})
    found["zip data.pkl"] = _zip({"archive/data.pkl": pickle.dumps(evil), "archive/version": b"3\n"})
    found["torchscript"] = _zip({"m/data.pkl": pickle.dumps(evil), "m/constants.pkl": pickle.dumps(evil), "m/version": b"3"})
    found["npy"] = _numpy(np.save, np.array([evil], dtype=object))
    found["npz"] = _numpy(np.savez, np.array([evil], dtype=object))
    found["npz params"] = _zip({"params/img/kernel.npy": _numpy(np.save, np.array([evil], dtype=object))})
    found["gzip"] = gzip.compress(pickle.dumps(evil))
    found["safetensors header"] = _header(b'{"__metadata__":{"x":"y"}}' + pickle.dumps(evil))
    found["parquet magic"] = b"PAR1" + pickle.dumps(evil) + b"PAR1"
    assert len(found) >= 30
    return found


def _torch(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def _numpy(save: Callable[..., None], array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    save(buffer, array)
    return buffer.getvalue()


def _zip(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def _tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _header(data: bytes) -> bytes:
    return len(data).to_bytes(8, "little") + data


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Honest files of every sort: pipelines, their data, CLIPs."""
    root = tmp_path_factory.mktemp("world")
    tiny_run.make_world(root)
    tiny.make("pixart", root / "pixart")
    (root / "config").mkdir()
    (root / "config" / "mmpo-pickles.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(root / "config")
    write_transformers_clip(root / "clip")
    (root / "run").mkdir()
    (root / "run" / "recipe.yaml").write_text(recipes.dump(tiny_run.load(root, root / "run")))
    return root


def copied(world: Path, name: str, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    return Path(shutil.copytree(world / name, to))


def in_pipeline(remove: str, put: str) -> Callable[[Path, Path, bytes], Any]:
    """Loads a pipeline in which `put` holds the attack and `remove` is gone."""

    def attack(world: Path, folder: Path, data: bytes) -> Any:
        pipe = copied(world, "pipe", folder / "pipe")
        (pipe / remove).unlink()
        (pipe / put).write_bytes(data)
        return families.load(str(pipe))

    return attack


def as_adapter(model: str, name: str) -> Callable[[Path, Path, bytes], Any]:
    def attack(world: Path, folder: Path, data: bytes) -> Any:
        (folder / "adapter").mkdir(exist_ok=True)
        (folder / "adapter" / "adapter_config.json").write_text('{"lora_alpha": 8}')
        (folder / "adapter" / name).write_bytes(data)
        return lora.wrap(families.load(str(world / model)), LoraConfig(path=str(folder / "adapter")))

    return attack


def as_reference(world: Path, folder: Path, data: bytes) -> Any:
    pipe = copied(world, "pipe", folder / "pipe")
    (pipe / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(data)
    find("modalities", "diffusion").load_reference(_Asking(families.load(str(world / "pipe"))), str(pipe))


class _Asking:
    """The part of an adapter that `load_reference` reads."""

    def __init__(self, loaded: Any) -> None:
        self.loaded, self.config, self.device = loaded, tiny_run.recipes.recipe_class("diffusion")().model, "cpu"


def as_head(name: str) -> Callable[[Path, Path, bytes], Any]:
    def attack(world: Path, folder: Path, data: bytes) -> Any:
        (folder / name).write_bytes(data)
        find("judges", "aesthetic")(path=None, head=folder / name)

    return attack


def as_clip(name: str) -> Callable[[Path, Path, bytes], Any]:
    def attack(world: Path, folder: Path, data: bytes) -> Any:
        (folder / name).write_bytes(data)
        load_clip(folder / name, "mmpo-pickles", "cpu", "clip_score")

    return attack


def as_clip_folder(name: str) -> Callable[[Path, Path, bytes], Any]:
    def attack(world: Path, folder: Path, data: bytes) -> Any:
        inner = folder / "clip"
        inner.mkdir(exist_ok=True)
        (inner / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY, "preprocess_cfg": {}}))
        (inner / name).write_bytes(data)
        load_clip(inner, "", "cpu", "clip_score")

    return attack


def as_pickscore(name: str) -> Callable[[Path, Path, bytes], Any]:
    def attack(world: Path, folder: Path, data: bytes) -> Any:
        inner = copied(world, "clip", folder / "clip")
        (inner / "model.safetensors").unlink()
        (inner / name).write_bytes(data)
        find("judges", "pickscore")(path=inner)

    return attack


def as_checkpoint(world: Path, folder: Path, data: bytes) -> Any:
    """Whoever can write a checkpoint can make its digests right as well."""
    where = folder / "checkpoints"
    shutil.rmtree(where, ignore_errors=True)
    path = checkpoint.save(where, 1, {"policy": {"w": torch.ones(2)}}, {}, keep=2)
    path = next(where.glob("step-*")) if path is None else path
    (path / "policy.safetensors").write_bytes(data)
    manifest = json.loads((path / "MANIFEST.json").read_bytes())
    manifest["files"]["policy.safetensors"] = {"size": len(data), "blake3": blake3(data).hexdigest()}
    written = json.dumps(manifest).encode()
    (path / "MANIFEST.json").write_bytes(written)
    name = f"{path.name.split('.')[0]}.{blake3(written).hexdigest()[:12]}"
    path.rename(path.with_name(name))
    (where / "CURRENT").write_text(name + "\n")
    checkpoint.load_latest(where)


def as_best(world: Path, folder: Path, data: bytes) -> Any:
    run = copied(world, "run", folder / "run")
    (run / "best").mkdir()
    (run / "best" / "policy.safetensors").write_bytes(data)
    open_run(run)


def as_data(name: str) -> Callable[[Path, Path, bytes], Any]:
    def attack(world: Path, folder: Path, data: bytes) -> Any:
        (folder / name).write_bytes(data)
        load_data(folder / name)

    return attack


def as_picture(world: Path, folder: Path, data: bytes) -> Any:
    row = {"caption": "a", "jpg_0": data, "jpg_1": data, "label_0": 1.0, "label_1": 0.0}
    pq.write_table(pa.Table.from_pylist([row]), folder / "pick.parquet")
    load_data(folder / "pick.parquet", format="pick_a_pic")


UNET, TEXT = "unet/diffusion_pytorch_model", "text_encoder/model"
PLACES: dict[str, Callable[[Path, Path, bytes], Any]] = {
    "denoiser .safetensors": in_pipeline(f"{UNET}.safetensors", f"{UNET}.safetensors"),
    "denoiser .bin": in_pipeline(f"{UNET}.safetensors", f"{UNET}.bin"),
    "text encoder .safetensors": in_pipeline(f"{TEXT}.safetensors", f"{TEXT}.safetensors"),
    "text encoder .bin": in_pipeline(f"{TEXT}.safetensors", "text_encoder/pytorch_model.bin"),
    "vae .bin": in_pipeline("vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.bin"),
    "reference": as_reference,
    "adapter .safetensors": as_adapter("pipe", "pytorch_lora_weights.safetensors"),
    "adapter .bin": as_adapter("pipe", "pytorch_lora_weights.bin"),
    "peft .safetensors": as_adapter("pixart", "adapter_model.safetensors"),
    "peft .bin": as_adapter("pixart", "adapter_model.bin"),
    **{f"head {end}": as_head(f"head{end}") for end in (".pth", ".pt", ".pkl", ".bin", ".npy", ".npz", ".safetensors")},
    **{f"clip {end}": as_clip(f"clip{end}") for end in (".pt", ".bin", ".pkl", ".npy", ".npz", ".safetensors")},
    "clip folder .safetensors": as_clip_folder("open_clip_model.safetensors"),
    "clip folder .bin": as_clip_folder("open_clip_pytorch_model.bin"),
    "pickscore .safetensors": as_pickscore("model.safetensors"),
    "pickscore .bin": as_pickscore("pytorch_model.bin"),
    "checkpoint": as_checkpoint,
    "best weights": as_best,
    **{f"data {end}": as_data(f"rows{end}") for end in (".parquet", ".pkl", ".npy", ".npz", ".jsonl", ".csv", ".arrow")},
    "a picture's bytes": as_picture,
}
SLOW = ("denoiser", "text", "vae", "reference", "adapter", "peft", "best", "clip", "pickscore")


def chosen(place: str, number: int) -> Iterator[int]:
    """Every attack in every place with MMPO_FULL=1; otherwise each place takes its turn of them, so that all occur."""
    step = 1 if FULL else 10 if place.startswith(SLOW) else 3
    yield from range(list(PLACES).index(place) % step, number, step)


def test_the_attacks_work(tmp_path: Path) -> None:
    """Without a guard each bare pickle leaves the marker: what the others are refused for is no blank shot."""
    marker = tmp_path / "marker"
    live = 0
    for data in attacks(marker).values():
        try:
            pickle.loads(data)
        except Exception:  # the ones in containers
            continue
        finally:
            time.sleep(0.01)  # os.popen does not wait
            live += marker.exists()
            marker.unlink(missing_ok=True)
    assert live >= 17


@pytest.mark.parametrize("place", PLACES)
def test_no_pickle_runs_and_each_is_refused(place: str, world: Path, tmp_path: Path) -> None:
    marker, start, refused = tmp_path / "marker", time.monotonic(), 0
    every = list(attacks(marker).items())
    for number in chosen(place, len(every)):
        name, data = every[number]
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises((ValueError, RunFailed)) as caught:
            PLACES[place](world, folder, data)
        assert not marker.exists(), name
        said = str(caught.value)
        assert 10 < len(said) < 1500 and "Traceback" not in said and "weights_only=False" not in said, said
        refused += 1
    counter("T17", "pickles in the place of a file", refused, "0 ran, all refused", time.monotonic() - start)


def test_pickles_in_a_cache_are_counted_and_never_used(tmp_path: Path) -> None:
    """As the file, and as the value of an entry whose digest whoever wrote it made right."""
    start = time.monotonic()
    marker = tmp_path / "marker"
    for number, data in enumerate(attacks(marker).values()):
        path, k = tmp_path / f"{number}.sqlite", key("x")
        Cache(path).put_many([(k, {"x": torch.ones(2)})])
        with sqlite3.connect(path) as connection:
            connection.execute("UPDATE entries SET value = ?, digest = ?", (data, blake3(k + data).digest()))
        cache = Cache(path)
        assert cache.get_many([k]) == [None] and (cache.damaged, cache.misses) == (1, 1)
        cache.close()
        (tmp_path / f"{number}.pkl").write_bytes(data + bytes(4096))
        with pytest.warns(UserWarning, match="moved to"):
            assert Cache(tmp_path / f"{number}.pkl").get_many([k]) == [None]
        assert not marker.exists()
    counter("T17", "pickles in caches", 2 * (number + 1), "0 ran, all counted", time.monotonic() - start)


def test_an_arrow_extension_in_parquet_unpickles_nothing(tmp_path: Path) -> None:
    """Arrow once unpickled its Python extension types from a file's metadata (CVE-2023-47248)."""
    marker = tmp_path / "marker"
    evil = pickle.dumps(Reduce(os.system, f"touch {marker}"))
    meta = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": evil}
    schema = pa.schema([pa.field("caption", pa.string(), metadata=meta)], metadata={b"pandas": evil})
    pq.write_table(pa.table([pa.array(["a"])], schema=schema), tmp_path / "rows.parquet")
    with pytest.raises(ValueError):
        load_data(tmp_path / "rows.parquet")
    assert not marker.exists()


# ---- code that comes with a model


def trapped(folder: Path, marker: Path) -> Path:
    """Python files that a library would import if it trusted them, beside every configuration of the folder."""
    for name in ("modeling_evil.py", "tokenization_evil.py", "pipeline.py", "configuration_evil.py", "__init__.py"):
        for place in [folder, *(p for p in folder.iterdir() if p.is_dir())]:
            (place / name).write_text(f"open({str(marker)!r}, 'w').close()\nclass Evil: ...\n")
    return folder


def edit(path: Path, **changes: Any) -> None:
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(found | changes))


AUTO = {
    "auto_map": {
        "AutoConfig": "configuration_evil.Evil",
        "AutoModel": "modeling_evil.Evil",
        "AutoTokenizer": ["tokenization_evil.Evil"] * 2,
    }
}


def test_auto_map_is_ignored(world: Path, tmp_path: Path) -> None:
    """A pipeline and a judge whose files name code of their own load by their own classes."""
    pipe = copied(world, "pipe", tmp_path / "pipe")
    for part in ("unet/config.json", "vae/config.json", "text_encoder/config.json", "tokenizer/tokenizer_config.json"):
        edit(pipe / part, **AUTO)
    families.load(str(trapped(pipe, tmp_path / "marker")))
    clip = copied(world, "clip", tmp_path / "clip")
    for part in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        edit(clip / part, **AUTO)
    find("judges", "pickscore")(path=trapped(clip, tmp_path / "marker"))
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"_class_name": ["pipeline", "Evil"]},
        {"_class_name": "Evil"},
        {"unet": ["modeling_evil", "Evil"]},
        {"unet": ["unet.modeling_evil", "Evil"]},
        {"text_encoder": ["transformers", "AutoModel"]},
        {"tokenizer": ["transformers", "AutoTokenizer"]},
        {"scheduler": ["diffusers.loaders", "Evil"]},
        {"_custom_pipeline": "pipeline", "_class_name": ["pipeline", "Evil"]},
    ],
    ids=str,
)
def test_a_pipeline_that_asks_for_its_own_code_is_refused(
    change: dict[str, Any], world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where transformers would ask the person at the terminal, who is never asked."""
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("asked whether to run the model's code"))
    pipe = copied(world, "pipe", tmp_path / "pipe")
    edit(pipe / "model_index.json", **change)
    for part in ("text_encoder/config.json", "tokenizer/tokenizer_config.json"):
        edit(pipe / part, **AUTO, model_type="evil")
    with pytest.raises(ValueError):
        families.load(str(trapped(pipe, tmp_path / "marker")))
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("part", ["config.json", "tokenizer_config.json"])
def test_a_judges_own_code_is_never_run(part: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("asked whether to run the model's code"))
    clip = copied(world, "clip", tmp_path / "clip")
    edit(clip / part, **AUTO, model_type="evil", tokenizer_class="Evil")
    edit(clip / "config.json", **AUTO, **({"model_type": "evil"} if part == "config.json" else {}))
    with contextlib.suppress(ValueError):  # it may also load by its own class
        find("judges", "pickscore")(path=trapped(clip, tmp_path / "marker"))
    assert not (tmp_path / "marker").exists()


def test_a_clip_folder_that_leads_to_another_library_is_refused(world: Path, tmp_path: Path) -> None:
    """open_clip hands these names, and the tokenizer's own arguments, to transformers."""
    evil = trapped(copied(world, "clip", tmp_path / "evil"), tmp_path / "marker")
    for part in ("config.json", "tokenizer_config.json"):
        edit(evil / part, **AUTO)
    for text in (
        {"hf_model_name": str(evil)},
        {"hf_tokenizer_name": str(evil), "tokenizer_kwargs": {"trust_remote_code": True}},
    ):
        folder = tmp_path / "clip"
        folder.mkdir(exist_ok=True)
        model = TINY | {"text_cfg": TINY["text_cfg"] | text}  # type: ignore[operator]
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": {}}))
        with pytest.raises(ValueError, match="from a hub"):
            load_clip(folder, "", "cpu", "clip_score")
    assert not (tmp_path / "marker").exists()
