"""Data files: what is read, and which line is named when one is at fault."""

import json

import pytest

from tokprune.runtime.data import Sample, read_samples
from tokprune.runtime.errors import UserError


@pytest.fixture
def data(tmp_path):
    (tmp_path / "cat.png").write_bytes(b"opened by nobody here")

    def write(text: str | bytes):
        path = tmp_path / "data.jsonl"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_samples(data, tmp_path):
    path = data('{"prompt": "a", "image": "cat.png", "answer": "b", "form": 3}\n\n  \n{"prompt": "c", "image": null}\n')
    assert read_samples(path) == [Sample("a", (tmp_path / "cat.png",), "b"), Sample("c")]


def test_several_images(data, tmp_path):
    (tmp_path / "dog.png").write_bytes(b"nor this")
    path = data('{"prompt": "a", "image": ["dog.png", "cat.png"]}\n{"prompt": "b", "image": []}\n')
    assert read_samples(path) == [Sample("a", (tmp_path / "dog.png", tmp_path / "cat.png")), Sample("b")]


def test_limit_leaves_later_lines_unread(data):
    path = data('{"prompt": "a"}\n{"prompt": "b"}\nnonsense\n')
    assert [sample.prompt for sample in read_samples(path, 2)] == ["a", "b"]
    with pytest.raises(UserError, match="line 3"):
        read_samples(path, 3)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_line_separators_within_a_text(data, separator):
    """JSON allows them in a string; ``str.splitlines`` would cut the line there."""
    line = json.dumps({"prompt": f"a{separator}b"}, ensure_ascii=False)
    assert [sample.prompt for sample in read_samples(data(line))] == [f"a{separator}b"]


def test_windows_file(data):
    path = data(b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "b"}\r\n')
    assert [sample.prompt for sample in read_samples(path)] == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("1" * 5000, "not valid JSON"),
        ("[1]", '"prompt"'),
        ('{"image": "cat.png"}', '"prompt"'),
        ('{"prompt": 3}', '"prompt"'),
        ('{"prompt": " "}', '"prompt"'),
        ('{"prompt": "a", "answer": 3}', '"answer" that is no text'),
        ('{"prompt": "a", "image": 3}', '"image" that is no path'),
        ('{"prompt": "a", "image": {"cat.png": 1}}', '"image" that is no path'),
        ('{"prompt": "a", "image": ["cat.png", 3]}', '"image" that is no path'),
        ('{"prompt": "a", "image": ["cat.png", ""]}', '"image" that is no path'),
        ('{"prompt": "a", "image": ["cat.png", "dog.png"]}', "dog.png, which is not there"),
        ('{"prompt": "a", "image": "dog.png"}', "dog.png, which is not there"),
        ('{"prompt": "a", "image": "."}', "which is not there"),
    ],
)
def test_line_refused(data, line, words):
    with pytest.raises(UserError, match=f"^line 2 of .*{words}"):
        read_samples(data('{"prompt": "a"}\n' + line + "\n"))


def test_file_refused(data, tmp_path):
    with pytest.raises(UserError, match="holds no samples"):
        read_samples(data("\n\n"))
    with pytest.raises(UserError, match="cannot be read"):
        read_samples(data(b"\xff\xfe"))
    with pytest.raises(UserError, match="cannot be read"):
        read_samples(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        read_samples(tmp_path / "nowhere.jsonl")
