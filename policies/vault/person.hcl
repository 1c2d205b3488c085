# What a person of zone ${zone} may do in Vault: be looked up by the gateway, log out, and read the public key of the
# zone's ledger, to check what the gateway signed.
# The policy's name, person-${zone}, is what makes a token one of this zone's people.

path "ledger/keys/${zone}" {
  capabilities = ["read"]
}

path "auth/token/lookup-self" {
  capabilities = ["read"]
}
path "auth/token/revoke-self" {
  capabilities = ["update"]
}
