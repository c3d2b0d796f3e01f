"""Two processes, this one and another, train one prefix: DistributedDataParallel."""

import socket
from datetime import timedelta

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ptv2_fast.encoders.attachment import find_attachment
from tests.models import attached, make_batch, one_thread  # noqa: F401


def gradients(model, rank: int) -> list[Tensor]:
    """Of all trained parameters, for a batch of the rank's own."""
    torch.manual_seed(rank)
    batch = make_batch(lengths=(11, 6 - rank))
    loss = model(**batch, labels=torch.tensor([0, rank])).loss
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


def seeded_model():
    torch.manual_seed(0)
    return attached(backbone="frozen", strict=True).train()


def worker(rank: int, port: int, results) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2,
        timeout=timedelta(minutes=2),
    )  # fmt: skip
    model = DistributedDataParallel(seeded_model())
    assert find_attachment(model.module) is not None
    results.put((rank, [gradient.tolist() for gradient in gradients(model, rank)]))
    del model  # as the last owner of the group it would wait, with the GIL, for a thread that waits
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_gradients_are_the_mean_over_the_processes():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    other = context.Process(target=worker, args=(1, port, queue))
    other.start()
    worker(0, port, queue)
    other.join()
    assert other.exitcode == 0
    by_rank = dict(queue.get() for _ in range(2))
    alone = [gradients(seeded_model(), rank) for rank in range(2)]
    for first, second, own, other in zip(by_rank[0], by_rank[1], *alone, strict=True):
        assert first == second
        torch.testing.assert_close(torch.tensor(first), (own + other) / 2)
