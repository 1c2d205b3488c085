"""Mutations of the controls without which nothing works, so that nobody need say when they are missing."""

from __future__ import annotations

from attacks.catalogue.mutation import Edit, Mutation, mutation

_BOUNDARY, _LAUNCH = "tests/sandbox/test_boundary.py::", "tests/sandbox/test_launch.py::"
_CANARIES, _KEYS = "tests/proofs/test_canaries.py::", "tests/proofs/test_keys.py::"
_ENVELOPE, _SHARDS = "tests/zones/test_envelope.py::", "tests/zones/test_shards.py::"
_LEDGER, _VAULT = "tests/zones/test_ledger.py::", "tests/test_vault.py::"
_HARDEN, _CUSTODIAN = "ray_gpu/sandbox/harden.py", "ray_gpu/custodian.py"
_REFUSED = r"'done'\.startswith|startswith\('refused'\)"

MUTATIONS: tuple[Mutation, ...] = (
    mutation(
        "payload-past-ray", "the gateway hands its relay, which is Ray's, what a call sends",
        (
            Edit(file="ray_gpu/job.py", old="    allowed = session.decide(request, source)\n",
                 new="    allowed = session.decide(request, source)\n"
                     '    session.leases.opener._relay.request({"op": "ping", "work": request.work.function})\n'),
            Edit(file="ray_gpu/relay.py", old='"ping": lambda _: {},', new='"ping": lambda said: globals().update(kept=said) or {},'),
        ),
        _CANARIES + "test_ray_sees_nothing", r"Hit\(.*== \[\]",
    ),
    mutation(
        "ray-quiet", "Ray writes what its workers print to files",
        Edit(file="ray_gpu/raylet.py", old='"RAY_LOG_TO_STDERR": "1",', new=""),
        "tests/test_nodes.py::test_prints_are_in_no_file", r"assert \[.+\] == \[\]",
    ),
    mutation(
        "ray-tls", "Ray's ports ask for no certificate",
        Edit(file="ray_gpu/node_identity.py", old='"RAY_USE_TLS": "1",', new='"RAY_USE_TLS": "0",'),
        "tests/test_node_identity.py::test_whom_ray_lets_in", r"waited in vain for .*ended",
    ),
    mutation(
        "ray-token", "Ray's ports ask for no token",
        Edit(file="ray_gpu/node_identity.py", old='"RAY_AUTH_MODE": "token"', new='"RAY_AUTH_MODE": "disabled"'),
        "tests/test_node_identity.py::test_whom_ray_lets_in", r"waited in vain for .*ended",
    ),
    mutation(
        "relay-network", "a client zone's relay has the host's network",
        Edit(file="ray_gpu/client_relay.py", old="network=False, env={", new="network=True, env={"),
        "tests/attack/test_client_relay.py::test_cage_has_no_network", r"== \['lo'\]",
    ),
    mutation(
        "forwarder", "the forwarder serves every uid",
        Edit(file="ray_gpu/forwarder.py", old="if boundary.peer_uid(asker) in self.uids:", new="if True:"),
        "tests/attack/test_client_relay.py::test_forwarder_serves_its_relay_alone", r"\('1', '1'\) == \('0', '1'\)",
    ),
    mutation(
        "node-addresses", "neither lock binds a node's certificate to its addresses",
        (
            Edit(file="policies/vault/ray-node.hcl", old='"ip_sans"     = ["${addresses}"]', new='"ip_sans"     = []'),
            Edit(file="ray_gpu/vault_pki.py",
                 old='[_single(address) for address in joined_addresses(node.certified()).split(",")],', new='["0.0.0.0/0", "::/0"],'),
        ),
        "tests/test_vault_setup.py::test_nobody_is_certified_as_another", "DID NOT RAISE",
    ),
    mutation(
        "no-core", "a crashed process may write its memory to a core file",
        Edit(file=_HARDEN, old="    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n", new=""),
        _BOUNDARY + "test_escape_is_refused[raise core limit-root]", _REFUSED,
    ),
    mutation(
        "no-descriptors", "a launched process inherits every descriptor, and closes none",
        (
            Edit(file=_HARDEN, old="    _close_others(around.keep_fds if keep_fds is None else keep_fds)\n", new=""),
            Edit(file="ray_gpu/sandbox/boundary.py", old="command, env=env, pass_fds=fds,",
                 new="command, env=env, close_fds=not [os.set_inheritable(fd, True) for fd in fds],"),
        ),
        _BOUNDARY + "test_escape_is_refused[inherited descriptor-root]", _REFUSED,
    ),
    mutation(
        "lease-end", "keeper and sandbox outlive their lease",
        Edit(file=_CUSTODIAN, old="        _kill(running)\n", new=""),
        "tests/attack/test_lease_end.py::test_lease_ends_with_its_actor", r"assert \[\[.+\] == \[\]",
    ),
    mutation(
        "private-memory", "messages are sealed from, and opened into, memory that others can map",
        Edit(file="ray_gpu/frames.py", old="_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS",
             new="_PRIVATE = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS"),
        "tests/test_frames.py::test_ciphers_see_private_memory_alone", r"assert \[.+\] == \[\]",
    ),
    mutation(
        "decision-first", "whatever policy answers is taken for a yes",
        Edit(file="zones/policy.py", old="return Answer(allowed=mine.allowed and theirs.allowed,", new="return Answer(allowed=True,"),
        "tests/zones/test_policy.py::test_deny_by_default", r"assert .*True",
    ),
    mutation(
        "ledger-first", "more leaves than the ledger reserved",
        Edit(file="zones/budget.py", old="            if self._ended or not fits:", new="            if False:"),
        _LEDGER + "test_draw_beyond", "DID NOT RAISE",
    ),
    mutation(
        "ledger-chain", "an entry's hash says nothing about what is in it",
        Edit(file="zones/audit.py", old="hashlib.sha256(_HEAD_LABEL + previous + digest)", new="hashlib.sha256(_HEAD_LABEL)"),
        _LEDGER + "test_tampered_entry", "DID NOT RAISE",
    ),
    mutation(
        "ledger-signed", "any signature of a checkpoint holds",
        Edit(file="zones/note.py", old="    except InvalidSignature:\n        return False", new="    except InvalidSignature:\n        return True"),
        "tests/zones/test_proof.py::test_checkpoint_that_does_not_hold", "DID NOT RAISE",
    ),
    mutation(
        "field-commitments", "all fields of an entry have one salt",
        Edit(file="zones/commitments.py", old="return hashlib.sha256(_SALT_LABEL + _text(name) + salt).digest()", new="return salt"),
        "tests/zones/test_proof.py::test_only_chosen_fields", "assert not",
    ),
    mutation(
        "labels", "a call has the class of its function, whatever data it sends",
        Edit(file="zones/labels.py", old="frozenset(data | {_small_class(", new="frozenset({_small_class("),
        "tests/zones/test_labels.py::test_classes", r"assert .*frozenset\(",
    ),
    mutation(
        "endpoints", "the gateway connects to wherever the relay says",
        Edit(file="ray_gpu/leases.py", old="if not endpoint_allowed(self.zone.endpoints, str(host), port):", new="if False:"),
        "tests/attack/test_lying_relay.py::test_endpoint_outside", "DID NOT RAISE",
    ),
    mutation(
        "sealed-memory", "a memory file that can still change is taken",
        Edit(file="ray_gpu/share.py", old="if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _REQUIRED != _REQUIRED:",
             new="if fcntl.fcntl(fd, fcntl.F_GET_SEALS) < 0:"),
        "tests/test_source.py::test_unsealed_memory_file_is_refused", "DID NOT RAISE",
    ),
    mutation(
        "person", "whoever has any token of Vault's counts as a person of the zone",
        Edit(file="zones/vault.py", old='''if _PERSON_POLICY.format(zone=check_id(zone, what="zone")) not in held or not entity_id:''',
             new="if not held or not entity_id:"),
        _VAULT + "test_whoami_refuses_who_is_no_person_of_the_zone", "DID NOT RAISE",
    ),
    mutation(
        "grant-terms", "a key opens for any grant",
        Edit(file="zones/vault.py", old='    digest = bytes.fromhex(grant_digest)\n    if len(digest) != 32:',
             new="    digest = bytes(32)\n    if not grant_digest:"),
        _VAULT + "test_changed_grant_refused", "DID NOT RAISE",
    ),
    mutation(
        "grant-once", "a lease is offered, and its grant taken, again",
        (
            Edit(file=_CUSTODIAN, old="if lease in self._used or lease in self._offers:", new="if False:"),
            Edit(file=_CUSTODIAN, old="if found is None or lease in self._used:", new="if found is None:"),
        ),
        _KEYS + "test_replayed_after_the_lease", "DID NOT RAISE",
    ),
    mutation(
        "own-leases", "a node may unwrap any node's keys",
        Edit(file="policies/vault/custodian.hcl", old="decrypt/{{identity.entity.name}}.*", new="decrypt/*"),
        _VAULT + "test_node_refused_other_nodes_key", "DID NOT RAISE",
    ),
    mutation(
        "ephemeral-exchange", "Vault's data key alone makes the lease key",
        Edit(file="zones/keys.py", old="kdf.derive(data_key + shared_secret)", new="kdf.derive(data_key + bytes(32))"),
        "tests/zones/test_keys.py::test_lease_key_depends_on_every_bit", r"assert .* != ",
    ),
    mutation(
        "shredded", "keys of ended leases stay in Vault",
        Edit(file="zones/vault.py", old='            self.call("DELETE", path)\n', new=""),
        _VAULT + "test_shredded_key_refuses", "DID NOT RAISE",
    ),
    mutation(
        "envelope", "a message is bound to no slot and no grant",
        (
            Edit(file="zones/envelope.py", old="return key.derive(_KEY_LABEL + info + lease)", new="return key.derive(_KEY_LABEL)"),
            Edit(file="zones/envelope.py", old="return _CONTEXT_LABEL + hashlib.sha512(header).digest() + _grant_bytes(grant_digest)",
                 new="return _CONTEXT_LABEL"),
        ),
        (_ENVELOPE + "test_wrong_grant", _ENVELOPE + "test_every_header_bit_is_in_the_context"), "DID NOT RAISE",
    ),
    mutation(
        "replay", "a shard is taken twice",
        Edit(file="zones/replay.py", old="if slot.call <= self._finished or full or (seen is not None and slot.attempt <= seen):",
             new="if full:"),
        _ENVELOPE + "test_replay_is_refused_in_any_order", r"False = refused\(",
    ),
    mutation(
        "shuffle", "rows leave in the source's order",
        Edit(file="zones/plan.py", old="return permutation(units, seed)",
             new="return np.arange(units, dtype=np.int64)"),
        _SHARDS + "test_shuffles_move_rows", r"\d+\)? < 20",
    ),
    mutation(
        "node-share", "a node with its share gets more",
        Edit(file="zones/spread.py", old="for node, some in holding.items() if len(some) < most[node]]", new="for node in holding]"),
        "tests/zones/test_spread.py::test_assign", r"assert ",
    ),
    mutation(
        "lineage", "policy is not asked about what a data set was made of",
        Edit(file="zones/policy.py", old="        asked = chain(self.zone, request)\n", new="        asked = [request]\n"),
        "tests/zones/test_lineage.py::test_refused_with_its_parent", r"assert \(True",
    ),
    mutation(
        "obligations", "a call is not checked against what its decision demands",
        Edit(file="ray_gpu/session.py", old="        if missed := unmet(obligations, call):\n", new="        if missed := []:\n"),
        "tests/job/test_obligations.py::test_broken[max_rows]", "DID NOT RAISE",
    ),
    mutation(
        "approval", "any key's signature approves a function",
        Edit(file="zones/approvals.py", old="    if not any(notes.signed_by(note, officer) for officer in officers):\n", new="    if False:\n"),
        "tests/zones/test_approvals.py::test_refused[another's]", r"== \{\}",
    ),
    mutation(
        "environment-contents", "published files are served unread",
        Edit(file="ray_gpu/environment_store.py", old="        if (was := files_digest(site)) != found.files:\n", new='        if (was := "") and was != found.files:\n'),
        "tests/test_environment_store.py::test_changed[_byte]", "DID NOT RAISE",
    ),
    mutation(
        "checkpoint-keys", "a key is anybody's, under any name",
        Edit(file="ray_gpu/checkpoints.py", old='    return hashlib.sha256(b"\\0".join((b"ray-gpu checkpoint", person.encode(), name.encode()))).hexdigest()\n', new='    return hashlib.sha256(b"ray-gpu checkpoint").hexdigest()\n'),
        "tests/job/test_checkpoints.py::test_theirs_alone", "DID NOT RAISE",
    ),
    mutation(
        "instance-owner", "instances are every session's",
        Edit(file="ray_gpu/session.py", old="        self._instances: dict[str, InstancePool] = {}\n", new='        self._instances: dict[str, InstancePool] = vars(services.in_force).setdefault("instances", {})\n'),
        "tests/job/test_classes.py::test_nobody_elses_calls", "DID NOT RAISE",
    ),
    mutation(
        "strip", "category values leave with the rows",
        Edit(file="zones/shards.py", old="    elif pa.types.is_dictionary(column.type):\n", new="    elif False:\n"),
        _SHARDS + "test_strip_hides_metadata_and_categories", r"assert ",
    ),
    mutation(
        "padding", "messages have the size of what is in them",
        Edit(file="zones/header.py", old="    return _power_of_two(size) if padding is Padding.COARSE else _bucket(size)\n", new="    return size\n"),
        _ENVELOPE + "test_padded_size_table", r"assert ",
    ),
    mutation(
        "plain-results", "an Arrow stream from outside may hold extension types",
        Edit(file="zones/ipc.py", old="                _check_schema(reader.schema)\n", new="                reader.schema\n"),
        "tests/proofs/test_results.py::test_forgery_is_refused[ray.data.arrow_pickled_object]", "DID NOT RAISE",
    ),
    mutation(
        "plain-errors", "an error of a function may end the notebook",
        (
            Edit(file="ray_gpu/remote_error.py", old='_NEVER = {"SystemExit", "KeyboardInterrupt", "GeneratorExit"}', new="_NEVER = {0}"),
            Edit(file="ray_gpu/remote_error.py", old="issubclass(kind, Exception))", new="issubclass(kind, BaseException))"),
        ),
        "tests/test_remote_error.py::test_what_would_end_the_notebook_stays_remote", r"False = isinstance\((SystemExit|KeyboardInterrupt)",
    ),
    mutation(
        "level-first", "a node that is weaker than policy asks for gets data",
        Edit(file="ray_gpu/leases.py", old="    if missing:\n        raise SandboxLevelError(", new="    if False:\n        raise SandboxLevelError("),
        "tests/job/test_degraded.py::test_refused_before_the_first_byte[one]", r"DID NOT RAISE.*SandboxLevelError",
    ),
    mutation(
        "pool-policy", "no pool refuses a grant",
        Edit(file="zones/policy.py", old="return None if decision.allowed else _because(decision)", new="return None"),
        "tests/zones/test_policy.py::test_refusal_of_a_grant", r"assert None == ",
    ),
    mutation(
        "pool-policy", "custodians do not ask their pool's policy",
        Edit(file=_CUSTODIAN, old="        refusal = self._policy.refusal(grant)\n", new='        refusal = ""\n'),
        _KEYS + "test_forbidden_by_the_pool", "DID NOT RAISE",
    ),
    mutation(
        "stalls", "a message that has begun need not end",
        (
            Edit(file="ray_gpu/frames.py", old="            elif time.monotonic() > self._deadline:", new="            elif False:"),
            Edit(file="ray_gpu/frames.py", old="        if self._deadline and time.monotonic() > self._deadline:", new="        if False:"),
        ),
        "tests/test_frames.py::test_message_that_never_ends[a byte]", "EnvelopeError|DID NOT RAISE",
    ),
    mutation(
        "gpu-scrub", "GPU memory is taken for scrubbed",
        Edit(file="ray_gpu/sandbox/scrub.py", old="scrubbed = self._scrubber(uid, self._devices) if others else 0", new="scrubbed = 0"),
        "tests/sandbox/test_scrub.py::test_when_it_is_scrubbed", r"assert 0 == \d",
    ),
    mutation(
        "strangers", "whoever says anything at the data port counts as the gateway",
        Edit(file="ray_gpu/keeper.py", old="        except (ZoneError, OSError):\n            proven = False", new="        except (ZoneError, OSError):\n            proven = True"),
        "tests/test_frames.py::test_strangers_at_the_keeper", "PeerClosedError|ConnectionResetError|EnvelopeError|assert False|TimeoutError: timed out",
    ),
    mutation(
        "second-opinion", "what one node answers is believed",
        Edit(file="ray_gpu/job.py", old="        if asked is None and self._leases.others(lease):\n", new="        if False:\n"),
        "tests/attack/test_into_zone.py::test_lying_result_on_ray[pickle as the value]", "AnswerRefusedError",
    ),
    mutation(
        "signed-receipt", "any signature counts as the node's",
        Edit(file="zones/keys.py", old="        key.verify(bytes.fromhex(signature_hex), _SIGNATURE_LABEL + message)\n", new="        del key\n"),
        "tests/zones/test_keys.py::test_node_signature_refused", "DID NOT RAISE",
    ),
)  # fmt: skip
