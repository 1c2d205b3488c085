# What a GPU node's custodian may do for zone ${zone}: unwrap the data keys of its own leases, nothing else.
# Node ids hold no dot, so "<node>.*" reaches no other node's keys.

path "zone-${zone}/decrypt/{{identity.entity.name}}.*" {
  capabilities = ["update"]
}

# The role "node" signs for the caller's own entity name alone.
path "pki-nodes/sign/node" {
  capabilities = ["update"]
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
