"""A storage that counts what is read through it."""

from components.shards.storage import Storage


class CountingStorage(Storage):
    """Counts what is read."""

    read_bytes = reads = 0

    def read(self, url: str, offset: int, size: int) -> bytes:
        self.read_bytes, self.reads = self.read_bytes + size, self.reads + 1
        return super().read(url, offset, size)
