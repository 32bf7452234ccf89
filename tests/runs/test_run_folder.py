"""Run folders: whose they are, checkpoints written and read back exactly, and only whole ones."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import ROOT
from xla_flags import xla_flags

from tspo_jax.checkpoints.folders import load_agent
from tspo_jax.devices import sharding
from tspo_jax.runs.run_folder import (
    ABSENT,
    Checkpoints,
    RunFolderError,
    check_content,
    check_run,
    differences,
    find_checkpoint,
    in_use,
    read_part,
    write_content,
    write_run_config,
)
from tspo_jax.selection.scoring import read_agent
from tspo_jax.tspo.policy import make_optimizer
from tspo_jax.tspo.programs import TrainState

CONFIG = {"seed": 0, "optimizer": {"learning_rate": 5e-4, "b1": 0.9}, "mesh": (("data", -1), ("model", 1))}


@pytest.fixture(scope="module")
def state(golden):
    agent = load_agent(golden / "tspo_agent")[1]
    optimizer = make_optimizer(10)
    opt_state = jax.jit(optimizer.init)(agent)
    return TrainState(agent, opt_state)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


SPLIT = """
import sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tspo_jax.runs.run_folder import Checkpoints

address, index, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(address, 2, index)
mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
values = np.arange(8 * 512, dtype=np.float32).reshape(8, 512)

def put(x, *axes):
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, PartitionSpec(*axes)), lambda i: x[i])

state = {"weights": put(values, "model"), "count": put(np.int32(3))}
with Checkpoints(folder, 1) as checkpoints:
    checkpoints.save(1, state, {"next_batch": 5})
like = jax.tree.map(lambda x: jax.device_put(jax.numpy.zeros_like(x), x.sharding), state)
with Checkpoints(folder, 1) as checkpoints:
    restored, place = checkpoints.restore(1, like)
assert place == {"next_batch": 5} and int(restored["count"]) == 3
shards = restored["weights"].addressable_shards
assert len(shards) == 2
for shard in shards:
    np.testing.assert_array_equal(shard.data, values[shard.index])
"""


def test_arrays_split_over_processes_are_saved_shard_by_shard(tmp_path):
    """Two processes, neither of which holds the whole; one alone reads it back."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    environment = os.environ | {"XLA_FLAGS": xla_flags(2)}
    processes = [
        subprocess.Popen([sys.executable, "-c", SPLIT, address, str(i), str(tmp_path)], cwd=ROOT, env=environment)
        for i in range(2)
    ]
    try:
        assert [process.wait(300) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    of_process = [list((tmp_path / "checkpoints" / "1" / "state").glob(f"ocdbt.process_{i}/d/*")) for i in range(2)]
    assert all(of_process)
    whole = read_part(tmp_path, "state")
    np.testing.assert_array_equal(whole["weights"], np.arange(8 * 512, dtype=np.float32).reshape(8, 512))


def test_a_run_folder_belongs_to_one_config(tmp_path):
    check_run(tmp_path, CONFIG)
    write_run_config(tmp_path, CONFIG)
    check_run(tmp_path, CONFIG)
    other = CONFIG | {"optimizer": {"learning_rate": 1e-4, "b2": 0.99}, "mesh": (("data", 2), ("model", 1))}
    with pytest.raises(RunFolderError) as error:
        check_run(tmp_path, other)
    assert "optimizer.learning_rate: 0.0005 there, 0.0001 here" in str(error.value)
    assert "optimizer.b1: 0.9 there, (no such field) here" in str(error.value)
    assert "mesh: " in str(error.value)
    check_run(tmp_path, CONFIG | {"mesh": other["mesh"]}, may_differ=("mesh",))
    check_run(tmp_path, other, may_differ=("mesh", "optimizer"))


def test_a_strange_folder_is_refused(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(RunFolderError, match="not a run folder"):
        check_run(tmp_path, CONFIG)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RunFolderError, match="config.json: not valid json"):
        check_run(tmp_path, CONFIG)
    with pytest.raises(RunFolderError, match="gs:/bucket/run: not a folder of this machine; mount the bucket"):
        check_run(Path("gs://bucket/run"), CONFIG)


def test_differences_name_nested_fields():
    assert differences({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "e": 5}) == {
        "a.c": (2, 4),
        "d": (3, ABSENT),
        "e": (ABSENT, 5),
    }


def test_checkpoints_come_back_exactly_on_any_mesh(tmp_path, state):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest_step() == 0
        for step in (1, 2, 3):
            checkpoints.save(step, state, {"next_index": step})
    mesh = sharding.make_mesh([("data", 4), ("model", 2)], jax.devices())
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest_step() == 3
        restored, iterator = checkpoints.restore(3, like=sharding.put_replicated(mesh, state))
    assert iterator == {"next_index": 3}
    assert_equal(restored, state)
    assert restored.agent["mlp"]["linear_1"]["kernel"].sharding.mesh == mesh
    kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert kept == ["2", "3"]
    for folder in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "2"):
        assert_equal(read_agent(folder), jax.tree.map(np.asarray, state.agent))


def test_a_half_written_checkpoint_is_never_used(tmp_path, state):
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        checkpoints.save(1, state, {})
    half = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp-0"
    half.mkdir()
    (half / "agent").mkdir()
    assert_equal(read_agent(tmp_path), jax.tree.map(np.asarray, state.agent))
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        assert checkpoints.latest_step() == 1
        checkpoints.save(2, state, {})
    assert find_checkpoint(tmp_path).name == "2"


def test_the_best_is_kept_beside_the_newest(tmp_path, state):
    scores = {1: 0.5, 2: None, 3: 0.75, 4: 0.25, 5: 0.75, 6: 0.1, 7: None}
    with pytest.raises(RunFolderError, match="holds no checkpoint"):
        find_checkpoint(tmp_path / "best")
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        for step, score in scores.items():
            checkpoints.save(step, state, {}, score)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["5", "7"]
    assert find_checkpoint(tmp_path).name == "7"
    assert find_checkpoint(tmp_path / "best").name == "5"
    assert_equal(read_agent(tmp_path / "best"), jax.tree.map(np.asarray, state.agent))
    with Checkpoints(tmp_path, keep=1) as checkpoints:  # a later start knows the scores
        checkpoints.save(8, state, {}, 0.7)
    assert find_checkpoint(tmp_path / "best").name == "5"


def test_scores_of_another_setting_are_no_match(tmp_path, state):
    with Checkpoints(tmp_path, keep=1, setting="one") as checkpoints:
        checkpoints.save(1, state, {}, 0.9)
    with Checkpoints(tmp_path, keep=1, setting="two") as checkpoints:
        for step, score in ((2, 0.5), (3, 0.7), (4, 0.6), (5, 0.2)):
            checkpoints.save(step, state, {}, score)
    assert find_checkpoint(tmp_path / "best").name == "3"


def test_content_is_bound(tmp_path):
    check_content(tmp_path, {"data.questions": "a"})
    write_content(tmp_path, {"data.questions": "a", "agent.clip": "c"})
    check_content(tmp_path, {"data.questions": "a", "agent.clip": "c"})
    with pytest.raises(RunFolderError, match=r"other content of config.data.questions: .* choose another --run_dir"):
        check_content(tmp_path, {"data.questions": "b", "agent.clip": "c"})


def test_an_agent_of_another_size_or_kind_is_refused(tmp_path, state):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, {})
        agent = {name: values for name, values in state.agent.items() if name != "mlp"}
        agent["temporal"] = state.agent["temporal"] | {"Self_q": {"kernel": np.zeros((3, 2)), "bias": np.zeros(64)}}
        with pytest.raises(RunFolderError) as error:
            checkpoints.restore(1, like=state._replace(agent=agent))
    assert "temporal.Self_q.kernel: [64, 64] there, [3, 2] here" in str(error.value)
    assert "mlp: " in str(error.value) and "bias: " not in str(error.value).split("mlp: ")[0]


def test_nothing_was_evaluated(tmp_path, state):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, {})
    with pytest.raises(RunFolderError, match="no checkpoint was evaluated .config.held_out.every."):
        read_agent(tmp_path / "best")


def test_a_stale_state_has_the_agent_that_drew(tmp_path, state):
    state = state._replace(drew=jax.tree.map(lambda x: x + 1, state.agent))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, {})
        restored, _ = checkpoints.restore(1, like=jax.tree.map(jax.numpy.asarray, state))
    assert_equal(restored, state)


def test_no_checkpoint_is_an_error(tmp_path):
    with pytest.raises(RunFolderError, match="holds no checkpoint"):
        read_agent(tmp_path)
    with pytest.raises(RunFolderError, match="holds no checkpoint"):
        read_agent(tmp_path / "absent")


def test_a_folder_in_use_is_refused(tmp_path):
    """Until its process ends, even by kill -9."""
    hold = (
        "import sys, time, tspo_jax.runs.run_folder as r\n"
        "with r.in_use(sys.argv[1]): print(1, flush=True); time.sleep(99)"
    )
    with subprocess.Popen([sys.executable, "-c", hold, tmp_path], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(RunFolderError, match=f"is in use by process {process.pid} on "), in_use(tmp_path):
            pass
        process.kill()
    with in_use(tmp_path):
        pass


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, state):
    """In a process that may write no file as large as a checkpoint."""
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, {"next_batch": 1})
    script = f"""if True:
        import resource, signal, sys
        import jax, numpy as np
        from tspo_jax.runs.run_folder import Checkpoints
        from tspo_jax.tspo.programs import TrainState
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        with Checkpoints({str(tmp_path)!r}, keep=1) as checkpoints:
            noise = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
            checkpoints.save(2, TrainState({{"a": noise}}, {{"b": noise}}), {{}})
    """
    failed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert failed.returncode != 0
    assert find_checkpoint(tmp_path).name == "1"
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.latest_step() == 1
        restored, iterator = checkpoints.restore(1, like=jax.tree.map(jax.numpy.asarray, state))
    assert iterator == {"next_batch": 1}
    assert_equal(restored, state)
