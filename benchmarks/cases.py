"""What is measured: both sides' commands, as a user types them.

In a command ``{name}`` is an image of `benchmarks.environments`; plain names are files of the side's own folder, which is
emptied and filled with `copies` before every run.  Of several ways to ask qemu-img the fastest on this machine counts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.environments import CLUSTER_BITS, DEPTHS, FULL_SIZES, SCATTERED, VIRTUAL_SIZES

Steps = tuple[str, ...]
"""Command lines, one after the other."""
Copies = tuple[tuple[str, str], ...]
"""(name in the side's folder, image) of files that a command changes."""


@dataclass(frozen=True)
class Case:
    """One workload.  `target` is the ratio that it is not to exceed, `peak_mib` the memory."""

    name: str
    about: str
    ours: Steps
    theirs: tuple[Steps, ...]
    """Alternatives."""
    copies: Copies = ()
    target: float | None = None
    peak_mib: int | None = None
    rounds: int = 5
    """Runs of each side that count."""
    long: bool = False
    """It takes a minute: what the first run has to read and compile makes no difference."""


def _start(name: str, words: str) -> Case:
    """Against a bare interpreter: 60 ms where that takes 11."""
    about = f"{name}, against a bare interpreter"
    return Case(f"start-{name}", about, (f"blocklib {words}",), (("python -c pass",),), target=60 / 11, rounds=15)


def _same(name: str, about: str, *steps: str, copies: Copies = (), target: float | None = None) -> Case:
    """The same words for both."""
    ours, theirs = (tuple(f"{program} {words}" for words in steps) for program in ("blocklib", "qemu-img"))
    return Case(name, about, ours, (theirs,), copies, target)


def _convert(name: str, about: str, words: str, *, target: float | None = None) -> Case:
    """qemu-img may write out of order with 16 coroutines, where that is faster; for compressing it always is."""
    flags = ("-W -m 16 ",) if words.startswith("-c ") else ("", "-W -m 16 ")
    theirs = tuple((f"qemu-img convert {flag}{words}",) for flag in flags)
    return Case(name, about, (f"blocklib convert {words}",), theirs, (), target, peak_mib=256)


def _bench(name: str, about: str, words: str, *, copies: Copies = (), target: float | None = None) -> Case:
    """qemu-img uses threads or io_uring, whichever is faster."""
    theirs = ((f"qemu-img bench {words}",), (f"qemu-img bench -i io_uring {words}",))
    return Case(name, about, (f"blocklib bench {words}",), theirs, copies, target)


def _job(name: str, about: str, words: str, *, copies: Copies = ()) -> Case:
    """A job on a disk in use, which is idle, against `blocklib convert` of the same data, durable as well."""
    theirs = ("blocklib convert -t writeback -f qcow2 -O qcow2 {sixty.qcow2} out",)
    return Case(f"job-{name}", f"{about}, against `convert`", (f"job {words}",), (theirs,), copies, target=1.2, rounds=7)


def _direct(name: str, about: str, words: str, *, copies: Copies = ()) -> Case:
    """Past the page cache: the kernel's own queues, either of them."""
    words = f"-t none -f qcow2 {words}"
    theirs = ((f"qemu-img bench -i native {words}",), (f"qemu-img bench -i io_uring {words}",))
    return Case(f"direct-{name}", f"{about}, O_DIRECT", (f"blocklib bench -i native {words}",), theirs, copies)


FLAGS = ("-W -m 16", "-i io_uring", "-i native")
"""What qemu-img may be faster with."""

_RAW = "-f raw -O qcow2 {sixty.raw} out"
_MAP = "map --output=json -f qcow2"
_CHECK = "check -f qcow2"
_MEASURE = "measure -f qcow2 -O qcow2"
# A step that is prime to the number of blocks visits each once, in no order that read-ahead could guess.
_EVERY_BLOCK = f"-f qcow2 -c {(1 << 30) // 4096} -S {162_013 * 4096}"
_EVERY_CLUSTER = f"-f qcow2 -w -c {(1 << 30) // 65536}"
_IN_EVERY_CLUSTER = f"{_EVERY_CLUSTER} -S {10_125 * 65536}"
_SNAPSHOT = ("snapshot -c s image", "snapshot -d s image")
_FRESH: Copies = (("image", "overlay.qcow2"),)
_DENSE: Copies = (("image", "dense-64k.qcow2"),)
_TOP: Copies = (("base.qcow2", "base-a.qcow2"), ("top.qcow2", "top-on-copy.qcow2"))
_OVER_EMPTY: Copies = (("base.qcow2", "empty-1g.qcow2"), ("middle.qcow2", "sixty-over-base.qcow2"))
_SCATTERED: Copies = (("image", "scattered-200k.qcow2"),)

TABLE: tuple[Case, ...] = (
    _start("info", "info {sixty.qcow2}"),
    _start("create", "create -q -f qcow2 new.qcow2 1G"),
    _convert("raw-qcow2", "convert raw to qcow2", _RAW, target=1.0),
    _convert("qcow2-raw", "convert qcow2 to raw", "-f qcow2 -O raw {sixty.qcow2} out", target=1.0),
    _convert("chain-qcow2", "convert a chain of 8 to qcow2", "-f qcow2 -O qcow2 {of-8.qcow2} out", target=1.0),
    replace(_convert("deflate", "convert -c, DEFLATE", f"-c {_RAW}", target=0.2), rounds=3, long=True),
    _convert("zstd", "convert -c, zstd", f"-c -o compression_type=zstd {_RAW}", target=0.8),
    _convert("undeflate", "decompress DEFLATE to raw", "-f qcow2 -O raw {sixty-deflate.qcow2} out", target=0.7),
    _convert("unzstd", "decompress zstd to raw", "-f qcow2 -O raw {sixty-zstd.qcow2} out", target=1.0),
    replace(_same("check-full", "check, 1 TiB fully mapped", f"{_CHECK} {{full-1t.qcow2}}", target=0.6), peak_mib=400),
    _same("check-scattered", "check, 200,000 scattered clusters", f"{_CHECK} {{scattered-200k.qcow2}}", target=0.5),
    _same("map-full", "map, 1 TiB fully mapped", f"{_MAP} {{full-1t.qcow2}}", target=0.7),
    _same("map-scattered", "map, 200,000 scattered clusters", f"{_MAP} {{written-200k.qcow2}}", target=0.7),
    _same("compare", "compare raw and qcow2", "compare -f raw -F qcow2 {sixty.raw} {sixty.qcow2}", target=1.0),
    _same("measure", "measure a raw image", "measure -f raw -O qcow2 {sixty.raw}", target=1.0),
    _same("measure-full", "measure, 1 TiB fully mapped", f"{_MEASURE} {{full-1t.qcow2}}", target=1.0),
    _same("measure-scattered", "measure, 200,000 scattered clusters", f"{_MEASURE} {{written-200k.qcow2}}", target=1.0),
    _same("commit", "commit 256 MiB into a base", "commit -q -f qcow2 top.qcow2", copies=_TOP, target=1.0),
    _same(
        "rebase",
        "safe rebase, an eighth differs",
        "rebase -f qcow2 -F qcow2 -b {base-b.qcow2} top.qcow2",
        copies=(("top.qcow2", "top-on-a.qcow2"),),
        target=1.0,
    ),
    replace(
        _same("snapshot", "snapshot create and delete, 200,000 scattered clusters", *_SNAPSHOT, copies=_SCATTERED),
        target=0.1,
        rounds=3,
        long=True,
    ),
    _bench("bench-read", "4 KiB random read", f"{_EVERY_BLOCK} {{dense-64k.qcow2}}", target=1.0),
    _bench("bench-rewrite", "4 KiB rewrite", f"-w {_EVERY_BLOCK} image", copies=_DENSE, target=1.0),
    _bench(
        "bench-allocate",
        "64 KiB allocating write into a fresh overlay",
        f"{_EVERY_CLUSTER} -s 64k image",
        copies=_FRESH,
        target=1.0,
    ),
    _bench(
        "bench-cow",
        "4 KiB copy-on-write into a fresh overlay",
        f"{_IN_EVERY_CLUSTER} image",
        copies=_FRESH,
        target=1.0,
    ),
    _job("mirror", "mirror of a disk in use", "mirror {sixty.qcow2} out"),
    _job("backup", "backup of a disk in use", "backup {sixty.qcow2} out"),
    _job("commit", "commit of the top image of a disk in use", "commit middle.qcow2", copies=_OVER_EMPTY),
    _job(
        "commit-below",
        "commit of an image below it",
        "commit-below top.qcow2",
        copies=(*_OVER_EMPTY, ("top.qcow2", "over-middle.qcow2")),
    ),
    _job("stream", "stream into the top image", "stream top.qcow2", copies=(("top.qcow2", "over-sixty.qcow2"),)),
)
"""The workloads that have targets."""


def _environments() -> tuple[Case, ...]:
    """The same work where one property of the image, or of the cache, is another."""
    cases: list[Case] = []
    for verb, words in (("map", _MAP), ("check", _CHECK)):
        cases += [
            *(_same(f"{verb}-empty-{n}", f"{verb}, nothing in {n}", f"{words} {{empty-{n}.qcow2}}") for n in VIRTUAL_SIZES),
            *(_same(f"{verb}-full-{n}", f"{verb}, all of {n} mapped", f"{words} {{full-{n}.qcow2}}") for n in FULL_SIZES),
            *(
                _same(f"{verb}-scattered-{n}", f"{verb}, {n} scattered holes", f"{words} {{scattered-{n}.qcow2}}")
                for n in SCATTERED
            ),
        ]
    for depth in DEPTHS:
        below = f"{depth} backing files"
        image = f"{{depth-{depth}.qcow2}}"
        cases += [
            _bench(f"bench-read-depth-{depth}", f"4 KiB random read, {below}", f"{_EVERY_BLOCK} {image}"),
            _convert(f"convert-depth-{depth}", f"convert to qcow2, {below}", f"-f qcow2 -O qcow2 {image} out"),
        ]
    for size in CLUSTER_BITS:
        kind = f"clusters of {size}"
        image = f"{{dense-{size}.qcow2}}"
        to = _RAW.replace("-O qcow2", f"-O qcow2 -o cluster_size={size}")
        cases += [
            _convert(f"from-cluster-{size}", f"convert qcow2 to raw, {kind}", f"-f qcow2 -O raw {image} out"),
            _convert(f"to-cluster-{size}", f"convert raw to qcow2, {kind}", to),
            _bench(f"bench-read-cluster-{size}", f"4 KiB random read, {kind}", f"{_EVERY_BLOCK} {image}"),
        ]
    sequential = _EVERY_BLOCK.partition(" -S")[0]
    cases += [
        _convert("from-shuffled", "convert to raw, no clusters in order", "-f qcow2 -O raw {shuffled.qcow2} out"),
        _bench("bench-read-shuffled", "4 KiB read, no clusters in order", f"{sequential} {{shuffled.qcow2}}"),
        _convert("direct-raw-qcow2", "convert raw to qcow2, O_DIRECT", f"-T none -t none {_RAW}"),
        _convert("direct-qcow2-raw", "convert to raw, O_DIRECT", "-T none -t none -f qcow2 -O raw {sixty.qcow2} out"),
        _direct("read", "4 KiB random read", f"-c 50000 -S {162_013 * 4096} {{dense-64k.qcow2}}"),
        _direct("rewrite", "4 KiB rewrite", f"-w -c 20000 -S {162_013 * 4096} image", copies=_DENSE),
        _direct("cow", "4 KiB copy-on-write", f"-w -c 4096 -S {10_125 * 65536} image", copies=_FRESH),
    ]
    return tuple(cases)


ENVIRONMENTS = _environments()
"""Workloads that show a law; they have no targets."""

QUICK = frozenset({"map-empty-1g", "map-empty-16t", "check-empty-1g", "check-empty-16t", "bench-read-depth-64", "direct-read"})
"""The environments that a quick run measures, beside the table."""

CASES = TABLE + ENVIRONMENTS
