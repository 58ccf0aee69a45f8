"""Process groups: which ranks share a machine, and the layout that ``tas`` gives xDiT's own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from swiftfusion_xdit import envs
from swiftfusion_xdit.agreement import Agreement
from swiftfusion_xdit.mesh import Mesh, paper_mesh
from swiftfusion_xdit.topology import Topology
from swiftfusion_xdit.xdit.options import Options
from swiftfusion_xdit.xdit.patches import Patches

MESH_ATTRIBUTE = "swiftfusion_mesh"


def sp_group() -> Any:
    """xDiT's sequence-parallel group coordinator of this rank."""
    return sys.modules["xfuser.core.distributed.parallel_state"].get_sp_group()


def sp_topology(group: Any, options: Options) -> Topology:
    """The machines of an SP group's ranks. Collective over the group where hosts must tell.

    ``--sp-machines N`` splits *all* ranks of the job into N equal, consecutive shares, as a
    cluster would; an SP group then spans those shares that its ranks lie in.
    """
    if options.machines is None:
        agreement = Agreement(group.device_group, timeout_s=envs.get("TIMEOUT_S"))
        return Topology.from_hosts(agreement.hosts())
    world = Topology.split(dist.get_world_size(), options.machines)
    return Topology.from_hosts([world.machine_of[rank] for rank in group.ranks])


def tas_mesh(topology: Topology, options: Options, num_heads: int | None) -> Mesh:
    """``--sp-mesh``, else the paper's degrees.

    Raises:
        ValueError: a forced mesh does not divide the heads, or the heads are unknown and no mesh
            is forced.
    """
    if options.mesh is None:
        if num_heads is None:
            raise ValueError(
                "--sp-strategy tas sets its degrees by the number of attention heads, which this "
                "model's config does not tell: give --sp-mesh torus=T,ulysses=U,ring=R"
            )
        return paper_mesh(topology, num_heads)
    mesh = options.mesh
    mesh.require(num_ranks=topology.num_ranks, num_heads=num_heads)
    if num_heads is not None and num_heads % mesh.num_head_groups:
        raise ValueError(
            f"--sp-mesh {mesh}: under tas torus({mesh.torus}) * ulysses({mesh.ulysses}) = "
            f"{mesh.num_head_groups} must divide the {num_heads} heads; torus has no such limit"
        )
    return mesh


def lay_out_tas(
    parallel_config: Any, options: Options, num_heads: int | None, layout: Patches
) -> None:
    """Replace xDiT's Ulysses and Ring groups by those of the paper: same ranks, same SP group.

    Collective over all ranks. yunchang's PROCESS_GROUP, the SP coordinator and the degrees in the
    config agree afterwards; ``get_sp_group().ranks``, the order of tokens, stays as it is. Undoing
    ``layout``, at the latest when xDiT destroys the SP group, puts xDiT's own groups back.
    """
    coordinator = sp_group()
    if coordinator.world_size == 1 or layout:
        return
    mesh = tas_mesh(sp_topology(coordinator, options), options, num_heads)
    ulysses, ring = _new_groups(coordinator, mesh)
    from yunchang.globals import PROCESS_GROUP

    layout.set(PROCESS_GROUP, "ULYSSES_PG", ulysses)
    layout.set(PROCESS_GROUP, "RING_PG", ring)
    for name, group in (("ulysses", ulysses), ("ring", ring)):
        layout.set(coordinator, f"{name}_group", group)
        layout.set(coordinator, f"{name}_world_size", dist.get_world_size(group))
        layout.set(coordinator, f"{name}_rank", dist.get_rank(group))
    for config in (parallel_config, parallel_config.sp_config):
        layout.set(config, "ulysses_degree", mesh.num_head_groups)
        layout.set(config, "ring_degree", mesh.ring)
    layout.set(coordinator, MESH_ATTRIBUTE, mesh)
    on_destroy(coordinator, layout.undo, layout)


def on_destroy(coordinator: Any, action: Callable[[], None], patches: Patches) -> None:
    """Do ``action`` right before xDiT destroys this group."""
    destroy = coordinator.destroy

    def act_and_destroy() -> None:
        action()
        destroy()

    patches.set(coordinator, "destroy", act_and_destroy)


def mesh_of(coordinator: Any) -> Mesh:
    """The mesh that xDiT's own collectives run on."""
    laid_out = getattr(coordinator, MESH_ATTRIBUTE, None)
    if laid_out is not None:
        return laid_out
    return Mesh(ulysses=coordinator.ulysses_world_size, ring=coordinator.ring_world_size)


def _new_groups(coordinator: Any, mesh: Mesh) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """This rank's Ulysses and Ring group; every SP group of the job makes its own in turn."""
    size = coordinator.world_size
    backend = dist.get_backend(coordinator.device_group)
    mine: dict[str, dist.ProcessGroup] = {}
    # Without tensor parallelism SP groups are consecutive blocks of ranks.
    first = coordinator.ranks[0] - coordinator.ranks[0] % size
    assert coordinator.ranks == list(range(first, first + size)), coordinator.ranks
    for block in range(0, dist.get_world_size() - size + 1, size):
        for name, lists in (("ulysses", mesh.ulysses_groups()), ("ring", mesh.ring_groups())):
            for ranks in lists:
                group = dist.new_group([block + rank for rank in ranks], backend=backend)
                if block == first and coordinator.rank_in_group in ranks:
                    mine[name] = group
    return mine["ulysses"], mine["ring"]
