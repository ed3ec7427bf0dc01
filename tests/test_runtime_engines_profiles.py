"""Sizes of engines by a bundle's limits."""

from __future__ import annotations

import dataclasses

import pytest

from tokprune.runtime.bundle import Bundle, open_bundle
from tokprune.runtime.engines.profiles import DECODE, PREFILL, bucket, segment_profiles
from tokprune.runtime.manifest import Limits


class TestProfiles:
    def sizes(self, bundle: Bundle, name: str, limits: Limits | None = None) -> dict:
        manifest = bundle.manifest if limits is None else dataclasses.replace(bundle.manifest, limits=limits)
        return segment_profiles(manifest, manifest.segment(name))

    def test_decoder(self, tiny_bundle):
        """Limits of 4 sequences, 60 rows a call, 100 cached; 16 visual tokens, pruned to 6, and 36 of text."""
        found = self.sizes(open_bundle(tiny_bundle("lofi")), "decoder_1", Limits(4, 60, 100))
        prefill, decode = found[PREFILL], found[DECODE]
        assert prefill["hidden_states"] == ((1, 1, 64), (1, 42, 64), (4, 60, 64))
        assert prefill["attention_mask"] == ((1, 1), (1, 42), (4, 160))
        assert prefill["past_key_values.1.key"] == ((1, 2, 0, 16), (1, 2, 0, 16), (4, 2, 100, 16))
        assert prefill["logits_index"] == ((1, 1), (1, 1), (4, 60))
        assert decode["hidden_states"] == ((1, 1, 64), (1, 1, 64), (4, 1, 64))
        assert decode["past_key_values.1.key"] == ((1, 2, 1, 16), (1, 2, 100, 16), (4, 2, 100, 16))
        assert decode["attention_mask"] == ((1, 2), (1, 101), (4, 101))

    def test_usual_caches_are_buckets(self, tiny_bundle):
        found = self.sizes(open_bundle(tiny_bundle("lofi")), "decoder_1", Limits(4, 60, 500))
        assert found[DECODE]["past_key_values.1.key"][1] == (1, 2, 128, 16)
        assert [bucket(rows, 300) for rows in (1, 128, 129, 257, 300)] == [128, 128, 256, 300, 300]

    def test_selector_and_tower(self, tiny_bundle):
        bundle, limits = open_bundle(tiny_bundle("lvpruning")), Limits(4, 60, 100)
        (select,) = self.sizes(bundle, "select_1", limits).values()  # 9 visual rows come, 4 go
        assert select["hidden_states"] == ((1, 10, 64), (1, 45, 64), (4, 60, 64))
        assert select["visual_index"] == ((1, 9), (1, 9), (12, 9))  # three images fit 60 rows
        assert select["row_template"] == ((1, 5), (1, 40), (4, 60))
        assert select["text_index"] == ((1, 1), (1, 36), (12, 60))
        (tower,) = self.sizes(bundle, "vision_encoder", limits).values()
        assert tower == {"pixel_values": ((1, 3, 56, 56), (1, 3, 56, 56), (12, 3, 56, 56))}

    @pytest.mark.parametrize("limits", [Limits(1, 1, 1), Limits(1, 1, 2), Limits(2, 5, 5), Limits(1, 17, 17)])
    @pytest.mark.parametrize("plan", ["none", "lvpruning", "fastv-2"])
    def test_small_limits_still_give_ordered_ranges(self, tiny_bundle, limits, plan):
        bundle = open_bundle(tiny_bundle(plan))
        for segment in bundle.manifest.segments:
            found = self.sizes(bundle, segment.name, limits)
            assert (DECODE in found) == (segment.layers is not None and limits.max_kv_capacity > 1)
            for ranges in found.values():
                for least, usual, most in ranges.values():
                    assert all(low <= middle <= high for low, middle, high in zip(least, usual, most, strict=True))
