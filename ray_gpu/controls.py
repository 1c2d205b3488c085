"""The registry of controls: what keeps off what, where, for which promise, and which tests attack it. Pure data.

``degradations`` anywhere, ``ray-gpu doctor`` and docs/controls.md speak of controls by the ids below. An id that a host
can lack is the name of the lack, as it stands in offers, hellos, ledgers, receipts and policies. How each is removed
in a copy, and which test then fails, is in ``attacks/catalogue``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

#: Where a control holds.
Place = Literal["node", "sandbox", "keeper", "cage", "gateway", "zone", "Vault"]
#: Who says that it is missing: offers and receipts; ``ray-gpu doctor`` alone; or nobody, since nothing works without.
Told = Literal["receipt", "doctor", "built in"]
Promise = Literal["P1", "P2", "P3", "P4", "P5", "P6", "P7", "P8"]

_DEFECT = "It cannot be switched off; a way around it is a vulnerability, see SECURITY.md."


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """One control."""

    id: str
    #: One sentence: what it keeps off.
    keeps_off: str
    where: Place
    #: The promise of docs/threat-model.md that it serves.
    promise: Promise
    told: Told
    #: What carries it out, or finds out whether it holds: file and name in it.
    code: str
    #: One sentence: what is weaker without it.
    meaning: str = "Nothing works without it."
    #: One sentence: what the host's operator does about it.
    fix: str = _DEFECT
    #: Tests that try to get around it and fail, ``file::function``.
    attacks: tuple[str, ...] = ()
    #: Tests in which the same attempt succeeds, because the control is not there.
    positives: tuple[str, ...] = ()


_BOUNDARY, _LAUNCH = "tests/sandbox/test_boundary.py::", "tests/sandbox/test_launch.py::"
_LAYERS, _BOMBS = "tests/sandbox/test_layers.py::", "tests/attack/test_escape_bombs.py::"
_ESCAPE, _KEYS = "tests/proofs/test_sandbox_escape.py::", "tests/proofs/test_keys.py::"
_BYPASS, _RESULTS = "tests/proofs/test_gateway_bypass.py::", "tests/proofs/test_results.py::"
_CANARIES, _DEGRADED = "tests/proofs/test_canaries.py::", "tests/job/test_degraded.py::"
_ENDINGS, _HOSTS = "tests/attack/test_canaries_endings.py::", "tests/attack/test_canaries_hosts.py::"
_MAIN, _LOST = "tests/job/test_main_job.py::", "tests/job/test_lost_leases.py::"
_NODES, _IDENTITY = "tests/test_nodes.py::", "tests/test_node_identity.py::"
_VAULT, _SETUP, _SOURCE = "tests/test_vault.py::", "tests/test_vault_setup.py::", "tests/test_source.py::"
_MATRIX, _FRAMES = "tests/hosts/test_matrix.py::", "tests/test_frames.py::"
_ENVELOPE, _SHARDS = "tests/zones/test_envelope.py::", "tests/zones/test_shards.py::"
_VALUES, _LEDGER, _ZONE_KEYS = (
    "tests/zones/test_values.py::",
    "tests/zones/test_ledger.py::",
    "tests/zones/test_keys.py::",
)
_PUBLISHED, _ENVIRONMENTS = "tests/test_environment_store.py::", "tests/job/test_environments.py::"
_CHECKPOINTS, _CLASSES = "tests/job/test_checkpoints.py::", "tests/job/test_classes.py::"
_OWN_UID, _END = "tests/attack/test_gateway_uid.py::", "tests/attack/test_lease_end.py::"
_CLUSTER, _ENDPOINT = "tests/hosts/test_cluster.py::", "tests/test_endpoint.py::"
_HOST, _SITE = "tests/attack/test_host_controls.py::", "tests/attack/test_site_controls.py::"
_PROBE_HEAD = "tests/test_head_probe.py::"
_INTO, _OUT = "tests/attack/test_into_zone.py::", "tests/attack/test_out_of_zone.py::"
_RELAY, _FLIPPING = "tests/attack/test_lying_relay.py::", "tests/attack/test_flipping.py::"
_DUTIES, _SHARE = "tests/job/test_obligations.py::", "tests/job/test_node_share.py::"
_ADVERSARY = "tests/attack/test_adversary.py::"
_LINEAGE, _CURATION = "tests/zones/test_lineage.py::", "tests/job/test_curation.py::"
_APPROVALS = "tests/zones/test_approvals.py::"
_GETS = "tests/attack/test_what_a_node_gets.py::"
_CLIENT = "tests/attack/test_client_relay.py::"
_LATERAL, _TENANTS = "tests/attack/test_lateral.py::", "tests/attack/test_tenants.py::"
_AFTERWARDS, _REVOCATION = "tests/attack/test_keys.py::", "tests/proofs/test_revocation.py::"
_SCRUB = "tests/sandbox/test_scrub.py::"
_PROOF, _SIGNING = "tests/zones/test_proof.py::", "tests/test_ledger_signing.py::"
_POLICY, _ERRORS = "tests/zones/test_policy.py::", "tests/test_remote_error.py::"
#: Any attempt of the probe: refused inside, and done outside by the same uid.
_PROBE_REFUSED = (_BOUNDARY + "test_escape_is_refused", _ESCAPE + "test_refused")
_PROBE_DONE = (_BOUNDARY + "test_same_uid_can_do_it_outside", _ESCAPE + "test_works_outside")
#: Attempts under one layer of the sandbox alone, each of which is made with that layer off too, and then succeeds.
_ALONE = (_LAYERS + "test_layer_alone_holds",)

#: A control is read as one paragraph, which the formatter would take apart.
# fmt: off
_ALL = (
    # -- what a host may lack, and a receipt then says ----------------------------------------------
    Control(
        id="shared-uid", where="sandbox", promise="P7", told="receipt", code="ray_gpu/sandbox/survey.py::drop",
        keeps_off="Leases, keepers and cages from each other's processes and memory.",
        meaning="Sandboxes, keepers and cages run under the uid of the process that started them.",
        fix="Run the custodian as root, so that each process gets a uid of its own.",
        attacks=(_LAUNCH + "test_uid_as_the_host_sees_it", _BOUNDARY + "test_never_uid_0",
                 _TENANTS + "test_at_the_same_time", _TENANTS + "test_right_afterwards", _TENANTS + "test_memory",
                 *_ALONE),
        positives=(_TENANTS + "test_one_lease_is_shared", *_ALONE)),
    Control(
        id="no-namespaces", where="sandbox", promise="P2", told="receipt",
        code="ray_gpu/sandbox/bubblewrap.py::arguments",
        keeps_off="User code from the network, the host's files and other processes.",
        meaning="bubblewrap cannot work here, so user code is held by Landlock, seccomp and limits alone.",
        fix="Install bubblewrap 0.8 or later and allow user namespaces, or run as root with CAP_SYS_ADMIN.",
        attacks=(*_PROBE_REFUSED, *_ALONE),
        positives=(*_PROBE_DONE, *_ALONE)),
    Control(
        id="file-capability", where="sandbox", promise="P2", told="receipt",
        code="ray_gpu/sandbox/survey.py::reach_python",
        keeps_off="Confined processes from files that their uid may not read.",
        meaning="Confined processes keep a capability that passes file permissions, since Python or "
        "this project lies in a private directory; Landlock alone holds them.",
        fix="Move Python and the project to where every uid can read them, or let bubblewrap work.",
        attacks=(_LAYERS + "test_capability_past_file_permissions",),
        positives=(_LAYERS + "test_capability_past_file_permissions",)),
    Control(
        id="no-seccomp", where="sandbox", promise="P2", told="receipt",
        code="ray_gpu/sandbox/seccomp.py::compile_filter",
        keeps_off="User code from system calls that it has no use for: new namespaces, keyrings, io_uring, sockets.",
        meaning="System calls are not filtered, so more of the kernel is within reach of user code.",
        fix="Install libseccomp (libseccomp2) on a kernel built with CONFIG_SECCOMP_FILTER.",
        attacks=(*_PROBE_REFUSED, *_ALONE),
        positives=(*_PROBE_DONE, *_ALONE)),
    Control(
        id="no-landlock", where="sandbox", promise="P2", told="receipt", code="ray_gpu/sandbox/landlock.py::restrict",
        keeps_off="User code from files and TCP where namespaces failed or are not there.",
        meaning="The kernel's second check of file access is missing.",
        fix="Use Linux 5.13 or later with landlock in the kernel's lsm= list.",
        attacks=(*_PROBE_REFUSED, *_ALONE),
        positives=(*_PROBE_DONE, *_ALONE)),
    Control(
        id="no-cgroup", where="sandbox", promise="P7", told="receipt", code="ray_gpu/sandbox/cgroup.py::create",
        keeps_off="One lease from all of the node's memory and processes.",
        meaning="Memory is not capped, nor processes where there are no namespaces either, so one lease can "
        "exhaust the node's.",
        fix="Run as root on a host where the memory controller of /sys/fs/cgroup is writable.",
        attacks=(_LAUNCH + "test_memory_cap_kills_the_sandbox", _BOMBS + "test_bomb_hits_its_cap", *_ALONE),
        positives=_ALONE),
    Control(
        id="swap-on", where="node", promise="P2", told="receipt", code="ray_gpu/sandbox/cgroup.py::_cap_memory",
        keeps_off="Plaintext from the disk.",
        meaning="Plaintext may be written to the node's swap device.",
        fix="Run swapoff -a, or use cgroups with swap accounting, which keep leases out of swap.",
        attacks=(_HOST + "test_swap", _LAUNCH + "test_memory_cap_leaves_no_swap", _ENDINGS + "test_swap"),
        positives=(_HOST + "test_swap", _LAUNCH + "test_memory_cap_leaves_no_swap")),
    Control(
        id="numpy-stand-in", where="node", promise="P8", told="receipt", code="ray_gpu/custodian.py::Custodian",
        keeps_off="People from taking a processor's figures for a GPU's.",
        meaning="There is no GPU here: NumPy computes in its place.",
        fix="Install the GPU's driver, and CuPy with `make gpu`.",
        attacks=(_DEGRADED + "test_demo_says_what_is_missing", _DEGRADED + "test_hello_names_the_stand_in"),
        positives=(_DEGRADED + "test_hello_names_the_stand_in",)),
    Control(
        id="embedded-vault", where="Vault", promise="P4", told="receipt", code="ray_gpu/embedded.py::Supervisor",
        keeps_off="Whoever has a disk of the pool or the zone from its keys.",
        meaning="Vault runs here with its unseal key beside its data: whoever has the disk has the keys.",
        fix="Run a Vault on a host of its own and set it up with `ray-gpu vault setup`.",
        attacks=(_SITE + "test_disk_of_an_embedded_vault", _LATERAL + "test_keys_of_vault_are_on_its_own_host"),
        positives=(_SITE + "test_disk_of_an_embedded_vault",
                   _AFTERWARDS + "test_backup_opens_nothing_for_a_neighbour")),
    Control(
        id="self-enforced", where="gateway", promise="P3", told="receipt", code="ray_gpu/services.py::start_gateway",
        keeps_off="A person from the gateway's memory, files and connections.",
        meaning="Notebook and gateway share a uid, so the person could go around the gateway.",
        fix="Start the gateway as root, so that it gets a uid of its own.",
        attacks=(_OUT + "test_gateway_cannot_be_pried_into", _BYPASS + "test_raw_connections",
                 _OWN_UID + "test_person_reads_no_data"),
        positives=(_OUT + "test_control_shared_uid_can_be_pried_into", _OWN_UID + "test_gateway_reads_them")),
    Control(
        id="uncaged-ray", where="cage", promise="P1", told="receipt", code="ray_gpu/raylet.py::start_node",
        keeps_off="Whatever Ray is made to run from the host's files and processes.",
        meaning="Ray's processes run without namespaces of their own.",
        fix="Install bubblewrap 0.8 or later and allow user namespaces, or run as root with CAP_SYS_ADMIN.",
        attacks=(_NODES + "test_rogue_task", _LAUNCH + "test_cage", _LATERAL + "test_zone_node",
                 _LATERAL + "test_gpu_node", _LATERAL + "test_cage_writes_its_own_memory_alone",
                 _LATERAL + "test_no_build_in_a_cage"),
        positives=(_NODES + "test_rogue_task", _LATERAL + "test_writes_without_cage",
                   _LATERAL + "test_zone_node_without_cage", _LATERAL + "test_gpu_node_without_cage")),
    Control(
        id="shared-network", where="cage", promise="P3", told="receipt", code="ray_gpu/cage_net.py::rules",
        keeps_off="Whatever Ray is made to run from the host's own services, the zone's network, Vault and the world.",
        meaning="Ray's processes are in the host's network, and reach whatever the host reaches.",
        fix="Run `ray-gpu node start` as root on a host of its own, with bubblewrap, iproute2 and nftables.",
        attacks=(_CLUSTER + "test_a_cage_reaches_rays_ports_alone", _CLUSTER + "test_every_ray_process_is_confined",
                 _MATRIX + "test_matrix"),
        positives=(_CLUSTER + "test_a_cage_reaches_rays_ports_alone", _MATRIX + "test_everything_without_rules",
                   _ENDPOINT + "test_a_socket_keeps_its_network")),
    # -- what a host may lack, and `ray-gpu doctor` finds --------------------------------------------
    Control(
        id="core-handler", where="node", promise="P2", told="doctor", code="ray_gpu/doctor/kernel.py::core_pattern",
        keeps_off="Memory of custodian, gateway and notebook from a crash handler's disk.",
        meaning="Cores are piped to a program, which gets a crashed process's memory whatever the core limit is.",
        fix="Run sysctl -w kernel.core_pattern=core, and keep it in /etc/sysctl.d.",
        attacks=(_HOST + "test_crash_handler",),
        positives=(_HOST + "test_crash_handler",)),
    Control(
        id="core-limit", where="node", promise="P2", told="doctor", code="ray_gpu/doctor/kernel.py::core_limit",
        keeps_off="Memory of crashed processes from the disk.",
        meaning="What is started here, such as a notebook, may write its memory to a core file.",
        fix="Run ulimit -c 0, or set LimitCORE=0 in the service and `* hard core 0` in /etc/security/limits.conf.",
        attacks=(_HOST + "test_core_file",),
        positives=(_HOST + "test_core_file",)),
    Control(
        id="ksm-on", where="node", promise="P7", told="doctor", code="ray_gpu/doctor/kernel.py::ksm",
        keeps_off="One lease from learning by timing which pages another has.",
        meaning="The kernel merges equal pages of different processes, which timing shows.",
        fix="Run echo 2 > /sys/kernel/mm/ksm/run, and switch ksmtuned off.",
        attacks=(_HOST + "test_page_merging",),
        positives=(_HOST + "test_page_merging",)),
    Control(
        id="ptrace-open", where="node", promise="P3", told="doctor", code="ray_gpu/doctor/kernel.py::ptrace_scope",
        keeps_off="Processes of one uid from each other's memory.",
        meaning="Processes that share a uid can read each other's memory.",
        fix="Run sysctl -w kernel.yama.ptrace_scope=1 or more, or run as root, so that uids are not shared.",
        attacks=(_HOST + "test_memory_of_another", _HOST + "test_memory_of_the_gateway"),
        positives=(_HOST + "test_memory_of_another",)),
    Control(
        id="credentials-open", where="node", promise="P4", told="doctor", code="ray_gpu/doctor/files.py::private_file",
        keeps_off="Other users of the host from the node's and the gateway's logins, Ray's token and its key.",
        meaning="Somebody else can read or replace a file that is a login.",
        fix="Make it its owner's alone: chmod 600; if others had it, issue what is in it anew.",
        attacks=(_HOST + "test_login_of_another", _SITE + "test_login_is_in_no_file"),
        positives=(_HOST + "test_login_of_another",)),
    Control(
        id="session-on-disk", where="cage", promise="P1", told="doctor", code="ray_gpu/doctor/files.py::tmpfs",
        keeps_off="What Ray writes, its token and its key from the disk.",
        meaning="Session or credentials of Ray lie on a disk and outlive the host.",
        fix="Mount a tmpfs there: /run and /dev/shm are tmpfs on every common distribution.",
        attacks=(_HOST + "test_files_on_a_disk",),
        positives=(_HOST + "test_files_on_a_disk",)),
    Control(
        id="full-ray", where="cage", promise="P1", told="doctor", code="ray_gpu/doctor/software.py::plain_ray",
        keeps_off="The network from agents of Ray that ask for no token and show stacks, logs and metrics.",
        meaning="ray[default] is installed, so its dashboard's agents run on this node.",
        fix="Install plain ray here: a fresh environment without ray[default], from constraints.txt.",
        attacks=(_IDENTITY + "test_agents",),
        positives=(_IDENTITY + "test_agents",)),
    Control(
        id="old-ray", where="cage", promise="P1", told="doctor", code="ray_gpu/doctor/software.py::ray_version",
        keeps_off="Strangers from a cluster whose Ray knows no tokens.",
        meaning="This Ray is older than the oldest that this project was made for.",
        fix="Install the version of constraints.txt.",
        attacks=(_IDENTITY + "test_whom_ray_lets_in",),
        positives=(_IDENTITY + "test_each_keeps_out",)),
    Control(
        id="certificate-ends", where="cage", promise="P1", told="doctor",
        code="ray_gpu/doctor/files.py::node_certificate",
        keeps_off="Nodes that were thrown out from the cluster for ever, and this one from a sudden end.",
        meaning="Ray's certificate has ended or is about to, and then no node speaks to this one.",
        fix="Restart the node when it is idle: ray-gpu node stop, then ray-gpu node start.",
        attacks=(_IDENTITY + "test_each_keeps_out", _PROBE_HEAD + "test_wrong_node"),
        positives=(_IDENTITY + "test_whom_ray_lets_in", _PROBE_HEAD + "test_head_and_node_fit")),
    Control(
        id="vault-unproven", where="Vault", promise="P4", told="doctor", code="ray_gpu/doctor/vault.py::answers",
        keeps_off="Whoever answers at Vault's address from logins and keys.",
        meaning="Vault cannot be asked, so no lease begins, and none that ended is shredded.",
        fix="Check Vault's address, its certificate and the file vault.ca, that it runs, and unseal it.",
        attacks=(_VAULT + "test_unreachable", _VAULT + "test_plain_http_refused", _SITE + "test_impostor"),
        positives=(_SITE + "test_impostor",)),
    Control(
        id="clock-skew", where="node", promise="P4", told="doctor", code="ray_gpu/doctor/vault.py::clock",
        keeps_off="Leases, certificates and entries from another time than everybody else's.",
        meaning="Leases and certificates end at another time here than Vault and the other side say.",
        fix="Start a time service (chrony, systemd-timesyncd) on this host and on Vault's.",
        attacks=(_SITE + "test_clock", _SITE + "test_custodian_of_another_time"),
        positives=(_SITE + "test_clock",)),
    Control(
        id="ports-open", where="zone", promise="P3", told="doctor", code="ray_gpu/ports.py::host_rules",
        keeps_off="Everybody but the gateway from the way out, and hosts from ports that are not theirs.",
        meaning="Nothing on this host filters its connections: whatever listens is reached, whatever runs gets out.",
        fix="Load the rules of docs/ports.md: ray-gpu firewall ROLE --hosts hosts.yaml > ray-gpu.nft; nft -f it.",
        attacks=(_MATRIX + "test_matrix", _MATRIX + "test_hosts_alone", _MATRIX + "test_zones_are_closed",
                 _LATERAL + "test_network"),
        positives=(_MATRIX + "test_everything_without_rules", _LATERAL + "test_network_without_rules")),
    Control(
        id="kernel-tcp", where="zone", promise="P3", told="doctor", code="ray_gpu/doctor/notebooks.py::kernels",
        keeps_off="Other users of the host from what a notebook shows and prints.",
        meaning="A Jupyter kernel publishes its outputs on TCP ports, in clear, to whoever connects.",
        fix="Start Jupyter with --KernelManager.transport=ipc, then restart the kernels.",
        attacks=(_SITE + "test_eavesdropper",),
        positives=(_SITE + "test_eavesdropper",)),
    # -- what nothing works without -----------------------------------------------------------------
    Control(
        id="payload-past-ray", where="cage", promise="P1", told="built in", code="ray_gpu/actor.py::GpuActor",
        keeps_off="Ray from data, code, results and errors, sealed ones too.",
        attacks=(_CANARIES + "test_ray_sees_nothing", _CANARIES + "test_gcs_tells_nothing", _ENDINGS + "test_ending"),
        positives=(_CANARIES + "test_plain_ray_is_found",)),
    Control(
        id="ray-quiet", where="cage", promise="P1", told="built in", code="ray_gpu/raylet.py::_Plan",
        keeps_off="Ray from writing what passes it: spills, worker logs, task events, metrics.",
        attacks=(_CANARIES + "test_ray_sees_nothing", _NODES + "test_prints_are_in_no_file", _HOSTS + "test_disk"),
        positives=(_CANARIES + "test_plain_ray_is_found", _NODES + "test_prints_are_in_no_file",
                   _CANARIES + "test_each_place_is_searched")),
    Control(
        id="ray-tls", where="cage", promise="P1", told="built in", code="ray_gpu/node_identity.py::RayFiles",
        keeps_off="Whoever has no certificate of the cluster's from Ray's ports.",
        attacks=(_IDENTITY + "test_whom_ray_lets_in",),
        positives=(_IDENTITY + "test_each_keeps_out",)),
    Control(
        id="ray-token", where="cage", promise="P1", told="built in", code="ray_gpu/node_identity.py::RayFiles",
        keeps_off="Whoever has a certificate but not the cluster's token from Ray's ports.",
        attacks=(_IDENTITY + "test_whom_ray_lets_in", _CLIENT + "test_strangers_at_the_heads_port"),
        positives=(_IDENTITY + "test_each_keeps_out",)),
    Control(
        id="relay-network", where="zone", promise="P3", told="built in",
        code="ray_gpu/client_relay.py::relay_profile",
        keeps_off="A client zone's relay, and Ray's code in it, from every network.",
        attacks=(_CLIENT + "test_cage_has_no_network", _CLIENT + "test_relay_as_it_runs"),
        positives=(_CLIENT + "test_cage_has_no_network",)),
    Control(
        id="forwarder", where="zone", promise="P3", told="built in", code="ray_gpu/forwarder.py::Forwarder",
        keeps_off="A client zone's relay from all destinations but one, and everybody else from that one.",
        attacks=(_CLIENT + "test_forwarder_has_one_destination", _CLIENT + "test_forwarder_serves_its_relay_alone"),
        positives=(_CLIENT + "test_forwarder_has_one_destination", _CLIENT + "test_forwarder_serves_its_relay_alone")),
    Control(
        id="node-addresses", where="Vault", promise="P1", told="built in", code="ray_gpu/vault_pki.py::ray_pki",
        keeps_off="One node from a certificate for another's address.",
        attacks=(_SETUP + "test_nobody_is_certified_as_another", _SETUP + "test_nothing_slips_in_besides"),
        positives=(_SETUP + "test_either_lock_holds_alone",)),
    Control(
        id="no-core", where="sandbox", promise="P2", told="built in", code="ray_gpu/sandbox/harden.py::_limit",
        keeps_off="Memory of keeper and sandbox from core files, and debuggers from their processes.",
        attacks=(*_PROBE_REFUSED, _HOST + "test_core_file", *_ALONE, _ENDINGS + "test_core_files"),
        positives=(*_PROBE_DONE, _HOST + "test_core_file", *_ALONE, _ENDINGS + "test_core_files")),
    Control(
        id="no-descriptors", where="sandbox", promise="P2", told="built in",
        code="ray_gpu/sandbox/harden.py::_close_others",
        keeps_off="User code from files and connections of whoever started it.",
        attacks=(_LAUNCH + "test_descriptors", *_PROBE_REFUSED, *_ALONE),
        positives=(*_PROBE_DONE, *_ALONE)),
    Control(
        id="lease-end", where="keeper", promise="P2", told="built in", code="ray_gpu/custodian.py::Custodian",
        keeps_off="Plaintext and keys from outliving their lease.",
        attacks=(_CANARIES + "test_gone_with_the_lease", _LAUNCH + "test_end_leaves_nothing",
                 _REVOCATION + "test_ends_by_itself", _REVOCATION + "test_never_connected",
                 _AFTERWARDS + "test_revoked_without_ray", _AFTERWARDS + "test_revoked_without_relay",
                 _AFTERWARDS + "test_cut_connection_without_ray", _AFTERWARDS + "test_dead_head_and_gateway",
                 _END + "test_lease_ends_with_its_actor", _ENDINGS + "test_ending"),
        positives=(_CANARIES + "test_keeper_and_sandbox_hold_it", _REVOCATION + "test_heartbeats_keep_it",
                   _END + "test_lease_lasts_while_its_actor_does")),
    Control(
        id="private-memory", where="keeper", promise="P6", told="built in", code="ray_gpu/frames.py::SealedSocket",
        keeps_off="A sandbox from changing bytes while its keeper seals or opens them.",
        attacks=(_FLIPPING + "test_nothing_forged", _FRAMES + "test_ciphers_see_private_memory_alone"),
        positives=(_FLIPPING + "test_control_cipher_in_shared_memory",
                   _FRAMES + "test_control_shared_memory_is_seen")),
    Control(
        id="strangers", where="keeper", promise="P2", told="built in", code="ray_gpu/keeper.py::Keeper",
        keeps_off="Whoever connects to a data port without the key from hearing a byte or keeping the gateway out.",
        attacks=(_FRAMES + "test_strangers_at_the_keeper", _RELAY + "test_strangers_on_the_data_port",
                 _BYPASS + "test_raw_connections"),
        positives=(_FRAMES + "test_strangers_at_the_keeper",)),
    Control(
        id="stalls", where="gateway", promise="P6", told="built in", code="ray_gpu/frames.py::SealedSocket",
        keeps_off="A node that sends, or takes, a byte now and then from holding a call for ever.",
        attacks=(_FRAMES + "test_message_that_never_ends", _FRAMES + "test_peer_that_takes_nothing",
                 _INTO + "test_lying_result"),
        positives=(_FRAMES + "test_control_without_a_deadline",)),
    Control(
        id="second-opinion", where="gateway", promise="P6", told="built in", code="ray_gpu/job.py::ShardRun",
        keeps_off="A node that lies from failing a call, from going unnamed, and from being asked again.",
        attacks=(_INTO + "test_lying_result", _INTO + "test_lying_answer_to_a_call", _INTO + "test_lying_hello",
                 _INTO + "test_lying_introduction", _INTO + "test_lying_receipt"),
        positives=(_INTO + "test_honest_hello", _INTO + "test_same_answer_of_two_nodes")),
    Control(
        id="decision-first", where="gateway", promise="P3", told="built in", code="zones/policy.py::Policy",
        keeps_off="Bytes from leaving that policy did not allow, whoever asks.",
        attacks=(_OUT + "test_forbidden_class", _MAIN + "test_refusal_is_in_the_ledger_and_sent_nothing",
                 _BYPASS + "test_denied", _POLICY + "test_deny_by_default"),
        positives=(_OUT + "test_counted_and_written_down", _BYPASS + "test_honest_request")),
    Control(
        id="ledger-first", where="gateway", promise="P3", told="built in", code="zones/budget.py::Budget",
        keeps_off="Bytes from leaving before they are written down.",
        attacks=(_MAIN + "test_intent_rests_on_an_earlier_decision", _BYPASS + "test_every_byte_is_in_the_ledger",
                 _LEDGER + "test_draw_beyond", _OUT + "test_counted_and_written_down",
                 _OUT + "test_share_is_written_down", _OUT + "test_option_value_stays"),
        positives=(_OUT + "test_control_bytes_that_the_ledger_lacks",)),
    Control(
        id="ledger-chain", where="zone", promise="P3", told="built in", code="zones/ledger.py::Ledger",
        keeps_off="Whoever can write the ledger's file from changing an entry unnoticed.",
        attacks=(_LEDGER + "test_every_byte_of_an_entry", _LEDGER + "test_tampered_entry"),
        positives=(_LEDGER + "test_control_without_the_chain",)),
    Control(
        id="ledger-signed", where="Vault", promise="P3", told="built in", code="zones/signing.py::Signer",
        keeps_off="Whoever can write the ledger's file from rewriting it, or cutting its end, unseen by who kept a "
                  "checkpoint.",
        attacks=(_PROOF + "test_noted_checkpoint", _PROOF + "test_cut_off",
                 _PROOF + "test_checkpoint_that_does_not_hold", _PROOF + "test_forged_inclusion",
                 _PROOF + "test_growth", _SIGNING + "test_others_do_not_sign", _SIGNING + "test_key_stays_in_vault",
                 _SIGNING + "test_commands"),
        positives=(_PROOF + "test_cut_off", _SIGNING + "test_commands")),
    Control(
        id="field-commitments", where="zone", promise="P3", told="built in", code="zones/commitments.py::field_salt",
        keeps_off="Whoever is shown a field of an entry from learning, or guessing, the others.",
        attacks=(_PROOF + "test_only_chosen_fields", "tests/zones/test_commitments.py::test_salts"),
        positives=(_PROOF + "test_only_chosen_fields",)),
    Control(
        id="labels", where="gateway", promise="P3", told="built in", code="zones/labels.py::classify",
        keeps_off="Data from leaving under a lower class than its own: renamed, derived, captured or as an argument.",
        attacks=(_BYPASS + "test_renamed_columns", _BYPASS + "test_session_cap", _OUT + "test_columns_of_its_own",
                 _OUT + "test_forbidden_class"),
        positives=(_BYPASS + "test_sealed_file", _OUT + "test_counted_and_written_down")),
    Control(
        id="obligations", where="gateway", promise="P3", told="built in", code="zones/obligations.py::unmet",
        keeps_off="Calls and leases from breaking what a decision demands: rows, shards, hours, length, devices, more.",
        attacks=(_DUTIES + "test_broken", _DUTIES + "test_hours", _DUTIES + "test_session_length",
                 _DUTIES + "test_gpu_kinds", _DUTIES + "test_environments"),
        positives=(_DUTIES + "test_broken", _DUTIES + "test_gpu_kinds", _DUTIES + "test_environments")),
    Control(
        id="environment-contents", where="node", promise="P2", told="built in",
        code="ray_gpu/environment_store.py::Store",
        keeps_off="Packages that were changed since an operator built them from running, and functions from changing "
                  "them or seeing others.",
        attacks=(_PUBLISHED + "test_changed", _PUBLISHED + "test_changed_document",
                 _ENVIRONMENTS + "test_changed_is_not_served", _ENVIRONMENTS + "test_runs_there"),
        positives=(_PUBLISHED + "test_as_it_was", _ENVIRONMENTS + "test_changed_is_not_served",
                   _ENVIRONMENTS + "test_runs_there")),
    Control(
        id="checkpoint-keys", where="zone", promise="P3", told="built in", code="ray_gpu/checkpoints.py::Checkpoints",
        keeps_off="Whoever reads the zone's disk, and other people, from what a person saved, and from changing it.",
        attacks=(_CHECKPOINTS + "test_unreadable_on_the_disk", _CHECKPOINTS + "test_theirs_alone"),
        positives=(_CHECKPOINTS + "test_kept_between_sessions", _CHECKPOINTS + "test_unreadable_on_the_disk",
                   _CHECKPOINTS + "test_theirs_alone")),
    Control(
        id="instance-owner", where="gateway", promise="P2", told="built in", code="ray_gpu/session.py::Session",
        keeps_off="Another session from the sandbox, and so the state, of a class's instance.",
        attacks=(_CLASSES + "test_nobody_elses_calls",),
        positives=(_CLASSES + "test_state_stays", _CLASSES + "test_nobody_elses_calls")),
    Control(
        id="approval", where="gateway", promise="P3", told="built in", code="zones/approvals.py::approved",
        keeps_off="A function that no officer signed, as it is, from being called where policy asks for that.",
        attacks=(_APPROVALS + "test_refused", _APPROVALS + "test_no_officers", _DUTIES + "test_reviewed"),
        positives=(_APPROVALS + "test_approved", _DUTIES + "test_reviewed")),
    Control(
        id="endpoints", where="gateway", promise="P3", told="built in", code="ray_gpu/leases.py::LeaseOpener",
        keeps_off="A lying relay from aiming the gateway at an address that zone.yaml does not name.",
        attacks=(_RELAY + "test_endpoint_outside", _RELAY + "test_endpoint_that_is_none",
                 _RELAY + "test_gateway_connects_nowhere_else"),
        positives=(_RELAY + "test_endpoint_allowed", _RELAY + "test_gateway_connects_nowhere_else")),
    Control(
        id="sealed-memory", where="gateway", promise="P3", told="built in", code="ray_gpu/source.py::from_memory",
        keeps_off="A notebook from changing data between decision and sending.",
        attacks=(_SOURCE + "test_sealed_memory_file_cannot_be_changed", _BYPASS + "test_file_that_can_change"),
        positives=(_SOURCE + "test_control_unsealed_memory_file_is_changed", _BYPASS + "test_sealed_file")),
    Control(
        id="person", where="gateway", promise="P3", told="built in", code="zones/vault.py::Vault",
        keeps_off="Whoever is no person of the zone, by Vault's word, from a session.",
        attacks=(_BYPASS + "test_nobody", _VAULT + "test_whoami_refuses_who_is_no_person_of_the_zone",
                 _OUT + "test_person_cannot_use_vault_for_keys"),
        positives=(_BYPASS + "test_honest_request",)),
    Control(
        id="grant-terms", where="Vault", promise="P4", told="built in", code="zones/vault.py::Vault",
        keeps_off="A lease's key from opening for terms that were not granted.",
        attacks=(_KEYS + "test_changed_grant", _VAULT + "test_changed_grant_refused",
                 _LATERAL + "test_key_opens_for_its_terms_alone"),
        positives=(_KEYS + "test_changed_grant_alone_is_fine",)),
    Control(
        id="grant-once", where="node", promise="P4", told="built in", code="ray_gpu/custodian.py::Custodian",
        keeps_off="A grant from being used twice, on another boot, or after its lease.",
        attacks=(_KEYS + "test_replayed_by_another_actor", _KEYS + "test_replayed_after_the_lease",
                 _KEYS + "test_another_boot", _LATERAL + "test_key_opens_once"),
        positives=(_KEYS + "test_honest_grant", _LATERAL + "test_key_opens_once")),
    Control(
        id="pool-policy", where="node", promise="P4", told="built in", code="zones/policy.py::PoolPolicy",
        keeps_off="Grants that the pool's operator forbids, though the zone's Vault has made a key for them.",
        attacks=(_KEYS + "test_forbidden_by_the_pool", _LATERAL + "test_forbidden_grant"),
        positives=(_KEYS + "test_changed_grant_alone_is_fine", _LATERAL + "test_key_opens_once")),
    Control(
        id="gpu-scrub", where="node", promise="P7", told="built in", code="ray_gpu/sandbox/scrub.py::Tenancy",
        keeps_off="One zone's lease from what another zone's left in GPU memory.",
        attacks=("tests/gpu/test_scrub.py::test_leftovers_are_scrubbed", _SCRUB + "test_when_it_is_scrubbed",
                 _SCRUB + "test_without_a_scrub_no_other_zone"),
        positives=("tests/gpu/test_scrub.py::test_leftovers_are_scrubbed",)),
    Control(
        id="own-leases", where="Vault", promise="P4", told="built in", code="policies/vault/custodian.hcl::decrypt",
        keeps_off="A node from another node's leases, and everybody else from all.",
        attacks=(_KEYS + "test_who_can_unwrap", _VAULT + "test_node_refused_other_nodes_key",
                 _TENANTS + "test_keys"),
        positives=(_KEYS + "test_who_can_unwrap",)),
    Control(
        id="ephemeral-exchange", where="keeper", promise="P4", told="built in", code="zones/keys.py::derive_lease_key",
        keeps_off="Whoever later gets Vault's backup and a node's identity from recorded traffic.",
        attacks=(_KEYS + "test_the_data_key_is_not_enough", _ZONE_KEYS + "test_lease_key_depends_on_every_bit",
                 _AFTERWARDS + "test_traffic_stays_sealed", _ZONE_KEYS + "test_recorded_traffic_stays_closed"),
        positives=(_AFTERWARDS + "test_traffic_stays_sealed",
                   _ZONE_KEYS + "test_control_recorded_traffic_without_the_exchange")),
    Control(
        id="shredded", where="Vault", promise="P4", told="built in", code="zones/vault.py::Vault",
        keeps_off="Everybody from a lease's key once the lease has ended.",
        attacks=(_KEYS + "test_shredded_with_the_session", _VAULT + "test_shredded_key_refuses",
                 _AFTERWARDS + "test_vault_gives_nothing_afterwards"),
        positives=(_VAULT + "test_data_key_round_trip", _AFTERWARDS + "test_backup_opens_nothing_for_a_neighbour")),
    Control(
        id="envelope", where="keeper", promise="P4", told="built in", code="zones/envelope.py::Opener",
        keeps_off="Whoever is between gateway and keeper from reading, changing, moving or cutting a message.",
        attacks=(_ENVELOPE + "test_every_byte", _ENVELOPE + "test_wrong_slot",
                 _ENVELOPE + "test_truncation_at_every_length", _RESULTS + "test_forgery_is_refused",
                 _ENVELOPE + "test_key_commitment", _ENVELOPE + "test_downgrade", _HOSTS + "test_wire"),
        positives=(_ENVELOPE + "test_key_commitment", _ENVELOPE + "test_untouched_message_opens",
                   _AFTERWARDS + "test_traffic_stays_sealed", _ENVELOPE + "test_control_without_authentication",
                   _HOSTS + "test_wire")),
    Control(
        id="replay", where="keeper", promise="P4", told="built in", code="zones/replay.py::ReplayGuard",
        keeps_off="A message from being accepted twice.",
        attacks=(_ENVELOPE + "test_replay_is_refused_in_any_order", _FRAMES + "test_replay_of_a_foreseen_message"),
        positives=(_ENVELOPE + "test_without_a_guard_a_message_opens_twice", _ENVELOPE + "test_control_replay_opens")),
    Control(
        id="shuffle", where="zone", promise="P5", told="built in", code="zones/plan.py::order",
        keeps_off="A node from the order of the rows and from shards that follow each other.",
        attacks=(_GETS + "test_order_is_not_found", _ADVERSARY + "test_nothing_is_found_out",
                 _SHARDS + "test_no_neighbour_in_a_shard",
                 _SHARDS + "test_no_position", _SHARDS + "test_shuffles_move_rows"),
        positives=(_GETS + "test_control_order_is_found", _ADVERSARY + "test_control_order_is_found_out",
                   _SHARDS + "test_shuffles_move_rows")),
    Control(
        id="node-share", where="gateway", promise="P5", told="built in", code="zones/spread.py::assign",
        keeps_off="A node from more of a data set than policy allows, over calls, sessions, filters and lost nodes.",
        attacks=(_SHARE + "test_epochs_do_not_add_up", _SHARE + "test_all_rows_to_one_node", _SHARE + "test_groups",
                 _SHARE + "test_lost_node", "tests/zones/test_spread.py::test_assign"),
        positives=(_SHARE + "test_control_without_a_bound",)),
    Control(
        id="lineage", where="gateway", promise="P3", told="built in", code="zones/lineage.py::chain",
        keeps_off="Derived data sets from leaving where what they were made of may not, or after it was changed.",
        attacks=(_CURATION + "test_it_outranks_no_parent", _LINEAGE + "test_refused_with_its_parent",
                 _LINEAGE + "test_segment_of_the_parent_that_stays", _LINEAGE + "test_problem"),
        positives=(_LINEAGE + "test_control_without_parents", _CURATION + "test_derived_data_leaves")),
    Control(
        id="strip", where="zone", promise="P5", told="built in", code="zones/shards.py::strip",
        keeps_off="A node from metadata, categories and values beneath nulls.",
        attacks=(_SHARDS + "test_strip_hides_metadata_and_categories", _SHARDS + "test_nothing_beneath_a_null",
                 _CANARIES + "test_category_values_stay", _GETS + "test_metadata_is_not_found"),
        positives=(_GETS + "test_control_metadata_is_found",)),
    Control(
        id="padding", where="zone", promise="P5", told="built in", code="zones/envelope.py::Sealer",
        keeps_off="Whoever watches the network from exact sizes.",
        attacks=(_ENVELOPE + "test_padded_size", _GETS + "test_size_is_not_found"),
        positives=(_GETS + "test_control_size_is_found",)),
    Control(
        id="plain-results", where="gateway", promise="P6", told="built in", code="zones/decoding.py::decode",
        keeps_off="Results from running code, or filling memory, in gateway or notebook.",
        attacks=(_RESULTS + "test_hostile_sandbox", _RESULTS + "test_pickle_stays_bytes",
                 _VALUES + "test_hostile_arrow", _RESULTS + "test_bomb_is_refused", _INTO + "test_lying_result"),
        positives=(_RESULTS + "test_trap_springs_here", _RESULTS + "test_trap_springs_in_the_gateway")),
    Control(
        id="plain-errors", where="gateway", promise="P6", told="built in", code="ray_gpu/remote_error.py::rebuild",
        keeps_off="Errors of a function from running code in the notebook, or ending it.",
        attacks=(_RESULTS + "test_forged_exception", _ERRORS + "test_what_would_end_the_notebook_stays_remote"),
        positives=(_RESULTS + "test_trap_springs_here",)),
    Control(
        id="level-first", where="gateway", promise="P8", told="built in", code="ray_gpu/leases.py::_check_level",
        keeps_off="Bytes from going to a node that lacks what policy asks for.",
        attacks=(_DEGRADED + "test_refused_before_the_first_byte",
                 _DEGRADED + "test_demo_is_refused_where_nothing_is_accepted"),
        positives=(_DEGRADED + "test_accepted",)),
    Control(
        id="signed-receipt", where="node", promise="P8", told="built in", code="zones/keys.py::verify_node_signature",
        keeps_off="Whoever is no certified node from stating what a lease did.",
        attacks=(_MAIN + "test_changed_receipt_does_not_verify", _ZONE_KEYS + "test_node_signature_refused",
                 _INTO + "test_lying_receipt"),
        positives=(_ZONE_KEYS + "test_node_signature_holds", _MAIN + "test_receipts_verify")),
)
# fmt: on

#: Every control by id.
CONTROLS: Mapping[str, Control] = MappingProxyType({control.id: control for control in _ALL})


def describe(ids: Iterable[str]) -> str:
    """Return one line per id, ``id: meaning fix``, for people. An unknown id stands alone."""
    return "\n".join(f"{i}: {CONTROLS[i].meaning} {CONTROLS[i].fix}" if i in CONTROLS else i for i in ids)


def markdown_table(mutations: Mapping[str, tuple[str, ...]]) -> str:
    """Return the registry as the table in docs/controls.md. Paths of links are relative to docs/.

    Args:
        mutations: By id, the tests that fail in a copy without the control: what ``attacks/catalogue`` says.
    """
    rows = []
    for control in _ALL:
        evidence = (control.attacks, control.positives, mutations.get(control.id, ()))
        tests = " | ".join(_links(kind) for kind in evidence)
        facts = f"`{control.id}` | {control.keeps_off} | {control.where} | {control.promise} | {control.told}"
        rows.append(f"| {facts} | {tests} |")
    head = "| id | keeps off | where | promise | told by | attack | positive control | mutation |"
    return "\n".join([head, "|---|---|---|---|---|---|---|---|", *rows, ""])


def _links(tests: tuple[str, ...]) -> str:
    # One link for a test, however many of its cases are named.
    parts = [test.partition("::") for test in dict.fromkeys(test.partition("[")[0] for test in tests)]
    return ", ".join(f"[{name}](../{file})" for file, _, name in parts) or "none yet"
