"""Which call receives what was sent in which; runs, and what is refused."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxTransformer2DModel
from patched import MODES, call, error, model, patches, run

from diffaccel.errors import OptionError
from diffaccel.parallel.layers import Post
from diffaccel.parallel.mail import About
from diffaccel.parallel.patch import PatchHook
from diffaccel.parallel.patch_arguments import arguments
from diffaccel.parallel.patch_settings import Settings
from diffaccel.parallel.plan import Group
from diffaccel.parallel.protocol import SoloWorld, WorldError
from diffaccel.parallel.world_emulated import EmulatedWorld
from diffaccel.testing.pipelines import build, denoiser


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


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
