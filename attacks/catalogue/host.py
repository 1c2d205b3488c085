"""Mutations of what a host may lack: the control itself where it is code of ours, and what says that it is missing."""

from __future__ import annotations

from attacks.catalogue.mutation import Edit, Mutation, mutation

_BOUNDARY, _LAUNCH = "tests/sandbox/test_boundary.py::", "tests/sandbox/test_launch.py::"
_CHECK, _SAID = "tests/doctor/test_checks.py::test_check", "tests/sandbox/test_survey.py::test_what_is_missing_is_said"
_SURVEY, _KERNEL = "ray_gpu/sandbox/survey.py", "ray_gpu/doctor/kernel.py"
_FILES, _SOFTWARE, _VAULT = "ray_gpu/doctor/files.py", "ray_gpu/doctor/software.py", "ray_gpu/doctor/vault.py"
_CGROUP = "ray_gpu/sandbox/cgroup.py"


def _unsaid(control: str, condition: str) -> Mutation:
    """Have nobody say before a lease that a control is missing."""
    old = f'"{control}": {condition},'
    return mutation(
        control, "offers do not say that it is missing", Edit(file=_SURVEY, old=old, new=f'"{control}": False,'),
        f"{_SAID}[{control}]", rf"'{control}' in \(",
    )  # fmt: skip


def _unchecked(control: str, edit: Edit, case: str) -> Mutation:
    """Have the doctor take a control for one that holds, though it does not."""
    return mutation(
        control, "the doctor says that all is well", edit, f"{_CHECK}[{case}]", r"\('(holds|unclear)'.* == \('missing'"
    )


MUTATIONS: tuple[Mutation, ...] = (
    mutation(
        "shared-uid", "all confined processes run under one uid",
        Edit(file=_SURVEY, old='[f"--reuid={profile.uid}", f"--regid={gid}",', new='["--reuid=61000", "--regid=61000",'),
        _LAUNCH + "test_uid_as_the_host_sees_it", r"'61000'",
    ),
    _unsaid("shared-uid", "not found.root"),
    mutation(
        "no-namespaces", "user code stays in the host's network",
        Edit(file="ray_gpu/sandbox/bubblewrap.py", old='yield "--unshare-net"', new="yield from ()"),
        _BOUNDARY + "test_bubblewrap_alone[root]", r"\{[^}]*'tcp'.*<=",
    ),
    mutation(
        "no-namespaces", "user code sees the host's files",
        Edit(file="ray_gpu/sandbox/bubblewrap.py", old="*_tmpfs(profile),", new='"--ro-bind", "/etc", "/etc", *_tmpfs(profile),'),
        _BOUNDARY + "test_bubblewrap_alone[root]", r"'read /etc/passwd'.*<=",
    ),
    _unsaid("no-namespaces", 'found.mode == "none"'),
    _unsaid("file-capability", "found.capability is not None"),
    _unchecked("file-capability", Edit(file=_KERNEL, old="    if capability:\n", new="    if False:\n"),
               "Python with a capability"),
    mutation(
        "no-seccomp", "the filter refuses no system call",
        Edit(file="ray_gpu/sandbox/seccomp.py", old="    if number >= 0:  #", new="    if number >= 1 << 30:  #"),
        _BOUNDARY + "test_escape_is_refused[keyctl-root]", r"'done'\.startswith|startswith\('refused'\)",
    ),
    _unsaid("no-seccomp", "not found.seccomp"),
    mutation(
        "no-landlock", "the rules are made and not put on",
        Edit(file="ray_gpu/sandbox/landlock.py",
             old="_checked(_RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint32(0))", new="os.fstat(ruleset)"),
        _BOUNDARY + "test_escape_is_refused[read host file-user-without-userns]",
        r"'done'\.startswith|startswith\('refused'\)",
    ),
    _unsaid("no-landlock", "found.landlock_abi == 0"),
    mutation(
        "no-cgroup", "a lease's memory has no cap",
        Edit(file=_CGROUP, old="        _cap_memory(found, memory, memory_bytes)\n", new="        del memory_bytes\n"),
        _LAUNCH + "test_memory_cap_kills_the_sandbox", r"'held' == ''",
    ),
    _unsaid("no-cgroup", 'found.cgroup is None and kind != "cage"'),
    mutation(
        "swap-on", "a lease's memory may be swapped out",
        (
            Edit(file=_CGROUP, old='_write(directory / "memory.swap.max", 0)', new="pass"),
            Edit(file=_CGROUP, old='_write(directory / "memory.memsw.limit_in_bytes", memory_bytes)', new="pass"),
        ),
        _LAUNCH + "test_memory_cap_leaves_no_swap", r"assert \d+ == 0",
    ),
    _unsaid("swap-on", 'found.swap and kind != "cage" and not (found.cgroup and found.cgroup.swap_control)'),
    _unchecked("swap-on", Edit(file=_KERNEL, old="    if groups and groups.usable and groups.swap_control:", new="    if True:"),
               "swap on"),
    mutation(
        "numpy-stand-in", "offers do not say that there is no GPU",
        Edit(file="ray_gpu/custodian.py", old='stand_in = () if boundary.gpu_devices() else ("numpy-stand-in",)', new="stand_in = ()"),
        "tests/test_offers.py::test_offer_says_what_computes[none]", r"'numpy-stand-in' in \[",
    ),
    mutation(
        "embedded-vault", "nobody says that keys lie beside the data",
        Edit(file="ray_gpu/embedded.py", old='return ("embedded-vault", *own, *cage)', new="return (*own, *cage)"),
        "tests/job/test_degraded.py::test_refused_before_the_first_byte[one]", r"DID NOT RAISE.*SandboxLevelError",
    ),
    mutation(
        "self-enforced", "people of the host can read the zone's data themselves",
        Edit(file="ray_gpu/services.py", old="data: 0o700,", new="data: 0o755,"),
        "tests/attack/test_gateway_uid.py::test_person_reads_no_data", r"assert 0 != 0|returncode",
    ),
    _unchecked("self-enforced", Edit(file=_KERNEL, old='''    if euid == 0:
        return holds("self-enforced"''', new='''    if True:
        return holds("self-enforced"'''), "gateway user"),
    mutation(
        "uncaged-ray", "the host's files are shown to Ray",
        Edit(file="ray_gpu/sandbox/profile.py", old="network=network, bind_ro=readable,",
             new='network=network, bind_ro=(*readable, Path("/etc")),'),
        _LAUNCH + "test_cage", r"61009 True",
    ),
    mutation(
        "uncaged-ray", "whoever runs in a cage can write where Python looks",
        Edit(file="ray_gpu/raylet.py", old="tmpfs=_TMPFS_BYTES if caged else {},",
             new="tmpfs=_TMPFS_BYTES | {str(root): 4096 for root in profiles.package_roots()} if caged else {},"),
        "tests/attack/test_lateral.py::test_cage_writes_its_own_memory_alone", r"assert .* == \{",
    ),
    _unchecked("uncaged-ray", Edit(file=_KERNEL, old='    if mode == "none":\n        return missing(control',
                                   new='    if False:\n        return missing(control'), "no cage"),
    mutation(
        "shared-network", "a cage opens whatever it wants",
        Edit(file="ray_gpu/cage_net.py", old='"from_cage": [answers, *opened, "drop"],', new='"from_cage": ["accept"],'),
        # With every firewall off: with them, hosts and router drop most of it as well.
        "tests/hosts/test_cluster.py::test_a_cage_reaches_rays_ports_alone", r"assert \[\('tcp'.* == \[\('tcp'",
    ),
    _unchecked("shared-network", Edit(file=_KERNEL, old='    if lacking or mode != "root":', new="    if False:"), "cage without nft"),
    # -- what `ray-gpu doctor` alone finds ----------------------------------------------------------
    _unchecked("core-handler", Edit(file=_KERNEL, old='    if pattern.startswith("|"):', new="    if False:"), "cores to systemd"),
    mutation(
        "core-limit", "our processes dump their memory like any other",
        Edit(file="ray_gpu/sandbox/harden.py", old="    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n    # A core",
             new="    return\n    # A core"),
        "tests/attack/test_host_controls.py::test_core_file", r"True is False",
    ),
    _unchecked("core-limit", Edit(file=_KERNEL, old="    if limit == 0:", new="    if True:"), "any core"),
    _unchecked("ksm-on", Edit(file=_KERNEL, old='    if run == "1":', new="    if False:"), "ksm on"),
    _unchecked("ptrace-open", Edit(file=_KERNEL, old='''    if euid == 0:
        return holds("ptrace-open"''', new='''    if True:
        return holds("ptrace-open"'''), "ptrace 0"),
    mutation(
        "credentials-open", "the doctor takes a login that all can read for private",
        Edit(file=_FILES, old="    if file.mode & _OTHERS_READ:", new="    if False:"),
        "tests/doctor/test_checks.py::test_private_file", r"'holds'.* == \('missing'",
    ),
    _unchecked("session-on-disk", Edit(file=_FILES, old="    if kind in IN_MEMORY:\n        return holds(", new="    if True:\n        return holds("), "disk"),
    mutation(
        "credentials-open", "a host starts with a login that all can read",
        Edit(file="ray_gpu/host_file.py", old="    if mode & 0o077:", new="    if False:"),
        "tests/test_host_files.py::test_login_refused", "DID NOT RAISE",
    ),
    mutation(
        "session-on-disk", "a node starts with its token on a disk",
        Edit(file="ray_gpu/node.py", old="        if kind not in IN_MEMORY:", new="        if False:"),
        "tests/attack/test_host_controls.py::test_files_on_a_disk", r"'session-on-disk' in '",
    ),
    _unchecked("full-ray", Edit(file=_SOFTWARE, old="    if set(AGENT_MODULES) <= set(modules):", new="    if False:"),
               "Ray with agents"),
    _unchecked("old-ray", Edit(file=_SOFTWARE, old="    if _numbers(installed) < _numbers(floors[0]):", new="    if False:"),
               "Ray old"),
    _unchecked("certificate-ends", Edit(file=_FILES, old="    if not_after - now < SOON_S:", new="    if False:"),
               "certificate ends"),
    _unchecked("vault-unproven", Edit(file=_VAULT, old='''    if answer.failure:
        return missing(''', new='''    if False:
        return missing('''), "Vault gone"),
    mutation(
        "vault-unproven", "logins go to a Vault without TLS",
        Edit(file="zones/vault.py", old='if not address.startswith("https://"):', new="if not address:"),
        "tests/test_vault.py::test_plain_http_refused", "DID NOT RAISE",
    ),
    mutation(
        "clock-skew", "nodes and gateways log in whatever their clock says",
        Edit(file="zones/vault.py", old="        if abs(ahead_s) > MOST_SKEW_S:", new="        if False:"),
        "tests/attack/test_site_controls.py::test_clock", "DID NOT RAISE",
    ),
    _unchecked("clock-skew", Edit(file=_VAULT, old="    if abs(skew) > MOST_SKEW_S:", new="    if False:"), "clock ahead"),
    mutation(
        "ports-open", "hosts let through what they do not name",
        Edit(file="ray_gpu/ports.py", old="priority filter; policy drop;", new="priority filter; policy accept;"),
        "tests/hosts/test_matrix.py::test_matrix", "got through",
    ),
    _unchecked("ports-open", Edit(file=_SOFTWARE, old='    if rules == "loaded":', new="    if True:"), "rules missing"),
    _unchecked("kernel-tcp", Edit(file="ray_gpu/doctor/notebooks.py", old='kernel.transport == "tcp"]', new="kernel.pid < 0]"),
               "kernels by TCP"),
)  # fmt: skip
