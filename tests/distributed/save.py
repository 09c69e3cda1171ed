"""A command for tests: writes a converted folder from a mesh over all processes, each its part of the weights."""

import sys
from pathlib import Path

from dllm_jax import cli, hosts
from dllm_jax.settings import DistributedSettings


def main(fields: dict[str, str]) -> int:
    """Loads `model.path` on a mesh of `mesh.fsdp` x `mesh.tensor` and writes it to `output.path`."""
    hosts.start(
        DistributedSettings(
            coordinator=fields["distributed.coordinator"],
            num_processes=int(fields["distributed.num_processes"]),
            process_id=int(fields["distributed.process_id"]),
        )
    )
    from dllm_jax.checkpoints import files, layout, store
    from dllm_jax.checkpoints.load import PARAMS, load_model, resolve
    from dllm_jax.checkpoints.manifest import write_manifest
    from dllm_jax.mesh import make_mesh

    source, folder = resolve(fields["model.path"]), Path(fields["output.path"])
    model = load_model(source, mesh=make_mesh(fsdp=int(fields["mesh.fsdp"]), tensor=int(fields["mesh.tensor"])))
    hosts.from_first(folder.mkdir)
    params = layout.flatten(model.params)
    assert not any(param.is_fully_addressable for param in params.values())
    store.save_params(folder / PARAMS, params)
    if hosts.is_first():
        files.write_config(source, folder, dtype=model.dtype.name)
        files.copy_companions(source, folder)
        write_manifest(folder)
    hosts.meet()
    return hosts.conclude(0, "")


if __name__ == "__main__":
    pairs = (argument.removeprefix("--config.").split("=", 1) for argument in sys.argv[1:])
    cli.leave(main({name: value for name, value in pairs}))
