"""The registry of controls: what keeps off what, where, for which promise, and which tests show it. Pure data.

``degradations`` anywhere, ``ray-gpu doctor`` and docs/controls.md speak of controls by the ids below. An id that a host
can lack is the name of the lack, as it stands in offers, hellos, ledgers, receipts and policies.
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
    #: Tests that remove the control in a copy and see another test fail.
    mutations: tuple[str, ...] = ()


_BOUNDARY, _LAUNCH = "tests/sandbox/test_boundary.py::", "tests/sandbox/test_launch.py::"
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
_POLICY, _ERRORS = "tests/zones/test_policy.py::", "tests/test_remote_error.py::"
#: Any attempt of the probe: refused inside, and done outside by the same uid.
_PROBE_REFUSED = (_BOUNDARY + "test_escape_is_refused", _ESCAPE + "test_refused")
_PROBE_DONE = (_BOUNDARY + "test_same_uid_can_do_it_outside", _ESCAPE + "test_works_outside")

#: A control is read as one paragraph, which the formatter would take apart.
# fmt: off
_ALL = (
    # -- what a host may lack, and a receipt then says ----------------------------------------------
    Control(
        id="shared-uid", where="sandbox", promise="P7", told="receipt", code="ray_gpu/sandbox/survey.py::drop",
        keeps_off="Leases, keepers and cages from each other's processes and memory.",
        meaning="Sandboxes, keepers and cages run under the uid of the process that started them.",
        fix="Run the custodian as root, so that each process gets a uid of its own.",
        attacks=(_LAUNCH + "test_uid_as_the_host_sees_it", _BOUNDARY + "test_never_uid_0")),
    Control(
        id="no-namespaces", where="sandbox", promise="P2", told="receipt",
        code="ray_gpu/sandbox/bubblewrap.py::arguments",
        keeps_off="User code from the network, the host's files and other processes.",
        meaning="bubblewrap cannot work here, so user code is held by Landlock, seccomp and limits alone.",
        fix="Install bubblewrap 0.8 or later and allow user namespaces, or run as root with CAP_SYS_ADMIN.",
        attacks=_PROBE_REFUSED,
        positives=_PROBE_DONE),
    Control(
        id="file-capability", where="sandbox", promise="P2", told="receipt",
        code="ray_gpu/sandbox/survey.py::reach_python",
        keeps_off="Confined processes from files that their uid may not read.",
        meaning="Confined processes keep a capability that passes file permissions, since Python or "
        "this project lies in a private directory; Landlock alone holds them.",
        fix="Move Python and the project to where every uid can read them, or let bubblewrap work."),
    Control(
        id="no-seccomp", where="sandbox", promise="P2", told="receipt",
        code="ray_gpu/sandbox/seccomp.py::compile_filter",
        keeps_off="User code from system calls that it has no use for: new namespaces, keyrings, io_uring, sockets.",
        meaning="System calls are not filtered, so more of the kernel is within reach of user code.",
        fix="Install libseccomp (libseccomp2) on a kernel built with CONFIG_SECCOMP_FILTER.",
        attacks=_PROBE_REFUSED,
        positives=_PROBE_DONE),
    Control(
        id="no-landlock", where="sandbox", promise="P2", told="receipt", code="ray_gpu/sandbox/landlock.py::restrict",
        keeps_off="User code from files and TCP where namespaces failed or are not there.",
        meaning="The kernel's second check of file access is missing.",
        fix="Use Linux 5.13 or later with landlock in the kernel's lsm= list.",
        attacks=_PROBE_REFUSED,
        positives=_PROBE_DONE),
    Control(
        id="no-cgroup", where="sandbox", promise="P7", told="receipt", code="ray_gpu/sandbox/cgroup.py::create",
        keeps_off="One lease from all of the node's memory and processes.",
        meaning="Memory is not capped, so one lease can exhaust the node's.",
        fix="Run as root on a host where the memory controller of /sys/fs/cgroup is writable.",
        attacks=(_LAUNCH + "test_memory_cap_kills_the_sandbox",)),
    Control(
        id="swap-on", where="node", promise="P2", told="receipt", code="ray_gpu/sandbox/cgroup.py::_cap_memory",
        keeps_off="Plaintext from the disk.",
        meaning="Plaintext may be written to the node's swap device.",
        fix="Run swapoff -a, or use cgroups with swap accounting, which keep leases out of swap.",
        attacks=(_ENDINGS + "test_swap",)),
    Control(
        id="numpy-stand-in", where="node", promise="P8", told="receipt", code="ray_gpu/custodian.py::Custodian",
        keeps_off="People from taking a processor's figures for a GPU's.",
        meaning="There is no GPU here: NumPy computes in its place.",
        fix="Install the GPU's driver, and CuPy with `make gpu`.",
        attacks=(_DEGRADED + "test_demo_says_what_is_missing",)),
    Control(
        id="embedded-vault", where="Vault", promise="P4", told="receipt", code="ray_gpu/embedded.py::Supervisor",
        keeps_off="Whoever has a disk of the pool or the zone from its keys.",
        meaning="Vault runs here with its unseal key beside its data: whoever has the disk has the keys.",
        fix="Run a Vault on a host of its own and set it up with `ray-gpu vault setup`."),
    Control(
        id="self-enforced", where="gateway", promise="P3", told="receipt", code="ray_gpu/services.py::start_gateway",
        keeps_off="A person from the gateway's memory, files and connections.",
        meaning="Notebook and gateway share a uid, so the person could go around the gateway.",
        fix="Start the gateway as root, so that it gets a uid of its own.",
        attacks=(_BYPASS + "test_raw_connections",)),
    Control(
        id="uncaged-ray", where="cage", promise="P1", told="receipt", code="ray_gpu/raylet.py::start_node",
        keeps_off="Whatever Ray is made to run from the host's files and processes.",
        meaning="Ray's processes run without namespaces of their own.",
        fix="Install bubblewrap 0.8 or later and allow user namespaces, or run as root with CAP_SYS_ADMIN.",
        attacks=(_NODES + "test_rogue_task", _LAUNCH + "test_cage"),
        positives=(_NODES + "test_rogue_task",)),
    # -- what a host may lack, and `ray-gpu doctor` finds --------------------------------------------
    Control(
        id="core-handler", where="node", promise="P2", told="doctor", code="ray_gpu/doctor/kernel.py::core_pattern",
        keeps_off="Memory of custodian, gateway and notebook from a crash handler's disk.",
        meaning="Cores are piped to a program, which gets a crashed process's memory whatever the core limit is.",
        fix="Run sysctl -w kernel.core_pattern=core, and keep it in /etc/sysctl.d."),
    Control(
        id="core-limit", where="node", promise="P2", told="doctor", code="ray_gpu/doctor/kernel.py::core_limit",
        keeps_off="Memory of crashed processes from the disk.",
        meaning="What is started here, such as a notebook, may write its memory to a core file.",
        fix="Run ulimit -c 0, or set LimitCORE=0 in the service and `* hard core 0` in /etc/security/limits.conf."),
    Control(
        id="ksm-on", where="node", promise="P7", told="doctor", code="ray_gpu/doctor/kernel.py::ksm",
        keeps_off="One lease from learning by timing which pages another has.",
        meaning="The kernel merges equal pages of different processes, which timing shows.",
        fix="Run echo 2 > /sys/kernel/mm/ksm/run, and switch ksmtuned off."),
    Control(
        id="ptrace-open", where="node", promise="P3", told="doctor", code="ray_gpu/doctor/kernel.py::ptrace_scope",
        keeps_off="Processes of one uid from each other's memory.",
        meaning="Processes that share a uid can read each other's memory.",
        fix="Run sysctl -w kernel.yama.ptrace_scope=1 or more, or run as root, so that uids are not shared."),
    Control(
        id="credentials-open", where="node", promise="P4", told="doctor", code="ray_gpu/doctor/files.py::private_file",
        keeps_off="Other users of the host from the node's and the gateway's logins, Ray's token and its key.",
        meaning="Somebody else can read or replace a file that is a login.",
        fix="Make it its owner's alone: chmod 600; if others had it, issue what is in it anew."),
    Control(
        id="session-on-disk", where="cage", promise="P1", told="doctor", code="ray_gpu/doctor/files.py::tmpfs",
        keeps_off="What Ray writes, its token and its key from the disk.",
        meaning="Session or credentials of Ray lie on a disk and outlive the host.",
        fix="Mount a tmpfs there: /run and /dev/shm are tmpfs on every common distribution."),
    Control(
        id="full-ray", where="cage", promise="P1", told="doctor", code="ray_gpu/doctor/software.py::plain_ray",
        keeps_off="The network from agents of Ray that ask for no token and show stacks, logs and metrics.",
        meaning="ray[default] is installed, so its dashboard's agents run on this node.",
        fix="Install plain ray here: a fresh environment without ray[default], from constraints.txt."),
    Control(
        id="old-ray", where="cage", promise="P1", told="doctor", code="ray_gpu/doctor/software.py::ray_version",
        keeps_off="Strangers from a cluster whose Ray knows no tokens.",
        meaning="This Ray is older than the oldest that this project was made for.",
        fix="Install the version of constraints.txt."),
    Control(
        id="certificate-ends", where="cage", promise="P1", told="doctor",
        code="ray_gpu/doctor/files.py::node_certificate",
        keeps_off="Nodes that were thrown out from the cluster for ever, and this one from a sudden end.",
        meaning="Ray's certificate has ended or is about to, and then no node speaks to this one.",
        fix="Restart the node when it is idle: ray-gpu node stop, then ray-gpu node start.",
        attacks=(_IDENTITY + "test_whom_ray_lets_in",)),
    Control(
        id="vault-unproven", where="Vault", promise="P4", told="doctor", code="ray_gpu/doctor/vault.py::answers",
        keeps_off="Whoever answers at Vault's address from logins and keys.",
        meaning="Vault cannot be asked, so no lease begins, and none that ended is shredded.",
        fix="Check Vault's address, its certificate and the file vault.ca, that it runs, and unseal it.",
        attacks=(_VAULT + "test_unreachable", _VAULT + "test_plain_http_refused")),
    Control(
        id="clock-skew", where="node", promise="P4", told="doctor", code="ray_gpu/doctor/vault.py::clock",
        keeps_off="Leases, certificates and entries from another time than everybody else's.",
        meaning="Leases and certificates end at another time here than Vault and the other side say.",
        fix="Start a time service (chrony, systemd-timesyncd) on this host and on Vault's."),
    Control(
        id="ports-open", where="zone", promise="P3", told="doctor", code="ray_gpu/ports.py::host_rules",
        keeps_off="Everybody but the gateway from the way out, and hosts from ports that are not theirs.",
        meaning="Nothing on this host filters its connections: whatever listens is reached, whatever runs gets out.",
        fix="Load the rules of docs/ports.md: ray-gpu firewall ROLE --hosts hosts.yaml > ray-gpu.nft; nft -f it.",
        attacks=(_MATRIX + "test_matrix", _MATRIX + "test_hosts_alone", _MATRIX + "test_zones_are_closed"),
        positives=(_MATRIX + "test_everything_without_rules",)),
    Control(
        id="kernel-tcp", where="zone", promise="P3", told="doctor", code="ray_gpu/doctor/notebooks.py::kernels",
        keeps_off="Other users of the host from what a notebook shows and prints.",
        meaning="A Jupyter kernel publishes its outputs on TCP ports, in clear, to whoever connects.",
        fix="Start Jupyter with --KernelManager.transport=ipc, then restart the kernels."),
    # -- what nothing works without -----------------------------------------------------------------
    Control(
        id="payload-past-ray", where="cage", promise="P1", told="built in", code="ray_gpu/actor.py::GpuActor",
        keeps_off="Ray from data, code, results and errors, sealed ones too.",
        attacks=(_CANARIES + "test_ray_sees_nothing", _CANARIES + "test_gcs_tells_nothing", _ENDINGS + "test_ending"),
        positives=(_CANARIES + "test_plain_ray_is_found",)),
    Control(
        id="ray-quiet", where="cage", promise="P1", told="built in", code="ray_gpu/raylet.py::_Plan",
        keeps_off="Ray from writing what passes it: spills, worker logs, task events, metrics.",
        attacks=(_CANARIES + "test_ray_sees_nothing", _HOSTS + "test_disk"),
        positives=(_CANARIES + "test_plain_ray_is_found", _CANARIES + "test_each_place_is_searched")),
    Control(
        id="ray-tls", where="cage", promise="P1", told="built in", code="ray_gpu/node_identity.py::RayFiles",
        keeps_off="Whoever has no certificate of the cluster's from Ray's ports.",
        attacks=(_IDENTITY + "test_whom_ray_lets_in",)),
    Control(
        id="node-addresses", where="Vault", promise="P1", told="built in", code="ray_gpu/vault_pki.py::ray_pki",
        keeps_off="One node from a certificate for another's address.",
        attacks=(_SETUP + "test_nobody_is_certified_as_another", _SETUP + "test_nothing_slips_in_besides"),
        positives=(_SETUP + "test_either_lock_holds_alone",)),
    Control(
        id="no-core", where="sandbox", promise="P2", told="built in", code="ray_gpu/sandbox/harden.py::_limit",
        keeps_off="Memory of keeper and sandbox from core files, and debuggers from their processes.",
        attacks=(*_PROBE_REFUSED, _ENDINGS + "test_core_files"),
        positives=(*_PROBE_DONE, _ENDINGS + "test_core_files")),
    Control(
        id="no-descriptors", where="sandbox", promise="P2", told="built in",
        code="ray_gpu/sandbox/harden.py::_close_others",
        keeps_off="User code from files and connections of whoever started it.",
        attacks=(_LAUNCH + "test_descriptors", *_PROBE_REFUSED),
        positives=_PROBE_DONE),
    Control(
        id="lease-end", where="keeper", promise="P2", told="built in", code="ray_gpu/custodian.py::Custodian",
        keeps_off="Plaintext and keys from outliving their lease.",
        attacks=(_CANARIES + "test_gone_with_the_lease", _ENDINGS + "test_ending", _LAUNCH + "test_end_leaves_nothing"),
        positives=(_CANARIES + "test_keeper_and_sandbox_hold_it",)),
    Control(
        id="private-memory", where="keeper", promise="P6", told="built in", code="ray_gpu/frames.py::SealedSocket",
        keeps_off="A sandbox from changing bytes while its keeper seals or opens them.",
        attacks=(_FRAMES + "test_ciphers_see_private_memory_alone",),
        positives=(_FRAMES + "test_control_shared_memory_is_seen",)),
    Control(
        id="decision-first", where="gateway", promise="P3", told="built in", code="zones/policy.py::Policy",
        keeps_off="Bytes from leaving that policy did not allow, whoever asks.",
        attacks=(_MAIN + "test_refusal_is_in_the_ledger_and_sent_nothing", _BYPASS + "test_denied",
                 _POLICY + "test_deny_by_default")),
    Control(
        id="ledger-first", where="gateway", promise="P3", told="built in", code="zones/budget.py::Budget",
        keeps_off="Bytes from leaving before they are written down.",
        attacks=(_MAIN + "test_intent_rests_on_an_earlier_decision", _BYPASS + "test_every_byte_is_in_the_ledger",
                 _LEDGER + "test_draw_beyond")),
    Control(
        id="ledger-chain", where="zone", promise="P3", told="built in", code="zones/ledger.py::Ledger",
        keeps_off="Whoever can write the ledger's file from changing an entry unnoticed.",
        attacks=(_LEDGER + "test_every_byte_of_an_entry", _LEDGER + "test_tampered_entry")),
    Control(
        id="labels", where="gateway", promise="P3", told="built in", code="zones/labels.py::classify",
        keeps_off="Data from leaving under a lower class than its own: renamed, derived, captured or as an argument.",
        attacks=(_BYPASS + "test_renamed_columns", _BYPASS + "test_session_cap")),
    Control(
        id="endpoints", where="gateway", promise="P3", told="built in", code="ray_gpu/leases.py::LeaseOpener",
        keeps_off="A lying relay from aiming the gateway at an address that zone.yaml does not name."),
    Control(
        id="sealed-memory", where="gateway", promise="P3", told="built in", code="ray_gpu/source.py::from_memory",
        keeps_off="A notebook from changing data between decision and sending.",
        attacks=(_SOURCE + "test_sealed_memory_file_cannot_be_changed", _BYPASS + "test_file_that_can_change")),
    Control(
        id="person", where="gateway", promise="P3", told="built in", code="zones/vault.py::Vault",
        keeps_off="Whoever is no person of the zone, by Vault's word, from a session.",
        attacks=(_BYPASS + "test_nobody", _VAULT + "test_whoami_refuses_who_is_no_person_of_the_zone")),
    Control(
        id="grant-terms", where="Vault", promise="P4", told="built in", code="zones/vault.py::Vault",
        keeps_off="A lease's key from opening for terms that were not granted.",
        attacks=(_KEYS + "test_changed_grant", _VAULT + "test_changed_grant_refused")),
    Control(
        id="grant-once", where="node", promise="P4", told="built in", code="ray_gpu/custodian.py::Custodian",
        keeps_off="A grant from being used twice, on another boot, or after its lease.",
        attacks=(_KEYS + "test_replayed_by_another_actor", _KEYS + "test_replayed_after_the_lease",
                 _KEYS + "test_another_boot")),
    Control(
        id="own-leases", where="Vault", promise="P4", told="built in", code="policies/vault/custodian.hcl::decrypt",
        keeps_off="A node from another node's leases, and everybody else from all.",
        attacks=(_KEYS + "test_who_can_unwrap", _VAULT + "test_node_refused_other_nodes_key")),
    Control(
        id="ephemeral-exchange", where="keeper", promise="P4", told="built in", code="zones/keys.py::derive_lease_key",
        keeps_off="Whoever later gets Vault's backup and a node's identity from recorded traffic.",
        attacks=(_KEYS + "test_the_data_key_is_not_enough", _ZONE_KEYS + "test_lease_key_depends_on_every_bit")),
    Control(
        id="shredded", where="Vault", promise="P4", told="built in", code="zones/vault.py::Vault",
        keeps_off="Everybody from a lease's key once the lease has ended.",
        attacks=(_KEYS + "test_shredded_with_the_session", _VAULT + "test_shredded_key_refuses"),
        positives=(_VAULT + "test_data_key_round_trip",)),
    Control(
        id="envelope", where="keeper", promise="P4", told="built in", code="zones/envelope.py::Opener",
        keeps_off="Whoever is between gateway and keeper from reading, changing, moving or cutting a message.",
        attacks=(_ENVELOPE + "test_every_byte", _ENVELOPE + "test_wrong_slot",
                 _ENVELOPE + "test_truncation_at_every_length", _RESULTS + "test_forgery_is_refused",
                 _HOSTS + "test_wire"),
        positives=(_HOSTS + "test_wire",)),
    Control(
        id="replay", where="keeper", promise="P4", told="built in", code="zones/replay.py::ReplayGuard",
        keeps_off="A message from being accepted twice.",
        attacks=(_ENVELOPE + "test_replay_is_refused_in_any_order", _FRAMES + "test_replay_of_a_foreseen_message")),
    Control(
        id="shuffle", where="zone", promise="P5", told="built in", code="zones/plan.py::order",
        keeps_off="A node from the order of the rows and from shards that follow each other.",
        attacks=(_SHARDS + "test_no_neighbour_in_a_shard", _SHARDS + "test_no_position")),
    Control(
        id="strip", where="zone", promise="P5", told="built in", code="zones/shards.py::strip",
        keeps_off="A node from metadata, categories and values beneath nulls.",
        attacks=(_SHARDS + "test_strip_hides_metadata_and_categories", _SHARDS + "test_nothing_beneath_a_null",
                 _CANARIES + "test_category_values_stay")),
    Control(
        id="padding", where="zone", promise="P5", told="built in", code="zones/envelope.py::Sealer",
        keeps_off="Whoever watches the network from exact sizes.",
        attacks=(_ENVELOPE + "test_padded_size",)),
    Control(
        id="plain-results", where="gateway", promise="P6", told="built in", code="zones/decoding.py::decode",
        keeps_off="Results from running code, or filling memory, in gateway or notebook.",
        attacks=(_RESULTS + "test_hostile_sandbox", _RESULTS + "test_pickle_stays_bytes",
                 _VALUES + "test_hostile_arrow"),
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
        attacks=(_MAIN + "test_changed_receipt_does_not_verify", _ZONE_KEYS + "test_node_signature_refused")),
)
# fmt: on

#: Every control by id.
CONTROLS: Mapping[str, Control] = MappingProxyType({control.id: control for control in _ALL})


def describe(ids: Iterable[str]) -> str:
    """Return one line per id, ``id: meaning fix``, for people. An unknown id stands alone."""
    return "\n".join(f"{i}: {CONTROLS[i].meaning} {CONTROLS[i].fix}" if i in CONTROLS else i for i in ids)


def markdown_table() -> str:
    """Return the registry as the table in docs/controls.md. Paths of links are relative to docs/."""
    rows = []
    for control in _ALL:
        tests = " | ".join(_links(kind) for kind in (control.attacks, control.positives, control.mutations))
        facts = f"`{control.id}` | {control.keeps_off} | {control.where} | {control.promise} | {control.told}"
        rows.append(f"| {facts} | {tests} |")
    head = "| id | keeps off | where | promise | told by | attack | positive control | mutation |"
    return "\n".join([head, "|---|---|---|---|---|---|---|---|", *rows, ""])


def _links(tests: tuple[str, ...]) -> str:
    parts = [test.partition("::") for test in tests]
    return ", ".join(f"[{name}](../{file})" for file, _, name in parts) or "none yet"
