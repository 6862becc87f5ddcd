"""Models brought from elsewhere: weights that are not there, variants, and configurations of another form."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor

import reward
import sample
from evaluation import judges
from plumbing import models

WEIGHTS = Path(__file__).parent.parent / "shapes" / "weights"
CLIP = WEIGHTS / "text_encoder"


@pytest.fixture
def model(tmp_path):
    return Path(shutil.copytree(WEIGHTS, tmp_path / "model"))


def rewrite(file: Path, without=(), **changes):
    """Change a JSON file, or take keys out of it."""
    whole = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in whole.items() if key not in without}))


def change(file: Path, edit):
    """Rewrite a weight file as `edit` says."""
    save_file({name: tensor.contiguous() for name, tensor in edit(load_file(file)).items()}, file,
              {"format": "pt"})


# -------------------------------------------------------------------------------- weights

DAMAGES = {
    "first missing": lambda w: {k: w[k] for k in sorted(w)[1:]},
    "last missing": lambda w: {k: w[k] for k in sorted(w)[:-1]},
    "half missing": lambda w: {k: w[k] for k in sorted(w)[::2]},
    "all renamed": lambda w: {"module." + k: v for k, v in w.items()},
    "one renamed": lambda w: {k + ("_old" if i == 3 else ""): v for i,
                              (k, v) in enumerate(sorted(w.items()))},
    "another shape": lambda w: w | {(k := sorted(w)[4]): torch.cat([w[k], w[k]])},
    "one more axis": lambda w: w | {(k := sorted(w)[4]): w[k][None]},
    "empty": lambda w: {"nothing": torch.zeros(1)}}


@pytest.mark.parametrize("part", models.NETWORKS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_network_with_other_tensors_is_refused_by_part_and_key(damage, part, model):
    file = next((model / part).glob("*.safetensors"))
    change(file, lambda w: {k: v for k,
                            v in w.items() if part != "text_encoder" or k.startswith("text_model.")})
    own = set(load_file(file))  # the shapes world's file holds a whole CLIP; this is the encoder's share
    change(file, DAMAGES[damage])
    with pytest.raises(ValueError) as error:
        models.load_network(models.NETWORKS[part], model / part)
    said = str(error.value)
    assert part in said and "\n" not in said and any(name.split(".")[-1] in said for name in own)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_clip_with_other_tensors_is_refused_as_reward_and_as_judge(damage, tmp_path):
    clip = Path(shutil.copytree(CLIP, tmp_path / "clip"))
    change(clip / "model.safetensors", DAMAGES[damage])
    for load in (models.load_clip, judges.load_clip):
        with pytest.raises(ValueError) as error:
            load(str(clip))
        assert "clip" in str(error.value) and "\n" not in str(error.value)


def test_two_loads_are_equal(model):
    a, b = (models.load_pipeline(str(model)) for _ in range(2))
    for part in models.NETWORKS:
        for x, y in zip(getattr(a, part).state_dict().values(), getattr(b, part).state_dict().values()):
            assert torch.equal(x, y)


@pytest.mark.parametrize("name", ["fp16", "bf16", "non_ema", "ema"])
def test_variant_files_load(name, model):
    for part in models.NETWORKS:
        file = next((model / part).glob("*.safetensors"))
        file.rename(file.with_name(f"{file.name.removesuffix('.safetensors')}.{name}.safetensors"))
    pipe = models.load_pipeline(str(model))
    assert {p.dtype for p in pipe.unet.parameters()} == {torch.float32}
    models.load_clip(str(model / "text_encoder"))


@pytest.mark.parametrize("files, kind", [
    (["model"], None), (["model", "model.fp16"], None), (["model.fp16"], "fp16"),
    (["model-00001-of-00002", "model-00002-of-00002"], None), (["model.fp16-00001-of-00002"], "fp16"),
    (["model-00001-of-00002.fp16", "model-00002-of-00002.fp16"], "fp16"),
    (["diffusion_pytorch_model.ema"], "ema"),
    (["diffusion_pytorch_model.non_ema", "diffusion_pytorch_model.non_ema-1"], "non_ema"), ([], None)])
def test_the_variant_is_read_from_the_names(files, kind, tmp_path):
    for name in files:
        (tmp_path / f"{name}.safetensors").touch()
    assert models.variant(tmp_path) == kind


def test_two_variants_without_plain_weights_are_refused(tmp_path):
    for name in ("fp16", "non_ema"):
        (tmp_path / f"model.{name}.safetensors").touch()
    with pytest.raises(ValueError, match="fp16 and non_ema"):
        models.variant(tmp_path)


# -------------------------------------------------------------------------------- a pipeline's configurations

@pytest.mark.parametrize("size, shape", [
    (8, (8, 8)), ([8, 8], (8, 8)), ([8, 12], (8, 12)), ([16, 8], (16, 8)), (4, (4, 4)),
    (None, None), ("8", None), ([8], None), ([8, 8, 8], None), ([8, None], None), (0, None), (-8, None),
    (8.0, None),
    ([8, 0], None), (True, None), ({}, None), ("absent", None), (10**9, None)])
def test_latent_size(size, shape, model):
    file = model / "unet" / "config.json"
    rewrite(file, ["sample_size"] * (size == "absent"), sample_size=size)
    if shape is None:
        with pytest.raises(ValueError, match="unet/config.json: sample_size is") as error:
            models.check_pipeline_folder(model)
        assert "\n" not in str(error.value)
        return
    pipe = models.load_pipeline(str(model))
    assert sample.latent_shape(pipe.unet) == (4, *shape)
    schedule = sample.ddim_schedule(pipe.scheduler, 2, 1.0)
    _, images = sample.draw(pipe, pipe.unet, schedule, ["a star"], [sample.image_generator(0)], 1.0)
    scale = pipe.vae_scale_factor
    assert images.shape == (1, 3, shape[0] * scale, shape[1] * scale)


@pytest.mark.parametrize("length", [16, 12, 10**30, 77, "absent"])
def test_token_length_is_the_shorter_of_tokenizer_and_encoder(length, model):
    rewrite(model / "tokenizer" / "tokenizer_config.json", ["model_max_length"] * (length == "absent"),
            model_max_length=length)
    pipe = models.load_pipeline(str(model))
    most = pipe.text_encoder.config.max_position_embeddings
    text = sample.encode_prompts(pipe, ["a red star"])
    assert text.shape[1] == (min(length, most) if length != "absent" else most)


@pytest.mark.parametrize("part, value", [
    ("unet", ["diffusers", "UNet3DConditionModel"]), ("unet", ["mine", "Mine"]), ("unet", None),
    ("unet", "x"),
    ("vae", ["diffusers", "AutoencoderTiny"]), ("text_encoder", ["transformers", "T5EncoderModel"]),
    ("tokenizer", ["transformers", "T5Tokenizer"]), ("tokenizer", []), ("vae", [1, 2, 3])])
def test_an_index_that_names_other_classes_is_refused(part, value, model):
    rewrite(model / "model_index.json", **{part: value})
    with pytest.raises(ValueError, match=f"model_index.json: {part} is"):
        models.check_pipeline_folder(model)


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "vae/config.json",
                                  "text_encoder/config.json", "scheduler/scheduler_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe{}", b"[" * 100_000])
def test_a_configuration_that_is_no_object_is_named(file, content, model):
    (model / file).write_bytes(content)
    with pytest.raises(ValueError) as error:
        models.check_pipeline_folder(model)
    assert str(model / file) in str(error.value) and "\n" not in str(error.value)


# -------------------------------------------------------------------------------- CLIP's geometry

HONOURED = [
    {}, dict(size=48), dict(size={"shortest_edge": 60}), dict(size={"height": 48, "width": 48}, crop_size=48),
    dict(size={"height": 64, "width": 56}), dict(crop_size={"height": 48, "width": 48}),
    dict(do_normalize=False),
    dict(image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5]), dict(resample=3),
    dict(size={"height": 48, "width": 48}, do_center_crop=False), dict(do_convert_rgb=False)]
REFUSED = [
    ("resample", dict(resample=2)), ("resample", dict(resample=0)), ("do_resize", dict(do_resize=False)),
    ("do_rescale", dict(do_rescale=False)), ("rescale_factor", dict(rescale_factor=1.0)),
    ("size", dict(size=47)),
    ("size", dict(size={"longest_edge": 48})), ("size", dict(size={"shortest_edge": 48, "longest_edge": 60})),
    ("size", dict(size=None)), ("size", dict(size="48")), ("size", dict(size={"shortest_edge": 48.5})),
    ("size", dict(size=10**9)), ("crop_size", dict(crop_size=40)), ("crop_size", dict(crop_size=None)),
    ("crop_size", dict(crop_size={"height": 48, "width": 40})), ("image_mean", dict(image_mean=[0.5])),
    ("crop_size", dict(do_center_crop=False, size={"height": 60, "width": 48})),
    ("image_mean", dict(image_mean=0.5)), ("image_std", dict(image_std=[0, 1, 1])),
    ("image_std", dict(image_std=[float("nan"), 1, 1])), ("do_normalize", dict(do_normalize="no"))]


@pytest.fixture
def clip(tmp_path):
    return Path(shutil.copytree(CLIP, tmp_path / "clip"))


@pytest.mark.parametrize("changes", HONOURED, ids=str)
@pytest.mark.parametrize("shape", [(64, 64), (64, 96)])
def test_geometry_equals_transformers(changes, shape, clip):
    file = clip / "preprocessor_config.json"
    rewrite(file, **changes)
    processor = models.clip_processor(str(clip), models.check_clip(str(clip)))
    size = dict(processor.size)
    size = size.get("shortest_edge") or (size["height"], size["width"])
    pixels = torch.rand(1, 3, *shape, generator=torch.Generator().manual_seed(0))
    pixels = torch.nn.functional.avg_pool2d(pixels, 5, 1, 2)  # as a picture: neighbours are alike
    ours = reward.preprocess(pixels, size, processor.crop_size["height"], processor.image_mean,
                             processor.image_std)
    picture = Image.fromarray(np.uint8(255 * pixels[0].permute(1, 2, 0) + 0.5))
    theirs = CLIPImageProcessor.from_pretrained(clip)(picture, return_tensors="pt").pixel_values
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() < 0.03  # 1/255, over a deviation


@pytest.mark.parametrize("key, changes", REFUSED, ids=str)
def test_geometry_that_is_not_honoured_is_refused_by_name(key, changes, clip):
    rewrite(clip / "preprocessor_config.json", **changes)
    with pytest.raises(ValueError, match=f"preprocessor_config.json: {key} is") as error:
        models.check_clip(str(clip))
    assert "\n" not in str(error.value)


def test_without_a_preprocessor_file_the_size_is_the_networks_own(clip):
    (clip / "preprocessor_config.json").unlink()
    processor = models.load_clip(str(clip))[2]
    assert processor.size["shortest_edge"] == processor.crop_size["height"] == 48
