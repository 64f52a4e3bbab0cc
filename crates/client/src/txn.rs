//! Transactions over all primitives.
