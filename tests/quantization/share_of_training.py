"""What one process of `test_base.test_two_processes_learn_what_one_does` does; run by torchrun."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (1, 2)]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from nets import net  # noqa: E402

from peftlite import inject_adapters, param_groups, quantize_base  # noqa: E402

TARGETS = ["query", "value", "up", "down"]


def learn(method: str, rank: int, world: int) -> dict[str, torch.Tensor]:
    """The state of an NF4 net after five steps on every `world`-th of twelve rows."""
    model = quantize_base(net().encoder.double(), TARGETS)
    inject_adapters(model, TARGETS, 2, method=method, seed=0)
    parallel = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
    opt = torch.optim.SGD(param_groups(model, 0.1))
    x = torch.linspace(-1, 1, 96, dtype=torch.float64).view(12, 8).cos()
    for _ in range(5):
        opt.zero_grad()
        parallel(x[rank::world]).square().mean().backward()
        opt.step()
    return model.state_dict()


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for method in ("lora", "dora"):
        torch.save(learn(method, dist.get_rank(), dist.get_world_size()), f"{sys.argv[1]}/{method}-{dist.get_rank()}.pt")
    dist.destroy_process_group()
