"""Attention written a second time, query by query; and xformers, by a stand-in of its kernel."""

import sys
import types

import pytest
import torch

from psvae.errors import ConfigError, MissingDependencyError
from psvae.nn.attention import attention, check_backend
from tests.generators.test_deep_fusion import sigmas, tiny_model, words
from tests.tiny import latents


def plain(q, k, v, sees):
    """``sees``: whether the query of an item looks at a key."""
    out = torch.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for item in range(q.shape[0]):
        for head in range(q.shape[1]):
            for row in range(q.shape[2]):
                keys = [place for place in range(k.shape[2]) if sees(item, row, place)]
                scores = k[item, head // group, keys] @ q[item, head, row] / q.shape[3] ** 0.5
                out[item, head, row] = scores.softmax(0) @ v[item, head // group, keys]
    return out


def qkv(heads, kv_heads, N, P, d=8):
    generator = torch.Generator().manual_seed(0)
    sizes = ((heads, N), (kv_heads, P), (kv_heads, P))
    return [torch.randn(2, *size, d, generator=generator) for size in sizes]


def memory_efficient_attention(q, k, v, attn_bias=None):
    """xformers' kernel: ``B N heads d``; refuses what the real one does."""
    assert q.shape[2] == k.shape[2]
    scores = torch.einsum("bnhd,bphd->bhnp", q, k) / q.shape[-1] ** 0.5
    if attn_bias is not None:
        assert attn_bias.shape == scores.shape
        assert attn_bias.dtype == q.dtype
        assert attn_bias.stride(-2) % 8 == 0
        scores = scores + attn_bias
    return torch.einsum("bhnp,bphd->bnhd", scores.softmax(-1), v)


@pytest.fixture
def xformers(monkeypatch):
    """Importable, and counting its calls."""
    calls = []

    def kernel(*args, **kwargs):
        calls.append(args)
        return memory_efficient_attention(*args, **kwargs)

    ops = types.SimpleNamespace(memory_efficient_attention=kernel)
    monkeypatch.setitem(sys.modules, "xformers", types.SimpleNamespace(ops=ops))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    return calls


HEADS = [(4, 4), (4, 2), (6, 1)]
HIDDEN = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 0, 1, 1]]).bool()  # one key for all queries alike
TABLE = torch.eye(3, 7).bool() | (torch.arange(21).view(3, 7) % 3 == 1)


@pytest.mark.parametrize("backend", ["sdpa", "xformers"])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_equals_attention_by_hand(heads, kv_heads, backend, xformers):
    q, k, v = qkv(heads, kv_heads, 3, 7)
    masks = {
        "none": (None, lambda item, row, place: True),
        "keys": (HIDDEN[:, None, None], lambda item, row, place: HIDDEN[item, place]),
        "table": (TABLE[None, None].expand(2, -1, -1, -1), lambda item, row, place: TABLE[row, place]),
        "one table": (TABLE[None, None], lambda item, row, place: TABLE[row, place]),
    }
    for name, (mask, sees) in masks.items():
        got = attention(q, k, v, mask, backend)
        torch.testing.assert_close(got, plain(q, k, v, sees), rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert bool(xformers) == (backend == "xformers")


@pytest.mark.parametrize("backend", ["sdpa", "xformers"])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize(("N", "P"), [(5, 5), (3, 7), (1, 4)])
def test_causal_ends_at_the_last_key(N, P, heads, kv_heads, backend, xformers):
    q, k, v = qkv(heads, kv_heads, N, P)
    got = attention(q, k, v, backend=backend, causal=True)
    wanted = plain(q, k, v, lambda item, row, place: place - row <= P - N)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_attention_by_hand():
    for causal, sees in ((False, lambda item, row, place: True), (True, lambda item, row, place: place <= row)):
        gradients = []
        for compute in (lambda *x, c=causal: attention(*x, causal=c), lambda *x, s=sees: plain(*x, s)):
            inputs = [x.requires_grad_() for x in qkv(4, 2, 5, 5)]
            compute(*inputs).square().sum().backward()
            gradients.append([x.grad for x in inputs])
        for got, wanted in zip(*gradients, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


# The choice of a back-end


def test_xformers_gives_the_model_the_same_numbers(xformers):
    model = tiny_model(image_rope="2d")
    inputs = {"input_ids": words(), "source_latents": latents(2, 2, 3, seed=4)}
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    cases = [inputs, {**inputs, "attention_mask": mask}, {"input_ids": words()}, {}]
    with torch.no_grad():
        wanted = [model(latents(), sigmas(), **case).sample for case in cases]
        assert not xformers
        model.set_attention_backend("xformers")
        xformers.clear()
        got = [model(latents(), sigmas(), **case).sample for case in cases]
        # trunk and head of four forwards, the words of three, the source of two: 2 blocks each
        assert len(xformers) == 2 * (4 + 4 + 3 + 2)
        model.set_attention_backend("sdpa")
        model(latents(), sigmas())
    assert len(xformers) == 2 * (4 + 4 + 3 + 2)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_an_absent_xformers_is_refused_when_it_is_chosen(monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers", None)
    model = tiny_model()
    with pytest.raises(
        MissingDependencyError, match=r"xformers was asked for on cpu .*pip install 'psvae\[xformers\]'"
    ):
        model.set_attention_backend("xformers")
    assert model.attention_backend == "sdpa"


@pytest.mark.parametrize("error", [NotImplementedError, RuntimeError])
def test_an_xformers_without_kernels_is_refused(error, xformers, monkeypatch):
    def kernel(*args, **kwargs):
        raise error("no operator found")

    monkeypatch.setattr(sys.modules["xformers.ops"], "memory_efficient_attention", kernel)
    with pytest.raises(MissingDependencyError, match=r'cannot run \(no operator found\).*or use "sdpa"'):
        check_backend("xformers", torch.device("cpu"))


@pytest.mark.bad_input
def test_another_name_is_refused():
    with pytest.raises(ConfigError, match="the attention back-end is 'flash'; wanted 'sdpa' or 'xformers'"):
        check_backend("flash", torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_real_xformers_equals_sdpa(dtype):
    pytest.importorskip("xformers.ops", reason="comes with psvae[xformers]")
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).cuda()
    model, ids = tiny_model().to("cuda", dtype), words().cuda()
    x, sigma = latents().to("cuda", dtype), sigmas().cuda()
    samples = []
    with torch.no_grad():
        for backend in ("sdpa", "xformers"):
            model.set_attention_backend(backend)
            samples.append([model(x, sigma, input_ids=ids, attention_mask=m).sample for m in (None, mask)])
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    for a, b in zip(*samples, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
