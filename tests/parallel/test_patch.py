"""Denoisers that are shared by ranks, against the same denoiser in one process; and what they send."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from patched import MODELS, MODES, call, error, model, patches, run

from diffaccel.parallel import layers
from diffaccel.parallel.layers import Post
from diffaccel.parallel.patch import PatchHook
from diffaccel.parallel.patch_arguments import arguments
from diffaccel.parallel.patch_cost import costs
from diffaccel.parallel.patch_settings import Settings
from diffaccel.parallel.plan import Group
from diffaccel.parallel.world_emulated import EmulatedWorld


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


# ---------------------------------------------------------------------- synchronous calls are exact
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_synchronous_call_equals_one_process(name, ranks):
    odd = (16, 12) if "ddpm" in name else (17, 11)  # UNet2DModel itself takes no odd sizes
    for size, batch in (((16, 16), 1), (odd, 3)):
        want = call(model(name), *size, batch)
        got, _ = run(name, ranks, patches("sync"), size=size, batch=batch)
        assert error(got[0], want) < 1e-5


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3"])
@pytest.mark.parametrize("ranks", [2, 4, 6])
def test_splitting_the_batch_equals_one_process(name, ranks):
    want = call(model(name), 16, 12, 2)
    got, world = run(name, ranks, Settings("sync", guidance="split"))
    assert error(got[0], want) < 1e-5
    if ranks == 2:
        assert set(world.traffics[0].bytes) == {"out"}


def _alone(seat, key, value):
    seat.swap("attn", [None] * seat.ranks, [None] * seat.ranks, key)
    return key, value


def _noisy(seat, key, value, exact=layers.everybodys):
    n = key.shape[2]
    key, value = exact(seat, key, value)
    noise = torch.randn(key.shape, generator=torch.Generator().manual_seed(0)) * 0.1
    noise[:, :, :n] = 0
    return key + noise, value


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux"])
@pytest.mark.parametrize("broken", [_alone, _noisy])
def test_without_the_others_keys_it_does_not(name, broken, monkeypatch):
    want = call(model(name), 16, 16, 1)
    monkeypatch.setattr(layers, "everybodys", broken)
    got, _ = run(name, 2, patches("sync"), size=(16, 16), batch=1)
    assert error(got[0], want) > 1e-4


def test_without_the_others_rows_or_statistics_it_does_not(monkeypatch):
    want = call(model("sd15"), 16, 16, 1)
    asked = layers.ConvHook._asked
    zero = staticmethod(lambda *a: [x if x is None else x * 0 for x in asked(*a)])
    swapped = staticmethod(lambda seat, x, top, bottom: asked(seat, x.flip(2), top, bottom))
    for broken in (zero, swapped):
        with monkeypatch.context() as patch:
            patch.setattr(layers.ConvHook, "_asked", broken)
            assert error(run("sd15", 2, patches("sync"), size=(16, 16), batch=1)[0][0], want) > 1e-3
    monkeypatch.setattr(layers, "_merged", lambda stats: (stats[0][0], stats[0][1]))
    assert error(run("sd15", 2, patches("sync"), size=(16, 16), batch=1)[0][0], want) > 1e-3


# ---------------------------------------------------------------------- late calls
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(
    "name, mode, options",
    [
        *((name, mode, {}) for name in ("sd15", "ddpm", "sd3", "flux") for mode in ("displaced", "fresh_halo")),
        *((name, "displaced", {"gn": "stale"}) for name in ("sd15", "ddpm")),
    ],
)
def test_late_messages_are_exact_where_nothing_moves(name, ranks, mode, options):
    """The timestep moves by so little that the model does not notice."""
    times = [1.0 - 1e-6 * i for i in range(4)]
    want = call(model(name), 16, 12, 2)
    got, _ = run(name, ranks, patches(mode, warmup=1, **options), times)
    assert max(error(x, want) for x in got) < 3e-5


@pytest.mark.parametrize("name", ["sd15", "sd3"])
@pytest.mark.parametrize("mode", MODES)
def test_the_warm_up_is_synchronous_and_what_follows_is_not(name, mode):
    times, seeds = [1.0, 0.8, 0.6, 0.4], [0, 1, 2, 3]
    exact, _ = run(name, 3, patches("sync"), times, seeds=seeds)
    late, _ = run(name, 3, patches(mode, warmup=2), times, seeds=seeds)
    assert all(torch.equal(a, b) for a, b in zip(exact[:2], late[:2]))
    assert all(error(a, b) > 1e-4 for a, b in zip(exact[2:], late[2:]))


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_partial_with_all_tokens_on_two_ranks_is_displaced(name):
    times, seeds = [1.0, 0.8, 0.6, 0.4], [0, 1, 2, 3]
    whole, _ = run(name, 2, patches("displaced", warmup=1), times, seeds=seeds)
    partial, _ = run(name, 2, patches("partial", ratio=1.0, warmup=1), times, seeds=seeds)
    some, _ = run(name, 2, patches("partial", ratio=0.3, warmup=1), times, seeds=seeds)
    assert all(torch.equal(a, b) for a, b in zip(whole, partial))
    assert not torch.equal(whole[2], some[2])


def test_extrapolation_follows_a_straight_line_exactly():
    """Keys that move in proportion to the timestep: late and extrapolated they are the present ones."""
    seen = []

    class Line(layers.Seat):
        pass

    world = EmulatedWorld(2, timeout=5)

    def rank(r: int) -> None:
        post = Post(world, Group(r, 2), remembers=2)
        split = layers.Ranges(8, 2)
        times = [1.0, 0.9, 0.7, 0.65]
        for i, t in enumerate(times):
            step = (t - times[i - 1]) / (times[i - 1] - times[i - 2]) if i > 1 else None
            late = frozenset({"attn"}) if i > 1 else frozenset()
            seat = Line(post, split, i, late, frozenset({"attn"}), step=step, where="layer")
            key, value = layers.everybodys(seat, torch.full((1, 1, 4, 1), t + r), torch.full((1, 1, 4, 1), 2 * t + r))
            if r == 0:
                seen.append((key[0, 0, 4:, 0] - (t + 1), value[0, 0, 4:, 0] - (2 * t + 1)))
        post.drain()

    world.run(rank)
    assert max(float(x.abs().max()) for pair in seen for x in pair) < 1e-6


# ---------------------------------------------------------------------- bytes and memory
@pytest.mark.parametrize("name", ["sd15", "ddpm", "sd3", "flux"])
@pytest.mark.parametrize("mode", ["sync", *MODES])
def test_counted_bytes_and_messages_are_those_of_the_formulas(name, mode):
    for ranks, size, guidance in ((2, (16, 12), "patches"), (4, (18, 10), "patches"), (4, (16, 12), "split")):
        settings = Settings(mode, warmup=None if mode == "sync" else 1, guidance=guidance)
        want = costs(model(name), *size, ranks, settings, batch=2, text=7)
        world, patches = EmulatedWorld(ranks, timeout=20), len(want.bytes)
        hook = PatchHook(world, settings)
        hook.attach(model(name))
        for i, formula in enumerate((want.sync_bytes, want.bytes, want.bytes)):
            before = [dict(t.bytes) for t in world.traffics] if i else [{}] * ranks
            messages = sum(world.traffics[0].messages.values()) if i else 0
            call(model(name), *size, 2, 1 - 0.1 * i)
            new = [{k: n - b.get(k, 0) for k, n in t.bytes.items()} for t, b in zip(world.traffics, before)]
            assert new == [formula[r % patches] for r in range(ranks)]
        assert sum(world.traffics[0].messages.values()) - messages == want.messages
        held = [_held(post) for post in hook._branches["0"].posts.values()]
        assert max(held) <= want.memory and (mode == "partial" or max(held) == want.memory)
        hook.detach(model(name))


def _held(post: Post) -> int:
    """Bytes of keys and values that a rank has received, or is receiving, for the next call."""
    kept = [x for (kind, _), history in post.received.items() if kind == "attn" for parts in history for x in parts]
    found = sum(x.numel() * x.element_size() for x in kept if x is not None)
    for (kind, _), mail in post.pending.items():
        shapes = [s for s in mail._shapes if s is not None] if kind == "attn" else []
        found += sum(torch.Size(s).numel() * 4 for s in shapes)
    return found


def test_partial_on_four_ranks_moves_less_than_a_fifth_of_what_distrifusion_does():
    """Stable Diffusion 1.5 at 512 x 512, counted on shapes alone."""
    with torch.device("meta"):
        shared = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    world = EmulatedWorld(4, "meta", timeout=30)
    hook = PatchHook(world, patches("partial", warmup=1))
    hook.attach(shared)
    given = arguments(shared, 64, 64, 1, 77, "meta")
    for time in (900.0, 800.0):
        before = sum(sum(t.bytes.values()) for t in world.traffics)
        shared(**{**given, "timestep": torch.tensor(time)})
        counted = sum(sum(t.bytes.values()) for t in world.traffics) - before
    hook.detach(shared)
    want = costs(shared, 64, 64, 4, patches("partial"))
    assert counted == sum(sum(d.values()) for d in want.bytes)
    assert counted < 0.2 * sum(sum(d.values()) for d in want.published)
