"""Filters and page tokens of lists."""

import base64
import json
import re
from hashlib import sha256

from lorry.adapter_store.label_index import Label
from lorry.rpc.errors import InvalidRequest

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000
MAX_FILTER_CHARS = 8192  # enough for all labels that an adapter can have
LABEL_TERM = re.compile(r'labels\.([^\s="]+)="((?:[^"\\]|\\.)*)"')
METHOD_TERM = re.compile(r"method=(\w+)")
AND = re.compile(r"\s+AND\s+")


def page_size(asked: int) -> int:
    if asked < 0:
        raise InvalidRequest.of("page_size", f"must not be negative, got {asked}")
    return min(asked or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)


def parse_filter(text: str) -> list[Label]:
    """The labels of ``labels.KEY="VALUE"`` and ``method=LORA``, joined by AND; of none, all match.

    All adapters are LORA.
    """
    if len(text) > MAX_FILTER_CHARS:
        raise InvalidRequest.of("filter", f"must have at most {MAX_FILTER_CHARS} characters")
    labels: list[Label] = []
    position = 0
    while position < len(text):
        label, method = LABEL_TERM.match(text, position), METHOD_TERM.match(text, position)
        match = label or method
        if match is None or (method is not None and method[1] != "LORA"):
            raise _invalid_filter(text, position)
        if label is not None:
            labels.append((label[1], re.sub(r"\\(.)", r"\1", label[2])))
        position = match.end()
        if position < len(text):
            joint = AND.match(text, position)
            if joint is None or joint.end() == len(text):
                raise _invalid_filter(text, position)
            position = joint.end()
    return labels


def make_token(scope: str, last: str) -> str:
    """A token that continues a list after `last`; good for the same scope only."""
    return base64.urlsafe_b64encode(json.dumps([_digest(scope), last]).encode()).decode()


def read_token(token: str, scope: str) -> str | None:
    """Where to continue; None for the first page."""
    if not token:
        return None
    try:
        digest, last = json.loads(base64.urlsafe_b64decode(token.encode()))
    except (ValueError, TypeError, RecursionError):
        digest, last = None, None
    if digest != _digest(scope) or not isinstance(last, str):
        raise InvalidRequest.of("page_token", "is not one of this list")
    return last


def _digest(scope: str) -> str:
    return sha256(scope.encode()).hexdigest()[:16]


def _invalid_filter(text: str, position: int) -> InvalidRequest:
    return InvalidRequest.of(
        "filter",
        f'must be labels.KEY="VALUE" and method=LORA joined by AND, got {text[position:][:100]!r}',
    )
