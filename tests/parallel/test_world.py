"""Ranks: messages, and one named error (never a hang) whatever happens to one of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jobs import outcome

from diffaccel.errors import OptionError
from diffaccel.parallel.agree import differences, same_on_all
from diffaccel.parallel.launch import first_host, slurm_environment
from diffaccel.parallel.world import TRIES, DistWorld, SoloWorld, WorldError, _connected, _unmet
from diffaccel.parallel.world_emulated import EmulatedWorld

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict:
    """What happened to 2 or 3 gloo ranks in each scenario of world_jobs.py."""
    work = tmp_path_factory.mktemp("ranks")
    return outcome(HERE / "world_jobs.py", work, 120)


def test_messages_reach_every_rank(runs):
    assert runs["messages"]["codes"] == [0, 0, 0], runs["messages"]["text"]


def test_ranks_that_were_told_different_things_say_what_and_once(runs):
    found = runs["disagree"]
    assert found["codes"] == [2, 2, 2], found["text"]
    assert "calls: rank 0 has 5, rank 1 has 6" in found["text"]
    assert found["text"].count("do not agree") == 1


@pytest.mark.parametrize("scenario, rank", [("raises", 1), ("host_raises", 0)])
def test_a_rank_that_fails_ends_all_with_one_error(runs, scenario, rank):
    found = runs[scenario]
    assert set(found["codes"]) == {2}, found["text"]
    reports = [line for line in found["text"].splitlines() if line.startswith("REPORT")]  # torch writes there too
    assert reports == [f"REPORT rank {rank}: the disk is full"], found["text"]
    assert found["seconds"] < 30


def test_what_one_rank_cannot_paint_is_said_by_all_when_the_rest_is_made(runs):
    """In Python each rank raises; who ends the world with the error says it once."""
    found = runs["fails"]
    assert found["codes"] == [2, 2, 2], found["text"]
    reports = [line for line in found["text"].splitlines() if line.startswith("REPORT")]
    assert len(reports) == 1 and "2 of 40 images failed; the other 38 are there" in reports[0], found["text"]
    assert "chunk 16 (images 32 to 33; first prompt 'p32', seed 32): the model broke" in reports[0]


def test_a_rank_that_is_killed_ends_all_with_one_error(runs):
    found = runs["dies"]
    assert found["codes"] == [2, -9, 2], found["text"]
    assert found["text"].count("REPORT") == 1
    assert "for rank 1 (last image); rank 1 was last alive" in found["text"]
    assert found["seconds"] < 60


def test_a_rank_that_hangs_ends_all_with_one_error(runs):
    found = runs["hangs"]
    assert found["codes"] == [2, 2], found["text"]
    assert found["text"].count("REPORT") == 1
    assert "REPORT rank 0: rank 0 waited" in found["text"] and "rank 1 is alive but has done nothing" in found["text"]


def test_one_process_needs_no_messages():
    world = SoloWorld()
    assert (world.rank, world.size, world.device.type) == (0, 1, "cpu")
    assert world.gather("x", b"1") == [b"1"]
    assert world.broadcast("x", b"2") == b"2"
    assert world.add("n", 2) == 2 and world.add("n", 3) == 5
    same_on_all(world, "recipe", {"a": 1})
    assert world.abort("over")


def test_an_alone_process_that_cannot_meet_the_others_says_where(tmp_path):
    code = "from diffaccel.parallel.world import open_world; open_world(cpu=True, timeout=1)"
    env = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60, check=False
    )
    assert "WorldError: rank 1 of 2 could not meet the others at 127.0.0.1:9" in done.stderr


def test_a_connection_that_nobody_answers_is_tried_again(monkeypatch):
    tried = []

    def store(host, port, timeout):
        tried.append((host, port, timeout.total_seconds()))
        if len(tried) < answers_at:
            raise torch.distributed.DistNetworkError("timed out")
        return torch.distributed.HashStore()

    monkeypatch.setattr(torch.distributed, "TCPStore", store)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "host", "MASTER_PORT": "9"}.items():
        monkeypatch.setenv(name, value)
    answers_at = TRIES
    assert _connected(6.0).timeout.total_seconds() == 6.0 and tried == [("host", 9, 6.0 / TRIES)] * TRIES
    answers_at, tried[:] = 99, []
    with pytest.raises(WorldError, match=r"rank 1 of 2 could not meet the others at host:9: .*timed out"):
        _connected(6.0)
    assert len(tried) == TRIES


def test_a_process_that_was_not_launched_counts_as_rank_0_of_1(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert str(_unmet(RuntimeError("no store"))).startswith("rank 0 of 1 could not meet the others")


# ---------------------------------------------------------------------- SLURM
def test_slurm_variables_of_a_step():
    env = {
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
        "SLURM_STEP_NODELIST": "gpu[007-009,12]",
        "SLURM_JOB_ID": "123456",
    }
    found = slurm_environment(env)
    assert found == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu007",
        "MASTER_PORT": "23456",
    }
    assert "MASTER_ADDR" not in slurm_environment({**env, "MASTER_ADDR": "elsewhere"})


def test_slurm_is_left_alone_without_a_step_and_under_torchrun():
    assert slurm_environment({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) == {}
    assert slurm_environment({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0", "RANK": "0"}) == {}


@pytest.mark.parametrize(
    "nodes, first",
    [("gpu[007-009,12],login", "gpu007"), ("n3,n4", "n3"), ("rack[1-2]-ib", "rack1-ib"), ("alone", "alone")],
)
def test_first_host(nodes, first):
    assert first_host(nodes) == first


def test_differences_name_the_leaf_and_both_sides():
    left, right = {"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": "x"}
    assert differences(left, right, "L", "R") == ["  a.c: L 2, R 3", '  d: L null, R "x"']
    assert differences(left, left, "L", "R") == []
    assert issubclass(WorldError, RuntimeError)


def test_emulated_ranks_speak_with_one_voice_outside_of_a_run():
    with EmulatedWorld(3) as world:
        assert (world.rank, world.size, world.gather("x", b"1"), world.broadcast("x", b"2")) == (0, 3, [b"1"] * 3, b"2")
        assert world.run(lambda rank: (rank, world.rank, world.add("n", 1)))[2][:2] == (2, 2)
        assert world.add("n", 0) == 3
        world.barrier("over")
        with torch.no_grad():
            assert world.run(lambda rank: torch.is_grad_enabled()) == [False] * 3
    with pytest.raises(OptionError, match="1 rank or more"):
        EmulatedWorld(0)


class Between:
    """A store in which rank 1, when first looked for, has said nothing; then says `word` (or nothing) and leaves."""

    def __init__(self, word: bytes | None) -> None:
        self.store, self.word, self.looked = torch.distributed.HashStore(), word, False

    def check(self, keys: list[str]) -> bool:
        if keys != ["0/last/1"] or self.looked:
            return self.store.check(keys)
        self.looked = True
        if self.word is not None:
            self.store.set("0/last/1", self.word)
        self.store.set("left/1", "")
        return False

    def __getattr__(self, name: str) -> object:
        return getattr(self.store, name)


def rank_0(store: Between) -> DistWorld:
    return DistWorld(0, 2, torch.device("cpu"), lambda: store)


def test_a_last_word_is_heard_though_its_rank_has_left():
    world = rank_0(Between(b"bye"))
    assert world.gather("last", b"hello") == [b"hello", b"bye"]
    world.close()


def test_a_rank_that_left_without_a_word_is_named():
    world = rank_0(Between(None))
    with pytest.raises(WorldError, match="rank 1 left before 'last', for which rank 0 was waiting"):
        world.gather("last", b"hello")
    world.close()
