"""SIGTERM and SIGINT as something to wait for."""

from __future__ import annotations

import asyncio
import signal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Counts the signals that ask for an end; the handlers are there while the context is."""

    def __init__(self) -> None:
        self.n = 0
        self._came = asyncio.Event()

    def __enter__(self) -> StopSignals:
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            loop.remove_signal_handler(number)

    def _note(self) -> None:
        self.n += 1
        self._came.set()

    async def wait_for(self, n: int) -> None:
        """Until `n` signals came."""
        while self.n < n:
            self._came.clear()
            await self._came.wait()
