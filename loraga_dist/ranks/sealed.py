"""A store between ranks that nobody else can speak in: every value carries a seal that takes a secret to make."""

from __future__ import annotations

import hashlib
import hmac

from torch.distributed.distributed_c10d import Store


class SealedStore:
    """Keys are open and values can be read by all who reach the store; what is not sealed by `secret` is not there.

    The secret itself never enters the store.
    """

    def __init__(self, store: Store, secret: str) -> None:
        self._store, self._secret = store, secret.encode()
        self.strangers = 0
        """Values seen that no rank has written."""

    def set(self, key: str, text: str) -> None:
        self._store.set(key, self._sealed(key, text))

    def get(self, key: str) -> str | None:
        """What a rank has written there, or None."""
        return self._opened(key, self._store.get(key)) if self._store.check([key]) else None

    def first(self, key: str, text: str) -> str:
        """What is there if a rank has written it, else this text, which then is there for all."""
        sealed, expected = self._sealed(key, text), ""
        for _ in range(3):
            found = self._store.compare_set(key, expected, sealed)
            if (known := self._opened(key, found)) is not None:
                return known
            expected = found.decode(errors="replace")  # a stranger's, to be replaced
        self._store.set(key, sealed)
        return text

    def _seal(self, key: str, text: bytes) -> bytes:
        return hmac.new(self._secret, key.encode() + b"\0" + text, hashlib.sha256).hexdigest().encode()

    def _sealed(self, key: str, text: str) -> str:
        return f"{self._seal(key, text.encode()).decode()} {text}"

    def _opened(self, key: str, value: bytes) -> str | None:
        seal, _, text = value.partition(b" ")
        if hmac.compare_digest(seal, self._seal(key, text)):
            return text.decode()
        self.strangers += 1
        return None
