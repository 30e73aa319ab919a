"""Denoisers that are shared by ranks, against the same denoiser in one process."""

from __future__ import annotations

import functools

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel, UNet2DModel

from diffaccel.errors import OptionError
from diffaccel.parallel import layers
from diffaccel.parallel.layers import Post
from diffaccel.parallel.mail import About
from diffaccel.parallel.patch import PatchHook
from diffaccel.parallel.patch_arguments import arguments
from diffaccel.parallel.patch_cost import costs
from diffaccel.parallel.patch_settings import Settings
from diffaccel.parallel.plan import Group
from diffaccel.parallel.protocol import SoloWorld, WorldError
from diffaccel.parallel.world_emulated import EmulatedWorld
from diffaccel.testing.pipelines import build, denoiser

patches = functools.partial(Settings, guidance="patches")  # a batch of two would be split between two ranks
MODELS = ("sd15", "sdxl", "ddpm", "old_ddpm", "sd3", "sd35", "flux")
MODES = ("displaced", "partial", "fresh_halo")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@functools.cache
def model(name: str) -> torch.nn.Module:
    """A tiny denoiser in which no parameter is a trivial zero or one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "old_ddpm":  # pads at the bottom and on the right alone, and normalises tokens
            found = UNet2DModel(
                16,
                3,
                3,
                down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                up_block_types=("AttnUpBlock2D", "UpBlock2D"),
                block_out_channels=(8, 16),
                layers_per_block=1,
                norm_num_groups=4,
                attention_head_dim=4,
                downsample_padding=0,
            )
        elif name == "sd35":  # a second attention, of image tokens alone
            sizes = {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 16}
            found = SD3Transformer2DModel(
                sample_size=16,
                patch_size=2,
                in_channels=4,
                out_channels=4,
                caption_projection_dim=16,
                pooled_projection_dim=16,
                dual_attention_layers=(0,),
                qk_norm="rms_norm",
                **sizes,
            )
        else:
            found = denoiser(build(name))
        for part in found.modules():
            if isinstance(part, (torch.nn.GroupNorm, torch.nn.LayerNorm)) and part.weight is not None:
                torch.nn.init.normal_(part.weight)
                torch.nn.init.normal_(part.bias)
    return found.eval().requires_grad_(False)


def call(shared: torch.nn.Module, height: int, width: int, batch: int, time: float = 1.0, seed: int = 0):
    given = arguments(shared, height, width, batch, 7, seed=seed)
    given["timestep"] = given["timestep"] * time
    return shared(**given, return_dict=False)[0]


def run(name, ranks, settings, times=(1.0,), size=(16, 12), batch=2, seeds=None, world=None):
    """Outputs of a chain of calls, and the world."""
    world = world or EmulatedWorld(ranks, timeout=20)
    hook = PatchHook(world, settings)
    hook.attach(model(name))
    try:
        return [call(model(name), *size, batch, t, (seeds or [0] * len(times))[i]) for i, t in enumerate(times)], world
    finally:
        hook.detach(model(name))


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference, in units of the largest output."""
    return float((got - want).abs().max() / want.abs().max())


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
@pytest.mark.parametrize("name", ["sd15", "ddpm", "sd3", "flux"])
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("mode, options", [("displaced", {}), ("displaced", {"gn": "stale"}), ("fresh_halo", {})])
def test_late_messages_are_exact_where_nothing_moves(name, ranks, mode, options):
    """The timestep moves by so little that the model does not notice."""
    if options and name in ("sd3", "flux"):
        pytest.skip("no group normalisation")
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


# ---------------------------------------------------------------------- which call receives what
class _Numbers(SoloWorld):
    """Rank 0 of two; what comes from rank 1 is the number of the message."""

    size = 2

    def __init__(self):
        super().__init__()
        self.sent = 0

    def send(self, about, parts, shapes, like):
        self.sent += 1
        return _Numbered(self.sent)


class _Numbered:
    def __init__(self, number):
        self.number = number

    def wait(self):
        assert self.number is not None, "received twice"
        number, self.number = self.number, None
        return [None, torch.tensor(number)]


def _received(lates, remembers=1):
    post, found = Post(_Numbers(), Group(0, 2), remembers), []
    for late in lates:
        about = About("attn", "layer", len(found))
        got = post.swap(about, [None, None], [None, ()], torch.zeros(()), late=late, keep=True)
        older = post.older(about) if late else None
        found.append((int(got[1]), None if older is None else int(older[1])))
    return found, post


def test_a_late_call_receives_what_was_sent_in_the_call_before():
    found, post = _received([False, False, True, True, True, False, True])
    assert [n for n, _ in found] == [1, 2, 2, 3, 4, 6, 6]
    assert len(post.pending) == 1
    post.drain()
    assert not post.pending
    found, _ = _received([False, False, True, True, False], remembers=2)
    assert found == [(1, None), (2, None), (2, 1), (3, 2), (5, None)]


@pytest.fixture
def decisions():
    """A hook whose calls are only written down: (branch, number in it, late)."""
    log, hook = [], PatchHook(EmulatedWorld(2), Settings("displaced", warmup=2, guidance="patches"), lambda: log.run)

    class Log(list):
        run = object()

    log = Log()

    def part(group, given, branch, late, step):
        if group.rank == 0:
            name = next(k for k, b in hook._branches.items() if b is branch)
            log.append((name, len(branch.times) - 1, late))
        return (given["sample"],)

    hook.attach(model("sd15"))
    hook._part = part
    yield hook, log
    hook.detach(model("sd15"))


def test_calls_are_late_after_the_warm_up_and_never_across_runs(decisions):
    hook, log = decisions
    for t in (1.0, 0.9, 0.8, 0.7):
        call(model("sd15"), 16, 12, 2, t)
    assert log == [("0", 0, False), ("0", 1, False), ("0", 2, True), ("0", 3, True)]
    log.clear()
    call(model("sd15"), 16, 12, 2, 0.8)  # the noise rises
    assert hook.tally.calls == 1
    call(model("sd15"), 16, 12, 1, 0.7)  # another batch
    log.run = object()  # another run, that happens to begin below
    call(model("sd15"), 16, 12, 1, 0.6)
    assert log == [("0", 0, False)] * 3


def test_two_calls_at_one_timestep_are_two_branches(decisions):
    _, log = decisions
    for t in (1.0, 0.9, 0.8):
        for _ in range(2):
            call(model("sd15"), 16, 12, 2, t)
    assert log == [(b, n, n > 1) for n in range(3) for b in ("0", "1")]


def test_branches_with_a_name_go_by_it(decisions):
    hook, log = decisions

    class Named:
        def __init__(self, name):
            self.name = name

    for t, order in ((1.0, "ab"), (0.9, "ba"), (0.8, "a")):
        for name in order:
            hook.context.set_context(Named(name))
            call(model("sd15"), 16, 12, 2, t)
    hook.context.set_context(None)
    assert log == [("a", 0, False), ("b", 0, False), ("b", 1, False), ("a", 1, False), ("a", 2, True)]


# ---------------------------------------------------------------------- runs
@pytest.mark.parametrize("mode", MODES)
def test_a_second_run_and_one_after_an_interruption_are_the_same(mode):
    world, settings = EmulatedWorld(3, timeout=20), patches(mode, warmup=1)
    hook = PatchHook(world, settings)
    hook.attach(model("sd15"))
    times, seeds = [1.0, 0.8, 0.6], [0, 1, 2]
    chain = lambda n: [call(model("sd15"), 16, 12, 2, t, s) for t, s in zip(times[:n], seeds)]  # noqa: E731
    first, _, second = chain(3), chain(2), chain(3)
    hook.detach(model("sd15"))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert not world._box, "messages were left behind"


def test_removing_the_hooks_leaves_no_trace():
    shared = model("sdxl")
    want, keys = call(shared, 16, 12, 2), list(shared.state_dict())
    hook = PatchHook(EmulatedWorld(2, timeout=20), patches("sync"))
    hook.attach(shared)
    assert list(shared.state_dict()) == keys
    hook.detach(shared)
    assert torch.equal(call(shared, 16, 12, 2), want)
    assert not any(hasattr(m, "_diffusers_hook") or "forward" in vars(m) for m in shared.modules())


# ---------------------------------------------------------------------- what is refused, and what fails
def test_attention_that_passes_by_is_found_out():
    shared = denoiser(build("sd3"))

    class Bare:
        """Joint attention without torch's scaled_dot_product_attention."""

        def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
            return hidden_states, encoder_hidden_states

    shared.transformer_blocks[0].attn.set_processor(Bare())
    hook = PatchHook(EmulatedWorld(2, timeout=10), patches("sync"))
    hook.attach(shared)
    with pytest.raises(WorldError, match=r"1 of 3 layers did not exchange .*transformer_blocks\.0\.attn"):
        call(shared, 16, 16, 1)
    with pytest.raises(WorldError, match="failed"):  # the world is closed
        call(shared, 16, 16, 1)


def test_models_and_layers_that_are_not_known_are_refused():
    with pytest.raises(OptionError, match=r"PixArtTransformer2DModel.*Known: FluxTransformer2DModel"):
        PatchHook(EmulatedWorld(2), Settings()).attach(denoiser(build("pixart")))
    changed = denoiser(build("sd15"))
    changed.mid_block.resnets[0].norm1 = torch.nn.InstanceNorm2d(16)
    with pytest.raises(OptionError, match=r"mid_block\.resnets\.0\.norm1 is a InstanceNorm2d"):
        PatchHook(EmulatedWorld(2), Settings()).attach(changed)
    changed = denoiser(build("sd15"))
    changed.conv_out.padding_mode = "reflect"
    with pytest.raises(OptionError, match="conv_out is a Conv2d"):
        PatchHook(EmulatedWorld(2), Settings()).attach(changed)


def test_too_many_ranks_are_refused_before_anything_is_sent():
    world = EmulatedWorld(4, timeout=5)
    with pytest.raises(OptionError, match="6 rows cannot be shared among 4 ranks"):
        run("sd15", 4, patches("sync"), size=(6, 8), world=world)
    world.check()  # still alive


def test_a_split_that_cannot_be_is_refused():
    with pytest.raises(OptionError, match="2 ranks and a batch of 1"):
        run("sd15", 2, Settings("sync", guidance="split"), batch=1)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"mode": "synk"}, "Did you mean 'sync'"),
        ({"mode": "sync", "warmup": 2}, "warmup has no effect with mode='sync'"),
        ({"mode": "displaced", "ratio": 0.3}, "ratio has no effect"),
        ({"mode": "displaced", "extrapolate": True}, "extrapolate has no effect"),
        ({"mode": "fresh_halo", "gn": "stale"}, "gn has no effect"),
        ({"mode": "partial", "ratio": 0.0}, r"in \(0, 1\]"),
        ({"mode": "displaced", "warmup": 0}, "1 or more"),
        ({"guidance": "both"}, "unknown guidance"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, said):
    with pytest.raises(OptionError, match=said):
        Settings(**options)


def test_an_error_in_one_rank_is_the_error_of_all():
    shared = denoiser(build("sd15"))
    world = EmulatedWorld(3, timeout=20)

    def broken(module, args):
        if world.rank == 1:
            raise MemoryError("full")

    shared.mid_block.register_forward_pre_hook(broken)
    hook = PatchHook(world, patches("sync"))
    hook.attach(shared)
    with pytest.raises(MemoryError, match="full"):
        call(shared, 16, 12, 1)
    with pytest.raises(WorldError, match="rank 1 failed: MemoryError: full"):
        world.check()


def test_a_rank_that_does_not_send_is_named_in_time():
    world = EmulatedWorld(2, timeout=0.2)

    def rank(r):
        if r == 0:
            world.send(About("attn", "mid", 3), [None, None], [None, (1,)], torch.zeros(1)).wait()

    with pytest.raises(WorldError, match=r"rank 0 waited 0 s for rank 1 \(attn, mid, call 3\)"):
        world.run(rank)


def test_flux_and_sd3_take_the_residuals_of_a_controlnet():
    for name, argument in (("flux", "controlnet_block_samples"), ("sd3", "block_controlnet_hidden_states")):
        shared = model(name)
        width = 32
        given = arguments(shared, 16, 12, 1, 7)
        tokens = given["hidden_states"].shape[1] if isinstance(shared, FluxTransformer2DModel) else 16 * 12
        given[argument] = [torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(1))]
        want = shared(**given).sample
        hook = PatchHook(EmulatedWorld(3, timeout=20), patches("sync"))
        hook.attach(shared)
        got = shared(**given).sample
        hook.detach(shared)
        assert error(got, want) < 1e-5
        assert error(shared(**{**given, argument: None}).sample, want) > 1e-3
