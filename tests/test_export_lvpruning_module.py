"""LVPruning's module and the attention that carries its decisions: shapes, invariances, gradients."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tokprune.export.lvpruning import attention as attention_module
from tokprune.export.lvpruning.attention import EPS, Parted, attention, log_keep
from tokprune.export.lvpruning.base import _places
from tokprune.export.lvpruning.module import DROP, KEEP, SelectorModule
from tokprune.runtime.plan import Module

D, SIZES = 24, Module(width=16, heads=2, intermediate=20)


@pytest.fixture
def module():
    made = SelectorModule(D, SIZES)
    made.initialise(torch.Generator().manual_seed(1))
    return made


@pytest.fixture
def rows():
    random = torch.Generator().manual_seed(2)
    return torch.randn(2, 7, D, generator=random), torch.randn(2, 5, D, generator=random)


def test_shapes_and_first_lean(module, rows):
    logits = module(*rows, torch.ones(2, 5, dtype=torch.bool))
    assert logits.shape == (2, 7, 2)
    assert logits.dtype == torch.float32
    keep = logits.softmax(-1)[..., KEEP]
    assert 0.7 < keep.min() <= keep.max() < 0.97  # around σ(2): the base model still answers, and a gradient is left


def test_against_numpy_in_float64(module, rows):
    visual, text = (x.numpy().astype(np.float64) for x in rows)
    w = {name: p.detach().numpy().astype(np.float64) for name, p in module.named_parameters()}
    valid = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], bool)

    def norm(x, weight):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight

    v = norm(visual, w["visual_norm.weight"]) @ w["visual_proj.weight"].T
    t = norm(text, w["text_norm.weight"]) @ w["text_proj.weight"].T
    mixed = np.zeros_like(v)
    for b in range(2):
        for head in (slice(0, 8), slice(8, 16)):
            q, k, x = (a @ w[f"{n}_proj.weight"].T[:, head] for n, a in (("q", v[b]), ("k", t[b]), ("v", t[b])))
            scores = np.exp(q @ k.T / np.sqrt(8)) * valid[b]
            mixed[b, :, head] = scores / scores.sum(-1, keepdims=True) @ x
    v = v + mixed @ w["o_proj.weight"].T
    u = norm(v, w["mlp_norm.weight"]) @ w["up_proj.weight"].T + w["up_proj.bias"]
    v = v + (u / (1 + np.exp(-u))) @ w["down_proj.weight"].T + w["down_proj.bias"]
    expected = norm(v, w["head_norm.weight"]) @ w["head.weight"].T + w["head.bias"]
    got = module(*rows, torch.from_numpy(valid)).detach().numpy()
    np.testing.assert_allclose(got, expected, atol=2e-6)  # a few roundings of values around 1 in FP32


def test_padded_text_changes_nothing(module, rows):
    visual, text = rows
    short = module(visual, text[:, :3], torch.ones(2, 3, dtype=torch.bool))
    valid = torch.tensor([[True, True, True, False, False]] * 2)
    text[:, 3:] = 1e4  # what stands in padding is not to matter
    torch.testing.assert_close(module(visual, text, valid), short, atol=1e-6, rtol=0)


def test_visual_rows_do_not_see_each_other(module, rows):
    visual, text = rows
    valid = torch.ones(2, 5, dtype=torch.bool)
    order = torch.tensor([3, 1, 6, 0, 5, 2, 4])
    logits = module(visual, text, valid)
    torch.testing.assert_close(module(visual[:, order], text, valid), logits[:, order], atol=1e-6, rtol=0)


def test_text_decides_too(module, rows):
    """Scores that ignored the question would be the same for both."""
    visual, text = rows
    valid = torch.ones(2, 5, dtype=torch.bool)
    assert (module(visual, text, valid) - module(visual, text.flip(0), valid)).abs().max() > 1e-3


def test_half_precision_rows_are_read_in_fp32(module, rows):
    visual, text = (x.half() for x in rows)
    valid = torch.ones(2, 5, dtype=torch.bool)
    assert torch.equal(module(visual, text, valid), module(visual.float(), text.float(), valid))


class Layer(nn.Module):
    num_key_value_groups = 2


S = 11  # rows, of which 2 to 7 are visual


def soft_policy(query, key, value, decisions):
    """DynamicViT's softmax, written out: e^s d / Σ e^s d with d = 1 at text and on the diagonal."""
    d = torch.ones(2, S, dtype=query.dtype).index_copy(1, torch.arange(2, 8), decisions)
    policy = d[:, None, None, :].expand(2, 1, S, S)
    policy = torch.where(torch.eye(S, dtype=torch.bool), 1.0, policy).tril()
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    weights = (query @ key.transpose(2, 3) * 0.4).exp() * policy
    return ((weights / weights.sum(-1, keepdim=True)) @ value).transpose(1, 2)


@pytest.fixture
def heads():
    random = torch.Generator().manual_seed(3)
    shapes = ((2, 4, S, 8), (2, 2, S, 8), (2, 2, S, 8))
    return [torch.randn(*shape, generator=random, dtype=torch.float64) for shape in shapes]


@pytest.fixture(params=[3, 128])
def block(request, monkeypatch):
    """Rows are computed in blocks; three do not divide eleven."""
    monkeypatch.setattr(attention_module, "_BLOCK", request.param)


WEIGHT = torch.randn(2, S, 4, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)  # ∂ℓ/∂out
DECISIONS = torch.tensor([[1, 0, 1, 0, 0, 1], [0, 0, 1, 1, 0, 0]], dtype=torch.float64)


def dropped_rows(decisions):
    return torch.zeros(2, S, dtype=torch.bool).index_copy(1, torch.arange(2, 8), decisions.detach() == 0)


def weight_of(decisions):
    """∂ℓ/∂out: no loss depends on what a dropped row computes."""
    return WEIGHT.masked_fill(dropped_rows(decisions)[:, :, None, None], 0)


def gradients(function, heads, decisions):
    inputs = [x.clone().requires_grad_() for x in (*heads, decisions)]
    out = function(*inputs)
    out.backward(weight_of(decisions).to(out.dtype))
    return [out.detach(), *(x.grad for x in inputs)]


def part(x, places):
    """Rows of [B, H, S, d]; place S is a row that fills up."""
    return F.pad(x, (0, 0, 0, 1)).gather(2, places[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def decided(query, key, value, decisions):
    """The rows that stay, then those that are dropped, put together again."""
    columns = torch.zeros(2, S).index_copy(1, torch.arange(2, 8), log_keep(decisions))
    dropped = dropped_rows(decisions)
    places = {"staying": _places(~dropped), "dropped": _places(dropped)}
    shares = [F.pad(columns, (0, 1)).gather(1, given) for given in places.values()]
    rows = Parted(places["staying"], shares[0], places["dropped"], shares[1])
    out = torch.zeros(2, S + 1, 4, 8)
    for name, given in places.items():
        if given.shape[1]:
            mixed = attention(Layer(), *(part(x, given) for x in (query, key, value)), None, 0.4, **{name: rows})[0]
            mixed = mixed.detach() if name == "dropped" else mixed
            out = out.scatter(1, given[..., None, None].expand_as(mixed), mixed)
    return out[:, :-1]


def test_places():
    chosen = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 1]]).bool()
    assert _places(chosen).tolist() == [[0, 2, 3], [3, 4, 4]]
    assert _places(~chosen).tolist() == [[1, 4, 4], [0, 1, 2]]
    assert _places(chosen & False).shape == (2, 0)


@pytest.mark.usefixtures("block")
def test_hard_decisions_have_the_soft_policys_gradient(heads):
    """Values and all gradients of hard decisions against autograd through DynamicViT's formula in float64."""
    expected = gradients(soft_policy, heads, DECISIONS)
    got = gradients(decided, [x.float() for x in heads], DECISIONS.float())
    for name, a, b in zip(("out", "query", "key", "value", "decisions"), got, expected, strict=True):
        # FP32 sums of some ten terms around 1; EPS is far below
        torch.testing.assert_close(a.double(), b, atol=2e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.usefixtures("block")
def test_soft_decisions_against_finite_differences(heads):
    decisions = 0.1 + 0.8 * torch.rand(2, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    grad = gradients(decided, [x.float() for x in heads], decisions.float())[-1]
    step = 1e-5
    for at in ((0, 0), (0, 5), (1, 3)):
        move = torch.zeros_like(decisions)
        move[at] = step
        up, down = ((soft_policy(*heads, decisions + sign * move) * WEIGHT).sum() for sign in (1, -1))
        assert grad[at].item() == pytest.approx(((up - down) / (2 * step)).item(), abs=1e-4)


def test_first_layer_of_a_stage_needs_the_columns_gradient_only(heads):
    """Nothing in front of the first stage has a gradient; the columns' is the same whether or not rows have one."""
    heads = [x.float() for x in heads]
    decisions = DECISIONS.float().requires_grad_()
    decided(*heads, decisions).backward(weight_of(decisions).float())
    alone = decisions.grad.clone()
    inner = [x.clone().requires_grad_() for x in heads]
    decisions.grad = None
    decided(*inner, decisions).backward(weight_of(decisions).float())
    assert torch.equal(alone, decisions.grad)


def test_without_decisions_it_is_causal_attention(heads):
    query, key, value = (x.float() for x in heads)
    out, _ = attention(Layer(), query, key, value, None, 0.4)
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.4).transpose(1, 2)
    assert torch.equal(out, expected)
    kept = decided(query, key[:, ::2], value[:, ::2], torch.ones(2, 6))
    torch.testing.assert_close(kept, expected, atol=2e-6, rtol=0)  # the same softmax, summed in another order


def test_places_of_the_logits():
    assert (KEEP, DROP) == (0, 1)  # files and graphs rely on it
    assert log_keep(torch.tensor([1.0, 0.0])).tolist() == pytest.approx([0.0, np.log(EPS)])
