# What a person of zone ${zone} may do in Vault: be looked up by the gateway, and log out.
# The policy's name, person-${zone}, is what makes a token one of this zone's people.

path "auth/token/lookup-self" {
  capabilities = ["read"]
}
path "auth/token/revoke-self" {
  capabilities = ["update"]
}
