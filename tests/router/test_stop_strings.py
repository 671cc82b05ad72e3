"""The matcher against its definition: try every cut of the whole text."""

import itertools

from hypothesis import example, given
from hypothesis import strategies as st

from lorry.router.stop_strings import StopMatcher

texts = st.text("ab", max_size=14)
stop_lists = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4)


def first_cut(text: str, stops: list[str], least_end: int = 0) -> tuple[int, str] | None:
    """Where the text ends, and by which stop string, by trying every end."""
    for end in range(least_end, len(text) + 1):
        matching = [stop for stop in stops if text[:end].endswith(stop)]
        if matching:
            longest = max(matching, key=len)
            return end - len(longest), longest
    return None


def split(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


def run(pieces: list[str], stops: list[str]) -> tuple[str, str | None]:
    matcher = StopMatcher(stops)
    emitted = ""
    for piece in pieces:
        emitted += matcher.push(piece)
        if matcher.matched is not None:
            return emitted, matcher.matched
    return emitted + matcher.flush(), None


@given(texts, stop_lists, st.lists(st.integers(0, 20), max_size=6))
@example("aab", ["aab", "ab", "b"], [1, 2])
@example("abab", ["abab", "b"], [])
def test_the_text_is_cut_at_the_first_stop_string(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    cut = first_cut(text, stops)
    expected = (text, None) if cut is None else (text[: cut[0]], cut[1])
    assert run(split(text, cuts), stops) == expected


@given(texts, stop_lists)
def test_exactly_what_could_begin_a_stop_string_is_held_back(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    emitted = ""
    for end in range(1, len(text) + 1):
        emitted += matcher.push(text[end - 1])
        if matcher.matched is not None:
            return
        beginnings = [
            size
            for stop in stops
            for size in range(1, len(stop))
            if text[:end].endswith(stop[:size])
        ]
        assert len(emitted) == end - max(beginnings, default=0)


@given(texts, stop_lists, st.integers(0, 14))
def test_matches_that_end_too_early_are_ignored(
    text: str, stops: list[str], num_ignored: int
) -> None:
    matcher = StopMatcher(stops)
    emitted = ""
    for index, character in enumerate(text):
        emitted += matcher.push(character, counts=index >= num_ignored)
        if matcher.matched is not None:
            break
    else:
        emitted += matcher.flush()
    cut = first_cut(text, stops, least_end=num_ignored + 1)
    assert emitted == (text if cut is None else text[: cut[0]])
    assert matcher.matched == (None if cut is None else cut[1])


def test_a_match_is_cut_out_of_a_long_piece() -> None:
    assert run(["x" * 1000 + "END" + "y" * 1000], ["END"]) == ("x" * 1000, "END")


def test_stop_strings_of_several_bytes_match_by_character() -> None:
    assert run(["caf", "é", " au lait"], ["é a"]) == ("caf", "é a")
