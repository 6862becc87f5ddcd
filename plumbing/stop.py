"""How a run ends before its time: a signal, a number that is not finite, a full GPU or disk, bad input.

Each is an exception. The loop of train.py turns NotFinite and Asked into one checkpoint and the command that
continues; run_script turns what a user can mend into one line. Of several processes all raise NotFinite and
Asked at the same step, since both are decided by what all of them tell.
"""

import shlex
import signal
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from plumbing import parallel

# Ctrl-C, a kill, a lost terminal, the warning that SLURM gives; not every system has all
SIGNALS = [one for one in signal.Signals if one.name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")]
NAMED = 5        # transitions named in one message
AGAIN = "continue with --resume, or where there is no checkpoint yet start again with --overwrite"
RECEIVED = []    # signals: the one thing here that outlives a call, as signals belong to the process


class Asked(Exception):
    """A signal has asked the run to stop, between two states that a continued run would also meet."""


class NotFinite(Exception):
    """A number is not finite; the message says which one, and where."""


# -------------------------------------------------------------------------------- what all processes ask

@contextmanager
def signals_noted():
    """Inside, Ctrl-C and its like are noted, for if_asked; a second one stops at once. A hangup that the run
    was told to ignore, by nohup, stays ignored. A thread hears no signals: there nothing changes."""
    def note(number, frame):
        RECEIVED.append(number)
        for one in before:
            signal.signal(one, signal.SIG_DFL)
        print("\nstopping after this update, with a checkpoint; once more stops at once", file=sys.stderr)

    RECEIVED.clear()
    main = threading.current_thread() is threading.main_thread()
    heard = [one for one in SIGNALS if one.name != "SIGHUP" or signal.getsignal(one) != signal.SIG_IGN]
    # None: of another language that hosts Python
    before = {one: signal.signal(one, note) for one in heard if main and signal.getsignal(one) is not None}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def if_asked():
    """Raise Asked where any process has had a signal: between epochs, so that a continued run is the same."""
    asked = sum(parallel.gather(RECEIVED[:1]), [])
    if asked:
        RECEIVED[:] = asked[:1]
        raise Asked


@contextmanager
def together():
    """Inside, NotFinite waits for the end of the block, which all processes reach, and is raised in all."""
    trouble = None
    try:
        yield
    except NotFinite as error:
        trouble = error
    said = [str(one) for one in parallel.gather(trouble) if one]
    if said:
        raise NotFinite(said[0])


# -------------------------------------------------------------------------------- how it ends

def resume_command() -> str:
    """The command that continues this run, to be pasted into a shell."""
    if Path(sys.argv[0]).name != "train.py":  # another program has called main, a notebook perhaps
        return "the same call with --resume among its flags"
    words = [word for word in sys.orig_argv if word not in ("--resume", "--overwrite")]
    if parallel.world() > 1:  # torchrun starts each process as `python -u SCRIPT ...`
        torchrun = str(Path(words[0]).with_name("torchrun"))
        words = [torchrun, f"--nproc_per_node={parallel.world()}", *words[2:]]
    return shlex.join([*words, "--resume"])


def ending(reason: Exception, checkpoint: Path) -> BaseException:
    """What a run ends with after NotFinite or Asked: its checkpoint and the command that continues."""
    parallel.gather(None)  # torchrun ends all as soon as one has gone, and process 0 may still be writing
    if isinstance(reason, Asked):
        print(f"stopped, in {checkpoint}; to continue:\n{resume_command()}", flush=True)
        return SystemExit(128 + RECEIVED[0])
    return ValueError(f"{reason}\nThe last good state is {checkpoint}. The same flags meet the same number "
                      "again: lower --learning-rate or --max-grad-norm, or try --precision float32, in "
                      f"state.json too, then\n{resume_command()}")


def run_script(name: str, main):
    """Call a program's main. What its user can mend ends it with one line and exit code 1."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal without the letters of a prompt is no error
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except torch.OutOfMemoryError as error:
        sys.exit(f"{name}: the GPU's memory is full ({str(error).split('. ')[0]}). In training, lower "
                 "--sample-batch and --micro-batch, or train adapters with --lora-rank 16 (docs/speed.md has "
                 f"the peak of each), then {AGAIN}. Elsewhere, lower --batch")
    except (ValueError, OSError, NotFinite, SafetensorError) as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt:  # before the first epoch or after the last, where nothing is lost
        print(f"{name}: stopped", file=sys.stderr)
        sys.exit(130)


# -------------------------------------------------------------------------------- numbers

def check_finite(what: str, values, names: list):
    """Raise NotFinite for the first picture whose values, of (B, n, ...), are not finite. names: B words."""
    bad = (~values.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise NotFinite(f"the {what} is not finite: {names[bad[0]]}")


def check_pictures(latents, pictures, names: list, dtype):
    """Raise NotFinite for a picture that failed: it, or its latent, is not finite, or it is all of one value
    while its latent is not, as a decoder gives it that overflowed. It must not be judged: black is safe.

    latents (B, C, h, w), pictures (B, 3, H, W), names: B words for them; dtype: of the compute."""
    flat, drawn = latents.flatten(1), pictures.flatten(1)
    failed = ~(flat.isfinite().all(1) & drawn.isfinite().all(1))
    failed |= (drawn.amin(1) == drawn.amax(1)) & (flat.amin(1) != flat.amax(1))
    found = failed.nonzero().flatten().tolist()
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise NotFinite(f"the picture of {names[found[0]]}{more} failed in {str(dtype)[6:]}: it or its "
                        "latent is not finite, or it is all of one value; try float32 (--dtype, --precision)")


def check_update(policy, norm, watched: list, names: list):
    """Raise NotFinite, in all processes, before an optimizer step whose loss or gradient is not finite.

    norm: of this process's gradient; watched: of each micro-batch its pairs (n, 2) of picture and transition,
    log-ratios (n,), loss and statistics; empty where none of a share's pairs is this process's. names: words
    for its pictures. One number is read from the device; where it went wrong is looked for only then."""
    with together():
        if watched:
            losses = torch.stack([loss for _, _, loss, _ in watched])
            ratios = torch.cat([log_ratio for _, log_ratio, _, _ in watched]).exp()
            if not (norm.isfinite() & ratios.isfinite().all() & losses.isfinite().all()).item():
                raise NotFinite(first_trouble(policy, watched, names))


def first_trouble(policy, watched: list, names: list) -> str:
    """Which number of an optimizer step is not finite; of a loss also on which transitions."""
    for pairs, log_ratio, loss, _ in watched:
        bad = ~log_ratio.exp().isfinite()
        if bad.any() or not loss.isfinite():
            found = pairs[bad] if bad.any() else pairs
            at = [f"{names[image]}, transition {step}" for image, step in found.tolist()]
            return "the loss is not finite: " + "; or ".join(at[:NAMED]) + "; or more" * (len(at) > NAMED)
    grads = ((name, p.grad) for name, p in policy.named_parameters() if p.grad is not None)
    return f"the gradient of {next(name for name, grad in grads if not grad.isfinite().all())} is not finite"
