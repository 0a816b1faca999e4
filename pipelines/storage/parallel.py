"""Several requests to a store at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def map_ahead(
    function: Callable[[_Item], _Result], items: Iterable[_Item], calls: int = 32
) -> Iterator[_Result]:
    """Yield `function(item)` for each of `items` in their order, up to `calls` at a time in threads.

    At most `calls` results are held; after an exception no other call begins.
    """
    with ThreadPoolExecutor(calls) as pool:
        running: deque[Future[_Result]] = deque()
        try:
            for item in items:
                running.append(pool.submit(function, item))
                if len(running) == calls:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()
