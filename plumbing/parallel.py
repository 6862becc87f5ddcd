"""Several processes under torchrun: the same run on several GPUs, by torch.distributed and nothing else.

    torchrun --nproc_per_node=8 train.py --prompts prompts/i2p.txt --out runs/sd14
    torchrun --nproc_per_node=2 -m shapes.train          # on a CPU, over gloo

W processes hold the same weights and optimizer state, which are never sent. Each samples and scores the
groups of its share of the P prompts. The optimizer's shares of (picture, transition) pairs are those of one
process, drawn by all from one seed; each takes the pairs of its own pictures, and the gradients are summed
before the step. So W changes the result as little as the micro-batch does: up to the order of summation.

All that they tell each other passes through `gather`, and so does trouble: a process that cannot go on says
so at its next gather, and all leave it with Ended, at the same step. Alone, every function is the identity.
"""

import itertools
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from tqdm import tqdm

BUCKET = 2**24                    # numbers of the gradient summed in one call: 64 MiB
TIMEOUT = timedelta(minutes=30)   # the others wait while process 0 draws a grid or writes a checkpoint
CHECK_EVERY = 10                  # rollouts between two comparisons of the weights


class Ended(Exception):
    """At least one process cannot go on. troubles: [(its rank, its trouble)]."""
    troubles = property(lambda self: self.args[0])


class Lost(Exception):
    """A process has gone without a word."""


# -------------------------------------------------------------------------------- the processes

def world() -> int:
    """W, the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is. Process 0 alone prints, draws and writes."""
    return dist.get_rank() if world() > 1 else 0


def join():
    """Meet the processes that torchrun started, each on a GPU of its own where there are GPUs."""
    if not dist.is_available() or not dist.is_torchelastic_launched() or int(os.environ["WORLD_SIZE"]) == 1:
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


# -------------------------------------------------------------------------------- what they tell each other

def call(collective, *args):
    try:
        collective(*args)
    except RuntimeError as error:
        why = str(error).splitlines()[0].split("] ", 1)[-1].split(". ")[0]  # without the library's own lines
        raise Lost(f"process {rank()} of {world()} has lost another one, which was killed or is out of reach "
                   f"({why})") from None


def gather(value, trouble=None) -> list:
    """[value of process 0, of process 1, ...]. If any has trouble, all raise Ended, with all the troubles."""
    if world() == 1:
        return [value]
    told = [None] * world()
    call(dist.all_gather_object, told, (value, trouble))
    troubles = [(i, trouble) for i, (_, trouble) in enumerate(told) if trouble]
    if troubles:
        raise Ended(troubles)
    return [value for value, _ in told]


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
    """Of (picture, transition) pairs (n, 2) of the whole rollout those of this process's pictures, by its own
    numbers. pictures: how many it has."""
    if world() == 1:
        return pairs
    pairs = pairs - torch.tensor([rank() * pictures, 0])
    return pairs[(pairs[:, 0] >= 0) & (pairs[:, 0] < pictures)]


def total(figures: dict, largest: tuple = ()) -> dict:
    """Each figure's sum over the processes, or its largest value."""
    told = gather(figures)
    return {name: (max if name in largest else sum)(one[name] for one in told) for name in figures}


def sum_gradients(params: list, norm):
    """Sum the gradients over the processes, in place, in flat buckets; returns the sum's norm. norm: that of
    this process's gradient, which is the answer where it is alone."""
    if world() == 1:
        return norm
    # a process without a pair in this share has no gradient, and takes part all the same
    known = gather([p.grad is not None for p in params])
    summed, buckets = [p for p, *any_of in zip(params, *known) if any(any_of)], {}
    for p, end in zip(summed, itertools.accumulate(p.numel() for p in summed)):
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        buckets.setdefault(end // BUCKET, []).append(p.grad)
    for bucket in buckets.values():
        flat = torch.cat([grad.flatten() for grad in bucket])
        call(dist.all_reduce, flat)
        for grad, part in zip(bucket, flat.split([grad.numel() for grad in bucket])):
            grad.copy_(part.view(grad.shape))
    return torch.nn.utils.get_total_norm([p.grad for p in summed])


def check_equal(params: list, epoch: int):
    """Stop where the processes' float32 weights have come apart: compared by the sums of their bits."""
    if world() == 1 or epoch % CHECK_EVERY:
        return
    told = gather(torch.stack([p.detach().view(torch.int32).sum(dtype=torch.int64) for p in params]).tolist())
    apart = [i for i, one in enumerate(told) if one != told[0]]
    if apart:
        sys.exit(1 if rank() else f"after epoch {epoch} the weights of processes {apart} are not those of "
                 "process 0: the GPUs or their links err, and the newest checkpoints may be wrong")
