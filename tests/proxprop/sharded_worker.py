"""One of two processes that train a small model sharded or replicated: each gets the mean of both directions."""

import copy
import datetime
import sys
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from proxprop import ProxPropConv1d, ProxPropLinear, proxprop_module_generator


def make_model():
    torch.manual_seed(0)
    settings = {"tau_prox": 0.7, "optimization_mode": "prox_cg2"}
    return nn.Sequential(
        ProxPropConv1d(2, 3, 3, **settings),
        nn.Tanh(),
        nn.Flatten(),
        proxprop_module_generator(nn.LayerNorm)(12, **settings),
        nn.Sequential(ProxPropLinear(12, 4, tau_prox=0.7, optimization_mode="prox_exact"), nn.Tanh()),
        nn.Linear(4, 2),
    ).double()


def batch(rank):
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(5, 2, 6, dtype=torch.float64, generator=generator)


def directions(model, x):
    model(x).square().sum().backward()
    return [p.grad for p in model.parameters()]


def check(name, actual, reference):
    actual = torch.cat([d.flatten() for d in actual])[: len(reference)]  # what is padded has no direction
    error = float((actual - reference).norm() / reference.norm())
    assert error < 1e-9, f"{name}: {error}"
    print(name, error, flush=True)


def wrapped(which, model):
    if which == "ddp":
        return DistributedDataParallel(model)
    if which == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        fully_shard(model[4])
        return fully_shard(model)
    return FullyShardedDataParallel(
        model, device_id=torch.device("cpu"), use_orig_params=which == "fsdp, original parameters"
    )


def gathered(which, model):
    """All directions, in the order of the parameters."""
    if which == "ddp":
        return [p.grad for p in model.parameters()]
    if which == "fsdp2":
        return [p.grad.full_tensor() for p in model.parameters()]
    parts = [p.grad if p.grad is not None else p.new_zeros(0) for p in model.parameters()]
    shard = torch.cat([part.flatten() for part in parts])
    sizes = [torch.zeros((), dtype=torch.long) for _ in range(2)]
    dist.all_gather(sizes, torch.tensor(shard.numel()))
    width = int(max(sizes))
    shards = [shard.new_zeros(width) for _ in range(2)]
    dist.all_gather(shards, nn.functional.pad(shard, (0, width - shard.numel())))
    return [part[: int(size)] for part, size in zip(shards, sizes, strict=True)]


def main(rendezvous, rank):
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=120),
    )
    plain = make_model()
    both = [directions(copy.deepcopy(plain), batch(r)) for r in range(2)]
    reference = torch.cat([((a + b) / 2).flatten() for a, b in zip(*both, strict=True)])
    kinds = ["ddp", "fsdp", "fsdp, original parameters"]
    if torch.__version__ >= "2.7":  # before, fully_shard wants a GPU
        kinds.append("fsdp2")
    for which in kinds:
        model = wrapped(which, copy.deepcopy(plain))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            directions(model, batch(rank))
        check(which, gathered(which, model), reference)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
