"""What a stage leaves for its next attempt at a shard where the root is no folder of this machine.

A local root keeps the scratch folder itself. Elsewhere a node that dies takes its disk along, so what a stage has done
is put beside the shard in numbered parts, each there whole or not at all, and removed when the shard is committed:

    _scratch/<stage>/<fingerprint>/<shard>/00000.part …
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from curate.store import Store


class Parts:
    """Appended bytes of one shard, in a folder of the store. One part is on its way at a time; `add` does not wait."""

    def __init__(self, store: Store, folder: str) -> None:
        self._store, self._folder = store, folder
        self._next = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="curate-scratch")
        self._sent: Future[None] | None = None

    def __enter__(self) -> "Parts":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()

    def load(self) -> Iterator[bytes]:
        """What earlier attempts have added, in order. `add` goes on behind it."""
        for name in self._store.names(self._folder):
            yield self._store.get_bytes(f"{self._folder}/{name}")
            self._next = int(name.partition(".")[0]) + 1

    def clear(self) -> None:
        """Forget what earlier attempts have added."""
        self._store.remove_tree(self._folder)
        self._next = 0

    def add(self, data: bytes) -> None:
        """Append bytes, in the background. Raises what the part before this one met."""
        if self._sent is not None:
            self._sent.result()
        self._sent = self._thread.submit(self._store.put_bytes, f"{self._folder}/{self._next:05d}.part", data)
        self._next += 1
