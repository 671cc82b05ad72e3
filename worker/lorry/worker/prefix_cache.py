"""Full KV pages kept by their keys, lent to every sequence that begins with the same tokens.

A page comes from the sequence that computed it and stays where it is; from then on it is the
cache's, the sequence one of its users. A page that nobody uses is idle and may be evicted. A key
that is already there is not replaced: the later copy remains its sequence's own.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

import numpy as np

from lorry.worker.page_keys import PageKeys
from lorry.worker.pool import PagePool


class PrefixCache:
    """Owns the pool's PREFIX pages."""

    def __init__(self, pool: PagePool, page_tokens: int) -> None:
        self.page_tokens = page_tokens
        self.query_tokens = 0
        self.hit_tokens = 0
        self.evictions = 0
        self._pool = pool
        self._page_of = dict[bytes, int]()
        self._key_of = dict[int, bytes]()
        self._users = dict[int, int]()  # running sequences, by page
        self._idle = dict[int, int]()  # in which step it was last used, by page; longest ago first

    def __contains__(self, key: bytes) -> bool:
        return key in self._page_of

    @property
    def pages(self) -> Collection[int]:
        return self._users.keys()

    @property
    def idle(self) -> Mapping[int, int]:
        """What may be evicted and in which step it was last used, longest ago first."""
        return self._idle

    def match(self, keys: PageKeys, token_ids: np.ndarray) -> list[int]:
        """The cached pages that `token_ids` begin with; the last token is never in them.

        It is computed anew, since its logits are what the next token is drawn from.
        """
        pages = list[int]()
        for index in range((len(token_ids) - 1) // self.page_tokens):
            page = self._page_of.get(keys.at(index, token_ids, self.page_tokens))
            if page is None:
                break
            pages.append(page)
        return pages

    def acquire(self, pages: Iterable[int]) -> None:
        """Count one more user of each page."""
        for page in pages:
            self._users[page] += 1
            self._idle.pop(page, None)

    def enter(self, offered: Iterable[tuple[bytes, int]]) -> None:
        """Take over sequences' pages by their keys; each sequence is its page's first user."""
        taken = list[int]()
        for key, page in offered:
            if key not in self._page_of:
                self._page_of[key] = page
                self._key_of[page] = key
                self._users[page] = 1
                taken.append(page)
        self._pool.turn_into_prefix(taken)

    def release(self, pages: list[int], step: int) -> None:
        """A sequence gives back its pages, in their order: its own are free, cached ones remain.

        A chain's end becomes idle before its beginning, for it is of no use without it.
        """
        own = list[int]()
        for page in reversed(pages):
            if page not in self._users:
                own.append(page)
                continue
            self._users[page] -= 1
            if not self._users[page]:
                self._idle[page] = step
        self._pool.release(own)

    def evict(self, pages: list[int]) -> None:
        """Free idle pages."""
        for page in pages:
            del self._idle[page], self._users[page]
            del self._page_of[self._key_of.pop(page)]
        self._pool.release(pages)
        self.evictions += len(pages)

    def note_query(self, tokens: int, cached_tokens: int) -> None:
        """Count a request's tokens, and how many of them the cache had."""
        self.query_tokens += tokens
        self.hit_tokens += cached_tokens

    def key_of(self, page: int) -> bytes | None:
        """The key of a cached page; None of any other."""
        return self._key_of.get(page)

    def check_integrity(self, used: Iterable[int]) -> None:
        """Raise AssertionError unless `used`, one for each user, are the pages in use."""
        users = Counter(used)
        assert set(users) <= self._users.keys(), "a page in use was evicted"
        for page, count in self._users.items():
            assert count == users[page], f"page {page} has {users[page]} users, counted {count}"
            assert (page in self._idle) == (not count), f"page {page} is wrongly idle"
        assert self._users.keys() == self._key_of.keys(), "a page has no key"
        assert {key: page for page, key in self._key_of.items()} == self._page_of
        assert self._idle.keys() <= self._users.keys(), "an idle page was evicted"
        steps = list(self._idle.values())
        assert steps == sorted(steps), "idle pages are out of order"
