"""Plans: what is allowed, how options are read, which layers each decoder has."""

import pytest

from tokprune.runtime.errors import UserError
from tokprune.runtime.plan import (
    Module,
    Plan,
    Rank,
    Stage,
    default_module,
    lvpruning_stages,
    make_plan,
    parse_keep,
    parse_rank,
    parse_stage,
)


def plan(method="random", stages=((2, 64),), **options):
    return make_plan(method, stages, **{"layers": 32, "visual_tokens": 576, **options})


class TestMakePlan:
    def test_keeps_what_the_method_needs(self):
        assert plan(seed=3, rank=Rank(components=5)) == Plan("random", (Stage(2, 64),), None, 3)
        assert plan("lofi", seed=3, rank=Rank(components=5)) == Plan("lofi", (Stage(2, 64),), Rank(components=5), 0)
        assert plan("uniform", seed=3) == Plan("uniform", (Stage(2, 64),))
        assert plan("none", ()) == Plan("none")

    @pytest.mark.parametrize(
        "stages",
        [[(0, 1)], [(31, 576)], [(0, 576), (1, 576), (31, 1)]],
    )
    def test_limits_are_allowed(self, stages):
        assert plan(stages=stages).stages == tuple(Stage(*stage) for stage in stages)

    @pytest.mark.parametrize(
        ("stages", "words"),
        [
            ([], "at least one stage"),
            ([(-1, 5)], "layer -1 .* 32 layers: choose 0 to 31"),
            ([(32, 5)], "layer 32 .* 32 layers"),
            ([(2, 0)], "keep 0 of 576"),
            ([(2, 577)], "keep 577 of 576 .* choose 1 to 576"),
            ([(2, 64), (4, 65)], "keep 65 of 64"),
            ([(2, 64), (2, 32)], "ascending"),
            ([(4, 64), (2, 32)], "ascending"),
        ],
    )
    def test_stages_refused(self, stages, words):
        with pytest.raises(UserError, match=words):
            plan(stages=stages)

    @pytest.mark.parametrize("components", [1, 63])
    def test_rank_below_the_tokens_of_every_stage(self, components):
        assert plan("lofi", [(2, 64), (4, 8)], rank=Rank(components=components)).rank == Rank(components=components)

    @pytest.mark.parametrize(
        ("rank", "words"),
        [
            (None, "needs a rank"),
            (Rank(), "needs a rank"),
            (Rank(components=5, energy=0.5), "needs a rank"),
            (Rank(components=0), "rank 0"),
            (Rank(components=576), "rank 576 .* 576 visual tokens .* choose 1 to 575"),
            (Rank(energy=0.0), "rank 0.0"),
            (Rank(energy=1.0), "rank 1.0"),
            (Rank(energy=float("nan")), "rank nan"),
        ],
    )
    def test_rank_refused(self, rank, words):
        with pytest.raises(UserError, match=words):
            plan("lofi", rank=rank)

    def test_rank_is_held_against_every_stage(self):
        with pytest.raises(UserError, match=r"rank 64 .* layer 4, where 64 visual tokens"):
            plan("lofi", [(2, 64), (4, 8)], rank=Rank(components=64))

    def test_others_refused(self):
        with pytest.raises(UserError, match="'dice' is unknown: choose one of lofi"):
            plan("dice")
        with pytest.raises(UserError, match="prunes nothing"):
            plan("none")
        with pytest.raises(UserError, match="seed -1"):
            plan(seed=-1)


class TestSegments:
    @pytest.mark.parametrize(
        ("stages", "expected"),
        [
            ((), [(0, 0, 8)]),
            (((2, 9),), [(0, 0, 2), (1, 2, 8)]),
            (((0, 9),), [(1, 0, 8)]),
            (((0, 9), (1, 8), (7, 1)), [(1, 0, 1), (2, 1, 7), (3, 7, 8)]),
        ],
    )
    def test_layers(self, stages, expected):
        assert list(Plan("random", tuple(Stage(*stage) for stage in stages)).segments(8)) == expected


class TestOptions:
    @pytest.mark.parametrize(
        ("text", "keep"), [("64", 64), ("0.5", 288), ("0.1", 58), ("0.0001", 1), ("577", 577), ("-3", -3)]
    )
    def test_keep(self, text, keep):
        assert parse_keep(text, 576) == keep  # whether a count fits is for make_plan to say

    @pytest.mark.parametrize("text", ["1.0", "0.0", "-0.5", "nan", "inf", "", "half", "64 of 576"])
    def test_keep_refused(self, text):
        with pytest.raises(UserError, match=f"--keep {text}"):
            parse_keep(text, 576)

    def test_rank(self):
        assert parse_rank("16") == Rank(components=16)
        assert parse_rank("0.9") == Rank(energy=0.9)
        with pytest.raises(UserError, match="--rank full"):
            parse_rank("full")

    def test_stage(self):
        assert parse_stage("2:64", 576) == (2, 64)
        assert parse_stage("2:0.25", 576) == (2, 144)

    @pytest.mark.parametrize("text", ["2", ":64", "2:", "-2:64", "a:64", "2:64:3", "²:64"])
    def test_stage_refused(self, text):
        with pytest.raises(UserError):
            parse_stage(text, 576)


class TestLvpruning:
    @pytest.mark.parametrize(
        ("layers", "stages"),
        [
            (32, [(1, 346), (8, 230), (16, 58)]),
            (40, [(1, 346), (10, 230), (20, 58)]),
            (8, [(1, 346), (2, 230), (4, 58)]),
            (3, [(1, 230), (2, 58)]),  # the first two meet at layer 1
            (2, [(1, 58)]),
        ],
    )
    def test_default_stages_scale_with_depth(self, layers, stages):
        assert lvpruning_stages(layers, 576) == stages
        make_plan("lvpruning", stages, layers=layers, visual_tokens=576, module=Module(64, 2, 256))

    @pytest.mark.parametrize("module", [None, Module(0, 1, 8), Module(64, 3, 8), Module(64, 2, 0), Module(64, 0, 8)])
    def test_needs_modules_of_a_sane_size(self, module):
        with pytest.raises(UserError, match="modules"):
            make_plan("lvpruning", [(1, 9)], layers=4, visual_tokens=16, module=module)

    @pytest.mark.parametrize("hidden", [64, 160, 1024, 4096, 5120])
    def test_default_module_is_sane(self, hidden):
        make_plan("lvpruning", [(1, 9)], layers=4, visual_tokens=16, module=default_module(hidden))


def test_fastv_needs_a_layer_before():
    make_plan("fastv", [(1, 9)], layers=4, visual_tokens=16)
    with pytest.raises(UserError, match="layer 0 has none"):
        make_plan("fastv", [(0, 9)], layers=4, visual_tokens=16)
