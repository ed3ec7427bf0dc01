"""Score of a checkpoint on held-out questions: `python -m tokprune.export.demo.evaluate [CHECKPOINT] [-n 1000]`.

Plain transformers, as a user would run it: AutoProcessor, LlavaForConditionalGeneration, greedy answers on all 576
visual tokens, FP32. Knows nothing about training.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from tokprune.export.demo import checkpoint_dir
from tokprune.export.demo.model import PROMPT
from tokprune.export.demo.scenes import FORMS, held_out_questions


@torch.inference_mode()
def evaluate(checkpoint: Path, n: int, seed: int, batch: int = 6) -> dict[str, float]:
    """Share of right answers per form and over `all`, for `n` held-out questions of `seed`."""
    processor = AutoProcessor.from_pretrained(checkpoint)
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    asked = list(held_out_questions(n, seed))
    hits: dict[str, list[bool]] = {form: [] for form in FORMS}
    for start in range(0, len(asked), batch):
        rows = asked[start : start + batch]
        inputs = processor(
            images=[Image.fromarray(scene.pixels) for _, scene, _ in rows],
            text=[PROMPT.format(question=q.prompt) for _, _, q in rows],
            padding=True,
            return_tensors="pt",
        )
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=4)
        answers = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for (_, _, question), answer in zip(rows, answers, strict=True):
            hits[question.form].append(answer.strip() == question.answer)
    scores = {form: sum(h) / len(h) for form, h in hits.items() if h}
    return scores | {"all": sum(map(sum, hits.values())) / len(asked)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=checkpoint_dir())
    parser.add_argument("-n", type=int, default=1000, help="questions")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    print(json.dumps(evaluate(arguments.checkpoint, arguments.n, arguments.seed), indent=1))


if __name__ == "__main__":
    main()
