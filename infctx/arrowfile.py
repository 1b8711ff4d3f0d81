"""The file that prepared documents lie in: a stream of Arrow record batches."""

from pathlib import Path
from typing import Any

import numpy as np

from infctx.segments import Document

EACH = 256  # what a document that is held takes besides its tokens, in tokens


class Rows:
    """Documents on their way into an Arrow file.

    Args:
        file: to write.
        vocab_size: of the tokenizer: ids take two bytes where that is enough.
        flush: tokens that are held before they are written: bounds memory.
    """

    def __init__(self, file: Path, vocab_size: int, flush: int) -> None:
        import pyarrow as pa

        self._pa, self.dtype = pa, np.uint16 if vocab_size <= 1 << 16 else np.uint32
        lists = {"tokens": pa.from_numpy_dtype(self.dtype), "mask": pa.bool_()}
        self._schema = pa.schema(
            {key: pa.large_list(kind) for key, kind in lists.items()}
            | {"supervised": pa.int64(), "source": pa.int32()}
        )  # fmt: skip
        self._writer = pa.ipc.new_stream(str(file), self._schema)
        self._held: list[tuple[Document, int, int]] = []
        self._tokens, self._flush_at = 0, flush

    def add(self, made: Document, supervised: int, source: int) -> None:
        """One more, at the end."""
        self._held.append((made, supervised, source))
        self._tokens += len(made.tokens) + EACH
        if self._tokens > self._flush_at:
            self._flush()

    def close(self) -> None:
        """Write what is held."""
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if not self._held:
            return
        made, supervised, source = zip(*self._held, strict=True)
        empty = np.empty(0, bool)
        lists = [
            self._lists([x.tokens for x in made], self.dtype, [False] * len(made)),
            self._lists([empty if x.mask is None else x.mask for x in made], bool, [x.mask is None for x in made]),
        ]
        columns = [*lists, self._pa.array(supervised, "int64"), self._pa.array(source, "int32")]
        self._writer.write_batch(self._pa.record_batch(columns, schema=self._schema))
        self._held, self._tokens = [], 0

    def _lists(self, parts: list[np.ndarray], dtype: Any, null: list[bool]) -> Any:
        offsets = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        values = np.concatenate(parts).astype(dtype, copy=False)
        return self._pa.LargeListArray.from_arrays(offsets, self._pa.array(values), mask=self._pa.array(null))
