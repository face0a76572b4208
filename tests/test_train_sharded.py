"""Training on several devices and processes: as on one, and what ends it.

Every process has two virtual CPU devices; they meet over loopback.
"""

import functools
import json
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from examples import train_sharded
from examples.lm import cli, data, devices, sharded, train
from nsa_jax import Layout, PackedRow, TransformerLM

SCRIPT = Path(train_sharded.__file__)
SMALL = ["--attention=window", "--seq-len=128", "--batch-size=4"]
SMALL += ["--max-bytes=200000", "--eval-batches=1", "--eval-every=2"]
SMALL += ["--checkpoint-every=2", "--sample-tokens=2"]
# Of jax, where process 0 is the one that has ended, or is silent.
ENDED = "another process has ended|detected fatal errors|cannot save the checkp"


def one_process(*args: object, env: Any) -> None:
  run = subprocess.run(
    [sys.executable, SCRIPT.with_name("train_lm.py"), *map(str, args)],
    capture_output=True,
    text=True,
    env=env,
    timeout=600,
  )
  assert run.returncode == 0, run.stderr


class Processes:
  """Processes of one run, with what they print in files."""

  def __init__(self, count: int, folder: Path, *args: object, env: Any):
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      port = free.getsockname()[1]
    flags = [*map(str, args), "--cpu-devices=2", f"--processes={count}"]
    flags += [f"--coordinator=127.0.0.1:{port}"]
    self._logs = [folder / f"log{i}" for i in range(count)]
    self._running = []
    for i, log in enumerate(self._logs):
      with log.open("w") as file:
        process = subprocess.Popen(
          [sys.executable, SCRIPT, *flags, f"--process={i}"],
          stdout=file,
          stderr=subprocess.STDOUT,
          env=env,
        )
      self._running.append(process)

  def __enter__(self) -> "Processes":
    return self

  def __exit__(self, *unused: object) -> None:
    for process in self._running:
      process.kill()
      process.wait()

  def send(self, process: int, number: signal.Signals) -> None:
    self._running[process].send_signal(number)

  def alive(self) -> bool:
    return all(process.poll() is None for process in self._running)

  def text(self, process: int) -> str:
    return self._logs[process].read_text(errors="replace")

  def wait(self, process: int, seconds: float = 600) -> int:
    """The exit code."""
    return self._running[process].wait(seconds)

  def finish(self) -> None:
    for i in range(len(self._running)):
      assert self.wait(i) == 0, self.text(i)


def losses(out: Path) -> np.ndarray:
  lines = (out / "metrics.jsonl").read_text().splitlines()
  return np.array([json.loads(line)["train_loss"] for line in lines])


def steps_of(out: Path) -> list[int]:
  found = (out / "checkpoints").glob("*")
  return sorted(int(path.name) for path in found if path.name.isdecimal())


def losses_here(*flags: str) -> list[float]:
  """What the training of these flags has, without the rest of a run."""
  args = cli.make_parser().parse_args(flags)
  args.learning_rate = cli.RECIPES["tiny"].learning_rate
  config = train.model_config(args)
  corpus = data.load_corpus(None, args.max_bytes, args.seq_len)
  batches, _ = train.open_data(args, config.nsa, corpus)
  model = TransformerLM(config)
  optimizer = train.make_optimizer(args.learning_rate, args.steps)
  tokens = np.zeros((1, args.seq_len), np.int32)
  params = jax.jit(model.init)(jax.random.key(args.seed), tokens)["params"]
  state = {"params": params, "opt_state": jax.jit(optimizer.init)(params)}
  step_fn = jax.jit(train.make_train_step(model, optimizer))
  found = []
  for step in range(args.steps):
    state, loss = step_fn(state, batches.read(step))
    found.append(float(loss))
  return found


@pytest.mark.parametrize("count", [2, 4])
def test_two_and_four_processes_train_as_one(
  count, tmp_path, script_environment
):
  mesh = [f"--mesh=data={count},sequence=2", "--zigzag", "--fsdp"]
  args = [*SMALL, "--steps=2"]
  with Processes(
    count, tmp_path, *args, *mesh, f"--out={tmp_path}", env=script_environment
  ) as all_of_them:
    expected = losses_here(*args)
    all_of_them.finish()
    where = f"{2 * count} x cpu of {count} processes (data={count}, sequence=2"
    assert where in all_of_them.text(0)
    assert "validation" not in all_of_them.text(count - 1)
  np.testing.assert_allclose(losses(tmp_path), expected, rtol=1e-5)
  assert (tmp_path / "sample.txt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["nsa", "window"])
@pytest.mark.parametrize(
  "count, mesh",
  [
    (2, ["--mesh=data=2,sequence=2", "--pack", "--tokenizer=bpe:300"]),
    (2, ["--mesh=sequence=4", "--zigzag", "--accumulate=2", "--tensorboard"]),
    (4, ["--mesh=data=4,sequence=2", "--fsdp", "--zigzag"]),
    (4, ["--mesh=data=8", "--fsdp"]),
  ],
)
def test_processes_train_as_one(
  attention, count, mesh, tmp_path, script_environment
):
  many, one = tmp_path / "many", tmp_path / "one"
  args = [*SMALL, "--steps=4", f"--attention={attention}", "--seq-len=256"]
  args += ["--batch-size=8"]
  with Processes(
    count, tmp_path, *args, *mesh, f"--out={many}", env=script_environment
  ) as all_of_them:
    all_of_them.finish()
  events = [*many.glob("tensorboard/*")]
  assert len(events) == ("--tensorboard" in mesh)
  text = [flag for flag in mesh if re.match("--(pack|tokenizer)", flag)]
  one_process(*args, *text, f"--out={one}", env=script_environment)
  np.testing.assert_allclose(losses(many), losses(one), rtol=1e-4)


@pytest.mark.slow
def test_processes_evaluate_as_one(tmp_path, script_environment):
  out, env = tmp_path / "out", script_environment
  args = [*SMALL, "--steps=2", "--tokenizer=bpe:300", f"--out={out}"]
  one_process(*args, env=env)
  *_, last = (out / "metrics.jsonl").read_text().splitlines()
  evaluate = ["--evaluate", f"--out={out}", *SMALL, "--mesh=sequence=4"]
  with Processes(2, tmp_path, *evaluate, "--zigzag", env=env) as both:
    both.finish()
    found = re.search(r"^validation +(\S+) nats/token", both.text(0), re.M)
    assert found is not None
    want = json.loads(last)["validation_loss"]
    assert float(found[1]) == pytest.approx(want, abs=1e-4)
    assert "nats" not in both.text(1)


@pytest.mark.slow
def test_checkpoints_go_from_mesh_to_mesh(tmp_path, script_environment):
  straight, moved = tmp_path / "straight", tmp_path / "moved"
  args = [*SMALL, "--attention=nsa", "--seq-len=256"]
  env = script_environment
  one_process(*args, "--steps=6", f"--out={straight}", env=env)
  args += ["--steps=6", f"--out={moved}", "--resume"]
  # Stopped by hand: --steps is part of the schedule.
  meshes = ["--mesh=data=4 --fsdp", "--mesh=sequence=4 --zigzag"]
  for i, mesh in enumerate(meshes):
    flags = [x for x in args if i or x != "--resume"]
    with Processes(2, tmp_path, *flags, *mesh.split(), env=env) as both:
      wait_for_step(both, moved, 2 * i + 2)
      both.send(1, signal.SIGKILL)
      both.wait(0)
    for extra in steps_of(moved):
      assert extra <= 6
  one_process(*args, env=env)
  assert steps_of(moved)[-1] == 6
  np.testing.assert_allclose(losses(moved), losses(straight), rtol=1e-4)


def wait_for_step(processes: Processes, out: Path, step: int) -> None:
  """Until the checkpoint of this step, or a later one, is saved."""
  for _ in range(6000):
    if any(found >= step for found in steps_of(out)):
      return
    assert processes.alive(), processes.text(0) + processes.text(1)
    time.sleep(0.05)
  pytest.fail("no checkpoint in five minutes")


@pytest.mark.slow
def test_a_killed_process(tmp_path, script_environment):
  """Ten times, at random: only the steps since the checkpoint are lost."""
  out, straight = tmp_path / "out", tmp_path / "straight"
  args = [*SMALL, "--steps=200"]
  rng = random.Random(0)
  resume: list[str] = []
  for _ in range(10):
    before = (steps_of(out) or [0])[-1] if out.exists() else 0
    mesh = rng.choice(["--mesh=data=4", "--mesh=data=2,sequence=2"])
    victim = rng.randrange(2)
    with Processes(
      2,
      tmp_path,
      *args,
      mesh,
      *resume,
      "--timeout=20",
      f"--out={out}",
      env=script_environment,
    ) as both:
      wait_for_step(both, out, before + 2)
      time.sleep(3 * rng.random())  # Also in the midst of a checkpoint.
      saved = steps_of(out)[-1]
      both.send(victim, signal.SIGKILL)
      assert both.wait(1 - victim, 60) != 0
      assert re.search(ENDED, both.text(1 - victim))
    assert steps_of(out)[-1] >= saved > before
    resume = ["--resume"]
  last = steps_of(out)[-1]
  with Processes(
    2,
    tmp_path,
    *args,
    *resume,
    f"--out={out}",
    env=script_environment,
  ) as both:
    wait_for_step(both, out, last + 2)
    assert f"steps {last} to 200" in both.text(0)
  one = [*SMALL, "--steps=200", f"--out={straight}"]
  run = subprocess.Popen(
    [sys.executable, SCRIPT.with_name("train_lm.py"), *one],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
    env=script_environment,
  )
  while not straight.exists() or (steps_of(straight) or [0])[-1] < last:
    assert run.poll() is None
    time.sleep(0.1)
  run.kill()
  run.wait()
  np.testing.assert_allclose(
    losses(out)[:last], losses(straight)[:last], rtol=1e-3
  )


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_silent_process(victim, tmp_path, script_environment):
  """It neither ends nor answers, as behind a broken network."""
  out = tmp_path / "out"
  with Processes(
    2,
    tmp_path,
    *SMALL,
    "--steps=1000",
    "--timeout=10",
    f"--out={out}",
    env=script_environment,
  ) as both:
    wait_for_step(both, out, 2)
    both.send(victim, signal.SIGSTOP)
    assert both.wait(1 - victim, 90) != 0
    assert re.search(ENDED, both.text(1 - victim))


@pytest.mark.slow
def test_a_signal_to_one_stops_all(tmp_path, script_environment):
  out = tmp_path / "out"
  with Processes(
    2, tmp_path, *SMALL, "--steps=1000", f"--out={out}", env=script_environment
  ) as both:
    wait_for_step(both, out, 2)
    both.send(1, signal.SIGTERM)
    assert [both.wait(i, 90) for i in range(2)] == [143, 143]
    assert "stopped at step" in both.text(0)
    step = re.search(r"stopped at step (\d+)", both.text(0))
    assert step is not None
    assert steps_of(out)[-1] == int(step[1])


@pytest.mark.parametrize("pack", [False, True])
def test_accumulated_gradients(pack):
  args = cli.make_parser().parse_args(["--attention=window"])
  args.seq_len, args.batch_size, args.pack, args.eval_batches = 64, 4, pack, 1
  config = train.model_config(args)
  text = np.random.default_rng(0).integers(1, 256, 4000).astype(np.uint8)
  sizes = [700, 90, 60, 1500, 30, 1620]
  corpus = data.Corpus("random", text, text, {}, sizes, sizes)
  batch = train.open_data(args, config.nsa, corpus)[0].read(0)
  model = TransformerLM(config)
  init = jax.jit(model.init)
  params = init(jax.random.key(0), np.zeros((1, 8), np.int32))["params"]

  def gradients(count):
    return jax.jit(functools.partial(train.loss_and_grads, model, count=count))

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
    gradients(2)(params, batch),
    gradients(1)(params, batch),
  )


def make_devices(mesh: str, zigzag: bool = False) -> devices.MeshDevices:
  return devices.MeshDevices(sharded.mesh_sizes(mesh), False, zigzag)


def test_batches_on_a_mesh():
  mesh = make_devices("data=2,sequence=4", zigzag=True)
  assert mesh.layout == Layout("data", "sequence", None, zigzag=True)
  assert mesh.rows(6) == slice(0, 6)
  windows = np.arange(6 * 17).reshape(6, 17)
  got = mesh.put(windows, 6)
  assert isinstance(got, PackedRow)
  assert got.segment_ids is got.positions is None
  order = [0, 1, 14, 15, 2, 3, 12, 13, 4, 5, 10, 11, 6, 7, 8, 9]
  np.testing.assert_array_equal(got.tokens, windows[:, order])
  np.testing.assert_array_equal(got.labels, windows[:, 1:][:, order])
  assert got.tokens.sharding.shard_shape(got.tokens.shape) == (3, 4)


def test_one_device_draws_in_kernels():
  """Over a mesh each device would draw the numbers of all."""
  name = "jax_threefry_gpu_kernel_lowering"

  def init():
    return jax.random.normal(jax.random.key(0), (8, 16))

  def create(where: devices.Devices) -> Any:
    """The array that is made, and whether kernels drew its numbers."""
    seen = []

    def watched():
      seen.append(getattr(jax.config, name))
      return init()

    shape = jax.eval_shape(init)
    sharding = where.shardings(shape)
    shape = jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
    made = where.create(watched, shape)
    assert made.sharding == sharding
    return made, *seen

  split, in_kernels = create(make_devices("data=8"))
  assert not in_kernels
  whole, in_kernels = create(devices.Devices())
  assert in_kernels
  assert not getattr(jax.config, name)
  np.testing.assert_array_equal(whole, split)
  with devices.draw_in_kernels():
    lowered = jax.jit(init).trace().lower(lowering_platforms=("cuda",))
  assert "cu_threefry2x32" in lowered.as_text()


def test_a_process_reads_its_rows_alone(monkeypatch):
  text = np.arange(200, dtype=np.uint8)
  batches = data.RandomWindows(text, 0, 8, 16)
  np.testing.assert_array_equal(
    batches.read(3, slice(2, 4)), batches.read(3)[2:4]
  )


@pytest.mark.parametrize(
  "args, message",
  [
    (["--mesh=rows=2"], "argument --mesh: 'rows=2' is not one of data, seq"),
    (["--mesh=data=0"], "argument --mesh: 'data=0' is not one of data, seq"),
    (["--mesh=data=3"], "--mesh has 3 devices, but 1 processes have 8."),
    (
      ["--mesh=data=4,sequence=2", "--accumulate=4"],
      "--batch-size 8 must be a multiple of 16, the devices along data times "
      "--accumulate.",
    ),
    (
      ["--mesh=sequence=8", "--zigzag", "--seq-len=136"],
      "--seq-len 136 must be a multiple of 16, twice the devices along",
    ),
    (
      ["--mesh=data=4,heads=2", "--max-bytes=100000"],
      "must have 'kv_heads' a multiple of 2",
    ),
    (["--accumulate=3"], "argument --accumulate: 3 does not divide --batch"),
    (
      ["--processes=2", "--coordinator=127.0.0.1:1"],
      "argument --process: is missing",
    ),
  ],
)
def test_messages(args, message, capsys):
  with pytest.raises(SystemExit) as caught:
    sharded.main([*SMALL, "--batch-size=8", *args])
  assert caught.value.code == 2
  error = capsys.readouterr().err
  assert error.startswith("train_sharded.py: error: ")
  assert message in error
