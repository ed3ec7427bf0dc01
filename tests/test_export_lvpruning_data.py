"""Training data: both formats, and every mistake in them by its line or entry; tokens of a micro-batch."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tokprune.export.checkpoint import find_checkpoint, load_processor
from tokprune.export.lvpruning.batch import Encoder, collate
from tokprune.export.lvpruning.data import Example, read_examples
from tokprune.runtime.errors import UserError
from tokprune.runtime.prompt import prompt_text

TURNS = [
    {"from": "human", "value": "<image>\nWhat is this?"},
    {"from": "gpt", "value": "a cat"},
    {"from": "human", "value": "Sure?\n<image>"},
    {"from": "gpt", "value": "yes"},
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (60, 60)).save(tmp_path / "images" / "a.png")
    return tmp_path


def write(path, entries):
    path.write_text(json.dumps(entries))
    return path


def test_conversations(folder):
    entries = [
        {"id": "1", "image": "a.png", "conversations": TURNS},
        {"id": 2, "conversations": TURNS},
        {"id": "3", "image": None, "conversations": TURNS},
        {"image": "a.png", "conversations": TURNS[:2]},
    ]
    data = read_examples(write(folder / "data.json", entries), folder / "images")
    picture = (folder / "images" / "a.png",)
    assert [(e.prompt, e.answer, e.images) for e in data.examples] == [
        ("What is this?", "a cat", picture),
        ("Sure?", "yes", picture),
        ("What is this?", "a cat", picture),
    ]
    assert data.without_image == 2
    assert len(data.sha256) == 64


def test_conversations_beside_their_images(folder):
    data = read_examples(write(folder / "d", [{"image": "images/a.png", "conversations": TURNS}]))
    assert len(data.examples) == 2


def test_lines(folder):
    lines = ['{"image": "images/a.png", "prompt": "x", "answer": " y "}', "", '{"prompt": "x", "answer": "y"}']
    (folder / "data.jsonl").write_text("\n".join(lines))
    data = read_examples(folder / "data.jsonl")
    assert [(e.prompt, e.answer) for e in data.examples] == [("x", "y")]
    assert data.without_image == 1


def test_a_line_with_several_images(folder):
    (folder / "data.jsonl").write_text('{"image": ["images/a.png", "images/a.png"], "prompt": "x", "answer": "y"}')
    assert read_examples(folder / "data.jsonl").examples[0].images == (folder / "images" / "a.png",) * 2


CASES = {
    "no answer": ('{"image": "images/a.png", "prompt": "x"}', ["sample 1", '"answer"']),
    "empty answer": ('{"image": "images/a.png", "prompt": "x", "answer": " "}', ["sample 1", '"answer"']),
    "only text": ('{"prompt": "x", "answer": "y"}', ["no question about an image"]),
    "line": ('{"prompt": "x", "answer": "y"}\n{"prompt"', ["line 2"]),
    "cut": ('[{"image": ', ["not valid JSON"]),
    "nested": ("[" * 100_000, ["not valid JSON"]),
    "binary": (b"\xff\xfe", ["cannot be read"]),
    "binary behind": (b'["' + b"a" * 50_000 + b'\xff"]', ["not valid JSON"]),
    "no list": ([1], ["entry 1", "conversations"]),
    "no turns": ([{"image": "images/a.png", "conversations": []}], ["entry 1", "conversations"]),
    "odd turns": ([{"image": "images/a.png", "conversations": TURNS[:3]}], ["entry 1", "pairs"]),
    "speaker": ([{"image": "images/a.png", "conversations": TURNS[::-1]}], ["entry 1", "place 1", "human"]),
    "value": (
        [
            {"conversations": TURNS},
            {"image": "images/a.png", "conversations": [TURNS[0], {"from": "gpt", "value": 3}]},
        ],
        ["entry 2", "place 2", "gpt"],
    ),
    "marker alone": (
        [{"image": "images/a.png", "conversations": [{"from": "human", "value": "<image>"}, TURNS[1]]}],
        ["entry 1", "place 1"],
    ),
    "image": ([{"image": ["images/a.png"], "conversations": TURNS}], ["entry 1", '"image"']),
    "image gone": ([{"image": "b.png", "conversations": TURNS}], ["entry 1", "b.png", "--images"]),
}


@pytest.mark.parametrize("case", CASES)
def test_refused(folder, case):
    content, words = CASES[case]
    text = content if isinstance(content, (str, bytes)) else json.dumps(content)
    path = folder / "data"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        read_examples(path)
    for word in ("data", *words):
        assert word in str(error.value)


def test_images_belong_to_conversations(folder):
    (folder / "data.jsonl").write_text('{"image": "images/a.png", "prompt": "x", "answer": "y"}')
    with pytest.raises(UserError, match="--images"):
        read_examples(folder / "data.jsonl", folder)


# tokens


@pytest.fixture
def checkpoint(tiny_checkpoint):
    return find_checkpoint(str(tiny_checkpoint))


def example(prompt="What is this?", answer="3", images=1):
    return Example(prompt, answer, ("a.png",) * images, "entry 7")


def test_tokens_are_those_of_the_processor(checkpoint):
    """Prompt and answer as transformers' processor reads the whole text, then the end of sequence."""
    encoded = Encoder(checkpoint)(example(answer="blue"))
    text = prompt_text(checkpoint.prompt, "What is this?", 1)
    processor = load_processor(checkpoint)
    picture = Image.new("RGB", (60, 60))
    whole = processor(text=text + " blue", images=picture)["input_ids"][0]
    assert encoded.ids == [*whole, 1]
    assert encoded.ids[: encoded.prompt] == list(processor(text=text, images=picture)["input_ids"][0])


def test_an_answer_is_cut_at_the_context(checkpoint):
    encoded = Encoder(checkpoint)(example(answer="3 " * 500))
    assert len(encoded.ids) == 128


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ({"prompt": "x " * 200}, ["entry 7", "context", "128"]),
        ({"prompt": "an <image>"}, ["entry 7", "<image>"]),
        ({"answer": "an <image>"}, ["entry 7", "answer"]),
    ],
)
def test_what_cannot_be_encoded(checkpoint, kind, words):
    with pytest.raises(UserError) as error:
        Encoder(checkpoint)(example(**kind))
    for word in words:
        assert word in str(error.value)


def test_collate(checkpoint):
    """Rows of two sequences of unlike length, the second with two images."""
    facts, encoder = checkpoint.facts, Encoder(checkpoint)
    sequences = [encoder(example(answer="3")), encoder(example("How many digits are there?", "2 blue", images=2))]
    batch = collate(sequences, facts.image_token_id, facts.vision.tokens)
    size = len(sequences[1].ids)
    flat = batch.ids.flatten()
    assert batch.ids.shape == (2, size)
    assert batch.owner.tolist() == [0, 1, 1]
    assert batch.visual.shape == (3, 16)
    assert (flat[batch.visual] == facts.image_token_id).all()
    assert (batch.visual // size).tolist() == [[0] * 16, [1] * 16, [1] * 16]
    for index, sequence in enumerate(sequences):
        text = batch.text[index][batch.text_valid[index]] - index * size
        prompt = np.array(sequence.ids[: sequence.prompt])
        assert text.tolist() == np.flatnonzero(prompt != facts.image_token_id).tolist()
        own = batch.predicting // size == index
        assert batch.targets[own].tolist() == sequence.ids[sequence.prompt :]
        assert (batch.predicting[own] - index * size + 1).tolist() == list(range(sequence.prompt, len(sequence.ids)))
    assert torch.equal(flat[batch.predicting + 1], batch.targets)
