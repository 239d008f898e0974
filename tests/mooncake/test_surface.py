"""Names, forms of options, and what is refused: nothing here starts a group of several ranks."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from pg_ranks import init, run, total, world
from ranks import Ctx

from moe_a2a import ConfigError, InputError
from moe_a2a.compat.mooncake import pg
from moe_a2a.compat.mooncake.backend import to_options
from moe_a2a.compat.mooncake.options import Settings

Options = pg.MooncakeBackendOptions
MIRROR = torch.zeros(8, dtype=torch.int32)


@pytest.mark.parametrize(
    "options, slots, joins, mode",
    [
        (Options(8), 8, False, "reconcile"),
        (Options(8, True), 8, True, "reconcile"),
        (Options(8, False, True, False), 8, False, "deferred"),
        (Options(8, False, False, False), 8, False, "framework"),
        (Options(-1, False), 0, False, "reconcile"),
        (Options(max_group_size=4, is_extension=True), 4, True, "reconcile"),
        (Options(MIRROR), 0, False, "reconcile"),
        (Options(MIRROR, True), 0, True, "reconcile"),
        (Options(MIRROR, True, 4), 4, True, "reconcile"),
        (Options(active_ranks=MIRROR, is_extension=False, max_group_size=8), 8, False, "reconcile"),
        (Options(torch.zeros(1, dtype=torch.int32), False), 0, False, "reconcile"),
    ],
)
def test_options_have_all_forms(options, slots, joins, mode):
    assert options.max_group_size == slots and options.is_extension is joins
    ours = to_options(options, slots or 3, Settings())
    assert ours.slots == (slots or 3) and ours.joining is joins and ours.on_failure == mode and not ours.raises


@pytest.mark.parametrize(
    "args, error, message",
    [
        ((4, False, False, True), ConfigError, "auto_deactivate_on_failure=False never makes one"),
        ((65,), ConfigError, "max_group_size=65; give an int up to 64"),
        ((4, 1), ConfigError, "is_extension=1; give True or False"),
        ((torch.zeros(4), False), ConfigError, "active_ranks is torch.float32"),
        ((torch.zeros(8, dtype=torch.int32)[::2],), ConfigError, "contiguous int32"),
        ((MIRROR, False, 9), ConfigError, "active_ranks has 8 places for 9 slots"),
        ((4, False, True), TypeError, "together"),
        ((MIRROR, False, 4, True, True), TypeError, "takes"),
        ((), TypeError, "takes"),
    ],
)
def test_options_that_cannot_be_are_refused_at_construction(args, error, message):
    with pytest.raises(error, match=message):
        Options(*args)


def test_settings_are_in_the_options_of_later_groups():
    said = Settings("10.0.0.7", 1.5, 2.5, 3.5, ("mlx5_0", "mlx5_1"))
    ours = to_options(Options(4), 4, said)
    assert ours.host_address == ours.control_address == "10.0.0.7" and ours.device_filter == "mlx5_0,mlx5_1"
    assert (ours.collective_timeout_s, ours.p2p_timeout_s, ours.reconcile_s) == (1.5, 2.5, 3.5)


def test_enums_are_as_upstreams():
    assert pg.ViewUpdateStatus is pg.ProposalStatus and int(pg.ProposalStatus.AppliedWithDroppedRanks) == 2
    assert pg.ProposalStatus.Rejected and pg.SyncAfterFailureStatus.Reconciled.name == "Reconciled"
    for name in pg.__all__:
        assert hasattr(pg, name)


def _one(ctx: Ctx) -> None:
    for call, given in (
        (pg.set_collective_timeout_us, 0),
        (pg.set_p2p_timeout_us, 1.5),
        (pg.set_fault_reconciliation_window_us, -1),
        (pg.set_host_ip, ""),
        (pg.set_device_filter, [""]),
        (pg.set_transfer_engine, 1),
    ):
        with pytest.raises(ConfigError):
            call(given)
    pg.set_device_filter([])
    pg.set_transfer_engine(None)
    with pytest.raises(ConfigError, match="pg_options is a dict; mooncake-cpu takes MooncakeBackendOptions"):
        init(ctx, {}, 1)
    with pytest.raises(ConfigError, match="max_group_size=1 for 2 ranks"):
        init(ctx, Options(1), 2)
    with pytest.raises(ConfigError, match="active_ranks has 1 places for 2 slots"):
        init(ctx, Options(torch.zeros(1, dtype=torch.int32)), 2)
    with pytest.raises(ConfigError, match="backend mooncake is for CUDA tensors"):
        dist.init_process_group("mooncake", store=ctx.store, rank=0, world_size=1)
    init(ctx, None, 1)
    assert total(3.0) == 3 and pg.get_active_ranks(None).tolist() == [1]
    with pytest.warns(DeprecationWarning, match="activate_ranks"):
        pg.extend_group_size_to(world(), 4)
    with pytest.raises(InputError, match="ranks="):
        pg.get_peer_state(world(), [0.5])
    with pytest.raises(InputError, match="no operation of a mooncake-cpu group"):
        pg.get_local_success(dist.Work())
    gloo = dist.new_group([0], backend="gloo")
    with pytest.raises(InputError, match="no process group of the backend mooncake-cpu"):
        pg.get_current_epoch(gloo)
    dist.destroy_process_group()
    pg.set_p2p_timeout_us(1_000_000)  # there is no group any more


def test_what_a_process_may_say_and_when():
    run(_one, 1)


def interpret(program: str, folder: Path) -> None:
    """In an interpreter of its own, with a folder in front of everything else."""
    path = f"import sys; sys.path.insert(0, {str(folder)!r})\n"
    done = subprocess.run([sys.executable, "-c", path + textwrap.dedent(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


INSTALLED = """
import sys
from moe_a2a.compat import mooncake as compat
compat.install()
compat.install()
import mooncake.pg
from mooncake import pg
import moe_a2a.compat.mooncake.pg as ours
assert mooncake.pg is pg is ours is sys.modules["mooncake.pg"]
import torch.distributed as dist
assert "mooncake-cpu" in dist.Backend.backend_list
"""


def test_install_leaves_the_rest_of_a_mooncake_package_as_it_is(tmp_path):
    package = tmp_path / "mooncake"
    package.mkdir()
    (package / "__init__.py").write_text("here = True\n")
    (package / "engine.py").write_text("class TransferEngine: pass\n")
    (package / "pg.py").write_text("raise ImportError('it would compile something')\n")
    interpret(
        INSTALLED
        + """
import mooncake.engine
from mooncake.engine import TransferEngine
assert mooncake.here and mooncake.engine.TransferEngine is TransferEngine
""",
        tmp_path,
    )


def test_install_works_where_no_mooncake_package_is(tmp_path):
    hide = """
import importlib.abc, sys
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "mooncake":
            raise ModuleNotFoundError("No module named 'mooncake'", name="mooncake")
sys.meta_path.insert(0, Hide())
"""
    interpret(
        hide
        + INSTALLED
        + """
try:
    import mooncake.engine
except ModuleNotFoundError as error:
    assert error.name == "mooncake.engine"
else:
    raise AssertionError
""",
        tmp_path,
    )


def test_install_comes_before_mooncakes_own_is_imported(tmp_path):
    package = tmp_path / "mooncake"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "pg.py").write_text("")
    interpret(
        """
        import mooncake.pg
        from moe_a2a import ConfigError
        from moe_a2a.compat import mooncake as compat
        try:
            compat.install()
        except ConfigError as error:
            assert "call install() before" in str(error)
        else:
            raise AssertionError
        """,
        tmp_path,
    )
