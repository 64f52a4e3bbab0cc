//! Elections: leading, with the safe order of shutting down.
