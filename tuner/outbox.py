"""Records on their way to MLflow, kept on disk: what a process leaves behind the next delivers."""

import hashlib
import sqlite3
import threading
from pathlib import Path

from platformdirs import user_state_path

from tuner.errors import StorageError
from tuner.storage import local_path

__all__ = ["Outbox", "outbox_path"]

FILE = "outbox.db"


def outbox_path(root: str) -> Path:
    """Where the outbox of a job is: in its storage, or on this machine where that is remote.

    Args:
        root: URI below which the job's checkpoints lie.
    """
    local = local_path(root)
    if local is not None:
        return local / FILE
    return user_state_path("pwiser") / f"{hashlib.sha256(root.encode()).hexdigest()[:16]}-{FILE}"


class Outbox:
    """Texts in the order in which they were put; what was put outlives the process, also SIGKILL.

    A SQLite file, of one process at a time, in a journal mode that waits for no disk: a power cut
    may lose the last texts, and damages nothing.

    Args:
        path: of the file; it is made, with its directory, where it is missing.

    Raises:
        StorageError: if it cannot be opened, or is no such file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._database.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = NORMAL")
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS records (id INTEGER PRIMARY KEY, text TEXT NOT NULL)"
            )
        except (OSError, sqlite3.Error) as error:
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY:
                raise StorageError(
                    f"storage: {path} is in use; the job is running already on this machine"
                ) from error
            raise StorageError(
                f"storage: {path} cannot be used ({error}); name a directory of yours, or remove "
                "the file if it is damaged: records that MLflow has not got are lost with it"
            ) from error

    def put(self, text: str) -> int:
        """Keep a text; return the number under which `remove` knows it.

        Raises:
            StorageError: if it cannot be written.
        """
        number = self._execute("INSERT INTO records (text) VALUES (?)", text).lastrowid
        assert number is not None
        return number

    def remove(self, number: int) -> None:
        """Forget a text, which has been delivered.

        Raises:
            StorageError: if that cannot be written.
        """
        self._execute("DELETE FROM records WHERE id = ?", number)

    def waiting(self) -> list[tuple[int, str]]:
        """All texts that have not been removed, with their numbers, in their order."""
        return self._execute("SELECT id, text FROM records ORDER BY id").fetchall()

    def close(self) -> None:
        """Close the file; it stays."""
        with self._lock:
            self._database.close()

    def _execute(self, statement: str, *values: str | int) -> sqlite3.Cursor:
        with self._lock:
            try:
                return self._database.execute(statement, values)
            except sqlite3.Error as error:
                raise StorageError(f"storage: {self.path} cannot be written ({error})") from error
