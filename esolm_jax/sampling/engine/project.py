"""Matrix products of a decoding pass, with the norm before them: a kernel on GPUs for few tokens,
XLA's products elsewhere."""

import dataclasses
import functools
import math

import jax
from jax.sharding import Mesh, PartitionSpec

from esolm_jax.model import layers
from esolm_jax.parallel import sharding
from esolm_jax.sampling.engine import cpu_kernels
from esolm_jax.sampling.engine.quantize import Quantized
from esolm_jax.sampling.engine.residual import Layer, Residual, biased, normed

MOST_TOKENS = 4  # beyond, matrix products


@dataclasses.dataclass(frozen=True)
class Projection:
    """How a platform computes products. Hashable. A call: (residual, layer) → (the layer's result
    for the normed residual, the residual as one array).

    Attributes:
      mesh: None = one device.
      platform: "gpu" for its kernel, else XLA's products.
      interpret: run the kernel in Python, on any device.
      most_tokens: of a device's rows in a pass, for the kernel.
    """

    mesh: Mesh | None = None
    platform: str = ""
    interpret: bool = False
    most_tokens: int = MOST_TOKENS

    def __call__(self, residual: Residual, layer: Layer, dtype=None) -> tuple[jax.Array, jax.Array]:
        """The result is in `dtype` (default: that of the residual)."""
        if self.takes(residual.h):
            from esolm_jax.sampling.engine import project_gpu  # importing Pallas takes a second

            run = functools.partial(project_gpu.project, dtype=dtype, interpret=self.interpret)
            if self.mesh is not None:
                run = self._on_mesh(run, residual, layer)
            return run(residual, layer)
        h = residual.sum()
        y = cpu_kernels.matmul(normed(layer.config, h), layer.kernel, dtype)
        y = biased(y, layer.bias)
        return layers.activate(layer.config, y) if layer.activates else y, h

    def product(self, x, kernel: jax.Array | Quantized) -> jax.Array:
        """The product of x [B, W, D] and a kernel [D, F], without a norm: [B, W, F], or the parts
        of its sum, [parts, B, W, F]: float32 if they are several. For Residual.added."""
        splits_terms = self.mesh is not None and self.mesh.shape["tensor"] > 1
        if splits_terms or not self.takes(x):
            return cpu_kernels.matmul(x, kernel)
        from esolm_jax.sampling.engine import project_gpu

        run = functools.partial(project_gpu.product, interpret=self.interpret)
        if self.mesh is not None:
            specs = sharding.spec("rows"), PartitionSpec()
            run = self._shard_map(run, specs, sharding.spec(None, "rows"))
        return run(x, kernel)

    def takes(self, x) -> bool:
        """Whether the kernel runs: on a GPU, for few tokens [B, W, D] of 16 bits; in tests, of any
        dtype."""
        shards = 1 if self.mesh is None else sharding.num_row_shards(self.mesh)
        is_few = math.prod(x.shape[:2]) // shards <= self.most_tokens
        is_narrow = x.dtype.itemsize == 2 or self.interpret
        return self.platform == "gpu" and is_few and is_narrow

    def _on_mesh(self, run, residual: Residual, layer: Layer):
        """`run` on each device's rows, and its columns of this layer."""
        rows = sharding.spec("rows")
        is_parts = residual.added is not None and residual.added.ndim > residual.h.ndim
        added = sharding.spec(None, "rows") if is_parts else rows
        columns = (None, "mlp") if layer.activates else ("heads",)
        kernel, bias = sharding.spec(None, *columns), sharding.spec(*columns)
        if isinstance(layer.kernel, Quantized):
            kernel = Quantized(kernel, bias)
        return self._shard_map(
            run,
            (Residual(rows, added, PartitionSpec()), layer.replace(kernel=kernel, bias=bias)),
            (sharding.spec("rows", None, columns[-1]), rows),
        )

    def _shard_map(self, run, in_specs, out_specs):
        return jax.shard_map(
            run,
            mesh=self.mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            check_vma=False,  # kernels do not declare over which axes their results vary
        )
