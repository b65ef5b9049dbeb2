"""A training step of MoCo-v2 against the step as facebookresearch/moco publishes it, on data in memory.

    python -m bench.moco_step [--batch 16] [--side 112] [--rounds 5]

On the CPU: ResNet-18, CPU seconds, each choice alone and all together; of ResNet-50 what a step asks of the device.
On a GPU: ResNet-50 at 224 pixels, bf16, `--gpu_batch` images, wall time and peak memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from bench import measure
from bench.measure import Row
from bench.operators import Operators
from bench.peers.published_moco import PublishedMoCo, momentum_loop, train_step
from ssl_train.data import Batch, to_device
from ssl_train.model import MoCo
from ssl_train.train import contrastive_loss
from utils import env, optim
from utils.device import autocast, pick, place, resolve_precision

RECIPE: dict[str, Any] = {"dim": 128, "queue": 65536, "momentum": 0.999, "temperature": 0.2}
SGD: dict[str, Any] = {"lr": 0.015, "momentum": 0.9, "weight_decay": 1e-4}
CALLS = 700  # operators that a step of ResNet-50 may ask for
IMAGES_PER_S = 3000  # ResNet-50, 224 px, bf16, on an H200
CPU = torch.device("cpu")
Step = Callable[[], object]


def batch(size: int, side: int, device: torch.device) -> Batch:
    views = torch.randint(256, (2, size, side, side, 3), dtype=torch.uint8, device=device)
    return Batch(views[0], views[1], torch.arange(size, device=device), side)


def ours(
    arch: str,
    data: Batch,
    device: torch.device,
    *,
    precision: str = "float32",
    channels_last: bool = True,
    fused: bool = True,
) -> Step:
    """A step as ssl_train takes it, or without one of its choices."""
    model = MoCo(arch=arch, **RECIPE).to(device)
    if channels_last:
        place(model, device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = optim.sgd(model, **SGD) if fused else torch.optim.SGD(trained, **SGD)
    loss_fn = contrastive_loss(model, device)

    def step() -> None:
        with autocast(device, precision):
            losses, _ = loss_fn(data)
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        optimizer.step()

    return step


def published(
    arch: str,
    data: Batch,
    device: torch.device,
    *,
    channels_last: bool = False,
    fused: bool | None = None,
) -> Step:
    """The published step, or with one of our choices."""
    model = PublishedMoCo(arch=arch, **RECIPE).to(device)
    if channels_last:
        place(model, device)
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), **SGD, fused=fused)
    form = torch.channels_last if channels_last else torch.contiguous_format
    query, key = (views.contiguous(memory_format=form) for views in to_device(data, device))
    return lambda: train_step(model, optimizer, query, key)


def choices(size: int, side: int, rounds: int) -> list[Row]:
    """Each choice alone, added to the published step; then all of them."""
    data = batch(size, side, CPU)
    peer = published("resnet18", data, CPU)
    variants = {
        "alone: channels_last": published("resnet18", data, CPU, channels_last=True),
        "alone: fused SGD": published("resnet18", data, CPU, fused=True),
        "alone: momentum, queue, loss": ours("resnet18", data, CPU, channels_last=False, fused=False),
        "all together": ours("resnet18", data, CPU),
    }
    named = {f"step, ResNet-18, {size} x {side} px, float32, {name}": step for name, step in variants.items()}
    how: dict[str, Any] = {"items": size, "unit": "images", "rounds": rounds}
    rows = [measure.rates(claim, step, peer, **how) for claim, step in named.items()]
    if resolve_precision("auto", CPU) == "bf16":
        fast = ours("resnet18", data, CPU, precision="bf16")
        plain = ours("resnet18", data, CPU, channels_last=False)
        rows.append(
            measure.rates("step, ResNet-18, bf16 + channels_last against neither", fast, plain, goal=1.7, **how)
        )
    return rows


def parts(rounds: int) -> list[Row]:
    """The momentum update and the queue's of ResNet-50, alone."""
    model, peer = place(MoCo(arch="resnet50", **RECIPE), CPU), PublishedMoCo(arch="resnet50", **RECIPE)
    lists = list(peer.encoder_k.parameters()), list(peer.encoder_q.parameters())
    keys = torch.randn(256, RECIPE["dim"])

    def times(count: int, work: Callable[[], object]) -> Step:
        return lambda: [work() for _ in range(count)]

    rows = []
    for claim, count, mine, theirs, goal in (
        ("momentum update", 10, model._update_key_encoder, lambda: momentum_loop(*lists, RECIPE["momentum"]), 4.0),
        ("256 keys into the queue", 1000, lambda: model._enqueue(keys), lambda: peer.enqueue(keys), None),
    ):
        a, b, ratio = measure.race(times(count, mine), times(count, theirs), rounds=2 * rounds)
        rows.append(Row(f"{claim}, ResNet-50", f"{1e3 * a / count:.2f} ms", f"{1e3 * b / count:.2f} ms", ratio, goal))
    return rows


def operators() -> list[Row]:
    """What a step of ResNet-50 asks of the device: the same for any size of image and batch."""
    data, counted = batch(8, 32, CPU), []
    for step in (ours("resnet50", data, CPU), published("resnet50", data, CPU)):
        step()
        with Operators() as asked:
            step()
        counted.append(asked)
    a, b = counted
    waits = [one.waits.total() for one in counted]
    ratio = waits[1] / waits[0] if waits[0] else math.inf
    calls = f"operator calls of a step, ResNet-50 (at most {CALLS})"
    return [
        Row(calls, str(a.calls), str(b.calls), b.calls / a.calls, b.calls / CALLS),
        Row("host waits of a step, ResNet-50 (none)", str(waits[0]), str(waits[1]), ratio, math.inf),
    ]


def gpu(device: torch.device, size: int, rounds: int) -> list[Row]:
    """ResNet-50 at 224 px: ours in bf16 against the published step, which is float32."""

    def run(steps: int, step: Step) -> Step:
        def timed() -> None:
            for _ in range(steps):
                step()
            torch.cuda.synchronize(device)

        return timed

    def peak(step: Step) -> float:
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) / 2**30

    data, name = batch(size, 224, device), torch.cuda.get_device_name(device)
    mine = run(5, ours("resnet50", data, device, precision="bf16"))
    a = peak(mine)
    torch.backends.cudnn.benchmark = True  # as published, and then for both
    peer = run(5, published("resnet50", data, device))
    b = peak(peer)
    how: dict[str, Any] = {"items": 5 * size, "unit": "images", "rounds": rounds, "clock": measure.wall}
    rows = [measure.rates(f"step, ResNet-50, {size} x 224 px, bf16 + channels_last, {name}", mine, peer, goal=2, **how)]
    rate = 5 * size / measure.race(mine, mine, rounds=rounds, clock=measure.wall)[0]
    goal = 1.0 if "H200" in name else None
    rows.append(Row("images a second", f"{rate:,.0f}", f"{IMAGES_PER_S:,} (goal)", rate / IMAGES_PER_S, goal))
    rows.append(Row("peak memory, with the other's model and state", f"{a:.1f} GiB", f"{b:.1f} GiB", b / a))
    return rows


def main() -> None:
    words = measure.arguments(__doc__, batch=16, side=112, rounds=5, gpu_batch=512)
    torch.set_num_threads(1)
    rows = choices(words.batch, words.side, words.rounds) + parts(words.rounds) + operators()
    if torch.cuda.is_available():
        rows += gpu(pick("cuda", env.world()), words.gpu_batch, words.rounds)
    else:
        print("ResNet-50 at 224 px on a GPU: not measured, there is none.")
    if resolve_precision("auto", CPU) != "bf16":
        print("bf16 on the CPU (goal 1.7): not judged, this one does not compute in it.")
    measure.report("moco_step: ours against the step that facebookresearch/moco publishes", rows)


if __name__ == "__main__":
    main()
