"""The group `alluxiofuse admin`."""

from __future__ import annotations

import time
from typing import Any

import click

from alluxiofuse.cli.fs_context import FsContext, master_options, run, say, say_json
from alluxiofuse.cli.fs_manage import mount_json, mount_line
from alluxiofuse.cli.fs_show import json_option
from alluxiofuse.units import format_size
from alluxiofuse.wire import master_ops as ops
from alluxiofuse.wire.types import WorkerInfo

SILENT_MS = 10_000
"""A worker not heard of for so long gets no new content (10 heartbeats of a second)."""


@click.group()
def admin() -> None:
    """Look at the cluster."""


@admin.command()
@json_option
@master_options
def report(context: FsContext, as_json: bool) -> None:
    """The state of master, workers, tiers, mounts, uploads and clients."""

    async def work() -> ops.MasterReport:
        async with context.connection() as master:
            return await master.call(ops.ReportState())

    found = run(work)
    if as_json:
        say_json(report_json(found, context.address))
    else:
        say(report_text(found, context.address))


def worker_json(worker: WorkerInfo) -> dict[str, Any]:
    address = worker.address
    return {
        "worker_id": address.worker_id,
        "hostname": address.hostname,
        "address": f"{address.host}:{address.port}" if address.port else "",
        "unix_path": address.unix_path,
        "is_alive": worker.is_alive,
        "has_left": worker.has_left,
        "last_heartbeat_ms_ago": worker.last_heartbeat_ms_ago,
        "version": worker.version,
        "container_count": worker.container_count,
        "block_count": worker.block_count,
        "dirty_bytes": worker.dirty_bytes,
        "counters": worker.counters,
        "tiers": [
            {
                "alias": tier.alias,
                "capacity_bytes": tier.capacity_bytes,
                "used_bytes": tier.used_bytes,
                "directories": tier.directories,
                "troubles": tier.troubles,
            }
            for tier in worker.tiers
        ],
    }


def report_json(found: ops.MasterReport, address: str) -> dict[str, Any]:
    return {
        "master": address,
        "cluster_id": found.cluster_id,
        "version": found.version,
        "uptime_s": found.started_s_ago,
        "inode_count": found.inode_count,
        "workers": [worker_json(worker) for worker in found.workers],
        "mounts": [mount_json(mount) for mount in found.mounts],
        "persist_pending_count": found.persist_pending_count,
        "persist_failing": found.persist_failing,
        "persist_waiting": found.persist_waiting,
        "sessions": found.session_names,
        "counters": found.counters,
    }


def report_text(found: ops.MasterReport, address: str) -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() - found.started_s_ago))
    lines = [
        f"master    {address}, version {found.version}, up since {since}",
        f"cluster   {found.cluster_id}",
        f"inodes    {found.inode_count}",
        "mounts",
        *[f"  {mount_line(mount)}" for mount in found.mounts],
        f"workers   {sum(worker.is_alive for worker in found.workers)} alive of {len(found.workers)}",
    ]
    for worker in found.workers:
        lines += worker_lines(worker)
    lines.append(f"persist   {found.persist_pending_count} to do, {len(found.persist_failing)} failing")
    lines += [f"  {failure}" for failure in found.persist_failing]
    lines += [f"  {line}" for line in found.persist_waiting]
    lines.append(f"clients   {len(found.session_names)}")
    lines += [f"  {name}" for name in found.session_names]
    lines += [f"{name} = {value}" for name, value in sorted(found.counters.items())]
    return "\n".join(lines)


def worker_lines(worker: WorkerInfo) -> list[str]:
    address = worker.address
    where = (
        f"{address.host}:{address.port}" if address.port else address.unix_path or "in the master's process"
    )
    state = "alive" if worker.is_alive else "stopped" if worker.has_left else "LOST"
    if worker.is_alive and worker.last_heartbeat_ms_ago > SILENT_MS:
        state = "silent"
    lines = [
        f"  {address.worker_id} {address.hostname} {where}: {state}, "
        f"heard {worker.last_heartbeat_ms_ago} ms ago, {worker.block_count} block(s), "
        f"{format_size(worker.dirty_bytes)} not persisted yet"
    ]
    for tier in worker.tiers:
        used, capacity = format_size(tier.used_bytes), format_size(tier.capacity_bytes)
        lines.append(f"    {tier.alias}  {used} of {capacity}  {', '.join(tier.directories)}")
        lines += [f"      OUT OF USE {trouble}" for trouble in tier.troubles]
    lines += [f"    {name} = {value}" for name, value in sorted(worker.counters.items()) if value]
    return lines
