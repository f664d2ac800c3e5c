"""Checkpoints come back bit for bit, or not at all."""

import hashlib
import json
import math
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorstore as ts

from jaxsft.run import checkpoint_files
from jaxsft.run import checkpoints as checkpoint
from jaxsft.run.checkpoint_files import state_bytes
from jaxsft.run.checkpoints import Checkpoints

FINGERPRINT = {"model": "gemma3-270m", "lora_r": 8, "learning_rate": 2e-5, "seed": 0}


def make_state(step=0):
    """Like the train state: nested adapters, optax's namedtuples, a scalar; after one update."""
    keys = jax.random.split(jax.random.key(step), 2)
    lora = {
        "layers": {
            "q_proj": {"a": jax.random.normal(keys[0], (2, 50, 30)), "b": jnp.zeros((2, 30, 40))}
        },
        "half": jax.random.normal(keys[1], (7,)).astype(jnp.bfloat16),
    }
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(1e-3, mask=lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree)),
    )
    opt = optimizer.init(lora)
    updates, opt = optimizer.update(jax.tree.map(jnp.ones_like, lora), opt, lora)
    return {"lora": optax.apply_updates(lora, updates), "opt": opt, "step": jnp.int32(step)}


def abstract(state):
    return jax.eval_shape(lambda: state)


def metadata(step=0):
    return {"fingerprint": FINGERPRINT, "config": {"max_length": 256}, "tokens_seen": 10 * step}


def save_steps(directory, steps, save_total_limit=10, eval_losses=()):
    losses = dict(zip(steps, eval_losses, strict=False))
    with Checkpoints(directory, save_total_limit) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), metadata(step), losses.get(step))


def assert_same(restored, expected):
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True):
        assert isinstance(got, jax.Array)
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


def files_of(step_directory):
    return [path for path in sorted(step_directory.rglob("*")) if path.is_file()]


def flip_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def flip_array_data(step_directory):
    """A bit in the largest file of array data, where Orbax itself notices nothing."""
    flip_bit(max(step_directory.glob("state/ocdbt.process_0/d/*"), key=lambda p: p.stat().st_size))


def test_roundtrip_is_bit_identical(tmp_path):
    state = make_state(3)
    save_steps(tmp_path, [3])
    restored = Checkpoints(tmp_path, 1).restore(abstract(state), FINGERPRINT)
    assert (restored.step, restored.metadata) == (3, metadata(3))
    assert_same(restored.state, state)
    # Arrays serve as `like` too, and the restored state may be donated.
    _, again, _ = Checkpoints(tmp_path, 1).restore(restored.state, FINGERPRINT)
    doubled = jax.jit(lambda tree: jax.tree.map(lambda x: x + x, tree), donate_argnums=0)(again)
    assert_same(doubled, jax.tree.map(lambda x: x + x, state))


def test_arrays_go_to_the_shardings_asked_for(tmp_path):
    state = make_state(1)
    save_steps(tmp_path, [1])
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)
    restored = Checkpoints(tmp_path, 1).restore(like, FINGERPRINT)
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(restored.state))
    assert_same(restored.state, state)


def test_save_is_asynchronous_and_safe_against_donation(tmp_path):
    state = make_state(1)
    expected = jax.tree.map(np.array, state)
    with Checkpoints(tmp_path, 2) as checkpoints:
        checkpoints.save(1, state, metadata(1))
        jax.block_until_ready(
            jax.jit(lambda t: jax.tree.map(lambda x: x * 0, t), donate_argnums=0)(state)
        )
        checkpoints.wait()
        assert checkpoints.steps() == [1]
        restored = checkpoints.restore(make_state(0), FINGERPRINT)
    assert_same(restored.state, expected)


def test_retention_keeps_the_newest_and_clears_leftovers(tmp_path):
    for name in ("7.orbax-checkpoint-tmp", "1.deleted"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("half")
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert checkpoints.steps() == []
        for step in (5, 10, 15, 20):
            checkpoints.save(step, make_state(step), metadata(step))
            checkpoints.wait()
            assert checkpoints.steps() == [s for s in (5, 10, 15, 20) if step - 5 <= s <= step]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["15", "20"]


def test_the_best_step_is_kept_too(tmp_path):
    save_steps(tmp_path, [1, 2, 3, 4], 2, eval_losses=[math.nan, 1.5, 2.5])
    checkpoints = Checkpoints(tmp_path, 2)
    assert checkpoints.steps() == [2, 3, 4]
    assert checkpoints.best == (2, 1.5)
    # After a restart the best is still known, until a better one takes its place.
    for step, loss in ((5, 1.75), (6, -math.inf), (7, 1.25), (8, 1.25)):
        checkpoints.save(step, make_state(step), metadata(step), loss)
    checkpoints.wait()
    assert checkpoints.steps() == [7, 8]
    assert checkpoints.best == Checkpoints(tmp_path, 1).best == (8, 1.25)
    assert Checkpoints(tmp_path / "none", 1).best is None


def test_no_checkpoint_is_none(tmp_path):
    assert Checkpoints(tmp_path / "none", 1).restore(make_state(), FINGERPRINT) is None
    assert Checkpoints(tmp_path / "none", 1).steps() == []


def test_a_given_step_is_restored_and_no_other(tmp_path):
    save_steps(tmp_path, [1, 2])
    checkpoints = Checkpoints(tmp_path, 2)
    assert checkpoints.restore(make_state(), FINGERPRINT, step=1).step == 1
    with pytest.raises(ValueError, match=r"no checkpoint of step 3; there: 1, 2"):
        checkpoints.restore(make_state(), FINGERPRINT, step=3)
    flip_array_data(tmp_path / "2")
    with pytest.raises(ValueError, match="no usable checkpoint"):
        checkpoints.restore(make_state(), FINGERPRINT, step=2)


def test_a_flipped_bit_is_found_and_the_step_before_is_used(tmp_path):
    save_steps(tmp_path, [1, 2, 3])
    flip_array_data(tmp_path / "3")
    events = []
    checkpoints = Checkpoints(tmp_path, 10)
    restored = checkpoints.restore(make_state(), FINGERPRINT, on_event=events.append)
    assert restored.step == 2
    assert_same(restored.state, make_state(2))
    assert len(events) == 1
    assert "SHA-256" in events[0]
    assert events[0].endswith("renamed to 3.corrupt, using step 2")
    assert checkpoints.steps() == [1, 2]
    # Training goes on, saves 3 again, and 3 goes bad again: the first one is not overwritten.
    checkpoints.save(3, make_state(3), metadata(3))
    checkpoints.wait()
    flip_array_data(tmp_path / "3")
    assert checkpoints.restore(make_state(), FINGERPRINT).step == 2
    assert {"3.corrupt", "3.corrupt-2"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_to_any_file_is_found_or_harmless(tmp_path, damage):
    save_steps(tmp_path / "whole", [1, 2])
    expected = {1: make_state(1), 2: make_state(2)}
    found = []
    for path in files_of(tmp_path / "whole" / "2"):
        name = path.relative_to(tmp_path / "whole")
        run = tmp_path / str(name).replace("/", "-")
        shutil.copytree(tmp_path / "whole", run)
        size = path.stat().st_size
        if damage == "remove":
            (run / name).unlink()
        elif damage == "truncate":
            (run / name).write_bytes(path.read_bytes()[: size // 2])
        elif size:
            flip_bit(run / name)
        restored = Checkpoints(run, 10).restore(make_state(), FINGERPRINT)
        assert_same(restored.state, expected[restored.step])
        if restored.step == 1:
            assert (run / "2.corrupt").is_dir()
            found.append(path.name)
    assert {"_CHECKPOINT_METADATA", "manifest.ocdbt"} <= set(found)


def test_no_usable_checkpoint_is_an_error_every_time(tmp_path):
    save_steps(tmp_path, [1, 2])
    flip_array_data(tmp_path / "1")
    (tmp_path / "2" / "_CHECKPOINT_METADATA").write_text("")
    for _ in range(2):  # never a silent restart, the second time either
        with pytest.raises(
            ValueError, match=r"no usable checkpoint \(step 2: .*; step 1: .*copy a good one back"
        ):
            Checkpoints(tmp_path, 2).restore(make_state(), FINGERPRINT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_another_run_is_refused_before_damage_is_judged(tmp_path):
    save_steps(tmp_path, [1])
    flip_array_data(tmp_path / "1")
    here = {"model": "gemma3-270m", "lora_r": 16, "seed": 1, "learning_rate": 2e-5, "packing": "no"}
    with pytest.raises(ValueError) as caught:
        Checkpoints(tmp_path, 1).restore(make_state(), here)
    message = str(caught.value)
    assert "lora_r is 8 there and 16 here" in message
    assert "seed is 0 there and 1 here" in message
    assert "packing is absent there and no here" in message
    assert "model" not in message.split("another run:")[1]
    assert "a new --name, or --fork-from" in message
    assert (tmp_path / "1").exists()


def test_options_of_rows_that_came_later_are_no_difference(tmp_path):
    """A run of an earlier version goes on; what its rows became is in the rows' own digest."""
    save_steps(tmp_path, [1])
    found = Checkpoints(tmp_path, 1).restore(make_state(), {**FINGERPRINT, "data.columns": "None"})
    assert found is not None and found[0] == 1


def test_other_arrays_under_the_same_fingerprint_are_refused(tmp_path):
    save_steps(tmp_path, [1])
    like = make_state()
    like["lora"]["half"] = jnp.zeros((8,), jnp.bfloat16)
    like["lora"]["more"] = jnp.zeros((1,))
    with pytest.raises(ValueError) as caught:
        Checkpoints(tmp_path, 1).restore(like, FINGERPRINT)
    assert "lora/half is bfloat16[7] there and bfloat16[8] here" in str(caught.value)
    assert "lora/more is absent there and float32[1] here" in str(caught.value)


def test_a_part_of_a_run_is_restored_if_that_part_agrees(tmp_path):
    state, checkpoints = make_state(1), Checkpoints(tmp_path, 1)
    save_steps(tmp_path, [1])
    like, part = {"lora": state["lora"]}, {"lora_r": 8}
    restored = checkpoints.restore(like, part, partly=True)
    assert_same(restored.state, like)
    assert restored.metadata == metadata(1)
    with pytest.raises(ValueError, match=r"does not fit: lora_r is 8 there and 4 here"):
        checkpoints.restore(like, {"lora_r": 4}, partly=True)
    like = {"lora": {"half": jnp.zeros((8,), jnp.bfloat16), "more": jnp.zeros((1,))}}
    with pytest.raises(ValueError) as caught:
        checkpoints.restore(like, part, partly=True)
    assert "does not fit: lora/half is bfloat16[7] there and bfloat16[8] here" in str(caught.value)
    assert "lora/more is absent there and float32[1] here" in str(caught.value)


HUGE = [60_000, 60_000]  # 13 GiB of float32


def claim(step_directory, key, **changes):
    """Writes other metadata for an array; the arrays and the record stay as they are."""
    base = {"driver": "file", "path": f"{step_directory}/state/"}
    kvstore = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
    name = f"{key}/.zarray".encode()
    metadata = json.loads(kvstore.read(name).result().value) | changes
    kvstore.write(name, json.dumps(metadata).encode()).result()


def rewrite_record(step_directory, change):
    """Changes the record and seals it again, as anyone can."""
    path = step_directory / "_CHECKPOINT_METADATA"
    everything = json.loads(path.read_text())
    custom = everything["custom_metadata"]
    record = json.loads(custom["jaxsft_record"])
    change(record)
    text = json.dumps(record)
    seal = hashlib.sha256(text.encode()).hexdigest()
    custom |= {"jaxsft_record": text, "jaxsft_sha256": seal}
    path.write_text(json.dumps(everything))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shape": [2, *HUGE]}, "declares float32[2, 60000, 60000] in chunks of [2, 50, 30]"),
        ({"chunks": [2, *HUGE]}, "in chunks of [2, 60000, 60000]"),
        ({"shape": HUGE, "chunks": HUGE}, "declares float32[60000, 60000]"),
        ({"dtype": "<f8"}, "declares float64[2, 50, 30]"),
        ({"compressor": {"id": "zstd", "level": 1}}, "is compressed, as no run saves it"),
        ({"compressor": {"id": "nothing"}}, "its arrays can't be read"),
        ({"filters": [{"id": "delta"}]}, "its arrays can't be read"),
        ({"zarr_format": 3}, "its arrays can't be read"),
    ],
    ids=str,
)
def test_what_files_declare_is_compared_before_memory_is_taken(tmp_path, changes, said):
    save_steps(tmp_path, [1])
    claim(tmp_path / "1", "lora/layers/q_proj/a", **changes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for like, part in ((make_state(), FINGERPRINT), ({"lora": make_state()["lora"]}, {})):
        with pytest.raises(ValueError, match=r"no usable checkpoint \(step 1: ") as caught:
            Checkpoints(tmp_path, 1).restore(like, part, partly=not part)
        assert said in str(caught.value) and len(str(caught.value)) < 600
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19  # KiB


def test_what_nobody_asked_for_takes_no_memory(tmp_path):
    """A record and files that claim 13 GiB for Adam's moments, of which a fork wants nothing."""
    state = make_state(1)
    save_steps(tmp_path, [1])
    for name in ("a", "b"):
        claim(tmp_path / "1", f"opt/1/0/mu/layers/q_proj/{name}", shape=HUGE, chunks=HUGE)

    def change(record):
        record["arrays"]["opt/1/0/mu/layers/q_proj/a"][1] = HUGE
        record["arrays"]["more"] = ["float32", HUGE, "0" * 64]

    rewrite_record(tmp_path / "1", change)
    like = {"lora": state["lora"]}
    assert_same(Checkpoints(tmp_path, 1).restore(like, {}, partly=True).state, like)
    with pytest.raises(ValueError, match=r"of another run: more is float32\[60000, 60000\] there"):
        Checkpoints(tmp_path, 1).restore(state, FINGERPRINT)


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.update(arrays={"a": 3}),
        lambda record: record.update(arrays={"a": ["float32", [1e9], "0"]}),
        lambda record: record.update(arrays={"a": ["float32", [-1], "0"]}),
        lambda record: record.update(arrays=[]),
        lambda record: record.update(metadata=[]),
        lambda record: record["metadata"].pop("fingerprint"),
        lambda record: record["metadata"].update(fingerprint={"model": ["x"]}),
        lambda record: record.update(eval_loss="low"),
        lambda record: record.update(step="1"),
    ],
)
def test_a_sealed_record_of_another_form_is_damage(tmp_path, change):
    save_steps(tmp_path, [1])
    rewrite_record(tmp_path / "1", change)
    with pytest.raises(ValueError, match=r"no usable checkpoint \(step 1: its metadata can't be"):
        Checkpoints(tmp_path, 1).restore(make_state(), FINGERPRINT)
    assert Checkpoints(tmp_path, 1).best is None


def test_a_long_list_of_differences_is_short(tmp_path):
    save_steps(tmp_path, [1])
    with pytest.raises(ValueError) as caught:
        Checkpoints(tmp_path, 1).restore(make_state(), {"\x1b[2J" + "x" * 5000: "y" * 5000})
    line = str(caught.value)
    assert len(line) < 600 and line.isprintable() and " and 4 more; use the settings" in line


def test_changed_metadata_is_damage(tmp_path):
    save_steps(tmp_path, [1, 2])
    path = tmp_path / "2" / "_CHECKPOINT_METADATA"
    text = path.read_text()
    assert text.count('\\"seed\\": 0') == 1
    path.write_text(text.replace('\\"seed\\": 0', '\\"seed\\": 9'))
    assert Checkpoints(tmp_path, 2).restore(make_state(), FINGERPRINT).step == 1


def test_an_empty_step_is_set_aside_and_in_nobodys_way(tmp_path):
    save_steps(tmp_path, [4])
    (tmp_path / "9").mkdir()
    (tmp_path / "8.corrupt").mkdir()
    (tmp_path / "12.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "13").write_text("a file")
    checkpoints = Checkpoints(tmp_path, 3)
    said = []
    assert checkpoints.restore(make_state(), FINGERPRINT, on_event=said.append).step == 4
    ends = [f"renamed to {step}.corrupt, using step 4" for step in (13, 9)]
    assert [line.endswith(end) for line, end in zip(said, ends, strict=True)] == [True, True]
    assert checkpoints.steps() == [4]
    checkpoints.save(9, make_state(9), metadata(9))
    checkpoints.wait()
    assert checkpoints.restore(make_state(), FINGERPRINT).step == 9


def test_steps_emptied_by_someone_are_no_reason_to_begin_again(tmp_path):
    for step in (1, 2):
        (tmp_path / str(step)).mkdir()
    with pytest.raises(ValueError, match="no usable checkpoint"):
        Checkpoints(tmp_path, 3).restore(make_state(), FINGERPRINT)
    assert Checkpoints(tmp_path, 3).steps() == [1, 2]


def test_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_steps("runs/demo", [1])
    assert (tmp_path / "runs" / "demo" / "1").is_dir()
    monkeypatch.chdir("/")
    assert Checkpoints(tmp_path / "runs" / "demo", 1).steps() == [1]


def test_misuse_is_refused(tmp_path):
    with pytest.raises(ValueError, match="save_total_limit is 0"):
        Checkpoints(tmp_path, 0)
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(1, make_state(1), metadata(1))
        with pytest.raises(ValueError, match="saved already"):
            checkpoints.save(1, make_state(1), metadata(1))


def test_a_failed_save_is_reported_once_and_leaves_no_step(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    with Checkpoints(tmp_path / "file" / "under", 1) as checkpoints:
        with pytest.raises(OSError):  # at the save or at the wait
            checkpoints.save(1, make_state(1), metadata(1))
            checkpoints.wait()
        assert checkpoints.steps() == []


def wait_by_polling(checkpoints):
    """The error of a failed save comes from `poll`, some call after the save is over."""
    while checkpoints.is_saving:
        checkpoints.poll()


def test_what_a_failed_save_leaves_is_removed_and_the_next_one_tries_again(tmp_path):
    save_steps(tmp_path, [1, 2])
    before = {path: path.read_bytes() for path in files_of(tmp_path)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(tmp_path, 1) as checkpoints:
        # Files of up to 10 kB, as on a disk that becomes full: the largest arrays have 12 kB.
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        try:
            checkpoints.save(3, make_state(3), metadata(3))
            with pytest.raises(
                OSError, match=r"step 3 couldn't be written \(File too large.*before it are intact"
            ):
                wait_by_polling(checkpoints)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert not checkpoints.is_saving
        assert checkpoints.steps() == [1, 2]  # over the limit of 1, and not touched
        assert {path: path.read_bytes() for path in before} == before
        checkpoints.save(3, make_state(3), metadata(3))
        wait_by_polling(checkpoints)
        assert [path.name for path in tmp_path.iterdir()] == ["3"]
        assert_same(checkpoints.restore(make_state(), FINGERPRINT).state, make_state(3))


def test_a_directory_that_vanished_is_made_again(tmp_path):
    with Checkpoints(tmp_path / "run" / "checkpoints", 2) as checkpoints:
        checkpoints.save(1, make_state(1), metadata(1))
        checkpoints.wait()
        shutil.rmtree(tmp_path / "run")
        assert checkpoints.steps() == []
        checkpoints.save(2, make_state(2), metadata(2))
        checkpoints.wait()
        assert checkpoints.steps() == [2]


@pytest.mark.parametrize("value", [jnp.nan, -jnp.inf])
@pytest.mark.parametrize("key", ["half", "whole"])
def test_what_is_not_finite_is_not_saved(tmp_path, key, value):
    state = {"half": jnp.zeros((7,), jnp.bfloat16), "whole": jnp.zeros((2, 3))}
    state[key] = state[key].at[-1].set(value)
    with Checkpoints(tmp_path / "none", 1) as checkpoints:
        with pytest.raises(FloatingPointError, match=f"{key} is not finite"):
            checkpoints.save(1, state, metadata(1))
        assert not (tmp_path / "none").exists()
        checkpoints.save(1, make_state(1), metadata(1))
    assert checkpoints.steps() == [1]


def test_a_damaged_step_that_cannot_be_renamed_is_passed_over(tmp_path, monkeypatch):
    save_steps(tmp_path, [1, 2])
    flip_array_data(tmp_path / "2")

    def fail(path, suffix):
        raise OSError(30, "Read-only file system")

    events = []
    with Checkpoints(tmp_path, 1) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "rename", fail)
            found = checkpoints.restore(make_state(), FINGERPRINT, on_event=events.append)
            assert found.step == 1
            assert "passed over, as it can't be renamed (OSError: [Errno 30]" in events[0]
            assert events[0].endswith("using step 1") and len(events) == 1
            checkpoints.save(2, make_state(2), metadata(2))
            with pytest.raises(OSError, match=r"Read-only file system.*before it are intact"):
                checkpoints.wait()
        checkpoints.save(2, make_state(2), metadata(2))  # can be renamed by now
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "2.corrupt"]


def test_a_step_that_vanishes_while_it_is_read_is_passed_over(tmp_path, monkeypatch):
    save_steps(tmp_path, [1, 2])
    read_record = checkpoint.read_record

    def read(path):
        if path.name == "2":
            path.rmtree()
        return read_record(path)

    monkeypatch.setattr(checkpoint, "read_record", read)
    events = []
    checkpoints = Checkpoints(tmp_path, 2)
    assert checkpoints.restore(make_state(), FINGERPRINT, on_event=events.append).step == 1
    assert "FileNotFoundError" in events[0] and events[0].endswith("using step 1")
    checkpoints.save(2, make_state(2), metadata(2))
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2]


def test_a_damaged_step_that_stays_does_not_count_among_the_newest(tmp_path, monkeypatch):
    save_steps(tmp_path, [1, 9])
    flip_array_data(tmp_path / "9")
    monkeypatch.setattr(checkpoint, "rename", lambda path, suffix: path.rename(tmp_path / "no/dir"))
    with Checkpoints(tmp_path, 1) as checkpoints:
        assert checkpoints.restore(make_state(), FINGERPRINT).step == 1
        checkpoints.save(2, make_state(2), metadata(2))
    assert checkpoints.steps() == [2, 9]


def test_state_bytes_is_an_upper_bound(tmp_path):
    state = make_state(1)
    data = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert data == 3 * 4 * (2 * 50 * 30 + 2 * 30 * 40) + 7 * (2 + 2 * 2) + 2 * 4
    save_steps(tmp_path, [1])
    on_disk = sum(path.stat().st_size for path in files_of(tmp_path))
    assert data < on_disk < state_bytes(state) == state_bytes(abstract(state)) < data + 200_000


def test_without_atomic_renames_a_step_is_one_once_it_is_committed(tmp_path, monkeypatch):
    """What is done on gs://, on local files."""
    monkeypatch.setattr(checkpoint_files, "is_object_store", lambda path: True)
    save_steps(tmp_path, [1, 2, 3, 4], 2, eval_losses=[1.0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3", "4"]
    # Two killed processes left a step half-written, and one half-deleted.
    shutil.copytree(tmp_path / "4", tmp_path / "5")
    for name in ("5", "3"):
        (tmp_path / name / "commit_success.txt").unlink()
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert checkpoints.steps() == [1, 4]
        assert checkpoints.restore(make_state(), FINGERPRINT).step == 4
        checkpoints.save(5, make_state(5), metadata(5))
        checkpoints.wait()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "4", "5"]
        assert_same(checkpoints.restore(make_state(), FINGERPRINT).state, make_state(5))
