//! Counters and sequences.
