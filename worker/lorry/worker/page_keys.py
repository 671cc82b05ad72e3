"""Names of full KV pages by what their content depends on.

A page's KV is a function of the base model, the adapter's version and all tokens up to the page's
end. Its key is a digest of tenant, version and those tokens, chained from page to page: equal keys
are equal content, for a digest of 256 bits, and no tenant's key is another's.
"""

from hashlib import blake2b

import numpy as np

DIGEST_BYTES = 32


class PageKeys:
    """Keys of one request's full pages, each made when it is first asked for."""

    __slots__ = ("_keys",)

    def __init__(self, tenant: str, version: bytes) -> None:
        name = tenant.encode()
        start = len(name).to_bytes(4, "little") + name + version
        self._keys = [blake2b(start, digest_size=DIGEST_BYTES).digest()]

    def at(self, index: int, token_ids: np.ndarray, page_tokens: int) -> bytes:
        """The key of page `index`; `token_ids` (int32) begin with all tokens up to its end."""
        if index + 1 < len(self._keys):
            return self._keys[index + 1]
        for page in range(len(self._keys) - 1, index + 1):
            tokens = token_ids[page * page_tokens : (page + 1) * page_tokens]
            assert len(tokens) == page_tokens, f"page {page} is not full"
            content = self._keys[-1] + tokens.tobytes()
            self._keys.append(blake2b(content, digest_size=DIGEST_BYTES).digest())
        return self._keys[-1]
