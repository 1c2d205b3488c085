"""Pictures of a :class:`zones.summary.Summary` as SVG, and the page around them: one HTML file that needs no network.

Pure. Everything that comes from the ledger is escaped. Colours are told apart by people who see few of them, and each
picture says its numbers as text too, so that it reads in print.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape

from zones.summary import Amount, Leased, Refused, Summary

#: By Okabe and Ito, for classes from the least sensitive on.
_COLOURS = ("#56b4e9", "#009e73", "#e69f00", "#d55e00", "#cc79a7", "#0072b2")
_WIDTH = 960
_MOST_ROWS = 60

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.45 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: #1b1f24; margin: 2rem auto;
  max-width: 1000px; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p { margin: .4rem 0 .8rem; } .quiet { color: #57606a; }
.cards { display: grid; grid-template-columns: repeat(4, 1fr); gap: .7rem; margin: 1.2rem 0; }
.card { border: 1px solid #d0d7de; border-radius: 8px; padding: .6rem .8rem; }
.card b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.bad b { color: #b42318; }
table { border-collapse: collapse; width: 100%; margin: .5rem 0; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #e1e4e8; vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
svg { width: 100%; height: auto; } svg text { font: 13px system-ui, Helvetica, Arial, sans-serif; fill: #1b1f24;
  paint-order: stroke; stroke: #fff; stroke-width: 3px; stroke-linejoin: round; }
svg text.quiet { fill: #57606a; } code { font-size: .87em; overflow-wrap: anywhere; }
.key span { display: inline-block; margin-right: 1.1rem; } .key i { display: inline-block; width: .8rem; height: .8rem;
  border-radius: 2px; margin-right: .35rem; vertical-align: -1px; }
section { break-inside: avoid-page; }
@media print { body { margin: 0; max-width: none; font-size: 11px; } h2 { margin-top: 1.2rem; }
  tr, .card, svg { break-inside: avoid; } * { print-color-adjust: exact; } }
"""


def page(found: Summary, *, verified: Sequence[tuple[str, str]]) -> str:
    """Return the whole report.

    Args:
        found: From :func:`zones.summary.summarise`.
        verified: What was checked of the ledger, and how that went.
    """
    title = f"What left zone {found.zone}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="quiet">{_day(found.first)} to {_day(found.last)} (UTC), {found.entries:,} ledger entries</p>',
        _cards(found),
        *_section("Where it went", _flow_text(found), _flows(found) if found.flows else ""),
        *_section("When, and how sensitive", "Bytes that left on each day, by the most sensitive class.", _days(found)),
        *_section("What", "", _datasets(found)),
        *_section("Share per server", _share_text(found), _shares(found)),
        *_section("Refused", _refused_text(found.refused), _refusals(found.refused)),
        *_section("Leases", _degraded_text(found.leases), _leases(found.leases)),
        *_section("How far this can be relied on", "", _table(("checked", "result"), verified)),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    top = f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head>'
    return f"{top}\n<body>{''.join(parts)}</body></html>\n"


def amount(bytes_: int) -> str:
    """Return a number of bytes for people, in powers of ten."""
    size, unit = float(bytes_), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"


def _section(title: str, text: str, body: str) -> Iterator[str]:
    said = f"<p>{text}</p>" if text else ""
    yield f"<section><h2>{escape(title)}</h2>{said}{body or _nothing()}</section>"


def _nothing() -> str:
    return '<p class="quiet">None.</p>'


def _day(time: str) -> str:
    return escape(f"{time[:10]} {time[11:16]}")


def _cards(found: Summary) -> str:
    total = found.total()
    degraded = sum(bool(lease.degradations) for lease in found.leases)
    lost = sum(lease.outcome != "done" for lease in found.leases)
    numbers = [
        ("bytes left", amount(total.bytes), False),
        ("calls", f"{total.calls:,}", False),
        ("rows left", f"{total.rows:,}", False),
        ("people, sessions", f"{len(found.people)}, {found.sessions}", False),
        ("refused", f"{len(found.refused):,}", bool(found.refused)),
        ("leases lost", f"{lost} of {len(found.leases)}", bool(lost)),
        ("leases degraded", f"{degraded} of {len(found.leases)}", bool(degraded)),
        ("versions of the policy", str(len(dict.fromkeys(found.policies))), False),
    ]
    cards = (f'<div class="card{" bad" if bad else ""}"><b>{said}</b>{name}</div>' for name, said, bad in numbers)
    return f'<div class="cards">{"".join(cards)}</div>'


def _colours(names: Sequence[str]) -> dict[str, str]:
    return {name: _COLOURS[place % len(_COLOURS)] for place, name in enumerate(names)}


def _key(colours: Mapping[str, str]) -> str:
    spans = (f'<span><i style="background:{colour}"></i>{escape(name)}</span>' for name, colour in colours.items())
    return f'<p class="key">{"".join(spans)}</p>'


# -- where it went -----------------------------------------------------------------------------------


def _flow_text(found: Summary) -> str:
    lines = []
    for dataset in found.names("dataset"):
        pools = ", ".join(
            f"{escape(pool)} {amount(found.total(dataset=dataset, pool=pool).bytes)}"
            for pool in found.names("pool")
            if found.total(dataset=dataset, pool=pool).bytes
        )
        lines.append(f"<b>{escape(dataset)}</b>: {pools}")
    return "; ".join(lines)


def _flows(found: Summary) -> str:
    """Return a picture of three columns: data sets, pools and nodes, with bands as wide as what went."""
    columns = [found.names("dataset"), found.names("pool"), found.names("node")]
    sizes = [
        {name: found.total(**{kind: name}).bytes for name in names}
        for kind, names in zip(("dataset", "pool", "node"), columns, strict=True)
    ]
    total = max(1, found.total().bytes)
    height, gap, bar = 260.0, 14.0, 14
    tallest = max(len(names) for names in columns)
    scale = (height - gap * (tallest - 1)) / total
    places = [_stacked(size, scale, gap) for size in sizes]
    height = max(start + width for place in places for start, width in place.values()) + 6
    lefts = (230, 480, 716)
    colours = _colours(columns[0])
    shapes: list[str] = []
    for (left, right), kinds in zip(((0, 1), (1, 2)), (("dataset", "pool"), ("pool", "node")), strict=True):
        used: Counter[tuple[int, str]] = Counter()
        filled: dict[tuple[int, str], float] = {}
        for one in columns[left]:
            for other in columns[right]:
                for dataset in columns[0]:
                    wanted = {kinds[0]: one, kinds[1]: other, "dataset": dataset}
                    if kinds[0] == "dataset" and dataset != one:
                        continue
                    width = found.total(**wanted).bytes * scale
                    if not width:
                        continue
                    start = filled.get((left, one), places[left][one][0])
                    end = filled.get((-right, other), places[right][other][0])
                    shapes.append(_band(lefts[left] + bar, start, lefts[right], end, max(width, 0.6), colours[dataset]))
                    filled[left, one], filled[-right, other] = start + width, end + width
                    used[left, one] += 1
    for place, left, size in zip(places, lefts, sizes, strict=True):
        for name, (start, width) in place.items():
            shapes.append(_rect(left, start, bar, max(width, 1.5), "#1b1f24"))
            middle = start + width / 2 + 4
            text = f"{escape(_short(name))} · {amount(size[name])}"
            if left == lefts[0]:
                shapes.append(f'<text x="{left - 8}" y="{middle:.1f}" text-anchor="end">{text}</text>')
            else:
                shapes.append(f'<text x="{left + bar + 8}" y="{middle:.1f}">{text}</text>')
    return _svg(height, shapes, "Bytes from data sets through pools to nodes")


def _stacked(sizes: Mapping[str, int], scale: float, gap: float) -> dict[str, tuple[float, float]]:
    """Return top and height of each bar of a column; small ones leave room for their words."""
    found, top = {}, 12.0
    for name, size in sizes.items():
        found[name] = (top, size * scale)
        top += max(size * scale, 8.0) + gap
    return found


def _band(x: float, y: float, x2: float, y2: float, width: float, colour: str) -> str:
    middle = (x + x2) / 2
    there = f"M{x:.1f},{y:.1f} C{middle:.1f},{y:.1f} {middle:.1f},{y2:.1f} {x2:.1f},{y2:.1f}"
    y, y2 = y + width, y2 + width
    back = f"L{x2:.1f},{y2:.1f} C{middle:.1f},{y2:.1f} {middle:.1f},{y:.1f} {x:.1f},{y:.1f} Z"
    return f'<path d="{there} {back}" fill="{colour}" fill-opacity=".55"/>'


def _rect(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"/>'


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    """Return words around a point; *text* is escaped already."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle"{kind}>{text}</text>'


def _short(name: str, most: int = 26) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _svg(height: float, shapes: Iterable[str], label: str) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">{"".join(shapes)}</svg>'


# -- when ---------------------------------------------------------------------------------------------


def _days(found: Summary) -> str:
    days = found.names("day")
    classes = sorted(found.names("classification"), key=lambda name: (found.ranks.get(name, -1), name))
    if not days:
        return ""
    colours = _colours(classes)
    most = max(1, *(found.total(day=day).bytes for day in days))
    height, left = 200.0, 8.0
    step = (_WIDTH - 16) / len(days)
    width = min(64.0, step * 0.7)
    shapes = [f'<line x1="0" x2="{_WIDTH}" y1="{height}" y2="{height}" stroke="#8c959f"/>']
    every = -(-len(days) // 12)
    for place, day in enumerate(days):
        x, y = left + place * step + (step - width) / 2, height
        for classification in classes:
            tall = found.total(day=day, classification=classification).bytes / most * (height - 30)
            if tall:
                y -= tall
                shapes.append(_rect(x, y, width, tall, colours[classification]))
        if len(days) <= 16:
            shapes.append(_text(x + width / 2, y - 6, amount(found.total(day=day).bytes)))
        if place % every == 0:
            shapes.append(_text(x + width / 2, height + 18, escape(day), ' class="quiet"'))
    return _key(colours) + _svg(height + 26, shapes, "Bytes per day and class")


# -- tables -------------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Return a table; cells are escaped. *numbers*: columns of numbers."""

    def cells(tag: str, row: Sequence[str]) -> str:
        kinds = (' class="n"' if place in numbers else "" for place in range(len(row)))
        return "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(kinds, row, strict=True))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><thead><tr>{cells('th', head)}</tr></thead><tbody>{body}</tbody></table>" if body else ""


def _datasets(found: Summary) -> str:
    rows: dict[tuple[str, str], tuple[Amount, set[str]]] = {}
    for flow, left in found.flows.items():
        total, people = rows.setdefault((flow.dataset, flow.classification), (Amount(), set()))
        total.add(left.bytes, left.calls, left.rows)
        people.add(flow.person)
    return _table(
        ("data set", "most sensitive class", "rows", "calls", "bytes", "people"),
        [
            (
                dataset,
                classification,
                f"{total.rows:,}",
                f"{total.calls:,}",
                amount(total.bytes),
                ", ".join(sorted(people)),
            )
            for (dataset, classification), (total, people) in sorted(rows.items())
        ],
        numbers=(2, 3, 4),
    )


def _share_text(found: Summary) -> str:
    bounded = "the most that policy's count says it was given of it in one window" if found.shares else ""
    return f"Of the bytes of each data set, how much each node was sent{', and ' + bounded if bounded else ''}."


def _shares(found: Summary) -> str:
    rows = []
    for dataset in found.names("dataset"):
        total = max(1, found.total(dataset=dataset).bytes)
        for node in found.names("node"):
            sent = found.total(dataset=dataset, node=node).bytes
            if sent:
                bound = found.shares.get((dataset, node))
                rows.append((dataset, node, 100 * sent / total, amount(sent), f"{bound} %" if bound else "not bounded"))
    body = "".join(
        f"<tr><td>{escape(dataset)}</td><td>{escape(node)}</td><td>"
        f'<svg viewBox="0 0 200 12" style="width:200px"><rect width="200" height="12" rx="2" fill="#eaeef2"/>'
        f'<rect width="{2 * percent:.1f}" height="12" rx="2" fill="#0072b2"/></svg></td>'
        f'<td class="n">{percent:.0f} %</td><td class="n">{sent}</td><td class="n">{escape(bound)}</td></tr>'
        for dataset, node, percent, sent, bound in rows
    )
    names = ("of its bytes", "bytes", "of its rows, at most")
    numbers = "".join(f'<th class="n">{name}</th>' for name in names)
    head = f"<tr><th>data set</th><th>node</th><th></th>{numbers}</tr>"
    return f"<table><thead>{head}</thead><tbody>{body}</tbody></table>" if body else ""


def _refused_text(refused: Sequence[Refused]) -> str:
    counted = Counter(one.rules for one in refused)
    said = "; ".join(f"{escape(rules)}: {times}" for rules, times in counted.most_common(8))
    more = f" The last {_MOST_ROWS} of {len(refused):,} are shown." if len(refused) > _MOST_ROWS else ""
    return f"{said}.{more}" if said else ""


def _refusals(refused: Sequence[Refused]) -> str:
    rows = [
        (_day(one.time), one.person, one.purpose, one.dataset, one.rules, one.reasons, str(one.seq))
        for one in refused[-_MOST_ROWS:]
    ]
    return _table(("time", "person", "purpose", "data set", "rule", "why", "entry"), rows, numbers=(6,))


def _degraded_text(leases: Sequence[Leased]) -> str:
    lacking = Counter(name for lease in leases for name in lease.degradations)
    if not leases:
        return ""
    if not lacking:
        return "Every lease had all controls."
    said = ", ".join(f"{escape(name)} ({times})" for name, times in lacking.most_common())
    return f"Controls that were missing, and on how many of {len(leases)} leases: {said}."


def _leases(leases: Sequence[Leased]) -> str:
    found: dict[tuple[str, str, str, str, int], list[Leased]] = {}
    for lease in leases:
        why = f"lost: {lease.reason}" if lease.outcome != "done" else lease.outcome
        key = (lease.node, lease.device or "unknown", why, ", ".join(lease.degradations) or "nothing", lease.held)
        found.setdefault(key, []).append(lease)
    rows = [
        (*names, str(held) if held else "unknown", str(len(some)), f"{sum(one.seconds for one in some):,}")
        for (*names, held), some in sorted(found.items())
    ]
    head = ("node", "device", "outcome", "lacked", "controls held", "leases", "seconds")
    return _table(head, rows, numbers=(4, 5, 6))
