"""What holds for torch-tpu's device, which torch lets a Python program declare: it computes nothing here."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.ranks import run
from utils.paths import RunDir

DECLARED = """
import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend as declare
from utils import checkpoint, device, dist, optim, paths, run_lock
from utils.env import World
class Module:
    is_available = staticmethod(lambda: True)
    is_initialized = staticmethod(lambda: True)
    _is_in_bad_fork = staticmethod(lambda: False)
    manual_seed_all = staticmethod(lambda seed: print(f"seeded {seed}"))
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16])
    get_device_name = staticmethod(lambda device: "TPU v4")
declare("tpu", Module())
content, moved = {}, []

@torch.library.impl("aten::_copy_from", "privateuseone")
def copy_from(source, target, non_blocking=False):
    target.copy_(content[id(source)])
    return target

def on_tpu(values):
    made = torch._C._acc.create_empty_tensor(tuple(values.shape), values.dtype)
    content[id(made)] = values
    return made

chip = torch.device("tpu", 0)
"""


def printed(program: str, *words: object) -> list[str]:
    done = run([sys.executable, "-c", DECLARED + program, *words])
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_it_computes_in_bf16_and_has_its_name() -> None:
    program = """
print(device.resolve_precision("auto", chip), device.resolve_precision("float32", chip))
print(device.kind_of(chip), device.describe(chip), sep=" | ")
with device.autocast(chip, "bf16"):
    print(torch.get_autocast_dtype("tpu"), torch.is_autocast_enabled("tpu"))
device.seed(7, chip)
"""
    expected = ["bf16 float32", "torch-tpu TPU v4 | torch-tpu TPU v4", "torch.bfloat16 True", "seeded 7"]
    assert printed(program) == expected


def test_its_step_is_not_fused_and_its_weights_keep_their_layout() -> None:
    program = """
class Layer(torch.nn.Conv2d):
    def to(self, *given, **how):
        moved.append((given, how))
        self.weight = torch.nn.Parameter(on_tpu(self.weight.detach()))
        return self
layer = device.place(Layer(2, 2, 1, bias=False), chip)
print(optim.sgd(layer, lr=1.0, momentum=0.9, weight_decay=0.0).defaults["fused"])
print(moved == [((chip,), {})])
"""
    assert printed(program) == ["False", "True"]


def test_what_is_saved_and_what_ranks_average_is_on_the_cpu(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
values = on_tpu(torch.arange(3.0))
print(values.device, device.on_host({"a": [values, "b"]}))
print(dist.mean(values))
run_dir = paths.RunDir(Path(sys.argv[1]))
saved = {"epochs_done": 1, "step": 1, "batch": 0, "is_best": False, "weights": values}
with run_lock.owned(run_dir):
    print(checkpoint.save(run_dir, saved).name)
"""
    file = RunDir(tmp_path).checkpoints / "checkpoint_0000.pth"
    copied = "tensor([0., 1., 2.])"
    assert printed(program, tmp_path) == [f"tpu:0 {{'a': [{copied}, 'b']}}", copied, file.name]
    plain = run([sys.executable, "-c", f"import torch; print(torch.load({str(file)!r}, weights_only=True)['weights'])"])
    assert plain.stdout == f"{copied}\n", plain.stderr
