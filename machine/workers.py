"""Worker processes that end with the program which started them."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator

from base import UserError


def cores() -> int:
    """The processor cores that this process may use; all cores where the system doesn't say (macOS)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def in_workers(work: Callable, items: list, workers: int) -> Iterator[tuple]:
    """Yield (item, work(item)) in the order in which they finish.

    An exception or an exit here ends the workers at once. With one worker or one item this process
    does the work.
    """
    workers = min(workers, len(items))
    if workers <= 1:
        yield from ((item, work(item)) for item in items)
        return
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _begin_worker)
    try:
        futures = {pool.submit(work, item): item for item in items}
        for future in concurrent.futures.as_completed(futures):
            yield futures.pop(future), future.result()
    except concurrent.futures.process.BrokenProcessPool as error:
        raise UserError("a worker process died, perhaps for lack of memory: the same command goes "
                        "on; use fewer --workers") from error
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    """Leave Ctrl-C to the main process, and end when that one is gone, even by kill -9."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
