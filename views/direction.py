"""How a direction sees anchors and prompts: what reward.py prints as a script.

A phrase stands at z·v, above 0 on the safe side. Unsafe prompts are carried to normalize(z_text + alpha·v),
as train.py does by default; one that is still below 0 there goes on asking for the unsafe picture.
"""

import math
from pathlib import Path

import torch

from plumbing.flags import Parser, default_device, real, usable
from plumbing.log import heading
from plumbing.models import load_clip
from plumbing.prompts import read_anchors, read_prompts
from reward import TEXT_BATCH, SteeringReward, steer

LISTED = 10   # phrases in a list; more are counted
SHOWN = 72    # letters of a phrase
PLANNED = 64  # unsafe prompts that a run's plan looks at, spread over the file


def carried(reward, prompts: list) -> str:
    """For a run's plan: how many of some unsafe prompts alpha carries past the middle."""
    unsafe = [p.text for p in prompts if p.unsafe]
    if not unsafe:
        return ""
    some = unsafe[::math.ceil(len(unsafe) / PLANNED)]
    safe = int((places(reward, some)[1] > 0).sum())
    return f"\n         of {len(some)} unsafe prompts alpha carries {safe} to the safe side of the direction"


def parse_args(argv=None):
    parser = Parser(prog="reward.py", description="How a direction sees anchors and prompts.")
    add, files = parser.add_argument, Path(__file__).parent.parent / "prompts"
    add("--prompts", nargs="+", default=[str(files / name) for name in ("i2p.txt", "benign.txt")],
        metavar="FILE", help="prompts under [category] lines; [benign] is not carried")
    add("--anchors", default=str(files / "anchors.txt"), metavar="FILE", help="phrases, [safe] and [unsafe]")
    add("--clip", default="laion/CLIP-ViT-H-14-laion2B-s32B-b79K", help="as train.py's")
    add("--alpha", type=real("[0, inf]"), default=0.5, help="how far unsafe prompts are carried")
    add("--direction", choices=("unit", "raw"), default="unit", help="v of length 1, or not")
    add("--device", default=default_device())
    return parser.parse_args(argv)


def main(argv=None):
    """Read, load and print; what cannot be read is refused before CLIP is loaded."""
    args = parse_args(argv)
    device = usable(args.device)
    (prompts, _), (anchors, _) = read_prompts(args.prompts), read_anchors(args.anchors)
    print(heading())
    reward = SteeringReward(load_clip(args.clip), anchors, args.alpha, args.direction == "unit",
                            device=device)
    prompts = reward.decide(prompts)
    print(f"{args.clip}, {args.direction} direction, alpha {args.alpha:g}\n\n"
          f"{'z·v, above 0 on the safe side':32}     n    mean     min     max    safe  carried to    safe")
    wrong = []
    for side, phrases in zip(("safe", "unsafe"), anchors):
        if phrases:
            z, _ = places(reward, phrases)
            print(line(f"anchors, {side}", z))
            wrong += [(value, f"{phrase} ({side})") for value, phrase in zip(z.tolist(), phrases)
                      if (value > 0) != (side == "safe")]
    kinds, stay = {}, []
    for p in prompts:
        side = "unsafe" if p.unsafe else "safe"
        kinds.setdefault(p.category or f"no category, {side}", []).append(p)
    for kind, members in kinds.items():
        z, after = places(reward, [p.text for p in members])
        print(line(kind, z, after if members[0].unsafe else None))
        stay += [(value, f"{p.text} ({kind})") for value, p in zip(after.tolist(), members)
                 if p.unsafe and value <= 0]
    print_list(f"{len(wrong)} of {sum(map(len, anchors))} anchors stand on the wrong side",
               sorted(wrong, key=lambda found: -abs(found[0])))
    print_list(f"{len(stay)} of {sum(p.unsafe for p in prompts)} unsafe prompts stay on the unsafe side at "
               f"alpha {args.alpha:g}", sorted(stay))


def places(reward, texts: list[str]):
    """Where n texts stand along the direction, and where alpha carries them: (2, n) on the CPU."""
    z = torch.cat([reward.embed_text(texts[i:i + TEXT_BATCH]) for i in range(0, len(texts), TEXT_BATCH)])
    return torch.stack([z, steer(z, reward.direction, reward.alpha)]).matmul(reward.direction).cpu()


def line(name: str, z, carried=None) -> str:
    """A row: n, mean, least and largest place, share on the safe side; where carried to, median and share."""
    share = lambda values: f"{(values > 0).float().mean():8.0%}"
    return (f"{name[:32]:32}{len(z):6}{z.mean():8.3f}{z.min():8.3f}{z.max():8.3f}{share(z)}"
            + ("" if carried is None else f"{carried.median():12.3f}{share(carried)}"))


def print_list(what: str, found: list):
    print(f"\n{what}" + ":" * bool(found))
    for value, phrase in found[:LISTED]:
        print(f"{value:8.3f}  {phrase[:SHOWN]}")
    if len(found) > LISTED:
        print(f"          and {len(found) - LISTED} more")
