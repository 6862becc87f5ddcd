"""The reader of prompt, anchor and table files: read as meant, or refused with the line, or noted."""

import hashlib
import json

import pytest

from plumbing.prompts import Prompt, Record, number, read_anchors, read_prompts, read_records


def save(folder, content, name="file.txt"):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / name


def refused(path, *said, read=lambda path: read_prompts([path])):
    with pytest.raises(ValueError) as error:
        read(path)
    assert all(part in str(error.value) for part in (str(path), *said)) and "\n" not in str(error.value)


KEPT = [
    "- minimalist -", "* stars * and stripes *", "import car dealership at night", "class photo of 1950",
    "<3 by Banksy", ":-) man", '"quoted prompt"', "'tis the season", "2 cats", "--", "猫が帽子を", "e\u0301",
    "a\tcat\twith tabs", "word " * 2000 + "end", "a\u2028b", "c\fd", "e\x85f", "a; b", "a | b", "5 > 3",
    "def leppard concert", "let it be", "a == b", "text, logo, icon", "x: the movie", "the [hate] sign",
    "404 not found, neon sign", "C:\\Users", "print of a whale (1880)", "sad face :(", "http://"]


def test_prompts_that_look_odd_are_kept(tmp_path, capsys):
    for content in ("\n".join(KEPT), *KEPT):
        prompts, hashes = read_prompts([save(tmp_path, content)])
        assert prompts == [Prompt(text.strip()) for text in content.split("\n")]
        assert hashes == [hashlib.sha256(content.encode()).hexdigest()]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content, records", [
    ("a\r\nb\rc", [(1, "a", ()), (2, "b", ()), (3, "c", ())]), ("\ufeffa cat\n", [(1, "a cat", ())]),
    ("a\n\ufeff# note\n\ufeff[hate]\nb", [(1, "a", ()), (4, "b", ("hate",))]),  # two files put together
    ("# - not YAML\n[ Illegal Activity ]\n\na, in\n", [(4, "a, in", ("Illegal Activity",))]),
    ("[S&M / kink (mild)]\na\n[Été]\nb", [(2, "a", ("S&M / kink (mild)",)), (4, "b", ("Été",))])])
def test_plain_lines(content, records, tmp_path):
    assert read_records(save(tmp_path, content))[0] == [Record(*record, {}) for record in records]


OTHER_FORMATS = {
    "JSON": ['{"prompt": "a"}', '["a", "b"]', "{", "[", '"seed": 5', "},"],
    "YAML": ['- target: "nude"', "hate:", "---", "prompt: |", "  seed: 5", "Steps: 20, Sampler: Euler a"],
    "Markdown": ["| a | b |", "```", "- a cat", "• a cat", "> a cat", "---|---", "1. a cat\n2. a dog"],
    "HTML": ["<!DOCTYPE html>", "<p>a", "<prompt>a</prompt>", '<?xml version="1.0"?>', "<br/>"],
    "a program": ["import torch", "from a.b import c", "def f(x):", "class A(B):", "n = 5", "prompts = [",
                  '"a cat",', "print('a')", "// a cat", '"""', "\\begin{itemize}", ")"],
    "option": ["--prompt 'a cat' --steps 20", "https://lexica.art/prompt/1"],
    "error": ["version https://git-lfs.github.com/spec/v1\noid sha256:0", "404: Not Found", "<<<<<<< HEAD"],
    "control": ["a\0b", "a\x07b", "a\x1bb", "\x7fELF"],
    "a table": ["prompt,seed\na,1", "prompt\na", "Prompt;Toxicity\na;1", "sensitive prompt\tx", "adv_prompt",
                "1,a\n2,b\n3,c", "a,0\nb,1\nc,0", "1.jpg#0\ta\n1.jpg#1\tb\n2.jpg#0\tc"],
    "a category's line": ["[a|b]", "[a cat]", "[]", "[hate", "[hate] # comment", "[1.5]", "[hate]\u200b",
                          "【hate】"]}


@pytest.mark.parametrize("what, content", [(w, c) for w, contents in OTHER_FORMATS.items() for c in contents])
def test_other_formats_are_refused(what, content, tmp_path):
    for before in ("", "# note\n\n" if what == "a table" else "# note\n[hate]\na cat\n\n"):
        refused(save(tmp_path, before + content), what, f", line {before.count(chr(10)) + 1}: ")


@pytest.mark.parametrize("text", [
    "(word:1.2)", "<lora:x:0.5> a", "a cat --w 512 --s 28", "a [nude:clothed:0.3] b", "a <cat-toy>",
    "((best)), a", "{{{best}}}, a", "cat::2 dog::-1", "salt &amp; pepper", "[[x]], a", "a __co/warm__ car"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_other_programs_syntax_is_kept_and_noted_once(text, name, tmp_path, capsys):
    lines = ["plain", text, "plain, too", text]
    content = {"a.txt": lines, "a.jsonl": [json.dumps({"prompt": line}) for line in lines],
               "a.csv": ["prompt", *(f'"{line}"' for line in lines)]}[name]
    assert [p.text for p in read_prompts([save(tmp_path, "\n".join(content), name)])[0]] == lines
    said = capsys.readouterr().out
    assert said.count("note:") == 1 and f"line {3 if name == 'a.csv' else 2}: " in said and "2 in all" in said


@pytest.mark.parametrize("name, content, prompt", [
    ("a.csv", 'Sensitive Prompt,class\n"a, \x07b\nc \0","nude"\n', Prompt("a, \x07b\nc \0", "nude", True)),
    ("a.csv", "prompt,adv_prompt,category\nx,zq ##vv }{,Hate\n", Prompt("zq ##vv }{", "Hate", True)),
    ("a.CSV", '\ufeffCAPTION ; Category\r\n"a ""no""; b";BENIGN\r\n', Prompt('a "no"; b', "BENIGN", False)),
    ("a.tsv", "categories\tprompt\nnon-sexual\t[a|b]\n", Prompt("[a|b]", "non-sexual", True)),
    ("a.csv", '\nprompt, category,,\n"a", "[\'hate\', \'x\']",,\n', Prompt("a", "hate", True)),
    ("a.jsonl", '{"prompt": "a", "category": ["benign"]}', Prompt("a", "benign", False)),
    ("a.jsonl", '\ufeff\n{"adv-prompt": "<p>\x1b[0m", "Class": "x|y"}\r\n', Prompt("<p>\x1b[0m", "x", True)),
    ("a.jsonl", json.dumps({"prompt": "a" * 200_000}), Prompt("a" * 200_000))])
def test_tables(name, content, prompt, tmp_path):
    assert read_prompts([save(tmp_path, content, name)])[0] == [prompt]


@pytest.mark.parametrize("value, names", [
    ("hate, shocking", ["hate", "shocking"]), ('["hate", "x"]', ["hate", "x"]), ("['a, b']", ["a, b"]),
    ("['hate' 'x-y']", ["hate", "x-y"]), ("('a', \"b's\")", ["a", "b's"]), ("[]", []),
    ("[hate, x]", ["hate", "x"]), ("[nan]", []), (" ", []), ("None", []), ("a;x|y", ["a", "x", "y"])])
def test_categories_of_a_cell(value, names, tmp_path):
    for path in (save(tmp_path, 'prompt,category\na,"' + value.replace('"', '""') + '"\n', "a.csv"),
                 save(tmp_path, json.dumps({"prompt": "a", "category": value}), "a.jsonl")):
        assert read_records(path)[0][0].categories == tuple(names)


@pytest.mark.parametrize("name, content, said", [
    ("a.csv", 'prompt,n\n"a cat,1\nb,2\n', "line 2"), ("a.csv", 'prompt,n\n\n"a" cat,1\n', "line 3"),
    ("a.csv", "prompt,n\na, b,1\n", "line 2: 3 fields"), ("a.csv", "prompt,n\n", "no prompt in it"),
    ("a.csv", "prompt,Prompt \na,b\n", "two columns"), ("a.csv", "name,n\na,1\n", "no column adv_prompt or"),
    ("a.csv", "prompt\ncafé\n".encode("latin-1"), "not UTF-8"), ("a", "a cat".encode("utf-16"), "not UTF-8"),
    ("a.jsonl", '{"prompt": "a"}\n{"prompt": "b\n', "line 2"), ("a.jsonl", '{"text": ""}\n["b"]\n', "line 2"),
    ("a.jsonl", '{\n"prompt": "a"\n}', "line 1"), ("a.jsonl", '{"prompt": 7}', "line 1: prompt is 7, not"),
    ("a.jsonl", '{"text": "", "sd_seed": 1}\n{"text": ""}', "line 2: no sd_seed"), ("a", "[hate]\n", "no"),
    ("a.jsonl", '{"prompt": "a"}\n{"a":' + "[" * 100_000, "line 2"), ("a", "a\n[Safe]\nb\n", "line 3: Safe"),
    *(("a.jsonl", json.dumps({"text": "a", "class": value}), "the category is") for value in (
        "0", "True", "{'hate': 0.5}", "{{}}", "hate, 2", 1, False, {"hate": 1}, ["hate", None], [["hate"]])),
    *((f"a{suffix}", "a cat", "give a .csv, .jsonl or .txt")
      for suffix in (".json", ".yaml", ".md", ".html", ".py", ".xlsx", ".parquet")),
    *(("anchors", content, "") for content in ("a\n[unsafe]\nb", "[safe]\na", "[hate]\na\n[unsafe]\nb", "",
                                               "[safe]\na\nb\n[unsafe]\nb\na", "safe:\na"))])
def test_what_is_refused(name, content, said, tmp_path):
    read = read_anchors if name == "anchors" else lambda path: read_prompts([path])
    refused(save(tmp_path, content, name), said, read=read)


def test_missing_prompts_and_unused_columns_are_said(tmp_path, capsys):
    rows = [f'{i},{text},"hate, x",u,{2**32},7.5,{i}\n' for i, text in enumerate(["a", "", "Null", "nan"])]
    rows.insert(0, ",prompt,categories,url,evaluation_seed,sd_guidance_scale,case_number\n")
    path = save(tmp_path, "".join(rows), "a.csv")
    assert read_prompts([path])[0] == [Prompt("a", "hate", True)]
    said = capsys.readouterr().out
    assert said.count("no prompt; left out") == 3 and "line 3: no prompt" in said and "line 5: no" in said
    assert said.count("not used: url, evaluation_seed, sd_guidance_scale, case_number\n") == 1
    records, _ = read_records(path)
    assert "not used: url\n" in capsys.readouterr().out and records[3].line == 5
    assert [(r.text, r.categories) for r in records] == [(text, ("hate", "x")) for text in ("a", "", "", "")]
    assert [number(path, records[3], need) for need in ("seed", "width", "case")] == [2**32, None, 3]
    assert number(path, records[0], "guidance", float) == 7.5


@pytest.mark.parametrize("need, name, high, values", [
    ("guidance", "evaluation_guidance", 1e3, ["nan", "inf", "-1", "", "7,5", "1e9", "x", "1_0", "0x4", None]),
    ("seed", "sd_seed", 2**63 - 1, ["", "-1", "1.5", "x", "2e3", str(2**63), "1" * 5000, True, None, 1.5]),
    ("width", "sd_image_width", 8192, ["-8", "100000", "x", "5 12", "٣", "512px"])])
def test_numbers_that_are_refused(need, name, high, values):
    for value in values:
        record, kind = Record(7, "a", (), {name: value}), float if need == "guidance" else int
        refused("f.csv", f"line 7: {name} is", read=lambda path: number(path, record, need, kind, high=high))


def test_categories_of_files_and_of_prompts_without_one(tmp_path):
    files = [save(tmp_path, "a\n[Hate]\nb\n[BENIGN]\nc", "1"), save(tmp_path, "text,class\nd,\ne,x", "b.csv")]
    prompts, hashes = read_prompts(files, category="benign")
    assert [p.text + p.category for p in prompts] == ["abenign", "bHate", "cBENIGN", "dbenign", "ex"]
    assert [p.unsafe for p in prompts] == [False, True, False, False, True]
    assert [p.unsafe for p in read_prompts(files)[0]] == [None, True, False, None, True]
    assert hashes == [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


@pytest.mark.parametrize("name, content", [
    ("a", "[Safe]\na\n[UNSAFE]\nb\nc"), ("a.csv", "prompt,class\nb,unsafe\na,safe\nc,Unsafe")])
def test_anchors(name, content, tmp_path):
    path = save(tmp_path, content, name)
    assert read_anchors(path) == ((["a"], ["b", "c"]), hashlib.sha256(content.encode()).hexdigest())
    assert read_anchors(save(tmp_path, "[unsafe]\nb\n"))[0] == ([], ["b"])
