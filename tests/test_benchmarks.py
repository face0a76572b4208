"""The benchmarks' tables, plots and arguments, on made-up timings."""

import dataclasses
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nsa_jax
from benchmarks import (
  backends,
  cold_compile,
  decode,
  harness,
  loss_curve,
  prefill,
  remat,
  selected,
  sharded,
  sweep_band,
  train_step,
  trained_ids,
  whole_op,
)
from examples.lm.data import Corpus
from nsa_jax import NSAConfig, TransformerConfig

NSA = NSAConfig(8, 4, 16, num_selected=4, window=32)
COMMANDS = (
  whole_op,
  train_step,
  loss_curve,
  decode,
  prefill,
  trained_ids,
  cold_compile,
  remat,
  selected,
  sharded,
  backends,
)


@pytest.mark.parametrize("module", COMMANDS)
def test_without_a_gpu_nothing_is_timed(module, tmp_path):
  if jax.default_backend() == "gpu":
    return
  # Tiny models under remat are measured on any machine.
  quick = [] if module is remat else ["--quick"]
  with pytest.raises(SystemExit, match="needs an NVIDIA GPU: JAX found 'cpu'"):
    module.main([*quick, f"--out={tmp_path}"])
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", COMMANDS)
def test_arguments(module, tmp_path, capsys):
  args = module.parser().parse_args(["--quick", f"--out={tmp_path}"])
  assert args.quick
  assert args.out == tmp_path
  assert module.parser().parse_args([]).out == harness.RESULTS
  with pytest.raises(SystemExit) as caught:
    module.parser().parse_args(["--quik=1"])
  assert caught.value.code == 2
  assert "unrecognized arguments" in capsys.readouterr().err


@pytest.mark.parametrize("branch", ["compressed", "selected, pool of 26"])
def test_backends_side_by_side(
  branch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
  """On made-up times of implementations that run here."""
  times = iter([2.0, 6.0, 1.0, 3.0])
  monkeypatch.setattr(
    backends, "BACKENDS", {"Triton": "reference", "Mosaic": "xla"}
  )
  monkeypatch.setattr(
    harness,
    "device_ms",
    lambda program, *args, repeats: (program(*args), next(times)),
  )
  row = backends.compare(branch, backends.Heads(8, 1, 16, 16), 128, 1)
  assert (row["Triton bwd ms"], row["Mosaic bwd ms"]) == (4.0, 2.0)
  assert row["Triton / Mosaic, fwd"] == row["Triton / Mosaic, bwd"] == 2
  assert row["difference"] < 0.01


def test_a_backend_that_cannot_is_a_row(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  monkeypatch.setattr(backends, "BACKENDS", {"cuDNN": "cudnn"})
  row = backends.compare("compressed", backends.Heads(8, 1, 16, 16), 64, 1)
  assert "has no `compressed_attention`" in row["cuDNN fwd ms"]


def test_more_arguments():
  parse = whole_op.parser().parse_args
  assert parse([]).long == 2**20
  assert parse(["--lengths", "4096", "8192"]).lengths == [4096, 8192]
  assert parse(["--parts", "8192"]).parts == [8192]
  assert parse(["--kv-heads", "1"]).kv_heads == 1
  assert parse([]).head_dim == 128
  assert train_step.parser().parse_args(["--layers=3"]).layers == 3
  assert loss_curve.parser().parse_args([]).batch_size == 4


# The whole op.


def made_up():
  """Times at three lengths; cuDNN is overtaken between the first two."""
  times: dict[int, dict[str, tuple[float, ...]]] = {
    1000: {"whole": (4.0, 10.0), "cuDNN": (2.0, 5.0)},
    2000: {"whole": (8.0, 20.0), "cuDNN": (16.0, 40.0), "Triton FA": (32.0,)},
    65536: {"whole": (30.0, 66.0), "window": (3.0, 11.0)},
  }
  parts: dict[str, tuple[float, ...]] = {
    "compressed": (9.0, 24.0),
    "scores and top-n": (5.5,),
  }
  times[65536] |= parts | {
    "selected": (11.5, 27.0),
    "Triton FA": (168.0, 660.0),
  }
  measured: dict[int, Any] = {}
  for length, found in times.items():
    flat = {
      (name, kind): ms
      for name, pair in found.items()
      for kind, ms in zip(("fwd", "bwd"), pair, strict=False)
    }
    memory = {"fwd": 10.0, "fwd+bwd": 20.0}
    measured[length] = flat, {"temporary MiB": memory}
  for length, wall in ((1000, (15.0, 7.5)), (2000, (30.0, 60.0))):
    for name, ms in zip(("whole", "cuDNN"), wall, strict=True):
      measured[length][0][name, "wall"] = ms
  measured[1000][1]["errors"] = [{"array": "out", "relative error": 0.003}]
  measured[65536][1]["kernels"] = {"nsa_selected_dq": 3.0, "loop_fusion": 1.0}
  return measured


def test_tables_of_the_whole_op(tmp_path):
  measured = made_up()
  tables = whole_op.tables(
    measured, NSAConfig(), {"tokens": 7}, {"cuDNN, 65536": "no memory"}
  )
  first, second, last = tables["Time"]
  assert (first["fwd ms"], first["bwd ms"]) == (4.0, 10.0)
  assert (first["cuDNN dense fwd ms"], last["cuDNN dense fwd ms"]) == (
    2.0,
    None,
  )
  assert second["Triton FA bwd ms"] is None
  assert last["temporary MiB, fwd+bwd"] == 20.0
  assert last["fwd ns/token"] == pytest.approx(30e6 / 65536)

  first, second, last = tables["Times faster than dense attention"]
  assert first["cuDNN, fwd"] == 0.5
  assert second["cuDNN, fwd+bwd"] == 2.0
  assert second["Triton FA, fwd+bwd"] is None
  assert (last["Triton FA, fwd"], last["Triton FA, bwd"]) == (5.6, 10.0)
  assert last["paper, fwd"] == 9.0
  assert last["of the paper, bwd"] == pytest.approx(10 / 6)
  assert last["of the ceiling, Triton FA fwd"] == pytest.approx(0.6125)
  assert first["paper, fwd"] is None

  cudnn, triton = tables["Break-even length, tokens"]
  assert (cudnn["fwd"], cudnn["fwd+bwd"]) == (1414, 1414)
  assert (cudnn["wall"], triton["wall"]) == (1414, "not measured")
  assert (triton["fwd"], triton["bwd"]) == ("below 2000", "below 65536")

  (row,) = tables["Parts, ms (timed alone)"]
  assert row["gates and the rest fwd"] == pytest.approx(1.0)
  assert row["gates and the rest bwd"] == pytest.approx(4.0)
  assert "scores and top-n bwd" not in row
  kernels = tables["Kernels of fwd+bwd at 65536 tokens"]
  assert [row["share"] for row in kernels] == ["75.0%", "25.0%"]
  assert tables["A long sequence"] == [{"tokens": 7}]
  assert tables["Did not run"][0]["reason"] == "no memory"
  assert any("Against xla in float32, 1000" in name for name in tables)

  whole_op.plot(tmp_path / "plot.png", measured)
  assert (tmp_path / "plot.png").stat().st_size > 10_000
  harness.record(tmp_path, "whole_op", "Title", tables, more=[1])
  saved = json.loads((tmp_path / "whole_op.json").read_text())
  assert saved["tables"]["Time"] == tables["Time"]
  assert saved["more"] == [1]
  assert "| 65536 | 30 | 66 |" in (tmp_path / "whole_op.md").read_text()


def test_calls_in_a_row():
  x = jnp.ones(3)
  assert harness.in_a_row_ms(lambda x: x + 1, x, calls=3) > 0


def test_break_even():
  lengths = (1, 2, 4)
  assert whole_op.break_even(lengths, (2.0, 3.0, 4.0)) == "below 1"
  assert whole_op.break_even(lengths, (0.1, 0.5, 0.9)) == "above 4"
  assert whole_op.break_even(lengths, (0.1, 0.5, 2.0)) == 3
  assert whole_op.break_even(lengths, (2.0, 0.5, None)) == "above 2"
  assert whole_op.break_even(lengths, (None,) * 3) == "not measured"


def test_keys_read():
  # The figures of the design, from the paper's configuration.
  for length, want in (
    (8192, 2.3),
    (16384, 4.0),
    (32768, 6.4),
    (65536, 9.1),
    (131072, 11.6),
  ):
    found = whole_op.keys_read_ratio(length, NSAConfig())
    assert found == pytest.approx(want, abs=0.06)


def test_programs_of_the_whole_op():
  shape = whole_op.Shape(32, 2, 1, 16, NSA, jnp.float32, "xla")
  wanted = whole_op.jobs(
    shape, only=("whole",), check=True, longest={"cuDNN": 0, "Triton FA": 0}
  )
  programs = harness.compile_all(wanted)
  names = {(name, kind) for _, name, kind in programs}
  assert names == {
    ("inputs", "fwd"),
    ("whole", "fwd"),
    ("whole", "both"),
    ("expected", "both"),
  }
  x = whole_op.program(programs, (shape, "inputs", "fwd"))(0)
  primals = tuple(x[:-1])
  out, ids = whole_op.program(programs, (shape, "whole", "fwd"))(*primals)
  gradients = whole_op.program(programs, (shape, "whole", "both"))(
    primals, (), x.dout
  )
  want = whole_op.program(programs, (shape, "expected", "both"))(x, ids)
  rows = whole_op.errors(out, gradients, *want)
  assert [row["array"] for row in rows] == [
    "out",
    "dquery",
    "dkey_compressed",
    "dvalue_compressed",
    "dkey_selected",
    "dvalue_selected",
    "dkey_window",
    "dvalue_window",
    "dgates",
  ]
  assert max(row["relative error"] for row in rows) < 1e-5
  every = whole_op.jobs(shape)
  assert (shape, "cuDNN", "both") in every
  assert (shape, "scores and top-n", "both") not in every
  long = whole_op.jobs(shape._replace(length=2**18))
  assert not {name for _, name, _ in long} & {"cuDNN", "Triton FA"}


def test_inputs_longer_than_a_piece_differ():
  shape = whole_op.Shape(whole_op.CHUNK + 64, 1, 1, 16)
  x = jax.jit(whole_op.inputs, static_argnums=1)(0, shape)
  assert x.query.shape == (1, shape.length, 1, 16)
  assert (x.query[0, :64] != x.query[0, whole_op.CHUNK :]).any()
  assert (x.query != x.dout).any()


def test_a_failed_program_is_reported(capsys):
  def fails(x):
    raise ValueError("too large\nfor the card")

  programs = harness.compile_all({"a": (fails, (1,)), "b": (jnp.sin, (1.0,))})
  assert programs["b"](1.0) == jnp.sin(1.0)
  failures = whole_op.Failures()
  assert failures.attempt("a", lambda: whole_op.program(programs, "a")) is None
  assert failures == {"a": "too large"}
  assert "a did not run: too large" in capsys.readouterr().out


# The training step.

HLO = """HloModule jit_train_step

%fused_computation.2 (p: f32[8]) -> f32[8] {
  %p = f32[8] parameter(0)
  ROOT %mul.1 = f32[8] multiply(%p, %p), metadata={op_name="STEP/mul"}
}

ENTRY %main.9 (a: f32[8]) -> f32[8] {
  %a = f32[8] parameter(0)
  %loop_fusion.3 = f32[8] fusion(%a), kind=kLoop, calls=%fused_computation.2
  %input-fusion = f32[8] fusion(%a), metadata={op_name="ATTN/compress_key/add"}
  %gates.1 = f32[8] fusion(%a), metadata={op_name="ATTN/mul"}
  ROOT %silu.2 = f32[8] fusion(%a), metadata={op_name="STEP/jvp(T)/jit(silu)"}
}
""".replace("ATTN", "STEP/jvp(T)/layers/attention").replace(
  "STEP", "jit(train_step)"
)


def test_kinds_of_kernels():
  origins = train_step.operations(HLO)
  kernels = {
    "loop_fusion_3": "optimiser",
    "input_fusion": "phi (fused kernels)",
    "gates_1": "attention: RoPE, gates, layout",
    "silu_2": "norms, SwiGLU",
    "nsa_selected_dq": "NSA: selected",
    "nsa_window_fwd": "NSA: window",
    "nsa_compressed_fwd": "NSA: compressed",
    "nsa_top_n": "NSA: scores and top-n",
    "nsa_anything": "NSA: other kernels",
    "void cub::DeviceRadixSortOnesweep": "sorts (NSA: selected, embedding)",
    "nvjet_tst_128x256_64x4": "matrix products",
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop": "full attention "
    "(cuDNN)",
    "memset": "rest",
  }
  for kernel, kind in kernels.items():
    assert train_step.kind_of(kernel, origins) == kind, kernel
  total = train_step.by_kind({"gates_1": 1.0, "nsa_top_n": 2.0}, origins)
  assert list(total.values()) == [2.0, 1.0]


def test_tables_of_the_training_step(tmp_path):
  origins = train_step.operations(HLO)
  measured = {
    "nsa": (
      {"attention": "nsa", "tokens/s": 300.0},
      {"nvjet": 6.0, "nsa_selected_fwd": 4.0},
      origins,
    ),
    "full": (
      {"attention": "full", "tokens/s": 100.0},
      {"nvjet": 6.0, "sdpa": 14.0},
      origins,
    ),
  }
  random = [{"tokens/s": 400.0}, {"tokens/s": 100.0}]
  tables = train_step.tables(measured, {"phi": (0.05, 16)}, random)
  faster = [row["nsa is faster by"] for row in tables["One step"]]
  assert faster == [1.0, 3.0, 1.0, 4.0]
  rows = tables["Where the time goes"]
  assert rows[0] == {
    "kind": "matrix products",
    "nsa ms": 6.0,
    "nsa share": "60.0%",
    "full ms": 6.0,
    "full share": "30.0%",
  }
  assert rows[1]["full ms"] is None
  (phi,) = tables["Parts timed alone, forward and backward"]
  assert phi["share of the nsa step"] == "8.0%"
  assert len(tables["Largest kernels of the nsa step"]) == 2
  train_step.plot(tmp_path / "plot.png", rows, ("nsa", "full"))
  assert (tmp_path / "plot.png").stat().st_size > 5_000


def test_programs_of_the_training_step():
  config = TransformerConfig.preset(
    "tiny", num_layers=1, model_dim=16, num_heads=2, head_dim=8, mlp_dim=16
  )
  config = dataclasses.replace(config, implementation="xla")
  wanted = train_step.jobs({"nsa": config}, 32)
  names = {name for _, name in wanted}
  assert names == {"init", "step", "phi", "embedding"}
  run, (table, out, tokens) = wanted["nsa", "embedding"]
  assert jax.eval_shape(run, table, out, tokens) == (out, (table,))
  run, shapes = wanted["nsa", "phi"]
  gradients = jax.eval_shape(run, *shapes)
  assert jax.tree.map(jnp.shape, gradients) == jax.tree.map(
    jnp.shape, tuple(shapes[:2])
  )
  assert jax.tree.map(jnp.shape, train_step.noise(0, shapes)) == jax.tree.map(
    jnp.shape, shapes
  )


def test_tokens_of_a_large_vocabulary():
  text = np.frombuffer(b"abab ba ab", np.uint8).astype(np.int32)[None]
  tokens = train_step.pairs_of_bytes(text, 2**15)
  assert tokens.shape == text.shape
  assert tokens.max() < 2**15
  assert tokens[0, 0] == tokens[0, 2] == tokens[0, 8]  # "ab"
  assert len(np.unique(tokens)) == 6


@pytest.mark.parametrize("attention", train_step.ATTENTIONS)
def test_models_of_the_training_step_can_be_traced(attention):
  sizes = {"num_layers": 1, "model_dim": 32, "num_heads": 2, "num_kv_heads": 1}
  sizes |= {"head_dim": 16, "mlp_dim": 16}
  configs = {
    name: train_step.configure(name, **sizes) for name in ("nsa", attention)
  }
  step, shapes = train_step.jobs(configs, 64)[attention, "step"]
  assert jax.eval_shape(step, *shapes)[1].shape == ()


# Remat policies.


def test_quick_remat(tmp_path, monkeypatch):
  for name, value in {"attention": "window", "implementation": "xla"}.items():
    monkeypatch.setitem(remat.QUICK, name, value)  # compiles faster
  monkeypatch.setattr(remat, "PLACES", {"scan": True})
  remat.main(["--quick", f"--out={tmp_path}", "--policies", "save_attention"])
  tables = json.loads((tmp_path / "remat.json").read_text())["tables"]
  for rows in (tables[remat.LONG_TABLE], tables[remat.TABLE]):
    (row,) = rows
    assert (row["remat"], row["runs"]) == ("save_attention", "yes")
    assert row["tokens/s"] > 0
    assert 4 < row["last loss"] < row["first loss"] < 8
  # The input of a block, and out of the window: `xla` needs no lse.
  heads, width, head_dim = (
    remat.QUICK[name] for name in ("num_heads", "model_dim", "head_dim")
  )
  want = 4 * (width + heads * head_dim)
  assert row["bytes on the device"] == pytest.approx(want, rel=0.1)
  assert row["bytes on the host"] == 0


def test_bytes_by_a_second_difference():
  def size(layers, length):
    return 7 + 5 * layers + (3 * layers + 11) * length

  sizes = {(n, t): float(size(n, t)) for n in (2, 4) for t in (64, 128)}
  assert remat.slope(sizes) == 3


def test_a_step_that_does_not_fit_is_a_row(capsys):
  program = remat.Program("full", True, 2, 8)
  row = remat.long_row(program, RuntimeError("too | large\nhere"), None)
  assert row == {"remat": "full", "runs": "no: too / large"}
  row = remat.table_row({program: ValueError("")}, "scan", None)
  assert row["runs"] == "no: ValueError"
  assert "too / large" in capsys.readouterr().out


# Compilation from a cold start.


@pytest.mark.parametrize("attention", cold_compile.ATTENTIONS)
@pytest.mark.parametrize("name", cold_compile.PROGRAMS)
def test_cold_programs(name, attention):
  sizes: dict[str, Any] = {"kv_heads": 1, "heads": 2, "head_dim": 16}
  if name != "op":
    sizes = {"num_layers": 1, "model_dim": 32, "num_heads": 2, "mlp_dim": 16}
    sizes |= {"num_kv_heads": 1, "head_dim": 16}
  sizes["implementation"] = "xla"
  program = cold_compile.make(name, attention, 64, **sizes)
  seconds = cold_compile.measure(program)
  assert list(seconds) == list(cold_compile.SECONDS)
  assert min(seconds.values()) > 0


def test_rows_of_cold_programs():
  seconds = dict.fromkeys(cold_compile.SECONDS, 1.0)
  half = dict.fromkeys(cold_compile.SECONDS, 0.5)
  found = cold_compile.tables(
    {
      ("op", "nsa"): {"default": seconds, "no autotuning": half},
      ("op", "full"): {"default": half, "no autotuning": half},
    }
  )
  (first, second) = found["From the call to the first result"]
  assert first["total s"] == 4
  assert first["more than without autotuning"] == 2
  assert first["times full attention"] == 2
  assert second["times full attention"] == 1


# Trained block ids.


def test_trained_ids_are_saved_by_layer(tmp_path):
  config = trained_ids.configure(
    num_layers=2, model_dim=16, mlp_dim=16, num_heads=2, head_dim=8, nsa=NSA
  )
  text = np.random.default_rng(0).integers(0, 256, 400).astype(np.uint8)
  params, loss = trained_ids.trained(config, text, 64, steps=2)
  assert 4 < loss < 7
  found: dict[str, Any] = trained_ids.selected_by_layer(
    config, params, text[None, :64]
  )
  assert list(found) == ["layer_0", "layer_1"]
  np.savez(tmp_path / "ids.npz", **found)
  loaded = trained_ids.load(tmp_path / "ids.npz", 48, kv_heads=3)
  assert loaded["layer_1"].shape == (1, 48, 3, 4)
  np.testing.assert_array_equal(
    loaded["layer_1"][:, :, 2], found["layer_1"][:, :48, 0]
  )
  assert not trained_ids.load(tmp_path / "ids.npz", 100, kv_heads=3)
  assert not trained_ids.load(tmp_path / "none.npz", 48, kv_heads=3)


def test_distinct_blocks_are_counted():
  ids = np.array([[0, 1], [0, 2], [1, 2], [1, -1]])[None, :, None]
  (row,) = next(
    iter(trained_ids.tables({"a": np.tile(ids, (1, 4, 1, 1))}).values())
  )
  assert row["of 2 neighbours"] == (3 + 2) / 2
  assert row["of 4 neighbours"] == 3
  assert row["longest list / mean"] == 3 / (7 / 3)


# The loss curves.


def test_curves_start_alike_and_are_compared(tmp_path):
  config = TransformerConfig.preset(
    "tiny", num_layers=1, model_dim=16, mlp_dim=16, attention="full"
  )
  text = np.random.default_rng(0).integers(0, 256, 400).astype(np.uint8)
  found = loss_curve.curves(
    config,
    Corpus("noise", text, text),
    runs={
      "xla": ("reference", jnp.float32, False),
      "reversed": ("reference", jnp.float32, True),
    },
    steps=3,
    batch_size=2,
    seq_len=32,
  )
  base, other = found["xla"], found["reversed"]
  assert len(base) == 3
  assert base[0] != base[2]
  np.testing.assert_allclose(base, other, rtol=1e-4)

  base, other = [3.0, 2.0, 1.0], [3.0, 2.5, 1.25]
  rows = loss_curve.summary({"xla": base, "triton": other})
  assert "largest difference" not in rows[0]
  assert (rows[1]["largest difference"], rows[1]["at step"]) == (0.5, 2)
  assert rows[1]["last loss"] == 1.25
  loss_curve.plot(tmp_path / "plot.png", {"xla": base, "triton": other})
  assert (tmp_path / "plot.png").stat().st_size > 5_000


# Decoding.


def test_tables_of_decoding(tmp_path):
  shape = decode.Shape(32, 65536)
  size = decode.bytes_read(shape)
  mib = 2**20 * 32
  assert size["dense"] == 128 * mib
  assert size["compressed"] == pytest.approx(8 * mib, rel=1e-3)
  assert (size["selected"], size["window"]) == (2 * mib, mib)
  measured: dict[Any, dict[str, Any]] = {
    shape: {
      "times": {
        "NSA": {"kernels": 0.125, "wall": 0.25},
        "cuDNN": "not here",
        "XLA": {"kernels": 2.0, "wall": 2.5},
        "XLA, heads first": {"kernels": 1.0, "wall": 3.0},
      },
      "bandwidth": 4.8e12,
      "kernels": {"nsa_decode_merge": 0.004},
      "error": {"context": 65536, "relative error of out": 0.003},
    }
  }
  tables = decode.tables(measured)
  (row,) = tables["One step"]
  assert (row["times faster, kernels"], row["times faster, wall"]) == (8, 10)
  assert row["cuDNN wall ms"] is None
  assert row["limit (bytes)"] == pytest.approx(11.6, abs=0.06)
  assert row["dense, of the bandwidth"] == pytest.approx(0.895, abs=1e-3)
  assert tables["Did not run"][0]["reason"] == "not here"
  assert any("Kernels of a step" in name for name in tables)
  # A card whose bandwidth is not known.
  other = {shape: measured[shape] | {"bandwidth": None}}
  (row,) = decode.tables(other)["One step"]
  assert "of the bandwidth" not in row
  assert row["times faster, kernels"] == 8
  decode.plot(tmp_path / "plot.png", measured)
  assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_tilings_of_decoding():
  for shape in (decode.Shape(*size) for size in decode.QUICK):
    found = decode.candidates(shape)
    assert found[0] == decode.default_tiles(shape)
    for kernel, least in (("compressed", 6), ("blocks", 12)):
      labels = {decode.label(tiles, kernel) for tiles in found}
      assert len(labels) >= least


@pytest.mark.parametrize("shape", sweep_band.SHAPES, ids=str)
@pytest.mark.parametrize("branch", sweep_band.BRANCHES)
def test_tilings_of_a_band(branch, shape):
  found = sweep_band.tilings(branch, shape)
  base = sweep_band.chosen(branch, shape)
  assert found[0] == base
  for i, name in enumerate(("fwd", "dkv")):
    tiles = {getattr(tiles, name) for tiles in found}
    candidates = sweep_band.columns(shape)[2 * i]
    assert len(tiles) >= sum(tile[3] >= shape.group for tile in candidates)
  # Only one of the two that share ds differs from the chosen one, if they fit.
  assert all(tiles.dkv == base.dkv or tiles.fwd == base.fwd for tiles in found)


def test_dense_decoding():
  shape = decode.Shape(2, 48, 4, 2, 16, NSA, jnp.float32)
  x = decode.inputs(0, shape)
  key, value = x.selected
  swapped = [jnp.swapaxes(a, 1, 2) for a in x.selected]
  got = [
    decode.dense("XLA", shape)(x.query, key, value),
    decode.dense("XLA, heads first", shape)(x.query, *swapped),
  ]
  want = jax.nn.dot_product_attention(x.query, key, value)
  for out in got:
    np.testing.assert_allclose(out, want, atol=1e-5)


def test_prefill_in_chunks_is_the_whole():
  shape = prefill.Shape(48, 4, 2, 16, NSA, jnp.float32, "xla")
  rows = prefill.measure(shape, (16,), 1)
  assert [(row["chunk"], row["place"]) for row in rows] == [
    (48, "static"),
    (16, "static"),
    (16, "traced"),
  ]
  for row in rows:
    assert row["ms"] > 0
    assert row["over the whole"] == row["ms"] / rows[0]["ms"]
    assert row["relative difference of out"] < 1e-5


# The op over several devices.


def test_bytes_that_a_device_receives():
  """An all-reduce is a reduce-scatter and an all-gather."""
  text = """
    %a = f32[1024,256]{1,0} all-reduce(%x), replica_groups={{0,1,2,3}}
    %b = (bf16[4,512,512]{2,1,0}, bf16[8,256,1024]{2,1,0}) all-gather(%x, %y)
    %c = (f32[512,256]{1,0}, f32[128,256]{1,0}) reduce-scatter-start(%x)
    %d = f32[512,512]{1,0} add(%x, %y)
    %e = bf16[512,1024]{1,0} collective-permute(%x), source_target_pairs={{0,1}}
    %f = f32[512,256]{1,0} all-to-all(%x), replica_groups=[2,2]<=[4]
    %h = (f32[512,256], f32[512,256]) all-reduce-start(%x, %y)
    %g = f32[512,256] all-to-all(%x), replica_groups=mesh['a'=2,'b'=2] {'b'}
  """
  assert sharded.received_mib(text, 4) == {
    "all-reduce": 2 * 3 / 4 * (1 + 1),
    "all-gather": 3 / 4 * (2 + 4),
    "reduce-scatter": 3 * 1 / 8,
    "collective-permute": 1,
    "all-to-all": 2 * 1 / 2 * (1 / 2),
  }


def test_ways_to_split():
  assert list(sharded.splits(2)) == [
    "data",
    "heads",
    "sequence",
    "sequence, zigzag",
  ]
  for count in (2, 4, 8):
    for split in sharded.splits(count).values():
      assert math.prod(split.sizes.values()) == count
  assert len(sharded.splits(8)) == 8


@pytest.mark.slow
@pytest.mark.parametrize(
  "name",
  ["data", "heads x sequence, zigzag", "data x heads x sequence, zigzag"],
)
def test_layouts_of_the_op_equal_one_device(name):
  wanted = {
    sharded.ONE: sharded.Split(nsa_jax.Layout(), {}),
    name: sharded.splits(8)[name],
  }
  *ones, row = sharded.measure(wanted, 128, (4, 2), 1)
  assert row["rows"] == ones[-1]["rows"]
  assert row["times faster"] == ones[-1]["ms"] / row["ms"]
  assert row["error"] < 1e-2


@pytest.mark.slow
def test_a_training_step_over_devices():
  row = sharded.train_row(256, "full", **remat.QUICK)
  assert row["last loss"] < row["first loss"]
