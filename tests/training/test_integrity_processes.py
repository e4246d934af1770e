"""Two processes: each hashes what it wrote, and both reach the same verdict on restore."""

import json

import pytest
from processes import Processes

pytestmark = pytest.mark.fast_compile

SCRIPT = """
import jax, numpy as np, optax, pathlib
jax.config.update("jax_platforms", "cpu")
from jax.sharding import Mesh, NamedSharding, PartitionSpec

def body(index):
    from esolm_jax.training import checkpoint, checkpoint_digests
    from esolm_jax.training.train_state import TrainState
    workdir = pathlib.Path(WORKDIR)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    rest = NamedSharding(mesh, PartitionSpec())
    shape = (2 * len(jax.devices()), 2**14)

    def state(step):
        content = np.random.default_rng(step).normal(size=shape).astype(np.float32)
        kernel = jax.make_array_from_callback(shape, rows, lambda index: content[index])
        small = jax.make_array_from_callback((), rest, lambda index: np.array(step, np.int32))
        return TrainState(step=small, params={"kernel": kernel}, ema={"kernel": kernel},
                          opt_state={"count": small}, key=small)

    hashed = []
    hash_file = checkpoint_digests.hash_file
    def recorded(path, algorithm):
        hashed.append(str(path))
        return hash_file(path, algorithm)
    checkpoint_digests.hash_file = recorded
    meta = {"config": {}, "cursor": 0, "tokenizer": {}, "version": ""}
    checkpoints = checkpoint.Checkpoints(workdir, keep_last=2, keep_best=0)
    for step in (1, 2):
        checkpoints.save(state(step), meta)
    checkpoints.close()
    others = f"/ocdbt.process_{1 - index}/"
    print("hashed of the other:", sum(others in name for name in hashed),
          "own:", sum(f"/ocdbt.process_{index}/" in name for name in hashed), flush=True)
    if index == 0:
        folder = workdir / "checkpoints" / "2" / "params" / "ocdbt.process_1"
        path = max(folder.rglob("*"), key=lambda p: p.stat().st_size)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    multihost.barrier("damaged", timeout=30)
    hashed.clear()
    def shape_of(a):
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=getattr(a, "sharding", None))
    like = jax.tree.map(shape_of, state(1))
    checkpoints = checkpoint.Checkpoints(workdir, keep_last=2, keep_best=0)
    found, _ = checkpoints.restore(like)
    wanted = state(1)
    assert int(found.step) == 1
    for a, b in zip(jax.tree.leaves(found.params), jax.tree.leaves(wanted.params)):
        for x, y in zip(a.addressable_shards, b.addressable_shards):
            np.testing.assert_array_equal(x.data, y.data)
    print("restored", int(found.step), flush=True)
    checkpoints.save(state(3), meta)
    checkpoints.close()
    print("left", sorted(p.name for p in (workdir / "checkpoints").iterdir()), flush=True)
    multihost.barrier("done", timeout=30)
main(body, barrier_timeout=50)
"""


def test_two_processes_hash_their_own_files_and_agree(tmp_path):
    script = SCRIPT.replace("WORKDIR", repr(str(tmp_path)))
    ended = Processes(script).wait()
    for index, (code, out, err) in enumerate(ended):
        assert code == 0, err[-3000:]
        assert "restored 1" in out and "left ['1', '3']" in out
        if index == 1:
            assert "hashed of the other: 0" in out
        assert "own: 0" not in out
    assert "step 2 is damaged; using step 1 instead" in ended[0][2]
    assert (tmp_path / "damaged_checkpoints" / "2").is_dir()
    for step in ("1", "3"):
        folder = tmp_path / "checkpoints" / step
        files = json.loads((folder / "_DIGESTS").read_text())["files"]
        assert {name for name in files if "ocdbt.process_1/" in name}
        assert not list(folder.glob("_DIGESTS.*"))
