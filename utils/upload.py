"""What rank 0 writes to a bucket while the other ranks wait for it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait

from utils import dist, mirror
from utils.paths import RunDir

DONE = "done"


def push(run_dir: RunDir) -> None:
    """`mirror.push` by rank 0; every rank returns when it is done, and raises what it raises.

    It may take longer than ranks wait for each other: meanwhile rank 0 says again and again that it is at work. When
    another rank is lost, the upload is ended first.
    """
    if dist.size() == 1:
        mirror.push(run_dir)
        return
    with ThreadPoolExecutor(1, "upload") as pool:
        upload = pool.submit(mirror.push, run_dir) if dist.rank() == 0 else None

        def look() -> str:
            assert upload
            if wait([upload], dist.patience() / 2).not_done:
                return ""
            upload.result()
            return DONE

        while dist.from_rank_0(look) != DONE:
            pass
