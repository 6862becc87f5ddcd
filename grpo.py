"""GRPO for diffusion: group advantages, clipped policy loss, exact KL to the base. Tensors in, tensors out.

Group relative policy optimisation (arXiv 2402.03300) needs no value network: the other pictures of a prompt
are the baseline. Loss and ratio are those of PPO (arXiv 1707.06347, Eq. 7); one action is one denoising step.

    r      reward of a picture              A      its advantage, shared by all of its transitions
    logp   log-density of a transition under the trained policy, per latent dimension (sample.log_prob)
    rho    = exp(logp − logp_old)           c      clip range
    mu     mean of a transition, s its deviation;  P prompts, G images per prompt, B transitions

Two departures from GRPO as written for language models: the KL is exact, not estimated from samples, and by
default the spread of all groups divides the advantages, not a group's own.
"""

import torch

ADVANTAGE_CLIP = 5.0   # DDPO's (the released code: 2.5): an outlier must not own the update
EPS = 1e-4             # ours (released code: 1e-8); a group's spread is 0.01 to 0.06 in the shapes world
ZERO_SPREAD = 1e-6     # rewards of a group closer than this are equal: float32 cosines are no finer


def group_advantages(rewards, divisor: str = "batch"):
    """A = (r − mean r) / (s + 1e-4), clipped to ±5: rewards (P, G) of P prompts' G images -> (P, G).

    The mean is the group's, over the images of one prompt. s is a standard deviation (the population's):
    of the group itself (divisor "group"; the released code's is the sample's), or, by default, the root mean
    square of all P groups' ("batch"). When all pictures of a prompt are already right, their rewards differ
    only by CLIP's taste. Dividing by that tiny spread turns noise into full-size advantages.
    A group without spread teaches nothing: its advantages are exactly 0, so that the caller can leave it out
    of the backward pass. Raises ValueError for groups of one."""
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be (prompts, images per prompt >= 2), not {tuple(rewards.shape)}")
    centred = rewards - rewards.mean(1, keepdim=True)
    std = rewards.std(1, correction=0, keepdim=True)
    s = std if divisor == "group" else std.square().mean().sqrt()
    advantages = (centred / (s + EPS)).clamp(-ADVANTAGE_CLIP, ADVANTAGE_CLIP)
    return torch.where(std > ZERO_SPREAD, advantages, torch.zeros_like(advantages))


def policy_loss(logp, logp_old, advantages, clip_range: float):
    """mean over B of max( −A·rho, −A·clip(rho, 1−c, 1+c) ). All (B,) -> scalar loss and a dict of statistics.

    The maximum of the two losses is the pessimistic one: a transition whose ratio has moved past the range in
    the direction that its advantage asks for gets no gradient, one that has moved the wrong way keeps it.

    Statistics are sums over B, without gradient, so that micro-batches can be added up: `positive` and
    `negative` count the signs of A, `clipped_positive` and `clipped_negative` those of them without gradient;
    `kl_old` sums (logp − logp_old)²/2, the second-order KL to the policy that sampled, per dimension as logp
    is; `ratio_dev` is the one maximum, of |rho − 1|."""
    assert logp.shape == logp_old.shape == advantages.shape and logp.ndim == 1, "a silent broadcast"
    rho = (logp - logp_old).exp()
    loss = torch.maximum(-advantages * rho, -advantages * rho.clamp(1 - clip_range, 1 + clip_range)).mean()
    with torch.no_grad():
        positive, negative = advantages > 0, advantages < 0
        stats = {
            "positive": positive.sum(), "clipped_positive": (positive & (rho > 1 + clip_range)).sum(),
            "negative": negative.sum(), "clipped_negative": (negative & (rho < 1 - clip_range)).sum(),
            "kl_old": (logp - logp_old).square().sum() / 2, "ratio_dev": (rho - 1).abs().max()}
    return loss, stats


def gaussian_kl(mu, mu_ref, sigma):
    """KL( N(mu, s²) || N(mu_ref, s²) ) = (mu − mu_ref)² / (2s²), a mean over D; exact, as s is shared.

    mu, mu_ref (B, C, h, w), sigma (B,) or scalar -> (B,). Its gradient is zero just where mu = mu_ref."""
    s = torch.as_tensor(sigma, dtype=mu.dtype, device=mu.device).reshape(-1, *[1] * (mu.ndim - 1))
    return ((mu - mu_ref).square() / (2 * s * s)).flatten(1).mean(1)
