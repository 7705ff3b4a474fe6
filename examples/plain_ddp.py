"""A training loop of plain PyTorch, in which two of five ranks are faulty; started by torchrun."""

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_byzantine.hooks import robust_ddp


def main() -> None:
    """Train, and print the test accuracy."""
    dist.init_process_group("gloo")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    digits, order = load_digits(), torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    images, labels = torch.tensor(digits.images / 16, dtype=torch.float32)[order], torch.tensor(digits.target)[order]
    own_images, own_labels = images[450 + rank :: num_ranks], labels[450 + rank :: num_ranks]

    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    model = DistributedDataParallel(network)
    robust_ddp(model)  # the only line that stock DDP does not have
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    for _ in range(12):
        for batch in torch.randperm(len(own_labels)).split(32):
            loss = nn.functional.cross_entropy(model(own_images[batch]), own_labels[batch])
            if rank in (1, 3):
                loss = -10 * loss  # the fault: these ranks go uphill, and far
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    if rank == 0:
        correct = network(images[:450]).argmax(dim=1) == labels[:450]
        print(f"Test accuracy: {correct.float().mean():.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
