"""SegmentedAttention: one mask by every path, pieces, windows, persistent memories, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask, flex_attention
from torch.testing import assert_close

from titans_pytorch import audit
from titans_pytorch.attention.flex import create_mac_block_mask
from titans_pytorch.attention.key_values import KeyValues
from titans_pytorch.attention.masks import KeptMasks, may_attend
from titans_pytorch.attention.rotary import RotaryEmbedding, turned
from titans_pytorch.attention.segmented import SegmentedAttention
from titans_pytorch.attention.windowed import Windows, attend, attend_in_windows
from titans_pytorch.titans.attention import attend_sliding, with_unplaced

DIM, HEADS = 8, 2
KINDS = [
    dict(segment_len=4),
    dict(segment_len=4, sliding=True),
    dict(segment_len=3, num_longterm_mem_tokens=2, num_persist_mem_tokens=3),
    dict(segment_len=3, num_longterm_mem_tokens=2, num_persist_mem_tokens=3, sliding=True),
    dict(segment_len=1),
    dict(segment_len=1, sliding=True, num_persist_mem_tokens=1),
    dict(segment_len=100, num_persist_mem_tokens=1),
    dict(segment_len=100, sliding=True),
]


def build(**kwargs: object) -> SegmentedAttention:
    torch.manual_seed(0)
    attention = SegmentedAttention(DIM, dim_head=4, heads=HEADS, **kwargs).double()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return attention


def naively(attention: SegmentedAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All keys for all queries, token by token, the rule written out."""
    out, window = torch.zeros_like(q), attention.window
    persistent_k, persistent_v = attention.persistent_memory
    for i in range(q.shape[2]):
        first = max(i - window, 0) if attention.sliding else i // window * window
        for row in range(q.shape[0]):
            keys = torch.cat((persistent_k, k[row, :, first : i + 1]), dim=1)
            values = torch.cat((persistent_v, v[row, :, first : i + 1]), dim=1)
            weights = (keys @ q[row, :, i, :, None] / q.shape[-1] ** 0.5).softmax(dim=1)
            out[row, :, i] = (weights * values).sum(dim=1)
    return out


def stream(attention: torch.nn.Module, piece: Tensor, cache: object) -> tuple[Tensor, object]:
    out, (_, cache) = attention(piece, cache=cache)
    return out, cache


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 21])
@pytest.mark.parametrize("kwargs", KINDS)
def test_windows_at_once_equal_token_by_token(kwargs: dict[str, object], count: int) -> None:
    attention = build(**kwargs)
    q, k, v = torch.randn(3, 2, HEADS, count, 4, dtype=torch.float64)
    assert_close(attention.by_windows(q, KeyValues(k, v)), naively(attention, q, k, v))


@pytest.mark.parametrize("kwargs", KINDS)
def test_audit(kwargs: dict[str, object]) -> None:
    report = audit(build(**kwargs), torch.randn(2, 23, DIM), stream=stream, poison=False)
    report.check()
    assert report["pieces"].value < 1e-12


@pytest.mark.parametrize("kwargs", KINDS)
def test_gradients_flow_through_the_cache(kwargs: dict[str, object]) -> None:
    attention = build(**kwargs)
    seq = torch.randn(2, 11, DIM, dtype=torch.float64, requires_grad=True)
    probe = torch.randn_like(seq)
    (whole,) = torch.autograd.grad((attention(seq)[0] * probe).sum(), seq)
    outs, cache = [], None
    for piece in seq.split((3, 1, 7), dim=1):
        out, cache = stream(attention, piece, cache)
        outs.append(out)
    (pieces,) = torch.autograd.grad((torch.cat(outs, dim=1) * probe).sum(), seq)
    assert_close(pieces, whole)


@pytest.mark.parametrize("sliding", [False, True])
def test_the_cache_holds_at_most_a_window(sliding: bool) -> None:
    attention = build(segment_len=4, sliding=sliding)
    for count in range(1, 30):
        _, (_, cache) = attention(torch.randn(2, count, DIM, dtype=torch.float64))
        assert cache.keys.shape[2] == (min(count, 4) if sliding else count % 4)
        assert cache.keys.untyped_storage().size() <= 8 * 2 * 2 * HEADS * 4 * 4  # queries beside keys at most


def test_sliding_costs_no_more_than_two_windows_per_query(monkeypatch: pytest.MonkeyPatch) -> None:
    products = []

    def counted(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: object) -> Tensor:
        products.append(q.shape[:-1].numel() * k.shape[2])
        return attend(q, k, v, mask, **kwargs)

    monkeypatch.setattr("titans_pytorch.attention.windowed.attend", counted)
    build(segment_len=8, sliding=True)(torch.randn(1, 800, DIM, dtype=torch.float64))
    assert sum(products) <= HEADS * 800 * 2 * 8


def test_one_token_needs_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object) -> Tensor:
        raise AssertionError("decoding makes no mask")

    for kwargs in KINDS:
        attention = build(**kwargs)
        _, (_, cache) = attention(torch.randn(1, 6, DIM, dtype=torch.float64))
        with monkeypatch.context() as patcher:
            patcher.setattr("titans_pytorch.attention.windowed.window_mask", refused)
            attention(torch.randn(1, 1, DIM, dtype=torch.float64), cache=cache)


@pytest.mark.parametrize("num_before, count", [(0, 1), (0, 13), (3, 1), (3, 2), (2, 11)])
@pytest.mark.parametrize("window", [1, 4])
def test_a_prefix_without_a_position_is_compared_apart_or_by_wider_keys(
    window: int, num_before: int, count: int
) -> None:
    """As on a CPU, and as on other devices: answers and gradients."""
    torch.manual_seed(0)
    num_before = min(num_before, window - 1)

    def randn(batch: int, tokens: int) -> Tensor:
        return torch.randn(batch, 2, tokens, 6, dtype=torch.float64, requires_grad=True)

    q, keys, prefix = randn(2, count), [randn(2, num_before + count) for _ in range(2)], [randn(1, 3) for _ in range(2)]
    tokens, shared = KeyValues(*keys), KeyValues(*prefix)
    turns = RotaryEmbedding(6).turns(num_before, count, q)
    apart = attend_sliding(q, turns, tokens, shared, window)
    wide = attend_in_windows(
        *with_unplaced(turned(q, *turns), q, tokens, shared), Windows(window, lookback=window - 1), scale=6**-0.5
    )
    assert_close(apart, wide)
    weights, inputs = torch.randn_like(apart), (q, *keys, *prefix)
    assert_close(
        torch.autograd.grad((apart * weights).sum(), inputs), torch.autograd.grad((wide * weights).sum(), inputs)
    )


def test_a_window_that_was_kept_in_half_precision_goes_on() -> None:
    """As after a piece that was read under autocast; and half precision is as near as it can be."""
    torch.manual_seed(0)
    q, tokens, prefix = (
        torch.randn(2, 2, 9, 8),
        KeyValues(*torch.randn(2, 2, 2, 9, 8)),
        KeyValues(*torch.randn(2, 1, 2, 3, 8)),
    )
    turns = RotaryEmbedding(8).turns(0, 9, q)
    expected = attend_sliding(q, turns, tokens, prefix, 4)
    mixed = attend_sliding(q, turns, tokens, prefix.map(Tensor.bfloat16), 4)
    assert mixed.dtype == torch.float32
    halves = attend_sliding(q.bfloat16(), turns, tokens.map(Tensor.bfloat16), prefix.map(Tensor.bfloat16), 4)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = attend_sliding(q, turns, tokens, prefix, 4)
    for found, share in ((mixed, 0.02), (halves, 0.02), (under_autocast, 0.02)):
        assert (found.float() - expected).square().mean().sqrt() < share * expected.square().mean().sqrt()


def test_masks_are_kept_up_to_a_number_of_bytes() -> None:
    masks, built = KeptMasks(max_bytes=100), []

    def get(key: str, size: int) -> None:
        masks.get(key, lambda: built.append(key) or torch.ones(size, dtype=torch.bool))
        assert masks.num_bytes == sum(mask.nbytes for mask in masks.masks.values()) <= 100

    for key, size in (("a", 40), ("b", 40), ("a", 40), ("c", 40), ("b", 40), ("huge", 101), ("b", 40)):
        get(key, size)
    assert built == ["a", "b", "c", "b", "huge"]


@pytest.mark.parametrize("persistent", [0, 3])
@pytest.mark.parametrize("sliding", [False, True])
@pytest.mark.parametrize("count, window", [(1, 1), (7, 4), (300, 128), (129, 1000)])
def test_the_block_mask_is_the_dense_mask_entry_by_entry(
    count: int, window: int, sliding: bool, persistent: int
) -> None:
    block_mask = create_mac_block_mask(count, window, persistent, sliding, device="cpu")
    keys = torch.arange(-persistent, count)
    expected = may_attend(torch.arange(count)[:, None], keys, window=window, sliding=sliding)
    made = create_mask(block_mask.mask_mod, 1, 1, count, count + persistent, device="cpu")
    assert torch.equal(made[0, 0], expected)
    assert block_mask is create_mac_block_mask(count, window, persistent, sliding, device="cpu")
    # Blocks that are skipped hold nothing that is seen.
    blocks = block_mask.to_dense()[0, 0].bool().repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert not (expected & ~blocks[: expected.shape[0], : expected.shape[1]]).any()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kwargs", KINDS[:4])
def test_flex_attention_equals_the_dense_path(kwargs: dict[str, object]) -> None:
    attention = build(**kwargs)
    seq = torch.randn(2, 21, DIM, dtype=torch.float64)
    persistent = kwargs.get("num_persist_mem_tokens", 0)
    block_mask = create_mac_block_mask(21, attention.window, persistent, attention.sliding, device="cpu")

    def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, block_mask=block_mask)

    with torch.no_grad():  # on CPU it only runs forward
        out, (_, cache) = attention(seq, flex_attn_fn=flex)
        expected, (_, expected_cache) = attention(seq, flex_attn_fn=flex, disable_flex_attn=True)
    assert_close(out, expected, rtol=1e-6, atol=1e-6)
    assert_close(cache, expected_cache)


def test_values_are_mixed_and_returned_before_mixing() -> None:
    attention = build(segment_len=4, accept_value_residual=True)
    plain = build(segment_len=4)
    plain.load_state_dict({k: v for k, v in attention.state_dict().items() if "v_mix" not in k})
    seq = torch.randn(2, 6, DIM, dtype=torch.float64)
    _, (own, _) = plain(seq)
    out, (values, cache) = attention(seq, value_residual=own * 2)
    assert_close(values, own)
    mix = attention.to_learned_v_mix(attention.norm(seq))
    assert_close(cache.values, (own + mix * own)[:, :, 4:])
    with torch.no_grad():
        attention.to_learned_v_mix[0].weight.zero_()
        attention.to_learned_v_mix[0].bias.fill_(-1e4)
    assert_close(attention(seq, value_residual=own * 2)[0], plain(seq)[0])
    assert not torch.allclose(out, plain(seq)[0])


def test_output_gating_multiplies_what_comes_out() -> None:
    attention, seq, gate = build(segment_len=4), *torch.randn(2, 2, 6, DIM, dtype=torch.float64)
    assert_close(attention(seq, output_gating=gate)[0], attention(seq)[0] * gate)


def test_attend_kwargs_reach_the_attention() -> None:
    seq = torch.randn(2, 6, DIM, dtype=torch.float64)
    plain, scaled = build(segment_len=4), build(segment_len=4, attend_kwargs=dict(scale=3.0))
    scaled.load_state_dict(plain.state_dict())
    assert not torch.allclose(scaled(seq)[0], plain(seq)[0])
    with torch.no_grad():
        scaled.to_qkv.weight[: HEADS * 4].mul_(0.5 / 3)  # queries
    assert_close(scaled(seq)[0], plain(seq)[0])
    dropping = build(segment_len=4, attend_kwargs=dict(dropout=0.5))
    assert not torch.equal(dropping(seq)[0], dropping(seq)[0])
    assert torch.equal(dropping.eval()(seq)[0], dropping(seq)[0])


@pytest.mark.parametrize(
    "kwargs, error, words",
    [
        (dict(segment_len=0), ValueError, "segment_len must be positive, got 0"),
        (dict(segment_len=2.5), TypeError, "segment_len must be a whole number"),
        (dict(segment_len=4, num_persist_mem_tokens=-1), ValueError, "num_persist_mem_tokens must be at least 0"),
        (dict(segment_len=4, dim_head=3), ValueError, "dim_head must be even"),
        (dict(segment_len=4, attend_kwargs=dict(causal=True)), ValueError, "attend_kwargs must be among"),
        (dict(segment_len=4, attend_kwargs=dict(dropout="no")), TypeError, "attend_kwargs\\['dropout'\\]"),
    ],
)
def test_refuses_wrong_arguments(kwargs: dict[str, object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        SegmentedAttention(DIM, **kwargs)


def test_refuses_wrong_inputs() -> None:
    attention, seq = build(segment_len=4), torch.randn(2, 6, DIM, dtype=torch.float64)
    _, (values, cache) = attention(seq)
    for wrong in (seq[0], seq[..., :3], seq[:, :0]):
        with pytest.raises(ValueError, match="seq must"):
            attention(wrong)
    with pytest.raises(TypeError, match="dtype"):
        attention(seq.float())
    with pytest.raises(ValueError, match="value_residual goes with accept_value_residual=True"):
        attention(seq, value_residual=values)
    with pytest.raises(ValueError, match=r"output_gating must have the shape \(2, 6, 8\)"):
        attention(seq, output_gating=seq[:, :3])
    with pytest.raises(TypeError, match="cache must be the cached_key_values"):
        attention(seq, cache=(cache.keys, cache.values))
    with pytest.raises(ValueError, match=r"cache\.keys must have the shape"):
        attention(seq[:1], cache=cache)
