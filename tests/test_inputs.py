"""Prompt files of every kind, and 300 mutations of every file that is read: read as what they say, or refused
in one line that names file and line.
"""

import hashlib
import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

import evaluate
import reward
from evaluation import geneval, i2p, prompts
from plumbing import checkpoint, log, models, texts

WEIGHTS = Path(__file__).parent.parent / "shapes" / "weights"
HUB = ("prompt,categories,hard,inappropriate_percentage,lexica_url,sd_seed,sd_guidance_scale,sd_image_width,"
       "sd_image_height,sd_model\n")
ESD = HUB.replace("prompt,", ",prompt,", 1).replace("sd_seed", "evaluation_seed").replace(
    "sd_guidance_scale", "evaluation_guidance").replace("sd_model", "case_number")
PROMPTS = ["a cat, in a hat", 'he said "no" twice', "a plain dog", "", "ein Bär\u2028am Fluß", "form\ffeed",
           "two\nlines"]


def quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def hub(texts_=PROMPTS, kind="hate, violence"):
    return HUB + "".join(f"{quoted(text)},{quoted(kind)},0,12.5,https://lexica.art/prompt/{i:04d},"
                         f"{2**32 - 5 - i},7,512,512,sd-v1.4\n" for i, text in enumerate(texts_))


def esd(texts_=PROMPTS):
    return ESD + "".join(f"{i},{quoted(text)},hate,0,12.5,https://lexica.art/prompt/{i:04d},"
                         f"{2**32 - 5 - i},7.5,512,512,{i}\n" for i, text in enumerate(texts_))


def jsonl(texts_=PROMPTS):
    return "".join(json.dumps(dict(prompt=text, tag="single_object",
                                   include=[{"class": "bench", "count": 1}]),
                              ensure_ascii=False) + "\n" for text in texts_)


def save(folder, content, name="file"):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder / name)


def arguments(*words, suite="prompts"):
    return evaluate.parse(["--model", "m", "--suite", suite, "--prompts", *words])


# -------------------------------------------------------------------------------- formats

TEXTS = [text for text in PROMPTS if text]


@pytest.mark.parametrize("name", ["a.csv", "a.CSV", "a.txt", "a", "a.jsonl", "a.tsv"])
@pytest.mark.parametrize("make", [hub, esd, lambda: hub().replace("\n", "\r\n"), lambda: "\ufeff" + hub()])
def test_a_csv_is_one_by_its_content(make, name, tmp_path, capsys):
    if name == "a.jsonl":
        with pytest.raises(ValueError, match="not JSON"):
            texts.read_prompts([save(tmp_path, make(), name)])
        return
    read = texts.read_prompts([save(tmp_path, make(), name)])
    assert [p.text.replace("\r\n", "\n") for p in read] == TEXTS and {p.category for p in read} == {"hate"}
    assert "line 5: no prompt; left out" in capsys.readouterr().out


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_other_delimiters(delimiter, tmp_path):
    content = delimiter.join(["Prompt", "Categories"]) + "\n" + (
        delimiter.join(["a, b", "shocking, hate"]) + "\n")
    assert texts.read_prompts([save(tmp_path, content)]) == [reward.Prompt("a, b", "shocking")]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a"])
def test_jsonl_is_one_by_its_content(name, tmp_path):
    path = save(tmp_path, jsonl(TEXTS), name)
    assert [p.text for p in texts.read_prompts([path])] == TEXTS
    assert [row["prompt"] for row in geneval.read_metadata(path)] == TEXTS


@pytest.mark.parametrize("content, prompts_", [
    ("a\u2028b\nc\fd\ne\x85f\ng\vh\n", ["a\u2028b", "c\fd", "e\x85f", "g\vh"]),
    ("a\r\nb\rc", ["a", "b", "c"]),
    ("\ufeffa cat", ["a cat"]), ("# no\n[hate]\n\na cat, in\n", ["a cat, in"]),
    ("a, b\nc, d, e\n", ["a, b", "c, d, e"]),
    ("[cat|dog] in a hat\n", ["[cat|dog] in a hat"]), ('"a quote"\nx\n', ['"a quote"', "x"])])
def test_plain_text(content, prompts_, tmp_path):
    path = save(tmp_path, content)
    assert [p.text for p in texts.read_prompts([path])] == prompts_


REFUSED = [
    ("unclosed quote", 'prompt,seed\n"a cat,1\nb,2\nc,3\nd,4\n', "line 2"),
    ("unclosed, closed later", 'prompt,seed\n"a cat,1\nb,2\n"c, d",3\n', "line 2"),
    ("text after a quote", 'prompt,seed\n"a" cat,1\n', "line 2"),
    ("unquoted comma", "prompt,seed\na, b,1\n", "line 2"),
    ("short row", "prompt,seed\na,1\nb\n", "line 3: 1 fields"),
    ("long row", "prompt,seed\na,1,\n", "line 2: 3 fields"),
    ("a long field", "prompt,seed\n" + "a" * 131_073 + ",1\n", "line 2"),
    ("header alone", "prompt,seed\n", "no prompt"),
    ("two prompts", "prompt,prompt\na,b\n", "two columns"), ("all empty", "prompt,seed\n,1\n", "no prompt"),
    ("no prompt column", "case_number,text\n1,a\n", "no column adv_prompt or prompt"),
    ("tabs, no prompt column", "text\tseed\na\t1\n", "no column"),
    ("JSON torn", '{"prompt": "a"}\n{"prompt": "b\n', "line 2"),
    ("JSON list", '{"prompt": "a"}\n["b"]\n', "line 2"), ("JSON number", '{"prompt": 7}\n', "line 1"),
    ("JSON null", '{"prompt": "a"}\n{"prompt": null}\n', "line 2"),
    ("JSON key", '{"prompt": "a"}\n{"promp": "b"}\n', "line 2"),
    ("JSON over lines", '{\n"prompt": "a"\n}\n', "line 1"),
    ("JSON deep", '{"prompt": "a"}\n{"a":' + "[" * 100_000, "line 2"),
    ("JSON no prompt", '{"text": "a"}\n', "no column"), ("NUL", "a\0b\n", "line 1: holds the control"),
    ("a pickle", b"\x80\x04\x95\x10", "not UTF-8"), ("UTF-16", "a cat".encode("utf-16"), "not UTF-8"),
    ("UTF-16 without mark", "a cat".encode("utf-16-le"), "control character"),
    ("latin-1", "caf\xe9".encode("latin-1"), "not UTF-8"),
    ("open section", "[hate\na cat\n", "line 1: [ without ]"), ("nothing", "", "no prompt"),
    ("spaces", " \n\t\n", "no"),
    ("escape", "a\x1bb", "control character"), ("separators", "a\x1cb\x1d\n", "control character")]


@pytest.mark.parametrize("what, content, said", REFUSED, ids=[what for what, _, _ in REFUSED])
def test_what_is_no_prompt_file_is_refused(what, content, said, tmp_path):
    path = save(tmp_path, content)
    for read in (lambda: texts.read_prompts([path]), lambda: prompts.rows(arguments(path))):
        if what != "all empty" or read.__code__.co_names[0] == "texts":  # evaluate draws '' for an empty one
            with pytest.raises(ValueError) as error:
                read()
            assert path in str(error.value) and said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name, content", [("a.csv", "text,n\na,1\n"), ("a.TSV", "text\na\n"),
                                           ("a.json", "[1]"), ("a.jsonl", "x")])
def test_an_ending_that_says_table_is_believed(name, content, tmp_path):
    with pytest.raises(ValueError, match="no column|one object a line"):
        texts.read_prompts([save(tmp_path, content, name)])


@pytest.mark.parametrize("column, value", [
    (c, v) for c, values in {
        "guidance": ["nan", "inf", "-inf", "-1", "", "7,5", "1e9", "x", "1_0"],
        "seed": ["", "-1", "1.5", "x", "2e3", str(2**63)],
        "width": ["-8", "511", "100000", "x", "nan"], "height": ["12", "", "0x40"],
        "case": ["-1", "x", "", "1.0"]}.items() for v in values])
def test_numbers_in_a_csv(column, value, tmp_path):
    row = dict(prompt="a", seed="5", guidance="7", width="512", height="512", case="3") | {column: value}
    names = {"seed": "sd_seed", "guidance": "sd_guidance_scale", "width": "sd_image_width",
             "height": "sd_image_height",
             "case": "case_number"}
    content = ",".join(names.get(n, n) for n in row) + "\n" + ",".join(f'"{v}"' for v in row.values()) + "\n"
    with pytest.raises(ValueError) as error:
        prompts.rows(arguments(save(tmp_path, content), "--guidance", "csv"))
    assert "line 2" in str(error.value) and (names[column] in str(error.value) or column in str(error.value))


def test_every_file_given_is_read(tmp_path):
    files = [save(tmp_path, hub(["a", "b"]), "1.csv"), save(tmp_path, "[hate]\nc\n", "2"),
             save(tmp_path, esd(["d", "e"]), "3")]
    assert [p.text for p in texts.read_prompts(files)] == list("abcde")
    rows, source, _ = prompts.rows(arguments(*files))
    assert [row.prompt for row in rows] == list("abcde") and len({row.case for row in rows}) == 5
    assert len(source["prompts"]) == 3
    rows, _, _ = i2p.rows(arguments(files[0], files[2], suite="i2p"))
    assert [row.prompt for row in rows] == list("abde") and [row.case for row in rows] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="lines of plain text"):
        i2p.rows(arguments(files[1], suite="i2p"))


# -------------------------------------------------------------------------------- fuzz

def mutations(data: bytes, seed: int, count: int = 300):
    """`count` times one or two of: a few bytes cut, swapped, inserted, or one changed."""
    draw = random.Random(seed)
    for _ in range(count):
        out = bytearray(data)
        for _ in range(draw.randint(1, 2)):
            at, n = draw.randrange(len(out)), draw.randint(1, 6)
            kind = draw.randrange(4)
            if kind == 0:
                del out[at:at + n]
            elif kind == 1:
                other = draw.randrange(len(out))
                out[at], out[other] = out[other], out[at]
            elif kind == 2:
                out[at:at] = bytes(draw.choice(b'",;\n\t{}[]:09azN\\\x00\xff\xc3') for _ in range(n))
            else:
                out[at] = draw.randrange(256)
        yield bytes(out)


def small_log():
    names = ("reward_mean", "reward_unsafe", "reward_benign", "alignment", "image_safety_unsafe",
             "clip_frac_pos",
             "clip_frac_neg", "kl_ref", "grad_norm", "ratio_dev_first", "zero_std_groups", "seconds_sample")
    return "".join(json.dumps(dict(epoch=e) | dict.fromkeys(names, 0.25)) + "\n" for e in range(5))


def small_state():
    return json.dumps(dict(epoch=5, flags=dict(out="x", steps=4),
                           versions=dict.fromkeys(checkpoint.LIBRARIES, "1"),
                           files=dict(prompts=[], benign=[], anchors=[hashlib.sha256(b"").hexdigest()])),
                      indent=1)


def compared(file: Path):
    (file.parent / "empty").touch()
    args = SimpleNamespace(out="x", steps=4, prompts=[], benign="", anchors=str(file.parent / "empty"))
    checkpoint.compare_flags(file.parent, args)


def anchors(file: Path):
    return texts.read_anchors(file)


# file, its content, what reads it, and what may not change without a word
CASES = {
    "prompts.csv": (hub(), lambda file: prompts.rows(arguments(str(file), "--guidance", "csv")),
                    lambda found: len(found[0])),
    "esd.csv": (esd(), lambda file: i2p.rows(arguments(str(file), suite="i2p")), lambda found: len(found[0])),
    "prompts.jsonl": (jsonl(TEXTS), lambda file: texts.read_prompts([file]), len),
    "metadata.jsonl": (jsonl(TEXTS), geneval.read_metadata, len),
    "prompts.txt": ("[hate]\na cat\na dog, too\n# note\n[benign]\nein Bär\n",
                    lambda file: texts.read_prompts([file]), None),
    "anchors.txt": ("[safe]\na calm lake\na park\n[unsafe]\na wound\nblood\n", anchors, None),
    "model/scheduler/scheduler_config.json": (None, lambda file: models.check_scheduler(file.parents[1], 50),
                                              None),
    "model/model_index.json": (None, lambda file: models.check_pipeline_folder(file.parent), None),
    "clip/preprocessor_config.json": (None, lambda file: models.check_clip(str(file.parent)), None),
    "state.json": (small_state(), compared, None),
    "metrics.jsonl": (small_log(), lambda file: log.Log(file, 1e-4), None)}


@pytest.mark.parametrize("name", CASES)
def test_fuzz(name, tmp_path, capsys):
    content, read, measure = CASES[name]
    file = tmp_path / name
    if content is None:
        shutil.copytree(WEIGHTS / ("text_encoder" if name.startswith("clip") else ""),
                        tmp_path / name.split("/")[0])
        content = file.read_text()
    file.write_text(content)
    whole = read(file)
    taken = refused = 0
    for data in mutations(content.encode(), sum(map(ord, name))):
        file.write_bytes(data)
        try:
            found = read(file)
            taken += 1
        except ValueError as error:
            said = str(error)
            assert file.name in said and len(said) < 2000, said
            assert "\n" not in said or "not the flags" in said, said
            refused += 1
        else:
            assert measure is None or measure(found) == measure(whole), data
    assert taken + refused == 300
    with capsys.disabled():
        print(f" {name}: {taken} read, {refused} refused", end=" ")
