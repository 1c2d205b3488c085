# What the gateway of zone ${zone} may do. It makes, lists and shreds lease keys and asks for data keys.
# It has no path to "export" or "backup", and to "decrypt" for its people's checkpoints alone: only the node that a
# lease is for can unwrap that.

path "zone-${zone}/keys" {
  capabilities = ["list"]
}

# Making a key is an "update" in transit; a second one of the same name changes nothing, and rotating is another path.
# The values allowed are the only ones used, so that no key is exportable or without a derivation context.
path "zone-${zone}/keys/+" {
  capabilities       = ["update", "delete"]
  allowed_parameters = {
    "type"    = ["aes256-gcm96"]
    "derived" = [true]
  }
  required_parameters = ["type", "derived"]
}

path "zone-${zone}/keys/+/config" {
  capabilities       = ["update"]
  allowed_parameters = {
    "deletion_allowed" = [true]
  }
}

path "zone-${zone}/datakey/plaintext/+" {
  capabilities = ["update"]
}

# What people keep in the zone. Its key is made like a lease's, and has no node in its name.
path "zone-${zone}/decrypt/checkpoints" {
  capabilities = ["update"]
}

# To sign checkpoints of its ledger. The key cannot be exported, and only set-up makes or rotates one.
path "ledger/keys/${zone}" {
  capabilities = ["read"]
}
path "ledger/sign/${zone}" {
  capabilities = ["update"]
}

# To turn a person's token into a name and groups.
path "identity/entity/id/+" {
  capabilities = ["read"]
}
path "identity/group/id/+" {
  capabilities = ["read"]
}

path "pki-nodes/cert/ca" {
  capabilities = ["read"]
}

path "auth/token/lookup-self" {
  capabilities = ["read"]
}
path "auth/token/revoke-self" {
  capabilities = ["update"]
}
