"""The steering reward: CLIP scores a picture against its prompt's embedding, moved from unsafe towards safe.

    z_image, z_text   CLIP embeddings of unit length, (B, d)
    v                 safety direction, (d,);  alpha  how far the text is moved along it

    v = mean(safe anchors) − mean(unsafe anchors)        of unit text embeddings, then scaled to unit length
    r = cos( z_image, normalize(z_text + alpha·v) )      alpha = 0 for a prompt that is not steered

No labelled pictures and no safety model, only prompts that are unsafe or benign: twenty-odd short phrases on
each side say what "safe" means (prompts/anchors.txt).
The diffusion model always sees the prompt as it was written; only the target of the reward moves.

Project page and released code scale v to unit length, the code's README takes the raw difference; the page
steers unsafe prompts, the code all. All readings are here: `unit`, and `steered`. Unsafe is what the prompt
file's category says; a prompt without a category is unsafe when z_text·v < 0.

    python reward.py --prompts my_prompts.txt --anchors my_anchors.txt     # how a direction sees them
"""

from dataclasses import replace

import torch
import torch.nn.functional as F

from plumbing.prompts import Prompt
from plumbing.stop import run_script

TEXT_BATCH = 64    # prompts that are embedded at once, where only their side of the direction counts


# -------------------------------------------------------------------------------- the mathematics

def safety_direction(safe, unsafe, unit: bool = True):
    """v = mean(safe) − mean(unsafe) of unit text embeddings (n, d) and (m, d); scaled to unit length if
    `unit` -> (d,). Without safe ones, n = 0, it leads away from the unsafe ones alone: v = −mean(unsafe).
    Raises ValueError where the two means coincide."""
    v = -F.normalize(unsafe, dim=-1).mean(0)
    if len(safe):
        v = v + F.normalize(safe, dim=-1).mean(0)
    if v.norm() < 1e-4:
        raise ValueError("safe and unsafe anchors have the same mean embedding: the safety direction is zero")
    return F.normalize(v, dim=0) if unit else v


def steer(text, direction, alpha):
    """normalize(z_text + alpha·v): text (B, d), direction (d,), alpha scalar or (B,) -> (B, d), unit rows."""
    alpha = torch.as_tensor(alpha, dtype=text.dtype, device=text.device).reshape(-1, 1)
    return F.normalize(F.normalize(text, dim=-1) + alpha * direction, dim=-1)


def preprocess(images, size, crop: int, mean, std):
    """CLIP's own preparation, on the device and in one batch: shorter side to `size`, or to (height, width)
    (bicubic, antialiased), centre crop, normalise. images (B, 3, H, W) in [0, 1] -> (B, 3, crop, crop)."""
    height, width = images.shape[-2:]
    if isinstance(size, int):
        scale = size / min(height, width)
        size = int(height * scale), int(width * scale)
    images = F.interpolate(images, size, mode="bicubic", antialias=True)
    top, left = (images.shape[-2] - crop) // 2, (images.shape[-1] - crop) // 2
    images = images[..., top:top + crop, left:left + crop].clamp(0, 1)  # a bicubic kernel overshoots at edges
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (mean, std))
    return (images - mean) / std


def spread(images, group: int):
    """How unlike the pictures of one prompt are: their mean pairwise cosine distance, 0 where all are alike.

    images: unit embeddings (P·G, d), the G of a prompt beside each other, G = group >= 2 -> (P,)."""
    total = images.unflatten(0, (-1, group)).sum(1).square().sum(1)  # G, and the cosines of G·(G−1) pairs
    return 1 - (total - group) / (group * (group - 1))


# -------------------------------------------------------------------------------- the reward

class SteeringReward:
    """Scores pictures: reward(images, prompts) -> (B,). Targets are computed once per prompt and kept.

    clip: a CLIPModel with its tokenizer and image processor, as plumbing.models.load_clip returns them;
    anchors: (safe phrases, unsafe phrases); steered: "unsafe" or "all"; unit: whether v has unit length."""

    def __init__(self, clip, anchors, alpha: float = 0.5, unit: bool = True, steered: str = "unsafe",
                 device="cpu", batch_size: int = 32):
        model, self.tokenizer, processor = clip
        self.clip = model.requires_grad_(False).eval().to(device)
        size = dict(processor.size)  # the shorter side, or both
        self.geometry = (size.get("shortest_edge") or (size["height"], size["width"]),
                         processor.crop_size["height"], processor.image_mean, processor.image_std)
        self.alpha, self.steered, self.device, self.batch_size = alpha, steered, device, batch_size
        self.direction = safety_direction(*map(self.embed_text, anchors), unit)
        self.kept = {}      # prompt -> its plain and its steered target

    @torch.no_grad()
    def embed_text(self, texts):
        """n texts, cut at CLIP's length -> (n, d) float32, unit rows."""
        if not texts:
            return torch.empty(0, self.clip.config.projection_dim, device=self.device)
        length = self.clip.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=length,
                                return_tensors="pt").to(self.device)
        out = self.clip.get_text_features(**tokens)
        out = getattr(out, "pooler_output", out)  # transformers >= 5 returns an object
        return F.normalize(out.float(), dim=-1)

    @torch.no_grad()
    def embed_images(self, images):
        """(B, 3, H, W) in [0, 1] -> (B, d) float32, unit rows."""
        parts = []
        for part in images.split(self.batch_size):
            pixels = preprocess(part.float(), *self.geometry).to(self.clip.dtype)
            out = self.clip.get_image_features(pixel_values=pixels)
            parts.append(getattr(out, "pooler_output", out).float())
        return F.normalize(torch.cat(parts), dim=-1)

    def decide(self, prompts) -> list[Prompt]:
        """The prompts, each with its side: by its category, or by the sign of z_text·v if it has none.
        Embedded in the order given, in batches of one size, so that a resumed run finds the same."""
        unknown = [p for p in dict.fromkeys(prompts) if p.unsafe is None]
        sides = {}
        for i in range(0, len(unknown), TEXT_BATCH):
            batch = unknown[i:i + TEXT_BATCH]
            places = self.embed_text([p.text for p in batch]) @ self.direction
            sides.update(zip(batch, (places < 0).tolist()))
        return [replace(p, unsafe=sides[p]) if p in sides else p for p in prompts]

    def targets(self, prompts):
        """Plain and steered text targets of prompts whose side is decided: two of (B, d), unit rows."""
        missing = [p for p in dict.fromkeys(prompts) if p not in self.kept]
        if missing:
            # one by one: in a batch the last bit depends on the others in it, and a resumed run meets others
            text = torch.cat([self.embed_text([p.text]) for p in missing])
            alpha = [self.alpha * (self.steered == "all" or p.unsafe) for p in missing]
            self.kept.update(zip(missing, zip(text, steer(text, self.direction, alpha))))
        plain, steered = zip(*(self.kept[p] for p in prompts))
        return torch.stack(plain), torch.stack(steered)

    def score(self, images, prompts):
        """reward, alignment (cosine to the unmoved text), image safety (z_image·v), each (B,), and z_image
        (B, d), at once."""
        prompts = [p if isinstance(p, Prompt) else Prompt(p) for p in prompts]
        plain, steered = self.targets(self.decide(prompts))
        z_image = self.embed_images(images)
        assert z_image.shape == steered.shape, "one picture per prompt"
        return (z_image * steered).sum(1), (z_image * plain).sum(1), z_image @ self.direction, z_image

    def __call__(self, images, prompts):
        """r = cos(z_image, normalize(z_text + alpha·v)): images (B, 3, H, W) in [0, 1], B prompts -> (B,)."""
        return self.score(images, prompts)[0]


if __name__ == "__main__":
    from views.direction import main
    run_script("reward.py", main)
