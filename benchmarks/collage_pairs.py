"""How fast `mmpo pairs collage` is without a model, and that its memory does not grow with the number of records.

    python benchmarks/collage_pairs.py --records 10000 --tile 448 --out DIR

The source is 400 crops of real photographs (scikit-image, scikit-learn; mmpo[dev]) with --records questions about them. The
answers come from a function of three lines. What is timed is therefore reading, composing, encoding and storing. Resident
memory is looked at after every part of 32 records; it is flat when the last tenth needs no more than the second one.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmpo import find, media
from mmpo.datasets import build as building
from mmpo.datasets.builder_options import ToolChoice
from mmpo.datasets.formats.mmpo import write_mmpo
from mmpo.datasets.tools import Answer, Prompt
from mmpo.pair import Pair, image, text

CROPS = 400


def crops(side: int) -> list[bytes]:
    """PNG files of crops of photographs, of many shapes, sides at most `side` pixels."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    photos = [data.astronaut(), data.chelsea(), data.coffee(), *load_sample_images().images]
    random, made = np.random.default_rng(0), []
    for i in range(CROPS):
        photo = photos[i % len(photos)]
        height, width = (int(n) for n in random.integers(side // 2, side, 2))
        top, left = int(random.integers(photo.shape[0] - height)), int(random.integers(photo.shape[1] - width))
        made.append(media.encode(photo[top : top + height, left : left + width], compress_level=1))
    return made


def questions(records: int, side: int) -> Iterator[Pair]:
    """Questions about the crops, with their answers."""
    blocks = [image(data) for data in crops(side)]
    for i in range(records):
        yield Pair(f"q{i}", (blocks[i % CROPS], text(f"What is in photo {i}?")), (text(f"This is photo {i % CROPS}."),))


def generator(path: Path | None = None, device: str = "cpu") -> Any:
    """Always says the same, and looks at everything alike."""

    def answer(prompts: Sequence[Prompt], seeds: Sequence[int], **_: Any) -> list[Answer]:
        shown = [sum(block.kind == "image" for block in prompt) for prompt in prompts]
        return [Answer("No idea.", perplexity=2.0, image_mass=(1.0,) * n, region_mass=np.ones((24, 24))) for n in shown]

    return answer


def resident() -> float:
    """Megabytes of this process in memory (Linux)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=10_000)
    parser.add_argument("--tile", type=int, default=448)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    source, memory = asked.out / "source", []
    write_mmpo(questions(asked.records, asked.tile * 5 // 8), source)
    find.PLUGINS.add(__name__)
    write = building.Shards.write

    def watched(*arguments: Any) -> None:
        write(*arguments)
        memory.append(resident())
        if len(memory) % 32 == 0:
            print(f"{len(memory) * building.PART} records, {memory[-1]:.1f} MB, {time.process_time():.1f} s", file=sys.stderr)

    building.Shards.write = watched  # type: ignore[assignment, method-assign]
    geometry = (f"tile={asked.tile}", f"margin={asked.tile * 40 // 448}", f"label={max(6, asked.tile * 36 // 448)}")
    order = building.Order(
        "collage",
        source,
        asked.out / "pairs",
        geometry,
        tools=ToolChoice(generator=f"{__name__}:generator", plugins=(__name__,)),
    )
    wall, process = time.perf_counter(), time.process_time()
    story = building.build(order)
    wall, process = time.perf_counter() - wall, time.process_time() - process
    tenth = max(1, len(memory) // 10)
    size = sum(path.stat().st_size for path in (asked.out / "pairs").rglob("*") if path.is_file())
    found = {
        "records": asked.records, "pairs": story["pairs"], "tile": asked.tile,
        "seconds": round(wall, 1), "process_seconds": round(process, 1),
        "pairs_per_second": round(story["pairs"] / wall, 1), "pairs_per_process_second": round(story["pairs"] / process, 1),
        "megabytes_resident_second_tenth": round(max(memory[tenth : 2 * tenth]), 1),
        "megabytes_resident_last_tenth": round(max(memory[-tenth:]), 1), "gigabytes_written": round(size / 1e9, 2),
    }  # fmt: skip
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
