"""The floor under the clip range: how far rounding alone moves the ratio when rollout and update call the
network at different batch shapes, with the rows in another order, or one of them with a gradient.

Stable Diffusion v1.4's architecture with random weights, scaled so that it predicts noise of unit deviation,
as a trained one does. Pictures are taken through single denoising steps by calls on --rows rows at once, two
of each picture, as guidance has it; the same step then has two log-densities (sample.log_prob), and |rho - 1|
is what lies between them. Then the same at one shape, the rows in another order, and with a gradient against
without. The last column is the distance to a float32 network, as a size for bf16's rounding itself. Largest
value over the pictures.

    python -m bench.rounding                              # 32 pictures at once against 4, on a GPU
    python -m bench.rounding --pictures 1 --rows 2 1      # minutes on a CPU
"""

import argparse
from functools import partial

import torch

from bench.sd14 import sd14_pipeline
from plumbing import output, stop
from sample import ddim_mean, ddim_schedule, default_device, log_prob

GUIDANCE = (1.0, 5.0, 7.5)
STEPS = (0, 24, 44)  # of 50: the first, the middle, and near the end, where s is small


def branches(unet, x, t, text, null_text, rows: int):
    """The unguided and the text's prediction, two of (B, C, h, w), by calls on `rows` of 2·B rows."""
    inputs = zip(x.repeat(2, 1, 1, 1).split(rows), torch.cat([null_text.expand_as(text), text]).split(rows))
    return torch.cat([unet(part, t.expand(len(part)), encoder_hidden_states=states).sample.float().detach()
                      for part, states in inputs]).chunk(2)


@torch.no_grad()
def main(argv=None):
    parser = argparse.ArgumentParser(description="Measure what batch shapes do to the ratio under bf16.")
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--rows", type=int, nargs=2, default=(64, 8), help="of two ways to call the network")
    parser.add_argument("--latents", type=int, default=64)
    parser.add_argument("--device", default=default_device())
    args = parser.parse_args(argv)
    print(output.heading())
    device, B, shape = torch.device(args.device), args.pictures, (4, args.latents, args.latents)
    pipe = sd14_pipeline("cpu", sample_size=args.latents)
    unet, generator = pipe.unet.to(device).requires_grad_(), torch.Generator().manual_seed(0)
    unet.enable_gradient_checkpointing()
    draw = lambda *size: torch.randn(*size, generator=generator).to(device)
    text, null_text = draw(B, 77, 768), draw(1, 77, 768)
    schedule = ddim_schedule(pipe.scheduler, 50, 1.0).to(device)
    spread = unet(draw(1, *shape), schedule.timesteps[24], encoder_hidden_states=null_text).sample.std()
    unet.conv_out.weight /= spread
    unet.conv_out.bias /= spread
    print(f"| step | guidance | {args.rows[0]} rows against {args.rows[1]} | another order | "
          "a gradient against none | bf16 against float32 |\n" + "|---" * 6 + "|")
    for i in STEPS:
        x, z, t = draw(B, *shape), draw(B, *shape), schedule.timesteps[i]
        constants = schedule.alpha_t[i], schedule.alpha_prev[i], schedule.sigma[i]
        many, few = args.rows
        call = partial(branches, unet, t=t, null_text=null_text)
        with torch.autocast(device.type, torch.bfloat16):
            others = [call(x, text=text, rows=many)]
            one = call(x, text=text, rows=few)
            others.append([part.flip(0) for part in call(x.flip(0), text=text.flip(0), rows=few)])
            with torch.enable_grad():
                others.append(call(x, text=text, rows=few))
        others.append(call(x, text=text, rows=few))
        for w in GUIDANCE:
            mean = lambda u, c: ddim_mean(u + w * (c - u), x, *constants)
            drawn = mean(*one) + schedule.sigma[i] * z
            logp, *new = (log_prob(drawn, mean(*pair), schedule.sigma[i]) for pair in (one, *others))
            ratios = [f"{((other - logp).exp() - 1).abs().max().item():.1e}" for other in new]
            print(f"| {i} | {w:g} | {' | '.join(ratios)} |", flush=True)


if __name__ == "__main__":
    stop.run_script("bench.rounding", main)
