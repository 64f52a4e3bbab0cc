//! Idempotency records: run something once per key, and get the first result again.
