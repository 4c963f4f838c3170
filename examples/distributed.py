"""Train a small character model on several processes, with PyTorch's own tools around the layers.

Every process reads its own part of the batch: sequences of random letters of which one letter
comes again a few steps later, which a recurrent layer has to remember. DistributedDataParallel
keeps a copy of the parameters in each process and averages the gradients; with --fsdp each process
keeps a part of the parameters, gradients and optimizer state, and gathers a layer when it runs.

    torchrun --standalone --nproc-per-node 2 examples/distributed.py
    torchrun --standalone --nproc-per-node 2 examples/distributed.py --fsdp --cell gru

Without torchrun it is one process.
"""

from __future__ import annotations

import argparse
import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastseq

LAYERS = {"gru": fastseq.GRU, "lstm": fastseq.LSTM, "rnn": fastseq.RNN}
LETTERS = 8
DELAY = 3  # steps after which a letter comes again


class Model(nn.Module):
    def __init__(self, cell: str, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(LETTERS, hidden)
        self.layer = LAYERS[cell](hidden, hidden, num_layers=2)
        self.readout = nn.Linear(hidden, LETTERS)

    def forward(self, letters: Tensor) -> Tensor:
        """Logits (rows, LETTERS) of the steps at which the letter has been seen."""
        output, _ = self.layer(self.embedding(letters))
        return self.readout(output[DELAY:].flatten(0, 1))


def batch(steps: int, rows: int, source: torch.Generator, device: torch.device) -> Tensor:
    return torch.randint(LETTERS, (steps, rows), generator=source).to(device)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cell", choices=sorted(LAYERS), default="lstm")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--steps", type=int, default=60, help="training steps")
    parser.add_argument("--batch", type=int, default=64, help="sequences a step, of all processes")
    parser.add_argument("--length", type=int, default=24, help="of a sequence")
    parser.add_argument("--fsdp", action="store_true", help="share out the parameters, too")
    args = parser.parse_args()

    processes = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch % processes:
        parser.error(f"--batch {args.batch} must be a multiple of the {processes} processes")
    if "RANK" not in os.environ:  # one process, no torchrun
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=2)
    )
    try:
        train(args, device)
    finally:
        dist.destroy_process_group()


def train(args: argparse.Namespace, device: torch.device) -> None:
    rank, processes = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # every process starts from the same parameters
    model: nn.Module = Model(args.cell, args.hidden).to(device)
    if args.fsdp:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (processes,))
        fully_shard(model.layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    source = torch.Generator().manual_seed(1 + rank)  # and sees letters of its own
    began = time.perf_counter()
    for step in range(1, args.steps + 1):
        letters = batch(args.length, args.batch // processes, source, device)
        loss = nn.functional.cross_entropy(model(letters), letters[:-DELAY].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == args.steps:
            mean = loss.detach()
            dist.all_reduce(mean)
            if rank == 0:
                print(f"step {step}: loss {mean.item() / processes:.3f}", flush=True)
    if rank == 0:
        seconds = time.perf_counter() - began
        held = sum((p.to_local() if args.fsdp else p).numel() for p in model.parameters())
        total = sum(p.numel() for p in model.parameters())
        print(
            f"{processes} processes, {seconds:.1f} s; process 0 holds {held} of {total} parameters"
        )


if __name__ == "__main__":
    main()
