"""``python -m benchmarks.document RESULTS.json...``: put saved results into docs/performance.md and redraw its plots.

The files are what `make bench`, ``benchmarks.run --json`` and ``benchmarks.costs --json`` save; of a case that stands in
several the last counts.  In the page everything between ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` is replaced, the
rest is written by people.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.cases import ENVIRONMENTS, FLAGS, TABLE, Case
from benchmarks.costs import COLUMNS
from benchmarks.environments import CLUSTER_BITS, DEPTHS, FULL_SIZES, SCATTERED, VIRTUAL_SIZES
from benchmarks.measure import ROOT, Result
from benchmarks.plots import Line, plot
from benchmarks.report import missed

PAGE = ROOT / "docs" / "performance.md"
PLOTS = ROOT / "docs" / "plots"


def main() -> int:
    parser = argparse.ArgumentParser(description="Put benchmark results into docs/performance.md.")
    parser.add_argument("files", nargs="+", type=Path, metavar="RESULTS.json")
    results: dict[str, Result] = {}
    requests: dict[str, float] = {}
    costs: dict[str, Any] = {}
    machine: dict[str, Any] = {}
    for path in parser.parse_args().files:
        saved = json.loads(path.read_text())
        if "costs" in saved:
            costs.update(saved["costs"])
        else:
            machine = _read(saved, results, requests)
    page = PAGE.read_text()
    for name, text in sections(machine, results, requests, costs).items():
        before, begin, rest = page.partition(f"<!-- begin {name} -->\n")
        _old, end, after = rest.partition(f"<!-- end {name} -->")
        if not end:
            parser.error(f"{PAGE} has no section {name}")
        page = before + begin + text + end + after
    PAGE.write_text(page)
    PLOTS.mkdir(exist_ok=True)
    for name, svg in plots(results).items():
        (PLOTS / name).write_text(svg)
    return 0


def _read(saved: Mapping[str, Any], results: dict[str, Result], requests: dict[str, float]) -> dict[str, Any]:
    """Sort one file's results in and return the facts of its machine."""
    if "benchmarks" not in saved:
        found = saved["results"]
    else:
        found = [one["extra_info"]["comparison"] for one in saved["benchmarks"] if "comparison" in one["extra_info"]]
        for one in saved["benchmarks"]:
            if "comparison" not in one["extra_info"]:
                requests[one["name"]] = one["stats"]["median"] / one["extra_info"].get("requests", 1)
    results.update({one["name"]: Result.from_json(one) for one in found})
    machine: dict[str, Any] = saved["machine"] if "machine" in saved else saved["machine_info"]["blocklib"]
    return machine


def sections(
    machine: Mapping[str, Any], results: Mapping[str, Result], requests: Mapping[str, float], costs: Mapping[str, Any]
) -> dict[str, str]:
    """The text of each part of the page that is made from results."""
    return {
        "machine": "".join(f"- {key.replace('_', ' ')}: {value}\n" for key, value in machine.items()),
        "targets": _table(TABLE, results, targets=True),
        "environments": _table(ENVIRONMENTS, results, targets=False),
        "requests": "| one request of 4 KiB | us |\n|---|---|\n"
        + "".join(f"| `{name.removeprefix('test_')}` | {seconds * 1e6:.2f} |\n" for name, seconds in sorted(requests.items())),
        "costs": _cost_table(costs),
    }


def _table(cases: Iterable[Case], results: Mapping[str, Result], *, targets: bool) -> str:
    head = ["workload", "case", "ratio", *(["at most", ""] if targets else []), "s", "CPU s", "MiB", "its flags"]
    rows = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for case in cases:
        result = results.get(case.name)
        if result is None:
            continue
        ours, theirs = result.ours, result.theirs
        cells = [case.about, f"`{case.name}`", f"**{result.ratio:.2f}**"]
        if targets:
            limits = [] if case.target is None else [f"{case.target:.2f}".rstrip("0").rstrip(".")]
            limits += [] if case.peak_mib is None else [f"{case.peak_mib} MiB"]
            cells += [", ".join(limits), "missed" if missed(case, result) else "met"]
        cells += [
            f"{ours.seconds:.3f} / {theirs.seconds:.3f}",
            f"{ours.cpu_seconds:.2f} / {theirs.cpu_seconds:.2f}",
            f"{ours.peak_bytes / 2**20:.0f} / {theirs.peak_bytes / 2**20:.0f}",
            next((f"`{flags}`" for flags in FLAGS if flags in result.chosen), ""),
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def _cost_table(costs: Mapping[str, Any]) -> str:
    rows = ["| case | |" + "".join(f" {kind} |" for kind in COLUMNS), "|" + "---|" * (2 + len(COLUMNS))]
    for name, sides in costs.items():
        for side, program in (("ours", "blocklib"), ("theirs", "qemu-img")):
            cells = []
            for kind in COLUMNS:
                calls, moved = sides[side].get(kind, (0, 0))
                cells.append(f"{calls:,} ({moved / 2**20:,.1f} MiB)" if moved else f"{calls:,}")
            rows.append(f"| `{name}` | {program} | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


# -- plots ------------------------------------------------------------------------------------------------------------


def plots(results: Mapping[str, Result]) -> dict[str, str]:
    """File names and SVGs of the laws whose cases were measured."""
    laws: dict[str, tuple[str, str, Mapping[str, float], tuple[str, ...]]] = {
        "virtual-size.svg": ("An empty image", "virtual size", _numbers(VIRTUAL_SIZES), ("map-empty", "check-empty")),
        "metadata.svg": ("Everything mapped", "mapped", _numbers(FULL_SIZES), ("map-full", "check-full")),
        "fragmentation.svg": (
            "64 GiB, clusters in random order",
            "clusters",
            _numbers(SCATTERED),
            ("map-scattered", "check-scattered"),
        ),
        "depth.svg": (
            "1 GiB, half of it data, in a chain",
            "images",
            {str(depth): float(depth + 1) for depth in DEPTHS},
            ("bench-read-depth", "convert-depth"),
        ),
        "cluster-size.svg": (
            "1 GiB",
            "cluster size",
            {name: float(1 << bits) for name, bits in CLUSTER_BITS.items()},
            ("from-cluster", "to-cluster", "bench-read-cluster"),
        ),
    }
    drawn: dict[str, str] = {}
    for file, (title, x_label, xs, families) in laws.items():
        lines: list[Line] = []
        for kind, family in enumerate(families):
            known = {x: results[f"{family}-{name}"] for name, x in xs.items() if f"{family}-{name}" in results}
            verb = family.removesuffix("-empty").removesuffix("-full").removesuffix("-scattered").removesuffix("-depth")
            verb = verb.removesuffix("-cluster")
            if known:
                lines.append(Line(f"blocklib {verb}", kind, False, [(x, one.ours.seconds) for x, one in known.items()]))
                lines.append(Line(f"qemu-img {verb}", kind, True, [(x, one.theirs.seconds) for x, one in known.items()]))
        if lines:
            names = {x: name for name, x in xs.items()}
            x_text = (lambda x: f"{x:.0f}") if file == "depth.svg" else names.__getitem__
            drawn[file] = plot(title, x_label, "seconds, whole process", lines, x_text)
    return drawn


def _numbers(sizes: Mapping[str, int]) -> dict[str, float]:
    return {name: float(size) for name, size in sizes.items()}


if __name__ == "__main__":
    sys.exit(main())
