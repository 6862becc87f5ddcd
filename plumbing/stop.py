"""How a run ends before its time: signals, numbers that are not finite, a full GPU, input that cannot work.

Failure is an exception. The loop of train.py turns NotFinite and Asked into one checkpoint, in one place, and
then into the exception that `ending` gives; run_script turns what is left into one line. Of several processes
(plumbing/parallel.py) what ends one ends all.
"""

import os
import shlex
import signal
import sys
import traceback
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from plumbing import output, parallel

# Ctrl-C, a kill, a lost terminal, the warning that SLURM and accelerate give; not every system has all
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
           if hasattr(signal, name)]
NAMED = 5        # transitions named in one message; more are counted
RECEIVED = []    # signals: the one thing here that outlives a call, as signals belong to the process


class Asked(Exception):
    """A signal has asked the run to stop, between two states that a continued run would also meet."""


class NotFinite(Exception):
    """A number is not finite; the message says which one, and where."""


class Failed(Exception):
    """One of several processes met something else; the message says which process, and what."""


ENDINGS = (NotFinite, Failed, Asked)
MENDED = (ValueError, OSError, torch.OutOfMemoryError)  # by the user


# -------------------------------------------------------------------------------- signals

@contextmanager
def signals_noted():
    """Inside, Ctrl-C and its like are noted, for if_asked; a second one stops at once. A hangup that the run
    was told to ignore, by nohup, stays ignored."""
    def note(number, frame):
        RECEIVED.append(number)
        for one in heard:
            signal.signal(one, signal.SIG_DFL)
        with suppress(OSError):  # print may be busy, and the terminal gone
            os.write(2, b"\nstopping after this update, with a checkpoint; once more stops at once\n")

    RECEIVED.clear()
    ignored = [one for one in SIGNALS if one.name == "SIGHUP" and signal.getsignal(one) == signal.SIG_IGN]
    heard = [one for one in SIGNALS if one not in ignored]
    before = {one: signal.signal(one, note) for one in heard}
    try:
        with as_one():
            yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def if_asked():
    """Raise Asked after one of SIGNALS. Called where the weights stand between two epochs, so that the
    continued run is the undisturbed one."""
    asked = RECEIVED[:1]
    parallel.gather(None, (Asked.__name__, asked[0]) if asked else None)
    if asked:
        raise Asked


@contextmanager
def as_one():
    """Inside, what ends one of several processes ends all at the same step, with the same exception."""
    try:
        yield
    except Exception as error:
        if parallel.world() == 1 or isinstance(error, parallel.Lost):
            raise
        if not isinstance(error, (*ENDINGS, *MENDED, parallel.Ended)):
            traceback.print_exc()
        kinds = {kind.__name__: kind for kind in ENDINGS}
        _, (name, what) = min(tell(error), key=lambda one: list(kinds).index(one[1][0]))
        if name == Asked.__name__:
            RECEIVED[:] = [what]  # a signal's number
            raise Asked from None
        raise kinds[name](what) from None


def tell(error) -> list:
    """Tell the other processes of an error here: [(rank, (kind, what happened))] of all that have one."""
    if isinstance(error, parallel.Ended):
        return error.troubles
    name = type(error).__name__ if isinstance(error, ENDINGS) else Failed.__name__
    what = said(error) if isinstance(error, ENDINGS) else f"process {parallel.rank()}: {said(error)}"
    try:
        parallel.gather(None, (name, what))
    except parallel.Ended as ended:
        return ended.troubles
    except parallel.Lost:
        pass
    return [(parallel.rank(), (name, what))]


def said(error) -> str:
    """An error in words."""
    if isinstance(error, torch.OutOfMemoryError):
        return (f"the GPU's memory is full ({str(error).split('. ')[0]}). In training, lower --sample-batch "
                "and --micro-batch, or train adapters with --lora-rank 16 (docs/speed.md has the "
                "peak of each), and continue with --resume: checkpoints are whole. Elsewhere, lower --batch")
    return str(error) if isinstance(error, (*ENDINGS, *MENDED)) else f"{type(error).__name__}: {error}"


def resume_command() -> str:
    """The command that continues this run, to be pasted into a shell."""
    words = [word for word in sys.orig_argv if word not in ("--resume", "--overwrite")]
    if parallel.world() > 1:  # torchrun starts each process as `python -u SCRIPT ...`
        torchrun = str(Path(words[0]).with_name("torchrun"))
        words = [torchrun, f"--nproc_per_node={parallel.world()}", *words[2:]]
    return shlex.join([*words, "--resume"])


def ending(reason: Exception, checkpoint) -> BaseException:
    """What the run ends with, after one of ENDINGS: the checkpoint and the command that continues."""
    if isinstance(reason, Asked):
        print(f"stopped, in {checkpoint}; to continue:\n{resume_command()}", flush=True)
        parallel.gather(None)  # torchrun ends all as soon as one has gone, and process 0 may still be writing
        return SystemExit(128 + RECEIVED[0])
    if isinstance(reason, Failed):
        return ValueError(f"{reason}\nThe last good state is {checkpoint}; to continue:\n{resume_command()}")
    return ValueError(f"{reason}\nThe last good state is {checkpoint}. "
                      "The same flags meet the same number again: lower --learning-rate or --max-grad-norm, "
                      "or try --precision float32 (a changed flag is to be changed in state.json too), then\n"
                      f"{resume_command()}")


def run_script(name: str, main):
    """Call a script's main. What its user can mend ends it with one line and exit code 1."""
    output.steady()
    try:
        main()
    except (*MENDED, parallel.Ended) as error:
        first, _ = tell(error)[0]
        sys.exit(f"{name}: {said(error)}" if parallel.rank() == first else 1)
    except parallel.Lost as error:
        sys.exit(f"{name}: {error}. Checkpoints are whole; to continue:\n{resume_command()}")
    except KeyboardInterrupt:  # before the first epoch or after the last, where nothing is lost
        print(f"{name}: stopped", file=sys.stderr)
        sys.exit(130)


# -------------------------------------------------------------------------------- numbers

def where(epoch: int, batch, pairs, group: int) -> str:
    """Epoch, prompt, image and transition in words. pairs: (picture's number among B = P·G, transition);
    transition None is the finished picture, -1 its initial noise."""
    names = {None: "the finished picture", -1: "initial noise"}
    at = [f"prompt {batch.prompts[i].text!r}, image {i % group}, {names.get(t, f'transition {t}')}"
          for i, t in pairs]
    return (f"epoch {epoch}, " + "; or ".join(at[:NAMED])
            + (f"; or {len(at) - NAMED} more" if len(at) > NAMED else ""))


def check_rollout(batch, images, rewards, group: int, epoch: int):
    """Raise NotFinite if a latent, log-probability, picture or reward is not finite. batch: a Rollout of B
    pictures; images (B, 3, H, W); rewards (B,)."""
    B = len(batch.prompts)
    # name, values as (B, steps, numbers), and the transition that the first of the steps belongs to
    for name, values, first in (("latent", batch.latents.flatten(2), -1),  # transition i draws latent i + 1
                                ("log-probability", batch.log_probs[..., None], 0),
                                ("picture", images.reshape(B, 1, -1), None),
                                ("reward", rewards.reshape(B, 1, 1), None)):
        bad = (~values.isfinite().all(2)).nonzero().tolist()
        if bad:
            image, step = bad[0]
            pair = image, None if first is None else first + step
            raise NotFinite(f"the {name} is not finite: {where(epoch, batch, [pair], group)}")


def check_update(policy, norm, watched, batch, group: int, epoch: int):
    """Raise NotFinite before an optimizer step whose loss or gradient is not finite.

    norm: of the whole gradient; watched: of each micro-batch its pairs (n, 2) of picture and transition,
    log-ratios (n,), loss; none where none of a share's pairs is this process's. One number is read from the
    device; where it went wrong is looked for only then."""
    if not watched:
        return
    losses = torch.stack([loss for _, _, loss in watched])
    ratios = torch.cat([log_ratio for _, log_ratio, _ in watched]).exp()
    if (norm.isfinite() & ratios.isfinite().all() & losses.isfinite().all()).item():
        return
    name = "loss"
    for pairs, log_ratio, loss in watched:
        if not (loss.isfinite() & log_ratio.exp().isfinite().all()).item():
            bad = ~log_ratio.exp().isfinite()
            pairs = pairs[bad] if bad.any() else pairs
            break
    else:
        name = "gradient of " + next(n for n, p in policy.named_parameters()
                                     if p.grad is not None and not p.grad.isfinite().all())
        pairs = torch.cat([pairs for pairs, _, _ in watched])
    raise NotFinite(f"the {name} is not finite: {where(epoch, batch, pairs.tolist(), group)}")
