"""What an advisor predicts, from numbers alone: its model, what it learns, and what it chooses."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_gpu.advice import WARM_S, Advisor, Link, Load, Work, decide, fit, local_s, remote_s

#: What a small machine measured of itself.
LINK = Link(
    trip_s=0.0007,
    shards_s=0.008,
    open_s=0.9,
    fresh_s=0.004,
    sent_s_per_byte=1e-9,
    read_s=0.002,
    read_s_per_byte=4e-10,
    node_s_per_local_s=0.5,
)
KEY, POOL = ("f", 0), ""
_seconds = st.floats(0, 100)
_links = st.builds(
    Link,
    trip_s=_seconds,
    shards_s=st.none() | _seconds,
    open_s=_seconds,
    fresh_s=_seconds,
    sent_s_per_byte=st.floats(0, 1e-6),
    read_s=_seconds,
    read_s_per_byte=st.floats(0, 1e-6),
    node_s_per_local_s=st.floats(0.001, 100),
)
_sizes = st.integers(0, 1 << 34)
_loads = st.builds(
    Load,
    size_bytes=_sizes,
    actors=st.integers(1, 64),
    rows=st.booleans(),
    in_gateway=st.booleans(),
    opens=st.booleans(),
    fresh=st.booleans(),
)
_runs = st.lists(st.tuples(_loads, _seconds), min_size=1, max_size=8)


@given(_links, _runs, _loads, _sizes)
def test_more_bytes_take_no_less(link: Link, runs: list[tuple[Load, float]], load: Load, more: int) -> None:
    """Neither place gets cheaper by more data, whatever was seen before."""
    work, larger = fit(runs), dataclasses.replace(load, size_bytes=load.size_bytes + more)

    assert remote_s(link, work, larger) >= remote_s(link, work, load)
    assert local_s(link, work, larger) >= local_s(link, work, load)


@given(_links, _runs, _loads)
def test_what_makes_a_call_dearer(link: Link, runs: list[tuple[Load, float]], load: Load) -> None:
    """Opening a lease, sending the function and fewer actors never make a call on nodes cheaper."""
    work = fit(runs)
    least = remote_s(link, work, dataclasses.replace(load, opens=False, fresh=False))

    assert remote_s(link, work, load) >= least >= 0
    assert remote_s(link, work, dataclasses.replace(load, actors=1)) >= remote_s(link, work, load)


@given(_runs, st.integers(1, 5))
def test_work_is_never_negative(runs: list[tuple[Load, float]], factor: int) -> None:
    """Whatever was seen, no work takes less than nothing."""
    work = fit(runs).times(factor)

    assert work.fixed_s >= 0
    assert work.s_per_byte >= 0


def test_line() -> None:
    """A line that was seen at three sizes is found again."""
    runs = [(Load(size_bytes=size), 0.5 + 2e-6 * size) for size in (1000, 50_000, 1_000_000)]

    assert fit(runs).at(500_000) == pytest.approx(1.5, rel=1e-3)


def test_one_size() -> None:
    """One size says that rows cost in proportion, and that arguments do not."""
    assert fit([(Load(size_bytes=100), 2.0)]).at(300) == pytest.approx(6.0)
    assert fit([(Load(size_bytes=100, rows=False), 2.0)]).at(300) == pytest.approx(2.0)


def test_sum_of_parts() -> None:
    """A prediction is the sum that the module's first lines say."""
    load = Load(size_bytes=10_000_000, actors=2, in_gateway=True, opens=True, fresh=True)
    work = Work(0.1, 1e-8)

    assert remote_s(LINK, work, load) == pytest.approx(0.008 + 0.01 + 0.9 + 0.004 + 0.2 / 2)
    assert local_s(LINK, work, load) == pytest.approx(0.002 + 0.004 + 0.2)


@pytest.mark.parametrize(
    ("remote", "local", "chosen", "says"),
    [
        (0.0311, 0.0122, "local", "local is faster: 12 ms against 31 ms"),
        (0.5, 7.0, "remote", "remote is faster: 500 ms against 7.0 s"),
        (1.0, 1.0, "local", "local is faster: 1.0 s against 1.0 s"),
        (12.34, 0.00004, "local", "local is faster: 40 µs against 12 s"),
        (None, 0.012, "remote", "remote, to measure it: 12 ms here is known so far"),
        (0.012, None, "remote", "remote, to measure it: 12 ms there is known so far"),
        (None, None, "remote", "remote, to measure it: nothing is known so far"),
    ],
)
def test_choice(remote: float | None, local: float | None, chosen: str, says: str) -> None:
    """The faster one, in words; what is as fast here does not leave; what is not known goes to nodes."""
    advice = decide(remote, local)

    assert (advice.chosen, str(advice)) == (chosen, says)


def test_refused() -> None:
    """What cannot run here does not, however fast it would be."""
    advice = decide(100.0, 0.001, refused="remote: there is no room")

    assert (advice.chosen, advice.reason, advice.predicted_local_s) == ("remote", "remote: there is no room", None)


def test_one_place_tells_of_the_other() -> None:
    """What was seen in one place is expected in the other by a node's speed; without a measured pool it is not."""
    load = Load(size_bytes=1_000_000)
    advisor = Advisor()
    advisor.saw_local(KEY, load, 1.0)
    unmeasured = advisor.predict(KEY, POOL, load)
    advisor.links[POOL] = LINK
    there = Advisor()
    there.links[POOL] = dataclasses.replace(LINK, shards_s=None)
    there.saw_remote(KEY, POOL, load, 0.5017)

    assert (unmeasured.predicted_remote_s, unmeasured.chosen) == (None, "remote")
    assert advisor.predict(KEY, POOL, load).predicted_remote_s == pytest.approx(0.5 + 0.008 + 0.001)
    assert there.predict(KEY, POOL, load).predicted_local_s == pytest.approx(1.0)


def test_what_was_seen_counts_more() -> None:
    """Once a function ran on a node, what it took there counts, not a node's speed."""
    advisor, load = Advisor(), Load(size_bytes=1_000_000)
    advisor.links[POOL] = LINK
    advisor.saw_local(KEY, load, 1.0)
    advisor.saw_remote(KEY, POOL, load, 30.0)

    assert advisor.predict(KEY, POOL, load).predicted_remote_s == pytest.approx(30.0)
    assert advisor.predict(KEY, POOL, load).chosen == "local"


def test_arguments() -> None:
    """The same arguments are predicted by themselves, others by all that the function took."""
    advisor, load = Advisor(), Load(size_bytes=1_000_000)
    advisor.links[POOL] = LINK
    for arguments, seconds in ((1, 1.0), (2, 9.0)):
        advisor.saw_local((KEY[0], arguments), load, seconds)

    found = [advisor.predict((KEY[0], arguments), POOL, load).predicted_local_s for arguments in (1, 2, 3)]

    assert found == pytest.approx([1.0, 9.0, 5.0])


def test_faster_than_the_link() -> None:
    """A call that took less than its bytes alone should shows that the link is faster, and nothing of the work."""
    advisor, load = Advisor(), Load(size_bytes=100_000_000)
    advisor.links[POOL] = dataclasses.replace(LINK, sent_s_per_byte=1e-7, shards_s=None)
    advisor.saw_remote(KEY, POOL, load, 0.5)

    assert advisor.links[POOL].sent_s_per_byte == pytest.approx(5e-9, rel=0.01)
    assert advisor.predict(KEY, POOL, load).predicted_remote_s == pytest.approx(0.5, rel=0.01)


def test_small_data() -> None:
    """A small call on data shows what such calls take besides; a large one does not."""
    advisor = Advisor()
    advisor.links[POOL] = dataclasses.replace(LINK, shards_s=None)
    for size in (1000, 300_000_000):
        advisor.saw_local(KEY, Load(size_bytes=size), 1e-6)
        advisor.saw_remote(KEY, POOL, Load(size_bytes=size), 0.02 if size == 1000 else 5.0)

    assert advisor.links[POOL].shards_s == pytest.approx(0.02, rel=0.01)


def test_leases_go_cold() -> None:
    """Leases that calls opened are there until nobody used them for a while."""
    advisor, terms = Advisor(), ("", 1.0, "")
    before = advisor.leases(terms, 0.0)
    advisor.saw_leases(terms, 1, 0.0)
    advisor.saw_leases(terms, 1, 5.0)
    advisor.saw_leases(terms, 0, 10.0)

    assert [before, advisor.leases(terms, 11.0), advisor.leases(terms, 10.0 + WARM_S)] == [0, 2, 0]


def test_memory_is_bounded() -> None:
    """A session of many functions forgets the oldest."""
    advisor, load = Advisor(), Load(size_bytes=1)
    advisor.links[POOL] = LINK
    for number in range(2000):
        advisor.saw_local((f"f{number}", number), load, 1.0)

    assert advisor.predict(("f0", 0), POOL, load).predicted_local_s is None
    assert advisor.predict(("f1999", 1999), POOL, load).predicted_local_s == pytest.approx(1.0)
