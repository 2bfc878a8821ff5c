"""How anything is read or written: folders, records, hashes."""
