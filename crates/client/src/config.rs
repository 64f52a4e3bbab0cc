//! Configuration with versions, followed and kept for a cold start.
