"""Many nodes: copies that a launcher starts make one run, and a rank that dies or hangs ends the others, named."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from psutil import Process
from test_ranks import weights
from tiny import make_project, run

from infctx.parallel.board import GONE, Hub, Judge, Link, Row
from infctx.parallel.config import ParallelConfig
from infctx.parallel.launch import require_world

TIMEOUT = 10  # seconds, of the runs in which a rank fails
RANKS = ["--data.batch_size", "1", "--trainer.strategy", "ddp"]
NODES = [*RANKS, "--trainer.num_nodes", "2", "--trainer.devices", "1"]
FIT = ["-m", "infctx", "fit", "-c", "recipe.yaml"]


class Processes:
    """What a test has started; killed at its end with all that it has started in turn."""

    def __init__(self, project: Path) -> None:
        self.project, self.started = project, []

    def start(self, *command: str, **environment: str) -> int:
        place = len(self.started)
        with self.out(place).open("w") as out:
            process = subprocess.Popen(
                [sys.executable, *command], cwd=self.project, stdout=out, stderr=out, start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            )  # fmt: skip
        self.started.append(process)
        return place

    def out(self, place: int) -> Path:
        return self.project / f"{place}.out"

    def wait(self, place: int, seconds: float = 240) -> int:
        try:
            return self.started[place].wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running: {self.out(place).read_text()}") from None

    def kill(self) -> None:
        """All of it, also what stands still and what is in a session of its own, as torchrun's ranks are."""
        for process in self.started:
            if process.poll() is None:
                family = Process(process.pid).children(recursive=True)
                process.kill()
                for one in family:
                    one.kill()
                process.wait()


@pytest.fixture
def processes(tmp_path):
    all_of_them = Processes(make_project(tmp_path / "project"))
    yield all_of_them
    all_of_them.kill()
    time.sleep(0.1)
    left = [p for p in psutil.process_iter(["cwd"]) if p.info["cwd"] == str(all_of_them.project)]
    for process in left:
        process.kill()
    assert not left, left


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def torchrun(processes: Processes, *options: str) -> list[int]:
    """The agents of two nodes, a rank on each."""
    agent = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1",
             "--master-port", free_port()]  # fmt: skip
    return [processes.start(*agent, "--node-rank", str(node), *FIT, *NODES, *options) for node in range(2)]


def slurm(processes: Processes, *options: str) -> list[int]:
    """What srun would start on two nodes."""
    job = {"SLURM_JOB_ID": "4242", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1",
           "SLURM_NNODES": "2", "SLURM_NODELIST": "127.0.0.1", "SLURM_LOCALID": "0",
           "MASTER_PORT": free_port()}  # fmt: skip
    own = [{**job, "SLURM_PROCID": str(node), "SLURM_NODEID": str(node)} for node in range(2)]
    return [processes.start(*FIT, *NODES, *options, **environment) for environment in own]


def rows(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(x) for x in lines if x.endswith("}")]


def assert_same_run(several: list[dict], one: list[dict], rel: float = 1e-5) -> None:
    keys = ("step", "tokens", "documents")
    assert [[x[k] for k in keys] for x in several] == [[x[k] for k in keys] for x in one]
    for a, b in zip(several, one):
        assert a["loss"] == pytest.approx(b["loss"], rel=rel)


def single(processes: Processes, monkeypatch, *options: str) -> list[dict]:
    monkeypatch.chdir(processes.project)
    run(monkeypatch, "fit", "-c", "recipe.yaml", "--name", "single", *options)
    return rows(processes.project / "runs" / "single")


def test_two_nodes_of_torchrun_make_one_run(processes, monkeypatch):
    nodes = torchrun(processes)
    one = single(processes, monkeypatch)
    for node in nodes:
        assert processes.wait(node) == 0, processes.out(node).read_text()
    folders = {x.name for x in (processes.project / "runs").iterdir()} - {"single"}
    assert len(folders) == 1
    assert_same_run(rows(processes.project / "runs" / folders.pop()), one)


@pytest.mark.slow
def test_copies_of_slurm_end_with_the_error_of_the_first(processes):
    folder = processes.project / "runs" / "taken"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").touch()
    nodes = slurm(processes, "--name", "taken")
    for node in nodes:
        assert processes.wait(node) == 2
        text = processes.out(node).read_text()
        assert text.count("\n") == 1 and "runs/taken holds a run already" in text, text


@pytest.mark.slow
@pytest.mark.parametrize("launch", [torchrun, slurm])
def test_two_nodes_are_killed_and_go_on(processes, monkeypatch, launch):
    options = ("--name", "two", "--resume", "auto", "--checkpoint.every_n_steps", "3", "--trainer.max_epochs", "8")
    one = single(processes, monkeypatch, *options[4:])
    launch(processes, *options)
    folder, deadline = processes.project / "runs" / "two", time.monotonic() + 300
    while len(rows(folder)) < 11 and time.monotonic() < deadline:
        time.sleep(0.01)
    processes.kill()
    assert 11 <= len(rows(folder)) < len(one)
    for sentence in ("resumed from", "has ended, at step"):
        nodes = launch(processes, *options)
        for node in nodes:
            assert processes.wait(node) == 0, processes.out(node).read_text()
        assert sentence in processes.out(nodes[0]).read_text()
    assert_same_run(rows(folder), one, rel=1e-4)
    a, b = weights(processes.project, "single"), weights(processes.project, "two")
    assert all(torch.allclose(a[k], b[k], rtol=1e-3, atol=1e-5) for k in a)


def test_copies_that_the_trainer_leaves_out_are_refused(monkeypatch):
    for key, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(key, value)
    require_world(2)
    with pytest.raises(ValueError, match=r"2 copies .* trainer.devices x trainer.num_nodes is 1"):
        require_world(1)


def ends(processes: Processes, faults: dict[str, str], rank: int) -> None:
    """Run two ranks for each fault, all at once: the one that is not at fault says the line, and nobody is left."""
    options = ["fit", "-c", "recipe.yaml", *RANKS, "--trainer.devices", "2", "--trainer.max_epochs", "1000",
               "--parallel.timeout", str(TIMEOUT)]  # fmt: skip
    script = str(Path(__file__).with_name("faulty.py"))
    started = {
        fault: processes.start(script, *options, "--name", fault, FAULT=fault, RANK_AT_FAULT=str(rank))
        for fault in faults
    }
    families, began, seconds = {}, {}, {}
    deadline = time.monotonic() + 300
    while len(seconds) < len(faults) and time.monotonic() < deadline:
        time.sleep(0.05)
        for fault, place in started.items():
            process, seen = processes.started[place], len(rows(processes.project / "runs" / fault))
            if fault not in families and (children := Process(process.pid).children()):
                families[fault] = children
            if fault not in began and seen == 3:
                began[fault] = time.monotonic()
            # A rank 0 that stands still stays: the one that it has started ends.
            ended = process.poll() is not None or (fault in families and not any(map(runs, families[fault])))
            if ended and fault not in seconds:
                seconds[fault] = time.monotonic() - began[fault]
    assert len(seconds) == len(faults), {x: processes.out(place).read_text() for x, place in started.items()}
    for fault, sentence in faults.items():
        text = processes.out(started[fault]).read_text()
        assert [x for x in text.splitlines() if x.startswith("infctx: error:") and sentence in x], text
        assert "Traceback" not in text and seconds[fault] < 2 * TIMEOUT, (seconds, text)
        if (rank, fault) != (0, "stop"):
            assert processes.wait(started[fault]) != 0
        psutil.wait_procs(families[fault], timeout=1)
        assert not any(map(runs, families[fault]))


def runs(process: Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_rank_that_dies_or_hangs_ends_the_other(processes):
    ends(processes, {"kill": f"rank 1 {GONE}", "sleep": "rank 1 hangs: it has stood in window 3 for 1"}, rank=1)


@pytest.mark.slow
def test_rank_0_that_dies_or_hangs_ends_the_other(processes):
    faults = {"kill": f"rank 0 {GONE}", "stop": "rank 0 has not been heard of for 1",
              "sleep": "rank 0 hangs: it has stood in window 3 for 1"}  # fmt: skip
    ends(processes, faults, rank=0)


@pytest.mark.slow
def test_a_rank_that_stands_still_or_has_an_error_ends_the_other(processes):
    faults = {"stop": "rank 1 has not been heard of for 1", "error": "rank 1 ended with an error: the loss is nan"}
    ends(processes, faults, rank=1)


@pytest.mark.slow
def test_a_job_that_was_suspended_goes_on(processes):
    """No clock of a watch runs while its process stands."""
    place = processes.start(*FIT, *RANKS, "--trainer.devices", "2", "--name", "two", "--parallel.timeout", "4",
                            "--trainer.max_epochs", "60")  # fmt: skip
    folder, family = processes.project / "runs" / "two", os.getpgid(processes.started[place].pid)
    while len(rows(folder)) < 30 and processes.started[place].poll() is None:
        time.sleep(0.05)
    seen = len(rows(folder))
    os.killpg(family, signal.SIGSTOP)
    time.sleep(12)
    assert len(rows(folder)) < 60 * 7 and seen >= 30
    os.killpg(family, signal.SIGCONT)
    assert processes.wait(place) == 0, processes.out(place).read_text()


@pytest.mark.slow
def test_nobody_is_at_fault_while_kernels_are_compiled_or_a_checkpoint_is_written(processes):
    options = ("--name", "two", "--parallel.timeout", "5", "--checkpoint.every_n_steps", "3", "--trainer.devices", "2")
    script = str(Path(__file__).with_name("faulty.py"))
    place = processes.start(script, *FIT[2:], *RANKS, *options, FAULT="none", RANK_AT_FAULT="1")
    assert processes.wait(place) == 0, processes.out(place).read_text()
    assert rows(processes.project / "runs" / "two")[-1]["seconds"] > 24  # it did stand twice


# The judge, at a row a second of each rank and a timeout of 20 seconds.


def verdict(*ranks, seconds: int = 60) -> str | None:
    """Args: ranks: from the second to that rank's row; its beat is added unless it has one."""
    judge = Judge(len(ranks), 20)
    for now in range(seconds):
        written = [rank(now) for rank in ranks]
        line = judge.verdict([x if x.beat else x._replace(beat=now + 1) for x in written], float(now))
        if line:
            return f"{now}: {line}"
    return None


def moving(now: int) -> Row:
    return Row(marks=now, pulses=8 * now, place=f"window {now}")


def at(marks: int, place: str = "the backward of window 5", **more):
    return lambda now: Row(marks=min(now, marks), place=place, **more)


def until(second: int, rank):
    return lambda now: rank(min(now, second))._replace(beat=min(now, second) + 1)


def test_no_alarm():
    assert verdict(moving, moving) is None
    assert verdict(moving, at(5, place="")) is None  # the first window, or a checkpoint
    assert verdict(at(6), lambda now: Row(marks=min(now, 5), pulses=now, place="window 5")) is None  # a long window
    assert verdict(at(6), lambda now: Row(marks=min(now, 5), pulses=now // 15, place="window 5")) is None
    assert verdict(at(9, end=""), at(8, end="")) is None
    assert verdict(at(6), at(6, place="")) is None


def test_alarms():
    hangs = "rank 1 hangs: it has stood in window 5 for 21 s while others wait for it"
    assert verdict(at(6), at(5, place="window 5"), at(6)) == f"26: {hangs}"
    assert verdict(at(6, end=""), at(5, place="window 5")) == f"26: {hangs}"
    unheard = "rank 1 has not been heard of for 21 s: its process stands still or its machine is gone"
    assert verdict(moving, until(7, moving), moving) == f"28: {unheard}"
    assert verdict(at(6), until(7, at(5, place="window 5"))) == f"28: {unheard}"  # it is no hang
    assert verdict(at(6), until(7, moving), at(6, suspects=True)).startswith("11: rank 1 has not been heard of for 4 s")
    assert verdict(moving, at(3, end=GONE)) == f"0: rank 1 {GONE}"
    stand = "no rank has moved for 21 s; the first to stand still was rank 1, in the backward of window 5"
    late = lambda now: Row(marks=6 if now > 8 else 0, place="the backward of window 5")  # noqa: E731
    early = lambda now: Row(marks=6 if now > 6 else 0, place="the backward of window 5")  # noqa: E731
    assert verdict(late, early) == f"30: {stand}"


def test_the_board():
    hub = Hub(3, 20.0)
    links = [Link(rank, "localhost", hub.port, hub.token, 20.0, 5.0) for rank in (1, 2)]
    stranger = Link(1, "localhost", hub.port, "guess", 20.0, 5.0)
    assert hub.tick(Row(beat=1), 0.0) is None
    assert [x.tick(Row(marks=i), 0.0) for i, x in enumerate(links)] == [None, None]
    assert [x.marks for x in hub.rows] == [0, 0, 1]
    assert stranger.tick(Row(marks=77), 0.0) == f"rank 0 {GONE}"  # it has hung up
    assert hub.rows[1].marks == 0 and hub.rows[1].end is None
    links[0].tick(Row(end=""), 1.0)
    links[0].close()
    links[1].close()  # without a word
    deadline = time.monotonic() + 10
    while hub.rows[2].end is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert hub.rows[1].end == "" and hub.tick(Row(beat=2), 2.0) == f"rank 2 {GONE}"
    assert hub.tick(Row(beat=3), 3.0) == f"rank 2 {GONE}"
    assert not hub.closes()
    hub.close()


def test_rank_0_is_mute():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        link = Link(1, "127.0.0.1", silent.getsockname()[1], "token", 20.0, 0.01)
        assert link.tick(Row(), 1.0) is None and link.tick(Row(), 20.0) is None
        assert link.tick(Row(), 21.0).startswith("rank 0 has not been heard of for 21 s")
        link.close()


def test_a_timeout_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"parallel\.timeout must be at least 1 second, got 0"):
        ParallelConfig(timeout=0)
