"""Eigenvalues of many small symmetric matrices."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from geomkd.geometry.precision import one_thread

_ON_HOST = 512  # rows up to which some cores are faster than an accelerator, which takes one by one
_IN_HAND = 2**22  # numbers that wait for their eigenvalues: 32 MB in float64
_WORTH_IT = 2**14  # numbers below which another thread takes longer to be told than to count


def eigenvalues(blocks: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield eigenvalues, (r, m) rising, of every block of (r, m, m) symmetric matrices.

    LAPACK takes one thread for a matrix (more would wait for each other), and torch's number of
    threads as many matrices at a time; small ones of a device are brought to the host for that.
    """
    threads, in_hand = torch.get_num_threads(), 0
    waiting: deque[tuple[int, torch.device, list[Future[Tensor]]]] = deque()  # not the blocks

    def oldest() -> Tensor:
        _, device, parts = waiting.popleft()
        return torch.cat([part.result() for part in parts]).to(device)

    with one_thread(), ThreadPoolExecutor(threads) as pool:
        start = pool.submit if threads > 1 else _at_once
        for block in blocks:
            held = block if block.shape[1] > _ON_HOST else block.cpu()
            each = max(-(-len(held) // threads), _WORTH_IT // held[0].numel(), 1)
            parts = [start(torch.linalg.eigvalsh, part) for part in held.split(each)]
            waiting.append((block.numel(), block.device, parts))
            in_hand += block.numel()
            while in_hand > _IN_HAND:
                in_hand -= waiting[0][0]
                yield oldest()
        while waiting:
            yield oldest()


def _at_once(function: Callable[[Tensor], Tensor], matrices: Tensor) -> Future[Tensor]:
    done: Future[Tensor] = Future()
    done.set_result(function(matrices))
    return done
