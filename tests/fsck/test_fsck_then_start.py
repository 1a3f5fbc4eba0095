"""After a repair the daemon starts, and everything that was not lost is right: read through the mount,
and in the under storage once it is persisted."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

import damages_log as of_log
import damages_slabs as of_slabs
import damages_tree as of_tree
import pytest
from daemons import LocalDaemon
from damage import container_of
from fsck_tree import MIB, build, content, expected
from fsck_world import check_clean, damage_of, find, repair, store_of

Start = Callable[..., LocalDaemon]
NO_UPLOADS = {"ALLUXIOFUSE_MASTER_PERSIST_DELAY_S": "1h"}

GROUPS: dict[str, list[Callable[[LocalDaemon], None]]] = {
    "records": [
        of_tree.record_of_a_linked_dirty_file_damaged,
        of_tree.record_of_a_clean_file_missing,
        of_tree.name_missing,
        of_log.entry_missing,
        of_log.counters_too_small,
        of_log.removal_of_a_file_that_is_there,
        of_log.removal_of_a_renamed_file,
        of_slabs.clean_slab_truncated,
        of_slabs.page_table_of_a_dirty_slab_damaged,
        of_tree.attribute_of_nobody,
        of_tree.list_of_names_has_one_too_many,
        of_tree.record_of_a_dirty_directory_missing,
    ],
    "roots": [
        of_tree.root_missing,
        of_tree.record_of_a_directory_missing,
        of_slabs.record_of_a_dirty_slab_missing,
        of_slabs.record_of_a_dirty_slab_damaged,
        of_slabs.marker_missing,
        of_slabs.worker_unknown_to_the_master,
        of_log.location_not_indexed,
        of_log.intents,
        of_log.container_not_indexed,
        of_log.format_and_cluster_missing,
    ],
    "lost and found": [
        of_tree.directory_and_its_name_missing,
        of_slabs.dirty_slab_of_nobody,
        of_tree.name_taken_by_another,
    ],
}


@pytest.mark.parametrize("group", GROUPS)
def test_the_daemon_goes_on(local_daemon: Start, group: str) -> None:
    site = local_daemon(env=NO_UPLOADS)
    build(site)
    site.kill()
    wanted = expected()
    with store_of(site) as store:
        new, dirty = find(store, "new"), find(store, "dir/dirty")
    binary = container_of(site, "dirty.bin")
    for damage in GROUPS[group]:
        damage(site)
    repair(site.state)
    if group == "lost and found":
        for name in ("new", "new/inner"):
            wanted[f"lost+found/{name.replace('new', f'#{new}')}"] = wanted.pop(name)
        wanted[f"lost+found/container-{binary}"] = wanted.pop("dirty.bin")
        wanted[f"lost+found/#{dirty}"] = wanted["dir/dirty"]
        wanted["dir/dirty"] = wanted["hard1"]
        wanted["lost+found"] = "dir"
    site.daemon.env.clear()
    site.daemon.start()
    compare(site, wanted)
    if "dirty.bin" in wanted:
        assert os.getxattr(site.mount / "dirty.bin", b"user.color") == b"blue"
    site.wait_persisted()
    for name, value in wanted.items():
        path = site.ufs_dir / name
        if isinstance(value, bytes) and name not in ("hard2", "dir/dirty"):  # one object for several names
            assert path.read_bytes() == value, name
    assert not (site.ufs_dir / "removed-before").exists()
    assert not (site.ufs_dir / "moved-before").exists()
    (site.mount / "dir" / "more").write_bytes(b"it goes on")
    assert site.stop() == 0, site.daemon.log_text()
    assert "Traceback" not in site.daemon.log_text()
    check_clean(site.state, arguments=("--verify-data",))


def test_a_damaged_page_table_of_what_was_being_written(local_daemon: Start) -> None:
    """Its record in the index has the size of before."""
    site = local_daemon(env=NO_UPLOADS)
    data = content("open", 3 * MIB + 5)
    fd = os.open(site.mount / "open", os.O_RDWR | os.O_CREAT)
    os.write(fd, data)
    os.fsync(fd)
    site.kill()
    with contextlib.suppress(OSError):  # flushed to nobody
        os.close(fd)
    of_slabs.damage_page_table(site, "open")
    assert {one["code"] for one in damage_of(repair(site.state))} == {"pages-damaged"}
    site.daemon.start()
    site.wait_persisted()
    assert (site.mount / "open").read_bytes() == (site.ufs_dir / "open").read_bytes() == data
    assert site.stop() == 0, site.daemon.log_text()


def compare(site: LocalDaemon, wanted: dict[str, bytes | str]) -> None:
    for name, value in wanted.items():
        path = site.mount / name
        if value == "dir":
            assert path.is_dir(), name
        elif isinstance(value, str):
            assert f"-> {os.readlink(path)}" == value
        else:
            assert path.read_bytes() == value, name
    found = {
        os.path.relpath(os.path.join(above, name), site.mount)
        for above, directories, files in os.walk(site.mount)
        for name in (*directories, *files)
    }
    assert found == wanted.keys()
