"""One of two processes that train a small model sharded or replicated.

Each gets the mean of both directions; with deferred steps, the direction of both batches together.
"""

import contextlib
import copy
import datetime
import sys
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

import proxprop.additive
from proxprop import ProxPropConv1d, ProxPropLinear, convert, defer, proxprop_module_generator


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


class Shifted(nn.Module):
    """Adds a vector to each row, by the signs of its numbers."""

    def __init__(self, width):
        super().__init__()
        self.of = nn.Embedding(90, width)

    def forward(self, x):
        rows = x.flatten(1)
        return rows + self.of((rows.detach()[:, :3] > 0).sum(1))


def make_deferrable_model():
    """Layers whose rows are held in all, or after one batch no more, and layers with more rows than columns."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(2, 3, 3),  # 40 rows of 7 entries, as much from each process
        nn.Tanh(),
        Shifted(12),
        nn.Linear(12, 50),  # 10 rows of 13 entries
        nn.Tanh(),
        nn.Linear(50, 7),
        nn.Tanh(),
        nn.Sequential(nn.Linear(7, 5), nn.Tanh()),  # 10 rows of 8 entries, half of them held in each process
        nn.Linear(5, 2),
    ).double()
    cg = {"optimization_mode": "prox_cg2"}
    convert(model, tau_prox=0.7, optimization_mode="prox_exact", skip="8", overrides={"0": cg, "5": cg})
    model[0].gram_reduction = "mean"
    return model


def accumulate(which, model, batches):
    """The gradient of the mean loss over both processes' batches; communication as each wrapper wants it."""
    for index, part in enumerate(batches):
        last = index == len(batches) - 1
        if which == "fsdp2":
            model.set_requires_gradient_sync(last)
        loss = model(part).square().sum() / 10
        with contextlib.nullcontext() if last or which != "ddp" else model.no_sync():
            (2 * loss if which in ("ddp", "fsdp2") else loss).backward()  # the mean over two processes is taken


def check_deferred(rank, kinds):
    plain = make_deferrable_model()
    full = torch.cat([batch(0), batch(1)])
    (plain(full).square().sum() / 10).backward()
    reference = torch.cat([p.grad.flatten() for p in plain.parameters()])
    plain.zero_grad()
    for which in kinds:
        for parts in (1, 3):
            model = copy.deepcopy(plain)
            if which == "fsdp2":
                from torch.distributed.fsdp import fully_shard

                fully_shard(model[7])
                fully_shard(model)
            elif which == "ddp":
                model = DistributedDataParallel(model)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            defer(model, optimizer)
            for _ in range(2):
                optimizer.zero_grad()
                # Micro-batches of other sizes on the other process.
                sizes = [5] if parts == 1 else [[1, 2, 2], [3, 1, 1]][rank]
                accumulate(which, model, batch(rank).split(sizes))
                optimizer.step()
                check(f"deferred, {which}, {parts} micro-batches", gathered(which, model), reference)
    check_averaged(rank, plain)
    check_alone(rank, plain)
    layer = plain[3]
    deferred = defer(layer)
    layer.zero_grad()
    if rank == 0:
        layer(torch.ones(1, 12, dtype=torch.float64)).sum().backward()
    with pytest.raises(RuntimeError, match="the model itself: backward passes came to it on some processes and not on"):
        deferred.solve()


def check_averaged(rank, plain):
    """A running average of both batches' AᵀA, renewed in every other step, is that of one process with both."""
    alone, model = copy.deepcopy(plain), DistributedDataParallel(copy.deepcopy(plain))
    settings = {"curvature_decay": 0.5, "refresh_every": 2}
    steps = defer(alone, process_group=dist.new_group([rank], use_local_synchronization=True), **settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    defer(model, optimizer, **settings)
    for step in range(4):
        batches = [batch(2 * step), batch(2 * step + 1)]
        alone.zero_grad()
        (alone(torch.cat(batches)).square().sum() / 10).backward()
        steps.solve()
        optimizer.zero_grad()
        accumulate("ddp", model, [batches[rank]])
        optimizer.step()
        reference = torch.cat([p.grad.flatten() for p in alone.parameters()])
        check(f"average, step {step}", gathered("ddp", model), reference)


def check_alone(rank, plain):
    """In a group of its own a process takes the step of its own batch, which for one pass is the immediate one."""
    immediate, deferred = copy.deepcopy(plain), copy.deepcopy(plain)
    proxprop.additive._told.add("processes")  # these two models are each for one process
    optimizer = torch.optim.SGD(deferred.parameters(), lr=0.0)
    defer(deferred, optimizer, process_group=dist.new_group([rank], use_local_synchronization=True))
    for model in (immediate, deferred):
        model.zero_grad()
        model(batch(rank)).square().sum().backward()
    optimizer.step()
    reference = torch.cat([p.grad.flatten() for p in immediate.parameters()])
    check("a group of its own", [p.grad for p in deferred.parameters()], reference)


def main(rendezvous, rank):
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=300),
    )
    plain = make_model()
    both = [directions(copy.deepcopy(plain), batch(r)) for r in range(2)]
    reference = torch.cat([((a + b) / 2).flatten() for a, b in zip(*both, strict=True)])
    kinds = ["ddp", "fsdp", "fsdp, original parameters"]
    if torch.__version__ >= "2.7":  # before, fully_shard wants a GPU
        kinds.append("fsdp2")
    for which in kinds:
        model = wrapped(which, copy.deepcopy(plain))
        proxprop.additive._told.clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            directions(model, batch(rank))
        assert [w for w in caught if "each process takes the step of its own batch" in str(w.message)], which
        check(which, gathered(which, model), reference)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_deferred(rank, [kind for kind in kinds if not kind.startswith("fsdp,") and kind != "fsdp"])
    assert not [w for w in caught if "ProxProp" in str(w.message)]
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
