"""Forty-odd ways to break the method by one line; the fast tests have to notice every one of them.

Each mutant replaces a text that stands exactly once in grpo, reward, sample, train or plumbing/log.py. It is
applied to a copy of the code in a temporary folder, without the shapes world; the tests run there, in a
process forked after the libraries' import, until the first failure. Run by hand, some minutes on one core:

    python tests/mutants.py                        # prints a line for each
    python tests/mutants.py --out docs/mutants.md  # and writes the table
    python tests/mutants.py --only grpo.py         # those of one file
"""

import argparse
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a process with several threads is not to be forked
import peft  # noqa: E402, F401  (what the tests import, loaded once)
import pytest  # noqa: E402
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel  # noqa: E402, F401
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer  # noqa: E402, F401

ROOT = Path(__file__).parent.parent
TESTS = ("test_core.py", "tests/test_train.py", "tests/test_log.py")  # for log.py the last first
COPIED = ("grpo.py", "reward.py", "sample.py", "train.py", "plumbing", "prompts", "pytest.ini",
          "tests/tiny.py", *TESTS)

MUTANTS = [  # file, exact old text, new text, what it breaks
    ("grpo.py", "rewards - rewards.mean(1, keepdim=True)", "rewards", "advantages not centred"),
    ("grpo.py", "rewards.mean(1, keepdim=True)", "rewards.mean()", "one baseline for all prompts"),
    ("grpo.py", "std(1, correction=0, keepdim", "std(1, correction=1, keepdim", "divided by G - 1"),
    ("grpo.py", 'if divisor == "group"', 'if divisor == "batch"', "the other divisor"),
    ("grpo.py", "std.square().mean().sqrt()", "std.mean()", "mean of the deviations"),
    ("grpo.py", "std > ZERO_SPREAD", "std > 0", "almost equal rewards teach"),
    ("grpo.py", ".clamp(-ADVANTAGE_CLIP, ADV", ".clamp(-100, ADV", "advantages clipped above only"),
    ("grpo.py", "maximum(-advantages * rho,", "maximum(advantages * rho,", "sign of the loss"),
    ("grpo.py", "torch.maximum(", "torch.minimum(", "optimistic clipping"),
    ("grpo.py", "rho.clamp(1 - clip_range, 1", "rho.clamp(0, 1", "ratio clipped above only"),
    ("grpo.py", "1 + clip_range)).mean()", "1 + clip_range)).sum()", "sum for mean"),
    ("grpo.py", "positive & (rho > 1 + clip", "positive & (rho < 1 - clip", "the wrong ones counted"),
    ("grpo.py", "(logp - logp_old).square().sum() / 2", "(logp - logp_old).square().sum()", "kl_old doubled"),
    ("grpo.py", "/ (2 * s * s)).flatten", "/ (s * s)).flatten", "KL doubled"),

    ("reward.py", "v = -F.normalize(unsafe", "v = F.normalize(unsafe", "direction turned round"),
    ("reward.py", "if len(safe):", "if not len(safe):", "safe anchors left out"),
    ("reward.py", "F.normalize(v, dim=0) if unit else v", "F.normalize(v, dim=0)", "raw direction scaled"),
    ("reward.py", "+ alpha * direction", "+ direction", "alpha ignored"),
    ("reward.py", "(images.shape[-2] - crop) // 2,", "0,", "crop at the top"),
    ("reward.py", "return (images - mean) / std", "return images - mean", "pixels not scaled"),
    ("reward.py", "{p: p.category != BENIGN if", "{p: True if", "benign prompts steered"),
    ("reward.py", "@ self.direction < 0", "@ self.direction > 0", "the safe ones steered"),
    ("reward.py", '(self.steered == "all" or unsafe[p])', "unsafe[p]", "--steer all ignored"),
    ("reward.py", "(z_image * plain)", "(z_image * 1 * steered)", "alignment to the moved text"),

    ("sample.py", "alpha_prev = torch.cat([alpha_t[1:],", "alpha_prev = torch.cat([alpha_t[:-1],",
     "a_p one step off"),
    ("sample.py", "sigma = eta * (", "sigma = (", "sigma without eta"),
    ("sample.py", "a_t.sqrt() * x_t - (1", "a_t.sqrt() * x_t + (1", "sign in v-prediction"),
    ("sample.py", "(1 - a_p - s * s).clamp", "(1 - a_p).clamp", "variance counted twice"),
    ("sample.py", "- s.log() -", "-", "density without its deviation"),
    ("sample.py", "per_dimension.flatten(1).mean(1)", "per_dimension.flatten(1).sum(1)", "sum over D"),
    ("sample.py", "eps_u, eps_c = eps.chunk(2)", "eps_c, eps_u = eps.chunk(2)", "branches swapped"),
    ("sample.py", "noise[:, i + 1]", "noise[:, 1]", "the same noise at every step"),
    ("sample.py", "*shape, generator=g)", "*shape)", "no stream of its own"),

    ("train.py", 'epoch, i, j, "rollout"', 'i, j, "rollout"', "epochs share noise"),
    ("train.py", 'epoch, "prompts"', '"prompts"', "epochs share prompts"),
    ("train.py", 'epoch, "transitions"', '"transitions"', "epochs share transitions"),
    ("train.py", "(benign, P - n_unsafe)", "(benign, n_unsafe)", "too few benign prompts"),
    ("train.py", "advantages.cpu().nonzero()", "(advantages < 9).nonzero()", "zero advantages taught"),
    ("train.py", "(batch.latents[image, step + 1], mu, s)", "(batch.latents[image, step], mu, s)",
     "transition one off"),
    ("train.py", "again = parts.dtype != torch.float32", "again = False", "bf16 compares with the rollout"),
    ("train.py", "log_probs[image, step] = log_prob", "log_probs[image, 0] = log_prob",
     "old ones of one step"),
    ("train.py", "torch.no_grad(), without_adapter", "without_adapter", "the base not detached"),
    ("train.py", "loss = loss + (beta * kl).mean()", "loss = loss", "KL missing"),
    ("train.py", "(batch.unsafe[image], args.kl, args.kl_benign)",
     "(batch.unsafe[image], args.kl_benign, args.kl)",
     "KL weights swapped"),
    ("train.py", "batch.unsafe = torch.tensor([parts", "batch.unsafe = torch.tensor([not parts",
     "sides swapped"),
    ("train.py", "kl.detach().sum()", "kl.detach().mean()", "kl_ref not summed"),
    ("train.py", "trained, optimizer = args.steps - args.skip_last,", "trained, optimizer = args.steps,",
     "--skip-last ignored"),
    ("train.py", "(len(micro) / len(share))", "(args.micro_batch / len(share))", "weights not by count"),
    ("train.py", "{name: total + stats[name]", "{name: stats[name]", "the last micro-batch's statistics"),
    ("train.py", "if n == 0:", "if True:", "first ratio taken too late"),
    ("train.py", "\n        optimizer.zero_grad(set_to_none=True)", "", "gradients pile up"),
    ("train.py", "norms = norms + norm", "norms = norm", "the last step's norm"),
    ("train.py", "params, args.max_grad_norm, norm)", "params, 1e9, norm)", "gradient not clipped"),
    ("train.py", "epoch / args.decay_epochs", "args.decay_epochs / (epoch + 1)", "rate rises"),

    ("plumbing/log.py", "reward_unsafe=mean(rewards[unsafe]), reward_benign=mean(rewards[~unsafe])",
     "reward_unsafe=mean(rewards[~unsafe]), reward_benign=mean(rewards[unsafe])", "figures swapped"),
    ("plumbing/log.py", "groups.std(1, correction=0)", "groups.std(1)", "spread of a sample"),
    ("plumbing/log.py", "== 0).all(1)", "== 0).any(1)", "too many groups without spread"),
    ("plumbing/log.py", '"clipped_negative", "negative"', '"clipped_negative", "pairs"', "share of all"),
    ("plumbing/log.py", 'share("kl_old", "pairs")', 'share("kl_ref", "pairs")', "the other KL"),
    ("plumbing/log.py", '["ratio_dev_first"] > clip', '["ratio_dev_first"] < clip', "warns of no rounding"),
    ("plumbing/log.py", "rise > 0 and fall", "rise > 0 or fall", "warns of half a symptom"),
    ("plumbing/log.py", "late.mean() - early.mean()", "early.mean() - late.mean()", "trend turned round"),
    ("plumbing/log.py", "if name not in self.warned}", "}", "warned again and again"),
]


def tested(scratch: Path, test: str):
    """What the forked process does: one file's tests up to the first failure, what they print into a file."""
    os.chdir(scratch)
    out = os.open("printed", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(out, 1), os.dup2(out, 2)
    sys.dont_write_bytecode = True  # or the next mutant of a file might be taken for this one
    os._exit(pytest.main(["-x", "-q", "-n", "0", "-p", "no:cacheprovider", test]))


def killer(scratch: Path, file: str) -> str:
    """The first test that fails in the scratch copy, or "" where all pass."""
    for test in TESTS if file != "plumbing/log.py" else TESTS[::-1]:
        process = multiprocessing.get_context("fork").Process(target=tested, args=(scratch, test))
        process.start()
        process.join()
        printed = (scratch / "printed").read_text(encoding="utf-8")
        failed = re.search(r"^FAILED (\S+)", printed, re.MULTILINE)
        if process.exitcode == 1 and failed:
            return failed[1].replace("::", " ").split("[")[0]
        if process.exitcode:
            sys.exit(f"{test} did not run:\n{printed}")
    return ""


def page(rows) -> str:
    survived = sum(by == "survived" for *_, by in rows)
    table = "\n".join(f"| {file} | {broken} | {by} |" for file, broken, by in rows)
    return f"""# Mutants

A test that passes on broken code proves nothing. Each row below is one line of the method broken on purpose;
the last column is the first test that fails then. Of {len(rows)} mutants {survived} survived. The texts
that are replaced stand in tests/mutants.py, which stops when one of them is no longer found.

    python tests/mutants.py --out docs/mutants.md

| file | what is broken | killed by |
|---|---|---|
{table}
"""


def main():
    parser = argparse.ArgumentParser(description="Break the method line by line, and see that a test fails.")
    parser.add_argument("--out", type=Path, help="write the table there")
    parser.add_argument("--only", default="", metavar="FILE", help="the mutants of this file alone")
    args = parser.parse_args()
    texts = {file: (ROOT / file).read_text(encoding="utf-8") for file, *_ in MUTANTS}
    for file, old, _, broken in MUTANTS:
        if texts[file].count(old) != 1:
            sys.exit(f"{file}: {old!r} ({broken}) stands there {texts[file].count(old)} times, not once: "
                     "mend the list of mutants")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        (scratch / "tests").mkdir()
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, scratch / name)
        if by := killer(scratch, "grpo.py"):
            sys.exit(f"{by} fails before anything is broken")
        for file, old, new, broken in MUTANTS:
            if args.only in file:
                (scratch / file).write_text(texts[file].replace(old, new), encoding="utf-8")
                rows.append((file, broken, killer(scratch, file) or "survived"))
                (scratch / file).write_text(texts[file], encoding="utf-8")
                print(f"{len(rows):3d}  {file:16} {broken:36} {rows[-1][2]}", flush=True)
    if args.out:
        args.out.write_text(page(rows), encoding="utf-8")
    sys.exit(any(by == "survived" for *_, by in rows))


if __name__ == "__main__":
    main()
