"""Which ranks share a host, and who receives for whom between hosts."""

from __future__ import annotations

import os

from hypothesis import given
from hypothesis import strategies as st

from moe_a2a.hosts import HostMap, own_label

labels = st.lists(st.sampled_from("abcd"), min_size=1, max_size=12)


def test_hosts_are_numbered_by_their_lowest_rank():
    hosts = HostMap.from_labels(["b", "a", "b", "c", "a"])
    assert hosts.ranks_of == ((0, 2), (1, 4), (3,))
    assert hosts.host_of == (0, 1, 0, 2, 1)
    assert hosts.peers(4) == (1, 4)
    assert hosts.remote_ranks(1) == (0, 2, 3)
    assert hosts.remote_hosts(1) == (0, 2)


def test_a_rail_goes_to_the_same_place_on_the_other_host():
    hosts = HostMap.from_labels(["a", "a", "a", "b", "b"])
    assert [hosts.rail(1, rank) for rank in (0, 1, 2)] == [3, 4, 3]  # two ranks there: the third starts over
    assert [hosts.rail(0, rank) for rank in (3, 4)] == [0, 1]
    assert [hosts.sources_railed_to(rank) for rank in range(5)] == [(3,), (4,), (), (0, 2), (1,)]


@given(labels)
def test_every_rank_has_one_rail_peer_on_every_other_host(names):
    hosts = HostMap.from_labels(names)
    for rank, host in enumerate(hosts.host_of):
        assert names[rank] == names[hosts.ranks_of[host][0]]
        for other in hosts.remote_hosts(host):
            rail = hosts.rail(other, rank)
            assert hosts.host_of[rail] == other and rank in hosts.sources_railed_to(rail)
    arrivals = [s for rank in range(len(names)) for s in hosts.sources_railed_to(rank)]
    assert len(arrivals) == sum(len(hosts.remote_hosts(host)) for host in hosts.host_of)


@given(labels)
def test_rails_share_the_load_of_a_host(names):
    hosts = HostMap.from_labels(names)
    for host, ranks in enumerate(hosts.ranks_of):
        for other in hosts.remote_hosts(host):
            loads = [sum(hosts.rail(host, s) == rank for s in hosts.ranks_of[other]) for rank in ranks]
            assert max(loads) - min(loads) <= 1


def test_the_label_is_the_one_given_then_the_environments_then_the_machines(monkeypatch):
    monkeypatch.setenv("MOE_A2A_HOST", "from-environment")
    assert own_label("given") == "given"
    assert own_label(None) == "from-environment"
    monkeypatch.delenv("MOE_A2A_HOST")
    found = own_label(None)
    with open("/proc/sys/kernel/random/boot_id") as f:
        assert found == f"{f.read().strip()}/{os.stat('/proc/self/ns/net').st_ino}"
