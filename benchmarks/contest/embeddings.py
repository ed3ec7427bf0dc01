"""What the decoder reads: embeddings of the prompt, the image's features in them, for peers without a vision tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration


@torch.inference_mode()
def convert(job: dict[str, Any]) -> None:
    """Write [1, S, D] float32 for each of ``job["images"]``, as transformers hands them to its language model."""
    out = Path(job["to"])
    out.mkdir()
    processor = AutoProcessor.from_pretrained(job["path"])
    model = LlavaForConditionalGeneration.from_pretrained(job["path"], dtype=torch.float32)
    for file in job["images"]:
        with Image.open(file) as opened:
            batch = processor(text=job["task"]["prompt"], images=opened.convert("RGB"), return_tensors="pt")
        features = model.model.get_image_features(batch["pixel_values"]).pooler_output
        states = model.get_input_embeddings()(batch["input_ids"])
        states[batch["input_ids"] == model.config.image_token_id] = torch.cat(tuple(features))
        np.save(out / f"{Path(file).stem}.npy", states.numpy())
