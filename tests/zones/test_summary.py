"""zones.summary and zones.pictures: the report says what the entries say, to the byte, and nothing gets out of it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import pytest

from tests.zones import months
from zones.pictures import amount, page
from zones.summary import NO_DATASET, Summary, summarise

ENTRIES = months.entries()
FOUND = summarise(ENTRIES)


def of_kind(kind: str) -> list[dict[str, object]]:
    """Return the entries of a kind."""
    return [entry for entry in ENTRIES if entry["kind"] == kind]


def test_sums() -> None:
    """All that the completions say is in the sums, each under its intent."""
    total = FOUND.total()
    completions = of_kind("completion")

    assert (total.bytes, total.calls, total.rows) == tuple(
        sum(int(str(entry[name])) for entry in completions) for name in ("bytes", "calls", "rows")
    )
    for name in ("dataset", "pool", "node", "day", "classification", "person"):
        assert sum(FOUND.total(**{name: value}).bytes for value in FOUND.names(name)) == total.bytes
    randhie = {entry["seq"] for entry in ENTRIES if entry["kind"] == "intent" and entry["dataset"] == "randhie"}
    wanted = sum(int(str(entry["bytes"])) for entry in completions if entry["intent"] in randhie)
    assert FOUND.total(dataset="randhie").bytes == wanted > 0
    assert FOUND.total(dataset="randhie", classification="confidential").bytes == wanted
    assert FOUND.total(dataset=NO_DATASET, classification="internal").bytes > 0


def test_counts() -> None:
    """Sessions, refusals of both kinds, leases and shares are those of the entries."""
    refused = [entry for entry in of_kind("decision") if entry["decision"] == "refused"] + of_kind("refusal")

    assert FOUND.sessions == len(of_kind("session-start"))
    assert sorted(one.seq for one in FOUND.refused) == sorted(int(str(entry["seq"])) for entry in refused)
    assert {one.rules for one in FOUND.refused} == {"no-direct-identifiers", "default", "max_rows"}
    assert all(one.dataset for one in FOUND.refused)
    assert len(FOUND.leases) == len(of_kind("lease-end"))
    assert sum(lease.outcome == "lost" for lease in FOUND.leases) == 1
    assert {lease.node for lease in FOUND.leases if lease.degradations} == {"gpu-3"}
    assert max(FOUND.shares.values()) == max(int(str(entry["percent"])) for entry in of_kind("share"))


def test_part_of_the_time() -> None:
    """Two parts of the time together are the whole; an intent may stand in one and its completion in the other."""
    for cut in {entry["time"] for entry in ENTRIES[10:60]}:
        early, late = summarise(ENTRIES, until=cut), summarise(ENTRIES, since=cut)
        assert early.total().bytes + late.total().bytes == FOUND.total().bytes
        assert early.entries + late.entries == FOUND.entries
        assert early.last < cut <= late.first


def test_crash() -> None:
    """What a crash left unknown counts as all that may have left."""
    intent = {**of_kind("intent")[0], "seq": 1}
    crash = {
        "kind": "recovered", "seq": 2, "time": "2026-03-02T09:00:00.000000Z", "intent": 1, "node": "gpu-1",
        "at_most_calls": 3, "at_most_bytes": 500,
    }  # fmt: skip
    found = summarise([ENTRIES[0], intent, crash])

    assert (found.total().bytes, found.total().calls, found.at_most) == (500, 3, 500)


class _Page(HTMLParser):
    """Collects a page's tags, and what it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [str(value) for name, value in attrs if name in ("src", "href", "xlink:href", "action")]

    def handle_data(self, data: str) -> None:
        self.words += f" {data}"


def test_page() -> None:
    """The page is well-formed, fetches nothing, runs nothing, and says its numbers as text."""
    text = page(FOUND, verified=[("chain", "holds")])
    found = _Page(text)
    body = text.partition("<body>")[2].partition("</body>")[0]

    ET.fromstring(f"<body>{body}</body>")
    assert found.fetched == []
    assert not {"script", "link", "img", "iframe", "object"} & set(found.tags)
    assert not re.search(r"url\(|@import|https?:", text)
    for number in (amount(FOUND.total().bytes), f"{FOUND.total().rows:,}", "max_rows", "gpu-3", "swap-on", "holds"):
        assert number in found.words
    assert found.tags.count("svg") >= 3


@pytest.mark.parametrize("hostile", ["<script>alert(1)</script>", '"><img src=x onerror=1>', "a&b</svg><b>"])
def test_nothing_gets_out_of_the_page(hostile: str) -> None:
    """Names and reasons that would be markup are shown as they are."""
    entries = [
        {
            key: hostile if key in ("dataset", "purpose", "person", "node", "pool", "reason") and value else value
            for key, value in entry.items()
        }
        for entry in ENTRIES
    ]
    text = page(summarise(entries), verified=[(hostile, hostile)])
    found = _Page(text)

    assert not {"script", "img", "b"} - {"b"} & set(found.tags)
    assert found.fetched == []
    assert hostile in re.sub(r"\s+", " ", found.words) or hostile[:20] in found.words


def test_empty() -> None:
    """A ledger in which nothing happened makes a page that says so."""
    found = summarise(ENTRIES[:2])
    text = page(found, verified=[])

    assert found.total().bytes == 0
    assert text.count("None.") >= 4
    assert page(Summary(), verified=[])


@pytest.mark.parametrize(
    ("bytes_", "said"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (99_940, "99.9 kB"),
        (163_000_000, "163 MB"),
        (5 * 10**15, "5000 TB"),
    ],
)
def test_amounts(bytes_: int, said: str) -> None:
    """Bytes are said in powers of ten."""
    assert amount(bytes_) == said
