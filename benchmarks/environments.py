"""The images that the cases work on: deterministic, sparse where that changes nothing, made when a case first asks.

They are kept in a folder, for making them takes longer than measuring with them; results never are.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

import blocklib
from benchmarks.qcow2_writer import write_image
from blocklib import GiB, KiB, MiB, TiB

RECIPES = 1
"""To be raised when an image is made in another way: images of older recipes are then of no use."""

CLUSTER = 64 * KiB
VIRTUAL_SIZES = {"1g": GiB, "64g": 64 * GiB, "1t": TiB, "4t": 4 * TiB, "16t": 16 * TiB}
FULL_SIZES = {"64g": 64 * GiB, "256g": 256 * GiB, "1t": TiB, "4t": 4 * TiB}
SCATTERED = {"12k": 12_500, "50k": 50_000, "200k": 200_000, "800k": 800_000}
CLUSTER_BITS = {"4k": 12, "64k": 16, "2m": 21}
DEPTHS = (0, 1, 8, 64)

_CHAIN_WRITES = 8000
"""Clusters that the images of a chain hold together; some stand in more than one of them."""
_TEXT = 16 * MiB

Recipe = Callable[["Images", Path], None]


class Images:
    """The folder of images; `images["sixty.raw"]` is the path of one, made if it is not there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / f"recipes-{RECIPES}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def __getitem__(self, name: str) -> Path:
        path = self.folder / name
        if not path.exists():
            making = self.folder / f"making-{os.getpid()}-{name}"
            RECIPES_BY_NAME[name](self, making)
            making.rename(path)
        return path


# -- content ----------------------------------------------------------------------------------------------------------


def _random(name: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")))


@lru_cache(maxsize=2)
def _text(name: str) -> bytes:
    """Bytes that DEFLATE shrinks to a third or so: words drawn from a small vocabulary, the frequent ones often."""
    random = _random(name)
    vocabulary = [random.bytes(int(n)).hex().encode() + b" " for n in random.integers(1, 7, 4096)]
    picks = (4096 * random.random(_TEXT // 5) ** 3).astype(int)
    return b"".join([vocabulary[pick] for pick in picks])[:_TEXT]


def _pieces(count: int, length: int, name: str, text_of: str = "text") -> Iterator[bytes]:
    """`count` pieces of `length` bytes, cut from a text at places of no pattern."""
    text = _text(text_of)
    for at in _random(name).integers(0, len(text) - length, count):
        yield text[at : at + length]


def _all_clusters(size: int, cluster: int = CLUSTER) -> NDArray[np.uint64]:
    return np.arange(size // cluster, dtype=np.uint64)


# -- recipes ----------------------------------------------------------------------------------------------------------


def _sixty_raw(_images: Images, path: Path) -> None:
    """1 GiB, 60 % of it data, in runs of 64 KiB to 1 MiB between holes."""
    random = _random("sixty")
    runs: list[tuple[int, int]] = []
    place = 0
    while place < GiB:
        length = min(int(random.integers(1, 17)) * CLUSTER, GiB - place)
        if random.random() < 0.6:
            runs.append((place, length))
        place += length
    with path.open("wb") as file:
        file.truncate(GiB)
        for (start, length), piece in zip(runs, _pieces(len(runs), MiB, "sixty"), strict=True):
            file.seek(start)
            file.write(piece[:length])


def _sixty_qcow2(compress: Literal["zlib", "zstd"] | None, images: Images, path: Path) -> None:
    options = {"compression_type": compress} if compress else {}
    with blocklib.open(images["sixty.raw"], format="raw") as source:
        blocklib.convert(source, path, format="qcow2", compress=compress, options=options)


def _sixty_over_base(images: Images, path: Path) -> None:
    """The same over an empty `base.qcow2` beside it."""
    shutil.copyfile(images["sixty.qcow2"], path)
    blocklib.rebase(path, "base.qcow2", backing_format="qcow2", unsafe=True, format="qcow2")


def _dense(cluster_bits: int, shuffled: bool, _images: Images, path: Path) -> None:
    """1 GiB of data; `shuffled`: neighbours in the disk are no neighbours in the file."""
    cluster = 1 << cluster_bits
    clusters = _all_clusters(GiB, cluster)
    if shuffled:
        clusters = _random("shuffled").permutation(clusters)
    write_image(path, GiB, clusters, cluster_bits=cluster_bits, fill=_pieces(GiB // MiB, MiB, "dense"))


def _full(size: int, _images: Images, path: Path) -> None:
    """Every cluster mapped, the data clusters holes of the file."""
    write_image(path, size, _all_clusters(size))


def _scattered(count: int, _images: Images, path: Path) -> None:
    """64 GiB with `count` clusters written in random order; the data clusters are holes of the file."""
    size = 64 * GiB
    write_image(path, size, _random("scattered").choice(size // CLUSTER, count, replace=False).astype(np.uint64))


def _written(count: int, _images: Images, path: Path) -> None:
    """The same with data in the clusters, as a guest leaves it; not kept in the page cache, where other images are to be."""
    size = 64 * GiB
    clusters = _random("scattered").choice(size // CLUSTER, count, replace=False).astype(np.uint64)
    write_image(path, size, clusters, fill=_pieces(count // 16, MiB, "written"))
    file = os.open(path, os.O_RDONLY)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


def _empty(size: int, _images: Images, path: Path) -> None:
    write_image(path, size, _all_clusters(0))


def _layer(chain: str, number: int, n_images: int, images: Images, path: Path) -> None:
    """Image `number` of a chain of `n_images` over 1 GiB; each image holds its share of the chain's clusters."""
    share = _CHAIN_WRITES // n_images
    clusters = _random(f"{chain} {number}").choice(GiB // CLUSTER, share, replace=False).astype(np.uint64)
    backing = images[_layer_name(chain, number - 1)].name if number else None
    write_image(path, GiB, clusters, backing=backing, fill=_pieces(share, CLUSTER, f"{chain} fill {number}"))


def _layer_name(chain: str, number: int) -> str:
    return f"{chain}-layer-{number}.qcow2"


def _chain_recipes() -> dict[str, Recipe]:
    found: dict[str, Recipe] = {}
    for name, n_images in [("of-8", 8)] + [(f"depth-{depth}", depth + 1) for depth in DEPTHS]:
        for number in range(n_images):
            top = number == n_images - 1
            found[f"{name}.qcow2" if top else _layer_name(name, number)] = partial(_layer, name, number, n_images)
    return found


def _overlay(backing: str, images: Images, path: Path) -> None:
    """Nothing of its own over `backing`; used as a copy in a folder below that of the images."""
    write_image(path, GiB, _all_clusters(0), backing=f"../{images[backing].name}")


def _over_middle(_images: Images, path: Path) -> None:
    """Nothing of its own over a `middle.qcow2` beside it."""
    write_image(path, GiB, _all_clusters(0), backing="middle.qcow2")


def _base(variant: str, _images: Images, path: Path) -> None:
    """1 GiB, every second MiB of it data; an eighth of the clusters of variant "b" differ from those of "a"."""
    clusters = _all_clusters(GiB)
    clusters = clusters[clusters // np.uint64(16) % np.uint64(2) == 0]
    same = _pieces(len(clusters), CLUSTER, "base")
    other = _pieces(len(clusters), CLUSTER, "base", f"text of {variant}")
    fill = (theirs if number % 8 == 0 else ours for number, (ours, theirs) in enumerate(zip(same, other, strict=True)))
    write_image(path, GiB, clusters, fill=fill)


def _top(in_place: bool, images: Images, path: Path) -> None:
    """4,096 scattered clusters of 1 GiB over base "a": over a copy beside it, or (`in_place`) over the image itself."""
    backing = f"../{images['base-a.qcow2'].name}" if in_place else "base.qcow2"
    clusters = np.sort(_random("top").choice(GiB // CLUSTER, 4096, replace=False)).astype(np.uint64)
    write_image(path, GiB, clusters, backing=backing, fill=_pieces(4096, CLUSTER, "top"))


RECIPES_BY_NAME: dict[str, Recipe] = {
    "sixty.raw": _sixty_raw,
    "sixty.qcow2": partial(_sixty_qcow2, None),
    "sixty-over-base.qcow2": _sixty_over_base,
    "sixty-deflate.qcow2": partial(_sixty_qcow2, "zlib"),
    "sixty-zstd.qcow2": partial(_sixty_qcow2, "zstd"),
    **{f"dense-{name}.qcow2": partial(_dense, bits, False) for name, bits in CLUSTER_BITS.items()},
    "shuffled.qcow2": partial(_dense, 16, True),
    **{f"full-{name}.qcow2": partial(_full, size) for name, size in FULL_SIZES.items()},
    **{f"scattered-{name}.qcow2": partial(_scattered, count) for name, count in SCATTERED.items()},
    "written-200k.qcow2": partial(_written, SCATTERED["200k"]),
    **{f"empty-{name}.qcow2": partial(_empty, size) for name, size in VIRTUAL_SIZES.items()},
    **_chain_recipes(),
    "overlay.qcow2": partial(_overlay, "dense-64k.qcow2"),
    "over-sixty.qcow2": partial(_overlay, "sixty.qcow2"),
    "over-middle.qcow2": _over_middle,
    "overlay-depth-8.qcow2": partial(_overlay, "depth-8.qcow2"),
    "base-a.qcow2": partial(_base, "a"),
    "base-b.qcow2": partial(_base, "b"),
    "top-on-copy.qcow2": partial(_top, False),
    "top-on-a.qcow2": partial(_top, True),
}
"""How each image is made; an image that another one names in its header is made on the way."""
