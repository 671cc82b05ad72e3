"""Writes the table of errors in docs/faults.md from `lorry.rpc.errors`: `make docs`."""

from collections.abc import Iterator
from pathlib import Path

from lorry.rpc.errors import ERRORS, LorryError

PAGE = Path(__file__).parents[1] / "docs" / "faults.md"
BEGIN, END = "<!-- errors, by `make docs`: begin -->\n", "<!-- errors: end -->"


def table() -> str:
    return "\n".join(["", *_lines(), "", ""])


def _lines() -> Iterator[str]:
    yield "| Code | Reason | Meaning |"
    yield "|---|---|---|"
    for error in sorted(ERRORS.values(), key=lambda error: (error.code.name, error.reason)):
        yield f"| {error.code.name} | {error.reason} | {meaning(error)} |"


def meaning(error: type[LorryError]) -> str:
    """The first paragraph of the class's own docstring, without its full stop."""
    paragraph, *_ = (error.__doc__ or "").split("\n\n")
    return " ".join(paragraph.split()).removesuffix(".")


def parts() -> tuple[str, str, str]:
    """The page before, between and after the markers."""
    before, rest = PAGE.read_text().split(BEGIN)
    between, after = rest.split(END)
    return before, between, after


def main() -> None:
    before, _, after = parts()
    PAGE.write_text(before + BEGIN + table() + END + after)


if __name__ == "__main__":
    main()
