"""Token statistics: closed forms, definitions in fp64, and what the tiled implementation may hold and save."""

from __future__ import annotations

import itertools
import math
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mmpo.kernels.token_stats import MIB, NAMES, TILINGS, Head, Tiling, TokenStats, chosen_backend, token_stats

ALL = frozenset(NAMES)
SMOOTH = NAMES[:4]
BACKENDS = ("reference", "tiled")
RECOMPUTE, KEEP = 0, MIB


def toy(p: list[float], q: list[float] | None = None) -> tuple[Tensor, Head, Tensor | None]:
    """One state and a head whose logits are exactly log p, and a reference's state whose logits are log q."""
    head = Head(torch.eye(len(p), dtype=torch.float64))
    return (
        torch.tensor([p], dtype=torch.float64).log(),
        head,
        None if q is None else torch.tensor([q], dtype=torch.float64).log(),
    )


def inputs(size: int = 7, width: int = 5, vocabulary: int = 23, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """hidden, weight and bias (with gradient), those of a reference, and labels, the last one in the last column."""
    draw = torch.Generator().manual_seed(seed)
    shapes = ((size, width), (vocabulary, width), (vocabulary,))
    policy, ref = ([torch.randn(s, generator=draw, dtype=torch.float64).to(dtype) for s in shapes] for _ in range(2))
    labels = torch.randint(vocabulary, (size,), generator=draw)
    labels[-1:] = vocabulary - 1
    return [x.requires_grad_() for x in policy], ref, labels


def values(stats: TokenStats, names: tuple[str, ...] = NAMES) -> list[Tensor]:
    return [getattr(stats, name) for name in names]


def mixed(stats: TokenStats, names: tuple[str, ...] = SMOOTH) -> Tensor:
    """A scalar in which every row of every differentiable statistic has a coefficient of its own."""
    found = torch.stack([getattr(stats, name) for name in names])
    return (found * torch.linspace(-0.8, 1.1, found.numel(), dtype=found.dtype).view_as(found)).sum()


# values


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_values_of_the_toy(backend: str) -> None:
    hidden, head, ref = toy([0.7, 0.2, 0.1], [0.5, 0.3, 0.2])
    stats = token_stats(hidden, head, torch.tensor([1]), ALL, ref, top_k=2, backend=backend)
    wanted = {"logp": math.log(0.2), "kl_ref": 0.092032850, "kl_policy": 0.085122826, "entropy": 0.801818553}
    wanted |= {"log_sum_p2": -0.616186139, "top_mass": 0.9, "top_entropy": 0.571560043}
    assert {n: float(getattr(stats, n)[0]) for n in NAMES} == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_wanted_is_there(backend: str) -> None:
    hidden, head, ref = toy([0.7, 0.2, 0.1], [0.5, 0.3, 0.2])
    for name in NAMES[1:]:
        stats = token_stats(hidden, head, torch.tensor([0]), {name}, ref, backend=backend)
        assert [n for n in NAMES if getattr(stats, n) is not None] == ["logp", name]


@pytest.mark.parametrize(("softcap", "scale", "keep"), itertools.product((None, 3.0), (1.0, 0.7), (RECOMPUTE, KEEP)))
def test_tiles_equal_the_definition(softcap: float | None, scale: float, keep: int) -> None:
    (hidden, weight, bias), (ref_hidden, ref_weight, ref_bias), labels = inputs()
    found = []
    for backend in BACKENDS:
        heads = Head(weight, bias, softcap, scale), Head(ref_weight, ref_bias, softcap, 1.3)
        stats = token_stats(hidden, heads[0], labels, ALL, ref_hidden, heads[1], 4, backend, Tiling(8 * 7 * 5, keep))
        found.append(values(stats) + list(torch.autograd.grad(mixed(stats), (hidden, weight, bias))))
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("wants", [(), ("kl_ref",), ("kl_policy",), ("entropy",), ("kl_ref", "entropy")])
def test_gradients_of_each_statistic_alone(wants: tuple[str, ...]) -> None:
    """Statistics that nobody wanted leave nothing behind in the gradient."""
    (hidden, weight, bias), (ref_hidden, ref_weight, _), labels = inputs()
    found = []
    for backend in BACKENDS:
        both, tiling = bool(set(wants) & {"kl_ref", "kl_policy"}), Tiling(8 * 7 * 5, 0)
        ref = ref_hidden if both else None, Head(ref_weight) if both else None
        stats = token_stats(hidden, Head(weight, bias), labels, set(wants), ref[0], ref[1], backend=backend, tiling=tiling)
        found.append(torch.autograd.grad(mixed(stats, ("logp", *wants)), (hidden, weight, bias)))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck_with_every_output_mixed(softcap: float | None) -> None:
    (hidden, weight, bias), (ref_hidden, ref_weight, ref_bias), labels = inputs(3, 2, 11)

    def outputs(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        heads = Head(weight, bias, softcap, 0.8), Head(ref_weight, ref_bias, softcap)
        stats = token_stats(
            hidden, heads[0], labels, set(SMOOTH), ref_hidden, heads[1], backend="tiled", tiling=Tiling(8 * 3 * 4, 0)
        )
        return (*values(stats, SMOOTH), mixed(stats) ** 2)

    assert torch.autograd.gradcheck(outputs, (hidden, weight, bias))


@settings(max_examples=12)
@given(tile=st.integers(8, 8 * 7 * 30), keep=st.sampled_from([RECOMPUTE, KEEP]))
def test_the_size_of_a_tile_changes_nothing(tile: int, keep: int) -> None:
    (hidden, weight, bias), (ref_hidden, ref_weight, ref_bias), labels = inputs(dtype=torch.float32)
    found = []
    for tiling in (Tiling(tile, keep), TILINGS["cpu"]):
        stats = token_stats(hidden, Head(weight, bias), labels, ALL, ref_hidden, Head(ref_weight, ref_bias), tiling=tiling)
        found.append(values(stats) + list(torch.autograd.grad(mixed(stats), (hidden, weight, bias))))
    torch.testing.assert_close(*found, rtol=1e-6, atol=3e-6)


def test_several_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    (hidden, weight, bias), (ref_hidden, _, _), labels = inputs()
    found = []
    for rows in (3, 1024):
        monkeypatch.setitem(sys.modules["mmpo.kernels.stats_tiled"].MAX_ROWS, "cpu", rows)
        stats = token_stats(hidden, Head(weight, bias), labels, ALL, ref_hidden, backend="tiled", tiling=Tiling(240, 0))
        found.append(values(stats) + list(torch.autograd.grad(mixed(stats), (hidden, weight, bias))))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-13)


def test_rows_do_not_know_of_each_other() -> None:
    (hidden, weight, _), (ref_hidden, _, _), labels = inputs(9)
    order, tiling = torch.randperm(9, generator=torch.Generator().manual_seed(1)), Tiling(400, 0)
    whole = values(token_stats(hidden, Head(weight), labels, ALL, ref_hidden, tiling=tiling))
    shuffled = values(token_stats(hidden[order], Head(weight), labels[order], ALL, ref_hidden[order], tiling=tiling))
    first = values(token_stats(hidden[:4], Head(weight), labels[:4], ALL, ref_hidden[:4], tiling=tiling))
    for all_rows, other, part in zip(whole, shuffled, first, strict=True):
        torch.testing.assert_close(all_rows[order], other, rtol=0, atol=1e-12)
        torch.testing.assert_close(all_rows[:4], part, rtol=0, atol=1e-12)


def test_equal_inputs_give_equal_bits() -> None:
    found = []
    for _ in range(2):
        (hidden, weight, bias), (ref_hidden, _, _), labels = inputs(40, 16, 500, torch.float32)
        stats = token_stats(hidden, Head(weight, bias), labels, ALL, ref_hidden, tiling=Tiling(4 * 40 * 33, 0))
        found.append([*values(stats), *torch.autograd.grad(mixed(stats), (hidden, weight, bias))])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


# precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_against_fp64_and_against_plain_code(dtype: torch.dtype) -> None:
    """Bounds of their own, and no worse than log_softmax over full logits of the same dtype."""
    (hidden, weight, bias), (ref_hidden, ref_weight, _), labels = inputs(64, 48, 1500, dtype)
    with torch.no_grad():
        for x in (hidden, weight, ref_hidden, ref_weight):
            x.mul_(0.5)

    def run(backend: str, to: torch.dtype) -> list[Tensor]:
        h, w, b = (x.detach().to(to).requires_grad_() for x in (hidden, weight, bias))
        heads, tiling = (Head(w, b), Head(ref_weight.to(to))), Tiling(4 * 64 * 100, 0)
        stats = token_stats(h, heads[0], labels, set(SMOOTH), ref_hidden.to(to), heads[1], backend=backend, tiling=tiling)
        return values(stats, SMOOTH) + list(torch.autograd.grad(mixed(stats), (h, w, b)))

    def plain() -> list[Tensor]:
        h, w, b = (x.detach().requires_grad_() for x in (hidden, weight, bias))
        log_p, log_q = (h @ w.T + b).log_softmax(-1), (ref_hidden @ ref_weight.T).log_softmax(-1)
        p, q = log_p.exp(), log_q.exp()
        kl_ref, kl_policy = (q * (log_q - log_p)).sum(-1), (p * (log_p - log_q)).sum(-1)
        stats = TokenStats(log_p.gather(1, labels[:, None])[:, 0], kl_ref, kl_policy, -(p * log_p).sum(-1))
        return values(stats, SMOOTH) + list(torch.autograd.grad(mixed(stats), (h, w, b)))

    exact, ours, naive = run("reference", torch.float64), run("tiled", dtype), plain()
    for number, (wanted, found, same_dtype) in enumerate(zip(exact, ours, naive, strict=True)):
        error, allowed = (float((x.detach() - wanted.detach()).norm() / wanted.detach().norm()) for x in (found, same_dtype))
        assert error <= (1e-5 if dtype == torch.float32 or number < 4 else 1e-2)
        assert error <= allowed + 1e-6
    if dtype == torch.float32:
        torch.testing.assert_close(ours[0].double(), exact[0], rtol=0, atol=2e-5)
        for found, wanted in zip(ours[1:4], exact[1:4], strict=True):
            torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


def test_halves_give_fp32_statistics_and_gradients_of_their_own_dtype() -> None:
    (hidden, weight, bias), _, labels = inputs(dtype=torch.bfloat16)
    stats = token_stats(hidden, Head(weight, bias), labels, {"entropy"})
    assert stats.logp.dtype == torch.float32 and stats.entropy is not None and stats.entropy.dtype == torch.float32
    assert [g.dtype for g in torch.autograd.grad(mixed(stats, ("logp", "entropy")), (hidden, weight, bias))] == 3 * [
        torch.bfloat16
    ]


def test_autocast_rounds_operands_as_a_linear_layer_would() -> None:
    (hidden, weight, _), _, labels = inputs(30, 16, 50, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = token_stats(hidden, Head(weight), labels, tiling=Tiling(4 * 30 * 8, 0)).logp
    rounded = token_stats(hidden.bfloat16().float(), Head(weight.bfloat16().float()), labels, backend="reference").logp
    torch.testing.assert_close(found, rounded, rtol=0, atol=1e-5)
    unrounded = token_stats(hidden, Head(weight), labels).logp
    assert not torch.allclose(rounded, unrounded, rtol=0, atol=1e-3)
    gradient = torch.autograd.grad(found.sum(), weight)[0]
    assert gradient.dtype == torch.float32 and bool(gradient.abs().sum() > 0)


@settings(max_examples=12)
@given(seed=st.integers(0, 2**31), spread=st.floats(1e-3, 30), distance=st.floats(0, 3))
def test_divergences_are_never_negative_and_zero_for_equal_models(seed: int, spread: float, distance: float) -> None:
    (hidden, weight, bias), (other, _, _), labels = inputs(dtype=torch.float32, seed=seed)
    hidden, head, tiling = spread * hidden.detach(), Head(weight, bias), Tiling(4 * 7 * 3, 0)
    for ref, exactly in ((hidden + distance * other, False), (hidden.clone(), True)):
        stats = token_stats(hidden, head, labels, {"kl_ref", "kl_policy"}, ref, tiling=tiling)
        for found in values(stats, ("kl_ref", "kl_policy")):
            assert bool((found >= 0).all()) and (not exactly or bool((found == 0).all()))


# the reference


def test_one_head_for_both_models_is_the_same_as_two_and_gets_the_policys_gradient_alone() -> None:
    (hidden, weight, bias), (ref_hidden, _, _), labels = inputs()
    ref_hidden.requires_grad_()
    found = []
    for ref_head in (None, Head(weight, bias), Head(weight.detach().clone(), bias.detach().clone())):
        stats = token_stats(hidden, Head(weight, bias), labels, ALL, ref_hidden, ref_head, tiling=Tiling(8 * 7 * 5, 0))
        assert torch.autograd.grad(mixed(stats), ref_hidden, allow_unused=True, retain_graph=True) == (None,)
        found.append(values(stats) + list(torch.autograd.grad(mixed(stats), (hidden, weight, bias))))
    for first, *others in zip(*found, strict=True):
        assert all(torch.equal(first, other) for other in others)


def test_a_reference_may_be_wider_but_must_have_the_same_vocabulary() -> None:
    (hidden, weight, _), _, labels = inputs()
    _, (ref_hidden, ref_weight, _), _ = inputs(width=8, seed=1)
    stats = [token_stats(hidden, Head(weight), labels, ALL, ref_hidden, Head(ref_weight), backend=b) for b in BACKENDS]
    torch.testing.assert_close(values(stats[0]), values(stats[1]), rtol=1e-12, atol=1e-13)
    with pytest.raises(ValueError, match="one vocabulary, but the policy has 23 tokens and the reference 22"):
        token_stats(hidden, Head(weight), labels, {"kl_ref"}, ref_hidden, Head(ref_weight[:22]))
    with pytest.raises(ValueError, match=r"ref_hidden: expected \(7, 5\), got \(7, 8\)"):
        token_stats(hidden, Head(weight), labels, {"kl_ref"}, ref_hidden)
    with pytest.raises(ValueError, match="kl_policy: needs ref_hidden"):
        token_stats(hidden, Head(weight), labels, {"kl_policy"})


# edges


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend: str) -> None:
    (hidden, weight, bias), (ref_hidden, _, _), labels = inputs(0)
    stats = token_stats(hidden, Head(weight, bias), labels, ALL, ref_hidden, backend=backend)
    assert all(v.shape == (0,) for v in values(stats))
    total = stats.logp.sum() + stats.kl_ref.sum()  # type: ignore[union-attr]
    gradients = torch.autograd.grad(total, (hidden, weight, bias))
    assert [tuple(g.shape) for g in gradients] == [(0, 5), (23, 5), (23,)] and not any(g.any() for g in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tokens_taken_out_of_the_vocabulary(dtype: torch.dtype) -> None:
    """-inf in the bias: as if the columns did not exist, also where they fill the first tiles."""
    (hidden, weight, bias), (ref_hidden, _, _), labels = inputs(dtype=dtype)
    out = torch.tensor([0, 1, 2, 3, 4, 5, 6, 20])
    left = torch.tensor([v for v in range(23) if v not in out])
    masked = bias.detach().clone().index_fill(0, out, -torch.inf).requires_grad_()
    place = torch.arange(7) * 2
    stats = token_stats(hidden, Head(weight, masked), left[place], ALL, ref_hidden, tiling=Tiling(dtype.itemsize * 7 * 3, 0))
    found = values(stats) + list(torch.autograd.grad(mixed(stats), (hidden, weight, masked)))
    wanted_stats = token_stats(hidden, Head(weight[left], bias[left]), place, ALL, ref_hidden, backend="reference")
    wanted = values(wanted_stats) + list(torch.autograd.grad(mixed(wanted_stats), (hidden, weight, bias)))
    for ours, exact in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)
    impossible = token_stats(hidden[:1], Head(weight, masked), out[:1], {"kl_ref"}, ref_hidden[:1], Head(weight))
    assert impossible.logp.item() == -torch.inf and impossible.kl_ref is not None and impossible.kl_ref.item() == torch.inf


def test_fewer_tokens_than_top_k_and_a_vocabulary_of_one() -> None:
    hidden, head, _ = toy([0.7, 0.2, 0.1])
    stats = token_stats(hidden, head, torch.tensor([0]), ALL - {"kl_ref", "kl_policy"}, top_k=10)
    assert stats.top_mass is not None and stats.top_mass.item() == pytest.approx(1)
    torch.testing.assert_close(stats.top_entropy, stats.entropy)
    one = token_stats(torch.ones(2, 3), Head(torch.ones(1, 3)), torch.zeros(2, dtype=torch.int64), {"entropy", "top_mass"})
    assert one.logp.tolist() == [0, 0] and one.entropy is not None and one.entropy.tolist() == [0, 0]


def test_statistics_without_gradient_are_detached_and_nothing_is_recorded_without_grad() -> None:
    (hidden, weight, _), _, labels = inputs()
    stats = token_stats(hidden, Head(weight), labels, ALL - {"kl_ref", "kl_policy"})
    assert [getattr(stats, n).requires_grad for n in ("logp", "entropy", *NAMES[4:])] == [True, True, False, False, False]
    with torch.no_grad():
        assert not token_stats(hidden, Head(weight), labels).logp.requires_grad


def test_a_frozen_head_gets_no_gradient_and_no_product_for_it() -> None:
    (hidden, weight, bias), _, labels = inputs(40, 16, 300, torch.float32)
    counted = []
    for head in (Head(weight, bias), Head(weight.detach(), bias.detach())):
        with FlopCounterMode(display=False) as counter:
            token_stats(hidden, head, labels, tiling=Tiling(4 * 40 * 64, 0)).logp.sum().backward()
        counted.append(counter.get_total_flops() / (2 * 40 * 16 * 300))
    assert counted == [4, 3]  # forward, again, to the states, and to the weight only if it wants one
    with FlopCounterMode(display=False) as counter:
        token_stats(hidden, Head(weight.detach()), labels).logp.sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 40 * 16 * 300  # kept logits are not computed again


def test_two_backward_passes_through_kept_logits() -> None:
    (hidden, weight, _), _, labels = inputs()
    loss = token_stats(hidden, Head(weight), labels, tiling=Tiling(1000, KEEP)).logp.sum()
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    assert all(torch.equal(*pair) for pair in zip(first, torch.autograd.grad(loss, (hidden, weight)), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([0, -100])}, r"labels: expected token ids in \[0, 4\), got -100 to 0; pass scored rows only"),
        ({"labels": torch.tensor([0, 4])}, "got 0 to 4"),
        ({"labels": torch.tensor([0])}, "labels: expected 2 int64"),
        ({"labels": torch.tensor([0, 1], dtype=torch.int32)}, "torch.int32"),
        ({"hidden": torch.ones(1, 2, 3)}, r"hidden: expected \(T, D\)"),
        ({"head": Head(torch.ones(4, 5))}, r"got \(2, 3\) and \(4, 5\)"),
        ({"head": Head(torch.ones(4, 3), torch.ones(3))}, r"head.bias: expected \(4,\), got \(3,\)"),
        ({"head": Head(torch.ones(4, 3), softcap=0.0)}, "head.softcap: expected a positive number"),
        ({"wants": {"entropie"}}, "wants: unknown entropie"),
        ({"top_k": 0}, "top_k: expected at least 1"),
        ({"backend": "cuda"}, "backend: expected one of auto, reference, tiled, triton, got 'cuda'"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"hidden": torch.ones(2, 3), "head": Head(torch.ones(4, 3)), "labels": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match=message):
        token_stats(**(given | change))


def test_the_cpu_takes_tiles() -> None:
    assert chosen_backend("auto", torch.ones(1, 1)) == "tiled"


# memory


class Living(TorchDispatchMode):
    """Bytes of tensors made under it that are alive, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.peak, self.known = 0, 0, weakref.WeakSet[Any]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in known and x.untyped_storage() not in self.known:
                size = x.untyped_storage().nbytes()
                self.known.add(x.untyped_storage())
                self.bytes += size
                self.peak = max(self.peak, self.bytes)
                weakref.finalize(x.untyped_storage(), self._gone, size)
        return out

    def _gone(self, size: int) -> None:
        self.bytes -= size


def test_the_counter_of_living_bytes_counts() -> None:
    with Living() as living:
        kept = torch.zeros(1000)
        for _ in range(3):
            kept.add_(torch.ones(1000)).view(10, 100).mul_(2)
        assert (living.bytes, living.peak) == (4000, 8000)


@pytest.mark.parametrize("models", [1, 2])
@pytest.mark.parametrize(("size", "vocabulary", "dtype"), [(1100, 4000, torch.float32), (9, 420_000, torch.bfloat16)])
def test_the_workspace_is_bounded(models: int, size: int, vocabulary: int, dtype: torch.dtype) -> None:
    (hidden, weight, bias), (ref_hidden, _, _), labels = inputs(size, 8, vocabulary, dtype)
    wants = ALL if models == 2 else ALL - {"kl_ref", "kl_policy"}
    args: dict[str, Any] = {"ref_hidden": ref_hidden if models == 2 else None, "tiling": Tiling(TILINGS["cuda"].tile, 0)}
    bound = models * 64 * MIB
    with Living() as living:
        stats = token_stats(hidden, Head(weight, bias, 5.0), labels, wants, **args)
        assert living.peak <= bound
        loss = mixed(stats, SMOOTH if models == 2 else ("logp", "entropy"))
        living.peak = living.bytes
        loss.backward()
        gradients = sum(x.nbytes for x in (hidden, weight, bias)) + 4 * (hidden.numel() + bias.numel())
        assert living.peak <= bound + gradients


@pytest.mark.parametrize("keep", [RECOMPUTE, 2 * 4 * 40 * 600 - 1, 2 * 4 * 40 * 600])
def test_what_is_saved_for_the_backward_pass(keep: int) -> None:
    """Inputs and a few numbers per row; logits of both models only if all of them fit into the bytes to keep."""
    (hidden, weight, bias), (ref_hidden, ref_weight, _), labels = inputs(40, 8, 600, torch.float32)
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        token_stats(hidden, Head(weight, bias), labels, ALL, ref_hidden, Head(ref_weight), tiling=Tiling(4 * 40 * 50, keep))
    given = {x.data_ptr() for x in (hidden, weight, bias, ref_hidden, ref_weight, labels)}
    made = sorted(x.numel() for x in saved if x.data_ptr() not in given)
    assert made == ([4 * 40] if keep < 2 * 4 * 40 * 600 else [4 * 40, 40 * 600, 40 * 600])


def test_no_tensor_of_all_logits_is_made() -> None:
    class Largest(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            self.largest = max([self.largest, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))])
            return out

    (hidden, weight, bias), (ref_hidden, _, _), labels = inputs(64, 8, 512, torch.float32)
    with Largest() as seen:
        mixed(token_stats(hidden, Head(weight, bias), labels, ALL, ref_hidden, tiling=Tiling(4 * 64 * 64, 0))).backward()
    assert seen.largest == 64 * 64  # a tile, as large as the weight's gradient
