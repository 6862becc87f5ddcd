"""Models and CLIPs brought from elsewhere: their names, what is refused or never opened, and the hub."""

import json
import pickle
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from started import UNET, Malicious, contents
from transformers import CLIPImageProcessor

import reward
import train
from plumbing import hub, run
from plumbing.models import (NETWORKS, check_model, load_clip, load_network, load_pipeline, local_folder,
                             read_json, trace)


# changes of a model's folder
config = lambda name, **changes: lambda f: (f / name).write_text(json.dumps(read_json(f / name) | changes))
written = lambda name, content: lambda folder: (folder / name).write_bytes(content)
torn = lambda name: lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])
without = lambda name: lambda folder: shutil.move(folder / name, folder.parent / "removed")
a_file = lambda folder: (shutil.rmtree(folder), folder.touch())


def pickled(folder):
    """Weights in the formats that can run code, in place of the safe one."""
    for file in [*folder.rglob("*.safetensors")]:
        for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin", "model.ckpt"):
            (file.parent / name).write_bytes(pickle.dumps(Malicious()))
        file.unlink()


@pytest.mark.parametrize("name", ["2026-11-25T10:30:00", "run 1", "运行", "-x", ":x:"])
def test_a_folder_is_the_folder_whatever_its_name(name, models, tmp_path, monkeypatch):
    """And what may be on the hub is looked for there, but where its owner is a folder here."""
    place = shutil.copytree(models / "a", tmp_path / name / "final")
    assert local_folder("--model", str(place)) == place
    assert trace("--model", f"{tmp_path / name}:final") == (place, [])
    monkeypatch.chdir(models)
    assert local_folder("--model", "d/b:c/d") is None
    with pytest.raises(ValueError, match="--model a/b: no such folder"):
        local_folder("--model", "a/b")


INDEX, UNET_JSON, SCHEDULE = "model_index.json", "unet/config.json", "scheduler/scheduler_config.json"
REFUSED = [
    (without("."), "no such folder"), (without(INDEX), "no model_index.json"),
    (a_file, "a file.*run code"), (pickled, "run code"), (lambda f: pickled(f / "vae"), "vae holds no .safe"),
    (written("unet/mine.py", b""), "its own .mine"), (config(UNET_JSON, cross_attention_dim=2048), "2048"),
    (config(UNET_JSON, in_channels=9), "[^0-9]9[^0-9]"), (config(UNET_JSON, sample_size=None), "None"),
    (config("vae/config.json", latent_channels=16), "16"), (config(INDEX, vae=None), "its vae is"),
    (config(INDEX, unet=["mine", "Mine"]), "its unet is"), (config(INDEX, text_encoder=[]), "encoder is .],"),
    (config(INDEX, tokenizer=["transformers", "T5Tokenizer"]), "T5"), (without("vae"), "its vae is"),
    (config(INDEX, text_encoder=["transformers", "CLIPTextModelWithProjection"]), "its text_encoder is"),
    (config(INDEX, vae=["diffusers", "AutoencoderKLTemporalDecoder"]), "its vae is"),
    (without("scheduler"), SCHEDULE), (written(SCHEDULE, b"7"), f"{SCHEDULE}: not a"),
    (written(INDEX, b"\xff\xfe{}"), "model_index.json: not a JSON"), (torn(UNET), "not a whole")]
NO_CLIP = [
    (a_file, "a file"), (pickled, "run code"), (torn("model.safetensors"), "not a whole"),
    *((config("config.json", model_type=kind), f"a {kind} model") for kind in ("siglip", "unknown", None)),
    (config("config.json", model_type="mine", auto_map={"AutoConfig": "mine.Mine"}), "a mine model"),
    (without("config.json"), "config.json"), (written("config.json", b"{"), "config.json")]


@pytest.mark.parametrize("source, change, said", [(source, *one) for source, every in (
    ("a", REFUSED), ("clip", NO_CLIP)) for one in every])
def test_what_is_refused_before_weights_are_read(source, change, said, models, tmp_path, monkeypatch):
    change(folder := Path(shutil.copytree(models / source, tmp_path / "model")))
    monkeypatch.setattr("plumbing.models.load_network", lambda *_, **__: pytest.fail("weights were read"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run foreign code"))
    with pytest.raises((ValueError, OSError), match=said) as error:
        if source == "clip":
            train.note_long(str(folder), [])
        train.make_schedule(SimpleNamespace(model=str(folder), steps=4, eta=1.0, skip_last=2))
    assert "\n" not in str(error.value)


DAMAGES = {
    "first missing": lambda w: {k: w[k] for k in sorted(w)[1:]},
    "all renamed": lambda w: {"module." + k: v for k, v in w.items()},
    "another shape": lambda w: w | {(k := sorted(w)[4]): torch.cat([w[k], w[k]])}}


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "clip"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_network_with_other_tensors_is_refused_by_part_and_key(damage, part, models, tmp_path):
    folder = Path(shutil.copytree(models / ("clip" if part == "clip" else f"a/{part}"), tmp_path / part))
    own = load_file(file := next(folder.glob("*.safetensors")))
    save_file({k: value.contiguous() for k, value in DAMAGES[damage](own).items()}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=part) as error:
        load_clip(str(folder)) if part == "clip" else load_network(NETWORKS[part], folder)
    assert "\n" not in str(error.value) and any(name.split(".")[-1] in str(error.value) for name in own)


HONOURED = [{}, dict(size={"shortest_edge": 60}), dict(size={"height": 32, "width": 32}, do_center_crop=0),
            dict(size={"height": 48, "width": 40}), dict(size=32, image_mean=[0.5] * 3, image_std=[0.2] * 3)]
NOT_HONOURED = [dict(resample=2), dict(do_resize=False), dict(do_rescale=False), dict(do_normalize=False),
                dict(crop_size=40), dict(do_center_crop=False, size={"height": 40, "width": 32})]


@pytest.mark.parametrize("changes", HONOURED + NOT_HONOURED, ids=str)
def test_clips_geometry_equals_transformers_or_is_refused(changes, models, tmp_path):
    folder = Path(shutil.copytree(models / "clip", tmp_path / "clip"))
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    config("preprocessor_config.json", **changes)(folder)
    if changes in NOT_HONOURED:
        with pytest.raises(ValueError, match="preprocessor_config.json has to resize .bicubic., crop to 32"):
            load_clip(str(folder))
        return
    ours = reward.SteeringReward(load_clip(str(folder)), ([], ["a red star"]))
    pixels = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    pixels = torch.nn.functional.avg_pool2d(pixels, 5, 1, 2)  # as a picture: neighbours are alike
    picture = Image.fromarray(np.uint8(255 * pixels[0].permute(1, 2, 0) + 0.5))
    theirs = CLIPImageProcessor.from_pretrained(folder)(picture, return_tensors="pt").pixel_values
    made = reward.preprocess(pixels, *ours.geometry)
    assert made.shape == theirs.shape and (made - theirs).abs().max() < 0.03  # 1/255, over a deviation


class Hub(BaseHTTPRequestHandler):
    """One repository, me/model, at one commit, as huggingface_hub asks for it; or an error where `where` is
    in the address: a status with a header, or "cut" for an answer that ends too early."""
    files, error, where, commit = {}, None, "/", "c" * 40
    log_message = lambda *_: None

    def do_GET(self):
        path = self.path.partition("?")[0]
        name = path.partition(f"/resolve/{self.commit}/")[2]
        about = [{"type": "file", "path": name, "rfilename": name, "size": len(data), "oid": "0" * 40}
                 for name, data in self.files.items()]
        listing = about if "/tree/" in path else {"id": "me/model", "sha": self.commit, "siblings": about}
        struck, header = self.where in path, ("ETag", f'"{hash(name)}"')
        code, body = 200, self.files.get(name) or json.dumps(listing).encode()
        if struck and isinstance(self.error, tuple):
            code, body, header = self.error[0], b"", self.error[1:] or header
        self.send_response(code)
        for header in (header, ("X-Repo-Commit", self.commit), ("Content-Length", len(body))):
            self.send_header(*header)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:-1] if struck and self.error == "cut" else body)

    do_HEAD = do_GET


@pytest.fixture
def server(models, tmp_path, monkeypatch):
    """The hub at 127.0.0.1, with an empty cache: me/model is models/a, with copies that nobody needs."""
    files = {name: (models / "a" / name).read_bytes() for name in contents(models / "a")}
    more = {name.replace(".safe", f".{kind}.safe"): b"x" for name in files for kind in ("fp16", "non_ema")}
    one = type("One", (Hub,), {"files": more | files | {"README.md": b"x", "a.ckpt": b"x", "a.bin": b"x"}})
    here = ThreadingHTTPServer(("127.0.0.1", 0), one)
    threading.Thread(target=here.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{here.server_port}"
    files_at = address + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in (("ENDPOINT", address), ("HUGGINGFACE_CO_URL_TEMPLATE", files_at),
                        ("HF_HUB_OFFLINE", False), ("HF_HUB_CACHE", str(tmp_path / "cache"))):
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # between its tries
    monkeypatch.chdir(tmp_path)
    hub.fetch.cache_clear()
    yield one
    here.shutdown(), here.server_close(), hub.fetch.cache_clear()


GATED, MISTYPED = (403, "X-Error-Code", "GatedRepo"), (404, "X-Error-Code", "RepoNotFound")
EXPIRED = 401, "X-Error-Message", "Invalid credentials in Authorization header"


@pytest.mark.parametrize("where", ["/", "/resolve/"])
@pytest.mark.parametrize("error, said", [
    (MISTYPED, "check the spelling"), (GATED, "accept its terms"), (EXPIRED, "refuses your token"),
    ((403,), "refuses your token"), ((503,), "answers 503"), ("cut", "be reached"), ("down", "be reached")])
def test_each_cause_has_its_line(error, said, where, server, monkeypatch):
    """For the list of files, and for the files themselves, as a gated repository answers."""
    server.error, server.where, server.files = error, where, {"model_index.json": b"{}"}
    if error == "down":
        monkeypatch.setattr(constants, "ENDPOINT" if where == "/" else "HUGGINGFACE_CO_URL_TEMPLATE",
                            "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}")
    with pytest.raises(ValueError, match=f"--model me/model: .*{said}") as error:
        check_model("--model", "me/model")
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_what_is_fetched_is_said_and_no_more_than_is_needed(server, models, capsys, monkeypatch):
    """Once; then a copy in the cache does without the hub, whatever it answers."""
    check_model("--model", "me/model")
    folder, needed = trace("--model", "me/model")[0], contents(models / "a")
    assert contents(folder) == needed and capsys.readouterr().out == (
        f"hub      me/model: {len(needed)} files, 0.0 GB where they are not here already\n")
    for fault in ((503,), EXPIRED, MISTYPED, "cut", "down", "offline"):
        server.error = fault
        if fault == "down":
            monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", fault == "offline")
        hub.fetch.cache_clear()
        assert trace("--model", "me/model") == (folder, []), fault


def test_a_hub_model_with_half_precision_files_alone_is_fetched_opened_and_copied(server, models, tmp_path):
    """As many fine-tunes are: by the variant, in float32. A run's copy has the names that tools look for."""
    half, base = Path(shutil.copytree(models / "a", tmp_path / "half")), tmp_path / "base"
    for file in [*half.glob("*/*.safetensors")]:
        values = {name: value.half() for name, value in load_file(file).items()}
        save_file(values, file.with_suffix(".fp16.safetensors"), {"format": "pt"})
        file.unlink()
    server.files = {name: (half / name).read_bytes() for name in contents(half)}
    check_model("--model", "me/model")
    opened = load_pipeline("me/model")
    assert contents(trace("--model", "me/model")[0]) == contents(half)
    for part in NETWORKS:
        weights = load_file(next((half / part).glob("*.fp16.safetensors")))
        weights = {name: value.float() for name, value in weights.items()}
        torch.testing.assert_close(dict(getattr(opened, part).state_dict()), weights, rtol=0, atol=0)
    base.mkdir()
    run.copy_base("me/model", base)
    plain = {name.replace(".fp16", ""): digest for name, digest in contents(half).items()}
    copied = contents(base)
    assert copied.keys() == {name for name in plain if not name.startswith("unet/")}
    assert all(copied[name] == plain[name] for name in copied if "/" in name)
    opened.unet.save_pretrained(base / "unet")
    StableDiffusionPipeline.from_pretrained(base)
