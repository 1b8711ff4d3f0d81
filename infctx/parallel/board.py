"""A board in rank 0's process: each rank writes there how far it is, and rank 0 judges whether one is dead or hangs.

Plain sockets, since torch's TCPStore cannot tell: its client waits without end for a server that stands still, and
prints the stack when it is gone. A row is a line of JSON each way, so traffic grows with the ranks, not their square.
"""

import json
import secrets
import socket
import threading
from typing import NamedTuple

GONE = "is gone: its process was killed or has crashed"
SUSPECT_SECONDS = 3.0  # of silence that are enough where a collective has failed already
LINE_BYTES = 1 << 16


class Row(NamedTuple):
    """What a rank says of itself."""

    beat: int = 0  # advanced by the thread that writes rows
    marks: int = 0  # places passed that every rank passes in the same order
    pulses: int = 0  # segments run, which show life; ranks may have different ones
    place: str = ""  # where the run is; empty where it may stand as long as it likes
    suspects: bool = False  # a collective has failed here, as it does when another rank dies
    end: str | None = None  # None: goes on; empty: has ended well; else what became of it


class Judge:
    """Tells from rows which rank the others should not wait for any longer.

    Args:
        ranks: how many write rows.
        timeout: seconds that a rank may be silent or stand still.
    """

    def __init__(self, ranks: int, timeout: float) -> None:
        self.timeout = timeout
        self._rows = [Row()] * ranks
        self._heard, self._moved = [0.0] * ranks, [0.0] * ranks

    def verdict(self, rows: list[Row], now: float) -> str | None:
        """Args: now: seconds since the first rows were due. Returns: a sentence on one rank; None if all is well."""
        for rank, (old, new) in enumerate(zip(self._rows, rows, strict=True)):
            if new != old:
                self._heard[rank] = now
            if new[1:] != old[1:]:
                self._moved[rank] = now
        self._rows = list(rows)
        return self._ended() or self._silent(now) or self._behind(now) or self._all_stand(now)

    def _ended(self) -> str | None:
        return next((f"rank {rank} {row.end}" for rank, row in enumerate(self._rows) if row.end), None)

    def _silent(self, now: float) -> str | None:
        suspected = any(row.suspects for row in self._rows)
        limit = min(self.timeout, SUSPECT_SECONDS) if suspected else self.timeout
        for rank in self._running():
            if (silence := now - self._heard[rank]) > limit:
                return unheard(rank, silence)
        return None

    def _behind(self, now: float) -> str | None:
        standing = [rank for rank in self._running() if self._stands(rank, now)]
        rank = min(standing, key=lambda rank: self._rows[rank].marks, default=None)
        if rank is None or self._rows[rank].marks == max(row.marks for row in self._rows):
            return None
        place, seconds = self._rows[rank].place, now - self._moved[rank]
        return f"rank {rank} hangs: it has stood in {place} for {seconds:.0f} s while others wait for it"

    def _all_stand(self, now: float) -> str | None:
        running = self._running()
        if not running or not all(self._stands(rank, now) for rank in running):
            return None
        first = min(running, key=lambda rank: self._moved[rank])
        seconds, place = now - max(self._moved[rank] for rank in running), self._rows[first].place
        return f"no rank has moved for {seconds:.0f} s; the first to stand still was rank {first}, in {place}"

    def _running(self) -> list[int]:
        return [rank for rank, row in enumerate(self._rows) if row.end is None]

    def _stands(self, rank: int, now: float) -> bool:
        heard = now - self._heard[rank] < max(SUSPECT_SECONDS, self.timeout / 2)
        return heard and self._rows[rank].place != "" and now - self._moved[rank] > self.timeout


def unheard(rank: int, seconds: float) -> str:
    """The sentence on a silent rank."""
    return f"rank {rank} has not been heard of for {seconds:.0f} s: its process stands still or its machine is gone"


class Hub:
    """Rank 0's end of the board. It listens on a free port; only who knows the token may write."""

    def __init__(self, ranks: int, timeout: float) -> None:
        self.rows, self.token = [Row()] * ranks, secrets.token_hex(16)
        self.line: str | None = None
        self._judge = Judge(ranks, timeout)
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self._server = socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=ranks)
        self.port: int = self._server.getsockname()[1]
        threading.Thread(target=self._accept, name="board", daemon=True).start()

    def tick(self, row: Row, now: float) -> str | None:
        """Write rank 0's row. Args: now: seconds since the board was opened. Returns: the verdict; the first stays."""
        self.rows[0] = row
        self.line = self.line or self._judge.verdict(self.rows, now)
        return self.line

    def closes(self) -> bool:
        """Whether nobody writes any more."""
        return all(row.end is not None for row in self.rows)

    def close(self) -> None:
        """Listen no longer."""
        self._server.close()

    def _accept(self) -> None:
        while True:
            try:
                other = self._server.accept()[0]
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=(other,), name="board", daemon=True).start()

    def _serve(self, other: socket.socket) -> None:
        rank = 0
        try:
            with other, other.makefile("rwb") as stream:
                while line := stream.readline(LINE_BYTES):
                    token, sender, *row = json.loads(line)
                    if token != self.token:
                        return
                    rank = sender
                    self.rows[rank] = Row(*row)
                    stream.write(json.dumps(self.line).encode() + b"\n")
                    stream.flush()
        except (OSError, ValueError, TypeError):
            pass  # as if it had ended
        finally:
            if rank and self.rows[rank].end is None:
                self.rows[rank] = self.rows[rank]._replace(end=GONE)


class Link:
    """Another rank's end of the board.

    Raises: OSError if rank 0 cannot be reached.
    """

    def __init__(self, rank: int, host: str, port: int, token: str, timeout: float, patience: float) -> None:
        self._rank, self._token, self._timeout = rank, token, timeout
        self._socket = socket.create_connection((host, port), timeout=timeout)
        self._socket.settimeout(patience)
        self._heard, self._asked, self._answer = 0.0, False, b""

    def tick(self, row: Row, now: float) -> str | None:
        """Write a row, read rank 0's verdict. Args: now: seconds since the board was opened."""
        try:
            if not self._asked:
                self._socket.sendall(json.dumps([self._token, self._rank, *row]).encode() + b"\n")
                self._asked = True
            while not self._answer.endswith(b"\n"):
                piece = self._socket.recv(LINE_BYTES)
                if not piece:
                    return f"rank 0 {GONE}"
                self._answer += piece
        except TimeoutError:
            silence = now - self._heard
            return unheard(0, silence) if silence > self._timeout else None
        except OSError:
            return f"rank 0 {GONE}"
        line, self._answer, self._asked, self._heard = json.loads(self._answer), b"", False, now
        return line

    def closes(self) -> bool:
        """One row that says how it ended is the last."""
        return True

    def close(self) -> None:
        """Hang up."""
        self._socket.close()
