"""Several processes under torchrun: the same run on several GPUs, by torch.distributed and nothing else.

    torchrun --nproc_per_node=8 train.py --prompts prompts/i2p.txt --out runs/sd14
    torchrun --nproc_per_node=2 -m shapes.train          # on a CPU, over gloo

W processes hold the same weights and optimizer state, which are never sent. Each samples and scores the
groups of its share of the P prompts. The pairs (picture, transition) of a step are those of one process; each
takes those of its own pictures, and gradients are summed: W changes no result but by the order of summation.
A process that ends with an error is noticed by torchrun, which ends the others. Alone, all is the identity.
"""

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from tqdm import tqdm

TIMEOUT = timedelta(minutes=30)  # the others wait while process 0 draws a grid or writes a checkpoint


def world() -> int:
    """W, the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is. Process 0 alone prints, draws and writes."""
    return dist.get_rank() if world() > 1 else 0


def join():
    """Meet the processes that torchrun started, each on a GPU of its own where there are GPUs."""
    launched = dist.is_available() and dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1
    if not launched or dist.is_initialized():
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    # gloo for what is said, even between GPUs: it waits for no queue, and sees at once that one has gone
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT)
    if rank():
        sys.stdout = open(os.devnull, "w")
        shown = tqdm.__init__
        tqdm.__init__ = lambda bar, *words, **more: shown(bar, *words, **more | {"disable": True})


def gather(value) -> list:
    """[value of process 0, of process 1, ...]; all wait here for the last one."""
    told = [value] * world()
    if world() > 1:
        dist.all_gather_object(told, value)
    return told


def share(P: int) -> range:
    """Which of P prompts are this process's."""
    return range(rank() * P // world(), (rank() + 1) * P // world())


def rows(*tensors) -> tuple:
    """Of tensors (B/W, ...), with a row for each picture of this process, the whole rollout's (B, ...)."""
    if world() == 1:
        return tensors
    parts = zip(*gather([tensor.cpu() for tensor in tensors]))
    return tuple(torch.cat(part).to(tensor.device) for tensor, part in zip(tensors, parts))


def own(pairs, pictures: int):
    """Of (picture, transition) pairs (n, 2) those of this process's `pictures`, by its own numbers."""
    pairs = pairs - torch.tensor([rank() * pictures, 0])
    return pairs[(pairs[:, 0] >= 0) & (pairs[:, 0] < pictures)]


def total(figures: dict, largest: tuple = ()) -> dict:
    """Each figure's sum over the processes; of those named in `largest` the largest value."""
    told = gather(figures)
    return {name: (max if name in largest else sum)(one[name] for one in told) for name in figures}


def sum_gradients(params: list, norm):
    """Sum the gradients over the processes, in place; returns the sum's norm. norm: of its own."""
    if world() == 1:
        return norm
    for p in params:  # a process without a pair in this share has no gradient, and takes part all the same
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        whole = p.grad.contiguous()  # in one order of memory, as the processes' own may differ
        dist.all_reduce(whole)
        p.grad.copy_(whole)
    return torch.nn.utils.get_total_norm([p.grad for p in params])
