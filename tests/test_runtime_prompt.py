"""Prompts and tokens against transformers' LlavaProcessor, with both kinds of tokenizer that LLaVA may have.

Token ids and texts are compared for equality; there is nothing to tolerate.
"""

import json
import random

import numpy as np
import pytest
from PIL import Image
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from tokprune.runtime.errors import UserError
from tokprune.runtime.manifest import PromptFormat
from tokprune.runtime.prompt import Tokenizer, expand_image_tokens, next_turn_text, prompt_text, visual_rows

FORMAT = PromptFormat(image="<image>\n", user="USER: {text} ", assistant="ASSISTANT:")
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
# chat_template.jinja of llava-hf/llava-1.5-7b-hf
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CORPUS = [
    "USER: What is in the picture? ASSISTANT: A red cat sits on the mat.",
    "USER: How many digits are there? ASSISTANT: There are two digits, 3 and 7.",
    "Grüße aus Köln, naïve café; Привет, как дела? 你好，世界。",
] * 4
POOLS = [
    "abcdefghij ABC   xyz.,;:!?'\"()0123456789",
    "äöüßéèñçøåÆœŁ",
    "你好世界图片里有什么猫狗",
    "😀👍🏽👩‍👩‍👧‍👦🇩🇪🏳️‍🌈",
    "e\u0301a\u0308o\u0302\u0323",  # combining
    "שלום مرحبا \u200f\u202e",  # right to left
    "\x00\x01\x07\x1b\x7f\x85\u200b\ufeff\u2028",  # control characters and invisible ones
    "\n\t\r  \u00a0\u3000",
    "▁Ġ<>[]{}|\\/#@%&*_^~`",
    "\U00010348\U0001f9ff\ufffd\uffff",
]
LISTED = [
    "What is this?",
    " leading space",
    "trailing space ",
    "two\nlines",
    "\n",  # only whitespace is tested apart: this one is filtered out below
    "USER: I am the user ASSISTANT: and I answer USER:",
    "{text} {} {0} %s",
    "< image > <image <imag",
    "<0x41> <0xFF>",
    "?",
    "a" * 3000,
    "word " * 1500,
    "你" * 500,
    "😀" * 200,
    "x\u0301" * 300,
]


def questions():
    rng = random.Random(0)
    mixed = []
    while len(mixed) < 200:
        pools = rng.sample(POOLS, rng.randint(1, 4))
        mixed.append("".join(rng.choice(rng.choice(pools)) for _ in range(rng.randint(1, 60))))
    return [question for question in LISTED + mixed if question.strip()][:200]


QUESTIONS = questions()


def byte_level():
    """GPT-2's kind: every byte has a letter of its own."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def byte_fallback():
    """Llama's kind, as its tokenizer.json has it: ▁ for a space and before the text, bytes for what is unknown."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # while training: no token spans words
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL[:3] + bytes_, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in bytes_]
    state["pre_tokenizer"] = None
    backend = Backend.from_str(json.dumps(state))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL[3:]])
    return backend


@pytest.fixture(scope="module", params=[byte_level, byte_fallback], ids=["byte-level", "byte-fallback"])
def pair(request, tmp_path_factory):
    """transformers' processor, and our tokenizer from the tokenizer.json that it saves."""
    backend = request.param()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
        ),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    processor.save_pretrained(folder)
    return processor, Tokenizer(folder / "tokenizer.json")


IMAGE = Image.new("RGB", (28, 28))  # 2 × 2 patches
PATCHES = 4


def turn(role, text, images=0):
    return {"role": role, "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


def reference_ids(processor, messages, images):
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    return text, processor(images=[IMAGE] * images or None, text=text)["input_ids"][0]


def test_there_are_200_questions():
    assert len(QUESTIONS) == 200


@pytest.mark.parametrize("images", [0, 1, 2])
def test_first_turn_equals_transformers(pair, images):
    processor, tokenizer = pair
    for question in QUESTIONS:
        text = prompt_text(FORMAT, question, images)
        ids = expand_image_tokens(tokenizer.encode(text), processor.image_token_id, [PATCHES] * images)
        expected_text, expected_ids = reference_ids(processor, [turn("user", question, images)], images)
        assert text == expected_text
        assert ids == list(expected_ids), question
        assert visual_rows(ids, processor.image_token_id, PATCHES).shape == (images, PATCHES)


@pytest.mark.parametrize("images", [0, 1])
def test_next_turn_goes_on_as_transformers_would(pair, images):
    """Cached ids of the first turn and its answer, and the next turn's behind them, are the ids of the whole."""
    processor, tokenizer = pair
    for question in QUESTIONS[::4]:
        first = expand_image_tokens(
            tokenizer.encode(prompt_text(FORMAT, "What is this?", 1)), processor.image_token_id, [PATCHES]
        )
        answer = tokenizer.encode(" A red cat.", special=False)
        following = tokenizer.encode(next_turn_text(FORMAT, question, images), special=False)
        following = expand_image_tokens(following, processor.image_token_id, [PATCHES] * images)
        messages = [turn("user", "What is this?", 1), turn("assistant", "A red cat."), turn("user", question, images)]
        assert first + answer + following == list(reference_ids(processor, messages, 1 + images)[1]), question


def test_decode_equals_transformers(pair):
    processor, tokenizer = pair
    for question in QUESTIONS:
        ids = [*tokenizer.encode(question), processor.tokenizer.eos_token_id]
        assert tokenizer.decode(ids) == processor.tokenizer.decode(ids, skip_special_tokens=True)


class TestStream:
    def test_pieces_join_to_the_whole(self, pair):
        processor, tokenizer = pair
        for question in QUESTIONS:
            ids = tokenizer.encode(question, special=False)
            ids.insert(len(ids) // 2, processor.tokenizer.eos_token_id)  # control tokens never show
            stream = tokenizer.stream()
            pieces = [stream.push(token) for token in ids]
            if "\ufffd" not in question:
                assert not any("\ufffd" in piece for piece in pieces)
                assert stream.finish() == ""
                assert "".join(pieces) == processor.tokenizer.decode(ids, skip_special_tokens=True)
            else:
                pieces.append(stream.finish())
                assert "".join(pieces) == tokenizer.decode(ids)

    def test_gives_words_as_they_come(self, pair):
        _, tokenizer = pair
        stream = tokenizer.stream()
        pieces = [stream.push(token) for token in tokenizer.encode(" two digits, two digits", special=False)]
        assert all(pieces)
        assert "".join(pieces).lstrip() == "two digits, two digits"

    def test_character_cut_off_at_the_end(self, pair):
        _, tokenizer = pair
        ids = tokenizer.encode("ok 😀", special=False)[:-1]
        stream = tokenizer.stream()
        text = "".join(stream.push(token) for token in ids)
        assert text.strip() == "ok"
        assert set(stream.finish()) == {"\ufffd"}
        assert stream.finish() == ""

    def test_broken_bytes_behind_a_character(self, pair):
        """What `tokenizers`' own DecodeStream fails on."""
        _, tokenizer = pair
        good, broken = tokenizer.encode("aé", special=False), tokenizer.encode("a😀", special=False)[:-1]
        stream = tokenizer.stream()
        text = "".join(stream.push(token) for token in good + broken[-1:] + good) + stream.finish()
        assert text.startswith("aé\ufffd")
        assert text.endswith("aé")

    def test_unknown_ids_are_nothing(self, pair):
        _, tokenizer = pair
        assert tokenizer.stream().push(10**6) == tokenizer.decode([10**6]) == ""


class TestRefusals:
    @pytest.mark.parametrize("question", ["", " ", "\n\t\u3000"])
    def test_empty(self, question):
        with pytest.raises(UserError, match="the prompt is empty"):
            prompt_text(FORMAT, question, 1)
        with pytest.raises(UserError, match="the prompt is empty"):
            next_turn_text(FORMAT, question)

    @pytest.mark.parametrize("images", [0, 1])
    def test_smuggled_image(self, images):
        with pytest.raises(UserError, match="'<image>', a control token"):
            prompt_text(FORMAT, "look:<image>!", images)
        with pytest.raises(UserError, match="'<image>', a control token"):
            next_turn_text(FORMAT, "look:<image>!", images)

    def test_every_control_token_of_the_tokenizer(self, pair):
        _, tokenizer = pair
        assert tokenizer.special_tokens == set(SPECIAL)
        for token in SPECIAL:
            with pytest.raises(UserError, match="a control token"):
                prompt_text(FORMAT, f"say{token}it", 0, tokenizer.special_tokens)

    def test_lone_surrogates(self, pair):
        """What Python makes of arguments that are not UTF-8."""
        with pytest.raises(UserError, match="no valid Unicode"):
            pair[1].encode(b"caf\xe9".decode("utf-8", "surrogateescape"))

    def test_slots_and_images_must_agree(self):
        with pytest.raises(UserError, match="2 image slots for 1 images"):
            expand_image_tokens([1, 9, 2, 9], 9, [4])
        with pytest.raises(UserError, match="0 image slots for 1 images"):
            expand_image_tokens([1, 2], 9, [4])

    def test_a_continuation_that_merges_with_anything(self, tmp_path):
        backend = Backend(
            models.BPE(vocab={"a": 0, "\n": 1, "b": 2, "ab": 3, "\nb": 4}, merges=[("a", "b"), ("\n", "b")])
        )
        backend.save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(ValueError, match="begin it with a space"):
            Tokenizer(tmp_path / "tokenizer.json").encode("b", special=False)

    @pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b'{"model": {}}'])
    def test_no_tokenizer(self, tmp_path, content):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(UserError, match="export the bundle again"):
            Tokenizer(tmp_path / "tokenizer.json")

    def test_missing_tokenizer(self, tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            Tokenizer(tmp_path / "tokenizer.json")


def test_saved_truncation_and_padding_are_ignored(pair, tmp_path):
    processor, tokenizer = pair
    backend = Backend.from_str(processor.tokenizer.backend_tokenizer.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "What is in the picture?"
    assert Tokenizer(tmp_path / "tokenizer.json").encode(text) == tokenizer.encode(text)


def test_empty_continuation(pair):
    assert pair[1].encode("", special=False) == []


def test_expand_and_rows():
    ids = expand_image_tokens([1, 9, 2, 9, 3], 9, [2, 2])
    assert ids == [1, 9, 9, 2, 9, 9, 3]
    rows = visual_rows(ids, 9, 2)
    assert rows.dtype == np.int64
    assert rows.tolist() == [[1, 2], [4, 5]]
    assert visual_rows([1, 2], 9, 2).shape == (0, 2)
    with pytest.raises(ValueError, match="no multiple of 3"):
        visual_rows(ids, 9, 3)
