"""Linear layers behind a norm in a decoding pass: a kernel on GPUs, XLA's products elsewhere."""

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

MOST_TOKENS = 64  # beyond, matrix products are large enough


@dataclasses.dataclass(frozen=True)
class Projection:
    """How a platform projects: (residual, layer) → (the layer's result for the normed residual, the
    residual as one array). Hashable.

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

    def __call__(self, residual: Residual, layer: Layer) -> tuple[jax.Array, jax.Array]:
        if self.takes(residual):
            from esolm_jax.sampling.engine import project_gpu  # importing Pallas takes a second

            run = functools.partial(project_gpu.project, interpret=self.interpret)
            if self.mesh is not None:
                run = self._on_mesh(run, layer)
            return run(residual, layer)
        h = residual.sum()
        y = biased(cpu_kernels.matmul(normed(layer.config, h), layer.kernel), layer.bias)
        return layers.activate(layer.config, y) if layer.activates else y, h

    def takes(self, residual: Residual) -> bool:
        """Whether the kernel runs: on a GPU, for few tokens of 16 bits; in tests, of any."""
        shards = 1 if self.mesh is None else sharding.num_row_shards(self.mesh)
        is_few = math.prod(residual.h.shape[:2]) // shards <= self.most_tokens
        is_narrow = residual.h.dtype.itemsize == 2 or self.interpret
        return self.platform == "gpu" and is_few and is_narrow

    def _on_mesh(self, run, layer: Layer):
        """`run` on each device's rows, and its columns of this layer."""
        rows = sharding.spec("rows")
        columns = (None, "mlp") if layer.activates else ("heads",)
        kernel, bias = sharding.spec(None, *columns), sharding.spec(*columns)
        if isinstance(layer.kernel, Quantized):
            kernel = Quantized(kernel, bias)
        return jax.shard_map(
            run,
            mesh=self.mesh,
            in_specs=(
                Residual(rows, rows, PartitionSpec()),
                layer.replace(kernel=kernel, bias=bias),
            ),
            out_specs=(sharding.spec("rows", None, columns[-1]), rows),
            check_vma=False,  # kernels do not declare over which axes their results vary
        )
