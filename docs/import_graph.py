"""Draw docs/import_graph.svg, the packages and what they import, from the source files.

    python docs/import_graph.py           # write it
    python docs/import_graph.py --check   # exit with status 1 if it does not match the sources

A box is a package or a module of a top package; programs of one top package share a box. An arrow goes
from a box to one that it imports. Arrows that follow from others are left out, and so are those to
pipelines/errors.py.
"""

import argparse
import ast
import sys
import textwrap
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs/import_graph.svg"
# A package imports only itself and those below it.
PACKAGES = ("cosmoflow_dali", "preprocess", "pipelines")
COMMON = "pipelines.errors"
FILL = {"cosmoflow_dali": "#fff4e5", "preprocess": "#e8f5e9", "pipelines": "#e7f0fd"}

WIDTH = 900
CHARACTER = 6.1  # width of one, at 10 px, monospace
LINE = 13
WRAP = 38  # characters
ROW_GAP = 34
BOX_GAP = 22
PAD = 10

Graph = dict[str, set[str]]


def read_sources() -> tuple[dict[str, list[str]], Graph]:
    """Return the modules in each box, and the boxes that each box imports."""
    paths = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
    }
    trees = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in paths.items()}
    boxes = {
        module: _box_of(module, trees[module], paths[module])
        for module in paths
        if module not in (*PACKAGES, COMMON)
    }
    members: dict[str, list[str]] = {box: [] for box in boxes.values()}
    imports: Graph = {box: set() for box in members}
    for module, box in boxes.items():
        if paths[module].name != "__init__.py" and module != box:
            members[box].append(module.removeprefix(box).removeprefix(module.split(".")[0]).strip("."))
        imports[box] |= {boxes[found] for found in _imported(trees[module]) if found in boxes} - {box}
    return members, imports


def _box_of(module: str, tree: ast.Module, path: Path) -> str:
    """Return the name of the box that holds `module`."""
    top, name, *_ = module.split(".")
    if path.parent == ROOT / top and any(
        isinstance(node, ast.If) and "__main__" in ast.dump(node.test) for node in tree.body
    ):
        return f"{top}.programs"
    return f"{top}.{name}"


def _imported(tree: ast.Module) -> set[str]:
    """Return the names that may be modules among those that `tree` imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def reduce(imports: Graph) -> Graph:
    """Return the fewest arrows from which all of `imports` follow."""

    def reachable(start: str) -> set[str]:
        return imports[start].union(*map(reachable, imports[start]))

    return {
        box: {target for target in targets if not any(target in reachable(other) for other in targets)}
        for box, targets in imports.items()
    }


def rows_of(imports: Graph) -> list[list[str]]:
    """Return the boxes in rows, highest first: each above all that it imports, a package above the next."""

    def height(box: str) -> int:
        own = [target for target in imports[box] if target.split(".")[0] == box.split(".")[0]]
        return 1 + max(map(height, own), default=-1)

    rows = []
    for package in PACKAGES:
        boxes = sorted(box for box in imports if box.split(".")[0] == package)
        for level in range(max(map(height, boxes)), -1, -1):
            rows += [[box for box in boxes if height(box) == level]]
    return rows


def route(rows: list[list[str]], arrows: Graph) -> tuple[list[list[str]], list[list[str]]]:
    """Return the rows, with bends where arrows cross them, in an order of few crossings; and the routes."""
    level = {box: index for index, row in enumerate(rows) for box in row}
    rows = [list(row) for row in rows]
    routes = []
    for box in sorted(arrows):
        for target in sorted(arrows[box]):
            bends = [f"{box}>{target}>{index}" for index in range(level[box] + 1, level[target])]
            for bend in bends:
                rows[int(bend.rsplit(">", 1)[1])].append(bend)
            routes.append([box, *bends, target])
    neighbours = _neighbours(routes)
    for sweep in range(24):
        order = range(len(rows)) if sweep % 2 else reversed(range(len(rows)))
        place = {name: (i + 0.5) / len(row) for row in rows for i, name in enumerate(row)}
        for index in order:
            rows[index].sort(
                key=lambda name: (
                    sum(place[other] for other in neighbours[name]) / max(1, len(neighbours[name]))
                )
            )
            place |= {name: (i + 0.5) / len(rows[index]) for i, name in enumerate(rows[index])}
    return rows, routes


def centres(rows: list[list[str]], routes: list[list[str]], width: dict[str, float]) -> dict[str, float]:
    """Return the centre of everything in `rows`: near its neighbours, in order, without overlap."""
    neighbours = _neighbours(routes)
    centre = {name: WIDTH * (i + 0.5) / len(row) for row in rows for i, name in enumerate(row)}
    for sweep in range(40):
        for row in rows if sweep % 2 else reversed(rows):
            wanted = [
                sum(centre[other] for other in neighbours[name]) / max(1, len(neighbours[name]))
                for name in row
            ]
            # The mean of the leftmost and the rightmost way to keep the order and the gaps.
            left, right = list(wanted), list(wanted)
            apart = [(width[a] + width[b]) / 2 + BOX_GAP for a, b in pairwise(row)]
            left[0] = max(left[0], 2 * PAD + width[row[0]] / 2)
            right[-1] = min(right[-1], WIDTH - 2 * PAD - width[row[-1]] / 2)
            for i, gap in enumerate(apart):
                left[i + 1] = max(left[i + 1], left[i] + gap)
            for i, gap in reversed(list(enumerate(apart))):
                right[i] = min(right[i], right[i + 1] - gap)
            for i, name in enumerate(row):
                centre[name] = (left[i] + right[i]) / 2
    shift = (WIDTH - min(centre.values()) - max(centre.values())) / 2
    return {name: x + shift for name, x in centre.items()}


def _neighbours(routes: list[list[str]]) -> dict[str, list[str]]:
    """Return what is next to each point of the routes."""
    neighbours: dict[str, list[str]] = defaultdict(list)
    for points in routes:
        for start, end in pairwise(points):
            neighbours[start].append(end)
            neighbours[end].append(start)
    return neighbours


def draw(members: dict[str, list[str]], imports: Graph) -> str:
    """Return the picture as SVG."""
    rows, routes = route(rows_of(imports), reduce(imports))
    text = {
        box: [box.split(".")[1] + ("" if names else ".py"), *textwrap.wrap(" ".join(names), WRAP)]
        for box, names in members.items()
    }
    width = {name: 0.0 for row in rows for name in row}
    width |= {box: max(map(len, lines)) * CHARACTER + 2 * PAD for box, lines in text.items()}
    centre = centres(rows, routes, width)
    area: dict[str, tuple[float, float, float, float]] = {}
    bands: list[tuple[str, float, float]] = []
    y = 0.0
    for row in rows:
        package = next(name for name in row if name in text).split(".")[0]
        top = bands[-1][1] if bands and bands[-1][0] == package else y + PAD
        if top > y:
            y = top + 2 * LINE
        tall = max(len(text[name]) * LINE + PAD if name in text else 0 for name in row)
        for name in row:
            high = len(text[name]) * LINE + PAD if name in text else tall
            area[name] = (centre[name] - width[name] / 2, y, width[name], high)
        bands = [band for band in bands if band[0] != package] + [(package, top, y + tall + PAD)]
        y += tall + ROW_GAP
    return _svg(bands, routes, area, text)


def _svg(
    bands: list[tuple[str, float, float]],
    routes: list[list[str]],
    area: dict[str, tuple[float, float, float, float]],
    text: dict[str, list[str]],
) -> str:
    """Return the SVG of packages' bands, arrows' routes and boxes at their places."""
    height = bands[-1][2] + 26
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" font-size="10" '
        'font-family="ui-monospace, Menlo, Consolas, monospace">',
        '<marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#607080"/></marker>',
        f'<rect width="{WIDTH}" height="{height:.0f}" fill="#ffffff"/>',
    ]
    for package, top, bottom in bands:
        lines.append(
            f'<rect x="4" y="{top:.0f}" width="{WIDTH - 8}" height="{bottom - top:.0f}" rx="8" '
            f'fill="{FILL[package]}"/>'
        )
        lines.append(f'<text x="14" y="{top + 15:.0f}" font-size="13" font-weight="bold">{package}/</text>')
    for points in routes:
        x, y, wide, high = area[points[0]]
        x, y = x + wide / 2, y + high
        path = f"M{x:.0f} {y:.0f}"
        for name in points[1:]:
            left, top, wide, high = area[name]
            to = left + wide / 2
            path += f"C{x:.0f} {(y + top) / 2:.0f} {to:.0f} {(y + top) / 2:.0f} {to:.0f} {top:.0f}"
            x, y = to, top
            if ">" in name:
                y = top + high
                path += f"V{y:.0f}"
        lines.append(f'<path d="{path}" fill="none" stroke="#607080" marker-end="url(#head)"/>')
    for name, (x, y, wide, high) in area.items():
        if name not in text:
            continue
        lines.append(
            f'<rect x="{x:.0f}" y="{y:.0f}" width="{wide:.0f}" height="{high:.0f}" rx="4" fill="#ffffff" '
            'stroke="#405060"/>'
        )
        for number, line in enumerate(text[name]):
            style = ' font-weight="bold"' if number == 0 else ' fill="#506070"'
            lines.append(
                f'<text x="{x + PAD:.0f}" y="{y + (number + 1) * LINE + 2:.0f}"{style}>{escape(line)}</text>'
            )
    lines.append(f'<text x="14" y="{height - 9:.0f}" fill="#506070">everything may import {COMMON}</text>')
    return "\n".join([*lines, "</svg>", ""])


def main() -> None:
    """Write the picture, or compare it with the sources."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the picture is stale")
    picture = draw(*read_sources())
    if not parser.parse_args().check:
        PICTURE.write_text(picture, encoding="utf-8")
    elif not PICTURE.exists() or PICTURE.read_text(encoding="utf-8") != picture:
        sys.exit(f"{PICTURE.relative_to(ROOT)} is stale: run python docs/import_graph.py")


if __name__ == "__main__":
    main()
