"""The data owner's side: policy, shards, envelope, keys and ledger. Imports neither Ray nor CuPy."""
