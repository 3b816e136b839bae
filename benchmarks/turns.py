"""Engines in processes of their own that take turns, so that what else a machine does hits all alike."""

from __future__ import annotations

import multiprocessing
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from multiprocessing.connection import Connection


@dataclass
class Process:
    """A process that answers requests through a connection, and why it does not any more."""

    process: Any
    connection: Connection
    problem: str | None = None
    samples: list[dict[str, float]] = field(default_factory=list)
    """What was measured so far."""

    @classmethod
    def begin(cls, serve: Callable[..., None], *arguments: Any, **fields: Any) -> Any:
        """Start ``serve(connection, *arguments)``, whose first message is None, or what is wrong."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, *arguments))
        process.start()
        theirs.close()
        begun = cls(process=process, connection=ours, **fields)
        begun.problem = begun._receive()
        return begun

    def ask(self, *request: Any) -> Any:
        """The reply, None when there is none any more; then ``problem`` says why."""
        if self.problem is not None:
            return None
        self.connection.send(request)
        reply = self._receive()
        if isinstance(reply, str):
            self.problem = reply
            return None
        return reply

    def _receive(self) -> Any:
        try:
            return self.connection.recv()
        except EOFError:
            self.process.join()
            return f"its process ended with code {self.process.exitcode}"

    def stop(self) -> None:
        """Hang up, which ends the process, and wait for its end."""
        self.connection.close()
        self.process.join()


def serve(connection: Connection, make: Callable[..., Any], arguments: Sequence[Any]) -> None:
    """Make an engine and call its methods, whose names are the requests, until told to stop.

    An engine that cannot be made, or a call that fails, gives its error as a string. ``close`` comes last.
    """
    try:
        engine = make(*arguments)
    except Exception as error:  # whatever a library raises makes it a peer that is missing
        connection.send(_said(error))
        return
    connection.send(None)
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            name, *given = connection.recv()
            try:
                reply = getattr(engine, name)(*given)
            except Exception as error:  # reported, the others go on
                reply = _said(error)
            connection.send(reply)
    engine.close()


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
