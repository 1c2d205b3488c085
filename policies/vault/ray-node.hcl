# What node ${node} of the Ray cluster may do: get a certificate for itself, and read the cluster's token.
#
# One policy for each node, because the addresses in a certificate are what other nodes go by: Ray's TLS checks that
# the certificate names the address that was dialled. A node that could have another's address certified could answer
# in its place. So two locks, each enough alone: this policy lets the node ask for exactly its own addresses, all of
# them, and the role ${node} certifies no others (allowed_ip_sans_cidr, which OpenBao has and HashiCorp Vault has not).
#
# Whoever holds a certificate and the token can run code on every Ray node, whatever its role: Ray is one domain of
# trust. Nothing in Ray's processes is worth having, and nothing here unwraps a lease's key.

path "pki-ray/sign/${node}" {
  capabilities       = ["update"]
  allowed_parameters = {
    "common_name" = ["${node}"]
    "ip_sans"     = ["${addresses}"]
    "csr"         = []
  }
  required_parameters = ["common_name", "ip_sans", "csr"]
}

path "kv-ray/data/token" {
  capabilities = ["read"]
}

path "auth/token/lookup-self" {
  capabilities = ["read"]
}
path "auth/token/revoke-self" {
  capabilities = ["update"]
}
